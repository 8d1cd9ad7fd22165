//! The SMMUv3 driver against the modelled unit, with a stream table of two levels: all that holds with a
//! linear one, and what is about the levels.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

/// How the units here behave.
const HARDWARE: hosted::Hardware = hosted::Hardware::Prompt;
/// The stream table of every machine here.
const STREAM_TABLE: hosted::smmu::StreamTable = hosted::smmu::StreamTable::TwoLevels;

#[path = "smmu/levels.rs"]
mod levels;
#[path = "smmu/suite.rs"]
mod suite;
