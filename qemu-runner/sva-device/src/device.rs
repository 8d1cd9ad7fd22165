// SPDX-License-Identifier: GPL-2.0-or-later
//! The state of one device: its lanes, its device TLB, its counters. Nothing here calls QEMU.

use crate::{
    operation::{Access, Operation, Pasid},
    registers::{LANES, LaneWord, MAGIC, PAGE_MAX, Word, control},
    tlb::{Tlb, Translation},
};

/// Number of page request group indices (PRGI); they are 9 bits wide.
const PRGIS: u16 = 512;

/// One device.
#[derive(Default)]
pub(crate) struct Device {
    lanes: [Lane; LANES],
    tlb: Tlb,
    counters: Counters,
    next_prgi: u16,
    /// Serial number of the last operation that began. It outlives every reset, which is how a turn that was
    /// scheduled before a reset is told from one that was scheduled after it.
    serial: u64,
}

#[derive(Default)]
struct Counters {
    stray: u32,
    invalidations: u32,
    groups: u32,
    requests: u32,
    responses: u32,
}

#[derive(Default)]
struct Lane {
    address: u64,
    data: u64,
    length: u32,
    pasid: u32,
    delay_us: u32,
    control: u32,
    stage: Stage,
    /// The operation that the lane last began.
    serial: u64,
    /// The code of the last response.
    answer: Option<u32>,
    /// The index of the last group.
    prgi: u16,
    rounds: u32,
    pages: u32,
}

/// How far a lane is with its operation.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Stage {
    #[default]
    Idle,
    /// The engine has been asked for a turn.
    Due,
    /// The engine is at work.
    Running,
    /// The group of the lane's `prgi` is outstanding.
    Waiting(Pasid),
    Done,
    Failed(Failure),
}

/// Why an operation failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Failure {
    pub(crate) cause: Cause,
    /// What the cause says it is: an errno, a response code, a memory transaction result, or 0.
    pub(crate) detail: u16,
}

/// Kinds of failure, numbered as in a lane's `STATUS`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Cause {
    /// The registers describe no operation.
    BadParameters = 1,
    /// QEMU refused the ATS request; detail: errno.
    AtsRefused = 2,
    /// QEMU refused a page request, or to tell us of responses; detail: errno.
    RequestRefused = 3,
    /// The response was Invalid Request; detail: its code.
    InvalidResponse = 4,
    /// The response was Response Failure; detail: its code.
    FailureResponse = 5,
    /// Pages were still missing after the last group that was allowed.
    TooManyRounds = 6,
    /// ATS could not translate a page, and no page request was allowed.
    NotMapped = 7,
    /// The memory transaction failed; detail: QEMU's result.
    DmaError = 8,
    /// This machine cannot do that.
    Unsupported = 9,
}

/// A claim on the engine: lane and operation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Turn {
    pub(crate) lane: usize,
    serial: u64,
}

/// What the engine is to go on with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    /// The operation, if the registers describe one.
    pub(crate) operation: Option<Operation>,
    /// The response that the lane waited for.
    pub(crate) answer: Option<u32>,
    /// Groups sent for this operation so far.
    pub(crate) rounds: u32,
}

impl Device {
    /// Returns the 4 or 8 bytes at `offset` of BAR 0.
    pub(crate) fn read(&self, offset: u64, bytes: u32) -> u64 {
        let low = u64::from(self.read_word(offset));
        if bytes == 8 { low | u64::from(self.read_word(offset | 4)) << 32 } else { low }
    }

    /// Stores 4 or 8 bytes at `offset` of BAR 0; returns the turn that this makes due, if any.
    pub(crate) fn write(&mut self, offset: u64, value: u64, bytes: u32) -> Option<Turn> {
        let turn = self.write_word(offset, value as u32);
        if bytes != 8 {
            return turn;
        }
        // No two neighbours both start an operation.
        turn.or(self.write_word(offset | 4, (value >> 32) as u32))
    }

    /// Returns how long after it became due `turn` is to be taken, in microseconds of the guest's time.
    pub(crate) fn delay_us(&self, turn: Turn) -> u32 {
        let is_first = |lane: &&Lane| lane.serial == turn.serial && lane.answer.is_none();
        self.lanes.get(turn.lane).filter(is_first).map_or(0, |lane| lane.delay_us)
    }

