//! What the SMMUv3 driver is told by the modelled unit, and what it tells it: events, page requests, answers, commands.

use crate::{HARDWARE, STREAM_TABLE};
use hosted::{
    Hardware, Moment, Random,
    smmu::{EVENTS, Machine, REQUESTS, Stage, StreamTable, Tapped, own, stream_place, translation},
};
use iommu::{
    Access, Attachment, Bus, Commands, Completion, DomainId, Error, Event, Events, Failure, FailureCause,
    FaultReason, FaultRecord, Features, GroupTag, Invalidation, Iova, Outcome, PAGE_SIZE, PageRequest,
    PageResponse, Pasid, Perms, PhysAddr, Stages, StreamId, Tables,
};
use models::smmuv3::{Config, Refusal, Requested, SmmuUnit, Wire};
use smmuv3::events::UnitError;
use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

const DISK: StreamId = StreamId(0x108);
const NIC: StreamId = StreamId(0x28);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: false };
const NOTHING: Perms = Perms { read: false, write: false, execute: false, privileged: false };

const GERROR: usize = 0x060;
const GERRORN: usize = 0x064;
const CMDQ_BASE: usize = 0x090;
const CMDQ_PROD: usize = 0x098;
const CMDQ_CONS: usize = 0x09C;
/// Entries of the command queue, and answers that there is room for.
const COMMANDS: usize = HARDWARE.commands();
const ANSWERS: usize = HARDWARE.answers();
/// Bits of GERROR.
const CMDQ_ERR: u32 = 1 << 0;
const EVENTQ_ABT_ERR: u32 = 1 << 2;
const PRIQ_ABT_ERR: u32 = 1 << 3;
const SFM_ERR: u32 = 1 << 8;

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

fn request(stream: StreamId, index: u16, last: bool) -> PageRequest {
    let tag = GroupTag { pasid: None, index };
    PageRequest { stream, tag, iova: Iova(0x7000), perms: Perms::READ_WRITE, last }
}

fn answer(request: PageRequest, outcome: Outcome) -> PageResponse {
    PageResponse { stream: request.stream, tag: request.tag, outcome }
}

fn machine_on<B: Bus + Clone>(unit: &'static SmmuUnit, memory: models::memory::Memory, bus: B) -> Machine<B> {
    let parts = HARDWARE.needs(STREAM_TABLE, &memory);
    let mut machine = HARDWARE.enable_smmu(unit, memory, bus, parts).expect("it comes into service");
    machine.smmu.events.enable_interrupts().expect("it is acknowledged");
    machine.assign(DISK, ALL);
    machine.assign(NIC, ALL);
    machine
}

/// A machine with two devices that send page requests.
fn machine() -> Machine {
    let (unit, memory) = HARDWARE.smmu_unit(Config::full());
    machine_on(unit, memory, unit)
}

/// An access that is refused and recorded: a stream that nobody assigned.
fn fault(unit: &SmmuUnit) {
    assert_eq!(unit.dma_read(StreamId(5), None, Iova(0), 1), Err(Refusal::Fault(0x04)));
}

fn count(events: &[Event], is: fn(&Event) -> bool) -> usize {
    events.iter().filter(|event| is(event)).count()
}

mod page_requests {
    use super::*;

    #[test]
    fn they_arrive_as_they_were_sent() {
        let mut machine = machine();
        let requests = [
            request(DISK, 0x1FF, false),
            request(NIC, 3, true),
            PageRequest { tag: GroupTag { pasid: pasid(5), index: 2 }, ..request(DISK, 0, true) },
            PageRequest {
                tag: GroupTag { pasid: pasid(0xF_FFFF), index: 4 },
                perms: Perms { privileged: true, execute: true, ..Perms::READ },
                ..request(DISK, 0, true)
            },
            PageRequest { iova: Iova(0x7FFF_FFFF_F000), ..request(DISK, 5, false) },
            // Asks for nothing, as the last, without PASID: no stop marker.
            PageRequest { perms: NOTHING, ..request(DISK, 6, true) },
        ];
        for request in requests {
            assert_eq!(machine.unit.page_request(request), Requested::Queued);
        }
        assert_eq!(machine.unit.stop_marker(DISK, Pasid::new(7).expect("20 bits")), Requested::Queued);

        let events = machine.pass();

        assert_eq!(events[..6], requests.map(Event::PageRequest));
        assert_eq!(events[6..], [Event::StopMarker { stream: DISK, pasid: pasid(7) }]);
        assert_eq!(machine.unit.pulses(), [Wire::PageRequest], "one for all of them");
        // Each last request waits for an answer, but for the stop marker.
        for (at, outcome) in
            [(1, Outcome::Success), (2, Outcome::Invalid), (3, Outcome::Success), (5, Outcome::Invalid)]
        {
            assert_eq!(machine.smmu.commands.respond(answer(requests[at], outcome)), Ok(()));
        }
        assert_eq!(machine.unit.waiting_groups(), []);
        machine.assert_lawful();
    }

    #[test]
    fn their_queue_wraps_many_times() {
        let mut machine = machine();
        let mut index = 0;
        for round in 0..40 {
            let count = [1, REQUESTS as u16, 60, 3][round % 4];
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
        let mut machine = machine();
        let mut next = 0..;
        // Full, five times over: nothing overflows, although the driver has not yet found the queue empty.
        for round in 0..5 {
            for index in next.by_ref().take(REQUESTS) {
                let queued = machine.unit.page_request(request(DISK, index % 512, false));
                assert_eq!(queued, Requested::Queued, "round {round}");
            }
            for _ in 0..REQUESTS {
                assert!(matches!(machine.smmu.events.next_request(), Some(Event::PageRequest(_))));
            }
        }
        machine.assert_lawful();
    }

    #[test]
    fn what_comes_after_the_queue_was_found_empty_is_found_by_the_next_pass() {
        let mut machine = machine();
        machine.smmu.events.acknowledge();
        assert_eq!(machine.smmu.events.next_ordinary(), None);
        assert_eq!(machine.unit.page_request(request(DISK, 1, true)), Requested::Queued);

        machine.smmu.events.acknowledge();

        let event = machine.smmu.events.next_request();
        assert_eq!(event, Some(Event::PageRequest(request(DISK, 1, true))));
        machine.assert_lawful();
    }

    #[test]
    fn an_overflow_is_reported_after_all_that_was_queued_and_service_goes_on() {
        let mut machine = machine();
        // The flag of the overflow turns each time.
        for round in 0..3 {
            for index in 0..REQUESTS as u16 {
                assert_eq!(machine.unit.page_request(request(DISK, index, false)), Requested::Queued);
            }
            assert_eq!(machine.unit.page_request(request(NIC, 1, true)), Requested::Lost);
            let answered = machine.unit.auto_answered();
            assert_eq!(
                (answered.len(), answered[round].outcome),
                (round + 1, Outcome::Success),
                "by the unit"
            );

            let events = machine.pass();

            assert_eq!(events.len(), REQUESTS + 1);
            assert_eq!(events[REQUESTS], Event::RequestsLost);
            assert_eq!(machine.pass(), [], "once");
            assert_eq!(machine.unit.page_request(request(NIC, 2, false)), Requested::Queued);
            assert_eq!(machine.pass(), [Event::PageRequest(request(NIC, 2, false))]);
        }
        machine.assert_lawful();
    }

    /// STE.PPAR: "PRI queue overflow". The devices here want the PASID of their requests in answers, as those do that are
    /// used with PASIDs; an answer without it ends another group of theirs, or is an error to them.
    #[test]
    fn what_the_unit_answers_by_itself_has_the_pasid_that_the_device_asked_with() {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let parts = HARDWARE.needs(STREAM_TABLE, &memory);
        let mut machine = HARDWARE.enable_smmu(unit, memory, unit, parts).expect("it comes into service");
        machine.assign(DISK, Features { pasid: true, ..ALL });
        let [tree, other] = [Stage::One, Stage::Two].map(|stage| machine.tree(stage));
        let of = |machine: &mut Machine, pasid, translation| {
            machine.attach_to(DISK, pasid, translation).expect("it can be attached")
        };
        let mut expected = Vec::new();
        let mut overflow = |machine: &mut Machine| {
            for index in 0..REQUESTS as u16 {
                assert_eq!(machine.unit.page_request(request(DISK, index, false)), Requested::Queued);
            }
            for pasid in [None, pasid(5), pasid(0xF_FFFF)] {
                let tag = GroupTag { pasid, index: 3 };
                let lost = machine.unit.page_request(PageRequest { tag, ..request(DISK, 3, true) });
                assert_eq!(lost, Requested::Lost);
                expected.push((tag, Outcome::Success));
            }
            machine.pass();
            machine.unit.forget_page_requests(DISK);
            let answered: Vec<_> =
                machine.unit.auto_answered().iter().map(|it| (it.tag, it.outcome)).collect();
            assert_eq!(answered, expected);
        };

        let five = of(&mut machine, pasid(5), translation(Stage::One, &tree));
        overflow(&mut machine);
        machine.detach(five);
        machine.block(DISK);
        machine.assign(DISK, Features { pasid: true, ..ALL });
        let plain = of(&mut machine, None, translation(Stage::Two, &other));
        overflow(&mut machine);
        machine.detach(plain);
        // A stream that is blocked and says so has an entry that is valid.
        let (leaving, invalidations) = machine.smmu.tables.block(DISK).expect("it is assigned");
        machine.invalidate(&invalidations);
        let silent = machine.smmu.tables.silence(DISK).expect("it is blocked");
        machine.invalidate(&silent);
        overflow(&mut machine);
        machine.smmu.tables.finish(leaving);
        machine.assert_lawful();
    }

    #[test]
    fn what_an_aborted_write_lost_is_told_after_what_was_queued() {
        let mut machine = machine();
        for _ in 0..2 {
            assert_eq!(machine.unit.page_request(request(DISK, 1, false)), Requested::Queued);
            machine.unit.raise_errors(PRIQ_ABT_ERR);
            assert_eq!(machine.unit.page_request(request(DISK, 2, false)), Requested::Refused);

            assert_eq!(
                machine.pass(),
                [
                    Event::PageRequest(request(DISK, 1, false)),
                    Event::RequestsLost,
                    Event::CommandsFailed { status: PRIQ_ABT_ERR }
                ]
            );
            assert_eq!(machine.recover(), []);
            assert_eq!(machine.unit.read32(GERROR) ^ machine.unit.read32(GERRORN), 0, "acknowledged");
            assert_eq!(machine.unit.page_request(request(DISK, 3, false)), Requested::Queued);
            assert_eq!(machine.pass(), [Event::PageRequest(request(DISK, 3, false))]);
        }
        machine.assert_lawful();
    }

    /// What is to happen at the access to a register that the number counts down to.
    type Plan = Arc<Mutex<Option<usize>>>;

    /// Runs a pass in which a burst of requests comes at each possible moment, then further passes only as long as the unit
    /// pulses.
    fn burst_at_every_moment(before: u16, burst: u16) {
        for moment in 0.. {
            let (unit, memory) = HARDWARE.smmu_unit(Config::full());
            let plan = Plan::default();
            let queued = Arc::new(AtomicUsize::new(before.into()));
            let (due, arrived) = (Arc::clone(&plan), Arc::clone(&queued));
            let bus = Tapped::new(unit, move |unit, kind| {
                let mut due = due.lock().expect("no test panics here");
                match *due {
                    Some(0) if kind == Moment::Access => {
                        *due = None;
                        for n in 0..burst {
                            let taken = unit.page_request(request(DISK, (before + n) % 512, false));
                            arrived.fetch_add(usize::from(taken == Requested::Queued), SeqCst);
                        }
                    }
                    Some(left) if kind == Moment::Access => *due = Some(left - 1),
                    _ => {}
                }
            });
            let mut machine = machine_on(unit, memory, bus);
            unit.pulses();
            for index in 0..before {
                assert_eq!(unit.page_request(request(DISK, index, false)), Requested::Queued);
            }
            unit.pulses();
            *plan.lock().expect("no test panics here") = Some(moment);

            let mut events = machine.pass();
            if plan.lock().expect("no test panics here").take().is_some() {
                assert!(moment > 3, "a pass has some accesses");
                return;
            }
            let mut passes = 1;
            while !unit.pulses().is_empty() {
                events.extend(machine.pass());
                passes += 1;
                assert!(passes < 5, "interrupts without an end");
            }

            let sent = queued.load(SeqCst);
            assert_eq!(
                count(&events, |event| matches!(event, Event::PageRequest(_))),
                sent,
                "at access {moment}"
            );
            let lost = usize::from(sent < usize::from(before) + usize::from(burst));
            let told = count(&events, |event| *event == Event::RequestsLost);
            assert_eq!(told, lost, "at access {moment}");
            assert!(
                lost == 0 || events.last() == Some(&Event::RequestsLost),
                "what was queued is told first"
            );
            assert_eq!(machine.pass(), [], "at access {moment}: left behind without an interrupt");
            machine.assert_lawful();
        }
    }

    #[test]
    fn one_that_arrives_during_a_pass_is_reported_in_it_or_interrupts_again() {
        burst_at_every_moment(0, 1);
        burst_at_every_moment(3, 2);
    }

    #[test]
    fn a_burst_that_overflows_during_a_pass_loses_nothing_that_was_queued() {
        burst_at_every_moment(0, 300);
        burst_at_every_moment(4, 300);
    }
}

mod faults {
    use super::*;

