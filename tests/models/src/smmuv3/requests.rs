//! Page requests: the queue that software reads, what it answers, and what the unit answers by itself.

use super::{
    Answer, SmmuUnit, State, Wire,
    events::Written,
    registers::{OVERFLOW, PRIQ, PRIQ_ABT_ERR, PRIQ_CONS, PRIQ_IRQ_CFG2, PRIQ_IRQEN, PRIQ_PROD, SMMUEN},
    walk::{Kind, Request},
};
use crate::device::{is_stop_marker, stop_marker};
use iommu::{GroupTag, Outcome, PageRequest, Pasid, Perms, StreamId};
use std::collections::BTreeMap;

/// What became of a page request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Requested {
    /// It is in the queue.
    Queued,
    /// The queue had no room for it. If it was the last of its group, the unit answered the group itself.
    Lost,
    /// The queue does not take requests now. The unit answered with Response Failure.
    Refused,
    /// The device may not use this group: it waits for the response to it.
    GroupBusy,
}

/// A group, by StreamID, PASID as it stands in responses, and PRGIndex.
type Key = (u32, Option<u32>, u16);

/// The inside of page request handling.
#[derive(Default)]
pub(super) struct Requests {
    /// Groups of which a request is in the queue, or was: whether the last one was too.
    groups: BTreeMap<Key, bool>,
    answers: Vec<Answer>,
    auto_answered: Vec<Answer>,
}

fn named((sid, pasid, index): Key) -> (StreamId, GroupTag) {
    let pasid = pasid.map(|pasid| Pasid::from_low_bits(pasid.into()));
    (StreamId(sid), GroupTag { pasid, index })
}

impl SmmuUnit {
    /// The device asks for a page.
    pub fn page_request(&self, request: PageRequest) -> Requested {
        let mut state = self.lock();
        let key = state.group(&request);
        if state.requests.groups.get(&key) == Some(&true) && !is_stop_marker(&request) {
            return Requested::GroupBusy;
        }
        state.page_request(request)
    }

    /// The device says that no more requests for `pasid` follow.
    pub fn stop_marker(&self, stream: StreamId, pasid: Pasid) -> Requested {
        self.page_request(stop_marker(stream, pasid))
    }

    /// Returns the responses that software sent to groups that waited for one, oldest first.
    pub fn answers(&self) -> Vec<Answer> {
        let mut state = self.lock();
        state.catch_up();
        state.requests.answers.clone()
    }

    /// Returns the responses that the unit sent by itself, to groups whose last request it dropped, oldest first.
    ///
    /// Success where the queue was full, so that the device tries again; Failure where it does not take requests.
    pub fn auto_answered(&self) -> Vec<Answer> {
        self.lock().requests.auto_answered.clone()
    }

    /// Returns the groups that wait for a response: their last request was queued, and nobody answered.
    pub fn waiting_groups(&self) -> Vec<(StreamId, GroupTag)> {
        let mut state = self.lock();
        state.catch_up();
        let waiting = state.requests.groups.iter().filter(|(_, last)| **last);
        waiting.map(|(&key, _)| named(key)).collect()
    }

    /// The device is reset: it waits for no response, and what it sent before is forgotten on its side.
    pub fn forget_page_requests(&self, stream: StreamId) {
        self.lock().requests.groups.retain(|key, _| key.0 != stream.0);
    }
}

impl State {
    fn group(&self, request: &PageRequest) -> Key {
        let pasid = request.tag.pasid.filter(|_| self.config.pasid_in_responses);
        (request.stream.0, pasid.map(Pasid::value), request.tag.index & 0x1FF)
    }

    /// A page request reaches the unit.
    fn page_request(&mut self, page: PageRequest) -> Requested {
        let stop_marker = is_stop_marker(&page);
        let (prod, cons) = (self.get(PRIQ_PROD), self.get(PRIQ_CONS));
        let empty = self.used(PRIQ, prod, cons) == 0;
        let overflowed = (prod ^ cons) & OVERFLOW != 0;
        let written = if !self.on(SMMUEN) || !self.on(PRIQ.enable) || self.active(PRIQ_ABT_ERR) {
            Written::Refused
        } else if overflowed {
            // Unlike the event queue, this one takes nothing before the overflow is acknowledged.
            Written::Full
        } else {
            self.push(PRIQ, PRIQ_ABT_ERR, &entry(&page))
        };
        let each_last = self.get(PRIQ_IRQ_CFG2) & 1 << 31 != 0;
        let interrupts = match written {
            Written::Done if each_last => page.last,
            Written::Done => empty,
            Written::Full => each_last && page.last,
            Written::Refused => false,
        };
        if interrupts {
            self.pulse(PRIQ_IRQEN, Wire::PageRequest);
        }
        match written {
            Written::Done => {
                if !stop_marker {
                    let key = self.group(&page);
                    self.requests.groups.insert(key, page.last);
                }
                Requested::Queued
            }
            Written::Full => {
                if page.last && !stop_marker {
                    let (pasid, outcome) = self.overflow_response(&page);
                    self.answer_itself(&page, pasid, outcome);
                }
                Requested::Lost
            }
            Written::Refused => {
                if !stop_marker {
                    self.answer_itself(&page, None, Outcome::Failure);
                }
                Requested::Refused
            }
        }
    }

