//! Configuration space of functions with ATS, PASID and PRI capabilities, which watches the order of their enables.
//!
//! The rules are those of the PCI Express Base specification's capabilities "ATS", "PASID" and "Page Request": PASID
//! changes only while ATS is off, page requests need ATS, and page requests start only after the function stopped.

use iommu::StreamId;
use pcie::ConfigSpace;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Where the capabilities are; each header is followed by what the function can do and what it is told.
const ATS: u16 = 0x100;
const PASID: u16 = 0x110;
const PRI: u16 = 0x120;

/// What a function is able to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Abilities {
    /// Invalidate Queue Depth: device-TLB invalidations that it can hold; 0 stands for 32.
    pub invalidate_queue_depth: u8,
    /// Max PASID Width: the bits of a PASID; `None` leaves the capability out.
    pub pasid_bits: Option<u8>,
    /// Outstanding Page Request Capacity; `None` leaves the capability out.
    pub page_requests: Option<u32>,
    /// PRG Response PASID Required.
    pub response_needs_pasid: bool,
    /// Firmware, or an owner before, left everything enabled, and all page requests allocated.
    pub left_enabled: bool,
}

impl Abilities {
    /// A function with everything, freshly reset: 20 bits of PASID, 64 page requests, responses that need the PASID.
    pub const FULL: Self = Self {
        invalidate_queue_depth: 0,
        pasid_bits: Some(20),
        page_requests: Some(64),
        response_needs_pasid: true,
        left_enabled: false,
    };
}

/// One function's registers.
struct Function {
    abilities: Abilities,
    /// Command, the lower half of the word at 0x04.
    command: u16,
    /// ATS Control: STU in 4:0, Enable in 15.
    ats: u16,
    /// PASID Control: Enable in 0, Execute Permission in 1, Privileged Mode in 2.
    pasid: u16,
    /// Page Request Control, Enable.
    page_requests: bool,
    /// Page Request Status, Response Failure in 0 and Unexpected PRG Index in 1.
    status: u16,
    /// Page requests are outstanding, so the function is not stopped.
    waiting: bool,
    /// Outstanding Page Request Allocation.
    allocation: u32,
}

impl Function {
    fn after_reset(abilities: Abilities) -> Self {
        Self {
            abilities,
            command: 0,
            ats: 0,
            pasid: 0,
            page_requests: false,
            status: 0,
            waiting: false,
            allocation: 0,
        }
    }

    fn new(abilities: Abilities) -> Self {
        let function = Self::after_reset(abilities);
        if !abilities.left_enabled {
            return function;
        }
        Self {
            ats: 1 << 15,
            pasid: u16::from(abilities.pasid_bits.is_some()),
            page_requests: abilities.page_requests.is_some(),
            allocation: abilities.page_requests.unwrap_or(0),
            ..function
        }
    }

    fn ats_is_on(&self) -> bool {
        self.ats & 1 << 15 != 0
    }

    /// Page Request Status, Stopped.
    fn is_stopped(&self) -> bool {
        !self.page_requests && !self.waiting
    }

    fn read(&self, offset: u16) -> u32 {
        let Abilities { invalidate_queue_depth, pasid_bits, page_requests, response_needs_pasid, .. } =
            self.abilities;
        // Each capability names the next one that is there.
        let after_pasid = if page_requests.is_some() { PRI } else { 0 };
        let after_ats = if pasid_bits.is_some() { PASID } else { after_pasid };
        let header = |id: u32, next: u16| u32::from(next) << 20 | 1 << 16 | id;
        match (offset, pasid_bits, page_requests) {
            (0x00, ..) => 0x0001_1234,
            (0x04, ..) => u32::from(self.command),
            (ATS, ..) => header(0x0F, after_ats),
            // Page Aligned Request: bit 5.
            (0x104, ..) => u32::from(self.ats) << 16 | 1 << 5 | u32::from(invalidate_queue_depth & 0x1F),
            (PASID, Some(_), _) => header(0x1B, after_pasid),
            (0x114, Some(bits), _) => u32::from(self.pasid) << 16 | u32::from(bits & 0x1F) << 8,
            (PRI, _, Some(_)) => header(0x13, 0),
            (0x124, _, Some(_)) => {
                let needs_pasid = u32::from(response_needs_pasid) << 31;
                let stopped = u32::from(self.is_stopped()) << 24;
                needs_pasid | stopped | u32::from(self.status) << 16 | u32::from(self.page_requests)
            }
            (0x128, _, Some(capacity)) => capacity,
            (0x12C, _, Some(_)) => self.allocation,
            _ => 0,
        }
    }

