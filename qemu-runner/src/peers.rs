//! What the same things cost others, and what they may cost here.
//!
//! Linux's figures are of version 6.12 in QEMU 11.1.3, counted as ours are: guest instructions, and the accesses in QEMU's
//! trace. A pair is one 4 KiB mapping and its removal, of an NVMe read, through Linux's DMA interface, with strict
//! invalidation (VT-d with second-stage tables in legacy mode). Faults are those of one device that go on.

use crate::{
    machine::Machine,
    rows::{INSTRUCTIONS, MMIO, Row},
};

pub(crate) const BRING_UP: &str = "bring-up to default deny";
pub(crate) const MAP: &str = "map one page";
pub(crate) const INVALIDATE: &str = "invalidate one page";
pub(crate) const UNMAP: &str = "unmap one page, with its invalidation";
pub(crate) const PAIR: &str = "map, unmap and invalidate one page";
pub(crate) const BATCH_MAP: &str = "map 512 pages in one batch";
pub(crate) const BATCH_INVALIDATE: &str = "invalidate 512 pages in one batch";
pub(crate) const BATCH_UNMAP: &str = "unmap 512 pages in one batch, with their invalidation";
pub(crate) const FAULT: &str = "unrecoverable fault";
pub(crate) const FAULTS: &str = "8 unrecoverable faults of one pass";
pub(crate) const FURTHER_FAULT: &str = "each further unrecoverable fault of a pass";
pub(crate) const REQUEST: &str = "page request";
pub(crate) const BURST: &str = "64 page requests of one burst";
pub(crate) const ANSWER: &str = "answer";
pub(crate) const ANSWERS: &str = "16 answers of one call";
pub(crate) const DETACH: &str = "detach with 64 groups outstanding";
pub(crate) const SPURIOUS: &str = "spurious interrupt for faults";

/// How the name of a figure ends for which page requests came from our own model: QEMU's SMMUv3 has none.
pub(crate) const TEST_DOUBLE: &str = " (test double)";

/// Whether the figure called `name` needs page requests.
pub(crate) fn needs_requests(name: &str) -> bool {
    let figure = name.split_once(BESIDE).map_or(name, |(figure, _)| figure);
    [REQUEST, BURST, ANSWER, ANSWERS, DETACH].contains(&figure)
}

/// How the name of a figure goes on that was measured beside many attached streams.
pub(crate) const BESIDE: &str = ", beside ";
/// Faults in [`FAULTS`].
pub(crate) const FAULTS_OF_A_PASS: f64 = 8.0;

/// Where Linux's figures are from.
const LINUX: &str = "Linux 6.12";
/// Percent by which instructions may differ beside many streams, and still be flat.
const FLAT: f64 = 2.0;

/// Puts beside `row` what its peer needs, and what it may need itself; `all` are the rows of the same boot.
pub(crate) fn judge(machine: Machine, row: &mut Row, all: &[Row]) {
    if let Some((name, _)) = row.name.split_once(BESIDE) {
        // Flat: the same as beside few.
        let alone = all.iter().find(|other| other.name == name && other.unit == row.unit);
        let margin = if row.unit == INSTRUCTIONS { FLAT / 100.0 } else { 0.0 };
        row.goal = alone.map(|alone| (alone.ours * (1.0 + margin)).ceil());
        return;
    }
    let (instructions, accesses) = peer(machine, &row.name);
    let (instructions_goal, accesses_goal) = goal(machine, &row.name);
    let (peer, goal) = match row.unit.as_str() {
        INSTRUCTIONS => (instructions, instructions_goal),
        MMIO => (accesses, accesses_goal),
        _ => (None, None),
    };
    row.peer = peer;
    row.peer_name = peer.map(|_| LINUX.into());
    row.goal = goal;
}

/// Instructions and accesses of Linux, where it does the same.
fn peer(machine: Machine, name: &str) -> (Option<f64>, Option<f64>) {
    let either = |x86_64: f64, aarch64: f64| {
        Some(match machine {
            Machine::X86_64 => x86_64,
            Machine::Aarch64 => aarch64,
        })
    };
    match name {
        // 16 reads and 55 writes; 31 and 38.
        BRING_UP => (None, either(71.0, 69.0)),
        MAP => (either(738.0, 834.0), Some(0.0)),
        UNMAP => (either(1701.0, 2057.0), either(1.0, 2.0)),
        PAIR => (either(2439.0, 2891.0), either(1.0, 2.0)),
        INVALIDATE => (either(577.0, 716.0), either(1.0, 2.0)),
        FAULT => (either(318.0, 249.0), either(5.0, 3.0)),
        SPURIOUS if machine == Machine::X86_64 => (Some(95.0), Some(1.0)),
        _ => (None, None),
    }
}

/// Instructions and accesses that we may need.
fn goal(machine: Machine, name: &str) -> (Option<f64>, Option<f64>) {
    let either = |x86_64: f64, aarch64: f64| {
        Some(match machine {
            Machine::X86_64 => x86_64,
            Machine::Aarch64 => aarch64,
        })
    };
    match name {
        BRING_UP => (None, either(71.0, 69.0)),
        // One doorbell; where completion is polled, one read.
        PAIR => (Some(600.0), either(1.0, 2.0)),
        INVALIDATE | BATCH_INVALIDATE | BATCH_UNMAP | UNMAP => (None, either(1.0, 2.0)),
        MAP | BATCH_MAP => (None, Some(0.0)),
        FAULT => (either(250.0, 200.0), either(5.0, 3.0)),
        REQUEST => (Some(500.0), either(4.0, 3.0)),
        // 500 for each; nothing per request.
        BURST => (Some(64.0 * 500.0), either(4.0, 3.0)),
        ANSWER => (Some(250.0), Some(1.0)),
        _ => (None, None),
    }
}
