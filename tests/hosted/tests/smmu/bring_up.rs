//! How the SMMUv3 driver takes a unit into service, and why it does not.

use crate::{HARDWARE, STREAM_TABLE};
use hosted::{
    Moment,
    smmu::{Machine, Stage, Tapped, needs},
};
use iommu::{
    Bus, Commands, DmaBuf, Error, Event, Events, FaultReason, Features, GroupTag, Iova, Outcome, PageRequest,
    PageResponse, Pasid, Perms, PhysAddr, StreamId, Tables,
};
use models::{
    golden_smmuv3 as golden,
    memory::Memory,
    smmuv3::{Config, Refusal, Requested, SmmuUnit, Update},
};
use smmuv3::Found;
use std::{
    ops::Range,
    sync::{Arc, Mutex},
};

const DISK: StreamId = StreamId(0x20);
const HERE: Iova = Iova(0x8_0000_0000);

const IDR0: usize = 0x000;
const IDR1: usize = 0x004;
const IDR5: usize = 0x014;
const CR0: usize = 0x020;
const CR0ACK: usize = 0x024;
const CR1: usize = 0x028;
const CR2: usize = 0x02C;
const GBPA: usize = 0x044;
const IRQ_CTRL: usize = 0x050;
const IRQ_CTRLACK: usize = 0x054;
const STRTAB_BASE: usize = 0x080;
const STRTAB_BASE_CFG: usize = 0x088;
const CMDQ_BASE: usize = 0x090;
const CMDQ_PROD: usize = 0x098;
const CMDQ_CONS: usize = 0x09C;
const EVENTQ_BASE: usize = 0x0A0;
const EVENTQ_PROD: usize = 0x1_00A8;
const EVENTQ_CONS: usize = 0x1_00AC;
const PRIQ_BASE: usize = 0x0C0;
const PRIQ_IRQ_CFG2: usize = 0x0DC;
const PRIQ_PROD: usize = 0x1_00C8;
const PRIQ_CONS: usize = 0x1_00CC;

const SMMUEN: u32 = 1 << 0;
const PRIQEN: u32 = 1 << 1;
const EVENTQEN: u32 = 1 << 2;
const CMDQEN: u32 = 1 << 3;
const ATSCHK: u32 = 1 << 4;

/// Writes a control register as firmware would, and waits for its acknowledgement.
fn command(unit: &SmmuUnit, register: usize, value: u32) {
    unit.write32(register, value);
    assert!((0..100).any(|_| unit.read32(register + 4) == value), "{register:#x}");
}

/// What the driver wrote, and what devices could do after it.
#[derive(Default)]
struct Log {
    writes: Vec<(usize, u64)>,
    /// What devices got through although the driver had begun.
    leaks: usize,
    /// The unit is in service: devices try no more.
    over: bool,
}

/// A unit, its memory, and a bus to it that keeps a log.
fn logged(config: Config) -> (&'static SmmuUnit, Memory, Tapped, Arc<Mutex<Log>>) {
    let (unit, memory) = HARDWARE.smmu_unit(config);
    let log = Arc::<Mutex<Log>>::default();
    let kept = Arc::clone(&log);
    let bus = Tapped::new(unit, move |unit, moment| {
        let mut log = kept.lock().expect("no test panics here");
        if let Moment::Written { offset, value } = moment {
            log.writes.push((offset, value));
        }
        // The first write asks for GBPA.ABORT; the second comes when that is in force.
        if log.writes.len() < 2 || log.over {
            return;
        }
        for stream in [0, 0x20, 0x1FF, 0x200, 0xFFFF].map(StreamId) {
            for pasid in [None, Pasid::new(0), Pasid::new(5)] {
                let refused = unit.dma_read(stream, pasid, HERE, 1);
                let through = matches!(refused, Ok(_) | Err(Refusal::NoMemory(_) | Refusal::Ignored));
                log.leaks += usize::from(through);
            }
        }
    });
    (unit, memory, bus, log)
}

