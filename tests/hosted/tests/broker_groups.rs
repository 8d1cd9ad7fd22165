//! How page requests become groups: assembly, poison, duplicates, overflow.
//!
//! The broker's scenarios are in four files: this one, `broker_queues.rs`, `broker_devices.rs`,
//! `broker_departure.rs`. Tests that stand for an entry of the list of known mistakes of others name its
//! subject. Entries that have no test among the four, and why:
//!
//! | subject | why not here |
//! |---|---|
//! | Break the loop on failure; Reject invalid read count; Avoid partial fault group delivery | a reader of the guest's memory: `channel.rs` |
//! | Fix struct iommu_hwpt_pgfault init and padding | bytes of the wire: `channel.rs` |
//! | Use a separate spinlock to protect the deliver list | no locks; a stuck reader is tested here, threads in `broker_races.rs` |
//! | Fix race during abort for file descriptors | nothing is published before it is made: opening is one store, at its end |
//! | Use device rbtree in iopf reporting path (fault against removal at once) | `broker_interleaved.rs`; in turns, in `broker_departure.rs` |
//! | Manage teardown with devm (interrupt after teardown) | the broker is never torn down; a request after a departure is tested |
//! | Fix a deadlock in intel_svm_drain_prq() | no locks |
//! | Only handle IOPF for SVA when PRI is supported; PRS isn't usable if PDS isn't supported | bring-up: `vtd/bring_up.rs`, `pcie.rs` |
//! | Clear PRQ overflow only when PRQ is empty | the driver's: `vtd/events.rs`; what the broker does then is tested here |
//! | Reject unsupported page request modes; Report the right page fault address | decoding: `golden_vtd.rs` |
//! | FAILURE encoded as 2 instead of 0xF | encoding: `golden_vtd.rs`, `golden_smmuv3.rs`; the broker never asks for it, tested |
//! | SMMU stall with unknown SID gets no RESUME | the same path as a page request of nobody, tested here |
//! | SMMUv3 has no drain | the driver's: `smmu_events.rs`; the broker's drain is in `broker_departure.rs` |

use broker::{ASSEMBLY_LIMIT_US, Limits, PAGES, POISONED, Refusal, Restraint, TICK_US, Tally, Verdict};
use hosted::{
    Machine,
    rig::{Did, Ended, Rig, last, part, response, send},
};
use iommu::{
    Bus, Event, Features, GroupTag, Iova, Outcome, PageRequest, PageResponse, Pasid, Perms, PhysAddr,
    StreamId,
};
use models::vtd::{Config, Requested};
use pgtable::VtdFirstStage;

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);

/// Two guests with a queue of eight slots each.
type World = Rig<2, 8, { 2 * (8 + POISONED) }>;
/// One guest with many slots.
type Wide = Rig<1, 64, { 64 + POISONED }>;

const LIMITS: Limits = Limits::with_requests(32);

fn refused(stream: StreamId, index: u16) -> Did {
    Did::Answered(response(stream, index, Outcome::Invalid))
}

#[test]
fn a_whole_group_reaches_its_owner_and_its_answer_the_device() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 1);
    let write = Perms { write: true, ..Perms::default() };

    assert_eq!(world.admit(part(DISK, 3, 0x10), 0), Did::Nothing);
    assert_eq!(world.admit(part(DISK, 3, 0x13), 1), Did::Nothing);
    assert_eq!(world.admit(PageRequest { perms: write, ..last(DISK, 3, 0x11) }, 2), Did::Forwarded(1));

    let group = world.deliver_one(1, 3);
    let pages: Vec<_> = group.pages.iter().map(|page| (page.iova().0, page.perms())).collect();
    let both = Perms::READ_WRITE;
    assert_eq!(pages, [(0x1_0000, both), (0x1_3000, both), (0x1_1000, write)]);
    assert_eq!(group.tag, GroupTag { pasid: Pasid::new(5), index: 3 });
    assert_eq!((group.name, group.opaque, group.reported_us), (0x21, 0xFEED_0020, 0));
    let sent = world.settle(1, group.cookie, Outcome::Success, 4);
    assert_eq!(sent, Ok(Some(response(DISK, 3, Outcome::Success))));
    let tally = Tally { requests: 3, opened: 1, succeeded: 1, ..Tally::default() };
    assert_eq!(world.ledger.tally(disk), Some(tally));
    assert_eq!((world.ledger.outstanding(world.queues[1]), world.ledger.outstanding_requests(disk)), (0, 0));
}

