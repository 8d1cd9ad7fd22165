//! The devices' side of the unit: reads and writes, translation requests, and what device TLBs hold.

use super::{
    State, VtdUnit,
    registers::TE,
    walk::{At, Kind, Mapping, Request},
};
use crate::{
    device::{self, DeviceTlbEntry},
    memory::OutsideMemory,
};
use iommu::{Iova, Pasid, PhysAddr, StreamId};

/// Why a device did not get what it asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// Blocked by the unit, for this reason (FRCD.FR). Recorded, unless FPD or an overflow kept it from being.
    Fault(u8),
    /// An ATS translation request found no mapping, or none that permits anything (R=W=0). Nothing is recorded.
    NoAccess,
    /// The unit does not translate now (GSTS.TES=0), and a request of this kind has no meaning untranslated.
    Unsupported,
    /// Let through, but there is no memory at this physical address.
    NoMemory(PhysAddr),
}

impl From<OutsideMemory> for Refusal {
    fn from(OutsideMemory(address): OutsideMemory) -> Self {
        Self::NoMemory(address)
    }
}

/// The 16 bits of a requester ID that a source-id holds.
pub(super) fn sid(stream: StreamId) -> u16 {
    stream.0 as u16
}

impl VtdUnit {
    /// The device reads `bytes` bytes at `iova`, untranslated.
    pub fn dma_read(
        &self,
        stream: StreamId,
        pasid: Option<Pasid>,
        iova: Iova,
        bytes: usize,
    ) -> Result<Vec<u8>, Refusal> {
        let mut state = self.lock();
        device::load(&state.memory.clone(), iova, bytes, |at| state.reach(stream, pasid, at, Kind::Read))
    }

    /// The device writes `bytes` at `iova`, untranslated. What lies before a refused page stays written.
    pub fn dma_write(
        &self,
        stream: StreamId,
        pasid: Option<Pasid>,
        iova: Iova,
        bytes: &[u8],
    ) -> Result<(), Refusal> {
        let mut state = self.lock();
        device::store(&state.memory.clone(), iova, bytes, |at| state.reach(stream, pasid, at, Kind::Write))
    }

    /// The device asks for the translation of `iova`, for writing too or not, and keeps it in its device TLB.
    pub fn ats_translate(
        &self,
        stream: StreamId,
        pasid: Option<Pasid>,
        iova: Iova,
        write: bool,
    ) -> Result<DeviceTlbEntry, Refusal> {
        self.lock().ats_translate(stream, pasid, iova, if write { Kind::Write } else { Kind::Read })
    }

    /// The device reads through its device TLB: it asks for a translation where it has none.
    pub fn ats_read(
        &self,
        stream: StreamId,
        pasid: Option<Pasid>,
        iova: Iova,
        bytes: usize,
    ) -> Result<Vec<u8>, Refusal> {
        let mut state = self.lock();
        device::load(&state.memory.clone(), iova, bytes, |at| {
            state.reach_translated(stream, pasid, at, Kind::Read)
        })
    }

    /// The device writes through its device TLB: it asks for a translation where it has none.
    pub fn ats_write(
        &self,
        stream: StreamId,
        pasid: Option<Pasid>,
        iova: Iova,
        bytes: &[u8],
    ) -> Result<(), Refusal> {
        let mut state = self.lock();
        device::store(&state.memory.clone(), iova, bytes, |at| {
            state.reach_translated(stream, pasid, at, Kind::Write)
        })
    }

    /// Returns where an untranslated read would go, at a unit that remembers nothing. It leaves no trace but A and D in paging
    /// entries.
    pub fn find(&self, stream: StreamId, pasid: Option<Pasid>, iova: Iova) -> Result<PhysAddr, Refusal> {
        let mut state = self.lock();
        let request = state.request(stream, pasid, iova.0, Kind::Read, At::Untranslated);
        let remembered = std::mem::take(&mut state.caches);
        let found = state.translate(&request);
        state.caches = remembered;
        found.map(|mapping| PhysAddr(mapping.phys)).map_err(|fault| Refusal::Fault(fault.reason))
    }

    /// Returns what the device TLB of `stream` holds.
    pub fn device_tlb(&self, stream: StreamId) -> Vec<DeviceTlbEntry> {
        let state = self.lock();
        state.caches.device.iter().filter(|entry| sid(entry.stream) == sid(stream)).copied().collect()
    }
}

