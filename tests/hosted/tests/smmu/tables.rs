//! The table side of the SMMUv3 driver against the modelled unit: who is translated how, and when that is really over.

use crate::{HARDWARE, STREAM_TABLE};
use hosted::{
    Moment, grant, root,
    smmu::{Machine, STREAMS, Stage, Tapped, stream_word, translation},
};
use iommu::{
    Access, Bus, Commands, Completion, Error, Event, FaultReason, FaultRecord, Features, Invalidation, Iova,
    PAGE_SIZE, Pasid, Perms, StreamId, Tables, Translation,
};
use models::smmuv3::{Config, Refusal};
use std::sync::{Arc, Mutex};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
const NONE: Features = Features { device_tlb: false, page_requests: false, pasid: false };
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: false };
const HERE: Iova = Iova(0x4000_0000);
const STAGES: [Stage; 2] = [Stage::One, Stage::Two];

const C_BAD_STE: Refusal = Refusal::Fault(0x04);
const F_TRANSLATION: Refusal = Refusal::Fault(0x10);

fn page(n: u64) -> Iova {
    Iova(HERE.0 + n * PAGE_SIZE)
}

/// The faults of one pass, in order.
fn faults(machine: &mut Machine) -> Vec<FaultRecord> {
    let fault = |event| match event {
        Event::Fault(fault) => fault,
        other => panic!("{other:?} is no fault"),
    };
    machine.pass().into_iter().map(fault).collect()
}

/// Units that differ in what invalidations look like: with everything; without ranges; with one stage alone.
fn units() -> [(Config, &'static [Stage]); 4] {
    let full = Config::full();
    [
        (full, &STAGES),
        (Config { idr3: full.idr3 & !(1 << 10), ..full }, &STAGES),
        (Config { idr0: full.idr0 & !1, ..full }, &STAGES[..1]),
        (Config { idr0: full.idr0 & !2, ..full }, &STAGES[1..]),
    ]
}

#[test]
fn a_device_reaches_what_is_mapped_for_it_and_nothing_else() {
    for stage in STAGES {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
        let tree = machine.tree(stage);
        machine.map(&tree, HERE, 0x1234_5678, Perms::READ_WRITE);
        machine.map(&tree, page(1), 7, Perms::READ);
        machine.assign(DISK, ALL);
        machine.assign(NIC, ALL);
        machine.attach(DISK, stage, &tree);

        assert_eq!(machine.read(DISK, None, HERE), Ok(0x1234_5678));
        assert_eq!(machine.ats_read(DISK, HERE), Ok(0x1234_5678));
        assert_eq!(machine.unit.dma_write(DISK, None, Iova(HERE.0 + 8), &[9]), Ok(()));
        assert_eq!(machine.read(DISK, None, Iova(HERE.0 + 8)), Ok(9));
        assert_eq!(machine.read(DISK, None, page(1)), Ok(7));
        assert_eq!(faults(&mut machine), []);

        // What each of them is refused with, and how that is told. Past 48 bits there is nothing at stage 1; past the 44
        // bits of the unit there is no address at stage 2.
        let far = Iova(1 << 50);
        let size = if stage == Stage::One {
            (0x10, FaultReason::NotMapped)
        } else {
            (0x11, FaultReason::AddressSize)
        };
        let other = Pasid::new(5);
        for (stream, pasid, iova, access, told, (code, reason)) in [
            (DISK, None, page(2), Access::Read, page(2), (0x10, FaultReason::NotMapped)),
            (DISK, None, page(1), Access::Write, page(1), (0x13, FaultReason::NotPermitted)),
            (DISK, None, far, Access::Read, far, size),
            (DISK, other, HERE, Access::Unknown, Iova(0), (0x08, FaultReason::NotAttached)),
            (NIC, None, HERE, Access::Unknown, Iova(0), (0x04, FaultReason::NotAttached)),
            (StreamId(0x21), None, HERE, Access::Unknown, Iova(0), (0x04, FaultReason::NotAttached)),
            (StreamId(STREAMS), None, HERE, Access::Unknown, Iova(0), (0x02, FaultReason::NotAttached)),
        ] {
            let refused = match access {
                Access::Write => machine.unit.dma_write(stream, pasid, iova, &[1]),
                _ => machine.read(stream, pasid, iova).map(|_| ()),
            };

            assert_eq!(refused, Err(Refusal::Fault(code as u8)), "{stage:?} {stream:?} {iova:?}");
            // Above the event's number, the code says which stage refused.
            let faults = faults(&mut machine).into_iter();
            let faults: Vec<_> =
                faults.map(|fault| FaultRecord { code: fault.code & 0xFF, ..fault }).collect();
            assert_eq!(faults, [FaultRecord { stream, pasid, access, iova: told, reason, code }]);
        }
        machine.assert_lawful();
    }
}

#[test]
fn the_upper_half_of_the_address_space_is_not_mapped() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let tree = machine.tree(Stage::One);
    machine.map(&tree, Iova(0x7000), 1, Perms::READ);
    machine.assign(DISK, NONE);
    machine.attach(DISK, Stage::One, &tree);

    assert_eq!(machine.read(DISK, None, Iova(0xFFFF_0000_0000_7000)), Err(F_TRANSLATION));
    machine.assert_lawful();
}

