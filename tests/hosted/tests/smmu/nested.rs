//! First stages that a guest owns, behind a second stage of the hypervisor's: against the modelled SMMUv3.

use crate::{HARDWARE, STREAM_TABLE};
use hosted::{
    Random, grant, root,
    smmu::{Machine, Stage, StageTree, stream_word},
};
use iommu::{
    Attachment, Bus, Error, Event, Events, Features, FirstStage, Gpa, Invalidation, Iova, PAGE_SIZE, Pasid,
    Perms, PhysAddr, Stages, StreamId, Translation,
};
use models::smmuv3::{Config, Refusal};
use smmuv3::guest::{GuestCommand, MAY_SET};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
const PLAIN: Features = Features { device_tlb: false, page_requests: false, pasid: false };
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: true };
const HERE: Iova = Iova(0x4000_0000);
/// Where a guest's memory begins, of its own addresses, and how many pages it has.
const RAM: u64 = 0x10_0000;
const PAGES: u64 = 32;
/// Where the device sees the context descriptor that the driver makes for a guest.
pub(crate) const CONTEXT: Gpa = Gpa(0x80_0000);

const C_BAD_STE: Refusal = Refusal::Fault(0x04);
const C_BAD_CD: Refusal = Refusal::Fault(0x0A);
const F_TRANSLATION: Refusal = Refusal::Fault(0x10);
const F_PERMISSION: Refusal = Refusal::Fault(0x13);

/// A guest: its memory, and the second stage that leads there.
pub(crate) struct Guest {
    ram: PhysAddr,
    pub(crate) second: StageTree,
    /// Pages of its memory that are in use.
    used: u64,
}

impl Guest {
    pub(crate) fn new<B: Bus + Clone>(machine: &mut Machine<B>) -> Self {
        let memory = machine.memory.take(512 * PAGES as usize, 512);
        let second = machine.tree(Stage::Two);
        let pages = grant(memory.phys().0, PAGES);
        second.map(&mut machine.frames, RAM, &pages, Perms::READ_WRITE).expect("nothing is mapped there");
        let guest = Self { ram: memory.phys(), second, used: 0 };
        (0..PAGES * 512).for_each(|word| guest.store(machine, RAM + word * 8, 0));
        guest
    }

    pub(crate) fn root(&self) -> iommu::Root {
        root(self.second.root().0, self.second.levels())
    }

    pub(crate) fn store<B: Bus + Clone>(&self, machine: &Machine<B>, at: u64, word: u64) {
        machine.memory.device_store(PhysAddr(self.ram.0 + at - RAM), word).expect("inside");
    }

    fn load<B: Bus + Clone>(&self, machine: &Machine<B>, at: u64) -> u64 {
        machine.memory.device_load(PhysAddr(self.ram.0 + at - RAM)).expect("inside")
    }

    /// A page of its own.
    pub(crate) fn page(&mut self) -> u64 {
        self.used += 1;
        assert!(self.used <= PAGES, "the guest's memory is used up");
        RAM + (self.used - 1) * PAGE_SIZE
    }

    /// Maps the page at `to` in stage-1 tables of its own below `top`. Returns where the leaf is.
    pub(crate) fn map<B: Bus + Clone>(&mut self, machine: &Machine<B>, top: u64, iova: Iova, to: u64) -> u64 {
        let mut table = top;
        for shift in [39, 30, 21] {
            let at = table + (iova.0 >> shift & 0x1FF) * 8;
            if self.load(machine, at) == 0 {
                let next = self.page();
                self.store(machine, at, next | 3);
            }
            table = self.load(machine, at) & 0x0000_FFFF_FFFF_F000;
        }
        let leaf = table + (iova.0 >> 12 & 0x1FF) * 8;
        // D1 of the fact sheet: a page, unprivileged, read and write, of one ASID.
        self.store(machine, leaf, to | 0xF47);
        leaf
    }

    /// Tables in which `content` is at [`HERE`]; returns the top one, and the leaf.
    pub(crate) fn tables<B: Bus + Clone>(&mut self, machine: &Machine<B>, content: u64) -> (u64, u64) {
        let (top, page) = (self.page(), self.page());
        self.store(machine, page, content);
        let leaf = self.map(machine, top, HERE, page);
        (top, leaf)
    }

