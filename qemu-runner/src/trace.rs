//! QEMU's own trace as a witness: was a device's translation ever bypassed, and was each removed mapping invalidated?
//!
//! `-trace 'vtd_*'` writes one line an event, the event's name first. The names and formats are those of QEMU 11.1
//! (`trace-events-all`). Invalidations are read from the descriptors themselves (`vtd_inv_desc`): QEMU lists an event for
//! each kind of invalidation, and never issues those for address spaces with a PASID.

use std::io::BufRead;

use serde::Serialize;

use crate::{error::Error, scenes::hex};

/// Size of the pages that a mapping consists of, in bytes.
const PAGE: u64 = 4096;

/// How many findings are quoted; the rest are counted.
const QUOTED: usize = 10;

/// A mapping that the hypervisor says it removed, its invalidation complete.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Unmap {
    /// Requester ID of the device.
    pub(crate) stream: u64,
    pub(crate) pasid: u64,
    /// Domain ID, which tags what the unit caches.
    pub(crate) domain: u64,
    /// First address, a multiple of 4096.
    pub(crate) iova: u64,
    /// Number of pages of 4096 bytes.
    pub(crate) pages: u64,
}

impl Unmap {
    /// First address and the address after the last; `None` if the range leaves the address space.
    fn range(&self) -> Option<(u64, u64)> {
        Some((self.iova, self.iova.checked_add(self.pages.checked_mul(PAGE)?)?))
    }
}

/// An invalidation of cached translations that QEMU took from the queue.
///
/// QEMU traces a descriptor before it checks it. A descriptor that it refuses stops the queue, so the hypervisor's wait
/// behind it does not complete, and no unmap is logged.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Invalidation {
    /// A naturally aligned range of 2^`log2` pages in one address space.
    Pages { domain: u64, pasid: u64, addr: u64, log2: u32 },
    /// One address space.
    Pasid { domain: u64, pasid: u64 },
    /// All address spaces of a domain.
    Domain { domain: u64 },
    /// Everything.
    Global,
}

impl Invalidation {
    /// Returns the part of `unmap`'s address space that is forgotten: first address and the address after the last.
    fn covers(&self, unmap: &Unmap) -> Option<(u64, u64)> {
        match *self {
            Self::Pages { domain, pasid, addr, log2 } if (domain, pasid) == (unmap.domain, unmap.pasid) => {
                // The field of the descriptor has six bits, more than an address has.
                let Some(bytes) = PAGE.checked_shl(log2).filter(|&bytes| bytes != 0) else {
                    return Some((0, u64::MAX));
                };
                let start = addr & !(bytes - 1);
                Some((start, start.saturating_add(bytes)))
            }
            Self::Pasid { domain, pasid } if (domain, pasid) == (unmap.domain, unmap.pasid) => {
                Some((0, u64::MAX))
            }
            Self::Domain { domain } if domain == unmap.domain => Some((0, u64::MAX)),
            Self::Global => Some((0, u64::MAX)),
            _ => None,
        }
    }

    /// How much is forgotten besides what was asked for, as a rank.
    fn breadth(&self) -> u8 {
        match self {
            Self::Pages { .. } => 0,
            Self::Pasid { .. } => 1,
            Self::Domain { .. } => 2,
            Self::Global => 3,
        }
    }
}

/// What QEMU's trace of one boot shows.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct Trace {
    /// Whether translation was switched on.
    pub enabled: bool,
    /// How often a device's translation was bypassed after translation was switched on.
    pub bypassed: u64,
    /// Mappings that the hypervisor removed.
    pub unmaps: u64,
    /// Removed mappings for which the trace has an invalidation of their own.
    pub invalidated: u64,
    /// What is wrong, the first few in words.
    pub findings: Vec<String>,
}

impl Trace {
    /// Whether the trace contradicts the hypervisor in nothing.
    pub fn clean(&self) -> bool {
        self.enabled && self.bypassed == 0 && self.invalidated == self.unmaps && self.findings.is_empty()
    }

