//! The guest image: a bare-metal program that runs as a virtual machine, owns PCI devices, speaks the fault channel,
//! maps memory by call and answers page requests.
//!
//! The hypervisor says which task it is to do ([`tasks`]); the guest does it, checks what it can see of it, reports
//! numbers and finishes with its own verdict. What depends on the machine is in one file, [`machine`].
#![no_std]
#![no_main]

#[cfg(not(target_os = "none"))]
compile_error!(
    "the guest image runs on bare metal: cargo build --release -p guest --target x86_64-unknown-none, \
     or --target aarch64-unknown-none-softfloat"
);

mod calls;
mod device;
#[cfg_attr(target_arch = "aarch64", path = "aarch64.rs")]
#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
mod machine;
mod memory;
mod say;
mod serve;
mod tasks;

use core::panic::PanicInfo;

/// Does the guest's task. The machine's entry comes here, with memory, stack and interrupts in order.
fn start() -> ! {
    finish(tasks::run().is_ok())
}

/// Ends the guest with its verdict.
fn finish(passed: bool) -> ! {
    // The hypervisor does not return from this; if it did, there would be nothing left to do.
    let _ = calls::ask(channel::Call::Finish, [passed.into(), 0, 0, 0]);
    machine::stop()
}

#[panic_handler]
fn panicked(info: &PanicInfo<'_>) -> ! {
    match info.location() {
        Some(at) => say!("guest panicked: {}:{}: {}", at.file(), at.line(), info.message()),
        None => say!("guest panicked: {}", info.message()),
    }
    finish(false)
}
