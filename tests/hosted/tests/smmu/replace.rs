//! Every translation of a device replaced by every other, while the modelled unit reads the tables at any moment.
//!
//! A step of a replacement stores some words. Between two completed invalidations the unit may have read each of them before
//! its store or after it, in any combination. So every combination is put before the unit in turn, and the device tries what
//! it can do by it.

use super::nested::{CONTEXT, Guest};
use crate::{HARDWARE, STREAM_TABLE};
use hosted::{
    Moment, grant, root,
    smmu::{Machine, Stage, StageTree, Tapped, translation},
    trust,
};
use iommu::{
    Attachment, Commands, Error, Features, Invalidation, Iova, Pasid, Perms, PhysAddr, StreamId, Tables,
    Translation,
};
use models::{
    memory::Memory,
    smmuv3::{Config, Refusal},
};
use pgtable::{Limits, Stage2, Tree};
use std::sync::{Arc, Mutex};

const DISK: StreamId = StreamId(0x20);

/// What a device has besides what is replaced.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    /// No PASIDs.
    Plain,
    /// PASIDs, of which none is attached.
    Free,
    /// PASIDs, of which 5 is attached.
    Busy,
}

/// The accesses that are tried: without a PASID, and with these.
const TRIED: [Option<u32>; 4] = [None, Some(0), Some(5), Some(6)];

/// What an access came to.
type Outcome = Result<u64, ()>;

