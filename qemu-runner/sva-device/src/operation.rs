// SPDX-License-Identifier: GPL-2.0-or-later
//! One operation of a lane: what `CONTROL` asked for, the pages it touches, the words it moves.

use crate::registers::{PAGE_MAX, control};
use std::fmt;

/// Bytes of a page, for ATS and page requests.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// The PASID that requests carry, if any.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Pasid(pub(crate) Option<u32>);

impl fmt::Display for Pasid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(pasid) => write!(f, "pasid {pasid:#x}"),
            None => f.write_str("no pasid"),
        }
    }
}

/// On whose behalf, and for what, memory is accessed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Access {
    pub(crate) pasid: Pasid,
    /// Whether requests carry Privileged Mode Requested.
    pub(crate) privileged: bool,
    /// Whether memory is written; otherwise it is read.
    pub(crate) write: bool,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = if self.write { "write" } else { "read" };
        let privileged = if self.privileged { "privileged " } else { "" };
        write!(f, "{privileged}{direction} with {}", self.pasid)
    }
}

/// What an operation does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Kind {
    /// DMA that the IOMMU translates.
    Untranslated,
    /// DMA to addresses that ATS translated.
    Translated {
        /// Whether the device TLB is used and filled.
        cache: bool,
        /// Whether missing pages are requested.
        page_requests: bool,
    },
    /// Page requests alone.
    Raw {
        /// Whether the last of them says so, and an answer is due.
        last: bool,
    },
    /// A stop marker.
    StopMarker,
}

/// One operation, its parameters checked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Operation {
    pub(crate) kind: Kind,
    pub(crate) access: Access,
    /// First byte; of a raw operation, the first page.
    pub(crate) address: u64,
    /// Bytes: 8 to 65536, a multiple of 8. A stop marker has no use for it.
    pub(crate) length: usize,
    /// First word of a write.
    pub(crate) data: u64,
}

impl Operation {
    /// Returns the operation that a lane's registers describe, or `None` when they describe none.
    pub(crate) fn parse(control: u32, address: u64, data: u64, length: u32, pasid: u32) -> Option<Self> {
        let has = |bits| control & bits != 0;
        let kind = if control & !control::ALL != 0 {
            return None;
        } else if has(control::RAW) {
            match (has(control::STOP_MARKER), has(control::NOT_LAST)) {
                _ if has(control::UNTRANSLATED | control::NO_PRI) => return None,
                (true, true) => return None,
                (true, false) => Kind::StopMarker,
                (false, not_last) => Kind::Raw { last: !not_last },
            }
        } else if has(control::STOP_MARKER | control::NOT_LAST) {
            return None;
        } else if has(control::UNTRANSLATED) {
            Kind::Untranslated
        } else {
            Kind::Translated { cache: has(control::CACHE), page_requests: !has(control::NO_PRI) }
        };
        let access = Access {
            pasid: Pasid((!has(control::NO_PASID)).then_some(pasid)),
            privileged: has(control::PRIVILEGED),
            write: has(control::WRITE),
        };
        // Raw operations are about whole pages, from the one that the address is in.
        let address = if has(control::RAW) { page_of(address) } else { address };
        let fits = length.is_multiple_of(8)
            && u64::from(length)
                .checked_sub(1)
                .and_then(|more| address.checked_add(more))
                .is_some_and(|last| (last - page_of(address)) / PAGE_BYTES < PAGE_MAX as u64);
        (fits || kind == Kind::StopMarker).then_some(Self {
            kind,
            access,
            address,
            length: length as usize,
            data,
        })
    }

    /// Returns the pages of the operation, ascending.
    pub(crate) fn pages(&self) -> impl Iterator<Item = u64> + use<> {
        let first = page_of(self.address);
        let count = (self.address - first + self.length as u64).div_ceil(PAGE_BYTES);
        (0..count).map(move |page| first + page * PAGE_BYTES)
    }

    /// Returns what a write stores: word `i`, little endian, is `data + i`.
    pub(crate) fn pattern(&self) -> Vec<u8> {
        (0..self.length as u64 / 8).flat_map(|i| self.data.wrapping_add(i).to_le_bytes()).collect()
    }
}

