//! Known mistakes of other drivers of VT-d, each as a test of this one. Each test names its advisory, or the commit that mended
//! it, in its comment. Those of their list that have no test here, and why:
//!
//! | advisory or commit | where it is, or why not |
//! |---|---|
//! | XSA-33, XSA-36, XSA-360; ACRN 25c0e3817 | interrupt entries: named at the tests of `vtd/interrupts.rs` |
//! | XSA-337 | entries are named by handles, and nothing is read back from a device |
//! | XSA-80, XSA-222 | no flag puts a flush off; a [`Ticket`] must be used, by lint |
//! | XSA-237, XSA-285, XSA-395, XSA-461, XSA-467, XSA-492 | the hypervisor's: ownership, locks; the driver takes none |
//! | XSA-275, XSA-311, XSA-442, XSA-445; CVE-2026-43253 | AMD's unit |
//! | XSA-304 | named at its test in `vtd/bring_up.rs` |
//! | XSA-321, XSA-328, XSA-347; CVE-2026-45894, -45944, -45945, -45862, -74439, -90243 | order and publication of entries: named at the tests of `vtd_stores.rs` and `vtd/tables.rs` |
//! | XSA-378, XSA-386, XSA-400, XSA-460 | reserved regions are the caller's to map; failures on the way: named at its test in `vtd_stores.rs` |
//! | XSA-449 | the caller assigns each requester ID; `dmar.rs` tells which there are |
//! | XSA-450, XSA-458 | no features that change code; no locks |
//! | "Handle two DRHD" of Asterinas #3920 | `dmar.rs` |
//! | Jailhouse a76e766b, ae8b272f | no queue is emulated for a guest |
//! | CVE-2024-44994, "Handle iommu faults for a bad iopf setup", "Fix leak in iopf_queue_discard_partial()"; a request that is not the last is answered; groups by index without PASID, floods without a last | the broker's: `broker_groups.rs` |
//! | CVE-2026-74520, CVE-2025-39966 and the rest of iommufd's queues | the broker's and the channel's: `broker_queues.rs`, `channel.rs` |
//! | "Fix a deadlock in intel_svm_drain_prq()" | a drain is a ticket, and holds no lock |
//! | "Fix crash in iommu_sva_unbind_device" (06e14c3) | only an [`Attachment`] can be detached, and once: `vtd/tables.rs` |
//! | CVE-2026-89448 (tboot, ACS) | ACS is the caller's; the driver switches nothing of it |
//! | "Do not allow PTEs to be split when dirty logging" | no dirty logging |
//! | "Program device table when reuse fails", "Fix kdump boot failure with scalable mode" | named at its test in `vtd/takeover.rs` |
//! | CVE-2026-90428 (an error from before) | named at its test in `vtd/bring_up.rs` |
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use hosted::{Machine, Moment, Tapped, needs, root, unit};
use iommu::{
    Attachment, Bus, Commands, Completion, DomainId, Error, Event, Failure, FailureCause, FaultReason,
    Features, GroupTag, Invalidation, Iova, Message, Outcome, PAGE_SIZE, PageRequest, PageResponse, Pasid,
    Perms, Stages, StreamId, Tables, Ticket, Translation,
};
use models::vtd::{Config, Refusal, Requested};
use pgtable::{VtdFirstStage, VtdSecondStage};
use std::sync::{Arc, Mutex};
use vtd::{
    Found, HEAD_LIMIT_US,
    remap::{Destination, Interrupt, RemapEntry, Source},
};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };
const OTHER: Invalidation = Invalidation::Device { stream: NIC, device_tlb: false };

const FSTS: usize = 0x34;
const IQH: usize = 0x80;
const IQT: usize = 0x88;
const IQA: usize = 0x90;
const PQH: usize = 0xC0;
const PQT: usize = 0xC8;
const PRS: usize = 0xDC;

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

/// A machine whose disk has PASID 5 attached, with a page at 0x1000 that begins with 7.
fn served<B: Bus + Clone>(
    mut machine: Machine<B>,
) -> (Machine<B>, Attachment, pgtable::Tree<VtdFirstStage<4>>) {
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.assign(DISK, ALL);
    let attachment = machine.attach(DISK, pasid(5), &tree);
    machine.map(&tree, Iova(0x1000), 7);
    machine.unit.plug(NIC);
    (machine, attachment, tree)
}

