//! NEIGHBOUR: repairs its device's faults, one after the other, whatever becomes of another guest's device.

use super::{Access, Bench, DEVICE, RELEASE};
use crate::{
    calls::{counters, demand, report, sleep, sleep_until},
    device::REQUEST_REFUSED,
    ensure,
    memory::PAGES,
    say,
    say::Failed,
};
use channel::{Call, call::NONE, counters::Counter};
use iommu::PAGE_SIZE;

/// The page of the first read; each further one is of the next page, so that no repair looks like none.
const FIRST_PAGE: u64 = 0x4700_0000;
/// Between two reads, in microseconds.
const PAUSE_US: u64 = 2_000;
/// How often, and how far apart in microseconds, it looks for a group.
const STEPS: u64 = 20_000;
const STEP_US: u64 = 100;
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
        let Bench { server, assigned } = &mut bench;
        let group = sleep_until(STEP_US, STEPS, || {
            // The unit's queue was full of another's requests: a device asks again.
            if assigned.device.status(0).is_failure(REQUEST_REFUSED) {
                assigned.start_read(0, iova, 0)?;
            }
            server.next_group()
        })?;
        let Some(group) = group else {
            say!("no page request came");
            return Err(Failed);
        };
        assigned.check_requests(&group, &[iova], Access::Read)?;
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
