//! Stream table entries and context descriptors: how they are found, and when they are illegal.

use super::{
    State, address_bits,
    registers::{CR2, RECINVSID, SMMUEN},
    walk::{Class, Fault, Request, Stop},
};
use iommu::PhysAddr;
use std::ops::Range;

/// STE.Config.
pub(super) fn ste_config(ste: &[u64; 8]) -> u64 {
    ste[0] >> 1 & 7
}

/// STE: stage 1 is selected.
pub(super) fn selects_stage_1(ste: &[u64; 8]) -> bool {
    ste_config(ste) & 5 == 5
}

/// STE: stage 2 is selected.
pub(super) fn selects_stage_2(ste: &[u64; 8]) -> bool {
    ste_config(ste) & 6 == 6
}

/// STE.EATS, of which 0 and 1 have a meaning here: split stages are illegal, and there is no permission table.
pub(super) fn full_ats(ste: &[u64; 8]) -> bool {
    ste[1] >> 28 & 3 == 1 && ste_config(ste) & 3 != 0
}

/// STE.S2FWB.
pub(super) fn forces_write_back(ste: &[u64; 8]) -> bool {
    ste[1] >> 25 & 1 != 0
}

/// The fields of an STE that a unit can have, by word.
const STE_FIELDS: [u64; 8] = [
    0xF8FF_FFFF_FFFF_FFFF,
    // S1DSS, S1CIR, S1COR, S1CSH; DRE, CONT, DCP, PPAR, MEV, software's, S2FWB, S1STALLD, EATS, SHCFG.
    0xFF | 0xF << 12 | 0x7F << 17 | 1 << 25 | 1 << 27 | 3 << 28 | 3 << 44 | 1 << 16,
    // S2VMID, VTCR, S2AA64, S2ENDI, S2AFFD, S2PTW, S2HD, S2HA, S2S, S2R.
    0xFFFF | 0x07FF_FFFF << 32,
    // S2TTB.
    0x00FF_FFFF_FFFF_FFF0,
    0,
    0,
    0,
    0,
];

/// The fields of a CD that this unit has, by word.
const CD_FIELDS: [u64; 8] = [
    u64::MAX,
    // HAD0, TTB0.
    0x00FF_FFFF_FFFF_FFF2,
    // HAD1, TTB1.
    0x00FF_FFFF_FFFF_FFF2,
    // MAIR, AMAIR.
    u64::MAX,
    u64::MAX,
    0,
    0,
    0,
];

/// The stage-2 geometry that an STE asks for.
#[derive(Clone, Copy)]
pub(super) struct Geometry {
    pub(super) input_bits: u32,
    pub(super) start: u32,
    pub(super) output_bits: u32,
    pub(super) base: u64,
}

/// One half of the addresses of a CD: TTB0's or TTB1's.
#[derive(Clone, Copy)]
pub(super) struct Half {
    /// EPD: no walk.
    pub(super) disabled: bool,
    /// HAD: the permissions in table descriptors do not count.
    pub(super) flat: bool,
    pub(super) geometry: Geometry,
    granule: u64,
    size_bits: u64,
}

/// The start level of an un-concatenated walk: 4 KiB granule, 9 bits for each level.
fn start_level(input_bits: u32) -> u32 {
    4 - input_bits.saturating_sub(12).div_ceil(9).clamp(1, 4)
}

impl State {
    /// The upper or lower half of the addresses of `cd`.
    pub(super) fn half(&self, cd: &[u64; 8], upper: bool) -> Half {
        let size = if upper { cd[0] >> 16 } else { cd[0] } & 0x3F;
        // The codes of TG1 differ: 2 is 4 KiB.
        let granule = if upper { (cd[0] >> 22 & 3) ^ 2 } else { cd[0] >> 6 & 3 };
        let word = cd[if upper { 2 } else { 1 }];
        let input_bits = 64 - size as u32;
        let output_bits = address_bits(cd[0] >> 32 & 7).min(self.config.output_bits());
        Half {
            disabled: cd[0] >> if upper { 30 } else { 14 } & 1 != 0,
            flat: word & 2 != 0,
            geometry: Geometry {
                input_bits,
                start: start_level(input_bits),
                output_bits,
                base: word & 0x00FF_FFFF_FFFF_FFF0,
            },
            granule,
            size_bits: size,
        }
    }

    /// The stage 2 of `ste`.
    pub(super) fn stage_2_geometry(&self, ste: &[u64; 8]) -> Geometry {
        let w2 = ste[2];
        Geometry {
            input_bits: 64 - (w2 >> 32 & 0x3F) as u32,
            start: [2, 1, 0, 3][(w2 >> 38 & 3) as usize],
            output_bits: address_bits(w2 >> 48 & 7).min(self.config.output_bits()),
            base: ste[3] & 0x00FF_FFFF_FFFF_FFF0,
        }
    }

    /// Finds the STE of a request, in the cache or in memory.
    pub(super) fn ste(&mut self, request: &Request) -> Result<[u64; 8], Stop> {
        let sid = request.sid;
        if u64::from(sid) >> self.stream_bits() != 0 {
            return Err(self.bad_stream());
        }
        let ste = match self.caches.streams.get(&sid) {
            Some(&ste) => ste,
            None => {
                let at = match self.split() {
                    None => self.stream_table() + u64::from(sid) * 64,
                    Some(split) => self.second_level(sid, split)?,
                };
                let ste = self.words(at).map_err(|_| Fault::configuration(0x03, at))?;
                self.caches.streams.insert(sid, ste);
                ste
            }
        };
        if self.ste_is_illegal(&ste) {
            return Err(Fault::configuration(0x04, 0).into());
        }
        Ok(ste)
    }

    /// C_BAD_STREAMID: there is no entry for the stream.
    fn bad_stream(&self) -> Stop {
        let recorded = self.get(CR2) & RECINVSID != 0;
        if recorded { Fault::configuration(0x02, 0).into() } else { Stop::Unrecorded(0x02) }
    }

