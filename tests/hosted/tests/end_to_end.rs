//! The whole way of a fault: a device asks, the driver reports, the broker puts together, the channel shows, a guest
//! repairs, and the answer goes back; and what happens when somebody on the way does not do his part.
//!
//! The unit and the devices are modelled, everything between is real. What a hypervisor adds is small enough to be
//! here: [`Host`].
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use broker::{AttachmentId, Attachments, Broker, Cookie, Policy, Queue, Verdict};
use channel::{
    Record,
    guest::Guest,
    host::{self, Pushed},
    record::{self, Request},
    ring::FRAMES,
};
use hosted::{Machine, Random, Window};
use iommu::{
    Attachment, Commands, Event, Features, GroupTag, Invalidation, Iova, Outcome, PAGE_SIZE, PageRequest,
    Pasid, Perms, StreamId, Tables,
};
use models::vtd::{Config, Refusal, Requested};
use pgtable::{Tree, VtdFirstStage};
use std::collections::VecDeque;

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };
const HERE: Iova = Iova(0x4000_0000);
const DEADLINE_US: u64 = 1_000;
const SLOTS: usize = 16;

fn pasid() -> Option<Pasid> {
    Pasid::new(5)
}

/// A device that its guest owns.
struct Owned {
    attachment: Attachment,
    id: AttachmentId,
    tree: Tree<VtdFirstStage>,
}

/// What a hypervisor does between the parts, for one guest with a channel.
struct Host {
    machine: Machine,
    queue: &'static Queue<SLOTS>,
    attachments: &'static Attachments<4>,
    broker: Broker<'static, 1, SLOTS, 4>,
    /// Slots that wait for the guest's home core.
    announced: VecDeque<u8>,
    channel: host::Host,
    window: Window,
    now_us: u64,
}

impl Host {
    fn new() -> Self {
        let machine = Machine::new(Config::full());
        // They live as long as the process, as a hypervisor's do.
        let queue: &Queue<SLOTS> = Box::leak(Box::new(Queue::new(1)));
        let attachments: &Attachments<4> = Box::leak(Box::default());
        let frames = [(); FRAMES].map(|()| machine.memory.take(512, 512));
        let window = Window::new(machine.memory.clone(), frames[0].phys());
        Self {
            machine,
            queue,
            attachments,
            broker: Broker::new([queue], attachments),
            announced: VecDeque::new(),
            channel: host::Host::new(frames),
            window,
            now_us: 0,
        }
    }

    fn guest(&self) -> Guest<Window> {
        Guest::open(self.window.clone()).expect("the host made it")
    }

    /// Gives `stream` to the guest, which has `budget` groups.
    fn give(&mut self, stream: StreamId, budget: u8) -> Owned {
        let tree = self.machine.tree(VtdFirstStage::<4>);
        self.machine.assign(stream, ALL);
        let attachment = self.machine.attach(stream, pasid(), &tree);
        let id = self.attachments.add(Policy {
            stream,
            pasid: pasid(),
            queue: 0,
            budget,
            device: stream.0 / 8,
            opaque: 0xFEED,
            deadline_us: DEADLINE_US,
        });
        Owned { attachment, id: id.expect("there is room"), tree }
    }

