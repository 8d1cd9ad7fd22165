//! Queues as objects, which requests go to which of them, and who may answer what was sent there.

use broker::{
    Broker, Cookie, Error, Inbox, Ledger, Limits, Missed, Owner, POISONED, Policy, Refusal, Requests,
    Restraint, RingError, Shown, Taken, Tally, Verdict, Whose,
};
use heapless::spsc;
use hosted::rig::{Did, Rig, last, part, response, send};
use iommu::{GroupTag, Iova, Outcome, PageRequest, Pasid, Perms, StreamId};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);

/// Two guests with a queue of eight slots each.
type World = Rig<2, 8, { 2 * (8 + POISONED) }>;

const LIMITS: Limits = Limits::with_requests(32);

fn refused(stream: StreamId, index: u16) -> Did {
    Did::Answered(response(stream, index, Outcome::Invalid))
}

fn of(pasid: Option<Pasid>, request: PageRequest) -> PageRequest {
    PageRequest { tag: GroupTag { pasid, ..request.tag }, ..request }
}

// What a queue is.

#[test]
fn a_queue_is_there_before_anything_is_attached_and_knows_whose_it_is() {
    let ledger = Ledger::<2, 8, 8, 8>::new(64);

    let guest = ledger.open(Owner::Guest(7)).expect("there are two");
    let pager = ledger.open(Owner::Pager).expect("there are two");

    assert_eq!(ledger.owner(guest), Some(Owner::Guest(7)));
    assert_eq!(ledger.owner(pager), Some(Owner::Pager));
    assert_eq!((ledger.outstanding(guest), ledger.missed(guest)), (0, Missed::default()));
    assert_eq!(ledger.open(Owner::Guest(8)), Err(Error::NoQueue), "all are open");
    assert_eq!(ledger.open_at(1, Owner::Guest(8)), Err(Error::NoQueue), "this one is");
    assert_eq!(ledger.open_at(2, Owner::Guest(8)), Err(Error::NoQueue), "there is none");
}

#[test]
fn several_attachments_share_a_queue_and_each_request_says_whose_it_is() {
    let mut world = World::new();
    let (disk, nic) = (world.add(DISK, &LIMITS), world.add(NIC, &LIMITS));
    let kinds = [
        (DISK, disk, None, 0x11, 0),
        (DISK, disk, Pasid::new(5), 0x11, u64::MAX),
        (NIC, nic, Pasid::new(5), 0x12, 0x8000_0000_0000_0000),
    ];
    for (stream, device, pasid, name, opaque) in kinds {
        let policy = world.policy(stream, device, 0);
        let policy = Policy { requests: pasid.into(), name, opaque, ..policy };
        let _ = world.ledger.attach(&policy).expect("there is room");
    }

    for (stream, _, pasid, ..) in kinds {
        assert_eq!(world.admit(of(pasid, last(stream, 1, 1)), 0), Did::Forwarded(0));
    }

    let groups = world.deliver(0, 0);
    for (group, (.., pasid, name, opaque)) in groups.iter().zip(kinds) {
        assert_eq!((group.tag.pasid, group.name, group.opaque), (pasid, name, opaque));
    }
    assert_eq!(groups.len(), 3);
    assert_eq!(world.ledger.outstanding(world.queues[0]), 3);
}

/// A fault may be told after the detachment began in which it no longer could happen.
#[test]
fn faults_from_before_a_detachment_are_told_as_its_own_until_it_is_over() {
    let world = World::new();
    let disk = world.add(DISK, &LIMITS);
    let policy = Policy { name: 0x21, opaque: 7, ..world.policy(DISK, disk, 0) };
    let attachment = world.ledger.attach(&policy).expect("there is room");
    let owner = || world.ledger.owner_of(DISK, Pasid::new(5));

    world.ledger.leave(attachment);
    assert_eq!(owner(), Some((0, 0x21, 7)));
    world.ledger.detach(attachment);
    assert_eq!(owner(), None);
}

