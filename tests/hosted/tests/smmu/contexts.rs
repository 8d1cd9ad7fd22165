//! Context descriptors of the SMMUv3 driver against the modelled unit: PASIDs, bypass beside them, stalls; and devices that
//! bypass translation or are silenced.

use crate::{HARDWARE, STREAM_TABLE};
use hosted::{
    smmu::{CONTEXT_TABLES, Machine, Stage, StageTree, translation},
    trust,
};
use iommu::{
    Bus, Commands, Error, Event, Features, Invalidation, Iova, PAGE_SIZE, Pasid, Perms, StreamId, Tables,
    Translation,
};
use models::smmuv3::{Config, Refusal};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
const PLAIN: Features = Features { device_tlb: false, page_requests: false, pasid: false };
const PASIDS: Features = Features { pasid: true, ..PLAIN };
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };
const HERE: Iova = Iova(0x4000_0000);

const C_BAD_STE: Refusal = Refusal::Fault(0x04);
const C_BAD_SUBSTREAMID: Refusal = Refusal::Fault(0x08);
const C_BAD_CD: Refusal = Refusal::Fault(0x0A);
const F_TRANSLATION: Refusal = Refusal::Fault(0x10);

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

/// Stage-1 tables in which `content` is at [`HERE`].
fn tree(machine: &mut Machine, content: u64) -> StageTree {
    let tree = machine.tree(Stage::One);
    machine.map(&tree, HERE, content, Perms::READ_WRITE);
    tree
}

fn one(tree: &StageTree) -> Translation {
    translation(Stage::One, tree)
}

/// Units that differ in what tables of context descriptors look like: of two levels; linear, as there are few PASIDs or as
/// the unit has no others; without a second stage, so that there are no VMIDs.
fn units() -> [(Config, u32); 5] {
    let full = Config::full();
    // IDR1.SSIDSIZE is [10:6].
    let substreams = |bits: u32| full.idr1 & !(0x1F << 6) | bits << 6;
    [
        (full, 0x7FFF),
        (Config { idr1: substreams(5), ..full }, 0x1F),
        (Config { idr1: substreams(8), ..full }, 0xFF),
        (Config { idr0: full.idr0 & !(1 << 19), ..full }, 0x3F),
        (Config { idr0: full.idr0 & !1, ..full }, 0x7FFF),
    ]
}

#[test]
fn a_pasid_is_translated_by_its_own_tables_and_nothing_else() {
    for (config, last) in units() {
        for features in [PASIDS, ALL] {
            let mut machine = HARDWARE.smmu(STREAM_TABLE, config);
            machine.assign(DISK, features);
            machine.assign(NIC, features);
            // None, and PASIDs that share a second-level table, and the last.
            let mut attached = Vec::new();
            for (n, pasid) in [pasid(1), None, pasid(2), pasid(last)].into_iter().enumerate() {
                for stream in [DISK, NIC] {
                    let content = u64::from(stream.0) << 8 | n as u64;
                    let tree = tree(&mut machine, content);
                    let attachment = machine.attach_to(stream, pasid, one(&tree)).expect("there is room");
                    attached.push((attachment, content));
                }
            }
            let mut domains: Vec<_> = attached.iter().map(|(attachment, _)| attachment.domain.0).collect();
            domains.sort_unstable();
            domains.dedup();
            assert_eq!(domains.len(), attached.len(), "no two share a number");
            let all = |machine: &Machine, gone: usize| {
                for (n, &(attachment, content)) in attached.iter().enumerate() {
                    let read = machine.read(attachment.stream, attachment.pasid, HERE);
                    if n >= gone {
                        assert_eq!(read, Ok(content), "{attachment:?}");
                        if features.device_tlb {
                            let read = machine.unit.ats_read(attachment.stream, attachment.pasid, HERE, 1);
                            assert_eq!(read, Ok(vec![content as u8]), "{attachment:?}");
                        }
                    } else {
                        assert_eq!(read, Err(C_BAD_CD), "{attachment:?}");
                        let device_tlb = machine.unit.device_tlb(attachment.stream);
                        assert!(device_tlb.iter().all(|entry| entry.pasid != attachment.pasid));
                    }
                }
                // PASIDs that nobody attached: PASID 0 among them, whatever accesses without one have.
                assert!(machine.read(DISK, pasid(0), HERE).is_err());
                assert_eq!(machine.read(DISK, pasid(3), HERE), Err(C_BAD_CD));
                assert_eq!(machine.read(DISK, pasid(last + 1), HERE), Err(C_BAD_SUBSTREAMID));
            };
            all(&machine, 0);

            for (n, &(attachment, _)) in attached.iter().enumerate() {
                machine.detach(attachment);
                all(&machine, n + 1);
            }
            machine.assert_lawful();
        }
    }
}

