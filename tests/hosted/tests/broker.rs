//! The broker, one scenario at a time: budgets, deadlines, overflow, departure, races.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use broker::{
    ASSEMBLY_LIMIT_US, Answer, AttachmentId, Attachments, Broker, Cookie, PAGES, Policy, Queue, Refusal,
    Tally, Verdict,
};
use iommu::{GroupTag, Iova, Outcome, PageRequest, PageResponse, Pasid, Perms, StreamId};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);

/// A guest's queue of eight slots; and the other guest's, whose cookies start far away.
fn queues() -> [Queue<8>; 2] {
    [Queue::new(1), Queue::new(1 << 40)]
}

/// PASID 5 of `stream`, owned by guest `queue`: 4 groups, 100 microseconds.
fn policy(stream: StreamId, queue: u8) -> Policy {
    let device = stream.0 + u32::from(queue);
    Policy { stream, pasid: Pasid::new(5), queue, budget: 4, device, opaque: 0xFEED, deadline_us: 100 }
}

fn part(stream: StreamId, index: u16, page: u64) -> PageRequest {
    let (pasid, iova) = (Pasid::new(5), Iova(page << 12));
    PageRequest { stream, tag: GroupTag { pasid, index }, iova, perms: Perms::READ_WRITE, last: false }
}

fn last(stream: StreamId, index: u16, page: u64) -> PageRequest {
    PageRequest { last: true, ..part(stream, index, page) }
}

fn response(stream: StreamId, index: u16, outcome: Outcome) -> PageResponse {
    PageResponse { stream, tag: GroupTag { pasid: Pasid::new(5), index }, outcome }
}

/// Sends `answer` and returns what was sent.
fn send<const S: usize>(answer: Answer<'_, S>) -> PageResponse {
    let mut sent = None;
    let result = answer.send(|response| {
        sent = Some(response);
        Ok::<(), (PageResponse, ())>(())
    });
    assert!(result.is_ok());
    sent.expect("`send` hands over the response")
}

/// Returns the slot of a group that was just forwarded to `queue`.
fn forwarded(verdict: Verdict, queue: u8) -> u8 {
    match verdict {
        Verdict::Forward { queue: to, slot } if to == queue => slot,
        other => panic!("not forwarded to queue {queue}: {other:?}"),
    }
}

fn add<const A: usize>(attachments: &Attachments<A>, policy: Policy) -> AttachmentId {
    attachments.add(policy).expect("there is room")
}

/// Every group that was opened is answered, waits, or was discarded; none twice.
fn assert_balance(tally: Tally, waiting: u64) {
    assert_eq!(tally.opened, tally.answered() + tally.discarded + waiting, "{tally:?}");
}

#[test]
fn a_whole_group_reaches_its_guest_and_its_answer_the_device() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let _ = add(&attachments, policy(DISK, 1));
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);

    assert_eq!(broker.admit(part(DISK, 3, 0x10), 0), Verdict::Nothing);
    assert_eq!(broker.admit(part(DISK, 3, 0x13), 1), Verdict::Nothing);
    let write_only = Perms { write: true, ..Perms::default() };
    let slot = forwarded(broker.admit(PageRequest { perms: write_only, ..last(DISK, 3, 0x11) }, 2), 1);

    let group = queues[1].deliver(slot).expect("it waits");
    assert_eq!((group.device, group.opaque), (0x21, 0xFEED));
    assert_eq!(group.tag, GroupTag { pasid: Pasid::new(5), index: 3 });
    let pages: Vec<_> = group.pages.iter().map(|p| (p.iova().0, p.perms())).collect();
    let both = Perms::READ_WRITE;
    assert_eq!(pages, [(0x1_0000, both), (0x1_3000, both), (0x1_1000, write_only)]);
    assert_eq!(queues[1].deliver(slot), None, "only once");
    let answer = queues[1].settle(group.cookie, Outcome::Success).expect("it is outstanding");
    assert_eq!(send(answer), response(DISK, 3, Outcome::Success));
    assert_eq!(queues[1].outstanding(), 0);
    assert_eq!(queues[1].counters().tally(), Tally { opened: 1, succeeded: 1, ..Tally::default() });
    assert_eq!(queues[0].counters().tally(), Tally::default());
}

