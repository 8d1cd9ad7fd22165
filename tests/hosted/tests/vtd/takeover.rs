//! How the VT-d driver takes a unit over that firmware left on: no device and no interrupt gets through on the way that did
//! not before, and none comes back that was stopped.

use crate::HARDWARE;
use hosted::{Machine, Moment, Tapped, needs};
use iommu::{Bus, DmaBuf, Error, Features, Invalidation, Iova, Message, Pasid, PhysAddr, StreamId};
use models::{
    golden,
    memory::Memory,
    vtd::{Config, VtdUnit},
};
use pgtable::VtdFirstStage;
use std::sync::{Arc, Mutex};
use vtd::{FRAME_WORDS, Found, Mode};

/// The device that firmware lets through, and one that it does not.
const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);

const GCMD: usize = 0x018;
const GSTS: usize = 0x01C;
const RTADDR: usize = 0x020;
const IQT: usize = 0x088;
const IQA: usize = 0x090;
const IRTA: usize = 0x0B8;
const PMEN: usize = 0x064;
const TE: u32 = 1 << 31;
const SRTP: u32 = 1 << 30;
const QIE: u32 = 1 << 26;
const IRE: u32 = 1 << 25;
const SIRTP: u32 = 1 << 24;
const CFI: u32 = 1 << 23;

/// What firmware does before it hands the unit over.
#[derive(Clone, Copy)]
struct Firmware {
    mode: Mode,
    translation: bool,
    queue: bool,
    /// The last descriptor in its queue is a wait.
    waits: bool,
    interrupts: bool,
    /// Interrupts of the compatibility format pass.
    compatibility: bool,
}

const ALL: Firmware = Firmware {
    mode: Mode::Scalable,
    translation: true,
    queue: true,
    waits: true,
    interrupts: true,
    compatibility: true,
};

/// What firmware left in memory.
struct Left {
    /// A page that the disk may read, and begins with a word that is known.
    page: u64,
    /// Its invalidation queue.
    queue: DmaBuf,
}

const WORD: u64 = 0x005E_C2E7;

/// A page that the unit sees with these words at its start.
fn page(unit: &VtdUnit, memory: &Memory, words: &[(usize, u64)]) -> DmaBuf {
    let mut page = memory.take(FRAME_WORDS, FRAME_WORDS);
    page.clear();
    for &(at, word) in words {
        page.store(at, word);
    }
    unit.publish(page.range(0, FRAME_WORDS));
    page
}

/// Writes one change of `GCMD`, and polls.
fn command(unit: &VtdUnit, bit: u32) {
    let levels = unit.read32(GSTS) & 0x96FF_FFFF;
    unit.write32(GCMD, levels | bit);
    assert!((0..100).any(|_| unit.read32(GSTS) & bit != 0), "{bit:#x}");
}

impl Firmware {
    fn run(self, unit: &VtdUnit, memory: &Memory) -> Left {
        let data = page(unit, memory, &[(0, WORD)]).phys().0;
        let queue = page(unit, memory, &[]);
        let wide = self.mode == Mode::Scalable;
        if self.queue {
            unit.write64(IQT, 0);
            unit.write64(IQA, queue.phys().0 | u64::from(wide) << 11);
            command(unit, QIE);
        }
        if self.translation {
            let root = self.tables(unit, memory);
            unit.write64(RTADDR, root | u64::from(wide) << 10);
            command(unit, SRTP);
            command(unit, TE);
        }
        if self.interrupts {
            // Entry 0: vector 0x30 for APIC 1, of whichever device: row 58 without SVT, in xAPIC format (destination in 47:40).
            let table = page(unit, memory, &[(0, 1 | 0x30 << 16 | 1 << 40), (1, 0)]);
            unit.write64(IRTA, table.phys().0 | 7);
            command(unit, SIRTP);
            if self.queue {
                self.forget_interrupts(unit, memory, &queue);
            }
            // Firmware waits.
            assert!(!unit.executed().is_empty());
            command(unit, IRE);
        }
        if self.compatibility {
            command(unit, CFI);
        }
        Left { page: data, queue }
    }

