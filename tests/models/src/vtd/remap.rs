//! Interrupts that devices and I/O APICs send: what arrives where, and what is refused.

use super::{
    Refusal, State, VtdUnit,
    device::sid,
    registers::{CFI, IRE},
    walk::{At, Fault, Kind, Request},
};
use iommu::{Message, PhysAddr, StreamId};
use std::collections::BTreeMap;

/// An interrupt that reached the processors.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Arrived {
    /// The ID of the local APIC, or of a group of them.
    pub destination: u32,
    /// The ID is a logical one (DM).
    pub logical: bool,
    /// One of the destinations is chosen (RH).
    pub hint: bool,
    /// 0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 7 ExtINT (DLM).
    pub delivery: u8,
    /// The vector.
    pub vector: u8,
    /// Level-triggered (TM).
    pub level: bool,
    /// The unit took it from an entry of its table; else the device chose it.
    pub remapped: bool,
}

/// The interrupt remapping table, and what the unit remembers of it.
#[derive(Default)]
pub(super) struct Remapping {
    /// IRTA as it was when GCMD.SIRTP completed.
    table: u64,
    /// Interrupt entry cache, by index. It has no limit.
    entries: BTreeMap<u16, [u64; 2]>,
    /// Everything was invalidated since the table was set.
    pub(super) is_fresh: bool,
}

impl Remapping {
    /// After GCMD.SIRTP completed; `forgets` where that invalidates (CAP.ESIRTPS).
    pub(super) fn set_table(&mut self, irta: u64, forgets: bool) {
        self.table = irta;
        self.is_fresh = forgets;
        if forgets {
            self.entries.clear();
        }
    }

    /// Drops all entries, or those that agree with `index` in all but the low `mask` bits.
    pub(super) fn forget(&mut self, selected: Option<(u16, u32)>) {
        match selected {
            None => {
                self.entries.clear();
                self.is_fresh = true;
            }
            Some((index, mask)) => {
                let block = |index: u16| u32::from(index) >> mask.min(16);
                self.entries.retain(|&at, _| block(at) != block(index));
            }
        }
    }

    /// IRTA.EIME.
    pub(super) fn is_extended(&self) -> bool {
        self.table & 1 << 11 != 0
    }
}

/// What an interrupt request names, in either format.
enum Named {
    /// An entry: handle and subhandle.
    Index(u32),
    /// The interrupt itself.
    Itself(Arrived),
}

/// Bits of word 0 that are reserved in a present entry for remapped interrupts, whatever the mode.
const RESERVED: u64 = 0x7 << 12 | 0xFF << 24;
/// Bits of the destination that are reserved without IRTA.EIME.
const RESERVED_XAPIC: u64 = 0xFF << 32 | 0xFFFF << 48;
/// Bits of word 1 that are reserved.
const RESERVED_UPPER: u64 = !0xF_FFFF;

impl VtdUnit {
    /// The device writes `message`, which lies in the interrupt range.
    ///
    /// PANICS: when it lies elsewhere, where it would be no interrupt.
    pub fn interrupt(&self, stream: StreamId, message: Message) -> Result<Arrived, Refusal> {
        let Message { address, data } = message;
        assert_eq!(address >> 20, 0xFEE, "{address:#x} is memory");
        let named = if address & 1 << 4 == 0 {
            Ok(Named::Itself(Arrived {
                destination: (address >> 12) as u32 & 0xFF,
                logical: address & 1 << 2 != 0,
                hint: address & 1 << 3 != 0,
                delivery: (data >> 8) as u8 & 7,
                vector: data as u8,
                level: data & 1 << 15 != 0,
                remapped: false,
            }))
        } else {
            let handle = (address >> 5) as u32 & 0x7FFF | ((address >> 2) as u32 & 1) << 15;
            let subhandle = if address & 1 << 3 != 0 { data & 0xFFFF } else { 0 };
            if data >> 16 != 0 { Err(0x20) } else { Ok(Named::Index(handle + subhandle)) }
        };
        self.lock().interrupt(sid(stream), named)
    }

