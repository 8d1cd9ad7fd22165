//! What all cores share: which groups are outstanding, of which devices, and whose they are.

use crate::{
    Answer, AttachmentId, Cookie, DeviceId, Latencies, Limits, Missed, Policy, Refusal, Restraint, Tally,
    attachments::{Attachments, Target},
    counters::count,
    devices::Devices,
    directory::Id,
    queue::{Queue, Settlement, State, Won},
};
use core::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};
use iommu::{Iova, Outcome, Pasid, StreamId};

/// Whose a queue is. The broker keeps it, and makes nothing of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Owner {
    /// A guest's, by its number.
    Guest(u16),
    /// The hypervisor's own pager's.
    Pager,
}

/// Names a queue until it is closed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct QueueId {
    pub(crate) index: u32,
    pub(crate) opened: u32,
}

impl QueueId {
    /// Returns which of the ledger's queues this is, from 0.
    pub fn index(self) -> usize {
        self.index as usize
    }
}

/// The low bits of a queue's word; how often it was opened is above them.
const CLOSED: u64 = 0;
const OPEN: u64 = 1;
const CLOSING: u64 = 2;
const CLAIMED: u64 = 3;
const STATE: u64 = 0xFF;

/// Why a queue cannot be closed, or a device not added.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Error {
    /// There is no such queue, or no more of them, or it is open.
    NoQueue,
    /// No place for the device, or it is there already, or the hardware's queue could not hold its requests and stop markers
    /// beside those of the others.
    NoRoomForDevice,
    /// No place for the attachment, or it is there already.
    NoRoomForAttachment,
    /// The queue, or the device, is not there any more.
    Gone,
    /// Groups wait for an answer.
    Outstanding {
        /// So many.
        groups: usize,
    },
}

/// Which groups are to be ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Whose {
    /// Those of an attachment that is leaving.
    Attachment(AttachmentId),
    /// Those of a device that is being reset.
    Device(DeviceId),
    /// All of a queue that is being closed, or whose owner is gone.
    All,
}

/// What became of an answer.
#[derive(Debug, Eq, PartialEq)]
#[must_use = "a settled group may hold the answer that a device waits for"]
pub enum Settled<'l, const S: usize> {
    /// Send it.
    Now(Answer<'l, S>),
    /// It is held back, and sent when [`Broker::expire`](crate::Broker::expire) says so: its owner claimed repairs that
    /// were none.
    Held,
}

/// Whose a fault is, and what it comes to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Faulted {
    /// As [`Ledger::owner_of`] has it.
    pub owner: (usize, u32, u64),
    /// What the device is held to from now on, if the fault was one too many.
    pub restraint: Option<Restraint>,
}

/// `Q` queues of `S` slots each, the devices in `D` places, their attachments in `A` places.
///
/// It is zero when it is made, so a static one costs no image, and every method takes `&self`: any core may call it, but for
/// what says otherwise.
#[derive(Debug)]
pub struct Ledger<const Q: usize, const S: usize, const D: usize, const A: usize> {
    queues: [Queue<S>; Q],
    words: [AtomicU64; Q],
    owners: [AtomicU64; Q],
    pub(crate) attachments: Attachments<A>,
    pub(crate) devices: Devices<D>,
    /// Requests that no attachment was for.
    pub(crate) strays: AtomicU64,
    /// How often hardware lost requests, of whomever.
    pub(crate) overflows: AtomicU64,
}

impl<const Q: usize, const S: usize, const D: usize, const A: usize> Ledger<Q, S, D, A> {
    /// A ledger of a unit whose page request queue has `entries` entries. It has no open queues and no devices.
    pub const fn new(entries: u32) -> Self {
        Self {
            queues: [const { Queue::new() }; Q],
            words: [const { AtomicU64::new(CLOSED) }; Q],
            owners: [const { AtomicU64::new(0) }; Q],
            attachments: Attachments::new(),
            devices: Devices::new(entries),
            strays: AtomicU64::new(0),
            overflows: AtomicU64::new(0),
        }
    }

    // Queues.

    /// Opens some queue for `owner`. It exists before anything is attached to it, and several attachments may use it.
    ///
    /// Looks at `Q` queues, and touches `S` slots.
    pub fn open(&self, owner: Owner) -> Result<QueueId, Error> {
        (0..Q).find_map(|index| self.open_at(index, owner).ok()).ok_or(Error::NoQueue)
    }

