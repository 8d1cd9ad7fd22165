//! Queued invalidation: descriptors are fetched in order from IQH to IQT, and executed.

use super::{
    Pace, State, VtdUnit,
    caches::Span,
    device::sid,
    faults::Group,
    registers::{FSTS, IQA, IQERCD, IQH, IQT, QIE, matches_sid},
};
use iommu::{PhysAddr, StreamId};
use std::collections::VecDeque;

/// FSTS.IQE: a descriptor, or the tail, was wrong.
const IQE: u64 = 1 << 4;
/// FSTS.ICE: a device completed an invalidation that nobody asked for.
const ICE: u64 = 1 << 5;
/// FSTS.ITE: a device did not complete an invalidation in time.
const ITE: u64 = 1 << 6;

/// IQERCD.IQEI: what was wrong.
#[derive(Clone, Copy)]
enum QueueError {
    InvalidTail = 1,
    Fetch = 2,
    InvalidType = 3,
    ReservedField = 4,
    InvalidWidth = 5,
    MisalignedTail = 6,
    InvalidMode = 7,
}

/// The reserved bits of words 0 and 1, by descriptor type. Words 2 and 3 are reserved for all of them.
const RESERVED: [(u64, u64, u64); 9] = [
    (1, 0xFFFC_0000_0000_F1C0, u64::MAX),
    (2, 0xFFFF_FFFF_0000_F100, 0xF80),
    (3, 0x000F_0000_FFE0_01F0, 0xFFE),
    (4, 0xFFFF_0000_07FF_F1E0, u64::MAX),
    (5, 0x0000_0000_FFFF_F100, 0x3),
    (6, 0xFFF0_0000_0000_F1C0, 0xF80),
    (7, 0xFFF0_0000_0000_F1C0, u64::MAX),
    (8, 0x0000_0000_0000_0000, 0x7FE),
    (9, 0xFFF0_0000_0000_01E0, 0xFFFF_FFFF_FFFF_F003),
];

/// The invalidation queue's inside.
#[derive(Default)]
pub(super) struct Queue {
    /// Fetched, and not executed yet.
    fetched: VecDeque<[u64; 4]>,
    /// Executed, oldest first.
    executed: Vec<[u64; 4]>,
    /// Looks of the driver so far, for [`Pace::OneIn`].
    looks: u32,
    /// How far fetching may run ahead while nothing is executed; `None` while the unit works by itself.
    paused: Option<usize>,
    /// Fetching stopped for IQE, and no tail was written since IQE was cleared.
    halted: bool,
    /// Numbers device-TLB invalidations and waits in their order.
    sequence: u64,
    /// Device-TLB invalidations that no device answered yet.
    unanswered: Vec<Unanswered>,
    /// Waits for device-TLB invalidations before them.
    waits: VecDeque<Wait>,
    /// Waits that ITE aborted.
    aborted: usize,
    /// The queue's memory cannot be read.
    lost: bool,
}

/// A device-TLB invalidation on its way.
struct Unanswered {
    sequence: u64,
    sid: u16,
    pasid: Option<u32>,
    span: Span,
    /// When the device is given up.
    deadline_us: u64,
}

/// An invalidation wait that is not complete.
struct Wait {
    sequence: u64,
    words: [u64; 4],
}

impl Wait {
    /// FN: what follows is not started before this wait is complete.
    fn fences(&self) -> bool {
        self.words[0] & 1 << 6 != 0
    }
}

impl VtdUnit {
    /// Stops executing invalidation descriptors. Up to `ahead` are still fetched, so that IQH passes them undone.
    pub fn pause(&self, ahead: usize) {
        let mut state = self.lock();
        state.config.pace = Pace::AtOnce;
        state.queue.paused = Some(ahead);
        state.run_queue();
    }

    /// Executes up to `count` descriptors of a paused unit, and returns how many.
    pub fn execute(&self, count: usize) -> usize {
        let mut state = self.lock();
        let mut done = 0;
        while done < count && state.execute_next() {
            done += 1;
        }
        state.run_queue();
        done
    }

    /// Lets a paused unit work by itself again.
    pub fn resume(&self) {
        let mut state = self.lock();
        state.config.pace = Pace::AtOnce;
        state.queue.paused = None;
        state.run_queue();
    }

    /// Returns the descriptors that were executed, oldest first; a wait is executed when it is complete.
    pub fn executed(&self) -> Vec<[u64; 4]> {
        let mut state = self.lock();
        state.catch_up();
        state.queue.executed.clone()
    }

    /// Returns how many waits ITE aborted: their status will not be written.
    pub fn aborted_waits(&self) -> usize {
        self.lock().queue.aborted
    }

    /// Plugs in the function `stream`, whose device TLB answers invalidations; those of any other are never answered.
    pub fn plug(&self, stream: StreamId) {
        self.plug_virtual(stream, stream);
    }

    /// Plugs in the virtual function `stream` of the physical function `physical`.
    pub fn plug_virtual(&self, stream: StreamId, physical: StreamId) {
        self.lock().plugged.insert(sid(stream), sid(physical));
    }

    /// Pulls the function out: its device TLB is gone, and it answers nothing.
    pub fn unplug(&self, stream: StreamId) {
        let mut state = self.lock();
        state.plugged.remove(&(sid(stream)));
        state.caches.forget_device(sid(stream), None, Span::ALL);
    }

    /// Lets the device put off its answers to device-TLB invalidations, until it is released or times out.
    pub fn hold_device_tlb(&self, stream: StreamId) {
        self.lock().holding.insert(sid(stream));
    }

    /// Lets the device answer what it put off, and from now on at once.
    pub fn release_device_tlb(&self, stream: StreamId) {
        let mut state = self.lock();
        let device = sid(stream);
        state.holding.remove(&device);
        if !state.plugged.contains_key(&device) {
            return;
        }
        let (answered, rest) =
            std::mem::take(&mut state.queue.unanswered).into_iter().partition(|u| u.sid == device);
        state.queue.unanswered = rest;
        let answered: Vec<Unanswered> = answered;
        for Unanswered { pasid, span, .. } in answered {
            state.caches.forget_device(device, pasid, span);
        }
        state.complete_waits();
        state.run_queue();
    }

