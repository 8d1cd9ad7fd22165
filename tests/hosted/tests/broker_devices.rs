//! What a device is held to: deadlines, escalation, budgets, answers that are held back; and what is counted.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use broker::{
    BUCKETS, DEADLINE_MAX_US, DeviceId, Error, Escalation, FaultLimits, Limits, POISONED, Refusal, Restraint,
    TICK_US, Tally,
};
use hosted::rig::{Did, Ended, Rig, last, part, response};
use iommu::{Outcome, PageResponse, Pasid, StreamId};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
/// What the devices of a world are attached for.
const PASID: Option<Pasid> = Pasid::new(5);

/// Two guests with a queue of 16 slots each.
type World = Rig<2, 16, { 2 * (16 + POISONED) }>;

const LIMITS: Limits = Limits::with_requests(32);
/// Nobody is restrained.
const MILD: Escalation = Escalation { warn: 0, throttle: 0, requests_off: 0, block: 0 };

fn refused(stream: StreamId, index: u16) -> Did {
    Did::Answered(response(stream, index, Outcome::Invalid))
}

fn responses(ended: Vec<Ended>) -> Vec<PageResponse> {
    let each = ended.into_iter().map(|ended| match ended {
        Ended::Expired { response, .. } | Ended::Held(response) => response,
    });
    each.collect()
}

fn invalid(stream: StreamId, index: u16) -> PageResponse {
    response(stream, index, Outcome::Invalid)
}

// Deadlines.

#[test]
fn each_group_expires_within_a_tick_of_its_own_deadline_and_not_before() {
    let mut world = World::new();
    let disk = world.attached(DISK, &Limits { deadline_us: 500_000, ..LIMITS }, 0);
    let nic = world.attached(NIC, &Limits { deadline_us: 100_000, ..LIMITS }, 1);
    assert_eq!(world.admit(last(DISK, 1, 1), 1_000), Did::Forwarded(0));
    assert_eq!(world.admit(last(NIC, 2, 1), 51_000), Did::Forwarded(1));
    assert_eq!(world.admit(last(NIC, 3, 2), 60_000), Did::Forwarded(1));

    for (due_us, response) in
        [(151_000, invalid(NIC, 2)), (160_000, invalid(NIC, 3)), (501_000, invalid(DISK, 1))]
    {
        assert_eq!(world.expire(due_us - 1), [], "before {due_us}");
        let next_us = world.broker.next_deadline_us().expect("something is left");
        assert!((due_us..due_us + TICK_US).contains(&next_us), "{next_us} for {due_us}");
        assert_eq!(responses(world.expire(next_us)), [response]);
    }

    assert_eq!(world.broker.next_deadline_us(), None);
    let expired = [disk, nic].map(|device| world.ledger.tally(device).map(|tally| tally.expired));
    assert_eq!(expired, [Some(1), Some(2)]);
}

#[test]
fn an_expiry_says_how_late_it_is() {
    let mut world = World::new();
    let _ = world.attached(DISK, &Limits { escalation: MILD, ..LIMITS }, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 7), Did::Forwarded(0));

    let ended = world.expire(7 + 100_000 + 54_321);

    assert_eq!(ended, [Ended::Expired { response: invalid(DISK, 1), late_us: 54_321, restraint: None }]);
}

#[test]
fn an_answer_after_the_expiry_is_late_and_one_before_it_stands() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    assert_eq!(world.admit(last(DISK, 2, 1), 0), Did::Forwarded(0));
    let [first, second] = &world.deliver(0, 0)[..] else { panic!("there are two") };
    let (first, second) = (first.cookie, second.cookie);

    assert!(world.settle(0, first, Outcome::Success, 90_000).is_ok());
    assert_eq!(responses(world.expire(200_000)), [invalid(DISK, 2)]);

    assert_eq!(world.settle(0, second, Outcome::Success, 200_001), Err(Refusal::Late));
    let tally = world.ledger.tally(disk).expect("it is there");
    assert_eq!((tally.succeeded, tally.expired), (1, 1));
    world.assert_balance(disk, 0);
}

