//! What the boot loader and firmware say about the machine: memory, modules, ACPI tables, configuration space.
//!
//! The start info is that of PVH (`hvm_start_info`, version 1, of the Xen project's `start_info.h`). Nothing in it, or in a
//! table, is believed before it is checked: addresses, lengths, counts and checksums.
#![expect(unsafe_code, reason = "the boot loader hands over memory by address")]

use crate::paging::{self, MAPPED_END};
use core::{fmt, iter, ops::Range, ptr, slice};
use heapless::Vec;
use iommu::{PAGE_SIZE, PhysAddr, StreamId};
use pcie::ConfigSpace;
use vtd::dmar::{Dmar, Requester, Reserved};

/// Why something about the machine is not as it is needed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, defmt::Format)]
#[non_exhaustive]
pub enum Error {
    /// What the boot loader handed over does not begin with the magic number of PVH.
    NotPvh {
        /// The first word of it.
        magic: u32,
    },
    /// The boot loader handed over no memory map: its start info is older than version 1.
    NoMemoryMap {
        /// Version of the start info.
        version: u32,
    },
    /// There is more of `what` than this build has room for.
    TooMany {
        /// The things.
        what: &'static str,
        /// Room for them.
        limit: usize,
    },
    /// `what` lies above 4 GiB, has a length that makes no sense, or overlaps what it must not.
    OutOfReach {
        /// The thing.
        what: &'static str,
        /// Its address.
        address: u64,
    },
    /// The memory map lists the RAM at `address` twice.
    OverlappingRam {
        /// Where the second listing begins.
        address: u64,
    },
    /// There is no free memory for `what`.
    NoMemory {
        /// What it is for.
        what: &'static str,
    },
    /// Firmware has no valid table `signature`, or it lacks what is needed of it.
    NoTable {
        /// The ACPI signature.
        signature: &'static str,
    },
    /// Neither CPUID nor the PIT tells the frequency of the TSC.
    NoClock,
    /// There is no such core, or it is the one that booted.
    UnknownCore {
        /// The core asked for.
        core: usize,
        /// How many there are.
        present: usize,
    },
    /// The core runs already.
    CoreRunning {
        /// The core asked for.
        core: usize,
    },
    /// The core did not come up in time.
    CoreSilent {
        /// The core asked for.
        core: usize,
        /// How long it was given, in microseconds.
        waited_us: u64,
    },
    /// The processor lacks `feature`, by the manual's name, or firmware switched it off.
    Unsupported {
        /// The feature.
        feature: &'static str,
    },
    /// A guest's tables must have four levels.
    Levels {
        /// The levels that they have.
        levels: u8,
    },
    /// There can be no virtual CPU `id`: the processor, or this build, can tell fewer guests apart.
    GuestOutOfRange {
        /// The number asked for.
        id: u16,
        /// How many there can be.
        limit: u32,
    },
    /// The virtual CPU `id` exists already.
    GuestExists {
        /// The number asked for.
        id: u16,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotPvh { magic } => {
                write!(f, "start info begins with {magic:#010x}: boot the image by its PVH note")
            }
            Self::NoMemoryMap { version } => {
                write!(f, "start info version {version} has no memory map: version 1 is needed")
            }
            Self::TooMany { what, limit } => write!(f, "more than {limit} {what}: raise the limit in arch"),
            Self::OutOfReach { what, address } => {
                write!(
                    f,
                    "{what} at {address:#x} cannot be used: it must lie below 4 GiB, apart from the image and from other RAM"
                )
            }
            Self::OverlappingRam { address } => write!(f, "the memory map lists RAM at {address:#x} twice"),
            Self::NoMemory { what } => write!(f, "no free memory for {what}"),
            Self::NoTable { signature } => write!(f, "firmware has no usable ACPI table {signature}"),
            Self::NoClock => write!(f, "neither CPUID leaf 0x15 nor the PIT tells the frequency of the TSC"),
            Self::UnknownCore { core, present } => {
                write!(f, "core {core} cannot be started: 1 to {present} (exclusive) can")
            }
            Self::CoreRunning { core } => write!(f, "core {core} runs already"),
            Self::CoreSilent { core, waited_us } => {
                write!(f, "core {core} did not come up in {waited_us} us")
            }
            Self::Unsupported { feature } => {
                write!(f, "the processor has no {feature}, or firmware switched it off")
            }
            Self::Levels { levels } => write!(f, "a guest's tables have {levels} levels instead of 4"),
            Self::GuestExists { id } => write!(f, "virtual CPU {id} exists already: drop it first"),
            Self::GuestOutOfRange { id, limit } => {
                write!(f, "virtual CPU {id} is past the {limit} that can be told apart")
            }
        }
    }
}

