//! A walk of tables by the manuals' words, written without the crate's constants.
//!
//! VT-d: "First-Stage Paging Entries", "Second-Stage Paging Entries". Arm: VMSAv8-64 descriptors. What is reserved, or what the
//! crate promises of the entries that it writes, is asserted on the way.

/// Whose tables, and how large.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Long mode, and the first stage of VT-d: `execute_disable` where XD may be set.
    LongMode { levels: u32, execute_disable: bool, nested: bool },
    /// The second stage of VT-d; on a unit that is asked to, all leaves force accesses to snoop.
    SecondStage { levels: u32, snoop: bool },
    /// AArch64: granule of 2^`granule` bytes, input addresses of `bits` bits.
    Arm { stage: u32, granule: u32, bits: u32 },
}

/// What a walk finds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Seen {
    pub phys: u64,
    pub leaf_bytes: u64,
    pub read: bool,
    pub write: bool,
    pub execute: bool,
    pub privileged: bool,
    /// 0 write-back, 1 uncached, 2 device; long mode has one word for the last two: 1.
    pub memory: u8,
    pub accessed: bool,
    /// Bits that say so, whatever they mean for a leaf that is not writable.
    pub dirty: bool,
    /// A writable leaf of which hardware would record the first write.
    pub clean: bool,
}

fn bits(word: u64, high: u32, low: u32) -> u64 {
    word >> low & (u64::MAX >> (63 - (high - low)))
}

fn bit(word: u64, at: u32) -> bool {
    bits(word, at, at) == 1
}

/// Walks from the table at `root`, whose words `load` loads by their address.
pub fn walk(load: impl Fn(u64) -> u64, kind: Kind, root: u64, address: u64) -> Option<Seen> {
    match kind {
        Kind::LongMode { levels, execute_disable, nested } => {
            long_mode(load, levels, execute_disable, nested, root, address)
        }
        Kind::SecondStage { levels, snoop } => second_stage(load, levels, snoop, root, address),
        Kind::Arm { stage, granule, bits } => arm(load, stage, granule, bits, root, address),
    }
}

fn long_mode(
    load: impl Fn(u64) -> u64,
    levels: u32,
    execute_disable: bool,
    nested: bool,
    root: u64,
    address: u64,
) -> Option<Seen> {
    let mut table = root;
    for level in (1..=levels).rev() {
        let entry = load(table + bits(address, 9 * level + 11, 9 * level + 3) * 8);
        if !bit(entry, 0) {
            return None;
        }
        assert_eq!(bits(entry, 62, 52), 0, "ignored bits are left alone: {entry:#x}");
        assert_eq!(bits(entry, 11, 8), 0, "G and ignored bits are left alone: {entry:#x}");
        assert!(execute_disable || !bit(entry, 63), "XD is reserved for older units: {entry:#x}");
        let leaf = level == 1 || bit(entry, 7);
        if !leaf {
            assert!(bit(entry, 1) && bit(entry, 2) && bit(entry, 5), "R/W, U/S and A of a table: {entry:#x}");
            assert!(!bit(entry, 63) && bits(entry, 4, 3) == 0, "no XD, PWT, PCD of a table: {entry:#x}");
            table = bits(entry, 51, 12) << 12;
            continue;
        }
        assert!(level <= 3, "PS is reserved at level {level}: {entry:#x}");
        assert!(level != 1 || !bit(entry, 7), "bit 7 of a page is PAT: {entry:#x}");
        let shift = 12 + 9 * (level - 1);
        assert!(level == 1 || bits(entry, shift - 1, 12) == 0, "PAT and reserved bits: {entry:#x}");
        assert!(!nested || bit(entry, 2), "nested walks are user accesses: {entry:#x}");
        let write = bit(entry, 1);
        return Some(Seen {
            phys: bits(entry, 51, shift) << shift | bits(address, shift - 1, 0),
            leaf_bytes: 1 << shift,
            read: true,
            write,
            execute: !bit(entry, 63),
            privileged: !bit(entry, 2),
            memory: match bits(entry, 4, 3) {
                0b00 => 0,
                0b11 => 1,
                other => panic!("PWT and PCD are {other:#b}"),
            },
            accessed: bit(entry, 5),
            dirty: bit(entry, 6),
            clean: write && !bit(entry, 6),
        });
    }
    unreachable!("level 1 has leaves alone")
}

fn second_stage(
    load: impl Fn(u64) -> u64,
    levels: u32,
    snoop: bool,
    root: u64,
    address: u64,
) -> Option<Seen> {
    let mut table = root;
    for level in (1..=levels).rev() {
        let entry = load(table + bits(address, 9 * level + 11, 9 * level + 3) * 8);
        if bits(entry, 1, 0) == 0 {
            return None;
        }
        assert_eq!(bits(entry, 63, 52), 0, "TM and ignored bits are left alone: {entry:#x}");
        assert_eq!(bits(entry, 6, 2), 0, "X, EMT and IPAT are left alone: {entry:#x}");
        let is_table = level > 1 && !bit(entry, 7);
        let snoops = snoop && !is_table;
        assert_eq!(bit(entry, 11), snoops, "SNP is for leaves, where the unit can snoop: {entry:#x}");
        if is_table {
            assert_eq!(bits(entry, 1, 0), 0b11, "a table permits everything: {entry:#x}");
            table = bits(entry, 51, 12) << 12;
            continue;
        }
        assert!(level <= 3, "PS is reserved at level {level}: {entry:#x}");
        let shift = 12 + 9 * (level - 1);
        assert!(level == 1 || bits(entry, shift - 1, 12) == 0, "reserved bits: {entry:#x}");
        let write = bit(entry, 1);
        return Some(Seen {
            phys: bits(entry, 51, shift) << shift | bits(address, shift - 1, 0),
            leaf_bytes: 1 << shift,
            read: bit(entry, 0),
            write,
            execute: true,
            privileged: false,
            memory: 0,
            accessed: bit(entry, 8),
            dirty: bit(entry, 9),
            clean: write && !bit(entry, 9),
        });
    }
    unreachable!("level 1 has leaves alone")
}