#[test]
fn a_deadline_of_zero_refuses_at_once() {
    let mut world = World::new();
    let disk = world.attached(DISK, &Limits { deadline_us: 0, ..LIMITS }, 0);

    assert_eq!(world.admit(last(DISK, 1, 1), 0), refused(DISK, 1));
    assert_eq!(world.admit(part(DISK, 2, 1), 0), Did::Nothing);
    assert_eq!(world.admit(last(DISK, 2, 1), 0), refused(DISK, 2));

    assert_eq!(world.ledger.outstanding(world.queues[0]), 0);
    let tally = Tally { requests: 3, opened: 2, poisoned: 1, refused: 2, ..Tally::default() };
    assert_eq!(world.ledger.tally(disk), Some(tally));
}

#[test]
fn no_deadline_is_longer_than_the_longest() {
    let mut world = World::new();
    let disk = world.attached(DISK, &Limits { deadline_us: u64::MAX, escalation: MILD, ..LIMITS }, 0);
    for round in 0..2 {
        let start_us = round * (1 << 30);
        assert_eq!(world.admit(last(DISK, 1, round), start_us), Did::Forwarded(0));
        assert_eq!(world.expire(start_us + DEADLINE_MAX_US - 1), []);
        assert_eq!(responses(world.expire(start_us + DEADLINE_MAX_US + TICK_US)), [invalid(DISK, 1)]);

        world.ledger.set_deadline(disk, u64::MAX);
    }
}

#[test]
fn a_deadline_that_is_set_holds_for_groups_that_begin_from_then_on() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));

    world.ledger.set_deadline(disk, 20_000);

    assert_eq!(world.admit(last(DISK, 2, 2), 0), Did::Forwarded(0));
    assert_eq!(responses(world.expire(20_000 + TICK_US)), [invalid(DISK, 2)]);
    assert_eq!(responses(world.expire(100_000 + TICK_US)), [invalid(DISK, 1)]);
}

#[test]
fn a_clock_that_jumps_ahead_lets_everything_expire_and_one_that_jumps_back_nothing_early() {
    let mut world = World::new();
    let _ = world.attached(DISK, &Limits { escalation: MILD, ..LIMITS }, 0);
    let start_us = 1 << 50;
    assert_eq!(world.admit(last(DISK, 1, 1), start_us), Did::Forwarded(0));
    assert_eq!(responses(world.expire(1 << 60)), [invalid(DISK, 1)]);

    assert_eq!(world.admit(last(DISK, 2, 2), 1 << 60), Did::Forwarded(0));
    assert_eq!(world.expire(1_000), [], "back");
    assert_eq!(world.expire(1_000 + 90_000), []);
    assert_eq!(responses(world.expire(1_000 + 100_000 + TICK_US)), [invalid(DISK, 2)]);
}

#[test]
fn a_clock_that_jumps_back_while_a_group_is_put_together_takes_no_time_from_its_guest() {
    let mut world = World::new();
    let _ = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(part(DISK, 1, 1), 1 << 40), Did::Nothing);

    assert_eq!(world.admit(last(DISK, 1, 2), 5_000), Did::Forwarded(0));

    assert_eq!(world.expire(5_000 + 99_999), []);
    assert_eq!(responses(world.expire(5_000 + 100_000 + TICK_US)), [invalid(DISK, 1)]);
}

#[test]
fn a_clock_that_wraps_neither_hastens_nor_delays() {
    let mut world = World::new();
    let disk = world.attached(DISK, &Limits { per_second: 1_000_000, burst: 4, ..LIMITS }, 0);
    let start_us = u64::MAX - 50_000;
    assert_eq!(world.admit(last(DISK, 1, 1), start_us), Did::Forwarded(0));
    assert_eq!(world.admit(part(DISK, 2, 1), start_us), Did::Nothing);

    assert_eq!(world.expire(u64::MAX), []);
    assert_eq!(world.expire(49_998), []);
    assert_eq!(responses(world.expire(50_000 + TICK_US)), [invalid(DISK, 1)]);
    assert_eq!(world.admit(last(DISK, 2, 2), 60_000), Did::Forwarded(0));
    let cookie = world.deliver_one(0, 60_000).cookie;
    assert!(world.settle(0, cookie, Outcome::Success, 70_000).is_ok());
    world.assert_balance(disk, 0);
}