    fn read_word(&self, offset: u64) -> u32 {
        let counters = &self.counters;
        match Word::at(offset) {
            Some(Word::MagicLow) => MAGIC as u32,
            Some(Word::MagicHigh) => (MAGIC >> 32) as u32,
            Some(Word::Lanes) => LANES as u32,
            Some(Word::PageMax) => PAGE_MAX as u32,
            Some(Word::Stray) => counters.stray,
            Some(Word::Invalidations) => counters.invalidations,
            Some(Word::Outstanding) => self.lanes.iter().filter(|lane| lane.is_waiting()).count() as u32,
            Some(Word::Groups) => counters.groups,
            Some(Word::Requests) => counters.requests,
            Some(Word::Responses) => counters.responses,
            Some(Word::Lane(lane, word)) => self.lanes[lane].read(word),
            Some(Word::Reset) | None => 0,
        }
    }

    fn write_word(&mut self, offset: u64, value: u32) -> Option<Turn> {
        match Word::at(offset)? {
            Word::Reset if value == 1 => self.reset_function(),
            Word::Lane(at, word) => {
                let lane = &mut self.lanes[at];
                if lane.write(word, value) {
                    self.serial += 1;
                    lane.serial = self.serial;
                    return Some(Turn { lane: at, serial: self.serial });
                }
            }
            _ => {}
        }
        None
    }

    /// Returns to the state of power-on, except that group indices continue: a late response to a group that is
    /// now forgotten must not find another group under the same index.
    pub(crate) fn reset_function(&mut self) {
        *self = Self { next_prgi: self.next_prgi, serial: self.serial, ..Self::default() };
    }

    /// Returns to the state of power-on.
    pub(crate) fn power_on(&mut self) {
        self.reset_function();
        self.next_prgi = 0;
    }

    /// Gives the engine `turn`, unless it is no longer due.
    pub(crate) fn take(&mut self, turn: Turn) -> Option<Job> {
        let lane = self.lane(turn).filter(|lane| lane.stage == Stage::Due)?;
        lane.stage = Stage::Running;
        let Lane { control, address, data, length, pasid, .. } = *lane;
        let operation = Operation::parse(control, address, data, length, pasid);
        Some(Job { operation, answer: lane.answer, rounds: lane.rounds })
    }

    /// Picks the index of a new group for the operation of `turn`, or nothing when the operation is no more.
    ///
    /// With `answered`, the lane waits from now on: an answer may come before the last request has returned.
    pub(crate) fn open_group(&mut self, turn: Turn, access: Access, answered: bool) -> Option<u16> {
        let in_use = |prgi: u16| self.lanes.iter().any(|lane| lane.is_waiting() && lane.prgi == prgi);
        // Lanes are fewer than indices, so one is free.
        let prgi = (0..PRGIS).map(|n| (self.next_prgi + n) % PRGIS).find(|prgi| !in_use(*prgi))?;
        let lane = self.lane(turn)?;
        lane.prgi = prgi;
        if answered {
            lane.stage = Stage::Waiting(access.pasid);
        }
        self.next_prgi = (prgi + 1) % PRGIS;
        Some(prgi)
    }

    /// Counts a page request that was sent for the operation of `turn`; `closes` when its group is thereby whole.
    pub(crate) fn sent(&mut self, turn: Turn, closes: bool) {
        let Some(lane) = self.lane(turn) else { return };
        lane.pages = lane.pages.wrapping_add(1);
        lane.rounds = lane.rounds.wrapping_add(closes.into());
        self.counters.requests = self.counters.requests.wrapping_add(1);
        self.counters.groups = self.counters.groups.wrapping_add(closes.into());
    }

    /// Takes a page group response; returns the turn that it makes due, or nothing when it is stray.
    pub(crate) fn respond(&mut self, pasid: Pasid, prgi: u16, code: u32) -> Option<Turn> {
        let group = |lane: &Lane| lane.stage == Stage::Waiting(pasid) && lane.prgi == prgi;
        let Some(at) = self.lanes.iter().position(group) else {
            self.counters.stray = self.counters.stray.wrapping_add(1);
            return None;
        };
        self.counters.responses = self.counters.responses.wrapping_add(1);
        let lane = &mut self.lanes[at];
        lane.answer = Some(code);
        lane.stage = Stage::Due;
        Some(Turn { lane: at, serial: lane.serial })
    }

