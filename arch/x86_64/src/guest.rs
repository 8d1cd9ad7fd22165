//! Virtual CPUs: what a guest is entered with, what it may do, and why it stops.
//!
//! What a guest gets: its own registers (x87 and SSE among them), CPUID without virtualization and without what it cannot
//! have, interrupts as vectors without an interrupt controller, memory through its own tables, one hypercall
//! instruction. What it does not: I/O ports, debug registers, most MSRs, AVX, power states.
//!
//! | feature | supported | note |
//! |---|---|---|
//! | 32-bit and 64-bit guests | yes | hypercalls come from 64-bit code in ring 0 alone |
//! | x87, SSE | yes | switched with the guest |
//! | AVX and later vector state | no | hidden, XCR0 is x87 alone and XSETBV is refused: there is no state to leak |
//! | `PKRU` | no | hidden; a guest that sets CR4.PKE all the same shares the register with its neighbours on the core |
//! | MSRs | some | EFER, system call and segment base registers; all others are refused with #GP |
//! | machine checks | no | one ends the machine, whoever was running |
//! | time-stamp counter | yes | the host's |
//! | defences against speculation | no | guests that share a core may learn of each other by timing |
#![expect(unsafe_code, reason = "the state of a virtual CPU has a place of its own, which it gives back")]

mod svm;

use crate::{
    cpu::{self, cpuid},
    interrupts,
    machine::Error,
    machine_check,
};
use core::fmt;
use iommu::{Gpa, Root};
use x86_64::registers::{
    control::{Cr4, Cr4Flags},
    xcontrol::{XCr0, XCr0Flags},
};

/// Returns whether this machine can run guests.
pub fn supported() -> Result<(), Error> {
    svm::supported().map(|_| ())
}

/// Makes this core ready to run guests. Comes before the first [`Vcpu::run`] on it.
pub fn init_core() -> Result<(), Error> {
    svm::init_core()?;
    switch_off_vector_state();
    Ok(())
}

/// Switches off all state of this core that XCR0 rules, except x87. Firmware may have left AVX on, and a guest may set
/// CR4.OSXSAVE: then one guest could read what another left in registers that are not switched.
fn switch_off_vector_state() {
    /// CPUID leaf 1, ECX.
    const CPUID_XSAVE: u32 = 1 << 26;
    if cpuid(1, 0).ecx & CPUID_XSAVE == 0 {
        return;
    }
    let found = Cr4::read_raw();
    // SAFETY: the processor has XSAVE; the bit lets the next instruction be one.
    unsafe { Cr4::write_raw(found | Cr4Flags::OSXSAVE.bits()) };
    // SAFETY: bit 0 alone is always allowed, and this build uses no vector state.
    unsafe { XCr0::write_raw(XCr0Flags::X87.bits()) };
    // SAFETY: as it was.
    unsafe { Cr4::write_raw(found) };
}

/// An interrupt of a guest, by its vector.
#[derive(Clone, Copy, Debug, Eq, PartialEq, defmt::Format)]
pub struct GuestInterrupt(u8);

impl GuestInterrupt {
    /// Returns interrupt `number`, or `None` if a guest cannot be interrupted by that: 32 to 255 are vectors of interrupts.
    pub const fn new(number: u32) -> Option<Self> {
        if number >= 32 && number <= 255 { Some(Self(number as u8)) } else { None }
    }
}

/// The interrupt by which a guest is told of its fault channel.
pub const FAULT_CHANNEL: GuestInterrupt = GuestInterrupt(0x50);

/// The shortest guest program that does something for ever: it waits for an interrupt, and again (`hlt`, `jmp`).
pub const WAITS: &[u8] = &[0xF4, 0xEB, 0xFD];

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
    /// Where (the guest's `rip`).
    pub at: u64,
    /// The processor's exit code and its two words of information.
    pub raw: [u64; 3],
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [code, info_1, info_2] = self.raw;
        match self.cause {
            Cause::TripleFault => write!(f, "triple fault")?,
            Cause::Port { port, write: true } => write!(f, "write to port {port:#x}")?,
            Cause::Port { port, write: false } => write!(f, "read from port {port:#x}")?,
            Cause::Hypercall => write!(f, "hypercall from 32-bit code")?,
            Cause::Delivery => write!(f, "memory was refused while an exception or interrupt was delivered")?,
            Cause::InvalidState => write!(f, "processor state that cannot be entered")?,
            Cause::Unexpected => write!(f, "exit that nothing is known about")?,
        }
        write!(f, " at {:#x} (exit {code:#x}, {info_1:#x}, {info_2:#x})", self.at)
    }
}

