//! Scenes that fill the unit's queues, or look at what it and devices remember.

use super::{
    Canary, PATIENCE_US, Seen, Unexpected, Writer, expect, longest_answer_us, passes, perform,
    perform_beside_neighbour, report, requesters, tally_of, task, wait_for,
};
use crate::{
    control::{self, ALLOCATION},
    engine::Engine,
    guest,
    hypervisor::{GUESTS, Hypervisor},
    memory::Share,
    tables::Stage,
};
use arch::cpu;
use broker::{FaultLimits, Missed, Restraint};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use iommu::{Access, FaultReason, Features, Gpa, Iova, PAGE_SIZE, Perms};

/// Refused writes of a storm: more than an event queue of one frame holds.
const STORM: u64 = 200;
/// Faults that are reported before a device is silenced that has too many, at most, beyond those that are: as many as the
/// unit has room for, and those of as long as its home core takes.
const AT_MOST_BEHIND: u64 = 256;
/// How long the service core looks away at most, in microseconds.
const AWAY_US: u64 = 1_000_000;

/// More faults than the unit has room to record: an unknown number is lost, which every guest with a device is told, and the
/// next one is recorded.
pub fn storm(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let writers = [Writer::nth(hv, 0)?, Writer::nth(hv, 1)?];
    let target = Canary::new(hv)?;
    let faults = || hv.unowned.with(|(count, _)| *count);
    let losses = || hv.lost.faults.load(Relaxed);
    let listeners = requesters(hv);
    for (index, &device) in listeners.iter().enumerate() {
        guest::start(hv, index, [task::LOSSES, 0, 0], &[device]);
    }
    let listen = wait_for(hv, PATIENCE_US, || (0..listeners.len()).all(|index| report(hv, index, 0) == 1));
    let (faults_before, losses_before) = (faults(), losses());
    writers.iter().for_each(|writer| writer.device.function.enable_bus_master(&hv.config));

    let mut refused = 0;
    {
        // This is the service core: as long as it is masked nobody takes what the unit records.
        let _masked = cpu::mask();
        for writer in writers.iter().cycle().take(STORM as usize) {
            refused += u64::from(writer.write(Iova(target.phys()), target.phys()) == Writer::REFUSED);
        }
    }
    let told = wait_for(hv, PATIENCE_US, || losses() > losses_before);
    let mut heard = Ok(());
    for index in 0..listeners.len() {
        let passed = passes(hv, index);
        heard = heard.and(passed);
    }
    let recorded = faults() - faults_before;
    let notices = losses() - losses_before;
    let before = faults();
    let again = writers[1].write(Iova(target.phys() + 8), target.phys() + 8);
    let reported = wait_for(hv, PATIENCE_US, || faults() > before);

    writers.iter().for_each(|writer| writer.device.function.disable_bus_master(&hv.config));
    let last = hv.unowned.with(|(_, last)| *last);
    let (unchanged, page) = (target.is_unchanged(), target.phys());
    target.release(hv);
    seen.count("refused", refused);
    seen.count("recorded", recorded);
    seen.count("notices_of_loss", notices);
    let told_guests = (0..listeners.len()).filter(|&index| report(hv, index, 1) > 0).count();
    seen.count("guests_told_of_loss", told_guests as u64);
    expect(listen, "a guest does not listen")?;
    heard?;
    let agree = |index: usize| report(hv, index, 1) == report(hv, index, 2) && report(hv, index, 3) == 0;
    expect((0..listeners.len()).all(agree), "a guest was told of faults that are another's")?;
    expect(told_guests == GUESTS, "a guest was not told that faults were lost")?;
    expect(refused == STORM && again == Writer::REFUSED && unchanged, "a write was not refused")?;
    expect(told, "nobody was told that faults were lost")?;
    expect(recorded > 0 && recorded < STORM, "all faults of the storm were recorded, or none")?;
    expect(reported, "the fault after the storm was not recorded")?;
    let last = last.ok_or("the fault after the storm was not recorded")?;
    expect(last.stream == writers[1].device.function.id, "the fault after the storm names another device")?;
    expect(last.reason == FaultReason::NotAttached, "the fault after the storm names another reason")?;
    expect(
        last.access == Access::Unknown || last.iova.0 == page,
        "the fault after the storm names another address",
    )?;
    Ok(
        "200 writes refused while nobody looked: the unit said that it lost reports, both guests were told, and the next fault was recorded",
    )
}

