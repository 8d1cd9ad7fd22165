//! One life of a device behind the SMMUv3 driver, on a unit that is slow, on one that falls silent at any moment, and on one
//! whose queue is always full: it goes well, or it is told; and nothing reaches what it may not.

use hosted::smmu::{Machine, Stage, StreamTable, needs, translation, unit};
use iommu::{
    Bus, Commands, Completion, Error, Event, Events, Features, GroupTag, Invalidation, Iova, Outcome,
    PAGE_SIZE, PageRequest, PageResponse, Perms, PhysAddr, StreamId, Tables,
};
use models::smmuv3::{Config, Requested, SmmuUnit};
use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

const DISK: StreamId = StreamId(0x108);
const STRANGER: StreamId = StreamId(0x44);
const HERE: Iova = Iova(0x4_5000);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: false };
/// How long a caller waits, in microseconds.
const PATIENCE_US: u64 = 2_000;

/// How a unit behaves.
#[derive(Clone, Copy, Debug)]
enum Manner {
    /// It executes one command each time that somebody has looked this often where it is.
    Slow(usize),
    /// After this many looks and writes it does nothing any more: registers stay as they were, and take nothing.
    Silent(usize),
    /// After this many it executes nothing any more; its registers are as ever.
    Idle(usize),
    /// It executes nothing until its queue is full, or somebody has waited for long.
    Full,
}

impl Manner {
    /// Whether the unit is as it should be until it ends.
    fn ends(self) -> bool {
        matches!(self, Self::Silent(_) | Self::Idle(_))
    }
}

/// How a unit tells that commands are done, besides `CMDQ_CONS`: it does not; by message (IDR0.MSI); by event (IDR0.SEV).
const SIGNALS: [u32; 3] = [0, 1 << 13, 1 << 14];

/// A bus to a unit of some manner.
#[derive(Clone, Debug)]
struct Wrapped {
    unit: &'static SmmuUnit,
    manner: Manner,
    accesses: Arc<AtomicUsize>,
}

impl Wrapped {
    fn new(unit: &'static SmmuUnit, manner: Manner) -> Self {
        if !manner.ends() {
            unit.pause();
        }
        Self { unit, manner, accesses: Arc::default() }
    }

    /// Counts an access; returns whether the unit takes part in it.
    fn reaches(&self) -> bool {
        let before = self.accesses.fetch_add(1, SeqCst);
        match self.manner {
            Manner::Slow(looks) => {
                if before.is_multiple_of(looks) {
                    self.unit.execute(1);
                }
                true
            }
            Manner::Silent(after) => {
                if before == after {
                    self.unit.pause();
                }
                before < after
            }
            Manner::Idle(after) => {
                if before == after {
                    self.unit.stand_still(true);
                }
                true
            }
            Manner::Full => {
                // The queue of this file has 64 entries; or a caller looks again and again.
                if before.is_multiple_of(40) {
                    self.unit.execute(usize::MAX);
                }
                true
            }
        }
    }
}

