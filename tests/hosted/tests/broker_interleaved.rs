//! The lock-free parts of the broker, interrupted at every moment.
//!
//! The source of the broker is compiled a second time here, with atomics that let something else happen before each
//! access (`hosted::interleave`). For each operation, each thing that other cores may do meanwhile, and each moment,
//! the same must hold: every group is answered once, and a guest sees a group whole or not at all. It is sequentially
//! consistent: what a weak memory order may do, `tests/loom` shows.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]
#![expect(unexpected_cfgs, reason = "the features of the broker are not those of this package")]
#![allow(dead_code, reason = "not all of the broker is used here")]

// Below, `core::sync` is `hosted::sync`; the other modules of `core` are the real ones.
extern crate hosted as core;

#[path = "../../../drivers/broker/src/attachments.rs"]
mod attachments;
#[path = "../../../drivers/broker/src/cookie.rs"]
mod cookie;
#[path = "../../../drivers/broker/src/counters.rs"]
mod counters;
#[path = "../../../drivers/broker/src/deadlines.rs"]
mod deadlines;
#[path = "../../../drivers/broker/src/devices.rs"]
mod devices;
#[path = "../../../drivers/broker/src/directory.rs"]
mod directory;
#[path = "../../../drivers/broker/src/faults.rs"]
mod faults;
#[path = "../../../drivers/broker/src/groups.rs"]
mod groups;
#[path = "../../../drivers/broker/src/inbox.rs"]
mod inbox;
#[path = "../../../drivers/broker/src/ledger.rs"]
mod ledger;
#[path = "../../../drivers/broker/src/queue.rs"]
mod queue;
#[path = "../../../drivers/broker/src/service.rs"]
mod service;

pub use attachments::{AttachmentId, Policy, Requests};
pub use cookie::Cookie;
pub use counters::{Missed, Tally};
pub use deadlines::{Deadlines, Due};
pub use devices::{DEADLINE_MAX_US, DeviceId, Escalation, Latencies, Limits, Restraint};
pub use faults::{FaultCount, FaultLimits};
pub use inbox::{Inbox, Taken};
pub use ledger::{Error, Faulted, Ledger, Owner, QueueId, Settled, Whose};
pub use queue::{Answer, Group, Page, Refusal, Shown};
pub use service::{Broker, Expiry, POISONED, Verdict};

use heapless::spsc;
use hosted::interleave::{accesses, interrupted};
use iommu::{GroupTag, Iova, Outcome, PageRequest, PageResponse, Pasid, Perms, StreamId};
use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

const DISK: StreamId = StreamId(0x20);
/// Pages of each group.
const GROUP: u64 = 3;
const DEADLINE_US: u64 = 100_000;

/// How often a group was asked for, shown to its guest, and answered.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    asked: usize,
    shown: usize,
    answered: usize,
}

/// A queue of `S` slots and everybody who uses it.
struct World<const S: usize, const N: usize> {
    ledger: &'static Ledger<1, S, 8, 8>,
    queue: QueueId,
    device: DeviceId,
    attachment: Cell<AttachmentId>,
    broker: RefCell<Broker<'static, 1, S, 8, 8, N>>,
    inbox: RefCell<Inbox<'static, 1, S, 8, 8>>,
    now_us: Cell<u64>,
    /// The device asks for the same pages in each run, so that the guest's claims to have repaired them are not believed.
    is_doubted: bool,
    run: Cell<u64>,
    /// The groups that were admitted in this run, by their numbers.
    groups: RefCell<Vec<Counts>>,
    /// The cookie that the guest was told last, and the number of its group.
    told: Cell<Option<(Cookie, u16)>>,
}

/// What a core may do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Action {
    /// The guest's home core reads what was announced, and answers the first of it.
    Forward,
    /// The guest answers what it was told last, perhaps again.
    Settle,
    /// The control path ends all groups of the queue.
    Evict,
    /// The control path takes the attachment away.
    Leave,
    /// The control path resets the device.
    Reset,
    /// The service core ends what is overdue: everything.
    Expire,
    /// The service core takes in one more group, as long as can be.
    Admit,
    /// The device uses the number of its last group again.
    Repeat,
}

