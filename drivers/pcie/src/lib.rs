//! PCIe configuration space as an IOMMU needs it: who is there, its ATS, PASID and PRI capabilities in their
//! order, and a reset between owners.
//!
//! What it assumes of the hardware: configuration space is reachable through [`ConfigSpace`]; a function that
//! is not there reads as all ones (PCI Express Base, "Configuration Space"). So does one that dies or is
//! pulled out, at any step: it is [`Error::Absent`] then, and never taken for one that is on, stopped or
//! idle.
//!
//! ```
//! # use pcie::*;
//! # use iommu::StreamId;
//! fn give_away(config: &impl ConfigSpace, function: StreamId) -> Result<Enabled, Error> {
//!     let device = Function::find(config, function).ok_or(Error::Absent { function })?;
//!     device.enable_page_requests(config, 32, true)
//! }
//! ```
//!
//! | feature | supported | note |
//! |---|---|---|
//! | ATS, PASID, PRI on and off | yes | PASID, then ATS, then PRI; off in reverse order; each is read back |
//! | page requests outstanding | yes | at most the capacity; that the sum fits the unit's queue is the broker's to keep |
//! | what device-TLB invalidations need | yes | queue depth, global, page-aligned, the physical function |
//! | virtual functions (SR-IOV) | found | with ATS; PASID and PRI are the physical function's |
//! | function-level reset | yes | PCI Express, or Advanced Features; in steps that never wait; BARs and Command are kept |
//! | bus master on and off | yes | |
//! | MSI on and off | yes | one message or several; MSI-X is in the device's own registers |
//! | memory BARs | yes | as firmware assigned them, 32 and 64 bits |
//! | buses behind a bridge | yes | what `DMAR` and `IORT` need |
//! | execute and privileged mode of PASIDs | no | left off |
//! | TLP prefixes and ACS on the way to a device | no | check them before PASIDs are used below a switch |
//! | MSI, MSI-X, and Device Control 2 after a reset | not restored | off, as the reset left them |
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod msi;
mod reset;

pub use reset::{IDLE_LIMIT_US, READY_LIMIT_US, Reset, SETTLE_US};

use core::{
    fmt,
    ops::{Range, RangeInclusive},
};
use iommu::{PhysAddr, StreamId};

/// Configuration space of one PCI segment. A function is named by its requester ID: `bus << 8 | device << 3 | function`.
pub trait ConfigSpace {
    /// Reads the 32-bit register at `offset` (a multiple of 4, below 4096); all ones if no function answers.
    fn read32(&self, function: StreamId, offset: u16) -> u32;
    /// Writes the 32-bit register at `offset` (a multiple of 4, below 4096).
    fn write32(&self, function: StreamId, offset: u16, value: u32);
}

/// Why a function could not be set up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Error {
    /// No function answers.
    Absent {
        /// The function asked for.
        function: StreamId,
    },
    /// The function lacks `capability`.
    Unsupported {
        /// The function.
        function: StreamId,
        /// The capability, by the PCIe specification's name.
        capability: &'static str,
    },
    /// Page requests are still outstanding (`Stopped` = 0), so the page request interface cannot be enabled.
    NotStopped {
        /// The function.
        function: StreamId,
    },
    /// The function has no enabled virtual function `number`.
    NoVirtualFunction {
        /// The physical function.
        function: StreamId,
        /// The number, from 1.
        number: u16,
    },
    /// The function's virtual functions are enabled, and a reset would end them under their owners.
    VirtualFunctions {
        /// The physical function.
        function: StreamId,
    },
    /// The function answers, but did not do what `capability` was told.
    Rejected {
        /// The function.
        function: StreamId,
        /// The capability, by the PCIe specification's name.
        capability: &'static str,
    },
    /// Another function answers than before the reset.
    Replaced {
        /// The function.
        function: StreamId,
    },
    /// The function did not get so far in `waited_us` microseconds.
    Timeout {
        /// The function.
        function: StreamId,
        /// What was waited for, by the PCIe specification's name.
        step: &'static str,
        /// How long.
        waited_us: u64,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Absent { function } => write!(f, "no function answers at {:#06x}", function.0),
            Self::Unsupported { function, capability } => {
                write!(f, "function {:#06x} has no {capability}", function.0)
            }
            Self::NotStopped { function } => {
                write!(f, "function {:#06x} still waits for page responses", function.0)
            }
            Self::NoVirtualFunction { function, number } => {
                write!(f, "function {:#06x} has no virtual function {number}", function.0)
            }
            Self::VirtualFunctions { function } => {
                write!(f, "function {:#06x} still has virtual functions", function.0)
            }
            Self::Rejected { function, capability } => {
                write!(f, "function {:#06x} did not do what its {capability} was told", function.0)
            }
            Self::Replaced { function } => {
                write!(f, "another function than before answers at {:#06x}", function.0)
            }
            Self::Timeout { function, step, waited_us } => {
                write!(f, "function {:#06x}: {step} did not end in {waited_us} us", function.0)
            }
        }
    }
}

