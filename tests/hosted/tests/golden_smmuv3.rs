//! Every public encoder and decoder of the SMMUv3 driver against words worked out from the manual's field tables.
//!
//! A letter with a number is a row of the fact sheet's golden words. Where the driver sets other fields than a row does,
//! the word is worked out again, and the comment shows how: `value << bit within the word`.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use iommu::{
    Access, Event, FaultReason, FaultRecord, GroupTag, Iova, Outcome, PageRequest, PageResponse, Pasid,
    Perms, PhysAddr, StreamId,
};
use smmuv3::{
    commands::{Command, Part},
    contexts::{ContextDescriptor, ContextTable, FirstLevelContext},
    events::{EventRecord, RequestEntry},
    streams::FirstLevelEntry,
    tables::{StreamEntry, Walks},
};

const SID: StreamId = StreamId(0x108);
const READ: Perms = Perms::READ;
const NOTHING: Perms = Perms { read: false, write: false, execute: false, privileged: false };

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

mod tables {
    use super::*;

    const COHERENT: Walks = Walks { coherent: true, address_size: 5 };
    const INCOHERENT: Walks = Walks { coherent: false, address_size: 5 };

    #[test]
    fn a_blocked_entry_is_not_valid_and_says_all_that_does_not_depend_on_tables() {
        // w1: S1CIR 1<<2 | S1COR 1<<4 | S1CSH 3<<6 = 0xD4 (as S3); SHCFG 1<<44 (as S2); EATS 1<<28 (as S4).
        assert_eq!(StreamEntry::blocked(false, COHERENT).0, [0, 0x0000_1000_0000_00D4, 0, 0, 0, 0, 0, 0]);
        assert_eq!(StreamEntry::blocked(true, COHERENT).0, [0, 0x0000_1000_1000_00D4, 0, 0, 0, 0, 0, 0]);
        assert_eq!(StreamEntry::blocked(true, INCOHERENT).0, [0, 0x0000_1000_1000_0000, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_second_stage_has_its_fields_in_the_places_of_the_manual() {
        let second =
            |vmid, walks, root| StreamEntry::default().with_second_stage(vmid, walks, PhysAddr(root)).0;
        // w2: VMID | T0SZ<<32 | SL0<<38 | IR 1<<40 | OR 1<<42 | SH 3<<44 | PS<<48 | AA64 1<<51 | PTW 1<<54 | S2R 1<<58.
        // S8, but for FWB in w1: T0SZ 16 is 0x10, SL0 2.
        assert_eq!(
            second(7, COHERENT, 0x2_0000_1000),
            [0, 0, 0x044D_3590_0000_0007, 0x2_0000_1000, 0, 0, 0, 0]
        );
        // 44 bits: T0SZ 20 is 0x14.
        let smaller = |address_size| Walks { coherent: false, address_size };
        assert_eq!(second(0xFFFF, smaller(4), 0x1000), [0, 0, 0x044C_0094_0000_FFFF, 0x1000, 0, 0, 0, 0]);
        // 42, 40, 36 and 32 bits: three levels, SL0 1<<6; T0SZ 25 (0x19), 25, 28 (0x1C), 32 (0x20).
        for (address_size, w2) in [
            (3, 0x044B_0059_0000_0001),
            (2, 0x044A_0059_0000_0001),
            (1, 0x0449_005C_0000_0001),
            (0, 0x0448_0060_0000_0001),
        ] {
            assert_eq!(second(1, smaller(address_size), 0x1000)[2], w2, "IDR5.OAS {address_size}");
        }
    }

    #[test]
    fn an_entry_is_opened_by_its_first_word_and_by_the_root_of_its_second_stage() {
        let blocked =
            StreamEntry::blocked(true, COHERENT).with_second_stage(0x2A, COHERENT, PhysAddr(0x5000));

        // S3: the context descriptor, Config 5<<1, V.
        let first = blocked.first_stage(PhysAddr(0x8812_3000));
        assert_eq!(first.0[0], 0x0000_0000_8812_300B);
        assert_eq!(first.0[1..], blocked.0[1..]);
        // The pointer is [55:6]: descriptors lie 64 bytes apart.
        assert_eq!(blocked.first_stage(PhysAddr(0x00FF_FFFF_FFFF_FFC0)).0[0], 0x00FF_FFFF_FFFF_FFCB);
        // S7: Config 6<<1, V; S2TTB.
        let second = blocked.second_stage(PhysAddr(0x1_4000_0000));
        assert_eq!(second.0[..2], [0x0D, blocked.0[1]]);
        assert_eq!(second.0[2..], [blocked.0[2], 0x1_4000_0000, 0, 0, 0, 0]);
    }

    #[test]
    fn every_way_to_be_translated_has_its_config() {
        let blocked =
            StreamEntry::blocked(false, COHERENT).with_second_stage(0x2A, COHERENT, PhysAddr(0x5000));
        let [_, w1, w2, w3, ..] = blocked.0;

        // S1, S2: Config 0, and 4<<1.
        assert_eq!(blocked.silent().0, [0x01, w1, w2, w3, 0, 0, 0, 0]);
        assert_eq!(blocked.bypass().0, [0x09, w1, w2, w3, 0, 0, 0, 0]);
        // S10 without a first stage of its own: Config 7<<1, V; MEV 1<<19.
        assert_eq!(
            blocked.nested(PhysAddr(0x1_4000_0000)).0,
            [0x0F, w1 | 0x8_0000, w2, 0x1_4000_0000, 0, 0, 0, 0]
        );
    }

    #[test]
    fn a_table_of_contexts_is_named_with_its_size_and_format() {
        let blocked = StreamEntry::blocked(true, COHERENT);
        let contexts =
            |at, log2, two_levels, bypass| blocked.contexts(ContextTable { at, log2, two_levels }, bypass).0;
        // As S4, but S1Fmt 1<<4 and S1CDMax 15<<59 = 0x78.. (20 is 0xA0..); S1DSS 2, SHCFG 1<<44.
        assert_eq!(
            contexts(0x9_0000_0000, 15, true, false),
            [0x7800_0009_0000_001B, 0x0000_1000_1000_00D6, 0, 0, 0, 0, 0, 0]
        );
        // S6 without S1STALLD: linear, S1CDMax 1, S1DSS 1.
        assert_eq!(
            contexts(0x8820_0000, 1, false, true),
            [0x0800_0000_8820_000B, 0x0000_1000_1000_00D5, 0, 0, 0, 0, 0, 0]
        );
    }

    #[test]
    fn stalls_and_forced_write_back_have_their_bits() {
        let second = StreamEntry::default().with_second_stage(3, COHERENT, PhysAddr(0x1000));
        // S1STALLD is [91], 1<<27 of w1 (S3); S2FWB [89], 1<<25 of w1 (S8); S2S [185], 1<<57 of w2 (S11).
        assert_eq!(StreamEntry::default().never_stalling().0[1], 0x0800_0000);
        assert_eq!(StreamEntry::default().with_forced_write_back().0[1], 0x0200_0000);
        assert_eq!(second.stalling().0[2], 0x064D_3590_0000_0003);
    }

    #[test]
    fn answers_of_the_unit_s_own_have_a_bit_for_the_pasid() {
        // PPAR is [82], 1<<18 of w1, and nothing else.
        assert_eq!(StreamEntry::default().answering_with_pasid().0, [0, 0x4_0000, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn a_first_level_entry_of_contexts_says_where_a_table_is() {
        // L3: L2Ptr [55:12], V.
        assert_eq!(FirstLevelContext::new(PhysAddr(0xB001_0000)).0, [0xB001_0001]);
        assert_eq!(FirstLevelContext::new(PhysAddr(0xFFFF_FFFF_FFFF_F000)).0, [0x00FF_FFFF_FFFF_F001]);
    }

    #[test]
    fn a_first_level_entry_says_where_a_table_is_and_how_long() {
        let entry = |table, split| FirstLevelEntry::new(PhysAddr(table), split).0;
        // L1, L2: L2Ptr [55:6], Span [4:0], which is log2 of the entries, and 1.
        assert_eq!(entry(0x8800_4000, 8), [0x0000_0000_8800_4009]);
        assert_eq!(entry(0x8800_5000, 6), [0x0000_0000_8800_5007]);
        assert_eq!(entry(0x00FF_FFFF_FFFF_0000, 10), [0x00FF_FFFF_FFFF_000B]);
    }

    #[test]
    fn a_context_descriptor_has_its_fields_in_the_places_of_the_manual() {
        // C1, with attributes 0 write-back 0xFF, 1 device 0x04<<8, 2 not cached 0x44<<16.
        let context = ContextDescriptor::new(PhysAddr(0x1_0203_0000), 1, COHERENT).0;
        assert_eq!(context, [0x0001_E205_C000_3510, 0x1_0203_0000, 0, 0x44_04FF, 0, 0, 0, 0]);
        // C1 without IR 1<<8, OR 1<<10 and SH 3<<12; IPS 4<<32; ASID 0xFFFF<<48.
        let walks = Walks { coherent: false, address_size: 4 };
        let context = ContextDescriptor::new(PhysAddr(0xFFFF_FFFF_F000), 0xFFFF, walks).0;
        assert_eq!(context, [0xFFFF_E204_C000_0010, 0xFFFF_FFFF_F000, 0, 0x44_04FF, 0, 0, 0, 0]);
        // S, 1<<44 (C2); not valid, V 1<<31 clear.
        let stalling = ContextDescriptor::new(PhysAddr(0x1_0203_0000), 1, COHERENT).stalling().0;
        assert_eq!(stalling, [0x0001_F205_C000_3510, 0x1_0203_0000, 0, 0x44_04FF, 0, 0, 0, 0]);
        assert_eq!(ContextDescriptor::unused(PhysAddr(0x7000)).0, [0, 0x7000, 0, 0x44_04FF, 0, 0, 0, 0]);
    }
}

mod commands {
    use super::*;

    #[test]
    fn configuration_is_forgotten_of_one_stream_or_of_all() {
        // K3, K5.
        assert_eq!(Command::cfgi_ste(SID, true).0, [0x0000_0108_0000_0003, 1]);
        assert_eq!(Command::cfgi_ste(StreamId(u32::MAX), true).0, [0xFFFF_FFFF_0000_0003, 1]);
        // With the way there: Leaf, bit 0 of w1, is 0.
        assert_eq!(Command::cfgi_ste(SID, false).0, [0x0000_0108_0000_0003, 0]);
        assert_eq!(Command::cfgi_all().0, [0x04, 0x1F]);
    }

    #[test]
    fn contexts_are_forgotten_one_or_all_of_a_stream() {
        let five = Pasid::new(5).expect("20 bits");
        // K6 without Leaf, which is 1 there: how the context was found is forgotten, too. K7.
        assert_eq!(Command::cfgi_cd(SID, five).0, [0x0000_0108_0000_5005, 0]);
        assert_eq!(Command::cfgi_cd_all(SID).0, [0x0000_0108_0000_0006, 0]);
        // The widest: SSID [31:12], SID [63:32].
        let last = Pasid::new(0xF_FFFF).expect("20 bits");
        assert_eq!(Command::cfgi_cd(StreamId(u32::MAX), last).0, [0xFFFF_FFFF_FFFF_F005, 0]);
        assert_eq!(Command::cfgi_cd_all(StreamId(u32::MAX)).0, [0xFFFF_FFFF_0000_0006, 0]);
    }

    #[test]
    fn translations_are_forgotten_by_vmid_by_page_or_all() {
        // K9, K11, K19, K20, K22.
        assert_eq!(Command::tlbi_nh_all(0x2A).0, [0x0000_002A_0000_0010, 0]);
        assert_eq!(
            Command::tlbi_nh_va(0x2A, 7, Iova(0x4020_1000), Part::Leaf).0,
            [0x0007_002A_0000_0012, 0x0000_0000_4020_1001]
        );
        assert_eq!(Command::tlbi_s12_vmall(0x2A).0, [0x0000_002A_0000_0028, 0]);
        assert_eq!(
            Command::tlbi_s2_ipa(0x2A, Iova(0x8020_0000)).0,
            [0x0000_002A_0000_002A, 0x0000_0000_8020_0001]
        );
        assert_eq!(Command::tlbi_nsnh_all().0, [0x30, 0]);
        // K10; K11 and K14 with tables and without: Leaf, bit 0 of w1.
        assert_eq!(Command::tlbi_nh_asid(0x2A, 7).0, [0x0007_002A_0000_0011, 0]);
        assert_eq!(Command::tlbi_nh_asid(0xFFFF, 0xFFFF).0, [0xFFFF_FFFF_0000_0011, 0]);
        assert_eq!(
            Command::tlbi_nh_va(0x2A, 7, Iova(0x4020_1000), Part::Way).0,
            [0x0007_002A_0000_0012, 0x0000_0000_4020_1000]
        );
        let upper = Iova(0xFFFF_0000_1234_5000);
        assert_eq!(Command::tlbi_nh_vaa(0x2A, upper, Part::Way).0, [0x0000_002A_0000_0013, upper.0]);
        assert_eq!(Command::tlbi_nh_vaa(0x2A, upper, Part::Leaf).0, [0x0000_002A_0000_0013, upper.0 | 1]);
        // The widest values: VMID [47:32], ASID [63:48], address [127:76].
        assert_eq!(
            Command::tlbi_s2_ipa(0xFFFF, Iova(u64::MAX)).0,
            [0x0000_FFFF_0000_002A, 0x00FF_FFFF_FFFF_F001]
        );
        assert_eq!(Command::tlbi_nh_all(0xFFFF).0[0], 0x0000_FFFF_0000_0010);
        assert_eq!(
            Command::tlbi_nh_va(0xFFFF, 0xFFFF, Iova(u64::MAX), Part::Leaf).0,
            [0xFFFF_FFFF_0000_0012, 0xFFFF_FFFF_FFFF_F001]
        );
    }

    #[test]
    fn a_device_forgets_a_block_or_everything() {
        // K23, K24.
        assert_eq!(Command::atc_inv(SID, None, Iova(0x1000_0000), 2).0, [0x0000_0108_0000_0040, 0x1000_0002]);
        assert_eq!(Command::atc_inv(SID, None, Iova(0), 52).0, [0x0000_0108_0000_0040, 0x34]);
        assert_eq!(Command::atc_inv(SID, None, Iova(0x7FFF_FFFF_F123), 0).0[1], 0x7FFF_FFFF_F000);
        // K25; and PASID 0, which is one: SSV 1<<11.
        assert_eq!(
            Command::atc_inv(SID, pasid(5), Iova(0x2000_0000), 9).0,
            [0x0000_0108_0000_5840, 0x0000_0000_2000_0009]
        );
        assert_eq!(Command::atc_inv(SID, pasid(0), Iova(0), 52).0, [0x0000_0108_0000_0840, 0x34]);
    }

    #[test]
    fn an_answer_names_device_pasid_group_and_outcome() {
        let answer = |pasid, index, outcome| {
            Command::pri_resp(&PageResponse { stream: SID, tag: GroupTag { pasid, index }, outcome }).0
        };
        // K27, K28, K29.
        assert_eq!(answer(pasid(5), 0x1A3, Outcome::Success), [0x0000_0108_0000_5841, 0x21A3]);
        assert_eq!(answer(None, 3, Outcome::Failure), [0x0000_0108_0000_0041, 0x0003]);
        assert_eq!(answer(None, 3, Outcome::Invalid), [0x0000_0108_0000_0041, 0x1003]);
        // PASID 0 is a PASID: SSV 1<<11. The largest: 0xF_FFFF<<12. A group has nine bits.
        assert_eq!(answer(pasid(0), 0, Outcome::Success), [0x0000_0108_0000_0841, 0x2000]);
        assert_eq!(answer(pasid(0xF_FFFF), 0xFFFF, Outcome::Invalid), [0x0000_0108_FFFF_F841, 0x11FF]);
    }

    #[test]
    fn a_stalled_access_is_tried_again_aborted_or_ended() {
        let resume = |stream, index, outcome| {
            Command::resume(&PageResponse { stream, tag: GroupTag { pasid: pasid(5), index }, outcome }).0
        };
        // K30, K31, K32: the PASID is no part of it.
        assert_eq!(resume(SID, 0x42, Outcome::Success), [0x0000_0108_0000_1044, 0x42]);
        assert_eq!(resume(SID, 0x42, Outcome::Invalid), [0x0000_0108_0000_2044, 0x42]);
        assert_eq!(resume(SID, 0x42, Outcome::Failure), [0x0000_0108_0000_0044, 0x42]);
        // STAG has sixteen bits, [79:64].
        assert_eq!(resume(StreamId(u32::MAX), 0xFFFF, Outcome::Success), [0xFFFF_FFFF_0000_1044, 0xFFFF]);
        // K33.
        assert_eq!(Command::stall_term(SID).0, [0x0000_0108_0000_0045, 0]);
    }

    #[test]
    fn a_sync_signals_nobody() {
        // K34.
        assert_eq!(Command::sync().0, [0x46, 0]);
    }

    #[test]
    fn a_sync_sends_an_event() {
        // K36: CS 2<<12. MSH and MSIAttr are about messages, and stay 0.
        assert_eq!(Command::sync_with_event().0, [0x2046, 0]);
    }
}

mod events {
    use super::*;
    use Access::{PageRequest as Asked, Read, Unknown, Write};
    use FaultReason::*;

    fn decoded(words: [u64; 4]) -> FaultRecord {
        EventRecord(words).decode()
    }

    #[test]
    fn records_decode_as_in_the_manual() {
        let fault = |stream, pasid, access, iova, reason, code| FaultRecord {
            stream: StreamId(stream),
            pasid,
            access,
            iova: Iova(iova),
            reason,
            code,
        };
        // E1 to E12; addresses are those of pages. Of what stage 2 refused, the code has S2 at bit 8 and CLASS at [10:9].
        for (words, expected) in [
            (
                [0x0108_0000_0010, 0x0208_0000_0000, 0x4020_1ABC, 0],
                fault(0x108, None, Read, 0x4020_1000, NotMapped, 0x10),
            ),
            (
                [0x0108_0000_5813, 0x0202_8000_0042, 0x7F00_0000_1000, 0],
                fault(0x108, pasid(5), Write, 0x7F00_0000_1000, NotPermitted, 0x13),
            ),
            ([0x0108_0000_0004, 0, 0, 0], fault(0x108, None, Unknown, 0, NotAttached, 0x04)),
            ([0x01FF_0000_0002, 0, 0, 0], fault(0x1FF, None, Unknown, 0, NotAttached, 0x02)),
            ([0x0108_0000_5809, 0, 0, 0xB001_0140], fault(0x108, pasid(5), Unknown, 0, BadTables, 0x09)),
            ([0x0108_0000_0003, 0, 0, 0x8800_4200], fault(0x108, None, Unknown, 0, BadTables, 0x03)),
            (
                [0x0108_0000_0010, 0x0288_0000_0000, 0x4020_1ABC, 0x9020_1000],
                fault(0x108, None, Read, 0x4020_1000, NotMapped, 0x510),
            ),
            (
                [0x0108_0000_0010, 0x0188_0000_0000, 0x4020_1ABC, 0x9100_0000],
                fault(0x108, None, Read, 0x4020_1000, BadTables, 0x310),
            ),
            (
                [0x0108_0000_0010, 0x0088_0000_0000, 0x4020_1ABC, 0xA000_0000],
                fault(0x108, None, Read, 0x4020_1000, BadTables, 0x110),
            ),
            // RnW is 0: a write whose walk met bad memory.
            (
                [0x0108_0000_000B, 0x0100_0000_0000, 0x4020_1ABC, 0x1_0203_00A8],
                fault(0x108, None, Write, 0x4020_1000, BadTables, 0x0B),
            ),
            ([0x0108_0002_0008, 0, 0, 0], fault(0x108, pasid(0x20), Unknown, 0, NotAttached, 0x08)),
            (
                [0x0108_0000_0011, 0x0280_0000_0000, 0x1000, 0x0100_0000_1000],
                fault(0x108, None, Write, 0x1000, AddressSize, 0x511),
            ),
        ] {
            assert_eq!(decoded(words), expected, "{words:#x?}");
        }
    }

    /// "Event records", those that the rows of the fact sheet leave out, with every field of theirs that is not reserved. SSV is
    /// 1<<11, a Reason or STAG in the low half of w1; PnU, InD, RnW 1<<33 to 1<<35, S2 1<<39, CLASS from 1<<40.
    #[test]
    fn records_decode_with_every_field_set() {
        let fault = |pasid, access, iova, reason, code| FaultRecord {
            stream: SID,
            pasid,
            access,
            iova: Iova(iova),
            reason,
            code,
        };
        let upper = 0xFFFF_8000_0000_1ABC;
        for (words, expected) in [
            // F_UUT: all of Reason, and a privileged fetch of an instruction.
            (
                [0x0108_0000_5801, 0x000E_FFFF_FFFF, upper, 0],
                fault(pasid(5), Read, 0xFFFF_8000_0000_1000, Other, 0x01),
            ),
            // C_BAD_STREAMID, C_BAD_CD and C_BAD_STE may have a SubstreamID; F_STREAM_DISABLED has none.
            ([0x0108_0000_5802, 0, 0, 0], fault(pasid(5), Unknown, 0, NotAttached, 0x02)),
            ([0x0108_0000_5804, 0, 0, 0], fault(pasid(5), Unknown, 0, NotAttached, 0x04)),
            ([0x0108_0000_0006, 0, 0, 0], fault(None, Unknown, 0, NotAttached, 0x06)),
            ([0x0108_FFFF_F80A, 0, 0, 0], fault(pasid(0xF_FFFF), Unknown, 0, NotAttached, 0x0A)),
            // F_TRANSL_FORBIDDEN, a read.
            (
                [0x0108_0000_0007, 0x0008_0000_0000, 0x8000_1ABC, 0],
                fault(None, Read, 0x8000_1000, NotAttached, 0x07),
            ),
            // F_ACCESS, stage 1: CLASS 2. F_PERMISSION of stage 2 on a table of the first: S2, CLASS 1; the IPA is not told.
            (
                [0x0108_FFFF_F812, 0x0200_0000_0000, upper, 0],
                fault(pasid(0xF_FFFF), Write, 0xFFFF_8000_0000_1000, NotPermitted, 0x12),
            ),
            (
                [0x0108_0000_0013, 0x0180_0000_0000, 0x5ABC, 0x000F_FFFF_FFFF_F000],
                fault(None, Write, 0x5000, BadTables, 0x313),
            ),
            // F_TLB_CONFLICT: Reason, and RnW.
            ([0x0108_0000_5820, 0x0008_0000_FFFF, 0x5ABC, 0], fault(pasid(5), Read, 0x5000, BadTables, 0x20)),
            // F_CFG_CONFLICT: Reason. F_VMS_FETCH: Reason, GPCF 1<<16, FetchAddr, which is not told.
            ([0x0108_0000_5821, 0xFFFF, 0, 0], fault(pasid(5), Unknown, 0, BadTables, 0x21)),
            (
                [0x0108_0000_5825, 0x1_FFFF, 0, 0x00FF_FFFF_FFFF_FFF8],
                fault(pasid(5), Unknown, 0, BadTables, 0x25),
            ),
        ] {
            assert_eq!(decoded(words), expected, "{words:#x?}");
        }
    }

    #[test]
    fn the_direction_is_told_where_the_record_has_one() {
        // RnW is [99], 1<<35 of w1: F_UUT, F_TRANSL_FORBIDDEN, F_WALK_EABT, 10 to 13, F_TLB_CONFLICT.
        for number in [0x01, 0x07, 0x0B, 0x10, 0x11, 0x12, 0x13, 0x20] {
            assert_eq!(decoded([number, 1 << 35, 0x5000, 0]).access, Read, "{number:#x}");
            assert_eq!(decoded([number, 0, 0x5000, 0]).access, Write, "{number:#x}");
            assert_eq!(decoded([number, 0, 0x5000, 0]).iova, Iova(0x5000), "{number:#x}");
        }
        // F_BAD_ATS_TREQ: W is [94], 1<<30 of w1; R, 1<<31, is always 1.
        let [read, write] = [0x8000_0000, 0xC000_0000].map(|w1| decoded([0x05, w1, 0x5000, 0]));
        assert_eq!((read.access, write.access, write.iova), (Read, Write, Iova(0x5000)));
        // E_PAGE_REQUEST.
        let hint = decoded([0x24, 0, 0x5000, 0]);
        assert_eq!((hint.access, hint.iova, hint.reason), (Asked, Iova(0x5000), Other));
        // Events about configuration, and those that nobody knows, have neither, whatever the reserved words hold.
        for number in [0x02, 0x03, 0x04, 0x06, 0x08, 0x09, 0x0A, 0x21, 0x25, 0x14, 0xFF] {
            let fault = decoded([number, 0, u64::MAX, u64::MAX]);
            assert_eq!((fault.access, fault.iova), (Unknown, Iova(0)), "{number:#x}");
        }
    }

    #[test]
    fn every_event_of_the_manual_has_its_reason() {
        for (numbers, reason) in [
            (&[0x02, 0x04, 0x05, 0x06, 0x07, 0x08, 0x0A][..], NotAttached),
            (&[0x10], NotMapped),
            (&[0x11], AddressSize),
            (&[0x12, 0x13], NotPermitted),
            (&[0x03, 0x09, 0x0B, 0x20, 0x21, 0x25], BadTables),
            // F_UUT, and numbers that are nobody's or the implementer's.
            (&[0x00, 0x01, 0x14, 0x24, 0xE0, 0xFF], Other),
        ] {
            for &number in numbers {
                let fault = decoded([number, 0, 0, 0]);
                assert_eq!((fault.reason, fault.code), (reason, number as u16), "{number:#x}");
            }
        }
    }
}

mod requests {
    use super::*;

    fn request(pasid: Option<Pasid>, index: u16, iova: u64, perms: Perms, last: bool) -> Event {
        let tag = GroupTag { pasid, index };
        Event::PageRequest(PageRequest { stream: SID, tag, iova: Iova(iova), perms, last })
    }

    #[test]
    fn entries_decode_as_in_the_manual() {
        let (execute, privileged) =
            (Perms { execute: true, ..NOTHING }, Perms { privileged: true, ..NOTHING });
        for (words, expected) in [
            // P1 to P4, and P4 without SSV: no stop marker, and it wants an answer.
            (
                [0xF000_0005_0000_0108, 0x7F00_0000_11A3],
                request(pasid(5), 0x1A3, 0x7F00_0000_1000, Perms::READ_WRITE, true),
            ),
            ([0x1000_0000_0000_0108, 0x4020_1003], request(None, 3, 0x4020_1000, READ, false)),
            ([0x5000_0000_0000_0108, 0x4020_2003], request(None, 3, 0x4020_2000, READ, true)),
            ([0xC000_0005_0000_0108, 0], Event::StopMarker { stream: SID, pasid: pasid(5) }),
            ([0x4000_0000_0000_0108, 0], request(None, 0, 0, NOTHING, true)),
            // Asks for nothing and is not the last: a part of a group. SSV 1<<63.
            ([0x8000_0005_0000_0108, 0x1001], request(pasid(5), 1, 0x1000, NOTHING, false)),
            // Bit by bit: Priv 1<<58, X 1<<59, R 1<<60, W 1<<61.
            ([0x0400_0000_0000_0108, 0], request(None, 0, 0, privileged, false)),
            ([0x0800_0000_0000_0108, 0], request(None, 0, 0, execute, false)),
            ([0x2000_0000_0000_0108, 0], request(None, 0, 0, Perms { write: true, ..NOTHING }, false)),
            // The SubstreamID is unknown without SSV, and the largest with it; [75:73] are reserved.
            (
                [0x100F_FFFF_0000_0108, 0xFFFF_FFFF_FFFF_FFFF],
                request(None, 0x1FF, 0xFFFF_FFFF_FFFF_F000, READ, false),
            ),
            ([0x900F_FFFF_0000_0108, 0], request(pasid(0xF_FFFF), 0, 0, READ, false)),
        ] {
            assert_eq!(RequestEntry(words).decode(), expected, "{words:#x?}");
        }
    }
}
