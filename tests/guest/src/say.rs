//! Lines for the hypervisor's log, and failures that have been said there.

use channel::Call;
use core::fmt;

/// The longest line that the hypervisor takes, in bytes.
const LINE_BYTES: usize = 128;

/// The task failed; why has been said in the log.
#[derive(Debug)]
pub struct Failed;

/// A line, cut off where it gets too long.
pub struct Line {
    bytes: [u8; LINE_BYTES],
    used: usize,
}

impl Line {
    /// An empty line.
    pub const fn new() -> Self {
        Self { bytes: [0; LINE_BYTES], used: 0 }
    }

    /// Sends the line.
    pub fn send(&self) {
        // A line that the hypervisor does not take is lost: there is nowhere else to say so.
        let _ = crate::calls::ask(Call::Say, [self.bytes.as_ptr().addr() as u64, self.used as u64, 0, 0]);
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = &mut self.bytes[self.used..];
        let taken = text.floor_char_boundary(room.len());
        room[..taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.used += taken;
        Ok(())
    }
}

/// Says a formatted line in the hypervisor's log.
#[macro_export]
macro_rules! say {
    ($($format:tt)*) => {{
        let mut line = $crate::say::Line::new();
        // A `Line` takes everything; what does not fit is cut off.
        let _ = core::fmt::Write::write_fmt(&mut line, format_args!($($format)*));
        line.send();
    }};
}

/// Says a formatted line and returns [`Failed`], unless a condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($format:tt)*) => {
        if !$condition {
            $crate::say!($($format)*);
            return Err($crate::say::Failed);
        }
    };
}
