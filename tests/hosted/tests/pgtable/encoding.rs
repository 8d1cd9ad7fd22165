//! What entries say: words worked out from the manuals, and every combination there and back.

use crate::{Kind, device_walk, frames, in_every_format, map};
use iommu::Perms;
use models::memory::Memory as Ram;
use pgtable::{
    Attributes, Dirty, Error, Format, Gather, Limits, LongMode, Memory, Stage1, Stage2, SvmNested, Tree,
    VtdFirstStage, VtdSecondStage,
};

fn all_attributes() -> impl Iterator<Item = Attributes> {
    let perms = (0..16_u32).map(|n| Perms {
        read: n & 1 != 0,
        write: n & 2 != 0,
        execute: n & 4 != 0,
        privileged: n & 8 != 0,
    });
    perms.flat_map(|perms| {
        [Memory::WriteBack, Memory::Uncached, Memory::Device].into_iter().flat_map(move |memory| {
            [Dirty::Untracked, Dirty::Clean, Dirty::Dirty].into_iter().flat_map(move |dirty| {
                [true, false].map(|accessed| Attributes { perms, memory, accessed, dirty })
            })
        })
    })
}

fn what_is_decoded_encodes_to_the_same<F: Format>(kind: Kind) {
    let (memory, mut frames) = frames(4);
    let tree = Tree::<F>::new(&mut frames, Limits::NONE).expect("a frame");
    let page = 1 << F::LAYOUT.page_bits;
    let (mut possible, mut refused) = (0, 0);

    for attributes in all_attributes() {
        match map(&tree, &mut frames, page, 0x4000_0000, page, attributes) {
            Ok(()) => possible += 1,
            Err(error) => {
                let Attributes { perms, memory, .. } = attributes;
                let no_reads = !perms.read
                    && !matches!((kind, perms.write), (Kind::SecondStage { .. }, true))
                    && !matches!((kind, perms.write), (Kind::Arm { stage: 2, .. }, true));
                let no_privilege = perms.privileged
                    && !matches!(kind, Kind::LongMode { nested: false, .. } | Kind::Arm { stage: 1, .. });
                let expected = if no_reads || no_privilege { Error::Permissions } else { Error::Memory };
                assert_eq!(error, expected, "{attributes:?}");
                assert!(error == Error::Permissions || memory != Memory::WriteBack);
                refused += 1;
                continue;
            }
        }
        let leaf = tree.translate(&frames, page).expect("it was mapped");
        let seen = device_walk(&memory, kind, tree.root(), page).expect("it was mapped");
        assert_eq!((seen.read, seen.write), (attributes.perms.read, attributes.perms.write));
        assert!(seen.execute || !attributes.perms.execute);
        assert_eq!((seen.accessed, seen.privileged), (attributes.accessed, attributes.perms.privileged));
        let mut gather = Gather::new();
        tree.unmap(&mut frames, page, page, &mut gather).expect("it is mapped");

        map(&tree, &mut frames, page, 0x4000_0000, page, leaf.attributes()).expect("there is such a leaf");
        let again = tree.translate(&frames, page).expect("it was mapped");
        assert_eq!(again.entry(), leaf.entry(), "{attributes:?} {:?}", leaf.attributes());
        tree.unmap(&mut frames, page, page, &mut gather).expect("it is mapped");
        gather.give_back(&mut frames);
    }
    assert!(possible > 10 && refused > 10, "{possible} {refused}");
    tree.take_down(&mut frames);
}

#[test]
fn attributes_decoded_from_an_entry_encode_to_the_same_entry() {
    in_every_format!(what_is_decoded_encodes_to_the_same);
}

/// The entry of level 1, or of the first level with a leaf, for `bytes` bytes at `phys`.
fn entry<F: Format>(phys: u64, bytes: u64, attributes: impl Into<Attributes>) -> u64 {
    let mut frames = hosted::TableFrames::new(Ram::new(8 * 16 * 8192), usize::MAX);
    let tree = Tree::<F>::new(&mut frames, Limits::NONE).expect("a frame");
    map(&tree, &mut frames, 0, phys, bytes, attributes).expect("there is room");
    tree.translate(&frames, 0).expect("it is mapped").entry()
}