#[test]
fn a_pass_that_stops_early_goes_on_where_it_stopped() {
    let mut world = World::new();
    let disk = world.attached(DISK, &Limits { escalation: MILD, ..LIMITS }, 0);
    for index in 0..16 {
        assert_eq!(world.admit(last(DISK, index, index.into()), 0), Did::Forwarded(0));
    }
    let mut expired = 0;
    for _ in 0..8 {
        for _ in 0..2 {
            if let broker::Expiry::Expired { answer, .. } = world.broker.expire(200_000) {
                let _ = hosted::rig::send(answer);
                expired += 1;
            }
        }
        // Between two passes.
        assert_eq!(world.admit(last(DISK, 100 + expired, 1), 200_000), Did::Forwarded(0));
    }

    assert_eq!(expired, 16);
    assert_eq!(world.expire(200_001), []);
    world.assert_balance(disk, 8);
}

// Escalation.

/// Lets groups of a device expire, one after the other, and returns what it is held to in between.
fn expire_each(world: &mut World, device: DeviceId, start_us: u64, groups: u64) -> Vec<Restraint> {
    let each = (0..groups).map(|n| {
        let now_us = start_us + n * 200_000;
        assert_eq!(world.admit(last(DISK, n as u16, n), now_us), Did::Forwarded(0));
        assert_eq!(world.expire(now_us + 150_000).len(), 1);
        world.ledger.restraint(device)
    });
    each.collect()
}

#[test]
fn repeated_expiry_escalates_by_the_device_s_policy_and_says_so_once_for_each_step() {
    let mut world = World::new();
    let escalation = Escalation { warn: 2, throttle: 3, requests_off: 5, block: 6 };
    let disk = world.attached(DISK, &Limits { escalation, ..LIMITS }, 0);
    let nic = world.attached(NIC, &LIMITS, 1);
    for index in 0..6 {
        assert_eq!(world.admit(last(DISK, index, index.into()), 0), Did::Forwarded(0));
    }

    let said: Vec<_> = world
        .expire(150_000)
        .into_iter()
        .map(|ended| match ended {
            Ended::Expired { restraint, .. } => restraint,
            Ended::Held(_) => panic!("none was held"),
        })
        .collect();

    let [warned, throttled, off, blocked] =
        [Restraint::Warned, Restraint::Throttled, Restraint::RequestsOff, Restraint::Blocked].map(Some);
    assert_eq!(said, [None, warned, throttled, None, off, blocked]);
    assert_eq!(world.ledger.restraint(nic), Restraint::None);
    assert_eq!(world.admit(last(DISK, 9, 1), 160_000), refused(DISK, 9), "at once");
    assert_eq!(world.admit(last(NIC, 9, 1), 160_000), Did::Forwarded(1));
    world.assert_balance(disk, 0);
}

#[test]
fn the_usual_escalation_leaves_a_guest_fifteen_expiries() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);

    let steps = expire_each(&mut world, disk, 0, 16);

    assert_eq!(steps[0], Restraint::Warned);
    assert_eq!((steps[2], steps[3]), (Restraint::Warned, Restraint::Throttled));
    assert_eq!((steps[14], steps[15]), (Restraint::Throttled, Restraint::RequestsOff));
}

