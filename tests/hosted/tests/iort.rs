//! What the SMMUv3 driver makes of `IORT` tables: those of `hosted::iort`, whose words say where they come
//! from, and those with something wrong in them.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use hosted::iort::{EVERYTHING, OFFSETS, QEMU, bytes, table};
use iommu::{PhysAddr, StreamId};
use smmuv3::iort::{Error, Iort, MemoryKind, Model, Node, Region, RootComplex, Unit};

fn everything() -> Vec<u8> {
    table(6, 11, &EVERYTHING.concat())
}

fn qemu() -> Vec<u8> {
    table(3, 3, &QEMU.concat())
}

fn read(table: &[u8]) -> Iort<'_> {
    Iort::new(table).expect("it says IORT, and is whole")
}

fn units<'t>(iort: &Iort<'t>) -> Vec<Unit<'t>> {
    iort.units().map(|unit| unit.expect("it is whole")).collect()
}

/// The base of the unit and the stream of a function.
fn endpoint(table: &[u8], segment: u16, requester: u16) -> Result<Option<(u64, u32)>, Error> {
    let found = read(table).endpoint(segment, requester)?;
    Ok(found.map(|endpoint| (endpoint.place.unit.base.0, endpoint.place.stream.0)))
}

/// The first identifier of the services, and the DeviceID, that the messages of a function lead to.
fn interrupts(table: &[u8], segment: u16, requester: u16) -> Result<Option<(u32, u32)>, Error> {
    let found = read(table).interrupts(segment, requester)?;
    Ok(found.map(|found| (found.group.identifiers().next().expect("there is one"), found.device)))
}

fn regions(table: &[u8], base: u64, stream: u32) -> Result<Vec<Region>, Error> {
    let iort = read(table);
    let unit = units(&iort).into_iter().find(|unit| unit.base.0 == base).expect("it is in the table");
    iort.regions(&unit, StreamId(stream)).collect()
}

/// Bases of the two units of `EVERYTHING`.
const A: u64 = 0x2B40_0000;
const B: u64 = 0x1_4000_0000;

mod golden {
    use super::*;

    #[test]
    fn the_unit_that_qemu_describes_is_found_with_its_wires() {
        let table = qemu();
        let iort = read(&table);

        let [unit] = units(&iort)[..] else { panic!("one unit") };
        assert_eq!((unit.base, unit.bytes(), unit.model), (PhysAddr(0x0905_0000), 0x2_0000, Model::Generic));
        assert!(unit.coherent && unit.httu == 0 && unit.proximity.is_none());
        // Errors before sync, as the layout has them: QEMU's numbers are not in their order.
        assert_eq!((unit.event, unit.page_request, unit.global_error, unit.sync), (0x6A, 0x6B, 0x6D, 0x6C));
        assert_eq!(iort.interrupts_of(&unit), Ok(None), "it has wires");
        // Bus 0 goes through it; all others go past it, and their messages straight to the ITS.
        assert_eq!(endpoint(&table, 0, 0x0010), Ok(Some((0x0905_0000, 0x10))));
        assert_eq!(endpoint(&table, 0, 0x00FF), Ok(Some((0x0905_0000, 0xFF))));
        assert_eq!(endpoint(&table, 0, 0x0100), Ok(None));
        assert_eq!(interrupts(&table, 0, 0x0010), Ok(Some((0, 0x10))));
        assert_eq!(interrupts(&table, 0, 0xFFFF), Ok(Some((0, 0xFFFF))));
    }

    #[test]
    fn every_node_is_read_where_it_is() {
        let table = everything();
        let nodes: Vec<_> = read(&table).nodes().map(|node| node.expect("it is whole")).collect();

        let offsets: Vec<_> = nodes.iter().map(Node::offset).collect();
        assert_eq!(offsets, OFFSETS[..11]);
        assert!(matches!(nodes[8..10], [Node::Other { kind: 5, .. }, Node::Other { kind: 3, .. }]));
        let [Node::ItsGroup(first), Node::ItsGroup(second), ..] = nodes[..] else { panic!("{nodes:?}") };
        assert_eq!(first.identifiers().collect::<Vec<_>>(), [0]);
        assert_eq!(second.identifiers().collect::<Vec<_>>(), [1, 2]);
    }