#[test]
fn what_the_unit_remembers_of_a_pasid_lasts_until_the_invalidation_and_no_longer() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    machine.assign(DISK, PASIDS);
    let near = tree(&mut machine, 1);
    machine.attach_to(DISK, pasid(1), one(&near)).expect("there is room");
    // A descriptor that is not valid is remembered, and that there is no table of them.
    for (value, refused) in [(2, C_BAD_CD), (0x405, C_BAD_SUBSTREAMID)] {
        let tree = tree(&mut machine, value.into());
        assert_eq!(machine.read(DISK, pasid(value), HERE), Err(refused));
        let attached = machine.smmu.tables.attach(DISK, pasid(value), one(&tree));
        let (attachment, invalidations) = attached.expect("there is room");
        assert_eq!(machine.read(DISK, pasid(value), HERE), Err(refused), "the model remembers");
        machine.invalidate(&invalidations);
        assert_eq!(machine.read(DISK, pasid(value), HERE), Ok(value.into()));

        let (leaving, invalidations) = machine.smmu.tables.detach(attachment).expect("it is attached");
        assert_eq!(machine.read(DISK, pasid(value), HERE), Ok(value.into()), "the model remembers");
        let again = machine.smmu.tables.attach(DISK, pasid(value), one(&tree)).err();
        assert_eq!(again, Some(Error::PasidState { stream: DISK, pasid: pasid(value) }));
        machine.invalidate(&invalidations);
        assert_eq!(machine.read(DISK, pasid(value), HERE), Err(C_BAD_CD));
        machine.smmu.tables.finish(leaving);
        machine.attach_to(DISK, pasid(value), one(&tree)).expect("it is free again");
        assert_eq!(machine.read(DISK, pasid(value), HERE), Ok(value.into()));
    }
    machine.assert_lawful();
}

#[test]
fn pages_of_one_pasid_are_forgotten_by_unit_and_device() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    machine.assign(DISK, ALL);
    let trees = [tree(&mut machine, 1), tree(&mut machine, 2)];
    let attachments = [1, 2]
        .map(|n| machine.attach_to(DISK, pasid(n), one(&trees[n as usize - 1])).expect("there is room"));
    let read = |machine: &Machine, n| {
        let ats = machine.unit.ats_read(DISK, pasid(n), HERE, 1);
        (machine.read(DISK, pasid(n), HERE).is_ok(), ats.is_ok())
    };
    assert_eq!((read(&machine, 1), read(&machine, 2)), ((true, true), (true, true)));

    machine.unmap(&trees[0], HERE, 1);
    machine.invalidate(&[Invalidation::covering(attachments[0], HERE, PAGE_SIZE)]);

    assert_eq!((read(&machine, 1), read(&machine, 2)), ((false, false), (true, true)));
    machine.assert_lawful();
}

