//! One record of a ring: 64 bytes, eight little-endian words, every bit of them written.
//!
//! | word | bits | content |
//! |---|---|---|
//! | 0 | 63:0 | cookie of a request; number of an event, counted from 1 |
//! | 1 | 63:12 | page address; the low bits are zero |
//! | 2 | 63:0 | the opaque value of the attachment |
//! | 3 | 31:0 | the guest's own name for the device |
//! | 3 | 63:32 | PASID; all ones if the access had none |
//! | 4 | 7:0 | 1 request, 2 event |
//! | 4 | 15:8 | access: 1 read, 2 write, 3 both, 4 fetch, 0 none of these |
//! | 4 | 16 | privileged |
//! | 4 | 47:32 | group index of a request |
//! | 4 | 63:48 | reason of an event |
//! | 5 | 31:0 | pages of the group; 0 for an event |
//! | 5 | 63:32 | which of them this is, from 0 |
//! | 6 | 63:0 | events lost so far, at least; 0 for a request |
//! | 7 | 63:0 | zero |

use iommu::{FaultReason, Field, Iova, Pasid, Perms, Words, descriptor};

/// Words of a record.
pub const RECORD_WORDS: usize = 8;

descriptor! {
    /// A record, as it lies in a ring.
    pub struct Record([u64; 8]);
}

numbered! {
    /// What a record holds.
    pub enum Kind {
        /// A page of a page request, which waits for an answer.
        Request = 1,
        /// An unrecoverable fault.
        Event = 2,
    }
}

numbered! {
    /// What a device wanted, as an enumeration.
    pub enum Wanted {
        /// Neither of the others.
        Nothing = 0,
        /// To read.
        Read = 1,
        /// To write.
        Write = 2,
        /// To read and write.
        ReadWrite = 3,
        /// To fetch instructions, and to read.
        Fetch = 4,
    }
}

impl From<Perms> for Wanted {
    fn from(perms: Perms) -> Self {
        match (perms.execute, perms.write, perms.read) {
            (false, false, false) => Self::Nothing,
            (false, false, true) => Self::Read,
            (false, true, false) => Self::Write,
            (false, true, true) => Self::ReadWrite,
            (true, _, _) => Self::Fetch,
        }
    }
}

/// A page request, as a guest sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Request {
    /// What to answer with.
    pub cookie: u64,
    /// The guest's own name for the device.
    pub device: u32,
    /// The PASID.
    pub pasid: Option<Pasid>,
    /// The opaque value of the attachment.
    pub opaque: u64,
    /// The device's number for the group.
    pub group: u16,
    /// The page.
    pub iova: Iova,
    /// What the device wants to do there.
    pub perms: Perms,
    /// Pages of the group, and which of them this is.
    pub pages: u32,
    /// Counted from 0.
    pub index: u32,
}

/// An unrecoverable fault, as a guest sees it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Event {
    /// Counted from 1 for each channel; a gap means lost events, at least as many.
    pub number: u64,
    /// Events lost so far, at least.
    pub lost: u64,
    /// The guest's own name for the device.
    pub device: u32,
    /// The PASID.
    pub pasid: Option<Pasid>,
    /// The opaque value of the attachment.
    pub opaque: u64,
    /// The page.
    pub iova: Iova,
    /// What was tried.
    pub perms: Perms,
    /// Why it was refused.
    pub reason: Reason,
}

numbered! {
    /// Why an access was refused, as a guest is told.
    pub enum Reason {
        /// Something else.
        Other = 0,
        /// The device, or this PASID of it, is attached to nothing.
        NotAttached = 1,
        /// No mapping at this address.
        NotMapped = 2,
        /// A mapping that does not permit this access.
        NotPermitted = 3,
        /// An address outside what can be mapped.
        AddressSize = 4,
        /// Of the device as a whole, and told once: it has more of these than it may. If it goes on, it is blocked.
        TooMany = 5,
        /// Of the device as a whole, and told once: it had too many of these, so that it is blocked and no more are told. It may be
        /// used again once it was given back and reset.
        Blocked = 6,
    }
}

impl From<FaultReason> for Reason {
    fn from(reason: FaultReason) -> Self {
        match reason {
            FaultReason::NotAttached => Self::NotAttached,
            FaultReason::NotMapped => Self::NotMapped,
            FaultReason::NotPermitted => Self::NotPermitted,
            FaultReason::AddressSize => Self::AddressSize,
            _ => Self::Other,
        }
    }
}

