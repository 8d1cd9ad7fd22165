//! The event side of the VT-d driver against the modelled unit: everything is reported, once, and nothing is slept
//! through.

use crate::HARDWARE;
use hosted::{Ends, Machine, Moment, Tapped, needs};
use iommu::{
    Access, Bus, Commands, Completion, Event, Events, FaultReason, Features, GroupTag, Invalidation, Iova,
    Message, Outcome, PAGE_SIZE, PageRequest, PageResponse, Pasid, Perms, PhysAddr, StreamId,
};
use models::{
    memory::Memory,
    vtd::{Config, Refusal, Requested, VtdUnit},
};
use pgtable::VtdFirstStage;
use std::sync::{Arc, Mutex};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };
/// Entries that the page request queue of `needs` can hold: one of 128 stays free.
const USABLE: u16 = 127;
const FAULT: Message = Message { address: 0xFEE0_1000, data: 0x41 };
const REQUEST: Message = Message { address: 0xFEE0_2000, data: 0x42 };
/// The registers.
const FSTS: usize = 0x34;
const PRS: usize = 0xDC;

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

fn request(stream: StreamId, index: u16, last: bool) -> PageRequest {
    let tag = GroupTag { pasid: pasid(5), index };
    PageRequest { stream, tag, iova: Iova(0x7000), perms: Perms::READ_WRITE, last }
}

/// Lets the disk and the card send page requests, of PASID 5 and without PASID.
fn attach_all<B: Bus + Clone>(mut machine: Machine<B>) -> Machine<B> {
    for stream in [DISK, NIC] {
        machine.assign(stream, ALL);
        for number in [None, pasid(5)] {
            let tree = machine.tree(VtdFirstStage::<4>);
            machine.attach(stream, number, &tree);
        }
    }
    machine.vtd.events.enable_interrupts(FAULT, REQUEST);
    machine
}

fn machine(config: Config) -> Machine {
    attach_all(HARDWARE.machine(config))
}

#[test]
fn page_requests_arrive_as_they_were_sent() {
    let mut machine = machine(Config::full());
    let requests = [
        request(DISK, 0x1FF, false),
        request(NIC, 3, true),
        PageRequest { tag: GroupTag { pasid: None, index: 2 }, ..request(DISK, 0, true) },
        PageRequest { perms: Perms { privileged: true, ..Perms::READ }, ..request(DISK, 4, true) },
        PageRequest { iova: Iova(0x7FFF_FFFF_F000), perms: Perms::default(), ..request(DISK, 5, false) },
    ];
    for request in requests {
        assert_eq!(machine.unit.page_request(request), Requested::Queued);
    }
    assert_eq!(machine.unit.stop_marker(DISK, Pasid::new(5).expect("20 bits")), Requested::Queued);

    let events = machine.pass();

    let expected = requests.map(Event::PageRequest);
    assert_eq!(events[..5], expected);
    assert_eq!(events[5..], [Event::StopMarker { stream: DISK, pasid: pasid(5) }]);
    assert_eq!(machine.unit.messages(), [REQUEST], "one for all of them");
    machine.assert_lawful();
}

#[test]
fn an_entry_that_no_manual_knows_is_reported_and_passed_over() {
    let mut machine = machine(Config::full());
    let queue = machine.unit.read64(0xD0) & !0xFFF;
    for index in 0..3 {
        machine.unit.page_request(request(DISK, index, false));
    }
    // The second entry becomes one of type 2.
    let words = [0x0000_0005_0020_0102, 0x1234];
    for (at, word) in (queue + 32..).step_by(8).zip(words) {
        machine.memory.device_store(PhysAddr(at), word).expect("inside");
    }

    let events = machine.pass();

    // PRGI is 75:67 of the whole, 11:3 of the second word: 0x1234 has 0x46 there.
    let group = Some((DISK, GroupTag { pasid: pasid(5), index: 0x46 }));
    assert_eq!(events[1], Event::Malformed { words, group });
    assert_eq!(events[0], Event::PageRequest(request(DISK, 0, false)));
    assert_eq!(events[2..], [Event::PageRequest(request(DISK, 2, false))]);
    machine.assert_lawful();
}