impl Action {
    const ALL: [Self; 8] = [
        Self::Forward,
        Self::Settle,
        Self::Evict,
        Self::Leave,
        Self::Reset,
        Self::Expire,
        Self::Admit,
        Self::Repeat,
    ];

    /// The service core and the home core are one core each, which does one thing at a time.
    fn core(self) -> usize {
        match self {
            Self::Forward => 0,
            Self::Expire | Self::Admit | Self::Repeat => 1,
            Self::Settle => 2,
            Self::Evict | Self::Leave | Self::Reset => 3,
        }
    }
}

fn policy(device: DeviceId, queue: QueueId, name: u32) -> Policy {
    Policy { stream: DISK, requests: Requests::Any, device, queue, name, opaque: name.into() }
}

/// A ledger with a queue and a device of which nothing is attached.
fn ledger<const S: usize>() -> (&'static Ledger<1, S, 8, 8>, QueueId, DeviceId) {
    // It lives as long as the process: what happens at a chosen moment cannot borrow from a test.
    let ledger: &Ledger<1, S, 8, 8> = Box::leak(Box::new(Ledger::new(1024)));
    let queue = ledger.open(Owner::Guest(1)).expect("there is one");
    let escalation = Escalation { warn: 0, throttle: 0, requests_off: 0, block: 0 };
    let limits = Limits { escalation, deadline_us: DEADLINE_US, ..Limits::with_requests(256) };
    (ledger, queue, ledger.add_device(DISK, &limits).expect("there is room"))
}

impl<const S: usize, const N: usize> World<S, N> {
    fn new(is_doubted: bool) -> Rc<Self> {
        let (ledger, queue, device) = ledger();
        let ring: &mut spsc::Queue<u16, 128> = Box::leak(Box::default());
        let (producer, consumer) = ring.split();
        let mut broker = Broker::new(ledger);
        broker.connect(0, producer).expect("it is large enough");
        Rc::new(Self {
            ledger,
            queue,
            device,
            attachment: Cell::new(ledger.attach(&policy(device, queue, 1)).expect("there is room")),
            broker: RefCell::new(broker),
            inbox: RefCell::new(Inbox::new(ledger, 0, consumer)),
            now_us: Cell::new(0),
            is_doubted,
            run: Cell::new(0),
            groups: RefCell::default(),
            told: Cell::new(None),
        })
    }

    fn act(&self, action: Action) {
        let ledger = self.ledger;
        match action {
            Action::Forward => {
                let mut first = None;
                while let Some(group) = self.next() {
                    first.get_or_insert((group.cookie, group.tag.index));
                }
                first.into_iter().for_each(|group| self.settle(group));
            }
            Action::Settle => self.told.get().into_iter().for_each(|group| self.settle(group)),
            Action::Evict => self.evict(Whose::All),
            Action::Leave => {
                ledger.leave(self.attachment.get());
                self.evict(Whose::Attachment(self.attachment.get()));
            }
            Action::Reset => {
                ledger.quiesce_device(self.device);
                self.evict(Whose::Device(self.device));
                ledger.resume_device(self.device);
            }
            Action::Expire => self.expire(),
            Action::Admit => {
                let number = self.groups.borrow().len();
                self.groups.borrow_mut().push(Counts { asked: 1, ..Counts::default() });
                self.ask(number);
            }
            Action::Repeat => {
                let Some(number) = self.groups.borrow().len().checked_sub(1) else { return };
                self.groups.borrow_mut()[number].asked += 1;
                self.ask(number);
            }
        }
    }

    /// Takes in the requests of a group, whose pages all carry its number.
    fn ask(&self, number: usize) {
        let tag = GroupTag { pasid: Pasid::new(5), index: number as u16 };
        let run = if self.is_doubted { 0 } else { self.run.get() };
        for page in 1..=GROUP {
            let iova = Iova((run << 16 | number as u64) << 12);
            let request = PageRequest { stream: DISK, tag, iova, perms: Perms::READ, last: page == GROUP };
            let verdict = self.broker.borrow_mut().admit(&request, self.now_us.get());
            match verdict {
                Verdict::Refuse(response) => self.count(&response),
                Verdict::End(answer) => self.send(answer),
                Verdict::Forward { .. } | Verdict::Nothing => {}
            }
        }
    }

