//! What the drivers themselves cost beside few and many devices in their own tables: over a bus that costs nothing.
//!
//! A driver has places for so many devices and no more ([`vtd::tables::DEVICES`], [`smmuv3::tables::DEVICES`]); the last that fits is the one
//! that is measured. What goes by the name of an attachment alone has to cost the same beside any number.

use bench::Row;
use hosted::{Hardware, Machine, smmu};
use iommu::{
    Attachment, Bus, Commands as _, Event, Events as _, Features, GroupTag, Invalidation, Iova, Outcome,
    PAGE_SIZE, PageResponse, PhysAddr, StreamId, Tables as _, Translation,
};
use models::{
    smmuv3::{self as smmuv3_model, SmmuUnit},
    vtd::{self as vtd_model, VtdUnit},
};
use pgtable::VtdFirstStage;
use std::{
    cell::{Cell, RefCell},
    ops::Range,
    rc::Rc,
};

/// Operations that are counted together.
const TIMES: usize = 16;

/// Registers, and what they say again and again.
type Said = (Range<usize>, [u64; 2]);

/// The way to a unit, until it is cut: then registers say what they said last, and nothing else happens.
struct Line<U: 'static> {
    unit: &'static U,
    cut: Rc<Cell<bool>>,
    /// The register that was read last.
    read: Rc<Cell<usize>>,
    /// What registers say then, from each of these offsets on.
    said: Rc<RefCell<Vec<Said>>>,
}

impl<U> Clone for Line<U> {
    fn clone(&self) -> Self {
        Self {
            unit: self.unit,
            cut: Rc::clone(&self.cut),
            read: Rc::clone(&self.read),
            said: Rc::clone(&self.said),
        }
    }
}

impl<U: Bus> Line<U> {
    fn new(unit: &'static U) -> Self {
        Self { unit, cut: Rc::default(), read: Rc::default(), said: Rc::default() }
    }

    /// Has `registers` say `words` from now on, again and again.
    fn keep(&self, registers: Range<usize>, words: [u64; 2]) {
        self.said.borrow_mut().push((registers, words));
    }

    fn said(&self, offset: usize) -> u64 {
        let said = self.said.borrow();
        let words = said.iter().find(|(registers, _)| registers.contains(&offset));
        words.map_or(0, |(registers, words)| words[(offset - registers.start) / 8 % 2])
    }
}

