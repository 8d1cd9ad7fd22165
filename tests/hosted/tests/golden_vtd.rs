//! Every public encoder and decoder of the VT-d driver against words worked out from the manual's field tables.
//!
//! "Row n" is a row of the fact sheet's golden words. Where the driver sets fewer fields than a row does, the word is
//! worked out again, and the comment shows how: `value << bit within the word`.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use hosted::root;
use iommu::{
    Access, DomainId, Event, FaultReason, Features, Gpa, GroupTag, Iova, Outcome, PageRequest, PageResponse,
    Pasid, Perms, PhysAddr, Stages, StreamId,
};
use vtd::{
    Reason,
    commands::Descriptor,
    events::{FaultEntry, RequestEntry},
    remap::{Delivery, Destination, Interrupt, Pin, Redirection, Refusal, RemapEntry, Source, message},
    tables::{ContextEntry, DirectoryEntry, LegacyContext, LegacyRoot, PasidEntry, RootHalf, Snoop},
};

fn pasid(value: u32) -> Pasid {
    Pasid::new(value).expect("20 bits")
}

const READ: Perms = Perms::READ;
const WRITE: Perms = Perms { read: false, write: true, execute: false, privileged: false };

mod tables {
    use super::*;

    const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };
    const WALKS: Snoop = Snoop { walks: true, accesses: false };
    const NONE: Snoop = Snoop { walks: false, accesses: false };

    #[test]
    fn each_half_of_a_root_entry_points_at_its_context_table() {
        // Row 5, both halves; row 6.
        assert_eq!(RootHalf::new(PhysAddr(0x1_0000)).0, [0x1_0001]);
        assert_eq!(RootHalf::new(PhysAddr(0x1_1000)).0, [0x1_1001]);
        assert_eq!(RootHalf::new(PhysAddr(0xF_EDCB_A000)).0, [0x0000_000F_EDCB_A001]);
    }

    #[test]
    fn a_context_entry_admits_what_the_device_may_use_and_no_more() {
        let word = |features| {
            let [first, rest @ ..] = ContextEntry::new(PhysAddr(0x2468_A000), features).0;
            assert_eq!(rest, [0; 3], "RID_PASID and all above are zero");
            first
        };

        // Row 7 with PDTS 0: 1 | DTE 1<<2 | PASIDE 1<<3 | PRE 1<<4 | 0x2468A<<12.
        assert_eq!(word(ALL), 0x2468_A01D);
        assert_eq!(word(Features::default()), 0x2468_A001);
        assert_eq!(word(Features { device_tlb: true, ..Features::default() }), 0x2468_A005);
        assert_eq!(word(Features { pasid: true, ..Features::default() }), 0x2468_A009);
        assert_eq!(word(Features { page_requests: true, ..Features::default() }), 0x2468_A011);
    }

    #[test]
    fn a_directory_entry_points_at_its_table() {
        // Row 9.
        assert_eq!(DirectoryEntry::new(PhysAddr(0x777_7000)).0, [0x0777_7001]);
    }

    #[test]
    fn a_first_stage_entry_has_its_fields_in_the_places_of_the_manual() {
        // Row 11 without SRE and WPE: w0 1 | AW 2<<2 | PGTT 1<<6; w1 6 | PWSNP 1<<23; w2 0x55555<<12.
        let entry = PasidEntry::first_stage(root(0x5555_5000, 4), DomainId(6), WALKS);
        assert_eq!(entry.0, [0x49, 0x0080_0006, 0x5555_5000, 0, 0, 0, 0, 0]);

        // Row 12 without PGSNP, SRE, EAFE: w0 1 | AW 3<<2 | PGTT 1<<6; w1 0xABC; w2 FSPM 1<<2 | 1<<12.
        let entry = PasidEntry::first_stage(root(0x1000, 5), DomainId(0xABC), NONE);
        assert_eq!(entry.0, [0x4D, 0xABC, 0x1004, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_second_stage_entry_has_its_fields_in_the_places_of_the_manual() {
        // Row 13 without SSADE and PGSNP: w0 1 | AW 2<<2 | PGTT 2<<6 | 0x333333<<12; w1 0x42 | PWSNP 1<<23.
        let entry = PasidEntry::second_stage(root(0x3_3333_3000, 4), DomainId(0x42), WALKS);
        assert_eq!(entry.0, [0x0000_0003_3333_3089, 0x0080_0042, 0, 0, 0, 0, 0, 0]);

        // AW: 1 is 3 levels, 3 is 5. w0 1 | AW<<2 | PGTT 2<<6 | 1<<12.
        assert_eq!(PasidEntry::second_stage(root(0x1000, 3), DomainId(1), NONE).0[0], 0x1085);
        assert_eq!(PasidEntry::second_stage(root(0x1000, 5), DomainId(1), NONE).0[0], 0x108D);
    }

    #[test]
    fn a_nested_entry_has_both_stages_in_the_places_of_the_manual() {
        // Row 14 without SRE and WPE: w0 1 | AW 3<<2 | PGTT 3<<6 | 0x800<<12; w1 0x1001; w2 FSPM 1<<2 | 0x900<<12.
        let entry = PasidEntry::nested(Gpa(0x90_0000), 5, root(0x80_0000, 5), DomainId(0x1001), NONE);
        assert_eq!(entry.0, [0x0080_00CD, 0x1001, 0x0090_0004, 0, 0, 0, 0, 0]);

        // The levels of each stage are its own. w0 1 | AW 1<<2 | PGTT 3<<6 | 0x800<<12; w2 FSPM 0.
        let entry = PasidEntry::nested(Gpa(0x90_0000), 4, root(0x80_0000, 3), DomainId(2), NONE);
        assert_eq!(entry.0, [0x0080_00C5, 2, 0x0090_0000, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_bypassing_entry_names_no_tables() {
        // Row 15: AW 2 is 4 levels.
        assert_eq!(PasidEntry::bypass(4, DomainId(1), WALKS).0, [0x109, 0x0080_0001, 0, 0, 0, 0, 0, 0]);
        // AW 3: 1 | 3<<2 | 4<<6.
        assert_eq!(PasidEntry::bypass(5, DomainId(1), NONE).0, [0x10D, 1, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn accesses_snoop_where_an_entry_says_so() {
        // Row 13 without SSADE, row 15 with PGSNP and without PWSNP: PGSNP 1<<24, PWSNP 1<<23.
        let both = Snoop { walks: true, accesses: true };
        let entry = PasidEntry::second_stage(root(0x3_3333_3000, 4), DomainId(0x42), both);
        assert_eq!(entry.0[1], 0x0180_0042);
        let accesses = Snoop { walks: false, accesses: true };
        assert_eq!(PasidEntry::bypass(4, DomainId(1), accesses).0[1], 0x0100_0001);
    }

    #[test]
    fn an_entry_that_refuses_everything_keeps_its_domain_and_is_not_present() {
        assert_eq!(PasidEntry::blocked(DomainId(0x42)).0, [0, 0x42, 0, 0, 0, 0, 0, 0]);
        // DID is 87:72, bit 8 of the second word: 0x42<<8.
        assert_eq!(LegacyContext::blocked(DomainId(0x42)).0, [0, 0x4200]);
    }

    #[test]
    fn a_legacy_root_entry_points_at_the_context_table_of_its_bus() {
        // Row 1.
        assert_eq!(LegacyRoot::new(PhysAddr(0x1234_5000)).0, [0x1234_5001, 0]);
    }

    #[test]
    fn a_legacy_context_entry_has_its_fields_in_the_places_of_the_manual() {
        // Row 2.
        let entry = LegacyContext::second_stage(root(0xABCD_E000, 4), DomainId(5), false);
        assert_eq!(entry.0, [0xABCD_E001, 0x0502]);
        // Row 3 without FPD: w0 1 | TT 1<<2 | 0x100001<<12.
        let entry = LegacyContext::second_stage(root(0x1_0000_1000, 3), DomainId(0x1234), true);
        assert_eq!(entry.0, [0x1_0000_1005, 0x0012_3401]);
        // Row 4.
        assert_eq!(LegacyContext::bypass(5, DomainId(3)).0, [0x9, 0x0303]);
    }
}

mod invalidation_descriptors {
    use super::*;

    #[test]
    fn the_context_cache_forgets_everything_or_one_device() {
        // Row 21.
        assert_eq!(Descriptor::all_contexts().0, [0x11, 0, 0, 0]);
        // Row 23 with DID 0, which scalable mode ignores: 1 | 3<<4 | 0x3FA<<32.
        assert_eq!(Descriptor::context(StreamId(0x03FA)).0, [0x0000_03FA_0000_0031, 0, 0, 0]);
        // Row 23 whole, as legacy mode has it.
        assert_eq!(Descriptor::context_of(7, StreamId(0x03FA)).0, [0x0000_03FA_0007_0031, 0, 0, 0]);
    }

    #[test]
    fn the_iotlb_forgets_everything_or_one_domain() {
        // Row 25, row 26. Drain: bit 0 is DW (bit 6), bit 1 is DR (bit 7).
        assert_eq!(Descriptor::all_translations(0b11).0, [0xD2, 0, 0, 0]);
        assert_eq!(Descriptor::domain(0x42, 0b11).0, [0x0042_00E2, 0, 0, 0]);
        assert_eq!(Descriptor::all_translations(0b00).0[0], 0x12);
        assert_eq!(Descriptor::all_translations(0b01).0[0], 0x52);
        assert_eq!(Descriptor::domain(0xFFFF, 0b10).0[0], 0xFFFF_00A2);
    }

    #[test]
    fn a_device_tlb_forgets_everything() {
        // Row 28: the physical function is another than the device.
        assert_eq!(
            Descriptor::device_tlb(StreamId(0x0108), StreamId(0x0100)).0,
            [0x0100_0108_0000_0003, 0x7FFF_FFFF_FFFF_F001, 0, 0]
        );
        // Rows 29 and 30, first words without MIP: PFSID 0x00F9 is 9<<12 | 0xF<<52, PFSID 0x0300 is 0x30<<52.
        assert_eq!(Descriptor::device_tlb(StreamId(0xFA), StreamId(0xF9)).0[0], 0x00F0_00FA_0000_9003);
        assert_eq!(Descriptor::device_tlb(StreamId(0x0300), StreamId(0x0300)).0[0], 0x0300_0300_0000_0003);
        // A unit without ECAP.DIT is told no physical function.
        assert_eq!(Descriptor::device_tlb(StreamId(0x0108), StreamId(0)).0[0], 0x0000_0108_0000_0003);
    }

    #[test]
    fn a_device_is_asked_no_more_than_it_takes_at_one_time() {
        // Rows 29 and 42, first words: MIP 16 in 20:16 of type 3, MIP 8 in 8:4 of type 8.
        let all = Descriptor::device_tlb(StreamId(0xFA), StreamId(0xF9));
        assert_eq!(all.at_most(16).0[0], 0x00F0_00FA_0010_9003);
        let of_pasid = Descriptor::pasid_device_tlb(StreamId(0x0108), StreamId(0x0100), pasid(5));
        assert_eq!(of_pasid.at_most(8).0[0], 0x0100_0005_0108_0088);
        // 32 is told as zero.
        assert_eq!((all.at_most(32), of_pasid.at_most(32)), (all, of_pasid));
        assert_eq!(
            (all.at_most(31).0[0], of_pasid.at_most(31).0[0]),
            (all.0[0] | 31 << 16, of_pasid.0[0] | 31 << 4)
        );
    }

    #[test]
    fn a_context_of_legacy_mode_is_named_with_its_domain() {
        // Row 23: DID 7, SID 0x03FA.
        assert_eq!(Descriptor::context_of(7, StreamId(0x03FA)).0, [0x0000_03FA_0007_0031, 0, 0, 0]);
    }

    #[test]
    fn what_does_nothing_is_a_wait_without_a_fence() {
        // Row 33 with data 0: 5 | SW 1<<5.
        assert_eq!(Descriptor::nothing(PhysAddr(0x1000_0040)).0, [0x25, 0x1000_0040, 0, 0]);
    }

    #[test]
    fn a_wait_writes_its_status_fences_and_drains_if_asked() {
        // Row 33 with FN: 5 | SW 1<<5 | FN 1<<6 | 2<<32.
        assert_eq!(Descriptor::wait(PhysAddr(0x1000_0040), 2, false).0, [0x2_0000_0065, 0x1000_0040, 0, 0]);
        // Row 36.
        assert_eq!(Descriptor::wait(PhysAddr(0x9008), 1, true).0, [0x1_0000_00E5, 0x9008, 0, 0]);
        // The whole of the data, the whole of the address.
        assert_eq!(
            Descriptor::wait(PhysAddr(0xFFFF_FFFF_FFFC), u32::MAX, false).0,
            [0xFFFF_FFFF_0000_0065, 0xFFFF_FFFF_FFFC, 0, 0]
        );
    }

    #[test]
    fn the_iotlb_forgets_a_pasid() {
        // Row 37.
        assert_eq!(Descriptor::pasid(0x10, pasid(0x1_2345)).0, [0x0001_2345_0010_0026, 0, 0, 0]);
    }

    #[test]
    fn the_pasid_cache_forgets_everything_or_one_entry() {
        // Row 41, row 40.
        assert_eq!(Descriptor::all_pasid_entries().0, [0x37, 0, 0, 0]);
        assert_eq!(Descriptor::pasid_entry(0x11, pasid(0xA_BCDE)).0, [0x000A_BCDE_0011_0017, 0, 0, 0]);
    }

    #[test]
    fn a_device_tlb_forgets_a_pasid() {
        // Row 43; and without a physical function.
        assert_eq!(
            Descriptor::pasid_device_tlb(StreamId(0xFA), StreamId(0xF9), pasid(0x1_2345)).0,
            [0x00F1_2345_00FA_9008, 0x7FFF_FFFF_FFFF_F800, 0, 0]
        );
        assert_eq!(
            Descriptor::pasid_device_tlb(StreamId(0xFA), StreamId(0), pasid(5)).0[0],
            0x0000_0005_00FA_0008
        );
    }

    #[test]
    fn a_page_group_response_carries_outcome_device_pasid_and_group() {
        let response = |stream, pasid, index, outcome| {
            let response = PageResponse { stream: StreamId(stream), tag: GroupTag { pasid, index }, outcome };
            Descriptor::page_group_response(&response).0
        };

        // Row 45, row 46, row 47.
        assert_eq!(response(0x20, Some(pasid(5)), 2, Outcome::Success), [0x0000_0005_0020_0019, 0x10, 0, 0]);
        assert_eq!(
            response(0x0108, Some(pasid(0x1_2345)), 0x1FF, Outcome::Invalid),
            [0x0001_2345_0108_1019, 0xFF8, 0, 0]
        );
        assert_eq!(response(0x0300, None, 7, Outcome::Failure), [0x0300_F009, 0x38, 0, 0]);
        // PASID 0 is a PASID: PP is set.
        assert_eq!(response(0x20, Some(pasid(0)), 0, Outcome::Success), [0x0020_0019, 0, 0, 0]);
    }
}

mod page_requests {
    use super::*;

    fn request(stream: u32, pasid: Option<Pasid>, index: u16, iova: u64, perms: Perms, last: bool) -> Event {
        let (stream, tag, iova) = (StreamId(stream), GroupTag { pasid, index }, Iova(iova));
        Event::PageRequest(PageRequest { stream, tag, iova, perms, last })
    }

    #[test]
    fn an_entry_says_who_asks_for_what() {
        // Row 48, measured on QEMU; row 49; row 50.
        assert_eq!(
            RequestEntry([0x0000_0005_0020_0101, 0x0000_0040_0000_0015, 0, 0]).decode(),
            request(0x20, Some(pasid(5)), 2, 0x40_0000_0000, READ, true)
        );
        assert_eq!(
            RequestEntry([0x0021_2345_0108_0101, 0x0000_7F00_0000_1FFB, 0, 0]).decode(),
            request(
                0x0108,
                Some(pasid(0x1_2345)),
                0x1FF,
                0x7F00_0000_1000,
                Perms { privileged: true, ..Perms::READ_WRITE },
                false
            )
        );
        assert_eq!(
            RequestEntry([0x0000_0000_0300_0001, 0x0000_0000_1234_501E, 0, 0]).decode(),
            request(0x0300, None, 3, 0x1234_5000, WRITE, true)
        );
    }

    #[test]
    fn a_request_to_execute_is_known() {
        // Row 48 with EXR: 1<<52.
        assert_eq!(
            RequestEntry([0x0010_0005_0020_0101, 0x0000_0040_0000_0015, 0, 0]).decode(),
            request(0x20, Some(pasid(5)), 2, 0x40_0000_0000, Perms { execute: true, ..READ }, true)
        );
    }

    #[test]
    fn a_last_request_of_a_pasid_for_nothing_is_a_stop_marker() {
        // Row 51.
        assert_eq!(
            RequestEntry([0x0000_0005_0020_0101, 0x4, 0, 0]).decode(),
            Event::StopMarker { stream: StreamId(0x20), pasid: Some(pasid(5)) }
        );
    }

    #[test]
    fn a_request_for_nothing_that_is_no_stop_marker_is_a_request() {
        // Row 51 without LPIG, and without PASID: only the last request of a PASID is a stop marker.
        assert_eq!(
            RequestEntry([0x0000_0005_0020_0101, 0, 0, 0]).decode(),
            request(0x20, Some(pasid(5)), 0, 0, Perms::default(), false)
        );
        assert_eq!(
            RequestEntry([0x0020_0001, 0x4, 0, 0]).decode(),
            request(0x20, None, 0, 0, Perms::default(), true)
        );
    }

    #[test]
    fn an_entry_of_another_type_is_kept_as_it_was() {
        for kind in (0..=0xFF).filter(|&kind| kind != 1) {
            let words = [0x0000_0005_0020_0100 | kind, 0x15];
            // Where a request has them: RID 0x20, PASID 5, PRGI 2.
            let group = Some((StreamId(0x20), GroupTag { pasid: Some(pasid(5)), index: 2 }));
            assert_eq!(RequestEntry([words[0], words[1], 7, 8]).decode(), Event::Malformed { words, group });
            // Bits 15:10 and 63:54 are no request's: whatever it is, it names no group.
            for bit in (10..16).chain(54..64) {
                let words = [words[0] | 1 << bit, words[1]];
                let expected = Event::Malformed { words, group: None };
                assert_eq!(RequestEntry([words[0], words[1], 0, 0]).decode(), expected);
            }
        }
    }

    #[test]
    fn words_two_and_three_and_reserved_bits_change_nothing() {
        // Row 48; the historic private data, bit 9 (PDP), bits 15:10 and 63:54.
        let plain = RequestEntry([0x0000_0005_0020_0101, 0x0000_0040_0000_0015, 0, 0]).decode();
        let noisy = RequestEntry([0xFFC0_0005_0020_FF01, 0x0000_0040_0000_0015, u64::MAX, u64::MAX]).decode();
        assert_eq!(noisy, plain);
    }
}

mod fault_records {
    use super::*;

    #[test]
    fn a_record_says_who_was_refused_what() {
        let decode = |words| {
            let fault = FaultEntry(words).decode().expect("F is set");
            (fault.stream.0, fault.pasid.map(Pasid::value), fault.access, fault.iova.0, fault.code)
        };

        // Rows 52 to 57.
        assert_eq!(
            decode([0x1234_5000, 0x8000_0005_0000_0108]),
            (0x0108, None, Access::Write, 0x1234_5000, 0x05)
        );
        assert_eq!(
            decode([0xFFFF_8000_0000_1000, 0xC123_4579_A000_00FA]),
            (0x00FA, Some(0x1_2345), Access::Read, 0xFFFF_8000_0000_1000, 0x79)
        );
        assert_eq!(
            decode([0x40_0000_0000, 0x8000_0547_9000_0020]),
            (0x20, Some(5), Access::PageRequest, 0x40_0000_0000, 0x47)
        );
        assert_eq!(decode([0x1_0000, 0xC000_0086_1000_0300]), (0x0300, None, Access::Atomic, 0x1_0000, 0x86));
        assert_eq!(decode([0xA000, 0xD000_0044_0000_0108]), (0x0108, None, Access::Read, 0xA000, 0x44));
        assert_eq!(
            decode([0x1234_0000_0000_0000, 0x8000_0026_0000_F0F8]),
            (0xF0F8, None, Access::Write, 0x1234_0000_0000_0000, 0x26)
        );
    }

    #[test]
    fn a_record_without_f_holds_no_fault() {
        // Row 53 without bit 127.
        assert_eq!(FaultEntry([0xFFFF_8000_0000_1000, 0x4123_4579_A000_00FA]).decode(), None);
        assert_eq!(FaultEntry([u64::MAX, u64::MAX >> 1]).decode(), None);
    }

    /// The manual's reasons, by what they mean to the owner of the device. What is not listed is unknown.
    const REASONS: [(FaultReason, &[u16]); 6] = [
        // Not present: LRT.2, LCT.2, SRT.2, SCT.2, SPD.2, SPT.2. Not admitted: LCT.5, RTA.2 to RTA.4, SCT.5 to SCT.8,
        // SCT.10, SGN.10.
        // SPT.4 is how a unit that looks at PGTT before P reports an entry that is all zero.
        (
            FaultReason::NotAttached,
            &[
                0x01, 0x02, 0x39, 0x41, 0x51, 0x59, 0x0D, 0x31, 0x32, 0x33, 0x44, 0x45, 0x46, 0x47, 0x49,
                0x89, 0x5B,
            ],
        ),
        // SFS.2, SSS.2.
        (FaultReason::NotMapped, &[0x71, 0x79]),
        // RTA.5, LGN.2, LGN.3, SPT.5, SPT.6, SGN.2, SGN.3, SGN.6, SGN.7.
        (FaultReason::NotPermitted, &[0x34, 0x05, 0x06, 0x5C, 0x5D, 0x81, 0x82, 0x85, 0x86]),
        // LGN.1, SGN.1, SGN.4, SGN.5.
        (FaultReason::AddressSize, &[0x04, 0x80, 0x83, 0x84]),
        // Access errors, reserved bits, invalid entries, nested walks that fail in the tables.
        (
            FaultReason::BadTables,
            &[
                0x03, 0x07, 0x08, 0x09, 0x0A, 0x0B, 0x0C, 0x30, 0x38, 0x3A, 0x40, 0x42, 0x43, 0x48, 0x50,
                0x52, 0x58, 0x5A, 0x70, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x7A, 0x7B, 0x7C, 0x7D,
                0x90, 0x91,
            ],
        ),
        // LGN.4, SGN.8, interrupt remapping.
        (FaultReason::Interrupt, &[0x0E, 0x87, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26, 0x27, 0x28, 0x29]),
    ];

    #[test]
    fn every_reason_of_the_manual_is_sorted_and_every_other_is_kept_raw() {
        for code in 0..=0xFF {
            let expected =
                REASONS.iter().find(|(_, codes)| codes.contains(&code)).map_or(FaultReason::Other, |r| r.0);

            // F, and FR in 103:96.
            let fault = FaultEntry([0, 1 << 63 | u64::from(code) << 32]).decode().expect("F is set");

            assert_eq!((fault.reason, fault.code), (expected, code), "{code:#04x}");
        }
    }

    #[test]
    fn each_reason_that_the_sources_explain_has_a_name_and_every_other_keeps_its_code() {
        let named: Vec<u16> = REASONS.iter().flat_map(|(_, codes)| codes.iter().copied()).collect();
        for code in 0..0x200 {
            let reason = Reason::of(code);

            assert_eq!(reason.code(), code);
            assert_eq!(reason == Reason::Other(code), !named.contains(&code), "{code:#x}: {reason:?}");
        }
        // A look at each table of the sheet (4.2).
        assert_eq!(Reason::of(0x02), Reason::ContextNotPresent, "LCT.2");
        assert_eq!(Reason::of(0x26), Reason::WrongSource);
        assert_eq!(Reason::of(0x47), Reason::PageRequestBlocked, "SCT.8");
        assert_eq!(Reason::of(0x59), Reason::PasidNotPresent, "SPT.2");
        assert_eq!(Reason::of(0x75), Reason::NestedRootNotReadable, "SFS.6");
        assert_eq!(Reason::of(0x79), Reason::SecondStageNotPresent, "SSS.2");
        assert_eq!(Reason::of(0x80), Reason::NotCanonical, "SGN.1");
    }

    /// The manual's reasons (revision 5.10, "Fault Conditions and Remapping Hardware Behavior"), by the tables that refuse;
    /// SFS.9, SFS.10, SSS.6 and SGN.3 as the sheet has them (4.2). What is not listed is the second stage's.
    const STAGES: [(Stages, &[u16]); 3] = [
        // LRT, LCT, interrupt remapping, RTA, SRT, SCT, SPD, SPT; SGN.4 is about an address that no table translates, SGN.10
        // about the PASID.
        (
            Stages::None,
            &[
                0x01, 0x08, 0x0A, 0x02, 0x03, 0x09, 0x0B, 0x0D, 0x20, 0x21, 0x22, 0x23, 0x24, 0x25, 0x26,
                0x27, 0x28, 0x29, 0x30, 0x31, 0x32, 0x33, 0x34, 0x38, 0x39, 0x3A, 0x40, 0x41, 0x42, 0x43,
                0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x50, 0x51, 0x52, 0x58, 0x59, 0x5A, 0x5B, 0x5C, 0x5D,
                0x83, 0x89,
            ],
        ),
        // SFS.1 to SFS.5: of SFS.6 to SFS.8 the manual says that the second stage lacks the permission. SFS.9, SFS.10.
        // SGN.1, SGN.2.
        (Stages::First, &[0x70, 0x71, 0x72, 0x73, 0x74, 0x90, 0x91, 0x80, 0x81]),
        // SGN.6 may be either's. (SGN.7 is not: a first-stage entry that is present can be read.)
        (Stages::Nested, &[0x85]),
    ];

    #[test]
    fn each_reason_says_which_stage_refused_and_of_every_other_it_was_the_second() {
        for code in 0..0x200 {
            let expected = STAGES
                .iter()
                .find(|(_, codes)| codes.contains(&code))
                .map_or(Stages::Second, |(stages, _)| *stages);

            assert_eq!(Reason::of(code).stages(), expected, "{code:#04x}");
        }
        // The second stage's, each by its name: LGN and LSS of legacy mode, SFS.6 to SFS.8, SSS, SGN.3, SGN.5, SGN.7, SGN.8;
        // a number without a name, and the faults of HPT, which this driver does not use.
        let seconds = [0x04, 0x05, 0x06, 0x07, 0x0C, 0x0E, 0x75, 0x76, 0x77];
        let further =
            [0x78, 0x79, 0x7A, 0x7B, 0x7C, 0x7D, 0x82, 0x84, 0x86, 0x87, 0x7E, 0x88, 0x92, 0xA0, 0xFF];
        for code in seconds.into_iter().chain(further) {
            assert_eq!(Reason::of(code).stages(), Stages::Second, "{code:#04x}");
        }
    }
}

mod interrupt_remapping {
    use super::*;

    const fn function(id: u32) -> Source {
        Source::Function(StreamId(id))
    }

    #[test]
    fn an_entry_has_its_fields_in_the_places_of_the_manual() {
        let x2apic = |source, id, vector| {
            RemapEntry::new(source, Interrupt::fixed(Destination::Physical(id), vector), true)
        };
        // Row 58.
        assert_eq!(
            x2apic(function(0x108), 0x1234_5678, 0x41),
            Ok(RemapEntry([0x1234_5678_0041_0001, 0x0004_0108]))
        );
        // Row 59: logical, RH, level, lowest priority.
        let lowest = Interrupt {
            destination: Destination::Logical(0x0F),
            delivery: Delivery::LowestPriority,
            vector: 0x30,
            level: true,
        };
        assert_eq!(
            RemapEntry::new(function(0xF0F8), lowest, false),
            Ok(RemapEntry([0x0000_0F00_0030_003D, 0x0004_F0F8]))
        );
        // Row 60 without FPD.
        assert_eq!(
            x2apic(Source::Buses { first: 2, last: 5 }, 7, 0x55),
            Ok(RemapEntry([0x7_0055_0001, 0x0008_0205]))
        );
        // Row 61.
        let all_functions = Source::Phantoms { function: StreamId(0x200), bits: 3 };
        assert_eq!(x2apic(all_functions, 1, 0x66), Ok(RemapEntry([0x1_0066_0001, 0x0007_0200])));
        // NMI: 1 | DLM 4<<5 | 1<<40, without a vector.
        let nmi = Interrupt { delivery: Delivery::Nmi, ..Interrupt::fixed(Destination::Physical(1), 0x41) };
        assert_eq!(RemapEntry::new(function(0x108), nmi, false).map(|e| e.0[0]), Ok(0x0000_0100_0000_0081));
    }

    #[test]
    fn an_entry_that_would_mean_something_else_is_refused() {
        let fixed = Interrupt::fixed(Destination::Physical(1), 0x41);
        let refused = |source, interrupt, x2apic| RemapEntry::new(source, interrupt, x2apic).is_err();

        assert!(!refused(function(0xFFFF), fixed, false));
        assert!(refused(function(0x1_0000), fixed, false), "a source-id has 16 bits");
        for bits in [0, 4, 255] {
            assert!(refused(Source::Phantoms { function: StreamId(8), bits }, fixed, false));
        }
        assert!(refused(Source::Buses { first: 3, last: 2 }, fixed, false));
        assert!(!refused(Source::Buses { first: 2, last: 2 }, fixed, false));
        let beyond = Interrupt::fixed(Destination::Physical(0x100), 0x41);
        assert!(refused(function(8), beyond, false), "xAPIC: 8 bits");
        assert!(!refused(function(8), beyond, true));
        for vector in [0, 15, 31] {
            assert!(refused(function(8), Interrupt { vector, ..fixed }, true));
        }
        assert!(!refused(function(8), Interrupt { vector: 32, ..fixed }, true));
    }

    #[test]
    fn a_message_names_its_entry_in_the_bits_of_the_manual() {
        // Rows 67 to 70.
        for (handle, several, address) in [
            (0x5, false, 0xFEE0_00B0),
            (0x5, true, 0xFEE0_00B8),
            (0x8001, true, 0xFEE0_003C),
            (0xFFFF, false, 0xFEEF_FFF4),
        ] {
            let message = message(handle, several, 3);
            assert_eq!((message.address, message.data), (address, if several { 3 } else { 0 }));
        }
    }

    #[test]
    fn a_pin_names_its_entry_in_the_bits_of_the_manual() {
        // Rows 63 and 64.
        let low = Pin { active_low: true, masked: false };
        assert_eq!(Redirection::new(0x1234, 0x31, true, low).0, [0x2469_0000_0000_A031]);
        let masked = Pin { active_low: false, masked: true };
        assert_eq!(Redirection::new(0x8001, 0x52, false, masked).0, [0x0003_0000_0001_0852]);
    }

    #[test]
    fn interrupt_entries_are_forgotten_by_index_and_mask() {
        // Rows 31 and 32; one entry: 4 | 1<<4 | 0xFFFF<<32.
        assert_eq!(Descriptor::all_interrupt_entries().0, [4, 0, 0, 0]);
        assert_eq!(Descriptor::interrupt_entries(0x1230, 3).0, [0x0000_1230_1800_0014, 0, 0, 0]);
        assert_eq!(Descriptor::interrupt_entries(0xFFFF, 0).0, [0x0000_FFFF_0000_0014, 0, 0, 0]);
    }

    #[test]
    fn a_fault_says_why_an_interrupt_was_refused_and_which() {
        // Row 57, and the other reasons of 4.2 in its place.
        let fault = |code: u64| FaultEntry([0x1234_0000_0000_0000, 1 << 63 | code << 32 | 0xF0F8]).decode();
        for (code, expected) in [
            (0x20, Refusal::Reserved),
            (0x21, Refusal::PastTheEnd),
            (0x22, Refusal::NotPresent),
            (0x23, Refusal::Unreadable),
            (0x24, Refusal::BadEntry),
            (0x25, Refusal::CompatibilityFormat),
            (0x26, Refusal::WrongSource),
        ] {
            let fault = fault(code).expect("F is set");
            assert_eq!((fault.stream, fault.reason), (StreamId(0xF0F8), FaultReason::Interrupt));
            assert_eq!(Refusal::of(&fault), Some((expected, 0x1234)), "{code:#x}");
        }
        // 0x0E and 0x87 are about memory accesses that end in the interrupt range.
        for code in [0x05, 0x0E, 0x1F, 0x27, 0x87] {
            assert_eq!(Refusal::of(&fault(code).expect("F is set")), None, "{code:#x}");
        }
    }
}
