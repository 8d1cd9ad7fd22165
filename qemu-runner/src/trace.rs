//! QEMU's own trace as a witness: was a device's translation ever bypassed, and was everything that the hypervisor says it
//! removed really forgotten?
//!
//! `-trace` writes one line an event, the event's name first. The names and formats are those of QEMU 11.1
//! (`trace-events-all`). What an event of a unit means is read by `vtd` and `smmu`; the verdict is the same for both.
//!
//! Trace and log have no clock in common. What joins them is order: of one address space, the hypervisor removes one thing
//! after the other, waits for the unit each time, and only then logs it. And QEMU executes what was submitted with one ring
//! of the doorbell before it traces anything of the next.

mod smmu;
mod vtd;

use std::{collections::HashMap, fmt, io::BufRead, mem};

use serde::Serialize;

use crate::{error::Error, machine::Machine, variant::Tables};

/// Size of the pages that a mapping consists of, in bytes.
const PAGE: u64 = 4096;

/// How many findings are quoted; the rest are counted.
const QUOTED: usize = 10;

/// Something that the hypervisor says it took from an address space, and that nothing remembers any more.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Removal {
    /// Requester ID of the device, which is its StreamID.
    pub(crate) stream: u64,
    /// 0 for accesses without one; no address space has the PASID 0 besides.
    pub(crate) pasid: u64,
    /// Domain ID, which tags what the unit caches: on an SMMUv3, ASID and VMID.
    pub(crate) domain: u64,
    pub(crate) part: Part,
}

/// How much was removed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Part {
    /// A mapping: `pages` pages of 4096 bytes from `iova`, a multiple of that.
    Pages { iova: u64, pages: u64 },
    /// All of it: the address space was detached.
    All,
    /// Whatever the device has: all of it was blocked. PASID and domain say nothing.
    Device,
    /// Nothing: the pages stay, and what was remembered of them is forgotten, because a guest asked. It is entry `number` of
    /// its array, whose entries are submitted together.
    Entry { number: u64, iova: u64, pages: u64 },
}

/// First address and the address after the last.
type Range = (u64, u64);

/// Where `pages` pages of so many bytes end that start at `start`; `None` if that is past the last address.
fn end(start: u64, pages: u64, bytes: u64) -> Option<u64> {
    let end = u128::from(start) + u128::from(pages) * u128::from(bytes);
    u64::try_from(end).ok().or((end == 1 << 64).then_some(u64::MAX))
}

/// All addresses.
const EVERYWHERE: Range = (0, u64::MAX);

impl Removal {
    /// The addresses to be forgotten; `None` if they leave the address space.
    fn range(&self) -> Option<Range> {
        match self.part {
            Part::Pages { iova, pages } | Part::Entry { iova, pages, .. } => {
                Some((iova, end(iova, pages, PAGE)?))
            }
            Part::All | Part::Device => Some(EVERYWHERE),
        }
    }

    /// Returns it as the unit is told of it: a command for a second stage of SMMUv3 has 56 bits of an address, which is more
    /// than any second stage has, so that nothing is remembered of what lies beyond.
    fn as_commanded(self, told: &Told<'_>) -> Self {
        let short = told.machine == Machine::Aarch64 && told.tables == Tables::Second;
        let cut = |iova: u64| if short { iova & ((1 << 56) - 1) } else { iova };
        let part = match self.part {
            Part::Pages { iova, pages } => Part::Pages { iova: cut(iova), pages },
            Part::Entry { number, iova, pages } => Part::Entry { number, iova: cut(iova), pages },
            part => part,
        };
        Self { part, ..self }
    }

    /// What has to happen for it, in order: each cache is filled from the one before.
    fn steps(&self, machine: Machine, has_device_tlb: bool) -> Vec<Step> {
        let steps: &[Step] = match self.part {
            Part::Pages { .. } | Part::Entry { .. } => &[Step::Translations, Step::DeviceTlb],
            Part::All => &[Step::Configuration, Step::Translations, Step::DeviceTlb, Step::Drain],
            Part::Device => &[Step::Configuration, Step::Translations],
        };
        let needed = |step: &Step| match step {
            Step::Configuration | Step::Translations => true,
            Step::DeviceTlb => has_device_tlb,
            // An SMMUv3 has no command for it.
            Step::Drain => has_device_tlb && machine == Machine::X86_64,
        };
        steps.iter().copied().filter(needed).collect()
    }
}

