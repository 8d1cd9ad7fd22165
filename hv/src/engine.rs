//! The device `sva-dev`, driven by the hypervisor itself.

use crate::memory;
use arch::{bus::Mmio, machine::Ecam};
use iommu::{Bus, Iova};
use pcie::Function;

/// A `sva-dev`, whose lanes write one word each.
pub struct Engine {
    registers: Mmio,
}

/// Lanes of a device.
pub const LANES: usize = 8;

impl Engine {
    const INVALIDATIONS: usize = 0x14;
    const RESET: usize = 0x28;
    /// Lane 0, and bytes from one to the next.
    const LANE: usize = 0x100;
    const STRIDE: usize = 0x40;
    /// Registers of a lane.
    const ADDRESS: usize = 0x00;
    const DATA: usize = 0x08;
    const LENGTH: usize = 0x10;
    const CONTROL: usize = 0x18;
    const STATUS: usize = 0x1C;
    const DELAY: usize = 0x2C;

    /// A write without PASID through the device TLB, which asks for no pages.
    pub const CACHED_WRITE: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 8;
    /// A write without PASID that the unit translates.
    pub const PLAIN_WRITE: u32 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 8;

    /// What became of a write: not over yet.
    pub const BUSY: u32 = 1;
    /// It arrived.
    pub const DONE: u32 = 2;
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
        let at = |register| Self::LANE + lane % LANES * Self::STRIDE + register;
        self.registers.write64(at(Self::ADDRESS), iova.0);
        self.registers.write64(at(Self::DATA), data);
        self.registers.write32(at(Self::LENGTH), 8);
        self.registers.write32(at(Self::DELAY), delay_us);
        self.registers.write32(at(Self::CONTROL), control);
    }

    /// Returns what became of the last write of `lane`, without what the device adds to a cause.
    pub fn status(&self, lane: usize) -> u32 {
        self.registers.read32(Self::LANE + lane % LANES * Self::STRIDE + Self::STATUS) & 0xFFFF
    }

    /// Returns how often the device was told to forget translations.
    pub fn invalidations(&self) -> u64 {
        self.registers.read32(Self::INVALIDATIONS).into()
    }
}
