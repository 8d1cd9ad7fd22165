//! What all cores share.

use crate::{memory::Pool, tables::Stage, wanted};
use arch::{
    cpu::{self, Locked},
    interrupts::{self, Source},
    machine::{Boot, Ecam},
    unit::{self, Commands, Remapping, Tables},
};
use broker::{
    BUCKETS, EventReceiver, EventSender, FaultCount, FaultLimits, Lost, Missed, POISONED, QueueId, Restraint,
    Tally, Whose,
};
use channel::call::{ARRAY, REPORTS};
use core::{
    ops::Range,
    sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
};
use heapless::{Vec, spsc};
use iommu::{
    Capabilities, Commands as _, Completion, Error, Failure, FaultRecord, Invalidation, Leaving,
    PageResponse, PhysAddr, StreamId, Ticket,
};
use pcie::Function;
use spin::Once;

/// The core that serves the unit.
pub const SERVICE_CORE: usize = 0;
/// Guests, one to a core.
pub const GUESTS: usize = 2;
/// Queues of page requests: each guest's, by its number, and the pager's.
pub const QUEUES: usize = GUESTS + 1;
/// The queue of the hypervisor's own [pager](crate::pager).
pub const PAGER: usize = GUESTS;
/// Devices of a guest, at most.
pub const DEVICES_PER_GUEST: usize = 2;
/// Groups that a guest may have outstanding.
pub const SLOTS: usize = if cfg!(feature = "measure") { 256 } else { 32 };
/// Places for devices in the ledger, and for attachments: more than there can be, so that a place is found quickly.
///
/// What is measured beside thousands of attached streams has those in the ledger alone.
const LEDGER_DEVICES: usize = if cfg!(feature = "measure") { 8192 } else { 16 };
const LEDGER_ATTACHMENTS: usize = if cfg!(feature = "measure") { 8192 } else { 32 };
/// Page requests that the devices in the ledger may have outstanding, all together. Of those that are nowhere else, there
/// are too many for the unit's queue.
const QUEUED: u32 = if cfg!(feature = "measure") { u32::MAX } else { unit::OUTSTANDING as u32 };
/// Groups that the service core knows of.
const GROUPS: usize = QUEUES * (SLOTS + POISONED);

/// What all cores share of the page requests.
pub type Ledger = broker::Ledger<QUEUES, SLOTS, LEDGER_DEVICES, LEDGER_ATTACHMENTS>;
/// What the service core owns of them.
pub type Broker = broker::Broker<'static, QUEUES, SLOTS, LEDGER_DEVICES, LEDGER_ATTACHMENTS, GROUPS>;
/// Where the owner of a queue receives the groups that are whole.
pub type Groups = broker::Inbox<'static, QUEUES, SLOTS, LEDGER_DEVICES, LEDGER_ATTACHMENTS>;
/// The right to answer a group.
pub type Answer = broker::Answer<'static, SLOTS>;
/// Events on their way to a guest's core; more are lost, and counted.
const NOTICES: usize = 32;
/// Devices that are looked at.
const DEVICES: usize = 16;
const _: () = assert!(DEVICES <= u64::BITS as usize, "there is a bit for each device");

/// Answers that may wait for the unit, at most: each group's, and some of those that waited nowhere.
const UNSENT: usize = SLOTS * QUEUES + 64;

/// Answers that are sent in one hold of the lock, at most: as many as a guest may give by one call.
pub const TOGETHER: usize = ARRAY as usize;

/// How long the driver may take to say what became of an invalidation, in microseconds: longer than it ever does.
///
/// Each core waits for the one that it submitted before it submits another, so at most one of each other core is ahead of it
/// in the unit's queue. The unit or its driver has an end for what is at the head within [`unit::HEAD_LIMIT_US`], and what is
/// behind comes to the head then: after as many of those as there are cores everything has an end. This is one more.
pub const BACKSTOP_US: u64 = (1 + GUESTS as u64 + 1) * unit::HEAD_LIMIT_US;
/// How long the service core may take for a pass that is waited for, in microseconds.
const DRAIN_LIMIT_US: u64 = 100_000;

/// Returns the core that is the home of the owner of queue `index`: a guest's own; of the pager the one that controls.
///
/// What is measured is measured on one core, which is all there is.
pub const fn home_of(index: usize) -> usize {
    if cfg!(feature = "measure") || index == PAGER { SERVICE_CORE } else { SERVICE_CORE + 1 + index }
}

