//! The translations that the VT-d driver's tables can express, in legacy and in scalable mode, against the modelled unit.

use crate::HARDWARE;
use hosted::{Machine, grant, needs, root, trust};
use iommu::{
    Attachment, Bus, Commands, Error, Event, Events, FaultReason, Features, FirstStage, Gpa, GroupTag,
    Invalidation, Iova, Leaving, Outcome, PAGE_SIZE, PageRequest, PageResponse, Pasid, Perms, PhysAddr,
    Stages, StreamId, Tables, Translation, unit::LeavingPart,
};
use models::vtd::{Config, Refusal, Requested};
use pgtable::{Format, Tree, VtdFirstStage, VtdSecondStage};
use vtd::{Found, Mode};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
const PLAIN: Features = Features { device_tlb: false, page_requests: false, pasid: false };
const ATS: Features = Features { device_tlb: true, ..PLAIN };
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };
const HERE: Iova = Iova(0x4000_0000);
const NEXT: Iova = Iova(HERE.0 + PAGE_SIZE);

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

fn second(tree: &Tree<impl Format>) -> Translation {
    Translation::Stage2(root(tree.root().0, tree.levels()))
}

/// The reasons of the faults in one pass, in order.
fn faults(machine: &mut Machine) -> Vec<FaultReason> {
    let reason = |event| match event {
        Event::Fault(fault) => fault.reason,
        other => panic!("{other:?} is no fault"),
    };
    machine.pass().into_iter().map(reason).collect()
}

fn refused<T>(reason: u8) -> Result<T, Refusal> {
    Err(Refusal::Fault(reason))
}

/// A machine in each mode, with everything that the model knows.
fn both_modes() -> [Machine; 2] {
    let config = Config::full().with_nesting();
    [HARDWARE.legacy(config), HARDWARE.machine(config)]
}

/// The words of the entry that says how accesses of `stream` without PASID are translated, as the unit sees them.
fn entry_words(machine: &Machine, stream: StreamId) -> Vec<u64> {
    let load = |at: u64| machine.memory.device_load(PhysAddr(at)).expect("it is in the memory");
    let (bus, devfn) = (u64::from(stream.0 >> 8), u64::from(stream.0 & 0xFF));
    let rtaddr = machine.unit.read64(0x20);
    let root = rtaddr & !0xFFF;
    let (at, words) = if rtaddr & 0xC00 == 0 {
        let contexts = load(root + bus * 16) & !0xFFF;
        (contexts + devfn * 16, 2)
    } else {
        let contexts = load(root + bus * 16 + devfn / 128 * 8) & !0xFFF;
        let directory = load(contexts + devfn % 128 * 32) & !0xFFF;
        (load(directory) & !0xFFF, 8)
    };
    (0..words).map(|word| load(at + word * 8)).collect()
}

#[test]
fn a_unit_walks_scalable_tables_where_it_has_them_and_legacy_ones_otherwise_or_when_asked() {
    let found = |ecap| Found::probe(HARDWARE.unit(Config { ecap, ..Config::full() }).0).expect("it is there");
    // ECAP.SMTS is bit 43.
    assert_eq!(found(Config::full().ecap).mode(), Mode::Scalable);
    assert_eq!(found(Config::full().ecap & !(1 << 43)).mode(), Mode::Legacy);
    assert_eq!(found(Config::full().ecap).in_legacy_mode().mode(), Mode::Legacy);

    let [legacy, scalable] = both_modes();
    // RTADDR.TTM is 11:10.
    assert_eq!((legacy.unit.read64(0x20) >> 10 & 3, legacy.vtd.tables.mode()), (0, Mode::Legacy));
    assert_eq!((scalable.unit.read64(0x20) >> 10 & 3, scalable.vtd.tables.mode()), (1, Mode::Scalable));
}

#[test]
fn a_unit_reports_what_it_can_do_in_its_mode() {
    let capabilities = |config: Config, legacy: bool| {
        let found = Found::probe(HARDWARE.unit(config).0).expect("it is there");
        if legacy { found.in_legacy_mode().capabilities() } else { found.capabilities() }
    };
    let full = Config::full();

    let legacy = capabilities(full, true);
    assert!(legacy.stage2 && legacy.bypass && legacy.device_tlb && legacy.coherent_walks);
    assert!(!legacy.stage1 && !legacy.nested && !legacy.page_requests);
    assert_eq!((legacy.pasid_bits, legacy.levels), (0, 4));

    let scalable = capabilities(full, false);
    assert!(scalable.stage1 && scalable.stage2 && scalable.bypass && scalable.page_requests);
    assert!(!scalable.nested, "ECAP.NEST is not set");
    assert!(capabilities(full.with_nesting(), false).nested);
    assert!(!capabilities(full.with_nesting(), true).nested);
    // Without either stage there is nothing to nest: SSTS is bit 46, FSTS bit 47. PT is bit 6.
    for bit in [46, 47] {
        let lacking = Config { ecap: full.ecap & !(1 << bit), ..full }.with_nesting();
        assert!(!capabilities(lacking, false).nested);
    }
    let lacking = Config { ecap: full.ecap & !(1 << 6), ..full };
    assert!(!capabilities(lacking, false).bypass && !capabilities(lacking, true).bypass);

    // CAP.SAGAW: bit 9 is 3 levels, bit 10 4, bit 11 5. CAP.FS5LP is bit 60, and says nothing of the second stage.
    let widths = |sagaw: u64, more: u64| Config { cap: full.cap & !(0x1F << 8) | sagaw << 8 | more, ..full };
    for (config, legacy_levels, scalable_levels) in [
        (widths(0b0010, 0), 3, 3),
        (widths(0b0110, 0), 4, 4),
        (widths(0b0110, 1 << 60), 4, 4),
        (widths(0b1110, 1 << 60), 5, 5),
        (widths(0b1110, 0), 5, 4),
    ] {
        assert_eq!(capabilities(config, true).levels, legacy_levels, "{:#x}", config.cap);
        assert_eq!(capabilities(config, false).levels, scalable_levels, "{:#x}", config.cap);
    }
    let none = capabilities(widths(0, 0), true);
    assert_eq!((none.stage2, none.levels), (false, 0));

    // ECAP.C is bit 0 and counts in legacy mode, SMPWCS is bit 48 and counts in scalable mode.
    let without = |bit: u64| Config { ecap: full.ecap & !(1 << bit), ..full };
    assert!(!capabilities(without(0), true).coherent_walks && capabilities(without(0), false).coherent_walks);
    assert!(
        capabilities(without(48), true).coherent_walks && !capabilities(without(48), false).coherent_walks
    );
    assert!(!capabilities(full, false).caches_absence);
    assert!(capabilities(full.with_caching_mode(), false).caches_absence);
    assert!(capabilities(full.with_write_buffer(), false).caches_absence);
}

