//! The way from a request to memory: stream, context, stage 1, stage 2.

use super::{
    State,
    caches::{Leaf, Tag, level_shift},
    configuration::{
        Geometry, first_table_bytes, forces_write_back, selects_stage_1, selects_stage_2, ste_config,
    },
};
use iommu::PhysAddr;

/// What a device asks for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    Read,
    Write,
    /// An ATS translation request: asks what is permitted.
    Translation,
}

/// One request of a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) sid: u32,
    pub(super) ssid: Option<u32>,
    pub(super) address: u64,
    pub(super) kind: Kind,
}

/// CLASS: what the unit was about to reach when it met a fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Class {
    /// A context descriptor.
    Cd = 0,
    /// A stage-1 table.
    Table = 1,
    /// What the request is for.
    Input = 2,
}

/// What becomes of a request that meets one of events 10 to 13, as CD or STE say.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Policy {
    pub(super) stall: bool,
    pub(super) record: bool,
    /// Else it completes, reads with zero.
    pub(super) abort: bool,
}

/// What all other faults do.
const ABORT: Policy = Policy { stall: false, record: true, abort: true };

/// Why a request was stopped, and what its event record says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Fault {
    /// The event number.
    pub(super) id: u8,
    pub(super) stage_2: bool,
    pub(super) class: Class,
    /// Word 3 of the record: IPA or FetchAddr.
    pub(super) address: u64,
    pub(super) policy: Policy,
}

impl Fault {
    /// Events 01 to 0A: of no stage and class.
    pub(super) fn configuration(id: u8, fetch: u64) -> Self {
        Self { id, stage_2: false, class: Class::Cd, address: fetch, policy: ABORT }
    }
}

/// How a request ends without reaching memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Stop {
    /// STE.Config says abort; there is no event for that.
    Silent,
    /// An event that is not recorded by choice of software (RECINVSID).
    Unrecorded(u8),
    /// An event.
    Fault(Fault),
}

impl From<Fault> for Stop {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Where a request may go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Mapping {
    pub(super) phys: u64,
    /// The mapping covers 2^`log2` bytes, naturally aligned.
    pub(super) log2: u32,
    pub(super) read: bool,
    pub(super) write: bool,
    /// What it was made from; none for an address that is passed as it is.
    pub(super) tag: Option<Tag>,
}

impl Mapping {
    fn permits(&self, kind: Kind) -> bool {
        match kind {
            Kind::Read => self.read,
            Kind::Write => self.write,
            Kind::Translation => true,
        }
    }
}

/// A walk of one stage.
#[derive(Clone, Copy)]
struct Walk {
    tag: Tag,
    geometry: Geometry,
    stage_2: bool,
    /// APTable does not count.
    flat: bool,
    class: Class,
    /// The IPA that a stage-2 fault reports.
    ipa: u64,
    policy: Policy,
}

impl Walk {
    fn fault(&self, id: u8) -> Stop {
        let address = if self.stage_2 { self.ipa & !0xFFF } else { 0 };
        Fault { id, stage_2: self.stage_2, class: self.class, address, policy: self.policy }.into()
    }

    /// F_WALK_EABT on the descriptor at `fetch`.
    fn unreadable(&self, fetch: u64) -> Stop {
        let class = if self.stage_2 { self.class } else { Class::Table };
        Fault { id: 0x0B, stage_2: self.stage_2, class, address: fetch, policy: ABORT }.into()
    }
}

/// Address bits 47:12 of a descriptor.
const ADDRESS: u64 = 0x0000_FFFF_FFFF_F000;
/// Of a block descriptor: nT, which is no part of the address.
const NT: u64 = 1 << 16;

/// What a walk found: the leaf descriptor, its level, and APTable on the way.
struct Found {
    descriptor: u64,
    level: u32,
    /// APTable: no unprivileged access, no writes.
    tables: u64,
}

impl State {
    /// Translates `request`. What it meets on the way is remembered in the caches.
    pub(super) fn translate(&mut self, request: &Request) -> Result<Mapping, Stop> {
        let ste = self.ste(request)?;
        if ste_config(&ste) < 4 {
            return Err(Stop::Silent);
        }
        let index = self.context_index(request, &ste)?;
        let Some(index) = index else {
            if request.address >> self.config.output_bits() != 0 {
                let too_large = Fault { class: Class::Input, ..Fault::configuration(0x11, 0) };
                return Err(too_large.into());
            }
            return if selects_stage_2(&ste) {
                self.stage_2(request, &ste, request.address, Class::Input)
            } else {
                Ok(as_it_is(request.address))
            };
        };
        let cd = self.cd(request, &ste, index)?;
        self.stage_1(request, &ste, &cd)
    }