/// "Fix event queue release use-after-free": the queue goes before what is attached to it.
#[test]
fn a_queue_that_was_opened_for_another_guest_gets_nothing_of_what_was_attached_before() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.reopen(0, Owner::Guest(9), 0), []);

    assert_eq!(world.admit(part(DISK, 1, 1), 1), Did::Nothing);
    assert_eq!(world.admit(last(DISK, 1, 2), 1), refused(DISK, 1));

    assert_eq!(world.deliver(0, 2), []);
    assert_eq!(world.ledger.owner_of(DISK, Pasid::new(5)), None, "nor do its faults");
    world.assert_balance(disk, 0);
}

/// "Fix event queue release use-after-free": what is attached goes before the queue.
#[test]
fn an_attachment_may_go_before_its_queue() {
    let mut world = World::new();
    let disk = world.add(DISK, &LIMITS);
    let attachment = world.attach(DISK, disk, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));

    world.ledger.leave(attachment);
    world.broker.discard_leaving();
    assert_eq!(world.evict(0, Whose::Attachment(attachment), 1), [response(DISK, 1, Outcome::Invalid)]);
    world.ledger.detach(attachment);

    assert_eq!(world.reopen(0, Owner::Guest(9), 2), []);
    let _ = world.attach(DISK, disk, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 3), Did::Forwarded(0));
}

#[test]
fn an_attachment_to_a_device_that_was_removed_is_not_one_to_what_took_its_place() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    world.ledger.remove_device(disk);
    let again = world.add(DISK, &LIMITS);

    assert_eq!(world.admit(last(DISK, 1, 1), 0), refused(DISK, 1));

    assert_eq!(world.ledger.tally(again), Some(Tally::default()));
    assert_eq!(world.ledger.tally(disk), None);
}

/// "Destroy response and mutex in iommufd_fault_destroy()": no cookie outlives its queue.
#[test]
fn a_queue_is_closed_once_nothing_waits_and_its_cookies_are_worth_nothing_afterwards() {
    let mut world = World::new();
    let _ = world.attached(DISK, &LIMITS, 0);
    let queue = world.queues[0];
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    let cookie = world.deliver_one(0, 0).cookie;

    world.ledger.shut(queue);
    world.broker.discard_leaving();
    assert_eq!(world.ledger.close(queue), Err(Error::Outstanding { groups: 1 }));
    assert_eq!(world.evict(0, Whose::All, 1), [response(DISK, 1, Outcome::Invalid)]);
    assert_eq!(world.ledger.close(queue), Ok(()));

    assert_eq!(world.settle(0, cookie, Outcome::Success, 2), Err(Refusal::OutOfRange), "no such queue");
    assert_eq!(world.ledger.close(queue), Err(Error::Gone));
    assert_eq!(world.ledger.owner(queue), None);
    let disk = world.policy(DISK, world.add(NIC, &LIMITS), 0);
    assert_eq!(world.ledger.attach(&disk), Err(Error::Gone));
    world.queues[0] = world.ledger.open(Owner::Guest(9)).expect("it is closed");
    assert_eq!(
        world.settle(0, cookie, Outcome::Success, 3),
        Err(Refusal::Late),
        "it was answered for its owner"
    );
    assert_eq!(world.ledger.owner(queue), None, "the old name is nobody's");
}

#[test]
fn a_queue_that_is_shut_refuses_what_is_new_and_takes_answers_to_what_it_has() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    assert_eq!(world.admit(part(DISK, 2, 1), 0), Did::Nothing);

    world.ledger.shut(world.queues[0]);

    assert_eq!(world.admit(last(DISK, 3, 1), 1), refused(DISK, 3));
    assert_eq!(world.admit(last(DISK, 2, 2), 1), refused(DISK, 2), "also what was half-seen");
    let cookie = world.deliver_one(0, 1).cookie;
    let sent = world.settle(0, cookie, Outcome::Success, 2);
    assert_eq!(sent, Ok(Some(response(DISK, 1, Outcome::Success))));
    world.assert_balance(disk, 0);
}

#[test]
fn a_queue_that_was_not_shut_cannot_be_closed() {
    let world = World::new();

    assert!(world.ledger.close(world.queues[0]).is_err());

    assert_eq!(world.ledger.owner(world.queues[0]), Some(Owner::Guest(0)));
}

// How a group comes to its owner.

