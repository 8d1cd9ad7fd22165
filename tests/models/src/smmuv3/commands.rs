//! The command queue: commands are consumed in order from CMDQ_CONS to CMDQ_PROD.

use super::{
    Pace, SmmuUnit, State, Wire,
    caches::{Forget, Of, Pages, Span},
    registers::{CMDQ, CMDQ_CONS, CMDQ_ERR, CMDQ_PROD, CMDQEN, SMMUEN},
};
use iommu::{PhysAddr, StreamId};

/// CMDQ_CONS.ERR: why a command was not consumed.
#[derive(Clone, Copy)]
enum CommandError {
    Illegal = 1,
    Abort = 2,
    DeviceTlbSync = 3,
}

/// The bits that a command may set, by opcode, in both words. SSec is one of them because it has a rule of its own.
const FIELDS: [(u64, u64, u64); 18] = [
    (0x01, SID | SSID | SSV | SSEC, 0),
    (0x02, SID | SSID | SSV | SSEC, ADDRESS | 1 << 11 | 0x3FF),
    (0x03, SID | SSEC, 1),
    (0x04, SID | SSEC, 0x1F),
    (0x05, SID | SSID | SSEC, 1),
    (0x06, SID | SSEC, 0),
    (0x10, VMID, 0),
    (0x11, VMID | ASID, 0),
    (0x12, VMID | ASID | RANGE, ADDRESS | PAGES),
    (0x13, VMID | RANGE, ADDRESS | PAGES),
    (0x28, VMID, 0),
    (0x2A, VMID | RANGE, ADDRESS & ((1 << 56) - 1) | PAGES),
    (0x30, 0, 0),
    (0x40, SID | SSID | SSV | 1 << 9, ADDRESS | 0x3F),
    (0x41, SID | SSID | SSV, 3 << 12 | 0x1FF),
    (0x44, SID | SSEC | 3 << 12, 0xFFFF),
    (0x45, SID | SSEC, 0),
    // CS, MSH, MSIAttr, MSIData; MSIAddress.
    (0x46, 3 << 12 | 0x3F << 22 | SID, (1 << 56) - (1 << 2)),
];

const SID: u64 = 0xFFFF_FFFF << 32;
const SSID: u64 = 0xF_FFFF << 12;
const SSV: u64 = 1 << 11;
const SSEC: u64 = 1 << 10;
const VMID: u64 = 0xFFFF << 32;
const ASID: u64 = 0xFFFF << 48;
/// NUM and SCALE.
const RANGE: u64 = 0x1F << 12 | 0x1F << 20;
/// TG, TTL and Leaf.
const PAGES: u64 = 0xF << 8 | 1;
const ADDRESS: u64 = !0xFFF;

/// The command queue's inside.
#[derive(Default)]
pub(super) struct Commands {
    /// Consumed, oldest first.
    executed: Vec<[u64; 2]>,
    /// Looks of the driver so far, for [`Pace::OneIn`].
    looks: u32,
    /// Nothing is consumed by itself.
    paused: bool,
    /// Reads of the queue are aborted.
    unreadable: bool,
    /// What commands promised since the last CMD_SYNC.
    promised: Vec<Forget>,
    /// CMD_ATC_INV that no device answered yet, and when the device is given up.
    unanswered: Vec<(Forget, u64)>,
    /// Messages of CMD_SYNC are not written before they have to be: when the next CMD_SYNC is complete.
    late: bool,
    /// Those on their way, address and data.
    messages: Vec<(u64, u32)>,
    /// Events that were sent to the cores.
    wakes: u64,
}

impl SmmuUnit {
    /// Stops consuming commands.
    pub fn pause(&self) {
        let mut state = self.lock();
        state.config.pace = Pace::AtOnce;
        state.commands.paused = true;
    }

    /// Consumes nothing, whatever its pace; or gets on again at that.
    pub fn stand_still(&self, stand: bool) {
        self.lock().commands.paused = stand;
    }

    /// Consumes up to `count` commands of a paused unit, and returns how many.
    pub fn execute(&self, count: usize) -> usize {
        let mut state = self.lock();
        let mut done = 0;
        while done < count && state.consume() {
            done += 1;
        }
        done
    }

    /// Lets a paused unit work by itself again.
    pub fn resume(&self) {
        let mut state = self.lock();
        state.config.pace = Pace::AtOnce;
        state.commands.paused = false;
        state.run_commands();
    }

    /// Lets each read of the command queue be aborted, or none.
    pub fn fail_fetches(&self, fail: bool) {
        self.lock().commands.unreadable = fail;
    }

    /// Lets the message of a CMD_SYNC take as long as it may, which is until the next CMD_SYNC is complete; or not any more.
    pub fn hold_messages(&self, hold: bool) {
        let mut state = self.lock();
        state.commands.late = hold;
        if !hold {
            state.write_messages();
        }
    }