#[test]
fn bring_up_follows_the_order_of_the_manual() {
    let (unit, memory, bus, log) = logged(Config::full());
    let needs = needs(STREAM_TABLE, &memory);
    let [table, commands, events, requests] =
        [&needs.stream_table, &needs.command_queue, &needs.event_queue, &needs.page_requests]
            .map(|b| b.phys().0);

    let machine = HARDWARE.enable_smmu(unit, memory, bus, needs).expect("it comes into service");

    let writes = log.lock().expect("no test panics here").writes.clone();
    let at = |offset: usize, value: u64| {
        let found = writes.iter().position(|&write| write == (offset, value));
        found.unwrap_or_else(|| panic!("{value:#x} was never written to {offset:#x}: {writes:x?}"))
    };
    // R9: the first of all writes.
    assert_eq!(writes[0], (GBPA, 0x8010_1000));
    // Facts 8.1, with all interrupts off before the rest. R1, RECINVSID, R3 to R8 with the sizes of `needs`: 512 streams,
    // 256 commands, 128 events, 256 requests. RA and WA are bit 62.
    let hint = 1 << 62;
    let order = [
        at(CR0, 0),
        at(IRQ_CTRL, 0),
        at(CR1, 0xD75),
        at(CR2, 1 << 1),
        at(STRTAB_BASE, table | hint),
        at(STRTAB_BASE_CFG, STREAM_TABLE.format()),
        at(CMDQ_BASE, commands | hint | 8),
        at(CMDQ_PROD, 0),
        at(CMDQ_CONS, 0),
        at(CR0, 0x08),
        // The first four commands.
        at(CMDQ_PROD, 4),
        at(EVENTQ_BASE, events | hint | 7),
        at(EVENTQ_PROD, 0),
        at(EVENTQ_CONS, 0),
        at(CR0, 0x0C),
        at(PRIQ_BASE, requests | hint | 8),
        at(PRIQ_PROD, 0),
        at(PRIQ_CONS, 0),
        at(CR0, 0x0E),
        at(CR0, 0x1E),
        // R2.
        at(CR0, 0x1F),
    ];
    assert!(order.is_sorted_by(|a, b| a < b), "{order:?}");
    let enables = writes.iter().filter(|&&(offset, _)| offset == CR0).count();
    assert_eq!(enables, 6, "CR0 is never written otherwise");
    // K5, K34, K22, K34: the configuration first, or translations could come back through it.
    assert_eq!(unit.executed(), [golden::CFGI_ALL, golden::SYNC, golden::TLBI_NSNH_ALL, golden::SYNC]);
    assert_eq!(unit.read32(CR0ACK), 0x1F);
    assert_eq!(unit.read32(IRQ_CTRL), 0, "until the handlers stand");
    machine.assert_lawful();
}

