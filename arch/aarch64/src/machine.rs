//! What the boot loader and firmware say about the machine: memory, the guest image, configuration space.
//!
//! Everything comes from the device tree, and nothing in it is believed before it is checked: addresses, lengths, counts.
#![expect(unsafe_code, reason = "the boot loader hands over memory by address")]

use crate::{
    ecam,
    paging::{self, BLOCK, MAPPED_END},
    tree::Tree,
};
use core::{fmt, iter, ops::Range, ptr, slice};
use heapless::Vec;
use iommu::{PAGE_SIZE, PhysAddr, StreamId};

pub use crate::ecam::Ecam;

/// Why something about the machine is not as it is needed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, defmt::Format)]
#[non_exhaustive]
pub enum Error {
    /// There is no device tree that can be read at this address.
    NoTree {
        /// The address that the boot loader gave, or QEMU's for an ELF file.
        address: u64,
    },
    /// The device tree lacks `what`.
    NoNode {
        /// The thing.
        what: &'static str,
    },
    /// There is more of `what` than this build has room for.
    TooMany {
        /// The things.
        what: &'static str,
        /// Room for them.
        limit: usize,
    },
    /// `what` lies above 512 GiB, has a length that makes no sense, or is not where it must be.
    OutOfReach {
        /// The thing.
        what: &'static str,
        /// Its address.
        address: u64,
    },
    /// The device tree lists the RAM at `address` twice.
    OverlappingRam {
        /// Where the second listing begins.
        address: u64,
    },
    /// Neither the device tree nor firmware tells the frequency of the counter.
    NoClock,
    /// No redistributor of the interrupt controller is that of `core`.
    NoRedistributor {
        /// The core.
        core: usize,
    },
    /// The interrupt controller did not acknowledge a write in time.
    Silent {
        /// What was waited for, by the manual's name.
        register: &'static str,
        /// How long, in microseconds.
        waited_us: u64,
    },
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
    /// Firmware did not start the core.
    CoreRefused {
        /// The core asked for.
        core: usize,
        /// What PSCI's `CPU_ON` returned.
        code: i32,
    },
    /// The core did not come up in time.
    CoreSilent {
        /// The core asked for.
        core: usize,
        /// How long it was given, in microseconds.
        waited_us: u64,
    },
    /// The machine lacks `feature`, by the manual's name, or firmware switched it off.
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
            Self::NoTree { address } => write!(
                f,
                "there is no device tree at {address:#x}: boot by the arm64 Linux protocol, with the tree in the image's GiB"
            ),
            Self::NoNode { what } => write!(f, "the device tree lacks {what}"),
            Self::TooMany { what, limit } => write!(f, "more than {limit} {what}: raise the limit in arch"),
            Self::OutOfReach { what, address } => {
                write!(
                    f,
                    "{what} at {address:#x} cannot be used: it must be aligned, below 512 GiB, and apart from the image"
                )
            }
            Self::OverlappingRam { address } => write!(f, "the device tree lists RAM at {address:#x} twice"),
            Self::NoClock => {
                write!(f, "neither the device tree nor CNTFRQ_EL0 tells the frequency of the counter")
            }
            Self::NoRedistributor { core } => {
                write!(f, "the interrupt controller has no redistributor for core {core}")
            }
            Self::Silent { register, waited_us } => {
                write!(f, "{register} gave no acknowledgement in {waited_us} us")
            }
            Self::UnknownCore { core, present } => {
                write!(f, "core {core} cannot be started: 1 to {present} (exclusive) can")
            }
            Self::CoreRunning { core } => write!(f, "core {core} runs already"),
            Self::CoreRefused { core, code } => {
                write!(f, "firmware did not start core {core}: CPU_ON returned {code}")
            }
            Self::CoreSilent { core, waited_us } => {
                write!(f, "core {core} did not come up in {waited_us} us")
            }
            Self::Unsupported { feature } => {
                write!(f, "the machine has no {feature}, or firmware switched it off")
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

const RAM_LIMIT: usize = 32;
const TAKEN_LIMIT: usize = 32;
/// What the boot loader said, checked.
pub struct Boot {
    tree: Tree,
    /// RAM that can be used, in whole blocks; no two overlap.
    ram: Vec<Range<u64>, RAM_LIMIT>,
    /// What must not be handed out as RAM: what the tree reserves, the image, and what the boot loader left.
    taken: Vec<Range<u64>, TAKEN_LIMIT>,
    guest_image: Option<Range<u64>>,
}

impl Boot {
    /// Reads what `tree` says of memory. Runs once, before any memory is handed out.
    pub(crate) fn new(tree: Tree) -> Result<Self, Error> {
        let mut boot = Self { tree, ram: Vec::new(), taken: Vec::new(), guest_image: None };
        boot.take(paging::image())?;
        boot.take(tree.memory())?;
        let mut unmapped = Vec::<Range<u64>, TAKEN_LIMIT>::new();
        for (range, is_unmapped) in tree.reserved() {
            boot.take(range.clone())?;
            if is_unmapped {
                // There is room: it has as much as what is taken.
                let _ = unmapped.push(range);
            }
        }
        boot.read_ram(&unmapped)?;
        boot.check_is_ram("the device tree", tree.memory())?;
        if let Some(image) = tree.initrd() {
            boot.check_is_ram("the guest image", image.clone())?;
            boot.take(image.clone())?;
            boot.guest_image = Some(image);
        }
        Ok(boot)
    }

    /// Notes the whole blocks of RAM, but for those in which something must not be mapped.
    fn read_ram(&mut self, unmapped: &[Range<u64>]) -> Result<(), Error> {
        for listed in self.tree.ram() {
            let listed = listed.start..listed.end.min(MAPPED_END);
            for range in gaps(listed, unmapped, BLOCK) {
                if self.ram.iter().any(|ram| overlap(ram, &range)) {
                    return Err(Error::OverlappingRam { address: range.start });
                }
                let full = |_| Error::TooMany { what: "ranges of RAM", limit: RAM_LIMIT };
                self.ram.push(range).map_err(full)?;
            }
        }
        Ok(())
    }

    /// Refuses a range that is not wholly in usable RAM: it would not be mapped as memory.
    fn check_is_ram(&self, what: &'static str, range: Range<u64>) -> Result<(), Error> {
        let inside = |ram: &Range<u64>| ram.start <= range.start && range.end <= ram.end;
        if !range.is_empty() && self.ram.iter().any(inside) && !overlap(&range, &paging::image()) {
            Ok(())
        } else {
            Err(Error::OutOfReach { what, address: range.start })
        }
    }

    fn take(&mut self, range: Range<u64>) -> Result<(), Error> {
        self.taken
            .push(range)
            .map_err(|_| Error::TooMany { what: "reserved ranges of memory", limit: TAKEN_LIMIT })
    }

    /// Returns the device tree.
    pub(crate) fn tree(&self) -> &Tree {
        &self.tree
    }

    /// Returns the RAM that can be used, in whole blocks.
    pub(crate) fn ram(&self) -> &[Range<u64>] {
        &self.ram
    }

    /// Returns whether firmware goes on using memory through `device`, so that it cannot be given away.
    ///
    /// The device tree names devices by node (`iommu-addresses` of reserved memory), and PCI functions mostly have none: where
    /// it names any, it is taken to name this one.
    pub fn firmware_uses(&self, _: &Ecam, _: StreamId) -> bool {
        self.tree.reserves_for_devices()
    }

    /// Returns the command line; empty if there is none, or it is not UTF-8.
    pub fn command_line(&self) -> &str {
        self.tree.command_line()
    }

    /// Returns the free RAM, in ranges of whole pages of 4 KiB, below 512 GiB.
    ///
    /// It leaves out this image, the guest image and everything that the boot loader or firmware keeps.
    pub fn memory(&self) -> impl Iterator<Item = Range<PhysAddr>> + '_ {
        let free = self.ram.iter().flat_map(|ram| gaps(ram.clone(), &self.taken, PAGE_SIZE));
        free.filter(|range| range.start != 0).map(addresses)
    }

    /// Returns where the guest image is: what the boot loader was given besides the image (`-initrd` of QEMU).
    pub fn guest_image(&self) -> Option<Range<PhysAddr>> {
        self.guest_image.clone().map(addresses)
    }

    /// Returns the bytes of the guest image.
    pub fn guest_image_bytes(&self) -> Option<&'static [u8]> {
        let image = self.guest_image.clone().filter(|image| image.start != 0)?;
        let start = ptr::with_exposed_provenance(image.start as usize);
        // SAFETY: `new` checked that it is RAM, which is mapped, and took it out of what is handed out.
        Some(unsafe { slice::from_raw_parts(start, (image.end - image.start) as usize) })
    }

