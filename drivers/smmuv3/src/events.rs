//! What the unit reports: page requests, faults and errors of its own.

use crate::{
    STALLING,
    interrupts::{self, Messages},
    queue::{EVENT_WORDS, REQUEST_WORDS, ReportQueue},
    regs::{self, ERRORS, GERROR, IDR0, LOSSES},
    stalls,
};
use heapless::Vec;
use iommu::{
    Access, Bus, Error, Event, FaultReason, FaultRecord, Field, GroupTag, Iova, PageRequest, Pasid, Perms,
    Stages, StreamId, Words, descriptor,
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
        match self.ordinary() {
            Some(request) => Event::PageRequest(request),
            None => Event::StopMarker { stream: self.stream(), pasid: self.tag().pasid },
        }
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
        (!is_marker).then(|| PageRequest {
            stream: self.stream(),
            tag,
            iova: Iova(self.address(Self::ADDRESS)),
            perms,
            last,
        })
    }

    fn stream(&self) -> StreamId {
        StreamId(self.get(Self::STREAM) as u32)
    }

    fn tag(&self) -> GroupTag {
        let pasid =
            self.is_set(Self::SUBSTREAM_VALID).then(|| Pasid::from_low_bits(self.get(Self::SUBSTREAM)));
        GroupTag { pasid, index: self.get(Self::GROUP) as u16 }
    }
}

descriptor! {
    /// One event record.
    pub struct EventRecord([u64; 4]);
}

/// An event, by what it is about; its name in the manual is [`name`](Self::name).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum EventKind {
    /// A transaction of a kind that the unit does not serve.
    UnsupportedTransaction,
    /// A stream past the end of the stream table.
    BadStreamId,
    /// A stream table entry could not be read.
    StreamEntryFetch,
    /// A stream table entry is not valid, or not legal.
    BadStreamEntry,
    /// A translation request of a device that may not ask.
    BadTranslationRequest,
    /// An access without PASID, of a stream whose accesses must have one.
    StreamDisabled,
    /// An access that claims to be translated, of a device that may not translate.
    TranslationForbidden,
    /// A PASID that the stream has not.
    BadSubstreamId,
    /// A context descriptor could not be read.
    ContextFetch,
    /// A context descriptor is not valid, or not legal.
    BadContext,
    /// A table could not be read.
    WalkAborted,
    /// Nothing is mapped.
    Translation,
    /// An address is too large for what is to translate it.
    AddressSize,
    /// A mapping that is not to be used yet.
    Access,
    /// A mapping that does not permit the access.
    Permission,
    /// The unit found two translations of one address.
    TlbConflict,
    /// The unit found two configurations of one stream.
    ConfigurationConflict,
    /// A device would like a page; nobody waits.
    PageRequestHint,
    /// Data about a virtual machine could not be read.
    MachineFetch,
    /// An event of the implementer's own.
    Implementation(u8),
    /// A number that this version of the driver does not know.
    Other(u8),
}

impl EventKind {
    /// Returns what the manual's number means; the low byte of [`FaultRecord::code`] is one.
    pub const fn of(number: u8) -> Self {
        match number {
            0x01 => Self::UnsupportedTransaction,
            0x02 => Self::BadStreamId,
            0x03 => Self::StreamEntryFetch,
            0x04 => Self::BadStreamEntry,
            0x05 => Self::BadTranslationRequest,
            0x06 => Self::StreamDisabled,
            0x07 => Self::TranslationForbidden,
            0x08 => Self::BadSubstreamId,
            0x09 => Self::ContextFetch,
            0x0A => Self::BadContext,
            0x0B => Self::WalkAborted,
            0x10 => Self::Translation,
            0x11 => Self::AddressSize,
            0x12 => Self::Access,
            0x13 => Self::Permission,
            0x20 => Self::TlbConflict,
            0x21 => Self::ConfigurationConflict,
            0x24 => Self::PageRequestHint,
            0x25 => Self::MachineFetch,
            0xE0..=0xEF => Self::Implementation(number),
            _ => Self::Other(number),
        }
    }

