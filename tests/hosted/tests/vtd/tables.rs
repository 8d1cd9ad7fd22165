//! The table side of the VT-d driver against the modelled unit: who is translated how, and when that is really over.

use crate::HARDWARE;
use hosted::{Machine, Tapped, grant, needs, root};
use iommu::{
    Commands, Completion, DomainId, Error, Event, FaultReason, Features, Invalidation, Iova, PAGE_SIZE,
    Pasid, Perms, StreamId, Tables, Translation,
};
use models::vtd::{Config, Refusal};
use pgtable::{VtdFirstStage, VtdSecondStage};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };
const HERE: Iova = Iova(0x4000_0000);

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

/// The reasons of the faults in one pass, in order.
fn faults(machine: &mut Machine) -> Vec<FaultReason> {
    let reason = |event| match event {
        Event::Fault(fault) => fault.reason,
        other => panic!("{other:?} is no fault"),
    };
    machine.pass().into_iter().map(reason).collect()
}

#[test]
fn a_device_reaches_what_is_mapped_for_its_pasid_and_nothing_else() {
    let mut machine = HARDWARE.machine(Config::full());
    let tree = machine.tree(VtdFirstStage::<4>);
    let page = machine.map(&tree, HERE, 0x1234_5678);
    machine.assign(DISK, ALL);
    machine.attach(DISK, pasid(5), &tree);

    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(0x1234_5678));
    assert_eq!(machine.unit.dma_write(DISK, pasid(5), Iova(HERE.0 + 8), &[7]), Ok(()));
    assert_eq!(machine.memory.device_load(iommu::PhysAddr(page.0 + 8)), Ok(7));

    let elsewhere = Iova(HERE.0 + PAGE_SIZE);
    assert_eq!(machine.read(DISK, pasid(5), elsewhere), Err(Refusal::Fault(0x71)), "SFS.2");
    assert_eq!(faults(&mut machine), [FaultReason::NotMapped]);
    for (stream, number) in [(DISK, None), (DISK, pasid(6)), (DISK, pasid(64)), (NIC, pasid(5)), (NIC, None)]
    {
        assert!(machine.read(stream, number, HERE).is_err());
        assert_eq!(faults(&mut machine), [FaultReason::NotAttached], "{stream:?} {number:?}");
    }
    machine.assert_lawful();
}

#[test]
fn accesses_without_pasid_have_an_attachment_of_their_own() {
    let mut machine = HARDWARE.machine(Config::qemu());
    let [plain, tagged] = [1, 2].map(|content| {
        let tree = machine.tree(VtdFirstStage::<4>);
        machine.map(&tree, HERE, content);
        tree
    });
    machine.assign(DISK, ALL);
    let without = machine.attach(DISK, None, &plain);
    machine.attach(DISK, pasid(1), &tagged);

    assert_eq!(machine.read(DISK, None, HERE), Ok(1));
    assert_eq!(machine.read(DISK, pasid(1), HERE), Ok(2));

    machine.detach(without);
    assert!(machine.read(DISK, None, HERE).is_err());
    assert_eq!(machine.read(DISK, pasid(1), HERE), Ok(2));
    machine.assert_lawful();
}

#[test]
fn a_page_that_was_unmapped_is_reached_until_its_invalidation_completes_and_not_after() {
    for device_tlb in [false, true] {
        let mut machine = HARDWARE.machine(Config::full());
        let tree = machine.tree(VtdFirstStage::<4>);
        machine.map(&tree, HERE, 1);
        machine.map(&tree, Iova(HERE.0 + PAGE_SIZE), 2);
        machine.assign(DISK, Features { device_tlb, page_requests: false, pasid: true });
        let attachment = machine.attach(DISK, pasid(5), &tree);
        let read = |machine: &Machine, at| {
            if device_tlb { machine.ats_read(DISK, pasid(5), at) } else { machine.read(DISK, pasid(5), at) }
        };
        let next = Iova(HERE.0 + PAGE_SIZE);
        assert_eq!((read(&machine, HERE), read(&machine, next)), (Ok(1), Ok(2)));

        machine.unmap(&tree, HERE);
        assert_eq!(read(&machine, HERE), Ok(1), "the model remembers, as hardware may");
        machine.invalidate(&[Invalidation::Pages { attachment, iova: HERE, pages: 1 }]);

        assert!(read(&machine, HERE).is_err(), "device TLB: {device_tlb}");
        assert_eq!(read(&machine, next), Ok(2), "its neighbour stays");
        assert!(machine.unit.device_tlb(DISK).iter().all(|entry| entry.iova != HERE));
        machine.assert_lawful();
    }
}

