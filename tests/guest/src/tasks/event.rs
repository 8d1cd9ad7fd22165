//! EVENT: accesses that nobody can repair come back as events, numbered.

use super::{Bench, DEVICE};
use crate::{
    calls::report,
    device::{DMA_ERROR, UNTRANSLATED, WRITE},
    ensure, machine,
    say::Failed,
};
use channel::{
    call::NONE,
    record::{Event, Reason, Wanted},
};
use iommu::{Iova, Pasid, Perms};

const OPAQUE: u64 = 0xE7E47;

/// Where the device writes, one after the other.
const ADDRESSES: [u64; 3] = [0x5000_3000, 0x5000_5000, 0x5000_7000];

/// Reports: events, interrupts, groups of page requests. In a second stage, a page that is not there may be one that permits
/// nothing.
pub fn run(second_stage: bool) -> Result<(), Failed> {
    let mut bench = Bench::set_up(OPAQUE, NONE)?;
    let mut before = None;
    for address in ADDRESSES {
        // The last one finds the guest asleep, which then can only be woken.
        let is_late = address == ADDRESSES[2];
        refused_write(&mut bench, address, before, is_late, second_stage)?;
        bench.server.expect_interrupt()?;
        before = Some(address);
    }
    bench.assigned.detach()?;
    while let Some(event) = bench.server.next_event() {
        check(&bench, &event, ADDRESSES[2], second_stage)?;
    }
    ensure!(bench.server.next_group()?.is_none(), "a write without page requests made one");
    report(&[bench.server.events, machine::interrupts(), bench.server.groups])
}

/// Has the device write to `address`, where nothing is mapped; this must become an event.
///
/// A machine may split an access and report each part, so the address `before` may come once more.
fn refused_write(
    bench: &mut Bench,
    address: u64,
    before: Option<u64>,
    is_late: bool,
    second_stage: bool,
) -> Result<(), Failed> {
    const CONTROL: u32 = UNTRANSLATED | WRITE;
    if is_late {
        while let Some(event) = bench.server.next_event() {
            check(bench, &event, before.unwrap_or(address), second_stage)?;
        }
        bench.assigned.start_late(0, address, 8, 0xBAD, CONTROL)?;
    } else {
        bench.assigned.start(0, address, 8, 0xBAD, CONTROL)?;
        bench.assigned.device.expect_failure(0, DMA_ERROR)?;
    }
    loop {
        let event = bench.server.wait_event()?;
        if before == Some(event.iova.0) {
            check(bench, &event, event.iova.0, second_stage)?;
            continue;
        }
        if is_late {
            bench.assigned.expect_early()?;
            bench.assigned.device.expect_failure(0, DMA_ERROR)?;
        }
        return check(bench, &event, address, second_stage);
    }
}

/// Checks that `event` is the next one, and in every field what a refused write to `address` is.
fn check(bench: &Bench, event: &Event, address: u64, second_stage: bool) -> Result<(), Failed> {
    let permits_nothing = second_stage && event.reason == Reason::NotPermitted;
    let number = bench.server.events;
    let expected = Event {
        number,
        lost: 0,
        device: DEVICE as u32,
        pasid: bench.assigned.pasid,
        opaque: OPAQUE,
        iova: Iova(address),
        perms: Perms { write: true, ..Perms::default() },
        reason: if permits_nothing { event.reason } else { Reason::NotMapped },
    };
    let Event { number: found, lost, iova: Iova(iova), opaque, perms, reason, .. } = *event;
    ensure!(
        *event == expected,
        "event {number} at {address:#x}: {found}, {lost} lost, {iova:#x} {reason:?} {:?} {opaque:#x} {:x?}",
        Wanted::from(perms),
        event.pasid.map(Pasid::value)
    );
    Ok(())
}
