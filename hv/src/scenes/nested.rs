//! A first stage that a guest owns.

use super::{Canary, Seen, Unexpected, expect, perform, report, requesters, task};
use crate::hypervisor::Hypervisor;
use iommu::FaultReason;

/// A guest has its device go through tables of its own, is told of faults in them and repairs one without a call, and reaches
/// nothing through them that is not its own: what the second stage refuses is the hypervisor's to know.
pub fn nested(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let devices = requesters(hv);
    let canary = Canary::new(hv)?;
    let before = hv.second_stage.with(|(count, _)| *count);
    let performed = perform(hv, 0, [task::NESTED, canary.phys(), 0], devices[0]);
    let unchanged = canary.is_unchanged();
    canary.release(hv);
    let (behind, last) = hv.second_stage.with(|(count, last)| (*count - before, *last));
    performed?;
    let [arrived, events, stale, refused, bindings] =
        [0, 1, 2, 3, 4].map(|number: usize| report(hv, 0, number));
    seen.count("words_that_arrived", arrived);
    seen.count("events", events);
    seen.count("words_by_what_the_unit_remembered", stale);
    seen.count("writes_past_the_guests_memory_refused", refused);
    seen.count("bindings_refused", bindings);
    seen.count("faults_of_the_second_stage", behind);
    expect(unchanged, "the hypervisor's memory changed")?;
    expect(arrived == 4 && stale == 1, "a word did not arrive where the guest's tables say")?;
    expect(events >= 2, "a fault of the guest's own tables did not reach it")?;
    expect(refused == 1 && behind >= 1, "the hypervisor was not told what its second stage refused")?;
    let fault = last.ok_or("the hypervisor was not told what its second stage refused")?;
    let expected = (hv.devices[devices[0]].function.id, report(hv, 0, 5), FaultReason::NotMapped);
    expect(
        (fault.stream, fault.iova.0, fault.reason) == expected,
        "the fault behind the guest's tables is another",
    )?;
    expect(bindings > 0, "an entry was taken that names what is the hypervisor's")?;
    Ok(
        "a guest's own tables translated its device; faults in them reached it and one was repaired there; past its memory nothing was in reach, which the hypervisor alone was told",
    )
}
