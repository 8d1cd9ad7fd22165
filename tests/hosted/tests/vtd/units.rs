//! A machine with two VT-d units, and one with memory that firmware goes on using.

use crate::HARDWARE;
use hosted::{Machine, TableFrames, grant, needs, root};
use iommu::{
    Capabilities, Commands, Completion, Event, Events, Features, Invalidation, Iova, PAGE_SIZE, Perms,
    PhysAddr, StreamId, Translation,
};
use models::{
    memory::{BASE, Memory},
    vtd::{Config, Refusal, VtdUnit},
};
use pgtable::{Format, Gather, Limits, Tree, VtdFirstStage, VtdSecondStage};
use vtd::{
    FRAME_WORDS, Found,
    dmar::{Dmar, Requester, Reserved},
};

/// 00:04.0, behind the unit that claims it.
const CLAIMED: StreamId = StreamId(0x20);
/// 00:05.0, behind the unit for the rest.
const REST: StreamId = StreamId(0x28);
const PLAIN: Features = Features { device_tlb: false, page_requests: false, pasid: false };
const HERE: Iova = Iova(0x4000_0000);

/// Where the units' registers are.
const BASES: [u64; 2] = [0xFED9_0000, 0xFED9_1000];

/// A table: a host address width of 48 bits; a unit that claims 00:04.0, one that takes the rest; `more`.
///
/// DRHD is type 0: length, flags (1 is INCLUDE_PCI_ALL), size, segment, base, scopes. The scope is an endpoint (1) of eight
/// bytes: start bus 0, device 4, function 0.
fn dmar(more: &[u8]) -> Vec<u8> {
    let mut table = [b"DMAR".as_slice(), &[0; 32], &[47, 1], &[0; 10]].concat();
    table.extend([0, 0, 24, 0, 0, 0, 0, 0]);
    table.extend(BASES[0].to_le_bytes());
    table.extend([1, 8, 0, 0, 0, 0, 4, 0]);
    table.extend([0, 0, 16, 0, 1, 0, 0, 0]);
    table.extend(BASES[1].to_le_bytes());
    table.extend(more);
    let length = table.len() as u32;
    table[4..8].copy_from_slice(&length.to_le_bytes());
    table
}

fn requester(id: StreamId) -> Requester {
    Requester { segment: 0, id }
}

/// Two units in front of one memory, each in service, with a driver of its own.
struct Pair {
    machines: [Machine; 2],
    capabilities: [Capabilities; 2],
    frames: TableFrames,
    table: Vec<u8>,
}

impl Pair {
    fn new(configs: [Config; 2]) -> Self {
        let memory = Memory::new(256 * FRAME_WORDS);
        let mut capabilities = Vec::new();
        let machines = configs.map(|config| {
            let unit: &'static VtdUnit = Box::leak(Box::new(VtdUnit::new(memory.clone(), config)));
            let parts = needs(&memory);
            capabilities.push(Found::probe(unit).expect("it is there").capabilities());
            HARDWARE.enable(unit, memory.clone(), unit, parts).expect("it comes into service")
        });
        let frames = TableFrames::new(memory, usize::MAX);
        Self { machines, capabilities: [capabilities[0], capabilities[1]], frames, table: dmar(&[]) }
    }

    /// The unit that ACPI says a device is behind.
    fn of(&mut self, device: StreamId) -> &mut Machine {
        let table = Dmar::new(&self.table).expect("it is a table");
        let unit = table.unit_of(requester(device), |_| None).expect("each device has a unit");
        let at = BASES.iter().position(|&base| base == unit.base.0).expect("it is one of the two");
        &mut self.machines[at]
    }

    /// What may be used of a domain that has devices behind both.
    fn common(&self) -> Capabilities {
        Capabilities::common(self.capabilities[0], self.capabilities[1])
    }