impl<U: Bus> Bus for Line<U> {
    fn read32(&self, offset: usize) -> u32 {
        if !self.cut.get() {
            return self.unit.read32(offset);
        }
        (self.said(offset & !7) >> (offset % 8 * 8)) as u32
    }
    fn write32(&self, offset: usize, value: u32) {
        if !self.cut.get() {
            self.unit.write32(offset, value);
        }
    }
    fn read64(&self, offset: usize) -> u64 {
        if self.cut.get() {
            return self.said(offset);
        }
        self.read.set(offset);
        self.unit.read64(offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        if !self.cut.get() {
            self.unit.write64(offset, value);
        }
    }
    fn publish(&self, range: Range<PhysAddr>) {
        if !self.cut.get() {
            self.unit.publish(range);
        }
    }
    fn observe(&self, range: Range<PhysAddr>) {
        if !self.cut.get() {
            self.unit.observe(range);
        }
    }
    fn now_us(&self) -> u64 {
        if self.cut.get() { 0 } else { self.unit.now_us() }
    }
}

/// What a driver does for one device.
trait Driver {
    fn invalidate(&mut self);
    fn answer(&mut self);
    fn fault(&mut self);
    fn detach_and_attach(&mut self);
}

const PLAIN: Features = Features { device_tlb: false, page_requests: false, pasid: false };
const NOWHERE: Iova = Iova(0x7000_0000);

fn stream(number: usize) -> StreamId {
    StreamId(0x20 + number as u32)
}

fn page(attachment: Attachment) -> Invalidation {
    Invalidation::Pages { attachment, iova: Iova(0x4000_0000), pages: 1 }
}

fn response(stream: StreamId) -> PageResponse {
    PageResponse { stream, tag: GroupTag { pasid: None, index: 7 }, outcome: Outcome::Success }
}

struct Vtd {
    machine: Machine<Line<VtdUnit>>,
    attachment: Attachment,
    translation: Translation,
}

impl Vtd {
    /// `devices` are attached, and the last of them has a fault.
    // In a box, because a driver is large, and to move it would be counted.
    fn new(devices: usize) -> Box<Self> {
        /// `FSTS`; where `CAP` says that the fault records are, and how many.
        const FSTS: usize = 0x34;
        const CAP: usize = 0x08;
        /// Head and tail of the queue.
        const IQH: usize = 0x80;
        const IQT: usize = 0x88;
        let (unit, memory) = Hardware::Prompt.unit(vtd_model::Config::full());
        let line = Line::new(unit);
        let mut needs = hosted::needs(&memory);
        needs.frames = (0..60).map(|_| memory.take(vtd::FRAME_WORDS, vtd::FRAME_WORDS)).collect();
        let machine = Hardware::Prompt.enable(unit, memory, line.clone(), needs);
        let mut machine = machine.unwrap_or_else(|error| panic!("{error}"));
        let tree = machine.tree(VtdFirstStage::<4>);
        let mut attachment = None;
        for number in 0..devices {
            machine.assign(stream(number), PLAIN);
            attachment = Some(machine.attach(stream(number), None, &tree));
        }
        let Some(attachment) = attachment else { panic!("there is a device") };
        // Until the driver has just seen the queue empty, and the ring does not end soon.
        while line.read.replace(0) != IQH || unit.read64(IQT) > 32 * 64 {
            machine.invalidate(&[page(attachment)]);
        }
        assert!(machine.read(attachment.stream, None, NOWHERE).is_err());
        let cap = unit.read64(CAP);
        let (first, count) = ((cap >> 24 & 0x3FF) as usize * 16, (cap >> 40 & 0xFF) as usize + 1);
        // In the upper half of its word.
        line.keep(FSTS - 4..FSTS + 4, [u64::from(unit.read32(FSTS)) << 32, 0]);
        line.keep(first..first + count * 16, [0, 8].map(|at| unit.read64(first + at)));
        line.cut.set(true);
        let translation = Translation::Stage1(hosted::root(tree.root().0, tree.levels()));
        Box::new(Self { machine, attachment, translation })
    }
}

impl Driver for Vtd {
    #[inline(never)]
    fn invalidate(&mut self) {
        for _ in 0..TIMES {
            assert!(self.machine.vtd.commands.submit(&[page(self.attachment)]).is_ok());
        }
    }
    #[inline(never)]
    fn answer(&mut self) {
        for _ in 0..TIMES {
            assert_eq!(self.machine.vtd.commands.respond(response(self.attachment.stream)), Ok(()));
        }
    }
    #[inline(never)]
    fn fault(&mut self) {
        for _ in 0..TIMES {
            let event = self.machine.vtd.events.next_fault();
            assert!(matches!(event, Some(Event::Fault(fault)) if fault.stream == self.attachment.stream));
        }
    }
    #[inline(never)]
    fn detach_and_attach(&mut self) {
        for _ in 0..TIMES {
            let tables = &mut self.machine.vtd.tables;
            let Ok((leaving, _)) = tables.detach(self.attachment) else { panic!("it is attached") };
            tables.finish(leaving);
            let attached = tables.attach(self.attachment.stream, None, self.translation);
            let Ok((attachment, _)) = attached else { panic!("it is assigned") };
            self.attachment = attachment;
        }
    }
}

struct Smmu {
    machine: smmu::Machine<Line<SmmuUnit>>,
    attachment: Attachment,
    translation: Translation,
}

impl Smmu {
    /// `devices` are attached, and the last of them has faults.
    fn new(devices: usize) -> Box<Self> {
        /// `EVENTQ_PROD`.
        const EVENTQ_PROD: usize = 0x1_00A8;
        /// `CMDQ_PROD`, in a queue of 256 commands.
        const CMDQ_PROD: usize = 0x98;
        let (unit, memory) = Hardware::Prompt.smmu_unit(smmuv3_model::Config::full());
        let line = Line::new(unit);
        let needs = smmu::needs(smmu::StreamTable::Linear, &memory);
        let events = needs.event_queue.range(0, needs.event_queue.words());
        let machine = Hardware::Prompt.enable_smmu(unit, memory, line.clone(), needs);
        let mut machine = machine.unwrap_or_else(|error| panic!("{error}"));
        let tree = machine.tree(smmu::Stage::One);
        let mut attachment = None;
        for number in 0..devices {
            machine.assign(stream(number), PLAIN);
            attachment = Some(machine.attach(stream(number), smmu::Stage::One, &tree));
        }
        let Some(attachment) = attachment else { panic!("there is a device") };
        // Until the ring does not end soon.
        while unit.read32(CMDQ_PROD) % 256 > 128 {
            machine.invalidate(&[page(attachment)]);
        }
        for number in 0..TIMES as u64 {
            let at = Iova(NOWHERE.0 + number * PAGE_SIZE);
            assert!(machine.read(attachment.stream, None, at).is_err());
        }
        unit.observe(events);
        // In the lower half.
        line.keep(EVENTQ_PROD..EVENTQ_PROD + 8, [unit.read32(EVENTQ_PROD).into(), 0]);
        line.cut.set(true);
        let translation = smmu::translation(smmu::Stage::One, &tree);
        Box::new(Self { machine, attachment, translation })
    }
}

impl Driver for Smmu {
    #[inline(never)]
    fn invalidate(&mut self) {
        for _ in 0..TIMES {
            assert!(self.machine.smmu.commands.submit(&[page(self.attachment)]).is_ok());
        }
    }
    #[inline(never)]
    fn answer(&mut self) {
        for _ in 0..TIMES {
            assert_eq!(self.machine.smmu.commands.respond(response(self.attachment.stream)), Ok(()));
        }
    }
    #[inline(never)]
    fn fault(&mut self) {
        for _ in 0..TIMES {
            let event = self.machine.smmu.events.next_fault();
            assert!(matches!(event, Some(Event::Fault(fault)) if fault.stream == self.attachment.stream));
        }
    }
    #[inline(never)]
    fn detach_and_attach(&mut self) {
        for _ in 0..TIMES {
            let tables = &mut self.machine.smmu.tables;
            let Ok((leaving, _)) = tables.detach(self.attachment) else { panic!("it is attached") };
            tables.finish(leaving);
            let attached = tables.attach(self.attachment.stream, None, self.translation);
            let Ok((attachment, _)) = attached else { panic!("it is assigned") };
            self.attachment = attachment;
        }
    }
}

mod counted {
    use super::{Driver, Smmu, Vtd};
    use gungraun::{library_benchmark, library_benchmark_group};
    use std::hint::black_box;

