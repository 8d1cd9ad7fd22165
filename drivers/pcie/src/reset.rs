//! Function-level reset, in steps that never wait.

use crate::{
    BAR0, BUS_MASTER, COMMAND_ONLY, COMMAND_STATUS, ConfigSpace, Error, Function, HEADER_TYPE, MEMORY_SPACE,
    NOT_READY, VENDOR_DEVICE, VF_ENABLE,
};
use iommu::Completion;

/// How long transactions of a function that may issue no more may stay outstanding, in microseconds.
///
/// The specification sets completion time-outs of up to 50 ms for what is not configured otherwise, and 64 s
/// at most. One second is long enough for the first and short enough for an owner who waits.
pub const IDLE_LIMIT_US: u64 = 1_000_000;
/// How long a function is left alone after its reset began, in microseconds: the specification's 100 ms.
pub const SETTLE_US: u64 = 100_000;
/// How long after its reset began a function may say that it is not ready, in microseconds: the
/// specification's second.
pub const READY_LIMIT_US: u64 = 1_000_000;

/// `Function Level Reset Capability` of the Device Capabilities register.
const EXPRESS_CAPABLE: u32 = 1 << 28;
/// `Initiate Function Level Reset` of the Device Control register.
const EXPRESS_RESET: u32 = 1 << 15;
/// `Transactions Pending` of the Device Status register, which shares the word with Device Control.
const EXPRESS_PENDING: u32 = 1 << 21;
/// `Transactions Pending` and `Function Level Reset` of the AF Capabilities register, with the length of 6
/// before them.
const ADVANCED_CAPABLE: u32 = 0b11 << 24 | 6 << 16;
/// `Initiate FLR` of the AF Control register.
const ADVANCED_RESET: u32 = 1 << 0;
/// `Transactions Pending` of the AF Status register, the byte after AF Control.
const ADVANCED_PENDING: u32 = 1 << 8;

const NAME: &str = "function-level reset";

/// A function-level reset, from one owner of a function to the next.
///
/// Before [`begin`](Self::begin), block the function in its unit, and invalidate its device TLB while it can
/// still answer: nothing may be invalidated there during the reset. Answer no page request of it afterwards;
/// they are gone.
///
/// When it is done, the function has its BARs, Command and Device Control as before, but issues nothing: bus
/// master, PASID, ATS and PRI are off, and so are its interrupts. After an error it is in no state to be
/// given to anybody; keep it blocked.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
#[must_use = "a reset that is not polled to its end leaves the function unusable"]
pub struct Reset {
    function: Function,
    way: Way,
    step: Step,
    /// When the step, or from the reset on the reset, began.
    since_us: u64,
    saved: Saved,
}

/// By which capability, and where it is.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
enum Way {
    Express(u16),
    Advanced(u16),
}

#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
enum Step {
    /// Transactions that were issued before may still be outstanding.
    Idle,
    /// The reset began; the function is left alone.
    Settle,
    /// It is asked whether it is ready.
    Ready,
    Over(Result<(), Error>),
}

/// What a reset takes away, and its end gives back.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
struct Saved {
    identity: u32,
    command: u32,
    device_control: u32,
    bars: [u32; 6],
}

impl Reset {
    /// Turns off all that `function` issues, and begins to reset it. `now_us` is the caller's clock, in
    /// microseconds.
    ///
    /// A bridge has no such reset, and a function with virtual functions is refused one: it would end them
    /// too.
    pub fn begin(config: &impl ConfigSpace, function: &Function, now_us: u64) -> Result<Self, Error> {
        let bridge = function.read(config, HEADER_TYPE)? & 0x7F_0000 != 0;
        let way = Way::of(function, config)?.filter(|_| !bridge);
        let way = way.ok_or(Error::Unsupported { function: function.id, capability: NAME })?;
        if let Some(sriov) = function.sriov
            && function.read(config, sriov + 8)? & VF_ENABLE != 0
        {
            return Err(Error::VirtualFunctions { function: function.id });
        }
        let saved = Saved {
            identity: config.read32(function.id, VENDOR_DEVICE),
            bars: core::array::from_fn(|n| config.read32(function.id, BAR0 + 4 * n as u16)),
            device_control: match function.express {
                Some(at) => function.read(config, at + 8)? & 0xFFFF & !EXPRESS_RESET,
                None => 0,
            },
            // Last, so that what was read before it is the function's, too.
            command: function.read(config, COMMAND_STATUS)? & COMMAND_ONLY & !BUS_MASTER,
        };
        function.disable_page_requests(config);
        function.disable_bus_master(config);
        Ok(Self { function: *function, way, step: Step::Idle, since_us: now_us, saved })
    }

