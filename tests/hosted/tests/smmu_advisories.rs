//! Bugs that others had with this kind of unit: each line of their histories that is about SMMUv3, by its advisory, its commit
//! or whose it was.
//!
//! Those that have no test here:
//!
//! | advisory, commit or driver | where it is, or why not |
//! |---|---|
//! | pKVM (its host has the event queue), MilvusVisor (its guest has all queues and messages) | no guest reaches a register: there is nothing that would show it one |
//! | pKVM sleeps until an event (`WFE`) without an end | `smmu_wakes.rs`; the hypervisor here does not sleep |
//! | seL4's bindings keep one fault of SMMUv2 | there is a queue here, and what is lost of it is told |
//! | OpenVMM: losses are counted, none is acknowledged unseen | `smmu/events.rs`, `page_requests` and `faults` |
//! | Jailhouse a76e766b, ae8b272f | no queue is emulated for a guest; its arrays of commands: `invalidate.rs` |
//! | Asterinas #3920 | the model notes each bit of GERRORN that turns without an error, in every test |
//! | ACRN: the status of a wait lay on a stack | what is written for a wait is written to memory of the unit's |
//! | ACRN 25c0e3817; XSA-33, -36, -49, -59, -237, -337, -360, -395, -458, -467 | interrupts of devices are the ITS's on this architecture |
//! | XSA-80, -207, -222, -275, -285, -304, -311, -460, -461 | tables of translation and whose memory is: tests of `pgtable` |
//! | XSA-378, -386, -400 | reserved memory is the caller's to map: `iort.rs`; failures on the way: `smmu/contexts.rs`, frames that run out |
//! | XSA-390 | `smmu/tables.rs`, a second stage takes as many bits as an address has |
//! | XSA-449; "Require exactly one Stream ID for a vDEVICE" | the caller assigns each stream; `iort.rs` and `smmu_tree.rs` tell which there are |
//! | XSA-450, -492 | one build of the driver, no lock |
//! | CVE-2026-43253; "Improve CMDQ lock fairness" | locks are the caller's; `submit` and `poll` wait for nothing |
//! | CVE-2026-45894, -45944, -45945, -74439, -90243 | `smmu/replace.rs`, and `smmu/tables.rs`, every mixture of old and new words |
//! | CVE-2026-45862 | the model reads what was published, coherent or not: every test of `smmu/contexts.rs` |
//! | "Skip dev-iotlb flush for inaccessible PCIe device" | as CVE-2026-43130 |
//! | "qi_submit_sync called with 0 count", "Avoid out-of-range shift" (VT-d) | batches of nothing: `smmu/events.rs`; all pages there are: below |
//! | "Unconditionally flush device TLB for pasid table updates"; "Do not allow SVA domain on wrong PASID" | `smmu/contexts.rs`, pages of one PASID; a PASID is translated by its own tables |
//! | "Program device table when reuse fails", "Fix kdump boot failure" | `smmu/bring_up.rs`, a unit that firmware left on |
//! | CVE-2022-48894, -49426, CVE-2026-93205, CVE-2025-39966 | objects of an operating system that were freed while in use; here `stop` takes all that uses the unit by value |
//! | CVE-2026-80818, -90426 (Tegra241) | queues of a vendor's own, which this driver does not use |
//! | CVE-2024-35843, CVE-2026-74520; cookies, groups, who may answer what (faults B.1, B.6, B.7, B.13) | whose a fault is, and who answers once, the broker knows: `broker_*.rs`, `end_to_end.rs` |
//! | faults B.8 (STALL_MAX is read and never used) | `smmu/events.rs`, `stalls`: told to the caller, whose budgets share it out |
//! | faults B.10 (PASID in responses) | `smmu/events.rs`: what the unit answers by itself has the PASID |
//! | faults B.12 (locks) | the caller's |
//! | faults B.13 (fields of a guest's entry and commands; MEV) | `smmu/nested.rs`, `invalidate.rs` |
//! | CVE-2026-64293, -80817 and others of the event queue of iommufd | the channel's: `channel.rs` |
//! | CVE-2026-89448 (ACS) | not the unit's |
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use hosted::{
    Moment, Random, grant, root,
    smmu::{COMMANDS, EVENTS, Machine, Stage, StreamTable, Tapped, needs, unit},
};
use iommu::{
    Attachment, Bus, Commands, Completion, DomainId, Error, Event, Events, FailureCause, Features, GroupTag,
    Invalidation, Iova, Outcome, PAGE_SIZE, PageRequest, PageResponse, Pasid, Perms, PhysAddr, Stages,
    StreamId, Tables, Translation,
};
use models::{
    golden_smmuv3 as golden,
    smmuv3::{Config, Ended, Refusal, Requested, SmmuUnit, Update},
};
use pgtable::{Gather, Limits, Stage1, Tree};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