impl core::error::Error for Error {}

const VENDOR_DEVICE: u16 = 0x00;
const COMMAND_STATUS: u16 = 0x04;
const HEADER_TYPE: u16 = 0x0C;
const BAR0: u16 = 0x10;
/// Primary, secondary and subordinate bus number of a bridge.
const BUS_NUMBERS: u16 = 0x18;
const CAPABILITIES: u16 = 0x34;
/// What the Vendor ID register says instead while a function is not ready for requests (`RRS`, once `CRS`).
const NOT_READY: u32 = 0xFFFF_0001;

/// `Memory Space Enable` of the Command register.
const MEMORY_SPACE: u32 = 1 << 1;
/// `Bus Master Enable` of the Command register.
const BUS_MASTER: u32 = 1 << 2;
/// The Status register shares the word with Command; its bits are write-one-to-clear, so zeros are written there.
const COMMAND_ONLY: u32 = 0xFFFF;

/// `Capabilities List` of the Status register.
const HAS_CAPABILITIES: u32 = 1 << 20;

const MSI: u8 = 0x05;
const EXPRESS: u8 = 0x10;
const ADVANCED_FEATURES: u8 = 0x13;
/// Capabilities lie in 0x40..0x100, 4 bytes or more each, so a longer chain has a loop.
const LIMIT: usize = (0x100 - 0x40) / 4;

const ATS: u16 = 0x000F;
const SRIOV: u16 = 0x0010;
const PRI: u16 = 0x0013;
const PASID: u16 = 0x001B;

/// Extended capabilities lie in 0x100..0x1000, 8 bytes or more each, so a longer chain has a loop.
const EXTENDED_LIMIT: usize = (0x1000 - 0x100) / 8;

/// A function that answers, and where its capabilities are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Function {
    /// Its requester ID.
    pub id: StreamId,
    /// `Vendor ID`.
    pub vendor: u16,
    /// `Device ID`.
    pub device: u16,
    /// The physical function, which is this one unless it is virtual.
    physical: StreamId,
    msi: Option<u16>,
    express: Option<u16>,
    advanced: Option<u16>,
    ats: Option<u16>,
    pasid: Option<u16>,
    pri: Option<u16>,
    sriov: Option<u16>,
}

/// What [`Function::enable_page_requests`] found and set.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Enabled {
    /// Page requests that the function may have outstanding (`Outstanding Page Request Allocation`).
    pub allocation: u32,
    /// Bits of a PASID (`Max PASID Width`).
    pub pasid_bits: u8,
}

/// What whoever invalidates the function's device TLB has to know.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct DeviceTlb {
    /// Invalidations that may be outstanding, 1 to 32 (`Invalidate Queue Depth`). Virtual functions share
    /// them with their physical function.
    pub invalidate_queue_depth: u8,
    /// One invalidation can drop an address from every PASID (`Global Invalidate Supported`).
    pub global_invalidate: bool,
    /// It asks for translations of whole pages alone (`Page Aligned Request`). VT-d needs that.
    pub page_aligned: bool,
    /// The physical function, which VT-d's commands name beside a virtual one (`PFSID`).
    pub physical: StreamId,
}

/// Returns the buses behind a bridge; `None` if `function` is none, or nobody has numbered them.
pub fn buses_behind(config: &impl ConfigSpace, function: StreamId) -> Option<RangeInclusive<u8>> {
    let kind = config.read32(function, HEADER_TYPE) >> 16 & 0x7F;
    let [_, secondary, subordinate, _] = config.read32(function, BUS_NUMBERS).to_le_bytes();
    (kind == 1 && secondary != 0 && subordinate >= secondary).then_some(secondary..=subordinate)
}

