//! The lock-free parts of the broker under real threads.
//!
//! A scheduler finds what it finds: `broker_interleaved.rs` tries every moment, this test tries a real machine.

use broker::{Answer, Attachments, Broker, Cookie, Policy, Queue, Verdict};
use hosted::Ends;
use iommu::{GroupTag, Iova, Outcome, PageRequest, PageResponse, Pasid, Perms, StreamId};
use std::{
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    thread,
};

const DISK: StreamId = StreamId(0x20);

/// PASID 5 of the disk, which may have eight groups, and soon expects its answers.
const POLICY: Policy =
    Policy { stream: DISK, pasid: Pasid::new(5), queue: 0, budget: 8, device: 1, opaque: 0, deadline_us: 12 };

fn request(index: usize, page: u64, last: bool) -> PageRequest {
    let tag = GroupTag { pasid: Pasid::new(5), index: index as u16 };
    PageRequest { stream: DISK, tag, iova: Iova(page << 12), perms: Perms::READ_WRITE, last }
}

/// Groups that the device asks for, and numbers that it has for them.
const GROUPS: usize = 100_000;
const NUMBERS: usize = 64;

/// A device that counts what it is answered.
struct Device {
    waits: [AtomicBool; NUMBERS],
    answered: AtomicUsize,
}

impl Device {
    fn take(&self, response: PageResponse) {
        let number = usize::from(response.tag.index);
        assert!(self.waits[number].swap(false, SeqCst), "group {number} was answered twice, or never asked");
        self.answered.fetch_add(1, SeqCst);
    }

    fn take_answer<const S: usize>(&self, queue: &Queue<S>, answer: Answer<'_, S>) {
        let sent = answer.send(|response| {
            assert!(queue.outstanding() > 0, "its slot is not free before it is sent");
            self.take(response);
            Ok::<(), (PageResponse, ())>(())
        });
        assert!(sent.is_ok());
    }
}

#[test]
fn each_group_is_answered_once_however_guest_deadline_and_eviction_race() {
    let queue = Queue::<8>::new(1);
    let attachments = Attachments::<1>::new();
    attachments.add(POLICY).expect("there is room");
    let device = Device { waits: [const { AtomicBool::new(false) }; NUMBERS], answered: AtomicUsize::new(0) };
    let last_cookie = AtomicU64::new(u64::MAX);
    let done = AtomicBool::new(false);
    let started = Barrier::new(3);
    let (announce, announced) = mpsc::channel();

    thread::scope(|scope| {
        // The guest's home core: reads each group; answers one in four not at all, and one in four twice.
        scope.spawn(|| {
            started.wait();
            for slot in announced {
                let Some(group) = queue.deliver(slot) else { continue };
                assert!(group.pages.iter().all(|p| p.iova.0 >> 12 == u64::from(group.tag.index)));
                last_cookie.store(group.cookie.0, SeqCst);
                for _ in 0..[0, 1, 1, 2][usize::from(group.tag.index) % 4] {
                    if let Ok(answer) = queue.settle(group.cookie, Outcome::Success) {
                        device.take_answer(&queue, answer);
                    }
                }
            }
        });
        // Another core: evicts now and then, and repeats the guest's cookies.
        scope.spawn(|| {
            started.wait();
            while !done.load(SeqCst) {
                if let Ok(answer) = queue.settle(Cookie(last_cookie.load(SeqCst)), Outcome::Invalid) {
                    device.take_answer(&queue, answer);
                }
                if let Some(answer) = queue.evict(DISK, Pasid::new(5)) {
                    device.take_answer(&queue, answer);
                }
                thread::yield_now();
            }
        });
        // The service core: admits, on a clock that ticks once for each group, and expires.
        let _ends = Ends(&done);
        started.wait();
        let mut broker = Broker::new([&queue], &attachments);
        let mut now_us = 0;
        for n in 0..GROUPS {
            let number = n % NUMBERS;
            let began_us = now_us;
            while device.waits[number].load(SeqCst) {
                now_us += 1;
                assert!(now_us - began_us < 100_000_000, "group {number} is never answered");
                while let Some(answer) = broker.expire(now_us) {
                    device.take_answer(&queue, answer);
                }
            }
            device.waits[number].store(true, SeqCst);
            let page = number as u64;
            for _ in 0..n % 3 {
                match broker.admit(request(number, page, false), now_us) {
                    Verdict::Nothing => {}
                    other => panic!("a part alone ends nothing: {other:?}"),
                }
            }
            match broker.admit(request(number, page, true), now_us) {
                Verdict::Forward { slot, .. } => announce.send(slot).expect("the guest listens"),
                Verdict::Answer(response) => device.take(response),
                Verdict::Nothing => panic!("group {number} was not outstanding"),
            }
            now_us += 1;
            while let Some(answer) = broker.expire(now_us) {
                device.take_answer(&queue, answer);
            }
        }
        while let Some(answer) = broker.expire(u64::MAX) {
            device.take_answer(&queue, answer);
        }
        drop(announce);
    });

    assert_eq!(device.answered.load(SeqCst), GROUPS);
    assert_eq!(queue.outstanding(), 0);
    let tally = queue.counters().tally();
    assert_eq!((tally.opened, tally.answered(), tally.discarded), (GROUPS as u64, GROUPS as u64, 0));
}
