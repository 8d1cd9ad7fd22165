//! The three halves of a unit in service, and what passes between them.
//!
//! After bring-up a unit is owned in three parts that never wait for each other: [`Events`] belongs to the interrupt
//! handler, [`Commands`] is shared under a short lock, [`Tables`] belongs to the control path. A change of the tables
//! says which [`Invalidation`]s make it visible; submitting them yields a [`Ticket`]; what the change took out of use
//! may be used again once the ticket has completed, and not before.

use crate::{
    Event, FaultRecord, Gpa, Iova, PAGE_SIZE, PageRequest, PageResponse, Pasid, Root, StreamId, Trust,
};
use core::fmt;
use heapless::Vec;

/// The event side of a unit: what hardware reports. Owned by one core, used from its interrupt handler.
pub trait Events {
    /// Opens a pass: acknowledges the interrupt, so that whatever arrives from here on interrupts again.
    fn acknowledge(&mut self);
    /// Looks for errors of the unit itself, where those have an interrupt of their own (`GERROR` of SMMUv3): the calls below
    /// tell what was active when this was called last. Where they share that of faults, there is nothing to do.
    fn look_for_errors(&mut self) {}
    /// Takes the oldest page request, or the news that some were lost; `None` when the queue is empty.
    ///
    /// The places of those that were found together are given back with the last of them. Who lets a request be answered
    /// before that has a queue for twice as many as may be outstanding: a device that is answered may ask again at once.
    ///
    /// Takes a bounded number of register accesses; never waits. So does `next_fault`.
    fn next_request(&mut self) -> Option<Event>;
    /// Takes the oldest page request if it is an ordinary one; after `None` [`next_request`](Self::next_request) is to be
    /// asked, which knows of everything.
    ///
    /// It is there because a request costs much on its way through an [`Event`].
    fn next_ordinary(&mut self) -> Option<PageRequest> {
        None
    }
    /// Takes the next fault, or the news that some were lost or that commands failed; `None` when there is no more.
    fn next_fault(&mut self) -> Option<Event>;
    /// Takes the next report, requests first: devices wait for those.
    fn next_event(&mut self) -> Option<Event> {
        self.next_request().or_else(|| self.next_fault())
    }
    /// Returns which tables refused the access of a fault that this unit told: [`Stages::None`] if none did,
    /// [`Stages::Nested`] where it was one of both and the unit does not say which.
    ///
    /// Of a nested attachment the second stage is the hypervisor's: its guest does not learn what was refused there. What a
    /// unit reports without saying of which stage (a page request) is the guest's to answer, and names its own addresses.
    fn refused_by(&self, fault: &FaultRecord) -> Stages;
}

/// The command side of a unit. Its caller holds a lock; nothing here waits.
pub trait Commands {
    /// Queues `invalidations` and one completion mark, and rings the doorbell once.
    fn submit(&mut self, invalidations: &[Invalidation]) -> Result<Ticket, Error>;
    /// Queues the answer to a group of page requests. The unit is told by [`ring`](Self::ring), which is to follow before the
    /// lock is given back: once for all answers that were queued.
    ///
    /// Room for answers is reserved: it fails only if more are sent than the unit was promised at bring-up, or the
    /// unit has stopped. Then the response comes back, because the device still waits for it.
    fn queue_response(&mut self, response: PageResponse) -> Result<(), (PageResponse, Error)>;
    /// Rings the doorbell for the answers that were queued since the unit was told last; for none it does nothing.
    fn ring(&mut self);
    /// Queues the answer to a group of page requests and rings the doorbell. It fails as
    /// [`queue_response`](Self::queue_response) does.
    fn respond(&mut self, response: PageResponse) -> Result<(), (PageResponse, Error)> {
        self.queue_response(response)?;
        self.ring();
        Ok(())
    }
    /// Tells what became of `ticket`.
    fn poll(&mut self, ticket: Ticket) -> Completion;
    /// Takes the queue one step out of an error, and returns what had stopped it; `None` when nothing does.
    ///
    /// To be called, again and again until it returns `None`, after [`Event::CommandsFailed`], and when a ticket that was
    /// polled has failed: each call deals with one error, in a bounded number of register accesses. What was queued behind
    /// the error is executed.
    fn recover(&mut self) -> Option<Failure>;
    /// Takes note that [`Event::CommandsFailed`] told `status`: what was lost by errors in it was told before it.
    ///
    /// To be called with each, before [`recover`](Self::recover). Errors that lose reports stay until then, so that none is over
    /// before it was told; the unit queues nothing meanwhile.
    fn told(&mut self, status: u32) {
        let _ = status;
    }
}

