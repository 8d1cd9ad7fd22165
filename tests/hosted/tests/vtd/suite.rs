//! All that holds of VT-d whatever the hardware is like.

mod bring_up;
mod commands;
mod events;
mod interrupts;
mod modes;
mod recovery;
mod tables;
mod takeover;
mod units;