    /// Writes a register, and returns the rules that this breaks.
    fn write(&mut self, offset: u16, value: u32) -> Vec<&'static str> {
        let mut broken = Vec::new();
        let mut demand = |holds: bool, rule| {
            if !holds {
                broken.push(rule);
            }
        };
        let (low, high) = (value as u16, (value >> 16) as u16);
        match (offset, self.abilities.pasid_bits, self.abilities.page_requests) {
            // I/O Space, Memory Space, Bus Master, Interrupt Disable.
            (0x04, ..) => self.command = low & 0x0407,
            (0x104, ..) => {
                let on = high & 1 << 15 != 0;
                demand(high & 0x7FE0 == 0, "ATS Control: reserved bits must be zero");
                demand(!on || !self.ats_is_on() || high == self.ats, "STU changes while ATS is on");
                demand(on || !self.page_requests, "ATS goes off before page requests do");
                self.ats = high & 0x801F;
            }
            (0x114, Some(_), _) => {
                demand(high & !7 == 0, "PASID Control: reserved bits must be zero");
                demand(high & 6 == 0, "PASID Control: execute and privileged mode are not supported");
                demand(high == self.pasid || !self.ats_is_on(), "PASID Control changes while ATS is on");
                self.pasid = high & 1;
            }
            (0x124, _, Some(capacity)) => {
                let (on, reset) = (low & 1 != 0, low & 2 != 0);
                demand(low & !3 == 0, "Page Request Control: reserved bits must be zero");
                demand(!reset || !on && !self.page_requests, "page requests are reset while they are on");
                if on && !self.page_requests {
                    demand(self.ats_is_on(), "page requests go on while ATS is off");
                    demand(self.is_stopped(), "page requests go on before the function stopped");
                    demand(self.allocation <= capacity, "more page requests are allocated than the capacity");
                }
                self.status &= !(high & 3);
                if reset && !on && !self.page_requests {
                    self.status = 0;
                }
                self.page_requests = on;
            }
            (0x12C, _, Some(capacity)) => {
                demand(!self.page_requests, "the allocation changes while page requests are on");
                demand(value <= capacity, "more page requests are allocated than the capacity");
                self.allocation = value;
            }
            _ => {}
        }
        broken
    }
}

/// Configuration space with functions in it; functions that were not added are absent.
pub struct ConfigurationSpace {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    functions: BTreeMap<StreamId, Function>,
    violations: Vec<String>,
}

/// What a function is told to use now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Enabled {
    /// It may issue transactions (Bus Master Enable).
    pub bus_master: bool,
    /// ATS Enable.
    pub ats: bool,
    /// PASID Enable.
    pub pasid: bool,
    /// Page Request Enable.
    pub page_requests: bool,
    /// How many page requests it may have outstanding.
    pub allocation: u32,
}

impl ConfigurationSpace {
    /// Returns a configuration space in which no function answers.
    pub fn new() -> Self {
        Self { state: Mutex::default() }
    }

    /// Adds a function, or replaces it.
    pub fn add(&self, function: StreamId, abilities: Abilities) {
        self.lock().functions.insert(function, Function::new(abilities));
    }

    /// Takes a function out.
    pub fn remove(&self, function: StreamId) {
        self.lock().functions.remove(&function);
    }

    /// Resets a function, as a function-level reset does: everything is off, and nothing is outstanding.
    pub fn reset(&self, function: StreamId) {
        if let Some(found) = self.lock().functions.get_mut(&function) {
            *found = Function::after_reset(found.abilities);
        }
    }

    /// Says whether page requests of a function are outstanding, so that it is not stopped when they go off.
    pub fn set_waiting(&self, function: StreamId, waiting: bool) {
        if let Some(found) = self.lock().functions.get_mut(&function) {
            found.waiting = waiting;
        }
    }

    /// The function was answered with Response Failure: it issues no more page requests until they go on again.
    pub fn response_failure(&self, function: StreamId) {
        if let Some(found) = self.lock().functions.get_mut(&function) {
            found.status |= 1;
        }
    }

