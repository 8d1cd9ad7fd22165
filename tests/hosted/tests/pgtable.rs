//! The translation trees against an ordered map, and against a walk written from the manual's entry format.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use hosted::{Machine, Random, TableFrames, grant};
use iommu::{Features, Invalidation, Iova, PAGE_SIZE, Pasid, Perms, PhysAddr, StreamId};
use models::{
    memory::Memory,
    vtd::{Config, Refusal},
};
use pgtable::{Error, Format, Frames, SVM_NESTED, Tree, VTD_FIRST_STAGE};
use std::collections::BTreeMap;

const FORMATS: [(Format, u64); 2] = [(VTD_FIRST_STAGE, 1 << 47), (SVM_NESTED, 1 << 48)];

const READ_EXECUTE: Perms = Perms { execute: true, ..Perms::READ };

fn frames(words: usize) -> (Memory, TableFrames) {
    let memory = Memory::new(words);
    (memory.clone(), TableFrames::new(memory, usize::MAX))
}

/// What a walk by the manual finds at `address`: the page, and whether it may be written and executed.
///
/// First-stage entries: P bit 0, R/W bit 1, U/S bit 2, A bit 5, D bit 6, PS bit 7, address 51:12, XD bit 63. The walk is
/// that of a request without privilege, in the device's view of memory, so it needs U/S at every level. Nothing sets A
/// and D later, so they have to be there.
fn walk(memory: &Memory, root: PhysAddr, address: u64) -> Option<(u64, bool, bool)> {
    let (mut table, mut write, mut execute) = (root.0, true, true);
    for shift in [39, 30, 21, 12] {
        let at = PhysAddr(table + (address >> shift & 0x1FF) * 8);
        let entry = memory.device_load(at).expect("tables are in memory");
        if entry & 1 == 0 {
            return None;
        }
        assert_eq!(entry & 0x7FF0_0000_0000_0000, 0, "bits 62:52 are left alone: {entry:#x}");
        assert_ne!(entry & 1 << 2, 0, "U/S at every level: {entry:#x}");
        assert_ne!(entry & 1 << 5, 0, "A from the start: {entry:#x}");
        assert_eq!(entry & 1 << 7, 0, "no superpages, no PAT: {entry:#x}");
        write &= entry & 1 << 1 != 0;
        execute &= entry & 1 << 63 == 0;
        if shift == 12 && entry & 1 << 1 != 0 {
            assert_ne!(entry & 1 << 6, 0, "D from the start where writes are allowed: {entry:#x}");
        }
        table = entry & 0x000F_FFFF_FFFF_F000;
    }
    Some((table, write, execute))
}

/// Returns what `walk` should find for a translation with `perms`: only one of the formats can forbid execution.
fn expected(format: Format, page: u64, perms: Perms) -> (u64, bool, bool) {
    (page, perms.write, perms.execute || format == VTD_FIRST_STAGE)
}

/// Some pages of the format: a dense run, one at each boundary between tables, and the last ones.
fn interesting_pages(end: u64) -> Vec<u64> {
    let dense = (0..24).map(|page| 0x40_0000 + page * PAGE_SIZE);
    let boundaries = [21, 30, 39].map(|shift| 1_u64 << shift);
    let around = boundaries.into_iter().flat_map(|b| [b - 2 * PAGE_SIZE, b - PAGE_SIZE, b, b + PAGE_SIZE]);
    dense.chain(around).chain([0, end - 2 * PAGE_SIZE, end - PAGE_SIZE]).collect()
}

