//! The register file: which bits of a register may be written, and when, and what a write sets off.

use super::{Config, State};

pub(super) const IDR0: usize = 0x000;
pub(super) const IDR1: usize = 0x004;
pub(super) const IDR3: usize = 0x00C;
pub(super) const IDR5: usize = 0x014;
pub(super) const IIDR: usize = 0x018;
pub(super) const AIDR: usize = 0x01C;
pub(super) const CR0: usize = 0x020;
pub(super) const CR0ACK: usize = 0x024;
pub(super) const CR1: usize = 0x028;
pub(super) const CR2: usize = 0x02C;
pub(super) const GBPA: usize = 0x044;
pub(super) const IRQ_CTRL: usize = 0x050;
pub(super) const IRQ_CTRLACK: usize = 0x054;
pub(super) const GERROR: usize = 0x060;
pub(super) const GERRORN: usize = 0x064;
pub(super) const STRTAB_BASE: usize = 0x080;
pub(super) const STRTAB_BASE_CFG: usize = 0x088;
pub(super) const CMDQ_BASE: usize = 0x090;
pub(super) const CMDQ_PROD: usize = 0x098;
pub(super) const CMDQ_CONS: usize = 0x09C;
pub(super) const EVENTQ_BASE: usize = 0x0A0;
pub(super) const PRIQ_BASE: usize = 0x0C0;
pub(super) const PRIQ_IRQ_CFG2: usize = 0x0DC;
pub(super) const EVENTQ_PROD: usize = 0x1_00A8;
pub(super) const EVENTQ_CONS: usize = 0x1_00AC;
pub(super) const PRIQ_PROD: usize = 0x1_00C8;
pub(super) const PRIQ_CONS: usize = 0x1_00CC;

/// Both register pages, in bytes.
const WINDOW: usize = 0x2_0000;

// CR0 and CR0ACK.
pub(super) const SMMUEN: u64 = 1 << 0;
pub(super) const PRIQEN: u64 = 1 << 1;
pub(super) const EVENTQEN: u64 = 1 << 2;
pub(super) const CMDQEN: u64 = 1 << 3;
pub(super) const ATSCHK: u64 = 1 << 4;

/// GBPA.UPDATE.
const UPDATE: u64 = 1 << 31;
/// GBPA.ABORT.
pub(super) const ABORT: u64 = 1 << 20;
/// CR2.RECINVSID.
pub(super) const RECINVSID: u64 = 1 << 1;

// IRQ_CTRL and IRQ_CTRLACK.
pub(super) const GERROR_IRQEN: u64 = 1 << 0;
pub(super) const PRIQ_IRQEN: u64 = 1 << 1;
pub(super) const EVENTQ_IRQEN: u64 = 1 << 2;

// GERROR and GERRORN.
pub(super) const CMDQ_ERR: u64 = 1 << 0;
pub(super) const EVENTQ_ABT_ERR: u64 = 1 << 2;
pub(super) const PRIQ_ABT_ERR: u64 = 1 << 3;

/// OVFLG and OVACKFLG of the queues that the unit writes.
pub(super) const OVERFLOW: u64 = 1 << 31;
/// The index and wrap bits of a queue pointer.
const POINTER: u64 = 0xF_FFFF;

/// An update of a register that the unit acknowledges later.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Update {
    /// One bit of CR0, as a mask; acknowledged in CR0ACK.
    Cr0(u32),
    /// IRQ_CTRL; acknowledged in IRQ_CTRLACK.
    IrqCtrl,
    /// GBPA; acknowledged by UPDATE.
    Gbpa,
}

/// When a register takes a write.
#[derive(Clone, Copy)]
enum When {
    /// Always.
    Always,
    /// Never (RO).
    Never,
    /// While these bits are zero in CR0 and in CR0ACK.
    Off(u64),
    /// While this bit is zero in IRQ_CTRL and in IRQ_CTRLACK.
    NoInterrupt(u64),
}

/// One register and its access rules; a bit outside `writable` is reserved.
pub(super) struct Register {
    offset: usize,
    bytes: usize,
    name: &'static str,
    writable: u64,
    when: When,
}

