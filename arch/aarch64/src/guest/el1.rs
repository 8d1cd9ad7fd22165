//! Guests at EL1: the registers that are switched, what is trapped, and the way in and out. Arm ARM, DDI 0487.
#![expect(unsafe_code, reason = "a guest is entered by an instruction, with registers that only it has")]

use super::{Pending, Stop, VCPUS};
use crate::{
    cpu::{self, CORES},
    entry::{HCR_HOST, NO_VECTORS},
    machine::Error,
    paging::NOTHING,
    registers::{HCRX_EL2, HSTR_EL2, VPIDR_EL2},
};
use aarch64_cpu::{asm::barrier, registers::*};
use core::{
    arch::{asm, global_asm},
    mem::offset_of,
    sync::atomic::{AtomicBool, Ordering},
};
use iommu::{Gpa, PAGE_SIZE, Root};

/// Bits of a guest's physical addresses.
const GUEST_ADDRESS_BITS: u64 = 44;
/// `PARange` of 44 bits.
const PA_RANGE_44: u64 = 4;

/// `HCR_EL2` of a core that runs guests: stage 2 on (`VM`), what a guest does to caches and TLBs reaches all cores (`FB`,
/// `BSU`); traps: WFI (`TWI`), identification (`TID1`, `TID3`, `TID5`), SMC (`TSC`), implementation-defined registers
/// (`TIDCP`, `TACR`), caches by set and way (`TSW`), LORegions (`TLOR`), error records (`TERR`), and, by zeros, pointer
/// authentication (`API`, `APK`) and tags (`ATA`).
const HCR_GUEST: u64 = HCR_HOST
    | 1 << 0
    | 1 << 9
    | 1 << 10
    | 1 << 13
    | 1 << 16
    | 1 << 18
    | 1 << 19
    | 1 << 20
    | 1 << 21
    | 1 << 22
    | 1 << 35
    | 1 << 36
    | 1 << 58;
/// `VTCR_EL2` but for `PS`: 44 bits from level 0 (`SL0` = 2), tables of 4 KiB that are write-back and inner shareable.
const STAGE_2_CONTROL: u64 = 1 << 31 | 0b11 << 12 | 1 << 10 | 1 << 8 | 0b10 << 6 | (64 - GUEST_ADDRESS_BITS);
/// Traps of `MDCR_EL2`: performance counters (`TPM`, `TPMCR`), debug (`TDA`, `TDOSA`, `TDRA`), profiling (`TPMS`), trace
/// (`TTRF`).
const DEBUG_TRAPS: u64 = 1 << 5 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 14 | 1 << 19;
/// `HPMN` of `MDCR_EL2`, which must keep a valid number.
const HPMN: u64 = 0x1F;

/// `SCTLR_EL1` with the bits that are one, and nothing on.
const SYSTEM_CONTROL_AT_START: u64 = 0x30D0_0980;
const SPAN: u64 = 1 << 23;
const DSSBS: u64 = 1 << 44;

/// The processor state: all masked, EL1 with its own stack.
const STATE_AT_START: u64 = 0x3C5;
const STATE_MODE: u64 = 0x1F;
const STATE_IS_32_BIT: u64 = 1 << 4;
const STATE_PAN: u64 = 1 << 22;
const STATE_SSBS: u64 = 1 << 12;
/// What an exception leaves of the processor state: the condition flags, `DIT`, `PAN`.
const STATE_KEPT: u64 = 0xF << 28 | 1 << 24 | STATE_PAN;

/// `En` and `TALL0` of `ICH_HCR_EL2`: the virtual interface is on, its group 0 is trapped.
const INTERFACE: u64 = 1 << 0 | 1 << 11;
/// List registers that are used, at most: interrupts that a guest can be offered at a time.
const LIST_REGISTERS: usize = 4;
/// A list register: pending, active, group 1, a maintenance interrupt when it ends.
const LIST_PENDING: u64 = 1 << 62;
const LIST_ACTIVE: u64 = 1 << 63;
const LIST_GROUP_1: u64 = 1 << 60;
const LIST_TELL_END: u64 = 1 << 41;
const LIST_PRIORITY: u64 = 0xA0 << 48;
const LIST_NUMBER: u64 = 0xFFFF_FFFF;