    #[test]
    fn they_are_reported_in_their_order_with_all_that_is_known() {
        let mut machine = machine();
        let tree = machine.tree(Stage::One);
        machine.attach(DISK, Stage::One, &tree);
        machine.unit.pulses();

        assert!(machine.read(DISK, None, Iova(0x1234_5678)).is_err());
        assert!(machine.unit.dma_write(DISK, None, Iova(0x9000), &[1]).is_err());
        assert!(machine.read(NIC, pasid(3), Iova(0)).is_err());

        let fault = |stream, access, iova, reason, code| {
            let record = FaultRecord { stream, pasid: None, access, iova: Iova(iova), reason, code };
            Event::Fault(record)
        };
        let events = machine.pass();
        assert_eq!(
            events[..2],
            [
                fault(DISK, Access::Read, 0x1234_5000, FaultReason::NotMapped, 0x10),
                fault(DISK, Access::Write, 0x9000, FaultReason::NotMapped, 0x10)
            ]
        );
        // C_BAD_STE tells the PASID (SSV), but neither access nor address.
        let Event::Fault(last) = &events[2] else { panic!("{events:?}") };
        assert_eq!((last.stream, last.pasid, last.access, last.code), (NIC, pasid(3), Access::Unknown, 0x04));
        assert_eq!(machine.unit.pulses(), [Wire::Event], "one for all of them");
        machine.assert_lawful();
    }

    #[test]
    fn their_queue_wraps_many_times() {
        let mut machine = machine();
        for count in [1, EVENTS, 60, 3].into_iter().cycle().take(20) {
            (0..count).for_each(|_| fault(machine.unit));

            assert_eq!(machine.pass().len(), count);
        }
        machine.assert_lawful();
    }

    #[test]
    fn lost_ones_are_told_after_the_recorded_and_recording_goes_on() {
        let mut machine = machine();
        for _ in 0..3 {
            (0..EVENTS + 10).for_each(|_| fault(machine.unit));

            let events = machine.pass();

            assert_eq!(events.len(), EVENTS + 1);
            assert_eq!(events[EVENTS], Event::FaultsLost);
            assert_eq!(machine.pass(), [], "once");
            fault(machine.unit);
            assert_eq!(machine.pass().len(), 1);
        }
        machine.assert_lawful();
    }

    #[test]
    fn an_aborted_write_is_told_and_acknowledged() {
        let mut machine = machine();
        for _ in 0..2 {
            machine.unit.raise_errors(EVENTQ_ABT_ERR);
            let told = [Event::FaultsLost, Event::CommandsFailed { status: EVENTQ_ABT_ERR }];
            assert_eq!(machine.pass(), told);
            assert_eq!(machine.recover(), []);
            assert_eq!(machine.pass(), [], "once");
            fault(machine.unit);
            assert_eq!(machine.pass().len(), 1);
        }
        machine.assert_lawful();
    }

    /// A ticket that failed is no error that was told, and an error may come after the look.
    #[test]
    fn a_recovery_that_nobody_was_told_to_make_ends_no_error_that_lost_reports() {
        for (error, lost) in [(EVENTQ_ABT_ERR, Event::FaultsLost), (PRIQ_ABT_ERR, Event::RequestsLost)] {
            let mut machine = machine();
            let half = request(DISK, 1, false);
            assert_eq!(machine.unit.page_request(half), Requested::Queued);
            assert_eq!(machine.pass(), [Event::PageRequest(half)]);
            machine.unit.raise_errors(error | 1 << 4);

            assert_eq!(machine.recover(), []);

            assert_eq!(machine.unit.read32(GERROR) ^ machine.unit.read32(GERRORN), error);
            assert_eq!(machine.pass(), [lost, Event::CommandsFailed { status: error }]);
            assert_eq!(machine.recover(), []);
            assert_eq!(machine.unit.read32(GERROR) ^ machine.unit.read32(GERRORN), 0, "acknowledged");
            assert_eq!(machine.pass(), [], "once");
            machine.assert_lawful();
        }
    }

    /// A pass has an end also where its queue has none: what the error lost is told by the next.
    #[test]
    fn an_error_is_not_told_before_what_it_lost() {
        let mut machine = machine();
        machine.unit.raise_errors(PRIQ_ABT_ERR | EVENTQ_ABT_ERR);
        machine.smmu.events.look_for_errors();

        assert_eq!(machine.smmu.events.next_fault(), Some(Event::FaultsLost));
        let told = machine.smmu.events.next_fault();
        assert_eq!(told, Some(Event::CommandsFailed { status: EVENTQ_ABT_ERR }));
        machine.smmu.commands.told(EVENTQ_ABT_ERR);
        assert_eq!(machine.smmu.commands.recover(), None);
        assert_eq!(machine.smmu.events.next_fault(), None);

        assert_eq!(machine.pass(), [Event::RequestsLost, Event::CommandsFailed { status: PRIQ_ABT_ERR }]);
        assert_eq!(machine.recover(), []);
        assert_eq!(machine.pass(), []);
        machine.assert_lawful();
    }

    #[test]
    fn every_error_is_told_by_name_and_acknowledged_by_recovery_alone() {
        let mut machine = machine();
        // Bit by bit: GERROR of facts 8.7.
        for (bit, error) in [
            (2, UnitError::EventQueue),
            (3, UnitError::RequestQueue),
            (4, UnitError::SyncMessage),
            (5, UnitError::EventMessage),
            (6, UnitError::RequestMessage),
            (7, UnitError::ErrorMessage),
        ] {
            machine.unit.raise_errors(1 << bit);

            let events = machine.pass();

            let Some(&Event::CommandsFailed { status }) = events.last() else { panic!("{events:?}") };
            assert_eq!(UnitError::of(status).collect::<Vec<_>>(), [error]);
            assert_eq!(machine.pass(), events, "until it is acknowledged, it is told once in each pass");
            assert_eq!(machine.recover(), [], "it stops no commands");
            assert_eq!(machine.pass(), []);
            machine.invalidate(&[Invalidation::All]);
        }
        let every = [UnitError::CommandQueue, UnitError::ServiceFailure];
        assert_eq!(UnitError::of(1 | 1 << 8).collect::<Vec<_>>(), every);
        let foreign = [UnitError::OtherCommandQueue, UnitError::DevicePermission];
        assert_eq!(UnitError::of(1 << 9 | 1 << 10).collect::<Vec<_>>(), foreign);
        assert_eq!(UnitError::of(1 << 1 | u32::MAX << 11).count(), 0, "reserved");
        machine.assert_lawful();
    }

