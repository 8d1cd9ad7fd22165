//! One SMMUv3, as the architecture (Arm IHI 0070) describes it.
//!
//! [`SmmuUnit`] is the hardware's side of [`Bus`], and the device's side of everything behind it: a test lets a driver
//! program the unit through the one, and plays the devices through the other ([`SmmuUnit::dma_read`],
//! [`SmmuUnit::page_request`]). It is written for suspicion, not for speed:
//!
//! - The unit reads every table, command and page in the device's view of [`Memory`], whatever IDR0.COHACC says, so
//!   each structure has to be published before it is used.
//! - It caches what the architecture lets it cache, for ever, so a missing invalidation leaves something stale to find;
//!   that a stream is not valid is cached like everything else.
//! - An invalidation drops what the architecture promises for it, and no more, and not before the next CMD_SYNC.
//! - Whatever breaks a rule of the architecture without being a fault of its own is noted in
//!   [`SmmuUnit::violations`]; a test of a driver ends by asserting that there are none.
//!
//! | feature | modelled | note |
//! |---|---|---|
//! | registers, access rules, acknowledgement | yes | Non-secure, both pages; the queue indices of page 1 are not aliased in page 0 |
//! | stream table and tables of context descriptors, of one level or two | yes | context descriptors of a nested stream are found through stage 2 |
//! | commands, errors of the command queue | yes | every command of a Non-secure queue; prefetches do nothing |
//! | stage 1, stage 2, both | yes | VMSAv8-64, 4 KiB granule (others are refused as illegal); memory attributes are not looked at, but for leaves that S2FWB gives no meaning |
//! | access flag, dirty state by hardware (HTTU) | no | |
//! | events, stalls | yes | events are not merged |
//! | ATS, device TLBs, page requests | yes | full ATS; of an IDR0 that says NS1ATS, so split stages are illegal |
//! | interrupts | yes | by messages where IDR0.MSI and an address say so, else by wires |
//! | events to waiting cores | yes | of CMD_SYNC; that for a queue that is no longer full is left out |
//! | EL2 contexts, Secure, Realm, ATOS, MPAM, ECMDQ | no | |
//!
//! Accesses are unprivileged, and of data.

#[cfg(test)]
mod bench;
mod caches;
mod commands;
mod configuration;
mod device;
mod events;
mod registers;
mod requests;
mod walk;

pub use crate::device::{Answer, DeviceTlbEntry, Pace};
pub use device::Refusal;
pub use events::{Ended, Wire};
pub use registers::Update;
pub use requests::Requested;

use crate::memory::Memory;
use iommu::{Bus, PhysAddr};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// What a unit can do, and how it behaves where the architecture leaves room.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// IDR0.
    pub idr0: u32,
    /// IDR1.
    pub idr1: u32,
    /// IDR3.
    pub idr3: u32,
    /// IDR5.
    pub idr5: u32,
    /// IIDR.
    pub iidr: u32,
    /// What GBPA holds after reset.
    pub gbpa: u32,
    /// How many register reads and looks at the clock pass before an update is acknowledged.
    pub acknowledge_after: u32,
    /// By how much [`Bus::now_us`] advances each time, in microseconds.
    pub clock_step_us: u64,
    /// How long a device may take to answer CMD_ATC_INV, in microseconds.
    pub device_tlb_timeout_us: u64,
    /// Whether devices want the PASID of their requests in responses (PRG Response PASID Required).
    pub pasid_in_responses: bool,
    /// When the unit executes what is in its queue.
    pub pace: Pace,
}

impl Config {
    /// The unit of QEMU's `virt` machine.
    ///
    /// Both stages, 16-bit StreamIDs, ASIDs and VMIDs, 44-bit addresses, ranges in invalidations, no stalls, aborts
    /// only. No substreams, ATS or page requests. Lets everything pass after reset.
    pub const fn qemu() -> Self {
        Self {
            idr0: 0x0D44_101B,
            idr1: 0x0273_0010,
            idr3: 0x0000_1414,
            idr5: 0x0000_0074,
            iidr: 0,
            gbpa: 0x0000_1000,
            acknowledge_after: 3,
            clock_step_us: 1,
            device_tlb_timeout_us: 50_000,
            pasid_in_responses: true,
            pace: Pace::AtOnce,
        }
    }

    /// Adds everything else that the model knows.
    ///
    /// 20-bit substreams in tables of two levels, S2FWB, ATS without split stages, a page request queue of up to 2^19 entries, at most 8 stalls, and
    /// terminated accesses that need not abort.
    pub const fn full() -> Self {
        let qemu = Self::qemu();
        Self {
            idr0: qemu.idr0 & !(1 << 24 | 1 << 26) | 1 << 10 | 1 << 11 | 1 << 16 | 1 << 19,
            idr1: qemu.idr1 | 20 << 6 | 19 << 11,
            idr3: qemu.idr3 | 1 << 8,
            idr5: qemu.idr5 | 8 << 16,
            ..qemu
        }
    }

