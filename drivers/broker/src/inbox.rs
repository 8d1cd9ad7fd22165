//! From the service core to the core of a queue's owner.

use crate::{Ledger, queue::Group};
use heapless::spsc::Consumer;

/// What the core of a queue's owner receives: the groups that are whole, one after the other.
///
/// The ring holds slots, and each slot at most once, so it never overflows. What was answered before it came here is not
/// shown.
pub struct Inbox<'l, const Q: usize, const S: usize, const D: usize, const A: usize> {
    ledger: &'l Ledger<Q, S, D, A>,
    queue: usize,
    slots: Consumer<'l, u16>,
    /// The group that is shown, if `is_shown`. It is read into its place, since it is large to move.
    group: Group,
    is_shown: bool,
    unseen: u64,
}

impl<'l, const Q: usize, const S: usize, const D: usize, const A: usize> Inbox<'l, Q, S, D, A> {
    /// The inbox of queue number `queue`, whose ring [`Broker::connect`](crate::Broker::connect) has the other end of.
    pub const fn new(ledger: &'l Ledger<Q, S, D, A>, queue: usize, slots: Consumer<'l, u16>) -> Self {
        Self { ledger, queue, slots, group: Group::NONE, is_shown: false, unseen: 0 }
    }

    /// Shows the next group, and the same one again until [`done`](Self::done). The time, in microseconds, is that of the
    /// clock which `admit` is given.
    ///
    /// Looks at the slots that were announced and answered since, and at one more.
    #[inline]
    pub fn peek(&mut self, now_us: u64) -> Option<&Group> {
        while !self.is_shown {
            let slot = self.slots.dequeue()?;
            self.is_shown = self.ledger.deliver(self.queue, slot, now_us, &mut self.group);
            self.unseen += u64::from(!self.is_shown);
        }
        Some(&self.group)
    }

    /// Returns whether there is nothing to look at.
    #[inline]
    pub fn is_empty(&self) -> bool {
        !self.is_shown && !self.slots.ready()
    }

    /// The group that was shown last has been dealt with.
    #[inline]
    pub fn done(&mut self) {
        self.is_shown = false;
    }

    /// Returns how many groups were answered before they came here.
    pub fn unseen(&self) -> u64 {
        self.unseen
    }

    /// Takes the next group, for whoever keeps it.
    pub fn next(&mut self, now_us: u64) -> Option<Group> {
        let group = self.peek(now_us)?.clone();
        self.done();
        Some(group)
    }
}