#[test]
fn from_its_second_write_on_no_device_gets_through() {
    for config in [Config::qemu(), Config::full()] {
        let (unit, memory, bus, log) = logged(config);
        assert!(unit.dma_read(DISK, None, HERE, 1).is_ok(), "firmware lets all");
        let needs = HARDWARE.needs(STREAM_TABLE, &memory);

        let mut machine = HARDWARE.enable_smmu(unit, memory, bus, needs).expect("it comes into service");

        let mut log = log.lock().expect("no test panics here");
        assert_eq!(log.leaks, 0);
        log.over = true;
        drop(log);
        // Without a valid entry, and past the table C_BAD_STREAMID: both are recorded.
        machine.pass();
        assert_eq!(machine.read(DISK, None, HERE), Err(STREAM_TABLE.untouched()));
        assert_eq!(machine.read(StreamId(0x200), None, HERE), Err(Refusal::Fault(0x02)));
        let reasons: Vec<_> = machine
            .pass()
            .into_iter()
            .map(|event| match event {
                Event::Fault(fault) => (fault.stream, fault.reason),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(reasons, [(DISK, FaultReason::NotAttached), (StreamId(0x200), FaultReason::NotAttached)]);
        machine.assign(DISK, Features::default());
        for pasid in [None, Pasid::new(5)] {
            let refused = machine.read(DISK, pasid, HERE);
            assert_eq!(refused, Err(Refusal::Fault(0x04)), "assigned is not attached");
        }
        machine.assert_lawful();
    }
}

#[test]
fn what_a_device_says_it_has_translated_is_refused_as_well() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    machine.unit.plug(DISK);
    assert!(machine.ats_read(DISK, HERE).is_err());

    machine.assign(DISK, Features { device_tlb: true, ..Features::default() });

    assert!(machine.ats_read(DISK, HERE).is_err());
    assert_eq!(machine.unit.read32(CR0ACK) & ATSCHK, ATSCHK);
    machine.assert_lawful();
}

#[test]
fn before_it_is_taken_into_service_a_unit_is_only_read() {
    let (_, _, bus, log) = logged(Config::full());

    let capabilities = Found::probe(bus).expect("it is there").capabilities();

    assert!(log.lock().expect("no test panics here").writes.is_empty());
    assert!(capabilities.stage1 && capabilities.stage2 && capabilities.page_requests);
    assert!(capabilities.device_tlb && capabilities.coherent_walks);
    assert!(capabilities.nested && capabilities.bypass);
    // A first level of one frame has 512 entries of 64 PASIDs.
    assert_eq!((capabilities.levels, capabilities.pasid_bits), (4, 15));
    // A granule of 4 KiB has blocks of 2 MiB and 1 GiB, in either stage.
    let leaves = 0x1000 | 0x20_0000 | 0x4000_0000;
    assert_eq!((capabilities.stage1_leaves, capabilities.stage2_leaves), (leaves, leaves));
}

#[test]
fn what_a_unit_can_do_is_what_its_bits_say() {
    let full = Config::full();
    let of = |config| Found::probe(HARDWARE.smmu_unit(config).0).expect("it is there").capabilities();
    // IDR0: S2P 0, S1P 1, COHACC 4, ATS 10, PRI 16, CD2L 19. IDR1.SSIDSIZE [10:6]. IDR5.OAS [2:0].
    let without = |bits: u32| of(Config { idr0: full.idr0 & !bits, ..full });

    assert!(!without(1 << 0).stage2 && without(1 << 0).stage1);
    assert!(!without(1 << 1).stage1 && without(1 << 1).stage2);
    assert!(!without(1 << 4).coherent_walks);
    assert!(!without(1 << 16).page_requests && without(1 << 16).device_tlb);
    let none = without(1 << 10 | 1 << 16);
    assert!(!none.device_tlb && !none.page_requests);
    assert!(!without(1 << 0).nested && !without(1 << 1).nested);
    for (substreams, two_levels, pasid_bits) in [
        (0, true, 0),
        (5, true, 5),
        (6, true, 6),
        (8, true, 8),
        (20, true, 15),
        (20, false, 6),
        (5, false, 5),
    ] {
        let idr0 = if two_levels { full.idr0 } else { full.idr0 & !(1 << 19) };
        let config = Config { idr0, idr1: full.idr1 & !(0x1F << 6) | substreams << 6, ..full };
        assert_eq!(of(config).pasid_bits, pasid_bits, "SSIDSIZE {substreams}, CD2L {two_levels}");
    }
    assert_eq!(without(1 << 1).pasid_bits, 0, "PASIDs have a first stage each");
    // MMU-600 (0x483 of Arm, 0x43B) before variant 2 is known not to nest.
    for (variant, nested) in [(0, false), (1, false), (2, true)] {
        assert_eq!(of(Config { iidr: 0x483 << 20 | variant << 16 | 0x43B, ..full }).nested, nested);
    }
}

#[test]
fn what_a_unit_does_not_have_is_left_untouched() {
    // The model notes writes to registers and bits that are not there.
    let full = Config::full();
    for (config, enabled) in [
        (Config::qemu(), SMMUEN | EVENTQEN | CMDQEN),
        (Config { idr0: full.idr0 & !(1 << 16), ..full }, SMMUEN | EVENTQEN | CMDQEN | ATSCHK),
        (Config { idr0: full.idr0 & !1, ..full }, 0x1F),
        (Config { idr0: full.idr0 & !2, ..full }, 0x1F),
    ] {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, config);

        assert_eq!(machine.unit.read32(CR0ACK), enabled);
        assert_eq!(machine.read(DISK, None, HERE), Err(STREAM_TABLE.untouched()));
        assert_eq!(machine.pass().len(), 1, "the fault");
        machine.smmu.events.enable_interrupts().expect("it is acknowledged");
        // GERROR, EVENTQ, and PRIQ where there is one.
        let wires = 1 | 1 << 2 | if enabled & PRIQEN != 0 { 1 << 1 } else { 0 };
        assert_eq!(machine.unit.read32(IRQ_CTRLACK), wires);
        machine.assert_lawful();
    }
}

#[test]
fn a_unit_that_is_not_coherent_accesses_memory_past_the_caches() {
    let full = Config::full();
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config { idr0: full.idr0 & !(1 << 4), ..full });

    assert_eq!(machine.unit.read32(CR1), 0);
    machine.assign(DISK, Features::default());
    // S1CIR, S1COR, S1CSH; S2IR0, S2OR0, S2SH0.
    assert_eq!(machine.stream_word(DISK, 1) & 0xFC, 0);
    assert_eq!(machine.stream_word(DISK, 2) & 0x3F << 40, 0);
    machine.assert_lawful();
}

