//! Stream tables of two levels: how the second comes to be, and what a unit may see of it meanwhile.

use crate::{HARDWARE, STREAM_TABLE};
use hosted::{
    Moment,
    smmu::{STREAMS, Stage, Tapped, stream_word, translation},
};
use iommu::{Bus, DmaBuf, Error, Features, Iova, Perms, PhysAddr, StreamId, Tables};
use models::{
    memory::Memory,
    smmuv3::{Config, Refusal, SmmuUnit},
};
use smmuv3::{Found, tables::DEVICES};
use std::sync::{Arc, Mutex};

/// Two streams of the first table of 64, and one of the fifth.
const DISK: StreamId = StreamId(0x20);
const NEIGHBOUR: StreamId = StreamId(0x3F);
const NIC: StreamId = StreamId(0x108);
const NONE: Features = Features { device_tlb: false, page_requests: false, pasid: false };
const HERE: Iova = Iova(0x4000_0000);

const C_BAD_STREAMID: Refusal = Refusal::Fault(0x02);
const C_BAD_STE: Refusal = Refusal::Fault(0x04);

const CR0: usize = 0x020;
const GBPA: usize = 0x044;
const STRTAB_BASE: usize = 0x080;
const STRTAB_BASE_CFG: usize = 0x088;

/// The words of the first level, as the unit sees them.
fn first_level(unit: &SmmuUnit, memory: &Memory, words: u64) -> Vec<u64> {
    let table = unit.read64(STRTAB_BASE) & 0x00FF_FFFF_FFFF_FFC0;
    (0..words).map(|at| memory.device_load(PhysAddr(table + at * 8)).expect("it is in the memory")).collect()
}

/// Memory for a table of two levels with these words; each table of the second has `second` words.
fn two_levels(memory: &Memory, first: usize, second: usize, tables: usize) -> smmuv3::Memory {
    smmuv3::Memory {
        stream_table: memory.take(first, first),
        second_level: (0..tables).map(|_| memory.take(second, second)).collect(),
        ..HARDWARE.needs(STREAM_TABLE, memory)
    }
}

#[test]
fn a_table_of_the_second_level_is_made_for_the_first_of_its_devices() {
    let (unit, memory) = HARDWARE.smmu_unit(Config::full());
    let parts = HARDWARE.needs(STREAM_TABLE, &memory);
    let tables: Vec<u64> = parts.second_level.iter().map(|table| table.phys().0).collect();
    let mut machine = HARDWARE.enable_smmu(unit, memory.clone(), unit, parts).expect("it comes into service");
    let mut expected = vec![0; 8];
    assert_eq!(first_level(unit, &memory, 8), expected);

    // L2: Span 7 is 64 entries.
    machine.assign(DISK, NONE);
    expected[0] = tables[0] | 7;
    assert_eq!(first_level(unit, &memory, 8), expected);
    machine.assign(NEIGHBOUR, NONE);
    assert_eq!(first_level(unit, &memory, 8), expected);
    machine.assign(NIC, NONE);
    expected[4] = tables[1] | 7;
    assert_eq!(first_level(unit, &memory, 8), expected);

    // Leaving takes nothing back, and coming again takes nothing new.
    machine.block(NIC);
    machine.assign(NIC, NONE);
    assert_eq!(first_level(unit, &memory, 8), expected);
    machine.assert_lawful();
}

