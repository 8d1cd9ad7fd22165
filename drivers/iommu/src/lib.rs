//! The vocabulary that every IOMMU driver of Portcullis speaks.
//!
//! Nothing here knows an architecture: addresses and identities ([`addr`]), bits of wide descriptors ([`bits`]),
//! registers, ordering and time ([`bus`]), memory shared with a device ([`dma`]), what hardware reports and is
//! answered ([`event`]), and the three halves of a unit in service ([`mod@unit`]).
//!
//! A driver is generic over one thing, its [`Bus`]. Bare metal implements it over mapped registers, the hosted tests
//! over a model of the unit, another hypervisor over whatever it has.
//!
//! | feature | supported | note |
//! |---|---|---|
//! | `defmt` | yes | `defmt::Format` for everything that is logged; off by default |
#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]

pub mod addr;
pub mod bits;
pub mod bus;
pub mod dma;
pub mod event;
pub mod unit;

pub use addr::{Gpa, Iova, PAGE_SIZE, Pasid, Perms, PhysAddr, StreamId};
pub use bits::{Field, Words};
pub use bus::{Bus, Ro, Rw, W1c};
pub use dma::{DmaBuf, Grant, Root, Trust};
pub use event::{Access, Event, FaultReason, FaultRecord, GroupTag, Outcome, PageRequest, PageResponse};
pub use unit::{
    Attachment, Capabilities, Commands, Completion, DomainId, Error, Events, Failure, FailureCause, Features,
    FirstStage, Invalidation, Invalidations, Leaving, Message, Stages, Tables, Ticket, Translation,
};
