//! What the demonstration shows, one function a scene.
//!
//! A scene arranges, lets devices and guests act, and checks what came of it. It fails by saying which expectation did
//! not hold. Frames are counted around each scene: one that leaves a frame taken has failed.

mod doorbell;
mod interrupts;
mod nested;
mod pager;
mod pressure;
mod recovery;
mod restart;
mod trust;

use crate::{
    control,
    guest::{self},
    hypervisor::{Device, Ending, GUESTS, Hypervisor},
    memory::{self, GuestRam, Share},
    service::wait_for,
    tables::Stage,
    wanted,
};
use broker::{Missed, Restraint, Tally};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use heapless::Vec;
use iommu::{Access, Bus, FaultReason, Features, Gpa, Iova, PAGE_SIZE, Perms};
use pcie::ConfigSpace as _;

/// The tasks of the guest program.
mod task {
    pub const EVENT: u64 = 1;
    pub const WATCH: u64 = 2;
    pub const REPAIR: u64 = 3;
    pub const SILENCE: u64 = 4;
    pub const FORGERY: u64 = 5;
    pub const HOLD: u64 = 6;
    pub const RELEASE: u64 = 7;
    pub const LEAVE: u64 = 8;
    pub const ISOLATION: u64 = 9;
    pub const RESTRAINT: u64 = 10;
    pub const NEIGHBOUR: u64 = 11;
    pub const CLAIMS: u64 = 12;
    pub const FLOOD: u64 = 13;
    pub const BATCH: u64 = 14;
    pub const NESTED: u64 = 15;
    pub const REFUSED_INTERRUPT: u64 = 16;
    pub const LOSSES: u64 = 17;
    pub const UNMAPS: u64 = 18;
}

/// How long a scene waits for a guest, in microseconds of the machine's time.
const PATIENCE_US: u64 = 5_000_000;
/// How long the neighbour watches its memory in [`isolation`]: longer than the tries take.
const WATCH_MS: u64 = 1_000;

/// What a scene has seen: the numbers that go into the report.
struct Seen {
    name: &'static str,
}

impl Seen {
    fn count(&self, key: &str, value: u64) {
        defmt::info!("scene count name={=str} key={=str} value={=u64}", self.name, key, value);
    }
}

/// An expectation that did not hold.
type Unexpected = &'static str;

type Scene = fn(&Hypervisor, &Seen) -> Result<&'static str, Unexpected>;