#[test]
fn every_permission_and_every_pasid_survives_the_way_to_the_guest() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
    for (index, pasid) in (0..).zip([None, Pasid::new(0), Pasid::new(Pasid::MAX)]) {
        let attached = add(&attachments, Policy { pasid, budget: 32, ..policy(DISK, 0) });
        for bits in 0..16 {
            let bit = |n: u32| bits >> n & 1 != 0;
            let perms = Perms { read: bit(0), write: bit(1), execute: bit(2), privileged: bit(3) };
            let tag = GroupTag { pasid, index };
            let iova = Iova(0xFFFF_FFFF_FFFF_F000);
            let request = PageRequest { stream: DISK, tag, iova, perms, last: true };

            let slot = forwarded(broker.admit(request, 0), 0);

            let group = queues[0].deliver(slot).expect("it waits");
            assert_eq!(group.tag, tag);
            assert_eq!(
                group.pages.iter().map(|p| (p.iova(), p.perms())).collect::<Vec<_>>(),
                [(iova, perms)]
            );
            let sent = send(queues[0].settle(group.cookie, Outcome::Success).expect("outstanding"));
            assert_eq!((sent.stream, sent.tag), (DISK, tag));
        }
        attachments.leave(attached);
        attachments.remove(attached);
    }
}

#[test]
fn groups_that_arrive_interleaved_do_not_mix() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let _ = add(&attachments, policy(DISK, 0));
    let _ = add(&attachments, Policy { pasid: Pasid::new(6), ..policy(DISK, 0) });
    let _ = add(&attachments, policy(NIC, 0));
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
    // One device and two indices; the same index with another PASID; the same index and PASID of another device.
    let six = GroupTag { pasid: Pasid::new(6), index: 1 };
    let kinds = [part(DISK, 1, 0x10), part(DISK, 2, 0x20), PageRequest { tag: six, ..part(DISK, 1, 0x30) }];
    let kinds = [kinds[0], kinds[1], kinds[2], part(NIC, 1, 0x40)];

    for request in kinds {
        assert_eq!(broker.admit(request, 0), Verdict::Nothing);
    }
    let slots = kinds.map(|request| {
        let iova = Iova(request.iova.0 + 0x1000);
        forwarded(broker.admit(PageRequest { iova, last: true, ..request }, 0), 0)
    });

    for (request, slot) in kinds.iter().zip(slots) {
        let group = queues[0].deliver(slot).expect("it waits");
        let pages: Vec<_> = group.pages.iter().map(|p| p.iova().0).collect();
        assert_eq!((group.tag, pages), (request.tag, vec![request.iova.0, request.iova.0 + 0x1000]));
    }
}

#[test]
fn one_group_over_the_budget_is_refused_and_an_answer_makes_room() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let _ = add(&attachments, Policy { budget: 2, ..policy(DISK, 0) });
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);

    let first = forwarded(broker.admit(last(DISK, 0, 1), 0), 0);
    assert_eq!(broker.admit(part(DISK, 1, 2), 0), Verdict::Nothing, "a half group counts as well");
    assert_eq!(
        broker.admit(last(DISK, 2, 3), 0),
        Verdict::Answer(response(DISK, 2, Outcome::Invalid)),
        "the third is one too many"
    );
    // A group of several pages over the budget is answered when its last request comes, and once.
    assert_eq!(broker.admit(part(DISK, 3, 4), 0), Verdict::Nothing);
    assert_eq!(broker.admit(part(DISK, 3, 5), 0), Verdict::Nothing);
    assert_eq!(broker.admit(last(DISK, 3, 6), 0), Verdict::Answer(response(DISK, 3, Outcome::Invalid)));

    let cookie = queues[0].deliver(first).expect("it waits").cookie;
    let _ = send(queues[0].settle(cookie, Outcome::Success).expect("outstanding"));
    let _ = forwarded(broker.admit(last(DISK, 2, 3), 0), 0);

    let tally = queues[0].counters().tally();
    assert_eq!(tally, Tally { opened: 5, succeeded: 1, refused: 2, ..Tally::default() });
    assert_balance(tally, 2);
}