/// The kinds of [`Crash`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, defmt::Format)]
#[non_exhaustive]
pub enum Cause {
    /// A fault while a double fault was delivered.
    TripleFault,
    /// An access to an I/O port; a guest has none.
    Port {
        /// The port.
        port: u16,
        /// Whether it wrote.
        write: bool,
    },
    /// A hypercall from outside 64-bit mode.
    Hypercall,
    /// Memory was refused that the guest needs to be told anything: its tables or its stack.
    Delivery,
    /// The processor refuses to enter the guest's state.
    InvalidState,
    /// Something that a guest here has no use for: debug registers, cache control, a debug or alignment exception.
    Unexpected,
}

/// A guest's general registers, except the stack pointer.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Registers {
    rax: u64,
    rbx: u64,
    rcx: u64,
    rdx: u64,
    rsi: u64,
    rdi: u64,
    rbp: u64,
    r8_to_r15: [u64; 8],
}

impl Registers {
    const ZERO: Self = Self { rax: 0, rbx: 0, rcx: 0, rdx: 0, rsi: 0, rdi: 0, rbp: 0, r8_to_r15: [0; 8] };
}

/// Why the processor left a guest; each backend translates its own codes into these.
enum Stop {
    HostInterrupt,
    HostNmi,
    /// The guest can take an interrupt now.
    InterruptWindow,
    Cpuid,
    ReadMsr,
    WriteMsr,
    Hypercall,
    Halt,
    Port {
        port: u16,
        write: bool,
    },
    Memory {
        address: Gpa,
        write: bool,
        execute: bool,
    },
    /// An instruction that the guest's processor does not have.
    Undefined,
    /// An instruction that the guest may not use.
    Refused,
    TripleFault,
    /// The hardware failed; the guest has no part in it.
    MachineCheck,
    InvalidState,
    Unexpected,
}

/// #UD.
const INVALID_OPCODE: u8 = 6;
/// #GP.
const GENERAL_PROTECTION: u8 = 13;

/// How many virtual CPUs can exist at a time.
pub const VCPUS: usize = 8;

/// A virtual CPU.
pub struct Vcpu {
    machine: &'static mut svm::Machine,
    pending: Pending,
    /// The core that it ran on last, in whose TLB its translations may be.
    core: Option<usize>,
    /// A refused access that the guest cannot be told about.
    undeliverable: bool,
}

impl Vcpu {
    /// Makes a virtual CPU that reaches memory through `nested_root`; it begins at guest-physical address 0.
    ///
    /// The root is that of 4-level tables in the x86-64 format, as a unit's second stage has them too, in which every
    /// entry that is present has its user bit set: the processor walks them as for user accesses. While the virtual CPU
    /// runs they fulfil the promise of [`Root::new`], with the guest in the place of the device; after a
    /// translation was taken away or changed, [`flush`](Self::flush) comes before the next [`run`](Self::run).
    ///
    /// `id` is below [`VCPUS`], and no two virtual CPUs that exist have the same: translations are cached under it.
    pub fn new(nested_root: Root, id: u16) -> Result<Self, Error> {
        let limit = svm::supported()?.min(VCPUS as u32);
        if nested_root.levels() != 4 {
            return Err(Error::Levels { levels: nested_root.levels() });
        }
        if u32::from(id) >= limit {
            return Err(Error::GuestOutOfRange { id, limit });
        }
        let machine = svm::Machine::take(id, nested_root).ok_or(Error::GuestExists { id })?;
        Ok(Self { machine, pending: Pending::default(), core: None, undeliverable: false })
    }

