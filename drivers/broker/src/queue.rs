//! The groups that one owner may have outstanding.

use crate::{
    Cookie, Missed,
    attachments::{Target, who},
    cookie::{GENERATION, SLOTS},
    counters::{Misses, count},
};
use core::{
    fmt,
    sync::atomic::{
        AtomicU64,
        Ordering::{self, AcqRel, Acquire, Relaxed, Release},
        fence,
    },
};
use heapless::Vec;
use iommu::{GroupTag, Iova, Outcome, PAGE_SIZE, PageRequest, PageResponse, Pasid, Perms, StreamId};

/// Pages of one group, at most.
pub const PAGES: usize = 16;

/// What a slot's word says, in its bits 6:0; the generation is in 63:8.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub(crate) enum State {
    /// Nothing here.
    Free = 0,
    /// The interrupt handler is putting a group together.
    Assembling = 1,
    /// A whole group waits for its owner's core.
    Waiting = 2,
    /// The owner knows.
    Delivered = 3,
    /// It will be answered with success, later.
    HeldSuccess = 4,
    /// It will be answered as invalid, later.
    HeldInvalid = 5,
    /// Someone won the right to answer, and is doing so.
    Answering = 6,
}

/// In a slot's word: the slot is on its way to its owner's core, which will look at it once more. The interrupt handler sets
/// it as a group becomes whole, and that core alone clears it.
const ANNOUNCED: u64 = 1 << 7;
const STATE: u64 = ANNOUNCED - 1;
const ONE_GENERATION: u64 = 1 << 8;
/// The low bits of a slot's word whose group waits, and is announced.
const WAITING: u64 = ANNOUNCED | State::Waiting as u64;

impl State {
    fn of(word: u64) -> Self {
        match word & STATE {
            1 => Self::Assembling,
            2 => Self::Waiting,
            3 => Self::Delivered,
            4 => Self::HeldSuccess,
            5 => Self::HeldInvalid,
            6 => Self::Answering,
            _ => Self::Free,
        }
    }

    /// The word of a group that was in another state.
    fn after(self, word: u64) -> u64 {
        word & !STATE | self as u64
    }

    /// Returns whether a group is whole, and not yet being answered.
    fn is_outstanding(self) -> bool {
        matches!(self, Self::Waiting | Self::Delivered | Self::HeldSuccess | Self::HeldInvalid)
    }
}

fn generation(word: u64) -> u64 {
    word >> ONE_GENERATION.ilog2() & GENERATION
}

/// How a group was begun, as what is added to its slot's word when it is whole.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub(crate) enum Begun {
    /// By this very request: its slot was free until now. Generations count modulo 2^56, of which a cookie has 52.
    Whole = ONE_GENERATION + State::Waiting as u64,
    /// By an earlier one.
    Before = State::Waiting as u64 - State::Assembling as u64,
}

/// A place for one group.
///
/// The payload is written by the interrupt handler alone, while `word` says free or assembling, and read by whoever a change
/// of `word` made its reader. All of it is atomic: a reader that came too late sees another group's words, never half a
/// word, and `word` tells it so.
#[derive(Debug)]
struct Slot {
    word: AtomicU64,
    /// The device and the PASID, as everywhere.
    who: AtomicU64,
    /// The place of its device in 31:0, the owner's name for it in 63:32: as its attachment has them.
    device_name: AtomicU64,
    opaque: AtomicU64,
    /// Group index in 15:0, number of pages in 23:16, the place of its attachment in 63:32.
    group: AtomicU64,
    reported_us: AtomicU64,
    /// An answer is held back until this long after the report, in microseconds.
    hold_us: AtomicU64,
    /// The address of each page, with what is wanted there in its low bits.
    pages: [AtomicU64; PAGES],
}

/// One page, in a slot's `group`.
const ONE_PAGE: u64 = 1 << 16;

/// Returns the number of pages, from a slot's `group`.
fn pages_of(group: u64) -> usize {
    (group >> 16 & 0xFF) as usize
}

