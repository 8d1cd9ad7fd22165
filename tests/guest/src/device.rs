//! The test device `sva-dev`: eight lanes, each a DMA engine that asks for the pages it misses.

use crate::{
    calls::{demand, sleep_until},
    ensure,
    memory::Window,
    say,
    say::Failed,
};
use channel::{Call, call::REQUESTS};
use core::{
    hint::spin_loop,
    sync::atomic::{Ordering, fence},
};

/// Vendor (15:0) and device (31:16) identity of the kind.
const IDENTITY: u64 = 0x5A5A_1B36;
/// The bytes "PSVAV001".
const MAGIC_VALUE: u64 = u64::from_le_bytes(*b"PSVAV001");

const MAGIC: u64 = 0x000;
const STRAY: u64 = 0x010;
const INVALIDATIONS: u64 = 0x014;
const OUTSTANDING: u64 = 0x018;
const GROUPS: u64 = 0x01C;
const RESPONSES: u64 = 0x024;
const RESET: u64 = 0x028;

const LANE: u64 = 0x100;
const LANE_STRIDE: u64 = 0x40;
const LANES: u64 = 8;
const LANE_ADDR: u64 = 0x00;
const LANE_DATA: u64 = 0x08;
const LANE_LEN: u64 = 0x10;
const LANE_PASID: u64 = 0x14;
const LANE_CONTROL: u64 = 0x18;
const LANE_STATUS: u64 = 0x1C;
const LANE_ROUNDS: u64 = 0x24;
const LANE_PAGES: u64 = 0x28;
const LANE_DELAY: u64 = 0x2C;

const GO: u32 = 1 << 0;
/// In an operation's `control`: memory is written; otherwise it is read.
pub const WRITE: u32 = 1 << 1;
/// In an operation's `control`: plain DMA, which asks for no page.
pub const UNTRANSLATED: u32 = 1 << 2;
/// In an operation's `control`: the device TLB is used and filled.
pub const CACHE: u32 = 1 << 5;
/// In an operation's `control`: page requests alone.
pub const RAW: u32 = 1 << 6;
/// With [`RAW`]: the group is left open.
pub const NOT_LAST: u32 = 1 << 7;
/// In an operation's `control`: no PASID.
pub const NO_PASID: u32 = 1 << 8;

/// Cause of a failed lane: the device may send no page requests.
pub const REQUEST_REFUSED: u8 = 3;
/// Cause of a failed lane: the page requests were answered Invalid Request.
pub const INVALID_RESPONSE: u8 = 4;
/// Cause of a failed lane: the memory access failed.
pub const DMA_ERROR: u8 = 8;
/// Cause of a failed lane: the machine has no way to make such a request.
pub const UNSUPPORTED: u8 = 9;

/// Looks at a busy lane before the guest sleeps; most operations end within these.
const POLLS: u32 = 20_000;
/// Steps of the sleep after that, in microseconds.
const STEP_US: u64 = 1_000;
/// Most steps that a lane is waited for: 2 s.
const STEPS: u64 = 2_000;

/// What a lane is to do.
pub struct Operation {
    /// First byte, as the device sees it.
    pub address: u64,
    /// Bytes, a multiple of 8.
    pub bytes: u32,
    /// The PASID to use.
    pub pasid: u32,
    /// First word of a write.
    pub data: u64,
    /// Zero (read), [`WRITE`], [`UNTRANSLATED`] and so on.
    pub control: u32,
}

/// How far a lane is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Status {
    /// Nothing was started since the reset.
    Idle,
    /// It works, or waits for pages.
    Busy,
    /// Done.
    Done,
    /// Failed.
    Failed {
        /// Why.
        cause: u8,
        /// What else the device says of it.
        detail: u16,
    },
}

impl Status {
    /// Returns whether it is a failure for `cause`.
    pub fn is_failure(self, cause: u8) -> bool {
        matches!(self, Self::Failed { cause: found, .. } if found == cause)
    }
}

/// One test device of the guest's.
pub struct Device {
    registers: Window,
    /// It asks for pages that it misses, and keeps translations of its own.
    pub asks_for_pages: bool,
}

impl Device {
    /// Finds the guest's device `number`, which must be of this kind, and resets it.
    pub fn find(number: u64) -> Result<Self, Failed> {
        let [base, bytes, identity] = demand(Call::Probe, [number, 0, 0, 0])?;
        let (asks_for_pages, identity) = (identity & REQUESTS != 0, identity & !REQUESTS);
        ensure!(identity == IDENTITY, "device {number} is {identity:#x}, not the test device");
        let Some(registers) = Window::new(base, bytes) else {
            say!("device {number}: the guest cannot use {bytes:#x} bytes at {base:#x} as registers");
            return Err(Failed);
        };
        let magic = registers.read64(MAGIC);
        ensure!(magic == MAGIC_VALUE, "device {number}: its registers start with {magic:#x}");
        registers.write32(RESET, 1);
        Ok(Self { registers, asks_for_pages })
    }