    #[test]
    fn several_errors_are_told_together_and_a_unit_in_service_failure_mode_refuses_everything() {
        let mut machine = machine();
        let open = machine.smmu.commands.submit(&[]).expect("there is room");
        machine.wait(open);
        machine.unit.pause();
        let late = machine.smmu.commands.submit(&[Invalidation::All]).expect("there is room");
        let all = EVENTQ_ABT_ERR | PRIQ_ABT_ERR | SFM_ERR;
        machine.unit.raise_errors(all);

        let events = machine.pass();

        assert_eq!(events[..2], [Event::RequestsLost, Event::FaultsLost]);
        assert_eq!(events[2..], [Event::CommandsFailed { status: all }]);
        let stopped = Failure { cause: FailureCause::Stopped, stream: None, ticket: None };
        assert_eq!(machine.recover(), [stopped], "once");
        assert_eq!(machine.pass(), []);
        assert_eq!(machine.smmu.commands.poll(open), Completion::Done, "it was before");
        assert_eq!(machine.smmu.commands.poll(late), Completion::Failed);
        for batch in [&[][..], &[commands::pages_of(Stages::First, false, 7, 1)]] {
            assert!(matches!(machine.smmu.commands.submit(batch), Err(Error::Failed { .. })));
        }
        let back = machine.smmu.commands.respond(answer(request(DISK, 1, true), Outcome::Success));
        assert!(
            matches!(&back, Err((back, Error::Failed { .. })) if back.tag.index == 1),
            "the answer comes back: {back:?}"
        );
        machine.assert_lawful();
    }
}

mod messages {
    use super::*;
    use iommu::Message;
    use smmuv3::Messages;

    const MESSAGES: Messages = Messages {
        errors: Message { address: 0x0809_0040, data: 1 },
        events: Message { address: 0x00FF_FFFF_FFFF_FFFC, data: 0xFFFF_FFFF },
        requests: Message { address: 4, data: 0 },
    };

    fn config() -> Config {
        Config { idr0: Config::full().idr0 | 1 << 13, ..Config::full() }
    }

    #[test]
    fn a_unit_interrupts_by_messages_and_no_more_by_wires() {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, config());
        // By wires first: what is told of messages is told while interrupts are off.
        machine.smmu.events.enable_interrupts().expect("it is acknowledged");
        machine.smmu.events.enable_messages(&MESSAGES).expect("it is acknowledged");
        machine.assign(NIC, ALL);
        // Commands end by messages, too.
        assert_eq!(machine.unit.messages().iter().filter(|message| message.0 < 0x0900_0000).count(), 0);
        assert!(machine.unit.pulses().iter().all(|&wire| wire == Wire::CommandSync));

        fault(machine.unit);
        assert_eq!(machine.unit.messages(), [(0x00FF_FFFF_FFFF_FFFC, 0xFFFF_FFFF)]);
        assert_eq!(machine.unit.page_request(request(NIC, 1, true)), Requested::Queued);
        assert_eq!(machine.unit.messages(), [(4, 0)]);
        machine.unit.raise_errors(1 << 2);
        assert_eq!(machine.unit.messages(), [(0x0809_0040, 1)]);

        assert_eq!(machine.unit.pulses(), []);
        // CFG0, CFG1, CFG2 of each: R-words by hand. CFG2: MemAttr 1 is Device-nGnRE.
        let words = [0x068, 0x0B0, 0x0D0]
            .map(|at| (machine.unit.read64(at), machine.unit.read32(at + 8), machine.unit.read32(at + 12)));
        let expected = [(0x0809_0040, 1, 1), (0x00FF_FFFF_FFFF_FFFC, 0xFFFF_FFFF, 1), (4, 0, 1)];
        assert_eq!(words, expected);
        machine.assert_lawful();
    }

    #[test]
    fn a_message_that_is_lost_is_told_by_its_name_and_what_it_was_about_is_found() {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, config());
        machine.smmu.events.enable_messages(&MESSAGES).expect("it is acknowledged");
        machine.assign(NIC, ALL);
        machine.unit.fail_messages(true);

        fault(machine.unit);

        let events = machine.pass();
        let Event::CommandsFailed { status } = events[1] else { panic!("{events:?}") };
        let names: Vec<_> = UnitError::of(status).collect();
        assert_eq!(names, [UnitError::EventMessage, UnitError::ErrorMessage]);
        assert!(matches!(events[0], Event::Fault(_)));
        assert_eq!(machine.recover(), []);
        assert_eq!(machine.pass(), []);
        machine.assert_lawful();
    }

    #[test]
    fn messages_that_cannot_be_are_refused() {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, config());
        for address in [0, 1, 0x0809_0042, 1 << 56, u64::MAX] {
            let messages = Messages { events: Message { address, data: 1 }, ..MESSAGES };
            let refused = machine.smmu.events.enable_messages(&messages);
            assert!(matches!(refused, Err(Error::Unsupported { .. })), "{address:#x}: {refused:?}");
        }
        machine.assert_lawful();
        // Without page requests, their message is not looked at; without messages, there are none.
        let idr0 = (config().idr0) & !(1 << 16);
        let mut machine = HARDWARE.smmu(STREAM_TABLE, Config { idr0, ..config() });
        let messages = Messages { requests: Message { address: 0, data: 0 }, ..MESSAGES };
        assert_eq!(machine.smmu.events.enable_messages(&messages), Ok(()));
        machine.assert_lawful();
        let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
        let refused = machine.smmu.events.enable_messages(&MESSAGES);
        assert!(matches!(refused, Err(Error::Unsupported { feature: "IDR0.MSI" })), "{refused:?}");
        machine.assert_lawful();
    }
}

mod stalls {
    use super::*;
    use models::smmuv3::Ended;

    const HERE: Iova = Iova(0x4_5000);
    /// Of the event queue, and of stalls at one time, as `Config::full` has them.
    const STALL_MAX: usize = 8;

    /// A machine whose device DISK is no PCI device: its faults stall.
    fn machine() -> (Machine, Attachment, hosted::smmu::StageTree) {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let parts = smmuv3::Memory {
            stalling: [DISK].into_iter().collect(),
            ..HARDWARE.needs(STREAM_TABLE, &memory)
        };
        let mut machine = HARDWARE.enable_smmu(unit, memory, unit, parts).expect("it comes into service");
        machine.smmu.events.enable_interrupts().expect("it is acknowledged");
        machine.assign(DISK, Features::default());
        machine.assign(NIC, ALL);
        let tree = machine.tree(Stage::One);
        let attachment = machine.attach(DISK, Stage::One, &tree);
        (machine, attachment, tree)
    }

    /// Has the tables of a device say that its faults stall, behind the driver's back.
    fn have_stall(machine: &mut Machine, stream: StreamId) {
        // S is bit 44 of a context descriptor's first word; S1STALLD bit 27 of an entry's second.
        let context = PhysAddr(machine.stream_word(stream, 0) & 0x00FF_FFFF_FFFF_FFC0);
        let word = machine.memory.device_load(context).expect("inside");
        machine.memory.device_store(context, word | 1 << 44).expect("inside");
        let entry = stream_place(machine.unit, &machine.memory, stream).expect("it has an entry");
        let word = machine.memory.device_load(PhysAddr(entry.0 + 8)).expect("inside");
        machine.memory.device_store(PhysAddr(entry.0 + 8), word & !(1 << 27)).expect("inside");
        machine.invalidate(&[Invalidation::Device { stream, device_tlb: false }]);
    }

    fn requests(events: &[Event]) -> Vec<PageRequest> {
        let request = |event: &Event| match *event {
            Event::PageRequest(request) => Some(request),
            _ => None,
        };
        events.iter().filter_map(request).collect()
    }

    #[test]
    fn an_access_that_waits_is_a_request_of_its_own_and_ends_as_it_is_answered() {
        let (mut machine, _, tree) = machine();
        let stall = |machine: &Machine| machine.unit.dma_write(DISK, None, Iova(HERE.0 + 0x123), &[1]);
        for (outcome, ended) in [
            (Outcome::Success, Ended::Retried),
            (Outcome::Invalid, Ended::Aborted),
            (Outcome::Failure, Ended::Terminated),
        ] {
            let Err(Refusal::Stalled(tag)) = stall(&machine) else { panic!("it stalls") };
            let perms = Perms { write: true, ..NOTHING };
            let tag = GroupTag { pasid: None, index: tag };
            let asked = PageRequest { stream: DISK, tag, iova: HERE, perms, last: true };
            assert_eq!(machine.pass(), [Event::PageRequest(asked)]);
            assert_eq!(machine.unit.stalled(), [(DISK, tag.index)]);

            assert_eq!(machine.smmu.commands.respond(answer(asked, outcome)), Ok(()));

            assert_eq!(machine.unit.stalled(), []);
            assert_eq!(machine.unit.ended_stalls().pop(), Some((DISK, tag.index, ended)));
        }
        machine.map(&tree, HERE, 0, Perms::READ_WRITE);
        assert_eq!(stall(&machine), Ok(()), "it is tried again, and there is a page now");
        machine.assert_lawful();
    }

    #[test]
    fn what_an_access_was_about_to_do_is_what_it_asks_for() {
        let (mut machine, ..) = machine();
        // E2 as it is; then RnW (35), InD (34), PnU (33) one by one: F_TRANSLATION of stream 0x108, STALL, STAG 0x1234.
        let word = |bits: u64| [0x0108_0000_0010, 0x0200_8000_1234 | bits, 0x7F00_0000_1FFF, 0];
        machine.unit.record([0x0108_0000_5813, 0x0202_8000_0042, 0x7F00_0000_1000, 0]);
        for bits in [0, 1 << 35, 1 << 35 | 1 << 34, 1 << 33] {
            machine.unit.record(word(bits));
        }

        let asked = requests(&machine.pass());

        let write = Perms { write: true, ..NOTHING };
        let with = |pasid, index, perms| PageRequest {
            stream: DISK,
            tag: GroupTag { pasid, index },
            iova: Iova(0x7F00_0000_1000),
            perms,
            last: true,
        };
        let expected = [
            with(pasid(5), 0x42, Perms { privileged: true, ..write }),
            with(None, 0x1234, write),
            with(None, 0x1234, Perms::READ),
            with(None, 0x1234, Perms { execute: true, ..Perms::READ }),
            with(None, 0x1234, Perms { privileged: true, ..write }),
        ];
        assert_eq!(asked, expected);
    }

