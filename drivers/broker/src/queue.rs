//! The groups that one guest may have outstanding.

use crate::{Cookie, Counters, Policy, cookie::GENERATION, counters::count};
use core::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
    fence,
};
use heapless::Vec;
use iommu::{GroupTag, Iova, Outcome, PAGE_SIZE, PageRequest, PageResponse, Pasid, Perms, StreamId};

/// Pages of one group, at most.
pub const PAGES: usize = 16;

/// What a slot's word says; the generation is above it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
enum State {
    /// Nothing here.
    Free = 0,
    /// The interrupt handler is putting a group together.
    Assembling = 1,
    /// A whole group waits for its guest's core.
    Waiting = 2,
    /// The guest knows.
    Delivered = 3,
    /// Someone won the right to answer, and is doing so.
    Answering = 4,
}

impl State {
    const BITS: u32 = 8;

    fn of(word: u64) -> Option<Self> {
        [Self::Free, Self::Assembling, Self::Waiting, Self::Delivered, Self::Answering]
            .into_iter()
            .find(|&state| state as u64 == word & 0xFF)
    }

    fn with(self, generation: u64) -> u64 {
        (generation & GENERATION) << Self::BITS | self as u64
    }
}

fn generation(word: u64) -> u64 {
    word >> State::BITS
}

/// A place for one group.
///
/// The payload is written by the interrupt handler alone, while `word` says assembling, and read by whoever a change of
/// `word` made its reader. All of it is atomic: a reader that came too late sees another group's words, never half a
/// word, and `word` tells it so.
#[derive(Debug)]
struct Slot {
    word: AtomicU64,
    /// Stream in 31:0, group index in 47:32, number of pages in 55:48.
    group: AtomicU64,
    /// PASID, all ones if there is none, in 31:0; the guest's name for the device in 63:32.
    pasid_device: AtomicU64,
    opaque: AtomicU64,
    /// The address of each page, with what is wanted there in its low bits.
    pages: [AtomicU64; PAGES],
}

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const EXECUTE: u64 = 1 << 2;
const PRIVILEGED: u64 = 1 << 3;

/// One page that a group asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Page {
    /// The page.
    pub iova: Iova,
    /// What the device wants to do there.
    pub perms: Perms,
}

impl Page {
    fn pack(self) -> u64 {
        let Perms { read, write, execute, privileged } = self.perms;
        let bit = |set, bit| if set { bit } else { 0 };
        self.iova.0 & !(PAGE_SIZE - 1)
            | bit(read, READ)
            | bit(write, WRITE)
            | bit(execute, EXECUTE)
            | bit(privileged, PRIVILEGED)
    }

    fn unpack(word: u64) -> Self {
        let perms = Perms {
            read: word & READ != 0,
            write: word & WRITE != 0,
            execute: word & EXECUTE != 0,
            privileged: word & PRIVILEGED != 0,
        };
        Self { iova: Iova(word & !(PAGE_SIZE - 1)), perms }
    }
}

/// A whole group, as its guest is to see it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Group {
    /// What the guest answers with.
    pub cookie: Cookie,
    /// The guest's own name for the device.
    pub device: u32,
    /// The value that the attachment was made with.
    pub opaque: u64,
    /// The PASID, and the device's number for the group.
    pub tag: GroupTag,
    /// The pages, in the order of their requests.
    pub pages: Vec<Page, PAGES>,
}

/// Why an answer was refused. Whatever it is, nothing changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Refusal {
    /// There is no such slot.
    OutOfRange,
    /// The slot holds a later group.
    Stale,
    /// The group was answered already: by the guest, or for it.
    Late,
    /// No group ever had this cookie.
    Unknown,
}

/// The groups that one guest may have outstanding: `S` slots, at most 64.
#[derive(Debug)]
pub struct Queue<const S: usize> {
    slots: [Slot; S],
    /// Bit n set: slot n is free.
    free: AtomicU64,
    counters: Counters,
}

/// The right to answer one group, won once.
///
/// Its slot is free again when the answer was sent, and not before.
#[derive(Debug)]
#[must_use = "the device waits until the answer is sent"]
pub struct Answer<'q, const S: usize> {
    queue: &'q Queue<S>,
    slot: u8,
    response: PageResponse,
}

impl<const S: usize> Answer<'_, S> {
    /// Returns the response, to look at.
    pub fn response(&self) -> &PageResponse {
        &self.response
    }

    /// Returns the slot where the group waited.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// Hands the response to `send`, and frees the slot. If `send` gives it back, so does this.
    pub fn send<E>(
        self,
        send: impl FnOnce(PageResponse) -> Result<(), (PageResponse, E)>,
    ) -> Result<(), (Self, E)> {
        let Self { queue, slot, response } = self;
        match send(response) {
            Ok(()) => {
                queue.release(slot);
                Ok(())
            }
            Err((response, error)) => Err((Self { queue, slot, response }, error)),
        }
    }
}