/// Faults of a device that no guest owns, which is blocked already. There is nobody to warn.
pub const STRAY_FAULTS: FaultLimits = FaultLimits { warn: 0, ..FaultLimits::USUAL };

/// Returns the home, by its guest, that deals with device `number` while no guest owns it.
pub const fn caretaker_of(number: usize) -> usize {
    number % GUESTS
}

/// A device that can be given away, or driven by the demonstration.
#[derive(Clone, Debug)]
pub struct Device {
    /// Its function.
    pub function: Function,
    /// Its registers, from the first base address register.
    pub registers: Range<PhysAddr>,
}

/// A fault for a guest, on its way from the service core to the guest's.
#[derive(Clone, Copy, Debug)]
pub struct Notice {
    /// What happened.
    pub fault: FaultRecord,
    /// The guest's own name for the device.
    pub device: u32,
    /// The opaque value of the attachment.
    pub opaque: u64,
}

/// What a guest's home core receives. The service core is the only producer of both.
pub struct Inbox {
    /// Groups that are whole.
    pub groups: Groups,
    /// Events.
    pub notices: EventReceiver<'static, Notice>,
}

/// Where the service core puts the events for a guest's home core.
pub type Notices = EventSender<'static, Notice>;

/// An answer that the unit did not take.
pub enum Unsent {
    /// To a group that waits in a slot.
    Group(Answer),
    /// To a group that waits nowhere.
    Refusal(PageResponse),
}

/// What became of a guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq, defmt::Format)]
pub enum Ending {
    /// It finished its task, and says whether all went as expected.
    Finished {
        /// Its own verdict.
        passed: bool,
    },
    /// It was stopped.
    Stopped,
    /// It did what a guest must not do.
    Crashed,
    /// Its resources could not be had.
    NotStarted,
}

/// What a guest is made for.
#[derive(Clone, Debug)]
pub struct Order {
    /// The devices that it is to own, by their place in [`Hypervisor::devices`].
    pub devices: Vec<usize, DEVICES_PER_GUEST>,
}

/// Kinds of [`broker::Restraint`].
const RESTRAINTS: usize = broker::Restraint::Blocked as usize + 1;

/// One home core, as the others see it.
pub struct Home {
    /// What to make a guest for; taken by the home core.
    pub order: Locked<Option<Order>>,
    /// What became of the last guest; `None` while it runs.
    pub ending: Locked<Option<Ending>>,
    /// The guest shall go.
    pub stop: AtomicBool,
    /// What the guest is told when it asks for its task: the task, two values.
    pub task: [AtomicU64; 3],
    /// What the guest reported.
    pub reports: [AtomicU64; REPORTS],
    /// Accesses to memory that is not the guest's; each was refused.
    pub refused_accesses: AtomicU64,
    /// Calls that were refused, by any status but done.
    pub refused_calls: AtomicU64,
    /// Mappings taken away, each invalidated.
    pub unmapped: AtomicU64,
    /// Entries of the guest's own invalidations that were done, and those that were refused.
    pub invalidated: AtomicU64,
    pub refused_invalidations: AtomicU64,
    /// Where the guest's memory is; 0 while there is none.
    pub ram: AtomicU64,
    /// The home core's ends of its rings; taken once.
    pub inbox: Locked<Option<Inbox>>,
    /// The queue of the guest that runs.
    pub queue: Locked<Option<QueueId>>,
    /// What happened to the page requests of the last guest's devices; complete once it ended.
    pub tally: Locked<Tally>,
    /// Which of the last guest's answers were refused; complete once it ended.
    pub missed: Locked<Missed>,
    /// How often a device of the guest came to be held to each restraint, by its number.
    pub restraints: [AtomicU64; RESTRAINTS],
    /// Groups that have no answer although the guest is gone.
    pub left: AtomicU64,
    /// The longest time seen from report to record, in microseconds.
    pub longest_to_record_us: AtomicU64,
    /// The times from report to answer of the last guest's devices, by powers of two of a microsecond; complete once it ended.
    pub answer_times: Locked<[u64; BUCKETS]>,
}