impl fmt::Display for Removal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.part {
            Part::Pages { iova, pages } => write!(f, "the unmap of {pages} pages at {iova:#x}")?,
            Part::All => f.write_str("the detachment")?,
            Part::Device => return write!(f, "the blocking of stream {:#x}", self.stream),
            Part::Entry { iova, pages, .. } => write!(f, "a guest's entry of {pages} pages at {iova:#x}")?,
        }
        write!(f, " (stream {:#x}, pasid {:#x}, domain {:#x})", self.stream, self.pasid, self.domain)
    }
}

/// A step of a removal.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Step {
    /// The unit forgets which tables translate.
    Configuration,
    /// The unit forgets translations.
    Translations,
    /// The device forgets translations.
    DeviceTlb,
    /// Every page request sent before has arrived.
    Drain,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configuration => "invalidation of the configuration",
            Self::Translations => "invalidation of translations",
            Self::DeviceTlb => "invalidation of the device TLB",
            Self::Drain => "drain of page requests",
        })
    }
}

/// A step that QEMU took from the unit's queue, and for what. A number that is `None` stands for all, or for one that the
/// trace does not tell.
///
/// QEMU traces some before it checks them. What it refuses stops the queue, so that no completion follows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Taken {
    step: Step,
    stream: Option<u64>,
    domain: Option<u64>,
    pasid: Option<u64>,
    range: Range,
}

impl Taken {
    /// A step for everything.
    const fn all(step: Step) -> Self {
        Self { step, stream: None, domain: None, pasid: None, range: EVERYWHERE }
    }

    /// Whether it is about the address space of `removal`.
    fn concerns(&self, removal: &Removal) -> bool {
        let same = |told: Option<u64>, meant| told.is_none_or(|told| told == meant);
        if removal.part == Part::Device {
            return same(self.stream, removal.stream);
        }
        same(self.stream, removal.stream)
            && same(self.domain, removal.domain)
            && same(self.pasid, removal.pasid)
    }
}

/// What an event in QEMU's trace says about the unit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Sight {
    /// Translation was switched on or off.
    Translation(bool),
    /// The unit is being brought up: what it was told before is about tables that are no more.
    BringUp,
    /// A device got past translation: the one with this stream, if the trace tells.
    Bypass(Option<u64>),
    /// A step was taken from the queue.
    Taken(Taken),
    /// All that was taken from the queue before is complete. If `drained`, that is a [`Step::Drain`].
    Completion { drained: bool },
    /// What was traced before and what follows were submitted apart.
    Doorbell,
}

/// The steps that were submitted together and completed.
type Batch = Vec<Taken>;

/// What the hypervisor says of one boot, to be compared with the trace of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Told<'t> {
    pub(crate) machine: Machine,
    /// Which tables translate devices.
    pub(crate) tables: Tables,
    /// What it removed, in order.
    pub(crate) removals: &'t [Removal],
    /// The streams of the devices that keep translations of their own.
    pub(crate) with_device_tlb: &'t [u64],
    /// The streams of the devices that may get past translation.
    pub(crate) trusted: &'t [u64],
    /// Whether it took over a unit that was on. An SMMUv3 then goes off, and refuses everything meanwhile; a VT-d unit stays on.
    pub(crate) restarts: bool,
    /// Whether it tells of detachments. Where there were unmaps there are detachments in the end.
    pub(crate) detachments: bool,
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
    /// Detachments that the hypervisor told of.
    pub detachments: u64,
    /// Detachments for which the trace has all steps.
    pub detached: u64,
    /// Entries of guests' own arrays of invalidations.
    pub entries: u64,
    /// Entries for which the trace has an invalidation.
    pub forgotten: u64,
    /// What is wrong, the first few in words.
    pub findings: Vec<String>,
}

impl Trace {
    /// Whether the trace contradicts the hypervisor in nothing.
    pub fn clean(&self) -> bool {
        self.enabled
            && self.bypassed == 0
            && self.invalidated == self.unmaps
            && self.detached == self.detachments
            && self.forgotten == self.entries
            && self.findings.is_empty()
    }

    fn find(&mut self, finding: String) {
        if self.findings.len() < QUOTED {
            self.findings.push(finding);
        }
    }

