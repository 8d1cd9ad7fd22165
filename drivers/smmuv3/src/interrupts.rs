//! The unit's own interrupts: pulses on wires, or messages, for events, page requests and errors.
//!
//! Neither has a memory: one that is due while it is off is gone.

use crate::{ACK_LIMIT_US, regs};
use iommu::{Bus, Error, Message, Rw, bus::wait_until};
use regs::{IRQ_CFG0, IRQ_CFG2, IRQ_CTRL};

/// The messages of a unit that has no wires.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Messages {
    /// For errors of its own.
    pub errors: Message,
    /// For events.
    pub events: Message,
    /// For page requests; not looked at where the unit has none.
    pub requests: Message,
}

/// Stops all of them, and keeps them to the wires where they could be messages.
pub(crate) fn disable<B: Bus>(bus: &B, messages: bool, page_requests: bool) -> Result<(), Error> {
    control(bus, 0)?;
    if messages {
        // An address of zero is the manual's way to say: no message.
        regs::GERROR_IRQ.cfg0.set(bus, 0);
        regs::EVENTQ_IRQ.cfg0.set(bus, 0);
        if page_requests {
            regs::PRIQ_IRQ.cfg0.set(bus, 0);
        }
    }
    if page_requests {
        regs::PRIQ_IRQ.cfg2.write(bus, IRQ_CFG2::LO::CLEAR);
    }
    Ok(())
}

/// Where the unit is told of one message.
pub(crate) struct MessageRegisters {
    pub(crate) cfg0: Rw<u64, IRQ_CFG0::Register>,
    pub(crate) cfg1: Rw<u32>,
    pub(crate) cfg2: Rw<u32, IRQ_CFG2::Register>,
}

/// Lets the unit interrupt, by messages.
pub(crate) fn enable_messages<B: Bus>(
    bus: &B,
    messages: &Messages,
    page_requests: bool,
) -> Result<(), Error> {
    let Messages { errors, events, requests } = messages;
    let all = [(&regs::GERROR_IRQ, errors), (&regs::EVENTQ_IRQ, events), (&regs::PRIQ_IRQ, requests)];
    let used = if page_requests { 3 } else { 2 };
    for (_, message) in all.iter().take(used) {
        // Zero is no message, and the field is [55:2].
        if message.address == 0 || message.address & !0x00FF_FFFF_FFFF_FFFC != 0 {
            return Err(Error::Unsupported { feature: "messages to this address" });
        }
    }
    // The registers take writes while their interrupts are off.
    control(bus, 0)?;
    for (registers, message) in all.into_iter().take(used) {
        registers.cfg1.set(bus, message.data);
        // Device-nGnRE: the write is to arrive as it is.
        registers.cfg2.write(bus, IRQ_CFG2::MEMATTR::Device);
        registers.cfg0.write(bus, IRQ_CFG0::ADDR.val(message.address >> 2));
    }
    enable(bus, page_requests)
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
