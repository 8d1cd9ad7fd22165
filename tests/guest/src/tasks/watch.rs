//! WATCH: what concerns another guest is not seen here.

use crate::{
    calls::{report, sleep_until},
    ensure, machine,
    say::Failed,
    serve::Server,
};

const STEP_US: u64 = 1_000;
const STEPS: u64 = 20;

/// Reports: events, interrupts, groups of page requests; all of them must be 0.
pub fn run() -> Result<(), Failed> {
    let mut server = Server::open()?;
    sleep_until(STEP_US, STEPS, || {
        let seen = server.next_group()?.is_some() | server.next_event().is_some();
        Ok((seen || machine::interrupts() > 0).then_some(()))
    })?;
    let seen = [server.events, machine::interrupts(), server.groups];
    report(&seen)?;
    ensure!(seen == [0; 3], "saw {} events, {} interrupts, {} groups", seen[0], seen[1], seen[2]);
    Ok(())
}
