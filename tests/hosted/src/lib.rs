//! What the hosted tests share: a machine with a unit in service, memory for tables and channels, random numbers.
//!
//! The tests themselves are in `tests/`, a file for each thing that they are about. Expected words come from the
//! manual's field tables, never from the driver: each test that has them says how they were worked out.
#![forbid(unsafe_code)]
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

pub mod fuzz;
mod hardware;
pub mod interleave;
pub mod iort;
mod machine;
mod memory;
mod random;
pub mod rig;
pub mod smmu;
pub mod sync;
mod tapped;
mod threads;
pub mod tree;

// What `core` is beside `sync`, where this package stands in for it.
#[doc(no_inline)]
pub use core::{fmt, iter, mem, ops, ptr};

pub use hardware::Hardware;
pub use machine::{Machine, needs, unit};
pub use memory::{TableFrames, TableWords, Window};
pub use models::memory::{grant, root, trust};
pub use random::Random;
pub use tapped::{Moment, Tapped};
pub use threads::Ends;
