//! A machine with one VT-d unit, and the driver that has it in service.

use crate::{Hardware, TableFrames, grant, root};
use iommu::{
    Attachment, Bus, Commands, Completion, Error, Event, Events, Features, Invalidation, Iova, PAGE_SIZE,
    Pasid, Perms, PhysAddr, StreamId, Tables, Ticket, Translation,
};
use models::{
    memory::Memory,
    vtd::{Config, Pace, Refusal, VtdUnit},
};
use pgtable::{Format, Gather, Limits, Tree};
use vtd::{FRAME_WORDS, Found, Vtd};

/// A modelled machine: memory, one VT-d unit, and the driver that has it in service.
///
/// `B` is how the driver reaches the unit: straight, or through something that a test puts in between.
pub struct Machine<B = &'static VtdUnit> {
    /// The memory.
    pub memory: Memory,
    /// The unit, and the devices behind it.
    pub unit: &'static VtdUnit,
    /// The driver.
    pub vtd: Vtd<B>,
    /// Frames for translation tables.
    pub frames: TableFrames,
    /// How the unit behaves.
    pub hardware: Hardware,
}

/// Returns a unit with `config` and its memory of 1 MiB. It lives as long as the process: tests are short.
pub fn unit(config: Config) -> (&'static VtdUnit, Memory) {
    let memory = Memory::new(256 * FRAME_WORDS);
    (Box::leak(Box::new(VtdUnit::new(memory.clone(), config))), memory)
}

/// Takes what a unit needs: queues of one page (128 entries), 20 frames for tables, room for 64 answers.
pub fn needs(memory: &Memory) -> vtd::Memory {
    let frame = || memory.take(FRAME_WORDS, FRAME_WORDS);
    vtd::Memory {
        root: frame(),
        invalidation_queue: frame(),
        status: frame(),
        page_requests: frame(),
        frames: (0..20).map(|_| frame()).collect(),
        interrupts: frame(),
        x2apic: true,
        answers: 64,
    }
}

impl Hardware {
    /// A unit with `config`, and its memory.
    pub fn unit(self, config: Config) -> (&'static VtdUnit, Memory) {
        unit(Config {
            pace: self.looks().map_or(config.pace, Pace::OneIn),
            reorders: config.reorders || self == Self::Slow,
            acknowledge_after: config.acknowledge_after.max(self.acknowledges_after()),
            ..config
        })
    }

    /// A machine with its unit in service.
    pub fn machine(self, config: Config) -> Machine {
        let (unit, memory) = self.unit(config);
        let needs = needs(&memory);
        self.enable(unit, memory, unit, needs).expect("it comes into service")
    }

    /// A machine with its unit in service in legacy mode.
    pub fn legacy(self, config: Config) -> Machine {
        let (unit, memory) = self.unit(config);
        let needs = needs(&memory);
        let found = Found::probe(unit).expect("it is there").in_legacy_mode();
        self.from_found(found, unit, memory, needs).expect("it comes into service")
    }

    /// Takes `unit` into service through `bus`.
    pub fn enable<B: Bus + Clone>(
        self,
        unit: &'static VtdUnit,
        memory: Memory,
        bus: B,
        needs: vtd::Memory,
    ) -> Result<Machine<B>, Error> {
        self.from_found(Found::probe(bus)?, unit, memory, needs)
    }

    /// Takes `unit`, which is `found`, into service.
    pub fn from_found<B: Bus + Clone>(
        self,
        found: Found<B>,
        unit: &'static VtdUnit,
        memory: Memory,
        needs: vtd::Memory,
    ) -> Result<Machine<B>, Error> {
        Ok(Machine { hardware: self, ..Machine::from_found(found, unit, memory, needs)? })
    }
}

impl Machine {
    /// A machine with its unit in service.
    pub fn new(config: Config) -> Self {
        let (unit, memory) = unit(config);
        let needs = needs(&memory);
        Self::enable(unit, memory, unit, needs).expect("it comes into service")
    }

    /// A machine with its unit in service in legacy mode.
    pub fn legacy(config: Config) -> Self {
        let (unit, memory) = unit(config);
        let needs = needs(&memory);
        let found = Found::probe(unit).expect("it is there").in_legacy_mode();
        Self::from_found(found, unit, memory, needs).expect("it comes into service")
    }
}

impl<B: Bus + Clone> Machine<B> {
    /// Takes `unit` into service through `bus`.
    pub fn enable(unit: &'static VtdUnit, memory: Memory, bus: B, needs: vtd::Memory) -> Result<Self, Error> {
        Self::from_found(Found::probe(bus)?, unit, memory, needs)
    }

    /// Takes `unit`, which is `found`, into service.
    pub fn from_found(
        found: Found<B>,
        unit: &'static VtdUnit,
        memory: Memory,
        needs: vtd::Memory,
    ) -> Result<Self, Error> {
        let vtd = found.enable(needs)?;
        let frames = TableFrames::new(memory.clone(), usize::MAX);
        Ok(Self { memory, unit, vtd, frames, hardware: Hardware::Prompt })
    }

    /// Returns a page that begins with `word`, as devices see it.
    pub fn page(&self, word: u64) -> PhysAddr {
        let mut page = self.memory.take(FRAME_WORDS, FRAME_WORDS);
        page.clear();
        page.store(0, word);
        self.memory.publish(page.range(0, FRAME_WORDS)).expect("the page is in the memory");
        page.phys()
    }

