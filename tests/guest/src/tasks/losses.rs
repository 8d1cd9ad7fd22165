//! LOSSES: its device does nothing, and other devices cause more faults than the unit has room for.

use super::DEVICE;
use crate::{
    calls::{counters, report, wait_interrupted},
    ensure,
    say::Failed,
    serve::Server,
};
use channel::counters::Counter;

/// Reports: 1, when it listens; then 2, the events that the channel says were lost, those that the counters say, and the
/// events that came.
pub fn run() -> Result<(), Failed> {
    let mut server = Server::open()?;
    ensure!(server.events_lost() == 0, "events were lost before there was any");
    report(&[1])?;
    let told = wait_interrupted(|| Ok((server.events_lost() > 0).then_some(())))?;
    ensure!(told.is_some(), "nobody said that events were lost, and no interrupt came");
    let counted = counters(DEVICE)?.get(Counter::LostEvents);
    while server.next_event().is_some() {}
    report(&[2, server.events_lost(), counted, server.events])
}
