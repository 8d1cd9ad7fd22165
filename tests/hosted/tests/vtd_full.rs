//! The VT-d driver against a modelled unit whose queue is full: all that holds where there is room.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

/// How the units here behave.
const HARDWARE: hosted::Hardware = hosted::Hardware::Full;

#[path = "vtd/bring_up.rs"]
mod bring_up;
#[path = "vtd/commands.rs"]
mod commands;
#[path = "vtd/events.rs"]
mod events;
#[path = "vtd/interrupts.rs"]
mod interrupts;
#[path = "vtd/modes.rs"]
mod modes;
#[path = "vtd/recovery.rs"]
mod recovery;
#[path = "vtd/tables.rs"]
mod tables;
#[path = "vtd/takeover.rs"]
mod takeover;
#[path = "vtd/units.rs"]
mod units;
