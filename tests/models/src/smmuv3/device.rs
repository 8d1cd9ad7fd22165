//! The devices' side of the unit: reads and writes, translation requests, and what device TLBs hold.

use super::{
    DeviceTlbEntry, SmmuUnit, State,
    caches::DeviceEntry,
    configuration::{full_ats, ste_config},
    registers::{ABORT, ATSCHK, GBPA, SMMUEN},
    walk::{Fault, Kind, Mapping, Request, Stop},
};
use crate::{device, memory::OutsideMemory};
use iommu::{Iova, Pasid, PhysAddr, StreamId};

/// Why a device did not get what it asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// Aborted by the unit, for this event. Recorded, unless software chose otherwise or there was no room.
    Fault(u8),
    /// Aborted by the unit without an event: STE.Config, or GBPA.
    Aborted,
    /// Completed by the unit, a read with zero, because CD.A says so.
    Ignored,
    /// Stalled by the unit under this tag, until CMD_RESUME.
    Stalled(u16),
    /// An ATS translation request found no mapping, or none that permits anything (R=W=0). Nothing is recorded.
    NoAccess,
    /// An ATS translation request to which ATS is off (Unsupported Request).
    Unsupported,
    /// An ATS translation request that met a wrong configuration (Completer Abort). Nothing is recorded.
    CompleterAbort,
    /// Let through, but there is no memory at this physical address.
    NoMemory(PhysAddr),
}

impl From<OutsideMemory> for Refusal {
    fn from(OutsideMemory(address): OutsideMemory) -> Self {
        Self::NoMemory(address)
    }
}

impl SmmuUnit {
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
        self.lock().ats_translate(stream, pasid, iova, write)
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

    /// Returns what the device TLB of `stream` holds.
    pub fn device_tlb(&self, stream: StreamId) -> Vec<DeviceTlbEntry> {
        let state = self.lock();
        let entries = state.caches.device.iter().map(|held| held.entry);
        entries.filter(|entry| entry.stream == stream).collect()
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
        if !self.on(SMMUEN) {
            return self.bypass(iova);
        }
        let request = request(stream, pasid, iova, kind);
        match self.translate(&request) {
            Ok(mapping) => Ok(PhysAddr(mapping.phys)),
            Err(stop) => Err(self.refuse(&request, stop)),
        }
    }

    /// While SMMUEN=0, GBPA decides.
    fn bypass(&self, iova: Iova) -> Result<PhysAddr, Refusal> {
        let aborts = self.get(GBPA) & ABORT != 0 || iova.0 >> self.config.output_bits() != 0;
        if aborts { Err(Refusal::Aborted) } else { Ok(PhysAddr(iova.0)) }
    }

    /// Records why an untranslated access was stopped, or stalls it.
    fn refuse(&mut self, request: &Request, stop: Stop) -> Refusal {
        let fault = match stop {
            Stop::Silent => return Refusal::Aborted,
            Stop::Unrecorded(id) => return Refusal::Fault(id),
            Stop::Fault(fault) => fault,
        };
        if fault.policy.stall {
            return Refusal::Stalled(self.stall(request, &fault));
        }
        self.report(request, &fault);
        if fault.policy.abort { Refusal::Fault(fault.id) } else { Refusal::Ignored }
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
        let held = self.caches.device.iter().map(|held| held.entry);
        let mut held = held.filter(|entry| entry.stream == stream);
        let entry = match held.find(|entry| entry.holds(pasid, iova) && entry.permits(write)) {
            Some(entry) => entry,
            None => self.ats_translate(stream, pasid, iova, write)?,
        };
        if !entry.permits(write) {
            return Err(Refusal::NoAccess);
        }
        let phys = entry.translated(iova);
        let request = request(stream, pasid, Iova(phys.0), kind);
        self.admit_translated(&request)?;
        Ok(phys)
    }

