//! REPAIR: the device asks for pages, the guest maps them and answers, the device carries on with the right data.

use super::{Access, Assigned, Bench};
use crate::{
    calls::report,
    device::{CACHE, INVALID_RESPONSE, Status},
    ensure, machine,
    memory::{PAGE_WORDS, PAGES, Page},
    say::Failed,
    serve::{Answer, Group, answer_all},
};
use channel::{Code, call::NONE};
use heapless::Vec;
use iommu::PAGE_SIZE;

// Where each step works, as the device sees it.
const ONE_PAGE: u64 = 0x4000_0000;
const FOUR_PAGES: u64 = 0x4010_0000;
const HALF_MAPPED: u64 = 0x4020_0000;
const TWO_LANES: [u64; 2] = [0x4030_0000, 0x4030_8000];
const CACHED: u64 = 0x4040_0000;
const KEPT: u64 = 0x4048_0000;
const LATE: u64 = 0x4050_0000;
const MANY: u64 = 0x4060_0000;

/// Pages that the last step asks for, one after the other.
const MANY_PAGES: u64 = 32;

/// Reports: groups served, pages mapped, the device's groups and responses, stray responses, unmaps, interrupts.
pub fn run(opaque: u64) -> Result<(), Failed> {
    let mut bench = Bench::set_up(opaque, NONE)?;
    one_page_is_read(&mut bench)?;
    a_read_only_page_is_made_writable(&mut bench)?;
    four_pages_are_one_group(&mut bench)?;
    a_refused_group_writes_nothing(&mut bench)?;
    two_lanes_are_answered_in_reverse(&mut bench)?;
    an_unmapped_page_leaves_the_device_tlb(&mut bench)?;
    a_sleeping_guest_is_woken(&mut bench)?;
    many_pages_are_read(&mut bench)?;

    let Bench { server, mut assigned } = bench;
    for (iova, pages) in
        [(ONE_PAGE, 1), (FOUR_PAGES, 4), (HALF_MAPPED, 1), (CACHED, 1), (LATE, 1), (MANY, MANY_PAGES)]
    {
        assigned.unmap(iova, pages)?;
    }
    for iova in TWO_LANES {
        assigned.unmap(iova, 1)?;
    }
    detach_with_a_cached_page(&mut assigned)?;

    let device = &assigned.device;
    let (groups, responses, stray) = (device.groups(), device.responses(), device.stray());
    let outstanding = device.outstanding();
    ensure!(
        groups == server.groups && responses == groups && outstanding == 0 && stray == 0,
        "{groups} groups, {} served, {responses} responses, {outstanding} outstanding, {stray} stray",
        server.groups
    );
    report(&[
        server.groups,
        assigned.mapped,
        groups,
        responses,
        stray,
        assigned.unmaps,
        machine::interrupts(),
    ])
}

fn one_page_is_read(bench: &mut Bench) -> Result<(), Failed> {
    let Bench { server, assigned } = bench;
    PAGES[0].fill(1);

    assigned.start_read(0, ONE_PAGE, 0)?;
    server.serve(1, |group| give(assigned, group, ONE_PAGE, &PAGES[0]))?;

    assigned.expect_read(0, &PAGES[0])
}

/// Maps `page` at `iova`, which must be what `group` asks to read.
fn give(assigned: &mut Assigned, group: &Group, iova: u64, page: &Page) -> Result<Code, Failed> {
    assigned.check_requests(group, &[iova], Access::Read)?;
    assigned.map(iova, page, Access::Read)?;
    Ok(Code::Success)
}

/// Goes on with the page that [`one_page_is_read`] mapped and filled.
fn a_read_only_page_is_made_writable(bench: &mut Bench) -> Result<(), Failed> {
    const DATA: u64 = 0xDA7A_0000_0000_0001;
    const FIRST: usize = 64;
    const END: usize = 128;
    let Bench { server, assigned } = bench;

    assigned.start_write(0, ONE_PAGE + FIRST as u64 * 8, (END - FIRST) as u64 * 8, DATA)?;
    server.serve(1, |group| {
        assigned.check_requests(group, &[ONE_PAGE], Access::Write)?;
        assigned.unmap(ONE_PAGE, 1)?;
        assigned.map(ONE_PAGE, &PAGES[0], Access::Write)?;
        Ok(Code::Success)
    })?;

    assigned.device.expect(0, Status::Done)?;
    ensure!(PAGES[0].counts_from(DATA, FIRST..END), "the page does not hold what the device wrote");
    let untouched = PAGES[0].is_filled(1, 0..FIRST) && PAGES[0].is_filled(1, END..PAGE_WORDS);
    ensure!(untouched, "the device wrote to more of the page than it was told to");
    Ok(())
}