#[test]
fn a_ring_that_could_overflow_is_not_accepted() {
    let ledger = Ledger::<1, 8, 8, 8>::new(64);
    let mut broker = Box::new(Broker::<'_, 1, 8, 8, 8, { 8 + POISONED }>::new(&ledger));
    let mut small = heapless::spsc::Queue::<u16, 8>::new();
    let mut large = heapless::spsc::Queue::<u16, 9>::new();

    let too_small = RingError::TooSmall { capacity: 7, needed: 8 };
    assert_eq!(broker.connect(0, small.split().0), Err(too_small));
    let (producer, _) = large.split();
    assert_eq!(broker.connect(1, producer), Err(RingError::NoQueue));
}

/// "Use a separate spinlock to protect fault->deliver list": a stuck reader holds nothing up.
#[test]
fn an_owner_that_never_reads_loses_nothing_but_its_own_time() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    let nic = world.attached(NIC, &LIMITS, 1);
    for round in 0..1_000 {
        let now_us = round * 200_000;
        world.ledger.quiesce_device(disk);
        world.ledger.resume_device(disk);
        for index in 0..8 {
            assert_eq!(world.admit(last(DISK, index, 1), now_us), Did::Forwarded(0), "round {round}");
        }
        assert_eq!(world.admit(last(NIC, 1, round), now_us), Did::Forwarded(1));
        let cookie = world.deliver_one(1, now_us).cookie;
        assert!(world.settle(1, cookie, Outcome::Success, now_us).is_ok());
        assert_eq!(world.expire(now_us + 150_000).len(), 8);
    }

    assert_eq!(world.deliver(0, 0), [], "what expired is not shown");
    world.assert_balance(disk, 0);
    world.assert_balance(nic, 0);
    world.ledger.quiesce_device(disk);
    world.ledger.resume_device(disk);
    for index in 0..8 {
        assert_eq!(world.admit(last(DISK, index, 1), 1 << 40), Did::Forwarded(0));
    }
    assert_eq!(world.deliver(0, 1 << 40).len(), 8, "it reads again, and has it all");
}

#[test]
fn what_waits_in_a_queue_is_announced_to_a_ring_that_is_connected_later_or_anew() {
    let ledger = Ledger::<1, 4, 8, 8>::new(64);
    let mut broker = Box::new(Broker::<'_, 1, 4, 8, 8, { 4 + POISONED }>::new(&ledger));
    let queue = ledger.open(Owner::Guest(1)).expect("it is closed");
    let device = ledger.add_device(DISK, &LIMITS).expect("there is room");
    let requests = Requests::from(Pasid::new(5));
    let policy = Policy { stream: DISK, requests, device, queue, name: 1, opaque: 0 };
    let _ = ledger.attach(&policy).expect("there is room");
    let mut rings = [const { heapless::spsc::Queue::<u16, 5>::new() }; 2];
    let mut admitted = 0;

    for (round, ring) in (0..).zip(&mut rings) {
        for index in 0..2 {
            let _ = broker.admit(&last(DISK, round * 2 + index, 1), 0);
            admitted += 1;
        }
        let (producer, consumer) = ring.split();
        assert_eq!(broker.connect(0, producer), Ok(()));
        let mut inbox = Inbox::new(&ledger, 0, consumer);
        if round == 1 {
            let seen: Vec<_> = core::iter::from_fn(|| inbox.next(0)).map(|group| group.tag.index).collect();
            assert_eq!(seen, [0, 1, 2, 3], "the first ring's reader never came");
        }
    }
    assert_eq!(admitted, ledger.outstanding(queue));
}

#[test]
fn a_group_that_is_left_is_shown_again_unless_it_is_answered_meanwhile() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    assert_eq!(world.admit(last(DISK, 2, 2), 0), Did::Forwarded(0));
    let leave = |group: Shown<'_>| {
        assert_eq!(group.tag().index, 1);
        None::<()>
    };

    assert_eq!(world.inboxes[0].take(0, leave), Taken::Left);
    assert_eq!(world.inboxes[0].take(0, leave), Taken::Left, "the same one");
    let take = |group: Shown<'_>| Some((group.tag().index, group.cookie()));
    let Taken::Yes((1, first)) = world.inboxes[0].take(0, take) else { panic!("the same one") };
    assert!(world.settle(0, first, Outcome::Success, 0).is_ok());
    assert_eq!(world.inboxes[0].take(0, |_| None::<()>), Taken::Left);
    assert_eq!(world.evict(0, Whose::All, 0), [response(DISK, 2, Outcome::Invalid)]);
    assert_eq!(world.inboxes[0].take(0, take), Taken::Gone, "it is answered");
    assert_eq!((world.inboxes[0].take(0, take), world.inboxes[0].unseen()), (Taken::Empty, 1));
    world.assert_balance(disk, 0);
}

