//! Everything that is x86 about the machine.
//!
//! `hv` imports this crate as `arch`, and the crate of the other architecture has the same names, so nothing here that
//! is public speaks of x86. It boots ([`machine`] says what the boot loader found), runs the cores ([`cpu`]), delivers
//! interrupts ([`interrupts`]), reaches devices and memory ([`bus`]), logs ([`console`]) and runs guests ([`guest`]).
//!
//! It assumes of the hardware: long mode with no-execute pages, an APIC, an invariant TSC that firmware left equal on all
//! cores, and coherent DMA (as x86 has). A PVH boot loader enters the image; from then on it takes nothing from firmware
//! but tables.
//!
//! The binary that links it defines the one function that it calls, and links with `linker/x86_64.ld`:
//!
//! ```ignore
//! #[unsafe(no_mangle)]
//! fn hypervisor(boot: arch::machine::Boot) -> ! {
//!     arch::interrupts::init_core();
//!     defmt::info!("{} cores", arch::cpu::cores_present());
//!     arch::cpu::exit(true)
//! }
//! ```
//!
//! | feature | supported | note |
//! |---|---|---|
//! | PVH boot | yes | ELF note `XEN_ELFNOTE_PHYS32_ENTRY`; version 1 of the start info, for its memory map |
//! | memory above 4 GiB | no | the page tables map the first 4 GiB, each address to itself |
//! | x2APIC | yes | xAPIC where it is missing; cores with an APIC ID above 254 are left alone |
//! | TSC frequency | yes | CPUID leaf 0x15, else measured against channel 2 of the PIT |
//! | guests: AMD SVM | yes | nested paging; next-RIP, decode assists and flush by ASID are not needed |
//! | guests: Intel VMX | no | |
#![no_std]
#![cfg(target_os = "none")]

mod apic;
pub mod bus;
mod clock;
pub mod console;
pub mod cpu;
mod entry;
pub mod guest;
pub mod interrupts;
pub mod machine;
mod machine_check;
mod paging;
mod segments;
pub mod unit;
