//! What the unit reports: page requests and faults.

use crate::{
    interrupts,
    queue::PageRequestQueue,
    reason::Reason,
    regs::{self, FRCD_TOP, FSTS, GONE, PRS},
};
use iommu::{
    Access, Bus, Event, FaultRecord, Field, GroupTag, Iova, Message, PageRequest, Pasid, Perms, Stages,
    StreamId, Words, descriptor,
};

descriptor! {
    /// One entry of the page request queue ("Page Request Descriptor").
    pub struct RequestEntry([u64; 4]);
}

impl RequestEntry {
    const TYPE: Field<Self> = Field::bits(7, 0);
    const PASID_PRESENT: Field<Self> = Field::bit(8);
    const REQUESTER: Field<Self> = Field::bits(31, 16);
    const PASID: Field<Self> = Field::bits(51, 32);
    const EXECUTE: Field<Self> = Field::bit(52);
    const PRIVILEGED: Field<Self> = Field::bit(53);
    const READ: Field<Self> = Field::bit(64);
    const WRITE: Field<Self> = Field::bit(65);
    const LAST: Field<Self> = Field::bit(66);
    const GROUP: Field<Self> = Field::bits(75, 67);
    /// What no page request sets. Bit 9 was once part of one.
    const RESERVED: [Field<Self>; 2] = [Field::bits(15, 10), Field::bits(63, 54)];
    const ADDRESS: Field<Self> = Field::bits(127, 76);

    /// Returns what the entry says.
    ///
    /// A last request that asks for neither read nor write is a stop marker if it has a PASID; without one it is an
    /// ordinary request that happens to ask for nothing, and wants an answer.
    pub fn decode(&self) -> Event {
        if let Some(request) = self.ordinary() {
            return Event::PageRequest(request);
        }
        let (stream, tag) = (self.stream(), self.tag());
        if self.get(Self::TYPE) == 1 {
            return Event::StopMarker { stream, pasid: tag.pasid };
        }
        let is_request = Self::RESERVED.into_iter().all(|field| self.get(field) == 0);
        let group = is_request.then_some((stream, tag));
        Event::Malformed { words: [self.0[0], self.0[1]], group }
    }

    /// Returns the request that the entry is, if it is one that wants an answer.
    #[inline]
    fn ordinary(&self) -> Option<PageRequest> {
        let perms = Perms {
            read: self.is_set(Self::READ),
            write: self.is_set(Self::WRITE),
            execute: self.is_set(Self::EXECUTE),
            privileged: self.is_set(Self::PRIVILEGED),
        };
        let (tag, last) = (self.tag(), self.is_set(Self::LAST));
        let is_marker = last && !perms.read && !perms.write && tag.pasid.is_some();
        (self.get(Self::TYPE) == 1 && !is_marker).then(|| PageRequest {
            stream: self.stream(),
            tag,
            iova: Iova(self.address(Self::ADDRESS)),
            perms,
            last,
        })
    }

    fn stream(&self) -> StreamId {
        StreamId(self.get(Self::REQUESTER) as u32)
    }

    fn tag(&self) -> GroupTag {
        let pasid = self.is_set(Self::PASID_PRESENT).then(|| Pasid::from_low_bits(self.get(Self::PASID)));
        GroupTag { pasid, index: self.get(Self::GROUP) as u16 }
    }
}

descriptor! {
    /// One fault-recording register ("Fault Recording Registers").
    pub struct FaultEntry([u64; 2]);
}

impl FaultEntry {
    const INFO: Field<Self> = Field::bits(63, 12);
    const SOURCE: Field<Self> = Field::bits(79, 64);
    const TYPE_2: Field<Self> = Field::bit(92);
    const PASID_PRESENT: Field<Self> = Field::bit(95);
    const REASON: Field<Self> = Field::bits(103, 96);
    const PASID: Field<Self> = Field::bits(123, 104);
    const TYPE_1: Field<Self> = Field::bit(126);
    const FAULT: Field<Self> = Field::bit(127);

    /// Returns what the record says, or `None` if it holds no fault.
    pub fn decode(&self) -> Option<FaultRecord> {
        if !self.is_set(Self::FAULT) {
            return None;
        }
        let code = self.get(Self::REASON) as u16;
        let access = match (self.is_set(Self::TYPE_1), self.is_set(Self::TYPE_2)) {
            (false, false) => Access::Write,
            (true, false) => Access::Read,
            (false, true) => Access::PageRequest,
            (true, true) => Access::Atomic,
        };
        Some(FaultRecord {
            stream: StreamId(self.get(Self::SOURCE) as u32),
            pasid: self.is_set(Self::PASID_PRESENT).then(|| Pasid::from_low_bits(self.get(Self::PASID))),
            access,
            iova: Iova(self.address(Self::INFO)),
            reason: Reason::of(code).class(),
            code,
        })
    }
}

/// The event side of a unit; see [`iommu::Events`].
#[derive(Debug)]
pub struct Events<B> {
    bus: B,
    /// The page request queue, where the unit has one; elsewhere its registers are reserved.
    requests: Option<PageRequestQueue>,
    /// Byte offset of the first fault-recording register, and how many there are.
    records: (usize, usize),
    /// The fault-recording register after the last one that was read, while the unit has faults pending.
    next_record: Option<usize>,
    /// Whether this pass has told that commands failed.
    told: bool,
    /// All registers read as ones when faults were last looked for: the unit is not there any more.
    gone: bool,
}

