//! What the unit reports: event records, errors of its own, and stalled requests.

use super::{
    SmmuUnit, State,
    registers::{
        EVENTQ, EVENTQ_ABT_ERR, EVENTQ_CONS, EVENTQ_IRQEN, EVENTQ_PROD, EVENTQEN, GERROR, GERROR_IRQEN,
        IRQ_CTRLACK, OVERFLOW, Ring,
    },
    walk::{Fault, Kind, Request},
};
use iommu::{PhysAddr, StreamId};
use std::collections::{BTreeMap, VecDeque};

/// An interrupt output of the unit. All of them give pulses, and remember nothing.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Wire {
    /// The event queue is no longer empty.
    Event,
    /// The page request queue is no longer empty; with PRIQ_IRQ_CFG2.LO, a group is complete.
    PageRequest,
    /// A CMD_SYNC with CS=IRQ is complete.
    CommandSync,
    /// An error became active in GERROR.
    Error,
}

/// How a stalled request ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    /// It is tried again, as if newly arrived.
    Retried,
    /// It completed, a read with zero.
    Terminated,
    /// It was aborted.
    Aborted,
}

/// Requests that wait for CMD_RESUME.
#[derive(Default)]
pub(super) struct Stalls {
    /// Their stall tags, by StreamID; true once the record is in the event queue.
    waiting: BTreeMap<(u32, u16), bool>,
    /// Records that the event queue had no room for, or that STALL_MAX kept back.
    unrecorded: VecDeque<[u64; 4]>,
    ended: Vec<(StreamId, u16, Ended)>,
    next_tag: u16,
}

impl SmmuUnit {
    /// Writes `words` to the event queue, as if the unit had met what they say.
    pub fn record(&self, words: [u64; 4]) {
        self.lock().write_event(words);
    }

    /// Makes these errors of GERROR active, as if the unit had met them.
    pub fn raise_errors(&self, errors: u32) {
        self.lock().raise(errors.into());
    }

    /// Returns the stalled requests that wait for an answer, by stall tag.
    pub fn stalled(&self) -> Vec<(StreamId, u16)> {
        let mut state = self.lock();
        state.catch_up();
        state.stalls.waiting.keys().map(|&(sid, tag)| (StreamId(sid), tag)).collect()
    }

    /// Returns how stalled requests ended, oldest first.
    pub fn ended_stalls(&self) -> Vec<(StreamId, u16, Ended)> {
        let mut state = self.lock();
        state.catch_up();
        state.stalls.ended.clone()
    }
}

/// What the unit tried with an entry for a queue that software reads.
pub(super) enum Written {
    Done,
    /// The queue is full. OVFLG is toggled unless an overflow was active already.
    Full,
    /// The queue is off, in an abort error, or has no memory.
    Refused,
}

impl State {
    /// Toggles errors of GERROR that are not active yet.
    pub(super) fn raise(&mut self, errors: u64) {
        let new: u64 =
            (0..32).map(|bit| 1 << bit).filter(|bit| errors & bit != 0 && !self.active(*bit)).sum();
        self.set(GERROR, self.get(GERROR) ^ new);
        if new != 0 {
            self.pulse(GERROR_IRQEN, Wire::Error);
        }
    }

    pub(super) fn pulse(&mut self, enable: u64, wire: Wire) {
        if self.get(IRQ_CTRLACK) & enable == 0 {
            return;
        }
        // GERROR_IRQ_CFG0, EVENTQ_IRQ_CFG0, PRIQ_IRQ_CFG0; MSI_GERROR_ABT_ERR, MSI_EVENTQ_ABT_ERR, MSI_PRIQ_ABT_ERR.
        let (registers, lost) = match wire {
            Wire::Error => (0x068, 1 << 7),
            Wire::Event => (0x0B0, 1 << 5),
            Wire::PageRequest => (0x0D0, 1 << 6),
            Wire::CommandSync => return self.pulses.push(wire),
        };
        match self.get(registers) {
            0 => self.pulses.push(wire),
            address => self.send(address, self.get(registers + 8) as u32, lost),
        }
    }

