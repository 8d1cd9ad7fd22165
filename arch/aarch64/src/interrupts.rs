//! Interrupts: where they come from, who handles them, and what the processor reports about ourselves.
#![expect(unsafe_code, reason = "the vectors are where the processor continues")]

use crate::{
    clock, console,
    cpu::{self, CORES},
    gic, its,
    machine::{Boot, Error},
};
use core::{
    arch::global_asm,
    cell::UnsafeCell,
    sync::atomic::{AtomicU8, AtomicU32, Ordering},
};
use heapless::Vec;
use smmuv3::tree::Wire;
use spin::Once;

/// Why a core is interrupted.
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
    /// An IOMMU has an error of its own.
    IommuError,
    /// A device, by a message.
    Device,
}

impl Source {
    const ALL: [Self; 6] =
        [Self::IommuFault, Self::PageRequest, Self::Timer, Self::Kick, Self::IommuError, Self::Device];

    /// The interrupt by which cores tell each other of the source (SGI).
    const fn between_cores(self) -> u32 {
        self as u32
    }
}

/// Wires that devices interrupt by, at most.
pub(crate) const WIRES: usize = 4;

static HANDLERS: [Once<fn()>; Source::ALL.len()] = [const { Once::new() }; Source::ALL.len()];
/// Numbers of the interrupts that each core has for itself: its EL2 timer, and the upkeep of list registers.
static TIMER: AtomicU32 = AtomicU32::new(0);
static MAINTENANCE: AtomicU32 = AtomicU32::new(0);
/// What each interrupt that is no message is for, by its number: a source plus one, or one of the two below; 0 if nobody
/// expects it.
static MEANINGS: [AtomicU8; gic::NUMBERS] = {
    let mut meanings = [const { AtomicU8::new(0) }; gic::NUMBERS];
    let mut at = 0;
    while at < Source::ALL.len() {
        meanings[Source::ALL[at].between_cores() as usize] = AtomicU8::new(meaning(Source::ALL[at]));
        at += 1;
    }
    meanings
};
/// The line of this core's timer is up.
const TIME_IS_OVER: u8 = 0xFE;
/// It ended the run of a guest, and that is all it is for.
const UPKEEP: u8 = 0xFF;

const fn meaning(source: Source) -> u8 {
    source as u8 + 1
}
/// The shared interrupts of devices.
static CONNECTED: Once<Vec<(Source, Wire), WIRES>> = Once::new();
/// For which source each message of a device is (LPI), plus one; 0 if it is for none.
static MESSAGES: [AtomicU8; its::EVENTS] = [const { AtomicU8::new(0) }; its::EVENTS];
/// How often an interrupt with this number was unexpected; the last counts all higher ones, too.
static UNEXPECTED: [AtomicU32; 256] = [const { AtomicU32::new(0) }; 256];

/// Lets `handler` handle `source`, on every core. It runs with interrupts masked, on the core that was interrupted.
///
/// PANICS: when `source` has a handler already.
pub fn on(source: Source, handler: fn()) {
    let slot = &HANDLERS[source as usize];
    assert!(!slot.is_completed(), "a source of interrupts has one handler");
    slot.call_once(|| handler);
}

/// Finds the interrupt controller, and the interrupts that each core has for itself. Runs once, on the first core.
pub(crate) fn init(boot: &Boot) -> Result<(), Error> {
    let controller = boot.tree().interrupt_controller()?;
    let timer = boot.tree().timer()?;
    TIMER.store(timer, Ordering::Relaxed);
    MAINTENANCE.store(controller.maintenance, Ordering::Relaxed);
    for (number, meaning) in [(timer, TIME_IS_OVER), (controller.maintenance, UPKEEP)] {
        set_meaning(number, meaning);
    }
    gic::init(&controller)
}