    /// Finds where the STE of `sid` is in a stream table of two levels, by the first in the cache or in memory.
    fn second_level(&mut self, sid: u32, split: u64) -> Result<u64, Stop> {
        let below = (1u32 << split) - 1;
        let first = sid & !below;
        let descriptor = match self.caches.first_level.get(&first) {
            Some(&(_, descriptor)) => descriptor,
            None => {
                let at = self.stream_table() + u64::from(sid >> split) * 8;
                let fetched = self.memory.device_load(PhysAddr(at));
                let descriptor = fetched.map_err(|_| Fault::configuration(0x03, at))?;
                self.caches.first_level.insert(first, (first | below, descriptor));
                descriptor
            }
        };
        // Span is [4:0]: 2^(Span - 1) entries. None, reserved, or more than SPLIT leaves room for.
        let span = descriptor & 0x1F;
        if span == 0 || span > 11 || span > split + 1 {
            return Err(self.bad_stream());
        }
        if descriptor & !(0x00FF_FFFF_FFFF_FFC0 | 0x1F) != 0 {
            self.violation(format!("L1STD {descriptor:#x}: reserved bits are set"));
        }
        let entries = 1u64 << (span - 1);
        let (pointer, index) = (descriptor & 0x00FF_FFFF_FFFF_FFC0, u64::from(sid & below));
        if index >= entries {
            return Err(self.bad_stream());
        }
        // The unit takes the low bits for zero.
        let table = pointer & !(entries * 64 - 1);
        if table != pointer {
            self.violation(format!("L1STD.L2Ptr {pointer:#x} is not aligned to its {entries} entries"));
        }
        Ok(table + index * 64)
    }

    /// The tables of STEs that the unit can reach from memory or from its caches: where, and how many bytes.
    fn stream_tables(&self) -> Vec<(u64, u64)> {
        let Some(split) = self.split() else { return vec![(self.stream_table(), 64 << self.stream_bits())] };
        let places = 1u64 << self.stream_bits().saturating_sub(split);
        let stored = (0..places).map(|place| PhysAddr(self.stream_table() + place * 8));
        let stored = stored.filter_map(|at| self.memory.device_load(at).ok());
        let cached = self.caches.first_level.values().map(|&(_, descriptor)| descriptor);
        let table = |descriptor: u64| {
            let span = descriptor & 0x1F;
            let bytes = 64 << span.saturating_sub(1);
            let reachable = (1..=split + 1).contains(&span);
            reachable.then_some((descriptor & 0x00FF_FFFF_FFFF_FFC0 & !(bytes - 1), bytes))
        };
        stored.chain(cached).filter_map(table).collect()
    }

    /// Whether `ste` is invalid, or has one of the combinations that end in C_BAD_STE.
    fn ste_is_illegal(&mut self, ste: &[u64; 8]) -> bool {
        if ste[0] & 1 == 0 {
            return true;
        }
        if ste_config(ste) < 4 {
            return false;
        }
        let mut fields = STE_FIELDS;
        if !self.config.forces_write_back() {
            fields[1] &= !(1 << 25);
        }
        // SHCFG, without IDR1.ATTR_TYPES_OVR.
        if self.config.idr1 & 1 << 27 == 0 {
            fields[1] &= !(3 << 44);
        }
        // PPAR.
        if !self.config.pri() || self.config.idr1 >> 6 & 0x1F == 0 {
            fields[1] &= !(1 << 18);
        }
        let reserved: Vec<usize> = (0..8).filter(|&word| ste[word] & !fields[word] != 0).collect();
        if !reserved.is_empty() {
            self.violation(format!("STE {ste:#x?}: reserved bits are set in words {reserved:?}"));
        }
        let (stage_1, stage_2) = (selects_stage_1(ste), selects_stage_2(ste));
        let has = |word: usize, bit: u32| ste[word] >> bit & 1 != 0;
        let config = &self.config;
        if stage_1 && !config.stage_1() || stage_2 && !config.stage_2() {
            return true;
        }
        let stalls_2 = stage_2 && has(2, 57);
        let ats = config.ats() && ste_config(ste) > 4;
        match ste[1] >> 28 & 3 {
            1 if ats && stalls_2 => return true,
            2 if ats => return true,
            _ => {}
        }
        if (stage_1 || stage_2) && config.stage_2() && !config.has(18) && ste[2] & 0xFF00 != 0 {
            return true;
        }
        if stage_1 {
            let contexts = ste[0] >> 59;
            let substreams = u64::from(config.idr1) >> 6 & 0x1F;
            let two_level = self.context_split(ste).is_some() && !config.two_level_contexts();
            let pointer = ste[0] & 0x00FF_FFFF_FFFF_FFC0;
            let beyond = !stage_2 && pointer >> config.output_bits() != 0;
            // Contexts beyond SSIDSIZE are illegal on a part without substreams as well: QEMU rejects them.
            if contexts > substreams || two_level || beyond || has(1, 27) && !config.stalls() {
                return true;
            }
        }
        if stage_2 {
            let Geometry { input_bits, start, output_bits, base } = self.stage_2_geometry(ste);
            let smallest = 12 + 9 * (3 - start) + 1;
            let largest = (12 + 9 * (4 - start) + 4).min(self.config.output_bits().min(48));
            let size = ste[2] >> 32 & 0x3F;
            let illegal = !has(2, 51) // S2AA64=0: no such tables here
                || ste[2] >> 46 & 3 != 0 // S2TG
                || ste[2] >> 38 & 3 == 3 // S2SL0
                || size > 39
                || !(smallest..=largest).contains(&input_bits)
                || base >> output_bits != 0
                || has(2, 52) // S2ENDI
                || has(2, 55) || has(2, 56) // S2HD, S2HA
                || has(2, 57) && !self.config.stalls();
            if !illegal {
                self.check_base_alignment("STE.S2TTB", base, input_bits, start);
            }
            return illegal;
        }
        false
    }

    /// Picks the CD for a request: its index, or none if stage 1 is bypassed.
    pub(super) fn context_index(&self, request: &Request, ste: &[u64; 8]) -> Result<Option<u32>, Stop> {
        let contexts = ste[0] >> 59;
        let default = ste[1] & 3;
        let no_substream = Fault::configuration(0x08, 0);
        let disabled = Fault::configuration(0x06, 0);
        match request.ssid {
            Some(_) if !selects_stage_1(ste) || contexts == 0 => Err(no_substream.into()),
            Some(ssid) if u64::from(ssid) >> contexts != 0 => Err(no_substream.into()),
            Some(0) if default == 2 => Err(disabled.into()),
            Some(ssid) => Ok(Some(ssid)),
            None if !selects_stage_1(ste) => Ok(None),
            None if contexts == 0 || default == 2 => Ok(Some(0)),
            None if default == 1 => Ok(None),
            None => Err(disabled.into()),
        }
    }