#[test]
fn a_tree_translates_as_an_ordered_map_does() {
    for (seed, (format, end)) in (1..).zip(FORMATS) {
        let (memory, mut frames) = frames(64 * 512);
        let tree = Tree::new(&mut frames, format).expect("a frame");
        let mut map = BTreeMap::<u64, (u64, Perms)>::new();
        let pages = interesting_pages(end);
        let mut random = Random::new(seed);
        let (mut mapped, mut unmapped, mut refused) = (0, 0, 0);

        for _ in 0..50_000 {
            let start = pages[random.below(pages.len() as u64) as usize];
            let count = 1 + random.below(4);
            let range = || (start..).step_by(PAGE_SIZE as usize).take(count as usize);
            let fits = start + count * PAGE_SIZE <= end;
            match random.below(5) {
                0 | 1 => {
                    let target = random.below(1 << 36) * PAGE_SIZE;
                    let perms = [Perms::READ, Perms::READ_WRITE, READ_EXECUTE][random.below(3) as usize];
                    let first_mapped = range().find(|page| map.contains_key(page));

                    let result = tree.map(&mut frames, start, &grant(target, count), perms);

                    match (fits, first_mapped) {
                        (false, _) => {
                            assert_eq!(
                                result,
                                Err(Error::Range { address: start, bytes: count * PAGE_SIZE })
                            );
                        }
                        (true, Some(address)) => assert_eq!(result, Err(Error::Mapped { address })),
                        (true, None) => {
                            assert_eq!(result, Ok(()));
                            map.extend(range().zip((target..).step_by(4096).map(|t| (t, perms))));
                        }
                    }
                    if result.is_ok() { mapped += 1 } else { refused += 1 }
                }
                2 | 3 => {
                    let first_absent = range().find(|page| !map.contains_key(page));

                    let result = tree.unmap(&mut frames, start, count * PAGE_SIZE);

                    match (fits, first_absent) {
                        (false, _) => {
                            assert_eq!(
                                result,
                                Err(Error::Range { address: start, bytes: count * PAGE_SIZE })
                            );
                        }
                        (true, Some(address)) => assert_eq!(result, Err(Error::NotMapped { address })),
                        (true, None) => {
                            assert_eq!(result, Ok(()));
                            map.retain(|page, _| !range().any(|gone| gone == *page));
                        }
                    }
                    if result.is_ok() { unmapped += 1 } else { refused += 1 }
                }
                _ => {
                    let address = start + random.below(PAGE_SIZE);
                    let found = map.get(&start);
                    let translated = tree.translate(&frames, address);

                    assert_eq!(
                        translated.map(|(to, perms)| (to.0, perms.read, perms.write)),
                        found.map(|&(target, perms)| (target + (address - start), true, perms.write))
                    );
                    assert_eq!(
                        walk(&memory, tree.root(), address),
                        found.map(|&(target, perms)| expected(format, target, perms))
                    );
                }
            }
        }

        assert!(mapped > 2_000 && unmapped > 2_000 && refused > 2_000, "{mapped} {unmapped} {refused}");
        for page in pages {
            let found = map.get(&page).map(|&(target, perms)| expected(format, target, perms));
            assert_eq!(walk(&memory, tree.root(), page), found, "{page:#x}");
        }
        tree.take_down(&mut frames);
        assert_eq!(frames.in_use(), 0, "every table went back");
    }
}

#[test]
fn a_map_that_fails_at_any_frame_changes_no_translation() {
    // What is there already has tables of its own. The new range ends in two leaf tables below an entry of the top
    // table that is empty, so it takes four: one of level 3, one of level 2, two of level 1.
    const THERE: u64 = 0x1000;
    const NEW: u64 = (1 << 39) + 0x20_0000 - PAGE_SIZE;
    for (format, _) in FORMATS {
        for left in 0..=4 {
            let (memory, mut frames) = frames(16 * 512);
            let tree = Tree::new(&mut frames, format).expect("a frame");
            tree.map(&mut frames, THERE, &grant(0x5000, 1), Perms::READ).expect("there are frames");
            let tables = frames.in_use();
            frames.set_left(left);

            let result = tree.map(&mut frames, NEW, &grant(0x8_0000, 2), Perms::READ_WRITE);

            let page = |address| walk(&memory, tree.root(), address).map(|(page, ..)| page);
            let found = [page(NEW), page(NEW + PAGE_SIZE)];
            if left < 4 {
                assert_eq!((result, found), (Err(Error::NoFrame), [None; 2]), "{left} frames");
            } else {
                assert_eq!((result, found), (Ok(()), [Some(0x8_0000), Some(0x8_1000)]));
            }
            assert_eq!(page(THERE), Some(0x5000));
            assert_eq!(frames.in_use(), tables + left, "tables that were made stay for the next attempt");
            tree.take_down(&mut frames);
            assert_eq!(frames.in_use(), 0, "half-made branches go back too");
        }
    }
}

