//! The translation trees, in every format: against an ordered map of leaves, and against a walk written from the manuals.
//!
//! `PGTABLE_OPERATIONS=1000000 cargo test --release -p hosted --test pgtable` does as many random operations in each format.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

mod advisories;
mod concurrent;
mod encoding;
mod model;
mod walker;

use hosted::{Machine, Random, TableFrames, grant};
use iommu::{Features, Invalidation, Iova, PAGE_SIZE, Pasid, Perms, PhysAddr, StreamId};
use model::{Model, Shape, expected};
use models::{
    memory::Memory,
    vtd::{Config, Refusal},
};
use pgtable::{
    Attributes, Changed, Dirty, Error, Format, Frames, Gather, Limits, LongMode, Tree, VtdFirstStage,
};
use std::collections::BTreeMap;
use walker::{Kind, Seen, walk};

/// Calls `$test` with the type and the [`Kind`] of every format.
macro_rules! in_every_format {
    ($test:ident) => {
        $test::<pgtable::VtdFirstStage<4>>(Kind::LongMode {
            levels: 4,
            execute_disable: false,
            nested: false,
        });
        $test::<pgtable::VtdFirstStage<5>>(Kind::LongMode {
            levels: 5,
            execute_disable: false,
            nested: false,
        });
        $test::<pgtable::LongMode<4>>(Kind::LongMode { levels: 4, execute_disable: true, nested: false });
        $test::<pgtable::LongMode<5>>(Kind::LongMode { levels: 5, execute_disable: true, nested: false });
        $test::<pgtable::SvmNested<4>>(Kind::LongMode { levels: 4, execute_disable: true, nested: true });
        $test::<pgtable::SvmNested<5>>(Kind::LongMode { levels: 5, execute_disable: true, nested: true });
        $test::<pgtable::VtdSecondStage<3>>(Kind::SecondStage { levels: 3, snoop: false });
        $test::<pgtable::VtdSecondStage<4>>(Kind::SecondStage { levels: 4, snoop: false });
        $test::<pgtable::VtdSecondStage<5>>(Kind::SecondStage { levels: 5, snoop: false });
        $test::<pgtable::VtdSecondStage<4, true>>(Kind::SecondStage { levels: 4, snoop: true });
        $test::<pgtable::Stage1<12, 39>>(Kind::Arm { stage: 1, granule: 12, bits: 39 });
        $test::<pgtable::Stage1<12, 48>>(Kind::Arm { stage: 1, granule: 12, bits: 48 });
        $test::<pgtable::Stage1<12, 52>>(Kind::Arm { stage: 1, granule: 12, bits: 52 });
        $test::<pgtable::Stage1<14, 48>>(Kind::Arm { stage: 1, granule: 14, bits: 48 });
        $test::<pgtable::Stage1<14, 52>>(Kind::Arm { stage: 1, granule: 14, bits: 52 });
        $test::<pgtable::Stage1<16, 48>>(Kind::Arm { stage: 1, granule: 16, bits: 48 });
        $test::<pgtable::Stage1<16, 52>>(Kind::Arm { stage: 1, granule: 16, bits: 52 });
        $test::<pgtable::Stage2<12, 40>>(Kind::Arm { stage: 2, granule: 12, bits: 40 });
        $test::<pgtable::Stage2<12, 42>>(Kind::Arm { stage: 2, granule: 12, bits: 42 });
        $test::<pgtable::Stage2<12, 44>>(Kind::Arm { stage: 2, granule: 12, bits: 44 });
        $test::<pgtable::Stage2<12, 48>>(Kind::Arm { stage: 2, granule: 12, bits: 48 });
        $test::<pgtable::Stage2<12, 52>>(Kind::Arm { stage: 2, granule: 12, bits: 52 });
        $test::<pgtable::Stage2<14, 40>>(Kind::Arm { stage: 2, granule: 14, bits: 40 });
        $test::<pgtable::Stage2<14, 48>>(Kind::Arm { stage: 2, granule: 14, bits: 48 });
        $test::<pgtable::Stage2<14, 52>>(Kind::Arm { stage: 2, granule: 14, bits: 52 });
        $test::<pgtable::Stage2<16, 44>>(Kind::Arm { stage: 2, granule: 16, bits: 44 });
        $test::<pgtable::Stage2<16, 48>>(Kind::Arm { stage: 2, granule: 16, bits: 48 });
        $test::<pgtable::Stage2<16, 52>>(Kind::Arm { stage: 2, granule: 16, bits: 52 });
    };
}
pub(crate) use in_every_format;

