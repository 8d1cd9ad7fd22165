//! What parts are known not to do as the architecture says, by `IIDR`, and how the driver keeps clear of it.
//!
//! The entries are those that Linux's driver has, which is the only source for their revisions. Quirks that
//! firmware tells by other means are no entries: of HiSilicon Hi161x and Cavium CN99xx by the model in
//! [`iort`](crate::iort), of Tegra T264 by its device tree node.

/// Something that some parts do not do as the architecture says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Erratum {
    /// The part, by the name of its implementer.
    pub part: &'static str,
    /// What cannot be relied on.
    pub avoid: Avoid,
    /// `IIDR.Implementer` and `IIDR.ProductID`.
    implementer: u32,
    product: u32,
    revisions: Revisions,
}

/// What cannot be relied on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Avoid {
    /// `CMD_SYNC` that wakes a waiting core (CS = SEV). The driver asks for a message, or for
    /// no signal.
    WakeUp,
    /// Both stages of one stream. The driver selects one or the other.
    NestedStages,
    /// Invalidations without a `CMD_SYNC` soon after them. The driver ends every batch of them with one.
    LateSync,
    /// The CPU's broadcast TLB maintenance. The driver sets `CR2.PTM`, and invalidates by commands.
    BroadcastInvalidation,
}

/// Which revisions of a part.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Revisions {
    All,
    /// Before this variant.
    Before(u32),
    /// Up to this revision of this variant.
    UpTo(u32, u32),
    /// Those whose variant or revision is 0.
    EitherZero,
}

impl Revisions {
    fn hold(self, variant: u32, revision: u32) -> bool {
        match self {
            Self::All => true,
            Self::Before(first) => variant < first,
            Self::UpTo(of, last) => variant == of && revision <= last,
            Self::EitherZero => variant == 0 || revision == 0,
        }
    }
}

/// Arm, in JEP106.
const ARM: u32 = 0x43B;

const fn of(part: &'static str, product: u32, revisions: Revisions, avoid: Avoid) -> Erratum {
    Erratum { part, avoid, implementer: ARM, product, revisions }
}

/// All that is known.
pub const ERRATA: [Erratum; 7] = [
    of("MMU-600", 0x483, Revisions::UpTo(0, 2), Avoid::WakeUp),
    of("MMU-600", 0x483, Revisions::Before(2), Avoid::NestedStages),
    of("MMU-700", 0x487, Revisions::EitherZero, Avoid::LateSync),
    of("MMU-700", 0x487, Revisions::EitherZero, Avoid::NestedStages),
    of("MMU-700", 0x487, Revisions::All, Avoid::BroadcastInvalidation),
    of("MMU-L1", 0x48A, Revisions::All, Avoid::BroadcastInvalidation),
    of("MMU-S3", 0x498, Revisions::All, Avoid::BroadcastInvalidation),
];

/// Which part a unit is, by `IIDR`, and which version of the architecture it has, by `AIDR`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Part {
    /// The implementer's number in JEP106: `Implementer`.
    pub implementer: u32,
    /// The implementer's number for the part: `ProductID`.
    pub product: u32,
    /// The n of r*n*p*m*: `Variant`.
    pub variant: u32,
    /// The m of r*n*p*m*: `Revision`.
    pub revision: u32,
    /// The n of SMMUv3.*n*: `ArchMinorRev`.
    pub minor: u32,
}

impl Part {
    /// Takes the two registers apart.
    pub const fn new(iidr: u32, aidr: u32) -> Self {
        Self {
            implementer: iidr & 0xFFF,
            product: iidr >> 20,
            variant: iidr >> 16 & 0xF,
            revision: iidr >> 12 & 0xF,
            minor: aidr & 0xF,
        }
    }

    /// Returns the errata of the part.
    pub fn errata(self) -> impl Iterator<Item = Erratum> {
        ERRATA.into_iter().filter(move |erratum| {
            erratum.implementer == self.implementer
                && erratum.product == self.product
                && erratum.revisions.hold(self.variant, self.revision)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Avoid::*, *};
    use std::vec::Vec;

    /// IIDR: ProductID [31:20], Variant [19:16], Revision [15:12], Implementer [11:0]; facts/smmuv3.md,
    /// section 8.8.
    #[test]
    fn a_part_has_the_errata_of_its_revision() {
        for (iidr, avoid) in [
            (0x4830_043B, &[WakeUp, NestedStages][..]),
            (0x4830_243B, &[WakeUp, NestedStages]),
            (0x4830_343B, &[NestedStages]),
            (0x4831_043B, &[NestedStages]),
            (0x4832_043B, &[]),
            (0x4870_043B, &[LateSync, NestedStages, BroadcastInvalidation]),
            (0x4870_143B, &[LateSync, NestedStages, BroadcastInvalidation]),
            (0x4871_043B, &[LateSync, NestedStages, BroadcastInvalidation]),
            (0x4871_143B, &[BroadcastInvalidation]),
            (0x48A0_043B, &[BroadcastInvalidation]),
            (0x498F_F43B, &[BroadcastInvalidation]),
            // Another implementer's, another product, and nobody's.
            (0x4830_043A, &[]),
            (0x4840_043B, &[]),
            (0, &[]),
            (u32::MAX, &[]),
        ] {
            let found: Vec<_> = Part::new(iidr, 0).errata().map(|erratum| erratum.avoid).collect();
            assert_eq!(found, avoid, "{iidr:#x}");
        }
    }

    #[test]
    fn a_part_is_told_by_its_registers() {
        // MMU-700 r1p2 of SMMUv3.2.
        let part = Part { implementer: 0x43B, product: 0x487, variant: 1, revision: 2, minor: 2 };
        assert_eq!(Part::new(0x4871_243B, 0x02), part);
    }
}
