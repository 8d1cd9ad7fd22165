//! The unit's own interrupts: messages that it writes when a fault, or a page request, is pending.
//!
//! They are written as they are, in the compatibility format, and never remapped.

use crate::regs::{ECTL, EventRegisters};
use iommu::{Bus, Message};

/// Stops the event from interrupting; what happens meanwhile stays pending.
pub(crate) fn mask<B: Bus>(bus: &B, event: &EventRegisters) {
    event.control.write(bus, ECTL::IM::SET);
}

/// Lets the event interrupt by `message`; one that is pending does so at once.
pub(crate) fn unmask<B: Bus>(bus: &B, event: &EventRegisters, message: Message) {
    event.data.set(bus, message.data);
    event.address.set(bus, message.address as u32);
    event.upper_address.set(bus, (message.address >> 32) as u32);
    event.control.write(bus, ECTL::IM::CLEAR);
}