#[test]
fn what_firmware_left_behind_is_taken_over_and_not_taken_for_ours() {
    let (unit, memory) = HARDWARE.smmu_unit(Config::full());
    // Queues on, of firmware's own, with an event in them; interrupts on, in the other manner; errors active.
    let queue = memory.take(512, 512);
    unit.write64(EVENTQ_BASE, queue.phys().0 | 4);
    unit.write64(CMDQ_BASE, queue.phys().0 | 4);
    unit.write32(PRIQ_IRQ_CFG2, 1 << 31);
    command(unit, CR0, EVENTQEN);
    command(unit, CR0, EVENTQEN | CMDQEN);
    command(unit, IRQ_CTRL, 0x7);
    unit.record(golden::C_BAD_STE);
    unit.raise_errors(0x0D);
    unit.pulses();
    let parts = HARDWARE.needs(STREAM_TABLE, &memory);

    let mut machine = HARDWARE.enable_smmu(unit, memory, unit, parts).expect("it comes into service");

    assert_eq!(machine.pass(), [], "events and errors of the time before");
    assert_eq!(unit.read32(PRIQ_IRQ_CFG2), 0, "LO");
    machine.smmu.events.enable_interrupts().expect("it is acknowledged");
    assert_eq!(machine.read(DISK, None, HERE), Err(STREAM_TABLE.untouched()));
    assert_eq!(machine.pass().len(), 1);
    unit.raise_errors(1 << 2);
    let told = [Event::FaultsLost, Event::CommandsFailed { status: 1 << 2 }];
    assert_eq!(machine.pass(), told, "errors of our time are still told");
    machine.assert_lawful();
}

/// A bus to a unit, if there is one, on which one register says something else; nothing may be written.
#[derive(Clone)]
struct Posing {
    unit: Option<&'static SmmuUnit>,
    register: usize,
    value: u32,
}

impl Bus for Posing {
    fn read32(&self, offset: usize) -> u32 {
        let value = self.unit.map_or(u32::MAX, |unit| unit.read32(offset));
        if offset == self.register { self.value } else { value }
    }
    fn write32(&self, offset: usize, _: u32) {
        panic!("write to {offset:#x} of a unit that is refused");
    }
    fn read64(&self, offset: usize) -> u64 {
        panic!("{offset:#x} is not looked at");
    }
    fn write64(&self, offset: usize, _: u64) {
        panic!("write to {offset:#x} of a unit that is refused");
    }
    fn publish(&self, _: Range<PhysAddr>) {}
    fn observe(&self, _: Range<PhysAddr>) {}
    fn now_us(&self) -> u64 {
        0
    }
}

#[test]
fn a_unit_that_is_not_there_is_absent() {
    let bus = Posing { unit: None, register: IDR0, value: u32::MAX };

    assert_eq!(Found::probe(bus).err(), Some(Error::Absent));
}

#[test]
fn what_a_unit_lacks_is_named_and_the_unit_left_alone() {
    let Config { idr0, idr1, idr5, .. } = Config::qemu();
    for (register, value, name) in [
        // TTF [3:2] = 1: AArch32 tables alone.
        (IDR0, idr0 & !(3 << 2) | 1 << 2, "IDR0.TTF"),
        // TTENDIAN [22:21] = 3: big.
        (IDR0, idr0 | 3 << 21, "IDR0.TTENDIAN"),
        // STALL_MODEL [25:24] = 2: forced.
        (IDR0, idr0 & !(3 << 24) | 2 << 24, "IDR0.STALL_MODEL"),
        (IDR1, idr1 | 1 << 30, "IDR1.TABLES_PRESET"),
        (IDR1, idr1 | 1 << 29, "IDR1.QUEUES_PRESET"),
        (IDR5, idr5 & !(1 << 4), "IDR5.GRAN4K"),
    ] {
        let (unit, memory) = HARDWARE.smmu_unit(Config::qemu());
        let needs = HARDWARE.needs(STREAM_TABLE, &memory);
        let bus = Posing { unit: Some(unit), register, value };

        let error = HARDWARE.enable_smmu(unit, memory, bus, needs).err();

        let Some(Error::Unsupported { feature }) = error else { panic!("{name}: {error:?}") };
        assert!(feature.contains(name), "{feature} does not name {name}");
    }
}