/// "iommu: Restore lost return in iommu_report_device_fault()": the first of several requests.
#[test]
fn a_first_request_that_is_not_the_last_is_neither_shown_nor_answered() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);

    assert_eq!(world.admit(part(DISK, 1, 1), 0), Did::Nothing);

    assert_eq!(world.deliver(0, 0), []);
    assert_eq!(world.ledger.outstanding(world.queues[0]), 1, "it has its slot");
    world.assert_balance(disk, 1);
}

/// "iommu/vt-d: Remove the pasid present check in prq_event_thread": requests without a PASID.
#[test]
fn every_permission_and_every_pasid_survives_the_way_to_the_owner() {
    let mut world = World::new();
    let disk = world.add(DISK, &LIMITS);
    for (index, pasid) in (0..).zip([None, Pasid::new(0), Pasid::new(Pasid::MAX)]) {
        let requests = broker::Requests::from(pasid);
        let policy = broker::Policy { requests, ..world.policy(DISK, disk, 0) };
        let _ = world.ledger.attach(&policy).expect("there is room");
        // Those for no access at all are malformed.
        for bits in (0..16).filter(|bits| bits & 7 != 0) {
            let bit = |n: u32| bits >> n & 1 != 0;
            let perms = Perms { read: bit(0), write: bit(1), execute: bit(2), privileged: bit(3) };
            let (tag, iova) = (GroupTag { pasid, index }, Iova(0xFFFF_FFFF_FFFF_F000));
            // Each at a time of its own: the same page again and again has its answers held back.
            let request = PageRequest { stream: DISK, tag, iova, perms, last: true };

            assert_eq!(world.admit(request, 0), Did::Forwarded(0));

            let group = world.deliver_one(0, 0);
            let pages: Vec<_> = group.pages.iter().map(|page| (page.iova(), page.perms())).collect();
            assert_eq!((group.tag, pages), (tag, vec![(iova, perms)]));
            let sent = world.settle(0, group.cookie, Outcome::Invalid, 0);
            assert_eq!(sent, Ok(Some(PageResponse { stream: DISK, tag, outcome: Outcome::Invalid })));
        }
    }
}

/// "(latent) group match ignores PASID".
#[test]
fn groups_that_arrive_interleaved_do_not_mix() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    let six = broker::Policy { requests: Pasid::new(6).into(), ..world.policy(DISK, disk, 0) };
    let _ = world.ledger.attach(&six).expect("there is room");
    let _ = world.attached(NIC, &LIMITS, 0);
    // One device and two numbers; the same number with another PASID; the same number and PASID of another
    // device.
    let tag = GroupTag { pasid: Pasid::new(6), index: 1 };
    let firsts = [
        part(DISK, 1, 0x10),
        part(DISK, 2, 0x20),
        PageRequest { tag, ..part(DISK, 1, 0x30) },
        part(NIC, 1, 0x40),
    ];

    for request in firsts {
        assert_eq!(world.admit(request, 0), Did::Nothing);
    }
    for request in firsts {
        let iova = Iova(request.iova.0 + 0x1000);
        assert_eq!(world.admit(PageRequest { iova, last: true, ..request }, 0), Did::Forwarded(0));
    }

    for (group, first) in world.deliver(0, 0).iter().zip(firsts) {
        let pages: Vec<_> = group.pages.iter().map(|page| page.iova().0).collect();
        assert_eq!((group.tag, pages), (first.tag, vec![first.iova.0, first.iova.0 + 0x1000]));
        assert_eq!(group.name, first.stream.0 + 1);
    }
}

/// "iommu: Handle iommu faults for a bad iopf setup"; "(latent) non-LAST request without handler is
/// answered".
#[test]
fn a_request_that_nobody_owns_is_answered_only_if_it_ends_its_group() {
    let mut world = World::new();
    let nic = world.add(NIC, &LIMITS);

    for stream in [DISK, NIC] {
        for page in 0..3 {
            assert_eq!(world.admit(part(stream, 1, page), 0), Did::Nothing);
        }
        assert_eq!(world.admit(last(stream, 1, 3), 0), refused(stream, 1));
    }

    assert_eq!(world.ledger.strays(), 8);
    let tally = Tally { requests: 4, opened: 1, refused: 1, ..Tally::default() };
    assert_eq!(world.ledger.tally(nic), Some(tally), "that of the device that is known is counted with it");
}