    /// Returns how many events, as by the instruction SEV, the unit has sent to the cores.
    pub fn wakes(&self) -> u64 {
        self.lock().commands.wakes
    }

    /// Returns the commands that were consumed, oldest first.
    pub fn executed(&self) -> Vec<[u64; 2]> {
        let mut state = self.lock();
        state.catch_up();
        state.commands.executed.clone()
    }

    /// Plugs in the function `stream`, whose device TLB answers CMD_ATC_INV; those of any other are never answered.
    pub fn plug(&self, stream: StreamId) {
        self.lock().plugged.insert(stream.0);
    }

    /// Pulls the function out: its device TLB is gone, and it answers nothing.
    pub fn unplug(&self, stream: StreamId) {
        let mut state = self.lock();
        state.plugged.remove(&stream.0);
        state.caches.forget_device(stream.0);
    }

    /// Lets the device put off its answers to CMD_ATC_INV, until it is released or times out.
    pub fn hold_device_tlb(&self, stream: StreamId) {
        self.lock().holding.insert(stream.0);
    }

    /// Lets the device answer what it put off, and from now on at once.
    pub fn release_device_tlb(&self, stream: StreamId) {
        let mut state = self.lock();
        state.holding.remove(&stream.0);
        if !state.plugged.contains(&stream.0) {
            return;
        }
        let of_device = |forget: &Forget| matches!(forget, Forget::Device { sid, .. } if *sid == stream.0);
        let (answered, rest) = std::mem::take(&mut state.commands.unanswered)
            .into_iter()
            .partition::<Vec<_>, _>(|(forget, _)| of_device(forget));
        state.commands.unanswered = rest;
        state.commands.promised.extend(answered.into_iter().map(|(forget, _)| forget));
        state.run_commands();
    }
}

impl State {
    /// Consumes commands as far as it goes, unless paused.
    pub(super) fn run_commands(&mut self) {
        while !self.commands.paused && self.config.pace == Pace::AtOnce && self.consume() {}
    }

    /// The driver looked at something: a slow unit may have got on.
    pub(super) fn looked(&mut self) {
        let Pace::OneIn(looks) = self.config.pace else { return };
        if self.commands.paused {
            return;
        }
        self.commands.looks = self.commands.looks.wrapping_add(1);
        if self.commands.looks.is_multiple_of(looks) {
            self.consume();
        }
    }

    /// A slow unit gets as far as it can.
    pub(super) fn catch_up(&mut self) {
        while self.config.pace != Pace::AtOnce && !self.commands.paused && self.consume() {}
    }

    /// Consumes one command. Returns whether there was one that could be.
    fn consume(&mut self) -> bool {
        let (prod, cons) = (self.get(CMDQ_PROD), self.get(CMDQ_CONS));
        let pointer = cons & 0xF_FFFF;
        if !self.on(CMDQEN) || self.active(CMDQ_ERR) || self.used(CMDQ, prod, pointer) == 0 {
            return false;
        }
        let done = self.fetch(pointer).and_then(|words| {
            self.check(words)?;
            Ok(self.carry_out(words)?.then_some(words))
        });
        match done {
            Ok(Some(words)) => {
                self.commands.executed.push(words);
                // ERR is unknown while no error is active; the model leaves it as it was.
                self.set(CMDQ_CONS, cons & !0xF_FFFF | self.next(CMDQ, pointer));
                true
            }
            Ok(None) => false,
            Err(error) => {
                self.set(CMDQ_CONS, pointer | (error as u64) << 24);
                self.raise(CMDQ_ERR);
                false
            }
        }
    }

    fn fetch(&self, pointer: u64) -> Result<[u64; 2], CommandError> {
        if self.commands.unreadable {
            return Err(CommandError::Abort);
        }
        let at = self.entry(CMDQ, pointer);
        let load = |at| self.memory.device_load(PhysAddr(at)).map_err(|_| CommandError::Abort);
        Ok([load(at)?, load(at + 8)?])
    }

    /// CERROR_ILL: everything that the queue rejects, whatever the state of the unit.
    fn check(&self, [w0, w1]: [u64; 2]) -> Result<(), CommandError> {
        let legal = |holds: bool| if holds { Ok(()) } else { Err(CommandError::Illegal) };
        let opcode = w0 & 0xFF;
        let Some(&(_, fields0, fields1)) = FIELDS.iter().find(|known| known.0 == opcode) else {
            return Err(CommandError::Illegal);
        };
        let config = &self.config;
        legal(match opcode {
            0x05 | 0x06 | 0x10..=0x13 => config.stage_1(),
            0x28 | 0x2A => config.stage_2(),
            0x40 => config.ats(),
            0x41 => config.pri(),
            0x44 | 0x45 => config.stalls(),
            _ => true,
        })?;
        legal(w0 & !(fields0 | 0xFF) | w1 & !fields1 == 0)?;
        legal(!(fields0 & SSEC != 0 && w0 & SSEC != 0))?;
        match opcode {
            0x12 | 0x13 | 0x2A => {
                let (num, scale) = (w0 >> 12 & 0x1F, w0 >> 20 & 0x1F);
                let (granule, level) = (w1 >> 10 & 3, level_hint(w1));
                // Without a granule, or without ranges at all, the rest of the range is reserved.
                let ranges = config.idr3 & 1 << 10 != 0;
                if granule == 0 || !ranges {
                    legal(num | scale | w1 >> 8 & 3 == 0 && (granule == 0 || ranges))
                } else {
                    legal(num | scale != 0 || level != 0)
                }
            }
            0x40 => legal(w1 & 0x3F <= 52),
            0x41 => legal(w1 >> 12 & 3 != 3),
            0x46 => legal(w0 >> 12 & 3 != 3),
            _ => Ok(()),
        }
    }