#[test]
fn a_budget_is_of_one_attachment_and_not_shared_with_others_of_its_device() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let six = |request: PageRequest| {
        let tag = GroupTag { pasid: Pasid::new(6), ..request.tag };
        PageRequest { tag, ..request }
    };
    let _ = add(&attachments, Policy { budget: 1, ..policy(DISK, 0) });
    let other = add(&attachments, Policy { budget: 1, pasid: Pasid::new(6), ..policy(DISK, 0) });
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);

    let _ = forwarded(broker.admit(last(DISK, 0, 1), 0), 0);
    let _ = forwarded(broker.admit(six(last(DISK, 0, 1)), 0), 0);
    assert!(matches!(broker.admit(six(last(DISK, 1, 1)), 0), Verdict::Answer(_)));

    // The same while one is half-seen, and its PASID belongs to another guest.
    attachments.leave(other);
    broker.discard_leaving();
    let _ = send(queues[0].evict(DISK, Pasid::new(6)).expect("one waits"));
    let _ = send(queues[0].evict(DISK, Pasid::new(5)).expect("one waits"));
    attachments.remove(other);
    let _ = add(&attachments, Policy { budget: 1, pasid: Pasid::new(6), ..policy(DISK, 1) });
    assert_eq!(broker.admit(part(DISK, 0, 1), 0), Verdict::Nothing);
    let _ = forwarded(broker.admit(six(last(DISK, 0, 1)), 0), 1);
}

#[test]
fn a_full_queue_refuses_at_once() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let _ = add(&attachments, Policy { budget: 255, ..policy(DISK, 0) });
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
    for index in 0..8 {
        let _ = forwarded(broker.admit(last(DISK, index, 1), 0), 0);
    }

    assert_eq!(broker.admit(last(DISK, 8, 1), 0), Verdict::Answer(response(DISK, 8, Outcome::Invalid)));

    assert_eq!((queues[0].outstanding(), queues[0].counters().tally().refused), (8, 1));
}

#[test]
fn a_request_that_nobody_owns_is_answered_only_if_it_ends_its_group() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let _ = add(&attachments, policy(NIC, 2));
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);

    // The disk has no attachment; the card has one, to a queue that does not exist.
    for stream in [DISK, NIC] {
        assert_eq!(broker.admit(part(stream, 1, 1), 0), Verdict::Nothing);
        assert_eq!(
            broker.admit(last(stream, 1, 2), 0),
            Verdict::Answer(response(stream, 1, Outcome::Invalid))
        );
    }
}

#[test]
fn a_deadline_of_zero_refuses_at_once() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let _ = add(&attachments, Policy { deadline_us: 0, ..policy(DISK, 0) });
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);

    assert_eq!(broker.admit(last(DISK, 1, 1), 0), Verdict::Answer(response(DISK, 1, Outcome::Invalid)));
    assert_eq!(broker.admit(part(DISK, 2, 1), 0), Verdict::Nothing);
    assert_eq!(broker.admit(last(DISK, 2, 1), 0), Verdict::Answer(response(DISK, 2, Outcome::Invalid)));

    assert_eq!(queues[0].outstanding(), 0);
    let tally = queues[0].counters().tally();
    assert_eq!(tally, Tally { opened: 2, refused: 2, ..Tally::default() });
}

#[test]
fn each_group_expires_at_its_own_deadline_and_not_before() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let six = GroupTag { pasid: Pasid::new(6), index: 3 };
    let _ = add(&attachments, Policy { deadline_us: 500, ..policy(DISK, 0) });
    let _ = add(&attachments, Policy { deadline_us: 100, ..policy(NIC, 1) });
    let _ = add(&attachments, Policy { deadline_us: 10, pasid: six.pasid, ..policy(DISK, 0) });
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
    let expire = |broker: &mut Broker<'_, 2, 8, 4>, now| {
        core::iter::from_fn(|| broker.expire(now)).map(send).collect::<Vec<_>>()
    };
    let _ = forwarded(broker.admit(last(DISK, 1, 1), 1000), 0);
    let _ = forwarded(broker.admit(last(NIC, 2, 1), 1050), 1);
    let _ = forwarded(broker.admit(PageRequest { tag: six, ..last(DISK, 3, 1) }, 1060), 0);

    // Due at 1500, 1150 and 1070: the last came last and is due first.
    for (now, due, next) in [
        (1069, vec![], Some(1070)),
        (1070, vec![PageResponse { stream: DISK, tag: six, outcome: Outcome::Invalid }], Some(1150)),
        (1149, vec![], Some(1150)),
        (1200, vec![response(NIC, 2, Outcome::Invalid)], Some(1500)),
        (1499, vec![], Some(1500)),
        (1500, vec![response(DISK, 1, Outcome::Invalid)], None),
        (u64::MAX, vec![], None),
    ] {
        assert_eq!(expire(&mut broker, now), due, "at {now}");
        assert_eq!(broker.next_deadline_us(), next, "after {now}");
    }
    assert_eq!(queues[0].counters().tally().expired + queues[1].counters().tally().expired, 3);
}

