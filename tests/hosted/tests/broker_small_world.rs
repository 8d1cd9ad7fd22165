//! Every state of a small world: two devices, two guests with a queue of three slots each.
//!
//! A breadth-first search does every operation in every state that can be reached, on the broker and on a
//! reference that is a list of groups, and compares what comes out: answers, deliveries, counts, slots and
//! requests in use. For each state the broker is made anew and led there again. The search ends when there is
//! no state left that it has not seen.
//!
//! What the world is bounded by:
//!
//! - each device has one PASID, two group numbers, and two page requests that may be outstanding; it is
//!   attached once;
//! - a deadline has come or not: `Wait` lets those of all whole groups come, `Stall` those of half-seen ones
//!   as well;
//! - each request is for another page, so no answer is held back; in a world of its own one device asks for
//!   one page again and again, and a guest that is doubted four times claims nothing any more;
//! - expiries restrain nobody (`broker_devices.rs` has that), a response failure does;
//! - an answer is sent at once (`broker_interleaved.rs` does something else in between);
//! - a departure has two steps: what stops admission, and the drain with the evictions and what comes after.
//!
//! States that differ only in how groups, devices and guests are numbered, in counts, in the order of slots,
//! and in what is still to be skipped of groups that were answered (an announcement, a timer), are the same.
//! In each state the cookie that each slot had before is tried, those that the way there used up, those of
//! the other guest, and some that never were.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use broker::{
    AttachmentId, Broker, Cookie, DeviceId, Escalation, Expiry, Inbox, Ledger, Limits, POISONED, Policy,
    QueueId, Refusal, Requests, Settled, Tally, Verdict, Whose,
};
use heapless::{Vec as Few, spsc};
use iommu::{GroupTag, Iova, Outcome, PAGE_SIZE, PageRequest, PageResponse, Pasid, Perms, StreamId};
use std::{collections::HashSet, thread};

const DEVICES: usize = 2;
const QUEUES: usize = 2;
const SLOTS: usize = 3;
const INDICES: usize = 2;
/// Page requests that a device may have outstanding.
const REQUESTS: u8 = 2;

/// Doubts above which a guest does not claim repairs any more, in the world of one page.
const DOUBT: u8 = 3;

/// How long a guest may take; an answer that is held back is so for as long.
const DEADLINE_US: u64 = 1_000;
/// Long enough for every guest's deadline, and far too short for a half-seen group's.
const WAIT_US: u64 = 3_000;
/// Long enough for everything.
const STALL_US: u64 = 1_100_000;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Op {
    /// A device asks for one more page in a group.
    Request { device: usize, index: usize, last: bool },
    /// Hardware lost an unknown number of requests.
    Overflow,
    /// A guest reads everything that it was sent.
    Deliver { queue: usize },
    /// A guest answers a group that it has read.
    Answer { device: usize, index: usize, outcome: Outcome },
    /// The deadlines of all whole groups come.
    Wait,
    /// What is due is ended.
    Expire,
    /// All deadlines come, and what is due is ended.
    Stall,
    /// A device is attached to a guest's queue.
    Attach { device: usize, queue: usize },
    /// A detach begins.
    Leave { device: usize },
    /// A detach goes on: drain, evict, detach.
    Depart { device: usize },
    /// A guest begins to die.
    Shut { queue: usize },
    /// A guest dies, and another one gets its queue: drain, evict, close, open.
    Die { queue: usize },
    /// A reset begins.
    Quiesce { device: usize },
    /// A reset goes on: drain, evict, resume.
    Reset { device: usize },
}

/// What came of an operation.
#[derive(Debug, Default, Eq, PartialEq)]
struct Seen {
    /// What hardware was told, by device and group number.
    responses: Few<(usize, usize, Outcome), 4>,
    /// What a guest read, by device and group number, with the number of pages.
    delivered: Few<(usize, usize, u8), 4>,
}

impl Seen {
    fn respond(&mut self, device: usize, index: usize, outcome: Outcome) {
        self.responses.push((device, index, outcome)).expect("there are four groups");
    }

    /// In which order groups are ended or read is nobody's business.
    fn sorted(mut self) -> Self {
        self.responses.sort_unstable_by_key(|&(device, index, _)| (device, index));
        self.delivered.sort_unstable();
        self
    }
}

// The reference.

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    Half,
    /// Its last request will be refused.
    Poisoned,
    /// Lost in an overflow: its last request will be answered with success.
    Lost,
    Waiting,
    Delivered,
    /// Its guest answered with success, which is held back.
    Held,
    /// The device used its number again: it will be refused.
    Doubled,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Group {
    stage: Stage,
    pages: u8,
    is_due: bool,
    /// Its guest is doubted: a success that comes before it is due is held back until then.
    is_doubted: bool,
}