/// Whether a core is ready to run guests.
static READY: [AtomicBool; CORES] = [const { AtomicBool::new(false) }; CORES];

fn physical_address_range() -> u64 {
    ID_AA64MMFR0_EL1.get() & 0xF
}

pub(super) fn supported() -> Result<(), Error> {
    let memory = ID_AA64MMFR0_EL1.get();
    // `TGran4` and `TGran4_2`: the second says 0 where it is as the first.
    let granule = matches!((memory >> 28 & 0xF, memory >> 40 & 0xF), (0 | 1, 0) | (_, 2 | 3));
    for (there, feature) in [
        (HCR_EL2.get() & 1 << 34 == 0, "EL2 without host extensions (HCR_EL2.E2H = 0)"),
        (ID_AA64PFR0_EL1.get() >> 4 & 0xF != 0, "AArch64 at EL1 (ID_AA64PFR0_EL1.EL1)"),
        (granule, "stage 2 tables of 4 KiB (ID_AA64MMFR0_EL1.TGran4_2)"),
        (physical_address_range() >= PA_RANGE_44, "44 bits of physical address (ID_AA64MMFR0_EL1.PARange)"),
    ] {
        if !there {
            return Err(Error::Unsupported { feature });
        }
    }
    Ok(())
}

/// Sets up what is the same for all guests on this core, and stays while none runs.
pub(super) fn init_core() {
    // Until a guest is entered, and after it has stopped, stage 2 maps nothing: what EL1 left cannot be walked.
    leave();
    VTCR_EL2.set(STAGE_2_CONTROL | physical_address_range().min(5) << 16);
    HCR_EL2.set(HCR_GUEST);
    CPTR_EL2.set(NO_VECTORS);
    MDCR_EL2.set(MDCR_EL2.get() & HPMN | DEBUG_TRAPS);
    HSTR_EL2.set(0);
    // `EL1PCTEN`: the counter may be read, the physical timer may not be used.
    CNTHCTL_EL2.set(1);
    CNTVOFF_EL2.set(0);
    // A processor of the host's kind, alone in its system.
    VPIDR_EL2.set(MIDR_EL1.get());
    VMPIDR_EL2.set(1 << 31 | 1 << 30);
    // Newer features: zeros trap what a guest could not use without the hypervisor switching more state.
    if ID_AA64MMFR1_EL1.get() >> 40 & 0xF != 0 {
        HCRX_EL2.set(0);
    }
    if ID_AA64MMFR0_EL1.get() >> 56 & 0xF != 0 {
        HFGRTR_EL2.set(0);
        HFGWTR_EL2.set(0);
        HFGITR_EL2.set(0);
        HDFGRTR_EL2.set(0);
        HDFGWTR_EL2.set(0);
    }
    barrier::isb(barrier::SY);
    READY[cpu::core()].store(true, Ordering::Relaxed);
}

fn leave() {
    VTTBR_EL2.set(NOTHING.address());
    barrier::isb(barrier::SY);
}

macro_rules! switched {
    ($($name:ident)*) => {
        /// The registers of EL1 and EL0 that a guest finds as it left them.
        #[derive(Clone, Copy)]
        struct Switched {
            $($name: u64,)*
        }

        impl Switched {
            const ZERO: Self = Self { $($name: 0,)* };

            /// Takes the registers of the guest that ran on this core.
            fn save(&mut self) {
                $({
                    let value;
                    // SAFETY: reading a register of EL1 touches no memory.
                    unsafe { asm!(concat!("mrs {}, ", stringify!($name)), out(reg) value, options(nostack)) };
                    self.$name = value;
                })*
            }

            /// Gives this core's EL1 and EL0 the registers of a guest.
            fn load(&self) {
                $({
                    let value = self.$name;
                    // SAFETY: registers of EL1 and EL0 mean nothing at EL2.
                    unsafe { asm!(concat!("msr ", stringify!($name), ", {}"), in(reg) value, options(nostack)) };
                })*
            }
        }
    };
}

