//! Which device's page requests go where.

use crate::{
    DeviceId, QueueId,
    directory::{Directory, Id},
};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use iommu::{Pasid, StreamId};

/// Which requests of a device an attachment is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub enum Requests {
    /// Those without a PASID.
    Plain,
    /// Those with this PASID.
    Of(Pasid),
    /// All that no other attachment of the device is about: its owner also owns the table of its PASIDs.
    Any,
}

impl From<Option<Pasid>> for Requests {
    fn from(pasid: Option<Pasid>) -> Self {
        pasid.map_or(Self::Plain, Self::Of)
    }
}

/// What is decided about an attachment when it is made.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Policy {
    /// The device, as hardware names it.
    pub stream: StreamId,
    /// Which of its requests.
    pub requests: Requests,
    /// The device's budgets and counts.
    pub device: DeviceId,
    /// The queue that its groups go to.
    pub queue: QueueId,
    /// The owner's own name for the device.
    pub name: u32,
    /// A value that comes back with each of its requests, and is never interpreted.
    pub opaque: u64,
}

/// Names an attachment until it is removed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct AttachmentId(pub(crate) Id);

/// Where the requests of an attachment go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    device_word: u64,
    /// The place of the device in 31:0, the owner's name for it in 63:32.
    pub device_name: u64,
    pub queue: QueueId,
    pub opaque: u64,
}

impl Target {
    pub fn device(&self) -> DeviceId {
        DeviceId(Id { place: self.device_name as u32, word: self.device_word })
    }

    pub fn name(&self) -> u32 {
        (self.device_name >> 32) as u32
    }
}

/// What an attachment is to: by full names, so that it never is to what took their place.
#[derive(Debug)]
struct Entry {
    device_word: AtomicU64,
    /// The place of the device in 31:0, its name in 63:32.
    device_name: AtomicU64,
    /// The number of the queue in 31:0, how often it was opened in 63:32.
    queue: AtomicU64,
    opaque: AtomicU64,
}

/// The attachments of a unit, in `A` places.
#[derive(Debug)]
pub(crate) struct Attachments<const A: usize> {
    directory: Directory<A>,
    entries: [Entry; A],
}

/// In place of a PASID's word: all of them.
const ANY: u32 = u32::MAX;

/// Packs device and PASID word into one word that is compared at once.
pub(crate) fn who(stream: StreamId, pasid: u32) -> u64 {
    u64::from(stream.0) << 32 | u64::from(pasid)
}

impl<const A: usize> Attachments<A> {
    pub const fn new() -> Self {
        Self {
            directory: Directory::new(),
            entries: [const {
                Entry {
                    device_word: AtomicU64::new(0),
                    device_name: AtomicU64::new(0),
                    queue: AtomicU64::new(0),
                    opaque: AtomicU64::new(0),
                }
            }; A],
        }
    }

    pub fn add(&self, policy: &Policy) -> Option<AttachmentId> {
        let pasid = match policy.requests {
            Requests::Plain => Pasid::word(None),
            Requests::Of(pasid) => Pasid::word(Some(pasid)),
            Requests::Any => ANY,
        };
        let fill = |place: usize| {
            let entry = &self.entries[place];
            let Id { place, word } = policy.device.0;
            entry.device_word.store(word, Relaxed);
            entry.device_name.store(u64::from(place) | u64::from(policy.name) << 32, Relaxed);
            let QueueId { index, opened } = policy.queue;
            entry.queue.store(u64::from(index) | u64::from(opened) << 32, Relaxed);
            entry.opaque.store(policy.opaque, Relaxed);
        };
        self.directory.add(who(policy.stream, pasid), fill).map(AttachmentId)
    }

    pub fn leave(&self, id: AttachmentId) {
        self.directory.leave(id.0);
    }

    pub fn remove(&self, id: AttachmentId) {
        self.directory.remove(id.0);
    }

    pub fn is_live(&self, id: AttachmentId) -> bool {
        self.directory.is_live(id.0)
    }

    /// Returns the live attachment that requests with this PASID, or with none, belong to.
    #[inline(always)]
    pub fn find_id(&self, stream: StreamId, pasid: Option<Pasid>) -> Option<AttachmentId> {
        let any = || self.directory.at(self.find_any(stream)?, who(stream, ANY));
        self.directory.find(who(stream, Pasid::word(pasid))).or_else(any).map(AttachmentId)
    }

    /// The place of the attachment that is about all requests of a device; out of line, so that the other way stays short.
    #[inline(never)]
    fn find_any(&self, stream: StreamId) -> Option<usize> {
        self.directory.find(who(stream, ANY)).map(|id| id.place as usize)
    }

    /// Returns where they go; if their attachment leaves meanwhile, where all others of the device go.
    pub fn find(&self, stream: StreamId, pasid: Option<Pasid>) -> Option<Target> {
        let live = |who| self.target(AttachmentId(self.directory.find(who)?));
        live(who(stream, Pasid::word(pasid))).or_else(|| live(who(stream, ANY)))
    }

    /// Returns where the requests of an attachment went that is leaving.
    pub fn find_leaving(&self, stream: StreamId, pasid: Option<Pasid>) -> Option<Target> {
        let leaving = |who| self.target(AttachmentId(self.directory.find_leaving(who)?));
        leaving(who(stream, Pasid::word(pasid))).or_else(|| leaving(who(stream, ANY)))
    }

    /// Reads where the requests of an attachment go; `None` if it changed meanwhile.
    #[inline(always)]
    pub fn target(&self, AttachmentId(id): AttachmentId) -> Option<Target> {
        let entry = self.entries.get(id.place as usize)?;
        let queue = entry.queue.load(Relaxed);
        let target = Target {
            device_word: entry.device_word.load(Relaxed),
            device_name: entry.device_name.load(Relaxed),
            queue: QueueId { index: queue as u32, opened: (queue >> 32) as u32 },
            opaque: entry.opaque.load(Relaxed),
        };
        self.directory.is_still(id).then_some(target)
    }
}