#[test]
fn pages_without_pasid_are_forgotten_by_the_device_as_well() {
    for pages in [1, 3, 8, 40] {
        let mut machine = HARDWARE.machine(Config::full());
        let tree = machine.tree(VtdFirstStage::<4>);
        machine.assign(DISK, ALL);
        let attachment = machine.attach(DISK, None, &tree);
        let page = |n: u64| Iova(HERE.0 + n * PAGE_SIZE);
        for n in 0..pages {
            machine.map(&tree, page(n), n);
            assert_eq!(machine.ats_read(DISK, None, page(n)), Ok(n));
            machine.unmap(&tree, page(n));
        }

        machine.invalidate(&[Invalidation::covering(attachment, HERE, pages * PAGE_SIZE)]);

        assert_eq!(machine.unit.device_tlb(DISK), [], "{pages} pages");
        assert_eq!(machine.read(DISK, None, HERE), Err(Refusal::Fault(0x71)));
        machine.assert_lawful();
    }
}

#[test]
fn a_detached_pasid_is_over_when_its_invalidations_complete_and_not_before() {
    let mut machine = HARDWARE.machine(Config::full());
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.map(&tree, HERE, 1);
    let fresh = Iova(HERE.0 + PAGE_SIZE);
    machine.map(&tree, fresh, 2);
    machine.assign(DISK, ALL);
    let attachment = machine.attach(DISK, pasid(5), &tree);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(1));
    assert_eq!(machine.ats_read(DISK, pasid(5), HERE), Ok(1));

    let (leaving, invalidations) = machine.vtd.tables.detach(attachment).expect("it is attached");
    // The unit and the device remember the translation, and the unit the PASID entry: even a new page is found.
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(1));
    assert_eq!(machine.read(DISK, pasid(5), fresh), Ok(2));
    assert_eq!(machine.ats_read(DISK, pasid(5), HERE), Ok(1));
    machine.invalidate(&invalidations);

    for at in [HERE, fresh] {
        assert_eq!(machine.read(DISK, pasid(5), at), Err(Refusal::Fault(0x59)), "SPT.2");
        assert!(machine.ats_read(DISK, pasid(5), at).is_err());
    }
    assert_eq!(machine.unit.device_tlb(DISK), []);
    machine.vtd.tables.finish(leaving);
    assert!(machine.read(DISK, pasid(5), HERE).is_err());
    machine.assert_lawful();
}

#[test]
fn a_pasid_is_not_attached_again_before_hardware_has_let_go_of_it() {
    let mut machine = HARDWARE.machine(Config::full());
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.assign(DISK, ALL);
    let first = machine.attach(DISK, pasid(5), &tree);
    let translation = Translation::Stage1(root(tree.root().0, 4));
    let busy = Err(Error::PasidState { stream: DISK, pasid: pasid(5) });
    let attach =
        |machine: &mut Machine| machine.vtd.tables.attach(DISK, pasid(5), translation).map(|(a, _)| a);
    assert_eq!(attach(&mut machine), busy, "it is attached");

    let (leaving, invalidations) = machine.vtd.tables.detach(first).expect("it is attached");
    assert_eq!(attach(&mut machine), busy, "it is leaving");
    assert_eq!(machine.vtd.tables.detach(first).err(), busy.err(), "it left already");
    machine.invalidate(&invalidations);
    assert_eq!(attach(&mut machine), busy, "nobody said that it is finished");
    machine.vtd.tables.finish(leaving);

    let again = attach(&mut machine).expect("now it is free");
    assert_eq!(again.pasid, pasid(5));
    machine.assert_lawful();
}