/// Returns the register map of a unit with these capabilities, in the manual's order.
pub(super) fn map(config: &Config) -> Vec<Register> {
    let pri = config.pri();
    let mut map = Vec::new();
    let mut add = |offset, bytes, name, writable, when| {
        map.push(Register { offset, bytes, name, writable, when });
    };
    let identification = ["IDR0", "IDR1", "IDR2", "IDR3", "IDR4", "IDR5", "IIDR", "AIDR"];
    for (offset, name) in (IDR0..).step_by(4).zip(identification) {
        add(offset, 4, name, 0, When::Never);
    }
    let ats = if config.ats() { ATSCHK } else { 0 };
    let queues = EVENTQEN | CMDQEN | if pri { PRIQEN } else { 0 };
    add(CR0, 4, "CR0", SMMUEN | queues | ats, When::Always);
    add(CR0ACK, 4, "CR0ACK", 0, When::Never);
    // TABLE_* and QUEUE_* are locked by different bits: see `written`.
    add(CR1, 4, "CR1", 0xFFF, When::Always);
    // RECINVSID and PTM.
    add(CR2, 4, "CR2", RECINVSID | 1 << 2, When::Off(SMMUEN));
    add(0x040, 4, "STATUSR", 0, When::Never);
    add(GBPA, 4, "GBPA", UPDATE | ABORT | 0xF_3F1F, When::Always);
    let interrupts = GERROR_IRQEN | EVENTQ_IRQEN | if pri { PRIQ_IRQEN } else { 0 };
    add(IRQ_CTRL, 4, "IRQ_CTRL", interrupts, When::Always);
    add(IRQ_CTRLACK, 4, "IRQ_CTRLACK", 0, When::Never);
    add(GERROR, 4, "GERROR", 0, When::Never);
    add(GERRORN, 4, "GERRORN", 0x1FD, When::Always);
    // Without MSIs, the addresses and data of messages are reserved. ADDR [55:2]; DATA; MemAttr [3:0] and SH [5:4].
    let messages = config.messages();
    let only = |bits: u64| if messages { bits } else { 0 };
    let mut interrupt = |offset, names: [_; 3], bit, attributes| {
        add(offset, 8, names[0], only((1 << 56) - (1 << 2)), When::NoInterrupt(bit));
        add(offset + 8, 4, names[1], only(0xFFFF_FFFF), When::NoInterrupt(bit));
        add(offset + 12, 4, names[2], attributes | only(0x3F), When::NoInterrupt(bit));
    };
    interrupt(0x068, ["GERROR_IRQ_CFG0", "GERROR_IRQ_CFG1", "GERROR_IRQ_CFG2"], GERROR_IRQEN, 0);
    interrupt(0x0B0, ["EVENTQ_IRQ_CFG0", "EVENTQ_IRQ_CFG1", "EVENTQ_IRQ_CFG2"], EVENTQ_IRQEN, 0);
    if pri {
        // LO holds for wires too.
        interrupt(0x0D0, ["PRIQ_IRQ_CFG0", "PRIQ_IRQ_CFG1", "PRIQ_IRQ_CFG2"], PRIQ_IRQEN, 1 << 31);
    }
    let address = |low: u32| (1 << 56) - (1 << low);
    add(STRTAB_BASE, 8, "STRTAB_BASE", 1 << 62 | address(6), When::Off(SMMUEN));
    // FMT and SPLIT are reserved where there is one level alone.
    let two_levels = if config.two_levels() { 0x3_07C0 } else { 0 };
    add(STRTAB_BASE_CFG, 4, "STRTAB_BASE_CFG", two_levels | 0x3F, When::Off(SMMUEN));
    let base = 1 << 62 | address(5) | 0x1F;
    add(CMDQ_BASE, 8, "CMDQ_BASE", base, When::Off(CMDQEN));
    add(CMDQ_PROD, 4, "CMDQ_PROD", POINTER, When::Always);
    add(CMDQ_CONS, 4, "CMDQ_CONS", POINTER, When::Off(CMDQEN));
    add(EVENTQ_BASE, 8, "EVENTQ_BASE", base, When::Off(EVENTQEN));
    add(EVENTQ_PROD, 4, "EVENTQ_PROD", OVERFLOW | POINTER, When::Off(EVENTQEN));
    add(EVENTQ_CONS, 4, "EVENTQ_CONS", OVERFLOW | POINTER, When::Always);
    if pri {
        add(PRIQ_BASE, 8, "PRIQ_BASE", base, When::Off(PRIQEN));
        add(PRIQ_PROD, 4, "PRIQ_PROD", OVERFLOW | POINTER, When::Off(PRIQEN));
        add(PRIQ_CONS, 4, "PRIQ_CONS", OVERFLOW | POINTER, When::Always);
    }
    map
}

