//! Memory as a hypervisor hands it out: to tables, to devices, to a guest.

use channel::{
    guest,
    ring::{CONSUMER, FRAMES},
};
use iommu::{DmaBuf, PhysAddr};
use models::memory::Memory;
use pgtable::{ENTRIES, Frames};
use std::collections::BTreeMap;

/// Table frames cut from a modelled memory, which remembers who has what.
#[derive(Debug)]
pub struct TableFrames {
    memory: Memory,
    given_back: Vec<DmaBuf>,
    taken: BTreeMap<PhysAddr, DmaBuf>,
    /// How many more frames there are.
    left: usize,
}

impl TableFrames {
    /// Frames from `memory`, `limit` of them at one time.
    pub fn new(memory: Memory, limit: usize) -> Self {
        Self { memory, given_back: Vec::new(), taken: BTreeMap::new(), left: limit }
    }

    /// Returns how many frames are in use.
    pub fn in_use(&self) -> usize {
        self.taken.len()
    }

    /// Sets how many more frames there are.
    pub fn set_left(&mut self, frames: usize) {
        self.left = frames;
    }
}

impl Frames for TableFrames {
    fn take(&mut self) -> Option<PhysAddr> {
        self.left = self.left.checked_sub(1)?;
        let mut frame = self.given_back.pop().unwrap_or_else(|| self.memory.take(ENTRIES, ENTRIES));
        frame.clear();
        self.memory.publish(frame.range(0, ENTRIES)).expect("the frame is in the memory");
        let phys = frame.phys();
        assert!(self.taken.insert(phys, frame).is_none(), "{phys:?} was handed out twice");
        Some(phys)
    }

    fn give_back(&mut self, frame: PhysAddr) {
        self.left += 1;
        let frame = self.taken.remove(&frame).unwrap_or_else(|| panic!("{frame:?} is not in use"));
        self.given_back.push(frame);
    }

    fn load(&self, frame: PhysAddr, index: usize) -> u64 {
        self.taken.get(&frame).unwrap_or_else(|| panic!("{frame:?} is not in use")).load(index)
    }

    fn store(&mut self, frame: PhysAddr, index: usize, value: u64) {
        let buffer = self.taken.get_mut(&frame).unwrap_or_else(|| panic!("{frame:?} is not in use"));
        buffer.store(index, value);
        self.memory.publish(buffer.range(index, 1)).expect("the frame is in the memory");
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
        let at = self.at(frame, word);
        // The host's `DmaBuf` is the only way in on the CPU's side, so the store comes in from the other.
        self.memory.device_store(at, value).expect("the frame is in the memory");
        self.memory.observe(at..PhysAddr(at.0 + 8)).expect("the frame is in the memory");
    }
}
