//! A bus on which a test looks on.

use iommu::{Bus, PhysAddr};
use models::vtd::VtdUnit;
use std::{fmt, ops::Range, sync::Arc};

/// A moment in a driver's use of its unit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Moment {
    /// A register is about to be read or written.
    Access,
    /// A register was written.
    Written {
        /// Where it is.
        offset: usize,
        /// What was written to it.
        value: u64,
    },
    /// One more word of memory was made visible to the unit.
    Published,
}

/// A bus that reaches its unit straight, and tells a test of each [`Moment`].
#[derive(Clone)]
pub struct Tapped {
    unit: &'static VtdUnit,
    tap: Arc<dyn Fn(&'static VtdUnit, Moment) + Send + Sync>,
}

impl Tapped {
    /// A bus to `unit` that calls `tap`.
    pub fn new(
        unit: &'static VtdUnit,
        tap: impl Fn(&'static VtdUnit, Moment) + Send + Sync + 'static,
    ) -> Self {
        Self { unit, tap: Arc::new(tap) }
    }

    fn tell(&self, moment: Moment) {
        (self.tap)(self.unit, moment);
    }
}

impl Bus for Tapped {
    fn read32(&self, offset: usize) -> u32 {
        self.tell(Moment::Access);
        self.unit.read32(offset)
    }

    fn write32(&self, offset: usize, value: u32) {
        self.tell(Moment::Access);
        self.unit.write32(offset, value);
        self.tell(Moment::Written { offset, value: value.into() });
    }

    fn read64(&self, offset: usize) -> u64 {
        self.tell(Moment::Access);
        self.unit.read64(offset)
    }

    fn write64(&self, offset: usize, value: u64) {
        self.tell(Moment::Access);
        self.unit.write64(offset, value);
        self.tell(Moment::Written { offset, value });
    }

    fn publish(&self, range: Range<PhysAddr>) {
        // Word by word: hardware may see some stores of a range before others.
        for at in (range.start.0..range.end.0).step_by(8) {
            self.unit.publish(PhysAddr(at)..PhysAddr(at + 8));
            self.tell(Moment::Published);
        }
    }

    fn observe(&self, range: Range<PhysAddr>) {
        self.unit.observe(range);
    }

    fn now_us(&self) -> u64 {
        self.unit.now_us()
    }
}

impl fmt::Debug for Tapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tapped {{ unit: {:?} }}", self.unit)
    }
}