/// Sets up a unit as firmware would: all in bypass by its own stream table of one level, with a queue of commands that it
/// has not yet executed; returns the memory of firmware's tables.
fn firmware(unit: &SmmuUnit, memory: &Memory, pending: usize) -> DmaBuf {
    let mut table = memory.take(4096, 4096);
    table.clear();
    for stream in 0..512 {
        table.store(stream * 8, golden::STE_BYPASS[0]);
        table.store(stream * 8 + 1, golden::STE_BYPASS[1]);
    }
    memory.publish(table.range(0, 4096)).expect("inside");
    let mut queue = memory.take(512, 512);
    let commands = [golden::CFGI_ALL, golden::SYNC, golden::TLBI_NSNH_ALL, golden::SYNC];
    for (at, words) in commands.into_iter().chain([golden::CFGI_ALL; 20]).enumerate() {
        queue.store_all(at * 2, words);
    }
    memory.publish(queue.range(0, 512)).expect("inside");
    unit.write32(CR2, 2);
    unit.write64(STRTAB_BASE, table.phys().0);
    unit.write32(STRTAB_BASE_CFG, 9);
    unit.write64(CMDQ_BASE, queue.phys().0 | 8);
    unit.write64(EVENTQ_BASE, memory.take(512, 512).phys().0 | 7);
    command(unit, CR0, CMDQEN);
    unit.write32(CMDQ_PROD, 4);
    command(unit, CR0, CMDQEN | EVENTQEN);
    command(unit, CR0, CMDQEN | EVENTQEN | SMMUEN);
    unit.pause();
    unit.write32(CMDQ_PROD, 4 + pending as u32);
    table
}

#[test]
fn a_unit_that_firmware_left_on_is_taken_over_without_a_moment_of_bypass() {
    // Firmware's last commands: none, some that take their time, some that never complete.
    for (pending, completes) in [(0, true), (5, true), (5, false)] {
        // Its firmware sets the time of the queue.
        let (unit, memory) =
            hosted::Hardware::Prompt.smmu_unit(Config { clock_step_us: 100, ..Config::full() });
        firmware(unit, &memory, pending);
        let page = memory.take(512, 512).phys().0;
        let read = |unit: &SmmuUnit| unit.dma_read(DISK, None, Iova(page), 1);
        assert!(read(unit).is_ok(), "firmware lets all");
        assert_eq!(unit.read32(GBPA), 0x1000, "and would without tables");
        let log = Arc::new(Mutex::new((Vec::new(), false, false)));
        let kept = Arc::clone(&log);
        let bus = Tapped::new(unit, move |unit, moment| {
            let mut log = kept.lock().expect("no test panics here");
            if let Moment::Written { offset, value } = moment {
                log.0.push((offset, value));
                if completes && log.0.len() == 3 {
                    unit.resume();
                }
            }
            // From the moment that translation is off, nothing gets through: neither by GBPA, nor by what was cached.
            if log.2 {
                return;
            }
            let off = unit.read32(CR0ACK) & SMMUEN == 0;
            log.1 |= off;
            let through = unit.dma_read(DISK, None, Iova(page), 1).is_ok();
            assert!(!through || !log.1, "after {:x?}", log.0.last());
        });
        let needs = HARDWARE.needs(STREAM_TABLE, &memory);

        let mut machine = HARDWARE.enable_smmu(unit, memory, bus, needs);
        log.lock().expect("no test panics here").2 = true;
        if !completes {
            // The new queue does not complete either: the unit is out of order, and still refuses everything.
            assert!(matches!(machine.err(), Some(Error::Timeout { register: "CMDQ_CONS", .. })));
            assert_eq!(read(unit), Err(Refusal::Aborted));
            continue;
        }

        let machine = machine.as_mut().expect("it comes into service");
        machine.pass();
        let log = log.lock().expect("no test panics here");
        let writes: Vec<_> = log.0.iter().filter(|(at, _)| [GBPA, CR0].contains(at)).take(4).collect();
        // ABORT first; then SMMUEN, EVENTQEN and CMDQEN, one after the other.
        let on = |bits: u32| (CR0, u64::from(bits));
        assert_eq!(writes, [&(GBPA, 0x8010_1000), &on(CMDQEN | EVENTQEN), &on(CMDQEN), &on(0)]);
        let firmwares = unit.executed().iter().filter(|words| **words == golden::CFGI_ALL).count();
        assert_eq!(firmwares, 1 + pending + 1, "its commands were executed, and ours");
        drop(log);
        // What firmware's entries said was cached, and is forgotten.
        assert_eq!(machine.read(DISK, None, Iova(page)), Err(STREAM_TABLE.untouched()));
        assert_eq!(machine.pass().len(), 1);
        machine.assert_lawful();
    }
}

#[test]
fn an_update_that_firmware_left_underway_is_waited_for() {
    let (unit, memory) = HARDWARE.smmu_unit(Config::qemu());
    unit.acknowledge_after(40);
    unit.write32(CR0, EVENTQEN);
    let needs = HARDWARE.needs(STREAM_TABLE, &memory);

    let machine = HARDWARE.enable_smmu(unit, memory, unit, needs).expect("it comes into service");

    // The model notes a bit that changes again before its acknowledgement.
    machine.assert_lawful();
}

