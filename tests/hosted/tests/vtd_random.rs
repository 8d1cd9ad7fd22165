//! Changes of the VT-d driver's tables in any order, against a list of who should reach what.

use hosted::{Machine, Random, root, trust};
use iommu::{
    Attachment, Error, Features, Iova, Leaving, Pasid, StreamId, Tables, Translation, unit::LeavingPart,
};
use models::vtd::Config;
use pgtable::VtdSecondStage;
use std::collections::BTreeMap;

/// Two on one half of a bus, one on the other half, one on another bus.
const STREAMS: [StreamId; 4] = [StreamId(0x20), StreamId(0x28), StreamId(0xA0), StreamId(0x0120)];

/// Accesses without PASID; two PASIDs of one table; one of another.
fn numbers(legacy: bool) -> Vec<Option<Pasid>> {
    let pasids = [1, 63, 64].map(Pasid::new);
    if legacy { vec![None] } else { [None].into_iter().chain(pasids).collect() }
}

type Who = (StreamId, Option<Pasid>);

/// An attachment, what is read through it, and whether it is leaving.
struct Attached {
    attachment: Attachment,
    reads: Option<u64>,
    leaving: bool,
}

/// Who should reach what.
#[derive(Default)]
struct List {
    /// Devices, and whether each is blocked.
    devices: BTreeMap<StreamId, bool>,
    attached: BTreeMap<Who, Attached>,
    leaving: Vec<Leaving>,
}

impl List {
    fn reads(&self, who: Who) -> Option<u64> {
        let open = self.devices.get(&who.0) == Some(&false);
        self.attached.get(&who).filter(|at| open && !at.leaving).and_then(|at| at.reads)
    }

    /// Whether a device has attachments, leaving or not.
    fn has_attachments(&self, stream: StreamId) -> bool {
        self.attached.keys().any(|who| who.0 == stream)
    }
}

/// One world: a machine, and the list of what it should be.
struct World {
    machine: Machine,
    list: List,
    legacy: bool,
    here: Iova,
    tree: u64,
}

impl World {
    fn new(config: Config, legacy: bool) -> Self {
        let mut machine = if legacy { Machine::legacy(config) } else { Machine::new(config) };
        let here = Iova(machine.page(0xB).0);
        let tree = machine.tree(VtdSecondStage::<4>);
        machine.map(&tree, here, 2);
        STREAMS.into_iter().for_each(|stream| machine.unit.plug(stream));
        Self { machine, list: List::default(), legacy, here, tree: tree.root().0 }
    }

    /// Every device reaches what the list says and nothing else.
    fn check(&self) {
        for stream in STREAMS {
            for number in numbers(self.legacy) {
                let read = self.machine.read(stream, number, self.here).ok();
                assert_eq!(read, self.list.reads((stream, number)), "{stream:?} {number:?}");
            }
        }
    }

    fn assign(&mut self, stream: StreamId) {
        let features = Features { pasid: !self.legacy, ..Features::default() };
        match self.machine.vtd.tables.assign(stream, features) {
            Ok(invalidations) => {
                self.machine.invalidate(&invalidations);
                assert!(self.list.devices.insert(stream, false).is_none(), "it was there already");
            }
            Err(error) => {
                assert_eq!(error, Error::StreamBusy { stream });
                assert!(self.list.devices.contains_key(&stream));
            }
        }
    }

    fn attach(&mut self, who: Who, kind: u64) {
        let (stream, pasid) = who;
        let (translation, reads) = match kind {
            0 => (Translation::Stage2(root(self.tree, 4)), Some(2)),
            1 => (Translation::Bypass(trust()), Some(0xB)),
            _ => (Translation::Blocked, None),
        };
        let expected = match self.list.devices.get(&stream) {
            None => Some(Error::UnknownStream { stream }),
            Some(true) => Some(Error::StreamBusy { stream }),
            Some(false) if self.list.attached.contains_key(&who) => Some(Error::PasidState { stream, pasid }),
            Some(false) => None,
        };
        let attached = self.machine.vtd.tables.attach(stream, pasid, translation);
        match attached {
            Ok((attachment, invalidations)) => {
                assert_eq!(expected, None, "{attachment:?}");
                self.machine.invalidate(&invalidations);
                self.list.attached.insert(who, Attached { attachment, reads, leaving: false });
            }
            Err(error) => assert_eq!(Some(error), expected),
        }
    }