const DISK: StreamId = StreamId(0x108);
const NIC: StreamId = StreamId(0x28);
const HERE: Iova = Iova(0x4_5000);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: false };

const CR0ACK: usize = 0x024;
const GERROR: usize = 0x060;
const GERRORN: usize = 0x064;
const IRQ_CTRLACK: usize = 0x054;
const CMDQ_BASE: usize = 0x090;
const CMDQ_CONS: usize = 0x09C;

/// A machine with two devices, of which `stalling` lists those whose faults wait.
fn machine_with(stalling: &[StreamId]) -> Machine {
    let (unit, memory) = unit(Config::full());
    let parts = smmuv3::Memory {
        stalling: stalling.iter().copied().collect(),
        ..needs(StreamTable::Linear, &memory)
    };
    let mut machine = Machine::enable(unit, memory, unit, parts).expect("it comes into service");
    machine.smmu.events.enable_interrupts().expect("it is acknowledged");
    for stream in [DISK, NIC] {
        let features = if stalling.contains(&stream) { Features::default() } else { ALL };
        machine.assign(stream, features);
    }
    machine
}

fn machine() -> Machine {
    machine_with(&[])
}

/// A page of DISK's that it remembers in its own TLB, and what makes it forget that.
fn remembered(machine: &mut Machine) -> (Attachment, Invalidation) {
    let tree = machine.tree(Stage::One);
    machine.map(&tree, HERE, 7, Perms::READ);
    let attachment = machine.attach(DISK, Stage::One, &tree);
    assert_eq!(machine.ats_read(DISK, HERE), Ok(7));
    machine.unmap(&tree, HERE, 1);
    (attachment, Invalidation::covering(attachment, HERE, 4096))
}

/// Overwrites the next command that the unit has not consumed by one that there is not.
fn spoil(machine: &Machine) {
    let queue = machine.unit.read64(CMDQ_BASE) & 0x00FF_FFFF_FFFF_FFE0;
    let at = u64::from(machine.unit.read32(CMDQ_CONS)) % COMMANDS as u64;
    machine.memory.device_store(PhysAddr(queue + at * 16), 0xFF).expect("inside");
}

fn asked(machine: &mut Machine) -> Vec<PageRequest> {
    let events = machine.pass().into_iter();
    events
        .filter_map(|event| match event {
            Event::PageRequest(request) => Some(request),
            _ => None,
        })
        .collect()
}

fn answer(request: PageRequest, outcome: Outcome) -> PageResponse {
    PageResponse { stream: request.stream, tag: request.tag, outcome }
}

#[test]
fn xen_and_gsd_2022_1002198_a_device_that_floods_the_event_queue_costs_a_bounded_time_a_call() {
    let (unit, memory) = unit(Config::full());
    let accesses = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&accesses);
    let bus = Tapped::new(unit, move |unit, moment| {
        if matches!(moment, Moment::Access) {
            counted.fetch_add(1, SeqCst);
            // A fault, and a page request, at every access to a register.
            unit.record(golden::F_TRANSLATION);
            let tag = GroupTag { pasid: None, index: 1 };
            unit.page_request(PageRequest { stream: DISK, tag, iova: HERE, perms: Perms::READ, last: false });
        }
    });
    let parts = needs(StreamTable::Linear, &memory);
    let mut machine = Machine::enable(unit, memory, bus, parts).expect("it comes into service");

    for _ in 0..2000 {
        let before = accesses.load(SeqCst);
        let _ = machine.smmu.events.next_request();
        let _ = machine.smmu.events.next_fault();
        let cost = accesses.load(SeqCst) - before;
        assert!(cost <= 12, "{cost} accesses");
    }
}

#[test]
fn jailhouse_hafnium_a_queue_that_nobody_read_for_long_says_so_and_goes_on() {
    let mut machine = machine();
    (0..3 * EVENTS).for_each(|_| machine.unit.record(golden::C_BAD_STE));

    let events = machine.pass();

    assert_eq!((events.len(), events.last()), (EVENTS + 1, Some(&Event::FaultsLost)));
    machine.unit.record(golden::F_TRANSLATION);
    assert_eq!(machine.pass().len(), 1, "later faults are seen");
    machine.assert_lawful();
}