    /// Opens queue number `index` for `owner`: the one whose ring leads to the owner's core.
    pub fn open_at(&self, index: usize, owner: Owner) -> Result<QueueId, Error> {
        let (word, queue) = self.words.get(index).zip(self.queues.get(index)).ok_or(Error::NoQueue)?;
        let before = word.load(Relaxed);
        let is_closed = before & STATE == CLOSED;
        let opened = ((before >> 8) as u32).wrapping_add(1);
        // The name from before means nothing any more: its owner would reach what is the next one's.
        let claimed = u64::from(opened) << 8 | CLAIMED;
        if !is_closed || word.compare_exchange(before, claimed, Acquire, Relaxed).is_err() {
            return Err(Error::NoQueue);
        }
        let number = match owner {
            Owner::Guest(number) => number.into(),
            Owner::Pager => u64::MAX,
        };
        self.owners[index].store(number, Relaxed);
        queue.open((index as u64 + 1) << 40);
        word.store(u64::from(opened) << 8 | OPEN, Release);
        Ok(QueueId { index: index as u32, opened })
    }

    /// Stops admitting groups to a queue: from here on they are refused at once. A handler that runs now may still admit one;
    /// after it has passed through a drain, none.
    pub fn shut(&self, queue: QueueId) {
        self.change_queue(queue, OPEN, CLOSING);
    }

    /// Closes a queue that was shut, drained, and whose groups were all evicted and answered. It may be opened for another
    /// owner then.
    pub fn close(&self, queue: QueueId) -> Result<(), Error> {
        let slots = self.queue(queue).ok_or(Error::Gone)?;
        if !self.change_queue(queue, CLOSING, CLAIMED) {
            return Err(Error::Gone);
        }
        if !slots.close() {
            self.change_queue(queue, CLAIMED, CLOSING);
            return Err(Error::Outstanding { groups: slots.outstanding() });
        }
        self.change_queue(queue, CLAIMED, CLOSED);
        Ok(())
    }

    fn change_queue(&self, queue: QueueId, from: u64, to: u64) -> bool {
        let opened = u64::from(queue.opened) << 8;
        self.words
            .get(queue.index as usize)
            .is_some_and(|word| word.compare_exchange(opened | from, opened | to, AcqRel, Relaxed).is_ok())
    }

    /// Returns whose a queue is; `None` if it is closed.
    pub fn owner(&self, queue: QueueId) -> Option<Owner> {
        self.queue(queue)?;
        let owner = self.owners[queue.index()].load(Relaxed);
        Some(u16::try_from(owner).map_or(Owner::Pager, Owner::Guest))
    }

    /// Returns the groups of a queue that were begun and are not yet answered; 0 if it is closed.
    pub fn outstanding(&self, queue: QueueId) -> usize {
        self.queue(queue).map_or(0, Queue::outstanding)
    }

    /// Returns the answers of a queue's owner that were refused.
    pub fn missed(&self, queue: QueueId) -> Missed {
        self.queue(queue).map_or(Missed::default(), Queue::missed)
    }

    fn queue(&self, queue: QueueId) -> Option<&Queue<S>> {
        let word = self.words.get(queue.index as usize)?.load(Acquire);
        let is_this = word >> 8 == u64::from(queue.opened) && word & STATE != CLOSED;
        self.queues.get(queue.index as usize).filter(|_| is_this)
    }

    /// Returns a queue if it admits groups.
    pub(crate) fn open_queue(&self, queue: QueueId) -> Option<&Queue<S>> {
        let word = self.words.get(queue.index as usize)?.load(Acquire);
        let is_open = word == u64::from(queue.opened) << 8 | OPEN;
        if is_open { self.queues.get(queue.index as usize) } else { None }
    }

    /// Returns queue `index`, in whatever state.
    pub(crate) fn any_queue(&self, index: usize) -> Option<&Queue<S>> {
        self.queues.get(index)
    }

    // Devices.

    /// Adds a device, with nothing attached yet. Its counts begin at 0.
    pub fn add_device(&self, stream: StreamId, limits: &Limits) -> Result<DeviceId, Error> {
        self.devices.add(stream, limits).ok_or(Error::NoRoomForDevice)
    }

    /// Changes how long the owner of a device may take for an answer, in microseconds, for groups that begin from here on.
    pub fn set_deadline(&self, device: DeviceId, deadline_us: u64) {
        if let Some(device) = self.devices.of(device) {
            device.deadline_us.store(deadline_us.min(crate::DEADLINE_MAX_US), Relaxed);
        }
    }