#[test]
fn a_slot_is_announced_once_however_often_it_is_used_before_its_owner_looks() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    for index in 0..20 {
        assert_eq!(world.admit(last(DISK, index, 1), 0), Did::Forwarded(0));
        assert_eq!(world.evict(0, Whose::All, 0), [response(DISK, index, Outcome::Invalid)]);
    }
    assert_eq!(world.admit(last(DISK, 20, 1), 0), Did::Forwarded(0));

    let index = |group: Shown<'_>| Some(group.tag().index);
    assert_eq!(world.inboxes[0].take(0, index), Taken::Yes(20));
    assert_eq!(world.inboxes[0].take(0, index), Taken::Empty);
    world.assert_balance(disk, 1);
}

#[test]
fn a_group_that_is_answered_while_it_is_read_is_not_taken() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    let ([queue, _], ledger) = (world.queues, world.ledger);
    for (index, answer) in [(1, true), (2, false)] {
        assert_eq!(world.admit(last(DISK, index, 1), 0), Did::Forwarded(0));
        let read = |group: Shown<'_>| {
            let answered = answer.then(|| ledger.evict(queue, Whose::All, 0)).flatten();
            assert_eq!(answered.map(send).is_some(), answer);
            Some(group.tag().index)
        };

        let taken = world.inboxes[0].take(0, read);

        assert_eq!(taken, if answer { Taken::Gone } else { Taken::Yes(2) });
    }
    assert_eq!(ledger.latencies(disk).map(|times| times.delivery.iter().sum()), Some(1_u64));
    world.assert_balance(disk, 1);
}

// Which requests go where.

#[test]
fn an_attachment_for_any_pasid_gets_what_no_other_attachment_of_its_device_is_about() {
    let mut world = World::new();
    let (disk, nic) = (world.add(DISK, &LIMITS), world.add(NIC, &LIMITS));
    let any = Policy { requests: Requests::Any, opaque: 1, ..world.policy(DISK, disk, 0) };
    let five = Policy { opaque: 2, ..world.policy(DISK, disk, 1) };
    let _ = world.ledger.attach(&any).expect("there is room");
    let _ = world.ledger.attach(&five).expect("there is room");
    let _ = world.attach(NIC, nic, 1);

    for (pasid, queue, opaque) in [
        (None, 0, 1),
        (Pasid::new(0), 0, 1),
        (Pasid::new(5), 1, 2),
        (Pasid::new(6), 0, 1),
        (Pasid::new(Pasid::MAX), 0, 1),
    ] {
        assert_eq!(world.admit(of(pasid, last(DISK, 1, 1)), 0), Did::Forwarded(queue));
        let group = world.deliver_one(queue, 0);
        assert_eq!((group.tag.pasid, group.opaque), (pasid, opaque));
        assert_eq!(world.ledger.owner_of(DISK, pasid), Some((queue, 0x21, opaque)));
    }
    let six = of(Pasid::new(6), last(NIC, 1, 1));
    assert!(matches!(world.admit(six, 0), Did::Answered(_)), "another device's PASIDs are its own");
}

#[test]
fn what_an_attachment_was_about_goes_to_that_for_any_pasid_once_it_left() {
    let mut world = World::new();
    let disk = world.add(DISK, &LIMITS);
    let any = Policy { requests: Requests::Any, ..world.policy(DISK, disk, 0) };
    let _ = world.ledger.attach(&any).expect("there is room");
    let five = world.attach(DISK, disk, 1);

    world.ledger.leave(five);

    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
}