    /// C1 of the fact sheet with 44 bits (IPS 4): `asid`, and tables at `top`.
    pub(crate) fn context<B: Bus + Clone>(&self, machine: &Machine<B>, at: u64, asid: u64, top: u64) {
        let words = [0x0000_E204_C000_3510 | asid << 48, top, 0, 0xF404_FF44];
        words.iter().enumerate().for_each(|(n, &word)| self.store(machine, at + n as u64 * 8, word));
    }

    /// Names a linear table of 2^`log2` context descriptors at `at`, as the guest's own entry would: Config 5<<1, V;
    /// S1CIR 1<<2, S1COR 1<<4, S1CSH 3<<6, S1DSS 2, S1STALLD 1<<27.
    pub(crate) fn contexts(&self, at: u64, log2: u64) -> Translation {
        let default = if log2 == 0 { 0 } else { 2 };
        self.entry([at | 0xB | log2 << 59, 0x0800_00D4 | default, 0, 0, 0, 0, 0, 0])
    }

    pub(crate) fn entry(&self, entry: [u64; 8]) -> Translation {
        Translation::Nested { first: FirstStage::Contexts { entry }, second: self.root() }
    }

    pub(crate) fn pages(&self, top: u64) -> Translation {
        Translation::Nested { first: FirstStage::Pages { root: Gpa(top), levels: 4 }, second: self.root() }
    }

    /// Gives the device a place for the descriptor that the driver makes, and maps it for reading.
    pub(crate) fn place<B: Bus + Clone>(&self, machine: &mut Machine<B>, stream: StreamId) -> PhysAddr {
        let frame = machine.smmu.tables.place_context(stream, CONTEXT).expect("there are frames");
        let pages = grant(frame.0, 1);
        self.second
            .map(&mut machine.frames, CONTEXT.0, &pages, Perms::READ)
            .expect("nothing is mapped there");
        frame
    }
}

fn pasid(value: u32) -> Option<Pasid> {
    Some(Pasid::new(value).expect("20 bits"))
}

fn attach(machine: &mut Machine, pasid: Option<Pasid>, translation: Translation) -> Attachment {
    machine.attach_to(DISK, pasid, translation).expect("it can be attached")
}

/// The one fault of a pass, and which tables refused.
fn fault(machine: &mut Machine) -> (u16, Stages) {
    let events = machine.pass();
    let [Event::Fault(fault)] = &events[..] else { panic!("{events:?}") };
    (fault.code & 0xFF, machine.smmu.events.refused_by(fault))
}

#[test]
fn a_guest_s_page_table_translates_behind_the_second_stage() {
    for pasid in [None, pasid(5), pasid(63)] {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
        let mut guest = Guest::new(&mut machine);
        let (top, leaf) = guest.tables(&machine, 0x1234);
        machine.assign(DISK, ALL);
        guest.place(&mut machine, DISK);
        let attachment = attach(&mut machine, pasid, guest.pages(top));
        assert_eq!(attachment.stages, Stages::Nested);

        assert_eq!(machine.read(DISK, pasid, HERE), Ok(0x1234));
        assert_eq!(machine.unit.ats_read(DISK, pasid, HERE, 2), Ok(vec![0x34, 0x12]));
        assert_eq!(machine.pass(), []);
        // Another PASID, or none, is attached to nothing.
        for other in [None, self::pasid(5), self::pasid(6), self::pasid(64)] {
            if other != pasid {
                assert!(machine.read(DISK, other, HERE).is_err(), "{other:?} of {pasid:?}");
            }
        }
        machine.pass();
        // A fault of the guest's tables is the guest's; one of the second stage is not.
        assert_eq!(machine.read(DISK, pasid, Iova(HERE.0 + PAGE_SIZE)), Err(F_TRANSLATION));
        assert_eq!(fault(&mut machine), (0x10, Stages::First));
        guest.map(&machine, top, Iova(HERE.0 + PAGE_SIZE), RAM + PAGES * PAGE_SIZE);
        assert_eq!(machine.read(DISK, pasid, Iova(HERE.0 + PAGE_SIZE)), Err(F_TRANSLATION));
        assert_eq!(fault(&mut machine), (0x10, Stages::Second));

        // What the guest unmaps is gone when it said so.
        guest.store(&machine, leaf, 0);
        assert_eq!(machine.read(DISK, pasid, HERE), Ok(0x1234), "the model remembers");
        machine.invalidate(&[Invalidation::FirstStage { attachment, asid: Some(0), pages: Some((HERE, 1)) }]);
        assert_eq!(machine.read(DISK, pasid, HERE), Err(F_TRANSLATION));
        machine.detach(attachment);
        assert_eq!(machine.read(DISK, pasid, HERE), Err(C_BAD_STE));
        assert_eq!(machine.unit.device_tlb(DISK), []);
        machine.assert_lawful();
    }
}