    /// Stops admitting the groups of a device that is about to be reset, or removed; see [`shut`](Self::shut).
    pub fn quiesce_device(&self, device: DeviceId) {
        self.devices.leave(device);
    }

    /// Admits the groups of a device again that was quiesced, drained, evicted and reset. What it did before is forgiven.
    pub fn resume_device(&self, device: DeviceId) {
        self.devices.return_to(device);
    }

    /// Forgets a device of which nothing is attached any more, and no group waits.
    pub fn remove_device(&self, device: DeviceId) {
        self.devices.remove(device);
    }

    /// Returns what a device is held to.
    pub fn restraint(&self, device: DeviceId) -> Restraint {
        self.devices.of(device).map_or(Restraint::None, crate::devices::Device::restraint)
    }

    /// Holds a device to [`Restraint::Blocked`]: hardware cannot rely on it.
    pub fn quarantine(&self, stream: StreamId) {
        if let Some(device) = self.devices.find(stream) {
            device.restrain(Restraint::Blocked);
        }
    }

    /// Counts an unrecoverable fault of a device as a whole, or that some were lost behind one of its; returns what the device is
    /// held to, if that was one too many. Only the interrupt handler calls it.
    pub fn device_faulted(&self, stream: StreamId, now_us: u64) -> Result<Option<Restraint>, Error> {
        Ok(self.devices.find(stream).ok_or(Error::Gone)?.faulted(now_us))
    }

    /// Returns what happened to the requests of a device; `None` if it was removed.
    pub fn tally(&self, device: DeviceId) -> Option<Tally> {
        self.devices.tally(device)
    }

    /// Returns the groups of a device that were refused or discarded: its owner is never shown them.
    pub fn unshown(&self, device: DeviceId) -> u64 {
        let of = |device: &crate::devices::Device| {
            device.counters.refused.load(Relaxed) + device.counters.discarded.load(Relaxed)
        };
        self.devices.of(device).map_or(0, of)
    }

    /// Returns how long the groups of a device took.
    pub fn latencies(&self, device: DeviceId) -> Option<Latencies> {
        self.devices.latencies(device)
    }

    /// Returns the requests of a device that are outstanding.
    pub fn outstanding_requests(&self, device: DeviceId) -> u64 {
        self.devices.of(device).map_or(0, |device| device.outstanding.load(Relaxed))
    }

    /// Takes note that the owner took pages back, or all that it had mapped for a PASID: a device that asks for them again is
    /// no sign that it had claimed repairs which were none. Looks at as many pages as are remembered, 32.
    pub fn unmapped(&self, device: DeviceId, pasid: Option<Pasid>, first: Iova, pages: u64) {
        if let Some(device) = self.devices.of(device) {
            device.unmapped(pasid, first, pages);
        }
    }

    /// Returns how many requests came for which nobody was attached.
    pub fn strays(&self) -> u64 {
        self.strays.load(Relaxed)
    }

    /// Returns how often hardware lost requests: each time an unknown number, of any device.
    pub fn overflows(&self) -> u64 {
        self.overflows.load(Relaxed)
    }

    // Attachments.

    /// Attaches: from here on the requests that `policy` names are admitted. If the queue is closed or the device removed
    /// while it is attached, they are refused, whoever has the place then.
    ///
    /// Devices whose requests go to one queue share its slots. If they are not one owner's, the queue is to have at least as
    /// many as they may have requests outstanding together.
    pub fn attach(&self, policy: &Policy) -> Result<AttachmentId, Error> {
        self.queue(policy.queue).ok_or(Error::Gone)?;
        self.devices.of(policy.device).ok_or(Error::Gone)?;
        self.attachments.add(policy).ok_or(Error::NoRoomForAttachment)
    }

    /// Stops admitting requests of an attachment; see [`shut`](Self::shut).
    pub fn leave(&self, attachment: AttachmentId) {
        self.attachments.leave(attachment);
    }

    /// Forgets an attachment that left, once its last group was answered.
    pub fn detach(&self, attachment: AttachmentId) {
        self.attachments.remove(attachment);
    }