    /// A root under which the disk bypasses (rows 4 and 15).
    fn tables(self, unit: &VtdUnit, memory: &Memory) -> u64 {
        let context = if self.mode == Mode::Legacy {
            // 16 bytes an entry: TT 2, AW 2, DID 3.
            page(unit, memory, &[(0x20 * 2, 1 | 2 << 2), (0x20 * 2 + 1, 2 | 3 << 8)])
        } else {
            // PGTT 4, AW 2, DID 3; directory; context of 32 bytes.
            let entries = page(unit, memory, &[(0, 1 | 2 << 2 | 4 << 6), (1, 3)]);
            let directory = page(unit, memory, &[(0, entries.phys().0 | 1)]);
            page(unit, memory, &[(0x20 * 4, directory.phys().0 | 1)])
        };
        page(unit, memory, &[(0, context.phys().0 | 1)]).phys().0
    }

    /// Two descriptors: interrupt entries, and a wait, or the two the other way round.
    fn forget_interrupts(self, unit: &VtdUnit, memory: &Memory, queue: &DmaBuf) {
        let width = if self.mode == Mode::Scalable { 4 } else { 2 };
        let mut descriptors = [golden::INTERRUPT_GLOBAL, golden::WAIT_FENCE];
        if !self.waits {
            descriptors.reverse();
        }
        for (at, words) in (0..).step_by(width).zip(descriptors) {
            for (n, &word) in words[..width].iter().enumerate() {
                let address = PhysAddr(queue.phys().0 + (at + n) as u64 * 8);
                memory.device_store(address, word).expect("inside");
            }
        }
        unit.write64(IQT, width as u64 * 16);
    }
}

/// What got through at one moment: the disk's read, any other device's, a remapped interrupt, one in the old format.
type Through = [bool; 4];

fn through(unit: &VtdUnit, page: u64) -> Through {
    let others = [(NIC, None), (StreamId(0x100), None), (DISK, Pasid::new(5)), (StreamId(0xFFFF), None)];
    let message = |address, data| unit.interrupt(DISK, Message { address, data }).is_ok();
    [
        unit.dma_read(DISK, None, Iova(page), 8) == Ok(WORD.to_le_bytes().to_vec()),
        others.iter().any(|&(stream, pasid)| unit.dma_read(stream, pasid, Iova(page), 1).is_ok()),
        message(0xFEE0_0010, 0),
        message(0xFEE0_1000, 0x41),
    ]
}

/// Each change of what gets through, in a takeover with a look after each write to a register.
fn changes(config: Config, firmware: Firmware, mode: Mode) -> (Result<Machine<Tapped>, Error>, Vec<Through>) {
    let (unit, memory) = HARDWARE.unit(config);
    let left = firmware.run(unit, &memory);
    let seen = Arc::new(Mutex::new(vec![through(unit, left.page)]));
    let kept = Arc::clone(&seen);
    let bus = Tapped::new(unit, move |unit, moment| {
        if matches!(moment, Moment::Access) {
            return;
        }
        let now = through(unit, left.page);
        let mut seen = kept.lock().expect("no test panics here");
        if seen.last() != Some(&now) {
            seen.push(now);
        }
    });
    // With x2APIC destinations the compatibility format would be blocked whatever CFIS says.
    let parts = vtd::Memory { x2apic: false, ..needs(&memory) };
    let mut found = Found::probe(bus).expect("it is there").with_old_queue(left.queue);
    if mode == Mode::Legacy {
        found = found.in_legacy_mode();
    }
    let machine = HARDWARE.from_found(found, unit, memory, parts);
    let seen = seen.lock().expect("no test panics here").clone();
    (machine, seen)
}

/// Whether the unit forgets by itself when its tables are set: CAP.ESRTPS (63) and ESIRTPS (62), or neither.
fn units() -> [Config; 3] {
    let base = Config::full();
    [0, 1 << 63, 3 << 62].map(|bits| Config { cap: base.cap & !(3 << 62) | bits, ..base })
}

#[test]
fn nothing_gets_through_on_the_way_that_did_not_before_and_nothing_comes_back() {
    for config in units() {
        for mode in [Mode::Scalable, Mode::Legacy] {
            for (queue, compatibility) in [(true, true), (true, false), (false, false)] {
                // Without the queue interrupt remapping cannot have been switched on.
                let firmware = Firmware { mode, queue, interrupts: queue, compatibility, ..ALL };

                let (machine, seen) = changes(config, firmware, mode);

                let machine = machine.expect("it comes into service");
                assert_eq!(seen.first(), Some(&[true, false, queue, compatibility || !queue]));
                assert_eq!(seen.last(), Some(&[false; 4]), "ours");
                for at in 0..4 {
                    let mut ended = seen.iter().map(|through| through[at]).skip_while(|&through| through);
                    // Without remapping all interrupts pass until there is some, whatever their format.
                    assert!(!ended.any(|through| through), "{at} comes back: {seen:?}");
                }
                machine.assert_lawful();
            }
        }
    }
}

