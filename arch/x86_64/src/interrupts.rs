//! Interrupts: where they come from, who handles them, and what the processor reports about ourselves.
#![expect(unsafe_code, reason = "the interrupt descriptor table names code to the processor")]

use crate::{
    apic, console, cpu, entry, machine_check,
    segments::{DOUBLE_FAULT_STACK, NMI_STACK},
};
use core::{
    arch::global_asm,
    sync::atomic::{AtomicU32, Ordering},
};
use iommu::Message;
use spin::Once;
use x86_64::{
    VirtAddr,
    instructions::tables::lidt,
    registers::{control::Cr2, rflags::RFlags},
    structures::{DescriptorTablePointer, idt},
};

/// Why a core is interrupted. Each has a vector of its own.
#[derive(Clone, Copy, Debug, Eq, PartialEq, defmt::Format)]
pub enum Source {
    /// An IOMMU reports a fault.
    IommuFault,
    /// An IOMMU has page requests.
    PageRequest,
    /// The time given to [`arm_timer`] is over.
    Timer,
    /// Another core, or this one, has work for this core.
    Kick,
    /// An IOMMU has an error of its own. Here it says so by [`IommuFault`](Self::IommuFault).
    IommuError,
    /// A device.
    Device,
}

impl Source {
    const ALL: [Self; 6] =
        [Self::IommuFault, Self::PageRequest, Self::Timer, Self::Kick, Self::IommuError, Self::Device];

    /// The vector; its upper four bits are the priority.
    const fn vector(self) -> u8 {
        0x40 + ((self as u8) << 4)
    }
}

/// The vector of #MC.
const MACHINE_CHECK: u64 = 18;
/// The vector of an interrupt that was withdrawn before it could be delivered; the manual wants ones in the low bits.
const SPURIOUS: u8 = 0xFF;

static HANDLERS: [Once<fn()>; Source::ALL.len()] = [const { Once::new() }; Source::ALL.len()];
static UNEXPECTED: [AtomicU32; 256] = [const { AtomicU32::new(0) }; 256];
static NMIS: AtomicU32 = AtomicU32::new(0);

/// Lets `handler` handle `source`, on every core. It runs with interrupts masked, on the core that was interrupted.
///
/// PANICS: when `source` has a handler already.
pub fn on(source: Source, handler: fn()) {
    let slot = &HANDLERS[source as usize];
    assert!(!slot.is_completed(), "a source of interrupts has one handler");
    slot.call_once(|| handler);
}

/// Lets this core be interrupted, once it unmasks. Comes before everything else in this module, and before
/// [`cpu::start`], on each core.
pub fn init_core() {
    apic::enable(SPURIOUS, Source::Timer.vector());
}

/// Returns the message by which the IOMMU, or a device without interrupt remapping, interrupts `core` for `source`: fixed
/// delivery, edge-triggered, in the compatibility format.
///
/// PANICS: when there is no such core.
pub fn message(source: Source, core: usize) -> Message {
    Message { address: apic::BASE | u64::from(destination(core)) << 12, data: u32::from(source.vector()) }
}

/// Returns the local APIC's ID of `core`, and the vector of `source`.
///
/// PANICS: when there is no such core.
pub(crate) fn target(source: Source, core: usize) -> (u32, u8) {
    (destination(core), source.vector())
}

/// Interrupts `core`, which may be this one, for `source`. Several kicks may arrive as one.
///
/// What this core stored before is visible to the other when it handles the interrupt.
///
/// PANICS: when there is no such core.
pub fn kick(core: usize, source: Source) {
    apic::send(destination(core), source.vector());
}

fn destination(core: usize) -> u32 {
    let id = entry::apic_id(core);
    assert!(id != u32::MAX, "no such core");
    id
}

/// Interrupts this core for [`Source::Timer`] in `after_us` microseconds, once, in place of what was armed before.
///
/// The counter has 32 bits (a minute and more on QEMU, some seconds at least elsewhere): a longer time ends early.
pub fn arm_timer(after_us: u64) {
    apic::arm_timer(after_us);
}

/// Takes back what [`arm_timer`] armed on this core. An interrupt that is already on its way still comes.
pub fn disarm_timer() {
    apic::disarm_timer();
}

/// Returns how many non-maskable interrupts have come, on all cores. That is all that is done about them.
pub fn non_maskable() -> u32 {
    NMIS.load(Ordering::Relaxed)
}

// One stub for each source, 64 bytes apart, and one for each vector, 16 bytes apart. What the calling convention lets a
// function change is kept, and nothing else: the image has no floating point.
//
// An interrupt of a source has nothing to tell but which it is. For the other vectors the processor pushes an error code
// for some exceptions alone; all else gets a 0, so that all look alike to `dispatch`. Nor does it push one for an interrupt
// that has an exception's vector: the stack was aligned to 16 bytes before its five or six words, so bit 3 tells them apart.
global_asm!(
    r#"
// The registers that a call may change.
.macro save_scratch
    push rax
    push rcx
    push rdx
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
.endm
.macro restore_scratch
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rax
.endm

.section .text.interrupts, "ax", @progbits
.global source_stubs
source_stubs:
    .set source, 0
    .rept {sources}
    .p2align 6
    save_scratch
    cld
    mov edi, source
    call {serve}                    # the stack is aligned: 5 + 9 words under an aligned one
    restore_scratch
    iretq
    .set source, source + 1
    .endr

.p2align 4
.global interrupt_stubs
interrupt_stubs:
    .set vector, 0
    .rept 256
    .p2align 4
    .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    test spl, 8
    jz 1f
    .endif
    push 0
1:
    push vector
    jmp interrupt_entry
    .set vector, vector + 1
    .endr

interrupt_entry:
    save_scratch
    cld
    lea rdi, [rsp + 72]
    call {dispatch}                 # the stack is aligned: 5 + 2 + 9 words under an aligned one
    restore_scratch
    add rsp, 16
    iretq
"#,
    sources = const Source::ALL.len(),
    serve = sym serve,
    dispatch = sym dispatch,
);

