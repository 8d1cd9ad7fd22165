//! The reference hypervisor: two guests, each with devices of its own that may fault, on one IOMMU.
//!
//! Core 0 serves the unit: its interrupts and its deadline timer come here ([`service`]), and between them it runs the
//! demonstration ([`scenes`]). Each other core is the home of one guest ([`guest`]).
#![cfg_attr(target_os = "none", no_std, no_main)]
#![cfg_attr(
    feature = "measure",
    expect(dead_code, reason = "what is measured has no home cores and shows no scenes")
)]

#[cfg(not(target_os = "none"))]
compile_error!(
    "hv is an image for a machine without an operating system: `cargo run` builds and boots it, and \
     `cargo build -p hv --target x86_64-unknown-none` builds it alone"
);

mod control;
#[cfg(not(feature = "measure"))]
mod engine;
mod forward;
mod guest;
mod hypercall;
mod hypervisor;
#[cfg(feature = "measure")]
mod measure;
mod memory;
mod pager;
#[cfg(not(feature = "measure"))]
mod restart;
#[cfg(not(feature = "measure"))]
mod scenes;
mod service;
mod tables;
mod wanted;

use arch::{cpu, interrupts, machine::Boot, unit};
use hypervisor::{Hypervisor, POOL, Told};
use pcie::Function;

/// Where `arch` hands over, on the core that booted: our own tables and stack, interrupts masked.
#[expect(unsafe_code, reason = "names the symbol that arch calls")]
#[unsafe(no_mangle)]
fn hypervisor(boot: Boot) -> ! {
    defmt::info!("Portcullis, {=usize} cores", cpu::cores_present());
    match bring_up(boot) {
        Ok(brought_up) => cpu::exit(run(&brought_up)),
        Err(what) => {
            defmt::error!("bring-up stopped: {}", what);
            cpu::exit(false)
        }
    }
}

/// Why there is no hypervisor.
#[derive(defmt::Format)]
enum Failure {
    Machine(arch::machine::Error),
    Unit(unit::Error),
    Service(service::Failure),
    #[cfg(not(feature = "measure"))]
    Before(restart::Failure),
    NoGuestImage,
    TooFewCores {
        present: usize,
        needed: usize,
    },
}

/// A machine in service.
struct BroughtUp {
    hv: &'static Hypervisor,
    /// Where the unit's registers are.
    #[cfg(feature = "measure")]
    unit: core::ops::Range<iommu::PhysAddr>,
    /// Ticks from looking for the unit until every device was blocked.
    #[cfg(feature = "measure")]
    ticks: u64,
}

/// Does what the image is for; returns whether all went as expected.
#[cfg(not(feature = "measure"))]
fn run(brought_up: &BroughtUp) -> bool {
    scenes::run(brought_up.hv)
}

/// Does what the image is for; returns whether all could be measured.
#[cfg(feature = "measure")]
fn run(brought_up: &BroughtUp) -> bool {
    measure::run(brought_up.hv, brought_up.unit.clone(), brought_up.ticks)
}

/// Takes the machine into service. From the moment when the unit is enabled no device reaches memory.
fn bring_up(boot: Boot) -> Result<BroughtUp, Failure> {
    interrupts::init_core();
    let needed = if cfg!(feature = "measure") { 1 } else { 1 + hypervisor::GUESTS };
    if cpu::cores_present() < needed {
        return Err(Failure::TooFewCores { present: cpu::cores_present(), needed });
    }
    arch::guest::supported().map_err(Failure::Machine)?;

    // What firmware let devices do ends before the unit can stop them itself.
    let config = boot.config_space().map_err(Failure::Machine)?;
    for function in Function::on_bus_0(&config) {
        function.disable_page_requests(&config);
        function.disable_messages(&config);
        function.disable_bus_master(&config);
    }

    #[cfg(feature = "measure")]
    let start = cpu::ticks();
    let found = unit::find(&boot).map_err(Failure::Unit)?;
    let (capabilities, registers) = (found.capabilities(), found.registers());
    defmt::info!("IOMMU: {}", capabilities);
    POOL.with(|pool| pool.adopt(boot.memory(), found.bus()));
    #[cfg(not(feature = "measure"))]
    restart::live(&boot, &config).map_err(Failure::Before)?;
    let mut unit = found.enable(|frames| memory::cut(&POOL, frames)).map_err(Failure::Unit)?;
    #[cfg(feature = "measure")]
    let ticks = cpu::ticks() - start;
    defmt::info!("unit enabled: every device is blocked");
    unit.serve_messages(&boot, |frames| memory::cut(&POOL, frames));

    let image = boot.guest_image_bytes().ok_or(Failure::NoGuestImage)?;
    let unit::Unit { events, commands, tables, remapping } = unit;
    #[cfg(feature = "measure")]
    let unit = registers.clone();
    let told = Told { commands, tables, remapping };
    let hv = Hypervisor::publish(boot, config, registers, capabilities, told, image);
    service::start(hv, events).map_err(Failure::Service)?;
    if !cfg!(feature = "measure") {
        for index in 0..hypervisor::GUESTS {
            cpu::start(hypervisor::home_of(index), guest::home).map_err(Failure::Machine)?;
        }
    }
    cpu::unmask_forever();
    Ok(BroughtUp {
        hv,
        #[cfg(feature = "measure")]
        unit,
        #[cfg(feature = "measure")]
        ticks,
    })
}
