//! What the interrupt handler owns: groups that are not yet whole, and deadlines.

use crate::{
    Answer, AttachmentId, Deadlines, DeviceId, Due, Ledger, QueueId, Restraint,
    counters::{count, count_alone},
    devices::Device,
    directory::Id,
    groups::{Groups, Key},
    queue::{Begun, Page, Queue, State, Won},
};
use core::sync::atomic::Ordering::Relaxed;
use heapless::{Vec, spsc::Producer};
use iommu::{GroupTag, Outcome, PageRequest, PageResponse, StreamId};

/// Groups of one queue that are remembered as poisoned, until their last request comes.
pub const POISONED: usize = 16;

/// How long a group may take to be whole, in microseconds. After that it is discarded, without an answer: none is owed
/// before the last request.
pub const ASSEMBLY_LIMIT_US: u64 = 1_000_000;

/// What to do about a request that was just reported.
#[derive(Debug, Eq, PartialEq)]
#[must_use = "a verdict may hold the answer that a device waits for"]
pub enum Verdict<'l, const S: usize> {
    /// A whole group waits: kick the core of the queue's owner.
    Forward {
        /// Which of the ledger's queues.
        queue: usize,
    },
    /// Send this answer to a group that waits nowhere.
    Refuse(PageResponse),
    /// Send this answer to a group that waited.
    End(Answer<'l, S>),
    /// Nothing now.
    Nothing,
}

/// What became of the next thing that had a deadline.
#[derive(Debug, Eq, PartialEq)]
#[must_use = "it may hold the answer that a device waits for"]
pub enum Expiry<'l, const S: usize> {
    /// Nobody answered in time: send this.
    Expired {
        /// The answer, which is invalid.
        answer: Answer<'l, S>,
        /// How long after its deadline, in microseconds.
        late_us: u64,
        /// What the device is held to from now on, if that is harder than before.
        restraint: Option<Restraint>,
    },
    /// An answer was held back until now: send it.
    Held(Answer<'l, S>),
    /// Something that needs no answer: a group that was settled, or half-seen. There may be more.
    Nothing,
    /// There is nothing that is due.
    Done,
}

/// Why the ring of a queue cannot be used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum RingError {
    /// There is no such queue.
    NoQueue,
    /// The ring must hold every slot of the queue at once.
    TooSmall {
        /// What it holds.
        capacity: usize,
        /// What it must hold.
        needed: usize,
    },
}

/// What is in a place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
enum Stage {
    /// Nothing that this side knows of.
    Idle = 0,
    /// A group that is being put together; the slot is the handler's.
    HalfSeen = 1,
    /// A whole group, whose answer may come at any time; the deadline is that of a held answer.
    Holding = 2,
    /// A whole group; the deadline is the guest's.
    Waiting = 3,
    /// No group: the last request of this name is to be refused.
    Poisoned = 4,
    /// The same, for a group that an overflow discarded: the device shall ask for all of it again.
    Discarded = 5,
}

/// What is known of a group besides what its slot says. The places of a queue's slots come first, those of poisoned groups
/// after them.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// When the first request was reported; of a whole group, when the last one was.
    since_us: u64,
    /// At most [`DEADLINE_MAX_US`](crate::DEADLINE_MAX_US).
    deadline_us: u32,
    stage: Stage,
}

/// What a group belongs to, by full names, so that it never belongs to what took their place.
#[derive(Clone, Copy, Debug)]
struct Belongs {
    device: DeviceId,
    queue: QueueId,
    attachment: AttachmentId,
}

/// A group of which the last request has come.
struct Whole<'q, const S: usize> {
    queue: &'q Queue<S>,
    /// The number of its queue, and its slot there.
    index: u32,
    slot: u16,
    begun: Begun,
    deadline_us: u32,
    /// When its first request was reported.
    since_us: u64,
}

/// What is known besides of a group that is half-seen, poisoned or discarded. A group of one request never is.
#[derive(Clone, Copy, Debug)]
struct Listed {
    to: Belongs,
    /// Where it is in the list of them.
    at: u32,
}