/// "Program device table when reuse fails", "Fix kdump boot failure with scalable mode".
#[test]
fn a_unit_taken_over_serves_devices() {
    for config in units() {
        let (unit, memory) = HARDWARE.unit(config);
        let left = ALL.run(unit, &memory);
        // What the unit remembers of firmware's time.
        assert!(through(unit, left.page)[0]);
        let parts = needs(&memory);
        let mut machine = HARDWARE.enable(unit, memory, unit, parts).expect("it comes into service");
        assert!(machine.read(DISK, None, Iova(left.page)).is_err());

        machine.assign(DISK, Features { device_tlb: true, page_requests: true, pasid: true });
        let tree = machine.tree(VtdFirstStage::<4>);
        machine.attach(DISK, None, &tree);
        machine.map(&tree, Iova(0x1000), 7);

        assert_eq!(machine.read(DISK, None, Iova(0x1000)), Ok(7));
        assert!(machine.read(DISK, None, Iova(left.page)).is_err(), "the old mapping");
        machine.assert_lawful();
    }
}

#[test]
fn translation_by_tables_of_another_mode_is_named_and_left_on() {
    for (theirs, ours) in [(Mode::Legacy, Mode::Scalable), (Mode::Scalable, Mode::Legacy)] {
        let (unit, memory) = HARDWARE.unit(Config::full());
        let left = Firmware { mode: theirs, ..ALL }.run(unit, &memory);
        let status = unit.read32(GSTS);
        let parts = needs(&memory);
        let found = || {
            let found = Found::probe(unit).expect("it is there");
            if ours == Mode::Legacy { found.in_legacy_mode() } else { found }
        };

        let error = HARDWARE.from_found(found(), unit, memory.clone(), needs(&memory)).err();
        assert!(matches!(error, Some(Error::InUse { what }) if what.contains("RTADDR.TTM")), "{error:?}");
        assert_eq!(unit.read32(GSTS), status);
        assert_eq!(through(unit, left.page)[..2], [true, false]);

        // Who has turned bus masters off may end it, and go on.
        found().end_translation().expect("it goes off");
        let machine = HARDWARE.from_found(found(), unit, memory, parts).expect("it comes into service");
        assert_eq!(through(unit, left.page), [false; 4]);
        machine.assert_lawful();
    }
}

#[test]
fn a_queue_that_goes_off_only_after_a_wait_gets_one_if_its_memory_is_lent() {
    let config = Config { ends_queue_after_wait: true, ..Config::full() };
    for mode in [Mode::Scalable, Mode::Legacy] {
        let firmware = Firmware { mode, waits: false, ..ALL };
        let (machine, seen) = changes(config, firmware, mode);
        machine.expect("it comes into service").assert_lawful();
        assert_eq!(seen.last(), Some(&[false; 4]));

        let (unit, memory) = HARDWARE.unit(config);
        let left = firmware.run(unit, &memory);
        let parts = needs(&memory);
        let found = Found::probe(unit).expect("it is there");
        let (start, end) = found.old_queue().map(|old| (old.start, old.end)).expect("it is on");
        assert_eq!((start, end.0 - start.0), (left.queue.phys(), 0x1000));
        let found = if mode == Mode::Legacy { found.in_legacy_mode() } else { found };
        let error = HARDWARE.from_found(found, unit, memory, parts).err();
        assert!(matches!(error, Some(Error::Timeout { register: "GSTS.QIES", .. })), "{error:?}");
        assert_eq!(through(unit, left.page)[..2], [true, false], "as firmware left it");
    }
}

#[test]
fn memory_that_is_not_the_old_queue_s_is_refused() {
    let (unit, memory) = HARDWARE.unit(Config::full());
    let left = ALL.run(unit, &memory);
    let parts = needs(&memory);
    let other = memory.take(FRAME_WORDS, FRAME_WORDS);

    let found = Found::probe(unit).expect("it is there").with_old_queue(other);
    let error = HARDWARE.from_found(found, unit, memory, parts).err();

    assert!(matches!(error, Some(Error::Memory { purpose: "the old invalidation queue", .. })), "{error:?}");
    assert_eq!(through(unit, left.page)[..2], [true, false]);
}

