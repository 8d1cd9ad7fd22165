//! Page requests between hardware and guests: exactly one answer to each group.
//!
//! Three parts, by who may touch them:
//!
//! - [`Ledger`]: what all cores share: the queues, each with the groups that its owner may have outstanding, in slots of
//!   atomic words; the devices with their budgets and counts; which device's requests go where. Any core may answer;
//!   whoever wins the one compare-and-swap mints the [`Answer`], and nobody else can.
//! - [`Broker`]: what the interrupt handler owns by `&mut`: groups that are not yet whole, and deadlines.
//! - [`Inbox`]: what the core of a queue's owner receives, through a ring that the handler never waits for.
//!
//! A group travels: [`Broker::admit`] puts its requests together and announces the whole group; [`Inbox::take`] shows it
//! to its owner; [`Ledger::settle`] (the owner answered), [`Broker::expire`] (it did not) or [`Ledger::evict`] (what it
//! belongs to is gone) ends it.
//!
//! It never allocates, waits or takes a lock, and each method says what it looks at: nothing in the interrupt handler grows
//! with the number of devices, attachments or groups. What a device is promised: its answer leaves at the latest when
//! interrupt latency, its deadline, one tick ([`TICK_US`]) and the entries before it in the same pass have gone by.
//!
//! What it assumes of the hardware: a device does not reuse a group index before that group was answered. One that does gets
//! one answer for both, is counted, and is [warned](Restraint::Warned).
//!
//! ```
//! # use broker::*;
//! # use iommu::*;
//! # fn send(_: PageResponse) -> Result<(), (PageResponse, Error)> { Ok(()) }
//! # type Hv = Ledger<2, 32, 8, 16>;
//! fn interrupt(broker: &mut Broker<'_, 2, 32, 8, 16, 96>, request: PageRequest, now_us: u64) {
//!     match broker.admit(&request, now_us) {
//!         Verdict::Forward { queue } => { /* kick the core of the queue's owner */ }
//!         Verdict::Refuse(response) => { let _ = send(response); }
//!         Verdict::End(answer) => { let _ = answer.send(send); }
//!         Verdict::Nothing => {}
//!     }
//! }
//! ```
//!
//! | feature | supported | note |
//! |---|---|---|
//! | groups of several pages | yes | up to [`PAGES`]; longer ones are refused |
//! | deadlines for each device | yes | 0 refuses at once; up to [`DEADLINE_MAX_US`] |
//! | budget and rate for each device | yes | outstanding requests; requests each second |
//! | escalation | yes | [`Restraint`]: told, throttled, requests off, blocked; the last two are the hypervisor's to carry out |
//! | unrecoverable faults | counted for each device | more than its [`FaultLimits`] in a period: told, then blocked |
//! | success without repair | yes | the device's answers are held back, for longer each time |
//! | stale, repeated, forged, foreign cookies | refused | and counted by kind |
//! | response failure by a guest | virtual | hardware hears that the pages are invalid |
//! | overflow of the hardware queue | yes | half-seen groups are discarded |
//! | a guest that owns its PASIDs | yes | [`Requests::Any`] |
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod attachments;
mod cookie;
mod counters;
mod deadlines;
mod devices;
mod directory;
mod events;
mod faults;
mod groups;
mod inbox;
mod ledger;
mod queue;
mod service;

pub use attachments::{AttachmentId, Policy, Requests};
pub use cookie::Cookie;
pub use counters::{BUCKETS, Missed, Tally};
pub use deadlines::{Deadlines, Due, TICK_US};
pub use devices::{DEADLINE_MAX_US, DeviceId, Escalation, Latencies, Limits, Restraint};
pub use events::{EventReceiver, EventSender, Lost, events};
pub use faults::{FaultCount, FaultLimits};
pub use inbox::{Inbox, Taken};
pub use ledger::{Error, Faulted, Ledger, Owner, QueueId, Settled, Whose};
pub use queue::{Answer, Group, PAGES, Page, Refusal, Shown};
pub use service::{ASSEMBLY_LIMIT_US, Broker, Expiry, POISONED, RingError, Verdict};