    /// Writes a message; an error of its own where that is aborted.
    pub(super) fn send(&mut self, address: u64, data: u32, lost: u64) {
        if !self.lose_messages {
            self.messages.push((address, data));
        } else if lost == 1 << 7 {
            // Nobody can be told by a message that the message about errors is lost.
            self.set(GERROR, self.get(GERROR) ^ if self.active(lost) { 0 } else { lost });
        } else {
            self.raise(lost);
        }
    }

    /// Puts `words` into `ring`, whose abort error is `error`.
    pub(super) fn push(&mut self, ring: Ring, error: u64, words: &[u64]) -> Written {
        if !self.on(ring.enable) || self.active(error) {
            return Written::Refused;
        }
        let (prod, cons) = (self.get(ring.prod), self.get(ring.cons));
        if self.used(ring, prod, cons) >= self.size(ring) {
            if (prod ^ cons) & OVERFLOW == 0 {
                self.set(ring.prod, prod ^ OVERFLOW);
            }
            return Written::Full;
        }
        for (at, &word) in (self.entry(ring, prod)..).step_by(8).zip(words) {
            if self.memory.device_store(PhysAddr(at), word).is_err() {
                self.raise(error);
                return Written::Refused;
            }
        }
        self.set(ring.prod, self.next(ring, prod));
        Written::Done
    }

    fn write_event(&mut self, words: [u64; 4]) -> bool {
        let empty = self.used(EVENTQ, self.get(EVENTQ_PROD), self.get(EVENTQ_CONS)) == 0;
        let done = matches!(self.push(EVENTQ, EVENTQ_ABT_ERR, &words), Written::Done);
        if done && empty {
            self.pulse(EVENTQ_IRQEN, Wire::Event);
        }
        done
    }

    /// Records a fault of `request`, if it is to be recorded.
    pub(super) fn report(&mut self, request: &Request, fault: &Fault) {
        if fault.policy.record {
            self.write_event(record(request, fault, None));
        }
    }

    /// Stalls `request` and returns its tag. Its record is never dropped, but may have to wait for room.
    pub(super) fn stall(&mut self, request: &Request, fault: &Fault) -> u16 {
        let tag = self.stalls.next_tag;
        self.stalls.next_tag = tag.wrapping_add(1);
        self.stalls.waiting.insert((request.sid, tag), false);
        self.stalls.unrecorded.push_back(record(request, fault, Some(tag)));
        self.flush_stalls();
        tag
    }

    /// Writes the records of stalled requests that waited, as far as there is room and STALL_MAX permits.
    pub(super) fn flush_stalls(&mut self) {
        while let Some(&words) = self.stalls.unrecorded.front() {
            let limit = (self.config.idr5 >> 16) as usize;
            let recorded = self.stalls.waiting.values().filter(|&&recorded| recorded).count();
            let used = self.used(EVENTQ, self.get(EVENTQ_PROD), self.get(EVENTQ_CONS));
            // A stall never makes an overflow.
            let room = self.on(EVENTQEN) && used < self.size(EVENTQ);
            if recorded >= limit || !room || !self.write_event(words) {
                return;
            }
            self.stalls.unrecorded.pop_front();
            self.stalls.waiting.insert(((words[0] >> 32) as u32, words[1] as u16), true);
        }
    }

    /// CMD_RESUME.
    pub(super) fn resume_stall(&mut self, sid: u32, tag: u16, w0: u64) {
        // AC, and AB.
        let ended = match w0 >> 12 & 3 {
            1 | 3 => Ended::Retried,
            0 if !self.config.has(26) => Ended::Terminated,
            _ => Ended::Aborted,
        };
        match self.stalls.waiting.get(&(sid, tag)) {
            Some(true) => {
                self.stalls.waiting.remove(&(sid, tag));
                self.stalls.ended.push((StreamId(sid), tag, ended));
                self.flush_stalls();
            }
            Some(false) => {
                self.violation(format!("CMD_RESUME of stream {sid:#x}, tag {tag:#x}: not recorded yet"));
            }
            None => self.violation(format!("CMD_RESUME of stream {sid:#x}, tag {tag:#x}: does not wait")),
        }
    }

