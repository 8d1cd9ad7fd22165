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

numbered! {
    /// An operation.
    pub enum Call {
        /// What there is. Argument: 0, or the number of a device from 1. Returns for 0: version, devices, the
        /// first PASID that may be attached, or [`NONE`]; for a device: address and size of its registers in the guest's memory,
        /// vendor and device identity (15:0, 31:16) with [`REQUESTS`] or not.
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
        /// Forgets translations. Arguments: type of the array ([`Layout`](crate::invalidate::Layout)), its guest
        /// address, its entries. Returns how many were handled, from the first; why the one after those was refused,
        /// or 0 ([`Refused`](crate::invalidate::Refused) in 31:0, the word of the entry in 63:32); the bits that were
        /// wrong. Fewer than all without a refusal: ask again for the rest. An empty array asks whether the type is
        /// known: the status is [`Status::Done`] or [`Status::UnknownType`].
        Invalidate = 7,
        /// Reads the counters of a device. Arguments: device, guest address, bytes. Writes whole words, as many as
        /// there are and fit ([`counters`](crate::counters)). Returns the bytes written.
        Counters = 8,
        /// Attaches a device by a first stage of the guest's own, whose addresses are the guest's. Arguments: device, guest
        /// address of its SMMUv3 stream table entry, as the guest would write it for an SMMU without a second stage, opaque
        /// value. Returns a name for the attachment, for which nothing is mapped by call. What the guest changes in its
        /// tables it has forgotten by [`Call::Invalidate`], as commands of SMMUv3.
        Bind = 9,

        /// Demonstration: what this guest is to do. Returns a task and two values.
        Task = 0x100,
        /// Demonstration: a line for the log. Arguments: guest address, bytes (at most 128).
        Say = 0x101,
        /// Demonstration: a number for the report. Arguments: which, from 0; value.
        Report = 0x102,
        /// Demonstration: the task is done. Argument: 1 if all went as expected.
        Finish = 0x103,
        /// Demonstration: waits for an interrupt, or for so many microseconds. Argument: microseconds.
        ///
        /// An interrupt that is pending, even while the guest masks its interrupts, ends the wait at once. A guest that looks
        /// whether something came and then calls this masks its interrupts before the look, and unmasks them after the call:
        /// else there is a window between the two, in which an interrupt comes, is taken, and leaves nothing that ends the wait.
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
        /// The unit takes no arrays of this type.
        UnknownType = 7,
    }
}

numbered! {
    /// How a guest answers a group.
    pub enum Code {
        /// The pages are there.
        Success = 0,
        /// They will not be.
        Invalid = 1,
        /// The device is to send no more page requests (`Response Failure`).
        ///
        /// This is what a guest would tell its device. Hardware is told that the pages will not be there, since
        /// devices share what a failure stops; from then on the hypervisor refuses the device's requests, until it
        /// has a new owner.
        Failure = 15,
    }
}

/// In what [`Call::Probe`] returns of a device: it asks for pages that it misses, and keeps translations of its own.
pub const REQUESTS: u64 = 1 << 32;

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
        let [respond, invalidate, counters, none] = [6, 7, 8, 10].map(Call::from_number);
        assert_eq!((respond, invalidate), (Some(Call::Respond), Some(Call::Invalidate)));
        assert_eq!((counters, none), (Some(Call::Counters), None));
    }

    /// PCI Express, "Response Code": 0 success, 1 invalid request, 1111b response failure; the others are reserved.
    #[test]
    fn a_guest_answers_with_the_response_codes_of_its_bus() {
        for number in 0..64 {
            let expected = match number {
                0 => Some(Code::Success),
                1 => Some(Code::Invalid),
                15 => Some(Code::Failure),
                _ => None,
            };
            assert_eq!(Code::from_number(number), expected, "code {number}");
        }
    }
}
