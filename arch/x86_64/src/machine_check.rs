//! Machine checks: what the processor knows about errors of the hardware. AMD64 Architecture Programmer's Manual, volume 2,
//! "Machine Check Architecture"; Intel's has the same registers.
#![expect(unsafe_code, reason = "the banks are MSRs")]

use crate::cpu::cpuid;
use x86_64::registers::model_specific::Msr;

/// `MCG_CAP`; its low byte counts the banks.
const MCG_CAP: Msr = Msr::new(0x179);
/// `MCG_STATUS`, and its bit `MCIP`.
const MCG_STATUS: Msr = Msr::new(0x17A);
const MCG_STATUS_MCIP: u64 = 1 << 2;
/// `MC0_STATUS`, and its bits `VAL` and `ADDRV`. The status of the next bank is 4 further, a bank's address 1 further.
const MC0_STATUS: u32 = 0x401;
const STATUS_VALID: u64 = 1 << 63;
const STATUS_ADDRESS_VALID: u64 = 1 << 58;
/// The most banks that have these numbers.
const BANKS: u32 = 32;

/// CPUID leaf 1, EDX.
const CPUID_MCA: u32 = 1 << 14;

fn is_supported() -> bool {
    cpuid(1, 0).edx & CPUID_MCA != 0
}

/// Returns whether there is a machine check on this core that nobody has handled (`MCG_STATUS.MCIP`).
pub(crate) fn is_in_progress() -> bool {
    // SAFETY: CPUID says that the register exists; reading it changes nothing.
    is_supported() && unsafe { MCG_STATUS.read() } & MCG_STATUS_MCIP != 0
}

/// Logs the errors that the banks of this core hold. They stay there, for firmware to find after a reset.
pub(crate) fn log_banks() {
    if !is_supported() {
        return;
    }
    // SAFETY: CPUID says that the register exists; reading it changes nothing.
    let banks = unsafe { MCG_CAP.read() } as u32 & 0xFF;
    for bank in 0..banks.min(BANKS) {
        let register = MC0_STATUS + bank * 4;
        // SAFETY: the bank exists; reading its status changes nothing.
        let status = unsafe { Msr::new(register).read() };
        if status & STATUS_VALID == 0 {
            continue;
        }
        let address = match status & STATUS_ADDRESS_VALID {
            0 => 0,
            // SAFETY: the bank says that it has an address; reading it changes nothing.
            _ => unsafe { Msr::new(register + 1).read() },
        };
        defmt::error!("bank {=u32}: status {=u64:#x}, address {=u64:#x}", bank, status, address);
    }
}