    /// The I/O APIC with the source-id `stream` raises the pin that has the redirection entry `entry`.
    ///
    /// PANICS: when the pin is masked.
    pub fn pin(&self, stream: StreamId, entry: u64) -> Result<Arrived, Refusal> {
        assert!(entry & 1 << 16 == 0, "the pin is masked");
        let (vector, level) = (entry as u8, entry & 1 << 15 != 0);
        let named = if entry & 1 << 48 == 0 {
            Named::Itself(Arrived {
                destination: (entry >> 56) as u32,
                logical: entry & 1 << 11 != 0,
                hint: false,
                delivery: (entry >> 8) as u8 & 7,
                vector,
                level,
                remapped: false,
            })
        } else {
            Named::Index((entry >> 49) as u32 | ((entry >> 11) as u32 & 1) << 15)
        };
        let mut state = self.lock();
        let arrived = state.interrupt(sid(stream), Ok(named))?;
        if (arrived.vector, arrived.level) != (vector, level) {
            state.violation(format!("the pin says vector {vector:#x}, level {level}: not as its entry"));
        }
        Ok(arrived)
    }
}

impl State {
    fn interrupt(&mut self, sid: u16, named: Result<Named, u8>) -> Result<Arrived, Refusal> {
        let index = match &named {
            Ok(Named::Index(index)) => *index,
            _ => 0,
        };
        self.remap(sid, named).map_err(|(reason, suppressed)| {
            // FI: the index in 63:48.
            let address = u64::from(index) << 48;
            let request = Request { sid, pasid: None, address, kind: Kind::Write, at: At::Untranslated };
            self.record(&request, &Fault { reason, suppressed, privileged: false });
            Refusal::Fault(reason)
        })
    }

    /// Returns what a request becomes, or the reason of its refusal and whether FPD keeps it from being recorded.
    fn remap(&mut self, sid: u16, named: Result<Named, u8>) -> Result<Arrived, (u8, bool)> {
        let status = self.status();
        let index = match named {
            Ok(Named::Itself(arrived)) if status & IRE == 0 => return Ok(arrived),
            // Nobody is behind the address without remapping.
            _ if status & IRE == 0 => return Err((0x20, true)),
            Ok(Named::Itself(arrived)) => {
                let passes = status & CFI != 0 && !self.remapping.is_extended();
                return if passes { Ok(arrived) } else { Err((0x25, false)) };
            }
            Err(reason) => return Err((reason, false)),
            Ok(Named::Index(index)) => index,
        };
        let size = 2 << (self.remapping.table & 0xF);
        let index =
            u16::try_from(index).ok().filter(|&index| u32::from(index) < size).ok_or((0x21, false))?;
        let [w0, w1] = self.remap_entry(index)?;
        let fpd = w0 & 1 << 1 != 0;
        let extended = self.remapping.is_extended();
        if w0 & 1 == 0 {
            return Err((0x22, fpd));
        }
        let reserved = RESERVED | if extended { 0 } else { RESERVED_XAPIC };
        let (delivery, validation) = ((w0 >> 5) as u8 & 7, w1 >> 18 & 3);
        // A posted interrupt (IM) needs CAP.PI, which the model lacks.
        let is_valid = w0 & (reserved | 1 << 15) | w1 & RESERVED_UPPER == 0
            && !matches!(delivery, 3 | 6)
            && validation != 3;
        if !is_valid {
            return Err((0x24, fpd));
        }
        let named = match validation {
            1 => (sid ^ w1 as u16) & [0xFFFF, 0xFFFB, 0xFFF9, 0xFFF8][(w1 >> 16 & 3) as usize] == 0,
            2 => ((w1 >> 8) as u8..=w1 as u8).contains(&((sid >> 8) as u8)),
            _ => true,
        };
        if !named {
            return Err((0x26, fpd));
        }
        let hint = w0 & 1 << 3 != 0;
        if delivery == 1 && !hint {
            self.violation(format!("interrupt entry {index:#x}: lowest priority without RH"));
        }
        let destination = (w0 >> 32) as u32;
        Ok(Arrived {
            destination: if extended { destination } else { destination >> 8 & 0xFF },
            logical: w0 & 1 << 2 != 0,
            hint,
            delivery,
            vector: (w0 >> 16) as u8,
            level: w0 & 1 << 4 != 0,
            remapped: true,
        })
    }

