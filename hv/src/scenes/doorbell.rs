//! Where messages of devices are translated as their other writes are: who reaches the page that takes them.

use super::{
    PATIENCE_US, Seen, Unexpected, Writer, expect, interrupts,
    interrupts::{Became, Sender},
    is_of_unmapped, passes, report, task, wait_for,
};
use crate::{
    control::{self, ALLOCATION, Space},
    guest,
    hypervisor::{Device, Hypervisor, SERVICE_CORE, home_of},
    memory::Share,
};
use arch::{cpu::Locked, unit::Remapping};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use iommu::{Access, FaultReason, Features, Iova, Message, PAGE_SIZE, PhysAddr};

/// Accesses of a guest's virtual CPU to the page: a load and a store.
const TRIES: u64 = 2;

fn no(_: control::Error) -> Unexpected {
    "the unit refused"
}

/// Attaches a device to empty tables of its own: empty but for the doorbell, if it has messages.
fn attach(hv: &Hypervisor, share: &Share, device: &Device) -> Result<Space, Unexpected> {
    let (function, requests) = (&device.function, device.function.has_page_requests());
    let features = Features { device_tlb: requests, page_requests: requests, pasid: false };
    control::assign(hv, function.id, features).map_err(no)?;
    let space = Space::new(hv, share, function.id, None).map_err(no)?;
    if requests {
        // It is asked to forget as a device with a device TLB is, so that it has to have one.
        function.enable_page_requests(&hv.config, ALLOCATION, false).map_err(|_| "the device refused")?;
    }
    Ok(space)
}

/// Blocks a device again.
fn detach(hv: &Hypervisor, share: &Share, device: &Device, space: Space) -> Result<(), Unexpected> {
    let leaving = control::block(hv, space.attachment.stream).map_err(no)?;
    space.end(hv, share).map_err(no)?;
    device.function.disable_page_requests(&hv.config);
    hv.tables.with(|tables| iommu::Tables::finish(tables, leaving));
    Ok(())
}

/// The scene of interrupts, and around it who reaches the doorbell at `page`.
pub fn show(
    hv: &Hypervisor,
    seen: &Seen,
    remapping: &Locked<Remapping>,
    share: &Share,
    page: PhysAddr,
    [owner, other]: [&Sender<'_>; 2],
    other_number: usize,
) -> Result<&'static str, Unexpected> {
    seen.count("doorbell", page.0);
    without_messages(hv, share, page)?;
    let mut spaces = [Some(attach(hv, share, owner.device)?), Some(attach(hv, share, other.device)?)];
    let [owners, others] = &mut spaces;
    let shown = interrupts::show(hv, seen, remapping, owner, other, |[others_message, message]| {
        alone_unmapped(hv, seen, share, owners, owner, message)?;
        other.use_message(others_message)?;
        let reaches = other.send() == Became::Arrived(SERVICE_CORE);
        expect(reaches, "the other device lost its doorbell with the first")?;
        if let Some(space) = others.take() {
            detach(hv, share, other.device, space)?;
        }
        // Nobody attached it.
        let Became::Refused(fault) = other.send() else {
            return Err("a message of a device that is not attached was not refused");
        };
        let named = fault.stream == other.device.function.id && fault.reason == FaultReason::NotAttached;
        expect(named, "the fault of a device that is not attached names another device or reason")?;
        of_a_guest(hv, seen, page, other, other_number, [others_message, message])?;
        *others = Some(attach(hv, share, other.device)?);
        Ok(())
    });
    owner.stop();
    other.stop();
    for (space, sender) in spaces.into_iter().zip([owner, other]) {
        if let Some(space) = space {
            detach(hv, share, sender.device, space)?;
        }
    }
    shown
}

/// A device that has no messages does not reach the doorbell from its own tables.
fn without_messages(hv: &Hypervisor, share: &Share, page: PhysAddr) -> Result<(), Unexpected> {
    let writer = Writer::find(hv)?;
    let space = attach(hv, share, writer.device)?;
    writer.device.function.enable_bus_master(&hv.config);
    let verdict = writer.write(Iova(page.0 + 0x40), page.0 + 0x40);
    writer.device.function.disable_bus_master(&hv.config);
    detach(hv, share, writer.device, space)?;
    expect(verdict == Writer::REFUSED, "a device that has no messages reaches the doorbell")
}

/// Takes the doorbell out of one device's tables: its message is refused, and reported with the address. Then puts it back.
fn alone_unmapped(
    hv: &Hypervisor,
    seen: &Seen,
    share: &Share,
    space: &mut Option<Space>,
    owner: &Sender<'_>,
    message: Message,
) -> Result<(), Unexpected> {
    let page = Iova(message.address & !(PAGE_SIZE - 1));
    if let Some(space) = space {
        space.unmap(hv, share, page, PAGE_SIZE).map_err(no)?;
    }
    let Became::Refused(fault) = owner.send() else {
        return Err("a message was not refused although its device does not reach the doorbell");
    };
    seen.count("refused_at", fault.iova.0);
    expect(fault.stream == owner.device.function.id, "the fault names another device")?;
    // QEMU's unit reports the page, and the manual has it report the address.
    let at_the_doorbell = fault.iova == page || fault.iova.0 == message.address;
    expect(at_the_doorbell, "the fault names another address than the doorbell's")?;
    expect(is_of_unmapped(hv, fault.reason), "the fault names another reason")?;
    expect(fault.access == Access::Write, "the fault names another access")?;
    if let Some(space) = space.take() {
        detach(hv, share, owner.device, space)?;
    }
    *space = Some(attach(hv, share, owner.device)?);
    expect(owner.send() == Became::Arrived(home_of(0)), "a message did not arrive by new tables")
}

/// A guest that owns the device: its device reaches the doorbell by the guest's attachment, for its own event alone, and its
/// virtual CPU does not.
fn of_a_guest(
    hv: &Hypervisor,
    seen: &Seen,
    page: PhysAddr,
    device: &Sender<'_>,
    number: usize,
    [own, foreign]: [Message; 2],
) -> Result<(), Unexpected> {
    guest::start(hv, 1, [task::REFUSED_INTERRUPT, page.0, 0], &[number]);
    let waits = wait_for(hv, PATIENCE_US, || report(hv, 1, 0) == 1);
    let sent = || {
        device.use_message(own)?;
        let arrived = device.send() == Became::Arrived(SERVICE_CORE);
        device.use_message(foreign)?;
        Ok((arrived, device.send() == Became::Dropped))
    };
    let sent = if waits { sent() } else { Err("the guest has not attached its device") };
    hv.homes[1].task[0].store(task::RELEASE, SeqCst);
    passes(hv, 1)?;
    let (arrived, dropped) = sent?;
    expect(arrived, "a message of a guest's device did not arrive")?;
    expect(dropped, "a guest's device raised another's event")?;
    let refused = hv.homes[1].refused_accesses.load(Relaxed);
    seen.count("accesses_of_the_guest_refused", refused);
    expect(refused == TRIES, "an access of the guest's own was not refused, or refused unseen")
}
