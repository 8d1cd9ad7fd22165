//! The frames of a channel: four of 4 KiB, one after the other in the guest's memory.
//!
//! | frame | for the guest | content |
//! |---|---|---|
//! | 0 | read-only | header |
//! | 1 | read-only | 64 records of requests |
//! | 2 | read-only | 64 records of events |
//! | 3 | read-write | consumer indices |
//!
//! | word | header | consumer frame |
//! |---|---|---|
//! | 0 | `PORTCHAN` in memory order | |
//! | 1 | version in 31:0, records of a ring in 63:32 | |
//! | 2 | requests produced | requests consumed |
//! | 3 | events produced | events consumed |
//! | 4 | groups of requests that the guest is never shown | |
//! | 5 | events lost | |
//!
//! All other words are zero. Everything counts modulo 2^64. Record n, counted from 0, lies in place n modulo 64.
//!
//! Word 4 counts groups of page requests of the guest's devices that were refused, discarded, or answered before they
//! came to the ring. Word 5 counts events that found no room, at the time when they were lost: after the last event was read,
//! it minus the `lost` of that event is the number of events that were lost at the end. Where the unit itself had no room it
//! does not say how many it lost, nor whose: each time counts as one event of every guest that owns a device behind it. So
//! word 5 is how many were lost at least, and not zero if any may have been.
//!
//! The guest reads a producer index with acquire, then the records, and stores its consumer index with release. That
//! index never goes back and never passes the producer's: the hypervisor ends a channel whose guest claims so.

/// Frames of a channel.
pub const FRAMES: usize = 4;
/// Bytes of a frame.
pub const FRAME_BYTES: usize = 4096;
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
/// Word of the header with the number of groups of requests that the guest is never shown.
pub const REQUESTS_LOST_WORD: usize = 4;
/// Word of the header with the number of events lost.
pub const EVENTS_LOST_WORD: usize = 5;