#[test]
fn a_legacy_device_reaches_what_is_mapped_for_it_and_nothing_else() {
    fn check<F: Format>(format: F, config: Config) {
        let mut machine = HARDWARE.legacy(config);
        let tree = machine.tree(format);
        machine.map(&tree, HERE, 0x1234);
        machine.assign(DISK, PLAIN);
        assert_eq!(machine.read(DISK, None, HERE), refused(0x02), "assigned is not attached (LCT.2)");
        assert_eq!(faults(&mut machine), [FaultReason::NotAttached]);
        let attachment = machine.attach_by(DISK, None, second(&tree));

        assert_eq!(machine.read(DISK, None, HERE), Ok(0x1234));
        assert_eq!(machine.read(DISK, None, NEXT), refused(0x06), "LGN.3");
        assert_eq!(machine.read(DISK, pasid(5), HERE), refused(0x31), "there are no PASIDs");
        assert_eq!(machine.read(NIC, None, HERE), refused(0x02));
        assert_eq!(machine.read(StreamId(0x120), None, HERE), refused(0x01), "another bus (LRT.2)");

        let (leaving, invalidations) = machine.vtd.tables.detach(attachment).expect("it is attached");
        assert_eq!(machine.read(DISK, None, HERE), Ok(0x1234), "the model remembers, as hardware may");
        machine.invalidate(&invalidations);
        assert_eq!(machine.read(DISK, None, HERE), refused(0x02));
        machine.vtd.tables.finish(leaving);
        assert_eq!(machine.read(DISK, None, HERE), refused(0x02));
        machine.assert_lawful();
    }
    check(VtdSecondStage::<3>, Config::qemu());
    check(VtdSecondStage::<4>, Config::full());
    check(VtdSecondStage::<5>, Config::full().with_five_levels());
    check(VtdSecondStage::<4, true>, Config::full());
    for old in units_of_old() {
        check(VtdSecondStage::<4>, old);
    }
}

#[test]
fn leaves_that_force_snooping_are_for_units_that_say_so() {
    let read = |config| {
        let mut machine = HARDWARE.legacy(config);
        let tree = machine.tree(VtdSecondStage::<4, true>);
        machine.map(&tree, HERE, 0x1234);
        machine.assign(DISK, PLAIN);
        machine.attach_by(DISK, None, second(&tree));
        machine.read(DISK, None, HERE)
    };
    let found = |config| Found::probe(HARDWARE.unit(config).0).expect("it is there");
    let says_so = |config| found(config).capabilities().forced_snoop;

    assert_eq!((says_so(Config::full()), read(Config::full())), (true, Ok(0x1234)));
    assert_eq!(
        (says_so(Config::qemu()), read(Config::qemu())),
        (false, refused(0x0C)),
        "SNP is reserved (LSL)"
    );
}

/// Units that know no other mode: ECAP.SMTS is bit 43; with a queue, and by registers alone: QI is bit 1, IR bit 3.
fn units_of_old() -> [Config; 4] {
    let queued = Config { ecap: Config::qemu().ecap & !(1 << 43), ..Config::qemu() };
    let by_registers = Config { ecap: queued.ecap & !(1 << 1 | 1 << 2 | 1 << 3 | 1 << 29), ..queued };
    [queued, by_registers, queued.with_caching_mode(), by_registers.with_write_buffer()]
}

#[test]
fn units_of_old_come_into_service_in_the_only_mode_that_they_have() {
    for old in units_of_old() {
        let mut machine = HARDWARE.machine(old);
        assert_eq!((machine.vtd.tables.mode(), machine.unit.read64(0x20) >> 10 & 3), (Mode::Legacy, 0));
        let tree = machine.tree(VtdSecondStage::<4>);
        machine.map(&tree, HERE, 1);
        machine.assign(DISK, PLAIN);
        let attachment = machine.attach_by(DISK, None, second(&tree));
        assert_eq!(machine.read(DISK, None, HERE), Ok(1));

        machine.unmap(&tree, HERE);
        assert_eq!(machine.read(DISK, None, HERE), Ok(1));
        machine.invalidate(&[Invalidation::Pages { attachment, iova: HERE, pages: 1 }]);
        assert_eq!(machine.read(DISK, None, HERE), refused(0x06));
        machine.map(&tree, HERE, 2);
        machine.invalidate(&[Invalidation::Pages { attachment, iova: HERE, pages: 1 }]);
        assert_eq!(machine.read(DISK, None, HERE), Ok(2));

        // Blocked while it is attached: the context is cached under its domain, and goes.
        let (device, invalidations) = machine.vtd.tables.block(DISK).expect("it is assigned");
        machine.invalidate(&invalidations);
        assert_eq!(machine.read(DISK, None, HERE), refused(0x02));
        machine.detach(attachment);
        machine.vtd.tables.finish(device);
        machine.assign(DISK, PLAIN);
        machine.attach_by(DISK, None, Translation::Bypass(trust()));
        let page = machine.page(3);
        assert_eq!(machine.read(DISK, None, Iova(page.0)), Ok(3));
        machine.assert_lawful();
    }
}

