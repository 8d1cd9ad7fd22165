//! What hardware reports, and what it is answered, in terms that no architecture owns.

use crate::{Iova, Pasid, Perms, StreamId};

/// One thing that a unit reported.
#[derive(Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum Event {
    /// An access was refused; nobody waits for an answer.
    Fault(FaultRecord),
    /// A device asks for a page, as one part of a group.
    PageRequest(PageRequest),
    /// A device says that it will send no more page requests for this PASID; it waits for no answer.
    StopMarker {
        /// The device.
        stream: StreamId,
        /// The PASID that it stopped using.
        pasid: Option<Pasid>,
    },
    /// The unit wrote an entry that the manual does not know; it is kept as it was.
    Malformed {
        /// The entry's first two words.
        words: [u64; 2],
        /// The device and group that it belongs to, if it is a page request of an unknown kind.
        group: Option<(StreamId, GroupTag)>,
    },
    /// The queue of page requests was full: an unknown number was lost, and answered by the unit itself.
    ///
    /// The queue has been drained to its end, so whatever belongs to a group that began before is gone.
    RequestsLost,
    /// There was no room to record a fault: an unknown number was lost.
    FaultsLost,
    /// The unit stopped executing commands, or dropped one; `status` is the manual's status register.
    ///
    /// It stays so, is reported once in each pass, and on VT-d faults no longer interrupt, until
    /// [`Commands::told`](crate::unit::Commands::told) had it and [`Commands::recover`](crate::unit::Commands::recover) found
    /// nothing more to do. Then another pass is due: what happened meanwhile did not interrupt.
    CommandsFailed {
        /// `FSTS` of VT-d, `GERROR` of SMMUv3.
        status: u32,
    },
}

/// What kind of access met a fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Access {
    /// A read.
    Read,
    /// A write.
    Write,
    /// An atomic operation: both.
    Atomic,
    /// A page request that the unit itself refused.
    PageRequest,
    /// The unit does not say; then there is no address either.
    Unknown,
}

/// An access that was refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct FaultRecord {
    /// The device.
    pub stream: StreamId,
    /// The PASID that the access carried.
    pub pasid: Option<Pasid>,
    /// What was tried.
    pub access: Access,
    /// The address, or its page; for an interrupt the value that the manual defines; 0 if the access is unknown.
    pub iova: Iova,
    /// Why, in the few classes that an owner acts upon.
    pub reason: FaultReason,
    /// Why, as the manual encodes it.
    pub code: u16,
}

/// Why an access was refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[non_exhaustive]
pub enum FaultReason {
    /// The device, or this PASID of it, is attached to nothing.
    NotAttached,
    /// No mapping at this address.
    NotMapped,
    /// A mapping that does not permit this access.
    NotPermitted,
    /// The address is outside what the tables can hold.
    AddressSize,
    /// The tables themselves are wrong: a reserved bit, an invalid entry, an unreadable table.
    BadTables,
    /// An interrupt request was refused.
    Interrupt,
    /// A code that this version of the driver does not know.
    Other,
}

/// What hardware needs back to release what waits: a page-group index with its PASID, or a stall tag.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct GroupTag {
    /// The PASID of the requests.
    pub pasid: Option<Pasid>,
    /// The device's own number for the group (`PRGI`, 9 bits; a stall tag has 16).
    pub index: u16,
}

/// A device asks for a page.
///
/// The requests of one device with the same [`GroupTag`] form a group, and one response answers the whole group,
/// once its last request was seen.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct PageRequest {
    /// The device.
    pub stream: StreamId,
    /// Its group.
    pub tag: GroupTag,
    /// The page that it asks for; the low 12 bits are zero.
    pub iova: Iova,
    /// What it wants to do there.
    pub perms: Perms,
    /// Whether this request ends its group.
    pub last: bool,
}

/// How a group of page requests ends.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Outcome {
    /// The pages may be there now: try again (`Success`).
    Success,
    /// These pages will not be there: give up (`Invalid Request`).
    Invalid,
    /// The device may send no more page requests at all (`Response Failure`).
    ///
    /// It stops every function that shares the page request interface, so no guest can cause it.
    Failure,
}

/// The answer to one group, on its way to hardware.
///
/// Whoever holds one owes it to the device: it is neither copied nor dropped, but handed to
/// [`Commands::respond`](crate::unit::Commands::respond).
#[derive(Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[must_use = "the device waits until the response is sent"]
pub struct PageResponse {
    /// The device that waits.
    pub stream: StreamId,
    /// Which of its groups.
    pub tag: GroupTag,
    /// How it ends.
    pub outcome: Outcome,
}
