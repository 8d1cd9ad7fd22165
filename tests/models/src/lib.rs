//! Device models for hosted tests: memory with two views, a VT-d unit, an SMMUv3, and endpoints behind them.
//!
//! A model stands where hardware would: a driver reaches it through the same seam ([`iommu::Bus`],
//! [`pcie::ConfigSpace`]) as on a board. It is written from the manual's words and numbers alone, and shares no constant
//! with any driver, so that a driver and its model cannot agree on the same mistake. What a driver does against the
//! manual's rules, without any effect that a test would notice, a model lists as a violation.
//!
//! ```
//! use iommu::{Bus, Iova, StreamId};
//! use models::{
//!     memory::Memory,
//!     vtd::{Config, Refusal, VtdUnit},
//! };
//!
//! let memory = Memory::new(8192);
//! let unit = VtdUnit::new(memory.clone(), Config::qemu());
//! let mut root = memory.take(512, 512);
//!
//! // A driver would do this: an empty root table, published, then RTADDR, GCMD.SRTP and GCMD.TE.
//! root.clear();
//! unit.publish(root.range(0, 512));
//! unit.write64(0x20, root.phys().0);
//! for (command, status) in [(0x4000_0000, 0x4000_0000), (0x8000_0000, 0xC000_0000)] {
//!     unit.write32(0x18, command);
//!     while unit.read32(0x1C) != status {}
//! }
//!
//! // And now no device gets through: the root entry is not present (LRT.2).
//! let refused = unit.dma_read(StreamId(0x20), None, Iova(0x1000), 4);
//! assert_eq!(refused, Err(Refusal::Fault(0x01)));
//! assert!(unit.violations().is_empty());
//! ```
//!
//! Whoever breaks the contract of a model itself, a test that is, meets a panic; a driver never does.
#![deny(unsafe_code)]

mod device;
pub mod endpoint;
pub mod golden;
pub mod golden_smmuv3;
pub mod memory;
pub mod smmuv3;
pub mod vtd;