impl Home {
    const fn new() -> Self {
        Self {
            order: Locked::new(None),
            ending: Locked::new(None),
            stop: AtomicBool::new(false),
            task: [const { AtomicU64::new(0) }; 3],
            reports: [const { AtomicU64::new(0) }; REPORTS],
            refused_accesses: AtomicU64::new(0),
            refused_calls: AtomicU64::new(0),
            unmapped: AtomicU64::new(0),
            invalidated: AtomicU64::new(0),
            refused_invalidations: AtomicU64::new(0),
            ram: AtomicU64::new(0),
            inbox: Locked::new(None),
            queue: Locked::new(None),
            tally: Locked::new(Tally::ZERO),
            missed: Locked::new(Missed::ZERO),
            restraints: [const { AtomicU64::new(0) }; RESTRAINTS],
            left: AtomicU64::new(0),
            longest_to_record_us: AtomicU64::new(0),
            answer_times: Locked::new([0; BUCKETS]),
        }
    }

    /// Returns how many groups the guest that runs has outstanding.
    pub fn outstanding(&self, ledger: &Ledger) -> usize {
        self.queue.with(|queue| queue.map_or(0, |queue| ledger.outstanding(queue)))
    }
}

/// What all cores share.
pub struct Hypervisor {
    /// What the boot loader said.
    pub boot: Boot,
    /// Frames of RAM.
    pub pool: &'static Locked<Pool>,
    /// Configuration space.
    pub config: Ecam,
    /// What the unit can do.
    pub capabilities: Capabilities,
    /// By which of its stages devices are translated.
    pub stage: Stage,
    /// The command side of the unit.
    pub commands: Locked<Commands>,
    /// The table side of the unit. Its changes are published one by one; waiting for their invalidation comes after.
    pub tables: Locked<Tables>,
    /// Which device may interrupt which core, where the unit says so. Changed as the tables are.
    pub remapping: Option<Locked<Remapping>>,
    /// The page to which devices write their messages, where the unit translates those. It is mapped at its own address for
    /// every device that has messages, wherever that is translated by tables of the hypervisor's; and for no virtual CPU.
    pub doorbell: Option<Range<PhysAddr>>,
    /// How often a device interrupted each core.
    pub device_interrupts: [AtomicU64; 1 + GUESTS],
    /// Which device's requests go where, and the groups that each guest has outstanding.
    pub ledger: &'static Ledger,
    /// The home cores.
    pub homes: &'static [Home; GUESTS],
    /// The pager's end of its ring, while there is no pager.
    pub pager: Locked<Option<Groups>>,
    /// What passes of the service routine were asked for, and are done.
    pub drains: Drains,
    /// Faults of devices that no guest owns: how many, and the last.
    pub unowned: Locked<(u64, Option<FaultRecord>)>,
    /// Faults of the second stage behind a first stage that a guest owns, which are not the guest's: how many, and the last.
    pub second_stage: Locked<(u64, Option<FaultRecord>)>,
    /// What the service routine is to do besides what it is interrupted for.
    pub due: Due,
    /// What stopped the unit's commands: how often, and the last.
    pub failures: Locked<(u64, Option<Failure>)>,
    /// How often the unit said that it lost reports.
    pub lost: Losses,
    /// The most microseconds that an answer came after its deadline.
    pub latest_expiry_us: AtomicU64,
    /// Answers that the unit did not take yet; the service core tries again.
    pub unsent: Locked<Vec<Unsent, UNSENT>>,
    /// The control core sleeps until something that a guest does.
    pub control_waits: AtomicBool,
    /// When the control core wants to be woken, in microseconds.
    pub control_wakes_us: AtomicU64,
    /// Devices of bus 0 with registers.
    pub devices: Vec<Device, DEVICES>,
    /// Whose each device is: the owner's queue plus one in 31:0, its name for the device in 63:32; 0 if it is nobody's.
    given: [AtomicU64; DEVICES],
    /// Devices whose first stage a guest owns.
    bound: DeviceSet,
    /// Devices that have more faults than they may, and that their homes have not dealt with yet.
    pub flooding: DeviceSet,
    /// The faults of devices that no guest owns.
    strays: [FaultCount; DEVICES],
    /// Who has each device in hand.
    hands: [Locked<Hand>; DEVICES],
    /// Devices that did not answer when they were to forget something.
    silent: DeviceSet,
    /// Devices that are blocked, all of them. One that is silent as well is not asked again.
    blocked: DeviceSet,
    /// In what condition the last owner left each device, as a [`Condition`].
    conditions: [AtomicU8; DEVICES],
    /// The guests' program.
    pub image: &'static [u8],
}