#[test]
fn a_guest_cannot_write_its_context_descriptor_or_read_an_address_of_the_hypervisor_s_there() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let mut guest = Guest::new(&mut machine);
    let (top, _) = guest.tables(&machine, 1);
    guest.map(&machine, top, HERE, CONTEXT.0);
    machine.assign(DISK, PLAIN);
    let frame = guest.place(&mut machine, DISK);
    attach(&mut machine, None, guest.pages(top));

    assert_eq!(machine.unit.dma_write(DISK, None, HERE, &[0; 8]), Err(F_PERMISSION));
    assert_eq!(fault(&mut machine), (0x13, Stages::Second));
    // What it can read: the first descriptor with the guest's own root, and nothing else.
    let words: Vec<_> = (0..512).map(|n| machine.read(DISK, None, Iova(HERE.0 + n * 8))).collect();
    assert_eq!(words[1], Ok(top));
    assert!(words[4..].iter().all(|word| *word == Ok(0)));
    let hypervisor_s = machine.memory.device_load(frame).expect("inside");
    assert_eq!(words[0], Ok(hypervisor_s));
    assert!(words.iter().all(|word| word.is_ok_and(|word| word & 0x0000_FFFF_FFFF_F000 != frame.0)));
    machine.assert_lawful();
}

#[test]
fn a_guest_s_context_descriptors_are_found_through_the_second_stage_and_remembered_until_it_says_so() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let mut guest = Guest::new(&mut machine);
    let (contexts, [(one, leaf), (other, _)]) =
        (guest.page(), [0x11, 0x22].map(|content| guest.tables(&machine, content)));
    guest.context(&machine, contexts, 3, one);
    guest.context(&machine, contexts + 5 * 64, 4, other);
    machine.assign(DISK, ALL);
    let attachment = attach(&mut machine, None, guest.contexts(contexts, 3));
    assert_eq!((machine.read(DISK, None, HERE), machine.read(DISK, pasid(5), HERE)), (Ok(0x11), Ok(0x22)));
    assert_eq!(machine.read(DISK, pasid(4), HERE), Err(C_BAD_CD));
    machine.pass();

    // The guest changes them, and says so by commands of its own: K6 and K7, K11 and K25 of the fact sheet for its stream 7.
    let say = |machine: &mut Machine, words: [u64; 2]| {
        let request = GuestCommand(words).request(true, true).expect("it is allowed");
        let invalidation = request.of(attachment).expect("there is something to forget");
        machine.invalidate(&[invalidation]);
    };
    guest.context(&machine, contexts + 5 * 64, 6, one);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(0x22), "the model remembers");
    say(&mut machine, [0x0000_0007_0000_5005, 1]);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(0x11));
    guest.context(&machine, contexts + 4 * 64, 7, other);
    assert_eq!(machine.read(DISK, pasid(4), HERE), Err(C_BAD_CD));
    say(&mut machine, [0x0000_0007_0000_0006, 0]);
    assert_eq!(machine.read(DISK, pasid(4), HERE), Ok(0x22));
    machine.pass();
    assert_eq!(machine.unit.ats_read(DISK, pasid(5), HERE, 1), Err(Refusal::Unsupported), "EATS is 0");
    guest.store(&machine, leaf, 0);
    say(&mut machine, [0x0003_0000_0000_0012, HERE.0 | 1]);
    assert_eq!(machine.read(DISK, None, HERE), Err(F_TRANSLATION));
    assert_eq!(machine.read(DISK, pasid(5), HERE), Ok(0x11), "another ASID");
    say(&mut machine, [0x30, 0]);
    assert_eq!(machine.read(DISK, pasid(5), HERE), Err(F_TRANSLATION));
    machine.assert_lawful();
}