impl Slot {
    const fn new() -> Self {
        Self {
            word: AtomicU64::new(0),
            who: AtomicU64::new(0),
            device_name: AtomicU64::new(0),
            opaque: AtomicU64::new(0),
            group: AtomicU64::new(0),
            reported_us: AtomicU64::new(0),
            hold_us: AtomicU64::new(0),
            pages: [const { AtomicU64::new(0) }; PAGES],
        }
    }

    /// Writes the payload of a group of one request so far. The slot is free, or was until just now.
    #[inline]
    fn fill(&self, target: &Target, attachment: u32, request: &PageRequest, page: Page, now_us: u64) {
        // ORDER: whoever still reads the payload for the group before sees that its word changed if it sees any of this.
        fence(Release);
        let PageRequest { stream, tag, .. } = *request;
        self.pages[0].store(page.0, Relaxed);
        self.who.store(who(stream, Pasid::word(tag.pasid)), Relaxed);
        self.device_name.store(target.device_name, Relaxed);
        self.opaque.store(target.opaque, Relaxed);
        self.group.store(u64::from(attachment) << 32 | u64::from(tag.index) | ONE_PAGE, Relaxed);
        self.reported_us.store(now_us, Relaxed);
    }

    /// Adds to the word, in a state where nobody else changes it but for the owner's core, which may clear `ANNOUNCED`.
    #[inline]
    fn step(&self, word: u64, by: u64, order: Ordering) {
        if word & ANNOUNCED == 0 {
            self.word.store(word.wrapping_add(by), order);
        } else {
            self.word.fetch_add(by, order);
        }
    }

    /// What the owner's core does with a slot that was announced, and whose group is not waiting, or is being answered just
    /// now: it takes the announcement back, and looks once more. Returns the word if it is delivered after all.
    #[cold]
    fn look_again(&self) -> Option<u64> {
        self.word.fetch_and(!ANNOUNCED, AcqRel);
        // From here on the slot is announced anew. What waited before, and was not announced because the slot was, is here.
        let word = self.word.load(Acquire);
        if word & ANNOUNCED != 0 || State::of(word) != State::Waiting {
            return None;
        }
        let delivered = State::Delivered.after(word);
        self.word.compare_exchange(word, delivered, AcqRel, Relaxed).ok()?;
        Some(delivered)
    }

    fn count(&self) -> usize {
        pages_of(self.group.load(Relaxed))
    }

    fn pages(&self) -> impl Iterator<Item = Page> {
        self.pages.iter().take(self.count()).map(|page| Page(page.load(Relaxed)))
    }

    fn name(&self) -> (StreamId, GroupTag) {
        let (who, group) = (self.who.load(Relaxed), self.group.load(Relaxed));
        (StreamId((who >> 32) as u32), GroupTag { pasid: Pasid::from_word(who as u32), index: group as u16 })
    }
}

/// One page that a group asks for: its address, and in the low bits of that what is wanted. One word, so that it goes from
/// the report to its owner in one move.
#[derive(Clone, Copy, Eq, PartialEq)]
pub struct Page(u64);

impl Page {
    const READ: u64 = 1 << 0;
    const WRITE: u64 = 1 << 1;
    const EXECUTE: u64 = 1 << 2;
    const PRIVILEGED: u64 = 1 << 3;

    /// The page that `iova` lies in.
    #[inline]
    pub fn new(iova: Iova, perms: Perms) -> Self {
        let Perms { read, write, execute, privileged } = perms;
        // Four bytes that are 0 or 1 become four bits: the product has a copy of each where the highest byte has its bits 0 to
        // 3, and nothing else there. A third of the instructions of four shifts.
        let bytes = u32::from_le_bytes([read.into(), write.into(), execute.into(), privileged.into()]);
        let bits = bytes.wrapping_mul(1 << 24 | 1 << 17 | 1 << 10 | 1 << 3) >> 24;
        Self(iova.0 & !(PAGE_SIZE - 1) | u64::from(bits))
    }

    /// Returns whether anything is wanted there.
    #[inline]
    pub(crate) fn is_for_some_access(self) -> bool {
        self.0 & (Self::READ | Self::WRITE | Self::EXECUTE) != 0
    }

