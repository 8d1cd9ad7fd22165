//! The arrays in which guests ask for invalidations. The words are worked out from the field tables of the manuals: commands
//! of SMMUv3 in Arm IHI 0070, "Commands".
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use channel::invalidate::{Handled, Layout, Range, Refusal, Refused, Request, VirtualStream, handle};
use iommu::{Iova, Pasid};

/// What a guest calls a device.
const SID: VirtualStream = VirtualStream(0x108);

fn pages(first: u64, pages: u64) -> Range {
    Range::Pages { first: Iova(first), pages }
}

/// Decodes one entry.
fn one(layout: Layout, entry: &[u64]) -> Result<Request, Refusal> {
    let mut seen = None;
    let handled = handle(layout, entry, 1, |request| {
        assert_eq!(seen.replace(request), None, "one entry is one request");
        Ok(())
    });
    assert_eq!((handled.handled == 1, handled.more), (handled.refusal.is_none(), false));
    handled.refusal.map_or_else(|| Ok(seen.expect("it was handled")), Err)
}

fn command(words: [u64; 2]) -> Result<Request, Refusal> {
    one(Layout::SmmuCommand, &words)
}

#[test]
fn commands_ask_for_what_the_manual_says() {
    let asid = |asid, range, leaf| Request::Stage1 { asid, range, leaf };
    let contexts = |pasid, leaf| Request::Contexts { device: SID, pasid, leaf };
    let tlb = |pasid, global, range| Request::DeviceTlb { device: SID, pasid, global, range };
    let five = Pasid::new(5);
    for (words, expected) in [
        // CFGI_CD: SSID in 31:12, SID in 63:32; leaf, and not.
        ([0x0000_0108_0000_5005, 1], contexts(five, true)),
        ([0x0000_0108_0000_0005, 0], contexts(Pasid::new(0), false)),
        ([0x0000_0108_FFFF_F005, 0], contexts(Pasid::new(0xF_FFFF), false)),
        // CFGI_CD_ALL.
        ([0x0000_0108_0000_0006, 0], contexts(None, false)),
        // TLBI_NH_ALL, of VMID 2A and of 0; TLBI_NSNH_ALL.
        ([0x0000_002A_0000_0010, 0], asid(None, Range::All, false)),
        ([0x0000_0000_0000_0010, 0], asid(None, Range::All, false)),
        ([0x0000_0000_0000_0030, 0], asid(None, Range::All, false)),
        // TLBI_NH_ASID: ASID in 63:48.
        ([0x0007_002A_0000_0011, 0], asid(Some(7), Range::All, false)),
        ([0xFFFF_0000_0000_0011, 0], asid(Some(0xFFFF), Range::All, false)),
        // TLBI_NH_VA, one page, leaf.
        ([0x0007_002A_0000_0012, 0x4020_1001], asid(Some(7), pages(0x4020_1000, 1), true)),
        // A range: 4 KiB granule (TG 1 in 75:74), level 3 (TTL in 73:72), (0 + 1) * 2^9 of them; (4 + 1) * 2^0.
        ([0x0007_002A_0090_0012, 0x4020_0701], asid(Some(7), pages(0x4020_0000, 512), true)),
        ([0x0007_0000_0000_4012, 0x4020_5701], asid(Some(7), pages(0x4020_5000, 5), true)),
        // 16 KiB (TG 2): 2 granules are 8 pages; 64 KiB (TG 3), no level: 1 * 2^1 granules are 32 pages.
        ([0x0007_0000_0000_1012, 0x4000_0B01], asid(Some(7), pages(0x4000_0000, 8), true)),
        ([0x0007_0000_0010_0012, 0x4000_0C00], asid(Some(7), pages(0x4000_0000, 32), false)),
        // A range starts with a whole granule, here of 64 KiB.
        ([0x0007_0000_0000_0012, 0x4000_FF00], asid(Some(7), pages(0x4000_0000, 16), false)),
        // The longest: 2^5 * 2^31 granules of 64 KiB from 0.
        ([0x0000_0000_01F1_F012, 0x0000_0F00], asid(Some(0), pages(0, 1 << 40), false)),
        // One that would go on at address zero ends with the last page.
        (
            [0x0000_0000_01F0_0012, 0xFFFF_FFFF_FFFF_F500],
            asid(Some(0), pages(0xFFFF_FFFF_FFFF_F000, 1), false),
        ),
        // TLBI_NH_VAA, not leaf.
        ([0x0000_002A_0000_0013, 0xFFFF_0000_1234_5000], asid(None, pages(0xFFFF_0000_1234_5000, 1), false)),
        // ATC_INV: 4 pages; all; PASID 5 and 512 pages; PASID 0, global, all.
        ([0x0000_0108_0000_0040, 0x1000_0002], tlb(None, false, pages(0x1000_0000, 4))),
        ([0x0000_0108_0000_0040, 0x34], tlb(None, false, Range::All)),
        ([0x0000_0108_0000_5840, 0x2000_0009], tlb(five, false, pages(0x2000_0000, 512))),
        ([0x0000_0108_0000_0A40, 0x34], tlb(Pasid::new(0), true, Range::All)),
        // The unit aligns the address to the span: 2^2 pages around 0x1000_3000; 2^51 around the last.
        ([0x0000_0108_0000_0040, 0x1000_3002], tlb(None, false, pages(0x1000_0000, 4))),
        ([0x0000_0108_0000_0040, 0xFFFF_FFFF_FFFF_F033], tlb(None, false, pages(1 << 63, 1 << 51))),
        // Without SSV (bit 11) neither Global nor the PASID counts.
        ([0x0000_0108_0000_5240, 0x34], tlb(None, false, Range::All)),
    ] {
        assert_eq!(command(words), Ok(expected), "{words:#x?}");
    }
}