#[test]
fn legacy_devices_are_found_wherever_they_are() {
    let mut machine = HARDWARE.legacy(Config::full());
    let frames = machine.vtd.tables.frames_free();
    // Both halves of a bus have one context table in this mode.
    let streams = [0x0000, 0x007F, 0x0080, 0x00FF, 0x0100, 0xFFFF].map(StreamId);
    for stream in streams {
        let tree = machine.tree(VtdSecondStage::<4>);
        machine.map(&tree, HERE, stream.0.into());
        machine.assign(stream, PLAIN);
        machine.attach_by(stream, None, second(&tree));
    }

    for stream in streams {
        assert_eq!(machine.read(stream, None, HERE), Ok(stream.0.into()));
    }
    assert_eq!(machine.vtd.tables.frames_free(), frames - 3, "a context table for each of three buses");
    machine.assert_lawful();
}

#[test]
fn a_legacy_device_keeps_translations_of_its_own_if_it_may() {
    let mut machine = HARDWARE.legacy(Config::full());
    let tree = machine.tree(VtdSecondStage::<4>);
    machine.map(&tree, HERE, 1);
    machine.assign(DISK, ATS);
    machine.assign(NIC, PLAIN);
    let attachment = machine.attach_by(DISK, None, second(&tree));
    machine.attach_by(NIC, None, second(&tree));

    assert_eq!(machine.ats_read(DISK, None, HERE), Ok(1));
    assert_eq!(machine.ats_read(NIC, None, HERE), refused(0x0D), "TT = 0 blocks it (LCT.5)");
    machine.unmap(&tree, HERE);
    machine.invalidate(&[Invalidation::Pages { attachment, iova: HERE, pages: 1 }]);
    assert!(machine.ats_read(DISK, None, HERE).is_err());

    machine.map(&tree, HERE, 2);
    assert_eq!(machine.ats_read(DISK, None, HERE), Ok(2));
    machine.detach(attachment);
    assert_eq!(machine.unit.device_tlb(DISK), []);
    assert!(machine.ats_read(DISK, None, HERE).is_err());
    machine.assert_lawful();
}

#[test]
fn a_legacy_device_leaves_as_a_whole_and_gives_everything_back() {
    let mut machine = HARDWARE.legacy(Config::full());
    let [old, new] = [1, 2].map(|content| {
        let tree = machine.tree(VtdSecondStage::<4>);
        machine.map(&tree, HERE, content);
        tree
    });
    machine.assign(DISK, ATS);
    let frames = machine.vtd.tables.frames_free();
    let attachment = machine.attach_by(DISK, None, second(&old));
    assert_eq!((machine.read(DISK, None, HERE), machine.ats_read(DISK, None, HERE)), (Ok(1), Ok(1)));

    // Blocked first, all at once: context, translations and device TLB.
    let (device, invalidations) = machine.vtd.tables.block(DISK).expect("it is assigned");
    machine.invalidate(&invalidations);
    assert_eq!(machine.read(DISK, None, HERE), refused(0x02));
    assert!(machine.ats_read(DISK, None, HERE).is_err());
    assert_eq!(machine.unit.device_tlb(DISK), []);
    let busy = Some(Error::StreamBusy { stream: DISK });
    assert_eq!(machine.vtd.tables.block(DISK).err(), busy);
    assert_eq!(machine.vtd.tables.attach(DISK, None, second(&new)).err(), busy);
    assert_eq!(machine.vtd.tables.assign(DISK, ATS).err(), busy);

    // Its attachment has its own end, and only then is the place free.
    machine.detach(attachment);
    machine.vtd.tables.finish(device);
    assert_eq!(machine.vtd.tables.frames_free(), frames);
    machine.assign(DISK, ATS);
    assert_eq!(machine.read(DISK, None, HERE), refused(0x02));
    let again = machine.attach_by(DISK, None, second(&new));
    assert_eq!(again.domain, attachment.domain, "the domain was given back");
    assert_eq!(machine.read(DISK, None, HERE), Ok(2), "nothing of what was before");
    machine.assert_lawful();
}

#[test]
fn a_legacy_device_whose_attachment_stays_is_not_given_away() {
    let mut machine = HARDWARE.legacy(Config::full());
    let tree = machine.tree(VtdSecondStage::<4>);
    machine.assign(DISK, PLAIN);
    let attachment = machine.attach_by(DISK, None, second(&tree));

    machine.block(DISK);
    assert_eq!(machine.vtd.tables.assign(DISK, PLAIN).err(), Some(Error::StreamBusy { stream: DISK }));
    let (leaving, _) = machine.vtd.tables.detach(attachment).expect("it is attached");
    drop(leaving);

    assert_eq!(machine.vtd.tables.assign(DISK, PLAIN).err(), Some(Error::StreamBusy { stream: DISK }));
}

#[test]
fn a_legacy_device_is_attached_once_and_detached_once() {
    let mut machine = HARDWARE.legacy(Config::full());
    let tree = machine.tree(VtdSecondStage::<4>);
    machine.map(&tree, HERE, 1);
    machine.assign(DISK, PLAIN);
    machine.assign(NIC, PLAIN);
    let first = machine.attach_by(DISK, None, second(&tree));
    let state = Some(Error::PasidState { stream: DISK, pasid: None });
    assert_eq!(machine.vtd.tables.attach(DISK, None, second(&tree)).err(), state);
    let at_nic = Attachment { stream: NIC, ..first };
    assert!(machine.vtd.tables.detach(at_nic).is_err(), "it is not that one's");

    let (leaving, invalidations) = machine.vtd.tables.detach(first).expect("it is attached");
    assert_eq!(machine.vtd.tables.detach(first).err(), state);
    assert_eq!(machine.vtd.tables.attach(DISK, None, second(&tree)).err(), state, "it is leaving");
    machine.invalidate(&invalidations);
    machine.vtd.tables.finish(leaving);
    assert_eq!(machine.vtd.tables.detach(first).err(), state);

    let again = machine.attach_by(DISK, None, second(&tree));
    assert_ne!(again.serial, first.serial);
    assert_eq!(machine.vtd.tables.detach(first).err(), state);
    assert_eq!(machine.read(DISK, None, HERE), Ok(1));
}