    /// Returns an empty tree of `format`.
    pub fn tree<F: Format>(&mut self, _format: F) -> Tree<F> {
        Tree::new(&mut self.frames, Limits::NONE).expect("there are frames")
    }

    /// Maps a new page that begins with `word` at `iova`.
    pub fn map(&mut self, tree: &Tree<impl Format>, iova: Iova, word: u64) -> PhysAddr {
        let page = self.page(word);
        tree.map(&mut self.frames, iova.0, &grant(page.0, 1), Perms::READ_WRITE)
            .expect("nothing is mapped there");
        page
    }

    /// Unmaps the page at `iova`, and invalidates nothing.
    pub fn unmap(&mut self, tree: &Tree<impl Format>, iova: Iova) {
        tree.unmap(&mut self.frames, iova.0, PAGE_SIZE, &mut Gather::new()).expect("it is mapped");
    }

    /// Plugs in the device `stream` and assigns it.
    pub fn assign(&mut self, stream: StreamId, features: Features) {
        self.unit.plug(stream);
        let invalidations = self.vtd.tables.assign(stream, features).expect("it can be assigned");
        self.invalidate(&invalidations);
    }

    /// Attaches a PASID of a device, or accesses without one, to first-stage tables.
    pub fn attach(&mut self, stream: StreamId, pasid: Option<Pasid>, tree: &Tree<impl Format>) -> Attachment {
        self.attach_by(stream, pasid, Translation::Stage1(root(tree.root().0, tree.levels())))
    }

    /// Attaches a PASID of a device, or accesses without one.
    pub fn attach_by(
        &mut self,
        stream: StreamId,
        pasid: Option<Pasid>,
        translation: Translation,
    ) -> Attachment {
        let attached = self.vtd.tables.attach(stream, pasid, translation);
        let (attachment, invalidations) = attached.expect("it can be attached");
        self.invalidate(&invalidations);
        attachment
    }

    /// Detaches, and waits until hardware has let go.
    pub fn detach(&mut self, attachment: Attachment) {
        let (leaving, invalidations) = self.vtd.tables.detach(attachment).expect("it is attached");
        self.invalidate(&invalidations);
        self.vtd.tables.finish(leaving);
    }

    /// Blocks a device whose attachments are gone, and waits until hardware has let go.
    pub fn block(&mut self, stream: StreamId) {
        let (leaving, invalidations) = self.vtd.tables.block(stream).expect("it is assigned");
        self.invalidate(&invalidations);
        self.vtd.tables.finish(leaving);
    }

    /// Submits `invalidations`, and waits.
    pub fn invalidate(&mut self, invalidations: &[Invalidation]) {
        let ticket = self.submit(invalidations);
        self.wait(ticket);
    }

    /// Submits `invalidations`; where units are not prompt, tries again until there is room.
    pub fn submit(&mut self, invalidations: &[Invalidation]) -> Ticket {
        if self.hardware == Hardware::Full && self.unit.pace() != Pace::AtOnce {
            // A unit of old has no queue; and one that is looked at between stores is as quick as what fills it.
            let _ = (0..200).any(|_| self.vtd.commands.submit(&[]).is_err());
        }
        for _ in 0..10_000 {
            match self.vtd.commands.submit(invalidations) {
                Err(Error::QueueFull { .. } | Error::Busy { .. }) if self.hardware != Hardware::Prompt => {
                    self.unit.advance(1);
                }
                submitted => return submitted.expect("there is room"),
            }
        }
        panic!("there is never room");
    }

    /// Waits for `ticket`, on the unit's clock.
    pub fn wait(&mut self, ticket: Ticket) {
        for _ in 0..10_000 {
            if self.vtd.commands.poll(ticket) == Completion::Done {
                return;
            }
            self.unit.advance(1);
        }
        panic!("{ticket:?} does not complete");
    }

    /// Takes all events of one pass.
    pub fn pass(&mut self) -> Vec<Event> {
        self.vtd.events.acknowledge();
        let from = &mut self.vtd.events;
        let mut events = Vec::new();
        loop {
            // Page requests come the short way, and every other time the one by which all else comes.
            let short = if events.len() % 2 == 0 { from.next_ordinary() } else { None };
            let Some(event) = short.map(Event::PageRequest).or_else(|| from.next_event()) else {
                return events;
            };
            events.push(event);
            assert!(events.len() < 10_000, "a pass without an end");
        }
    }

    /// The device reads the word at `iova`, untranslated.
    pub fn read(&self, stream: StreamId, pasid: Option<Pasid>, iova: Iova) -> Result<u64, Refusal> {
        self.unit.dma_read(stream, pasid, iova, 8).map(word)
    }

    /// The device reads the word at `iova` through its device TLB.
    pub fn ats_read(&self, stream: StreamId, pasid: Option<Pasid>, iova: Iova) -> Result<u64, Refusal> {
        self.unit.ats_read(stream, pasid, iova, 8).map(word)
    }

    /// The driver broke no rule of the manual.
    pub fn assert_lawful(&self) {
        let violations = self.unit.violations();
        assert!(violations.is_empty(), "{} violations, first {:?}", violations.len(), violations[0]);
    }
}

fn word(bytes: Vec<u8>) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes were asked for"))
}
