//! Instructions of a page request's way through broker and channel, and back.

use broker::{
    Answer, Broker, Cookie, Inbox, Ledger, Limits, Owner, POISONED, Policy, QueueId, Requests, Settled,
    Verdict,
};
use channel::{
    Record,
    host::{Host, Pushed},
    record::Request,
};
use heapless::spsc;
use iommu::{GroupTag, Iova, Outcome, PageRequest, PageResponse, Pasid, Perms, StreamId};
use models::memory::Memory;

/// Groups that are counted together.
const GROUPS: usize = 64;

/// Slots, and places of devices and attachments: for 65,536 devices, of which half of the places stay free.
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
    host: Host,
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
        let mut inbox = Inbox::new(&BOOKS, 0, consumer);
        for device in 0..devices {
            let stream = StreamId(device as u32);
            let Ok(id) = BOOKS.add_device(stream, &Limits::with_requests(1024)) else {
                panic!("no place for device {device}")
            };
            let requests = Requests::from(pasid());
            let policy = Policy { stream, requests, device: id, queue, name: device as u32, opaque: 7 };
            assert!(BOOKS.attach(&policy).is_ok(), "no place for attachment {device}");
        }
        for number in 0..waiting {
            let verdict = broker.admit(request(number % devices, 1000 + number / devices), 1);
            assert!(matches!(verdict, Verdict::Forward { .. }), "{verdict:?}");
            let _ = inbox.next(1);
        }
        let memory = Memory::new(4 * 512 * 8);
        let host = Host::new([0; 4].map(|_| memory.take(512, 512)));
        let requests = (0..GROUPS).map(|index| request(devices / 2, index)).collect();
        Self { broker, inbox, queue, host, requests, cookies: Vec::with_capacity(GROUPS) }
    }

    /// A report by hardware becomes a record that the guest sees.
    #[inline(always)]
    fn deliver(&mut self) {
        for request in &self.requests {
            let Verdict::Forward { .. } = self.broker.admit(*request, 1000) else { return };
            let Some(group) = self.inbox.peek(1010) else { return };
            self.cookies.push(group.cookie.0);
            let pages = group.pages.len() as u32;
            let record = |(index, page): (usize, &broker::Page)| {
                Record::request(&Request {
                    cookie: group.cookie.0,
                    device: group.name,
                    pasid: group.tag.pasid,
                    opaque: group.opaque,
                    group: group.tag.index,
                    iova: page.iova(),
                    perms: page.perms(),
                    pages,
                    index: index as u32,
                })
            };
            let Ok(Pushed::Yes) = self.host.push_group(group.pages.iter().enumerate().map(record)) else {
                return;
            };
            self.inbox.done();
        }
    }

    /// The guest's answer becomes the response for hardware.
    #[inline(always)]
    fn answer(&mut self, mut send: impl FnMut(PageResponse)) -> usize {
        let mut answered = 0;
        for &cookie in &self.cookies {
            let settled = BOOKS.settle(self.queue, Cookie(cookie), Outcome::Success, 1020);
            let Ok(Settled::Now(answer)) = settled else { return answered };
            let answer: Answer<'_, SLOTS> = answer;
            let sent = answer.send(|response| {
                send(response);
                Ok::<(), (PageResponse, ())>(())
            });
            answered += usize::from(sent.is_ok());
        }
        answered
    }

    fn delivered(mut self) -> Self {
        self.deliver();
        assert_eq!(self.cookies.len(), GROUPS, "every group was delivered");
        self
    }
}

mod counted {
    use super::World;
    use gungraun::{library_benchmark, library_benchmark_group};
    use std::hint::black_box;

    #[library_benchmark]
    #[bench::alone(World::new(1, 0))]
    #[bench::among_256_devices(World::new(256, 0))]
    #[bench::among_65536_devices(World::new(65_536, 0))]
    #[bench::among_4000_groups(World::new(256, 4000))]
    fn admit_to_record(mut world: World) -> World {
        black_box(&mut world).deliver();
        world
    }

    #[library_benchmark]
    #[bench::alone(World::new(1, 0).delivered())]
    #[bench::among_256_devices(World::new(256, 0).delivered())]
    #[bench::among_65536_devices(World::new(65_536, 0).delivered())]
    #[bench::among_4000_groups(World::new(256, 4000).delivered())]
    fn answer_to_response(mut world: World) -> (usize, World) {
        let answered = black_box(&mut world).answer(|response| {
            black_box(&response);
            std::mem::forget(response);
        });
        (answered, world)
    }

    library_benchmark_group!(name = ours, benchmarks = [admit_to_record, answer_to_response]);
    gungraun::main!(library_benchmark_groups = ours);

    pub fn run() {
        main();
    }
}

fn main() {
    bench::tools_or_exit();
    counted::run();
}