#[test]
fn a_group_has_sixteen_pages_and_a_longer_one_is_refused_whole_and_once() {
    for extra in [0, 1, 5] {
        let mut world = World::new();
        let disk = world.attached(DISK, &LIMITS, 0);
        let pages = PAGES as u64 + extra;

        for page in 1..pages {
            assert_eq!(world.admit(part(DISK, 1, page), 0), Did::Nothing);
        }
        let did = world.admit(last(DISK, 1, pages), 0);

        if extra == 0 {
            assert_eq!(did, Did::Forwarded(0));
            let group = world.deliver_one(0, 0);
            assert!(group.pages.iter().map(|page| page.iova().0 >> 12).eq(1..=16));
            continue;
        }
        assert_eq!(did, refused(DISK, 1), "{pages} pages");
        assert_eq!(world.ledger.outstanding(world.queues[0]), 0, "it holds no slot");
        assert_eq!(world.ledger.outstanding_requests(disk), 0, "and none of its pages is charged");
        let poisoned = u64::from(extra > 1);
        let tally = Tally { requests: pages, opened: 1, poisoned, refused: 1, ..Tally::default() };
        assert_eq!(world.ledger.tally(disk), Some(tally));
        assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0), "its number is free");
    }
}

/// PCI Express, "Page Request Message": a request for no access that does not end its group has no meaning.
#[test]
fn a_part_that_asks_for_no_access_poisons_its_group_wherever_it_comes() {
    for place in 0..3 {
        let mut world = World::new();
        let disk = world.attached(DISK, &LIMITS, 0);

        for at in 0..3 {
            let request = if at < 2 { part(DISK, 1, at) } else { last(DISK, 1, at) };
            let perms = if at == place { Perms::default() } else { Perms::READ };
            let did = world.admit(PageRequest { perms, ..request }, 0);
            assert_eq!(did, if at < 2 { Did::Nothing } else { refused(DISK, 1) }, "{place}");
        }

        assert_eq!(world.ledger.outstanding_requests(disk), 0);
        assert_eq!(world.admit(last(DISK, 1, 7), 0), Did::Forwarded(0), "its number is free again");
    }
}

#[test]
fn a_part_over_the_budget_poisons_its_group_alone() {
    let mut world = World::new();
    let disk = world.attached(DISK, &Limits::with_requests(3), 0);
    assert_eq!(world.admit(last(DISK, 9, 1), 0), Did::Forwarded(0));
    assert_eq!(world.admit(part(DISK, 1, 1), 0), Did::Nothing);
    assert_eq!(world.admit(part(DISK, 1, 2), 0), Did::Nothing);

    assert_eq!(world.admit(part(DISK, 1, 3), 0), Did::Nothing, "the fourth request");

    assert_eq!(world.ledger.outstanding_requests(disk), 1, "the poisoned group holds nothing");
    assert_eq!(world.admit(part(DISK, 1, 4), 0), Did::Nothing);
    assert_eq!(world.admit(last(DISK, 1, 5), 0), refused(DISK, 1));
    assert_eq!(world.deliver_one(0, 0).tag.index, 9);
    let tally = Tally { requests: 6, opened: 2, poisoned: 1, refused: 1, ..Tally::default() };
    assert_eq!(world.ledger.tally(disk), Some(tally));
    world.assert_balance(disk, 1);
}

/// "(latent) LAST-less floods unbounded".
#[test]
fn half_seen_groups_over_the_share_of_their_device_hold_no_slot_and_other_devices_carry_on() {
    let mut world = Wide::new();
    let disk = world.attached(DISK, &Limits { half_seen: 4, ..LIMITS }, 0);
    let _ = world.attached(NIC, &LIMITS, 0);
    for index in 0..500 {
        assert_eq!(world.admit(part(DISK, index, 1), 0), Did::Nothing);
    }

    assert_eq!(world.ledger.outstanding(world.queues[0]), 4);

    assert_eq!(world.admit(part(NIC, 0, 1), 0), Did::Nothing);
    assert_eq!(world.admit(last(NIC, 0, 2), 0), Did::Forwarded(0));
    for index in 0..4 {
        assert_eq!(world.admit(last(DISK, index, 2), 0), Did::Forwarded(0));
    }
    assert_eq!(world.admit(last(DISK, 499, 2), 0), refused(DISK, 499));
    let lengths: Vec<_> = world.deliver(0, 0).iter().map(|group| group.pages.len()).collect();
    assert_eq!(lengths, [2; 5]);
    world.assert_balance(disk, 4 + POISONED as u64 - 1);
}