    /// Compares the trace that `lines` carries with what the hypervisor told.
    ///
    /// A step counts when the hypervisor has waited for it: when a completion follows in its batch. Each batch accounts for
    /// one removal at most, so that a step which was forgotten is not excused by a twin; the entries of one array share
    /// theirs.
    pub(crate) fn judge(lines: impl BufRead, all: &Told<'_>) -> Result<Self, Error> {
        let mut trace = Self::default();
        let mut batches = trace.read(all, lines)?;
        if !trace.enabled {
            trace.find("translation was never switched on".into());
        }
        let told = all.removals.iter().any(|removal| removal.part == Part::All);
        // A device that was blocked need not have been attached.
        let attached = all.removals.iter().any(|removal| removal.part != Part::Device);
        if all.detachments && !told && attached {
            trace.find("the hypervisor removed mappings and told of no detachment".into());
        }
        // Where the search for an address space's next batch begins, and whether that one is of entries before.
        let mut next = HashMap::<(u64, u64), (usize, bool)>::new();
        // Only in legacy mode do the tables of an address space hang on the entry of its device, so that blocking the device
        // looks like a detachment.
        let looks_like_one = |part| part != Part::Device || all.tables == Tables::Legacy;
        for removal in all.removals.iter().filter(|removal| looks_like_one(removal.part)) {
            let removal = &removal.as_commanded(all);
            let steps = removal.steps(all.machine, all.with_device_tlb.contains(&removal.stream));
            let (from, of_entries) = next.entry((removal.stream, removal.pasid)).or_default();
            let is_entry = matches!(removal.part, Part::Entry { .. });
            let goes_on = matches!(removal.part, Part::Entry { number: 1.., .. });
            if *of_entries && !goes_on {
                batches[*from].clear();
                *from += 1;
                *of_entries = false;
            }
            let found = search(&batches[*from..], removal, &steps, told);
            if let Ok(at) = found {
                if *of_entries && at > 0 {
                    batches[*from].clear();
                }
                *from += at;
                *of_entries = is_entry;
                if !is_entry {
                    batches[*from].clear();
                    *from += 1;
                }
            }
            let counts = match removal.part {
                Part::Pages { .. } => Some((&mut trace.unmaps, &mut trace.invalidated)),
                Part::All => Some((&mut trace.detachments, &mut trace.detached)),
                Part::Entry { .. } => Some((&mut trace.entries, &mut trace.forgotten)),
                Part::Device => None,
            };
            if let Some((all, complete)) = counts {
                *all += 1;
                *complete += u64::from(found.is_ok());
            }
            if let Err(lacking) = found {
                // One that lacks a step only is over all the same: it does not stand in the way of what follows.
                let over = |batch: &&mut Batch| removal.part == Part::All && is_detachment(batch, removal);
                batches[*from..].iter_mut().find(over).into_iter().for_each(Vec::clear);
                trace.find(format!("no completed {lacking} for {removal}"));
            }
        }
        Ok(trace)
    }

    /// Reads the batches that completed while translation was on, in order, and notes what else there is to see.
    fn read(&mut self, all: &Told<'_>, lines: impl BufRead) -> Result<Vec<Batch>, Error> {
        let read = |event: &str, text: &str| match all.machine {
            Machine::X86_64 => vtd::read(all.tables, event, text),
            Machine::Aarch64 => smmu::read(event, text),
        };
        let (mut taken, mut batch, mut batches) = (Vec::new(), Batch::new(), Vec::new());
        let mut translates = false;
        for line in lines.split(b'\n') {
            let line = line.map_err(|source| Error::Io { doing: "reading QEMU's trace".into(), source })?;
            let line = String::from_utf8_lossy(&line);
            let (event, text) = line.split_once(' ').unwrap_or((&line, ""));
            match read(event, text.trim_end()) {
                Some(Sight::Translation(on)) => {
                    let goes_off = all.restarts && all.machine == Machine::Aarch64;
                    if self.enabled && !on && !goes_off {
                        self.find("translation was switched off again".into());
                    }
                    self.enabled |= on;
                    if on && !translates {
                        (taken, batch, batches) = Default::default();
                    }
                    translates = on;
                }
                Some(Sight::BringUp) => (taken, batch, batches) = Default::default(),
                Some(Sight::Bypass(Some(stream))) if all.trusted.contains(&stream) => {}
                Some(Sight::Bypass(_)) if self.enabled => {
                    self.bypassed += 1;
                    self.find(format!("translation was bypassed: {}", line.trim_end()));
                }
                Some(Sight::Taken(step)) if self.enabled => taken.push(step),
                Some(Sight::Completion { drained }) => {
                    batch.append(&mut taken);
                    batch.extend(drained.then_some(Taken::all(Step::Drain)));
                }
                Some(Sight::Doorbell) => {
                    taken.clear();
                    batches.push(mem::take(&mut batch));
                }
                Some(Sight::Bypass(_) | Sight::Taken(_)) | None => {}
            }
        }
        batches.push(batch);
        Ok(batches)
    }
}

