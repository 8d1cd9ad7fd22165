//! What the VT-d driver does when its invalidation queue fails: a descriptor that the unit does not take, a device that does
//! not answer, an answer that nobody waited for.

use crate::HARDWARE;
use hosted::{Machine, Random};
use iommu::{
    Attachment, Bus, Commands, Completion, DomainId, Error, Event, Events, Failure, FailureCause, Features,
    GroupTag, Invalidation, Iova, Outcome, PageRequest, PageResponse, Pasid, Perms, PhysAddr, Stages,
    StreamId, Tables, Ticket,
};
use models::vtd::{Config, Requested};
use pgtable::VtdFirstStage;

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };
/// Entries of the queue, and what of it may be used for commands: 64 are for answers, one tells full from empty.
const ENTRIES: u64 = 128;
const COMMANDS: usize = 63;

const SECOND_US: u64 = 1_000_000;
/// The registers, and bits of `FSTS`.
const FSTS: usize = 0x34;
const IQH: usize = 0x80;
const IQT: usize = 0x88;
const IQA: usize = 0x90;
const IQE: u32 = 1 << 4;
const ICE: u32 = 1 << 5;
const ITE: u32 = 1 << 6;

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

/// Units that go on when the error is cleared, and units that wait for the tail.
fn units() -> [Config; 2] {
    [false, true].map(|resumes_at_tail_write| Config { resumes_at_tail_write, ..Config::full() })
}

/// Everything that a device TLB holds without PASID.
fn device_tlb(stream: StreamId) -> Invalidation {
    let at = Attachment {
        serial: 1,
        stream,
        pasid: None,
        domain: DomainId(1),
        stages: Stages::First,
        device_tlb: true,
    };
    Invalidation::DeviceTlb { attachment: at, pasid: None, pages: None }
}

const OTHER: Invalidation = Invalidation::Device { stream: NIC, device_tlb: false };

/// What goes into the queue by itself: a page of a device without a TLB.
const PAGE: Invalidation = Invalidation::Pages {
    attachment: Attachment {
        serial: 1,
        stream: NIC,
        pasid: None,
        domain: DomainId(1),
        stages: Stages::First,
        device_tlb: false,
    },
    iova: Iova(0x7000),
    pages: 1,
};

/// A machine whose disk may send page requests of PASID 5.
fn with_page_requests(config: Config) -> Machine {
    let mut machine = HARDWARE.machine(config);
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.assign(DISK, ALL);
    machine.attach(DISK, pasid(5), &tree);
    machine.unit.plug(NIC);
    machine
}

/// The disk asks for a page in group `index`, and the driver reads it. Returns the answer to it.
fn asked(machine: &mut Machine, index: u16) -> PageResponse {
    let tag = GroupTag { pasid: pasid(5), index };
    let request = PageRequest { stream: DISK, tag, iova: Iova(0x1000), perms: Perms::READ, last: true };
    assert_eq!(machine.unit.page_request(request), Requested::Queued);
    assert_eq!(machine.vtd.events.next_request(), Some(Event::PageRequest(request)));
    PageResponse { stream: DISK, tag, outcome: Outcome::Success }
}

fn submit(machine: &mut Machine, what: &[Invalidation]) -> Ticket {
    machine.vtd.commands.submit(what).expect("there is room")
}

/// Makes entry `at` of the queue something that no unit knows.
fn spoil(machine: &Machine, at: u64) {
    let queue = machine.unit.read64(IQA) & !0xFFF;
    machine.memory.device_store(PhysAddr(queue + at % (ENTRIES * 32)), 0xF).expect("inside");
}

/// One pass, in which every error is dealt with. Returns what was told, and the failures.
fn recovered(machine: &mut Machine) -> (Vec<u32>, Vec<Failure>) {
    let mut told = Vec::new();
    for event in machine.pass() {
        let Event::CommandsFailed { status } = event else { panic!("{event:?}") };
        told.push(status);
    }
    let mut failures = Vec::new();
    while let Some(failure) = machine.vtd.commands.recover() {
        failures.push(failure);
        assert!(failures.len() < 50, "errors without an end: {failures:?}");
    }
    (told, failures)
}