#[test]
fn a_device_with_all_its_half_seen_groups_may_still_ask_for_single_pages() {
    let mut world = World::new();
    let _ = world.attached(DISK, &Limits { half_seen: 1, ..LIMITS }, 0);
    assert_eq!(world.admit(part(DISK, 1, 1), 0), Did::Nothing);

    assert_eq!(world.admit(last(DISK, 2, 1), 0), Did::Forwarded(0));

    assert_eq!(world.deliver_one(0, 0).tag.index, 2);
}

#[test]
fn the_oldest_of_too_many_poisoned_groups_is_forgotten_and_counted_and_no_other_guest_s() {
    let mut world = World::new();
    let nothing = Limits { requests: 1, half_seen: 0, ..LIMITS };
    let disk = world.attached(DISK, &nothing, 0);
    let _ = world.attached(NIC, &nothing, 1);
    assert_eq!(world.admit(part(NIC, 0, 1), 0), Did::Nothing);
    let each = POISONED as u16;
    for index in 0..=each {
        assert_eq!(world.admit(part(DISK, index, 1), 1 + u64::from(index)), Did::Nothing);
    }

    let (opened, requests) = (POISONED as u64 + 1, POISONED as u64 + 1);
    let tally = Tally { requests, opened, poisoned: opened, discarded: 1, ..Tally::default() };
    assert_eq!(world.ledger.tally(disk), Some(tally));
    for index in 1..=each {
        assert_eq!(world.admit(last(DISK, index, 2), 20), refused(DISK, index));
    }
    world.assert_balance(disk, 0);
    assert_eq!(world.admit(last(NIC, 0, 2), 20), refused(NIC, 0), "the other guest's is remembered");
}

#[test]
fn the_last_request_of_a_second_group_with_one_number_ends_both_as_invalid() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 1, 0x10), 0), Did::Forwarded(0));
    let cookie = world.deliver_one(0, 0).cookie;

    assert_eq!(world.admit(last(DISK, 1, 0x30), 2), refused(DISK, 1));

    assert_eq!(world.settle(0, cookie, Outcome::Success, 3), Err(Refusal::Late));
    assert_eq!(world.expire(1 << 30), []);
    let poisoned = Tally { duplicates: 1, poisoned: 1, refused: 1, ..Tally::default() };
    assert_eq!(world.ledger.tally(disk), Some(Tally { requests: 2, opened: 1, ..poisoned }));
    assert_eq!(world.ledger.restraint(disk), Restraint::Warned, "the device is flagged");
    assert_eq!(world.ledger.outstanding(world.queues[0]), 0);
}

#[test]
fn a_part_of_a_second_group_with_one_number_stops_the_owner_s_answer_until_its_end() {
    for waits_for_last in [false, true] {
        let mut world = World::new();
        let disk = world.attached(DISK, &LIMITS, 0);
        assert_eq!(world.admit(last(DISK, 1, 0x10), 0), Did::Forwarded(0));
        let cookie = world.deliver_one(0, 0).cookie;

        assert_eq!(world.admit(part(DISK, 1, 0x20), 1), Did::Nothing);
        assert_eq!(world.admit(part(DISK, 1, 0x21), 1), Did::Nothing);

        assert_eq!(world.settle(0, cookie, Outcome::Success, 2), Err(Refusal::Late));
        if waits_for_last {
            assert_eq!(world.admit(last(DISK, 1, 0x30), 3), refused(DISK, 1));
        } else {
            assert_eq!(world.expire(LIMITS.deadline_us - 1), []);
            let at_us = LIMITS.deadline_us + TICK_US;
            assert_eq!(world.expire(at_us), [Ended::Held(response(DISK, 1, Outcome::Invalid))]);
        }
        let tally = world.ledger.tally(disk).expect("it is there");
        assert_eq!((tally.poisoned, tally.refused, tally.expired), (1, 1, 0));
        assert_eq!(world.expire(1 << 30), []);
        world.assert_balance(disk, 0);
    }
}

