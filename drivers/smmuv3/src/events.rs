//! What the unit reports: page requests, faults and errors of its own.

use crate::{
    interrupts,
    queue::{EVENT_WORDS, REQUEST_WORDS, ReportQueue},
    regs::{self, GERROR},
};
use iommu::{
    Access, Bus, Error, Event, FaultReason, FaultRecord, Field, GroupTag, Iova, PageRequest, Pasid, Perms,
    StreamId, Words, descriptor,
};

descriptor! {
    /// One entry of the PRI queue.
    pub struct RequestEntry([u64; 2]);
}

impl RequestEntry {
    const STREAM: Field<Self> = Field::bits(31, 0);
    const SUBSTREAM: Field<Self> = Field::bits(51, 32);
    const PRIVILEGED: Field<Self> = Field::bit(58);
    const EXECUTE: Field<Self> = Field::bit(59);
    const READ: Field<Self> = Field::bit(60);
    const WRITE: Field<Self> = Field::bit(61);
    const LAST: Field<Self> = Field::bit(62);
    const SUBSTREAM_VALID: Field<Self> = Field::bit(63);
    const GROUP: Field<Self> = Field::bits(72, 64);
    const ADDRESS: Field<Self> = Field::bits(127, 76);

    /// Returns what the entry says.
    ///
    /// A last request that asks for neither read nor write is a stop marker if it has a PASID; without one it is an
    /// ordinary request that happens to ask for nothing, and wants an answer.
    pub fn decode(&self) -> Event {
        let stream = StreamId(self.get(Self::STREAM) as u32);
        let pasid =
            self.is_set(Self::SUBSTREAM_VALID).then(|| Pasid::from_low_bits(self.get(Self::SUBSTREAM)));
        let perms = Perms {
            read: self.is_set(Self::READ),
            write: self.is_set(Self::WRITE),
            execute: self.is_set(Self::EXECUTE),
            privileged: self.is_set(Self::PRIVILEGED),
        };
        let last = self.is_set(Self::LAST);
        if last && !perms.read && !perms.write && pasid.is_some() {
            return Event::StopMarker { stream, pasid };
        }
        Event::PageRequest(PageRequest {
            stream,
            tag: GroupTag { pasid, index: self.get(Self::GROUP) as u16 },
            iova: Iova(self.address(Self::ADDRESS)),
            perms,
            last,
        })
    }
}

descriptor! {
    /// One event record.
    pub struct EventRecord([u64; 4]);
}

impl EventRecord {
    const NUMBER: Field<Self> = Field::bits(7, 0);
    const SUBSTREAM_VALID: Field<Self> = Field::bit(11);
    const SUBSTREAM: Field<Self> = Field::bits(31, 12);
    const STREAM: Field<Self> = Field::bits(63, 32);
    const ATS_WRITE: Field<Self> = Field::bit(94);
    const READ: Field<Self> = Field::bit(99);
    const INPUT_ADDRESS: Field<Self> = Field::bits(191, 140);

    /// Returns what the record says; its code is the manual's event number.
    ///
    /// Events about the configuration of a stream (`C_BAD_STE` and the like) tell neither address nor access.
    pub fn decode(&self) -> FaultRecord {
        let number = self.get(Self::NUMBER);
        // C_BAD_SUBSTREAMID has no SSV, and always has a SubstreamID.
        let substream = self.is_set(Self::SUBSTREAM_VALID) || number == 0x08;
        let write = match number {
            0x01 | 0x07 | 0x0B | 0x10..=0x13 | 0x20 => !self.is_set(Self::READ),
            0x05 => self.is_set(Self::ATS_WRITE),
            _ => false,
        };
        let addressed = matches!(number, 0x01 | 0x05 | 0x07 | 0x0B | 0x10..=0x13 | 0x20 | 0x24);
        FaultRecord {
            stream: StreamId(self.get(Self::STREAM) as u32),
            pasid: substream.then(|| Pasid::from_low_bits(self.get(Self::SUBSTREAM))),
            access: match number {
                0x24 => Access::PageRequest,
                _ if write => Access::Write,
                _ if addressed => Access::Read,
                // Configuration events carry neither.
                _ => Access::Unknown,
            },
            iova: Iova(if addressed { self.address(Self::INPUT_ADDRESS) } else { 0 }),
            reason: reason(number),
            code: number as u16,
        }
    }
}