    /// The page.
    #[inline]
    pub fn iova(self) -> Iova {
        Iova(self.0 & !(PAGE_SIZE - 1))
    }

    /// What the device wants to do there.
    #[inline]
    pub fn perms(self) -> Perms {
        Perms {
            read: self.0 & Self::READ != 0,
            write: self.0 & Self::WRITE != 0,
            execute: self.0 & Self::EXECUTE != 0,
            privileged: self.0 & Self::PRIVILEGED != 0,
        }
    }
}

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Page").field("iova", &self.iova()).field("perms", &self.perms()).finish()
    }
}

#[cfg(feature = "defmt")]
impl defmt::Format for Page {
    fn format(&self, f: defmt::Formatter<'_>) {
        defmt::write!(f, "{} {}", self.iova(), self.perms());
    }
}

/// A whole group, as it lies in its slot.
///
/// It may be answered while it is read, and its slot used again: what was read is to be thrown away then.
#[derive(Clone, Copy, Debug)]
pub struct Shown<'l> {
    slot: &'l Slot,
    cookie: Cookie,
    /// The slot's.
    group: u64,
    device_name: u64,
    reported_us: u64,
}

impl Shown<'_> {
    /// Returns what the owner answers with.
    #[inline]
    pub fn cookie(&self) -> Cookie {
        self.cookie
    }

    /// Returns the owner's own name for the device.
    #[inline]
    pub fn name(&self) -> u32 {
        (self.device_name >> 32) as u32
    }

    /// Returns the value that the attachment was made with.
    #[inline]
    pub fn opaque(&self) -> u64 {
        self.slot.opaque.load(Relaxed)
    }

    /// Returns the PASID, and the device's number for the group.
    #[inline]
    pub fn tag(&self) -> GroupTag {
        GroupTag { pasid: Pasid::from_word(self.slot.who.load(Relaxed) as u32), index: self.group as u16 }
    }

    /// Returns when the first of its requests was reported, in microseconds.
    #[inline]
    pub fn reported_us(&self) -> u64 {
        self.reported_us
    }

    /// Returns how many pages it asks for, at most [`PAGES`].
    #[inline]
    pub fn pages(&self) -> usize {
        pages_of(self.group)
    }

    /// Returns the page of its request number `index`.
    #[inline]
    pub fn page(&self, index: usize) -> Page {
        Page(self.slot.pages[index % PAGES].load(Relaxed))
    }

    /// Returns the place of its device.
    #[inline]
    pub(crate) fn device(&self) -> u32 {
        self.device_name as u32
    }
}

/// A whole group, as its owner is to see it, for whoever keeps it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Group {
    /// What the owner answers with.
    pub cookie: Cookie,
    /// The owner's own name for the device.
    pub name: u32,
    /// The value that the attachment was made with.
    pub opaque: u64,
    /// The PASID, and the device's number for the group.
    pub tag: GroupTag,
    /// When the first of its requests was reported, in microseconds.
    pub reported_us: u64,
    /// The pages, in the order of their requests.
    pub pages: Vec<Page, PAGES>,
}

impl From<Shown<'_>> for Group {
    fn from(group: Shown<'_>) -> Self {
        Self {
            cookie: group.cookie(),
            name: group.name(),
            opaque: group.opaque(),
            tag: group.tag(),
            reported_us: group.reported_us(),
            pages: (0..group.pages()).map(|index| group.page(index)).collect(),
        }
    }
}

/// A group that is its owner's, in a slot whose word said so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delivered<'l> {
    slot: &'l Slot,
    at: u16,
    word: u64,
    /// Its queue's.
    first: u64,
}

impl<'l> Delivered<'l> {
    /// Shows it, to be read.
    #[inline]
    pub fn show(&self) -> Shown<'l> {
        let &Self { slot, at, word, first } = self;
        let cookie = Cookie::new(at, generation(word).wrapping_add(first) & GENERATION);
        let [group, device_name, reported_us] =
            [&slot.group, &slot.device_name, &slot.reported_us].map(|word| word.load(Relaxed));
        Shown { slot, cookie, group, device_name, reported_us }
    }

    /// Returns whether what was read is the group; else it was answered meanwhile, and that may be a mixture.
    #[inline]
    pub fn is_still(&self) -> bool {
        // ORDER: the payload was read before the word is read again. If someone answered meanwhile, the slot may
        // hold another group already.
        fence(Acquire);
        self.slot.word.load(Relaxed) == self.word
    }
}