    /// Checks translated traffic against its stream; without ATSCHK it passes unseen.
    fn admit_translated(&mut self, request: &Request) -> Result<(), Refusal> {
        let forbidden = Fault::configuration(0x07, 0);
        if !self.on(SMMUEN) {
            self.report(request, &forbidden);
            return Err(Refusal::Fault(0x07));
        }
        if !self.on(ATSCHK) {
            return Ok(());
        }
        match self.ste(request) {
            Ok(ste) if ste_config(&ste) < 4 => Err(Refusal::Aborted),
            Ok(ste) if !full_ats(&ste) => {
                self.report(request, &forbidden);
                Err(Refusal::Fault(0x07))
            }
            Ok(_) => Ok(()),
            // An invalid entry: no event.
            Err(_) => Err(Refusal::Aborted),
        }
    }

    fn ats_translate(
        &mut self,
        stream: StreamId,
        pasid: Option<Pasid>,
        iova: Iova,
        write: bool,
    ) -> Result<DeviceTlbEntry, Refusal> {
        let request = request(stream, pasid, iova, Kind::Translation);
        let Mapping { phys, log2, read, write, tag } = self.answer_translation(&request, write)?;
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
        if !read && !write {
            return Err(Refusal::NoAccess);
        }
        if let Some(tag) = tag {
            let replaced =
                |old: &DeviceTlbEntry| (old.stream, old.pasid, old.iova) == (stream, pasid, entry.iova);
            self.caches.device.retain(|old| !replaced(&old.entry));
            self.caches.device.push(DeviceEntry { entry, tag });
        }
        Ok(entry)
    }

    /// Answers an ATS translation request. Nothing is recorded, save that there should have been none.
    fn answer_translation(&mut self, request: &Request, write: bool) -> Result<Mapping, Refusal> {
        if !self.config.ats() {
            return Err(Refusal::Unsupported);
        }
        if !self.on(SMMUEN) {
            self.report_bad_translation_request(request, write);
            return Err(Refusal::Unsupported);
        }
        let ste = self.ste(request).map_err(|_| Refusal::CompleterAbort)?;
        if ste_config(&ste) < 4 {
            return Err(Refusal::Unsupported);
        }
        if !full_ats(&ste) {
            self.report_bad_translation_request(request, write);
            return Err(Refusal::Unsupported);
        }
        self.translate(request).map_err(|stop| match stop {
            Stop::Fault(Fault { id: 0x10..=0x13, .. }) => Refusal::NoAccess,
            _ => Refusal::CompleterAbort,
        })
    }
}