    /// Ends the operation of `turn`, with the new `DATA` if it read memory; returns whether there was one to end.
    pub(crate) fn end(&mut self, turn: Turn, outcome: Result<Option<u64>, Failure>) -> bool {
        let Some(lane) = self.lane(turn) else { return false };
        match outcome {
            Ok(data) => {
                lane.data = data.unwrap_or(lane.data);
                lane.stage = Stage::Done;
            }
            Err(failure) => lane.stage = Stage::Failed(failure),
        }
        true
    }

    /// Returns a translation that the device TLB has of `page` for `access`.
    pub(crate) fn lookup(&self, access: Access, page: u64) -> Option<Translation> {
        self.tlb.lookup(access, page)
    }

    /// Keeps `translation` in the device TLB.
    pub(crate) fn fill(&mut self, access: Access, translation: Translation) {
        self.tlb.fill(access, translation);
    }

    /// Drops all that the device TLB holds.
    pub(crate) fn forget_translations(&mut self) {
        self.tlb.clear();
    }

    /// Takes a device-TLB invalidation of `first` to `last` in `pasid`; returns how many translations it dropped.
    pub(crate) fn invalidate(&mut self, pasid: Pasid, first: u64, last: u64) -> usize {
        self.counters.invalidations = self.counters.invalidations.wrapping_add(1);
        self.tlb.invalidate(pasid, first, last)
    }

    /// Returns the lane of `turn` while the operation is the same and has not ended.
    fn lane(&mut self, turn: Turn) -> Option<&mut Lane> {
        self.lanes.get_mut(turn.lane).filter(|lane| lane.serial == turn.serial && lane.is_busy())
    }
}

impl Lane {
    fn is_waiting(&self) -> bool {
        matches!(self.stage, Stage::Waiting(_))
    }

    fn is_busy(&self) -> bool {
        matches!(self.stage, Stage::Due | Stage::Running | Stage::Waiting(_))
    }

    fn read(&self, word: LaneWord) -> u32 {
        match word {
            LaneWord::AddrLow => self.address as u32,
            LaneWord::AddrHigh => (self.address >> 32) as u32,
            LaneWord::DataLow => self.data as u32,
            LaneWord::DataHigh => (self.data >> 32) as u32,
            LaneWord::Len => self.length,
            LaneWord::Pasid => self.pasid,
            LaneWord::Control => 0,
            LaneWord::Status => match self.stage {
                Stage::Idle => 0,
                Stage::Due | Stage::Running | Stage::Waiting(_) => 1,
                Stage::Done => 2,
                Stage::Failed(Failure { cause, detail }) => 3 | (cause as u32) << 8 | u32::from(detail) << 16,
            },
            LaneWord::Response => {
                let answer = self.answer.map_or(0, |code| code & 0xff | 1 << 8);
                answer | u32::from(self.prgi) << 16
            }
            LaneWord::Rounds => self.rounds,
            LaneWord::Pages => self.pages,
            LaneWord::Delay => self.delay_us,
        }
    }