impl Function {
    /// Returns the function `id`, or `None` if none answers, or it is not ready. A virtual function is found
    /// by its physical one alone, see [`virtual_function`](Self::virtual_function).
    pub fn find(config: &impl ConfigSpace, id: StreamId) -> Option<Self> {
        let identity = config.read32(id, VENDOR_DEVICE);
        if identity & 0xFFFF == 0xFFFF || identity == NOT_READY {
            return None;
        }
        Some(Self::scan(config, id, identity, id))
    }

    /// Returns virtual function `number` of this function; the first is 1.
    pub fn virtual_function(&self, config: &impl ConfigSpace, number: u16) -> Result<Self, Error> {
        let sriov = self.needed(self.sriov, "SR-IOV capability")?;
        let read = |offset| self.read(config, sriov + offset);
        // VF Enable; NumVFs in 15:0; First VF Offset in 15:0 and VF Stride in 31:16; VF Device ID in 31:16.
        let (control, count, place, device) = (read(0x08)?, read(0x10)?, read(0x14)?, read(0x18)?);
        let none = Error::NoVirtualFunction { function: self.id, number };
        if control & VF_ENABLE == 0 || number == 0 || u32::from(number) > count & 0xFFFF {
            return Err(none);
        }
        let id =
            u64::from(self.id.0) + u64::from(place & 0xFFFF) + u64::from(number - 1) * u64::from(place >> 16);
        let id = u16::try_from(id).map(|id| StreamId(id.into())).map_err(|_| none)?;
        if id == self.id {
            return Err(none);
        }
        // Its own Vendor ID reads as ones though it is there.
        if config.read32(id, COMMAND_STATUS) == u32::MAX {
            return Err(Error::Absent { function: id });
        }
        let identity = u32::from(self.vendor) | device & 0xFFFF_0000;
        Ok(Self::scan(config, id, identity, self.id))
    }

    /// Looks for the capabilities of a function that answers.
    fn scan(config: &impl ConfigSpace, id: StreamId, identity: u32, physical: StreamId) -> Self {
        let mut function = Self {
            id,
            vendor: identity as u16,
            device: (identity >> 16) as u16,
            physical,
            msi: None,
            express: None,
            advanced: None,
            ats: None,
            pasid: None,
            pri: None,
            sriov: None,
        };
        let mut at = match config.read32(id, COMMAND_STATUS) & HAS_CAPABILITIES {
            0 => 0,
            _ => config.read32(id, CAPABILITIES) as u16 & 0xFC,
        };
        for _ in 0..LIMIT {
            if at < 0x40 {
                break;
            }
            let header = config.read32(id, at);
            match header as u8 {
                MSI => function.msi = Some(at),
                EXPRESS => function.express = Some(at),
                ADVANCED_FEATURES => function.advanced = Some(at),
                0xFF => break,
                _ => {}
            }
            at = (header >> 8) as u16 & 0xFC;
        }
        let mut at = 0x100;
        for _ in 0..EXTENDED_LIMIT {
            let header = config.read32(id, at);
            if header == 0 || header == u32::MAX {
                break;
            }
            match header as u16 {
                ATS => function.ats = Some(at),
                PASID => function.pasid = Some(at),
                PRI => function.pri = Some(at),
                SRIOV => function.sriov = Some(at),
                _ => {}
            }
            at = (header >> 20) as u16 & 0xFFC;
            if at < 0x100 {
                break;
            }
        }
        function
    }

    fn needed(&self, at: Option<u16>, capability: &'static str) -> Result<u16, Error> {
        at.ok_or(Error::Unsupported { function: self.id, capability })
    }

    /// Reads a register that is never all ones while the function is there.
    fn read(&self, config: &impl ConfigSpace, offset: u16) -> Result<u32, Error> {
        match config.read32(self.id, offset) {
            u32::MAX => Err(Error::Absent { function: self.id }),
            value => Ok(value),
        }
    }

