//! BATCH: an array of invalidations with a bad entry in its middle, of pages that the device keeps.

use super::{
    Access, Bench,
    entries::{invalidate, refused_at},
};
use crate::{calls::report, device::CACHE, ensure, memory::PAGES, say::Failed};
use channel::{call::NONE, invalidate::Refused};
use iommu::PAGE_SIZE;

const FIRST: u64 = 0x4B00_0000;
/// Pages that the device keeps.
const COUNT: usize = 4;

/// Reports: entries of the array, how many of them were done before the bad one, how many when asked for again; the device
/// counts them.
pub fn run() -> Result<(), Failed> {
    let mut bench = Bench::set_up(0xBA7C4, NONE)?;
    let assigned = &mut bench.assigned;
    let iovas: [u64; COUNT] = core::array::from_fn(|at| FIRST + at as u64 * PAGE_SIZE);
    for (iova, page) in iovas.into_iter().zip(&PAGES) {
        page.fill(iova);
        assigned.map(iova, page, Access::Read)?;
        assigned.start_read(0, iova, CACHE)?;
        assigned.expect_read(0, page)?;
    }

    let own = assigned.attachment;
    let [a, b, c, d] = iovas.map(|iova| [own, iova, 1, 0]);
    let bad = [own ^ 1 << 40, FIRST, 1, 0];
    let before = assigned.device.invalidations();
    let answer = invalidate(&[a, b, bad, c, d]);
    let first = assigned.device.invalidations() - before;
    ensure!(answer == refused_at(2, Refused::NotYours, 0, 0), "an array with a bad entry: {answer:x?}");
    let answer = invalidate(&[c, d]);
    let second = assigned.device.invalidations() - before - first;
    ensure!(answer == Ok([2, 0, 0]), "the rest of the array: {answer:x?}");

    for (lane, (iova, page)) in (0..).zip(iovas.into_iter().zip(&PAGES)) {
        assigned.start_read(lane, iova, CACHE)?;
        assigned.expect_read(lane, page)?;
    }
    assigned.unmap(FIRST, COUNT as u64)?;
    assigned.detach()?;
    report(&[COUNT as u64 + 1, first, second])
}
