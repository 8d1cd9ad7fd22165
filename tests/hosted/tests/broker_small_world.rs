//! The broker in a world so small that all of it can be visited.
//!
//! Two guests with a queue of two slots each, two devices with one PASID each, two group indices, groups of one or two
//! pages. Every operation is tried in every state that is reached, breadth first, and what the broker does is compared
//! with a reference that is as plain as possible: a list of groups. After that each state is wound up, to see that
//! nothing stays behind.
//!
//! A broker cannot be copied, so a state is reached again by repeating the operations that led to it. Two states are
//! the same if the reference cannot tell them apart once group numbers are swapped, times counted from now, and
//! cookies named by their slots. What the broker remembers about groups that are gone (a deadline that was not taken
//! back, the last cookie of a slot) is part of a state, so that it gets its chance to do harm.

use broker::{
    ASSEMBLY_LIMIT_US, Answer, AttachmentId, Attachments, Broker, Cookie, Policy, Queue, Refusal, Tally,
    Verdict,
};
use iommu::{GroupTag, Iova, Outcome, PageRequest, PageResponse, Pasid, Perms, StreamId};
use std::collections::HashSet;

const SLOTS: usize = 2;
const TICK_US: u64 = 10;
/// Device 0 may have two groups, and one tick; device 1 one group, and two ticks.
const BUDGET: [usize; 2] = [2, 1];
const DEADLINE_US: [u64; 2] = [TICK_US, 2 * TICK_US];
/// Where the cookies of each queue start: far apart, so that neither knows the other's.
const FIRST: [u64; 2] = [1, 1 << 40];
/// A cookie of neither queue, before its slot is put in: further ahead than either will ever be.
const FORGED: u64 = 1 << 50;

fn stream(device: usize) -> StreamId {
    StreamId(0x20 + 8 * device as u32)
}

fn pasid() -> Option<Pasid> {
    Pasid::new(5)
}

fn request(device: usize, index: u16, last: bool) -> PageRequest {
    let tag = GroupTag { pasid: pasid(), index };
    let iova = Iova(if last { 0x2000 } else { 0x1000 });
    PageRequest { stream: stream(device), tag, iova, perms: Perms::READ_WRITE, last }
}

/// Something that happens.
#[derive(Clone, Copy, Debug)]
enum Op {
    /// A device asks for a page.
    Request { device: usize, index: u16, last: bool },
    /// A guest's core looks at a slot.
    Deliver { queue: usize, slot: u8 },
    /// A guest answers with some cookie.
    Settle { queue: usize, cookie: Cookie, outcome: Outcome },
    /// Time passes, and everything that is due expires.
    Pass { us: u64 },
    /// An attachment leaves.
    Leave { device: usize },
    /// The service core drops half-seen groups of attachments that left.
    Drain,
    /// A whole group of an attachment that left is ended.
    Evict { device: usize },
    /// An attachment that left and has no groups is forgotten.
    Remove { device: usize },
    /// A device is attached, for a guest.
    Add { device: usize, queue: usize },
    /// Hardware lost requests.
    Overflow,
}

/// What can be seen of an operation from outside.
#[derive(Debug, Default, Eq, PartialEq)]
struct Seen {
    responses: Vec<(usize, u16, Outcome)>,
    forwarded: Option<(usize, u8)>,
    delivered: Option<(Cookie, u16, usize)>,
    refused: Option<Refusal>,
}

// The broker under test.

struct Real<'q> {
    queues: [&'q Queue<SLOTS>; 2],
    attachments: &'q Attachments<2>,
    broker: Broker<'q, 2, SLOTS, 2>,
    ids: [Option<(AttachmentId, usize)>; 2],
    now_us: u64,
}

