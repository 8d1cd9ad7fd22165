//! WATCH: what concerns another guest is not seen here.

use crate::{
    calls::{report, sleep_until},
    ensure, machine,
    memory::{PAGE_WORDS, PAGES},
    say::Failed,
    serve::Server,
};

const STEP_US: u64 = 1_000;
/// What the guest's page holds while it watches.
const SEED: u64 = 0x3A7C;

/// Watches for `steps` milliseconds. Reports: events, interrupts, groups of page requests, all of which must be 0; and
/// before it watches, where the page lies that must not change meanwhile.
pub fn run(steps: u64) -> Result<(), Failed> {
    let mut server = Server::open()?;
    let page = &PAGES[0];
    page.fill(SEED);
    report(&[0, 0, 0, page.address()])?;
    sleep_until(STEP_US, steps, || {
        let seen = server.next_group()?.is_some() | server.next_event().is_some();
        Ok((seen || machine::interrupts() > 0).then_some(()))
    })?;
    let seen = [server.events, machine::interrupts(), server.groups];
    report(&seen)?;
    ensure!(page.is_filled(SEED, 0..PAGE_WORDS), "the page at {:#x} changed", page.address());
    ensure!(seen == [0; 3], "saw {} events, {} interrupts, {} groups", seen[0], seen[1], seen[2]);
    Ok(())
}