/// Lets this core be interrupted, once it unmasks. Comes before everything else in this module, and before
/// [`cpu::start`], on each core.
pub fn init_core() {
    disarm_timer();
    let own = [TIMER.load(Ordering::Relaxed), MAINTENANCE.load(Ordering::Relaxed)];
    if let Err(error) = gic::init_core(cpu::core(), Source::ALL.len() as u32, &own) {
        // Whoever waits for an interrupt of this core will say that none came.
        defmt::error!("core {=usize} cannot be interrupted: {}", cpu::core(), defmt::Display2Format(&error));
    }
}

/// Names the wires of a device that interrupt for a source. The first call counts: there is one such device.
pub(crate) fn connect(wires: &[(Source, Wire)]) {
    let connected: &Vec<_, WIRES> = CONNECTED.call_once(|| wires.iter().copied().take(WIRES).collect());
    for &(source, wire) in connected {
        set_meaning(wire.number, meaning(source));
    }
}

/// Says what interrupt `number` is for. The numbers are those that the device tree gives, of interrupts that there are.
fn set_meaning(number: u32, meaning: u8) {
    if let Some(place) = MEANINGS.get(number as usize) {
        place.store(meaning, Ordering::Relaxed);
    }
}

/// Leads the wires that interrupt for `source` to `core`.
///
/// PANICS: when there is no such core.
pub(crate) fn route(source: Source, core: usize) {
    assert!(core < cpu::cores_present(), "no such core");
    for (_, wire) in CONNECTED.get().into_iter().flatten().filter(|(of, _)| *of == source) {
        gic::route(wire.number, wire.edge, core);
    }
}

/// Lets the device's message `number` (LPI), counted from 0, be for `source`.
pub(crate) fn set_message(number: usize, source: Source) {
    MESSAGES[number].store(meaning(source), Ordering::Relaxed);
}

/// Returns what interrupt `number` is for.
fn meaning_of(number: u32) -> u8 {
    let place = match number.checked_sub(gic::FIRST_LPI) {
        None => MEANINGS.get(number as usize),
        Some(message) => MESSAGES.get(message as usize),
    };
    place.map_or(0, |meaning| meaning.load(Ordering::Relaxed))
}

/// Interrupts `core`, which may be this one, for `source`. Several kicks may arrive as one.
///
/// What this core stored before is visible to the other when it handles the interrupt.
///
/// PANICS: when there is no such core.
pub fn kick(core: usize, source: Source) {
    gic::send(core, source.between_cores());
}

/// Interrupts this core for [`Source::Timer`] in `after_us` microseconds, once, in place of what was armed before.
pub fn arm_timer(after_us: u64) {
    clock::arm_timer(after_us);
}

/// Takes back what [`arm_timer`] armed on this core. An interrupt that is already on its way still comes.
pub fn disarm_timer() {
    clock::disarm_timer();
}

/// Returns how many non-maskable interrupts have come, on all cores: none, since these machines have none.
pub fn non_maskable() -> u32 {
    0
}

/// Bytes of the stack on which a core reports what ends it: the stack that it was on may be the cause.
const LAST_STACK_BYTES: usize = 16 * 1024;

#[repr(C, align(16))]
struct LastStack(UnsafeCell<[u8; LAST_STACK_BYTES]>);

// SAFETY: no reference to the bytes is ever made; only the core that owns it runs on it.
unsafe impl Sync for LastStack {}

static LAST_STACKS: [LastStack; CORES] = [const { LastStack(UnsafeCell::new([0; LAST_STACK_BYTES])) }; CORES];

