//! Doorbells: where devices write their interrupts, if those are messages.
//!
//! A message passes the unit like any access of its device. Which doorbell a device has firmware tells: of a PCI function
//! by `msi-map` or `msi-parent` of the device tree, or by the mapping of [`iort`](crate::iort) to an ITS group, whose
//! numbers the `MADT` table turns into addresses.
//!
//! To keep the interrupts of one owner of devices from those of another, the page of the doorbell is mapped, for writing, in
//! the tables of each owner that has a device behind it, and nowhere else; no guest's CPU reaches it. An ITS tells devices
//! apart by what the unit passes on (DeviceID), which no device chooses. A GICv2m frame does not: any device that reaches
//! it can raise any of its interrupts, so it may be mapped for one owner alone.

use iommu::{PAGE_SIZE, PhysAddr};

/// What a doorbell belongs to, by where its registers begin.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Doorbell {
    /// An interrupt translation service (`arm,gic-v3-its`), at its `GITS_CTLR`: `GITS_TRANSLATER` is in its second frame.
    Its(PhysAddr),
    /// A frame of a GICv2m (`arm,gic-v2m-frame`): `MSI_SETSPI_NS` is in its first page.
    Frame(PhysAddr),
}

impl Doorbell {
    /// Returns where a device writes to interrupt; `None` where that is past the last address.
    pub fn register(self) -> Option<PhysAddr> {
        let (base, offset) = match self {
            Self::Its(base) => (base, 0x1_0040),
            Self::Frame(base) => (base, 0x40),
        };
        base.0.checked_add(offset).map(PhysAddr)
    }

    /// Returns the page that is mapped for it, as device memory.
    pub fn page(self) -> Option<PhysAddr> {
        self.register().map(|register| PhysAddr(register.0 & !(PAGE_SIZE - 1)))
    }

    /// Whether it tells devices apart, so that owners can share it.
    pub const fn is_shareable(self) -> bool {
        matches!(self, Self::Its(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// QEMU's `virt` machine has its ITS at 0x0808_0000, and its GICv2m at 0x0802_0000.
    #[test]
    fn a_doorbell_is_where_the_manuals_have_its_register() {
        let its = Doorbell::Its(PhysAddr(0x0808_0000));
        assert_eq!((its.register(), its.page()), (Some(PhysAddr(0x0809_0040)), Some(PhysAddr(0x0809_0000))));
        let frame = Doorbell::Frame(PhysAddr(0x0802_0000));
        assert_eq!(
            (frame.register(), frame.page()),
            (Some(PhysAddr(0x0802_0040)), Some(PhysAddr(0x0802_0000)))
        );
        assert!(its.is_shareable() && !frame.is_shareable());
        assert_eq!(Doorbell::Its(PhysAddr(u64::MAX)).page(), None);
    }
}