impl Bus for Wrapped {
    fn read32(&self, offset: usize) -> u32 {
        self.reaches();
        self.unit.read32(offset)
    }
    fn write32(&self, offset: usize, value: u32) {
        if self.reaches() {
            self.unit.write32(offset, value);
        }
    }
    fn read64(&self, offset: usize) -> u64 {
        self.reaches();
        self.unit.read64(offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        if self.reaches() {
            self.unit.write64(offset, value);
        }
    }
    fn publish(&self, range: Range<PhysAddr>) {
        self.unit.publish(range);
    }
    fn observe(&self, range: Range<PhysAddr>) {
        // Whoever looks at a message looks at the unit.
        self.reaches();
        self.unit.observe(range);
    }
    fn now_us(&self) -> u64 {
        self.unit.now_us()
    }
}

/// Submits and waits, as long as [`PATIENCE_US`]; a time-out is never success.
fn invalidate(machine: &mut Machine<Wrapped>, invalidations: &[Invalidation]) -> Result<(), Error> {
    let start = machine.unit.now_us();
    let mut ticket = None;
    loop {
        let waited_us = machine.unit.now_us() - start;
        if waited_us > PATIENCE_US {
            return Err(Error::Timeout { register: "the command queue", waited_us });
        }
        let Some(ticket) = ticket else {
            match machine.smmu.commands.submit(invalidations) {
                Ok(queued) => ticket = Some(queued),
                Err(Error::QueueFull { .. } | Error::Busy { .. }) => {
                    // A caller looks again later.
                    machine.smmu.events.acknowledge();
                    machine.smmu.events.look_for_errors();
                    let _ = machine.smmu.events.next_fault();
                }
                Err(error) => return Err(error),
            }
            continue;
        };
        match machine.smmu.commands.poll(ticket) {
            Completion::Done => return Ok(()),
            Completion::Failed => return Err(Error::Failed { ticket }),
            Completion::Pending => {}
        }
    }
}

/// What one life showed.
#[derive(Debug, Default)]
struct Seen {
    /// The unit was taken into service.
    enabled: bool,
    /// Pages whose invalidation was told to be done.
    gone: Vec<Iova>,
}

/// A device comes, works, asks for a page, loses its pages one by one, and goes.
fn life(machine: &mut Machine<Wrapped>, stage: Stage, seen: &mut Seen) -> Result<(), Error> {
    let pages: Vec<Iova> = (0..4).map(|n| Iova(HERE.0 + n * PAGE_SIZE)).collect();
    machine.unit.plug(DISK);
    let invalidations = machine.smmu.tables.assign(DISK, ALL)?;
    invalidate(machine, &invalidations)?;
    let tree = machine.tree(stage);
    for &page in &pages {
        machine.map(&tree, page, page.0, Perms::READ);
    }
    let (attachment, invalidations) = machine.smmu.tables.attach(DISK, None, translation(stage, &tree))?;
    invalidate(machine, &invalidations)?;
    for &page in &pages {
        assert_eq!(machine.read(DISK, None, page), Ok(page.0));
        assert_eq!(machine.ats_read(DISK, page), Ok(page.0));
    }
    assert!(machine.read(DISK, None, Iova(0)).is_err());
    let tag = GroupTag { pasid: None, index: 3 };
    let request = PageRequest { stream: DISK, tag, iova: HERE, perms: Perms::READ, last: true };
    if machine.unit.page_request(request) == Requested::Queued {
        machine.smmu.events.acknowledge();
        machine.smmu.events.look_for_errors();
        for _ in 0..1000 {
            if let Some(Event::PageRequest(asked)) = machine.smmu.events.next_event() {
                let response =
                    PageResponse { stream: asked.stream, tag: asked.tag, outcome: Outcome::Invalid };
                machine.smmu.commands.respond(response).map_err(|(_, error)| error)?;
                break;
            }
        }
    }
    for &page in &pages {
        machine.unmap(&tree, page, 1);
        invalidate(machine, &[Invalidation::covering(attachment, page, PAGE_SIZE)])?;
        seen.gone.push(page);
    }
    let (detached, invalidations) = machine.smmu.tables.detach(attachment)?;
    invalidate(machine, &invalidations)?;
    seen.gone.push(Iova(0));
    machine.smmu.tables.finish(detached);
    let (leaving, invalidations) = machine.smmu.tables.block(DISK)?;
    invalidate(machine, &invalidations)?;
    machine.smmu.tables.finish(leaving);
    Ok(())
}

/// Lives through it on a unit of `manner`, with bits of [`SIGNALS`] in IDR0, and checks what holds in any.
fn live(manner: Manner, stage: Stage, signals: u32) -> (Seen, Result<(), Error>) {
    let full = Config::full();
    let (unit, memory) = unit(Config { idr0: full.idr0 | signals, clock_step_us: 20, ..full });
    let parts = smmuv3::Memory {
        // 64 commands.
        command_queue: memory.take(128, 128),
        answers: 16,
        ..needs(StreamTable::Linear, &memory)
    };
    let bus = Wrapped::new(unit, manner);
    let mut seen = Seen::default();
    let machine = Machine::enable(unit, memory, bus, parts);
    let result = machine.and_then(|mut machine| {
        seen.enabled = true;
        let result = life(&mut machine, stage, &mut seen);
        for &page in &seen.gone {
            assert!(machine.read(DISK, None, page).is_err(), "{manner:?}: {page:?} was told to be gone");
            assert!(machine.ats_read(DISK, page).is_err(), "{manner:?}: {page:?} was told to be gone");
        }
        for iova in [HERE, Iova(0), Iova(0x8000_0000)] {
            assert!(machine.read(STRANGER, None, iova).is_err(), "{manner:?}");
        }
        if !matches!(manner, Manner::Silent(_)) {
            machine.assert_lawful();
        }
        result
    });
    (seen, result)
}

/// Each stage, and each signal.
fn ways() -> impl Iterator<Item = (Stage, u32)> {
    [Stage::One, Stage::Two].into_iter().flat_map(|stage| SIGNALS.map(|signals| (stage, signals)))
}

#[test]
fn on_a_slow_unit_everything_goes_well() {
    for (stage, signals) in ways() {
        for looks in [1, 2, 3, 7] {
            let (seen, result) = live(Manner::Slow(looks), stage, signals);

            assert_eq!(result, Ok(()), "one command in {looks} looks, {signals:#x}");
            assert_eq!(seen.gone.len(), 5);
        }
    }
}

/// Lives once for each moment at which a unit may end, and counts how often it did not come into service, was given up, and
/// lived to the end.
fn end_at_each_moment(manner: fn(usize) -> Manner, stage: Stage, signals: u32) -> [usize; 3] {
    let mut counts = [0; 3];
    for moment in 0.. {
        let (seen, result) = live(manner(moment), stage, signals);
        match (seen.enabled, result) {
            (false, Err(error)) => {
                assert!(matches!(error, Error::Timeout { .. }), "{moment}: {error}");
                counts[0] += 1;
            }
            (true, Err(error)) => {
                assert!(
                    matches!(error, Error::Timeout { .. } | Error::QueueFull { .. }),
                    "{moment}: {error}"
                );
                counts[1] += 1;
            }
            (_, Ok(())) => {
                counts[2] += 1;
                if counts[2] == 3 {
                    break;
                }
            }
        }
    }
    counts
}

#[test]
fn a_unit_that_falls_silent_is_told_of_and_promises_nothing() {
    for (stage, signals) in ways() {
        let [refused, given_up, _] = end_at_each_moment(Manner::Silent, stage, signals);

        assert!(refused > 20 && given_up > 10, "{refused} times not in service, {given_up} times given up");
    }
}

#[test]
fn a_unit_that_executes_nothing_any_more_is_told_of_and_promises_nothing() {
    for (stage, signals) in ways() {
        let [refused, given_up, _] = end_at_each_moment(Manner::Idle, stage, signals);

        assert!(refused > 20 && given_up > 10, "{refused} times not in service, {given_up} times given up");
    }
}

#[test]
fn on_a_unit_whose_queue_is_full_everything_is_tried_again_until_it_goes_well() {
    for (stage, signals) in ways() {
        let (seen, result) = live(Manner::Full, stage, signals);

        assert_eq!(result, Ok(()), "{signals:#x}");
        assert_eq!(seen.gone.len(), 5);
    }
}

#[test]
fn a_queue_that_is_full_refuses_and_every_command_is_executed_once_there_is_room() {
    let (unit, memory) = unit(Config::full());
    let parts = smmuv3::Memory {
        command_queue: memory.take(128, 128),
        answers: 16,
        ..needs(StreamTable::Linear, &memory)
    };
    let mut machine = Machine::enable(unit, memory, unit, parts).expect("it comes into service");
    let one = [Invalidation::Device { stream: DISK, device_tlb: false }];
    let before = unit.executed().len();
    let (mut queued, mut refused, mut tickets) = (0, 0, Vec::new());
    for round in 0..500 {
        if round % 100 == 0 {
            unit.pause();
        }
        match machine.smmu.commands.submit(&one) {
            Ok(ticket) => {
                queued += 2;
                tickets.push(ticket);
            }
            Err(Error::QueueFull { needed: 2, .. }) => {
                refused += 1;
                unit.execute(3);
            }
            Err(error) => panic!("{error}"),
        }
    }
    unit.resume();

    assert!(refused > 50);
    assert_eq!(unit.executed().len() - before, queued);
    assert!(tickets.iter().all(|&ticket| machine.smmu.commands.poll(ticket) == Completion::Done));
    machine.assert_lawful();
}
