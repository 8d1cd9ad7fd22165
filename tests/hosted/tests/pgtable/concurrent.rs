//! Tables that somebody reads while they change: after every single store, from another core, and with hardware that records.

use crate::{Kind, Seen, in_every_format, map, model::Shape, walk};
use hosted::{Random, TableFrames, TableWords};
use iommu::{PAGE_SIZE, Perms, PhysAddr};
use models::memory::Memory;
use pgtable::{
    Attributes, Dirty, Error, Format, Frames, Gather, Limits, LongMode, Stage1, Stage2, Table, Tree,
    VtdSecondStage, Words,
};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    ops::Range,
    rc::Rc,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
};

/// Rounds after which a thread that did not come in between will not come any more.
const ROUNDS_AT_MOST: u64 = 10_000_000;

/// What is looked at after each store.
struct Watch {
    memory: Memory,
    kind: Kind,
    root: Cell<u64>,
    /// Of each address: what the walk may find.
    allowed: RefCell<Vec<(u64, Vec<Option<Seen>>)>>,
    /// How often each word was stored.
    stores: RefCell<BTreeMap<u64, u32>>,
}

impl Watch {
    fn check(&self, load: impl Fn(u64) -> u64, when: &str) {
        for (address, allowed) in &*self.allowed.borrow() {
            let seen = walk(&load, self.kind, self.root.get(), *address);
            assert!(allowed.contains(&seen), "{address:#x} is {seen:x?} {when}");
        }
    }

    fn device(&self, at: u64) -> u64 {
        self.memory.device_load(PhysAddr(at)).expect("tables are in memory")
    }

    fn stored(&self, at: u64) {
        *self.stores.borrow_mut().entry(at).or_default() += 1;
        // A unit that snoops sees all stores so far.
        self.check(|word| self.memory.cpu_load(PhysAddr(word)), "for a unit that snoops");
        // One that does not sees what was published, and perhaps this store before others: its line was evicted.
        self.check(|word| self.device(word), "for a unit that does not snoop");
        let evicted = |word| if word == at { self.memory.cpu_load(PhysAddr(at)) } else { self.device(word) };
        self.check(evicted, "when the line of the last store is evicted");
    }
}

/// Frames whose every store is watched.
struct Watched {
    frames: TableFrames,
    watch: Rc<Watch>,
}

struct WatchedTable<'w> {
    words: TableWords,
    frame: u64,
    watch: &'w Rc<Watch>,
}

impl Clone for WatchedTable<'_> {
    fn clone(&self) -> Self {
        *self
    }
}
impl Copy for WatchedTable<'_> {}

impl Table for WatchedTable<'_> {
    fn load(self, index: usize) -> u64 {
        self.words.load(index)
    }
    fn store(self, index: usize, value: u64) {
        self.words.store(index, value);
        self.watch.stored(self.frame + index as u64 * 8);
    }
    fn exchange(self, index: usize, current: u64, new: u64) -> Result<(), u64> {
        self.words.exchange(index, current, new)?;
        self.watch.stored(self.frame + index as u64 * 8);
        Ok(())
    }
}

impl Words for Watched {
    type Table = WatchedTable<'static>;

    fn table(&self, frame: PhysAddr) -> Self::Table {
        // One for each process is not worth more.
        let watch = Box::leak(Box::new(Rc::clone(&self.watch)));
        WatchedTable { words: self.frames.table(frame), frame: frame.0, watch }
    }
}

impl Frames for Watched {
    fn take(&mut self, bytes: usize) -> Option<PhysAddr> {
        self.frames.take(bytes)
    }
    fn give_back(&mut self, frame: PhysAddr, bytes: usize) {
        self.frames.give_back(frame, bytes);
    }
    fn publish(&self, range: Range<PhysAddr>) {
        self.frames.publish(range);
        self.watch.check(|word| self.watch.device(word), "after a publish");
    }
}

impl Watched {
    /// Does `change`, during which `watched` addresses are what they were, what they become, or nothing.
    fn during(
        &mut self,
        watched: &[u64],
        before: &[Option<Seen>],
        after: &[Option<Seen>],
        change: impl FnOnce(&mut Self),
    ) {
        let allowed = watched.iter().zip(before.iter().zip(after));
        let allowed =
            allowed.map(|(&at, (&old, &new))| (at, if old == new { vec![old] } else { vec![old, new] }));
        *self.watch.allowed.borrow_mut() = allowed.collect();
        self.watch.stores.borrow_mut().clear();
        change(self);
        self.watch.allowed.borrow_mut().clear();
        let found: Vec<_> = self.look(watched);
        assert_eq!(found, after, "in the end");
    }