switched! {
    sctlr_el1 cpacr_el1 ttbr0_el1 ttbr1_el1 tcr_el1 mair_el1 amair_el1 contextidr_el1 vbar_el1
    esr_el1 far_el1 afsr0_el1 afsr1_el1 par_el1 elr_el1 spsr_el1
    sp_el0 sp_el1 tpidr_el0 tpidrro_el0 tpidr_el1 csselr_el1 cntkctl_el1 cntv_cval_el0 cntv_ctl_el0
}

/// A guest's side of the interrupt controller.
struct Interface {
    list: [u64; LIST_REGISTERS],
    /// What the guest set: priority mask, group enable and so on.
    control: u64,
    /// The priorities of interrupts that the guest handles (`ICH_AP1R<n>_EL2`).
    active: [u64; 4],
}

/// List registers that there are, as far as they are used.
fn list_registers() -> usize {
    LIST_REGISTERS.min((ICH_VTR_EL2.get() & 0x1F) as usize + 1)
}

/// Words of active priorities that there are: one for 32 levels of preemption.
fn active_words() -> usize {
    1 << ((ICH_VTR_EL2.get() >> 26 & 0b111) as usize + 1).saturating_sub(5).min(2)
}

impl Interface {
    const RESET: Self = Self { list: [0; LIST_REGISTERS], control: 0, active: [0; 4] };

    fn save(&mut self) {
        for (at, place) in self.list.iter_mut().enumerate().take(list_registers()) {
            *place = match at {
                0 => ICH_LR0_EL2.get(),
                1 => ICH_LR1_EL2.get(),
                2 => ICH_LR2_EL2.get(),
                _ => ICH_LR3_EL2.get(),
            };
        }
        for (at, place) in self.active.iter_mut().enumerate().take(active_words()) {
            *place = match at {
                0 => ICH_AP1R0_EL2.get(),
                1 => ICH_AP1R1_EL2.get(),
                2 => ICH_AP1R2_EL2.get(),
                _ => ICH_AP1R3_EL2.get(),
            };
        }
        self.control = ICH_VMCR_EL2.get();
        // Its maintenance interrupt goes with it.
        ICH_HCR_EL2.set(0);
        barrier::isb(barrier::SY);
    }

    fn load(&self) {
        ICH_HCR_EL2.set(INTERFACE);
        ICH_VMCR_EL2.set(self.control);
        for (at, &value) in self.active.iter().enumerate().take(active_words()) {
            match at {
                0 => ICH_AP1R0_EL2.set(value),
                1 => ICH_AP1R1_EL2.set(value),
                2 => ICH_AP1R2_EL2.set(value),
                _ => ICH_AP1R3_EL2.set(value),
            }
        }
        for (at, &value) in self.list.iter().enumerate().take(list_registers()) {
            match at {
                0 => ICH_LR0_EL2.set(value),
                1 => ICH_LR1_EL2.set(value),
                2 => ICH_LR2_EL2.set(value),
                _ => ICH_LR3_EL2.set(value),
            }
        }
    }

    /// Moves interrupts into list registers: where one is listed, it is pending there; else the first free place is its.
    fn offer(&mut self, pending: &mut Pending) {
        let list = &mut self.list[..list_registers()];
        let is_used = |entry: u64| entry & (LIST_PENDING | LIST_ACTIVE) != 0;
        while let Some(number) = pending.first() {
            let number_of = |entry: u64| entry & LIST_NUMBER;
            let listed = list.iter().position(|&entry| is_used(entry) && number_of(entry) == number.into());
            let Some(at) = listed.or_else(|| list.iter().position(|&entry| !is_used(entry))) else { break };
            if listed.is_none() {
                list[at] = LIST_GROUP_1 | LIST_PRIORITY | u64::from(number);
            }
            list[at] |= LIST_PENDING;
            pending.remove(number);
        }
        // Some are left only if all places are used: then the end of any one stops the guest.
        for entry in list.iter_mut().filter(|entry| is_used(**entry)) {
            *entry = *entry & !LIST_TELL_END | if pending.is_empty() { 0 } else { LIST_TELL_END };
        }
    }
}