    /// Carries out a command that is legal. Returns false if it is not complete.
    fn carry_out(&mut self, [w0, w1]: [u64; 2]) -> Result<bool, CommandError> {
        let sid = (w0 >> 32) as u32;
        let ssid = (w0 >> 12) as u32 & 0xF_FFFF;
        let vmid = if self.config.stage_2() { (w0 >> 32) as u16 } else { 0 };
        let asid = (w0 >> 48) as u16;
        let everything = |of| Forget::Translations { of, pages: Pages::ALL };
        let promise = match w0 & 0xFF {
            0x03 => Forget::Streams { sids: sid..=sid, leaf: w1 & 1 != 0 },
            0x04 => {
                let range = w1 & 0x1F;
                let below = if range == 31 { u32::MAX } else { (2u32 << range) - 1 };
                Forget::Streams { sids: sid & !below..=sid | below, leaf: false }
            }
            0x05 => Forget::Contexts { sid, ssid: Some(ssid), leaf: w1 & 1 != 0 },
            0x06 => Forget::Contexts { sid, ssid: None, leaf: false },
            0x10 => everything(Of::Stage1(vmid)),
            0x11 => everything(Of::Asid(vmid, asid)),
            0x12 => self.pages(Of::AsidAndGlobal(vmid, asid), w0, w1),
            0x13 => self.pages(Of::Stage1(vmid), w0, w1),
            0x28 => everything(Of::Vmid(vmid)),
            0x2A => self.pages(Of::Stage2(vmid), w0, w1),
            0x30 => everything(Of::All),
            0x40 => {
                if self.on(SMMUEN) {
                    let ssid = self.pasid(w0);
                    self.invalidate_device_tlb(sid, ssid, w0 & 1 << 9 != 0, w1);
                }
                return Ok(true);
            }
            0x41 => {
                if self.on(SMMUEN) {
                    let ssid = self.pasid(w0);
                    self.page_response(sid, ssid, w1);
                }
                return Ok(true);
            }
            0x44 => {
                self.resume_stall(sid, w1 as u16, w0);
                return Ok(true);
            }
            0x45 => {
                self.terminate_stalls(sid);
                return Ok(true);
            }
            0x46 => return self.sync(w0, w1),
            // Prefetches are hints.
            _ => return Ok(true),
        };
        self.commands.promised.push(promise);
        Ok(true)
    }

    /// NH_VA, NH_VAA, S2_IPA: one address, or with TG the range that NUM and SCALE give.
    fn pages(&mut self, of: Of, w0: u64, w1: u64) -> Forget {
        let leaves_only = w1 & 1 != 0;
        let (granule, level) = (w1 >> 10 & 3, level_hint(w1));
        let address = w1 & ADDRESS;
        if granule == 0 {
            let pages = Pages { span: Span::aligned(address, 12), leaves_only, level: None };
            return Forget::Translations { of, pages };
        }
        let shift = [0, 12, 14, 16][granule as usize];
        let count = ((w0 >> 12 & 0x1F) + 1) << (w0 >> 20 & 0x1F);
        let alignment = match (granule, level) {
            (1, 1) => 30,
            (1, 2) => 21,
            (2, 2) => 25,
            (3, 1) => 42,
            (3, 2) => 29,
            _ => shift,
        };
        if address & ((1 << alignment) - 1) != 0 {
            self.violation(format!(
                "TLBI range at {address:#x}: not aligned to level {level} of granule code {granule}"
            ));
        }
        let last = address.saturating_add((count << shift) - 1);
        let level = if level == 0 { None } else { Some(level as u32) };
        // Translations of another granule may stay, and all that the model makes have 4 KiB.
        let of_granule = if granule == 1 { level } else { Some(u32::MAX) };
        let leaves_only = leaves_only || granule != 1;
        let pages = Pages { span: Span { first: address, last }, leaves_only, level: of_granule };
        Forget::Translations { of, pages }
    }

