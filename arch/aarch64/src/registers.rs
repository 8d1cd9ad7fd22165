//! System registers that `aarch64-cpu` does not have, in its way: a constant with `get` and `set`.
//!
//! As there, both are safe functions. What the registers can do to memory safety is said where they are used.
#![expect(unsafe_code, reason = "system registers are reached by instructions")]

use core::arch::asm;

macro_rules! registers {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {$(
        $(#[$doc])*
        #[expect(non_camel_case_types, reason = "the manual's name")]
        pub(crate) struct $name;

        #[expect(dead_code, reason = "not every register is both read and written")]
        impl $name {
            /// Reads the register.
            pub(crate) fn get(&self) -> u64 {
                let value;
                // SAFETY: reading it touches no memory.
                unsafe { asm!(concat!("mrs {}, ", $text), out(reg) value, options(nostack)) };
                value
            }

            /// Writes the register.
            pub(crate) fn set(&self, value: u64) {
                // SAFETY: the write itself touches no memory of Rust's.
                unsafe { asm!(concat!("msr ", $text, ", {}"), in(reg) value, options(nostack)) };
            }
        }
    )*};
}

registers! {
    /// Compare value of the EL2 physical timer.
    CNTHP_CVAL_EL2 = "cnthp_cval_el2";
    /// Data cache geometry.
    CTR_EL0 = "ctr_el0";
    /// Extended configuration of EL2; zeros make what it speaks of trap.
    HCRX_EL2 = "s3_4_c1_c2_2";
    /// Traps of 32-bit system registers.
    HSTR_EL2 = "hstr_el2";
    /// Which priority groups are told apart.
    ICC_BPR1_EL1 = "icc_bpr1_el1";
    /// How this core's interface to the interrupt controller works.
    ICC_CTLR_EL1 = "icc_ctlr_el1";
    /// Ends an interrupt of group 1.
    ICC_EOIR1_EL1 = "icc_eoir1_el1";
    /// Takes the highest interrupt of group 1 that is pending.
    ICC_IAR1_EL1 = "icc_iar1_el1";
    /// Opens group 1.
    ICC_IGRPEN1_EL1 = "icc_igrpen1_el1";
    /// Which priorities interrupt.
    ICC_PMR_EL1 = "icc_pmr_el1";
    /// What a guest reads as `MIDR_EL1`.
    VPIDR_EL2 = "vpidr_el2";
    /// Sends an interrupt of group 1 to other cores.
    ICC_SGI1R_EL1 = "icc_sgi1r_el1";
    /// Whether EL1 uses system registers for its interrupts.
    ICC_SRE_EL1 = "icc_sre_el1";
}