    /// A group that a guest is told of is one group, and whole.
    fn next(&self) -> Option<Group> {
        let group = self.inbox.borrow_mut().next(self.now_us.get())?;
        // A group whose number was used twice may have begun before the answer to the first, and is new from there on.
        let counts = &mut self.groups.borrow_mut()[usize::from(group.tag.index)];
        counts.shown += 1;
        let asked = counts.asked;
        let pages = group.pages.len() as u64;
        assert!(pages == GROUP || asked > 1 && pages < GROUP, "{group:?}");
        let number = |page: &Page| page.iova().0 >> 12 & 0xFFFF;
        assert!(group.pages.iter().all(|page| number(page) == u64::from(group.tag.index)), "{group:?}");
        self.told.set(Some((group.cookie, group.tag.index)));
        Some(group)
    }

    fn settle(&self, (cookie, number): (Cookie, u16)) {
        match self.ledger.settle(self.queue, cookie, Outcome::Success, self.now_us.get()) {
            Ok(Settled::Now(answer)) => {
                assert_eq!(answer.response().tag.index, number, "a cookie answers its own group");
                self.send(answer);
            }
            Ok(Settled::Held) | Err(_) => {}
        }
    }

    fn evict(&self, whose: Whose) {
        while let Some(answer) = self.ledger.evict(self.queue, whose, self.now_us.get()) {
            self.send(answer);
        }
    }

    fn expire(&self) {
        self.now_us.set(self.now_us.get() + 2 * DEADLINE_US);
        loop {
            let expiry = self.broker.borrow_mut().expire(self.now_us.get());
            match expiry {
                Expiry::Expired { answer, .. } | Expiry::Held(answer) => self.send(answer),
                Expiry::Nothing => {}
                Expiry::Done => return,
            }
        }
    }

    fn send(&self, answer: Answer<'_, S>) {
        let sent = answer.send(|response| {
            assert!(self.ledger.outstanding(self.queue) > 0, "its slot is not free before it is sent");
            self.count(&response);
            Ok::<(), (PageResponse, ())>(())
        });
        assert!(sent.is_ok());
    }

    fn count(&self, response: &PageResponse) {
        self.groups.borrow_mut()[usize::from(response.tag.index)].answered += 1;
    }

    /// Ends what is left, and says what is wrong.
    fn end(&self) -> Result<(), String> {
        // What still waits was shown, or is announced. Of a number that was used twice nobody may be told.
        while self.next().is_some() {}
        let groups = self.groups.borrow().clone();
        if groups.iter().any(|group| group.asked == 1 && group.answered == 0 && group.shown == 0) {
            return Err(format!("{groups:?}: its announcement was lost"));
        }
        self.expire();
        self.expire();
        let (ledger, groups) = (self.ledger, self.groups.take());
        // A number that was used twice at a time has one answer.
        if !groups.iter().all(|group| (1..=group.asked).contains(&group.answered)) {
            return Err(format!("{groups:?}"));
        }
        let outstanding = (ledger.outstanding(self.queue), ledger.outstanding_requests(self.device));
        if outstanding != (0, 0) {
            return Err(format!("{outstanding:?} outstanding"));
        }
        let tally = ledger.tally(self.device).expect("it is there");
        if tally.opened != tally.answered() + tally.discarded {
            return Err(format!("{tally:?}"));
        }
        // The next run begins as this one did.
        ledger.leave(self.attachment.get());
        ledger.detach(self.attachment.get());
        let attachment = ledger.attach(&policy(self.device, self.queue, 1));
        self.attachment.set(attachment.map_err(|error| format!("{error:?}"))?);
        self.told.set(None);
        self.run.set(self.run.get() + 1);
        Ok(())
    }
}