#[test]
fn a_number_that_was_used_twice_before_delivery_is_not_shown() {
    let mut world = World::new();
    let _ = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 1, 0x10), 0), Did::Forwarded(0));
    assert_eq!(world.admit(part(DISK, 1, 0x20), 1), Did::Nothing);

    assert_eq!(world.deliver(0, 1), []);
}

#[test]
fn a_device_may_use_a_number_again_as_soon_as_its_answer_is_sent() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    let cookie = world.deliver_one(0, 0).cookie;
    let settled = world.ledger.settle(world.queues[0], cookie, Outcome::Success, 0).expect("outstanding");
    let broker::Settled::Now(answer) = settled else { panic!("its owner is believed") };

    // The device asks again before whoever sent the answer comes to free the slot.
    let mut again = None;
    let sent = answer.send(|response| {
        again = Some(matches!(world.broker.admit(&last(DISK, 1, 2), 1), Verdict::Forward { queue: 0 }));
        drop(response);
        Ok::<(), (PageResponse, ())>(())
    });

    assert!(sent.is_ok());
    assert_eq!(again, Some(true));
    let group = world.deliver_one(0, 1);
    assert_eq!(group.pages[0].iova(), Iova(0x2000));
    let sent = world.settle(0, group.cookie, Outcome::Invalid, 2);
    assert_eq!(sent, Ok(Some(response(DISK, 1, Outcome::Invalid))));
    assert_eq!(world.ledger.tally(disk).map(|tally| tally.duplicates), Some(0));
}

/// "iommu/iommufd: Fix IOPF group ownership UAF": a group has one owner at every time.
#[test]
fn an_answer_that_could_not_be_sent_is_still_owed_keeps_its_slot_and_is_nobody_else_s() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    let cookie = world.deliver_one(0, 0).cookie;
    let settled = world.ledger.settle(world.queues[0], cookie, Outcome::Success, 0).expect("outstanding");
    let broker::Settled::Now(answer) = settled else { panic!("its owner is believed") };

    let Err((answer, "full")) = answer.send(|response| Err((response, "full"))) else {
        panic!("it was not sent");
    };

    assert_eq!(world.ledger.outstanding(world.queues[0]), 1);
    assert_eq!(world.settle(0, cookie, Outcome::Success, 0), Err(Refusal::Late), "won once");
    assert_eq!(world.evict(0, broker::Whose::All, 0), []);
    assert_eq!(world.expire(1 << 30), []);
    assert_eq!(send(answer), response(DISK, 1, Outcome::Success));
    assert_eq!(world.ledger.outstanding(world.queues[0]), 0);
    world.assert_balance(disk, 0);
}

#[test]
fn a_half_group_that_grows_too_old_is_discarded_without_an_answer() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(part(DISK, 1, 1), 500), Did::Nothing);

    assert_eq!(world.expire(499 + ASSEMBLY_LIMIT_US), []);
    assert_eq!(world.ledger.outstanding(world.queues[0]), 1);
    assert_eq!(world.expire(500 + ASSEMBLY_LIMIT_US + TICK_US), []);

    assert_eq!((world.ledger.outstanding(world.queues[0]), world.broker.next_deadline_us()), (0, None));
    let tally = Tally { requests: 1, opened: 1, discarded: 1, ..Tally::default() };
    assert_eq!((world.ledger.tally(disk), world.ledger.outstanding_requests(disk)), (Some(tally), 0));
    assert_eq!(world.ledger.restraint(disk), Restraint::None, "its guest is not at fault");
}

#[test]
fn parts_do_not_prolong_the_time_that_a_group_has_to_be_whole() {
    let mut world = World::new();
    let _ = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(part(DISK, 1, 1), 0), Did::Nothing);
    assert_eq!(world.admit(part(DISK, 1, 2), ASSEMBLY_LIMIT_US - 10), Did::Nothing);

    assert_eq!(world.expire(ASSEMBLY_LIMIT_US + TICK_US), []);

    assert_eq!(world.ledger.outstanding(world.queues[0]), 0);
}

#[test]
fn the_time_that_a_device_takes_for_its_group_is_not_its_guest_s() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    let slow_us = 3 * LIMITS.deadline_us;
    assert_eq!(world.admit(part(DISK, 1, 1), 0), Did::Nothing);

    assert_eq!(world.admit(last(DISK, 1, 2), slow_us), Did::Forwarded(0));

    assert_eq!(world.expire(slow_us + LIMITS.deadline_us - 1), [], "the guest has all of its time");
    let ended = world.expire(slow_us + LIMITS.deadline_us + TICK_US);
    let expired = Ended::Expired {
        response: response(DISK, 1, Outcome::Invalid),
        late_us: TICK_US,
        restraint: Some(Restraint::Warned),
    };
    assert_eq!(ended, [expired]);
    world.assert_balance(disk, 0);
}