/// The table side of a unit: which device is translated how. A device that was never assigned is blocked.
pub trait Tables {
    /// Gives `stream` tables of its own, in which everything is still blocked.
    fn assign(&mut self, stream: StreamId, features: Features) -> Result<Invalidations, Error>;
    /// Lets accesses of `stream` that carry `pasid` (or none) through `translation`.
    fn attach(
        &mut self,
        stream: StreamId,
        pasid: Option<Pasid>,
        translation: Translation,
    ) -> Result<(Attachment, Invalidations), Error>;
    /// Blocks an attachment again. Its tables are free once the invalidations completed and `finish` took the token.
    fn detach(&mut self, attachment: Attachment) -> Result<(Leaving, Invalidations), Error>;
    /// Blocks all of `stream` again.
    fn block(&mut self, stream: StreamId) -> Result<(Leaving, Invalidations), Error>;
    /// Has what a blocked `stream` still tries refused without a record, so that it cannot flood the unit's faults. Ends
    /// with the `finish` of its block.
    fn silence(&mut self, stream: StreamId) -> Result<Invalidations, Error>;
    /// Takes note that the invalidations of a [`Leaving`] have completed.
    fn finish(&mut self, leaving: Leaving);
}

/// What a unit can do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Capabilities {
    /// First-stage (stage 1) tables.
    pub stage1: bool,
    /// Second-stage (stage 2) tables.
    pub stage2: bool,
    /// First-stage tables of a guest, whose addresses go through second-stage tables.
    pub nested: bool,
    /// Devices that reach all of memory without tables.
    pub bypass: bool,
    /// Levels of a table hierarchy, at most.
    pub levels: u8,
    /// Sizes of leaves in first-stage tables of 4 KiB pages: bit n set, it takes leaves of 2^n bytes.
    pub stage1_leaves: u64,
    /// The same of second-stage tables.
    pub stage2_leaves: u64,
    /// Bits of a PASID; 0 where the unit knows none.
    pub pasid_bits: u8,
    /// Page requests are served, and can be drained.
    pub page_requests: bool,
    /// Device TLBs (ATS).
    pub device_tlb: bool,
    /// Page walks see the CPU's caches.
    pub coherent_walks: bool,
    /// Second-stage tables of legacy mode can make accesses snoop the CPU's caches, whatever the device says (SNP, `ECAP.SC`).
    pub forced_snoop: bool,
    /// The unit may remember that something was not mapped (`CAP.CM`), or not see at once that it is (`CAP.RWBF`): what is
    /// mapped anew is invalidated, too.
    pub caches_absence: bool,
}

impl Capabilities {
    /// Returns what units `a` and `b` can both do: all that may be used of a domain with devices behind each of them.
    ///
    /// What has to be done for one of them has to be done for both.
    pub const fn common(a: Self, b: Self) -> Self {
        const fn least(a: u8, b: u8) -> u8 {
            if a < b { a } else { b }
        }
        Self {
            stage1: a.stage1 && b.stage1,
            stage2: a.stage2 && b.stage2,
            nested: a.nested && b.nested,
            bypass: a.bypass && b.bypass,
            levels: least(a.levels, b.levels),
            stage1_leaves: a.stage1_leaves & b.stage1_leaves,
            stage2_leaves: a.stage2_leaves & b.stage2_leaves,
            pasid_bits: least(a.pasid_bits, b.pasid_bits),
            page_requests: a.page_requests && b.page_requests,
            device_tlb: a.device_tlb && b.device_tlb,
            coherent_walks: a.coherent_walks && b.coherent_walks,
            forced_snoop: a.forced_snoop && b.forced_snoop,
            caches_absence: a.caches_absence || b.caches_absence,
        }
    }
}