    #[test]
    fn units_differ_in_their_revisions() {
        let table = everything();
        let iort = read(&table);
        let [new, old] = units(&iort)[..] else { panic!("two units") };

        assert_eq!((new.base.0, new.bytes(), new.model), (A, 0x2_0000, Model::Generic));
        assert_eq!((new.coherent, new.httu, new.proximity), (true, 2, Some(3)));
        assert_eq!((new.event, new.page_request, new.global_error, new.sync), (0, 0, 0, 0));
        // Its own messages: the mapping of the index.
        let own = iort.interrupts_of(&new).expect("it is sound").expect("it has no wires");
        assert_eq!((own.group.identifiers().next(), own.device), (Some(1), 0x8000_0007));
        // Revision 0 knows neither proximity nor index. CN99xx has page 0 alone.
        assert_eq!((old.base.0, old.bytes(), old.model), (B, 0x1_0000, Model::CaviumCn99xx));
        assert_eq!((old.coherent, old.httu, old.proximity), (false, 0, None));
        assert_eq!((old.event, old.page_request, old.global_error, old.sync), (0x40, 0x41, 0x42, 0x43));
        assert_eq!(iort.interrupts_of(&old), Ok(None));
    }

    #[test]
    fn root_complexes_differ_in_their_revisions() {
        let table = everything();
        let of = |segment, requester| {
            let found = read(&table).endpoint(segment, requester).expect("it is sound");
            found.expect("it is translated").root_complex
        };
        let told = |root: RootComplex<'_>| (root.segment, root.coherent, root.pasid_bits, root.address_bits);

        let new = of(1, 0);
        assert_eq!(told(new), (1, true, 20, Some(48)));
        assert!(new.ats && new.pri && new.pasid);
        let old = of(0, 0);
        assert_eq!(told(old), (0, false, 0, Some(40)));
        assert!(!old.ats && !old.pri && !old.pasid);
        let first = read(&table).nodes().flatten().filter_map(|node| match node {
            Node::RootComplex(root) => Some(root),
            _ => None,
        });
        // Revision 0 ends after the segment.
        let first = first.last().expect("it is the last node");
        assert_eq!(told(first), (2, true, 0, None));
        assert!(first.ats && !first.pri);
    }

    #[test]
    fn a_function_is_the_stream_of_the_unit_that_its_requester_id_leads_to() {
        let table = everything();
        for (segment, requester, expected) in [
            (1, 0x0000, Some((A, 0x100))),
            (1, 0x00FF, Some((A, 0x1FF))),
            (1, 0x0100, Some((B, 0))),
            (1, 0x01FF, Some((B, 0xFF))),
            // Straight to an ITS; and nowhere.
            (1, 0x0200, None),
            (1, 0x0300, None),
            // A single mapping is for all of them.
            (0, 0x0000, Some((B, 0x55))),
            (0, 0xFFFF, Some((B, 0x55))),
            // Behind an SMMUv2; and of a segment that nobody describes.
            (2, 0x0000, None),
            (3, 0x0000, None),
        ] {
            assert_eq!(endpoint(&table, segment, requester), Ok(expected), "{segment} {requester:#x}");
        }
    }

    #[test]
    fn messages_of_a_function_lead_through_its_unit_to_the_its() {
        let table = everything();
        for (segment, requester, expected) in [
            (1, 0x0010, Some((0, 0x110))),
            (1, 0x0110, Some((1, 0x2_0010))),
            (1, 0x0210, Some((0, 0x210))),
            (0, 0x0000, Some((1, 0x2_0055))),
            (1, 0x0300, None),
            (2, 0x0000, None),
        ] {
            assert_eq!(interrupts(&table, segment, requester), Ok(expected), "{segment} {requester:#x}");
        }
    }

    #[test]
    fn a_component_is_found_by_its_path_with_all_its_streams() {
        let table = everything();
        let iort = read(&table);

        let dma = iort.component("\\_SB.DMA0").expect("it is sound").expect("it is there");
        assert_eq!((dma.stalls, dma.pasid_bits, dma.coherent, dma.address_bits), (true, 8, true, Some(44)));
        let streams: Vec<_> = iort
            .component_streams(&dma)
            .map(|place| place.map(|place| (place.unit.base.0, place.stream.0)))
            .collect();
        assert_eq!(streams, [Ok((A, 0x300))], "the other single mapping is for its messages");
        for other in ["\\_SB.DMA", "\\_SB.DMA00", ""] {
            assert_eq!(iort.component(other), Ok(None));
        }
    }

