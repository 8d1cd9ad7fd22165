//! Giving devices to guests and taking them away, in an order that leaves no moment in which a device reaches what is not
//! its guest's, and no request without an answer.

use crate::{
    guest::Guest,
    hypervisor::{Condition, DEVICES_PER_GUEST, Device, GUESTS, Hypervisor, SERVICE_CORE, caretaker_of},
    memory::{self, Share},
    service,
    tables::{DeviceTables, Unmapped},
    wanted,
};
use arch::{cpu, interrupts, unit};
use broker::{AttachmentId, DeviceId, Limits, Policy, QueueId, Restraint, Whose};
use core::{ops::Range, sync::atomic::Ordering::Relaxed};
use heapless::Vec;
use iommu::{
    Attachment, Completion, Features, FirstStage, Gpa, Grant, Invalidation, Iova, Leaving, PAGE_SIZE, Pasid,
    Perms, PhysAddr, Stages, StreamId, Tables as _, Translation,
};

/// Page requests that one device may have outstanding. All devices together stay below what the unit's queue holds.
///
/// What is measured has one device that sends page requests, and no stop markers.
pub const ALLOCATION: u32 = if cfg!(feature = "measure") { 64 } else { 15 };
const _: () = assert!(
    cfg!(feature = "measure") || ALLOCATION as usize * 2 * DEVICES_PER_GUEST * GUESTS <= unit::OUTSTANDING,
    "the devices' requests, with as many stop markers, fit the unit's queue"
);
const _: () = assert!(
    ALLOCATION as usize * DEVICES_PER_GUEST < crate::hypervisor::SLOTS,
    "a guest's queue holds the groups of its devices, and some that are just being answered"
);

/// How long another core may take to silence a device, in microseconds: it waits for the unit three times.
const SILENCING_LIMIT_US: u64 = 3 * crate::hypervisor::BACKSTOP_US;

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
    /// The broker says so.
    Broker(broker::Error),
    /// Firmware goes on using memory through the device.
    Firmwares {
        /// Which.
        stream: StreamId,
    },
    /// What the last owner left in the device may still act: it was not reset since.
    NotReset {
        /// Which.
        stream: StreamId,
    },
    /// The guest owns the first stage: nothing is mapped there by call.
    Bound,
    /// The page to which devices write their messages stays as it is.
    Doorbell,
    /// The device is not one that may reach all of memory: the command line does not say `trusted=` of it.
    NotTrusted {
        /// Which.
        stream: StreamId,
    },
}

/// A device that a guest owns.
pub struct Given {
    /// Its place in [`Hypervisor::devices`].
    pub number: usize,
    /// Its name in the broker.
    pub id: DeviceId,
    /// What it was held to so far.
    restraint: Restraint,
    /// What its tables left behind when it was blocked for good.
    blocked: Option<Leaving>,
}

/// A device, or a PASID of it, that is translated by tables of its own.
pub struct Space {
    /// Its name in the unit.
    pub attachment: Attachment,
    /// What it reaches.
    pub tree: DeviceTables,
}