#[test]
fn a_device_that_is_throttled_may_have_one_group_of_several_pages_at_a_time() {
    let mut world = World::new();
    let escalation = Escalation { throttle: 1, ..MILD };
    let disk = world.attached(DISK, &Limits { escalation, ..LIMITS }, 0);
    assert_eq!(expire_each(&mut world, disk, 0, 1), [Restraint::Throttled]);

    assert_eq!(world.admit(part(DISK, 1, 1), 300_000), Did::Nothing);
    assert_eq!(world.admit(last(DISK, 2, 1), 300_000), refused(DISK, 2));
    assert_eq!(world.admit(last(DISK, 1, 2), 300_000), Did::Forwarded(0));

    let cookie = world.deliver_one(0, 300_000).cookie;
    assert!(world.settle(0, cookie, Outcome::Success, 300_001).is_ok());
    assert_eq!(world.ledger.restraint(disk), Restraint::None, "an answer in time lifts it");
    assert_eq!(world.admit(last(DISK, 2, 1), 300_002), Did::Forwarded(0));
    assert_eq!(world.admit(last(DISK, 3, 1), 300_002), Did::Forwarded(0));
}

#[test]
fn an_answer_in_time_lets_the_count_of_expiries_begin_anew() {
    let mut world = World::new();
    let escalation = Escalation { requests_off: 3, ..MILD };
    let disk = world.attached(DISK, &Limits { escalation, ..LIMITS }, 0);
    for round in 0..5 {
        let start_us = round * 1_000_000;
        assert_eq!(expire_each(&mut world, disk, start_us, 2), [Restraint::None; 2]);
        assert_eq!(world.admit(last(DISK, 9, 1_000 + round), start_us + 500_000), Did::Forwarded(0));
        let cookie = world.deliver_one(0, start_us + 500_000).cookie;
        assert!(world.settle(0, cookie, Outcome::Invalid, start_us + 500_001).is_ok());
    }
    assert_eq!(expire_each(&mut world, disk, 1 << 40, 3)[2], Restraint::RequestsOff);
}

#[test]
fn only_a_reset_gives_page_requests_back() {
    let mut world = World::new();
    let escalation = Escalation { requests_off: 1, ..MILD };
    let disk = world.attached(DISK, &Limits { escalation, ..LIMITS }, 0);
    assert_eq!(expire_each(&mut world, disk, 0, 1), [Restraint::RequestsOff]);
    assert_eq!(world.admit(last(DISK, 1, 1), 1 << 40), refused(DISK, 1), "time does not");

    world.ledger.quiesce_device(disk);
    world.broker.discard_leaving();
    world.ledger.resume_device(disk);

    assert_eq!(world.admit(last(DISK, 1, 1), 1 << 40), Did::Forwarded(0));
}

// Faults.

/// What the device is held to by each of `faults` faults at `now_us`.
fn faults(world: &World, stream: StreamId, faults: usize, now_us: u64) -> Vec<Restraint> {
    (0..faults).filter_map(|_| world.ledger.faulted(stream, PASID, now_us)?.restraint).collect()
}

#[test]
fn too_many_faults_block_a_device_and_its_requests_are_refused_until_it_is_reset() {
    let mut world = World::new();
    let limits = FaultLimits { period_us: 1_000, warn: 2, block: 5 };
    let disk = world.attached(DISK, &Limits { faults: limits, escalation: MILD, ..LIMITS }, 0);
    let nic = world.attached(NIC, &Limits { faults: limits, ..LIMITS }, 1);
    assert_eq!(faults(&world, NIC, 1, 0), []);

    assert_eq!(faults(&world, DISK, 4, 0), [Restraint::Warned]);
    assert_eq!(world.admit(last(DISK, 1, 1), 10), Did::Forwarded(0), "a warning refuses nothing");
    assert_eq!(faults(&world, DISK, 10, 0), [Restraint::Blocked]);
    assert_eq!(world.ledger.restraint(disk), Restraint::Blocked);
    assert_eq!(world.admit(last(DISK, 2, 1), 10), refused(DISK, 2));
    assert_eq!(world.admit(last(NIC, 2, 1), 10), Did::Forwarded(1), "another's faults are another's");
    assert_eq!(world.ledger.restraint(nic), Restraint::None);
    let counted = [disk, nic].map(|device| world.ledger.tally(device).map(|tally| tally.faults));
    assert_eq!(counted, [Some(14), Some(1)]);

    world.ledger.quiesce_device(disk);
    world.broker.discard_leaving();
    world.ledger.resume_device(disk);
    assert_eq!(world.ledger.restraint(disk), Restraint::None);
    assert_eq!(world.admit(last(DISK, 3, 1), 20), Did::Forwarded(0));
    assert_eq!(faults(&world, DISK, 10, 0), [Restraint::Warned, Restraint::Blocked], "it begins anew");
}