#[test]
fn every_split_of_the_architecture_serves_its_first_and_its_last_stream() {
    for (split, places, format, span) in [
        (6, 16, 1 << 16 | 6 << 6 | 10, 7),
        (8, 8, 1 << 16 | 8 << 6 | 11, 9),
        // R4: 2^16 streams.
        (8, 256, 0x0001_0210, 9),
        (10, 64, 1 << 16 | 10 << 6 | 16, 11),
    ] {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let parts = two_levels(&memory, places, 8 << split, 2);
        let tables: Vec<u64> = parts.second_level.iter().map(|table| table.phys().0).collect();
        let mut machine =
            HARDWARE.enable_smmu(unit, memory.clone(), unit, parts).expect("it comes into service");
        assert_eq!(unit.read32(STRTAB_BASE_CFG), format);

        let last = (places as u32) << split;
        let streams = [0, (1 << split) - 1, last - (1 << split), last - 1].map(StreamId);
        for stream in streams {
            let tree = machine.tree(Stage::One);
            machine.map(&tree, HERE, stream.0.into(), Perms::READ);
            machine.assign(stream, NONE);
            machine.attach(stream, Stage::One, &tree);
        }

        let first = first_level(unit, &memory, places as u64);
        assert_eq!((first[0], first[places - 1]), (tables[0] | span, tables[1] | span));
        assert!(first[1..places - 1].iter().all(|&word| word == 0));
        for stream in streams {
            assert_eq!(machine.read(stream, None, HERE), Ok(stream.0.into()));
        }
        assert_eq!(machine.read(StreamId(1), None, HERE), Err(C_BAD_STE));
        assert_eq!(machine.read(StreamId(1 << split), None, HERE), Err(C_BAD_STREAMID));
        let past = StreamId(last);
        assert_eq!(machine.smmu.tables.assign(past, NONE).err(), Some(Error::UnknownStream { stream: past }));
        machine.assert_lawful();
    }
}

#[test]
fn a_stream_that_was_refused_for_want_of_a_table_is_forgotten_with_its_neighbour() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    assert_eq!(machine.read(NEIGHBOUR, None, HERE), Err(C_BAD_STREAMID));
    assert_eq!(machine.read(NIC, None, HERE), Err(C_BAD_STREAMID));

    let invalidations = machine.smmu.tables.assign(DISK, NONE).expect("it can be assigned");
    assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STREAMID), "the model remembers, as hardware may");
    machine.invalidate(&invalidations);

    assert_eq!(machine.read(DISK, None, HERE), Err(C_BAD_STE));
    assert_eq!(machine.read(NEIGHBOUR, None, HERE), Err(C_BAD_STE));
    assert_eq!(machine.read(NIC, None, HERE), Err(C_BAD_STREAMID));
    machine.assert_lawful();
}

#[test]
fn no_store_leads_to_anything_but_whole_tables_of_entries_that_are_not_valid() {
    let (unit, memory) = HARDWARE.smmu_unit(Config::full());
    let parts = HARDWARE.needs(STREAM_TABLE, &memory);
    let table = parts.second_level[0].phys().0;
    let looks = Arc::new(Mutex::new(Vec::new()));
    let (kept, of) = (Arc::clone(&looks), memory.clone());
    let bus = Tapped::new(unit, move |unit, moment| {
        // Before CR0.CMDQEN nothing is looked at yet.
        if moment != Moment::Published || unit.read32(CR0) == 0 {
            return;
        }
        let first = first_level(unit, &of, 8);
        let entries: Vec<u64> = (0..64).map(|stream| stream_word(unit, &of, StreamId(stream), 0)).collect();
        kept.lock().expect("no test panics here").push((first, entries));
    });
    let mut machine = HARDWARE.enable_smmu(unit, memory, bus, parts).expect("it comes into service");
    looks.lock().expect("no test panics here").clear();

    machine.assign(DISK, NONE);

    let looks = looks.lock().expect("no test panics here");
    assert!(looks.len() > 3, "one word of the first level, and those of an entry that are not zero");
    let led: Vec<bool> = looks.iter().map(|(first, _)| first[0] != 0).collect();
    assert!(led.is_sorted() && led.contains(&true));
    for (first, entries) in &*looks {
        assert!(first[0] == 0 || first[0] == table | 7, "{:#x}", first[0]);
        assert!(first[1..].iter().all(|&word| word == 0));
        // V is bit 0; what was never written would have it set.
        assert!(entries.iter().all(|&word| word == 0), "{entries:x?}");
    }
}

/// What two devices got, when they looked once, at the publication that was chosen.
type Look = Arc<Mutex<(usize, Option<[Result<Vec<u8>, Refusal>; 2]>)>>;

