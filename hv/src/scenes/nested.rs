//! A first stage that a guest owns.

use super::{Canary, Seen, Unexpected, expect, perform, report, requesters, task};
use crate::hypervisor::Hypervisor;

/// A guest has its device go through tables of its own, repairs a fault in them without a call, and reaches nothing through
/// them that is not its own.
pub fn nested(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    let canary = Canary::new(hv)?;
    let performed = perform(hv, 0, [task::NESTED, canary.phys(), 0], devices[0]);
    let unchanged = canary.is_unchanged();
    canary.release(hv);
    performed?;
    let [arrived, events, stale, refused, bindings] =
        [0, 1, 2, 3, 4].map(|number: usize| report(hv, 0, number));
    seen.count("words_that_arrived", arrived);
    seen.count("events", events);
    seen.count("words_by_what_the_unit_remembered", stale);
    seen.count("writes_past_the_guests_memory_refused", refused);
    seen.count("bindings_refused", bindings);
    expect(unchanged, "the hypervisor's memory changed")?;
    expect(arrived == 4 && stale == 1, "a word did not arrive where the guest's tables say")?;
    expect(events >= 2 && refused == 1, "a fault did not reach the guest")?;
    expect(bindings > 0, "an entry was taken that names what is the hypervisor's")?;
    Ok(
        "a guest's own tables translated its device; a fault in them reached it and was repaired there; past its memory nothing was in reach",
    )
}