/// A space whose page requests go to somebody.
pub struct Owned {
    /// Its name in the broker.
    id: AttachmentId,
    /// The name of its device there.
    device: DeviceId,
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
        let stream = device.function.id;
        if self.hv.boot.firmware_uses(&self.hv.config, stream) {
            return Err(Error::Firmwares { stream });
        }
        take_in_hand(self.hv, number)?;
        let taken = self.take(number, device);
        if taken.is_err() && self.devices.iter().all(|given| given.number != number) {
            self.hv.let_go(number, None);
        }
        taken
    }

    /// Gives the guest a device that is in hand.
    fn take(&mut self, number: usize, device: &Device) -> Result<(), Error> {
        let stream = device.function.id;
        if !self.hv.is_clean(number) {
            return Err(Error::NotReset { stream });
        }
        let requests = self.asks_for_pages(device);
        let pasids = requests && self.hv.capabilities.pasid_bits > 0;
        let features = Features { device_tlb: requests, page_requests: requests, pasid: pasids };
        // Without page requests the broker has nothing to admit.
        let limits = Limits::with_requests(if requests { ALLOCATION } else { 0 });
        let id = self.hv.ledger.add_device(stream, &limits).map_err(Error::Broker)?;
        // Whatever fails from here on, the device is the guest's to give back.
        let _ = self.devices.push(Given { number, id, restraint: Restraint::None, blocked: None });
        self.hv.give(number, Some((self.index, self.devices.len() as u32)));
        if requests {
            let tlb = device.function.device_tlb(&self.hv.config).map_err(Error::Device)?;
            let describe = |commands: &mut _| unit::describe_device_tlb(commands, stream, &tlb);
            self.hv.commands.with(describe).map_err(Error::Unit)?;
        }
        self.stuck_if_late(assign(self.hv, stream, features))?;
        if pasids {
            // Accesses without PASID reach an empty space. It also has to be there: QEMU's unit refuses every PASID of a
            // device whose entry for accesses without one is not present.
            let blank = self.stuck_if_late(Space::new(self.hv, &self.share, stream, None))?;
            let _ = self.blanks.push(blank);
        }
        if requests {
            let config = &self.hv.config;
            let enabled =
                device.function.enable_page_requests(config, ALLOCATION, pasids).map_err(Error::Device)?;
            defmt::debug!("{} of guest {=usize}: {}", stream, self.index, enabled);
        }
        device.function.enable_bus_master(&self.hv.config);
        Ok(())
    }

    /// Returns whether `device` sends page requests, and the unit serves them, and translates for it.
    pub fn asks_for_pages(&self, device: &Device) -> bool {
        let can = device.function.has_page_requests() && self.hv.capabilities.page_requests;
        can && match device.function.device_tlb(&self.hv.config) {
            Ok(tlb) => tlb.page_aligned || !unit::WHOLE_PAGES_ALONE,
            Err(_) => false,
        }
    }

    /// Attaches a device of the guest; returns the guest's name for the attachment.
    pub fn attach(
        &mut self,
        device: u32,
        pasid: Option<Pasid>,
        opaque: u64,
        deadline_us: u64,
    ) -> Result<u64, Error> {
        let given = (device as usize).checked_sub(1).and_then(|at| self.devices.get(at));
        let given = given.ok_or(Error::Attached)?;
        let device_of = self.hv.devices.get(given.number).ok_or(Error::Attached)?;
        let place = self.attachments.iter().position(Option::is_none).ok_or(Error::Attached)?;
        self.hv.ledger.set_deadline(given.id, deadline_us);
        let policy = Policy {
            stream: device_of.function.id,
            requests: pasid.into(),
            device: given.id,
            queue: self.queue,
            name: device,
            opaque,
        };
        let space = || Space::new(self.hv, &self.share, policy.stream, pasid);
        let attached = attach(self.hv, &policy, space);
        self.attachments[place] = Some(self.stuck_if_late(attached)?);
        Ok(place as u64 + 1)
    }

    /// Attaches a device of the guest by a first stage of the guest's own, over a second in which the guest's addresses are
    /// what they are for its virtual CPU: its memory, and nothing else but what a device needs to interrupt. Returns the guest's name for the attachment.
    pub fn bind(&mut self, device: u32, first: FirstStage, opaque: u64) -> Result<u64, Error> {
        let given = (device as usize).checked_sub(1).and_then(|at| self.devices.get(at));
        let given = given.ok_or(Error::Attached)?;
        let device_of = self.hv.devices.get(given.number).ok_or(Error::Attached)?;
        let place = self.attachments.iter().position(Option::is_none).ok_or(Error::Attached)?;
        let policy = Policy {
            stream: device_of.function.id,
            requests: None.into(),
            device: given.id,
            queue: self.queue,
            name: device,
            opaque,
        };
        let memory = self.ram.grant(Gpa(0), self.ram.bytes()).ok_or(Error::Registers)?;
        let space = || Space::behind(self.hv, &self.share, policy.stream, first, &memory);
        let attached = attach(self.hv, &policy, space);
        self.attachments[place] = Some(self.stuck_if_late(attached)?);
        Ok(place as u64 + 1)
    }

    /// Returns the attachments whose first stage the guest owns.
    pub fn bound(&self) -> impl Iterator<Item = Attachment> {
        let attachments = self.attachments.iter().flatten().map(|owned| owned.space.attachment);
        attachments.filter(|attachment| attachment.stages == Stages::Nested)
    }

    /// Detaches; on an error the attachment stays blocked, and its tables are never used again.
    pub fn detach(&mut self, name: u64) -> Option<Result<(), Error>> {
        let at = usize::try_from(name.checked_sub(1)?).ok()?;
        let owned = self.attachments.get_mut(at)?.take()?;
        let detached = detach(self.hv, &self.share, self.queue, owned);
        Some(self.stuck_if_late(detached))
    }

    /// Notes that hardware may still know what it was to forget: then the guest's memory is never used again.
    fn stuck_if_late<T>(&mut self, result: Result<T, Error>) -> Result<T, Error> {
        self.stuck |= matches!(
            result,
            Err(Error::Unit(
                iommu::Error::Timeout { .. }
                    | iommu::Error::QueueFull { .. }
                    | iommu::Error::Busy { .. }
                    | iommu::Error::Failed { .. }
            ))
        );
        result
    }

    /// Returns what the guest attached under `name`.
    pub fn owned(&self, name: u64) -> Option<&Owned> {
        self.attachments.get(usize::try_from(name.checked_sub(1)?).ok()?)?.as_ref()
    }

    /// Maps `grant` for an attachment.
    pub fn map(&self, owned: &Owned, iova: Iova, grant: &Grant, perms: Perms) -> Result<(), Error> {
        owned.space.is_the_hypervisors()?;
        self.spares_doorbell(iova, grant.bytes())?;
        owned.space.map(self.hv, &self.share, iova, grant, perms)
    }

    /// Unmaps, and returns when nothing reaches the memory any more.
    pub fn unmap(&self, owned: &Owned, iova: Iova, bytes: u64) -> Result<(), Error> {
        owned.space.is_the_hypervisors()?;
        self.spares_doorbell(iova, bytes)?;
        owned.space.unmap(self.hv, &self.share, iova, bytes)?;
        self.hv.ledger.unmapped(owned.device, owned.space.attachment.pasid, iova, bytes / PAGE_SIZE);
        // Nobody else counts while the guest is here.
        let unmapped = &self.home().unmapped;
        unmapped.store(unmapped.load(Relaxed).wrapping_add(1), Relaxed);
        Ok(())
    }

    /// Checks that a guest leaves the page alone to which its devices write their messages.
    fn spares_doorbell(&self, iova: Iova, bytes: u64) -> Result<(), Error> {
        let meets =
            |page: &Range<PhysAddr>| iova.0 < page.end.0 && page.start.0 < iova.0.saturating_add(bytes);
        let hits = self.hv.doorbell.as_ref().is_some_and(meets);
        if hits { Err(Error::Doorbell) } else { Ok(()) }
    }

    /// Takes all devices back, with requests outstanding or not; `false` if one did not let go of memory.
    pub fn release_devices(&mut self) -> bool {
        let mut released = !self.stuck;
        for Given { number, id, blocked, .. } in core::mem::take(&mut self.devices) {
            let Some(device) = self.hv.devices.get(number) else { continue };
            let stream = device.function.id;
            // No new requests are admitted, and then the hardware lets none through.
            for owned in
                self.attachments.iter().flatten().filter(|owned| owned.space.attachment.stream == stream)
            {
                self.hv.ledger.leave(owned.id);
            }
            // A device that issues nothing cannot flood the unit with faults while it is taken away.
            device.function.disable_bus_master(&self.hv.config);
            let blocked = blocked.map_or_else(|| block(self.hv, stream), Ok);
            let is_its = |space: &Space| space.attachment.stream == stream;
            let of_it =
                self.attachments.iter_mut().filter_map(|place| place.take_if(|owned| is_its(&owned.space)));
            let mut detached: Result<(), Error> = Ok(());
            for owned in of_it {
                detached = detached.and(detach(self.hv, &self.share, self.queue, owned));
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
            if let (Some(tally), Some(latencies)) = (self.hv.ledger.tally(id), self.hv.ledger.latencies(id)) {
                self.home().tally.with(|sum| *sum += tally);
                let add = |(sum, count): (&mut u64, u64)| *sum += count;
                self.home().answer_times.with(|sums| sums.iter_mut().zip(latencies.answer).for_each(add));
            }
            self.hv.ledger.remove_device(id);
            // Neither machine lists a device whose faults stall. Where one does, this is the place for
            // `Invalidation::Stalls`: it is blocked, all that it reported is answered, and what was never reported waits.
            // Nothing may be invalidated there while it is reset, and by now nothing has to.
            self.hv.mark(number, if blocked.is_ok() { reset(self.hv, device) } else { Condition::Broken });
            self.hv.give(number, None);
            self.hv.flooding.take(number);
            match blocked {
                Ok(leaving) if released => self.hv.tables.with(|tables| tables.finish(leaving)),
                // It stays blocked for good.
                Ok(_) => silence(self.hv, stream),
                Err(error) => {
                    defmt::error!("{} could not be blocked: {}", stream, error);
                    released = false;
                }
            }
            self.hv.let_go(number, None);
        }
        released
    }

    /// Returns whether there is something for [`restrain_devices`](Self::restrain_devices) to do.
    pub fn must_restrain(&self) -> bool {
        self.devices.iter().any(|given| self.hv.ledger.restraint(given.id) != given.restraint)
    }

    /// Does to the guest's devices what the broker holds them to: the part that is neither refusing nor waiting.
    pub fn restrain_devices(&mut self) {
        silence_strays(self.hv, self.index);
        for given in &mut self.devices {
            let restraint = self.hv.ledger.restraint(given.id);
            if restraint == given.restraint {
                continue;
            }
            let before = core::mem::replace(&mut given.restraint, restraint);
            self.hv.homes[self.index].restraints[restraint as usize].fetch_add(1, Relaxed);
            let Some(device) = self.hv.devices.get(given.number) else { continue };
            if restraint >= Restraint::RequestsOff && before < Restraint::RequestsOff {
                // The broker admits nothing more, so what is outstanding ends here.
                self.hv.evict(self.queue, Whose::Device(given.id));
                device.function.disable_page_requests_alone(&self.hv.config);
                defmt::warn!("{} may ask for no more pages", device.function.id);
            }
            if restraint == Restraint::Blocked {
                match block_for_good(self.hv, device) {
                    Ok(leaving) => given.blocked = Some(leaving),
                    // It is blocked, but the unit did not confirm it.
                    Err(error) => {
                        defmt::error!("{} could not be blocked: {}", device.function.id, error);
                        self.stuck = true;
                    }
                }
            }
        }
    }
}

