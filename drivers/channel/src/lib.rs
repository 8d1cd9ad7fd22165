//! What a guest sees: the fault channel's two rings, and the calls that go with them.
//!
//! The wire layout is defined once, in [`record`] and [`ring`]; the hypervisor's side is [`host`], a Rust guest's side is
//! [`guest`], a C guest's side is made by [`header`]; the operations are in [`call`].
//!
//! The frames of the rings belong to the hypervisor. The guest reads them and cannot write them; its consumer indices
//! live in a frame of their own, and are only ever numbers: an impossible one ends the channel.
//!
//! Both sides reach the rings, and the arrays that a call names, through their caches. On Arm a guest begins without any: it
//! turns them on, and maps both as normal write-back memory, before it opens the channel.
//!
//! | feature | supported | note |
//! |---|---|---|
//! | requests, a group at a time | yes | a group becomes visible whole |
//! | events, lossy and numbered | yes | each record says how many were lost before it |
//! | losses | yes | two sums in the header, so that the last ones are seen too |
//! | C header | yes | `include/portcullis.h`, made by [`header`] |
//! | invalidation arrays | yes | pages, VT-d first stage, SMMUv3 commands: [`invalidate`]; the hypervisor here serves the first |
//! | counters of a device | yes | [`counters`] |
//! | response failure | virtual | hardware hears that the pages are invalid; the device may ask for no more |
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

#[macro_use]
mod numbered;
pub mod call;
pub mod counters;
pub mod guest;
pub mod header;
pub mod host;
pub mod invalidate;
pub mod record;
pub mod ring;

pub use call::{Call, Code, Status};
pub use record::Record;