    /// Stores a word; returns whether this begins an operation.
    fn write(&mut self, word: LaneWord, value: u32) -> bool {
        if self.is_busy() {
            return false;
        }
        match word {
            LaneWord::AddrLow => set_low(&mut self.address, value),
            LaneWord::AddrHigh => set_high(&mut self.address, value),
            LaneWord::DataLow => set_low(&mut self.data, value),
            LaneWord::DataHigh => set_high(&mut self.data, value),
            LaneWord::Len => self.length = value,
            LaneWord::Pasid => self.pasid = value & 0xf_ffff,
            LaneWord::Delay => self.delay_us = value,
            LaneWord::Control if value & control::GO != 0 => {
                let Self { address, data, length, pasid, delay_us, .. } = *self;
                *self = Self { address, data, length, pasid, delay_us, control: value, ..Self::default() };
                self.stage = Stage::Due;
                return true;
            }
            LaneWord::Control
            | LaneWord::Status
            | LaneWord::Response
            | LaneWord::Rounds
            | LaneWord::Pages => {}
        }
        false
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = *register & !0xffff_ffff | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = *register & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCESS: Access = Access { pasid: Pasid(Some(5)), privileged: false, write: false };
    const LANE_2: u64 = 0x100 + 2 * 0x40;

    /// Begins an operation on lane `lane` and lets the engine take it.
    fn begin(device: &mut Device, lane: u64) -> Turn {
        let turn = device.write(0x100 + lane * 0x40 + 0x18, control::GO.into(), 4).expect("the lane is idle");
        device.take(turn).expect("the turn is due");
        turn
    }

    fn status(device: &Device, lane: u64) -> u64 {
        device.read(0x100 + lane * 0x40 + 0x1c, 4)
    }

    #[test]
    fn an_eight_byte_access_is_two_four_byte_accesses() {
        let mut device = Device::default();

        device.write(LANE_2, 0x1122_3344_5566_7788, 8);
        device.write(LANE_2 + 0x10, 0x7ff5_0000_1000, 8);

        assert_eq!(device.read(LANE_2, 8), 0x1122_3344_5566_7788);
        assert_eq!(device.read(LANE_2 + 4, 4), 0x1122_3344);
        assert_eq!(device.read(LANE_2 + 0x10, 4), 0x1000);
        assert_eq!(device.read(LANE_2 + 0x14, 4), 0x7ff5);
        assert_eq!(device.read(0x000, 8), MAGIC);
        assert_eq!(device.read(0x008, 8), 16 << 32 | 8);
    }

    #[test]
    fn unknown_and_write_only_registers_read_zero() {
        let mut device = Device::default();

        device.write(0x02c, u64::MAX, 4);
        device.write(LANE_2 + 0x18, 0, 4);

        for offset in [0x028, 0x02c, LANE_2 + 0x18, LANE_2 + 0x2c, 0xffc] {
            assert_eq!(device.read(offset, 4), 0, "{offset:#x}");
        }
    }

    #[test]
    fn a_pasid_has_twenty_bits() {
        let mut device = Device::default();

        device.write(LANE_2 + 0x14, 0xffff_ffff, 4);

        assert_eq!(device.read(LANE_2 + 0x14, 4), 0xf_ffff);
    }

    #[test]
    fn an_operation_is_delayed_until_it_starts_and_its_answers_are_not() {
        let mut device = Device::default();
        device.write(LANE_2 + 0x2c, 50_000, 4);

        let turn = device.write(LANE_2 + 0x18, control::GO.into(), 4).expect("the lane is idle");
        assert_eq!((device.delay_us(turn), status(&device, 2)), (50_000, 1));
        device.take(turn).expect("the turn is due");
        let prgi = device.open_group(turn, ACCESS, true).expect("an index is free");
        let answered = device.respond(Pasid(Some(5)), prgi, 0).expect("the group is outstanding");

        assert_eq!(device.delay_us(answered), 0);
        assert_eq!(device.read(LANE_2 + 0x2c, 4), 50_000, "DELAY");
    }

    #[test]
    fn a_busy_lane_ignores_writes() {
        let mut device = Device::default();
        device.write(LANE_2, 0x1000, 8);
        begin(&mut device, 2);

        device.write(LANE_2, 0x2000, 8);
        let again = device.write(LANE_2 + 0x18, control::GO.into(), 4);

        assert_eq!(again, None);
        assert_eq!(device.read(LANE_2, 8), 0x1000);
        assert_eq!(status(&device, 2), 1);
    }

    #[test]
    fn a_control_write_without_go_does_nothing() {
        let mut device = Device::default();

        assert_eq!(device.write(LANE_2 + 0x18, control::WRITE.into(), 4), None);

        assert_eq!(status(&device, 2), 0);
    }

    #[test]
    fn a_response_reaches_the_lane_of_its_pasid_and_index_and_is_counted() {
        let mut device = Device::default();
        let first = begin(&mut device, 0);
        let second = begin(&mut device, 1);
        let prgi = device.open_group(first, ACCESS, true).expect("an index is free");
        let other = device.open_group(second, ACCESS, true).expect("an index is free");

        assert_eq!(device.respond(Pasid(Some(6)), prgi, 0), None);
        assert_eq!(device.respond(Pasid(None), prgi, 0), None);
        assert_eq!(device.respond(Pasid(Some(5)), other + 1, 0), None);
        assert_eq!(device.respond(Pasid(Some(5)), other, 1), Some(second));

        assert_eq!(device.read(0x010, 4), 3, "STRAY");
        assert_eq!(device.read(0x018, 4), 1, "OUTSTANDING");
        assert_eq!(device.read(0x024, 4), 1, "RESPONSES");
        assert_eq!(device.read(0x140 + 0x20, 4), u64::from(other) << 16 | 0x101, "RESPONSE");
        assert_eq!(device.take(second).and_then(|job| job.answer), Some(1));
    }

    #[test]
    fn a_second_response_to_a_group_is_stray() {
        let mut device = Device::default();
        let turn = begin(&mut device, 0);
        let prgi = device.open_group(turn, ACCESS, true).expect("an index is free");

        assert_eq!(device.respond(Pasid(Some(5)), prgi, 0), Some(turn));
        assert_eq!(device.respond(Pasid(Some(5)), prgi, 0), None);

        assert_eq!(device.read(0x010, 4), 1, "STRAY");
    }

    #[test]
    fn an_index_in_use_is_not_picked_again() {
        let mut device = Device::default();
        let waits = begin(&mut device, 0);
        let held = device.open_group(waits, ACCESS, true).expect("an index is free");
        let other = begin(&mut device, 1);

        let picked: Vec<u16> = (0..PRGIS).filter_map(|_| device.open_group(other, ACCESS, false)).collect();

        assert_eq!(picked.len(), usize::from(PRGIS));
        assert!(!picked.contains(&held));
        assert!(picked.iter().all(|prgi| *prgi < PRGIS));
        assert_eq!(picked.first(), picked.last(), "511 are free, so the 512th is the first again");
    }

    #[test]
    fn a_reset_forgets_the_outstanding_group_and_does_not_reuse_its_index() {
        let mut device = Device::default();
        let turn = begin(&mut device, 0);
        let prgi = device.open_group(turn, ACCESS, true).expect("an index is free");
        device.sent(turn, true);

        device.write(0x028, 1, 4);

        assert_eq!(status(&device, 0), 0);
        assert_eq!(device.read(0x01c, 4), 0, "GROUPS");
        let next = begin(&mut device, 0);
        assert_ne!(device.open_group(next, ACCESS, true), Some(prgi));
        assert_eq!(device.respond(Pasid(Some(5)), prgi, 0), None);
        assert_eq!(device.read(0x010, 4), 1, "STRAY");
    }

    #[test]
    fn a_machine_reset_starts_the_group_indices_anew() {
        let mut device = Device::default();
        let turn = begin(&mut device, 0);
        let first = device.open_group(turn, ACCESS, true);

        device.power_on();

        let turn = begin(&mut device, 0);
        assert_eq!(device.open_group(turn, ACCESS, true), first);
    }

    #[test]
    fn only_a_one_resets() {
        let mut device = Device::default();
        begin(&mut device, 0);

        device.write(0x028, 2, 4);

        assert_eq!(status(&device, 0), 1);
    }

    #[test]
    fn a_turn_from_before_a_reset_is_void() {
        let mut device = Device::default();
        let old = device.write(0x118, control::GO.into(), 4).expect("the lane is idle");
        device.power_on();
        let new = device.write(0x118, control::GO.into(), 4).expect("the lane is idle");

        assert!(device.take(old).is_none());
        assert!(!device.end(old, Ok(None)));
        assert!(device.open_group(old, ACCESS, true).is_none());
        assert!(device.take(new).is_some());
    }

    #[test]
    fn an_operation_ends_once() {
        let mut device = Device::default();
        let turn = begin(&mut device, 3);

        assert!(device.end(turn, Err(Failure { cause: Cause::DmaError, detail: 2 })));
        assert!(!device.end(turn, Ok(None)));

        assert_eq!(status(&device, 3), 0x0002_0803);
    }

    #[test]
    fn a_new_operation_clears_what_the_last_one_reported() {
        let mut device = Device::default();
        let turn = begin(&mut device, 0);
        let prgi = device.open_group(turn, ACCESS, true).expect("an index is free");
        device.sent(turn, true);
        device.respond(Pasid(Some(5)), prgi, 1);
        device.end(turn, Ok(Some(7)));
        assert_eq!((device.read(0x124, 4), device.read(0x128, 4)), (1, 1), "ROUNDS and PAGES");

        begin(&mut device, 0);

        assert_eq!(device.read(0x108, 8), 7, "DATA");
        assert_eq!(device.read(0x120, 4), 0, "RESPONSE");
        assert_eq!((device.read(0x124, 4), device.read(0x128, 4)), (0, 0), "ROUNDS and PAGES");
    }
}
