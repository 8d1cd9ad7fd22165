//! The VT-d driver behind hardware that is slow, that is silent, and whose queue is full: the same story each time, and the same
//! end, or a refusal that says so.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use hosted::{Machine, needs, unit};
use iommu::{
    Attachment, Bus, Commands, Completion, Error, Event, Events, Features, GroupTag, Invalidation, Iova,
    Outcome, PageRequest, PageResponse, Pasid, Perms, PhysAddr, StreamId, Tables, Ticket,
};
use models::vtd::{Config, Requested, VtdUnit};
use pgtable::VtdFirstStage;
use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering::SeqCst},
    },
};
use vtd::HEAD_LIMIT_US;

const DISK: StreamId = StreamId(0x20);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };

/// A unit that executes one descriptor of its queue for some register accesses and looks at the clock, or none at all.
#[derive(Clone, Debug)]
struct Slow {
    unit: &'static VtdUnit,
    accesses: Arc<AtomicU32>,
    /// One descriptor for so many; 0 is none.
    each: Arc<AtomicU32>,
}

impl Slow {
    fn step(&self) {
        let each = self.each.load(SeqCst);
        let count = self.accesses.fetch_add(1, SeqCst);
        if each != 0 && count.is_multiple_of(each) {
            self.unit.execute(1);
        }
    }
}

