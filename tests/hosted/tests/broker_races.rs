//! The lock-free parts of the broker under real threads.
//!
//! A scheduler finds what it finds: `broker_interleaved.rs` tries every moment, this test tries a real machine. Under Miri it
//! is shorter, and shows what a weak machine may do.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use broker::{
    Answer, AttachmentId, Broker, Cookie, DeviceId, Escalation, Expiry, Inbox, Ledger, Limits, Owner,
    POISONED, Policy, QueueId, Requests, Settled, Verdict, Whose,
};
use heapless::spsc;
use hosted::{Ends, Random};
use iommu::{GroupTag, Iova, Outcome, PageRequest, PageResponse, Pasid, Perms, StreamId};
use std::{
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    thread,
};

const DISK: StreamId = StreamId(0x20);
const SLOTS: usize = 8;
/// How soon the device expects its answers; the clock ticks once for each group, by 1 ms.
const DEADLINE_US: u64 = 12 * TICK_US;
const TICK_US: u64 = 1_024;

/// Numbers that the device has for its groups.
const NUMBERS: usize = 64;

/// Groups that the device asks for. `RACES_GROUPS` says so, if it is there.
fn groups() -> usize {
    let usual = if cfg!(miri) { 60 } else { 100_000 };
    std::env::var("RACES_GROUPS").map_or(usual, |groups| groups.parse().expect("it is a number"))
}

/// What all cores see, and a device that counts what it is answered.
struct World {
    ledger: Ledger<1, SLOTS, 8, 8>,
    queue: QueueId,
    device: DeviceId,
    now_us: AtomicU64,
    /// Passes of the service core that have begun.
    passes: AtomicU64,
    last_cookie: AtomicU64,
    /// Someone has finished, or failed.
    done: AtomicBool,
    waits: [AtomicBool; NUMBERS],
    answered: AtomicUsize,
}

impl World {
    fn new() -> Self {
        let ledger = Ledger::new(1024);
        let queue = ledger.open(Owner::Guest(1)).expect("there is one");
        let escalation = Escalation { warn: 0, throttle: 0, requests_off: 0, block: 0 };
        let limits = Limits { escalation, deadline_us: DEADLINE_US, ..Limits::with_requests(64) };
        let device = ledger.add_device(DISK, &limits).expect("there is room");
        Self {
            ledger,
            queue,
            device,
            now_us: AtomicU64::new(0),
            passes: AtomicU64::new(0),
            last_cookie: AtomicU64::new(u64::MAX),
            done: AtomicBool::new(false),
            waits: [const { AtomicBool::new(false) }; NUMBERS],
            answered: AtomicUsize::new(0),
        }
    }

    fn attach(&self, opaque: u64) -> AttachmentId {
        let (device, queue) = (self.device, self.queue);
        let policy = Policy { stream: DISK, requests: Requests::Any, device, queue, name: 1, opaque };
        self.ledger.attach(&policy).expect("there is room")
    }

    fn take(&self, response: PageResponse) {
        let number = usize::from(response.tag.index);
        assert!(self.waits[number].swap(false, SeqCst), "group {number} was answered twice, or never asked");
        self.answered.fetch_add(1, SeqCst);
    }

    fn send(&self, answer: Answer<'_, SLOTS>) {
        let sent = answer.send(|response| {
            assert!(self.ledger.outstanding(self.queue) > 0, "its slot is not free before it is sent");
            self.take(response);
            Ok::<(), (PageResponse, ())>(())
        });
        assert!(sent.is_ok());
    }

    fn settle(&self, cookie: Cookie, outcome: Outcome) {
        match self.ledger.settle(self.queue, cookie, outcome, self.now_us.load(SeqCst)) {
            Ok(Settled::Now(answer)) => self.send(answer),
            Ok(Settled::Held) | Err(_) => {}
        }
    }

    fn evict(&self, whose: Whose) -> bool {
        let answer = self.ledger.evict(self.queue, whose, self.now_us.load(SeqCst));
        answer.map(|answer| self.send(answer)).is_some()
    }

    /// The guest's home core: reads each group; answers one in four not at all, and one in four twice.
    fn serve(&self, ring: spsc::Consumer<'_, u16>) {
        let _ends = Ends(&self.done);
        let mut inbox = Inbox::new(&self.ledger, 0, ring);
        while !self.done.load(SeqCst) {
            let Some(group) = inbox.next(self.now_us.load(SeqCst)) else {
                thread::yield_now();
                continue;
            };
            let number = group.tag.index;
            assert!((1..=1 + usize::from(number) % 3).contains(&group.pages.len()), "{group:?}");
            assert!(group.pages.iter().all(|p| p.iova().0 >> 12 == u64::from(number)), "{group:?}");
            assert_eq!(group.tag.pasid, Pasid::new(number.into()));
            self.last_cookie.store(group.cookie.0, SeqCst);
            for _ in 0..[0, 1, 1, 2][usize::from(number) % 4] {
                self.settle(group.cookie, Outcome::Success);
            }
        }
    }

