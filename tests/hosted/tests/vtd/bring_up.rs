//! How the VT-d driver takes a unit into service, and why it does not.

use crate::HARDWARE;
use hosted::{Moment, Tapped, needs};
use iommu::{Bus, DmaBuf, Error, Events, Features, Iova, Pasid, PhysAddr, StreamId, Tables};
use models::{
    golden,
    memory::Memory,
    vtd::{Config, Refusal, VtdUnit},
};
use std::{
    ops::Range,
    sync::{Arc, Mutex},
};
use vtd::{FRAME_WORDS, Found};

const DISK: StreamId = StreamId(0x20);

const GCMD: usize = 0x018;
const GSTS: usize = 0x01C;
const RTADDR: usize = 0x020;
const TE: u32 = 1 << 31;
const SRTP: u32 = 1 << 30;
const QIE: u32 = 1 << 26;
const IRE: u32 = 1 << 25;
const SIRTP: u32 = 1 << 24;

/// Writes `GCMD` as firmware would, and waits for `GSTS`.
fn command(unit: &VtdUnit, value: u32, status: u32) {
    unit.write32(GCMD, value);
    assert!((0..100).any(|_| unit.read32(GSTS) == status), "GSTS is {:#x}", unit.read32(GSTS));
}

/// What the driver wrote, and what devices could do after it.
#[derive(Default)]
struct Log {
    writes: Vec<(usize, u64)>,
    /// What devices got through although translation was on.
    leaks: usize,
}

/// A unit, its memory, and a bus to it that keeps a log.
fn logged(config: Config) -> (&'static VtdUnit, Memory, Tapped, Arc<Mutex<Log>>) {
    // Compares what was written, and what was executed, in its order.
    let (unit, memory) = hosted::Hardware::Prompt.unit(config);
    let log = Arc::<Mutex<Log>>::default();
    let kept = Arc::clone(&log);
    let bus = Tapped::new(unit, move |unit, moment| {
        let Moment::Written { offset, value } = moment else { return };
        let mut log = kept.lock().expect("no test panics here");
        log.writes.push((offset, value));
        if unit.read32(GSTS) & TE != 0 {
            for stream in [0, 0x20, 0xFF, 0x100, 0xFFFF].map(StreamId) {
                for pasid in [None, Pasid::new(0), Pasid::new(5)] {
                    let through = unit.dma_read(stream, pasid, Iova(0x8_0000_0000), 1).is_ok();
                    log.leaks += usize::from(through);
                }
            }
        }
    });
    (unit, memory, bus, log)
}