    #[test]
    fn only_faults_of_tables_stall() {
        let (mut machine, ..) = machine();
        // The bits of STALL and STAG mean something else elsewhere: R of F_BAD_ATS_TREQ, Reason of others.
        let others =
            [0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0A, 0x0B, 0x20, 0x21, 0x24, 0x25];
        for number in others {
            machine.unit.record([0x0108_0000_0000 | number, 0x8000_0042, 0, 0]);
        }

        assert_eq!(count(&machine.pass(), |event| matches!(event, Event::Fault(_))), others.len());
    }

    #[test]
    fn accesses_to_one_page_are_told_and_answered_one_by_one() {
        let (mut machine, ..) = machine();
        let stalled = [(); 3].map(|()| machine.read(DISK, None, HERE));
        assert!(stalled.iter().all(|refusal| matches!(refusal, Err(Refusal::Stalled(_)))));

        let asked = requests(&machine.pass());

        assert_eq!(asked.len(), 3);
        for request in asked {
            machine.smmu.commands.respond(answer(request, Outcome::Success)).expect("there is room");
        }
        assert_eq!((machine.unit.stalled(), machine.unit.ended_stalls().len()), (vec![], 3));
        machine.assert_lawful();
    }

    #[test]
    fn requests_and_stalls_are_answered_each_in_its_manner() {
        let (mut machine, ..) = machine();
        // The same number: a group of NIC's, a stall of DISK's.
        let Err(Refusal::Stalled(tag)) = machine.read(DISK, None, HERE) else { panic!("it stalls") };
        assert_eq!(machine.unit.page_request(request(NIC, tag, true)), Requested::Queued);
        fault(machine.unit);

        let mut asked = Vec::new();
        // All of them are requests of one pass: whoever drains the requests has drained the stalls.
        while let Some(event) = machine.smmu.events.next_request() {
            asked.push(event);
        }
        assert!(
            matches!(asked[..], [Event::PageRequest(_), Event::PageRequest(_), Event::Fault(_)]),
            "{asked:?}"
        );
        for request in requests(&asked) {
            machine.smmu.commands.respond(answer(request, Outcome::Invalid)).expect("there is room");
        }

        assert_eq!(machine.unit.ended_stalls(), [(DISK, tag, Ended::Aborted)]);
        let answers = machine.unit.answers();
        assert_eq!(answers.iter().map(|a| (a.stream, a.tag.index)).collect::<Vec<_>>(), [(NIC, tag)]);
        machine.assert_lawful();
    }

    #[test]
    fn a_device_that_should_not_stall_is_told_so_and_its_access_ends() {
        let (mut machine, ..) = machine();
        let tree = machine.tree(Stage::One);
        machine.attach(NIC, Stage::One, &tree);
        have_stall(&mut machine, NIC);
        let Err(Refusal::Stalled(tag)) = machine.read(NIC, None, HERE) else { panic!("it stalls") };

        let asked = requests(&machine.pass());

        assert_eq!((asked.len(), asked[0].stream), (1, NIC));
        assert!(asked[0].tag.index > 0x1FF, "no group of its page requests is meant");
        // Even if somebody has it tried again: it would stall again.
        machine.smmu.commands.respond(answer(asked[0], Outcome::Success)).expect("there is room");
        assert_eq!(machine.unit.ended_stalls(), [(NIC, tag, Ended::Aborted)]);
        machine.assert_lawful();
    }

    #[test]
    fn a_full_event_queue_loses_no_access_that_waits() {
        let (mut machine, ..) = machine();
        // An answer makes room at once.
        machine.unit.resume();
        (0..EVENTS).for_each(|_| fault(machine.unit));
        for _ in 0..3 * STALL_MAX {
            assert!(matches!(machine.read(DISK, None, HERE), Err(Refusal::Stalled(_))));
        }
        let mut ended = 0;
        for _ in 0..10 {
            for request in requests(&machine.pass()) {
                machine.smmu.commands.respond(answer(request, Outcome::Invalid)).expect("there is room");
                ended += 1;
            }
        }

        assert_eq!((ended, machine.unit.stalled()), (3 * STALL_MAX, vec![]));
        machine.assert_lawful();
    }

    #[test]
    fn a_device_that_is_taken_away_leaves_no_access_waiting() {
        let (mut machine, attachment, _) = machine();
        // More than the unit tells of at one time.
        for _ in 0..STALL_MAX + 3 {
            assert!(matches!(machine.read(DISK, None, HERE), Err(Refusal::Stalled(_))));
        }
        let known = requests(&machine.pass());
        assert_eq!(known.len(), STALL_MAX);

        // Blocked, and the unit knows; what was reported is answered; what remains is ended; what comes now is discarded.
        let (leaving, invalidations) = machine.smmu.tables.block(DISK).expect("it is assigned");
        machine.invalidate(&invalidations);
        let (detached, invalidations) = machine.smmu.tables.detach(attachment).expect("it is attached");
        machine.invalidate(&invalidations);
        for request in known {
            machine.smmu.commands.respond(answer(request, Outcome::Invalid)).expect("there is room");
        }
        machine.invalidate(&[Invalidation::Stalls { stream: DISK }]);
        assert_eq!(machine.unit.stalled(), []);
        machine.pass();
        machine.smmu.tables.finish(detached);
        machine.smmu.tables.finish(leaving);

        assert_eq!(machine.unit.ended_stalls().len(), STALL_MAX + 3);
        // It is whoever's next, and nothing of the time before is left.
        assert_eq!(machine.pass(), []);
        machine.assert_lawful();
    }

    #[test]
    fn a_device_whose_faults_do_not_stall_has_nothing_to_end() {
        let (mut machine, ..) = machine();
        let before = machine.unit.executed().len();

        machine.invalidate(&[Invalidation::Stalls { stream: NIC }]);

        assert_eq!(own(&machine.unit.executed()[before..]), [[0x46, 0]]);
        machine.assert_lawful();
    }

    #[test]
    fn a_unit_says_how_many_may_wait_and_one_that_cannot_is_asked_for_none() {
        let found = |config| smmuv3::Found::probe(HARDWARE.smmu_unit(config).0).expect("it is there");
        assert_eq!(usize::from(found(Config::full()).stalls()), STALL_MAX);
        assert_eq!(found(Config::qemu()).stalls(), 0);
        // STALL_MAX without stalls (STALL_MODEL 1) says nothing.
        let none = Config { idr0: Config::full().idr0 | 1 << 24, ..Config::full() };
        assert_eq!(found(none).stalls(), 0);

        let (unit, memory) = HARDWARE.smmu_unit(none);
        let parts = smmuv3::Memory {
            stalling: [DISK].into_iter().collect(),
            ..HARDWARE.needs(STREAM_TABLE, &memory)
        };
        let error = found(none).enable(parts).err();
        assert!(
            matches!(error, Some(Error::Unsupported { feature }) if feature.contains("STALL_MODEL")),
            "{error:?}"
        );
        assert_eq!(unit.read32(0x44), 0x1000, "GBPA: it was left alone");
    }

    #[test]
    fn an_answer_of_a_kind_that_the_unit_does_not_have_comes_back() {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::qemu());
        // Counts what was executed.
        machine.unit.resume();

        let back = machine.smmu.commands.respond(answer(request(DISK, 1, true), Outcome::Success));

        assert!(matches!(back, Err((_, Error::Unsupported { .. }))), "{back:?}");
        assert_eq!(machine.pass(), []);
        machine.assert_lawful();
    }
}

mod answers {
    use super::*;

    #[test]
    fn an_answer_ends_the_group_that_it_names_and_no_other() {
        let mut machine = machine();
        // The same number for different devices and PASIDs; the largest number; PASID 0; no PASID.
        let groups = [
            (DISK, pasid(5), 1, Outcome::Success),
            (DISK, pasid(6), 1, Outcome::Invalid),
            (NIC, pasid(5), 1, Outcome::Failure),
            (DISK, None, 1, Outcome::Success),
            (DISK, pasid(0), 1, Outcome::Invalid),
            (DISK, pasid(0xF_FFFF), 0x1FF, Outcome::Invalid),
        ];
        for (stream, pasid, index, _) in groups {
            let tag = GroupTag { pasid, index };
            machine.unit.page_request(PageRequest { tag, ..request(stream, 0, true) });
        }
        assert_eq!(machine.pass().len(), groups.len());

        for (stream, pasid, index, outcome) in groups {
            let response = PageResponse { stream, tag: GroupTag { pasid, index }, outcome };
            assert_eq!(machine.smmu.commands.respond(response), Ok(()));

            let last = machine.unit.answers().pop().map(|a| (a.stream, a.tag.pasid, a.tag.index, a.outcome));
            assert_eq!(last, Some((stream, pasid, index, outcome)));
        }
        assert_eq!(machine.unit.waiting_groups(), []);
        machine.assert_lawful();
    }

    #[test]
    fn answers_that_are_queued_together_reach_the_unit_when_the_doorbell_rings() {
        const TOGETHER: usize = 5;
        let mut machine = machine();
        let asked: Vec<_> = (0..TOGETHER as u16).map(|index| request(DISK, index, true)).collect();
        // So often that the queue wraps, between two answers of one doorbell as well.
        for round in 0..COMMANDS {
            for &request in &asked {
                assert_eq!(machine.unit.page_request(request), Requested::Queued);
            }
            assert_eq!(machine.pass().len(), TOGETHER);
            for &request in &asked {
                let answer = answer(request, Outcome::Success);
                assert_eq!(machine.smmu.commands.queue_response(answer), Ok(()));
            }
            assert_eq!(machine.unit.answers().len(), round * TOGETHER, "the unit was not told yet");

            machine.smmu.commands.ring();

            assert_eq!(machine.unit.answers().len(), (round + 1) * TOGETHER);
            assert_eq!(machine.unit.waiting_groups(), []);
        }
        machine.invalidate(&[Invalidation::All]);
        machine.assert_lawful();
    }