#[test]
fn a_walker_between_any_two_stores_finds_no_stream_or_no_valid_entry_or_the_new_one() {
    for stage in [Stage::One, Stage::Two] {
        let mut met = Vec::new();
        // What the unit has read it remembers, so each moment is looked at on a unit of its own.
        for moment in 1.. {
            let (unit, memory) = HARDWARE.smmu_unit(Config::full());
            let parts = HARDWARE.needs(STREAM_TABLE, &memory);
            let look = Look::default();
            let chosen = Arc::clone(&look);
            let bus = Tapped::new(unit, move |unit, kind| {
                let mut look = chosen.lock().expect("no test panics here");
                if kind == Moment::Published && look.0 > 0 {
                    look.0 -= 1;
                    if look.0 == 0 {
                        look.1 = Some([DISK, NEIGHBOUR].map(|stream| unit.dma_read(stream, None, HERE, 1)));
                    }
                }
            });
            let mut machine = HARDWARE.enable_smmu(unit, memory, bus, parts).expect("it comes into service");
            let tree = machine.tree(stage);
            machine.map(&tree, HERE, 1, Perms::READ);
            look.lock().expect("no test panics here").0 = moment;

            machine.assign(DISK, NONE);
            let attached = machine.smmu.tables.attach(DISK, None, translation(stage, &tree));
            let (_, invalidations) = attached.expect("it can be attached");
            machine.invalidate(&invalidations);

            assert_eq!(machine.read(DISK, None, HERE), Ok(1), "whatever the unit met before");
            assert_eq!(machine.read(NEIGHBOUR, None, HERE), Err(C_BAD_STE));
            machine.assert_lawful();
            let Some([disk, neighbour]) = look.lock().expect("no test panics here").1.take() else { break };
            let blocked = [Err(C_BAD_STREAMID), Err(C_BAD_STE)];
            assert!(disk == Ok(vec![1]) || blocked.contains(&disk), "{stage:?}, moment {moment}: {disk:?}");
            assert!(blocked.contains(&neighbour), "{stage:?}, moment {moment}: {neighbour:?}");
            met.push(disk);
        }
        assert!(met.contains(&Ok(vec![1])) && met.contains(&Err(C_BAD_STE)), "{met:?}");
    }
}

#[test]
fn a_pool_that_is_used_up_is_told_and_nothing_has_changed() {
    let (unit, memory) = HARDWARE.smmu_unit(Config::full());
    let parts = two_levels(&memory, 8, 512, 2);
    let mut machine = HARDWARE.enable_smmu(unit, memory.clone(), unit, parts).expect("it comes into service");
    machine.assign(DISK, NONE);
    machine.assign(NIC, NONE);
    let (first, commands) = (first_level(unit, &memory, 8), unit.executed());
    let third = StreamId(0x40);

    for _ in 0..DEVICES {
        let refused = machine.smmu.tables.assign(third, NONE).err();
        let told = matches!(refused, Some(Error::Exhausted { what }) if what.contains("second-level"));
        assert!(told, "{refused:?}");
    }

    assert_eq!((first_level(unit, &memory, 8), unit.executed()), (first, commands));
    assert_eq!(machine.smmu.tables.block(third).err(), Some(Error::UnknownStream { stream: third }));
    assert_eq!(machine.read(third, None, HERE), Err(C_BAD_STREAMID));
    // All places for devices but two are still there, for streams that have tables.
    let others =
        (0..0x40).chain(0x100..0x140).map(StreamId).filter(|&stream| stream != DISK && stream != NIC);
    for stream in others.take(DEVICES - 2) {
        machine.assign(stream, NONE);
    }
    machine.assert_lawful();
}

#[test]
fn a_device_that_finds_no_place_takes_no_table() {
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config::full());
    for stream in 0..DEVICES as u32 {
        machine.assign(StreamId(stream), NONE);
    }
    let first = first_level(machine.unit, &machine.memory, 8);

    let refused = machine.smmu.tables.assign(NIC, NONE).err();

    assert!(matches!(refused, Some(Error::Exhausted { what }) if what.contains("devices")), "{refused:?}");
    assert_eq!(first_level(machine.unit, &machine.memory, 8), first);
}

#[test]
fn a_unit_of_linear_tables_alone_is_given_no_second_level() {
    let full = Config::full();
    // ST_LEVEL [28:27].
    let (unit, memory) = HARDWARE.smmu_unit(Config { idr0: full.idr0 & !(3 << 27), ..full });
    let parts = HARDWARE.needs(STREAM_TABLE, &memory);

    let error = HARDWARE.enable_smmu(unit, memory, unit, parts).err();

    assert!(
        matches!(error, Some(Error::Unsupported { feature }) if feature.contains("IDR0.ST_LEVEL")),
        "{error:?}"
    );
    assert_eq!((unit.read32(CR0), unit.read32(GBPA)), (0, 0x1000));
}