fn completions<const N: usize>(machine: &mut Machine, tickets: [Ticket; N]) -> [Completion; N] {
    tickets.map(|ticket| machine.vtd.commands.poll(ticket))
}

#[test]
fn a_refused_descriptor_is_replaced_and_the_others_are_executed() {
    // Contexts, PASID cache and translations, with two fences between them; the wait. Pages, and the wait.
    let all = (0..6).map(|place| (Invalidation::All, place));
    let places: Vec<_> = all.chain((0..2).map(|place| (PAGE, place))).collect();
    for config in units() {
        for &(spoiled, place) in &places {
            let mut machine = HARDWARE.machine(config);
            machine.unit.pause(0);
            let before = submit(&mut machine, &[OTHER]);
            let at = machine.unit.read64(IQT);
            let refused = submit(&mut machine, &[spoiled]);
            let after = submit(&mut machine, &[PAGE]);
            spoil(&machine, at + place * 32);

            machine.unit.resume();
            assert_eq!(machine.unit.read64(IQH), at + place * 32, "the queue stopped");
            let (told, failures) = recovered(&mut machine);

            assert!(matches!(told[..], [status] if status & IQE != 0), "{told:x?}");
            let failure = Failure { cause: FailureCause::Refused, stream: None, ticket: Some(refused) };
            assert_eq!(failures, [failure], "place {place} of {spoiled:?}");
            assert_eq!(
                completions(&mut machine, [before, refused, after]),
                [Completion::Done, Completion::Failed, Completion::Done]
            );
            assert_eq!(machine.unit.read32(FSTS), 0);
            machine.invalidate(&[Invalidation::All]);
            assert_eq!(machine.vtd.commands.poll(refused), Completion::Failed, "for good");
            machine.assert_lawful();
        }
    }
}

#[test]
fn what_replaces_a_refused_descriptor_is_a_wait_that_nobody_reads() {
    let mut machine = HARDWARE.machine(Config::full());
    let status = machine.unit.executed().last().map(|words| words[1]).expect("a wait");
    machine.unit.pause(0);
    let at = machine.unit.read64(IQT);
    let refused = submit(&mut machine, &[OTHER]);
    for (place, words) in [
        // Row 33 with data 0, at the word after the one that is read; and the wait again, with its own number (2) and FN.
        (0, [0x25, status + 8]),
        (1, [0x2_0000_0065, status]),
    ] {
        spoil(&machine, at + place * 32);
        machine.unit.execute(1);

        recovered(&mut machine);

        let queue = (machine.unit.read64(IQA) & !0xFFF) + at + place * 32;
        let word = |n: u64| machine.memory.device_load(PhysAddr(queue + n * 8)).expect("inside");
        assert_eq!([word(0), word(1), word(2), word(3)], [words[0], words[1], 0, 0]);
        machine.unit.execute(1);
    }
    assert_eq!(machine.vtd.commands.poll(refused), Completion::Failed);
    machine.assert_lawful();
}

#[test]
fn answers_behind_a_refused_descriptor_arrive_and_arrive_once() {
    for config in units() {
        let mut machine = with_page_requests(config);
        let answers: Vec<_> = (0..4).map(|index| asked(&mut machine, index)).collect();
        machine.unit.pause(0);
        let mut answers = answers.into_iter();
        let mut respond = |machine: &mut Machine| {
            let answer = answers.next().expect("four");
            assert_eq!(machine.vtd.commands.respond(answer), Ok(()));
        };
        respond(&mut machine);
        let at = machine.unit.read64(IQT);
        let refused = submit(&mut machine, &[OTHER]);
        respond(&mut machine);
        let after = submit(&mut machine, &[Invalidation::PageRequestDrain]);
        respond(&mut machine);
        respond(&mut machine);
        spoil(&machine, at);

        machine.unit.resume();
        assert_eq!(machine.unit.answers().len(), 1);
        recovered(&mut machine);

        let mut numbers: Vec<_> = machine.unit.answers().iter().map(|answer| answer.tag.index).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 1, 2, 3]);
        assert_eq!(machine.unit.waiting_groups(), []);
        assert_eq!(completions(&mut machine, [refused, after]), [Completion::Failed, Completion::Done]);
        machine.assert_lawful();
    }
}