/// Returns which of `batches` is the first with all `steps` of `removal`; otherwise the step that none has, or that none
/// of those which come furthest has.
///
/// An unmap is not looked for beyond the detachment of its address space, if all detachments are `told`: one that was logged
/// before has taken its batch already, and what it left empty is none.
fn search(batches: &[Batch], removal: &Removal, steps: &[Step], told: bool) -> Result<usize, Step> {
    let is_unmap = matches!(removal.part, Part::Pages { .. } | Part::Entry { .. });
    let mut furthest = if is_unmap { Step::Translations } else { Step::Configuration };
    for (at, batch) in batches.iter().enumerate() {
        if is_unmap && told && is_detachment(batch, removal) {
            break;
        }
        // What changes entries is no unmap, whatever translations are forgotten for it.
        if is_unmap && batch.iter().any(|taken| taken.step == Step::Configuration) {
            continue;
        }
        match lacking(batch, removal, steps) {
            None => return Ok(at),
            Some(step) => furthest = furthest.max(step),
        }
    }
    Err(furthest)
}

/// Whether `batch` has the unit's part in the detachment of the address space of `removal`.
fn is_detachment(batch: &[Taken], removal: &Removal) -> bool {
    let detachment = Removal { part: Part::All, ..*removal };
    lacking(batch, &detachment, &[Step::Configuration, Step::Translations]).is_none()
}

/// Returns the first of `steps` that `batch` does not hold for all of `removal`, after those before it.
fn lacking(batch: &[Taken], removal: &Removal, steps: &[Step]) -> Option<Step> {
    let mut rest = batch.iter();
    steps.iter().copied().find(|&step| {
        let Some(range) = removal.range() else { return true };
        let mut missing = vec![range];
        while !missing.is_empty() {
            match rest.next() {
                Some(taken) if taken.step == step && taken.concerns(removal) => {
                    missing = without(&missing, taken.range);
                }
                Some(_) => {}
                None => return true,
            }
        }
        false
    })
}

