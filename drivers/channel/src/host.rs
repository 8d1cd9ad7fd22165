//! The hypervisor's side of a channel: the only producer.

use crate::{
    Record,
    record::{self, RECORD_WORDS},
    ring::{
        CONSUMER, EVENTS, EVENTS_WORD, FRAMES, HEADER, MAGIC, MAGIC_WORD, RECORDS, REQUESTS, REQUESTS_WORD,
        VERSION, VERSION_WORD,
    },
};
use core::sync::atomic::{Ordering, fence};
use iommu::DmaBuf;

/// The guest wrote a consumer index that cannot be: it runs ahead of what was produced, or far behind.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Broken {
    /// Records produced.
    pub produced: u64,
    /// Records that the guest claims to have consumed.
    pub consumed: u64,
}

/// What became of a record that was offered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[must_use = "what did not fit is not in the ring"]
pub enum Pushed {
    /// It is visible to the guest.
    Yes,
    /// There is no room now.
    Full,
}

/// The hypervisor's side of a channel. The guest's home core owns it.
#[derive(Debug)]
pub struct Host {
    frames: [DmaBuf; FRAMES],
    requests: u64,
    events: u64,
    lost: u64,
}

impl Host {
    /// Opens a channel in four frames that the guest will see one after the other, the last of them writable.
    pub fn new(mut frames: [DmaBuf; FRAMES]) -> Self {
        for frame in &mut frames {
            frame.clear();
        }
        frames[HEADER].store(VERSION_WORD, VERSION | RECORDS << 32);
        frames[HEADER].store(MAGIC_WORD, MAGIC);
        Self { frames, requests: 0, events: 0, lost: 0 }
    }

    /// Gives the frames back; the guest must have lost its mapping of them.
    pub fn into_frames(self) -> [DmaBuf; FRAMES] {
        self.frames
    }

    /// Returns the number of events that found no room.
    pub fn events_lost(&self) -> u64 {
        self.lost
    }

    /// Makes a whole group visible at once, or nothing of it.
    pub fn push_group(&mut self, records: impl ExactSizeIterator<Item = Record>) -> Result<Pushed, Broken> {
        let count = records.len() as u64;
        if self.room(self.requests, REQUESTS_WORD)? < count {
            return Ok(Pushed::Full);
        }
        for (at, record) in (self.requests..).zip(records) {
            self.write(REQUESTS, at, &record);
        }
        self.requests += count;
        self.show(REQUESTS_WORD, self.requests);
        Ok(Pushed::Yes)
    }

    /// Makes an event visible; if there is no room it is counted as lost. The number is the channel's to give.
    pub fn push_event(&mut self, event: &record::Event) -> Result<Pushed, Broken> {
        // Numbers count what happened, so that a reader sees the gap.
        let number = self.events + self.lost + 1;
        if self.room(self.events, EVENTS_WORD)? == 0 {
            self.lost += 1;
            return Ok(Pushed::Full);
        }
        let record = Record::event(&record::Event { number, lost: self.lost, ..*event });
        self.write(EVENTS, self.events, &record);
        self.events += 1;
        self.show(EVENTS_WORD, self.events);
        Ok(Pushed::Yes)
    }

    /// Counts events that were lost before they came here.
    pub fn count_lost_events(&mut self, events: u64) {
        self.lost = self.lost.saturating_add(events);
    }

    /// Returns how many records fit, by what the guest says that it has consumed.
    fn room(&self, produced: u64, word: usize) -> Result<u64, Broken> {
        let consumed = self.frames[CONSUMER].load(word);
        match produced.checked_sub(consumed) {
            Some(unread) if unread <= RECORDS => Ok(RECORDS - unread),
            _ => Err(Broken { produced, consumed }),
        }
    }

    fn write(&mut self, ring: usize, at: u64, record: &Record) {
        let place = (at % RECORDS) as usize * RECORD_WORDS;
        for (i, word) in record.0.into_iter().enumerate() {
            self.frames[ring].store(place + i, word);
        }
    }

    fn show(&mut self, word: usize, produced: u64) {
        // ORDER: the records are visible before the index that admits them.
        fence(Ordering::Release);
        self.frames[HEADER].store(word, produced);
    }
}
