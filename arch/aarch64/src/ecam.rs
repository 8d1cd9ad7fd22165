//! Configuration space of PCI segment 0, and addresses for devices to which firmware gave none.
#![expect(unsafe_code, reason = "configuration space is reached by address")]

use crate::tree::Pci;
use core::{ops::Range, ptr};
use iommu::StreamId;
use pcie::{ConfigSpace, Function};

/// Memory-mapped configuration space of PCI segment 0 (the PCIe specification's ECAM).
///
/// Buses that it does not cover, and registers that do not exist, read all ones; writes to them do nothing.
#[derive(Clone, Copy, Debug)]
pub struct Ecam {
    /// Where the first bus is.
    base: usize,
    first_bus: u8,
    last_bus: u8,
}

impl Ecam {
    /// Each bus has 1 MiB.
    const BUS_SHIFT: u32 = 20;

    /// Opens configuration space.
    ///
    /// # Safety
    ///
    /// It is where `pci` says, and mapped as a device.
    pub(crate) unsafe fn new(pci: &Pci) -> Self {
        let (first_bus, last_bus) = pci.buses;
        Self { base: pci.registers.start as usize, first_bus, last_bus }
    }

    fn register(&self, function: StreamId, offset: u16) -> Option<*mut u32> {
        let bus = u8::try_from(function.0 >> 8).ok()?;
        let exists =
            (self.first_bus..=self.last_bus).contains(&bus) && offset < 4096 && offset.is_multiple_of(4);
        exists.then(|| {
            let bus_offset = usize::from(bus - self.first_bus) << Self::BUS_SHIFT;
            let function_offset = (function.0 as usize & 0xFF) << 12;
            ptr::with_exposed_provenance_mut(self.base + bus_offset + function_offset + usize::from(offset))
        })
    }
}

impl ConfigSpace for Ecam {
    fn read32(&self, function: StreamId, offset: u16) -> u32 {
        match self.register(function, offset) {
            // SAFETY: `new` was promised that the buses are mapped as a device.
            Some(register) => unsafe { register.read_volatile() },
            None => u32::MAX,
        }
    }

    fn write32(&self, function: StreamId, offset: u16, value: u32) {
        if let Some(register) = self.register(function, offset) {
            // SAFETY: as above. What a function does once it may issue transactions is up to its IOMMU.
            unsafe { register.write_volatile(value) };
        }
    }
}

const COMMAND: u16 = 0x04;
const HEADER_TYPE: u16 = 0x0C;
const BAR0: u16 = 0x10;
/// `Memory Space Enable` of the Command register.
const MEMORY_SPACE: u32 = 1 << 1;
/// The Status register shares the word with Command; its bits are write-one-to-clear, so zeros are written there.
const COMMAND_ONLY: u32 = 0xFFFF;

/// Gives the memory of devices on bus 0 addresses in `window`, each aligned to its size.
///
/// Firmware that gave one device an address is believed to have done so with all, and nothing is changed.
pub(crate) fn assign(config: &Ecam, window: Range<u64>) {
    let bars = || {
        Function::on_bus_0(config).flat_map(|function| Bars { config, function: function.id, next: Some(0) })
    };
    if bars().any(|bar| bar.address(config) != 0) {
        return;
    }
    let mut next = window.start;
    for bar in bars() {
        let bytes = bar.bytes(config);
        let at = next.next_multiple_of(bytes.max(1));
        if bytes == 0 {
            continue;
        }
        match at.checked_add(bytes).filter(|&end| end <= window.end && at != 0) {
            Some(end) => {
                bar.set_address(config, at);
                next = end;
            }
            None => defmt::warn!("no room for {=u64:#x} bytes of {}", bytes, bar.function),
        }
    }
}

/// A base address register for memory.
struct Bar {
    function: StreamId,
    offset: u16,
    /// It takes two registers.
    wide: bool,
}

/// The base address registers for memory of one function.
struct Bars<'a> {
    config: &'a Ecam,
    function: StreamId,
    /// The register to look at next.
    next: Option<u16>,
}

impl Iterator for Bars<'_> {
    type Item = Bar;

    fn next(&mut self) -> Option<Bar> {
        // A bridge has two, and needs windows besides: what is behind it is not looked for.
        let is_device = self.config.read32(self.function, HEADER_TYPE) >> 16 & 0x7F == 0;
        while let Some(index) = self.next.filter(|&index| is_device && index < 6) {
            let offset = BAR0 + index * 4;
            let low = self.config.read32(self.function, offset);
            let wide = low & 0b110 == 0b100 && index < 5;
            self.next = Some(index + 1 + u16::from(wide));
            if low & 1 == 0 {
                return Some(Bar { function: self.function, offset, wide });
            }
        }
        None
    }
}

impl Bar {
    fn words(&self) -> impl Iterator<Item = (u32, u16)> + use<> {
        [(0, self.offset), (32, self.offset + 4)].into_iter().take(1 + usize::from(self.wide))
    }

    fn raw(&self, config: &Ecam) -> u64 {
        self.words().map(|(shift, at)| u64::from(config.read32(self.function, at)) << shift).sum()
    }

    fn address(&self, config: &Ecam) -> u64 {
        self.raw(config) & !0xF
    }

    /// Moves the memory. It does not answer until memory space is enabled again.
    fn set_address(&self, config: &Ecam, address: u64) {
        let command = config.read32(self.function, COMMAND) & COMMAND_ONLY;
        config.write32(self.function, COMMAND, command & !MEMORY_SPACE);
        for (shift, at) in self.words() {
            config.write32(self.function, at, (address >> shift) as u32);
        }
    }

    /// Returns the size of the memory; 0 if there is no such register. The register has address 0 afterwards.
    fn bytes(&self, config: &Ecam) -> u64 {
        self.set_address(config, u64::MAX);
        let mask = self.address(config);
        self.set_address(config, 0);
        let mask = if self.wide {
            mask
        } else if mask == 0 {
            0
        } else {
            mask | !0xFFFF_FFFF
        };
        mask.wrapping_neg()
    }
}