/// A unit that takes longer than this driver waits before it gives a device up.
fn patient() -> Config {
    Config { device_tlb_timeout_us: 1 << 40, ..Config::full() }
}

fn page(attachment: Attachment) -> Invalidation {
    Invalidation::Pages { attachment, iova: Iova(0x1000), pages: 1 }
}

fn submit<B: Bus + Clone>(machine: &mut Machine<B>, what: &[Invalidation]) -> Ticket {
    machine.vtd.commands.submit(what).expect("there is room")
}

fn request(index: u16) -> PageRequest {
    let tag = GroupTag { pasid: pasid(5), index };
    PageRequest { stream: DISK, tag, iova: Iova(0x1000), perms: Perms::READ, last: true }
}

/// XSA-373: a command that timed out stayed in the queue, and its late completion was taken for the next command's.
#[test]
fn a_completion_that_comes_late_is_nobody_s() {
    let (mut machine, attachment, tree) = served(Machine::new(patient()));
    assert_eq!(machine.ats_read(DISK, pasid(5), Iova(0x1000)), Ok(7));
    machine.unit.hold_device_tlb(DISK);
    machine.unmap(&tree, Iova(0x1000));
    let silent = submit(&mut machine, &[page(attachment)]);
    assert_eq!(machine.vtd.commands.poll(silent), Completion::Pending);

    machine.unit.advance(HEAD_LIMIT_US);
    assert_eq!(machine.vtd.commands.poll(silent), Completion::Failed, "which is not done");
    let failure = Failure { cause: FailureCause::Unanswered, stream: Some(DISK), ticket: Some(silent) };
    assert_eq!(machine.vtd.commands.recover(), Some(failure));
    assert_eq!(machine.vtd.commands.recover(), None, "once");
    assert_eq!(machine.ats_read(DISK, pasid(5), Iova(0x1000)), Ok(7), "it has not let go");
    let behind = submit(&mut machine, &[OTHER]);
    assert_eq!(machine.vtd.commands.poll(behind), Completion::Pending);

    // The unit writes the status of the first, and then of the second.
    machine.unit.pause(0);
    machine.unit.release_device_tlb(DISK);
    assert_eq!(machine.vtd.commands.poll(silent), Completion::Failed);
    assert_eq!(machine.vtd.commands.poll(behind), Completion::Pending, "not by the first one's");
    machine.unit.resume();
    assert_eq!(machine.vtd.commands.poll(behind), Completion::Done);
    assert_eq!(machine.vtd.commands.poll(silent), Completion::Failed);
    machine.assert_lawful();
}

/// XSA-373: the place in the queue was used again.
#[test]
fn a_place_in_the_queue_is_not_used_again_before_its_ticket_has_ended() {
    let (mut machine, attachment, _) = served(Machine::new(patient()));
    machine.unit.hold_device_tlb(DISK);
    let at = machine.unit.read64(IQT);
    let queue = machine.unit.read64(IQA) & !0xFFF;
    let words = |machine: &Machine| {
        let word = |n: u64| machine.memory.device_load(iommu::PhysAddr(queue + at + n * 8)).expect("inside");
        [0, 1, 2, 3].map(word)
    };
    let _silent = submit(&mut machine, &[page(attachment)]);
    let before = words(&machine);
    machine.unit.advance(HEAD_LIMIT_US);
    // As if the unit fetched all that it is given.
    machine.unit.pause(usize::MAX);

    for _ in 0..400 {
        let _ = machine.vtd.commands.submit(&[]);
        let _ = machine.vtd.commands.poll(Ticket(1));
    }

    assert_eq!(words(&machine), before);
    let refused = machine.vtd.commands.submit(&[]);
    assert!(matches!(refused, Err(Error::QueueFull { .. })), "{refused:?}");
}