    /// Returns entry `index` as the unit remembers it, or reads it.
    fn remap_entry(&mut self, index: u16) -> Result<[u64; 2], (u8, bool)> {
        if let Some(&entry) = self.remapping.entries.get(&index) {
            return Ok(entry);
        }
        let at = (self.remapping.table & !0xFFF) + u64::from(index) * 16;
        let word = |at| self.memory.device_load(PhysAddr(at)).map_err(|_| (0x23, false));
        let entry = [word(at)?, word(at + 8)?];
        if entry[0] & 1 != 0 || self.config.caching_mode() {
            self.remapping.entries.insert(index, entry);
        }
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Config,
        bench::Bench,
        registers::{GCMD, GSTS, QIE, SIRTP, TE},
    };
    use super::*;
    use crate::golden;
    use iommu::Bus;

    const IRTA: usize = 0xB8;
    const NIC: StreamId = StreamId(0x108);

    /// A unit that remaps interrupts by a table of 256 entries; returns where that is.
    fn bench(config: Config, extended: bool) -> (Bench, u64) {
        let mut bench = Bench::scalable(config, [0; 8]);
        let table = bench.page();
        bench.unit.write64(IRTA, table | golden::IRTA & u64::from(extended) << 11 | 7);
        bench.command(SIRTP, true);
        bench.submit(&[golden::INTERRUPT_GLOBAL]);
        bench.command(IRE, true);
        (bench, table)
    }

    /// The message of row 67 (handle 5), by another handle.
    fn message(handle: u64) -> Message {
        Message { address: golden::MESSAGE & !(0x7FFF << 5) | handle << 5, data: 0 }
    }

    fn arrived(destination: u32, vector: u8) -> Arrived {
        Arrived {
            destination,
            logical: false,
            hint: false,
            delivery: 0,
            vector,
            level: false,
            remapped: true,
        }
    }

    #[test]
    fn golden_entries_become_what_they_say() {
        let (extended, table) = bench(Config::full(), true);
        extended.put(table + 0x50, &golden::REMAP_X2APIC);
        extended.put(table + 0x60, &golden::REMAP_BUSES);
        extended.put(table + 0x70, &golden::REMAP_FUNCTIONS);
        let (plain, table) = bench(Config::full(), false);
        plain.put(table + 0x50, &golden::REMAP_XAPIC);

        assert_eq!(extended.unit.interrupt(NIC, message(5)), Ok(arrived(0x1234_5678, 0x41)));
        for (sid, reaches) in [(0x1FF, false), (0x200, true), (0x5FF, true), (0x600, false)] {
            let got = extended.unit.interrupt(StreamId(sid), message(6));
            assert_eq!(got, if reaches { Ok(arrived(7, 0x55)) } else { Err(Refusal::Fault(0x26)) });
        }
        for (sid, reaches) in [(0x1FF, false), (0x200, true), (0x207, true), (0x208, false)] {
            assert_eq!(extended.unit.interrupt(StreamId(sid), message(7)).is_ok(), reaches, "{sid:#x}");
        }
        let lowest = Arrived { logical: true, hint: true, delivery: 1, level: true, ..arrived(0x0F, 0x30) };
        assert_eq!(plain.unit.interrupt(StreamId(0xF0F8), message(5)), Ok(lowest));
        extended.assert_lawful();
        plain.assert_lawful();
    }

