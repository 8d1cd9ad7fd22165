//! What the interrupt handler owns: groups that are not yet whole, and deadlines.

use crate::{Answer, AttachmentId, Attachments, Cookie, Queue, counters::count};
use heapless::Vec;
use iommu::{GroupTag, Outcome, PageRequest, PageResponse, StreamId};

/// Groups that may be half-seen at one time, over all queues.
const ASSEMBLING: usize = 32;
/// Groups that are remembered as spoilt, until their last request comes, over all queues.
const SPOILT: usize = 32;

/// How long a group may take to be whole, in microseconds. After that it is discarded, without an answer: none is owed
/// before the last request.
pub const ASSEMBLY_LIMIT_US: u64 = 1_000_000;

/// What to do about a request that was just reported.
#[derive(Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[must_use = "a verdict may hold the answer that a device waits for"]
pub enum Verdict {
    /// A whole group waits: tell the core that serves `queue` of `slot`.
    Forward {
        /// The queue.
        queue: u8,
        /// The slot in it.
        slot: u8,
    },
    /// Send this answer.
    Answer(PageResponse),
    /// Nothing now.
    Nothing,
}

/// A group that is not yet whole.
#[derive(Clone, Copy, Debug)]
struct Assembling {
    stream: StreamId,
    tag: GroupTag,
    queue: u8,
    slot: u8,
    attachment: AttachmentId,
    opened_us: u64,
}

/// A group whose last request will be answered as `outcome`, whatever comes before it.
#[derive(Clone, Copy, Debug)]
struct Spoilt {
    stream: StreamId,
    tag: GroupTag,
    queue: u8,
    attachment: AttachmentId,
    since_us: u64,
    outcome: Outcome,
    /// Whether the group is counted as discarded already, so that the answer does not close it a second time.
    counted: bool,
}

/// When a group's guest must have answered.
#[derive(Clone, Copy, Debug)]
struct Deadline {
    cookie: Cookie,
    at_us: u64,
}

/// The interrupt handler's part, over `Q` queues of `S` slots and `A` attachments.
#[derive(Debug)]
pub struct Broker<'q, const Q: usize, const S: usize, const A: usize> {
    queues: [&'q Queue<S>; Q],
    attachments: &'q Attachments<A>,
    assembling: Vec<Assembling, ASSEMBLING>,
    /// In the order in which they were spoilt.
    spoilt: Vec<Spoilt, SPOILT>,
    /// Of each slot that was forwarded and not yet seen settled.
    deadlines: [[Option<Deadline>; S]; Q],
}

impl<'q, const Q: usize, const S: usize, const A: usize> Broker<'q, Q, S, A> {
    /// Half-seen groups that one queue may have, so that none can take the places of another.
    const ASSEMBLING_SHARE: usize = ASSEMBLING / Q;
    /// Spoilt groups that one queue may have.
    const SPOILT_SHARE: usize = SPOILT / Q;