#[test]
fn an_answer_in_time_lifts_the_warning_about_faults_and_does_not_have_it_told_again() {
    let mut world = World::new();
    let limits = FaultLimits { period_us: 1_000, warn: 2, block: 50 };
    let disk = world.attached(DISK, &Limits { faults: limits, ..LIMITS }, 0);
    assert_eq!(faults(&world, DISK, 2, 0), [Restraint::Warned]);
    assert_eq!(world.admit(last(DISK, 1, 1), 10), Did::Forwarded(0));
    let cookie = world.deliver_one(0, 20).cookie;
    assert!(world.settle(0, cookie, Outcome::Success, 30).is_ok());
    assert_eq!(world.ledger.restraint(disk), Restraint::None);

    for round in 1..100 {
        assert_eq!(faults(&world, DISK, 49, round * 1_000), []);
    }
    assert_eq!(faults(&world, DISK, 1, 99_999), [Restraint::Blocked]);
}

#[test]
fn a_harder_restraint_than_a_warning_is_not_softened_by_one() {
    let mut world = World::new();
    let limits = FaultLimits { period_us: 1_000, warn: 1, block: 0 };
    let escalation = Escalation { requests_off: 1, ..MILD };
    let disk = world.attached(DISK, &Limits { faults: limits, escalation, ..LIMITS }, 0);
    assert_eq!(expire_each(&mut world, disk, 0, 1), [Restraint::RequestsOff]);

    assert_eq!(faults(&world, DISK, 100, 0), [Restraint::Warned], "it is told all the same");
    assert_eq!(world.ledger.restraint(disk), Restraint::RequestsOff);
}

#[test]
fn a_fault_of_no_attachment_counts_against_its_device_and_one_of_no_device_against_none() {
    let world = World::new();
    let limits = FaultLimits { period_us: 1_000, warn: 0, block: 3 };
    let disk = world.attached(DISK, &Limits { faults: limits, ..LIMITS }, 0);

    assert_eq!(world.ledger.faulted(DISK, None, 0), None, "those without PASID are nobody's");
    assert_eq!(world.ledger.device_faulted(DISK, 0), Ok(None));
    assert_eq!(world.ledger.faulted(DISK, PASID, 0).map(|faulted| faulted.restraint), Some(None));
    assert_eq!(
        world.ledger.device_faulted(DISK, 0),
        Ok(Some(Restraint::Blocked)),
        "they are counted together"
    );
    assert_eq!(world.ledger.tally(disk).map(|tally| tally.faults), Some(3));
    assert_eq!(world.ledger.device_faulted(NIC, 0), Err(Error::Gone));
}

#[test]
fn faults_of_a_device_that_was_removed_are_nobody_s() {
    let world = World::new();
    let limits = FaultLimits { period_us: 1_000, warn: 0, block: 1 };
    let disk = world.attached(DISK, &Limits { faults: limits, ..LIMITS }, 0);
    world.ledger.remove_device(disk);
    let next = world.ledger.add_device(NIC, &Limits { faults: limits, ..LIMITS }).expect("there is room");

    assert_eq!(world.ledger.device_faulted(DISK, 0), Err(Error::Gone));
    // The attachment is there until it leaves; its device is gone, whoever has the place now.
    let faulted = world.ledger.faulted(DISK, PASID, 0).expect("it is attached");
    assert_eq!(faulted.restraint, None);
    assert_eq!(world.ledger.restraint(next), Restraint::None);
    assert_eq!(world.ledger.tally(next).map(|tally| tally.faults), Some(0));
}

