//! A machine with one SMMUv3, and the driver that has it in service.

use crate::{Hardware, Moment, TableFrames, grant, root};
use iommu::{
    Attachment, Bus, Commands, Completion, Error, Event, Events, Failure, Features, Grant, Invalidation,
    Iova, PAGE_SIZE, Pasid, Perms, PhysAddr, StreamId, Tables, Ticket, Translation,
};
use models::{
    memory::Memory,
    smmuv3::{Config, Pace, Refusal, SmmuUnit},
};
use pgtable::{Gather, Limits, Stage1, Stage2, Tree};
use smmuv3::{FRAME_WORDS, Found, Smmu};
use std::{fmt, ops::Range, sync::Arc};

/// Streams that the stream table of [`needs`] holds, whatever its levels.
pub const STREAMS: u32 = 512;
/// Streams of a second-level table of [`needs`]: one frame of them.
pub const SECOND_LEVEL: u32 = 64;
/// Frames for context descriptors of [`needs`].
pub const CONTEXT_TABLES: usize = 16;
/// Entries of the command queue of [`needs`].
pub const COMMANDS: usize = 256;
/// Answers that [`needs`] asks room for.
pub const ANSWERS: usize = 64;
/// Entries of the event queue of [`needs`].
pub const EVENTS: usize = 128;
/// Entries of the page request queue of [`needs`].
pub const REQUESTS: usize = 256;

/// Whose commands fill a queue that is to be full: a stream past the end of every table.
const OTHERS: StreamId = StreamId(0xFFFF);
/// How often a queue that is full is met so, at least, before the unit gets on.
const FULL: usize = 3;

/// Which stage translates.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Stage {
    /// Stage 1.
    One,
    /// Stage 2.
    Two,
}

/// Which stream table a unit is given.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StreamTable {
    /// One level.
    Linear,
    /// Two levels, with a table of the second level for each place in the first.
    TwoLevels,
}

impl StreamTable {
    /// Returns what `STRTAB_BASE_CFG` says of it.
    pub fn format(self) -> u64 {
        // FMT [17:16], SPLIT [10:6], LOG2SIZE [5:0].
        match self {
            Self::Linear => 9,
            Self::TwoLevels => 1 << 16 | 6 << 6 | 9,
        }
    }

    /// Returns what becomes of an access by a stream of which neither itself nor a near one was ever assigned.
    pub fn untouched(self) -> Refusal {
        match self {
            // C_BAD_STE: there is an entry, and it is not valid.
            Self::Linear => Refusal::Fault(0x04),
            // C_BAD_STREAMID: there is no entry.
            Self::TwoLevels => Refusal::Fault(0x02),
        }
    }
}

/// Tables of either stage.
#[derive(Debug)]
pub enum StageTree {
    /// Stage 1, 48 bits.
    One(Tree<Stage1>),
    /// Stage 2, 44 bits.
    Two(Tree<Stage2<12, 44>>),
}

impl StageTree {
    /// Returns the physical address of the top table.
    pub fn root(&self) -> PhysAddr {
        match self {
            Self::One(tree) => tree.root(),
            Self::Two(tree) => tree.root(),
        }
    }

    /// Returns the number of levels.
    pub fn levels(&self) -> u8 {
        match self {
            Self::One(tree) => tree.levels(),
            Self::Two(tree) => tree.levels(),
        }
    }

    /// Maps `grant` at `address`.
    pub fn map(
        &self,
        frames: &mut TableFrames,
        address: u64,
        grant: &Grant,
        perms: Perms,
    ) -> Result<(), pgtable::Error> {
        match self {
            Self::One(tree) => tree.map(frames, address, grant, perms),
            Self::Two(tree) => tree.map(frames, address, grant, perms),
        }
    }

    /// Unmaps `bytes` bytes; what changed is the caller's to know.
    pub fn unmap(&self, frames: &mut TableFrames, address: u64, bytes: u64) -> Result<(), pgtable::Error> {
        match self {
            Self::One(tree) => tree.unmap(frames, address, bytes, &mut Gather::new()),
            Self::Two(tree) => tree.unmap(frames, address, bytes, &mut Gather::new()),
        }
    }