#[test]
fn a_refused_answer_is_told_with_its_device_and_fails_no_ticket() {
    let mut machine = with_page_requests(Config::full());
    let answer = asked(&mut machine, 1);
    machine.unit.pause(0);
    let before = submit(&mut machine, &[OTHER]);
    let at = machine.unit.read64(IQT);
    assert_eq!(machine.vtd.commands.respond(answer), Ok(()));
    let after = submit(&mut machine, &[OTHER]);
    spoil(&machine, at);

    machine.unit.resume();
    let (_, failures) = recovered(&mut machine);

    assert_eq!(failures, [Failure { cause: FailureCause::Refused, stream: Some(DISK), ticket: None }]);
    assert_eq!(completions(&mut machine, [before, after]), [Completion::Done; 2]);
}

#[test]
fn several_refused_descriptors_are_dealt_with_one_by_one() {
    for config in units() {
        let mut machine = HARDWARE.machine(config);
        machine.unit.pause(0);
        let at = machine.unit.read64(IQT);
        let tickets = [(); 20].map(|()| submit(&mut machine, &[OTHER]));
        // Of each second ticket the descriptor, of each sixth the wait as well.
        for n in (0..20).step_by(2) {
            spoil(&machine, at + n * 64);
            if n % 6 == 0 {
                spoil(&machine, at + n * 64 + 32);
            }
        }

        machine.unit.resume();
        let (_, failures) = recovered(&mut machine);

        assert_eq!(failures.len(), 14);
        for (n, ticket) in tickets.into_iter().enumerate() {
            let expected = if n % 2 == 0 { Completion::Failed } else { Completion::Done };
            assert_eq!(machine.vtd.commands.poll(ticket), expected, "{n}");
        }
        machine.assert_lawful();
    }
}

/// The unit cannot read the queue's memory, so nothing that is put there helps.
#[test]
fn a_queue_that_cannot_go_on_is_given_up_and_says_so() {
    let mut machine = with_page_requests(Config::full());
    // Where the queue goes off later, it fails once more before it does.
    machine.unit.acknowledge_after(3);
    // The time of its errors is its own.
    machine.unit.resume();
    let answer = asked(&mut machine, 1);
    machine.unit.lose_queue(true);
    let tickets = [(); 3].map(|()| submit(&mut machine, &[OTHER]));
    assert_eq!(machine.pass(), [Event::CommandsFailed { status: machine.unit.read32(FSTS) }]);

    let mut failures = Vec::new();
    while let Some(failure) = machine.vtd.commands.recover() {
        failures.push(failure);
        assert!(failures.len() < 20, "{failures:?}");
    }

    let last = failures.last().map(|failure| (failure.cause, failure.ticket));
    assert_eq!(last, Some((FailureCause::Stopped, Some(tickets[2]))), "{failures:?}");
    assert_eq!(completions(&mut machine, tickets), [Completion::Failed; 3]);
    for invalidation in [OTHER, PAGE] {
        assert!(matches!(machine.vtd.commands.submit(&[invalidation]), Err(Error::Failed { .. })));
    }
    let copy = PageResponse { stream: DISK, tag: answer.tag, outcome: Outcome::Success };
    let (back, error) = machine.vtd.commands.respond(answer).expect_err("nothing would carry it");
    assert_eq!(back, copy);
    assert!(matches!(error, Error::Failed { .. }));
    // The pass that is due after an error; the queue may have failed once more while it went off.
    machine.pass();
    assert_eq!(machine.vtd.commands.recover(), None);
    assert_eq!(machine.unit.read32(FSTS) & (IQE | ITE | ICE), 0, "faults interrupt again");
    assert_eq!(machine.pass(), []);
}

