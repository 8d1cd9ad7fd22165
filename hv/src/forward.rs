//! From the rings of the service core to the guest's channel, on the guest's home core.

use crate::{
    guest::Guest,
    hypervisor::{Inbox, Notice},
};
use arch::cpu;
use broker::Group;
use channel::{
    Record,
    host::{Broken, Host, Pushed},
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
                // Whatever was answered before it came here is not shown.
                while let Some(group) = inbox.groups.peek(now_us) {
                    match push(channel, group)? {
                        Pushed::Full => break,
                        Pushed::Yes => news = true,
                        // A group has fewer pages than a ring has places, and a guest that broke its channel is ended. If
                        // either is ever not so the group is answered at its deadline.
                        Pushed::TooLarge | Pushed::Ended => {}
                    }
                    let taken_us = now_us.saturating_sub(group.reported_us);
                    self.hv.homes[self.index].longest_to_record_us.fetch_max(taken_us, Relaxed);
                    inbox.groups.done();
                }
            }
            while let Some(notice) = inbox.notices.receive() {
                // A guest also hears of an event that found no room: perhaps it is the last for a long time.
                if channel.push_event(&event(&notice))? != Pushed::Ended {
                    news = true;
                }
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

/// Makes all of a group visible, or nothing of it.
fn push(channel: &mut Host, group: &Group) -> Result<Pushed, Broken> {
    let pages = group.pages.len() as u32;
    let record = |(index, page): (usize, &broker::Page)| {
        Record::request(&Request {
            cookie: group.cookie.0,
            device: group.name,
            pasid: group.tag.pasid,
            opaque: group.opaque,
            group: group.tag.index,
            iova: page.iova(),
            perms: page.perms(),
            pages,
            index: index as u32,
        })
    };
    channel.push_group(group.pages.iter().enumerate().map(record))
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
