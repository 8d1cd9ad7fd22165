//! Page requests: the queue that software reads, what it answers, and what the unit answers by itself.

use super::{
    State, VtdUnit,
    device::{Refusal, sid},
    faults::Group,
    registers::{PQA, PQH, PQT, PRS, TE},
    walk::{At, Kind, Request},
};
use crate::device::{Answer, is_stop_marker, stop_marker};
use iommu::{GroupTag, Outcome, PageRequest, Pasid, Perms, PhysAddr, StreamId};
use std::collections::{BTreeMap, VecDeque};

/// PRS.PPR: a request is in the queue.
const PPR: u64 = 1 << 0;
/// PRS.PRO: the queue was full, or had been and PRO is still set.
const PRO: u64 = 1 << 1;

/// What became of a page request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Requested {
    /// It is in the queue.
    Queued,
    /// It is on its way, until [`VtdUnit::deliver_page_requests`] or a wait with PD.
    Held,
    /// The queue had no room for it. If it was the last of its group, the unit answered the group itself.
    Lost,
    /// The unit refused it. If it was the last of its group, the unit answered the group itself.
    Refused(Refusal),
    /// The device may not use this group: it waits for the response to it.
    GroupBusy,
}

/// A group, by source-id, PASID and PRGI.
type Key = (u16, Option<u32>, u16);

/// The inside of page request handling.
#[derive(Default)]
pub(super) struct Requests {
    /// Groups of which a request is in the queue, or was: whether the last one was too.
    groups: BTreeMap<Key, bool>,
    holding: bool,
    /// On their way to the queue.
    held: VecDeque<PageRequest>,
    answers: Vec<Answer>,
    auto_answered: Vec<Answer>,
}

fn group(request: &PageRequest) -> Key {
    (sid(request.stream), request.tag.pasid.map(Pasid::value), request.tag.index & 0x1FF)
}

impl VtdUnit {
    /// The device asks for a page.
    pub fn page_request(&self, request: PageRequest) -> Requested {
        let mut state = self.lock();
        if state.requests.groups.get(&group(&request)) == Some(&true) && !is_stop_marker(&request) {
            return Requested::GroupBusy;
        }
        if state.requests.holding {
            state.requests.held.push_back(request);
            return Requested::Held;
        }
        state.page_request(request)
    }

    /// The device says that no more requests for `pasid` follow.
    pub fn stop_marker(&self, stream: StreamId, pasid: Pasid) -> Requested {
        self.page_request(stop_marker(stream, pasid))
    }

    /// Keeps page requests on their way from now on, until they are delivered.
    pub fn hold_page_requests(&self) {
        self.lock().requests.holding = true;
    }

    /// Lets the page requests that are on their way arrive, and all later ones at once.
    pub fn deliver_page_requests(&self) {
        let mut state = self.lock();
        state.requests.holding = false;
        state.deliver_page_requests();
    }

    /// Returns the responses that software sent to groups that waited for one, oldest first.
    pub fn answers(&self) -> Vec<Answer> {
        let mut state = self.lock();
        state.catch_up();
        state.requests.answers.clone()
    }

    /// Returns the responses that the unit sent by itself, to groups whose last request it dropped, oldest first.
    ///
    /// Success where the queue was full, so that the device tries again; Invalid where the request was refused.
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
        self.lock().requests.groups.retain(|key, _| key.0 != sid(stream));
    }
}

fn named((sid, pasid, index): Key) -> (StreamId, GroupTag) {
    let pasid = pasid.map(|pasid| Pasid::from_low_bits(pasid.into()));
    (StreamId(sid.into()), GroupTag { pasid, index })
}

impl State {
    pub(super) fn deliver_page_requests(&mut self) {
        while let Some(request) = self.requests.held.pop_front() {
            self.page_request(request);
        }
    }

    /// The page request queue's size in bytes, by PQA.PQS.
    fn request_queue_bytes(&self) -> u64 {
        4096 << (self.get(PQA) & 7)
    }

    /// A page request reaches the unit.
    fn page_request(&mut self, page: PageRequest) -> Requested {
        if self.status() & TE == 0 {
            return Requested::Refused(Refusal::Unsupported);
        }
        let request = Request {
            sid: sid(page.stream),
            pasid: page.tag.pasid.map(Pasid::value),
            address: page.iova.0,
            kind: Kind::PageRequest,
            at: At::Untranslated,
        };
        if let Err(fault) = self.admit_page_request(&request) {
            self.record(&request, &fault);
            self.answer_itself(&page, Outcome::Invalid);
            return Requested::Refused(Refusal::Fault(fault.reason));
        }
        let (head, tail) = (self.get(PQH), self.get(PQT));
        let next = (tail + 32) % self.request_queue_bytes();
        if self.get(PRS) & PRO != 0 || next == head {
            self.report(Group::PageRequest, PRO);
            self.answer_itself(&page, Outcome::Success);
            return Requested::Lost;
        }
        let base = self.get(PQA) & !0xFFF;
        for (at, word) in (tail..).step_by(8).zip(descriptor(&page)) {
            if let Err(error) = self.memory.device_store(PhysAddr(base + at), word) {
                self.violation(format!("page request queue, PQA {base:#x}: {error}"));
                return Requested::Lost;
            }
        }
        self.set(PQT, next);
        if !is_stop_marker(&page) {
            let last = self.requests.groups.entry(group(&page)).or_default();
            *last |= page.last;
        }
        self.report(Group::PageRequest, PPR);
        Requested::Queued
    }