impl core::error::Error for Error {}

const MAGIC: u32 = 0x336E_C578;
const START_INFO_BYTES: u64 = 56;
const MODULE_BYTES: u64 = 32;
const MEMORY_MAP_ENTRY_BYTES: u64 = 24;
const MEMORY_MAP_RAM: u32 = 1;

const COMMAND_LINE_LIMIT: u64 = 4096;
const MODULE_LIMIT: u32 = 8;
const MEMORY_MAP_LIMIT: u32 = 128;
const RAM_LIMIT: usize = 32;
const TAKEN_LIMIT: usize = MEMORY_MAP_LIMIT as usize + MODULE_LIMIT as usize + 8;
/// Longest ACPI table that is looked at, in bytes; the longest known are some hundred kilobytes.
const TABLE_LIMIT: u64 = 1 << 20;

const MIB: u64 = 1 << 20;

/// What a PC has at fixed addresses: the first MiB, and the I/O APICs, HPET, IOMMUs and local APICs.
const FIXED: [Range<u64>; 2] = [0..MIB, 0xFEC0_0000..0xFEF0_0000];

/// What the boot loader said, checked.
pub struct Boot {
    command_line: &'static str,
    /// RAM, as the memory map has it; no two overlap.
    ram: Vec<Range<u64>, RAM_LIMIT>,
    /// What must not be handed out as RAM: the rest of the memory map, the image, and what the boot loader left.
    taken: Vec<Range<u64>, TAKEN_LIMIT>,
    guest_image: Option<Range<u64>>,
    /// `rsdp_paddr`, or 0.
    rsdp: u64,
}

impl Boot {
    /// Reads the start info at `address`. Runs once, before any memory is handed out.
    pub(crate) fn read(address: u64) -> Result<Self, Error> {
        let start_info = boot_bytes("the start info", address, START_INFO_BYTES)?;
        let field = |at| u64_at(start_info, at).unwrap_or(0);
        let magic = field(0) as u32;
        let version = (field(0) >> 32) as u32;
        if magic != MAGIC {
            return Err(Error::NotPvh { magic });
        }
        let map = field(40);
        let map_entries = field(48) as u32;
        if version < 1 || map_entries == 0 {
            return Err(Error::NoMemoryMap { version });
        }
        let mut boot =
            Self { command_line: "", ram: Vec::new(), taken: Vec::new(), guest_image: None, rsdp: field(32) };
        boot.take(paging::image())?;
        boot.take(address..address + START_INFO_BYTES)?;
        boot.read_memory_map(map, map_entries)?;
        boot.read_modules(field(16), (field(8) >> 32) as u32)?;
        if field(24) != 0 {
            let text = boot.take_text("the command line", field(24))?;
            boot.command_line = core::str::from_utf8(text).unwrap_or("");
        }
        Ok(boot)
    }

    fn read_memory_map(&mut self, address: u64, entries: u32) -> Result<(), Error> {
        if entries > MEMORY_MAP_LIMIT {
            return Err(Error::TooMany { what: "memory map entries", limit: MEMORY_MAP_LIMIT as usize });
        }
        let bytes = u64::from(entries) * MEMORY_MAP_ENTRY_BYTES;
        let map = boot_bytes("the memory map", address, bytes)?;
        self.take(address..address + bytes)?;
        for entry in map.chunks_exact(MEMORY_MAP_ENTRY_BYTES as usize) {
            let field = |at| u64_at(entry, at).unwrap_or(0);
            let range = field(0)..field(0).saturating_add(field(8));
            if field(16) as u32 != MEMORY_MAP_RAM {
                self.take(range)?;
            } else if self.ram.iter().any(|ram| overlap(ram, &range)) {
                return Err(Error::OverlappingRam { address: range.start });
            } else if self.ram.push(range).is_err() {
                return Err(Error::TooMany { what: "ranges of RAM", limit: RAM_LIMIT });
            }
        }
        Ok(())
    }

