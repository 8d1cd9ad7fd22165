//! Giving devices to guests and taking them away, in an order that leaves no moment in which a device reaches what is not
//! its guest's, and no request without an answer.

use crate::{
    guest::Guest,
    hypervisor::{ATTACHMENTS, DEVICES_PER_GUEST, GUESTS, Hypervisor},
    memory::{self, Share},
};
use arch::unit::{self, DeviceTables};
use broker::{AttachmentId, Policy};
use core::sync::atomic::Ordering::Relaxed;
use heapless::Vec;
use iommu::{
    Attachment, Features, Grant, Invalidation, Iova, Leaving, PAGE_SIZE, Pasid, Perms, StreamId, Tables as _,
};
use pgtable::{Gather, Limits, Tree};

/// Page requests that one device may have outstanding. All devices together stay below what the unit's queue holds.
pub const ALLOCATION: u32 = 15;
/// Groups that one attachment may have outstanding: as many as requests, since a group has one at least.
pub const BUDGET: u8 = ALLOCATION as u8;
const _: () = assert!(
    ALLOCATION as usize * 2 * DEVICES_PER_GUEST * GUESTS <= unit::OUTSTANDING,
    "the devices' requests, with as many stop markers, fit the unit's queue"
);
const _: () = assert!(ATTACHMENTS >= GUESTS * crate::guest::ATTACHMENTS);

/// Why a device could not be given, attached or mapped for.
#[derive(Clone, Copy, Debug, defmt::Format)]
pub enum Error {
    /// The unit or its driver says so.
    Unit(iommu::Error),
    /// The device says so.
    Device(pcie::Error),
    /// The tables say so.
    Tables(pgtable::Error),
    /// Its registers are too large to be shown to a guest, or no whole pages.
    Registers,
    /// It is attached already, or there are too many attachments.
    Attached,
}

/// A device, or a PASID of it, that is translated by tables of its own.
pub struct Space {
    /// Its name in the unit.
    pub attachment: Attachment,
    /// What it reaches.
    pub tree: Tree<DeviceTables>,
}

/// A space whose page requests go to somebody.
pub struct Owned {
    /// Its name in the broker.
    id: AttachmentId,
    /// What it reaches.
    pub space: Space,
}