    /// Stage 1, and stage 2 for whatever stage 1 reaches if the STE selects both.
    fn stage_1(&mut self, request: &Request, ste: &[u64; 8], cd: &[u64; 8]) -> Result<Mapping, Stop> {
        let nested = selects_stage_2(ste);
        let vmid = if self.config.stage_2() { ste[2] as u16 } else { 0 };
        let asid = (cd[0] >> 48) as u16;
        let own = Tag::Stage1 { vmid, asid: Some(asid) };
        let global = Tag::Stage1 { vmid, asid: None };
        let upper = request.address >> 55 & 1 != 0;
        let half = self.half(cd, upper);
        let walk = Walk {
            tag: own,
            geometry: half.geometry,
            stage_2: false,
            flat: half.flat,
            class: Class::Input,
            ipa: 0,
            policy: Policy {
                stall: cd[0] >> 44 & 1 != 0,
                record: cd[0] >> 45 & 1 != 0,
                abort: cd[0] >> 46 & 1 != 0,
            },
        };
        // The size of a half that is not walked means nothing.
        if half.disabled {
            return Err(walk.fault(0x10));
        }
        // Bits above the range are copies of bit 55.
        let input_bits = half.geometry.input_bits;
        let above = request.address >> input_bits;
        if above != if upper { u64::MAX >> input_bits } else { 0 } {
            return Err(walk.fault(0x10));
        }
        if let Some(leaf) = self.caches.leaf(&[own, global], request.address) {
            let mapping = mapping_of(&leaf, request.address);
            if mapping.permits(request.kind) {
                return Ok(mapping);
            }
            // Which of the two stages refuses is not remembered: nested translations are walked again.
            if !nested {
                return Err(walk.fault(0x13));
            }
        }
        let found = self.walk(&walk, request, ste, request.address & ((1 << input_bits) - 1))?;
        let Found { descriptor, level, tables } = found;
        let affd = cd[0] >> 35 & 1 != 0;
        if descriptor & 1 << 10 == 0 && !affd {
            return Err(walk.fault(0x12));
        }
        // AP[1] lets unprivileged accesses in, which all of them are; AP[2] keeps writes out.
        let read = descriptor & 1 << 6 != 0 && tables & 1 == 0;
        let write = read && descriptor & 1 << 7 == 0 && tables & 2 == 0;
        let shift = level_shift(level);
        let below = (1 << shift) - 1;
        let ipa = descriptor & ADDRESS & !below | request.address & below;
        let tag = if descriptor & 1 << 11 != 0 { own } else { global };
        let mut leaf = Leaf { tag, input: request.address, log2: shift, level, output: ipa, read, write };
        if !mapping_of(&leaf, request.address).permits(request.kind) {
            if !nested {
                self.caches.keep(leaf);
            }
            return Err(walk.fault(0x13));
        }
        if nested {
            let second = self.stage_2(request, ste, ipa, Class::Input)?;
            leaf.log2 = shift.min(second.log2);
            leaf.output = second.phys;
            leaf.read &= second.read;
            leaf.write &= second.write;
        }
        self.caches.keep(leaf);
        Ok(mapping_of(&leaf, request.address))
    }