#[test]
fn accesses_without_pasid_bypass_beside_pasids_or_alone() {
    for features in [PLAIN, PASIDS] {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
        let page = machine.memory.take(512, 512).phys();
        machine.memory.device_store(page, 0x77).expect("inside");
        machine.assign(DISK, features);
        let tree = tree(&mut machine, 5);
        if features.pasid {
            machine.attach_to(DISK, pasid(5), one(&tree)).expect("there is room");
        }

        let attachment = machine.attach_to(DISK, None, Translation::Bypass(trust())).expect("it can");

        assert_eq!(machine.read(DISK, None, Iova(page.0)), Ok(0x77));
        let with = machine.read(DISK, pasid(5), HERE);
        assert_eq!(with, if features.pasid { Ok(5) } else { Err(C_BAD_SUBSTREAMID) });
        assert!(machine.read(DISK, pasid(0), Iova(page.0)).is_err());
        machine.detach(attachment);
        assert!(machine.read(DISK, None, Iova(page.0)).is_err());
        machine.assert_lawful();
    }
}

#[test]
fn frames_that_run_out_leave_everything_blocked_and_none_is_lost() {
    for frames in 0..=6 {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let mut parts = HARDWARE.needs(STREAM_TABLE, &memory);
        parts.context_tables.truncate(frames);
        let mut machine = HARDWARE.enable_smmu(unit, memory, unit, parts).expect("it comes into service");
        let content = tree(&mut machine, 9);
        for _ in 0..2 {
            // Each wants a second-level table more than the one before; the first wants the first level as well.
            let mut attached = Vec::new();
            machine.assign(DISK, PASIDS);
            for (n, pasid) in [None, pasid(64), pasid(128), pasid(129), pasid(192)].into_iter().enumerate() {
                let needed = [2, 3, 4, 4, 5][n];
                let got = machine.attach_to(DISK, pasid, one(&content));
                if frames < needed {
                    assert!(
                        matches!(got, Err(Error::Exhausted { what }) if what.contains("context")),
                        "{got:?}"
                    );
                    assert!(machine.read(DISK, pasid, HERE).is_err(), "{frames} frames, {pasid:?}");
                } else {
                    attached.push(got.expect("there is room"));
                    assert_eq!(machine.read(DISK, pasid, HERE), Ok(9));
                }
            }
            // A second device gets what is left, or nothing.
            machine.assign(NIC, PASIDS);
            let other = machine.attach_to(NIC, pasid(1), one(&content));
            assert_eq!(machine.read(NIC, pasid(1), HERE).is_ok(), other.is_ok());
            attached.extend(other);
            for attachment in attached {
                machine.detach(attachment);
            }
            machine.block(DISK);
            machine.block(NIC);
            assert_eq!(machine.smmu.tables.free_context_tables(), frames);
            machine.pass();
        }
        machine.assert_lawful();
    }
}

#[test]
fn a_replacement_for_which_frames_run_out_is_refused_and_nothing_has_changed() {
    for frames in 0..=2 {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let mut parts = HARDWARE.needs(STREAM_TABLE, &memory);
        parts.context_tables.truncate(frames);
        let mut machine = HARDWARE.enable_smmu(unit, memory, unit, parts).expect("it comes into service");
        machine.assign(DISK, PASIDS);
        let second = machine.tree(Stage::Two);
        machine.map(&second, HERE, 2, Perms::READ);
        let first = tree(&mut machine, 1);
        let behind = translation(Stage::Two, &second);
        let attachment = machine.attach_to(DISK, None, behind).expect("it takes no frames");

        // The first level, and a table of the second.
        let replaced = machine.replace(attachment, one(&first));

        let now = match replaced {
            Ok(now) => {
                assert_eq!((frames, machine.read(DISK, None, HERE)), (2, Ok(1)));
                now
            }
            Err(error) => {
                assert!(matches!(error, Error::Exhausted { what } if what.contains("context")), "{error:?}");
                assert_eq!(machine.read(DISK, None, HERE), Ok(2));
                attachment
            }
        };
        machine.detach(now);
        machine.block(DISK);
        assert_eq!(machine.smmu.tables.free_context_tables(), frames);
        machine.assert_lawful();
    }
}