/// The interrupt handler's part. It has places for `N` groups: `Q` times (`S` + [`POISONED`]).
///
/// It is zero when it is made, so a static one costs no image.
pub struct Broker<'l, const Q: usize, const S: usize, const D: usize, const A: usize, const N: usize> {
    ledger: &'l Ledger<Q, S, D, A>,
    rings: [Option<Producer<'l, u16>>; Q],
    places: [Place; N],
    listed: [Listed; N],
    groups: Groups<N>,
    deadlines: Deadlines<N>,
    /// Places of groups that are half-seen, poisoned or discarded.
    half_seen: Vec<u32, N>,
}

impl<'l, const Q: usize, const S: usize, const D: usize, const A: usize, const N: usize>
    Broker<'l, Q, S, D, A, N>
{
    /// Places of a queue.
    const EACH: usize = S + POISONED;

    /// A broker for the groups of `ledger`. There is one for each.
    pub const fn new(ledger: &'l Ledger<Q, S, D, A>) -> Self {
        const { assert!(N == Q * (S + POISONED), "N is Q * (S + POISONED)") };
        let nothing = Belongs {
            device: DeviceId(Id::NONE),
            queue: QueueId { index: 0, opened: 0 },
            attachment: AttachmentId(Id::NONE),
        };
        Self {
            ledger,
            rings: [const { None }; Q],
            places: [Place { since_us: 0, deadline_us: 0, stage: Stage::Idle }; N],
            listed: [Listed { to: nothing, at: 0 }; N],
            groups: Groups::new(),
            deadlines: Deadlines::new(),
            half_seen: Vec::new(),
        }
    }

    /// Connects queue number `queue` with the core of its owner, which has an [`Inbox`](crate::Inbox) for the other end of the
    /// ring, an empty one. Groups that wait already, or were announced through a ring that is gone, are announced.
    pub fn connect(&mut self, queue: usize, mut ring: Producer<'l, u16>) -> Result<(), RingError> {
        let place = self.rings.get_mut(queue).ok_or(RingError::NoQueue)?;
        if ring.capacity() < S {
            return Err(RingError::TooSmall { capacity: ring.capacity(), needed: S });
        }
        if let Some(queue) = self.ledger.any_queue(queue) {
            for slot in (0..S as u16).filter(|&slot| queue.is_announced(slot)) {
                // There is room for every slot.
                let _ = ring.enqueue(slot);
            }
        }
        *place = Some(ring);
        Ok(())
    }

    fn place_of(queue: QueueId, slot: u16) -> u32 {
        queue.index * Self::EACH as u32 + u32::from(slot)
    }

    /// Returns the queue of a place, and the slot if it is one of a slot.
    fn slot_of(place: u32) -> (u32, u16) {
        (place / Self::EACH as u32, (place % Self::EACH as u32) as u16)
    }

    /// Takes in one request that hardware reported.
    ///
    /// The work is bounded: a search for the group among those that share its bucket, one for the attachment in 32 places,
    /// and a handful of loads and stores, however many devices, attachments and groups there are.
    pub fn admit(&mut self, request: &PageRequest, now_us: u64) -> Verdict<'l, S> {
        let key = Groups::<N>::key(request.stream, request.tag);
        if let Some(place) = self.groups.find(key) {
            if !self.is_answered(place)
                && let Some(verdict) = self.admit_known(place, request, now_us)
            {
                return verdict;
            }
            // Its number is free for a new one.
            self.groups.remove(place);
        }
        let Some(attachment) = self.ledger.attachments.find_id(request.stream, request.tag.pasid) else {
            return self.refuse_stray(request);
        };
        if request.last {
            self.admit_first::<true>(attachment, request, now_us)
        } else {
            self.admit_first_part(attachment, request, now_us)
        }
    }

    /// Returns whether the group in `place` has its answer, as most have when their number is used again.
    #[inline]
    fn is_answered(&self, place: u32) -> bool {
        match self.places[place as usize].stage {
            Stage::HalfSeen | Stage::Poisoned | Stage::Discarded => false,
            Stage::Holding | Stage::Waiting => {
                let (queue, slot) = Self::slot_of(place);
                self.ledger.any_queue(queue as usize).is_some_and(|queue| !queue.is_outstanding(slot))
            }
            Stage::Idle => true,
        }
    }

    /// A request of a group that has a place; `None` if that group is answered.
    #[inline(never)]
    fn admit_known(&mut self, place: u32, request: &PageRequest, now_us: u64) -> Option<Verdict<'l, S>> {
        match self.places[place as usize].stage {
            Stage::HalfSeen => Some(self.admit_part(place, request, now_us)),
            Stage::Poisoned | Stage::Discarded => Some(self.admit_poisoned(place, request)),
            Stage::Holding | Stage::Waiting => self.admit_duplicate(place, request, now_us),
            Stage::Idle => None,
        }
    }

    /// The first request of a group, which is `WHOLE` by that or not: compiled twice, so that neither pays for the other.
    #[inline(always)]
    fn admit_first<const WHOLE: bool>(
        &mut self,
        attachment: AttachmentId,
        request: &PageRequest,
        now_us: u64,
    ) -> Verdict<'l, S> {
        let ledger = self.ledger;
        // If it leaves just now, it might have left before as well.
        let Some(target) = ledger.attachments.target(attachment) else { return self.refuse_stray(request) };
        // Made where it is needed, which is out of the way of most groups.
        let to = || Belongs { device: target.device(), queue: target.queue, attachment };
        let Some(device) = ledger.devices.live(target.device()) else {
            return self.refuse_leaving(to(), request, now_us);
        };
        count_alone(&device.counters.opened);
        let deadline_us = device.deadline_us.load(Relaxed);
        if !device.charge(now_us, true) {
            return self.refuse(device, to(), request, now_us);
        }
        let page = Page::new(request.iova, request.perms);
        // A request for no access is malformed: nobody could repair what it asks for.
        let may_begin =
            deadline_us > 0 && page.is_for_some_access() && (WHOLE || device.may_have_half_seen());
        let begun = if may_begin { ledger.open_queue(target.queue) } else { None }.and_then(|queue| {
            Some((queue, queue.begin(&target, attachment.0.place, request, page, now_us)?))
        });
        let Some((queue, slot)) = begun else {
            device.discharge(1);
            return self.refuse(device, to(), request, now_us);
        };
        let QueueId { index, .. } = target.queue;
        let (place, deadline_us) = (Self::place_of(target.queue, slot), deadline_us as u32);
        self.groups.insert(place, Groups::<N>::key(request.stream, request.tag));
        if WHOLE {
            let whole = Whole { queue, index, slot, begun: Begun::Whole, deadline_us, since_us: now_us };
            return self.forward(&whole, device, request, now_us);
        }
        self.places[place as usize] = Place { since_us: now_us, deadline_us, stage: Stage::HalfSeen };
        self.list(place, to(), device, now_us);
        Verdict::Nothing
    }

    /// The first request of a group of several.
    #[inline(never)]
    fn admit_first_part(
        &mut self,
        attachment: AttachmentId,
        request: &PageRequest,
        now_us: u64,
    ) -> Verdict<'l, S> {
        self.admit_first::<false>(attachment, request, now_us)
    }

    /// A request for which nobody is attached.
    #[cold]
    fn refuse_stray(&self, request: &PageRequest) -> Verdict<'l, S> {
        // Nobody to ask. Parts that are not the last want no answer.
        count(&self.ledger.strays);
        if let Some(device) = self.ledger.devices.find(request.stream) {
            count_alone(&device.counters.requests);
            if request.last {
                count_alone(&device.counters.opened);
                count(&device.counters.refused);
            }
        }
        refusal(request, Outcome::Invalid)
    }

    /// The first request of a group of a device that is not live any more.
    #[cold]
    fn refuse_leaving(&mut self, to: Belongs, request: &PageRequest, now_us: u64) -> Verdict<'l, S> {
        let Some(device) = self.ledger.devices.of(to.device) else {
            count(&self.ledger.strays);
            return refusal(request, Outcome::Invalid);
        };
        count_alone(&device.counters.opened);
        count_alone(&device.counters.requests);
        self.refuse(device, to, request, now_us)
    }

    /// A further request of a group that is being put together.
    fn admit_part(&mut self, place: u32, request: &PageRequest, now_us: u64) -> Verdict<'l, S> {
        let to = self.listed[place as usize].to;
        let (queue_index, slot) = Self::slot_of(place);
        let ledger = self.ledger;
        let (Some(queue), Some(device)) =
            (ledger.any_queue(queue_index as usize), ledger.devices.at(to.device.0.place))
        else {
            return Verdict::Nothing;
        };
        let is_wanted = self.is_wanted(&to) && request.perms.is_for_some_access();
        let is_charged = device.charge(now_us, false);
        if is_wanted && is_charged && queue.add(slot, request) {
            if !request.last {
                return Verdict::Nothing;
            }
            self.unlist(place, device);
            let Place { since_us, deadline_us, .. } = self.places[place as usize];
            let begun = Begun::Before;
            let whole = Whole { queue, index: queue_index, slot, begun, deadline_us, since_us };
            return self.forward(&whole, device, request, now_us);
        }
        // Malformed, too many pages, over budget, or its attachment is leaving.
        if is_charged {
            device.discharge(1);
        }
        self.forget_half_seen(place, queue, device);
        self.refuse(device, to, request, now_us)
    }

    /// Returns whether nothing of what a group belongs to is leaving.
    fn is_wanted(&self, to: &Belongs) -> bool {
        let ledger = self.ledger;
        ledger.attachments.is_live(to.attachment)
            && ledger.devices.is_live(to.device)
            && ledger.open_queue(to.queue).is_some()
    }

    /// A request of a group that was poisoned, or discarded, earlier.
    fn admit_poisoned(&mut self, place: u32, request: &PageRequest) -> Verdict<'l, S> {
        let Place { stage, .. } = self.places[place as usize];
        let device = self.device_of(place);
        if let Some(device) = device {
            count_alone(&device.counters.requests);
        }
        if !request.last {
            return Verdict::Nothing;
        }
        if let Some(device) = device {
            self.unlist(place, device);
        }
        self.groups.remove(place);
        if stage == Stage::Discarded {
            // It counts as discarded already.
            return refusal(request, Outcome::Success);
        }
        if let Some(device) = device {
            count(&device.counters.refused);
        }
        refusal(request, Outcome::Invalid)
    }

    /// A request with the name of a group that is whole. If that has no answer yet, the device used one number twice, and
    /// gets one answer: when the last request of the second group comes, or at the deadline of the first.
    fn admit_duplicate(&mut self, place: u32, request: &PageRequest, now_us: u64) -> Option<Verdict<'l, S>> {
        let (queue, slot) = Self::slot_of(place);
        let queue = self.ledger.any_queue(queue as usize)?;
        // A group that someone is answering right now is answered: the device may have the answer already.
        let device = self.ledger.devices.at(queue.poison(slot)?)?;
        self.places[place as usize].stage = Stage::Waiting;
        count_alone(&device.counters.requests);
        if device.counters.duplicates.fetch_add(1, Relaxed) == 0 {
            device.restrain(Restraint::Warned);
        }
        if !request.last {
            return Some(Verdict::Nothing);
        }
        let (won, _) = queue.end(slot, |_, _, _| Some(Outcome::Invalid))?;
        Some(Verdict::End(self.end_poisoned(queue, device, won, now_us)))
    }

    fn end_poisoned(&self, queue: &Queue<S>, device: &Device, won: Won<'l, S>, now_us: u64) -> Answer<'l, S> {
        self.ledger.book(queue, &won, now_us);
        count(&device.counters.poisoned);
        count(&device.counters.refused);
        won.answer
    }

    /// A group is whole: its owner is to know, and has a deadline.
    // Always inline: what it needs is at hand where it is called.
    #[inline(always)]
    fn forward(
        &mut self,
        whole: &Whole<'_, S>,
        device: &Device,
        request: &PageRequest,
        now_us: u64,
    ) -> Verdict<'l, S> {
        let &Whole { queue, index, slot, begun, deadline_us, since_us } = whole;
        let (mut stage, mut first_us, mut held_us) = (Stage::Waiting, u64::from(deadline_us), 0);
        let hold_us = device.asked(request.tag.pasid, request.iova);
        if hold_us > 0 {
            // How long the device took for its group is not the guest's doing.
            held_us = passed_us(since_us, now_us) + hold_us;
            (stage, first_us) = (Stage::Holding, hold_us);
        }
        let place = index * Self::EACH as u32 + u32::from(slot);
        if let Some(place) = self.places.get_mut(place as usize) {
            *place = Place { since_us: now_us, deadline_us, stage };
        }
        self.deadlines.arm(place, now_us, first_us);
        if queue.complete(slot, begun, held_us)
            && let Some(Some(ring)) = self.rings.get_mut(index as usize)
        {
            // There is room: it holds every slot, and each is announced once at a time.
            let _ = ring.enqueue(slot);
        }
        Verdict::Forward { queue: index as usize }
    }

    /// Refuses a group: now if this is its last request, else when that comes.
    #[cold]
    fn refuse(&mut self, device: &Device, to: Belongs, request: &PageRequest, now_us: u64) -> Verdict<'l, S> {
        if request.last {
            count(&device.counters.refused);
        } else {
            count(&device.counters.poisoned);
            let key = Groups::<N>::key(request.stream, request.tag);
            self.remember(Stage::Poisoned, device, to, key, now_us);
        }
        refusal(request, Outcome::Invalid)
    }

    /// Remembers a group that has no slot, until its last request comes. If its queue has too many, the oldest is
    /// forgotten: its last request will look like a group of one page, the guest repairs that page, and the device asks
    /// again for the others.
    fn remember(&mut self, stage: Stage, device: &Device, to: Belongs, key: Key, now_us: u64) {
        let first = Self::place_of(to.queue, S as u16) as usize;
        let Some(own) = self.places.get(first..first + POISONED) else { return };
        let place = own.iter().position(|place| place.stage == Stage::Idle).unwrap_or_else(|| {
            let age = |&(_, place): &(usize, &Place)| now_us.wrapping_sub(place.since_us);
            own.iter().enumerate().max_by_key(age).map_or(0, |(at, _)| at)
        });
        let place = (first + place) as u32;
        self.forget_poisoned(place);
        self.groups.insert(place, key);
        self.places[place as usize] = Place { since_us: now_us, deadline_us: 0, stage };
        self.list(place, to, device, now_us);
    }

    /// Takes note that the last request of a poisoned group will not come, or will not be known for what it is.
    fn forget_poisoned(&mut self, place: u32) {
        let Place { stage, .. } = self.places[place as usize];
        if !matches!(stage, Stage::Poisoned | Stage::Discarded) {
            return;
        }
        if let Some(device) = self.device_of(place) {
            if stage == Stage::Poisoned {
                count(&device.counters.discarded);
            }
            self.unlist(place, device);
        }
        self.groups.remove(place);
    }

    /// Gives the slot of a half-seen group back. It gets no answer from here.
    fn forget_half_seen(&mut self, place: u32, queue: &Queue<S>, device: &Device) {
        let (_, slot) = Self::slot_of(place);
        device.discharge(queue.pages(slot) as u64);
        self.unlist(place, device);
        self.groups.remove(place);
        queue.release(slot);
    }

    /// Discards a half-seen group; returns its name.
    fn discard(&mut self, place: u32) -> Option<(&'l Device, Key)> {
        let (queue, _) = Self::slot_of(place);
        let queue = self.ledger.any_queue(queue as usize)?;
        let device = self.device_of(place)?;
        let key = self.groups.name(place)?;
        self.forget_half_seen(place, queue, device);
        count(&device.counters.discarded);
        Some((device, key))
    }

    /// Returns the device of a group that is on the list of those that wait for a last request.
    fn device_of(&self, place: u32) -> Option<&'l Device> {
        self.ledger.devices.at(self.listed[place as usize].to.device.0.place)
    }

    /// Puts a place on the list of those that wait for a last request, and limits how long.
    fn list(&mut self, place: u32, to: Belongs, device: &Device, now_us: u64) {
        self.listed[place as usize] = Listed { to, at: self.half_seen.len() as u32 };
        // There is room for all places.
        let _ = self.half_seen.push(place);
        device.half_seen.store(device.half_seen.load(Relaxed) + 1, Relaxed);
        self.deadlines.arm(place, now_us, ASSEMBLY_LIMIT_US);
    }

    /// Takes a place off that list.
    fn unlist(&mut self, place: u32, device: &Device) {
        let at = self.listed[place as usize].at as usize;
        if self.half_seen.get(at) == Some(&place) {
            self.half_seen.swap_remove(at);
            if let Some(&moved) = self.half_seen.get(at) {
                self.listed[moved as usize].at = at as u32;
            }
            device.half_seen.store(device.half_seen.load(Relaxed).saturating_sub(1), Relaxed);
        }
        self.places[place as usize].stage = Stage::Idle;
        self.deadlines.disarm(place);
    }

    /// Hardware lost requests, and the queue is empty: whatever is half-seen is gone, and hardware has answered it.
    ///
    /// If the last request of such a group was not lost but comes later, it is answered with success, so that the device
    /// asks again for all of it. Looks at each half-seen group once.
    pub fn overflowed(&mut self, now_us: u64) {
        count(&self.ledger.overflows);
        // What is added on the way comes after what is still to be looked at.
        for at in (0..self.half_seen.len()).rev() {
            let Some(&place) = self.half_seen.get(at) else { continue };
            let Place { stage, .. } = self.places[place as usize];
            let to = self.listed[place as usize].to;
            if stage == Stage::HalfSeen {
                if let Some((device, key)) = self.discard(place) {
                    self.remember(Stage::Discarded, device, to, key, now_us);
                }
            } else if stage == Stage::Poisoned {
                // Its last request may be lost as well, and its number in use again.
                if let Some(device) = self.device_of(place) {
                    count(&device.counters.discarded);
                }
                self.places[place as usize].stage = Stage::Discarded;
            }
        }
    }

    /// Hardware reported a part of a group that nobody can read. A group that is half-seen is poisoned: it gets no answer that
    /// would say that all of it was looked at.
    pub fn malformed(&mut self, stream: StreamId, tag: GroupTag, now_us: u64) {
        let key = Groups::<N>::key(stream, tag);
        let Some(place) = self.groups.find(key) else { return };
        if self.places[place as usize].stage != Stage::HalfSeen {
            return;
        }
        let to = self.listed[place as usize].to;
        let (queue, _) = Self::slot_of(place);
        let ledger = self.ledger;
        let (Some(queue), Some(device)) =
            (ledger.any_queue(queue as usize), ledger.devices.at(to.device.0.place))
        else {
            return;
        };
        self.forget_half_seen(place, queue, device);
        count(&device.counters.poisoned);
        self.remember(Stage::Poisoned, device, to, key, now_us);
    }

    /// Discards what is half-seen of attachments, devices and queues that are leaving; part of a drain. Looks at each
    /// half-seen group once.
    pub fn discard_leaving(&mut self) {
        for at in (0..self.half_seen.len()).rev() {
            let Some(&place) = self.half_seen.get(at) else { continue };
            if self.is_wanted(&self.listed[place as usize].to) {
                continue;
            }
            if self.places[place as usize].stage == Stage::HalfSeen {
                let _ = self.discard(place);
            } else {
                self.forget_poisoned(place);
            }
        }
    }

    /// Ends the next thing whose time has come; to be called until it is [`Expiry::Done`], or as often as a pass allows.
    ///
    /// Looks at one entry, however many there are.
    pub fn expire(&mut self, now_us: u64) -> Expiry<'l, S> {
        self.deadlines.tell(now_us);
        let place = match self.deadlines.pop() {
            Due::Entry(place) => place,
            Due::Later => return Expiry::Nothing,
            Due::Nothing => return Expiry::Done,
        };
        let entry = self.places[place as usize];
        match entry.stage {
            Stage::Idle => Expiry::Nothing,
            Stage::HalfSeen => {
                let _ = self.discard(place);
                Expiry::Nothing
            }
            Stage::Poisoned | Stage::Discarded => {
                self.forget_poisoned(place);
                Expiry::Nothing
            }
            Stage::Holding | Stage::Waiting => {
                self.expire_whole(place, entry, now_us).unwrap_or(Expiry::Nothing)
            }
        }
    }

    /// The time of a whole group has come: that of an answer that was held back, or that of its guest.
    fn expire_whole(&mut self, place: u32, entry: Place, now_us: u64) -> Option<Expiry<'l, S>> {
        let (queue, slot) = Self::slot_of(place);
        let ledger = self.ledger;
        let queue = ledger.any_queue(queue as usize)?;
        let left_us = u64::from(entry.deadline_us).saturating_sub(passed_us(entry.since_us, now_us));
        let is_holding = entry.stage == Stage::Holding && left_us > 0;
        let pick = |state: State, _: u32, _: u32| match state {
            State::HeldSuccess => Some(Outcome::Success),
            // The guest still has time.
            State::Waiting | State::Delivered if is_holding => None,
            _ => Some(Outcome::Invalid),
        };
        let Some((won, state)) = queue.end(slot, pick) else {
            if is_holding && queue.is_outstanding(slot) {
                self.places[place as usize].stage = Stage::Waiting;
                self.deadlines.arm(place, now_us, left_us);
            } else {
                // It was settled. Its name goes when the number or the slot is used again.
                self.places[place as usize].stage = Stage::Idle;
            }
            return None;
        };
        self.places[place as usize].stage = Stage::Idle;
        self.groups.remove(place);
        let device = ledger.devices.at(won.device)?;
        Some(match state {
            State::HeldSuccess => {
                ledger.book_held(queue, &won, now_us);
                Expiry::Held(won.answer)
            }
            State::HeldInvalid => Expiry::Held(self.end_poisoned(queue, device, won, now_us)),
            _ => {
                ledger.book(queue, &won, now_us);
                let late_us = passed_us(entry.since_us, now_us).saturating_sub(entry.deadline_us.into());
                Expiry::Expired { answer: won.answer, late_us, restraint: device.expired() }
            }
        })
    }

    /// Returns when something may be due next, in microseconds, on the clock of `admit`; `None` if nothing is.
    ///
    /// It may be a group that was settled meanwhile.
    pub fn next_deadline_us(&self) -> Option<u64> {
        self.deadlines.next_us()
    }
}

/// Returns the time from `since_us` to `now_us`, on a clock that may wrap; nothing if it jumped back.
fn passed_us(since_us: u64, now_us: u64) -> u64 {
    let passed_us = now_us.wrapping_sub(since_us);
    if passed_us > u64::MAX / 2 { 0 } else { passed_us }
}

/// The answer of a request that ends its group; nothing for one that does not.
fn refusal<'l, const S: usize>(request: &PageRequest, outcome: Outcome) -> Verdict<'l, S> {
    if request.last {
        Verdict::Refuse(PageResponse { stream: request.stream, tag: request.tag, outcome })
    } else {
        Verdict::Nothing
    }
}
