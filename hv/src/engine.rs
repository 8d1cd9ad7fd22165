//! The device `sva-dev`, driven by the hypervisor itself.

use crate::memory;
use arch::{bus::Mmio, machine::Ecam};
use iommu::{Bus, Iova, Pasid};
use pcie::Function;

/// A `sva-dev`, whose lanes write one word each.
pub struct Engine {
    registers: Mmio,
}

/// Lanes of a device.
pub const LANES: usize = 8;

impl Engine {
    const STRAY: usize = 0x10;
    const INVALIDATIONS: usize = 0x14;
    const GROUPS: usize = 0x1C;
    const RESPONSES: usize = 0x24;
    const RESET: usize = 0x28;
    /// Lane 0, and bytes from one to the next.
    const LANE: usize = 0x100;
    const STRIDE: usize = 0x40;
    /// Registers of a lane.
    const ADDRESS: usize = 0x00;
    const DATA: usize = 0x08;
    const LENGTH: usize = 0x10;
    const PASID: usize = 0x14;
    const CONTROL: usize = 0x18;
    const STATUS: usize = 0x1C;
    const DELAY: usize = 0x2C;

    /// A write without PASID through the device TLB, which asks for no pages.
    pub const CACHED_WRITE: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 8;
    /// A write that asks for the pages that are missing, and what makes it one without PASID.
    const ASKING_WRITE: u32 = 1 << 0 | 1 << 1;
    const NO_PASID: u32 = 1 << 8;
    /// A write without PASID that the unit translates.
    pub const PLAIN_WRITE: u32 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 8;

    /// What became of a write: not over yet.
    pub const BUSY: u32 = 1;
    /// It arrived.
    pub const DONE: u32 = 2;
    /// It failed, because the page that it asked for was refused.
    pub const DENIED: u32 = 4 << 8 | 3;
    /// It failed, because the translation that the device asked for does not exist.
    pub const NOT_MAPPED: u32 = 7 << 8 | 3;
    /// It failed, because the access was refused.
    pub const REFUSED: u32 = 8 << 8 | 3;

    /// Opens and resets the registers of `function`; `None` if they are out of reach.
    pub fn new(config: &Ecam, function: &Function) -> Option<Self> {
        function.enable_memory(config);
        let registers = memory::device(function.memory_bar(config, 0)?)?;
        registers.write32(Self::RESET, 1);
        Some(Self { registers })
    }

    /// Has `lane` write the word `data` to `iova`, `delay_us` microseconds from now.
    pub fn start(&self, lane: usize, iova: Iova, data: u64, control: u32, delay_us: u32) {
        let at = |register| Self::register(lane, register);
        self.registers.write64(at(Self::ADDRESS), iova.0);
        self.registers.write64(at(Self::DATA), data);
        self.registers.write32(at(Self::LENGTH), 8);
        self.registers.write32(at(Self::DELAY), delay_us);
        self.registers.write32(at(Self::CONTROL), control);
    }

    /// Has `lane` write the word `data` to `iova`, with `pasid` or without, and ask for the page if it is missing.
    pub fn ask(&self, lane: usize, pasid: Option<Pasid>, iova: Iova, data: u64) {
        self.registers.write32(Self::register(lane, Self::PASID), pasid.map_or(0, Pasid::value));
        let without = if pasid.is_none() { Self::NO_PASID } else { 0 };
        self.start(lane, iova, data, Self::ASKING_WRITE | without, 0);
    }

    /// Returns what became of the last write of `lane`, without what the device adds to a cause.
    pub fn status(&self, lane: usize) -> u32 {
        self.registers.read32(Self::register(lane, Self::STATUS)) & 0xFFFF
    }

    fn register(lane: usize, register: usize) -> usize {
        Self::LANE + lane % LANES * Self::STRIDE + register
    }

    /// Returns how many groups the device sent whole, and how many answers it got: those it waited for, and others.
    pub fn groups_and_answers(&self) -> [u64; 3] {
        [Self::GROUPS, Self::RESPONSES, Self::STRAY].map(|register| self.registers.read32(register).into())
    }

    /// Returns how often the device was told to forget translations.
    pub fn invalidations(&self) -> u64 {
        self.registers.read32(Self::INVALIDATIONS).into()
    }
}
