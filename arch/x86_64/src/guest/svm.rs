//! AMD SVM: entering a guest, and why it came back. AMD64 Architecture Programmer's Manual, volume 2.
//!
//! A backend has this file's functions and types; policy (what a guest may do) is `guest`'s. One for Intel VMX would be
//! chosen here.
#![expect(unsafe_code, reason = "VMRUN switches the whole world")]

use super::{Registers, Stop, VCPUS};
use crate::{
    cpu::{self, CORES, cpuid},
    machine::Error,
    paging,
};
use core::{
    arch::{asm, naked_asm},
    cell::UnsafeCell,
    mem::offset_of,
    sync::atomic::{AtomicBool, Ordering},
};
use iommu::{Gpa, Root};
use x86_64::registers::model_specific::{Efer, EferFlags, Msr};

/// `VM_CR`, and its bit `SVMDIS`.
const VM_CR: Msr = Msr::new(0xC001_0114);
const VM_CR_SVMDIS: u64 = 1 << 4;
/// `VM_HSAVE_PA`: where VMRUN keeps the host's state.
const VM_HSAVE_PA: u32 = 0xC001_0117;

/// Returns how many guests' address spaces (`ASID`) the processor tells apart; the host has one more.
pub(super) fn supported() -> Result<u32, Error> {
    let lacks = |feature| Err(Error::Unsupported { feature });
    if cpuid(0x8000_0000, 0).eax < 0x8000_000A || cpuid(0x8000_0001, 0).ecx & 1 << 2 == 0 {
        return lacks("SVM");
    }
    // SAFETY: a processor with SVM has this register.
    if unsafe { VM_CR.read() } & VM_CR_SVMDIS != 0 {
        return lacks("SVM (VM_CR.SVMDIS)");
    }
    let features = cpuid(0x8000_000A, 0);
    if features.edx & 1 << 0 == 0 {
        return lacks("nested paging (NP)");
    }
    Ok(features.ebx.saturating_sub(1))
}

#[repr(C, align(4096))]
struct Page(UnsafeCell<[u8; 4096]>);

// SAFETY: no reference to the bytes is ever made; only the processor uses them, on the core that owns the page.
unsafe impl Sync for Page {}

impl Page {
    const fn zero() -> Self {
        Self(UnsafeCell::new([0; 4096]))
    }

    /// The physical address; the image is mapped to itself.
    fn phys(&self) -> u64 {
        self.0.get().expose_provenance() as u64
    }
}

/// Where VMRUN keeps the host's state, by core.
static HOST_SAVE: [Page; CORES] = [const { Page::zero() }; CORES];
/// What VMRUN leaves out and VMSAVE keeps, by core: segment bases among it.
static HOST_REST: [Page; CORES] = [const { Page::zero() }; CORES];
static READY: [AtomicBool; CORES] = [const { AtomicBool::new(false) }; CORES];

/// Makes this core ready to enter guests.
pub(super) fn init_core() -> Result<(), Error> {
    supported()?;
    let core = cpu::core();
    // SAFETY: SVM is there; the bit only makes its instructions valid.
    unsafe { Efer::update(|efer| efer.insert(EferFlags::SECURE_VIRTUAL_MACHINE_ENABLE)) };
    let mut host_save = Msr::new(VM_HSAVE_PA);
    // SAFETY: the page is this core's, for ever, and used for nothing else.
    unsafe { host_save.write(HOST_SAVE[core].phys()) };
    // SAFETY: the page is this core's; what is saved (FS, GS, TR, LDTR, system call registers) does not change any more.
    unsafe { asm!("vmsave rax", in("rax") HOST_REST[core].phys(), options(nostack, preserves_flags)) };
    READY[core].store(true, Ordering::Relaxed);
    Ok(())
}

/// One bit for each I/O port and a few more: every access comes to us.
#[repr(C, align(4096))]
struct IoPermissions([u8; 3 * 4096]);
static IO_PERMISSIONS: IoPermissions = IoPermissions([0xFF; 3 * 4096]);

/// Two bits for each of the MSRs 0.., 0xC000_0000.. and 0xC001_0000..: reads and writes that come to us.
#[repr(C, align(4096))]
struct MsrPermissions([u8; 2 * 4096]);
static MSR_PERMISSIONS: MsrPermissions = {
    let mut bits = [0xFF; 2 * 4096];
    let mut at = 0;
    while at < OWN_MSRS.len() {
        let msr = OWN_MSRS[at];
        let index = (msr & 0x1FFF) as usize + if msr >= 0xC000_0000 { 0x2000 } else { 0 };
        bits[index / 4] &= !(0b11 << (index % 4 * 2));
        at += 1;
    }
    MsrPermissions(bits)
};

