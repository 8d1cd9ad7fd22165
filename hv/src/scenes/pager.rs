//! A device whose faults the hypervisor repairs itself.

use super::{PATIENCE_US, Seen, Unexpected, expect, passes, report, requesters, tally_of, task, wait_for};
use crate::{engine::Engine, guest, hypervisor::Hypervisor, pager::Pager};
use broker::Restraint;
use iommu::{Iova, PAGE_SIZE, Pasid};

/// A device that no guest owns asks the hypervisor's own pager for pages: it gets those of its window, and no other. While the
/// device is reset, a guest lets groups of its own run out of time, and they are answered in theirs.
pub fn pager(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    const WINDOW: u64 = 0x4300_0000;
    const PASID: u64 = 9;
    /// Where each lane writes: twice the same page, two others of the window, and the page behind it.
    const TARGETS: [u64; 5] =
        [WINDOW, WINDOW + 8, WINDOW + PAGE_SIZE, WINDOW + 3 * PAGE_SIZE + 8, WINDOW + 4 * PAGE_SIZE];
    let [number, neighbour] = *requesters(hv).as_slice() else { return Err("there are no two sva-devs") };
    let engine = Engine::new(&hv.config, &hv.devices[number].function).ok_or("sva-dev is out of reach")?;
    let pasid = (hv.capabilities.pasid_bits > 0).then_some(Pasid::from_low_bits(PASID));
    let mut pager = Pager::new(hv, number, pasid, Iova(WINDOW)..Iova(WINDOW + 4 * PAGE_SIZE))
        .inspect_err(|error| defmt::error!("there is no pager for the device: {}", error))
        .map_err(|_| "there is no pager for the device")?;

    for (lane, &target) in TARGETS.iter().enumerate() {
        engine.ask(lane, pasid, Iova(target), !target);
    }
    let is_idle = || (0..TARGETS.len()).all(|lane| engine.status(lane) != Engine::BUSY);
    let (mut came, mut restraint) = (true, Restraint::None);
    while came && !is_idle() {
        came = wait_for(hv, PATIENCE_US, || pager.is_asked() || is_idle());
        restraint = restraint.max(pager.serve());
    }
    let statuses: [u32; TARGETS.len()] = core::array::from_fn(|lane| engine.status(lane));
    let words = TARGETS.map(|target| pager.load(Iova(target)));
    let [groups, answers, stray] = engine.groups_and_answers();
    // Its first group asks while the device is reset, and runs out of time after that.
    guest::start(hv, 1, [task::SILENCE, 0, 0], &[neighbour]);
    let tally = pager.end().map_err(|_| "the device did not let go of its pages")?;
    let neighbours_passed = passes(hv, 1);
    let (neighbours, _) = tally_of(hv, 1)?;

    seen.count("groups", tally.opened);
    seen.count("answered_success", tally.succeeded);
    seen.count("answered_invalid", tally.declined);
    seen.count("answers_at_the_device", answers);
    seen.count("expired_of_the_neighbour", neighbours.expired);
    let (denied, allowed) = (statuses[4], &statuses[..4]);
    expect(came, "the device waits for an answer")?;
    expect(allowed.iter().all(|&status| status == Engine::DONE), "a write inside the window failed")?;
    expect(denied == Engine::DENIED, "a write past the window was not refused")?;
    let written = TARGETS.iter().zip(words).take(4).all(|(target, word)| word == Some(!target));
    expect(written && words[4].is_none(), "the device's words are not where they belong")?;
    expect(restraint == Restraint::None, "the device is held to something")?;
    expect(tally.opened == groups && tally.answered() == groups, "a group has no answer, or several")?;
    expect((answers, stray) == (groups, 0), "an answer did not reach the device, or too many did")?;
    expect(tally.declined == 1, "more than the one group was refused")?;
    neighbours_passed?;
    expect(
        neighbours.expired == 2 && report(hv, 1, 2) == 2,
        "the neighbour's groups were not answered at their deadlines",
    )?;
    Ok(
        "a device without a guest got its pages from the hypervisor's own pager as it asked for them, and none but those of its window",
    )
}
