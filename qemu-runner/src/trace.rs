//! QEMU's own trace as a witness: was a device's translation ever bypassed, and was each removed mapping invalidated?
//!
//! `-trace` writes one line an event, the event's name first. The names and formats are those of QEMU 11.1
//! (`trace-events-all`). What an event of a unit means is read by `vtd` and `smmu`; the verdict is the same for both.

mod smmu;
mod vtd;

use std::io::BufRead;

use serde::Serialize;

use crate::{error::Error, machine::Machine};

/// Size of the pages that a mapping consists of, in bytes.
const PAGE: u64 = 4096;

/// How many findings are quoted; the rest are counted.
const QUOTED: usize = 10;

/// A mapping that the hypervisor says it removed, its invalidation complete.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Unmap {
    /// Requester ID of the device, which is its StreamID.
    pub(crate) stream: u64,
    pub(crate) pasid: u64,
    /// Domain ID, which tags what the unit caches: on an SMMUv3, ASID and VMID.
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

/// An invalidation of cached translations that QEMU took from the unit's queue.
///
/// QEMU traces some before it checks them. What it refuses stops the queue, so that no completion follows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Invalidation {
    /// All domains if `None`.
    domain: Option<u64>,
    /// All address spaces of the domain if `None`.
    pasid: Option<u64>,
    /// First address and the address after the last; all addresses if `None`.
    range: Option<(u64, u64)>,
}

impl Invalidation {
    /// Everything.
    const ALL: Self = Self { domain: None, pasid: None, range: None };

    /// Returns the part of `unmap`'s address space that is forgotten: first address and the address after the last.
    fn covers(&self, unmap: &Unmap) -> Option<(u64, u64)> {
        let concerns = self.domain.is_none_or(|domain| domain == unmap.domain)
            && self.pasid.is_none_or(|pasid| pasid == unmap.pasid);
        concerns.then_some(self.range.unwrap_or((0, u64::MAX)))
    }

    /// How much is forgotten besides what was asked for, as a rank up to [`BROADEST`].
    fn breadth(&self) -> u8 {
        u8::from(self.domain.is_none()) + u8::from(self.pasid.is_none()) + u8::from(self.range.is_none())
    }
}

/// Rank of [`Invalidation::ALL`].
const BROADEST: u8 = 3;

/// What an event in QEMU's trace says about the unit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Sight {
    /// Translation was switched on or off.
    Translation(bool),
    /// A device got past translation.
    Bypass,
    /// Cached translations are to be forgotten.
    Invalidation(Invalidation),
    /// All that was taken from the queue before is complete.
    Completion,
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

    /// Compares the trace of `machine` that `lines` carries with the `unmaps` that the hypervisor logged.
    ///
    /// An invalidation counts when the hypervisor has waited for it: when a completion follows in the trace.
    /// Each invalidation accounts for one unmap at most, so that one which was forgotten is not excused by a twin.
    pub(crate) fn judge(machine: Machine, lines: impl BufRead, unmaps: &[Unmap]) -> Result<Self, Error> {
        let read = match machine {
            Machine::X86_64 => vtd::read,
            Machine::Aarch64 => smmu::read,
        };
        let mut trace = Self { unmaps: unmaps.len() as u64, ..Self::default() };
        let (mut taken, mut complete) = (Vec::new(), Vec::new());
        for line in lines.split(b'\n') {
            let line = line.map_err(|source| Error::Io { doing: "reading QEMU's trace".into(), source })?;
            let line = String::from_utf8_lossy(&line);
            let (event, text) = line.split_once(' ').unwrap_or((&line, ""));
            match read(event, text.trim_end()) {
                Some(Sight::Translation(on)) => {
                    if trace.enabled && !on {
                        trace.find("translation was switched off again".into());
                    }
                    trace.enabled |= on;
                }
                Some(Sight::Bypass) if trace.enabled => {
                    trace.bypassed += 1;
                    trace.find(format!("translation was bypassed: {}", line.trim_end()));
                }
                Some(Sight::Invalidation(invalidation)) if trace.enabled => taken.push(invalidation),
                Some(Sight::Completion) => complete.append(&mut taken),
                Some(Sight::Bypass | Sight::Invalidation(_)) | None => {}
            }
        }
        if !trace.enabled {
            trace.find("translation was never switched on".into());
        }
        for unmap in unmaps {
            if account(&mut complete, unmap) {
                trace.invalidated += 1;
            } else {
                trace.find(format!(
                    "no completed invalidation for the unmap of {} pages at {:#x} (stream {:#x}, pasid {:#x}, domain {:#x})",
                    unmap.pages, unmap.iova, unmap.stream, unmap.pasid, unmap.domain
                ));
            }
        }
        Ok(trace)
    }
}

