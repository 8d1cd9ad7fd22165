//! The hypervisor's side of a channel: the only producer.

use crate::{
    Record,
    record::{self, RECORD_WORDS},
    ring::{
        CONSUMER, EVENTS, EVENTS_LOST_WORD, EVENTS_WORD, FRAMES, HEADER, MAGIC, MAGIC_WORD, RECORDS,
        REQUESTS, REQUESTS_LOST_WORD, REQUESTS_WORD, VERSION, VERSION_WORD,
    },
};
use core::sync::atomic::{Ordering, fence};
use iommu::DmaBuf;

/// The guest wrote a consumer index that cannot be: it goes back, or runs ahead of what was produced.
///
/// It is reported once, and ends the channel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Broken {
    /// Records produced.
    pub produced: u64,
    /// Records that the guest claims to have consumed.
    pub consumed: u64,
}

/// What became of what was offered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[must_use = "what did not fit is not in the ring"]
pub enum Pushed {
    /// It is visible to the guest.
    Yes,
    /// There is no room now.
    Full,
    /// A group of more pages than the ring has places: there will never be room.
    TooLarge,
    /// The guest broke the channel before: nothing is shown any more.
    Ended,
}

/// What the hypervisor keeps of one ring: in frame `FRAME`, its indices in word `WORD` of header and consumer frame.
///
/// Indices count modulo 2^64.
#[derive(Debug)]
struct Ring<const FRAME: usize, const WORD: usize> {
    produced: u64,
    /// What the guest had consumed when it was last looked at.
    consumed: u64,
}

impl<const FRAME: usize, const WORD: usize> Ring<FRAME, WORD> {
    const fn counting_from(first: u64) -> Self {
        Self { produced: first, consumed: first }
    }

    /// Returns how many records fit, by what the guest says that it has consumed.
    ///
    /// The guest's word is read once: what was checked is what is used.
    fn room(&mut self, frames: &[DmaBuf; FRAMES]) -> Result<u64, Broken> {
        let consumed = frames[CONSUMER].load(WORD);
        // ORDER: the guest has read what it gives back before the place is written again.
        fence(Ordering::Acquire);
        let unread = self.produced.wrapping_sub(consumed);
        // What is unread can only have become less. At most RECORDS were, so this holds them to that as well.
        if unread > self.produced.wrapping_sub(self.consumed) {
            return Err(Broken { produced: self.produced, consumed });
        }
        self.consumed = consumed;
        Ok(RECORDS - unread)
    }

    /// Writes `record` where index `at` has its place.
    fn write(frames: &mut [DmaBuf; FRAMES], at: u64, record: &Record) {
        let place = (at % RECORDS) as usize * RECORD_WORDS;
        frames[FRAME].store_all(place, record.0);
    }

    /// Makes everything before index `produced` visible.
    fn show(&mut self, frames: &mut [DmaBuf; FRAMES], produced: u64) {
        self.produced = produced;
        // ORDER: the records are visible before the index that admits them.
        fence(Ordering::Release);
        frames[HEADER].store(WORD, produced);
    }
}

/// The hypervisor's side of a channel. The guest's home core owns it.
#[derive(Debug)]
pub struct Host {
    frames: [DmaBuf; FRAMES],
    requests: Ring<REQUESTS, REQUESTS_WORD>,
    events: Ring<EVENTS, EVENTS_WORD>,
    requests_lost: u64,
    events_lost: u64,
    ended: bool,
}

impl Host {
    /// Opens a channel in four frames that the guest will see one after the other, the last of them writable.
    pub fn new(frames: [DmaBuf; FRAMES]) -> Self {
        Self::counting_from(0, frames)
    }

    /// Opens a channel whose indices begin at `first`: they wrap at 2^64, and nobody can wait for that.
    pub fn counting_from(first: u64, mut frames: [DmaBuf; FRAMES]) -> Self {
        for frame in &mut frames {
            frame.clear();
        }
        for frame in [HEADER, CONSUMER] {
            frames[frame].store(REQUESTS_WORD, first);
            frames[frame].store(EVENTS_WORD, first);
        }
        frames[HEADER].store(VERSION_WORD, VERSION | RECORDS << 32);
        // ORDER: who finds the magic number finds everything else.
        fence(Ordering::Release);
        frames[HEADER].store(MAGIC_WORD, MAGIC);
        Self {
            frames,
            requests: Ring::counting_from(first),
            events: Ring::counting_from(first),
            requests_lost: 0,
            events_lost: 0,
            ended: false,
        }
    }

    /// Gives the frames back; the guest must have lost its mapping of them.
    pub fn into_frames(self) -> [DmaBuf; FRAMES] {
        self.frames
    }

    /// Returns the number of events that found no room, here or before they came here.
    pub fn events_lost(&self) -> u64 {
        self.events_lost
    }