    fn find(&mut self, finding: String) {
        if self.findings.len() < QUOTED {
            self.findings.push(finding);
        }
    }

    /// Compares the trace that `lines` carries with the `unmaps` that the hypervisor logged.
    ///
    /// Each invalidation accounts for one unmap at most, so that one which was forgotten is not excused by a twin.
    pub(crate) fn judge(lines: impl BufRead, unmaps: &[Unmap]) -> Result<Self, Error> {
        let mut trace = Self { unmaps: unmaps.len() as u64, ..Self::default() };
        let mut invalidations = Vec::new();
        for line in lines.split(b'\n') {
            let line = line.map_err(|source| Error::Io { doing: "reading QEMU's trace".into(), source })?;
            let line = String::from_utf8_lossy(&line);
            let (event, text) = line.split_once(' ').unwrap_or((&line, ""));
            if event == "vtd_dmar_enable" {
                let on = text.trim_end().ends_with('1');
                if trace.enabled && !on {
                    trace.find("translation was switched off again".into());
                }
                trace.enabled |= on;
            } else if trace.enabled {
                if let Some(bypass) = bypass(event, text) {
                    trace.bypassed += 1;
                    trace.find(bypass);
                }
                invalidations.extend(invalidation(event, text));
            }
        }
        if !trace.enabled {
            trace.find("translation was never switched on".into());
        }
        for unmap in unmaps {
            if account(&mut invalidations, unmap) {
                trace.invalidated += 1;
            } else {
                trace.find(format!(
                    "no invalidation for the unmap of {} pages at {:#x} (stream {:#x}, pasid {:#x}, domain {:#x})",
                    unmap.pages, unmap.iova, unmap.stream, unmap.pasid, unmap.domain
                ));
            }
        }
        Ok(trace)
    }
}

/// Returns how a device got past translation, if that is what the event says.
fn bypass(event: &str, text: &str) -> Option<String> {
    let text = text.trim_end();
    let past = match event {
        "vtd_translate_pt" => true,
        "vtd_pt_enable_fast_path" => text.ends_with(" 1"),
        "vtd_switch_address_space" => text.ends_with("(iommu enabled=0)"),
        _ => false,
    };
    past.then(|| format!("translation was bypassed: {event} {text}"))
}

/// Returns the invalidation of cached translations that an event reports, if it does.
fn invalidation(event: &str, text: &str) -> Option<Invalidation> {
    if event != "vtd_inv_desc" {
        return None;
    }
    let text = text.strip_prefix("invalidate desc type ")?;
    let (kind, text) = text.split_once(" high ")?;
    let (high, low) = text.trim_end().split_once(" low ")?;
    let (high, low) = (hex(high)?, hex(low)?);
    // Intel VT-d, "IOTLB Invalidate Descriptor" and "PASID-based-IOTLB Invalidate Descriptor".
    let granularity = low >> 4 & 0b11;
    let domain = low >> 16 & 0xffff;
    let pasid = low >> 32 & 0xf_ffff;
    match (kind, granularity) {
        ("iotlb", 0b01) => Some(Invalidation::Global),
        ("iotlb", 0b10) => Some(Invalidation::Domain { domain }),
        // Page-selective without a PASID (0b11) concerns second-stage tables, and no mapping here is in those.
        ("p-iotlb", 0b10) => Some(Invalidation::Pasid { domain, pasid }),
        ("p-iotlb", 0b11) => {
            Some(Invalidation::Pages { domain, pasid, addr: high & !(PAGE - 1), log2: (high & 0x3f) as u32 })
        }
        _ => None,
    }
}

