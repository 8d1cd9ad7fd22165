//! Words as the unit finds them: whole entries in memory, of a driver in service, and what it acknowledges in registers. Each is
//! worked out from the field tables of the manual; a comment shows how, as `value << bit within the word`.
//!
//! The unit has addresses of 44 bits (IPS and S2PS 4), accesses memory through the caches, and stalls as it is told.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use hosted::{
    grant, root,
    smmu::{EVENTS, Machine, REQUESTS, Stage, StreamTable, needs, stream_place, translation, unit},
    trust,
};
use iommu::{
    Attachment, Bus, Event, Features, FirstStage, GroupTag, Iova, PageRequest, Pasid, Perms, PhysAddr,
    StreamId, Tables, Translation,
};
use models::smmuv3::{Config, Requested};
use pgtable::{Limits, Stage2, Tree};

const OTHER: StreamId = StreamId(0x20);
const DISK: StreamId = StreamId(0x108);
const PLAIN: Features = Features { device_tlb: false, page_requests: false, pasid: false };
const ATS: Features = Features { device_tlb: true, ..PLAIN };
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };

/// S1CIR 1<<2, S1COR 1<<4, S1CSH 3<<6.
const CACHED: u64 = 0xD4;
/// PPAR 1<<18, MEV 1<<19, S2FWB 1<<25, S1STALLD 1<<27, EATS 1<<28, SHCFG 1<<44.
const PPAR: u64 = 0x4_0000;
const MEV: u64 = 0x8_0000;
const S2FWB: u64 = 0x0200_0000;
const S1STALLD: u64 = 0x0800_0000;
const EATS: u64 = 0x1000_0000;
const SHCFG: u64 = 0x1000_0000_0000;
/// Of word 1, what a unit does not look at without a first stage: S1DSS, S1CIR, S1COR, S1CSH, S1STALLD.
const OF_FIRST_STAGE: u64 = 0xFF | S1STALLD;

/// S2VMID 1, S2T0SZ 20<<32, S2SL0 2<<38, S2IR0 1<<40, S2OR0 1<<42, S2SH0 3<<44, S2PS 4<<48, S2AA64 1<<51, S2PTW 1<<54,
/// S2R 1<<58: 14 + 80, 100 + 400 + 3000; 4 + 8, 40, 400.
const SECOND_44: u64 = 0x044C_3594_0000_0001;
/// With S2T0SZ 25<<32 and S2SL0 1<<38: 19 + 40.
const SECOND_39: u64 = 0x044C_3559_0000_0001;

/// A machine with a device that is not looked at, so that numbers are not zero, and one that is.
struct Bench {
    machine: Machine,
    /// Where descriptors of devices without PASIDs are.
    contexts: u64,
}

fn bench(features: Features, change: fn(&mut smmuv3::Memory)) -> Bench {
    let (unit, memory) = unit(Config::full());
    let mut parts = needs(StreamTable::Linear, &memory);
    change(&mut parts);
    let contexts = parts.contexts.phys().0;
    let mut machine = Machine::enable(unit, memory, unit, parts).expect("it comes into service");
    machine.assign(OTHER, PLAIN);
    machine.assign(DISK, features);
    Bench { machine, contexts }
}

impl Bench {
    /// The eight words at `at`, as the unit sees them.
    fn words(&self, at: u64) -> [u64; 8] {
        std::array::from_fn(|n| {
            self.machine.memory.device_load(PhysAddr(at + n as u64 * 8)).expect("it is in the memory")
        })
    }

    fn entry(&self) -> [u64; 8] {
        let place = stream_place(self.machine.unit, &self.machine.memory, DISK).expect("it is there");
        self.words(place.0)
    }

    fn attach(&mut self, pasid: Option<u32>, translation: Translation) -> Attachment {
        let pasid = pasid.map(|pasid| Pasid::new(pasid).expect("20 bits"));
        self.machine.attach_to(DISK, pasid, translation).expect("it can be attached")
    }

    fn tree(&mut self, stage: Stage) -> (Translation, u64) {
        let tree = self.machine.tree(stage);
        (translation(stage, &tree), tree.root().0)
    }
}

/// T0SZ 16, IR0 1<<8, OR0 1<<10, SH0 3<<12, EPD1 1<<30, V 1<<31, IPS 4<<32, AA64 1<<41, R 1<<45, A 1<<46, ASET 1<<47, ASID;
/// attributes 0 to 2: FF, 04, 44.
fn context(asid: u16, root: u64) -> [u64; 8] {
    [0x0000_E204_C000_3510 | u64::from(asid) << 48, root, 0, 0x44_04FF, 0, 0, 0, 0]
}