#[test]
fn bring_up_follows_the_order_of_the_manual() {
    let (unit, memory, bus, log) = logged(Config::qemu());
    let needs = needs(&memory);
    let [root, queue, status, requests] =
        [&needs.root, &needs.invalidation_queue, &needs.status, &needs.page_requests].map(|b| b.phys().0);

    let machine = HARDWARE.enable(unit, memory, bus, needs).expect("it comes into service");

    let writes = log.lock().expect("no test panics here").writes.clone();
    let at = |offset: usize, value: u64| {
        let found = writes.iter().position(|&write| write == (offset, value));
        found.unwrap_or_else(|| panic!("{value:#x} was never written to {offset:#x}: {writes:x?}"))
    };
    let command = |bit: u32| {
        let sets = |&(offset, value): &(usize, u64)| offset == GCMD && value as u32 & bit != 0;
        writes.iter().position(sets).unwrap_or_else(|| panic!("GCMD {bit:#x} was never written"))
    };
    // Facts 7.1: mask the events; IQT, IQA (base, DW), QIE; RTADDR (scalable), SRTP; the interrupt table, SIRTP; invalidate
    // (first IQT); IRE; TE.
    let masks = [0x38, 0xA0, 0xE0].map(|control| at(control, 1 << 31));
    let order = [
        masks.into_iter().max().unwrap_or(0),
        at(0x88, 0),
        at(0x90, queue | 1 << 11),
        command(QIE),
        at(RTADDR, root | 1 << 10),
        command(SRTP),
        command(SIRTP),
        at(0x88, 7 * 32),
        command(IRE),
        command(TE),
    ];
    assert!(order.is_sorted_by(|a, b| a < b), "{order:?}");
    // 5.3: PQH = 0, PQT = 0, PQA.
    assert!(at(0xC0, 0) < at(0xD0, requests) && at(0xC8, 0) < at(0xD0, requests));
    // Rows 21, 41, 25, 31, and row 33 with FN: contexts, PASID cache, translations, wait for 1; in this order, with waits
    // between them that write to the word after. Interrupt entries depend on nothing.
    let fence = [0x65, status + 8, 0, 0];
    assert_eq!(
        machine.unit.executed(),
        [
            golden::CONTEXT_GLOBAL,
            golden::INTERRUPT_GLOBAL,
            fence,
            golden::PASID_CACHE_GLOBAL,
            fence,
            [0xD2, 0, 0, 0],
            [0x1_0000_0065, status, 0, 0]
        ]
    );
    assert_eq!(machine.unit.read32(GSTS), TE | SRTP | QIE | IRE | SIRTP, "and not CFIS");
    // 1.7: 256 entries (S = 7), EIME, in a table where nothing is present.
    let irta = machine.unit.read64(0xB8);
    assert_eq!(irta & 0xFFF, 0x807);
    assert!((0..512).all(|word| machine.memory.device_load(PhysAddr((irta & !0xFFF) + word * 8)) == Ok(0)));
    assert_eq!(machine.unit.read64(RTADDR), root | 1 << 10);
    machine.assert_lawful();
}

#[test]
fn a_table_has_left_the_write_buffer_before_the_unit_is_told_of_it() {
    // CAP.RWBF. What is in the buffer is not in the device's view; the interrupt table begins at IRTA.
    let (unit, memory) = HARDWARE.unit(Config::full().with_write_buffer());
    let told = Arc::<Mutex<Vec<u32>>>::default();
    let (seen, kept) = (memory.clone(), Arc::clone(&told));
    let bus = Tapped::new(unit, move |unit, moment| {
        let Moment::Written { offset: GCMD, value } = moment else { return };
        for (bit, register) in [(SRTP, RTADDR), (SIRTP, 0xB8)] {
            if value as u32 & bit != 0 {
                let table = unit.read64(register) & !0xFFF;
                let words = (0..512).map(|word| seen.device_load(PhysAddr(table + word * 8)));
                assert!(words.into_iter().all(|word| word == Ok(0)), "GCMD {value:#x}");
                kept.lock().expect("nobody panicked").push(bit);
            }
        }
    });
    let parts = needs(&memory);

    let machine = HARDWARE.enable(unit, memory, bus, parts).expect("it comes into service");

    assert_eq!(*told.lock().expect("nobody panicked"), [SRTP, SIRTP]);
    machine.assert_lawful();
}

#[test]
fn from_the_moment_that_translation_is_on_no_device_gets_through() {
    let (unit, memory, bus, log) = logged(Config::full());
    let needs = needs(&memory);

    let mut machine = HARDWARE.enable(unit, memory, bus, needs).expect("it comes into service");

    assert_eq!(log.lock().expect("no test panics here").leaks, 0);
    assert_eq!(machine.read(DISK, None, Iova(0x8_0000_0000)), Err(Refusal::Fault(0x39)), "SRT.2");
    machine.unit.plug(DISK);
    let features = Features { device_tlb: true, page_requests: true, pasid: true };
    assert!(machine.vtd.tables.assign(DISK, features).is_ok());
    for pasid in [None, Pasid::new(5)] {
        let refused = machine.read(DISK, pasid, Iova(0x8_0000_0000));
        assert_eq!(refused, Err(Refusal::Fault(0x51)), "assigned is not attached (SPD.2)");
    }
    machine.assert_lawful();
}