/// Bits that a level resolves.
fn stride(granule: u32) -> u32 {
    match granule {
        12 => 9,
        14 => 11,
        16 => 13,
        other => panic!("no granule of 2^{other}"),
    }
}

/// The level at which a walk starts, by Arm's numbers: 3 has the pages, -1 is possible.
///
/// Stage 2 starts one level further down where that takes at most 16 tables in a row.
pub fn start_level(stage: u32, granule: u32, bits: u32) -> i32 {
    let (stride, resolved) = (stride(granule), bits - granule);
    let natural = 4 - resolved.div_ceil(stride) as i32;
    let at_top = resolved - (3 - natural) as u32 * stride;
    if stage == 2 && at_top <= 4 { natural + 1 } else { natural }
}

fn arm(
    load: impl Fn(u64) -> u64,
    stage: u32,
    granule: u32,
    input_bits: u32,
    root: u64,
    address: u64,
) -> Option<Seen> {
    let large = input_bits > 48;
    let output = |entry: u64| match (large, granule) {
        (false, _) => bits(entry, 47, granule) << granule,
        (true, 16) => bits(entry, 47, 16) << 16 | bits(entry, 15, 12) << 48,
        (true, _) => bits(entry, 49, granule) << granule | bits(entry, 9, 8) << 50,
    };
    let mut table = root;
    let first = start_level(stage, granule, input_bits);
    for level in first..=3 {
        let shift = granule + stride(granule) * (3 - level) as u32;
        let high = if level == first { input_bits - 1 } else { shift + stride(granule) - 1 };
        let entry = load(table + bits(address, high, shift) * 8);
        if !bit(entry, 0) {
            return None;
        }
        assert!(large || bits(entry, 50, 48) == 0, "no address bits above 47, no GP: {entry:#x}");
        assert_eq!(bits(entry, 63, 55), 0, "table restrictions, PBHA and software bits: {entry:#x}");
        assert!(!bit(entry, 52), "no contiguous hint: {entry:#x}");
        let table_or_page = bit(entry, 1);
        if level < 3 && table_or_page {
            let low = if large && granule != 16 { 0 } else { bits(entry, 9, 8) };
            assert_eq!((bits(entry, 7, 2), low, bits(entry, 11, 10)), (0, 0, 0), "ignored bits of a table");
            assert_eq!(bits(entry, 54, 51), 0, "ignored bits of a table: {entry:#x}");
            table = output(entry);
            continue;
        }
        let block_levels: &[i32] = match (granule, large) {
            (12, false) => &[1, 2],
            (12, true) => &[0, 1, 2],
            (_, false) => &[2],
            (_, true) => &[1, 2],
        };
        assert!(table_or_page == (level == 3) && (level == 3 || block_levels.contains(&level)), "{entry:#x}");
        let phys = output(entry);
        assert_eq!(bits(phys, shift - 1, 0), 0, "a block is aligned, and has no nT: {entry:#x}");
        // With LPA2 the context has the shareability.
        let shareability = (!large || granule == 16).then(|| bits(entry, 9, 8));
        let memory = match (stage, bits(entry, 5, 2)) {
            // AttrIndx is 4:2, and NS is 5.
            (1, index) => match index {
                0 => 0,
                2 => 1,
                1 => 2,
                other => panic!("AttrIndx and NS are {other:#b}"),
            },
            (_, 0b1111) => 0,
            (_, 0b0101) => 1,
            (_, 0b0001) => 2,
            (_, other) => panic!("MemAttr is {other:#b}"),
        };
        if let Some(shareability) = shareability {
            assert_eq!(shareability, if memory == 0 { 0b11 } else { 0b10 }, "inner for RAM: {entry:#x}");
        }
        let dbm = bit(entry, 51);
        let common = Seen {
            phys: phys | bits(address, shift - 1, 0),
            leaf_bytes: 1 << shift,
            read: true,
            write: false,
            execute: false,
            privileged: false,
            memory,
            accessed: bit(entry, 10),
            dirty: false,
            clean: false,
        };
        return Some(if stage == 1 {
            assert!(bit(entry, 11), "nG: {entry:#x}");
            let (user, read_only) = (bit(entry, 6), bit(entry, 7));
            let (pxn, uxn) = (bit(entry, 53), bit(entry, 54));
            assert!(user || uxn, "without AP[1] nobody without privilege may execute either: {entry:#x}");
            assert!(!user || pxn == uxn, "{entry:#x}");
            Seen {
                write: !read_only || dbm,
                execute: if user { !uxn } else { !pxn },
                privileged: !user,
                dirty: dbm && !read_only,
                clean: dbm && read_only,
                ..common
            }
        } else {
            assert!(!bit(entry, 11) && !bit(entry, 53), "{entry:#x}");
            let write = bit(entry, 7);
            Seen {
                read: bit(entry, 6),
                write: write || dbm,
                execute: !bit(entry, 54),
                dirty: dbm && write,
                clean: dbm && !write,
                ..common
            }
        });
    }
    unreachable!("level 3 has leaves alone")
}