#[test]
fn a_device_without_a_device_tlb_is_given_no_translations() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let tree = machine.tree(Stage::One);
    machine.map(&tree, HERE, 1, Perms::READ);
    machine.assign(DISK, NONE);
    machine.attach(DISK, Stage::One, &tree);

    assert_eq!(machine.ats_read(DISK, HERE), Err(Refusal::Unsupported));
    assert_eq!(machine.unit.device_tlb(DISK), []);
    let [fault] = faults(&mut machine)[..] else { panic!("one fault") };
    assert_eq!((fault.code, fault.reason, fault.iova), (0x05, FaultReason::NotAttached, HERE));
    machine.assert_lawful();
}

#[test]
fn what_the_unit_remembers_of_a_device_lasts_until_the_invalidation_and_no_longer() {
    for stage in STAGES {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::qemu());
        let tree = machine.tree(stage);
        machine.map(&tree, HERE, 1, Perms::READ);
        machine.map(&tree, page(1), 2, Perms::READ);
        // Before it is assigned: the unit remembers that the entry was not valid, or that there was none.
        assert_eq!(machine.read(DISK, None, HERE), Err(STREAM_TABLE.untouched()));
        machine.assign(DISK, NONE);
        assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STE));

        let attached = machine.smmu.tables.attach(DISK, None, translation(stage, &tree));
        let (attachment, invalidations) = attached.expect("it can be attached");
        assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STE), "the model remembers, as hardware may");
        machine.invalidate(&invalidations);
        assert_eq!(machine.read(DISK, None, HERE), Ok(1));

        let (leaving, invalidations) = machine.smmu.tables.detach(attachment).expect("it is attached");
        // The entry is remembered, not the translation alone: a page that it never reached.
        assert_eq!((machine.read(DISK, None, HERE), machine.read(DISK, None, page(1))), (Ok(1), Ok(2)));
        machine.unit.pause();
        let ticket = machine.smmu.commands.submit(&invalidations).expect("there is room");
        assert_eq!(machine.read(DISK, None, HERE), Ok(1));
        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Pending);
        machine.unit.resume();
        machine.wait(ticket);
        assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STE));
        machine.smmu.tables.finish(leaving);
        machine.assert_lawful();
    }
}