/// Its name, whether it needs devices that send page requests, and itself.
type SceneOf = (&'static str, bool, Scene);

/// Scenes that a command line names, at most.
const NAMED: usize = 16;

/// The ordinary scenes.
static SCENES: [SceneOf; 10] = [
    ("deny", false, deny),
    ("allow", false, allow),
    ("event", true, event),
    ("repair", true, repair),
    ("silence", true, silence),
    ("forgery", true, forgery),
    ("restraint", true, restraint),
    ("claims", true, claims),
    ("departure", true, departure),
    ("isolation", true, isolation),
];

/// Scenes that are shown only where the command line names them: each needs a boot, or a machine, that is made for it.
static FURTHER: &[SceneOf] = &[
    ("recovery", true, recovery::recovery),
    ("restart", true, restart::restart),
    ("nested", true, nested::nested),
    ("storm", true, pressure::storm),
    ("overflow", true, pressure::overflow),
    ("staleness", true, pressure::staleness),
    ("batch", true, pressure::batch),
    ("trust", false, trust::trust),
    ("interrupts", true, interrupts::interrupts),
    ("pager", true, pager::pager),
];

/// Shows the scenes that were asked for, in that order, or else the ordinary ones; returns whether all of them passed.
pub fn run(hv: &Hypervisor) -> bool {
    let mut named: Vec<&SceneOf, NAMED> = Vec::new();
    for name in wanted::scenes(hv.boot.command_line()) {
        match SCENES.iter().chain(FURTHER).find(|(known, ..)| *known == name) {
            Some(scene) if named.push(scene).is_ok() => {}
            _ => defmt::warn!("the scene {=str} is not known, or is one too many", name),
        }
    }
    if named.is_empty() {
        named.extend(&SCENES);
    }
    let (mut ended, mut passed, mut skipped) = (0u32, 0u32, 0u32);
    for &(name, needs_requests, scene) in named {
        if needs_requests && requesters(hv).len() < GUESTS {
            defmt::warn!(
                "scene skip name={=str} reason=there are no two devices that send page requests",
                name
            );
            skipped += 1;
            continue;
        }
        defmt::info!("scene begin name={=str}", name);
        let frames = hv.pool.with(|pool| pool.in_use());
        let result = scene(hv, &Seen { name }).and_then(|seen| {
            let left = hv.pool.with(|pool| pool.in_use());
            if left == frames { Ok(seen) } else { Err("memory was not given back") }
        });
        ended += 1;
        match result {
            Ok(seen) => {
                passed += 1;
                defmt::info!("scene end name={=str} passed=true seen={=str}", name, seen);
            }
            Err(what) => defmt::info!("scene end name={=str} passed=false seen={=str}", name, what),
        }
    }
    defmt::info!("demonstration end scenes={=u32} passed={=u32}", ended, passed);
    passed == ended && skipped == 0 && ended > 0
}

/// Turns a condition into the name of what did not hold.
fn expect(holds: bool, otherwise: Unexpected) -> Result<(), Unexpected> {
    if holds { Ok(()) } else { Err(otherwise) }
}

/// Returns the devices that send page requests, by their place in [`Hypervisor::devices`].
fn requesters(hv: &Hypervisor) -> Vec<usize, GUESTS> {
    let requests = |(_, device): &(usize, &Device)| device.function.has_page_requests();
    hv.devices.iter().enumerate().filter(requests).map(|(number, _)| number).take(GUESTS).collect()
}

/// Waits for a guest's end.
fn ending_of(hv: &Hypervisor, index: usize) -> Result<Ending, Unexpected> {
    let mut ending = None;
    if wait_for(hv, PATIENCE_US, || {
        ending = hv.homes[index].ending.with(|ending| *ending);
        ending.is_some()
    }) {
        return ending.ok_or("a guest did not end in time");
    }
    guest::stop(hv, index);
    let stopped = wait_for(hv, PATIENCE_US, || hv.homes[index].ending.with(|ending| ending.is_some()));
    Err(if stopped { "a guest did not end in time, and was stopped" } else { "a guest cannot be stopped" })
}

/// Waits until a guest has passed its task.
fn passes(hv: &Hypervisor, index: usize) -> Result<(), Unexpected> {
    match ending_of(hv, index)? {
        Ending::Finished { passed: true } => Ok(()),
        Ending::Finished { passed: false } => Err("the guest's own check failed; its lines above say which"),
        Ending::Crashed => Err("the guest crashed"),
        Ending::Stopped => Err("the guest was stopped"),
        Ending::NotStarted => Err("the guest could not be made"),
    }
}

/// Runs `task` on guest `index` with one device, and waits until it has passed.
fn perform(hv: &Hypervisor, index: usize, task: [u64; 3], device: usize) -> Result<(), Unexpected> {
    guest::start(hv, index, task, &[device]);
    passes(hv, index)
}

fn report(hv: &Hypervisor, index: usize, number: usize) -> u64 {
    hv.homes[index].reports[number].load(Relaxed)
}

/// What was counted of a guest that ended, and that its groups add up.
fn tally_of(hv: &Hypervisor, index: usize) -> Result<(Tally, Missed), Unexpected> {
    let home = &hv.homes[index];
    let (tally, missed) = (home.tally.with(|tally| *tally), home.missed.with(|missed| *missed));
    expect(home.left.load(Relaxed) == 0, "a group has no answer although its guest is gone")?;
    expect(
        tally.opened == tally.answered() + tally.discarded,
        "groups opened are not the sum of groups answered and discarded",
    )?;
    Ok((tally, missed))
}

/// QEMU's `iommu-testdev`: writes one word through the IOMMU, and reads it back where it should have arrived.
struct Writer<'h> {
    device: &'h Device,
    registers: arch::bus::Mmio,
}

impl<'h> Writer<'h> {
    const DOES_IT: usize = 0x00;
    const IOVA: usize = 0x04;
    const LENGTH: usize = 0x0C;
    const RESULT: usize = 0x10;
    const ARM: usize = 0x14;
    const ATTRIBUTES: usize = 0x18;
    const PHYSICAL: usize = 0x1C;

