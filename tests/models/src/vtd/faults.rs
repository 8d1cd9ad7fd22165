//! Fault recording, and the event messages of all three groups.

use super::{
    State, VtdUnit,
    registers::{self, FECTL, FSTS, ICS, IECTL, PECTL, PRS},
    walk::{Fault, Request},
};
use iommu::Message;

/// FSTS.PFO: a fault met a full set of records.
const PFO: u64 = 1 << 0;
/// FSTS.PPF: a fault is pending in some record.
const PPF: u64 = 1 << 1;
/// FRCD.F, in the record's second word.
const F: u64 = 1 << 63;
/// IM of FECTL, IECTL and PECTL: no message.
const MASKED: u64 = 1 << 31;
/// IP of FECTL, IECTL and PECTL: a message waits for the mask.
const PENDING: u64 = 1 << 30;

/// Conditions that share one event message.
#[derive(Clone, Copy)]
pub(super) enum Group {
    /// FSTS: PPF, PFO, IQE, ICE, ITE.
    Fault,
    /// ICS: IWC.
    Invalidation,
    /// PRS: PPR, PRO.
    PageRequest,
}

impl Group {
    /// The register that holds the conditions, those of its bits, and the control register of the message.
    fn registers(self) -> (usize, u64, usize) {
        match self {
            Self::Fault => (FSTS, 0x7F, FECTL),
            Self::Invalidation => (ICS, 1, IECTL),
            Self::PageRequest => (PRS, 3, PECTL),
        }
    }
}

impl VtdUnit {
    /// Passes over `count` fault records: the next fault goes to a later one.
    pub fn skip_fault_records(&self, count: usize) {
        let mut state = self.lock();
        let records = registers::fault_records(state.config.cap) + 1;
        state.next_fault = (state.next_fault + count) % records;
    }
}

impl State {
    /// Sets status bits of `group`, and raises its event if none of its conditions was pending before.
    pub(super) fn report(&mut self, group: Group, bits: u64) {
        let (status, conditions, control) = group.registers();
        let before = self.get(status);
        self.set(status, before | bits);
        if before & conditions != 0 {
            return;
        }
        if self.get(control) & MASKED != 0 {
            self.set(control, self.get(control) | PENDING);
        } else {
            self.send(control);
        }
    }

    /// After software cleared status bits: with none left, a message that still waits is dropped.
    pub(super) fn settle(&mut self, group: Group) {
        let (status, conditions, control) = group.registers();
        if self.get(status) & conditions == 0 {
            self.set(control, self.get(control) & !PENDING);
        }
    }

    /// After a write to the control register: with the mask gone, a message that waited is sent.
    pub(super) fn unmask(&mut self, group: Group) {
        let (_, _, control) = group.registers();
        if self.get(control) & (MASKED | PENDING) == PENDING {
            self.set(control, self.get(control) & !PENDING);
            self.send(control);
        }
    }

    fn send(&mut self, control: usize) {
        let address = self.get(control + 12) << 32 | self.get(control + 8);
        self.messages.push(Message { address, data: self.get(control + 4) as u32 });
    }

    /// Records a primary fault in the next FRCD, unless FPD or an overflow says otherwise.
    pub(super) fn record(&mut self, request: &Request, fault: &Fault) {
        if fault.suppressed || self.get(FSTS) & PFO != 0 {
            return;
        }
        let cap = self.config.cap;
        let is_its = |record| {
            let word = self.get(registers::fault_record(cap, record) + 8);
            word & F != 0 && word as u16 == request.sid
        };
        if self.config.compresses_faults && (0..=registers::fault_records(cap)).any(is_its) {
            return;
        }
        let at = registers::fault_record(cap, self.next_fault);
        if self.get(at + 8) & F != 0 {
            return self.report(Group::Fault, PFO);
        }
        let (t1, t2) = request.kind.type_bits();
        let pasid = request.pasid.map_or(0, |pasid| u64::from(pasid) << 40 | 1 << 31);
        self.set(at, request.address & !0xFFF);
        self.set(
            at + 8,
            F | t1 << 62
                | request.at.bits() << 60
                | pasid
                | u64::from(fault.reason) << 32
                | u64::from(fault.privileged) << 29
                | t2 << 28
                | u64::from(request.sid),
        );
        if self.get(FSTS) & PPF == 0 {
            // FRI names the record that made faults pending; it stays until all are cleared.
            self.set(FSTS, self.get(FSTS) & !0xFF00 | (self.next_fault as u64) << 8);
        }
        self.next_fault = (self.next_fault + 1) % (registers::fault_records(cap) + 1);
        self.report(Group::Fault, PPF);
    }

