//! The command side of the VT-d driver against the modelled unit: what is put in the queue, and when it counts as done.

use crate::HARDWARE;
use hosted::{Machine, Moment, Random, Tapped, needs};
use iommu::{
    Attachment, Bus, Commands, Completion, DomainId, Error, Event, Events, Features, GroupTag, Invalidation,
    Iova, Outcome, PAGE_SIZE, PageRequest, PageResponse, Pasid, Perms, PhysAddr, Stages, StreamId, Tables,
    Ticket,
};
use models::vtd::{Config, VtdUnit};
use pgtable::VtdFirstStage;
use std::{
    ops::Range,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };
/// Entries of the queue that `needs` gives, answers that it keeps room for, and entries that can be used.
const ENTRIES: usize = 128;
const ANSWERS: usize = 64;
const USABLE: usize = ENTRIES - 1;

/// The register that holds the tail.
const IQT: usize = 0x88;

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

/// PFSID 0x0300, the device itself: bits 15:4 in 63:52, bits 3:0 (zero here) in 15:12.
const PFSID: u64 = 0x30 << 52;

/// An attachment that no table knows: good enough to encode.
fn attachment(pasid: Option<Pasid>, stages: Stages, device_tlb: bool) -> Attachment {
    Attachment { serial: 1, stream: StreamId(0x0300), pasid, domain: DomainId(0x10), stages, device_tlb }
}

/// Returns the descriptors that `invalidation` becomes, without the wait that ends them.
fn encoded(config: Config, invalidation: Invalidation) -> Vec<[u64; 4]> {
    // Compares descriptors in the order in which they were queued.
    let mut machine = hosted::Hardware::Prompt.machine(config);
    machine.unit.plug(StreamId(0x0300));
    let before = machine.unit.executed().len();
    machine.invalidate(&[invalidation]);
    let mut words = machine.unit.executed().split_off(before);
    let wait = words.pop().expect("a wait");
    // Row 33 with FN: the second wait of this unit.
    assert_eq!(wait[0], 0x2_0000_0065);
    without_fences(words, wait[1])
}

/// Row 33 with data 0, and FN.
const FENCE: u64 = 0x65;

/// Leaves out the waits between the descriptors: SW with data 0 to the word after `status`, and FN.
fn without_fences(mut words: Vec<[u64; 4]>, status: u64) -> Vec<[u64; 4]> {
    words.retain(|&words| words != [FENCE, status + 8, 0, 0]);
    words
}

#[test]
fn pages_of_a_pasid_are_cut_into_blocks_for_the_unit_and_then_for_the_device() {
    let words = |invalidation| encoded(Config::full(), invalidation);
    let tagged = attachment(pasid(1), Stages::First, true);
    let pages = |attachment, iova, pages| Invalidation::Pages { attachment, iova: Iova(iova), pages };

    // Row 38: 512 pages at 0x20_0000. Its device TLB half as row 44 without G: eight ones from bit 12 on, and S.
    let type_8 = |address| [8 | 0x300 << 16 | 1 << 32 | PFSID, address, 0, 0];
    assert_eq!(
        words(pages(tagged, 0x20_0000, 512)),
        [[0x1_0010_0036, 0x20_0009, 0, 0], type_8(0x20_0000 | 0xF_F000 | 1 << 11)]
    );
    // One page: AM 0, and no S.
    assert_eq!(words(pages(tagged, 0x7000, 1)), [[0x1_0010_0036, 0x7000, 0, 0], type_8(0x7000)]);
    // Three pages from an odd one: one and two. Two pages: S, and no one bit.
    assert_eq!(
        words(pages(tagged, 0x1000, 3)),
        [
            [0x1_0010_0036, 0x1000, 0, 0],
            [0x1_0010_0036, 0x2001, 0, 0],
            type_8(0x1000),
            type_8(0x2000 | 1 << 11)
        ]
    );
    // Without PASID: PASID 0 (RID_PASID) for the unit, type 3 for the device. Row 30: 16 pages, three ones, S in bit 0.
    assert_eq!(
        words(pages(attachment(None, Stages::First, true), 0x1234_0000, 16)),
        [[0x10_0036, 0x1234_0004, 0, 0], [3 | 0x300 << 32 | PFSID, 0x1234_7001, 0, 0]]
    );
    // A device without a TLB is not asked.
    assert_eq!(
        words(pages(attachment(pasid(1), Stages::First, false), 0x7000, 1)),
        [[0x1_0010_0036, 0x7000, 0, 0]]
    );
}

