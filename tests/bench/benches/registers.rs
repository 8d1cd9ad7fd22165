//! How often a driver reaches for its unit's registers, where QEMU's unit cannot show it: VT-d with several places for
//! faults, by the model. Accesses are counted by the bus between driver and model; nothing else has to be installed.

use bench::Row;
use iommu::{Bus, Event, Events as _, Iova, PhysAddr, StreamId};
use models::{
    memory::Memory,
    vtd::{Config, VtdUnit},
};
use std::{cell::Cell, ops::Range, rc::Rc};
use vtd::{FRAME_WORDS, Found, Vtd};

/// A bus that counts the accesses which go over it.
#[derive(Clone)]
struct Counting {
    unit: &'static VtdUnit,
    accesses: Rc<Cell<u64>>,
}

impl Counting {
    fn count(&self) {
        self.accesses.set(self.accesses.get() + 1);
    }
}

impl Bus for Counting {
    fn read32(&self, offset: usize) -> u32 {
        self.count();
        self.unit.read32(offset)
    }
    fn write32(&self, offset: usize, value: u32) {
        self.count();
        self.unit.write32(offset, value);
    }
    fn read64(&self, offset: usize) -> u64 {
        self.count();
        self.unit.read64(offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        self.count();
        self.unit.write64(offset, value);
    }
    fn publish(&self, range: Range<PhysAddr>) {
        self.unit.publish(range);
    }
    fn observe(&self, range: Range<PhysAddr>) {
        self.unit.observe(range);
    }
    fn now_us(&self) -> u64 {
        self.unit.now_us()
    }
}

/// A unit in service, behind a bus that counts.
struct Machine {
    unit: &'static VtdUnit,
    vtd: Vtd<Counting>,
    accesses: Rc<Cell<u64>>,
}

impl Machine {
    fn new() -> Option<Self> {
        let memory = Memory::new(256 * FRAME_WORDS);
        let unit: &'static VtdUnit = Box::leak(Box::new(VtdUnit::new(memory.clone(), Config::full())));
        let accesses = Rc::new(Cell::new(0));
        let bus = Counting { unit, accesses: Rc::clone(&accesses) };
        let frame = || memory.take(FRAME_WORDS, FRAME_WORDS);
        let needs = vtd::Memory {
            root: frame(),
            invalidation_queue: frame(),
            status: frame(),
            page_requests: frame(),
            frames: (0..20).map(|_| frame()).collect(),
            interrupts: frame(),
            x2apic: true,
            answers: 64,
        };
        let vtd = Found::probe(bus).and_then(|found| found.enable(needs)).ok()?;
        Some(Self { unit, vtd, accesses })
    }

    /// Returns the accesses of one pass over so many faults, each of another device; `None` if one is not told.
    fn pass(&mut self, faults: u32) -> Option<f64> {
        for device in 0..faults {
            let stream = StreamId(0x100 + 8 * device);
            self.unit.plug(stream);
            // That it is refused is what is wanted.
            let _ = self.unit.dma_read(stream, None, Iova(0x7000), 8);
        }
        let before = self.accesses.get();
        let mut told = 0;
        while let Some(event) = self.vtd.events.next_fault() {
            told += u32::from(matches!(event, Event::Fault(_)));
        }
        (told == faults).then(|| (self.accesses.get() - before) as f64)
    }
}

fn main() {
    let Some(mut machine) = Machine::new() else {
        eprintln!("the modelled unit does not come into service");
        std::process::exit(1);
    };
    let (none, one, several) = (machine.pass(0), machine.pass(1), machine.pass(4));
    let further = one.zip(several).map(|(one, several)| (several - one) / 3.0);
    let row = |what: &str, cost, goal| Row { what: what.to_string(), costs: vec![cost], goal };
    let rows = [
        row("VT-d by the model: a pass for no fault", none, None),
        row("VT-d by the model: a pass for one fault", one, Some(5.0)),
        row("VT-d by the model: each further fault of a pass", further, None),
    ];
    bench::print(qemu_runner::MMIO, &["ours"], &rows);
    if rows.iter().any(|row| row.costs.contains(&None)) {
        eprintln!("a fault was not told");
        std::process::exit(1);
    }
}