#[test]
fn before_it_is_taken_into_service_a_unit_is_only_read() {
    let (_, _, bus, log) = logged(Config::qemu());

    let capabilities = Found::probe(bus).expect("it is there").capabilities();

    assert!(log.lock().expect("no test panics here").writes.is_empty());
    // Facts 1.2, the measured unit: first stage, no second stage in scalable mode, 20 bits of PASID, PRS with PDS.
    assert!(capabilities.stage1 && !capabilities.stage2 && capabilities.page_requests);
    assert!(capabilities.device_tlb && !capabilities.coherent_walks);
    assert_eq!((capabilities.levels, capabilities.pasid_bits), (4, 20));
}

/// XSA-304: leaves are as large as the unit reports, and no larger.
#[test]
fn a_unit_has_the_leaves_that_it_reports() {
    const KIB4: u64 = 1 << 12;
    const MIB2: u64 = 1 << 21;
    const GIB1: u64 = 1 << 30;
    // CAP.SSLPS: bit 34 2 MiB, bit 35 1 GiB, 36 and 37 reserved; CAP.FS1GP: bit 56.
    let none = Config::qemu().cap & !(0xF << 34 | 1 << 56);
    for (bits, stage1, stage2) in [
        (0, KIB4 | MIB2, KIB4),
        (1 << 34, KIB4 | MIB2, KIB4 | MIB2),
        (1 << 35, KIB4 | MIB2, KIB4 | GIB1),
        (0xF << 34, KIB4 | MIB2, KIB4 | MIB2 | GIB1),
        (1 << 56, KIB4 | MIB2 | GIB1, KIB4),
    ] {
        let (unit, _) = HARDWARE.unit(Config { cap: none | bits, ..Config::qemu() });

        let capabilities = Found::probe(unit).expect("it is there").capabilities();

        assert_eq!((capabilities.stage1_leaves, capabilities.stage2_leaves), (stage1, stage2), "{bits:#x}");
    }
}

#[test]
fn a_unit_that_cannot_drain_page_requests_has_none() {
    // ECAP.PDS is bit 42, ECAP.PRS bit 29.
    for (lacking, expected) in
        [(0, true), (1 << 42, false), (1 << 29, false), (1 << 2, false), (1 << 40, false)]
    {
        let (unit, _) = HARDWARE.unit(Config { ecap: Config::qemu().ecap & !lacking, ..Config::qemu() });

        let capabilities = Found::probe(unit).expect("it is there").capabilities();

        assert_eq!(capabilities.page_requests, expected, "without ECAP bits {lacking:#x}");
    }
}

#[test]
fn a_unit_without_page_requests_is_used_without_touching_their_registers() {
    let (unit, memory) = HARDWARE.unit(Config { ecap: Config::qemu().ecap & !(1 << 29), ..Config::qemu() });
    let needs = needs(&memory);

    let mut machine = HARDWARE.enable(unit, memory, unit, needs).expect("it comes into service");
    assert_eq!(machine.read(DISK, None, Iova(0x1000)), Err(Refusal::Fault(0x39)));

    assert_eq!(machine.pass().len(), 1, "the fault");
    machine.assert_lawful();
}

/// CVE-2026-90428: an error that was latched before the handler stood.
#[test]
fn faults_of_the_time_before_are_not_taken_for_ours() {
    let (unit, memory) = HARDWARE.unit(Config::full());
    // Firmware used legacy mode for a while, and left two faults and an overflow behind.
    let mut root = memory.take(FRAME_WORDS, FRAME_WORDS);
    root.clear();
    unit.publish(root.range(0, FRAME_WORDS));
    unit.write64(RTADDR, root.phys().0);
    command(unit, SRTP, SRTP);
    command(unit, TE, SRTP | TE);
    for page in 0..6 {
        assert!(unit.dma_read(DISK, None, Iova(page << 12), 1).is_err());
    }
    command(unit, 0, SRTP);
    assert_ne!(unit.read32(0x34), 0, "FSTS");
    let needs = needs(&memory);

    let mut machine = HARDWARE.enable(unit, memory, unit, needs).expect("it comes into service");

    assert_eq!(machine.vtd.events.next_event(), None);
    assert_eq!(unit.read32(0x34) & 3, 0, "FSTS.PPF and PFO");
    machine.assert_lawful();
}