/// An update on its way.
pub(super) struct Due {
    /// Register reads and looks at the clock until it is acknowledged.
    left: u32,
    update: Update,
    /// GBPA: what it will hold.
    value: u64,
}

/// One of the three queues: where its registers are, and how large its entries.
#[derive(Clone, Copy)]
pub(super) struct Ring {
    pub(super) name: &'static str,
    pub(super) base: usize,
    pub(super) prod: usize,
    pub(super) cons: usize,
    /// Its enable in CR0.
    pub(super) enable: u64,
    entry_bytes: u64,
    /// Where IDR1 holds log2 of its largest size.
    limit_shift: u32,
}

pub(super) const CMDQ: Ring = Ring {
    name: "CMDQ",
    base: CMDQ_BASE,
    prod: CMDQ_PROD,
    cons: CMDQ_CONS,
    enable: CMDQEN,
    entry_bytes: 16,
    limit_shift: 21,
};

pub(super) const EVENTQ: Ring = Ring {
    name: "EVENTQ",
    base: EVENTQ_BASE,
    prod: EVENTQ_PROD,
    cons: EVENTQ_CONS,
    enable: EVENTQEN,
    entry_bytes: 32,
    limit_shift: 16,
};

pub(super) const PRIQ: Ring = Ring {
    name: "PRIQ",
    base: PRIQ_BASE,
    prod: PRIQ_PROD,
    cons: PRIQ_CONS,
    enable: PRIQEN,
    entry_bytes: 16,
    limit_shift: 11,
};

impl State {
    pub(super) fn get(&self, register: usize) -> u64 {
        self.values.get(&register).copied().unwrap_or(0)
    }

    pub(super) fn set(&mut self, register: usize, value: u64) {
        self.values.insert(register, value);
    }

    /// Whether this enable of CR0 is in force.
    pub(super) fn on(&self, enable: u64) -> bool {
        self.get(CR0ACK) & enable != 0
    }

    /// Reads `bytes` bytes at `offset`; zero where no register is.
    pub(super) fn read(&mut self, offset: usize, bytes: usize) -> u64 {
        if self.gone {
            return u64::MAX;
        }
        self.step();
        match self.find(offset, bytes) {
            Err(rule) => {
                self.violation(format!("read of {bytes} bytes at {offset:#07x}: {rule}"));
                0
            }
            Ok(None) => 0,
            Ok(Some(at)) => {
                let register = self.map[at].offset;
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
            Ok(None) => return self.violation(format!("write to {offset:#07x}: no such register")),
            Err(rule) => {
                return self.violation(format!("write of {bytes} bytes at {offset:#07x}: {rule}"));
            }
        };
        let Register { offset: register, name, writable, when, .. } = self.map[at];
        // A 32-bit write to half of a 64-bit register leaves the other half alone.
        let shift = (offset - register) * 8;
        let written = u64::MAX >> (64 - bytes * 8) << shift;
        let value = value << shift;
        let refused = match when {
            When::Always => None,
            When::Never => Some("is read-only"),
            When::Off(enables) if (self.get(CR0) | self.get(CR0ACK)) & enables != 0 => {
                Some("is locked: what uses it is on, or was not acknowledged to be off")
            }
            When::NoInterrupt(enable) if (self.get(IRQ_CTRL) | self.get(IRQ_CTRLACK)) & enable != 0 => {
                Some("is locked while its interrupt is on")
            }
            When::Off(_) | When::NoInterrupt(_) => None,
        };
        if let Some(rule) = refused {
            return self.violation(format!("write to {name}: it {rule}"));
        }
        if value & !writable != 0 {
            self.violation(format!("write to {name}: reserved bits {:#x} must be zero", value & !writable));
        }
        let old = self.get(register);
        self.set(register, old & !(written & writable) | value & writable);
        self.written(register, old);
    }

    /// Returns the place in the map of the register that an access reaches, or the rule that it breaks.
    fn find(&self, offset: usize, bytes: usize) -> Result<Option<usize>, &'static str> {
        if !offset.is_multiple_of(bytes) {
            return Err("misaligned");
        }
        if offset.checked_add(bytes).is_none_or(|end| end > WINDOW) {
            return Err("outside the unit's registers");
        }
        let holds = |r: &Register| (r.offset..r.offset + r.bytes).contains(&offset);
        match self.map.iter().position(holds) {
            Some(at) if bytes > self.map[at].bytes => Err("a 32-bit register takes 32-bit accesses"),
            found => Ok(found),
        }
    }

