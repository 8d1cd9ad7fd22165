//! What things cost on a machine, in instructions and accesses to the unit's registers: one function a group of figures.
//!
//! The image with the feature `measure` shows these in place of the demonstration. It runs on one core, which serves the
//! unit and is the guest's home too, in QEMU with `-icount shift=0,sleep=off`: there [`cpu::ticks`] counts instructions. The
//! guest never runs but to be left at once; what it would ask for is asked here, by the functions that serve its calls.
//!
//! A stretch that is measured lies between two writes to the unit's first register, which is read-only: QEMU's trace
//! shows them, and whoever reads it counts the accesses in between.

use crate::{
    guest::Guest,
    hypervisor::{self, Hypervisor, Inbox, Order, SERVICE_CORE},
    memory,
};
use arch::{
    bus::Mmio,
    cpu,
    guest::Exit,
    interrupts::{self, Source},
};
use broker::{Limits, Policy, Whose};
use channel::{
    call::{ARRAY, Call, Code},
    host::Host,
    ring,
};
use heapless::Vec;
use iommu::{Bus, DmaBuf, Gpa, Invalidation, Iova, PAGE_SIZE, Pasid, Perms, PhysAddr, StreamId};

/// A figure that could not be measured, and why.
type Unexpected = &'static str;

/// The register that marks: version (VT-d) or first identification register (SMMUv3), which ignore writes.
const MARKED: usize = 0;
/// What a mark begins with: `MK` in 31:16, the stretch in 15:1, and whether it ends in bit 0.
const MARK: u32 = 0x4D4B_0000;

/// Attached streams beside which everything is measured again. The guest's own two are among them.
const BESIDE: [u32; 3] = [2, 256, 4096];
/// Requests of a burst, and groups outstanding when a space is detached.
const BURST: usize = 64;
/// Answers of one call, as many as it takes.
const ANSWERED: usize = ARRAY as usize;
/// Pages of a batch.
const BATCH: u64 = 512;
/// Faults of one pass, where the unit keeps so many.
const FAULTS: usize = 8;
/// Microseconds between the moments at which what depends on time is measured: a multiple of the wheel's ticks.
const MOMENT_US: u64 = 1024;
/// Looks at a device that is about to ask.
const POLLS: u32 = 1_000_000;

/// Counts instructions, and marks what is counted.
struct Meter {
    unit: Mmio,
    stretches: u32,
    /// What a stretch counts in which nothing is done.
    nothing: u64,
    /// Attached streams.
    beside: u32,
    /// Nothing is told: what is done for the first time may cost more, once.
    quiet: bool,
}

impl Meter {
    fn new(unit: Mmio) -> Self {
        Self { unit, stretches: 0, nothing: 0, beside: 0, quiet: false }
    }

    /// Finds what a stretch costs in which nothing is done, and that a tick is an instruction.
    fn calibrate(&mut self) -> Result<(), Unexpected> {
        self.nothing = self.count(|| ()).1;
        if self.count(|| ()).1 != 0 {
            return Err("the counter does not count instructions: it differs from one try to the next");
        }
        if self.count(cpu::hundred_instructions).1 != 100 {
            return Err("the counter does not count instructions: a hundred are not counted as a hundred");
        }
        defmt::println!("measure calibrated nothing={=u64}", self.nothing);
        Ok(())
    }

    /// Returns what `f` returns, and how many instructions that took.
    #[inline(never)]
    fn count<R>(&mut self, f: impl FnOnce() -> R) -> (R, u64) {
        self.stretches += 1;
        let stretch = MARK | self.stretches << 1;
        self.unit.write32(MARKED, stretch);
        let start = cpu::ticks();
        let result = f();
        let ticks = cpu::ticks() - start;
        self.unit.write32(MARKED, stretch | 1);
        (result, ticks.saturating_sub(self.nothing))
    }

    /// Measures `f` as the figure `name`, and returns what it returns.
    fn figure<R>(&mut self, name: &str, f: impl FnOnce() -> R) -> R {
        let (result, instructions) = self.count(f);
        self.tell(name, instructions);
        result
    }

    /// Tells what the last stretch took.
    fn tell(&mut self, name: &str, instructions: u64) {
        if !self.quiet {
            defmt::println!(
                "measure figure name={=str} streams={=u32} stretch={=u32} instructions={=u64}",
                name,
                self.beside,
                self.stretches,
                instructions
            );
        }
    }
}