/// What the way in and out saves: the general registers, and where the guest is.
#[repr(C)]
struct Context {
    x: [u64; 31],
    pc: u64,
    state: u64,
}

/// An access to a system register, as `ESR_EL2.ISS` tells it.
#[derive(Clone, Copy)]
pub(super) struct RegisterAccess(u64);

impl RegisterAccess {
    /// `Op0`, `Op1`, `CRn`, `CRm`, `Op2`.
    fn register(self) -> [u64; 5] {
        let Self(syndrome) = self;
        [
            syndrome >> 20 & 0b11,
            syndrome >> 14 & 0b111,
            syndrome >> 10 & 0xF,
            syndrome >> 1 & 0xF,
            syndrome >> 17 & 0b111,
        ]
    }

    fn is_read(self) -> bool {
        self.0 & 1 != 0
    }

    /// The general register; `None` for the one that is always zero.
    fn general(self) -> Option<usize> {
        Some((self.0 >> 5 & 0x1F) as usize).filter(|&at| at < 31)
    }
}

/// The state of a guest's processor while it does not run.
pub(super) struct Machine {
    context: Context,
    switched: Switched,
    interface: Interface,
    /// `VTTBR_EL2`.
    translation: u64,
    /// What the next entry forgets.
    flush: bool,
    /// `ESR_EL2`, `FAR_EL2`, `HPFAR_EL2` of the last stop.
    syndrome: u64,
    address: u64,
    page: u64,
}

impl Machine {
    /// Makes a processor whose address space goes through `root`, under number `id`, which is below [`VCPUS`].
    pub(super) fn new(root: Root, id: u16) -> Self {
        const { assert!(VCPUS < 255, "the numbers fit 8 bits, and number 0 is nobody's") };
        let mut machine = Self {
            context: Context { x: [0; 31], pc: 0, state: STATE_AT_START },
            switched: Switched::ZERO,
            interface: Interface::RESET,
            translation: u64::from(id + 1) << 48 | root.phys().0,
            flush: true,
            syndrome: 0,
            address: 0,
            page: 0,
        };
        machine.start_at(Gpa(0), 0);
        machine
    }

    pub(super) fn start_at(&mut self, entry: Gpa, argument: u32) {
        self.context = Context { x: [0; 31], pc: entry.0, state: STATE_AT_START };
        self.context.x[0] = argument.into();
        self.switched = Switched { sctlr_el1: SYSTEM_CONTROL_AT_START, ..Switched::ZERO };
        self.interface = Interface::RESET;
        self.flush = true;
        // SAFETY: forgets instructions that were fetched before their memory was written.
        unsafe { asm!("ic ialluis", "dsb ish", "isb", options(nostack)) };
    }

    pub(super) fn offer(&mut self, pending: &mut Pending) {
        self.interface.offer(pending);
    }

    /// Lets the guest run until something stops it. Called with interrupts masked; returns with them masked.
    ///
    /// PANICS: on a core without [`init_core`].
    pub(super) fn enter(&mut self) -> Stop {
        assert!(READY[cpu::core()].load(Ordering::Relaxed), "guest::init_core has not run on this core");
        VTTBR_EL2.set(self.translation);
        self.switched.load();
        self.interface.load();
        barrier::isb(barrier::SY);
        if core::mem::take(&mut self.flush) {
            // SAFETY: forgetting is always sound.
            unsafe { asm!("tlbi vmalls12e1", "dsb nsh", "isb", options(nostack)) };
        }
        // SAFETY: stage 2 maps what the maker of the root vouched for, and everything that reaches beyond the guest is
        // trapped since `init_core`.
        let kind = unsafe { enter_guest(&raw mut self.context) };
        self.syndrome = ESR_EL2.get();
        self.address = FAR_EL2.get();
        self.page = HPFAR_EL2.get();
        self.switched.save();
        self.interface.save();
        let stop = self.stop(kind);
        leave();
        cpu::unmask_errors();
        stop
    }

