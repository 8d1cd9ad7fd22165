//! The VT-d driver against a modelled unit whose queue is full: all that holds where there is room.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

/// How the units here behave.
const HARDWARE: hosted::Hardware = hosted::Hardware::Full;

#[path = "vtd/suite.rs"]
mod suite;
