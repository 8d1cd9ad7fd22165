//! The whole way of a fault: a device asks, the driver reports, the broker puts together, the channel shows, a guest
//! repairs, and the answer goes back; and what happens when somebody on the way does not do his part.
//!
//! The unit and the devices are modelled, everything between is real. What a hypervisor adds is small enough to be
//! here: [`Host`].
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use broker::{
    Answer, AttachmentId, Broker, Cookie, DeviceId, Escalation, Expiry, Group, Inbox, Ledger, Limits, Owner,
    POISONED, Policy, QueueId, Settled, Shown, TICK_US, Taken, Tally, Verdict, Whose,
};
use channel::{
    Record,
    guest::Guest,
    host::{self, Batch, Pushed},
    record::{self, Request},
    ring::FRAMES,
};
use heapless::spsc;
use hosted::{Ends, Machine, Random, Window};
use iommu::{
    Attachment, Commands, Event, Events, Features, GroupTag, Invalidation, Iova, Outcome, PAGE_SIZE,
    PageRequest, Pasid, Perms, StreamId, Tables,
};
use models::vtd::{Config, Refusal, Requested, VtdUnit};
use pgtable::{Tree, VtdFirstStage};
use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };
const HERE: Iova = Iova(0x4000_0000);
const DEADLINE_US: u64 = 8 * TICK_US;
const SLOTS: usize = 16;
const PLACES: usize = SLOTS + POISONED;

fn pasid() -> Option<Pasid> {
    Pasid::new(5)
}

/// A device that its guest owns.
struct Owned {
    attachment: Attachment,
    id: AttachmentId,
    device: DeviceId,
    tree: Tree<VtdFirstStage>,
}

/// What a hypervisor does between the parts, for one guest with a channel.
struct Host {
    machine: Machine,
    ledger: &'static Ledger<1, SLOTS, 8, 8>,
    queue: QueueId,
    broker: Box<Broker<'static, 1, SLOTS, 8, 8, PLACES>>,
    inbox: Inbox<'static, 1, SLOTS, 8, 8>,
    channel: host::Host,
    window: Window,
    now_us: u64,
}

impl Host {
    fn new() -> Self {
        let machine = Machine::new(Config::full());
        // They live as long as the process, as a hypervisor's do.
        let ledger: &Ledger<1, SLOTS, 8, 8> = Box::leak(Box::new(Ledger::new(127)));
        let ring: &mut spsc::Queue<u16, { SLOTS + 1 }> = Box::leak(Box::default());
        let (producer, consumer) = ring.split();
        let mut broker = Box::new(Broker::new(ledger));
        broker.connect(0, producer).expect("it is large enough");
        let frames = [(); FRAMES].map(|()| machine.memory.take(512, 512));
        let window = Window::new(machine.memory.clone(), frames[0].phys());
        Self {
            machine,
            ledger,
            queue: ledger.open(Owner::Guest(1)).expect("there is one"),
            broker,
            inbox: Inbox::new(ledger, 0, consumer),
            channel: host::Host::new(frames),
            window,
            now_us: 0,
        }
    }

    fn guest(&self) -> Guest<Window> {
        Guest::open(self.window.clone()).expect("the host made it")
    }

    /// Gives `stream` to the guest, which may have `budget` requests.
    fn give(&mut self, stream: StreamId, budget: u32) -> Owned {
        let tree = self.machine.tree(VtdFirstStage::<4>);
        self.machine.assign(stream, ALL);
        let attachment = self.machine.attach(stream, pasid(), &tree);
        let escalation = Escalation { warn: 0, throttle: 0, requests_off: 0, block: 0 };
        let limits = Limits { escalation, deadline_us: DEADLINE_US, ..Limits::with_requests(budget) };
        let device = self.ledger.add_device(stream, &limits).expect("there is room");
        let requests = pasid().into();
        let (queue, name) = (self.queue, stream.0 / 8);
        let id = self.ledger.attach(&Policy { stream, requests, device, queue, name, opaque: 0xFEED });
        Owned { attachment, id: id.expect("there is room"), device, tree }
    }

