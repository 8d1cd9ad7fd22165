//! FLOOD: fills the queue of page requests while nobody takes any, and repairs what was asked for before.

use super::{Access, Bench, DEVICE, RELEASE};
use crate::{
    calls::{counters, demand, report, sleep_until},
    device::{NOT_LAST, RAW, REQUEST_REFUSED, Status},
    ensure,
    memory::PAGES,
    say,
    say::Failed,
};
use channel::{Call, Code, call::DEADLINE_MAX_US, counters::Counter};
use iommu::PAGE_SIZE;

/// What the device reads; it asks for each page in a group of its own.
const READ: u64 = 0x4900_0000;
const READS: u64 = 4;
/// What it asks for without ever ending a group: more requests than any queue here has room for.
const ASKED: u64 = 0x4A00_0000;
const OPERATIONS: u32 = 20;
const PAGES_EACH: u64 = 16;
const LANE: u64 = 5;
const LAST_LANE: u64 = 6;
const STEP_US: u64 = 1_000;
const STEPS: u64 = 2_000;

/// Reports: 1, when it waits for the task to become [`RELEASE`]; 2, when the queue is full; then requests of the groups that
/// never end, operations that the unit refused, whole groups, answers, stray answers.
pub fn run() -> Result<(), Failed> {
    let mut bench = Bench::set_up(0xF100D, DEADLINE_MAX_US)?;
    report(&[1])?;
    sleep_until(STEP_US, STEPS, || {
        let [task, ..] = demand(Call::Task, [0; 4])?;
        Ok((task == RELEASE).then_some(()))
    })?;

    for lane in 0..READS {
        PAGES[lane as usize].fill(lane);
        bench.assigned.start_read(lane, READ + lane * PAGE_SIZE, 0)?;
    }
    let device = &bench.assigned.device;
    sleep_until(STEP_US, STEPS, || Ok((device.groups() == READS).then_some(())))?;
    let (mut requests, mut refused) = (0, 0);
    for _ in 0..OPERATIONS {
        bench.assigned.start(LANE, ASKED, (PAGES_EACH * PAGE_SIZE) as u32, 0, RAW | NOT_LAST)?;
        refused += u64::from(refused_or_done(&bench, LANE)?);
        requests += u64::from(bench.assigned.device.pages(LANE));
    }
    // A whole group that finds the queue full: the unit answers it, or does not take it.
    bench.assigned.start(LAST_LANE, ASKED, PAGE_SIZE as u32, 0, RAW)?;
    refused += u64::from(refused_or_done(&bench, LAST_LANE)?);
    report(&[2])?;

    let Bench { server, assigned } = &mut bench;
    server.serve(READS, |group| {
        let iova = group.requests.first().map_or(0, |request| request.iova.0);
        let lane = iova.wrapping_sub(READ) / PAGE_SIZE;
        ensure!(lane < READS, "a group asks for {iova:#x}, which no lane reads");
        assigned.check_requests(group, &[iova], Access::Read)?;
        assigned.map(iova, &PAGES[lane as usize], Access::Read)?;
        Ok(Code::Success)
    })?;
    for lane in 0..READS {
        assigned.expect_read(lane, &PAGES[lane as usize])?;
    }
    assigned.unmap(READ, READS)?;

    // What was half seen goes with what was lost, while its device is still attached: soon, since the service core comes to the
    // loss behind the groups that were just repaired.
    let discarded = || Ok((counters(DEVICE)?.get(Counter::Discarded) > 0).then_some(()));
    ensure!(sleep_until(STEP_US, STEPS, discarded)?.is_some(), "an overflow discarded no half-seen group");
    ensure!(counters(DEVICE)?.get(Counter::Overflows) > 0, "nobody counted an overflow");

    // The queue takes requests again.
    assigned.start_read(0, READ, 0)?;
    let group = bench.wait_read(READ)?;
    bench.assigned.repair_read(&group, 0, READ, &PAGES[0])?;
    bench.assigned.detach()?;
    let device = &bench.assigned.device;
    let outstanding = device.outstanding();
    ensure!(outstanding == 0, "{outstanding} groups have no answer");
    report(&[3, requests, refused, device.groups(), device.responses(), device.stray()])
}

/// Waits for `lane`; returns whether the unit refused what it asked for.
fn refused_or_done(bench: &Bench, lane: u64) -> Result<bool, Failed> {
    let status = bench.assigned.device.wait(lane)?;
    let refused = status.is_failure(REQUEST_REFUSED);
    if !refused && status != Status::Done {
        say!("lane {lane} ended as {status:?}");
        return Err(Failed);
    }
    Ok(refused)
}