/// What goes by itself takes a shorter way than what goes with others.
#[test]
fn pages_by_themselves_are_told_as_they_are_among_others() {
    let full = Config::full();
    // CAP.PSI is bit 39; CAP.MAMV is bits 53:48.
    let configs = [
        full,
        Config { cap: full.cap & !(1 << 39), ..full },
        Config { cap: full.cap & !(0x3F << 48) | 4 << 48, ..full },
    ];
    for config in configs {
        let mut machine = hosted::Hardware::Prompt.machine(config);
        machine.unit.plug(StreamId(0x0300));
        let mut told = |invalidations: &[Invalidation]| {
            let before = machine.unit.executed().len();
            machine.invalidate(invalidations);
            let mut words = machine.unit.executed().split_off(before);
            let wait = words.pop().expect("a wait");
            assert_eq!((wait[0] as u32, words.contains(&wait)), (0x65, false));
            without_fences(words, wait[1])
        };
        for stages in [Stages::First, Stages::Second, Stages::Nested] {
            for (pasid, device_tlb) in [(None, false), (pasid(1), false), (pasid(1), true)] {
                for (page, pages) in [
                    (7, 1),
                    (8, 2),
                    (7, 2),
                    (7, 3),
                    (0, 16),
                    (16, 16),
                    (0, 32),
                    (5, 0),
                    (0, 1 << 18),
                    (1, 255),
                ] {
                    let attachment = attachment(pasid, stages, device_tlb);
                    let iova = Iova(page * PAGE_SIZE);
                    let one = Invalidation::Pages { attachment, iova, pages };
                    // Of which nothing becomes a descriptor: faults do not stall here.
                    let nothing = Invalidation::Stalls { stream: attachment.stream };

                    assert_eq!(told(&[one]), told(&[one, nothing]), "{one:?}");
                }
            }
        }
        machine.assert_lawful();
    }
}

/// Two descriptors at a time, with an odd number of them before: the last place of the ring comes to be the first of two.
#[test]
fn a_page_by_itself_goes_over_the_end_of_the_ring() {
    let mut machine = HARDWARE.machine(Config::full());
    machine.invalidate(&[]);
    let one = |page: u64| Invalidation::Pages {
        attachment: attachment(pasid(1), Stages::First, false),
        iova: Iova(page * PAGE_SIZE),
        pages: 1,
    };
    for odd in [false, true] {
        let before = machine.unit.executed().len();
        for page in 0..2 * ENTRIES as u64 {
            machine.invalidate(&[one(page)]);
        }
        let told: Vec<_> = machine
            .unit
            .executed()
            .split_off(before)
            .into_iter()
            .filter(|words| words[0] & 0xF == 6)
            .collect();
        let all: Vec<_> =
            (0..2 * ENTRIES as u64).map(|page| [0x1_0010_0036, page * PAGE_SIZE, 0, 0]).collect();
        assert_eq!(told, all, "odd: {odd}");
        // A wait alone.
        machine.invalidate(&[]);
    }
    machine.assert_lawful();
}

#[test]
fn pages_by_themselves_leave_room_for_answers_and_nothing_when_they_are_refused() {
    let mut machine = HARDWARE.machine(Config::full());
    let at = attachment(pasid(1), Stages::First, false);
    let one = Invalidation::Pages { attachment: at, iova: Iova(0x7000), pages: 1 };
    // Wherever in the ring it begins.
    for round in 0..ENTRIES / 2 {
        machine.unit.pause(0);
        let before = machine.unit.executed().len();

        let submitted: Vec<_> = (0..ENTRIES).map(|_| machine.vtd.commands.submit(&[one])).collect();

        let tickets: Vec<_> = submitted.iter().copied().flatten().collect();
        assert_eq!(tickets.len(), (USABLE - ANSWERS) / 2, "round {round}");
        let refused = Error::QueueFull { needed: 2, free: (USABLE - ANSWERS) % 2 };
        assert!(submitted[tickets.len()..].iter().all(|&result| result == Err(refused)));
        assert!(tickets.iter().all(|&ticket| machine.vtd.commands.poll(ticket) == Completion::Pending));
        machine.unit.resume();
        machine.invalidate(&[]);
        assert!(tickets.iter().all(|&ticket| machine.vtd.commands.poll(ticket) == Completion::Done));
        assert_eq!(machine.unit.executed().len() - before, 2 * tickets.len() + 1, "and nothing else");
    }
    machine.assert_lawful();
}

#[test]
fn a_page_by_itself_is_told_behind_a_device_that_is_still_asked() {
    let mut machine = hosted::Hardware::Prompt.machine(Config::full());
    machine.unit.plug(StreamId(0x0300));
    machine.unit.pause(0);
    let asking = Invalidation::Pages {
        attachment: attachment(pasid(1), Stages::First, true),
        iova: Iova(0x7000),
        pages: 1,
    };
    let alone = Invalidation::Pages {
        attachment: attachment(pasid(1), Stages::First, false),
        iova: Iova(0x9000),
        pages: 1,
    };
    let first = machine.vtd.commands.submit(&[asking]).expect("there is room");
    let second = machine.vtd.commands.submit(&[alone]).expect("there is room");

    assert!(matches!(machine.vtd.commands.submit(&[asking]), Err(Error::Busy { .. })));
    assert_eq!([first, second].map(|ticket| machine.vtd.commands.poll(ticket)), [Completion::Pending; 2]);
    machine.unit.resume();
    machine.invalidate(&[]);

    assert_eq!([first, second].map(|ticket| machine.vtd.commands.poll(ticket)), [Completion::Done; 2]);
    machine.assert_lawful();
}

