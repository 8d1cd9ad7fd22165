//! The way from a request to memory: root, context, PASID directory and table, paging structures.

use super::{
    State,
    caches::{CachedPasid, Leaf, Tag, level_shift},
};
use iommu::PhysAddr;

/// What a device asks for.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) enum Kind {
    Read,
    Write,
    PageRequest,
}

impl Kind {
    /// FRCD.T1 and T2.
    pub(super) fn type_bits(self) -> (u64, u64) {
        match self {
            Self::Write => (0, 0),
            Self::Read => (1, 0),
            Self::PageRequest => (0, 1),
        }
    }
}

/// FRCD.AT, and the AT field of the transaction.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) enum At {
    Untranslated,
    TranslationRequest,
    Translated,
}

impl At {
    pub(super) fn bits(self) -> u64 {
        match self {
            Self::Untranslated => 0,
            Self::TranslationRequest => 1,
            Self::Translated => 2,
        }
    }
}

/// One request of a device.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub(super) sid: u16,
    pub(super) pasid: Option<u32>,
    pub(super) address: u64,
    pub(super) kind: Kind,
    pub(super) at: At,
}

/// Why a request was blocked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Fault {
    /// FRCD.FR.
    pub(super) reason: u8,
    /// FPD keeps it from being recorded.
    pub(super) suppressed: bool,
    /// FRCD.PRIV.
    pub(super) privileged: bool,
}

/// The faults that FPD does not qualify: there is no entry yet to take it from, or that entry is not to be trusted.
const NEVER_SUPPRESSED: [u8; 13] =
    [0x01, 0x08, 0x09, 0x0A, 0x30, 0x31, 0x32, 0x38, 0x39, 0x3A, 0x40, 0x50, 0x58];

/// What is known about a request while it is on its way: what its faults need.
#[derive(Clone, Copy, Default)]
pub(super) struct Way {
    /// The OR of the FPD bits met so far.
    fpd: bool,
    privileged: bool,
}

impl Way {
    fn fault(self, reason: u8) -> Fault {
        let suppressed = self.fpd && !NEVER_SUPPRESSED.contains(&reason);
        Fault { reason, suppressed, privileged: self.privileged }
    }

    /// Passes `value` on, or faults with `reason`.
    fn load<T, E>(self, value: Result<T, E>, reason: u8) -> Result<T, Fault> {
        value.map_err(|_| self.fault(reason))
    }

    fn demand(self, holds: bool, reason: u8) -> Result<(), Fault> {
        if holds { Ok(()) } else { Err(self.fault(reason)) }
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
}

/// A paging format: how a walk is made and which reasons it gives.
struct Format {
    tag: Tag,
    root: u64,
    levels: u32,
    /// First stage: IA-32e entries with accessed and dirty bits. Else second-stage entries.
    first_stage: bool,
    /// WPE: supervisor writes obey R/W.
    write_protect: bool,
    /// A table, or the top table, lies outside memory.
    table_error: u8,
    root_error: u8,
    reserved: u8,
    /// No entry, for a read and for a write.
    absent: [u8; 2],
    /// No permission, for a read and for a write.
    denied: [u8; 2],
    /// The output is in the interrupt range.
    interrupt_range: u8,
}

/// A second-stage format of legacy mode, with the reasons LCT.4, LSL and LGN.
fn legacy_second_stage(did: u16, root: u64, levels: u32) -> Format {
    Format {
        tag: Tag::Second { did },
        root,
        levels,
        first_stage: false,
        write_protect: false,
        root_error: 0x03,
        table_error: 0x07,
        reserved: 0x0C,
        absent: [0x06, 0x05],
        denied: [0x06, 0x05],
        interrupt_range: 0x0E,
    }
}

/// A second-stage format of scalable mode, with the reasons SSS and SGN.
fn scalable_second_stage(did: u16, root: u64, levels: u32) -> Format {
    Format {
        root_error: 0x7B,
        table_error: 0x78,
        reserved: 0x7A,
        absent: [0x79; 2],
        denied: [0x86, 0x85],
        interrupt_range: 0x87,
        ..legacy_second_stage(did, root, levels)
    }
}

/// A first-stage format, with the reasons SFS and SGN.
fn first_stage(tag: Tag, root: u64, levels: u32, write_protect: bool) -> Format {
    Format {
        tag,
        root,
        levels,
        first_stage: true,
        write_protect,
        root_error: 0x73,
        table_error: 0x70,
        reserved: 0x72,
        absent: [0x71; 2],
        denied: [0x86, 0x85],
        interrupt_range: 0x87,
    }
}

/// RTADDR.TTM.
const LEGACY: u64 = 0;
const SCALABLE: u64 = 1;

/// Bits of an entry that hold the address of a table or page.
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
/// Bits of a page-sized pointer in the root, context and PASID structures.
const POINTER: u64 = !0xFFF;

impl State {
    /// Translates `request`. What it meets on the way is remembered in the caches.
    pub(super) fn translate(&mut self, request: &Request) -> Result<Mapping, Fault> {
        let way = Way::default();
        match self.root >> 10 & 3 {
            LEGACY => self.translate_legacy(request, way),
            SCALABLE if self.config.ecap & 1 << 43 != 0 => self.translate_scalable(request, way),
            _ => Err(way.fault(0x30)),
        }
    }

    /// The checks of a page request, which is not translated: the device's context alone decides.
    pub(super) fn admit_page_request(&mut self, request: &Request) -> Result<(), Fault> {
        let mut way = Way::default();
        match self.root >> 10 & 3 {
            LEGACY => Err(way.fault(0x32)),
            SCALABLE if self.config.ecap & 1 << 43 != 0 => {
                self.scalable_context(request, &mut way).map(|_| ())
            }
            _ => Err(way.fault(0x30)),
        }
    }

    fn translate_legacy(&mut self, request: &Request, mut way: Way) -> Result<Mapping, Fault> {
        way.demand(request.pasid.is_none(), 0x31)?;
        let [w0, w1, ..] = self.legacy_context(request.sid, &mut way)?;
        let (cap, ecap) = (self.config.cap, self.config.ecap);
        let did = (w1 >> 8) as u16;
        let translation_type = w0 >> 2 & 3;
        let reserved = w0 & 0xFF0 | w1 & !0xFF_FF7F | self.beyond_domains(did);
        // Pass-through ignores the pointer.
        let pointer = if translation_type == 2 { 0 } else { self.beyond_host(w0 & POINTER) };
        way.demand(reserved | pointer == 0, 0x0B)?;
        let supported = match translation_type {
            0 => true,
            1 => ecap & 1 << 2 != 0,
            2 => ecap & 1 << 6 != 0,
            _ => false,
        };
        let levels = self.supported_levels(w1 & 7);
        way.demand(supported && levels.is_some(), 0x03)?;
        way.demand(request.at == At::Untranslated || translation_type == 1, 0x0D)?;
        if request.at == At::Translated {
            return Ok(self.as_it_is(request.address));
        }
        if translation_type == 2 {
            way.demand(self.beyond_host(request.address) == 0, 0x04)?;
            return Ok(self.as_it_is(request.address));
        }
        let levels = levels.unwrap_or(0);
        way.demand(self.within_guest_width(request.address, cap, levels), 0x04)?;
        self.page_walk(request, way, &legacy_second_stage(did, w0 & POINTER, levels))
    }

    /// Finds the legacy root and context entry of `sid`.
    fn legacy_context(&mut self, sid: u16, way: &mut Way) -> Result<[u64; 4], Fault> {
        let entry = match self.caches.contexts.get(&sid) {
            Some(&(entry, _)) => entry,
            None => {
                let bus = u64::from(sid >> 8);
                let [r0, r1] = way.load(self.words(self.root & POINTER, bus * 16), 0x08)?;
                way.demand(r0 & 1 != 0, 0x01)?;
                way.demand(r0 & 0xFFE | r1 | self.beyond_host(r0 & POINTER) == 0, 0x0A)?;
                let [w0, w1] = way.load(self.words(r0 & POINTER, u64::from(sid & 0xFF) * 16), 0x09)?;
                let entry = [w0, w1, 0, 0];
                self.keep_context(sid, entry, (w1 >> 8) as u16);
                entry
            }
        };
        way.fpd |= entry[0] & 2 != 0;
        way.demand(entry[0] & 1 != 0, 0x02)?;
        Ok(entry)
    }

    /// Caches a context entry; one that is not present only in caching mode, under domain 0.
    fn keep_context(&mut self, sid: u16, entry: [u64; 4], did: u16) {
        if entry[0] & 1 != 0 {
            self.caches.contexts.insert(sid, (entry, did));
        } else if self.config.caching_mode() {
            self.caches.contexts.insert(sid, (entry, 0));
        }
    }

