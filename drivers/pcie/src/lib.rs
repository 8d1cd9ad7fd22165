//! PCIe configuration space as an IOMMU needs it: who is there, and its ATS, PASID and PRI capabilities in their order.
//!
//! What it assumes of the hardware: configuration space is reachable through [`ConfigSpace`]; a function that is not
//! there reads as all ones (PCI Express Base, "Configuration Space").
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
//! | ATS, PASID, PRI on and off | yes | PASID, then ATS, then PRI; off in reverse order |
//! | bus master on and off | yes | |
//! | memory BARs | yes | as firmware assigned them, 32 and 64 bits |
//! | SR-IOV, function-level reset, ACS | no | |
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

use core::{fmt, ops::Range};
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
        }
    }
}

impl core::error::Error for Error {}

const VENDOR_DEVICE: u16 = 0x00;
const COMMAND_STATUS: u16 = 0x04;
const HEADER_TYPE: u16 = 0x0C;
const BAR0: u16 = 0x10;

/// `Memory Space Enable` of the Command register.
const MEMORY_SPACE: u32 = 1 << 1;
/// `Bus Master Enable` of the Command register.
const BUS_MASTER: u32 = 1 << 2;
/// The Status register shares the word with Command; its bits are write-one-to-clear, so zeros are written there.
const COMMAND_ONLY: u32 = 0xFFFF;

const ATS: u16 = 0x000F;
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
    ats: Option<u16>,
    pasid: Option<u16>,
    pri: Option<u16>,
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

impl Function {
    /// Returns the function `id`, or `None` if none answers.
    pub fn find(config: &impl ConfigSpace, id: StreamId) -> Option<Self> {
        let identity = config.read32(id, VENDOR_DEVICE);
        if identity & 0xFFFF == 0xFFFF {
            return None;
        }
        let mut function = Self {
            id,
            vendor: identity as u16,
            device: (identity >> 16) as u16,
            ats: None,
            pasid: None,
            pri: None,
        };
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
                _ => {}
            }
            at = (header >> 20) as u16 & 0xFFC;
            if at < 0x100 {
                break;
            }
        }
        Some(function)
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

    /// Turns on PASID (if `pasids`), then ATS, then PRI with at most `allocation` requests outstanding.
    ///
    /// The order is the specification's: a PASID enable must not change while ATS is on, and PRI rests on ATS. The unit's
    /// tables must allow what is turned on before. Whatever was on before, from firmware or an earlier owner, is turned off first.
    pub fn enable_page_requests(
        &self,
        config: &impl ConfigSpace,
        allocation: u32,
        pasids: bool,
    ) -> Result<Enabled, Error> {
        let needed =
            |at: Option<u16>, capability| at.ok_or(Error::Unsupported { function: self.id, capability });
        let pasid = needed(self.pasid, "PASID capability")?;
        let ats = needed(self.ats, "ATS capability")?;
        let pri = needed(self.pri, "PRI capability")?;
        self.disable_page_requests(config);

        let pasid_capability = config.read32(self.id, pasid + 4);
        if pasids {
            config.write32(self.id, pasid + 4, 1 << 16);
        }
        // STU (20:16) = 0: translations of 4 KiB.
        config.write32(self.id, ats + 4, 1 << 31);

        let status = config.read32(self.id, pri + 4) >> 16;
        if pasids && status & 1 << 15 == 0 {
            // Responses carry the PASID of the request; a function that does not expect it would wait for ever.
            self.disable_page_requests(config);
            let capability = "PRG Response PASID Required";
            return Err(Error::Unsupported { function: self.id, capability });
        }
        if status & 1 << 8 == 0 {
            self.disable_page_requests(config);
            return Err(Error::NotStopped { function: self.id });
        }
        // Response Failure and Unexpected PRG Index are write-one-to-clear, from whoever owned the function before.
        config.write32(self.id, pri + 4, 0b11 << 16 | PRI_RESET);
        let allocation = allocation.min(config.read32(self.id, pri + 8));
        config.write32(self.id, pri + 12, allocation);
        config.write32(self.id, pri + 4, PRI_ENABLE);
        Ok(Enabled { allocation, pasid_bits: (pasid_capability >> 8) as u8 & 0x1F })
    }

    /// Turns off PRI alone: the device asks for no more pages.
    pub fn disable_page_requests_alone(&self, config: &impl ConfigSpace) {
        if let Some(at) = self.pri {
            config.write32(self.id, at + 4, 0);
            // The read makes the posted write arrive.
            let _ = config.read32(self.id, at + 4);
        }
    }

    /// Turns off PRI, then ATS, then PASID.
    pub fn disable_page_requests(&self, config: &impl ConfigSpace) {
        for at in [self.pri, self.ats, self.pasid].into_iter().flatten() {
            config.write32(self.id, at + 4, 0);
            // The read makes the posted write arrive before the next step relies on it.
            let _ = config.read32(self.id, at + 4);
        }
    }
}

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
        let function = Function { id: DEVICE, vendor: 0, device: 0, ats: None, pasid: None, pri: None };

        let bar = function.memory_bar(&space, 0).expect("a memory BAR");

        assert_eq!(bar, PhysAddr(0xFEB0_0000)..PhysAddr(0xFEB0_1000));
        assert_eq!(*space.0.borrow(), 0xFEB0_0000, "restored");
        assert_eq!(space.1.borrow()[0] & 2, 0, "memory decode is off while the register holds ones");
    }
}