    #[test]
    fn golden_messages_and_pins_name_their_entries() {
        let (bench, table) = bench(Config::full(), true);
        let none = Err(Refusal::Fault(0x22));
        bench.put(table + 8 * 16, &golden::REMAP_X2APIC);
        let send = |address, data| bench.unit.interrupt(NIC, Message { address, data });

        assert_eq!(send(golden::MESSAGE, 3), none, "without SHV the data is nothing");
        assert_eq!(send(golden::MESSAGE_SUBHANDLE, 3), Ok(arrived(0x1234_5678, 0x41)));
        for (address, data) in [
            (golden::MESSAGE_HIGH, 0),
            (golden::MESSAGE_LAST, 0),
            (golden::MESSAGE_SUBHANDLE, 0xFB),
            (golden::MESSAGE_SUBHANDLE, 0xFFFF),
        ] {
            assert_eq!(send(address, data), Err(Refusal::Fault(0x21)), "{address:#x} {data:#x}");
        }
        assert_eq!(send(golden::MESSAGE, 1 << 16), Err(Refusal::Fault(0x20)));
        for (entry, reason) in [(golden::PIN_LEVEL, 0x21), (golden::PIN_MASKED & !(1 << 16), 0x21)] {
            assert_eq!(bench.unit.pin(NIC, entry), Err(Refusal::Fault(reason)));
        }
        let pin = golden::PIN_LEVEL & 0xFFFF_FF00 & !(1 << 15) | 1 << 48 | 8 << 49;
        assert_eq!(bench.unit.pin(NIC, pin | 0x41), Ok(arrived(0x1234_5678, 0x41)));
        bench.assert_lawful();
        assert!(bench.unit.pin(NIC, pin | 0x42).is_ok());
        bench.assert_broken("not as its entry");
    }

    #[test]
    fn an_entry_with_a_reserved_field_is_refused() {
        let [w0, w1] = golden::REMAP_X2APIC;
        for (extended, entry) in [
            (true, [w0 | 1 << 12, w1]),
            (true, [w0 | 1 << 24, w1]),
            (true, [w0 | 3 << 5, w1]),
            (true, [w0 | 6 << 5, w1]),
            (true, [w0 | 1 << 15, w1]),
            (true, [w0, w1 | 1 << 20]),
            (true, [w0, w1 | 1 << 63]),
            (true, [w0, w1 | 3 << 18]),
            (true, golden::REMAP_POSTED),
            (false, golden::REMAP_X2APIC),
            (false, [1 | 1 << 39, w1]),
            (false, [1 | 1 << 48, w1]),
        ] {
            let (bench, table) = bench(Config::full(), extended);
            bench.put(table + 0x50, &entry);

            assert_eq!(bench.unit.interrupt(NIC, message(5)), Err(Refusal::Fault(0x24)), "{entry:x?}");
            assert_eq!(bench.fault(0), [5 << 48, 1 << 63 | 0x24 << 32 | 0x108]);
        }
    }

    #[test]
    fn a_refusal_is_recorded_as_the_golden_word_unless_the_entry_says_otherwise() {
        let (bench, table) = bench(Config::full(), true);
        let [w0, w1] = golden::REMAP_X2APIC;
        bench.put(table + 0x50, &[w0, w1]);
        bench.put(table + 0x60, &[w0 | 1 << 1, w1]);
        bench.put(table + 0x70, &[1 << 1, 0]);

        for index in [6, 7] {
            assert!(bench.unit.interrupt(StreamId(0xF0F8), message(index)).is_err());
            assert_eq!(bench.fault(0), [0, 0], "FPD");
        }
        assert_eq!(bench.unit.interrupt(StreamId(0xF0F8), message(5)), Err(Refusal::Fault(0x26)));

        // As the golden word, but for the index.
        assert_eq!(bench.fault(0), [5 << 48, golden::FAULT_INTERRUPT[1]]);
    }

    #[test]
    fn an_entry_is_remembered_until_it_is_invalidated() {
        let one = |index: u64, mask: u64| [index << 32 | mask << 27 | 1 << 4 | 4, 0, 0, 0];
        for (words, forgotten) in [
            (golden::INTERRUPT_GLOBAL, true),
            (one(5, 0), true),
            (one(4, 0), false),
            (one(4, 1), true),
            (one(6, 1), false),
            (one(0, 3), true),
            (golden::INTERRUPT_INDEX, false),
        ] {
            let (bench, table) = bench(Config::full(), true);
            bench.put(table + 0x50, &golden::REMAP_X2APIC);
            assert!(bench.unit.interrupt(NIC, message(5)).is_ok());
            bench.put(table + 0x50, &[0, 0]);
            assert!(bench.unit.interrupt(NIC, message(5)).is_ok(), "stale");

            bench.submit(&[words]);

            assert_eq!(bench.unit.interrupt(NIC, message(5)).is_err(), forgotten, "{words:x?}");
            bench.assert_lawful();
        }
    }