    fn translate_scalable(&mut self, request: &Request, mut way: Way) -> Result<Mapping, Fault> {
        let context = self.scalable_context(request, &mut way)?;
        if request.at == At::Translated {
            return Ok(self.as_it_is(request.address));
        }
        // RID_PASID and RID_PRIV stand for a request without PASID.
        way.privileged = request.pasid.is_none() && context[1] & 1 << 20 != 0;
        let pasid = request.pasid.unwrap_or((context[1] & 0xF_FFFF) as u32);
        let cached = self.pasid_entry(request.sid, pasid, context[0], &mut way)?;
        let entry = cached.entry;
        let (cap, ecap) = (self.config.cap, self.config.ecap);
        let has = |bit: u32| ecap & 1 << bit != 0;
        let only = |present: bool, bits: u64| if present { 0 } else { bits };
        let mut reserved = [0; 8];
        // SLEE and 11:10; SSADE needs SSADS, which no modelled unit has.
        reserved[0] = entry[0] & (1 << 5 | 1 << 9 | 3 << 10) | self.beyond_host(entry[0] & POINTER);
        // 86:80; PWSNP needs SMPWCS, PGSNP needs SC; 95:91.
        reserved[1] = entry[1] & (0x7F << 16 | only(has(48), 1 << 23) | only(has(7), 1 << 24) | 0x1F << 27);
        reserved[1] |= self.beyond_domains(entry[1] as u16);
        // SRE needs SRS, EAFE needs EAFS; ERE; 139:136.
        reserved[2] = entry[2] & (only(has(31), 1) | 1 << 1 | only(has(34), 1 << 7) | 0xF << 8)
            | self.beyond_host(entry[2] & POINTER);
        reserved[3..].copy_from_slice(&entry[3..]);
        way.demand(reserved == [0; 8], 0x5A)?;
        let did = entry[1] as u16;
        let levels = self.supported_levels(entry[0] >> 2 & 7);
        let translation_type = entry[0] >> 6 & 7;
        // FSPM: 0 is four levels, 1 five, which need FS5LP.
        let first_levels = match entry[2] >> 2 & 3 {
            0 => Some(4),
            1 if cap & 1 << 60 != 0 => Some(5),
            _ => None,
        };
        let supported = match translation_type {
            1 => has(47) && first_levels.is_some(),
            2 => has(46) && levels.is_some(),
            3 => has(26) && first_levels.is_some() && levels.is_some(),
            4 => has(6),
            _ => false,
        };
        way.demand(supported, 0x5B)?;
        way.demand(!way.privileged || translation_type == 2 || entry[2] & 1 != 0, 0x5D)?;
        let levels = levels.unwrap_or(0);
        let first_levels = first_levels.unwrap_or(0);
        let first = |tag| first_stage(tag, entry[2] & POINTER, first_levels, entry[2] & 1 << 4 != 0);
        match translation_type {
            1 => {
                way.demand(is_canonical(request.address, first_levels), 0x80)?;
                self.page_walk(request, way, &first(Tag::First { did, pasid }))
            }
            3 => {
                way.demand(is_canonical(request.address, first_levels), 0x80)?;
                let second = scalable_second_stage(did, entry[0] & POINTER, levels);
                self.nested_walk(request, way, &first(Tag::Nested { did, pasid }), &second)
            }
            2 => {
                way.demand(self.within_guest_width(request.address, cap, levels), 0x84)?;
                self.page_walk(request, way, &scalable_second_stage(did, entry[0] & POINTER, levels))
            }
            _ => {
                way.demand(self.beyond_host(request.address) == 0, 0x83)?;
                Ok(self.as_it_is(request.address))
            }
        }
    }

    /// Finds and checks the scalable root and context entry for `request`.
    fn scalable_context(&mut self, request: &Request, way: &mut Way) -> Result<[u64; 4], Fault> {
        let sid = request.sid;
        let entry = match self.caches.contexts.get(&sid) {
            Some(&(entry, _)) => entry,
            None => {
                let (bus, devfn) = (u64::from(sid >> 8), u64::from(sid & 0xFF));
                // LP and LCTP for devfn 0 to 127, UP and UCTP for the others.
                let half = bus * 16 + devfn / 128 * 8;
                let [root] = way.load(self.words(self.root & POINTER, half), 0x38)?;
                way.demand(root & 1 != 0, 0x39)?;
                way.demand(root & 0xFFE | self.beyond_host(root & POINTER) == 0, 0x3A)?;
                let entry = way.load(self.words(root & POINTER, devfn % 128 * 32), 0x40)?;
                self.keep_context(sid, entry, 0);
                entry
            }
        };
        way.fpd |= entry[0] & 2 != 0;
        way.demand(entry[0] & 1 != 0, 0x41)?;
        let ecap = self.config.ecap;
        let only = |bit: u32, bits: u64| if ecap & 1 << bit != 0 { 0 } else { bits };
        // 8:5; DTE needs DT, PRE needs PRS; RID_PASID needs RPS, RID_PRIV needs RPRIVS; 255:85.
        let reserved = entry[0] & (0xF << 5 | only(2, 1 << 2) | only(29, 1 << 4))
            | entry[1] & (only(49, 0xF_FFFF) | only(53, 1 << 20) | !0x1F_FFFF)
            | entry[2]
            | entry[3]
            | self.beyond_host(entry[0] & POINTER);
        way.demand(reserved == 0, 0x42)?;
        // PDTS: 2^(PDTS+7) directory entries of 64 PASIDs each.
        let pasids = 1 << ((entry[0] >> 9 & 7) + 13);
        way.demand(entry[1] & 0xF_FFFF < pasids, 0x43)?;
        way.demand(request.at == At::Untranslated || entry[0] & 1 << 2 != 0, 0x44)?;
        if let Some(pasid) = request.pasid {
            way.demand(entry[0] & 1 << 3 != 0, 0x45)?;
            way.demand(u64::from(pasid) < pasids, 0x46)?;
        }
        way.demand(request.kind != Kind::PageRequest || entry[0] & 1 << 4 != 0, 0x47)?;
        Ok(entry)
    }

    /// Finds the PASID table entry of `pasid` through the directory that `context` points at.
    fn pasid_entry(
        &mut self,
        sid: u16,
        pasid: u32,
        context: u64,
        way: &mut Way,
    ) -> Result<CachedPasid, Fault> {
        let cached = match self.caches.pasids.get(&(sid, pasid)) {
            Some(&cached) => cached,
            None => {
                let pasid_index = u64::from(pasid);
                let [directory] = way.load(self.words(context & POINTER, (pasid_index >> 6) * 8), 0x50)?;
                let directory_fpd = directory & 2 != 0;
                way.fpd |= directory_fpd;
                way.demand(directory & 1 != 0, 0x51)?;
                way.demand(directory & 0xFFC | self.beyond_host(directory & POINTER) == 0, 0x52)?;
                let entry: [u64; 8] =
                    way.load(self.words(directory & POINTER, (pasid_index & 0x3F) * 64), 0x58)?;
                let present = entry[0] & 1 != 0;
                let did = if present { entry[1] as u16 } else { 0 };
                let cached = CachedPasid { entry, directory_fpd, did };
                if present || self.config.caching_mode() {
                    self.caches.pasids.insert((sid, pasid), cached);
                }
                cached
            }
        };
        way.fpd |= cached.directory_fpd || cached.entry[0] & 2 != 0;
        way.demand(cached.entry[0] & 1 != 0, 0x59)?;
        Ok(cached)
    }

    /// Answers from the IOTLB, or walks the paging structures.
    fn page_walk(&mut self, request: &Request, way: Way, format: &Format) -> Result<Mapping, Fault> {
        if let Some(leaf) = self.caches.leaf(format.tag, request.address)
            // The first write through a clean leaf walks, to set its D.
            && (leaf.dirty || !format.first_stage || request.kind != Kind::Write)
        {
            return permit(request, way, format, &leaf);
        }
        let mut used = Vec::new();
        let mut tables = Vec::new();
        let mut leaf = self.find_leaf(request, way, format, &mut used, &mut tables)?;
        let mapping = permit(request, way, format, &leaf);
        if mapping.is_err() && (leaf.present || !self.config.caching_mode() || format.first_stage) {
            return mapping;
        }
        if format.first_stage {
            leaf.dirty |= request.kind == Kind::Write && mapping.is_ok_and(|mapping| mapping.write);
            let last = used.len().saturating_sub(1);
            for (at, &entry) in used.iter().enumerate() {
                let dirty = if at == last && leaf.dirty { 1 << 6 } else { 0 };
                way.load(self.memory.device_set(entry, 1 << 5 | dirty), format.table_error)?;
            }
        }
        self.caches.structures.extend(tables);
        self.caches.keep(leaf);
        mapping
    }

