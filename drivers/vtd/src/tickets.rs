//! What became of what was queued: which tickets are done, which wait, which never will be.
//!
//! A wait writes a sequence number when all before it has completed. Most tickets are done when their own number was
//! written; one whose wait the unit aborted is queued again under a later number. A ticket that failed is remembered as
//! such, so that no later number passes for its own.

use heapless::Vec;
use iommu::{Completion, StreamId, Ticket};

/// Tickets without an end, at most; with so many nothing more is queued.
pub(crate) const PENDING: usize = 128;
/// Failed tickets that are remembered one by one.
const FAILED: usize = 32;
/// How long the head of the queue may take where it waits for a device, in microseconds, before its ticket is taken for failed.
///
/// PCI Express, "Address Translation Services", gives a device one minute to answer an invalidation, and half as much more.
/// Units notice by themselves one that does not answer (`FSTS.ITE`), and that comes first; a device that is slow but in time
/// must cost nobody anything but the wait (XSA-373).
pub const HEAD_LIMIT_US: u64 = 90_000_000;
/// How long it may take where the unit alone is to do something.
const UNIT_LIMIT_US: u64 = 1_000_000;

/// What was queued for one ticket. Its places in the queue are not used again before it has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch {
    pub(crate) ticket: Ticket,
    /// The sequence number whose completion is the ticket's.
    pub(crate) done_at: u64,
    /// Where its descriptors are in the queue: the first, and the one after the last, which is its wait.
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// Whose device TLB it waits for.
    pub(crate) asked: Option<StreamId>,
    /// Its wait drains page requests.
    pub(crate) drains: bool,
    /// It was told to be failed, although it may still complete.
    pub(crate) failed: bool,
}

/// The tickets of a unit.
#[derive(Debug)]
pub(crate) struct Tickets {
    /// The last sequence number that was queued.
    submitted: u64,
    /// The last that is known to have completed; never goes back.
    completed: u64,
    /// In the order in which they were queued.
    pending: Vec<Batch, PENDING>,
    failed: Vec<u64, FAILED>,
    /// The newest that ever failed: what is newer has not.
    newest_failed: u64,
    /// Tickets up to this one are taken for failed: it was one, and there was no more room to remember it.
    forgotten: u64,
    /// The sequence number at the head of the queue, and since when at least.
    head: (u64, u64),
}

impl Tickets {
    pub(crate) fn new() -> Self {
        Self {
            submitted: 0,
            completed: 0,
            pending: Vec::new(),
            failed: Vec::new(),
            newest_failed: 0,
            forgotten: 0,
            head: (0, 0),
        }
    }

    /// The sequence number of the next wait.
    #[inline]
    pub(crate) fn next(&self) -> u64 {
        self.submitted + 1
    }

    /// Takes note that the wait [`next`](Self::next) was queued.
    #[inline]
    pub(crate) fn took(&mut self) {
        self.submitted += 1;
    }

    /// Adds a batch; there must be [`room`](Self::has_room).
    #[inline]
    pub(crate) fn add(&mut self, batch: Batch) {
        let _ = self.pending.push(batch);
    }

    #[inline]
    pub(crate) fn has_room(&self) -> bool {
        !self.pending.is_full()
    }

    /// Reads the word that waits write: the low half of a sequence number.
    #[inline]
    pub(crate) fn observe(&mut self, status: u32) {
        let behind = (self.submitted as u32).wrapping_sub(status);
        if let Some(completed) = self.submitted.checked_sub(behind.into()) {
            self.completed = completed;
        }
        // A word that goes back is an old wait's that came late. What is done is not pending any more, and stays done.
        let completed = self.completed;
        if completed == self.submitted {
            return self.pending.clear();
        }
        self.pending.retain(|batch| batch.done_at > completed);
    }

    /// The last sequence number that is known to have completed.
    pub(crate) fn completed(&self) -> u64 {
        self.completed
    }