#[test]
fn the_queue_wraps_many_times() {
    let mut machine = machine(Config::full());
    let mut index = 0;
    for round in 0..50 {
        let count = [1, USABLE, 60, 3][round % 4];
        let sent: Vec<_> = (0..count).map(|n| request(DISK, (index + n) % 512, false)).collect();
        index = (index + count) % 512;
        for &request in &sent {
            assert_eq!(machine.unit.page_request(request), Requested::Queued);
        }

        assert_eq!(machine.pass(), sent.into_iter().map(Event::PageRequest).collect::<Vec<_>>());
    }
    machine.assert_lawful();
}

#[test]
fn every_place_is_given_back_with_the_last_entry_that_was_there() {
    let mut machine = machine(Config::full());
    machine.vtd.events.acknowledge();
    let mut next = 0..;
    // Full, five times over: nothing overflows, although the driver has not yet found the queue empty.
    for round in 0..5 {
        for index in next.by_ref().take(USABLE.into()) {
            let queued = machine.unit.page_request(request(DISK, index % 512, false));
            assert_eq!(queued, Requested::Queued, "round {round}");
        }
        for _ in 0..USABLE {
            assert!(matches!(machine.vtd.events.next_event(), Some(Event::PageRequest(_))));
        }
    }
    machine.assert_lawful();
}

#[test]
fn a_pass_that_begins_before_the_last_one_has_taken_all_finds_what_came_between() {
    let mut machine = machine(Config::full());
    for index in 0..3 {
        assert_eq!(machine.unit.page_request(request(DISK, index, false)), Requested::Queued);
    }
    machine.vtd.events.acknowledge();
    assert_eq!(machine.vtd.events.next_ordinary(), Some(request(DISK, 0, false)));
    for index in 3..5 {
        assert_eq!(machine.unit.page_request(request(DISK, index, false)), Requested::Queued);
    }

    let events = machine.pass();

    assert_eq!(events, [1, 2, 3, 4].map(|index| Event::PageRequest(request(DISK, index, false))));
    machine.assert_lawful();
}

#[test]
fn an_overflow_is_reported_after_all_that_was_queued_and_service_goes_on() {
    let mut machine = machine(Config::full());
    for round in 0..3 {
        for index in 0..USABLE {
            assert_eq!(machine.unit.page_request(request(DISK, index, false)), Requested::Queued);
        }
        // The unit answers the group whose last request it drops.
        assert_eq!(machine.unit.page_request(request(NIC, 1, true)), Requested::Lost);
        let own = machine.unit.auto_answered().pop().expect("its last request was dropped");
        assert_eq!((own.stream, own.outcome), (NIC, Outcome::Success));

        let mut events = machine.pass();

        assert_eq!(events.pop(), Some(Event::RequestsLost), "round {round}");
        assert_eq!(events.len(), usize::from(USABLE));
        assert!(events.iter().all(|event| matches!(event, Event::PageRequest(_))));
        assert_eq!(machine.unit.read32(PRS) & 2, 0, "PRS.PRO");
        assert_eq!(machine.pass(), []);
        assert_eq!(machine.unit.messages().len(), 1, "round {round}");
        machine.unit.forget_page_requests(DISK);
    }
    assert_eq!(machine.unit.page_request(request(NIC, 1, true)), Requested::Queued);
    assert_eq!(machine.pass(), [Event::PageRequest(request(NIC, 1, true))]);
    machine.assert_lawful();
}

#[test]
fn a_pending_request_survives_the_clearing_of_an_overflow() {
    let mut machine = machine(Config::full());
    for index in 0..=USABLE {
        machine.unit.page_request(request(DISK, index, false));
    }
    machine.vtd.events.acknowledge();
    let mut events = (0..=USABLE).map(|_| machine.vtd.events.next_event());
    assert!(events.any(|event| event == Some(Event::RequestsLost)));
    machine.unit.messages();

    // The overflow was reported and cleared; what comes now is queued, and interrupts.
    assert_eq!(machine.unit.page_request(request(NIC, 1, true)), Requested::Queued);

    assert_eq!(machine.unit.messages(), [REQUEST]);
    assert_eq!(machine.vtd.events.next_event(), Some(Event::PageRequest(request(NIC, 1, true))));
}

/// What is to happen, and how many register accesses before it.
type Plan = Arc<Mutex<Option<(usize, fn(&VtdUnit))>>>;