#[test]
fn a_poisoned_group_is_forgotten_by_age_so_that_its_number_can_be_used_again() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    for page in 0..=PAGES as u64 {
        assert_eq!(world.admit(part(DISK, 1, page), 0), Did::Nothing);
    }

    assert_eq!(world.expire(ASSEMBLY_LIMIT_US + TICK_US), []);

    world.assert_balance(disk, 0);
    assert_eq!(world.broker.next_deadline_us(), None);
    assert_eq!(world.admit(last(DISK, 1, 1), 2 * ASSEMBLY_LIMIT_US), Did::Forwarded(0));
}

/// "iommu: Fix leak in iopf_queue_discard_partial()"; "Clear PRQ overflow only when PRQ is empty".
#[test]
fn an_overflow_discards_half_groups_and_answers_their_tails_with_success_once() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 9, 9), 0), Did::Forwarded(0));
    assert_eq!(world.admit(part(DISK, 1, 1), 0), Did::Nothing);
    assert_eq!(world.admit(part(DISK, 2, 1), 0), Did::Nothing);

    world.broker.overflowed(5);

    assert_eq!(world.ledger.outstanding(world.queues[0]), 1, "what was whole waits on");
    assert_eq!(world.ledger.outstanding_requests(disk), 1);
    assert_eq!(world.admit(part(DISK, 1, 2), 6), Did::Nothing);
    assert_eq!(world.admit(last(DISK, 1, 3), 7), Did::Answered(response(DISK, 1, Outcome::Success)));
    let tally = Tally { requests: 5, opened: 3, discarded: 2, ..Tally::default() };
    assert_eq!(world.ledger.tally(disk), Some(tally));
    // The device asks again for all of it.
    assert_eq!(world.admit(part(DISK, 1, 1), 8), Did::Nothing);
    assert_eq!(world.admit(last(DISK, 1, 3), 9), Did::Forwarded(0));
    let shown: Vec<_> =
        world.deliver(0, 9).iter().map(|group| (group.tag.index, group.pages.len())).collect();
    assert_eq!(shown, [(9, 1), (1, 2)]);
    assert_eq!(world.ledger.overflows(), 1);
    world.assert_balance(disk, 2);
}

#[test]
fn a_group_that_was_poisoned_before_an_overflow_is_answered_with_success_as_well() {
    // Its last request may have been among the lost ones: then the device was answered, and uses the number
    // again.
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    for page in 0..=PAGES as u64 {
        assert_eq!(world.admit(part(DISK, 1, page), 0), Did::Nothing);
    }

    world.broker.overflowed(5);

    assert_eq!(world.admit(last(DISK, 1, 3), 7), Did::Answered(response(DISK, 1, Outcome::Success)));
    world.assert_balance(disk, 0);
}

#[test]
fn an_overflow_with_more_half_groups_than_can_be_remembered_leaks_none() {
    let mut world = Wide::new();
    let limits = Limits { half_seen: 64, ..Limits::with_requests(64) };
    let disk = world.attached(DISK, &limits, 0);
    for index in 0..64 {
        assert_eq!(world.admit(part(DISK, index, 1), index.into()), Did::Nothing);
    }

    world.broker.overflowed(100);

    assert_eq!(world.ledger.outstanding(world.queues[0]), 0);
    assert_eq!(world.ledger.outstanding_requests(disk), 0);
    let tally = Tally { requests: 64, opened: 64, discarded: 64, ..Tally::default() };
    assert_eq!(world.ledger.tally(disk), Some(tally));
    let answered = (0..64).filter(|&index| {
        world.admit(last(DISK, index, 2), 101) == Did::Answered(response(DISK, index, Outcome::Success))
    });
    assert_eq!(answered.count(), POISONED);
    // The others look like groups of one page, which the device gets an answer for like for any other.
    assert_eq!(world.deliver(0, 102).len(), 64 - POISONED);
}

