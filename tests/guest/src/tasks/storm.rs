//! STORM: has its device write where nothing is mapped, until it is blocked for that.

use super::{Bench, DEVICE};
use crate::{
    calls::{report, sleep},
    device::{DMA_ERROR, UNTRANSLATED, WRITE},
    ensure,
    say::Failed,
};
use channel::{
    call::NONE,
    record::{Event, Reason},
};
use iommu::{Iova, PAGE_SIZE, Perms};

const OPAQUE: u64 = 0x57_0231;
/// Where the lanes write, each to a page of its own.
const AT: u64 = 0x5300_0000;
/// Lanes that write at once.
const LANES: u64 = 8;
/// Rounds of all lanes, at most, until the device is blocked; those in which the guest does not listen, and those that follow.
const ROUNDS: u64 = 4_000;
const DEAF_ROUNDS: u64 = 400;
const FURTHER: u64 = 8;
/// How long the guest listens in the end, in microseconds.
const LISTEN_US: u64 = 50_000;

/// What the guest was told.
#[derive(Default)]
struct Told {
    faults: u64,
    too_many: u64,
    blocked: u64,
}

/// Reports: writes, faults told before the device was blocked, warnings, times that it was blocked, events lost, faults told
/// afterwards.
pub fn run() -> Result<(), Failed> {
    let mut bench = Bench::set_up(OPAQUE, NONE)?;
    let (mut told, mut writes) = (Told::default(), 0);
    while told.too_many == 0 && writes < ROUNDS * LANES {
        writes += refused_writes(&bench)?;
        listen(&mut bench, &mut told)?;
    }
    // That the device is blocked is told although there is no room for it when it happens.
    for _ in 0..DEAF_ROUNDS {
        writes += refused_writes(&bench)?;
    }
    while told.blocked == 0 && writes < ROUNDS * LANES {
        listen(&mut bench, &mut told)?;
        writes += refused_writes(&bench)?;
    }
    ensure!(told.blocked == 1, "after {writes} refused writes the device is not blocked");
    ensure!(told.too_many == 1, "{} warnings", told.too_many);
    let before = told.faults;
    for _ in 0..FURTHER {
        writes += refused_writes(&bench)?;
        listen(&mut bench, &mut told)?;
    }
    sleep(LISTEN_US)?;
    listen(&mut bench, &mut told)?;
    let after = told.faults - before;
    ensure!(
        (told.blocked, after) == (1, 0),
        "{} times blocked, {after} faults told afterwards",
        told.blocked
    );
    bench.assigned.detach()?;
    report(&[writes, before, told.too_many, told.blocked, bench.server.events_lost(), after])
}

/// Has each lane write once; returns how many that are.
fn refused_writes(bench: &Bench) -> Result<u64, Failed> {
    for lane in 0..LANES {
        bench.assigned.start(lane, AT + lane * PAGE_SIZE, 8, 0xBAD, UNTRANSLATED | WRITE)?;
    }
    for lane in 0..LANES {
        bench.assigned.device.expect_failure(lane, DMA_ERROR)?;
    }
    Ok(LANES)
}

/// Takes what the channel has.
fn listen(bench: &mut Bench, told: &mut Told) -> Result<(), Failed> {
    while let Some(event) = bench.server.next_event() {
        let Event { device, reason, iova, pasid, perms, .. } = event;
        ensure!(u64::from(device) == DEVICE, "an event of device {device}");
        match reason {
            Reason::TooMany | Reason::Blocked => {
                let is_bare = (iova, pasid, perms) == (Iova(0), None, Perms::default());
                ensure!(is_bare, "a device as a whole has no address: {:#x}", iova.0);
                told.too_many += u64::from(reason == Reason::TooMany);
                told.blocked += u64::from(reason == Reason::Blocked);
            }
            _ => told.faults += 1,
        }
    }
    Ok(())
}