#[test]
fn the_physical_function_is_named_only_to_a_unit_that_asks_for_it() {
    let tagged = attachment(pasid(1), Stages::First, true);
    let pages = Invalidation::Pages { attachment: tagged, iova: Iova(0x7000), pages: 1 };

    // ECAP.DIT is bit 41: the modelled QEMU has none, and the field is reserved there.
    assert_eq!(encoded(Config::qemu(), pages)[1], [8 | 0x300 << 16 | 1 << 32, 0x7000, 0, 0]);
    assert_eq!(encoded(Config::full(), pages)[1], [8 | 0x300 << 16 | 1 << 32 | PFSID, 0x7000, 0, 0]);
}

#[test]
fn pages_of_a_second_stage_are_invalidated_in_their_domain() {
    // Row 27 without IH, DID 0x10: 2 | 3<<4 | DW 1<<6 | DR 1<<7 | 0x10<<16; AM 4.
    let second = attachment(pasid(1), Stages::Second, false);
    let pages = Invalidation::Pages { attachment: second, iova: Iova(0x1234_0000), pages: 16 };

    assert_eq!(encoded(Config::full(), pages), [[0x0010_00F2, 0x1234_0004, 0, 0]]);
    // CAP.PSI is bit 39: without it the whole domain (row 26).
    let without = Config { cap: Config::full().cap & !(1 << 39), ..Config::full() };
    assert_eq!(encoded(without, pages), [[0x0010_00E2, 0, 0, 0]]);
    // CAP.DWD and DRD are bits 54 and 55: no draining where there is none.
    let undrained = Config { cap: Config::full().cap & !(3 << 54), ..Config::full() };
    assert_eq!(encoded(undrained, pages), [[0x0010_0032, 0x1234_0004, 0, 0]]);
}

/// Of a nested attachment: what its guest did to the first stage, and what the hypervisor did to the second.
#[test]
fn the_stages_of_a_nested_attachment_are_forgotten_each_in_its_own_way() {
    let config = Config::full().with_nesting();
    let words = |invalidation| encoded(config, invalidation);
    let at = attachment(pasid(1), Stages::Nested, true);
    let second = Some((Iova(0x1234_0000), 16));
    let first_stage = |pages| Invalidation::FirstStage { attachment: at, asid: None, pages };
    let device_tlb = |pages| Invalidation::DeviceTlb { attachment: at, pasid: pasid(1), pages };
    // Rows 37 and 38 in domain 0x10, row 43, row 26, row 40.
    let all_of_pasid = [0x1_0010_0026, 0, 0, 0];
    let device = [8 | 0x300 << 16 | 1 << 32 | PFSID, 0x7FFF_FFFF_FFFF_F800, 0, 0];

    assert_eq!(words(first_stage(None)), [all_of_pasid]);
    assert_eq!(words(first_stage(second)), [[0x1_0010_0036, 0x1234_0004, 0, 0]]);
    assert_eq!(words(first_stage(Some((Iova(0x1000), 255)))), [all_of_pasid], "too many pieces");
    assert_eq!(words(device_tlb(None)), [device]);
    // 16 pages: three ones from bit 12 on, and S.
    assert_eq!(words(device_tlb(second)), [[device[0], 0x1234_7000 | 1 << 11, 0, 0]]);
    assert_eq!(words(device_tlb(Some((Iova(0x1000), 255)))), [device]);
    // Pages of the second stage; then all that the first made of them, in the unit and in the device.
    let pages = Invalidation::Pages { attachment: at, iova: Iova(0x1234_0000), pages: 16 };
    assert_eq!(words(pages), [[0x0010_00F2, 0x1234_0004, 0, 0], all_of_pasid, device]);
    assert_eq!(
        words(Invalidation::Attachment(at)),
        [[0x1_0010_0017, 0, 0, 0], [0x0010_00E2, 0, 0, 0], all_of_pasid, device]
    );
    // What has no tables is cached by its PASID.
    let bypass = attachment(pasid(1), Stages::None, false);
    assert_eq!(words(Invalidation::Attachment(bypass)), [[0x1_0010_0017, 0, 0, 0], all_of_pasid]);
}

#[test]
fn what_no_unit_can_forget_is_refused_by_name_and_nothing_of_it_queued() {
    let mut machine = HARDWARE.machine(Config::full());
    let executed = machine.unit.executed().len();
    let nested = attachment(pasid(1), Stages::Nested, true);
    let plain = attachment(pasid(1), Stages::First, false);
    for (invalidation, name) in [
        (Invalidation::Contexts { attachment: nested, pasid: None }, "context descriptors"),
        (Invalidation::FirstStage { attachment: nested, asid: Some(3), pages: None }, "by number"),
        (Invalidation::FirstStage { attachment: plain, asid: None, pages: None }, "guest's own"),
        (Invalidation::DeviceTlb { attachment: plain, pasid: pasid(1), pages: None }, "device TLB"),
        (Invalidation::DeviceTlb { attachment: nested, pasid: pasid(2), pages: None }, "another attachment"),
        (Invalidation::DeviceTlb { attachment: nested, pasid: None, pages: None }, "another attachment"),
    ] {
        let refused = machine.vtd.commands.submit(&[Invalidation::All, invalidation]);

        assert!(
            matches!(refused, Err(Error::Unsupported { feature }) if feature.contains(name)),
            "{refused:?}"
        );
    }
    assert_eq!(machine.unit.executed().len(), executed);
}