/// `words` words that are not aligned to their size.
fn crooked(memory: &Memory, words: usize) -> DmaBuf {
    let _odd = memory.take(1, words);
    memory.take(words, 1)
}

#[test]
fn a_second_level_of_another_shape_is_refused_by_name_and_the_unit_left_alone() {
    type Change = fn(&mut smmuv3::Memory, &Memory);
    let cases: [(&str, usize, Change); 8] = [
        ("second-level", 512, |m, from| m.second_level = [from.take(256, 256)].into_iter().collect()),
        ("second-level", 2048, |m, from| m.second_level = [from.take(1024, 1024)].into_iter().collect()),
        ("second-level", 8192, |m, from| m.second_level = [from.take(16384, 16384)].into_iter().collect()),
        ("second-level", 512, |m, from| m.second_level[3] = crooked(from, 512)),
        ("second-level", 512, |m, from| m.second_level[7] = from.take(2048, 2048)),
        ("the stream table", 8, |m, from| m.stream_table = from.take(4, 8)),
        ("the stream table", 8, |m, from| m.stream_table = crooked(from, 16)),
        ("the stream table", 8, |m, from| m.stream_table = from.take(12, 16)),
    ];
    for (purpose, expected, change) in cases {
        let (unit, memory) = HARDWARE.smmu_unit(Config::full());
        let mut parts = HARDWARE.needs(STREAM_TABLE, &memory);
        change(&mut parts, &memory);

        let error = HARDWARE.enable_smmu(unit, memory, unit, parts).err();

        let Some(Error::Memory { purpose: named, needed, .. }) = error else {
            panic!("{purpose}: {error:?}")
        };
        assert!(named.contains(purpose), "{named} is not {purpose}");
        assert_eq!(needed, expected, "{named}");
        assert_eq!((unit.read32(CR0), unit.read32(GBPA)), (0, 0x1000));
    }
}

#[test]
fn what_a_stream_table_is_said_to_take_serves_its_last_stream() {
    let full = Config::full();
    let single = Config { idr0: full.idr0 & !(3 << 27), ..full };
    for (config, last, words, second_level_words) in [
        (full, 0, 8, 0),
        (full, 0x3F, 512, 0),
        (full, 0xFF, 2048, 0),
        (full, 0x100, 8, 2048),
        (full, 0xFFFF, 256, 2048),
        (single, 0x1FF, 4096, 0),
    ] {
        let (unit, memory) = HARDWARE.smmu_unit(config);
        let found = Found::probe(unit).expect("it is there");
        let needs = found.stream_table(StreamId(last)).expect("the unit knows the stream");
        assert_eq!((needs.words, needs.second_level_words), (words, second_level_words), "{last:#x}");

        let tables = usize::from(second_level_words != 0);
        let parts = two_levels(&memory, words, second_level_words.max(1), tables);
        let mut machine = HARDWARE.enable_smmu(unit, memory, unit, parts).expect("it comes into service");

        machine.assign(StreamId(last), NONE);
        machine.assert_lawful();
    }
}

#[test]
fn streams_that_a_unit_cannot_tell_apart_are_refused_by_name() {
    // IDR1.SIDSIZE [5:0].
    let full = Config::full();
    for (bits, last) in [(16, 0x1_0000), (9, 0x200), (16, u32::MAX)] {
        let config = Config { idr1: full.idr1 & !0x3F | bits, ..full };
        let found = Found::probe(HARDWARE.smmu_unit(config).0).expect("it is there");
        let stream = StreamId(last);

        assert_eq!(found.stream_table(stream), Err(Error::UnknownStream { stream }));
        assert!(found.stream_table(StreamId((1 << bits) - 1)).is_ok());
    }
    // A table that has places for more of them than that.
    let mut machine = HARDWARE.smmu(STREAM_TABLE, Config { idr1: full.idr1 & !0x3F | 8, ..full });
    for stream in [0x100, STREAMS - 1, STREAMS, u32::MAX].map(StreamId) {
        assert_eq!(machine.smmu.tables.assign(stream, NONE).err(), Some(Error::UnknownStream { stream }));
    }
    machine.assign(StreamId(0xFF), NONE);
    machine.assert_lawful();
}