/// Measures everything; returns whether all of it could be. `bring_up` is what bring-up took.
pub fn run(hv: &'static Hypervisor, unit: core::ops::Range<PhysAddr>, bring_up: u64) -> bool {
    match measure(hv, unit, bring_up) {
        Ok(()) => {
            defmt::println!("measure end");
            true
        }
        Err(what) => {
            defmt::error!("not everything could be measured: {=str}", what);
            false
        }
    }
}

fn measure(
    hv: &'static Hypervisor,
    unit: core::ops::Range<PhysAddr>,
    bring_up: u64,
) -> Result<(), Unexpected> {
    let mut meter = Meter::new(memory::device(unit).ok_or("the unit is out of reach")?);
    // Everything before the first mark is bring-up's.
    meter.calibrate()?;
    defmt::println!("measure bring_up instructions={=u64}", bring_up.saturating_sub(meter.nothing));
    let mut bench = Bench::set_up(hv, meter)?;
    for beside in BESIDE {
        bench.attach_until(beside)?;
        for quiet in [true, false] {
            bench.meter.quiet = quiet;
            bench.pages()?;
            bench.faults()?;
            bench.requests()?;
            bench.detachment()?;
            bench.spurious();
        }
    }
    bench.meter.beside = BESIDE[0];
    bench.switch()?;
    bench.stack()
}

/// What is needed to measure: a guest with two devices, whose core this is.
struct Bench {
    hv: &'static Hypervisor,
    guest: Guest,
    inbox: Inbox,
    meter: Meter,
    requester: Requester,
    writer: Mmio,
    /// The guest's name for what the requester is attached to.
    attachment: u64,
    /// Its name for what the writer is attached to.
    plain: u64,
    /// How many streams are attached in the ledger.
    attached: u32,
    /// The next page that is asked for: none is asked for twice, which would look like a claim that was false.
    next_page: u64,
}

/// Where a page is mapped; the page after it stays mapped, so that tables stay as well.
const PAGES_AT: u64 = 0x4000_0000;
/// Where a batch is mapped, by tables of its own.
const BATCH_AT: u64 = 0x8000_0000;
/// Where pages are asked for.
const REQUESTS_AT: u64 = 0x1_0000_0000;
/// Where nothing is mapped.
const NOTHING_AT: u64 = 0x7000_0000;
/// Where the guest puts its answers.
const ANSWERS: Gpa = Gpa(0x1000);
/// Where the guest's program is.
const PROGRAM: Gpa = Gpa(0x10_0000);
/// How long a guest may take to answer, in microseconds: nothing expires here.
const DEADLINE_US: u64 = 10_000_000;

impl Bench {
    fn set_up(hv: &'static Hypervisor, meter: Meter) -> Result<Self, Unexpected> {
        arch::guest::init_core().map_err(|_| "this core runs no guests")?;
        let find = |identity| {
            let is_it =
                |device: &hypervisor::Device| (device.function.vendor, device.function.device) == identity;
            hv.devices.iter().position(is_it)
        };
        let requester = find(Requester::IDENTITY).ok_or("there is no device that sends page requests")?;
        let writer = find((0x1B36, 0x0005)).ok_or("there is no iommu-testdev")?;
        let open = |device: usize| {
            hv.devices[device].function.enable_memory(&hv.config);
            memory::device(hv.devices[device].registers.clone()).ok_or("a device is out of reach")
        };
        let inbox = hv.homes[0].inbox.with(Option::take).ok_or("there are no rings")?;
        let mut guest = Guest::new(hv, 0).map_err(|_| "there is no guest")?;
        let devices = [requester, writer].into_iter().collect();
        guest.own(&Order { devices }).map_err(|_| "the guest has no devices")?;
        let pasid = if hv.capabilities.pasid_bits > 0 { Pasid::new(1) } else { None };
        let attachment =
            guest.attach(1, pasid, 0x51, DEADLINE_US).map_err(|_| "nothing could be attached")?;
        let plain = guest.attach(2, None, 0x52, DEADLINE_US).map_err(|_| "nothing could be attached")?;
        let requester = Requester { registers: open(requester)?, pasid };
        let writer = open(writer)?;
        Ok(Self {
            hv,
            guest,
            inbox,
            meter,
            requester,
            writer,
            attachment,
            plain,
            attached: 2,
            next_page: REQUESTS_AT,
        })
    }