// Budgets.

#[test]
fn a_device_may_have_as_many_requests_outstanding_as_it_was_allowed() {
    let mut world = World::new();
    let disk = world.attached(DISK, &Limits::with_requests(4), 0);
    assert_eq!(world.admit(last(DISK, 0, 1), 0), Did::Forwarded(0));
    assert_eq!(world.admit(part(DISK, 1, 2), 0), Did::Nothing);
    assert_eq!(world.admit(part(DISK, 1, 3), 0), Did::Nothing);
    assert_eq!(world.admit(last(DISK, 1, 4), 0), Did::Forwarded(0));

    assert_eq!(world.admit(last(DISK, 2, 5), 0), refused(DISK, 2), "over its budget it is answered");

    assert_eq!(world.ledger.outstanding_requests(disk), 4);
    let second = world.deliver(0, 0)[1].cookie;
    assert!(world.settle(0, second, Outcome::Success, 0).is_ok());
    assert_eq!(world.ledger.outstanding_requests(disk), 1, "a group's pages are all given back");
    world.assert_balance(disk, 1);
}

#[test]
fn a_storm_of_one_device_does_not_touch_another_guest_s() {
    let mut world = World::new();
    let disk = world.attached(DISK, &Limits::with_requests(64), 0);
    let nic = world.attached(NIC, &LIMITS, 1);
    for index in 0..10_000 {
        let _ = world.admit(part(DISK, index % 512, 1), 0);
        let _ = world.admit(last(DISK, index % 300, 2), 0);
        if index % 100 == 0 {
            assert_eq!(world.admit(last(NIC, 1, index.into()), 0), Did::Forwarded(1));
            let cookie = world.deliver_one(1, 0).cookie;
            assert!(world.settle(1, cookie, Outcome::Success, 0).is_ok());
        }
    }
    let tally = world.ledger.tally(nic).expect("it is there");
    assert_eq!((tally.opened, tally.succeeded), (100, 100));
    assert!(world.ledger.outstanding_requests(disk) <= 64);
}

#[test]
fn a_device_over_its_rate_is_answered_at_once_and_has_it_again_later() {
    let mut world = World::new();
    let disk = world.attached(DISK, &Limits { per_second: 1_000, burst: 2, ..LIMITS }, 0);
    let nic = world.attached(NIC, &LIMITS, 1);
    let ask = |world: &mut World, index, now_us| world.admit(last(DISK, index, index.into()), now_us);

    assert_eq!(ask(&mut world, 0, 5_000), Did::Forwarded(0));
    assert_eq!(ask(&mut world, 1, 5_000), Did::Forwarded(0), "a burst of two");
    assert_eq!(ask(&mut world, 2, 5_000), refused(DISK, 2));
    assert_eq!(ask(&mut world, 2, 5_900), refused(DISK, 2));
    assert_eq!(world.admit(last(NIC, 1, 1), 5_900), Did::Forwarded(1), "another device has its own");
    assert_eq!(ask(&mut world, 2, 6_000), Did::Forwarded(0), "one each millisecond");
    assert_eq!(ask(&mut world, 3, 6_001), refused(DISK, 3));

    world.assert_balance(disk, 3);
    world.assert_balance(nic, 1);
}

#[test]
fn the_devices_requests_and_their_stop_markers_fit_the_hardware_s_queue() {
    let world = World::with_entries(128);
    let limits = Limits::with_requests(32);
    let disk = world.ledger.add_device(DISK, &limits).expect("half of it");
    let _ = world.ledger.add_device(NIC, &limits).expect("the other half");

    assert_eq!(world.ledger.add_device(StreamId(1), &Limits::with_requests(1)), Err(Error::NoRoomForDevice));
    assert_eq!(
        world.ledger.add_device(StreamId(1), &Limits::with_requests(u32::MAX)),
        Err(Error::NoRoomForDevice)
    );
    world.ledger.remove_device(disk);
    world.ledger.remove_device(disk);
    assert!(world.ledger.add_device(StreamId(1), &limits).is_ok());
    assert_eq!(world.ledger.add_device(DISK, &Limits::with_requests(1)), Err(Error::NoRoomForDevice));
}