#[test]
fn hvisor_axvisor_faults_are_recorded_before_the_first_device_can_meet_one() {
    let (unit, memory) = unit(Config::full());
    let bus = Tapped::new(unit, |unit, _| {
        let enabled = unit.read32(CR0ACK);
        assert!(enabled & 1 == 0 || enabled & 1 << 2 != 0, "SMMUEN without EVENTQEN");
    });
    let parts = needs(StreamTable::Linear, &memory);
    let mut machine = Machine::enable(unit, memory, bus, parts).expect("it comes into service");

    assert_eq!(machine.read(NIC, None, HERE), Err(Refusal::Fault(0x04)));

    assert_eq!(machine.pass().len(), 1);
}

#[test]
fn bao_382_abort_is_the_only_default_and_errors_interrupt() {
    let mut machine = machine();
    // No stream but those assigned; and those neither, until they are attached.
    for stream in [0, 1, 0x28, 0x108, 0x1FF, 0x200, 0xFFFF, u32::MAX].map(StreamId) {
        for pasid in [None, Pasid::new(0), Pasid::new(9)] {
            let refused = machine.unit.dma_write(stream, pasid, HERE, &[1]);
            assert!(matches!(refused, Err(Refusal::Fault(_))), "{stream:?} {pasid:?}: {refused:?}");
        }
    }
    assert_eq!(machine.unit.read32(IRQ_CTRLACK), 0b111, "GERROR, PRIQ, EVENTQ");
    machine.pass();
    machine.assert_lawful();
}

#[test]
fn tf_rmm_axvisor_the_bad_command_is_replaced_before_its_error_is_acknowledged() {
    let mut machine = machine();
    machine.unit.pause();
    let bad = machine.smmu.commands.submit(&[Invalidation::All]).expect("there is room");
    let behind = machine.smmu.commands.submit(&[Invalidation::All]).expect("there is room");
    spoil(&machine);
    machine.unit.resume();

    let causes: Vec<_> = machine.recover().into_iter().map(|failure| failure.cause).collect();

    assert_eq!(causes, [FailureCause::Refused], "acknowledged alone, it would come again");
    assert_eq!(machine.smmu.commands.poll(bad), Completion::Failed);
    assert_eq!(machine.smmu.commands.poll(behind), Completion::Done);
    machine.assert_lawful();
}

#[test]
fn jailhouse_pkvm_a_unit_that_is_silent_is_given_up_after_a_time() {
    for update in [Update::Gbpa, Update::Cr0(1), Update::Cr0(1 << 2), Update::Cr0(1 << 3)] {
        let (unit, memory) = unit(Config { clock_step_us: 50, ..Config::full() });
        unit.never_acknowledge(&[update]);
        let parts = needs(StreamTable::Linear, &memory);

        let error = Machine::enable(unit, memory, unit, parts).err();

        assert!(matches!(error, Some(Error::Timeout { .. })), "{update:?}: {error:?}");
    }
}

#[test]
fn openvmm_a_noisy_device_can_be_kept_from_its_neighbours_reports() {
    let mut machine = machine();
    let (leaving, invalidations) = machine.smmu.tables.block(DISK).expect("it is assigned");
    machine.invalidate(&invalidations);
    let silent = machine.smmu.tables.silence(DISK).expect("it is blocked");
    machine.invalidate(&silent);

    for _ in 0..10 * EVENTS {
        assert!(machine.read(DISK, None, HERE).is_err());
    }
    assert!(machine.read(NIC, None, HERE).is_err());

    let events = machine.pass();
    assert!(matches!(&events[..], [Event::Fault(fault)] if fault.stream == NIC), "{events:?}");
    machine.smmu.tables.finish(leaving);
    machine.assert_lawful();
}

#[test]
fn xsa_302_306_442_445_a_device_that_was_taken_away_reaches_nothing_by_entry_or_by_what_was_cached() {
    for stage in [Stage::One, Stage::Two] {
        let mut machine = machine();
        let tree = machine.tree(stage);
        machine.map(&tree, HERE, 7, Perms::READ_WRITE);
        let attachment = machine.attach(DISK, stage, &tree);
        assert_eq!(machine.read(DISK, None, HERE), Ok(7));
        assert_eq!(machine.ats_read(DISK, HERE), Ok(7));

        machine.detach(attachment);

        assert!(machine.read(DISK, None, HERE).is_err());
        assert!(machine.ats_read(DISK, HERE).is_err());
        assert_eq!(machine.unit.device_tlb(DISK), []);
        machine.assert_lawful();
    }
}

