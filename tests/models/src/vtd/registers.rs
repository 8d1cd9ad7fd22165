//! The register file: which bits of a register may be written, and what a write sets off.

use super::{State, faults::Group};

pub(super) const VER: usize = 0x000;
pub(super) const CAP: usize = 0x008;
pub(super) const ECAP: usize = 0x010;
pub(super) const GCMD: usize = 0x018;
pub(super) const GSTS: usize = 0x01C;
pub(super) const RTADDR: usize = 0x020;
pub(super) const CCMD: usize = 0x028;
pub(super) const FSTS: usize = 0x034;
pub(super) const FECTL: usize = 0x038;
pub(super) const PMEN: usize = 0x064;
pub(super) const IQH: usize = 0x080;
pub(super) const IQT: usize = 0x088;
pub(super) const IQA: usize = 0x090;
pub(super) const ICS: usize = 0x09C;
pub(super) const IECTL: usize = 0x0A0;
pub(super) const IQERCD: usize = 0x0B0;
pub(super) const IRTA: usize = 0x0B8;
pub(super) const PQH: usize = 0x0C0;
pub(super) const PQT: usize = 0x0C8;
pub(super) const PQA: usize = 0x0D0;
pub(super) const PRS: usize = 0x0DC;
pub(super) const PECTL: usize = 0x0E0;

/// GCMD.TE and GSTS.TES: translation.
pub(super) const TE: u32 = 1 << 31;
/// GCMD.SRTP and GSTS.RTPS: set root table pointer.
pub(super) const SRTP: u32 = 1 << 30;
const SFL: u32 = 1 << 29;
const EAFL: u32 = 1 << 28;
const WBF: u32 = 1 << 27;
/// GCMD.QIE and GSTS.QIES: queued invalidation.
pub(super) const QIE: u32 = 1 << 26;
/// GCMD.IRE and GSTS.IRES: interrupt remapping.
pub(super) const IRE: u32 = 1 << 25;
/// GCMD.SIRTP and GSTS.IRTPS: set interrupt remap table pointer.
pub(super) const SIRTP: u32 = 1 << 24;
/// GCMD.CFI and GSTS.CFIS: compatibility format interrupts pass.
pub(super) const CFI: u32 = 1 << 23;
/// The commands that stay on until a zero is written.
const LEVELS: u32 = TE | EAFL | QIE | IRE | CFI;
/// The commands that act once; a zero there means nothing.
const ONE_SHOTS: u32 = SRTP | SFL | WBF | SIRTP;

/// CCMD.ICC and IOTLB.IVT: the command bit of register-based invalidation.
const INVALIDATE: u64 = 1 << 63;

/// One register and its access rules; a bit that is in none of the three masks is reserved.
pub(super) struct Register {
    offset: usize,
    bytes: usize,
    name: &'static str,
    /// Bits that keep what is written.
    writable: u64,
    /// Bits that a written one clears (RW1C).
    cleared: u64,
    /// Bits that ignore what is written (RO).
    read_only: u64,
}

/// Everything but the low 12 bits: where the registers hold the address of a table or queue.
const PAGE: u64 = !0xFFF;