    /// Stage 2 for `ipa`, which is what the request, a stage-1 table or a context descriptor lies at.
    pub(super) fn stage_2(
        &mut self,
        request: &Request,
        ste: &[u64; 8],
        ipa: u64,
        class: Class,
    ) -> Result<Mapping, Stop> {
        let kind = if class == Class::Input { request.kind } else { Kind::Read };
        let tag = Tag::Stage2 { vmid: ste[2] as u16 };
        let has = |bit: u32| ste[2] >> bit & 1 != 0;
        let geometry = self.stage_2_geometry(ste);
        let policy = Policy { stall: has(57), record: has(58), abort: true };
        let walk = Walk { tag, geometry, stage_2: true, flat: true, class, ipa, policy };
        if ipa >> geometry.input_bits != 0 {
            return Err(walk.fault(0x10));
        }
        let leaf = match self.caches.leaf(&[tag], ipa) {
            Some(leaf) => leaf,
            None => {
                let Found { descriptor, level, .. } = self.walk(&walk, request, ste, ipa)?;
                if descriptor & 1 << 10 == 0 && !has(53) {
                    return Err(walk.fault(0x12));
                }
                // MemAttr is [5:2]; with S2FWB bit 3 of it is reserved, and so is 4.
                let attribute = descriptor >> 2 & 0xF;
                if forces_write_back(ste) && (attribute & 8 != 0 || attribute == 4) {
                    self.violation(format!("stage-2 leaf {descriptor:#x}: MemAttr is reserved with S2FWB"));
                }
                let shift = level_shift(level);
                let output = descriptor & ADDRESS & !((1 << shift) - 1);
                // S2AP.
                let (read, write) = (descriptor & 1 << 6 != 0, descriptor & 1 << 7 != 0);
                let leaf = Leaf { tag, input: ipa, log2: shift, level, output, read, write };
                self.caches.keep(leaf);
                leaf
            }
        };
        let mapping = mapping_of(&leaf, ipa);
        if mapping.permits(kind) { Ok(mapping) } else { Err(walk.fault(0x13)) }
    }