#[test]
fn what_overflowed_is_forgotten_by_age_and_counts_once() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(part(DISK, 1, 1), 0), Did::Nothing);
    world.broker.overflowed(5);

    assert_eq!(world.expire(5 + ASSEMBLY_LIMIT_US + TICK_US), []);

    assert_eq!(world.admit(last(DISK, 1, 1), 2 * ASSEMBLY_LIMIT_US), Did::Forwarded(0));
    let tally = Tally { requests: 2, opened: 2, discarded: 1, ..Tally::default() };
    assert_eq!(world.ledger.tally(disk), Some(tally));
}

#[test]
fn a_group_that_was_answered_does_not_hinder_the_next_one_with_its_number() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    for round in 0..100 {
        let now_us = round * 60_000;
        assert_eq!(world.admit(part(DISK, 1, round), now_us), Did::Nothing);
        assert_eq!(world.expire(now_us), [], "the deadline of the group before is not this one's");
        assert_eq!(world.admit(last(DISK, 1, round + 1_000), now_us), Did::Forwarded(0));
        let group = world.deliver_one(0, now_us);
        assert_eq!(group.pages.len(), 2);

        let told = world.settle(0, group.cookie, Outcome::Success, now_us);

        assert_eq!(told, Ok(Some(response(DISK, 1, Outcome::Success))));
    }
    assert_eq!(world.ledger.tally(disk).map(|tally| (tally.duplicates, tally.succeeded)), Some((0, 100)));
}

/// "iommu/vt-d: Drop stop marker messages"; malformed entries.
#[test]
fn stop_markers_and_malformed_entries_between_its_requests_leave_a_group_as_it_is() {
    let mut machine = Machine::new(Config::full());
    machine.assign(DISK, Features { device_tlb: true, page_requests: true, pasid: true });
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.attach(DISK, Pasid::new(5), &tree);
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    let pasid = Pasid::new(5).expect("20 bits");
    let queue = machine.unit.read64(0xD0) & !0xFFF;
    for request in [part(DISK, 0, 0x10), last(DISK, 9, 0x11)] {
        assert_eq!(machine.unit.page_request(request), Requested::Queued);
    }
    // The second entry becomes one of type 2 (7:0), with the first group's number in 75:67.
    let entry = PhysAddr(queue + 32);
    machine.memory.device_store(entry, 0x0000_0005_0020_0102).expect("inside");
    machine.memory.device_store(PhysAddr(queue + 40), 0x1_1007).expect("inside");
    assert_eq!(machine.unit.stop_marker(DISK, pasid), Requested::Queued);
    assert_eq!(machine.unit.page_request(last(DISK, 0, 0x12)), Requested::Queued);

    let events = machine.pass();

    assert!(matches!(
        events[..],
        [Event::PageRequest(_), Event::Malformed { .. }, Event::StopMarker { .. }, Event::PageRequest(_)]
    ));
    let mut did = Vec::new();
    for event in events {
        if let Event::PageRequest(request) = event {
            did.push(world.admit(request, 0));
        }
    }
    assert_eq!(did, [Did::Nothing, Did::Forwarded(0)]);
    let pages: Vec<_> = world.deliver_one(0, 0).pages.iter().map(|page| page.iova().0).collect();
    assert_eq!(pages, [0x1_0000, 0x1_2000]);
    world.assert_balance(disk, 1);
}

#[test]
fn a_group_with_a_part_that_nobody_can_read_is_refused_when_it_ends() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    let tag = part(DISK, 1, 0).tag;
    assert_eq!(world.admit(part(DISK, 1, 0x10), 0), Did::Nothing);
    assert_eq!(world.admit(part(DISK, 2, 0x20), 0), Did::Nothing);

    world.broker.malformed(DISK, tag, 1);
    // Of a group that nobody knows, or of another device, it says nothing.
    world.broker.malformed(DISK, part(DISK, 7, 0).tag, 1);
    world.broker.malformed(NIC, part(NIC, 2, 0).tag, 1);

    assert_eq!(world.admit(last(DISK, 1, 0x11), 2), refused(DISK, 1));
    assert_eq!(world.admit(last(DISK, 2, 0x21), 2), Did::Forwarded(0));
    assert_eq!(world.deliver_one(0, 2).pages.len(), 2);
    let tally = world.ledger.tally(disk).expect("it is there");
    assert_eq!((tally.poisoned, tally.refused, tally.opened), (1, 1, 2));
    world.assert_balance(disk, 1);
}