    /// Does what a write to `register` sets off; the register holds the new value already.
    fn written(&mut self, register: usize, old: u64) {
        let new = self.get(register);
        match register {
            CR0 => self.enables_written(old, new),
            CR1 => {
                let enabled = self.get(CR0) | self.get(CR0ACK);
                let locked = if enabled & SMMUEN != 0 { 0xFC0 } else { 0 }
                    | if enabled & (PRIQEN | EVENTQEN | CMDQEN) != 0 { 0x3F } else { 0 };
                self.set(CR1, old & locked | new & !locked);
                if (old ^ new) & locked != 0 {
                    self.violation(format!("write to CR1: bits {locked:#x} are locked by CR0"));
                }
            }
            GBPA => {
                self.set(GBPA, old);
                if new & UPDATE == 0 {
                    self.violation("write to GBPA: ignored without UPDATE".into());
                } else if old & UPDATE != 0 {
                    self.violation("write to GBPA: ignored before UPDATE of the one before is zero".into());
                } else {
                    self.set(GBPA, old | UPDATE);
                    self.update(Update::Gbpa, new & !UPDATE);
                }
            }
            IRQ_CTRL => {
                if self.due.iter().any(|due| due.update == Update::IrqCtrl) {
                    self.violation("IRQ_CTRL written before IRQ_CTRLACK showed the write before".into());
                }
                if old != new {
                    self.update(Update::IrqCtrl, 0);
                }
            }
            GERRORN => {
                let active = self.get(GERROR) ^ old;
                let wrong = (old ^ new) & !active;
                if wrong != 0 {
                    self.violation(format!("GERRORN toggles {wrong:#x}, where no error is active"));
                }
                self.run_commands();
                self.flush_stalls();
            }
            STRTAB_BASE_CFG if new >> 16 & 3 > 1 => {
                self.violation(format!("STRTAB_BASE_CFG {new:#x}: FMT is reserved"));
            }
            STRTAB_BASE_CFG if new >> 16 & 3 == 1 && !matches!(new >> 6 & 0x1F, 6 | 8 | 10) => {
                self.violation(format!("STRTAB_BASE_CFG {new:#x}: SPLIT is reserved"));
            }
            CMDQ_BASE => self.check_base(CMDQ),
            EVENTQ_BASE => self.check_base(EVENTQ),
            PRIQ_BASE => self.check_base(PRIQ),
            CMDQ_PROD => {
                self.check_pointer(CMDQ, new);
                // While an error is active, software may take commands back.
                let forward = self.used_between(CMDQ, old, new) + self.used(CMDQ, old, self.get(CMDQ_CONS));
                if self.on(CMDQEN) && !self.active(CMDQ_ERR) && forward > self.size(CMDQ) {
                    self.violation(format!("CMDQ_PROD written as {new:#x}: moved back, or past CMDQ_CONS"));
                }
                self.run_commands();
            }
            EVENTQ_CONS => {
                self.consumed(EVENTQ, old, new);
                self.flush_stalls();
            }
            PRIQ_CONS => self.consumed(PRIQ, old, new),
            CMDQ_CONS => self.check_pointer(CMDQ, new),
            EVENTQ_PROD => self.check_pointer(EVENTQ, new),
            PRIQ_PROD => self.check_pointer(PRIQ, new),
            _ => {}
        }
    }

    /// A write to CR0.
    fn enables_written(&mut self, old: u64, new: u64) {
        for bit in [SMMUEN, PRIQEN, EVENTQEN, CMDQEN, ATSCHK] {
            if (old ^ new) & bit == 0 {
                continue;
            }
            let update = Update::Cr0(bit as u32);
            if self.due.iter().any(|due| due.update == update) {
                self.violation(format!("CR0 bit {bit:#x} changed again before CR0ACK showed it"));
            }
            if new & bit != 0 {
                self.check_enable(bit);
            }
            self.update(update, 0);
        }
    }