/// XSA-373: the time that a command waited behind others was counted against its owner.
#[test]
fn time_counts_from_when_a_command_is_at_the_head() {
    let (mut machine, attachment, _) = served(Machine::new(patient()));
    machine.unit.hold_device_tlb(DISK);
    let first = submit(&mut machine, &[page(attachment)]);
    let second = submit(&mut machine, &[OTHER]);
    let polled = |machine: &mut Machine| [first, second].map(|ticket| machine.vtd.commands.poll(ticket));
    assert_eq!(polled(&mut machine), [Completion::Pending; 2]);
    machine.unit.advance(HEAD_LIMIT_US * 9 / 10);
    assert_eq!(polled(&mut machine), [Completion::Pending; 2]);

    // The first is done in time; now the unit does nothing at all.
    machine.unit.pause(0);
    machine.unit.release_device_tlb(DISK);
    assert_eq!(polled(&mut machine), [Completion::Done, Completion::Pending]);
    // Where the unit alone is to do something, that is a second.
    machine.unit.advance(900_000);
    assert_eq!(polled(&mut machine), [Completion::Done, Completion::Pending], "its own time is not over");
    machine.unit.advance(200_000);
    assert_eq!(polled(&mut machine), [Completion::Done, Completion::Failed]);

    // No device is to blame.
    let failure = Failure { cause: FailureCause::Stopped, stream: None, ticket: Some(second) };
    assert_eq!(machine.vtd.commands.recover(), Some(failure));
}

/// XSA-373, CVE-2024-26891, CVE-2026-43130, CVE-2026-43161, 42662d19839f, 10e60d878139: a device that is gone, in either mode.
#[test]
fn a_device_that_is_gone_holds_nobody_up_for_longer_than_the_unit_waits() {
    for legacy in [false, true] {
        let config = Config { device_tlb_timeout_us: 5_000, ..Config::full() };
        let mut machine = if legacy { Machine::legacy(config) } else { Machine::new(config) };
        machine.unit.plug(NIC);
        let gone = Attachment {
            serial: 1,
            stream: DISK,
            pasid: None,
            domain: DomainId(1),
            stages: Stages::Second,
            device_tlb: true,
        };
        for _ in 0..20 {
            let silent = submit(&mut machine, &[Invalidation::Attachment(gone)]);
            let others = [(); 5].map(|()| submit(&mut machine, &[OTHER]));

            machine.unit.advance(5_001);
            assert_eq!(machine.pass().len(), 1);
            let failure = machine.vtd.commands.recover().expect("it failed");
            assert_eq!(machine.vtd.commands.recover(), None);

            assert_eq!((failure.stream, failure.ticket), (Some(DISK), Some(silent)));
            assert_eq!(machine.vtd.commands.poll(silent), Completion::Failed);
            assert!(others.into_iter().all(|ticket| machine.vtd.commands.poll(ticket) == Completion::Done));
        }
        machine.assert_lawful();
    }
}

/// "Fix intel iommu iotlb sync hardlockup and retry": the waits that were aborted were looked for in every second place.
#[test]
fn an_abort_is_noticed_wherever_in_the_queue_its_wait_is() {
    for filler in 0..9 {
        let config = Config { device_tlb_timeout_us: 1_000, ..Config::full() };
        let (mut machine, attachment, _) = served(Machine::new(config));
        machine.unit.hold_device_tlb(DISK);
        (0..filler).for_each(|_| _ = submit(&mut machine, &[]));
        let what = vec![page(attachment); 1 + filler % 3];
        let silent = submit(&mut machine, &what);
        let behind = submit(&mut machine, &[OTHER]);

        machine.unit.advance(2_000);
        machine.pass();

        assert_eq!(machine.vtd.commands.recover().and_then(|failure| failure.ticket), Some(silent));
        assert_eq!(machine.vtd.commands.poll(silent), Completion::Failed, "{filler}");
        assert_eq!(machine.vtd.commands.poll(behind), Completion::Done, "{filler}");
        machine.assert_lawful();
    }
}

/// "Fix potential lockup if qi_submit_sync called with 0 count".
#[test]
fn a_batch_of_nothing_is_done() {
    let mut machine = Machine::new(Config::full());
    let before = machine.unit.executed().len();

    machine.invalidate(&[]);

    assert_eq!(machine.unit.executed().len() - before, 1, "the wait");
}

