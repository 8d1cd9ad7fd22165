//! What goes away: attachments, devices, guests; every group is answered once, and none after that.

use broker::{ASSEMBLY_LIMIT_US, Limits, Owner, POISONED, Policy, Refusal, Restraint, Tally, Whose};
use hosted::rig::{Did, Rig, last, part, response};
use iommu::{GroupTag, Outcome, PageRequest, PageResponse, Pasid, StreamId};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);

/// Two guests with a queue of eight slots each.
type World = Rig<2, 8, { 2 * (8 + POISONED) }>;

const LIMITS: Limits = Limits::with_requests(32);

fn invalid(stream: StreamId, index: u16) -> PageResponse {
    response(stream, index, Outcome::Invalid)
}

fn refused(stream: StreamId, index: u16) -> Did {
    Did::Answered(invalid(stream, index))
}

/// "iommu/iommufd: Fix IOPF group ownership UAF": detach while groups are whole, read, half-seen.
#[test]
fn a_detach_answers_what_is_whole_discards_what_is_half_and_leaves_other_devices_alone() {
    let mut world = World::new();
    let disk = world.add(DISK, &LIMITS);
    let leaving = world.attach(DISK, disk, 0);
    let nic = world.attached(NIC, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    let cookie = world.deliver_one(0, 0).cookie;
    assert_eq!(world.admit(last(DISK, 2, 1), 0), Did::Forwarded(0));
    assert_eq!(world.admit(part(DISK, 3, 1), 0), Did::Nothing);
    assert_eq!(world.admit(last(NIC, 1, 1), 0), Did::Forwarded(0));
    assert_eq!(world.admit(part(NIC, 2, 1), 0), Did::Nothing);

    world.ledger.leave(leaving);
    world.broker.discard_leaving();
    let told = world.evict(0, Whose::Attachment(leaving), 1);
    world.ledger.detach(leaving);

    assert_eq!(told, [invalid(DISK, 1), invalid(DISK, 2)]);
    assert_eq!(world.settle(0, cookie, Outcome::Success, 2), Err(Refusal::Late));
    assert_eq!(world.ledger.missed(world.queues[0]).late, 1);
    let tally = Tally { requests: 3, opened: 3, evicted: 2, discarded: 1, ..Tally::default() };
    assert_eq!(world.ledger.tally(disk), Some(tally));
    assert_eq!(world.ledger.outstanding_requests(disk), 0);
    assert_eq!(world.ledger.outstanding(world.queues[0]), 2);
    assert_eq!(world.admit(last(NIC, 2, 2), 3), Did::Forwarded(0));
    assert_eq!(world.deliver(0, 3).len(), 2);
    world.assert_balance(nic, 2);
}

/// "handle window between drain and xa_erase": what comes between the steps of a detach.
#[test]
fn requests_between_the_steps_of_a_detach_are_answered_once_and_go_to_nobody() {
    for drained in [false, true] {
        let mut world = World::new();
        let disk = world.add(DISK, &LIMITS);
        let leaving = world.attach(DISK, disk, 0);
        assert_eq!(world.admit(part(DISK, 1, 1), 0), Did::Nothing);
        assert_eq!(world.admit(part(DISK, 2, 1), 0), Did::Nothing);
        world.ledger.leave(leaving);
        if drained {
            world.broker.discard_leaving();
        }

        assert_eq!(world.admit(last(DISK, 1, 2), 1), refused(DISK, 1));
        assert_eq!(world.admit(part(DISK, 2, 2), 1), Did::Nothing);
        assert_eq!(world.admit(last(DISK, 3, 1), 1), refused(DISK, 3));
        assert_eq!(world.admit(part(DISK, 4, 1), 1), Did::Nothing);

        world.broker.discard_leaving();
        assert_eq!(world.evict(0, Whose::Attachment(leaving), 2), []);
        world.ledger.detach(leaving);
        assert_eq!(world.deliver(0, 3), []);
        assert_eq!(world.ledger.outstanding(world.queues[0]), 0);
        world.assert_balance(disk, 0);
    }
}

#[test]
fn nothing_is_answered_after_a_detach() {
    let mut world = World::new();
    let disk = world.add(DISK, &LIMITS);
    let leaving = world.attach(DISK, disk, 0);
    for index in 0..4 {
        assert_eq!(world.admit(last(DISK, index, 1), 0), Did::Forwarded(0));
        assert_eq!(world.admit(part(DISK, 8 + index, 1), 0), Did::Nothing);
    }
    let cookies: Vec<_> = world.deliver(0, 0).iter().map(|group| group.cookie).collect();
    assert_eq!(world.admit(part(DISK, 0, 2), 0), Did::Nothing, "one of them doubled");

    world.ledger.leave(leaving);
    world.broker.discard_leaving();
    assert_eq!(world.evict(0, Whose::Attachment(leaving), 1).len(), 4);
    world.ledger.detach(leaving);

    for cookie in cookies {
        assert_eq!(world.settle(0, cookie, Outcome::Success, 2), Err(Refusal::Late));
    }
    assert_eq!(world.expire(2 * ASSEMBLY_LIMIT_US), []);
    assert_eq!(world.evict(0, Whose::All, 2), []);
    assert_eq!(world.deliver(0, 2), []);
    assert_eq!(world.broker.next_deadline_us(), None);
    world.assert_balance(disk, 0);
}

#[test]
fn a_device_that_is_replaced_to_another_guest_shows_it_nothing_of_before() {
    let mut world = World::new();
    let disk = world.add(DISK, &LIMITS);
    let old = world.attach(DISK, disk, 0);
    assert_eq!(world.admit(part(DISK, 1, 1), 0), Did::Nothing);
    assert_eq!(world.admit(last(DISK, 2, 1), 0), Did::Forwarded(0));
    let cookie = world.deliver_one(0, 0).cookie;

    world.ledger.leave(old);
    world.broker.discard_leaving();
    assert_eq!(world.evict(0, Whose::Attachment(old), 1), [invalid(DISK, 2)]);
    world.ledger.detach(old);
    let _ = world.attach(DISK, disk, 1);

    assert_eq!(world.admit(part(DISK, 1, 7), 2), Did::Nothing);
    assert_eq!(world.admit(last(DISK, 1, 8), 2), Did::Forwarded(1));
    let group = world.deliver_one(1, 2);
    assert!(group.pages.iter().map(|page| page.iova().0 >> 12).eq([7, 8]));
    for queue in [0, 1] {
        assert!(world.settle(queue, cookie, Outcome::Success, 3).is_err());
    }
    assert!(world.settle(0, group.cookie, Outcome::Success, 3).is_err(), "the old owner may not answer it");
    assert!(world.settle(1, group.cookie, Outcome::Success, 3).is_ok());
    world.assert_balance(disk, 0);
}

#[test]
fn an_eviction_of_one_attachment_leaves_the_others_of_the_device() {
    let mut world = World::new();
    let disk = world.add(DISK, &LIMITS);
    let pasids = [None, Pasid::new(5), Pasid::new(6)];
    let attachments = pasids.map(|pasid| {
        let policy = Policy { requests: pasid.into(), ..world.policy(DISK, disk, 0) };
        let attachment = world.ledger.attach(&policy).expect("there is room");
        let tag = GroupTag { pasid, index: 1 };
        assert_eq!(world.admit(PageRequest { tag, ..last(DISK, 1, 1) }, 0), Did::Forwarded(0));
        attachment
    });

    for at in [2, 0, 1] {
        let told = world.evict(0, Whose::Attachment(attachments[at]), 1);
        assert_eq!(told.iter().map(|response| response.tag.pasid).collect::<Vec<_>>(), [pasids[at]]);
        assert_eq!(world.evict(0, Whose::Attachment(attachments[at]), 1), []);
    }
}

#[test]
fn a_guest_that_dies_leaves_no_group_of_any_device_and_its_queue_to_the_next_one() {
    let mut world = World::new();
    let (disk, nic) = (world.attached(DISK, &LIMITS, 0), world.attached(NIC, &LIMITS, 0));
    for stream in [DISK, NIC] {
        assert_eq!(world.admit(last(stream, 1, 1), 0), Did::Forwarded(0));
        assert_eq!(world.admit(last(stream, 2, 1), 0), Did::Forwarded(0));
        assert_eq!(world.admit(part(stream, 3, 1), 0), Did::Nothing);
    }
    let cookies: Vec<_> = world.deliver(0, 0).iter().map(|group| group.cookie).collect();

    let told = world.reopen(0, Owner::Guest(5), 1);

    assert_eq!(told, [invalid(DISK, 1), invalid(DISK, 2), invalid(NIC, 1), invalid(NIC, 2)]);
    assert_eq!(world.ledger.owner(world.queues[0]), Some(Owner::Guest(5)));
    for cookie in cookies {
        assert!(world.settle(0, cookie, Outcome::Success, 2).is_err(), "the next owner cannot use it");
    }
    assert_eq!(world.ledger.missed(world.queues[0]).total(), 4, "its count begins at 0");
    for device in [disk, nic] {
        assert_eq!(world.ledger.outstanding_requests(device), 0);
        world.assert_balance(device, 0);
    }
}

#[test]
fn a_reset_answers_what_a_device_has_in_every_queue_and_forgives_it() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    let six = Policy { requests: Pasid::new(6).into(), ..world.policy(DISK, disk, 1) };
    let _ = world.ledger.attach(&six).expect("there is room");
    let tag = GroupTag { pasid: Pasid::new(6), index: 1 };
    let nic = world.attached(NIC, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    assert_eq!(world.admit(PageRequest { tag, ..last(DISK, 1, 1) }, 0), Did::Forwarded(1));
    assert_eq!(world.admit(part(DISK, 2, 1), 0), Did::Nothing);
    assert_eq!(world.admit(last(NIC, 1, 1), 0), Did::Forwarded(0));
    let failed = world.deliver(0, 0)[0].cookie;
    assert!(world.settle(0, failed, Outcome::Failure, 0).is_ok());
    assert_eq!(world.ledger.restraint(disk), Restraint::RequestsOff);

    world.ledger.quiesce_device(disk);
    assert_eq!(world.admit(last(DISK, 7, 1), 1), refused(DISK, 7));
    world.broker.discard_leaving();
    assert_eq!(world.evict(0, Whose::Device(disk), 1), []);
    assert_eq!(
        world.evict(1, Whose::Device(disk), 1),
        [PageResponse { stream: DISK, tag, outcome: Outcome::Invalid }]
    );
    world.ledger.resume_device(disk);

    assert_eq!(world.ledger.restraint(disk), Restraint::None);
    world.assert_balance(disk, 0);
    assert_eq!(world.admit(last(DISK, 2, 2), 2), Did::Forwarded(0));
    assert_eq!(world.deliver_one(0, 2).pages.len(), 1, "what was half-seen is not continued");
    world.assert_balance(nic, 1);
}

#[test]
fn a_drain_leaves_half_seen_groups_of_what_stays() {
    let mut world = World::new();
    let _ = world.attached(DISK, &LIMITS, 0);
    let nic = world.add(NIC, &LIMITS);
    let leaving = world.attach(NIC, nic, 1);
    for index in 0..6 {
        assert_eq!(world.admit(part(DISK, index, 1), 0), Did::Nothing);
        assert_eq!(world.admit(part(NIC, index, 1), 0), Did::Nothing);
    }

    world.ledger.leave(leaving);
    world.broker.discard_leaving();

    for index in 0..6 {
        assert_eq!(world.admit(last(DISK, index, 2), 1), Did::Forwarded(0));
    }
    assert_eq!(world.deliver(0, 1).iter().map(|group| group.pages.len()).collect::<Vec<_>>(), [2; 6]);
    assert_eq!(world.ledger.outstanding(world.queues[1]), 0);
}

#[test]
fn a_departure_ends_answers_that_were_held_back_too() {
    let mut world = World::new();
    let disk = world.add(DISK, &LIMITS);
    let leaving = world.attach(DISK, disk, 0);
    let mut held = 0;
    for round in 0..10 {
        assert_eq!(world.admit(last(DISK, round, 1), 0), Did::Forwarded(0));
        let cookie = world.deliver_one(0, 0).cookie;
        held += usize::from(world.settle(0, cookie, Outcome::Success, 0) == Ok(None));
    }
    assert!(held > 3, "a guest that repairs nothing is held back");

    world.ledger.leave(leaving);
    world.broker.discard_leaving();
    let told = world.evict(0, Whose::Attachment(leaving), 0);
    world.ledger.detach(leaving);

    assert_eq!(told.len(), held);
    assert_eq!(world.expire(1 << 30), [], "and they are not sent once more");
    world.assert_balance(disk, 0);
}

/// "use device rbtree in iopf reporting path": a request of a device that was just removed.
#[test]
fn a_device_that_was_removed_is_nobody_and_its_place_can_be_used_by_another() {
    let mut world = World::new();
    let disk = world.add(DISK, &LIMITS);
    let attachment = world.attach(DISK, disk, 0);
    world.ledger.leave(attachment);
    world.broker.discard_leaving();
    world.ledger.detach(attachment);
    world.ledger.quiesce_device(disk);
    world.ledger.remove_device(disk);

    assert_eq!(world.admit(last(DISK, 1, 1), 1), refused(DISK, 1));
    assert_eq!(world.ledger.tally(disk), None);
    assert_eq!(world.ledger.restraint(disk), Restraint::None);

    let again = world.attached(DISK, &LIMITS, 1);
    assert_eq!(world.admit(last(DISK, 1, 1), 2), Did::Forwarded(1));
    assert_eq!(world.ledger.tally(again), Some(Tally { requests: 1, opened: 1, ..Tally::default() }));
    world.ledger.remove_device(disk);
    assert!(world.ledger.tally(again).is_some(), "an old name removes nothing");
}

/// "amdxdna: WARN in iopf_queue_flush_dev at SVA unbind": what never had a group, or is long gone.
#[test]
fn departures_of_what_has_nothing_or_is_gone_change_nothing() {
    let mut world = World::new();
    let disk = world.add(DISK, &LIMITS);
    let gone = world.attach(DISK, disk, 0);
    for _ in 0..2 {
        world.ledger.leave(gone);
        world.broker.discard_leaving();
        assert_eq!(world.evict(0, Whose::Attachment(gone), 0), []);
        world.ledger.detach(gone);
    }
    let stays = world.attach(DISK, disk, 0);

    world.ledger.leave(gone);
    world.ledger.detach(gone);
    world.ledger.resume_device(disk);
    world.broker.discard_leaving();

    assert_ne!(gone, stays);
    assert_eq!(world.admit(last(DISK, 1, 1), 1), Did::Forwarded(0));
}