    /// Answers from the IOTLB, or walks first-stage tables whose own addresses, and the one that they end at, are walked
    /// through the second stage.
    fn nested_walk(
        &mut self,
        request: &Request,
        way: Way,
        first: &Format,
        second: &Format,
    ) -> Result<Mapping, Fault> {
        // What both stages permit is in one leaf, so supervisors have no more say in it.
        let both = Format { first_stage: false, ..*first };
        if let Some(leaf) = self.caches.leaf(first.tag, request.address)
            && (leaf.dirty || request.kind != Kind::Write)
        {
            return permit(request, way, &both, &leaf);
        }
        way.demand(self.within_guest_width(first.root, self.config.cap, second.levels), 0x5B)?;
        let mut used = Vec::new();
        let mut tables = Vec::new();
        let mut table = first.root;
        let mut rights = (true, true, true);
        let (output, log2, dirty) = 'walk: {
            for level in (1..=first.levels).rev() {
                let shift = level_shift(level);
                let key = (first.tag, level, request.address >> shift);
                let guest = table + (request.address >> shift & 0x1FF) * 8;
                let is_top = level == first.levels;
                let entry = match self.caches.structures.get(&key) {
                    Some(&entry) => entry,
                    None => {
                        let held = self.through_second(request, way, second, guest)?;
                        way.demand(held.read, if is_top { 0x75 } else { 0x76 })?;
                        let at = PhysAddr(held.output | guest & ((1 << held.log2) - 1));
                        let error = if is_top { first.root_error } else { first.table_error };
                        let entry = way.load(self.memory.device_load(at), error)?;
                        used.push((at, entry, held.write));
                        entry
                    }
                };
                way.demand(entry & 1 != 0, first.absent[0])?;
                let large = entry & 1 << 7 != 0 && level > 1;
                way.demand(self.reserved_in(first, entry, level, large) == 0, first.reserved)?;
                rights = (rights.0, rights.1 && entry & 2 != 0, rights.2 && entry & 4 != 0);
                if large || level == 1 {
                    break 'walk (entry & ADDRESS & !((1 << shift) - 1), shift, entry & 1 << 6 != 0);
                }
                tables.push((key, entry));
                table = entry & ADDRESS;
            }
            return Err(way.fault(first.reserved));
        };
        let (read, write, user) = rights;
        let of_first = Leaf {
            tag: first.tag,
            input: request.address,
            log2,
            output,
            present: true,
            read,
            write,
            user,
            dirty,
        };
        let guest = grant(request, way, first, &of_first)?;
        let held = self.through_second(request, way, second, guest.phys)?;
        let log2 = log2.min(held.log2);
        let leaf = Leaf {
            log2,
            output: (held.output | guest.phys & ((1 << held.log2) - 1)) & !((1 << log2) - 1),
            read: held.read,
            write: (write || way.privileged && !first.write_protect) && held.write,
            dirty: dirty || request.kind == Kind::Write,
            ..of_first
        };
        let mapping = permit(request, way, &both, &leaf)?;
        let last = used.len().saturating_sub(1);
        for (n, &(at, entry, writable)) in used.iter().enumerate() {
            let set = 1 << 5 | if n == last && leaf.dirty { 1 << 6 } else { 0 };
            way.demand(writable || entry & set == set, 0x77)?;
            way.load(self.memory.device_set(at, set), first.table_error)?;
        }
        self.caches.structures.extend(tables);
        self.caches.keep(leaf);
        Ok(mapping)
    }

    /// Finds what the second stage has for the guest's address `guest`, which is from an entry of the first.
    ///
    /// That nothing is there is SSS.2 whatever it is asked for; what it is asked for decides only where there is something.
    fn through_second(
        &mut self,
        request: &Request,
        way: Way,
        second: &Format,
        guest: u64,
    ) -> Result<Leaf, Fault> {
        way.demand(self.within_guest_width(guest, self.config.cap, second.levels), 0x74)?;
        if let Some(leaf) = self.caches.leaf(second.tag, guest) {
            way.demand(leaf.present, second.absent[0])?;
            return Ok(leaf);
        }
        let (mut used, mut tables) = (Vec::new(), Vec::new());
        let asked = Request { address: guest, ..*request };
        let leaf = self.find_leaf(&asked, way, second, &mut used, &mut tables)?;
        if leaf.present || self.config.caching_mode() {
            self.caches.structures.extend(tables);
            self.caches.keep(leaf);
        }
        way.demand(leaf.present, second.absent[0])?;
        Ok(leaf)
    }

    /// Walks to the leaf entry for `request`. `used` collects the entries on the way, `tables` those that point on.
    fn find_leaf(
        &self,
        request: &Request,
        way: Way,
        format: &Format,
        used: &mut Vec<PhysAddr>,
        tables: &mut Vec<((Tag, u32, u64), u64)>,
    ) -> Result<Leaf, Fault> {
        let input = request.address;
        let mut leaf = Leaf {
            tag: format.tag,
            input,
            log2: 12,
            output: 0,
            present: true,
            read: true,
            write: true,
            user: true,
            dirty: false,
        };
        let mut table = format.root;
        for level in (1..=format.levels).rev() {
            let shift = level_shift(level);
            let at = PhysAddr(table + (input >> shift & 0x1FF) * 8);
            let key = (format.tag, level, input >> shift);
            let error = if level == format.levels { format.root_error } else { format.table_error };
            let entry = match self.caches.structures.get(&key) {
                Some(&entry) => entry,
                None => way.load(self.memory.device_load(at), error)?,
            };
            leaf.present = entry & if format.first_stage { 1 } else { 3 } != 0;
            if !leaf.present {
                (leaf.read, leaf.write) = (false, false);
                return Ok(leaf);
            }
            let large = entry & 1 << 7 != 0 && level > 1;
            way.demand(self.reserved_in(format, entry, level, large) == 0, format.reserved)?;
            leaf.read &= format.first_stage || entry & 1 != 0;
            leaf.write &= entry & 2 != 0;
            leaf.user &= !format.first_stage || entry & 4 != 0;
            used.push(at);
            if large || level == 1 {
                leaf.log2 = shift;
                // Bit 12 of a large first-stage leaf is PAT; what else lies below the page size is zero.
                leaf.output = entry & ADDRESS & !((1 << shift) - 1);
                leaf.dirty = format.first_stage && entry & 1 << 6 != 0;
                return Ok(leaf);
            }
            tables.push((key, entry));
            table = entry & ADDRESS;
        }
        Err(way.fault(format.reserved))
    }

    /// Returns the reserved bits that are set in a present paging entry.
    fn reserved_in(&self, format: &Format, entry: u64, level: u32, large: bool) -> u64 {
        let (cap, ecap) = (self.config.cap, self.config.ecap);
        let mut reserved = self.beyond_host(entry & ADDRESS);
        let can_be_large = match (format.first_stage, level) {
            (true, 2) => true,
            (true, 3) => cap & 1 << 56 != 0,
            (false, 2) => cap & 1 << 34 != 0,
            (false, 3) => cap & 1 << 35 != 0,
            _ => false,
        };
        if large {
            let lowest = if format.first_stage { 13 } else { 12 };
            reserved |= entry & ((1 << level_shift(level)) - (1 << lowest));
            reserved |= if can_be_large { 0 } else { 1 << 7 };
        }
        // SNP is for second-stage leaves, and needs SC; the first stage ignores the bit.
        let snoop_allowed = (large || level == 1) && ecap & 1 << 7 != 0;
        if !format.first_stage && !snoop_allowed {
            reserved |= entry & 1 << 11;
        }
        reserved
    }

    fn as_it_is(&self, address: u64) -> Mapping {
        Mapping { phys: address, log2: 12, read: true, write: true }
    }

    /// Reads `N` words at `offset` bytes into the structure at `base`, in the device's view.
    fn words<const N: usize>(
        &self,
        base: u64,
        offset: u64,
    ) -> Result<[u64; N], crate::memory::OutsideMemory> {
        let mut words = [0; N];
        for (word, at) in words.iter_mut().zip((0u64..).step_by(8)) {
            *word = self.memory.device_load(PhysAddr(base.saturating_add(offset + at)))?;
        }
        Ok(words)
    }

    /// The bits of `address` above the host address width.
    fn beyond_host(&self, address: u64) -> u64 {
        address.checked_shr(self.config.host_address_bits).unwrap_or(0)
    }

    /// Non-zero if `did` is wider than CAP.ND says, or the 0 that caching mode reserves.
    fn beyond_domains(&self, did: u16) -> u64 {
        let width = 4 + 2 * (self.config.cap & 7);
        let reserved = self.config.caching_mode() && did == 0;
        u64::from(did) >> width | u64::from(reserved)
    }

