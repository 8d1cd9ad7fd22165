//! One VT-d unit, as the manual describes it.
//!
//! [`VtdUnit`] is the hardware's side of [`Bus`], and the device's side of everything behind it: a test lets a driver
//! program the unit through the one, and plays the devices through the other ([`VtdUnit::dma_read`],
//! [`VtdUnit::page_request`]). It is written for suspicion, not for speed:
//!
//! - The unit reads every table, descriptor and page in the device's view of [`Memory`], whatever ECAP.C says, so each
//!   structure has to be published before it is used. [`Bus::order`] is enough where the unit looks into the CPU's caches
//!   (ECAP.C, and in scalable mode ECAP.SMPWCS), and does nothing where it does not.
//! - With CAP.RWBF what is published stays in a buffer until GCMD.WBF, or an invalidation, flushes it; the invalidation
//!   queue itself is not behind the buffer.
//! - It caches what the manual lets it cache, for ever, so a missing invalidation leaves a stale translation to find.
//! - An invalidation drops what the manual promises for it, and no more.
//! - Whatever breaks a rule of the manual without being a fault of its own is noted in [`VtdUnit::violations`]; a test
//!   of a driver ends by asserting that there are none.
//!
//! | feature | modelled | note |
//! |---|---|---|
//! | registers, access rules, acknowledgement | yes | advanced fault log, MTRR, performance and virtual command blocks: reserved |
//! | queued invalidation, 128 and 256 bits | yes | every descriptor type |
//! | register-based invalidation | yes | |
//! | legacy mode | yes | second stage of 3 to 5 levels, pass-through |
//! | scalable mode | yes | first stage of 4 or 5 levels, second stage of 3 to 5 levels, nested, pass-through |
//! | write buffer | yes | GCMD.WBF, GSTS.WBFS |
//! | second-stage A/D, snoop control of data | no | a unit that claims the first cannot be made; the second has no effect |
//! | primary faults, fault events | yes | 0x90 and 0x91 (A/D update not snooped, failed) are never met |
//! | ATS, device TLBs, page requests | yes | |
//! | interrupt remapping | yes | messages and I/O APIC pins, source validation, x2APIC; entries are cached for ever |
//! | posted interrupts | no | |
//! | protected memory ranges | yes | while translation is off |

#[cfg(test)]
mod bench;
mod caches;
mod device;
mod faults;
mod queue;
mod registers;
mod remap;
mod requests;
mod walk;

pub use crate::device::{Answer, DeviceTlbEntry, Pace};
pub use device::Refusal;
pub use remap::Arrived;
pub use requests::Requested;

use crate::memory::{Memory, OutsideMemory};
use iommu::{Bus, Message, PhysAddr};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What a unit can do, and how it behaves where the manual leaves room.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// CAP.
    pub cap: u64,
    /// ECAP.
    pub ecap: u64,
    /// VER.
    pub version: u32,
    /// The host address width in bits, as the DMAR table gives it; address bits above are reserved.
    pub host_address_bits: u32,
    /// How many register reads and looks at the clock pass before a command through a register is acknowledged.
    pub acknowledge_after: u32,
    /// By how much [`Bus::now_us`] advances each time, in microseconds.
    pub clock_step_us: u64,
    /// How long a device may take to answer a device-TLB invalidation before ITE, in microseconds.
    pub device_tlb_timeout_us: u64,
    /// Whether IQERCD names the device that did not answer (ITESID), or reads as zero as it does on old units.
    pub names_silent_devices: bool,
    /// Whether descriptors between two waits are executed last first; the manual promises no order among them.
    pub reorders: bool,
    /// Whether the queue goes off only after a wait, as on QEMU; else GSTS.QIES stays.
    pub ends_queue_after_wait: bool,
    /// Whether fetching resumes only at the next write to IQT after IQE was cleared, as on QEMU, or at once.
    pub resumes_at_tail_write: bool,
    /// Whether faults of a source that has one recorded already are not recorded, as on QEMU; the manual allows it.
    pub compresses_faults: bool,
    /// When the unit executes what is in its queue.
    pub pace: Pace,
}

impl Config {
    /// The unit of QEMU's q35 machine with scalable mode, first stage, ATS and page requests.
    ///
    /// 64 Ki domains, second-stage widths of 39 and 48 bits (legacy mode only), one fault record at 0x220, ESRTPS;
    /// queued invalidation, device TLBs, pass-through, 20-bit PASIDs, page requests with drain. Not coherent, no snoop
    /// control, no supervisor requests, RID_PASID 0.
    pub const fn qemu() -> Self {
        Self {
            cap: 0x81D2_008C_222F_0606,
            ecap: 0x0000_8D9A_20F0_0F5E,
            version: 0x10,
            host_address_bits: 48,
            acknowledge_after: 3,
            clock_step_us: 1,
            device_tlb_timeout_us: 50_000,
            names_silent_devices: false,
            ends_queue_after_wait: false,
            reorders: false,
            resumes_at_tail_write: true,
            compresses_faults: false,
            pace: Pace::AtOnce,
        }
    }