    /// Takes the reset as far as it goes at `now_us`, without waiting. Once it is over, the result stays.
    pub fn poll(&mut self, config: &impl ConfigSpace, now_us: u64) -> Result<Completion, Error> {
        let waited_us = now_us.saturating_sub(self.since_us);
        let next = match self.step {
            Step::Idle => self.idle(config, now_us, waited_us),
            Step::Settle if waited_us < SETTLE_US => Ok(Step::Settle),
            Step::Settle | Step::Ready => self.ready(config, waited_us),
            Step::Over(result) => Ok(Step::Over(result)),
        };
        self.step = next.unwrap_or_else(|error| Step::Over(Err(error)));
        match self.step {
            Step::Over(result) => result.map(|()| Completion::Done),
            _ => Ok(Completion::Pending),
        }
    }

    /// Resets the function once nothing is outstanding: a completion that came afterwards could be taken for
    /// another's.
    fn idle(&mut self, config: &impl ConfigSpace, now_us: u64, waited_us: u64) -> Result<Step, Error> {
        let function = &self.function;
        let (at, pending) = match self.way {
            Way::Express(at) => (at + 8, EXPRESS_PENDING),
            Way::Advanced(at) => (at + 4, ADVANCED_PENDING),
        };
        if function.read(config, at)? & pending != 0 {
            let step = "Transactions Pending";
            let over = Err(Error::Timeout { function: function.id, step, waited_us });
            return if waited_us < IDLE_LIMIT_US { Ok(Step::Idle) } else { over };
        }
        let reset = match self.way {
            // The upper half is Device Status, write-one-to-clear.
            Way::Express(_) => self.saved.device_control | EXPRESS_RESET,
            Way::Advanced(_) => ADVANCED_RESET,
        };
        config.write32(function.id, at, reset);
        self.since_us = now_us;
        Ok(Step::Settle)
    }

    /// Gives the function its configuration back once it answers.
    fn ready(&self, config: &impl ConfigSpace, waited_us: u64) -> Result<Step, Error> {
        let (function, saved) = (&self.function, &self.saved);
        let identity = config.read32(function.id, VENDOR_DEVICE);
        // A virtual function reads all ones there even when it is well.
        let command = match identity {
            NOT_READY => u32::MAX,
            _ => config.read32(function.id, COMMAND_STATUS),
        };
        if command == u32::MAX {
            return match identity {
                _ if waited_us < READY_LIMIT_US => Ok(Step::Ready),
                NOT_READY => {
                    Err(Error::Timeout { function: function.id, step: "Request Retry Status", waited_us })
                }
                _ => Err(Error::Absent { function: function.id }),
            };
        }
        if identity != saved.identity {
            return Err(Error::Replaced { function: function.id });
        }
        // The reset clears Command.
        if command & saved.command & MEMORY_SPACE != 0 {
            return Err(Error::Rejected { function: function.id, capability: NAME });
        }
        for (n, bar) in saved.bars.into_iter().enumerate() {
            config.write32(function.id, BAR0 + 4 * n as u16, bar);
        }
        if let Some(at) = function.express {
            config.write32(function.id, at + 8, saved.device_control);
        }
        config.write32(function.id, COMMAND_STATUS, saved.command);
        function.read(config, COMMAND_STATUS)?;
        Ok(Step::Over(Ok(())))
    }
}

impl Way {
    /// Returns how `function` can be reset: by the PCI Express capability, or where that cannot by Advanced
    /// Features.
    fn of(function: &Function, config: &impl ConfigSpace) -> Result<Option<Self>, Error> {
        if let Some(at) = function.express
            && function.read(config, at + 4)? & EXPRESS_CAPABLE != 0
        {
            return Ok(Some(Self::Express(at)));
        }
        match function.advanced {
            Some(at) if function.read(config, at)? >> 16 & 0x3FF == ADVANCED_CAPABLE >> 16 => {
                Ok(Some(Self::Advanced(at)))
            }
            _ => Ok(None),
        }
    }
}
