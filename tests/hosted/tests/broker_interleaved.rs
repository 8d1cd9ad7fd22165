//! The lock-free parts of the broker, interrupted at every moment.
//!
//! The source of the broker is compiled a second time here, with atomics that let something else happen before each
//! access (`hosted::interleave`). For each operation, each thing that other cores may do meanwhile, and each moment,
//! the same must hold: every group is answered once, and a guest sees a group whole or not at all. It is sequentially
//! consistent: what a weak memory order may do, it does not show.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]
#![expect(unexpected_cfgs, reason = "the features of the broker are not those of this package")]

// Below, `core::sync` is `hosted::sync`; nothing else of `core` is used.
extern crate hosted as core;

#[path = "../../../drivers/broker/src/attachments.rs"]
mod attachments;
#[path = "../../../drivers/broker/src/cookie.rs"]
mod cookie;
#[path = "../../../drivers/broker/src/counters.rs"]
mod counters;
#[path = "../../../drivers/broker/src/queue.rs"]
mod queue;
#[path = "../../../drivers/broker/src/service.rs"]
mod service;

pub use attachments::{AttachmentId, Attachments, Policy};
pub use cookie::Cookie;
pub use counters::{Counters, Tally};
pub use queue::{Answer, Group, PAGES, Page, Queue, Refusal};
pub use service::{Broker, Verdict};

use hosted::interleave::interrupted;
use iommu::{GroupTag, Iova, Outcome, PageRequest, PageResponse, Pasid, Perms, StreamId};
use std::{cell::RefCell, rc::Rc};

const DISK: StreamId = StreamId(0x20);

fn pasid() -> Option<Pasid> {
    Pasid::new(5)
}

/// A queue of `S` slots and everybody who uses it.
struct World<const S: usize> {
    queue: &'static Queue<S>,
    broker: RefCell<Broker<'static, 1, S, 1>>,
    /// Of each group that was admitted, by its number: how often it was answered.
    answers: RefCell<Vec<usize>>,
    /// The cookie that the guest was told last.
    told: RefCell<Option<Cookie>>,
}

/// What a core may do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Action {
    /// The guest's home core reads slot 0, and answers what it finds.
    Forward,
    /// The guest answers what it was told last, perhaps again.
    Settle,
    /// The control path ends the groups of the device.
    Evict,
    /// The service core ends what is overdue: everything.
    Expire,
    /// The service core takes in one more group, as long as can be.
    Admit,
}

impl Action {
    const ALL: [Self; 5] = [Self::Forward, Self::Settle, Self::Evict, Self::Expire, Self::Admit];

    /// The service core and the home core are one core each, which does one thing at a time.
    fn core(self) -> usize {
        match self {
            Self::Forward => 0,
            Self::Expire | Self::Admit => 1,
            Self::Settle => 2,
            Self::Evict => 3,
        }
    }
}

impl<const S: usize> World<S> {
    fn new() -> Rc<Self> {
        // They live as long as the process: what happens at a chosen moment cannot borrow from a test.
        let queue: &Queue<S> = Box::leak(Box::new(Queue::new(1)));
        let attachments: &Attachments<1> = Box::leak(Box::default());
        let policy = Policy {
            stream: DISK,
            pasid: pasid(),
            queue: 0,
            budget: S as u8,
            device: 1,
            opaque: 0,
            deadline_us: 10,
        };
        attachments.add(policy).expect("there is room");
        Rc::new(Self {
            queue,
            broker: RefCell::new(Broker::new([queue], attachments)),
            answers: RefCell::default(),
            told: RefCell::default(),
        })
    }

    fn act(&self, action: Action) {
        match action {
            Action::Forward => {
                if let Some(group) = self.queue.deliver(0) {
                    self.check(&group);
                    *self.told.borrow_mut() = Some(group.cookie);
                    self.settle(group.cookie);
                }
            }
            Action::Settle => {
                let told = *self.told.borrow();
                told.into_iter().for_each(|cookie| self.settle(cookie));
            }
            Action::Evict => {
                while let Some(answer) = self.queue.evict(DISK, pasid()) {
                    self.send(answer);
                }
            }
            Action::Expire => {
                while let Some(answer) = self.broker.borrow_mut().expire(u64::MAX) {
                    self.send(answer);
                }
            }
            Action::Admit => self.admit(),
        }
    }

    /// Admits a group whose pages all carry its number.
    fn admit(&self) {
        let number = self.answers.borrow().len();
        self.answers.borrow_mut().push(0);
        let tag = GroupTag { pasid: pasid(), index: number as u16 };
        for page in 0..PAGES {
            let last = page + 1 == PAGES;
            let iova = Iova((number as u64) << 12);
            let request = PageRequest { stream: DISK, tag, iova, perms: Perms::READ, last };
            let verdict = self.broker.borrow_mut().admit(request, 0);
            if let Verdict::Answer(response) = verdict {
                self.count(&response);
            }
        }
    }