#[test]
fn what_legacy_mode_lacks_is_refused_by_name() {
    let mut machine = HARDWARE.legacy(Config::full().with_nesting());
    for (features, name) in [
        (Features { pasid: true, ..PLAIN }, "ECAP.PASID"),
        (Features { page_requests: true, ..ATS }, "ECAP.PRS"),
    ] {
        let Some(Error::Unsupported { feature }) = machine.vtd.tables.assign(DISK, features).err() else {
            panic!("{name}")
        };
        assert!(feature.contains(name), "{feature}");
    }
    machine.assign(DISK, ATS);
    let first = FirstStage::Pages { root: Gpa(0x1000), levels: 4 };
    for (translation, name) in [
        (Translation::Stage1(root(0x1000, 4)), "ECAP.FSTS"),
        (Translation::Nested { first, second: root(0x1000, 4) }, "ECAP.NEST"),
        (Translation::Stage2(root(0x1000, 5)), "levels"),
        (Translation::Stage2(root(0x1000, 2)), "levels"),
        (Translation::Bypass(trust()), "device TLB"),
    ] {
        let refused = machine.vtd.tables.attach(DISK, None, translation).err();
        let Some(Error::Unsupported { feature }) = refused else { panic!("{name}: {refused:?}") };
        assert!(feature.contains(name), "{feature}");
    }
    let past = machine.vtd.tables.attach(DISK, pasid(5), Translation::Blocked).err();
    assert!(matches!(past, Some(Error::PasidOutOfRange { limit: 1, .. })), "{past:?}");
    let beyond = StreamId(0x1_0000);
    assert_eq!(machine.vtd.tables.assign(beyond, PLAIN).err(), Some(Error::UnknownStream { stream: beyond }));
}

#[test]
fn a_legacy_unit_that_remembers_absence_is_told_of_what_becomes_present() {
    let mut machine = HARDWARE.legacy(Config::full().with_caching_mode());
    let tree = machine.tree(VtdSecondStage::<4>);
    machine.map(&tree, HERE, 1);
    assert!(machine.read(DISK, None, HERE).is_err());
    machine.assign(DISK, PLAIN);
    assert!(machine.read(DISK, None, HERE).is_err());

    let attachment = machine.attach_by(DISK, None, second(&tree));

    assert_eq!(machine.read(DISK, None, HERE), Ok(1));
    machine.detach(attachment);
    assert!(machine.read(DISK, None, HERE).is_err());
    machine.attach_by(DISK, None, second(&tree));
    assert_eq!(machine.read(DISK, None, HERE), Ok(1));
    machine.assert_lawful();
}

#[test]
fn second_stage_tables_of_three_to_five_levels_translate_in_scalable_mode() {
    fn check<F: Format>(format: F, config: Config) {
        let mut machine = HARDWARE.machine(config);
        let tree = machine.tree(format);
        machine.map(&tree, HERE, 1);
        machine.assign(DISK, ALL);
        machine.attach_by(DISK, pasid(5), second(&tree));
        assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(1));
        machine.assert_lawful();
    }
    check(VtdSecondStage::<3>, Config::full());
    check(VtdSecondStage::<4>, Config::full());
    check(VtdSecondStage::<5>, Config::full().with_five_levels());

    let mut machine = HARDWARE.machine(Config::full().with_five_levels());
    let tree = machine.tree(VtdFirstStage::<5>);
    let far = Iova(0x00AB_4000_0000_0000);
    machine.map(&tree, far, 5);
    machine.assign(DISK, ALL);
    machine.attach(DISK, pasid(5), &tree);
    assert_eq!(machine.read(DISK, pasid(5), far), Ok(5));
    machine.assert_lawful();
}

#[test]
fn tables_of_more_levels_than_the_unit_walks_are_refused() {
    let mut machine = HARDWARE.machine(Config::full().with_nesting());
    machine.assign(DISK, ALL);
    let nested = |first, second| Translation::Nested {
        first: FirstStage::Pages { root: Gpa(0x1000), levels: first },
        second: root(0x1000, second),
    };
    for translation in [
        Translation::Stage1(root(0x1000, 5)),
        Translation::Stage1(root(0x1000, 3)),
        Translation::Stage2(root(0x1000, 5)),
        Translation::Stage2(root(0x1000, 6)),
        Translation::Stage2(root(0x1000, 255)),
        nested(5, 4),
        nested(3, 4),
        nested(4, 5),
        nested(255, 4),
    ] {
        let refused = machine.vtd.tables.attach(DISK, None, translation).err();
        assert_eq!(refused, Some(Error::Unsupported { feature: "this number of table levels" }));
    }
}

#[test]
fn a_device_that_bypasses_reaches_all_of_memory_until_it_is_detached() {
    for (mut machine, absent) in both_modes().into_iter().zip([0x02, 0x59]) {
        let page = machine.page(0x77);
        let there = Iova(page.0);
        machine.assign(DISK, PLAIN);
        machine.assign(NIC, PLAIN);
        let attachment = machine.attach_by(DISK, None, Translation::Bypass(trust()));
        assert_eq!(attachment.stages, Stages::None);

        assert_eq!(machine.read(DISK, None, there), Ok(0x77));
        assert!(machine.read(NIC, None, there).is_err(), "the other does not");
        let (leaving, invalidations) = machine.vtd.tables.detach(attachment).expect("it is attached");
        assert_eq!(machine.read(DISK, None, there), Ok(0x77), "the entry is remembered");
        // QEMU remembers by the context that a device bypasses, whatever becomes of the entry of its PASID.
        let of_context = match machine.vtd.tables.mode() {
            Mode::Legacy => Invalidation::Attachment(attachment),
            Mode::Scalable => Invalidation::Device { stream: DISK, device_tlb: false },
        };
        assert!(invalidations.contains(&of_context), "{invalidations:?}");
        machine.invalidate(&invalidations);

        assert_eq!(machine.read(DISK, None, there), refused(absent));
        machine.vtd.tables.finish(leaving);
        machine.block(DISK);
        machine.assign(DISK, PLAIN);
        assert!(machine.read(DISK, None, there).is_err());
        machine.assert_lawful();
    }
}