    /// The service core's pass: drain, admit, expire.
    fn service(&mut self) {
        for event in self.machine.pass() {
            match event {
                Event::PageRequest(request) => match self.broker.admit(&request, self.now_us) {
                    Verdict::Refuse(response) => {
                        assert_eq!(self.machine.vtd.commands.respond(response), Ok(()));
                    }
                    Verdict::End(answer) => self.send(answer),
                    Verdict::Forward { .. } | Verdict::Nothing => {}
                },
                Event::RequestsLost => self.broker.overflowed(self.now_us),
                Event::Fault(fault) => {
                    if let Some((_, device, opaque)) = self.ledger.owner_of(fault.stream, fault.pasid) {
                        let event = record::Event {
                            number: 0,
                            lost: 0,
                            device,
                            pasid: fault.pasid,
                            opaque,
                            iova: fault.iova,
                            perms: Perms::READ,
                            reason: fault.reason.into(),
                        };
                        assert_eq!(self.channel.push_event(&event), Ok(Pushed::Yes));
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        loop {
            match self.broker.expire(self.now_us) {
                Expiry::Expired { answer, .. } | Expiry::Held(answer) => self.send(answer),
                Expiry::Nothing => {}
                Expiry::Done => return,
            }
        }
    }

    fn send(&mut self, answer: Answer<'static, SLOTS>) {
        assert!(answer.send(|response| self.machine.vtd.commands.respond(response)).is_ok());
    }

    /// The home core's part: slots to records.
    fn forward(&mut self) {
        while let Some(group) = self.inbox.next(self.now_us) {
            assert_eq!(self.channel.push_group(records(&group)), Ok(Pushed::Yes));
        }
    }

    /// The guest's answer; returns whether it was taken.
    fn settle(&mut self, cookie: u64, outcome: Outcome) -> bool {
        match self.ledger.settle(self.queue, Cookie(cookie), outcome, self.now_us) {
            Ok(Settled::Now(answer)) => {
                self.send(answer);
                true
            }
            Ok(Settled::Held) => true,
            Err(_) => false,
        }
    }

    /// Takes `stream` away from the guest: design 5.1, in its order.
    fn take_away(&mut self, stream: StreamId, owned: Owned) {
        self.ledger.leave(owned.id);
        let (device, mut invalidations) = self.machine.vtd.tables.block(stream).expect("it is assigned");
        invalidations.push(Invalidation::PageRequestDrain).expect("there is room for it");
        self.machine.invalidate(&invalidations);
        // The drain epoch of the service core: everything that was queued before is looked at.
        self.service();
        self.broker.discard_leaving();
        while let Some(answer) = self.ledger.evict(self.queue, Whose::Attachment(owned.id), self.now_us) {
            self.send(answer);
        }
        self.machine.detach(owned.attachment);
        self.machine.vtd.tables.finish(device);
        self.ledger.detach(owned.id);
        let tally = self.ledger.tally(owned.device).expect("it is there");
        assert_eq!(tally.opened, tally.answered() + tally.discarded, "{tally:?}");
        self.ledger.remove_device(owned.device);
        owned.tree.take_down(&mut self.machine.frames);
    }
}

/// A group, as its guest sees it.
fn records(group: &Group) -> impl ExactSizeIterator<Item = Record> {
    group.pages.iter().enumerate().map(|(index, page)| {
        Record::request(&Request {
            cookie: group.cookie.0,
            device: group.name,
            pasid: group.tag.pasid,
            opaque: group.opaque,
            group: group.tag.index,
            iova: page.iova(),
            perms: page.perms(),
            pages: group.pages.len() as u32,
            index: index as u32,
        })
    })
}

fn ask(stream: StreamId, index: u16, page: u64, last: bool) -> PageRequest {
    let tag = GroupTag { pasid: pasid(), index };
    PageRequest { stream, tag, iova: Iova(HERE.0 + page * PAGE_SIZE), perms: Perms::READ_WRITE, last }
}

#[test]
fn a_guest_repairs_what_its_device_missed_and_the_device_carries_on() {
    let mut host = Host::new();
    let disk = host.give(DISK, 4);
    let mut guest = host.guest();
    // The device finds nothing at three pages, and asks for all of them in one group.
    for page in 0..3 {
        let missing = host.machine.ats_read(DISK, pasid(), Iova(HERE.0 + page * PAGE_SIZE));
        assert_eq!(missing, Err(Refusal::NoAccess));
        assert_eq!(host.machine.unit.page_request(ask(DISK, 7, page, page == 2)), Requested::Queued);
    }

    host.service();
    host.forward();
    let mut cookie = None;
    for n in 0..3 {
        let request = guest.next_request().expect("the group is visible whole");
        assert_eq!((request.index, request.pages, request.group), (n, 3, 7));
        assert_eq!((request.device, request.opaque, request.pasid), (4, 0xFEED, pasid()));
        assert_eq!(*cookie.get_or_insert(request.cookie), request.cookie);
        host.machine.map(&disk.tree, request.iova, u64::from(n) + 100);
    }
    assert_eq!(guest.next_request(), None);
    assert_eq!(host.machine.unit.answers(), [], "nobody answered yet");
    assert!(host.settle(cookie.expect("there was a request"), Outcome::Success));

    let answers = host.machine.unit.answers();
    assert_eq!(answers.len(), 1);
    assert_eq!((answers[0].stream, answers[0].tag.index, answers[0].outcome), (DISK, 7, Outcome::Success));
    for page in 0..3 {
        let iova = Iova(HERE.0 + page * PAGE_SIZE);
        assert_eq!(host.machine.ats_read(DISK, pasid(), iova), Ok(page + 100));
        assert_eq!(host.machine.read(DISK, pasid(), iova), Ok(page + 100));
    }
    assert!(!host.settle(cookie.expect("there was a request"), Outcome::Success), "once");
    assert_eq!(host.machine.unit.answers().len(), 1);
    host.machine.assert_lawful();
}

#[test]
fn a_silent_guest_does_not_keep_its_device_waiting() {
    let mut host = Host::new();
    host.give(DISK, 4);
    let mut guest = host.guest();
    host.machine.unit.page_request(ask(DISK, 1, 0, true));
    host.service();
    host.forward();
    let request = guest.next_request().expect("it is visible");

    host.now_us = DEADLINE_US - 1;
    host.service();
    assert_eq!(host.machine.unit.answers(), []);
    host.now_us = DEADLINE_US;
    host.service();

    let outcomes = |host: &Host| host.machine.unit.answers().iter().map(|a| a.outcome).collect::<Vec<_>>();
    assert_eq!(outcomes(&host), [Outcome::Invalid]);
    // The device uses the number again; the late answer must not end the new group.
    host.machine.unit.page_request(ask(DISK, 1, 9, true));
    host.service();
    assert!(!host.settle(request.cookie, Outcome::Success));
    assert_eq!(outcomes(&host), [Outcome::Invalid]);
    assert_eq!(host.machine.unit.waiting_groups().len(), 1);
    host.machine.assert_lawful();
}

#[test]
fn a_guest_over_its_budget_is_refused_and_the_others_are_not() {
    let mut host = Host::new();
    host.give(DISK, 2);
    host.give(NIC, 2);
    for index in 0..4 {
        host.machine.unit.page_request(ask(DISK, index, 0, true));
    }
    host.machine.unit.page_request(ask(NIC, 0, 0, true));

    host.service();

    let refused: Vec<_> =
        host.machine.unit.answers().iter().map(|a| (a.stream, a.tag.index, a.outcome)).collect();
    assert_eq!(refused, [(DISK, 2, Outcome::Invalid), (DISK, 3, Outcome::Invalid)]);
    assert_eq!(host.machine.unit.waiting_groups().len(), 3);
}

#[test]
fn a_fault_that_cannot_be_repaired_reaches_the_guest_that_owns_the_device() {
    let mut host = Host::new();
    host.give(DISK, 2);
    let mut guest = host.guest();
    assert!(host.machine.read(DISK, pasid(), HERE).is_err());
    assert!(host.machine.read(NIC, pasid(), HERE).is_err());

    host.service();

    let event = guest.next_event().expect("it was told");
    assert_eq!((event.device, event.iova, event.opaque, event.number), (4, HERE, 0xFEED, 1));
    assert_eq!(event.reason, record::Reason::NotMapped);
    assert_eq!(guest.next_event(), None, "nothing of the other device, which is not its own");
}

#[test]
fn a_departure_ends_every_request_wherever_it_is_and_gives_everything_back() {
    let mut host = Host::new();
    let frames = host.machine.vtd.tables.frames_free();
    let disk = host.give(DISK, 8);
    let nic = host.give(NIC, 8);
    let mut guest = host.guest();
    let tables = host.machine.frames.in_use();
    host.machine.map(&disk.tree, HERE, 7);
    assert_eq!(host.machine.ats_read(DISK, pasid(), HERE), Ok(7));
    // One that the guest knows; one that waits for its core; one half-seen; the other device's.
    host.machine.unit.page_request(ask(DISK, 0, 1, true));
    host.service();
    host.forward();
    let known = guest.next_request().expect("it is visible").cookie;
    host.machine.unit.page_request(ask(DISK, 1, 1, true));
    host.machine.unit.page_request(ask(DISK, 2, 1, false));
    host.machine.unit.page_request(ask(NIC, 0, 1, true));
    host.service();
    // Two in the hardware queue that nobody has looked at, one of them half; one on its way.
    host.machine.unit.page_request(ask(DISK, 3, 1, true));
    host.machine.unit.page_request(ask(DISK, 4, 1, false));
    host.machine.unit.hold_page_requests();
    host.machine.unit.page_request(ask(DISK, 5, 1, true));

    host.take_away(DISK, disk);

    // The unit itself refuses what arrives once the device is blocked; the others were answered by us. Each once.
    let count = |index: u16| {
        let of =
            |a: &&models::vtd::Answer| (a.stream, a.tag.index, a.outcome) == (DISK, index, Outcome::Invalid);
        let (ours, own) = (host.machine.unit.answers(), host.machine.unit.auto_answered());
        (ours.iter().filter(of).count(), own.iter().filter(of).count())
    };
    assert_eq!([0, 1, 2, 3, 4, 5].map(count), [(1, 0), (1, 0), (0, 0), (1, 0), (0, 0), (0, 1)]);
    assert_eq!(host.machine.unit.waiting_groups(), [(NIC, ask(NIC, 0, 0, true).tag)], "the other's waits on");
    assert!(!host.settle(known, Outcome::Success), "the guest is too late");
    assert_eq!(host.ledger.outstanding(host.queue), 1);
    assert!(
        host.machine.ats_read(DISK, pasid(), HERE).is_err()
            && host.machine.read(DISK, pasid(), HERE).is_err()
    );
    assert!(host.machine.frames.in_use() < tables, "its tables went back");

    host.take_away(NIC, nic);
    assert_eq!((host.ledger.outstanding(host.queue), host.machine.frames.in_use()), (0, 0));
    // The context table of their bus is kept for the next device.
    assert_eq!(host.machine.vtd.tables.frames_free(), frames - 1);
    host.machine.unit.forget_page_requests(DISK);
    let again = host.give(DISK, 2);
    host.machine.map(&again.tree, HERE, 8);
    assert_eq!(host.machine.ats_read(DISK, pasid(), HERE), Ok(8));
    host.machine.assert_lawful();
}

/// A device that asks for groups of up to three pages, and starts a number again once it was answered.
struct Device {
    stream: StreamId,
    /// Of each number: the pages that are still to be asked for, if its group has begun.
    begun: [Option<u64>; 8],
    finished: usize,
}

impl Device {
    fn step(&mut self, unit: &VtdUnit, random: &mut Random) {
        self.go_on(unit, random.below(8) as u16, random);
    }

    fn go_on(&mut self, unit: &VtdUnit, index: u16, random: &mut Random) {
        let left = self.begun[usize::from(index)].unwrap_or_else(|| random.below(3));
        let request = ask(self.stream, index, u64::from(index) * 4 + left, left == 0);
        match unit.page_request(request) {
            Requested::GroupBusy => {}
            Requested::Queued | Requested::Lost => {
                self.begun[usize::from(index)] = left.checked_sub(1);
                self.finished += usize::from(left == 0);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn every_group_is_answered_once_whatever_overflows_is_late_or_is_silent() {
    let mut random = Random::new(17);
    let mut host = Host::new();
    let owned = [DISK, NIC].map(|stream| host.give(stream, 12));
    let mut guest = host.guest();
    let mut devices = [DISK, NIC].map(|stream| Device { stream, begun: [None; 8], finished: 0 });
    let mut overflows = 0;
    for round in 0..4_000 {
        // Mostly a few requests between two passes; now and then so many that the queue of 127 overflows. A device may
        // send parts of a group without end, so that its eight numbers suffice for that.
        let burst = if round % 16 == 0 { 400 } else { random.below(12) };
        for _ in 0..burst {
            let which = random.below(2) as usize;
            devices[which].step(host.machine.unit, &mut random);
            if round % 16 == 0 {
                let part = ask(devices[which].stream, 100 + random.below(50) as u16, 0, false);
                overflows += usize::from(host.machine.unit.page_request(part) == Requested::Lost);
            }
        }
        host.service();
        host.forward();
        while let Some(request) = guest.next_request() {
            // It answers the last page of a group; one group in five not at all, and some twice.
            if request.index + 1 == request.pages && random.below(5) != 0 {
                let outcome = if random.below(4) == 0 { Outcome::Invalid } else { Outcome::Success };
                assert!(host.settle(request.cookie, outcome));
                if random.below(4) == 0 {
                    assert!(!host.settle(request.cookie, outcome));
                }
            }
        }
        host.now_us += random.below(DEADLINE_US);
    }
    // Whatever was begun stays half; everything else ends.
    host.service();
    host.now_us += DEADLINE_US + TICK_US;
    host.service();

    let finished: usize = devices.iter().map(|device| device.finished).sum();
    let (ours, own) = (host.machine.unit.answers().len(), host.machine.unit.auto_answered().len());
    assert_eq!(ours + own, finished, "one answer for each group");
    assert!(finished > 5_000 && own > 100 && overflows > 1_000, "{finished} {own} {overflows}");
    assert_eq!(host.machine.unit.waiting_groups(), []);
    let mut tally = Tally::default();
    owned.iter().for_each(|owned| tally += host.ledger.tally(owned.device).expect("it is there"));
    assert!(
        tally.succeeded > 100 && tally.declined > 100 && tally.expired > 100 && tally.refused > 100,
        "{tally:?}"
    );
    host.machine.assert_lawful();
}

/// What all cores of the last test see.
struct Cores<C> {
    unit: &'static VtdUnit,
    ledger: &'static Ledger<1, SLOTS, 8, 8>,
    queue: QueueId,
    commands: Mutex<C>,
    now_us: AtomicU64,
    /// Devices that have asked for all that they want.
    finished: AtomicUsize,
    /// All is over, or someone has failed.
    done: AtomicBool,
}

impl<C: Commands> Cores<C> {
    fn send(&self, answer: Answer<'_, SLOTS>) {
        let mut commands = self.commands.lock().expect("no core has failed");
        assert!(answer.send(|response| commands.respond(response)).is_ok());
    }

    /// The service core: drain, admit, expire, on a clock that ticks once a pass.
    fn service(&self, events: &mut impl Events, broker: &mut Broker<'static, 1, SLOTS, 8, 8, PLACES>) {
        let _ends = Ends(&self.done);
        while !self.done.load(SeqCst) {
            let is_last = self.finished.load(SeqCst) == 2 && self.unit.waiting_groups().is_empty();
            let now_us = self.now_us.fetch_add(TICK_US / 8, SeqCst);
            events.acknowledge();
            while let Some(event) = events.next_event() {
                match event {
                    Event::PageRequest(request) => match broker.admit(&request, now_us) {
                        Verdict::Refuse(response) => {
                            let sent = self.commands.lock().expect("no core has failed").respond(response);
                            assert_eq!(sent, Ok(()));
                        }
                        Verdict::End(answer) => self.send(answer),
                        Verdict::Forward { .. } | Verdict::Nothing => {}
                    },
                    Event::RequestsLost => broker.overflowed(now_us),
                    other => panic!("{other:?}"),
                }
            }
            loop {
                match broker.expire(now_us) {
                    Expiry::Expired { answer, .. } | Expiry::Held(answer) => self.send(answer),
                    Expiry::Nothing => {}
                    Expiry::Done => break,
                }
            }
            if is_last {
                return;
            }
            thread::yield_now();
        }
    }

    /// The home core: from the ring to the channel.
    fn forward(&self, inbox: &mut Inbox<'static, 1, SLOTS, 8, 8>, channel: &mut host::Host) {
        let _ends = Ends(&self.done);
        while !self.done.load(SeqCst) {
            let mut batch = channel.requests().expect("the guest keeps to the rules");
            let offer = |batch: &mut Batch<'_>, group: Shown<'_>| {
                let records: Vec<_> = records(&Group::from(group)).collect();
                batch.offer(records.len(), |index| records[index]).then_some(())
            };
            loop {
                match inbox.take(self.now_us.load(SeqCst), |group| offer(&mut batch, group)) {
                    Taken::Yes(()) => batch.accept(),
                    Taken::Gone => {}
                    Taken::Left | Taken::Empty => break,
                }
            }
            drop(batch);
            thread::yield_now();
        }
    }

    /// The guest: it forgets one group in five, and answers some twice.
    fn answer(&self, mut guest: Guest<Window>) {
        let _ends = Ends(&self.done);
        let mut random = Random::new(5);
        let mut before = 0;
        while !self.done.load(SeqCst) {
            let Some(request) = guest.next_request() else {
                thread::yield_now();
                continue;
            };
            // Whatever the channel shows is one group after the other, and each is whole.
            let of_group = u64::from(request.group) * 4 + u64::from(request.pages - 1 - request.index);
            assert_eq!(request.iova, Iova(HERE.0 + of_group * PAGE_SIZE), "{request:?}");
            assert_eq!(request.cookie == before, request.index > 0, "{request:?}");
            before = request.cookie;
            if request.index + 1 < request.pages || random.below(5) == 0 {
                continue;
            }
            for _ in 0..=random.below(4) / 3 {
                let (cookie, now_us) = (Cookie(request.cookie), self.now_us.load(SeqCst));
                match self.ledger.settle(self.queue, cookie, Outcome::Success, now_us) {
                    Ok(Settled::Now(answer)) => self.send(answer),
                    Ok(Settled::Held) | Err(_) => {}
                }
            }
        }
    }

    /// The control path: ends a group of a device now and then.
    fn control(&self, devices: [DeviceId; 2]) {
        let _ends = Ends(&self.done);
        let mut random = Random::new(7);
        while !self.done.load(SeqCst) {
            let whose = Whose::Device(devices[random.below(2) as usize]);
            if random.below(64) == 0
                && let Some(answer) = self.ledger.evict(self.queue, whose, self.now_us.load(SeqCst))
            {
                self.send(answer);
            }
            thread::yield_now();
        }
    }

    /// A device that asks for so many groups, and finishes those that it has begun.
    fn ask(&self, stream: StreamId, groups: usize) -> usize {
        let mut random = Random::new(stream.0.into());
        let mut device = Device { stream, begun: [None; 8], finished: 0 };
        while device.finished < groups && !self.done.load(SeqCst) {
            device.step(self.unit, &mut random);
            thread::yield_now();
        }
        for index in 0..8 {
            while device.begun[usize::from(index)].is_some() && !self.done.load(SeqCst) {
                device.go_on(self.unit, index, &mut random);
                thread::yield_now();
            }
        }
        self.finished.fetch_add(1, SeqCst);
        device.finished
    }
}

#[test]
fn every_group_is_answered_once_when_all_who_take_part_run_at_the_same_time() {
    let mut host = Host::new();
    let owned = [DISK, NIC].map(|stream| host.give(stream, 12));
    let (guest, devices) = (host.guest(), [owned[0].device, owned[1].device]);
    let Host { machine, ledger, queue, mut broker, mut inbox, mut channel, .. } = host;
    let vtd::Vtd { mut events, commands, .. } = machine.vtd;
    let cores = Cores {
        unit: machine.unit,
        ledger,
        queue,
        commands: Mutex::new(commands),
        now_us: AtomicU64::new(0),
        finished: AtomicUsize::new(0),
        done: AtomicBool::new(false),
    };

    let finished = thread::scope(|scope| {
        scope.spawn(|| cores.forward(&mut inbox, &mut channel));
        scope.spawn(|| cores.answer(guest));
        scope.spawn(|| cores.control(devices));
        let asked = [DISK, NIC].map(|stream| {
            scope.spawn({
                let cores = &cores;
                move || cores.ask(stream, 4_000)
            })
        });
        cores.service(&mut events, &mut broker);
        asked.map(|device| device.join().expect("it ends"))
    });

    let (ours, own) = (cores.unit.answers().len(), cores.unit.auto_answered().len());
    assert_eq!(ours + own, finished.iter().sum::<usize>(), "one answer for each group");
    assert_eq!((cores.unit.waiting_groups(), ledger.outstanding(queue)), (vec![], 0));
    let mut tally = Tally::default();
    for device in devices {
        tally += ledger.tally(device).expect("it is there");
        assert_eq!(ledger.outstanding_requests(device), 0);
    }
    println!("{tally:?}, {own} answered by the unit");
    assert_eq!(tally.opened, tally.answered() + tally.discarded, "{tally:?}");
    assert!(tally.succeeded > 100 && tally.expired > 0 && tally.evicted > 0, "{tally:?}");
    assert!(cores.unit.violations().is_empty(), "{:?}", cores.unit.violations());
}
