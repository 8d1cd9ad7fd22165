//! The SMMUv3 driver against a modelled unit whose queue is full: all that holds where there is room.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

/// How the units here behave.
const HARDWARE: hosted::Hardware = hosted::Hardware::Full;
/// The stream table of every machine here.
const STREAM_TABLE: hosted::smmu::StreamTable = hosted::smmu::StreamTable::TwoLevels;

#[path = "smmu/levels.rs"]
mod levels;
#[path = "smmu/suite.rs"]
mod suite;