    #[test]
    fn a_full_queue_refuses_invalidations_and_still_takes_every_answer() {
        // Each: CMD_CFGI_STE and CMD_SYNC; or what goes by itself, CMD_TLBI_NH_VA and CMD_SYNC.
        let device = Invalidation::Device { stream: NIC, device_tlb: false };
        for one in [device, commands::pages_of(Stages::First, false, 7, 1)] {
            refuses_and_takes_every_answer(one);
        }
    }

    fn refuses_and_takes_every_answer(one: Invalidation) {
        let mut machine = machine();
        let asked: Vec<_> = (0..=ANSWERS as u16).map(|index| request(DISK, index, true)).collect();
        for &request in &asked {
            assert_eq!(machine.unit.page_request(request), Requested::Queued);
        }
        machine.unit.pause();
        let room = COMMANDS - ANSWERS;
        let before = machine.unit.executed().len();
        let one = [one];
        let mut last = None;
        for _ in 0..room / 2 - 1 {
            last = Some(machine.smmu.commands.submit(&one).expect("there is room"));
        }
        let full = machine.smmu.commands.submit(&[one[0]; 2]).err();
        assert_eq!(full, Some(Error::QueueFull { needed: 3, free: 2 }));
        last = machine.smmu.commands.submit(&[]).ok().or(last);
        let full = machine.smmu.commands.submit(&one).err();
        assert_eq!(full, Some(Error::QueueFull { needed: 2, free: 1 }));
        last = machine.smmu.commands.submit(&[]).ok().or(last);
        let full = machine.smmu.commands.submit(&[]).err();
        assert_eq!(full, Some(Error::QueueFull { needed: 1, free: 0 }));

        for &request in &asked[..ANSWERS] {
            assert_eq!(machine.smmu.commands.respond(answer(request, Outcome::Success)), Ok(()));
        }
        // One more than was promised: it comes back.
        let more = machine.smmu.commands.respond(answer(asked[ANSWERS], Outcome::Invalid));
        let Err((back, Error::QueueFull { needed: 1, free: 0 })) = more else { panic!("{more:?}") };
        assert_eq!(back, answer(asked[ANSWERS], Outcome::Invalid));

        machine.unit.resume();
        machine.wait(last.expect("there was room"));
        assert_eq!(machine.unit.executed().len() - before, COMMANDS);
        assert_eq!(machine.smmu.commands.respond(back), Ok(()));
        assert_eq!((machine.unit.answers().len(), machine.unit.waiting_groups()), (ANSWERS + 1, vec![]));
        machine.invalidate(&[Invalidation::All]);
        machine.assert_lawful();
    }
}

mod commands {
    use super::*;

    /// Returns the commands that `invalidation` becomes, without the CMD_SYNC that ends them.
    fn encoded(config: Config, invalidation: Invalidation) -> Vec<[u64; 2]> {
        let (unit, memory) = HARDWARE.smmu_unit(config);
        let mut machine = HARDWARE
            .enable_smmu(unit, memory.clone(), unit, HARDWARE.needs(STREAM_TABLE, &memory))
            .expect("it comes into service");
        unit.plug(DISK);
        let before = unit.executed().len();
        machine.invalidate(&[invalidation]);
        machine.assert_lawful();
        let mut words = own(&unit.executed()[before..]);
        assert_eq!(words.pop(), Some([0x46, 0]), "K34");
        words
    }

    /// Returns what goes into the queue by itself, if there is no device TLB.
    pub fn pages_of(stages: Stages, device_tlb: bool, page: u64, pages: u64) -> Invalidation {
        let attachment =
            Attachment { serial: 1, stream: DISK, pasid: None, domain: DomainId(0x2A), stages, device_tlb };
        Invalidation::Pages { attachment, iova: Iova(page * PAGE_SIZE), pages }
    }

    /// What goes by itself takes a shorter way than what goes with others.
    #[test]
    fn pages_by_themselves_are_told_as_they_are_among_others() {
        // IDR3.RIL is bit 10.
        let full = Config::full();
        let single = Config { idr3: full.idr3 & !(1 << 10), ..full };
        for config in [full, single] {
            let (unit, memory) = HARDWARE.smmu_unit(config);
            let mut machine = HARDWARE
                .enable_smmu(unit, memory.clone(), unit, HARDWARE.needs(STREAM_TABLE, &memory))
                .expect("it comes into service");
            unit.plug(DISK);
            let mut told = |invalidations: &[Invalidation]| {
                let before = unit.executed().len();
                machine.invalidate(invalidations);
                let words = unit.executed().split_off(before);
                assert_eq!(words.last().map(|words| words[0] & 0xFF), Some(0x46), "{invalidations:?}");
                // The number that a message tells differs.
                words
                    .into_iter()
                    .map(|[low, high]| [if low & 0xFF == 0x46 { 0x46 } else { low }, high])
                    .collect::<Vec<_>>()
            };
            for stages in [Stages::First, Stages::Second, Stages::Nested] {
                for device_tlb in [false, true] {
                    for (page, pages) in
                        [(7, 1), (7, 2), (7, 3), (0, 8), (0, 9), (5, 0), (0, 512), (1, 33), (0, 1 << 40)]
                    {
                        let one = pages_of(stages, device_tlb, page, pages);
                        // Of which nothing becomes a command: the disk's faults do not stall.
                        let nothing = Invalidation::Stalls { stream: DISK };

                        assert_eq!(told(&[one]), told(&[one, nothing]), "{one:?}");
                    }
                }
            }
            machine.assert_lawful();
        }
    }

    /// Two commands at a time, with an odd number of them before: the last place of the ring comes to be the first of two.
    #[test]
    fn a_page_by_itself_goes_over_the_end_of_the_ring() {
        const PAGES: u64 = 600;
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let mut machine = HARDWARE
            .enable_smmu(unit, memory.clone(), unit, HARDWARE.needs(STREAM_TABLE, &memory))
            .expect("it comes into service");
        for odd in [false, true] {
            let before = unit.executed().len();
            for page in 0..PAGES {
                machine.invalidate(&[pages_of(Stages::Second, false, page, 1)]);
            }
            // K22.
            let told: Vec<_> = unit
                .executed()
                .split_off(before)
                .into_iter()
                .filter(|words| words[0] & 0xFF == 0x2A)
                .map(|words| words[1])
                .collect();
            let all: Vec<_> = (0..PAGES).map(|page| (page * PAGE_SIZE) | 1).collect();
            assert_eq!(told, all, "odd: {odd}");
            // A CMD_SYNC alone.
            machine.invalidate(&[]);
        }
        machine.assert_lawful();
    }

    #[test]
    fn invalidations_become_the_commands_of_the_manual_in_its_order() {
        let full = Config::full();
        let at = |stages, device_tlb| Attachment {
            serial: 1,
            stream: DISK,
            pasid: None,
            domain: DomainId(0x2A),
            stages,
            device_tlb,
        };
        let pages = |attachment, iova, pages| Invalidation::Pages { attachment, iova: Iova(iova), pages };
        // K3, K34, K24, K9, K19; K11 with ASID 0x2A. Leaf of K3 keeps the first of two levels, where there are two.
        let leaf = u64::from(STREAM_TABLE == StreamTable::Linear);
        let (ste, sync, everything) =
            ([0x0000_0108_0000_0003, leaf], [0x46, 0], [0x0000_0108_0000_0040, 0x34]);
        let (nh_all, vmall) = ([0x0000_002A_0000_0010, 0], [0x0000_002A_0000_0028, 0]);
        let nh_va = |iova: u64| [0x002A_002A_0000_0012, iova | 1];
        for (invalidation, expected) in [
            (Invalidation::Device { stream: DISK, device_tlb: false }, vec![ste]),
            (Invalidation::Device { stream: DISK, device_tlb: true }, vec![ste, sync, everything]),
            (Invalidation::Attachment(at(Stages::First, true)), vec![ste, sync, nh_all, sync, everything]),
            (Invalidation::Attachment(at(Stages::Second, true)), vec![ste, sync, vmall, sync, everything]),
            (Invalidation::Attachment(at(Stages::First, false)), vec![ste, sync, nh_all]),
            (pages(at(Stages::First, false), 0x4020_1000, 1), vec![nh_va(0x4020_1000)]),
            // K13 without a level: TG 1<<10, NUM 4<<12. 512 pages are 32 times 2^4: NUM 31<<12 | SCALE 4<<20.
            (pages(at(Stages::First, false), 0x4020_5000, 5), vec![[0x002A_002A_0000_4012, 0x4020_5401]]),
            (pages(at(Stages::First, false), 0x4020_0000, 512), vec![[0x002A_002A_0041_F012, 0x4020_0401]]),
            (pages(at(Stages::Second, false), 0x8020_0000, 5), vec![[0x0000_002A_0000_402A, 0x8020_0401]]),
            // K23: four pages; and K20.
            (
                pages(at(Stages::Second, true), 0x1000_0000, 4),
                vec![[0x0000_002A_0000_302A, 0x1000_0401], sync, [0x0000_0108_0000_0040, 0x1000_0002]],
            ),
            (Invalidation::PageRequestDrain, vec![]),
        ] {
            assert_eq!(encoded(full, invalidation), expected, "{invalidation:?}");
        }
        // Without ranges: page by page, up to a few; then everything.
        let single = Config { idr3: full.idr3 & !(1 << 10), ..full };
        assert_eq!(
            encoded(single, pages(at(Stages::First, false), 0x4020_1000, 3)),
            [nh_va(0x4020_1000), nh_va(0x4020_2000), nh_va(0x4020_3000)]
        );
        assert_eq!(
            encoded(single, pages(at(Stages::First, true), 0x4020_1000, 9)),
            [nh_all, sync, everything]
        );
        assert_eq!(encoded(single, pages(at(Stages::Second, false), 0x4020_1000, 9)), [vmall]);
        // Without stage 2 there are no VMIDs: reserved.
        let first = Config { idr0: full.idr0 & !1, ..full };
        assert_eq!(
            encoded(first, Invalidation::Attachment(at(Stages::First, false))),
            [ste, sync, [0x10, 0]]
        );
        assert_eq!(
            encoded(first, pages(at(Stages::First, false), 0x1000, 1)),
            [[0x002A_0000_0000_0012, 0x1001]]
        );
    }