    const fn has(&self, bit: u32) -> bool {
        self.idr0 & 1 << bit != 0
    }

    /// IDR0.S2P.
    const fn stage_2(&self) -> bool {
        self.has(0)
    }

    /// IDR0.S1P.
    const fn stage_1(&self) -> bool {
        self.has(1)
    }

    /// IDR0.ATS.
    const fn ats(&self) -> bool {
        self.has(10)
    }

    /// IDR0.MSI.
    const fn messages(&self) -> bool {
        self.has(13)
    }

    /// IDR0.SEV.
    const fn wakes(&self) -> bool {
        self.has(14)
    }

    /// IDR0.PRI.
    const fn pri(&self) -> bool {
        self.has(16)
    }

    /// IDR0.CD2L: tables of context descriptors may have two levels.
    const fn two_level_contexts(&self) -> bool {
        self.has(19)
    }

    /// IDR3.FWB.
    const fn forces_write_back(&self) -> bool {
        self.idr3 & 1 << 8 != 0
    }

    /// IDR0.ST_LEVEL=1: stream tables may have two levels.
    const fn two_levels(&self) -> bool {
        self.has(27)
    }

    /// IDR0.STALL_MODEL=0: faults may stall.
    const fn stalls(&self) -> bool {
        !self.has(24)
    }

    /// IDR5.OAS in bits.
    const fn output_bits(&self) -> u32 {
        address_bits(self.idr5 as u64 & 7)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::qemu()
    }
}

/// The address size that OAS, IPS or S2PS encode, in bits. Codes of more than 48 bits act as 48: 4 KiB tables end there.
const fn address_bits(code: u64) -> u32 {
    match code {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        _ => 48,
    }
}

/// What the model knows, of IDR0: S2P, S1P, AArch64 tables, COHACC, ATS, NS1ATS, ASID16, MSI, SEV, PRI, VMID16, CD2L, little-endian
/// tables, no stall, TERM_MODEL, two-level stream tables.
const MODELLED_IDR0: u32 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 3 << 10
    | 1 << 12
    | 1 << 13
    | 1 << 14
    | 1 << 16
    | 1 << 18
    | 1 << 19
    | 2 << 21
    | 1 << 24
    | 1 << 26
    | 1 << 27;
/// Of IDR1: the sizes.
const MODELLED_IDR1: u32 = 0x03FF_FFFF;
/// Of IDR3: HAD, XNX, PPS, FWB, RIL, BBML.
const MODELLED_IDR3: u32 = 1 << 2 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 10 | 3 << 11;
/// Of IDR5: OAS, granules (of which a driver may use 4 KiB), STALL_MAX.
const MODELLED_IDR5: u32 = 0xFFFF_0077;

/// A modelled SMMUv3: the registers behind [`Bus`], and the devices behind the unit.
pub struct SmmuUnit {
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
    /// Updates that are never acknowledged.
    withheld: Vec<Update>,
    clock_us: u64,
    caches: caches::Caches,
    commands: commands::Commands,
    stalls: events::Stalls,
    requests: requests::Requests,
    /// Devices that are there.
    plugged: BTreeSet<u32>,
    /// Devices that put off the answer to CMD_ATC_INV.
    holding: BTreeSet<u32>,
    pulses: Vec<Wire>,
    /// Messages that were written, and whether their writes are aborted.
    messages: Vec<(u64, u32)>,
    lose_messages: bool,
    violations: Vec<String>,
}

impl State {
    fn violation(&mut self, text: String) {
        self.violations.push(text);
    }
}

impl SmmuUnit {
    /// Returns a unit after reset, in front of `memory`.
    ///
    /// PANICS: when `config` claims a capability that the model lacks, or page requests without ATS.
    pub fn new(memory: Memory, config: Config) -> Self {
        let Config { idr0, idr1, idr3, idr5, .. } = config;
        let claimed = [idr0, idr1, idr3, idr5];
        let modelled = [MODELLED_IDR0, MODELLED_IDR1, MODELLED_IDR3, MODELLED_IDR5];
        for (name, (claimed, modelled)) in
            ["IDR0", "IDR1", "IDR3", "IDR5"].iter().zip(claimed.into_iter().zip(modelled))
        {
            assert!(claimed & !modelled == 0, "not modelled: {name} bits {:#x}", claimed & !modelled);
        }
        assert!(config.ats() || !config.pri(), "IDR0.PRI is reserved without IDR0.ATS");
        assert!(!config.ats() || config.has(11), "not modelled: split-stage ATS (IDR0.NS1ATS=0)");
        let values = [
            (registers::IDR0, idr0.into()),
            (registers::IDR1, idr1.into()),
            (registers::IDR3, idr3.into()),
            (registers::IDR5, idr5.into()),
            (registers::IIDR, config.iidr.into()),
            // SMMUv3.1.
            (registers::AIDR, 1),
            (registers::GBPA, config.gbpa.into()),
        ];
        let state = State {
            config,
            memory,
            map: registers::map(&config),
            values: values.into(),
            due: Vec::new(),
            withheld: Vec::new(),
            clock_us: 0,
            caches: caches::Caches::default(),
            commands: commands::Commands::default(),
            stalls: events::Stalls::default(),
            requests: requests::Requests::default(),
            plugged: BTreeSet::new(),
            holding: BTreeSet::new(),
            pulses: Vec::new(),
            messages: Vec::new(),
            lose_messages: false,
            violations: Vec::new(),
        };
        Self { state: Mutex::new(state) }
    }