    const DONE: u32 = 0;
    /// The access was refused.
    const REFUSED: u32 = 0xDEAD_0002;

    /// What it writes.
    const PATTERN: u32 = 0x1234_5678;

    fn is_it(device: &Device) -> bool {
        (device.function.vendor, device.function.device) == (0x1B36, 0x0005)
    }

    fn find(hv: &'h Hypervisor) -> Result<Self, Unexpected> {
        Self::nth(hv, 0)
    }

    /// Returns the device of this kind before which there are `n` others.
    fn nth(hv: &'h Hypervisor, n: usize) -> Result<Self, Unexpected> {
        let device = hv
            .devices
            .iter()
            .filter(|device| Self::is_it(device))
            .nth(n)
            .ok_or("there are too few iommu-testdevs")?;
        device.function.enable_memory(&hv.config);
        let registers = memory::device(device.registers.clone()).ok_or("iommu-testdev is out of reach")?;
        Ok(Self { device, registers })
    }

    /// Writes one word to `iova`, expected at `phys`; returns the device's verdict.
    fn write(&self, iova: Iova, phys: u64) -> u32 {
        let set = |register, value| self.registers.write32(register, value);
        let set_pair = |register, value: u64| {
            set(register, value as u32);
            set(register + 4, (value >> 32) as u32);
        };
        set_pair(Self::IOVA, iova.0);
        set_pair(Self::PHYSICAL, phys);
        set(Self::LENGTH, 4);
        set(Self::ATTRIBUTES, 0);
        set(Self::ARM, 1);
        // Reading is what starts it.
        let _ = self.registers.read32(Self::DOES_IT);
        self.registers.read32(Self::RESULT)
    }
}

/// A frame whose words are all known, to see whether anybody wrote to it.
struct Canary(GuestRam);

impl Canary {
    fn new(hv: &Hypervisor) -> Result<Self, Unexpected> {
        let mut frame = GuestRam::new(hv.pool, 1).ok_or("there is no frame for a canary")?;
        for at in (0..PAGE_SIZE).step_by(8) {
            frame.store(Gpa(at), Self::word(at));
        }
        Ok(Self(frame))
    }

    const fn word(at: u64) -> u64 {
        at.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5043_4152_4459
    }

    fn is_unchanged(&self) -> bool {
        (0..PAGE_SIZE).step_by(8).all(|at| self.0.load(Gpa(at)) == Some(Self::word(at)))
    }

    fn phys(&self) -> u64 {
        self.0.phys().0
    }

    fn release(self, hv: &Hypervisor) {
        hv.pool.with(|pool| pool.give_back(self.0.into_buffer()));
    }
}

/// Before any attachment a device's DMA is refused, and the fault is reported.
fn deny(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let writer = Writer::find(hv)?;
    let target = Canary::new(hv)?;
    let before = hv.unowned.with(|(count, _)| *count);
    writer.device.function.enable_bus_master(&hv.config);

    let verdict = writer.write(Iova(target.phys()), target.phys());
    let reported = wait_for(hv, PATIENCE_US, || hv.unowned.with(|(count, _)| *count) > before);

    writer.device.function.disable_bus_master(&hv.config);
    let unchanged = target.is_unchanged();
    let address = target.phys();
    target.release(hv);
    expect(verdict == Writer::REFUSED, "the device was not refused")?;
    expect(unchanged, "memory changed")?;
    expect(reported, "no fault was reported")?;
    let fault = hv.unowned.with(|(_, last)| *last).ok_or("no fault was reported")?;
    seen.count("stream", fault.stream.0.into());
    seen.count("address", fault.iova.0);
    seen.count("code", fault.code.into());
    expect(fault.stream == writer.device.function.id, "the fault names another device")?;
    expect(fault.reason == FaultReason::NotAttached, "the fault names another reason")?;
    if fault.access == Access::Unknown {
        // SMMUv3 reports a device without a stream table entry by its identity alone.
        return Ok(
            "DMA before any attachment was refused; the fault came by interrupt with device and reason",
        );
    }
    expect(fault.iova.0 == address, "the fault names another address")?;
    expect(fault.access == Access::Write, "the fault names another access")?;
    Ok("DMA before any attachment was refused; the fault came by interrupt with device, address and reason")
}

