//! Intel VT-d in QEMU's trace (`vtd_*`).
//!
//! Steps are read from the descriptors themselves (`vtd_inv_desc`): QEMU lists an event for each kind of invalidation, and
//! never issues those for address spaces with a PASID.

use super::{EVERYWHERE, PAGE, Range, Sight, Step, Taken};
use crate::{scenes::hex, variant::Tables};

/// Reads an event of a VT-d unit that translates devices by `tables`: its name and what follows that.
pub(super) fn read(tables: Tables, event: &str, text: &str) -> Option<Sight> {
    match event {
        // Written while the unit is brought up alone, last when translation is switched on.
        "vtd_reg_write_gcmd" => Some(Sight::BringUp),
        "vtd_dmar_enable" => Some(Sight::Translation(text.ends_with('1'))),
        "vtd_translate_pt" => Some(Sight::Bypass(stream(text, "source id "))),
        "vtd_pt_enable_fast_path" if text.ends_with(" 1") => Some(Sight::Bypass(stream(text, "sid "))),
        "vtd_switch_address_space" if text.ends_with("(iommu enabled=0)") => {
            Some(Sight::Bypass(function(text)))
        }
        "vtd_inv_qi_tail" => Some(Sight::Doorbell),
        "vtd_inv_desc" => descriptor(tables, text),
        _ => None,
    }
}

/// Reads the number of a device after `name`: `source id 0x18, …`.
fn stream(text: &str, name: &str) -> Option<u64> {
    let number = text.strip_prefix(name)?;
    hex(number.split([',', ' ']).next()?)
}

/// Reads the number of a device as a bus writes it: `Device 00:03.0 …`.
fn function(text: &str) -> Option<u64> {
    let (bus, rest) = text.strip_prefix("Device ")?.split_once(':')?;
    let (slot, rest) = rest.split_once('.')?;
    let number = |digits| u64::from_str_radix(digits, 16).ok();
    Some(number(bus)? << 8 | number(slot)? << 3 | number(rest.split(' ').next()?)?)
}

/// Reads a descriptor of the invalidation queue.
fn descriptor(tables: Tables, text: &str) -> Option<Sight> {
    let text = text.strip_prefix("invalidate desc type ")?;
    let (kind, text) = text.split_once(" high ")?;
    let (high, low) = text.split_once(" low ")?;
    let (high, low) = (hex(high)?, hex(low)?);
    // Intel VT-d, "Queued Invalidation Interface": the descriptors, bit by bit.
    let granularity = low >> 4 & 0b11;
    let domain = Some(low >> 16 & 0xffff);
    let pasid = Some(low >> 32 & 0xf_ffff);
    let taken = match (kind, granularity) {
        ("wait", _) => return Some(Sight::Completion { drained: low >> 7 & 1 != 0 }),
        // A context entry names the tables itself in legacy mode alone; elsewhere it stays when one of the device's address
        // spaces goes.
        ("context-cache", 0b01) if tables == Tables::Legacy => Taken::all(Step::Configuration),
        ("context-cache", 0b10) if tables == Tables::Legacy => {
            Taken { domain, ..Taken::all(Step::Configuration) }
        }
        ("context-cache", 0b11) if tables == Tables::Legacy => {
            Taken { domain, stream: Some(low >> 32 & 0xffff), ..Taken::all(Step::Configuration) }
        }
        ("pasid-cache", _) if tables == Tables::Legacy => return None,
        ("pasid-cache", 0b00) => Taken { domain, ..Taken::all(Step::Configuration) },
        ("pasid-cache", 0b01) => Taken { domain, pasid, ..Taken::all(Step::Configuration) },
        ("pasid-cache", 0b11) => Taken::all(Step::Configuration),
        ("iotlb", 0b01) => Taken::all(Step::Translations),
        ("iotlb", 0b10) => Taken { domain, ..Taken::all(Step::Translations) },
        // Without a PASID, page-selective invalidation concerns second-stage tables alone, and with one first-stage tables.
        ("iotlb", 0b11) if tables != Tables::First => {
            let range = aligned(high, (high & 0x3f) as u32);
            Taken { domain, range, ..Taken::all(Step::Translations) }
        }
        ("p-iotlb", _) if tables != Tables::First => return None,
        ("p-iotlb", 0b10) => Taken { domain, pasid, ..Taken::all(Step::Translations) },
        ("p-iotlb", 0b11) => {
            // Address mask: log2 of the number of pages.
            let range = aligned(high, (high & 0x3f) as u32);
            Taken { domain, pasid, range, ..Taken::all(Step::Translations) }
        }
        ("device", _) => {
            let range = sized(high, high & 1 != 0);
            let stream = Some(low >> 32 & 0xffff);
            Taken { stream, pasid: Some(0), range, ..Taken::all(Step::DeviceTlb) }
        }
        ("device-piotlb", _) => {
            let range = sized(high, high >> 11 & 1 != 0);
            // Global (G): of all PASIDs.
            let pasid = pasid.filter(|_| high & 1 == 0);
            Taken { stream: domain, pasid, range, ..Taken::all(Step::DeviceTlb) }
        }
        _ => return None,
    };
    Some(Sight::Taken(taken))
}

/// The range of 2^`log2` pages in which `address` lies.
fn aligned(address: u64, log2: u32) -> Range {
    // Six bits of an address mask are more than an address has.
    let Some(bytes) = PAGE.checked_shl(log2).filter(|&bytes| bytes != 0) else { return EVERYWHERE };
    let start = address & !(bytes - 1);
    (start, start.saturating_add(bytes))
}

