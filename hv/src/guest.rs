//! A guest: its memory, its virtual CPU, the devices that it owns; and the core that is its home.

use crate::{
    control::{self, Given, Owned, Space},
    hypervisor::{self, DEVICES_PER_GUEST, Ending, GUESTS, Home, Hypervisor, Inbox, Order, SERVICE_CORE},
    memory::{self, GuestRam, Share},
};
use arch::{
    cpu,
    guest::{Exit, Vcpu},
    interrupts::{self, Source},
    unit::GuestTables,
};
use broker::{Missed, Owner, QueueId, Tally, Whose};
use channel::{host::Host, ring};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use heapless::Vec;
use iommu::{DmaBuf, Gpa, PAGE_SIZE, Perms};
use pgtable::{Attributes, Limits, Memory, Tree};

/// Frames of a guest's RAM, which starts at its address 0: 2 MiB.
pub const RAM_FRAMES: usize = 512;
/// Where a guest's program is put, and entered.
const ENTRY: Gpa = Gpa(0x10_0000);
/// Where a guest finds its fault channel, once it is open.
pub const CHANNEL: Gpa = Gpa(0x8000_0000);
/// Where a guest finds the registers of its first device; each further one is [`WINDOW`] bytes on.
pub const REGISTERS: Gpa = Gpa(0x9000_0000);
/// Bytes between the registers of two devices; larger ones are not given away.
pub const WINDOW: u64 = 1 << 20;
/// Frames for the tables of a guest's devices.
const TABLE_FRAMES: usize = 64;
/// What is mapped in one hold of the pool: one leaf, where the memory is aligned to it.
const STEP: u64 = 512 * PAGE_SIZE;
/// Leaves of a guest's tables: pages, and 2 MiB, which every core takes.
const GUEST_LEAVES: Limits = Limits { leaf_sizes: 1 << 21, ..Limits::NONE };
/// Attachments of a guest.
pub const ATTACHMENTS: usize = 4;

/// A guest that exists. Its home core owns it.
pub struct Guest {
    /// What all cores share.
    pub hv: &'static Hypervisor,
    /// Which guest this is, from 0.
    pub index: usize,
    /// Its memory.
    pub ram: GuestRam,
    /// What its virtual CPU reaches.
    pub nested: Tree<GuestTables>,
    /// Its virtual CPU.
    pub vcpu: Vcpu,
    /// The queue of its page requests.
    pub queue: QueueId,
    /// Its devices; the guest counts them from 1.
    pub devices: Vec<Given, DEVICES_PER_GUEST>,
    /// The empty spaces of its devices, for accesses without PASID.
    pub blanks: Vec<Space, DEVICES_PER_GUEST>,
    /// What it may take for the tables of its devices.
    pub share: Share,
    /// Hardware did not confirm in time that it has forgotten something of the guest's.
    pub stuck: bool,
    /// What it attached, by its own name for it minus one.
    pub attachments: [Option<Owned>; ATTACHMENTS],
    /// Its fault channel, once it is open.
    pub channel: Option<Host>,
    /// Groups that it was never shown, as its channel says.
    pub unshown: u64,
    /// What the inbox had counted of them for the guests before this one.
    pub unseen_before: u64,
}

/// Why a guest could not be made.
#[derive(Clone, Copy, Debug, defmt::Format)]
pub enum NotMade {
    /// There is no memory for it.
    Memory,
    /// Its tables could not be made.
    Tables(pgtable::Error),
    /// Its virtual CPU could not be made.
    Processor(arch::machine::Error),
    /// Its program does not fit.
    Image {
        /// How long that is.
        bytes: usize,
    },
    /// A device could not be given to it.
    Device(crate::control::Error),
    /// Its queue could not be opened.
    Queue(broker::Error),
}

