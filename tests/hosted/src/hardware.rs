//! How the units behave that a scenario runs on.

/// How the units of a test program behave: its scenarios are the same behind all of them, and so is their end.
///
/// A scenario is told by the program that includes it. One that sets the time of its unit itself, or that asks for what
/// is promised only of prompt hardware, says [`Hardware::Prompt`], and why.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Hardware {
    /// What is queued is executed at once, and what is written to a register acknowledged soon.
    Prompt,
    /// What is queued is executed one entry for every few looks of the driver, out of order where the manual promises
    /// none; what is written to a register is acknowledged late.
    Slow,
    /// As late, and in order; and whoever submits something through a machine finds the queue full first, where that can be
    /// filled, and makes do with the first room that there is.
    Full,
}

impl Hardware {
    /// How many looks of the driver a unit takes for an entry of its queue; `None` is at once.
    pub(crate) fn looks(self) -> Option<u32> {
        match self {
            Self::Prompt => None,
            Self::Slow => Some(7),
            Self::Full => Some(8),
        }
    }

    /// How many looks it takes, at least, to acknowledge what was written to a register.
    pub(crate) fn acknowledges_after(self) -> u32 {
        match self {
            Self::Prompt => 0,
            Self::Slow => 40,
            Self::Full => 10,
        }
    }
}
