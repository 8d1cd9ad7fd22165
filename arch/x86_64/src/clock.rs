//! Time: the TSC, counted in microseconds.
#![expect(unsafe_code, reason = "the PIT is reached through I/O ports")]

use crate::{cpu::cpuid, machine::Error};
use core::{
    arch::{asm, x86_64::_rdtsc},
    sync::atomic::{AtomicU64, Ordering},
};
use x86_64::instructions::port::Port;

/// The TSC when the clock started.
static START: AtomicU64 = AtomicU64::new(0);
/// Microseconds in a tick, in units of 2^-64; 0 until the frequency is known.
static US_PER_TICK: AtomicU64 = AtomicU64::new(0);

/// Returns the microseconds since boot. It never decreases, on all cores together, as the TSC does not.
pub fn now_us() -> u64 {
    let ticks = ticks().saturating_sub(START.load(Ordering::Relaxed));
    ((u128::from(ticks) * u128::from(US_PER_TICK.load(Ordering::Relaxed))) >> 64) as u64
}

/// Finds the frequency of the TSC, and starts the clock at 0.
pub(crate) fn init() -> Result<(), Error> {
    let hz = match hz_by_cpuid() {
        Some(hz) => hz,
        None => {
            // One window may be stretched by a system management interrupt, so the middle of three counts.
            let mut windows = [hz_by_pit()?, hz_by_pit()?, hz_by_pit()?];
            windows.sort_unstable();
            windows[1]
        }
    };
    // A slower clock could not tell microseconds apart, and there is no such processor.
    if hz <= 1_000_000 {
        return Err(Error::NoClock);
    }
    START.store(ticks(), Ordering::Relaxed);
    US_PER_TICK.store(((1_000_000_u128 << 64) / u128::from(hz)) as u64, Ordering::Relaxed);
    Ok(())
}

/// Returns the TSC. In QEMU with `-icount shift=0,sleep=off` it counts instructions.
pub fn ticks() -> u64 {
    // ORDER: without it the processor may read the TSC before it has done what comes earlier in the program.
    // SAFETY: every 64-bit x86 processor has LFENCE. It is written out because the intrinsic would be a call: this target
    // has no SSE2.
    unsafe { asm!("lfence", options(nostack, preserves_flags)) };
    // SAFETY: every 64-bit x86 processor has RDTSC, and CR4.TSD does not matter in ring 0.
    unsafe { _rdtsc() }
}

/// Returns what CPUID leaf 0x15 says: the frequency of the crystal, times a ratio.
fn hz_by_cpuid() -> Option<u64> {
    if cpuid(0, 0).eax < 0x15 {
        return None;
    }
    let leaf = cpuid(0x15, 0);
    let hz = (u64::from(leaf.ecx) * u64::from(leaf.ebx)).checked_div(u64::from(leaf.eax))?;
    (hz != 0).then_some(hz)
}

const PIT_HZ: u64 = 1_193_182;
/// PIT ticks to measure over, at least: 2 ms, to which one tick more or less makes 0.04 %.
const WINDOW: u16 = 2386;
/// Rounds after which a PIT whose counter has not moved is taken for absent; each takes longer than a port access, 0.1 us.
const ROUNDS: u32 = 1_000_000;

/// Measures the TSC against channel 2 of the PIT, whose gate and speaker port 0x61 controls.
fn hz_by_pit() -> Result<u64, Error> {
    let mut gate = Port::<u8>::new(0x61);
    let mut command = Port::<u8>::new(0x43);
    let mut counter = Port::<u8>::new(0x42);
    // SAFETY: reading the port has no effect.
    let before = unsafe { gate.read() };
    // SAFETY: gate on, speaker off; the chipset's other bits are kept.
    unsafe { gate.write(before & !0b10 | 0b01) };
    // SAFETY: channel 2, low byte then high byte, mode 0; nothing else uses the channel.
    unsafe { command.write(0b1011_0000) };
    // SAFETY: counts down from 0xFFFF.
    unsafe { counter.write(0xFF) };
    // SAFETY: as above.
    unsafe { counter.write(0xFF) };

    let mut sample = || {
        // SAFETY: latches the count of channel 2.
        unsafe { command.write(0b1000_0000) };
        // SAFETY: the low byte of the latched count.
        let low = unsafe { counter.read() };
        // SAFETY: the high byte.
        let high = unsafe { counter.read() };
        (u16::from_le_bytes([low, high]), ticks())
    };
    let (first_count, first_ticks) = sample();
    let measured = (0..ROUNDS).find_map(|_| {
        let (count, ticks) = sample();
        let elapsed = first_count.wrapping_sub(count);
        (elapsed >= WINDOW).then(|| (ticks - first_ticks) * PIT_HZ / u64::from(elapsed))
    });
    // SAFETY: the port is as it was found.
    unsafe { gate.write(before) };
    measured.ok_or(Error::NoClock)
}