/// Opcode, and what may be set in each word besides it: the manual's fields, as masks written by hand.
///
/// VMID 47:32 (and with the ASID, 63:32), NUM 16:12, SCALE 24:20, SSID 31:12, SID 63:32; Leaf 64, TTL 73:72, TG 75:74, address
/// 127:76, Size 69:64. SSec (10), TTL128 (71), the sixth bit of SCALE (25) are none of a guest's.
const FIELDS: [(u64, u64, u64); 8] = [
    (0x05, 0xFFFF_FFFF_FFFF_F000, 0x0000_0000_0000_0001),
    (0x06, 0xFFFF_FFFF_0000_0000, 0x0000_0000_0000_0000),
    (0x10, 0x0000_FFFF_0000_0000, 0x0000_0000_0000_0000),
    (0x11, 0xFFFF_FFFF_0000_0000, 0x0000_0000_0000_0000),
    (0x12, 0xFFFF_FFFF_01F1_F000, 0xFFFF_FFFF_FFFF_FF01),
    (0x13, 0x0000_FFFF_01F1_F000, 0xFFFF_FFFF_FFFF_FF01),
    (0x30, 0x0000_0000_0000_0000, 0x0000_0000_0000_0000),
    (0x40, 0xFFFF_FFFF_FFFF_FA00, 0xFFFF_FFFF_FFFF_F03F),
];

#[test]
fn every_bit_of_every_command_that_is_reserved_is_refused_and_every_other_is_taken() {
    for (opcode, low, high) in FIELDS {
        for bit in 8..128 {
            let (word, bits) = (bit / 64, 1_u64 << (bit % 64));
            let mut words = [opcode, 0];
            words[word] |= bits;
            let found = command(words);

            if [low, high][word] & bits == 0 {
                let refusal = Refusal { why: Refused::Bits, word: word as u32, bits };
                assert_eq!(found, Err(refusal), "opcode {opcode:#x}, bit {bit}");
                assert_eq!(refusal.values(), [(word as u64) << 32 | 2, bits]);
            } else if matches!(opcode, 0x12 | 0x13)
                && [12..=16, 20..=24, 72..=73].iter().any(|r| r.contains(&bit))
            {
                // NUM, SCALE and TTL are a range's, and without TG there is none.
                assert_eq!(found.map_err(|refusal| refusal.why), Err(Refused::Size), "bit {bit}");
            } else if matches!(opcode, 0x12 | 0x13) && (74..=75).contains(&bit) {
                // A granule alone is the range that the manual calls illegal.
                assert_eq!(found.map_err(|refusal| refusal.why), Err(Refused::Size), "bit {bit}");
            } else {
                assert!(found.is_ok(), "opcode {opcode:#x}, bit {bit}: {found:?}");
            }
        }
    }
}

#[test]
fn all_that_a_command_may_say_at_once_is_taken() {
    for (opcode, low, high) in FIELDS {
        // Size stands for nothing beyond 52.
        let high = if opcode == 0x40 { high & !0x3F | 52 } else { high };
        assert!(command([opcode | low, high]).is_ok(), "opcode {opcode:#x}");
    }
}