#[test]
fn a_device_that_does_not_answer_is_named_and_its_ticket_failed() {
    for reports in [true, false] {
        let config = Config { device_tlb_timeout_us: 1_000, names_silent_devices: reports, ..Config::full() };
        let mut machine = with_page_requests(config);
        // The time of its errors is its own.
        machine.unit.resume();
        machine.unit.hold_device_tlb(DISK);
        let before = submit(&mut machine, &[OTHER]);
        let silent = submit(&mut machine, &[device_tlb(DISK)]);
        let after = submit(&mut machine, &[OTHER]);
        assert_eq!(machine.vtd.commands.poll(after), Completion::Pending, "it waits behind the device");

        machine.unit.advance(2_000);
        assert_eq!(machine.unit.aborted_waits(), 1);
        let (told, failures) = recovered(&mut machine);

        assert!(matches!(told[..], [status] if status & ITE != 0), "{told:x?}");
        let failure = Failure { cause: FailureCause::Unanswered, stream: Some(DISK), ticket: Some(silent) };
        assert_eq!(failures, [failure], "IQERCD names it: {reports}");
        for _ in 0..3 {
            machine.invalidate(&[OTHER]);
            assert_eq!(
                completions(&mut machine, [before, silent, after]),
                [Completion::Done, Completion::Failed, Completion::Done]
            );
        }
        machine.assert_lawful();
    }
}

/// Whatever is still asked of it would hold up everybody once more.
#[test]
fn a_silent_device_is_blocked_and_let_go_of_without_being_asked_again() {
    let mut machine = Machine::new(Config { device_tlb_timeout_us: 1_000, ..Config::full() });
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.assign(DISK, ALL);
    machine.map(&tree, Iova(0x1000), 7);
    let attachment = machine.attach(DISK, pasid(5), &tree);
    assert_eq!(machine.ats_read(DISK, pasid(5), Iova(0x1000)), Ok(7));
    machine.unit.hold_device_tlb(DISK);
    let silent = submit(&mut machine, &[device_tlb(DISK)]);
    machine.unit.advance(2_000);
    recovered(&mut machine);
    assert_eq!(machine.vtd.commands.poll(silent), Completion::Failed);

    let (device, blocked) = machine.vtd.tables.block(DISK).expect("it is assigned");
    let (leaving, detached) = machine.vtd.tables.detach(attachment).expect("it is attached");
    for invalidations in [blocked, detached] {
        assert!(invalidations.iter().any(|it| it.asks() == Some(DISK)));
        let unasked: Vec<_> = invalidations.into_iter().filter_map(Invalidation::unasked).collect();
        let ticket = submit(&mut machine, &unasked);
        assert_eq!(machine.vtd.commands.poll(ticket), Completion::Done, "nobody waits for the device");
    }

    assert!(machine.ats_read(DISK, pasid(5), Iova(0x1000)).is_err(), "what it remembers is of no use");
    machine.vtd.tables.finish(leaving);
    machine.vtd.tables.finish(device);
    assert_eq!(machine.vtd.commands.recover(), None);
    machine.assert_lawful();
}

/// However far the unit had fetched when it gave the device up, also if the wait for the device was not.
#[test]
fn what_was_aborted_with_the_device_s_wait_is_done_once_more() {
    for ahead in 1..12 {
        let mut machine = with_page_requests(Config { device_tlb_timeout_us: 1_000, ..Config::full() });
        let answers: Vec<_> = (0..3).map(|index| asked(&mut machine, index)).collect();
        machine.unit.hold_device_tlb(DISK);
        machine.unit.pause(ahead);
        let silent = submit(&mut machine, &[device_tlb(DISK)]);
        let mut others = Vec::new();
        for answer in answers {
            others.push(submit(&mut machine, &[OTHER]));
            assert_eq!(machine.vtd.commands.respond(answer), Ok(()));
        }
        assert_eq!(machine.unit.execute(1), 1, "the device is asked");

        machine.unit.advance(2_000);
        let (_, failures) = recovered(&mut machine);
        assert_eq!(failures[0].ticket, Some(silent), "{ahead}");
        for &ticket in &others {
            assert_eq!(
                machine.vtd.commands.poll(ticket),
                Completion::Pending,
                "{ahead}: not before its wait"
            );
        }
        machine.unit.resume();

        assert_eq!(machine.vtd.commands.poll(silent), Completion::Failed, "{ahead}");
        for &ticket in &others {
            assert_eq!(machine.vtd.commands.poll(ticket), Completion::Done, "{ahead}");
        }
        assert_eq!(machine.unit.answers().len(), 3, "{ahead}: each once");
        machine.assert_lawful();
    }
}

