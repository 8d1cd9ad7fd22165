//! The hypervisor's own pager: it owns the queue of a device that no guest owns, and gives the device memory page by page, as
//! it asks.
//!
//! A fault goes to whoever owns the translation that it failed in. Where that is the hypervisor, its pager stands where a
//! guest's home core does otherwise: the same ring, the same deadlines, the same cookies, and the same order in which all of
//! it ends.

use crate::{
    control::{self, ALLOCATION, Error, Owned, Space},
    hypervisor::{Condition, Device, Groups, Hypervisor, PAGER},
    memory::{GuestRam, Share},
};
use arch::{cpu, unit};
use broker::{DeviceId, Limits, Owner, Page, Policy, QueueId, Restraint, Settled, Taken, Tally, Whose};
use core::ops::Range;
use heapless::Vec;
use iommu::{Features, Gpa, Iova, Leaving, Outcome, PAGE_SIZE, Pasid, Perms, StreamId};

/// Pages that a pager gives away, at most.
const PAGES: usize = 16;
/// Frames for the tables of its device.
const TABLE_FRAMES: usize = 16;

/// The memory that a device, or one PASID of it, gets as it asks for it.
pub struct Pager<'h> {
    hv: &'h Hypervisor,
    groups: Groups,
    queue: QueueId,
    /// The device, and its place in [`Hypervisor::devices`].
    device: &'h Device,
    number: usize,
    id: DeviceId,
    /// What it reaches; made last.
    owned: Option<Owned>,
    /// The empty space of accesses without PASID, where the others have one.
    blank: Option<Space>,
    /// What its tables left behind when it was blocked for good.
    blocked: Option<Leaving>,
    share: Share,
    /// Where the device may ask for pages.
    window: Range<Iova>,
    /// What it has got.
    pages: Vec<(Iova, GuestRam), PAGES>,
}

impl<'h> Pager<'h> {
    /// Takes device `number`, which nobody owns, and gives its accesses with `pasid`, or without, pages in `window` when they are
    /// asked for. There is one pager at a time.
    pub fn new(
        hv: &'h Hypervisor,
        number: usize,
        pasid: Option<Pasid>,
        window: Range<Iova>,
    ) -> Result<Self, Error> {
        let device = hv.devices.get(number).ok_or(Error::Attached)?;
        let stream = device.function.id;
        if hv.owner_of(stream).is_some() {
            return Err(Error::Attached);
        }
        if hv.boot.firmware_uses(&hv.config, stream) {
            return Err(Error::Firmwares { stream });
        }
        control::take_in_hand(hv, number)?;
        let opened = Self::open(hv, number, stream);
        let (groups, queue, id) = opened.inspect_err(|_| hv.let_go(number, None))?;
        // The device's name is its number, counted as guests count.
        hv.give(number, Some((PAGER, number as u32 + 1)));
        let mut pager = Self {
            hv,
            groups,
            queue,
            device,
            number,
            id,
            owned: None,
            blank: None,
            blocked: None,
            share: Share::new(TABLE_FRAMES),
            window,
            pages: Vec::new(),
        };
        match pager.begin(pasid) {
            Ok(()) => Ok(pager),
            Err(error) => {
                let _ = pager.end();
                Err(error)
            }
        }
    }

    /// What everything else refers to: the queue exists before any attachment.
    fn open(hv: &Hypervisor, number: usize, stream: StreamId) -> Result<(Groups, QueueId, DeviceId), Error> {
        if !hv.is_clean(number) {
            return Err(Error::NotReset { stream });
        }
        let groups = hv.pager.with(Option::take).ok_or(Error::Attached)?;
        let opened = hv.ledger.open_at(PAGER, Owner::Pager).and_then(|queue| {
            let id = hv.ledger.add_device(stream, &Limits::with_requests(ALLOCATION));
            id.map(|id| (queue, id)).inspect_err(|_| {
                hv.ledger.shut(queue);
                let _ = hv.ledger.close(queue);
            })
        });
        match opened {
            Ok((queue, id)) => Ok((groups, queue, id)),
            Err(error) => {
                hv.pager.with(|place| *place = Some(groups));
                Err(Error::Broker(error))
            }
        }
    }

    /// Unit first, then configuration space, as for a guest's device.
    fn begin(&mut self, pasid: Option<Pasid>) -> Result<(), Error> {
        let Self { hv, device, .. } = *self;
        let stream = device.function.id;
        let tlb = device.function.device_tlb(&hv.config).map_err(Error::Device)?;
        let describe = |commands: &mut _| unit::describe_device_tlb(commands, stream, &tlb);
        hv.commands.with(describe).map_err(Error::Unit)?;
        let has_pasid = pasid.is_some();
        control::assign(hv, stream, Features { device_tlb: true, page_requests: true, pasid: has_pasid })?;
        if has_pasid {
            self.blank = Some(Space::new(hv, &self.share, stream, None)?);
        }
        let policy = Policy {
            stream,
            requests: pasid.into(),
            device: self.id,
            queue: self.queue,
            name: self.number as u32 + 1,
            opaque: 0,
        };
        let space = || Space::new(hv, &self.share, stream, pasid);
        self.owned = Some(control::attach(hv, &policy, space)?);
        device.function.enable_page_requests(&hv.config, ALLOCATION, has_pasid).map_err(Error::Device)?;
        device.function.enable_bus_master(&hv.config);
        Ok(())
    }