    fn detach(&mut self, who: Who) {
        let Some(at) = self.list.attached.get_mut(&who) else { return };
        match self.machine.vtd.tables.detach(at.attachment) {
            Ok((leaving, invalidations)) => {
                assert!(!at.leaving, "it left already");
                at.leaving = true;
                self.list.leaving.push(leaving);
                self.machine.invalidate(&invalidations);
            }
            Err(error) => {
                assert_eq!(error, Error::PasidState { stream: who.0, pasid: who.1 });
                assert!(at.leaving);
            }
        }
    }

    fn block(&mut self, stream: StreamId) {
        let blocked = self.list.devices.get(&stream).copied();
        match self.machine.vtd.tables.block(stream) {
            Ok((leaving, invalidations)) => {
                assert_eq!(blocked, Some(false));
                self.list.devices.insert(stream, true);
                self.list.leaving.push(leaving);
                self.machine.invalidate(&invalidations);
            }
            Err(Error::StreamBusy { .. }) => assert_eq!(blocked, Some(true)),
            Err(error) => {
                assert_eq!((error, blocked), (Error::UnknownStream { stream }, None));
            }
        }
    }

    fn silence(&mut self, stream: StreamId) {
        let silenced = self.machine.vtd.tables.silence(stream);
        assert_eq!(silenced.is_ok(), self.list.devices.get(&stream) == Some(&true));
        self.machine.invalidate(&silenced.unwrap_or_default());
    }

    /// Takes note of one that left; of a device only when all of its attachments are gone.
    fn finish(&mut self, at: usize) {
        let leaving = self.list.leaving.swap_remove(at);
        let stream = leaving.stream;
        match leaving.what {
            LeavingPart::Attachment(attachment) => {
                self.list.attached.remove(&(stream, attachment.pasid));
            }
            LeavingPart::Device if self.list.has_attachments(stream) => {
                return self.list.leaving.push(leaving);
            }
            LeavingPart::Device => {
                self.list.devices.remove(&stream);
            }
        }
        self.machine.vtd.tables.finish(leaving);
    }

    /// Everything leaves.
    fn end(&mut self) {
        let attached: Vec<_> = self.list.attached.keys().copied().collect();
        attached.into_iter().for_each(|who| self.detach(who));
        STREAMS.into_iter().for_each(|stream| self.block(stream));
        while let Some(last) = self.list.leaving.len().checked_sub(1) {
            // Attachments were put before their devices or come round again.
            let first = self.list.leaving.iter().position(|leaving| leaving.what != LeavingPart::Device);
            self.finish(first.unwrap_or(last));
        }
        assert!(self.list.devices.is_empty() && self.list.attached.is_empty());
    }
}

#[test]
fn whatever_the_order_of_changes_each_device_reaches_what_it_was_given() {
    let full = Config::full();
    let incoherent = Config { ecap: full.ecap & !(1 | 1 << 48), ..full };
    for config in [full, incoherent, full.with_caching_mode(), full.with_write_buffer()] {
        for legacy in [false, true] {
            for seed in 0..4 {
                let mut random = Random::new(seed);
                let mut world = World::new(config, legacy);
                let frames = world.machine.vtd.tables.frames_free();
                for _ in 0..400 {
                    let stream = STREAMS[random.below(4) as usize];
                    let numbers = numbers(legacy);
                    let who = (stream, numbers[random.below(numbers.len() as u64) as usize]);
                    match random.below(16) {
                        0..3 => world.assign(stream),
                        3..8 => world.attach(who, random.below(3)),
                        8..11 => world.detach(who),
                        11 => world.block(stream),
                        12 => world.silence(stream),
                        _ if world.list.leaving.is_empty() => {}
                        _ => world.finish(random.below(world.list.leaving.len() as u64) as usize),
                    }
                    world.check();
                }
                world.end();
                world.check();
                // Context tables stay: of both halves of a bus and of another, or of two buses.
                let contexts = if legacy { 2 } else { 3 };
                assert_eq!(world.machine.vtd.tables.frames_free(), frames - contexts);
                world.machine.assert_lawful();
            }
        }
    }
}