#[test]
fn one_pasid_bypasses_and_the_next_does_not() {
    let mut machine = HARDWARE.machine(Config::full());
    let page = machine.page(0x77);
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.assign(DISK, ALL);
    machine.attach_by(DISK, pasid(5), Translation::Bypass(trust()));
    machine.attach(DISK, pasid(6), &tree);

    assert_eq!(machine.read(DISK, pasid(5), Iova(page.0)), Ok(0x77));
    assert_eq!(machine.ats_read(DISK, pasid(5), Iova(page.0)), Ok(0x77));
    assert_eq!(machine.read(DISK, pasid(6), Iova(page.0)), refused(0x71));
    assert_eq!(machine.read(DISK, None, Iova(page.0)), refused(0x59));
    machine.assert_lawful();
}

#[test]
fn a_bypass_that_the_unit_lacks_is_refused_by_the_name_of_its_bit() {
    // ECAP.PT is bit 6.
    let config = Config { ecap: Config::full().ecap & !(1 << 6), ..Config::full() };
    for mut machine in [HARDWARE.legacy(config), HARDWARE.machine(config)] {
        machine.assign(DISK, PLAIN);
        let refused = machine.vtd.tables.attach(DISK, None, Translation::Bypass(trust())).err();
        assert_eq!(refused, Some(Error::Unsupported { feature: "ECAP.PT" }));
    }
}

#[test]
fn an_attachment_that_is_blocked_takes_its_place_and_lets_nothing_through() {
    for (mut machine, absent) in both_modes().into_iter().zip([0x02, 0x59]) {
        let tree = machine.tree(VtdSecondStage::<4>);
        machine.map(&tree, HERE, 1);
        machine.assign(DISK, PLAIN);
        let blocked = machine.attach_by(DISK, None, Translation::Blocked);

        assert_eq!(machine.read(DISK, None, HERE), refused(absent));
        let taken = machine.vtd.tables.attach(DISK, None, second(&tree)).err();
        assert_eq!(taken, Some(Error::PasidState { stream: DISK, pasid: None }));
        machine.detach(blocked);
        assert!(machine.vtd.tables.detach(blocked).is_err());

        let attachment = machine.attach_by(DISK, None, second(&tree));
        assert_eq!(attachment.domain, blocked.domain, "its domain was given back");
        assert_eq!(machine.read(DISK, None, HERE), Ok(1));
        machine.assert_lawful();
    }
}

/// A guest whose memory is that of the second-stage tree, and its own first stage.
struct Guest {
    second: Tree<VtdSecondStage<4>>,
    first: Tree<VtdFirstStage<4>>,
}

impl Guest {
    /// The guest's address of the host's `address`.
    fn address(address: u64) -> u64 {
        address + 0x10_0000_0000
    }

    /// Lets the guest reach the host's page at `page`.
    fn give(&self, machine: &mut Machine, page: u64) {
        let grant = grant(page, 1);
        let _ = self.second.map(&mut machine.frames, Self::address(page), &grant, Perms::READ_WRITE);
    }

    /// A guest that maps `HERE` to a page of its own, which begins with `word`.
    ///
    /// Its tables are made by the tree of the host, and then every address in them is turned into the guest's.
    fn new(machine: &mut Machine, word: u64) -> (Self, PhysAddr) {
        let (second, first) = (machine.tree(VtdSecondStage::<4>), machine.tree(VtdFirstStage::<4>));
        let page = machine.map(&first, HERE, word);
        let guest = Self { second, first };
        guest.give(machine, page.0);
        let mut table = guest.first.root().0;
        for level in (1..=4).rev() {
            guest.give(machine, table);
            let at = PhysAddr(table + (HERE.0 >> (3 + 9 * level) & 0x1FF) * 8);
            let entry = machine.memory.device_load(at).expect("it is a table");
            machine.memory.device_store(at, Self::address(entry)).expect("it is a table");
            table = entry & 0x000F_FFFF_FFFF_F000;
        }
        (guest, page)
    }

    fn translation(&self) -> Translation {
        let first = FirstStage::Pages { root: Gpa(Self::address(self.first.root().0)), levels: 4 };
        Translation::Nested { first, second: root(self.second.root().0, 4) }
    }
}

#[test]
fn a_guest_s_own_tables_reach_the_guest_s_memory_and_nothing_else() {
    let mut machine = HARDWARE.machine(Config::full().with_nesting());
    let (guest, page) = Guest::new(&mut machine, 0x1234);
    machine.assign(DISK, ALL);
    let attachment = machine.attach_by(DISK, pasid(5), guest.translation());
    assert_eq!(attachment.stages, Stages::Nested);

    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(0x1234));
    assert_eq!(machine.ats_read(DISK, pasid(5), HERE), Ok(0x1234));
    assert_eq!(machine.read(DISK, pasid(5), NEXT), refused(0x71), "SFS.2: the guest's own affair");

    // The host takes the page away: whatever the guest's tables say, it is gone when the invalidation has completed.
    machine.unmap(&guest.second, Iova(Guest::address(page.0)));
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(0x1234));
    let iova = Iova(Guest::address(page.0));
    machine.invalidate(&[Invalidation::Pages { attachment, iova, pages: 1 }]);
    assert_eq!(machine.read(DISK, pasid(5), HERE), refused(0x79), "SSS.2");
    assert!(machine.ats_read(DISK, pasid(5), HERE).is_err());

    machine.detach(attachment);
    assert_eq!(machine.read(DISK, pasid(5), HERE), refused(0x59));
    machine.assert_lawful();
}

/// The one fault of a pass: its code, the page that it names, and which tables refused.
fn fault_of(machine: &mut Machine) -> (u16, Iova, Stages) {
    let events = machine.pass();
    let [Event::Fault(fault)] = &events[..] else { panic!("{events:?}") };
    (fault.code, fault.iova, machine.vtd.events.refused_by(fault))
}