    /// Begins a batch of requests, in the room that the guest has made until now. A channel that has ended has none.
    #[inline]
    pub fn requests(&mut self) -> Result<Batch<'_>, Broken> {
        let room = match self.ended {
            true => 0,
            false => self.requests.room(&self.frames).inspect_err(|_| self.ended = true)?,
        };
        let at = self.requests.produced;
        Ok(Batch { host: self, at, offered: at, end: at.wrapping_add(room) })
    }

    /// Makes a whole group visible at once, or nothing of it.
    pub fn push_group(&mut self, records: impl ExactSizeIterator<Item = Record>) -> Result<Pushed, Broken> {
        if self.ended {
            return Ok(Pushed::Ended);
        }
        let count = records.len();
        if count as u64 > RECORDS {
            return Ok(Pushed::TooLarge);
        }
        let mut batch = self.requests()?;
        if !batch.has_room(count) {
            return Ok(Pushed::Full);
        }
        // An iterator may be wrong about its length; there is room for what it said.
        records.take(count).for_each(|record| batch.write(&record));
        batch.accept();
        Ok(Pushed::Yes)
    }

    /// Makes an event visible; if there is no room it is counted as lost. The number is the channel's to give.
    pub fn push_event(&mut self, event: &record::Event) -> Result<Pushed, Broken> {
        let pushed = self.offer_event(event)?;
        if pushed == Pushed::Full {
            self.count_lost_events(1);
        }
        Ok(pushed)
    }

    /// Makes an event visible; if there is no room it is the caller's to offer again.
    // Always inline: as a function of its own it takes the event from memory, which costs a fault 60 instructions.
    #[inline(always)]
    pub fn offer_event(&mut self, event: &record::Event) -> Result<Pushed, Broken> {
        if self.ended {
            return Ok(Pushed::Ended);
        }
        if self.events.room(&self.frames).inspect_err(|_| self.ended = true)? == 0 {
            return Ok(Pushed::Full);
        }
        let (at, lost) = (self.events.produced, self.events_lost);
        let next = at.wrapping_add(1);
        // Numbers count what happened, so that a reader sees the gap.
        let record = Record::event(&record::Event { number: next.wrapping_add(lost), lost, ..*event });
        Ring::<EVENTS, EVENTS_WORD>::write(&mut self.frames, at, &record);
        self.events.show(&mut self.frames, next);
        Ok(Pushed::Yes)
    }

    /// Counts events that were lost; the guest sees the sum at once, and in every event that follows.
    pub fn count_lost_events(&mut self, events: u64) {
        self.events_lost = self.events_lost.wrapping_add(events);
        self.frames[HEADER].store(EVENTS_LOST_WORD, self.events_lost);
    }

    /// Counts requests of the guest's devices that it is never shown; the guest sees the sum at once.
    ///
    /// They were refused, discarded or answered before they came here.
    pub fn count_lost_requests(&mut self, requests: u64) {
        self.requests_lost = self.requests_lost.wrapping_add(requests);
        self.frames[HEADER].store(REQUESTS_LOST_WORD, self.requests_lost);
    }
}

/// Groups of requests that become visible together, when the batch is dropped: the guest's index is read once for all of them,
/// and theirs written once.
#[derive(Debug)]
pub struct Batch<'h> {
    host: &'h mut Host,
    /// Where what is accepted ends, and what was offered after it.
    at: u64,
    offered: u64,
    /// Where the room ends.
    end: u64,
}

impl Batch<'_> {
    /// Writes a group of `count` records behind what was accepted; `false`, and nothing is written, if there is no room. Nobody
    /// sees it unless it is [accepted](Self::accept), and whatever is offered next takes its place.
    #[inline]
    pub fn offer(&mut self, count: usize, record: impl Fn(usize) -> Record) -> bool {
        self.offered = self.at;
        if !self.has_room(count) {
            return false;
        }
        // Most groups are of one page.
        if count == 1 {
            self.write(&record(0));
        } else {
            self.offered = Self::write_all(self.host, self.at, count, record);
        }
        true
    }

    /// Makes what was offered last a part of the batch.
    #[inline]
    pub fn accept(&mut self) {
        self.at = self.offered;
    }

    /// Returns whether nothing was accepted.
    pub fn is_empty(&self) -> bool {
        self.at == self.host.requests.produced
    }

    #[inline]
    fn has_room(&self, count: usize) -> bool {
        count as u64 <= self.end.wrapping_sub(self.at)
    }

    /// Writes several records from index `at` on; returns where they end. Out of line, so that the way of one stays short.
    #[inline(never)]
    fn write_all(host: &mut Host, at: u64, count: usize, record: impl Fn(usize) -> Record) -> u64 {
        (0..count).fold(at, |at, index| {
            Ring::<REQUESTS, REQUESTS_WORD>::write(&mut host.frames, at, &record(index));
            at.wrapping_add(1)
        })
    }

    #[inline]
    fn write(&mut self, record: &Record) {
        Ring::<REQUESTS, REQUESTS_WORD>::write(&mut self.host.frames, self.offered, record);
        self.offered = self.offered.wrapping_add(1);
    }
}

impl Drop for Batch<'_> {
    #[inline]
    fn drop(&mut self) {
        if !self.is_empty() {
            let Host { requests, frames, .. } = &mut *self.host;
            requests.show(frames, self.at);
        }
    }
}
