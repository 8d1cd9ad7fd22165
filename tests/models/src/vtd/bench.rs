//! A unit with tables, queues and devices set up by hand, for this module's own tests.

use super::{
    Config, VtdUnit,
    registers::{CAP, FECTL, FSTS, GCMD, GSTS, IECTL, IQA, IQT, PECTL, PQA, PQH, PQT, QIE, RTADDR, SRTP, TE},
};
use crate::{
    golden,
    memory::{BASE, Memory},
};
use iommu::{Bus, GroupTag, Iova, Message, PageRequest, Pasid, Perms, PhysAddr, StreamId};

/// The device that the bench's tables are for: 00:04.0.
pub(super) const DEVICE: StreamId = StreamId(0x20);
/// The PASID that the bench's tables are for.
pub(super) const PASID: Pasid = Pasid::from_low_bits(5);
/// The domain of what the bench attaches.
pub(super) const DID: u64 = 6;
/// An address that nothing is mapped at until a test does so; its table indices are all different.
pub(super) const IOVA: Iova = Iova(0x2B5A_D3E7_9000);

/// Where the bench's pages are; everything after `FREE` is handed out.
const ROOT: u64 = BASE.0;
const CONTEXT: u64 = BASE.0 + 0x1000;
/// The PASID directory.
pub(super) const DIRECTORY: u64 = BASE.0 + 0x2000;
const PASIDS: u64 = BASE.0 + 0x3000;
/// The top first-stage table.
pub(super) const FIRST_STAGE: u64 = BASE.0 + 0x4000;
/// The invalidation queue.
pub(super) const QUEUE: u64 = BASE.0 + 0x5000;
/// The page request queue.
pub(super) const REQUESTS: u64 = BASE.0 + 0x6000;
/// A page for the status of waits.
pub(super) const STATUS: u64 = BASE.0 + 0x7000;
const FREE: u64 = BASE.0 + 0x8000;
const END: u64 = BASE.0 + 0x4_0000;

/// The unit, and what was put into its memory.
pub(super) struct Bench {
    pub(super) unit: VtdUnit,
    memory: Memory,
    next: u64,
}

impl Bench {
    /// A unit after reset in front of memory that is zero.
    pub(super) fn new(config: Config) -> Self {
        let memory = Memory::new(((END - BASE.0) / 8) as usize);
        for at in (BASE.0..END).step_by(8) {
            memory.device_store(PhysAddr(at), 0).expect("inside");
        }
        Self { unit: VtdUnit::new(memory.clone(), config), memory, next: FREE }
    }

    /// A unit that translates in scalable mode: [`DEVICE`] with [`PASID`] and without goes through `entry`.
    pub(super) fn scalable(config: Config, entry: [u64; 8]) -> Self {
        let bench = Self::new(config);
        bench.put(ROOT, &[CONTEXT | 1, 0]);
        bench.put(CONTEXT + 0x20 * 32, &at_page(golden::SCALABLE_CONTEXT, 0, DIRECTORY));
        bench.put(DIRECTORY, &at_page([golden::PASID_DIRECTORY], 0, PASIDS));
        bench.set_pasid_entry(PASID.value(), entry);
        bench.set_pasid_entry(0, entry);
        bench.start(ROOT | golden::RTADDR_SCALABLE & 0xC00, QUEUE | golden::IQA_256_BITS & 0xFFF);
        bench
    }

    /// A unit that translates in legacy mode: [`DEVICE`] goes through the context entry `context`.
    pub(super) fn legacy(config: Config, context: [u64; 2]) -> Self {
        let bench = Self::new(config);
        bench.put(ROOT, &[CONTEXT | 1, 0]);
        bench.set_legacy_context(context);
        bench.start(ROOT, QUEUE);
        bench
    }

    /// Sets the root table, turns on the invalidation queue, the page request queue, messages and translation.
    fn start(&self, rtaddr: u64, iqa: u64) {
        self.unit.plug(DEVICE);
        self.unit.write64(RTADDR, rtaddr);
        self.command(SRTP, true);
        self.unit.write64(IQT, 0);
        self.unit.write64(IQA, iqa);
        self.command(QIE, true);
        for (at, vector) in [(FECTL, 0x40), (IECTL, 0x41), (PECTL, 0x42)] {
            self.unit.write32(at + 4, vector);
            self.unit.write32(at + 8, 0xFEE0_0000);
            self.unit.write32(at + 12, 0);
            self.unit.write32(at, 0);
        }
        self.unit.write64(PQH, 0);
        self.unit.write64(PQT, 0);
        self.unit.write64(PQA, REQUESTS);
        self.command(TE, true);
    }