/// What a device may use besides plain accesses.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Features {
    /// The device keeps translations of its own (ATS).
    pub device_tlb: bool,
    /// The device sends page requests (PRI). Needs `device_tlb`.
    pub page_requests: bool,
    /// The device's accesses may carry a PASID.
    pub pasid: bool,
}

/// How the accesses of an attachment are translated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Translation {
    /// Not at all: every access is refused, as it is without an attachment.
    Blocked,
    /// Not at all: every access reaches the physical address that it names.
    Bypass(Trust),
    /// By first-stage (stage 1) tables.
    Stage1(Root),
    /// By second-stage (stage 2) tables.
    Stage2(Root),
    /// By first-stage tables that a guest owns; the addresses in and from those by second-stage tables.
    Nested {
        /// The guest's.
        first: FirstStage,
        /// The hypervisor's: what the guest's own addresses are.
        second: Root,
    },
}

/// A first stage that a guest owns. Nothing in it is believed: all that it says goes through the second stage.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum FirstStage {
    /// Page tables of `levels` levels, whose top table is at `root`.
    Pages {
        /// Where.
        root: Gpa,
        /// Levels, 4 or 5.
        levels: u8,
    },
    /// A table of context descriptors, one for each PASID, as the guest's own stream table entry names it (SMMUv3).
    Contexts {
        /// The guest's entry; only the fields that the driver lists as a guest's to choose are taken from it.
        entry: [u64; 8],
    },
}

/// Which tables an attachment is translated by.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Stages {
    /// None: it is blocked, or bypasses them.
    None,
    /// First-stage tables.
    First,
    /// Second-stage tables.
    Second,
    /// A guest's first stage over the hypervisor's second.
    Nested,
}

impl Translation {
    /// Returns which tables it names.
    pub const fn stages(&self) -> Stages {
        match self {
            Self::Blocked | Self::Bypass(_) => Stages::None,
            Self::Stage1(_) => Stages::First,
            Self::Stage2(_) => Stages::Second,
            Self::Nested { .. } => Stages::Nested,
        }
    }
}

/// A number under which a unit caches translations: `DID` of VT-d, VMID or ASID of SMMUv3.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct DomainId(pub u16);

/// A device, or one PASID of it, that is translated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Attachment {
    /// Its number among all that the unit ever had, so that it is never taken for one that came after it.
    pub serial: u64,
    /// The device.
    pub stream: StreamId,
    /// The PASID, or `None` for accesses without one.
    pub pasid: Option<Pasid>,
    /// The number under which its translations are cached.
    pub domain: DomainId,
    /// Which tables translate it.
    pub stages: Stages,
    /// Whether the device keeps translations of its own.
    pub device_tlb: bool,
}

/// Something for the unit, and perhaps the device, to forget.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Invalidation {
    /// Everything that the unit caches, of all devices.
    All,
    /// All interrupt entries.
    Interrupts,
    /// 2^`log2` interrupt entries from `index`, a multiple of their number (VT-d).
    InterruptEntry {
        /// The first entry.
        index: u16,
        /// How many, as a power of two.
        log2: u8,
    },
    /// The configuration of a device.
    Device {
        /// The device.
        stream: StreamId,
        /// Whether the device keeps translations of its own.
        device_tlb: bool,
    },
    /// The configuration and all translations of an attachment.
    Attachment(Attachment),
    /// The translations of `pages` pages from `iova`, whose leaf entries changed. Of a nested attachment these are pages of
    /// its second stage; as nobody knows what the first made of them, all that it cached goes with them.
    Pages {
        /// Whose.
        attachment: Attachment,
        /// The first page.
        iova: Iova,
        /// How many.
        pages: u64,
    },
    /// What a guest changed in the first stage of its own, of a nested attachment. Device TLBs are not touched.
    FirstStage {
        /// Whose.
        attachment: Attachment,
        /// The guest's own number of the address space (ASID of SMMUv3); `None` is all of them.
        asid: Option<u16>,
        /// The first page and how many; `None` is all.
        pages: Option<(Iova, u64)>,
    },
    /// The context descriptors of a guest's table (SMMUv3), of a nested attachment.
    Contexts {
        /// Whose.
        attachment: Attachment,
        /// Of which PASID; `None` is of all.
        pasid: Option<Pasid>,
    },
    /// What the device itself remembers, of an attachment that has a device TLB.
    DeviceTlb {
        /// Whose.
        attachment: Attachment,
        /// Of which of the guest's PASIDs; `None` is without PASID.
        pasid: Option<Pasid>,
        /// The first page and how many; `None` is all.
        pages: Option<(Iova, u64)>,
    },
    /// Completion also means that every page request sent before has reached its queue.
    PageRequestDrain,
    /// All accesses of a blocked device that still wait for an answer: they are aborted. For when everything that was
    /// reported of it has been answered; no answer to it is sent afterwards. Nothing where its faults do not stall.
    Stalls {
        /// The device.
        stream: StreamId,
    },
}