    /// Returns the manual's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UnsupportedTransaction => "F_UUT",
            Self::BadStreamId => "C_BAD_STREAMID",
            Self::StreamEntryFetch => "F_STE_FETCH",
            Self::BadStreamEntry => "C_BAD_STE",
            Self::BadTranslationRequest => "F_BAD_ATS_TREQ",
            Self::StreamDisabled => "F_STREAM_DISABLED",
            Self::TranslationForbidden => "F_TRANSL_FORBIDDEN",
            Self::BadSubstreamId => "C_BAD_SUBSTREAMID",
            Self::ContextFetch => "F_CD_FETCH",
            Self::BadContext => "C_BAD_CD",
            Self::WalkAborted => "F_WALK_EABT",
            Self::Translation => "F_TRANSLATION",
            Self::AddressSize => "F_ADDR_SIZE",
            Self::Access => "F_ACCESS",
            Self::Permission => "F_PERMISSION",
            Self::TlbConflict => "F_TLB_CONFLICT",
            Self::ConfigurationConflict => "F_CFG_CONFLICT",
            Self::PageRequestHint => "E_PAGE_REQUEST",
            Self::MachineFetch => "F_VMS_FETCH",
            Self::Implementation(_) => "IMPLEMENTATION DEFINED",
            Self::Other(_) => "unknown",
        }
    }

    /// Whether the record says for which access it is, and at which address.
    const fn has_address(self) -> bool {
        matches!(
            self,
            Self::UnsupportedTransaction
                | Self::BadTranslationRequest
                | Self::TranslationForbidden
                | Self::WalkAborted
                | Self::TlbConflict
                | Self::PageRequestHint
        ) || self.can_stall()
    }

    /// Whether the access may wait for an answer.
    const fn can_stall(self) -> bool {
        matches!(self, Self::Translation | Self::AddressSize | Self::Access | Self::Permission)
    }

    /// Whether the record says which stage it was, and what that was to translate.
    const fn has_stage(self) -> bool {
        matches!(self, Self::WalkAborted) || self.can_stall()
    }

    const fn reason(self) -> FaultReason {
        match self {
            // A bad stream table entry is one that is not valid, and so is a bad context descriptor: this driver makes no
            // others. In a table of a guest's own it may also be one that makes no sense; the unit does not say which.
            Self::BadStreamId
            | Self::BadStreamEntry
            | Self::BadContext
            | Self::BadTranslationRequest
            | Self::StreamDisabled
            | Self::TranslationForbidden
            | Self::BadSubstreamId => FaultReason::NotAttached,
            Self::Translation => FaultReason::NotMapped,
            Self::AddressSize => FaultReason::AddressSize,
            Self::Access | Self::Permission => FaultReason::NotPermitted,
            Self::StreamEntryFetch
            | Self::ContextFetch
            | Self::WalkAborted
            | Self::TlbConflict
            | Self::ConfigurationConflict
            | Self::MachineFetch => FaultReason::BadTables,
            _ => FaultReason::Other,
        }
    }
}

/// In [`FaultRecord::code`], above the event's number: the second stage refused it (S2), and what that was to translate
/// (CLASS).
const CODE_SECOND_STAGE: u16 = 1 << 8;
const CODE_CLASS_SHIFT: u32 = 9;
/// CLASS: the access itself; others are what the first stage is read from.
const CLASS_INPUT: u64 = 2;

impl EventRecord {
    const NUMBER: Field<Self> = Field::bits(7, 0);
    const SUBSTREAM_VALID: Field<Self> = Field::bit(11);
    const SUBSTREAM: Field<Self> = Field::bits(31, 12);
    const STREAM: Field<Self> = Field::bits(63, 32);
    const STALL_TAG: Field<Self> = Field::bits(79, 64);
    const ATS_WRITE: Field<Self> = Field::bit(94);
    const STALL: Field<Self> = Field::bit(95);
    const PRIVILEGED: Field<Self> = Field::bit(97);
    const INSTRUCTION: Field<Self> = Field::bit(98);
    const READ: Field<Self> = Field::bit(99);
    const SECOND_STAGE: Field<Self> = Field::bit(103);
    const CLASS: Field<Self> = Field::bits(105, 104);
    const INPUT_ADDRESS: Field<Self> = Field::bits(191, 140);