    #[test]
    fn a_component_with_ids_of_its_own_has_a_stream_for_each() {
        // The same without the single mappings.
        let mut words = EVERYTHING.concat();
        let component = (OFFSETS[6] - 48) / 4;
        (words[component + 2], words[component + 3]) = (1, 80);
        let table = table(6, 11, &words);
        let iort = read(&table);
        let dma = iort.component("\\_SB.DMA0").expect("it is sound").expect("it is there");

        let stream = |id| {
            let place = iort.component_stream(&dma, id).expect("it is sound");
            place.map(|place| (place.unit.base.0, place.stream.0))
        };

        assert_eq!((stream(0), stream(3), stream(4)), (Some((B, 0x310)), Some((B, 0x313)), None));
        assert_eq!(iort.component_streams(&dma).count(), 0);
    }

    #[test]
    fn reserved_memory_is_told_to_the_streams_that_need_it_and_to_no_others() {
        let table = everything();
        let region = |start, bytes| Region {
            start: PhysAddr(start),
            bytes,
            remap_permitted: true,
            privileged: true,
            kind: MemoryKind::NormalWriteBack,
        };

        for stream in [0x104, 0x105] {
            let expected = [region(0x8000_0000, 0x2_0000), region(0x1_9000_0000, 0x1_0000)];
            assert_eq!(regions(&table, A, stream), Ok(expected.to_vec()), "{stream:#x}");
        }
        for (unit, stream) in [(A, 0x103), (A, 0x106), (A, 0), (B, 0x104)] {
            assert_eq!(regions(&table, unit, stream), Ok(vec![]), "{stream:#x}");
        }
    }
}

/// What others got wrong, by the notes on them: each is named for who did.
mod peers {
    use super::*;

    /// OpenVMM has the flags of RMR the other way round (fact sheet, section 12, row 12).
    #[test]
    fn unlike_openvmm_remap_is_the_first_flag_of_reserved_memory_and_privilege_the_second() {
        let at = (OFFSETS[7] - 48) / 4 + 4;
        for (flags, remap_permitted, privileged, kind) in [
            (0, false, false, MemoryKind::Device(0)),
            (1, true, false, MemoryKind::Device(0)),
            (2, false, true, MemoryKind::Device(0)),
            (3 << 2, false, false, MemoryKind::Device(3)),
            (4 << 2, false, false, MemoryKind::NormalNotCached),
            (6 << 2, false, false, MemoryKind::Other(6)),
            (0xFFFF_FFFF, true, true, MemoryKind::Other(0xFF)),
        ] {
            let mut words = EVERYTHING.concat();
            words[at] = flags;
            let found = regions(&table(6, 11, &words), A, 0x104).expect("it is sound")[0];

            assert_eq!(
                (found.remap_permitted, found.privileged),
                (remap_permitted, privileged),
                "{flags:#x}"
            );
            assert_eq!(found.kind, kind, "{flags:#x}");
        }
    }

    /// EDK2 of old and Xen read bit 1 alone (row 30).
    #[test]
    fn unlike_xen_the_override_of_httu_has_two_bits() {
        for (flags, httu) in [(0, 0), (1 << 1, 1), (2 << 1, 2), (3 << 1, 3), (!(3 << 1), 0)] {
            let mut words = EVERYTHING.concat();
            words[(OFFSETS[2] - 48) / 4 + 6] = flags;
            let table = table(6, 11, &words);

            assert_eq!(units(&read(&table))[0].httu, httu, "{flags:#x}");
        }
    }