/// What a home core does for ever: it makes the guests that it is asked for, and runs each to its end.
pub fn home() -> ! {
    interrupts::init_core();
    let index = cpu::core() - SERVICE_CORE - 1;
    let hv = hypervisor::get();
    let inbox = hv.and_then(|hv| hv.homes.get(index)?.inbox.with(Option::take));
    let (Some(hv), Some(mut inbox), Ok(())) = (hv, inbox, arch::guest::init_core()) else {
        defmt::error!("core {=usize} cannot be a home", cpu::core());
        cpu::exit(false)
    };
    cpu::unmask_forever();
    let home = &hv.homes[index];
    loop {
        control::silence_strays(hv, index);
        let order = {
            let _masked = cpu::mask();
            let order = home.order.with(Option::take);
            if order.is_none() && !control::has_strays(hv, index) {
                cpu::wait_for_interrupt();
            }
            order
        };
        if let Some(order) = order {
            let ending = live(hv, index, &order, &mut inbox);
            home.ending.with(|slot| *slot = Some(ending));
            interrupts::kick(SERVICE_CORE, Source::Kick);
        }
    }
}

/// Makes a guest, runs it, and takes everything back.
// A guest with its virtual CPU takes some KiB; the frames that hold one do not merge into one large frame.
#[inline(never)]
fn live(hv: &'static Hypervisor, index: usize, order: &Order, inbox: &mut Inbox) -> Ending {
    let mut guest = match Guest::new(hv, index) {
        Ok(guest) => guest,
        Err(error) => {
            defmt::error!("guest {=usize} could not be made: {}", index, error);
            return Ending::NotStarted;
        }
    };
    hv.homes[index].queue.with(|queue| *queue = Some(guest.queue));
    guest.unseen_before = inbox.groups.unseen();
    let ending = match guest.own(order) {
        Ok(()) => guest.run(inbox),
        Err(error) => {
            defmt::error!("guest {=usize} could not be given its devices: {}", index, error);
            Ending::NotStarted
        }
    };
    guest.depart();
    // What was announced for the guest that left was answered when it left.
    while inbox.groups.next(cpu::now_us()).is_some() {}
    while inbox.notices.receive().is_some() {}
    let _ = inbox.notices.take_lost();
    ending
}

impl Guest {
    /// Makes a guest with its program in its memory, and no devices.
    #[inline(never)]
    pub fn new(hv: &'static Hypervisor, index: usize) -> Result<Self, NotMade> {
        // First what everything else refers to: the queue exists before any attachment.
        let queue = hv.ledger.open_at(index, Owner::Guest(index as u16)).map_err(NotMade::Queue)?;
        let made = Self::with_queue(hv, index, queue);
        if made.is_err() {
            close(hv, index, queue);
        }
        made
    }

    #[inline(never)]
    fn with_queue(hv: &'static Hypervisor, index: usize, queue: QueueId) -> Result<Self, NotMade> {
        let mut ram = GuestRam::new(hv.pool, RAM_FRAMES).ok_or(NotMade::Memory)?;
        let nested = match hv.pool.with(|pool| Tree::new(pool, GUEST_LEAVES)) {
            Ok(nested) => nested,
            Err(error) => {
                hv.pool.with(|pool| pool.give_back(ram.into_buffer()));
                return Err(NotMade::Tables(error));
            }
        };
        match Self::load(hv, index, &mut ram, &nested) {
            Ok(vcpu) => Ok(Self {
                hv,
                index,
                ram,
                nested,
                vcpu,
                queue,
                devices: Vec::new(),
                blanks: Vec::new(),
                share: Share::new(TABLE_FRAMES),
                stuck: false,
                attachments: [const { None }; ATTACHMENTS],
                channel: None,
                unshown: 0,
                unseen_before: 0,
            }),
            Err(error) => {
                hv.pool.with(|pool| {
                    nested.take_down(pool);
                    pool.give_back(ram.into_buffer());
                });
                Err(error)
            }
        }
    }