/// Page requests that were on their way when a drain was asked for have arrived when its ticket is done, whatever happened
/// to its first wait.
#[test]
fn a_drain_that_was_aborted_still_drains() {
    let mut machine = with_page_requests(Config { device_tlb_timeout_us: 1_000, ..Config::full() });
    machine.unit.hold_device_tlb(DISK);
    machine.unit.pause(4);
    let silent = submit(&mut machine, &[device_tlb(DISK)]);
    let drain = submit(&mut machine, &[OTHER, Invalidation::PageRequestDrain]);
    let after = submit(&mut machine, &[OTHER]);
    machine.unit.execute(1);
    machine.unit.advance(2_000);
    machine.unit.hold_page_requests();
    let tag = GroupTag { pasid: pasid(5), index: 1 };
    let request = PageRequest { stream: DISK, tag, iova: Iova(0x1000), perms: Perms::READ, last: true };
    machine.unit.page_request(request);

    recovered(&mut machine);
    // What was fetched of both, and the wait of the second as it was queued first: neither is done yet.
    machine.unit.execute(3);
    assert_eq!(
        completions(&mut machine, [silent, drain, after]),
        [Completion::Failed, Completion::Pending, Completion::Pending]
    );
    machine.unit.execute(2);
    assert_eq!(
        completions(&mut machine, [silent, drain, after]),
        [Completion::Failed, Completion::Done, Completion::Pending]
    );
    machine.unit.resume();

    assert_eq!(machine.vtd.commands.poll(after), Completion::Done);
    assert_eq!(machine.pass(), [Event::PageRequest(request)]);
    machine.assert_lawful();
}

#[test]
fn a_full_queue_has_room_for_what_an_abort_makes_necessary() {
    let mut machine = with_page_requests(Config { device_tlb_timeout_us: 1_000, ..Config::full() });
    let answers: Vec<_> = (0..64).map(|index| asked(&mut machine, index)).collect();
    machine.unit.hold_device_tlb(DISK);
    machine.unit.pause(COMMANDS + 60);
    let silent = submit(&mut machine, &[device_tlb(DISK)]);
    let others: Vec<_> = (0..COMMANDS).map_while(|_| machine.vtd.commands.submit(&[]).ok()).collect();
    assert_eq!(others.len(), COMMANDS - 2);
    for answer in answers {
        assert_eq!(machine.vtd.commands.respond(answer), Ok(()));
    }
    machine.unit.execute(1);

    machine.unit.advance(2_000);
    assert!(machine.unit.aborted_waits() > COMMANDS - 2);
    let (_, failures) = recovered(&mut machine);
    machine.unit.resume();

    assert_eq!(failures[0].ticket, Some(silent));
    assert!(others.into_iter().all(|ticket| machine.vtd.commands.poll(ticket) == Completion::Done));
    assert_eq!(machine.unit.answers().len(), 64);
    machine.assert_lawful();
}

#[test]
fn one_device_tlb_at_a_time_is_waited_for() {
    let mut machine = with_page_requests(Config { device_tlb_timeout_us: 1_000, ..Config::full() });
    // The time of its errors is its own.
    machine.unit.resume();
    machine.unit.hold_device_tlb(DISK);
    let first = submit(&mut machine, &[device_tlb(DISK)]);
    let busy = Err(Error::Busy { what: "device-TLB invalidation" });

    assert_eq!(machine.vtd.commands.submit(&[device_tlb(NIC)]), busy);
    assert_eq!(machine.vtd.commands.submit(&[OTHER, device_tlb(DISK)]), busy);
    let other = submit(&mut machine, &[OTHER]);
    machine.unit.release_device_tlb(DISK);
    let second = submit(&mut machine, &[device_tlb(NIC)]);
    assert_eq!(completions(&mut machine, [first, other, second]), [Completion::Done; 3]);

    machine.unit.hold_device_tlb(NIC);
    let silent = submit(&mut machine, &[device_tlb(NIC)]);
    machine.unit.advance(2_000);
    assert_eq!(machine.vtd.commands.submit(&[device_tlb(DISK)]), busy, "nobody has looked yet");
    let (_, failures) = recovered(&mut machine);
    assert_eq!(failures[0].stream, Some(NIC));
    let third = submit(&mut machine, &[device_tlb(DISK)]);
    assert_eq!(completions(&mut machine, [silent, third]), [Completion::Failed, Completion::Done]);
    machine.assert_lawful();
}