#[test]
fn a_device_is_added_once() {
    let world = World::new();
    let _ = world.add(DISK, &LIMITS);

    assert_eq!(world.ledger.add_device(DISK, &LIMITS), Err(Error::NoRoomForDevice));

    assert!(world.ledger.add_device(NIC, &LIMITS).is_ok());
}

// Success without repair.

/// A device asks for the same page, its guest says at once that it is there; returns after how long hardware
/// hears it.
fn claim(world: &mut World, page: u64, now_us: u64) -> u64 {
    assert_eq!(world.admit(last(DISK, 1, page), now_us), Did::Forwarded(0));
    let cookie = world.deliver_one(0, now_us).cookie;
    if world.settle(0, cookie, Outcome::Success, now_us).expect("it is outstanding").is_some() {
        return 0;
    }
    assert_eq!(world.settle(0, cookie, Outcome::Success, now_us), Err(Refusal::Late), "once");
    for tick in 0.. {
        let held = world.expire(now_us + tick * TICK_US);
        if !held.is_empty() {
            assert_eq!(held, [Ended::Held(response(DISK, 1, Outcome::Success))]);
            return tick * TICK_US;
        }
    }
    0
}

#[test]
fn a_guest_that_answers_success_without_repairing_is_slowed_down_and_its_device_is_not_failed() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);

    let delays: Vec<_> = (0..12).map(|round| claim(&mut world, 7, round * 1_000_000)).collect();

    assert_eq!(delays[..2], [0, 0], "once may be chance");
    assert!(delays.windows(2).all(|pair| pair[0] <= pair[1] + TICK_US), "{delays:?}");
    assert!(delays[3] > 0 && delays[6] > delays[3], "{delays:?}");
    assert!(*delays.last().expect("there are twelve") <= LIMITS.deadline_us + TICK_US, "{delays:?}");
    assert_eq!(world.ledger.restraint(disk), Restraint::None);
    let tally = world.ledger.tally(disk).expect("it is there");
    assert_eq!((tally.succeeded, tally.expired, tally.unrepaired), (12, 0, 11));
    assert_eq!(tally.held, delays.iter().filter(|&&delay| delay > 0).count() as u64);
    world.assert_balance(disk, 0);
}

#[test]
fn a_guest_that_repairs_what_it_says_is_never_held_back() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);

    assert!((0..200).all(|page| claim(&mut world, page, page * 1_000) == 0));

    assert_eq!(world.ledger.tally(disk).map(|tally| (tally.held, tally.unrepaired)), Some((0, 0)));
}

#[test]
fn a_guest_that_begins_to_repair_is_believed_again() {
    let mut world = World::new();
    let _ = world.attached(DISK, &LIMITS, 0);
    for round in 0..8 {
        let _ = claim(&mut world, 7, round * 1_000_000);
    }
    assert!(claim(&mut world, 7, 9_000_000) > 0);

    let delays: Vec<_> = (0..20).map(|n| claim(&mut world, 100 + n, (10 + n) * 1_000_000)).collect();

    assert_eq!(delays.last(), Some(&0), "{delays:?}");
}

#[test]
fn an_answer_of_invalid_is_never_held_back() {
    let mut world = World::new();
    let _ = world.attached(DISK, &LIMITS, 0);
    for round in 0..8 {
        let _ = claim(&mut world, 7, round * 1_000_000);
    }
    assert_eq!(world.admit(last(DISK, 1, 7), 9_000_000), Did::Forwarded(0));
    let cookie = world.deliver_one(0, 9_000_000).cookie;

    let sent = world.settle(0, cookie, Outcome::Invalid, 9_000_000);

    assert_eq!(sent, Ok(Some(invalid(DISK, 1))));
}