/// Who has a device in hand.
#[derive(Debug)]
pub enum Hand {
    /// Nobody: it is blocked, and what it tries is reported.
    Nobody,
    /// A guest that it was given to, or a core that is about to silence it.
    Somebody,
    /// Nobody: it is blocked, and silenced, until the block is finished.
    Silenced(Leaving),
}

/// Some of the devices, by their places: bit n set, device n.
pub struct DeviceSet(AtomicU64);

impl DeviceSet {
    const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Puts a device in, or takes it out.
    fn set(&self, number: usize, is_in: bool) {
        if is_in {
            self.0.fetch_or(1 << number, Relaxed);
        } else {
            self.0.fetch_and(!(1 << number), Relaxed);
        }
    }

    /// Puts a device in, after what was noted of it elsewhere.
    pub fn put(&self, number: usize) {
        // ORDER: whoever takes the device out sees what is known of it.
        self.0.fetch_or(1 << number, Release);
    }

    /// Takes a device out; returns whether it was in.
    pub fn take(&self, number: usize) -> bool {
        self.0.fetch_and(!(1 << number), Acquire) & 1 << number != 0
    }

    pub fn has(&self, number: usize) -> bool {
        self.0.load(Relaxed) & 1 << number != 0
    }

    pub fn is_empty(&self) -> bool {
        self.0.load(Relaxed) == 0
    }
}

/// In what condition a device is that no guest owns.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Condition {
    /// It never had an owner, or was reset since, or may be given away as it is.
    Clean,
    /// It cannot be reset.
    Unreset,
    /// It was not blocked, or did not come out of its reset: nobody owns it any more.
    Broken,
}

/// The parts of a unit that are told something, rather than telling it.
pub struct Told {
    /// Its commands.
    pub commands: Commands,
    /// Its tables.
    pub tables: Tables,
    /// Its interrupt remapping, if it has that.
    pub remapping: Option<Remapping>,
}

static HYPERVISOR: Once<Hypervisor> = Once::new();
// What can be made at compile time lies beside it, and never passes over a stack.
/// Frames of RAM; none until bring-up has found some.
pub static POOL: Locked<Pool> = Locked::new(Pool::empty());
/// The page requests of all guests; no queues and no devices until there are guests.
pub static LEDGER: Ledger = Ledger::new(QUEUED);
static HOMES: [Home; GUESTS] = [const { Home::new() }; GUESTS];
static NOTICES_LOST: [Lost; GUESTS] = [const { Lost::new() }; GUESTS];

/// Returns the hypervisor, once it is published: for interrupt handlers, and for cores that start.
pub fn get() -> Option<&'static Hypervisor> {
    HYPERVISOR.get()
}