    /// Returns the queue, the owner's name for the device and the opaque value of the attachment that a fault belongs to.
    /// One that is leaving, and is not forgotten yet, is still told what happened before.
    pub fn owner_of(&self, stream: StreamId, pasid: Option<Pasid>) -> Option<(usize, u32, u64)> {
        let target = self.target_of(stream, pasid)?;
        Some((target.queue.index(), target.name(), target.opaque))
    }

    /// Counts an unrecoverable fault of an attachment, and returns whose it is; `None`, and nothing is counted, if it is of none.
    /// Only the interrupt handler calls it. Looks at one device.
    #[inline]
    pub fn faulted(&self, stream: StreamId, pasid: Option<Pasid>, now_us: u64) -> Option<Faulted> {
        let target = self.target_of(stream, pasid)?;
        let restraint = self.devices.of(target.device()).and_then(|device| device.faulted(now_us));
        Some(Faulted { owner: (target.queue.index(), target.name(), target.opaque), restraint })
    }

    #[inline]
    fn target_of(&self, stream: StreamId, pasid: Option<Pasid>) -> Option<Target> {
        let attachments = &self.attachments;
        let target = attachments.find(stream, pasid).or_else(|| attachments.find_leaving(stream, pasid))?;
        self.queue(target.queue)?;
        Some(target)
    }

    // Groups.

    /// Ends the group that `cookie` names as the owner of `queue` asked. Whoever gets the [`Answer`] sends it; no one else
    /// can.
    ///
    /// A response failure would stop every function that shares the device's page request interface: hardware is told that
    /// the pages are invalid, and the device is held to [`Restraint::RequestsOff`]. Looks at one slot.
    pub fn settle(
        &self,
        queue: QueueId,
        cookie: Cookie,
        outcome: Outcome,
        now_us: u64,
    ) -> Result<Settled<'_, S>, Refusal> {
        let queue = self.queue(queue).ok_or(Refusal::OutOfRange)?;
        match queue.settle(cookie, outcome, now_us)? {
            Settlement::Won(won) => {
                self.book_settled(queue, &won, outcome, now_us);
                Ok(Settled::Now(won.answer))
            }
            Settlement::Held(device) => {
                if let Some(device) = self.devices.at(device) {
                    count(&device.counters.held);
                    device.answered_in_time();
                }
                Ok(Settled::Held)
            }
        }
    }

    fn book_settled(&self, queue: &Queue<S>, won: &Won<'_, S>, outcome: Outcome, now_us: u64) {
        self.book(queue, won, now_us);
        let Some(device) = self.devices.at(won.device) else { return };
        match outcome {
            Outcome::Success => {
                count(&device.counters.succeeded);
                let pasid = won.answer.response().tag.pasid;
                queue.for_each_page(won.answer.slot(), |page| device.repaired(pasid, page.iova()));
            }
            Outcome::Invalid => count(&device.counters.declined),
            Outcome::Failure => {
                count(&device.counters.failed);
                device.restrain(Restraint::RequestsOff);
            }
        }
        device.answered_in_time();
    }

    /// Takes note that a group is answered, by whomever.
    pub(crate) fn book(&self, queue: &Queue<S>, won: &Won<'_, S>, now_us: u64) {
        let Some(device) = self.devices.at(won.device) else { return };
        device.discharge(queue.pages(won.answer.slot()) as u64);
        device.answer.count(now_us.saturating_sub(won.reported_us));
    }

    /// Books a success that was held back and is sent now.
    pub(crate) fn book_held(&self, queue: &Queue<S>, won: &Won<'_, S>, now_us: u64) {
        self.book_settled(queue, won, Outcome::Success, now_us);
    }

    /// Ends some whole group of what is going away, as invalid; `None` when there is none left. Looks at `S` slots.
    pub fn evict(&self, queue: QueueId, whose: Whose, now_us: u64) -> Option<Answer<'_, S>> {
        let queue = self.queue(queue)?;
        let pick = |_: State, device: u32, attachment: u32| {
            let is_it = match whose {
                Whose::Attachment(AttachmentId(Id { place, .. })) => attachment == place,
                Whose::Device(DeviceId(Id { place, .. })) => device == place,
                Whose::All => true,
            };
            is_it.then_some(Outcome::Invalid)
        };
        let (won, _) = (0..S as u16).find_map(|slot| queue.end(slot, pick))?;
        self.book(queue, &won, now_us);
        if let Some(device) = self.devices.at(won.device) {
            count(&device.counters.evicted);
        }
        Some(won.answer)
    }
}
