//! What a page request's way through broker and channel costs, and its way back.

use bench::Row;
use broker::{
    Answer, Broker, Cookie, Inbox, Ledger, Limits, Owner, POISONED, Policy, QueueId, Requests, Settled,
    Shown, Taken, Verdict,
};
use channel::{
    Record,
    host::{Batch, Host},
    record::{RECORD_WORDS, Request},
    ring::{HEADER, REQUESTS, REQUESTS_WORD},
};
use heapless::spsc;
use iommu::{GroupTag, Iova, Outcome, PageRequest, PageResponse, Pasid, Perms, StreamId};
use models::memory::Memory;
use std::{hint::black_box, time::Instant};

/// Groups that are counted together.
const GROUPS: usize = 64;

/// Slots, as many as a queue has, and places of devices and attachments: for 65,536 devices, of which half of the places stay
/// free.
const SLOTS: usize = 4096;
const DEVICES: usize = 131_072;

type Books = Ledger<1, SLOTS, DEVICES, DEVICES>;
type Service = Broker<'static, 1, SLOTS, DEVICES, DEVICES, { SLOTS + POISONED }>;

static BOOKS: Books = Ledger::new(u32::MAX);

/// Everything between hardware and a guest.
struct World {
    broker: Box<Service>,
    inbox: Inbox<'static, 1, SLOTS, DEVICES, DEVICES>,
    queue: QueueId,
    host: Option<Host>,
    /// Requests of the device that is measured, and the cookies that its guest was told.
    requests: Vec<PageRequest>,
    cookies: Vec<u64>,
}

fn pasid() -> Option<Pasid> {
    Pasid::new(5)
}

fn request(device: usize, index: usize) -> PageRequest {
    let tag = GroupTag { pasid: pasid(), index: index as u16 };
    let iova = Iova(((index as u64) << 16 | device as u64) << 12);
    PageRequest { stream: StreamId(device as u32), tag, iova, perms: Perms::READ_WRITE, last: true }
}

impl World {
    /// `devices` devices attached, `waiting` groups of them outstanding.
    fn new(devices: usize, waiting: usize) -> Self {
        let Ok(queue) = BOOKS.open(Owner::Guest(0)) else { unreachable!("it is closed") };
        let ring = Box::leak(Box::new(spsc::Queue::<u16, { SLOTS + 1 }>::new()));
        let (producer, consumer) = ring.split();
        let mut broker = Box::new(Broker::new(&BOOKS));
        assert_eq!(broker.connect(0, producer), Ok(()));
        let inbox = Inbox::new(&BOOKS, 0, consumer);
        let memory = Memory::new(4 * 512 * 8);
        let host = Some(Host::new([0; 4].map(|_| memory.take(512, 512))));
        let (requests, cookies) = Default::default();
        let mut world = Self { broker, inbox, queue, host, requests, cookies };
        world.attach(0, devices);
        world.wait(waiting, devices);
        world
    }

    /// Attaches more devices; one in the middle is the one that is measured.
    fn attach(&mut self, from: usize, to: usize) {
        for device in from..to {
            let stream = StreamId(device as u32);
            let Ok(id) = BOOKS.add_device(stream, &Limits::with_requests(1024)) else {
                panic!("no place for device {device}")
            };
            let requests = Requests::from(pasid());
            let policy =
                Policy { stream, requests, device: id, queue: self.queue, name: device as u32, opaque: 7 };
            assert!(BOOKS.attach(&policy).is_ok(), "no place for attachment {device}");
        }
        self.requests = (0..GROUPS).map(|index| request(to / 2, index)).collect();
    }

    /// Lets groups of these devices wait.
    fn wait(&mut self, groups: usize, devices: usize) {
        let measured = std::mem::take(&mut self.requests);
        let all: Vec<_> =
            (0..groups).map(|number| request(number % devices, 1000 + number / devices)).collect();
        for requests in all.chunks(GROUPS) {
            self.requests = requests.to_vec();
            self.deliver();
            self.read();
            assert_eq!(self.cookies.len(), requests.len(), "every group was delivered");
        }
        self.requests = measured;
    }

    /// Reports by hardware, of one pass, become records that the guest sees.
    // One function, so that each of the broker's is called in one place, as in a hypervisor: there the compiler joins them.
    #[inline(never)]
    fn deliver(&mut self) {
        for request in &self.requests {
            let Verdict::Forward { .. } = self.broker.admit(request, 1000) else { return };
        }
        let Some(Ok(mut batch)) = self.host.as_mut().map(Host::requests) else { return };
        let offer = |batch: &mut Batch<'_>, group: Shown<'_>| {
            let pages = group.pages();
            let record = move |index: usize| {
                let (tag, page) = (group.tag(), group.page(index));
                Record::request(&Request {
                    cookie: group.cookie().0,
                    device: group.name(),
                    pasid: tag.pasid,
                    opaque: group.opaque(),
                    group: tag.index,
                    iova: page.iova(),
                    perms: page.perms(),
                    pages: pages as u32,
                    index: index as u32,
                })
            };
            batch.offer(pages, record).then_some(())
        };
        loop {
            match self.inbox.take(1010, |group| offer(&mut batch, group)) {
                Taken::Yes(()) => batch.accept(),
                Taken::Gone => {}
                Taken::Left | Taken::Empty => return,
            }
        }
    }