/// Returns the register map of a unit with these capabilities, in the manual's order.
pub(super) fn map(cap: u64, ecap: u64) -> Vec<Register> {
    const ALL: u64 = u64::MAX;
    let mut map = Vec::new();
    let mut add = |offset, bytes, name, writable, cleared, read_only| {
        map.push(Register { offset, bytes, name, writable, cleared, read_only });
    };
    add(VER, 4, "VER", 0, 0, ALL);
    add(CAP, 8, "CAP", 0, 0, ALL);
    add(ECAP, 8, "ECAP", 0, 0, ALL);
    add(GCMD, 4, "GCMD", u64::from(LEVELS | ONE_SHOTS), 0, 0);
    add(GSTS, 4, "GSTS", 0, 0, ALL);
    add(RTADDR, 8, "RTADDR", PAGE | 3 << 10, 0, 0);
    add(CCMD, 8, "CCMD", INVALIDATE | 3 << 61 | 0x3_FFFF_FFFF, 0, 3 << 59);
    add(FSTS, 4, "FSTS", 0, 0x7D, 0xFF02);
    event(&mut add, FECTL, ["FECTL", "FEDATA", "FEADDR", "FEUADDR"]);
    if cap & 3 << 5 != 0 {
        add(PMEN, 4, "PMEN", 1 << 31, 0, 1);
        add(0x068, 4, "PLMBASE", ALL, 0, 0);
        add(0x06C, 4, "PLMLIMIT", ALL, 0, 0);
        add(0x070, 8, "PHMBASE", ALL, 0, 0);
        add(0x078, 8, "PHMLIMIT", ALL, 0, 0);
    }
    add(IQH, 8, "IQH", 0, 0, ALL);
    add(IQT, 8, "IQT", 0x7_FFF0, 0, 0);
    // DW asks for 256-bit descriptors, which are part of scalable mode.
    add(IQA, 8, "IQA", PAGE | (ecap >> 43 & 1) << 11 | 7, 0, 0);
    add(ICS, 4, "ICS", 0, 1, 0);
    event(&mut add, IECTL, ["IECTL", "IEDATA", "IEADDR", "IEUADDR"]);
    add(IQERCD, 8, "IQERCD", 0, 0, ALL);
    if ecap & 1 << 3 != 0 {
        add(IRTA, 8, "IRTA", PAGE | 1 << 11 | 0xF, 0, 0);
    }
    if ecap & 1 << 29 != 0 {
        add(PQH, 8, "PQH", 0x7_FFE0, 0, 0);
        add(PQT, 8, "PQT", 0x7_FFE0, 0, 0);
        add(PQA, 8, "PQA", PAGE | 7, 0, 0);
        add(PRS, 4, "PRS", 0, 3, 0);
        event(&mut add, PECTL, ["PECTL", "PEDATA", "PEADDR", "PEUADDR"]);
    }
    let iva = invalidate_address(ecap);
    add(iva, 8, "IVA", PAGE | 0x7F, 0, 0);
    add(iva + 8, 8, "IOTLB", INVALIDATE | 3 << 60 | 0x3_FFFF << 32, 0, 3 << 57);
    for index in 0..=fault_records(cap) {
        add(fault_record(cap, index), 8, "FRCD", 0, 0, ALL);
        add(fault_record(cap, index) + 8, 8, "FRCD", 0, 1 << 63, ALL >> 1);
    }
    map
}