/// "Avoid out-of-range shift in qi_desc_dev_iotlb_pasid()"; CVE-2023-52484: a huge range in page-sized steps.
#[test]
fn a_huge_range_is_few_descriptors_and_forgets_all_of_it() {
    for (iova, pages) in
        [(0, u64::MAX), (0, 1 << 52), (0x7000, u64::MAX), (1 << 63, 1 << 51), (0x1000, 1 << 40)]
    {
        let (mut machine, attachment, _) = served(Machine::new(Config::full()));
        assert_eq!(machine.ats_read(DISK, pasid(5), Iova(0x1000)), Ok(7));
        let before = machine.unit.executed().len();

        for what in [
            Invalidation::Pages { attachment, iova: Iova(iova), pages },
            Invalidation::DeviceTlb { attachment, pasid: pasid(5), pages: Some((Iova(iova), pages)) },
        ] {
            machine.invalidate(&[what]);
        }

        assert!(machine.unit.executed().len() - before < 24, "{iova:#x}");
        assert_eq!(machine.unit.read32(FSTS), 0, "{iova:#x}: every descriptor was one");
        let covers = iova <= 0x1000 && (0x1000 - iova) / PAGE_SIZE < pages;
        // More may be forgotten than was asked for.
        assert!(machine.unit.device_tlb(DISK).is_empty() || !covers, "{iova:#x}");
        machine.assert_lawful();
    }
}

/// ACRN 65ec6f3f3: the word that hardware writes was on a stack that was gone when it did.
#[test]
fn a_wait_writes_to_the_unit_s_own_memory_and_nowhere_else() {
    let (unit, memory) = unit(Config { device_tlb_timeout_us: 1_000, ..Config::full() });
    let parts = needs(&memory);
    let status = parts.status.phys().0;
    let (mut machine, attachment, _) =
        served(Machine::enable(unit, memory, unit, parts).expect("it comes into service"));
    machine.unit.hold_device_tlb(DISK);
    let queue = machine.unit.read64(IQA) & !0xFFF;

    // A device that does not answer, and a descriptor that is none.
    let _ = submit(&mut machine, &[page(attachment)]);
    let _ = submit(&mut machine, &[Invalidation::All]);
    let at = machine.unit.read64(IQT) - 32;
    machine.memory.device_store(iommu::PhysAddr(queue + at), 0xF).expect("inside");
    machine.unit.advance(2_000);
    machine.pass();
    while machine.vtd.commands.recover().is_some() {}
    machine.invalidate(&[OTHER]);

    let waits = machine.unit.executed().into_iter().filter(|words| words[0] & 0xF == 5);
    assert!(waits.clone().count() > 5);
    assert!(waits.into_iter().all(|words| (status..status + 16).contains(&words[1])));
    machine.assert_lawful();
}

/// XSA-346: a page was given away before what was to forget it had completed.
#[test]
fn a_ticket_is_not_done_while_a_device_still_reaches_the_page() {
    let (mut machine, attachment, tree) = served(Machine::new(Config::full()));
    assert_eq!(machine.ats_read(DISK, pasid(5), Iova(0x1000)), Ok(7));
    machine.unit.hold_device_tlb(DISK);
    machine.unmap(&tree, Iova(0x1000));

    let ticket = submit(&mut machine, &[page(attachment)]);
    for _ in 0..10 {
        assert_eq!(machine.ats_read(DISK, pasid(5), Iova(0x1000)), Ok(7));
        assert_eq!(machine.vtd.commands.poll(ticket), Completion::Pending);
        machine.unit.advance(100);
    }
    machine.unit.release_device_tlb(DISK);

    assert_eq!(machine.vtd.commands.poll(ticket), Completion::Done);
    assert!(machine.ats_read(DISK, pasid(5), Iova(0x1000)).is_err());
}

/// XSA-302, XSA-306: a device went on after it was taken away; also where its invalidation fails.
#[test]
fn a_device_that_was_taken_away_reaches_nothing_also_if_it_did_not_answer() {
    let config = Config { device_tlb_timeout_us: 1_000, ..Config::full() };
    let (mut machine, _, _) = served(Machine::new(config));
    assert_eq!(machine.ats_read(DISK, pasid(5), Iova(0x1000)), Ok(7));
    machine.unit.hold_device_tlb(DISK);

    let (_leaving, invalidations) = machine.vtd.tables.block(DISK).expect("it is assigned");
    let ticket = submit(&mut machine, &invalidations);
    machine.unit.advance(2_000);
    machine.pass();
    assert!(machine.vtd.commands.recover().is_some());

    assert_eq!(machine.vtd.commands.poll(ticket), Completion::Failed);
    assert_ne!(machine.unit.device_tlb(DISK), [], "it still has its translation");
    assert_eq!(machine.ats_read(DISK, pasid(5), Iova(0x1000)), Err(Refusal::Fault(0x41)), "SCT.2");
    assert_eq!(machine.read(DISK, pasid(5), Iova(0x1000)), Err(Refusal::Fault(0x41)));
    // And nobody gets its place.
    assert!(machine.vtd.tables.assign(DISK, ALL).is_err());
}