#[test]
fn one_key_has_one_attachment() {
    let world = World::new();
    let disk = world.add(DISK, &LIMITS);
    let first = world.attach(DISK, disk, 0);

    assert_eq!(world.ledger.attach(&world.policy(DISK, disk, 1)), Err(Error::NoRoomForAttachment));
    world.ledger.leave(first);
    assert_eq!(
        world.ledger.attach(&world.policy(DISK, disk, 1)),
        Err(Error::NoRoomForAttachment),
        "it has not gone yet"
    );
    world.ledger.detach(first);
    assert!(world.ledger.attach(&world.policy(DISK, disk, 1)).is_ok());
}

#[test]
fn a_full_queue_refuses_at_once_and_an_answer_makes_room() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    for index in 0..8 {
        assert_eq!(world.admit(last(DISK, index, index.into()), 0), Did::Forwarded(0));
    }

    assert_eq!(world.admit(last(DISK, 8, 1), 0), refused(DISK, 8));
    assert_eq!(world.admit(part(DISK, 9, 1), 0), Did::Nothing);
    assert_eq!(world.admit(last(DISK, 9, 1), 0), refused(DISK, 9));

    assert_eq!(world.ledger.outstanding_requests(disk), 8);
    let first = world.deliver(0, 0)[0].cookie;
    assert!(world.settle(0, first, Outcome::Success, 0).is_ok());
    assert_eq!(world.admit(last(DISK, 8, 1), 0), Did::Forwarded(0));
    world.assert_balance(disk, 8);
}

// Who may answer.

#[test]
fn a_cookie_that_is_not_outstanding_changes_nothing_and_is_counted_by_kind() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    let _ = world.attached(NIC, &LIMITS, 1);
    assert_eq!(world.admit(last(NIC, 1, 1), 0), Did::Forwarded(1));
    let foreign = world.deliver_one(1, 0).cookie;
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    let first = world.deliver_one(0, 0).cookie;
    assert!(world.settle(0, first, Outcome::Success, 0).is_ok());
    let settle = |world: &World, cookie| world.settle(0, cookie, Outcome::Success, 0).err();

    assert_eq!(settle(&world, first), Some(Refusal::Late), "answered, and nothing came after it");
    // A cookie is slot (11:0) and generation: the next one in this slot is known in advance, and means
    // nothing yet.
    let next = Cookie(first.0 + 0x1000);
    assert_eq!(settle(&world, next), Some(Refusal::Unknown), "free");
    assert_eq!(world.admit(part(DISK, 2, 1), 0), Did::Nothing);
    assert_eq!(settle(&world, next), Some(Refusal::Unknown), "half-seen");
    assert_eq!(settle(&world, first), Some(Refusal::Stale), "the slot has another group");
    assert_eq!(world.admit(last(DISK, 2, 2), 0), Did::Forwarded(0));
    assert_eq!(settle(&world, first), Some(Refusal::Stale));
    assert_eq!(settle(&world, foreign), Some(Refusal::Unknown), "another guest's");
    assert_eq!(settle(&world, Cookie(0)), Some(Refusal::Unknown), "made up");
    assert_eq!(settle(&world, Cookie(first.0 | 0xFFF)), Some(Refusal::OutOfRange));
    assert_eq!(settle(&world, Cookie(first.0 & !0xFFF | 8)), Some(Refusal::OutOfRange), "one past the last");
    assert_eq!(
        settle(&world, Cookie(first.0 & !0xFFF | 1)),
        Some(Refusal::Unknown),
        "a slot that was never used"
    );

    let missed = Missed { late: 1, stale: 2, unknown: 5, out_of_range: 2 };
    assert_eq!(world.ledger.missed(world.queues[0]), missed);
    assert_eq!((missed.total(), world.ledger.missed(world.queues[1]).total()), (10, 0));
    assert_eq!(world.deliver_one(0, 0).cookie, next, "it waits still");
    world.assert_balance(disk, 1);
    assert!(world.settle(1, foreign, Outcome::Success, 0).is_ok(), "its own guest may");
}

#[test]
fn a_cookie_of_a_lower_queue_is_no_older_one_of_a_higher() {
    let mut world = World::new();
    let _ = world.attached(DISK, &LIMITS, 0);
    let _ = world.attached(NIC, &LIMITS, 1);
    assert_eq!(world.admit(last(NIC, 1, 1), 0), Did::Forwarded(1));
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    let lower = world.deliver_one(0, 0).cookie;

    assert_eq!(world.settle(1, lower, Outcome::Success, 0), Err(Refusal::Unknown));
}