    #[inline]
    pub(crate) fn completion(&self, ticket: Ticket) -> Completion {
        // Mostly nothing has failed, and nothing is pending.
        let failed = || ticket.0 <= self.forgotten || self.failed.contains(&ticket.0);
        let pending = || !self.pending.is_empty() && self.pending.iter().any(|batch| batch.ticket == ticket);
        if ticket.0 <= self.newest_failed && failed() {
            Completion::Failed
        } else if ticket.0 > self.submitted || pending() {
            Completion::Pending
        } else {
            Completion::Done
        }
    }

    #[inline]
    pub(crate) fn pending(&self) -> &[Batch] {
        &self.pending
    }

    pub(crate) fn find(&self, ticket: Ticket) -> Option<Batch> {
        self.pending.iter().find(|batch| batch.ticket == ticket).copied()
    }

    /// Notes that a batch is elsewhere in the queue.
    pub(crate) fn moved(&mut self, ticket: Ticket, change: impl FnOnce(&mut Batch)) {
        if let Some(batch) = self.pending.iter_mut().find(|batch| batch.ticket == ticket) {
            change(batch);
        }
    }

    /// A device TLB has not answered yet.
    pub(crate) fn waits_for_device(&self) -> bool {
        self.pending.iter().any(|batch| batch.asked.is_some())
    }

    /// Takes a ticket for failed, for good. Its places stay taken until it ends.
    pub(crate) fn fail(&mut self, ticket: Ticket) {
        for batch in self.pending.iter_mut().filter(|batch| batch.ticket == ticket) {
            batch.failed = true;
        }
        if self.failed.contains(&ticket.0) {
            return;
        }
        if self.failed.is_full()
            && let Some((at, &oldest)) = self.failed.iter().enumerate().min_by_key(|(_, ticket)| **ticket)
        {
            self.failed.swap_remove(at);
            self.forgotten = self.forgotten.max(oldest);
        }
        let _ = self.failed.push(ticket.0);
        self.newest_failed = self.newest_failed.max(ticket.0);
    }

    /// Takes a ticket for failed, and ended: nothing of it will happen any more.
    pub(crate) fn end(&mut self, ticket: Ticket) {
        self.fail(ticket);
        self.pending.retain(|batch| batch.ticket != ticket);
    }

    /// Starts to count anew how long the head of the queue takes.
    pub(crate) fn restart_clock(&mut self) {
        self.head.0 = 0;
    }

