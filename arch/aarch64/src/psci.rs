//! PSCI: what firmware does for us with the power of cores. Arm DEN 0022.
#![expect(unsafe_code, reason = "firmware is called by an instruction")]

use core::arch::asm;

const CPU_OFF: u32 = 0x8400_0002;
const CPU_ON: u32 = 0xC400_0003;

/// `ALREADY_ON` and `ON_PENDING`: the core was started before.
pub(crate) const ALREADY_ON: i32 = -4;
pub(crate) const ON_PENDING: i32 = -5;

/// Starts the core with `affinity` at physical address `entry`, with `context` in x0. Returns PSCI's code of an error.
///
/// # Safety
///
/// What is at `entry` is code for a core that has just been switched on.
pub(crate) unsafe fn cpu_on(affinity: u64, entry: u64, context: u64) -> Result<(), i32> {
    // SAFETY: firmware keeps our memory; the caller vouches for what the other core runs.
    match unsafe { call(CPU_ON, [affinity, entry, context]) } as i32 {
        0 => Ok(()),
        code => Err(code),
    }
}

/// Switches this core off. Returns only if firmware refuses.
pub(crate) fn cpu_off() {
    // SAFETY: it stops this core, on which nothing is left to do.
    unsafe { call(CPU_OFF, [0; 3]) };
}

/// Calls firmware by SMC, as the SMC Calling Convention says.
///
/// # Safety
///
/// What `function` does with `arguments` leaves memory alone, and the other cores sound.
unsafe fn call(function: u32, [first, second, third]: [u64; 3]) -> u64 {
    let result;
    // SAFETY: x0 to x17 are firmware's to change, the other registers are kept; the caller vouches for the rest.
    unsafe {
        asm!(
            "smc #0",
            inlateout("x0") u64::from(function) => result,
            inlateout("x1") first => _,
            inlateout("x2") second => _,
            inlateout("x3") third => _,
            lateout("x4") _, lateout("x5") _, lateout("x6") _, lateout("x7") _, lateout("x8") _, lateout("x9") _,
            lateout("x10") _, lateout("x11") _, lateout("x12") _, lateout("x13") _, lateout("x14") _,
            lateout("x15") _, lateout("x16") _, lateout("x17") _,
            options(nostack),
        );
    }
    result
}