impl Hypervisor {
    /// Puts together what bring-up found, and makes it known to all cores.
    pub fn publish(
        boot: Boot,
        config: Ecam,
        unit: Range<PhysAddr>,
        capabilities: Capabilities,
        told: Told,
        image: &'static [u8],
    ) -> &'static Self {
        let Told { commands, tables, remapping } = told;
        let mut devices: Vec<Device, DEVICES> = Vec::new();
        for function in Function::on_bus_0(&config) {
            let Some(registers) = function.memory_bar(&config, 0) else { continue };
            // A device says itself where its registers are. What it says must not reach what is the machine's, or another's.
            let overlaps =
                |other: &Range<PhysAddr>| registers.start < other.end && other.start < registers.end;
            let others = devices.iter().any(|device| overlaps(&device.registers));
            if others || overlaps(&unit) || boot.overlaps_machine(&registers) {
                defmt::warn!(
                    "{} claims registers at {}, which are not its own",
                    function.id,
                    registers.start
                );
                continue;
            }
            // Devices past the table are left alone: blocked.
            let _ = devices.push(Device { function, registers });
        }
        let stage = Stage::of(&capabilities, boot.command_line());
        let doorbell = remapping.as_ref().and_then(Remapping::doorbell);
        let strays = [const { FaultCount::new() }; DEVICES];
        strays.iter().for_each(|faults| faults.set(&STRAY_FAULTS));
        HYPERVISOR.call_once(|| Self {
            boot,
            pool: &POOL,
            config,
            capabilities,
            stage,
            commands: Locked::new(commands),
            tables: Locked::new(tables),
            remapping: remapping.map(Locked::new),
            doorbell,
            device_interrupts: [const { AtomicU64::new(0) }; 1 + GUESTS],
            ledger: &LEDGER,
            homes: &HOMES,
            pager: Locked::new(None),
            drains: Drains::new(),
            unowned: Locked::new((0, None)),
            second_stage: Locked::new((0, None)),
            due: Due(AtomicU32::new(0)),
            failures: Locked::new((0, None)),
            lost: Losses { faults: AtomicU64::new(0), requests: AtomicU64::new(0) },
            latest_expiry_us: AtomicU64::new(0),
            unsent: Locked::new(Vec::new()),
            control_waits: AtomicBool::new(false),
            control_wakes_us: AtomicU64::new(u64::MAX),
            devices,
            given: [const { AtomicU64::new(0) }; DEVICES],
            bound: DeviceSet::new(),
            flooding: DeviceSet::new(),
            strays,
            hands: [const { Locked::new(Hand::Nobody) }; DEVICES],
            silent: DeviceSet::new(),
            blocked: DeviceSet::new(),
            conditions: [const { AtomicU8::new(Condition::Clean as u8) }; DEVICES],
            image,
        })
    }

    /// Returns the page that `stream` has to reach to interrupt; `None` where there is none, or it has no messages.
    pub fn doorbell_of(&self, stream: StreamId) -> Option<Range<PhysAddr>> {
        let device = self.devices.iter().find(|device| device.function.id == stream)?;
        self.doorbell.clone().filter(|_| device.function.messages(&self.config).is_ok())
    }

    /// Notes that device `number` belongs to the owner of a queue, a guest or the pager, who has a name for it; or to nobody.
    pub fn give(&self, number: usize, owner: Option<(usize, u32)>) {
        if let Some(given) = self.given.get(number) {
            let word = owner.map_or(0, |(guest, name)| (guest as u64 + 1) | u64::from(name) << 32);
            given.store(word, Relaxed);
        }
    }

    /// Notes in what condition device `number` is when its owner is gone.
    pub fn mark(&self, number: usize, condition: Condition) {
        if let Some(of_it) = self.conditions.get(number) {
            of_it.store(condition as u8, Relaxed);
        }
        if condition == Condition::Clean {
            self.silent.set(number, false);
            self.blocked.set(number, false);
        }
    }

    /// Notes that a guest owns the first stage of a device, or does no longer.
    pub fn note_bound(&self, stream: StreamId, bound: bool) {
        if let Some(number) = self.place_of(stream) {
            self.bound.set(number, bound);
        }
    }

    /// Returns whether a guest owns the first stage of a device.
    pub fn is_bound(&self, stream: StreamId) -> bool {
        self.is_in(&self.bound, stream)
    }

    /// Notes that a device did not answer when it was to forget something.
    pub fn note_silent(&self, stream: StreamId) {
        if let Some(number) = self.place_of(stream) {
            self.silent.set(number, true);
        }
    }

    /// Notes that a device is blocked. If it does not answer, then or later, it is not asked again until it was reset.
    pub fn note_blocked(&self, stream: StreamId) {
        if let Some(number) = self.place_of(stream) {
            self.blocked.set(number, true);
        }
    }

    /// Returns whether a device is blocked that did not answer.
    pub fn is_unasked(&self, stream: StreamId) -> bool {
        self.is_in(&self.silent, stream) && self.is_in(&self.blocked, stream)
    }

    /// Returns whether `set` has a device, which is looked for only if it has any.
    fn is_in(&self, set: &DeviceSet, stream: StreamId) -> bool {
        !set.is_empty() && self.place_of(stream).is_some_and(|number| set.has(number))
    }

    /// Returns the place of a device in `devices`. Looks at all of them.
    fn place_of(&self, stream: StreamId) -> Option<usize> {
        self.devices.iter().position(|device| device.function.id == stream)
    }

    /// Returns whether device `number` may be given to a guest.
    pub fn is_clean(&self, number: usize) -> bool {
        self.conditions.get(number).is_some_and(|of_it| of_it.load(Relaxed) == Condition::Clean as u8)
    }

    /// Returns whether the command line lets devices that cannot be reset go from one guest to the next.
    pub fn may_stay_unreset(&self) -> bool {
        wanted::value(self.boot.command_line(), "unreset") == Some("allow")
    }

    /// Returns the queue of whoever owns a device, and its name for the device. Looks at all devices.
    pub fn owner_of(&self, stream: StreamId) -> Option<(usize, u32)> {
        let word = self.given.get(self.place_of(stream)?)?.load(Relaxed);
        let guest = (word as u32).checked_sub(1)?;
        Some((guest as usize, (word >> 32) as u32))
    }

    /// Counts a fault of a device that no guest owns; returns what it is to be held to if that was one too many. Those of
    /// functions that are not in `devices` are counted in `unowned` alone. Looks at all devices.
    pub fn stray_fault(&self, stream: StreamId, now_us: u64) -> Option<Restraint> {
        self.strays.get(self.place_of(stream)?)?.add(now_us)
    }

    /// Has the home of a device deal with it, as it has more faults than it may; returns which home that is.
    pub fn note_flooding(&self, stream: StreamId) -> Option<usize> {
        let number = self.place_of(stream)?;
        self.flooding.put(number);
        Some(self.owner_of(stream).map_or(caretaker_of(number), |(guest, _)| guest))
    }

    /// Returns whether device `number` is silenced, and nobody's.
    pub fn is_silenced(&self, number: usize) -> bool {
        self.hands.get(number).is_some_and(|hand| hand.with(|hand| matches!(hand, Hand::Silenced(_))))
    }

    /// Takes a device in hand that nobody has; returns what its silence is to be finished with, if it is silenced. `None` if
    /// somebody has it.
    pub fn take_in_hand(&self, number: usize) -> Option<Option<Leaving>> {
        self.hands.get(number)?.with(|hand| match core::mem::replace(hand, Hand::Somebody) {
            Hand::Nobody => Some(None),
            Hand::Silenced(leaving) => Some(Some(leaving)),
            Hand::Somebody => None,
        })
    }

    /// Lets go of a device that was in hand. What it did before is forgiven, unless it was silenced for it.
    pub fn let_go(&self, number: usize, silenced: Option<Leaving>) {
        let (Some(hand), Some(faults)) = (self.hands.get(number), self.strays.get(number)) else { return };
        if silenced.is_none() {
            faults.forgive();
        }
        hand.with(|hand| *hand = silenced.map_or(Hand::Nobody, Hand::Silenced));
    }

    /// Returns whether guest `index` owns a device.
    pub fn owns_a_device(&self, index: usize) -> bool {
        self.given.iter().any(|given| given.load(Relaxed) as u32 as usize == index + 1)
    }

    /// Makes the rings between the service core and the home cores. Called once.
    pub fn connect(&self, broker: &mut Broker) -> Option<[Notices; GUESTS]> {
        let mut groups_of = |index: usize| {
            // A ring of n holds n - 1, and must hold every slot of the queue.
            let slots = self.pool.with(|pool| pool.keep(spsc::Queue::<u16, { SLOTS + 1 }>::new()))?;
            let (slots_in, slots_out) = slots.split();
            broker.connect(index, slots_in).ok()?;
            Some(Groups::new(self.ledger, index, slots_out))
        };
        let pagers = groups_of(PAGER)?;
        self.pager.with(|place| *place = Some(pagers));
        let mut connect = |index: usize| {
            let groups = groups_of(index)?;
            let notices = self.pool.with(|pool| pool.keep(spsc::Queue::<Notice, { NOTICES + 1 }>::new()))?;
            let (notices_in, notices_out) = notices.split();
            let (sender, notices) = broker::events(notices_in, notices_out, &NOTICES_LOST[index]);
            self.homes[index].inbox.with(|inbox| *inbox = Some(Inbox { groups, notices }));
            Some(sender)
        };
        Some([connect(0)?, connect(1)?])
    }

    /// Sends the answer to a group that waited, and frees its slot.
    pub fn answer(&self, answer: Answer) {
        self.answer_all(core::iter::once(answer));
    }

    /// Sends the answers to groups that waited, [`TOGETHER`] at most, in one hold of the lock and by one doorbell. They are
    /// asked for while the lock is held: to settle a group takes about as long as to queue its answer.
    pub fn answer_all(&self, answers: impl Iterator<Item = Answer>) {
        if !self.try_answer(answers) {
            self.due.tell(Due::UNSENT);
        }
    }

    /// Sends the answer to a group that waited nowhere.
    pub fn respond(&self, response: PageResponse) {
        if !self.try_respond(response) {
            self.due.tell(Due::UNSENT);
        }
    }

    /// Ends the groups of a queue that are `whose`, and have no answer.
    pub fn evict(&self, queue: QueueId, whose: Whose) {
        let evicted = || self.ledger.evict(queue, whose, cpu::now_us());
        while let Some(first) = evicted() {
            // They are looked for before the lock is held.
            let mut answers = Vec::<Answer, TOGETHER>::new();
            let rest = core::iter::from_fn(evicted).take(TOGETHER - 1);
            answers.extend(core::iter::once(first).chain(rest));
            self.answer_all(core::iter::from_fn(|| answers.pop()));
        }
    }

    /// Sends answers; returns whether all were sent. The others are kept.
    fn try_answer(&self, answers: impl Iterator<Item = Answer>) -> bool {
        self.commands.with(|commands| {
            let mut all_sent = true;
            for answer in answers {
                if let Err((answer, error)) = answer.send(|response| commands.queue_response(response)) {
                    self.keep(Unsent::Group(answer), error);
                    all_sent = false;
                }
            }
            commands.ring();
            all_sent
        })
    }

    /// The same, of an answer to a group that waited nowhere.
    fn try_respond(&self, response: PageResponse) -> bool {
        let sent = self.commands.with(|commands| commands.respond(response));
        sent.map_err(|(response, error)| self.keep(Unsent::Refusal(response), error)).is_ok()
    }

    /// Keeps an answer until the service core tries again. Entries of the command queue are reserved for answers, so this
    /// means that the unit is stuck, or that a device sends more requests than it was allowed.
    #[cold]
    fn keep(&self, unsent: Unsent, error: Error) {
        match self.unsent.with(|list| list.push(unsent)) {
            Ok(()) => defmt::debug!("an answer waits: {}", error),
            Err(_) => defmt::error!("an answer is lost, and its device may wait for ever: {}", error),
        }
    }

    /// Tries once more to send what was not sent; returns whether nothing is left.
    pub fn send_unsent(&self) -> bool {
        let mut tries = self.unsent.with(|list| list.len());
        let mut all_sent = true;
        while tries > 0 {
            all_sent &= match self.unsent.with(|list| (!list.is_empty()).then(|| list.remove(0))) {
                Some(Unsent::Group(answer)) => self.try_answer(core::iter::once(answer)),
                Some(Unsent::Refusal(response)) => self.try_respond(response),
                None => break,
            };
            tries -= 1;
        }
        all_sent
    }

    /// Submits `invalidations` and waits until they have completed. Interrupts are open, and no lock is held.
    ///
    /// That they failed is the driver's to say: another device's may be at the head of the queue, and that is no reason to
    /// give up on these. On an error nothing that they cover may be used again.
    ///
    /// A device that is blocked because it did not answer is not asked again: the unit lets nothing of it through, whatever it
    /// remembers, and it is reset before anybody else gets it.
    #[inline]
    pub fn invalidate(&self, invalidations: &[Invalidation]) -> Result<(), Error> {
        if self.silent.is_empty() {
            // Mostly there is no such device.
            return self.submit_and_wait(invalidations);
        }
        self.invalidate_asking_some(invalidations)
    }

    #[inline(never)]
    fn invalidate_asking_some(&self, invalidations: &[Invalidation]) -> Result<(), Error> {
        const PART: usize = 8;
        let is_unasked = |it: &Invalidation| it.asks().is_some_and(|stream| self.is_unasked(stream));
        if !invalidations.iter().any(is_unasked) {
            return self.submit_and_wait(invalidations);
        }
        for part in invalidations.chunks(PART) {
            let unasked = part.iter().filter_map(|it| if is_unasked(it) { it.unasked() } else { Some(*it) });
            self.submit_and_wait(&unasked.collect::<Vec<_, PART>>())?;
        }
        Ok(())
    }

    fn submit_and_wait(&self, invalidations: &[Invalidation]) -> Result<(), Error> {
        let mut since_us = None;
        loop {
            // `None` is done: a unit may be that quick. The clock is for those that are not.
            let undone = self.commands.with(|commands| {
                match commands.submit(invalidations).map(|ticket| (ticket, commands.poll(ticket))) {
                    Ok((_, Completion::Done)) => None,
                    undone => Some(undone),
                }
            });
            let Some(undone) = undone else { return Ok(()) };
            if let Some(result) = self.wait_on(undone, &mut since_us) {
                return result;
            }
        }
    }

    /// Waits until what was submitted has completed. `None` if there was no room for it: then it is to be submitted again, for
    /// some time from `since_us` on.
    #[inline(never)]
    fn wait_on(
        &self,
        submitted: Result<(Ticket, Completion), Error>,
        since_us: &mut Option<u64>,
    ) -> Option<Result<(), Error>> {
        Some(match submitted {
            Ok((_, Completion::Done)) => Ok(()),
            Ok((ticket, Completion::Failed)) => Err(self.has_failed(ticket)),
            Ok((ticket, Completion::Pending)) => self.wait(ticket),
            Err(error @ (Error::QueueFull { .. } | Error::Busy { .. })) => {
                let now_us = cpu::now_us();
                if now_us.saturating_sub(*since_us.get_or_insert(now_us)) < BACKSTOP_US {
                    cpu::relax();
                    return None;
                }
                Err(error)
            }
            Err(error) => Err(error),
        })
    }

    /// Has the service core find out why: not everything that fails interrupts.
    fn has_failed(&self, ticket: Ticket) -> Error {
        self.due.tell(Due::FAILED);
        Error::Failed { ticket }
    }

    fn wait(&self, ticket: Ticket) -> Result<(), Error> {
        let start = cpu::now_us();
        loop {
            // The clock is read first: a wait that was preempted for long looks once more before it gives up.
            let waited_us = cpu::now_us().saturating_sub(start);
            match self.commands.with(|commands| commands.poll(ticket)) {
                Completion::Done => return Ok(()),
                Completion::Failed => return Err(self.has_failed(ticket)),
                Completion::Pending => {}
            }
            if waited_us >= BACKSTOP_US {
                return Err(Error::Timeout { register: "the invalidation queue", waited_us });
            }
            cpu::relax();
        }
    }

    /// Waits until the service routine has emptied the unit's queues once, from start to end, after this call.
    ///
    /// Whatever the unit had reported before is then admitted, and whoever looked at the attachments before is done.
    pub fn drain(&self) -> Result<(), Error> {
        let start = cpu::now_us();
        let wanted = self.drains.asked.fetch_add(1, AcqRel) + 1;
        self.due.tell(Due::DRAIN);
        loop {
            let waited_us = cpu::now_us().saturating_sub(start);
            if self.drains.done.load(Acquire) >= wanted {
                return Ok(());
            }
            if waited_us >= DRAIN_LIMIT_US {
                return Err(Error::Timeout { register: "the service core", waited_us });
            }
            cpu::relax();
        }
    }
}