const READ_EXECUTE: Perms = Perms { execute: true, ..Perms::READ };

/// Frames from a memory of `mib` MiB, which the device sees once it is published.
fn frames(mib: usize) -> (Memory, TableFrames) {
    let memory = Memory::new(mib << 17);
    (memory.clone(), TableFrames::new(memory, usize::MAX))
}

/// What a device finds.
fn device_walk(memory: &Memory, kind: Kind, root: PhysAddr, address: u64) -> Option<Seen> {
    walk(|at| memory.device_load(PhysAddr(at)).expect("tables are in memory"), kind, root.0, address)
}

/// Maps `bytes` bytes of memory at `phys`.
fn map<F: Format>(
    tree: &Tree<F>,
    frames: &mut impl Frames,
    address: u64,
    phys: u64,
    bytes: u64,
    attributes: impl Into<Attributes>,
) -> Result<(), Error> {
    tree.map(frames, address, &grant(phys, bytes / PAGE_SIZE), attributes)
}

/// Unmaps, and gives back what goes, as if it had been invalidated.
fn unmap<F: Format>(
    tree: &Tree<F>,
    frames: &mut impl Frames,
    address: u64,
    bytes: u64,
) -> Result<Vec<Changed>, Error> {
    let mut gather = Gather::new();
    tree.unmap(frames, address, bytes, &mut gather)?;
    let ranges = gather.ranges().collect();
    gather.give_back(frames);
    Ok(ranges)
}