/// In legacy mode there are no PASIDs, and entries have 16 bytes.
#[test]
fn legacy_mode_is_invalidated_by_domain() {
    let at = attachment(None, Stages::Second, true);
    let mut machine = HARDWARE.legacy(Config::full());
    // Counts what was executed.
    machine.unit.resume();
    machine.unit.plug(StreamId(0x0300));
    let mut words = |invalidation| {
        let before = machine.unit.executed().len();
        machine.invalidate(&[invalidation]);
        let mut words = machine.unit.executed().split_off(before);
        let wait = words.pop().expect("a wait");
        assert_eq!(wait[0] & 0xFFFF_FFFF, 0x65);
        without_fences(words, wait[1])
    };

    // Row 28 with its own PFSID; row 23 with DID 0x10; rows 26 and 27; rows 21 and 25.
    let device = [3 | 0x300 << 32 | PFSID, 0x7FFF_FFFF_FFFF_F001, 0, 0];
    let domain = [0x0010_00E2, 0, 0, 0];
    assert_eq!(words(Invalidation::Attachment(at)), [[0x0300_0010_0031, 0, 0, 0], domain, device]);
    let pages = Invalidation::Pages { attachment: at, iova: Iova(0x1234_0000), pages: 16 };
    let device_pages = [3 | 0x300 << 32 | PFSID, 0x1234_7001, 0, 0];
    assert_eq!(words(pages), [[0x0010_00F2, 0x1234_0004, 0, 0], device_pages]);
    let all = [[0x11, 0, 0, 0], [0xD2, 0, 0, 0]];
    assert_eq!(words(Invalidation::All), all);
    let gone = Invalidation::Device { stream: StreamId(0x0300), device_tlb: true };
    assert_eq!(words(gone), [all[0], all[1], device], "nobody says which domain");
    assert_eq!(machine.unit.read64(IQT) % 32, 16, "an odd number of entries");
    machine.assert_lawful();
}

#[test]
fn a_virtual_function_is_invalidated_under_its_physical_one_and_not_faster_than_it_takes() {
    for config in [Config::full(), Config::qemu()] {
        let mut machine = HARDWARE.machine(config);
        // Counts what was executed.
        machine.unit.resume();
        let (virt, physical) = (StreamId(0x0108), StreamId(0x0100));
        machine.unit.plug_virtual(virt, physical);
        assert_eq!(machine.vtd.commands.describe(virt, physical, 8), Ok(()));
        let at = Attachment { stream: virt, ..attachment(pasid(5), Stages::First, true) };
        let before = machine.unit.executed().len();

        machine.invalidate(&[Invalidation::DeviceTlb {
            attachment: at,
            pasid: pasid(5),
            pages: Some((Iova(0xFFFF_8000_0000_1000), 1)),
        }]);

        // Row 42: PFSID 0x0100, MIP 8. A unit without ECAP.DIT (41) is told neither.
        let told = if config.ecap >> 41 & 1 != 0 { 0x0100_0000_0000_0080 } else { 0 };
        let expected = [0x0000_0005_0108_0008 | told, 0xFFFF_8000_0000_1000, 0, 0];
        assert_eq!(machine.unit.executed()[before], expected);
        machine.assert_lawful();
    }
}

#[test]
fn notes_about_devices_are_replaced_and_their_number_is_limited() {
    let mut machine = HARDWARE.machine(Config::full());
    for _ in 0..3 {
        for n in 0..16 {
            assert_eq!(machine.vtd.commands.describe(StreamId(n), StreamId(0), 1), Ok(()));
        }
        let one_more = machine.vtd.commands.describe(StreamId(16), StreamId(0), 1);
        assert!(matches!(one_more, Err(Error::Exhausted { .. })), "{one_more:?}");
    }
}

#[test]
fn a_range_of_many_pieces_forgets_the_whole_pasid() {
    let tagged = attachment(pasid(1), Stages::First, true);
    // From the second page, 255 pages: eight blocks.
    let pages = Invalidation::Pages { attachment: tagged, iova: Iova(0x1000), pages: 255 };

    let words = encoded(Config::full(), pages);

    // Row 37 and row 43 for PASID 1: everything, S and all ones.
    let all = [8 | 0x300 << 16 | 1 << 32 | PFSID, 0x7FFF_FFFF_FFFF_F800, 0, 0];
    assert_eq!(words, [[0x1_0010_0026, 0, 0, 0], all]);
}

