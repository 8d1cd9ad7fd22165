//! What a unit meets that walks the VT-d driver's tables between any two of its stores, and what becomes of a change for
//! which there is too little of something.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use hosted::{Machine, grant, needs, root, trust, unit};
use iommu::{
    Bus, Commands, Error, Features, FirstStage, Gpa, Invalidations, Iova, Leaving, Pasid, Perms, PhysAddr,
    StreamId, Tables, Translation,
};
use models::{
    memory::{BASE, Memory, UNWRITTEN},
    vtd::{Config, Refusal, VtdUnit},
};
use pgtable::{VtdFirstStage, VtdSecondStage};
use std::{
    fmt,
    ops::Range,
    sync::{Arc, Mutex},
};
use vtd::{FRAME_WORDS, Found};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
/// On another bus.
const FAR: StreamId = StreamId(0x0120);
const PLAIN: Features = Features { device_tlb: false, page_requests: false, pasid: false };
const TAGGED: Features = Features { pasid: true, ..PLAIN };

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

/// What a device reads; [`NOTHING`] if some entry on the way is not present, or a fault that makes it worse than that.
type Seen = Result<u64, Refusal>;

/// An entry that is not present: LRT.2, LCT.2, SRT.2, SCT.2, SPD.2, SPT.2. PASIDs in legacy mode: RTA.2.
const NOT_PRESENT: [u8; 7] = [0x01, 0x02, 0x39, 0x41, 0x51, 0x59, 0x31];
const NOTHING: Seen = Err(Refusal::Fault(0x02));

/// Takes all entries that are not present for the same; a reserved bit, an invalid entry, an access error are not.
fn plain(seen: Seen) -> Seen {
    match seen {
        Err(Refusal::Fault(reason)) if NOT_PRESENT.contains(&reason) => NOTHING,
        other => other,
    }
}

/// Whose accesses are watched: the first three are of one device.
fn watched() -> [(StreamId, Option<Pasid>); 5] {
    [(DISK, None), (DISK, pasid(5)), (DISK, pasid(700)), (NIC, None), (FAR, None)]
}

/// What may be seen now of each that is watched, and how often somebody looked.
#[derive(Default)]
struct Look {
    allowed: [Vec<Seen>; 5],
    looks: usize,
}

/// A bus behind which a unit that remembers nothing walks the tables whenever it could see something new.
///
/// What the driver has stored and not published may be visible already, any part of it: on a unit that looks into the CPU's
/// caches it is, and lines leave a cache when they like. So before each publication every combination of such words is
/// tried.
#[derive(Clone)]
struct Glass {
    unit: &'static VtdUnit,
    memory: Memory,
    /// The driver's tables, by the frame.
    frames: Arc<Vec<PhysAddr>>,
    /// Where every device reads.
    here: Arc<Mutex<Option<Iova>>>,
    look: Arc<Mutex<Look>>,
}

impl Glass {
    fn look(&self) {
        let Some(here) = *self.here.lock().expect("nobody panicked") else { return };
        let mut look = self.look.lock().expect("nobody panicked");
        look.looks += 1;
        for (n, (stream, pasid)) in watched().into_iter().enumerate() {
            let seen = self.seen(stream, pasid, here);
            let allowed = &look.allowed[n];
            assert!(allowed.contains(&seen), "{stream:?} {pasid:?} sees {seen:x?}, not {allowed:x?}");
        }
    }

    fn seen(&self, stream: StreamId, pasid: Option<Pasid>, here: Iova) -> Seen {
        let found = self.unit.find(stream, pasid, here);
        plain(found.map(|at| self.memory.device_load(at).expect("it is in the memory")))
    }

    /// The words of the tables that the CPU stored and the unit does not see.
    fn unpublished(&self) -> Vec<(PhysAddr, u64, u64)> {
        let words =
            self.frames.iter().flat_map(|frame| (frame.0..).step_by(8).take(FRAME_WORDS)).map(PhysAddr);
        words
            .map(|at| (at, self.memory.cpu_load(at), self.memory.device_load(at).expect("a table")))
            .filter(|(_, new, old)| new != old)
            .collect()
    }

    fn show(&self, at: PhysAddr, word: u64) {
        self.memory.device_store(at, word).expect("a table");
    }