/// Not every unit names the one that is silent: a guest could hide behind the other. Later is no better, so it is not for later
/// that it is refused.
#[test]
fn two_devices_in_one_batch_are_refused_as_too_much() {
    let mut machine = with_page_requests(Config::full());
    let too_much = Err(Error::Exhausted { what: "devices asked in a batch" });

    for batch in [[device_tlb(DISK), device_tlb(NIC)], [device_tlb(NIC), device_tlb(DISK)]] {
        assert_eq!(machine.vtd.commands.submit(&batch), too_much);
        batch.iter().for_each(|&one| machine.invalidate(&[one]));
    }
    // The same device twice is one device.
    machine.invalidate(&[device_tlb(DISK), device_tlb(DISK)]);
    machine.assert_lawful();
}

#[test]
fn a_stray_answer_is_told_with_its_device_and_stops_nothing() {
    let mut machine = HARDWARE.machine(Config::full());
    // The time of its errors is its own.
    machine.unit.resume();
    for _ in 0..20 {
        machine.unit.stray_completion(DISK);
        let ticket = submit(&mut machine, &[OTHER]);

        let (told, failures) = recovered(&mut machine);

        assert!(matches!(told[..], [status] if status & ICE != 0), "{told:x?}");
        let failure = Failure { cause: FailureCause::Unexpected, stream: Some(DISK), ticket: None };
        assert_eq!(failures, [failure]);
        assert_eq!(machine.unit.read32(FSTS), 0);
        assert_eq!(machine.vtd.commands.poll(ticket), Completion::Done);
    }
    machine.assert_lawful();
}

/// A unit that neither answers nor says why: the device comes first, and what waits behind it does not hide it.
#[test]
fn of_several_tickets_that_took_too_long_the_device_s_is_told() {
    let mut machine = with_page_requests(Config { device_tlb_timeout_us: 1 << 40, ..Config::full() });
    machine.unit.pause(0);
    let tickets = [vec![device_tlb(DISK)], vec![OTHER], vec![OTHER]].map(|what| submit(&mut machine, &what));

    for _ in 0..8 {
        machine.unit.advance(vtd::HEAD_LIMIT_US);
        completions(&mut machine, tickets);
    }

    assert_eq!(completions(&mut machine, tickets), [Completion::Failed; 3]);
    let named = Failure { cause: FailureCause::Unanswered, stream: Some(DISK), ticket: Some(tickets[0]) };
    assert_eq!(machine.vtd.commands.recover(), Some(named));
    assert_eq!(machine.vtd.commands.recover(), None);
}

/// It was not asked yet, so it is not to blame.
#[test]
fn a_device_behind_a_unit_that_does_nothing_is_not_called_silent() {
    let mut machine = with_page_requests(Config { device_tlb_timeout_us: 1 << 40, ..Config::full() });
    machine.unit.pause(0);
    let tickets = [vec![OTHER], vec![device_tlb(DISK)]].map(|what| submit(&mut machine, &what));

    for ticket in tickets {
        while machine.vtd.commands.poll(ticket) == Completion::Pending {
            machine.unit.advance(SECOND_US);
        }
        let failure = Failure { cause: FailureCause::Stopped, stream: None, ticket: Some(ticket) };
        assert_eq!(machine.vtd.commands.recover(), Some(failure));
    }
}