/// Attached and mapped, the same DMA arrives; unmapped and invalidated, it is refused again.
fn allow(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    const AT: Iova = Iova(0x4000_0000);
    let writer = Writer::find(hv)?;
    let stream = writer.device.function.id;
    let target = Canary::new(hv)?;
    let no = |_| "the unit refused";
    control::assign(hv, stream, Features::default()).map_err(no)?;
    let share = Share::new(8);
    let space = control::Space::new(hv, &share, stream, None).map_err(no)?;
    let grant = target.0.grant(Gpa(0), PAGE_SIZE).ok_or("a frame cannot be granted")?;
    space.map(hv, &share, AT, &grant, Perms::READ_WRITE).map_err(no)?;
    writer.device.function.enable_bus_master(&hv.config);

    let at = 0x128;
    let verdict = writer.write(Iova(AT.0 + at), target.phys() + at);
    let arrived = target.0.load(Gpa(at)).unwrap_or(0) as u32;
    space.unmap(hv, &share, AT, PAGE_SIZE).map_err(no)?;
    let before = hv.unowned.with(|(count, _)| *count);
    let refused = writer.write(Iova(AT.0 + at + 8), target.phys() + at + 8);
    let beside = target.0.load(Gpa(at + 8));
    let reported = wait_for(hv, PATIENCE_US, || hv.unowned.with(|(count, _)| *count) > before);

    writer.device.function.disable_bus_master(&hv.config);
    let leaving = control::block(hv, stream).map_err(no)?;
    space.end(hv, &share).map_err(no)?;
    hv.tables.with(|tables| iommu::Tables::finish(tables, leaving));
    target.release(hv);
    expect(verdict == Writer::DONE, "the device was refused although its page is mapped")?;
    expect(arrived == Writer::PATTERN, "the word did not arrive")?;
    expect(refused == Writer::REFUSED, "the device was not refused after its page was unmapped")?;
    expect(beside == Some(Canary::word(at + 8)), "memory changed after it was unmapped")?;
    expect(reported, "no fault was reported")?;
    let reason = hv.unowned.with(|(_, last)| last.map(|fault| fault.reason));
    expect(reason.is_some_and(|reason| is_of_unmapped(hv, reason)), "the fault names another reason")?;
    seen.count("written", arrived.into());
    seen.count("unmaps", 1);
    Ok("the word arrived in the right frame; after unmap and invalidation the same DMA was refused")
}

/// Whether `reason` is what the unit says of an address at which nothing is mapped.
///
/// A second-stage entry of VT-d is not present when it permits nothing, and that is what the unit reports.
fn is_of_unmapped(hv: &Hypervisor, reason: FaultReason) -> bool {
    match reason {
        FaultReason::NotMapped => true,
        FaultReason::NotPermitted => hv.stage == Stage::Second,
        _ => false,
    }
}

/// A fault that nobody can repair reaches the guest that owns the device, and no other.
fn event(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    guest::start(hv, 1, [task::WATCH, 100, 0], &[devices[1]]);
    let second_stage = u64::from(hv.stage == Stage::Second);
    let told = perform(hv, 0, [task::EVENT, second_stage, 0], devices[0]);
    let watched = passes(hv, 1);
    told.and(watched)?;
    seen.count("events", report(hv, 0, 0));
    seen.count("interrupts", report(hv, 0, 1));
    seen.count("events_of_the_other_guest", report(hv, 1, 0));
    seen.count("requests_of_the_other_guest", report(hv, 1, 2));
    expect(report(hv, 0, 0) >= 3 && report(hv, 0, 1) >= 1, "the owner was not told")?;
    expect(report(hv, 1, 0) == 0 && report(hv, 1, 2) == 0, "the other guest was told")?;
    Ok(
        "three refused writes, as numbered events in the owner's ring, by virtual interrupt, one to a sleeping guest; the other saw nothing",
    )
}

