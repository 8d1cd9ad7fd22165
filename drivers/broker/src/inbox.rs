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
}

impl<'l, const Q: usize, const S: usize, const D: usize, const A: usize> Inbox<'l, Q, S, D, A> {
    /// The inbox of queue number `queue`, whose ring [`Broker::connect`](crate::Broker::connect) has the other end of.
    pub const fn new(ledger: &'l Ledger<Q, S, D, A>, queue: usize, slots: Consumer<'l, u16>) -> Self {
        Self { ledger, queue, slots }
    }

    /// Takes the next group. The time, in microseconds, is what `admit` had on its clock.
    ///
    /// Looks at the slots that were announced and answered since, and at one more.
    pub fn next(&mut self, now_us: u64) -> Option<Group> {
        while let Some(slot) = self.slots.dequeue() {
            if let Some(group) = self.ledger.deliver(self.queue, slot, now_us) {
                return Some(group);
            }
        }
        None
    }
}
