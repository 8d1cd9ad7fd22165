//! Time: the physical counter, counted in microseconds, and this core's EL2 timer.

use crate::{machine::Error, registers::CNTHP_CVAL_EL2};
use aarch64_cpu::{
    asm::barrier,
    registers::{CNTFRQ_EL0, CNTHP_CTL_EL2, CNTPCT_EL0, Readable, Writeable},
};
use core::sync::atomic::{AtomicU64, Ordering};

/// The counter when the clock started.
static START: AtomicU64 = AtomicU64::new(0);
/// Microseconds in a tick, in units of 2^-64; 0 until the frequency is known.
static US_PER_TICK: AtomicU64 = AtomicU64::new(0);
/// Ticks in a microsecond, in units of 2^-32.
static TICKS_PER_US: AtomicU64 = AtomicU64::new(0);

/// Returns the microseconds since boot. It never decreases, on all cores together, as the counter does not.
pub fn now_us() -> u64 {
    let ticks = ticks().saturating_sub(START.load(Ordering::Relaxed));
    ((u128::from(ticks) * u128::from(US_PER_TICK.load(Ordering::Relaxed))) >> 64) as u64
}

/// Starts the clock at 0. The frequency is what the device tree says, or else what firmware left in `CNTFRQ_EL0`.
pub(crate) fn init(tree_hz: Option<u32>) -> Result<(), Error> {
    let hz = tree_hz.map_or(CNTFRQ_EL0.get(), u64::from);
    // A slower counter could not tell microseconds apart, and the architecture asks for no such thing.
    if hz <= 1_000_000 {
        return Err(Error::NoClock);
    }
    TICKS_PER_US.store(((u128::from(hz) << 32) / 1_000_000) as u64, Ordering::Relaxed);
    START.store(ticks(), Ordering::Relaxed);
    US_PER_TICK.store(((1_000_000_u128 << 64) / u128::from(hz)) as u64, Ordering::Relaxed);
    Ok(())
}

/// Returns the physical counter. In QEMU with `-icount shift=0,sleep=off`, at the GHz that `virt` has, it counts instructions.
pub fn ticks() -> u64 {
    // ORDER: without it the processor may read the counter before it has done what comes earlier in the program.
    barrier::isb(barrier::SY);
    CNTPCT_EL0.get()
}

/// Raises this core's EL2 timer in `after_us` microseconds.
pub(crate) fn arm_timer(after_us: u64) {
    let after = (u128::from(after_us) * u128::from(TICKS_PER_US.load(Ordering::Relaxed))) >> 32;
    CNTHP_CVAL_EL2.set(ticks().saturating_add(u64::try_from(after).unwrap_or(u64::MAX)));
    CNTHP_CTL_EL2.write(CNTHP_CTL_EL2::ENABLE::SET);
    barrier::isb(barrier::SY);
}

/// Lowers this core's EL2 timer.
pub(crate) fn disarm_timer() {
    CNTHP_CTL_EL2.set(0);
    // ORDER: the interrupt controller sees the line go down only once the write is done.
    barrier::isb(barrier::SY);
}
