//! Everything that is Arm about the machine.
//!
//! `hv` imports this crate as `arch`, and the crate of the other architecture has the same names, so nothing here that
//! is public speaks of Arm. It boots ([`machine`] says what the boot loader found), runs the cores ([`cpu`]), delivers
//! interrupts ([`interrupts`]), reaches devices and memory ([`bus`]), logs ([`console`]) and runs guests ([`guest`]).
//!
//! It runs at EL2 with `HCR_EL2.E2H` = 0. It assumes of the hardware: Armv8.0 with EL2, GICv3 with its system registers,
//! a PL011, PSCI through SMC, and a device tree that describes them. A boot loader enters the image by the arm64 Linux
//! boot protocol, or as an ELF file; from then on it takes nothing from firmware but the device tree and PSCI.
//!
//! The binary that links it defines the one function that it calls, and links with `linker/aarch64.ld`:
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
//! | arm64 Linux boot protocol | yes | the image runs where it is linked alone, at `0x4020_0000` |
//! | ELF, by QEMU | yes | the device tree is then at `0x4000_0000`, and QEMU hands over no `-initrd` |
//! | device tree | yes | version 17; buses that translate addresses are not searched |
//! | ACPI | no | |
//! | RAM | yes | in whole blocks of 2 MiB, below 512 GiB |
//! | GICv3 | yes | SPIs, PPIs, SGIs of group 1; messages of devices by one ITS, 32 of them, for the hypervisor alone |
//! | PCI | bus 0 | base address registers are assigned where firmware assigned none |
//! | guests | yes | AArch64 EL1; 4-level stage 2, 44-bit addresses |
#![no_std]
#![cfg(target_os = "none")]

pub mod bus;
mod clock;
pub mod console;
pub mod cpu;
mod ecam;
mod entry;
mod gic;
pub mod guest;
pub mod interrupts;
mod its;
pub mod machine;
mod paging;
mod psci;
mod registers;
mod tree;
pub mod unit;
