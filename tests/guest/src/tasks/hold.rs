//! HOLD: keeps a group outstanding, so that another guest can try to answer it, until told to go on.

use super::{Bench, RELEASE};
use crate::{
    calls::{demand, report, sleep_until},
    ensure,
    memory::PAGES,
    say::Failed,
};
use channel::{Call, call::DEADLINE_MAX_US};

const PAGE: u64 = 0x4300_0000;
const STEP_US: u64 = 10_000;
const STEPS: u64 = 300;

/// Reports: the cookie of the group, as soon as it is outstanding; then 1, when the device was repaired; stray responses.
pub fn run() -> Result<(), Failed> {
    // The group outlives the default deadline.
    let mut bench = Bench::set_up(0x401D, DEADLINE_MAX_US)?;
    PAGES[0].fill(1);
    bench.assigned.start_read(0, PAGE, 0)?;
    let group = bench.wait_read(PAGE)?;
    report(&[group.cookie])?;

    sleep_until(STEP_US, STEPS, || {
        let [task, ..] = demand(Call::Task, [0; 4])?;
        Ok((task == RELEASE).then_some(()))
    })?;

    bench.assigned.expect_busy(0)?;
    bench.assigned.repair_read(&group, 0, PAGE, &PAGES[0])?;
    bench.assigned.unmap(PAGE, 1)?;
    bench.assigned.detach()?;
    let stray = bench.assigned.device.stray();
    report(&[group.cookie, 1, stray])?;
    ensure!(stray == 0, "{stray} responses that the device did not wait for");
    Ok(())
}