#[test]
fn a_domain_is_not_used_again_before_hardware_has_let_go_of_it() {
    let mut machine = HARDWARE.machine(Config::full());
    let [old, new] = [1, 2].map(|content| {
        let tree = machine.tree(VtdFirstStage::<4>);
        machine.map(&tree, HERE, content);
        tree
    });
    machine.assign(DISK, ALL);
    let first = machine.attach(DISK, pasid(5), &old);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(1));

    // Nothing of the first is invalidated yet: what the unit remembers under its domain is still there.
    let (leaving, invalidations) = machine.vtd.tables.detach(first).expect("it is attached");
    let second = machine.attach(DISK, pasid(6), &new);

    assert_ne!(second.domain, first.domain);
    assert_eq!(machine.read(DISK, pasid(6), HERE), Ok(2));
    machine.invalidate(&invalidations);
    machine.vtd.tables.finish(leaving);
    assert_eq!(machine.attach(DISK, pasid(5), &new).domain, first.domain, "now it is free");
    machine.assert_lawful();
}

#[test]
fn an_attachment_that_was_detached_does_not_name_the_one_that_came_after_it() {
    let mut machine = HARDWARE.machine(Config::full());
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.map(&tree, HERE, 1);
    machine.assign(DISK, ALL);
    let first = machine.attach(DISK, pasid(5), &tree);
    let (leaving, invalidations) = machine.vtd.tables.detach(first).expect("it is attached");
    machine.invalidate(&invalidations);
    machine.vtd.tables.finish(leaving);
    let refused = Some(Error::PasidState { stream: DISK, pasid: pasid(5) });

    // It has the domain that was given back; the one after it has another, which the first is not taken for either.
    let second = machine.attach(DISK, pasid(5), &tree);
    assert_eq!(second.domain, first.domain);
    assert_eq!(machine.vtd.tables.detach(first).err(), refused);
    machine.detach(second);
    let other = machine.attach(DISK, pasid(6), &tree);
    let third = machine.attach(DISK, pasid(5), &tree);
    assert!(other.domain == first.domain && third.domain != first.domain);

    assert_eq!(machine.vtd.tables.detach(first).err(), refused);
    assert_eq!(machine.vtd.tables.detach(second).err(), refused);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(1));
    machine.detach(third);
    machine.assert_lawful();
}

#[test]
fn each_pasid_of_each_device_is_attached_and_detached_alone() {
    let mut machine = HARDWARE.machine(Config::full());
    // Two in one PASID table, the first of the next, and the last that the tables hold.
    let numbers = [None, pasid(1), pasid(63), pasid(64), pasid(8191)];
    let mut attached = Vec::new();
    for (d, stream) in [DISK, NIC].into_iter().enumerate() {
        machine.assign(stream, ALL);
        for (n, number) in numbers.into_iter().enumerate() {
            let tree = machine.tree(VtdFirstStage::<4>);
            let content = (d * 10 + n) as u64;
            machine.map(&tree, HERE, content);
            let attachment = machine.attach(stream, number, &tree);
            attached.push((attachment, content));
        }
    }
    let domains: Vec<_> = attached.iter().map(|(attachment, _)| attachment.domain.0).collect();
    let distinct: BTreeSet<_> = domains.iter().collect();
    assert_eq!(distinct.len(), domains.len(), "a domain for each: {domains:?}");
    assert!(!domains.contains(&0), "domain 0 is reserved for caching mode");

    while let Some((gone, _)) = attached.pop() {
        for (attachment, content) in &attached {
            assert_eq!(machine.read(attachment.stream, attachment.pasid, HERE), Ok(*content));
            assert_eq!(machine.ats_read(attachment.stream, attachment.pasid, HERE), Ok(*content));
        }
        machine.detach(gone);
        assert!(machine.read(gone.stream, gone.pasid, HERE).is_err());
        assert_eq!(faults(&mut machine), [FaultReason::NotAttached]);
        // All others are remembered still, by the unit and by the device.
        let known = machine.unit.device_tlb(gone.stream);
        assert!(known.iter().all(|entry| entry.pasid != gone.pasid));
        let left = attached.iter().filter(|(a, _)| a.stream == gone.stream).count();
        assert_eq!(known.len(), left, "only what was detached is forgotten");
    }
    machine.assert_lawful();
}