    #[test]
    fn absence_is_remembered_in_caching_mode_alone() {
        for (config, remembers) in [(Config::full(), false), (Config::full().with_caching_mode(), true)] {
            let (bench, table) = bench(config, true);
            assert_eq!(bench.unit.interrupt(NIC, message(5)), Err(Refusal::Fault(0x22)));

            bench.put(table + 0x50, &golden::REMAP_X2APIC);

            assert_eq!(bench.unit.interrupt(NIC, message(5)).is_err(), remembers);
        }
    }

    #[test]
    fn the_compatibility_format_passes_before_remapping_and_where_it_is_let() {
        let plain = Message { address: 0xFEE0_3000, data: 0x41 };
        let passed = Arrived { remapped: false, ..arrived(3, 0x41) };
        let off = Bench::new(Config::full());
        assert_eq!(off.unit.interrupt(NIC, plain), Ok(passed));
        assert!(off.unit.interrupt(NIC, message(5)).is_err());

        for (extended, compatible, expected) in [
            (false, false, Err(Refusal::Fault(0x25))),
            (true, false, Err(Refusal::Fault(0x25))),
            (false, true, Ok(passed)),
        ] {
            let (bench, _) = bench(Config::full(), extended);
            if compatible {
                bench.command(CFI, true);
            }
            assert_eq!(bench.unit.interrupt(NIC, plain), expected);
            assert_eq!(bench.unit.pin(NIC, 3 << 56 | 0x41), expected);
            bench.assert_lawful();
        }
        let (bench, _) = bench(Config::full(), true);
        bench.command(CFI, true);
        bench.assert_broken("IRTA.EIME");
    }

    #[test]
    fn a_table_is_used_from_the_moment_that_it_is_set() {
        let (mut bench, _) = bench(Config::full(), true);
        let next = bench.page();
        bench.put(next + 0x50, &golden::REMAP_X2APIC);

        bench.unit.write64(IRTA, next | 1 << 11);
        assert_eq!(bench.unit.interrupt(NIC, message(5)), Err(Refusal::Fault(0x22)), "not set yet");
        bench.unit.write32(GCMD, TE | QIE | IRE | SIRTP);
        while bench.unit.read32(GSTS) & SIRTP == 0 {}

        assert_eq!(bench.unit.interrupt(NIC, message(5)), Err(Refusal::Fault(0x21)), "two entries");
        bench.put(next + 0x10, &golden::REMAP_X2APIC);
        assert_eq!(bench.unit.interrupt(NIC, message(1)), Ok(arrived(0x1234_5678, 0x41)));
        bench.assert_lawful();
    }

    #[test]
    fn a_table_outside_memory_is_a_fault() {
        let (bench, _) = bench(Config::full(), true);
        bench.unit.write64(IRTA, 0x1000);
        bench.unit.write32(GCMD, TE | QIE | IRE | SIRTP);
        while bench.unit.read32(GSTS) & SIRTP == 0 {}

        assert_eq!(bench.unit.interrupt(NIC, message(1)), Err(Refusal::Fault(0x23)));
    }

    #[test]
    fn lowest_priority_without_the_hint_is_noted() {
        let (bench, table) = bench(Config::full(), false);
        let [w0, w1] = golden::REMAP_XAPIC;
        bench.put(table + 0x50, &[w0 & !(1 << 3), w1]);

        assert!(bench.unit.interrupt(StreamId(0xF0F8), message(5)).is_ok());

        bench.assert_broken("without RH");
    }

    #[test]
    #[should_panic(expected = "is memory")]
    fn a_message_elsewhere_is_no_interrupt() {
        let _ = Bench::new(Config::full()).unit.interrupt(NIC, Message { address: 0x1000, data: 0 });
    }
}