    /// Looks while some of what is not published is visible, and puts it back.
    fn look_ahead(&self) {
        let words = self.unpublished();
        let put_back =
            |words: &[(PhysAddr, u64, u64)]| words.iter().for_each(|&(at, _, old)| self.show(at, old));
        if words.len() <= 8 {
            for some in 0..1_usize << words.len() {
                for (_, &(at, new, _)) in words.iter().enumerate().filter(|(n, _)| some >> n & 1 != 0) {
                    self.show(at, new);
                }
                self.look();
                put_back(&words);
            }
            return;
        }
        // A whole frame, which nobody should reach: an eighth of its words alone, and all from either end.
        for &(at, new, old) in words.iter().step_by(8) {
            self.show(at, new);
            self.look();
            self.show(at, old);
        }
        let ends: [Vec<_>; 2] = [words.clone(), words.iter().rev().copied().collect()];
        for end in ends {
            for (n, (at, new, _)) in end.into_iter().enumerate() {
                self.show(at, new);
                if n % 8 == 0 {
                    self.look();
                }
            }
            put_back(&words);
        }
    }

    fn reaches(&self, range: Range<PhysAddr>, how: impl Fn(Range<PhysAddr>)) {
        self.look_ahead();
        let words = (range.end.0 - range.start.0) / 8;
        for (n, at) in (range.start.0..range.end.0).step_by(8).enumerate() {
            how(PhysAddr(at)..PhysAddr(at + 8));
            if words <= 8 || n % 8 == 0 {
                self.look();
            }
        }
    }
}

impl fmt::Debug for Glass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Glass {{ {:?} }}", self.unit)
    }
}

impl Bus for Glass {
    fn read32(&self, offset: usize) -> u32 {
        self.unit.read32(offset)
    }
    fn write32(&self, offset: usize, value: u32) {
        self.unit.write32(offset, value);
        self.look();
    }
    fn read64(&self, offset: usize) -> u64 {
        self.unit.read64(offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        self.unit.write64(offset, value);
        self.look();
    }
    fn publish(&self, range: Range<PhysAddr>) {
        self.reaches(range, |word| self.unit.publish(word));
    }
    fn order(&self, range: Range<PhysAddr>) {
        self.reaches(range, |word| self.unit.order(word));
    }
    fn observe(&self, range: Range<PhysAddr>) {
        self.unit.observe(range);
    }
    fn now_us(&self) -> u64 {
        self.unit.now_us()
    }
}

/// A machine with a glass bus, and what each of those that are watched should see now.
struct Scene {
    machine: Machine<Glass>,
    glass: Glass,
    legacy: bool,
    now: [Seen; 5],
    here: Iova,
}

impl Scene {
    fn new(config: Config, legacy: bool) -> Self {
        let (unit, memory) = unit(config);
        let parts = needs(&memory);
        let frames = [&parts.root].into_iter().chain(&parts.frames).map(|frame| frame.phys()).collect();
        let glass = Glass {
            unit,
            memory: memory.clone(),
            frames: Arc::new(frames),
            here: Arc::default(),
            look: Arc::default(),
        };
        let found = Found::probe(glass.clone()).expect("it is there");
        let found = if legacy { found.in_legacy_mode() } else { found };
        let machine = Machine::from_found(found, unit, memory, parts).expect("it comes into service");
        let here = Iova(machine.page(0xB).0);
        let scene = Self { machine, glass, legacy, now: [NOTHING; 5], here };
        *scene.glass.here.lock().expect("nobody panicked") = Some(here);
        scene
    }

    fn allow(&self, allowed: [Vec<Seen>; 5]) {
        self.glass.look.lock().expect("nobody panicked").allowed = allowed;
    }

    /// Does something after which those in `changed` see something else; everybody else never does.
    fn step<T>(&mut self, changed: &[(usize, Seen)], does: impl FnOnce(&mut Machine<Glass>) -> T) -> T {
        let mut allowed = self.now.map(|seen| vec![seen]);
        for &(n, seen) in changed {
            allowed[n].extend([seen, NOTHING]);
            self.now[n] = seen;
        }
        self.allow(allowed);
        let done = does(&mut self.machine);
        self.allow(self.now.map(|seen| vec![seen]));
        self.glass.look();
        done
    }

