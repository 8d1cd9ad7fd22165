//! The broker, compiled a second time with atomics that loom controls; and what the channel needs for the same.
//!
//! loom runs a model of a few threads in every interleaving of their atomic accesses, and lets each load see every value
//! that the memory order allows. The source is the product's own: in this crate `core` is [`sync`] and a few modules of the
//! real one, and `heapless` has a ring of ours ([`spsc`]). The models are in `tests/`.
#![expect(unexpected_cfgs, reason = "the features of the broker are not those of this package")]

extern crate self as core;
extern crate self as heapless;

mod dma;
pub mod spsc;
pub mod sync;

pub use dma::DmaBuf;
// For the channel, to which this crate is `iommu` as well.
#[doc(no_inline)]
pub use iommu::{FaultReason, Field, Iova, Pasid, Perms, Words, descriptor};

#[doc(no_inline)]
pub use real_heapless::Vec;
#[doc(no_inline)]
pub use std::{array, fmt, mem, ops, ptr};

#[path = "../../../drivers/broker/src/attachments.rs"]
mod attachments;
#[path = "../../../drivers/broker/src/cookie.rs"]
mod cookie;
#[path = "../../../drivers/broker/src/counters.rs"]
mod counters;
#[path = "../../../drivers/broker/src/deadlines.rs"]
mod deadlines;
#[path = "../../../drivers/broker/src/devices.rs"]
mod devices;
#[path = "../../../drivers/broker/src/directory.rs"]
mod directory;
#[path = "../../../drivers/broker/src/faults.rs"]
mod faults;
#[path = "../../../drivers/broker/src/groups.rs"]
mod groups;
#[path = "../../../drivers/broker/src/inbox.rs"]
mod inbox;
#[path = "../../../drivers/broker/src/ledger.rs"]
mod ledger;
#[path = "../../../drivers/broker/src/queue.rs"]
mod queue;
#[path = "../../../drivers/broker/src/service.rs"]
mod service;

pub use attachments::{AttachmentId, Policy, Requests};
pub use cookie::Cookie;
pub use counters::{BUCKETS, Missed, Tally};
pub use deadlines::{Deadlines, Due, TICK_US};
pub use devices::{DEADLINE_MAX_US, DeviceId, Escalation, Latencies, Limits, Restraint};
pub use faults::{FaultCount, FaultLimits};
pub use inbox::{Inbox, Taken};
pub use ledger::{Error, Faulted, Ledger, Owner, QueueId, Settled, Whose};
pub use queue::{Answer, Group, PAGES, Page, Refusal, Shown};
pub use service::{ASSEMBLY_LIMIT_US, Broker, Expiry, POISONED, RingError, Verdict};