    fn read_modules(&mut self, address: u64, count: u32) -> Result<(), Error> {
        if count == 0 {
            return Ok(());
        }
        if count > MODULE_LIMIT {
            return Err(Error::TooMany { what: "boot modules", limit: MODULE_LIMIT as usize });
        }
        let bytes = u64::from(count) * MODULE_BYTES;
        let list = boot_bytes("the list of modules", address, bytes)?;
        self.take(address..address + bytes)?;
        for module in list.chunks_exact(MODULE_BYTES as usize) {
            let field = |at| u64_at(module, at).unwrap_or(0);
            let range = field(0)..field(0).saturating_add(field(8));
            if range.is_empty() || range.start == 0 || range.end > MAPPED_END {
                return Err(Error::OutOfReach { what: "a boot module", address: range.start });
            }
            self.take(range.clone())?;
            self.guest_image.get_or_insert(range);
        }
        Ok(())
    }

    /// Returns the text at `address`, without the NUL that ends it, and keeps its memory.
    fn take_text(&mut self, what: &'static str, address: u64) -> Result<&'static [u8], Error> {
        let limit = COMMAND_LINE_LIMIT.min(MAPPED_END.saturating_sub(address));
        let text = boot_bytes(what, address, limit)?;
        let length = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
        self.take(address..address + length as u64 + 1)?;
        Ok(&text[..length])
    }

    fn take(&mut self, range: Range<u64>) -> Result<(), Error> {
        self.taken
            .push(range)
            .map_err(|_| Error::TooMany { what: "reserved ranges of memory", limit: TAKEN_LIMIT })
    }

    /// Returns the command line; empty if there is none, or it is not UTF-8.
    pub fn command_line(&self) -> &str {
        self.command_line
    }

    /// Returns the free RAM, in ranges of whole pages of 4 KiB, above 1 MiB and below 4 GiB.
    ///
    /// It leaves out this image, the boot modules and everything that the boot loader or firmware keeps.
    pub fn memory(&self) -> impl Iterator<Item = Range<PhysAddr>> + '_ {
        self.free(MIB..MAPPED_END).map(addresses)
    }

    /// Returns a free page below 1 MiB. Page 0 is not one: firmware keeps its own data there.
    pub(crate) fn page_below_1_mib(&self) -> Option<u64> {
        self.free(PAGE_SIZE..MIB).next().map(|range| range.start)
    }

    /// Returns the end of RAM below 4 GiB.
    pub(crate) fn top_of_ram(&self) -> u64 {
        self.ram
            .iter()
            .filter(|ram| ram.start < MAPPED_END)
            .map(|ram| ram.end.min(MAPPED_END))
            .max()
            .unwrap_or(0)
    }

    /// Returns whole pages of RAM inside `window` that are not taken.
    fn free(&self, window: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ram.iter().flat_map(move |ram| {
            let end = ram.end.min(window.end);
            let mut at = page_up(ram.start.max(window.start));
            iter::from_fn(move || {
                while at < end {
                    let in_the_way = self.taken.iter().filter(|taken| overlap(taken, &(at..end)));
                    let (stop, next) = match in_the_way.min_by_key(|taken| taken.start) {
                        Some(taken) => (taken.start, taken.end),
                        None => (end, end),
                    };
                    let free = at..stop & !(PAGE_SIZE - 1);
                    at = page_up(next);
                    if !free.is_empty() {
                        return Some(free);
                    }
                }
                None
            })
        })
    }

    /// Returns where the guest image is: the first boot module (`-initrd` of QEMU).
    pub fn guest_image(&self) -> Option<Range<PhysAddr>> {
        self.guest_image.clone().map(addresses)
    }