/// The MSRs that VMLOAD and VMSAVE switch, so that each guest has its own.
const OWN_MSRS: [u32; 10] = [
    0x174,       // SYSENTER_CS
    0x175,       // SYSENTER_ESP
    0x176,       // SYSENTER_EIP
    0xC000_0081, // STAR
    0xC000_0082, // LSTAR
    0xC000_0083, // CSTAR
    0xC000_0084, // SFMASK
    0xC000_0100, // FS.base
    0xC000_0101, // GS.base
    0xC000_0102, // KernelGSbase
];

/// A segment register as the VMCB has it.
#[repr(C)]
#[derive(Default)]
struct Segment {
    selector: u16,
    /// Bits 55:52 and 47:40 of a descriptor.
    attributes: u16,
    limit: u32,
    base: u64,
}

impl Segment {
    const fn flat(selector: u16, attributes: u16) -> Self {
        Self { selector, attributes, limit: u32::MAX, base: 0 }
    }
}

/// The virtual machine control block: what VMRUN reads and writes ("Layout of VMCB").
#[repr(C, align(4096))]
struct Vmcb {
    intercept_cr: u32,
    intercept_dr: u32,
    intercept_exceptions: u32,
    intercept_1: u32,
    intercept_2: u32,
    _reserved_014: [u8; 0x2C],
    iopm_base: u64,
    msrpm_base: u64,
    tsc_offset: u64,
    asid: u32,
    tlb_control: u32,
    /// `V_TPR`, `V_IRQ`, ... `V_INTR_VECTOR`.
    virtual_interrupt: u64,
    /// `INTERRUPT_SHADOW` in bit 0.
    interrupt_shadow: u64,
    exit_code: u64,
    exit_info_1: u64,
    exit_info_2: u64,
    exit_int_info: u64,
    /// `NP_ENABLE` in bit 0.
    nested_paging: u64,
    _reserved_098: [u8; 0x10],
    event_injection: u64,
    nested_cr3: u64,
    _lbr_virtualization: u64,
    /// 0 always: nothing of the block is taken from a cache.
    _clean: u64,
    next_rip: u64,
    _reserved_0d0: [u8; 0x330],

    es: Segment,
    cs: Segment,
    ss: Segment,
    ds: Segment,
    fs: Segment,
    gs: Segment,
    gdtr: Segment,
    ldtr: Segment,
    idtr: Segment,
    tr: Segment,
    _reserved_4a0: [u8; 0x2B],
    cpl: u8,
    _reserved_4cc: [u8; 4],
    efer: u64,
    _reserved_4d8: [u8; 0x70],
    cr4: u64,
    cr3: u64,
    cr0: u64,
    dr7: u64,
    dr6: u64,
    rflags: u64,
    rip: u64,
    _reserved_580: [u8; 0x58],
    rsp: u64,
    _reserved_5e0: [u8; 0x18],
    rax: u64,
    vmsave: [u8; 0x68],
    g_pat: u64,
    _reserved_670: [u8; 0x990],
}

const _: () = {
    assert!(size_of::<Vmcb>() == 4096);
    assert!(offset_of!(Vmcb, iopm_base) == 0x40);
    assert!(offset_of!(Vmcb, virtual_interrupt) == 0x60);
    assert!(offset_of!(Vmcb, nested_paging) == 0x90);
    assert!(offset_of!(Vmcb, event_injection) == 0xA8);
    assert!(offset_of!(Vmcb, next_rip) == 0xC8);
    assert!(offset_of!(Vmcb, es) == 0x400);
    assert!(offset_of!(Vmcb, tr) == 0x490);
    assert!(offset_of!(Vmcb, cpl) == 0x4CB);
    assert!(offset_of!(Vmcb, efer) == 0x4D0);
    assert!(offset_of!(Vmcb, cr4) == 0x548);
    assert!(offset_of!(Vmcb, rip) == 0x578);
    assert!(offset_of!(Vmcb, rsp) == 0x5D8);
    assert!(offset_of!(Vmcb, rax) == 0x5F8);
    assert!(offset_of!(Vmcb, g_pat) == 0x668);
};