/// Does `action` with `others` at each moment in turn, from a state in which `known` groups were told to the guest and
/// `waiting` more are whole. Returns how many moments there were.
fn at_every_moment<const S: usize, const N: usize>(
    (known, waiting, is_doubted): (usize, usize, bool),
    action: Action,
    others: &[Action],
) -> usize {
    let world = World::<S, N>::new(is_doubted);
    for moment in 0.. {
        for _ in 0..known {
            world.act(Action::Admit);
            world.next().expect("it waits");
        }
        (0..waiting).for_each(|_| world.act(Action::Admit));
        let (beside, what) = (Rc::clone(&world), others.to_vec());

        let interruption = move || what.iter().for_each(|&action| beside.act(action));
        let ((), happened) = interrupted(moment, interruption, || world.act(action));

        if let Err(wrong) = world.end() {
            panic!("{wrong}: {action:?}, at access {moment} {others:?}, {known} known, {waiting} waiting");
        }
        if !happened {
            return moment;
        }
    }
    0
}

fn everything<const S: usize, const N: usize>(is_doubted: bool) -> usize {
    let mut moments = 0;
    for (known, waiting) in [(0, 0), (0, 1), (1, 0), (1, S - 1)] {
        let state = (known, waiting, is_doubted);
        for action in Action::ALL {
            let beside = |other: &Action| other.core() != action.core();
            for first in Action::ALL.into_iter().filter(beside) {
                moments += at_every_moment::<S, N>(state, action, &[first]);
                for second in Action::ALL.into_iter().filter(beside) {
                    moments += at_every_moment::<S, N>(state, action, &[first, second]);
                }
            }
        }
    }
    moments
}

#[test]
fn with_one_slot_each_group_is_answered_once_at_every_moment() {
    let moments = everything::<1, { 1 + POISONED }>(false);

    println!("{moments} moments");
    assert!(moments > 10_000);
}

#[test]
fn with_two_slots_each_group_is_answered_once_at_every_moment() {
    let moments = everything::<2, { 2 + POISONED }>(false);

    println!("{moments} moments");
    assert!(moments > 10_000);
}

#[test]
fn a_group_of_a_guest_that_is_doubted_is_answered_once_at_every_moment() {
    let moments = everything::<1, { 1 + POISONED }>(true);

    println!("{moments} moments");
    assert!(moments > 10_000);
}

#[test]
fn a_free_slot_is_found_whenever_another_is_freed() {
    const S: usize = 66;
    for moment in 0.. {
        let world = World::<S, { S + POISONED }>::new(false);
        for _ in 0..63 {
            world.act(Action::Admit);
            world.next().expect("it waits");
        }
        let beside = Rc::clone(&world);

        // One slot of the first word and two of the second are free, and one more perhaps.
        let interruption = move || {
            beside.act(Action::Admit);
            beside.act(Action::Admit);
            while beside.next().is_some() {}
        };
        let told = world.told.get().expect("it was told");
        let ((), happened) = interrupted(moment, interruption, || world.settle(told));
        while world.ledger.outstanding(world.queue) < S {
            let before = world.ledger.outstanding(world.queue);
            world.act(Action::Admit);
            assert!(world.ledger.outstanding(world.queue) > before, "access {moment}");
        }

        world.end().expect("all is answered");
        if !happened {
            assert!(moment > 5);
            return;
        }
    }
}

#[test]
fn an_attachment_is_found_as_it_was_or_as_it_is_at_every_moment() {
    for moment in 0.. {
        let (ledger, queue, device) = ledger::<1>();
        let first = ledger.attach(&policy(device, queue, 1)).expect("there is room");
        // Another guest gets the device while the handler looks for its owner.
        let interruption = move || {
            ledger.leave(first);
            ledger.detach(first);
            assert!(ledger.attach(&policy(device, queue, 2)).is_ok());
        };

        let (found, happened) = interrupted(moment, interruption, || ledger.owner_of(DISK, None));

        assert!([None, Some((0, 1, 1)), Some((0, 2, 2))].contains(&found), "{moment}: {found:?}");
        if !happened {
            assert!(moment > 5);
            return;
        }
    }
}