fn four_pages_are_one_group(bench: &mut Bench) -> Result<(), Failed> {
    const DATA: u64 = 0xDA7A_0000_0000_1000;
    /// Which guest page is behind which page of the device.
    const SCRAMBLED: [usize; 4] = [6, 4, 7, 5];
    let Bench { server, assigned } = bench;
    let pages: [u64; 4] = core::array::from_fn(|n| FOUR_PAGES + n as u64 * PAGE_SIZE);
    let before = (assigned.device.groups(), assigned.device.responses());

    assigned.start_write(0, FOUR_PAGES, 4 * PAGE_SIZE, DATA)?;
    server.serve(1, |group| {
        assigned.check_requests(group, &pages, Access::Write)?;
        for (iova, at) in pages.into_iter().zip(SCRAMBLED) {
            assigned.map(iova, &PAGES[at], Access::Write)?;
        }
        Ok(Code::Success)
    })?;

    assigned.device.expect(0, Status::Done)?;
    for (n, at) in (0..).zip(SCRAMBLED) {
        let first = DATA + n * PAGE_WORDS as u64;
        ensure!(PAGES[at].counts_from(first, 0..PAGE_WORDS), "page {n} of 4 does not hold what was written");
    }
    let device = &assigned.device;
    let sent = (device.rounds(0), device.pages(0));
    ensure!(sent == (1, 4), "the lane sent {} groups and {} requests, not 1 and 4", sent.0, sent.1);
    let after = (device.groups(), device.responses());
    ensure!(after == (before.0 + 1, before.1 + 1), "groups, responses were {before:?} and are {after:?}");
    Ok(())
}

/// Of two pages the first is mapped. No byte may reach it before both are.
fn a_refused_group_writes_nothing(bench: &mut Bench) -> Result<(), Failed> {
    let Bench { server, assigned } = bench;
    PAGES[1].fill(2);
    assigned.map(HALF_MAPPED, &PAGES[1], Access::Write)?;

    assigned.start_write(0, HALF_MAPPED, 2 * PAGE_SIZE, 0xBAD)?;
    server.serve(1, |group| {
        assigned.check_requests(group, &[HALF_MAPPED + PAGE_SIZE], Access::Write)?;
        Ok(Code::Invalid)
    })?;

    assigned.device.expect_failure(0, INVALID_RESPONSE)?;
    ensure!(PAGES[1].is_filled(2, 0..PAGE_WORDS), "a refused write changed memory");
    Ok(())
}

fn two_lanes_are_answered_in_reverse(bench: &mut Bench) -> Result<(), Failed> {
    let pages = [&PAGES[2], &PAGES[3]];
    for (lane, iova) in (0..).zip(TWO_LANES) {
        pages[lane].fill(3 + lane as u64);
        bench.assigned.start_read(lane as u64, iova, 0)?;
    }

    let groups = bench.wait_reads(TWO_LANES)?;
    let mut answers = Vec::<Answer, 2>::new();
    for (lane, group) in groups.iter().rev() {
        bench.assigned.map(TWO_LANES[*lane], pages[*lane], Access::Read)?;
        // There is room: there are two groups.
        let _ = answers.push(group.answer(Code::Success));
    }
    answer_all(&answers)?;

    bench.assigned.expect_read(0, pages[0])?;
    bench.assigned.expect_read(1, pages[1])
}

fn an_unmapped_page_leaves_the_device_tlb(bench: &mut Bench) -> Result<(), Failed> {
    let Bench { server, assigned } = bench;
    PAGES[8].fill(5);
    PAGES[9].fill(6);

    assigned.start_read(0, CACHED, CACHE)?;
    server.serve(1, |group| give(assigned, group, CACHED, &PAGES[8]))?;
    assigned.expect_read(0, &PAGES[8])?;

    let groups = assigned.device.groups();
    assigned.start_read(0, CACHED, CACHE)?;
    assigned.expect_read(0, &PAGES[8])?;
    ensure!(assigned.device.groups() == groups, "the device asked again for a page that it has");

    let invalidations = assigned.device.invalidations();
    assigned.unmap(CACHED, 1)?;
    ensure!(assigned.device.invalidations() > invalidations, "an unmap reached no device TLB");
    assigned.start_read(0, CACHED, CACHE)?;
    server.serve(1, |group| give(assigned, group, CACHED, &PAGES[9]))?;
    assigned.expect_read(0, &PAGES[9])
}

/// Detaches while the device keeps a translation: it must be told to forget that too.
fn detach_with_a_cached_page(assigned: &mut Assigned) -> Result<(), Failed> {
    PAGES[11].fill(8);
    assigned.map(KEPT, &PAGES[11], Access::Read)?;
    assigned.start_read(0, KEPT, CACHE)?;
    assigned.expect_read(0, &PAGES[11])?;

    let invalidations = assigned.device.invalidations();
    assigned.detach()?;
    ensure!(assigned.device.invalidations() > invalidations, "a detachment reached no device TLB");
    Ok(())
}

/// The request comes while the guest sleeps, with nothing else to wake it.
fn a_sleeping_guest_is_woken(bench: &mut Bench) -> Result<(), Failed> {
    let Bench { server, assigned } = bench;
    PAGES[10].fill(7);
    assigned.start_late(0, LATE, PAGE_SIZE as u32, 0, 0)?;
    server.serve(1, |group| {
        assigned.expect_early()?;
        give(assigned, group, LATE, &PAGES[10])
    })?;
    assigned.expect_read(0, &PAGES[10])
}

fn many_pages_are_read(bench: &mut Bench) -> Result<(), Failed> {
    let Bench { server, assigned } = bench;
    for n in 0..MANY_PAGES {
        let (iova, page) = (MANY + n * PAGE_SIZE, &PAGES[n as usize % PAGES.len()]);
        page.fill(0x100 + n);
        assigned.start_read(0, iova, 0)?;
        server.serve(1, |group| give(assigned, group, iova, page))?;
        assigned.expect_read(0, page)?;
    }
    Ok(())
}