#[test]
fn a_device_is_found_wherever_it_is() {
    let (unit, memory) = HARDWARE.unit(Config::full());
    let mut parts = needs(&memory);
    while parts.frames.push(memory.take(512, 512)).is_ok() {}
    let mut machine = HARDWARE.enable(unit, memory, unit, parts).expect("it comes into service");
    // Both halves of the first, the second and the last bus, and the ends of each.
    let streams = [0x0000, 0x007F, 0x0080, 0x00FF, 0x0100, 0x01FF, 0xFF00, 0xFFFF].map(StreamId);
    for stream in streams {
        let tree = machine.tree(VtdFirstStage::<4>);
        machine.map(&tree, HERE, stream.0.into());
        machine.assign(stream, ALL);
        machine.attach(stream, pasid(5), &tree);
    }

    for stream in streams {
        assert_eq!(machine.read(stream, pasid(5), HERE), Ok(stream.0.into()));
    }
    machine.assert_lawful();
}

#[test]
fn a_departure_blocks_lets_go_and_gives_everything_back() {
    let mut machine = HARDWARE.machine(Config::full());
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.map(&tree, HERE, 1);
    machine.assign(NIC, ALL);
    machine.attach(NIC, None, &tree);
    // The context table of their bus stays: the card is on it as well.
    let before = machine.vtd.tables.frames_free();
    machine.assign(DISK, ALL);
    let attached = [None, pasid(5), pasid(700)].map(|number| machine.attach(DISK, number, &tree));
    assert_eq!(machine.vtd.tables.frames_free(), before - 3, "a directory and two PASID tables");
    for at in &attached {
        assert_eq!(machine.ats_read(DISK, at.pasid, HERE), Ok(1));
        assert_eq!(machine.read(DISK, at.pasid, HERE), Ok(1));
    }

    // Design 5.1: block in hardware first; everything else after that.
    let (device, invalidations) = machine.vtd.tables.block(DISK).expect("it is assigned");
    machine.invalidate(&invalidations);
    for number in [None, pasid(5), pasid(700)] {
        assert_eq!(machine.read(DISK, number, HERE), Err(Refusal::Fault(0x41)), "SCT.2");
        assert_eq!(machine.ats_read(DISK, number, HERE), Err(Refusal::Fault(0x41)), "translated ones too");
    }
    assert_eq!(machine.vtd.tables.block(DISK).err(), Some(Error::StreamBusy { stream: DISK }));
    let translation = Translation::Stage1(root(tree.root().0, 4));
    let attach = machine.vtd.tables.attach(DISK, pasid(6), translation).map(|_| ());
    assert_eq!(attach, Err(Error::StreamBusy { stream: DISK }), "nothing new is attached to it");
    for at in attached {
        machine.detach(at);
    }
    machine.vtd.tables.finish(device);

    assert_eq!(machine.vtd.tables.frames_free(), before);
    assert_eq!(machine.unit.device_tlb(DISK), []);
    assert_eq!(machine.read(NIC, None, HERE), Ok(1), "the other device goes on");
    // And it can be given to someone else, who sees nothing of what was.
    machine.assign(DISK, ALL);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Err(Refusal::Fault(0x51)));
    let other = machine.tree(VtdFirstStage::<4>);
    machine.map(&other, HERE, 2);
    machine.attach(DISK, pasid(5), &other);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(2));
    machine.assert_lawful();
}