    /// The service core's pass: drain, admit, expire.
    fn service(&mut self) {
        for event in self.machine.pass() {
            match event {
                Event::PageRequest(request) => match self.broker.admit(request, self.now_us) {
                    Verdict::Forward { slot, .. } => self.announced.push_back(slot),
                    Verdict::Answer(response) => {
                        assert_eq!(self.machine.vtd.commands.respond(response), Ok(()));
                    }
                    Verdict::Nothing => {}
                },
                Event::RequestsLost => self.broker.overflowed(self.now_us),
                Event::Fault(fault) => {
                    if let Some((_, policy)) = self.attachments.find(fault.stream, fault.pasid) {
                        let event = record::Event {
                            number: 0,
                            lost: 0,
                            device: policy.device,
                            pasid: fault.pasid,
                            opaque: policy.opaque,
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
        while let Some(answer) = self.broker.expire(self.now_us) {
            assert!(answer.send(|response| self.machine.vtd.commands.respond(response)).is_ok());
        }
    }

    /// The home core's part: slots to records.
    fn forward(&mut self) {
        while let Some(slot) = self.announced.pop_front() {
            let Some(group) = self.queue.deliver(slot) else { continue };
            let pages = group.pages.len() as u32;
            let records = (0..pages as usize).map(|index| {
                let page = group.pages[index];
                Record::request(&Request {
                    cookie: group.cookie.0,
                    device: group.device,
                    pasid: group.tag.pasid,
                    opaque: group.opaque,
                    group: group.tag.index,
                    iova: page.iova,
                    perms: page.perms,
                    pages,
                    index: index as u32,
                })
            });
            assert_eq!(self.channel.push_group(records), Ok(Pushed::Yes));
        }
    }

    /// The guest's answer; returns whether it was taken.
    fn settle(&mut self, cookie: u64, outcome: Outcome) -> bool {
        match self.queue.settle(Cookie(cookie), outcome) {
            Ok(answer) => {
                assert!(answer.send(|response| self.machine.vtd.commands.respond(response)).is_ok());
                true
            }
            Err(_) => false,
        }
    }

    /// Takes `stream` away from the guest: design 5.1, in its order.
    fn take_away(&mut self, stream: StreamId, owned: Owned) {
        self.attachments.leave(owned.id);
        let (device, mut invalidations) = self.machine.vtd.tables.block(stream).expect("it is assigned");
        invalidations.push(Invalidation::PageRequestDrain).expect("there is room for it");
        self.machine.invalidate(&invalidations);
        // The drain epoch of the service core: everything that was queued before is looked at.
        self.service();
        self.broker.discard_leaving();
        while let Some(answer) = self.queue.evict(stream, pasid()) {
            assert!(answer.send(|response| self.machine.vtd.commands.respond(response)).is_ok());
        }
        self.machine.detach(owned.attachment);
        self.machine.vtd.tables.finish(device);
        self.attachments.remove(owned.id);
        owned.tree.take_down(&mut self.machine.frames);
    }
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
    assert_eq!(host.queue.outstanding(), 1);
    assert!(
        host.machine.ats_read(DISK, pasid(), HERE).is_err()
            && host.machine.read(DISK, pasid(), HERE).is_err()
    );
    assert!(host.machine.frames.in_use() < tables, "its tables went back");

    host.take_away(NIC, nic);
    assert_eq!((host.queue.outstanding(), host.machine.frames.in_use()), (0, 0));
    // The context table of their bus is kept for the next device.
    assert_eq!(host.machine.vtd.tables.frames_free(), frames - 1);
    let tally = host.queue.counters().tally();
    assert_eq!(tally.opened, tally.answered() + tally.discarded, "{tally:?}");
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
    fn step(&mut self, host: &Host, random: &mut Random) {
        let index = random.below(8) as u16;
        let left = self.begun[usize::from(index)].unwrap_or_else(|| random.below(3));
        let request = ask(self.stream, index, u64::from(index) * 4 + left, left == 0);
        match host.machine.unit.page_request(request) {
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
    for stream in [DISK, NIC] {
        host.give(stream, 6);
    }
    let mut guest = host.guest();
    let mut devices = [DISK, NIC].map(|stream| Device { stream, begun: [None; 8], finished: 0 });
    let mut overflows = 0;
    for round in 0..4_000 {
        // Mostly a few requests between two passes; now and then so many that the queue of 127 overflows. A device may
        // send parts of a group without end, so that its eight numbers suffice for that.
        let burst = if round % 16 == 0 { 400 } else { random.below(12) };
        for _ in 0..burst {
            let which = random.below(2) as usize;
            devices[which].step(&host, &mut random);
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
    host.now_us += DEADLINE_US;
    host.service();

    let finished: usize = devices.iter().map(|device| device.finished).sum();
    let (ours, own) = (host.machine.unit.answers().len(), host.machine.unit.auto_answered().len());
    assert_eq!(ours + own, finished, "one answer for each group");
    assert!(finished > 5_000 && own > 100 && overflows > 1_000, "{finished} {own} {overflows}");
    assert_eq!(host.machine.unit.waiting_groups(), []);
    let tally = host.queue.counters().tally();
    assert!(
        tally.succeeded > 100 && tally.declined > 100 && tally.expired > 100 && tally.refused > 100,
        "{tally:?}"
    );
    host.machine.assert_lawful();
}