/// A device, all that it can be attached to, and where its tables are.
struct Bench {
    machine: Machine<Tapped>,
    here: Iova,
    states: Vec<(&'static str, Translation)>,
    /// Where the unit reads what is replaced: first words, and how many.
    tables: Vec<(u64, u64)>,
    attachment: Attachment,
    /// The words of the tables after each store, in the unit's view.
    stores: Arc<Mutex<Vec<Words>>>,
    /// They are named by address alone.
    _trees: Vec<StageTree>,
}

/// Words by their address.
type Words = Vec<(u64, u64)>;

fn words_of(memory: &Memory, tables: &[(u64, u64)]) -> Words {
    let places = tables.iter().flat_map(|&(at, words)| (0..words).map(move |n| at + n * 8));
    places.map(|at| (at, memory.device_load(PhysAddr(at)).expect("inside"))).collect()
}

/// Content of the page of PASID 5.
const BESIDE: u64 = 0x555;

impl Bench {
    fn new(kind: Kind) -> Self {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let mut parts = HARDWARE.needs(STREAM_TABLE, &memory);
        parts.context_tables.truncate(4);
        let entry = (parts.stream_table.phys().0 + u64::from(DISK.0) * 64, 8);
        let contexts = parts.context_tables.iter().chain([&parts.contexts]);
        let mut tables: Vec<_> = contexts.map(|frame| (frame.phys().0, 512)).collect();
        tables.push(entry);
        let stores = Arc::new(Mutex::new(Vec::new()));
        let (kept, of, places) = (Arc::clone(&stores), memory.clone(), tables.clone());
        let bus = Tapped::new(unit, move |_, moment| {
            if moment == Moment::Published {
                kept.lock().expect("no test panics here").push(words_of(&of, &places));
            }
        });
        let mut machine = HARDWARE.enable_smmu(unit, memory, bus, parts).expect("it comes into service");
        // What a device that bypasses translation finds at its own address.
        let page = machine.memory.take(512, 512).phys();
        machine.memory.device_store(page, 0xB).expect("inside");
        let here = Iova(page.0);
        let mut trees = Vec::new();
        let mut tree = |machine: &mut Machine<Tapped>, stage, content| {
            let tree = machine.tree(stage);
            machine.map(&tree, here, content, Perms::READ_WRITE);
            let translation = translation(stage, &tree);
            trees.push(tree);
            translation
        };
        let mut states = vec![
            ("blocked", Translation::Blocked),
            ("bypass", Translation::Bypass(trust())),
            ("stage 1", tree(&mut machine, Stage::One, 0x1A)),
            ("another stage 1", tree(&mut machine, Stage::One, 0x1B)),
        ];
        let features = Features { pasid: kind != Kind::Plain, ..Features::default() };
        machine.assign(DISK, features);
        let attachment =
            machine.attach_to(DISK, None, Translation::Blocked).expect("nothing is attached yet");
        if kind == Kind::Busy {
            let beside = tree(&mut machine, Stage::One, BESIDE);
            machine.attach_to(DISK, Pasid::new(5), beside).expect("there is room");
            return Self { machine, here, states, tables, attachment, stores, _trees: trees };
        }
        states.push(("stage 2", tree(&mut machine, Stage::Two, 0x2A)));
        states.push(("another stage 2", tree(&mut machine, Stage::Two, 0x2B)));
        // 39 bits: three levels.
        let small = Tree::<Stage2<12, 39>>::new(&mut machine.frames, Limits::NONE).expect("there are frames");
        let page = machine.memory.take(512, 512).phys();
        machine.memory.device_store(page, 0x2C).expect("inside");
        small.map(&mut machine.frames, here.0, &grant(page.0, 1), Perms::READ).expect("nothing is there");
        states.push(("stage 2 of three levels", Translation::Stage2(root(small.root().0, small.levels()))));

        let mut guest = Guest::new(&mut machine);
        machine.detach(attachment);
        guest.place(&mut machine, DISK);
        let attachment = machine.attach_to(DISK, None, Translation::Blocked).expect("it is detached");
        machine.map(&guest.second, here, 0x6A, Perms::READ);
        let guest_tables = |guest: &mut Guest, content| {
            let (top, page) = (guest.page(), guest.page());
            guest.store(&machine, page, content);
            guest.map(&machine, top, here, page);
            top
        };
        let tops = [0x7A, 0x7B, 0x7C, 0x7D].map(|content| guest_tables(&mut guest, content));
        let contexts = [guest.page(), guest.page()];
        guest.context(&machine, contexts[0], 3, tops[2]);
        guest.context(&machine, contexts[1], 4, tops[3]);
        guest.context(&machine, contexts[1] + 6 * 64, 4, tops[2]);
        states.extend([
            ("a guest's pages", guest.pages(tops[0])),
            ("other pages of the guest", guest.pages(tops[1])),
            ("a guest's context", guest.contexts(contexts[0], 0)),
            // Not cached, not shared, and with eight descriptors: 3<<59, S1DSS 2.
            ("a guest's contexts", guest.entry([contexts[1] | 0xB | 3 << 59, 0x2, 0, 0, 0, 0, 0, 0])),
            ("a guest's bypass", guest.entry([9, 0, 0, 0, 0, 0, 0, 0])),
            ("a guest's abort", guest.entry([1, 0, 0, 0, 0, 0, 0, 0])),
        ]);
        trees.push(guest.second);
        Self { machine, here, states, tables, attachment, stores, _trees: trees }
    }

    fn try_all(&self) -> [Outcome; 4] {
        TRIED.map(|pasid| {
            let pasid = pasid.map(|pasid| Pasid::new(pasid).expect("20 bits"));
            match self.machine.read(DISK, pasid, self.here) {
                Ok(content) => Ok(content),
                Err(Refusal::Fault(_) | Refusal::Aborted) => Err(()),
                Err(other) => panic!("{other:?}"),
            }
        })
    }

    fn forget_all(&mut self) {
        // The checker's own means: whatever the hardware is like, it finds what was waited for before out of its way.
        let ticket = self.machine.smmu.commands.submit(&[Invalidation::All]).expect("there is room");
        self.machine.wait(ticket);
        self.machine.pass();
    }

    /// All words that the unit reads, in its view.
    fn words(&self) -> Words {
        words_of(&self.machine.memory, &self.tables)
    }

    /// Whether the unit could have read the word at `at` by the entry in `words`: it is in the entry, or in a table of context
    /// descriptors that it leads to.
    fn is_reachable(&self, words: &Words, at: u64) -> bool {
        let [.., (shared, _), (entry, _)] = self.tables[..] else { panic!("the entry is the last") };
        if at >= entry && at < entry + 64 {
            return true;
        }
        let (_, head) = words[words.len() - 8];
        // V, Config: 5 is stage 1, and 7 both; S1ContextPtr; S1CDMax.
        let pointer = head & 0x00FF_FFFF_FFFF_FFC0;
        match (head & 0xF, head >> 59) {
            (0xB, 0) => (pointer..pointer + 64).contains(&at),
            // Any of the frames that tables are made of.
            (0xB, _) => !(shared..shared + 4096).contains(&at),
            // The guest's second stage has one of them at this address.
            (0xF, _) => pointer == CONTEXT.0 && !(shared..shared + 4096).contains(&at),
            _ => false,
        }
    }