#[test]
fn no_block_is_larger_than_the_unit_says() {
    // CAP.MAMV is 53:48. With 1: blocks of two pages.
    let small = Config { cap: Config::full().cap & !(0x3F << 48) | 1 << 48, ..Config::full() };
    let tagged = attachment(pasid(1), Stages::First, false);
    let pages = |pages| Invalidation::Pages { attachment: tagged, iova: Iova(0x8000), pages };

    let block = |iova: u64, am| [0x1_0010_0036, iova | am, 0, 0];
    assert_eq!(encoded(small, pages(4)), [block(0x8000, 1), block(0xA000, 1)]);
    assert_eq!(encoded(small, pages(512)), [[0x1_0010_0026, 0, 0, 0]], "256 blocks are too many");
}

#[test]
fn the_pages_of_a_range_are_forgotten_and_no_others() {
    let mut machine = HARDWARE.machine(Config::full());
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.assign(DISK, ALL);
    let attachment = machine.attach(DISK, pasid(5), &tree);
    const START: u64 = 0x4000_0000;
    for page in 0..32 {
        machine.map(&tree, Iova(START + page * PAGE_SIZE), page);
    }
    let mut random = Random::new(3);
    for _ in 0..200 {
        let (first, pages) = (random.below(32), 1 + random.below(8));
        for page in 0..32 {
            assert!(machine.ats_read(DISK, pasid(5), Iova(START + page * PAGE_SIZE)).is_ok());
        }

        machine.invalidate(&[Invalidation::Pages {
            attachment,
            iova: Iova(START + first * PAGE_SIZE),
            pages,
        }]);

        let known = machine.unit.device_tlb(DISK);
        let known = |page| known.iter().any(|entry| entry.iova.0 == START + page * PAGE_SIZE);
        for page in 0..32 {
            let inside = (first..first + pages).contains(&page);
            assert_eq!(known(page), !inside, "page {page} of {pages} from {first}");
        }
    }
}

#[test]
fn an_invalidation_of_everything_at_bring_up_and_of_an_attachment_is_complete() {
    let at = attachment(pasid(0xA_BCDE), Stages::First, true);
    // PASID cache as row 40 with DID 0x10, then P-IOTLB as row 37, then the device's as row 43: in this order.
    assert_eq!(
        encoded(Config::full(), Invalidation::Attachment(at)),
        [
            [0x000A_BCDE_0010_0017, 0, 0, 0],
            [0x000A_BCDE_0010_0026, 0, 0, 0],
            [8 | 0x300 << 16 | 0xA_BCDE << 32 | PFSID, 0x7FFF_FFFF_FFFF_F800, 0, 0]
        ]
    );
    let at = attachment(None, Stages::Second, true);
    // PASID 0 (RID_PASID); second stage: the domain (row 26); type 3, everything (row 28).
    assert_eq!(
        encoded(Config::full(), Invalidation::Attachment(at)),
        [
            [0x0010_0017, 0, 0, 0],
            [0x0010_00E2, 0, 0, 0],
            [3 | 0x300 << 32 | PFSID, 0x7FFF_FFFF_FFFF_F001, 0, 0]
        ]
    );
    let device = |device_tlb| Invalidation::Device { stream: StreamId(0x0300), device_tlb };
    let context = [0x0000_0300_0000_0031, 0, 0, 0];
    assert_eq!(encoded(Config::full(), device(false)), [context]);
    assert_eq!(encoded(Config::full(), device(true))[0], context);
    assert_eq!(encoded(Config::full(), device(true)).len(), 2);
}

#[test]
fn a_batch_is_one_doorbell_and_one_wait() {
    // Compares descriptors in the order in which they were queued.
    let (unit, memory) = hosted::Hardware::Prompt.unit(Config::full());
    let parts = needs(&memory);
    let rung = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&rung);
    let bus = Tapped::new(unit, move |_, moment| {
        if matches!(moment, Moment::Written { offset: IQT, .. }) {
            count.fetch_add(1, SeqCst);
        }
    });
    let mut machine = HARDWARE.enable(unit, memory, bus, parts).expect("it comes into service");
    let (doorbells, executed) = (rung.load(SeqCst), unit.executed().len());
    let at = attachment(pasid(5), Stages::First, false);

    machine.invalidate(&[Invalidation::Attachment(at), Invalidation::PageRequestDrain, Invalidation::All]);

    assert_eq!(rung.load(SeqCst) - doorbells, 1);
    let words = unit.executed().split_off(executed);
    // Types (3:0): contexts, PASID cache twice, P-IOTLB and IOTLB, with fences between them, and one wait with SW, FN, PD
    // (row 36).
    assert_eq!(words.iter().map(|w| w[0] & 0xF).collect::<Vec<_>>(), [1, 5, 7, 7, 5, 6, 2, 5]);
    assert_eq!(words[7][0] & 0xFFFF_FFFF, 0xE5);
    machine.assert_lawful();
}