    /// Finds CD `index` of a stream, in the cache or in memory.
    pub(super) fn cd(&mut self, request: &Request, ste: &[u64; 8], index: u32) -> Result<[u64; 8], Stop> {
        let key = (request.sid, index);
        let cd = match self.caches.contexts.get(&key) {
            Some(&cd) => cd,
            None => {
                let mut at = match self.context_split(ste) {
                    None => (ste[0] & 0x00FF_FFFF_FFFF_FFC0) + u64::from(index) * 64,
                    Some(split) => self.second_level_context(request, ste, index, split)?,
                };
                if selects_stage_2(ste) {
                    at = self.stage_2(request, ste, at, Class::Cd)?.phys;
                }
                let cd = self.words(at).map_err(|_| Fault::configuration(0x09, at))?;
                self.caches.contexts.insert(key, cd);
                cd
            }
        };
        if self.cd_is_illegal(ste, &cd) {
            return Err(Fault::configuration(0x0A, 0).into());
        }
        Ok(cd)
    }

    /// Log2 of the context descriptors of a second-level table, if the table of `ste` has two levels (S1Fmt).
    fn context_split(&self, ste: &[u64; 8]) -> Option<u32> {
        // With one descriptor, and on a part without substreams, the format is ignored.
        if ste[0] >> 59 == 0 || self.config.idr1 >> 6 & 0x1F == 0 {
            return None;
        }
        match ste[0] >> 4 & 3 {
            1 => Some(6),
            2 => Some(10),
            _ => None,
        }
    }

    /// Finds where CD `index` is in a table of two levels: an address as `ste` has them, which is an IPA with stage 2.
    fn second_level_context(
        &mut self,
        request: &Request,
        ste: &[u64; 8],
        index: u32,
        split: u32,
    ) -> Result<u64, Stop> {
        let below = (1u32 << split) - 1;
        let first = index & !below;
        let descriptor = match self.caches.first_contexts.get(&(request.sid, first)) {
            Some(&(_, descriptor)) => descriptor,
            None => {
                let mut at = (ste[0] & 0x00FF_FFFF_FFFF_FFC0) + u64::from(index >> split) * 8;
                if selects_stage_2(ste) {
                    at = self.stage_2(request, ste, at, Class::Cd)?.phys;
                }
                let fetched = self.memory.device_load(PhysAddr(at));
                let descriptor = fetched.map_err(|_| Fault::configuration(0x09, at))?;
                self.caches.first_contexts.insert((request.sid, first), (first | below, descriptor));
                descriptor
            }
        };
        // V is bit 0, L2Ptr is [55:12].
        let pointer = descriptor & 0x00FF_FFFF_FFFF_F000;
        let beyond = !selects_stage_2(ste) && pointer >> self.config.output_bits() != 0;
        if descriptor & 1 == 0 || beyond {
            return Err(Fault::configuration(0x08, 0).into());
        }
        if descriptor & !(0x00FF_FFFF_FFFF_F000 | 1) != 0 {
            self.violation(format!("L1CD {descriptor:#x}: reserved bits are set"));
        }
        let table = pointer & !((64u64 << split) - 1);
        if table != pointer {
            self.violation(format!("L1CD.L2Ptr {pointer:#x} is not aligned to its table"));
        }
        Ok(table + u64::from(index & below) * 64)
    }

    fn cd_is_illegal(&mut self, ste: &[u64; 8], cd: &[u64; 8]) -> bool {
        let has = |bit: u32| cd[0] >> bit & 1 != 0;
        if !has(31) {
            return true;
        }
        let reserved: Vec<usize> = (0..8).filter(|&word| cd[word] & !CD_FIELDS[word] != 0).collect();
        if !reserved.is_empty() {
            self.violation(format!("CD {cd:#x?}: reserved bits are set in words {reserved:?}"));
        }
        let config = &self.config;
        let (epd0, epd1) = (has(14), has(30));
        let illegal = !has(46) && config.has(26) // A=0 with TERM_MODEL=1
            || has(44) && (!config.stalls() || ste[1] >> 27 & 1 != 0) // S
            || !has(41) // AA64=0: no such tables here
            || has(42) || has(43) // HD, HA
            || cd[0] >> 56 != 0 && !config.has(12) // ASID
            || has(15) && !(epd0 && epd1); // ENDI
        if illegal {
            return true;
        }
        for upper in [false, true] {
            let half = self.half(cd, upper);
            if half.disabled {
                continue;
            }
            let Geometry { input_bits, start, output_bits, base } = half.geometry;
            if half.granule != 0 || !(16..=39).contains(&half.size_bits) || base >> output_bits != 0 {
                return true;
            }
            self.check_base_alignment("CD.TTB", base, input_bits, start);
        }
        false
    }

    /// The unit ignores address bits below the size of the first table.
    fn check_base_alignment(&mut self, name: &str, base: u64, input_bits: u32, start: u32) {
        let bytes = first_table_bytes(input_bits, start);
        if !base.is_multiple_of(bytes) {
            self.violation(format!("{name} {base:#x} is not aligned to the {bytes:#x} bytes of its table"));
        }
    }

    /// Reads an STE or CD from memory.
    fn words(&self, at: u64) -> Result<[u64; 8], crate::memory::OutsideMemory> {
        let mut words = [0; 8];
        for (word, at) in words.iter_mut().zip((at..).step_by(8)) {
            *word = self.memory.device_load(PhysAddr(at))?;
        }
        Ok(words)
    }

    /// The entries that the unit may read at any time and that lie in `range`, as they are.
    ///
    /// That is every STE, and the CDs of streams that it has met already.
    pub(super) fn live_entries(&self, range: &Range<PhysAddr>) -> Vec<LiveEntry> {
        if !self.on(SMMUEN) {
            return Vec::new();
        }
        let mut tables: Vec<_> =
            self.stream_tables().into_iter().map(|(table, bytes)| (Entry::Ste, table, bytes)).collect();
        for ste in self.caches.streams.values().filter(|ste| ste[0] & 1 != 0) {
            if !selects_stage_1(ste) || selects_stage_2(ste) {
                continue;
            }
            let (pointer, log2) = (ste[0] & 0x00FF_FFFF_FFFF_FFC0, ste[0] >> 59);
            let Some(split) = self.context_split(ste) else {
                tables.push((Entry::Cd, pointer, 64 << log2));
                continue;
            };
            let places = 1u64 << log2.saturating_sub(split.into());
            let stored = (0..places).filter_map(|n| self.memory.device_load(PhysAddr(pointer + n * 8)).ok());
            tables.extend(
                stored
                    .filter(|first| first & 1 != 0)
                    .map(|first| (Entry::Cd, first & 0x00FF_FFFF_FFFF_F000, 64 << split)),
            );
        }
        let mut live = Vec::new();
        for (entry, table, bytes) in tables {
            let (first, last) = (range.start.0.max(table), range.end.0.min(table + bytes));
            for at in (first & !63..last).step_by(64) {
                live.extend(self.words(at).map(|words| LiveEntry { entry, at, words }));
            }
        }
        live
    }