#[test]
fn a_unit_that_is_stopped_refuses_everything_and_can_be_taken_into_service_again() {
    let (unit, memory) = HARDWARE.smmu_unit(Config::full());
    let parts = HARDWARE.needs(STREAM_TABLE, &memory);
    let mut machine = HARDWARE.enable_smmu(unit, memory.clone(), unit, parts).expect("it comes into service");
    machine.smmu.events.enable_interrupts().expect("it is acknowledged");
    let tree = machine.tree(Stage::One);
    machine.map(&tree, HERE, 7, Perms::READ);
    machine.assign(DISK, Features::default());
    machine.attach(DISK, Stage::One, &tree);
    assert_eq!(machine.read(DISK, None, HERE), Ok(7));
    let parts = HARDWARE.needs(STREAM_TABLE, &memory);
    let refused = |unit: &SmmuUnit| {
        assert_eq!(unit.dma_read(DISK, None, HERE, 1), Err(Refusal::Aborted));
        assert_eq!(unit.dma_read(StreamId(3), None, Iova(0), 1), Err(Refusal::Aborted));
    };

    let found = machine.smmu.stop().expect("it is acknowledged");

    assert_eq!((unit.read32(CR0ACK), unit.read32(IRQ_CTRLACK)), (0, 0));
    refused(unit);
    let mut again = Machine {
        smmu: found.enable(parts).expect("it comes back"),
        memory,
        unit,
        frames: machine.frames,
        hardware: HARDWARE,
    };
    // What it remembered of the time before is forgotten: the device is nobody's.
    assert_eq!(again.read(DISK, None, HERE), Err(STREAM_TABLE.untouched()));
    assert_eq!(again.pass().len(), 1);
    again.assert_lawful();
}

#[test]
fn an_answer_that_is_queued_reaches_its_device_before_the_unit_is_stopped() {
    let (unit, memory) = HARDWARE.smmu_unit(Config::full());
    // The unit executes nothing, until it has been looked at for a while.
    let looks = Arc::new(Mutex::new(None::<u32>));
    let left = Arc::clone(&looks);
    let bus = Tapped::new(unit, move |unit, _| {
        let mut left = left.lock().expect("no test panics here");
        *left = left.map(|left| left.saturating_sub(1));
        if *left == Some(0) {
            unit.resume();
        }
    });
    let parts = HARDWARE.needs(STREAM_TABLE, &memory);
    let mut machine = HARDWARE.enable_smmu(unit, memory, bus, parts).expect("it comes into service");
    let tag = GroupTag { pasid: None, index: 3 };
    let perms = Perms::READ;
    assert_eq!(
        unit.page_request(PageRequest { stream: DISK, tag, iova: HERE, perms, last: true }),
        Requested::Queued
    );
    unit.pause();
    let response = PageResponse { stream: DISK, tag, outcome: Outcome::Invalid };
    machine.smmu.commands.respond(response).expect("there is room");
    *looks.lock().expect("no test panics here") = Some(60);

    machine.smmu.stop().expect("it is acknowledged");

    assert_eq!(unit.answers().len(), 1);
}

#[test]
fn a_unit_that_does_not_let_itself_be_stopped_is_named_and_refuses_what_comes() {
    for (update, register) in [
        (Update::Gbpa, "GBPA.UPDATE"),
        (Update::Cr0(SMMUEN), "CR0ACK.SMMUEN"),
        (Update::Cr0(PRIQEN), "CR0ACK.PRIQEN"),
        (Update::Cr0(EVENTQEN), "CR0ACK.EVENTQEN"),
        (Update::Cr0(CMDQEN), "CR0ACK"),
    ] {
        let machine = HARDWARE.smmu(STREAM_TABLE, Config { clock_step_us: 100, ..Config::full() });
        machine.unit.never_acknowledge(&[update]);

        let error = machine.smmu.stop().err();

        assert!(
            matches!(error, Some(Error::Timeout { register: named, .. }) if named == register),
            "{register}: {error:?}"
        );
        assert!(machine.unit.dma_read(DISK, None, HERE, 1).is_err());
    }
}

/// `words` words that are not aligned to their size.
fn crooked(memory: &Memory, words: usize) -> DmaBuf {
    let odd = memory.take(1, words);
    assert!(odd.phys().0.is_multiple_of(words as u64 * 8));
    memory.take(words, 1)
}