impl Group {
    fn new(stage: Stage, pages: u8) -> Self {
        Self { stage, pages, is_due: false, is_doubted: false }
    }

    fn is_whole(self) -> bool {
        matches!(self.stage, Stage::Waiting | Stage::Delivered | Stage::Held | Stage::Doubled)
    }

    fn has_slot(self) -> bool {
        self.is_whole() || self.stage == Stage::Half
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Attached {
    No,
    To(usize),
    Leaving(usize),
    /// To a queue that is no more.
    ToNone,
    LeavingNone,
}

/// One device, and the groups that it knows of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Device {
    attached: Attached,
    is_quiesced: bool,
    /// A guest answered with a response failure.
    is_off: bool,
    groups: [Option<Group>; INDICES],
    /// A guest said that it repaired the page that is asked for again and again, and it was not asked for
    /// since.
    is_claimed: bool,
    /// How often such claims were none, less how often pages were asked for without.
    doubt: u8,
    tally: Tally,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Reference {
    devices: [Device; DEVICES],
    is_shut: [bool; QUEUES],
    /// All requests are for one page.
    has_one_page: bool,
}

impl Device {
    fn queue(&self) -> Option<usize> {
        match self.attached {
            Attached::To(queue) | Attached::Leaving(queue) => Some(queue),
            _ => None,
        }
    }

    fn groups(&self) -> impl Iterator<Item = Group> {
        self.groups.iter().flatten().copied()
    }

    /// Returns the page requests that are outstanding.
    fn pages(&self) -> u8 {
        self.groups().filter(|group| group.has_slot()).map(|group| group.pages).sum()
    }

    /// A group is whole.
    fn ask(&mut self, index: usize) {
        if core::mem::take(&mut self.is_claimed) {
            self.tally.unrepaired += 1;
            self.doubt += 1;
        } else {
            self.doubt = self.doubt.saturating_sub(1);
        }
        if let Some(group) = &mut self.groups[index] {
            group.is_doubted = self.doubt >= 2;
        }
    }

    fn slots(&self) -> usize {
        self.groups().filter(|group| group.has_slot()).count()
    }

    /// Every group that was opened is answered, waits, or was discarded.
    fn assert_balance(&self) {
        let waiting = self.groups().filter(|group| group.stage != Stage::Lost).count() as u64;
        assert_eq!(self.tally.opened, self.tally.answered() + waiting + self.tally.discarded, "{self:?}");
    }
}

impl Reference {
    fn new(has_one_page: bool) -> Self {
        let device = Device {
            attached: Attached::No,
            is_quiesced: false,
            is_off: false,
            groups: [None; INDICES],
            is_claimed: false,
            doubt: 0,
            tally: Tally::default(),
        };
        Self { devices: [device; DEVICES], is_shut: [false; QUEUES], has_one_page }
    }

    /// Returns whether nothing but counts differs.
    fn is_same(&self, other: &Self) -> bool {
        let mut counted = *other;
        for (device, own) in counted.devices.iter_mut().zip(&self.devices) {
            device.tally = own.tally;
        }
        counted == *self
    }

    fn slots(&self, queue: usize) -> usize {
        self.devices.iter().filter(|device| device.queue() == Some(queue)).map(Device::slots).sum()
    }

    /// Returns whether the requests of a device are wanted where they would go.
    fn is_wanted(&self, device: usize) -> bool {
        let Device { attached, is_quiesced, .. } = self.devices[device];
        matches!(attached, Attached::To(queue) if !self.is_shut[queue]) && !is_quiesced
    }

    fn request(&mut self, at: usize, index: usize, last: bool, seen: &mut Seen) {
        let is_wanted = self.is_wanted(at);
        let has_room = self.devices[at].queue().is_some_and(|queue| self.slots(queue) < SLOTS);
        let device = &mut self.devices[at];
        let is_within_budget = !device.is_off && device.pages() < REQUESTS;
        let is_owned = matches!(device.attached, Attached::To(_) | Attached::ToNone);
        let group = &mut device.groups[index];
        let tally = &mut device.tally;
        if group.is_none() && !is_owned && device.is_quiesced {
            // Nobody is there to count it.
            if last {
                seen.respond(at, index, Outcome::Invalid);
            }
            return;
        }
        tally.requests += 1;
        let refuse = match *group {
            None if !is_owned => {
                if last {
                    tally.opened += 1;
                    tally.refused += 1;
                    seen.respond(at, index, Outcome::Invalid);
                }
                return;
            }
            None => {
                tally.opened += 1;
                let is_admitted = is_wanted && is_within_budget && has_room;
                let stage = if last { Stage::Waiting } else { Stage::Half };
                *group = is_admitted.then_some(Group::new(stage, 1));
                !is_admitted
            }
            Some(Group { stage: Stage::Half, pages, .. }) => {
                let is_admitted = is_wanted && is_within_budget;
                let stage = if last { Stage::Waiting } else { Stage::Half };
                *group = is_admitted.then_some(Group::new(stage, pages + 1));
                !is_admitted
            }
            Some(Group { stage: Stage::Poisoned, .. }) if last => {
                *group = None;
                true
            }
            Some(Group { stage: Stage::Poisoned, .. }) => false,
            Some(Group { stage: Stage::Lost, .. }) => {
                if last {
                    *group = None;
                    seen.respond(at, index, Outcome::Success);
                }
                false
            }
            Some(whole) => {
                tally.duplicates += 1;
                *group = (!last).then_some(Group { stage: Stage::Doubled, ..whole });
                tally.poisoned += u64::from(last);
                last
            }
        };
        if refuse && last {
            tally.refused += 1;
            seen.respond(at, index, Outcome::Invalid);
        } else if refuse {
            tally.poisoned += 1;
            *group = Some(Group::new(Stage::Poisoned, 0));
        } else if group.is_some_and(|group| group.stage == Stage::Waiting) {
            device.ask(index);
        }
    }

    /// Ends all groups that `which` says, as nobody answered them in time.
    fn expire(&mut self, which: impl Fn(Group) -> bool, seen: &mut Seen) {
        for (at, device) in self.devices.iter_mut().enumerate() {
            for (index, place) in device.groups.iter_mut().enumerate() {
                let Some(group) = place.take_if(|group| which(*group)) else { continue };
                match group.stage {
                    Stage::Waiting | Stage::Delivered => device.tally.expired += 1,
                    Stage::Held => {
                        device.tally.succeeded += 1;
                        device.is_claimed = self.has_one_page;
                    }
                    Stage::Doubled => {
                        device.tally.poisoned += 1;
                        device.tally.refused += 1;
                    }
                    Stage::Half | Stage::Poisoned => device.tally.discarded += 1,
                    Stage::Lost => {}
                }
                let is_held = group.stage == Stage::Held;
                if group.is_whole() {
                    seen.respond(at, index, if is_held { Outcome::Success } else { Outcome::Invalid });
                }
            }
        }
    }

    /// Forgets what is half-seen and not wanted any more.
    fn drain(&mut self) {
        for at in 0..DEVICES {
            if self.is_wanted(at) {
                continue;
            }
            let device = &mut self.devices[at];
            for place in &mut device.groups {
                if let Some(group) = place.take_if(|group| !group.is_whole()) {
                    device.tally.discarded += u64::from(group.stage != Stage::Lost);
                }
            }
        }
    }

    /// Answers all whole groups of a device.
    fn evict(&mut self, at: usize, seen: &mut Seen) {
        let device = &mut self.devices[at];
        for (index, place) in device.groups.iter_mut().enumerate() {
            if place.take_if(|group| group.is_whole()).is_some() {
                device.tally.evicted += 1;
                seen.respond(at, index, Outcome::Invalid);
            }
        }
    }

    fn apply(&mut self, op: Op) -> Seen {
        let mut seen = Seen::default();
        match op {
            Op::Request { device, index, last } => self.request(device, index, last, &mut seen),
            Op::Overflow => {
                for device in &mut self.devices {
                    for group in device.groups.iter_mut().flatten() {
                        if matches!(group.stage, Stage::Half | Stage::Poisoned) {
                            *group = Group::new(Stage::Lost, 0);
                            device.tally.discarded += 1;
                        }
                    }
                }
            }
            Op::Deliver { queue } => {
                for (at, device) in self.devices.iter_mut().enumerate() {
                    if device.queue() != Some(queue) {
                        continue;
                    }
                    for (index, group) in device.groups.iter_mut().enumerate() {
                        if let Some(group) = group.as_mut().filter(|group| group.stage == Stage::Waiting) {
                            group.stage = Stage::Delivered;
                            seen.delivered.push((at, index, group.pages)).expect("there are four");
                        }
                    }
                }
            }
            Op::Answer { device: at, index, outcome } => {
                let device = &mut self.devices[at];
                if outcome == Outcome::Success
                    && let Some(group) = device.groups[index].as_mut()
                    && group.is_doubted
                    && !group.is_due
                {
                    group.stage = Stage::Held;
                    device.tally.held += 1;
                    return seen;
                }
                device.groups[index] = None;
                match outcome {
                    Outcome::Success => {
                        device.tally.succeeded += 1;
                        device.is_claimed = self.has_one_page;
                    }
                    Outcome::Invalid => device.tally.declined += 1,
                    Outcome::Failure => {
                        device.tally.failed += 1;
                        device.is_off = true;
                    }
                }
                let told = if outcome == Outcome::Failure { Outcome::Invalid } else { outcome };
                seen.respond(at, index, told);
            }
            Op::Wait => {
                let groups = self.devices.iter_mut().flat_map(|device| device.groups.iter_mut().flatten());
                groups.filter(|group| group.is_whole()).for_each(|group| group.is_due = true);
            }
            Op::Expire => self.expire(|group| group.is_due, &mut seen),
            Op::Stall => self.expire(|_| true, &mut seen),
            Op::Attach { device, queue } => self.devices[device].attached = Attached::To(queue),
            Op::Leave { device } => {
                let attached = &mut self.devices[device].attached;
                *attached = match *attached {
                    Attached::To(queue) => Attached::Leaving(queue),
                    _ => Attached::LeavingNone,
                };
            }
            Op::Depart { device } => {
                self.drain();
                self.evict(device, &mut seen);
                self.devices[device].attached = Attached::No;
            }
            Op::Shut { queue } => self.is_shut[queue] = true,
            Op::Die { queue } => {
                self.drain();
                for device in 0..DEVICES {
                    if self.devices[device].queue() != Some(queue) {
                        continue;
                    }
                    self.evict(device, &mut seen);
                    let attached = &mut self.devices[device].attached;
                    let is_leaving = matches!(*attached, Attached::Leaving(_));
                    *attached = if is_leaving { Attached::LeavingNone } else { Attached::ToNone };
                }
                self.is_shut[queue] = false;
            }
            Op::Quiesce { device } => self.devices[device].is_quiesced = true,
            Op::Reset { device } => {
                self.drain();
                self.evict(device, &mut seen);
                let device = &mut self.devices[device];
                (device.is_quiesced, device.is_off) = (false, false);
                (device.is_claimed, device.doubt) = (false, 0);
            }
        }
        seen
    }

    /// Does `f` for each operation that means something here.
    fn operations(&self, world: World) -> Vec<Op> {
        let mut ops = Vec::with_capacity(40);
        for device in 0..world.devices {
            let Device { attached, is_quiesced, groups, doubt, .. } = self.devices[device];
            for (index, group) in groups.iter().enumerate() {
                ops.push(Op::Request { device, index, last: false });
                ops.push(Op::Request { device, index, last: true });
                if group.is_some_and(|group| group.stage == Stage::Delivered) {
                    let outcomes = [Outcome::Success, Outcome::Invalid, Outcome::Failure];
                    for &outcome in &outcomes[usize::from(doubt >= DOUBT)..] {
                        ops.push(Op::Answer { device, index, outcome });
                    }
                }
            }
            match attached {
                Attached::No => {
                    let open = (0..world.queues).filter(|&queue| !self.is_shut[queue]);
                    ops.extend(open.map(|queue| Op::Attach { device, queue }));
                }
                Attached::To(_) | Attached::ToNone => ops.push(Op::Leave { device }),
                Attached::Leaving(_) | Attached::LeavingNone => ops.push(Op::Depart { device }),
            }
            ops.push(if is_quiesced { Op::Reset { device } } else { Op::Quiesce { device } });
        }
        for queue in 0..world.queues {
            ops.push(Op::Deliver { queue });
            ops.push(if self.is_shut[queue] { Op::Die { queue } } else { Op::Shut { queue } });
        }
        ops.extend([Op::Overflow, Op::Wait, Op::Expire, Op::Stall]);
        ops
    }

    /// Returns what the future depends on, the same for states that differ in numbers alone.
    fn key(&self) -> u64 {
        let device = |at: usize, is_swapped: bool| {
            let Device { attached, is_quiesced, is_off, groups, is_claimed, doubt, .. } = self.devices[at];
            let queue = |queue: usize| (queue ^ usize::from(is_swapped)) as u64;
            let attached = match attached {
                Attached::No => 0,
                Attached::To(to) => 1 + queue(to),
                Attached::Leaving(to) => 3 + queue(to),
                Attached::ToNone => 5,
                Attached::LeavingNone => 6,
            };
            let mut groups = groups.map(|group| {
                group.map_or(0, |Group { stage, pages, is_due, is_doubted }| {
                    let stage = stage as u64 + 1;
                    stage << 4 | u64::from(pages) << 2 | u64::from(is_due) << 1 | u64::from(is_doubted)
                })
            });
            groups.sort_unstable();
            let flags = u64::from(is_quiesced) << 2 | u64::from(is_off) << 1 | u64::from(is_claimed);
            assert!(doubt < 8 && groups[1] < 1 << 7);
            groups[0] << 16 | groups[1] << 9 | attached << 6 | flags << 3 | u64::from(doubt)
        };
        let keys = [false, true].map(|is_swapped| {
            let mut devices = [0, 1].map(|at| device(at, is_swapped));
            devices.sort_unstable();
            let shut = |at: usize| u64::from(self.is_shut[at ^ usize::from(is_swapped)]);
            devices[0] << 32 | devices[1] << 2 | shut(0) << 1 | shut(1)
        });
        keys[0].min(keys[1])
    }
}

// The broker.

type Hv = Ledger<QUEUES, SLOTS, 8, 8>;
const PLACES: usize = QUEUES * (SLOTS + POISONED);

/// The broker, and everything around it.
struct Real<'l, 'b> {
    ledger: &'l Hv,
    broker: &'b mut Broker<'l, QUEUES, SLOTS, 8, 8, PLACES>,
    inboxes: [Inbox<'l, QUEUES, SLOTS, 8, 8>; QUEUES],
    queues: [QueueId; QUEUES],
    devices: [DeviceId; DEVICES],
    attachments: [Option<(AttachmentId, usize)>; DEVICES],
    now_us: u64,
    has_one_page: bool,
    /// The page that was asked for last, of whomever.
    page: u64,
    /// The pages that were asked for last in each group.
    asked: [[[u64; REQUESTS as usize]; INDICES]; DEVICES],
    /// What each group was told as last.
    cookies: [[Option<Cookie>; INDICES]; DEVICES],
    /// Every cookie that was told, with its queue.
    told: Few<(usize, Cookie), 64>,
    overflows: u64,
}

fn stream(device: usize) -> StreamId {
    StreamId(0x20 + 8 * device as u32)
}

fn name(device: usize) -> u32 {
    0x70 + device as u32
}

/// A queue's owner; another one each time that it is opened.
fn owner(queue: usize, now_us: u64) -> broker::Owner {
    broker::Owner::Guest((queue as u64 + now_us) as u16)
}

fn tag(index: usize) -> GroupTag {
    GroupTag { pasid: Pasid::new(5), index: index as u16 }
}

/// Lets `body` have a new broker.
fn with_real<R>(has_one_page: bool, body: impl FnOnce(&mut Real<'_, '_>) -> R) -> R {
    let ledger = Hv::new(64);
    let mut broker = Broker::new(&ledger);
    let mut rings: [spsc::Queue<u16, { SLOTS + 1 }>; QUEUES] = [const { spsc::Queue::new() }; QUEUES];
    let [first, second] = &mut rings;
    let inboxes = [(0, first), (1, second)].map(|(queue, ring)| {
        let (producer, consumer) = ring.split();
        broker.connect(queue, producer).expect("it holds three slots");
        Inbox::new(&ledger, queue, consumer)
    });
    let limits = Limits {
        deadline_us: DEADLINE_US,
        escalation: Escalation { warn: 0, throttle: 0, requests_off: 0, block: 0 },
        ..Limits::with_requests(REQUESTS.into())
    };
    let queues = [0, 1].map(|queue| ledger.open(owner(queue, 0)).expect("there are two"));
    let devices = [0, 1].map(|device| ledger.add_device(stream(device), &limits).expect("there is room"));
    body(&mut Real {
        ledger: &ledger,
        broker: &mut broker,
        inboxes,
        queues,
        devices,
        attachments: [None; DEVICES],
        now_us: 0,
        has_one_page,
        page: 0,
        asked: Default::default(),
        cookies: Default::default(),
        told: Few::new(),
        overflows: 0,
    })
}

fn note(seen: &mut Seen, response: &PageResponse) {
    let device = (response.stream.0 as usize - 0x20) / 8;
    let index = usize::from(response.tag.index);
    assert_eq!((response.stream, response.tag), (stream(device), tag(index)));
    seen.respond(device, index, response.outcome);
}

fn send(seen: &mut Seen, answer: broker::Answer<'_, SLOTS>) {
    let sent = answer.send(|response| {
        note(seen, &response);
        Ok::<(), (PageResponse, ())>(())
    });
    assert!(sent.is_ok());
}

impl Real<'_, '_> {
    /// Lets each guest have had one cookie of each of its slots: a third device asked, was answered, and is
    /// gone.
    fn use_up_cookies(&mut self) {
        let gone = stream(DEVICES);
        let limits = Limits::with_requests(SLOTS as u32);
        for queue in 0..QUEUES {
            let device = self.ledger.add_device(gone, &limits).expect("there is room");
            let requests = Requests::Plain;
            let policy = Policy {
                stream: gone,
                requests,
                device,
                queue: self.queues[queue],
                name: name(DEVICES),
                opaque: 0,
            };
            let attachment = self.ledger.attach(&policy).expect("there is room");
            for index in 0..SLOTS as u16 {
                let tag = GroupTag { pasid: None, index };
                let (iova, perms) = (Iova(0), Perms::READ);
                let request = PageRequest { stream: gone, tag, iova, perms, last: true };
                assert_eq!(self.broker.admit(&request, self.now_us), Verdict::Forward { queue });
            }
            while let Some(group) = self.inboxes[queue].next(self.now_us) {
                let settled =
                    self.ledger.settle(self.queues[queue], group.cookie, Outcome::Invalid, self.now_us);
                let Ok(Settled::Now(answer)) = settled else { panic!("it is outstanding: {settled:?}") };
                assert!(answer.send(|_| Ok::<(), (PageResponse, ())>(())).is_ok());
                self.told.push((queue, group.cookie)).expect("there are six");
            }
            self.ledger.leave(attachment);
            self.ledger.detach(attachment);
            self.ledger.remove_device(device);
        }
        assert_eq!(self.told.len(), QUEUES * SLOTS);
    }

    fn expire(&mut self, seen: &mut Seen) {
        loop {
            match self.broker.expire(self.now_us) {
                Expiry::Expired { answer, restraint, .. } => {
                    assert_eq!(restraint, None);
                    send(seen, answer);
                }
                Expiry::Held(answer) => send(seen, answer),
                Expiry::Nothing => {}
                Expiry::Done => return,
            }
        }
    }

    fn evict(&mut self, queue: usize, whose: Whose, seen: &mut Seen) {
        while let Some(answer) = self.ledger.evict(self.queues[queue], whose, self.now_us) {
            send(seen, answer);
        }
    }

    fn apply(&mut self, op: Op) -> Seen {
        let mut seen = Seen::default();
        match op {
            Op::Request { device, index, last } => {
                self.page += u64::from(!self.has_one_page);
                let asked = &mut self.asked[device][index];
                *asked = [asked[1], self.page];
                let iova = Iova(self.page * PAGE_SIZE);
                let request = PageRequest {
                    stream: stream(device),
                    tag: tag(index),
                    iova,
                    perms: Perms::READ_WRITE,
                    last,
                };
                match self.broker.admit(&request, self.now_us) {
                    Verdict::Refuse(response) => note(&mut seen, &response),
                    Verdict::End(answer) => send(&mut seen, answer),
                    Verdict::Nothing => assert!(!last, "a last request is never left"),
                    Verdict::Forward { .. } => assert!(last, "a group is not whole before its last request"),
                }
            }
            Op::Overflow => {
                self.broker.overflowed(self.now_us);
                self.overflows += 1;
                assert_eq!(self.ledger.overflows(), self.overflows);
            }
            Op::Deliver { queue } => {
                while let Some(group) = self.inboxes[queue].next(self.now_us) {
                    let device = (group.name - name(0)) as usize;
                    let index = usize::from(group.tag.index);
                    assert_eq!((group.opaque, group.tag), (device as u64 ^ 0xFEED, tag(index)));
                    let asked = &self.asked[device][index][usize::from(REQUESTS) - group.pages.len()..];
                    assert!(
                        group.pages.iter().map(|page| page.iova().0 / PAGE_SIZE).eq(asked.iter().copied())
                    );
                    self.cookies[device][index] = Some(group.cookie);
                    self.told.push((queue, group.cookie)).expect("a path is short");
                    seen.delivered.push((device, index, group.pages.len() as u8)).expect("there are four");
                }
            }
            Op::Answer { device, index, outcome } => {
                let cookie = self.cookies[device][index].expect("it was told");
                let (_, queue) = self.attachments[device].expect("it is attached");
                let settled = self.ledger.settle(self.queues[queue], cookie, outcome, self.now_us);
                match settled.expect("it is outstanding") {
                    Settled::Now(answer) => send(&mut seen, answer),
                    Settled::Held => assert!(self.has_one_page, "each page is asked for once"),
                }
            }
            Op::Wait => self.now_us += WAIT_US,
            Op::Expire => self.expire(&mut seen),
            Op::Stall => {
                self.now_us += STALL_US;
                self.expire(&mut seen);
                assert_eq!(self.broker.next_deadline_us(), None);
            }
            Op::Attach { device, queue } => {
                let policy = Policy {
                    stream: stream(device),
                    requests: Requests::Of(Pasid::new(5).expect("20 bits")),
                    device: self.devices[device],
                    queue: self.queues[queue],
                    name: name(device),
                    opaque: device as u64 ^ 0xFEED,
                };
                let attached = self.ledger.attach(&policy).expect("there is room");
                self.attachments[device] = Some((attached, queue));
            }
            Op::Leave { device } => {
                let (attachment, _) = self.attachments[device].expect("it is attached");
                self.ledger.leave(attachment);
            }
            Op::Depart { device } => {
                let (attachment, queue) = self.attachments[device].take().expect("it is attached");
                self.broker.discard_leaving();
                self.evict(queue, Whose::Attachment(attachment), &mut seen);
                self.ledger.detach(attachment);
            }
            Op::Shut { queue } => self.ledger.shut(self.queues[queue]),
            Op::Die { queue } => {
                self.broker.discard_leaving();
                self.evict(queue, Whose::All, &mut seen);
                let old = self.queues[queue];
                assert_eq!(self.ledger.close(old), Ok(()), "no slot is leaked");
                let new = self.ledger.open(owner(queue, self.now_us)).expect("one is closed");
                assert_eq!(new.index(), queue);
                self.queues[queue] = new;
                assert_eq!((self.ledger.owner(old), self.ledger.outstanding(old)), (None, 0));
            }
            Op::Quiesce { device } => self.ledger.quiesce_device(self.devices[device]),
            Op::Reset { device } => {
                self.broker.discard_leaving();
                for queue in 0..QUEUES {
                    self.evict(queue, Whose::Device(self.devices[device]), &mut seen);
                }
                self.ledger.resume_device(self.devices[device]);
            }
        }
        seen
    }

    /// Compares what can be seen of the two from outside.
    fn assert_same(&self, reference: &Reference) {
        for (device, expected) in reference.devices.iter().enumerate() {
            assert_eq!(self.ledger.tally(self.devices[device]), Some(expected.tally));
            assert_eq!(self.ledger.outstanding_requests(self.devices[device]), expected.pages().into());
            expected.assert_balance();
        }
        for queue in 0..QUEUES {
            assert_eq!(self.ledger.outstanding(self.queues[queue]), reference.slots(queue), "queue {queue}");
        }
    }

    /// Answers with every cookie that is used up, foreign or made up: nothing changes but the counts of
    /// refusals.
    fn try_bad_cookies(&self, reference: &Reference) {
        let is_live = |cookie| {
            (0..DEVICES).any(|device| {
                let groups = reference.devices[device].groups.iter().zip(&self.cookies[device]);
                groups
                    .filter(|(group, _)| group.is_some_and(|group| group.stage == Stage::Delivered))
                    .any(|(_, &told)| told == Some(cookie))
            })
        };
        let refuse = |queue: usize, cookie| {
            let before = self.ledger.missed(self.queues[queue]).total();
            let refused = self.ledger.settle(self.queues[queue], cookie, Outcome::Success, self.now_us).err();
            assert!(refused.is_some(), "{cookie:?} to queue {queue}");
            assert_eq!(self.ledger.missed(self.queues[queue]).total(), before + 1);
            refused
        };
        for &(of, cookie) in &self.told {
            for queue in 0..QUEUES {
                if queue != of || !is_live(cookie) {
                    let _ = refuse(queue, cookie);
                }
            }
            // Far ahead of what the slot had, and a slot that is not there.
            assert_eq!(refuse(of, Cookie(cookie.0 + (1 << 32))), Some(Refusal::Unknown));
            assert_eq!(refuse(of, Cookie(cookie.0 | SLOTS as u64)), Some(Refusal::OutOfRange));
        }
        assert_eq!(refuse(0, Cookie(0)), Some(Refusal::Unknown));
        assert_eq!(refuse(1, Cookie(u64::MAX)), Some(Refusal::OutOfRange));
    }

    /// Ends everything: each group that waits is answered once more, and then there is nothing left.
    fn wind_up(&mut self, reference: &Reference) {
        let mut left = *reference;
        let ops = [0, 1].map(|queue| [Op::Shut { queue }, Op::Die { queue }]);
        for op in ops.into_iter().flatten() {
            assert_eq!(self.apply(op).sorted(), left.apply(op).sorted(), "{op:?}");
        }
        assert!(left.devices.iter().all(|device| device.slots() == 0));
        self.assert_same(&left);
        self.try_bad_cookies(&left);
    }
}

// The search.

/// A part of the world.
#[derive(Clone, Copy)]
struct World {
    devices: usize,
    queues: usize,
    has_one_page: bool,
}

/// States after which a search is given up: far more than there are.
const MOST: usize = 10_000_000;

#[derive(Default)]
struct Visited {
    states: usize,
    transitions: usize,
    /// The longest of the shortest ways to a state.
    depth: usize,
    /// Whether nothing new was left when the search ended.
    complete: bool,
}

/// A state that was found: by what, and from which.
struct Found {
    key: u64,
    op: Op,
    from: u32,
    state: Reference,
}

/// Does everything that can be done in one state; returns how much that was, and what of it leads to unknown
/// states.
fn expand(
    world: World,
    path: &[Op],
    state: &Reference,
    from: u32,
    known: &HashSet<u64>,
) -> (usize, Vec<Found>) {
    let mut found: Vec<Found> = Vec::new();
    let (stays, leads): (Vec<_>, Vec<_>) = state
        .operations(world)
        .into_iter()
        .map(|op| {
            let mut after = *state;
            let expected = after.apply(op).sorted();
            (op, after, expected)
        })
        .partition(|(_, after, _)| after.is_same(state));
    // What changes nothing but counts is done one after the other.
    with_real(world.has_one_page, |real| {
        real.use_up_cookies();
        path.iter().for_each(|&op| drop(real.apply(op)));
        real.assert_same(state);
        real.try_bad_cookies(state);
        let mut state = *state;
        for (op, ..) in &stays {
            let expected = state.apply(*op).sorted();
            assert_eq!(real.apply(*op).sorted(), expected, "{op:?} after {path:?}");
            real.assert_same(&state);
        }
        real.wind_up(&state);
    });
    let transitions = stays.len() + leads.len();
    for (op, after, expected) in leads {
        with_real(world.has_one_page, |real| {
            path.iter().for_each(|&op| drop(real.apply(op)));
            assert_eq!(real.apply(op).sorted(), expected, "{op:?} after {path:?}");
            real.assert_same(&after);
        });
        let key = after.key();
        if !known.contains(&key) && found.iter().all(|found| found.key != key) {
            found.push(Found { key, op, from, state: after });
        }
    }
    (transitions, found)
}

fn visit(world: World) -> Visited {
    let start = Reference::new(world.has_one_page);
    let mut known = HashSet::from([start.key()]);
    // How each state was reached: from which, and by what.
    let mut ways: Vec<(u32, Op)> = vec![(0, Op::Wait)];
    let mut level = vec![(0, start)];
    let mut visited = Visited { states: 1, ..Visited::default() };
    while !level.is_empty() && visited.states < MOST {
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let share = level.len().div_ceil(workers);
        let work = |states: &[(u32, Reference)]| {
            let (mut transitions, mut found) = (0, Vec::new());
            for (at, state) in states {
                let mut path: Vec<Op> = Vec::new();
                let mut back = *at;
                while back != 0 {
                    let (from, op) = ways[back as usize];
                    path.push(op);
                    back = from;
                }
                path.reverse();
                let (more, new) = expand(world, &path, state, *at, &known);
                transitions += more;
                found.extend(new);
            }
            (transitions, found)
        };
        let work = &work;
        let results: Vec<(usize, Vec<Found>)> = thread::scope(|scope| {
            let threads: Vec<_> =
                level.chunks(share).map(|states| scope.spawn(move || work(states))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no state surprises")).collect()
        });
        level.clear();
        for (transitions, found) in results {
            visited.transitions += transitions;
            for Found { key, op, from, state } in found {
                if known.insert(key) {
                    level.push((ways.len() as u32, state));
                    ways.push((from, op));
                }
            }
        }
        visited.states += level.len();
        visited.depth += usize::from(!level.is_empty());
        if std::env::var_os("CI").is_none() {
            println!(
                "depth {}: {} states, {} transitions",
                visited.depth, visited.states, visited.transitions
            );
        }
    }
    visited.complete = level.is_empty();
    let Visited { states, transitions, depth, .. } = visited;
    println!(
        "{} devices, {} guests, {SLOTS} slots each, {}: {states} states, {transitions} transitions, depth {depth}: {}",
        world.devices,
        world.queues,
        if world.has_one_page { "one page" } else { "any page" },
        if visited.complete { "all there are" } else { "cut off" },
    );
    visited
}

#[test]
fn one_device_of_one_guest_behaves_in_every_state_there_is() {
    let visited = visit(World { devices: 1, queues: 1, has_one_page: false });

    assert!(visited.complete && visited.states > 100);
}

#[test]
fn one_device_behaves_in_every_state_there_is_while_it_changes_hands() {
    let visited = visit(World { devices: 1, queues: 2, has_one_page: false });

    assert!(visited.complete && visited.states > 500);
}

#[test]
fn one_device_that_asks_for_one_page_behaves_in_every_state_there_is() {
    let visited = visit(World { devices: 1, queues: 2, has_one_page: true });

    assert!(visited.complete && visited.states > 5_000);
}

#[test]
fn two_devices_of_two_guests_behave_in_every_state_there_is() {
    let visited = visit(World { devices: 2, queues: 2, has_one_page: false });

    assert!(visited.complete && visited.states > 10_000);
}