/// Where no unit answers: every register reads as all ones.
#[derive(Clone)]
struct Nothing;

impl Bus for Nothing {
    fn read32(&self, _: usize) -> u32 {
        u32::MAX
    }
    fn write32(&self, offset: usize, _: u32) {
        panic!("write to {offset:#x} of a unit that is not there");
    }
    fn read64(&self, _: usize) -> u64 {
        u64::MAX
    }
    fn write64(&self, offset: usize, _: u64) {
        panic!("write to {offset:#x} of a unit that is not there");
    }
    fn publish(&self, _: Range<PhysAddr>) {}
    fn observe(&self, _: Range<PhysAddr>) {}
    fn now_us(&self) -> u64 {
        0
    }
}

#[test]
fn a_unit_that_is_not_there_is_absent() {
    assert_eq!(Found::probe(Nothing).err(), Some(Error::Absent));
}

fn refusal(config: Config) -> Error {
    let (unit, memory) = HARDWARE.unit(config);
    let needs = needs(&memory);
    HARDWARE.enable(unit, memory, unit, needs).err().expect("it is refused")
}

#[test]
fn what_a_unit_lacks_is_named() {
    // ECAP.QI is bit 1.
    let without = Config { ecap: Config::qemu().ecap & !(1 << 1), ..Config::qemu() };

    let Error::Unsupported { feature } = refusal(without) else { panic!("it has all") };

    assert!(feature.contains("ECAP.QI"), "{feature}");
}

/// ECAP.SMTS is bit 43; without it DW of IQA is reserved, and an entry has 16 bytes.
#[test]
fn a_unit_without_scalable_mode_is_used_in_legacy_mode() {
    // Compares descriptors in the order in which they were queued.
    let (unit, memory) =
        hosted::Hardware::Prompt.unit(Config { ecap: Config::qemu().ecap & !(1 << 43), ..Config::qemu() });
    let needs = needs(&memory);
    let [root, queue, status] =
        [&needs.root, &needs.invalidation_queue, &needs.status].map(|buffer| buffer.phys().0);

    let machine = HARDWARE.enable(unit, memory, unit, needs).expect("it comes into service");

    assert_eq!((unit.read64(RTADDR), unit.read64(0x90)), (root, queue), "TTM 00, DW 0");
    // Rows 21, 25, 31, and row 33 with FN; there are no PASIDs.
    assert_eq!(
        machine.unit.executed(),
        [
            golden::CONTEXT_GLOBAL,
            golden::INTERRUPT_GLOBAL,
            [0x65, status + 8, 0, 0],
            [0xD2, 0, 0, 0],
            [0x1_0000_0065, status, 0, 0]
        ]
    );
    assert_eq!(unit.read64(0x88), 5 * 16);
    // LRT.2: the root entry is not present.
    assert_eq!(machine.read(DISK, None, Iova(0x8_0000_0000)), Err(Refusal::Fault(0x01)));
    machine.assert_lawful();
}

/// `words` words that are not aligned to their size.
fn crooked(memory: &Memory, words: usize) -> DmaBuf {
    let odd = memory.take(1, words);
    assert!(odd.phys().0.is_multiple_of(words as u64 * 8));
    memory.take(words, 1)
}

