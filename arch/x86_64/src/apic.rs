//! The local APIC of this core: x2APIC, or xAPIC where that is missing. Registers have the x2APIC's numbers.
#![expect(unsafe_code, reason = "the local APIC is reached through MSRs, or through memory")]

use crate::{clock::now_us, cpu::cpuid};
use core::{
    arch::asm,
    ptr,
    sync::atomic::{AtomicBool, Ordering},
};
use spin::Once;
use x86_64::{instructions::port::Port, registers::model_specific::Msr};

/// The highest ID that a message-signalled interrupt reaches without interrupt remapping; 255 means every core.
pub(crate) const MAX_ID: u32 = 254;
/// Where message-signalled interrupts are written, and where the registers of xAPIC are.
pub(crate) const BASE: u64 = 0xFEE0_0000;

/// `IA32_APIC_BASE`.
const APIC_BASE: u32 = 0x1B;
const APIC_BASE_ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
const APIC_BASE_ENABLE: u64 = 1 << 11;
const APIC_BASE_X2APIC: u64 = 1 << 10;

/// CPUID leaf 1, ECX.
const CPUID_X2APIC: u32 = 1 << 21;

const TASK_PRIORITY: u32 = 0x08;
const END_OF_INTERRUPT: u32 = 0x0B;
const SPURIOUS: u32 = 0x0F;
/// The first of eight, of 32 vectors each.
const IN_SERVICE: u32 = 0x10;
const COMMAND: u32 = 0x30;
/// Of xAPIC alone: bits 63:32 of the interrupt command register.
const COMMAND_HIGH: u32 = 0x31;
const LVT_TIMER: u32 = 0x32;
const LVT_LINT0: u32 = 0x35;
const LVT_ERROR: u32 = 0x37;
const TIMER_INITIAL: u32 = 0x38;
const TIMER_CURRENT: u32 = 0x39;
const TIMER_DIVIDE: u32 = 0x3E;

const MASKED: u64 = 1 << 16;
const SOFTWARE_ENABLE: u64 = 1 << 8;
/// `Delivery Status` of xAPIC: the message before has not left yet.
const SEND_PENDING: u64 = 1 << 12;
const LEVEL_ASSERT: u64 = 1 << 14;
const DELIVER_INIT: u64 = 0b101 << 8;
const DELIVER_STARTUP: u64 = 0b110 << 8;
/// Divides the timer's clock by 16.
const DIVIDE_BY_16: u64 = 0b0011;

/// Ticks of the timer in a second, once a core has measured them.
static TIMER_HZ: Once<u64> = Once::new();

/// Whether the registers of the cores that were enabled are MSRs: all cores are of one kind.
static IS_X2APIC: AtomicBool = AtomicBool::new(false);

/// Returns whether this core is in x2APIC mode. Comes after `enable`.
pub(crate) fn is_x2apic() -> bool {
    IS_X2APIC.load(Ordering::Relaxed)
}

/// Reads a register. Comes after `enable`.
fn read(register: u32) -> u64 {
    read_as(is_x2apic(), register)
}

/// Writes a register. Comes after `enable`.
fn write(register: u32, value: u64) {
    write_as(is_x2apic(), register, value);
}

/// Reads a register of this core, which is in x2APIC mode or not.
fn read_as(is_x2apic: bool, register: u32) -> u64 {
    if is_x2apic {
        // SAFETY: this core is in x2APIC mode, and the numbers above are registers that can be read.
        unsafe { Msr::new(0x800 + register).read() }
    } else {
        // SAFETY: `enable` put the registers at `BASE`, which is mapped uncached.
        u64::from(unsafe { memory(register).read_volatile() })
    }
}

/// Writes a register of this core, which is in x2APIC mode or not.
fn write_as(is_x2apic: bool, register: u32, value: u64) {
    if is_x2apic {
        let mut register = Msr::new(0x800 + register);
        // SAFETY: this core is in x2APIC mode; what the registers can do to memory safety is to deliver an interrupt, whose
        // handlers are safe at any time.
        unsafe { register.write(value) };
    } else {
        // SAFETY: as for `read`, and as above.
        unsafe { memory(register).write_volatile(value as u32) };
    }
}

fn memory(register: u32) -> *mut u32 {
    ptr::with_exposed_provenance_mut(BASE as usize + register as usize * 16)
}

/// Returns the ID of this core. Needs no `enable`.
pub(crate) fn id() -> u32 {
    if cpuid(0, 0).eax >= 0xB && cpuid(0xB, 0).ebx != 0 { cpuid(0xB, 0).edx } else { cpuid(1, 0).ebx >> 24 }
}