#[test]
fn the_modelled_unit_walks_a_tree_as_an_ordered_map_says() {
    let mut machine = Machine::new(Config::full());
    let stream = StreamId(0x20);
    machine.assign(stream, Features { pasid: true, ..Features::default() });
    let tree = machine.tree(VTD_FIRST_STAGE);
    let attachment = machine.attach(stream, Pasid::new(5), &tree);
    // One page of memory for each content; several addresses may reach one.
    let memory: Vec<_> = (0..8).map(|content| machine.page(content)).collect();
    let addresses = interesting_pages(1 << 47);
    let mut map = BTreeMap::new();
    let mut random = Random::new(9);

    for _ in 0..2_000 {
        let address = addresses[random.below(addresses.len() as u64) as usize];
        let (content, write) = (random.below(8), random.below(2) == 0);
        if map.remove(&address).is_some() {
            machine.unmap(&tree, Iova(address));
            machine.invalidate(&[Invalidation::covering(attachment, Iova(address), PAGE_SIZE)]);
        } else {
            let page = grant(memory[content as usize].0, 1);
            let perms = if write { Perms::READ_WRITE } else { Perms::READ };
            tree.map(&mut machine.frames, address, &page, perms).expect("nothing is there");
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

#[test]
fn a_tree_without_a_frame_is_refused() {
    let mut frames = TableFrames::new(Memory::new(512), 0);

    assert_eq!(Tree::new(&mut frames, VTD_FIRST_STAGE).err(), Some(Error::NoFrame));
}

#[test]
fn bad_input_is_refused_by_name() {
    for (format, end) in FORMATS {
        let (_, mut frames) = frames(16 * 512);
        let tree = Tree::new(&mut frames, format).expect("a frame");
        let tables = frames.in_use();
        let range = |address, bytes| Err(Error::Range { address, bytes });

        let mut map =
            |address, phys, pages, perms| tree.map(&mut frames, address, &grant(phys, pages), perms);
        // Unaligned, past the end, around the end of the address space, empty.
        assert_eq!(map(0x1800, 0x1000, 1, Perms::READ), range(0x1800, 4096));
        assert_eq!(map(end, 0x1000, 1, Perms::READ), range(end, 4096));
        assert_eq!(map(end - 4096, 0x1000, 2, Perms::READ), range(end - 4096, 8192));
        assert_eq!(map(u64::MAX - 4095, 0x1000, 2, Perms::READ), range(u64::MAX - 4095, 8192));
        assert_eq!(map(0x1000, 0x1000, 0, Perms::READ), range(0x1000, 0));
        // Memory that is unaligned, or that no entry can hold: it ends past 2^52.
        assert_eq!(map(0x1000, 0x1800, 1, Perms::READ), range(0x1800, 4096));
        assert_eq!(map(0x1000, 1 << 52, 1, Perms::READ), range(1 << 52, 4096));
        assert_eq!(map(0x1000, (1 << 52) - 4096, 2, Perms::READ), range((1 << 52) - 4096, 8192));
        // Not readable.
        assert_eq!(
            map(0x1000, 0x1000, 1, Perms { write: true, ..Perms::default() }),
            Err(Error::Permissions)
        );
        assert_eq!(map(0x1000, 0x1000, 1, Perms::default()), Err(Error::Permissions));

        for (address, bytes) in
            [(0x1800, 4096), (0x1000, 100), (end, 4096), (0x1000, 0), (u64::MAX - 4095, 8192)]
        {
            assert_eq!(tree.unmap(&mut frames, address, bytes), range(address, bytes));
        }
        assert_eq!(tree.unmap(&mut frames, 0x1000, 4096), Err(Error::NotMapped { address: 0x1000 }));
        for address in [end, u64::MAX, 1 << 63] {
            assert_eq!(tree.translate(&frames, address), None);
        }
        assert_eq!(frames.in_use(), tables, "nothing was begun");
        tree.take_down(&mut frames);
    }
}

#[test]
fn an_unmap_that_meets_a_hole_unmaps_nothing() {
    let (memory, mut frames) = frames(16 * 512);
    let tree = Tree::new(&mut frames, VTD_FIRST_STAGE).expect("a frame");
    tree.map(&mut frames, 0x1000, &grant(0x8000, 1), Perms::READ).expect("there is room");
    tree.map(&mut frames, 0x3000, &grant(0x9000, 1), Perms::READ).expect("there is room");

    assert_eq!(tree.unmap(&mut frames, 0x1000, 0x3000), Err(Error::NotMapped { address: 0x2000 }));

    assert!(walk(&memory, tree.root(), 0x1000).is_some() && walk(&memory, tree.root(), 0x3000).is_some());
    tree.take_down(&mut frames);
}

/// Frames that check, at each store, that the tables mean either what they meant before or what they shall mean after.
struct Watched<'m> {
    frames: TableFrames,
    memory: &'m Memory,
    root: PhysAddr,
    /// Of each address that is looked at: what the walk may find.
    allowed: Vec<(u64, [Option<u64>; 2])>,
    stores: usize,
}

impl Frames for Watched<'_> {
    fn take(&mut self) -> Option<PhysAddr> {
        self.frames.take()
    }
    fn give_back(&mut self, frame: PhysAddr) {
        self.frames.give_back(frame);
    }
    fn load(&self, frame: PhysAddr, index: usize) -> u64 {
        self.frames.load(frame, index)
    }
    fn store(&mut self, frame: PhysAddr, index: usize, value: u64) {
        self.frames.store(frame, index, value);
        self.stores += 1;
        for (address, allowed) in &self.allowed {
            let found = walk(self.memory, self.root, *address).map(|(page, ..)| page);
            assert!(
                allowed.contains(&found),
                "{address:#x} translates to {found:x?} after {} stores",
                self.stores
            );
        }
    }
}

#[test]
fn a_walk_between_any_two_stores_sees_a_page_as_before_or_as_after() {
    let (memory, mut frames) = frames(32 * 512);
    let tree = Tree::new(&mut frames, VTD_FIRST_STAGE).expect("a frame");
    let (old, new) = (0x20_0000 - 4 * PAGE_SIZE, 0x20_0000 - 2 * PAGE_SIZE);
    tree.map(&mut frames, old, &grant(0x5000, 2), Perms::READ).expect("there is room");
    let page = |start: u64, n: u64| start + n * PAGE_SIZE;
    let stays = (0..2).map(|n| (page(old, n), [Some(page(0x5000, n)); 2]));
    let comes = (0..4).map(|n| (page(new, n), [None, Some(page(0x9000, n))]));
    let allowed = stays.chain(comes).collect();
    let mut watched = Watched { frames, memory: &memory, root: tree.root(), allowed, stores: 0 };

    // Two pages in a table that is there, two in one that is made on the way; then away again.
    tree.map(&mut watched, new, &grant(0x9000, 4), Perms::READ_WRITE).expect("there is room");
    assert_eq!(watched.stores, 1 + 4, "one new table and four leaves, each by one store");
    tree.unmap(&mut watched, new, 4 * PAGE_SIZE).expect("it is mapped");

    assert_eq!(watched.stores, 5 + 4);
}