/// Resets a device that is blocked and asks for nothing, so that nothing of its last owner's acts in the next one's memory.
///
/// Takes a tenth of a second, and two at most, so the core that takes the device away sleeps meanwhile: never in the service
/// routine.
pub fn reset(hv: &Hypervisor, device: &Device) -> Condition {
    /// How long the core sleeps between two looks, in microseconds.
    const STEP_US: u64 = 5_000;
    let stream = device.function.id;
    let start_us = cpu::now_us();
    let mut reset = match pcie::Reset::begin(&hv.config, &device.function, start_us) {
        Ok(reset) => reset,
        Err(pcie::Error::Unsupported { .. }) => {
            // What it remembers nobody could make it forget.
            let allowed = hv.may_stay_unreset() && !hv.is_unasked(stream);
            match allowed {
                true => defmt::warn!(
                    "{} has no reset, and is given to the next guest as the last one left it",
                    stream
                ),
                false => defmt::warn!(
                    "{} has no reset: it is given to no other guest (unreset=allow on the command line lets it be)",
                    stream
                ),
            }
            return if allowed { Condition::Clean } else { Condition::Unreset };
        }
        Err(error) => {
            defmt::error!("{} cannot be reset, and is given to nobody any more: {}", stream, error);
            return Condition::Broken;
        }
    };
    loop {
        match reset.poll(&hv.config, cpu::now_us()) {
            Ok(Completion::Done) => {
                defmt::info!("{} was reset in {=u64} us", stream, cpu::now_us().saturating_sub(start_us));
                return Condition::Clean;
            }
            // The timer of the service core is the routine's: whoever took it there would take the deadlines with it.
            Ok(_) if cpu::core() == SERVICE_CORE => drop(service::wait_for(hv, STEP_US, || false)),
            Ok(_) => {
                let _masked = cpu::mask();
                interrupts::arm_timer(STEP_US);
                cpu::wait_for_interrupt();
                interrupts::disarm_timer();
            }
            Err(error) => {
                defmt::error!("{} was not reset, and is given to nobody any more: {}", stream, error);
                return Condition::Broken;
            }
        }
    }
}