    /// Notes entries that changed so that the unit may have read a mixture: it reads word by word, in any order.
    pub(super) fn check_live_entries(&mut self, before: Vec<LiveEntry>) {
        for LiveEntry { entry, at, words: old } in before {
            let Ok(new) = self.words(at) else { continue };
            let changed = (0..8).filter(|&word| old[word] != new[word]).count();
            let valid = match entry {
                Entry::Ste => 1,
                Entry::Cd => 1 << 31,
            };
            if (old[0] | new[0]) & valid != 0 && changed > 1 {
                self.violation(format!(
                    "{entry:?} at {at:#x}: {changed} words changed at once while it is valid or becomes so"
                ));
            }
        }
    }
}

/// Which kind of entry a [`LiveEntry`] is.
#[derive(Clone, Copy, Debug)]
enum Entry {
    Ste,
    Cd,
}

/// An entry that the unit may read at any time.
pub(super) struct LiveEntry {
    entry: Entry,
    at: u64,
    words: [u64; 8],
}

/// The size in bytes of the first table, or of the tables side by side, of a walk; at least 64.
pub(super) fn first_table_bytes(input_bits: u32, start: u32) -> u64 {
    let shift = super::caches::level_shift(start);
    (8u64 << input_bits.saturating_sub(shift)).max(64)
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config, Refusal,
        bench::{
            Bench, CONTEXTS, DEVICE, IOVA, IPA, PAGE, PAGE_2, PASID, SID, STREAMS, SYNC, context, stage_1,
            stage_2,
        },
    };
    use crate::golden_smmuv3 as golden;
    use iommu::{Bus, Pasid, StreamId};

    #[test]
    fn a_stream_is_found_by_its_number() {
        let bench = Bench::attached(Config::qemu(), golden::STE_ABORT);

        assert_eq!(bench.read(IOVA), Err(Refusal::Aborted));
        bench.assert_events(&[]);
        let other = bench.unit.dma_read(StreamId(0x107), None, IOVA, 1);
        assert_eq!(other, Err(Refusal::Fault(0x04)));
        bench.assert_events(&[[golden::C_BAD_STE[0] ^ 0xF << 32, 0, 0, 0]]);
        let last = bench.unit.dma_read(StreamId(0x200), None, IOVA, 1);
        assert_eq!(last, Err(Refusal::Fault(0x02)));
        bench.assert_events(&[[golden::C_BAD_STREAMID[0] & 0xFF | 0x200 << 32, 0, 0, 0]]);
        bench.assert_lawful();
    }

    #[test]
    fn a_stream_that_is_not_valid_is_remembered_as_such() {
        let bench = Bench::started(Config::qemu());
        assert_eq!(bench.read(IPA), Err(Refusal::Fault(0x04)));
        bench.assert_events(&[golden::C_BAD_STE]);

        bench.put(STREAMS + SID * 64, &golden::STE_ABORT);
        assert_eq!(bench.read(IPA), Err(Refusal::Fault(0x04)));
        bench.set_ste(golden::STE_ABORT);

        assert_eq!(bench.read(IPA), Err(Refusal::Aborted));
    }

    #[test]
    fn a_stream_table_without_memory_is_a_fetch_fault() {
        use super::super::registers::{SMMUEN, STRTAB_BASE};
        let bench = Bench::started(Config::qemu());
        bench.switch(SMMUEN, false);
        bench.unit.write64(STRTAB_BASE, golden::STRTAB_BASE);
        bench.enable(SMMUEN);

        assert_eq!(bench.read(IOVA), Err(Refusal::Fault(0x03)));
        bench.assert_events(&[[golden::F_STE_FETCH[0], 0, 0, 0x8020_0000 + SID * 64]]);
    }

    /// Where the tests below have a table of the second level.
    const SECOND: u64 = STREAMS + 0x2_0000;

    /// A unit whose stream table has two levels, LOG2SIZE 16, and nothing in the first.
    fn two_levels(split: u32) -> Bench {
        use super::super::registers::{SMMUEN, STRTAB_BASE_CFG};
        let bench = Bench::started(Config::qemu());
        bench.switch(SMMUEN, false);
        bench.unit.write32(STRTAB_BASE_CFG, 1 << 16 | split << 6 | 16);
        bench.enable(SMMUEN);
        bench
    }

    fn read(bench: &Bench, sid: u32) -> Result<Vec<u8>, Refusal> {
        bench.unit.dma_read(StreamId(sid), None, IOVA, 1)
    }

    #[test]
    fn a_first_level_descriptor_leads_to_the_streams_of_its_span() {
        // L4: SID 0x108 with SPLIT 8 is entry 8 below the second descriptor. Span 9 is all of 256, Span 4 is 8 of them.
        for (split, span, first, inside, outside) in [
            (8, 9, 0x100, &[0x100, 0x108, 0x1FF][..], &[0xFF, 0x200][..]),
            (8, 4, 0x100, &[0x100, 0x107], &[0x108, 0x1FF]),
            (8, 1, 0x100, &[0x100], &[0x101]),
            (6, 7, 0x100, &[0x100, 0x13F], &[0xFF, 0x140]),
            (10, 11, 0, &[0, 0x3FF], &[0x400]),
            // Nothing, more than SPLIT leaves room for, and what is reserved.
            (8, 0, 0x100, &[], &[0x100, 0x108]),
            (8, 10, 0x100, &[], &[0x100]),
            (10, 12, 0, &[], &[0]),
            (10, 31, 0, &[], &[0]),
        ] {
            let bench = two_levels(split);
            for index in 0..256 {
                bench.put(SECOND + index * 64, &golden::STE_ABORT);
            }
            bench.put(SECOND + 0x3FF * 64, &golden::STE_ABORT);
            bench.put(STREAMS + (first >> split) * 8, &[SECOND | span]);

            for &sid in inside {
                assert_eq!(read(&bench, sid), Err(Refusal::Aborted), "SPLIT {split}, Span {span}: {sid:#x}");
            }
            bench.assert_events(&[]);
            for &sid in outside {
                assert_eq!(
                    read(&bench, sid),
                    Err(Refusal::Fault(0x02)),
                    "SPLIT {split}, Span {span}: {sid:#x}"
                );
                bench.assert_events(&[[u64::from(sid) << 32 | 0x02, 0, 0, 0]]);
            }
            bench.assert_lawful();
        }
    }

    #[test]
    fn the_entry_of_a_stream_is_read_where_its_descriptor_says() {
        let bench = two_levels(8);
        bench.put(STREAMS + 8, &[golden::L1_STREAMS]);

        assert_eq!(read(&bench, 0x108), Err(Refusal::Fault(0x03)));

        bench.assert_events(&[golden::F_STE_FETCH]);
    }

    #[test]
    fn a_first_level_descriptor_is_remembered_until_the_way_to_a_stream_is_forgotten() {
        let bench = two_levels(8);
        bench.put(SECOND + 8 * 64, &golden::STE_ABORT);
        bench.put(SECOND + 9 * 64, &golden::STE_ABORT);
        assert_eq!(read(&bench, 0x108), Err(Refusal::Fault(0x02)));
        bench.put(STREAMS + 8, &[SECOND | 9]);
        assert_eq!(read(&bench, 0x109), Err(Refusal::Fault(0x02)), "another stream of the same descriptor");

        // K3 has Leaf = 1. The same for another stream, and Leaf = 0 for a stream of another descriptor.
        for command in [golden::CFGI_STE, [0x0000_0109_0000_0003, 1], [0x0000_0200_0000_0003, 0]] {
            bench.submit(&[command, SYNC]);
            assert_eq!(read(&bench, 0x108), Err(Refusal::Fault(0x02)), "{command:x?}");
        }
        // Leaf = 0, of any stream of the descriptor.
        bench.submit(&[[0x0000_01FF_0000_0003, 0], SYNC]);
        assert_eq!(read(&bench, 0x108), Err(Refusal::Aborted));

        // And the way back: the entry itself is remembered too, longer than the descriptor.
        bench.put(STREAMS + 8, &[0]);
        assert_eq!(read(&bench, 0x109), Err(Refusal::Aborted));
        bench.submit(&[[0x0000_01FF_0000_0003, 0], SYNC]);
        assert_eq!(
            (read(&bench, 0x108), read(&bench, 0x10A)),
            (Err(Refusal::Aborted), Err(Refusal::Fault(0x02)))
        );
        // K4: 256 streams from 0x100.
        bench.submit(&[golden::CFGI_STE_RANGE, SYNC]);
        assert_eq!(read(&bench, 0x109), Err(Refusal::Fault(0x02)));
        bench.assert_lawful();
    }

    #[test]
    fn a_range_or_everything_is_forgotten_with_the_way_there() {
        for command in [golden::CFGI_STE_RANGE, golden::CFGI_ALL] {
            let bench = two_levels(6);
            bench.put(SECOND + 8 * 64, &golden::STE_ABORT);
            assert_eq!(read(&bench, 0x108), Err(Refusal::Fault(0x02)));
            bench.put(STREAMS + 4 * 8, &[SECOND | 7]);

            bench.submit(&[command, SYNC]);

            assert_eq!(read(&bench, 0x108), Err(Refusal::Aborted), "{command:x?}");
        }
    }

    #[test]
    fn a_first_level_descriptor_that_is_crooked_is_noted() {
        let bench = two_levels(8);
        bench.put(SECOND + 8 * 64, &golden::STE_ABORT);
        bench.put(STREAMS + 8, &[SECOND | 0x40 | 9]);
        assert_eq!(read(&bench, 0x108), Err(Refusal::Aborted), "the unit takes the low bits for zero");
        bench.assert_broken("L1STD.L2Ptr");

        let bench = two_levels(8);
        bench.put(STREAMS + 8, &[SECOND | 1 << 5 | 1 << 60 | 9]);
        assert_eq!(read(&bench, 0x108), Err(Refusal::Fault(0x04)));
        bench.assert_broken("reserved bits");
    }

    #[test]
    fn a_first_level_without_memory_is_a_fetch_fault_and_is_not_remembered() {
        use super::super::registers::{SMMUEN, STRTAB_BASE};
        let bench = two_levels(8);
        bench.switch(SMMUEN, false);
        bench.unit.write64(STRTAB_BASE, golden::STRTAB_BASE);
        bench.enable(SMMUEN);

        // L4: the descriptor of SID 0x108 is at 0x80200008.
        assert_eq!(read(&bench, 0x108), Err(Refusal::Fault(0x03)));
        bench.assert_events(&[[golden::F_STE_FETCH[0], 0, 0, 0x8020_0008]]);
        assert_eq!(read(&bench, 0x108), Err(Refusal::Fault(0x03)));
    }

    #[test]
    fn entries_that_a_remembered_descriptor_leads_to_are_live() {
        let bench = two_levels(8);
        let memory = bench.memory();
        let mut table = memory.take(((SECOND - STREAMS) / 8 + 16) as usize, 8);
        let at = table.words() - 16;
        table.clear();
        let mut publish = |words: [u64; 4]| {
            words.iter().enumerate().for_each(|(n, &word)| table.store(at + n, word));
            bench.unit.publish(table.range(at, 4));
            bench.unit.violations().len()
        };
        assert_eq!(publish([1, 2, 3, 4]), 0, "nothing leads there");
        assert_eq!(publish([0; 4]), 0);

        bench.put(STREAMS + 8, &[SECOND | 9]);
        assert_eq!(publish([1, 2, 3, 4]), 1);

        bench.assert_broken("Ste at");
    }

    #[test]
    fn bypass_passes_addresses_as_they_are() {
        let mut bench = Bench::attached(Config::full(), golden::STE_BYPASS);
        let page = bench.page();
        bench.put(page, &[7]);

        assert_eq!(bench.read(iommu::Iova(page)), Ok(7));
        let with_pasid = bench.unit.dma_read(DEVICE, Some(Pasid::from_low_bits(0x20)), IOVA, 1);
        assert_eq!(with_pasid, Err(Refusal::Fault(0x08)));
        bench.assert_events(&[golden::C_BAD_SUBSTREAMID]);
        assert_eq!(bench.read(IOVA), Err(Refusal::Fault(0x11)));
        bench.assert_events(&[[SID << 32 | 0x11, 2 << 40 | 1 << 35, IOVA.0, 0]]);
    }

    #[test]
    fn illegal_stream_table_entries_are_refused() {
        type Change = fn(&mut [u64; 8]);
        let cases: &[(bool, Change)] = &[
            (false, |ste| ste[0] &= !1),
            (false, |ste| ste[3] |= 1 << 40),
            (false, |ste| ste[2] &= !(1 << 51)),
            (false, |ste| ste[2] |= 1 << 46),
            (false, |ste| ste[2] |= 3 << 38),
            // T0SZ 24 needs 17 tables and more at level 2, and is too small for level 0.
            (false, |ste| ste[2] &= !(3 << 38)),
            (false, |ste| ste[2] = ste[2] & !(3 << 38) | 2 << 38 | 63 << 32),
            (false, |ste| ste[2] |= 1 << 52),
            (false, |ste| ste[2] |= 1 << 56),
            // T0SZ 16: more bits than OAS.
            (false, |ste| ste[2] = ste[2] & !(0xFF << 32) | 0x90 << 32),
            (false, |ste| *ste = golden::STE_STALL_ATS),
            (true, |ste| ste[0] |= 21 << 59),
            (true, |ste| ste[0] |= 1 << 50),
            (true, |ste| ste[1] = ste[1] & !(3 << 28) | 2 << 28),
        ];
        for (at, (first, change)) in cases.iter().enumerate() {
            let config = Config::full();
            let mut ste = if *first { stage_1(&config, 0) } else { stage_2(&config) };
            change(&mut ste);
            let bench = Bench::attached(config, ste);

            assert_eq!(bench.read(IPA), Err(Refusal::Fault(0x04)), "case {at}");
            bench.assert_events(&[golden::C_BAD_STE]);
            bench.assert_lawful();
        }
    }

    #[test]
    fn a_part_that_lacks_a_feature_refuses_entries_that_use_it() {
        let full = Config::full();
        for (config, ste) in [
            (Config { idr0: full.idr0 & !1, ..full }, stage_2(&full)),
            (Config { idr0: full.idr0 & !2, ..full }, stage_1(&full, 0)),
            (Config::qemu(), golden::STE_STALL),
            (Config::qemu(), golden::STE_STAGE_1),
            (Config::qemu(), stage_1(&Config::qemu(), 3)),
            // Tables of two levels on a part without CD2L, in both formats.
            (Config { idr0: full.idr0 & !(1 << 19), ..full }, with_format(stage_1(&full, 3), 1)),
            (Config { idr0: full.idr0 & !(1 << 19), ..full }, with_format(stage_1(&full, 3), 2)),
        ] {
            let bench = Bench::attached(config, ste);

            assert_eq!(bench.read(IPA), Err(Refusal::Fault(0x04)), "{ste:x?}");
        }
    }

    #[test]
    fn reserved_bits_are_noted() {
        let config = Config::qemu();
        let mut ste = stage_1(&config, 0);
        ste[5] = 1;
        let bench = Bench::attached(config, ste);

        assert_eq!(bench.read(IOVA), Err(Refusal::Fault(0x10)));
        bench.assert_broken("reserved bits are set in words [5]");
    }

    #[test]
    fn an_attribute_is_overridden_where_the_unit_can() {
        let full = Config::full();
        for (idr1, broken) in [(full.idr1, false), (full.idr1 & !(1 << 27), true)] {
            assert_word_1_is_lawful(Config { idr1, ..full }, 1 << 44, !broken);
        }
    }

    /// Has a stage 1 entry with `bits` in its word 1 looked at, which are reserved unless that is `lawful`.
    fn assert_word_1_is_lawful(config: Config, bits: u64, lawful: bool) {
        let mut ste = stage_1(&config, 0);
        ste[1] |= bits;
        let bench = Bench::attached(config, ste);

        assert_eq!(bench.read(IOVA), Err(Refusal::Fault(0x10)));

        if lawful {
            bench.assert_lawful();
        } else {
            bench.assert_broken("reserved bits are set in words [1]");
        }
    }

    #[test]
    fn a_bit_about_automatic_answers_needs_page_requests_and_pasids() {
        let full = Config::full();
        let [no_requests, no_pasids] = [
            Config { idr0: full.idr0 & !(1 << 16), ..full },
            Config { idr1: full.idr1 & !(0x1F << 6), ..full },
        ];
        for (config, broken) in [(full, false), (no_requests, true), (no_pasids, true)] {
            assert_word_1_is_lawful(config, 1 << 18, !broken);
        }
    }

    #[test]
    fn a_pasid_picks_its_context() {
        let config = Config::full();
        let mut bench = Bench::attached(config, stage_1(&config, 3));
        bench.map_page(PAGE);
        let read = |pasid: Option<u64>| {
            bench.unit.dma_read(DEVICE, pasid.map(Pasid::from_low_bits), IOVA, 1).map(|_| ())
        };

        assert_eq!(read(None), Ok(()));
        assert_eq!(read(Some(5)), Ok(()));
        assert_eq!(read(Some(8)), Err(Refusal::Fault(0x08)));
        assert_eq!(read(Some(0)), Err(Refusal::Fault(0x06)));
        assert_eq!(read(Some(3)), Err(Refusal::Fault(0x0A)));

        bench.assert_events(&[
            [golden::C_BAD_SUBSTREAMID[0] & !(0xF_FFFF << 12) | 8 << 12, 0, 0, 0],
            [SID << 32 | 0x06, 0, 0, 0],
            [SID << 32 | 3 << 12 | 1 << 11 | 0x0A, 0, 0, 0],
        ]);
        bench.assert_lawful();
    }

    #[test]
    fn without_a_pasid_the_default_substream_decides() {
        let config = Config::full();
        for (default, expected) in
            [(0, Refusal::Fault(0x06)), (1, Refusal::Fault(0x11)), (3, Refusal::Fault(0x06))]
        {
            let mut ste = stage_1(&config, 3);
            ste[1] = ste[1] & !3 | default;
            let mut bench = Bench::attached(config, ste);
            bench.map_page(PAGE);

            assert_eq!(bench.read(IOVA), Err(expected), "S1DSS {default}");
            assert!(bench.unit.dma_read(DEVICE, Some(PASID), IOVA, 1).is_ok());
        }
    }

    #[test]
    fn illegal_context_descriptors_are_refused() {
        type Change = fn(&mut [u64; 8]);
        let cases: &[Change] = &[
            |cd| cd[0] &= !(1 << 31),
            |cd| cd[0] &= !(1 << 41),
            |cd| cd[0] &= !(1 << 46),
            |cd| cd[0] |= 1 << 44,
            |cd| cd[0] |= 1 << 43,
            |cd| cd[0] |= 1 << 15,
            |cd| cd[0] |= 1 << 6,
            |cd| cd[0] = cd[0] & !0x3F | 15,
            |cd| cd[0] = cd[0] & !0x3F | 40,
            |cd| cd[1] |= 1 << 44,
            // The upper half, with T1SZ zero.
            |cd| cd[0] &= !(1 << 30),
        ];
        for (at, change) in cases.iter().enumerate() {
            let config = Config::qemu();
            let mut cd = context(1);
            change(&mut cd);
            let bench = Bench::attached(config, stage_1(&config, 0));
            bench.put(CONTEXTS, &cd);

            assert_eq!(bench.read(IOVA), Err(Refusal::Fault(0x0A)), "case {at}");
            bench.assert_events(&[[SID << 32 | 0x0A, 0, 0, 0]]);
            bench.assert_lawful();
        }
    }

    #[test]
    fn contexts_without_memory_are_a_fetch_fault() {
        let config = Config::full();
        let mut ste = stage_1(&config, 3);
        ste[0] = ste[0] & !CONTEXTS | 0xB001_0000;
        let bench = Bench::attached(config, ste);

        let read = bench.unit.dma_read(DEVICE, Some(PASID), IOVA, 1);

        assert_eq!(read, Err(Refusal::Fault(0x09)));
        bench.assert_events(&[golden::F_CD_FETCH]);
    }

    #[test]
    fn a_valid_entry_that_changes_in_several_words_at_once_is_noted() {
        let bench = Bench::started(Config::qemu());
        let memory = bench.memory();
        let mut entry = memory.take(16, 8);
        bench.assert_lawful();
        // The first words that are handed out are the start of the stream table.
        assert_eq!(entry.phys().0, STREAMS);
        entry.clear();
        let mut publish = |words: [u64; 4]| {
            words.iter().enumerate().for_each(|(at, &word)| entry.store(8 + at, word));
            bench.unit.publish(entry.range(8, 8));
            bench.unit.violations().len()
        };

        let [w0, w1, w2, w3, ..] = stage_2(&Config::qemu());
        assert_eq!(publish([0, w1, w2, w3]), 0);
        assert_eq!(publish([w0, w1, w2, w3]), 0);
        assert_eq!(publish([w0, w1, w2, w3 + 0x4000]), 0);
        assert_eq!(publish([w0, w1, w2 + 1, w3]), 1);
        assert_eq!(publish([0, 0, 0, 0]), 2);
        assert_eq!(publish([w0, w1, w2, w3]), 3);

        assert!(bench.unit.violations()[0].contains("Ste at 0x800000040: 2 words"));
    }

    #[test]
    fn a_stage_2_table_is_aligned_to_all_of_its_parts() {
        let config = Config::qemu();
        let mut ste = stage_2(&config);
        ste[3] |= 0x1000;
        let mut bench = Bench::attached(config, ste);
        bench.map_page_2(PAGE_2);

        assert!(bench.read(IPA).is_ok(), "the unit ignores the bits");
        assert!(bench.unit.violations()[0].contains("STE.S2TTB"));
    }
    #[test]
    fn a_context_descriptor_in_use_changes_word_by_word_too() {
        let config = Config::qemu();
        let bench = Bench::started(config);
        let memory = bench.memory();
        // Up to the context descriptors, and these.
        let mut contexts = memory.take(((CONTEXTS - STREAMS) / 8 + 8) as usize, 8);
        let first = contexts.words() - 8;
        assert_eq!(contexts.range(first, 8).start.0, CONTEXTS);
        bench.set_ste(stage_1(&config, 0));
        let [w0, w1, _, w3, ..] = context(1);
        let mut publish = |words: [u64; 8]| {
            words.iter().enumerate().for_each(|(at, &word)| contexts.store(first + at, word));
            bench.unit.publish(contexts.range(first, 8));
            bench.unit.violations().len()
        };

        assert_eq!(publish([w0, w1, 0, w3, 0, 0, 0, 0]), 0, "the unit does not know the stream yet");
        assert_eq!(bench.read(IOVA), Err(Refusal::Fault(0x10)));
        assert_eq!(publish([w0, w1 + 0x1000, 0, w3, 0, 0, 0, 0]), 0);
        assert_eq!(publish([w0 + 1, w1, 0, w3, 0, 0, 0, 0]), 1);

        bench.assert_broken("Cd at");
    }

    /// `ste` with S1Fmt.
    fn with_format(mut ste: [u64; 8], format: u64) -> [u64; 8] {
        ste[0] = ste[0] & !(3 << 4) | format << 4;
        ste
    }

    /// A two-level table of context descriptors at [`CONTEXTS`] and the second-level tables of these SubstreamIDs, each with
    /// a context of ASID 3.
    fn with_contexts(bench: &mut Bench, split: u64, ssids: &[u32]) {
        bench.put(CONTEXTS, &[0; 512]);
        for &ssid in ssids {
            let ssid = u64::from(ssid);
            // A second-level table of 1024 has 64 KiB; those of the bench are at the next such boundary.
            let table = if split == 6 { bench.page() } else { LARGE };
            bench.put(CONTEXTS + (ssid >> split) * 8, &[table | 1]);
            bench.put(table + (ssid & ((1 << split) - 1)) * 64, &context(3));
        }
    }

    /// 64 KiB at a boundary of 64 KiB, in which pages of the bench are only handed out late.
    const LARGE: u64 = crate::memory::BASE.0 + 0x3_0000;

    fn read_with(bench: &Bench, ssid: u32) -> Result<(), Refusal> {
        bench.unit.dma_read(DEVICE, Some(Pasid::from_low_bits(ssid.into())), IOVA, 1).map(|_| ())
    }

    #[test]
    fn a_table_of_two_levels_is_indexed_by_the_upper_and_lower_bits_of_a_substream() {
        // L5, L6: SSID 0x405 is entry 1 of the first level and 5 of the second with S1Fmt 2, entry 0x10 and 5 with S1Fmt 1.
        for (format, split, ssid, near, far) in [(1, 6, 0x405, 0x406, 0x445), (2, 10, 0x405, 0x7FF, 0x805)] {
            let config = Config::full();
            let mut bench = Bench::attached(config, with_format(stage_1(&config, 12), format));
            with_contexts(&mut bench, split, &[ssid]);
            bench.map_page(PAGE);

            assert_eq!(read_with(&bench, ssid), Ok(()), "S1Fmt {format}");
            assert_eq!(read_with(&bench, near), Err(Refusal::Fault(0x0A)), "S1Fmt {format}");
            // No table: C_BAD_SUBSTREAMID. So is what S1CDMax does not reach.
            assert_eq!(read_with(&bench, far), Err(Refusal::Fault(0x08)), "S1Fmt {format}");
            assert_eq!(read_with(&bench, 1 << 12), Err(Refusal::Fault(0x08)), "S1Fmt {format}");
            bench.assert_lawful();
        }
    }

    #[test]
    fn a_first_level_descriptor_of_contexts_is_remembered_until_the_way_is_forgotten() {
        let config = Config::full();
        let mut bench = Bench::attached(config, with_format(stage_1(&config, 12), 1));
        with_contexts(&mut bench, 6, &[]);
        bench.map_page(PAGE);
        assert_eq!(read_with(&bench, 0x405), Err(Refusal::Fault(0x08)));
        with_contexts(&mut bench, 6, &[0x405]);
        assert_eq!(read_with(&bench, 0x405), Err(Refusal::Fault(0x08)), "that there was none is remembered");

        // CFGI_CD of it with Leaf, of another table without, of another stream.
        for command in [
            [0x0000_0108_0040_5005, 1],
            [0x0000_0108_0044_5005, 0],
            [0x0000_0109_0040_5005, 0],
            [0x0109 << 32 | 6, 0],
        ] {
            bench.submit(&[command, SYNC]);
            assert_eq!(read_with(&bench, 0x405), Err(Refusal::Fault(0x08)), "{command:x?}");
        }
        bench.submit(&[[0x0000_0108_0040_6005, 0], SYNC]);
        assert_eq!(read_with(&bench, 0x405), Ok(()), "one of the same table");

        // The descriptor itself is remembered longer than the way.
        bench.put(CONTEXTS + 0x10 * 8, &[0]);
        bench.submit(&[[0x0000_0108_0040_6005, 0], SYNC]);
        assert_eq!((read_with(&bench, 0x405), read_with(&bench, 0x407)), (Ok(()), Err(Refusal::Fault(0x08))));
        bench.submit(&[golden::CFGI_CD_ALL, SYNC]);
        assert_eq!(read_with(&bench, 0x405), Err(Refusal::Fault(0x08)));
        bench.assert_lawful();
    }

    #[test]
    fn a_context_descriptor_is_remembered_until_it_is_forgotten() {
        for forget in [golden::CFGI_CD, golden::CFGI_CD_ALL, golden::CFGI_STE] {
            let config = Config::full();
            let mut bench = Bench::attached(config, stage_1(&config, 3));
            bench.map_page(PAGE);
            assert_eq!(read_with(&bench, 5), Ok(()));

            bench.put(CONTEXTS + 5 * 64, &[0; 8]);
            bench.submit(&[[0x0000_0108_0000_4005, 0], [0x0000_0109_0000_5005, 0], SYNC]);
            assert_eq!(read_with(&bench, 5), Ok(()), "another, and another stream's");
            bench.submit(&[forget, SYNC]);

            assert_eq!(read_with(&bench, 5), Err(Refusal::Fault(0x0A)), "{forget:x?}");
        }
    }

    #[test]
    fn both_levels_of_a_nested_table_of_contexts_are_found_through_stage_2() {
        let config = Config::full();
        let second = crate::golden_smmuv3::STE_STAGE_2;
        let nested = |contexts: u64| {
            let first = with_format(stage_1(&config, 12), 1);
            let head = first[0] & !0x00FF_FFFF_FFFF_FFC0 | contexts | 4;
            [head, first[1], second[2], super::super::bench::STAGE_2, 0, 0, 0, 0]
        };
        let mut bench = Bench::attached(config, nested(CONTEXTS));
        with_contexts(&mut bench, 6, &[0x405]);
        let leaf = bench.word(CONTEXTS + 0x10 * 8) & !1;
        let (_, page) = bench.map_page(PAGE);
        let top = super::super::bench::STAGE_2;
        // Everything is at its own IPA but for the two levels, which the guest has elsewhere.
        for at in (crate::memory::BASE.0..crate::memory::BASE.0 + 0x3_8000).step_by(0x1000) {
            bench.map(top, 1, at, 3, at | PAGE_2);
        }
        let [first, table] = [0x10_0000_0000, 0x10_0000_1000];
        bench.map(top, 1, first, 3, CONTEXTS | PAGE_2);
        bench.map(top, 1, table, 3, leaf | PAGE_2);
        bench.put(CONTEXTS + 0x10 * 8, &[table | 1]);
        bench.set_ste(nested(first));
        bench.put(page, &[9]);

        assert_eq!(read_with(&bench, 0x405), Ok(()));

        // Either level that stage 2 does not map is a fault of stage 2, on the way to a context (class 0).
        for gone in [first, table] {
            bench.map(top, 1, gone, 3, 0);
            bench.submit(&[golden::CFGI_ALL, SYNC, golden::TLBI_NSNH_ALL, SYNC]);
            assert_eq!(read_with(&bench, 0x405), Err(Refusal::Fault(0x10)));
            let at = if gone == first { first + 0x10 * 8 } else { table + 5 * 64 };
            let event = [SID << 32 | 0x405 << 12 | 1 << 11 | 0x10, 1 << 35 | 1 << 39, IOVA.0, at & !0xFFF];
            bench.assert_events(&[event]);
            bench.map(top, 1, gone, 3, if gone == first { CONTEXTS } else { leaf } | PAGE_2);
        }
        bench.assert_lawful();
    }

    #[test]
    fn forced_write_back_is_a_field_of_parts_that_have_it() {
        let full = Config::full();
        let mut ste = stage_2(&full);
        ste[1] |= 1 << 25;
        for (config, lawful) in [(full, true), (Config { idr3: full.idr3 & !(1 << 8), ..full }, false)] {
            let mut bench = Bench::attached(config, ste);
            // D6: MemAttr 6 is write-back, whatever stage 1 says.
            bench.map_page_2(golden::STAGE_2_PAGE_FWB & !0x8000_0000);

            assert!(bench.read(IPA).is_ok());

            if lawful {
                bench.assert_lawful();
            } else {
                bench.assert_broken("reserved bits are set in words [1]");
            }
        }
    }

    #[test]
    fn a_leaf_that_forced_write_back_gives_no_meaning_is_noted() {
        let config = Config::full();
        let mut ste = stage_2(&config);
        ste[1] |= 1 << 25;
        let mut bench = Bench::attached(config, ste);
        // MemAttr 0xF, which is write-back without S2FWB.
        bench.map_page_2(PAGE_2);

        assert!(bench.read(IPA).is_ok());

        bench.assert_broken("S2FWB");
    }
}