#[test]
fn an_old_queue_that_is_never_empty_is_given_up_in_time() {
    let (unit, memory) = HARDWARE.unit(Config::full());
    let left = ALL.run(unit, &memory);
    unit.pause(0);
    unit.write64(IQT, 96);
    let parts = needs(&memory);

    let error = HARDWARE.enable(unit, memory, unit, parts).err();

    assert!(matches!(error, Some(Error::Timeout { register: "IQH", .. })), "{error:?}");
    assert_eq!(through(unit, left.page)[..2], [true, false]);
}

/// A unit that does not acknowledge a step: whatever it is, no device gets through that did not before.
#[test]
fn a_takeover_that_is_given_up_leaves_nothing_more_open_than_it_was() {
    for silent in [QIE, SRTP, SIRTP] {
        let (unit, memory) = HARDWARE.unit(Config::full());
        let left = ALL.run(unit, &memory);
        let parts = needs(&memory);
        unit.never_acknowledge(silent);

        let error = HARDWARE.enable(unit, memory, unit, parts).err();

        assert!(matches!(error, Some(Error::Timeout { .. })), "{silent:#x}: {error:?}");
        assert_ne!(unit.read32(GSTS) & TE, 0, "{silent:#x}: translation stays on");
        assert!(!through(unit, left.page)[1], "{silent:#x}");
    }
}

#[test]
fn memory_that_firmware_protects_stays_so_until_translation_does_it() {
    // CAP.PLMR and PHMR are bits 5 and 6.
    let config = Config { cap: Config::full().cap | 3 << 5, ..Config::full() };
    let firmware = Firmware { translation: false, ..ALL };
    let (unit, memory) = HARDWARE.unit(config);
    let left = firmware.run(unit, &memory);
    // All of memory below and above 4 GiB.
    for (at, value) in [(0x068, 0), (0x06C, u32::MAX)] {
        unit.write32(at, value);
    }
    unit.write64(0x070, 1 << 32);
    unit.write64(0x078, u64::MAX);
    unit.write32(PMEN, 1 << 31);
    assert!((0..100).any(|_| unit.read32(PMEN) & 1 != 0));
    let leaks = Arc::new(Mutex::new(0));
    let count = Arc::clone(&leaks);
    let bus = Tapped::new(unit, move |unit, _| {
        let through = through(unit, left.page);
        *count.lock().expect("no test panics here") += usize::from(through[0] || through[1]);
    });
    let parts = needs(&memory);

    let machine = HARDWARE.enable(unit, memory, bus, parts).expect("it comes into service");

    assert_eq!(*leaks.lock().expect("no test panics here"), 0);
    assert_eq!(unit.read32(PMEN), 0);
    machine.assert_lawful();
}

mod without_a_queue {
    use super::*;
    use hosted::root;
    use iommu::{Commands, Completion, PageResponse, Tables, Translation};
    use pgtable::VtdSecondStage;

    /// A unit of old: no queued invalidation (1), device TLBs (2), interrupt remapping (3), page requests (29), scalable mode
    /// (43).
    fn old() -> Config {
        let lacks = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 29 | 1 << 42 | 1 << 43 | 1 << 46 | 1 << 47;
        // ESRTPS is not theirs.
        Config { ecap: Config::full().ecap & !lacks, cap: Config::full().cap & !(1 << 63), ..Config::full() }
    }

    #[test]
    fn a_unit_is_told_through_its_registers_and_each_ticket_is_done_at_once() {
        let mut machine = HARDWARE.machine(old());
        assert_eq!(machine.unit.read32(GSTS), TE | SRTP);
        machine.assign(DISK, Features::default());
        let tree = machine.tree(VtdSecondStage::<4>);
        let translation = Translation::Stage2(root(tree.root().0, tree.levels()));
        let (at, invalidations) =
            machine.vtd.tables.attach(DISK, None, translation).expect("it can be attached");
        machine.invalidate(&invalidations);
        for n in 0..6 {
            machine.map(&tree, Iova(0x1000 * n), n);
            assert_eq!(machine.read(DISK, None, Iova(0x1000 * n)), Ok(n));
        }

        machine.unmap(&tree, Iova(0x2000));
        assert_eq!(machine.read(DISK, None, Iova(0x2000)), Ok(2), "it is remembered");
        let pages = Invalidation::Pages { attachment: at, iova: Iova(0x2000), pages: 1 };
        let ticket = machine.vtd.commands.submit(&[pages]).expect("the unit acknowledges");
        assert_eq!(machine.vtd.commands.poll(ticket), Completion::Done);
        assert!(machine.read(DISK, None, Iova(0x2000)).is_err());
        assert_eq!(machine.read(DISK, None, Iova(0x3000)), Ok(3));

        machine.detach(at);
        assert!(machine.read(DISK, None, Iova(0x3000)).is_err());
        machine.block(DISK);
        assert!(machine.unit.executed().is_empty());
        machine.assert_lawful();
    }