/// Both guests repair the faults of their own devices at once.
fn repair(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    for index in 0..GUESTS {
        guest::start(hv, index, [task::REPAIR, 0xA0 + index as u64, 0], &[devices[index]]);
    }
    let results = [0, 1].map(|index: usize| passes(hv, index));
    let mut total = Tally::default();
    for (index, result) in results.into_iter().enumerate() {
        result?;
        let (tally, _) = tally_of(hv, index)?;
        expect(tally.succeeded > 0 && tally.expired == 0, "a group was not answered by its guest")?;
        expect(report(hv, index, 2) == report(hv, index, 3), "the device misses an answer")?;
        expect(report(hv, index, 4) == 0, "the device got an answer that it did not ask for")?;
        expect(tally.opened == report(hv, index, 2), "device and hypervisor count different groups")?;
        total.opened += tally.opened;
        total.succeeded += tally.succeeded;
        total.declined += tally.declined;
    }
    let unmapped: u64 = hv.homes.iter().map(|home| home.unmapped.load(Relaxed)).sum();
    seen.count("groups", total.opened);
    seen.count("answered_success", total.succeeded);
    seen.count("answered_invalid", total.declined);
    seen.count("pages_mapped", report(hv, 0, 1) + report(hv, 1, 1));
    seen.count("unmaps", unmapped);
    let longest = |of: fn(&crate::hypervisor::Home) -> u64| hv.homes.iter().map(of).max().unwrap_or(0);
    seen.count("longest_to_record_us", longest(|home| home.longest_to_record_us.load(Relaxed)));
    seen.count("longest_to_answer_less_than_us", longest_answer_us(hv, &[0, 1]));
    Ok(
        "both guests at once: request, interrupt, ring, map, answer by cookie; the data is right, each group has one answer",
    )
}

/// A guest that does not answer is answered for, at the deadline of its device.
fn silence(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    hv.latest_expiry_us.store(0, Relaxed);
    perform(hv, 0, [task::SILENCE, 0, 0], devices[0])?;
    let (tally, missed) = tally_of(hv, 0)?;
    seen.count("expired", tally.expired);
    seen.count("late_answers_refused", missed.late);
    seen.count("latest_us_after_its_deadline", hv.latest_expiry_us.load(Relaxed));
    seen.count("stray_answers_at_the_device", report(hv, 0, 3));
    expect(tally.expired == 2 && report(hv, 0, 2) == 2, "a silent group was not answered at its deadline")?;
    expect(missed.late == 2 && report(hv, 0, 1) == 2, "a late answer was not refused")?;
    expect(report(hv, 0, 3) == 0, "the device got a second answer")?;
    Ok(
        "100 ms and 20 ms deadlines: the hypervisor answered, the device failed cleanly, the late answers were refused",
    )
}

/// Cookies that were made up, are stale, were used, or are another guest's change nothing.
fn forgery(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    guest::start(hv, 1, [task::HOLD, 0, 0], &[devices[1]]);
    let holds = wait_for(hv, PATIENCE_US, || report(hv, 1, 0) != 0);
    let foreign = report(hv, 1, 0);
    let forged = if holds {
        perform(hv, 0, [task::FORGERY, foreign, 0], devices[0])
    } else {
        Err("the other guest has no request outstanding")
    };
    let still_held = hv.homes[1].outstanding(hv.ledger) == 1;
    hv.homes[1].task[0].store(task::RELEASE, SeqCst);
    let released = passes(hv, 1);
    forged.and(released)?;
    let (_, missed) = tally_of(hv, 0)?;
    let (others, _) = tally_of(hv, 1)?;
    seen.count("forged", report(hv, 0, 0));
    seen.count("refused", report(hv, 0, 1));
    seen.count("unknown_cookies", missed.unknown);
    seen.count("stale_cookies", missed.stale);
    seen.count("repeated_cookies", missed.late);
    seen.count("out_of_range", missed.out_of_range);
    expect(report(hv, 0, 0) > 0 && report(hv, 0, 0) == report(hv, 0, 1), "a forged answer was taken")?;
    expect(
        missed.unknown > 0 && missed.stale > 0 && missed.late > 0 && missed.out_of_range > 0,
        "a kind was not counted",
    )?;
    expect(still_held && others.succeeded == 1, "the other guest's request was touched")?;
    expect(report(hv, 0, 3) == 0 && report(hv, 1, 2) == 0, "a device got an answer that it did not ask for")?;
    Ok(
        "made-up, stale, repeated, foreign and out-of-range cookies: each refused and counted, nothing changed",
    )
}

