//! From the rings of the service core to the guest's channel, on the guest's home core.

use crate::{
    guest::Guest,
    hypervisor::{Inbox, Notice},
};
use broker::Group;
use channel::{
    Record,
    host::{Broken, Pushed},
    record::{Event, Reason, Request},
};
use core::sync::atomic::Ordering::{AcqRel, Relaxed};
use iommu::{Access, Perms};

impl Guest {
    /// Moves what the service core announced into the channel, and interrupts the guest if there is something new.
    ///
    /// A group that finds no room waits here, and runs into its deadline if the guest does not make room. Without a
    /// channel everything waits.
    pub fn forward(&mut self, inbox: &mut Inbox) -> Result<(), Broken> {
        while let Some(slot) = inbox.slots.dequeue() {
            // There is room: each slot is announced once at a time, and the first one perhaps once more.
            let _ = self.announced.push(slot);
        }
        let mut news = false;
        while let Some(&slot) = self.announced.first() {
            if self.channel.is_none() {
                break;
            }
            let group = match self.undelivered.take() {
                Some(group) => Some(group),
                None => {
                    // ORDER: from here on the slot is announced anew, so it is read after this.
                    self.home().announced.fetch_and(!(1 << slot), AcqRel);
                    self.hv.queues[self.index].deliver(slot)
                }
            };
            // Whatever was answered before it came here is not shown.
            if let Some(group) = group {
                match self.push(&group)? {
                    Pushed::Yes => news = true,
                    Pushed::Full => {
                        self.undelivered = Some(group);
                        break;
                    }
                    // A group has fewer pages than a ring has places, and a guest that broke its channel is ended. If
                    // either is ever not so the group is answered at its deadline.
                    Pushed::TooLarge | Pushed::Ended => {}
                }
                let home = self.home();
                home.longest_to_record_us.fetch_max(home.age_us(slot), Relaxed);
            }
            self.announced.remove(0);
        }
        let home = self.home();
        if let Some(channel) = &mut self.channel {
            let lost = home.notices_lost.swap(0, Relaxed);
            if lost > 0 {
                channel.count_lost_events(lost);
                news = true;
            }
            while let Some(notice) = inbox.notices.dequeue() {
                // A guest also hears of an event that found no room: perhaps it is the last for a long time.
                if channel.push_event(&event(&notice))? != Pushed::Ended {
                    news = true;
                }
            }
        }
        if news {
            self.vcpu.inject(arch::guest::FAULT_CHANNEL);
        }
        Ok(())
    }

    fn push(&mut self, group: &Group) -> Result<Pushed, Broken> {
        let Some(channel) = &mut self.channel else { return Ok(Pushed::Full) };
        let pages = group.pages.len() as u32;
        let record = |(index, page): (usize, &broker::Page)| {
            Record::request(&Request {
                cookie: group.cookie.0,
                device: group.device,
                pasid: group.tag.pasid,
                opaque: group.opaque,
                group: group.tag.index,
                iova: page.iova,
                perms: page.perms,
                pages,
                index: index as u32,
            })
        };
        channel.push_group(group.pages.iter().enumerate().map(record))
    }
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
    Event {
        number: 0,
        lost: 0,
        device: notice.device,
        pasid: fault.pasid,
        opaque: notice.opaque,
        iova: fault.iova,
        perms,
        reason: Reason::from(fault.reason),
    }
}