    fn assign(&mut self, stream: StreamId, features: Features) {
        let step = |machine: &mut Machine<Glass>| machine.vtd.tables.assign(stream, features);
        let invalidations = self.step(&[], step).expect("it can be assigned");
        self.settle(&invalidations);
    }

    fn settle(&mut self, invalidations: &Invalidations) {
        self.step(&[], |machine| machine.invalidate(invalidations));
        for (n, (stream, pasid)) in watched().into_iter().enumerate() {
            let seen = plain(self.machine.read(stream, pasid, self.here));
            assert_eq!(seen, self.now[n], "{stream:?} {pasid:?}");
        }
    }

    fn finish(&mut self, leaving: Leaving) {
        self.step(&[], |machine| machine.vtd.tables.finish(leaving));
    }

    /// The frames that belong to the tables of `stream` alone, as a walk of the tables in memory finds them.
    fn frames_of(&self, stream: StreamId) -> Vec<PhysAddr> {
        let load = |at: u64| self.machine.memory.device_load(PhysAddr(at)).expect("a table");
        if self.legacy {
            return Vec::new();
        }
        let (bus, devfn) = (u64::from(stream.0 >> 8), u64::from(stream.0 & 0xFF));
        let table = load((self.machine.unit.read64(0x20) & !0xFFF) + bus * 16 + devfn / 128 * 8) & !0xFFF;
        let directory = load(table + devfn % 128 * 32) & !0xFFF;
        let tables = (0..128).map(|n| load(directory + n * 8)).filter(|entry| entry & 1 != 0);
        tables.map(|entry| PhysAddr(entry & !0xFFF)).chain([PhysAddr(directory)]).collect()
    }
}

/// Names a translation, given what it may use.
type Choose = fn(&Roots) -> Translation;

struct Roots {
    first: u64,
    second: u64,
    /// Maps the guest's addresses to the same of the host.
    same: u64,
}

/// The translations of a mode, with what a device reads through each.
fn translations(legacy: bool) -> Vec<(&'static str, Choose, Option<u64>)> {
    let nested: Choose = |roots| Translation::Nested {
        first: FirstStage::Pages { root: Gpa(roots.first), levels: 4 },
        second: root(roots.same, 4),
    };
    let both: [(&str, Choose, Option<u64>); 3] = [
        ("second stage", |roots| Translation::Stage2(root(roots.second, 4)), Some(2)),
        ("bypass", |_| Translation::Bypass(trust()), Some(0xB)),
        ("blocked", |_| Translation::Blocked, None),
    ];
    let scalable: [(&str, Choose, Option<u64>); 2] = [
        ("first stage", |roots| Translation::Stage1(root(roots.first, 4)), Some(1)),
        ("nested", nested, Some(1)),
    ];
    both.into_iter().chain(scalable.into_iter().filter(|_| !legacy)).collect()
}

/// Trees that map where everybody reads.
fn roots(machine: &mut Machine<Glass>, here: Iova) -> Roots {
    let first = machine.tree(VtdFirstStage::<4>);
    let second = machine.tree(VtdSecondStage::<4>);
    let same = machine.tree(VtdSecondStage::<4>);
    machine.map(&first, here, 1);
    machine.map(&second, here, 2);
    same.map(&mut machine.frames, BASE.0, &grant(BASE.0, 256), Perms::READ_WRITE).expect("nothing is there");
    Roots { first: first.root().0, second: second.root().0, same: same.root().0 }
}

/// XSA-328, XSA-347, CVE-2026-45894, -45944, -45945, -74439, -90243: a live entry of several words was changed in the wrong order.
#[test]
fn between_any_two_stores_a_unit_meets_what_was_or_what_will_be_or_nothing() {
    let full = Config::full().with_nesting();
    let incoherent = Config { ecap: full.ecap & !(1 | 1 << 48), ..full };
    for (config, legacy) in [(full, false), (full, true), (incoherent, false), (incoherent, true)] {
        for (name, choose, reads) in translations(legacy) {
            let mut scene = Scene::new(config, legacy);
            scene.step(&[], |_| ());
            let here = scene.here;
            let roots = scene.step(&[], |machine| roots(machine, here));
            let translation = choose(&roots);
            let tagged = if legacy { PLAIN } else { TAGGED };
            let own: &[usize] = if legacy { &[0] } else { &[0, 1, 2] };
            let through = reads.map_or(NOTHING, Ok);
            let attach = |scene: &mut Scene, n: usize, seen: Seen| {
                let (stream, pasid) = watched()[n];
                let does =
                    |machine: &mut Machine<Glass>| machine.vtd.tables.attach(stream, pasid, translation);
                let (attachment, invalidations) = scene.step(&[(n, seen)], does).expect("it can be attached");
                scene.settle(&invalidations);
                attachment
            };

            scene.assign(DISK, tagged);
            let mut attached: Vec<_> = own.iter().map(|&n| attach(&mut scene, n, through)).collect();
            scene.assign(NIC, PLAIN);
            let nic = attach(&mut scene, 3, through);
            scene.assign(FAR, PLAIN);
            attach(&mut scene, 4, through);

            // One attachment leaves, and comes again.
            let first = attached.remove(0);
            let does = |machine: &mut Machine<Glass>| machine.vtd.tables.detach(first);
            let (leaving, invalidations) = scene.step(&[(0, NOTHING)], does).expect("it is attached");
            scene.settle(&invalidations);
            scene.finish(leaving);
            attached.push(attach(&mut scene, 0, through));

            // All of the device leaves.
            let gone: Vec<_> = own.iter().map(|&n| (n, NOTHING)).collect();
            let does = |machine: &mut Machine<Glass>| machine.vtd.tables.block(DISK);
            let (device, invalidations) = scene.step(&gone, does).expect("it is assigned");
            scene.settle(&invalidations);
            let does = |machine: &mut Machine<Glass>| machine.vtd.tables.silence(DISK);
            let invalidations = scene.step(&[], does).expect("it is blocked");
            scene.settle(&invalidations);
            let freed = scene.frames_of(DISK);
            for attachment in attached {
                let does = |machine: &mut Machine<Glass>| machine.vtd.tables.detach(attachment);
                let (leaving, invalidations) = scene.step(&[], does).expect("it is attached");
                scene.settle(&invalidations);
                scene.finish(leaving);
            }
            let before = scene.machine.vtd.tables.frames_free();
            scene.finish(device);
            assert_eq!(scene.machine.vtd.tables.frames_free(), before + freed.len(), "{name}");

            // Nobody reaches the frames that are free now, whatever is in them: a walk as much as a unit that remembers.
            for frame in freed {
                for word in (frame.0..).step_by(8).take(FRAME_WORDS) {
                    scene.glass.show(PhysAddr(word), UNWRITTEN);
                }
            }
            scene.step(&[], |_| ());
            for (n, (stream, pasid)) in watched().into_iter().enumerate() {
                assert_eq!(plain(scene.machine.read(stream, pasid, here)), scene.now[n], "{name}");
            }

            // And they are used again, by somebody else.
            scene.assign(DISK, tagged);
            attach(&mut scene, 0, through);
            let does = |machine: &mut Machine<Glass>| machine.vtd.tables.detach(nic);
            let (leaving, invalidations) = scene.step(&[(3, NOTHING)], does).expect("it is attached");
            scene.settle(&invalidations);
            scene.finish(leaving);
            let looks = scene.glass.look.lock().expect("nobody panicked").looks;
            assert!(looks > 500, "{name}: it looked {looks} times");
            scene.machine.assert_lawful();
        }
    }
}

/// Assigns and attaches whatever the frames suffice for; what fails has changed nothing.
fn fill(machine: &mut Machine, legacy: bool) -> (usize, Vec<iommu::Attachment>, Vec<StreamId>) {
    let page = machine.page(0xB);
    let here = Iova(page.0);
    let exhausted = |error| matches!(error, Error::Exhausted { what } if what.contains("frames"));
    let (mut failed, mut attached, mut assigned) = (0, Vec::new(), Vec::new());
    let numbers = if legacy { vec![None] } else { vec![None, pasid(5), pasid(63), pasid(64), pasid(700)] };
    for stream in [DISK, NIC, StreamId(0xA0), FAR] {
        machine.unit.plug(stream);
        let free = machine.vtd.tables.frames_free();
        match machine.vtd.tables.assign(stream, if legacy { PLAIN } else { TAGGED }) {
            Ok(invalidations) => {
                machine.invalidate(&invalidations);
                assigned.push(stream);
            }
            Err(error) => {
                assert!(exhausted(error), "{error:?}");
                assert_eq!(machine.vtd.tables.frames_free(), free, "nothing is lost");
                failed += 1;
            }
        }
        assert!(machine.read(stream, None, here).is_err());
        for &number in &numbers {
            let free = machine.vtd.tables.frames_free();
            match machine.vtd.tables.attach(stream, number, Translation::Bypass(trust())) {
                Ok((attachment, invalidations)) => {
                    machine.invalidate(&invalidations);
                    assert_eq!(machine.read(stream, number, here), Ok(0xB));
                    attached.push(attachment);
                }
                Err(error) => {
                    let unknown = error == Error::UnknownStream { stream };
                    assert!(if assigned.contains(&stream) { exhausted(error) } else { unknown }, "{error:?}");
                    assert_eq!(machine.vtd.tables.frames_free(), free, "nothing is lost");
                    assert!(machine.read(stream, number, here).is_err(), "it is still blocked");
                    failed += 1;
                }
            }
        }
    }
    (failed, attached, assigned)
}

/// XSA-378, XSA-386, XSA-400, XSA-460: a change that failed half-way left what it had done.
#[test]
fn whichever_frame_is_missing_a_change_happens_or_leaves_everything_as_it_was() {
    for legacy in [false, true] {
        let mut enough = false;
        for frames in 0..=20 {
            let (unit, memory) = unit(Config::full());
            let mut parts = needs(&memory);
            parts.frames.truncate(frames);
            let found = Found::probe(unit).expect("it is there");
            let found = if legacy { found.in_legacy_mode() } else { found };
            let mut machine = Machine::from_found(found, unit, memory, parts).expect("it comes into service");

            let (failed, attached, assigned) = fill(&mut machine, legacy);

            enough |= failed == 0;
            assert_eq!(failed == 0, frames >= if legacy { 2 } else { 19 }, "{frames} frames");
            // All that there is can be given back, but for the context tables: of both halves of a bus, and of another.
            for attachment in attached {
                machine.detach(attachment);
            }
            let tables = |stream: &StreamId| if legacy { stream.0 >> 8 } else { stream.0 >> 7 };
            let mut contexts: Vec<_> = assigned.iter().map(tables).collect();
            contexts.dedup();
            for stream in assigned {
                machine.block(stream);
            }
            assert_eq!(machine.vtd.tables.frames_free(), frames - contexts.len());
            machine.assert_lawful();
        }
        assert!(enough);
    }
}

#[test]
fn a_change_that_is_refused_takes_no_frame() {
    // CAP.ND = 0: 16 domains, of which 15 are for attachments.
    let (unit, memory) = unit(Config { cap: Config::full().cap & !7, ..Config::full() });
    let parts = needs(&memory);
    let mut machine = Machine::enable(unit, memory, unit, parts).expect("it comes into service");
    machine.assign(DISK, TAGGED);
    let free = machine.vtd.tables.frames_free();
    let refuse = |machine: &mut Machine, translation| {
        let error = machine.vtd.tables.attach(DISK, pasid(700), translation).expect_err("it is refused");
        assert_eq!(machine.vtd.tables.frames_free(), free - 1, "the table of PASID 1 and no other");
        error
    };
    for number in 1..16 {
        machine.attach_by(DISK, pasid(number), Translation::Blocked);
    }

    let error = refuse(&mut machine, Translation::Bypass(trust()));
    assert!(matches!(error, Error::Exhausted { what } if what.contains("domain")), "{error:?}");
    let error = refuse(&mut machine, Translation::Stage1(root(0x1000, 9)));
    assert!(matches!(error, Error::Unsupported { .. }), "{error:?}");
    let ticket = machine.vtd.commands.submit(&[]).expect("there is room");
    machine.wait(ticket);
    machine.assert_lawful();
}
