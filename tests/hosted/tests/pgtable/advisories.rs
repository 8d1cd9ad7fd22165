//! Bugs that others had in their tables: each line of their advisories that is about tables and superpages, by its number.
//!
//! One has no test here. XSA-285: a page became somebody else's while a table was filled. Whose a page is, is not for the tables
//! to know: they map what a `Grant` promises, all of it in one call, under the lock of whoever made the promise.

use crate::{Kind, Perms, device_walk, frames, in_every_format, map, unmap};
use hosted::TableFrames;
use iommu::PAGE_SIZE;
use models::memory::Memory;
use pgtable::{Error, Format, Gather, Limits, LongMode, Tree, VtdFirstStage, VtdSecondStage};

const MIB2: u64 = 2 << 20;
const GIB1: u64 = 1 << 30;

#[test]
fn xsa_207_a_tree_in_which_nothing_was_mapped_gives_its_frames_back() {
    let (_, mut frames) = frames(1);

    for _ in 0..10_000 {
        let tree = Tree::<VtdFirstStage>::new(&mut frames, Limits::NONE).expect("a frame");
        tree.take_down(&mut frames);
    }

    assert_eq!(frames.in_use(), 0);
}

#[test]
fn xsa_222_and_346_a_table_is_free_when_its_invalidation_has_completed_and_never_if_it_has_not() {
    let (_, mut frames) = frames(1);
    let tree = Tree::<VtdSecondStage>::new(&mut frames, Limits::PAGES).expect("a frame");
    map(&tree, &mut frames, 0, 0, 2 * MIB2, Perms::READ).expect("there is room");
    let in_use = frames.in_use();

    let mut first = Gather::new();
    tree.unmap(&mut frames, 0, MIB2, &mut first).expect("it is mapped");
    let mut second = Gather::new();
    tree.unmap(&mut frames, MIB2, MIB2, &mut second).expect("it is mapped");
    assert!(first.tables_went() && second.tables_went());
    assert_eq!(frames.in_use(), in_use, "both wait");
    first.give_back(&mut frames);
    assert_eq!(frames.in_use(), in_use - 1);
    drop(second);

    tree.take_down(&mut frames);
    assert_eq!(frames.in_use(), 1, "what was not invalidated is not used again");
}

#[test]
fn xsa_275_large_replaces_small_and_small_large_and_every_leaf_that_was_is_gathered() {
    let (memory, mut frames) = frames(1);
    let kind = Kind::LongMode { levels: 4, execute_disable: true, nested: false };
    let tree = Tree::<LongMode>::new(&mut frames, Limits::NONE).expect("a frame");
    let leaf = |at| device_walk(&memory, kind, tree.root(), at).map(|seen| seen.leaf_bytes);

    for round in 0..10 {
        // Small: one page after the other, in memory that would fit one leaf, is never merged.
        for at in (0..MIB2).step_by(PAGE_SIZE as usize) {
            map(&tree, &mut frames, at, GIB1 + at, PAGE_SIZE, Perms::READ).expect("nothing is there");
        }
        assert_eq!((leaf(0), leaf(MIB2 - 1)), (Some(PAGE_SIZE), Some(PAGE_SIZE)));
        assert_eq!(map(&tree, &mut frames, 0, GIB1, MIB2, Perms::READ), Err(Error::Mapped { address: 0 }));
        let small = unmap(&tree, &mut frames, 0, MIB2).expect("all is mapped");
        assert_eq!(small.iter().map(|range| (range.start(), range.bytes())).collect::<Vec<_>>(), [(0, MIB2)]);
        assert_eq!((small[0].leaf_bytes(), small[0].tables_went()), (PAGE_SIZE, true), "round {round}");
        // Large.
        map(&tree, &mut frames, 0, GIB1, MIB2, Perms::READ).expect("nothing is there");
        assert_eq!(leaf(PAGE_SIZE), Some(MIB2));
        let large = unmap(&tree, &mut frames, 0, MIB2).expect("it is mapped");
        assert_eq!((large[0].leaf_bytes(), large[0].tables_went()), (MIB2, false));
    }
    tree.take_down(&mut frames);
}

