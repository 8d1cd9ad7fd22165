//! The unit's own interrupts: pulses on wires, for events, page requests and errors.
//!
//! A pulse has no memory: one that comes while its wire is off is gone.

use crate::{ACK_LIMIT_US, regs};
use iommu::{Bus, Error, bus::wait_until};
use regs::IRQ_CTRL;

/// Stops all of them, and keeps them to the wires where they could be messages.
pub(crate) fn disable<B: Bus>(bus: &B, messages: bool, page_requests: bool) -> Result<(), Error> {
    control(bus, 0)?;
    if messages {
        // An address of zero is the manual's way to say: no message.
        regs::GERROR_IRQ_CFG0.set(bus, 0);
        regs::EVENTQ_IRQ_CFG0.set(bus, 0);
        if page_requests {
            regs::PRIQ_IRQ_CFG0.set(bus, 0);
        }
    }
    if page_requests {
        regs::PRIQ_IRQ_CFG2.write(bus, regs::PRIQ_IRQ_CFG2::LO::CLEAR);
    }
    Ok(())
}

/// Lets the unit interrupt.
pub(crate) fn enable<B: Bus>(bus: &B, page_requests: bool) -> Result<(), Error> {
    let wires = IRQ_CTRL::GERROR::SET + IRQ_CTRL::EVENTQ::SET + IRQ_CTRL::PRIQ.val(page_requests.into());
    control(bus, wires.value)
}

fn control<B: Bus>(bus: &B, wanted: u32) -> Result<(), Error> {
    regs::IRQ_CTRL.set(bus, wanted);
    wait_until(bus, "IRQ_CTRLACK", ACK_LIMIT_US, || regs::IRQ_CTRLACK.read(bus).get() == wanted)
}