/// Takes out of `invalidations` the narrowest and earliest that together cover `unmap`; changes nothing if they do not.
fn account(invalidations: &mut Vec<Invalidation>, unmap: &Unmap) -> bool {
    let Some((start, end)) = unmap.range() else { return false };
    for breadth in 0..=BROADEST {
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

    const FOUR_PAGES: Unmap = Unmap { stream: 0x18, pasid: 1, domain: 5, iova: 0x4000_0000, pages: 4 };

    /// What the trace of one machine says for what the other's says in other words.
    struct Words {
        machine: Machine,
        on: &'static str,
        off: &'static str,
        bypass: &'static str,
        /// Of the four pages, of each half of them, of their domain, and of everything.
        pages: &'static str,
        halves: [&'static str; 2],
        domain: &'static str,
        all: &'static str,
        wait: &'static str,
    }

    const WORDS: [Words; 2] = [
        Words {
            machine: Machine::X86_64,
            on: "vtd_dmar_enable enable 1",
            off: "vtd_dmar_enable enable 0",
            bypass: "vtd_translate_pt source id 0x18, iova 0x1000",
            pages: "vtd_inv_desc invalidate desc type p-iotlb high 0x40000002 low 0x100050036",
            halves: [
                "vtd_inv_desc invalidate desc type p-iotlb high 0x40002001 low 0x100050036",
                "vtd_inv_desc invalidate desc type p-iotlb high 0x40000001 low 0x100050036",
            ],
            domain: "vtd_inv_desc invalidate desc type iotlb high 0x0 low 0x50022",
            all: "vtd_inv_desc invalidate desc type iotlb high 0x0 low 0x12",
            wait: "vtd_inv_desc invalidate desc type wait high 0x1000 low 0x100000025",
        },
        Words {
            machine: Machine::Aarch64,
            on: "smmuv3_write_mmio addr: 0x20 val:0xf size: 0x4(0)",
            off: "smmuv3_write_mmio addr: 0x20 val:0xe size: 0x4(0)",
            bypass: "smmuv3_translate_bypass smmuv3-iommu-memory-region-24-0 sid=0x18 STE bypass iova:0x1000 is_write=0",
            pages: "smmuv3_range_inval vmid=5 asid=5 addr=0x40000000 tg=1 num_pages=0x4 ttl=0 leaf=1 stage=1",
            halves: [
                "smmuv3_range_inval vmid=5 asid=5 addr=0x40002000 tg=1 num_pages=0x2 ttl=0 leaf=1 stage=1",
                "smmuv3_range_inval vmid=5 asid=5 addr=0x40000000 tg=1 num_pages=0x2 ttl=0 leaf=1 stage=1",
            ],
            domain: "smmuv3_cmdq_tlbi_nh vmid=5",
            all: "smmuv3_cmdq_tlbi_nsnh ",
            wait: "smmuv3_cmdq_opcode <--- SMMU_CMD_SYNC",
        },
    ];

    impl Words {
        /// Judges `lines` as they are.
        fn judge_all(&self, lines: &[&str], unmaps: &[Unmap]) -> Trace {
            Trace::judge(self.machine, lines.join("\n").as_bytes(), unmaps).unwrap()
        }

        /// Judges `lines` between a unit that is switched on and a wait.
        fn judge(&self, lines: &[&str], unmaps: &[Unmap]) -> Trace {
            self.judge_all(&[&[self.on], lines, &[self.wait]].concat(), unmaps)
        }
    }

    #[test]
    fn an_unmap_is_matched_by_the_invalidation_of_its_pages() {
        for words in &WORDS {
            let trace = words.judge(&[words.pages], &[FOUR_PAGES]);

            assert!(trace.clean(), "{trace:?}");
            assert_eq!((trace.unmaps, trace.invalidated), (1, 1));
        }
    }

    #[test]
    fn several_invalidations_cover_an_unmap_together_and_not_in_part() {
        for words in &WORDS {
            let [second, first] = words.halves;

            assert!(words.judge(&[second, first], &[FOUR_PAGES]).clean());
            for half in words.halves {
                let trace = words.judge(&[half], &[FOUR_PAGES]);

                assert_eq!(trace.invalidated, 0, "{half}");
                assert!(trace.findings[0].contains("0x40000000"), "{half}");
            }
        }
    }

    #[test]
    fn a_wider_invalidation_covers_an_unmap() {
        for words in &WORDS {
            for line in [words.domain, words.all] {
                assert!(words.judge(&[line], &[FOUR_PAGES]).clean(), "{line}");
            }
        }
    }

    #[test]
    fn an_invalidation_of_another_domain_or_other_pages_does_not_count() {
        for words in &WORDS {
            for elsewhere in [
                Unmap { domain: 6, ..FOUR_PAGES },
                Unmap { iova: 0x4000_4000, ..FOUR_PAGES },
                Unmap { pages: 5, ..FOUR_PAGES },
            ] {
                assert_eq!(words.judge(&[words.pages], &[elsewhere]).invalidated, 0, "{elsewhere:?}");
            }
            assert_eq!(words.judge(&[words.domain], &[Unmap { domain: 6, ..FOUR_PAGES }]).invalidated, 0);
        }
    }

    #[test]
    fn an_invalidation_that_nobody_waited_for_does_not_count() {
        for words in &WORDS {
            let trace = words.judge_all(&[words.on, words.wait, words.pages], &[FOUR_PAGES]);

            assert_eq!((trace.enabled, trace.invalidated), (true, 0));
        }
    }

    #[test]
    fn one_invalidation_accounts_for_one_unmap() {
        for words in &WORDS {
            let twice = [FOUR_PAGES, FOUR_PAGES];

            assert_eq!(words.judge(&[words.pages], &twice).invalidated, 1);
            assert_eq!(words.judge(&[words.pages, words.pages], &twice).invalidated, 2);
        }
    }

    #[test]
    fn a_narrow_invalidation_is_used_before_a_wide_one() {
        for words in &WORDS {
            let elsewhere = Unmap { domain: 6, ..FOUR_PAGES };

            let trace = words.judge(&[words.all, words.pages], &[FOUR_PAGES, elsewhere]);

            assert!(trace.clean(), "{trace:?}");
        }
    }

    #[test]
    fn an_invalidation_before_the_unit_was_enabled_does_not_count() {
        for words in &WORDS {
            let trace = words.judge_all(&[words.all, words.on, words.wait], &[FOUR_PAGES]);

            assert_eq!((trace.enabled, trace.invalidated), (true, 0));
        }
    }

    #[test]
    fn a_bypass_counts_from_the_moment_when_the_unit_is_enabled() {
        for words in &WORDS {
            let before = words.judge_all(&[words.bypass, words.on], &[]);
            let after = words.judge_all(&[words.on, words.bypass], &[]);

            assert!(before.clean(), "{before:?}");
            assert!(after.bypassed == 1 && !after.clean(), "{after:?}");
            assert!(after.findings[0].contains(words.bypass), "{after:?}");
        }
    }

    #[test]
    fn a_unit_that_is_never_enabled_or_does_not_stay_so_is_a_finding() {
        for words in &WORDS {
            let never = words.judge_all(&[words.off], &[]);
            let off = words.judge_all(&[words.on, words.off], &[]);

            assert_eq!(never.findings, ["translation was never switched on"]);
            assert_eq!(off.findings, ["translation was switched off again"]);
            assert!(!never.clean() && !off.clean());
        }
    }

    #[test]
    fn an_unmap_that_leaves_the_address_space_is_never_covered() {
        let impossible = Unmap { iova: u64::MAX - 4095, pages: u64::MAX, ..FOUR_PAGES };

        for words in &WORDS {
            assert_eq!(words.judge(&[words.all], &[impossible]).invalidated, 0);
        }
    }

    #[test]
    fn findings_are_quoted_to_a_limit_and_counted_beyond_it() {
        for words in &WORDS {
            let trace = words.judge(&[words.bypass; 50], &[]);

            assert_eq!((trace.bypassed, trace.findings.len()), (50, QUOTED));
        }
    }
}