    /// CMD_STALL_TERM, which is for streams that abort everything new.
    pub(super) fn terminate_stalls(&mut self, sid: u32) {
        let request = Request { sid, ssid: None, address: 0, kind: Kind::Read };
        // An entry that is not valid aborts, too, if not in silence.
        let aborts = self.ste(&request).map_or(true, |ste| super::configuration::ste_config(&ste) < 4);
        if !aborts {
            self.violation(format!("CMD_STALL_TERM of stream {sid:#x}: its STE does not abort"));
        }
        self.end_stalls(|of| of == sid);
    }

    /// SMMUEN was cleared.
    pub(super) fn end_all_stalls(&mut self) {
        self.end_stalls(|_| true);
    }

    fn end_stalls(&mut self, of: impl Fn(u32) -> bool) {
        let stalls = &mut self.stalls;
        let named: Vec<_> = stalls.waiting.keys().copied().filter(|&(sid, _)| of(sid)).collect();
        for (sid, tag) in named {
            stalls.waiting.remove(&(sid, tag));
            stalls.ended.push((StreamId(sid), tag, Ended::Aborted));
        }
        stalls.unrecorded.retain(|words| !of((words[0] >> 32) as u32));
        self.flush_stalls();
    }
}

/// The event record for a fault; `tag` is there if the request stalls.
fn record(request: &Request, fault: &Fault, tag: Option<u16>) -> [u64; 4] {
    let Request { sid, ssid, address, kind } = *request;
    let id = fault.id;
    let substream = match (id, ssid) {
        // F_STREAM_DISABLED and F_TRANSL_FORBIDDEN name no substream, C_BAD_SUBSTREAMID does so without SSV.
        (0x06 | 0x07, _) | (_, None) => 0,
        (0x08, Some(ssid)) => u64::from(ssid) << 12,
        (_, Some(ssid)) => u64::from(ssid) << 12 | 1 << 11,
    };
    let w0 = u64::from(id) | substream | u64::from(sid) << 32;
    if id < 0x0B {
        return match id {
            // F_TRANSL_FORBIDDEN says what for and where.
            0x07 => [w0, direction(kind), address, 0],
            _ => [w0, 0, 0, fault.address],
        };
    }
    let stall = tag.map_or(0, |tag| u64::from(tag) | 1 << 31);
    let stage = u64::from(fault.stage_2) << 39 | (fault.class as u64) << 40;
    [w0, stall | direction(kind) | stage, address, fault.address]
}

/// RnW.
fn direction(kind: Kind) -> u64 {
    if kind == Kind::Write { 0 } else { 1 << 35 }
}

/// F_BAD_ATS_TREQ for a translation request of one page.
pub(super) fn bad_translation_request(request: &Request, write: bool) -> [u64; 4] {
    let Request { sid, ssid, address, .. } = *request;
    let substream = ssid.map_or(0, |ssid| u64::from(ssid) << 12 | 1 << 11);
    let w0 = 0x05 | substream | u64::from(sid) << 32;
    // Span of one unit, R, W.
    [w0, 1 | 1 << 31 | u64::from(write) << 30, address & !0xFFF, 0]
}

impl State {
    pub(super) fn report_bad_translation_request(&mut self, request: &Request, write: bool) {
        self.write_event(bad_translation_request(request, write));
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config, Refusal,
        bench::{Bench, CONTEXTS, DEVICE, EVENTS, IOVA, SID, SYNC, context, stage_1},
        registers::{EVENTQ_BASE, GERRORN, IRQ_CTRL, SMMUEN},
    };
    use super::*;
    use crate::golden_smmuv3 as golden;
    use iommu::Bus;