/// Why an answer was refused. Whatever it is, nothing changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Refusal {
    /// There is no such slot, or no such queue.
    OutOfRange,
    /// The slot holds a later group.
    Stale,
    /// The group was answered already: by its owner, or for it.
    Late,
    /// No group ever had this cookie.
    Unknown,
}

/// The right to answer one group, won once.
///
/// Its slot is free again when the answer was sent, and not before.
#[derive(Debug)]
#[must_use = "the device waits until the answer is sent"]
pub struct Answer<'l, const S: usize> {
    queue: &'l Queue<S>,
    slot: u16,
    response: PageResponse,
}

impl<const S: usize> PartialEq for Answer<'_, S> {
    fn eq(&self, other: &Self) -> bool {
        core::ptr::eq(self.queue, other.queue) && self.slot == other.slot && self.response == other.response
    }
}

impl<const S: usize> Eq for Answer<'_, S> {}

impl<const S: usize> Answer<'_, S> {
    /// Returns the response, to look at.
    pub fn response(&self) -> &PageResponse {
        &self.response
    }

    /// Returns the slot where the group waited.
    pub fn slot(&self) -> u16 {
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

/// What a group that was just won was about, for the books of its device.
pub(crate) struct Won<'l, const S: usize> {
    pub answer: Answer<'l, S>,
    pub device: u32,
    pub reported_us: u64,
}

/// Words of free slots, and slots of one word.
const WORDS: usize = SLOTS / WORD;
const WORD: usize = 64;

/// What became of a settlement.
pub(crate) enum Settlement<'l, const S: usize> {
    Won(Won<'l, S>),
    /// The answer is held back; the place of the device.
    Held(u32),
}

/// The groups that one owner may have outstanding: `S` slots, at most 4096.
#[derive(Debug)]
pub(crate) struct Queue<const S: usize> {
    slots: [Slot; S],
    /// Bit n of word w set: slot w * 64 + n is free. Whoever answers sets, the interrupt handler alone clears.
    free: [AtomicU64; WORDS],
    /// Bit w clear: word w of `free` is 0, or someone is about to set the bit. Set, the word may be 0 all the same: the slot
    /// was taken before whoever freed it set the bit.
    summary: AtomicU64,
    /// The word where the interrupt handler found a free slot last: it looks there first.
    last: AtomicU64,
    /// What is added to a slot's generation to make a cookie, so that no two queues make the same one.
    first: AtomicU64,
    misses: Misses,
}

impl<const S: usize> Queue<S> {
    /// A queue without free slots. All of it is zero.
    pub const fn new() -> Self {
        const { assert!(S > 0 && S <= SLOTS, "a queue has 1 to 4096 slots") };
        Self {
            slots: [const { Slot::new() }; S],
            free: [const { AtomicU64::new(0) }; WORDS],
            summary: AtomicU64::new(0),
            last: AtomicU64::new(0),
            first: AtomicU64::new(0),
            misses: Misses::new(),
        }
    }

    /// Frees all slots. Nobody uses the queue yet.
    pub fn open(&self, first_generation: u64) {
        self.first.store(first_generation & GENERATION, Relaxed);
        self.misses.reset();
        (0..S as u16).for_each(|slot| self.free(slot));
    }

    /// Takes all slots away again; `false`, and nothing changed, if one is in use.
    pub fn close(&self) -> bool {
        if self.outstanding() != 0 {
            return false;
        }
        for word in &self.free {
            word.store(0, Relaxed);
        }
        self.summary.store(0, Relaxed);
        true
    }

    pub fn missed(&self) -> Missed {
        self.misses.tally()
    }

    /// Returns the groups that were begun and are not yet answered.
    pub fn outstanding(&self) -> usize {
        let free: u32 = self.free.iter().map(|word| word.load(Acquire).count_ones()).sum();
        S - free as usize
    }