/// Runs `task` on guest 0 while the other guest repairs the faults of its own device; returns how many that were.
fn perform_beside_neighbour(hv: &Hypervisor, task: u64, devices: &[usize]) -> Result<u64, Unexpected> {
    guest::start(hv, 1, [task::NEIGHBOUR, 0, 0], &devices[1..]);
    let there = wait_for(hv, PATIENCE_US, || report(hv, 1, 0) > 0);
    let before = report(hv, 1, 0);
    let performed = perform(hv, 0, [task, 0, 0], devices[0]);
    let end = report(hv, 1, 0);
    // One read may have been on its way; the next one was not.
    let goes_on = wait_for(hv, PATIENCE_US, || report(hv, 1, 0) >= end + 2);
    hv.homes[1].task[0].store(task::RELEASE, SeqCst);
    let released = passes(hv, 1);
    expect(there, "the other guest repairs nothing")?;
    performed.and(released)?;
    let (neighbours, missed) = tally_of(hv, 1)?;
    expect(end > before, "the other guest's device was not served meanwhile")?;
    expect(goes_on, "the other guest's device is not served any more")?;
    expect(
        neighbours.succeeded == neighbours.opened && missed == Missed::ZERO && report(hv, 1, 1) == 0,
        "the other guest's device was touched",
    )?;
    let restraints = hv.homes[1].restraints.iter().map(|count| count.load(Relaxed)).sum::<u64>();
    expect(restraints == 0, "the other guest's device was restrained")?;
    Ok(end - before)
}

/// A guest leaves requests unanswered, again and again: its device is warned, throttled, and may ask no more.
fn restraint(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    let during = perform_beside_neighbour(hv, task::RESTRAINT, &devices)?;
    let (tally, missed) = tally_of(hv, 0)?;
    let held_to = |restraint| hv.homes[0].restraints[restraint as usize].load(Relaxed);
    let [lifted, warned, throttled, off] =
        [Restraint::None, Restraint::Warned, Restraint::Throttled, Restraint::RequestsOff].map(held_to);
    seen.count("expired", tally.expired);
    seen.count("late_answers_refused", missed.late);
    seen.count("answered_in_time", tally.succeeded);
    seen.count("refused_at_once", tally.refused);
    seen.count("warned", warned);
    seen.count("throttled", throttled);
    seen.count("lifted", lifted);
    seen.count("requests_off", off);
    seen.count("groups_of_the_neighbour", during);
    seen.count("longest_to_answer_of_the_neighbour_less_than_us", longest_answer_us(hv, &[1]));
    let told = [0, 1, 2, 3, 4].map(|number: usize| report(hv, 0, number));
    let counted = [tally.expired, missed.late, tally.succeeded, tally.refused, tally.opened];
    expect(told == counted, "guest and hypervisor count different groups")?;
    expect(report(hv, 0, 5) == 0, "the device got an answer that it did not ask for")?;
    expect(
        tally.expired == 24 && (warned, throttled, lifted, off) == (4, 2, 3, 1),
        "a restraint was not applied, or not lifted",
    )?;
    perform(hv, 0, [task::REPAIR, 0x4E, 0], devices[0])?;
    let (next, _) = tally_of(hv, 0)?;
    seen.count("groups_of_the_next_owner", next.opened);
    expect(next.succeeded > 0 && next.refused == 0, "the next owner's requests were refused")?;
    Ok(
        "warned, throttled, lifted by an answer; off after 16 in a row; the neighbour was served, the next owner starts afresh",
    )
}

/// A guest claims repairs that are none, then gives its device's page requests up.
fn claims(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    let during = perform_beside_neighbour(hv, task::CLAIMS, &devices)?;
    let (tally, _) = tally_of(hv, 0)?;
    seen.count("unrepaired", tally.unrepaired);
    seen.count("held", tally.held);
    seen.count("answered_success", tally.succeeded);
    seen.count("answered_failure", tally.failed);
    seen.count("evicted", tally.evicted);
    seen.count("longest_to_answer_less_than_us", longest_answer_us(hv, &[0]));
    seen.count("groups_of_the_neighbour", during);
    let told = [0, 1, 2, 3].map(|number: usize| report(hv, 0, number));
    expect(
        told == [tally.unrepaired, tally.held, tally.succeeded, tally.failed],
        "guest and hypervisor count different groups",
    )?;
    expect(tally.held > 0 && tally.expired == 0, "answers were not held back, or beyond their deadline")?;
    expect(tally.failed == 1 && tally.evicted == 1, "a failure did not end what was outstanding")?;
    expect(report(hv, 0, 4) == 0, "the device got an answer that it did not ask for")?;
    Ok(
        "false claims are held back for longer each time, trust returns; a response failure ends its own device's requests alone",
    )
}