#[test]
fn a_fault_of_a_nested_attachment_says_whose_tables_refused_and_names_no_address_but_the_device_s() {
    // MGAW: the second stage takes addresses of 39 bits.
    let config = Config::full().with_nesting();
    let mut machine = HARDWARE.machine(Config { cap: config.cap & !(0x3F << 16) | 38 << 16, ..config });
    let (guest, page) = Guest::new(&mut machine, 0x1234);
    machine.assign(DISK, ALL);
    let attachment = machine.attach_by(DISK, pasid(5), guest.translation());
    // The guest's tables again, by the addresses that the guest has for them: the entry of `HERE` is in the last of them.
    let table_of = |machine: &Machine, level: u32| {
        let mut table = guest.first.root().0;
        for level in (level + 1..=4).rev() {
            let at = PhysAddr(table + (HERE.0 >> (3 + 9 * level) & 0x1FF) * 8);
            let entry = machine.memory.device_load(at).expect("it is a table");
            table = (entry & 0x000F_FFFF_FFFF_F000) - Guest::address(0);
        }
        table
    };
    let last = table_of(&machine, 1);
    let here = PhysAddr(last + (HERE.0 >> 12 & 0x1FF) * 8);
    let entry = machine.memory.device_load(here).expect("it is a table");
    let store = |machine: &Machine, entry| machine.memory.device_store(here, entry).expect("it is a table");
    let everything = Invalidation::Attachment(attachment);

    // The first stage's own: nothing there, a reserved bit, a page of supervisors, an address past the second stage.
    assert_eq!(machine.read(DISK, pasid(5), NEXT), refused(0x71));
    assert_eq!(fault_of(&mut machine), (0x71, NEXT, Stages::First));
    for (broken, code) in [(entry | 1 << 51, 0x72), (entry & !4, 0x81), (entry | 1 << 40, 0x74)] {
        store(&machine, broken);
        assert_eq!(machine.read(DISK, pasid(5), HERE), refused(code as u8), "{code:#x}");
        assert_eq!(fault_of(&mut machine), (code, HERE, Stages::First));
    }
    // A permission to write that the first stage lacks, or the second: the unit has one number for both.
    store(&machine, entry & !2);
    assert_eq!(machine.unit.dma_write(DISK, pasid(5), HERE, &[1; 8]), refused(0x85));
    assert_eq!(fault_of(&mut machine), (0x85, HERE, Stages::Nested));
    store(&machine, entry);

    // The page is not the guest's any more; nor, then, its last table.
    machine.unmap(&guest.second, Iova(Guest::address(page.0)));
    machine.invalidate(&[everything]);
    assert_eq!(machine.read(DISK, pasid(5), HERE), refused(0x79));
    assert_eq!(fault_of(&mut machine), (0x79, HERE, Stages::Second));
    // A page request for it says no more than that the device wants the page: it is the guest's, by the guest's address.
    assert!(machine.ats_read(DISK, pasid(5), HERE).is_err());
    let tag = GroupTag { pasid: pasid(5), index: 3 };
    let request = PageRequest { stream: DISK, tag, iova: HERE, perms: Perms::READ, last: true };
    assert_eq!(machine.unit.page_request(request), Requested::Queued);
    assert_eq!(machine.pass(), [Event::PageRequest(request)]);
    let answer = PageResponse { stream: DISK, tag, outcome: Outcome::Invalid };
    machine.vtd.commands.respond(answer).expect("there is room");

    machine.unmap(&guest.second, Iova(Guest::address(last)));
    machine.invalidate(&[everything]);
    assert_eq!(machine.read(DISK, pasid(5), HERE), refused(0x79));
    assert_eq!(fault_of(&mut machine), (0x79, HERE, Stages::Second));
    // It may be written again, but not be read.
    let grant = grant(last, 1);
    let write = Perms { write: true, ..Perms::default() };
    guest
        .second
        .map(&mut machine.frames, Guest::address(last), &grant, write)
        .expect("nothing is mapped there");
    machine.invalidate(&[everything]);
    assert_eq!(machine.read(DISK, pasid(5), HERE), refused(0x76));
    assert_eq!(fault_of(&mut machine), (0x76, HERE, Stages::Second));

    // What is attached to nothing was refused by no tables.
    machine.detach(attachment);
    assert_eq!(machine.read(DISK, pasid(5), HERE), refused(0x59));
    assert_eq!(fault_of(&mut machine), (0x59, HERE, Stages::None));
    machine.assert_lawful();
}

#[test]
fn a_nested_attachment_is_over_when_its_invalidations_complete_and_not_before() {
    let mut machine = HARDWARE.machine(Config::full().with_nesting());
    let (guest, _) = Guest::new(&mut machine, 1);
    machine.assign(DISK, ALL);
    let attachment = machine.attach_by(DISK, None, guest.translation());
    assert_eq!((machine.read(DISK, None, HERE), machine.ats_read(DISK, None, HERE)), (Ok(1), Ok(1)));

    let (leaving, invalidations) = machine.vtd.tables.detach(attachment).expect("it is attached");
    assert_eq!(machine.read(DISK, None, HERE), Ok(1));
    machine.invalidate(&invalidations);

    assert_eq!(machine.read(DISK, None, HERE), refused(0x59));
    assert_eq!(machine.unit.device_tlb(DISK), []);
    machine.vtd.tables.finish(leaving);
    // The domain is used again, and nothing that was nested under it is found.
    let (other, _) = Guest::new(&mut machine, 2);
    let next = machine.attach_by(DISK, None, other.translation());
    assert_eq!(next.domain, attachment.domain);
    assert_eq!(machine.read(DISK, None, HERE), Ok(2));
    machine.assert_lawful();
}