    /// Adds everything else that the model knows.
    ///
    /// Four fault records; snoop control, supervisor requests, RID_PASID and RID_PRIV, device-TLB invalidations that name
    /// the physical function, second stage in scalable mode, coherent page walks, stop markers.
    pub const fn full() -> Self {
        let qemu = Self::qemu().with_fault_records(4);
        let more = 1 | 1 << 7 | 1 << 31 | 1 << 41 | 1 << 46 | 1 << 48 | 1 << 49 | 1 << 53 | 1 << 58;
        let ecap = qemu.ecap | more;
        Self { ecap, names_silent_devices: true, resumes_at_tail_write: false, ..qemu }
    }

    /// Sets CAP.NFR so that there are `count` fault records, 1 at least.
    pub const fn with_fault_records(self, count: u8) -> Self {
        let last = count.saturating_sub(1) as u64;
        Self { cap: self.cap & !(0xFF << 40) | last << 40, ..self }
    }

    /// Sets ECAP.NEST: first-stage tables of a guest over second-stage tables.
    pub const fn with_nesting(self) -> Self {
        Self { ecap: self.ecap | 1 << 26, ..self }
    }

    /// Sets CAP.FS5LP, in CAP.SAGAW the width of 57 bits, and as much in CAP.MGAW: tables of 5 levels.
    pub const fn with_five_levels(self) -> Self {
        let cap = self.cap & !(0x3F << 16) | 56 << 16 | 1 << 60 | 1 << 11;
        Self { cap, host_address_bits: 52, ..self }
    }

    /// Sets CAP.RWBF: what software stores in tables stays in a buffer until that is flushed.
    pub const fn with_write_buffer(self) -> Self {
        Self { cap: self.cap | 1 << 4, ..self }
    }

    /// Sets CAP.CM: the unit may cache entries that are not present.
    pub const fn with_caching_mode(self) -> Self {
        Self { cap: self.cap | 1 << 7, ..self }
    }

    /// ECAP.DIT: device-TLB invalidations name the physical function; elsewhere PFSID is reserved.
    const fn throttles(&self) -> bool {
        self.ecap & 1 << 41 != 0
    }

    /// CAP.CM.
    const fn caching_mode(&self) -> bool {
        self.cap & 1 << 7 != 0
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::qemu()
    }
}

/// Capabilities that the model lacks. CAP: AFL, widths other than 39, 48 and 57 bits, PI, ECMDS.
const UNMODELLED_CAP: u64 = 1 << 3 | 0x11 << 8 | 1 << 59 | 1 << 61;
/// ECAP: MTS, ERS, EAFS, VCS, SSADS, PMS, ADMS.
const UNMODELLED_ECAP: u64 = 1 << 25 | 1 << 30 | 1 << 34 | 1 << 44 | 1 << 45 | 1 << 51 | 1 << 52;

/// A modelled VT-d unit: the registers behind [`Bus`], and the devices behind the unit.
pub struct VtdUnit {
    state: Mutex<State>,
}

/// All of the unit. The files of this module each add the part that they are named for.
struct State {
    config: Config,
    memory: Memory,
    map: Vec<registers::Register>,
    /// What the registers hold, by offset.
    values: BTreeMap<usize, u64>,
    due: Vec<registers::Due>,
    /// Bits of GCMD that are never acknowledged.
    never_acknowledged: u32,
    clock_us: u64,
    /// RTADDR as it was when GCMD.SRTP completed.
    root: u64,
    caches: caches::Caches,
    /// Words that were published and are not in memory yet, oldest first (CAP.RWBF).
    write_buffer: Vec<(PhysAddr, u64)>,
    /// How often memory was published: cache lines were flushed.
    flushes: usize,
    remapping: remap::Remapping,
    queue: queue::Queue,
    /// The fault record that the next fault goes to.
    next_fault: usize,
    requests: requests::Requests,
    /// Devices that are there, and for each the physical function that it belongs to.
    plugged: BTreeMap<u16, u16>,
    /// Devices that put off the answer to device-TLB invalidations.
    holding: BTreeSet<u16>,
    messages: Vec<Message>,
    violations: Vec<String>,
    /// Nothing answers any more.
    gone: bool,
}

impl State {
    fn violation(&mut self, text: String) {
        self.violations.push(text);
    }