#[test]
fn xsa_321_a_unit_that_is_not_coherent_sees_every_entry_that_was_stored() {
    // The model reads what was published, whatever IDR0.COHACC says; without it the unit is told so (CR1).
    let full = Config::full();
    let (unit, memory) = unit(Config { idr0: full.idr0 & !(1 << 4), ..full });
    let parts = needs(StreamTable::Linear, &memory);
    let mut machine = Machine::enable(unit, memory, unit, parts).expect("it comes into service");
    machine.assign(DISK, Features::default());
    let tree = machine.tree(Stage::One);
    machine.map(&tree, HERE, 7, Perms::READ);
    let attachment = machine.attach(DISK, Stage::One, &tree);
    assert_eq!(machine.read(DISK, None, HERE), Ok(7));

    machine.detach(attachment);

    assert!(machine.read(DISK, None, HERE).is_err());
    machine.assert_lawful();
}

#[test]
fn xsa_346_a_page_is_out_of_reach_when_its_ticket_is_done_and_not_before() {
    let mut machine = machine();
    let (_, pages) = remembered(&mut machine);
    machine.unit.pause();
    let ticket = machine.smmu.commands.submit(&[pages]).expect("there is room");

    // Command by command: whenever the ticket is done, nothing is left of the page.
    for _ in 0..10 {
        let done = machine.smmu.commands.poll(ticket) == Completion::Done;
        let reached = machine.ats_read(DISK, HERE).is_ok();
        assert!(!(done && reached));
        if done {
            machine.unit.resume();
            machine.assert_lawful();
            return;
        }
        machine.unit.execute(1);
    }
    panic!("it was never done");
}

#[test]
fn xsa_373_a_time_out_fails_its_own_ticket_names_its_device_and_a_late_answer_changes_nothing() {
    let mut machine = machine();
    let (_, pages) = remembered(&mut machine);
    let tree = machine.tree(Stage::One);
    machine.attach(NIC, Stage::One, &tree);
    machine.unit.hold_device_tlb(DISK);
    let stuck = machine.smmu.commands.submit(&[pages]).expect("there is room");
    // Time in the queue counts against nobody else: these wait behind it, and are not late.
    let other = [Invalidation::Device { stream: NIC, device_tlb: false }];
    let behind = machine.smmu.commands.submit(&other).expect("there is room");
    machine.unit.advance(60_000);

    let failures = machine.recover();
    assert_eq!(failures.len(), 1);
    assert_eq!((failures[0].stream, failures[0].ticket), (Some(DISK), Some(stuck)));
    assert_eq!(machine.smmu.commands.poll(behind), Completion::Done);
    let newer = machine.smmu.commands.submit(&other).expect("there is room");
    machine.unit.release_device_tlb(DISK);

    assert_eq!(machine.smmu.commands.poll(stuck), Completion::Failed, "late is not in time");
    assert_eq!(machine.smmu.commands.poll(newer), Completion::Done);
    assert!(stuck < behind && behind < newer, "no ticket is used twice");
    machine.assert_lawful();
}

/// Each further command to it would hold up everybody once more.
#[test]
fn cve_2024_26891_a_silent_device_is_blocked_and_let_go_of_without_being_asked_again() {
    let mut machine = machine();
    let (attachment, pages) = remembered(&mut machine);
    machine.unit.hold_device_tlb(DISK);
    let silent = machine.smmu.commands.submit(&[pages]).expect("there is room");
    machine.unit.advance(60_000);
    machine.recover();
    assert_eq!(machine.smmu.commands.poll(silent), Completion::Failed);

    let (device, blocked) = machine.smmu.tables.block(DISK).expect("it is assigned");
    let (leaving, detached) = machine.smmu.tables.detach(attachment).expect("it is attached");
    for invalidations in [blocked, detached] {
        assert!(invalidations.iter().any(|it| it.asks() == Some(DISK)));
        let unasked: Vec<_> = invalidations.into_iter().filter_map(Invalidation::unasked).collect();
        let ticket = machine.smmu.commands.submit(&unasked).expect("there is room");
        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Done, "nobody waits for the device");
    }

    assert!(machine.ats_read(DISK, HERE).is_err(), "what it remembers is of no use");
    machine.smmu.tables.finish(leaving);
    machine.smmu.tables.finish(device);
    assert_eq!(machine.recover(), []);
    machine.assert_lawful();
}

