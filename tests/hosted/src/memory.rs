//! Memory as a hypervisor hands it out: to tables, to devices, to a guest.

use channel::{
    guest,
    ring::{CONSUMER, FRAMES},
};
use iommu::{PAGE_SIZE, PhysAddr};
use models::memory::Memory;
use pgtable::Frames;
use std::{
    collections::BTreeMap,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::SeqCst},
};

/// Words of a frame.
const ENTRIES: usize = PAGE_SIZE as usize / 8;

/// Table frames cut from a modelled memory, which remembers who has what.
#[derive(Debug)]
pub struct TableFrames {
    memory: Memory,
    given_back: BTreeMap<usize, Vec<(PhysAddr, Words)>>,
    taken: BTreeMap<PhysAddr, Words>,
    /// How many more frames there are.
    left: usize,
}

type Words = &'static [AtomicU64];

impl TableFrames {
    /// Frames from `memory`, `limit` of them at one time.
    pub fn new(memory: Memory, limit: usize) -> Self {
        Self { memory, given_back: BTreeMap::new(), taken: BTreeMap::new(), left: limit }
    }

    /// Returns how many frames are in use.
    pub fn in_use(&self) -> usize {
        self.taken.len()
    }

    /// Returns how many more frames there are.
    pub fn left(&self) -> usize {
        self.left
    }

    /// Returns all words of the frames in use, as the CPU sees them.
    pub fn content(&self) -> Vec<(PhysAddr, Vec<u64>)> {
        let load = |words: &Words| words.iter().map(|word| word.load(SeqCst)).collect();
        self.taken.iter().map(|(&frame, words)| (frame, load(words))).collect()
    }

    /// Returns a word of a frame in use that the device does not see as the CPU does.
    pub fn unpublished(&self) -> Option<PhysAddr> {
        let words = self.taken.iter().flat_map(|(frame, words)| (frame.0..).step_by(8).zip(*words));
        words.map(|(at, word)| (PhysAddr(at), word.load(SeqCst))).find_map(|(at, word)| {
            (self.memory.device_load(at).expect("the frame is in the memory") != word).then_some(at)
        })
    }

    /// Sets how many more frames there are.
    pub fn set_left(&mut self, frames: usize) {
        self.left = frames;
    }
}

/// A table in a modelled memory, as the CPU sees it.
#[derive(Clone, Copy, Debug)]
pub struct TableWords(Words);

impl pgtable::Table for TableWords {
    fn load(self, index: usize) -> u64 {
        self.0[index].load(SeqCst)
    }

    fn store(self, index: usize, value: u64) {
        self.0[index].store(value, SeqCst);
    }

    fn exchange(self, index: usize, current: u64, new: u64) -> Result<(), u64> {
        self.0[index].compare_exchange(current, new, SeqCst, SeqCst).map(|_| ())
    }
}

impl pgtable::Words for TableFrames {
    type Table = TableWords;

    fn table(&self, frame: PhysAddr) -> TableWords {
        TableWords(self.taken.get(&frame).unwrap_or_else(|| panic!("{frame:?} is not in use")))
    }
}

impl Frames for TableFrames {
    fn take(&mut self, bytes: usize) -> Option<PhysAddr> {
        self.left = self.left.checked_sub(1)?;
        let free = self.given_back.get_mut(&bytes).and_then(Vec::pop);
        let (phys, words) = free.unwrap_or_else(|| self.memory.take_shared(bytes / 8, bytes / 8));
        for word in words {
            word.store(0, SeqCst);
        }
        self.publish(phys..PhysAddr(phys.0 + bytes as u64));
        assert!(self.taken.insert(phys, words).is_none(), "{phys:?} was handed out twice");
        Some(phys)
    }

    fn give_back(&mut self, frame: PhysAddr, bytes: usize) {
        self.left = self.left.saturating_add(1);
        let words = self.taken.remove(&frame).unwrap_or_else(|| panic!("{frame:?} is not in use"));
        assert_eq!(words.len() * 8, bytes, "{frame:?} goes back as it was taken");
        self.given_back.entry(bytes).or_default().push((frame, words));
    }

    fn publish(&self, range: Range<PhysAddr>) {
        self.memory.publish(range).expect("the frame is in the memory");
    }
}

/// What a guest sees of the four frames of its channel, which lie one after the other.
#[derive(Clone, Debug)]
pub struct Window {
    memory: Memory,
    start: PhysAddr,
}

impl Window {
    /// The window to the frames that begin at `start`.
    pub fn new(memory: Memory, start: PhysAddr) -> Self {
        Self { memory, start }
    }

    fn at(&self, frame: usize, word: usize) -> PhysAddr {
        assert!(frame < FRAMES && word < ENTRIES, "a guest reads its channel and nothing else");
        PhysAddr(self.start.0 + (frame * ENTRIES + word) as u64 * 8)
    }
}

impl guest::Frames for Window {
    fn load(&self, frame: usize, word: usize) -> u64 {
        self.memory.cpu_load(self.at(frame, word))
    }

    fn store(&self, frame: usize, word: usize, value: u64) {
        assert_eq!(frame, CONSUMER, "the other frames are read-only for a guest");
        self.memory.guest_store(self.at(frame, word), value);
    }
}