    /// Attaches streams that are nowhere but in the ledger, until there are `count`.
    fn attach_until(&mut self, count: u32) -> Result<(), Unexpected> {
        let ledger = self.hv.ledger;
        while self.attached < count {
            let stream = StreamId(0x1000 + self.attached);
            let device = ledger.add_device(stream, &Limits::with_requests(1));
            let device = device.map_err(|_| "the ledger has no room for a device")?;
            let policy = Policy {
                stream,
                requests: self.requester.pasid.into(),
                device,
                queue: self.guest.queue,
                name: self.attached,
                opaque: 0,
            };
            ledger.attach(&policy).map_err(|_| "the ledger has no room for an attachment")?;
            self.attached += 1;
        }
        self.meter.beside = count;
        Ok(())
    }

    /// Mapping, unmapping, invalidating: a page, and a batch. First for a device without a TLB of its own.
    fn pages(&mut self) -> Result<(), Unexpected> {
        self.pages_of(
            self.plain,
            [
                "map one page",
                "invalidate one page",
                "unmap one page, with its invalidation",
                "map 512 pages in one batch",
                "invalidate 512 pages in one batch",
                "unmap 512 pages in one batch, with their invalidation",
            ],
        )?;
        self.pages_of(
            self.attachment,
            [
                "map one page, device with a TLB",
                "invalidate one page, device with a TLB",
                "unmap one page, with its invalidation, device with a TLB",
                "map 512 pages in one batch, device with a TLB",
                "invalidate 512 pages in one batch, device with a TLB",
                "unmap 512 pages in one batch, with their invalidation, device with a TLB",
            ],
        )
    }

    fn pages_of(&mut self, attachment: u64, names: [&str; 6]) -> Result<(), Unexpected> {
        let Self { guest, meter, hv, .. } = self;
        let owned = guest.owned(attachment).ok_or("the attachment is gone")?;
        let grant = |pages| guest.ram.grant(Gpa(0), pages * PAGE_SIZE).ok_or("the guest has no memory");
        let (one, all) = (grant(1)?, grant(BATCH)?);
        let map = |at, grant| guest.map(owned, Iova(at), grant, Perms::READ_WRITE).map_err(|_| "not mapped");
        let unmap = |at, pages| guest.unmap(owned, Iova(at), pages * PAGE_SIZE).map_err(|_| "not unmapped");
        let pages =
            |at, pages| Invalidation::Pages { attachment: owned.space.attachment, iova: Iova(at), pages };
        let forget = |at, count| hv.invalidate(&[pages(at, count)]).map_err(|_| "not forgotten");

        let neighbour = PAGES_AT + PAGE_SIZE;
        map(neighbour, &one)?;
        meter.figure(names[0], || map(PAGES_AT, &one))?;
        meter.figure(names[1], || forget(PAGES_AT, 1))?;
        meter.figure(names[2], || unmap(PAGES_AT, 1))?;
        meter.figure(names[3], || map(BATCH_AT, &all))?;
        meter.figure(names[4], || forget(BATCH_AT, BATCH))?;
        meter.figure(names[5], || unmap(BATCH_AT, BATCH))?;
        unmap(neighbour, 1)
    }

    /// Unrecoverable faults, from interrupt entry to the guest's record.
    fn faults(&mut self) -> Result<(), Unexpected> {
        let _masked = cpu::mask();
        // What came before is over.
        self.take();
        self.renew_channel()?;
        self.fault();
        self.figure("unrecoverable fault", Self::take);
        if self.renew_channel()? != [0, 1] {
            return Err("a fault did not reach the guest");
        }
        for _ in 0..FAULTS {
            self.fault();
        }
        self.wait_for_moment();
        let ((), instructions) = self.meter.count(|| take(&mut self.guest, &mut self.inbox));
        // A unit with a single place for faults has lost the others.
        if self.renew_channel()? == [0, FAULTS as u64] {
            self.meter.tell("8 unrecoverable faults of one pass", instructions);
        }
        Ok(())
    }