    #[test]
    fn a_guest_s_first_stage_is_forgotten_as_far_as_it_says_and_never_less() {
        let full = Config::full();
        let at = |pasid, stages, device_tlb| Attachment {
            serial: 1,
            stream: DISK,
            pasid,
            domain: DomainId(0x2A),
            stages,
            device_tlb,
        };
        let nested = at(None, Stages::Nested, true);
        let first = |asid, pages: Option<(u64, u64)>| Invalidation::FirstStage {
            attachment: nested,
            asid,
            pages: pages.map(|(iova, pages)| (Iova(iova), pages)),
        };
        let contexts = |pasid| Invalidation::Contexts { attachment: nested, pasid };
        let device = |pasid, pages: Option<(u64, u64)>| Invalidation::DeviceTlb {
            attachment: nested,
            pasid,
            pages: pages.map(|(iova, pages)| (Iova(iova), pages)),
        };
        let (nh_all, sync) = ([0x0000_002A_0000_0010, 0], [0x46, 0]);
        let everything = [0x0000_0108_0000_0040, 0x34];
        for (invalidation, expected) in [
            // K9, K10; K11 and K14 without Leaf. Of many pages, global ones may be meant: K9 again.
            (first(None, None), vec![nh_all]),
            (first(Some(7), None), vec![[0x0007_002A_0000_0011, 0]]),
            (first(Some(7), Some((0x4020_1000, 1))), vec![[0x0007_002A_0000_0012, 0x4020_1000]]),
            (
                first(None, Some((0xFFFF_0000_1234_5000, 2))),
                vec![
                    [0x0000_002A_0000_0013, 0xFFFF_0000_1234_5000],
                    [0x0000_002A_0000_0013, 0xFFFF_0000_1234_6000],
                ],
            ),
            (first(Some(7), Some((0x4020_1000, 9))), vec![nh_all]),
            (first(None, Some((0, u64::MAX))), vec![nh_all]),
            // The end of the address space.
            (
                first(Some(7), Some((0xFFFF_FFFF_FFFF_F000, 2))),
                vec![[0x0007_002A_0000_0012, 0xFFFF_FFFF_FFFF_F000], [0x0007_002A_0000_0012, 0]],
            ),
            // K6 without Leaf, K7.
            (contexts(pasid(5)), vec![[0x0000_0108_0000_5005, 0]]),
            (contexts(None), vec![[0x0000_0108_0000_0006, 0]]),
            // K24, K25, K23.
            (device(None, None), vec![everything]),
            (device(pasid(5), Some((0x2000_0000, 512))), vec![[0x0000_0108_0000_5840, 0x2000_0009]]),
            (device(None, Some((0x1000_0000, 4))), vec![[0x0000_0108_0000_0040, 0x1000_0002]]),
            // K20 as a range, K34, K9, K34, K24: what came of both stages is cached by the first's addresses.
            (
                Invalidation::Pages { attachment: nested, iova: Iova(0x8020_0000), pages: 5 },
                vec![[0x0000_002A_0000_402A, 0x8020_0401], sync, nh_all, sync, everything],
            ),
            // K3, K34, K19, K34, K24.
            (
                Invalidation::Attachment(nested),
                vec![
                    [0x0000_0108_0000_0003, u64::from(STREAM_TABLE == StreamTable::Linear)],
                    sync,
                    [0x0000_002A_0000_0028, 0],
                    sync,
                    everything,
                ],
            ),
            // Of one PASID: K6, K34, K10, K34, K24 with the PASID.
            (
                Invalidation::Attachment(at(pasid(5), Stages::First, true)),
                vec![
                    [0x0000_0108_0000_5005, 0],
                    sync,
                    [0x002A_002A_0000_0011, 0],
                    sync,
                    [0x0000_0108_0000_5840, 0x34],
                ],
            ),
            (
                Invalidation::Pages {
                    attachment: at(pasid(5), Stages::First, true),
                    iova: Iova(0x1000),
                    pages: 1,
                },
                vec![[0x002A_002A_0000_0012, 0x1001], sync, [0x0000_0108_0000_5840, 0x1000]],
            ),
        ] {
            assert_eq!(encoded(full, invalidation), expected, "{invalidation:?}");
        }
    }

    #[test]
    fn what_an_attachment_does_not_have_is_not_invalidated() {
        let mut machine = machine();
        // Counts what was executed.
        machine.unit.resume();
        // Counts what was executed.
        machine.unit.resume();
        let attachment = Attachment {
            serial: 1,
            stream: DISK,
            pasid: None,
            domain: DomainId(0x2A),
            stages: Stages::First,
            device_tlb: false,
        };
        for invalidation in [
            Invalidation::FirstStage { attachment, asid: None, pages: None },
            Invalidation::Contexts { attachment, pasid: None },
            Invalidation::DeviceTlb { attachment, pasid: None, pages: None },
        ] {
            let refused = machine.smmu.commands.submit(&[invalidation]);
            assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
        }
        machine.assert_lawful();
    }

    #[test]
    fn a_batch_is_one_doorbell_and_one_sync_and_one_that_is_too_large_is_refused_whole() {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let bells = Arc::new(AtomicUsize::new(0));
        let rung = Arc::clone(&bells);
        let bus = Tapped::new(unit, move |_, moment| {
            let bell = matches!(moment, Moment::Written { offset: CMDQ_PROD, .. });
            rung.fetch_add(usize::from(bell), SeqCst);
        });
        let mut machine = machine_on(unit, memory, bus);
        // The time of its errors is its own.
        machine.unit.resume();
        let (before, rung) = (unit.executed().len(), bells.load(SeqCst));
        let one = Invalidation::Device { stream: NIC, device_tlb: false };

        machine.invalidate(&[one; 10]);
        assert_eq!((unit.executed().len() - before, bells.load(SeqCst) - rung), (11, 1));

        // 31 and the CMD_SYNC fit; 32 do not.
        machine.invalidate(&[one; 31]);
        let refused = machine.smmu.commands.submit(&[one; 32]).err();
        assert!(
            matches!(refused, Some(Error::Exhausted { what }) if what.contains("commands")),
            "{refused:?}"
        );
        let unknown = machine.smmu.commands.submit(&[one, Invalidation::Interrupts]).err();
        assert!(matches!(unknown, Some(Error::Unsupported { .. })), "{unknown:?}");
        assert_eq!((unit.executed().len() - before, bells.load(SeqCst) - rung), (43, 2));
        machine.assert_lawful();
    }

    #[test]
    fn a_batch_that_wraps_is_executed_as_it_was_queued() {
        let mut machine = machine();
        let before = machine.unit.executed().len();

        // Three commands each, so that each lap of the ring ends at another of them.
        for batch in 0..COMMANDS as u32 {
            let about = |n| Invalidation::Device { stream: StreamId(2 * batch + n), device_tlb: false };
            machine.invalidate(&[about(0), about(1)]);
        }

        let executed = own(&machine.unit.executed()[before..]);
        let streams: Vec<_> =
            executed.chunks(3).flat_map(|batch| [batch[0][0] >> 32, batch[1][0] >> 32]).collect();
        assert_eq!(streams, (0..2 * COMMANDS as u64).collect::<Vec<_>>());
    }

    #[test]
    fn a_ticket_is_done_exactly_when_its_sync_is_however_often_the_queue_wraps() {
        let mut machine = machine();
        machine.unit.pause();
        let mut random = Random::new(3);
        // Commands queued and consumed; where each open ticket's CMD_SYNC is.
        let (mut queued, mut consumed, mut full) = (0, 0, 0);
        let mut open = Vec::new();
        let mut done = Vec::new();
        while queued < 20 * COMMANDS {
            let count = random.below(20) as usize;
            let one = Invalidation::Device { stream: NIC, device_tlb: false };
            match machine.smmu.commands.submit(&vec![one; count]) {
                Ok(ticket) => {
                    queued += count + 1;
                    open.push((ticket, queued));
                }
                Err(error) => {
                    assert!(
                        matches!(error, Error::QueueFull { needed, .. } if needed == count + 1),
                        "{error}"
                    );
                    full += 1;
                    consumed += machine.unit.execute(random.below(COMMANDS as u64) as usize);
                }
            }
            consumed += machine.unit.execute(random.below(10) as usize);
            open.retain(|&(ticket, place)| {
                let expected = if place <= consumed { Completion::Done } else { Completion::Pending };
                assert_eq!(
                    machine.smmu.commands.poll(ticket),
                    expected,
                    "{ticket:?} at {place} of {consumed}"
                );
                if expected == Completion::Done {
                    done.push(ticket);
                }
                expected == Completion::Pending
            });
        }
        assert!(full > 5 && done.len() > COMMANDS && done.is_sorted_by(|a, b| a < b));
        assert!(
            done.iter().all(|&ticket| machine.smmu.commands.poll(ticket) == Completion::Done),
            "for good"
        );
        machine.assert_lawful();
    }

    /// Overwrites the `n`th command that the unit has not consumed yet by one that there is not.
    fn spoil(machine: &Machine, n: u64) {
        let queue = machine.unit.read64(CMDQ_BASE) & 0x00FF_FFFF_FFFF_FFE0;
        let at = u64::from(machine.unit.read32(CMDQ_CONS)) + n;
        let place = PhysAddr(queue + at % COMMANDS as u64 * 16);
        machine.memory.device_store(place, 0xFF).expect("inside");
    }