/// A device whose accesses are refused again and again is warned of, then blocked and silenced, which its guest is told; the other
/// guest's device is served meanwhile. One that nobody owns is silenced at once. Both serve their next owners.
pub fn escalation(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    let held_to = |restraint: Restraint| hv.homes[0].restraints[restraint as usize].load(Relaxed);
    let during = perform_beside_neighbour(hv, task::STORM, &devices)?;
    let (tally, _) = tally_of(hv, 0)?;
    let [writes, faults, warnings, blocked, lost, after] =
        [0, 1, 2, 3, 4, 5].map(|number: usize| report(hv, 0, number));
    seen.count("refused", writes);
    seen.count("recorded", tally.faults);
    seen.count("told", faults);
    seen.count("told_as_lost", lost);
    seen.count("told_once_blocked", after);
    seen.count("warnings", warnings);
    seen.count("blocked", blocked);
    seen.count("groups_of_the_neighbour", during);
    seen.count("longest_to_answer_of_the_neighbour_less_than_us", longest_answer_us(hv, &[1]));
    let held = [Restraint::Warned, Restraint::Blocked].map(held_to);
    perform(hv, 0, [task::REPAIR, 0x5E, 0], devices[0])?;
    let (next, _) = tally_of(hv, 0)?;
    seen.count("groups_of_the_next_owner", next.opened);

    let (recorded, further) = stray(hv, devices[0])?;
    seen.count("recorded_of_nobodys", recorded);
    seen.count("recorded_of_nobodys_once_silenced", further);
    let second_stage = u64::from(hv.stage == Stage::Second);
    perform(hv, 0, [task::EVENT, second_stage, 0], devices[0])?;
    seen.count("faults_told_to_its_next_owner", report(hv, 0, 0));
    let limit = u64::from(FaultLimits::USUAL.block);
    expect((limit..limit + AT_MOST_BEHIND).contains(&tally.faults), "the device was not silenced in time")?;
    expect(blocked == 1 && after == 0, "the owner was not told once that its device is blocked")?;
    expect(held == [1, 1], "the device was not held to what it should be")?;
    expect(next.succeeded > 0 && next.faults == 0, "the next owner's requests were not served")?;
    expect((limit..limit + AT_MOST_BEHIND).contains(&recorded), "nobody's device was not silenced in time")?;
    expect(further == 0, "a silenced device goes on to be reported")?;
    Ok(
        "a storm of refused writes: the device was warned of, blocked and silenced, its guest told once; nobody's device as well, at once; the neighbour was served; both serve again after a reset",
    )
}

/// Has a device that nobody owns write until it is silenced; returns how many faults were reported until then, and of as many
/// writes of a device that is allowed to go on.
fn stray(hv: &Hypervisor, number: usize) -> Result<(u64, u64), Unexpected> {
    const FURTHER: usize = 64;
    let function = &hv.devices[number].function;
    let engine = Engine::new(&hv.config, function).ok_or("sva-dev is out of reach")?;
    let target = Canary::new(hv)?;
    let faults = || hv.unowned.with(|(count, _)| *count);
    let refused = || {
        engine.start(0, Iova(target.phys()), 0xBAD, Engine::PLAIN_WRITE, 0);
        let end_us = cpu::now_us().saturating_add(PATIENCE_US);
        while engine.status(0) == Engine::BUSY && cpu::now_us() < end_us {
            cpu::relax();
        }
        engine.status(0) == Engine::REFUSED
    };
    let before = faults();
    function.enable_bus_master(&hv.config);
    let end_us = cpu::now_us().saturating_add(PATIENCE_US);
    let mut all_refused = true;
    while all_refused && !hv.is_silenced(number) && cpu::now_us() < end_us {
        all_refused = refused();
    }
    let silenced = hv.is_silenced(number);
    let recorded = faults() - before;
    // The hypervisor has taken its right to write away as well, so that the unit is not even asked.
    function.enable_bus_master(&hv.config);
    all_refused &= (0..FURTHER).all(|_| refused());
    // Once more around all that the service core has to do.
    let drained = hv.drain().is_ok();
    function.disable_bus_master(&hv.config);
    let further = faults() - before - recorded;
    let unchanged = target.is_unchanged();
    target.release(hv);
    expect(all_refused && unchanged, "a write was not refused")?;
    expect(silenced && drained, "nobody's device was not silenced")?;
    Ok((recorded, further))
}