#[test]
fn the_first_stage_of_a_device_without_pasids() {
    let mut bench = bench(ATS, |_| ());
    let (first, root) = bench.tree(Stage::One);

    let attachment = bench.attach(None, first);

    let [w0, w1, w2, ..] = bench.entry();
    // S1ContextPtr, Config 5<<1, V: the second descriptor.
    assert_eq!(w0, (bench.contexts + 64) | 0xB);
    assert_eq!(w1, SHCFG | EATS | S1STALLD | CACHED);
    // S2VMID counts where there is a second stage at all; the rest of it does not.
    assert_eq!((w2 & 0xFFFF, attachment.domain.0), (1, 1));
    assert_eq!(bench.words(bench.contexts + 64), context(1, root));
    bench.machine.assert_lawful();
}

#[test]
fn pasids_in_tables_of_two_levels() {
    let mut bench = bench(ALL, |_| ());
    let (first, root) = bench.tree(Stage::One);

    let attachment = bench.attach(Some(70), first);

    let [w0, w1, ..] = bench.entry();
    // S1CDMax 15<<59, S1Fmt 1<<4, Config 5<<1, V; S1DSS 2.
    assert_eq!(w0 & !0x00FF_FFFF_FFFF_FFC0, 0x7800_0000_0000_001B);
    assert_eq!(w1, SHCFG | EATS | S1STALLD | PPAR | CACHED | 2);
    // L1CD: L2Ptr [55:12], V. 70 is 1 * 64 + 6; of the first 64 the first is there, and not valid.
    let [zero, one, two, ..] = bench.words(w0 & 0x00FF_FFFF_FFFF_FFC0);
    assert_eq!((zero & 0xFFF, one & 0xFFF, two), (1, 1, 0));
    assert_ne!(attachment.domain.0, 1, "an ASID of its own");
    assert_eq!(bench.words((one & !0xFFF) + 6 * 64), context(attachment.domain.0, root));
    assert_eq!(bench.words(zero & !0xFFF)[0], 0);
    bench.machine.assert_lawful();
}

#[test]
fn the_second_stage_of_44_bits() {
    let mut bench = bench(ATS, |_| ());
    let (second, root) = bench.tree(Stage::Two);

    bench.attach(None, second);

    let [w0, w1, rest @ ..] = bench.entry();
    // Config 6<<1, V.
    assert_eq!((w0, w1 & !OF_FIRST_STAGE), (0xD, SHCFG | EATS));
    assert_eq!(rest, [SECOND_44, root, 0, 0, 0, 0]);
    bench.machine.assert_lawful();
}

#[test]
fn the_second_stage_of_39_bits() {
    let mut bench = bench(PLAIN, |_| ());
    let small =
        Tree::<Stage2<12, 39>>::new(&mut bench.machine.frames, Limits::NONE).expect("there are frames");
    let attachment = bench.attach(None, Translation::Blocked);

    let to = Translation::Stage2(root(small.root().0, 3));
    bench.machine.replace(attachment, to).expect("it can be replaced");

    let [w0, w1, rest @ ..] = bench.entry();
    assert_eq!((w0, w1 & !OF_FIRST_STAGE), (0xD, SHCFG));
    assert_eq!(rest, [SECOND_39, small.root().0, 0, 0, 0, 0]);
    bench.machine.assert_lawful();
}

#[test]
fn a_second_stage_that_decides_how_memory_is_cached() {
    let mut bench = bench(PLAIN, |parts| parts.forced_write_back = true);
    let (second, _) = bench.tree(Stage::Two);

    bench.attach(None, second);

    let [w0, w1, w2, ..] = bench.entry();
    assert_eq!((w0, w1 & !OF_FIRST_STAGE, w2), (0xD, SHCFG | S2FWB, SECOND_44));
}

#[test]
fn accesses_that_stall_in_either_stage() {
    let mut bench = bench(PLAIN, |parts| parts.stalling.push(DISK).expect("there is room"));
    let (first, root) = bench.tree(Stage::One);
    let attachment = bench.attach(None, first);

    let [_, w1, ..] = bench.entry();
    assert_eq!(w1, SHCFG | CACHED, "neither S1STALLD nor EATS");
    // S 1<<44.
    let [w0, rest @ ..] = context(1, root);
    let [stalling, after @ ..] = bench.words(bench.contexts + 64);
    assert_eq!((stalling, after), (w0 | 0x1000_0000_0000, rest));

    bench.machine.detach(attachment);
    let (second, _) = bench.tree(Stage::Two);
    bench.attach(None, second);
    // S2S 1<<57.
    let [_, w1, w2, ..] = bench.entry();
    assert_eq!((w1 & !OF_FIRST_STAGE, w2), (SHCFG, SECOND_44 | 0x0200_0000_0000_0000));
    bench.machine.assert_lawful();
}