    /// Page requests, from interrupt entry to the guest's records; and answers, from the call to the doorbell.
    fn requests(&mut self) -> Result<(), Unexpected> {
        let _masked = cpu::mask();
        self.ask(1)?;
        self.figure("page request", Self::take);
        if self.renew_channel()? != [1, 0] {
            return Err("a page request did not reach the guest");
        }
        self.evict_all();
        self.ask(BURST)?;
        self.figure("64 page requests of one burst", Self::take);
        if self.renew_channel()? != [BURST as u64, 0] {
            return Err("a page request of a burst did not reach the guest");
        }
        self.evict_all();

        self.ask(1)?;
        cpu::take_interrupts();
        self.show_groups(1)?;
        self.figure("answer", |bench| bench.answer(1));
        self.ask(ANSWERED)?;
        cpu::take_interrupts();
        self.show_groups(ANSWERED)?;
        self.figure("16 answers of one call", |bench| bench.answer(ANSWERED as u64));
        if self.hv.ledger.outstanding(self.guest.queue) != 0 {
            return Err("an answer was refused");
        }
        Ok(())
    }

    /// Detaching while groups are outstanding.
    fn detachment(&mut self) -> Result<(), Unexpected> {
        {
            let _masked = cpu::mask();
            self.ask(BURST)?;
            cpu::take_interrupts();
        }
        if self.hv.ledger.outstanding(self.guest.queue) != BURST {
            return Err("not every group is outstanding");
        }
        let attachment = self.attachment;
        let detached =
            self.figure("detach with 64 groups outstanding", |bench| bench.guest.detach(attachment));
        if !matches!(detached, Some(Ok(()))) || self.hv.ledger.outstanding(self.guest.queue) != 0 {
            return Err("it could not be detached");
        }
        let _masked = cpu::mask();
        self.take();
        self.renew_channel()?;
        self.attachment = self
            .guest
            .attach(1, self.requester.pasid, 0x51, DEADLINE_US)
            .map_err(|_| "it could not be attached again")?;
        Ok(())
    }

    /// Interrupts for nothing.
    fn spurious(&mut self) {
        let _masked = cpu::mask();
        for (source, name) in [
            (Source::IommuFault, "spurious interrupt for faults"),
            (Source::PageRequest, "spurious interrupt for page requests"),
        ] {
            cpu::take_interrupts();
            interrupts::kick(SERVICE_CORE, source);
            self.figure(name, |_| cpu::take_interrupts());
        }
    }

    /// Entering a guest that leaves at once.
    fn switch(&mut self) -> Result<(), Unexpected> {
        let _masked = cpu::mask();
        if !self.guest.ram.write(PROGRAM, arch::guest::WAITS) {
            return Err("the guest has no memory for a program");
        }
        self.guest.vcpu.start_at(PROGRAM, 0);
        for quiet in [true, false] {
            self.meter.quiet = quiet;
            let exit = self.figure("enter a guest, and leave it", |bench| bench.guest.vcpu.run());
            if exit != Exit::Halt {
                return Err("the guest did something else");
            }
        }
        Ok(())
    }

    /// How much of the stack the interrupt path uses: a burst of requests, and a fault.
    fn stack(&mut self) -> Result<(), Unexpected> {
        let _masked = cpu::mask();
        self.fault();
        self.ask(BURST)?;
        let bytes = cpu::stack_used_by(cpu::take_interrupts);
        defmt::println!("measure stack bytes={=usize}", bytes);
        self.take();
        self.renew_channel()?;
        self.evict_all();
        Ok(())
    }

    /// Waits for a moment that is as far as any other from a tick of the broker's wheel: what a pass costs depends a little
    /// on whether one has gone by.
    fn wait_for_moment(&self) {
        let begin = cpu::now_us() / MOMENT_US;
        while cpu::now_us() / MOMENT_US == begin {}
    }

    /// Measures `f` as the figure `name`.
    fn figure<R>(&mut self, name: &str, f: impl FnOnce(&mut Self) -> R) -> R {
        self.wait_for_moment();
        let unit = self.meter.unit;
        let mut meter = core::mem::replace(&mut self.meter, Meter::new(unit));
        let result = meter.figure(name, || f(self));
        self.meter = meter;
        result
    }

    /// Handles the interrupts that are pending, and forwards what they brought to the guest.
    fn take(&mut self) {
        take(&mut self.guest, &mut self.inbox);
    }

    /// Opens the channel anew, and empty; returns how many requests and events were in it.
    fn renew_channel(&mut self) -> Result<[u64; 2], Unexpected> {
        let frames = match self.guest.channel.take() {
            Some(channel) => channel.into_frames(),
            None => {
                let mut frames: Vec<DmaBuf, { ring::FRAMES }> = Vec::new();
                while !frames.is_full() {
                    // There is room: it was looked for.
                    let _ = frames.push(memory::cut(self.hv.pool, 1).ok_or("there is no frame")?);
                }
                frames.into_array().map_err(|_| "there are not enough frames")?
            }
        };
        let told = [ring::REQUESTS_WORD, ring::EVENTS_WORD].map(|word| frames[ring::HEADER].load(word));
        self.guest.channel = Some(Host::new(frames));
        Ok(told)
    }