    /// The PASID that a command to a device carries.
    fn pasid(&mut self, w0: u64) -> Option<u32> {
        if w0 & SSV == 0 {
            return None;
        }
        if self.config.idr1 >> 6 & 0x1F == 0 {
            self.violation(format!("command {w0:#x}: SSV without substreams (IDR1.SSIDSIZE=0)"));
        }
        Some((w0 >> 12) as u32 & 0xF_FFFF)
    }

    /// ATC_INV. For a device that is not there, or puts it off, it stays unanswered.
    fn invalidate_device_tlb(&mut self, sid: u32, ssid: Option<u32>, global: bool, w1: u64) {
        let log2 = 12 + (w1 & 0x3F) as u32;
        let span = Span::aligned(w1 & ADDRESS, log2);
        // Global is about mappings that all PASIDs share.
        let ssid = if global { None } else { ssid };
        let forget = Forget::Device { sid, ssid, span };
        if self.plugged.contains(&sid) && !self.holding.contains(&sid) {
            self.commands.promised.push(forget);
        } else {
            let deadline_us = self.clock_us.saturating_add(self.config.device_tlb_timeout_us);
            self.commands.unanswered.push((forget, deadline_us));
        }
    }

    /// SYNC: complete once all that was promised before is true.
    fn sync(&mut self, w0: u64, w1: u64) -> Result<bool, CommandError> {
        let now = self.clock_us;
        let waiting = self.commands.unanswered.len();
        self.commands.unanswered.retain(|&(_, deadline_us)| deadline_us > now);
        if self.commands.unanswered.len() < waiting {
            return Err(CommandError::DeviceTlbSync);
        }
        if waiting != 0 {
            return Ok(false);
        }
        let promised = std::mem::take(&mut self.commands.promised);
        self.caches.forget(&promised);
        // Those of earlier ones are complete when this one is.
        self.write_messages();
        if w0 >> 12 & 3 == 1 {
            if self.config.messages() && w1 != 0 {
                // MSH and MSIAttr: memory is read through caches, which only what is inner shareable write-back meets.
                let cached = self.config.has(4) && w0 >> 22 & 0x3F == 0x3F;
                if !cached && self.memory.device_load(PhysAddr(w1 & !7)).is_ok() {
                    self.violation(format!("CMD_SYNC {w0:#x}: its message to memory passes by the caches"));
                }
                // MSIAddress, MSIData.
                self.commands.messages.push((w1, (w0 >> 32) as u32));
                if !self.commands.late {
                    self.write_messages();
                }
            }
            self.pulses.push(Wire::CommandSync);
        }
        if w0 >> 12 & 3 == 2 {
            if self.config.wakes() {
                self.commands.wakes += 1;
            } else {
                // No error: the unit does as if none were asked for. Whoever asks may wait for it, though.
                self.violation(format!("CMD_SYNC {w0:#x}: asks for an event without IDR0.SEV"));
            }
        }
        Ok(true)
    }

    /// Writes the messages of CMD_SYNC that are on their way, or has them aborted: MSI_CMDQ_ABT_ERR.
    fn write_messages(&mut self) {
        for (address, data) in std::mem::take(&mut self.commands.messages) {
            if !self.lose_messages {
                // What is not memory is a doorbell somewhere.
                let _ = self.memory.device_store32(PhysAddr(address), data);
            }
            self.send(address, data, 1 << 4);
        }
    }
}