#[test]
fn memory_that_is_too_small_or_crooked_is_named_and_the_unit_left_alone() {
    type Change = fn(&mut smmuv3::Memory, &Memory);
    let cases: [(&str, Change); 14] = [
        ("stream table", |m, from| m.stream_table = crooked(from, 2048)),
        ("stream table", |m, from| m.stream_table = from.take(1536, 2048)),
        ("stream table", |m, from| m.stream_table = from.take(4, 8)),
        ("context descriptors", |m, from| m.contexts = from.take(256, 512)),
        ("context descriptors", |m, from| m.contexts = crooked(from, 512)),
        ("empty table", |m, from| m.empty_table = from.take(256, 512)),
        ("empty table", |m, from| m.empty_table = crooked(from, 512)),
        ("command queue", |m, from| m.command_queue = crooked(from, 512)),
        ("command queue", |m, from| m.command_queue = from.take(128, 128)),
        ("command queue", |m, _| m.answers = 225),
        ("event queue", |m, from| m.event_queue = crooked(from, 512)),
        ("event queue", |m, from| m.event_queue = from.take(3, 4)),
        ("page request queue", |m, from| m.page_requests = crooked(from, 1024)),
        ("page request queue", |m, from| m.page_requests = from.take(1536, 2048)),
    ];
    for (purpose, change) in cases {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let mut needs = needs(STREAM_TABLE, &memory);
        change(&mut needs, &memory);

        let error = HARDWARE.enable_smmu(unit, memory, unit, needs).err();

        let Some(Error::Memory { purpose: named, words, needed }) = error else {
            panic!("{purpose}: {error:?}")
        };
        assert!(named.contains(purpose), "{named} is not {purpose}");
        assert!(needed.is_power_of_two() && words > 0);
        assert_eq!((unit.read32(CR0), unit.read32(GBPA)), (0, 0x1000), "CR0 and GBPA of the {purpose}");
    }
}

#[test]
fn a_queue_larger_than_the_unit_can_use_is_refused() {
    let full = Config::full();
    // IDR1: CMDQS [25:21], EVENTQS [20:16], PRIQS [15:11]; `needs` has 2^8, 2^7 and 2^8 entries.
    for (shift, log2, purpose, needed) in [
        (21, 7, "the command queue", 256),
        (16, 6, "the event queue", 256),
        (11, 7, "the page request queue", 256),
    ] {
        let with = |log2: u32| Config { idr1: full.idr1 & !(0x1F << shift) | log2 << shift, ..full };
        let enable = |config| {
            let (unit, memory) = HARDWARE.smmu_unit(config);
            let needs = needs(STREAM_TABLE, &memory);
            HARDWARE.enable_smmu(unit, memory, unit, needs).map(|machine| machine.assert_lawful()).err()
        };

        assert_eq!(enable(with(log2)), Some(Error::Memory { purpose, words: 512, needed }));
        assert_eq!(enable(with(log2 + 1)), None, "{purpose} of exactly that size");
    }
}

#[test]
fn a_queue_of_requests_lies_where_the_unit_can_be_told() {
    // One entry is 16 bytes, and PRIQ_BASE.ADDR begins at bit 5.
    let (unit, memory) = HARDWARE.smmu_unit(Config::full());
    let mut parts = HARDWARE.needs(STREAM_TABLE, &memory);
    let _ = memory.take(2, 4);
    parts.page_requests = memory.take(2, 2);
    let place = parts.page_requests.phys().0;
    assert!(!place.is_multiple_of(32));

    let enabled = HARDWARE.enable_smmu(unit, memory, unit, parts);

    if enabled.is_ok() {
        assert_eq!(unit.read64(PRIQ_BASE) & 0x00FF_FFFF_FFFF_FFE0, place, "the unit writes to other memory");
    }
}