    /// Returns the functions of bus 0 that answer.
    ///
    /// Function 0 of a device tells whether the others are there (`Multi-Function Device`).
    pub fn on_bus_0<C: ConfigSpace>(config: &C) -> impl Iterator<Item = Self> + '_ {
        (0..256).filter_map(move |id| {
            let id = StreamId(id);
            let first = StreamId(id.0 & !7);
            if id != first && config.read32(first, HEADER_TYPE) & 1 << 23 == 0 {
                return None;
            }
            Self::find(config, id)
        })
    }

    /// Returns whether the function can ask for pages: it has ATS, PASID and PRI.
    pub fn has_page_requests(&self) -> bool {
        self.ats.is_some() && self.pasid.is_some() && self.pri.is_some()
    }

    /// Returns the memory of base address register `index`, or `None` if it is not a memory BAR or unassigned.
    ///
    /// Reading the size writes the register, so nothing may use the memory meanwhile; it is restored.
    pub fn memory_bar(&self, config: &impl ConfigSpace, index: u8) -> Option<Range<PhysAddr>> {
        let at = BAR0 + u16::from(index.min(5)) * 4;
        let low = config.read32(self.id, at);
        let wide = low & 0b110 == 0b100;
        if low & 1 != 0 || (wide && index >= 5) {
            return None;
        }
        let command = config.read32(self.id, COMMAND_STATUS) & COMMAND_ONLY;
        config.write32(self.id, COMMAND_STATUS, command & !MEMORY_SPACE);
        let mut base = u64::from(low & !0xF);
        let mut size_mask = u64::from(self.probe(config, at, low) & !0xF) | !0xFFFF_FFFF;
        if wide {
            let high = config.read32(self.id, at + 4);
            base |= u64::from(high) << 32;
            size_mask = size_mask & 0xFFFF_FFFF | u64::from(self.probe(config, at + 4, high)) << 32;
        }
        config.write32(self.id, COMMAND_STATUS, command);
        let bytes = (!size_mask).checked_add(1)?;
        if base == 0 || size_mask & 0xFFFF_FFF0 == 0 {
            return None;
        }
        PhysAddr(base).spanning(bytes)
    }

    /// Writes all ones to a base address register, reads back, restores.
    fn probe(&self, config: &impl ConfigSpace, at: u16, value: u32) -> u32 {
        config.write32(self.id, at, u32::MAX);
        let mask = config.read32(self.id, at);
        config.write32(self.id, at, value);
        mask
    }

    /// Lets the function decode its memory BARs and issue transactions.
    pub fn enable_bus_master(&self, config: &impl ConfigSpace) {
        self.command(config, MEMORY_SPACE | BUS_MASTER, 0);
    }

    /// Lets the function issue no transactions. Whether it decodes its BARs stays as it is.
    pub fn disable_bus_master(&self, config: &impl ConfigSpace) {
        self.command(config, 0, BUS_MASTER);
    }

    /// Lets the function decode its memory BARs.
    pub fn enable_memory(&self, config: &impl ConfigSpace) {
        self.command(config, MEMORY_SPACE, 0);
    }

    fn command(&self, config: &impl ConfigSpace, set: u32, clear: u32) {
        let command = config.read32(self.id, COMMAND_STATUS) & COMMAND_ONLY;
        config.write32(self.id, COMMAND_STATUS, command & !clear | set);
    }

    /// Returns what invalidations of the function's device TLB need.
    pub fn device_tlb(&self, config: &impl ConfigSpace) -> Result<DeviceTlb, Error> {
        let read = |function: &Self| {
            let ats = function.needed(function.ats, ATS_NAME)?;
            function.read(config, ats + 4)
        };
        let own = read(self)?;
        // A virtual function reads 0, and has a part in what its physical one has.
        let depth = match self.physical_of_virtual(config)? {
            Some(physical) => read(&physical)?,
            None => own,
        };
        Ok(DeviceTlb {
            invalidate_queue_depth: match depth as u8 & 0x1F {
                0 => 32,
                depth => depth,
            },
            page_aligned: own & 1 << 5 != 0,
            global_invalidate: own & 1 << 6 != 0,
            physical: self.physical,
        })
    }

    /// Returns the physical function of a virtual one.
    fn physical_of_virtual(&self, config: &impl ConfigSpace) -> Result<Option<Self>, Error> {
        if self.physical == self.id {
            return Ok(None);
        }
        Self::find(config, self.physical).map(Some).ok_or(Error::Absent { function: self.physical })
    }

    /// Turns on ATS alone, for a function without page requests, or a virtual one.
    ///
    /// The unit's tables must allow it, and its device TLB be invalidated, before. [`disable_page_requests`]
    /// turns it off.
    ///
    /// [`disable_page_requests`]: Self::disable_page_requests
    pub fn enable_ats(&self, config: &impl ConfigSpace) -> Result<(), Error> {
        let ats = self.needed(self.ats, ATS_NAME)?;
        self.disable_page_requests(config);
        if let Some(physical) = self.physical_of_virtual(config)? {
            // The smallest translation unit of a virtual function is that of its physical one.
            let at = physical.needed(physical.ats, ATS_NAME)?;
            if physical.read(config, at + 4)? & ATS_UNIT != 0 {
                let capability = "translation unit of 4 KiB";
                return Err(Error::Unsupported { function: physical.id, capability });
            }
        }
        config.write32(self.id, ats + 4, ATS_ENABLE);
        let checked = self.check(config, ats, ATS_ENABLE, ATS_NAME);
        if checked.is_err() {
            self.disable_page_requests(config);
        }
        checked
    }

    /// Turns on PASID (if `pasids`), then ATS, then PRI with at most `allocation` requests outstanding.
    ///
    /// The order is the specification's: a PASID enable must not change while ATS is on, and PRI rests on
    /// ATS. The unit's tables must allow what is turned on before. Whatever was on before, from firmware or
    /// an earlier owner, is turned off first; after an error everything is off.
    ///
    /// What all functions together may have outstanding must fit the unit's queue.
    /// `broker::Ledger::add_device` keeps that sum, stop markers included, and refuses a device that would
    /// exceed it: add the device with `allocation` first.
    pub fn enable_page_requests(
        &self,
        config: &impl ConfigSpace,
        allocation: u32,
        pasids: bool,
    ) -> Result<Enabled, Error> {
        let pasid = self.needed(self.pasid, PASID_NAME)?;
        let ats = self.needed(self.ats, ATS_NAME)?;
        let pri = self.needed(self.pri, PRI_NAME)?;
        self.disable_page_requests(config);
        let enabled = self.turn_on(config, [pasid, ats, pri], allocation, pasids);
        if enabled.is_err() {
            self.disable_page_requests(config);
        }
        enabled
    }

    /// Turns on what is off.
    fn turn_on(
        &self,
        config: &impl ConfigSpace,
        [pasid, ats, pri]: [u16; 3],
        allocation: u32,
        pasids: bool,
    ) -> Result<Enabled, Error> {
        let status = self.read(config, pri + 4)? >> 16;
        if pasids && status & 1 << 15 == 0 {
            // Responses carry the PASID of the request; a function that does not expect it would wait for ever.
            let capability = "PRG Response PASID Required";
            return Err(Error::Unsupported { function: self.id, capability });
        }
        if status & 1 << 8 == 0 {
            return Err(Error::NotStopped { function: self.id });
        }
        let pasid_bits = (self.read(config, pasid + 4)? >> 8) as u8 & 0x1F;
        if pasids {
            config.write32(self.id, pasid + 4, PASID_ENABLE);
        }
        config.write32(self.id, ats + 4, ATS_ENABLE);
        // Response Failure and Unexpected PRG Index are write-one-to-clear, from whoever owned the function before.
        config.write32(self.id, pri + 4, 0b11 << 16 | PRI_RESET);
        let allocation = allocation.min(config.read32(self.id, pri + 8));
        config.write32(self.id, pri + 12, allocation);
        config.write32(self.id, pri + 4, PRI_ENABLE);

        if pasids {
            self.check(config, pasid, PASID_ENABLE, PASID_NAME)?;
        }
        self.check(config, ats, ATS_ENABLE, ATS_NAME)?;
        self.check(config, pri, PRI_ENABLE, PRI_NAME)?;
        Ok(Enabled { allocation, pasid_bits: pasid_bits.min(20) })
    }

    /// Checks that the capability at `at` has `enable` set, so that it is there and does what it was told.
    fn check(
        &self,
        config: &impl ConfigSpace,
        at: u16,
        enable: u32,
        capability: &'static str,
    ) -> Result<(), Error> {
        match self.read(config, at + 4)? & enable {
            0 => Err(Error::Rejected { function: self.id, capability }),
            _ => Ok(()),
        }
    }

    /// Returns whether PRI is off and every page request that was outstanding has its answer (`Stopped`).
    ///
    /// It takes as long as the answers do. Until then PRI cannot be turned on again but by a reset of the
    /// function.
    pub fn page_requests_stopped(&self, config: &impl ConfigSpace) -> Result<bool, Error> {
        let pri = self.needed(self.pri, PRI_NAME)?;
        let status = self.read(config, pri + 4)?;
        Ok(status & PRI_ENABLE == 0 && status & 1 << 24 != 0)
    }

    /// Turns off PRI alone: the device asks for no more pages.
    pub fn disable_page_requests_alone(&self, config: &impl ConfigSpace) {
        self.switch_off(config, self.pri);
    }

    /// Turns off PRI, then ATS, then PASID.
    pub fn disable_page_requests(&self, config: &impl ConfigSpace) {
        for capability in [self.pri, self.ats, self.pasid] {
            self.switch_off(config, capability);
        }
    }

    /// Clears what a capability controls, if the function has it.
    fn switch_off(&self, config: &impl ConfigSpace, capability: Option<u16>) {
        if let Some(at) = capability {
            config.write32(self.id, at + 4, 0);
            // The read makes the posted write arrive before the next step relies on it.
            let _ = config.read32(self.id, at + 4);
        }
    }
}