#[test]
fn a_guest_for_whose_descriptor_no_frame_is_left_is_refused_and_stays_blocked() {
    let (unit, memory) = HARDWARE.smmu_unit(Config::full());
    let mut parts = HARDWARE.needs(STREAM_TABLE, &memory);
    parts.context_tables.truncate(1);
    let mut machine = HARDWARE.enable_smmu(unit, memory, unit, parts).expect("it comes into service");
    let mut guest = Guest::new(&mut machine);
    let (top, _) = guest.tables(&machine, 1);
    machine.assign(DISK, PLAIN);
    machine.assign(NIC, PLAIN);
    guest.place(&mut machine, NIC);

    let refused = machine.smmu.tables.place_context(DISK, CONTEXT);

    assert!(matches!(refused, Err(Error::Exhausted { what }) if what.contains("context")), "{refused:?}");
    assert!(machine.attach_to(DISK, None, guest.pages(top)).is_err());
    assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STE));
    // Once the other has gone, there is one.
    machine.block(NIC);
    assert!(machine.smmu.tables.place_context(DISK, CONTEXT).is_ok());
    machine.pass();
    machine.assert_lawful();
}

#[test]
fn a_guest_s_device_forgets_what_its_guest_says() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let mut guest = Guest::new(&mut machine);
    let (contexts, (top, leaf)) = (guest.page(), guest.tables(&machine, 0x11));
    guest.context(&machine, contexts, 3, top);
    machine.assign(DISK, ALL);
    let Translation::Nested { first: FirstStage::Contexts { mut entry }, .. } = guest.contexts(contexts, 0)
    else {
        panic!("it is one")
    };
    // EATS.
    entry[1] |= 1 << 28;
    let attachment = attach(&mut machine, None, guest.entry(entry));
    assert_eq!(machine.ats_read(DISK, HERE), Ok(0x11));
    guest.store(&machine, leaf, 0);
    // TLBI_NH_ASID 3, then K23 for stream 7: four pages.
    for words in [[0x0003_0000_0000_0011, 0], [0x0000_0007_0000_0040, HERE.0 | 2]] {
        assert_eq!(machine.ats_read(DISK, HERE), Ok(0x11), "the device remembers");
        let request = GuestCommand(words).request(true, true).expect("it is allowed");
        machine.invalidate(&[request.of(attachment).expect("there is something to forget")]);
    }

    assert!(machine.ats_read(DISK, HERE).is_err());
    machine.assert_lawful();
}

