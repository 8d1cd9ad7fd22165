//! RESTRAINT: leaves its device's requests unanswered, again and again, until it may ask for no more.

use super::{Bench, DEVICE, REFUSED};
use crate::{
    calls::{counters, report, sleep, sleep_until},
    device::{INVALID_RESPONSE, REQUEST_REFUSED, Status},
    ensure,
    memory::PAGES,
    say::Failed,
    serve::respond,
};
use channel::{Code, counters::Counter};
use iommu::PAGE_SIZE;

const PAGES_ASKED: [u64; 2] = [0x4800_0000, 0x4800_2000];
const DEADLINE_US: u64 = 20_000;
const STEP_US: u64 = 5_000;
const STEPS: u64 = 100;

/// What the guest did, and saw.
#[derive(Default)]
struct Done {
    silent: u64,
    late: u64,
    in_time: u64,
    refused_at_once: u64,
}

/// Reports: groups left unanswered, late answers refused, groups answered in time, groups refused at once, the device's
/// groups, stray responses.
pub fn run() -> Result<(), Failed> {
    let mut bench = Bench::set_up(0x4E57_4A17, DEADLINE_US)?;
    let mut done = Done::default();
    // Were the warning after the first not lifted, the fourth would throttle the device.
    unanswered(&mut bench, &mut done, 1)?;
    one_in_time(&mut bench, &mut done)?;
    unanswered(&mut bench, &mut done, 3)?;
    two_at_once(&mut bench, &mut done)?;
    unanswered(&mut bench, &mut done, 4)?;
    one_at_a_time(&mut bench, &mut done)?;
    two_at_once(&mut bench, &mut done)?;
    unanswered(&mut bench, &mut done, 15)?;
    asleep_when_it_is_too_many(&mut bench, &mut done)?;
    none_any_more(&mut bench)?;
    bench.assigned.detach()?;
    // What the guest attaches again is the same device, which has not been reset.
    bench.assigned.attach_again(DEADLINE_US)?;
    none_any_more(&mut bench)?;

    let device = &bench.assigned.device;
    let (groups, stray) = (device.groups(), device.stray());
    let counters = counters(DEVICE)?;
    for (counter, expected) in [
        (Counter::Groups, groups),
        (Counter::Expired, done.silent),
        (Counter::Late, done.late),
        (Counter::Succeeded, done.in_time),
        (Counter::Refused, done.refused_at_once),
        (Counter::Outstanding, 0),
    ] {
        let counted = counters.get(counter);
        ensure!(counted == expected, "{counter:?}: {expected} by the guest's own count, {counted} counted");
    }
    bench.assigned.detach()?;
    report(&[done.silent, done.late, done.in_time, done.refused_at_once, groups, stray])?;
    ensure!(stray == 0, "{stray} responses that the device did not wait for");
    Ok(())
}

/// Leaves `times` groups unanswered, one after the other, until somebody else answers; then answers.
fn unanswered(bench: &mut Bench, done: &mut Done, times: u64) -> Result<(), Failed> {
    for _ in 0..times {
        bench.assigned.start_read(0, PAGES_ASKED[0], 0)?;
        let group = bench.wait_read(PAGES_ASKED[0])?;
        done.silent += 1;
        let device = &bench.assigned.device;
        sleep_until(STEP_US, STEPS, || Ok((device.status(0) != Status::Busy).then_some(())))?;
        device.expect_failure(0, INVALID_RESPONSE)?;
        let answered = respond(&[group.answer(Code::Success)])?;
        ensure!(answered == REFUSED, "a late answer: {answered:?}");
        done.late += 1;
    }
    Ok(())
}

fn one_in_time(bench: &mut Bench, done: &mut Done) -> Result<(), Failed> {
    bench.assigned.start_read(0, PAGES_ASKED[0], 0)?;
    let group = bench.wait_read(PAGES_ASKED[0])?;
    bench.assigned.repair_read(&group, 0, PAGES_ASKED[0], &PAGES[0])?;
    done.in_time += 1;
    bench.assigned.unmap(PAGES_ASKED[0], 1)
}

/// The device is not throttled: two groups wait for their answers at the same time.
fn two_at_once(bench: &mut Bench, done: &mut Done) -> Result<(), Failed> {
    for (lane, iova) in (0..).zip(PAGES_ASKED) {
        bench.assigned.start_read(lane, iova, 0)?;
    }
    for (at, group) in bench.wait_reads(PAGES_ASKED)? {
        bench.assigned.repair_read(&group, at as u64, PAGES_ASKED[at], &PAGES[at])?;
        done.in_time += 1;
    }
    PAGES_ASKED.into_iter().try_for_each(|iova| bench.assigned.unmap(iova, 1))
}

/// The device is throttled: while one group waits, another is refused at once. Answering the one in time lifts that.
fn one_at_a_time(bench: &mut Bench, done: &mut Done) -> Result<(), Failed> {
    bench.assigned.start_read(0, PAGES_ASKED[0], 0)?;
    let group = bench.wait_read(PAGES_ASKED[0])?;
    bench.assigned.start_read(1, PAGES_ASKED[1], 0)?;
    bench.assigned.device.expect_failure(1, INVALID_RESPONSE)?;
    done.refused_at_once += 1;
    ensure!(bench.server.next_group()?.is_none(), "a throttled device has two groups at once");
    bench.assigned.repair_read(&group, 0, PAGES_ASKED[0], &PAGES[0])?;
    done.in_time += 1;
    bench.assigned.unmap(PAGES_ASKED[0], 1)
}

/// Leaves the last group unanswered that the device may, asleep: nothing but a kick makes its home core take the device's
/// page requests away before the other lane asks.
fn asleep_when_it_is_too_many(bench: &mut Bench, done: &mut Done) -> Result<(), Failed> {
    bench.assigned.start_read(0, PAGES_ASKED[0], 0)?;
    let group = bench.wait_read(PAGES_ASKED[0])?;
    let assigned = &bench.assigned;
    let other = assigned.operation(PAGES_ASKED[1], PAGE_SIZE as u32, 0, 0);
    assigned.device.start_after(2 * DEADLINE_US as u32, 1, &other)?;
    sleep(4 * DEADLINE_US)?;
    done.silent += 1;
    assigned.device.expect_failure(0, INVALID_RESPONSE)?;
    assigned.device.expect_failure(1, REQUEST_REFUSED)?;
    let answered = respond(&[group.answer(Code::Success)])?;
    ensure!(answered == REFUSED, "a late answer: {answered:?}");
    done.late += 1;
    Ok(())
}

/// The device's page requests are off.
fn none_any_more(bench: &mut Bench) -> Result<(), Failed> {
    bench.assigned.start_read(0, PAGES_ASKED[0], 0)?;
    bench.assigned.device.expect_failure(0, REQUEST_REFUSED)?;
    ensure!(bench.server.next_group()?.is_none(), "a device whose requests are off has one");
    Ok(())
}