impl<const S: usize> Queue<S> {
    /// An empty queue. Its cookies count from `first_generation`, of which 56 bits are used.
    ///
    /// Queues that start far apart never make the same cookie, so that one guest's cookie means nothing to another.
    pub const fn new(first_generation: u64) -> Self {
        assert!(S > 0 && S <= 64, "a queue has 1 to 64 slots");
        let word = (first_generation & GENERATION) << State::BITS;
        let mut queue = Self {
            slots: [const {
                Slot {
                    word: AtomicU64::new(0),
                    group: AtomicU64::new(0),
                    pasid_device: AtomicU64::new(0),
                    opaque: AtomicU64::new(0),
                    pages: [const { AtomicU64::new(0) }; PAGES],
                }
            }; S],
            free: AtomicU64::new(u64::MAX >> (64 - S)),
            counters: Counters::new(),
        };
        let mut at = 0;
        while at < S {
            queue.slots[at].word = AtomicU64::new(word);
            at += 1;
        }
        queue
    }

    /// Returns what happened so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Returns the groups that were begun and are not yet answered.
    pub fn outstanding(&self) -> usize {
        S - self.free.load(Relaxed).count_ones() as usize
    }

    /// Takes a free slot for a new group. The interrupt handler alone calls it.
    pub(crate) fn open(&self, policy: &Policy, tag: GroupTag) -> Option<u8> {
        let free = self.free.load(Acquire);
        if free == 0 {
            return None;
        }
        let at = free.trailing_zeros() as u8;
        self.free.fetch_and(!(1 << at), Relaxed);
        let slot = self.slots.get(usize::from(at))?;
        let next = generation(slot.word.load(Relaxed)).wrapping_add(1);
        slot.word.store(State::Assembling.with(next), Relaxed);
        // ORDER: whoever still reads the payload for the group before sees the new word if it sees any new payload.
        fence(Release);
        slot.group.store(u64::from(policy.stream.0) | u64::from(tag.index) << 32, Relaxed);
        let pasid = tag.pasid.map_or(u32::MAX, Pasid::value);
        slot.pasid_device.store(u64::from(pasid) | u64::from(policy.device) << 32, Relaxed);
        slot.opaque.store(policy.opaque, Relaxed);
        Some(at)
    }

    /// Adds a page to a group that is being put together; `false` if it has as many as it can.
    pub(crate) fn add(&self, slot: u8, request: &PageRequest) -> bool {
        let Some(slot) = self.slots.get(usize::from(slot)) else { return false };
        let group = slot.group.load(Relaxed);
        let Some(page) = slot.pages.get((group >> 48) as usize) else { return false };
        page.store(Page { iova: request.iova, perms: request.perms }.pack(), Relaxed);
        slot.group.store(group + (1 << 48), Relaxed);
        true
    }

    /// Declares a group whole.
    pub(crate) fn complete(&self, slot: u8) {
        if let Some(slot) = self.slots.get(usize::from(slot)) {
            let generation = generation(slot.word.load(Relaxed));
            // ORDER: whoever sees the group waiting sees its payload.
            slot.word.store(State::Waiting.with(generation), Release);
        }
    }

    /// Gives back the slot of a group that is not answered: it was being put together, and nobody else knows of it.
    pub(crate) fn discard(&self, slot: u8) {
        self.release(slot);
    }

    fn release(&self, at: u8) {
        if let Some(slot) = self.slots.get(usize::from(at)) {
            // The generation stays, so that an answer that comes late is known as such.
            let generation = generation(slot.word.load(Relaxed));
            slot.word.store(State::Free.with(generation), Release);
            self.free.fetch_or(1 << at, Release);
        }
    }

    /// Reads a group that waits in `slot`, for its guest; `None` if it was answered meanwhile.
    ///
    /// Only the guest's home core calls it, once for each slot that the interrupt handler announced.
    pub fn deliver(&self, slot: u8) -> Option<Group> {
        let at = slot;
        let slot = self.slots.get(usize::from(at))?;
        let word = slot.word.load(Acquire);
        if State::of(word) != Some(State::Waiting) {
            return None;
        }
        let generation = generation(word);
        let delivered = State::Delivered.with(generation);
        slot.word.compare_exchange(word, delivered, AcqRel, Relaxed).ok()?;
        let group = slot.group.load(Relaxed);
        let pasid_device = slot.pasid_device.load(Relaxed);
        let count = (group >> 48 & 0xFF) as usize;
        let group = Group {
            cookie: Cookie::new(at, generation),
            device: (pasid_device >> 32) as u32,
            opaque: slot.opaque.load(Relaxed),
            tag: GroupTag { pasid: Pasid::new(pasid_device as u32), index: (group >> 32) as u16 },
            pages: slot.pages.iter().take(count).map(|page| Page::unpack(page.load(Relaxed))).collect(),
        };
        // ORDER: the payload was read before the word is read again. If someone answered meanwhile, the slot may
        // hold another group already, and what was read is a mixture.
        fence(Acquire);
        (slot.word.load(Relaxed) == delivered).then_some(group)
    }