    /// The levels that AW stands for, if CAP.SAGAW has them.
    fn supported_levels(&self, width: u64) -> Option<u32> {
        let supported = (1..=3).contains(&width) && self.config.cap & 1 << (8 + width) != 0;
        supported.then_some(width as u32 + 2)
    }

    /// Returns whether `address` is below min(MGAW, AW).
    fn within_guest_width(&self, address: u64, cap: u64, levels: u32) -> bool {
        let maximum = (cap >> 16 & 0x3F) as u32 + 1;
        address >> maximum.min(12 + 9 * levels) == 0
    }
}

/// Checks what `leaf` permits, and that it does not lead to where interrupts are written.
fn permit(request: &Request, way: Way, format: &Format, leaf: &Leaf) -> Result<Mapping, Fault> {
    let mapping = grant(request, way, format, leaf)?;
    way.demand(mapping.phys >> 20 != 0xFEE, format.interrupt_range)?;
    Ok(mapping)
}

/// Checks what `leaf` permits; an ATS translation request is told, and refused only if nothing is left.
fn grant(request: &Request, way: Way, format: &Format, leaf: &Leaf) -> Result<Mapping, Fault> {
    let writes = usize::from(request.kind == Kind::Write);
    way.demand(leaf.present, format.absent[writes])?;
    way.demand(way.privileged || leaf.user, 0x81)?;
    let write = leaf.write || format.first_stage && way.privileged && !format.write_protect;
    let permitted = match (request.at, request.kind) {
        (At::TranslationRequest, _) => leaf.read || write,
        (_, Kind::Write) => write,
        _ => leaf.read,
    };
    way.demand(permitted, format.denied[writes])?;
    let phys = leaf.output | request.address & ((1 << leaf.log2) - 1);
    // A translation that was not asked for with write must leave D alone, so it is told as read-only.
    let write = write && (request.at != At::TranslationRequest || request.kind == Kind::Write);
    Ok(Mapping { phys, log2: leaf.log2, read: leaf.read, write })
}