    fn look(&self, watched: &[u64]) -> Vec<Option<Seen>> {
        let look =
            |&at: &u64| walk(|word| self.watch.device(word), self.watch.kind, self.watch.root.get(), at);
        watched.iter().map(look).collect()
    }

    /// How many words were stored, and how often the one that was stored most.
    fn stores(&self) -> (usize, u32) {
        let stores = self.watch.stores.borrow();
        (stores.len(), stores.values().copied().max().unwrap_or_default())
    }
}

fn every_store_leaves_a_page_as_before_or_as_after<F: Format>(kind: Kind) {
    let Shape { page, spans, leaves, .. } = Shape::of(kind);
    let memory = Memory::new(if page > 4096 { 1 << 21 } else { 1 << 19 });
    let mut frames = TableFrames::new(memory.clone(), usize::MAX);
    let tree = Tree::<F>::new(&mut frames, Limits::NONE).expect("a frame");
    let watch = Watch {
        memory,
        kind,
        root: Cell::new(tree.root().0),
        allowed: RefCell::default(),
        stores: RefCell::default(),
    };
    let mut watched = Watched { frames, watch: Rc::new(watch) };
    let (block, top) = (leaves[1], spans[spans.len() - 1]);

    // A neighbour that stays; pages on both sides of a boundary of the top table, with a block in the middle where one fits.
    let start = top - 2 * page;
    let bytes = 2 * page + block + 2 * page;
    map(&tree, &mut watched, start - page, 64 * block, page, Perms::READ).expect("there is room");
    let look = [
        start - page,
        start,
        start + page,
        top,
        top + block - 1,
        top + block,
        start + bytes - 1,
        start + bytes,
    ];
    let empty = watched.look(&look);
    assert_eq!(empty.iter().flatten().count(), 1);

    // The same once more, unwatched, to know how it ends.
    map(&tree, &mut watched, start, 128 * block + start % block, bytes, Perms::READ_WRITE)
        .expect("there is room");
    let mapped = watched.look(&look);
    assert_eq!(mapped.iter().flatten().count(), 7);
    let mut gather = Gather::new();
    tree.unmap(&mut watched, start, bytes, &mut gather).expect("it is mapped");
    gather.give_back(&mut watched);

    watched.during(&look, &empty, &mapped, |frames| {
        map(&tree, frames, start, 128 * block + start % block, bytes, Perms::READ_WRITE)
            .expect("there is room");
    });
    let mut read_only = mapped.clone();
    for seen in read_only[1..7].iter_mut().flatten() {
        (seen.write, seen.dirty) = (false, false);
    }
    let mut gather = Gather::new();
    watched.during(&look, &mapped, &read_only, |frames| {
        tree.protect(frames, start, bytes, Perms::READ, &mut gather).expect("it is mapped");
    });
    let leaves_changed = if watched.stores().1 == 1 { watched.stores().0 } else { 0 };
    assert_eq!(leaves_changed, 5, "XSA-328: each leaf by one store");
    watched.during(&look, &read_only, &empty, |frames| {
        tree.unmap(frames, start, bytes, &mut gather).expect("it is mapped");
    });
    assert_eq!(watched.stores().1, 1, "XSA-328: each entry by one store");
    gather.give_back(&mut watched);

    // A page after the other in tables that are there: one store each.
    for at in [start, start + page] {
        watched.watch.stores.borrow_mut().clear();
        map(&tree, &mut watched, at, 0, page, Perms::READ).expect("there is room");
        assert_eq!(watched.stores(), (1, 1));
    }
    // A whole table goes by one store to a live entry; what hardware still walks of it is what was there, or nothing.
    let table = spans[1];
    let rest = table - 2 * page;
    map(&tree, &mut watched, start + 2 * page - table, 0, page, Perms::READ).expect("there is room");
    map(&tree, &mut watched, start + 3 * page - table, page, rest - 2 * page, Perms::READ)
        .expect("there is room");
    let whole = [top - table, top - table + page, top - page];
    let (before, after) = (watched.look(&whole), [None; 3]);
    let mut gather = Gather::new();
    watched.during(&whole, &before, &after, |frames| {
        tree.unmap(frames, top - table, table, &mut gather).expect("it is mapped");
    });
    assert_eq!(watched.stores(), (2, 1), "the entry that pointed at it, and the link of what waits");
    gather.give_back(&mut watched);
    tree.take_down(&mut watched);
    assert_eq!(watched.frames.in_use(), 0);
}

