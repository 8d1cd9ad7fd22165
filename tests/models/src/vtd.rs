//! One VT-d unit, as the manual describes it.
//!
//! [`VtdUnit`] is the hardware's side of [`Bus`], and the device's side of everything behind it: a test lets a driver
//! program the unit through the one, and plays the devices through the other ([`VtdUnit::dma_read`],
//! [`VtdUnit::page_request`]). It is written for suspicion, not for speed:
//!
//! - The unit reads every table, descriptor and page in the device's view of [`Memory`], whatever ECAP.C says, so each
//!   structure has to be published before it is used.
//! - It caches what the manual lets it cache, for ever, so a missing invalidation leaves a stale translation to find.
//! - An invalidation drops what the manual promises for it, and no more.
//! - Whatever breaks a rule of the manual without being a fault of its own is noted in [`VtdUnit::violations`]; a test
//!   of a driver ends by asserting that there are none.
//!
//! | feature | modelled | note |
//! |---|---|---|
//! | registers, access rules, acknowledgement | yes | advanced fault log, MTRR, performance and virtual command blocks: reserved |
//! | queued invalidation, 128 and 256 bits | yes | every descriptor type; interrupt entries are accepted, none are cached |
//! | register-based invalidation | yes | |
//! | legacy mode | yes | second stage of 3 or 4 levels, pass-through |
//! | scalable mode | yes | first stage of 4 levels, second stage of 3 or 4 levels, pass-through |
//! | nested translation, 5 levels, second-stage A/D | no | a unit that claims them cannot be made |
//! | primary faults, fault events | yes | 0x90 and 0x91 (A/D update not snooped, failed) are never met |
//! | ATS, device TLBs, page requests | yes | |
//! | interrupt remapping | no | GCMD.SIRTP, IRE and CFI are acknowledged, and no more |
//! | protected memory ranges | no | PMEN is acknowledged, and no more |

#[cfg(test)]
mod bench;
mod caches;
mod device;
mod faults;
mod queue;
mod registers;
mod requests;
mod walk;

pub use crate::device::{Answer, DeviceTlbEntry};
pub use device::Refusal;
pub use requests::Requested;

use crate::memory::Memory;
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
    /// Whether fetching resumes only at the next write to IQT after IQE was cleared, as on QEMU, or at once.
    pub resumes_at_tail_write: bool,
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
            resumes_at_tail_write: true,
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

/// Capabilities that the model lacks. CAP: AFL, widths other than 39 and 48 bits, PI, FS5LP, ECMDS.
const UNMODELLED_CAP: u64 = 1 << 3 | 0x19 << 8 | 0x7 << 59;
/// ECAP: MTS, NEST, ERS, EAFS, VCS, SSADS, PMS, ADMS.
const UNMODELLED_ECAP: u64 = 1 << 25 | 1 << 26 | 1 << 30 | 1 << 34 | 1 << 44 | 1 << 45 | 1 << 51 | 1 << 52;

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
}

impl State {
    fn violation(&mut self, text: String) {
        self.violations.push(text);
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
            queue: queue::Queue::default(),
            next_fault: 0,
            requests: requests::Requests::default(),
            plugged: BTreeMap::new(),
            holding: BTreeSet::new(),
            messages: Vec::new(),
            violations: Vec::new(),
        };
        Self { state: Mutex::new(state) }
    }

    /// Returns the rules of the manual that were broken so far, in their order.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
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
        if let Err(error) = state.memory.publish(range) {
            state.violation(format!("publish: {error}"));
        }
    }

    fn observe(&self, range: Range<PhysAddr>) {
        let mut state = self.lock();
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