#[test]
fn a_guest_may_have_its_device_pass_its_first_stage_or_refused() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let mut guest = Guest::new(&mut machine);
    let page = guest.page();
    guest.store(&machine, page, 0x55);
    machine.assign(DISK, PLAIN);

    // Config 4: behind its own addresses is still the second stage.
    let attachment = attach(&mut machine, None, guest.entry([9, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(machine.read(DISK, None, Iova(page)), Ok(0x55));
    assert_eq!(machine.read(DISK, None, Iova(guest.ram.0)), Err(F_TRANSLATION));
    machine.detach(attachment);
    machine.pass();
    // Not valid, and Config 0: without a record, as the architecture has it for its unit.
    for word in [0, 1] {
        let attachment = attach(&mut machine, None, guest.entry([word, 0, 0, 0, 0, 0, 0, 0]));
        assert_eq!(machine.read(DISK, None, Iova(page)), Err(Refusal::Aborted));
        assert_eq!(machine.pass(), []);
        machine.detach(attachment);
        assert_eq!(machine.read(DISK, None, Iova(page)), Err(C_BAD_STE));
        machine.pass();
    }
    machine.assert_lawful();
}

#[test]
fn a_guest_has_accesses_wait_of_a_device_that_was_named_and_of_no_other() {
    let (unit, memory) = HARDWARE.smmu_unit(Config::full());
    let mut parts = HARDWARE.needs(STREAM_TABLE, &memory);
    parts.stalling.push(NIC).expect("there is room");
    let mut machine = HARDWARE.enable_smmu(unit, memory, unit, parts).expect("it comes into service");
    for (stream, stalls) in [(DISK, false), (NIC, true)] {
        let mut guest = Guest::new(&mut machine);
        let (contexts, (top, _)) = (guest.page(), guest.tables(&machine, 1));
        guest.context(&machine, contexts, 3, top);
        // CD.S, and an entry without S1STALLD.
        guest.store(&machine, contexts, guest.load(&machine, contexts) | 1 << 44);
        machine.assign(stream, PLAIN);
        let translation = guest.entry([contexts | 0xB, 0xD4, 0, 0, 0, 0, 0, 0]);
        machine.attach_to(stream, None, translation).expect("it can be attached");

        let refused = machine.read(stream, None, Iova(0));

        // S = 1 with S1STALLD = 1 is no legal descriptor.
        assert!(stalls || refused == Err(C_BAD_CD), "{refused:?}");
        assert_eq!(matches!(refused, Err(Refusal::Stalled(_))), stalls, "{refused:?}");
    }
    machine.assert_lawful();
}

#[test]
fn guests_with_the_same_addresses_and_numbers_do_not_meet() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let attached = [(DISK, 0xD), (NIC, 0xE)].map(|(stream, content)| {
        let mut guest = Guest::new(&mut machine);
        let (contexts, (top, leaf)) = (guest.page(), guest.tables(&machine, content));
        guest.context(&machine, contexts, 1, top);
        machine.assign(stream, PLAIN);
        let translation = guest.contexts(contexts, 0);
        let attachment = machine.attach_to(stream, None, translation).expect("it can be attached");
        (stream, content, guest, leaf, attachment)
    });
    for (stream, content, ..) in &attached {
        assert_eq!(machine.read(*stream, None, HERE), Ok(*content));
    }

    // One unmaps its page and says so; the other keeps what it has, in the TLB too.
    let [(_, _, guest, leaf, first), (_, _, other, other_s, _)] = &attached;
    guest.store(&machine, *leaf, 0);
    other.store(&machine, *other_s, 0);
    machine.invalidate(&[Invalidation::FirstStage { attachment: *first, asid: None, pages: None }]);

    assert_eq!(machine.read(DISK, None, HERE), Err(F_TRANSLATION));
    assert_eq!(machine.read(NIC, None, HERE), Ok(0xE), "its translations are its own to forget");
    machine.assert_lawful();
}

#[test]
fn a_page_that_the_hypervisor_takes_back_is_gone_from_both_stages() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let mut guest = Guest::new(&mut machine);
    let (top, leaf) = guest.tables(&machine, 1);
    let page = guest.load(&machine, leaf) & 0x0000_FFFF_FFFF_F000;
    machine.assign(DISK, ALL);
    guest.place(&mut machine, DISK);
    let attachment = attach(&mut machine, None, guest.pages(top));
    assert_eq!((machine.read(DISK, None, HERE), machine.ats_read(DISK, HERE)), (Ok(1), Ok(1)));

    machine.unmap(&guest.second, Iova(page), 1);
    machine.invalidate(&[Invalidation::Pages { attachment, iova: Iova(page), pages: 1 }]);

    assert_eq!(machine.read(DISK, None, HERE), Err(F_TRANSLATION));
    assert!(machine.ats_read(DISK, HERE).is_err());
    machine.assert_lawful();
}