/// In the PASID of a record: the access had none.
pub const NO_PASID: u64 = 0xFFFF_FFFF;

impl Record {
    const NUMBER: Field<Self> = Field::bits(63, 0);
    const ADDRESS: Field<Self> = Field::bits(127, 76);
    const OPAQUE: Field<Self> = Field::bits(191, 128);
    const DEVICE: Field<Self> = Field::bits(223, 192);
    const PASID: Field<Self> = Field::bits(255, 224);
    const KIND: Field<Self> = Field::bits(263, 256);
    const WANTED: Field<Self> = Field::bits(271, 264);
    const PRIVILEGED: Field<Self> = Field::bit(272);
    const GROUP: Field<Self> = Field::bits(303, 288);
    const REASON: Field<Self> = Field::bits(319, 304);
    const PAGES: Field<Self> = Field::bits(351, 320);
    const INDEX: Field<Self> = Field::bits(383, 352);
    const LOST: Field<Self> = Field::bits(447, 384);

    /// The fields in the order of their bits, with their names in C and what they hold.
    pub(crate) const FIELDS: [(&str, Field<Self>, &str); 13] = [
        ("number", Self::NUMBER, "cookie of a request; number of an event, counted from 1"),
        ("address", Self::ADDRESS, "of the page; the low 12 bits are zero"),
        ("opaque", Self::OPAQUE, "of the attachment"),
        ("device", Self::DEVICE, "the guest's own name for it"),
        ("pasid", Self::PASID, "NO_PASID if the access had none"),
        ("kind", Self::KIND, "enum portcullis_kind"),
        ("access", Self::WANTED, "enum portcullis_access"),
        ("privileged", Self::PRIVILEGED, "1 if it was"),
        ("group", Self::GROUP, "index of a request's group"),
        ("reason", Self::REASON, "of an event: enum portcullis_reason"),
        ("pages", Self::PAGES, "of a request's group"),
        ("index", Self::INDEX, "which of them this is, from 0"),
        ("lost", Self::LOST, "events lost before this one, at least"),
    ];

    /// What word 4 says of each set of permissions; they are its bits in the order read, write, execute, privileged. Looked up,
    /// since to work it out takes ten steps.
    const ACCESS: [u32; 16] = {
        let mut access = [0; 16];
        let mut set = 0;
        while set < 16 {
            let wanted = if set & 4 != 0 { Wanted::Fetch as u32 } else { set & 3 };
            let privileged = set >> 3;
            access[set as usize] =
                wanted << (Self::WANTED.lowest() % 64) | privileged << (Self::PRIVILEGED.lowest() % 64);
            set += 1;
        }
        access
    };

    fn common(number: u64, device: u32, pasid: Option<Pasid>, opaque: u64, iova: Iova, perms: Perms) -> Self {
        let Perms { read, write, execute, privileged } = perms;
        let bits = [read, write, execute, privileged].map(usize::from);
        let set = bits[0] | bits[1] << 1 | bits[2] << 2 | bits[3] << 3;
        Self([0, 0, 0, 0, Self::ACCESS[set % 16].into(), 0, 0, 0])
            .with(Self::NUMBER, number)
            .with_address(Self::ADDRESS, iova.0)
            .with(Self::OPAQUE, opaque)
            .with(Self::DEVICE, device.into())
            .with(Self::PASID, pasid.map_or(NO_PASID, |pasid| pasid.value().into()))
    }

    /// The record of one page of a request.
    pub fn request(request: &Request) -> Self {
        let Request { cookie, device, pasid, opaque, iova, perms, .. } = *request;
        Self::common(cookie, device, pasid, opaque, iova, perms)
            .with(Self::KIND, Kind::Request as u64)
            .with(Self::GROUP, request.group.into())
            .with(Self::PAGES, request.pages.into())
            .with(Self::INDEX, request.index.into())
    }

    /// The record of an event.
    pub fn event(event: &Event) -> Self {
        let Event { number, device, pasid, opaque, iova, perms, .. } = *event;
        Self::common(number, device, pasid, opaque, iova, perms)
            .with(Self::KIND, Kind::Event as u64)
            .with(Self::REASON, event.reason as u64)
            .with(Self::LOST, event.lost)
    }

    fn holds(&self, kind: Kind) -> bool {
        self.get(Self::KIND) == kind as u64
    }

    fn pasid(&self) -> Option<Pasid> {
        Pasid::new(self.get(Self::PASID) as u32)
    }