/// Reads and writes of all debug registers.
const INTERCEPT_ALL_DR: u32 = u32::MAX;
/// #DB and #AC, since a guest can make their delivery go round for ever, and #MC, which is the host's.
const INTERCEPT_EXCEPTIONS: u32 = 1 << 1 | 1 << 17 | 1 << 18;
/// INTR, NMI, RDPMC, CPUID, INVD, HLT, INVLPGA, ports, MSRs, shutdown.
const INTERCEPT_1: u32 =
    1 << 0 | 1 << 1 | 1 << 15 | 1 << 18 | 1 << 22 | 1 << 24 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 31;
/// VINTR: the guest could take an interrupt.
const INTERCEPT_1_WINDOW: u32 = 1 << 4;
/// VMRUN, VMMCALL, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, RDTSCP, WBINVD, MONITOR, MWAIT (two), XSETBV, RDPRU.
const INTERCEPT_2: u32 = 0x7EFF;

/// `V_IRQ`, of the highest priority (`V_INTR_PRIO`), whatever the guest's task priority (`V_IGN_TPR`).
const WINDOW: u64 = 1 << 8 | 0xF << 16 | 1 << 20;
/// `V_INTR_MASKING`: the guest's interrupt flag does not hold back the host's interrupts.
const V_INTR_MASKING: u64 = 1 << 24;

/// `TLB_CONTROL`: flush every translation, or (`FlushByAsid`) those of this guest.
const TLB_FLUSH_ALL: u32 = 1;
const TLB_FLUSH_GUEST: u32 = 3;

/// The format of `EVENTINJ` and `EXITINTINFO`.
const EVENT_VALID: u64 = 1 << 31;
const EVENT_HAS_CODE: u64 = 1 << 11;
const EVENT_TYPE: u64 = 0b111 << 8;
const EVENT_INTERRUPT: u64 = 0 << 8;
const EVENT_EXCEPTION: u64 = 3 << 8;

const RFLAGS_IF: u64 = 1 << 9;
const CR0_PG: u64 = 1 << 31;
/// `PE` and `ET`: protected mode without paging.
const CR0_AT_START: u64 = 0x11;
const CS_LONG: u16 = 1 << 9;

const EFER_SVME: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const EFER_LME: u64 = 1 << 8;
/// `SCE`, `LME` and `NXE`: what a guest may set.
const EFER_GUEST: u64 = 1 << 0 | EFER_LME | 1 << 11;

/// x87 and SSE registers in the layout of FXSAVE.
#[repr(C, align(16))]
struct FxState([u32; 128]);

impl FxState {
    /// As FNINIT leaves it, and `MXCSR` as reset does: all exceptions masked.
    const AT_START: Self = {
        let mut words = [0; 128];
        words[0] = 0x037F;
        words[6] = 0x1F80;
        Self(words)
    };
}

/// The state of a guest's processor while it does not run.
///
/// It stays where it is, in the image: VMRUN needs the block at a physical address, and a page is too much to move.
pub(super) struct Machine {
    vmcb: Vmcb,
    state: SavedState,
    /// What the next entry says to `TLB_CONTROL`.
    flush: bool,
}

/// What the VMCB does not hold.
#[repr(C)]
struct SavedState {
    fx: FxState,
    registers: Registers,
}

/// A place for the state of one guest's processor.
struct Place {
    taken: AtomicBool,
    machine: UnsafeCell<Machine>,
}

// SAFETY: whoever set `taken` is the only one to reach the state, until `release`.
unsafe impl Sync for Place {}

static PLACES: [Place; VCPUS] =
    [const { Place { taken: AtomicBool::new(false), machine: UnsafeCell::new(Machine::BLANK) } }; VCPUS];

impl Machine {
    const BLANK: Self = Self {
        // SAFETY: the block is integers alone, for which zeros are values.
        vmcb: unsafe { core::mem::zeroed() },
        state: SavedState { fx: FxState([0; 128]), registers: Registers::ZERO },
        flush: false,
    };