    /// Returns what the record is about.
    pub fn kind(&self) -> EventKind {
        EventKind::of(self.get(Self::NUMBER) as u8)
    }

    fn stream(&self) -> StreamId {
        StreamId(self.get(Self::STREAM) as u32)
    }

    fn pasid(&self) -> Option<Pasid> {
        // C_BAD_SUBSTREAMID has no SSV, and always has a SubstreamID.
        let valid = self.is_set(Self::SUBSTREAM_VALID) || self.kind() == EventKind::BadSubstreamId;
        valid.then(|| Pasid::from_low_bits(self.get(Self::SUBSTREAM)))
    }

    /// Returns what the record says, as a fault.
    ///
    /// Its code is the manual's event number. If the second stage refused the access, bit 8 is set, and bits 10 and 9 say
    /// what for: 2 for the access itself, 1 for a table of the first stage, 0 for a context descriptor.
    ///
    /// Events about the configuration of a stream (`C_BAD_STE` and the like) tell neither address nor access. Physical
    /// addresses, and those between the stages, are not told at all.
    pub fn decode(&self) -> FaultRecord {
        let kind = self.kind();
        let access = match kind {
            EventKind::PageRequestHint => Access::PageRequest,
            EventKind::BadTranslationRequest if self.is_set(Self::ATS_WRITE) => Access::Write,
            EventKind::BadTranslationRequest => Access::Read,
            _ if !kind.has_address() => Access::Unknown,
            _ if self.is_set(Self::READ) => Access::Read,
            _ => Access::Write,
        };
        let mut code = self.get(Self::NUMBER) as u16;
        let mut reason = kind.reason();
        if kind.has_stage() && self.is_set(Self::SECOND_STAGE) {
            let class = self.get(Self::CLASS);
            code |= CODE_SECOND_STAGE | (class as u16) << CODE_CLASS_SHIFT;
            if class != CLASS_INPUT {
                // What the first stage says is read from where the second has nothing: as if memory did not answer.
                reason = FaultReason::BadTables;
            }
        }
        let iova = Iova(if kind.has_address() { self.address(Self::INPUT_ADDRESS) } else { 0 });
        FaultRecord { stream: self.stream(), pasid: self.pasid(), access, iova, reason, code }
    }

    /// Returns the request for a page that an access which waits stands for, and its stall tag; `None` if none waits.
    ///
    /// It is a group of its own: what it asks for is what the access was about to do.
    fn stalled(&self, stalling: &[StreamId]) -> Option<PageRequest> {
        if !self.kind().can_stall() || !self.is_set(Self::STALL) {
            return None;
        }
        let (stream, read) = (self.stream(), self.is_set(Self::READ));
        Some(PageRequest {
            stream,
            tag: stalls::tag(stream, self.pasid(), self.get(Self::STALL_TAG) as u16, stalling),
            iova: Iova(self.address(Self::INPUT_ADDRESS)),
            perms: Perms {
                read,
                write: !read,
                execute: self.is_set(Self::INSTRUCTION),
                privileged: self.is_set(Self::PRIVILEGED),
            },
            last: true,
        })
    }
}

/// An error of the unit itself: a bit of `GERROR`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum UnitError {
    /// The command queue stopped at a command (`CMDQ_ERR`).
    CommandQueue,
    /// Events could not be written, stalled accesses among them: what stalls has to be ended (`EVENTQ_ABT_ERR`).
    EventQueue,
    /// Page requests could not be written (`PRIQ_ABT_ERR`).
    RequestQueue,
    /// The message of a `CMD_SYNC` could not be written (`MSI_CMDQ_ABT_ERR`).
    SyncMessage,
    /// The message about an event could not be written (`MSI_EVENTQ_ABT_ERR`).
    EventMessage,
    /// The message about page requests could not be written (`MSI_PRIQ_ABT_ERR`).
    RequestMessage,
    /// The message about an error could not be written (`MSI_GERROR_ABT_ERR`).
    ErrorMessage,
    /// Service failure mode: the unit does nothing any more (`SFM_ERR`).
    ServiceFailure,
    /// An enhanced command queue, of which this driver has none, stopped (`CMDQP_ERR`).
    OtherCommandQueue,
    /// The device permission table, which this driver does not use, refused an access (`DPT_ERR`).
    DevicePermission,
}