#[test]
fn memory_that_is_too_small_or_crooked_is_named_and_the_unit_left_alone() {
    type Change = fn(&mut vtd::Memory, &Memory);
    let cases: [(&str, Change); 11] = [
        ("root table", |m, from| m.root = from.take(256, 512)),
        ("root table", |m, from| m.root = crooked(from, 512)),
        ("completions", |m, from| m.status = from.take(256, 512)),
        ("completions", |m, from| m.status = crooked(from, 512)),
        ("tables", |m, from| m.frames[7] = from.take(256, 512)),
        ("tables", |m, from| m.frames[19] = crooked(from, 512)),
        ("invalidation queue", |m, from| m.invalidation_queue = crooked(from, 1024)),
        ("invalidation queue", |m, from| m.invalidation_queue = from.take(256, 512)),
        ("invalidation queue", |m, _| m.answers = 128),
        ("page request queue", |m, from| m.page_requests = crooked(from, 1024)),
        ("page request queue", |m, from| m.page_requests = from.take(1536, 2048)),
    ];
    for (purpose, change) in cases {
        let (unit, memory) = HARDWARE.unit(Config::qemu());
        let mut needs = needs(&memory);
        change(&mut needs, &memory);

        let error = HARDWARE.enable(unit, memory, unit, needs).err();

        let Some(Error::Memory { purpose: named, words, needed }) = error else {
            panic!("{purpose}: {error:?}")
        };
        assert!(named.contains(purpose), "{named} is not {purpose}");
        assert!(needed.is_power_of_two() && words > 0);
        assert_eq!((unit.read32(GSTS), unit.read64(0x90)), (0, 0), "GSTS and IQA of the {purpose}");
    }
}

#[test]
fn a_queue_larger_than_the_unit_can_use_is_refused() {
    let memory = Memory::new((256 + 128 + 256) * 2 * FRAME_WORDS);
    let unit: &VtdUnit = Box::leak(Box::new(VtdUnit::new(memory.clone(), Config::qemu())));
    let mut parts = needs(&memory);
    parts.page_requests = memory.take(256 * FRAME_WORDS, 256 * FRAME_WORDS);

    let error = HARDWARE.enable(unit, memory, unit, parts).err();

    let needed = 128 * FRAME_WORDS;
    let words = 256 * FRAME_WORDS;
    assert_eq!(error, Some(Error::Memory { purpose: "the page request queue", words, needed }));
}

#[test]
fn a_unit_that_never_acknowledges_is_given_up_in_time_by_the_name_of_the_register() {
    for (silent, name) in
        [(QIE, "GSTS.QIES"), (SRTP, "GSTS.RTPS"), (SIRTP, "GSTS.IRTPS"), (TE, "GSTS.TES"), (IRE, "GSTS.IRES")]
    {
        let (unit, memory) = HARDWARE.unit(Config::qemu());
        let needs = needs(&memory);
        unit.never_acknowledge(silent);

        let error = HARDWARE.enable(unit, memory, unit, needs).err();

        let Some(Error::Timeout { register, waited_us }) = error else { panic!("{name}: {error:?}") };
        assert_eq!(register, name);
        assert!((100_000..110_000).contains(&waited_us), "{waited_us}");
        assert_eq!(unit.read32(GSTS) & TE, 0, "{name}: translation comes last");
    }
}

#[test]
fn a_unit_that_never_completes_its_first_invalidation_is_not_switched_on() {
    for ahead in [0, usize::MAX] {
        let (unit, memory) = HARDWARE.unit(Config::qemu());
        let needs = needs(&memory);
        unit.pause(ahead);

        let error = HARDWARE.enable(unit, memory, unit, needs).err();

        assert!(
            matches!(error, Some(Error::Timeout { register: "the first invalidation", .. })),
            "{error:?}"
        );
        assert_eq!(unit.read32(GSTS), SRTP | SIRTP | QIE, "fetched is not completed: translation stays off");
    }
}