    fn store(&self, at: u64, word: u64) {
        self.machine.memory.device_store(PhysAddr(at), word).expect("inside");
    }

    /// What every combination of the words before and after a step lets the device do.
    ///
    /// What nothing led to before cannot have been read before; it is whole before the store that leads there.
    fn mixtures(&mut self, before: &Words) -> Vec<[Outcome; 4]> {
        let after = self.words();
        let changed = |of: &Words, than: &Words| -> Vec<usize> {
            (0..of.len()).filter(|&n| of[n] != than[n]).collect()
        };
        let all = changed(before, &after);
        let (read, unread): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|&n| self.is_reachable(before, before[n].0));
        assert!(read.len() <= 10, "{} words in one step", read.len());
        let stores = std::mem::take(&mut *self.stores.lock().expect("no test panics here"));
        if let Some(first) = stores.iter().position(|words| read.iter().any(|&n| words[n] != before[n])) {
            assert!(unread.iter().all(|&n| stores[first][n] == after[n]), "it is led to before it is whole");
        }
        let mut outcomes = Vec::new();
        for chosen in 0..1_u32 << read.len() {
            for (n, &word) in read.iter().enumerate() {
                let (at, value) = if chosen & 1 << n == 0 { before[word] } else { after[word] };
                self.store(at, value);
            }
            self.forget_all();
            outcomes.push(self.try_all());
        }
        read.iter().for_each(|&n| self.store(after[n].0, after[n].1));
        self.forget_all();
        outcomes
    }

    fn replace(&mut self, state: usize) {
        let (_, translation) = self.states[state];
        self.attachment = self.machine.replace(self.attachment, translation).expect("it can be replaced");
    }
}

/// Whether a device is translated without a gap while one state replaces another. A gap is where more than one of the words
/// that the unit looks at before and after have to change.
fn is_without_gap(kind: Kind, from: &str, to: &str) -> bool {
    let either = |of: &dyn Fn(&str) -> bool| of(from) || of(to);
    let both = |of: &dyn Fn(&str) -> bool| of(from) && of(to);
    let blocks = |name: &str| name == "blocked" || name == "a guest's abort";
    if from == to || either(&blocks) {
        return true;
    }
    // What has a second stage: which tables, and whether it is behind a first. A guest's all have the same.
    let small = |name: &str| name == "stage 2 of three levels";
    let guest = |name: &str| name.contains("guest");
    let second = |name: &str| name.contains("stage 2") || guest(name);
    let nested = |name: &str| guest(name) && name != "a guest's bypass";
    // Words 2 and 3.
    if both(&second) && small(from) != small(to) {
        return false;
    }
    // Words 0 and 3.
    if both(&second) && guest(from) != guest(to) && either(&nested) {
        return false;
    }
    // Words 0 and 1: of those that have a first stage, one says of its descriptors what the others do not.
    let bypasses_first = |name: &str| name == "bypass" && kind != Kind::Plain;
    let first = |name: &str| name.contains("stage 1") || nested(name) || bypasses_first(name);
    !(both(&first) && either(&|name| name == "a guest's contexts"))
}