    /// Returns the bytes of the guest image.
    pub fn guest_image_bytes(&self) -> Option<&'static [u8]> {
        let image = self.guest_image.clone()?;
        self.firmware(image.start, image.end - image.start)
    }

    /// Returns the whole ACPI table with `signature`, its checksum verified; `None` if there is none that is valid.
    pub fn acpi_table(&self, signature: &[u8; 4]) -> Option<&'static [u8]> {
        let (root, entry_bytes) = self.acpi_root()?;
        root.get(36..)?.chunks_exact(entry_bytes).find_map(|entry| {
            let mut address = [0; 8];
            address[..entry_bytes].copy_from_slice(entry);
            let address = u64::from_le_bytes(address);
            self.firmware(address, 4).filter(|found| found == signature)?;
            self.table(address)
        })
    }

    /// Returns the XSDT, or else the RSDT, and the bytes of each of its entries.
    fn acpi_root(&self) -> Option<(&'static [u8], usize)> {
        let rsdp = self.rsdp(self.rsdp).or_else(|| {
            let ebda = u64::from(u16::from_le_bytes(*self.firmware(0x40E, 2)?.first_chunk()?)) << 4;
            let places = (ebda..ebda + 1024).chain(0xE_0000..0x10_0000).step_by(16);
            places.filter(|&place| place >= PAGE_SIZE).find_map(|place| self.rsdp(place))
        })?;
        let xsdt = u64_at(rsdp, 24).unwrap_or(0);
        match self.table(xsdt).filter(|table| table.starts_with(b"XSDT")) {
            Some(xsdt) => Some((xsdt, 8)),
            None => {
                let rsdt = self.table(u64::from(u32_at(rsdp, 16)?))?;
                rsdt.starts_with(b"RSDT").then_some((rsdt, 4))
            }
        }
    }

    /// Returns the root pointer at `address`: 20 bytes in the first version of ACPI, 36 since.
    fn rsdp(&self, address: u64) -> Option<&'static [u8]> {
        let first = self.firmware(address, 20)?;
        if !first.starts_with(b"RSD PTR ") || sum(first) != 0 {
            return None;
        }
        match first[15] {
            0 | 1 => Some(first),
            _ => self.firmware(address, 36).filter(|whole| sum(whole) == 0),
        }
    }

    fn table(&self, address: u64) -> Option<&'static [u8]> {
        let header = self.firmware(address, 36)?;
        let bytes = u64::from(u32_at(header, 4)?);
        let table = self.firmware(address, (36..=TABLE_LIMIT).contains(&bytes).then_some(bytes)?)?;
        (sum(table) == 0).then_some(table)
    }

    /// Returns the local APIC IDs of the cores that firmware lists as enabled (MADT).
    pub(crate) fn apic_ids(&self) -> impl Iterator<Item = u32> + '_ {
        const ENABLED: u32 = 1 << 0;
        let mut rest = self.acpi_table(b"APIC").and_then(|madt| madt.get(44..)).unwrap_or(&[]);
        let entries = iter::from_fn(move || {
            let length = usize::from(*rest.get(1)?);
            let entry = rest.get(..length).filter(|entry| entry.len() >= 2)?;
            rest = &rest[length..];
            Some(entry)
        });
        entries.filter_map(|entry| {
            let (id, flags) = match entry[0] {
                // Processor Local APIC.
                0 => (u32::from(*entry.get(3)?), u32_at(entry, 4)?),
                // Processor Local x2APIC.
                9 => (u32_at(entry, 4)?, u32_at(entry, 8)?),
                _ => return None,
            };
            (flags & ENABLED != 0).then_some(id)
        })
    }

    /// Returns the configuration space of PCI segment 0 (MCFG).
    pub fn config_space(&self) -> Result<Ecam, Error> {
        const NO_MCFG: Error = Error::NoTable { signature: "MCFG" };
        let allocations = self.acpi_table(b"MCFG").and_then(|mcfg| mcfg.get(44..)).ok_or(NO_MCFG)?;
        let segment_0 = allocations.chunks_exact(16).find(|entry| entry[8..10] == [0, 0]).ok_or(NO_MCFG)?;
        let base = u64_at(segment_0, 0).ok_or(NO_MCFG)?;
        let (first_bus, last_bus) = (segment_0[10], segment_0[11]);
        let end = base.checked_add((u64::from(last_bus) + 1) << Ecam::BUS_SHIFT);
        let in_reach = end.is_some_and(|end| end <= MAPPED_END) && base % (1 << Ecam::BUS_SHIFT) == 0;
        if !in_reach || self.top_of_ram() > base {
            return Err(Error::OutOfReach { what: "configuration space", address: base });
        }
        Ok(Ecam { base: base as usize, first_bus, last_bus })
    }

    /// Returns whether firmware goes on using memory through `device`, so that it cannot be given away (`RMRR` of the `DMAR`
    /// table). If the table cannot be read, so it is for all that is known.
    pub fn firmware_uses(&self, config: &Ecam, device: StreamId) -> bool {
        let Some(table) = self.acpi_table(b"DMAR") else { return false };
        let buses = |of: Requester| pcie::buses_behind(config, of.id);
        let device = Requester { segment: 0, id: device };
        Dmar::new(table).map_or(true, |table| table.kept_mapped(device, Reserved::Refuse, buses).is_err())
    }

    /// Returns whether a part of `range` belongs to the machine, so that it cannot be the registers of a device.
    ///
    /// That is all that the memory map lists, whatever its type (firmware leaves out what devices are given by their base
    /// address registers), this image and the boot modules, configuration space, the first MiB, and
    /// `0xFEC0_0000..0xFEF0_0000`, where the APICs are. A device may claim any address as its own: this comes before such
    /// an address is believed.
    pub fn overlaps_machine(&self, range: &Range<PhysAddr>) -> bool {
        let range = range.start.0..range.end.0;
        let mut known = self.ram.iter().chain(&self.taken).chain(&FIXED);
        known.any(|known| overlap(known, &range))
            || self.config_windows().any(|window| overlap(&window, &range))
    }

    /// Returns the configuration space of all segments (MCFG).
    fn config_windows(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let allocations = self.acpi_table(b"MCFG").and_then(|mcfg| mcfg.get(44..)).unwrap_or(&[]);
        allocations.chunks_exact(16).map(|entry| {
            let base = u64_at(entry, 0).unwrap_or(0);
            let bus = |number| base.saturating_add(number << Ecam::BUS_SHIFT);
            bus(entry[10].into())..bus(u64::from(entry[11]) + 1)
        })
    }

    /// Returns `bytes` bytes at `address` that firmware or the boot loader left, if no part of them can change.
    fn firmware(&self, address: u64, bytes: u64) -> Option<&'static [u8]> {
        let range = address..address.checked_add(bytes)?;
        let changes = overlap(&range, &paging::image())
            || self.free(MIB..MAPPED_END).any(|free| overlap(&range, &free));
        if range.start == 0 || range.end > MAPPED_END || changes {
            return None;
        }
        // SAFETY: the memory is mapped, is not null, is neither part of the image nor ever handed out, and what firmware
        // left there stays.
        Some(unsafe {
            slice::from_raw_parts(ptr::with_exposed_provenance(range.start as usize), bytes as usize)
        })
    }
}