/// A bus on which something may be planned.
fn sudden(unit: &'static VtdUnit) -> (Tapped, Plan) {
    let plan = Plan::default();
    let kept = Arc::clone(&plan);
    let bus = Tapped::new(unit, move |unit, moment| {
        if moment != Moment::Access {
            return;
        }
        let mut plan = kept.lock().expect("no test panics here");
        match &mut *plan {
            Some((0, what)) => {
                what(unit);
                *plan = None;
            }
            Some((left, _)) => *left -= 1,
            None => {}
        }
    });
    (bus, plan)
}

/// What the devices do, and how many events of what kind must come of it, in one pass or two.
struct Story {
    /// Fault records that were used before.
    used: usize,
    before: fn(&VtdUnit),
    suddenly: fn(&VtdUnit),
    expected: fn(&[Event]) -> bool,
}

/// Runs a pass in which `suddenly` happens at each possible moment, then further passes only if the unit interrupts.
fn at_every_moment(story: &Story) {
    for moment in 0.. {
        let (unit, memory) = used_unit(story.used);
        let parts = needs(&memory);
        let (bus, plan) = sudden(unit);
        let mut machine =
            attach_all(HARDWARE.enable(unit, memory, bus, parts).expect("it comes into service"));
        (story.before)(unit);
        unit.messages();
        *plan.lock().expect("no test panics here") = Some((moment, story.suddenly));

        let mut events = machine.pass();
        if plan.lock().expect("no test panics here").take().is_some() {
            // The pass is shorter than that: all moments were tried. Nothing interrupts, so it must be complete.
            assert!(moment > 3, "a pass has some accesses");
            return;
        }
        let mut passes = 1;
        while !unit.messages().is_empty() {
            events.extend(machine.pass());
            passes += 1;
            assert!(passes < 5, "interrupts without an end");
        }

        assert!((story.expected)(&events), "at access {moment}: {events:?}");
        assert_eq!(machine.pass(), [], "at access {moment}: left behind without an interrupt");
        machine.assert_lawful();
    }
}

fn count(events: &[Event], is: fn(&Event) -> bool) -> usize {
    events.iter().filter(|event| is(event)).count()
}

fn is_request(event: &Event) -> bool {
    matches!(event, Event::PageRequest(_))
}

fn is_fault(event: &Event) -> bool {
    matches!(event, Event::Fault(_))
}

fn ask_once(unit: &VtdUnit) {
    unit.page_request(request(DISK, 1, true));
}

fn ask_twice(unit: &VtdUnit) {
    unit.page_request(request(DISK, 2, false));
    unit.page_request(request(DISK, 2, true));
}

fn fill(unit: &VtdUnit) {
    for index in 0..200 {
        unit.page_request(request(NIC, index, false));
    }
}

/// Reads where nothing is mapped.
fn fail(unit: &VtdUnit) {
    assert_eq!(unit.dma_read(DISK, pasid(5), Iova(0x9000), 1), Err(Refusal::Fault(0x71)));
}

#[test]
fn a_request_that_arrives_during_a_pass_is_reported_in_it_or_interrupts_again() {
    for before in [(|_| {}) as fn(&VtdUnit), ask_twice] {
        at_every_moment(&Story {
            used: 0,
            before,
            suddenly: ask_once,
            expected: |events| {
                let of_group = |e: &Event| matches!(e, Event::PageRequest(r) if r.tag.index == 1);
                count(events, of_group) == 1 && matches!(count(events, is_request), 1 | 3)
            },
        });
    }
}

#[test]
fn a_burst_that_overflows_during_a_pass_loses_nothing_that_was_queued() {
    for before in [(|_| {}) as fn(&VtdUnit), ask_twice] {
        at_every_moment(&Story {
            used: 0,
            before,
            suddenly: fill,
            expected: |events| {
                // The loss is told once, after everything that was queued before it.
                let lost = events.iter().position(|event| *event == Event::RequestsLost);
                let last = events.iter().rposition(is_request);
                count(events, is_request) >= 125
                    && count(events, |event| *event == Event::RequestsLost) == 1
                    && lost > last
            },
        });
    }
}

#[test]
fn a_fault_during_a_pass_is_reported_in_it_or_interrupts_again() {
    for before in [(|_| {}) as fn(&VtdUnit), ask_twice] {
        at_every_moment(&Story {
            used: 0,
            before,
            suddenly: fail,
            expected: |events| count(events, is_fault) == 1,
        });
    }
    // Also where the second fault goes to the record that the driver looks at first.
    for used in 0..4 {
        at_every_moment(&Story {
            used,
            before: fail,
            suddenly: |unit| assert!(unit.dma_read(DISK, pasid(5), Iova(0xA000), 1).is_err()),
            expected: |events| {
                let mut pages = fault_pages(events);
                pages.sort();
                pages == [9, 0xA]
            },
        });
    }
}