    /// Gives all tables back.
    pub fn take_down(self, frames: &mut TableFrames) {
        match self {
            Self::One(tree) => tree.take_down(frames),
            Self::Two(tree) => tree.take_down(frames),
        }
    }
}

/// A modelled machine: memory, one SMMUv3, and the driver that has it in service.
///
/// `B` is how the driver reaches the unit: straight, or through something that a test puts in between.
pub struct Machine<B = &'static SmmuUnit> {
    /// The memory.
    pub memory: Memory,
    /// The unit, and the devices behind it.
    pub unit: &'static SmmuUnit,
    /// The driver.
    pub smmu: Smmu<B>,
    /// Frames for translation tables.
    pub frames: TableFrames,
    /// How the unit behaves.
    pub hardware: Hardware,
    /// The errors that were told since the last recovery.
    pub told: u32,
}

/// Returns a unit with `config` and its memory of 2 MiB. It lives as long as the process: tests are short.
pub fn unit(config: Config) -> (&'static SmmuUnit, Memory) {
    let memory = Memory::new(512 * FRAME_WORDS);
    (Box::leak(Box::new(SmmuUnit::new(memory.clone(), config))), memory)
}

/// Takes what a unit needs: a stream table of [`STREAMS`] streams, and one frame for everything else.
pub fn needs(table: StreamTable, memory: &Memory) -> smmuv3::Memory {
    let frame = || memory.take(FRAME_WORDS, FRAME_WORDS);
    let places = STREAMS / SECOND_LEVEL;
    let (words, second_level) = match table {
        StreamTable::Linear => (STREAMS * 8, 0),
        StreamTable::TwoLevels => (places, places),
    };
    smmuv3::Memory {
        stream_table: memory.take(words as usize, words as usize),
        second_level: (0..second_level).map(|_| frame()).collect(),
        contexts: frame(),
        context_tables: (0..CONTEXT_TABLES).map(|_| frame()).collect(),
        empty_table: frame(),
        command_queue: frame(),
        status: frame(),
        event_queue: frame(),
        page_requests: frame(),
        answers: ANSWERS,
        stalling: heapless::Vec::new(),
        forced_write_back: false,
    }
}

impl Hardware {
    /// Entries of the command queue of [`needs`](Self::needs).
    pub const fn commands(self) -> usize {
        // Of one that is to be filled time and again, as few as the driver takes with these answers.
        if matches!(self, Self::Full) { 64 } else { COMMANDS }
    }

    /// Answers that [`needs`](Self::needs) asks room for.
    pub const fn answers(self) -> usize {
        if matches!(self, Self::Full) { 32 } else { ANSWERS }
    }

    /// What [`needs`] takes, with a command queue that suits.
    pub fn needs(self, table: StreamTable, memory: &Memory) -> smmuv3::Memory {
        let words = self.commands() * 2;
        smmuv3::Memory {
            command_queue: memory.take(words, words),
            answers: self.answers(),
            ..needs(table, memory)
        }
    }

    /// An SMMUv3 with `config`, and its memory.
    pub fn smmu_unit(self, config: Config) -> (&'static SmmuUnit, Memory) {
        unit(Config {
            pace: self.looks().map_or(config.pace, Pace::OneIn),
            acknowledge_after: config.acknowledge_after.max(self.acknowledges_after()),
            ..config
        })
    }

    /// A machine with its SMMUv3 in service.
    pub fn smmu(self, table: StreamTable, config: Config) -> Machine {
        let (unit, memory) = self.smmu_unit(config);
        let needs = self.needs(table, &memory);
        self.enable_smmu(unit, memory, unit, needs).expect("it comes into service")
    }

    /// Takes `unit` into service through `bus`.
    pub fn enable_smmu<B: Bus + Clone>(
        self,
        unit: &'static SmmuUnit,
        memory: Memory,
        bus: B,
        needs: smmuv3::Memory,
    ) -> Result<Machine<B>, Error> {
        Ok(Machine { hardware: self, ..Machine::enable(unit, memory, bus, needs)? })
    }
}