    fn free(&self, slot: u16) {
        let (word, bit) = (usize::from(slot) / WORD, usize::from(slot) % WORD);
        self.free[word % WORDS].fetch_or(1 << bit, AcqRel);
        // ORDER: the slot is free before its word is said to have some.
        self.summary.fetch_or(1 << word, AcqRel);
    }

    /// Takes out a free slot. The interrupt handler alone calls it.
    #[inline]
    fn take(&self) -> Option<usize> {
        let mut word = self.last.load(Relaxed) as usize % WORDS;
        let mut free = self.free[word].load(Acquire);
        if free == 0 {
            (word, free) = self.find_free()?;
        }
        let bit = free.trailing_zeros() as usize;
        // What it was is not asked of the change itself: that would be a loop around a compare-and-swap.
        self.free[word].fetch_and(!(1 << bit), AcqRel);
        Some(word * WORD + bit)
    }

    /// Returns some word that has free slots, and which.
    #[cold]
    #[inline(never)]
    fn find_free(&self) -> Option<(usize, u64)> {
        // At most one round for each word that was said to have a free slot after that was taken.
        for _ in 0..=WORDS {
            let summary = self.summary.load(Acquire);
            if summary == 0 {
                return None;
            }
            let word = summary.trailing_zeros() as usize;
            let free = self.free[word].load(Acquire);
            if free != 0 {
                self.last.store(word as u64, Relaxed);
                return Some((word, free));
            }
            self.exhaust(word);
        }
        None
    }

    /// Takes note that a word of free slots was seen empty.
    fn exhaust(&self, word: usize) {
        self.summary.fetch_and(!(1 << word), AcqRel);
        // ORDER: whoever freed one meanwhile set the bit before it was cleared, and is seen here, or sets it after.
        if self.free[word].load(Acquire) != 0 {
            self.summary.fetch_or(1 << word, AcqRel);
        }
    }

    /// Takes a free slot for a group that begins with this request, which asks for `page`. [`complete`](Self::complete) declares
    /// it whole; if that is at once, its word says until then that the slot is free. The interrupt handler alone calls it.
    #[inline]
    pub fn begin(
        &self,
        target: &Target,
        attachment: u32,
        request: &PageRequest,
        page: Page,
        now_us: u64,
    ) -> Option<u16> {
        let at = self.take()?;
        let slot = self.slots.get(at)?;
        if !request.last {
            let by = ONE_GENERATION + State::Assembling as u64;
            slot.step(slot.word.load(Relaxed), by, Relaxed);
        }
        slot.fill(target, attachment, request, page, now_us);
        Some(at as u16)
    }

    /// Adds a page to a group that is being put together; `false` if it has as many as it can.
    pub fn add(&self, slot: u16, request: &PageRequest) -> bool {
        let Some(slot) = self.slots.get(usize::from(slot)) else { return false };
        let group = slot.group.load(Relaxed);
        let Some(page) = slot.pages.get(pages_of(group)) else { return false };
        page.store(Page::new(request.iova, request.perms).0, Relaxed);
        slot.group.store(group + ONE_PAGE, Relaxed);
        true
    }

    /// Declares a group whole, with an answer held back so long. Returns whether its owner's core has to be told of the
    /// slot; else it will look anyway.
    #[inline]
    pub fn complete(&self, slot: u16, from: Begun, hold_us: u64) -> bool {
        let Some(slot) = self.slots.get(usize::from(slot)) else { return false };
        slot.hold_us.store(hold_us, Relaxed);
        let by = from as u64;
        let mut word = slot.word.load(Relaxed);
        if word & ANNOUNCED != 0 {
            // ORDER: as below. If it changed, the owner's core has just looked, and too early.
            match slot.word.compare_exchange(word, word.wrapping_add(by), Release, Relaxed) {
                Ok(_) => return false,
                Err(changed) => word = changed,
            }
        }
        // ORDER: whoever sees the group waiting sees its payload. Nobody else changes the word now.
        slot.word.store(word.wrapping_add(by | ANNOUNCED), Release);
        true
    }