/// XSA-207, XSA-399: tables that were never given back; a domain number that was used again too early.
#[test]
fn frames_and_domain_numbers_come_back_when_the_unit_has_forgotten_them_and_not_before() {
    let mut machine = Machine::new(Config::full());
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.assign(NIC, ALL);
    let other = machine.attach(NIC, None, &tree);
    machine.detach(other);
    machine.block(NIC);
    let free = machine.vtd.tables.frames_free();
    for round in 0..300 {
        machine.assign(NIC, ALL);
        let first = machine.attach(NIC, None, &tree);
        let (leaving, invalidations) = machine.vtd.tables.detach(first).expect("it is attached");
        let second = machine.attach(NIC, pasid(5), &tree);
        assert_ne!(second.domain, first.domain, "round {round}");
        machine.invalidate(&invalidations);
        machine.vtd.tables.finish(leaving);
        machine.detach(second);
        machine.block(NIC);

        assert_eq!(machine.vtd.tables.frames_free(), free, "round {round}");
    }
    // A device of which nothing was ever attached.
    (0..300).for_each(|_| {
        machine.assign(NIC, ALL);
        machine.block(NIC);
    });
    assert_eq!(machine.vtd.tables.frames_free(), free);
}

/// XSA-390: a unit of fewer levels got the root of a higher table.
#[test]
fn a_root_of_another_height_than_the_unit_walks_is_refused() {
    let mut machine = Machine::new(Config::full());
    machine.assign(NIC, Features::default());
    for levels in [0, 1, 2, 3, 5, 6, 255] {
        for translation in [Translation::Stage1, Translation::Stage2] {
            let refused = machine.vtd.tables.attach(NIC, None, translation(root(0x8_0000_0000, levels)));
            // CAP.SAGAW of this unit: second stages of 3 and 4 levels.
            let taken = levels == 3 && matches!(translation(root(0, 3)), Translation::Stage2(_));
            match refused {
                Ok((attachment, _)) if taken => machine.detach(attachment),
                Err(Error::Unsupported { .. }) if !taken => {}
                other => panic!("{levels}: {other:?}"),
            }
        }
    }
}

/// "Unconditionally flush device TLB for pasid table updates"; "SVA stale kernel IOTLB" (CVE-2025-71089).
#[test]
fn what_a_device_and_the_unit_remember_of_tables_goes_with_their_attachment() {
    let (mut machine, attachment, _) = served(Machine::new(Config::full()));
    assert_eq!(machine.ats_read(DISK, pasid(5), Iova(0x1000)), Ok(7));

    machine.detach(attachment);

    assert_eq!(machine.unit.device_tlb(DISK), []);
    // The tables below are others now: nothing of the way to the old ones is left.
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.attach(DISK, pasid(5), &tree);
    assert_eq!(machine.read(DISK, pasid(5), Iova(0x1000)), Err(Refusal::Fault(0x71)));
    machine.map(&tree, Iova(0x1000), 8);
    assert_eq!(machine.ats_read(DISK, pasid(5), Iova(0x1000)), Ok(8));
    machine.assert_lawful();
}

/// "Fix incorrect domain ID in context flush helper": the context of legacy mode is found under its domain.
#[test]
fn a_context_of_legacy_mode_is_forgotten_under_its_own_domain() {
    let mut machine = Machine::legacy(Config::full());
    let tree = machine.tree(VtdSecondStage::<4>);
    machine.map(&tree, Iova(0x1000), 7);
    for stream in [DISK, NIC] {
        machine.assign(stream, Features::default());
        let translation = Translation::Stage2(root(tree.root().0, tree.levels()));
        let (_, invalidations) = machine.vtd.tables.attach(stream, None, translation).expect("it can be");
        machine.invalidate(&invalidations);
        assert_eq!(machine.read(stream, None, Iova(0x1000)), Ok(7));
    }

    let (_leaving, invalidations) = machine.vtd.tables.block(NIC).expect("it is assigned");
    machine.invalidate(&invalidations);

    assert_eq!(machine.read(NIC, None, Iova(0x1000)), Err(Refusal::Fault(0x02)), "LCT.2");
    assert_eq!(machine.read(DISK, None, Iova(0x1000)), Ok(7));
    machine.assert_lawful();
}