    /// Follows the tables of one stage down to the leaf for `input`.
    fn walk(&mut self, walk: &Walk, request: &Request, ste: &[u64; 8], input: u64) -> Result<Found, Stop> {
        let Geometry { input_bits, start, output_bits, base } = walk.geometry;
        let mut table = base & !(first_table_bytes(input_bits, start) - 1);
        let mut tables = 0;
        for level in start..=3 {
            let shift = level_shift(level);
            // The first table may be a part of one, or several side by side.
            let index = if level == start { input >> shift } else { input >> shift & 0x1FF };
            let key = (walk.tag, level, request_key(walk, request, input) >> shift);
            let descriptor = match self.caches.tables.get(&key) {
                Some(&descriptor) => descriptor,
                None => {
                    let mut at = table + index * 8;
                    if !walk.stage_2 && selects_stage_1(ste) && selects_stage_2(ste) {
                        at = self.stage_2(request, ste, at, Class::Table)?.phys;
                    }
                    self.memory.device_load(PhysAddr(at)).map_err(|_| walk.unreadable(at))?
                }
            };
            let points = descriptor & 3 == 3;
            let leaf = if level == 3 { points } else { descriptor & 3 == 1 && level != 0 };
            if !leaf && (!points || level == 3) {
                return Err(walk.fault(0x10));
            }
            let below = if leaf && level < 3 { (1 << shift) - 1 } else { 0 };
            if descriptor & ADDRESS & below & !NT != 0 {
                self.violation(format!(
                    "block descriptor {descriptor:#x}: address bits below its size are set"
                ));
            }
            let address = descriptor & ADDRESS & !below;
            if address >> output_bits != 0 {
                return Err(walk.fault(0x11));
            }
            if leaf {
                return Ok(Found { descriptor, level, tables });
            }
            self.caches.tables.insert(key, descriptor);
            if !walk.flat {
                tables |= descriptor >> 61 & 3;
            }
            table = address;
        }
        // A table at level 3 was refused above.
        Err(walk.fault(0x10))
    }
}

/// The address that walk caches remember a step of a walk by: the whole of it, with the upper half's sign bits.
fn request_key(walk: &Walk, request: &Request, input: u64) -> u64 {
    if walk.stage_2 { input } else { request.address }
}

/// An address that is passed as it is.
fn as_it_is(address: u64) -> Mapping {
    Mapping { phys: address, log2: 12, read: true, write: true, tag: None }
}

fn mapping_of(leaf: &Leaf, input: u64) -> Mapping {
    let below = (1 << leaf.log2) - 1;
    Mapping {
        phys: leaf.output & !below | input & below,
        log2: leaf.log2,
        read: leaf.read,
        write: leaf.write,
        tag: Some(leaf.tag),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config, Refusal,
        bench::{
            Bench, CONTEXTS, DEVICE, IOVA, IPA, PAGE, PAGE_2, SID, STAGE_1, STAGE_2, context, stage_1,
            stage_2,
        },
    };
    use crate::golden_smmuv3 as golden;
    use iommu::Iova;

    /// Word 1 of an event: RnW, CLASS IN.
    const READ: u64 = 1 << 35 | 2 << 40;
    const WRITE: u64 = 2 << 40;
    /// S2.
    const SECOND: u64 = 1 << 39;

    fn first() -> Bench {
        let config = Config::qemu();
        Bench::attached(config, stage_1(&config, 0))
    }

    fn second() -> Bench {
        let config = Config::qemu();
        Bench::attached(config, stage_2(&config))
    }

    /// Both stages: all of the bench's memory is at the same IPA, up to what a test takes away.
    fn nested() -> Bench {
        let config = Config::qemu();
        let [w0, w1, w2, ..] = stage_2(&config);
        let mut bench = Bench::attached(config, [w0 | CONTEXTS | 2, w1, w2, STAGE_2, 0, 0, 0, 0]);
        for page in (CONTEXTS..CONTEXTS + 0x3_8000).step_by(0x1000) {
            bench.map(STAGE_2, 1, page, 3, page | PAGE_2);
        }
        bench
    }

    fn event(id: u64, w1: u64, address: Iova, w3: u64) -> [u64; 4] {
        [SID << 32 | id, w1, address.0, w3]
    }

    #[test]
    fn stage_1_translates_by_four_levels() {
        let mut bench = first();
        let (_, page) = bench.map_page(PAGE);
        bench.put(page + 0x18, &[0x1122]);

        assert_eq!(bench.read(Iova(IOVA.0 + 0x18)), Ok(0x1122));
        assert_eq!(bench.write(IOVA, 0x33), Ok(()));

        assert_eq!(bench.word(page), 0x33);
        bench.assert_events(&[]);
        bench.assert_lawful();
    }

    #[test]
    fn stage_2_translates_with_tables_side_by_side() {
        let mut bench = second();
        let (leaf, page) = bench.map_page_2(PAGE_2);
        bench.put(page, &[0x1122]);

        assert_eq!(bench.read(IPA), Ok(0x1122));
        assert!(leaf > STAGE_2);
        bench.assert_events(&[]);
        bench.assert_lawful();
    }

    #[test]
    fn blocks_translate_as_a_whole() {
        let mut bench = first();
        let block = golden::STAGE_1_BLOCK & !0x8020_0000 & !(1 << 7);
        // The memory starts at a multiple of 1 GiB.
        bench.map(STAGE_1, 0, 0x40_0020_0000, 2, 0x8_0000_0000 | block);
        bench.map(STAGE_1, 0, 0x41_4000_0000, 1, 0x8_0000_0000 | block);
        let page = bench.page();
        bench.put(page, &[5]);

        let offset = page - 0x8_0000_0000;
        assert_eq!(bench.read(Iova(0x40_0020_0000 + offset)), Ok(5));
        assert_eq!(bench.read(Iova(0x41_4000_0000 + offset)), Ok(5));
        bench.map(STAGE_1, 0, 0x8080_0000_0000 & !(1 << 47), 0, 0x8_0000_0000 | block);
        assert_eq!(bench.read(Iova(0x80_0000_0000)), Err(Refusal::Fault(0x10)));

        bench.assert_lawful();
    }

    #[test]
    fn a_missing_mapping_is_a_translation_fault() {
        let bench = first();
        assert_eq!(bench.read(IOVA), Err(Refusal::Fault(0x10)));
        assert_eq!(bench.write(IOVA, 1), Err(Refusal::Fault(0x10)));
        bench.assert_events(&[event(0x10, READ, IOVA, 0), event(0x10, WRITE, IOVA, 0)]);

        let bench = second();
        let address = Iova(IPA.0 + 0xABC);
        let read = bench.unit.dma_read(DEVICE, None, address, 1);
        assert_eq!(read, Err(Refusal::Fault(0x10)));
        bench.assert_events(&[event(0x10, READ | SECOND, address, IPA.0)]);
    }

    #[test]
    fn golden_faults_look_like_the_golden_words() {
        let bench = first();
        let _ = bench.unit.dma_read(DEVICE, None, Iova(0x4020_1ABC), 1);
        bench.assert_events(&[golden::F_TRANSLATION]);

        // A way that ends outside memory: at entry 1, where the golden word has entry 21.
        let mut bench = first();
        bench.map(STAGE_1, 0, 0x4020_1000, 2, 0x1_0203_0000 | 3);
        assert_eq!(bench.unit.dma_read(DEVICE, None, Iova(0x4020_1ABC), 1), Err(Refusal::Fault(0x0B)));
        let [w0, w1, w2, _] = golden::F_WALK_EABT;
        bench.assert_events(&[[w0, w1, w2, 0x1_0203_0008]]);

        let mut bench = nested();
        bench.map(STAGE_1, 0, 0x4020_1000, 3, 0x9020_1000 | PAGE);
        let _ = bench.unit.dma_read(DEVICE, None, Iova(0x4020_1ABC), 1);
        bench.assert_events(&[golden::F_TRANSLATION_STAGE_2]);

        let mut bench = nested();
        bench.map(STAGE_1, 0, 0x4020_1000, 2, 0x9100_0000 | 3);
        let _ = bench.unit.dma_read(DEVICE, None, Iova(0x4020_1ABC), 1);
        bench.assert_events(&[golden::F_TRANSLATION_OF_TABLE]);

        let mut bench = nested();
        bench.map(STAGE_2, 1, CONTEXTS, 3, 0);
        let _ = bench.unit.dma_read(DEVICE, None, Iova(0x4020_1ABC), 1);
        let [w0, w1, w2, _] = golden::F_TRANSLATION_OF_CD;
        bench.assert_events(&[[w0, w1, w2, CONTEXTS]]);

        let mut bench = second();
        bench.map(STAGE_2, 1, 0x1000, 3, 0x100_0000_1000 | PAGE_2);
        assert_eq!(bench.write(Iova(0x1000), 1), Err(Refusal::Fault(0x11)));
        let [w0, w1, w2, _] = golden::F_ADDR_SIZE_STAGE_2;
        bench.assert_events(&[[w0, w1, w2, 0x1000]]);
    }

    #[test]
    fn both_stages_translate_one_after_the_other() {
        let mut bench = nested();
        let (_, page) = bench.map_page(PAGE);
        bench.put(page, &[9]);

        assert_eq!(bench.read(IOVA), Ok(9));
        bench.assert_lawful();
        bench.map(STAGE_2, 1, page, 3, 0);
        let vmid = |words: [u64; 2]| [words, super::super::bench::SYNC];
        bench.submit(&vmid([golden::TLBI_S2_IPA[0], page | 1]));
        assert_eq!(bench.read(IOVA), Ok(9), "both stages in one are not dropped by S2_IPA");
        bench.submit(&vmid(golden::TLBI_NH_ALL));

        assert_eq!(bench.read(IOVA), Err(Refusal::Fault(0x10)));
        bench.assert_events(&[event(0x10, READ | SECOND, IOVA, page)]);
    }

    #[test]
    fn the_stage_that_refuses_is_the_one_that_is_named() {
        let mut bench = nested();
        let (_, page) = bench.map_page(PAGE);
        bench.map(STAGE_2, 1, page, 3, page | PAGE_2 & !(1 << 7));
        bench.read(IOVA).expect("readable");

        assert_eq!(bench.write(IOVA, 1), Err(Refusal::Fault(0x13)));

        bench.assert_events(&[event(0x13, WRITE | SECOND, IOVA, page)]);
    }

    #[test]
    fn permissions_are_kept() {
        // AP[1] is missing, AP[2] is set.
        for (attributes, read, write) in
            [(PAGE & !(1 << 6), false, false), (PAGE | 1 << 7, true, false), (PAGE, true, true)]
        {
            let mut bench = first();
            bench.map_page(attributes);
            assert_eq!((bench.read(IOVA).is_ok(), bench.write(IOVA, 1).is_ok()), (read, write));
            if !write {
                assert_eq!(bench.write(IOVA, 1), Err(Refusal::Fault(0x13)));
            }
        }
        for (attributes, read, write) in
            [(PAGE_2 & !(1 << 6), false, true), (PAGE_2 & !(1 << 7), true, false)]
        {
            let mut bench = second();
            bench.map_page_2(attributes);
            assert_eq!((bench.read(IPA).is_ok(), bench.write(IPA, 1).is_ok()), (read, write));
        }
    }

    #[test]
    fn permissions_of_tables_count_unless_the_context_says_otherwise() {
        for (bits, flat, read, write) in
            [(1 << 61, 0, false, false), (2 << 61, 0, true, false), (3 << 61, 1 << 1, true, true)]
        {
            let mut bench = first();
            let mut cd = context(1);
            cd[1] |= flat;
            bench.put(CONTEXTS, &cd);
            bench.map_page(PAGE);
            let top = STAGE_1 + (IOVA.0 >> 39) * 8;
            bench.put(top, &[bench.word(top) | bits]);

            assert_eq!((bench.read(IOVA).is_ok(), bench.write(IOVA, 1).is_ok()), (read, write));
        }
    }

    #[test]
    fn a_page_without_the_access_flag_is_a_fault_unless_it_is_disabled() {
        let mut bench = first();
        bench.map_page(PAGE & !(1 << 10));
        assert_eq!(bench.read(IOVA), Err(Refusal::Fault(0x12)));
        bench.assert_events(&[event(0x12, READ, IOVA, 0)]);

        let mut bench = first();
        let mut cd = context(1);
        cd[0] |= 1 << 35;
        bench.put(CONTEXTS, &cd);
        bench.map_page(PAGE & !(1 << 10));
        assert!(bench.read(IOVA).is_ok());

        let mut bench = second();
        bench.map_page_2(PAGE_2 & !(1 << 10));
        assert_eq!(bench.read(IPA), Err(Refusal::Fault(0x12)));
    }

    #[test]
    fn addresses_beyond_the_range_are_refused() {
        let mut bench = first();
        bench.map(STAGE_1, 0, IOVA.0, 3, 1 << 44 | PAGE);
        assert_eq!(bench.read(IOVA), Err(Refusal::Fault(0x11)), "output");
        assert_eq!(bench.read(Iova(1 << 48)), Err(Refusal::Fault(0x10)), "between the halves");
        assert_eq!(bench.read(Iova(u64::MAX - 7)), Err(Refusal::Fault(0x10)), "EPD1");

        let bench = second();
        assert_eq!(bench.read(Iova(1 << 40)), Err(Refusal::Fault(0x10)));
        bench.assert_events(&[event(0x10, READ | SECOND, Iova(1 << 40), 1 << 40)]);
        assert_eq!(bench.read(Iova(1 << 44)), Err(Refusal::Fault(0x11)));
        bench.assert_events(&[event(0x11, READ, Iova(1 << 44), 0)]);
    }

    #[test]
    fn the_upper_half_has_tables_of_its_own() {
        let mut bench = first();
        let mut cd = context(1);
        // EPD1 off; T1SZ 25; TG1 4 KiB is code 2.
        cd[0] = cd[0] & !(1 << 30) | 25 << 16 | 2 << 22;
        let top = bench.page();
        cd[2] = top;
        bench.put(CONTEXTS, &cd);
        let page = bench.page();
        bench.put(page, &[6]);
        let address = 0xFFFF_FFFF_8000_3000;
        bench.map(top, 1, address & 0x7F_FFFF_FFFF, 3, page | PAGE);

        assert_eq!(bench.read(Iova(address)), Ok(6));
        assert_eq!(bench.read(Iova(address & !(1 << 40))), Err(Refusal::Fault(0x10)));
        assert_eq!(bench.read(IOVA), Err(Refusal::Fault(0x10)));
        bench.assert_lawful();
    }

    #[test]
    fn what_was_translated_is_remembered() {
        let mut bench = first();
        let (leaf, page) = bench.map_page(PAGE | 1 << 7);
        bench.put(page, &[4]);
        assert_eq!(bench.write(IOVA, 1), Err(Refusal::Fault(0x13)));

        bench.put(leaf, &[page | PAGE]);
        assert_eq!(bench.write(IOVA, 1), Err(Refusal::Fault(0x13)), "still read-only");
        bench.put(leaf, &[0]);

        assert_eq!(bench.read(IOVA), Ok(4), "still there");
    }

    #[test]
    fn what_was_not_translated_is_not_remembered() {
        let mut bench = second();
        assert!(bench.read(IPA).is_err());

        bench.map_page_2(PAGE_2);

        assert!(bench.read(IPA).is_ok());
    }

    #[test]
    fn a_block_with_low_address_bits_is_noted() {
        let mut bench = first();
        bench.map(STAGE_1, 0, IOVA.0, 2, 0x8_0000_1000 | golden::STAGE_1_BLOCK & 0xFFF);

        assert_eq!(
            bench.read(IOVA),
            Err(Refusal::NoMemory(iommu::PhysAddr(0x8_0000_0000 + (IOVA.0 & 0x1F_FFFF))))
        );

        bench.assert_broken("block descriptor");
    }
    #[test]
    fn a_block_of_stage_1_is_remembered_by_the_pages_of_stage_2() {
        let mut bench = nested();
        let pages = [bench.page(), bench.page()];
        // Stage 2 swaps the two pages.
        bench.map(STAGE_2, 1, pages[0], 3, pages[1] | PAGE_2);
        bench.map(STAGE_2, 1, pages[1], 3, pages[0] | PAGE_2);
        bench.put(pages[0], &[1]);
        bench.put(pages[1], &[2]);
        let block = golden::STAGE_1_BLOCK & !0x8020_0000 & !(1 << 7);
        bench.map(STAGE_1, 0, 0x40_0020_0000, 2, 0x8_0000_0000 | block);

        let read = pages.map(|page| bench.read(Iova(0x40_0020_0000 + page - 0x8_0000_0000)));

        assert_eq!(read, [Ok(2), Ok(1)]);
        bench.assert_lawful();
    }
    #[test]
    fn tables_of_stage_1_need_only_be_readable_in_stage_2() {
        let mut bench = nested();
        let (_, page) = bench.map_page(PAGE);
        for table in (CONTEXTS..page).step_by(0x1000) {
            bench.map(STAGE_2, 1, table, 3, table | PAGE_2 & !(1 << 7));
        }

        assert_eq!(bench.write(IOVA, 3), Ok(()));

        assert_eq!(bench.word(page), 3);
    }
}