#[test]
fn a_blocked_device_whose_attachments_stay_keeps_its_tables() {
    let mut machine = HARDWARE.machine(Config::full());
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.assign(DISK, ALL);
    let attachment = machine.attach(DISK, pasid(5), &tree);
    let free = machine.vtd.tables.frames_free();

    machine.block(DISK);
    assert_eq!(machine.vtd.tables.frames_free(), free, "hardware may still know its PASID entries");
    assert_eq!(machine.vtd.tables.assign(DISK, ALL).err(), Some(Error::StreamBusy { stream: DISK }));

    // A detachment that nobody waited for does not help either.
    let (leaving, _) = machine.vtd.tables.detach(attachment).expect("it is attached");
    assert_eq!(machine.vtd.tables.assign(DISK, ALL).err(), Some(Error::StreamBusy { stream: DISK }));
    drop(leaving);
    assert_eq!(machine.vtd.tables.frames_free(), free);
}

#[test]
fn what_the_tables_do_not_hold_is_refused_by_name() {
    let mut machine = HARDWARE.machine(Config::full());
    let tree = machine.tree(VtdFirstStage::<4>);
    let stage1 = Translation::Stage1(root(tree.root().0, 4));
    let tables = &mut machine.vtd.tables;
    let attach = |tables: &mut vtd::Tables<_>, stream, number, translation| {
        tables.attach(stream, number, translation).map(|_| ())
    };

    let unknown = Err(Error::UnknownStream { stream: DISK });
    assert_eq!(attach(tables, DISK, None, stage1), unknown);
    assert_eq!(tables.block(DISK).map(|_| ()), unknown);
    let beyond = StreamId(0x1_0000);
    assert_eq!(tables.assign(beyond, ALL).err(), Some(Error::UnknownStream { stream: beyond }));

    assert!(tables.assign(DISK, Features { device_tlb: true, ..Features::default() }).is_ok());
    assert_eq!(tables.assign(DISK, ALL).err(), Some(Error::StreamBusy { stream: DISK }));
    let state = Err(Error::PasidState { stream: DISK, pasid: pasid(5) });
    assert_eq!(attach(tables, DISK, pasid(5), stage1), state, "the device has no PASIDs");

    assert!(tables.assign(NIC, ALL).is_ok());
    assert!(matches!(attach(tables, NIC, pasid(0), stage1), Err(Error::Unsupported { .. })), "PASID 0");
    let past = Pasid::new(8192).expect("20 bits");
    let out_of_range = Err(Error::PasidOutOfRange { pasid: past, limit: 8192 });
    assert_eq!(attach(tables, NIC, Some(past), stage1), out_of_range);
    for levels in [0, 2, 3, 5, 255] {
        let translation = Translation::Stage1(root(0x1000, levels));
        let refused = attach(tables, NIC, None, translation);
        assert!(matches!(refused, Err(Error::Unsupported { .. })), "{levels} levels: {refused:?}");
    }
    let never = iommu::Attachment {
        serial: 0,
        stream: NIC,
        pasid: pasid(9),
        domain: DomainId(3),
        stages: iommu::Stages::First,
        device_tlb: true,
    };
    let refused = tables.detach(never).map(|_| ());
    assert_eq!(refused, Err(Error::PasidState { stream: NIC, pasid: pasid(9) }));

    assert_eq!(attach(tables, NIC, None, stage1), Ok(()), "after all that it still works");
}