impl Machine {
    /// A machine with its unit in service.
    pub fn new(table: StreamTable, config: Config) -> Self {
        let (unit, memory) = unit(config);
        let needs = needs(table, &memory);
        Self::enable(unit, memory, unit, needs).expect("it comes into service")
    }
}

impl<B: Bus + Clone> Machine<B> {
    /// Takes `unit` into service through `bus`.
    pub fn enable(
        unit: &'static SmmuUnit,
        memory: Memory,
        bus: B,
        needs: smmuv3::Memory,
    ) -> Result<Self, Error> {
        let smmu = Found::probe(bus)?.enable(needs)?;
        let frames = TableFrames::new(memory.clone(), usize::MAX);
        Ok(Self { memory, unit, smmu, frames, hardware: Hardware::Prompt, told: 0 })
    }

    /// Returns an empty tree for `stage`.
    pub fn tree(&mut self, stage: Stage) -> StageTree {
        match stage {
            Stage::One => {
                StageTree::One(Tree::new(&mut self.frames, Limits::NONE).expect("there are frames"))
            }
            Stage::Two => {
                StageTree::Two(Tree::new(&mut self.frames, Limits::NONE).expect("there are frames"))
            }
        }
    }

    /// Maps a new page that begins with `word` at `iova`.
    pub fn map(&mut self, tree: &StageTree, iova: Iova, word: u64, perms: Perms) {
        let mut page = self.memory.take(FRAME_WORDS, FRAME_WORDS);
        page.clear();
        page.store(0, word);
        self.memory.publish(page.range(0, FRAME_WORDS)).expect("the page is in the memory");
        tree.map(&mut self.frames, iova.0, &grant(page.phys().0, 1), perms).expect("nothing is mapped there");
    }

    /// Unmaps `pages` pages from `iova`, and invalidates nothing.
    pub fn unmap(&mut self, tree: &StageTree, iova: Iova, pages: u64) {
        tree.unmap(&mut self.frames, iova.0, pages * PAGE_SIZE).expect("they are mapped");
    }

    /// Plugs in the device `stream` and assigns it.
    pub fn assign(&mut self, stream: StreamId, features: Features) {
        self.unit.plug(stream);
        let invalidations = self.smmu.tables.assign(stream, features).expect("it can be assigned");
        self.invalidate(&invalidations);
    }

    /// Attaches a device to tables.
    pub fn attach(&mut self, stream: StreamId, stage: Stage, tree: &StageTree) -> Attachment {
        let attached = self.smmu.tables.attach(stream, None, translation(stage, tree));
        let (attachment, invalidations) = attached.expect("it can be attached");
        self.invalidate(&invalidations);
        attachment
    }

    /// Attaches accesses with `pasid`, or without one.
    pub fn attach_to(
        &mut self,
        stream: StreamId,
        pasid: Option<Pasid>,
        translation: Translation,
    ) -> Result<Attachment, Error> {
        let (attachment, invalidations) = self.smmu.tables.attach(stream, pasid, translation)?;
        self.invalidate(&invalidations);
        Ok(attachment)
    }

    /// Replaces the translation of an attachment, step by step.
    pub fn replace(&mut self, attachment: Attachment, translation: Translation) -> Result<Attachment, Error> {
        let mut replacement = self.smmu.tables.replace(attachment, translation)?;
        let mut steps = 0;
        while let Some(invalidations) = self.smmu.tables.step(&mut replacement)? {
            self.invalidate(&invalidations);
            steps += 1;
            assert!(steps < 10, "a replacement without an end");
        }
        Ok(replacement.attachment())
    }

    /// Detaches, and waits until hardware has let go.
    pub fn detach(&mut self, attachment: Attachment) {
        let (leaving, invalidations) = self.smmu.tables.detach(attachment).expect("it is attached");
        self.invalidate(&invalidations);
        self.smmu.tables.finish(leaving);
    }