    /// Whether the unit looks into the CPU's caches: ECAP.C, and ECAP.SMPWCS for what it walks in scalable mode.
    fn is_coherent(&self) -> bool {
        self.config.ecap & 1 != 0 && (self.root >> 10 & 3 != 1 || self.config.ecap & 1 << 48 != 0)
    }

    /// What the CPU stored to `range` leaves the CPU, for memory or for the write buffer before it.
    fn arrive(&mut self, range: Range<PhysAddr>) -> Result<(), OutsideMemory> {
        let buffered = self.config.cap & 1 << 4 != 0 && !self.in_queue(range.start);
        if !buffered {
            return self.memory.publish(range);
        }
        for at in (range.start.0..range.end.0).step_by(8).map(PhysAddr) {
            let word = self.memory.write_back(at)?;
            self.write_buffer.push((at, word));
        }
        Ok(())
    }

    /// Empties the write buffer into memory.
    fn flush_write_buffer(&mut self) {
        for (at, word) in std::mem::take(&mut self.write_buffer) {
            // `arrive` has seen that there is such a word.
            let _ = self.memory.device_store(at, word);
        }
    }
}

impl VtdUnit {
    /// Returns a unit after reset, in front of `memory`.
    ///
    /// PANICS: when `config` claims a capability that the model lacks.
    pub fn new(memory: Memory, config: Config) -> Self {
        let (cap, ecap) = (config.cap & UNMODELLED_CAP, config.ecap & UNMODELLED_ECAP);
        assert!(cap | ecap == 0, "not modelled: CAP bits {cap:#x}, ECAP bits {ecap:#x}");
        let values = [
            (registers::VER, config.version.into()),
            (registers::CAP, config.cap),
            (registers::ECAP, config.ecap),
            // The event messages are masked at reset.
            (registers::FECTL, 1 << 31),
            (registers::IECTL, 1 << 31),
            (registers::PECTL, 1 << 31),
        ];
        let state = State {
            config,
            memory,
            map: registers::map(config.cap, config.ecap),
            values: values.into(),
            due: Vec::new(),
            never_acknowledged: 0,
            clock_us: 0,
            root: 0,
            caches: caches::Caches::default(),
            write_buffer: Vec::new(),
            flushes: 0,
            remapping: remap::Remapping::default(),
            queue: queue::Queue::default(),
            next_fault: 0,
            requests: requests::Requests::default(),
            plugged: BTreeMap::new(),
            holding: BTreeSet::new(),
            messages: Vec::new(),
            violations: Vec::new(),
            gone: false,
        };
        Self { state: Mutex::new(state) }
    }

    /// Returns the rules of the manual that were broken so far, in their order.
    pub fn violations(&self) -> Vec<String> {
        let mut state = self.lock();
        state.catch_up();
        state.violations.clone()
    }

    /// Takes the messages (MSIs) that the unit sent since the last call.
    pub fn messages(&self) -> Vec<Message> {
        std::mem::take(&mut self.lock().messages)
    }

    /// Sets how many register reads and looks at the clock pass before a command is acknowledged.
    pub fn acknowledge_after(&self, steps: u32) {
        self.lock().config.acknowledge_after = steps;
    }

    /// Never acknowledges the commands in `bits`, numbered as in GCMD; zero acknowledges everything again.
    pub fn never_acknowledge(&self, bits: u32) {
        let mut state = self.lock();
        state.never_acknowledged = bits;
        state.acknowledge();
    }

    /// Returns how often memory was published since the unit was made: each costs the flush of its cache lines.
    pub fn flushes(&self) -> usize {
        self.lock().flushes
    }

    /// Returns when it executes what is queued.
    pub fn pace(&self) -> Pace {
        self.lock().config.pace
    }

    /// Takes the unit away: registers read as ones, writes go nowhere, and nothing is executed.
    pub fn vanish(&self) {
        self.lock().gone = true;
    }