/// Gives `stream` tables of its own, in which everything is blocked.
pub fn assign(hv: &Hypervisor, stream: StreamId, features: Features) -> Result<(), Error> {
    let invalidations = hv.tables.with(|tables| tables.assign(stream, features)).map_err(Error::Unit)?;
    hv.invalidate(&invalidations).map_err(Error::Unit)
}

impl Space {
    /// Lets accesses of `stream` that carry `pasid` (or none) through empty tables of their own.
    pub fn new(
        hv: &Hypervisor,
        share: &Share,
        stream: StreamId,
        pasid: Option<Pasid>,
    ) -> Result<Self, Error> {
        let tree =
            share.with(hv.pool, |frames| DeviceTables::new(frames, hv.stage)).map_err(Error::Tables)?;
        let translation = tree.translation();
        Self::attach(hv, share, stream, pasid, tree, translation)
    }

    /// Lets accesses of `stream` without PASID through the tables that a guest has, and then through its `memory`.
    fn behind(
        hv: &Hypervisor,
        share: &Share,
        stream: StreamId,
        first: FirstStage,
        memory: &Grant,
    ) -> Result<Self, Error> {
        let tree =
            share.with(hv.pool, |frames| DeviceTables::of_guest(frames, memory)).map_err(Error::Tables)?;
        let translation = tree.behind(first);
        // Before the first access: a fault of the second stage is none of the guest's.
        hv.note_bound(stream, true);
        Self::attach(hv, share, stream, None, tree, translation).inspect_err(|_| hv.note_bound(stream, false))
    }