#[test]
fn cve_2024_26891_2026_43130_43161_a_device_that_is_gone_holds_up_nobody_for_ever() {
    let mut machine = machine();
    let (_, pages) = remembered(&mut machine);
    machine.unit.unplug(DISK);
    let ticket = machine.smmu.commands.submit(&[pages]).expect("there is room");
    let request = PageRequest {
        stream: NIC,
        tag: GroupTag { pasid: None, index: 5 },
        iova: HERE,
        perms: Perms::READ,
        last: true,
    };
    assert_eq!(machine.unit.page_request(request), Requested::Queued);
    machine.pass();
    machine.smmu.commands.respond(answer(request, Outcome::Success)).expect("there is room");
    machine.unit.advance(60_000);

    assert!(matches!(machine.pass()[..], [Event::CommandsFailed { .. }]));
    assert_eq!(machine.recover().len(), 1);

    assert_eq!(machine.smmu.commands.poll(ticket), Completion::Failed);
    assert_eq!(machine.unit.waiting_groups(), [], "the other device has its answer");
    machine.invalidate(&[Invalidation::Device { stream: NIC, device_tlb: true }]);
    machine.assert_lawful();
}

#[test]
fn cve_2023_52484_a_huge_range_is_a_few_commands() {
    for ranges in [true, false] {
        let full = Config::full();
        let config = if ranges { full } else { Config { idr3: full.idr3 & !(1 << 10), ..full } };
        let mut machine = Machine::new(StreamTable::Linear, config);
        let attachment = |stages| Attachment {
            serial: 1,
            stream: DISK,
            pasid: None,
            domain: DomainId(3),
            stages,
            device_tlb: false,
        };
        for pages in [1, 7, 512, 1 << 18, 1 << 36, u64::MAX] {
            for stages in [Stages::First, Stages::Second, Stages::Nested] {
                let before = machine.unit.executed().len();
                let attachment = attachment(stages);
                machine.invalidate(&[Invalidation::Pages { attachment, iova: Iova(0), pages }]);
                if stages == Stages::Nested {
                    let pages = Some((Iova(0), pages));
                    machine.invalidate(&[Invalidation::FirstStage { attachment, asid: Some(1), pages }]);
                }
                let commands = machine.unit.executed().len() - before;
                assert!(commands <= 20, "{pages} pages: {commands} commands");
            }
        }
        machine.assert_lawful();
    }
}

#[test]
fn range_commands_and_reserved_bits_no_invalidation_becomes_a_command_that_the_unit_refuses() {
    // "Avoid constructing invalid range commands", "Reject unsupported bits in invalidation commands": one such command would
    // stop the queue for every device.
    let full = Config::full();
    let configs =
        [full, Config { idr3: full.idr3 & !(1 << 10), ..full }, Config { idr0: full.idr0 & !1, ..full }];
    for config in configs {
        let mut machine = Machine::new(StreamTable::Linear, config);
        machine.unit.plug(DISK);
        let mut random = Random::new(7);
        let mut number = |bits: u64| random.number() >> random.below(64).max(64 - bits);
        for _ in 0..3000 {
            let stages =
                [Stages::None, Stages::First, Stages::Second, Stages::Nested][number(2) as usize & 3];
            let stages = if config.idr0 & 1 == 0 { Stages::First } else { stages };
            let pasid = (number(2) & 1 == 1).then(|| Pasid::from_low_bits(number(20)));
            let attachment = Attachment {
                serial: number(60),
                stream: DISK,
                pasid,
                domain: DomainId(number(16) as u16),
                stages,
                device_tlb: number(2) & 1 == 1,
            };
            let pages = (Iova(number(64)), number(64));
            let some = (number(2) & 1 == 1).then_some(pages);
            let asid = (number(2) & 1 == 1).then_some(number(16) as u16);
            let invalidation = match number(3) & 7 {
                0 => Invalidation::Attachment(attachment),
                1 | 2 if stages != Stages::None => {
                    Invalidation::Pages { attachment, iova: pages.0, pages: pages.1 }
                }
                3 => Invalidation::FirstStage { attachment, asid, pages: some },
                4 => Invalidation::Contexts { attachment, pasid },
                5 => Invalidation::DeviceTlb { attachment, pasid, pages: some },
                _ => Invalidation::All,
            };
            match machine.smmu.commands.submit(&[invalidation]) {
                Ok(ticket) => {
                    let done = machine.smmu.commands.poll(ticket);
                    let cons = machine.unit.read32(CMDQ_CONS);
                    assert_eq!(
                        done,
                        Completion::Done,
                        "{invalidation:?} {cons:#x} {:?}",
                        machine.unit.executed().last()
                    );
                }
                Err(error) => {
                    assert!(matches!(error, Error::Unsupported { .. }), "{invalidation:?}: {error}")
                }
            }
            assert_eq!(machine.unit.read32(GERROR) ^ machine.unit.read32(GERRORN), 0, "{invalidation:?}");
        }
        machine.assert_lawful();
    }
}

