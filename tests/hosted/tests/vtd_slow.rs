//! The VT-d driver against a modelled unit that is slow: all that holds with a prompt one.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

/// How the units here behave.
const HARDWARE: hosted::Hardware = hosted::Hardware::Slow;

#[path = "vtd/suite.rs"]
mod suite;