    /// Returns the configuration space of PCI segment 0.
    ///
    /// Devices on bus 0 have addresses afterwards: firmware's, or else ones from the host bridge's window.
    pub fn config_space(&self) -> Result<Ecam, Error> {
        let pci = self.tree.pci()?;
        for registers in iter::once(&pci.registers).chain(&pci.windows) {
            if self.ram.iter().any(|ram| overlap(ram, registers)) {
                return Err(Error::OutOfReach { what: "PCI, which lies in RAM,", address: registers.start });
            }
        }
        // SAFETY: the tree says that it is here, and what is not RAM is mapped as a device.
        let config = unsafe { Ecam::new(&pci) };
        // Every base address register can hold an address below 4 GiB.
        if let Some(window) = pci.windows.iter().find(|window| window.end <= 1 << 32) {
            ecam::assign(&config, window.clone());
        }
        Ok(config)
    }

    /// Returns whether a part of `range` belongs to the machine, so that it cannot be the registers of a device.
    ///
    /// That is all that lies outside the host bridge's windows to devices' memory. A device may claim any address as its
    /// own: this comes before such an address is believed.
    pub fn overlaps_machine(&self, range: &Range<PhysAddr>) -> bool {
        let Ok(pci) = self.tree.pci() else { return true };
        !pci.windows.iter().any(|window| window.start <= range.start.0 && range.end.0 <= window.end)
    }
}

/// Returns what `taken` leaves of `whole`, in whole units of `unit` bytes, a power of two.
fn gaps(whole: Range<u64>, taken: &[Range<u64>], unit: u64) -> impl Iterator<Item = Range<u64>> + '_ {
    let up = move |at: u64| at.saturating_add(unit - 1) & !(unit - 1);
    let mut at = up(whole.start);
    iter::from_fn(move || {
        while at < whole.end {
            let in_the_way = taken.iter().filter(|taken| overlap(taken, &(at..whole.end)));
            let (stop, next) = match in_the_way.min_by_key(|taken| taken.start) {
                Some(taken) => (taken.start, taken.end),
                None => (whole.end, whole.end),
            };
            let free = at..stop & !(unit - 1);
            at = up(next);
            if !free.is_empty() {
                return Some(free);
            }
        }
        None
    })
}

fn addresses(range: Range<u64>) -> Range<PhysAddr> {
    PhysAddr(range.start)..PhysAddr(range.end)
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}