#[test]
fn every_translation_becomes_every_other_by_way_of_both_or_of_none() {
    for kind in [Kind::Plain, Kind::Free, Kind::Busy] {
        let mut bench = Bench::new(kind);
        let states = bench.states.len();
        let (mut gaps, mut most) = (0, 0);
        for from in 0..states {
            for to in 0..states {
                let (names, goal) = ((bench.states[from].0, bench.states[to].0), bench.states[to].1);
                bench.replace(from);
                bench.forget_all();
                let old = bench.try_all();
                let mut met = Vec::new();
                let replaced = bench.machine.smmu.tables.replace(bench.attachment, goal);
                let mut replacement = replaced.expect("it can be replaced");
                let mut steps = 0;
                loop {
                    let before = bench.words();
                    bench.stores.lock().expect("no test panics here").clear();
                    let step = bench.machine.smmu.tables.step(&mut replacement).expect("it is there");
                    let Some(invalidations) = step else { break };
                    met.extend(bench.mixtures(&before));
                    bench.machine.invalidate(&invalidations);
                    steps += 1;
                }
                bench.attachment = replacement.attachment();
                let new = bench.try_all();

                let mut gap = false;
                for outcome in met {
                    for (n, &got) in outcome.iter().enumerate() {
                        let shared = TRIED[n] == Some(0) && [names.0, names.1].contains(&"bypass");
                        // PASID 0 has no descriptor of its own; the first is its own as well while accesses without PASID
                        // bypass translation, and those reach more than it says.
                        let fine = got == old[n] || got == new[n] || got.is_err();
                        let fine = fine || shared && (got == old[0] || got == new[0]);
                        assert!(fine, "{kind:?} {names:?}, PASID {:?}: {got:x?}", TRIED[n]);
                        gap |= got.is_err() && old[n].is_ok() && new[n].is_ok();
                    }
                    if kind == Kind::Busy {
                        assert_eq!(outcome[2], Ok(BESIDE), "{names:?}: PASID 5 has nothing to do with it");
                    }
                }
                assert_eq!(gap, !is_without_gap(kind, names.0, names.1), "{kind:?} {names:?}: a gap");
                most = most.max(steps);
                gaps += usize::from(gap);
            }
        }
        assert_eq!(gaps == 0, kind == Kind::Busy, "{kind:?}");
        assert_eq!(most, if kind == Kind::Busy { 2 } else { 4 }, "{kind:?}: steps");
        bench.machine.assert_lawful();
    }
}

#[test]
fn what_the_unit_remembers_of_the_translation_before_is_gone_after_the_last_step() {
    for kind in [Kind::Plain, Kind::Free, Kind::Busy] {
        let mut bench = Bench::new(kind);
        let states = bench.states.len();
        for to in 0..states {
            bench.replace(to);
            bench.forget_all();
            let expected = bench.try_all();
            for from in 0..states {
                bench.replace(from);
                let _ = bench.try_all();
                let (names, goal) = ((bench.states[from].0, bench.states[to].0), bench.states[to].1);
                let replaced = bench.machine.smmu.tables.replace(bench.attachment, goal);
                let mut replacement = replaced.expect("it can be replaced");
                loop {
                    let step = bench.machine.smmu.tables.step(&mut replacement).expect("it is there");
                    // It goes on trying, and the unit remembers what it can.
                    let _ = bench.try_all();
                    let Some(invalidations) = step else { break };
                    bench.machine.invalidate(&invalidations);
                    let _ = bench.try_all();
                }
                bench.attachment = replacement.attachment();

                assert_eq!(bench.try_all(), expected, "{kind:?} {names:?}");
                bench.machine.pass();
            }
        }
        bench.machine.assert_lawful();
    }
}

#[test]
fn a_pasid_s_tables_are_replaced_without_a_gap() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let pasid = Pasid::new(9);
    let here = Iova(0x4000_0000);
    let trees = [1, 2].map(|content| {
        let tree = machine.tree(Stage::One);
        machine.map(&tree, here, content, Perms::READ);
        tree
    });
    machine.assign(DISK, Features { pasid: true, ..Features::default() });
    let [one, two] = [0, 1].map(|n| translation(Stage::One, &trees[n]));
    let attachment = machine.attach_to(DISK, pasid, one).expect("there is room");
    assert_eq!(machine.read(DISK, pasid, here), Ok(1));

    let second = machine.replace(attachment, two).expect("it can be replaced");
    assert_eq!(machine.read(DISK, pasid, here), Ok(2));
    let blocked = machine.replace(second, Translation::Blocked).expect("it can be replaced");
    assert_eq!(machine.read(DISK, pasid, here), Err(Refusal::Fault(0x0A)));
    let third = machine.replace(blocked, one).expect("it can be replaced");
    assert_eq!(machine.read(DISK, pasid, here), Ok(1));
    let error = machine.replace(third, Translation::Bypass(trust())).err();
    assert_eq!(error, Some(Error::Unsupported { feature: "this translation of a PASID" }));

    assert_eq!((third.domain, third.pasid), (attachment.domain, pasid));
    machine.detach(third);
    machine.assert_lawful();
}