/// Returns the end of the bucket of the longest answer among the guests of these homes, in microseconds.
fn longest_answer_us(hv: &Hypervisor, homes: &[usize]) -> u64 {
    let times = homes.iter().map(|&index| hv.homes[index].answer_times.with(|times| *times));
    1 << times.filter_map(|times| times.iter().rposition(|&count| count > 0)).max().unwrap_or(0)
}

/// A guest goes with requests outstanding; a new one takes its device over.
fn departure(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    guest::start(hv, 0, [task::LEAVE, 0, 0], &[devices[0]]);
    let ready = wait_for(hv, PATIENCE_US, || report(hv, 0, 1) == 1);
    let outstanding = hv.homes[0].outstanding(hv.ledger);
    let enables = enables_of(hv, devices[0]);
    let registers = registers_in_use(hv, devices[0])?;
    let ram = hv.homes[0].ram.load(Relaxed);
    guest::stop(hv, 0);
    let ending = ending_of(hv, 0)?;
    let enables_left = enables_of(hv, devices[0]);
    let registers_left = registers_in_use(hv, devices[0])?;
    expect(ready, "the guest has no requests outstanding")?;
    expect(ending == Ending::Stopped, "the guest ended by itself")?;
    let (left, _) = tally_of(hv, 0)?;
    seen.count("outstanding_when_it_was_stopped", outstanding as u64);
    seen.count("evicted", left.evicted);
    seen.count("half_seen_groups_discarded", left.discarded);
    expect(report(hv, 0, 0) == 4 && left.evicted == 4, "not every request was answered when the guest went")?;
    expect(left.discarded == 1, "the half-seen group was not discarded")?;
    seen.count("enables", enables);
    seen.count("enables_left", enables_left);
    expect(enables >= 3, "a guest's device does not ask for pages")?;
    expect(enables_left == 0, "a device that is nobody's may issue requests, of one kind or another")?;
    seen.count("registers_in_use", registers);
    seen.count("registers_left", registers_left);
    expect(registers > 0, "a guest's device has nothing to do")?;
    expect(registers_left == 0, "a device keeps what its last owner told it")?;
    let words_left = words_left_in(hv, ram)?;
    seen.count("words_left_in_memory", words_left);
    expect(words_left == 0, "memory is handed out with what the last owner left there")?;

    perform(hv, 0, [task::REPAIR, 0xDE, 0], devices[0])?;
    let (tally, _) = tally_of(hv, 0)?;
    seen.count("groups_of_the_next_owner", tally.opened);
    expect(tally.succeeded > 0 && report(hv, 0, 4) == 0, "the next owner's requests were not served")?;

    let without_reset = hv.devices.iter().position(Writer::is_it).ok_or("there is no iommu-testdev")?;
    perform(hv, 1, [task::WATCH, 1, 0], without_reset)?;
    guest::start(hv, 1, [task::WATCH, 1, 0], &[without_reset]);
    let again = ending_of(hv, 1)?;
    seen.count("given_again_without_reset", (again != Ending::NotStarted).into());
    let expected = if hv.may_stay_unreset() { Ending::Finished { passed: true } } else { Ending::NotStarted };
    expect(
        again == expected,
        "a device without reset was given to the next guest, or refused although it may be",
    )?;
    Ok(match again {
        Ending::NotStarted => {
            "every request was answered, the device switched off and reset, its memory came back and is handed out empty; a new guest repairs; a device without reset is given to nobody else"
        }
        _ => {
            "every request was answered, the device switched off and reset, its memory came back and is handed out empty; a new guest repairs; a device without reset was given on, as the command line allows"
        }
    })
}