/// "SVA stale kernel IOTLB": a table that went is walked by nobody once the unit has forgotten the whole attachment; to forget
/// the pages alone leaves a way that leads through it.
#[test]
fn cve_2025_71089_71202_2026_97525_a_table_is_used_again_only_when_no_walk_leads_through_it() {
    /// What a table of the last level maps.
    const BLOCK: u64 = 512 * PAGE_SIZE;
    let (mut machine, here) = (machine(), Iova(BLOCK));
    let tree = Tree::<Stage1>::new(&mut machine.frames, Limits::PAGES).expect("there are frames");
    let [page, secret] = [7, 0x5EC12E7].map(|content| {
        let mut page = machine.memory.take(512, 512);
        page.clear();
        page.store(0, content);
        machine.memory.publish(page.range(0, 512)).expect("the page is in the memory");
        page.phys().0
    });
    // All others of the block are of no matter.
    tree.map(&mut machine.frames, here.0, &grant(page, 512), Perms::READ).expect("nothing is mapped there");
    let before: Vec<_> = machine.frames.content().into_iter().map(|(frame, _)| frame).collect();
    let attached = machine.attach_to(NIC, None, Translation::Stage1(root(tree.root().0, 4)));
    let attachment = attached.expect("it can be attached");
    assert_eq!(machine.read(NIC, None, here), Ok(7));
    let mut gather = Gather::new();
    tree.unmap(&mut machine.frames, here.0, BLOCK, &mut gather).expect("it is mapped");
    assert!(gather.tables_went());
    gather.give_back(&mut machine.frames);
    let after: Vec<_> = machine.frames.content().into_iter().map(|(frame, _)| frame).collect();
    // Whoever has the frames now stores what would be leaves: of a page, D1 with the secret's address.
    for frame in before.into_iter().filter(|frame| !after.contains(frame)) {
        for word in 0..512 {
            machine.memory.device_store(PhysAddr(frame.0 + word * 8), secret | 0xF47).expect("inside");
        }
    }
    let next = Iova(here.0 + PAGE_SIZE);
    machine.invalidate(&[Invalidation::Pages { attachment, iova: here, pages: 512 }]);
    assert_eq!(machine.read(NIC, None, next), Ok(0x5EC12E7), "what would happen");

    machine.invalidate(&[Invalidation::Attachment(attachment)]);

    assert!(machine.read(NIC, None, next).is_err());
    assert!(machine.read(NIC, None, here).is_err());
    machine.assert_lawful();
}

#[test]
fn thunderclap_a_device_that_claims_to_have_translated_is_refused() {
    let mut machine = machine();
    let tree = machine.tree(Stage::One);
    machine.map(&tree, HERE, 7, Perms::READ);
    // CR0ACK.ATSCHK.
    assert_ne!(machine.unit.read32(CR0ACK) & 1 << 4, 0);
    let attachment = machine.attach(NIC, Stage::One, &tree);
    assert_eq!(machine.ats_read(NIC, HERE), Ok(7));
    machine.unit.hold_device_tlb(NIC);
    let (_, invalidations) = machine.smmu.tables.detach(attachment).expect("it is attached");
    // The device keeps what it has; the unit knows that it is blocked.
    let _ = machine.smmu.commands.submit(&invalidations).expect("there is room");
    machine.unit.advance(1);

    assert!(machine.ats_read(NIC, HERE).is_err(), "what it still has is of no use to it");
    machine.unit.release_device_tlb(NIC);
    machine.assert_lawful();
}

#[test]
fn cve_2024_44994_faults_b1_an_access_that_stalls_is_always_told_with_what_answers_it() {
    // Linux sends nothing for a stream that it does not know.
    let mut machine = machine_with(&[DISK]);
    for stream in [DISK, NIC, StreamId(0x1FF), StreamId(u32::MAX)] {
        let word = 0x10 | u64::from(stream.0) << 32;
        machine.unit.record([word, 1 << 31 | 0x42, HERE.0, 0]);

        let asked = asked(&mut machine);

        assert_eq!((asked.len(), asked[0].stream), (1, stream));
        let before = machine.unit.executed().len();
        machine.smmu.commands.respond(answer(asked[0], Outcome::Invalid)).expect("there is room");
        // K31.
        let resume = [0x2044 | u64::from(stream.0) << 32, 0x42];
        assert_eq!(machine.unit.executed()[before..], [resume]);
    }
}

