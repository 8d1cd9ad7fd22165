//! The bodies of the fuzz targets with random bytes, and with golden ones that were changed here and there. `tests/fuzz` runs
//! them for as long as one likes.

use hosted::{
    Random, fuzz,
    iort::{EVERYTHING, QEMU, table},
};

/// Calls `body` with `count` inputs: half of them random and up to `longest` bytes, half made from `golden` ones.
fn run(body: fn(&[u8]), seed: u64, count: u64, longest: u64, golden: &[Vec<u8>]) {
    let mut random = Random::new(seed);
    for seed in golden {
        body(seed);
    }
    for n in 0..count {
        let mut input: Vec<u8> = if n % 2 == 0 {
            (0..random.below(longest + 1)).map(|_| random.number() as u8).collect()
        } else {
            golden[random.below(golden.len() as u64) as usize].clone()
        };
        if n % 2 == 1 {
            for _ in 0..1 + random.below(3) {
                mutate(&mut input, &mut random);
            }
        }
        body(&input);
    }
}

/// Flips a bit, sets a byte, or cuts the end off.
fn mutate(input: &mut Vec<u8>, random: &mut Random) {
    let Some(at) = (!input.is_empty()).then(|| random.below(input.len() as u64) as usize) else { return };
    match random.below(8) {
        0..4 => input[at] ^= 1 << random.below(8),
        4..7 => input[at] = [0, 0xFF, 0x80, random.number() as u8][random.below(4) as usize],
        _ => input.truncate(at),
    }
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[test]
fn no_consumer_page_does_more_than_end_its_channel() {
    // Operation in 2:0, ring in 7; see `fuzz::channel`. A guest that reads all of 60 pages and 20 events, twice.
    let round = |n: u8| [vec![6, n, 3, 2, n], vec![7; 20], vec![0x82, 20, 3, 3]].concat();
    let honest = [vec![0], round(60), round(60), vec![4, 3, 5, 1]].concat();
    let around = [vec![1], round(50), round(50)].concat();
    // As many events as there is room for, and more; then an index that goes back.
    let full = [vec![0], vec![7; 70], vec![0x82, 5, 7, 7, 3, 0x81, 2, 7, 7]].concat();

    run(fuzz::channel, 1, 20_000, 200, &[honest, around, full]);
}

#[test]
fn no_array_is_handled_further_than_its_words_say() {
    // Layout, budget, the number of a call, then entries.
    let with = |layout, words: &[u64]| [vec![layout, 16], bytes(&[7]), bytes(words)].concat();
    let commands = with(
        3,
        &[
            0x0000_0108_0000_5005,
            1,
            0x0000_0108_0000_0006,
            0,
            0x0000_002A_0000_0010,
            0,
            0x0007_002A_0000_0011,
            0,
            0x0007_002A_0090_0012,
            0x4020_0701,
            0x0000_002A_0000_0013,
            0xFFFF_0000_1234_5000,
            0x0000_0108_0000_5840,
            0x2000_0009,
            0x30,
            0,
        ],
    );
    let pages = with(1, &[7, 0x5000, 3, 1, 8, 0xFFFF_FFFF_FFFF_F000, 1, 0]);
    let stage1 = with(2, &[7, 0, u64::MAX, 1, 8, 0x5000, 1, 0]);

    run(fuzz::invalidation, 2, 200_000, 120, &[commands, pages, stage1]);
}

#[test]
fn every_entry_of_every_queue_says_something_or_is_told_to_be_malformed() {
    // Page requests and a fault of VT-d; page requests and events of SMMUv3; a record of a request and one of an event.
    let golden = [
        bytes(&[0x0000_0005_0008_0101, 0x7F00_0000_100F, 0, 0]),
        bytes(&[0x4020_1000, 0x8000_0571_0000_0008]),
        bytes(&[0xF000_0005_0000_0108, 0x7F00_0000_11A3]),
        bytes(&[0xC000_0005_0000_0108, 0]),
        bytes(&[0x0108_0000_5813, 0x0202_8000_0042, 0x7F00_0000_1000, 0]),
        bytes(&[0x0108_0002_0008, 0, 0, 0]),
        bytes(&[1, 0x7F00_0000_1000, 2, 0x0001_2345_0000_0002, 0x01FF_0001_0301, 0x0003_0000_0004, 0, 0]),
        bytes(&[9, 0x4000_0000, 7, 0xFFFF_FFFF_0000_0001, 0x0002_0000_0000_0202, 0, 2, 0]),
    ];

    run(fuzz::queue_entries, 3, 200_000, 64, &golden);
}

#[test]
fn every_dmar_table_is_refused_or_read_to_its_end() {
    // Header right, segment, seed, requester ID in two bytes; then a unit for the bridge 00:01.0 and an
    // endpoint behind it, a region, root ports, near memory, a name, an SoC device, and a structure of a type
    // that there is not.
    let unit = [0, 0, 34, 0, 0, 0, 0, 0, 0, 0, 0xD9, 0xFE, 0, 0, 0, 0];
    let scopes = [2, 8, 0, 0, 0, 0, 1, 0, 1, 10, 0, 0, 0, 0, 1, 0, 2, 0];
    let region = [1, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x7B, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0x7F, 0, 0, 0, 0];
    let endpoint = [1, 8, 0, 0, 0, 0, 2, 0];
    let rest = [0, 0, 16, 0, 1, 0, 0, 0, 0, 0x10, 0xD9, 0xFE, 0, 0, 0, 0, 2, 0, 8, 0, 1, 0, 0, 0];
    let near = [3, 0, 20, 0, 0, 0, 0, 0, 0, 0x10, 0xD9, 0xFE, 0, 0, 0, 0, 1, 0, 0, 0];
    let name = [4, 0, 11, 0, 0, 0, 0, 1, b'\\', b'A', 0];
    let soc = [[5, 0, 16, 0, 1, 0, 0, 0], endpoint, [6, 0, 16, 0, 0, 0, 0, 0], endpoint].concat();
    let unknown = [0x7F, 0, 5, 0, 9];
    let structures: [&[u8]; 8] = [&unit, &scopes, &region, &endpoint, &rest, &near, &name, &soc];
    let whole = [structures.concat(), unknown.to_vec()].concat();
    let golden = [[&[1, 0, 5, 0, 0x10][..], &whole].concat(), [&[1, 0, 5, 1, 0][..], &rest].concat()];

    run(fuzz::dmar, 4, 200_000, 160, &golden);
}

#[test]
fn no_table_of_firmware_is_more_than_read_or_refused() {
    // Segment and requester ID, then a table; functions behind each unit, and behind none.
    let asked = |segment: u16, requester: u16, table: &[u8]| {
        [&segment.to_le_bytes()[..], &requester.to_le_bytes(), table].concat()
    };
    let (everything, qemu) = (table(6, 11, &EVERYTHING.concat()), table(3, 3, &QEMU.concat()));
    let golden = [
        asked(1, 0x0004, &everything),
        asked(1, 0x0100, &everything),
        asked(0, 0x0010, &everything),
        asked(0, 0x0010, &qemu),
        asked(0, 0x0100, &qemu),
        asked(7, 0, &qemu),
    ];

    run(fuzz::iort, 4, 100_000, 200, &golden);
}