    /// Returns the batch that takes too long, now failed, and whether it is the one at the head of the queue.
    ///
    /// What waits behind others is not at the head: its time has not begun. That holds also where the head was told to be
    /// failed, as long as the unit is still at it; but a unit that is at it for once more its time, and more, does nothing any
    /// more, and so each of those times another ends, which is nobody's fault.
    pub(crate) fn overdue(&mut self, now_us: u64) -> Option<(Batch, bool)> {
        // What was aborted was queued again behind others.
        let head = *self.pending.iter().min_by_key(|batch| batch.done_at)?;
        if self.head.0 != head.done_at {
            self.head = (head.done_at, now_us);
        }
        let limit_us = if head.asked.is_some() { HEAD_LIMIT_US } else { UNIT_LIMIT_US };
        if now_us.saturating_sub(self.head.1) < limit_us {
            return None;
        }
        self.head.1 = now_us;
        let late = *self.pending.iter().filter(|batch| !batch.failed).min_by_key(|batch| batch.done_at)?;
        self.fail(late.ticket);
        Some((late, late.ticket == head.ticket))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(ticket: u64) -> Batch {
        Batch {
            ticket: Ticket(ticket),
            done_at: ticket,
            start: 0,
            end: 1,
            asked: None,
            drains: false,
            failed: false,
        }
    }

    /// Tickets of which `count` were queued.
    fn queued(count: u64) -> Tickets {
        let mut tickets = Tickets::new();
        for ticket in 1..=count {
            tickets.took();
            tickets.add(batch(ticket));
        }
        tickets
    }

    #[test]
    fn a_failed_ticket_stays_failed_whatever_completes_later() {
        let mut tickets = queued(3);
        tickets.fail(Ticket(2));

        tickets.observe(3);

        let all = [1, 2, 3, 4].map(|n| tickets.completion(Ticket(n)));
        assert_eq!(all, [Completion::Done, Completion::Failed, Completion::Done, Completion::Pending]);
    }

    #[test]
    fn a_status_that_goes_back_takes_nothing_back() {
        let mut tickets = queued(3);
        tickets.observe(3);

        tickets.observe(1);

        assert_eq!(tickets.completion(Ticket(3)), Completion::Done);
    }

    #[test]
    fn of_more_failures_than_are_remembered_none_becomes_done() {
        let mut tickets = queued(100);
        for ticket in (1..=100).step_by(2) {
            tickets.fail(Ticket(ticket));
        }

        tickets.observe(100);

        for ticket in 1..=100 {
            let completion = tickets.completion(Ticket(ticket));
            assert!(completion == Completion::Failed || ticket % 2 == 0, "{ticket}");
            assert!(completion == Completion::Done || ticket % 2 == 1 || ticket < 40, "{ticket}");
        }
    }

    #[test]
    fn time_counts_from_when_a_ticket_is_the_first() {
        let mut tickets = queued(2);
        assert!(tickets.overdue(10).is_none());
        // The first completes late; the second has all of its own time from then on.
        assert!(tickets.overdue(10 + UNIT_LIMIT_US - 1).is_none());
        tickets.observe(1);

        assert!(tickets.overdue(10 + UNIT_LIMIT_US).is_none());
        assert!(tickets.overdue(9 + 2 * UNIT_LIMIT_US).is_none());
        let (late, at_head) = tickets.overdue(10 + 2 * UNIT_LIMIT_US).expect("its time is over");

        assert_eq!((late.ticket, tickets.completion(Ticket(2))), (Ticket(2), Completion::Failed));
        assert!(at_head);
        assert_eq!(tickets.pending().len(), 1, "its places stay taken");
    }

    #[test]
    fn what_waits_for_a_device_has_the_time_that_a_device_has() {
        let mut tickets = queued(1);
        tickets.moved(Ticket(1), |batch| batch.asked = Some(StreamId(0x20)));
        assert!(tickets.overdue(10).is_none());

        assert!(tickets.overdue(9 + HEAD_LIMIT_US).is_none());
        assert!(tickets.overdue(10 + HEAD_LIMIT_US).is_some());
    }

    #[test]
    fn behind_one_that_was_told_to_be_failed_nothing_is_at_the_head() {
        let mut tickets = queued(3);
        tickets.moved(Ticket(1), |batch| batch.asked = Some(StreamId(0x20)));
        assert!(tickets.overdue(0).is_none());
        let first = tickets.overdue(HEAD_LIMIT_US).map(|(late, at_head)| (late.ticket, at_head));
        assert_eq!(first, Some((Ticket(1), true)));

        assert!(tickets.overdue(2 * HEAD_LIMIT_US - 1).is_none(), "the unit is still at the first");
        let second = tickets.overdue(2 * HEAD_LIMIT_US).map(|(late, at_head)| (late.ticket, at_head));
        assert_eq!(second, Some((Ticket(2), false)), "the unit does nothing");
        // It comes to life: the time of the third begins.
        tickets.observe(2);
        assert!(tickets.overdue(3 * HEAD_LIMIT_US).is_none());
        assert!(tickets.overdue(3 * HEAD_LIMIT_US + UNIT_LIMIT_US).is_some());
    }

    /// What an abort took is queued again, and so is not where it was.
    #[test]
    fn the_head_is_what_the_unit_is_at_and_not_what_was_submitted_first() {
        let mut tickets = queued(2);
        tickets.took();
        tickets.moved(Ticket(1), |batch| batch.done_at = 3);
        assert!(tickets.overdue(0).is_none());

        let late = tickets.overdue(UNIT_LIMIT_US).map(|(late, _)| late.ticket);

        assert_eq!(late, Some(Ticket(2)));
    }
}