#[test]
fn faults_b4_a_stream_is_drained_before_its_tables_are_let_go_of() {
    let mut machine = machine_with(&[DISK]);
    let tree = machine.tree(Stage::One);
    let attachment = machine.attach(DISK, Stage::One, &tree);
    for _ in 0..12 {
        assert!(matches!(machine.read(DISK, None, HERE), Err(Refusal::Stalled(_))));
    }
    let first = asked(&mut machine);

    let (leaving, invalidations) = machine.smmu.tables.detach(attachment).expect("it is attached");
    machine.invalidate(&invalidations);
    for request in first.into_iter().chain(asked(&mut machine)) {
        machine.smmu.commands.respond(answer(request, Outcome::Invalid)).expect("there is room");
    }
    machine.invalidate(&[Invalidation::Stalls { stream: DISK }]);
    asked(&mut machine);
    machine.smmu.tables.finish(leaving);

    let ended = machine.unit.ended_stalls();
    assert!(ended.len() == 12 && ended.iter().all(|&(.., ended)| ended == Ended::Aborted));
    assert_eq!(asked(&mut machine), [], "nothing of it comes later");
    machine.assert_lawful();
}

#[test]
fn faults_b5_stalls_survive_an_event_queue_that_is_full() {
    let mut machine = machine_with(&[DISK]);
    let tree = machine.tree(Stage::One);
    machine.attach(DISK, Stage::One, &tree);
    (0..EVENTS).for_each(|_| machine.unit.record(golden::C_BAD_STE));
    assert!(matches!(machine.read(DISK, None, HERE), Err(Refusal::Stalled(_))));

    let asked = asked(&mut machine);

    assert_eq!(asked.len(), 1);
    machine.smmu.commands.respond(answer(asked[0], Outcome::Invalid)).expect("there is room");
    assert_eq!(machine.unit.stalled(), []);
    machine.assert_lawful();
}

#[test]
fn faults_b5_and_b6_page_requests_are_served_and_no_answer_switches_them_off_unasked() {
    // Linux answers every one with DENY, 0 on this unit: Response Failure, after which the function may ask no more.
    let mut machine = machine();
    for (index, outcome) in [(1, Outcome::Success), (2, Outcome::Invalid), (3, Outcome::Failure)] {
        let tag = GroupTag { pasid: None, index };
        let request = PageRequest { stream: NIC, tag, iova: HERE, perms: Perms::READ, last: true };
        assert_eq!(machine.unit.page_request(request), Requested::Queued);
        assert_eq!(machine.pass(), [Event::PageRequest(request)]);
        machine.smmu.commands.respond(answer(request, outcome)).expect("there is room");
        assert_eq!(machine.unit.answers().last().map(|answer| answer.outcome), Some(outcome));
    }
    machine.assert_lawful();
}

#[test]
fn faults_b5_service_failure_mode_is_told_and_nothing_is_promised_in_it() {
    let mut machine = machine();
    machine.unit.pause();
    let ticket = machine.smmu.commands.submit(&[Invalidation::All]).expect("there is room");
    machine.unit.raise_errors(1 << 8);

    assert_eq!(machine.pass(), [Event::CommandsFailed { status: 1 << 8 }]);
    assert_eq!(machine.recover().len(), 1);

    assert_eq!(machine.smmu.commands.poll(ticket), Completion::Failed);
    assert!(machine.smmu.commands.submit(&[]).is_err());
}

#[test]
fn faults_b7_a_sync_that_does_not_complete_is_pending_for_ever_and_never_done() {
    let mut machine = machine();
    machine.unit.pause();
    let ticket = machine.smmu.commands.submit(&[Invalidation::All]).expect("there is room");

    for _ in 0..100 {
        machine.unit.advance(1_000_000);
        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Pending);
    }
    machine.assert_lawful();
}

#[test]
fn cve_2026_90428_an_error_that_was_latched_before_is_not_taken_for_ours() {
    let (unit, memory) = unit(Config::full());
    unit.raise_errors(1 | 1 << 2 | 1 << 3 | 1 << 8);
    let parts = needs(StreamTable::Linear, &memory);

    let mut machine = Machine::enable(unit, memory, unit, parts).expect("it comes into service");

    machine.smmu.events.enable_interrupts().expect("it is acknowledged");
    assert_eq!(machine.pass(), []);
    machine.invalidate(&[Invalidation::All]);
    machine.assert_lawful();
}