#[test]
fn a_page_that_was_unmapped_is_reached_until_its_invalidation_completes_and_not_after() {
    for (config, stages) in units() {
        for &stage in stages {
            for features in [NONE, ALL] {
                let mut machine = HARDWARE.smmu(STREAM_TABLE, config);
                let tree = machine.tree(stage);
                machine.map(&tree, HERE, 1, Perms::READ);
                machine.map(&tree, page(1), 2, Perms::READ);
                machine.assign(DISK, features);
                let attachment = machine.attach(DISK, stage, &tree);
                let read = |machine: &Machine, at| {
                    if features.device_tlb {
                        machine.ats_read(DISK, at)
                    } else {
                        machine.read(DISK, None, at)
                    }
                };
                assert_eq!((read(&machine, HERE), read(&machine, page(1))), (Ok(1), Ok(2)));

                machine.unmap(&tree, HERE, 1);
                assert_eq!(read(&machine, HERE), Ok(1), "the model remembers, as hardware may");
                machine.invalidate(&[Invalidation::Pages { attachment, iova: HERE, pages: 1 }]);

                assert!(read(&machine, HERE).is_err(), "{stage:?} {features:?}");
                assert_eq!(machine.read(DISK, None, HERE), Err(F_TRANSLATION));
                assert_eq!(read(&machine, page(1)), Ok(2), "its neighbour stays");
                assert!(machine.unit.device_tlb(DISK).iter().all(|entry| entry.iova != HERE));
                machine.assert_lawful();
            }
        }
    }
}

#[test]
fn all_pages_of_a_range_are_forgotten_by_unit_and_device_wherever_it_begins() {
    for (config, stages) in units() {
        for &stage in stages {
            let mut machine = HARDWARE.smmu(STREAM_TABLE, config);
            let tree = machine.tree(stage);
            machine.assign(DISK, ALL);
            let attachment = machine.attach(DISK, stage, &tree);
            let memory = machine.memory.take(512 * 80, 512);
            let pages = grant(memory.phys().0, 80);
            tree.map(&mut machine.frames, HERE.0, &pages, Perms::READ).expect("nothing is mapped there");
            let mut next = 0;
            for count in [1, 2, 3, 7, 8, 9, 33] {
                let range = next..next + count;
                for n in range.clone().chain([79]) {
                    assert!(
                        machine.ats_read(DISK, page(n)).is_ok() && machine.read(DISK, None, page(n)).is_ok()
                    );
                }
                machine.unmap(&tree, page(next), count);

                machine.invalidate(&[Invalidation::covering(attachment, page(next), count * PAGE_SIZE)]);

                for n in range {
                    assert_eq!(machine.read(DISK, None, page(n)), Err(F_TRANSLATION), "page {n} of {count}");
                    assert_eq!(
                        machine.ats_read(DISK, page(n)),
                        Err(Refusal::NoAccess),
                        "page {n} of {count}"
                    );
                }
                assert!(machine.read(DISK, None, page(79)).is_ok(), "another page stays mapped");
                next += count;
                machine.pass();
            }
            machine.assert_lawful();
        }
    }
}

#[test]
fn a_detached_device_is_over_when_its_invalidations_complete_in_unit_and_device() {
    for (config, stages) in units() {
        for &stage in stages {
            let mut machine = HARDWARE.smmu(STREAM_TABLE, config);
            let [tree, other] = [1, 2].map(|content| {
                let tree = machine.tree(stage);
                machine.map(&tree, HERE, content, Perms::READ_WRITE);
                tree
            });
            machine.assign(DISK, ALL);
            // Again and again, under the same numbers: nothing of the tables before is left.
            for (tree, content) in [(&tree, 1), (&other, 2), (&tree, 1)] {
                let attachment = machine.attach(DISK, stage, tree);
                assert_eq!(
                    (machine.read(DISK, None, HERE), machine.ats_read(DISK, HERE)),
                    (Ok(content), Ok(content))
                );

                machine.detach(attachment);

                assert_eq!(machine.unit.device_tlb(DISK), []);
                assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STE));
                assert!(machine.ats_read(DISK, HERE).is_err());
                assert_eq!(machine.stream_word(DISK, 0) & 1, 0, "V");
            }
            machine.assert_lawful();
        }
    }
}

#[test]
fn a_device_can_change_its_stage() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    machine.assign(DISK, ALL);
    for (content, stage) in [Stage::One, Stage::Two, Stage::Two, Stage::One].into_iter().enumerate() {
        let tree = machine.tree(stage);
        machine.map(&tree, HERE, content as u64, Perms::READ);
        let attachment = machine.attach(DISK, stage, &tree);
        assert_eq!(machine.read(DISK, None, HERE), Ok(content as u64));
        machine.detach(attachment);
        let frames = machine.frames.in_use();
        tree.take_down(&mut machine.frames);
        assert!(machine.frames.in_use() < frames);
    }
    machine.assert_lawful();
}