#[test]
fn a_first_stage_that_the_unit_cannot_walk_for_a_guest_is_refused_by_name() {
    let mut machine = HARDWARE.machine(Config::full().with_nesting());
    machine.assign(DISK, ALL);
    let second = root(0x1000, 4);
    for (first, name) in [
        (FirstStage::Contexts { entry: [0; 8] }, "PASID tables"),
        (FirstStage::Pages { root: Gpa(0x1008), levels: 4 }, "page boundary"),
    ] {
        let refused = machine.vtd.tables.attach(DISK, None, Translation::Nested { first, second }).err();
        let Some(Error::Unsupported { feature }) = refused else { panic!("{name}: {refused:?}") };
        assert!(feature.contains(name), "{feature}");
    }
    let mut machine = HARDWARE.machine(Config::full());
    machine.assign(DISK, ALL);
    let first = FirstStage::Pages { root: Gpa(0x1000), levels: 4 };
    let refused = machine.vtd.tables.attach(DISK, None, Translation::Nested { first, second }).err();
    assert_eq!(refused, Some(Error::Unsupported { feature: "ECAP.NEST" }));
}

#[test]
fn entries_hold_the_words_of_the_manual_and_no_bit_that_the_unit_lacks() {
    // PWSNP (SMPWCS) is 1<<23 of the second word and PGSNP (SC) 1<<24: `full` has both, `qemu` neither. AW 2.
    let nested = Config::full().with_nesting();
    let without = |bit: u64| Config { ecap: nested.ecap & !(1 << bit), ..nested };
    for (config, snoop) in
        [(nested, 0x0180_0000), (without(48), 0x0100_0000), (without(7), 0x0080_0000), (Config::qemu(), 0)]
    {
        let mut machine = HARDWARE.machine(config);
        machine.assign(DISK, PLAIN);
        let attachment = machine.attach_by(DISK, None, Translation::Bypass(trust()));
        // 1 | AW 2<<2 | PGTT 4<<6.
        let did = u64::from(attachment.domain.0);
        assert_eq!(entry_words(&machine, DISK), [0x109, did | snoop, 0, 0, 0, 0, 0, 0]);
        machine.detach(attachment);
        assert_eq!(entry_words(&machine, DISK), [0; 8]);
        let first = machine.attach_by(DISK, None, Translation::Stage1(root(0x7000, 4)));
        let did = u64::from(first.domain.0);
        assert_eq!(entry_words(&machine, DISK), [0x49, did | snoop, 0x7000, 0, 0, 0, 0, 0]);
        machine.detach(first);
        if config.ecap & 1 << 26 != 0 {
            let first = FirstStage::Pages { root: Gpa(0x9000), levels: 4 };
            machine.attach_by(DISK, None, Translation::Nested { first, second: root(0x7000, 3) });
            // 1 | AW 1<<2 | PGTT 3<<6.
            assert_eq!(entry_words(&machine, DISK), [0x70C5, did | snoop, 0x9000, 0, 0, 0, 0, 0]);
        }
    }

    // Legacy: TT 1<<2 with a device TLB, TT 2<<2 for pass-through; AW is 2 at bit 0 of the second word, DID at bit 8.
    let mut machine = HARDWARE.legacy(Config::full());
    machine.assign(DISK, ATS);
    machine.assign(NIC, PLAIN);
    let [disk, nic] = [
        machine.attach_by(DISK, None, Translation::Stage2(root(0x7000, 3))),
        machine.attach_by(NIC, None, Translation::Bypass(trust())),
    ];
    assert_eq!(entry_words(&machine, DISK), [0x7005, 1 | u64::from(disk.domain.0) << 8]);
    assert_eq!(entry_words(&machine, NIC), [0x9, 2 | u64::from(nic.domain.0) << 8]);
    machine.detach(disk);
    assert_eq!(entry_words(&machine, DISK), [0, 0]);
}

#[test]
fn a_blocked_device_that_goes_on_floods_nobody_once_it_is_silenced() {
    for config in [Config::full(), Config::full().with_caching_mode()] {
        for mut machine in [HARDWARE.legacy(config), HARDWARE.machine(config)] {
            let tree = machine.tree(VtdSecondStage::<4>);
            machine.map(&tree, HERE, 1);
            machine.assign(DISK, PLAIN);
            machine.assign(NIC, PLAIN);
            let attachment = machine.attach_by(DISK, None, second(&tree));
            let busy = Some(Error::StreamBusy { stream: DISK });
            assert_eq!(machine.vtd.tables.silence(DISK).err(), busy, "it is not blocked");
            assert_eq!(machine.read(DISK, None, HERE), Ok(1));
            let (leaving, invalidations) = machine.vtd.tables.block(DISK).expect("it is assigned");
            machine.invalidate(&invalidations);
            assert!(machine.read(DISK, None, HERE).is_err());
            assert_eq!(faults(&mut machine), [FaultReason::NotAttached]);

            let invalidations = machine.vtd.tables.silence(DISK).expect("it is blocked");
            machine.invalidate(&invalidations);

            assert!(machine.read(DISK, None, HERE).is_err() && machine.read(DISK, None, NEXT).is_err());
            assert_eq!(faults(&mut machine), []);
            // What is detached meanwhile does not end it.
            machine.detach(attachment);
            assert!(machine.read(DISK, None, HERE).is_err());
            assert_eq!(faults(&mut machine), []);
            assert!(machine.read(NIC, None, HERE).is_err());
            assert_eq!(faults(&mut machine), [FaultReason::NotAttached], "the other is still heard");
            machine.vtd.tables.finish(leaving);
            machine.assign(DISK, PLAIN);
            assert!(machine.read(DISK, None, HERE).is_err());
            assert_eq!(faults(&mut machine), [FaultReason::NotAttached], "its new owner is told again");
            machine.assert_lawful();
        }
    }
    let mut machine = HARDWARE.machine(Config::full());
    let unknown = Some(Error::UnknownStream { stream: DISK });
    assert_eq!(machine.vtd.tables.silence(DISK).err(), unknown);
}