impl State {
    /// Finds the physical address of one untranslated access.
    fn reach(
        &mut self,
        stream: StreamId,
        pasid: Option<Pasid>,
        iova: Iova,
        kind: Kind,
    ) -> Result<PhysAddr, Refusal> {
        if self.status() & TE == 0 {
            let passes = pasid.is_none() && !self.is_protected(iova.0);
            return if passes { Ok(PhysAddr(iova.0)) } else { Err(Refusal::Unsupported) };
        }
        let request = self.request(stream, pasid, iova.0, kind, At::Untranslated);
        self.permitted(&request).map(|mapping| PhysAddr(mapping.phys))
    }

    /// Finds the physical address of one access through the device TLB, and sends it as translated.
    fn reach_translated(
        &mut self,
        stream: StreamId,
        pasid: Option<Pasid>,
        iova: Iova,
        kind: Kind,
    ) -> Result<PhysAddr, Refusal> {
        let write = kind == Kind::Write;
        let mut held = self.caches.device.iter().filter(|entry| sid(entry.stream) == sid(stream));
        let entry = match held.find(|entry| entry.holds(pasid, iova) && entry.permits(write)) {
            Some(&entry) => entry,
            None => self.ats_translate(stream, pasid, iova, kind)?,
        };
        if !entry.permits(write) {
            return Err(Refusal::NoAccess);
        }
        let address = entry.translated(iova).0;
        let request = self.request(stream, None, address, kind, At::Translated);
        self.permitted(&request).map(|mapping| PhysAddr(mapping.phys))
    }

    fn ats_translate(
        &mut self,
        stream: StreamId,
        pasid: Option<Pasid>,
        iova: Iova,
        kind: Kind,
    ) -> Result<DeviceTlbEntry, Refusal> {
        if self.status() & TE == 0 {
            return Err(Refusal::Unsupported);
        }
        let request = self.request(stream, pasid, iova.0, kind, At::TranslationRequest);
        let Mapping { phys, log2, read, write } = self.permitted(&request)?;
        let below = (1 << log2) - 1;
        let entry = DeviceTlbEntry {
            stream,
            pasid,
            iova: Iova(iova.0 & !below),
            phys: PhysAddr(phys & !below),
            bytes: 1 << log2,
            read,
            write,
        };
        let replaced =
            |old: &DeviceTlbEntry| (sid(old.stream), old.pasid, old.iova) == (sid(stream), pasid, entry.iova);
        self.caches.device.retain(|old| !replaced(old));
        self.caches.device.push(entry);
        Ok(entry)
    }

    fn request(&self, stream: StreamId, pasid: Option<Pasid>, address: u64, kind: Kind, at: At) -> Request {
        Request { sid: sid(stream), pasid: pasid.map(Pasid::value), address, kind, at }
    }