    /// Returns whether there is something for [`serve`](Self::serve) to do: the device asks for something, or has too many faults.
    pub fn is_asked(&mut self) -> bool {
        if self.hv.flooding.has(self.number) {
            return true;
        }
        loop {
            match self.groups.take(cpu::now_us(), |_| None::<()>) {
                Taken::Yes(()) | Taken::Left => return true,
                Taken::Gone => {}
                Taken::Empty => return false,
            }
        }
    }

    /// Answers what the device has asked for; returns what the device is held to.
    ///
    /// A group has all of its pages, or is refused. What it got before it was refused stays.
    pub fn serve(&mut self) -> Restraint {
        while let Some(group) = self.groups.next(cpu::now_us()) {
            let is_repaired = group.pages.iter().all(|page| match self.give(*page) {
                Ok(given) => given,
                Err(error) => {
                    defmt::warn!("{} cannot be given a page: {}", self.device.function.id, error);
                    false
                }
            });
            let outcome = if is_repaired { Outcome::Success } else { Outcome::Invalid };
            match self.hv.ledger.settle(self.queue, group.cookie, outcome, cpu::now_us()) {
                Ok(Settled::Now(answer)) => self.hv.answer(answer),
                // The service core sends it.
                Ok(Settled::Held) => {}
                Err(refusal) => defmt::debug!("the pager came too late: {}", refusal),
            }
        }
        self.hv.flooding.take(self.number);
        let restraint = self.hv.ledger.restraint(self.id);
        if restraint == Restraint::Blocked && self.blocked.is_none() {
            self.blocked = control::block_for_good(self.hv, self.device).ok();
        }
        restraint
    }

    /// Gives the device `page`; `false` if it may not have that.
    fn give(&mut self, page: Page) -> Result<bool, Error> {
        let (iova, perms) = (page.iova(), page.perms());
        if !self.window.contains(&iova) || perms.execute || perms.privileged {
            return Ok(false);
        }
        if self.pages.iter().any(|(given, _)| *given == iova) {
            return Ok(true);
        }
        let Some(owned) = self.owned.as_ref().filter(|_| !self.pages.is_full()) else { return Ok(false) };
        let Some(frame) = GuestRam::new(self.hv.pool, 1) else { return Ok(false) };
        let Some(grant) = frame.grant(Gpa(0), PAGE_SIZE) else { return Ok(false) };
        let mapped = owned.space.map(self.hv, &self.share, iova, &grant, Perms::READ_WRITE);
        // Even if the unit did not confirm it: the frame is the device's from here on, until the pager ends.
        let _ = self.pages.push((iova, frame));
        mapped.map(|()| true)
    }

    /// Returns a word that the device may have written, or `None` where it has no page.
    pub fn load(&self, iova: Iova) -> Option<u64> {
        let page = iova.0 & !(PAGE_SIZE - 1);
        let (_, frame) = self.pages.iter().find(|(given, _)| given.0 == page)?;
        frame.load(Gpa(iova.0 - page))
    }

    /// Takes the device and its memory back, with requests outstanding or not; returns what became of them.
    ///
    /// On an error the frames are never used again, since the device may still reach them, and there is no pager any more.
    pub fn end(self) -> Result<Tally, Error> {
        let Self { hv, groups, queue, device, number, id, owned, blank, blocked, share, pages, .. } = self;
        let stream = device.function.id;
        device.function.disable_bus_master(&hv.config);
        let leaving = blocked.map_or_else(|| control::block(hv, stream), Ok);
        let leaving = leaving.inspect_err(|_| hv.mark(number, Condition::Broken))?;
        if let Some(owned) = owned {
            control::detach(hv, &share, queue, owned)?;
        }
        if let Some(blank) = blank {
            blank.end(hv, &share)?;
        }
        device.function.disable_page_requests(&hv.config);
        let tally = hv.ledger.tally(id).unwrap_or(Tally::ZERO);
        hv.ledger.remove_device(id);
        hv.mark(number, control::reset(hv, device));
        hv.give(number, None);
        hv.flooding.take(number);
        hv.tables.with(|tables| iommu::Tables::finish(tables, leaving));
        hv.let_go(number, None);
        hv.ledger.shut(queue);
        hv.drain().map_err(Error::Unit)?;
        hv.evict(queue, Whose::All);
        hv.ledger.close(queue).map_err(Error::Broker)?;
        for (_, frame) in pages {
            hv.pool.with(|pool| pool.give_back(frame.into_buffer()));
        }
        hv.pager.with(|place| *place = Some(groups));
        Ok(tally)
    }
}