#[test]
fn a_guest_s_first_stage_behind_a_second() {
    let mut bench = bench(ATS, |_| ());
    let tree = bench.machine.tree(Stage::Two);
    // S10, as its guest writes it: S1CDMax 16<<59, S1ContextPtr, S1Fmt 2<<4, Config 5<<1, V; EATS, S1STALLD, S1DSS 2.
    let entry = [0x8000_0000_A000_002B, EATS | S1STALLD | CACHED | 2, 0, 0, 0, 0, 0, 0];
    let nested =
        Translation::Nested { first: FirstStage::Contexts { entry }, second: root(tree.root().0, 4) };

    bench.attach(None, nested);

    // Config 7<<1; and S10 with MEV.
    assert_eq!(bench.entry()[..2], [0x8000_0000_A000_002F, SHCFG | EATS | S1STALLD | MEV | CACHED | 2]);
    assert_eq!(bench.entry()[1], 0x0000_1000_1808_00D6);
    assert_eq!(bench.entry()[2..], [SECOND_44, tree.root().0, 0, 0, 0, 0]);
    bench.machine.assert_lawful();
}

#[test]
fn a_guest_s_page_table_behind_a_second_stage() {
    const AT: u64 = 0x80_0000;
    let mut bench = bench(Features { pasid: true, ..PLAIN }, |_| ());
    let tree = bench.machine.tree(Stage::Two);
    let frame = bench.machine.smmu.tables.place_context(DISK, iommu::Gpa(AT)).expect("there are frames");
    tree.map(&mut bench.machine.frames, AT, &grant(frame.0, 1), Perms::READ).expect("nothing is there");
    let first = FirstStage::Pages { root: iommu::Gpa(0x12_3000), levels: 4 };

    bench.attach(Some(5), Translation::Nested { first, second: root(tree.root().0, 4) });

    // S1CDMax 6<<59, S1ContextPtr, linear, Config 7<<1, V; S1DSS 2.
    assert_eq!(bench.entry()[0], 0x3000_0000_0080_000F);
    assert_eq!(bench.entry()[1], SHCFG | S1STALLD | MEV | CACHED | 2);
    // The sixth; ASID 0, and the guest's own address.
    assert_eq!(bench.words(frame.0 + 5 * 64), context(0, 0x12_3000));
    bench.machine.assert_lawful();
}

#[test]
fn bypass_and_silence_and_nothing() {
    let mut bench = bench(PLAIN, |_| ());
    // V alone is looked at.
    assert_eq!(bench.entry()[0] & 1, 0);
    let attachment = bench.attach(None, Translation::Bypass(trust()));
    // Config 4<<1, V.
    let [w0, w1, ..] = bench.entry();
    assert_eq!((w0, w1 & !OF_FIRST_STAGE), (0x9, SHCFG));

    bench.machine.detach(attachment);
    let (leaving, invalidations) = bench.machine.smmu.tables.block(DISK).expect("it is assigned");
    bench.machine.invalidate(&invalidations);
    let silent = bench.machine.smmu.tables.silence(DISK).expect("it is blocked");
    bench.machine.invalidate(&silent);
    // Config 0, V.
    assert_eq!(bench.entry()[0] & 0xF, 0x1);

    bench.machine.smmu.tables.finish(leaving);
    assert_eq!(bench.entry(), [0; 8]);
    bench.machine.assert_lawful();
}

#[test]
fn what_is_acknowledged_of_queues_that_overflowed() {
    // EVENTQ_PROD and _CONS, PRIQ_PROD and _CONS.
    let indices =
        |machine: &Machine| [0x1_00A8, 0x1_00AC, 0x1_00C8, 0x1_00CC].map(|at| machine.unit.read32(at));
    let mut machine = bench(ALL, |_| ()).machine;
    let tag = GroupTag { pasid: None, index: 3 };
    let request = PageRequest { stream: DISK, tag, iova: Iova(0x7000), perms: Perms::READ, last: false };
    // R10: 2^7 events, 2^8 requests, and the wrap flag above the index.
    for _ in 0..EVENTS {
        machine.unit.record([0x0108_0000_0004, 0, 0, 0]);
    }
    for _ in 0..REQUESTS {
        assert_eq!(machine.unit.page_request(request), Requested::Queued);
    }
    assert_eq!(indices(&machine), [0x80, 0, 0x100, 0]);
    // R11: OVFLG 1<<31.
    machine.unit.record([0x0108_0000_0004, 0, 0, 0]);
    assert_eq!(machine.unit.page_request(request), Requested::Lost);
    assert_eq!(indices(&machine), [0x8000_0080, 0, 0x8000_0100, 0]);

    let events = machine.pass();

    assert_eq!(
        events.iter().filter(|event| matches!(event, Event::FaultsLost | Event::RequestsLost)).count(),
        2
    );
    // R12: OVACKFLG as OVFLG.
    assert_eq!(indices(&machine), [0x8000_0080, 0x8000_0080, 0x8000_0100, 0x8000_0100]);
    // The second time around, the flags come back to where they were.
    for _ in 0..=EVENTS {
        machine.unit.record([0x0108_0000_0004, 0, 0, 0]);
    }
    machine.pass();
    assert_eq!(indices(&machine)[..2], [0, 0]);
    machine.assert_lawful();
}