    /// Translates the codes of the processor. The guest's translation is still in force.
    fn stop(&mut self, kind: u64) -> Stop {
        match kind {
            0 => {}
            1 => return Stop::HostInterrupt,
            // A fast interrupt is taken, and reported, as soon as it is unmasked.
            2 => return Stop::HostInterrupt,
            _ => return Stop::SystemError,
        }
        let class = self.syndrome >> 26 & 0x3F;
        match class {
            // WFI; WFE is not trapped.
            0x01 => Stop::Halt,
            // The address is that behind HVC; the number in it means nothing yet.
            0x16 => {
                self.context.pc = self.context.pc.wrapping_sub(4);
                if self.syndrome & 0xFFFF == 0 { Stop::Hypercall } else { Stop::Undefined }
            }
            0x18 => Stop::Register(RegisterAccess(self.syndrome & 0x1FF_FFFF)),
            0x20 | 0x24 => self.memory_stop(class == 0x20),
            // Coprocessors of 32-bit code, floating point and vectors, pointer authentication, 64-byte loads, SVC and HVC
            // and SMC of 32-bit code, registers of 128 bits, SMC, SVE, SME.
            0x03..=0x0C | 0x11..=0x14 | 0x17 | 0x19 | 0x1D => Stop::Undefined,
            _ => Stop::Unexpected,
        }
    }

    /// An access that stage 2 stopped.
    fn memory_stop(&self, execute: bool) -> Stop {
        const WRITE: u64 = 1 << 6;
        const WALK: u64 = 1 << 7;
        let is_walk = self.syndrome & WALK != 0;
        let is_permission = match self.syndrome & 0x3C {
            // Address size, translation, access flag.
            0x00 | 0x04 | 0x08 => false,
            0x0C => true,
            _ => return Stop::Unexpected,
        };
        let offset = self.address & (PAGE_SIZE - 1);
        let address = if is_walk {
            self.faulting_page()
        } else if is_permission {
            // The processor need not say which page it was.
            match self.translate() {
                Some(page) => page | offset,
                // The guest has changed its own tables meanwhile: it tries again.
                None => return Stop::Nothing,
            }
        } else {
            self.faulting_page() | offset
        };
        let write = !execute && !is_walk && self.syndrome & WRITE != 0;
        Stop::Memory { address: Gpa(address), write, execute: execute && !is_walk }
    }

    fn faulting_page(&self) -> u64 {
        (self.page & 0xFFF_FFFF_FFF0) << 8
    }

    /// Returns the guest-physical page of the address that the guest used.
    fn translate(&self) -> Option<u64> {
        // SAFETY: walks the guest's tables through its stage 2, and stores nothing.
        unsafe { asm!("at s1e1r, {}", "isb", in(reg) self.address, options(nostack)) };
        let result = PAR_EL1.get();
        (result & 1 == 0).then_some(result & 0x000F_FFFF_FFFF_F000)
    }

    pub(super) fn registers(&mut self) -> &mut [u64; 31] {
        &mut self.context.x
    }

    pub(super) fn pc(&self) -> u64 {
        self.context.pc
    }

    /// The syndrome and the two addresses of the last stop, as the manual lays them out.
    pub(super) fn raw_stop(&self) -> [u64; 3] {
        [self.syndrome, self.address, self.page]
    }

    /// Goes past the instruction that stopped the guest.
    pub(super) fn skip(&mut self) {
        // 32-bit code has instructions of two bytes (`IL` = 0).
        let bytes = if self.syndrome & 1 << 25 != 0 { 4 } else { 2 };
        self.context.pc = self.context.pc.wrapping_add(bytes);
    }

    /// Whether the guest has an interrupt that it has not taken.
    pub(super) fn has_interrupt(&self) -> bool {
        self.interface.list.iter().any(|entry| entry & LIST_PENDING != 0)
    }

    pub(super) fn flush(&mut self) {
        self.flush = true;
    }