#[test]
fn a_guest_whose_answers_are_held_back_still_has_its_deadline_whatever_the_clock_does() {
    for jump in [false, true] {
        let mut world = World::new();
        let _ = world.attached(DISK, &Limits { escalation: MILD, ..LIMITS }, 0);
        for round in 0..5 {
            let _ = claim(&mut world, 7, round * 1_000_000);
        }
        let asked_us = 10_000_000;
        assert_eq!(world.admit(last(DISK, 1, 7), asked_us), Did::Forwarded(0));
        let now_us = if jump { 1_000 } else { asked_us };

        // The time until which an answer would be held goes by, and the guest is silent.
        for tick in 0..90 {
            assert_eq!(world.expire(now_us + tick * TICK_US), [], "tick {tick}");
        }

        let limit_us = now_us + 2 * LIMITS.deadline_us + 2 * TICK_US;
        assert_eq!(responses(world.expire(limit_us)), [invalid(DISK, 1)]);
    }
}

// Counts.

#[test]
fn every_group_is_in_the_histograms_once_by_powers_of_two_of_a_microsecond() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    // Reported at 0, read at 3, answered at 100; one is read and expires at 150000; one expires unread.
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    let cookie = world.deliver_one(0, 3).cookie;
    assert!(world.settle(0, cookie, Outcome::Success, 100).is_ok());
    assert_eq!(world.admit(last(DISK, 2, 2), 0), Did::Forwarded(0));
    assert_eq!(world.deliver(0, 0).len(), 1);
    assert_eq!(world.admit(last(DISK, 3, 3), 0), Did::Forwarded(0));
    assert_eq!(world.expire(150_000).len(), 2);

    let latencies = world.ledger.latencies(disk).expect("it is there");

    let mut delivery = [0; BUCKETS];
    // 0 is below 1; 3 is in 2..4.
    (delivery[0], delivery[2]) = (1, 1);
    assert_eq!(latencies.delivery, delivery);
    let mut answer = [0; BUCKETS];
    // 100 is in 64..128, 150000 in 131072..262144.
    (answer[7], answer[18]) = (1, 2);
    assert_eq!(latencies.answer, answer);
}

#[test]
fn the_counts_of_a_device_are_its_own_and_begin_at_zero() {
    let mut world = World::new();
    let disk = world.attached(DISK, &LIMITS, 0);
    assert_eq!(world.admit(last(DISK, 1, 1), 0), Did::Forwarded(0));
    assert_eq!(world.expire(1 << 20).len(), 1);
    assert_eq!(world.ledger.tally(disk).map(|tally| tally.expired), Some(1));
    let nic = world.attached(NIC, &LIMITS, 0);
    assert_eq!(world.ledger.tally(nic), Some(Tally::default()));

    world.ledger.remove_device(disk);
    let again = world.add(DISK, &LIMITS);

    assert_eq!(world.ledger.tally(again), Some(Tally::default()));
    assert_eq!(world.ledger.latencies(again), Some(broker::Latencies::default()));
}

#[test]
fn an_answer_is_held_back_for_its_time_after_the_report_and_no_longer() {
    let start_us = 1 << 40;
    let settled = |after_us: u64| {
        let mut world = World::new();
        let _ = world.attached(DISK, &LIMITS, 0);
        let settle_after = |world: &mut World, after_us| {
            assert_eq!(world.admit(last(DISK, 1, 1), start_us), Did::Forwarded(0));
            let cookie = world.deliver_one(0, start_us).cookie;
            world.settle(0, cookie, Outcome::Success, start_us + after_us).expect("it waits")
        };
        // Twice it claims to have repaired a page that it is asked for again.
        for _ in 0..2 {
            assert_eq!(settle_after(&mut world, 1), Some(response(DISK, 1, Outcome::Success)));
        }
        settle_after(&mut world, after_us)
    };

    assert_eq!(settled(999), None, "less than a millisecond");
    assert_eq!(settled(1_000), Some(response(DISK, 1, Outcome::Success)));
}
