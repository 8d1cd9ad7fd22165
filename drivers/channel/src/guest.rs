//! A guest's side of a channel: the only consumer.

use crate::{
    Record,
    record::{Event, RECORD_WORDS, Request},
    ring::{
        CONSUMER, EVENTS, EVENTS_LOST_WORD, EVENTS_WORD, HEADER, MAGIC, MAGIC_WORD, RECORDS, REQUESTS,
        REQUESTS_LOST_WORD, REQUESTS_WORD, VERSION, VERSION_WORD,
    },
};
use core::sync::atomic::{Ordering, fence};

/// How a guest reaches the frames of its channel.
pub trait Frames {
    /// Loads a word of a frame, in one load.
    fn load(&self, frame: usize, word: usize) -> u64;
    /// Stores a word of a frame, in one store.
    fn store(&self, frame: usize, word: usize, value: u64);
}

/// A guest's side of a channel.
#[derive(Debug)]
pub struct Guest<F> {
    frames: F,
    requests: u64,
    events: u64,
}

impl<F: Frames> Guest<F> {
    /// Opens the channel in `frames`, or returns `None` if it is not one of this version.
    ///
    /// A guest that opens it once more goes on where it was.
    pub fn open(frames: F) -> Option<Self> {
        if frames.load(HEADER, MAGIC_WORD) != MAGIC {
            return None;
        }
        // ORDER: who finds the magic number finds everything else.
        fence(Ordering::Acquire);
        let known = frames.load(HEADER, VERSION_WORD) == VERSION | RECORDS << 32;
        let [requests, events] = [REQUESTS_WORD, EVENTS_WORD].map(|word| frames.load(CONSUMER, word));
        known.then_some(Self { frames, requests, events })
    }

    /// Returns how many page requests of the guest's devices it was never shown.
    pub fn requests_lost(&self) -> u64 {
        self.frames.load(HEADER, REQUESTS_LOST_WORD)
    }

    /// Returns how many events were lost so far at least, those after the last event included.
    pub fn events_lost(&self) -> u64 {
        self.frames.load(HEADER, EVENTS_LOST_WORD)
    }

    /// Takes the next page of a request.
    pub fn next_request(&mut self) -> Option<Request> {
        self.next(REQUESTS, REQUESTS_WORD, self.requests).and_then(|record| {
            self.requests = self.requests.wrapping_add(1);
            record.as_request()
        })
    }

    /// Takes the next event.
    pub fn next_event(&mut self) -> Option<Event> {
        self.next(EVENTS, EVENTS_WORD, self.events).and_then(|record| {
            self.events = self.events.wrapping_add(1);
            record.as_event()
        })
    }

    fn next(&self, ring: usize, word: usize, at: u64) -> Option<Record> {
        if self.frames.load(HEADER, word) == at {
            return None;
        }
        // ORDER: the record is read after the index that admits it, and before it is given back.
        fence(Ordering::Acquire);
        let place = (at % RECORDS) as usize * RECORD_WORDS;
        let record = Record(core::array::from_fn(|i| self.frames.load(ring, place + i)));
        fence(Ordering::Release);
        self.frames.store(CONSUMER, word, at.wrapping_add(1));
        Some(record)
    }
}