    /// Notes the rule that turning on `bit` breaks in the state that the unit is in.
    fn check_enable(&mut self, bit: u64) {
        for ring in [CMDQ, EVENTQ, PRIQ].into_iter().filter(|ring| ring.enable == bit) {
            let (prod, cons) = (self.get(ring.prod), self.get(ring.cons));
            if self.used(ring, prod, cons) > self.size(ring) {
                self.violation(format!("{} enabled with indices {prod:#x}, {cons:#x}", ring.name));
            }
        }
        if bit == SMMUEN && !self.caches.configuration_known {
            // After reset, caches hold anything.
            self.violation("SMMUEN set before CFGI_ALL and CMD_SYNC".into());
        }
        if bit == SMMUEN && !self.caches.translations_known {
            self.violation("SMMUEN set before TLBI_NSNH_ALL and CMD_SYNC".into());
        }
        if bit == SMMUEN {
            let base = self.get(STRTAB_BASE) & ((1 << 56) - 1);
            if self.stream_table() != base {
                self.violation(format!("STRTAB_BASE {base:#x} is not aligned to the table's size"));
            }
        }
    }

    /// Bits of a StreamID that finds an entry: STRTAB_BASE_CFG.LOG2SIZE, which IDR1.SIDSIZE limits.
    pub(super) fn stream_bits(&self) -> u64 {
        (self.get(STRTAB_BASE_CFG) & 0x3F).min(self.get(IDR1) & 0x3F).min(32)
    }

    /// STRTAB_BASE_CFG.SPLIT of a stream table of two levels; none of a linear one.
    pub(super) fn split(&self) -> Option<u64> {
        let config = self.get(STRTAB_BASE_CFG);
        let split = match config >> 6 & 0x1F {
            known @ (6 | 8 | 10) => known,
            _ => 6,
        };
        (config >> 16 & 3 == 1).then_some(split)
    }

    /// STRTAB_BASE.ADDR, aligned as the unit does: to the size that LOG2SIZE says, also where that is beyond IDR1.SIDSIZE.
    ///
    /// Of two levels, this is the first: 8 bytes for each 2^SPLIT streams, and 64 at least.
    pub(super) fn stream_table(&self) -> u64 {
        let streams = self.get(STRTAB_BASE_CFG) & 0x3F;
        let log2 = match self.split() {
            None => 6 + streams,
            Some(split) => (3 + streams.saturating_sub(split)).max(6),
        };
        self.get(STRTAB_BASE) & ((1 << 56) - (1 << 6)) & !((1u128 << log2) - 1) as u64
    }

    fn update(&mut self, update: Update, value: u64) {
        self.due.retain(|due| due.update != update);
        self.due.push(Due { left: self.config.acknowledge_after, update, value });
        self.acknowledge();
    }

    /// One step of the unit's time: a register read, or a look at the clock.
    pub(super) fn step(&mut self) {
        for due in &mut self.due {
            due.left = due.left.saturating_sub(1);
        }
        self.acknowledge();
        self.looked();
        // A CMD_SYNC may have waited long enough for a device.
        self.run_commands();
    }

    /// Puts updates into force that are due, unless they are withheld.
    pub(super) fn acknowledge(&mut self) {
        let withheld = self.withheld.clone();
        let ready = |due: &Due| due.left == 0 && !withheld.contains(&due.update);
        while let Some(at) = self.due.iter().position(ready) {
            let Due { update, value, .. } = self.due.remove(at);
            match update {
                Update::Cr0(bit) => self.put_into_force(bit.into()),
                Update::IrqCtrl => self.set(IRQ_CTRLACK, self.get(IRQ_CTRL)),
                Update::Gbpa => self.set(GBPA, value),
            }
        }
    }

    fn put_into_force(&mut self, bit: u64) {
        let on = self.get(CR0) & bit;
        self.set(CR0ACK, self.get(CR0ACK) & !bit | on);
        match bit {
            SMMUEN if on == 0 => self.end_all_stalls(),
            CMDQEN => self.run_commands(),
            EVENTQEN => self.flush_stalls(),
            _ => {}
        }
    }

    /// Whether this error of GERROR is active.
    pub(super) fn active(&self, error: u64) -> bool {
        (self.get(GERROR) ^ self.get(GERRORN)) & error != 0
    }

    /// Entries of a queue: 2^LOG2SIZE, which IDR1 limits.
    pub(super) fn size(&self, ring: Ring) -> u64 {
        let limit = self.get(IDR1) >> ring.limit_shift & 0x1F;
        1 << (self.get(ring.base) & 0x1F).min(limit)
    }

    /// Entries between two indices with their wrap bits.
    fn used_between(&self, ring: Ring, from: u64, to: u64) -> u64 {
        to.wrapping_sub(from) & (self.size(ring) * 2 - 1)
    }

    /// Entries that wait in a queue with these indices.
    pub(super) fn used(&self, ring: Ring, prod: u64, cons: u64) -> u64 {
        self.used_between(ring, cons, prod)
    }