    fn perms(&self) -> Perms {
        let wanted = Wanted::from_number(self.get(Self::WANTED));
        Perms {
            read: matches!(wanted, Some(Wanted::Read | Wanted::ReadWrite | Wanted::Fetch)),
            write: matches!(wanted, Some(Wanted::Write | Wanted::ReadWrite)),
            execute: wanted == Some(Wanted::Fetch),
            privileged: self.is_set(Self::PRIVILEGED),
        }
    }

    /// Returns the request that this record holds, if it holds one.
    pub fn as_request(&self) -> Option<Request> {
        self.holds(Kind::Request).then(|| Request {
            cookie: self.get(Self::NUMBER),
            device: self.get(Self::DEVICE) as u32,
            pasid: self.pasid(),
            opaque: self.get(Self::OPAQUE),
            group: self.get(Self::GROUP) as u16,
            iova: Iova(self.address(Self::ADDRESS)),
            perms: self.perms(),
            pages: self.get(Self::PAGES) as u32,
            index: self.get(Self::INDEX) as u32,
        })
    }

    /// Returns the event that this record holds, if it holds one.
    pub fn as_event(&self) -> Option<Event> {
        let reason = Reason::from_number(self.get(Self::REASON)).unwrap_or(Reason::Other);
        self.holds(Kind::Event).then(|| Event {
            number: self.get(Self::NUMBER),
            lost: self.get(Self::LOST),
            device: self.get(Self::DEVICE) as u32,
            pasid: self.pasid(),
            opaque: self.get(Self::OPAQUE),
            iova: Iova(self.address(Self::ADDRESS)),
            perms: self.perms(),
            reason,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_lies_in_its_record_as_documented() {
        let request = Request {
            cookie: 0x0102_0304_0506_0708,
            device: 2,
            pasid: Pasid::new(0x1_2345),
            opaque: 0xFEED_F00D,
            group: 0x1FF,
            iova: Iova(0x7F00_0000_1000),
            perms: Perms { privileged: true, ..Perms::READ_WRITE },
            pages: 4,
            index: 3,
        };

        let record = Record::request(&request);

        assert_eq!(
            record.0,
            [
                0x0102_0304_0506_0708,
                0x7F00_0000_1000,
                0xFEED_F00D,
                0x0001_2345_0000_0002,
                0x0000_01FF_0001_0301,
                0x0000_0003_0000_0004,
                0,
                0
            ]
        );
        assert_eq!(record.as_request(), Some(request));
        assert_eq!(record.as_event(), None);
    }

    #[test]
    fn an_event_lies_in_its_record_as_documented() {
        let event = Event {
            number: 9,
            lost: 2,
            device: 1,
            pasid: None,
            opaque: 7,
            iova: Iova(0x4000_0000),
            perms: Perms { write: true, ..Perms::default() },
            reason: Reason::NotMapped,
        };

        let record = Record::event(&event);

        assert_eq!(record.0, [9, 0x4000_0000, 7, 0xFFFF_FFFF_0000_0001, 0x0002_0000_0000_0202, 0, 2, 0]);
        assert_eq!(record.as_event(), Some(event));
        assert_eq!(record.as_request(), None);
    }

    #[test]
    fn every_field_takes_all_its_bits_and_no_others() {
        let all = Perms { read: true, write: true, execute: true, privileged: true };
        let request = Request {
            cookie: u64::MAX,
            device: u32::MAX,
            pasid: Pasid::new(Pasid::MAX),
            opaque: u64::MAX,
            group: u16::MAX,
            iova: Iova(u64::MAX),
            perms: all,
            pages: u32::MAX,
            index: u32::MAX,
        };

        assert_eq!(
            Record::request(&request).0,
            [
                u64::MAX,
                0xFFFF_FFFF_FFFF_F000,
                u64::MAX,
                0x000F_FFFF_FFFF_FFFF,
                0x0000_FFFF_0001_0401,
                u64::MAX,
                0,
                0
            ]
        );
        let read = Record([u64::MAX, u64::MAX, u64::MAX, u64::MAX, 0xFFFF_FFFF_FFFF_0401, u64::MAX, 0, 0]);
        let fetch = Perms { write: false, ..all };
        let expected = Request { iova: Iova(0xFFFF_FFFF_FFFF_F000), pasid: None, perms: fetch, ..request };
        assert_eq!(read.as_request(), Some(expected));
        let nothing = Record([0, 0, 0, 0, 1, 0, 0, 0]).as_request();
        assert_eq!(nothing.map(|r| (r.pasid, r.perms, r.group)), Some((Pasid::new(0), Perms::default(), 0)));
    }
}
