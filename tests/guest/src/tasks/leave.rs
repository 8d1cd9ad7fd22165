//! LEAVE: fills its memory, has four groups outstanding and half of a fifth, and never answers: the guest is to be stopped
//! like this.

use super::Bench;
use crate::{
    calls::{report, sleep},
    device::{NOT_LAST, RAW, Status},
    memory,
    say::Failed,
};
use channel::call::DEADLINE_MAX_US;
use iommu::PAGE_SIZE;

const PAGES: [u64; 4] = [0x4400_0000, 0x4400_2000, 0x4400_4000, 0x4400_6000];
const HALF_GROUP: u64 = 0x4401_0000;
const HALF_GROUP_LANE: u64 = 4;
const STEP_US: u64 = 100_000;

/// Reports: groups outstanding, then 1 when all is so. Does not end.
pub fn run() -> Result<(), Failed> {
    // What the next owner of the memory must not find.
    memory::PAGES.iter().for_each(|page| page.fill(0x1EA7E));
    // No group may end before the guest does.
    let mut bench = Bench::set_up(0x1EA7E, DEADLINE_MAX_US)?;
    for (lane, page) in (0..).zip(PAGES) {
        bench.assigned.start_read(lane, page, 0)?;
    }
    bench.wait_reads(PAGES)?;
    bench.assigned.start(HALF_GROUP_LANE, HALF_GROUP, 2 * PAGE_SIZE as u32, 0, RAW | NOT_LAST)?;
    bench.assigned.device.expect(HALF_GROUP_LANE, Status::Done)?;
    report(&[bench.server.groups, 1])?;
    loop {
        sleep(STEP_US)?;
    }
}