#[test]
fn a_reader_at_every_single_store_sees_old_new_or_nothing() {
    in_every_format!(every_store_leaves_a_page_as_before_or_as_after);
}

/// Ends the other thread, however the one that owns it ends.
struct Stops<'s>(&'s AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Frames that are never given back, so that a reader may be late.
#[derive(Clone)]
struct Endless(&'static [[AtomicU64; 512]], Arc<AtomicU64>);

impl Endless {
    fn new(frames: usize) -> Self {
        let words = (0..frames).map(|_| [const { AtomicU64::new(0) }; 512]).collect::<Vec<_>>();
        Self(Box::leak(words.into_boxed_slice()), Arc::default())
    }
}

impl Words for Endless {
    type Table = &'static [AtomicU64; 512];

    fn table(&self, frame: PhysAddr) -> Self::Table {
        &self.0[(frame.0 / PAGE_SIZE) as usize]
    }
}

impl Frames for Endless {
    fn take(&mut self, bytes: usize) -> Option<PhysAddr> {
        assert_eq!(bytes, 4096);
        let next = self.1.fetch_add(1, SeqCst);
        ((next as usize) < self.0.len()).then_some(PhysAddr(next * PAGE_SIZE))
    }
    fn give_back(&mut self, _frame: PhysAddr, _bytes: usize) {}
    fn publish(&self, _range: Range<PhysAddr>) {}
}

#[test]
fn another_core_reads_what_was_mapped_or_nothing_while_it_changes() {
    let mut frames = Endless::new(20_000);
    let tree = Tree::<LongMode>::new(&mut frames, Limits::NONE).expect("a frame");
    let stop = AtomicBool::new(false);
    let start = (1 << 30) - 256 * PAGE_SIZE;
    let seen = AtomicU64::new(0);

    std::thread::scope(|scope| {
        let reader = frames.clone();
        let (tree, stop, seen) = (&tree, &stop, &seen);
        scope.spawn(move || {
            let mut random = Random::new(7);
            while !stop.load(Relaxed) {
                let address = start + random.below(512) * PAGE_SIZE;
                if let Some(leaf) = tree.translate(&reader, address) {
                    let offset = leaf.phys().0.wrapping_sub(address);
                    assert!(offset == 1 << 36 || offset == 1 << 37, "{address:#x} is at {:?}", leaf.phys());
                    assert_eq!(leaf.bytes(), PAGE_SIZE);
                    seen.fetch_add(1, Relaxed);
                }
            }
        });
        let _stops = Stops(stop);
        // As often as it takes for the other thread to have come and looked.
        for round in 0..ROUNDS_AT_MOST {
            if round >= 2_000 && seen.load(Relaxed) >= 1_000 {
                break;
            }
            let offset = 1 << (36 + round % 2);
            // Not aligned alike, so that no larger leaf fits; both sides of a boundary of level 3, whose tables come and go.
            map(tree, &mut frames, start, start + offset, 512 * PAGE_SIZE, Perms::READ_WRITE)
                .expect("nothing is there");
            let mut gather = Gather::new();
            tree.protect(&mut frames, start, 512 * PAGE_SIZE, Perms::READ, &mut gather)
                .expect("it is mapped");
            tree.unmap(&mut frames, start, 512 * PAGE_SIZE, &mut gather).expect("it is mapped");
            gather.give_back(&mut frames);
        }
    });

    assert!(seen.load(Relaxed) >= 1_000, "the reader was there");
}

/// Records a write to `address` as hardware does: in one step, and only in an entry that permits it. True if it was the first.
fn hardware_writes<F: Format>(page: u64, table: &[AtomicU64; 512]) -> bool {
    let writes = F::LAYOUT.writes;
    let index = (page / PAGE_SIZE % 512) as usize;
    let record = |entry: u64| {
        let may = entry & 1 != 0 && entry & writes.bits == writes.clean;
        may.then_some(entry & !writes.bits | writes.dirty)
    };
    table[index].fetch_update(SeqCst, SeqCst, record).is_ok()
}

fn no_write_is_lost<F: Format>() {
    let mut frames = Endless::new(16);
    let tree = Tree::<F>::new(&mut frames, Limits::PAGES).expect("a frame");
    let clean = Attributes { dirty: Dirty::Clean, ..Perms::READ_WRITE.into() };
    let bytes = 64 * PAGE_SIZE;
    map(&tree, &mut frames, 0, 0, bytes, clean).expect("there is room");
    // The table of pages is the one with a second entry.
    let table = frames.0.iter().find(|table| table[1].load(SeqCst) != 0).expect("there is one");
    let (stop, recorded) = (AtomicBool::new(false), AtomicU64::new(0));
    let mut reported = 0_u64;

    std::thread::scope(|scope| {
        let (tree, stop, recorded) = (&tree, &stop, &recorded);
        scope.spawn(move || {
            let mut random = Random::new(3);
            while !stop.load(Relaxed) {
                if hardware_writes::<F>(random.below(64) * PAGE_SIZE, table) {
                    recorded.fetch_add(1, SeqCst);
                }
            }
        });
        let executable = Attributes { perms: Perms { execute: true, ..Perms::READ_WRITE }, ..clean };
        let _stops = Stops(stop);
        // As often as it takes for the other thread to have come and written.
        for round in 0..ROUNDS_AT_MOST {
            if round >= 2_000 && recorded.load(SeqCst) >= 1_000 {
                break;
            }
            let mut gather = Gather::new();
            let attributes = if round % 2 == 0 { executable } else { clean };
            tree.protect(&mut frames, 0, bytes, attributes, &mut gather).expect("it is mapped");
            let mut count = |_, leaf: pgtable::Leaf<F>| {
                assert!(leaf.dirty());
                reported += 1;
            };
            tree.clear_dirty(&mut frames, 0, bytes, &mut gather, &mut count).expect("whole leaves");
        }
    });

    tree.clear_dirty(&mut frames, 0, bytes, &mut Gather::new(), |_, _| reported += 1).expect("whole leaves");
    assert!(reported >= 1_000, "hardware wrote: {reported}");
    assert_eq!(reported, recorded.load(SeqCst), "every first write is reported once");
    tree.clear_dirty(&mut frames, 0, bytes, &mut Gather::new(), |at, _| panic!("{at:#x} was cleared"))
        .expect("whole leaves");
}

#[test]
fn no_write_that_hardware_records_is_lost() {
    no_write_is_lost::<LongMode>();
    no_write_is_lost::<VtdSecondStage>();
    no_write_is_lost::<Stage1>();
    no_write_is_lost::<Stage2>();
}

#[test]
fn clearing_reports_each_leaf_that_may_have_been_written_and_gathers_it() {
    let mut frames = Endless::new(16);
    let tree = Tree::<Stage2>::new(&mut frames, Limits::NONE).expect("a frame");
    let as_is = |dirty| Attributes { dirty, ..Perms::READ_WRITE.into() };
    let block = 2 << 20;
    for (n, attributes) in
        [as_is(Dirty::Clean), as_is(Dirty::Dirty), as_is(Dirty::Untracked), Perms::READ.into()]
            .into_iter()
            .enumerate()
    {
        map(&tree, &mut frames, n as u64 * PAGE_SIZE, 0x1000, PAGE_SIZE, attributes).expect("there is room");
    }
    map(&tree, &mut frames, block, block, block, as_is(Dirty::Dirty)).expect("there is room");

    let (mut gather, mut seen) = (Gather::new(), Vec::new());
    tree.clear_dirty(&mut frames, 0, 3 * block, &mut gather, |at, leaf| seen.push((at, leaf.bytes())))
        .expect("whole leaves");

    // What is not tracked counts as written, and stays so.
    assert_eq!(seen, [(PAGE_SIZE, PAGE_SIZE), (2 * PAGE_SIZE, PAGE_SIZE), (block, block)]);
    let gathered: Vec<_> = gather.ranges().map(|range| (range.start(), range.bytes())).collect();
    assert_eq!(gathered, [(PAGE_SIZE, PAGE_SIZE), (block, block)]);
    let refused = tree.clear_dirty(&mut frames, block, PAGE_SIZE, &mut gather, |_, _| {});
    assert_eq!(refused, Err(Error::Superpage { address: block, bytes: block }));
}