    /// The physical address of the entry that `pointer` names.
    pub(super) fn entry(&self, ring: Ring, pointer: u64) -> u64 {
        let size = self.size(ring);
        let below = (size * ring.entry_bytes).max(32) - 1;
        let base = self.get(ring.base) & ((1 << 56) - (1 << 5)) & !below;
        base + (pointer & (size - 1)) * ring.entry_bytes
    }

    /// The index after `pointer`; its overflow flag stays.
    pub(super) fn next(&self, ring: Ring, pointer: u64) -> u64 {
        pointer & OVERFLOW | (pointer + 1) & (self.size(ring) * 2 - 1)
    }

    fn check_base(&mut self, ring: Ring) {
        let (base, size) = (self.get(ring.base), self.size(ring));
        let name = ring.name;
        if 1 << (base & 0x1F) != size {
            self.violation(format!("{name}_BASE.LOG2SIZE is beyond what IDR1 allows"));
        }
        let address = base & ((1 << 56) - (1 << 5));
        if self.entry(ring, 0) != address {
            self.violation(format!("{name}_BASE {address:#x} is not aligned to the queue's size"));
        }
    }

    fn check_pointer(&mut self, ring: Ring, pointer: u64) {
        let index = pointer & !OVERFLOW;
        if index >= self.size(ring) * 2 {
            self.violation(format!("{} index {index:#x} has bits beyond the wrap bit", ring.name));
        }
    }