    /// Translates, and records a fault; a translation request that only lacks a mapping is answered instead.
    fn permitted(&mut self, request: &Request) -> Result<Mapping, Refusal> {
        self.translate(request).map_err(|fault| {
            let lacks_mapping = matches!(fault.reason, 0x05 | 0x06 | 0x71 | 0x79 | 0x81 | 0x85 | 0x86);
            if request.at == At::TranslationRequest && lacks_mapping {
                return Refusal::NoAccess;
            }
            self.record(request, &fault);
            Refusal::Fault(fault.reason)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config,
        bench::{Bench, DEVICE, FIRST_STAGE, IOVA, PASID, STATUS, first_stage},
    };
    use super::*;
    use crate::golden;

    fn bench() -> Bench {
        Bench::scalable(Config::full(), first_stage(FIRST_STAGE))
    }

    #[test]
    fn without_translation_an_address_is_itself_and_a_pasid_has_no_meaning() {
        let bench = Bench::new(Config::qemu());
        bench.put(STATUS, &[0x1234]);

        assert_eq!(bench.unit.dma_read(DEVICE, None, Iova(STATUS), 2), Ok(vec![0x34, 0x12]));
        assert_eq!(bench.read(Iova(STATUS)), Err(Refusal::Unsupported));
        assert_eq!(bench.unit.ats_translate(DEVICE, None, Iova(STATUS), false), Err(Refusal::Unsupported));
    }

    #[test]
    fn an_access_is_translated_page_by_page() {
        let mut bench = bench();
        let pages = [bench.page(), bench.page()];
        bench.map(FIRST_STAGE, 4, IOVA.0, 1, 7, pages[1] | 7);
        bench.map(FIRST_STAGE, 4, IOVA.0 + 0x1000, 1, 7, pages[0] | 7);

        let start = Iova(IOVA.0 + 0xFFC);
        assert_eq!(bench.write(start, 0x1122_3344_5566_7788), Ok(()));

        assert_eq!(bench.word(pages[1] + 0xFF8) >> 32, 0x5566_7788);
        assert_eq!(bench.word(pages[0]), 0x1122_3344);
        assert_eq!(bench.read(start), Ok(0x1122_3344_5566_7788));
        let far = bench.unit.dma_read(DEVICE, Some(PASID), start, 0x1008);
        assert_eq!(far, Err(Refusal::Fault(0x71)));
    }

    #[test]
    fn a_mapping_to_no_memory_is_not_the_unit_s_fault() {
        let mut bench = bench();
        bench.map(FIRST_STAGE, 4, IOVA.0, 1, 7, 0x1000 | 7);

        assert_eq!(bench.read(IOVA), Err(Refusal::NoMemory(PhysAddr(0x1000))));
        assert_eq!(bench.fault(0), [0, 0]);
    }

    #[test]
    fn a_device_keeps_the_translation_that_it_asked_for() {
        let mut bench = bench();
        let (leaf, page) = bench.map_page(7);
        bench.put(page, &[1]);

        let entry = bench.unit.ats_translate(DEVICE, Some(PASID), IOVA, false).expect("mapped");
        assert_eq!(bench.unit.device_tlb(DEVICE), [entry]);
        assert_eq!((entry.phys.0, entry.bytes, entry.read, entry.write), (page, 4096, true, false));
        bench.put(leaf, &[0]);

        assert_eq!(bench.unit.ats_read(DEVICE, Some(PASID), IOVA, 1), Ok(vec![1]));
        let write = bench.unit.ats_write(DEVICE, Some(PASID), IOVA, &[2]);
        assert_eq!(write, Err(Refusal::NoAccess), "it asks again, for writing");
    }

    #[test]
    fn a_device_finds_each_of_its_translations() {
        let mut bench = bench();
        for (at, data) in [(0, 1), (0x1000, 2), (0x2000, 3)] {
            let page = bench.page();
            bench.map(FIRST_STAGE, 4, IOVA.0 + at, 1, 7, page | 7);
            bench.put(page, &[data]);
        }

        let order = [0x1000, 0, 0x2000, 0x1000];
        let read = order.map(|at| bench.unit.ats_read(DEVICE, Some(PASID), Iova(IOVA.0 + at), 1));

        assert_eq!(read, [2, 1, 3, 2].map(|data| Ok(vec![data])));
        assert_eq!(bench.unit.device_tlb(DEVICE).len(), 3);
    }

    #[test]
    fn a_translation_for_writing_sets_dirty_and_another_does_not() {
        let mut bench = bench();
        let (leaf, page) = bench.map_page(7);

        bench.unit.ats_translate(DEVICE, Some(PASID), IOVA, false).expect("mapped");
        assert_eq!(bench.word(leaf) & 0x60, 0x20);
        bench.unit.ats_write(DEVICE, Some(PASID), IOVA, &[7]).expect("mapped");

        assert_eq!(bench.word(leaf) & 0x60, 0x60);
        assert_eq!(bench.word(page), 7);
        assert_eq!(bench.unit.device_tlb(DEVICE).len(), 1);
    }

    #[test]
    fn a_large_page_is_translated_as_a_whole() {
        let mut bench = bench();
        bench.map(FIRST_STAGE, 4, IOVA.0, 2, 7, 0x8_0020_0000 | 1 << 7 | 7);

        let entry = bench.unit.ats_translate(DEVICE, Some(PASID), IOVA, false).expect("mapped");

        assert_eq!((entry.iova.0, entry.phys.0, entry.bytes), (IOVA.0 & !0x1F_FFFF, 0x8_0020_0000, 2 << 20));
        let offset = IOVA.0 & 0x1F_FFFF;
        let read = bench.unit.ats_read(DEVICE, Some(PASID), IOVA, 1);
        assert_eq!(read, Err(Refusal::NoMemory(PhysAddr(0x8_0020_0000 + offset))));
        assert_eq!(bench.unit.device_tlb(DEVICE), [entry]);
    }

    #[test]
    fn a_page_that_is_only_read_is_told_so_and_not_made_dirty() {
        let mut bench = bench();
        let (leaf, _) = bench.map_page(5);

        let entry = bench.unit.ats_translate(DEVICE, Some(PASID), IOVA, true).expect("mapped");

        assert_eq!((entry.read, entry.write, bench.word(leaf) & 0x60), (true, false, 0x20));
        assert_eq!(bench.unit.ats_write(DEVICE, Some(PASID), IOVA, &[1]), Err(Refusal::NoAccess));
    }

    #[test]
    fn a_translation_that_is_missing_is_no_fault_and_a_broken_table_is() {
        let mut bench = bench();
        let translate = |bench: &Bench| bench.unit.ats_translate(DEVICE, Some(PASID), IOVA, false);

        assert_eq!(translate(&bench), Err(Refusal::NoAccess));
        assert_eq!(bench.fault(0), [0, 0]);
        bench.map_page(1 << 51 | 7);

        assert_eq!(translate(&bench), Err(Refusal::Fault(0x72)));
        assert_eq!(bench.take_fault(), 0x72);
    }

    #[test]
    fn a_device_tlb_forgets_what_it_is_told_to() {
        let [w0, all, ..] = golden::PASID_DEVICE_TLB_ALL;
        let with_pasid = |pasid: u64, w1: u64| [w0 & 0xF | 2 << 52 | 0x20 << 16 | pasid << 32, w1, 0, 0];
        let without_pasid = |w1: u64| [2 << 52 | 0x20 << 32 | 3, w1, 0, 0];
        for (words, forgotten) in [
            (with_pasid(5, all), true),
            (with_pasid(5, IOVA.0), true),
            (with_pasid(6, all | 1), true),
            (without_pasid(0x7FFF_FFFF_FFFF_F001), true),
            (without_pasid(IOVA.0), true),
            (with_pasid(6, all), false),
            (with_pasid(5, IOVA.0 + 0x1000), false),
            (golden::PASID_CACHE_GLOBAL, false),
        ] {
            let mut bench = bench();
            bench.map_page(7);
            bench.unit.ats_translate(DEVICE, Some(PASID), IOVA, false).expect("mapped");

            bench.submit(&[words]);

            assert_eq!(bench.unit.device_tlb(DEVICE).is_empty(), forgotten, "{words:x?}");
            bench.assert_lawful();
        }
    }

    #[test]
    fn a_device_that_holds_back_its_answer_still_uses_what_it_knows() {
        let mut bench = bench();
        let (leaf, _) = bench.map_page(7);
        bench.unit.ats_translate(DEVICE, Some(PASID), IOVA, false).expect("mapped");
        bench.put(leaf, &[0]);
        bench.unit.hold_device_tlb(DEVICE);

        bench.submit(&[[2 << 52 | 0x20 << 32 | 3, IOVA.0, 0, 0]]);
        assert_eq!(bench.unit.ats_read(DEVICE, Some(PASID), IOVA, 1), Ok(vec![0]));
        bench.unit.release_device_tlb(DEVICE);

        assert_eq!(bench.unit.device_tlb(DEVICE), []);
    }

    #[test]
    fn translated_requests_need_the_device_tlb_to_be_enabled() {
        let mut bench = bench();
        bench.map_page(7);
        bench.unit.ats_translate(DEVICE, Some(PASID), IOVA, false).expect("mapped");

        bench.set_context([golden::SCALABLE_CONTEXT[0] & !(1 << 2), 0, 0, 0]);
        bench.submit(&[golden::CONTEXT_GLOBAL]);

        assert_eq!(bench.unit.ats_read(DEVICE, Some(PASID), IOVA, 1), Err(Refusal::Fault(0x44)));
        assert_eq!(bench.fault(0)[1] >> 60 & 3, 2);
    }
}