impl<'q> Real<'q> {
    fn new(queues: [&'q Queue<SLOTS>; 2], attachments: &'q Attachments<2>) -> Self {
        Self { queues, attachments, broker: Broker::new(queues, attachments), ids: [None; 2], now_us: 0 }
    }

    fn apply(&mut self, op: Op) -> Seen {
        let mut seen = Seen::default();
        match op {
            Op::Request { device, index, last } => {
                match self.broker.admit(request(device, index, last), self.now_us) {
                    Verdict::Forward { queue, slot } => seen.forwarded = Some((queue.into(), slot)),
                    Verdict::Answer(response) => seen.responses.push(read(&response)),
                    Verdict::Nothing => {}
                }
            }
            Op::Deliver { queue, slot } => {
                let group = self.queues[queue].deliver(slot);
                seen.delivered = group.map(|group| (group.cookie, group.tag.index, group.pages.len()));
            }
            Op::Settle { queue, cookie, outcome } => match self.queues[queue].settle(cookie, outcome) {
                Ok(answer) => self.send(answer, &mut seen),
                Err(refusal) => seen.refused = Some(refusal),
            },
            Op::Pass { us } => {
                self.now_us += us;
                while let Some(answer) = self.broker.expire(self.now_us) {
                    self.send(answer, &mut seen);
                }
            }
            Op::Leave { device } => {
                self.ids[device].into_iter().for_each(|(id, _)| self.attachments.leave(id))
            }
            Op::Drain => self.broker.discard_leaving(),
            Op::Evict { device } => {
                let queue = self.ids[device].map_or(0, |(_, queue)| queue);
                if let Some(answer) = self.queues[queue].evict(stream(device), pasid()) {
                    self.send(answer, &mut seen);
                }
            }
            Op::Remove { device } => {
                self.ids[device].take().into_iter().for_each(|(id, _)| self.attachments.remove(id));
            }
            Op::Add { device, queue } => {
                let id = self.attachments.add(Policy {
                    stream: stream(device),
                    pasid: pasid(),
                    queue: queue as u8,
                    budget: BUDGET[device] as u8,
                    device: device as u32,
                    opaque: 0,
                    deadline_us: DEADLINE_US[device],
                });
                self.ids[device] = id.map(|id| (id, queue));
            }
            Op::Overflow => self.broker.overflowed(self.now_us),
        }
        seen
    }

    /// Sends an answer. Its slot is free after that, and not before.
    fn send(&self, answer: Answer<'_, SLOTS>, seen: &mut Seen) {
        let outstanding = || self.queues[0].outstanding() + self.queues[1].outstanding();
        let before = outstanding();
        let sent = answer.send(|response| {
            assert_eq!(outstanding(), before, "the slot was freed before the answer was sent");
            seen.responses.push(read(&response));
            Ok::<(), (PageResponse, ())>(())
        });
        assert!(sent.is_ok() && outstanding() == before - 1, "the slot is free once the answer is sent");
    }

    fn tallies(&self) -> [Tally; 2] {
        self.queues.map(|queue| queue.counters().tally())
    }

    /// Ends everything, the way a hypervisor that shuts down does, and checks that nothing stays behind.
    fn wind_up(&mut self) {
        for device in 0..2 {
            self.apply(Op::Leave { device });
        }
        self.apply(Op::Drain);
        for device in 0..2 {
            while !self.apply(Op::Evict { device }).responses.is_empty() {}
            self.apply(Op::Remove { device });
        }
        for (queue, tally) in self.queues.into_iter().zip(self.tallies()) {
            assert_eq!(queue.outstanding(), 0, "a slot leaked");
            assert_eq!(tally.opened, tally.answered() + tally.discarded, "{tally:?}");
        }
        assert_eq!(self.broker.next_deadline_us(), None, "something still has a deadline");
        let seen = self.apply(Op::Pass { us: ASSEMBLY_LIMIT_US });
        assert_eq!(seen, Seen::default(), "an answer after departure");
    }
}

fn read(response: &PageResponse) -> (usize, u16, Outcome) {
    assert_eq!(response.tag.pasid, pasid());
    ((response.stream.0 as usize - 0x20) / 8, response.tag.index, response.outcome)
}

/// Runs `body` on a new broker.
fn with_real<R>(body: impl FnOnce(Real<'_>) -> R) -> R {
    let queues = FIRST.map(Queue::new);
    let attachments = Attachments::new();
    body(Real::new([&queues[0], &queues[1]], &attachments))
}

// The reference.

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Owner {
    Nobody,
    Live { queue: usize },
    Leaving { queue: usize },
}

#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Stage {
    /// Its last request has not come.
    Half,
    /// Its last request will be answered so, whatever comes before it. `closed`: it counts as discarded already.
    Spoilt { outcome: Outcome, closed: bool },
    /// It waits for its guest, who knows it once it has the cookie.
    Whole { due_us: u64, cookie: Option<Cookie> },
}

#[derive(Clone, Copy, Debug)]
struct Group {
    device: usize,
    index: u16,
    queue: usize,
    /// Where it is, unless it is spoilt.
    slot: u8,
    pages: usize,
    stage: Stage,
}

/// What is left of the groups that a slot had.
#[derive(Clone, Copy, Debug, Default)]
struct Past {
    /// The last cookie that a guest was told.
    cookie: Option<Cookie>,
    /// Whether the slot has been used since the group of that cookie ended.
    used_since: bool,
    /// The deadline of the last whole group, until its time comes.
    due_us: Option<u64>,
}

#[derive(Clone, Debug)]
struct Reference {
    now_us: u64,
    owners: [Owner; 2],
    groups: Vec<Group>,
    past: [[Past; SLOTS]; 2],
    tallies: [Tally; 2],
}

impl Reference {
    fn new() -> Self {
        Self {
            now_us: 0,
            owners: [Owner::Nobody; 2],
            groups: Vec::new(),
            past: Default::default(),
            tallies: Default::default(),
        }
    }