const PASID_NAME: &str = "PASID capability";
const ATS_NAME: &str = "ATS capability";
const PRI_NAME: &str = "PRI capability";

/// `PASID Enable` of the PASID Control register; execute and privileged mode stay off.
const PASID_ENABLE: u32 = 1 << 16;
/// `Enable` of the ATS Control register, with a smallest translation unit (STU) of 0: 4 KiB.
const ATS_ENABLE: u32 = 1 << 31;
/// `Smallest Translation Unit` of the ATS Control register.
const ATS_UNIT: u32 = 0x1F << 16;
/// `VF Enable` of the SR-IOV Control register.
const VF_ENABLE: u32 = 1 << 0;
/// `Enable` of the Page Request Control register.
const PRI_ENABLE: u32 = 1 << 0;
/// `Reset` of the Page Request Control register; acts while `Enable` is zero.
const PRI_RESET: u32 = 1 << 1;

#[cfg(test)]
mod tests {
    use super::*;
    use std::{cell::RefCell, collections::BTreeMap, vec::Vec};

    const DEVICE: StreamId = StreamId(0x20);

    /// One function with registers that remember, and the order of writes.
    struct Space {
        words: RefCell<BTreeMap<u16, u32>>,
        writes: RefCell<Vec<(u16, u32)>>,
    }

