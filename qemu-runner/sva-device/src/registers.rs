// SPDX-License-Identifier: GPL-2.0-or-later
//! The register map: what a guest finds in BAR 0, as 32-bit words. `README.md` has it as a table.

/// Size of BAR 0 in bytes.
pub(crate) const BAR_BYTES: u64 = 4096;
/// Number of lanes, each a DMA engine with at most one operation in flight.
pub(crate) const LANES: usize = 8;
/// Most pages that one operation may touch.
pub(crate) const PAGE_MAX: usize = 16;
/// What `MAGIC` reads: the bytes "PSVAV001".
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"PSVAV001");

const LANE_BASE: u64 = 0x100;
const LANE_STRIDE: u64 = 0x40;

/// Bits of a lane's `CONTROL`.
pub(crate) mod control {
    /// Starts the operation; without it a write to `CONTROL` does nothing.
    pub(crate) const GO: u32 = 1 << 0;
    /// Memory is written; otherwise it is read.
    pub(crate) const WRITE: u32 = 1 << 1;
    /// DMA that the IOMMU translates: no ATS, no page requests.
    pub(crate) const UNTRANSLATED: u32 = 1 << 2;
    /// A page that ATS cannot translate fails the operation; no page request is sent.
    pub(crate) const NO_PRI: u32 = 1 << 3;
    /// Requests carry Privileged Mode Requested.
    pub(crate) const PRIVILEGED: u32 = 1 << 4;
    /// The device TLB is used and filled.
    pub(crate) const CACHE: u32 = 1 << 5;
    /// Page requests alone: no ATS before them, no DMA after them.
    pub(crate) const RAW: u32 = 1 << 6;
    /// With `RAW`: no request carries Last, so that no answer is due.
    pub(crate) const NOT_LAST: u32 = 1 << 7;
    /// Requests carry no PASID, whatever the lane's `PASID` says.
    pub(crate) const NO_PASID: u32 = 1 << 8;
    /// With `RAW`: a stop marker instead of requests.
    pub(crate) const STOP_MARKER: u32 = 1 << 9;
    /// Every bit that means something.
    pub(crate) const ALL: u32 = (1 << 10) - 1;
}

/// One 32-bit word of BAR 0, by the register that it is or is half of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Word {
    MagicLow,
    MagicHigh,
    Lanes,
    PageMax,
    Stray,
    Invalidations,
    Outstanding,
    Groups,
    Requests,
    Responses,
    Reset,
    /// A word of lane `.0`, which is less than [`LANES`].
    Lane(usize, LaneWord),
}

/// One 32-bit word of a lane, by the register that it is or is half of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum LaneWord {
    AddrLow,
    AddrHigh,
    DataLow,
    DataHigh,
    Len,
    Pasid,
    Control,
    Status,
    Response,
    Rounds,
    Pages,
    Delay,
}

impl Word {
    /// Returns the word at `offset` bytes, or `None` where no register is.
    pub(crate) fn at(offset: u64) -> Option<Self> {
        Some(match offset {
            0x000 => Self::MagicLow,
            0x004 => Self::MagicHigh,
            0x008 => Self::Lanes,
            0x00c => Self::PageMax,
            0x010 => Self::Stray,
            0x014 => Self::Invalidations,
            0x018 => Self::Outstanding,
            0x01c => Self::Groups,
            0x020 => Self::Requests,
            0x024 => Self::Responses,
            0x028 => Self::Reset,
            _ => {
                let into = offset.checked_sub(LANE_BASE)?;
                let lane = usize::try_from(into / LANE_STRIDE).ok().filter(|lane| *lane < LANES)?;
                Self::Lane(lane, LaneWord::at(into % LANE_STRIDE)?)
            }
        })
    }
}

impl LaneWord {
    fn at(offset: u64) -> Option<Self> {
        Some(match offset {
            0x00 => Self::AddrLow,
            0x04 => Self::AddrHigh,
            0x08 => Self::DataLow,
            0x0c => Self::DataHigh,
            0x10 => Self::Len,
            0x14 => Self::Pasid,
            0x18 => Self::Control,
            0x1c => Self::Status,
            0x20 => Self::Response,
            0x24 => Self::Rounds,
            0x28 => Self::Pages,
            0x2c => Self::Delay,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_magic_number_is_the_documented_one() {
        assert_eq!(MAGIC, 0x3130_3056_4156_5350);
    }

    #[test]
    fn global_registers_and_lanes_are_where_the_table_says() {
        assert_eq!(Word::at(0x010), Some(Word::Stray));
        assert_eq!(Word::at(0x028), Some(Word::Reset));
        assert_eq!(Word::at(0x100), Some(Word::Lane(0, LaneWord::AddrLow)));
        assert_eq!(Word::at(0x100 + 3 * 0x40 + 0x1c), Some(Word::Lane(3, LaneWord::Status)));
        assert_eq!(Word::at(0x100 + 7 * 0x40 + 0x28), Some(Word::Lane(7, LaneWord::Pages)));
        assert_eq!(Word::at(0x100 + 0x2c), Some(Word::Lane(0, LaneWord::Delay)));
    }

    #[test]
    fn nothing_is_between_the_registers_or_past_the_last_lane() {
        for offset in [0x02c, 0x0fc, 0x102, 0x130, 0x100 + 8 * 0x40, BAR_BYTES - 4, u64::MAX] {
            assert_eq!(Word::at(offset), None, "{offset:#x}");
        }
    }
}