#[test]
fn devices_are_translated_each_by_its_own_tables() {
    for stage in STAGES {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
        // The first and the last of the table, and two neighbours.
        let streams = [0, 0x20, 0x21, STREAMS - 1].map(StreamId);
        let attachments: Vec<_> = streams
            .iter()
            .map(|&stream| {
                let tree = machine.tree(stage);
                machine.map(&tree, HERE, stream.0.into(), Perms::READ);
                machine.assign(stream, ALL);
                machine.attach(stream, stage, &tree)
            })
            .collect();
        let all = |machine: &Machine, but: Option<StreamId>| {
            for stream in streams.into_iter().filter(|&stream| Some(stream) != but) {
                assert_eq!(machine.read(stream, None, HERE), Ok(stream.0.into()));
                assert_eq!(machine.ats_read(stream, HERE), Ok(stream.0.into()));
            }
        };
        all(&machine, None);

        machine.detach(attachments[1]);

        assert_eq!(machine.read(streams[1], None, HERE), Err(C_BAD_STE));
        all(&machine, Some(streams[1]));
        machine.assert_lawful();
    }
}

#[test]
fn a_departure_blocks_lets_go_and_gives_the_place_to_someone_else() {
    for stage in STAGES {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
        let tree = machine.tree(stage);
        machine.map(&tree, HERE, 1, Perms::READ);
        machine.assign(DISK, ALL);
        let attachment = machine.attach(DISK, stage, &tree);
        assert_eq!((machine.read(DISK, None, HERE), machine.ats_read(DISK, HERE)), (Ok(1), Ok(1)));

        // The whole device first, then what it had.
        let (device, blocked) = machine.smmu.tables.block(DISK).expect("it is assigned");
        machine.invalidate(&blocked);
        // What the device keeps was made by an entry that let it; the device was told to forget it.
        assert_eq!(machine.unit.device_tlb(DISK), []);
        assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STE));
        let refused = machine.smmu.tables.attach(DISK, None, translation(stage, &tree)).err();
        assert_eq!(refused, Some(Error::StreamBusy { stream: DISK }));
        assert_eq!(machine.smmu.tables.block(DISK).err(), Some(Error::StreamBusy { stream: DISK }));
        machine.detach(attachment);
        assert_eq!(machine.smmu.tables.assign(DISK, ALL).err(), Some(Error::StreamBusy { stream: DISK }));
        machine.smmu.tables.finish(device);

        assert_eq!(machine.smmu.tables.block(DISK).err(), Some(Error::UnknownStream { stream: DISK }));
        assert!((0..8).all(|word| machine.stream_word(DISK, word) == 0));
        // The next has its number, and sees nothing of what was.
        let other = machine.tree(stage);
        machine.map(&other, page(1), 2, Perms::READ);
        machine.assign(NIC, ALL);
        let next = machine.attach(NIC, stage, &other);
        assert_eq!(next.domain, attachment.domain);
        assert_eq!(machine.read(NIC, None, HERE), Err(F_TRANSLATION));
        assert_eq!(machine.read(NIC, None, page(1)), Ok(2));
        // And the device itself can come back.
        machine.assign(DISK, NONE);
        assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STE));
        machine.assert_lawful();
    }
}

#[test]
fn a_device_whose_attachment_never_left_keeps_its_place() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let tree = machine.tree(Stage::One);
    machine.assign(DISK, ALL);
    let attachment = machine.attach(DISK, Stage::One, &tree);

    machine.block(DISK);
    assert_eq!(machine.smmu.tables.assign(DISK, ALL).err(), Some(Error::StreamBusy { stream: DISK }));

    // A detachment that nobody waited for does not help either.
    let (leaving, _) = machine.smmu.tables.detach(attachment).expect("it is attached");
    assert_eq!(machine.smmu.tables.assign(DISK, ALL).err(), Some(Error::StreamBusy { stream: DISK }));
    let refused = machine.smmu.tables.detach(attachment).err();
    assert_eq!(refused, Some(Error::PasidState { stream: DISK, pasid: None }));
    drop(leaving);
    machine.assert_lawful();
}

