//! What the calls `Invalidate` and `Counters` take, and what they refuse: a part of the task ISOLATION.

use super::{Bench, DEVICE};
use crate::{
    calls::{Refusal, ask, demand},
    ensure, machine,
    memory::COUNTS,
    say::Failed,
};
use channel::{
    Call, Status,
    Status::{NotYours, UnknownType},
    call::ARRAY,
    counters::COUNTERS_WORDS,
    invalidate::{LEAF, Layout, Refused},
};
use iommu::PAGE_SIZE;

/// Of a guest that has a few pages mapped there, or none.
const IOVA: u64 = 0x4600_0000;
const LAST_PAGE: u64 = u64::MAX - (PAGE_SIZE - 1);
/// Pages that begin and end where no larger block does, of which an array is too much for one batch.
const AWKWARD_PAGES: u64 = 0x155;
const PAGES: u64 = Layout::Pages as u64;

/// Calls that must be refused as a whole, and how.
pub fn refused_calls(devices: u64) -> [(Call, [u64; 4], Status); 16] {
    let end = machine::RAM.end;
    let counts = COUNTS.address();
    let bytes = COUNTERS_WORDS as u64 * 8;
    let invalidate = |layout, array, entries| [layout, array, entries, 0];
    let counters = |device, to, bytes| [device, to, bytes, 0];
    [
        (Call::Invalidate, invalidate(0, counts, 1), UnknownType),
        (Call::Invalidate, invalidate(Layout::VtdStage1 as u64, counts, 1), UnknownType),
        (Call::Invalidate, invalidate(Layout::SmmuCommand as u64, counts, 0), UnknownType),
        (Call::Invalidate, invalidate(u64::MAX, counts, u64::MAX), UnknownType),
        (Call::Invalidate, invalidate(PAGES, end, 1), NotYours),
        (Call::Invalidate, invalidate(PAGES, end - 8, 1), NotYours),
        (Call::Invalidate, invalidate(PAGES, end - 8, u64::MAX), NotYours),
        (Call::Invalidate, invalidate(PAGES, counts + 4, 1), NotYours),
        (Call::Invalidate, invalidate(PAGES, u64::MAX - 7, 1), NotYours),
        (Call::Counters, counters(0, counts, bytes), NotYours),
        (Call::Counters, counters(devices + 1, counts, bytes), NotYours),
        (Call::Counters, counters(DEVICE | 1 << 40, counts, bytes), NotYours),
        (Call::Counters, counters(DEVICE, end, bytes), NotYours),
        (Call::Counters, counters(DEVICE, end - 8, u64::MAX), NotYours),
        (Call::Counters, counters(DEVICE, counts + 4, bytes), NotYours),
        (Call::Counters, counters(DEVICE, u64::MAX - 7, bytes), NotYours),
    ]
}

/// Entries that must be refused, and how: why, in which word, for which bits.
pub fn refused_entries(bench: &Bench) -> [([u64; 4], Refused, u64, u64); 8] {
    let own = bench.assigned.attachment;
    [
        ([own ^ 1 << 40, IOVA, 1, 0], Refused::NotYours, 0, 0),
        ([0, IOVA, 1, 0], Refused::NotYours, 0, 0),
        ([own + 1, IOVA, 1, 0], Refused::NotYours, 0, 0),
        ([own, IOVA, 0, 0], Refused::Range, 2, 0),
        ([own, LAST_PAGE, 2, 0], Refused::Range, 2, 2),
        ([own, 0, u64::MAX, 0], Refused::Range, 2, u64::MAX),
        ([own, IOVA | 8, 1, 0], Refused::Bits, 1, 8),
        ([own, IOVA, 1, 2], Refused::Bits, 3, 2),
    ]
}

/// Asks to forget what `entries` name.
pub fn invalidate(entries: &[[u64; 4]]) -> Result<[u64; 3], Refusal> {
    ask(Call::Invalidate, [PAGES, entries.as_ptr().addr() as u64, entries.len() as u64, 0])
}

/// What a call returns that was refused at entry `handled`.
pub fn refused_at(handled: u64, why: Refused, word: u64, bits: u64) -> Result<[u64; 3], Refusal> {
    Ok([handled, why as u64 | word << 32, bits])
}

/// Arrays that are good, or good up to an entry: what comes before that is done, and reaches the device.
pub fn the_good_ones_are_done(bench: &Bench) -> Result<(), Failed> {
    let own = bench.assigned.attachment;
    let device = &bench.assigned.device;
    let array = [
        [own, IOVA, 1, 0],
        [own, IOVA + 4 * PAGE_SIZE, 4, LEAF],
        [own ^ 1 << 40, IOVA, 1, 0],
        [own, IOVA + 64 * PAGE_SIZE, 1, 0],
    ];
    let before = device.invalidations();
    let answer = invalidate(&array);
    ensure!(answer == refused_at(2, Refused::NotYours, 0, 0), "an array with a bad entry: {answer:x?}");
    let reached = device.invalidations() - before;
    ensure!(reached >= 2 || !device.asks_for_pages, "of two good entries {reached} reached the device");

    for entry in [[own, 0, 1 << 52, 0], [own, LAST_PAGE, 1, 0]] {
        let answer = invalidate(&[entry]);
        ensure!(answer == Ok([1, 0, 0]), "{entry:x?}: {answer:x?}");
    }
    let answer = invalidate(&[]);
    ensure!(answer == Ok([0; 3]), "an empty array: {answer:x?}");
    // However many are announced, one call handles no more than it says.
    let array = [[own, IOVA + PAGE_SIZE, AWKWARD_PAGES, 0]; ARRAY as usize + 1];
    let announced = [PAGES, array.as_ptr().addr() as u64, u64::MAX, 0];
    let answer = ask(Call::Invalidate, announced);
    ensure!(answer == Ok([ARRAY, 0, 0]), "2^64 - 1 entries: {answer:x?}");

    // Whole words, as many as fit, and nothing behind them.
    COUNTS.fill(9);
    let [written, ..] = demand(Call::Counters, [DEVICE, COUNTS.address(), 12, 0])?;
    ensure!(written == 8 && COUNTS.is_filled(9, 1..COUNTERS_WORDS), "{written} bytes for room of 12");
    let [written, ..] = demand(Call::Counters, [DEVICE, COUNTS.address(), u64::MAX, 0])?;
    let all = COUNTERS_WORDS as u64 * 8;
    let kept = COUNTS.is_filled(9, COUNTERS_WORDS..COUNTERS_WORDS + 8);
    ensure!(written == all && kept, "{written} bytes of counters instead of {all}");
    Ok(())
}