impl Guest {
    /// Gives the guest a device, of which everything is blocked until it is attached.
    pub fn take_device(&mut self, number: usize) -> Result<(), Error> {
        let device = self.hv.devices.get(number).ok_or(Error::Registers)?;
        let registers = device.registers.end.0 - device.registers.start.0;
        if registers > crate::guest::WINDOW || !registers.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Registers);
        }
        let requests = device.function.has_page_requests() && self.hv.capabilities.page_requests;
        let pasids = requests && self.hv.capabilities.pasid_bits > 0;
        let features = Features { device_tlb: requests, page_requests: requests, pasid: pasids };
        // Whatever fails from here on, the device is the guest's to give back.
        let _ = self.devices.push(number);
        self.stuck_if_late(assign(self.hv, device.function.id, features))?;
        if pasids {
            // Accesses without PASID reach an empty space. It also has to be there: QEMU's unit refuses every PASID of a
            // device whose entry for accesses without one is not present.
            let blank = self.stuck_if_late(Space::new(self.hv, &self.share, device.function.id, None))?;
            let _ = self.blanks.push(blank);
        }
        if requests {
            let config = &self.hv.config;
            let enabled =
                device.function.enable_page_requests(config, ALLOCATION, pasids).map_err(Error::Device)?;
            defmt::debug!("{} of guest {=usize}: {}", device.function.id, self.index, enabled);
        }
        device.function.enable_bus_master(&self.hv.config);
        Ok(())
    }

    /// Attaches a device of the guest; returns the guest's name for the attachment.
    pub fn attach(
        &mut self,
        device: u32,
        pasid: Option<Pasid>,
        opaque: u64,
        deadline_us: u64,
    ) -> Result<u64, Error> {
        let number = (device as usize).checked_sub(1).and_then(|at| self.devices.get(at));
        let device_of = number.and_then(|&number| self.hv.devices.get(number)).ok_or(Error::Attached)?;
        let place = self.attachments.iter().position(Option::is_none).ok_or(Error::Attached)?;
        let stream = device_of.function.id;
        let queue = self.index as u8;
        let policy = Policy { stream, pasid, queue, budget: BUDGET, device, opaque, deadline_us };
        let attached = attach(self.hv, &self.share, &policy);
        self.attachments[place] = Some(self.stuck_if_late(attached)?);
        Ok(place as u64 + 1)
    }

    /// Detaches; on an error the attachment stays blocked, and its tables are never used again.
    pub fn detach(&mut self, name: u64) -> Option<Result<(), Error>> {
        let at = usize::try_from(name.checked_sub(1)?).ok()?;
        let owned = self.attachments.get_mut(at)?.take()?;
        let detached = detach(self.hv, &self.share, self.index, owned);
        Some(self.stuck_if_late(detached))
    }

    /// Notes that hardware may still know what it was to forget: then the guest's memory is never used again.
    fn stuck_if_late<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        self.stuck |=
            matches!(result, Err(Error::Unit(iommu::Error::Timeout { .. } | iommu::Error::QueueFull { .. })));
        result
    }

    /// Returns what the guest attached under `name`.
    pub fn owned(&self, name: u64) -> Option<&Owned> {
        self.attachments.get(usize::try_from(name.checked_sub(1)?).ok()?)?.as_ref()
    }

    /// Maps `grant` for an attachment.
    pub fn map(&self, owned: &Owned, iova: Iova, grant: &Grant, perms: Perms) -> Result<(), Error> {
        map(self.hv, &self.share, owned, iova, grant, perms)
    }

    /// Unmaps, and returns when nothing reaches the memory any more.
    pub fn unmap(&self, owned: &Owned, iova: Iova, bytes: u64) -> Result<(), Error> {
        unmap(self.hv, &self.share, owned, iova, bytes)?;
        self.home().unmapped.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Takes all devices back, with requests outstanding or not; `false` if one did not let go of memory.
    pub fn release_devices(&mut self) -> bool {
        let mut released = !self.stuck;
        for number in core::mem::take(&mut self.devices) {
            let Some(device) = self.hv.devices.get(number) else { continue };
            let stream = device.function.id;
            // No new requests are admitted, and then the hardware lets none through.
            for owned in
                self.attachments.iter().flatten().filter(|owned| owned.space.attachment.stream == stream)
            {
                self.hv.attachments.leave(owned.id);
            }
            // A device that issues nothing cannot flood the unit with faults while it is taken away.
            device.function.disable_bus_master(&self.hv.config);
            let blocked = block(self.hv, stream);
            let is_its = |space: &Space| space.attachment.stream == stream;
            let of_it =
                self.attachments.iter_mut().filter_map(|place| place.take_if(|owned| is_its(&owned.space)));
            let mut detached: Result<(), Error> = Ok(());
            for owned in of_it {
                detached = detached.and(detach(self.hv, &self.share, self.index, owned));
            }
            while let Some(at) = self.blanks.iter().position(is_its) {
                detached = detached.and(self.blanks.swap_remove(at).end(self.hv, &self.share));
            }
            if let Err(error) = detached {
                defmt::error!("{} could not be detached: {}", stream, error);
                released = false;
            }
            // Every group of the device was answered; now it may be told that there is nobody to ask.
            device.function.disable_page_requests(&self.hv.config);
            match blocked {
                Ok(leaving) if released => self.hv.tables.with(|tables| tables.finish(leaving)),
                Ok(_) => {}
                Err(error) => {
                    defmt::error!("{} could not be blocked: {}", stream, error);
                    released = false;
                }
            }
        }
        released
    }
}

/// Gives `stream` tables of its own, in which everything is blocked.
pub fn assign(hv: &Hypervisor, stream: StreamId, features: Features) -> Result<(), Error> {
    let invalidations = hv.tables.with(|tables| tables.assign(stream, features)).map_err(Error::Unit)?;
    hv.invalidate(&invalidations).map_err(Error::Unit)
}

impl Space {
    /// Lets accesses of `stream` that carry `pasid` (or none) through empty tables of their own.
    fn new(hv: &Hypervisor, share: &Share, stream: StreamId, pasid: Option<Pasid>) -> Result<Self, Error> {
        // Pages alone: a guest may take back any page of what it lent.
        let tree = share.with(hv.pool, |frames| Tree::new(frames, Limits::PAGES)).map_err(Error::Tables)?;
        let translation = unit::translation(memory::root(&tree));
        match hv.tables.with(|tables| tables.attach(stream, pasid, translation)) {
            Ok((attachment, invalidations)) => {
                // On an error the unit may know of the tables, so their frames are not used again.
                hv.invalidate(&invalidations).map_err(Error::Unit)?;
                Ok(Self { attachment, tree })
            }
            Err(error) => {
                share.with(hv.pool, |frames| tree.take_down(frames));
                Err(Error::Unit(error))
            }
        }
    }