/// Counts the registers of a `sva-dev` that differ from what they are after a reset: those of its lanes, and its counters.
fn registers_in_use(hv: &Hypervisor, number: usize) -> Result<u64, Unexpected> {
    const COUNTERS: core::ops::Range<usize> = 0x010..0x028;
    const LANES: core::ops::Range<usize> = 0x100..0x300;
    let device = hv.devices.get(number).ok_or("there is no such device")?;
    let registers = memory::device(device.registers.clone()).ok_or("a device is out of reach")?;
    let words = COUNTERS.step_by(4).chain(LANES.step_by(4));
    Ok(words.filter(|&at| registers.read32(at) != 0).count() as u64)
}

/// Counts what a device may do, as its configuration space has it: master the bus, translate (ATS), ask for pages (PRI), name
/// address spaces (PASID).
fn enables_of(hv: &Hypervisor, number: usize) -> u64 {
    const COMMAND: u16 = 0x04;
    const BUS_MASTER: u32 = 1 << 2;
    const EXTENDED: u16 = 0x100;
    /// Each capability has 8 bytes at least, so a longer chain has a loop.
    const CAPABILITIES: usize = (0x1000 - EXTENDED as usize) / 8;
    let read = |at| hv.devices.get(number).map_or(0, |device| hv.config.read32(device.function.id, at));
    let mut enables = u64::from(read(COMMAND) & BUS_MASTER != 0);
    let mut at = EXTENDED;
    for _ in 0..CAPABILITIES {
        let header = read(at);
        let enable = match header as u16 {
            0x000F => 1 << 31,
            0x0013 => 1 << 0,
            0x001B => 1 << 16,
            _ => 0,
        };
        enables += u64::from(read(at + 4) & enable != 0);
        at = (header >> 20) as u16 & !3;
        if at < EXTENDED {
            break;
        }
    }
    enables
}

/// Counts the words that are not zero in the memory which the next guest would get: the last one's, that lay at `ram`.
fn words_left_in(hv: &Hypervisor, ram: u64) -> Result<u64, Unexpected> {
    let memory = GuestRam::new(hv.pool, guest::RAM_FRAMES).ok_or("there is no memory for a guest")?;
    let is_the_same = memory.phys().0 == ram;
    let left = (0..memory.bytes()).step_by(8).filter(|&at| memory.load(Gpa(at)) != Some(0)).count();
    hv.pool.with(|pool| pool.give_back(memory.into_buffer()));
    expect(is_the_same, "the next guest would get other memory, which shows nothing")?;
    Ok(left as u64)
}

/// Neither a guest's code nor its device reaches memory that is not its own.
fn isolation(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    let canary = Canary::new(hv)?;
    guest::start(hv, 1, [task::WATCH, WATCH_MS, 0], &[devices[1]]);
    let there = wait_for(hv, PATIENCE_US, || report(hv, 1, 3) != 0);
    let neighbour = hv.homes[1].ram.load(Relaxed) + report(hv, 1, 3);
    let tried = perform(hv, 0, [task::ISOLATION, canary.phys(), neighbour], devices[0]);
    let still_there = hv.homes[1].ending.with(|ending| ending.is_none());
    let watched = passes(hv, 1);
    let unchanged = canary.is_unchanged();
    canary.release(hv);
    expect(there, "the other guest told no page of its memory")?;
    expect(still_there, "the other guest went before the tries were over")?;
    tried.and(watched)?;
    seen.count("tries", report(hv, 0, 0));
    seen.count("refused", report(hv, 0, 1));
    seen.count("by_code", report(hv, 0, 2));
    seen.count("by_call", report(hv, 0, 3));
    seen.count("by_device", report(hv, 0, 4));
    seen.count("accesses_that_the_hypervisor_refused", hv.homes[0].refused_accesses.load(Relaxed));
    seen.count("calls_that_the_hypervisor_refused", hv.homes[0].refused_calls.load(Relaxed));
    expect(unchanged, "the hypervisor's memory changed")?;
    expect(report(hv, 0, 0) > 0 && report(hv, 0, 0) == report(hv, 0, 1), "a try was not refused")?;
    expect(hv.homes[0].refused_accesses.load(Relaxed) == report(hv, 0, 2), "an access was refused unseen")?;
    expect(report(hv, 1, 0) == 0 && report(hv, 1, 2) == 0, "the other guest was told of it")?;
    Ok("every try by code, call, entry and device was refused and reported; the bytes are unchanged")
}