/// Thunderclap: a device says that its addresses are translated already.
#[test]
fn a_device_without_a_device_tlb_reaches_nothing_with_addresses_that_it_calls_translated() {
    let mut machine = Machine::new(Config::full());
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.assign(DISK, Features { pasid: true, ..Features::default() });
    machine.attach(DISK, None, &tree);
    machine.map(&tree, Iova(0x1000), 7);
    assert_eq!(machine.read(DISK, None, Iova(0x1000)), Ok(7));

    assert_eq!(machine.ats_read(DISK, None, Iova(0x1000)), Err(Refusal::Fault(0x44)), "SCT.5");
}

/// Asterinas #3920: a status that was read once was written back, and with it what had come meanwhile.
#[test]
fn only_what_was_read_is_acknowledged_and_one_thing_at_a_time() {
    let (unit, memory) = unit(Config::full());
    let parts = needs(&memory);
    let writes = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&writes);
    let bus = Tapped::new(unit, move |_, moment| {
        if let Moment::Written { offset, value } = moment {
            kept.lock().expect("no test panics here").push((offset, value));
        }
    });
    let (mut machine, ..) = served(Machine::enable(unit, memory, bus, parts).expect("it comes into service"));
    for _ in 0..6 {
        assert!(machine.read(DISK, pasid(5), Iova(0x9000)).is_err());
    }
    machine.unit.stray_completion(DISK);
    // PFO, PPF, ICE.
    assert_eq!(machine.unit.read32(FSTS) & 0x7F, 1 | 2 | 1 << 5);
    writes.lock().expect("no test panics here").clear();

    let events = machine.pass();
    assert_eq!(machine.unit.read32(FSTS) & 0x7F, 1 << 5, "what is for the command side is left to it");
    assert!(machine.vtd.commands.recover().is_some());

    assert_eq!(events.len(), 4 + 1 + 1);
    let writes = writes.lock().expect("no test panics here");
    let status: Vec<u64> = writes.iter().filter(|write| write.0 == FSTS).map(|write| write.1).collect();
    assert_eq!(status, [1, 1 << 5], "PFO alone, then ICE alone");
    // FRCD: F alone, in the top 32 bits of each of four records. CAP.FRO is 33:24.
    let first = (Config::full().cap >> 24 & 0x3FF) as usize * 16;
    let records: Vec<_> = writes.iter().filter(|write| write.0 >= first && write.0 < first + 64).collect();
    assert_eq!(records.len(), 4);
    assert!(records.iter().all(|write| write.0 % 16 == 12 && write.1 == 1 << 31));
}

/// Asterinas #3920: a unit that does not forget by itself when its tables are set (ESRTPS, ESIRTPS = 0).
#[test]
fn a_unit_that_does_not_forget_by_itself_is_told_to() {
    for bits in [0, 1 << 62, 1 << 63] {
        let machine = Machine::new(Config { cap: Config::full().cap & !(3 << 62) | bits, ..Config::full() });

        let kinds = machine.unit.executed().iter().map(|words| words[0] & 0xFF).collect::<Vec<_>>();

        // Global: context cache, interrupt entries, PASID cache, IOTLB.
        for kind in [0x11, 0x04, 0x37, 0xD2] {
            assert!(kinds.contains(&kind), "{kind:#x} of {kinds:x?}");
        }
    }
}

/// CVE-2024-35843: a page request of a device that is being taken away.
#[test]
fn a_request_that_was_on_its_way_when_its_device_left_is_reported_before_the_drain_is_done() {
    let (mut machine, attachment, _) = served(Machine::new(Config::full()));
    machine.unit.hold_page_requests();
    assert_eq!(machine.unit.page_request(request(1)), Requested::Held);

    let (leaving, mut invalidations) = machine.vtd.tables.detach(attachment).expect("it is attached");
    invalidations.push(Invalidation::PageRequestDrain).expect("there is room");
    let ticket = submit(&mut machine, &invalidations);
    assert_eq!(machine.vtd.commands.poll(ticket), Completion::Done);

    assert_eq!(machine.pass(), [Event::PageRequest(request(1))]);
    let response = PageResponse { stream: DISK, tag: request(1).tag, outcome: Outcome::Invalid };
    assert_eq!(machine.vtd.commands.respond(response), Ok(()));
    assert_eq!(machine.unit.waiting_groups(), []);
    machine.vtd.tables.finish(leaving);
    machine.assert_lawful();
}

