//! Intel VT-d in QEMU's trace (`vtd_*`).
//!
//! Invalidations are read from the descriptors themselves (`vtd_inv_desc`): QEMU lists an event for each kind of
//! invalidation, and never issues those for address spaces with a PASID.

use super::{Invalidation, PAGE, Sight};
use crate::scenes::hex;

/// Reads an event of a VT-d unit: its name and what follows that.
pub(super) fn read(event: &str, text: &str) -> Option<Sight> {
    match event {
        "vtd_dmar_enable" => Some(Sight::Translation(text.ends_with('1'))),
        "vtd_translate_pt" => Some(Sight::Bypass),
        "vtd_pt_enable_fast_path" if text.ends_with(" 1") => Some(Sight::Bypass),
        "vtd_switch_address_space" if text.ends_with("(iommu enabled=0)") => Some(Sight::Bypass),
        "vtd_inv_desc" => descriptor(text),
        _ => None,
    }
}

/// Reads a descriptor of the invalidation queue.
fn descriptor(text: &str) -> Option<Sight> {
    let text = text.strip_prefix("invalidate desc type ")?;
    let (kind, text) = text.split_once(" high ")?;
    let (high, low) = text.split_once(" low ")?;
    let (high, low) = (hex(high)?, hex(low)?);
    // Intel VT-d, "IOTLB Invalidate Descriptor" and "PASID-based-IOTLB Invalidate Descriptor".
    let granularity = low >> 4 & 0b11;
    let domain = Some(low >> 16 & 0xffff);
    let pasid = Some(low >> 32 & 0xf_ffff);
    let invalidation = match (kind, granularity) {
        ("wait", _) => return Some(Sight::Completion),
        ("iotlb", 0b01) => Invalidation::ALL,
        ("iotlb", 0b10) => Invalidation { domain, ..Invalidation::ALL },
        // Page-selective without a PASID (0b11) concerns second-stage tables, and no mapping here is in those.
        ("p-iotlb", 0b10) => Invalidation { domain, pasid, range: None },
        ("p-iotlb", 0b11) => Invalidation { domain, pasid, range: aligned_range(high) },
        _ => return None,
    };
    Some(Sight::Invalidation(invalidation))
}

/// Returns the range that a PASID-based descriptor's upper half selects; `None` if that is all there is.
fn aligned_range(high: u64) -> Option<(u64, u64)> {
    // Address mask: log2 of the number of pages. Its six bits are more than an address has.
    let bytes = PAGE.checked_shl((high & 0x3f) as u32).filter(|&bytes| bytes != 0)?;
    let start = high & !(PAGE - 1) & !(bytes - 1);
    Some((start, start.saturating_add(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invalidation(descriptor: &str) -> Option<Invalidation> {
        match read("vtd_inv_desc", &format!("invalidate desc type {descriptor}"))? {
            Sight::Invalidation(invalidation) => Some(invalidation),
            other => panic!("{other:?} is no invalidation"),
        }
    }

    #[test]
    fn each_kind_of_invalidation_is_read() {
        let (domain, pasid) = (Some(5), Some(1));
        for (descriptor, meant) in [
            ("iotlb high 0x0 low 0x12", Invalidation::ALL),
            ("iotlb high 0x0 low 0x50022", Invalidation { domain, ..Invalidation::ALL }),
            ("p-iotlb high 0x0 low 0x100050026", Invalidation { domain, pasid, range: None }),
            ("p-iotlb high 0x3f low 0x100050036", Invalidation { domain, pasid, range: None }),
            (
                "p-iotlb high 0x40003002 low 0x100050036",
                Invalidation { domain, pasid, range: Some((0x4000_0000, 0x4000_4000)) },
            ),
        ] {
            assert_eq!(invalidation(descriptor), Some(meant), "{descriptor}");
        }
    }

    #[test]
    fn what_forgets_no_translation_of_ours_is_no_invalidation() {
        for descriptor in [
            "iotlb high 0x40000002 low 0x50032",
            "device-piotlb high 0x40000002 low 0x100180008",
            "p-iotlb high 0x40000002",
            "p-iotlb high 40000002 low 0x100050036",
        ] {
            assert_eq!(invalidation(descriptor), None, "{descriptor}");
        }
        assert_eq!(read("vtd_inv_desc_iotlb_domain", "iotlb invalidate whole domain 0x5"), None);
    }

    #[test]
    fn every_way_past_translation_is_a_bypass() {
        for (event, text) in [
            ("vtd_translate_pt", "source id 0x18, iova 0x1000"),
            ("vtd_pt_enable_fast_path", "sid 0x18 1"),
            ("vtd_switch_address_space", "Device 00:03.0 switching address space (iommu enabled=0)"),
        ] {
            assert_eq!(read(event, text), Some(Sight::Bypass), "{event}");
        }
    }

    #[test]
    fn what_stays_translated_is_no_bypass() {
        let switch = "Device 00:03.0 switching address space (iommu enabled=1)";

        assert_eq!(read("vtd_switch_address_space", switch), None);
        assert_eq!(read("vtd_pt_enable_fast_path", "sid 0x18 0"), None);
    }
}