    /// Maps the guest's memory for its virtual CPU, and puts its program there.
    fn load(
        hv: &Hypervisor,
        index: usize,
        ram: &mut GuestRam,
        nested: &Tree<GuestTables>,
    ) -> Result<Vcpu, NotMade> {
        let perms = Perms { execute: true, ..Perms::READ_WRITE };
        for at in (0..ram.bytes()).step_by(STEP as usize) {
            let part = ram.grant(Gpa(at), STEP.min(ram.bytes() - at)).ok_or(NotMade::Memory)?;
            hv.pool.with(|pool| nested.map(pool, at, &part, perms)).map_err(NotMade::Tables)?;
        }
        if !ram.write(ENTRY, hv.image) {
            return Err(NotMade::Image { bytes: hv.image.len() });
        }
        let mut vcpu = Vcpu::new(memory::root(nested), index as u16).map_err(NotMade::Processor)?;
        vcpu.start_at(ENTRY, 0);
        hv.homes[index].ram.store(ram.phys().0, Relaxed);
        Ok(vcpu)
    }

    /// Gives the guest its devices: unit first, then configuration space, then their registers.
    pub fn own(&mut self, order: &Order) -> Result<(), NotMade> {
        for &device in &order.devices {
            self.take_device(device).map_err(NotMade::Device)?;
            let registers = self.hv.devices[device].registers.clone();
            let at = REGISTERS.0 + (self.devices.len() as u64 - 1) * WINDOW;
            let grant = memory::registers(registers);
            // Whatever the guest says of them: lines of them in a cache would reach the device when nobody asked for it.
            let attributes = Attributes { memory: Memory::Device, ..Perms::READ_WRITE.into() };
            let map = |pool: &mut memory::Pool| self.nested.map(pool, at, &grant, attributes);
            self.hv.pool.with(map).map_err(NotMade::Tables)?;
        }
        Ok(())
    }

    /// Returns how other cores see the guest.
    pub fn home(&self) -> &'static Home {
        &self.hv.homes[self.index]
    }

    /// Runs the guest until it ends.
    fn run(&mut self, inbox: &mut Inbox) -> Ending {
        loop {
            let exit = {
                // From the last look at the rings until the guest is entered no interrupt is handled: one that comes
                // then brings the guest out at once, and the rings are looked at again.
                let _masked = cpu::mask();
                if self.home().stop.load(SeqCst) {
                    return Ending::Stopped;
                }
                if let Err(broken) = self.forward(inbox) {
                    defmt::warn!("guest {=usize} broke its channel: {}", self.index, broken);
                    return Ending::Crashed;
                }
                self.vcpu.run()
            };
            self.restrain_devices();
            match exit {
                Exit::Interrupted => {}
                Exit::Halt => self.sleep(inbox, u64::MAX),
                Exit::Hypercall { operation, arguments } => {
                    if let Some(ending) = self.call(operation, arguments, inbox) {
                        return ending;
                    }
                }
                Exit::Memory { address, write, execute } => {
                    defmt::info!(
                        "guest {=usize} may not reach {} (write {=bool}, execute {=bool})",
                        self.index,
                        address,
                        write,
                        execute
                    );
                    self.home().refused_accesses.fetch_add(1, Relaxed);
                    self.vcpu.refuse_access();
                }
                Exit::Crash(crash) => {
                    defmt::error!("guest {=usize} crashed: {}", self.index, defmt::Display2Format(&crash));
                    return Ending::Crashed;
                }
            }
        }
    }

    /// Lets the core sleep until the guest has an interrupt, or until `end_us`, or until the guest shall go.
    pub fn sleep(&mut self, inbox: &mut Inbox, end_us: u64) {
        loop {
            // A guest that sleeps for long holds up no restraint of its devices.
            self.restrain_devices();
            let _masked = cpu::mask();
            if self.must_restrain() {
                continue;
            }
            let now_us = cpu::now_us();
            let stop = self.home().stop.load(SeqCst);
            // The guest may have made room since the rings were last looked at. A broken channel is `run`'s to deal with.
            let broken = self.forward(inbox).is_err();
            if stop || broken || self.vcpu.is_interrupt_pending() || now_us >= end_us {
                break;
            }
            if end_us != u64::MAX {
                interrupts::arm_timer(end_us - now_us);
            }
            cpu::wait_for_interrupt();
        }
        interrupts::disarm_timer();
    }

    /// Opens the fault channel, in frames that the guest sees and does not own.
    pub fn open_channel(&mut self) -> Option<()> {
        let pool = self.hv.pool;
        let mut frames: Vec<DmaBuf, { ring::FRAMES }> = Vec::new();
        while let Some(frame) = (!frames.is_full()).then(|| memory::cut(pool, 1)).flatten() {
            // There is room: it was looked for.
            let _ = frames.push(frame);
        }
        let frames = match frames.into_array::<{ ring::FRAMES }>() {
            Ok(frames) => frames,
            Err(some) => {
                pool.with(|pool| some.into_iter().for_each(|frame| pool.give_back(frame)));
                return None;
            }
        };
        let mapped = pool.with(|pool| {
            frames.iter().enumerate().all(|(number, frame)| {
                let perms = if number == ring::CONSUMER { Perms::READ_WRITE } else { Perms::READ };
                let at = CHANNEL.0 + number as u64 * PAGE_SIZE;
                self.nested.map(pool, at, &memory::shared(frame), perms).is_ok()
            })
        });
        // Even if a frame could not be mapped the guest may reach the others: they are the channel's until it departs.
        self.channel = Some(Host::new(frames));
        mapped.then_some(())
    }

    /// Takes everything back from a guest that runs no more: first its devices, then its memory.
    #[inline(never)]
    fn depart(mut self) {
        let mut released = self.release_devices();
        released &= close(self.hv, self.index, self.queue);
        // The virtual CPU goes here, so nobody walks its tables any more.
        let Self { hv, index, ram, nested, channel, .. } = self;
        hv.homes[index].ram.store(0, Relaxed);
        if !released {
            // A device may still reach the memory: it is never used again.
            defmt::error!("guest {=usize}: its memory is kept, because a device did not let go of it", index);
            return;
        }
        hv.pool.with(|pool| {
            nested.take_down(pool);
            for frame in channel.into_iter().flat_map(Host::into_frames) {
                pool.give_back(frame);
            }
            pool.give_back(ram.into_buffer());
        });
    }
}