/// 5ef7e24c7420 "PRS isn't usable if PDS isn't supported"; 39c20c4e83b9 "Only handle IOPF for SVA when PRI is supported".
#[test]
fn a_unit_that_cannot_drain_takes_no_device_with_page_requests_and_every_other() {
    // ECAP.PDS is bit 42, ECAP.PRS bit 29.
    for lacks in [1 << 42, 1 << 29, 1 << 42 | 1 << 29] {
        let config = Config { ecap: Config::full().ecap & !lacks, ..Config::full() };
        let mut machine = Machine::new(config);

        let refused = machine.vtd.tables.assign(DISK, ALL);
        assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
        let drained = machine.vtd.commands.submit(&[Invalidation::PageRequestDrain]);
        assert_eq!(drained.is_ok(), lacks & 1 << 42 == 0);
        machine.assign(DISK, Features { page_requests: false, ..ALL });

        assert_eq!(machine.unit.read32(FSTS), 0);
        machine.assert_lawful();
    }
}

/// "Clear PRQ overflow only when PRQ is empty".
#[test]
fn an_overflow_is_acknowledged_when_the_queue_is_empty_and_not_before() {
    let (unit, memory) = unit(Config::full());
    let parts = needs(&memory);
    let cleared = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&cleared);
    let bus = Tapped::new(unit, move |unit, moment| {
        if matches!(moment, Moment::Written { offset: PRS, value } if value & 2 != 0) {
            let empty = unit.read64(PQH) == unit.read64(PQT);
            kept.lock().expect("no test panics here").push(empty);
        }
    });
    let (mut machine, ..) = served(Machine::enable(unit, memory, bus, parts).expect("it comes into service"));
    cleared.lock().expect("no test panics here").clear();
    for index in 0..200 {
        machine.unit.page_request(request(index));
    }
    assert_eq!(machine.unit.read32(PRS), 3, "PPR and PRO");

    let events = machine.pass();

    assert_eq!((events.len(), events.last()), (128, Some(&Event::RequestsLost)));
    assert_eq!(*cleared.lock().expect("no test panics here"), [true]);
    machine.assert_lawful();
}

/// "Drop stop marker messages"; "Remove the pasid present check in prq_event_thread"; FAILURE encoded as 2.
#[test]
fn each_kind_of_page_request_gets_the_answer_that_is_its_own() {
    let (mut machine, ..) = served(Machine::new(Config::full()));
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.attach(DISK, None, &tree);
    let plain = PageRequest { tag: GroupTag { pasid: None, index: 3 }, ..request(3) };
    assert_eq!(machine.unit.stop_marker(DISK, Pasid::new(5).expect("20 bits")), Requested::Queued);
    assert_eq!(machine.unit.page_request(plain), Requested::Queued);
    assert_eq!(machine.unit.page_request(request(4)), Requested::Queued);

    let expected = [
        Event::StopMarker { stream: DISK, pasid: pasid(5) },
        Event::PageRequest(plain),
        Event::PageRequest(request(4)),
    ];
    assert_eq!(machine.pass(), expected);
    let at = machine.unit.executed().len();
    for (tag, outcome) in [(plain.tag, Outcome::Success), (request(4).tag, Outcome::Failure)] {
        let response = PageResponse { stream: DISK, tag, outcome };
        assert_eq!(machine.vtd.commands.respond(response), Ok(()));
    }

    // Type 9, RID 0x20 in 31:16: without PP and PASID; with both, and code 0xF in 15:12. PRGI in 11:3 of the second word.
    let words = machine.unit.executed().split_off(at);
    assert_eq!(words, [[0x0020_0009, 3 << 3, 0, 0], [0x5_0020_F019, 4 << 3, 0, 0]]);
    assert_eq!(machine.unit.waiting_groups(), [], "a stop marker waits for nothing");
    machine.assert_lawful();
}

