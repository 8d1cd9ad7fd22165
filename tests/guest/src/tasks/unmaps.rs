//! UNMAPS: maps and unmaps a page, again and again, whatever the unit does for others meanwhile.

use super::{Access, Bench, RELEASE};
use crate::{
    calls::{demand, report, sleep},
    memory::PAGES,
    say::Failed,
};
use channel::{Call, call::DEADLINE_US};

const PAGE: u64 = 0x4C00_0000;
/// Between an unmap and the next map, in microseconds.
const PAUSE_US: u64 = 5_000;

/// Reports: unmaps that are done, as it goes on; none may fail.
pub fn run() -> Result<(), Failed> {
    let mut bench = Bench::set_up(0x0B5E55ED, DEADLINE_US)?;
    let assigned = &mut bench.assigned;
    loop {
        assigned.map(PAGE, &PAGES[0], Access::Read)?;
        assigned.unmap(PAGE, 1)?;
        report(&[assigned.unmaps])?;
        sleep(PAUSE_US)?;
        let [task, ..] = demand(Call::Task, [0; 4])?;
        if task == RELEASE {
            return assigned.detach();
        }
    }
}
