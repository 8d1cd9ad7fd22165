//! How a stream table entry becomes another while the unit may be reading it.
//!
//! The unit reads an entry word by word, in any order, at any time, and keeps what it read until it is told to forget the
//! entry. So for as long as one change is under way it may have any mixture of the words before and after it. Which mixtures
//! matter depends on which fields the unit looks at (architecture specification, "Configuration structures and
//! configuration invalidation procedure", and the description of each field of the STE):
//!
//! - A change is without a gap if each mixture means what the entry meant before, or what it means after.
//! - Fields that the unit does not look at can be written before the word that makes it look, and cleared after the one
//!   that makes it stop; each is a change of its own, and the unit forgets the entry in between.
//! - Where neither helps, the entry is not valid in between.

use crate::tables::StreamEntry;
use iommu::{PhysAddr, Words};

/// Words of an entry that this driver writes; the others stay zero.
const USED: usize = 4;

/// Returns the bits that the unit looks at, by word.
fn looked_at(entry: &StreamEntry) -> [u64; USED] {
    let config = entry.get(StreamEntry::CONFIG);
    if !entry.is_set(StreamEntry::VALID) {
        return [1, 0, 0, 0];
    }
    if config < 4 {
        return [0xF, 0, 0, 0];
    }
    let (first, second) = (config & 1 != 0, config & 2 != 0);
    // Of one context descriptor neither S1Fmt, [5:4] of word 0, nor S1DSS counts.
    let one = entry.get(StreamEntry::CONTEXTS_LOG2) == 0;
    let head = match (first, one) {
        (false, _) => 0xF,
        (true, true) => !(3 << 4),
        (true, false) => u64::MAX,
    };
    // Of word 1: [7:0] are S1DSS, S1CIR, S1COR, S1CSH, and bit 27 is S1STALLD; bit 25 is S2FWB. MEV, bit 19, and EATS [29:28],
    // which is 0 or 1 here, change nothing of what is translated how, and may change at any time. PPAR, bit 18, never does
    // while a device is assigned.
    let mut attributes = !(1 << 19 | 3 << 28);
    if !first {
        attributes &= !(0xFF | 1 << 27);
    } else if one {
        attributes &= !3;
    }
    if !second {
        attributes &= !(1 << 25);
    }
    // S2VMID counts with either stage.
    let second_stage = if second {
        u64::MAX
    } else if first {
        0xFFFF
    } else {
        0
    };
    [head, attributes, second_stage, if second { u64::MAX } else { 0 }]
}

/// Whether the unit does the same by both.
fn same(a: &StreamEntry, b: &StreamEntry) -> bool {
    let (of_a, of_b) = (looked_at(a), looked_at(b));
    of_a == of_b && (0..USED).all(|word| (a.0[word] ^ b.0[word]) & of_a[word] == 0)
}

/// Whether nothing is translated by it: it is not valid, says so, or has a second stage whose tables are the empty ones.
fn refuses(entry: &StreamEntry, empty: PhysAddr) -> bool {
    let config = entry.get(StreamEntry::CONFIG);
    !entry.is_set(StreamEntry::VALID)
        || config < 4
        || config & 2 != 0 && entry.address(StreamEntry::ROOT) == empty.0
}

/// Whether all that `entry` lets through goes through the second stage of `after`, whatever comes before that.
fn is_confined(entry: &StreamEntry, after: &StreamEntry) -> bool {
    let both = |config: u64| config & 2 != 0;
    both(entry.get(StreamEntry::CONFIG))
        && both(after.get(StreamEntry::CONFIG))
        && entry.0[2..USED] == after.0[2..USED]
}

/// Whether every mixture of the words of two entries passes `test`.
fn every_mixture(before: &StreamEntry, after: &StreamEntry, test: impl Fn(&StreamEntry) -> bool) -> bool {
    (0..1_u32 << USED).all(|chosen| {
        let mut mixture = *before;
        for word in (0..USED).filter(|word| chosen & 1 << word != 0) {
            mixture.0[word] = after.0[word];
        }
        test(&mixture)
    })
}

/// Whether one entry may be written over another at once: whatever the unit reads meanwhile refuses, means what the entry
/// meant or will mean or what `idle` means, or reaches nothing but what the second stage of `after` lets it reach.
pub(crate) fn is_safe_at_once(
    before: &StreamEntry,
    after: &StreamEntry,
    idle: &StreamEntry,
    empty: PhysAddr,
) -> bool {
    every_mixture(before, after, |mixture| {
        [before, after, idle].into_iter().any(|meant| same(mixture, meant))
            || refuses(mixture, empty)
            || is_confined(mixture, after)
    })
}

/// Returns what to write next on the way from `now` to `goal`, after which the unit has to forget the entry; `None` at the
/// goal.
///
/// Takes three changes at most. Whatever the unit reads meanwhile means what `now` means, or what `goal` means, or refuses;
/// and that only where there is no way without.
pub(crate) fn next(now: &StreamEntry, goal: &StreamEntry, empty: PhysAddr) -> Option<StreamEntry> {
    if now == goal {
        return None;
    }
    let gap = |mixture: &StreamEntry| refuses(mixture, empty);
    let either = |mixture: &StreamEntry| same(mixture, now) || same(mixture, goal);
    let at_rest = refuses(now, empty) || refuses(goal, empty);
    if every_mixture(now, goal, |mixture| either(mixture) || at_rest && gap(mixture)) {
        return Some(*goal);
    }
    if !at_rest {
        let (before, after) = (looked_at(now), looked_at(goal));
        let differs = |word: &usize| (now.0[*word] ^ goal.0[*word]) & before[*word] & after[*word] != 0;
        let mut critical = (0..USED).filter(differs);
        if let (Some(critical), None) = (critical.next(), critical.next()) {
            // What only the goal looks at may be there already, and what only the state before looks at may stay.
            let mut prepared = *now;
            for word in (0..USED).filter(|&word| word != critical) {
                let new = after[word] & !before[word];
                prepared.0[word] = now.0[word] & !new | goal.0[word] & new;
            }
            if prepared == *now {
                prepared.0[critical] = goal.0[critical];
            }
            return Some(prepared);
        }
    }
    if every_mixture(now, goal, |mixture| either(mixture) || gap(mixture)) {
        return Some(*goal);
    }
    let mut closed = if now.is_set(StreamEntry::VALID) { *now } else { *goal };
    closed.0[0] = 0;
    Some(closed)
}