#[test]
fn a_cookie_is_used_once_whatever_its_code() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    let outcomes = [Outcome::Success, Outcome::Invalid];
    for (index, outcome) in (0..).zip(outcomes) {
        assert_eq!(world.admit(last(DISK, index, 1), 0), Did::Forwarded(0));
        let cookie = world.deliver_one(0, 0).cookie;

        assert_eq!(world.settle(0, cookie, outcome, 0), Ok(Some(response(DISK, index, outcome))));
        for again in outcomes {
            assert_eq!(world.settle(0, cookie, again, 0), Err(Refusal::Late));
        }
    }
    let tally = world.ledger.tally(disk).expect("it is there");
    assert_eq!((tally.succeeded, tally.declined, tally.answered()), (1, 1, 2));
}

/// "iommufd: Remove IOMMUFD_PAGE_RESP_FAILURE".
#[test]
fn a_response_failure_takes_page_requests_from_one_device_and_never_reaches_hardware() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    let nic = world.attached(NIC, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    assert_eq!(world.admit(last(DISK, 2, 1), 0), Did::Forwarded(0));
    assert_eq!(world.admit(part(DISK, 3, 1), 0), Did::Nothing);
    let [first, second] = &world.deliver(0, 0)[..] else { panic!("there are two") };
    let (first, second) = (first.cookie, second.cookie);

    let sent = world.settle(0, first, Outcome::Failure, 1);

    assert_eq!(sent, Ok(Some(response(DISK, 1, Outcome::Invalid))));
    assert_eq!(world.ledger.restraint(disk), Restraint::RequestsOff);
    assert_eq!(world.admit(last(DISK, 4, 1), 2), refused(DISK, 4));
    assert_eq!(world.admit(last(DISK, 3, 2), 2), refused(DISK, 3));
    let sent = world.settle(0, second, Outcome::Success, 2);
    assert_eq!(
        sent,
        Ok(Some(response(DISK, 2, Outcome::Success))),
        "what waited is answered as its owner says"
    );
    assert_eq!(world.ledger.restraint(disk), Restraint::RequestsOff, "and that gives nothing back");
    assert_eq!(world.admit(last(NIC, 1, 1), 3), Did::Forwarded(0));
    let tally = world.ledger.tally(disk).expect("it is there");
    assert_eq!((tally.failed, tally.declined, tally.succeeded, tally.refused), (1, 0, 1, 2));
    world.assert_balance(disk, 0);
    world.assert_balance(nic, 1);
}

#[test]
fn a_ring_that_is_connected_late_or_anew_announces_what_waits() {
    const N: usize = 2 + POISONED;
    let ledger = Box::new(Ledger::<1, 2, 8, 8>::new(64));
    let queue = ledger.open(Owner::Pager).expect("there is one");
    let device = ledger.add_device(StreamId(1), &Limits::with_requests(2)).expect("there is room");
    let policy = Policy { stream: StreamId(1), requests: Requests::Plain, device, queue, name: 0, opaque: 0 };
    ledger.attach(&policy).expect("there is room");
    let (mut first, mut second) = (spsc::Queue::<u16, 3>::new(), spsc::Queue::<u16, 3>::new());
    let (producer, _) = first.split();
    let (other_producer, consumer) = second.split();
    let mut broker = Box::new(Broker::<1, 2, 8, 8, N>::new(&ledger));
    let admit = |broker: &mut Broker<'_, 1, 2, 8, 8, N>, index| {
        let tag = GroupTag { pasid: None, index };
        let request =
            PageRequest { stream: StreamId(1), tag, iova: Iova(0x1000), perms: Perms::READ, last: true };
        assert_eq!(broker.admit(&request, 0), Verdict::Forward { queue: 0 });
    };

    admit(&mut broker, 1);
    broker.connect(0, producer).expect("it is large enough");
    admit(&mut broker, 2);
    broker.connect(0, other_producer).expect("it is large enough");

    let mut inbox = Inbox::new(&ledger, 0, consumer);
    let indices = core::iter::from_fn(|| inbox.next(0)).map(|group| group.tag.index);
    assert_eq!(indices.collect::<Vec<_>>(), [1, 2]);
}
