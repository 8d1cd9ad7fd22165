//! A unit with tables, queues and devices set up by hand, for this module's own tests.

use super::{
    Config, Refusal, Requested, SmmuUnit, Wire,
    registers::{
        CMDQ_BASE, CMDQ_CONS, CMDQ_PROD, CMDQEN, CR0, CR0ACK, CR1, CR2, EVENTQ_BASE, EVENTQ_CONS,
        EVENTQ_PROD, EVENTQEN, GBPA, IRQ_CTRL, IRQ_CTRLACK, PRIQ_BASE, PRIQ_CONS, PRIQ_PROD, PRIQEN, SMMUEN,
        STRTAB_BASE, STRTAB_BASE_CFG,
    },
};
use crate::{
    golden_smmuv3 as golden,
    memory::{BASE, Memory},
};
use iommu::{Bus, GroupTag, Iova, PageRequest, Pasid, Perms, PhysAddr, StreamId};

/// The device that the bench's tables are for, as in the golden words.
pub(super) const DEVICE: StreamId = StreamId(0x108);
/// Its StreamID, as commands and tables hold it.
pub(super) const SID: u64 = 0x108;
/// The PASID that the bench's tables are for.
pub(super) const PASID: Pasid = Pasid::from_low_bits(5);
/// The VMID of what the bench attaches.
pub(super) const VMID: u64 = 0x2A;
/// An address that nothing is mapped at until a test does so; its table indices are all different.
pub(super) const IOVA: Iova = Iova(0x2B5A_D3E7_9000);
/// The same for stage 2, in the second of its two tables side by side.
pub(super) const IPA: Iova = Iova(0xB5_AD3E_7000);

/// Where the bench's pages are; everything after `FREE` is handed out. The stream table is the first.
pub(super) const STREAMS: u64 = BASE.0;
/// The context descriptors of [`DEVICE`].
pub(super) const CONTEXTS: u64 = BASE.0 + 0x8000;
/// The command queue, 2^8 entries.
pub(super) const COMMANDS: u64 = BASE.0 + 0x9000;
/// The event queue, 2^3 entries.
pub(super) const EVENTS: u64 = BASE.0 + 0xA000;
/// The page request queue, 2^3 entries.
pub(super) const REQUESTS: u64 = BASE.0 + 0xB000;
/// The top stage-1 table, of level 0.
pub(super) const STAGE_1: u64 = BASE.0 + 0xC000;
/// Both top stage-2 tables, of level 1.
pub(super) const STAGE_2: u64 = BASE.0 + 0xE000;
const FREE: u64 = BASE.0 + 0x1_0000;
const END: u64 = BASE.0 + 0x4_0000;

/// CMD_SYNC.
pub(super) const SYNC: [u64; 2] = golden::SYNC;
/// A stage-1 page that unprivileged accesses may read and write, of one ASID.
pub(super) const PAGE: u64 = golden::STAGE_1_PAGE & !0x8000_0000;
/// A stage-2 page that may be read and written.
pub(super) const PAGE_2: u64 = golden::STAGE_2_PAGE & !0x8000_0000;

/// The unit, and what was put into its memory.
pub(super) struct Bench {
    pub(super) unit: SmmuUnit,
    memory: Memory,
    next: u64,
}

/// Stage 1 with `log2` context descriptors; EATS 1 if the unit has ATS.
pub(super) fn stage_1(config: &Config, log2: u64) -> [u64; 8] {
    let eats = if config.ats() { 1 << 28 } else { 0 };
    let [w0, w1, ..] = golden::STE_STAGE_1;
    // Without a PASID, the context with index 0 counts.
    let default = if log2 == 0 { 0 } else { 2 };
    [w0 & 0xF | CONTEXTS | log2 << 59, w1 & 0xFF | default | eats, VMID, 0, 0, 0, 0, 0]
}

/// Stage 2, as in the golden words; SHCFG if the unit has it.
pub(super) fn stage_2(config: &Config) -> [u64; 8] {
    let eats = if config.ats() { 1 << 28 } else { 0 };
    let reserved = if config.idr1 & 1 << 27 == 0 { 3 << 44 } else { 0 };
    let [w0, w1, w2, ..] = golden::STE_STAGE_2;
    [w0, w1 & !reserved | eats, w2, STAGE_2, 0, 0, 0, 0]
}