/// More page requests than the queue holds: what was lost is told, every group has one answer, and the other device is served.
pub fn overflow(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    let losses = || hv.lost.requests.load(Relaxed);
    let before = losses();
    guest::start(hv, 1, [task::NEIGHBOUR, 0, 0], &devices[1..]);
    let there = wait_for(hv, PATIENCE_US, || report(hv, 1, 0) > 0);
    guest::start(hv, 0, [task::FLOOD, 0, 0], &[devices[0]]);
    let ready = wait_for(hv, PATIENCE_US, || report(hv, 0, 0) == 1);
    let start_us = cpu::now_us();
    let mut flooded = false;
    if there && ready {
        // This is the service core: as long as it is masked nobody takes what the queue holds.
        let _masked = cpu::mask();
        hv.homes[0].task[0].store(task::RELEASE, SeqCst);
        while !flooded && cpu::now_us().saturating_sub(start_us) < AWAY_US {
            flooded = report(hv, 0, 0) == 2;
            cpu::relax();
        }
    }
    let away_us = cpu::now_us().saturating_sub(start_us);
    let served = passes(hv, 0);
    let end = report(hv, 1, 0);
    let goes_on = wait_for(hv, PATIENCE_US, || report(hv, 1, 0) >= end + 2);
    hv.homes[1].task[0].store(task::RELEASE, SeqCst);
    let released = passes(hv, 1);
    expect(there, "the other guest repairs nothing")?;
    expect(ready && flooded, "the guest did not fill the queue in time")?;
    served.and(released)?;
    let (tally, _) = tally_of(hv, 0)?;
    let (neighbours, missed) = tally_of(hv, 1)?;
    seen.count("requests", report(hv, 0, 1));
    seen.count("refused_by_the_unit", report(hv, 0, 2));
    seen.count("notices_of_loss", losses() - before);
    seen.count("half_seen_groups_discarded", tally.discarded);
    seen.count("answered_success", tally.succeeded);
    seen.count("groups", report(hv, 0, 3));
    seen.count("answers_at_the_device", report(hv, 0, 4));
    seen.count("nobody_looked_for_us", away_us);
    seen.count("groups_of_the_neighbour", neighbours.opened);
    seen.count("longest_to_answer_of_the_neighbour_less_than_us", longest_answer_us(hv, &[1]));
    expect(losses() > before, "nobody was told that page requests were lost")?;
    expect(tally.discarded > 0, "no half-seen group was discarded")?;
    expect(report(hv, 0, 3) == report(hv, 0, 4), "a group has no answer, or several")?;
    expect(report(hv, 0, 5) == 0, "the device got an answer that it did not ask for")?;
    expect(goes_on, "the other guest's device is not served any more")?;
    expect(
        neighbours.succeeded == neighbours.opened && missed == Missed::ZERO && report(hv, 1, 1) == 0,
        "the other guest's device was touched",
    )?;
    Ok(
        "the queue overflowed: half-seen groups were discarded, every whole one has one answer, both devices go on",
    )
}

