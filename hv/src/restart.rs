//! A life of the hypervisor before this one, whose unit was left on: what a hypervisor finds that was started in place of
//! another (`kexec`), with devices that go on.
//!
//! The command line asks for it by `restart=warm`. The life before takes the unit into service, gives tables to two devices
//! and has them write again and again; then it is over, without a word to unit or devices. Bring-up comes next, as always.

use crate::{
    POOL,
    engine::{Engine, LANES},
    memory::{self, GuestRam},
    tables::{DeviceTables, Stage},
    wanted,
};
use arch::{
    cpu::{self, Locked},
    machine::{Boot, Ecam},
    unit,
};
use heapless::Vec;
use iommu::{
    Commands as _, Completion, Features, Gpa, Invalidation, Iova, PAGE_SIZE, Perms, StreamId, Tables as _,
};
use pcie::Function;

/// Where the devices see the page that they are given.
pub const AT: Iova = Iova(0x4300_0000);
/// What lane n writes, less n.
pub const WORD: u64 = 0xBEF0_4E00;
/// When the first lane of each device writes, in microseconds from its start.
const FIRST_US: u32 = 10;
/// How long the unit may take for an invalidation, in microseconds.
const LIMIT_US: u64 = 100_000;

/// What is left of the life before.
pub struct Before {
    /// A device that writes into the page that it was given, and one that writes to physical addresses.
    pub engines: [Engine; 2],
    /// The devices.
    pub functions: [Function; 2],
    /// The page that both were given.
    pub page: GuestRam,
    /// A page that no device was given.
    pub other: GuestRam,
}

/// What is left, until a scene looks at it.
pub static BEFORE: Locked<Option<Before>> = Locked::new(None);

/// Why the life before was none.
#[derive(Clone, Copy, Debug, defmt::Format)]
pub enum Failure {
    /// The unit.
    Unit(unit::Error),
    /// The unit, in service.
    Service(iommu::Error),
    /// The tables.
    Tables(pgtable::Error),
    /// There are no two devices of the kind `sva-dev` in reach.
    NoDevices,
    /// There is no memory.
    NoMemory,
}

/// Lives, if the command line asks for that.
pub fn live(boot: &Boot, config: &Ecam) -> Result<(), Failure> {
    if wanted::value(boot.command_line(), "restart") != Some("warm") {
        return Ok(());
    }
    let found = unit::find(boot).map_err(Failure::Unit)?;
    let stage = Stage::of(&found.capabilities(), boot.command_line());
    let start_us = cpu::now_us();
    let unit = found.enable(|frames| memory::cut(&POOL, frames)).map_err(Failure::Unit)?;
    let took_us = cpu::now_us().saturating_sub(start_us);
    // The next bring-up takes about as long, however the hypervisor was compiled: half of the writes fall into it.
    let step_us = (took_us * 2 / LANES as u64).clamp(1, 10_000) as u32;
    let unit::Unit { mut commands, mut tables, .. } = unit;
    let page = GuestRam::new(&POOL, 1).ok_or(Failure::NoMemory)?;
    let other = GuestRam::new(&POOL, 1).ok_or(Failure::NoMemory)?;
    let functions: Vec<Function, 2> =
        Function::on_bus_0(config).filter(Function::has_page_requests).take(2).collect();
    let functions = functions.into_array::<2>().map_err(|_| Failure::NoDevices)?;
    let engine = |function| Engine::new(config, function).ok_or(Failure::NoDevices);
    let engines = [engine(&functions[0])?, engine(&functions[1])?];
    for function in &functions {
        give(&mut commands, &mut tables, stage, function.id, &page)?;
        function.enable_bus_master(config);
    }
    for lane in 0..LANES {
        let delay_us = FIRST_US + lane as u32 * step_us;
        let (offset, word) = (lane as u64 * 8, WORD + lane as u64);
        for (engine, base) in engines.iter().zip([AT.0, other.phys().0]) {
            engine.start(lane, Iova(base + offset), word, Engine::PLAIN_WRITE, delay_us);
        }
    }
    BEFORE.with(|before| *before = Some(Before { engines, functions, page, other }));
    Ok(())
}

/// Gives `stream` the page, by tables that stay for ever: the unit may walk them until it is told otherwise.
fn give(
    commands: &mut unit::Commands,
    tables: &mut unit::Tables,
    stage: Stage,
    stream: StreamId,
    page: &GuestRam,
) -> Result<(), Failure> {
    let assigned = tables.assign(stream, Features::default()).map_err(Failure::Service)?;
    invalidate(commands, &assigned)?;
    let grant = page.grant(Gpa(0), PAGE_SIZE).ok_or(Failure::NoMemory)?;
    let tree = POOL.with(|pool| {
        let tree = DeviceTables::new(pool, stage)?;
        tree.map(pool, AT.0, &grant, Perms::READ_WRITE).map(|()| tree)
    });
    let translation = tree.map_err(Failure::Tables)?.translation();
    let (_, attached) = tables.attach(stream, None, translation).map_err(Failure::Service)?;
    invalidate(commands, &attached)
}

fn invalidate(commands: &mut unit::Commands, invalidations: &[Invalidation]) -> Result<(), Failure> {
    let ticket = commands.submit(invalidations).map_err(Failure::Service)?;
    let start_us = cpu::now_us();
    while commands.poll(ticket) != Completion::Done {
        let waited_us = cpu::now_us().saturating_sub(start_us);
        if waited_us >= LIMIT_US {
            let register = "the invalidation queue";
            return Err(Failure::Service(iommu::Error::Timeout { register, waited_us }));
        }
        cpu::relax();
    }
    Ok(())
}