    /// Section 10.1: 65536 requester IDs are 0xFFFF. Linux meets tables that have their number.
    #[test]
    fn the_number_of_ids_is_one_less_than_their_number_unless_that_meets_the_next_range() {
        let ranges = |first: [u32; 5], second: [u32; 5]| {
            let mut words = QEMU.concat();
            words.truncate(37);
            words.extend_from_slice(&first);
            words.extend_from_slice(&second);
            table(3, 3, &words)
        };
        // 0x100 for 0xFF: requester 0x100 is the first of the next range, and not the last of this one.
        let (short, next) = ([0, 0x100, 0, 0x48, 0], [0x100, 0xFF, 0x4000, 0x48, 0]);
        for table in [ranges(short, next), ranges(next, short)] {
            assert_eq!(endpoint(&table, 0, 0xFF), Ok(Some((0x0905_0000, 0xFF))));
            assert_eq!(endpoint(&table, 0, 0x100), Ok(Some((0x0905_0000, 0x4000))));
            assert_eq!(endpoint(&table, 0, 0x101), Ok(Some((0x0905_0000, 0x4001))));
        }
        // Nothing follows: it is one more.
        let table = ranges(short, [0x200, 0, 0, 0x48, 0]);
        assert_eq!(endpoint(&table, 0, 0x100), Ok(Some((0x0905_0000, 0x100))));
        assert_eq!(endpoint(&table, 0, 0x200), Ok(Some((0x0905_0000, 0))), "a range of one");
        assert_eq!(endpoint(&table, 0, 0x201), Ok(None));
    }

    /// The tables of Ampere's and Arm's own machines say that a single mapping has one ID and one more.
    #[test]
    fn a_single_mapping_has_one_id_whatever_it_says() {
        let mut words = EVERYTHING.concat();
        let single = (OFFSETS[2] - 48) / 4 + 22;
        assert_eq!(words[single + 4], 1);
        words[single + 1] = 0xFFFF_FFFF;
        let table = table(6, 11, &words);

        let iort = read(&table);
        let own = iort.interrupts_of(&units(&iort)[0]).expect("it is sound").expect("it has no wires");
        assert_eq!(own.device, 0x8000_0007);
        assert_eq!(interrupts(&table, 1, 0), Ok(Some((0, 0x100))), "it is none of its streams'");
    }

    /// Xen knows revision B alone: its units have no index, and its root complexes no address limit.
    #[test]
    fn the_index_for_a_unit_s_own_messages_counts_as_its_revision_says() {
        // Revision, flags, event, index; whether the node's index counts.
        for (revision, flags, event, index, expected) in [
            (5, 0x10, 0x40, 1, Ok(true)),
            (5, 0x00, 0, 1, Ok(false)),
            (4, 0x00, 0, 1, Ok(true)),
            (4, 0x10, 0x40, 1, Ok(false)),
            (1, 0x00, 0, 1, Ok(true)),
            (0, 0x10, 0, 1, Ok(false)),
            // Not in the list, or for others too: before revision 5 nobody said that it counts.
            (4, 0x00, 0, 2, Ok(false)),
            (4, 0x00, 0, 0, Ok(false)),
            (5, 0x10, 0, 2, Err("no mapping of the number")),
            (5, 0x10, 0, 0, Err("for others, too")),
        ] {
            let mut words = EVERYTHING.concat();
            let unit = (OFFSETS[2] - 48) / 4;
            words[unit] = words[unit] & 0x00FF_FFFF | revision << 24;
            words[unit + 6] = flags;
            // All four interrupts are wires, or one is not.
            words[unit + 11..unit + 15].copy_from_slice(&[event, 1, 1, 1]);
            words[unit + 16] = index;
            let table = table(6, 11, &words);
            let iort = read(&table);

            match (iort.interrupts_of(&units(&iort)[0]), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found.is_some(), expected, "{revision} {flags:#x}"),
                (Err(Error::Node { offset: 0x64, kind: 4, what }), Err(expected)) => {
                    assert!(what.contains(expected), "{what}");
                }
                (found, expected) => panic!("{revision} {flags:#x}: {found:?} is not {expected:?}"),
            }
        }
    }

    /// Linux reads no RMR before revision 5 of the table. A device that has one may not be given away as if
    /// it had none.
    #[test]
    fn reserved_memory_of_an_early_table_is_an_error_and_not_none() {
        for revision in [0, 3, 4] {
            let table = table(revision, 11, &EVERYTHING.concat());

            let Err(Error::Node { offset: 0x220, kind: 6, what }) = regions(&table, A, 0x104) else {
                panic!("no error in revision {revision}")
            };
            assert!(what.contains("revision"), "{what}");
            assert_eq!(endpoint(&table, 1, 0), Ok(Some((A, 0x100))), "the rest is read");
        }
        for revision in [5, 6, 0xFF] {
            let table = table(revision, 11, &EVERYTHING.concat());

            assert_eq!(regions(&table, A, 0x104).map(|found| found.len()), Ok(2), "revision {revision}");
        }
    }

    /// Overlapping unity maps (XSA-378 and its family): what is mapped twice is unmapped half.
    #[test]
    fn regions_that_overlap_are_refused() {
        let mut words = EVERYTHING.concat();
        let second = (OFFSETS[7] - 48) / 4 + 17;
        for (start, overlap) in
            [(0x8002_0000, false), (0x8001_0000, true), (0x7FFF_0000, false), (0x8000_0000, true)]
        {
            (words[second], words[second + 1]) = (start, 0);
            let found = regions(&table(6, 11, &words), A, 0x104);

            assert_eq!(found.is_err(), overlap, "{start:#x}: {found:?}");
        }
    }
}