    #[test]
    fn a_command_that_the_unit_refuses_fails_its_ticket_and_no_other() {
        // However the queue has wrapped, and whichever command it is of the three, or of two that go by themselves.
        let all = [(0, 0), (0, 1), (0, 2), (126, 1), (127, 0), (127, 2), (300, 1)];
        let all = all.map(|(turns, bad)| (Invalidation::All, turns, bad));
        let page = [(0, 0), (0, 1), (126, 1)];
        let page = page.map(|(turns, bad)| (commands::pages_of(Stages::First, false, 7, 1), turns, bad));
        for (spoiled, turns, bad) in all.into_iter().chain(page) {
            let mut machine = machine();
            (0..turns)
                .for_each(|_| machine.invalidate(&[Invalidation::Device { stream: NIC, device_tlb: false }]));
            machine.unit.pause();
            let asked = request(DISK, 7, true);
            assert_eq!(machine.unit.page_request(asked), Requested::Queued);
            machine.pass();
            let before = machine.smmu.commands.submit(&[]).expect("there is room");
            let ticket = machine.smmu.commands.submit(&[spoiled]).expect("there is room");
            machine.smmu.commands.respond(answer(asked, Outcome::Success)).expect("there is room");
            let after = machine.smmu.commands.submit(&[Invalidation::All]).expect("there is room");
            spoil(&machine, 1 + bad);
            machine.unit.pulses();

            machine.unit.resume();

            assert_eq!(machine.unit.pulses(), [Wire::Error]);
            // CERROR_ILL is 1, in [30:24].
            assert_eq!(machine.unit.read32(CMDQ_CONS) >> 24, 1);
            assert_eq!(machine.pass(), [Event::CommandsFailed { status: CMDQ_ERR }]);
            let poll = |machine: &mut Machine| {
                [before, ticket, after].map(|ticket| machine.smmu.commands.poll(ticket))
            };
            assert_eq!(poll(&mut machine), [Completion::Done, Completion::Pending, Completion::Pending]);
            assert_eq!(machine.unit.answers().len(), 0, "the answer is queued behind");
            let failure = Failure { cause: FailureCause::Refused, stream: None, ticket: Some(ticket) };
            assert_eq!(machine.recover(), [failure]);
            assert_eq!(poll(&mut machine), [Completion::Done, Completion::Failed, Completion::Done]);
            assert_eq!(machine.unit.answers().len(), 1, "no answer is lost");
            assert_eq!(machine.pass(), []);
            // The same again, and now it is done.
            machine.invalidate(&[Invalidation::All]);
            assert_eq!(poll(&mut machine)[1], Completion::Failed, "for good");
            machine.assert_lawful();
        }
    }

    #[test]
    fn an_answer_that_the_unit_refuses_fails_no_ticket() {
        let mut machine = machine();
        machine.unit.pause();
        let before = machine.smmu.commands.submit(&[]).expect("there is room");
        machine
            .smmu
            .commands
            .respond(answer(request(DISK, 3, true), Outcome::Success))
            .expect("there is room");
        let after = machine.smmu.commands.submit(&[]).expect("there is room");
        spoil(&machine, 1);
        machine.unit.resume();

        // The memory still says which device the answer was for.
        let failure = Failure { cause: FailureCause::Refused, stream: Some(DISK), ticket: None };
        assert_eq!(machine.recover(), [failure]);

        assert_eq!(machine.smmu.commands.poll(before), Completion::Done);
        assert_eq!(machine.smmu.commands.poll(after), Completion::Done);
        machine.assert_lawful();
    }