    /// The unit answers a group whose last request it dropped.
    fn answer_itself(&mut self, page: &PageRequest, outcome: Outcome) {
        if page.last && !is_stop_marker(page) {
            self.requests.groups.remove(&group(page));
            let (stream, tag) = named(group(page));
            self.requests.auto_answered.push(Answer { stream, tag, outcome });
        }
    }

    /// Descriptor type 9: goes to the device if its group waits.
    pub(super) fn page_group_response(&mut self, w0: u64, w1: u64) {
        let pasid = (w0 & 1 << 4 != 0).then_some((w0 >> 32) as u32 & 0xF_FFFF);
        let key = ((w0 >> 16) as u16, pasid, (w1 >> 3 & 0x1FF) as u16);
        let (stream, tag) = named(key);
        let outcome = match w0 >> 12 & 0xF {
            0 => Outcome::Success,
            1 => Outcome::Invalid,
            0xF => Outcome::Failure,
            code => {
                self.violation(format!("page group response: code {code:#x} is reserved"));
                Outcome::Failure
            }
        };
        if self.requests.groups.get(&key) == Some(&true) {
            self.requests.groups.remove(&key);
            self.requests.answers.push(Answer { stream, tag, outcome });
            return;
        }
        let other_pasid = |&(sid, _, index): &Key| (sid, index) == (key.0, key.2);
        let what = if self.requests.groups.contains_key(&key) {
            "before its last request"
        } else if self.requests.groups.keys().any(other_pasid) {
            "with the wrong PASID"
        } else {
            "that does not wait for one"
        };
        let device = key.0;
        self.violation(format!("page group response to device {device:#06x}, {tag:?}, {what}"));
    }

    /// After a write to PQH: it moves forward to at most PQT. Zero is where software starts a queue.
    pub(super) fn page_request_head_written(&mut self, old: u64) {
        let (size, head, tail) = (self.request_queue_bytes(), self.get(PQH), self.get(PQT));
        let ahead = |to: u64| to.wrapping_sub(old) & (size - 1);
        if head >= size || head != 0 && ahead(head) > ahead(tail) {
            self.violation(format!("PQH written as {head:#x}: not between {old:#x} and PQT {tail:#x}"));
        }
    }
}