/// Opens this core's local APIC for `spurious`, for `timer` once that is armed, and for messages, and closes everything
/// else that interrupts.
pub(crate) fn enable(spurious: u8, timer: u8) {
    mask_pics();
    let mut base = Msr::new(APIC_BASE);
    // SAFETY: every core with an APIC has this register.
    let found = unsafe { base.read() };
    let value = found & !APIC_BASE_ADDRESS | BASE | APIC_BASE_ENABLE;
    // SAFETY: the registers are where the page tables expect devices; the manual's other bits are kept.
    unsafe { base.write(value) };
    let left_on = found & APIC_BASE_X2APIC != 0;
    write_as(left_on, TIMER_DIVIDE, DIVIDE_BY_16);
    // Before x2APIC where that is possible: QEMU with -icount gives up when the counter is read through RDMSR.
    TIMER_HZ.call_once(|| measure_timer(left_on));
    let is_x2apic = cpuid(1, 0).ecx & CPUID_X2APIC != 0;
    if is_x2apic {
        // SAFETY: CPUID says that the mode exists, and the APIC was enabled before, as the manual asks.
        unsafe { base.write(value | APIC_BASE_X2APIC) };
    }
    IS_X2APIC.store(is_x2apic, Ordering::Relaxed);
    // Firmware may have left the 8259s wired through here.
    for register in [LVT_LINT0, LVT_ERROR] {
        write(register, read(register) | MASKED);
    }
    // It counts once, from where it is armed; zero is not at all.
    write(TIMER_INITIAL, 0);
    write(LVT_TIMER, u64::from(timer));
    write(TASK_PRIORITY, 0);
    write(SPURIOUS, SOFTWARE_ENABLE | u64::from(spurious));
}

/// Masks the two 8259 interrupt controllers, which nobody serves.
fn mask_pics() {
    for data in [0x21, 0xA1] {
        let mut port = Port::<u8>::new(data);
        // SAFETY: the mask register of the controller; all of its inputs off.
        unsafe { port.write(0xFF) };
    }
}

/// Counts the timer, masked, against the clock.
fn measure_timer(is_x2apic: bool) -> u64 {
    const WINDOW_US: u64 = 500;
    let read = |register| read_as(is_x2apic, register);
    let write = |register, value| write_as(is_x2apic, register, value);
    write(LVT_TIMER, MASKED);
    write(TIMER_INITIAL, u64::from(u32::MAX));
    let (start_us, start_count) = (now_us(), read(TIMER_CURRENT));
    while now_us() - start_us < WINDOW_US {
        core::hint::spin_loop();
    }
    let (end_us, end_count) = (now_us(), read(TIMER_CURRENT));
    write(TIMER_INITIAL, 0);
    (start_count - end_count) * 1_000_000 / (end_us - start_us)
}

/// Lets the timer of this core interrupt in `after_us` microseconds, once.
pub(crate) fn arm_timer(after_us: u64) {
    // Without `enable` there is no frequency; then the shortest time is as wrong as any other.
    let hz = TIMER_HZ.get().copied().unwrap_or(0);
    let count = (after_us.saturating_mul(hz) / 1_000_000).clamp(1, u64::from(u32::MAX));
    write(TIMER_INITIAL, count);
}

/// Stops the timer of this core.
pub(crate) fn disarm_timer() {
    write(TIMER_INITIAL, 0);
}

/// Returns whether this core handles an interrupt with `vector`, which has not ended.
pub(crate) fn is_in_service(vector: u8) -> bool {
    read(IN_SERVICE + u32::from(vector / 32)) & 1 << (vector % 32) != 0
}

/// Ends the interrupt that this core handles.
pub(crate) fn end_of_interrupt() {
    write(END_OF_INTERRUPT, 0);
}

/// Interrupts the core with `id`.
pub(crate) fn send(id: u32, vector: u8) {
    command(id, LEVEL_ASSERT | u64::from(vector));
}

/// Resets the core with `id`, which then waits for a start-up message.
pub(crate) fn send_init(id: u32) {
    command(id, LEVEL_ASSERT | DELIVER_INIT);
}

/// Starts the core with `id` in real mode at `page`, which lies below 1 MiB.
pub(crate) fn send_startup(id: u32, page: u64) {
    command(id, LEVEL_ASSERT | DELIVER_STARTUP | page >> 12 & 0xFF);
}

fn command(id: u32, message: u64) {
    // ORDER: a write to an x2APIC register waits for nothing, so without these the other core could be interrupted before
    // it can see what it is interrupted for (the manual: MFENCE; LFENCE).
    // SAFETY: every 64-bit x86 processor has both.
    unsafe { asm!("mfence", "lfence", options(nostack, preserves_flags)) };
    if is_x2apic() {
        write(COMMAND, u64::from(id) << 32 | message);
        return;
    }
    write(COMMAND_HIGH, u64::from(id) << 24);
    write(COMMAND, message);
    // The next message must not overwrite this one; a bus that never takes it would be broken, so the wait is bounded.
    for _ in 0..10_000 {
        if read(COMMAND) & SEND_PENDING == 0 {
            break;
        }
        core::hint::spin_loop();
    }
}
