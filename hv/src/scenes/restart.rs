//! A unit that was left on.

use super::{PATIENCE_US, Seen, Unexpected, expect, wait_for};
use crate::{
    engine::{Engine, LANES},
    hypervisor::Hypervisor,
    restart::{AT, BEFORE, Before, WORD},
};
use iommu::{FaultReason, Gpa, Iova, PAGE_SIZE};

/// What a life of the hypervisor before this one let devices do ends in one step, and nothing more was possible meanwhile.
pub fn restart(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let before = BEFORE.with(Option::take).ok_or("there was no life before this one")?;
    let shown = show(hv, seen, &before);
    before.functions.iter().for_each(|function| function.disable_bus_master(&hv.config));
    // What the life before gave away is left alone: nobody blocked its devices one by one.
    shown
}

fn show(hv: &Hypervisor, seen: &Seen, before: &Before) -> Result<&'static str, Unexpected> {
    let Before { engines: [given, other], functions, page, other: canary } = before;
    let status = |engine: &Engine| -> [u32; LANES] { core::array::from_fn(|lane| engine.status(lane)) };
    let over = || ![given, other].iter().any(|engine| status(engine).contains(&Engine::BUSY));
    expect(wait_for(hv, PATIENCE_US, over), "a write of the life before did not end")?;

    let arrived = status(given).iter().take_while(|&&status| status == Engine::DONE).count();
    let refused = status(given).iter().rev().take_while(|&&status| status == Engine::REFUSED).count();
    let is_there = |lane: usize| page.load(Gpa(lane as u64 * 8)) == Some(WORD + lane as u64);
    let is_empty = |lane: usize| page.load(Gpa(lane as u64 * 8)) == Some(0);
    seen.count("arrived_before", arrived as u64);
    seen.count("refused_after", refused as u64);
    let faults = hv.unowned.with(|(count, _)| *count);
    given.start(0, Iova(AT.0 + PAGE_SIZE / 2), WORD, Engine::PLAIN_WRITE, 0);
    let reported = wait_for(hv, PATIENCE_US, || hv.unowned.with(|(count, _)| *count) > faults);
    let last = hv.unowned.with(|(_, last)| *last).ok_or("no fault was reported")?;
    wait_for(hv, PATIENCE_US, || given.status(0) != Engine::BUSY);

    expect(arrived + refused == LANES, "a write arrived after another one was refused")?;
    expect(arrived > 0 && refused > 0, "all writes came before the unit was taken over, or all after it")?;
    let holds = (0..arrived).all(is_there) && (arrived..LANES).all(is_empty);
    expect(holds, "the page that the life before had given holds something else")?;
    expect(status(other) == [Engine::REFUSED; LANES], "a write past translation was not refused")?;
    let untouched = (0..PAGE_SIZE).step_by(8).all(|at| canary.load(Gpa(at)) == Some(0));
    expect(untouched, "a device reached memory past translation")?;
    expect(
        given.status(0) == Engine::REFUSED && reported,
        "a device still has what the life before gave it",
    )?;
    let expected = (functions[0].id, FaultReason::NotAttached);
    expect((last.stream, last.reason) == expected, "the fault names another device or reason")?;
    Ok(
        "a device wrote on while the unit was taken over: what it had been given ended in one step, and nothing else was in reach",
    )
}