#[test]
fn every_other_opcode_is_refused_by_its_number() {
    for opcode in (0..=0xFF).filter(|opcode| FIELDS.iter().all(|(taken, ..)| taken != opcode)) {
        let refusal = Refusal { why: Refused::Opcode, word: 0, bits: opcode };
        assert_eq!(command([opcode, 0]), Err(refusal));
        assert_eq!(command([opcode | 0xFFFF_FFFF_FFFF_FF00, u64::MAX]), Err(refusal));
        assert_eq!(refusal.values(), [1, opcode]);
    }
}

#[test]
fn neither_the_vmid_nor_a_stream_of_the_machine_comes_out_of_a_command() {
    for (opcode, ..) in FIELDS.iter().filter(|(opcode, ..)| matches!(opcode, 0x10..=0x13)) {
        let with = |vmid: u64| command([opcode | vmid << 32, 0]);
        assert!(with(0).is_ok());
        assert_eq!(with(0x2A), with(0));
        assert_eq!(with(0xFFFF), with(0));
    }
    // The names of devices come out as names that only their guest knows.
    assert!(matches!(
        command([0xFFFF_FFFF_0000_0006, 0]),
        Ok(Request::Contexts { device: VirtualStream(0xFFFF_FFFF), .. })
    ));
}

#[test]
fn sizes_that_the_manual_calls_illegal_or_unknown_are_refused() {
    let refused = |words| command(words).map_err(|refusal| (refusal.why, refusal.word, refusal.bits));
    // TG, and NUM, SCALE and TTL zero.
    for granule in 1..4_u64 {
        assert_eq!(refused([0x12, granule << 10]), Err((Refused::Size, 1, granule << 10)));
    }
    // NUM, SCALE and TTL without TG.
    assert_eq!(refused([0x13 | 1 << 12, 0]), Err((Refused::Size, 1, 0)));
    assert_eq!(refused([0x13 | 1 << 20, 0]), Err((Refused::Size, 1, 0)));
    assert_eq!(refused([0x13, 3 << 8]), Err((Refused::Size, 1, 3 << 8)));
    // 16 KiB at level 1, which needs addresses of 52 bits.
    assert_eq!(refused([0x12 | 1 << 12, 0x900]), Err((Refused::Size, 1, 0x900)));
    assert!(command([0x12 | 1 << 12, 0x500]).is_ok() && command([0x12 | 1 << 12, 0xD00]).is_ok());
    // ATC_INV of more than everything.
    for size in 0..64 {
        let expected = if size > 52 { Err((Refused::Size, 1, size)) } else { Ok(()) };
        assert_eq!(refused([0x40, size]).map(|_| ()), expected, "size {size}");
    }
}

#[test]
fn pages_of_an_attachment_are_asked_for_in_four_words() {
    let request = |attachment, range, leaf| Ok(Request::Attachment { attachment, range, leaf });
    for layout in [Layout::Pages, Layout::VtdStage1] {
        assert_eq!(one(layout, &[7, 0x5000, 3, 0]), request(7, pages(0x5000, 3), false));
        assert_eq!(one(layout, &[u64::MAX, 0, 1, 1]), request(u64::MAX, pages(0, 1), true));
        // The last page; every page there is.
        let last = 0xFFFF_FFFF_FFFF_F000;
        assert_eq!(one(layout, &[7, last, 1, 1]), request(7, pages(last, 1), true));
        assert_eq!(one(layout, &[7, 0, 1 << 52, 0]), request(7, pages(0, 1 << 52), false));
        // No page; one more than there are, from the last and from the first.
        for (first, count) in
            [(0x5000, 0), (last, 2), (0, (1 << 52) + 1), (0x5000, u64::MAX), (last, u64::MAX)]
        {
            let refusal = Refusal { why: Refused::Range, word: 2, bits: count };
            assert_eq!(one(layout, &[7, first, count, 0]), Err(refusal), "{count:#x} from {first:#x}");
        }
    }
    // All of it is what a guest can say of a first stage of its own.
    assert_eq!(one(Layout::VtdStage1, &[7, 0, u64::MAX, 1]), request(7, Range::All, true));
    let refusal = Refusal { why: Refused::Range, word: 2, bits: u64::MAX };
    assert_eq!(one(Layout::Pages, &[7, 0, u64::MAX, 1]), Err(refusal));
}