/// Returns `ranges` without `(from, to)`.
fn without(ranges: &[Range], (from, to): Range) -> Vec<Range> {
    ranges
        .iter()
        .flat_map(|&(start, end)| [(start, end.min(from)), (start.max(to), end)])
        .filter(|(start, end)| start < end)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOUR_PAGES: Removal =
        Removal { stream: 0x18, pasid: 1, domain: 5, part: Part::Pages { iova: 0x4000_0000, pages: 4 } };
    const DETACHMENT: Removal = Removal { part: Part::All, ..FOUR_PAGES };

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
        /// All steps of a detachment but the drain.
        detachment: [&'static str; 3],
        /// Of the four pages, in the device.
        device: &'static str,
        wait: &'static str,
        /// With a drain, where there is one.
        drain: &'static str,
        doorbell: &'static str,
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
            detachment: [
                "vtd_inv_desc invalidate desc type pasid-cache high 0x0 low 0x100050017",
                "vtd_inv_desc invalidate desc type p-iotlb high 0x0 low 0x100050026",
                "vtd_inv_desc invalidate desc type device-piotlb high 0x7ffffffffffff800 low 0x100180008",
            ],
            device: "vtd_inv_desc invalidate desc type device-piotlb high 0x40001800 low 0x100180008",
            wait: "vtd_inv_desc invalidate desc type wait high 0x1000 low 0x100000065",
            drain: "vtd_inv_desc invalidate desc type wait high 0x1000 low 0x1000000e5",
            doorbell: "vtd_inv_qi_tail write tail 50",
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
            detachment: [
                "smmuv3_cmdq_cfgi_ste streamid= 0x18",
                "smmuv3_cmdq_tlbi_nh vmid=5",
                "smmuv3_cmdq_opcode <--- SMMU_CMD_ATC_INV",
            ],
            device: "smmuv3_cmdq_opcode <--- SMMU_CMD_ATC_INV",
            wait: "smmuv3_cmdq_opcode <--- SMMU_CMD_SYNC",
            drain: "smmuv3_cmdq_opcode <--- SMMU_CMD_SYNC",
            doorbell: "smmuv3_write_mmio addr: 0x98 val:0x6 size: 0x4(0)",
        },
    ];

    impl Words {
        /// Judges `lines` as they are. The device has a device TLB, or not.
        fn judge_with(&self, lines: &[&str], removals: &[Removal], device_tlb: bool) -> Trace {
            let with_device_tlb: &[u64] = if device_tlb { &[0x18] } else { &[] };
            self.judge_told(lines, &Told { with_device_tlb, ..self.told(removals) })
        }

        /// What a hypervisor tells that removes `removals` of a device without a device TLB.
        fn told<'t>(&self, removals: &'t [Removal]) -> Told<'t> {
            let machine = self.machine;
            let tables = Tables::First;
            Told {
                machine,
                tables,
                removals,
                with_device_tlb: &[],
                trusted: &[],
                restarts: false,
                detachments: false,
            }
        }

        fn judge_told(&self, lines: &[&str], told: &Told<'_>) -> Trace {
            Trace::judge(lines.join("\n").as_bytes(), told).unwrap()
        }

        /// Judges `lines` as they are.
        fn judge_all(&self, lines: &[&str], removals: &[Removal]) -> Trace {
            self.judge_with(lines, removals, false)
        }

        /// Judges `lines` between a unit that is switched on and a wait.
        fn judge(&self, lines: &[&str], removals: &[Removal]) -> Trace {
            self.judge_all(&[&[self.on], lines, &[self.wait]].concat(), removals)
        }

        /// Judges `batches`, each submitted by itself and waited for.
        fn judge_batches(&self, batches: &[Vec<&str>], removals: &[Removal]) -> Trace {
            let mut lines = vec![self.on, self.doorbell];
            for batch in batches {
                lines.extend(batch);
                lines.extend([self.wait, self.doorbell]);
            }
            self.judge_all(&lines, removals)
        }
    }

    /// Four pages elsewhere in the address space.
    fn four_pages(iova: u64) -> Removal {
        Removal { part: Part::Pages { iova, pages: 4 }, ..FOUR_PAGES }
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
    fn several_invalidations_cover_an_unmap_together_and_not_in_part_or_apart() {
        for words in &WORDS {
            let [second, first] = words.halves;

            assert!(words.judge(&[second, first], &[FOUR_PAGES]).clean());
            for half in words.halves {
                let trace = words.judge(&[half], &[FOUR_PAGES]);

                assert_eq!(trace.invalidated, 0, "{half}");
                assert!(trace.findings[0].contains("0x40000000"), "{half}");
            }
            let apart = words.judge_batches(&[vec![second], vec![first]], &[FOUR_PAGES]);
            assert_eq!(apart.invalidated, 0, "the hypervisor waited in between for something else");
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
            let five = Part::Pages { iova: 0x4000_0000, pages: 5 };
            for elsewhere in [
                Removal { domain: 6, ..FOUR_PAGES },
                four_pages(0x4000_4000),
                Removal { part: five, ..FOUR_PAGES },
            ] {
                assert_eq!(words.judge(&[words.pages], &[elsewhere]).invalidated, 0, "{elsewhere:?}");
            }
            assert_eq!(words.judge(&[words.domain], &[Removal { domain: 6, ..FOUR_PAGES }]).invalidated, 0);
        }
    }

    #[test]
    fn an_invalidation_that_nobody_waited_for_does_not_count() {
        for words in &WORDS {
            let never = [words.on, words.wait, words.pages];
            let another = [words.on, words.pages, words.doorbell, words.wait];

            for lines in [&never[..], &another] {
                let trace = words.judge_all(lines, &[FOUR_PAGES]);

                assert_eq!((trace.enabled, trace.invalidated), (true, 0), "{lines:?}");
            }
        }
    }

    #[test]
    fn what_was_submitted_together_accounts_for_one_unmap() {
        for words in &WORDS {
            let twice = [FOUR_PAGES, FOUR_PAGES];

            assert_eq!(words.judge(&[words.pages, words.pages], &twice).invalidated, 1);
            assert_eq!(words.judge_batches(&[vec![words.pages], vec![words.pages]], &twice).invalidated, 2);
        }
    }

    #[test]
    fn one_lost_invalidation_of_ten_is_found_whichever_it_is() {
        let removals: Vec<Removal> = (0..10).map(|n| four_pages(0x4000_0000 + n * 0x4000)).collect();
        for words in &WORDS {
            let moved = |n: u64| words.pages.replace("0x400000", &format!("0x40{:04x}", n << 6));
            let lines: Vec<String> = (0..10).map(moved).collect();
            let batches: Vec<Vec<&str>> = lines.iter().map(|line| vec![line.as_str()]).collect();
            assert!(words.judge_batches(&batches, &removals).clean());

            for lost in 0..10 {
                let mut rest = batches.clone();
                rest.remove(lost);

                let trace = words.judge_batches(&rest, &removals);

                assert_eq!((trace.unmaps, trace.invalidated, trace.findings.len()), (10, 9, 1));
                let iova = format!("{:#x}", 0x4000_0000 + lost * 0x4000);
                assert!(trace.findings[0].contains(&iova), "{:?}", trace.findings);
            }
            // The same pages ten times: the count alone tells.
            let same = vec![vec![words.pages]; 9];
            assert_eq!(words.judge_batches(&same, &[FOUR_PAGES; 10]).invalidated, 9);
        }
    }

    #[test]
    fn the_steps_of_a_detachment_are_not_those_of_an_unmap() {
        for words in &WORDS {
            let [configuration, translations, _] = words.detachment;

            let trace = words.judge(&[configuration, translations], &[FOUR_PAGES]);

            assert_eq!((trace.unmaps, trace.invalidated), (1, 0), "{:?}", words.machine);
        }
    }

    #[test]
    fn an_unmap_that_was_forgotten_is_not_excused_by_one_after_the_detachment() {
        for words in &WORDS {
            let [configuration, translations, _] = words.detachment;
            let detachment = vec![configuration, translations];
            let batches = [detachment.clone(), vec![words.pages], detachment];

            let trace = words.judge_batches(&batches, &[FOUR_PAGES, DETACHMENT, FOUR_PAGES, DETACHMENT]);

            assert_eq!((trace.invalidated, trace.detached, trace.findings.len()), (1, 2, 1), "{trace:?}");
            assert!(trace.findings[0].contains("unmap"), "{trace:?}");
        }
    }

    #[test]
    fn what_another_core_submits_in_between_does_not_matter() {
        for words in &WORDS {
            let other = Removal { stream: 0x20, pasid: 2, domain: 6, ..FOUR_PAGES };
            // A reader that knows one order for all would find the second too late.
            let line = words.pages.replace("0x100050036", "0x200060036").replace('5', "6");
            let batches = [vec![line.as_str()], vec![words.pages]];

            let trace = words.judge_batches(&batches, &[FOUR_PAGES, other]);

            assert_eq!((trace.unmaps, trace.invalidated), (2, 2), "{trace:?}");
        }
    }

    #[test]
    fn an_unmap_reaches_the_device_tlb_where_there_is_one_and_after_the_unit() {
        for words in &WORDS {
            for (lines, invalidated) in [
                (vec![words.pages, words.device], 1),
                (vec![words.pages], 0),
                (vec![words.device, words.pages], 0),
            ] {
                let lines = [&[words.on], &lines[..], &[words.wait]].concat();

                assert_eq!(
                    words.judge_with(&lines, &[FOUR_PAGES], true).invalidated,
                    invalidated,
                    "{lines:?}"
                );
            }
        }
    }

    #[test]
    fn a_detachment_takes_every_step_in_order() {
        for words in &WORDS {
            let whole = [&words.detachment[..], &[words.drain]].concat();
            let judge = |lines: &[&str]| {
                let lines = [&[words.on, words.doorbell], lines, &[words.doorbell]].concat();
                words.judge_with(&lines, &[DETACHMENT], true)
            };
            let trace = judge(&whole);
            assert!(trace.clean() && (trace.detachments, trace.detached) == (1, 1), "{trace:?}");

            for (at, step) in [
                "invalidation of the configuration",
                "invalidation of translations",
                "invalidation of the device TLB",
            ]
            .into_iter()
            .enumerate()
            {
                let mut lost = whole.clone();
                lost.remove(at);

                let trace = judge(&lost);

                assert_eq!(trace.detached, 0, "{step}");
                assert!(trace.findings[0].contains(step), "{trace:?} is not about the {step}");
                let mut late = lost.clone();
                late.insert(if at == 2 { 0 } else { 2 }, whole[at]);
                assert_eq!(judge(&late).detached, 0, "{step} out of order");
            }
        }
    }

    #[test]
    fn page_requests_are_drained_where_a_device_sends_them_and_the_unit_can() {
        let [vtd, smmu] = &WORDS;
        for words in [vtd, smmu] {
            let lines = [&[words.on], &words.detachment[..], &[words.wait]].concat();

            let sends = words.judge_with(&lines, &[DETACHMENT], true);
            let does_not = words.judge_with(&lines, &[DETACHMENT], false);

            assert!(does_not.clean(), "{does_not:?}");
            assert_eq!(sends.detached, u64::from(words.machine == Machine::Aarch64));
        }
    }

    #[test]
    fn a_detachment_that_lacks_a_step_is_not_held_against_what_follows() {
        for words in &WORDS {
            let [configuration, translations, _] = words.detachment;
            let lines = [words.on, configuration, translations, words.drain, words.doorbell];
            let lines = [&lines[..], &[words.pages, words.device, words.wait]].concat();

            let trace = words.judge_with(&lines, &[DETACHMENT, FOUR_PAGES], true);

            assert_eq!((trace.detached, trace.invalidated, trace.findings.len()), (0, 1, 1), "{trace:?}");
        }
    }

    #[test]
    fn a_detachment_forgets_all_of_its_space_and_each_has_its_own() {
        for words in &WORDS {
            let [configuration, translations, _] = words.detachment;
            let part = words.judge(&[configuration, words.pages], &[DETACHMENT]);
            let foreign = Removal { stream: 0x20, pasid: 2, domain: 6, part: Part::All };
            let once = vec![configuration, translations];

            assert_eq!(part.detached, 0);
            assert_eq!(words.judge(&once, &[foreign]).detached, 0);
            assert_eq!(words.judge_batches(std::slice::from_ref(&once), &[DETACHMENT; 2]).detached, 1);
            assert_eq!(words.judge_batches(&[once.clone(), once], &[DETACHMENT; 2]).detached, 2);
        }
    }

    #[test]
    fn in_legacy_mode_a_device_that_is_blocked_takes_a_batch_of_its_own() {
        const ENTRY: &str = "vtd_inv_desc invalidate desc type context-cache high 0x0 low 0x1800050031";
        const GLOBAL: &str = "vtd_inv_desc invalidate desc type context-cache high 0x0 low 0x11";
        const PAGES: &str = "vtd_inv_desc invalidate desc type iotlb high 0x40000002 low 0x50032";
        let words = &WORDS[0];
        let blocked = Removal { part: Part::Device, ..FOUR_PAGES };
        let unmap = Removal { pasid: 0, ..FOUR_PAGES };
        let detachment = Removal { part: Part::All, ..unmap };
        let judge = |batches: &[&[&'static str]], removals: &[Removal]| {
            let mut lines = vec![words.on, words.doorbell];
            for batch in batches {
                lines.extend(batch.iter());
                lines.extend([words.wait, words.doorbell]);
            }
            words.judge_told(&lines, &Told { tables: Tables::Legacy, ..words.told(removals) })
        };

        for entry in [ENTRY, GLOBAL] {
            let all = [&[ENTRY, words.domain][..], &[entry, words.all], &[PAGES], &[ENTRY, words.domain]];
            let removals = [detachment, blocked, unmap, detachment];
            assert!(judge(&all, &removals).clean(), "{entry}: {:?}", judge(&all, &removals));
            let never = judge(&[all[0], all[2], &[words.domain]], &[detachment, blocked]);
            assert!(never.findings[0].contains("the blocking of stream 0x18"), "{never:?}");
        }
    }

    #[test]
    fn a_hypervisor_that_tells_of_no_detachment_is_contradicted_if_it_must() {
        for words in &WORDS {
            let judge = |removals: &[Removal], detachments| {
                let told = Told { detachments, ..words.told(removals) };
                words.judge_told(&[words.on, words.pages, words.wait], &told).clean()
            };

            assert!(judge(&[FOUR_PAGES], false) && !judge(&[FOUR_PAGES], true));
            assert!(judge(&[], true), "nothing was attached");
            let blocked = [Removal { part: Part::Device, ..FOUR_PAGES }];
            let told = Told { detachments: true, ..words.told(&blocked) };
            let trace = words.judge_told(&[words.on, words.pages, words.wait], &told);
            let of_none = |finding: &String| finding.contains("told of no detachment");
            assert!(!trace.findings.iter().any(of_none), "blocked without having been attached: {trace:?}");
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
    fn a_device_that_is_trusted_may_get_past_translation_and_no_other() {
        for words in &WORDS {
            let judge = |trusted: &[u64]| {
                let told = Told { trusted, ..words.told(&[]) };
                words.judge_told(&[words.on, words.bypass], &told).clean()
            };

            assert!(judge(&[0x18]) && !judge(&[0x20]), "{:?}", words.machine);
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
    fn only_an_smmu_that_is_taken_over_goes_off_and_even_then_nothing_gets_past_it() {
        for words in &WORDS {
            let told = Told { restarts: true, ..words.told(&[]) };
            let judge = |between: &[&str]| {
                let lines = [&[words.on, words.off], between, &[words.on]].concat();
                words.judge_told(&lines, &told).clean()
            };

            assert_eq!(judge(&[]), words.machine == Machine::Aarch64);
            assert!(!judge(&[words.bypass]));
        }
    }

    #[test]
    fn what_a_unit_was_told_before_it_is_brought_up_does_not_count() {
        let [vtd, smmu] = &WORDS;
        let again = "vtd_reg_write_gcmd status 0xc6000000 val 0x86000000";
        for (words, again) in [(vtd, &[again][..]), (smmu, &[smmu.off, smmu.on])] {
            let judge = |first: &str, second: &[&str]| {
                let lines = [&[first, words.wait, words.doorbell], again, second].concat();
                words.judge(&lines, &[FOUR_PAGES]).invalidated
            };

            assert_eq!(judge(words.pages, &[]), 0);
            assert_eq!(judge(words.all, &[words.pages]), 1);
        }
    }

    #[test]
    fn what_no_second_stage_of_an_smmu_reaches_is_cut_to_what_its_commands_hold() {
        const CUT: &str =
            "smmuv3_range_inval vmid=5 asid=-1 addr=0xfffffffffff000 tg=0 num_pages=0x1 ttl=0 leaf=1 stage=2";
        let words = &WORDS[1];
        let last = Removal { part: Part::Pages { iova: u64::MAX - 4095, pages: 1 }, ..FOUR_PAGES };
        let removals = [last];
        let judge = |tables| {
            let told = Told { tables, ..words.told(&removals) };
            words.judge_told(&[words.on, CUT, words.wait], &told).invalidated
        };

        assert_eq!((judge(Tables::Second), judge(Tables::First)), (1, 0));
    }

    #[test]
    fn an_unmap_that_leaves_the_address_space_is_never_covered() {
        let impossible =
            Removal { part: Part::Pages { iova: u64::MAX - 4095, pages: u64::MAX }, ..FOUR_PAGES };

        for words in &WORDS {
            assert_eq!(words.judge(&[words.all], &[impossible]).invalidated, 0);
        }
    }

    #[test]
    fn entries_of_one_array_share_a_batch_and_nothing_else_does() {
        let entry = |number, iova, pages| Removal { part: Part::Entry { number, iova, pages }, ..FOUR_PAGES };
        let halves = [entry(0, 0x4000_0000, 2), entry(1, 0x4000_2000, 2)];
        for words in &WORDS {
            let together = [words.pages, words.wait];
            let trace = |removals: &[Removal]| words.judge(&together, removals);

            assert!(trace(&halves).clean(), "{:?}", trace(&halves));
            assert_eq!((trace(&halves).entries, trace(&halves).unmaps), (2, 0));
            // Another array, or an unmap, wants a batch of its own.
            assert_eq!(trace(&[halves[0], entry(0, 0x4000_2000, 2)]).forgotten, 1);
            assert_eq!(trace(&[halves[0], FOUR_PAGES]).invalidated, 0);
            assert_eq!(trace(&[FOUR_PAGES, halves[0]]).forgotten, 0);
            assert_eq!(trace(&[entry(0, 0x4000_4000, 1)]).forgotten, 0);
        }
    }

    #[test]
    fn the_last_page_ends_where_addresses_do() {
        let last = Removal { part: Part::Pages { iova: u64::MAX - 4095, pages: 1 }, ..FOUR_PAGES };

        for words in &WORDS {
            assert_eq!(words.judge(&[words.all, words.wait], &[last]).invalidated, 1);
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