#[test]
fn a_group_that_was_settled_in_time_does_not_expire_nor_does_the_next_in_its_slot() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let _ = add(&attachments, policy(DISK, 0));
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
    let slot = forwarded(broker.admit(last(DISK, 1, 1), 0), 0);
    let cookie = queues[0].deliver(slot).expect("it waits").cookie;
    let _ = send(queues[0].settle(cookie, Outcome::Success).expect("outstanding"));
    assert_eq!(broker.next_deadline_us(), None, "nothing is outstanding");

    // The same index and the same slot, 60 later: the old deadline must not end it.
    assert_eq!(forwarded(broker.admit(last(DISK, 1, 1), 60), 0), slot);
    assert!(broker.expire(100).is_none());
    assert_eq!(broker.next_deadline_us(), Some(160));

    assert_eq!(broker.expire(160).map(send), Some(response(DISK, 1, Outcome::Invalid)));
}

#[test]
fn a_half_group_in_the_slot_of_a_settled_one_does_not_expire_with_it() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let _ = add(&attachments, policy(DISK, 0));
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
    let slot = forwarded(broker.admit(last(DISK, 1, 1), 0), 0);
    let cookie = queues[0].deliver(slot).expect("it waits").cookie;
    let _ = send(queues[0].settle(cookie, Outcome::Success).expect("outstanding"));
    assert_eq!(broker.admit(part(DISK, 1, 1), 10), Verdict::Nothing);

    assert!(broker.expire(100).is_none());

    assert_eq!(forwarded(broker.admit(last(DISK, 1, 2), 110), 0), slot);
    assert_eq!(queues[0].deliver(slot).map(|group| group.pages.len()), Some(2));
}

#[test]
fn a_request_of_a_group_that_is_outstanding_is_dropped_and_counted() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let _ = add(&attachments, policy(DISK, 0));
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
    let slot = forwarded(broker.admit(last(DISK, 1, 0x10), 0), 0);

    assert_eq!(broker.admit(part(DISK, 1, 0x20), 1), Verdict::Nothing);
    let cookie = queues[0].deliver(slot).map(|group| {
        assert_eq!(group.pages.len(), 1);
        group.cookie
    });
    assert_eq!(broker.admit(last(DISK, 1, 0x30), 2), Verdict::Nothing);

    let answer = queues[0].settle(cookie.expect("it waited"), Outcome::Success).expect("outstanding");
    assert_eq!(send(answer), response(DISK, 1, Outcome::Success));
    let tally = queues[0].counters().tally();
    assert_eq!(tally, Tally { opened: 1, succeeded: 1, duplicates: 2, ..Tally::default() });
}

#[test]
fn a_group_has_sixteen_pages_and_a_longer_one_is_refused_whole() {
    for extra in [0, 1, 5] {
        let queues = queues();
        let attachments = Attachments::<4>::new();
        let _ = add(&attachments, policy(DISK, 0));
        let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
        let pages = PAGES as u64 + extra;

        for page in 1..pages {
            assert_eq!(broker.admit(part(DISK, 1, page), 0), Verdict::Nothing);
        }
        let verdict = broker.admit(last(DISK, 1, pages), 0);

        if extra == 0 {
            let group = queues[0].deliver(forwarded(verdict, 0)).expect("it waits");
            assert_eq!(
                group.pages.iter().map(|p| p.iova().0 >> 12).collect::<Vec<_>>(),
                Vec::from_iter(1..=16)
            );
        } else {
            assert_eq!(verdict, Verdict::Answer(response(DISK, 1, Outcome::Invalid)), "{pages} pages");
            assert_eq!(queues[0].outstanding(), 0);
            let tally = queues[0].counters().tally();
            assert_eq!(tally, Tally { opened: 1, refused: 1, ..Tally::default() });
            let _ = forwarded(broker.admit(last(DISK, 1, 1), 0), 0);
        }
    }
}

/// Half-seen groups, and spoilt ones, that each of two guests may have.
const SHARE: u16 = 16;