#[test]
fn what_the_unit_lacks_is_refused_by_the_name_of_its_bit() {
    // ECAP: DT bit 2, PRS bit 29, PASID bit 40, PDS bit 42, SSTS bit 46 (never there), FSTS bit 47.
    let without = |bits: u64| {
        let (unit, memory) = HARDWARE.unit(Config { ecap: Config::qemu().ecap & !bits, ..Config::qemu() });
        let needs = needs(&memory);
        HARDWARE.enable(unit, memory, unit, needs).expect("it comes into service")
    };
    let only_ats = Features { device_tlb: true, ..Features::default() };
    let ats_and_pri = Features { page_requests: true, ..only_ats };
    let only_pasid = Features { pasid: true, ..Features::default() };
    for (bits, features, name) in [
        (1 << 2, only_ats, "ECAP.DT"),
        (1 << 29, ats_and_pri, "ECAP.PRS"),
        (1 << 42, ats_and_pri, "ECAP.PRS"),
        (1 << 40, only_pasid, "ECAP.PASID"),
        // Page requests of a device without a device TLB.
        (0, Features { page_requests: true, ..Features::default() }, "ECAP.PRS"),
    ] {
        let refused = without(bits).vtd.tables.assign(DISK, features).err();
        let Some(Error::Unsupported { feature }) = refused else { panic!("{name}: {refused:?}") };
        assert!(feature.contains(name), "{feature}");
    }

    let mut machine = without(1 << 47);
    assert!(machine.vtd.tables.assign(DISK, ALL).is_ok());
    for (translation, name) in [
        (Translation::Stage1(root(0x1000, 4)), "ECAP.FSTS"),
        (Translation::Stage2(root(0x1000, 4)), "ECAP.SSTS"),
    ] {
        let refused = machine.vtd.tables.attach(DISK, None, translation).err();
        assert_eq!(refused, Some(Error::Unsupported { feature: name }));
    }
}

#[test]
fn when_frames_run_out_nothing_is_half_done() {
    let (unit, memory) = HARDWARE.unit(Config::full());
    let mut needs = needs(&memory);
    // A context table, a directory, a PASID table; a directory for the second device.
    needs.frames.truncate(4);
    let mut machine = HARDWARE.enable(unit, memory, unit, needs).expect("it comes into service");
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.map(&tree, HERE, 1);
    let translation = Translation::Stage1(root(tree.root().0, 4));
    machine.assign(DISK, ALL);
    let disk = machine.attach(DISK, pasid(5), &tree);
    machine.assign(NIC, ALL);

    let exhausted = |error| matches!(error, Some(Error::Exhausted { what }) if what.contains("frames"));
    assert!(exhausted(machine.vtd.tables.attach(NIC, pasid(5), translation).err()));
    assert!(exhausted(machine.vtd.tables.assign(StreamId(0x30), ALL).err()));
    assert!(exhausted(machine.vtd.tables.assign(StreamId(0x100), ALL).err()), "another bus");
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(1));
    assert!(machine.read(NIC, pasid(5), HERE).is_err());

    machine.detach(disk);
    machine.block(DISK);
    machine.attach(NIC, pasid(5), &tree);
    assert_eq!(machine.read(NIC, pasid(5), HERE), Ok(1), "with the frames of the other");
    assert!(machine.read(StreamId(0x30), None, HERE).is_err());
    machine.assert_lawful();
}

#[test]
fn every_place_can_be_taken_and_one_more_is_refused() {
    let (unit, memory) = HARDWARE.unit(Config::full());
    let mut parts = needs(&memory);
    while parts.frames.push(memory.take(512, 512)).is_ok() {}
    let mut machine = HARDWARE.enable(unit, memory, unit, parts).expect("it comes into service");
    let tree = machine.tree(VtdFirstStage::<4>);
    let translation = Translation::Stage1(root(tree.root().0, 4));
    // Sixteen devices on both halves of a bus; four PASID tables of a device, 64 PASIDs each, 127 domains.
    for device in 0..16 {
        machine.assign(StreamId(device * 16), ALL);
    }
    let refused = machine.vtd.tables.assign(StreamId(0x0F), ALL).err();
    assert!(matches!(refused, Some(Error::Exhausted { .. })), "{refused:?}");
    for number in [1, 64, 128, 192] {
        machine.attach(StreamId(0), pasid(number), &tree);
    }
    let refused = machine.vtd.tables.attach(StreamId(0), pasid(256), translation).err();
    assert!(matches!(refused, Some(Error::Exhausted { .. })), "{refused:?}");

    let mut taken = 4;
    let refused = loop {
        let stream = StreamId(taken / 60 * 16 + 16);
        match machine.vtd.tables.attach(stream, pasid(taken % 60 + 1), translation) {
            Ok((attachment, _)) => {
                assert!(attachment.domain.0 > 0 && attachment.domain.0 < 128);
                taken += 1;
            }
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::Exhausted { what } if what.contains("domain")), "{refused:?}");
    assert_eq!(taken, 127);
}