fn request(stream: StreamId, pasid: Option<Pasid>, iova: Iova, kind: Kind) -> Request {
    Request { sid: stream.0, ssid: pasid.map(Pasid::value), address: iova.0, kind }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config,
        bench::{Bench, DEVICE, IOVA, IPA, PAGE, PAGE_2, PASID, SID, STAGE_1, SYNC, VMID, stage_1, stage_2},
        registers::SMMUEN,
    };
    use super::*;
    use crate::golden_smmuv3 as golden;

    fn bench() -> Bench {
        let config = Config::full();
        Bench::attached(config, stage_1(&config, 3))
    }

    fn translate(bench: &Bench, write: bool) -> Result<DeviceTlbEntry, Refusal> {
        bench.unit.ats_translate(DEVICE, Some(PASID), IOVA, write)
    }

    #[test]
    fn an_access_is_translated_page_by_page() {
        let mut bench = bench();
        let pages = [bench.page(), bench.page()];
        bench.map(STAGE_1, 0, IOVA.0, 3, pages[1] | PAGE);
        bench.map(STAGE_1, 0, IOVA.0 + 0x1000, 3, pages[0] | PAGE);

        let start = Iova(IOVA.0 + 0xFFC);
        assert_eq!(bench.write(start, 0x1122_3344_5566_7788), Ok(()));

        assert_eq!(bench.word(pages[1] + 0xFF8) >> 32, 0x5566_7788);
        assert_eq!(bench.word(pages[0]), 0x1122_3344);
        assert_eq!(bench.read(start), Ok(0x1122_3344_5566_7788));
    }

    #[test]
    fn a_device_keeps_the_translation_that_it_asked_for() {
        let mut bench = bench();
        let (leaf, page) = bench.map_page(PAGE | 1 << 7);
        bench.put(page, &[1]);

        let entry = translate(&bench, false).expect("mapped");
        assert_eq!(bench.unit.device_tlb(DEVICE), [entry]);
        assert_eq!((entry.phys.0, entry.bytes, entry.read, entry.write), (page, 4096, true, false));
        bench.put(leaf, &[0]);
        bench.submit(&[golden::TLBI_NSNH_ALL, SYNC]);

        assert_eq!(bench.unit.ats_read(DEVICE, Some(PASID), IOVA, 1), Ok(vec![1]));
        let write = bench.unit.ats_write(DEVICE, Some(PASID), IOVA, &[2]);
        assert_eq!(write, Err(Refusal::NoAccess), "it asks again, for writing");
        bench.assert_events(&[]);
        bench.assert_lawful();
    }

    #[test]
    fn stage_2_alone_serves_devices_too() {
        let config = Config::full();
        let mut bench = Bench::attached(config, stage_2(&config));
        let (_, page) = bench.map_page_2(PAGE_2);

        assert_eq!(bench.unit.ats_write(DEVICE, None, IPA, &[8]), Ok(()));

        assert_eq!(bench.word(page), 8);
    }

    #[test]
    fn a_translation_that_is_missing_is_no_fault() {
        let mut bench = bench();
        assert_eq!(translate(&bench, false), Err(Refusal::NoAccess));
        bench.map_page(PAGE & !(1 << 6));

        assert_eq!(translate(&bench, false), Err(Refusal::NoAccess));
        assert_eq!(bench.unit.device_tlb(DEVICE), []);
        bench.assert_events(&[]);
    }

    #[test]
    fn the_stream_decides_whether_a_device_may_ask() {
        let with_eats = |eats: u64| {
            let mut ste = stage_1(&Config::full(), 3);
            ste[1] = ste[1] & !(3 << 28) | eats << 28;
            ste
        };
        // Span of one unit, R; the substream.
        let refused = [SID << 32 | 5 << 12 | 1 << 11 | 0x05, 1 << 31 | 1, IOVA.0, 0];
        for (ste, refusal, events) in [
            (with_eats(0), Refusal::Unsupported, vec![refused]),
            (with_eats(3), Refusal::Unsupported, vec![refused]),
            (golden::STE_BYPASS, Refusal::Unsupported, vec![refused]),
            (golden::STE_ABORT, Refusal::Unsupported, vec![]),
            ([0; 8], Refusal::CompleterAbort, vec![]),
        ] {
            let bench = Bench::attached(Config::full(), ste);

            assert_eq!(translate(&bench, false), Err(refusal));
            bench.assert_events(&events);
        }
    }

    #[test]
    fn a_wrong_context_is_a_completer_abort() {
        let bench = bench();

        let answer = bench.unit.ats_translate(DEVICE, Some(Pasid::from_low_bits(8)), IOVA, false);

        assert_eq!(answer, Err(Refusal::CompleterAbort));
        bench.assert_events(&[]);
    }

    #[test]
    fn translated_traffic_is_checked_against_its_stream() {
        for (checked, ste, expected) in [
            (true, golden::STE_ABORT, Err(Refusal::Aborted)),
            (true, [0; 8], Err(Refusal::Aborted)),
            (true, golden::STE_BYPASS, Err(Refusal::Fault(0x07))),
            (false, golden::STE_ABORT, Ok(vec![0])),
        ] {
            let mut bench = bench();
            let (_, page) = bench.map_page(PAGE);
            translate(&bench, false).expect("mapped");
            bench.switch(ATSCHK, checked);
            bench.set_ste(ste);

            assert_eq!(bench.unit.ats_read(DEVICE, Some(PASID), IOVA, 1), expected);

            let forbidden = [[SID << 32 | 0x07, 1 << 35, page, 0]];
            let recorded = usize::from(expected == Err(Refusal::Fault(0x07)));
            bench.assert_events(&forbidden[..recorded]);
        }
    }

    #[test]
    fn a_unit_that_is_off_answers_no_device() {
        let mut bench = bench();
        let (_, page) = bench.map_page(PAGE);
        translate(&bench, false).expect("mapped");
        bench.switch(SMMUEN, false);

        assert_eq!(translate(&bench, true), Err(Refusal::Unsupported));
        assert_eq!(bench.unit.ats_read(DEVICE, Some(PASID), IOVA, 1), Err(Refusal::Fault(0x07)));

        bench.assert_events(&[
            [SID << 32 | 5 << 12 | 1 << 11 | 0x05, 3 << 30 | 1, IOVA.0, 0],
            [SID << 32 | 0x07, 1 << 35, page, 0],
        ]);
    }

    #[test]
    fn a_part_without_ats_has_none() {
        let config = Config::qemu();
        let mut bench = Bench::attached(config, stage_1(&config, 0));
        bench.map_page(PAGE);

        let answer = bench.unit.ats_translate(DEVICE, None, IOVA, false);

        assert_eq!(answer, Err(Refusal::Unsupported));
        bench.assert_events(&[]);
    }

    #[test]
    fn a_device_tlb_forgets_what_it_is_told_to() {
        let page = |words: [u64; 2], address: u64, log2: u64| [words[0], address | log2];
        for (words, forgotten) in [
            (golden::ATC_INV_ALL, true),
            (golden::ATC_INV_GLOBAL, true),
            (page(golden::ATC_INV_PASID, 0, 52), true),
            (page(golden::ATC_INV_PASID, IOVA.0, 0), true),
            (page(golden::ATC_INV_PASID, IOVA.0 & !0x3FFF, 2), true),
            (page(golden::ATC_INV_PASID, IOVA.0 ^ 0x1000, 0), false),
            (page(golden::ATC_INV_16K, IOVA.0 ^ 0x1000, 1), true),
            ([golden::ATC_INV_PASID[0] ^ 1 << 12, 52], false),
            ([golden::ATC_INV_PASID[0] ^ 1 << 32, 52], false),
            (golden::TLBI_NSNH_ALL, false),
        ] {
            let mut bench = bench();
            bench.map_page(PAGE);
            translate(&bench, false).expect("mapped");
            bench.unit.plug(StreamId(0x109));

            bench.submit(&[words, SYNC]);

            assert_eq!(bench.unit.device_tlb(DEVICE).is_empty(), forgotten, "{words:x?}");
            bench.assert_lawful();
        }
    }

    #[test]
    fn a_device_asks_again_between_invalidations_without_a_sync() {
        let of_vmid = [golden::TLBI_S12_VMALL[0] & 0xFF | VMID << 32, 0];
        for (commands, forgotten) in [
            (vec![of_vmid, golden::ATC_INV_ALL, SYNC], false),
            (vec![of_vmid, SYNC, golden::ATC_INV_ALL, SYNC], true),
        ] {
            let mut bench = bench();
            bench.map_page(PAGE);
            translate(&bench, false).expect("mapped");

            bench.submit(&commands);

            assert_eq!(bench.unit.device_tlb(DEVICE).is_empty(), forgotten);
        }
    }

    #[test]
    fn a_device_that_holds_back_its_answer_still_uses_what_it_knows() {
        let mut bench = bench();
        bench.map_page(PAGE);
        translate(&bench, false).expect("mapped");
        bench.unit.hold_device_tlb(DEVICE);

        bench.submit(&[golden::ATC_INV_ALL, SYNC]);
        assert_eq!(bench.unit.device_tlb(DEVICE).len(), 1);
        bench.unit.release_device_tlb(DEVICE);

        assert_eq!(bench.unit.device_tlb(DEVICE), []);
    }

    #[test]
    fn a_device_that_is_pulled_out_has_no_device_tlb() {
        let mut bench = bench();
        bench.map_page(PAGE);
        translate(&bench, false).expect("mapped");

        bench.unit.unplug(DEVICE);

        assert_eq!(bench.unit.device_tlb(DEVICE), []);
    }
}
