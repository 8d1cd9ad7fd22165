//! Accesses that wait: the tags that name them, and which devices have such.
//!
//! The unit names a stalled access by device and stall tag, and a group of page requests by device, PASID and a number of
//! 9 bits. One [`GroupTag`] holds either. Which it is, the device tells: those whose faults stall are listed at bring-up,
//! and never ask for pages.
//!
//! No other device's faults stall, as its configuration has it. If one does all the same, somebody has to end the access:
//! its tag is then told as one that no group of page requests can have.

use iommu::{GroupTag, PageResponse, Pasid, StreamId};

/// Numbers of groups of page requests end here.
const GROUPS: u16 = 0x200;
/// Added to a tag below [`GROUPS`] of a device that is not listed.
const UNLISTED: u16 = 0x8000;

/// Returns the tag under which a stalled access is told.
pub(crate) fn tag(stream: StreamId, pasid: Option<Pasid>, stag: u16, listed: &[StreamId]) -> GroupTag {
    let index = if stag < GROUPS && !listed.contains(&stream) { stag | UNLISTED } else { stag };
    GroupTag { pasid, index }
}

/// Returns the answer to the stalled access that `response` is for, or `None` if it is for page requests.
///
/// An access of a device that is not listed is never tried again: it would stall again.
pub(crate) fn waiting(response: &PageResponse, listed: &[StreamId]) -> Option<PageResponse> {
    let &PageResponse { stream, tag, outcome } = response;
    if listed.contains(&stream) {
        return Some(PageResponse { stream, tag, outcome });
    }
    let index = match tag.index ^ UNLISTED {
        stag if stag < GROUPS => stag,
        _ if tag.index < GROUPS => return None,
        _ => tag.index,
    };
    Some(PageResponse { stream, tag: GroupTag { index, ..tag }, outcome: iommu::Outcome::Invalid })
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::Outcome;

    const LISTED: StreamId = StreamId(3);
    const OTHER: StreamId = StreamId(4);

    #[test]
    fn a_tag_comes_back_as_the_unit_gave_it() {
        for stag in [0, 1, 0x1FF, 0x200, 0x1234, 0x7FFF, 0x8200, 0xFFFF] {
            for stream in [LISTED, OTHER] {
                let tag = tag(stream, None, stag, &[LISTED]);
                let response = PageResponse { stream, tag, outcome: Outcome::Success };

                let answer = waiting(&response, &[LISTED]).expect("it stalls");

                assert_eq!((answer.stream, answer.tag.index), (stream, stag));
                let outcome = if stream == LISTED { Outcome::Success } else { Outcome::Invalid };
                assert_eq!(answer.outcome, outcome, "{stag:#x}");
            }
        }
    }

    #[test]
    fn a_group_of_page_requests_is_no_stall() {
        for index in [0, 1, 0x1FF] {
            let response = PageResponse {
                stream: OTHER,
                tag: GroupTag { pasid: None, index },
                outcome: Outcome::Success,
            };

            assert_eq!(waiting(&response, &[LISTED]), None);
        }
    }
}