    macro_rules! operation {
        ($operation:ident) => {
            #[library_benchmark]
            #[bench::vtd_beside_1(Vtd::new(1))]
            #[bench::vtd_beside_most(Vtd::new(vtd::tables::DEVICES))]
            #[bench::smmuv3_beside_1(Smmu::new(1))]
            #[bench::smmuv3_beside_most(Smmu::new(smmuv3::tables::DEVICES))]
            fn $operation<D: Driver>(mut driver: Box<D>) -> Box<D> {
                black_box(&mut driver).$operation();
                driver
            }
        };
    }
    operation!(invalidate);
    operation!(answer);
    operation!(fault);
    operation!(detach_and_attach);

    library_benchmark_group!(name = all, benchmarks = [invalidate, answer, fault, detach_and_attach]);
    gungraun::main!(library_benchmark_groups = all);

    pub fn run() {
        main();
    }
}

/// What is counted.
const OPERATIONS: [(&str, &str); 4] = [
    ("invalidate", "queue the invalidation of one page"),
    ("answer", "queue an answer"),
    ("fault", "translate a fault"),
    ("detach_and_attach", "detach and attach"),
];

fn main() {
    bench::tools_or_exit();
    counted::run();
    if bench::is_counted() {
        return;
    }
    let mut rows = Vec::new();
    for (driver, most) in [("vtd", vtd::tables::DEVICES), ("smmuv3", smmuv3::tables::DEVICES)] {
        for (function, what) in OPERATIONS {
            let count =
                |case: &str| bench::instructions("streams", function, &format!("{driver}_{case}"), TIMES);
            let few = count("beside_1");
            for (cost, devices, goal) in
                [(few, 1, None), (count("beside_most"), most, few.map(|few| (few * 1.02).ceil()))]
            {
                rows.push(Row {
                    what: format!("{what}, {driver} with {devices} attached"),
                    costs: vec![cost],
                    goal,
                });
            }
        }
    }
    bench::print("instructions", &["ours"], &rows);
}