    /// Writes one change of GCMD and polls GSTS until it is acknowledged.
    pub(super) fn command(&self, bit: u32, on: bool) {
        let levels = self.unit.read32(GSTS) & 0x96FF_FFFF;
        self.unit.write32(GCMD, if on { levels | bit } else { levels & !bit });
        for _ in 0..100 {
            if (self.unit.read32(GSTS) & bit != 0) == on {
                return;
            }
        }
        panic!("GCMD bit {bit:#x} was not acknowledged");
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

    pub(super) fn set_pasid_entry(&self, pasid: u32, entry: [u64; 8]) {
        self.put(PASIDS + u64::from(pasid) * 64, &entry);
    }

    pub(super) fn set_context(&self, entry: [u64; 4]) {
        self.put(CONTEXT + 0x20 * 32, &at_page(entry, 0, DIRECTORY));
    }

    pub(super) fn set_legacy_context(&self, entry: [u64; 2]) {
        self.put(CONTEXT + 0x20 * 16, &entry);
    }

    /// Puts `entry` at `offset` in a context table for `bus`.
    pub(super) fn set_context_on_bus(&mut self, bus: u64, offset: u64, entry: &[u64]) {
        let table = self.page();
        self.put(ROOT + bus * 16, &[table | 1, 0]);
        self.put(table + offset, entry);
    }

    /// Makes the lower context table of `bus` the upper one, and the other way round.
    pub(super) fn swap_root_halves(&self, bus: u64) {
        let at = ROOT + bus * 16;
        self.put(at, &[self.word(at + 8), self.word(at)]);
    }

    pub(super) fn set_directory(&self, entry: u64) {
        self.put(DIRECTORY, &[entry]);
    }

    pub(super) fn set_root(&self, entry: [u64; 2]) {
        self.put(ROOT, &entry);
    }

    /// Sets RTADDR by GCMD.SRTP, with translation off meanwhile.
    pub(super) fn replace_root(&self, rtaddr: u64) {
        self.command(TE, false);
        self.unit.write64(RTADDR, rtaddr);
        self.unit.write32(GCMD, QIE | SRTP);
        self.unit.advance(0);
        self.unit.advance(0);
        self.unit.advance(0);
        self.command(TE, true);
    }

    /// Makes `entry` the entry at `level` for `iova` under the table `root`, with tables of `bits` above. Returns where.
    pub(super) fn map(
        &mut self,
        root: u64,
        levels: u32,
        iova: u64,
        level: u32,
        bits: u64,
        entry: u64,
    ) -> u64 {
        let mut table = root;
        for above in (level + 1..=levels).rev() {
            let at = table + (iova >> (3 + 9 * above) & 0x1FF) * 8;
            if self.word(at) == 0 {
                let next = self.page();
                self.put(at, &[next | bits]);
            }
            table = self.word(at) & 0x000F_FFFF_FFFF_F000;
        }
        let at = table + (iova >> (3 + 9 * level) & 0x1FF) * 8;
        self.put(at, &[entry]);
        at
    }

    /// Maps [`IOVA`] to a page of its own in [`FIRST_STAGE`], with the leaf's low bits `bits`. Returns leaf and page.
    pub(super) fn map_page(&mut self, bits: u64) -> (u64, u64) {
        let page = self.page();
        (self.map(FIRST_STAGE, 4, IOVA.0, 1, 7, page | bits), page)
    }

    /// Puts `descriptors` at the tail of the 256-bit invalidation queue and writes IQT.
    pub(super) fn submit(&self, descriptors: &[[u64; 4]]) {
        let mut tail = self.unit.read64(IQT);
        for words in descriptors {
            self.put(QUEUE + tail, words);
            tail = (tail + 32) % 4096;
        }
        self.unit.write64(IQT, tail);
    }

    /// The device reads 8 bytes with [`PASID`].
    pub(super) fn read(&self, iova: Iova) -> Result<u64, super::Refusal> {
        let bytes = self.unit.dma_read(DEVICE, Some(PASID), iova, 8)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight")))
    }

    /// The device writes 8 bytes with [`PASID`].
    pub(super) fn write(&self, iova: Iova, value: u64) -> Result<(), super::Refusal> {
        self.unit.dma_write(DEVICE, Some(PASID), iova, &value.to_le_bytes())
    }

    /// The device sends group `index`'s last page request, a read of [`IOVA`].
    pub(super) fn page_request(&self, index: u16) -> super::Requested {
        self.unit.page_request(page_request(index, true))
    }

    /// Fault record `index`, wherever CAP puts it.
    pub(super) fn fault(&self, index: usize) -> [u64; 2] {
        let at = super::registers::fault_record(self.unit.read64(CAP), index);
        [self.unit.read64(at), self.unit.read64(at + 8)]
    }

    /// FR of fault record 0, which is cleared.
    pub(super) fn take_fault(&self) -> u8 {
        let at = super::registers::fault_record(self.unit.read64(CAP), 0);
        let [_, record] = self.fault(0);
        assert!(record >> 63 != 0, "a fault was recorded");
        self.unit.write32(at + 12, 1 << 31);
        assert_eq!(self.unit.read32(FSTS), 0);
        (record >> 32) as u8
    }

    /// The data of the messages sent since the last call.
    pub(super) fn vectors(&self) -> Vec<u32> {
        let vector = |m: Message| (m.address == 0xFEE0_0000).then_some(m.data);
        self.unit.messages().into_iter().map(|m| vector(m).expect("the address that was set")).collect()
    }
}

/// A read of [`IOVA`] by [`DEVICE`] with [`PASID`] in group `index`.
pub(super) fn page_request(index: u16, last: bool) -> PageRequest {
    let tag = GroupTag { pasid: Some(PASID), index };
    PageRequest { stream: DEVICE, tag, iova: IOVA, perms: Perms::READ, last }
}

/// A PASID table entry for first-stage tables at `root`, in [`DID`].
pub(super) fn first_stage(root: u64) -> [u64; 8] {
    let [w0, _, w2, ..] = golden::PASID_FIRST_STAGE;
    // Of word 2 only WPE (bit 4): SRE needs ECAP.SRS.
    [w0, DID, w2 & 0x10 | root, 0, 0, 0, 0, 0]
}

/// `words` with the page pointer of word `at` replaced.
pub(super) fn at_page<const N: usize>(mut words: [u64; N], at: usize, page: u64) -> [u64; N] {
    words[at] = words[at] & 0xFFF | page;
    words
}