/// What was taken out of the tables stays in unit and device until they are told to forget it, and not longer.
pub fn staleness(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    const AT: Iova = Iova(0x4100_0000);
    const WORDS: [u64; 5] = [0x57A1E, 0x57A1F, 0x57A20, 0x57A21, 0x57A22];
    let number = *requesters(hv).first().ok_or("there is no sva-dev")?;
    let function = &hv.devices[number].function;
    let engine = Engine::new(&hv.config, function).ok_or("sva-dev is out of reach")?;
    let target = Canary::new(hv)?;
    let no = |_| "the unit refused";
    let features = Features { device_tlb: true, page_requests: true, pasid: false };
    control::assign(hv, function.id, features).map_err(no)?;
    let share = Share::new(8);
    let space = control::Space::new(hv, &share, function.id, None).map_err(no)?;
    let grant = target.0.grant(Gpa(0), PAGE_SIZE).ok_or("a frame cannot be granted")?;
    space.map(hv, &share, AT, &grant, Perms::READ_WRITE).map_err(no)?;
    function.enable_page_requests(&hv.config, ALLOCATION, false).map_err(|_| "the device refused")?;
    function.enable_bus_master(&hv.config);

    let write = |at: usize, control| {
        let iova = Iova(AT.0 + at as u64 * 8);
        engine.start(0, iova, WORDS[at], control, 0);
        wait_for(hv, PATIENCE_US, || engine.status(0) != Engine::BUSY);
        (engine.status(0), target.0.load(Gpa(at as u64 * 8)) == Some(WORDS[at]))
    };
    let mapped = [write(0, Engine::CACHED_WRITE), write(1, Engine::PLAIN_WRITE)];
    let unmapped = space.remove(hv, &share, AT, PAGE_SIZE).map_err(no)?;
    let stale = write(2, Engine::CACHED_WRITE);
    let before = engine.invalidations();
    space.forget(hv, &share, AT, PAGE_SIZE, unmapped).map_err(no)?;
    let reached = engine.invalidations() - before;
    let forgotten = [write(3, Engine::CACHED_WRITE), write(4, Engine::PLAIN_WRITE)];

    function.disable_bus_master(&hv.config);
    let leaving = control::block(hv, function.id).map_err(no)?;
    space.end(hv, &share).map_err(no)?;
    function.disable_page_requests(&hv.config);
    hv.tables.with(|tables| iommu::Tables::finish(tables, leaving));
    target.release(hv);
    seen.count("unmaps", 1);
    seen.count("invalidations_at_the_device", reached);
    expect(mapped == [(Engine::DONE, true); 2], "a write to a page that is mapped did not arrive")?;
    expect(stale == (Engine::DONE, true), "the device kept nothing, so there is nothing to see")?;
    expect(reached == 1, "the device was not told when the wait was over")?;
    expect(forgotten[0] == (Engine::NOT_MAPPED, false), "the device still has the translation")?;
    expect(forgotten[1] == (Engine::REFUSED, false), "the unit still has the translation")?;
    Ok(
        "a device used its copy of a removed translation until the invalidation; when that had completed, neither it nor the unit had one",
    )
}

/// An array of invalidations with a bad entry in its middle: what comes before is done, the rest is not, and each is told.
pub fn batch(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    perform(hv, 0, [task::BATCH, 0, 0], devices[0])?;
    let [entries, first, second] = [0, 1, 2].map(|number: usize| report(hv, 0, number));
    seen.count("entries", entries);
    seen.count("done_before_the_bad_one", first);
    seen.count("done_when_asked_again", second);
    let home = &hv.homes[0];
    let counted = [&home.invalidated, &home.refused_invalidations].map(|count| count.load(Relaxed));
    seen.count("counted_as_done", counted[0]);
    seen.count("counted_as_refused", counted[1]);
    expect((entries, first, second) == (5, 2, 2), "an entry was done that should not be, or not done")?;
    expect(counted == [4, 1], "the guest's entries were not counted as what became of them")?;
    Ok(
        "two entries before a bad one were done and reached the device, the two behind it only when asked for again",
    )
}