/// Random operations in each format.
fn operations() -> u64 {
    std::env::var("PGTABLE_OPERATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(3_000)
}

/// Attributes that the format of `kind` can say, all kinds of them.
fn some_attributes(random: &mut Random, kind: Kind) -> Attributes {
    let (stage2, second) =
        (matches!(kind, Kind::Arm { stage: 2, .. }), matches!(kind, Kind::SecondStage { .. }));
    let forbids_execution = !second && !matches!(kind, Kind::LongMode { execute_disable: false, .. });
    let has_privilege = matches!(kind, Kind::LongMode { nested: false, .. } | Kind::Arm { stage: 1, .. });
    let read = !(stage2 || second) || random.below(4) != 0;
    let write = !read || random.below(2) == 0;
    let memory = match random.below(4) {
        0 if !second => pgtable::Memory::Uncached,
        1 if matches!(kind, Kind::Arm { .. }) => pgtable::Memory::Device,
        _ => pgtable::Memory::WriteBack,
    };
    // In long mode the bit that says "not tracked" is the one that says "dirty".
    let dirty = match random.below(3) {
        0 if write => Dirty::Clean,
        1 if write && matches!(kind, Kind::Arm { .. }) => Dirty::Dirty,
        _ => Dirty::Untracked,
    };
    let perms = Perms {
        read,
        write,
        execute: !forbids_execution || random.below(2) == 0,
        privileged: has_privilege && random.below(4) == 0,
    };
    Attributes { perms, memory, accessed: random.below(8) != 0, dirty }
}

/// One range that a random operation is about.
fn some_range(random: &mut Random, model: &Model) -> (u64, u64) {
    let Shape { page, leaves, spans, input_bits, .. } = &model.shape;
    let end = 1_u64 << input_bits;
    // Half of the time something that is mapped, with what follows it, or with a page more or less.
    if random.below(2) == 0 && !model.leaves.is_empty() {
        let at = random.below(end);
        let (&start, leaf) =
            model.leaves.range(at..).next().or_else(|| model.leaves.first_key_value()).expect("some");
        let mut last = start + leaf.bytes;
        for _ in 0..random.below(600) {
            match model.leaves.get(&last) {
                Some(next) => last += next.bytes,
                None => break,
            }
        }
        let less = if random.below(8) == 0 { *page } else { 0 };
        return (start, (last - start).saturating_sub(less).max(*page));
    }
    // Around the first boundaries between entries of each level, and at the end.
    let span = spans[random.below(spans.len() as u64) as usize];
    let near = match random.below(8) {
        0 => end - 4 * page,
        1 => 0,
        _ => (span * (1 + random.below(2))).min(end - page),
    };
    let start = (near + random.below(8) * page).saturating_sub(4 * page);
    let bytes = match random.below(4) {
        0 => {
            let leaf = leaves[random.below(leaves.len() as u64) as usize];
            let start = near - near % leaf;
            let (before, after) = (random.below(2) * 2 * page, random.below(2) * 3 * page);
            return (start.saturating_sub(before), leaf * (1 + random.below(2)) + before + after);
        }
        _ => (1 + random.below(12)) * page,
    };
    (start, bytes)
}

fn a_tree_means_what_a_map_of_leaves_means<F: Format>(kind: Kind) {
    let shape = Shape::of(kind);
    let (memory, mut frames) = frames(if shape.page > 4096 { 24 } else { 8 });
    let tree = Tree::<F>::new(&mut frames, Limits::NONE).expect("a frame");
    assert_eq!(usize::from(tree.levels()), shape.spans.len());
    let mut model = Model::new(kind, u64::MAX);
    let mut random = Random::new(shape.input_bits.into());
    let mut done = BTreeMap::<&str, u64>::new();

    for operation in 0..operations() {
        let (start, bytes) = some_range(&mut random, &model);
        let mut outcome = "refused";
        match random.below(8) {
            0..3 => {
                // Small ranges to anywhere, larger ones so that leaves above a page fit.
                let largest = shape.leaves[shape.leaves.len() - 1];
                let phys = match bytes {
                    bytes if bytes > 64 * shape.page || random.below(4) != 0 => {
                        largest * random.below(((1 << shape.output_bits) - (bytes + 2 * largest)) / largest)
                            + start % largest
                    }
                    _ => shape.page * random.below((1 << shape.output_bits) / shape.page - 64),
                };
                let attributes = some_attributes(&mut random, kind);
                let left = if random.below(3) == 0 { random.below(3) as usize } else { usize::MAX };
                frames.set_left(left);
                let expected = model.map(start, bytes, phys, attributes, left);
                assert_eq!(
                    map(&tree, &mut frames, start, phys, bytes, attributes),
                    expected,
                    "map {start:#x} {bytes:#x}"
                );
                if expected.is_ok() {
                    outcome = "mapped";
                } else if expected == Err(Error::NoFrame) {
                    outcome = "without frames";
                }
            }
            3..6 => {
                let expected = model.unmap(start, bytes);
                let mut gather = Gather::new();
                let in_use = frames.in_use();
                let result = tree.unmap(&mut frames, start, bytes, &mut gather);
                assert_eq!(result, expected.map(|_| ()), "unmap {start:#x} {bytes:#x}");
                if let Ok((smallest, gone)) = expected {
                    let ranges: Vec<_> = gather.ranges().collect();
                    assert_eq!(ranges.len(), 1);
                    let range = ranges[0];
                    assert_eq!((range.start(), range.bytes(), range.leaf_bytes()), (start, bytes, smallest));
                    assert_eq!((range.tables_went(), gather.tables_went()), (gone > 0, gone > 0));
                    assert_eq!(frames.in_use(), in_use, "tables wait for the invalidation");
                    outcome = if gone > 0 { "unmapped with tables" } else { "unmapped" };
                } else {
                    assert_eq!(gather.ranges().count(), 0, "nothing changed");
                }
                gather.give_back(&mut frames);
            }
            6 => {
                let mut attributes = some_attributes(&mut random, kind);
                if let Some((_, leaf)) = model.find(start).filter(|_| random.below(8) != 0) {
                    attributes.memory = leaf.attributes.memory;
                }
                let mut gather = Gather::new();
                let expected = model.protect(start, bytes, attributes);
                let result = tree.protect(&mut frames, start, bytes, attributes, &mut gather);
                assert_eq!(
                    result,
                    expected.clone().map(|_| ()),
                    "protect {start:#x} {bytes:#x} {attributes:?}"
                );
                let covered = |at: u64| {
                    gather.ranges().any(|range| at >= range.start() && at - range.start() < range.bytes())
                };
                assert!(expected.iter().flatten().all(|&at| covered(at)), "every changed leaf is gathered");
                if expected.as_ref().is_ok_and(|changed| changed.is_empty()) || expected.is_err() {
                    assert_eq!(gather.ranges().count(), 0, "nothing changed");
                }
                if expected.is_ok() {
                    outcome = "protected";
                }
                gather.give_back(&mut frames);
            }
            _ => {
                let address = start + random.below(shape.page);
                let found = (address < 1 << shape.input_bits).then(|| model.find(address)).flatten();
                let leaf = tree.translate(&frames, address);
                assert_eq!(
                    leaf.map(|leaf| (leaf.phys().0, leaf.bytes(), leaf.dirty())),
                    found.map(|(at, leaf)| {
                        let dirty = leaf.attributes.perms.write && leaf.attributes.dirty != Dirty::Clean;
                        (leaf.phys + (address - at), leaf.bytes, dirty)
                    }),
                    "{address:#x}"
                );
                outcome = "translated";
            }
        }
        *done.entry(outcome).or_default() += 1;

        // The ends of the range, and the pages beside it, as the device sees them.
        for address in
            [start.wrapping_sub(1), start, start.wrapping_add(bytes - 1), start.wrapping_add(bytes)]
        {
            if address < 1 << shape.input_bits {
                let found = model.find(address).map(|(at, leaf)| expected(kind, at, leaf, address));
                assert_eq!(
                    device_walk(&memory, kind, tree.root(), address),
                    found,
                    "{address:#x} after {operation}"
                );
            }
        }
        assert_eq!(frames.in_use(), 1 + model.tables.len(), "the tables that are needed");
        if operation % 500 == 0 {
            let mut walked = BTreeMap::new();
            tree.walk(&frames, 0, 1 << shape.input_bits, |at, leaf| {
                assert!(walked.insert(at, (leaf.phys().0, leaf.bytes())).is_none());
            })
            .expect("the whole range");
            let all: BTreeMap<_, _> =
                model.leaves.iter().map(|(&at, leaf)| (at, (leaf.phys, leaf.bytes))).collect();
            assert_eq!(walked, all);
            assert_eq!(frames.unpublished(), None, "what was stored was published");
            let words = frames.content().into_iter().flat_map(|(_, words)| words);
            assert_eq!(
                words.into_iter().find(|&word| word != 0 && word & 0b11 == 0),
                None,
                "nothing is left of what went"
            );
        }
    }

    // How often tables go, or frames are short, depends on the format; others look at these in every format.
    for outcome in ["mapped", "unmapped", "protected", "translated", "refused"] {
        assert!(
            done.get(outcome).is_some_and(|&times| times >= 10),
            "{outcome} is rare in {kind:?}: {done:?}"
        );
    }
    for (&at, &leaf) in &model.leaves {
        assert_eq!(
            device_walk(&memory, kind, tree.root(), at),
            Some(expected(kind, at, leaf, at)),
            "{at:#x}"
        );
    }
    tree.take_down(&mut frames);
    assert_eq!(frames.in_use(), 0, "the source has back what it gave");
}

#[test]
fn trees_of_all_formats_mean_what_maps_of_leaves_mean() {
    in_every_format!(a_tree_means_what_a_map_of_leaves_means);
}

fn a_map_that_finds_no_frame_changes_nothing<F: Format>(kind: Kind) {
    let shape = Shape::of(kind);
    let (memory, mut frames) = frames(if shape.page > 4096 { 16 } else { 4 });
    let tree = Tree::<F>::new(&mut frames, Limits::NONE).expect("a frame");
    let top = shape.spans[shape.spans.len() - 1];
    // Two pages on either side of a boundary between entries of the top table; what is there before shares their tables.
    let (start, bytes) = (top - 2 * shape.page, 4 * shape.page);
    map(&tree, &mut frames, start - shape.page, 0, shape.page, Perms::READ).expect("there is room");
    unmap(&tree, &mut frames, start - shape.page, shape.page).expect("it is mapped");
    let tables = frames.in_use();
    let needed = shape.spans.len() - 1;
    let free = || frames.in_use();
    assert_eq!(free(), 1 + needed);

    for left in 0..needed {
        frames.set_left(left);
        let before = frames.content();
        assert_eq!(
            map(&tree, &mut frames, start, 0x10_0000, bytes, Perms::READ),
            Err(Error::NoFrame),
            "{left}"
        );
        assert_eq!((frames.in_use(), frames.left()), (tables, left), "the source is as it was");
        assert!(frames.content() == before, "the tables are as they were");
        assert_eq!(device_walk(&memory, kind, tree.root(), start), None);
    }
    frames.set_left(needed);
    assert_eq!(map(&tree, &mut frames, start, 0x10_0000, bytes, Perms::READ), Ok(()), "{kind:?}");
    assert_eq!(frames.left(), 0, "as many as were needed");
    tree.take_down(&mut frames);
    assert_eq!(frames.in_use(), 0);
}

#[test]
fn a_map_without_its_nth_frame_changes_nothing_for_every_n() {
    in_every_format!(a_map_that_finds_no_frame_changes_nothing);
}

#[test]
fn a_tree_without_a_frame_is_refused() {
    let mut frames = TableFrames::new(Memory::new(512), 0);

    assert_eq!(Tree::<LongMode>::new(&mut frames, Limits::NONE).err(), Some(Error::NoFrame));
}

fn bad_ranges_are_refused<F: Format>(kind: Kind) {
    let Shape { page, input_bits, output_bits, .. } = Shape::of(kind);
    let (_, mut frames) = frames(4);
    let tree = Tree::<F>::new(&mut frames, Limits::NONE).expect("a frame");
    let end = 1_u64 << input_bits;
    let ranges = [
        // Unaligned, past the end, over the end, around the end of the address space, empty.
        (page / 2, page),
        (page, page + page / 2),
        (end, page),
        (end - page, 2 * page),
        (u64::MAX - (page - 1), 2 * page),
        (u64::MAX - (page - 1), page),
        (page, 0),
        (0, 0),
        (page, u64::MAX - (page - 1)),
        (1 << 63, page),
    ];
    for (address, bytes) in ranges {
        let refused = Err(Error::Range { address, bytes });
        let gather = &mut Gather::new();
        if bytes % PAGE_SIZE == 0 && bytes < 1 << 40 {
            assert_eq!(map(&tree, &mut frames, address, 0, bytes, Perms::READ), refused);
        }
        assert_eq!(tree.unmap(&mut frames, address, bytes, gather), refused);
        assert_eq!(tree.protect(&mut frames, address, bytes, Perms::READ, gather), refused);
        assert_eq!(tree.clear_dirty(&mut frames, address, bytes, gather, |_, _| {}), refused);
        assert_eq!(tree.walk(&frames, address, bytes, |_, _| {}), refused);
        assert_eq!(gather.ranges().count(), 0);
    }
    let limit = 1_u64 << output_bits;
    for (phys, bytes) in
        [(page / 2, page), (limit, page), (limit - page, 2 * page), (u64::MAX - (page - 1), page)]
    {
        let refused = Err(Error::Range { address: phys, bytes: grant(phys, bytes / PAGE_SIZE).bytes() });
        let result = map(&tree, &mut frames, page, phys, bytes, Perms::READ);
        // A grant around the end of all addresses has no bytes.
        assert!(
            result == refused || matches!(result, Err(Error::Range { bytes: 0, .. })),
            "{phys:#x}: {result:?}"
        );
    }
    for address in [end, u64::MAX, 1 << 63] {
        assert!(tree.translate(&frames, address).is_none());
    }
    assert_eq!(frames.in_use(), 1, "nothing was begun");
    tree.take_down(&mut frames);
}

#[test]
fn ranges_that_are_no_ranges_are_refused_by_name() {
    in_every_format!(bad_ranges_are_refused);
}

#[test]
fn the_limits_of_a_machine_are_kept() {
    let (_, mut frames) = frames(4);
    let limits = Limits { output_bits: 39, leaf_sizes: 0 };
    let tree = Tree::<LongMode>::new(&mut frames, limits).expect("a frame");

    let phys = (1 << 39) - 2 * PAGE_SIZE;
    assert_eq!(map(&tree, &mut frames, 0, phys, 2 * PAGE_SIZE, Perms::READ), Ok(()));
    for (phys, bytes) in [(1 << 39, PAGE_SIZE), (phys, 3 * PAGE_SIZE)] {
        assert_eq!(
            map(&tree, &mut frames, 0x10_0000, phys, bytes, Perms::READ),
            Err(Error::Range { address: phys, bytes })
        );
    }
    tree.take_down(&mut frames);
}

fn the_largest_leaves_are_used<F: Format>(kind: Kind) {
    let shape = Shape::of(kind);
    let (memory, mut frames) = frames(if shape.page > 4096 { 16 } else { 4 });
    let tree = Tree::<F>::new(&mut frames, Limits::NONE).expect("a frame");
    let largest = shape.leaves[shape.leaves.len() - 1];
    let start = largest - shape.leaves[0];

    // One page, one leaf of the largest size, one of each smaller size that follows.
    let bytes: u64 = shape.leaves[0] + shape.leaves.iter().sum::<u64>();
    map(&tree, &mut frames, start, largest * 4 + start, bytes, Perms::READ_WRITE).expect("there is room");

    let mut at = start;
    for leaf in std::iter::once(&shape.leaves[0]).chain(shape.leaves.iter().rev()) {
        let seen = device_walk(&memory, kind, tree.root(), at + leaf - 1).expect("it is mapped");
        assert_eq!((seen.leaf_bytes, seen.phys), (*leaf, largest * 4 + at + leaf - 1));
        at += leaf;
    }
    // A part of a leaf is refused, in all formats.
    for &bytes in &shape.leaves[1..] {
        let at = start + shape.leaves[0] + shape.leaves.iter().filter(|&&other| other > bytes).sum::<u64>();
        let part = Err(Error::Superpage { address: at, bytes });
        let gather = &mut Gather::new();
        for (from, length) in
            [(at, shape.page), (at + shape.page, shape.page), (at + bytes - shape.page, shape.page)]
        {
            assert_eq!(tree.unmap(&mut frames, from, length, gather), part);
            assert_eq!(tree.protect(&mut frames, from, length, Perms::READ, gather), part);
            assert_eq!(tree.clear_dirty(&mut frames, from, length, gather, |_, _| {}), part);
        }
        assert_eq!(gather.ranges().count(), 0);
    }
    unmap(&tree, &mut frames, start, bytes).expect("all of it is mapped");
    tree.take_down(&mut frames);
    assert_eq!(frames.in_use(), 0);
}

#[test]
fn a_map_uses_the_largest_leaves_and_none_is_changed_in_part() {
    in_every_format!(the_largest_leaves_are_used);
}

#[test]
fn a_unit_translates_as_an_ordered_map_does() {
    let mut machine = Machine::new(Config::full());
    let stream = StreamId(0x20);
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.assign(stream, Features { pasid: true, ..Features::default() });
    let attachment = machine.attach(stream, Pasid::new(5), &tree);
    let mut map = BTreeMap::<u64, (u64, bool)>::new();
    let addresses: Vec<u64> = [0x20_0000, 0x4000_0000, 1 << 39]
        .into_iter()
        .flat_map(|at: u64| (0..6).map(move |n| at + n * PAGE_SIZE - 3 * PAGE_SIZE))
        .collect();
    let mut random = Random::new(1);

    for content in 0..150 {
        let address = addresses[random.below(addresses.len() as u64) as usize];
        if map.remove(&address).is_some() {
            machine.unmap(&tree, Iova(address));
            machine.invalidate(&[Invalidation::Pages { attachment, iova: Iova(address), pages: 1 }]);
        } else {
            let write = random.below(2) == 0;
            let page = machine.page(content);
            let perms = if write { Perms::READ_WRITE } else { READ_EXECUTE };
            tree.map(&mut machine.frames, address, &grant(page.0, 1), perms).expect("nothing is there");
            map.insert(address, (content, write));
        }

        let address = addresses[random.below(addresses.len() as u64) as usize];
        let found = map.get(&address);
        let read = machine.read(stream, Pasid::new(5), Iova(address));
        // SFS.2: a first-stage entry is not present. SGN.6: no write permission.
        assert_eq!(
            read,
            found.map_or(Err(Refusal::Fault(0x71)), |&(content, _)| Ok(content)),
            "{address:#x}"
        );
        let written = machine.unit.dma_write(stream, Pasid::new(5), Iova(address + 8), &[1]);
        let expected = match found {
            Some((_, true)) => Ok(()),
            Some((_, false)) => Err(Refusal::Fault(0x85)),
            None => Err(Refusal::Fault(0x71)),
        };
        assert_eq!(written, expected, "{address:#x}");
        let _ = machine.pass();
    }

    machine.detach(attachment);
    tree.take_down(&mut machine.frames);
    assert_eq!(machine.frames.in_use(), 0);
    machine.assert_lawful();
}