impl Invalidation {
    /// Returns the invalidation of the `bytes` bytes from `iova`, grown to whole pages.
    pub fn covering(attachment: Attachment, iova: Iova, bytes: u64) -> Self {
        let first = iova.0 / PAGE_SIZE;
        let last = iova.0.saturating_add(bytes.saturating_sub(1)) / PAGE_SIZE;
        Self::Pages { attachment, iova: Iova(first * PAGE_SIZE), pages: last - first + 1 }
    }

    /// Returns the device that has to forget something, too; `None` if it is the unit alone.
    pub const fn asks(&self) -> Option<StreamId> {
        match *self {
            Self::Device { stream, device_tlb: true } => Some(stream),
            Self::Attachment(attachment)
            | Self::Pages { attachment, .. }
            | Self::DeviceTlb { attachment, .. }
                if attachment.device_tlb =>
            {
                Some(attachment.stream)
            }
            _ => None,
        }
    }

    /// Returns the part of it that the unit does alone, without its device; `None` if there is no such part.
    ///
    /// For a device that does not answer ([`FailureCause::Unanswered`]), once it is blocked: what it remembers it can use no
    /// more, so nobody has to wait for it again. It has to be reset before it is let through to anything.
    pub const fn unasked(self) -> Option<Self> {
        Some(match self {
            Self::Device { stream, .. } => Self::Device { stream, device_tlb: false },
            Self::Attachment(attachment) => Self::Attachment(Attachment { device_tlb: false, ..attachment }),
            Self::Pages { attachment, iova, pages } => {
                Self::Pages { attachment: Attachment { device_tlb: false, ..attachment }, iova, pages }
            }
            Self::DeviceTlb { .. } => return None,
            other => other,
        })
    }
}

/// The invalidations that one change of the tables asks for, in their order.
pub type Invalidations = Vec<Invalidation, 4>;

/// A place in a command queue, by a 64-bit sequence number that is never used twice.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[must_use = "nothing that the commands took out of use may be reused before the ticket completes"]
pub struct Ticket(pub u64);

/// What became of a ticket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Completion {
    /// Hardware has completed it and everything before it.
    Done,
    /// Not yet.
    Pending,
    /// It never will: a command of it was refused, or a device did not answer. What it was to take out of use may still be
    /// in use, until the same is submitted again and done.
    Failed,
}

/// What stopped a command queue, as [`Commands::recover`] found it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Failure {
    /// Why.
    pub cause: FailureCause,
    /// Whose command it was, where it can be told: for [`FailureCause::Unanswered`] the device to quarantine.
    pub stream: Option<StreamId>,
    /// The ticket that is [`Completion::Failed`] now, if one is.
    pub ticket: Option<Ticket>,
}

/// Why a command queue stopped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum FailureCause {
    /// The unit does not take the command (`FSTS.IQE`, `CERROR_ILL`). It was replaced by one that does nothing.
    Refused,
    /// The unit could not read the queue (`CERROR_ABT`), or could not be brought to go on: nothing will be executed.
    Stopped,
    /// A device did not answer in time (`FSTS.ITE`, `CERROR_ATC_INV_SYNC`).
    Unanswered,
    /// A device gave an answer that nobody waited for (`FSTS.ICE`).
    Unexpected,
}

/// Tables that are blocked, but that hardware may still be walking.
///
/// Goes back to [`Tables::finish`] once the invalidations have completed. If they never do, it is kept, and with it
/// everything that it names: that stays blocked and out of use.
#[derive(Debug, Eq, PartialEq)]
#[must_use = "the tables stay out of use until `finish` takes this back"]
pub struct Leaving {
    /// The device.
    pub stream: StreamId,
    /// Which PASID of it, or the whole device.
    pub what: LeavingPart,
}