    /// After a write to the index with which software consumes: forward, to at most the one that the unit writes.
    fn consumed(&mut self, ring: Ring, old: u64, new: u64) {
        self.check_pointer(ring, new);
        if !self.on(ring.enable) {
            return;
        }
        let prod = self.get(ring.prod);
        if self.used_between(ring, old, new) > self.used(ring, prod, old) {
            let name = ring.name;
            self.violation(format!("{name}_CONS written as {new:#x}: not between {old:#x} and {prod:#x}"));
        }
        if (old ^ new) & OVERFLOW != 0 && (new ^ prod) & OVERFLOW != 0 {
            self.violation(format!("{}_CONS acknowledges an overflow that there was not", ring.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        SmmuUnit, Wire,
        bench::{Bench, COMMANDS, SYNC},
    };
    use super::*;
    use crate::{golden_smmuv3 as golden, memory::Memory};
    use iommu::Bus;

    fn unit() -> SmmuUnit {
        SmmuUnit::new(Memory::new(8), Config::full())
    }

    /// Asserts that `action` on a unit after reset breaks exactly one rule, one whose text contains `words`.
    fn assert_breaks(words: &str, action: impl Fn(&SmmuUnit)) {
        let unit = unit();

        action(&unit);

        let broken = unit.violations();
        assert!(broken.len() == 1 && broken[0].contains(words), "{broken:?} is not {words:?}");
    }

    #[test]
    fn the_identification_of_qemu_reads_as_it_was_measured() {
        let unit = SmmuUnit::new(Memory::new(8), Config::qemu());

        let read = [0, 4, 8, 0xC, 0x10, 0x14, 0x18, 0x1C, 0x40, GBPA, 0xFE0].map(|at| unit.read32(at));

        assert_eq!(read, [0x0D44_101B, 0x0273_0010, 0, 0x1414, 0, 0x74, 0, 1, 0, 0x1000, 0]);
        assert_eq!(unit.violations(), [""; 0]);
    }

    #[test]
    fn an_enable_is_acknowledged_after_some_steps() {
        let unit = unit();

        unit.write32(CR0, CMDQEN as u32);
        let seen = [(); 4].map(|()| unit.read32(CR0ACK));

        assert_eq!(seen, [0, 0, 8, 8]);
        assert_eq!(unit.read32(CR0), 8);
        unit.never_acknowledge(&[Update::Cr0(8)]);
        unit.write32(CR0, 0);
        (0..9).for_each(|_| unit.advance(1_000_000));
        assert_eq!(unit.read32(CR0ACK), 8);
        unit.never_acknowledge(&[]);
        unit.advance(1);
        assert_eq!(unit.read32(CR0ACK), 0);
        assert_eq!(unit.violations(), [""; 0]);
    }

    #[test]
    fn the_bypass_attribute_takes_effect_when_update_reads_zero() {
        let unit = unit();

        unit.write32(GBPA, golden::GBPA_ABORT as u32);

        assert_eq!(unit.read32(GBPA), 0x8000_1000);
        unit.advance(0);
        assert_eq!(unit.read32(GBPA), 0x0010_1000);
        assert_eq!(unit.violations(), [""; 0]);
    }

    #[test]
    fn interrupts_are_enabled_when_acknowledged() {
        let unit = unit();

        unit.never_acknowledge(&[Update::IrqCtrl]);
        unit.write32(IRQ_CTRL, 5);
        unit.raise_errors(1 << 8);
        (0..9).for_each(|_| unit.advance(9));
        assert_eq!((unit.read32(IRQ_CTRLACK), unit.pulses()), (0, vec![]));
        unit.never_acknowledge(&[]);
        unit.raise_errors(1 << 8 | 4);

        assert_eq!((unit.read32(IRQ_CTRLACK), unit.pulses()), (5, vec![Wire::Error]));
        assert_eq!(unit.read32(GERROR), 1 << 8 | 4);
    }

    #[test]
    fn a_half_of_a_register_may_be_written_alone() {
        let unit = unit();

        unit.write32(STRTAB_BASE, 0x8020_0000);
        unit.write32(STRTAB_BASE + 4, 0x4000_0000);

        assert_eq!(unit.read64(STRTAB_BASE), golden::STRTAB_BASE);
        assert_eq!(unit.read32(STRTAB_BASE + 4), 0x4000_0000);
        assert_eq!(unit.violations(), [""; 0]);
    }

    #[test]
    fn an_access_against_the_rules_is_noted() {
        assert_breaks("misaligned", |unit| unit.write32(CR0 + 2, 0));
        assert_breaks("outside", |unit| {
            unit.read32(WINDOW);
        });
        assert_breaks("32-bit accesses", |unit| {
            unit.read64(CR0);
        });
        assert_breaks("read-only", |unit| unit.write32(CR0ACK, 1));
        assert_breaks("no such register", |unit| unit.write32(0x0A8, 0));
        assert_breaks("reserved bits 0x20", |unit| unit.write32(CR0, 0x20));
        assert_breaks("ignored without UPDATE", |unit| unit.write32(GBPA, 1 << 20));
        assert_breaks("ignored before", |unit| {
            unit.write32(GBPA, golden::GBPA_ABORT as u32);
            unit.write32(GBPA, golden::GBPA_ABORT as u32);
        });
        assert_breaks("changed again", |unit| {
            unit.write32(CR0, EVENTQEN as u32);
            unit.write32(CR0, 0);
        });
        assert_breaks("before IRQ_CTRLACK", |unit| {
            unit.write32(IRQ_CTRL, 1);
            unit.write32(IRQ_CTRL, 5);
        });
        assert_breaks("no error is active", |unit| unit.write32(GERRORN, 4));
        assert_breaks("SPLIT is reserved", |unit| unit.write32(STRTAB_BASE_CFG, 1 << 16 | 7 << 6));
        assert_breaks("FMT is reserved", |unit| unit.write32(STRTAB_BASE_CFG, 2 << 16));
        assert_breaks("beyond what IDR1", |unit| unit.write64(CMDQ_BASE, 20));
        assert_breaks("not aligned", |unit| unit.write64(EVENTQ_BASE, 0x8010_2020 | 7));
        assert_breaks("beyond the wrap bit", |unit| unit.write32(PRIQ_CONS, 2));
    }

    #[test]
    fn a_stream_table_of_more_streams_than_the_part_tells_apart_is_aligned_to_all_of_it() {
        // IDR1.SIDSIZE of this part is 16, and 2^16 entries are 4 MiB.
        for (log2, base, aligned) in
            [(16, 0x8040_0000, true), (17, 0x8040_0000, false), (17, 0x8080_0000, true)]
        {
            let unit = unit();
            unit.write64(STRTAB_BASE, base);
            unit.write32(STRTAB_BASE_CFG, log2);
            assert_eq!((unit.read32(STRTAB_BASE_CFG), unit.violations()), (log2, vec![]));

            unit.write32(CR0, SMMUEN as u32);

            let broken = |violation: &String| violation.contains("not aligned to the table");
            assert_eq!(unit.violations().iter().any(broken), !aligned, "{log2} {base:#x}");
        }
    }

    #[test]
    fn the_first_of_two_levels_is_aligned_to_its_size_and_to_64_bytes() {
        // 2^(16 - 8) entries are 2 KiB; 2^(8 - 6) are 32 bytes.
        for (config, base, aligned) in [
            (0x1_0210, 0x8020_0800, true),
            (0x1_0210, 0x8020_0400, false),
            (0x1_0188, 0x8020_0040, true),
            // 2^(16 - 10) entries; and of an even smaller table, one.
            (0x1_0290, 0x8020_0200, true),
            (0x1_0290, 0x8020_0100, false),
            (0x1_0284, 0x8020_0040, true),
        ] {
            let unit = unit();
            unit.write64(STRTAB_BASE, base);
            unit.write32(STRTAB_BASE_CFG, config);
            assert_eq!((unit.read32(STRTAB_BASE_CFG), unit.violations()), (config, vec![]));

            unit.write32(CR0, SMMUEN as u32);

            let broken = |violation: &String| violation.contains("not aligned to the table");
            assert_eq!(unit.violations().iter().any(broken), !aligned, "{config:#x} {base:#x}");
        }
    }

    #[test]
    fn a_part_of_linear_tables_alone_has_no_format_to_choose() {
        let config = Config { idr0: Config::full().idr0 & !(1 << 27), ..Config::full() };
        let unit = SmmuUnit::new(Memory::new(8), config);

        unit.write32(STRTAB_BASE_CFG, 0x1_0210);

        assert_eq!(unit.read32(STRTAB_BASE_CFG), 0x10);
        assert!(unit.violations()[0].contains("reserved bits 0x10200"), "{:?}", unit.violations());
    }

    #[test]
    fn a_part_without_page_requests_has_none_of_their_registers() {
        let unit = SmmuUnit::new(Memory::new(8), Config::qemu());

        unit.write32(CR0, PRIQEN as u32);
        unit.write64(PRIQ_BASE, 0);

        assert_eq!((unit.read64(PRIQ_BASE), unit.violations().len()), (0, 2));
    }

    #[test]
    fn what_is_in_use_is_locked() {
        let bench = Bench::started(Config::full());
        let unit = &bench.unit;
        let before = [CR1, CR2, STRTAB_BASE, CMDQ_BASE, EVENTQ_BASE, PRIQ_BASE, CMDQ_CONS, EVENTQ_PROD];
        let values = before.map(|at| unit.read32(at));

        before.iter().for_each(|&at| unit.write32(at, 0));

        assert_eq!(before.map(|at| unit.read32(at)), values);
        let noted = unit.violations();
        assert_eq!(noted.len(), before.len(), "{noted:#?}");
        assert!(noted.iter().all(|noted| noted.contains("locked")));
    }

    #[test]
    fn caches_are_unknown_after_reset() {
        for (commands, words) in [
            ([golden::CFGI_ALL, SYNC], "before TLBI_NSNH_ALL"),
            ([golden::TLBI_NSNH_ALL, SYNC], "before CFGI_ALL"),
        ] {
            let bench = Bench::new(Config::qemu());
            bench.unit.write64(CMDQ_BASE, COMMANDS | 8);
            bench.enable(CMDQEN);
            bench.submit(&commands);

            bench.enable(SMMUEN);

            bench.assert_broken(words);
        }
    }

    #[test]
    fn a_command_index_moves_forward_and_not_past_the_queue() {
        let bench = Bench::started(Config::qemu());
        bench.unit.pause();

        bench.unit.write32(CMDQ_PROD, 4 + 256);
        bench.assert_lawful();
        bench.unit.write32(CMDQ_PROD, 4 + 257);

        bench.assert_broken("moved back, or past");
    }

    #[test]
    fn an_index_that_consumes_stays_behind_the_one_that_produces() {
        let bench = Bench::started(Config::qemu());
        bench.unit.record(golden::C_BAD_STE);

        bench.unit.write32(EVENTQ_CONS, 2);
        bench.assert_broken("not between");
        bench.unit.write32(EVENTQ_CONS, 1 << 31 | 2);

        assert!(bench.unit.violations()[1].contains("overflow that there was not"));
    }
    #[test]
    fn what_was_in_use_is_locked_until_it_is_acknowledged_to_be_off() {
        let bench = Bench::started(Config::qemu());
        let unit = &bench.unit;

        unit.write32(CR0, 0);
        unit.write64(CMDQ_BASE, 8);
        bench.assert_broken("not acknowledged to be off");
        while unit.read32(CR0ACK) != 0 {}
        unit.write64(CMDQ_BASE, 8);

        assert_eq!((unit.read64(CMDQ_BASE), unit.violations().len()), (8, 1));
    }
}
