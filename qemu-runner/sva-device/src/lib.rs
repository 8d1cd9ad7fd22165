// SPDX-License-Identifier: GPL-2.0-or-later
//! A PCIe device for stock QEMU that issues real ATS and PRI traffic, as a QEMU plugin. For tests only.
//!
//! `qemu-system-x86_64 -plugin libsva_device.so -device intel-iommu,... -device sva-dev ...`: on being installed, the
//! plugin registers the device type `sva-dev` with QEMU's object model, in time for `-device`. It instruments no code.
//! In an Arm machine with an SMMUv3 it also supplies the PRI queue that QEMU's SMMUv3 lacks: a test double of ours.
//! `README.md` has the registers, the arguments and the limits.
//!
//! | file | about |
//! |---|---|
//! | `registers` | where each register is |
//! | `operation` | what a lane is asked to do, checked; pages, data |
//! | `device` | the state: lanes, page request groups, counters |
//! | `tlb` | the device TLB |
//! | `engine` | what a lane does with its turn |
//! | `endpoint` | the device type, and what QEMU calls |
//! | `priq` | the PRI queue of an SMMUv3 |
//! | `smmu` | what QEMU's SMMUv3 lacks: PRI queue, `CMD_PRI_RESP`, `CMD_ATC_INV` |
//! | `overlay` | puts that in front of QEMU's SMMUv3 |
//! | `qemu` | all that is relied on of QEMU |
#![expect(unsafe_code, reason = "QEMU loads the library and calls it by name, with C strings")]

mod device;
mod endpoint;
mod engine;
mod operation;
mod overlay;
mod priq;
mod qemu;
mod registers;
mod smmu;
mod tlb;

use endpoint::Type;
use overlay::Machine;
use qemu::Qemu;
use std::{
    ffi::{CStr, c_char, c_int, c_void},
    fmt::Arguments,
    io::Write,
    sync::atomic::AtomicI32,
};

/// The plugin interface version that we say we were built for; QEMU 11.1 loads no other.
///
/// Of that interface the plugin uses nothing but its own installation, so another version need not stop a trial: the
/// environment variable `PORTCULLIS_PLUGIN_API` overrides it (on Linux), before QEMU looks.
#[unsafe(no_mangle)]
pub static qemu_plugin_version: AtomicI32 = AtomicI32::new(7);

/// Has the dynamic loader run [`override_version`] before QEMU looks.
#[cfg(target_os = "linux")]
#[used]
// SAFETY: `.init_array` holds pointers to functions of this type.
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = override_version;

/// Takes [`qemu_plugin_version`] from the environment variable `PORTCULLIS_PLUGIN_API`, if that is a number.
#[cfg(target_os = "linux")]
extern "C" fn override_version() {
    if let Some(version) = std::env::var("PORTCULLIS_PLUGIN_API").ok().and_then(|it| it.parse().ok()) {
        qemu_plugin_version.store(version, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Registers the device type; QEMU calls it once, for `-plugin`. Anything but 0 makes QEMU exit.
///
/// # Safety
///
/// `argv` holds `argc` C strings, and this is QEMU's call: after its own types are registered, before the machine is
/// made, under the big QEMU lock.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    _id: u64,
    _info: *const c_void,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    let mut arguments = Vec::new();
    for n in 0..usize::try_from(argc).unwrap_or(0) {
        // SAFETY: there are `argc`, as promised.
        let argument = unsafe { argv.add(n) };
        // SAFETY: the same.
        let argument = unsafe { argument.read() };
        // SAFETY: a C string, as promised, that outlives this call.
        arguments.push(unsafe { CStr::from_ptr(argument) });
    }
    // SAFETY: passed on.
    match unsafe { install(&arguments) } {
        Ok(()) => 0,
        Err(why) => {
            say(format_args!("{why}"));
            1
        }
    }
}

/// # Safety
///
/// As for [`qemu_plugin_install`].
unsafe fn install(arguments: &[&CStr]) -> Result<(), String> {
    let Wanted { verbose, spoiled } = parse(arguments)?;
    // SAFETY: we are in a QEMU whose plugin interface is ours; see the head of `qemu`.
    let qemu = unsafe { Qemu::find() }.map_err(|missing| {
        format!(
            "this QEMU cannot host the test device; it needs {} (QEMU 11.1 or later, built with modules, has them)",
            missing.join(", ")
        )
    })?;
    // SAFETY: QEMU's types are registered and the lock is held, as promised.
    let ids_at = unsafe { qemu.find_ids() }.ok_or(
        "this QEMU cannot host the test device; it needs the devices edu and pci-testdev, and one place where \
         their classes keep the PCI identifiers",
    )?;
    let qemu: &'static Qemu = Box::leak(Box::new(qemu));
    // SAFETY: passed on.
    let machine = unsafe { Machine::new(qemu, verbose, spoiled) };
    // SAFETY: passed on.
    unsafe { endpoint::register(Type { qemu, machine, ids_at, verbose }) };
    Ok(())
}

/// What the arguments ask for.
#[derive(Debug, Default, Eq, PartialEq)]
struct Wanted {
    /// A line per action.
    verbose: bool,
    /// The stream whose answers an SMMU is to refuse.
    spoiled: Option<u32>,
}

fn parse(arguments: &[&CStr]) -> Result<Wanted, String> {
    arguments.iter().try_fold(Wanted::default(), |wanted, argument| {
        let text = argument.to_str().unwrap_or_default();
        let stream = || u32::from_str_radix(text.strip_prefix("spoil=0x")?, 16).ok();
        match (text, stream()) {
            ("verbose=on", _) => Ok(Wanted { verbose: true, ..wanted }),
            ("verbose=off", _) => Ok(Wanted { verbose: false, ..wanted }),
            (_, spoiled @ Some(_)) => Ok(Wanted { spoiled, ..wanted }),
            _ => Err(format!(
                "unknown argument {argument:?}; verbose=on, verbose=off and spoil=0x<stream> are known"
            )),
        }
    })
}

/// Prints one line to the standard error output, if that can be.
fn say(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "sva-dev: {line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_verbose_argument_wins_and_silence_is_the_default() {
        let verbose = |arguments: &[&CStr]| parse(arguments).map(|wanted| wanted.verbose);

        assert_eq!(verbose(&[]), Ok(false));
        assert_eq!(verbose(&[c"verbose=on"]), Ok(true));
        assert_eq!(verbose(&[c"verbose=on", c"verbose=off"]), Ok(false));
    }

    #[test]
    fn a_stream_whose_answers_are_spoiled_is_named_in_hexadecimal() {
        assert_eq!(parse(&[c"spoil=0x18"]), Ok(Wanted { verbose: false, spoiled: Some(0x18) }));
        assert!(parse(&[c"spoil=24"]).is_err() && parse(&[c"spoil=0x"]).is_err());
    }

    #[test]
    fn an_unknown_argument_is_refused_by_name() {
        let refusal = parse(&[c"verbose=on", c"loud"]).expect_err("it is unknown");

        assert!(refusal.contains("\"loud\""), "{refusal}");
    }
}