/// XSA-373: whoever waited behind a device that took its time paid for it. PCI Express gives a device a minute and a half, and
/// units take about as long to report one.
#[test]
fn others_are_only_late_while_a_silent_device_holds_the_queue() {
    let mut machine = with_page_requests(Config { device_tlb_timeout_us: 60 * SECOND_US, ..Config::full() });
    // The time of its errors is its own.
    machine.unit.resume();
    machine.unit.hold_device_tlb(DISK);
    let silent = submit(&mut machine, &[device_tlb(DISK)]);
    let others = [0; 4].map(|_| submit(&mut machine, &[OTHER]));

    for _ in 0..119 {
        assert_eq!(machine.vtd.commands.poll(silent), Completion::Pending);
        assert_eq!(completions(&mut machine, others), [Completion::Pending; 4]);
        assert_eq!(machine.vtd.commands.recover(), None);
        machine.unit.advance(SECOND_US / 2);
    }
    machine.unit.advance(SECOND_US);
    let (_, failures) = recovered(&mut machine);

    assert_eq!(
        failures,
        [Failure { cause: FailureCause::Unanswered, stream: Some(DISK), ticket: Some(silent) }]
    );
    assert_eq!(completions(&mut machine, others), [Completion::Done; 4]);
    machine.assert_lawful();
}

/// A unit that never reports it: its device has failed, and nobody else as long as the unit may be waiting for it.
#[test]
fn behind_a_device_that_was_given_up_others_wait_until_the_unit_gives_it_up_too() {
    let mut machine = with_page_requests(Config { device_tlb_timeout_us: 1 << 40, ..Config::full() });
    machine.unit.resume();
    machine.unit.hold_device_tlb(DISK);
    let silent = submit(&mut machine, &[device_tlb(DISK)]);
    let others = [0; 4].map(|_| submit(&mut machine, &[OTHER]));
    let waited_for = |machine: &mut Machine, seconds: u64| {
        for _ in 0..seconds {
            assert_eq!(completions(machine, others), [Completion::Pending; 4]);
            machine.unit.advance(SECOND_US);
        }
    };

    waited_for(&mut machine, 90);
    assert_eq!(machine.vtd.commands.poll(silent), Completion::Failed);
    let named = Failure { cause: FailureCause::Unanswered, stream: Some(DISK), ticket: Some(silent) };
    assert_eq!(machine.vtd.commands.recover(), Some(named));
    waited_for(&mut machine, 60);
    machine.unit.release_device_tlb(DISK);

    assert_eq!(completions(&mut machine, others), [Completion::Done; 4]);
    assert_eq!(machine.vtd.commands.poll(silent), Completion::Failed);
    assert_eq!(machine.vtd.commands.recover(), None);
    machine.assert_lawful();
}

/// A link that is down, or power that is off: every register reads as ones, and the queues hold what was in them before.
#[test]
fn a_unit_that_is_gone_is_told_of_once_and_a_pass_has_an_end() {
    let mut machine = with_page_requests(Config::full());
    for index in 0..5 {
        let answer = asked(&mut machine, index);
        assert_eq!(machine.vtd.commands.respond(answer), Ok(()));
    }
    machine.unit.pause(0);
    let tickets = [(); 3].map(|()| submit(&mut machine, &[OTHER]));

    machine.unit.vanish();

    assert_eq!(machine.pass(), [Event::CommandsFailed { status: u32::MAX }]);
    let stopped = Failure { cause: FailureCause::Stopped, stream: None, ticket: Some(tickets[2]) };
    assert_eq!(machine.vtd.commands.recover(), Some(stopped));
    for _ in 0..3 {
        assert_eq!(machine.vtd.commands.recover(), None);
        assert_eq!(machine.pass(), []);
    }
    assert_eq!(completions(&mut machine, tickets), [Completion::Failed; 3]);
    assert!(matches!(machine.vtd.commands.submit(&[OTHER]), Err(Error::Failed { .. })));
}

#[test]
fn an_error_is_told_once_in_each_pass_until_it_is_dealt_with() {
    let mut machine = HARDWARE.machine(Config::full());
    machine.unit.stray_completion(DISK);

    for _ in 0..3 {
        assert_eq!(machine.pass(), [Event::CommandsFailed { status: ICE }]);
    }
    assert!(machine.vtd.commands.recover().is_some());

    assert_eq!(machine.pass(), []);
    assert_eq!(machine.vtd.commands.recover(), None);
}