#[test]
fn xsa_304_a_leaf_has_a_size_that_every_unit_takes() {
    let (memory, mut frames) = frames(1);
    let kind = Kind::SecondStage { levels: 4, snoop: false };
    let [all, large, small] =
        [1 << 21 | 1 << 30, 1 << 30, 1 << 21].map(|leaf_sizes| Limits { output_bits: 46, leaf_sizes });
    for (limits, sizes) in [
        (all, [GIB1, MIB2]),
        (all.and(small), [MIB2, MIB2]),
        (large, [GIB1, PAGE_SIZE]),
        (large.and(small), [PAGE_SIZE, PAGE_SIZE]),
        (Limits::PAGES.and(all), [PAGE_SIZE, PAGE_SIZE]),
    ] {
        let tree = Tree::<VtdSecondStage>::new(&mut frames, limits).expect("a frame");
        // 1 GiB in pages is a lot of tables for this memory: 64 MiB of it tells.
        let bytes = if sizes[0] == GIB1 { GIB1 } else { 64 << 20 };
        map(&tree, &mut frames, GIB1, GIB1, bytes, Perms::READ).expect("there is room");
        map(&tree, &mut frames, 0, 4 * GIB1, MIB2, Perms::READ).expect("there is room");
        let leaf = |at| device_walk(&memory, kind, tree.root(), at).map(|seen| seen.leaf_bytes);
        assert_eq!([leaf(GIB1), leaf(0)], sizes.map(Some), "{limits:?}");
        tree.take_down(&mut frames);
    }
    assert_eq!(frames.in_use(), 0);
}

fn every_leaf_is_as_deep_as_the_format<F: Format>(kind: Kind) {
    let (memory, mut frames) = frames(16);
    let tree = Tree::<F>::new(&mut frames, Limits::PAGES).expect("a frame");
    let shape = crate::Shape::of(kind);
    let depth_is = |tree: &Tree<F>| assert_eq!(usize::from(tree.levels()), shape.spans.len());

    // However little or much is mapped, and wherever, the number of levels is the one that a unit is told.
    for (n, &span) in shape.spans.iter().enumerate() {
        depth_is(&tree);
        let at = span.min((1 << shape.input_bits) - span);
        map(&tree, &mut frames, at, 0, shape.page, Perms::READ).expect("there is room");
        assert_eq!(
            device_walk(&memory, kind, tree.root(), at).map(|seen| seen.leaf_bytes),
            Some(shape.page),
            "{n}"
        );
        unmap(&tree, &mut frames, at, shape.page).expect("it is mapped");
    }
    depth_is(&tree);
    tree.take_down(&mut frames);
}

#[test]
fn xsa_311_and_390_the_depth_of_a_tree_is_its_formats_for_life() {
    in_every_format!(every_leaf_is_as_deep_as_the_format);
}

#[test]
fn xsa_321_what_changed_is_published_whole_at_any_alignment() {
    let (memory, mut frames) = frames(4);
    let kind = Kind::SecondStage { levels: 4, snoop: false };
    let tree = Tree::<VtdSecondStage>::new(&mut frames, Limits::NONE).expect("a frame");

    // Ends of ranges at every place of a cache line of eight entries, on both sides of a boundary between tables.
    for first in 0..9 {
        for count in 1..18 {
            let (start, bytes) = (MIB2 - 9 * PAGE_SIZE + first * PAGE_SIZE, count * PAGE_SIZE);
            let published =
                |frames: &TableFrames| assert_eq!(frames.unpublished(), None, "{start:#x} {bytes:#x}");
            map(&tree, &mut frames, start, GIB1, bytes, Perms::READ).expect("there is room");
            published(&frames);
            tree.protect(&mut frames, start, bytes, Perms::READ_WRITE, &mut Gather::new())
                .expect("it is mapped");
            published(&frames);
            assert!(
                device_walk(&memory, kind, tree.root(), start + bytes - 1).is_some_and(|seen| seen.write)
            );
            unmap(&tree, &mut frames, start, bytes).expect("it is mapped");
            published(&frames);
            assert_eq!(device_walk(&memory, kind, tree.root(), start), None);
        }
    }
    tree.take_down(&mut frames);
}