#[test]
fn a_device_is_not_attached_again_before_hardware_has_let_go_of_it() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let tree = machine.tree(Stage::One);
    machine.assign(DISK, NONE);
    let busy = Error::PasidState { stream: DISK, pasid: None };
    let again = translation(Stage::One, &tree);
    let attachment = machine.attach(DISK, Stage::One, &tree);
    assert_eq!(machine.smmu.tables.attach(DISK, None, again).err(), Some(busy));

    let (leaving, invalidations) = machine.smmu.tables.detach(attachment).expect("it is attached");
    assert_eq!(machine.smmu.tables.attach(DISK, None, again).err(), Some(busy));
    assert_eq!(machine.smmu.tables.detach(attachment).err(), Some(busy));
    machine.invalidate(&invalidations);
    assert_eq!(machine.smmu.tables.attach(DISK, None, again).err(), Some(busy), "until it is told");
    machine.smmu.tables.finish(leaving);

    assert_eq!(machine.smmu.tables.detach(attachment).err(), Some(busy), "it is gone");
    machine.attach(DISK, Stage::One, &tree);
    machine.assert_lawful();
}

#[test]
fn an_attachment_that_was_detached_does_not_name_the_one_that_came_after_it() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let tree = machine.tree(Stage::One);
    machine.map(&tree, HERE, 1, Perms::READ_WRITE);
    machine.assign(DISK, NONE);
    let first = machine.attach(DISK, Stage::One, &tree);
    machine.detach(first);
    let refused = Some(Error::PasidState { stream: DISK, pasid: None });

    // It has the domain of the first, and so has one of the same device that is assigned anew.
    let second = machine.attach(DISK, Stage::One, &tree);
    assert_eq!(second.domain, first.domain);
    assert_eq!(machine.smmu.tables.detach(first).err(), refused);
    machine.detach(second);
    machine.block(DISK);
    machine.assign(DISK, NONE);
    let third = machine.attach(DISK, Stage::One, &tree);

    assert_eq!(machine.smmu.tables.detach(first).err(), refused);
    assert_eq!(machine.smmu.tables.detach(second).err(), refused);
    assert_eq!(machine.read(DISK, None, HERE), Ok(1));
    machine.detach(third);
    machine.assert_lawful();
}

#[test]
fn what_the_tables_do_not_hold_is_refused_by_name() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let tree = machine.tree(Stage::One);
    let unknown = |stream| Some(Error::UnknownStream { stream });
    let past = StreamId(STREAMS);
    assert_eq!(machine.smmu.tables.assign(past, NONE).err(), unknown(past));
    assert_eq!(machine.smmu.tables.assign(StreamId(u32::MAX), NONE).err(), unknown(StreamId(u32::MAX)));
    assert_eq!(machine.smmu.tables.attach(DISK, None, translation(Stage::One, &tree)).err(), unknown(DISK));
    assert_eq!(machine.smmu.tables.block(DISK).err(), unknown(DISK));

    machine.assign(DISK, NONE);
    assert_eq!(machine.smmu.tables.assign(DISK, NONE).err(), Some(Error::StreamBusy { stream: DISK }));
    let pasid = Pasid::new(5);
    assert_eq!(
        machine.smmu.tables.attach(DISK, pasid, translation(Stage::One, &tree)).err(),
        Some(Error::PasidState { stream: DISK, pasid })
    );
    let attachment = machine.attach(DISK, Stage::One, &tree);
    let foreign = iommu::Attachment { stages: iommu::Stages::Second, ..attachment };
    assert_eq!(
        machine.smmu.tables.detach(foreign).err(),
        Some(Error::PasidState { stream: DISK, pasid: None })
    );
    machine.assert_lawful();
}