#[test]
fn a_unit_without_interrupt_remapping_comes_into_service_and_has_none() {
    // ECAP.IR is bit 3.
    let (unit, memory) = HARDWARE.unit(Config { ecap: Config::qemu().ecap & !(1 << 3), ..Config::qemu() });
    let parts = needs(&memory);

    let machine = HARDWARE.enable(unit, memory, unit, parts).expect("it comes into service");

    assert_eq!(unit.read32(GSTS), TE | SRTP | QIE);
    assert!(machine.vtd.remapping.is_none());
    machine.assert_lawful();
}

/// IRTA.S: 2^(S + 1) entries of 16 bytes; EIME is bit 11.
#[test]
fn the_interrupt_table_is_as_large_as_its_memory_and_extended_where_unit_and_caller_are() {
    const EIM: u64 = 1 << 4;
    let table = 256 * FRAME_WORDS;
    for (words, ecap, x2apic, expected) in [
        (FRAME_WORDS, 0, true, Ok((7, 256, true))),
        (4 * FRAME_WORDS, 0, false, Ok((9, 1024, false))),
        (FRAME_WORDS, EIM, true, Ok((7, 256, false))),
        (table, 0, true, Ok((15, 65536, true))),
        (2 * table, 0, true, Err(table)),
        (FRAME_WORDS / 2, 0, true, Err(FRAME_WORDS)),
    ] {
        let memory = Memory::new(4 * table);
        let config = Config { ecap: Config::qemu().ecap & !ecap, ..Config::qemu() };
        let unit: &'static VtdUnit = Box::leak(Box::new(VtdUnit::new(memory.clone(), config)));
        let parts = vtd::Memory { interrupts: memory.take(words, words), x2apic, ..needs(&memory) };
        let base = parts.interrupts.phys().0;

        let made = HARDWARE.enable(unit, memory, unit, parts);

        match (made, expected) {
            (Ok(machine), Ok((size, entries, extended))) => {
                assert_eq!(unit.read64(0xB8), base | u64::from(extended) << 11 | size);
                let remapping = machine.vtd.remapping.as_ref().expect("the unit remaps");
                assert_eq!((remapping.entries(), remapping.is_x2apic()), (entries, extended));
                machine.assert_lawful();
            }
            (Err(Error::Memory { purpose, words: given, needed }), Err(limit)) => {
                assert_eq!((purpose, given, needed), ("the interrupt remapping table", words, limit));
                assert_eq!(unit.read32(GSTS), 0, "nothing was switched on");
            }
            (made, _) => panic!("{words} words: {:?}", made.err()),
        }
    }
}

#[test]
fn memory_that_firmware_protects_is_let_go_once_translation_protects_it() {
    const PMEN: usize = 0x64;
    const EPM: u64 = 1 << 31;
    // CAP.PLMR and PHMR are bits 5 and 6.
    let (unit, memory, bus, log) = logged(Config { cap: Config::qemu().cap | 3 << 5, ..Config::qemu() });
    unit.write32(PMEN, EPM as u32);
    assert!((0..100).any(|_| unit.read32(PMEN) & 1 != 0), "PMEN.PRS");
    let parts = needs(&memory);

    let machine = HARDWARE.enable(unit, memory, bus, parts).expect("it comes into service");

    assert_eq!(unit.read32(PMEN), 0, "EPM, and PRS");
    let writes = &log.lock().expect("no test panics here").writes;
    let ended = writes.iter().position(|&(at, _)| at == PMEN);
    let translated = writes.iter().position(|&(at, value)| at == GCMD && value & u64::from(TE) != 0);
    assert!(ended > translated);
    machine.assert_lawful();
}

#[test]
fn a_slow_unit_comes_into_service() {
    let (unit, memory) = HARDWARE.unit(Config { acknowledge_after: 500, ..Config::qemu() });
    let needs = needs(&memory);

    let machine = HARDWARE.enable(unit, memory, unit, needs).expect("it comes into service");

    machine.assert_lawful();
}