#[test]
fn a_pasid_comes_and_goes_by_way_of_its_tables_or_of_none() {
    let mut bench = Bench::new(Kind::Free);
    let pasid = Pasid::new(5);
    // Again and again, by the same descriptor: nothing of the tables before is met.
    for state in [2, 3, 2] {
        let (_, translation) = bench.states[state];
        let old = bench.try_all();
        let before = bench.words();
        bench.stores.lock().expect("no test panics here").clear();
        let attached = bench.machine.smmu.tables.attach(DISK, pasid, translation);
        let (attachment, invalidations) = attached.expect("there is room");
        let coming = bench.mixtures(&before);
        bench.machine.invalidate(&invalidations);
        let new = bench.try_all();
        let before = bench.words();
        let (leaving, invalidations) = bench.machine.smmu.tables.detach(attachment).expect("it is attached");
        let going = bench.mixtures(&before);
        bench.machine.invalidate(&invalidations);
        bench.machine.smmu.tables.finish(leaving);

        assert_eq!((old[2], new[2], bench.try_all()), (Err(()), Ok(0x1A + state as u64 - 2), old));
        for outcome in coming.into_iter().chain(going) {
            assert!((0..4).all(|n| outcome[n] == old[n] || outcome[n] == new[n]), "{outcome:x?}");
        }
    }
    bench.machine.assert_lawful();
}

#[test]
fn a_replacement_ends_when_its_attachment_does() {
    let mut bench = Bench::new(Kind::Plain);
    let machine = &mut bench.machine;
    let gone = Some(Error::PasidState { stream: DISK, pasid: None });
    let [_, bypass, one, .., abort] = bench.states[..] else { panic!("there are more") };
    let first = bench.attachment;
    let mut early = machine.smmu.tables.replace(first, bypass.1).expect("it is attached");
    // The one before names nothing any more.
    assert_eq!(machine.smmu.tables.detach(first).err(), gone);
    assert_eq!(machine.smmu.tables.replace(first, one.1).err(), gone);

    // Another replaces it half-way.
    let step = machine.smmu.tables.step(&mut early).expect("it is there").expect("there is something to do");
    machine.invalidate(&step);
    let second = machine.replace(early.attachment(), one.1).expect("it is attached");
    assert_eq!(machine.smmu.tables.step(&mut early).err(), gone);
    assert_eq!(machine.read(DISK, None, bench.here), Ok(0x1A));
    // It leaves half-way.
    let mut late = machine.smmu.tables.replace(second, bypass.1).expect("it is attached");
    let step = machine.smmu.tables.step(&mut late).expect("it is there").expect("there is something to do");
    machine.invalidate(&step);
    machine.detach(late.attachment());
    assert_eq!(machine.smmu.tables.step(&mut late).err(), gone);
    assert_eq!(machine.read(DISK, None, bench.here), Err(Refusal::Fault(0x04)));
    // All of the device leaves half-way.
    let attachment = machine.attach_to(DISK, None, abort.1).expect("it is free");
    let mut last = machine.smmu.tables.replace(attachment, one.1).expect("it is attached");
    let (leaving, invalidations) = machine.smmu.tables.block(DISK).expect("it is assigned");
    assert_eq!(machine.smmu.tables.step(&mut last).err(), gone);
    machine.invalidate(&invalidations);
    assert_eq!(machine.read(DISK, None, bench.here), Err(Refusal::Fault(0x04)));
    assert_eq!(
        machine.smmu.tables.replace(last.attachment(), one.1).err(),
        Some(Error::StreamBusy { stream: DISK })
    );
    machine.detach(last.attachment());
    machine.smmu.tables.finish(leaving);
    machine.assert_lawful();
}