    /// From now on the queue's memory cannot be read (IQEI 2), or can be again.
    pub fn lose_queue(&self, lost: bool) {
        self.lock().queue.lost = lost;
    }

    /// The device completes an invalidation that nobody asked for (FSTS.ICE).
    pub fn stray_completion(&self, stream: StreamId) {
        let mut state = self.lock();
        let codes = state.get(IQERCD) & !(0xFFFF << 48);
        state.set(IQERCD, codes | u64::from(sid(stream)) << 48);
        state.report(Group::Fault, ICE);
    }
}

impl State {
    /// Bytes of one descriptor, by IQA.DW.
    fn descriptor_bytes(&self) -> u64 {
        if self.get(IQA) & 1 << 11 != 0 { 32 } else { 16 }
    }

    /// Bytes of the queue, by IQA.QS.
    fn queue_bytes(&self) -> u64 {
        4096 << (self.get(IQA) & 7)
    }

    /// After a write to IQT.
    pub(super) fn tail_written(&mut self, old: u64) {
        let (size, head, tail) = (self.queue_bytes(), self.get(IQH), self.get(IQT));
        let ahead = |from: u64, to: u64| to.wrapping_sub(from) & (size - 1);
        // The tail moves forward only, and one entry stays free, so it never reaches or passes the head.
        if self.status() & QIE != 0 && ahead(head, old) + ahead(old, tail) >= size {
            self.violation(format!("IQT written as {tail:#x}: passes IQH {head:#x}, the queue was full"));
        }
        if self.get(FSTS) & IQE == 0 {
            self.queue.halted = false;
        }
        self.run_queue();
    }

    /// After FSTS was written: fetching goes on if no error is left.
    pub(super) fn errors_cleared(&mut self) {
        if self.get(FSTS) & IQE == 0 && !self.config.resumes_at_tail_write {
            self.queue.halted = false;
        }
        self.run_queue();
    }

    /// Whether the last descriptor was a wait.
    pub(super) fn ended_with_wait(&self) -> bool {
        self.queue.executed.last().is_some_and(|words| words[0] & 0xF == 5)
    }

    /// After QIE was cleared.
    pub(super) fn stop_queue(&mut self) {
        self.set(IQH, 0);
        self.queue.fetched.clear();
        self.queue.halted = false;
    }

    /// Fetches, and executes unless paused, as far as it goes.
    pub(super) fn run_queue(&mut self) {
        match self.queue.paused {
            None if self.config.pace != Pace::AtOnce => {}
            None => while self.execute_next() {},
            Some(ahead) => while self.queue.fetched.len() < ahead && self.fetch() {},
        }
    }

    /// The driver looked at something: a slow unit may have got on.
    pub(super) fn looked(&mut self) {
        let Pace::OneIn(looks) = self.config.pace else { return };
        self.queue.looks = self.queue.looks.wrapping_add(1);
        if self.queue.looks.is_multiple_of(looks) {
            self.execute_next();
        }
    }

    /// A slow unit gets as far as it can.
    pub(super) fn catch_up(&mut self) {
        while self.config.pace != Pace::AtOnce && self.execute_next() {}
    }

    /// Executes one descriptor. Returns whether there was one that could be started.
    fn execute_next(&mut self) -> bool {
        if self.queue.waits.iter().any(Wait::fences) || self.queue.fetched.is_empty() && !self.fetch() {
            return false;
        }
        let is_wait = |words: &[u64; 4]| words[0] & 0xF == 5;
        let mut at = 0;
        if self.config.reorders {
            while !self.queue.fetched.iter().any(is_wait) && self.fetch() {}
            let waits = self.queue.fetched.iter().position(is_wait).unwrap_or(self.queue.fetched.len());
            at = waits.saturating_sub(1);
        }
        let Some(words) = self.queue.fetched.remove(at) else { return false };
        self.execute(words);
        true
    }

    /// Fetches the descriptor at IQH. Returns whether there was one without an error.
    fn fetch(&mut self) -> bool {
        if self.gone || self.status() & QIE == 0 || self.queue.halted || self.get(FSTS) & (IQE | ITE) != 0 {
            return false;
        }
        let (head, tail, bytes) = (self.get(IQH), self.get(IQT), self.descriptor_bytes());
        if head == tail {
            return false;
        }
        match self.descriptor(head, tail, bytes) {
            Ok(words) => {
                self.queue.fetched.push_back(words);
                self.set(IQH, (head + bytes) % self.queue_bytes());
                true
            }
            Err(error) => {
                // IQH stays where it is.
                self.queue.halted = true;
                self.set(IQERCD, self.get(IQERCD) & !0xF | error as u64);
                self.report(Group::Fault, IQE);
                false
            }
        }
    }

    /// Reads and checks the descriptor at `head`.
    fn descriptor(&self, head: u64, tail: u64, bytes: u64) -> Result<[u64; 4], QueueError> {
        if tail >= self.queue_bytes() {
            return Err(QueueError::InvalidTail);
        }
        if !tail.is_multiple_of(bytes) {
            return Err(QueueError::MisalignedTail);
        }
        let mode = self.root >> 10 & 3;
        if mode == 1 && bytes != 32 {
            return Err(QueueError::InvalidWidth);
        }
        if self.queue.lost {
            return Err(QueueError::Fetch);
        }
        let mut words = [0; 4];
        for (word, at) in words.iter_mut().zip((0..bytes).step_by(8)) {
            let address = PhysAddr((self.get(IQA) & !0xFFF) + head + at);
            *word = self.memory.device_load(address).map_err(|_| QueueError::Fetch)?;
        }
        let kind = words[0] >> 5 & 0x70 | words[0] & 0xF;
        let Some(&(_, reserved0, reserved1)) = RESERVED.iter().find(|known| known.0 == kind) else {
            return Err(QueueError::InvalidType);
        };
        let ecap = self.config.ecap;
        let has = |bit: u32| ecap & 1 << bit != 0;
        let needed = match kind {
            3 => has(2),
            4 => has(3),
            6 | 7 => has(43),
            8 => has(43) && has(2),
            9 => has(43) && has(29),
            _ => true,
        };
        if !needed {
            return Err(QueueError::InvalidType);
        }
        if kind >= 6 && bytes != 32 {
            return Err(QueueError::InvalidWidth);
        }
        if kind >= 6 && mode != 1 {
            return Err(QueueError::InvalidMode);
        }
        // Wait.PD is reserved without page-request drain.
        let drain = if kind == 5 && !has(42) { 1 << 7 } else { 0 };
        if words[0] & (reserved0 | drain) | words[1] & reserved1 | words[2] | words[3] != 0 {
            return Err(QueueError::ReservedField);
        }
        let (granularity, am) = (words[0] >> 4 & 3, words[1] & 0x3F);
        let cap = self.config.cap;
        let supported = match kind {
            1 => granularity != 0,
            2 => match granularity {
                0 => false,
                3 => cap & 1 << 39 != 0 && am <= cap >> 48 & 0x3F,
                _ => true,
            },
            4 => words[0] >> 27 & 0x1F <= ecap >> 20 & 0xF,
            6 => granularity >= 2,
            7 => granularity != 2,
            _ => true,
        };
        if supported { Ok(words) } else { Err(QueueError::ReservedField) }
    }

