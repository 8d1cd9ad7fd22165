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
/// How long a command may be at the head of the queue, in microseconds, before its ticket is taken for failed.
///
/// It is longer than units take to notice a device that does not answer (`FSTS.ITE`), which then comes first.
pub const HEAD_LIMIT_US: u64 = 1_000_000;

/// Whose device TLBs a batch waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Asked {
    Nobody,
    One(StreamId),
    Several,
}

impl Asked {
    pub(crate) fn and(self, stream: StreamId) -> Self {
        match self {
            Self::Nobody => Self::One(stream),
            Self::One(same) if same == stream => self,
            Self::One(_) | Self::Several => Self::Several,
        }
    }

    /// The device, where there is one alone.
    pub(crate) fn stream(self) -> Option<StreamId> {
        if let Self::One(stream) = self { Some(stream) } else { None }
    }
}

/// What was queued for one ticket. Its places in the queue are not used again before it has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Batch {
    pub(crate) ticket: Ticket,
    /// The sequence number whose completion is the ticket's.
    pub(crate) done_at: u64,
    /// Where its descriptors are in the queue: the first, and the one after the last, which is its wait.
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) asked: Asked,
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
    /// The ticket at the head of the queue, and since when at least.
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
        self.pending.iter().any(|batch| batch.asked != Asked::Nobody)
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

    /// Returns the batch that is at the head of the queue for too long, now failed.
    ///
    /// What waits behind others is not at the head: its time has not begun.
    pub(crate) fn overdue(&mut self, now_us: u64) -> Option<Batch> {
        let head = *self.pending.iter().find(|batch| !batch.failed)?;
        if self.head.0 != head.ticket.0 {
            self.head = (head.ticket.0, now_us);
        }
        if now_us.saturating_sub(self.head.1) < HEAD_LIMIT_US {
            return None;
        }
        self.fail(head.ticket);
        Some(head)
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
            asked: Asked::Nobody,
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
        assert!(tickets.overdue(10 + HEAD_LIMIT_US - 1).is_none());
        tickets.observe(1);

        assert!(tickets.overdue(10 + HEAD_LIMIT_US).is_none());
        assert!(tickets.overdue(9 + 2 * HEAD_LIMIT_US).is_none());
        let late = tickets.overdue(10 + 2 * HEAD_LIMIT_US).expect("its time is over");

        assert_eq!((late.ticket, tickets.completion(Ticket(2))), (Ticket(2), Completion::Failed));
        assert_eq!(tickets.pending().len(), 1, "its places stay taken");
    }
}