#[test]
fn what_the_unit_lacks_is_refused_by_the_name_of_its_bit() {
    let full = Config::full();
    let assign = |config, features: Features, name: &str| {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, config);
        let error = machine.smmu.tables.assign(DISK, features).err();
        assert!(matches!(error, Some(Error::Unsupported { feature }) if feature.contains(name)), "{error:?}");
        machine.assert_lawful();
    };
    assign(Config::qemu(), Features { device_tlb: true, ..NONE }, "IDR0.ATS");
    assign(Config { idr0: full.idr0 & !(1 << 16), ..full }, ALL, "IDR0.PRI");
    assign(full, Features { page_requests: true, ..NONE }, "ATS");
    assign(Config::qemu(), Features { pasid: true, ..NONE }, "PASID");

    let attach = |config, translation: Translation, name: &str| {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, config);
        machine.assign(DISK, NONE);
        let error = machine.smmu.tables.attach(DISK, None, translation).err();
        assert!(matches!(error, Some(Error::Unsupported { feature }) if feature.contains(name)), "{error:?}");
        assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STE));
        machine.assert_lawful();
    };
    let [one, two] = [Translation::Stage1, Translation::Stage2];
    attach(Config { idr0: full.idr0 & !2, ..full }, one(root(0x1000, 4)), "IDR0.S1P");
    attach(Config { idr0: full.idr0 & !1, ..full }, two(root(0x1000, 4)), "IDR0.S2P");
    // 42 bits.
    attach(Config { idr5: full.idr5 & !7 | 3, ..full }, two(root(0x1000, 4)), "IDR5.OAS");
    attach(full, one(root(0x1000, 5)), "levels");
    attach(full, two(root(0x1000, 3)), "in one change");
    attach(full, two(root(0x1000, 5)), "levels");
}

#[test]
fn every_place_can_be_taken_and_one_more_is_refused() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let places = smmuv3::tables::DEVICES as u32;
    let mut domains = Vec::new();
    for n in 0..places {
        let tree = machine.tree(Stage::One);
        machine.map(&tree, HERE, n.into(), Perms::READ);
        machine.assign(StreamId(n), NONE);
        domains.push(machine.attach(StreamId(n), Stage::One, &tree).domain.0);
    }
    domains.sort_unstable();
    domains.dedup();
    assert_eq!(domains.len(), places as usize, "no two share a number");

    let refused = machine.smmu.tables.assign(StreamId(places), NONE).err();

    assert!(matches!(refused, Some(Error::Exhausted { what }) if what.contains("devices")), "{refused:?}");
    for n in 0..places {
        assert_eq!(machine.read(StreamId(n), None, HERE), Ok(n.into()));
    }
    machine.assert_lawful();
}

#[test]
fn a_detachment_that_never_completes_keeps_what_it_names_blocked() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let tree = machine.tree(Stage::Two);
    machine.map(&tree, HERE, 1, Perms::READ);
    machine.assign(DISK, ALL);
    let attachment = machine.attach(DISK, Stage::Two, &tree);
    assert_eq!(machine.ats_read(DISK, HERE), Ok(1));
    machine.unit.hold_device_tlb(DISK);

    let (leaving, invalidations) = machine.smmu.tables.detach(attachment).expect("it is attached");
    let ticket = machine.smmu.commands.submit(&invalidations).expect("there is room");
    // CMD_ATC_INV times out after 50 ms.
    for _ in 0..100 {
        machine.unit.advance(1_000);
        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Pending);
    }

    let again = machine.smmu.tables.attach(DISK, None, translation(Stage::Two, &tree)).err();
    assert_eq!(again, Some(Error::PasidState { stream: DISK, pasid: None }));
    assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STE));
    let events = machine.pass();
    assert!(events.iter().any(|event| matches!(event, Event::CommandsFailed { .. })), "{events:?}");
    drop(leaving);
}

/// What the unit could have read of an entry: its first word, and the root of its second stage.
type Seen = Arc<Mutex<Vec<[u64; 2]>>>;

