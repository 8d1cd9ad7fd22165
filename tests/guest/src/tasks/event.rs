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

/// Reports: events, interrupts, groups of page requests.
pub fn run() -> Result<(), Failed> {
    let mut bench = Bench::set_up(OPAQUE, NONE)?;
    refused_write(&mut bench, 0x5000_3000, 1)?;
    bench.server.wait_interrupt()?;
    refused_write(&mut bench, 0x5000_5000, 2)?;
    bench.assigned.detach()?;
    ensure!(bench.server.next_event().is_none(), "two refused writes made more than two events");
    ensure!(bench.server.next_group()?.is_none(), "a write without page requests made one");
    report(&[bench.server.events, machine::interrupts(), bench.server.groups])
}

/// Has the device write to `address`, where nothing is mapped; this must become the event `number`.
fn refused_write(bench: &mut Bench, address: u64, number: u64) -> Result<(), Failed> {
    bench.assigned.start(0, address, 8, 0xBAD, UNTRANSLATED | WRITE)?;
    bench.assigned.device.expect_failure(0, DMA_ERROR)?;
    let event = bench.server.wait_event()?;
    let expected = Event {
        number,
        lost: 0,
        device: DEVICE as u32,
        pasid: bench.assigned.pasid,
        opaque: OPAQUE,
        iova: Iova(address),
        perms: Perms { write: true, ..Perms::default() },
        reason: Reason::NotMapped,
    };
    let Event { number: found, lost, iova: Iova(iova), opaque, perms, reason, .. } = event;
    ensure!(
        event == expected,
        "event {number} at {address:#x}: {found}, {lost} lost, {iova:#x} {reason:?} {:?} {opaque:#x} {:x?}",
        Wanted::from(perms),
        event.pasid.map(Pasid::value)
    );
    Ok(())
}
