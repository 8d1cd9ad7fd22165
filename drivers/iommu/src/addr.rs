//! Addresses, and who issues them.

use core::{fmt, num::NonZeroU32, ops::Range};

/// The smallest unit of translation, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// A physical address, in bytes, as the IOMMU and its devices see memory.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PhysAddr(pub u64);

impl PhysAddr {
    /// Returns the `bytes` that start here, or `None` if they would wrap.
    pub fn spanning(self, bytes: u64) -> Option<Range<Self>> {
        Some(self..Self(self.0.checked_add(bytes)?))
    }
}

/// An address that a device issues, before translation. Bytes.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Iova(pub u64);

/// A guest-physical address, in bytes.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Gpa(pub u64);

/// The identity that a device's transactions carry: a PCIe requester ID on VT-d, a StreamID on SMMUv3.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct StreamId(pub u32);

/// A process address space identifier: 20 bits, carried by a transaction beside its stream.
///
/// It is kept as one more than it is, so that an `Option<Pasid>` takes no more than four bytes and no branch to copy.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Pasid(NonZeroU32);

impl Pasid {
    /// The largest value that the PCIe field holds.
    pub const MAX: u32 = (1 << 20) - 1;

    /// Returns the PASID `value`, or `None` if it does not fit 20 bits.
    #[inline]
    pub const fn new(value: u32) -> Option<Self> {
        if value <= Self::MAX { Some(Self::from_low_bits(value as u64)) } else { None }
    }

    /// Returns the PASID in the low 20 bits of `word`; the other bits are ignored.
    #[inline]
    pub const fn from_low_bits(word: u64) -> Self {
        Self(NonZeroU32::MIN.saturating_add(word as u32 & Self::MAX))
    }

    /// Returns a PASID, or that there is none, as a word: one more than it is, or 0. Since it is kept like that, this is a copy.
    #[inline]
    pub fn word(pasid: Option<Self>) -> u32 {
        pasid.map_or(0, |pasid| pasid.0.get())
    }

    /// Returns what [`word`](Self::word) made `word` from; the largest PASID if it cannot have.
    #[inline]
    pub fn from_word(word: u32) -> Option<Self> {
        NonZeroU32::new(word.min(Self::MAX + 1)).map(Self)
    }

    /// Returns the number itself.
    #[inline]
    pub const fn value(self) -> u32 {
        self.0.get() - 1
    }
}

impl fmt::Debug for Pasid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pasid").field(&self.value()).finish()
    }
}

/// What an access may do, or what a device asks to be allowed to do.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Perms {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
    /// Instruction fetches.
    pub execute: bool,
    /// Accesses made in privileged mode.
    pub privileged: bool,
}

impl Perms {
    /// Reads alone.
    pub const READ: Self = Self { read: true, write: false, execute: false, privileged: false };
    /// Reads and writes.
    pub const READ_WRITE: Self = Self { write: true, ..Self::READ };

    /// Returns whether they are for any access at all.
    pub const fn is_for_some_access(self) -> bool {
        self.read || self.write || self.execute
    }
}

/// Addresses and identities are logged in hexadecimal, as manuals and other tools print them.
#[cfg(feature = "defmt")]
mod log {
    use super::{Gpa, Iova, Pasid, PhysAddr, StreamId};
    use defmt::{Format, Formatter, write};

    impl Format for PhysAddr {
        fn format(&self, f: Formatter<'_>) {
            write!(f, "PhysAddr({=u64:#x})", self.0);
        }
    }
    impl Format for Iova {
        fn format(&self, f: Formatter<'_>) {
            write!(f, "Iova({=u64:#x})", self.0);
        }
    }
    impl Format for Gpa {
        fn format(&self, f: Formatter<'_>) {
            write!(f, "Gpa({=u64:#x})", self.0);
        }
    }
    impl Format for StreamId {
        fn format(&self, f: Formatter<'_>) {
            write!(f, "StreamId({=u32:#x})", self.0);
        }
    }
    impl Format for Pasid {
        fn format(&self, f: Formatter<'_>) {
            write!(f, "Pasid({=u32:#x})", self.value());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pasid_has_twenty_bits() {
        assert_eq!(Pasid::new(0xF_FFFF).map(Pasid::value), Some(0xF_FFFF));
        assert_eq!(Pasid::new(0x10_0000), None);
        assert_eq!(Pasid::new(0).map(Pasid::value), Some(0));
        assert_eq!(Pasid::from_low_bits(0xFFFF_FFFF_FFF1_2345).value(), 0x1_2345);
    }

    #[test]
    fn a_range_that_would_wrap_is_no_range() {
        assert_eq!(PhysAddr(u64::MAX).spanning(2), None);
        assert_eq!(PhysAddr(0x1000).spanning(8), Some(PhysAddr(0x1000)..PhysAddr(0x1008)));
    }
}