    /// The lowest slot that no group of `queue` is in.
    fn free_slot(&self, queue: usize) -> Option<u8> {
        let taken = |slot| self.groups.iter().any(|g| g.queue == queue && g.slot == slot && g.is_in_a_slot());
        (0..SLOTS as u8).find(|&slot| !taken(slot))
    }

    /// Takes out the groups that `gone` picks.
    fn take(&mut self, gone: impl Fn(&Group) -> bool) -> Vec<Group> {
        let (out, stay) = self.groups.iter().partition(|group| gone(group));
        self.groups = stay;
        out
    }

    fn is_live(&self, device: usize) -> bool {
        matches!(self.owners[device], Owner::Live { .. })
    }

    /// Does `op`, and returns what must be seen. A cookie that a guest is told, and the choice among groups that may
    /// all be evicted, are the broker's: they are taken from `real`.
    fn apply(&mut self, op: Op, real: &Seen) -> Seen {
        let mut seen = Seen::default();
        match op {
            Op::Request { device, index, last } => self.request(device, index, last, &mut seen),
            Op::Deliver { queue, slot } => {
                let cookies = self.cookies();
                let waits = |g: &&mut Group| {
                    (g.queue, g.slot) == (queue, slot) && matches!(g.stage, Stage::Whole { cookie: None, .. })
                };
                if let Some(group) = self.groups.iter_mut().find(waits)
                    && let Stage::Whole { cookie, .. } = &mut group.stage
                {
                    let told = real.delivered.map_or(Cookie(0), |(cookie, ..)| cookie);
                    assert!(!cookies.contains(&told), "{told:?} was used before");
                    *cookie = Some(told);
                    seen.delivered = Some((told, group.index, group.pages));
                    self.past[queue][usize::from(slot)].cookie = Some(told);
                    self.past[queue][usize::from(slot)].used_since = false;
                }
            }
            Op::Settle { queue, cookie, outcome } => {
                let named = |g: &Group| {
                    g.queue == queue
                        && matches!(g.stage, Stage::Whole { cookie: Some(of), .. } if of == cookie)
                };
                let settled = self.take(named);
                let success = outcome == Outcome::Success;
                for group in &settled {
                    *if success {
                        &mut self.tallies[queue].succeeded
                    } else {
                        &mut self.tallies[queue].declined
                    } += 1;
                    let outcome = if success { Outcome::Success } else { Outcome::Invalid };
                    seen.responses.push((group.device, group.index, outcome));
                }
                if settled.is_empty() {
                    seen.refused = Some(self.refuse_cookie(queue, cookie));
                }
            }
            Op::Pass { us } => {
                self.now_us += us;
                let now = self.now_us;
                if us >= ASSEMBLY_LIMIT_US {
                    for group in self.take(|g| !g.is_whole()) {
                        self.discard(&group);
                    }
                }
                for group in self.take(|g| matches!(g.stage, Stage::Whole { due_us, .. } if due_us <= now)) {
                    self.tallies[group.queue].expired += 1;
                    seen.responses.push((group.device, group.index, Outcome::Invalid));
                }
                for past in self.past.as_flattened_mut() {
                    past.due_us = past.due_us.filter(|&due_us| due_us > now);
                }
            }
            Op::Leave { device } => {
                if let Owner::Live { queue } = self.owners[device] {
                    self.owners[device] = Owner::Leaving { queue };
                }
            }
            Op::Drain => {
                let live = [0, 1].map(|device| self.is_live(device));
                for group in self.take(|g| !g.is_whole() && !live[g.device]) {
                    self.discard(&group);
                }
            }
            Op::Evict { device } => {
                let whole = |g: &&Group| g.device == device && g.is_whole();
                let chosen = real.responses.first().map(|&(_, index, _)| index);
                let mut candidates = self.groups.iter().filter(whole).map(|g| g.index);
                let index = candidates.clone().find(|&i| Some(i) == chosen).or_else(|| candidates.next());
                for group in self.take(|g| g.device == device && Some(g.index) == index) {
                    self.tallies[group.queue].evicted += 1;
                    seen.responses.push((device, group.index, Outcome::Invalid));
                }
            }
            Op::Remove { device } => self.owners[device] = Owner::Nobody,
            Op::Add { device, queue } => self.owners[device] = Owner::Live { queue },
            Op::Overflow => {
                for group in &mut self.groups {
                    let closed = match group.stage {
                        Stage::Whole { .. } => continue,
                        Stage::Spoilt { closed, .. } => closed,
                        Stage::Half => {
                            self.tallies[group.queue].discarded += 1;
                            true
                        }
                    };
                    group.stage = Stage::Spoilt { outcome: Outcome::Success, closed };
                }
            }
        }
        seen
    }