    /// Returns what a function is told to use, or `None` if it is absent.
    pub fn enabled(&self, function: StreamId) -> Option<Enabled> {
        self.lock().functions.get(&function).map(|found| Enabled {
            bus_master: found.command & 1 << 2 != 0,
            ats: found.ats_is_on(),
            pasid: found.pasid & 1 != 0,
            page_requests: found.page_requests,
            allocation: found.allocation,
        })
    }

    /// Returns the rules of the specification that were broken so far, in their order.
    pub fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A test that panicked in another thread has failed already; this one may go on looking.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for ConfigurationSpace {
    fn default() -> Self {
        Self::new()
    }
}

impl State {
    /// Returns whether `offset` is that of a register, and notes it if not.
    fn is_register(&mut self, function: StreamId, offset: u16) -> bool {
        let is_register = offset < 0x1000 && offset.is_multiple_of(4);
        if !is_register {
            self.violations.push(format!("function {:#06x}: {offset:#x} is no register", function.0));
        }
        is_register
    }
}

impl ConfigSpace for ConfigurationSpace {
    fn read32(&self, function: StreamId, offset: u16) -> u32 {
        let mut state = self.lock();
        if !state.is_register(function, offset) {
            return u32::MAX;
        }
        state.functions.get(&function).map_or(u32::MAX, |found| found.read(offset))
    }

    fn write32(&self, function: StreamId, offset: u16, value: u32) {
        let mut state = self.lock();
        if !state.is_register(function, offset) {
            return;
        }
        let broken = state.functions.get_mut(&function).map(|found| found.write(offset, value));
        let named = broken.into_iter().flatten().map(|rule| format!("function {:#06x}: {rule}", function.0));
        state.violations.extend(named);
    }
}

impl fmt::Debug for ConfigurationSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.lock().functions.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FUNCTION: StreamId = StreamId(0x20);
    const PASID_ON: (u16, u32) = (0x114, 1 << 16);
    const ATS_ON: (u16, u32) = (0x104, 1 << 31);
    const PRI_RESET: (u16, u32) = (0x124, 2);
    const PRI_ON: (u16, u32) = (0x124, 1);
    const ALLOCATE_32: (u16, u32) = (0x12C, 32);

    fn space(abilities: Abilities) -> ConfigurationSpace {
        let space = ConfigurationSpace::new();
        space.add(FUNCTION, abilities);
        space
    }

    fn write(space: &ConfigurationSpace, writes: &[(u16, u32)]) {
        for &(offset, value) in writes {
            space.write32(FUNCTION, offset, value);
        }
    }

    /// The chain of extended capabilities: ID and place of each.
    fn chain(space: &ConfigurationSpace) -> Vec<(u32, u32)> {
        let mut found = Vec::new();
        let mut at = 0x100;
        while at != 0 {
            let header = space.read32(FUNCTION, at as u16);
            found.push((header & 0xFFFF, at));
            at = header >> 20;
        }
        found
    }

    #[test]
    fn capabilities_are_chained_as_far_as_they_are_there() {
        let without = |pasid_bits, page_requests| Abilities { pasid_bits, page_requests, ..Abilities::FULL };

        assert_eq!(chain(&space(Abilities::FULL)), [(0x0F, 0x100), (0x1B, 0x110), (0x13, 0x120)]);
        assert_eq!(chain(&space(without(None, Some(1)))), [(0x0F, 0x100), (0x13, 0x120)]);
        assert_eq!(chain(&space(without(Some(20), None))), [(0x0F, 0x100), (0x1B, 0x110)]);
        assert_eq!(chain(&space(without(None, None))), [(0x0F, 0x100)]);
    }

    #[test]
    fn an_absent_function_reads_as_ones_and_drops_writes() {
        let space = space(Abilities::FULL);

        space.write32(StreamId(0x28), 0x04, 7);

        assert_eq!(space.read32(StreamId(0x28), 0), u32::MAX);
        assert_eq!(space.enabled(StreamId(0x28)), None);
        space.remove(FUNCTION);
        assert_eq!(space.read32(FUNCTION, 0), u32::MAX);
        assert_eq!(space.violations(), [""; 0]);
    }

    #[test]
    fn a_fresh_function_is_off_stopped_and_says_what_it_can() {
        let space = space(Abilities { invalidate_queue_depth: 8, ..Abilities::FULL });

        assert_eq!(space.read32(FUNCTION, 0x104), 0x0000_0028);
        assert_eq!(space.read32(FUNCTION, 0x114), 0x0000_1400);
        assert_eq!(space.read32(FUNCTION, 0x124), 0x8100_0000);
        assert_eq!([space.read32(FUNCTION, 0x128), space.read32(FUNCTION, 0x12C)], [64, 0]);
    }