#[test]
fn xsa_378_and_400_a_map_that_fails_half_way_leaves_no_part_behind() {
    let (memory, mut frames) = frames(4);
    let kind = Kind::SecondStage { levels: 4, snoop: false };
    let tree = Tree::<VtdSecondStage>::new(&mut frames, Limits::PAGES).expect("a frame");
    map(&tree, &mut frames, 3 * MIB2 - PAGE_SIZE, 0, PAGE_SIZE, Perms::READ).expect("there is room");
    let before = frames.content();

    // Over what is mapped already, after five MiB that are free; and with too few frames.
    let overlapping = map(&tree, &mut frames, PAGE_SIZE, GIB1, 3 * MIB2, Perms::READ);
    assert_eq!(overlapping, Err(Error::Mapped { address: 3 * MIB2 - PAGE_SIZE }));
    frames.set_left(1);
    assert_eq!(map(&tree, &mut frames, PAGE_SIZE, GIB1, 2 * MIB2, Perms::READ), Err(Error::NoFrame));

    assert!(frames.content() == before);
    assert_eq!(device_walk(&memory, kind, tree.root(), PAGE_SIZE), None);
    tree.take_down(&mut frames);
}

#[test]
fn cve_2023_52484_a_range_however_large_is_one_range_to_invalidate() {
    let mut frames = TableFrames::new(Memory::new(2 << 20), usize::MAX);
    let tree = Tree::<VtdFirstStage>::new(&mut frames, Limits::PAGES).expect("a frame");
    map(&tree, &mut frames, GIB1, 0, GIB1, Perms::READ).expect("there is room");
    let in_use = frames.in_use();

    let mut gather = Gather::new();
    // In pieces, as guests do, of which none but the last are whole tables' worth.
    for (start, bytes) in [(0, MIB2 / 2), (MIB2 / 2, MIB2 / 2), (MIB2, GIB1 - MIB2)] {
        tree.unmap(&mut frames, GIB1 + start, bytes, &mut gather).expect("it is mapped");
    }

    let ranges: Vec<_> =
        gather.ranges().map(|range| (range.start(), range.bytes(), range.leaf_bytes())).collect();
    assert_eq!(ranges, [(GIB1, GIB1, PAGE_SIZE)]);
    gather.give_back(&mut frames);
    assert_eq!(frames.in_use(), in_use - 511, "all tables of pages but the one that went page by page");
    tree.take_down(&mut frames);
}

#[test]
fn more_ranges_than_a_gather_keeps_apart_are_all_covered() {
    let (_, mut frames) = frames(1);
    let tree = Tree::<VtdFirstStage>::new(&mut frames, Limits::NONE).expect("a frame");
    // Pages and larger leaves in turn, upwards and downwards, none beside another.
    let upwards: Vec<(u64, u64)> =
        (0..20).flat_map(|n| [(4 * n * MIB2, PAGE_SIZE), (4 * n * MIB2 + 2 * MIB2, MIB2)]).collect();
    let downwards: Vec<_> = upwards.iter().rev().copied().collect();

    for leaves in [upwards, downwards] {
        for &(at, bytes) in &leaves {
            map(&tree, &mut frames, at, GIB1 + at, bytes, Perms::READ).expect("there is room");
        }

        let mut gather = Gather::new();
        for &(at, bytes) in &leaves {
            tree.unmap(&mut frames, at, bytes, &mut gather).expect("it is mapped");
        }

        let ranges: Vec<_> = gather.ranges().collect();
        assert_eq!(ranges.len(), pgtable::RANGES);
        for &(at, bytes) in &leaves {
            let covers = |range: &pgtable::Changed| {
                let end = range.start() + range.bytes();
                range.start() <= at && at + bytes <= end && range.leaf_bytes() <= bytes
            };
            assert!(ranges.iter().any(covers), "{at:#x}: {ranges:?}");
        }
    }
    tree.take_down(&mut frames);
}