    /// After software wrote FRCD.F: PPF is the OR of all of them.
    pub(super) fn fault_record_cleared(&mut self) {
        let cap = self.config.cap;
        let pending = |at| self.get(registers::fault_record(cap, at) + 8) & F != 0;
        if !(0..=registers::fault_records(cap)).any(pending) {
            self.set(FSTS, self.get(FSTS) & !PPF);
            self.settle(Group::Fault);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config, Refusal, Requested,
        bench::{Bench, DEVICE, FIRST_STAGE, PASID, first_stage},
        registers::fault_record,
    };
    use super::*;
    use crate::golden;
    use iommu::{Bus, GroupTag, Iova, PageRequest, Pasid, Perms, StreamId};

    const CAP: u64 = Config::full().cap;

    fn bench(config: Config) -> Bench {
        Bench::scalable(config, first_stage(FIRST_STAGE))
    }

    /// A read without PASID by a device on a bus that has no tables.
    fn stray_read(bench: &Bench, address: u64) {
        let read = bench.unit.dma_read(StreamId(0x200), None, Iova(address), 1);
        assert_eq!(read, Err(Refusal::Fault(0x39)));
    }

    fn fsts(bench: &Bench) -> u32 {
        bench.unit.read32(FSTS)
    }

    #[test]
    fn a_page_request_that_is_refused_is_recorded_as_the_golden_word() {
        let bench = bench(Config::full());
        bench.set_context([golden::SCALABLE_CONTEXT[0] & !(1 << 4), 0, 0, 0]);

        let requested = bench.unit.page_request(PageRequest {
            stream: DEVICE,
            tag: GroupTag { pasid: Some(PASID), index: 1 },
            iova: Iova(0x40_0000_0000),
            perms: Perms::READ,
            last: false,
        });

        assert_eq!(requested, Requested::Refused(Refusal::Fault(0x47)));
        assert_eq!(bench.fault(0), golden::FAULT_PAGE_REQUEST);
    }

    #[test]
    fn a_legacy_write_that_is_refused_is_recorded_as_the_golden_word() {
        let mut bench = Bench::legacy(Config::qemu(), [0, 0]);
        bench.set_context_on_bus(1, 0x08 * 16, &[FIRST_STAGE | 1, 2]);

        let written = bench.unit.dma_write(StreamId(0x108), None, Iova(0x1234_5678), &[1]);

        assert_eq!(written, Err(Refusal::Fault(5)));
        assert_eq!(bench.fault(0), golden::FAULT_WRITE);
    }

    #[test]
    fn a_translation_request_that_is_refused_is_recorded_as_the_golden_word() {
        let mut bench = bench(Config::full());
        bench.set_context_on_bus(1, 0x08 * 32, &[golden::SCALABLE_CONTEXT[0] & !(1 << 2), 0, 0, 0]);

        let translated = bench.unit.ats_translate(StreamId(0x108), None, Iova(0xABCD), false);

        assert_eq!(translated, Err(Refusal::Fault(0x44)));
        assert_eq!(bench.fault(0), golden::FAULT_TRANSLATION_REQUEST);
    }

    #[test]
    fn a_fault_keeps_pasid_page_and_privilege() {
        let bench = bench(Config::full());
        let pasid = Pasid::from_low_bits(0x1_2345);
        let read = bench.unit.dma_read(DEVICE, Some(pasid), Iova(0xFFFF_8000_0000_1FFF), 1);
        assert_eq!(read, Err(Refusal::Fault(0x46)));

        // As the golden word, but for the reason, the device and the privilege.
        let expected = golden::FAULT_READ_PASID[1] & !(0xFF << 32 | 1 << 29 | 0xFFFF) | 0x46 << 32 | 0x20;

        assert_eq!(bench.fault(0), [golden::FAULT_READ_PASID[0], expected]);
    }

    #[test]
    fn a_record_is_cleared_by_writing_one_to_f_alone() {
        let bench = bench(Config::full());
        stray_read(&bench, 0x1000);
        let at = fault_record(CAP, 0);
        let before = bench.fault(0);

        bench.unit.write32(at + 12, 0);
        bench.unit.write64(at + 8, 0x7FFF_FFFF_FFFF_FFFF);
        assert_eq!(bench.fault(0), before);
        bench.unit.write32(at + 12, 1 << 31);

        assert_eq!(bench.fault(0), [before[0], before[1] & !(1 << 63)]);
        assert_eq!(fsts(&bench), 0, "PPF drops with the last F");
        bench.assert_lawful();
    }

    #[test]
    fn the_index_names_the_record_that_made_faults_pending() {
        let bench = bench(Config::full());
        (0..3).for_each(|at| stray_read(&bench, at << 12));
        assert_eq!(fsts(&bench), 0x0002);
        (0..3).for_each(|at| bench.unit.write32(fault_record(CAP, at) + 12, 1 << 31));
        assert_eq!(fsts(&bench) & 2, 0);

        stray_read(&bench, 0x3000);
        stray_read(&bench, 0x4000);

        assert_eq!(fsts(&bench), 0x0302);
        assert_eq!([bench.fault(3)[0], bench.fault(0)[0]], [0x3000, 0x4000], "the records are a ring");
        bench.unit.write32(fault_record(CAP, 3) + 12, 1 << 31);
        assert_eq!(fsts(&bench), 0x0302, "and the index stays until all are cleared");
    }

    #[test]
    fn a_fault_that_finds_all_records_full_is_an_overflow() {
        let bench = bench(Config::full());
        (0..5).for_each(|at| stray_read(&bench, at << 12));
        assert_eq!(fsts(&bench) & 3, 3);

        // While PFO is set nothing is recorded, although there is room.
        bench.unit.write32(fault_record(CAP, 0) + 12, 1 << 31);
        stray_read(&bench, 0x5000);
        assert_eq!(bench.fault(0)[1] >> 63, 0);
        bench.unit.write32(FSTS, 1);
        stray_read(&bench, 0x6000);

        assert_eq!(bench.fault(0)[0], 0x6000);
        assert_eq!(fsts(&bench) & 3, 2);
    }

    #[test]
    fn status_is_cleared_by_ones_and_by_nothing_else() {
        let bench = bench(Config::full().with_fault_records(1));
        stray_read(&bench, 0);
        stray_read(&bench, 0);
        bench.unit.stray_completion(DEVICE);
        assert_eq!(fsts(&bench), 0x23);

        bench.unit.write32(FSTS, 0);
        bench.unit.write32(FSTS, 0x52);
        assert_eq!(fsts(&bench), 0x23, "PPF is read-only, IQE and ITE were not set");
        bench.unit.write32(FSTS, 0x20);

        assert_eq!(fsts(&bench), 0x03);
        bench.assert_lawful();
    }

    #[test]
    fn one_message_is_sent_until_all_status_is_cleared() {
        let bench = bench(Config::full());
        stray_read(&bench, 0);
        stray_read(&bench, 0);
        assert_eq!(bench.vectors(), [0x40]);

        bench.unit.stray_completion(DEVICE);
        bench.unit.write32(fault_record(CAP, 0) + 12, 1 << 31);
        bench.unit.write32(fault_record(CAP, 1) + 12, 1 << 31);
        stray_read(&bench, 0);
        assert_eq!(bench.vectors(), [0; 0], "ICE is still pending");
        bench.unit.write32(fault_record(CAP, 2) + 12, 1 << 31);
        bench.unit.write32(FSTS, 1 << 5);
        stray_read(&bench, 0);

        assert_eq!(bench.vectors(), [0x40]);
    }

    #[test]
    fn a_masked_message_waits_for_the_mask() {
        let bench = bench(Config::full());
        bench.unit.write32(FECTL, 1 << 31);
        stray_read(&bench, 0);
        assert_eq!(bench.unit.read32(FECTL), 3 << 30);
        assert_eq!(bench.vectors(), [0; 0]);

        bench.unit.write32(FECTL, 0);

        assert_eq!(bench.vectors(), [0x40]);
        assert_eq!(bench.unit.read32(FECTL), 0);
    }

    #[test]
    fn a_masked_message_is_dropped_when_its_reason_is_gone() {
        let bench = bench(Config::full());
        bench.unit.write32(FECTL, 1 << 31);
        stray_read(&bench, 0);

        bench.take_fault();
        bench.unit.write32(FECTL, 0);

        assert_eq!(bench.vectors(), [0; 0]);
    }

    #[test]
    fn a_message_goes_to_both_halves_of_its_address() {
        let bench = bench(Config::full());
        bench.unit.write32(FECTL + 12, 0x1234_5600);

        stray_read(&bench, 0);

        let message = Message { address: 0x1234_5600_FEE0_0000, data: 0x40 };
        assert_eq!(bench.unit.messages(), [message]);
    }

    #[test]
    fn the_golden_status_word_has_a_fault_in_record_five() {
        let bench = bench(Config::full().with_fault_records(8));
        for at in 0..5 {
            stray_read(&bench, 0);
            bench.unit.write32(fault_record(CAP, at) + 12, 1 << 31);
        }

        stray_read(&bench, 0);

        assert_eq!(fsts(&bench), golden::FSTS);
    }
}