    impl Space {
        /// ATS at 0x100, PASID at 0x108 (20 bits), PRI at 0x110 (capacity 64, stopped, response needs PASID).
        fn with_page_requests() -> Self {
            let words = [
                (0x00, 0x5A5A_1B36),
                (0x04, 0x0010_0000),
                (0x100, 0x1081_000F),
                (0x108, 0x1101_001B),
                (0x10C, 0x0000_1400),
                (0x110, 0x0001_0013),
                (0x114, 0x8100_0000),
                (0x118, 64),
            ];
            Self { words: RefCell::new(words.into()), writes: RefCell::default() }
        }
    }

    impl ConfigSpace for Space {
        fn read32(&self, function: StreamId, offset: u16) -> u32 {
            if function != DEVICE {
                return u32::MAX;
            }
            *self.words.borrow().get(&offset).unwrap_or(&0)
        }
        fn write32(&self, function: StreamId, offset: u16, value: u32) {
            assert_eq!(function, DEVICE);
            self.writes.borrow_mut().push((offset, value));
            // Capability and status bits are hardware's; writing cannot change them.
            let read_only = match offset {
                0x104 | 0x10C => 0x0000_FFFF,
                0x114 => 0xFFFF_0000,
                _ => 0,
            };
            let before = self.words.borrow().get(&offset).copied().unwrap_or(0);
            self.words.borrow_mut().insert(offset, before & read_only | value & !read_only);
        }
    }