    /// How the unit answers the last request of a group that had no room: with which PASID, and which code.
    fn overflow_response(&mut self, page: &PageRequest) -> (Option<Pasid>, Outcome) {
        let pasid = page.tag.pasid;
        // IDR3.PPS: always with the PASID of the request.
        if pasid.is_none() || self.config.idr3 & 1 << 5 != 0 {
            return (pasid, Outcome::Success);
        }
        let request = Request { sid: page.stream.0, ssid: None, address: 0, kind: Kind::Read };
        match self.ste(&request) {
            // STE.PPAR.
            Ok(ste) => (pasid.filter(|_| ste[1] & 1 << 18 != 0), Outcome::Success),
            Err(_) => (None, Outcome::Failure),
        }
    }

    /// The unit answers a group.
    fn answer_itself(&mut self, page: &PageRequest, pasid: Option<Pasid>, outcome: Outcome) {
        let key = self.group(page);
        self.requests.groups.remove(&key);
        let (stream, tag) = named(key);
        if outcome == Outcome::Success && pasid != tag.pasid {
            self.violation(format!(
                "STE.PPAR of stream {:#x} is not what the device wants: its group {tag:?} is answered with {pasid:?}",
                stream.0
            ));
        }
        let tag = GroupTag { pasid, ..tag };
        self.requests.auto_answered.push(Answer { stream, tag, outcome });
    }

    /// CMD_PRI_RESP: goes to the device if its group waits.
    pub(super) fn page_response(&mut self, sid: u32, pasid: Option<u32>, w1: u64) {
        let key = (sid, pasid, w1 as u16 & 0x1FF);
        let (stream, tag) = named(key);
        // The code 3 was rejected before.
        let outcome = match w1 >> 12 & 3 {
            0 => Outcome::Failure,
            1 => Outcome::Invalid,
            _ => Outcome::Success,
        };
        if self.requests.groups.get(&key) == Some(&true) {
            self.requests.groups.remove(&key);
            self.requests.answers.push(Answer { stream, tag, outcome });
            return;
        }
        let other_pasid = |&(of, _, index): &Key| (of, index) == (key.0, key.2);
        let what = if self.requests.groups.contains_key(&key) {
            "before its last request"
        } else if self.requests.groups.keys().any(other_pasid) {
            "with the wrong PASID"
        } else {
            "that does not wait for one"
        };
        self.violation(format!("CMD_PRI_RESP to stream {sid:#x}, {tag:?}, {what}"));
    }
}