    /// Lets `us` microseconds pass.
    pub fn advance(&self, us: u64) {
        let mut state = self.lock();
        state.clock_us = state.clock_us.saturating_add(us);
        state.step();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panicked in another thread has failed already; this one may go on looking.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bus for VtdUnit {
    fn read32(&self, offset: usize) -> u32 {
        self.lock().read(offset, 4) as u32
    }

    fn write32(&self, offset: usize, value: u32) {
        self.lock().write(offset, 4, value.into());
    }

    fn read64(&self, offset: usize) -> u64 {
        self.lock().read(offset, 8)
    }

    fn write64(&self, offset: usize, value: u64) {
        self.lock().write(offset, 8, value);
    }

    fn publish(&self, range: Range<PhysAddr>) {
        let mut state = self.lock();
        state.flushes += 1;
        if let Err(error) = state.arrive(range) {
            state.violation(format!("publish: {error}"));
        }
    }

    fn order(&self, range: Range<PhysAddr>) {
        let mut state = self.lock();
        if !state.is_coherent() {
            // What was stored stays in the CPU's caches, where the unit does not look.
            return;
        }
        if let Err(error) = state.arrive(range) {
            state.violation(format!("order: {error}"));
        }
    }

    fn observe(&self, range: Range<PhysAddr>) {
        let mut state = self.lock();
        state.looked();
        if let Err(error) = state.memory.observe(range) {
            state.violation(format!("observe: {error}"));
        }
    }

    fn now_us(&self) -> u64 {
        let mut state = self.lock();
        state.clock_us = state.clock_us.saturating_add(state.config.clock_step_us);
        state.step();
        state.clock_us
    }
}

impl fmt::Debug for VtdUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        write!(f, "VtdUnit {{ GSTS: {:#010x}, RTADDR: {:#x} }}", state.status(), state.root)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_s_memory_reaches_the_unit_when_it_is_published() {
        let memory = Memory::new(2048);
        let unit = VtdUnit::new(memory.clone(), Config::qemu());
        let mut root = memory.take(512, 512);
        root.clear();
        let start = || {
            unit.acknowledge_after(0);
            unit.write64(registers::RTADDR, root.phys().0);
            unit.write32(registers::GCMD, registers::SRTP);
            unit.write32(registers::GCMD, registers::TE);
        };
        let read = || unit.dma_read(iommu::StreamId(0), None, iommu::Iova(0), 1);

        start();
        assert_eq!(read(), Err(Refusal::Fault(0x0A)), "the unit sees what was there before");
        unit.publish(root.range(0, 512));

        assert_eq!(read(), Err(Refusal::Fault(0x01)));
        assert_eq!(unit.violations(), [""; 0]);
    }

    /// A unit that translates by a root table which was cleared and published, and that table.
    fn translating(config: Config) -> (VtdUnit, iommu::DmaBuf) {
        let memory = Memory::new(2048);
        let unit = VtdUnit::new(memory.clone(), config);
        let mut root = memory.take(512, 512);
        root.clear();
        unit.publish(root.range(0, 512));
        unit.acknowledge_after(0);
        unit.write32(registers::GCMD, WBF);
        unit.write64(registers::RTADDR, root.phys().0);
        unit.write32(registers::GCMD, registers::SRTP);
        unit.write32(registers::GCMD, registers::TE);
        (unit, root)
    }

    /// GCMD.WBF.
    const WBF: u32 = 1 << 27;

    /// What a device on bus 0 meets: a root entry that is not present, or one with a reserved bit.
    fn read(unit: &VtdUnit) -> Result<Vec<u8>, Refusal> {
        unit.dma_read(iommu::StreamId(0), None, iommu::Iova(0), 1)
    }

    #[test]
    fn what_is_put_in_order_reaches_a_unit_that_looks_into_the_caches_and_no_other() {
        for (ecap, reason) in [(Config::qemu().ecap | 1, 0x0A), (Config::qemu().ecap, 0x01)] {
            let (unit, mut root) = translating(Config { ecap, ..Config::qemu() });
            root.store(0, 3);
            let flushes = unit.flushes();

            unit.order(root.range(0, 1));

            assert_eq!(read(&unit), Err(Refusal::Fault(reason)));
            assert_eq!(unit.flushes(), flushes);
            unit.publish(root.range(0, 1));
            assert_eq!((read(&unit), unit.flushes()), (Err(Refusal::Fault(0x0A)), flushes + 1));
        }
    }

    #[test]
    fn what_is_published_stays_in_the_write_buffer_until_that_is_flushed() {
        let (unit, mut root) = translating(Config::qemu().with_write_buffer());
        root.store(0, 3);
        unit.publish(root.range(0, 1));
        // What is stored later is not what was published.
        root.store(0, 5);

        assert_eq!(read(&unit), Err(Refusal::Fault(0x01)));
        unit.write32(registers::GCMD, registers::TE | WBF);

        assert_eq!(read(&unit), Err(Refusal::Fault(0x0A)));
        assert_eq!(root.load(0), 5);
        assert_eq!(unit.violations(), [""; 0]);
    }

    #[test]
    fn ordering_memory_that_is_not_there_is_noted() {
        let unit = VtdUnit::new(Memory::new(8), Config::qemu());

        unit.publish(PhysAddr(0)..PhysAddr(8));
        unit.observe(PhysAddr(0)..PhysAddr(8));

        assert_eq!(unit.violations().len(), 2);
    }

    #[test]
    fn threads_can_share_a_unit_and_its_memory() {
        fn shared<T: Send + Sync>() {}

        shared::<VtdUnit>();
        shared::<Memory>();
        shared::<crate::endpoint::ConfigurationSpace>();
    }
}