    /// Lets the requester ask for `groups` pages, each in a group of its own; interrupts are masked.
    fn ask(&mut self, groups: usize) -> Result<(), Unexpected> {
        for first in (0..groups).step_by(Requester::LANES) {
            let lanes = Requester::LANES.min(groups - first);
            self.requester.ask(lanes, self.next_page)?;
            self.next_page += lanes as u64 * PAGE_SIZE;
        }
        Ok(())
    }

    /// Takes `groups` groups as the guest would, and puts an answer for each into its memory.
    fn show_groups(&mut self, groups: usize) -> Result<(), Unexpected> {
        for at in 0..groups as u64 {
            let group = self.inbox.groups.next(cpu::now_us()).ok_or("a group did not come")?;
            self.guest.ram.store(Gpa(ANSWERS.0 + at * 16), group.cookie.0);
            self.guest.ram.store(Gpa(ANSWERS.0 + at * 16 + 8), Code::Success as u64);
        }
        Ok(())
    }

    /// Answers so many groups by one call.
    fn answer(&mut self, groups: u64) {
        let _ = self.guest.call(Call::Respond as u64, [ANSWERS.0, groups, 0, 0], &mut self.inbox);
    }

    /// Answers what is outstanding.
    fn evict_all(&mut self) {
        self.hv.evict(self.guest.queue, Whose::All);
    }

    /// Lets the writer write where nothing is mapped.
    fn fault(&self) {
        const DOES_IT: usize = 0x00;
        const IOVA: usize = 0x04;
        const LENGTH: usize = 0x0C;
        const ARM: usize = 0x14;
        const ATTRIBUTES: usize = 0x18;
        for (register, value) in
            [(IOVA, NOTHING_AT as u32), (IOVA + 4, 0), (LENGTH, 4), (ATTRIBUTES, 0), (ARM, 1)]
        {
            self.writer.write32(register, value);
        }
        // Reading is what starts it.
        let _ = self.writer.read32(DOES_IT);
    }
}

/// Handles the interrupts that are pending, and forwards what they brought to `guest`.
fn take(guest: &mut Guest, inbox: &mut Inbox) {
    cpu::take_interrupts();
    // A guest that broke its channel would be told nothing, and that is looked at.
    let _ = guest.forward(inbox);
}

/// The test device `sva-dev`, as far as it asks for pages and waits.
struct Requester {
    registers: Mmio,
    pasid: Option<Pasid>,
}

impl Requester {
    const IDENTITY: (u16, u16) = (0x1B36, 0x5A5A);
    /// Groups that it can have outstanding, as far as it knows.
    const LANES: usize = 8;
    const GROUPS: usize = 0x01C;
    const RESET: usize = 0x028;
    const LANE: usize = 0x100;
    const LANE_STRIDE: usize = 0x40;
    const ADDRESS: usize = 0x00;
    const LENGTH: usize = 0x10;
    const PASID: usize = 0x14;
    const CONTROL: usize = 0x18;
    /// Go, and page requests alone.
    const ASK: u32 = 1 << 0 | 1 << 6;
    const NO_PASID: u32 = 1 << 8;

    /// Asks for a page by each of `lanes` lanes, from `page` on, and returns when all are on their way. Then the device
    /// forgets them, so that it can ask for more: it takes no notice of the answers.
    fn ask(&self, lanes: usize, page: u64) -> Result<(), Unexpected> {
        self.registers.write32(Self::RESET, 1);
        for lane in 0..lanes {
            let base = Self::LANE + lane * Self::LANE_STRIDE;
            self.registers.write64(base + Self::ADDRESS, page + lane as u64 * PAGE_SIZE);
            self.registers.write32(base + Self::LENGTH, PAGE_SIZE as u32);
            self.registers.write32(base + Self::PASID, self.pasid.map_or(0, Pasid::value));
            let without = if self.pasid.is_none() { Self::NO_PASID } else { 0 };
            self.registers.write32(base + Self::CONTROL, Self::ASK | without);
        }
        for _ in 0..POLLS {
            if self.registers.read32(Self::GROUPS) as usize == lanes {
                return Ok(());
            }
            cpu::relax();
        }
        Err("the device does not ask")
    }
}