    /// Returns whether a slot is on its way to its owner's core, or was when its ring went away.
    pub fn is_announced(&self, slot: u16) -> bool {
        self.slots.get(usize::from(slot)).is_some_and(|slot| slot.word.load(Acquire) & ANNOUNCED != 0)
    }

    /// Returns the pages of a group that is being put together.
    pub fn pages(&self, slot: u16) -> usize {
        self.slots.get(usize::from(slot)).map_or(0, Slot::count)
    }

    /// Gives a slot back. The group in it was answered, or is half-seen, and then only the interrupt handler knows of it.
    pub fn release(&self, at: u16) {
        if let Some(slot) = self.slots.get(usize::from(at)) {
            // The generation stays, so that an answer that comes late is known as such.
            let word = slot.word.load(Relaxed);
            slot.step(word, (word & STATE).wrapping_neg(), Release);
            self.free(at);
        }
    }

    /// Returns whether a whole group in `slot` has no answer yet.
    pub fn is_outstanding(&self, slot: u16) -> bool {
        let slot = self.slots.get(usize::from(slot));
        slot.is_some_and(|slot| State::of(slot.word.load(Acquire)).is_outstanding())
    }

    /// Makes the group that waits in slot `at`, which was announced, its owner's; `None` if it was answered meanwhile.
    ///
    /// Only the owner's core calls it, once for each announcement.
    #[inline]
    pub fn deliver(&self, at: u16) -> Option<Delivered<'_>> {
        let slot = self.slots.get(usize::from(at))?;
        let first = self.first.load(Relaxed);
        let word = slot.word.load(Acquire);
        if word & (ANNOUNCED | STATE) == WAITING {
            let delivered = word - (WAITING - State::Delivered as u64);
            if slot.word.compare_exchange(word, delivered, AcqRel, Relaxed).is_ok() {
                return Some(Delivered { slot, at, word: delivered, first });
            }
        }
        Some(Delivered { slot, at, word: slot.look_again()?, first })
    }

    /// Ends the group that `cookie` names as its owner asked, or holds the answer back.
    pub fn settle(
        &self,
        cookie: Cookie,
        outcome: Outcome,
        now_us: u64,
    ) -> Result<Settlement<'_, S>, Refusal> {
        let settled = self.try_settle(cookie, outcome, now_us);
        if let Err(refusal) = &settled {
            count(match refusal {
                Refusal::OutOfRange => &self.misses.out_of_range,
                Refusal::Stale => &self.misses.stale,
                Refusal::Late => &self.misses.late,
                Refusal::Unknown => &self.misses.unknown,
            });
        }
        settled
    }

    fn try_settle(
        &self,
        cookie: Cookie,
        outcome: Outcome,
        now_us: u64,
    ) -> Result<Settlement<'_, S>, Refusal> {
        let at = cookie.slot();
        // Where there is no such slot another is looked at, so that a refusal takes the same work whatever its reason.
        let is_there = usize::from(at) < S;
        let slot = self.slots.get(usize::from(at)).unwrap_or(&self.slots[0]);
        let wanted = cookie.generation().wrapping_sub(self.first.load(Relaxed)) & GENERATION;
        let mut word = slot.word.load(Acquire);
        if !is_there {
            return Err(Refusal::OutOfRange);
        }
        // A group changes at most three times more before it is answered, and is announced once, so this ends in the fifth round.
        loop {
            let current = generation(word);
            if current != wanted {
                // Generations count up from 1: what is below was here once, what is above, as another queue's is, never was.
                let was_here = wanted != 0 && wanted < current;
                return Err(if was_here { Refusal::Stale } else { Refusal::Unknown });
            }
            match State::of(word) {
                State::Waiting | State::Delivered => {}
                State::Free if current == 0 => return Err(Refusal::Unknown),
                State::Free | State::Answering | State::HeldSuccess | State::HeldInvalid => {
                    return Err(Refusal::Late);
                }
                State::Assembling => return Err(Refusal::Unknown),
            }
            let age_us = now_us.wrapping_sub(slot.reported_us.load(Relaxed));
            let is_held = outcome == Outcome::Success && age_us < slot.hold_us.load(Relaxed);
            let next = if is_held { State::HeldSuccess } else { State::Answering };
            let device = slot.device_name.load(Relaxed) as u32;
            match slot.word.compare_exchange(word, next.after(word), AcqRel, Acquire) {
                Ok(_) if is_held => return Ok(Settlement::Held(device)),
                Ok(_) => return Ok(Settlement::Won(self.won(at, slot, outcome))),
                Err(changed) => word = changed,
            }
        }
    }

    /// Ends the whole group in slot `at` with the outcome that `pick` has for its state, the place of its device and that
    /// of its attachment; leaves it alone if there is none.
    pub fn end(
        &self,
        at: u16,
        pick: impl Fn(State, u32, u32) -> Option<Outcome>,
    ) -> Option<(Won<'_, S>, State)> {
        let slot = self.slots.get(usize::from(at))?;
        let mut word = slot.word.load(Acquire);
        // As in `try_settle`, this ends in the fifth round.
        loop {
            let state = State::of(word);
            if !state.is_outstanding() {
                return None;
            }
            let (device, attachment) =
                (slot.device_name.load(Relaxed) as u32, slot.group.load(Relaxed) >> 32);
            let outcome = pick(state, device, attachment as u32)?;
            let answering = State::Answering.after(word);
            match slot.word.compare_exchange(word, answering, AcqRel, Acquire) {
                Ok(_) => return Some((self.won(at, slot, outcome), state)),
                Err(changed) => word = changed,
            }
        }
    }

    /// Decides that the whole group in `slot` will be answered as invalid, later, and returns the place of its device; `None`
    /// if it is being answered. The interrupt handler alone calls it.
    pub fn poison(&self, slot: u16) -> Option<u32> {
        let slot = self.slots.get(usize::from(slot))?;
        let mut word = slot.word.load(Acquire);
        while State::of(word).is_outstanding() {
            let held = State::HeldInvalid.after(word);
            match slot.word.compare_exchange(word, held, AcqRel, Acquire) {
                Ok(_) => return Some(slot.device_name.load(Relaxed) as u32),
                Err(changed) => word = changed,
            }
        }
        None
    }

    /// The caller's change of the word made the slot its own: nobody writes the payload until it is released.
    fn won<'l>(&'l self, at: u16, slot: &Slot, outcome: Outcome) -> Won<'l, S> {
        // Hardware never hears of a response failure: it would stop every function that shares the interface.
        let outcome = if outcome == Outcome::Failure { Outcome::Invalid } else { outcome };
        let (stream, tag) = slot.name();
        let response = PageResponse { stream, tag, outcome };
        Won {
            answer: Answer { queue: self, slot: at, response },
            device: slot.device_name.load(Relaxed) as u32,
            reported_us: slot.reported_us.load(Relaxed),
        }
    }

    /// Does `f` for each page of a group that was won.
    pub fn for_each_page(&self, slot: u16, f: impl FnMut(Page)) {
        if let Some(slot) = self.slots.get(usize::from(slot)) {
            slot.pages().for_each(f);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_is_said_to_have_a_free_slot_and_has_none_does_not_hide_those_of_others() {
        let queue = std::boxed::Box::new(Queue::<130>::new());
        queue.open(0);
        (0..128).for_each(|slot| assert_eq!(queue.take(), Some(slot)));

        queue.summary.fetch_or(0b11, AcqRel);
        assert_eq!([queue.take(), queue.take(), queue.take()], [Some(128), Some(129), None]);
    }

    #[test]
    fn a_page_keeps_its_address_and_each_of_its_permissions() {
        for bits in 0..16 {
            let [read, write, execute, privileged] = [0, 1, 2, 3].map(|bit| bits >> bit & 1 == 1);
            let perms = Perms { read, write, execute, privileged };

            let page = Page::new(Iova(0xFFFF_0000_1234_5FFF), perms);

            assert_eq!((page.iova(), page.perms()), (Iova(0xFFFF_0000_1234_5000), perms));
        }
    }
}