    /// Whether `address` is in the queue.
    pub(super) fn in_queue(&self, address: PhysAddr) -> bool {
        let start = self.get(IQA) & !0xFFF;
        (start..start + self.queue_bytes()).contains(&address.0)
    }

    fn execute(&mut self, words: [u64; 4]) {
        let [w0, w1, ..] = words;
        // Whatever was stored before it is in memory before anything is forgotten.
        self.flush_write_buffer();
        let granularity = w0 >> 4 & 3;
        let (did, pasid) = ((w0 >> 16) as u16, (w0 >> 32) as u32 & 0xF_FFFF);
        match w0 & 0xF {
            1 => {
                let (sid, fm) = ((w0 >> 32) as u16, w0 >> 48 & 3);
                // In scalable mode contexts belong to no domain, so a device is named by its source-id alone.
                let scalable = self.root >> 10 & 3 == 1;
                self.caches.forget_contexts(|s, cached| match granularity {
                    1 => true,
                    2 => cached == did,
                    _ => matches_sid(s, sid, fm) && (scalable || cached == did),
                });
            }
            2 => {
                // `descriptor` has checked that the unit can.
                self.invalidate_iotlb(granularity, did, w1);
            }
            3 => self.invalidate_device_tlb(w0, (w0 >> 32) as u16, None, device_span(w1, w1 & 1 != 0)),
            4 => {
                let selected =
                    (words[0] & 1 << 4 != 0).then_some(((w0 >> 32) as u16, (w0 >> 27) as u32 & 0x1F));
                self.remapping.forget(selected);
            }
            5 => return self.wait(words),
            6 => {
                let span = if granularity == 3 { self.page_span(w1) } else { Span::ALL };
                let leaves_only = granularity == 3 && w1 & 1 << 6 != 0;
                self.caches.forget_translations(|tag| tag.is_of_pasid(did, pasid), span, leaves_only);
            }
            7 => self.caches.forget_pasids(|p, cached| match granularity {
                0 => cached == did,
                1 => cached == did && p == pasid,
                _ => true,
            }),
            8 => {
                let pasid = if w1 & 1 != 0 { None } else { Some(pasid) };
                self.invalidate_device_tlb(w0, did, pasid, device_span(w1, w1 & 1 << 11 != 0));
            }
            9 => self.page_group_response(w0, w1),
            // `descriptor` lets no other through.
            _ => {}
        }
        self.queue.executed.push(words);
    }

    /// Types 3 and 8. For a device that is not there, or puts it off, the invalidation stays unanswered.
    fn invalidate_device_tlb(&mut self, w0: u64, sid: u16, pasid: Option<u32>, span: Span) {
        let physical = (w0 >> 12 & 0xF | w0 >> 48 & 0xFFF0) as u16;
        let plugged = self.plugged.get(&sid).copied();
        if !self.config.throttles() {
            if physical != 0 {
                self.violation(format!(
                    "device-TLB invalidation of {sid:#06x}: PFSID is reserved without ECAP.DIT"
                ));
            }
        } else if plugged.is_some_and(|expected| expected != physical) {
            self.violation(format!(
                "device-TLB invalidation of {sid:#06x}: {physical:#06x} is not its PFSID"
            ));
        }
        if plugged.is_some() && !self.holding.contains(&sid) {
            return self.caches.forget_device(sid, pasid, span);
        }
        self.queue.sequence += 1;
        let deadline_us = self.clock_us.saturating_add(self.config.device_tlb_timeout_us);
        let sequence = self.queue.sequence;
        self.queue.unanswered.push(Unanswered { sequence, sid, pasid, span, deadline_us });
    }

    /// Type 5: complete once every device-TLB invalidation before it is.
    fn wait(&mut self, words: [u64; 4]) {
        self.queue.sequence += 1;
        self.queue.waits.push_back(Wait { sequence: self.queue.sequence, words });
        self.complete_waits();
    }

    fn complete_waits(&mut self) {
        loop {
            let first = self.queue.unanswered.iter().map(|u| u.sequence).min().unwrap_or(u64::MAX);
            match self.queue.waits.pop_front_if(|wait| wait.sequence < first) {
                Some(wait) => self.complete(wait.words),
                None => return,
            }
        }
    }

    fn complete(&mut self, words: [u64; 4]) {
        let w0 = words[0];
        if w0 & 1 << 7 != 0 {
            // PD: requests that are on their way arrive first.
            self.deliver_page_requests();
        }
        if w0 & 1 << 5 != 0 {
            let status = (w0 >> 32) as u32;
            if let Err(error) = self.memory.device_store32(PhysAddr(words[1]), status) {
                self.violation(format!("invalidation wait, STADDR: {error}"));
            }
        }
        self.queue.executed.push(words);
        if w0 & 1 << 4 != 0 {
            self.report(Group::Invalidation, 1);
        }
    }

    /// Gives up devices that did not answer in time: ITE, and every wait fetched so far is aborted.
    pub(super) fn expire_device_tlb_invalidations(&mut self) {
        let now = self.clock_us;
        let Some(at) = self.queue.unanswered.iter().position(|u| u.deadline_us <= now) else { return };
        let sid = self.queue.unanswered[at].sid;
        self.queue.unanswered.retain(|u| u.deadline_us > now);
        let is_wait = |words: &[u64; 4]| words[0] & 0xF == 5;
        let queued = self.queue.fetched.len();
        self.queue.fetched.retain(|words| !is_wait(words));
        self.queue.aborted += self.queue.waits.len() + queued - self.queue.fetched.len();
        self.queue.waits.clear();
        let named = if self.config.names_silent_devices { u64::from(sid) << 32 } else { 0 };
        self.set(IQERCD, self.get(IQERCD) & !(0xFFFF << 32) | named);
        self.report(Group::Fault, ITE);
        self.run_queue();
    }
}