/// Closes the queue of a guest that is gone; `false` if a group has no answer.
fn close(hv: &Hypervisor, index: usize, queue: QueueId) -> bool {
    hv.ledger.shut(queue);
    // Its devices were drained one by one; this is for a handler that had found the queue open before.
    let drained = hv.drain();
    hv.evict(queue, Whose::All);
    let home = &hv.homes[index];
    home.missed.with(|missed| *missed = hv.ledger.missed(queue));
    home.queue.with(|shown| *shown = None);
    match drained.map_err(drop).and_then(|()| hv.ledger.close(queue).map_err(drop)) {
        Ok(()) => true,
        Err(()) => {
            let groups = hv.ledger.outstanding(queue);
            home.left.store(groups as u64, Relaxed);
            defmt::error!(
                "the queue of guest {=usize} cannot be closed: {=usize} groups left",
                index,
                groups
            );
            false
        }
    }
}

/// Asks the home core of guest `index` for a guest with `devices`, which will be told `task`.
pub fn start(hv: &Hypervisor, index: usize, task: [u64; 3], devices: &[usize]) {
    let home = &hv.homes[index % GUESTS];
    home.stop.store(false, SeqCst);
    home.ending.with(|ending| *ending = None);
    for (place, value) in home.task.iter().zip(task) {
        place.store(value, SeqCst);
    }
    for counter in home.reports.iter().chain(&home.restraints).chain([
        &home.refused_accesses,
        &home.refused_calls,
        &home.unmapped,
        &home.invalidated,
        &home.refused_invalidations,
        &home.longest_to_record_us,
        &home.left,
    ]) {
        counter.store(0, Relaxed);
    }
    home.tally.with(|tally| *tally = Tally::ZERO);
    home.missed.with(|missed| *missed = Missed::ZERO);
    home.answer_times.with(|times| times.fill(0));
    let devices = devices.iter().copied().take(DEVICES_PER_GUEST).collect();
    home.order.with(|order| *order = Some(Order { devices }));
    interrupts::kick(hypervisor::home_of(index % GUESTS), Source::Kick);
}

/// Asks a guest to go.
pub fn stop(hv: &Hypervisor, index: usize) {
    hv.homes[index % GUESTS].stop.store(true, SeqCst);
    interrupts::kick(hypervisor::home_of(index % GUESTS), Source::Kick);
}