#[test]
fn a_unit_with_few_domains_is_given_no_more_than_it_has() {
    // CAP.ND = 0: 16 domains. Domain 0 is not used.
    let (unit, memory) = HARDWARE.unit(Config { cap: Config::full().cap & !7, ..Config::full() });
    let needs = needs(&memory);
    let mut machine = HARDWARE.enable(unit, memory, unit, needs).expect("it comes into service");
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.map(&tree, HERE, 1);
    machine.assign(DISK, ALL);

    let attached: Vec<_> = (1..16).map(|number| machine.attach(DISK, pasid(number), &tree)).collect();
    let translation = Translation::Stage1(root(tree.root().0, 4));
    let refused = machine.vtd.tables.attach(DISK, pasid(16), translation).err();
    assert!(matches!(refused, Some(Error::Exhausted { .. })), "{refused:?}");
    assert!(attached.iter().all(|a| machine.read(DISK, a.pasid, HERE) == Ok(1)));

    machine.detach(attached[7]);
    let again = machine.attach(DISK, pasid(16), &tree);
    assert_eq!(again.domain, attached[7].domain, "a domain is used again once it is finished");
    assert_eq!(machine.read(DISK, pasid(16), HERE), Ok(1));
    machine.assert_lawful();
}

#[test]
fn a_unit_that_remembers_absence_is_told_of_what_becomes_present() {
    let mut machine = HARDWARE.machine(Config::full().with_caching_mode());
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.map(&tree, HERE, 1);
    machine.unit.plug(DISK);
    // It has seen that there is nothing, and remembers.
    assert!(machine.read(DISK, None, HERE).is_err() && machine.read(DISK, pasid(5), HERE).is_err());

    machine.assign(DISK, ALL);
    assert!(machine.read(DISK, None, HERE).is_err() && machine.read(DISK, pasid(5), HERE).is_err());
    let attachment = machine.attach(DISK, pasid(5), &tree);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(1));
    let next = Iova(HERE.0 + PAGE_SIZE);
    assert!(machine.read(DISK, pasid(5), next).is_err());
    machine.map(&tree, next, 2);
    machine.invalidate(&[Invalidation::Pages { attachment, iova: next, pages: 1 }]);
    assert_eq!(machine.read(DISK, pasid(5), next), Ok(2));

    machine.detach(attachment);
    assert!(machine.read(DISK, pasid(5), HERE).is_err());
    machine.attach(DISK, pasid(5), &tree);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(1));
    machine.assert_lawful();
}

#[test]
fn second_stage_tables_translate_and_are_forgotten() {
    let mut machine = HARDWARE.machine(Config::full());
    let tree = machine.tree(VtdSecondStage::<4>);
    machine.map(&tree, HERE, 1);
    let read_only = Iova(HERE.0 + PAGE_SIZE);
    let page = machine.page(2);
    tree.map(&mut machine.frames, read_only.0, &grant(page.0, 1), Perms::READ).expect("nothing is there");
    machine.assign(DISK, ALL);
    let translation = Translation::Stage2(root(tree.root().0, 4));
    let (attachment, _) = machine.vtd.tables.attach(DISK, pasid(5), translation).expect("it can be");

    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(1));
    assert_eq!(machine.ats_read(DISK, pasid(5), HERE), Ok(1));
    assert_eq!(machine.read(DISK, pasid(5), read_only), Ok(2));
    let refused = machine.unit.dma_write(DISK, pasid(5), read_only, &[1]);
    assert_eq!(refused, Err(Refusal::Fault(0x85)), "SGN.6");
    assert_eq!(faults(&mut machine), [FaultReason::NotPermitted]);

    machine.unmap(&tree, HERE);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(1));
    machine.invalidate(&[Invalidation::Pages { attachment, iova: HERE, pages: 1 }]);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Err(Refusal::Fault(0x79)), "SSS.2");
    assert!(machine.ats_read(DISK, pasid(5), HERE).is_err());
    machine.detach(attachment);
    assert_eq!(machine.read(DISK, pasid(5), read_only), Err(Refusal::Fault(0x59)));
    machine.assert_lawful();
}