/// Takes out of `invalidations` the narrowest and earliest that together cover `unmap`; changes nothing if they do not.
fn account(invalidations: &mut Vec<Invalidation>, unmap: &Unmap) -> bool {
    let Some((start, end)) = unmap.range() else { return false };
    for breadth in 0..=3 {
        let mut missing = vec![(start, end)];
        let mut used = Vec::new();
        for (at, invalidation) in invalidations.iter().enumerate() {
            if missing.is_empty() {
                break;
            }
            let Some(covered) = invalidation.covers(unmap).filter(|_| invalidation.breadth() == breadth)
            else {
                continue;
            };
            let left = without(&missing, covered);
            if left != missing {
                missing = left;
                used.push(at);
            }
        }
        if missing.is_empty() {
            for at in used.into_iter().rev() {
                invalidations.remove(at);
            }
            return true;
        }
    }
    false
}

/// Returns `ranges` without `(from, to)`.
fn without(ranges: &[(u64, u64)], (from, to): (u64, u64)) -> Vec<(u64, u64)> {
    ranges
        .iter()
        .flat_map(|&(start, end)| [(start, end.min(from)), (start.max(to), end)])
        .filter(|(start, end)| start < end)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ON: &str = "vtd_dmar_enable enable 1\n";
    const FOUR_PAGES: Unmap = Unmap { stream: 0x18, pasid: 1, domain: 5, iova: 0x4000_0000, pages: 4 };

    fn judge(lines: &[&str], unmaps: &[Unmap]) -> Trace {
        let text = lines.join("\n");
        Trace::judge(format!("{ON}{text}\n").as_bytes(), unmaps).unwrap()
    }

    #[test]
    fn an_unmap_is_matched_by_the_invalidation_of_its_pages() {
        let trace = judge(
            &["vtd_inv_desc invalidate desc type p-iotlb high 0x40000002 low 0x100050036"],
            &[FOUR_PAGES],
        );

        assert!(trace.clean(), "{trace:?}");
        assert_eq!((trace.unmaps, trace.invalidated), (1, 1));
    }

    #[test]
    fn several_invalidations_cover_an_unmap_together() {
        let trace = judge(
            &[
                "vtd_inv_desc invalidate desc type p-iotlb high 0x40002001 low 0x100050036",
                "vtd_inv_desc invalidate desc type p-iotlb high 0x40000000 low 0x100050036",
                "vtd_inv_desc invalidate desc type p-iotlb high 0x40001000 low 0x100050036",
            ],
            &[FOUR_PAGES],
        );

        assert!(trace.clean(), "{trace:?}");
    }

    #[test]
    fn a_wider_invalidation_covers_an_unmap() {
        for line in [
            "vtd_inv_desc invalidate desc type p-iotlb high 0x0 low 0x100050026",
            "vtd_inv_desc invalidate desc type iotlb high 0x0 low 0x50022",
            "vtd_inv_desc invalidate desc type iotlb high 0x0 low 0x12",
            "vtd_inv_desc invalidate desc type p-iotlb high 0x3f low 0x100050036",
        ] {
            assert!(judge(&[line], &[FOUR_PAGES]).clean(), "{line}");
        }
    }

    #[test]
    fn an_invalidation_of_something_else_does_not_count() {
        for line in [
            "vtd_inv_desc invalidate desc type p-iotlb high 0x40000001 low 0x100050036",
            "vtd_inv_desc invalidate desc type p-iotlb high 0x40004002 low 0x100050036",
            "vtd_inv_desc invalidate desc type p-iotlb high 0x40000002 low 0x100060036",
            "vtd_inv_desc invalidate desc type p-iotlb high 0x40000002 low 0x200050036",
            "vtd_inv_desc invalidate desc type p-iotlb high 0x0 low 0x200050026",
            "vtd_inv_desc invalidate desc type iotlb high 0x0 low 0x60022",
            "vtd_inv_desc invalidate desc type iotlb high 0x40000002 low 0x50032",
            "vtd_inv_desc invalidate desc type device-piotlb high 0x40000002 low 0x100180008",
            "vtd_inv_desc invalidate desc type p-iotlb high 0x40000002",
            "vtd_inv_desc_iotlb_domain iotlb invalidate whole domain 0x5",
        ] {
            let trace = judge(&[line], &[FOUR_PAGES]);

            assert!(!trace.clean() && trace.invalidated == 0, "{line}");
            assert!(trace.findings[0].contains("0x40000000"), "{line}");
        }
    }

    #[test]
    fn one_invalidation_accounts_for_one_unmap() {
        let line = "vtd_inv_desc invalidate desc type p-iotlb high 0x40000002 low 0x100050036";

        assert_eq!(judge(&[line], &[FOUR_PAGES, FOUR_PAGES]).invalidated, 1);
        assert_eq!(judge(&[line, line], &[FOUR_PAGES, FOUR_PAGES]).invalidated, 2);
    }

    #[test]
    fn a_narrow_invalidation_is_used_before_a_wide_one() {
        let elsewhere = Unmap { pasid: 2, ..FOUR_PAGES };
        let trace = judge(
            &[
                "vtd_inv_desc invalidate desc type iotlb high 0x0 low 0x12",
                "vtd_inv_desc invalidate desc type p-iotlb high 0x40000002 low 0x100050036",
            ],
            &[FOUR_PAGES, elsewhere],
        );

        assert!(trace.clean(), "{trace:?}");
    }

    #[test]
    fn an_invalidation_before_the_unit_was_enabled_does_not_count() {
        let text = format!("vtd_inv_desc invalidate desc type iotlb high 0x0 low 0x12\n{ON}");

        let trace = Trace::judge(text.as_bytes(), &[FOUR_PAGES]).unwrap();

        assert_eq!((trace.enabled, trace.invalidated), (true, 0));
    }

    #[test]
    fn every_way_past_translation_is_a_bypass() {
        for line in [
            "vtd_translate_pt source id 0x18, iova 0x1000",
            "vtd_pt_enable_fast_path sid 0x18 1",
            "vtd_switch_address_space Device 00:03.0 switching address space (iommu enabled=0)",
        ] {
            let trace = judge(&[line], &[]);

            assert!(trace.bypassed == 1 && !trace.clean(), "{line}");
        }
    }

    #[test]
    fn what_stays_translated_is_no_bypass() {
        let before = "vtd_switch_address_space Device 00:03.0 switching address space (iommu enabled=0)\n";
        let after = "vtd_switch_address_space Device 00:03.0 switching address space (iommu enabled=1)\n\
                     vtd_pt_enable_fast_path sid 0x18 0\n";

        let trace = Trace::judge(format!("{before}{ON}{after}").as_bytes(), &[]).unwrap();

        assert!(trace.clean(), "{trace:?}");
    }

    #[test]
    fn a_unit_that_is_never_enabled_or_does_not_stay_so_is_a_finding() {
        let never = Trace::judge(&b""[..], &[]).unwrap();
        let off = judge(&["vtd_dmar_enable enable 0"], &[]);

        assert_eq!(never.findings, ["translation was never switched on"]);
        assert_eq!(off.findings, ["translation was switched off again"]);
        assert!(!never.clean() && !off.clean());
    }

    #[test]
    fn an_unmap_that_leaves_the_address_space_is_never_covered() {
        let impossible = Unmap { iova: u64::MAX - 4095, pages: u64::MAX, ..FOUR_PAGES };

        let trace = judge(&["vtd_inv_desc invalidate desc type iotlb high 0x0 low 0x12"], &[impossible]);

        assert_eq!(trace.invalidated, 0);
    }

    #[test]
    fn findings_are_quoted_to_a_limit_and_counted_beyond_it() {
        let trace = judge(&["vtd_translate_pt source id 0x18, iova 0x1000"; 50], &[]);

        assert_eq!((trace.bypassed, trace.findings.len()), (50, QUOTED));
    }
}
