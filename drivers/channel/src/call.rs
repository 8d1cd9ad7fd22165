//! The operations that a guest may ask of the hypervisor.
//!
//! A call has a number and four arguments, and returns a [`Status`] and three values. Unknown numbers, and arguments
//! that name nothing, are refused by name.

/// Answered by [`Call::Probe`]; a guest that finds another version must not go on.
pub const VERSION: u64 = 1;
/// Entries of an array that one call handles, at most; what is left is asked for again.
pub const ARRAY: u64 = 16;
/// As PASID: none. As deadline: the default.
pub const NONE: u64 = u64::MAX;
/// How long a guest may take to answer, in microseconds, if it asks for nothing else.
pub const DEADLINE_US: u64 = 100_000;
/// The longest deadline that a guest can ask for, in microseconds.
pub const DEADLINE_MAX_US: u64 = 10_000_000;

macro_rules! numbered {
    ($(#[$outer:meta])* pub enum $name:ident { $($(#[$doc:meta])* $variant:ident = $number:literal,)* }) => {
        $(#[$outer])*
        #[derive(Clone, Copy, Debug, Eq, PartialEq)]
        #[cfg_attr(feature = "defmt", derive(defmt::Format))]
        #[repr(u64)]
        pub enum $name { $($(#[$doc])* $variant = $number,)* }

        impl $name {
            /// Returns what `number` stands for, if it stands for anything.
            pub const fn from_number(number: u64) -> Option<Self> {
                match number {
                    $($number => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

numbered! {
    /// An operation.
    pub enum Call {
        /// What there is. Argument: 0, or the number of a device from 1. Returns for 0: version, devices, the
        /// first PASID that may be attached, or [`NONE`]; for a device: address and size of its registers in the guest's memory,
        /// vendor and device identity (15:0, 31:16).
        Probe = 0,
        /// Opens the fault channel. Returns its address in the guest's memory; once only.
        OpenChannel = 1,
        /// Attaches a device. Arguments: device, PASID or [`NONE`], opaque value, deadline in microseconds or [`NONE`].
        /// Returns a name for the attachment.
        Attach = 2,
        /// Detaches. Argument: attachment. Everything outstanding is answered when it returns.
        Detach = 3,
        /// Maps memory of the guest for an attachment. Arguments: attachment with [`WRITABLE`] or not, device address,
        /// guest address, bytes.
        Map = 4,
        /// Unmaps. Arguments: attachment, device address, bytes. Nothing reaches the memory any more when it is done;
        /// after [`Status::TimedOut`] the device may, until it is detached.
        Unmap = 5,
        /// Answers page requests. Arguments: guest address of an array of {cookie, [`Code`]}, its length. Returns how many
        /// were handled, and how many of those were refused.
        Respond = 6,

        /// Demonstration: what this guest is to do. Returns a task and two values.
        Task = 0x100,
        /// Demonstration: a line for the log. Arguments: guest address, bytes (at most 128).
        Say = 0x101,
        /// Demonstration: a number for the report. Arguments: which, from 0; value.
        Report = 0x102,
        /// Demonstration: the task is done. Argument: 1 if all went as expected.
        Finish = 0x103,
        /// Demonstration: waits for an interrupt, or for so many microseconds. Argument: microseconds.
        Sleep = 0x104,
    }
}

numbered! {
    /// How a call ended.
    pub enum Status {
        /// It was done.
        Done = 0,
        /// There is no such operation.
        UnknownCall = 1,
        /// An argument names nothing of this guest's: a device, an attachment, memory.
        NotYours = 2,
        /// An argument is malformed: not whole pages, a PASID of more bits, too long.
        Malformed = 3,
        /// It is so already, or not in a state for this.
        WrongState = 4,
        /// There is no room for more.
        NoRoom = 5,
        /// Hardware did not complete it in time. What it concerns stays blocked and out of use.
        TimedOut = 6,
    }
}

numbered! {
    /// How a guest answers a group.
    pub enum Code {
        /// The pages are there.
        Success = 0,
        /// They will not be.
        Invalid = 1,
    }
}

/// In the attachment argument of [`Call::Map`]: the device may write.
pub const WRITABLE: u64 = 1 << 63;

/// Numbers that [`Call::Report`] takes.
pub const REPORTS: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_operations_are_the_same_thing() {
        for number in (0..16).chain(0x100..0x110) {
            assert!(Call::from_number(number).is_none_or(|call| call as u64 == number));
        }
        assert_eq!(Call::from_number(6), Some(Call::Respond));
        assert_eq!(Call::from_number(7), None);
        assert_eq!(Code::from_number(15), None, "a guest cannot say response failure");
    }
}