    fn request(&mut self, device: usize, index: u16, last: bool, seen: &mut Seen) {
        let at = self.groups.iter().position(|g| (g.device, g.index) == (device, index));
        let answer = |seen: &mut Seen, outcome| {
            if last {
                seen.responses.push((device, index, outcome));
            }
        };
        match at.map(|at| (at, self.groups[at].stage)) {
            Some((at, Stage::Spoilt { outcome, closed })) => {
                answer(seen, outcome);
                if last {
                    let group = self.groups.remove(at);
                    self.tallies[group.queue].refused += u64::from(!closed);
                }
                return;
            }
            Some((at, Stage::Half)) if self.is_live(device) => {
                self.groups[at].pages += 1;
                if last {
                    self.forward(at, seen);
                }
                return;
            }
            Some((at, Stage::Half)) => {
                let group = self.groups.remove(at);
                return self.refuse(group, last, seen);
            }
            Some((_, Stage::Whole { .. })) | None => {}
        }
        let Owner::Live { queue } = self.owners[device] else { return answer(seen, Outcome::Invalid) };
        if at.is_some() {
            self.tallies[queue].duplicates += 1;
            return;
        }
        self.tallies[queue].opened += 1;
        let mut group = Group { device, index, queue, slot: 0, pages: 1, stage: Stage::Half };
        let outstanding = self.groups.iter().filter(|g| g.device == device && g.is_in_a_slot()).count();
        match self.free_slot(queue) {
            Some(slot) if outstanding < BUDGET[device] => {
                group.slot = slot;
                self.past[queue][usize::from(slot)].used_since = true;
                self.groups.push(group);
                if last {
                    self.forward(self.groups.len() - 1, seen);
                }
            }
            _ => self.refuse(group, last, seen),
        }
    }

    fn forward(&mut self, at: usize, seen: &mut Seen) {
        let Group { device, queue, slot, .. } = self.groups[at];
        let due_us = self.now_us + DEADLINE_US[device];
        self.groups[at].stage = Stage::Whole { due_us, cookie: None };
        self.past[queue][usize::from(slot)].due_us = Some(due_us);
        seen.forwarded = Some((queue, slot));
    }

    /// Refuses a group, with this request if it is the last, else when that comes.
    fn refuse(&mut self, group: Group, last: bool, seen: &mut Seen) {
        if last {
            self.tallies[group.queue].refused += 1;
            seen.responses.push((group.device, group.index, Outcome::Invalid));
        } else {
            let stage = Stage::Spoilt { outcome: Outcome::Invalid, closed: false };
            self.groups.push(Group { stage, ..group });
        }
    }