    #[test]
    fn all_page_requests_of_the_capacity_may_be_allocated() {
        let space = space(Abilities::FULL);

        write(&space, &[ATS_ON, (0x12C, 64), PRI_ON]);

        assert_eq!(space.enabled(FUNCTION).map(|on| on.allocation), Some(64));
        assert_eq!(space.violations(), [""; 0]);
    }

    #[test]
    fn the_right_order_breaks_no_rule() {
        let space = space(Abilities::FULL);

        write(&space, &[(0x04, 6), PASID_ON, ATS_ON, PRI_RESET, ALLOCATE_32, PRI_ON]);

        let expected =
            Enabled { bus_master: true, ats: true, pasid: true, page_requests: true, allocation: 32 };
        assert_eq!(space.enabled(FUNCTION), Some(expected));
        assert_eq!(space.read32(FUNCTION, 0x124), 0x8000_0001, "not stopped while on");
        write(&space, &[(0x124, 0), (0x104, 0), (0x114, 0)]);
        assert_eq!(space.read32(FUNCTION, 0x124), 0x8100_0000);
        assert_eq!(space.violations(), [""; 0]);
    }

    #[test]
    fn each_wrong_order_breaks_its_rule() {
        let cases: &[(&[(u16, u32)], &str)] = &[
            (&[ATS_ON, PASID_ON], "PASID Control changes while ATS is on"),
            (&[PASID_ON, ATS_ON, (0x114, 0)], "PASID Control changes while ATS is on"),
            (&[(0x114, 3 << 16)], "not supported"),
            (&[(0x114, 1 << 19)], "PASID Control: reserved"),
            (&[(0x104, 1 << 21)], "ATS Control: reserved"),
            (&[ATS_ON, (0x104, 1 << 31 | 1 << 16)], "STU changes while ATS is on"),
            (&[PRI_ON], "while ATS is off"),
            (&[ATS_ON, PRI_ON, (0x104, 0)], "before page requests do"),
            (&[ATS_ON, PRI_ON, (0x124, 3)], "reset while they are on"),
            (&[ATS_ON, (0x124, 3)], "reset while they are on"),
            (&[ATS_ON, PRI_ON, ALLOCATE_32], "the allocation changes"),
            (&[(0x12C, 65)], "than the capacity"),
            (&[(0x124, 4)], "Page Request Control: reserved"),
            (&[(0x1000, 0)], "is no register"),
            (&[(0x102, 0)], "is no register"),
        ];
        for (writes, rule) in cases {
            let space = space(Abilities::FULL);

            write(&space, writes);

            let broken = space.violations();
            assert!(broken.len() == 1 && broken[0].contains(rule), "{broken:?} is not {rule:?}");
        }
    }

    #[test]
    fn page_requests_do_not_go_on_before_the_function_stopped() {
        let space = space(Abilities::FULL);
        space.set_waiting(FUNCTION, true);
        assert_eq!(space.read32(FUNCTION, 0x124), 0x8000_0000);

        write(&space, &[ATS_ON, PRI_ON]);

        assert_eq!(space.violations().len(), 1);
    }

    #[test]
    fn a_response_failure_is_cleared_by_a_one_or_a_reset() {
        for clear in [(0x124, 1 << 16), PRI_RESET] {
            let space = space(Abilities::FULL);
            space.response_failure(FUNCTION);

            write(&space, &[(0x124, 0)]);
            assert_eq!(space.read32(FUNCTION, 0x124), 0x8101_0000);
            write(&space, &[clear]);

            assert_eq!(space.read32(FUNCTION, 0x124), 0x8100_0000);
            assert_eq!(space.violations(), [""; 0]);
        }
    }

    #[test]
    fn what_was_left_enabled_stays_on_until_a_reset() {
        let space = space(Abilities { left_enabled: true, ..Abilities::FULL });
        let on = Enabled { bus_master: false, ats: true, pasid: true, page_requests: true, allocation: 64 };
        assert_eq!(space.enabled(FUNCTION), Some(on));

        space.reset(FUNCTION);

        let off =
            Enabled { bus_master: false, ats: false, pasid: false, page_requests: false, allocation: 0 };
        assert_eq!(space.enabled(FUNCTION), Some(off));
    }
}