    /// A group that a guest is told of is one group.
    fn check(&self, group: &Group) {
        assert_eq!(group.pages.len(), PAGES);
        assert!(group.pages.iter().all(|page| page.iova.0 >> 12 == u64::from(group.tag.index)), "{group:?}");
    }

    fn settle(&self, cookie: Cookie) {
        if let Ok(answer) = self.queue.settle(cookie, Outcome::Success) {
            self.send(answer);
        }
    }

    fn send(&self, answer: Answer<'_, S>) {
        let sent = answer.send(|response| {
            self.count(&response);
            Ok::<(), (PageResponse, ())>(())
        });
        assert!(sent.is_ok());
    }

    fn count(&self, response: &PageResponse) {
        self.answers.borrow_mut()[usize::from(response.tag.index)] += 1;
    }
}

/// Does `action` with `others` at each moment in turn, from a state in which `known` groups were told to the guest and
/// `waiting` more are whole. Returns how many moments there were.
fn at_every_moment<const S: usize>(known: usize, waiting: usize, action: Action, others: &[Action]) -> usize {
    for moment in 0.. {
        let world = World::<S>::new();
        for _ in 0..known {
            world.admit();
            let group = world.queue.deliver(0).expect("it waits");
            *world.told.borrow_mut() = Some(group.cookie);
        }
        (0..waiting).for_each(|_| world.admit());
        let (beside, what) = (Rc::clone(&world), others.to_vec());

        let interruption = move || what.iter().for_each(|&action| beside.act(action));
        let ((), happened) = interrupted(moment, interruption, || world.act(action));
        world.act(Action::Expire);

        let context =
            || format!("{action:?}, at access {moment} {others:?}, {known} known, {waiting} waiting");
        assert!(world.answers.borrow().iter().all(|&times| times == 1), "{:?}: {}", world.answers, context());
        assert_eq!(world.queue.outstanding(), 0, "{}", context());
        let tally = world.queue.counters().tally();
        assert_eq!((tally.opened, tally.discarded), (tally.answered(), 0), "{}", context());
        if !happened {
            return moment;
        }
    }
    0
}

fn everything<const S: usize>() -> usize {
    let mut moments = 0;
    for (known, waiting) in [(0, 0), (0, 1), (1, 0), (1, S - 1)] {
        for action in Action::ALL {
            let beside = |other: &Action| other.core() != action.core();
            for first in Action::ALL.into_iter().filter(beside) {
                moments += at_every_moment::<S>(known, waiting, action, &[first]);
                for second in Action::ALL.into_iter().filter(beside) {
                    moments += at_every_moment::<S>(known, waiting, action, &[first, second]);
                }
            }
        }
    }
    moments
}

#[test]
fn with_one_slot_each_group_is_answered_once_at_every_moment() {
    let moments = everything::<1>();

    println!("{moments} moments");
    assert!(moments > 1_000);
}

#[test]
fn with_two_slots_each_group_is_answered_once_at_every_moment() {
    let moments = everything::<2>();

    println!("{moments} moments");
    assert!(moments > 1_000);
}

#[test]
fn an_attachment_is_found_as_it_was_or_as_it_is_at_every_moment() {
    let policy = |n: u32| Policy {
        stream: DISK,
        pasid: pasid(),
        queue: n as u8,
        budget: n as u8,
        device: n,
        opaque: n.into(),
        deadline_us: n.into(),
    };
    for moment in 0.. {
        let attachments: &Attachments<2> = Box::leak(Box::default());
        let first = attachments.add(policy(1)).expect("there is room");
        // Another guest gets the device while the handler looks for its owner.
        let interruption = move || {
            attachments.leave(first);
            attachments.remove(first);
            assert!(attachments.add(policy(2)).is_some());
        };

        let (found, happened) = interrupted(moment, interruption, || attachments.find(DISK, pasid()));

        let found = found.map(|(_, policy)| policy);
        assert!(found.is_none() || [policy(1), policy(2)].map(Some).contains(&found), "{moment}: {found:?}");
        if !happened {
            assert!(moment > 5);
            return;
        }
    }
}

#[test]
fn two_cores_that_add_at_once_get_two_places_at_every_moment() {
    let policy = |stream| Policy {
        stream: StreamId(stream),
        pasid: pasid(),
        queue: 0,
        budget: 1,
        device: stream,
        opaque: 0,
        deadline_us: 1,
    };
    for moment in 0.. {
        let attachments: &Attachments<2> = Box::leak(Box::default());
        let interruption = move || assert!(attachments.add(policy(0x28)).is_some());

        let (first, happened) = interrupted(moment, interruption, || attachments.add(policy(0x20)));

        assert!(first.is_some());
        if !happened {
            assert!(moment > 5);
            return;
        }
        for stream in [0x20, 0x28] {
            let found = attachments.find(StreamId(stream), pasid()).map(|(_, policy)| policy);
            assert_eq!(found, Some(policy(stream)), "{moment}");
        }
    }
}