#[test]
fn faults_b13_a_guest_is_told_no_address_but_its_own() {
    // Each record with every address field full of something else: FetchAddr and IPA are not told.
    let mut machine = machine();
    for number in 0..=0xFFu64 {
        for second in [0, 1 << 39] {
            for class in 0..4u64 {
                let words = [number | 0x0108 << 32, second | class << 40, HERE.0, 0x00AB_CDEF_1234_5678];
                machine.unit.record(words);
                let events = machine.pass();
                let [Event::Fault(fault)] = &events[..] else { panic!("{events:?}") };
                assert!([0, HERE.0].contains(&fault.iova.0), "{fault:?}");
                let refused = machine.smmu.events.refused_by(fault);
                let has_stage = matches!(number, 0x0B | 0x10..=0x13);
                let expected = match (has_stage, second) {
                    (false, _) => Stages::None,
                    (true, 0) => Stages::First,
                    (true, _) => Stages::Second,
                };
                assert_eq!(refused, expected, "{number:#x}");
            }
        }
    }
}

#[test]
fn match_stall_behaviour_a_unit_that_cannot_stall_is_never_told_to() {
    // STALL_MODEL 1: CMD_RESUME and CMD_STALL_TERM are no commands, and S and S2S no legal bits.
    let full = Config::full();
    let mut machine = Machine::new(StreamTable::Linear, Config { idr0: full.idr0 | 1 << 24, ..full });
    machine.assign(NIC, ALL);
    for stage in [Stage::One, Stage::Two] {
        let tree = machine.tree(stage);
        let attachment = machine.attach(NIC, stage, &tree);
        assert!(matches!(machine.read(NIC, None, HERE), Err(Refusal::Fault(0x10))));
        machine.detach(attachment);
    }
    machine.invalidate(&[Invalidation::Stalls { stream: NIC }]);
    let tag = GroupTag { pasid: None, index: 0x300 };
    let back = machine.smmu.commands.respond(PageResponse { stream: NIC, tag, outcome: Outcome::Invalid });
    assert!(back.is_err(), "no group has this number, and nothing stalls");
    assert_eq!(machine.unit.read32(GERROR) ^ machine.unit.read32(GERRORN), 0);
    machine.assert_lawful();
}

#[test]
fn xsa_399_a_number_is_used_again_only_when_its_translations_are_forgotten() {
    let mut machine = machine();
    let tree = machine.tree(Stage::One);
    machine.map(&tree, HERE, 7, Perms::READ);
    let attachment = machine.attach(DISK, Stage::One, &tree);
    assert_eq!(machine.read(DISK, None, HERE), Ok(7));
    let (detached, first) = machine.smmu.tables.detach(attachment).expect("it is attached");
    let (leaving, second) = machine.smmu.tables.block(DISK).expect("it is assigned");

    // Until both are confirmed, the place is taken.
    assert!(matches!(machine.smmu.tables.assign(DISK, ALL), Err(Error::StreamBusy { .. })));
    machine.invalidate(&first);
    machine.smmu.tables.finish(detached);
    assert!(matches!(machine.smmu.tables.assign(DISK, ALL), Err(Error::StreamBusy { .. })));
    machine.invalidate(&second);
    machine.smmu.tables.finish(leaving);

    machine.assign(StreamId(0x30), Features::default());
    let empty = machine.tree(Stage::One);
    let next = machine.attach(StreamId(0x30), Stage::One, &empty);
    assert_eq!(next.domain, attachment.domain, "the number comes back");
    assert!(machine.read(StreamId(0x30), None, HERE).is_err(), "and nothing with it");
    machine.assert_lawful();
}

/// The unit's model knows these rules for every test here; this one breaks nothing that it could note.
#[test]
fn xsa_328_347_live_entries_change_by_the_order_of_the_manual() {
    let (unit, memory) = unit(Config::full());
    let parts = needs(StreamTable::Linear, &memory);
    let reached = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&reached);
    // At every store that becomes visible, a device tries: it meets the old state or the new.
    let bus = Tapped::new(unit, move |unit: &'static SmmuUnit, moment| {
        if matches!(moment, Moment::Published) && unit.read32(CR0ACK) & 1 != 0 {
            let read = unit.dma_read(DISK, None, HERE, 8);
            let word = read.map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
            assert!(
                matches!(word, Ok(7) | Err(Refusal::Fault(0x04 | 0x02 | 0x10) | Refusal::Aborted)),
                "{word:x?}"
            );
            seen.fetch_add(1, SeqCst);
        }
    });
    let mut machine = Machine::enable(unit, memory, bus, parts).expect("it comes into service");
    for stage in [Stage::One, Stage::Two] {
        machine.assign(DISK, ALL);
        let tree = machine.tree(stage);
        machine.map(&tree, HERE, 7, Perms::READ);
        let attachment = machine.attach(DISK, stage, &tree);
        machine.detach(attachment);
        machine.block(DISK);
        machine.pass();
    }

    assert!(reached.load(SeqCst) > 20);
    machine.assert_lawful();
}