    fn discard(&mut self, group: &Group) {
        let closed = matches!(group.stage, Stage::Spoilt { closed: true, .. });
        self.tallies[group.queue].discarded += u64::from(!closed);
    }

    /// Every cookie that is known.
    fn cookies(&self) -> Vec<Cookie> {
        self.past.as_flattened().iter().filter_map(|past| past.cookie).collect()
    }

    fn refuse_cookie(&mut self, queue: usize, cookie: Cookie) -> Refusal {
        let tally = &mut self.tallies[queue];
        let Some(past) = self.past[queue].get((cookie.0 & 0xFF) as usize) else {
            tally.out_of_range += 1;
            return Refusal::OutOfRange;
        };
        if past.cookie == Some(cookie) && !past.used_since {
            tally.late += 1;
            Refusal::Late
        } else if past.cookie == Some(cookie) || cookie.0 >> 8 < FIRST[queue] {
            // An earlier group's, or from before the first.
            tally.stale += 1;
            Refusal::Stale
        } else {
            tally.unknown += 1;
            Refusal::Unknown
        }
    }

    /// Everything that may happen now, to `devices` devices and `queues` guests.
    fn operations(&self, devices: usize, queues: usize) -> Vec<Op> {
        let mut ops = vec![Op::Pass { us: TICK_US }, Op::Pass { us: ASSEMBLY_LIMIT_US }, Op::Overflow];
        for device in 0..devices {
            for (index, last) in [(0, false), (0, true), (1, false), (1, true)] {
                let half = |g: &Group| (g.device, g.index, g.stage) == (device, index, Stage::Half);
                // Two pages are enough.
                if last || !self.is_live(device) || !self.groups.iter().any(half) {
                    ops.push(Op::Request { device, index, last });
                }
            }
            match self.owners[device] {
                Owner::Nobody => ops.extend((0..queues).map(|queue| Op::Add { device, queue })),
                Owner::Live { .. } => ops.push(Op::Leave { device }),
                Owner::Leaving { .. } if self.groups.iter().all(|g| g.device != device) => {
                    ops.push(Op::Remove { device });
                }
                Owner::Leaving { .. } => ops.extend([Op::Drain, Op::Evict { device }]),
            }
        }
        for (queue, first) in FIRST.into_iter().enumerate().take(queues) {
            let mut settle = |cookie, outcome| ops.push(Op::Settle { queue, cookie, outcome });
            let past = |queue: usize| self.past[queue].iter().filter_map(|past| past.cookie);
            for cookie in past(queue) {
                settle(cookie, Outcome::Success);
                settle(cookie, Outcome::Invalid);
            }
            past(1 - queue).for_each(|foreign| settle(foreign, Outcome::Success));
            settle(Cookie(FORGED << 8), Outcome::Success);
            settle(Cookie(first << 8 | SLOTS as u64), Outcome::Success);
            ops.extend((0..SLOTS as u8).map(|slot| Op::Deliver { queue, slot }));
        }
        ops
    }

    /// Every group that was opened was answered, was discarded, or is there.
    fn assert_balance(&self) {
        for (queue, tally) in self.tallies.iter().enumerate() {
            let closed = |g: &&Group| matches!(g.stage, Stage::Spoilt { closed: true, .. });
            let there = self.groups.iter().filter(|g| g.queue == queue && !closed(g)).count() as u64;
            assert_eq!(tally.opened, tally.answered() + tally.discarded + there, "{self:?}");
        }
    }

    /// What tells this state from others.
    fn key(&self) -> Key {
        let after = |due_us: u64| due_us.saturating_sub(self.now_us);
        let groups = [0, 1].map(|device| {
            let of = self.groups.iter().filter(|g| g.device == device);
            let mut groups: Vec<_> = of
                .map(|g| {
                    let (slot, pages) = if g.is_in_a_slot() { (g.slot, g.pages) } else { (0, 0) };
                    let (kind, known, left) = match g.stage {
                        Stage::Half => (0, false, 0),
                        Stage::Spoilt { outcome, closed } => {
                            (1 + u8::from(closed), outcome == Outcome::Success, 0)
                        }
                        Stage::Whole { due_us, cookie } => (3, cookie.is_some(), after(due_us)),
                    };
                    (g.queue, slot, pages, kind, known, left)
                })
                .collect();
            groups.sort_unstable();
            groups
        });
        let past = self
            .past
            .map(|queue| queue.map(|past| (past.cookie.is_some(), past.used_since, past.due_us.map(after))));
        (self.owners, groups, past)
    }
}

type GroupKey = (usize, u8, usize, u8, bool, u64);
type Key = ([Owner; 2], [Vec<GroupKey>; 2], [[(bool, bool, Option<u64>); SLOTS]; 2]);

impl Group {
    fn is_whole(&self) -> bool {
        matches!(self.stage, Stage::Whole { .. })
    }