impl Bus for Slow {
    fn read32(&self, offset: usize) -> u32 {
        self.step();
        self.unit.read32(offset)
    }
    fn write32(&self, offset: usize, value: u32) {
        self.step();
        self.unit.write32(offset, value);
    }
    fn read64(&self, offset: usize) -> u64 {
        self.step();
        self.unit.read64(offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        self.step();
        self.unit.write64(offset, value);
    }
    fn publish(&self, range: Range<PhysAddr>) {
        self.unit.publish(range);
    }
    fn observe(&self, range: Range<PhysAddr>) {
        self.unit.observe(range);
    }
    fn now_us(&self) -> u64 {
        self.step();
        self.unit.now_us()
    }
}

/// A machine whose unit fetches `ahead` descriptors and executes one for each `each` accesses.
fn slow(config: Config, ahead: usize, each: u32) -> (Machine<Slow>, Slow) {
    let (unit, memory) = unit(config);
    unit.pause(ahead);
    let bus = Slow { unit, accesses: Arc::default(), each: Arc::new(AtomicU32::new(each)) };
    let parts = needs(&memory);
    (Machine::enable(unit, memory, bus.clone(), parts).expect("it comes into service"), bus)
}

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

/// What the story is told through: submits, however often it is refused for want of room.
fn submit<B: Bus + Clone>(machine: &mut Machine<B>, what: &[Invalidation]) -> Ticket {
    for _ in 0..100_000 {
        match machine.vtd.commands.submit(what) {
            Ok(ticket) => return ticket,
            Err(Error::QueueFull { .. } | Error::Busy { .. }) => _ = machine.vtd.commands.poll(Ticket(1)),
            Err(error) => panic!("{error}"),
        }
    }
    panic!("there is never room")
}

fn wait<B: Bus + Clone>(machine: &mut Machine<B>, ticket: Ticket) {
    for _ in 0..100_000 {
        match machine.vtd.commands.poll(ticket) {
            Completion::Done => return,
            Completion::Pending => {}
            Completion::Failed => panic!("{ticket:?} failed"),
        }
    }
    panic!("{ticket:?} does not complete")
}

fn invalidate<B: Bus + Clone>(machine: &mut Machine<B>, what: &[Invalidation]) {
    let ticket = submit(machine, what);
    wait(machine, ticket);
}

fn attached<B: Bus + Clone>(machine: &mut Machine<B>) -> (Attachment, pgtable::Tree<VtdFirstStage<4>>) {
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.unit.plug(DISK);
    let invalidations = machine.vtd.tables.assign(DISK, ALL).expect("it can be assigned");
    invalidate(machine, &invalidations);
    let translation = iommu::Translation::Stage1(hosted::root(tree.root().0, tree.levels()));
    let attached = machine.vtd.tables.attach(DISK, pasid(5), translation);
    let (attachment, invalidations) = attached.expect("it can be attached");
    invalidate(machine, &invalidations);
    (attachment, tree)
}

/// A device is given, asks, is answered, loses a page, is taken away: several times over.
fn story<B: Bus + Clone>(machine: &mut Machine<B>) {
    for round in 0..6_u16 {
        let (attachment, tree) = attached(machine);
        for page in 0..4 {
            let iova = Iova(0x1000 * (page + 1));
            assert!(machine.ats_read(DISK, pasid(5), iova).is_err());
            let tag = GroupTag { pasid: pasid(5), index: round * 4 + page as u16 };
            let request = PageRequest { stream: DISK, tag, iova, perms: Perms::READ, last: true };
            assert_eq!(machine.unit.page_request(request), Requested::Queued);
            assert_eq!(machine.pass(), [Event::PageRequest(request)]);
            machine.map(&tree, iova, page);
            let mut response = PageResponse { stream: DISK, tag, outcome: Outcome::Success };
            while let Err((back, error)) = machine.vtd.commands.respond(response) {
                assert!(matches!(error, Error::QueueFull { .. }), "{error}");
                response = back;
                let _ = machine.vtd.commands.poll(Ticket(1));
            }
            assert_eq!(machine.ats_read(DISK, pasid(5), iova), Ok(page));
        }

        machine.unmap(&tree, Iova(0x2000));
        invalidate(machine, &[Invalidation::Pages { attachment, iova: Iova(0x2000), pages: 1 }]);
        assert!(machine.ats_read(DISK, pasid(5), Iova(0x2000)).is_err());
        assert_eq!(machine.ats_read(DISK, pasid(5), Iova(0x3000)), Ok(2));

        let (leaving, mut invalidations) = machine.vtd.tables.detach(attachment).expect("it is attached");
        invalidations.push(Invalidation::PageRequestDrain).expect("there is room");
        invalidate(machine, &invalidations);
        machine.vtd.tables.finish(leaving);
        assert_eq!(machine.unit.device_tlb(DISK), []);
        let (leaving, invalidations) = machine.vtd.tables.block(DISK).expect("it is assigned");
        invalidate(machine, &invalidations);
        machine.vtd.tables.finish(leaving);
        assert_eq!(machine.unit.answers().len(), usize::from(round + 1) * 4, "each once");
    }
    assert_eq!(machine.unit.waiting_groups(), []);
    machine.assert_lawful();
}

#[test]
fn slow_hardware_changes_nothing_but_the_time() {
    for reorders in [false, true] {
        for (ahead, each) in [(0, 1), (0, 7), (3, 2), (16, 5), (usize::MAX, 11)] {
            // QEMU's unit says less about what it did not do.
            for base in [Config::qemu(), Config::full()] {
                let (mut machine, _) = slow(Config { reorders, acknowledge_after: 40, ..base }, ahead, each);

                story(&mut machine);
            }
        }
    }
}

#[test]
fn the_story_is_the_same_in_a_queue_that_is_nearly_full() {
    let (mut machine, bus) = slow(Config::full(), 0, 1);
    // What fills it is executed only when a step is made for want of room.
    bus.each.store(3, SeqCst);
    let filler = AtomicBool::new(true);
    while filler.load(SeqCst) {
        let full = machine.vtd.commands.submit(&[]).is_err();
        filler.store(!full, SeqCst);
    }

    story(&mut machine);
}

#[test]
fn a_full_queue_refuses_everything_but_answers_and_takes_it_when_there_is_room() {
    let (mut machine, bus) = slow(Config::full(), 0, 1);
    let (attachment, _tree) = attached(&mut machine);
    let ask = |index| {
        let tag = GroupTag { pasid: pasid(5), index };
        PageRequest { stream: DISK, tag, iova: Iova(0x1000), perms: Perms::READ, last: true }
    };
    for index in 0..64 {
        assert_eq!(machine.unit.page_request(ask(index)), Requested::Queued);
    }
    assert_eq!(machine.pass().len(), 64);
    bus.each.store(0, SeqCst);
    let tickets: Vec<Ticket> = (0..200).map_while(|_| machine.vtd.commands.submit(&[]).ok()).collect();
    assert!(tickets.len() > 50);

    for what in [
        vec![],
        vec![Invalidation::All],
        vec![Invalidation::Pages { attachment, iova: Iova(0x1000), pages: 1 }],
        vec![Invalidation::Attachment(attachment), Invalidation::PageRequestDrain],
    ] {
        let refused = machine.vtd.commands.submit(&what);
        assert!(matches!(refused, Err(Error::QueueFull { .. })), "{refused:?}");
    }
    for index in 0..64 {
        let response = PageResponse { stream: DISK, tag: ask(index).tag, outcome: Outcome::Success };
        assert_eq!(machine.vtd.commands.respond(response), Ok(()));
    }
    machine.unit.resume();

    assert!(tickets.into_iter().all(|ticket| machine.vtd.commands.poll(ticket) == Completion::Done));
    assert_eq!(machine.unit.answers().len(), 64);
    machine.invalidate(&[Invalidation::Attachment(attachment)]);
    machine.assert_lawful();
}

/// From some moment on the unit fetches, or does not even that, and completes nothing.
#[test]
fn with_silent_hardware_every_operation_ends_and_nothing_is_used_again() {
    for ahead in [0, 5, usize::MAX] {
        let (mut machine, bus) = slow(Config::full(), ahead, 1);
        let (attachment, _tree) = attached(&mut machine);
        let free = machine.vtd.tables.frames_free();
        bus.each.store(0, SeqCst);

        let (leaving, invalidations) = machine.vtd.tables.detach(attachment).expect("it is attached");
        let mut tickets = vec![machine.vtd.commands.submit(&invalidations).expect("there is room")];
        tickets.extend((0..20).map_while(|_| machine.vtd.commands.submit(&[Invalidation::All]).ok()));
        // The device's ticket has no end, so no other device is asked.
        let more = machine.vtd.commands.submit(&invalidations);
        assert!(matches!(more, Err(Error::Busy { .. } | Error::QueueFull { .. })), "{more:?}");

        let mut failures = Vec::new();
        for &ticket in &tickets {
            let polls = (0..10).map(|_| {
                machine.unit.advance(HEAD_LIMIT_US / 4);
                machine.vtd.commands.poll(ticket)
            });
            let end = polls.into_iter().find(|&completion| completion != Completion::Pending);
            assert_eq!(end, Some(Completion::Failed), "{ahead}: {ticket:?}");
            failures.extend(machine.vtd.commands.recover());
        }

        assert_eq!(failures.len(), tickets.len(), "{ahead}: each is told");
        assert_eq!(failures[0].stream, Some(DISK));
        assert!(failures[1..].iter().all(|failure| failure.stream.is_none()));
        // What it was to take out of use is still in use: its place in the tables, its domain, its frames.
        assert_eq!(machine.vtd.tables.frames_free(), free);
        let translation = iommu::Translation::Stage1(hosted::root(0x8_0000_0000, 4));
        assert!(machine.vtd.tables.attach(DISK, pasid(5), translation).is_err());
        assert!(matches!(machine.vtd.commands.submit(&[]), Ok(_) | Err(Error::QueueFull { .. })));
        assert_eq!(machine.vtd.events.next_event(), None);

        // It wakes up: what was failed stays so, and what is submitted now is done.
        machine.unit.resume();
        assert!(tickets.iter().all(|&ticket| machine.vtd.commands.poll(ticket) == Completion::Failed));
        machine.invalidate(&invalidations);
        machine.vtd.tables.finish(leaving);
        assert!(machine.vtd.tables.attach(DISK, pasid(5), translation).is_ok());
        machine.assert_lawful();
    }
}