impl<B: Bus> Events<B> {
    pub(crate) fn new(bus: B, requests: Option<PageRequestQueue>, records: (usize, usize)) -> Self {
        Self { bus, requests, records, next_record: None, told: false, gone: false }
    }

    /// Lets the unit interrupt: by `faults` for faults and command errors, by `requests` for page requests.
    ///
    /// What was reported before interrupts at once. Call it when the handlers stand.
    pub fn enable_interrupts(&mut self, faults: Message, requests: Message) {
        interrupts::unmask(&self.bus, &regs::FAULT_EVENT, faults);
        if self.requests.is_some() {
            interrupts::unmask(&self.bus, &regs::PAGE_REQUEST_EVENT, requests);
        }
    }

    /// Looks what came since the page request queue was found empty.
    #[inline(never)]
    fn look_again(&mut self) -> Option<Event> {
        let requests = self.requests.as_mut()?;
        // What came after the last look has set PPR again. PRO is looked at after the queue was found empty, not when the
        // interrupt came: while it is set the unit neither queues nor interrupts.
        let status = regs::PRS.read(&self.bus);
        let (more, lost) = (status.is_set(PRS::PPR), status.is_set(PRS::PRO));
        if !more && !lost || status.get() == GONE {
            return None;
        }
        // PPR before the look, so that what comes after it interrupts. Between the look before and the status the queue may
        // have filled, and only then overflowed. Once PRO is seen nothing comes any more, so a queue that is empty now stays
        // so until PRO is cleared.
        if more {
            regs::PRS.clear(&self.bus, PRS::PPR::SET);
        }
        requests.look(&self.bus);
        if let Some(entry) = requests.pop(&self.bus) {
            return Some(RequestEntry(entry).decode());
        }
        if !lost {
            return None;
        }
        regs::PRS.clear(&self.bus, PRS::PRO::SET);
        Some(Event::RequestsLost)
    }
}

impl<B: Bus> iommu::Events for Events<B> {
    /// Clears `PRS.PPR`, and only then reads the tail: a request that arrives later sets it again, and interrupts.
    fn acknowledge(&mut self) {
        self.told = false;
        if let Some(requests) = &mut self.requests {
            regs::PRS.clear(&self.bus, PRS::PPR::SET);
            requests.look(&self.bus);
        }
    }

    #[inline]
    fn next_ordinary(&mut self) -> Option<PageRequest> {
        let requests = self.requests.as_mut()?;
        let request = RequestEntry(requests.peek()?).ordinary()?;
        requests.take(&self.bus);
        Some(request)
    }

    fn next_request(&mut self) -> Option<Event> {
        if let Some(entry) = self.requests.as_mut()?.pop(&self.bus) {
            return Some(RequestEntry(entry).decode());
        }
        self.look_again()
    }

    fn next_fault(&mut self) -> Option<Event> {
        let (first, count) = self.records;
        let status = regs::FSTS.read(&self.bus);
        let was_gone = core::mem::replace(&mut self.gone, status.get() == GONE);
        if self.gone {
            // Told once: nobody can clear it.
            return (!was_gone).then_some(Event::CommandsFailed { status: GONE });
        }
        if status.is_set(FSTS::PPF) {
            // FRI is where the faults that are pending began; it does not move as they are read. Units fill the records in
            // turn, so the next one is after the last. All are looked at before PPF is left standing: while it stands
            // nothing interrupts.
            let next = |index: usize| if index + 1 < count { index + 1 } else { 0 };
            let began = self.next_record.unwrap_or(status.read(FSTS::FRI) as usize);
            // There is no record past the last, whatever the unit says.
            let mut index = if began < count { began } else { 0 };
            for _ in 0..count {
                let record = regs::FaultRecording::at(first, index);
                let high = record.high.read(&self.bus).get();
                // ORDER: F is in the high word; the low word belongs to it only if it is read afterwards.
                let entry = FaultEntry([record.low.read(&self.bus).get(), high]);
                if let Some(fault) = entry.decode() {
                    // F alone is written; every other bit of the record is read-only.
                    record.top.clear(&self.bus, FRCD_TOP::F::SET);
                    self.next_record = Some(next(index));
                    return Some(Event::Fault(fault));
                }
                index = next(index);
            }
        }
        if !status.is_set(FSTS::PPF) {
            self.next_record = None;
        }
        if status.is_set(FSTS::PFO) {
            regs::FSTS.clear(&self.bus, FSTS::PFO::SET);
            return Some(Event::FaultsLost);
        }
        let failed = FSTS::IQE::SET + FSTS::ITE::SET + FSTS::ICE::SET;
        if status.any_matching_bits_set(failed) && !self.told {
            // Clearing it is for the command side, which knows what it was about.
            self.told = true;
            return Some(Event::CommandsFailed { status: status.get() });
        }
        None
    }

    fn refused_by(&self, fault: &FaultRecord) -> Stages {
        Reason::of(fault.code).stages()
    }
}