/// Returns what ADDR and S of a device-TLB invalidation name: with S, each 1 bit from bit 12 upward doubles the size.
fn device_span(w1: u64, sized: bool) -> Span {
    let doublings = if sized { (w1 >> 12).trailing_ones() + 1 } else { 0 };
    Span::aligned(w1, 12 + doublings)
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config, Refusal,
        bench::{Bench, DEVICE, DID, FIRST_STAGE, IOVA, PASID, QUEUE, STATUS, first_stage},
        registers::{GCMD, ICS},
    };
    use super::*;
    use crate::golden;
    use iommu::{Bus, Iova};

    fn bench() -> Bench {
        Bench::scalable(Config::full(), first_stage(FIRST_STAGE))
    }

    /// A wait that writes `data` to `STATUS + offset`, with the flags `more` of word 0.
    fn wait(data: u64, offset: u64, more: u64) -> [u64; 4] {
        [data << 32 | 1 << 5 | more | 5, STATUS + offset, 0, 0]
    }

    /// A PASID-based device-TLB invalidation of everything that [`DEVICE`] holds for [`PASID`].
    fn device_tlb_all() -> [u64; 4] {
        let [w0, w1, ..] = golden::PASID_DEVICE_TLB_ALL;
        let pfsid = 2 << 52;
        [w0 & 0xF | pfsid | 0x20 << 16 | u64::from(PASID.value()) << 32, w1, 0, 0]
    }

    /// The error bits of FSTS.
    fn errors(bench: &Bench) -> u64 {
        u64::from(bench.unit.read32(FSTS)) & (IQE | ICE | ITE)
    }

    #[test]
    fn golden_descriptors_are_executed_as_they_are() {
        let bench = bench();
        bench.unit.plug_virtual(StreamId(0x108), StreamId(0x100));
        bench.unit.plug_virtual(StreamId(0xFA), StreamId(0xF9));
        bench.unit.plug(StreamId(0x200));
        let descriptors = [
            golden::CONTEXT_GLOBAL,
            golden::CONTEXT_DEVICE,
            golden::INTERRUPT_GLOBAL,
            golden::INTERRUPT_INDEX,
            // The largest IM that ECAP.MHMV allows, and the largest AM that CAP.MAMV allows.
            [15 << 27 | 1 << 4 | 4, 0, 0, 0],
            [3 << 4 | 2, 18, 0, 0],
            golden::WAIT_INTERRUPT,
            golden::WAIT_FENCE,
            golden::PASID_IOTLB_ALL,
            golden::PASID_IOTLB_PAGES,
            golden::PASID_CACHE_DOMAIN,
            golden::PASID_CACHE_PASID,
            golden::PASID_CACHE_GLOBAL,
            golden::PASID_DEVICE_TLB_PAGE,
            golden::PASID_DEVICE_TLB_ALL,
            golden::PASID_DEVICE_TLB_2M,
        ];

        bench.submit(&descriptors);

        assert_eq!(bench.unit.executed(), descriptors);
        assert_eq!(bench.unit.read64(IQH), 16 * 32);
        assert_eq!(errors(&bench), 0);
        bench.assert_lawful();
    }

    #[test]
    fn a_wait_writes_its_status_where_it_says() {
        let bench = bench();
        bench.put(STATUS, &[u64::MAX; 2]);
        let status = |golden: [u64; 4], at: u64| [golden[0], STATUS + at, 0, 0];

        bench.submit(&[status(golden::WAIT_STATUS, 4), status(golden::WAIT_DRAIN, 8)]);

        assert_eq!(bench.word(STATUS), 0x0000_0002_FFFF_FFFF);
        assert_eq!(bench.word(STATUS + 8), 0xFFFF_FFFF_0000_0001);
        bench.assert_lawful();
    }

    #[test]
    fn a_status_address_outside_memory_is_noted() {
        let bench = bench();

        bench.submit(&[golden::WAIT_STATUS]);

        bench.assert_broken("STADDR: 0x10000040");
    }

    #[test]
    fn a_wait_interrupts_once_until_it_is_acknowledged() {
        let bench = bench();

        bench.submit(&[golden::WAIT_INTERRUPT, golden::WAIT_INTERRUPT]);
        assert_eq!((bench.unit.read32(ICS), bench.vectors()), (1, vec![0x41]));
        bench.unit.write32(ICS, 1);
        assert_eq!(bench.unit.read32(ICS), 0);
        bench.submit(&[golden::WAIT_INTERRUPT]);

        assert_eq!(bench.vectors(), [0x41]);
    }

    #[test]
    fn narrow_descriptors_work_in_legacy_mode() {
        let bench = Bench::legacy(Config::qemu(), [0, 0]);
        let iotlb_domain = 0x42 << 16 | 1 << 7 | 1 << 6 | 2 << 4 | 2;
        bench.put(QUEUE, &[golden::CONTEXT_GLOBAL[0], 0, iotlb_domain, 0, golden::WAIT_FENCE[0], 0]);

        bench.unit.write64(IQT, 0x30);

        let executed = [golden::CONTEXT_GLOBAL, [iotlb_domain, 0, 0, 0], golden::WAIT_FENCE];
        assert_eq!(bench.unit.executed(), executed);
        bench.assert_lawful();
    }

    #[test]
    fn a_bad_descriptor_stops_the_queue_where_it_is() {
        let bad: &[([u64; 4], QueueError)] = &[
            ([0, 0, 0, 0], QueueError::InvalidType),
            ([0xA, 0, 0, 0], QueueError::InvalidType),
            ([1 << 9 | 5, 0, 0, 0], QueueError::InvalidType),
            ([golden::CONTEXT_GLOBAL[0] | 1 << 6, 0, 0, 0], QueueError::ReservedField),
            ([golden::CONTEXT_GLOBAL[0], 1, 0, 0], QueueError::ReservedField),
            ([golden::CONTEXT_GLOBAL[0], 0, 1, 0], QueueError::ReservedField),
            ([golden::CONTEXT_GLOBAL[0], 0, 0, 1 << 63], QueueError::ReservedField),
            ([1, 0, 0, 0], QueueError::ReservedField),
            ([2, 0, 0, 0], QueueError::ReservedField),
            ([2 | 3 << 4, 19, 0, 0], QueueError::ReservedField),
            ([2 | 1 << 4, 1 << 7, 0, 0], QueueError::ReservedField),
            ([3 | 1 << 21, 0, 0, 0], QueueError::ReservedField),
            ([3, 2, 0, 0], QueueError::ReservedField),
            ([4 | 1 << 5, 0, 0, 0], QueueError::ReservedField),
            ([4 | 16 << 27, 0, 0, 0], QueueError::ReservedField),
            ([golden::WAIT_FENCE[0] | 1 << 8, 0, 0, 0], QueueError::ReservedField),
            ([golden::WAIT_STATUS[0], STATUS | 2, 0, 0], QueueError::ReservedField),
            ([6 | 1 << 4, 0, 0, 0], QueueError::ReservedField),
            ([6 | 2 << 4 | 1 << 63, 0, 0, 0], QueueError::ReservedField),
            ([7 | 2 << 4, 0, 0, 0], QueueError::ReservedField),
            ([8, 1 << 10, 0, 0], QueueError::ReservedField),
            ([9 | 1 << 5, 0, 0, 0], QueueError::ReservedField),
            ([9, 1 << 12, 0, 0], QueueError::ReservedField),
        ];
        for &(words, error) in bad {
            let bench = bench();

            bench.submit(&[golden::WAIT_FENCE, words, golden::WAIT_INTERRUPT]);

            assert_eq!(errors(&bench), IQE, "{words:x?}");
            assert_eq!(bench.unit.read64(IQH), 32, "{words:x?}");
            assert_eq!(bench.unit.read64(IQERCD) & 0xF, error as u64, "{words:x?}");
            assert_eq!(bench.unit.executed(), [golden::WAIT_FENCE]);
            assert_eq!(bench.vectors(), [0x40]);
        }
    }

    /// A field of a descriptor, by its highest and lowest bit.
    type Field = (u32, u32);

    /// For each type, a descriptor that is right, and the fields that it has beside its type.
    const FIELDS: [([u64; 4], &[Field]); 9] = [
        (golden::CONTEXT_GLOBAL, &[(5, 4), (31, 16), (47, 32), (49, 48)]),
        ([1 << 4 | 2, 0, 0, 0], &[(5, 4), (6, 6), (7, 7), (31, 16), (69, 64), (70, 70), (127, 76)]),
        ([3, 0, 0, 0], &[(15, 12), (20, 16), (47, 32), (63, 52), (64, 64), (127, 76)]),
        (golden::INTERRUPT_GLOBAL, &[(4, 4), (31, 27), (47, 32)]),
        ([5, STATUS, 0, 0], &[(4, 4), (5, 5), (6, 6), (7, 7), (63, 32), (127, 66)]),
        (golden::PASID_IOTLB_ALL, &[(5, 4), (31, 16), (51, 32), (69, 64), (70, 70), (127, 76)]),
        (golden::PASID_CACHE_GLOBAL, &[(5, 4), (31, 16), (51, 32)]),
        (
            golden::PASID_DEVICE_TLB_ALL,
            &[(8, 4), (15, 12), (31, 16), (51, 32), (63, 52), (64, 64), (75, 75), (127, 76)],
        ),
        // 66 is LPIG of older units, which is ignored.
        (golden::PAGE_GROUP_RESPONSE, &[(4, 4), (15, 12), (31, 16), (51, 32), (66, 66), (75, 67)]),
    ];

    /// Submits `words` with `bit` changed, and returns whether that is an error, which is repaired.
    fn is_refused(bench: &Bench, mut words: [u64; 4], bit: u32) -> bool {
        words[(bit / 64) as usize] ^= 1 << (bit % 64);
        bench.submit(&[words]);
        if errors(bench) == 0 {
            return false;
        }
        bench.put(QUEUE + bench.unit.read64(IQH), &golden::CONTEXT_GLOBAL);
        bench.unit.write32(FSTS, IQE as u32);
        assert_eq!((errors(bench), bench.unit.read64(IQH)), (0, bench.unit.read64(IQT)));
        true
    }

    #[test]
    fn every_bit_outside_a_field_is_reserved() {
        let bench = bench();
        for (words, fields) in FIELDS {
            // Bits 3:0 and 11:9 are the type.
            let is_known = |bit| {
                bit < 4 || (9..12).contains(&bit) || fields.iter().any(|&(hi, lo)| (lo..=hi).contains(&bit))
            };
            for bit in (0..256).filter(|&bit| !is_known(bit)) {
                assert!(is_refused(&bench, words, bit), "type {} bit {bit}", words[0] & 0xF);
            }
        }
    }

    #[test]
    fn every_bit_of_an_address_or_identity_may_be_set() {
        let bench = bench();
        for (words, fields) in FIELDS {
            for bit in fields.iter().filter(|(hi, lo)| hi - lo >= 8).flat_map(|&(hi, lo)| lo..=hi) {
                assert!(!is_refused(&bench, words, bit), "type {} bit {bit}", words[0] & 0xF);
            }
        }
    }

    #[test]
    fn a_descriptor_needs_its_capability() {
        let without = |bit: u32| Config { ecap: Config::full().ecap & !(1 << bit), ..Config::full() };
        for (bit, words) in [
            (2, [3, 0, 0, 0]),
            (2, device_tlb_all()),
            (3, golden::INTERRUPT_GLOBAL),
            (42, golden::WAIT_DRAIN),
            (29, golden::PAGE_GROUP_RESPONSE),
        ] {
            let bench = Bench::scalable(without(bit), first_stage(FIRST_STAGE));

            bench.submit(&[words]);

            assert_eq!(errors(&bench), IQE, "{words:x?}");
        }
        let legacy = Bench::legacy(Config::qemu(), [0, 0]);
        legacy.put(QUEUE, &golden::PASID_IOTLB_ALL);
        legacy.unit.write64(IQT, 0x10);
        assert_eq!((errors(&legacy), legacy.unit.read64(IQERCD)), (IQE, 5));
    }

    #[test]
    fn scalable_mode_needs_wide_descriptors_and_pasids_need_scalable_mode() {
        let narrow = bench();
        narrow.command(QIE, false);
        narrow.unit.write64(IQT, 0);
        narrow.unit.write64(IQA, QUEUE);
        narrow.command(QIE, true);
        narrow.submit(&[golden::WAIT_FENCE]);
        assert_eq!((errors(&narrow), narrow.unit.read64(IQERCD)), (IQE, QueueError::InvalidWidth as u64));

        let legacy = Bench::legacy(Config::qemu(), [0, 0]);
        legacy.command(QIE, false);
        legacy.unit.write64(IQA, QUEUE | 1 << 11);
        legacy.command(QIE, true);
        legacy.submit(&[golden::PASID_CACHE_GLOBAL]);
        assert_eq!((errors(&legacy), legacy.unit.read64(IQERCD)), (IQE, QueueError::InvalidMode as u64));
    }

    #[test]
    fn a_tail_outside_the_queue_or_between_entries_is_an_error() {
        for (tail, error) in [(0x1000, QueueError::InvalidTail), (0x30, QueueError::MisalignedTail)] {
            let bench = bench();

            bench.unit.write64(IQT, tail);

            assert_eq!((errors(&bench), bench.unit.read64(IQERCD)), (IQE, error as u64));
            assert_eq!(bench.unit.read64(IQH), 0);
        }
    }

    #[test]
    fn a_repaired_queue_goes_on_at_once_or_at_the_next_tail() {
        for resumes_at_tail_write in [false, true] {
            let config = Config { resumes_at_tail_write, ..Config::full() };
            let bench = Bench::scalable(config, first_stage(FIRST_STAGE));
            bench.submit(&[[0; 4], golden::WAIT_FENCE]);
            assert_eq!(errors(&bench), IQE);

            bench.put(QUEUE, &golden::WAIT_INTERRUPT);
            bench.unit.write64(IQT, 64);
            assert_eq!(bench.unit.executed().len(), 0, "not while IQE is set");
            bench.unit.write32(FSTS, IQE as u32);
            let at_once = bench.unit.executed().len();
            bench.unit.write64(IQT, 64);

            assert_eq!(at_once, if resumes_at_tail_write { 0 } else { 2 });
            assert_eq!(bench.unit.executed(), [golden::WAIT_INTERRUPT, golden::WAIT_FENCE]);
        }
    }

    #[test]
    fn the_queue_wraps_and_holds_one_entry_less_than_its_size() {
        let bench = bench();
        bench.submit(&[golden::CONTEXT_GLOBAL; 100]);
        bench.unit.pause(0);

        bench.submit(&[golden::WAIT_FENCE; 127]);
        assert_eq!(bench.unit.read64(IQT), (100 + 127) % 128 * 32);
        bench.assert_lawful();
        bench.submit(&[golden::WAIT_FENCE]);

        bench.assert_broken("passes IQH 0xc80");
    }

    #[test]
    fn a_paused_unit_executes_as_many_as_it_is_told() {
        let bench = bench();
        bench.unit.pause(0);
        bench.submit(&[wait(1, 0, 0), wait(2, 0, 0), wait(3, 0, 0)]);
        assert_eq!((bench.word(STATUS), bench.unit.read64(IQH)), (0, 0));

        assert_eq!(bench.unit.execute(2), 2);
        assert_eq!((bench.word(STATUS), bench.unit.read64(IQH)), (2, 64));
        bench.unit.resume();

        assert_eq!((bench.word(STATUS), bench.unit.read64(IQH)), (3, 96));
        assert_eq!(bench.unit.execute(1), 0);
    }

    #[test]
    fn the_head_passes_what_is_fetched_and_not_done() {
        let bench = bench();
        bench.unit.pause(2);

        bench.submit(&[wait(1, 0, 0), wait(2, 0, 0), wait(3, 0, 0)]);

        assert_eq!((bench.word(STATUS), bench.unit.read64(IQH)), (0, 64));
        assert_eq!(bench.unit.execute(1), 1);
        assert_eq!((bench.word(STATUS), bench.unit.read64(IQH)), (1, 96));
    }

    #[test]
    fn turning_the_queue_off_resets_its_head() {
        let bench = bench();
        bench.submit(&[golden::WAIT_FENCE]);

        bench.command(QIE, false);

        assert_eq!(bench.unit.read64(IQH), 0);
        bench.assert_lawful();
    }

    #[test]
    fn a_wait_waits_for_the_devices_before_it_and_a_fence_holds_back_what_follows() {
        let bench = bench();
        bench.unit.hold_device_tlb(DEVICE);

        bench.submit(&[
            wait(1, 0, 0),
            device_tlb_all(),
            wait(2, 8, 0),
            golden::CONTEXT_GLOBAL,
            wait(3, 16, 1 << 6),
            golden::PASID_CACHE_GLOBAL,
        ]);
        assert_eq!([0, 8, 16].map(|at| bench.word(STATUS + at)), [1, 0, 0]);
        assert_eq!(bench.unit.executed()[1..], [device_tlb_all(), golden::CONTEXT_GLOBAL]);
        bench.unit.release_device_tlb(DEVICE);

        assert_eq!([0, 8, 16].map(|at| bench.word(STATUS + at)), [1, 2, 3]);
        assert_eq!(bench.unit.executed().last(), Some(&golden::PASID_CACHE_GLOBAL));
        bench.assert_lawful();
    }

    #[test]
    fn a_wait_waits_for_no_device_after_it() {
        let bench = bench();
        let other = StreamId(0x28);
        bench.unit.plug(other);
        bench.unit.hold_device_tlb(DEVICE);
        bench.unit.hold_device_tlb(other);
        // SID and PFSID 0x28 in place of 0x20.
        let of_other = [device_tlb_all()[0] | 8 << 16 | 8 << 12, device_tlb_all()[1], 0, 0];

        bench.submit(&[device_tlb_all(), wait(1, 0, 0), of_other, wait(2, 8, 0)]);
        bench.unit.release_device_tlb(DEVICE);
        assert_eq!([0, 8].map(|at| bench.word(STATUS + at)), [1, 0]);
        bench.unit.release_device_tlb(other);

        assert_eq!([0, 8].map(|at| bench.word(STATUS + at)), [1, 2]);
        bench.assert_lawful();
    }

    #[test]
    fn contexts_are_invalidated_by_domain_and_by_device_with_its_mask() {
        let device = |sid: u64, did: u64, fm: u64| [fm << 48 | sid << 32 | did << 16 | 3 << 4 | 1, 0, 0, 0];
        let domain = |did: u64| [did << 16 | 2 << 4 | 1, 0, 0, 0];
        for (words, forgotten) in [
            (device(0x20, DID, 0), true),
            (device(0x24, DID, 1), true),
            (device(0x26, DID, 2), true),
            (device(0x27, DID, 3), true),
            (domain(DID), true),
            (device(0x24, DID, 0), false),
            (device(0x26, DID, 1), false),
            (device(0x21, DID, 2), false),
            (device(0x28, DID, 3), false),
            (device(0x20, DID + 1, 0), false),
            (domain(DID + 1), false),
        ] {
            let bench = Bench::legacy(Config::qemu(), [2 << 2 | 1, DID << 8 | 2]);
            let read = || bench.unit.dma_read(DEVICE, None, Iova(STATUS), 1);
            assert_eq!(read(), Ok(vec![0]));
            bench.set_legacy_context([0; 2]);

            bench.put(QUEUE, &words[..2]);
            bench.unit.write64(IQT, 0x10);

            assert_eq!(read().is_err(), forgotten, "{words:x?}");
        }
    }

    #[test]
    fn a_device_that_does_not_answer_in_time_aborts_the_waits() {
        let bench = bench();
        bench.unit.unplug(DEVICE);
        bench.submit(&[device_tlb_all(), wait(1, 0, 0), golden::CONTEXT_GLOBAL, wait(2, 8, 0)]);

        bench.unit.advance(49_999);
        assert_eq!(errors(&bench), 0);
        bench.unit.advance(1);
        assert_eq!((errors(&bench), bench.unit.aborted_waits()), (ITE, 2));
        assert_eq!(bench.unit.read64(IQERCD), 0x20 << 32);
        assert_eq!(bench.vectors(), [0x40]);

        // Fetching stops while ITE is set; what is submitted again then completes.
        bench.submit(&[wait(3, 16, 0)]);
        assert_eq!(bench.word(STATUS + 16), 0);
        bench.unit.write32(FSTS, ITE as u32);
        assert_eq!([0, 8, 16].map(|at| bench.word(STATUS + at)), [0, 0, 3]);
        bench.assert_lawful();
    }

    #[test]
    fn waits_that_were_only_fetched_are_aborted_too() {
        let bench = bench();
        bench.unit.hold_device_tlb(DEVICE);
        bench.unit.pause(3);
        bench.submit(&[device_tlb_all(), wait(1, 0, 0), golden::CONTEXT_GLOBAL, wait(2, 8, 0)]);
        assert_eq!(bench.unit.execute(1), 1);

        bench.unit.advance(50_000);
        assert_eq!((errors(&bench), bench.unit.aborted_waits()), (ITE, 2));
        bench.unit.resume();

        assert_eq!(bench.unit.executed(), [device_tlb_all(), golden::CONTEXT_GLOBAL]);
        assert_eq!([0, 8].map(|at| bench.word(STATUS + at)), [0, 0]);
    }

    #[test]
    fn a_completion_that_nobody_asked_for_is_reported_and_stops_nothing() {
        let bench = bench();

        bench.unit.stray_completion(DEVICE);
        bench.submit(&[wait(1, 0, 0)]);

        assert_eq!((errors(&bench), bench.unit.read64(IQERCD)), (ICE, 0x20 << 48));
        assert_eq!(bench.word(STATUS), 1);
    }

    #[test]
    fn a_device_tlb_is_invalidated_under_its_physical_function() {
        let bench = bench();
        bench.unit.plug_virtual(StreamId(0x108), StreamId(0x100));

        bench.submit(&[golden::PASID_DEVICE_TLB_PAGE]);
        bench.assert_lawful();
        bench.unit.plug(StreamId(0x108));
        bench.submit(&[golden::PASID_DEVICE_TLB_PAGE]);

        bench.assert_broken("0x0100 is not its PFSID");
    }

    #[test]
    fn without_throttling_no_physical_function_is_named() {
        let bench = Bench::scalable(Config::qemu(), first_stage(FIRST_STAGE));
        let [w0, w1, ..] = device_tlb_all();

        bench.submit(&[[w0 & !(0xFFF << 52 | 0xF << 12), w1, 0, 0]]);
        bench.assert_lawful();
        bench.submit(&[device_tlb_all()]);

        bench.assert_broken("PFSID is reserved without ECAP.DIT");
    }

    #[test]
    fn sizes_of_device_tlb_invalidations_are_read_from_trailing_ones() {
        let span = |words: [u64; 4]| {
            let span = device_span(words[1], words[1] & 1 << 11 != 0);
            (span.first, span.last)
        };

        assert_eq!(span(golden::PASID_DEVICE_TLB_PAGE), (0xFFFF_8000_0000_1000, 0xFFFF_8000_0000_1FFF));
        assert_eq!(span(golden::PASID_DEVICE_TLB_ALL), (0, u64::MAX));
        assert_eq!(span(golden::PASID_DEVICE_TLB_2M), (0x4000_0000, 0x401F_FFFF));
        // 64 KiB without PASID, where S is bit 0.
        let small = device_span(0x1234_7001, true);
        assert_eq!((small.first, small.last), (0x1234_0000, 0x1234_FFFF));
    }

    /// What the unit still remembers of a mapping, after each table was changed behind its back.
    #[test]
    fn each_cache_keeps_what_was_not_invalidated() {
        let context_device = [golden::CONTEXT_DEVICE[0] & 0xFFFF | 0x20 << 32, 0, 0, 0];
        let pasid = [golden::PASID_CACHE_PASID[0] & 0xFFFF | DID << 16 | 5 << 32, 0, 0, 0];
        let pasid_domain = [golden::PASID_CACHE_DOMAIN[0] & 0xFFFF | DID << 16, 0, 0, 0];
        let iotlb_all = [golden::PASID_IOTLB_ALL[0] & 0xFFFF | DID << 16 | 5 << 32, 0, 0, 0];
        let iotlb_page = [golden::PASID_IOTLB_PAGES[0] & 0xFFFF | DID << 16 | 5 << 32, IOVA.0, 0, 0];
        let iotlb_global = [1 << 4 | 2, 0, 0, 0];
        /// A change, the descriptors that make the unit notice it, and some that do not.
        type Case<'a> = (fn(&Bench, u64), &'a [[u64; 4]], &'a [[u64; 4]]);
        let other_stage = [2 << 4 | DID << 16 | 2, 0, 0, 0];
        let cases: [Case; 3] = [
            (
                |bench, _| bench.set_context([0; 4]),
                &[context_device, golden::CONTEXT_GLOBAL],
                &[pasid, golden::PASID_CACHE_GLOBAL, iotlb_all, iotlb_global],
            ),
            (
                |bench, _| bench.set_pasid_entry(5, [0; 8]),
                &[pasid, pasid_domain, golden::PASID_CACHE_GLOBAL],
                &[golden::CONTEXT_GLOBAL, iotlb_all, golden::PASID_CACHE_PASID, golden::PASID_CACHE_DOMAIN],
            ),
            (
                |bench, leaf| bench.put(leaf, &[0]),
                &[iotlb_all, iotlb_page, iotlb_global],
                &[golden::CONTEXT_GLOBAL, golden::PASID_CACHE_GLOBAL, golden::PASID_IOTLB_ALL, other_stage],
            ),
        ];
        for (change, right, wrong) in cases {
            for (descriptors, forgotten) in [(right, true), (wrong, false)] {
                for &descriptor in descriptors {
                    let mut bench = bench();
                    let (leaf, _) = bench.map_page(7);
                    bench.read(IOVA).expect("mapped");
                    change(&bench, leaf);
                    assert!(bench.read(IOVA).is_ok(), "remembered");

                    bench.submit(&[descriptor]);

                    assert_eq!(bench.read(IOVA).is_err(), forgotten, "{descriptor:x?}");
                    bench.assert_lawful();
                }
            }
        }
    }

    #[test]
    fn an_invalidation_of_leaves_alone_keeps_the_way_to_them() {
        for (hint, expected) in [(0, Err(Refusal::Fault(0x71))), (1 << 6, Ok(0))] {
            let mut bench = bench();
            bench.map_page(7);
            bench.read(IOVA).expect("mapped");
            // The table above the leaf is taken away.
            bench.map(FIRST_STAGE, 4, IOVA.0, 2, 7, 0);

            let words = golden::PASID_IOTLB_PAGES[0] & 0xFFFF | DID << 16 | 5 << 32;
            bench.submit(&[[words, IOVA.0 | hint, 0, 0]]);

            assert_eq!(bench.read(IOVA), expected);
        }
    }

    #[test]
    fn the_way_to_second_stage_leaves_is_kept_only_by_a_hinted_page_invalidation() {
        let iotlb = |g: u64| DID << 16 | g << 4 | 2;
        for (words, kept) in [
            ([iotlb(3), IOVA.0 | 1 << 6, 0, 0], true),
            ([iotlb(3), IOVA.0, 0, 0], false),
            ([iotlb(2), 0, 0, 0], false),
            ([iotlb(1), 0, 0, 0], false),
        ] {
            let entry = [FIRST_STAGE | 2 << 6 | 2 << 2 | 1, DID, 0, 0, 0, 0, 0, 0];
            let mut bench = Bench::scalable(Config::full(), entry);
            bench.map(FIRST_STAGE, 4, IOVA.0, 1, 3, STATUS | 1);
            bench.read(IOVA).expect("mapped");
            bench.map(FIRST_STAGE, 4, IOVA.0, 2, 3, 0);

            bench.submit(&[words]);

            assert_eq!(bench.read(IOVA).is_ok(), kept, "{words:x?}");
        }
    }

    #[test]
    fn an_invalidation_that_is_not_aligned_to_its_size_is_noted() {
        let bench = bench();

        bench.submit(&[[golden::PASID_IOTLB_PAGES[0], 0x20_1000 | 9, 0, 0]]);

        bench.assert_broken("not aligned");
    }

    #[test]
    fn setting_the_root_table_forgets_everything_if_the_unit_says_so() {
        for (cap, forgotten) in [(Config::full().cap, true), (Config::full().cap & !(1 << 63), false)] {
            let bench =
                Bench::scalable(Config { cap, ..Config::full() }, [4 << 6 | 1, DID, 0, 0, 0, 0, 0, 0]);
            assert_eq!(bench.read(Iova(STATUS)), Ok(0));
            bench.set_pasid_entry(5, [0; 8]);

            bench.unit.write32(GCMD, 0xC400_0000);
            (0..5).for_each(|_| bench.unit.advance(0));

            assert_eq!(bench.read(Iova(STATUS)).is_err(), forgotten);
            assert_eq!(bench.fault(0)[1] >> 63 != 0, forgotten);
        }
    }

    #[test]
    fn the_second_stage_is_invalidated_by_domain_or_page() {
        let iotlb = |g: u64, did: u64| did << 16 | g << 4 | 2;
        for (words, forgotten) in [
            ([iotlb(2, DID), 0, 0, 0], true),
            ([iotlb(3, DID), IOVA.0, 0, 0], true),
            ([iotlb(1, 0), 0, 0, 0], true),
            ([iotlb(2, DID + 1), 0, 0, 0], false),
            ([iotlb(3, DID), IOVA.0 + 0x1000, 0, 0], false),
            ([golden::PASID_IOTLB_ALL[0] & 0xFFFF | DID << 16 | 5 << 32, 0, 0, 0], false),
        ] {
            let entry = [FIRST_STAGE | 2 << 6 | 2 << 2 | 1, DID, 0, 0, 0, 0, 0, 0];
            let mut bench = Bench::scalable(Config::full(), entry);
            let leaf = bench.map(FIRST_STAGE, 4, IOVA.0, 1, 3, STATUS | 1);
            bench.read(IOVA).expect("mapped");
            bench.put(leaf, &[0]);

            bench.submit(&[words]);

            assert_eq!(bench.read(IOVA).is_err(), forgotten, "{words:x?}");
        }
    }
}