#[test]
fn every_bit_of_an_entry_of_pages_that_has_no_meaning_is_refused() {
    for layout in [Layout::Pages, Layout::VtdStage1] {
        for (word, bit) in (0..12).map(|bit| (1, bit)).chain((1..64).map(|bit| (3, bit))) {
            let mut entry = [7, 0x5000, 1, 1];
            entry[word] |= 1 << bit;
            let refusal = Refusal { why: Refused::Bits, word: word as u32, bits: 1 << bit };
            assert_eq!(one(layout, &entry), Err(refusal));
        }
        for (word, bit) in (0..64).map(|bit| (0, bit)).chain((12..64).map(|bit| (1, bit))) {
            let mut entry = [0, 0, 1, 1];
            entry[word] |= 1 << bit;
            assert!(one(layout, &entry).is_ok(), "word {word}, bit {bit}");
        }
    }
}

/// An array of `count` commands for ASIDs 0, 1, 2...
fn asids(count: u64) -> Vec<u64> {
    (0..count).flat_map(|asid| [asid << 48 | 0x11, 0]).collect()
}

/// Handles `words`; returns how far that came, and the ASIDs.
fn handle_asids(words: &[u64], budget: usize) -> (Handled, Vec<u16>) {
    let mut seen = Vec::new();
    let handled = handle(Layout::SmmuCommand, words, budget, |request| {
        let Request::Stage1 { asid: Some(asid), .. } = request else { panic!("{request:?}") };
        seen.push(asid);
        Ok(())
    });
    (handled, seen)
}

#[test]
fn an_array_is_handled_up_to_its_first_bad_entry() {
    let mut words = asids(5);
    // A CMD_SYNC in place 3: it would wait for everybody's commands.
    words[6] = 0x46;

    let (handled, seen) = handle_asids(&words, 16);

    let refusal = Some(Refusal { why: Refused::Opcode, word: 0, bits: 0x46 });
    assert_eq!((handled, seen), (Handled { handled: 3, refusal, more: false }, vec![0, 1, 2]));
}

#[test]
fn an_array_that_is_too_much_for_one_call_goes_on_where_it_stopped() {
    let words = asids(40);
    let (mut at, mut all, mut calls) = (0, Vec::new(), 0);
    loop {
        let (handled, seen) = handle_asids(&words[at * 2..], 7);
        assert_eq!((handled.refusal, handled.handled), (None, seen.len()));
        assert!(seen.len() <= 7);
        (at, calls) = (at + handled.handled, calls + 1);
        all.extend(seen);
        if !handled.more {
            break;
        }
    }
    assert_eq!((calls, all), (6, (0..40).collect()));

    // 16 entries a call, however large the budget; none without one.
    assert_eq!(handle_asids(&words, usize::MAX).0, Handled { handled: 16, refusal: None, more: true });
    assert_eq!(handle_asids(&words, 0).0, Handled { handled: 0, refusal: None, more: true });
    assert_eq!(handle_asids(&words[..32], 16).0, Handled { handled: 16, refusal: None, more: false });
}

#[test]
fn an_entry_for_everything_counts_as_one() {
    let everything = [7, 0, 1 << 52, 0, 7, 0, u64::MAX, 0];
    let mut requests = 0;

    let handled = handle(Layout::VtdStage1, &everything, 2, |_| {
        requests += 1;
        Ok(())
    });

    assert_eq!((handled, requests), (Handled { handled: 2, refusal: None, more: false }, 2));
}

#[test]
fn an_empty_array_asks_for_nothing() {
    for layout in [Layout::Pages, Layout::VtdStage1, Layout::SmmuCommand] {
        let handled = handle(layout, &[], 16, |request| panic!("{request:?}"));
        assert_eq!(handled, Handled { handled: 0, refusal: None, more: false });
    }
    // That is how a guest asks whether there is a type; these are all, for ever by these numbers.
    let known = |number| Layout::from_number(number);
    assert_eq!([1, 2, 3].map(known), [Layout::Pages, Layout::VtdStage1, Layout::SmmuCommand].map(Some));
    assert_eq!([0, 4, u64::MAX].map(known), [None; 3]);
}

#[test]
fn whoever_knows_the_names_may_refuse_them() {
    let words = [7, 0x1000, 1, 0, 8, 0x1000, 1, 0, 9, 0x1000, 1, 0];
    let refusal = Refusal { why: Refused::NotYours, word: 0, bits: 8 };
    let mut seen = 0;

    let handled = handle(Layout::Pages, &words, 16, |request| {
        seen += 1;
        let Request::Attachment { attachment, .. } = request else { panic!("{request:?}") };
        if attachment == 8 { Err(refusal) } else { Ok(()) }
    });

    assert_eq!((handled, seen), (Handled { handled: 1, refusal: Some(refusal), more: false }, 2));
}