#[test]
fn two_cores_that_attach_at_once_get_two_places_at_every_moment() {
    for moment in 0.. {
        let (ledger, queue, device) = ledger::<1>();
        let with = move |name| Policy {
            requests: Requests::Of(Pasid::new(name).expect("it has 20 bits")),
            ..policy(device, queue, name)
        };
        let interruption = move || assert!(ledger.attach(&with(6)).is_ok());

        let (first, happened) = interrupted(moment, interruption, || ledger.attach(&with(5)));

        assert!(first.is_ok());
        if !happened {
            assert!(moment > 5);
            return;
        }
        for name in [5, 6] {
            let found = ledger.owner_of(DISK, Pasid::new(name));
            assert_eq!(found, Some((0, name, name.into())), "{moment}");
        }
    }
}

#[test]
fn an_old_name_of_a_queue_means_nothing_while_it_is_opened_anew() {
    for moment in 0.. {
        let (ledger, old, _) = ledger::<2>();
        ledger.shut(old);
        ledger.close(old).expect("nothing waits");
        let interruption = move || {
            assert_eq!((ledger.owner(old), ledger.outstanding(old)), (None, 0));
            let settled = ledger.settle(old, Cookie(1 << 12), Outcome::Success, 0);
            assert_eq!(settled, Err(Refusal::OutOfRange));
            assert_eq!(ledger.close(old), Err(Error::Gone));
        };

        let (new, happened) = interrupted(moment, interruption, || ledger.open(Owner::Guest(2)));

        let new = new.expect("it was closed");
        assert_eq!((ledger.owner(new), ledger.owner(old)), (Some(Owner::Guest(2)), None));
        assert_eq!(ledger.missed(new), Missed::default());
        if !happened {
            assert!(moment > 5);
            return;
        }
    }
}

#[test]
fn a_ring_that_is_connected_late_or_anew_announces_what_waits() {
    let world = World::<2, { 2 + POISONED }>::new(false);
    let rings = [(); 2].map(|()| Box::leak(Box::new(spsc::Queue::<u16, 3>::new())).split());
    let [(first, _), (second, consumer)] = rings;
    world.broker.replace(Broker::new(world.ledger));

    world.act(Action::Admit);
    world.broker.borrow_mut().connect(0, first).expect("it is large enough");
    world.act(Action::Admit);
    world.broker.borrow_mut().connect(0, second).expect("it is large enough");
    world.inbox.replace(Inbox::new(world.ledger, 0, consumer));

    let indices = std::iter::from_fn(|| world.next()).map(|group| group.tag.index);
    assert_eq!(indices.collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn a_cookie_is_refused_with_the_same_work_whatever_is_wrong_with_it() {
    let world = World::<2, { 2 + POISONED }>::new(false);
    let settle = |cookie| {
        let settle = || world.ledger.settle(world.queue, cookie, Outcome::Success, 0).map(drop);
        let (settled, accesses) = accesses(settle);
        (settled.expect_err("it is not outstanding"), accesses)
    };
    // The first group's slot is used anew; the second was answered, and its slot is free.
    for _ in 0..3 {
        world.act(Action::Admit);
    }
    let told: Vec<_> = std::iter::from_fn(|| world.next()).map(|group| group.cookie).collect();
    told.iter().zip(0..).for_each(|(&cookie, number)| world.settle((cookie, number)));
    world.act(Action::Admit);
    let again = world.next().expect("a slot is free").cookie;
    let free = *told.iter().find(|cookie| cookie.slot() != again.slot()).expect("there are two slots");
    let stale = *told.iter().find(|cookie| cookie.slot() == again.slot()).expect("it was used before");
    let never = Cookie(again.0 + (1 << 12));
    let nowhere = Cookie(again.0 | 0xFFF);
    let foreign = Cookie(again.0 ^ 1 << 40);

    let refused = [free, stale, never, nowhere, foreign].map(settle);

    let reasons = [Refusal::Late, Refusal::Stale, Refusal::Unknown, Refusal::OutOfRange, Refusal::Unknown];
    assert_eq!(refused.map(|(reason, _)| reason), reasons);
    let work = refused[0].1;
    assert!(work > 0, "accesses are counted");
    assert_eq!(refused.map(|(_, accesses)| accesses), [work; 5]);
}