    /// Rows 77 to 80, with the unit's DW and DR (48, 49).
    #[test]
    fn each_invalidation_is_written_as_in_the_manual() {
        let (unit, memory) = HARDWARE.unit(old());
        let parts = needs(&memory);
        let log = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&log);
        let bus = Tapped::new(unit, move |_, moment| {
            if let Moment::Written { offset, value } = moment {
                kept.lock().expect("no test panics here").push((offset, value));
            }
        });
        let mut machine = HARDWARE.enable(unit, memory, bus, parts).expect("it comes into service");
        // ECAP.IRO (17:8), in 16 bytes: IVA, and IOTLB after it.
        let iva = (old().ecap >> 8 & 0x3FF) as usize * 16;
        let at = iommu::Attachment {
            serial: 1,
            stream: StreamId(0x0108),
            pasid: None,
            domain: iommu::DomainId(0x42),
            stages: iommu::Stages::Second,
            device_tlb: false,
        };
        let mut written = |invalidation| {
            log.lock().expect("no test panics here").clear();
            machine.invalidate(&[invalidation]);
            log.lock().expect("no test panics here").clone()
        };

        assert_eq!(
            written(Invalidation::All),
            [(0x28, 0xA000_0000_0000_0000), (iva, 0), (iva + 8, 0x9003_0000_0000_0000)]
        );
        assert_eq!(
            written(Invalidation::Attachment(at)),
            [(0x28, 0xE000_0000_0108_0042), (iva, 0), (iva + 8, 0xA003_0042_0000_0000)]
        );
        // Row 80 without IH.
        let pages = Invalidation::Pages { attachment: at, iova: Iova(0x1234_0000), pages: 16 };
        assert_eq!(written(pages), [(iva, 0x1234_0004), (iva + 8, 0xB003_0042_0000_0000)]);
        machine.assert_lawful();
    }

    #[test]
    fn it_refuses_what_registers_cannot_say() {
        let mut machine = HARDWARE.machine(old());
        let response = PageResponse {
            stream: DISK,
            tag: iommu::GroupTag { pasid: None, index: 0 },
            outcome: iommu::Outcome::Success,
        };

        let drained = machine.vtd.commands.submit(&[Invalidation::PageRequestDrain]);
        assert!(matches!(drained, Err(Error::Unsupported { .. })), "{drained:?}");
        assert!(machine.vtd.commands.submit(&[Invalidation::Interrupts]).is_err());
        let refused = machine.vtd.commands.respond(response).map_err(|(back, _)| back.stream);
        assert_eq!(refused, Err(DISK));
        assert_eq!(machine.vtd.commands.recover(), None);
        let found = Found::probe(machine.unit).expect("it is there");
        assert!(!found.capabilities().device_tlb && !found.capabilities().page_requests);
    }

    #[test]
    fn a_unit_that_does_not_acknowledge_is_given_up_in_time() {
        let mut machine = HARDWARE.machine(old());
        machine.unit.acknowledge_after(u32::MAX);

        let error = machine.vtd.commands.submit(&[Invalidation::All]);

        assert!(matches!(error, Err(Error::Timeout { register: "CCMD.ICC", .. })), "{error:?}");
        // It is not told more before it has done what it was told.
        let again = machine.vtd.commands.submit(&[Invalidation::All]);
        assert!(matches!(again, Err(Error::Timeout { register: "CCMD.ICC", .. })), "{again:?}");
        machine.assert_lawful();
    }

    #[test]
    fn a_unit_whose_kind_has_no_such_registers_is_refused() {
        // VER.MAX 6 and later; interrupt remapping, and scalable mode, are not to be had without a queue.
        let with_remapping = Config { ecap: old().ecap | 1 << 3, ..old() };
        let scalable = Config { ecap: old().ecap | 1 << 43, ..old() };
        for config in [Config { version: 0x60, ..old() }, with_remapping, scalable] {
            let (unit, memory) = HARDWARE.unit(config);
            let parts = needs(&memory);

            let error = HARDWARE.enable(unit, memory, unit, parts).err();

            assert!(matches!(error, Some(Error::Unsupported { feature }) if feature.contains("ECAP.QI")));
            assert_eq!(unit.read32(GSTS), 0);
        }
    }
}