/// Sorts the manual's events ("Event records") into what an owner acts upon.
const fn reason(number: u64) -> FaultReason {
    match number {
        // C_BAD_STREAMID, C_BAD_STE, F_BAD_ATS_TREQ, F_STREAM_DISABLED, F_TRANSL_FORBIDDEN, C_BAD_SUBSTREAMID. A bad
        // stream table entry is one that is not valid: this driver makes no others.
        0x02 | 0x04..=0x08 => FaultReason::NotAttached,
        // F_TRANSLATION.
        0x10 => FaultReason::NotMapped,
        // F_ADDR_SIZE.
        0x11 => FaultReason::AddressSize,
        // F_ACCESS, F_PERMISSION.
        0x12 | 0x13 => FaultReason::NotPermitted,
        // F_STE_FETCH, F_CD_FETCH, C_BAD_CD, F_WALK_EABT, F_TLB_CONFLICT, F_CFG_CONFLICT, F_VMS_FETCH.
        0x03 | 0x09..=0x0B | 0x20 | 0x21 | 0x25 => FaultReason::BadTables,
        _ => FaultReason::Other,
    }
}

/// Errors after which the unit does nothing more for us: a stopped command queue, and service failure mode.
const STOPPED: u32 = GERROR::CMDQ_ERR::SET.value | GERROR::SFM_ERR::SET.value;

/// The event side of a unit; see [`iommu::Events`].
#[derive(Debug)]
pub struct Events<B> {
    bus: B,
    events: ReportQueue<EVENT_WORDS>,
    /// The PRI queue, where the unit has one; elsewhere its registers are reserved.
    requests: Option<ReportQueue<REQUEST_WORDS>>,
    /// `GERRORN` as it was last written.
    acknowledged: u32,
    /// Which errors of `STOPPED` were reported; they are never acknowledged.
    reported: u32,
}

impl<B: Bus> Events<B> {
    pub(crate) fn new(
        bus: B,
        events: ReportQueue<EVENT_WORDS>,
        requests: Option<ReportQueue<REQUEST_WORDS>>,
        acknowledged: u32,
    ) -> Self {
        Self { bus, events, requests, acknowledged, reported: 0 }
    }

    /// Lets the unit interrupt, by its wires for events, page requests and errors.
    ///
    /// They are pulses: what was reported before does not interrupt any more. Call it when the handlers stand, and drain
    /// the unit once afterwards.
    pub fn enable_interrupts(&mut self) -> Result<(), Error> {
        interrupts::enable(&self.bus, self.requests.is_some())
    }

    /// Returns the errors that are active.
    fn errors(&self) -> u32 {
        regs::GERROR.read(&self.bus).get() ^ self.acknowledged
    }

    /// Acknowledges active errors. The bits of others stay as they are: to toggle them is unpredictable.
    fn acknowledge_errors(&mut self, active: u32) {
        self.acknowledged ^= active;
        regs::GERRORN.set(&self.bus, self.acknowledged);
    }
}

impl<B: Bus> iommu::Events for Events<B> {
    /// Does nothing: a queue pulses when an entry comes after CONS said that it is empty, and PROD is read after that.
    fn acknowledge(&mut self) {}

    fn next_request(&mut self) -> Option<Event> {
        let requests = self.requests.as_mut()?;
        if let Some(entry) = requests.pop(&self.bus) {
            return Some(RequestEntry(entry).decode());
        }
        if requests.take_overflow(&self.bus) {
            return Some(Event::RequestsLost);
        }
        if self.errors() & GERROR::PRIQ_ABT_ERR::SET.value == 0 {
            return None;
        }
        // Nothing is queued while the error is active, so a queue that is empty now stays so until it is acknowledged.
        if let Some(entry) = self.requests.as_mut().and_then(|requests| requests.pop(&self.bus)) {
            return Some(RequestEntry(entry).decode());
        }
        self.acknowledge_errors(GERROR::PRIQ_ABT_ERR::SET.value);
        Some(Event::RequestsLost)
    }