/// The unit may execute what lies between two fences in any order, and devices go on asking meanwhile: what is forgotten must
/// not come back from a cache that is still to be emptied.
#[test]
fn what_devices_ask_for_meanwhile_does_not_bring_back_what_is_being_forgotten() {
    for reorders in [false, true] {
        for detaches in [false, true] {
            let mut machine = HARDWARE.machine(Config { reorders, ..Config::full() });
            let tree = machine.tree(VtdFirstStage::<4>);
            machine.assign(DISK, ALL);
            let attachment = machine.attach(DISK, pasid(5), &tree);
            machine.map(&tree, Iova(0x1000), 7);
            assert_eq!(machine.ats_read(DISK, pasid(5), Iova(0x1000)), Ok(7));
            machine.unit.pause(0);
            machine.unmap(&tree, Iova(0x1000));
            let pages = Invalidation::Pages { attachment, iova: Iova(0x1000), pages: 1 };
            let (leaving, invalidations) = if detaches {
                let (leaving, needed) = machine.vtd.tables.detach(attachment).expect("it is attached");
                (Some(leaving), needed.to_vec())
            } else {
                (None, vec![pages])
            };

            let ticket = machine.vtd.commands.submit(&invalidations).expect("there is room");
            let mut steps = 0;
            while machine.unit.execute(1) > 0 {
                let _ = machine.ats_read(DISK, pasid(5), Iova(0x1000));
                steps += 1;
            }

            assert_eq!(machine.vtd.commands.poll(ticket), Completion::Done);
            // The unit's caches, a fence, the device's, the wait; and one cache and fence more for a detachment.
            assert_eq!(steps, if leaving.is_some() { 6 } else { 4 });
            assert!(machine.ats_read(DISK, pasid(5), Iova(0x1000)).is_err(), "{reorders} {detaches}");
            assert_eq!(machine.unit.device_tlb(DISK), []);
            leaving.into_iter().for_each(|leaving| machine.vtd.tables.finish(leaving));
            machine.assert_lawful();
        }
    }
}

#[test]
fn a_batch_that_does_not_fit_is_refused_whole() {
    let mut machine = HARDWARE.machine(Config::full());
    let at = attachment(pasid(1), Stages::First, true);
    let executed = machine.unit.executed().len();

    // Ten attachments are 30 descriptors, two fences and a wait; a batch has 32.
    let refused = machine.vtd.commands.submit(&[Invalidation::Attachment(at); 10]);

    assert!(matches!(refused, Err(Error::Exhausted { .. })), "{refused:?}");
    assert_eq!(machine.unit.executed().len(), executed, "nothing of it was queued");
    machine.invalidate(&[]);
}

/// A response to group `index` of the disk's PASID 5.
fn answer(index: u16) -> PageResponse {
    PageResponse { stream: DISK, tag: GroupTag { pasid: pasid(5), index }, outcome: Outcome::Success }
}

/// A machine whose disk may send page requests of PASID 5.
fn with_page_requests() -> Machine {
    let mut machine = HARDWARE.machine(Config::full());
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.assign(DISK, ALL);
    machine.attach(DISK, pasid(5), &tree);
    machine
}

fn ask(machine: &Machine, index: u16) {
    let tag = GroupTag { pasid: pasid(5), index };
    let request = PageRequest { stream: DISK, tag, iova: Iova(0x1000), perms: Perms::READ, last: true };
    assert_eq!(machine.unit.page_request(request), models::vtd::Requested::Queued);
}

#[test]
fn a_full_queue_refuses_invalidations_and_still_takes_every_answer() {
    let mut machine = with_page_requests();
    for index in 0..ANSWERS as u16 {
        ask(&machine, index);
    }
    assert_eq!(machine.pass().len(), ANSWERS);
    machine.unit.pause(0);

    // Each is two descriptors; as many fit as leave the reserve.
    let device = Invalidation::Device { stream: NIC, device_tlb: false };
    let submitted: Vec<_> = (0..ENTRIES).map(|_| machine.vtd.commands.submit(&[device])).collect();
    let tickets: Vec<_> = submitted.iter().copied().flatten().collect();
    assert_eq!(tickets.len(), (USABLE - ANSWERS) / 2);
    let refused = Error::QueueFull { needed: 2, free: (USABLE - ANSWERS) % 2 };
    assert!(submitted[tickets.len()..].iter().all(|&result| result == Err(refused)));
    for index in 0..ANSWERS as u16 {
        assert_eq!(machine.vtd.commands.respond(answer(index)), Ok(()));
    }
    // More than was promised: it goes as long as there is room, and then the answer comes back.
    assert_eq!(machine.vtd.commands.respond(answer(0)), Ok(()));
    let full = Error::QueueFull { needed: 1, free: 0 };
    assert_eq!(machine.vtd.commands.respond(answer(1)), Err((answer(1), full)));
    assert!(tickets.iter().all(|&ticket| machine.vtd.commands.poll(ticket) == Completion::Pending));

    // The one answer too many has no group, which the unit notes; so it stays out of the check.
    machine.unit.execute(USABLE - 1);
    assert!(tickets.iter().all(|&ticket| machine.vtd.commands.poll(ticket) == Completion::Done));
    assert_eq!(machine.unit.answers().len(), ANSWERS);
    machine.assert_lawful();
}