    #[test]
    fn pasid_comes_before_ats_and_ats_before_pri() {
        let space = Space::with_page_requests();
        let function = Function::find(&space, DEVICE).expect("it answers");

        let enabled = function.enable_page_requests(&space, 32, true).expect("it can");

        assert_eq!(enabled, Enabled { allocation: 32, pasid_bits: 20 });
        let writes = space.writes.borrow();
        assert_eq!(writes[..3], [(0x114, 0), (0x104, 0), (0x10C, 0)], "off in reverse order first");
        assert_eq!(
            writes[3..],
            [(0x10C, 0x1_0000), (0x104, 0x8000_0000), (0x114, 0x3_0002), (0x11C, 32), (0x114, 1)]
        );
    }

    #[test]
    fn a_function_gets_no_more_than_its_capacity() {
        let space = Space::with_page_requests();
        let function = Function::find(&space, DEVICE).expect("it answers");

        assert_eq!(function.enable_page_requests(&space, 1000, true).map(|e| e.allocation), Ok(64));
    }

    #[test]
    fn a_function_with_requests_outstanding_is_not_enabled() {
        struct Busy(Space);
        impl ConfigSpace for Busy {
            fn read32(&self, function: StreamId, offset: u16) -> u32 {
                self.0.read32(function, offset) & if offset == 0x114 { !(1 << 24) } else { u32::MAX }
            }
            fn write32(&self, function: StreamId, offset: u16, value: u32) {
                self.0.write32(function, offset, value);
            }
        }
        let space = Busy(Space::with_page_requests());
        let function = Function::find(&space, DEVICE).expect("it answers");

        assert_eq!(
            function.enable_page_requests(&space, 32, true),
            Err(Error::NotStopped { function: DEVICE })
        );
        assert!(!space.0.writes.borrow().contains(&(0x114, 1)));
        let last =
            |offset| space.0.writes.borrow().iter().rfind(|(at, _)| *at == offset).map(|(_, value)| *value);
        assert_eq!((last(0x104), last(0x10C)), (Some(0), Some(0)), "ATS and PASID are off again");
    }

    #[test]
    fn a_function_that_expects_no_pasid_in_responses_sends_no_requests() {
        struct Plain(Space);
        impl ConfigSpace for Plain {
            fn read32(&self, function: StreamId, offset: u16) -> u32 {
                self.0.read32(function, offset) & if offset == 0x114 { !(1 << 31) } else { u32::MAX }
            }
            fn write32(&self, function: StreamId, offset: u16, value: u32) {
                self.0.write32(function, offset, value);
            }
        }
        let space = Plain(Space::with_page_requests());
        let function = Function::find(&space, DEVICE).expect("it answers");

        assert!(matches!(function.enable_page_requests(&space, 32, true), Err(Error::Unsupported { .. })));
        assert!(
            function.enable_page_requests(&space, 32, false).is_ok(),
            "without PASIDs there is none to expect"
        );
    }

    #[test]
    fn a_chain_of_capabilities_that_loops_ends() {
        let space = Space::with_page_requests();
        space.words.borrow_mut().insert(0x110, 0x1001_0013);

        assert!(Function::find(&space, DEVICE).expect("it answers").has_page_requests());
    }

    #[test]
    fn a_function_that_is_not_there_is_none() {
        assert_eq!(Function::find(&Space::with_page_requests(), StreamId(0x28)), None);
    }

    #[test]
    fn the_size_of_a_bar_is_read_without_moving_it() {
        struct Bar(RefCell<u32>, RefCell<Vec<u32>>);
        impl ConfigSpace for Bar {
            fn read32(&self, _: StreamId, offset: u16) -> u32 {
                if offset == 0x10 { *self.0.borrow() & 0xFFFF_F000 } else { 0x5A5A_1B36 }
            }
            fn write32(&self, _: StreamId, offset: u16, value: u32) {
                if offset == 0x10 {
                    *self.0.borrow_mut() = value;
                } else if offset == 0x04 {
                    self.1.borrow_mut().push(value);
                }
            }
        }
        let space = Bar(RefCell::new(0xFEB0_0000), RefCell::default());
        let function = Function::find(&space, DEVICE).expect("it answers");

        let bar = function.memory_bar(&space, 0).expect("a memory BAR");

        assert_eq!(bar, PhysAddr(0xFEB0_0000)..PhysAddr(0xFEB0_1000));
        assert_eq!(*space.0.borrow(), 0xFEB0_0000, "restored");
        assert_eq!(space.1.borrow()[0] & 2, 0, "memory decode is off while the register holds ones");
    }
}