/// The range that a descriptor for device TLBs selects: one page, or, if `size`, twice as many as the ones above bit 12 count.
fn sized(address: u64, size: bool) -> Range {
    aligned(address, if size { (address >> 12).trailing_ones() + 1 } else { 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(descriptor: &str) -> Option<Sight> {
        of_tables(Tables::First, descriptor)
    }

    fn of_tables(tables: Tables, descriptor: &str) -> Option<Sight> {
        read(tables, "vtd_inv_desc", &format!("invalidate desc type {descriptor}"))
    }

    #[test]
    fn pages_of_second_stage_tables_are_forgotten_by_other_descriptors_than_those_of_first() {
        let range = (0x4000_0000, 0x4000_4000);
        let pages = Sight::Taken(Taken { domain: Some(5), range, ..Taken::all(Step::Translations) });
        let (of_second, of_first) =
            ("iotlb high 0x40000002 low 0x50032", "p-iotlb high 0x3f low 0x100050036");

        assert_eq!(of_tables(Tables::Second, of_second), Some(pages));
        assert_eq!(of_tables(Tables::Second, of_first), None);
        assert_eq!(of_tables(Tables::First, of_second), None);
    }

    #[test]
    fn each_kind_of_invalidation_is_read() {
        let (domain, pasid) = (Some(5), Some(1));
        let configuration = Taken::all(Step::Configuration);
        let translations = Taken::all(Step::Translations);
        let device = Taken { stream: Some(0x28), pasid, ..Taken::all(Step::DeviceTlb) };
        for (descriptor, meant) in [
            ("pasid-cache high 0x0 low 0x37", configuration),
            ("pasid-cache high 0x0 low 0x50007", Taken { domain, ..configuration }),
            ("pasid-cache high 0x0 low 0x100050017", Taken { domain, pasid, ..configuration }),
            ("iotlb high 0x0 low 0x12", translations),
            ("iotlb high 0x0 low 0x50022", Taken { domain, ..translations }),
            ("p-iotlb high 0x0 low 0x100050026", Taken { domain, pasid, ..translations }),
            ("p-iotlb high 0x3f low 0x100050036", Taken { domain, pasid, ..translations }),
            (
                "p-iotlb high 0x40003002 low 0x100050036",
                Taken { domain, pasid, range: (0x4000_0000, 0x4000_4000), ..translations },
            ),
            ("device-piotlb high 0x7ffffffffffff800 low 0x100280008", device),
            ("device-piotlb high 0x7ffffffffffff801 low 0x100280008", Taken { pasid: None, ..device }),
            (
                "device-piotlb high 0x40000000 low 0x100280008",
                Taken { range: (0x4000_0000, 0x4000_1000), ..device },
            ),
            (
                "device-piotlb high 0x40001800 low 0x100280008",
                Taken { range: (0x4000_0000, 0x4000_4000), ..device },
            ),
            ("device high 0x7ffffffffffff001 low 0x2800000003", Taken { pasid: Some(0), ..device }),
            (
                "device high 0x40000001 low 0x2800000003",
                Taken { pasid: Some(0), range: (0x4000_0000, 0x4000_2000), ..device },
            ),
        ] {
            assert_eq!(seen(descriptor), Some(Sight::Taken(meant)), "{descriptor}");
        }
    }

    #[test]
    fn what_forgets_nothing_of_ours_is_no_step() {
        for descriptor in [
            "iotlb high 0x40000002 low 0x50032",
            // The context entry of a device stays when one of its address spaces goes.
            "context-cache high 0x0 low 0x1800000031",
            "page group response high 0x8 low 0x100280019",
            "p-iotlb high 0x40000002",
            "p-iotlb high 40000002 low 0x100050036",
        ] {
            assert_eq!(seen(descriptor), None, "{descriptor}");
        }
        assert_eq!(
            read(Tables::First, "vtd_inv_desc_iotlb_domain", "iotlb invalidate whole domain 0x5"),
            None
        );
    }

    #[test]
    fn in_legacy_mode_the_context_entry_is_the_configuration() {
        let entry = Taken { stream: Some(0x18), domain: Some(5), ..Taken::all(Step::Configuration) };
        let of_entry = "context-cache high 0x0 low 0x1800050031";

        assert_eq!(of_tables(Tables::Legacy, of_entry), Some(Sight::Taken(entry)));
        assert_eq!(of_tables(Tables::Second, of_entry), None);
        assert_eq!(of_tables(Tables::Legacy, "pasid-cache high 0x0 low 0x100050017"), None);
    }

    #[test]
    fn a_wait_completes_and_drains_only_if_it_says_so() {
        assert_eq!(seen("wait high 0x1000 low 0x100000065"), Some(Sight::Completion { drained: false }));
        assert_eq!(seen("wait high 0x1000 low 0x1000000e5"), Some(Sight::Completion { drained: true }));
    }

    #[test]
    fn each_write_of_the_tail_begins_what_is_submitted_together() {
        assert_eq!(read(Tables::First, "vtd_inv_qi_tail", "write tail 50"), Some(Sight::Doorbell));
    }

    #[test]
    fn every_way_past_translation_is_a_bypass() {
        for (event, text) in [
            ("vtd_translate_pt", "source id 0x18, iova 0x1000"),
            ("vtd_pt_enable_fast_path", "sid 0x18 1"),
            ("vtd_switch_address_space", "Device 00:03.0 switching address space (iommu enabled=0)"),
        ] {
            assert_eq!(read(Tables::First, event, text), Some(Sight::Bypass(Some(0x18))), "{event}");
        }
    }

    #[test]
    fn what_stays_translated_is_no_bypass() {
        let switch = "Device 00:03.0 switching address space (iommu enabled=1)";

        assert_eq!(read(Tables::First, "vtd_switch_address_space", switch), None);
        assert_eq!(read(Tables::First, "vtd_pt_enable_fast_path", "sid 0x18 0"), None);
    }
}