#[test]
fn a_device_that_comes_and_goes_takes_and_gives_the_same() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    for turn in 0..50 {
        machine.assign(DISK, PASIDS);
        let trees = [tree(&mut machine, turn), tree(&mut machine, turn + 100)];
        let first = machine.attach_to(DISK, None, one(&trees[0])).expect("there is room");
        let second = machine.attach_to(DISK, pasid(70), one(&trees[1])).expect("there is room");
        assert_eq!(machine.read(DISK, None, HERE), Ok(turn));
        assert_eq!(machine.read(DISK, pasid(70), HERE), Ok(turn + 100));

        // All of the device first, in every other turn.
        if turn % 2 == 0 {
            let (leaving, invalidations) = machine.smmu.tables.block(DISK).expect("it is assigned");
            machine.invalidate(&invalidations);
            assert_eq!(machine.read(DISK, pasid(70), HERE), Err(C_BAD_STE));
            machine.detach(second);
            machine.detach(first);
            machine.smmu.tables.finish(leaving);
        } else {
            machine.detach(first);
            machine.detach(second);
            machine.block(DISK);
        }

        assert_eq!(machine.smmu.tables.free_context_tables(), CONTEXT_TABLES);
        for tree in trees {
            tree.take_down(&mut machine.frames);
        }
    }
    machine.assert_lawful();
}

#[test]
fn a_device_whose_pasids_did_not_leave_keeps_its_place_and_frames() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    machine.assign(DISK, PASIDS);
    let tree = tree(&mut machine, 1);
    let attachment = machine.attach_to(DISK, pasid(1), one(&tree)).expect("there is room");

    machine.block(DISK);

    let busy = Some(Error::StreamBusy { stream: DISK });
    assert_eq!(machine.smmu.tables.assign(DISK, PASIDS).err(), busy);
    assert_eq!(machine.smmu.tables.free_context_tables(), CONTEXT_TABLES - 2);
    let (leaving, _) = machine.smmu.tables.detach(attachment).expect("it is attached");
    assert_eq!(machine.smmu.tables.assign(DISK, PASIDS).err(), busy);
    drop(leaving);
    machine.assert_lawful();
}

#[test]
fn what_a_pasid_cannot_have_is_refused_by_name() {
    let full = Config::full();
    let mut machine = HARDWARE.smmu(STREAM_TABLE, full);
    let first = tree(&mut machine, 1);
    let second = machine.tree(Stage::Two);
    machine.assign(DISK, PASIDS);
    machine.assign(NIC, PLAIN);
    let mut refused = |stream, pasid, translation, name: &str| {
        let error = machine.smmu.tables.attach(stream, pasid, translation).expect_err("it is refused");
        assert!(format!("{error:?}").contains(name), "{error:?} is not {name}");
    };

    refused(DISK, pasid(0), one(&first), "PASID 0");
    refused(DISK, pasid(0x8000), one(&first), "limit: 32768");
    refused(DISK, pasid(1), translation(Stage::Two, &second), "this translation of a PASID");
    refused(DISK, pasid(1), Translation::Bypass(trust()), "this translation of a PASID");
    refused(NIC, pasid(1), one(&first), "PasidState");
    let plain = machine.attach_to(DISK, None, translation(Stage::Two, &second)).expect("it can");
    let error = machine.attach_to(DISK, pasid(1), one(&first)).err();
    assert_eq!(error, Some(Error::Unsupported { feature: "PASIDs beside a second stage" }));
    machine.detach(plain);
    machine.attach_to(DISK, pasid(1), one(&first)).expect("there is room");
    let error = machine.attach_to(DISK, None, translation(Stage::Two, &second)).err();
    assert_eq!(error, Some(Error::Unsupported { feature: "a second stage beside PASIDs" }));
    machine.assert_lawful();

    // ASIDs of 8 bits: IDR0.ASID16 is bit 12. Three PASIDs have one below 256, whichever device they are of.
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config { idr0: full.idr0 & !(1 << 12), ..full });
    machine.assign(DISK, PASIDS);
    let tree = tree(&mut machine, 1);
    for n in 1..=3 {
        machine.attach_to(DISK, pasid(n), one(&tree)).expect("there is room");
        assert_eq!(machine.read(DISK, pasid(n), HERE), Ok(1));
    }
    let error = machine.attach_to(DISK, pasid(4), one(&tree)).err();
    assert_eq!(error, Some(Error::Exhausted { what: "ASIDs of 8 bits" }));
    machine.assert_lawful();
}

