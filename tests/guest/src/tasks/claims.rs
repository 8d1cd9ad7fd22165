//! CLAIMS: answers that pages are there which are not; then gives its device's page requests up.

use super::{Access, Bench, DEVICE, REFUSED};
use crate::{
    calls::{counters, report},
    device::{INVALID_RESPONSE, REQUEST_REFUSED, Status},
    ensure,
    memory::PAGES,
    say,
    say::Failed,
    serve::{answer_all, respond},
};
use channel::{
    Code,
    counters::{Counter, bucket},
};
use iommu::PAGE_SIZE;

const PAGE: u64 = 0x4900_0000;
const HONEST: u64 = 0x4910_0000;
const GIVEN_UP: [u64; 2] = [0x4920_0000, 0x4920_2000];
/// Less than the last answers would be held back for. A time of up to 16 ms is counted like this.
const DEADLINE_US: u64 = 10_000;
const FIRST_HOLD_US: u64 = 1_000;
/// Groups that the test device sends for one operation before it gives up.
const ROUNDS: usize = 8;
/// The first group whose answer is held back, from 0: the second repetition.
const FIRST_HELD: usize = 2;
/// Repairs after which the guest is believed again.
const REPAIRS: u64 = 10;

/// Reports: claims that were none, answers held back, groups answered with success, with failure, stray responses.
pub fn run() -> Result<(), Failed> {
    let mut bench = Bench::set_up(0xC1A_1115, DEADLINE_US)?;
    let rounds = claim_until_the_last_round(&mut bench)?;
    let held = counters(DEVICE)?.get(Counter::Held);
    ensure!(held == (ROUNDS - FIRST_HELD) as u64, "{held} answers were held back");
    each_was_held_back_longer(rounds)?;
    be_honest(&mut bench)?;
    give_up(&mut bench)?;

    let counters = counters(DEVICE)?;
    let device = &bench.assigned.device;
    let (groups, stray) = (device.groups(), device.stray());
    for (counter, expected) in [
        (Counter::Groups, groups),
        (Counter::Unrepaired, ROUNDS as u64 - 1),
        (Counter::Succeeded, ROUNDS as u64 + REPAIRS),
        (Counter::Failed, 1),
        (Counter::Evicted, 1),
        (Counter::Late, 1),
        (Counter::Expired, 0),
        (Counter::Refused, 0),
        (Counter::Outstanding, 0),
    ] {
        let counted = counters.get(counter);
        ensure!(counted == expected, "{counter:?}: {expected} by the guest's own count, {counted} counted");
    }
    bench.assigned.detach()?;
    let [unrepaired, held, succeeded, failed] =
        [Counter::Unrepaired, Counter::Held, Counter::Succeeded, Counter::Failed].map(|of| counters.get(of));
    report(&[unrepaired, held, succeeded, failed, stray])?;
    ensure!(stray == 0, "{stray} responses that the device did not wait for");
    Ok(())
}

/// Repairs the page only in the last round that the device has, and says so in each. Returns which of the counters' buckets
/// holds the time that each answer took.
fn claim_until_the_last_round(bench: &mut Bench) -> Result<[usize; ROUNDS], Failed> {
    let mut buckets = [0; ROUNDS];
    PAGES[0].fill(1);
    bench.assigned.start_read(0, PAGE, 0)?;
    let mut group = bench.wait_read(PAGE)?;
    for (round, took) in buckets.iter_mut().enumerate() {
        let before = counters(DEVICE)?;
        if round == ROUNDS - 1 {
            bench.assigned.map(PAGE, &PAGES[0], Access::Read)?;
        }
        answer_all(&[group.answer(Code::Success)])?;
        // The next group, or the end, comes when the answer has left.
        if round < ROUNDS - 1 {
            group = bench.wait_read(PAGE)?;
        } else {
            bench.assigned.expect_read(0, &PAGES[0])?;
        }
        let Some(bucket) = counters(DEVICE)?.answered_since(&before) else {
            say!("round {round}: its answer was not counted, or another was");
            return Err(Failed);
        };
        *took = bucket;
    }
    let rounds = bench.assigned.device.rounds(0);
    ensure!(rounds == ROUNDS as u32, "{rounds} rounds instead of {ROUNDS}");
    bench.assigned.unmap(PAGE, 1)?;
    Ok(buckets)
}

/// The first answer is held back for 1 ms, each further one for twice as long, and none beyond the deadline.
fn each_was_held_back_longer(buckets: [usize; ROUNDS]) -> Result<(), Failed> {
    for (n, &took) in buckets[FIRST_HELD..].iter().enumerate() {
        let held_us = (FIRST_HOLD_US << n).min(DEADLINE_US);
        ensure!(took >= bucket(held_us), "answer {n} that was held back left too early: {buckets:?}");
    }
    let longest = buckets.iter().max();
    ensure!(
        longest <= Some(&bucket(DEADLINE_US)),
        "an answer was held back beyond the deadline: {buckets:?}"
    );
    Ok(())
}

/// Repairs pages until answers leave at once again.
fn be_honest(bench: &mut Bench) -> Result<(), Failed> {
    let mut held = 0;
    for n in 0..REPAIRS {
        held = counters(DEVICE)?.get(Counter::Held);
        let iova = HONEST + n * PAGE_SIZE;
        PAGES[1].fill(n);
        bench.assigned.start_read(0, iova, 0)?;
        let group = bench.wait_read(iova)?;
        bench.assigned.repair_read(&group, 0, iova, &PAGES[1])?;
    }
    let after = counters(DEVICE)?.get(Counter::Held);
    ensure!(after == held, "an answer is held back although the last {REPAIRS} pages were repaired");
    bench.assigned.unmap(HONEST, REPAIRS)
}

/// Answers one group of two with failure: both get an answer that says no, and the device may ask for no more.
fn give_up(bench: &mut Bench) -> Result<(), Failed> {
    for (lane, iova) in (0..).zip(GIVEN_UP) {
        bench.assigned.start_read(lane, iova, 0)?;
    }
    let groups = bench.wait_reads(GIVEN_UP)?;
    let [(_, given_up), (_, other)] = groups.as_slice() else { return Err(Failed) };
    answer_all(&[given_up.answer(Code::Failure)])?;
    for lane in 0..2 {
        bench.assigned.device.expect_failure(lane, INVALID_RESPONSE)?;
    }
    let answered = respond(&[other.answer(Code::Success)])?;
    ensure!(answered == REFUSED, "a group was answered twice: {answered:?}");
    bench.assigned.start_read(0, GIVEN_UP[0], 0)?;
    bench.assigned.device.expect_failure(0, REQUEST_REFUSED)?;
    let status = bench.assigned.device.status(1);
    ensure!(matches!(status, Status::Failed { .. }), "lane 1 is {status:?}");
    Ok(())
}
