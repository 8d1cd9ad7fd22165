//! The frames of a channel: four of 4 KiB, one after the other in the guest's memory.
//!
//! | frame | for the guest | content |
//! |---|---|---|
//! | 0 | read-only | header |
//! | 1 | read-only | 64 records of requests |
//! | 2 | read-only | 64 records of events |
//! | 3 | read-write | consumer indices |
//!
//! Indices count records from the start of the channel and never wrap; record n lies in place n modulo 64.

/// Frames of a channel.
pub const FRAMES: usize = 4;
/// Records of a ring.
pub const RECORDS: u64 = 64;

/// Which frame is which.
pub const HEADER: usize = 0;
/// The frame of the requests.
pub const REQUESTS: usize = 1;
/// The frame of the events.
pub const EVENTS: usize = 2;
/// The frame of the guest's indices.
pub const CONSUMER: usize = 3;

/// Word 0 of the header: `PORTCHAN` in memory order.
pub const MAGIC: u64 = u64::from_le_bytes(*b"PORTCHAN");
/// Word 1 of the header: the version in 31:0, records of a ring in 63:32.
pub const VERSION: u64 = 1;

/// Word of the header with the magic number.
pub const MAGIC_WORD: usize = 0;
/// Word of the header with version and size.
pub const VERSION_WORD: usize = 1;
/// Word with the number of requests produced (header) or consumed (consumer frame).
pub const REQUESTS_WORD: usize = 2;
/// Word with the number of events produced (header) or consumed (consumer frame).
pub const EVENTS_WORD: usize = 3;
