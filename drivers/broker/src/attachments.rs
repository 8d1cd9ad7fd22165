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
    pub device: u32,
    pub queue: u32,
    pub name: u32,
    pub opaque: u64,
}

#[derive(Debug)]
struct Entry {
    device_queue: AtomicU64,
    name: AtomicU64,
    opaque: AtomicU64,
}

/// The attachments of a unit, in `A` places.
#[derive(Debug)]
pub(crate) struct Attachments<const A: usize> {
    directory: Directory<A>,
    entries: [Entry; A],
}

/// In place of a PASID, which has 20 bits.
const PLAIN: u32 = u32::MAX;
const ANY: u32 = u32::MAX - 1;

/// Packs device and PASID into one word that is compared at once.
fn key(stream: StreamId, pasid: u32) -> u64 {
    u64::from(stream.0) << 32 | u64::from(pasid)
}

impl<const A: usize> Attachments<A> {
    pub const fn new() -> Self {
        Self {
            directory: Directory::new(),
            entries: [const {
                Entry { device_queue: AtomicU64::new(0), name: AtomicU64::new(0), opaque: AtomicU64::new(0) }
            }; A],
        }
    }

    pub fn add(&self, policy: &Policy) -> Option<AttachmentId> {
        let pasid = match policy.requests {
            Requests::Plain => PLAIN,
            Requests::Of(pasid) => pasid.value(),
            Requests::Any => ANY,
        };
        let fill = |place: usize| {
            let entry = &self.entries[place];
            let device_queue = u64::from(policy.device.0.place) | u64::from(policy.queue.index) << 32;
            entry.device_queue.store(device_queue, Relaxed);
            entry.name.store(policy.name.into(), Relaxed);
            entry.opaque.store(policy.opaque, Relaxed);
        };
        self.directory.add(key(policy.stream, pasid), fill).map(AttachmentId)
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
    pub fn find(&self, stream: StreamId, pasid: Option<Pasid>) -> Option<(AttachmentId, Target)> {
        let read = |place: usize| {
            let entry = &self.entries[place];
            let device_queue = entry.device_queue.load(Relaxed);
            Target {
                device: device_queue as u32,
                queue: (device_queue >> 32) as u32,
                name: entry.name.load(Relaxed) as u32,
                opaque: entry.opaque.load(Relaxed),
            }
        };
        let exact = key(stream, pasid.map_or(PLAIN, Pasid::value));
        let found = self.directory.find(exact, read);
        let (id, target) = found.or_else(|| self.directory.find(key(stream, ANY), read))?;
        Some((AttachmentId(id), target))
    }
}