#[test]
fn a_queue_that_was_full_goes_on_where_it_stopped() {
    let mut machine = HARDWARE.machine(Config::full());
    for round in 0..5 {
        machine.unit.pause(0);
        assert!((0..ENTRIES).any(|_| machine.vtd.commands.submit(&[]).is_err()));
        // One entry is given back: exactly one more goes in.
        assert_eq!(machine.unit.execute(1), 1);
        assert!(machine.vtd.commands.submit(&[]).is_ok(), "round {round}");
        assert!(machine.vtd.commands.submit(&[]).is_err(), "round {round}");
        machine.unit.resume();
    }
    machine.invalidate(&[Invalidation::All]);
    machine.assert_lawful();
}

#[test]
fn a_ticket_is_done_exactly_when_its_wait_is_however_slow_the_unit() {
    let mut machine = HARDWARE.machine(Config::full());
    machine.unit.plug(DISK);
    let mut random = Random::new(11);
    let mut tickets: Vec<Ticket> = Vec::new();
    machine.unit.pause(0);
    let (mut full, mut submitted) = (0, 0);
    for _ in 0..6_000 {
        if random.below(2) == 0 {
            let what = Invalidation::Device { stream: DISK, device_tlb: false };
            let count = random.below(4) as usize;
            match machine.vtd.commands.submit(&[what; 3][..count]) {
                Ok(ticket) => {
                    assert!(tickets.iter().all(|&earlier| earlier < ticket), "tickets count up");
                    tickets.push(ticket);
                    submitted += 1;
                }
                Err(Error::QueueFull { .. }) => full += 1,
                Err(error) => panic!("{error}"),
            }
        } else {
            machine.unit.execute(random.below(6) as usize);
        }
        // The waits that the unit executed, after the first one of bring-up.
        let is_wait = |words: &&[u64; 4]| words[0] & 0xF == 5 && words[0] != FENCE;
        let waits = machine.unit.executed().iter().filter(is_wait).count() - 1;
        for (n, &ticket) in tickets.iter().enumerate().skip(waits.saturating_sub(2)).take(5) {
            let expected = if n < waits { Completion::Done } else { Completion::Pending };
            assert_eq!(machine.vtd.commands.poll(ticket), expected, "{ticket:?} after {waits} waits");
        }
    }
    // The queue has 128 entries: it was filled, and gone around, many times.
    assert!(submitted > 1_000 && full > 50, "{submitted} {full}");
    machine.unit.resume();
    assert!(tickets.into_iter().all(|ticket| machine.vtd.commands.poll(ticket) == Completion::Done));
    machine.assert_lawful();
}

#[test]
fn fetched_is_not_done() {
    let mut machine = HARDWARE.machine(Config::full());
    machine.unit.pause(usize::MAX);

    let ticket = machine.vtd.commands.submit(&[Invalidation::All]).expect("there is room");
    assert_eq!(machine.unit.read64(0x80), machine.unit.read64(IQT), "IQH has passed all of it");
    assert_eq!(machine.vtd.commands.poll(ticket), Completion::Pending);

    machine.unit.resume();
    assert_eq!(machine.vtd.commands.poll(ticket), Completion::Done);
}

#[test]
fn a_ticket_is_done_however_long_ago() {
    let mut machine = HARDWARE.machine(Config::qemu());
    let first = machine.vtd.commands.submit(&[]).expect("there is room");
    for _ in 0..5_000 {
        machine.invalidate(&[]);
    }

    assert_eq!(machine.vtd.commands.poll(first), Completion::Done);
    machine.assert_lawful();
}

#[test]
fn a_status_that_the_unit_never_promised_is_not_done() {
    for garbage in [0xFFFF_FFFF, 0x8000_0000, 3, 0xBAD0_BAD1] {
        let mut machine = HARDWARE.machine(Config::qemu());
        machine.unit.pause(0);
        let pending = machine.vtd.commands.submit(&[]).expect("there is room");
        // Where the first wait wrote: word 1 of the last descriptor of bring-up.
        let status = machine.unit.executed().last().map(|words| words[1]).expect("a wait");

        // Two are submitted, and the status says a third.
        machine.memory.device_store(PhysAddr(status), garbage).expect("inside");

        assert_eq!(machine.vtd.commands.poll(pending), Completion::Pending, "{garbage:#x}");
        machine.unit.resume();
        assert_eq!(machine.vtd.commands.poll(pending), Completion::Done);
    }
}

#[test]
fn a_drain_brings_in_the_page_requests_that_were_on_their_way() {
    let mut machine = with_page_requests();
    machine.unit.hold_page_requests();
    let tag = GroupTag { pasid: pasid(5), index: 1 };
    let request = PageRequest { stream: DISK, tag, iova: Iova(0x1000), perms: Perms::READ, last: true };
    machine.unit.page_request(request);

    machine.invalidate(&[Invalidation::Device { stream: NIC, device_tlb: false }]);
    assert_eq!(machine.pass(), [], "no drain was asked for");
    machine.invalidate(&[Invalidation::PageRequestDrain]);

    assert_eq!(machine.pass(), [Event::PageRequest(request)]);
    machine.assert_lawful();
}