    fn next_fault(&mut self) -> Option<Event> {
        if let Some(record) = self.events.pop(&self.bus) {
            return Some(Event::Fault(EventRecord(record).decode()));
        }
        if self.events.take_overflow(&self.bus) {
            return Some(Event::FaultsLost);
        }
        let active = self.errors();
        if active & GERROR::EVENTQ_ABT_ERR::SET.value != 0 {
            self.acknowledge_errors(GERROR::EVENTQ_ABT_ERR::SET.value);
            return Some(Event::FaultsLost);
        }
        // CMDQ_ERR is not acknowledged, so the queue stays stopped and its tickets stay pending: the unit would fetch the
        // same command again, and after a device that did not answer, a SYNC would pass as if it had.
        let fresh = active & STOPPED & !self.reported;
        if fresh != 0 {
            self.reported |= fresh;
            return Some(Event::CommandsFailed { status: active });
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SID: StreamId = StreamId(0x108);

    /// The events of facts/smmuv3.md, section 11.6, rows E1 to E5, E7, E11, E12.
    #[test]
    fn event_records_decode_as_in_the_manual() {
        use {Access::*, FaultReason::*};
        let pasid = Pasid::new;
        for (words, stream, pasid, access, iova, reason) in [
            ([0x0108_0000_0010, 0x0208_0000_0000, 0x4020_1ABC, 0], SID, None, Read, 0x4020_1000, NotMapped),
            (
                [0x0108_0000_5813, 0x0202_8000_0042, 0x7F00_0000_1000, 0],
                SID,
                pasid(5),
                Write,
                0x7F00_0000_1000,
                NotPermitted,
            ),
            ([0x0108_0000_0004, 0, 0, 0], SID, None, Unknown, 0, NotAttached),
            ([0x01FF_0000_0002, 0, 0, 0], StreamId(0x1FF), None, Unknown, 0, NotAttached),
            ([0x0108_0000_5809, 0, 0, 0xB001_0140], SID, pasid(5), Unknown, 0, BadTables),
            (
                [0x0108_0000_0010, 0x0288_0000_0000, 0x4020_1ABC, 0x9020_1000],
                SID,
                None,
                Read,
                0x4020_1000,
                NotMapped,
            ),
            ([0x0108_0002_0008, 0, 0, 0], SID, pasid(0x20), Unknown, 0, NotAttached),
            (
                [0x0108_0000_0011, 0x0280_0000_0000, 0x1000, 0x0100_0000_1000],
                SID,
                None,
                Write,
                0x1000,
                AddressSize,
            ),
        ] {
            let code = (words[0] & 0xFF) as u16;
            let expected = FaultRecord { stream, pasid, access, iova: Iova(iova), reason, code };
            assert_eq!(EventRecord(words).decode(), expected);
        }
    }

    #[test]
    fn an_event_that_nobody_knows_is_kept_by_its_number() {
        let fault = EventRecord([u64::MAX; 4]).decode();

        assert_eq!((fault.reason, fault.code), (FaultReason::Other, 0xFF));
    }

    /// The page requests of facts/smmuv3.md, section 11.7.
    #[test]
    fn page_requests_decode_as_in_the_manual() {
        let request = |pasid, index, iova, perms, last| {
            let tag = GroupTag { pasid, index };
            Event::PageRequest(PageRequest { stream: SID, tag, iova: Iova(iova), perms, last })
        };
        let pasid = Pasid::new(5);
        for (words, event) in [
            (
                [0xF000_0005_0000_0108, 0x7F00_0000_11A3],
                request(pasid, 0x1A3, 0x7F00_0000_1000, Perms::READ_WRITE, true),
            ),
            ([0x1000_0000_0000_0108, 0x4020_1003], request(None, 3, 0x4020_1000, Perms::READ, false)),
            ([0x5000_0000_0000_0108, 0x4020_2003], request(None, 3, 0x4020_2000, Perms::READ, true)),
            ([0xC000_0005_0000_0108, 0], Event::StopMarker { stream: SID, pasid }),
            ([0x4000_0000_0000_0108, 0], request(None, 0, 0, Perms::default(), true)),
        ] {
            assert_eq!(RequestEntry(words).decode(), event);
        }
    }
}