mod malformed {
    use super::*;

    /// `EVERYTHING` with word `at` of the node at `offset` changed.
    fn changed(offset: usize, at: usize, value: u32) -> Vec<u8> {
        let mut words = EVERYTHING.concat();
        words[(offset - 48) / 4 + at] = value;
        table(6, 11, &words)
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let table = everything();
        assert_eq!(Iort::new(&[]).err(), Some(Error::NotIort));
        assert_eq!(Iort::new(&table[..47]).err(), Some(Error::NotIort));
        assert_eq!(Iort::new(&[b"DMAR", &table[4..]].concat()).err(), Some(Error::NotIort));
        let given = table.len();
        for claimed in [0, 47, given as u32 + 1, u32::MAX] {
            let mut table = table.clone();
            table[4..8].copy_from_slice(&claimed.to_le_bytes());
            assert_eq!(Iort::new(&table).err(), Some(Error::Length { claimed, given }));
        }
    }

    #[test]
    fn what_comes_after_the_length_of_the_table_is_not_part_of_it() {
        let mut long = everything();
        long.extend_from_slice(&[0xFF; 100]);

        assert_eq!(read(&long).nodes().count(), 11);
    }

    #[test]
    fn a_node_that_is_wrong_is_named_by_its_type_and_offset() {
        for (offset, kind, at, value, what) in [
            // Length 0, less than a header, less than the type needs, and past the end of the table.
            (0x30, 0, 0, 0x0100_0000, "its length"),
            (0x48, 0, 0, 0x0100_0F00, "its length"),
            (0x48, 0, 0, 0x0100_1000, "too short"),
            (0x64, 4, 0, 0x0500_4304, "too short"),
            (0xD0, 4, 0, 0x0000_3B04, "too short"),
            (0xD0, 4, 0, 0x0100_4304, "too short"),
            (0x120, 2, 0, 0x0400_2302, "too short"),
            (0x184, 2, 0, 0x0000_1F02, "too short"),
            (0x1BC, 1, 0, 0x0400_1C01, "too short"),
            (0x220, 6, 0, 0x0300_1B06, "too short"),
            (0x278, 5, 0, 0x02FF_FF05, "its length"),
            (0x2B4, 2, 0, 0x0000_3502, "its length"),
            // Mappings: so many, so far, in the header, and so that their end is no number.
            (0x64, 4, 2, 3, "mappings"),
            (0x64, 4, 2, u32::MAX, "mappings"),
            (0x120, 2, 3, 41, "mappings"),
            (0x120, 2, 3, 15, "mappings"),
            (0x120, 2, 3, u32::MAX, "mappings"),
            // Identifiers, the name's end, regions.
            (0x48, 0, 4, 3, "identifiers"),
            (0x48, 0, 4, u32::MAX, "identifiers"),
            (0x1BC, 1, 7, 0x535F_FF2C, "name"),
            (0x220, 6, 5, 3, "regions"),
            (0x220, 6, 5, 0, "regions"),
            (0x220, 6, 5, u32::MAX, "regions"),
            (0x220, 6, 6, 27, "regions"),
            (0x220, 6, 6, 49, "regions"),
            (0x220, 6, 2, 0, "no stream"),
        ] {
            let mut table = changed(offset, at, value);
            if at == 0 {
                // A node that is too short for its type has no mappings that could leave it first.
                table[offset + 8..offset + 12].fill(0);
            }
            let nodes: Vec<_> = read(&table).nodes().collect();

            let Some(Err(error)) = nodes.last().copied() else { panic!("{offset:#x}: {nodes:?}") };
            let Error::Node { offset: named, kind: of, what: why } = error else { panic!("{error:?}") };
            assert_eq!((named, of), (offset, kind), "{why}");
            assert!(why.contains(what), "{why} is not {what}");
            assert!(error.to_string().contains(&format!("{offset:#x}")), "{error}");
            assert!(nodes[..nodes.len() - 1].iter().all(Result::is_ok), "after it there are no more");
        }
    }