    /// Blocks the space in hardware; returns when the unit and the device have forgotten it, and every page request sent
    /// before has reached its queue.
    fn block(&self, hv: &Hypervisor) -> Result<Leaving, Error> {
        let (leaving, invalidations) =
            hv.tables.with(|tables| tables.detach(self.attachment)).map_err(Error::Unit)?;
        let mut commands: Vec<Invalidation, 8> = invalidations.iter().copied().collect();
        if self.attachment.device_tlb && hv.capabilities.page_requests {
            // There is room: a detachment asks for fewer.
            let _ = commands.push(Invalidation::PageRequestDrain);
        }
        hv.invalidate(&commands).map_err(Error::Unit)?;
        Ok(leaving)
    }

    /// Gives the tables of a space that was blocked back.
    fn free(self, hv: &Hypervisor, share: &Share, leaving: Leaving) {
        hv.tables.with(|tables| tables.finish(leaving));
        share.with(hv.pool, |frames| self.tree.take_down(frames));
    }

    /// Ends a space whose page requests went to nobody.
    fn end(self, hv: &Hypervisor, share: &Share) -> Result<(), Error> {
        let leaving = self.block(hv)?;
        self.free(hv, share, leaving);
        Ok(())
    }
}

/// Attaches a device, or a PASID of it, to empty tables of its own.
pub fn attach(hv: &Hypervisor, share: &Share, policy: &Policy) -> Result<Owned, Error> {
    // The broker first: a request that comes as soon as the unit lets it must find its owner.
    let id = hv.attachments.add(*policy).ok_or(Error::Attached)?;
    let space = Space::new(hv, share, policy.stream, policy.pasid).inspect_err(|_| {
        hv.attachments.leave(id);
        hv.attachments.remove(id);
    })?;
    Ok(Owned { id, space })
}

/// Maps `grant` at `iova`.
pub fn map(
    hv: &Hypervisor,
    share: &Share,
    owned: &Owned,
    iova: Iova,
    grant: &Grant,
    perms: Perms,
) -> Result<(), Error> {
    share
        .with(hv.pool, |frames| owned.space.tree.map(frames, iova.0, grant, perms))
        .map_err(Error::Tables)?;
    if hv.capabilities.caches_absence {
        let invalidation = Invalidation::covering(owned.space.attachment, iova, grant.bytes());
        hv.invalidate(&[invalidation]).map_err(Error::Unit)?;
    }
    Ok(())
}

/// Unmaps `bytes` from `iova`, and returns when nothing reaches the memory any more. On an error of the unit the device may
/// still reach it, until it is detached.
pub fn unmap(hv: &Hypervisor, share: &Share, owned: &Owned, iova: Iova, bytes: u64) -> Result<(), Error> {
    let mut gather = Gather::new();
    share
        .with(hv.pool, |frames| owned.space.tree.unmap(frames, iova.0, bytes, &mut gather))
        .map_err(Error::Tables)?;
    let Attachment { stream, pasid, domain, .. } = owned.space.attachment;
    // `Pages` leaves what the unit remembers of the tables above.
    let invalidation = match gather.tables_went() {
        true => Invalidation::Attachment(owned.space.attachment),
        false => Invalidation::covering(owned.space.attachment, iova, bytes),
    };
    // On an error the tables that went are never used again.
    hv.invalidate(&[invalidation]).map_err(Error::Unit)?;
    share.with(hv.pool, |frames| gather.give_back(frames));
    defmt::debug!(
        "unmap stream={=u32:#x} pasid={=u32:#x} domain={=u16:#x} iova={=u64:#x} pages={=u64}",
        stream.0,
        pasid.map_or(0, Pasid::value),
        domain.0,
        iova.0,
        bytes / PAGE_SIZE
    );
    Ok(())
}

/// Blocks all of a device, and returns when the unit knows.
pub fn block(hv: &Hypervisor, stream: StreamId) -> Result<Leaving, Error> {
    let (leaving, invalidations) = hv.tables.with(|tables| tables.block(stream)).map_err(Error::Unit)?;
    hv.invalidate(&invalidations).map_err(Error::Unit)?;
    Ok(leaving)
}

/// Detaches: mark as leaving; block in hardware, invalidate, wait; let the service core pass; answer what is outstanding;
/// wait until the answers are out; and only then let go of the tables.
pub fn detach(hv: &Hypervisor, share: &Share, queue: usize, owned: Owned) -> Result<(), Error> {
    let Owned { id, space } = owned;
    let Attachment { stream, pasid, .. } = space.attachment;
    hv.attachments.leave(id);
    let leaving = space.block(hv)?;
    // The drain is also the grace period: no handler that saw the attachment alive is still at work.
    hv.drain().map_err(Error::Unit)?;
    while let Some(answer) = hv.queues[queue].evict(stream, pasid) {
        hv.answer(answer);
    }
    hv.invalidate(&[]).map_err(Error::Unit)?;
    hv.attachments.remove(id);
    space.free(hv, share, leaving);
    Ok(())
}