/// What the service routine is to do besides what it is interrupted for: all that is seldom so, in one word, so that a pass
/// finds with one load that there is nothing.
pub struct Due(AtomicU32);

impl Due {
    /// Look at everything: a pass has left something.
    pub const ALL: u32 = 1 << 0;
    /// Empty the queues, for someone who waits for that.
    pub const DRAIN: u32 = 1 << 1;
    /// Send the answers that the unit did not take.
    pub const UNSENT: u32 = 1 << 2;
    /// Find out why a ticket has failed.
    pub const FAILED: u32 = 1 << 3;
    /// See when the control core wants to be woken.
    pub const WAKE: u32 = 1 << 4;

    /// Has `what` done by a pass that begins after this.
    pub fn tell(&self, what: u32) {
        self.note(what);
        interrupts::kick(SERVICE_CORE, Source::PageRequest);
    }

    /// Has `what` done by the next pass, whenever that is.
    pub fn note(&self, what: u32) {
        // ORDER: whoever takes it sees what it is about.
        self.0.fetch_or(what, Release);
    }

    /// Takes all that is to be done. A word that is zero is only loaded.
    pub fn take(&self) -> u32 {
        if self.0.load(Relaxed) == 0 { 0 } else { self.0.swap(0, AcqRel) }
    }
}

/// How often the unit said that it lost an unknown number of reports.
pub struct Losses {
    /// Of faults.
    pub faults: AtomicU64,
    /// Of page requests.
    pub requests: AtomicU64,
}

/// Passes of the service routine that someone waits for.
pub struct Drains {
    asked: AtomicU64,
    done: AtomicU64,
}

impl Drains {
    const fn new() -> Self {
        Self { asked: AtomicU64::new(0), done: AtomicU64::new(0) }
    }

    /// Returns what was asked for until now; the service routine reads it before it begins.
    pub fn asked(&self) -> u64 {
        self.asked.load(Acquire)
    }

    /// Says that a pass which began after `asked` was read has found the queues empty.
    pub fn done(&self, asked: u64) {
        self.done.store(asked, Release);
    }
}