    /// The guest reads the cookies of its records, and has an empty channel again.
    fn read(&mut self) {
        let Some(frames) = self.host.take().map(Host::into_frames) else { return };
        let shown = frames[HEADER].load(REQUESTS_WORD) as usize;
        self.cookies = (0..shown).map(|at| frames[REQUESTS].load(at * RECORD_WORDS)).collect();
        self.host = Some(Host::new(frames));
    }

    /// The guest's answer becomes the response for hardware.
    #[inline(never)]
    fn answer(&mut self) -> usize {
        let mut answered = 0;
        for &cookie in &self.cookies {
            let settled = BOOKS.settle(self.queue, Cookie(cookie), Outcome::Success, 1020);
            let Ok(Settled::Now(answer)) = settled else { return answered };
            let answer: Answer<'_, SLOTS> = answer;
            let sent = answer.send(|response| {
                let _ = black_box(response);
                Ok::<(), (PageResponse, ())>(())
            });
            answered += usize::from(sent.is_ok());
        }
        answered
    }

    fn delivered(mut self) -> Self {
        self.deliver();
        self.read();
        assert_eq!(self.cookies.len(), GROUPS, "every group was delivered");
        self
    }

    fn answered(mut self) -> Self {
        assert_eq!(self.answer(), GROUPS, "every group was answered");
        self
    }

    /// The nanoseconds of each way of a group, there and back: medians of 301 rounds.
    fn time(&mut self) -> [Option<f64>; 2] {
        let mut times: [Vec<_>; 2] = Default::default();
        for _ in 0..301 {
            let start = Instant::now();
            self.deliver();
            times[0].push(start.elapsed().as_nanos());
            self.read();
            assert_eq!(self.cookies.len(), GROUPS, "every group was delivered");
            let start = Instant::now();
            let answered = self.answer();
            times[1].push(start.elapsed().as_nanos());
            assert_eq!(answered, GROUPS, "every group was answered");
        }
        times.map(|mut times| {
            times.sort_unstable();
            times.get(times.len() / 2).map(|&median| median as f64 / GROUPS as f64)
        })
    }
}

mod counted {
    use super::{GROUPS, SLOTS, World};
    use gungraun::{library_benchmark, library_benchmark_group};
    use std::hint::black_box;

    #[library_benchmark]
    #[bench::alone(World::new(1, 0))]
    #[bench::among_256_devices(World::new(256, 0))]
    #[bench::among_4096_devices(World::new(4096, 0))]
    #[bench::among_65536_devices(World::new(65_536, 0))]
    #[bench::among_1_group(World::new(256, 1))]
    #[bench::among_4096_groups(World::new(256, SLOTS - GROUPS))]
    #[bench::again(World::new(256, 0).delivered().answered())]
    fn admit_to_record(mut world: World) -> World {
        black_box(&mut world).deliver();
        world
    }

    #[library_benchmark]
    #[bench::alone(World::new(1, 0).delivered())]
    #[bench::among_256_devices(World::new(256, 0).delivered())]
    #[bench::among_4096_devices(World::new(4096, 0).delivered())]
    #[bench::among_65536_devices(World::new(65_536, 0).delivered())]
    #[bench::among_1_group(World::new(256, 1).delivered())]
    #[bench::among_4096_groups(World::new(256, SLOTS - GROUPS).delivered())]
    #[bench::again(World::new(256, 0).delivered().answered().delivered())]
    fn answer_to_response(mut world: World) -> (usize, World) {
        let answered = black_box(&mut world).answer();
        (answered, world)
    }

    library_benchmark_group!(name = all, benchmarks = [admit_to_record, answer_to_response]);
    gungraun::main!(library_benchmark_groups = all);

    pub fn run() {
        main();
    }
}

/// What is counted, and what it may cost.
const WAYS: [(&str, &str, f64); 2] =
    [("admit_to_record", "admit to record", 250.0), ("answer_to_response", "answer to response", 150.0)];
const CASES: [(&str, &str); 7] = [
    ("alone", "1 device, first use of its slots"),
    ("among_256_devices", "256 devices"),
    ("among_4096_devices", "4,096 devices"),
    ("among_65536_devices", "65,536 devices"),
    ("among_1_group", "256 devices, 1 group waits"),
    ("among_4096_groups", "256 devices, 4,096 groups wait (the 64 counted among them)"),
    ("again", "256 devices, slots and group numbers used before"),
];

fn main() {
    bench::tools_or_exit();
    counted::run();
    if bench::is_counted() {
        return;
    }
    let row = |(function, way, goal): (&str, &str, f64), (case, what): (&str, &str)| Row {
        what: format!("{way}, {what}"),
        costs: vec![bench::instructions("broker", function, case, GROUPS)],
        goal: Some(goal),
    };
    let rows: Vec<_> = WAYS.into_iter().flat_map(|way| CASES.map(|case| row(way, case))).collect();
    bench::print("instructions", &["ours"], &rows);

    let mut world = World::new(1, 0);
    let mut rows = Vec::new();
    let mut time = |world: &mut World, what: &str| {
        for ((_, way, _), cost) in WAYS.into_iter().zip(world.time()) {
            rows.push(Row { what: format!("{way}, {what}"), costs: vec![cost], goal: None });
        }
    };
    time(&mut world, "1 device");
    world.attach(1, 256);
    time(&mut world, "256 devices");
    world.attach(256, 65_536);
    time(&mut world, "65,536 devices");
    world.wait(SLOTS - GROUPS, 256);
    time(&mut world, "65,536 devices, 4,096 groups wait (the 64 counted among them)");
    bench::print("nanoseconds", &["ours"], &rows);
}
