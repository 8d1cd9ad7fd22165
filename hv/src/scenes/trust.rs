//! Devices that reach all of memory.

use super::{Canary, PATIENCE_US, Seen, Unexpected, Writer, expect, wait_for};
use crate::{
    control::{self, Error, PassedThrough},
    hypervisor::Hypervisor,
};
use iommu::{Gpa, Iova};

/// A device reaches all of memory only if the command line names it; it does then, and does no longer when that ends.
pub fn trust(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let [trusted, other] = [Writer::nth(hv, 0)?, Writer::nth(hv, 1)?];
    let target = Canary::new(hv)?;
    let write = |writer: &Writer<'_>, at: u64| {
        let verdict = writer.write(Iova(target.phys() + at), target.phys() + at);
        (verdict, target.0.load(Gpa(at)).is_some_and(|word| word as u32 == Writer::PATTERN))
    };
    for writer in [&trusted, &other] {
        writer.device.function.enable_bus_master(&hv.config);
    }

    let before = write(&trusted, 0x10);
    let refused = PassedThrough::new(hv, other.device.function.id);
    let passed = PassedThrough::new(hv, trusted.device.function.id);
    let during = write(&trusted, 0x20);
    let beside = write(&other, 0x30);
    let ended = passed.map(|passed| passed.end(hv));
    let faults = hv.unowned.with(|(count, _)| *count);
    let after = write(&trusted, 0x40);
    let reported = wait_for(hv, PATIENCE_US, || hv.unowned.with(|(count, _)| *count) > faults);

    for writer in [&trusted, &other] {
        writer.device.function.disable_bus_master(&hv.config);
    }
    let leaving = control::block(hv, trusted.device.function.id);
    target.release(hv);
    seen.count("refused_for_lack_of_trust", refused.is_err().into());
    let stream = other.device.function.id;
    match refused {
        Err(Error::NotTrusted { stream: named }) if named == stream => {}
        Err(_) => return Err("a device that nobody trusts was refused, but for another reason"),
        Ok(_) => return Err("a device that nobody trusts was let through"),
    }
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(_)) => return Err("the trusted device could not be detached again"),
        Err(_) => return Err("the trusted device was not let through"),
    }
    match leaving {
        Ok(leaving) => hv.tables.with(|tables| iommu::Tables::finish(tables, leaving)),
        Err(_) => return Err("the trusted device could not be blocked again"),
    }
    let not = (Writer::REFUSED, false);
    expect(before == not, "the trusted device reached memory before it was let through")?;
    expect(during == (Writer::DONE, true), "the trusted device did not reach memory")?;
    expect(beside == not, "the other device reached memory")?;
    expect(after == not && reported, "the trusted device reached memory when that had ended")?;
    Ok(
        "a device reached memory untranslated for as long as it was let through; one that nobody trusts was refused by name",
    )
}
