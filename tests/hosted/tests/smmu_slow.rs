//! The SMMUv3 driver against a modelled unit that is slow: all that holds with a prompt one.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

/// How the units here behave.
const HARDWARE: hosted::Hardware = hosted::Hardware::Slow;
/// The stream table of every machine here.
const STREAM_TABLE: hosted::smmu::StreamTable = hosted::smmu::StreamTable::Linear;

#[path = "smmu/suite.rs"]
mod suite;