#[test]
fn each_of_several_errors_is_told_by_itself() {
    let mut machine = with_page_requests(Config { device_tlb_timeout_us: 1_000, ..Config::full() });
    // The time of its errors is its own.
    machine.unit.resume();
    machine.unit.hold_device_tlb(DISK);
    let silent = submit(&mut machine, &[device_tlb(DISK)]);
    let at = machine.unit.read64(IQT);
    let refused = submit(&mut machine, &[OTHER]);
    let after = submit(&mut machine, &[OTHER]);
    spoil(&machine, at);
    machine.unit.advance(2_000);
    machine.unit.stray_completion(NIC);

    let (_, failures) = recovered(&mut machine);

    let expected = [
        Failure { cause: FailureCause::Unanswered, stream: Some(DISK), ticket: Some(silent) },
        Failure { cause: FailureCause::Refused, stream: None, ticket: Some(refused) },
        Failure { cause: FailureCause::Unexpected, stream: Some(NIC), ticket: None },
    ];
    assert_eq!(failures, expected);
    assert_eq!(
        completions(&mut machine, [silent, refused, after]),
        [Completion::Failed, Completion::Failed, Completion::Done]
    );
    machine.assert_lawful();
}

/// Against a record of what the unit did: nothing is done that was not, nothing fails that did not, no answer is lost.
#[test]
fn whatever_goes_wrong_each_ticket_tells_the_truth() {
    for seed in 1..=40 {
        let mut random = Random::new(seed);
        let resumes_at_tail_write = random.below(2) == 0;
        let config = Config { device_tlb_timeout_us: 300, resumes_at_tail_write, ..Config::full() };
        let mut machine = with_page_requests(config);
        machine.unit.pause(random.below(8) as usize);
        // Tickets, each with the number that its wait writes, and whether something of it was spoilt or not answered.
        let mut tickets: Vec<(Ticket, bool)> = Vec::new();
        let mut answers = 0;
        for _ in 0..600 {
            match random.below(12) {
                0..4 => {
                    let at = machine.unit.read64(IQT);
                    let asks = random.below(4) == 0;
                    let device = if random.below(2) == 0 { DISK } else { NIC };
                    let what = if asks { vec![OTHER, device_tlb(device)] } else { vec![OTHER] };
                    let Ok(ticket) = machine.vtd.commands.submit(&what) else { continue };
                    let is_spoilt = random.below(10) == 0 && machine.unit.read64(IQH) == at;
                    if is_spoilt {
                        spoil(&machine, at + 32 * random.below(what.len() as u64 + 1));
                    }
                    tickets.push((ticket, is_spoilt));
                }
                4..8 => _ = machine.unit.execute(random.below(5) as usize),
                8 if machine.unit.waiting_groups().is_empty() => {
                    let answer = asked(&mut machine, answers % 512);
                    assert_eq!(machine.vtd.commands.respond(answer), Ok(()), "seed {seed}");
                    answers += 1;
                }
                9 => machine.unit.hold_device_tlb(if random.below(2) == 0 { DISK } else { NIC }),
                10 => [DISK, NIC].iter().for_each(|&device| machine.unit.release_device_tlb(device)),
                _ => machine.unit.advance(random.below(400)),
            }
            for failure in recovered(&mut machine).1 {
                if failure.cause == FailureCause::Unanswered {
                    let named = tickets.iter_mut().find(|(ticket, _)| Some(*ticket) == failure.ticket);
                    named.expect("it has a ticket").1 = true;
                } else {
                    assert_eq!(failure.cause, FailureCause::Refused, "seed {seed}");
                }
            }
        }
        [DISK, NIC].iter().for_each(|&device| machine.unit.release_device_tlb(device));
        machine.unit.resume();
        recovered(&mut machine);

        for &(ticket, failed) in tickets.iter().rev().take(25) {
            let expected = if failed { Completion::Failed } else { Completion::Done };
            assert_eq!(machine.vtd.commands.poll(ticket), expected, "seed {seed}, {ticket:?}");
        }
        for &(ticket, failed) in &tickets {
            assert!(!failed || machine.vtd.commands.poll(ticket) == Completion::Failed, "seed {seed}");
        }
        assert_eq!(machine.unit.answers().len(), usize::from(answers), "seed {seed}");
        machine.assert_lawful();
    }
}