/// A broker over two queues of 64 slots; in the first, which `body` gets, one device may have them all.
fn with_room<R>(body: impl FnOnce(&Queue<64>, &Attachments<4>, &mut Broker<'_, 2, 64, 4>) -> R) -> R {
    let queues = [1, 1 << 40].map(Queue::<64>::new);
    let attachments = Attachments::new();
    let _ = add(&attachments, Policy { budget: 64, ..policy(DISK, 0) });
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
    body(&queues[0], &attachments, &mut broker)
}

#[test]
fn a_half_group_over_the_share_is_refused_and_the_others_carry_on() {
    with_room(|queue, attachments, broker| {
        let _ = add(attachments, policy(NIC, 1));
        for index in 0..=SHARE {
            assert_eq!(broker.admit(part(DISK, index, 1), 0), Verdict::Nothing);
        }

        // The other guest has room.
        assert_eq!(broker.admit(part(NIC, 0, 1), 0), Verdict::Nothing);
        let _ = forwarded(broker.admit(last(NIC, 0, 2), 0), 1);
        for index in 0..SHARE {
            let group = queue.deliver(forwarded(broker.admit(last(DISK, index, 2), 0), 0)).expect("it waits");
            assert_eq!((group.tag.index, group.pages.len()), (index, 2));
        }
        let refused = Verdict::Answer(response(DISK, SHARE, Outcome::Invalid));
        assert_eq!(broker.admit(last(DISK, SHARE, 2), 0), refused);

        assert_eq!(queue.outstanding(), SHARE.into(), "the one too many holds no slot");
        assert_balance(queue.counters().tally(), SHARE.into());
    });
}

#[test]
fn a_half_group_that_grows_too_old_is_discarded_without_an_answer() {
    with_room(|queue, _, broker| {
        assert_eq!(broker.admit(part(DISK, 1, 1), 500), Verdict::Nothing);
        assert_eq!(broker.next_deadline_us(), Some(500 + ASSEMBLY_LIMIT_US));

        assert!(broker.expire(499 + ASSEMBLY_LIMIT_US).is_none());
        assert_eq!(queue.outstanding(), 1);
        assert!(broker.expire(500 + ASSEMBLY_LIMIT_US).is_none());

        assert_eq!((queue.outstanding(), broker.next_deadline_us()), (0, None));
        let tally = queue.counters().tally();
        assert_eq!(tally, Tally { opened: 1, discarded: 1, ..Tally::default() });
        // Its number is free: what comes now is a group of one page.
        let slot = forwarded(broker.admit(last(DISK, 1, 2), 2 * ASSEMBLY_LIMIT_US), 0);
        assert_eq!(queue.deliver(slot).map(|group| group.pages.len()), Some(1));
    });
}

#[test]
fn a_spoilt_group_is_forgotten_by_age_so_that_its_number_can_be_used_again() {
    with_room(|queue, _, broker| {
        for page in 0..17 {
            assert_eq!(broker.admit(part(DISK, 1, page), 0), Verdict::Nothing);
        }
        assert_eq!(broker.next_deadline_us(), Some(ASSEMBLY_LIMIT_US));

        assert!(broker.expire(ASSEMBLY_LIMIT_US).is_none());

        assert_eq!(broker.next_deadline_us(), None);
        let tally = queue.counters().tally();
        assert_eq!(tally, Tally { opened: 1, discarded: 1, ..Tally::default() });
        let slot = forwarded(broker.admit(last(DISK, 1, 1), ASSEMBLY_LIMIT_US), 0);
        assert!(queue.deliver(slot).is_some());
    });
}

#[test]
fn the_oldest_of_too_many_spoilt_groups_is_forgotten_and_counted() {
    with_room(|queue, attachments, broker| {
        // Budget 0: each is spoilt from its first request.
        let _ = add(attachments, Policy { budget: 0, ..policy(NIC, 0) });
        let _ = add(attachments, Policy { budget: 0, pasid: None, ..policy(NIC, 1) });
        let of_the_other = GroupTag { pasid: None, index: 0 };
        assert_eq!(broker.admit(PageRequest { tag: of_the_other, ..part(NIC, 0, 1) }, 0), Verdict::Nothing);
        for index in 0..=SHARE {
            assert_eq!(broker.admit(part(NIC, index, 1), index.into()), Verdict::Nothing);
        }
        let opened = u64::from(SHARE) + 1;
        assert_eq!(queue.counters().tally(), Tally { opened, discarded: 1, ..Tally::default() });

        for index in 1..=SHARE {
            let refused = Verdict::Answer(response(NIC, index, Outcome::Invalid));
            assert_eq!(broker.admit(last(NIC, index, 2), 20), refused);
        }
        assert_balance(queue.counters().tally(), 0);
        // The other guest's is remembered still: a part of it is no new group.
        assert_eq!(broker.next_deadline_us(), Some(ASSEMBLY_LIMIT_US));
    });
}

#[test]
fn a_device_may_use_a_number_again_as_soon_as_its_answer_is_sent() {
    with_room(|queue, _, broker| {
        let slot = forwarded(broker.admit(last(DISK, 1, 1), 0), 0);
        let cookie = queue.deliver(slot).expect("it waits").cookie;
        let answer = queue.settle(cookie, Outcome::Success).expect("outstanding");

        // The device asks again before whoever sent the answer comes to free the slot.
        let mut again = None;
        let sent = answer.send(|response| {
            again = Some(broker.admit(last(DISK, 1, 2), 1));
            drop(response);
            Ok::<(), (PageResponse, ())>(())
        });

        assert!(sent.is_ok());
        let second = forwarded(again.expect("it was asked"), 0);
        assert_ne!(second, slot, "the slot was not free yet");
        let group = queue.deliver(second).expect("it waits");
        assert_eq!(group.pages[0].iova(), Iova(0x2000));
        let answer = queue.settle(group.cookie, Outcome::Invalid).expect("outstanding");
        assert_eq!(send(answer), response(DISK, 1, Outcome::Invalid));
    });
}

#[test]
fn an_answer_that_could_not_be_sent_is_still_owed_and_keeps_its_slot() {
    with_room(|queue, _, broker| {
        let slot = forwarded(broker.admit(last(DISK, 1, 1), 0), 0);
        let cookie = queue.deliver(slot).expect("it waits").cookie;
        let answer = queue.settle(cookie, Outcome::Success).expect("outstanding");
        assert_eq!(*answer.response(), response(DISK, 1, Outcome::Success));

        let mut seen = 0;
        let Err((answer, "full")) = answer.send(|response| {
            seen = queue.outstanding();
            Err((response, "full"))
        }) else {
            panic!("it was not sent");
        };
        assert_eq!((seen, queue.outstanding()), (1, 1), "the slot is not free before, nor after");
        assert_eq!(queue.settle(cookie, Outcome::Success).err(), Some(Refusal::Late), "won once");
        assert!(queue.evict(DISK, Pasid::new(5)).is_none() && broker.expire(10_000).is_none());

        assert_eq!(send(answer), response(DISK, 1, Outcome::Success));
        assert_eq!(queue.outstanding(), 0);
        assert_balance(queue.counters().tally(), 0);
    });
}

#[test]
fn an_overflow_discards_half_groups_and_answers_their_tails_with_success_once() {
    with_room(|queue, _, broker| {
        let whole = forwarded(broker.admit(last(DISK, 9, 9), 0), 0);
        assert_eq!(broker.admit(part(DISK, 1, 1), 0), Verdict::Nothing);

        broker.overflowed(5);

        assert_eq!(queue.outstanding(), 1, "what was whole waits on");
        assert_eq!(broker.admit(part(DISK, 1, 2), 6), Verdict::Nothing);
        assert_eq!(broker.admit(last(DISK, 1, 3), 7), Verdict::Answer(response(DISK, 1, Outcome::Success)));
        assert_eq!(queue.counters().tally(), Tally { opened: 2, discarded: 1, ..Tally::default() });
        // The device asks again for all of it.
        assert_eq!(broker.admit(part(DISK, 1, 1), 8), Verdict::Nothing);
        let again = forwarded(broker.admit(last(DISK, 1, 3), 9), 0);
        assert_eq!(queue.deliver(again).map(|group| group.pages.len()), Some(2));
        assert_eq!(queue.deliver(whole).map(|group| group.tag.index), Some(9));
        assert_balance(queue.counters().tally(), 2);
    });
}

#[test]
fn a_group_that_was_spoilt_before_an_overflow_is_answered_with_success_as_well() {
    // Its last request may have been among the lost ones: then the device was answered, and uses the number again.
    with_room(|queue, _, broker| {
        for page in 0..17 {
            assert_eq!(broker.admit(part(DISK, 1, page), 0), Verdict::Nothing);
        }

        broker.overflowed(5);

        assert_eq!(broker.admit(last(DISK, 1, 3), 7), Verdict::Answer(response(DISK, 1, Outcome::Success)));
        assert_eq!(queue.counters().tally(), Tally { opened: 1, refused: 1, ..Tally::default() });
    });
}

#[test]
fn what_overflowed_is_forgotten_by_age() {
    with_room(|queue, _, broker| {
        assert_eq!(broker.admit(part(DISK, 1, 1), 0), Verdict::Nothing);
        broker.overflowed(5);
        assert_eq!(broker.next_deadline_us(), Some(5 + ASSEMBLY_LIMIT_US));

        assert!(broker.expire(5 + ASSEMBLY_LIMIT_US).is_none());

        let _ = forwarded(broker.admit(last(DISK, 1, 1), 5 + ASSEMBLY_LIMIT_US), 0);
        let tally = queue.counters().tally();
        assert_eq!(tally, Tally { opened: 2, discarded: 1, ..Tally::default() }, "discarded once");
    });
}

#[test]
fn a_departure_ends_what_was_whole_discards_what_was_half_and_lets_the_place_be_used_again() {
    let queues = queues();
    let attachments = Attachments::<2>::new();
    let disk = add(&attachments, policy(DISK, 0));
    let _ = add(&attachments, policy(NIC, 0));
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
    let delivered = forwarded(broker.admit(last(DISK, 1, 1), 0), 0);
    let cookie = queues[0].deliver(delivered).expect("it waits").cookie;
    let _ = forwarded(broker.admit(last(DISK, 2, 1), 0), 0);
    assert_eq!(broker.admit(part(DISK, 3, 1), 0), Verdict::Nothing);
    let stays = forwarded(broker.admit(last(NIC, 1, 1), 0), 0);
    assert_eq!(broker.admit(part(NIC, 2, 1), 0), Verdict::Nothing);

    attachments.leave(disk);
    // Between leaving and the drain: new groups, and the next part of a half group.
    assert_eq!(broker.admit(last(DISK, 4, 1), 1), Verdict::Answer(response(DISK, 4, Outcome::Invalid)));
    assert_eq!(broker.admit(part(DISK, 5, 1), 1), Verdict::Nothing);
    broker.discard_leaving();
    let mut evicted: Vec<_> =
        core::iter::from_fn(|| queues[0].evict(DISK, Pasid::new(5))).map(send).map(|r| r.tag.index).collect();
    evicted.sort();
    attachments.remove(disk);

    assert_eq!(evicted, [1, 2]);
    assert_eq!(queues[0].settle(cookie, Outcome::Success).err(), Some(Refusal::Late));
    let tally = queues[0].counters().tally();
    assert_eq!(
        tally,
        Tally { opened: 5, evicted: 2, discarded: 1, late: 1, ..Tally::default() },
        "the other device's two are still there"
    );
    assert_balance(tally, 2);
    assert_eq!(queues[0].deliver(stays).map(|group| group.tag.index), Some(1));
    // The half group is gone: the device belongs to the other guest now, and starts anew.
    let _ = add(&attachments, policy(DISK, 1));
    let slot = forwarded(broker.admit(last(DISK, 3, 2), 2), 1);
    assert_eq!(queues[1].deliver(slot).map(|group| group.pages.len()), Some(1));
}

#[test]
fn the_last_request_of_a_half_group_whose_attachment_left_is_answered_as_invalid() {
    for drained in [false, true] {
        let queues = queues();
        let attachments = Attachments::<2>::new();
        let disk = add(&attachments, policy(DISK, 0));
        let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
        assert_eq!(broker.admit(part(DISK, 1, 1), 0), Verdict::Nothing);
        attachments.leave(disk);
        if drained {
            broker.discard_leaving();
        }

        let verdict = broker.admit(last(DISK, 1, 2), 1);

        assert_eq!(verdict, Verdict::Answer(response(DISK, 1, Outcome::Invalid)));
        assert_eq!(queues[0].outstanding(), 0);
        assert_balance(queues[0].counters().tally(), 0);
    }
}

#[test]
fn an_eviction_of_one_pasid_leaves_the_others_of_the_device() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
    for pasid in [None, Pasid::new(5), Pasid::new(6)] {
        let _ = add(&attachments, Policy { pasid, ..policy(DISK, 0) });
        let tag = GroupTag { pasid, index: 1 };
        let _ = forwarded(broker.admit(PageRequest { tag, ..last(DISK, 1, 1) }, 0), 0);
    }

    for pasid in [Pasid::new(6), None, Pasid::new(5)] {
        assert_eq!(queues[0].evict(NIC, pasid).map(send), None);
        assert_eq!(queues[0].evict(DISK, pasid).map(send).map(|r| r.tag.pasid), Some(pasid));
        assert_eq!(queues[0].evict(DISK, pasid).map(send), None);
    }
}