    /// The control path: ends groups, and gives the device to another owner again and again.
    fn control(&self, mut attachment: AttachmentId) {
        let _ends = Ends(&self.done);
        for round in 1.. {
            for _ in 0..8 {
                self.evict(Whose::Device(self.device));
                thread::yield_now();
            }
            self.ledger.leave(attachment);
            // Two passes have begun from here on: one of them knows that the attachment leaves, and is over.
            let begun = self.passes.load(SeqCst);
            while self.passes.load(SeqCst) < begun + 2 {
                if self.done.load(SeqCst) {
                    return;
                }
                thread::yield_now();
            }
            while self.evict(Whose::Attachment(attachment)) {}
            self.ledger.detach(attachment);
            attachment = self.attach(round);
        }
    }

    /// A guest's other core: repeats cookies, and makes some up.
    fn forge(&self) {
        let _ends = Ends(&self.done);
        let mut random = Random::new(3);
        while !self.done.load(SeqCst) {
            let cookie = self.last_cookie.load(SeqCst);
            self.settle(Cookie(cookie), Outcome::Invalid);
            self.settle(Cookie(cookie ^ 1 << random.below(64)), Outcome::Success);
            thread::yield_now();
        }
    }

    /// The service core: admits, on a clock that ticks once for each group, and expires.
    fn service(&self, ring: spsc::Producer<'_, u16>) {
        let _ends = Ends(&self.done);
        let mut broker = Box::new(Broker::<1, SLOTS, 8, 8, { SLOTS + POISONED }>::new(&self.ledger));
        broker.connect(0, ring).expect("it is large enough");
        for n in 0..groups() {
            let number = n % NUMBERS;
            self.wait_for(number, &mut broker);
            self.waits[number].store(true, SeqCst);
            let parts = 1 + number % 3;
            for part in 1..=parts {
                let tag = GroupTag { pasid: Pasid::new(number as u32), index: number as u16 };
                let (iova, perms) = (Iova((number as u64) << 12), Perms::READ_WRITE);
                let request = PageRequest { stream: DISK, tag, iova, perms, last: part == parts };
                match broker.admit(&request, self.now_us.load(SeqCst)) {
                    Verdict::Forward { queue: 0 } => assert!(request.last),
                    Verdict::Refuse(response) => self.take(response),
                    Verdict::Nothing => assert!(!request.last, "group {number} was not outstanding"),
                    other => panic!("{other:?}"),
                }
            }
            self.pass(&mut broker);
        }
        for number in 0..NUMBERS {
            self.wait_for(number, &mut broker);
        }
    }

    /// Waits until `number` has its answer. It comes at the deadline at the latest, unless a core that sends one does not run
    /// now: the machine may have fewer cores than this test.
    fn wait_for(&self, number: usize, broker: &mut Broker<'_, 1, SLOTS, 8, 8, { SLOTS + POISONED }>) {
        while self.waits[number].load(SeqCst) {
            assert!(!self.done.load(SeqCst), "another core has failed");
            self.pass(broker);
            thread::yield_now();
        }
    }

    fn pass(&self, broker: &mut Broker<'_, 1, SLOTS, 8, 8, { SLOTS + POISONED }>) {
        self.passes.fetch_add(1, SeqCst);
        let now_us = self.now_us.fetch_add(TICK_US, SeqCst) + TICK_US;
        loop {
            match broker.expire(now_us) {
                Expiry::Expired { answer, .. } | Expiry::Held(answer) => self.send(answer),
                Expiry::Nothing => {}
                Expiry::Done => return,
            }
        }
    }
}

#[test]
fn each_group_is_answered_once_however_guest_deadline_and_eviction_race() {
    let world = Box::new(World::new());
    let attachment = world.attach(0);
    let mut ring = spsc::Queue::<u16, { SLOTS + 1 }>::new();
    let (producer, consumer) = ring.split();

    thread::scope(|scope| {
        let cores = [
            scope.spawn(|| world.serve(consumer)),
            scope.spawn(|| world.control(attachment)),
            scope.spawn(|| world.forge()),
        ];
        world.service(producer);
        for core in cores {
            core.join().expect("it ends");
        }
    });

    assert_eq!(world.answered.load(SeqCst), groups());
    let ledger = &world.ledger;
    assert_eq!((ledger.outstanding(world.queue), ledger.outstanding_requests(world.device)), (0, 0));
    let tally = ledger.tally(world.device).expect("it is there");
    println!("{tally:?}");
    assert_eq!((tally.opened, tally.answered(), tally.discarded), (groups() as u64, groups() as u64, 0));
    let ends = [tally.succeeded, tally.expired, tally.evicted, tally.refused];
    assert!(ends.iter().filter(|&&count| count > 0).count() >= 2, "they race: {tally:?}");
}