#[test]
fn an_overflow_of_faults_during_a_pass_is_told() {
    at_every_moment(&Story {
        used: 0,
        before: fail,
        suddenly: |unit| (0..6).for_each(|_| fail(unit)),
        expected: |events| {
            count(events, is_fault) >= 4 && count(events, |event| *event == Event::FaultsLost) == 1
        },
    });
}

#[test]
fn of_a_source_whose_faults_are_compressed_one_is_told_for_each_time_that_they_are_taken() {
    let mut machine = machine(Config { compresses_faults: true, ..Config::full() });
    let storm = |machine: &Machine<_>, stream, count| {
        for page in 1..=count {
            assert!(machine.unit.dma_read(stream, None, Iova(page << 12), 1).is_err());
        }
    };
    // Ten times as many as there are records: the others' are not lost for it, and nothing is told to be.
    for round in 0..3 {
        storm(&machine, DISK, 40);
        storm(&machine, NIC, 1);

        let told = machine.pass();

        let of = |event: &Event| match event {
            Event::Fault(fault) => (fault.stream, fault.iova),
            other => panic!("{other:?}"),
        };
        let told: Vec<_> = told.iter().map(of).collect();
        assert_eq!(told, [(DISK, Iova(0x1000)), (NIC, Iova(0x1000))], "round {round}");
    }
    machine.assert_lawful();
}

#[test]
fn faults_are_reported_in_their_order_with_all_that_is_known() {
    let mut machine = machine(Config::full());
    assert!(machine.unit.dma_read(DISK, pasid(5), Iova(0x1_2345), 1).is_err());
    assert!(machine.unit.dma_write(NIC, None, Iova(0x2_0000), &[1]).is_err());
    assert!(machine.unit.dma_read(StreamId(0x1FF), pasid(0xF_FFFF), Iova(0x3_0000), 1).is_err());

    let faults = machine.pass();

    let fault = |event: &Event| match event {
        Event::Fault(f) => (f.stream.0, f.pasid.map(Pasid::value), f.access, f.iova.0, f.reason, f.code),
        other => panic!("{other:?}"),
    };
    let seen: Vec<_> = faults.iter().map(fault).collect();
    assert_eq!(
        seen,
        [
            (0x20, Some(5), Access::Read, 0x1_2000, FaultReason::NotMapped, 0x71),
            (0x28, None, Access::Write, 0x2_0000, FaultReason::NotMapped, 0x71),
            (0x1FF, Some(0xF_FFFF), Access::Read, 0x3_0000, FaultReason::NotAttached, 0x39),
        ]
    );
    assert_eq!(machine.unit.messages(), [FAULT]);
    assert_eq!(machine.unit.read32(FSTS), machine.unit.read32(FSTS) & 0xFF00, "nothing is pending any more");
    machine.assert_lawful();
}

#[test]
fn fault_records_are_used_round_and_round() {
    // One record, as QEMU has; and several.
    for records in [1, 3, 4] {
        let mut machine = machine(Config::full().with_fault_records(records));
        let mut page = 0;
        for round in 0..40 {
            let burst = 1 + round % u64::from(records);
            for n in 0..burst {
                assert!(machine.unit.dma_read(DISK, pasid(5), Iova((page + n) * PAGE_SIZE), 1).is_err());
            }

            let pages = fault_pages(&machine.pass());

            assert_eq!(pages, Vec::from_iter(page..page + burst), "{records} records, round {round}");
            assert_eq!(machine.unit.messages(), [FAULT]);
            page += burst;
        }
        machine.assert_lawful();
    }
}

/// Returns a unit whose next fault goes to record `used`: firmware has used the ones before, in legacy mode.
fn used_unit(used: usize) -> (&'static VtdUnit, Memory) {
    let (unit, memory) = HARDWARE.unit(Config::full());
    let mut root = memory.take(512, 512);
    root.clear();
    unit.publish(root.range(0, 512));
    // RTADDR with TTM 00, then SRTP, then TE; and TE off again.
    unit.write64(0x20, root.phys().0);
    for (command, status) in [(1 << 30, 1 << 30), (1 << 31, 3 << 30)] {
        unit.write32(0x18, command);
        assert!((0..100).any(|_| unit.read32(0x1C) == status));
    }
    (0..used).for_each(|_| assert!(unit.dma_read(DISK, None, Iova(0), 1).is_err()));
    unit.write32(0x18, 0);
    assert!((0..100).any(|_| unit.read32(0x1C) == 1 << 30));
    (unit, memory)
}