#[test]
fn a_detachment_that_never_completes_keeps_what_it_names_blocked() {
    let mut machine = HARDWARE.machine(Config::full());
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.map(&tree, HERE, 1);
    machine.assign(DISK, ALL);
    let attachment = machine.attach(DISK, pasid(5), &tree);
    machine.unit.hold_device_tlb(DISK);

    let (leaving, invalidations) = machine.vtd.tables.detach(attachment).expect("it is attached");
    let ticket = machine.vtd.commands.submit(&invalidations).expect("there is room");

    machine.unit.advance(10_000);
    assert_eq!(machine.vtd.commands.poll(ticket), Completion::Pending);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Err(Refusal::Fault(0x59)), "the unit itself has let go");
    drop(leaving);
    let translation = Translation::Stage1(root(tree.root().0, 4));
    let refused = machine.vtd.tables.attach(DISK, pasid(5), translation).map(|_| ());
    assert_eq!(refused, Err(Error::PasidState { stream: DISK, pasid: pasid(5) }));
}

/// What a device may see at `HERE`, and how often it looked.
#[derive(Default)]
struct Look {
    allowed: Vec<Result<u64, Refusal>>,
    looks: usize,
}

/// XSA-321, CVE-2026-45862: what was stored had not left the caches when the unit was sent there.
#[test]
fn a_device_meets_the_old_state_or_the_new_at_every_moment_and_nothing_in_between() {
    // The device reads between any two words that the driver makes visible, and around every register access.
    let (unit, memory) = HARDWARE.unit(Config::full());
    let look = Arc::<Mutex<Look>>::default();
    let looking = Arc::clone(&look);
    let bus = Tapped::new(unit, move |unit, _| {
        let mut look = looking.lock().expect("no test panics here");
        if !look.allowed.is_empty() {
            look.looks += 1;
            let seen = unit.dma_read(DISK, pasid(5), HERE, 8);
            let seen = seen.map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
            assert!(look.allowed.contains(&seen), "the device sees {seen:x?}");
        }
    });
    let allow = |allowed: &[Result<u64, Refusal>]| {
        let mut look = look.lock().expect("no test panics here");
        look.allowed = allowed.to_vec();
        std::mem::take(&mut look.looks)
    };
    let needs = needs(&memory);
    let mut machine = HARDWARE.enable(unit, memory, bus, needs).expect("it comes into service");
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.map(&tree, HERE, 1);

    // Root, context, directory and PASID entry not present: SRT.2, SCT.2, SPD.2, SPT.2. Nothing else: a reserved bit or
    // an invalid entry would be a half-written one.
    let absent = [0x39, 0x41, 0x51, 0x59].map(|code| Err(Refusal::Fault(code)));
    allow(&absent);
    machine.assign(DISK, ALL);
    assert!(allow(&[&absent[..], &[Ok(1)]].concat()) > 500, "it looked often");
    let attachment = machine.attach(DISK, pasid(5), &tree);
    assert!(allow(&[Ok(1)]) > 500);
    assert!(machine.vtd.tables.assign(NIC, ALL).is_ok());

    allow(&[Ok(1), absent[3]]);
    let (leaving, invalidations) = machine.vtd.tables.detach(attachment).expect("it is attached");
    machine.invalidate(&invalidations);
    allow(&absent[3..]);
    machine.vtd.tables.finish(leaving);
    allow(&absent[1..]);
    machine.block(DISK);
    allow(&absent[1..3]);
    machine.assign(DISK, ALL);
    assert!(allow(&[]) > 5);
    machine.assert_lawful();
}