    fn tree<F: Format>(&mut self, _: F, content: u64) -> Tree<F> {
        let tree = Tree::<F>::new(&mut self.frames, Limits::NONE).expect("there are frames");
        let page = self.machines[0].page(content);
        tree.map(&mut self.frames, HERE.0, &grant(page.0, 1), Perms::READ_WRITE).expect("nothing is there");
        tree
    }

    fn read(&mut self, device: StreamId) -> Result<u64, Refusal> {
        self.of(device).read(device, None, HERE)
    }

    fn assert_lawful(&self) {
        self.machines.iter().for_each(Machine::assert_lawful);
    }
}

#[test]
fn a_domain_over_two_units_uses_what_both_can_do() {
    // `qemu` has no second stage in scalable mode, no coherent walks; the other lacks first-stage leaves of 1 GiB.
    let full = Config::full();
    let pair = Pair::new([Config { cap: full.cap & !(1 << 56), ..full }, Config::qemu()]);

    let common = pair.common();

    assert!(pair.capabilities[0].stage2 && pair.capabilities[0].coherent_walks);
    assert!(common.stage1 && !common.stage2 && !common.coherent_walks && common.bypass);
    assert_eq!((common.levels, common.pasid_bits), (4, 20));
    assert_eq!(common.stage1_leaves, 1 << 12 | 1 << 21);
    assert_eq!(pair.capabilities[1].stage1_leaves, 1 << 12 | 1 << 21 | 1 << 30);
}

#[test]
fn one_domain_serves_devices_behind_two_units_each_through_its_own() {
    let mut pair = Pair::new([Config::full(), Config::qemu()]);
    assert!(pair.common().stage1);
    let tree = pair.tree(VtdFirstStage::<4>, 7);
    let translation = Translation::Stage1(root(tree.root().0, 4));
    let attachments = [CLAIMED, REST].map(|device| {
        pair.of(device).assign(device, PLAIN);
        pair.of(device).attach_by(device, None, translation)
    });

    assert_eq!([pair.read(CLAIMED), pair.read(REST)], [Ok(7), Ok(7)]);
    // A device that came to the other unit would be nobody's there.
    assert!(pair.of(REST).read(CLAIMED, None, HERE).is_err());
    assert!(pair.of(CLAIMED).read(REST, None, HERE).is_err());

    // What changes is told to both, and each forgets what it is told.
    let [claimed, rest] = attachments;
    tree.unmap(&mut pair.frames, HERE.0, PAGE_SIZE, &mut Gather::new()).expect("it is mapped");
    let executed = |pair: &mut Pair, device| pair.of(device).unit.executed().len();
    let before = executed(&mut pair, REST);
    pair.of(CLAIMED).invalidate(&[Invalidation::Pages { attachment: claimed, iova: HERE, pages: 1 }]);
    assert_eq!(executed(&mut pair, REST), before, "the other has not heard of it");
    assert_eq!([pair.read(CLAIMED), pair.read(REST)], [Err(Refusal::Fault(0x71)), Ok(7)]);
    pair.of(REST).invalidate(&[Invalidation::Pages { attachment: rest, iova: HERE, pages: 1 }]);
    assert_eq!(pair.read(REST), Err(Refusal::Fault(0x71)));
    pair.assert_lawful();
}