/// The entry of the page request queue.
fn entry(page: &PageRequest) -> [u64; 2] {
    let Perms { read, write, execute, privileged } = page.perms;
    // SSID, SSV, and what has a meaning only with them: Priv and X.
    let substream = page.tag.pasid.map_or(0, |pasid| {
        u64::from(pasid.value()) << 32 | 1 << 63 | u64::from(privileged) << 58 | u64::from(execute) << 59
    });
    let w0 = u64::from(page.stream.0)
        | substream
        | u64::from(read) << 60
        | u64::from(write) << 61
        | u64::from(page.last) << 62;
    [w0, u64::from(page.tag.index & 0x1FF) | page.iova.0 & !0xFFF]
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config,
        bench::{Bench, DEVICE, PASID, REQUESTS, SYNC, page_request},
        registers::{GERROR, IRQ_CTRL, PRIQ_BASE, PRIQEN},
    };
    use super::*;
    use crate::golden_smmuv3 as golden;
    use iommu::Bus;
    use iommu::Iova;

    /// STE.PPAR.
    const PPAR: u64 = 1 << 18;

    fn bench() -> Bench {
        Bench::started(Config::full())
    }

    /// [`DEVICE`] with an STE that has PPAR as told.
    fn attached(config: Config, ppar: bool) -> Bench {
        let mut ste = golden::STE_BYPASS;
        ste[1] = if ppar { PPAR } else { 0 };
        Bench::attached(config, ste)
    }

    /// CMD_PRI_RESP to [`DEVICE`] with [`PASID`].
    fn response(code: u64, index: u64) -> [u64; 2] {
        [golden::PRI_RESP_SUCCESS[0], code << 12 | index]
    }

    fn answer(index: u16, outcome: Outcome) -> Answer {
        Answer { stream: DEVICE, tag: GroupTag { pasid: Some(PASID), index }, outcome }
    }

    fn fill(bench: &Bench) {
        (0..8).for_each(|index| assert_eq!(bench.page_request(index), Requested::Queued));
    }

    #[test]
    fn page_requests_look_like_the_golden_words() {
        let bench = bench();
        let request = |pasid, index, iova, perms, last| PageRequest {
            stream: DEVICE,
            tag: GroupTag { pasid, index },
            iova: Iova(iova),
            perms,
            last,
        };
        let privileged = Perms { privileged: true, execute: true, ..Perms::READ };

        for request in [
            request(Some(PASID), 0x1A3, 0x7F00_0000_1000, Perms::READ_WRITE, true),
            request(None, 3, 0x4020_1000, Perms::READ, false),
            request(None, 3, 0x4020_2000, privileged, true),
        ] {
            assert_eq!(bench.unit.page_request(request), Requested::Queued);
        }
        assert_eq!(bench.unit.stop_marker(DEVICE, PASID), Requested::Queued);

        let expected = [
            golden::PAGE_REQUEST,
            golden::PAGE_REQUEST_FIRST,
            golden::PAGE_REQUEST_LAST,
            golden::STOP_MARKER,
        ];
        for (at, words) in (REQUESTS..).step_by(16).zip(expected) {
            assert_eq!([bench.word(at), bench.word(at + 8)], words);
        }
        assert_eq!(bench.unit.read32(PRIQ_PROD), 4);
        bench.assert_lawful();
    }

    #[test]
    fn a_request_interrupts_when_the_queue_was_empty() {
        let bench = bench();

        bench.page_request(0);
        bench.page_request(1);
        assert_eq!(bench.pulses(), [Wire::PageRequest]);
        bench.unit.write32(PRIQ_CONS, 2);
        bench.page_request(2);

        assert_eq!(bench.pulses(), [Wire::PageRequest]);
    }

    #[test]
    fn with_lo_each_last_request_interrupts_even_one_that_is_lost() {
        let bench = bench();
        bench.unit.write32(IRQ_CTRL, 5);
        (0..9).for_each(|_| bench.unit.advance(1));
        bench.unit.write32(PRIQ_IRQ_CFG2, 1 << 31);
        bench.unit.write32(IRQ_CTRL, 7);
        (0..9).for_each(|_| bench.unit.advance(1));

        bench.unit.page_request(page_request(9, false));
        assert_eq!(bench.pulses(), []);
        (0..7).for_each(|index| assert_eq!(bench.page_request(index), Requested::Queued));
        bench.page_request(9);

        assert_eq!(bench.pulses().len(), 8);
    }

    #[test]
    fn a_response_answers_a_group_that_is_complete() {
        let bench = bench();
        bench.unit.page_request(page_request(2, false));
        for index in [7, 2, 3] {
            bench.page_request(index);
        }
        assert_eq!(bench.unit.waiting_groups().len(), 3);
        assert_eq!(bench.page_request(2), Requested::GroupBusy);

        bench.submit(&[response(2, 2), response(1, 7), response(0, 3), SYNC]);

        let expected =
            [answer(2, Outcome::Success), answer(7, Outcome::Invalid), answer(3, Outcome::Failure)];
        assert_eq!(bench.unit.answers(), expected);
        assert_eq!(bench.unit.waiting_groups(), []);
        bench.assert_lawful();
    }

    #[test]
    fn a_response_that_nobody_waits_for_is_noted() {
        type Setup = fn(&Bench);
        let cases: &[(Setup, &str)] = &[
            (|bench| bench.submit(&[response(2, 1)]), "that does not wait"),
            (
                |bench| {
                    bench.page_request(1);
                    bench.submit(&[response(2, 1), response(2, 1)]);
                },
                "that does not wait",
            ),
            (
                |bench| {
                    bench.unit.page_request(page_request(1, false));
                    bench.submit(&[response(2, 1)]);
                },
                "before its last request",
            ),
            (
                |bench| {
                    bench.page_request(1);
                    bench.submit(&[[response(2, 1)[0] ^ 1 << 12, response(2, 1)[1]]]);
                },
                "wrong PASID",
            ),
            (
                |bench| {
                    bench.page_request(3);
                    bench.submit(&[golden::PRI_RESP_INVALID]);
                },
                "wrong PASID",
            ),
            (
                |bench| {
                    bench.unit.stop_marker(DEVICE, PASID);
                    bench.submit(&[response(2, 0)]);
                },
                "that does not wait",
            ),
            (
                |bench| {
                    bench.page_request(1);
                    bench.unit.forget_page_requests(DEVICE);
                    bench.submit(&[response(2, 1)]);
                },
                "that does not wait",
            ),
        ];
        for (setup, words) in cases {
            let bench = bench();

            setup(&bench);

            bench.assert_broken(words);
        }
    }

    #[test]
    fn a_device_that_wants_no_pasid_in_responses_gets_none() {
        let bench = Bench::started(Config { pasid_in_responses: false, ..Config::full() });

        bench.page_request(3);
        bench.submit(&[golden::PRI_RESP_INVALID]);

        let tag = GroupTag { pasid: None, index: 3 };
        assert_eq!(bench.unit.answers(), [Answer { stream: DEVICE, tag, outcome: Outcome::Invalid }]);
        bench.assert_lawful();
    }

    #[test]
    fn a_queue_that_is_full_takes_nothing_before_the_overflow_is_acknowledged() {
        let bench = attached(Config::full(), true);
        fill(&bench);
        assert_eq!(bench.unit.read32(PRIQ_PROD), 8);

        assert_eq!(bench.unit.page_request(page_request(9, false)), Requested::Lost);
        assert_eq!(bench.unit.read32(PRIQ_PROD), 1 << 31 | 8);
        bench.unit.write32(PRIQ_CONS, 8);
        assert_eq!(bench.page_request(9), Requested::Lost);
        assert_eq!(bench.unit.stop_marker(DEVICE, PASID), Requested::Lost);
        assert_eq!(bench.unit.auto_answered(), [answer(9, Outcome::Success)]);
        bench.unit.write32(PRIQ_CONS, 1 << 31 | 8);

        assert_eq!(bench.page_request(9), Requested::Queued);
        assert_eq!(bench.unit.read32(PRIQ_PROD), 1 << 31 | 9);
        bench.assert_lawful();
    }

    #[test]
    fn a_group_whose_last_request_is_lost_is_over() {
        let bench = attached(Config::full(), true);
        bench.unit.page_request(page_request(9, false));
        (0..7).for_each(|index| assert_eq!(bench.page_request(index), Requested::Queued));

        bench.page_request(9);
        bench.submit(&[response(2, 9)]);

        bench.assert_broken("that does not wait");
    }

    #[test]
    fn the_stream_decides_whether_an_automatic_response_has_a_pasid() {
        let full = Config::full();
        let without = Config { pasid_in_responses: false, ..full };
        let always = Config { idr3: full.idr3 | 1 << 5, ..full };
        for (config, ppar, pasid, lawful) in [
            (full, true, Some(PASID), true),
            (full, false, None, false),
            (without, false, None, true),
            (without, true, Some(PASID), false),
            (always, false, Some(PASID), true),
        ] {
            let bench = attached(config, ppar);
            fill(&bench);

            assert_eq!(bench.page_request(9), Requested::Lost);

            let tag = GroupTag { pasid, index: 9 };
            let expected = Answer { stream: DEVICE, tag, outcome: Outcome::Success };
            assert_eq!(bench.unit.auto_answered(), [expected]);
            assert_eq!(bench.unit.violations().is_empty(), lawful);
        }
    }

    #[test]
    fn a_device_without_a_stream_is_refused_when_the_queue_is_full() {
        let bench = bench();
        fill(&bench);

        bench.page_request(9);

        let tag = GroupTag { pasid: None, index: 9 };
        assert_eq!(bench.unit.auto_answered(), [Answer { stream: DEVICE, tag, outcome: Outcome::Failure }]);
        bench.assert_events(&[]);
    }

    #[test]
    fn a_queue_that_is_off_refuses_every_request() {
        let off: [fn(&Bench); 2] = [|bench| bench.switch(PRIQEN, false), |bench| bench.switch(SMMUEN, false)];
        for off in off {
            let bench = bench();
            off(&bench);

            assert_eq!(bench.page_request(1), Requested::Refused);
            assert_eq!(bench.unit.page_request(page_request(2, false)), Requested::Refused);
            assert_eq!(bench.unit.stop_marker(DEVICE, PASID), Requested::Refused);

            let outcomes: Vec<_> = bench.unit.auto_answered().iter().map(|answer| answer.outcome).collect();
            assert_eq!(outcomes, [Outcome::Failure, Outcome::Failure]);
            assert_eq!(bench.unit.read32(PRIQ_PROD), 0);
        }
    }

    #[test]
    fn a_page_request_queue_without_memory_is_an_error() {
        let bench = bench();
        bench.switch(PRIQEN, false);
        bench.unit.write64(PRIQ_BASE, 3);
        bench.enable(PRIQEN);

        assert_eq!(bench.page_request(1), Requested::Refused);

        assert_eq!(bench.unit.read32(GERROR), 8);
        assert_eq!(bench.unit.auto_answered().len(), 1);
    }
}