    /// [`DEVICE`] with a context whose policy bits S, R and A are as in `bits`.
    fn with_policy(config: Config, bits: u64) -> Bench {
        let bench = Bench::attached(config, stage_1(&config, 0));
        let mut cd = context(1);
        cd[0] = cd[0] & !(7 << 44) | bits << 44;
        bench.put(CONTEXTS, &cd);
        bench
    }

    fn stalling() -> Bench {
        with_policy(Config::full(), 7)
    }

    /// CMD_RESUME of [`DEVICE`].
    fn resume(words: [u64; 2], tag: u64) -> [u64; 2] {
        [words[0], tag]
    }

    #[test]
    fn events_are_read_as_they_were_written() {
        let bench = Bench::started(Config::qemu());
        let events = [golden::F_TRANSLATION, golden::F_PERMISSION_STALLED, golden::C_BAD_SUBSTREAMID];

        events.iter().for_each(|&words| bench.unit.record(words));

        assert_eq!(bench.pulses(), [Wire::Event], "only the first finds the queue empty");
        bench.assert_events(&events);
        bench.unit.record(golden::F_CD_FETCH);
        assert_eq!(bench.pulses(), [Wire::Event]);
        bench.assert_lawful();
    }

    #[test]
    fn an_event_without_room_is_an_overflow() {
        let bench = Bench::started(Config::qemu());

        (0..8).for_each(|_| bench.unit.record(golden::C_BAD_STE));
        assert_eq!(bench.unit.read32(EVENTQ_PROD), 8);
        (0..2).for_each(|_| bench.unit.record(golden::F_TRANSLATION));
        assert_eq!(bench.unit.read32(EVENTQ_PROD), 1 << 31 | 8);

        // Unlike page requests, events are recorded again before the overflow is acknowledged.
        bench.unit.write32(EVENTQ_CONS, 2);
        bench.unit.record(golden::F_STE_FETCH);
        assert_eq!(bench.unit.read32(EVENTQ_PROD), 1 << 31 | 9);
        bench.unit.write32(EVENTQ_CONS, 1 << 31 | 9);
        bench.unit.record(golden::F_STE_FETCH);

        bench.assert_events(&[golden::F_STE_FETCH]);
        assert_eq!(bench.unit.read32(EVENTQ_PROD), 1 << 31 | 10);
        bench.assert_lawful();
    }

    #[test]
    fn an_interrupt_that_is_off_is_lost() {
        let bench = Bench::started(Config::qemu());
        bench.unit.write32(IRQ_CTRL, 0);
        (0..9).for_each(|_| bench.unit.advance(1));

        bench.unit.record(golden::C_BAD_STE);
        bench.unit.raise_errors(4);

        assert_eq!(bench.pulses(), []);
    }

    #[test]
    fn an_event_queue_without_memory_is_an_error() {
        let bench = Bench::started(Config::qemu());
        bench.switch(EVENTQEN, false);
        bench.unit.write64(EVENTQ_BASE, 0x1000 | 3);
        bench.enable(EVENTQEN);

        bench.unit.record(golden::C_BAD_STE);
        assert_eq!((bench.unit.read32(GERROR), bench.pulses()), (4, vec![Wire::Error]));
        assert_eq!(bench.unit.read32(EVENTQ_PROD), 0);
        bench.unit.write32(GERRORN, 4);
        bench.unit.record(golden::C_BAD_STE);

        assert_eq!(bench.unit.read32(GERROR), 0, "toggled again");
        bench.assert_lawful();
    }

    #[test]
    fn nothing_is_recorded_while_the_queue_is_off() {
        let bench = Bench::started(Config::qemu());
        bench.switch(EVENTQEN, false);

        bench.unit.record(golden::C_BAD_STE);

        assert_eq!((bench.unit.read32(EVENTQ_PROD), bench.word(EVENTS)), (0, 0));
    }

    #[test]
    fn the_context_decides_how_a_fault_ends() {
        let event = [SID << 32 | 0x10, 1 << 35 | 2 << 40, IOVA.0, 0];
        for (bits, refusal, events) in [
            (0, Refusal::Ignored, vec![]),
            (2, Refusal::Ignored, vec![event]),
            (4, Refusal::Fault(0x10), vec![]),
            (6, Refusal::Fault(0x10), vec![event]),
        ] {
            let bench = with_policy(Config::full(), bits);

            assert_eq!(bench.read(IOVA), Err(refusal));
            bench.assert_events(&events);
        }
    }