#[test]
fn every_mixture_of_old_and_new_words_of_an_entry_is_harmless() {
    let (unit, memory) = HARDWARE.smmu_unit(Config::full());
    let parts = HARDWARE.needs(STREAM_TABLE, &memory);
    let empty = parts.empty_table.phys().0;
    let seen = Seen::default();
    let (kept, of) = (Arc::clone(&seen), memory.clone());
    let bus = Tapped::new(unit, move |unit, moment| {
        // Before STRTAB_BASE says where the table is, there is none.
        if moment == Moment::Published && unit.read64(0x080) != 0 {
            let words = [0, 3].map(|word| stream_word(unit, &of, DISK, word));
            kept.lock().expect("no test panics here").push(words);
        }
    });
    let mut machine = HARDWARE.enable_smmu(unit, memory, bus, parts).expect("it comes into service");
    // Between two completed invalidations the unit may have any word of any moment.
    let check = |root: Option<u64>| {
        let mut seen = seen.lock().expect("no test panics here");
        for [first, _] in &*seen {
            for [_, third] in &*seen {
                // V and Config: 0b110 is stage 2.
                let second_stage = first & 0b1111 == 0b1101;
                assert!(!second_stage || *third == empty || Some(*third) == root, "{first:#x} {third:#x}");
                assert!(first & 1 == 0 || root.is_some(), "valid without tables: {first:#x}");
            }
        }
        // What it has from here on is what is there now.
        let last = seen.pop();
        seen.clear();
        seen.extend(last);
    };
    machine.assign(DISK, ALL);
    seen.lock().expect("no test panics here").drain(..).for_each(|[first, _]| assert_eq!(first, 0));
    for stage in [Stage::Two, Stage::Two, Stage::One, Stage::Two, Stage::One] {
        let tree = machine.tree(stage);
        let root = (stage == Stage::Two).then_some(tree.root().0);
        let attachment = machine.attach(DISK, stage, &tree);
        check(root.or(Some(empty)));
        machine.detach(attachment);
        check(root.or(Some(empty)));
        assert_eq!([0, 3].map(|word| machine.stream_word(DISK, word)), [0, empty]);
    }
    let tree = machine.tree(Stage::Two);
    machine.attach(DISK, Stage::Two, &tree);
    check(Some(tree.root().0));
    machine.block(DISK);
    check(Some(tree.root().0));
    machine.assert_lawful();
}

/// What a device got, when it looked once, at the publication that was chosen.
type Look = Arc<Mutex<(usize, Option<Result<Vec<u8>, Refusal>>)>>;

#[test]
fn a_device_meets_the_old_state_or_the_new_at_every_moment_and_nothing_in_between() {
    for stage in STAGES {
        let mut met = Vec::new();
        // What the unit has read it remembers, so each moment is looked at on a unit of its own.
        for moment in 1.. {
            let (unit, memory) = HARDWARE.smmu_unit(Config::full());
            let parts = HARDWARE.needs(STREAM_TABLE, &memory);
            let look = Look::default();
            let chosen = Arc::clone(&look);
            let bus = Tapped::new(unit, move |unit, kind| {
                let mut look = chosen.lock().expect("no test panics here");
                if kind == Moment::Published && look.0 > 0 {
                    look.0 -= 1;
                    if look.0 == 0 {
                        look.1 = Some(unit.dma_read(DISK, None, HERE, 1));
                    }
                }
            });
            let mut machine = HARDWARE.enable_smmu(unit, memory, bus, parts).expect("it comes into service");
            let tree = machine.tree(stage);
            machine.map(&tree, HERE, 1, Perms::READ);
            machine.assign(DISK, NONE);
            look.lock().expect("no test panics here").0 = moment;

            let (attachment, invalidations) = machine
                .smmu
                .tables
                .attach(DISK, None, translation(stage, &tree))
                .expect("it can be attached");
            machine.invalidate(&invalidations);
            let (leaving, invalidations) = machine.smmu.tables.detach(attachment).expect("it is attached");
            machine.invalidate(&invalidations);
            machine.smmu.tables.finish(leaving);

            machine.assert_lawful();
            let Some(seen) = look.lock().expect("no test panics here").1.take() else { break };
            assert!(seen == Ok(vec![1]) || seen == Err(C_BAD_STE), "{stage:?}, moment {moment}: {seen:?}");
            met.push(seen.is_ok());
        }
        assert!(met.contains(&true) && met.contains(&false), "{met:?}");
    }
}
