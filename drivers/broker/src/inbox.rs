//! From the service core to the core of a queue's owner.

use crate::{
    Ledger,
    queue::{Delivered, Group, Shown},
};
use heapless::spsc::Consumer;

/// What the core of a queue's owner receives: the groups that are whole, one after the other.
///
/// The ring holds slots, and each slot at most once, so it never overflows. What was answered before it came here is not
/// shown.
pub struct Inbox<'l, const Q: usize, const S: usize, const D: usize, const A: usize> {
    ledger: &'l Ledger<Q, S, D, A>,
    queue: usize,
    slots: Consumer<'l, u16>,
    /// A group that was shown and not taken: it is shown again.
    left: Option<Delivered<'l>>,
    unseen: u64,
}

/// What became of the next group.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Taken<R> {
    /// It was shown, and this was made of it.
    Yes(R),
    /// It was shown, and left.
    Left,
    /// It was answered before it came here, or while it was read. There may be more.
    Gone,
    /// There is none.
    Empty,
}

impl<'l, const Q: usize, const S: usize, const D: usize, const A: usize> Inbox<'l, Q, S, D, A> {
    /// The inbox of queue number `queue`, whose ring [`Broker::connect`](crate::Broker::connect) has the other end of.
    pub const fn new(ledger: &'l Ledger<Q, S, D, A>, queue: usize, slots: Consumer<'l, u16>) -> Self {
        Self { ledger, queue, slots, left: None, unseen: 0 }
    }

    /// Shows the next group to `read`, which returns what it made of it, or `None` to have it shown again next time. The time,
    /// in microseconds, is that of the clock which `admit` is given.
    ///
    /// The group may be answered while it is read: then what `read` returned is thrown away, and what it did besides is to do no
    /// harm. Looks at one slot.
    #[inline]
    pub fn take<R>(&mut self, now_us: u64, read: impl FnOnce(Shown<'_>) -> Option<R>) -> Taken<R> {
        let Some(queue) = self.ledger.any_queue(self.queue) else { return Taken::Empty };
        let delivered = if self.left.is_some() {
            self.left.take()
        } else {
            let Some(slot) = self.slots.dequeue() else { return Taken::Empty };
            queue.deliver(slot)
        };
        if let Some(delivered) = delivered {
            let group = delivered.show();
            let Some(result) = read(group) else {
                self.left = Some(delivered);
                return Taken::Left;
            };
            let (device, reported_us) = (group.device(), group.reported_us());
            if delivered.is_still() {
                if let Some(device) = self.ledger.devices.at(device) {
                    device.delivery.count(now_us.saturating_sub(reported_us));
                }
                return Taken::Yes(result);
            }
        }
        self.unseen += 1;
        Taken::Gone
    }

    /// Returns whether there is nothing to look at.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.left.is_none() && !self.slots.ready()
    }

    /// Returns how many groups were answered before they came here.
    pub fn unseen(&self) -> u64 {
        self.unseen
    }

    /// Takes the next group, for whoever keeps it. Looks at the slots that were announced and answered since, and at one more.
    pub fn next(&mut self, now_us: u64) -> Option<Group> {
        loop {
            match self.take(now_us, |group| Some(Group::from(group))) {
                Taken::Yes(group) => return Some(group),
                Taken::Gone => {}
                Taken::Left | Taken::Empty => return None,
            }
        }
    }
}