    #[test]
    fn a_stalled_request_waits_for_its_answer() {
        for (words, ended) in [
            (golden::RESUME_RETRY, Ended::Retried),
            (golden::RESUME_ABORT, Ended::Aborted),
            (golden::RESUME_TERMINATE, Ended::Terminated),
        ] {
            let bench = stalling();

            assert_eq!(bench.write(IOVA, 1), Err(Refusal::Stalled(0)));
            bench.assert_events(&[[SID << 32 | 0x10, 1 << 31 | 2 << 40, IOVA.0, 0]]);
            assert_eq!(bench.unit.stalled(), [(DEVICE, 0)]);
            bench.submit(&[resume(words, 0)]);

            assert_eq!(bench.unit.stalled(), []);
            assert_eq!(bench.unit.ended_stalls(), [(DEVICE, 0, ended)]);
            bench.assert_lawful();
        }
    }

    #[test]
    fn an_answer_that_nobody_waits_for_is_noted() {
        let bench = stalling();

        let _ = bench.read(IOVA);
        bench.submit(&[resume(golden::RESUME_RETRY, 1)]);
        bench.assert_broken("does not wait");
        bench.submit(&[resume(golden::RESUME_RETRY, 0), resume(golden::RESUME_RETRY, 0)]);

        assert_eq!(bench.unit.violations().len(), 2);
    }

    #[test]
    fn stalled_requests_are_not_lost_when_the_queue_is_full() {
        let bench = stalling();
        (0..8).for_each(|_| bench.unit.record(golden::C_BAD_STE));

        assert_eq!(bench.read(IOVA), Err(Refusal::Stalled(0)));
        assert_eq!(bench.unit.read32(EVENTQ_PROD), 8, "no overflow");
        bench.submit(&[resume(golden::RESUME_RETRY, 0)]);
        bench.assert_broken("not recorded yet");
        (0..8).for_each(|_| assert_eq!(bench.take_event(), Some(golden::C_BAD_STE)));

        assert_eq!(bench.take_event().map(|words| words[1] & 0xFFFF_FFFF), Some(1 << 31));
    }

    #[test]
    fn no_more_stalls_are_recorded_than_the_unit_has() {
        let config = Config { idr5: Config::qemu().idr5 | 2 << 16, ..Config::full() };
        let bench = with_policy(config, 7);

        let stalls = [(); 3].map(|()| bench.read(IOVA));
        assert_eq!(stalls, [0, 1, 2].map(|tag| Err(Refusal::Stalled(tag))));
        assert_eq!(bench.unit.read32(EVENTQ_PROD), 2);
        bench.submit(&[resume(golden::RESUME_RETRY, 1)]);

        assert_eq!(bench.unit.read32(EVENTQ_PROD), 3);
        bench.assert_lawful();
    }

    #[test]
    fn a_stream_that_aborts_may_end_its_stalls() {
        let bench = stalling();
        let _ = bench.read(IOVA);

        bench.submit(&[golden::STALL_TERM]);
        bench.assert_broken("does not abort");

        let bench = stalling();
        let _ = bench.read(IOVA);
        bench.set_ste(golden::STE_ABORT);
        bench.submit(&[golden::STALL_TERM, SYNC]);
        assert_eq!(bench.unit.ended_stalls(), [(DEVICE, 0, Ended::Aborted)]);
        bench.assert_lawful();
    }

    #[test]
    fn a_unit_that_is_turned_off_ends_all_stalls() {
        let bench = stalling();
        let _ = bench.read(IOVA);

        bench.switch(SMMUEN, false);

        assert_eq!(bench.unit.stalled(), []);
        assert_eq!(bench.unit.ended_stalls(), [(DEVICE, 0, Ended::Aborted)]);
    }
}