#[test]
fn every_place_for_a_pasid_can_be_taken_and_one_more_is_refused() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    machine.assign(DISK, PASIDS);
    let tree = tree(&mut machine, 1);
    let places = smmuv3::tables::PASIDS as u32;
    for n in 1..=places {
        machine.attach_to(DISK, pasid(n), one(&tree)).expect("there is room");
    }

    let refused = machine.attach_to(DISK, pasid(places + 1), one(&tree)).err();

    assert_eq!(refused, Some(Error::Exhausted { what: "places for PASIDs" }));
    assert!((1..=places).all(|n| machine.read(DISK, pasid(n), HERE) == Ok(1)));
    assert_eq!(machine.read(DISK, pasid(places + 1), HERE), Err(C_BAD_CD));
    machine.assert_lawful();
}

#[test]
fn accesses_wait_of_devices_that_were_named_and_of_no_others() {
    // CD.S is bit 44, STE.S1STALLD bit 91, STE.S2S bit 185.
    const FIRST_STALL: u64 = 1 << 44;
    const NEVER: u64 = 1 << (91 - 64);
    const SECOND_STALL: u64 = 1 << (185 - 128);
    for features in [PLAIN, PASIDS] {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let mut parts = HARDWARE.needs(STREAM_TABLE, &memory);
        parts.stalling.push(DISK).expect("there is room");
        let mut machine = HARDWARE.enable_smmu(unit, memory, unit, parts).expect("it comes into service");
        let tree = tree(&mut machine, 1);
        for (stream, stalls) in [(DISK, true), (NIC, false)] {
            machine.assign(stream, features);
            assert_eq!(machine.stream_word(stream, 1) & NEVER == 0, stalls);
            assert_eq!(machine.stream_word(stream, 2) & SECOND_STALL != 0, stalls);
            machine.attach_to(stream, None, one(&tree)).expect("it can be attached");

            let refused = machine.read(stream, None, Iova(0));

            assert_eq!(matches!(refused, Err(Refusal::Stalled(_))), stalls, "{refused:?}");
            // S1ContextPtr, and of a table of two levels its first.
            let mut context = machine.stream_word(stream, 0) & 0x00FF_FFFF_FFFF_FFC0;
            if features.pasid {
                context = machine.memory.device_load(iommu::PhysAddr(context)).expect("inside") & !1;
            }
            let word = machine.memory.device_load(iommu::PhysAddr(context)).expect("inside");
            assert_eq!(word & FIRST_STALL != 0, stalls);
        }
        let ats = Features { device_tlb: true, ..PLAIN };
        machine.smmu.tables.block(DISK).map(drop).expect("it is assigned");
        machine.assert_lawful();
        // STE.EATS = 1 with S2S = 1 is illegal.
        let (unit, memory) = hosted::smmu::unit(Config::full());
        let mut parts = HARDWARE.needs(STREAM_TABLE, &memory);
        parts.stalling.push(DISK).expect("there is room");
        let mut machine = HARDWARE.enable_smmu(unit, memory, unit, parts).expect("it comes into service");
        let error = machine.smmu.tables.assign(DISK, ats).err();
        assert!(
            matches!(error, Some(Error::Unsupported { feature }) if feature.contains("ATS")),
            "{error:?}"
        );
    }
}