impl UnitError {
    /// Returns the errors of a status that [`Event::CommandsFailed`] told.
    pub fn of(status: u32) -> impl Iterator<Item = Self> {
        let known = [
            (GERROR::CMDQ_ERR::SET, Self::CommandQueue),
            (GERROR::EVENTQ_ABT_ERR::SET, Self::EventQueue),
            (GERROR::PRIQ_ABT_ERR::SET, Self::RequestQueue),
            (GERROR::MSI_CMDQ_ABT_ERR::SET, Self::SyncMessage),
            (GERROR::MSI_EVENTQ_ABT_ERR::SET, Self::EventMessage),
            (GERROR::MSI_PRIQ_ABT_ERR::SET, Self::RequestMessage),
            (GERROR::MSI_GERROR_ABT_ERR::SET, Self::ErrorMessage),
            (GERROR::SFM_ERR::SET, Self::ServiceFailure),
            (GERROR::CMDQP_ERR::SET, Self::OtherCommandQueue),
            (GERROR::DPT_ERR::SET, Self::DevicePermission),
        ];
        known.into_iter().filter(move |(bit, _)| status & bit.value != 0).map(|(_, error)| error)
    }
}

/// The event side of a unit; see [`iommu::Events`].
///
/// A fault of a device whose faults stall is a page request, of a group of its own. On a unit that has such devices
/// `next_request` empties both queues, so that nothing waits behind faults.
///
/// It acknowledges no error: [`Commands::told`](iommu::Commands::told) and [`Commands::recover`](iommu::Commands::recover) do,
/// and are to be called after each [`Event::CommandsFailed`]. Until then each
/// [`look_for_errors`](iommu::Events::look_for_errors) has the errors told again.
#[derive(Debug)]
pub struct Events<B> {
    bus: B,
    events: ReportQueue<EVENT_WORDS>,
    /// The PRI queue, where the unit has one; elsewhere its registers are reserved.
    requests: Option<ReportQueue<REQUEST_WORDS>>,
    /// Devices whose faults stall.
    stalling: Vec<StreamId, STALLING>,
    /// Which errors were active when they were looked for; of those, which were followed by the news of what they lost, and
    /// which were told.
    active: u32,
    lost: u32,
    told: u32,
    /// All registers read as ones when errors were looked for: the unit is not there any more.
    gone: bool,
}

impl<B: Bus> Events<B> {
    pub(crate) fn new(
        bus: B,
        events: ReportQueue<EVENT_WORDS>,
        requests: Option<ReportQueue<REQUEST_WORDS>>,
        stalling: Vec<StreamId, STALLING>,
    ) -> Self {
        Self { bus, events, requests, stalling, active: 0, lost: 0, told: 0, gone: false }
    }

    /// Lets the unit interrupt, by its wires for events, page requests and errors.
    ///
    /// They are pulses: what was reported before does not interrupt any more. Call it when the handlers stand, and drain
    /// the unit once afterwards.
    pub fn enable_interrupts(&mut self) -> Result<(), Error> {
        interrupts::enable(&self.bus, self.requests.is_some())
    }

    /// Lets the unit interrupt by messages instead, where it can (`IDR0.MSI`). The same holds of them.
    ///
    /// On an error interrupts are off.
    pub fn enable_messages(&mut self, messages: &Messages) -> Result<(), Error> {
        if !regs::IDR0.read(&self.bus).is_set(IDR0::MSI) {
            return Err(Error::Unsupported { feature: "IDR0.MSI" });
        }
        interrupts::enable_messages(&self.bus, messages, self.requests.is_some())
    }

