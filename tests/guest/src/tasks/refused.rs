//! REFUSED: an interrupt of the guest's device that the unit refused comes back as an event.

use super::DEVICE;
use crate::{calls::report, ensure, say::Failed, serve::Server};
use channel::record::{Event, Reason};
use iommu::{Iova, Perms};

/// Waits for one event, which says that the device may not write its message, and not which entry of whose table it named.
///
/// Reports: that it waits; events.
pub fn run() -> Result<(), Failed> {
    let mut server = Server::open()?;
    report(&[1, 0])?;
    let event = server.wait_event()?;
    let expected = Event {
        number: server.events,
        lost: 0,
        device: DEVICE as u32,
        pasid: None,
        opaque: 0,
        iova: Iova(0),
        perms: Perms { write: true, ..Perms::default() },
        reason: Reason::Other,
    };
    ensure!(event == expected, "the event is {event:?}");
    server.expect_interrupt()?;
    report(&[1, server.events])
}