    fn attach(
        hv: &Hypervisor,
        share: &Share,
        stream: StreamId,
        pasid: Option<Pasid>,
        tree: DeviceTables,
        translation: Translation,
    ) -> Result<Self, Error> {
        // Messages carry no PASID. Nobody walks the tables yet, so that there is nothing to invalidate.
        let doorbell = if pasid.is_none() { hv.doorbell_of(stream) } else { None };
        let mapped = doorbell.map_or(Ok(()), |page| {
            let grant = memory::doorbell(page);
            share.with(hv.pool, |frames| tree.map_registers(frames, &grant))
        });
        if let Err(error) = mapped {
            share.with(hv.pool, |frames| tree.take_down(frames));
            return Err(Error::Tables(error));
        }
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

    /// Checks that what is mapped in it is mapped by call.
    fn is_the_hypervisors(&self) -> Result<(), Error> {
        if self.attachment.stages == Stages::Nested { Err(Error::Bound) } else { Ok(()) }
    }

    /// Maps `grant` at `iova`.
    pub fn map(
        &self,
        hv: &Hypervisor,
        share: &Share,
        iova: Iova,
        grant: &Grant,
        perms: Perms,
    ) -> Result<(), Error> {
        share.with(hv.pool, |frames| self.tree.map(frames, iova.0, grant, perms)).map_err(Error::Tables)?;
        if hv.capabilities.caches_absence {
            let invalidation = Invalidation::covering(self.attachment, iova, grant.bytes());
            hv.invalidate(&[invalidation]).map_err(Error::Unit)?;
        }
        Ok(())
    }

    /// Unmaps `bytes` from `iova`, and returns when nothing reaches the memory any more. On an error of the unit the device
    /// may still reach it, until it is detached.
    pub fn unmap(&self, hv: &Hypervisor, share: &Share, iova: Iova, bytes: u64) -> Result<(), Error> {
        let unmapped = self.remove(hv, share, iova, bytes)?;
        self.forget(hv, share, iova, bytes, unmapped)
    }

    /// Takes `bytes` from `iova` out of the tables. The unit and the device may still know them.
    pub fn remove(&self, hv: &Hypervisor, share: &Share, iova: Iova, bytes: u64) -> Result<Unmapped, Error> {
        share.with(hv.pool, |frames| self.tree.unmap(frames, iova.0, bytes)).map_err(Error::Tables)
    }

    /// Has the unit and the device forget what was removed, and returns when they have.
    pub fn forget(
        &self,
        hv: &Hypervisor,
        share: &Share,
        iova: Iova,
        bytes: u64,
        unmapped: Unmapped,
    ) -> Result<(), Error> {
        let Attachment { stream, pasid, domain, .. } = self.attachment;
        if unmapped.tables_went() {
            // `Pages` leaves what the unit remembers of the tables above. On an error the tables are never used again.
            hv.invalidate(&[Invalidation::Attachment(self.attachment)]).map_err(Error::Unit)?;
            share.with(hv.pool, |frames| unmapped.give_back(frames));
        } else {
            // Only whole pages are removed.
            let pages = Invalidation::Pages { attachment: self.attachment, iova, pages: bytes / PAGE_SIZE };
            hv.invalidate(&[pages]).map_err(Error::Unit)?;
        }
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

    /// Blocks the space in hardware; returns when the unit and the device have forgotten it, and every page request sent
    /// before has reached its queue.
    fn block(&self, hv: &Hypervisor) -> Result<Leaving, Error> {
        let leaving = detach_and_wait(hv, self.attachment)?;
        // While the domain's number is still taken, so that whoever judges the trace takes nobody else's for it.
        let Attachment { stream, pasid, domain, .. } = self.attachment;
        defmt::debug!(
            "detach stream={=u32:#x} pasid={=u32:#x} domain={=u16:#x}",
            stream.0,
            pasid.map_or(u32::MAX, Pasid::value),
            domain.0
        );
        Ok(leaving)
    }

    /// Gives the tables of a space that was blocked back.
    fn free(self, hv: &Hypervisor, share: &Share, leaving: Leaving) {
        if self.attachment.stages == Stages::Nested {
            hv.note_bound(self.attachment.stream, false);
        }
        hv.tables.with(|tables| tables.finish(leaving));
        share.with(hv.pool, |frames| self.tree.take_down(frames));
    }

    /// Ends a space whose page requests went to nobody.
    pub fn end(self, hv: &Hypervisor, share: &Share) -> Result<(), Error> {
        let leaving = self.block(hv)?;
        self.free(hv, share, leaving);
        Ok(())
    }
}

/// Blocks an attachment; returns when the unit and the device have forgotten it, and every page request sent before has
/// reached its queue.
fn detach_and_wait(hv: &Hypervisor, attachment: Attachment) -> Result<Leaving, Error> {
    let (leaving, invalidations) = hv.tables.with(|tables| tables.detach(attachment)).map_err(Error::Unit)?;
    let mut commands: Vec<Invalidation, 8> = invalidations.iter().copied().collect();
    if attachment.device_tlb && hv.capabilities.page_requests {
        // There is room: a detachment asks for fewer.
        let _ = commands.push(Invalidation::PageRequestDrain);
    }
    hv.invalidate(&commands).map_err(Error::Unit)?;
    Ok(leaving)
}

/// A device that reaches all of memory, untranslated.
pub struct PassedThrough {
    attachment: Attachment,
}

impl PassedThrough {
    /// Lets `stream`, which was blocked, through to all of memory: only a device that the command line names as trusted.
    pub fn new(hv: &Hypervisor, stream: StreamId) -> Result<Self, Error> {
        let trusted = wanted::value(hv.boot.command_line(), "trusted").and_then(|number| {
            let digits = number.strip_prefix("0x")?;
            u32::from_str_radix(digits, 16).ok().map(StreamId)
        });
        if trusted != Some(stream) {
            return Err(Error::NotTrusted { stream });
        }
        assign(hv, stream, Features::default())?;
        let translation = Translation::Bypass(memory::trust());
        let (attachment, invalidations) =
            hv.tables.with(|tables| tables.attach(stream, None, translation)).map_err(Error::Unit)?;
        hv.invalidate(&invalidations).map_err(Error::Unit)?;
        Ok(Self { attachment })
    }

    /// Detaches it again, and returns when the unit knows. What is left of the device is blocked.
    pub fn end(self, hv: &Hypervisor) -> Result<(), Error> {
        let leaving = detach_and_wait(hv, self.attachment)?;
        hv.tables.with(|tables| tables.finish(leaving));
        Ok(())
    }
}

/// Tells the log what an entry of a guest's array had forgotten, for whoever compares it with the unit's own.
pub fn tell_invalidated(entry: usize, invalidation: &Invalidation) {
    let Invalidation::Pages { attachment: Attachment { stream, pasid, domain, .. }, iova, pages } =
        *invalidation
    else {
        return;
    };
    defmt::debug!(
        "invalidate stream={=u32:#x} pasid={=u32:#x} domain={=u16:#x} iova={=u64:#x} pages={=u64} entry={=usize}",
        stream.0,
        pasid.map_or(0, Pasid::value),
        domain.0,
        iova.0,
        pages,
        entry
    );
}

/// Attaches a device, or a PASID of it, by what `space` makes for it.
pub fn attach(
    hv: &Hypervisor,
    policy: &Policy,
    space: impl FnOnce() -> Result<Space, Error>,
) -> Result<Owned, Error> {
    // The broker first: a request that comes as soon as the unit lets it must find its owner.
    let id = hv.ledger.attach(policy).map_err(|error| match error {
        broker::Error::NoRoomForAttachment => Error::Attached,
        error => Error::Broker(error),
    })?;
    let space = space().inspect_err(|_| {
        hv.ledger.leave(id);
        hv.ledger.detach(id);
    })?;
    Ok(Owned { id, device: policy.device, space })
}

/// Blocks all of a device, and returns when the unit knows; and the device, unless it did not answer before.
pub fn block(hv: &Hypervisor, stream: StreamId) -> Result<Leaving, Error> {
    let (leaving, invalidations) = hv.tables.with(|tables| tables.block(stream)).map_err(Error::Unit)?;
    hv.note_blocked(stream);
    hv.invalidate(&invalidations).map_err(Error::Unit)?;
    defmt::debug!("block stream={=u32:#x}", stream.0);
    Ok(leaving)
}

/// Blocks a device that cannot be relied on, and has no more recorded of what it tries, until it is given back.
pub fn block_for_good(hv: &Hypervisor, device: &Device) -> Result<Leaving, Error> {
    device.function.disable_bus_master(&hv.config);
    block(hv, device.function.id).inspect(|_| silence(hv, device.function.id))
}

/// Has what a blocked device still tries refused without a record, so that it costs nobody anything; returns when the unit
/// knows. It ends when the block is finished.
fn silence(hv: &Hypervisor, stream: StreamId) {
    let silenced = hv.tables.with(|tables| tables.silence(stream));
    match silenced.and_then(|invalidations| hv.invalidate(&invalidations)) {
        Ok(()) => defmt::info!("{} is blocked, and no more is told of what it tries", stream),
        Err(error) => defmt::error!("{} could not be silenced: {}", stream, error),
    }
}

/// Returns whether there are devices for [`silence_strays`] to silence.
pub fn has_strays(hv: &Hypervisor, index: usize) -> bool {
    !hv.flooding.is_empty() && strays(hv, index).next().is_some()
}

/// Silences devices that no guest owns and that have too many faults: those whose caretaker is the home of guest `index`.
pub fn silence_strays(hv: &Hypervisor, index: usize) {
    if !hv.flooding.is_empty() {
        strays(hv, index).for_each(|number| silence_stray(hv, number));
    }
}

fn strays(hv: &Hypervisor, index: usize) -> impl Iterator<Item = usize> {
    let is_its = move |number: &usize| caretaker_of(*number) == index && hv.flooding.has(*number);
    let is_nobodys = |number: &usize| {
        hv.devices.get(*number).is_some_and(|device| hv.owner_of(device.function.id).is_none())
    };
    (0..hv.devices.len()).filter(is_its).filter(is_nobodys)
}

/// Silences a device that no guest owns: it gets tables of its own, for what is blocked by having none has no place where that
/// could be said.
#[cold]
fn silence_stray(hv: &Hypervisor, number: usize) {
    hv.flooding.take(number);
    let Some(device) = hv.devices.get(number) else { return };
    let silenced = match hv.take_in_hand(number) {
        // Somebody has just taken it: then it is theirs.
        None => return,
        Some(Some(leaving)) => Some(leaving),
        Some(None) => {
            let assigned = assign(hv, device.function.id, Features::default());
            assigned.and_then(|()| block_for_good(hv, device)).ok()
        }
    };
    hv.let_go(number, silenced);
}

/// Takes a device in hand that no guest owns. If it is silenced it is reset, and the silence is over.
pub fn take_in_hand(hv: &Hypervisor, number: usize) -> Result<(), Error> {
    let device = hv.devices.get(number).ok_or(Error::Registers)?;
    let start_us = cpu::now_us();
    let silenced = loop {
        match hv.take_in_hand(number) {
            Some(silenced) => break silenced,
            // Another core is about to silence it, which has an end.
            None if cpu::now_us().saturating_sub(start_us) < SILENCING_LIMIT_US => cpu::relax(),
            None => return Err(Error::Attached),
        }
    };
    if let Some(leaving) = silenced {
        hv.mark(number, reset(hv, device));
        hv.tables.with(|tables| tables.finish(leaving));
    }
    hv.flooding.take(number);
    Ok(())
}

/// Detaches: mark as leaving; block in hardware, invalidate, wait; let the service core pass; answer what is outstanding;
/// wait until the answers are out; and only then let go of the tables.
pub fn detach(hv: &Hypervisor, share: &Share, queue: QueueId, owned: Owned) -> Result<(), Error> {
    let Owned { id, device, space } = owned;
    hv.ledger.leave(id);
    let leaving = space.block(hv)?;
    // The drain is also the grace period: no handler that saw the attachment alive is still at work.
    hv.drain().map_err(Error::Unit)?;
    hv.evict(queue, Whose::Attachment(id));
    hv.invalidate(&[]).map_err(Error::Unit)?;
    hv.ledger.detach(id);
    hv.ledger.unmapped(device, space.attachment.pasid, Iova(0), u64::MAX);
    space.free(hv, share, leaving);
    Ok(())
}