    /// Answers an access to a system register; false if the guest's processor has no such register.
    pub(super) fn access(&mut self, access: RegisterAccess) -> bool {
        let value = match (access.register(), access.is_read()) {
            ([3, 0, 0, group @ 1..=7, number], true) => identification(group, number),
            // REVIDR_EL1 and AIDR_EL1.
            ([3, 0, 0, 0, 6] | [3, 1, 0, 0, 7], true) => 0,
            // ICC_SRE_EL1: `SRE`, `DFB`, `DIB`, always.
            ([3, 0, 12, 12, 5], true) => 0b111,
            ([3, 0, 12, 12, 5], false) => {
                self.skip();
                return true;
            }
            _ => return false,
        };
        if let Some(general) = access.general() {
            self.context.x[general] = value;
        }
        self.skip();
        true
    }

    /// Whether the guest stopped at the code by which exceptions are told to it.
    pub(super) fn is_being_told(&self) -> bool {
        let class = self.syndrome >> 26 & 0x3F;
        let vectors = self.switched.vbar_el1;
        class == 0x20
            && self.mode() != 0
            && (vectors..vectors.saturating_add(0x800)).contains(&self.context.pc)
    }

    /// The exception level, as `CurrentEL` has it; 32-bit code is at EL0.
    fn mode(&self) -> u64 {
        if self.context.state & STATE_IS_32_BIT != 0 { 0 } else { self.context.state & 0b1100 }
    }

    /// Gives the guest the exception for an instruction that it does not have.
    pub(super) fn inject_undefined(&mut self) {
        self.inject(0);
    }

    /// Gives the guest a synchronous external abort for the access that stopped it.
    pub(super) fn inject_external_abort(&mut self) {
        const EXTERNAL: u64 = 0x10;
        const WRITE: u64 = 1 << 6;
        let lower = self.syndrome >> 26 & 0x3F;
        let class = if self.mode() == 0 { lower } else { lower + 1 };
        self.switched.far_el1 = self.address;
        self.inject(class << 26 | self.syndrome & WRITE | EXTERNAL);
    }

    /// Puts the guest at its exception vector, as the processor would.
    fn inject(&mut self, syndrome: u64) {
        /// An instruction of four bytes, or none in particular.
        const IL: u64 = 1 << 25;
        let Context { pc, state, .. } = self.context;
        let switched = &mut self.switched;
        let vector = match state & STATE_MODE {
            mode if mode & STATE_IS_32_BIT != 0 => 0x600,
            0b0000 => 0x400,
            0b0100 => 0x000,
            _ => 0x200,
        };
        switched.esr_el1 = syndrome | IL;
        switched.elr_el1 = pc;
        switched.spsr_el1 = state;
        let pan = if switched.sctlr_el1 & SPAN == 0 { STATE_PAN } else { 0 };
        let ssbs = if switched.sctlr_el1 & DSSBS != 0 { STATE_SSBS } else { 0 };
        self.context.state = state & STATE_KEPT | pan | ssbs | STATE_AT_START;
        self.context.pc = (switched.vbar_el1 & !0x7FF).wrapping_add(vector);
    }
}

/// Returns what a guest sees of an identification register: the host's features that it may use.
///
/// A list of what is allowed, since each new feature of a processor may bring state that is not switched.
fn identification(group: u64, number: u64) -> u64 {
    /// AArch64 at EL0 and EL1, no floating point or vectors, system registers for interrupts.
    const PROCESSOR: u64 = 0x11 | 0xFF << 16 | 1 << 24;
    /// Armv8 debug, which is the least that can be said.
    const DEBUG: u64 = 6;
    /// `CRC32`, `Atomic`, `TS`.
    const INSTRUCTIONS_0: u64 = fields(&[16, 20, 52]);
    /// `DPB`, `LRCPC`, `SB`.
    const INSTRUCTIONS_1: u64 = fields(&[0, 20, 36]);
    /// `ASIDBits`, `BigEnd`, `TGran16`, `TGran64`, `TGran4`; the range of addresses is stage 2's.
    const MEMORY_0: u64 = fields(&[4, 8, 20, 24, 28]);
    /// `HPDS`, `PAN`.
    const MEMORY_1: u64 = fields(&[12, 20]);
    /// `CnP`, `UAO`, `ST`.
    const MEMORY_2: u64 = fields(&[0, 4, 28]);
    match (group, number) {
        (4, 0) => PROCESSOR,
        (5, 0) => DEBUG,
        (6, 0) => ID_AA64ISAR0_EL1.get() & INSTRUCTIONS_0,
        (6, 1) => ID_AA64ISAR1_EL1.get() & INSTRUCTIONS_1,
        (7, 0) => ID_AA64MMFR0_EL1.get() & MEMORY_0 | PA_RANGE_44,
        (7, 1) => ID_AA64MMFR1_EL1.get() & MEMORY_1,
        (7, 2) => ID_AA64MMFR2_EL1.get() & MEMORY_2,
        _ => 0,
    }
}

