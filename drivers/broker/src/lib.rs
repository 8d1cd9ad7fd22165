//! Page requests between hardware and guests: exactly one answer to each group.
//!
//! Three parts, by who may touch them:
//!
//! - [`Attachments`]: which device's requests go where. Written by the control path, read by the interrupt handler, one
//!   atomic word at a time.
//! - [`Queue`]: the groups that one guest may have outstanding, in slots of atomic words. Any core may answer; whoever
//!   wins the one compare-and-swap mints the [`Answer`], and nobody else can.
//! - [`Broker`]: what the interrupt handler owns by `&mut`: groups that are not yet whole, and deadlines.
//!
//! A group travels: [`Broker::admit`] puts its requests together and says where the whole group waits;
//! [`Queue::deliver`] reads it for the guest; [`Queue::settle`] (the guest answered), [`Broker::expire`] (it did not) or
//! [`Queue::evict`] (the guest is gone) ends it.
//!
//! It never allocates, waits or takes a lock. With S slots in a queue, Q queues and A attachments, `admit` looks at no
//! more than A attachments and S slots, `settle` at one slot, `evict` at S, `expire` at Q * S deadlines.
//!
//! What it assumes of the hardware: a device does not reuse a group index before that group was answered. A device that
//! does has the second group dropped, and counted.
//!
//! ```
//! # use broker::*;
//! # use iommu::*;
//! # fn send(_: PageResponse) -> Result<(), (PageResponse, Error)> { Ok(()) }
//! fn interrupt(broker: &mut Broker<'_, 2, 32, 16>, request: PageRequest, now_us: u64) {
//!     match broker.admit(request, now_us) {
//!         Verdict::Forward { queue, slot } => { /* tell the guest's core that `slot` waits */ }
//!         Verdict::Answer(response) => { let _ = send(response); }
//!         Verdict::Nothing => {}
//!     }
//! }
//! ```
//!
//! | feature | supported | note |
//! |---|---|---|
//! | groups of several pages | yes | up to [`PAGES`]; longer ones are refused |
//! | deadlines for each attachment | yes | 0 refuses at once |
//! | budget for each attachment | yes | outstanding groups |
//! | stale, repeated, forged, foreign cookies | refused | and counted by kind |
//! | overflow of the hardware queue | yes | half-seen groups are discarded |
//! | rates, escalation, histograms | no | |
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

mod attachments;
mod cookie;
mod counters;
mod queue;
mod service;

pub use attachments::{AttachmentId, Attachments, Policy};
pub use cookie::Cookie;
pub use counters::{Counters, Tally};
pub use queue::{Answer, Group, PAGES, Page, Queue, Refusal};
pub use service::{ASSEMBLY_LIMIT_US, Broker, Verdict};