/// The context descriptor of the golden words, with the bench's table and ASID `asid`.
pub(super) fn context(asid: u64) -> [u64; 8] {
    let [w0, _, _, mair, ..] = golden::CD;
    [w0 & !(0xFFFF << 48) | asid << 48, STAGE_1, 0, mair, 0, 0, 0, 0]
}

impl Bench {
    /// A unit after reset in front of memory that is zero.
    pub(super) fn new(config: Config) -> Self {
        let memory = Memory::new(((END - BASE.0) / 8 + 512) as usize);
        for at in (BASE.0..END).step_by(8) {
            memory.device_store(PhysAddr(at), 0).expect("inside");
        }
        Self { unit: SmmuUnit::new(memory.clone(), config), memory, next: FREE }
    }

    /// A unit in service, whose stream table is empty.
    pub(super) fn started(config: Config) -> Self {
        let bench = Self::new(config);
        let unit = &bench.unit;
        unit.plug(DEVICE);
        unit.write32(GBPA, golden::GBPA_ABORT as u32);
        while unit.read32(GBPA) != 0x0010_1000 {}
        unit.write32(CR1, golden::CR1 as u32);
        unit.write32(CR2, 2);
        unit.write64(STRTAB_BASE, 1 << 62 | STREAMS);
        unit.write32(STRTAB_BASE_CFG, 9);
        unit.write64(CMDQ_BASE, 1 << 62 | COMMANDS | 8);
        unit.write64(EVENTQ_BASE, 1 << 62 | EVENTS | 3);
        for index in [CMDQ_PROD, CMDQ_CONS, EVENTQ_PROD, EVENTQ_CONS] {
            unit.write32(index, 0);
        }
        bench.enable(CMDQEN);
        bench.submit(&[golden::CFGI_ALL, SYNC, golden::TLBI_NSNH_ALL, SYNC]);
        bench.enable(EVENTQEN);
        let mut interrupts = 1 | 4;
        if config.pri() {
            unit.write64(PRIQ_BASE, 1 << 62 | REQUESTS | 3);
            unit.write32(PRIQ_PROD, 0);
            unit.write32(PRIQ_CONS, 0);
            bench.enable(PRIQEN);
            interrupts |= 2;
        }
        if config.ats() {
            bench.enable(super::registers::ATSCHK);
        }
        unit.write32(IRQ_CTRL, interrupts);
        while unit.read32(IRQ_CTRLACK) != interrupts {}
        bench.enable(SMMUEN);
        bench
    }

    /// A unit in service, with `ste` for [`DEVICE`] and a context for no PASID and for [`PASID`].
    pub(super) fn attached(config: Config, ste: [u64; 8]) -> Self {
        let bench = Self::started(config);
        bench.put(CONTEXTS, &context(1));
        bench.put(CONTEXTS + u64::from(PASID.value()) * 64, &context(2));
        bench.set_ste(ste);
        bench
    }

    /// Clears or sets an enable of CR0, and polls CR0ACK until it is acknowledged.
    pub(super) fn switch(&self, enable: u64, on: bool) {
        let enable = enable as u32;
        let old = self.unit.read32(CR0);
        self.unit.write32(CR0, if on { old | enable } else { old & !enable });
        for _ in 0..100 {
            if (self.unit.read32(CR0ACK) & enable != 0) == on {
                return;
            }
        }
        panic!("CR0 bit {enable:#x} was not acknowledged");
    }

    pub(super) fn enable(&self, enable: u64) {
        self.switch(enable, true);
    }

    /// Puts `commands` into the queue and tells the unit.
    pub(super) fn submit(&self, commands: &[[u64; 2]]) {
        let mut prod = self.unit.read32(CMDQ_PROD);
        for words in commands {
            self.put(COMMANDS + u64::from(prod & 0xFF) * 16, words);
            prod = (prod + 1) & 0x1FF;
        }
        self.unit.write32(CMDQ_PROD, prod);
    }

    /// Replaces the STE of [`DEVICE`], and makes the unit forget the one before.
    pub(super) fn set_ste(&self, ste: [u64; 8]) {
        self.put(STREAMS + SID * 64, &ste);
        self.submit(&[golden::CFGI_STE, SYNC]);
    }

    pub(super) fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// Asserts that no rule was broken.
    pub(super) fn assert_lawful(&self) {
        assert_eq!(self.unit.violations(), [""; 0]);
    }