    /// Blocks a device whose attachment is gone, and waits until hardware has let go.
    pub fn block(&mut self, stream: StreamId) {
        let (leaving, invalidations) = self.smmu.tables.block(stream).expect("it is assigned");
        self.invalidate(&invalidations);
        self.smmu.tables.finish(leaving);
    }

    /// Submits `invalidations`, and waits.
    pub fn invalidate(&mut self, invalidations: &[Invalidation]) {
        let ticket = self.submit(invalidations);
        self.wait(ticket);
    }

    /// Submits `invalidations`; where units are not prompt, tries again until there is room.
    ///
    /// One that is to be full is filled before, and stands still until it was met so.
    pub fn submit(&mut self, invalidations: &[Invalidation]) -> Ticket {
        // The time of one that was paused is the test's.
        if self.hardware == Hardware::Full && self.unit.pace() != Pace::AtOnce {
            self.unit.stand_still(true);
            let others = [Invalidation::Device { stream: OTHERS, device_tlb: false }];
            while self.smmu.commands.submit(&others).is_ok() {}
            for _ in 0..FULL {
                let refused = self.smmu.commands.submit(invalidations);
                assert!(matches!(refused, Err(Error::QueueFull { .. } | Error::Busy { .. })), "{refused:?}");
            }
            self.unit.stand_still(false);
        }
        for _ in 0..10_000 {
            match self.smmu.commands.submit(invalidations) {
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
            if self.smmu.commands.poll(ticket) == Completion::Done {
                return;
            }
            self.unit.advance(1);
        }
        panic!("{ticket:?} does not complete");
    }

    /// Takes all events of one pass.
    pub fn pass(&mut self) -> Vec<Event> {
        self.smmu.events.acknowledge();
        self.smmu.events.look_for_errors();
        let from = &mut self.smmu.events;
        let mut events = Vec::new();
        loop {
            // Page requests come the short way, and every other time the one by which all else comes.
            let short = if events.len() % 2 == 0 { from.next_ordinary() } else { None };
            let Some(event) = short.map(Event::PageRequest).or_else(|| from.next_event()) else {
                return events;
            };
            if let Event::CommandsFailed { status } = event {
                self.told |= status;
            }
            events.push(event);
            assert!(events.len() < 10_000, "a pass without an end");
        }
    }

    /// Takes the unit out of its errors; returns what had stopped its commands.
    pub fn recover(&mut self) -> Vec<Failure> {
        self.smmu.commands.told(std::mem::take(&mut self.told));
        let failures: Vec<_> = std::iter::from_fn(|| self.smmu.commands.recover()).take(1000).collect();
        assert!(failures.len() < 1000, "a recovery without an end");
        failures
    }

    /// The device reads the word at `iova`, untranslated.
    pub fn read(&self, stream: StreamId, pasid: Option<Pasid>, iova: Iova) -> Result<u64, Refusal> {
        self.unit.dma_read(stream, pasid, iova, 8).map(word)
    }

    /// The device reads the word at `iova` through its device TLB.
    pub fn ats_read(&self, stream: StreamId, iova: Iova) -> Result<u64, Refusal> {
        self.unit.ats_read(stream, None, iova, 8).map(word)
    }

    /// Returns a word of the stream table entry of `stream`, as the unit sees it.
    pub fn stream_word(&self, stream: StreamId, word: u64) -> u64 {
        stream_word(self.unit, &self.memory, stream, word)
    }

    /// The driver broke no rule of the manual.
    pub fn assert_lawful(&self) {
        let violations = self.unit.violations();
        assert!(violations.is_empty(), "{} violations, first {:?}", violations.len(), violations[0]);
    }
}

/// Returns a word of the stream table entry of `stream`, as `unit` sees it; zero where there is no entry.
pub fn stream_word(unit: &SmmuUnit, memory: &Memory, stream: StreamId, word: u64) -> u64 {
    let load = |at| memory.device_load(PhysAddr(at)).expect("the table is in the memory");
    stream_place(unit, memory, stream).map_or(0, |place| load(place.0 + word * 8))
}

/// Returns where the stream table entry of `stream` is, if it has one.
pub fn stream_place(unit: &SmmuUnit, memory: &Memory, stream: StreamId) -> Option<PhysAddr> {
    const STRTAB_BASE: usize = 0x080;
    const STRTAB_BASE_CFG: usize = 0x088;
    // ADDR, and L2Ptr of the first level, are [55:6].
    const ADDRESS: u64 = 0x00FF_FFFF_FFFF_FFC0;
    let load = |at| memory.device_load(PhysAddr(at)).expect("the table is in the memory");
    let mut table = unit.read64(STRTAB_BASE) & ADDRESS;
    let mut index = stream.0;
    // FMT, SPLIT.
    let format = unit.read32(STRTAB_BASE_CFG);
    if format >> 16 & 3 == 1 {
        let split = format >> 6 & 0x1F;
        let descriptor = load(table + u64::from(index >> split) * 8);
        // Span.
        if descriptor & 0x1F == 0 {
            return None;
        }
        table = descriptor & ADDRESS;
        index &= (1 << split) - 1;
    }
    Some(PhysAddr(table + u64::from(index) * 64))
}

/// Returns `commands` without those of others, and their `CMD_SYNC`, that filled a queue.
pub fn own(commands: &[[u64; 2]]) -> Vec<[u64; 2]> {
    // CMD_CFGI_STE.
    let of_others = |words: &[u64; 2]| words[0] == u64::from(OTHERS.0) << 32 | 0x03;
    let mut own = Vec::new();
    let mut rest = commands.iter();
    while let Some(words) = rest.next() {
        if of_others(words) {
            rest.next();
        } else {
            own.push(*words);
        }
    }
    own
}

/// Names `tree` as the tables of `stage`.
pub fn translation(stage: Stage, tree: &StageTree) -> Translation {
    let root = root(tree.root().0, tree.levels());
    match stage {
        Stage::One => Translation::Stage1(root),
        Stage::Two => Translation::Stage2(root),
    }
}

fn word(bytes: Vec<u8>) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes were asked for"))
}