/// TTL; level 1 of the 16 KiB granule has no blocks, so it acts as no hint.
fn level_hint(w1: u64) -> u64 {
    let level = w1 >> 8 & 3;
    if w1 >> 10 & 3 == 2 && level == 1 { 0 } else { level }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config, Refusal, Wire,
        bench::{Bench, COMMANDS, DEVICE, IOVA, PAGE, PASID, SYNC, VMID, context, stage_1, stage_2},
        registers::{CMDQ_BASE, GERROR, GERRORN},
    };
    use super::*;
    use crate::golden_smmuv3 as golden;
    use iommu::{Bus, Iova};

    /// The commands that bring-up sent.
    const BEFORE: usize = 4;

    /// What [`golden`] words say, for the bench's first context instead: VMID 0x2A and ASID 1.
    fn of_asid(words: [u64; 2]) -> [u64; 2] {
        [words[0] & !(0xFFFF << 48) | 1 << 48, words[1]]
    }

    /// TLBI by address, of one page.
    fn of_page(words: [u64; 2], address: u64) -> [u64; 2] {
        [words[0], words[1] & 0xFFF | address]
    }

    fn error(bench: &Bench) -> Option<u32> {
        let active = bench.unit.read32(GERROR) ^ bench.unit.read32(GERRORN);
        (active & 1 != 0).then(|| bench.unit.read32(CMDQ_CONS) >> 24)
    }

    /// [`DEVICE`] with one stage-1 page, which was read and then unmapped. Returns where the leaf was.
    fn stale() -> (Bench, u64) {
        let config = Config::full();
        let mut bench = Bench::attached(config, stage_1(&config, 3));
        let (leaf, _) = bench.map_page(PAGE);
        bench.read(IOVA).expect("mapped");
        bench.put(leaf, &[0]);
        (bench, leaf)
    }

    #[test]
    fn golden_commands_are_executed_as_they_are() {
        let full = Config::full();
        let config = Config { idr0: full.idr0 | 1 << 14, ..full };
        let bench = Bench::attached(config, golden::STE_ABORT);
        bench.submit(&[golden::PREFETCH_CONFIG, golden::STALL_TERM]);
        let before = bench.unit.executed().len();
        let commands = [
            golden::PREFETCH_ADDR,
            golden::CFGI_STE,
            golden::CFGI_STE_RANGE,
            golden::CFGI_ALL,
            golden::CFGI_CD,
            golden::CFGI_CD_ALL,
            golden::TLBI_NH_ALL,
            golden::TLBI_NH_ASID,
            golden::TLBI_NH_VA,
            golden::TLBI_NH_VA_512,
            golden::TLBI_NH_VA_5,
            golden::TLBI_NH_VAA,
            golden::TLBI_S12_VMALL,
            golden::TLBI_S2_IPA,
            golden::TLBI_S2_IPA_1G,
            golden::TLBI_NSNH_ALL,
            golden::ATC_INV_16K,
            golden::ATC_INV_ALL,
            golden::ATC_INV_PASID,
            golden::ATC_INV_GLOBAL,
            golden::SYNC,
            golden::SYNC_ATTRIBUTES,
            golden::SYNC_SEV,
            golden::SYNC_IRQ,
        ];

        bench.submit(&commands);

        assert_eq!(bench.unit.executed()[before..], commands);
        assert_eq!(error(&bench), None);
        assert_eq!(bench.pulses(), [Wire::CommandSync]);
        assert_eq!(bench.unit.wakes(), 1);
        bench.assert_lawful();
    }

    #[test]
    fn an_event_is_sent_where_there_are_events_and_once_all_before_is_done() {
        for (sev, events) in [(1 << 14, 1), (0, 0)] {
            let full = Config::full();
            let bench = Bench::attached(Config { idr0: full.idr0 | sev, ..full }, golden::STE_ABORT);
            bench.unit.hold_device_tlb(DEVICE);

            bench.submit(&[golden::ATC_INV_ALL, golden::SYNC_SEV]);
            assert_eq!(bench.unit.wakes(), 0);
            bench.unit.release_device_tlb(DEVICE);

            assert_eq!((bench.unit.wakes(), error(&bench)), (events, None));
            match sev {
                0 => bench.assert_broken("without IDR0.SEV"),
                _ => bench.assert_lawful(),
            }
        }
    }

    #[test]
    fn what_is_no_command_is_illegal() {
        let full = Config::full();
        let no_ranges = Config { idr3: full.idr3 & !(1 << 10), ..full };
        let stage_1_only = Config { idr0: full.idr0 & !1, ..full };
        let stage_2_only = Config { idr0: full.idr0 & !2, ..full };
        for (config, words) in [
            (full, [0, 0]),
            (full, [0x81, 0]),
            (full, golden::CFGI_VMS_PIDM),
            (full, golden::TLBI_EL2_ALL),
            (full, golden::TLBI_EL2_ASID),
            (full, golden::TLBI_EL2_VA),
            (full, golden::TLBI_EL2_VAA),
            (full, golden::SYNC_RESERVED),
            (full, golden::CFGI_STE_SECURE),
            (full, golden::TLBI_NH_VA_EMPTY_RANGE),
            (full, [golden::CFGI_ALL[0] | 1 << 11, golden::CFGI_ALL[1]]),
            (full, [golden::SYNC[0], 1]),
            (full, [golden::TLBI_NH_VA[0] | 1 << 20, golden::TLBI_NH_VA[1]]),
            (full, [golden::ATC_INV_ALL[0], 53]),
            (full, [golden::PRI_RESP_FAILURE[0], 3 << 12]),
            (no_ranges, golden::TLBI_NH_VA_512),
            (stage_1_only, golden::TLBI_S12_VMALL),
            (stage_1_only, golden::TLBI_S2_IPA),
            (stage_2_only, golden::TLBI_NH_ALL),
            (stage_2_only, golden::CFGI_CD),
            (Config::qemu(), golden::ATC_INV_ALL),
            (Config::qemu(), golden::PRI_RESP_SUCCESS),
            (Config::qemu(), golden::RESUME_RETRY),
            (Config::qemu(), golden::STALL_TERM),
        ] {
            let bench = Bench::started(config);

            bench.submit(&[words]);

            assert_eq!(error(&bench), Some(1), "{words:x?}");
            assert_eq!(bench.unit.read32(CMDQ_CONS) & 0xFFFFF, BEFORE as u32);
            assert_eq!(bench.pulses(), [Wire::Error]);
        }
    }

    #[test]
    fn a_command_queue_goes_on_where_it_stopped() {
        let bench = Bench::started(Config::qemu());

        bench.submit(&[[0, 0], golden::CFGI_ALL]);
        assert_eq!(bench.unit.executed().len(), BEFORE);
        bench.put(COMMANDS + 4 * 16, &SYNC);
        bench.unit.write32(GERRORN, bench.unit.read32(GERROR));

        assert_eq!(bench.unit.executed()[BEFORE..], [SYNC, golden::CFGI_ALL]);
        bench.submit(&[[0, 0]]);
        assert_eq!((error(&bench), bench.unit.read32(GERROR)), (Some(1), 0));
        bench.assert_lawful();
    }

    #[test]
    fn a_queue_without_memory_is_aborted() {
        let bench = Bench::new(Config::qemu());
        bench.unit.write64(CMDQ_BASE, 8);
        bench.enable(CMDQEN);

        bench.unit.write32(CMDQ_PROD, 1);

        assert_eq!(error(&bench), Some(2));
    }

    #[test]
    fn a_unit_that_stands_still_consumes_nothing_until_it_gets_on() {
        for pace in [Pace::AtOnce, Pace::OneIn(3)] {
            let bench = Bench::started(Config { pace, ..Config::full() });
            let before = bench.unit.executed().len();
            bench.unit.stand_still(true);

            bench.submit(&[SYNC, SYNC]);
            for _ in 0..20 {
                bench.unit.read32(CMDQ_CONS);
            }
            assert_eq!(bench.unit.executed().len(), before, "{pace:?}");
            bench.unit.stand_still(false);

            for _ in 0..7 {
                bench.unit.read32(CMDQ_CONS);
            }
            assert_eq!(bench.unit.read32(CMDQ_CONS), bench.unit.read32(CMDQ_PROD), "{pace:?}");
            bench.assert_lawful();
        }
    }

    #[test]
    fn a_paused_unit_consumes_what_it_is_told_to() {
        let bench = Bench::started(Config::qemu());
        bench.unit.pause();

        bench.submit(&[golden::CFGI_ALL, SYNC, SYNC]);
        assert_eq!(bench.unit.read32(CMDQ_CONS), BEFORE as u32);
        assert_eq!(bench.unit.execute(2), 2);
        assert_eq!(bench.unit.read32(CMDQ_CONS), BEFORE as u32 + 2);
        bench.unit.resume();

        assert_eq!(bench.unit.read32(CMDQ_CONS), BEFORE as u32 + 3);
        assert_eq!(bench.unit.execute(1), 0);
    }

    #[test]
    fn the_queue_wraps() {
        let bench = Bench::started(Config::qemu());

        for _ in 0..600 {
            bench.submit(&[SYNC]);
        }

        assert_eq!(bench.unit.executed().len(), BEFORE + 600);
        assert_eq!(bench.unit.read32(CMDQ_CONS), (BEFORE as u32 + 600) % 512);
        bench.assert_lawful();
    }

    #[test]
    fn an_invalidation_is_done_when_a_sync_is() {
        let (bench, _) = stale();

        bench.submit(&[golden::TLBI_NH_ALL]);
        assert!(bench.read(IOVA).is_ok());
        bench.submit(&[SYNC]);

        assert_eq!(bench.read(IOVA), Err(Refusal::Fault(0x10)));
    }

    #[test]
    fn an_invalidation_drops_what_it_names() {
        let other_page = Iova(IOVA.0 ^ 0x1000).0;
        let va = of_asid(golden::TLBI_NH_VA);
        let range = |pages: u64, level: u64, address: u64| {
            let num = (pages - 1) << 12;
            [golden::TLBI_NH_VA[0] & 0xFF | num | VMID << 32 | 1 << 48, address | 1 << 10 | level << 8 | 1]
        };
        for (words, dropped) in [
            (golden::TLBI_NSNH_ALL, true),
            (golden::TLBI_S12_VMALL, true),
            (golden::TLBI_NH_ALL, true),
            (of_asid(golden::TLBI_NH_ASID), true),
            (of_page(va, IOVA.0), true),
            (of_page(golden::TLBI_NH_VAA, IOVA.0), true),
            (range(2, 3, IOVA.0 - 0x1000), true),
            (range(2, 0, IOVA.0), true),
            (range(2, 2, IOVA.0 & !0x1F_FFFF), false),
            (range(2, 3, IOVA.0 + 0x1000), false),
            (range(1, 3, IOVA.0 - 0x1000), false),
            ([range(1, 3, IOVA.0)[0], IOVA.0 & !0x3FFF | 2 << 10 | 3 << 8 | 1], false),
            (of_page(va, other_page), false),
            (of_page(golden::TLBI_NH_VA, IOVA.0), false),
            (golden::TLBI_NH_ASID, false),
            ([golden::TLBI_NH_ALL[0] ^ 1 << 32, 0], false),
            ([golden::TLBI_S12_VMALL[0] ^ 1 << 32, 0], false),
            (of_page(golden::TLBI_S2_IPA, IOVA.0), false),
            (golden::CFGI_ALL, false),
        ] {
            let (bench, _) = stale();

            bench.submit(&[words, SYNC]);

            assert_eq!(bench.read(IOVA).is_err(), dropped, "{words:x?}");
            assert_eq!(error(&bench), None, "{words:x?}");
        }
    }

    #[test]
    fn a_range_that_is_not_aligned_to_its_level_is_noted() {
        let bench = Bench::started(Config::qemu());
        let [w0, w1] = golden::TLBI_S2_IPA_1G;

        bench.submit(&[[w0, w1 | 0x1000], SYNC]);

        bench.assert_broken("not aligned");
    }

    #[test]
    fn leaf_invalidations_keep_the_way_to_the_leaf() {
        for (leaf_only, stale) in [(1, true), (0, false)] {
            let config = Config::qemu();
            let mut bench = Bench::attached(config, stage_1(&config, 0));
            let (_, page) = bench.map_page(PAGE);
            bench.read(IOVA).expect("mapped");
            let table = bench.page();
            // The last table is replaced by one that maps nothing.
            let way = bench.map(super::super::bench::STAGE_1, 0, IOVA.0, 2, table | 3);
            assert_eq!(bench.word(way), table | 3);

            let [w0, _] = of_asid(golden::TLBI_NH_VA);
            bench.submit(&[[w0, IOVA.0 | leaf_only], SYNC]);

            assert_eq!(bench.read(IOVA).is_ok(), stale, "page {page:#x}");
        }
    }

    #[test]
    fn a_global_translation_is_dropped_by_address_and_not_by_asid() {
        let config = Config::qemu();
        let mut bench = Bench::attached(config, stage_1(&config, 0));
        let (leaf, _) = bench.map_page(PAGE & !(1 << 11));
        bench.read(IOVA).expect("mapped");
        bench.put(leaf, &[0]);

        bench.submit(&[of_asid(golden::TLBI_NH_ASID), SYNC]);
        assert!(bench.read(IOVA).is_ok());
        bench.submit(&[of_page(golden::TLBI_NH_VA, IOVA.0), SYNC]);

        assert!(bench.read(IOVA).is_err());
    }

    #[test]
    fn configuration_is_dropped_by_the_commands_for_it() {
        let of_range = |sid: u64, range: u64| [golden::CFGI_STE_RANGE[0] & 0xFF | sid << 32, range];
        for (words, dropped) in [
            (golden::CFGI_STE, true),
            (golden::CFGI_ALL, true),
            (golden::CFGI_STE_RANGE, true),
            (of_range(0x10F, 3), true),
            (of_range(0x110, 3), false),
            ([golden::CFGI_STE[0] ^ 1 << 32, 1], false),
            (golden::CFGI_CD_ALL, false),
            (golden::TLBI_NSNH_ALL, false),
        ] {
            let bench = Bench::attached(Config::qemu(), golden::STE_ABORT);
            assert_eq!(bench.read(IOVA), Err(Refusal::Aborted));
            bench.put(super::super::bench::STREAMS + 0x108 * 64, &golden::STE_BYPASS);

            bench.submit(&[words, SYNC]);

            let expected = if dropped { Err(Refusal::Fault(0x11)) } else { Err(Refusal::Aborted) };
            assert_eq!(bench.read(IOVA), expected, "{words:x?}");
        }
    }

    #[test]
    fn contexts_are_dropped_by_the_commands_for_them() {
        for (words, dropped) in [
            (golden::CFGI_CD, true),
            (golden::CFGI_CD_ALL, true),
            (golden::CFGI_STE, true),
            (golden::CFGI_ALL, true),
            ([golden::CFGI_CD[0] ^ 1 << 12, 1], false),
            ([golden::CFGI_CD_ALL[0] ^ 1 << 32, 0], false),
        ] {
            let config = Config::full();
            let mut bench = Bench::attached(config, stage_1(&config, 3));
            bench.map_page(PAGE);
            let read = |bench: &Bench| bench.unit.dma_read(DEVICE, Some(PASID), IOVA, 1);
            read(&bench).expect("mapped");
            let [w0, ..] = context(2);
            bench.put(super::super::bench::CONTEXTS + 5 * 64, &[w0 & !(1 << 31)]);

            bench.submit(&[words, SYNC]);

            assert_eq!(read(&bench) == Err(Refusal::Fault(0x0A)), dropped, "{words:x?}");
        }
    }

    #[test]
    fn a_sync_says_by_message_that_it_is_complete() {
        let bench = Bench::started(Config { idr0: Config::qemu().idr0 | 1 << 13, ..Config::qemu() });

        bench.submit(&[golden::SYNC_IRQ]);
        // K37: 0xCAFE to 0x8010_3F40.
        assert_eq!(bench.unit.messages(), [(0x8010_3F40, 0xCAFE)]);
        bench.unit.fail_messages(true);
        bench.submit(&[golden::SYNC_IRQ]);

        assert_eq!((bench.unit.messages(), bench.unit.read32(GERROR)), (vec![], 1 << 4));
        bench.assert_lawful();
    }

    #[test]
    fn a_message_may_be_late_until_the_next_sync() {
        let bench = Bench::started(Config { idr0: Config::qemu().idr0 | 1 << 13, ..Config::qemu() });
        bench.unit.hold_messages(true);

        bench.submit(&[golden::SYNC_IRQ]);
        assert_eq!(bench.unit.messages(), []);
        bench.submit(&[golden::CFGI_ALL]);
        assert_eq!(bench.unit.messages(), []);
        bench.submit(&[SYNC]);

        assert_eq!(bench.unit.messages(), [(0x8010_3F40, 0xCAFE)]);
    }

    #[test]
    fn a_message_to_memory_is_written_there_and_not_past_the_caches() {
        // Write-back and inner shareable; Device-nGnRE; write-back and not shareable.
        for (attributes, lawful) in [(0x3F, true), (1 << 2, false), (0xF << 2, false)] {
            let mut bench = Bench::started(Config { idr0: Config::qemu().idr0 | 1 << 13, ..Config::qemu() });
            let word = bench.page();

            bench.submit(&[[0xCAFE << 32 | attributes << 22 | 1 << 12 | 0x46, word]]);

            assert_eq!(bench.word(word), 0xCAFE);
            if lawful {
                bench.assert_lawful();
            } else {
                bench.assert_broken("passes by the caches");
            }
        }
    }

    #[test]
    fn a_sync_waits_for_devices() {
        let (bench, _) = stale();
        bench.unit.hold_device_tlb(DEVICE);

        bench.submit(&[golden::ATC_INV_ALL, SYNC, golden::CFGI_ALL]);
        let waiting = bench.unit.executed().len();
        assert_eq!(bench.unit.executed().last(), Some(&golden::ATC_INV_ALL));
        bench.unit.release_device_tlb(DEVICE);

        assert_eq!(bench.unit.executed()[waiting..], [SYNC, golden::CFGI_ALL]);
        assert_eq!(error(&bench), None);
    }

    #[test]
    fn a_device_that_does_not_answer_fails_the_sync() {
        let (bench, _) = stale();
        bench.unit.unplug(DEVICE);

        bench.submit(&[golden::ATC_INV_ALL, SYNC]);
        assert_eq!(error(&bench), None);
        bench.unit.advance(50_000);

        assert_eq!(error(&bench), Some(3));
        assert_eq!(bench.unit.executed().last(), Some(&golden::ATC_INV_ALL));
        bench.unit.write32(GERRORN, 1);
        assert_eq!(bench.unit.executed().last(), Some(&SYNC));
        bench.assert_lawful();
    }

    #[test]
    fn commands_to_devices_are_ignored_while_the_unit_is_off() {
        let bench = Bench::started(Config::full());
        bench.switch(SMMUEN, false);

        bench.submit(&[[golden::ATC_INV_ALL[0] ^ 1 << 32, 52], golden::PRI_RESP_SUCCESS, SYNC]);

        assert_eq!(bench.unit.executed().last(), Some(&SYNC));
        bench.assert_lawful();
    }

    #[test]
    fn a_pasid_without_substreams_is_noted() {
        let full = Config::full();
        let config = Config { idr1: full.idr1 & !(0x1F << 6), ..full };
        let bench = Bench::started(config);

        bench.submit(&[golden::ATC_INV_PASID, SYNC]);

        bench.assert_broken("without substreams");
    }

    #[test]
    fn stage_2_is_dropped_by_its_own_commands() {
        let config = Config::qemu();
        let mut bench = Bench::attached(config, stage_2(&config));
        let (leaf, _) = bench.map_page_2(super::super::bench::PAGE_2);
        let ipa = super::super::bench::IPA;
        bench.read(ipa).expect("mapped");
        bench.put(leaf, &[0]);

        bench.submit(&[of_page(golden::TLBI_NH_VAA, ipa.0), golden::TLBI_NH_ALL, SYNC]);
        assert!(bench.read(ipa).is_ok());
        bench.submit(&[of_page(golden::TLBI_S2_IPA, ipa.0), SYNC]);

        assert_eq!(bench.read(ipa), Err(Refusal::Fault(0x10)));
        bench.assert_lawful();
    }
    #[test]
    fn commands_may_be_taken_back_while_an_error_is_active() {
        let bench = Bench::started(Config::qemu());
        bench.submit(&[[0, 0], golden::CFGI_ALL]);

        bench.unit.write32(CMDQ_PROD, BEFORE as u32);
        bench.unit.write32(GERRORN, 1);
        bench.submit(&[SYNC]);

        assert_eq!(bench.unit.executed()[BEFORE..], [SYNC]);
        bench.assert_lawful();
    }
}