    #[test]
    fn a_name_without_an_end_is_refused() {
        // The component without mappings, whose 40 bytes are all name.
        let mut node = EVERYTHING.concat()[(OFFSETS[6] - 48) / 4..][..10].to_vec();
        (node[0], node[2]) = (0x0400_2801, 0);
        assert!(read(&table(6, 1, &node)).nodes().all(|node| node.is_ok()));

        node[9] = 0x4141_4141;

        let table = table(6, 1, &node);
        let found = read(&table).nodes().next();
        assert!(matches!(found, Some(Err(Error::Node { offset: 0x30, kind: 1, .. }))), "{found:?}");
    }

    #[test]
    fn a_table_that_ends_before_its_nodes_says_how_many_are_missing() {
        for (count, first, expected) in [
            (12, 0x30, Error::Ends { offset: 0x2E8, missing: 1 }),
            (u32::MAX, 0x30, Error::Ends { offset: 0x2E8, missing: u32::MAX - 11 }),
            (11, 0x2E8, Error::Ends { offset: 0x2E8, missing: 11 }),
            (11, 0x2D9, Error::Ends { offset: 0x2D9, missing: 11 }),
            (11, u32::MAX, Error::Ends { offset: u32::MAX as usize, missing: 11 }),
            // In the table's own header.
            (11, 0x2F, Error::Ends { offset: 0x2F, missing: 11 }),
        ] {
            let mut table = everything();
            table[36..44].copy_from_slice(&bytes(&[count, first]));

            assert_eq!(read(&table).nodes().last(), Some(Err(expected)));
        }
    }

    #[test]
    fn a_mapping_that_leads_astray_is_an_error_that_names_where_it_is() {
        // The reference is the fourth word of a mapping, the output the third.
        for (change, requester, offset, kind, what) in [
            ((0x120, 13, 0), 0x0000, 0x120, 2, "no node"),
            ((0x120, 13, 0x65), 0x0000, 0x120, 2, "no node"),
            ((0x120, 13, u32::MAX), 0x0000, 0x120, 2, "no node"),
            // To a root complex, which may be itself; to a component, an RMR, counters.
            ((0x120, 13, 0x120), 0x0000, 0x120, 2, "translates nothing"),
            ((0x120, 13, 0x184), 0x0000, 0x120, 2, "translates nothing"),
            ((0x120, 13, 0x1BC), 0x0000, 0x120, 2, "translates nothing"),
            ((0x120, 13, 0x220), 0x0000, 0x120, 2, "translates nothing"),
            ((0x120, 13, 0x278), 0x0000, 0x120, 2, "translates nothing"),
            // From the last numbers to none.
            ((0x120, 12, 0xFFFF_FF80), 0x0080, 0x120, 2, "do not exist"),
        ] {
            let (of, at, value) = change;
            let table = changed(of, at, value);

            let error = endpoint(&table, 1, requester).err();
            let Some(Error::Node { offset: named, kind: of, what: why }) = error else {
                panic!("{what}: {error:?}")
            };
            assert_eq!((named, of), (offset, kind));
            assert!(why.contains(what), "{why} is not {what}");
            assert_eq!(interrupts(&table, 1, requester).err(), error, "messages go the same way");
            assert_eq!(endpoint(&table, 1, 0x0100), Ok(Some((B, 0))), "another range is another matter");
        }
    }