    /// A broker over `queues`, with the requests of `attachments`.
    pub const fn new(queues: [&'q Queue<S>; Q], attachments: &'q Attachments<A>) -> Self {
        Self { queues, attachments, assembling: Vec::new(), spoilt: Vec::new(), deadlines: [[None; S]; Q] }
    }

    /// Takes in one request that hardware reported.
    pub fn admit(&mut self, request: PageRequest, now_us: u64) -> Verdict {
        if let Some(verdict) = self.admit_spoilt(&request) {
            return verdict;
        }
        if let Some(at) =
            self.assembling.iter().position(|g| g.stream == request.stream && g.tag == request.tag)
        {
            return self.admit_part(at, &request, now_us);
        }
        let Some((attachment, policy)) = self.attachments.find(request.stream, request.tag.pasid) else {
            // Nobody to ask. Parts that are not the last want no answer.
            return refusal(&request, Outcome::Invalid);
        };
        let Some(&queue) = self.queues.get(usize::from(policy.queue)) else {
            return refusal(&request, Outcome::Invalid);
        };
        let (outstanding, same_group) = Self::outstanding(queue, &request);
        if same_group {
            // Its answer, which is one, is still to come.
            count(&queue.counters().duplicates);
            return Verdict::Nothing;
        }
        count(&queue.counters().opened);
        let assembling = self.assembling.iter().filter(|g| g.attachment == attachment).count();
        let over_budget = outstanding + assembling >= usize::from(policy.budget);
        if over_budget || policy.deadline_us == 0 {
            return self.refuse(queue, policy.queue, attachment, &request, now_us);
        }
        let Some(slot) = queue.open(&policy, request.tag) else {
            return self.refuse(queue, policy.queue, attachment, &request, now_us);
        };
        // A new slot has room for one page.
        let _ = queue.add(slot, &request);
        if request.last {
            return self.forward(policy.queue, slot, policy.deadline_us, now_us);
        }
        let begun = self.assembling.iter().filter(|g| g.queue == policy.queue).count();
        let group = Assembling {
            stream: request.stream,
            tag: request.tag,
            queue: policy.queue,
            slot,
            attachment,
            opened_us: now_us,
        };
        if begun >= Self::ASSEMBLING_SHARE || self.assembling.push(group).is_err() {
            queue.discard(slot);
            return self.refuse(queue, policy.queue, attachment, &request, now_us);
        }
        Verdict::Nothing
    }

    /// A further request of a group that is being put together.
    fn admit_part(&mut self, at: usize, request: &PageRequest, now_us: u64) -> Verdict {
        let group = self.assembling[at];
        let Some(&queue) = self.queues.get(usize::from(group.queue)) else { return Verdict::Nothing };
        let policy =
            self.attachments.find(group.stream, group.tag.pasid).filter(|(id, _)| *id == group.attachment);
        let (Some((_, policy)), true) = (policy, queue.add(group.slot, request)) else {
            // Too many pages, or its attachment is leaving.
            self.assembling.swap_remove(at);
            queue.discard(group.slot);
            return self.refuse(queue, group.queue, group.attachment, request, now_us);
        };
        if !request.last {
            return Verdict::Nothing;
        }
        self.assembling.swap_remove(at);
        self.forward(group.queue, group.slot, policy.deadline_us, now_us)
    }

    /// A request of a group that was spoilt earlier.
    fn admit_spoilt(&mut self, request: &PageRequest) -> Option<Verdict> {
        let at = self.spoilt.iter().position(|g| g.stream == request.stream && g.tag == request.tag)?;
        if !request.last {
            return Some(Verdict::Nothing);
        }
        let Spoilt { queue, outcome, counted, .. } = self.spoilt.remove(at);
        if !counted && let Some(queue) = self.queues.get(usize::from(queue)) {
            count(&queue.counters().refused);
        }
        Some(refusal(request, outcome))
    }

    fn forward(&mut self, queue: u8, slot: u8, deadline_us: u64, now_us: u64) -> Verdict {
        let Some(of) = self.queues.get(usize::from(queue)) else { return Verdict::Nothing };
        let Some(cookie) = of.cookie(slot) else { return Verdict::Nothing };
        let at_us = now_us.saturating_add(deadline_us);
        self.deadlines[usize::from(queue)][usize::from(slot)] = Some(Deadline { cookie, at_us });
        of.complete(slot);
        Verdict::Forward { queue, slot }
    }

    /// Refuses a group: now if this is its last request, else when that comes.
    fn refuse(
        &mut self,
        queue: &Queue<S>,
        number: u8,
        attachment: AttachmentId,
        request: &PageRequest,
        now_us: u64,
    ) -> Verdict {
        if request.last {
            count(&queue.counters().refused);
        } else {
            let PageRequest { stream, tag, .. } = *request;
            let outcome = Outcome::Invalid;
            let since_us = now_us;
            self.spoil(Spoilt { stream, tag, queue: number, attachment, since_us, outcome, counted: false });
        }
        refusal(request, Outcome::Invalid)
    }

    /// Remembers a group as spoilt. If its queue has too many, the oldest of them is forgotten: its last request will look like a
    /// group of one page, the guest repairs that page, and the device asks again for the others.
    fn spoil(&mut self, group: Spoilt) {
        let of_queue = |g: &Spoilt| g.queue == group.queue;
        if self.spoilt.iter().filter(|g| of_queue(g)).count() >= Self::SPOILT_SHARE
            && let Some(oldest) = self.spoilt.iter().position(of_queue)
        {
            let oldest = self.spoilt.remove(oldest);
            self.forget(oldest);
        }
        // There is room: one was taken out if there was none.
        let _ = self.spoilt.push(group);
    }

    /// Takes note that the last request of a spoilt group will not come, or will not be known for what it is.
    fn forget(&self, group: Spoilt) {
        if !group.counted
            && let Some(queue) = self.queues.get(usize::from(group.queue))
        {
            count(&queue.counters().discarded);
        }
    }

    /// Forgets spoilt groups, so that a later group with the same number is not taken for them.
    fn forget_where(&mut self, gone: impl Fn(&Spoilt) -> bool) {
        while let Some(at) = self.spoilt.iter().position(&gone) {
            let group = self.spoilt.remove(at);
            self.forget(group);
        }
    }

    /// Counts the groups of the request's attachment that wait in `queue`, and tells whether its own group is one of them.
    fn outstanding(queue: &Queue<S>, request: &PageRequest) -> (usize, bool) {
        let live = (0..S as u8).filter_map(|slot| queue.live(slot));
        live.filter(|(_, stream, tag)| *stream == request.stream && tag.pasid == request.tag.pasid)
            .fold((0, false), |(groups, same), (_, _, tag)| (groups + 1, same || tag == request.tag))
    }

    /// Hardware lost requests, and the queue is empty: whatever is half-seen is gone, and hardware has answered it.
    ///
    /// If the last request of such a group was not lost but comes later, it is answered with success, so that the device
    /// asks again for all of it.
    pub fn overflowed(&mut self, now_us: u64) {
        // The last requests of groups that were spoilt before may be lost as well, and their numbers in use again.
        for group in &mut self.spoilt {
            group.outcome = Outcome::Success;
        }
        while let Some(group) = self.assembling.pop() {
            self.discard(group);
            let Assembling { stream, tag, queue, attachment, .. } = group;
            let outcome = Outcome::Success;
            self.spoil(Spoilt { stream, tag, queue, attachment, since_us: now_us, outcome, counted: true });
        }
    }

    /// Discards half-seen groups whose attachment is leaving; part of a drain.
    pub fn discard_leaving(&mut self) {
        let attachments = self.attachments;
        self.discard_where(|group| !attachments.is_live(group.attachment));
        self.forget_where(|group| !attachments.is_live(group.attachment));
    }

    fn discard_where(&mut self, gone: impl Fn(&Assembling) -> bool) {
        while let Some(at) = self.assembling.iter().position(&gone) {
            let group = self.assembling.swap_remove(at);
            self.discard(group);
        }
    }

    fn discard(&self, group: Assembling) {
        if let Some(queue) = self.queues.get(usize::from(group.queue)) {
            queue.discard(group.slot);
            count(&queue.counters().discarded);
        }
    }

    /// Ends one group whose guest ran out of time; call it until it returns `None`.
    ///
    /// Half-seen groups that are too old are discarded on the way.
    pub fn expire(&mut self, now_us: u64) -> Option<Answer<'q, S>> {
        self.discard_where(|group| now_us.saturating_sub(group.opened_us) >= ASSEMBLY_LIMIT_US);
        self.forget_where(|group| now_us.saturating_sub(group.since_us) >= ASSEMBLY_LIMIT_US);
        for (queue, deadlines) in self.queues.iter().zip(&mut self.deadlines) {
            for deadline in deadlines {
                let Some(Deadline { cookie, at_us }) = *deadline else { continue };
                if at_us > now_us {
                    continue;
                }
                *deadline = None;
                // A group that was settled in time is not there any more.
                if let Some(answer) = queue.expire(cookie) {
                    return Some(answer);
                }
            }
        }
        None
    }

    /// Returns when the next group runs out of time, if any is outstanding; in microseconds, on the clock of `admit`.
    pub fn next_deadline_us(&self) -> Option<u64> {
        let waiting = self.queues.iter().zip(&self.deadlines).flat_map(|(queue, deadlines)| {
            let live =
                |d: &&Deadline| queue.live(d.cookie.slot()).is_some_and(|(cookie, ..)| cookie == d.cookie);
            deadlines.iter().flatten().filter(live).map(|d| d.at_us)
        });
        let began = self.assembling.iter().map(|g| g.opened_us).chain(self.spoilt.iter().map(|g| g.since_us));
        waiting.chain(began.map(|us| us.saturating_add(ASSEMBLY_LIMIT_US))).min()
    }
}

/// The answer of a request that ends its group; nothing for one that does not.
fn refusal(request: &PageRequest, outcome: Outcome) -> Verdict {
    if request.last {
        Verdict::Answer(PageResponse { stream: request.stream, tag: request.tag, outcome })
    } else {
        Verdict::Nothing
    }
}
