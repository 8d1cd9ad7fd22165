//! The VT-d driver against the modelled unit.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

/// How the units here behave.
const HARDWARE: hosted::Hardware = hosted::Hardware::Prompt;

#[path = "vtd/suite.rs"]
mod suite;