    /// Puts the virtual CPU where a kernel is entered, with nothing left of what it did before.
    ///
    /// As for PVH: 32-bit protected mode, flat segments, paging off, `eip` = `entry` (its low 32 bits), `ebx` = `argument`.
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
            self.offer_interrupt();
            match self.machine.enter() {
                Stop::HostInterrupt => {
                    cpu::take_interrupts();
                    return Exit::Interrupted;
                }
                // The processor took the NMI when the host's state was back; the window is for `offer_interrupt`.
                Stop::HostNmi | Stop::InterruptWindow => {}
                Stop::Cpuid => self.answer_cpuid(),
                Stop::ReadMsr => self.read_msr(),
                Stop::WriteMsr => self.write_msr(),
                Stop::Undefined => self.machine.inject_exception(INVALID_OPCODE, None),
                Stop::Refused => self.machine.inject_exception(GENERAL_PROTECTION, Some(0)),
                Stop::Hypercall if !self.machine.is_64_bit() => return self.crash(Cause::Hypercall),
                Stop::Hypercall if self.machine.privilege() != 0 => {
                    self.machine.inject_exception(INVALID_OPCODE, None);
                }
                Stop::Hypercall => {
                    let Registers { rax, rdi, rsi, rdx, rcx, .. } = *self.machine.registers();
                    return Exit::Hypercall { operation: rax, arguments: [rdi, rsi, rdx, rcx] };
                }
                Stop::Halt => {
                    self.machine.skip(1);
                    return Exit::Halt;
                }
                Stop::Memory { address, write, execute } => return Exit::Memory { address, write, execute },
                Stop::Port { port, write } => return self.crash(Cause::Port { port, write }),
                Stop::MachineCheck => interrupts::machine_check(),
                // A guest without CR4.MCE is shut down by a machine check.
                Stop::TripleFault if machine_check::is_in_progress() => interrupts::machine_check(),
                Stop::TripleFault => return self.crash(Cause::TripleFault),
                Stop::InvalidState => return self.crash(Cause::InvalidState),
                Stop::Unexpected => return self.crash(Cause::Unexpected),
            }
        }
    }

    fn crash(&self, cause: Cause) -> Exit {
        Exit::Crash(Crash { cause, at: self.machine.rip(), raw: self.machine.raw_stop() })
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

    /// Gives the guest the highest interrupt that is pending, or asks to be told when it can take it.
    fn offer_interrupt(&mut self) {
        if self.machine.can_take_interrupt()
            && let Some(vector) = self.pending.take_highest()
        {
            self.machine.inject_interrupt(vector);
        }
        self.machine.ask_for_window(!self.pending.is_empty());
    }

    /// Answers [`Exit::Hypercall`]: `rax`, `rdi`, `rsi` and `rdx` become `results`, and the guest goes on behind the call.
    ///
    /// Without an answer it makes the same call again.
    pub fn answer(&mut self, results: [u64; 4]) {
        let registers = self.machine.registers();
        [registers.rax, registers.rdi, registers.rsi, registers.rdx] = results;
        self.machine.skip(3);
    }

    /// Answers [`Exit::Memory`] with an exception of the guest, #GP(0), at the instruction that touched the address.
    ///
    /// If the guest was just being told of something else, what it was told with (its tables, its stack) is what is
    /// refused: then the next [`run`](Self::run) is a [`Crash`].
    pub fn refuse_access(&mut self) {
        if self.machine.has_event() {
            self.undeliverable = true;
        } else {
            self.machine.inject_exception(GENERAL_PROTECTION, Some(0));
        }
    }

    /// Forgets the translations of this virtual CPU before it runs again.
    pub fn flush(&mut self) {
        self.machine.flush();
    }

    fn answer_cpuid(&mut self) {
        let registers = self.machine.registers();
        let leaf = guest_cpuid(registers.rax as u32, registers.rcx as u32);
        [registers.rax, registers.rbx, registers.rcx, registers.rdx] = leaf.map(u64::from);
        self.machine.skip(2);
    }

    fn read_msr(&mut self) {
        if self.machine.registers().rcx as u32 != EFER {
            return self.machine.inject_exception(GENERAL_PROTECTION, Some(0));
        }
        let value = self.machine.efer();
        let registers = self.machine.registers();
        registers.rax = value & 0xFFFF_FFFF;
        registers.rdx = value >> 32;
        self.machine.skip(2);
    }

    fn write_msr(&mut self) {
        let Registers { rax, rcx, rdx, .. } = *self.machine.registers();
        if rcx as u32 == EFER && self.machine.set_efer(rdx << 32 | rax & 0xFFFF_FFFF) {
            self.machine.skip(2);
        } else {
            self.machine.inject_exception(GENERAL_PROTECTION, Some(0));
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // SAFETY: the reference goes with `self`.
        unsafe { self.machine.release() };
    }
}

/// `EFER`, the one MSR that is answered here.
const EFER: u32 = 0xC000_0080;

/// Returns what a guest sees of a CPUID leaf, as `eax`, `ebx`, `ecx`, `edx`: the host's features that it may use.
///
/// A list of what is allowed, since each new feature of a processor may bring state that is not switched.
fn guest_cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    /// SSE3, PCLMULQDQ, SSSE3, CMPXCHG16B, PCID, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, RDRAND.
    const LEAF_1_ECX: u32 = bits(&[0, 1, 9, 13, 17, 19, 20, 22, 23, 25, 30]);
    /// `Hypervisor present`.
    const LEAF_1_HYPERVISOR: u32 = bits(&[31]);
    /// FPU, PSE, TSC, MSR, PAE, CX8, SEP, PGE, CMOV, PSE36, CLFSH, MMX, FXSR, SSE, SSE2.
    const LEAF_1_EDX: u32 = bits(&[0, 3, 4, 5, 6, 8, 11, 13, 15, 17, 19, 23, 24, 25, 26]);
    /// FSGSBASE, BMI1, SMEP, BMI2, ERMS, RDSEED, ADX, SMAP, CLFLUSHOPT.
    const LEAF_7_EBX: u32 = bits(&[0, 3, 7, 8, 9, 18, 19, 20, 23]);
    /// LAHF, ABM, SSE4A, PREFETCHW.
    const LEAF_80000001_ECX: u32 = bits(&[0, 5, 6, 8]);
    /// SYSCALL, NX, 1 GiB pages, long mode.
    const LEAF_80000001_EDX: u32 = bits(&[11, 20, 26, 29]);
    /// `Invariant TSC`.
    const LEAF_80000007_EDX: u32 = bits(&[8]);

    let host = cpuid(leaf, subleaf);
    match leaf {
        0 => [host.eax.min(7), host.ebx, host.ecx, host.edx],
        // EBX holds the APIC ID of whichever core this is, and the count of them; the guest has one core and no APIC.
        1 => {
            let flush_line = host.ebx & 0xFF00;
            [host.eax, flush_line, host.ecx & LEAF_1_ECX | LEAF_1_HYPERVISOR, host.edx & LEAF_1_EDX]
        }
        7 if subleaf == 0 => [0, host.ebx & LEAF_7_EBX, 0, 0],
        0x8000_0000 => [host.eax.min(0x8000_0008), host.ebx, host.ecx, host.edx],
        0x8000_0001 => [host.eax, 0, host.ecx & LEAF_80000001_ECX, host.edx & LEAF_80000001_EDX],
        // The brand.
        0x8000_0002..=0x8000_0004 => [host.eax, host.ebx, host.ecx, host.edx],
        0x8000_0007 => [0, 0, 0, host.edx & LEAF_80000007_EDX],
        // Widths of addresses.
        0x8000_0008 => [host.eax, 0, 0, 0],
        _ => [0; 4],
    }
}

const fn bits(numbers: &[u32]) -> u32 {
    let mut word = 0;
    let mut at = 0;
    while at < numbers.len() {
        word |= 1 << numbers[at];
        at += 1;
    }
    word
}

/// The interrupts that a guest has not taken, by vector.
#[derive(Default)]
struct Pending([u64; 4]);

impl Pending {
    fn add(&mut self, vector: u8) {
        self.0[usize::from(vector / 64)] |= 1 << (vector % 64);
    }

    fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }

    /// Takes the interrupt with the highest vector, which is the one of the highest priority.
    fn take_highest(&mut self) -> Option<u8> {
        let (word, bits) = self.0.iter_mut().enumerate().rfind(|(_, bits)| **bits != 0)?;
        let bit = bits.ilog2();
        *bits &= !(1 << bit);
        Some(word as u8 * 64 + bit as u8)
    }
}