#[test]
fn a_unit_that_cannot_stall_has_no_bits_of_it() {
    // S1STALLD with STALL_MODEL 1 is illegal.
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::qemu());
    machine.assign(DISK, PLAIN);
    let tree = tree(&mut machine, 3);
    machine.attach(DISK, Stage::One, &tree);

    assert_eq!(machine.read(DISK, None, HERE), Ok(3));
    assert_eq!(machine.stream_word(DISK, 1) >> (91 - 64) & 1, 0);
    machine.assert_lawful();
}

#[test]
fn a_silenced_device_is_refused_without_a_record() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    machine.assign(DISK, ALL);
    let tree = tree(&mut machine, 1);
    let plain = machine.attach_to(DISK, None, one(&tree)).expect("it can be attached");
    let busy = Some(Error::StreamBusy { stream: DISK });
    assert_eq!(machine.smmu.tables.silence(DISK).err(), busy, "it is not blocked");
    let unknown = Some(Error::UnknownStream { stream: NIC });
    assert_eq!(machine.smmu.tables.silence(NIC).err(), unknown);
    let (leaving, invalidations) = machine.smmu.tables.block(DISK).expect("it is assigned");
    machine.invalidate(&invalidations);
    assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STE));
    assert_eq!(machine.pass().len(), 1, "it is recorded");

    let invalidations = machine.smmu.tables.silence(DISK).expect("it is blocked");
    machine.invalidate(&invalidations);

    for pasid in [None, pasid(5)] {
        assert_eq!(machine.read(DISK, pasid, HERE), Err(Refusal::Aborted));
    }
    assert!(machine.ats_read(DISK, HERE).is_err());
    assert_eq!(machine.pass(), []);
    // What it had leaves as ever, and the silence with it.
    machine.detach(plain);
    assert_eq!(machine.read(DISK, None, HERE), Err(Refusal::Aborted));
    machine.smmu.tables.finish(leaving);
    machine.assign(DISK, PLAIN);
    assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STE));
    assert!(matches!(machine.pass()[..], [Event::Fault(_)]));
    machine.assert_lawful();
}

#[test]
fn a_second_stage_takes_as_many_bits_as_an_address_has() {
    let full = Config::full();
    for (size, bits) in [(5, 48), (4, 44)] {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, Config { idr5: full.idr5 & !7 | size, ..full });
        assert_eq!(machine.smmu.tables.second_stage_bits(4), Some(bits));
        let tree = machine.tree(Stage::Two);
        machine.map(&tree, HERE, 1, Perms::READ);
        machine.assign(DISK, PLAIN);
        machine.attach(DISK, Stage::Two, &tree);

        assert_eq!(machine.read(DISK, None, HERE), Ok(1));
        // Past the tables of 44 bits, but not past what the entry says.
        let past = machine.read(DISK, None, Iova(1 << 44));
        assert_eq!(past, Err(if bits == 48 { F_TRANSLATION } else { Refusal::Fault(0x11) }));
        machine.assert_lawful();
    }
    for size in [0, 1, 2, 3] {
        let machine = HARDWARE.smmu(STREAM_TABLE, Config { idr5: full.idr5 & !7 | size, ..full });
        assert_eq!(machine.smmu.tables.second_stage_bits(4), None, "OAS {size}");
        assert!(machine.smmu.tables.second_stage_bits(3).is_some_and(|bits| bits >= 32));
        machine.assert_lawful();
    }
}

#[test]
fn forced_write_back_is_said_where_the_tables_are_made_for_it() {
    for wanted in [false, true] {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let mut parts = HARDWARE.needs(STREAM_TABLE, &memory);
        parts.forced_write_back = wanted;
        let mut machine = HARDWARE.enable_smmu(unit, memory, unit, parts).expect("it comes into service");
        machine.assign(DISK, PLAIN);
        // S2FWB is [89].
        assert_eq!(machine.stream_word(DISK, 1) >> (89 - 64) & 1 != 0, wanted);
    }
    let (unit, memory) = HARDWARE.smmu_unit(Config::qemu());
    let mut parts = HARDWARE.needs(STREAM_TABLE, &memory);
    parts.forced_write_back = true;
    let error = HARDWARE.enable_smmu(unit, memory, unit, parts).err();
    assert_eq!(error, Some(Error::Unsupported { feature: "IDR3.FWB" }));
    // GBPA and CR0 as after reset.
    assert_eq!((unit.read32(0x44), unit.read32(0x20)), (0x1000, 0));
}

