//! SILENCE: whoever does not answer is answered for, at the deadline; the late answer is refused.

use super::{Bench, REFUSED};
use crate::{
    calls::{report, sleep_until},
    device::{INVALID_RESPONSE, Status},
    ensure,
    memory::PAGES,
    say::Failed,
    serve::respond,
};
use channel::{Code, call::NONE};

const PAGE: u64 = 0x4100_0000;
const SHORT_DEADLINE_US: u64 = 20_000;
const STEP_US: u64 = 10_000;
const STEPS: u64 = 100;

/// What was seen of groups that the guest did not answer.
#[derive(Default)]
struct Seen {
    silent_groups: u64,
    late_answers_refused: u64,
    lanes_failed: u64,
}

/// Reports: groups not answered, late answers refused, lanes that failed, stray responses.
pub fn run() -> Result<(), Failed> {
    let mut bench = Bench::set_up(0x51_1E4CE, NONE)?;
    let mut seen = Seen::default();
    let default = unanswered_read(&mut bench, &mut seen)?;
    bench.assigned.detach()?;
    bench.assigned.attach_again(SHORT_DEADLINE_US)?;
    let short = unanswered_read(&mut bench, &mut seen)?;
    ensure!(short < default, "the default deadline took {default} steps, one of 20 ms {short}");

    PAGES[0].fill(1);
    bench.assigned.start_read(0, PAGE, 0)?;
    let group = bench.wait_read(PAGE)?;
    bench.assigned.repair_read(&group, 0, PAGE, &PAGES[0])?;
    bench.assigned.unmap(PAGE, 1)?;
    bench.assigned.detach()?;

    let stray = bench.assigned.device.stray();
    ensure!(stray == 0, "{stray} responses that the device did not wait for");
    report(&[seen.silent_groups, seen.late_answers_refused, seen.lanes_failed, stray])
}

/// Leaves a page request unanswered until the lane fails, then answers; returns how many steps that took.
fn unanswered_read(bench: &mut Bench, seen: &mut Seen) -> Result<u64, Failed> {
    bench.assigned.start_read(0, PAGE, 0)?;
    let group = bench.wait_read(PAGE)?;
    seen.silent_groups += 1;
    let device = &bench.assigned.device;
    let mut steps = 0;
    let ended = sleep_until(STEP_US, STEPS, || {
        steps += 1;
        Ok((device.status(0) != Status::Busy).then_some(()))
    })?;
    ensure!(ended.is_some(), "nobody answered for the guest within {} ms", STEPS * STEP_US / 1000);
    device.expect_failure(0, INVALID_RESPONSE)?;
    seen.lanes_failed += 1;
    let answered = respond(&[group.answer(Code::Success)])?;
    ensure!(answered == REFUSED, "a late answer: {answered:?}");
    seen.late_answers_refused += 1;
    Ok(steps)
}