/// What lies on the stack when `dispatch` is called.
#[repr(C)]
struct Frame {
    vector: u64,
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

type Idt = [idt::Entry<idt::HandlerFunc>; 256];

/// Loads the interrupt descriptor table, the same for all cores.
pub(crate) fn load() {
    static IDT: Once<Idt> = Once::new();
    unsafe extern "C" {
        safe static interrupt_stubs: [[u8; 16]; 256];
        safe static source_stubs: [[u8; 64]; Source::ALL.len()];
    }
    let idt = IDT.call_once(|| {
        let mut table = [const { idt::Entry::missing() }; 256];
        for (entry, stub) in table.iter_mut().zip(&interrupt_stubs) {
            // SAFETY: the stub keeps all registers and returns with IRETQ, as a handler must.
            unsafe { entry.set_handler_addr(VirtAddr::from_ptr(stub)) };
        }
        for (source, stub) in Source::ALL.into_iter().zip(&source_stubs) {
            // SAFETY: as above.
            unsafe { table[usize::from(source.vector())].set_handler_addr(VirtAddr::from_ptr(stub)) };
        }
        for (vector, stack) in [(2, NMI_STACK), (8, DOUBLE_FAULT_STACK)] {
            let address = table[vector].handler_addr();
            // SAFETY: as above.
            let options = unsafe { table[vector].set_handler_addr(address) };
            // SAFETY: `segments` sets up both stacks; neither handler can be interrupted by what uses the same.
            unsafe { options.set_stack_index(stack) };
        }
        table
    });
    let pointer =
        DescriptorTablePointer { limit: size_of::<Idt>() as u16 - 1, base: VirtAddr::from_ptr(idt) };
    // SAFETY: the table is complete, and lives for ever.
    unsafe { lidt(&pointer) };
}

/// Handles an interrupt of the source with this number.
extern "sysv64" fn serve(source: usize) {
    match HANDLERS.get(source).and_then(Once::get) {
        Some(handler) => handler(),
        None => unexpected(Source::ALL[source % Source::ALL.len()].vector()),
    }
    apic::end_of_interrupt();
}

/// Handles everything that is not of a source.
extern "sysv64" fn dispatch(frame: &Frame) {
    let vector = frame.vector as u8;
    match vector {
        2 => {
            NMIS.fetch_add(1, Ordering::Relaxed);
        }
        0..=31 if !is_interrupt(frame) => exception(frame),
        SPURIOUS => {}
        _ => {
            unexpected(vector);
            apic::end_of_interrupt();
        }
    }
}

/// Returns whether an interrupt has brought the exception's vector of `frame`: a device may put any into its message, and
/// the local APIC takes those from 16 on.
fn is_interrupt(frame: &Frame) -> bool {
    // What came while interrupts were masked is an exception. That includes all that comes before `apic::enable`, and a
    // machine check while an interrupt with its vector is handled.
    RFlags::from_bits_truncate(frame.rflags).contains(RFlags::INTERRUPT_FLAG)
        && apic::is_in_service(frame.vector as u8)
}

fn unexpected(vector: u8) {
    if UNEXPECTED[usize::from(vector)].fetch_add(1, Ordering::Relaxed) == 0 {
        defmt::warn!("nobody handles vector {=u8:#x}; told once", vector);
    }
}

/// The exceptions' mnemonics and names in the manual, by vector.
const EXCEPTIONS: [&str; 32] = [
    "#DE divide error",
    "#DB debug exception",
    "NMI",
    "#BP breakpoint",
    "#OF overflow",
    "#BR bound range exceeded",
    "#UD invalid opcode",
    "#NM device not available",
    "#DF double fault",
    "coprocessor segment overrun",
    "#TS invalid TSS",
    "#NP segment not present",
    "#SS stack fault",
    "#GP general protection",
    "#PF page fault",
    "exception 15",
    "#MF floating-point error",
    "#AC alignment check",
    "#MC machine check",
    "#XM SIMD floating-point",
    "#VE virtualization exception",
    "#CP control protection",
    "exception 22",
    "exception 23",
    "exception 24",
    "exception 25",
    "exception 26",
    "exception 27",
    "#HV hypervisor injection",
    "#VC VMM communication",
    "#SX security exception",
    "exception 31",
];

/// Reports an exception of the hypervisor itself, and ends the machine.
fn exception(frame: &Frame) -> ! {
    if console::last_words() {
        defmt::error!(
            "{=str} on core {=usize}: error code {=u64:#x}, rip {=u64:#x}, rsp {=u64:#x}, cr2 {=u64:#x}",
            EXCEPTIONS[frame.vector as usize & 31],
            cpu::core(),
            frame.error_code,
            frame.rip,
            frame.rsp,
            Cr2::read_raw(),
        );
        if frame.vector == MACHINE_CHECK {
            machine_check::log_banks();
        }
    }
    cpu::exit(false)
}

/// Reports a machine check that stopped a guest, and ends the machine as an exception of the hypervisor does: it is the
/// hardware that failed.
pub(crate) fn machine_check() -> ! {
    if console::last_words() {
        defmt::error!("#MC machine check on core {=usize}, while a guest ran", cpu::core());
        machine_check::log_banks();
    }
    cpu::exit(false)
}