    /// Returns the device's registers.
    pub fn registers(&self) -> &Window {
        &self.registers
    }

    /// Starts `operation` on `lane`, which must not be busy.
    pub fn start(&self, lane: u64, operation: &Operation) -> Result<(), Failed> {
        self.start_after(0, lane, operation)
    }

    /// Starts `operation` on `lane`, which must not be busy, `delay_us` microseconds from now. The lane is busy until then.
    pub fn start_after(&self, delay_us: u32, lane: u64, operation: &Operation) -> Result<(), Failed> {
        let status = self.status(lane);
        ensure!(status != Status::Busy, "lane {lane} is busy and cannot start anything");
        self.write64(lane, LANE_ADDR, operation.address);
        self.write64(lane, LANE_DATA, operation.data);
        self.write32(lane, LANE_LEN, operation.bytes);
        self.write32(lane, LANE_PASID, operation.pasid);
        self.write32(lane, LANE_DELAY, delay_us);
        // ORDER: what was stored for the device is in memory before it starts.
        fence(Ordering::SeqCst);
        self.write32(lane, LANE_CONTROL, operation.control | GO);
        Ok(())
    }

    /// Returns how far `lane` is.
    pub fn status(&self, lane: u64) -> Status {
        let word = self.read32(lane, LANE_STATUS);
        let status = match word & 0xFF {
            0 => Status::Idle,
            1 => Status::Busy,
            2 => Status::Done,
            _ => Status::Failed { cause: (word >> 8) as u8, detail: (word >> 16) as u16 },
        };
        // ORDER: what the device stored before it ended is loaded after this.
        fence(Ordering::SeqCst);
        status
    }

    /// Waits until `lane` is no longer busy.
    pub fn wait(&self, lane: u64) -> Result<Status, Failed> {
        let ended = || Some(self.status(lane)).filter(|status| *status != Status::Busy);
        for _ in 0..POLLS {
            if let Some(status) = ended() {
                return Ok(status);
            }
            spin_loop();
        }
        sleep_until(STEP_US, STEPS, || Ok(ended()))?.ok_or_else(|| {
            say!("lane {lane} is still busy after {} ms", STEPS * STEP_US / 1000);
            Failed
        })
    }

    /// Waits until `lane` has ended, which must be as `expected` says.
    pub fn expect(&self, lane: u64, expected: Status) -> Result<(), Failed> {
        let status = self.wait(lane)?;
        ensure!(status == expected, "lane {lane} ended as {status:?}, not as {expected:?}");
        Ok(())
    }

    /// Waits until `lane` has failed, which must be for `cause`.
    pub fn expect_failure(&self, lane: u64, cause: u8) -> Result<(), Failed> {
        let status = self.wait(lane)?;
        ensure!(status.is_failure(cause), "lane {lane} ended as {status:?}, not with failure {cause}");
        Ok(())
    }

    /// Returns what `lane` found in the memory that it read: see [`Page::checksum`](crate::memory::Page::checksum).
    pub fn data(&self, lane: u64) -> u64 {
        self.registers.read64(lane_register(lane, LANE_DATA))
    }

    /// Returns the groups that `lane` sent for its operation.
    pub fn rounds(&self, lane: u64) -> u32 {
        self.read32(lane, LANE_ROUNDS)
    }

    /// Returns the page requests that `lane` sent for its operation.
    pub fn pages(&self, lane: u64) -> u32 {
        self.read32(lane, LANE_PAGES)
    }

    /// Returns the number of responses that the device did not wait for.
    pub fn stray(&self) -> u64 {
        self.registers.read32(STRAY).into()
    }

    /// Returns the number of invalidations of the device TLB.
    pub fn invalidations(&self) -> u64 {
        self.registers.read32(INVALIDATIONS).into()
    }

    /// Returns the number of groups that wait for a response.
    pub fn outstanding(&self) -> u64 {
        self.registers.read32(OUTSTANDING).into()
    }

    /// Returns the number of groups that were sent.
    pub fn groups(&self) -> u64 {
        self.registers.read32(GROUPS).into()
    }

    /// Returns the number of responses to groups that were sent.
    pub fn responses(&self) -> u64 {
        self.registers.read32(RESPONSES).into()
    }

    fn read32(&self, lane: u64, register: u64) -> u32 {
        self.registers.read32(lane_register(lane, register))
    }

    fn write32(&self, lane: u64, register: u64, value: u32) {
        self.registers.write32(lane_register(lane, register), value);
    }

    fn write64(&self, lane: u64, register: u64, value: u64) {
        self.registers.write64(lane_register(lane, register), value);
    }
}

fn lane_register(lane: u64, register: u64) -> u64 {
    assert!(lane < LANES, "the device has no such lane");
    LANE + lane * LANE_STRIDE + register
}