    /// Takes place `id` for a processor whose address space goes through `nested_root`; `None` if it is taken.
    pub(super) fn take(id: u16, nested_root: Root) -> Option<&'static mut Self> {
        let place = PLACES.get(usize::from(id))?;
        if place.taken.swap(true, Ordering::Acquire) {
            return None;
        }
        // SAFETY: the place was free, so no other reference to its state lives.
        let machine = unsafe { &mut *place.machine.get() };
        let vmcb = &mut machine.vmcb;
        vmcb.intercept_dr = INTERCEPT_ALL_DR;
        vmcb.intercept_exceptions = INTERCEPT_EXCEPTIONS;
        vmcb.intercept_2 = INTERCEPT_2;
        vmcb.iopm_base = (&raw const IO_PERMISSIONS).addr() as u64;
        vmcb.msrpm_base = (&raw const MSR_PERMISSIONS).addr() as u64;
        // Number 0 is the host's.
        vmcb.asid = u32::from(id) + 1;
        vmcb.nested_paging = 1;
        vmcb.nested_cr3 = nested_root.phys().0;
        machine.start_at(Gpa(0), 0);
        Some(machine)
    }

    /// Gives the place back.
    ///
    /// # Safety
    ///
    /// The reference that [`take`](Self::take) gave is not used any more.
    pub(super) unsafe fn release(&self) {
        let place = PLACES.iter().find(|place| core::ptr::eq(place.machine.get(), self));
        if let Some(place) = place {
            place.taken.store(false, Ordering::Release);
        }
    }

    /// Puts the processor at `entry`, as a PVH boot loader does: 32-bit protected mode, flat segments, no paging.
    pub(super) fn start_at(&mut self, entry: Gpa, argument: u32) {
        let vmcb = &mut self.vmcb;
        vmcb.virtual_interrupt = V_INTR_MASKING;
        vmcb.intercept_1 = INTERCEPT_1;
        vmcb.interrupt_shadow = 0;
        vmcb.event_injection = 0;
        vmcb.cs = Segment::flat(0x08, 0xC9B);
        vmcb.ss = Segment::flat(0x10, 0xC93);
        vmcb.ds = Segment::flat(0x10, 0xC93);
        vmcb.es = Segment::flat(0x10, 0xC93);
        vmcb.fs = Segment::flat(0x10, 0xC93);
        vmcb.gs = Segment::flat(0x10, 0xC93);
        vmcb.gdtr = Segment::default();
        vmcb.idtr = Segment::default();
        vmcb.ldtr = Segment { attributes: 0x82, ..Segment::default() };
        vmcb.tr = Segment { attributes: 0x8B, limit: 0x67, ..Segment::default() };
        vmcb.cpl = 0;
        vmcb.efer = EFER_SVME;
        vmcb.cr0 = CR0_AT_START;
        vmcb.cr3 = 0;
        vmcb.cr4 = 0;
        vmcb.dr6 = 0xFFFF_0FF0;
        vmcb.dr7 = 0x400;
        vmcb.rflags = 0b10;
        vmcb.rip = entry.0 & 0xFFFF_FFFF;
        vmcb.rsp = 0;
        vmcb.vmsave = [0; 0x68];
        vmcb.g_pat = paging::PAT_AT_RESET;
        self.flush = true;
        self.state.fx = FxState::AT_START;
        self.state.registers = Registers { rbx: argument.into(), ..Registers::ZERO };
    }

    /// Lets the guest run until something stops it. Called with interrupts masked; returns with them masked.
    ///
    /// PANICS: on a core without [`init_core`].
    pub(super) fn enter(&mut self) -> Stop {
        let core = cpu::core();
        assert!(READY[core].load(Ordering::Relaxed), "guest::init_core has not run on this core");
        self.vmcb.tlb_control = match core::mem::take(&mut self.flush) {
            false => 0,
            true if cpuid(0x8000_000A, 0).edx & 1 << 6 != 0 => TLB_FLUSH_GUEST,
            true => TLB_FLUSH_ALL,
        };
        self.vmcb.rax = self.state.registers.rax;
        // SAFETY: the block says what `take` and this type's functions put there: nested paging on, everything that
        // reaches beyond the guest intercepted. It is in the image, which is mapped to itself.
        unsafe { vmrun(&raw mut self.vmcb, &raw mut self.state, HOST_REST[core].phys()) };
        self.state.registers.rax = self.vmcb.rax;
        self.keep_undelivered_event();
        self.stop()
    }

    /// Queues again what the guest was about to be told when it stopped.
    ///
    /// INT and its kin are not queued: the guest is still in front of the instruction, and executes it again.
    fn keep_undelivered_event(&mut self) {
        let event = self.vmcb.exit_int_info;
        let software = matches!((event & EVENT_TYPE, event & 0xFF), (0x400, _) | (EVENT_EXCEPTION, 3 | 4));
        self.vmcb.event_injection = match event & EVENT_VALID != 0 && !software {
            false => 0,
            true if event & EVENT_HAS_CODE != 0 => event,
            // The upper half is stale where there is no error code.
            true => event & 0xFFFF_FFFF,
        };
    }

    fn stop(&self) -> Stop {
        let info = self.vmcb.exit_info_1;
        match self.vmcb.exit_code {
            0x52 => Stop::MachineCheck,
            0x60 => Stop::HostInterrupt,
            0x61 => Stop::HostNmi,
            0x64 => Stop::InterruptWindow,
            0x72 => Stop::Cpuid,
            0x78 => Stop::Halt,
            0x7B => Stop::Port { port: (info >> 16) as u16, write: info & 1 == 0 },
            0x7C if info & 1 == 0 => Stop::ReadMsr,
            0x7C => Stop::WriteMsr,
            0x7F => Stop::TripleFault,
            0x81 => Stop::Hypercall,
            // RDPMC.
            0x6F => Stop::Refused,
            // INVLPGA, VMRUN, VMLOAD, VMSAVE, STGI, CLGI, SKINIT, RDTSCP, MONITOR, MWAIT, XSETBV, RDPRU: CPUID hides them all.
            0x7A | 0x80 | 0x82..=0x87 | 0x8A..=0x8E => Stop::Undefined,
            0x400 => Stop::Memory {
                address: Gpa(self.vmcb.exit_info_2),
                write: info & 1 << 1 != 0,
                execute: info & 1 << 4 != 0,
            },
            u64::MAX => Stop::InvalidState,
            _ => Stop::Unexpected,
        }
    }

    pub(super) fn registers(&mut self) -> &mut Registers {
        &mut self.state.registers
    }

    pub(super) fn rip(&self) -> u64 {
        self.vmcb.rip
    }

    /// The exit code and its two words, as the manual lists them.
    pub(super) fn raw_stop(&self) -> [u64; 3] {
        [self.vmcb.exit_code, self.vmcb.exit_info_1, self.vmcb.exit_info_2]
    }

    pub(super) fn is_64_bit(&self) -> bool {
        self.vmcb.efer & EFER_LMA != 0 && self.vmcb.cs.attributes & CS_LONG != 0
    }

    pub(super) fn privilege(&self) -> u8 {
        self.vmcb.cpl
    }

    /// Goes past the instruction that stopped the guest. It is `bytes` long, unless the processor says otherwise.
    pub(super) fn skip(&mut self, bytes: u64) {
        // Processors without `NRIPS` leave 0. There, redundant prefixes put a guest into the middle of its own instruction.
        let next = match self.vmcb.next_rip {
            0 => self.vmcb.rip.wrapping_add(bytes),
            next => next,
        };
        self.vmcb.rip = if self.is_64_bit() { next } else { next & 0xFFFF_FFFF };
        self.vmcb.interrupt_shadow = 0;
    }

    pub(super) fn can_take_interrupt(&self) -> bool {
        self.vmcb.rflags & RFLAGS_IF != 0 && self.vmcb.interrupt_shadow & 1 == 0 && !self.has_event()
    }

    /// Whether something is queued to be delivered at the next entry.
    pub(super) fn has_event(&self) -> bool {
        self.vmcb.event_injection & EVENT_VALID != 0
    }

    /// Whether what is queued is an interrupt.
    pub(super) fn has_interrupt(&self) -> bool {
        self.has_event() && self.vmcb.event_injection & EVENT_TYPE == EVENT_INTERRUPT
    }

    pub(super) fn inject_interrupt(&mut self, vector: u8) {
        self.vmcb.event_injection = EVENT_VALID | EVENT_INTERRUPT | u64::from(vector);
    }

    /// Gives the guest exception `vector` at the instruction where it is, with this error code if the exception has one.
    pub(super) fn inject_exception(&mut self, vector: u8, error_code: Option<u32>) {
        let code = error_code.map_or(0, |code| EVENT_HAS_CODE | u64::from(code) << 32);
        self.vmcb.event_injection = EVENT_VALID | EVENT_EXCEPTION | u64::from(vector) | code;
    }

    /// Asks for [`Stop::InterruptWindow`] as soon as the guest could take an interrupt, or no longer asks.
    pub(super) fn ask_for_window(&mut self, wanted: bool) {
        if wanted {
            self.vmcb.intercept_1 |= INTERCEPT_1_WINDOW;
            self.vmcb.virtual_interrupt |= WINDOW;
        } else {
            self.vmcb.intercept_1 &= !INTERCEPT_1_WINDOW;
            self.vmcb.virtual_interrupt &= !WINDOW;
        }
    }

    pub(super) fn flush(&mut self) {
        self.flush = true;
    }

    /// Returns `EFER` as the guest sees it: SVM is off.
    pub(super) fn efer(&self) -> u64 {
        self.vmcb.efer & !EFER_SVME
    }

    /// Sets `EFER`; false if the guest may not, as the manual says or because it has no such feature.
    pub(super) fn set_efer(&mut self, value: u64) -> bool {
        let old = self.vmcb.efer;
        let mode_changes = (old ^ value) & EFER_LME != 0;
        if value & !(EFER_GUEST | EFER_LMA) != 0 || (mode_changes && self.vmcb.cr0 & CR0_PG != 0) {
            return false;
        }
        self.vmcb.efer = value & EFER_GUEST | old & EFER_LMA | EFER_SVME;
        true
    }
}