#[test]
fn silence_ends_with_the_end_of_the_block() {
    for mut machine in both_modes() {
        machine.assign(DISK, PLAIN);
        let (leaving, invalidations) = machine.vtd.tables.block(DISK).expect("it is assigned");
        machine.invalidate(&invalidations);
        let invalidations = machine.vtd.tables.silence(DISK).expect("it is blocked");
        machine.invalidate(&invalidations);
        assert!(machine.read(DISK, None, HERE).is_err());
        assert_eq!(faults(&mut machine), []);

        machine.vtd.tables.finish(leaving);

        assert!(machine.read(DISK, None, HERE).is_err());
        assert_eq!(faults(&mut machine), [FaultReason::NotAttached]);
        machine.assert_lawful();
    }
}

#[test]
fn the_end_of_what_never_began_to_leave_changes_nothing() {
    for mut machine in both_modes() {
        let tree = machine.tree(VtdSecondStage::<4>);
        machine.map(&tree, HERE, 1);
        machine.assign(DISK, PLAIN);
        let attachment = machine.attach_by(DISK, None, second(&tree));

        for what in [LeavingPart::Attachment(attachment), LeavingPart::Device] {
            machine.vtd.tables.finish(Leaving { stream: DISK, what });
        }

        machine.invalidate(&[Invalidation::All]);
        assert_eq!(machine.read(DISK, None, HERE), Ok(1));
        machine.detach(attachment);
        machine.block(DISK);
        assert!(machine.read(DISK, None, HERE).is_err());
        machine.assert_lawful();
    }
}

/// GCMD.WBF and GSTS.WBFS.
const WBF: u32 = 1 << 27;

#[test]
fn what_is_attached_is_seen_although_a_write_buffer_is_in_the_way() {
    for legacy in [false, true] {
        let config = Config::full().with_write_buffer();
        let mut machine = if legacy { HARDWARE.legacy(config) } else { HARDWARE.machine(config) };
        let tree = machine.tree(VtdSecondStage::<4>);
        machine.map(&tree, HERE, 1);
        machine.unit.plug(DISK);

        // Nobody submits an invalidation.
        assert!(machine.vtd.tables.assign(DISK, PLAIN).is_ok());
        let attached = machine.vtd.tables.attach(DISK, None, second(&tree));

        assert_eq!(machine.read(DISK, None, HERE), Ok(1), "legacy: {legacy}");
        let (attachment, _) = attached.expect("it can be attached");
        machine.detach(attachment);
        assert!(machine.read(DISK, None, HERE).is_err());
        assert_eq!(machine.unit.read32(0x1C) & WBF, 0);
        machine.assert_lawful();
    }
}

#[test]
fn a_write_buffer_that_is_never_flushed_changes_nothing_but_the_time_it_takes() {
    let (unit, memory) = HARDWARE.unit(Config::full().with_write_buffer());
    unit.never_acknowledge(WBF);
    let parts = needs(&memory);
    let error = HARDWARE.enable(unit, memory, unit, parts).err();
    assert!(matches!(error, Some(Error::Timeout { register: "GSTS.WBFS", .. })), "{error:?}");
    assert_eq!(unit.read32(0x1C) & 1 << 31, 0, "translation stays off");

    for legacy in [false, true] {
        let config = Config::full().with_write_buffer();
        let mut machine = if legacy { HARDWARE.legacy(config) } else { HARDWARE.machine(config) };
        machine.assign(NIC, PLAIN);
        let free = machine.vtd.tables.frames_free();
        machine.unit.never_acknowledge(WBF);

        let late = |error: Option<Error>| match error {
            Some(Error::Timeout { register, waited_us }) => {
                assert_eq!(register, "GSTS.WBFS");
                assert!((100_000..110_000).contains(&waited_us), "{waited_us}");
            }
            other => panic!("{other:?}"),
        };
        late(machine.vtd.tables.assign(DISK, PLAIN).err());
        late(machine.vtd.tables.attach(NIC, None, Translation::Bypass(trust())).err());

        assert_eq!(machine.vtd.tables.frames_free(), free);
        machine.unit.never_acknowledge(0);
        assert!(machine.read(NIC, None, HERE).is_err());
        machine.assign(DISK, PLAIN);
        machine.attach_by(NIC, None, Translation::Bypass(trust()));
        assert!(machine.read(NIC, None, Iova(machine.page(1).0)).is_ok(), "and then it works");
    }
}

#[test]
fn a_unit_that_looks_into_the_caches_pays_for_no_flush_of_its_tables() {
    let without = |bits: u64| Config { ecap: Config::full().ecap & !bits, ..Config::full() };
    // ECAP.C is bit 0, SMPWCS bit 48: for PASID tables, either may be what the unit goes by.
    for (config, legacy, flushes) in [
        (Config::full(), false, false),
        (Config::full(), true, false),
        (without(1), false, true),
        (without(1), true, true),
        (without(1 << 48), false, true),
        (without(1 << 48), true, false),
    ] {
        let mut machine = if legacy { HARDWARE.legacy(config) } else { HARDWARE.machine(config) };
        let page = machine.page(1);
        machine.unit.plug(DISK);
        let before = machine.unit.flushes();
        let tables = &mut machine.vtd.tables;
        assert!(tables.assign(DISK, PLAIN).is_ok());
        let (attachment, _) = tables.attach(DISK, None, Translation::Bypass(trust())).expect("it can be");
        assert_eq!(machine.unit.flushes() > before, flushes, "legacy: {legacy}, ECAP {:#x}", config.ecap);

        assert_eq!(machine.read(DISK, None, Iova(page.0)), Ok(1));
        let (leaving, invalidations) = machine.vtd.tables.detach(attachment).expect("it is attached");
        let ticket = machine.vtd.commands.submit(&invalidations).expect("there is room");
        machine.wait(ticket);
        let before = machine.unit.flushes();
        machine.vtd.tables.finish(leaving);
        let (_leaving, _) = machine.vtd.tables.block(DISK).expect("it is assigned");
        assert!(machine.vtd.tables.silence(DISK).is_ok());
        assert_eq!(machine.unit.flushes() > before, flushes);
        assert!(machine.read(DISK, None, Iova(page.0)).is_err());
        machine.assert_lawful();
    }
}