/// The page request descriptor.
fn descriptor(page: &PageRequest) -> [u64; 4] {
    let Perms { read, write, execute, privileged } = page.perms;
    let pasid = page.tag.pasid.map_or(0, |pasid| u64::from(pasid.value()) << 32 | 1 << 8);
    let w0 = 0x01 // type
        | u64::from(sid(page.stream)) << 16
        | pasid // PASID and PP
        | u64::from(execute) << 52 // EXR
        | u64::from(privileged) << 53; // PMR
    let w1 = u64::from(read) // RD
        | u64::from(write) << 1 // WR
        | u64::from(page.last) << 2 // LPIG
        | u64::from(page.tag.index & 0x1FF) << 3 // PRGI
        | page.iova.0 & !0xFFF;
    [w0, w1, 0, 0]
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config,
        bench::{Bench, DEVICE, FIRST_STAGE, PASID, REQUESTS, STATUS, first_stage, page_request},
        registers::PECTL,
    };
    use super::*;
    use crate::golden;
    use iommu::Bus;
    use iommu::Iova;

    /// A queue of 128 entries.
    const SIZE: u64 = 4096;

    fn bench() -> Bench {
        Bench::scalable(Config::full(), first_stage(FIRST_STAGE))
    }

    /// A page group response to [`DEVICE`], with `code`, for group `index`.
    fn response(code: u64, index: u64) -> [u64; 4] {
        [golden::PAGE_GROUP_RESPONSE[0] | code << 12, index << 3, 0, 0]
    }

    fn answer(index: u16, outcome: Outcome) -> Answer {
        Answer { stream: DEVICE, tag: GroupTag { pasid: Some(PASID), index }, outcome }
    }

    /// Fills the queue, leaving the one entry that is never used.
    fn fill(bench: &Bench) {
        for index in 0..127 {
            assert_eq!(bench.page_request(index), Requested::Queued);
        }
    }

    #[test]
    fn page_requests_look_like_the_golden_words() {
        let mut bench = bench();
        let all_pasids = [golden::SCALABLE_CONTEXT[0] & 0xFFF | 7 << 9, 0, 0, 0];
        let request = |stream, pasid: Option<u64>, index, iova, perms, last| PageRequest {
            stream: StreamId(stream),
            tag: GroupTag { pasid: pasid.map(Pasid::from_low_bits), index },
            iova: Iova(iova),
            perms,
            last,
        };
        let privileged = Perms { privileged: true, ..Perms::READ_WRITE };
        let write = Perms { write: true, ..Perms::default() };

        bench.set_context_on_bus(1, 0x08 * 32, &all_pasids);
        bench.set_context_on_bus(3, 0, &all_pasids);
        let requests = [
            request(0x20, Some(5), 2, 0x40_0000_0000, Perms::READ, true),
            request(0x108, Some(0x1_2345), 0x1FF, 0x7F00_0000_1000, privileged, false),
            request(0x300, None, 3, 0x1234_5000, write, true),
        ];
        for request in requests {
            assert_eq!(bench.unit.page_request(request), Requested::Queued);
        }
        assert_eq!(bench.unit.stop_marker(DEVICE, PASID), Requested::Queued);

        let expected = [
            golden::PAGE_REQUEST,
            golden::PAGE_REQUEST_PRIVILEGED,
            golden::PAGE_REQUEST_WITHOUT_PASID,
            golden::STOP_MARKER,
        ];
        for (at, words) in (REQUESTS..).step_by(32).zip(expected) {
            assert_eq!([0, 8, 16, 24].map(|word| bench.word(at + word)), words);
        }
        assert_eq!(bench.unit.read64(PQT), 4 * 32);
        bench.assert_lawful();
    }

    #[test]
    fn a_request_interrupts_unless_one_is_pending() {
        let bench = bench();

        bench.page_request(0);
        bench.page_request(1);
        assert_eq!((bench.unit.read32(PRS), bench.vectors()), (PPR as u32, vec![0x42]));
        bench.unit.write32(PRS, PPR as u32);
        bench.page_request(2);

        assert_eq!(bench.vectors(), [0x42]);
        bench.unit.write32(PECTL, 1 << 31);
        bench.unit.write32(PRS, 3);
        bench.page_request(3);
        assert_eq!((bench.unit.read32(PECTL), bench.vectors()), (3 << 30, vec![]));
    }

    #[test]
    fn a_response_answers_a_group_that_is_complete() {
        let bench = bench();
        bench.unit.page_request(page_request(2, false));
        bench.unit.page_request(page_request(7, true));
        bench.unit.page_request(page_request(2, true));
        bench.unit.page_request(page_request(3, true));
        assert_eq!(bench.unit.waiting_groups().len(), 3);

        bench.submit(&[golden::PAGE_GROUP_RESPONSE, response(1, 7), response(0xF, 3)]);

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
            (|b| b.submit(&[response(0, 1)]), "that does not wait"),
            (
                |b| {
                    b.page_request(1);
                    b.submit(&[response(0, 1), response(0, 1)]);
                },
                "that does not wait",
            ),
            (
                |b| {
                    b.unit.page_request(page_request(1, false));
                    b.submit(&[response(0, 1)]);
                },
                "before its last request",
            ),
            (
                |b| {
                    b.page_request(1);
                    b.submit(&[[response(0, 1)[0] ^ 1 << 32, 1 << 3, 0, 0]]);
                },
                "wrong PASID",
            ),
            (
                |b| {
                    b.page_request(1);
                    b.submit(&[[response(0, 1)[0] & 0xFFFF_FFEF, 1 << 3, 0, 0]]);
                },
                "wrong PASID",
            ),
            (
                |b| {
                    b.page_request(1);
                    b.submit(&[response(2, 1)]);
                },
                "code 0x2",
            ),
            (
                |b| {
                    b.unit.stop_marker(DEVICE, PASID);
                    b.submit(&[response(0, 0)]);
                },
                "that does not wait",
            ),
            (
                |b| {
                    b.page_request(1);
                    b.unit.forget_page_requests(DEVICE);
                    b.submit(&[response(0, 1)]);
                },
                "that does not wait",
            ),
        ];
        for (setup, rule) in cases {
            let bench = bench();

            setup(&bench);

            bench.assert_broken(rule);
        }
    }

    #[test]
    fn a_device_waits_for_the_response_before_it_uses_the_group_again() {
        let bench = bench();
        bench.page_request(1);

        assert_eq!(bench.page_request(1), Requested::GroupBusy);
        bench.submit(&[response(0, 1)]);

        assert_eq!(bench.page_request(1), Requested::Queued);
    }

    #[test]
    fn a_full_queue_drops_and_answers_what_was_last() {
        let bench = bench();
        fill(&bench);
        bench.unit.write32(PRS, PPR as u32);
        bench.vectors();

        assert_eq!(bench.unit.page_request(page_request(200, false)), Requested::Lost);
        assert_eq!(bench.page_request(201), Requested::Lost);
        assert_eq!(bench.unit.stop_marker(DEVICE, PASID), Requested::Lost);

        assert_eq!((bench.unit.read32(PRS), bench.vectors()), (PRO as u32, vec![0x42]));
        assert_eq!(bench.unit.auto_answered(), [answer(201, Outcome::Success)]);
        assert_eq!(bench.unit.read64(PQT), 127 * 32);
    }

    #[test]
    fn an_overflow_lasts_until_software_clears_it() {
        let bench = bench();
        fill(&bench);
        bench.page_request(200);

        bench.unit.write64(PQH, 127 * 32);
        assert_eq!(bench.page_request(201), Requested::Lost);
        bench.unit.write32(PRS, PRO as u32);

        assert_eq!(bench.page_request(202), Requested::Queued);
        assert_eq!(bench.unit.read64(PQT), 0, "the queue is a ring");
        bench.assert_lawful();
    }

    #[test]
    fn a_group_whose_end_was_dropped_is_answered_already() {
        let bench = bench();
        bench.unit.page_request(page_request(300, false));
        (0..126).for_each(|index| _ = bench.page_request(index));

        assert_eq!(bench.page_request(300), Requested::Lost);
        assert_eq!(bench.unit.auto_answered(), [answer(300, Outcome::Success)]);
        bench.submit(&[response(0, 300)]);

        bench.assert_broken("that does not wait");
    }

    #[test]
    fn a_refused_request_is_answered_as_invalid_if_it_was_last() {
        let bench = bench();
        bench.set_context([golden::SCALABLE_CONTEXT[0] & !(1 << 4), 0, 0, 0]);

        let refused = Requested::Refused(Refusal::Fault(0x47));
        assert_eq!(bench.unit.page_request(page_request(1, false)), refused);
        assert_eq!(bench.unit.page_request(page_request(2, true)), refused);

        assert_eq!(bench.unit.auto_answered(), [answer(2, Outcome::Invalid)]);
        assert_eq!((bench.unit.read64(PQT), bench.unit.waiting_groups()), (0, vec![]));
    }

    #[test]
    fn requests_have_no_meaning_without_translation_or_in_legacy_mode() {
        let untranslated = Bench::new(Config::full());
        assert_eq!(untranslated.page_request(0), Requested::Refused(Refusal::Unsupported));

        let legacy = Bench::legacy(Config::full(), [0, 0]);
        assert_eq!(legacy.page_request(0), Requested::Refused(Refusal::Fault(0x32)));
    }

    #[test]
    fn a_drain_brings_in_what_is_on_its_way() {
        let wait = |more: u64| [1 << 32 | 1 << 5 | more | 5, STATUS, 0, 0];
        let bench = bench();
        bench.unit.hold_page_requests();
        assert_eq!(bench.page_request(1), Requested::Held);

        bench.submit(&[wait(0)]);
        assert_eq!((bench.word(STATUS), bench.unit.read64(PQT)), (1, 0));
        bench.submit(&[wait(1 << 7)]);
        assert_eq!(bench.unit.read64(PQT), 32);

        bench.page_request(2);
        bench.unit.deliver_page_requests();
        assert_eq!(bench.unit.read64(PQT), 64);
        assert_eq!(bench.page_request(3), Requested::Queued);
    }

    #[test]
    fn the_head_moves_forward_to_the_tail_and_no_further() {
        let bench = bench();
        (0..3).for_each(|index| _ = bench.page_request(index));

        bench.unit.write64(PQH, 64);
        bench.unit.write64(PQH, 96);
        bench.assert_lawful();
        bench.unit.write64(PQH, 128);

        bench.assert_broken("PQH written as 0x80");
    }

    #[test]
    fn a_head_that_moves_back_or_out_is_noted() {
        for head in [32, SIZE] {
            let bench = bench();
            (0..3).for_each(|index| _ = bench.page_request(index));
            bench.unit.write64(PQH, 64);

            bench.unit.write64(PQH, head);

            bench.assert_broken("PQH written as");
        }
    }

    #[test]
    fn a_queue_that_is_nowhere_loses_its_requests() {
        let bench = bench();
        bench.unit.write64(PQA, golden::PQA);

        assert_eq!(bench.page_request(0), Requested::Lost);

        bench.assert_broken("PQA 0x200000");
        assert_eq!(bench.unit.read64(PQT), 0);
    }
}