/// The fields of four bits that begin at these bits.
const fn fields(starts: &[u32]) -> u64 {
    let mut word = 0;
    let mut at = 0;
    while at < starts.len() {
        word |= 0xF << starts[at];
        at += 1;
    }
    word
}

unsafe extern "C" {
    /// Enters a guest; returns why it stopped: 0 an exception, 1 an interrupt, 2 a fast interrupt, 3 a system error.
    ///
    /// # Safety
    ///
    /// Interrupts are masked, `init_core` has run on this core, and this core has the guest's registers and stage 2.
    fn enter_guest(context: *mut Context) -> u64;
}

// On the stack, from where the guest is entered: what the caller keeps in registers, and above it the context. The vectors
// have pushed the guest's x0 and x1, and put the kind of the stop into x1.
global_asm!(
    r#"
.section .text.guest, "ax", @progbits
.global enter_guest, guest_stopped
enter_guest:
    stp x29, x30, [sp, #-112]!
    stp x19, x20, [sp, #16]
    stp x21, x22, [sp, #32]
    stp x23, x24, [sp, #48]
    stp x25, x26, [sp, #64]
    stp x27, x28, [sp, #80]
    str x0, [sp, #96]
    ldp x1, x2, [x0, #{pc}]
    msr elr_el2, x1
    msr spsr_el2, x2
    ldp x2, x3, [x0, #16]
    ldp x4, x5, [x0, #32]
    ldp x6, x7, [x0, #48]
    ldp x8, x9, [x0, #64]
    ldp x10, x11, [x0, #80]
    ldp x12, x13, [x0, #96]
    ldp x14, x15, [x0, #112]
    ldp x16, x17, [x0, #128]
    ldp x18, x19, [x0, #144]
    ldp x20, x21, [x0, #160]
    ldp x22, x23, [x0, #176]
    ldp x24, x25, [x0, #192]
    ldp x26, x27, [x0, #208]
    ldp x28, x29, [x0, #224]
    ldr x30, [x0, #240]
    ldp x0, x1, [x0]
    eret
    dsb nsh                                 // nothing is done ahead of time behind it
    isb

guest_stopped:
    ldr x0, [sp, #16 + 96]
    stp x2, x3, [x0, #16]
    stp x4, x5, [x0, #32]
    stp x6, x7, [x0, #48]
    stp x8, x9, [x0, #64]
    stp x10, x11, [x0, #80]
    stp x12, x13, [x0, #96]
    stp x14, x15, [x0, #112]
    stp x16, x17, [x0, #128]
    stp x18, x19, [x0, #144]
    stp x20, x21, [x0, #160]
    stp x22, x23, [x0, #176]
    stp x24, x25, [x0, #192]
    stp x26, x27, [x0, #208]
    stp x28, x29, [x0, #224]
    str x30, [x0, #240]
    ldp x2, x3, [sp], #16
    stp x2, x3, [x0]
    mrs x2, elr_el2
    mrs x3, spsr_el2
    stp x2, x3, [x0, #{pc}]
    mov x0, x1
    ldp x19, x20, [sp, #16]
    ldp x21, x22, [sp, #32]
    ldp x23, x24, [sp, #48]
    ldp x25, x26, [sp, #64]
    ldp x27, x28, [sp, #80]
    ldp x29, x30, [sp], #112
    ret
"#,
    pc = const offset_of!(Context, pc),
);

const _: () = {
    assert!(offset_of!(Context, x) == 0);
    assert!(offset_of!(Context, pc) == 248 && offset_of!(Context, state) == 256);
};
