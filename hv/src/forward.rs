//! From the rings of the service core to the guest's channel, on the guest's home core.

use crate::{
    control::Given,
    guest::Guest,
    hypervisor::{Hypervisor, Inbox, Notice},
};
use arch::{cpu, interrupts};
use broker::{Restraint, Shown, Taken};
use channel::{
    Record,
    host::{Batch, Broken, Host, Pushed},
    record::{Event, Reason, Request},
};
use core::sync::atomic::Ordering::Relaxed;
use iommu::{Access, FaultReason, Iova, Perms};

impl Guest {
    /// Moves what the service core announced into the channel, and interrupts the guest if there is something new.
    ///
    /// A group that finds no room waits here, and runs into its deadline if the guest does not make room. Without a
    /// channel everything waits.
    pub fn forward(&mut self, inbox: &mut Inbox) -> Result<(), Broken> {
        let mut news = false;
        if let Some(channel) = &mut self.channel {
            if !inbox.groups.is_empty() {
                let now_us = cpu::now_us();
                let mut batch = channel.requests()?;
                let mut longest_us = 0;
                // Whatever was answered before it came here is not shown.
                loop {
                    match inbox.groups.take(now_us, |group| offer(&mut batch, group)) {
                        Taken::Yes(reported_us) => {
                            batch.accept();
                            longest_us = longest_us.max(now_us.saturating_sub(reported_us));
                        }
                        Taken::Gone => {}
                        Taken::Left | Taken::Empty => break,
                    }
                }
                if !batch.is_empty() {
                    news = true;
                    self.hv.homes[self.index].longest_to_record_us.fetch_max(longest_us, Relaxed);
                }
            }
            while let Some(notice) = inbox.notices.receive() {
                // A guest also hears of an event that found no room: perhaps it is the last for a long time.
                if channel.push_event(&event(&notice))? != Pushed::Ended {
                    news = true;
                }
            }
            if !self.hv.flooding.is_empty() {
                news |= tell_flooding(self.hv, &self.devices, channel)?;
            }
            let refused: u64 = self.devices.iter().map(|given| self.hv.ledger.unshown(given.id)).sum();
            let unshown = refused + inbox.groups.unseen() - self.unseen_before;
            if unshown > self.unshown {
                channel.count_lost_requests(unshown - self.unshown);
                self.unshown = unshown;
                news = true;
            }
            let lost = inbox.notices.take_lost();
            if lost > 0 {
                channel.count_lost_events(lost);
                news = true;
            }
        }
        if news {
            self.vcpu.inject(arch::guest::FAULT_CHANNEL);
        }
        Ok(())
    }
}

/// Writes a group into the channel, to be accepted, and returns when it was reported; `None` if there is no room.
fn offer(batch: &mut Batch<'_>, group: Shown<'_>) -> Option<u64> {
    // Else it would never find room.
    const { assert!(broker::PAGES as u64 <= channel::ring::RECORDS) };
    let pages = group.pages();
    let record = move |index: usize| {
        let (tag, page) = (group.tag(), group.page(index));
        Record::request(&Request {
            cookie: group.cookie().0,
            device: group.name(),
            pasid: tag.pasid,
            opaque: group.opaque(),
            group: tag.index,
            iova: page.iova(),
            perms: page.perms(),
            pages: pages as u32,
            index: index as u32,
        })
    };
    batch.offer(pages, record).then(|| group.reported_us())
}

/// How long after it found no room an event that must not be lost is offered again, in microseconds.
const RETRY_US: u64 = 1_000;

/// Tells a guest which of its devices have more faults than they may, and which are blocked for it; returns whether there was
/// something to tell. What finds no room in the channel is told later.
#[cold]
fn tell_flooding(hv: &Hypervisor, devices: &[Given], channel: &mut Host) -> Result<bool, Broken> {
    let mut told = false;
    for (given, device) in devices.iter().zip(1..) {
        // Taken before the restraint is read: a harder one that comes meanwhile is told after this.
        if !hv.flooding.take(given.number) {
            continue;
        }
        let is_blocked = hv.ledger.restraint(given.id) == Restraint::Blocked;
        let event = Event {
            number: 0,
            lost: 0,
            device,
            pasid: None,
            opaque: 0,
            iova: Iova(0),
            perms: Perms::default(),
            reason: if is_blocked { Reason::Blocked } else { Reason::TooMany },
        };
        match channel.offer_event(&event)? {
            Pushed::Full => {
                hv.flooding.put(given.number);
                // A guest may make room without coming out.
                interrupts::arm_timer(RETRY_US);
            }
            _ => told = true,
        }
    }
    Ok(told)
}

/// Tells a guest of a fault in its own terms. Number and losses are the channel's to fill in.
fn event(notice: &Notice) -> Event {
    let fault = &notice.fault;
    let perms = match fault.access {
        Access::Read | Access::PageRequest => Perms::READ,
        Access::Write => Perms { write: true, ..Perms::default() },
        Access::Atomic => Perms::READ_WRITE,
        Access::Unknown => Perms::default(),
    };
    // Of an interrupt it is the number of an entry in a table that is no guest's.
    let iova = if fault.reason == FaultReason::Interrupt { Iova(0) } else { fault.iova };
    Event {
        number: 0,
        lost: 0,
        device: notice.device,
        pasid: fault.pasid,
        opaque: notice.opaque,
        iova,
        perms,
        reason: Reason::from(fault.reason),
    }
}