    /// Returns the rules of the architecture that were broken so far, in their order.
    pub fn violations(&self) -> Vec<String> {
        let mut state = self.lock();
        state.catch_up();
        state.violations.clone()
    }

    /// Takes the pulses that the unit gave on its interrupt wires since the last call, oldest first.
    pub fn pulses(&self) -> Vec<Wire> {
        std::mem::take(&mut self.lock().pulses)
    }

    /// Takes the messages, address and data, that the unit wrote since the last call, oldest first.
    pub fn messages(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.lock().messages)
    }

    /// Lets writes of messages be aborted from now on, or not any more.
    pub fn fail_messages(&self, fail: bool) {
        self.lock().lose_messages = fail;
    }

    /// Sets how many register reads and looks at the clock pass before an update is acknowledged.
    pub fn acknowledge_after(&self, steps: u32) {
        self.lock().config.acknowledge_after = steps;
    }

    /// Never acknowledges these updates; an empty list acknowledges everything again.
    pub fn never_acknowledge(&self, updates: &[Update]) {
        let mut state = self.lock();
        state.withheld = updates.to_vec();
        state.acknowledge();
    }

    /// Returns when it executes what is queued.
    pub fn pace(&self) -> Pace {
        self.lock().config.pace
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

impl Bus for SmmuUnit {
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
        let before = state.live_entries(&range);
        if let Err(error) = state.memory.publish(range) {
            state.violation(format!("publish: {error}"));
        }
        state.check_live_entries(before);
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

impl fmt::Debug for SmmuUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.lock();
        let (cr0, acknowledged) = (state.get(registers::CR0), state.get(registers::CR0ACK));
        write!(f, "SmmuUnit {{ CR0: {cr0:#x}, CR0ACK: {acknowledged:#x} }}")
    }
}

#[cfg(test)]
mod tests {
    use super::{bench::Bench, *};
    use iommu::{Iova, StreamId};

    #[test]
    fn a_driver_s_memory_reaches_the_unit_when_it_is_published() {
        let bench = Bench::started(Config::qemu());
        let memory = bench.memory();
        let mut buffer = memory.take(8, 8);
        buffer.clear();

        bench.unit.publish(buffer.range(0, 8));

        assert_eq!(memory.device_load(buffer.phys()), Ok(0));
        bench.assert_lawful();
    }

    #[test]
    fn ordering_memory_that_is_not_there_is_noted() {
        let unit = SmmuUnit::new(Memory::new(8), Config::qemu());

        unit.publish(PhysAddr(0)..PhysAddr(8));
        unit.observe(PhysAddr(0)..PhysAddr(8));

        assert_eq!(unit.violations().len(), 2);
    }

    #[test]
    fn before_it_is_enabled_everything_passes_or_nothing() {
        for (gbpa, expected) in
            [(0x1000, Err(Refusal::NoMemory(PhysAddr(0x5000)))), (1 << 20, Err(Refusal::Aborted))]
        {
            let unit = SmmuUnit::new(Memory::new(8), Config { gbpa, ..Config::qemu() });

            assert_eq!(unit.dma_read(StreamId(1), None, Iova(0x5000), 1), expected);
            assert_eq!(unit.dma_read(StreamId(1), None, Iova(1 << 44), 1), Err(Refusal::Aborted));
        }
    }

    #[test]
    #[should_panic(expected = "not modelled: IDR0 bits 0x200")]
    fn a_unit_that_claims_what_is_not_modelled_is_not_made() {
        SmmuUnit::new(Memory::new(8), Config { idr0: Config::qemu().idr0 | 1 << 9, ..Config::qemu() });
    }

    #[test]
    fn threads_can_share_a_unit() {
        fn shared<T: Send + Sync>() {}

        shared::<SmmuUnit>();
    }
}