/// The pages of the faults in `events`.
fn fault_pages(events: &[Event]) -> Vec<u64> {
    events
        .iter()
        .filter_map(|e| if let Event::Fault(f) = e { Some(f.iova.0 / PAGE_SIZE) } else { None })
        .collect()
}

#[test]
fn the_first_fault_may_be_in_any_record() {
    for used in 1..4 {
        let (unit, memory) = used_unit(used);
        let parts = needs(&memory);
        let mut machine =
            attach_all(HARDWARE.enable(unit, memory, unit, parts).expect("it comes into service"));

        for page in 1..4 {
            assert!(machine.unit.dma_read(DISK, pasid(5), Iova(page * PAGE_SIZE), 1).is_err());
        }

        assert_eq!(fault_pages(&machine.pass()), [1, 2, 3], "{used} were used before");
        machine.assert_lawful();
    }
}

#[test]
fn no_record_is_left_behind_whatever_order_the_unit_fills_them_in() {
    for skipped in 0..7 {
        let mut machine = machine(Config::full().with_fault_records(7));
        assert!(machine.unit.dma_read(DISK, pasid(5), Iova(PAGE_SIZE), 1).is_err());
        machine.vtd.events.acknowledge();
        assert_eq!(fault_pages(&machine.vtd.events.next_fault().into_iter().collect::<Vec<_>>()), [1]);
        assert!(machine.unit.dma_read(DISK, pasid(5), Iova(2 * PAGE_SIZE), 1).is_err());
        machine.unit.skip_fault_records(skipped);
        // Back at the record that is in use, it is one too many.
        let lost = machine.unit.dma_read(DISK, pasid(5), Iova(3 * PAGE_SIZE), 1).is_err() && skipped == 6;

        let mut pages = fault_pages(&machine.pass());

        pages.sort();
        assert_eq!(pages, if lost { vec![2] } else { vec![2, 3] }, "{skipped}");
        assert_eq!(machine.unit.read32(FSTS) & 0x7F, 0, "nothing is pending, so the next one interrupts");
    }
}

#[test]
fn lost_faults_are_told_after_the_recorded_ones_and_recording_goes_on() {
    let mut machine = machine(Config::full());
    for round in 0..3 {
        for _ in 0..6 {
            fail(machine.unit);
        }

        let events = machine.pass();

        assert_eq!(events.len(), 5, "four records and the news: {events:?}");
        assert!(events[..4].iter().all(is_fault), "round {round}");
        assert_eq!(events[4], Event::FaultsLost);
        assert_eq!(machine.unit.read32(FSTS) & 0x7F, 0);
        assert_eq!(machine.unit.messages(), [FAULT]);
    }
    machine.assert_lawful();
}

#[test]
fn each_kind_of_news_in_the_fault_status_is_told_by_itself() {
    let mut machine = machine(Config::full());
    for _ in 0..6 {
        fail(machine.unit);
    }
    machine.unit.stray_completion(DISK);

    let events = machine.pass();

    assert_eq!(count(&events, is_fault), 4);
    assert_eq!(count(&events, |event| *event == Event::FaultsLost), 1);
    assert_eq!(count(&events, |event| matches!(event, Event::CommandsFailed { .. })), 1);
    assert_eq!(events.len(), 6);
    assert!(machine.vtd.commands.recover().is_some());
    assert_eq!(machine.unit.read32(FSTS) & 0x7F, 0);
    machine.assert_lawful();
}

#[test]
fn what_happened_before_interrupts_were_let_through_interrupts_then() {
    let (unit, memory) = HARDWARE.unit(Config::full());
    let parts = needs(&memory);
    let mut machine = HARDWARE.enable(unit, memory, unit, parts).expect("it comes into service");
    machine.assign(DISK, ALL);
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.attach(DISK, pasid(5), &tree);
    fail(unit);
    ask_once(unit);
    assert_eq!(unit.messages(), [], "masked");

    machine.vtd.events.enable_interrupts(FAULT, REQUEST);

    let mut messages = unit.messages();
    messages.sort_by_key(|message| message.data);
    assert_eq!(messages, [FAULT, REQUEST]);
    assert_eq!(machine.pass().len(), 2);
}

