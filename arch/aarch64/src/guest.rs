//! Virtual CPUs: what a guest is entered with, what it may do, and why it stops.
//!
//! What a guest gets: its own registers of EL1 and EL0, identification registers without what it cannot have, interrupts
//! through a virtual interface of GICv3, memory through its own tables, one hypercall instruction. What it does not: an
//! interrupt distributor, a timer that interrupts, firmware, debug registers, floating point and vectors, power states.
//!
//! | feature | supported | note |
//! |---|---|---|
//! | AArch64 at EL1 and EL0 | yes | hypercalls come from EL1 alone |
//! | floating point, vectors | no | hidden, and an undefined instruction: there is no state to leak |
//! | pointer authentication, memory tagging | no | as above |
//! | performance counters, debug, trace | no | as above |
//! | virtual counter | yes | the host's; its timer can be set, and interrupts nobody |
//! | ICC system registers | yes | interrupts 32 to 255 of group 1, by edge; there are no SGIs |
//! | system errors that come late | no | one that arrives when the guest has stopped is the hypervisor's end |
//! | memory partitioning (MPAM) | no | a guest that sets its identifiers all the same shares them with its neighbours on the core |
//! | defences against speculation | no | guests that share a core may learn of each other by timing |

mod el1;

use crate::{cpu, machine::Error};
use core::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
};
use iommu::{Gpa, Root};

/// Returns whether this machine can run guests.
pub fn supported() -> Result<(), Error> {
    el1::supported()
}

/// Makes this core ready to run guests. Comes before the first [`Vcpu::run`] on it.
pub fn init_core() -> Result<(), Error> {
    el1::supported()?;
    el1::init_core();
    Ok(())
}

/// An interrupt of a guest, by its number (INTID).
#[derive(Clone, Copy, Debug, Eq, PartialEq, defmt::Format)]
pub struct GuestInterrupt(u8);

impl GuestInterrupt {
    /// Returns interrupt `number`, or `None` if a guest cannot be interrupted by that: 32 to 255 are interrupts of devices.
    pub const fn new(number: u32) -> Option<Self> {
        if number >= 32 && number <= 255 { Some(Self(number as u8)) } else { None }
    }
}

/// The interrupt by which a guest is told of its fault channel.
pub const FAULT_CHANNEL: GuestInterrupt = GuestInterrupt(0x50);

/// The shortest guest program that does something for ever: it waits for an interrupt, and again (`wfi`, `b`).
pub const WAITS: &[u8] = &[0x7F, 0x20, 0x03, 0xD5, 0xFF, 0xFF, 0xFF, 0x17];

/// Why a guest stopped.
#[derive(Clone, Copy, Debug, Eq, PartialEq, defmt::Format)]
pub enum Exit {
    /// It asks for something, and waits for [`Vcpu::answer`].
    Hypercall {
        /// What it asks for.
        operation: u64,
        /// What it gives with it.
        arguments: [u64; 4],
    },
    /// It waits for an interrupt. It goes on behind its wait when it runs again, so the caller does the waiting.
    Halt,
    /// The hypervisor was interrupted, and has handled the interrupt. The guest did nothing special.
    Interrupted,
    /// It touched an address that its tables do not map so. It tries again when it runs again, unless
    /// [`Vcpu::refuse_access`] refuses.
    Memory {
        /// What it touched.
        address: Gpa,
        /// It wanted to write; else to read, or to execute.
        write: bool,
        /// It wanted to execute.
        execute: bool,
    },
    /// It did what a guest must not do, and cannot go on. To run it again makes sense after [`Vcpu::start_at`] alone.
    Crash(Crash),
}

/// What a guest did that it cannot go on from.
#[derive(Clone, Copy, Debug, Eq, PartialEq, defmt::Format)]
pub struct Crash {
    /// What it did.
    pub cause: Cause,
    /// Where (the guest's `pc`).
    pub at: u64,
    /// The processor's syndrome (`ESR_EL2`) and its two addresses (`FAR_EL2`, `HPFAR_EL2`).
    pub raw: [u64; 3],
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [syndrome, address, page] = self.raw;
        match self.cause {
            Cause::Delivery => write!(f, "memory was refused where exceptions are told")?,
            Cause::SystemError => write!(f, "system error")?,
            Cause::Unexpected => write!(f, "exception that nothing is known about")?,
        }
        write!(f, " at {:#x} (esr {syndrome:#x}, far {address:#x}, hpfar {page:#x})", self.at)
    }
}

/// The kinds of [`Crash`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, defmt::Format)]
#[non_exhaustive]
pub enum Cause {
    /// Memory was refused that the guest needs to be told anything: the code of its exception vectors.
    Delivery,
    /// An access failed outside the processor, and is reported late.
    SystemError,
    /// Something that a guest here has no use for.
    Unexpected,
}

/// Why the processor left a guest.
enum Stop {
    HostInterrupt,
    Hypercall,
    Halt,
    /// An access to a system register that is answered here.
    Register(el1::RegisterAccess),
    Memory {
        address: Gpa,
        write: bool,
        execute: bool,
    },
    /// Hardware had it stop, but the reason is gone: it goes on where it was.
    Nothing,
    /// An instruction that the guest's processor does not have.
    Undefined,
    SystemError,
    Unexpected,
}

/// How many virtual CPUs can exist at a time.
pub const VCPUS: usize = 8;

/// Which numbers of virtual CPUs are in use.
static TAKEN: [AtomicBool; VCPUS] = [const { AtomicBool::new(false) }; VCPUS];

/// A virtual CPU.
pub struct Vcpu {
    id: u16,
    machine: el1::Machine,
    pending: Pending,
    /// The core that it ran on last, in whose TLB its translations may be.
    core: Option<usize>,
    /// A refused access that the guest cannot be told about.
    undeliverable: bool,
}