/// Returns whether the bits above what `levels` levels translate repeat the highest of those: 47, or 56.
fn is_canonical(address: u64, levels: u32) -> bool {
    let top = address as i64 >> (11 + 9 * levels);
    top == 0 || top == -1
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config, Refusal, Requested,
        bench::{Bench, DEVICE, DID, DIRECTORY, FIRST_STAGE, IOVA, PASID, STATUS, at_page, first_stage},
    };
    use crate::{golden, memory::BASE};
    use iommu::{Iova, Pasid, PhysAddr, StreamId};

    /// Bits of an entry that hold the address of a table or page.
    const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
    /// Device-visible memory that is not there.
    const NOWHERE: u64 = 0x1000;
    const R: u64 = 1;
    const W: u64 = 2;
    const US: u64 = 4;
    const A: u64 = 1 << 5;
    const D: u64 = 1 << 6;
    const PS: u64 = 1 << 7;

    fn fault(reason: u8) -> Result<u64, Refusal> {
        Err(Refusal::Fault(reason))
    }

    /// A PASID table entry for second-stage tables at `root`, with AW 2 (48 bits).
    fn second_stage(root: u64) -> [u64; 8] {
        [root | 2 << 6 | 2 << 2 | 1, DID, 0, 0, 0, 0, 0, 0]
    }

    /// A PASID table entry for pass-through.
    const PASS_THROUGH: [u64; 8] = [4 << 6 | 2 << 2 | 1, DID, 0, 0, 0, 0, 0, 0];

    #[test]
    fn golden_first_stage_entries_translate() {
        let mut bench = Bench::scalable(Config::full(), at_page(golden::PASID_FIRST_STAGE, 2, FIRST_STAGE));
        let page = bench.page();
        let [leaf] = at_page([golden::FIRST_STAGE_PAGE & 0xFFF], 0, page);
        bench.map(FIRST_STAGE, 4, IOVA.0, 1, golden::FIRST_STAGE_TABLE & 0xFFF, leaf | 1 << 63);
        bench.put(page + 8, &[0x1234]);

        assert_eq!(bench.read(Iova(IOVA.0 + 8)), Ok(0x1234));
        assert_eq!(bench.write(IOVA, 0x5678), Ok(()));

        assert_eq!(bench.word(page), 0x5678);
        bench.assert_lawful();
    }

    #[test]
    fn golden_contexts_mean_what_their_bits_say() {
        // RID_PASID is 0xFFFFF, so the entry is the last of the table under the last of 2^14 directory entries.
        let mut bench = Bench::scalable(Config::full(), first_stage(FIRST_STAGE));
        bench.set_context(golden::SCALABLE_CONTEXT_RID_PASID);
        let (_, page) = bench.map_page(7);
        bench.put(page, &[42]);
        let table = bench.page();
        bench.put(DIRECTORY + 0x3FFF * 8, &[table | 1]);
        // RID_PRIV asks for SRE.
        bench.put(table + 0x3F * 64, &at_page(golden::PASID_FIRST_STAGE, 2, FIRST_STAGE));

        assert_eq!(bench.read(IOVA), Ok(42));
        assert_eq!(bench.unit.dma_read(DEVICE, None, IOVA, 1), Ok(vec![42]));
        assert_eq!(bench.page_request(0), Requested::Refused(Refusal::Fault(0x47)));
        let translated = bench.unit.ats_translate(DEVICE, None, IOVA, false);
        assert_eq!(translated, Err(Refusal::Fault(0x44)));
    }

    #[test]
    fn a_golden_root_of_which_only_the_upper_half_is_present_serves_the_upper_devices() {
        let bench = Bench::scalable(Config::full(), PASS_THROUGH);
        bench.set_root(golden::SCALABLE_ROOT_UPPER);

        assert_eq!(bench.read(IOVA), fault(0x39));
        let upper = bench.unit.dma_read(StreamId(0x80), None, IOVA, 8);
        assert_eq!(upper, Err(Refusal::Fault(0x40)), "its context table is outside memory");
    }

    #[test]
    fn the_two_halves_of_a_root_entry_are_checked_apart() {
        let bench = Bench::scalable(Config::full(), PASS_THROUGH);
        bench.set_root([golden::SCALABLE_ROOT[0] | 1 << 1, golden::SCALABLE_ROOT[1]]);

        assert_eq!(bench.read(Iova(STATUS)), fault(0x3A));
        let upper = bench.unit.dma_read(StreamId(0x80), None, IOVA, 8);
        assert_eq!(upper, Err(Refusal::Fault(0x40)));
    }

    #[test]
    fn each_structure_of_scalable_mode_has_its_faults() {
        type Break = fn(&Bench);
        let context = |w0: u64, w1: u64| [golden::SCALABLE_CONTEXT[0] & 0xFFF | w0, w1, 0, 0];
        let cases: &[(u8, Break)] = &[
            (0x38, |b| b.replace_root(NOWHERE | 1 << 10)),
            (0x30, |b| b.replace_root(STATUS | 2 << 10)),
            (0x39, |b| b.set_root([0, 1])),
            (0x3A, |b| b.set_root([STATUS | 0x801, 0])),
            (0x3A, |b| b.set_root([1 << 48 | 1, 0])),
            (0x40, |b| b.set_root([NOWHERE | 1, 0])),
            (0x41, |b| b.set_context([0; 4])),
            (0x51, |b| b.set_directory(0)),
            (0x52, |b| b.set_directory(STATUS | 1 << 2 | 1)),
            (0x52, |b| b.set_directory(1 << 48 | 1)),
            (0x58, |b| b.set_directory(NOWHERE | 1)),
            (0x59, |b| b.set_pasid_entry(5, [0; 8])),
        ];
        for &(reason, breaks) in cases {
            let bench = Bench::scalable(Config::full(), PASS_THROUGH);
            breaks(&bench);
            assert_eq!(bench.read(Iova(STATUS)), fault(reason));
            assert_eq!(bench.take_fault(), reason);
            bench.assert_lawful();
        }
        for (reason, entry) in [
            (0x42, context(1 << 5, 0)),
            (0x42, context(0, 1 << 21)),
            (0x42, {
                let mut e = context(0, 0);
                e[3] = 1 << 63;
                e
            }),
            // PDTS 0 has room for 2^13 PASIDs.
            (0x43, [1 | 1 << 3, 1 << 13, 0, 0]),
            (0x45, [1, 0, 0, 0]),
        ] {
            let bench = Bench::scalable(Config::full(), PASS_THROUGH);
            bench.set_context(entry);
            assert_eq!(bench.read(Iova(STATUS)), fault(reason), "{entry:x?}");
        }
    }

    #[test]
    fn a_pasid_beyond_the_directory_faults() {
        let bench = Bench::scalable(Config::full(), PASS_THROUGH);
        bench.set_context([1 | 1 << 3, 0, 0, 0]);
        let read = |pasid| bench.unit.dma_read(DEVICE, Some(Pasid::from_low_bits(pasid)), Iova(STATUS), 1);

        assert_eq!(read(0x2000), Err(Refusal::Fault(0x46)));
        assert_eq!(read(0x1FFF), Err(Refusal::Fault(0x51)));
    }

    #[test]
    fn context_bits_are_reserved_where_the_capability_is_missing() {
        let context = golden::SCALABLE_CONTEXT[0] & 0xFFF;
        for (capability, entry) in [
            (1 << 2, [context, 0, 0, 0]),
            (1 << 29, [context, 0, 0, 0]),
            (1 << 49, [context, 1, 0, 0]),
            (1 << 53, [context, 1 << 20, 0, 0]),
        ] {
            let read = |ecap| {
                let bench = Bench::scalable(Config { ecap, ..Config::full() }, PASS_THROUGH);
                bench.set_context(entry);
                bench.set_pasid_entry(1, [PASS_THROUGH[0], DID, 1, 0, 0, 0, 0, 0]);
                bench.set_pasid_entry(0, [PASS_THROUGH[0], DID, 1, 0, 0, 0, 0, 0]);
                bench.put(STATUS, &[0]);
                bench.unit.dma_read(DEVICE, None, Iova(STATUS), 1)
            };

            assert_eq!(read(Config::full().ecap), Ok(vec![0]));
            assert_eq!(read(Config::full().ecap & !capability), Err(Refusal::Fault(0x42)), "{capability:#x}");
        }
    }

    #[test]
    fn pasid_entry_bits_are_reserved_where_the_capability_is_missing() {
        let [pgsnp, pwsnp, sre] = [(1, 1 << 24), (1, 1 << 23), (2, 1)];
        for (capability, (word, bits)) in [(1 << 7, pgsnp), (1 << 48, pwsnp), (1 << 31, sre)] {
            let read = |ecap| {
                let mut entry = PASS_THROUGH;
                entry[word] |= bits;
                Bench::scalable(Config { ecap, ..Config::full() }, entry).read(Iova(STATUS))
            };

            assert_eq!(read(Config::full().ecap), Ok(0));
            assert_eq!(read(Config::full().ecap & !capability), fault(0x5A), "{capability:#x}");
        }
    }

    #[test]
    fn reserved_bits_of_a_pasid_entry_come_before_what_it_asks_for() {
        for (word, bit) in
            [(0, 5), (0, 9), (0, 10), (1, 16), (1, 22), (1, 27), (2, 1), (2, 7), (2, 8), (3, 0), (7, 63)]
        {
            let mut entry = PASS_THROUGH;
            entry[word] |= 1 << bit;
            entry[0] |= 7 << 6;

            assert_eq!(
                Bench::scalable(Config::full(), entry).read(Iova(STATUS)),
                fault(0x5A),
                "{word} {bit}"
            );
        }
    }

    #[test]
    fn a_pasid_entry_that_asks_for_what_the_unit_lacks_faults() {
        let five_levels = [golden::PASID_FIRST_STAGE_5_LEVELS[0], DID, 1 << 2, 0, 0, 0, 0, 0];
        let nested = [3 << 6 | 2 << 2 | 1, DID, 0, 0, 0, 0, 0, 0];
        let no_width = [2 << 6 | 1, DID, 0, 0, 0, 0, 0, 0];
        for entry in [five_levels, nested, no_width] {
            assert_eq!(Bench::scalable(Config::full(), entry).read(IOVA), fault(0x5B));
        }

        for (bit, entry) in
            [(46, second_stage(FIRST_STAGE)), (47, first_stage(FIRST_STAGE)), (6, PASS_THROUGH)]
        {
            let without = Config { ecap: Config::full().ecap & !(1 << bit), ..Config::full() };
            assert_eq!(Bench::scalable(without, entry).read(IOVA), fault(0x5B));
        }
    }

    #[test]
    fn a_domain_wider_than_the_unit_s_is_reserved() {
        let narrow = Config { cap: Config::qemu().cap & !7, ..Config::qemu() };
        let entry = |did| [PASS_THROUGH[0], did, 0, 0, 0, 0, 0, 0];

        assert_eq!(Bench::scalable(narrow, entry(15)).read(Iova(STATUS)), Ok(0));
        assert_eq!(Bench::scalable(narrow, entry(16)).read(Iova(STATUS)), fault(0x5A));
        assert_eq!(
            Bench::scalable(Config::qemu().with_caching_mode(), entry(0)).read(Iova(STATUS)),
            fault(0x5A)
        );
    }

    #[test]
    fn first_stage_faults_name_what_was_met() {
        let root = |root| Bench::scalable(Config::full(), first_stage(root)).read(IOVA);
        assert_eq!(root(NOWHERE), fault(0x73));
        assert_eq!(root(FIRST_STAGE), fault(0x71));

        let entry = |level, entry| {
            let mut bench = Bench::scalable(Config::full(), first_stage(FIRST_STAGE));
            bench.map(FIRST_STAGE, 4, IOVA.0, level, 7, entry);
            bench.read(IOVA)
        };
        assert_eq!(entry(3, NOWHERE | 7), fault(0x70));
        assert_eq!(entry(1, 0), fault(0x71));
        assert_eq!(entry(4, STATUS | PS | 7), fault(0x72));
        assert_eq!(entry(2, STATUS | PS | 7), fault(0x72), "not aligned to 2 MiB");
        assert_eq!(entry(1, 1 << 48 | 7), fault(0x72));
        assert_eq!(entry(1, STATUS | 3), fault(0x81));
        assert_eq!(entry(1, 0xFEE0_0000 | 7), fault(0x87));
    }

    #[test]
    fn first_stage_rights_are_those_of_every_level() {
        let mut bench = Bench::scalable(Config::full(), first_stage(FIRST_STAGE));
        let page = bench.page();
        bench.map(FIRST_STAGE, 4, IOVA.0, 1, R | US, page | 7);
        let user = Iova(IOVA.0 + (1 << 39));
        bench.map(FIRST_STAGE, 4, user.0, 1, 3, page | 7);

        assert_eq!(bench.read(IOVA), Ok(0));
        assert_eq!(bench.write(IOVA, 1), Err(Refusal::Fault(0x85)));
        assert_eq!(bench.read(user), fault(0x81));
    }

    #[test]
    fn an_address_that_is_not_canonical_faults() {
        let bench = Bench::scalable(Config::full(), first_stage(FIRST_STAGE));

        assert_eq!(bench.read(Iova(0x0000_8000_0000_0000)), fault(0x80));
        assert_eq!(bench.read(Iova(0xFFFF_8000_0000_0000)), fault(0x71));
    }

    #[test]
    fn accessed_and_dirty_are_set_where_they_were_used() {
        let mut bench = Bench::scalable(Config::full(), first_stage(FIRST_STAGE));
        let (leaf, _) = bench.map_page(7);
        let top = FIRST_STAGE + (IOVA.0 >> 39 & 0x1FF) * 8;

        bench.read(IOVA).expect("mapped");
        assert_eq!([bench.word(leaf) & (A | D), bench.word(top) & (A | D)], [A, A]);
        bench.write(IOVA, 1).expect("mapped");

        assert_eq!([bench.word(leaf) & (A | D), bench.word(top) & (A | D)], [A | D, A]);
    }

    #[test]
    fn a_refused_access_leaves_accessed_and_dirty_alone() {
        let mut bench = Bench::scalable(Config::full(), first_stage(FIRST_STAGE));
        let (leaf, _) = bench.map_page(R | US);

        assert_eq!(bench.write(IOVA, 1), Err(Refusal::Fault(0x85)));

        assert_eq!(bench.word(leaf) & (A | D), 0);
    }

    #[test]
    fn large_first_stage_pages_cover_what_they_should() {
        for level in [2, 3] {
            let mut bench = Bench::scalable(Config::full(), first_stage(FIRST_STAGE));
            let size = 1 << (3 + 9 * level);
            // The large page that the modelled memory begins with; IOVA and output agree below its size.
            let base = STATUS & !(size - 1);
            bench.map(FIRST_STAGE, 4, IOVA.0, level, 7, base | PS | 1 << 12 | 7);
            bench.put(STATUS, &[0x77]);

            assert_eq!(bench.read(Iova(IOVA.0 & !(size - 1) | STATUS & (size - 1))), Ok(0x77));
        }
        let without = Config { cap: Config::qemu().cap & !(1 << 56), ..Config::full() };
        let mut bench = Bench::scalable(without, first_stage(FIRST_STAGE));
        bench.map(FIRST_STAGE, 4, IOVA.0, 3, 7, PS | 7);
        assert_eq!(bench.read(IOVA), fault(0x72));
    }

    #[test]
    fn a_supervisor_request_needs_the_entry_s_leave_and_obeys_write_protect() {
        // RID_PRIV makes requests without PASID supervisor requests; they may use supervisor pages.
        let supervisor = |sre: u64, wpe: u64| {
            let mut entry = first_stage(FIRST_STAGE);
            entry[2] = FIRST_STAGE | wpe << 4 | sre;
            let mut bench = Bench::scalable(Config::full(), entry);
            bench.set_context([golden::SCALABLE_CONTEXT[0] & 0xFFF, 1 << 20, 0, 0]);
            bench.map_page(R);
            let read = bench.unit.dma_read(DEVICE, None, IOVA, 1).map(|_| ());
            assert_eq!(bench.fault(0)[1] >> 29 & 1, u64::from(read.is_err()), "PRIV");
            (read, bench.unit.dma_write(DEVICE, None, IOVA, &[1]))
        };

        let refused = Err(Refusal::Fault(0x5D));
        assert_eq!(supervisor(0, 0), (refused, refused));
        assert_eq!(supervisor(1, 0), (Ok(()), Ok(())));
        assert_eq!(supervisor(1, 1), (Ok(()), Err(Refusal::Fault(0x85))));
    }

    #[test]
    fn second_stage_faults_of_scalable_mode_name_what_was_met() {
        let root = |root| Bench::scalable(Config::full(), second_stage(root)).read(IOVA);
        assert_eq!(root(NOWHERE), fault(0x7B));
        assert_eq!(root(FIRST_STAGE), fault(0x79));

        let entry = |level, entry| {
            let mut bench = Bench::scalable(Config::full(), second_stage(FIRST_STAGE));
            bench.map(FIRST_STAGE, 4, IOVA.0, level, R | W, entry);
            (bench.read(IOVA), bench.write(IOVA, 1))
        };
        let both = |reason| (fault(reason), Err(Refusal::Fault(reason)));
        assert_eq!(entry(3, NOWHERE | R), both(0x78));
        assert_eq!(entry(4, FIRST_STAGE | PS | R), both(0x7A));
        assert_eq!(entry(2, FIRST_STAGE | 1 << 11 | R), both(0x7A), "SNP is for leaves");
        assert_eq!(entry(1, STATUS | R), (Ok(0), Err(Refusal::Fault(0x85))));
        assert_eq!(entry(1, STATUS | W), (fault(0x86), Ok(())));
        assert_eq!(entry(1, STATUS | 1 << 11 | PS | R | W), (Ok(0), Ok(())), "PS is ignored at level 1");
        assert_eq!(entry(1, 0xFEEF_F000 | R | W), both(0x87));
        let beyond = Bench::scalable(Config::full(), second_stage(FIRST_STAGE)).read(Iova(1 << 48));
        assert_eq!(beyond, fault(0x84));
    }

    /// A PASID table entry for first-stage tables at the guest's address `first`, over second-stage tables at `second`.
    fn nested(first: u64, second: u64) -> [u64; 8] {
        let [w0, _, w2, ..] = golden::PASID_NESTED;
        // AW 2 in place of 3, 4 levels in place of 5; SRE needs ECAP.SRS.
        [w0 & !(0x7 << 2) & 0xFFF | 2 << 2 | second, DID, w2 & 0x10 | first, 0, 0, 0, 0, 0]
    }

    /// Where the guest's addresses start: far from the host's.
    const GUEST: u64 = 0x10_0000_0000;

    /// A unit behind whose second stage the guest's address `GUEST + n` is the host's `BASE + n`, for all of its memory.
    fn nested_bench(config: Config) -> (Bench, u64) {
        let mut bench = Bench::scalable(config, [0; 8]);
        let second = bench.page();
        for page in (0..0x4_0000).step_by(0x1000) {
            bench.map(second, 4, GUEST + page, 1, R | W, (BASE.0 + page) | R | W);
        }
        bench.set_pasid_entry(PASID.value(), nested(to_guest(FIRST_STAGE), second));
        (bench, second)
    }

    /// The guest's address of the host's `address`.
    fn to_guest(address: u64) -> u64 {
        address - BASE.0 + GUEST
    }

    /// Maps `IOVA` by the guest's tables in `FIRST_STAGE` to the guest's `target`, with `bits`; returns where the leaf is.
    fn map_guest(bench: &mut Bench, level: u32, bits: u64, leaf: u64) -> u64 {
        let mut table = FIRST_STAGE;
        for above in (level + 1..=4).rev() {
            let at = table + (IOVA.0 >> (3 + 9 * above) & 0x1FF) * 8;
            if bench.word(at) == 0 {
                let next = bench.page();
                bench.put(at, &[to_guest(next) | bits]);
            }
            table = (bench.word(at) & ADDRESS) - GUEST + BASE.0;
        }
        let at = table + (IOVA.0 >> (3 + 9 * level) & 0x1FF) * 8;
        bench.put(at, &[leaf]);
        at
    }

    const FULL_NESTING: Config = Config::full().with_nesting();

    #[test]
    fn a_nested_address_goes_through_both_stages() {
        let (mut bench, _) = nested_bench(FULL_NESTING);
        let page = bench.page();
        let leaf = map_guest(&mut bench, 1, 7, to_guest(page) | 7);
        bench.put(page + 8, &[0x1234]);

        assert_eq!(bench.read(Iova(IOVA.0 + 8)), Ok(0x1234));
        assert_eq!(bench.word(leaf) & (A | D), A);
        assert_eq!(bench.write(IOVA, 0x5678), Ok(()));

        assert_eq!((bench.word(page), bench.word(leaf) & (A | D)), (0x5678, A | D));
        bench.assert_lawful();
    }

    #[test]
    fn nested_tables_of_five_levels_translate() {
        let config = FULL_NESTING.with_five_levels();
        let (mut bench, second) = nested_bench(config);
        let top = bench.page();
        bench.put(top, &[to_guest(FIRST_STAGE) | 7]);
        let page = bench.page();
        map_guest(&mut bench, 1, 7, to_guest(page) | 7);
        bench.put(page, &[0x77]);
        let mut entry = nested(to_guest(top), second);
        entry[2] |= 1 << 2;
        bench.set_pasid_entry(PASID.value(), entry);

        assert_eq!(bench.read(IOVA), Ok(0x77));
        assert_eq!(bench.read(Iova(1 << 56)), fault(0x80));
        // Second-stage tables of 5 levels: AW 3.
        let upper = bench.page();
        bench.put(upper, &[second | R | W]);
        entry[0] = entry[0] & 0xFFF & !(7 << 2) | 3 << 2 | upper;
        bench.set_pasid_entry(0, entry);
        let plain = bench.unit.dma_read(DEVICE, None, IOVA, 1);
        assert_eq!(plain, Ok(vec![0x77]));
    }

    #[test]
    fn nested_faults_name_the_stage_and_what_was_met() {
        // The first-stage tables themselves, by the guest's addresses.
        for (first, expected) in [
            // Nothing there in the second stage; nothing there in the first.
            (0x20_0000_0000, 0x79),
            (to_guest(FIRST_STAGE), 0x71),
        ] {
            let (bench, second) = nested_bench(FULL_NESTING);
            bench.set_pasid_entry(PASID.value(), nested(first, second));
            assert_eq!(bench.read(IOVA), fault(expected), "{first:#x}");
            assert_eq!(bench.take_fault(), expected);
        }
        let narrow = Config { cap: FULL_NESTING.cap & !(0x3F << 16) | 38 << 16, ..FULL_NESTING };
        let (bench, second) = nested_bench(narrow);
        bench.set_pasid_entry(PASID.value(), nested(1 << 40, second));
        assert_eq!(bench.read(IOVA), fault(0x5B), "SPT.4");

        // What a table of the second stage says of the pages that first-stage tables are in.
        let second_stage_of = |level: u32, bits: u64| {
            let (mut bench, second) = nested_bench(FULL_NESTING);
            let page = bench.page();
            let leaf = map_guest(&mut bench, 1, 7, to_guest(page) | 7);
            // The table at `level`: the top one, or the last.
            let table = if level == 4 { FIRST_STAGE } else { leaf & !0xFFF };
            bench.map(second, 4, to_guest(table), 1, R | W, table | bits);
            (bench.read(IOVA), bench)
        };
        assert_eq!(second_stage_of(4, W).0, fault(0x75), "SFS.6");
        assert_eq!(second_stage_of(1, W).0, fault(0x76), "SFS.7");
        assert_eq!(second_stage_of(1, 0).0, fault(0x79), "SSS.2");
        assert_eq!(second_stage_of(1, R).0, fault(0x77), "SFS.8: A cannot be set");
        assert_eq!(second_stage_of(1, R | W | 1 << 48).0, fault(0x7A), "SSS.3");

        // The page that it ends at.
        let target = |address: u64, rights: u64| {
            let (mut bench, second) = nested_bench(FULL_NESTING);
            let page = bench.page();
            map_guest(&mut bench, 1, 7, if address == 0 { to_guest(page) } else { address } | 7);
            bench.map(second, 4, to_guest(page), 1, R | W, page | rights);
            (bench.read(IOVA), bench.write(IOVA, 1))
        };
        let both = |reason| (fault(reason), Err(Refusal::Fault(reason)));
        assert_eq!(target(0x20_0000_0000, R | W), both(0x79));
        assert_eq!(target(0, R), (Ok(0), Err(Refusal::Fault(0x85))));
        assert_eq!(target(0, W), (fault(0x86), Ok(())));
        let wide = |config: Config| {
            let (mut bench, _) = nested_bench(config);
            map_guest(&mut bench, 1, 7, 1 << 40 | 7);
            bench.read(IOVA)
        };
        assert_eq!(wide(narrow), fault(0x74), "SFS.5");
        // And what the guest's own tables say.
        let entry = |level, entry| {
            let (mut bench, _) = nested_bench(FULL_NESTING);
            map_guest(&mut bench, level, 7, entry);
            bench.read(IOVA)
        };
        assert_eq!(entry(1, 0), fault(0x71));
        assert_eq!(entry(4, PS | 7), fault(0x72));
        assert_eq!(entry(1, to_guest(STATUS) | 3), fault(0x81));
    }

    #[test]
    fn a_guest_s_own_rights_and_the_host_s_are_both_needed() {
        let (mut bench, _) = nested_bench(FULL_NESTING);
        let page = bench.page();
        map_guest(&mut bench, 1, 7, to_guest(page) | R | US);
        assert_eq!((bench.read(IOVA), bench.write(IOVA, 1)), (Ok(0), Err(Refusal::Fault(0x85))));

        // A large page of the guest over small ones of the host reaches each of those, and no other.
        let (mut bench, _) = nested_bench(FULL_NESTING);
        map_guest(&mut bench, 2, 7, GUEST & !0x1F_FFFF | PS | 7);
        bench.put(STATUS, &[0x66]);
        let large = IOVA.0 & !0x1F_FFFF;
        assert_eq!(bench.read(Iova(large + STATUS - BASE.0)), Ok(0x66));
        assert_eq!(bench.read(Iova(large + 0x10_0000)), fault(0x79));
    }

    #[test]
    fn what_was_nested_is_forgotten_by_its_pasid_and_by_its_domain_and_not_by_pages_of_it() {
        let did = DID << 16;
        let cases: [(&str, [u64; 4], bool); 4] = [
            ("the PASID", [6 | 2 << 4 | did | u64::from(PASID.value()) << 32, 0, 0, 0], true),
            ("the domain", [2 | 2 << 4 | did, 0, 0, 0], true),
            ("another PASID", [6 | 2 << 4 | did | 6 << 32, 0, 0, 0], false),
            ("the page, as the second stage has it", [2 | 3 << 4 | did, 0, 0, 0], false),
        ];
        for (what, descriptor, forgotten) in cases {
            let (mut bench, _) = nested_bench(FULL_NESTING);
            let page = bench.page();
            let leaf = map_guest(&mut bench, 1, 7, to_guest(page) | 7);
            assert_eq!(bench.read(IOVA), Ok(0));
            bench.put(leaf, &[0]);
            let mut descriptor = descriptor;
            if descriptor[0] & 0x3F == 0x32 {
                descriptor[1] = to_guest(page);
            }

            bench.submit(&[descriptor]);

            assert_eq!(bench.read(IOVA).is_err(), forgotten, "{what}");
        }
        // The second stage is remembered under the domain: a PASID-based invalidation leaves it.
        for (descriptor, expected) in [(cases[0].1, Ok(0)), (cases[1].1, fault(0x79))] {
            let (mut bench, second) = nested_bench(FULL_NESTING);
            let page = bench.page();
            map_guest(&mut bench, 1, 7, to_guest(page) | 7);
            assert_eq!(bench.read(IOVA), Ok(0));
            bench.map(second, 4, to_guest(page), 1, R | W, 0);

            bench.submit(&[descriptor]);

            assert_eq!(bench.read(IOVA), expected);
        }
    }

    #[test]
    fn first_stage_tables_of_five_levels_translate_where_the_unit_has_them() {
        let five = |config| {
            let mut entry = first_stage(FIRST_STAGE);
            entry[2] |= 1 << 2;
            let mut bench = Bench::scalable(config, entry);
            let page = bench.page();
            let iova = 0x00AB_2B5A_D3E7_9000;
            bench.map(FIRST_STAGE, 5, iova, 1, 7, page | 7);
            (bench.read(Iova(iova)), bench.read(Iova(1 << 56)))
        };
        assert_eq!(five(Config::full().with_five_levels()), (Ok(0), fault(0x80)));
        assert_eq!(five(Config::full()), (fault(0x5B), fault(0x5B)));
    }

    #[test]
    fn a_unit_that_remembers_finds_what_is_there_now_when_it_is_asked_to() {
        let mut bench = Bench::scalable(Config::full(), first_stage(FIRST_STAGE));
        let (leaf, page) = bench.map_page(7);
        let find = |bench: &Bench| bench.unit.find(DEVICE, Some(PASID), IOVA);
        assert_eq!(bench.read(IOVA), Ok(0));
        assert_eq!(find(&bench), Ok(PhysAddr(page)));

        bench.put(leaf, &[0]);

        assert_eq!(find(&bench), Err(Refusal::Fault(0x71)));
        assert_eq!(bench.read(IOVA), Ok(0), "it goes on remembering");
        assert_eq!(bench.fault(0), [0, 0], "nothing is recorded");
    }

    #[test]
    fn pass_through_reaches_what_it_names_and_nothing_above_the_host_s_width() {
        let bench = Bench::scalable(Config::full(), PASS_THROUGH);
        bench.put(STATUS, &[0x99]);

        assert_eq!(bench.read(Iova(STATUS)), Ok(0x99));
        assert_eq!(bench.write(Iova(STATUS), 0x98), Ok(()));
        assert_eq!(bench.word(STATUS), 0x98);
        assert_eq!(bench.read(Iova(1 << 48)), fault(0x83));
    }

    /// A legacy context entry with the bits of a golden one: translation type `tt`, width `aw`.
    fn legacy_context(tt: u64, aw: u64, root: u64) -> [u64; 2] {
        [root | tt << 2 | 1, DID << 8 | aw]
    }

    fn legacy_read(bench: &Bench, iova: u64) -> Result<u64, Refusal> {
        let bytes = bench.unit.dma_read(DEVICE, None, Iova(iova), 8)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight")))
    }

    #[test]
    fn legacy_tables_of_three_to_five_levels_translate() {
        for (config, aw, levels, iova) in [
            (Config::qemu(), 1, 3, IOVA.0 & 0x7F_FFFF_FFFF),
            (Config::qemu(), 2, 4, IOVA.0),
            (Config::qemu().with_five_levels(), 3, 5, IOVA.0 | 0xAB << 48),
        ] {
            let mut bench = Bench::legacy(config, legacy_context(0, aw, FIRST_STAGE));
            bench.map(FIRST_STAGE, levels, iova, 1, R | W, STATUS | R);
            bench.put(STATUS, &[0x55]);

            assert_eq!(legacy_read(&bench, iova), Ok(0x55));
            assert_eq!(bench.unit.dma_write(DEVICE, None, Iova(iova), &[1]), Err(Refusal::Fault(0x05)));
            assert_eq!(legacy_read(&bench, 1 << (12 + 9 * levels)), fault(0x04));
            assert_eq!(legacy_read(&bench, 0x7000), fault(0x06));
            bench.assert_lawful();
        }
    }

    #[test]
    fn large_second_stage_pages_cover_what_they_should() {
        for level in [2, 3] {
            let mut bench = Bench::legacy(Config::qemu(), legacy_context(0, 2, FIRST_STAGE));
            let size = 1 << (3 + 9 * level);
            bench.map(FIRST_STAGE, 4, 0, level, R | W, STATUS & !(size - 1) | PS | R);
            bench.put(STATUS, &[0x66]);

            assert_eq!(legacy_read(&bench, STATUS & (size - 1)), Ok(0x66));
        }
        let without = Config { cap: Config::qemu().cap & !(3 << 34), ..Config::qemu() };
        let mut bench = Bench::legacy(without, legacy_context(0, 2, FIRST_STAGE));
        bench.map(FIRST_STAGE, 4, 0, 2, R | W, PS | R);
        assert_eq!(legacy_read(&bench, 0), fault(0x0C));
    }

    #[test]
    fn each_structure_of_legacy_mode_has_its_faults() {
        let [c0, c1] = legacy_context(0, 2, FIRST_STAGE);
        for (reason, context) in [
            (0x02, [0, 0]),
            (0x0B, [c0 | 1 << 4, c1]),
            (0x0B, [c0 | 1 << 48, c1]),
            (0x0B, [c0, c1 | 1 << 7]),
            (0x0B, [c0, c1 | 1 << 24]),
            (0x03, [c0 | 3 << 2, c1]),
            (0x03, [c0, c1 & !7 | 3]),
            (0x03, legacy_context(0, 2, NOWHERE)),
        ] {
            let bench = Bench::legacy(Config::qemu(), context);
            assert_eq!(legacy_read(&bench, IOVA.0), fault(reason), "{context:x?}");
            assert_eq!(bench.take_fault(), reason);
        }
        for (reason, root) in
            [(0x01, [0, 0]), (0x0A, [STATUS | 3, 0]), (0x0A, [STATUS | 1, 1]), (0x09, [NOWHERE | 1, 0])]
        {
            let bench = Bench::legacy(Config::qemu(), [c0, c1]);
            bench.set_root(root);
            assert_eq!(legacy_read(&bench, IOVA.0), fault(reason), "{root:x?}");
        }
        let bench = Bench::legacy(Config::qemu(), [c0, c1]);
        bench.replace_root(NOWHERE);
        assert_eq!(legacy_read(&bench, IOVA.0), fault(0x08));
        for (level, entry, reason) in [
            (3, NOWHERE | R, 0x07),
            (1, 0xFEE0_0000 | R, 0x0E),
            (4, PS | R, 0x0C),
            // SNP needs ECAP.SC.
            (1, STATUS | 1 << 11 | R, 0x0C),
        ] {
            let mut bench = Bench::legacy(Config::qemu(), [c0, c1]);
            bench.map(FIRST_STAGE, 4, IOVA.0, level, R | W, entry);
            assert_eq!(legacy_read(&bench, IOVA.0), fault(reason));
        }
    }

    #[test]
    fn contexts_are_found_by_bus_device_and_function() {
        for sid in [0x0105, 0x01FF, 0xFF80] {
            let (bus, devfn) = (sid >> 8, sid & 0xFF);
            let read = |bench: &Bench, sid| bench.unit.dma_read(StreamId(sid), None, Iova(STATUS), 1);

            let mut legacy = Bench::legacy(Config::qemu(), [0, 0]);
            legacy.set_context_on_bus(bus.into(), u64::from(devfn) * 16, &legacy_context(2, 2, 0));
            assert_eq!(read(&legacy, sid), Ok(vec![0]));
            assert_eq!(read(&legacy, sid ^ 1), Err(Refusal::Fault(0x02)));

            // In scalable mode each half of the root entry has a table for 128 functions.
            let mut scalable = Bench::scalable(Config::full(), PASS_THROUGH);
            let offset = u64::from(devfn & 0x7F) * 32;
            scalable.set_context_on_bus(bus.into(), offset, &at_page(golden::SCALABLE_CONTEXT, 0, DIRECTORY));
            if devfn >= 128 {
                scalable.swap_root_halves(bus.into());
            }
            assert_eq!(read(&scalable, sid), Ok(vec![0]));
            assert_eq!(read(&scalable, sid ^ 0x80), Err(Refusal::Fault(0x39)));
        }
    }

    #[test]
    fn legacy_mode_has_no_pasids() {
        let bench = Bench::legacy(Config::qemu(), legacy_context(2, 2, 0));

        assert_eq!(bench.read(Iova(STATUS)), fault(0x31));
    }

    #[test]
    fn legacy_pass_through_is_not_translated_and_ignores_the_pointer() {
        let [c0, c1] = legacy_context(2, 2, 1 << 48);
        let bench = Bench::legacy(Config::qemu(), [c0, c1 | 0xFFFF << 8]);
        bench.put(STATUS, &[0x11]);

        assert_eq!(legacy_read(&bench, STATUS), Ok(0x11));
        assert_eq!(legacy_read(&bench, 1 << 48), fault(0x04));
    }

    #[test]
    fn a_legacy_context_says_whether_the_device_may_use_ats() {
        for (tt, expected) in [(0, Err(Refusal::Fault(0x0D))), (1, Ok(STATUS))] {
            let mut bench = Bench::legacy(Config::qemu(), legacy_context(tt, 2, FIRST_STAGE));
            bench.map(FIRST_STAGE, 4, IOVA.0, 1, R | W, STATUS | R);

            let translated = bench.unit.ats_translate(DEVICE, None, IOVA, false);

            assert_eq!(translated.map(|entry| entry.phys.0), expected);
        }
    }

    #[test]
    fn an_address_is_no_wider_than_the_unit_s_maximum() {
        let cap = Config::qemu().cap & !(0x3F << 16) | 39 << 16;
        let mut bench = Bench::legacy(Config { cap, ..Config::qemu() }, legacy_context(0, 2, FIRST_STAGE));
        bench.map(FIRST_STAGE, 4, (1 << 40) - 4096, 1, R | W, STATUS | R);

        assert_eq!(legacy_read(&bench, (1 << 40) - 4096), Ok(0));
        assert_eq!(legacy_read(&bench, 1 << 40), fault(0x04));
    }

    #[test]
    fn a_translation_that_was_written_through_is_remembered_for_writes() {
        let mut bench = Bench::scalable(Config::full(), first_stage(FIRST_STAGE));
        let (leaf, _) = bench.map_page(7);
        bench.read(IOVA).expect("mapped");
        bench.write(IOVA, 1).expect("mapped");

        bench.put(leaf, &[0]);

        assert_eq!(bench.write(IOVA, 2), Ok(()));
        assert_eq!(bench.read(IOVA), Ok(2));
    }

    #[test]
    fn a_translation_that_was_only_read_through_is_walked_again_for_a_write() {
        let mut bench = Bench::scalable(Config::full(), first_stage(FIRST_STAGE));
        let (leaf, _) = bench.map_page(7);
        bench.read(IOVA).expect("mapped");

        bench.put(leaf, &[0]);

        assert_eq!(bench.write(IOVA, 1), Err(Refusal::Fault(0x71)));
    }

    #[test]
    fn fault_processing_disable_counts_from_every_entry_on_the_way() {
        type Disable = fn(&Bench);
        let cases: &[(u8, bool, Disable)] = &[
            (0x41, false, |b| b.set_context([2, 0, 0, 0])),
            (0x51, false, |b| b.set_directory(golden::PASID_DIRECTORY_FPD)),
            (0x59, false, |b| b.set_pasid_entry(5, [2, 0, 0, 0, 0, 0, 0, 0])),
            (0x52, false, |b| {
                b.set_context([golden::SCALABLE_CONTEXT[0] & 0xFFF | 2, 0, 0, 0]);
                b.set_directory(1 << 2 | 1);
            }),
            // An access error is recorded all the same.
            (0x58, true, |b| b.set_directory(NOWHERE | 3)),
            (0x39, true, |b| b.set_root([2, 0])),
        ];
        for &(reason, recorded, disable) in cases {
            let bench = Bench::scalable(Config::full(), PASS_THROUGH);

            disable(&bench);

            assert_eq!(bench.read(Iova(STATUS)), fault(reason));
            assert_eq!(bench.fault(0)[1] >> 63 != 0, recorded, "{reason:#x}");
        }
    }

    #[test]
    fn fault_processing_disable_counts_in_legacy_mode_too() {
        let bench = Bench::legacy(Config::qemu(), [2, 0]);

        assert_eq!(legacy_read(&bench, IOVA.0), fault(0x02));
        assert_eq!(bench.fault(0), [0, 0]);
        bench.set_legacy_context(legacy_context(2, 2, 0));

        assert_eq!(legacy_read(&bench, STATUS), Ok(0), "what is not present is not remembered");
    }

    #[test]
    fn an_entry_that_is_not_present_is_remembered_in_caching_mode_alone() {
        for (config, expected) in [(Config::full(), Ok(0)), (Config::full().with_caching_mode(), fault(0x59))]
        {
            let bench = Bench::scalable(config, [0; 8]);
            assert_eq!(bench.read(Iova(STATUS)), fault(0x59));

            bench.set_pasid_entry(PASID.value(), PASS_THROUGH);

            assert_eq!(bench.read(Iova(STATUS)), expected);
        }
        for (config, expected) in [(Config::full(), Ok(0)), (Config::full().with_caching_mode(), fault(0x79))]
        {
            let mut bench = Bench::scalable(config, second_stage(FIRST_STAGE));
            assert_eq!(bench.read(IOVA), fault(0x79));

            bench.map(FIRST_STAGE, 4, IOVA.0, 1, R | W, STATUS | R);

            assert_eq!(bench.read(IOVA), expected);
        }
    }
}