#[test]
fn a_doorbell_that_is_mapped_for_one_domain_is_not_reached_by_another() {
    // A message is a write to a page that is mapped in the tables of each domain that owns a device, and in no other's. Here
    // the page is memory, so that the test can see who wrote.
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let doorbell = machine.memory.take(512, 512);
    let message = Iova(doorbell.phys().0 + 0x40);
    let [with, without] = [1, 2].map(|content| tree(&mut machine, content));
    let grant = hosted::grant(doorbell.phys().0, 1);
    with.map(&mut machine.frames, doorbell.phys().0, &grant, Perms::READ_WRITE).expect("nothing is there");
    machine.assign(DISK, PLAIN);
    machine.assign(NIC, PLAIN);
    machine.attach(DISK, Stage::One, &with);
    machine.attach(NIC, Stage::One, &without);

    assert_eq!(machine.unit.dma_write(DISK, None, message, &[7, 0, 0, 0]), Ok(()));
    assert_eq!(machine.unit.dma_write(NIC, None, message, &[9, 0, 0, 0]), Err(F_TRANSLATION));
    let written = machine.memory.device_load(iommu::PhysAddr(message.0)).expect("inside");
    assert_eq!(written as u32, 7);
    machine.assert_lawful();
}

#[test]
fn a_dropped_ticket_of_a_pasid_leaves_it_out_of_use() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    machine.assign(DISK, PASIDS);
    let tree = tree(&mut machine, 1);
    let attachment = machine.attach_to(DISK, pasid(1), one(&tree)).expect("there is room");
    let (leaving, invalidations) = machine.smmu.tables.detach(attachment).expect("it is attached");
    let ticket = machine.smmu.commands.submit(&invalidations).expect("there is room");
    machine.wait(ticket);
    drop(leaving);

    let again = machine.attach_to(DISK, pasid(1), one(&tree)).err();

    assert_eq!(again, Some(Error::PasidState { stream: DISK, pasid: pasid(1) }));
    let gone = machine.smmu.tables.detach(attachment).err();
    assert_eq!(gone, Some(Error::PasidState { stream: DISK, pasid: pasid(1) }));
    machine.assert_lawful();
}

#[test]
fn a_pasid_that_nobody_attached_is_told_as_such() {
    let mut machine = Machine::new(STREAM_TABLE, Config::full());
    machine.assign(DISK, PASIDS);
    let tree = tree(&mut machine, 1);
    let attachment = machine.attach_to(DISK, pasid(1), one(&tree)).expect("there is room");
    let reasons = |machine: &mut Machine| -> Vec<_> {
        let events = machine.pass().into_iter();
        events
            .map(|event| match event {
                iommu::Event::Fault(fault) => (fault.pasid, fault.reason, fault.code),
                other => panic!("{other:?}"),
            })
            .collect()
    };

    // One beside it in the same table, one in a table that there is not; then the one that was detached.
    assert_eq!(machine.read(DISK, pasid(3), HERE), Err(C_BAD_CD));
    assert_eq!(machine.read(DISK, pasid(0x405), HERE), Err(C_BAD_SUBSTREAMID));
    let not_attached = iommu::FaultReason::NotAttached;
    assert_eq!(reasons(&mut machine), [(pasid(3), not_attached, 0x0A), (pasid(0x405), not_attached, 0x08)]);
    machine.detach(attachment);

    assert_eq!(machine.read(DISK, pasid(1), HERE), Err(C_BAD_CD));
    assert_eq!(reasons(&mut machine), [(pasid(1), not_attached, 0x0A)]);
    machine.assert_lawful();
}