impl Vcpu {
    /// Makes a virtual CPU that reaches memory through `nested_root`; it begins at guest-physical address 0.
    ///
    /// The root is that of 4-level stage 2 tables for 44 bits of address. While the virtual CPU exists they fulfil the
    /// promise of [`Root::new`], with the guest in the place of the device; after a translation was taken away or
    /// changed, [`flush`](Self::flush) comes before the next [`run`](Self::run).
    ///
    /// `id` is below [`VCPUS`], and no two virtual CPUs that exist have the same: translations are cached under it.
    pub fn new(nested_root: Root, id: u16) -> Result<Self, Error> {
        el1::supported()?;
        if nested_root.levels() != 4 {
            return Err(Error::Levels { levels: nested_root.levels() });
        }
        let limit = VCPUS as u32;
        let taken = TAKEN.get(usize::from(id)).ok_or(Error::GuestOutOfRange { id, limit })?;
        if taken.swap(true, Ordering::Acquire) {
            return Err(Error::GuestExists { id });
        }
        let machine = el1::Machine::new(nested_root, id);
        Ok(Self { id, machine, pending: Pending::default(), core: None, undeliverable: false })
    }

    /// Puts the virtual CPU where a kernel is entered, with nothing left of what it did before.
    ///
    /// As for Linux: EL1 with the stack of EL1, translation and caches off, interrupts masked, `pc` = `entry`, `x0` =
    /// `argument`. Without caches it sees of its memory what was [published](iommu::Bus::publish), and runs that.
    pub fn start_at(&mut self, entry: Gpa, argument: u32) {
        self.machine.start_at(entry, argument);
        self.pending = Pending::default();
        self.undeliverable = false;
    }

    /// Runs the guest until something happens.
    ///
    /// Called with interrupts masked, an interrupt that comes after the caller last looked for work ends it at once, so no
    /// work is left behind. Called with them open, it masks them for itself.
    ///
    /// PANICS: on a core without [`init_core`].
    pub fn run(&mut self) -> Exit {
        let _masked = cpu::mask();
        if self.undeliverable {
            return self.crash(Cause::Delivery);
        }
        let core = Some(cpu::core());
        if core != self.core {
            // What this core kept from the time when the guest ran on it may be out of date.
            self.core = core;
            self.flush();
        }
        loop {
            self.machine.offer(&mut self.pending);
            match self.machine.enter() {
                Stop::HostInterrupt => {
                    cpu::take_interrupts();
                    return Exit::Interrupted;
                }
                Stop::Nothing => {}
                Stop::Register(access) => {
                    if !self.machine.access(access) {
                        self.machine.inject_undefined();
                    }
                }
                Stop::Undefined => self.machine.inject_undefined(),
                Stop::Hypercall => {
                    let [operation, first, second, third, fourth, ..] = *self.machine.registers();
                    let arguments = [first, second, third, fourth];
                    return Exit::Hypercall { operation, arguments };
                }
                Stop::Halt => {
                    self.machine.skip();
                    return Exit::Halt;
                }
                Stop::Memory { address, write, execute } => return Exit::Memory { address, write, execute },
                Stop::SystemError => return self.crash(Cause::SystemError),
                Stop::Unexpected => return self.crash(Cause::Unexpected),
            }
        }
    }

    fn crash(&self, cause: Cause) -> Exit {
        Exit::Crash(Crash { cause, at: self.machine.pc(), raw: self.machine.raw_stop() })
    }

    /// Interrupts the guest as soon as it lets itself be interrupted; an interrupt that is pending already stays one.
    pub fn inject(&mut self, interrupt: GuestInterrupt) {
        self.pending.add(interrupt.0);
    }

    /// Returns whether the guest has an interrupt that it has not taken. A guest that halted with one goes on with it,
    /// unless it has masked its interrupts.
    pub fn is_interrupt_pending(&self) -> bool {
        !self.pending.is_empty() || self.machine.has_interrupt()
    }

    /// Answers [`Exit::Hypercall`]: `x0` to `x3` become `results`, and the guest goes on behind the call.
    ///
    /// Without an answer it makes the same call again.
    pub fn answer(&mut self, results: [u64; 4]) {
        self.machine.registers()[..4].copy_from_slice(&results);
        self.machine.skip();
    }

    /// Answers [`Exit::Memory`] with an exception of the guest, a synchronous external abort, at the instruction that
    /// touched the address.
    ///
    /// If the guest was just being told of something else, the code that it is told by is what is refused: then the next
    /// [`run`](Self::run) is a [`Crash`].
    pub fn refuse_access(&mut self) {
        if self.machine.is_being_told() {
            self.undeliverable = true;
        } else {
            self.machine.inject_external_abort();
        }
    }

    /// Forgets the translations of this virtual CPU before it runs again.
    pub fn flush(&mut self) {
        self.machine.flush();
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        TAKEN[usize::from(self.id)].store(false, Ordering::Release);
    }
}

/// The interrupts that a guest has not been offered, by number.
#[derive(Default)]
struct Pending([u64; 4]);

impl Pending {
    fn add(&mut self, number: u8) {
        self.0[usize::from(number / 64)] |= 1 << (number % 64);
    }

    fn remove(&mut self, number: u8) {
        self.0[usize::from(number / 64)] &= !(1 << (number % 64));
    }

    fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    /// Returns the interrupt with the lowest number, which comes first among equals.
    fn first(&self) -> Option<u8> {
        let (word, bits) = self.0.iter().enumerate().find(|(_, bits)| **bits != 0)?;
        Some(word as u8 * 64 + bits.trailing_zeros() as u8)
    }
}