#[test]
fn a_unit_that_never_acknowledges_is_given_up_in_time_by_the_name_of_the_register() {
    for (silent, name) in [
        (Update::Gbpa, "GBPA.UPDATE"),
        (Update::IrqCtrl, "IRQ_CTRLACK"),
        (Update::Cr0(CMDQEN), "CR0ACK.CMDQEN"),
        (Update::Cr0(PRIQEN), "CR0ACK.PRIQEN"),
        (Update::Cr0(ATSCHK), "CR0ACK.ATSCHK"),
        (Update::Cr0(SMMUEN), "CR0ACK.SMMUEN"),
    ] {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let needs = HARDWARE.needs(STREAM_TABLE, &memory);
        // Firmware left interrupts on, which are to be acknowledged off.
        command(unit, IRQ_CTRL, 0x4);
        unit.never_acknowledge(&[silent]);

        let error = HARDWARE.enable_smmu(unit, memory, unit, needs).err();

        let Some(Error::Timeout { register, waited_us }) = error else { panic!("{name}: {error:?}") };
        assert_eq!(register, name);
        assert!((100_000..110_000).contains(&waited_us), "{waited_us}");
        assert_eq!(unit.read32(CR0ACK) & SMMUEN, 0);
        let aborted = unit.dma_read(DISK, None, HERE, 1) == Err(Refusal::Aborted);
        assert_eq!(aborted, silent != Update::Gbpa, "{name}: blocked, but for what GBPA itself did not take");
        assert_eq!(unit.violations(), Vec::<String>::new());
    }
}

#[test]
fn a_unit_whose_queues_do_not_go_off_is_given_up() {
    let (unit, memory) = HARDWARE.smmu_unit(Config::full());
    command(unit, CR0, EVENTQEN);
    unit.never_acknowledge(&[Update::Cr0(EVENTQEN)]);
    let needs = HARDWARE.needs(STREAM_TABLE, &memory);

    let error = HARDWARE.enable_smmu(unit, memory, unit, needs).err();

    assert!(matches!(error, Some(Error::Timeout { register: "CR0ACK.EVENTQEN", .. })), "{error:?}");
    assert_eq!(unit.violations(), Vec::<String>::new(), "what a queue that is on uses stays as it is");
}

#[test]
fn a_unit_that_never_completes_its_first_invalidation_is_not_switched_on() {
    let (unit, memory) = HARDWARE.smmu_unit(Config::qemu());
    let needs = HARDWARE.needs(STREAM_TABLE, &memory);
    unit.pause();

    let error = HARDWARE.enable_smmu(unit, memory, unit, needs).err();

    assert!(matches!(error, Some(Error::Timeout { register: "CMDQ_CONS", .. })), "{error:?}");
    assert_eq!(unit.read32(CR0), CMDQEN);
    assert_eq!(unit.dma_read(DISK, None, HERE, 1), Err(Refusal::Aborted));
}

#[test]
fn interrupts_that_are_never_acknowledged_are_given_up_by_name() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    machine.unit.never_acknowledge(&[Update::IrqCtrl]);

    let error = machine.smmu.events.enable_interrupts();

    assert!(matches!(error, Err(Error::Timeout { register: "IRQ_CTRLACK", .. })), "{error:?}");
}

#[test]
fn a_slow_unit_comes_into_service() {
    let machine = HARDWARE.smmu(STREAM_TABLE, Config { acknowledge_after: 500, ..Config::full() });

    assert_eq!(machine.unit.read32(CR0ACK), 0x1F);
    machine.assert_lawful();
}

#[test]
fn a_part_with_errata_is_kept_clear_of_them() {
    // IIDR: MMU-600 r0p0, MMU-700 r0p0, and a part of which nothing is known.
    for (iidr, known) in [(0x4830_043B, 2), (0x4870_043B, 3), (0, 0)] {
        let config = Config { iidr, ..Config::full() };
        assert_eq!(
            Found::probe(HARDWARE.smmu_unit(config).0).expect("it is there").errata().count(),
            known,
            "{iidr:#x}"
        );
        let mut machine = HARDWARE.smmu(STREAM_TABLE, config);
        let before = machine.unit.executed().len();

        machine.assign(DISK, Features::default());

        let commands = machine.unit.executed();
        let syncs: Vec<_> = commands.iter().filter(|words| words[0] & 0xFF == 0x46).collect();
        assert!(syncs.iter().all(|words| **words == golden::SYNC), "CS is 0: no signal that could be lost");
        assert!(
            before < commands.len() && commands.last() == Some(&golden::SYNC),
            "every batch ends with one"
        );
        machine.assert_lawful();
    }
}

#[test]
fn a_unit_of_few_streams_is_given_no_more_than_it_has() {
    // IDR1.SIDSIZE is [5:0]: 4 bits.
    let qemu = Config::qemu();
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config { idr1: qemu.idr1 & !0x3F | 4, ..qemu });

    let refused = machine.smmu.tables.assign(StreamId(16), Features::default()).err();
    assert_eq!(refused, Some(Error::UnknownStream { stream: StreamId(16) }));
    // A table of more entries than that is no offence: the smaller number counts (facts 2.1).
    machine.assign(StreamId(15), Features::default());
    assert_eq!(machine.smmu.events.next_event(), None);
    machine.assert_lawful();
}