    /// Ends the group that `cookie` names as its guest asked. Whoever gets the [`Answer`] sends it; no one else can.
    ///
    /// `Outcome::Failure` would stop every function that shares the device's page request interface, so a guest that
    /// asks for it gets `Invalid` sent.
    pub fn settle(&self, cookie: Cookie, outcome: Outcome) -> Result<Answer<'_, S>, Refusal> {
        let outcome = if outcome == Outcome::Success { Outcome::Success } else { Outcome::Invalid };
        let counter =
            if outcome == Outcome::Success { &self.counters.succeeded } else { &self.counters.declined };
        let answer = self.answer(cookie, outcome);
        count(match &answer {
            Ok(_) => counter,
            Err(Refusal::OutOfRange) => &self.counters.out_of_range,
            Err(Refusal::Stale) => &self.counters.stale,
            Err(Refusal::Late) => &self.counters.late,
            Err(Refusal::Unknown) => &self.counters.unknown,
        });
        answer
    }

    /// Ends some whole group of a device and PASID that is going away; `None` when there is none left.
    pub fn evict(&self, stream: StreamId, pasid: Option<Pasid>) -> Option<Answer<'_, S>> {
        (0..S as u8).find_map(|at| {
            let (cookie, of, tag) = self.live(at)?;
            if of != stream || tag.pasid != pasid {
                return None;
            }
            let answer = self.answer(cookie, Outcome::Invalid).ok()?;
            count(&self.counters.evicted);
            Some(answer)
        })
    }

    /// Ends the group in `slot`, if it still is the one of `cookie`, because nobody answered.
    pub(crate) fn expire(&self, cookie: Cookie) -> Option<Answer<'_, S>> {
        let answer = self.answer(cookie, Outcome::Invalid).ok()?;
        count(&self.counters.expired);
        Some(answer)
    }

    /// Returns the cookie that names the group in `slot` now.
    pub(crate) fn cookie(&self, slot: u8) -> Option<Cookie> {
        let word = self.slots.get(usize::from(slot))?.word.load(Acquire);
        Some(Cookie::new(slot, generation(word)))
    }

    /// Returns whose group waits for an answer in `slot`, if one does.
    pub(crate) fn live(&self, at: u8) -> Option<(Cookie, StreamId, GroupTag)> {
        let slot = self.slots.get(usize::from(at))?;
        let word = slot.word.load(Acquire);
        if !matches!(State::of(word), Some(State::Waiting | State::Delivered)) {
            return None;
        }
        let (group, pasid_device) = (slot.group.load(Relaxed), slot.pasid_device.load(Relaxed));
        // ORDER: as in `deliver`. A change from waiting to delivered leaves the payload as it was.
        fence(Acquire);
        if generation(slot.word.load(Relaxed)) != generation(word) {
            return None;
        }
        let tag = GroupTag { pasid: Pasid::new(pasid_device as u32), index: (group >> 32) as u16 };
        Some((Cookie::new(at, generation(word)), StreamId(group as u32), tag))
    }

    /// The one place where the right to answer is won.
    fn answer(&self, cookie: Cookie, outcome: Outcome) -> Result<Answer<'_, S>, Refusal> {
        let at = cookie.slot();
        let slot = self.slots.get(usize::from(at)).ok_or(Refusal::OutOfRange)?;
        let wanted = cookie.generation();
        let mut word = slot.word.load(Acquire);
        // A group changes at most twice more (delivered, answering), so this ends in the third round.
        loop {
            let current = generation(word);
            if current != wanted {
                // Generations count up, in 56 bits: what is behind was here once, what is ahead never was.
                let behind = current.wrapping_sub(wanted) & GENERATION;
                return Err(if behind <= GENERATION / 2 { Refusal::Stale } else { Refusal::Unknown });
            }
            match State::of(word) {
                Some(State::Waiting | State::Delivered) => {}
                Some(State::Free | State::Answering) => return Err(Refusal::Late),
                Some(State::Assembling) | None => return Err(Refusal::Unknown),
            }
            match slot.word.compare_exchange(word, State::Answering.with(current), AcqRel, Acquire) {
                Ok(_) => break,
                Err(changed) => word = changed,
            }
        }
        // From here on the slot is ours: nobody writes the payload until it is released.
        let (group, pasid_device) = (slot.group.load(Relaxed), slot.pasid_device.load(Relaxed));
        let tag = GroupTag { pasid: Pasid::new(pasid_device as u32), index: (group >> 32) as u16 };
        let response = PageResponse { stream: StreamId(group as u32), tag, outcome };
        Ok(Answer { queue: self, slot: at, response })
    }
}