#[test]
fn whatever_a_guest_s_entry_says_only_its_own_fields_reach_the_unit() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    let guest = Guest::new(&mut machine);
    machine.assign(DISK, ALL);
    let word = |machine: &Machine, at| stream_word(machine.unit, &machine.memory, DISK, at);
    // Row S10 as the guest writes it, and what the driver makes of it, for the bits that are not the guest's.
    let usual = [0x8000_0000_0010_002B, 0x1800_00D6, 0, 0, 0, 0, 0, 0];
    let attachment = attach(&mut machine, None, guest.entry(usual));
    let own: [u64; 8] = std::array::from_fn(|at| word(&machine, at as u64) & !MAY_SET[at]);
    machine.detach(attachment);
    // PPAR 1<<18, MEV 1<<19, SHCFG 1<<44; VMID 0, the second stage and its root.
    assert_eq!(own[..2], [0, 0x0000_1000_000C_0000]);
    assert_eq!(own[3..], [guest.second.root().0, 0, 0, 0, 0]);
    let mut random = Random::new(0x5EED);
    let (mut allowed, mut refused) = (0, 0);
    for _ in 0..2000 {
        let mut entry = usual;
        for word in &mut entry {
            *word ^= random.number() & random.number() & random.number() & random.number() & random.number();
        }
        if random.number() & 3 != 0 {
            entry.iter_mut().zip(MAY_SET).for_each(|(word, may)| *word &= may);
        }
        // Valid, and stage 1: other kinds of entries have a test of their own.
        entry[0] = entry[0] & !0xF | 0xB;

        match machine.attach_to(DISK, None, guest.entry(entry)) {
            Ok(attachment) => {
                allowed += 1;
                // Config is 7, V is set.
                assert_eq!(word(&machine, 0) & 0xF, 0xF);
                for (at, own) in own.into_iter().enumerate() {
                    assert_eq!(entry[at] & !MAY_SET[at], 0, "{entry:#x?}");
                    assert_eq!(word(&machine, at as u64) & !MAY_SET[at], own, "{entry:#x?}");
                }
                machine.detach(attachment);
            }
            Err(error) => {
                refused += 1;
                let named = matches!(error, Error::Unsupported { feature } if feature.contains("STE"));
                assert!(named, "{error:?} names no field");
                assert_eq!(word(&machine, 0) & 1, 0);
            }
        }
    }
    assert!(allowed > 100 && refused > 100, "{allowed} and {refused}");
    machine.assert_lawful();
}

#[test]
fn what_cannot_be_nested_is_refused_by_name() {
    let refused = |config, features, pasid, make: fn(&mut Guest, &mut Machine) -> Translation, name: &str| {
        let mut machine = HARDWARE.smmu(STREAM_TABLE, config);
        let mut guest = Guest::new(&mut machine);
        machine.assign(DISK, features);
        let translation = make(&mut guest, &mut machine);
        let error = machine.attach_to(DISK, pasid, translation).expect_err("it is refused");
        assert!(format!("{error:?}").contains(name), "{error:?} is not {name}");
        assert!(machine.read(DISK, pasid, HERE).is_err());
        machine.assert_lawful();
    };
    let full = Config::full();
    let pages = |guest: &mut Guest, machine: &mut Machine| {
        guest.place(machine, DISK);
        guest.pages(RAM)
    };
    // MMU-700 (0x487 of Arm, 0x43B), variant 0.
    let erratum = Config { iidr: 0x487 << 20 | 0x43B, ..full };
    refused(erratum, PLAIN, None, pages, "IDR0.S1P and IDR0.S2P together");
    refused(full, PLAIN, None, |guest, _| guest.pages(RAM), "without a place in the second stage");
    refused(full, ALL, pasid(64), pages, "without a place in the second stage");
    refused(full, ALL, pasid(0), pages, "PasidState");
    refused(full, PLAIN, pasid(1), pages, "PasidState");
    refused(full, ALL, pasid(1), |guest, _| guest.contexts(RAM, 0), "PasidState");
    refused(
        full,
        PLAIN,
        None,
        |g, m| {
            g.place(m, DISK);
            g.pages(1 << 44)
        },
        "this root",
    );
    refused(
        full,
        PLAIN,
        None,
        |g, m| {
            g.place(m, DISK);
            g.pages(RAM + 8)
        },
        "this root",
    );
    refused(full, PLAIN, None, |guest, _| guest.contexts(1 << 44, 0), "STE.S1ContextPtr");
    refused(full, PLAIN, None, |guest, _| guest.contexts(RAM, 21), "STE.S1CDMax");

    let mut machine = HARDWARE.smmu(STREAM_TABLE, full);
    let place = |machine: &mut Machine, at| machine.smmu.tables.place_context(DISK, Gpa(at)).err();
    assert_eq!(place(&mut machine, 0), Some(Error::UnknownStream { stream: DISK }));
    machine.assign(DISK, PLAIN);
    assert!(matches!(place(&mut machine, 8), Some(Error::Unsupported { .. })));
    assert_eq!(place(&mut machine, 0x1000), None);
    assert_eq!(place(&mut machine, 0x2000), None, "the same frame, elsewhere");
    assert_eq!(machine.smmu.tables.free_context_tables(), hosted::smmu::CONTEXT_TABLES - 1);
    machine.block(DISK);
    assert_eq!(machine.smmu.tables.free_context_tables(), hosted::smmu::CONTEXT_TABLES);
}
