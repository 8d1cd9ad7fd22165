//! A broker with its queues, and everybody who uses it.

use broker::{
    Answer, AttachmentId, Broker, Cookie, DeviceId, Expiry, Group, Inbox, Ledger, Limits, Owner, Policy,
    QueueId, Refusal, Requests, Restraint, Settled, Verdict, Whose,
};
use heapless::spsc;
use iommu::{GroupTag, Iova, Outcome, PAGE_SIZE, PageRequest, PageResponse, Pasid, Perms, StreamId};

/// Places for devices, and for attachments.
const PLACES: usize = 1024;
/// Entries of the ring of a queue: more than any queue has slots.
const RING: usize = 8192;

/// `Q` queues of `S` slots; `N` is what the broker wants.
///
/// What it is made of lives until the process ends, as it does in a hypervisor.
pub struct Rig<const Q: usize, const S: usize, const N: usize> {
    /// What all cores share.
    pub ledger: &'static Ledger<Q, S, PLACES, PLACES>,
    /// The interrupt handler's part.
    pub broker: Box<Broker<'static, Q, S, PLACES, PLACES, N>>,
    /// The cores of the queues' owners.
    pub inboxes: [Inbox<'static, Q, S, PLACES, PLACES>; Q],
    /// The queues, open, of guest 0, guest 1 and so on.
    pub queues: [QueueId; Q],
}

/// What became of a request.
#[derive(Debug, Eq, PartialEq)]
pub enum Did {
    /// Nothing yet.
    Nothing,
    /// A whole group waits in this queue.
    Forwarded(usize),
    /// Hardware has its answer.
    Answered(PageResponse),
}

/// What became of a deadline.
#[derive(Debug, Eq, PartialEq)]
pub enum Ended {
    /// Nobody answered in time.
    Expired {
        /// What hardware was told.
        response: PageResponse,
        /// How late, in microseconds.
        late_us: u64,
        /// What the device is held to, if that is new.
        restraint: Option<Restraint>,
    },
    /// An answer had been held back.
    Held(PageResponse),
}

/// Sends an answer; returns what was sent.
pub fn send<const S: usize>(answer: Answer<'_, S>) -> PageResponse {
    let mut sent = None;
    let result = answer.send(|response| {
        sent = Some(response);
        Ok::<(), (PageResponse, ())>(())
    });
    assert!(result.is_ok());
    sent.expect("`send` hands over the response")
}

/// Group `index` of PASID 5 of `stream` asks for one more page.
pub fn part(stream: StreamId, index: u16, page: u64) -> PageRequest {
    let tag = GroupTag { pasid: Pasid::new(5), index };
    PageRequest { stream, tag, iova: Iova(page * PAGE_SIZE), perms: Perms::READ_WRITE, last: false }
}

/// Group `index` of PASID 5 of `stream` asks for its last page.
pub fn last(stream: StreamId, index: u16, page: u64) -> PageRequest {
    PageRequest { last: true, ..part(stream, index, page) }
}

/// The answer to group `index` of PASID 5 of `stream`.
pub fn response(stream: StreamId, index: u16, outcome: Outcome) -> PageResponse {
    PageResponse { stream, tag: GroupTag { pasid: Pasid::new(5), index }, outcome }
}

impl<const Q: usize, const S: usize, const N: usize> Default for Rig<Q, S, N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const Q: usize, const S: usize, const N: usize> Rig<Q, S, N> {
    /// Queues that are open, and no device, below a hardware queue of 65536 entries.
    pub fn new() -> Self {
        Self::with_entries(1 << 16)
    }

    /// The same, below a hardware queue of so many entries.
    pub fn with_entries(entries: u32) -> Self {
        let ledger: &'static _ = Box::leak(Box::new(Ledger::new(entries)));
        let mut broker = Box::new(Broker::new(ledger));
        let inboxes = core::array::from_fn(|queue| {
            let ring: &'static mut spsc::Queue<u16, RING> = Box::leak(Box::new(spsc::Queue::new()));
            let (producer, consumer) = ring.split();
            broker.connect(queue, producer).expect("it is large enough");
            Inbox::new(ledger, queue, consumer)
        });
        let queues =
            core::array::from_fn(|queue| ledger.open(Owner::Guest(queue as u16)).expect("none is open"));
        Self { ledger, broker, inboxes, queues }
    }