    /// Takes the oldest event.
    #[inline]
    fn next_record(&mut self) -> Option<Event> {
        let record = EventRecord(self.events.pop(&self.bus)?);
        let stalled = record.stalled(&self.stalling).map(Event::PageRequest);
        Some(stalled.unwrap_or_else(|| Event::Fault(record.decode())))
    }

    /// Takes the news that page requests were lost, if they were, for when the queue was just found empty.
    #[inline(never)]
    fn lost_requests(&mut self) -> Option<Event> {
        const LOST: u32 = GERROR::PRIQ_ABT_ERR::SET.value;
        let requests = self.requests.as_mut()?;
        if requests.take_overflow(&self.bus) {
            return Some(Event::RequestsLost);
        }
        if self.active & LOST & !self.lost == 0 {
            return None;
        }
        // Nothing is queued while the error is active, so a queue that is empty now stays so until it is acknowledged.
        if let Some(entry) = requests.pop(&self.bus) {
            return Some(RequestEntry(entry).decode());
        }
        self.lost |= LOST;
        Some(Event::RequestsLost)
    }
}

impl<B: Bus> iommu::Events for Events<B> {
    /// Acknowledges nothing: a queue pulses when an entry comes after CONS said that it is empty, and PROD is read after
    /// that.
    fn acknowledge(&mut self) {
        if let Some(requests) = &mut self.requests {
            requests.begin();
        }
    }

    fn look_for_errors(&mut self) {
        let now = regs::GERROR.read(&self.bus).get();
        let gone = now == regs::GONE;
        let active = match (gone, core::mem::replace(&mut self.gone, gone)) {
            (false, _) => (now ^ regs::GERRORN.read(&self.bus).get()) & ERRORS,
            // Told once, as all errors together: nobody can acknowledge them.
            (true, false) => now,
            (true, true) => 0,
        };
        // Where there is no queue of page requests, nothing of it is lost.
        let lost = if self.requests.is_some() { 0 } else { GERROR::PRIQ_ABT_ERR::SET.value };
        (self.active, self.lost, self.told) = (active, lost, 0);
    }

    #[inline]
    fn next_ordinary(&mut self) -> Option<PageRequest> {
        let requests = self.requests.as_mut()?;
        let request = RequestEntry(requests.peek(&self.bus)?).ordinary()?;
        requests.take(&self.bus);
        Some(request)
    }

    fn next_request(&mut self) -> Option<Event> {
        if let Some(entry) = self.requests.as_mut().and_then(|requests| requests.pop(&self.bus)) {
            return Some(RequestEntry(entry).decode());
        }
        let lost = self.lost_requests();
        if lost.is_some() || self.stalling.is_empty() { lost } else { self.next_record() }
    }

    fn next_fault(&mut self) -> Option<Event> {
        const LOST: u32 = GERROR::EVENTQ_ABT_ERR::SET.value;
        if let Some(event) = self.next_record() {
            return Some(event);
        }
        if self.events.take_overflow(&self.bus) {
            return Some(Event::FaultsLost);
        }
        if self.active & LOST & !self.lost != 0 {
            self.lost |= LOST;
            return Some(Event::FaultsLost);
        }
        // What is told may be acknowledged, so what it lost was told before.
        let status = self.active & !(LOSSES & !self.lost);
        if status & !self.told != 0 {
            self.told |= status;
            return Some(Event::CommandsFailed { status });
        }
        None
    }

    fn refused_by(&self, fault: &FaultRecord) -> Stages {
        if !EventKind::of(fault.code as u8).has_stage() {
            Stages::None
        } else if fault.code & CODE_SECOND_STAGE != 0 {
            Stages::Second
        } else {
            Stages::First
        }
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
            // S2 is bit 39 of w1, CLASS bits 41 and 40.
            let second = if words[1] & 1 << 39 != 0 { 1 << 8 | (words[1] >> 40 & 3) << 9 } else { 0 };
            let code = (words[0] & 0xFF | second) as u16;
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