/// Returns the start of the page that holds `address`.
pub(crate) fn page_of(address: u64) -> u64 {
    address & !(PAGE_BYTES - 1)
}

/// Returns what a read leaves in `DATA`: the wrapping sum of word `i` times `2 * i + 1`.
///
/// The weights are odd, so that no bit of any word is lost, and differ, so that words out of place are noticed.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    let (words, _) = bytes.as_chunks();
    words
        .iter()
        .zip(0u64..)
        .fold(0, |sum: u64, (word, i)| sum.wrapping_add(u64::from_le_bytes(*word).wrapping_mul(2 * i + 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dma(address: u64, length: u32) -> Option<Operation> {
        Operation::parse(control::GO, address, 0, length, 5)
    }

    fn pages(operation: Option<Operation>) -> Vec<u64> {
        operation.expect("the parameters are good").pages().collect()
    }

    #[test]
    fn a_dma_touches_every_page_that_holds_one_of_its_bytes() {
        assert_eq!(pages(dma(0x1000, 8)), [0x1000]);
        assert_eq!(pages(dma(0x1ff8, 16)), [0x1000, 0x2000]);
        assert_eq!(pages(dma(0x1ffc, 8)), [0x1000, 0x2000]);
        assert_eq!(pages(dma(0x1_0000, 65536)).len(), 16);
        assert_eq!(pages(dma(u64::MAX - 7, 8)), [u64::MAX - 0xfff]);
    }

    #[test]
    fn a_dma_that_is_empty_ragged_too_long_or_wraps_is_refused() {
        for (address, length) in
            [(0, 0), (0, 12), (0, 65544), (8, 65536), (u64::MAX - 7, 16), (0, !7), (4, 65536)]
        {
            assert_eq!(dma(address, length), None, "{address:#x} {length}");
        }
    }

    #[test]
    fn a_raw_operation_asks_for_its_length_in_whole_pages() {
        let raw = |address, length| Operation::parse(control::GO | control::RAW, address, 0, length, 5);

        assert_eq!(pages(raw(0x1ff8, 4096)), [0x1000]);
        assert_eq!(pages(raw(0x1000, 4104)), [0x1000, 0x2000]);
        assert_eq!(pages(raw(0x1ff8, 65536)).len(), 16);
        assert_eq!(raw(0x1000, 0), None);
        assert_eq!(raw(u64::MAX, 4104), None);
    }

    #[test]
    fn control_bits_that_contradict_each_other_or_mean_nothing_are_refused() {
        let refused = [
            control::NOT_LAST,
            control::STOP_MARKER,
            control::RAW | control::UNTRANSLATED,
            control::RAW | control::NO_PRI,
            control::RAW | control::NOT_LAST | control::STOP_MARKER,
            1 << 10,
        ];
        for bits in refused {
            assert_eq!(Operation::parse(control::GO | bits, 0, 0, 8, 5), None, "{bits:#x}");
        }
    }

    #[test]
    fn a_stop_marker_needs_no_length() {
        let marker = control::GO | control::RAW | control::STOP_MARKER;

        let operation = Operation::parse(marker, 0, 0, 0, 5).expect("the parameters are good");

        assert_eq!(operation.kind, Kind::StopMarker);
    }

    #[test]
    fn no_pasid_overrides_the_pasid_register() {
        let with = Operation::parse(control::GO, 0, 0, 8, 5).expect("the parameters are good");
        let without =
            Operation::parse(control::GO | control::NO_PASID, 0, 0, 8, 5).expect("the parameters are good");

        assert_eq!(with.access.pasid, Pasid(Some(5)));
        assert_eq!(without.access.pasid, Pasid(None));
    }

    #[test]
    fn a_write_stores_a_count_that_wraps() {
        let operation = Operation::parse(control::GO, 0, u64::MAX, 24, 5).expect("the parameters are good");

        let words: Vec<u64> =
            operation.pattern().as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        assert_eq!(words, [u64::MAX, 0, 1]);
    }

    #[test]
    fn the_checksum_weighs_word_i_with_twice_i_plus_one() {
        let bytes: Vec<u8> = [10u64, 100, u64::MAX].iter().flat_map(|word| word.to_le_bytes()).collect();

        assert_eq!(checksum(&bytes), 10 + 300 - 5);
    }
}
