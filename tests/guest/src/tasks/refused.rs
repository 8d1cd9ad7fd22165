//! REFUSED: an interrupt of the guest's device that the unit refused comes back as an event; and the page to which devices
//! write their messages is not the guest's.

use super::{Bench, DEVICE, RELEASE};
use crate::{
    calls::{Refusal, ask, demand, report, sleep_until},
    ensure, machine,
    memory::{PAGES, try_write},
    say::Failed,
    serve::Server,
};
use channel::{
    Call, Status,
    call::{NONE, WRITABLE},
    record::{Event, Reason},
};
use iommu::{Iova, PAGE_SIZE, Perms};

const STEP_US: u64 = 10_000;
const STEPS: u64 = 300;

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

/// Attaches the device, tries to reach and to change the page at `doorbell`, and keeps the device attached until told to go
/// on.
///
/// Reports: 1, when the device is attached.
pub fn at_the_doorbell(doorbell: u64) -> Result<(), Failed> {
    let mut bench = Bench::set_up(0xD00B, NONE)?;
    let register = doorbell + machine::MESSAGES % PAGE_SIZE;
    ensure!(machine::try_read(register).is_none(), "the guest itself reads at {register:#x}");
    ensure!(!try_write(register, 1), "the guest itself writes to {register:#x}");
    let attachment = bench.assigned.attachment;
    let tries = [
        (Call::Unmap, [attachment, doorbell, PAGE_SIZE, 0]),
        (Call::Map, [attachment | WRITABLE, doorbell, PAGES[0].address(), PAGE_SIZE]),
    ];
    for (call, arguments) in tries {
        let answer = ask(call, arguments);
        let refused = answer == Err(Refusal::For(Status::WrongState));
        ensure!(refused, "{call:?} of the doorbell: {answer:x?}");
    }
    report(&[1])?;
    sleep_until(STEP_US, STEPS, || {
        let [task, ..] = demand(Call::Task, [0; 4])?;
        Ok((task == RELEASE).then_some(()))
    })?;
    bench.assigned.detach()
}