#[test]
fn a_guest_cannot_stop_a_device_with_a_response_failure() {
    with_room(|queue, _, broker| {
        let slot = forwarded(broker.admit(last(DISK, 1, 1), 0), 0);
        let cookie = queue.deliver(slot).expect("it waits").cookie;

        let answer = queue.settle(cookie, Outcome::Failure).expect("outstanding");

        assert_eq!(send(answer), response(DISK, 1, Outcome::Invalid));
        assert_eq!(queue.counters().tally().declined, 1);
    });
}

#[test]
fn a_cookie_that_is_not_outstanding_changes_nothing_and_is_counted_by_kind() {
    let queues = queues();
    let attachments = Attachments::<4>::new();
    let _ = add(&attachments, policy(DISK, 0));
    let _ = add(&attachments, policy(NIC, 1));
    let mut broker = Broker::new([&queues[0], &queues[1]], &attachments);
    let slot = forwarded(broker.admit(last(DISK, 1, 1), 0), 0);
    let first = queues[0].deliver(slot).expect("it waits").cookie;
    let _ = send(queues[0].settle(first, Outcome::Success).expect("outstanding"));
    let try_settle = |cookie| queues[0].settle(cookie, Outcome::Success).err();

    assert_eq!(try_settle(first), Some(Refusal::Late), "answered, and nothing came after it");
    // A cookie is slot (7:0) and generation: the next one in this slot is known in advance, and means nothing yet.
    let next = Cookie(first.0 + 0x100);
    assert_eq!(try_settle(next), Some(Refusal::Unknown), "free");
    assert_eq!(broker.admit(part(DISK, 2, 1), 0), Verdict::Nothing);
    assert_eq!(try_settle(next), Some(Refusal::Unknown), "half-seen");
    assert_eq!(try_settle(first), Some(Refusal::Stale), "the slot has another group");
    assert_eq!(forwarded(broker.admit(last(DISK, 2, 2), 0), 0), slot);
    assert_eq!(try_settle(first), Some(Refusal::Stale));
    let foreign = {
        let slot = forwarded(broker.admit(last(NIC, 1, 1), 0), 1);
        queues[1].deliver(slot).expect("it waits").cookie
    };
    assert_eq!(try_settle(foreign), Some(Refusal::Unknown), "another guest's");
    assert_eq!(try_settle(Cookie(first.0 | 0xFF)), Some(Refusal::OutOfRange));
    assert_eq!(try_settle(Cookie(first.0 & !0xFF | 8)), Some(Refusal::OutOfRange), "one past the last");

    let tally = queues[0].counters().tally();
    let refused = Tally { late: 1, stale: 2, unknown: 3, out_of_range: 2, ..Tally::default() };
    assert_eq!(tally, Tally { opened: 2, succeeded: 1, ..refused });
    assert_eq!(tally.cookies_refused(), 8);
    let group = queues[0].deliver(slot).expect("it waits still");
    assert_eq!(group.cookie, next);
    assert!(queues[1].settle(foreign, Outcome::Success).map(send).is_ok(), "its own guest may");
}

#[test]
fn a_generation_that_wraps_keeps_cookies_apart() {
    let queue = Queue::<1>::new(u64::MAX >> 8);
    let attachments = Attachments::<1>::new();
    let _ = add(&attachments, policy(DISK, 0));
    let mut broker = Broker::new([&queue], &attachments);
    let mut cookies = Vec::new();

    for n in 0..3 {
        let slot = forwarded(broker.admit(last(DISK, n, 1), 0), 0);
        let cookie = queue.deliver(slot).expect("it waits").cookie;
        assert!(cookies.iter().all(|&old| queue.settle(old, Outcome::Success).err() == Some(Refusal::Stale)));
        cookies.push(cookie);
        let _ = send(queue.settle(cookie, Outcome::Success).expect("outstanding"));
    }

    assert_eq!(cookies.iter().map(|c| c.0 >> 8).collect::<Vec<_>>(), [0, 1, 2], "from all ones on");
}