/// Returns `bytes` bytes at `address` that the boot loader handed over as `what`; the caller keeps their memory.
fn boot_bytes(what: &'static str, address: u64, bytes: u64) -> Result<&'static [u8], Error> {
    let range = address..address.saturating_add(bytes);
    if address == 0 || range.end > MAPPED_END || overlap(&range, &paging::image()) {
        return Err(Error::OutOfReach { what, address });
    }
    // SAFETY: the memory is mapped, is not null and is not part of the image. No memory has been handed out yet, and the
    // caller takes this out of what will be.
    Ok(unsafe { slice::from_raw_parts(ptr::with_exposed_provenance(address as usize), bytes as usize) })
}

fn addresses(range: Range<u64>) -> Range<PhysAddr> {
    PhysAddr(range.start)..PhysAddr(range.end)
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

fn page_up(address: u64) -> u64 {
    address.saturating_add(PAGE_SIZE - 1) & !(PAGE_SIZE - 1)
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_le_bytes)
}

/// Memory-mapped configuration space of PCI segment 0 (the PCIe specification's ECAM).
///
/// Buses that it does not cover, and registers that do not exist, read all ones; writes to them do nothing.
#[derive(Clone, Copy, Debug)]
pub struct Ecam {
    /// Where bus 0 is, or would be.
    base: usize,
    first_bus: u8,
    last_bus: u8,
}

impl Ecam {
    /// Each bus has 1 MiB.
    const BUS_SHIFT: u32 = 20;

    fn register(&self, function: StreamId, offset: u16) -> Option<*mut u32> {
        let bus = u8::try_from(function.0 >> 8).ok()?;
        let exists =
            (self.first_bus..=self.last_bus).contains(&bus) && offset < 4096 && offset.is_multiple_of(4);
        exists.then(|| {
            ptr::with_exposed_provenance_mut(self.base + ((function.0 as usize) << 12) + usize::from(offset))
        })
    }
}

impl ConfigSpace for Ecam {
    fn read32(&self, function: StreamId, offset: u16) -> u32 {
        match self.register(function, offset) {
            // SAFETY: `config_space` checked that the buses are mapped above RAM, where memory is uncached.
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