#[test]
fn entries_are_the_words_of_the_manuals() {
    const RWX: Perms = Perms { execute: true, ..Perms::READ_WRITE };
    const RX: Perms = Perms { execute: true, ..Perms::READ };
    const READ: Perms = Perms::READ;
    let device = |perms| Attributes { memory: Memory::Device, ..perms };
    let clean = |perms: Perms| Attributes { dirty: Dirty::Clean, ..perms.into() };
    let (kib4, mib2, gib1) = (1 << 12, 1 << 21, 1 << 30);

    // P 1, R/W 2, U/S 4, A 0x20, D 0x40, PS 0x80, XD 1 << 63.
    assert_eq!(entry::<VtdFirstStage>(0x8000_0000, kib4, Perms::READ_WRITE), 0x8000_0067);
    assert_eq!(entry::<VtdFirstStage<5>>(0x8000_0000, kib4, READ), 0x8000_0025);
    assert_eq!(entry::<LongMode>(0x8020_0000, mib2, Perms::READ_WRITE), 0x8000_0000_8020_00E7);
    assert_eq!(entry::<LongMode>(0x8020_0000, mib2, clean(RWX)), 0x8020_00A7);
    let privileged = Perms { privileged: true, ..RX };
    assert_eq!(entry::<LongMode>(0x1000, kib4, privileged), 0x1021);
    assert_eq!(entry::<SvmNested>(0x4000_0000, gib1, RWX), 0x4000_00E7);
    assert_eq!(entry::<SvmNested>(0x1000, kib4, device(RWX.into())), 0x107F);
    // R 1, W 2, PS 0x80, A 0x100, D 0x200.
    assert_eq!(entry::<VtdSecondStage>(0x8000_0000, kib4, Perms::READ_WRITE), 0x8000_0303);
    assert_eq!(entry::<VtdSecondStage<3>>(0x8020_0000, mib2, READ), 0x8020_0181);
    let write_only = Perms { read: false, ..Perms::READ_WRITE };
    assert_eq!(entry::<VtdSecondStage<5>>(0x4000_0000, gib1, clean(write_only)), 0x4000_0182);
    // SNP 0x800.
    assert_eq!(entry::<VtdSecondStage<4, true>>(0x12_3456_7000, kib4, Perms::READ_WRITE), 0x12_3456_7B03);
    assert_eq!(entry::<VtdSecondStage<4, true>>(0x8020_0000, mib2, READ), 0x8020_0981);
    // The fact sheet's D1 to D3, D5 and D7, with MAIR attribute 0 for write-back.
    assert_eq!(entry::<Stage1>(0x8000_0000, kib4, RWX), 0x8000_0F43);
    assert_eq!(entry::<Stage1>(0x8000_0000, kib4, READ), 0x0060_0000_8000_0FC3);
    assert_eq!(entry::<Stage1>(0x8020_0000, mib2, clean(RWX)), 0x0008_0000_8020_0FC1);
    assert_eq!(entry::<Stage2>(0x8000_0000, kib4, RWX), 0x8000_07FF);
    assert_eq!(
        entry::<Stage2<12, 44>>(0x0900_0000, kib4, device(Perms::READ_WRITE.into())),
        0x0040_0000_0900_06C7
    );
    // 52 bits: address bits 51:48 in 15:12 with 64 KiB, 51:50 in 9:8 with the others.
    assert_eq!(entry::<Stage2<16, 52>>(0x000A_1234_5678_0000, 1 << 16, RWX), 0x1234_5678_A7FF);
    assert_eq!(entry::<Stage1<12, 52>>(0x000B_0000_0000_1000, kib4, RWX), 0x0003_0000_0000_1E43);
    assert_eq!(entry::<Stage2<14, 52>>(0x000C_0000_0000_4000, 1 << 14, RX), 0x47FF & !0x380 | 0x300);
}