/// Enters the guest of `vmcb`, with the rest of its registers in `state`, and returns when it stops.
///
/// # Safety
///
/// Interrupts are masked, `init_core` has run on this core, and `host_rest` is this core's. `vmcb` is at its physical
/// address, and lets the guest reach nothing that the hypervisor's safety rests on.
#[unsafe(naked)]
unsafe extern "sysv64" fn vmrun(vmcb: *mut Vmcb, state: *mut SavedState, host_rest: u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "push rdx",
        "push rsi",
        // From here to STGI no interrupt is taken, nor an NMI: they stay pending.
        "clgi",
        "fxrstor64 [rsi]",
        "mov rax, rdi",
        "mov rbx, [rsi + {rbx}]",
        "mov rcx, [rsi + {rcx}]",
        "mov rdx, [rsi + {rdx}]",
        "mov rdi, [rsi + {rdi}]",
        "mov rbp, [rsi + {rbp}]",
        "mov r8,  [rsi + {r8}]",
        "mov r9,  [rsi + {r8} + 8]",
        "mov r10, [rsi + {r8} + 16]",
        "mov r11, [rsi + {r8} + 24]",
        "mov r12, [rsi + {r8} + 32]",
        "mov r13, [rsi + {r8} + 40]",
        "mov r14, [rsi + {r8} + 48]",
        "mov r15, [rsi + {r8} + 56]",
        "mov rsi, [rsi + {rsi}]",
        // While the guest runs, the flag that counts for the host's interrupts is the one at VMRUN (`V_INTR_MASKING`).
        "sti",
        "vmload rax",
        "vmrun rax",
        "vmsave rax",
        "cli",
        // VMRUN restored rax and rsp; everything else is the guest's.
        "xchg rsi, [rsp]",
        "mov [rsi + {rbx}], rbx",
        "mov [rsi + {rcx}], rcx",
        "mov [rsi + {rdx}], rdx",
        "mov [rsi + {rdi}], rdi",
        "mov [rsi + {rbp}], rbp",
        "mov [rsi + {r8}], r8",
        "mov [rsi + {r8} + 8], r9",
        "mov [rsi + {r8} + 16], r10",
        "mov [rsi + {r8} + 24], r11",
        "mov [rsi + {r8} + 32], r12",
        "mov [rsi + {r8} + 40], r13",
        "mov [rsi + {r8} + 48], r14",
        "mov [rsi + {r8} + 56], r15",
        "pop qword ptr [rsi + {rsi}]",
        "fxsave64 [rsi]",
        "pop rax",
        "vmload rax",
        "stgi",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        rbx = const REGISTERS + offset_of!(Registers, rbx),
        rcx = const REGISTERS + offset_of!(Registers, rcx),
        rdx = const REGISTERS + offset_of!(Registers, rdx),
        rsi = const REGISTERS + offset_of!(Registers, rsi),
        rdi = const REGISTERS + offset_of!(Registers, rdi),
        rbp = const REGISTERS + offset_of!(Registers, rbp),
        r8 = const REGISTERS + offset_of!(Registers, r8_to_r15),
    )
}

const REGISTERS: usize = offset_of!(SavedState, registers);