    fn is_in_a_slot(&self) -> bool {
        !matches!(self.stage, Stage::Spoilt { .. })
    }
}

// The search.

/// A part of the small world, and how far to go in it.
struct World {
    devices: usize,
    queues: usize,
    /// What happens before the search begins.
    start: Vec<Op>,
    /// Operations, at most.
    depth: usize,
}

struct Visited {
    states: usize,
    transitions: usize,
    /// Whether nothing new was left when the search ended.
    complete: bool,
}

/// Does `op` after `path` on a new broker, compares with the reference, and returns the reference's state. A state
/// that `known` does not have is wound up.
fn step(path: &[Op], before: &Reference, op: Op, known: &mut HashSet<Key>) -> (Reference, bool) {
    let mut after = before.clone();
    let new = with_real(|mut real| {
        path.iter().for_each(|&op| drop(real.apply(op)));
        let mut seen = real.apply(op);
        let mut expected = after.apply(op, &seen);
        // In which order groups expire is nobody's business.
        seen.responses.sort_unstable_by_key(|&(device, index, _)| (device, index));
        expected.responses.sort_unstable_by_key(|&(device, index, _)| (device, index));
        assert_eq!(seen, expected, "{op:?} after {path:?}");
        assert_eq!(real.tallies(), after.tallies, "{op:?} after {path:?}");
        after.assert_balance();
        let new = known.insert(after.key());
        if new {
            real.wind_up();
        }
        new
    });
    (after, new)
}

fn visit(world: World) -> Visited {
    let (mut path, mut reference) = (Vec::new(), Reference::new());
    let mut known = HashSet::from([reference.key()]);
    for op in world.start {
        reference = step(&path, &reference, op, &mut known).0;
        path.push(op);
    }
    let mut level = vec![(path, reference)];
    let mut visited = Visited { states: 1, transitions: 0, complete: false };
    for _ in 0..world.depth {
        let mut next = Vec::new();
        for (path, reference) in level {
            for op in reference.operations(world.devices, world.queues) {
                visited.transitions += 1;
                let (after, new) = step(&path, &reference, op, &mut known);
                if new {
                    next.push(([&path[..], &[op]].concat(), after));
                }
            }
        }
        visited.states += next.len();
        level = next;
        if level.is_empty() {
            visited.complete = true;
            break;
        }
    }
    let Visited { states, transitions, complete } = visited;
    println!("{states} states, {transitions} transitions, {}", if complete { "all" } else { "cut off" });
    visited
}

#[test]
fn one_device_of_one_guest_behaves_in_every_state_there_is() {
    let visited = visit(World { devices: 1, queues: 1, start: Vec::new(), depth: usize::MAX });

    assert!(visited.complete && visited.states > 1_000 && visited.transitions > 15_000);
}

#[test]
fn one_device_behaves_when_it_changes_hands() {
    let start = vec![Op::Add { device: 0, queue: 0 }];
    let visited = visit(World { devices: 1, queues: 2, start, depth: 13 });

    assert!(visited.states > 5_000 && visited.transitions > 50_000);
}

#[test]
fn two_devices_of_one_guest_behave_when_they_share_its_slots() {
    let start = [0, 1].map(|device| Op::Add { device, queue: 0 }).to_vec();
    let visited = visit(World { devices: 2, queues: 1, start, depth: 9 });

    assert!(visited.states > 10_000 && visited.transitions > 100_000);
}

#[test]
fn two_devices_of_two_guests_do_not_disturb_each_other() {
    let start = [0, 1].map(|device| Op::Add { device, queue: device }).to_vec();
    let visited = visit(World { devices: 2, queues: 2, start, depth: 8 });

    assert!(visited.states > 10_000 && visited.transitions > 100_000);
}