/// "Report the right page fault address"; "Fix PDP check"; "Don't set then clear private data".
#[test]
fn the_address_of_a_request_is_the_one_that_was_sent() {
    let (mut machine, ..) = served(Machine::new(Config::full()));
    for (index, iova) in (0..).zip([0, 0x1000, 0x7FFF_FFFF_F000, 0xFFFF_8000_0000_0000, !0xFFF]) {
        let request = PageRequest { iova: Iova(iova), ..request(index) };
        assert_eq!(machine.unit.page_request(request), Requested::Queued);

        assert_eq!(machine.pass(), [Event::PageRequest(request)]);
    }
}

/// CVE-2024-26891 from the other side: nothing is left of an error that an earlier system caused.
#[test]
fn a_queue_starts_at_its_beginning_whatever_was_before() {
    let (unit, memory) = unit(Config::full());
    let found = Found::probe(unit).expect("it is there");
    assert!(found.old_queue().is_none());
    unit.stray_completion(DISK);
    let parts = needs(&memory);

    let mut machine = Machine::from_found(found, unit, memory, parts).expect("it comes into service");

    assert_eq!(machine.vtd.commands.recover(), None);
    assert_eq!(machine.pass(), []);
    assert_eq!(machine.unit.read64(IQH), machine.unit.read64(IQT));
}

/// "Reject unsupported page request modes": what asks to execute, or as a supervisor, was never answered.
#[test]
fn a_request_of_every_mode_says_what_it_wants_and_has_one_answer() {
    let (mut machine, ..) = served(Machine::new(Config::full()));
    for bits in 1..16_u16 {
        let has = |bit: u16| bits & 1 << bit != 0;
        let perms = Perms { read: has(0), write: has(1), execute: has(2), privileged: has(3) };
        if !perms.read && !perms.write {
            // A last request for neither is a stop marker.
            continue;
        }
        let request = PageRequest { perms, ..request(bits) };
        assert_eq!(machine.unit.page_request(request), Requested::Queued);
        assert_eq!(machine.pass(), [Event::PageRequest(request)]);

        let response = PageResponse { stream: DISK, tag: request.tag, outcome: Outcome::Invalid };
        assert_eq!(machine.vtd.commands.respond(response), Ok(()));
        assert_eq!(machine.unit.waiting_groups(), [], "{perms:?}");
    }
    machine.assert_lawful();
}

/// XSA-49: entries that let every source through.
#[test]
fn no_entry_that_interrupts_leaves_its_source_unverified() {
    let interrupt = Interrupt::fixed(Destination::Physical(1), 0x41);
    let mut sources = vec![Source::Function(DISK), Source::Function(StreamId(0xFFFF))];
    sources.extend((0..=3).map(|bits| Source::Phantoms { function: DISK, bits }));
    sources.extend([(0, 0), (2, 5), (0, 0xFF)].map(|(first, last)| Source::Buses { first, last }));
    for source in sources {
        let Ok(entry) = RemapEntry::new(source, interrupt, true) else { continue };
        // P is bit 0; SVT is 83:82, and only 1 and 2 compare.
        assert_eq!(entry.0[0] & 1, 1, "{source:?}");
        assert!(matches!(entry.0[1] >> 18 & 3, 1 | 2), "{source:?}: {:#x}", entry.0[1]);
    }
}

/// XSA-59: what cannot be an interrupt became an error of the whole machine.
#[test]
fn a_malformed_interrupt_request_is_a_fault_of_its_device_and_no_more() {
    let (mut machine, attachment, _) = served(Machine::new(Config::full()));
    // Remappable (bit 4 of the address), with data where none may be (31:16).
    for data in [1 << 16, u32::MAX] {
        let malformed = Message { address: 0xFEE0_0010, data };
        assert_eq!(machine.unit.interrupt(DISK, malformed), Err(Refusal::Fault(0x20)));

        let events = machine.pass();
        let [Event::Fault(fault)] = &events[..] else { panic!("{events:?}") };
        assert_eq!((fault.stream, fault.code, fault.reason), (DISK, 0x20, FaultReason::Interrupt));
    }
    assert_eq!(machine.read(DISK, attachment.pasid, Iova(0x1000)), Ok(7));
    machine.assert_lawful();
}