#[test]
fn an_answer_ends_the_group_that_it_names_and_no_other() {
    let mut machine = with_page_requests();
    let tree = machine.tree(VtdFirstStage::<4>);
    machine.attach(DISK, pasid(6), &tree);
    machine.attach(DISK, None, &tree);
    machine.assign(NIC, ALL);
    machine.attach(NIC, pasid(5), &tree);
    // The same number for different devices and PASIDs; the largest number; no PASID.
    let groups = [
        (DISK, pasid(5), 1, Outcome::Success),
        (DISK, pasid(6), 1, Outcome::Invalid),
        (NIC, pasid(5), 1, Outcome::Failure),
        (DISK, None, 1, Outcome::Success),
        (DISK, pasid(5), 0x1FF, Outcome::Invalid),
    ];
    for (stream, pasid, index, _) in groups {
        let tag = GroupTag { pasid, index };
        machine.unit.page_request(PageRequest {
            stream,
            tag,
            iova: Iova(0x1000),
            perms: Perms::READ,
            last: true,
        });
    }
    assert_eq!(machine.pass().len(), 5);

    for (stream, pasid, index, outcome) in groups {
        let response = PageResponse { stream, tag: GroupTag { pasid, index }, outcome };
        assert_eq!(machine.vtd.commands.respond(response), Ok(()));

        let last = machine.unit.answers().pop().map(|a| (a.stream, a.tag.pasid, a.tag.index, a.outcome));
        assert_eq!(last, Some((stream, pasid, index, outcome)));
    }
    assert_eq!(machine.unit.waiting_groups(), []);
    machine.assert_lawful();
}

#[test]
fn answers_that_are_queued_together_reach_the_unit_when_the_doorbell_rings() {
    const TOGETHER: usize = 5;
    let mut machine = with_page_requests();
    // So often that the queue wraps, between two answers of one doorbell as well.
    for round in 0..ENTRIES {
        (0..TOGETHER as u16).for_each(|index| ask(&machine, index));
        assert_eq!(machine.pass().len(), TOGETHER);
        for index in 0..TOGETHER as u16 {
            assert_eq!(machine.vtd.commands.queue_response(answer(index)), Ok(()));
        }
        assert_eq!(machine.unit.answers().len(), round * TOGETHER, "the unit was not told yet");

        machine.vtd.commands.ring();

        assert_eq!(machine.unit.answers().len(), (round + 1) * TOGETHER);
        assert_eq!(machine.unit.waiting_groups(), []);
    }
    machine.invalidate(&[]);
    machine.assert_lawful();
}

/// A bus on which the unit lies about its registers from some moment on.
#[derive(Clone)]
struct Lying {
    unit: &'static VtdUnit,
    lie: Arc<Mutex<Option<u64>>>,
}

impl Lying {
    fn lie(&self) -> Option<u64> {
        *self.lie.lock().expect("no test panics here")
    }
}

impl Bus for Lying {
    fn read32(&self, offset: usize) -> u32 {
        self.lie().map_or_else(|| self.unit.read32(offset), |lie| lie as u32)
    }
    fn write32(&self, offset: usize, value: u32) {
        self.unit.write32(offset, value);
    }
    fn read64(&self, offset: usize) -> u64 {
        self.lie().unwrap_or_else(|| self.unit.read64(offset))
    }
    fn write64(&self, offset: usize, value: u64) {
        self.unit.write64(offset, value);
    }
    fn publish(&self, range: Range<PhysAddr>) {
        self.unit.publish(range);
    }
    fn observe(&self, range: Range<PhysAddr>) {
        self.unit.observe(range);
    }
    fn now_us(&self) -> u64 {
        self.unit.now_us()
    }
}

#[test]
fn no_register_value_makes_the_driver_panic_or_run_for_ever() {
    // All ones (the unit fell off the bus), a head and a tail outside the queue, off their grid, noise.
    let mut random = Random::new(5);
    let noise: Vec<u64> = (0..40).map(|_| random.number()).collect();
    for lie in [u64::MAX, 0, 0x7_FFE0, 0x7_FFF0, 0x1010, 1 << 63].into_iter().chain(noise) {
        let (unit, memory) = HARDWARE.unit(Config::full());
        let parts = needs(&memory);
        let bus = Lying { unit, lie: Default::default() };
        let mut machine = HARDWARE.enable(unit, memory, bus.clone(), parts).expect("it comes into service");

        *bus.lie.lock().expect("no test panics here") = Some(lie);

        for _ in 0..ENTRIES * 2 {
            let _ = machine.vtd.commands.submit(&[Invalidation::All]);
            let _ = machine.vtd.commands.respond(answer(1));
        }
        machine.vtd.events.acknowledge();
        for _ in 0..1000 {
            let _ = machine.vtd.events.next_event();
        }
        // Each error is dealt with once, and soon there are no more, or no more use in it.
        assert!((0..100).any(|_| machine.vtd.commands.recover().is_none()), "{lie:#x}");
    }
}