    #[test]
    fn a_place_that_stays_bad_stops_the_queue() {
        let mut machine = machine();
        machine.unit.pause();
        let ticket = machine.smmu.commands.submit(&[Invalidation::All]).expect("there is room");
        spoil(&machine, 0);
        machine.unit.resume();
        // What is stored there does not last.
        machine.unit.pause();
        assert_eq!(machine.smmu.commands.recover().map(|failure| failure.cause), Some(FailureCause::Refused));
        spoil(&machine, 0);
        machine.unit.resume();

        let failures: Vec<_> = machine.recover().into_iter().map(|failure| failure.cause).collect();

        assert_eq!(failures, [FailureCause::Stopped]);
        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Failed);
        assert!(matches!(machine.smmu.commands.submit(&[]), Err(Error::Failed { .. })));
        machine.assert_lawful();
    }

    #[test]
    fn many_failed_tickets_stay_failed() {
        let mut machine = machine();
        let mut failed = Vec::new();
        for _ in 0..100 {
            machine.unit.pause();
            failed.push(machine.smmu.commands.submit(&[]).expect("there is room"));
            spoil(&machine, 0);
            machine.unit.resume();
            assert_eq!(machine.recover().len(), 1);
        }
        let done = machine.smmu.commands.submit(&[]).expect("there is room");
        machine.wait(done);

        assert!(failed.iter().all(|&ticket| machine.smmu.commands.poll(ticket) == Completion::Failed));
        machine.assert_lawful();
    }

    #[test]
    fn a_queue_that_the_unit_cannot_read_stops_and_everything_is_told_so() {
        let mut machine = machine();
        // Where the queue goes off later, it fails once more before it does.
        machine.unit.acknowledge_after(3);
        // The time of its errors is its own.
        machine.unit.resume();
        let done = machine.smmu.commands.submit(&[]).expect("there is room");
        machine.wait(done);
        machine.unit.fail_fetches(true);
        let executed = machine.unit.executed().len();
        let ticket = machine.smmu.commands.submit(&[Invalidation::All]).expect("there is room");

        assert_eq!(machine.pass(), [Event::CommandsFailed { status: CMDQ_ERR }]);
        // CERROR_ABT is 2.
        assert_eq!(machine.unit.read32(CMDQ_CONS) >> 24, 2);
        let stopped = Failure { cause: FailureCause::Stopped, stream: None, ticket: None };
        assert_eq!(machine.recover(), [stopped]);
        assert_eq!(machine.recover(), []);

        assert_eq!(machine.smmu.commands.poll(done), Completion::Done);
        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Failed);
        // The queue is off: what was told as failed is never executed, and the unit is quiet.
        machine.unit.advance(10);
        machine.recover();
        machine.unit.fail_fetches(false);
        machine.unit.advance(100_000);
        assert_eq!(machine.unit.executed().len(), executed);
        assert_eq!(machine.pass(), []);
        // Faults are told on, and other errors acknowledged.
        fault(machine.unit);
        machine.unit.raise_errors(EVENTQ_ABT_ERR);
        assert!(matches!(machine.pass()[..2], [Event::Fault(_), Event::FaultsLost]));
        assert_eq!(machine.recover(), []);
        assert_eq!(machine.unit.read32(GERROR) ^ machine.unit.read32(GERRORN), 0);
        machine.assert_lawful();
    }

    /// A machine whose device has a page in its device TLB, and what makes it forget that.
    fn remembered() -> (Machine, Invalidation) {
        let mut machine = machine();
        let tree = machine.tree(Stage::One);
        machine.map(&tree, Iova(0x1000), 7, Perms::READ);
        let attachment = machine.attach(DISK, Stage::One, &tree);
        assert_eq!(machine.ats_read(DISK, Iova(0x1000)), Ok(7));
        machine.unmap(&tree, Iova(0x1000), 1);
        (machine, Invalidation::covering(attachment, Iova(0x1000), PAGE_SIZE))
    }

    #[test]
    fn a_device_that_does_not_answer_is_named_and_the_others_go_on() {
        let (mut machine, pages) = remembered();
        // The time of its errors is its own.
        machine.unit.resume();
        machine.unit.hold_device_tlb(DISK);

        let ticket = machine.smmu.commands.submit(&[pages]).expect("there is room");
        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Pending);
        assert_eq!(machine.pass(), [], "it may still answer");
        let asked = request(NIC, 9, true);
        assert_eq!(machine.unit.page_request(asked), Requested::Queued);
        assert_eq!(machine.pass().len(), 1);
        machine.smmu.commands.respond(answer(asked, Outcome::Success)).expect("there is room");
        let other = [Invalidation::Device { stream: NIC, device_tlb: false }];
        let behind = machine.smmu.commands.submit(&other).expect("there is room");
        machine.unit.advance(60_000);
        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Pending);
        // CERROR_ATC_INV_SYNC is 3.
        assert_eq!(machine.unit.read32(CMDQ_CONS) >> 24, 3);

        assert_eq!(machine.pass(), [Event::CommandsFailed { status: CMDQ_ERR }]);
        let failure = Failure { cause: FailureCause::Unanswered, stream: Some(DISK), ticket: Some(ticket) };
        assert_eq!(machine.recover(), [failure]);

        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Failed);
        assert_eq!(machine.smmu.commands.poll(behind), Completion::Done);
        assert_eq!(machine.unit.answers().len(), 1, "no answer is lost");
        // Too late: what it still remembered is not known.
        machine.unit.release_device_tlb(DISK);
        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Failed);
        machine.invalidate(&[pages]);
        assert!(machine.ats_read(DISK, Iova(0x1000)).is_err());
        machine.assert_lawful();
    }

    /// How often is not what counts: a unit may report as fast as it is asked.
    #[test]
    fn a_sync_that_fails_again_until_the_device_answers_costs_nobody_but_the_device() {
        let (mut machine, pages) = remembered();
        // The time of its errors is its own.
        machine.unit.resume();
        machine.unit.hold_device_tlb(DISK);
        machine.unit.fail_until_answered(true);
        let ticket = machine.smmu.commands.submit(&[pages]).expect("there is room");
        let other = [Invalidation::Device { stream: NIC, device_tlb: false }];
        let behind = machine.smmu.commands.submit(&other).expect("there is room");
        machine.unit.advance(60_000);

        let mut failures = Vec::new();
        for _ in 0..600 {
            assert_eq!(machine.pass(), [Event::CommandsFailed { status: CMDQ_ERR }]);
            failures.extend(machine.recover());
            assert_eq!(machine.smmu.commands.poll(behind), Completion::Pending);
            machine.unit.advance(100_000);
        }
        machine.unit.release_device_tlb(DISK);
        machine.pass();
        failures.extend(machine.recover());

        let failure = Failure { cause: FailureCause::Unanswered, stream: Some(DISK), ticket: Some(ticket) };
        assert_eq!(failures, [failure], "it is told once");
        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Failed);
        assert_eq!(machine.smmu.commands.poll(behind), Completion::Done);
        machine.invalidate(&[pages]);
        machine.assert_lawful();
    }

    /// A link that is down, or power that is off: every register reads as ones, and the queues hold what was in them before.
    #[test]
    fn a_unit_that_is_gone_is_told_of_once_and_a_pass_has_an_end() {
        let mut machine = machine();
        for index in 0..5 {
            assert_eq!(machine.unit.page_request(request(DISK, index, true)), Requested::Queued);
            fault(machine.unit);
            assert_eq!(machine.pass().len(), 2);
        }

        machine.unit.vanish();

        let lost = [Event::RequestsLost, Event::FaultsLost, Event::CommandsFailed { status: u32::MAX }];
        assert_eq!(machine.pass(), lost, "an unknown number");
        let stopped = Failure { cause: FailureCause::Stopped, stream: None, ticket: None };
        assert_eq!(machine.recover(), [stopped]);
        for _ in 0..3 {
            assert_eq!(machine.recover(), []);
            assert_eq!(machine.pass(), []);
        }
        assert!(matches!(machine.smmu.commands.submit(&[]), Err(Error::Failed { .. })));
    }

    /// As a number ones are a place in the queue, too.
    #[test]
    fn a_unit_that_is_gone_has_done_nothing_since() {
        // What is counted is what was submitted here, one by one.
        let mut machine = Hardware::Prompt.smmu(STREAM_TABLE, Config::full());
        let last = 2 * hosted::smmu::COMMANDS as u64 - 1;
        while (machine.unit.executed().len() as u64) < last - 3 {
            machine.invalidate(&[]);
        }
        machine.unit.pause();
        let tickets = [(); 16].map(|()| machine.smmu.commands.submit(&[]).expect("there is room"));
        assert!(tickets[0].0 < last && last < tickets[15].0);

        machine.unit.vanish();

        for ticket in tickets {
            assert_eq!(machine.smmu.commands.poll(ticket), Completion::Pending);
        }
        assert_eq!(machine.recover().len(), 1);
        assert!(tickets.iter().all(|&ticket| machine.smmu.commands.poll(ticket) == Completion::Failed));
    }

    /// PCI Express gives a device a minute and a half.
    #[test]
    fn a_unit_that_waits_for_a_device_for_longer_than_one_may_take_is_given_up_once() {
        let (mut machine, pages) = remembered();
        machine.unit.resume();
        machine.unit.hold_device_tlb(DISK);
        machine.unit.fail_until_answered(true);
        let ticket = machine.smmu.commands.submit(&[pages]).expect("there is room");
        machine.unit.advance(60_000);
        let failure = Failure { cause: FailureCause::Unanswered, stream: Some(DISK), ticket: Some(ticket) };
        assert_eq!(machine.recover(), [failure]);

        machine.unit.advance(80_000_000);
        assert_eq!(machine.recover(), []);
        machine.unit.advance(10_000_000);

        let stopped = Failure { cause: FailureCause::Stopped, stream: None, ticket: None };
        assert_eq!(machine.recover(), [stopped]);
        assert_eq!(machine.recover(), []);
        assert!(matches!(machine.smmu.commands.submit(&[]), Err(Error::Failed { .. })));
        machine.assert_lawful();
    }

    #[test]
    fn one_device_at_a_time_is_asked_to_forget() {
        let (mut machine, pages) = remembered();
        let other = Invalidation::Device { stream: NIC, device_tlb: true };
        machine.unit.hold_device_tlb(DISK);
        let ticket = machine.smmu.commands.submit(&[pages]).expect("there is room");

        let busy = Some(Error::Busy { what: "invalidation of a device TLB" });
        assert_eq!(machine.smmu.commands.submit(&[other]).err(), busy);
        assert_eq!(machine.smmu.commands.submit(&[pages]).err(), busy, "nor the same again");
        let unit_alone = machine.smmu.commands.submit(&[Invalidation::All]).expect("it asks no device");
        assert_eq!(machine.smmu.commands.poll(unit_alone), Completion::Pending, "a CMD_SYNC is in between");
        machine.unit.release_device_tlb(DISK);
        machine.wait(ticket);

        machine.invalidate(&[other]);
        // The same device twice is one device.
        machine.invalidate(&[pages, pages]);
        machine.assert_lawful();
    }

    /// Which of them is silent, nobody could tell. Later is no better, so it is not for later that it is refused.
    #[test]
    fn two_devices_in_one_batch_are_refused_as_too_much() {
        let (mut machine, pages) = remembered();
        let other = Invalidation::Device { stream: NIC, device_tlb: true };

        for batch in [[pages, other], [other, pages]] {
            let refused = machine.smmu.commands.submit(&batch).err();
            assert_eq!(refused, Some(Error::Exhausted { what: "devices asked in a batch" }));
            batch.iter().for_each(|&one| machine.invalidate(&[one]));
        }
        machine.assert_lawful();
    }

    #[test]
    fn a_device_that_was_given_up_does_not_keep_others_from_being_asked() {
        let (mut machine, pages) = remembered();
        // The time of its errors is its own.
        machine.unit.resume();
        machine.unit.unplug(DISK);
        for _ in 0..5 {
            let ticket = machine.smmu.commands.submit(&[pages, pages]).expect("there is room");
            machine.unit.advance(60_000);
            let failures = machine.recover();
            assert!(!failures.is_empty() && failures.iter().all(|failure| failure.stream == Some(DISK)));
            machine.unit.advance(60_000);
            machine.recover();
            assert_eq!(machine.smmu.commands.poll(ticket), Completion::Failed);
        }

        machine.invalidate(&[Invalidation::Device { stream: NIC, device_tlb: true }]);
        machine.assert_lawful();
    }

    #[test]
    fn a_slow_device_is_waited_for() {
        let mut machine = machine();
        // The time of its errors is its own.
        machine.unit.resume();
        machine.unit.hold_device_tlb(DISK);
        let gone = [Invalidation::Device { stream: DISK, device_tlb: true }];
        let ticket = machine.smmu.commands.submit(&gone).expect("there is room");
        machine.unit.advance(40_000);
        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Pending);

        machine.unit.release_device_tlb(DISK);

        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Done);
        assert_eq!(machine.pass(), []);
        machine.assert_lawful();
    }

    /// A bus on which the unit lies about its registers from some moment on.
    #[derive(Clone)]
    struct Lying {
        unit: &'static SmmuUnit,
        lie: Arc<Mutex<Option<u32>>>,
    }

    impl Bus for Lying {
        fn read32(&self, offset: usize) -> u32 {
            self.lie.lock().expect("no test panics here").unwrap_or_else(|| self.unit.read32(offset))
        }
        fn write32(&self, offset: usize, value: u32) {
            self.unit.write32(offset, value);
        }
        fn read64(&self, offset: usize) -> u64 {
            self.unit.read64(offset)
        }
        fn write64(&self, offset: usize, value: u64) {
            self.unit.write64(offset, value);
        }
        fn publish(&self, range: Range<PhysAddr>) {
            self.unit.publish(range);
        }
        fn observe(&self, range: Range<PhysAddr>) {
            self.unit.observe(range);
        }
        fn now_us(&self) -> u64 {
            self.unit.now_us()
        }
    }

    #[test]
    fn a_place_where_the_unit_cannot_be_changes_no_ticket() {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let bus = Lying { unit, lie: Arc::default() };
        let mut machine = machine_on(unit, memory, bus.clone());
        let lie = |value| *bus.lie.lock().expect("no test panics here") = value;
        (0..3 * COMMANDS).for_each(|_| machine.invalidate(&[]));
        let done = machine.smmu.commands.submit(&[]).expect("there is room");
        machine.wait(done);
        unit.pause();
        let from = unit.read32(CMDQ_CONS);
        let pending = [(); 3].map(|()| machine.smmu.commands.submit(&[]).expect("there is room"));
        let to = unit.read32(CMDQ_PROD);
        let bits = 2 * COMMANDS as u32 - 1;

        // Everything but from..=to; and what a unit that fell off the bus says.
        let outside = (to + 1..=from + bits).map(|place| place & bits);
        for place in outside.filter(|place| *place != from).chain([u32::MAX]) {
            lie(Some(place));
            assert_eq!(machine.smmu.commands.poll(done), Completion::Done, "{place:#x}");
            let open = pending.map(|ticket| machine.smmu.commands.poll(ticket));
            assert_eq!(open, [Completion::Pending; 3], "{place:#x}");
        }

        lie(None);
        unit.resume();
        assert_eq!(machine.smmu.commands.poll(pending[2]), Completion::Done);
        machine.assert_lawful();
    }

    #[test]
    fn no_register_value_makes_the_driver_panic_or_run_for_ever() {
        // All ones (the unit fell off the bus), indices outside a queue, flags alone, noise.
        let mut random = Random::new(5);
        let noise: Vec<u32> = (0..40).map(|_| random.number() as u32).collect();
        for lie in [u32::MAX, 0, 0x1FF, 0x200, 0xF_FFFF, 1 << 31].into_iter().chain(noise) {
            let (unit, memory) = HARDWARE.smmu_unit(Config::full());
            let bus = Lying { unit, lie: Arc::default() };
            let mut machine = machine_on(unit, memory, bus.clone());

            *bus.lie.lock().expect("no test panics here") = Some(lie);

            for index in 0..COMMANDS as u16 * 2 {
                let _ = machine.smmu.commands.submit(&[Invalidation::All]);
                let _ = machine.smmu.commands.respond(answer(request(DISK, index, true), Outcome::Invalid));
            }
            let taken = (0..3 * REQUESTS).filter(|_| machine.smmu.events.next_event().is_some()).count();
            assert!(
                taken <= 2 * (REQUESTS + EVENTS) + 5,
                "a unit that stands still reports for ever: {lie:#x}"
            );
        }
    }
}