// An entry is 128 bytes. Those for what a guest was stopped by are continued in `guest`.
global_asm!(
    r#"
.macro fatal kind
.p2align 7
    mov x0, #\kind
    b 8f
.endm
.macro stopped kind
.p2align 7
    stp x0, x1, [sp, #-16]!
    mov x1, #\kind
    b guest_stopped
.endm

.section .text.vectors, "ax", @progbits
.p2align 11
.global vectors
vectors:
    fatal 0                                 // from here, with the stack of EL0, which nobody uses
    fatal 1
    fatal 2
    fatal 3
    fatal 0                                 // from here: an exception
.p2align 7                                  // an interrupt
    sub sp, sp, #176
    stp x0, x1, [sp]
    stp x2, x3, [sp, #16]
    stp x4, x5, [sp, #32]
    stp x6, x7, [sp, #48]
    stp x8, x9, [sp, #64]
    stp x10, x11, [sp, #80]
    stp x12, x13, [sp, #96]
    stp x14, x15, [sp, #112]
    stp x16, x17, [sp, #128]
    stp x18, x30, [sp, #144]
    mrs x0, elr_el2
    mrs x1, spsr_el2
    stp x0, x1, [sp, #160]
    bl {dispatch}
    b 9f
    fatal 2
    fatal 3
    stopped 0                               // from a guest
    stopped 1
    stopped 2
    stopped 3
    stopped 0                               // from 32-bit code of a guest
    stopped 1
    stopped 2
    stopped 3
.p2align 7
9:  ldp x0, x1, [sp, #160]
    msr elr_el2, x0
    msr spsr_el2, x1
    ldp x0, x1, [sp]
    ldp x2, x3, [sp, #16]
    ldp x4, x5, [sp, #32]
    ldp x6, x7, [sp, #48]
    ldp x8, x9, [sp, #64]
    ldp x10, x11, [sp, #80]
    ldp x12, x13, [sp, #96]
    ldp x14, x15, [sp, #112]
    ldp x16, x17, [sp, #128]
    ldp x18, x30, [sp, #144]
    add sp, sp, #176
    eret

8:  mov x4, sp
    mrs x1, esr_el2
    mrs x2, elr_el2
    mrs x3, far_el2
    mrs x5, tpidr_el2                       // the core
    ldr x6, ={last_stacks} + {last_stack_bytes}
    mov x7, #{last_stack_bytes}
    madd x6, x5, x7, x6
    mov sp, x6
    bl {exception}
"#,
    dispatch = sym dispatch,
    exception = sym exception,
    last_stacks = sym LAST_STACKS,
    last_stack_bytes = const LAST_STACK_BYTES,
);

extern "C" fn dispatch() {
    let Some(number) = gic::take() else { return };
    let mut what = meaning_of(number);
    if what == TIME_IS_OVER {
        // The line stays up for as long as the time is over: once is enough.
        disarm_timer();
        what = meaning(Source::Timer);
    }
    match HANDLERS.get(usize::from(what).wrapping_sub(1)).and_then(Once::get) {
        Some(handler) => handler(),
        None if what == UPKEEP => {}
        None => unexpected(number),
    }
    gic::end(number);
}

fn unexpected(number: u32) {
    let slot = &UNEXPECTED[(number as usize).min(UNEXPECTED.len() - 1)];
    if slot.fetch_add(1, Ordering::Relaxed) == 0 {
        defmt::warn!("nobody handles interrupt {=u32}; told once", number);
    }
}

/// Returns the name of an exception class (`ESR_EL2.EC`), for those that EL2 can meet in itself.
fn class_name(class: u64) -> &'static str {
    match class {
        0x00 => "undefined instruction",
        0x07 => "floating point or vector instruction",
        0x0E => "illegal execution state",
        0x15 => "SVC instruction",
        0x16 => "HVC instruction",
        0x18 => "system instruction",
        0x21 => "instruction abort",
        0x22 => "misaligned pc",
        0x25 => "data abort",
        0x26 => "misaligned sp",
        0x3C => "BRK instruction",
        _ => "exception",
    }
}

/// Reports an exception of the hypervisor itself, and ends the machine.
extern "C" fn exception(kind: u64, syndrome: u64, at: u64, address: u64, stack: u64) -> ! {
    if cpu::is_ending() {
        cpu::halt()
    }
    if console::last_words() {
        let name = match kind {
            2 => "fast interrupt",
            3 => "system error",
            _ => class_name(syndrome >> 26 & 0x3F),
        };
        defmt::error!(
            "{=str} on core {=usize}: esr {=u64:#x}, pc {=u64:#x}, sp {=u64:#x}, far {=u64:#x}",
            name,
            cpu::core(),
            syndrome,
            at,
            stack,
            address,
        );
    }
    cpu::exit(false)
}