/// How much of a device leaves.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LeavingPart {
    /// One attachment.
    Attachment(Attachment),
    /// All of it.
    Device,
}

/// A message-signalled interrupt, as the unit is to write it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Message {
    /// Where.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// Why an operation on a unit did not happen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Error {
    /// There is no unit at this address: its registers read as all ones.
    Absent,
    /// The unit lacks `feature`, by the manual's name of the capability bit.
    Unsupported {
        /// The capability, as the manual names it.
        feature: &'static str,
    },
    /// Firmware left `what` switched on, and this driver does not take it over.
    InUse {
        /// The manual's name of what is on.
        what: &'static str,
    },
    /// The memory handed over for `purpose` has `words` words, and `needed` are needed, naturally aligned.
    Memory {
        /// What it is for.
        purpose: &'static str,
        /// What was given.
        words: usize,
        /// What is needed.
        needed: usize,
    },
    /// The unit's tables hold no such device: past the last bus, or never assigned.
    UnknownStream {
        /// The device asked for.
        stream: StreamId,
    },
    /// The device is assigned already, or its tables are still leaving.
    StreamBusy {
        /// The device asked for.
        stream: StreamId,
    },
    /// This PASID of the device is attached already, is leaving, or was never attached.
    PasidState {
        /// The device asked for.
        stream: StreamId,
        /// The PASID asked for.
        pasid: Option<Pasid>,
    },
    /// The PASID is past the end of the device's tables.
    PasidOutOfRange {
        /// The PASID asked for.
        pasid: Pasid,
        /// The number of PASIDs that the tables hold.
        limit: u32,
    },
    /// All frames, domain numbers or places for `what` are taken.
    Exhausted {
        /// What there is no more of.
        what: &'static str,
    },
    /// The command queue has no room; try again when earlier commands have completed.
    QueueFull {
        /// Entries asked for.
        needed: usize,
        /// Entries free now, without those reserved for answers.
        free: usize,
    },
    /// The commands of this ticket were not executed; [`Commands::recover`] told why.
    Failed {
        /// Which.
        ticket: Ticket,
    },
    /// Only one `what` may be on its way at a time; try again when the one before has completed.
    Busy {
        /// What is on its way.
        what: &'static str,
    },
    /// The unit did not acknowledge within `waited_us` microseconds.
    Timeout {
        /// The register or queue waited for, by the manual's name.
        register: &'static str,
        /// How long.
        waited_us: u64,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Absent => write!(f, "no unit answers at this address"),
            Self::Unsupported { feature } => write!(f, "the unit lacks {feature}"),
            Self::InUse { what } => write!(f, "firmware left {what} switched on"),
            Self::Memory { purpose, words, needed } => write!(
                f,
                "memory for {purpose} has {words} words, but {needed} naturally aligned words are needed"
            ),
            Self::UnknownStream { stream } => write!(f, "stream {:#x} is not assigned", stream.0),
            Self::StreamBusy { stream } => write!(f, "stream {:#x} is in use", stream.0),
            Self::PasidState { stream, pasid: Some(pasid) } => {
                write!(f, "PASID {:#x} of stream {:#x} is not in the state for this", pasid.value(), stream.0)
            }
            Self::PasidState { stream, pasid: None } => {
                write!(f, "stream {:#x} without PASID is not in the state for this", stream.0)
            }
            Self::PasidOutOfRange { pasid, limit } => {
                write!(f, "PASID {:#x} is past the {limit} of the tables", pasid.value())
            }
            Self::Exhausted { what } => write!(f, "there are no more {what}"),
            Self::QueueFull { needed, free } => {
                write!(f, "the command queue has room for {free} entries, not {needed}")
            }
            Self::Failed { ticket } => write!(f, "the commands of ticket {} failed", ticket.0),
            Self::Busy { what } => write!(f, "another {what} is on its way"),
            Self::Timeout { register, waited_us } => {
                write!(f, "{register} gave no acknowledgement in {waited_us} us")
            }
        }
    }
}

