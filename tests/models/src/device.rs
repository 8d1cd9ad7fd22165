//! What devices do whichever unit they are behind: PCI Express says it, and no unit's manual.

use crate::memory::{Memory, OutsideMemory};
use iommu::{GroupTag, Iova, Outcome, PAGE_SIZE, PageRequest, Pasid, Perms, PhysAddr, StreamId};
use std::ops::Range;

/// A translation that a device keeps for itself.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DeviceTlbEntry {
    /// The device.
    pub stream: StreamId,
    /// The PASID that it holds for.
    pub pasid: Option<Pasid>,
    /// The first address that it holds for.
    pub iova: Iova,
    /// What that is translated to.
    pub phys: PhysAddr,
    /// How many bytes it holds for; a power of two, to which both addresses are aligned.
    pub bytes: u64,
    /// Reads are permitted.
    pub read: bool,
    /// Writes are permitted.
    pub write: bool,
}

impl DeviceTlbEntry {
    /// Whether it lets a write pass, or a read.
    pub(crate) fn permits(&self, write: bool) -> bool {
        if write { self.write } else { self.read }
    }

    /// Whether it tells where `iova` is for accesses with `pasid`.
    pub(crate) fn holds(&self, pasid: Option<Pasid>, iova: Iova) -> bool {
        self.pasid == pasid && iova.0 >= self.iova.0 && iova.0 - self.iova.0 < self.bytes
    }

    /// Returns where `iova` is, which it holds for.
    pub(crate) fn translated(&self, iova: Iova) -> PhysAddr {
        PhysAddr(self.phys.0 + (iova.0 - self.iova.0))
    }
}

/// When a unit executes what is in its queue.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Pace {
    /// As soon as it is told of it.
    AtOnce,
    /// One entry each time that the driver has looked this often: at a register, at what the unit wrote to memory, at the
    /// clock. A test that asks what was executed or answered in the end looks for long; one that pauses or resumes the
    /// unit sets the pace itself from then on.
    OneIn(u32),
}

/// A response to a group of page requests, as the device gets it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Answer {
    /// The device.
    pub stream: StreamId,
    /// Its group.
    pub tag: GroupTag,
    /// The response code.
    pub outcome: Outcome,
}

/// A stop marker ends the requests of a PASID, asks for nothing and is never answered.
pub(crate) fn is_stop_marker(request: &PageRequest) -> bool {
    let Perms { read, write, .. } = request.perms;
    request.last && !read && !write && request.tag.pasid.is_some()
}

/// The stop marker for `pasid`.
pub(crate) fn stop_marker(stream: StreamId, pasid: Pasid) -> PageRequest {
    let tag = GroupTag { pasid: Some(pasid), index: 0 };
    PageRequest { stream, tag, iova: Iova(0), perms: Perms::default(), last: true }
}

/// Loads `bytes` bytes from `iova`; `place` finds each page's physical address.
pub(crate) fn load<E: From<OutsideMemory>>(
    memory: &Memory,
    iova: Iova,
    bytes: usize,
    mut place: impl FnMut(Iova) -> Result<PhysAddr, E>,
) -> Result<Vec<u8>, E> {
    let mut loaded = Vec::with_capacity(bytes);
    for part in pages(iova, bytes) {
        let phys = place(Iova(iova.0.wrapping_add(part.start as u64)))?;
        for at in 0..part.len() as u64 {
            loaded.push(memory.device_load_byte(PhysAddr(phys.0 + at))?);
        }
    }
    Ok(loaded)
}

/// Stores `bytes` from `iova`; `place` finds each page's physical address.
pub(crate) fn store<E: From<OutsideMemory>>(
    memory: &Memory,
    iova: Iova,
    bytes: &[u8],
    mut place: impl FnMut(Iova) -> Result<PhysAddr, E>,
) -> Result<(), E> {
    for part in pages(iova, bytes.len()) {
        let phys = place(Iova(iova.0.wrapping_add(part.start as u64)))?;
        for (at, &byte) in (0..).zip(&bytes[part]) {
            memory.device_store_byte(PhysAddr(phys.0 + at), byte)?;
        }
    }
    Ok(())
}

/// Cuts `bytes` bytes at `iova` where pages end; the parts are offsets from `iova`.
fn pages(iova: Iova, bytes: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0usize;
    std::iter::from_fn(move || {
        let left = PAGE_SIZE - iova.0.wrapping_add(start as u64) % PAGE_SIZE;
        let end = bytes.min(start.saturating_add(left as usize));
        let part = start..end;
        start = end;
        (!part.is_empty()).then_some(part)
    })
}