    #[test]
    fn a_unit_leads_to_an_its_and_to_nothing_else() {
        // To itself, to the other unit, to a root complex.
        for to in [0x64, 0xD0, 0x120] {
            let table = changed(0x64, 20, to);

            let Err(Error::Node { offset: 0x64, kind: 4, what }) = interrupts(&table, 1, 0) else {
                panic!("{to:#x} is followed")
            };
            assert!(what.contains("other than an ITS"), "{what}");
            assert_eq!(endpoint(&table, 1, 0), Ok(Some((A, 0x100))));
        }
    }

    #[test]
    fn an_id_that_leads_to_two_places_is_no_stream() {
        // Ranges that share more than an end.
        let table = changed(0x120, 11, 0x180);
        let Err(Error::Node { offset: 0x120, kind: 2, what }) = endpoint(&table, 1, 0x0110) else {
            panic!("it is one of them")
        };
        assert!(what.contains("different places"), "{what}");
        assert_eq!(endpoint(&table, 1, 0x0010), Ok(Some((A, 0x110))), "where they agree");

        // Two root complexes of one segment: the last is of segment 1 now, and leads all of it past the
        // units.
        let table = changed(0x2B4, 7, 1);
        let Err(Error::Node { offset: 0x2B4, kind: 2, what }) = endpoint(&table, 1, 0x0010) else {
            panic!("it is one of them")
        };
        assert!(what.contains("elsewhere"), "{what}");
        // What the other does not know is not in doubt.
        assert_eq!(endpoint(&table, 1, 0x0300), Ok(None));
    }

    #[test]
    fn a_region_that_cannot_be_is_an_error_and_the_last() {
        // The first: base in words 12 and 13, length in 14 and 15.
        for (at, value) in [(12, 0x8000_1000), (14, 0x2_1000), (14, 0), (15, 0xFFFF_FFFF)] {
            let mut table = changed(0x220, at, value);
            if at == 15 {
                // Past the last address.
                table[0x220 + 52..0x220 + 56].copy_from_slice(&[0xFF; 4]);
            }
            let iort = read(&table);
            let found: Vec<_> = iort.regions(&units(&iort)[0], StreamId(0x104)).collect();

            let [Err(Error::Node { offset: 0x220, kind: 6, what })] = found[..] else { panic!("{found:?}") };
            assert!(what.contains("64 KiB"), "{what}");
        }
        // Streams that are no numbers.
        let table = changed(0x220, 9, 0xFFFF_FFFF);
        assert!(matches!(regions(&table, A, 0x104), Err(Error::Node { offset: 0x220, kind: 6, .. })));
    }

    #[test]
    fn every_cut_of_a_table_is_read_up_to_the_node_that_it_cuts() {
        for (whole, count) in [(qemu(), 3), (everything(), 11)] {
            let nodes: Vec<_> = read(&whole).nodes().collect();
            assert_eq!(nodes.len(), count);
            for end in 0..whole.len() {
                // As it is, and as a table that admits to be so short.
                assert!(Iort::new(&whole[..end]).is_err());
                let mut cut = whole[..end].to_vec();
                if let Some(length) = cut.get_mut(4..8) {
                    length.copy_from_slice(&(end as u32).to_le_bytes());
                }
                let Ok(iort) = Iort::new(&cut) else {
                    assert!(end < 48);
                    continue;
                };

                let found: Vec<_> = iort.nodes().collect();

                let (last, before) = found.split_last().expect("nodes are missing");
                let offset = match *last {
                    Err(Error::Ends { offset, missing }) => {
                        assert_eq!(missing as usize, count - before.len());
                        assert!(end < offset + 16);
                        offset
                    }
                    Err(Error::Node { offset, what, .. }) => {
                        assert!(what.contains("its length"));
                        offset
                    }
                    other => panic!("{end:#x}: {other:?}"),
                };
                let known = |node: &Result<Node<'_>, Error>| node.map(|node| node.offset());
                assert!(before.iter().map(known).eq(nodes.iter().take(before.len()).map(known)));
                assert_eq!(nodes[before.len()].map(|node| node.offset()), Ok(offset), "{end:#x}");
                for segment in 0..3 {
                    assert!(iort.endpoint(segment, 0x10).is_err(), "half a table says nothing of a device");
                    assert!(iort.interrupts(segment, 0x10).is_err());
                }
                assert!(iort.component("\\_SB.DMA0").is_ok() == (end >= 0x220), "{end:#x}");
            }
        }
    }
}
