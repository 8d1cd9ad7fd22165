//! NEIGHBOUR: repairs its device's faults, one after the other, whatever becomes of another guest's device.

use super::{Bench, DEVICE, RELEASE};
use crate::{
    calls::{counters, demand, report, sleep},
    ensure,
    memory::PAGES,
    say::Failed,
};
use channel::{Call, call::NONE, counters::Counter};
use iommu::PAGE_SIZE;

/// The page of the first read; each further one is of the next page, so that no repair looks like none.
const FIRST_PAGE: u64 = 0x4700_0000;
/// Between two reads, in microseconds.
const PAUSE_US: u64 = 2_000;
/// Most reads.
const READS: u64 = 3_000;

/// Reports: groups repaired so far; at the end, also stray responses. Ends when the task becomes [`RELEASE`].
pub fn run() -> Result<(), Failed> {
    let mut bench = Bench::set_up(0x4E1_6B0, NONE)?;
    for read in 0..READS {
        let [task, ..] = demand(Call::Task, [0; 4])?;
        if task == RELEASE {
            break;
        }
        let iova = FIRST_PAGE + read * PAGE_SIZE;
        PAGES[0].fill(read);
        bench.assigned.start_read(0, iova, 0)?;
        let group = bench.wait_read(iova)?;
        bench.assigned.repair_read(&group, 0, iova, &PAGES[0])?;
        bench.assigned.unmap(iova, 1)?;
        report(&[bench.server.groups])?;
        sleep(PAUSE_US)?;
    }
    let counters = counters(DEVICE)?;
    bench.assigned.detach()?;
    let groups = bench.server.groups;
    let served = [Counter::Groups, Counter::Succeeded].map(|counter| counters.get(counter));
    ensure!(served == [groups; 2], "{groups} groups repaired, and the counters have {served:?}");
    let stray = bench.assigned.device.stray();
    ensure!(stray == 0, "{stray} responses that the device did not wait for");
    report(&[groups, stray])
}