#[test]
fn a_message_to_a_far_processor_is_programmed_whole() {
    let mut machine = machine(Config::full());
    let far = Message { address: 0x0001_2300_FEE4_5008, data: 0xFFFF };
    machine.vtd.events.enable_interrupts(far, REQUEST);

    fail(machine.unit);

    assert_eq!(machine.unit.messages(), [far]);
    machine.assert_lawful();
}

#[test]
fn a_request_of_a_device_without_page_requests_is_a_fault_and_no_request() {
    let mut machine = HARDWARE.machine(Config::full());
    machine.assign(DISK, Features { device_tlb: true, page_requests: false, pasid: true });
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.attach(DISK, pasid(5), &tree);

    // SCT.8.
    let refused = machine.unit.page_request(request(DISK, 1, true));
    assert_eq!(refused, Requested::Refused(Refusal::Fault(0x47)));

    let events = machine.pass();
    let [Event::Fault(fault)] = events[..] else { panic!("{events:?}") };
    assert_eq!((fault.access, fault.reason), (Access::PageRequest, FaultReason::NotAttached));
}

mod threads {
    use super::*;
    use std::{
        sync::{
            atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
            mpsc,
        },
        thread,
        time::{Duration, Instant},
    };

    /// Groups that each of the two devices asks for.
    const GROUPS: usize = 3_000;

    #[test]
    fn one_core_takes_events_while_two_others_answer_and_invalidate() {
        let machine = machine(Config::full());
        // It counts on a unit that is quick.
        machine.unit.resume();
        let unit = machine.unit;
        let mut events = machine.vtd.events;
        let commands = Mutex::new(machine.vtd.commands);
        let (work, answers) = mpsc::channel::<PageRequest>();
        let answers = Mutex::new(answers);
        let (done, seen) = (AtomicBool::new(false), AtomicUsize::new(0));

        thread::scope(|scope| {
            // The devices: each asks for one group after the other, as soon as a number is free.
            for stream in [DISK, NIC] {
                let done = &done;
                scope.spawn(move || {
                    for n in 0..GROUPS {
                        let request = request(stream, (n % 16) as u16, true);
                        while unit.page_request(request) != Requested::Queued {
                            assert!(!done.load(SeqCst), "nobody answers any more");
                            thread::yield_now();
                        }
                    }
                });
            }
            // Two cores: each sends answers, and every few of them an invalidation.
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut answered = 0;
                    loop {
                        let next = answers.lock().expect("no panic").recv();
                        let Ok(PageRequest { stream, tag, .. }) = next else { return };
                        let response = PageResponse { stream, tag, outcome: Outcome::Success };
                        let sent = commands.lock().expect("no panic").respond(response);
                        assert_eq!(sent, Ok(()));
                        answered += 1;
                        if answered % 8 == 0 {
                            let ticket = commands
                                .lock()
                                .expect("no panic")
                                .submit(&[Invalidation::PageRequestDrain])
                                .expect("there is room: the unit is quick");
                            let polled = commands.lock().expect("no panic").poll(ticket);
                            assert_eq!(polled, Completion::Done, "the unit completes at once");
                        }
                    }
                });
            }
            // The service core. If it fails, so do the others: they get no more work, and see that it ended.
            let (work, _ends) = (work, Ends(&done));
            let mut last = Instant::now();
            while seen.load(SeqCst) < 2 * GROUPS {
                assert!(last.elapsed() < Duration::from_secs(20), "no more requests come");
                events.acknowledge();
                while let Some(event) = events.next_event() {
                    last = Instant::now();
                    match event {
                        Event::PageRequest(request) => {
                            let number = seen.fetch_add(1, SeqCst) + 1;
                            assert!(number <= 2 * GROUPS, "more requests are reported than were sent");
                            work.send(request).expect("the other cores listen");
                        }
                        other => panic!("{other:?}"),
                    }
                }
            }
        });

        assert_eq!(unit.answers().len(), 2 * GROUPS);
        assert_eq!(unit.waiting_groups(), []);
        assert_eq!(unit.violations(), [""; 0]);
    }
}