    /// Adds a device.
    pub fn add(&self, stream: StreamId, limits: &Limits) -> DeviceId {
        self.ledger.add_device(stream, limits).expect("there is room")
    }

    /// What an attachment of a device to a queue is made with: PASID 5, and names that tell whose it is.
    pub fn policy(&self, stream: StreamId, device: DeviceId, queue: usize) -> Policy {
        Policy {
            stream,
            requests: Requests::from(Pasid::new(5)),
            device,
            queue: self.queues[queue],
            name: stream.0 + 1,
            opaque: 0xFEED_0000 + u64::from(stream.0),
        }
    }

    /// Attaches PASID 5 of a device to a queue.
    pub fn attach(&self, stream: StreamId, device: DeviceId, queue: usize) -> AttachmentId {
        self.ledger.attach(&self.policy(stream, device, queue)).expect("there is room")
    }

    /// Adds a device, and attaches its PASID 5 to a queue.
    pub fn attached(&self, stream: StreamId, limits: &Limits, queue: usize) -> DeviceId {
        let device = self.add(stream, limits);
        let _ = self.attach(stream, device, queue);
        device
    }

    /// Lets the interrupt handler take in a request, and sends what it has to say.
    pub fn admit(&mut self, request: PageRequest, now_us: u64) -> Did {
        match self.broker.admit(&request, now_us) {
            Verdict::Forward { queue } => Did::Forwarded(queue),
            Verdict::Refuse(response) => Did::Answered(response),
            Verdict::End(answer) => Did::Answered(send(answer)),
            Verdict::Nothing => Did::Nothing,
        }
    }

    /// Lets the interrupt handler end whatever is due, and sends it.
    pub fn expire(&mut self, now_us: u64) -> Vec<Ended> {
        let mut ended = Vec::new();
        loop {
            match self.broker.expire(now_us) {
                Expiry::Expired { answer, late_us, restraint } => {
                    ended.push(Ended::Expired { response: send(answer), late_us, restraint });
                }
                Expiry::Held(answer) => ended.push(Ended::Held(send(answer))),
                Expiry::Nothing => {}
                Expiry::Done => return ended,
            }
        }
    }

    /// Lets the owner of a queue read whatever was sent there.
    pub fn deliver(&mut self, queue: usize, now_us: u64) -> Vec<Group> {
        core::iter::from_fn(|| self.inboxes[queue].next(now_us)).collect()
    }

    /// Lets the owner of a queue read the one group that was sent there.
    pub fn deliver_one(&mut self, queue: usize, now_us: u64) -> Group {
        let mut groups = self.deliver(queue, now_us);
        assert_eq!(groups.len(), 1, "{groups:?}");
        groups.remove(0)
    }

    /// Lets the owner of a queue answer; returns what hardware was told, unless that is held back.
    pub fn settle(
        &self,
        queue: usize,
        cookie: Cookie,
        outcome: Outcome,
        now_us: u64,
    ) -> Result<Option<PageResponse>, Refusal> {
        Ok(match self.ledger.settle(self.queues[queue], cookie, outcome, now_us)? {
            Settled::Now(answer) => Some(send(answer)),
            Settled::Held => None,
        })
    }

    /// Ends groups that are to go; returns what hardware was told, by stream and number.
    pub fn evict(&self, queue: usize, whose: Whose, now_us: u64) -> Vec<PageResponse> {
        let answers = core::iter::from_fn(|| self.ledger.evict(self.queues[queue], whose, now_us));
        let mut responses: Vec<_> = answers.map(send).collect();
        responses.sort_by_key(|response| (response.stream.0, response.tag.index));
        responses
    }

    /// Closes a queue as its owner's death does, and opens it for `owner`; returns what hardware was told.
    pub fn reopen(&mut self, queue: usize, owner: Owner, now_us: u64) -> Vec<PageResponse> {
        self.ledger.shut(self.queues[queue]);
        self.broker.discard_leaving();
        let told = self.evict(queue, Whose::All, now_us);
        self.ledger.close(self.queues[queue]).expect("no group is left");
        self.queues[queue] = self.ledger.open_at(queue, owner).expect("it is closed");
        told
    }

    /// Asserts that every group of a device that was opened was answered, discarded, or is one of `waiting`.
    pub fn assert_balance(&self, device: DeviceId, waiting: u64) {
        let tally = self.ledger.tally(device).expect("it is there");
        assert_eq!(tally.opened, tally.answered() + tally.discarded + waiting, "{tally:?}");
    }
}