/// Adds the four registers of an event: its control, and its message's data, address and upper address.
fn event(
    add: &mut impl FnMut(usize, usize, &'static str, u64, u64, u64),
    at: usize,
    names: [&'static str; 4],
) {
    add(at, 4, names[0], 1 << 31, 0, 1 << 30);
    add(at + 4, 4, names[1], 0xFFFF, 0, 0);
    add(at + 8, 4, names[2], 0xFFFF_FFFC, 0, 0);
    add(at + 12, 4, names[3], 0xFFFF_FFFF, 0, 0);
}

/// CAP.NFR: the index of the last fault record.
pub(super) fn fault_records(cap: u64) -> usize {
    (cap >> 40 & 0xFF) as usize
}

/// CAP.FRO: the offset of fault record `index`.
pub(super) fn fault_record(cap: u64, index: usize) -> usize {
    (cap >> 24 & 0x3FF) as usize * 16 + index * 16
}

/// ECAP.IRO: the offset of IVA; IOTLB follows it.
pub(super) fn invalidate_address(ecap: u64) -> usize {
    (ecap >> 8 & 0x3FF) as usize * 16
}

/// Something that the unit was told to do, and acknowledges later.
pub(super) struct Due {
    /// Register reads and looks at the clock until then.
    left: u32,
    what: Order,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Order {
    /// A bit of GCMD, and whether it was written as one.
    Global(u32, bool),
    /// Register-based invalidation through CCMD.
    Context,
    /// Register-based invalidation through IVA and IOTLB.
    Iotlb,
    /// PMEN.EPM.
    ProtectedMemory,
}

impl State {
    pub(super) fn get(&self, register: usize) -> u64 {
        self.values.get(&register).copied().unwrap_or(0)
    }

    pub(super) fn set(&mut self, register: usize, value: u64) {
        self.values.insert(register, value);
    }

    /// GSTS.
    pub(super) fn status(&self) -> u32 {
        self.get(GSTS) as u32
    }

    /// Reads `bytes` bytes at `offset`; all ones where no unit answers.
    pub(super) fn read(&mut self, offset: usize, bytes: usize) -> u64 {
        if self.gone {
            return u64::MAX;
        }
        self.step();
        match self.find(offset, bytes) {
            Err(rule) => {
                self.violation(format!("read of {bytes} bytes at {offset:#05x}: {rule}"));
                u64::MAX
            }
            Ok(None) => 0,
            Ok(Some(at)) => {
                let Register { offset: register, name, .. } = self.map[at];
                if register == GCMD || register == invalidate_address(self.config.ecap) {
                    self.violation(format!("read of {name}: it is write-only"));
                    return 0;
                }
                self.get(register) >> ((offset - register) * 8)
            }
        }
    }

    /// Writes the low `bytes` bytes of `value` at `offset`.
    pub(super) fn write(&mut self, offset: usize, bytes: usize, value: u64) {
        if self.gone {
            return;
        }
        let at = match self.find(offset, bytes) {
            Ok(Some(at)) => at,
            Ok(None) => return self.violation(format!("write to {offset:#05x}: reserved register")),
            Err(rule) => {
                return self.violation(format!("write of {bytes} bytes at {offset:#05x}: {rule}"));
            }
        };
        let Register { offset: register, name, writable, cleared, read_only, .. } = self.map[at];
        // A 32-bit write to half of a 64-bit register leaves the other half alone.
        let shift = (offset - register) * 8;
        let written = u64::MAX >> (64 - bytes * 8) << shift;
        let value = value << shift;
        if writable | cleared == 0 {
            return self.violation(format!("write to {name}: it is read-only"));
        }
        let reserved = value & !(writable | cleared | read_only);
        if reserved != 0 {
            self.violation(format!("write to {name}: reserved bits {reserved:#x} must be zero"));
        }
        let old = self.get(register);
        let new = old & !(written & writable) | value & writable;
        self.set(register, new & !(value & cleared));
        self.written(register, old, value);
    }

    /// Returns the place in the map of the register that an access reaches, or the rule that it breaks.
    fn find(&self, offset: usize, bytes: usize) -> Result<Option<usize>, &'static str> {
        if !offset.is_multiple_of(bytes) {
            return Err("misaligned");
        }
        if offset.checked_add(bytes).is_none_or(|end| end > self.window()) {
            return Err("outside the unit's registers");
        }
        let holds = |r: &Register| (r.offset..r.offset + r.bytes).contains(&offset);
        match self.map.iter().position(holds) {
            Some(at) if bytes > self.map[at].bytes => Err("a 32-bit register takes 32-bit accesses"),
            found => Ok(found),
        }
    }

    /// The size of the register window in bytes: whole pages up to the last register.
    fn window(&self) -> usize {
        let end = self.map.iter().map(|r| r.offset + r.bytes).max().unwrap_or(0);
        end.next_multiple_of(4096)
    }

    /// Does what a write to `register` sets off. `value` is what was written, zero where nothing was.
    fn written(&mut self, register: usize, old: u64, value: u64) {
        let cap = self.config.cap;
        match register {
            GCMD => {
                self.set(GCMD, 0);
                self.global_command(value as u32);
            }
            RTADDR if self.is_due(|order| matches!(order, Order::Global(SRTP, _))) => {
                self.violation("RTADDR written between GCMD.SRTP and GSTS.RTPS".into());
            }
            IRTA if self.is_due(|order| matches!(order, Order::Global(SIRTP, _))) => {
                self.violation("IRTA written between GCMD.SIRTP and GSTS.IRTPS".into());
            }
            CCMD if value & INVALIDATE != 0 => self.invalidate_by_register("CCMD", old, Order::Context),
            r if r == invalidate_address(self.config.ecap) + 8 && value & INVALIDATE != 0 => {
                self.invalidate_by_register("IOTLB", old, Order::Iotlb);
            }
            FSTS => {
                self.settle(Group::Fault);
                self.errors_cleared();
            }
            ICS => self.settle(Group::Invalidation),
            PRS => self.settle(Group::PageRequest),
            FECTL => self.unmask(Group::Fault),
            IECTL => self.unmask(Group::Invalidation),
            PECTL => self.unmask(Group::PageRequest),
            PMEN => self.order(Order::ProtectedMemory),
            IQT => self.tail_written(old),
            IQA if self.status() & QIE != 0 => {
                // What hardware does is not said; the model goes on with the queue that it has.
                self.set(IQA, old);
                self.violation("IQA written while GSTS.QIES=1".into());
            }
            PQH => self.page_request_head_written(old),
            r if r >= fault_record(cap, 0) && r <= fault_record(cap, fault_records(cap)) + 8 => {
                self.fault_record_cleared();
            }
            _ => {}
        }
    }

    /// A write to GCMD: at most one change of a level, or one one-shot command.
    fn global_command(&mut self, value: u32) {
        let status = self.status();
        let commands = (value ^ status) & LEVELS | value & ONE_SHOTS;
        if self.is_due(|order| matches!(order, Order::Global(..))) {
            self.violation("GCMD written before GSTS acknowledged the command before".into());
        }
        if commands.count_ones() > 1 {
            self.violation(format!("GCMD changes more than one bit at once: {commands:#010x}"));
        }
        for bit in (0..32).rev().map(|bit| 1 << bit).filter(|bit| commands & bit != 0) {
            self.check_command(bit, value & bit != 0);
            match bit {
                SRTP | SFL | SIRTP => self.set(GSTS, self.get(GSTS) & !u64::from(bit)),
                // WBFS reads as one while the buffer is flushed; a unit that needs no flush has nothing to do.
                WBF if self.config.cap & 1 << 4 != 0 => self.set(GSTS, self.get(GSTS) | u64::from(bit)),
                _ => {}
            }
            self.order(Order::Global(bit, value & bit != 0));
        }
    }

    /// Notes the rule that a command breaks in the state that the unit is in.
    fn check_command(&mut self, bit: u32, on: bool) {
        let (cap, ecap, status) = (self.config.cap, self.config.ecap, self.status());
        let has = |bit: u32| status & bit != 0;
        let broken = match bit {
            TE if on && !has(SRTP) => "GCMD.TE set before a root table (GSTS.RTPS=0)",
            SRTP if has(TE) && (self.get(RTADDR) ^ self.root) & 3 << 10 != 0 => {
                "GCMD.SRTP changes RTADDR.TTM while GSTS.TES=1"
            }
            SFL | EAFL if cap & 1 << 3 == 0 => "GCMD.SFL or EAFL without CAP.AFL",
            QIE if ecap & 1 << 1 == 0 => "GCMD.QIE without ECAP.QI",
            // A queue that stopped for an error does not get any emptier.
            QIE if !on && self.get(IQH) != self.get(IQT) && self.get(FSTS) & 0x50 == 0 => {
                "GCMD.QIE cleared while IQH differs from IQT"
            }
            IRE | SIRTP | CFI if ecap & 1 << 3 == 0 => "GCMD.IRE, SIRTP or CFI without ECAP.IR",
            IRE if on && !has(SIRTP) => "GCMD.IRE set before a table (GSTS.IRTPS=0)",
            IRE if on && !has(QIE) => "GCMD.IRE set without queued invalidation",
            IRE if on && !self.remapping.is_fresh => {
                "GCMD.IRE set before all interrupt entries were invalidated"
            }
            CFI if on && self.remapping.is_extended() => "GCMD.CFI set while IRTA.EIME=1",
            _ => return,
        };
        self.violation(broken.into());
    }

    /// Whether protected memory is on, and `address` in it. Its limits are the last bytes.
    pub(super) fn is_protected(&self, address: u64) -> bool {
        let within = |base: usize, limit: usize| (self.get(base)..=self.get(limit)).contains(&address);
        let low = self.config.cap & 1 << 5 != 0 && within(0x068, 0x06C);
        let high = self.config.cap & 1 << 6 != 0 && within(0x070, 0x078);
        self.get(PMEN) & 1 != 0 && (low || high)
    }

    fn invalidate_by_register(&mut self, name: &str, old: u64, order: Order) {
        if self.status() & QIE != 0 {
            // The command bit stays set and nothing happens.
            return self.violation(format!("{name}: register-based invalidation while GSTS.QIES=1"));
        }
        if old & INVALIDATE != 0 {
            self.violation(format!("{name} written before the command before it was done"));
        }
        if self.get(VER) >> 4 & 0xF >= 6 {
            self.violation(format!("{name}: version 6 and later have no register-based invalidation"));
        }
        self.order(order);
    }

    fn order(&mut self, what: Order) {
        self.due.push(Due { left: self.config.acknowledge_after, what });
        self.acknowledge();
    }

    fn is_due(&self, is: impl Fn(Order) -> bool) -> bool {
        self.due.iter().any(|due| is(due.what))
    }

    /// One step of the unit's time: a register read, or a look at the clock.
    pub(super) fn step(&mut self) {
        for due in &mut self.due {
            due.left = due.left.saturating_sub(1);
        }
        self.acknowledge();
        self.looked();
        self.expire_device_tlb_invalidations();
    }

    /// Carries out what is due, unless it is told never to.
    pub(super) fn acknowledge(&mut self) {
        let never = self.never_acknowledged;
        let ready =
            |due: &Due| due.left == 0 && !matches!(due.what, Order::Global(bit, _) if never & bit != 0);
        while let Some(at) = self.due.iter().position(ready) {
            match self.due.remove(at).what {
                Order::Global(bit, on) => self.carry_out(bit, on),
                Order::Context => {
                    self.flush_write_buffer();
                    self.invalidate_contexts_by_register();
                }
                Order::Iotlb => {
                    self.flush_write_buffer();
                    self.invalidate_iotlb_by_register();
                }
                Order::ProtectedMemory => {
                    let enabled = self.get(PMEN) & 1 << 31;
                    self.set(PMEN, enabled | enabled >> 31);
                }
            }
        }
    }

    fn carry_out(&mut self, bit: u32, on: bool) {
        let status = self.get(GSTS);
        let on = match bit {
            WBF => false,
            SRTP | SFL | SIRTP => true,
            _ => on,
        };
        self.set(GSTS, if on { status | u64::from(bit) } else { status & !u64::from(bit) });
        match bit {
            SRTP => {
                self.root = self.get(RTADDR);
                // ESRTPS: no invalidation has to follow.
                if self.config.cap & 1 << 63 != 0 {
                    self.caches.forget_all();
                }
            }
            WBF => self.flush_write_buffer(),
            // ESIRTPS: no invalidation has to follow.
            SIRTP => self.remapping.set_table(self.get(IRTA), self.config.cap & 1 << 62 != 0),
            QIE if on => self.run_queue(),
            QIE if self.config.ends_queue_after_wait && !self.ended_with_wait() => {
                self.set(GSTS, self.get(GSTS) | u64::from(QIE));
            }
            QIE => self.stop_queue(),
            _ => {}
        }
    }

    /// CCMD: global, domain- or device-selective. A refused command reads back as granularity 0.
    fn invalidate_contexts_by_register(&mut self) {
        let command = self.get(CCMD);
        let (did, sid, fm) = (command as u16, (command >> 16) as u16, command >> 32 & 3);
        let granularity = command >> 61 & 3;
        if self.root >> 10 & 3 != 0 {
            self.violation("CCMD used while RTADDR.TTM is not legacy".into());
        }
        match granularity {
            1 => self.caches.forget_contexts(|_, _| true),
            2 => self.caches.forget_contexts(|_, cached| cached == did),
            3 => self.caches.forget_contexts(|s, cached| cached == did && matches_sid(s, sid, fm)),
            _ => self.violation("CCMD.CIRG=0 is reserved".into()),
        }
        self.set(CCMD, command & !(INVALIDATE | 3 << 59) | granularity << 59);
    }

    /// IVA and IOTLB: global, domain- or page-selective. A refused command reads back as granularity 0.
    fn invalidate_iotlb_by_register(&mut self) {
        let at = invalidate_address(self.config.ecap);
        let (address, command) = (self.get(at), self.get(at + 8));
        let granularity = command >> 60 & 3;
        let done = self.invalidate_iotlb(granularity, (command >> 32) as u16, address);
        if !done {
            self.violation("IOTLB.IIRG, or IVA.AM, is not one that the unit supports".into());
        }
        let actual = if done { granularity } else { 0 };
        self.set(at + 8, command & !(INVALIDATE | 3 << 57) | actual << 57);
    }
}

/// Returns whether source-id `sid` is named by `pattern` and the function mask `fm`.
pub(super) fn matches_sid(sid: u16, pattern: u16, fm: u64) -> bool {
    let ignored = [0, 0b100, 0b110, 0b111][(fm & 3) as usize];
    (sid ^ pattern) & !ignored == 0
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config,
        bench::{Bench, DEVICE, DID, FIRST_STAGE, IOVA, QUEUE, STATUS, first_stage},
    };
    use super::*;
    use crate::golden;
    use iommu::Bus;

    #[test]
    fn registers_start_with_the_events_masked() {
        let bench = Bench::new(Config::qemu());

        assert_eq!(bench.unit.read32(VER), 0x10);
        assert_eq!(bench.unit.read64(CAP), 0x81D2_008C_222F_0606);
        assert_eq!(bench.unit.read64(ECAP), 0x8D9A_20F0_0F5E);
        assert_eq!(bench.unit.read32(GSTS), 0);
        for control in [FECTL, IECTL, PECTL] {
            assert_eq!(bench.unit.read32(control), 1 << 31);
        }
        bench.assert_lawful();
    }

    #[test]
    fn a_wide_register_takes_its_halves_one_by_one() {
        let bench = Bench::new(Config::qemu());

        bench.unit.write32(RTADDR, 0x1234_5400);
        bench.unit.write32(RTADDR + 4, 0x7);

        assert_eq!(bench.unit.read64(RTADDR), 0x7_1234_5400);
        assert_eq!([bench.unit.read32(CAP), bench.unit.read32(CAP + 4)], [0x222F_0606, 0x81D2_008C]);
        bench.assert_lawful();
    }

    #[test]
    fn an_access_that_the_manual_does_not_allow_is_noted() {
        type Access = fn(&super::super::VtdUnit);
        let cases: &[(Access, &str)] = &[
            (|unit| unit.write64(FECTL, 0), "32-bit accesses"),
            (|unit| _ = unit.read32(CAP + 2), "misaligned"),
            (|unit| _ = unit.read64(GSTS), "misaligned"),
            (|unit| _ = unit.read32(0x1000), "outside"),
            (|unit| unit.write32(GSTS, 0), "GSTS: it is read-only"),
            (|unit| unit.write64(IQH, 0), "IQH: it is read-only"),
            (|unit| _ = unit.read32(GCMD), "GCMD: it is write-only"),
            (|unit| unit.write32(0x058, 1), "reserved register"),
            (|unit| unit.write64(RTADDR, 1 << 9), "RTADDR: reserved bits 0x200"),
            (|unit| unit.write32(FSTS, 1 << 7), "FSTS: reserved bits 0x80"),
            (|unit| unit.write32(FECTL + 4, 1 << 16), "FEDATA: reserved bits 0x10000"),
            (|unit| unit.write32(FECTL + 8, 3), "FEADDR: reserved bits 0x3"),
            (|unit| unit.write64(PQA, 1 << 3), "PQA: reserved bits 0x8"),
            (|unit| unit.write64(IQT, 8), "IQT: reserved bits 0x8"),
        ];
        for (access, rule) in cases {
            let bench = Bench::new(Config::qemu());

            access(&bench.unit);

            bench.assert_broken(rule);
        }
    }

    #[test]
    fn reserved_bits_are_the_unit_s_own() {
        let without = Config { ecap: Config::qemu().ecap & !(1 << 43 | 1 << 29 | 1 << 3), ..Config::qemu() };
        let bench = Bench::new(without);

        bench.unit.write64(IQA, golden::IQA_256_BITS);
        bench.assert_broken("IQA: reserved bits 0x800");
        bench.unit.write64(PQA, golden::PQA);
        bench.unit.write64(0xB8, golden::IRTA);

        assert_eq!(bench.unit.violations().len(), 3);
        assert_eq!([bench.unit.read64(PQA), bench.unit.read64(0xB8)], [0, 0]);
    }

    #[test]
    fn registers_hold_what_is_written() {
        let bench = Bench::new(Config { cap: Config::qemu().cap | 3 << 5, ..Config::qemu() });
        let words = [
            (RTADDR, golden::RTADDR_SCALABLE),
            (RTADDR, golden::RTADDR_ABORT),
            (IQA, golden::IQA_256_BITS),
            (IQA, golden::IQA_128_BITS),
            (0x0B8, golden::IRTA),
            (PQA, golden::PQA),
            // PHMBASE and PHMLIMIT.
            (0x070, 0x1234_5678_9ABC_D000),
            (0x078, 0xFFFF_FFFF_FFFF_F000),
        ];

        for (register, word) in words {
            bench.unit.write64(register, word);
            assert_eq!(bench.unit.read64(register), word);
        }

        bench.assert_lawful();
    }

    #[test]
    fn a_command_is_acknowledged_after_a_while() {
        let bench = Bench::new(Config::qemu());
        bench.unit.acknowledge_after(3);

        bench.unit.write32(GCMD, SRTP);

        let polls = [(); 3].map(|()| bench.unit.read32(GSTS));
        assert_eq!(polls, [0, 0, SRTP]);
    }

    #[test]
    fn looking_at_the_clock_passes_time_too() {
        let bench = Bench::new(Config { clock_step_us: 5, ..Config::qemu() });
        bench.unit.acknowledge_after(2);
        bench.unit.write32(GCMD, SRTP);

        assert_eq!([bench.unit.now_us(), bench.unit.now_us()], [5, 10]);
        bench.unit.advance(90);

        assert_eq!(bench.unit.read32(GSTS), SRTP);
        assert_eq!(bench.unit.now_us(), 105);
    }

    #[test]
    fn a_unit_can_be_told_never_to_acknowledge() {
        let bench = Bench::new(Config::qemu());
        bench.unit.never_acknowledge(SRTP);

        bench.unit.write32(GCMD, SRTP);
        assert!((0..1000).all(|_| bench.unit.read32(GSTS) == 0));
        bench.unit.never_acknowledge(0);

        assert_eq!(bench.unit.read32(GSTS), SRTP);
    }

    #[test]
    fn a_zero_turns_a_level_off_and_leaves_a_one_shot_on() {
        let bench = Bench::scalable(Config::qemu(), first_stage(0));
        assert_eq!(bench.unit.read32(GSTS), TE | SRTP | QIE);

        bench.command(TE, false);

        assert_eq!(bench.unit.read32(GSTS), SRTP | QIE);
        bench.assert_lawful();
    }

    #[test]
    fn setting_the_root_table_again_clears_its_status_meanwhile() {
        let bench = Bench::scalable(Config::qemu(), first_stage(0));

        bench.unit.write32(GCMD, TE | QIE | SRTP);

        assert_eq!(bench.unit.read32(GSTS), TE | QIE);
        bench.command(TE, true);
        assert_eq!(bench.unit.read32(GSTS), TE | QIE | SRTP);
    }

    #[test]
    fn a_command_against_the_rules_is_noted() {
        type Setup = fn(&Bench);
        let cases: &[(Setup, &str)] = &[
            (|b| b.unit.write32(GCMD, TE | SRTP | QIE | WBF), "more than one bit"),
            (|b| b.unit.write32(GCMD, 0), "more than one bit"),
            (|b| b.unit.write32(GCMD, TE | QIE | CFI | 1), "reserved bits 0x1"),
            (|b| b.unit.write32(GCMD, TE | QIE | IRE), "GSTS.IRTPS=0"),
            (|b| b.unit.write32(GCMD, TE | QIE | SFL), "without CAP.AFL"),
            (
                |b| {
                    b.unit.write32(GCMD, TE | QIE | SIRTP);
                    b.unit.write32(GCMD, TE | QIE | SIRTP);
                },
                "before GSTS acknowledged",
            ),
            (
                |b| {
                    b.unit.write32(GCMD, TE | QIE | SRTP);
                    b.unit.write64(RTADDR, 0x5400);
                },
                "between GCMD.SRTP and GSTS.RTPS",
            ),
            (
                |b| {
                    b.unit.write64(RTADDR, 0x5000);
                    b.unit.write32(GCMD, TE | QIE | SRTP);
                },
                "changes RTADDR.TTM",
            ),
            (|b| b.unit.write64(IQA, QUEUE), "IQA written while GSTS.QIES=1"),
            (
                |b| {
                    b.unit.pause(0);
                    b.submit(&[golden::WAIT_FENCE]);
                    b.unit.write32(GCMD, TE);
                },
                "IQH differs from IQT",
            ),
        ];
        for (setup, rule) in cases {
            let bench = Bench::scalable(Config::qemu(), first_stage(0));

            setup(&bench);

            bench.assert_broken(rule);
        }
    }

    #[test]
    fn interrupt_remapping_goes_on_after_its_table_and_the_queue() {
        let bench = Bench::scalable(Config::qemu(), first_stage(0));

        bench.unit.write64(IRTA, golden::IRTA & !(1 << 11));
        bench.command(SIRTP, true);
        bench.submit(&[golden::INTERRUPT_GLOBAL]);
        bench.command(IRE, true);
        bench.command(CFI, true);

        assert_eq!(bench.unit.read32(GSTS), TE | SRTP | QIE | IRE | SIRTP | CFI);
        bench.assert_lawful();

        let hasty = Bench::scalable(Config::qemu(), first_stage(0));
        hasty.command(SIRTP, true);
        hasty.command(IRE, true);
        hasty.assert_broken("before all interrupt entries were invalidated");

        let without_queue = Bench::new(Config::qemu());
        without_queue.command(SIRTP, true);
        without_queue.command(IRE, true);
        without_queue.assert_broken("without queued invalidation");
    }

    #[test]
    fn translation_needs_a_root_table() {
        let bench = Bench::new(Config::qemu());

        bench.unit.write32(GCMD, TE);

        bench.assert_broken("GSTS.RTPS=0");
    }

    #[test]
    fn a_write_buffer_flush_reads_as_one_while_it_lasts() {
        let bench = Bench::new(Config { cap: Config::qemu().cap | 1 << 4, ..Config::qemu() });

        bench.unit.write32(GCMD, WBF);

        assert_eq!([(); 3].map(|()| bench.unit.read32(GSTS)), [WBF, WBF, 0]);
        bench.assert_lawful();
    }

    #[test]
    fn protected_memory_goes_off_when_told_and_not_before() {
        let bench = Bench::new(Config { cap: Config::qemu().cap | 3 << 5, ..Config::qemu() });

        bench.unit.write32(PMEN, 1 << 31);
        assert_eq!([(); 3].map(|()| bench.unit.read32(PMEN)), [1 << 31, 1 << 31, 1 << 31 | 1]);
        bench.unit.write32(PMEN, 0);

        assert_eq!([(); 3].map(|()| bench.unit.read32(PMEN)), [1, 1, 0]);
        bench.assert_lawful();
    }

    #[test]
    fn protected_memory_is_reached_by_nobody_while_there_is_no_translation() {
        let bench = Bench::new(Config { cap: Config::qemu().cap | 3 << 5, ..Config::qemu() });
        let read = |at: u64| bench.unit.dma_read(DEVICE, None, iommu::Iova(at), 1);
        bench.unit.write64(0x070, STATUS);
        bench.unit.write64(0x078, STATUS + 0xFFF);
        assert_eq!(read(STATUS), Ok(vec![0]));

        bench.unit.write32(PMEN, 1 << 31);
        (0..3).for_each(|_| bench.unit.advance(0));

        assert_eq!(read(STATUS), Err(super::super::Refusal::Unsupported));
        assert_eq!(read(STATUS + 0x1000), Ok(vec![0]));
    }

    #[test]
    fn register_based_invalidation_reports_what_it_did() {
        let bench = Bench::new(Config::qemu());
        let iva = invalidate_address(Config::qemu().ecap);

        bench.unit.write64(CCMD, golden::CCMD_GLOBAL);
        bench.unit.write64(iva, golden::IVA);
        bench.unit.write64(iva + 8, golden::IOTLB_DOMAIN);

        assert_eq!(bench.unit.read64(CCMD) >> 63, 1, "not done at once");
        bench.unit.advance(0);
        bench.unit.advance(0);
        assert_eq!(bench.unit.read64(CCMD), 1 << 61 | 1 << 59);
        assert_eq!(bench.unit.read64(iva + 8), golden::IOTLB_DOMAIN & !(1 << 63) | 2 << 57);
        bench.assert_lawful();
    }

    #[test]
    fn register_based_invalidation_fires_on_the_high_half() {
        let bench = Bench::new(Config::qemu());
        bench.unit.acknowledge_after(0);

        bench.unit.write32(CCMD, golden::CCMD_DEVICE as u32);
        assert_eq!(bench.unit.read64(CCMD) >> 59 & 3, 0);
        bench.unit.write32(CCMD + 4, (golden::CCMD_DEVICE >> 32) as u32);

        assert_eq!(bench.unit.read64(CCMD), golden::CCMD_DEVICE & !(1 << 63) | 3 << 59);
        bench.assert_lawful();
    }

    /// Remembers the device's context and one translation, takes both away, and invalidates by registers.
    #[test]
    fn register_based_invalidation_forgets_what_it_names() {
        let iva = invalidate_address(Config::qemu().ecap);
        let context =
            |granularity: u64, did: u64, sid: u64| (CCMD, 1 << 63 | granularity << 61 | sid << 16 | did);
        let iotlb = |granularity: u64, did: u64| (iva + 8, 1 << 63 | granularity << 60 | did << 32);
        for ((register, command), page, forgotten) in [
            (context(1, 0, 0), 0, true),
            (context(2, DID, 0), 0, true),
            (context(3, DID, 0x20), 0, true),
            (context(2, DID + 1, 0), 0, false),
            (context(3, DID, 0x21), 0, false),
            (context(3, DID + 1, 0x20), 0, false),
            (iotlb(1, 0), 0, true),
            (iotlb(2, DID), 0, true),
            (iotlb(3, DID), IOVA.0, true),
            (iotlb(2, DID + 1), 0, false),
            (iotlb(3, DID), IOVA.0 + 0x1000, false),
        ] {
            let mut bench = Bench::legacy(Config::qemu(), [FIRST_STAGE | 1, DID << 8 | 2]);
            bench.command(QIE, false);
            bench.unit.acknowledge_after(0);
            let leaf = bench.map(FIRST_STAGE, 4, IOVA.0, 1, 3, STATUS | 1);
            let read = || bench.unit.dma_read(DEVICE, None, IOVA, 1);
            assert_eq!(read(), Ok(vec![0]));
            if register == CCMD {
                bench.set_legacy_context([0; 2]);
            } else {
                bench.put(leaf, &[0]);
            }

            bench.unit.write64(iva, page);
            bench.unit.write64(register, command);

            assert_eq!(read().is_err(), forgotten, "{command:#x}");
            bench.assert_lawful();
        }
    }

    #[test]
    fn register_based_invalidation_is_for_old_units_and_contexts_of_legacy_mode() {
        let new = Bench::new(Config { version: 0x60, ..Config::qemu() });
        new.unit.write64(CCMD, golden::CCMD_GLOBAL);
        new.assert_broken("version 6");

        let scalable = Bench::scalable(Config::qemu(), first_stage(0));
        scalable.command(QIE, false);
        scalable.unit.write64(CCMD, golden::CCMD_GLOBAL);
        (0..3).for_each(|_| scalable.unit.advance(0));
        scalable.assert_broken("TTM is not legacy");
    }

    #[test]
    fn a_pending_message_is_not_made_or_taken_by_writing_its_bit() {
        let bench = Bench::new(Config::qemu());

        bench.unit.write32(FECTL, 3 << 30);
        bench.unit.write32(FECTL, 1 << 30);

        assert_eq!(bench.unit.read32(FECTL), 0);
        assert_eq!(bench.unit.messages(), []);
        bench.assert_lawful();
    }

    #[test]
    fn register_based_invalidation_does_nothing_beside_the_queue() {
        let bench = Bench::legacy(Config::qemu(), [0, 0]);

        bench.unit.write64(CCMD, golden::CCMD_GLOBAL);
        bench.unit.advance(0);

        assert_eq!(bench.unit.read64(CCMD), golden::CCMD_GLOBAL);
        bench.assert_broken("while GSTS.QIES=1");
    }

    #[test]
    #[should_panic(expected = "not modelled")]
    fn a_unit_cannot_claim_what_the_model_lacks() {
        // MTS.
        Bench::new(Config { ecap: Config::qemu().ecap | 1 << 25, ..Config::qemu() });
    }
}