    /// Asserts that exactly one rule was broken, one whose text contains `words`.
    pub(super) fn assert_broken(&self, words: &str) {
        let broken = self.unit.violations();
        assert!(broken.len() == 1 && broken[0].contains(words), "{broken:?} is not {words:?}");
    }

    /// A page of its own, zero.
    pub(super) fn page(&mut self) -> u64 {
        self.next += 0x1000;
        assert!(self.next <= END, "the bench's memory is used up");
        self.next - 0x1000
    }

    /// Stores `words` at `address`, for the unit to see.
    pub(super) fn put(&self, address: u64, words: &[u64]) {
        for (at, &word) in (address..).step_by(8).zip(words) {
            self.memory.device_store(PhysAddr(at), word).expect("inside");
        }
    }

    /// The word at `address` as the unit sees it.
    pub(super) fn word(&self, address: u64) -> u64 {
        self.memory.device_load(PhysAddr(address)).expect("inside")
    }

    /// Maps `address` below `root`, a table of level `start`, by `leaf` at `level`. Returns where the leaf is.
    pub(super) fn map(&mut self, root: u64, start: u32, address: u64, level: u32, leaf: u64) -> u64 {
        let mut table = root;
        for at in start..=3 {
            let shift = 39 - at * 9;
            let index = if at == start { address >> shift } else { address >> shift & 0x1FF };
            let entry = table + index * 8;
            if at == level {
                self.put(entry, &[leaf]);
                return entry;
            }
            if self.word(entry) == 0 {
                let next = self.page();
                self.put(entry, &[next | 3]);
            }
            table = self.word(entry) & 0x0000_FFFF_FFFF_F000;
        }
        panic!("level {level} is none of {start} to 3");
    }

    /// Maps a new page at [`IOVA`], with what `PAGE` or so says. Returns where the leaf and the page are.
    pub(super) fn map_page(&mut self, attributes: u64) -> (u64, u64) {
        let page = self.page();
        (self.map(STAGE_1, 0, IOVA.0, 3, page | attributes), page)
    }

    /// Maps a new page at [`IPA`] in stage 2. Returns where the leaf and the page are.
    pub(super) fn map_page_2(&mut self, attributes: u64) -> (u64, u64) {
        let page = self.page();
        (self.map(STAGE_2, 1, IPA.0, 3, page | attributes), page)
    }

    /// [`DEVICE`] reads a word, without a PASID.
    pub(super) fn read(&self, iova: Iova) -> Result<u64, Refusal> {
        let bytes = self.unit.dma_read(DEVICE, None, iova, 8)?;
        Ok(bytes.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte)))
    }

    /// [`DEVICE`] writes a word, without a PASID.
    pub(super) fn write(&self, iova: Iova, value: u64) -> Result<(), Refusal> {
        self.unit.dma_write(DEVICE, None, iova, &value.to_le_bytes())
    }

    /// Takes the oldest event.
    pub(super) fn take_event(&self) -> Option<[u64; 4]> {
        let (prod, cons) = (self.unit.read32(EVENTQ_PROD), self.unit.read32(EVENTQ_CONS));
        if (prod ^ cons) & 0xF == 0 {
            return None;
        }
        let at = EVENTS + u64::from(cons & 7) * 32;
        let words = [0, 8, 16, 24].map(|word| self.word(at + word));
        self.unit.write32(EVENTQ_CONS, cons & 1 << 31 | (cons + 1) & 0xF);
        Some(words)
    }

    /// Asserts that exactly these events were recorded since the last look.
    pub(super) fn assert_events(&self, expected: &[[u64; 4]]) {
        let events: Vec<_> = std::iter::from_fn(|| self.take_event()).collect();
        assert_eq!(events, expected, "{events:#x?}");
    }

    /// Takes the pulses on the wires.
    pub(super) fn pulses(&self) -> Vec<Wire> {
        self.unit.pulses()
    }

    /// [`DEVICE`] asks for a page, as the last of group `index`.
    pub(super) fn page_request(&self, index: u16) -> Requested {
        self.unit.page_request(page_request(index, true))
    }
}

/// A request of [`DEVICE`] for a page, with [`PASID`].
pub(super) fn page_request(index: u16, last: bool) -> PageRequest {
    PageRequest {
        stream: DEVICE,
        tag: GroupTag { pasid: Some(PASID), index },
        iova: IOVA,
        perms: Perms::READ_WRITE,
        last,
    }
}