/// A bus that reaches its unit straight, and tells a test of each [`Moment`].
#[derive(Clone)]
pub struct Tapped {
    unit: &'static SmmuUnit,
    tap: Arc<dyn Fn(&'static SmmuUnit, Moment) + Send + Sync>,
}

impl Tapped {
    /// A bus to `unit` that calls `tap`.
    pub fn new(
        unit: &'static SmmuUnit,
        tap: impl Fn(&'static SmmuUnit, Moment) + Send + Sync + 'static,
    ) -> Self {
        Self { unit, tap: Arc::new(tap) }
    }

    fn tell(&self, moment: Moment) {
        (self.tap)(self.unit, moment);
    }
}

impl Bus for Tapped {
    fn read32(&self, offset: usize) -> u32 {
        self.tell(Moment::Access);
        self.unit.read32(offset)
    }

    fn write32(&self, offset: usize, value: u32) {
        self.tell(Moment::Access);
        self.unit.write32(offset, value);
        self.tell(Moment::Written { offset, value: value.into() });
    }

    fn read64(&self, offset: usize) -> u64 {
        self.tell(Moment::Access);
        self.unit.read64(offset)
    }

    fn write64(&self, offset: usize, value: u64) {
        self.tell(Moment::Access);
        self.unit.write64(offset, value);
        self.tell(Moment::Written { offset, value });
    }

    fn publish(&self, range: Range<PhysAddr>) {
        // Word by word: hardware may see some stores of a range before others.
        for at in (range.start.0..range.end.0).step_by(8) {
            self.unit.publish(PhysAddr(at)..PhysAddr(at + 8));
            self.tell(Moment::Published);
        }
    }

    fn observe(&self, range: Range<PhysAddr>) {
        self.unit.observe(range);
    }

    fn now_us(&self) -> u64 {
        self.unit.now_us()
    }
}

impl fmt::Debug for Tapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tapped {{ unit: {:?} }}", self.unit)
    }
}