#[test]
fn commands_to_one_unit_leave_the_other_alone() {
    let mut pair = Pair::new([Config::full(), Config::full()]);
    let trees = [1, 2].map(|content| pair.tree(VtdSecondStage::<4>, content));
    let attachments = [(CLAIMED, &trees[0]), (REST, &trees[1])].map(|(device, tree)| {
        pair.of(device).assign(device, PLAIN);
        let translation = Translation::Stage2(root(tree.root().0, 4));
        pair.of(device).attach_by(device, None, translation)
    });
    // The same numbers mean something else at each unit.
    assert_eq!(attachments[0].domain, attachments[1].domain);
    assert_eq!(attachments[0].serial, attachments[1].serial);
    assert_eq!([pair.read(CLAIMED), pair.read(REST)], [Ok(1), Ok(2)]);

    pair.of(CLAIMED).invalidate(&[Invalidation::All]);
    pair.of(CLAIMED).detach(attachments[0]);
    pair.of(CLAIMED).block(CLAIMED);

    // The other remembers its translation: what it had of the page is still there although the table says no more.
    let frames = &mut pair.frames;
    trees[1].unmap(frames, HERE.0, PAGE_SIZE, &mut Gather::new()).expect("it is mapped");
    assert_eq!(pair.read(REST), Ok(2));
    assert_eq!(pair.read(CLAIMED), Err(Refusal::Fault(0x41)));
    // Nor are faults of one told by the other.
    assert_eq!(pair.of(REST).vtd.events.next_event(), None);
    assert!(matches!(pair.of(CLAIMED).vtd.events.next_event(), Some(Event::Fault(_))));
    // A unit that has stopped working does not hold up the other.
    pair.of(CLAIMED).unit.pause(0);
    let stuck = pair.of(CLAIMED).vtd.commands.submit(&[Invalidation::All]).expect("there is room");
    pair.of(REST).invalidate(&[Invalidation::Attachment(attachments[1])]);
    assert_eq!(pair.of(CLAIMED).vtd.commands.poll(stuck), Completion::Pending);
    assert_eq!(pair.read(REST), Err(Refusal::Fault(0x79)));
    pair.assert_lawful();
}

/// RMRR is type 1: length, two reserved bytes, segment, base, limit, scopes. 00:04.0 uses two pages at `base`.
fn region(base: PhysAddr) -> Vec<u8> {
    let mut region = vec![1, 0, 32, 0, 0, 0, 0, 0];
    region.extend(base.0.to_le_bytes());
    region.extend((base.0 + 2 * PAGE_SIZE - 1).to_le_bytes());
    region.extend([1, 8, 0, 0, 0, 0, 4, 0]);
    region
}

#[test]
fn a_device_that_firmware_uses_is_given_away_with_its_region_in_place_or_not_at_all() {
    let mut machine = HARDWARE.machine(Config::full());
    let mut memory = machine.memory.take(4 * FRAME_WORDS, FRAME_WORDS);
    memory.clear();
    (0..4).for_each(|page| memory.store(page * FRAME_WORDS, 0x100 + page as u64));
    machine.memory.publish(memory.range(0, 4 * FRAME_WORDS)).expect("it is in the memory");
    let base = PhysAddr(memory.phys().0 + PAGE_SIZE);
    assert!(base > BASE);
    let table = dmar(&region(base));
    let dmar = Dmar::new(&table).expect("it is a table");
    let tree = machine.tree(VtdSecondStage::<4>);
    machine.map(&tree, HERE, 1);

    assert!(dmar.kept_mapped(requester(CLAIMED), Reserved::Refuse, |_| None).is_err());
    assert!(dmar.kept_mapped(requester(REST), Reserved::Refuse, |_| None).is_ok(), "it is not that one's");
    let kept = dmar.kept_mapped(requester(CLAIMED), Reserved::KeepMapped, |_| None).expect("it is allowed");
    for range in kept {
        let grant = grant(range.start.0, (range.end.0 - range.start.0) / PAGE_SIZE);
        tree.map(&mut machine.frames, range.start.0, &grant, Perms::READ_WRITE).expect("nothing is there");
    }
    machine.assign(CLAIMED, PLAIN);
    machine.attach_by(CLAIMED, None, Translation::Stage2(root(tree.root().0, 4)));

    let read = |page: u64| machine.read(CLAIMED, None, Iova(memory.phys().0 + page * PAGE_SIZE));
    assert_eq!([1, 2].map(read), [Ok(0x101), Ok(0x102)], "its region, at its own addresses");
    assert_eq!([0, 3].map(read), [Err(Refusal::Fault(0x79)); 2], "and not a page more");
    assert_eq!(machine.read(CLAIMED, None, HERE), Ok(1));
    machine.assert_lawful();
}