impl core::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTACHMENT: Attachment = Attachment {
        serial: 1,
        stream: StreamId(0x20),
        pasid: None,
        domain: DomainId(1),
        stages: Stages::First,
        device_tlb: false,
    };

    #[test]
    fn an_invalidation_covers_every_page_that_its_bytes_touch() {
        let pages = |iova, bytes| match Invalidation::covering(ATTACHMENT, Iova(iova), bytes) {
            Invalidation::Pages { iova, pages, .. } => (iova.0, pages),
            other => panic!("{other:?}"),
        };

        assert_eq!(pages(0x1000, 0x1000), (0x1000, 1));
        assert_eq!(pages(0x1FFF, 2), (0x1000, 2));
        assert_eq!(pages(u64::MAX - 1, 0x1_0000), (u64::MAX - 0xFFF, 1), "the end does not wrap");
    }

    #[test]
    fn unasked_an_invalidation_is_the_same_for_the_unit_and_asks_no_device() {
        let of = |device_tlb| {
            let attachment = Attachment { device_tlb, ..ATTACHMENT };
            [
                Invalidation::Device { stream: ATTACHMENT.stream, device_tlb },
                Invalidation::Attachment(attachment),
                Invalidation::Pages { attachment, iova: Iova(0x1000), pages: 2 },
            ]
        };
        let device_tlb = |device_tlb| {
            let attachment = Attachment { device_tlb, ..ATTACHMENT };
            Invalidation::DeviceTlb { attachment, pasid: None, pages: None }
        };

        for (asking, not) in of(true).into_iter().zip(of(false)) {
            assert_eq!((asking.asks(), asking.unasked()), (Some(ATTACHMENT.stream), Some(not)));
            assert_eq!((not.asks(), not.unasked()), (None, Some(not)));
        }
        assert_eq!((device_tlb(true).asks(), device_tlb(true).unasked()), (Some(ATTACHMENT.stream), None));
        let all = Invalidation::All;
        assert_eq!((all.asks(), all.unasked()), (None, Some(all)));
    }

    /// A unit that can do everything, and asks for nothing.
    const ABLE: Capabilities = Capabilities {
        stage1: true,
        stage2: true,
        nested: true,
        bypass: true,
        levels: 5,
        stage1_leaves: 1 << 12 | 1 << 21 | 1 << 30,
        stage2_leaves: 1 << 12 | 1 << 21,
        pasid_bits: 20,
        page_requests: true,
        device_tlb: true,
        coherent_walks: true,
        forced_snoop: true,
        caches_absence: false,
    };

    #[test]
    fn two_units_have_in_common_what_each_of_them_can_do() {
        let changes: [fn(&mut Capabilities); 13] = [
            |c| c.stage1 = false,
            |c| c.stage2 = false,
            |c| c.nested = false,
            |c| c.bypass = false,
            |c| c.levels = 3,
            |c| c.stage1_leaves = 1 << 12,
            |c| c.stage2_leaves = 1 << 12,
            |c| c.pasid_bits = 0,
            |c| c.page_requests = false,
            |c| c.device_tlb = false,
            |c| c.coherent_walks = false,
            |c| c.forced_snoop = false,
            |c| c.caches_absence = true,
        ];
        for (at, change) in changes.into_iter().enumerate() {
            let mut weaker = ABLE;
            change(&mut weaker);

            assert_ne!(weaker, ABLE);
            assert_eq!(Capabilities::common(ABLE, weaker), weaker, "change {at}");
            assert_eq!(Capabilities::common(weaker, ABLE), weaker, "change {at}");
            assert_eq!(Capabilities::common(weaker, weaker), weaker, "change {at}");
        }
    }

    #[test]
    fn leaves_in_common_are_the_sizes_that_both_take_and_not_the_smaller_list() {
        let with = |stage2_leaves| Capabilities { stage2_leaves, ..ABLE };

        let common = Capabilities::common(with(1 << 12 | 1 << 21), with(1 << 12 | 1 << 30));

        assert_eq!(common.stage2_leaves, 1 << 12);
    }

    #[test]
    fn an_error_names_the_thing() {
        let error = Error::Timeout { register: "GSTS.TES", waited_us: 100_000 };

        assert_eq!(error.to_string(), "GSTS.TES gave no acknowledgement in 100000 us");
    }
}
