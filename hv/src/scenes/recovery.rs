//! A unit that stopped, and goes on.

use super::{
    Canary, PATIENCE_US, Seen, Unexpected, Writer, expect, passes, report, requesters, task, wait_for,
};
use crate::{
    control::{self, Space},
    guest,
    hypervisor::Hypervisor,
    memory::Share,
};
use arch::cpu;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use iommu::{
    Commands as _, Completion, FailureCause, Features, Gpa, GroupTag, Invalidation, Iova, Outcome, PAGE_SIZE,
    PageResponse, Perms, Tables as _,
};

/// How long the queue stands still, in microseconds: long for a unit, and less than anything may be at its head.
const STILL_US: u64 = 120_000;

fn stand_still() {
    let end_us = cpu::now_us().saturating_add(STILL_US);
    while cpu::now_us() < end_us {
        cpu::relax();
    }
}

/// A command that the unit does not take stops its queue; it is taken out, and what was queued behind it is executed: also
/// what a guest unmaps meanwhile, which waits that long and does not fail.
///
/// The command is an answer to a device that asked for nothing, without a PASID. QEMU's VT-d has no such answers yet. QEMU's
/// SMMUv3 takes everything that the driver has, so there the plugin spoils it on its way.
pub fn recovery(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    const AT: Iova = Iova(0x4200_0000);
    let no = |_| "the unit refused";
    let writer = Writer::find(hv)?;
    let stream = writer.device.function.id;
    let target = Canary::new(hv)?;
    let share = Share::new(8);
    control::assign(hv, stream, Features::default()).map_err(no)?;
    let space = Space::new(hv, &share, stream, None).map_err(no)?;
    let grant = target.0.grant(Gpa(0), PAGE_SIZE).ok_or("a frame cannot be granted")?;
    space.map(hv, &share, AT, &grant, Perms::READ_WRITE).map_err(no)?;
    writer.device.function.enable_bus_master(&hv.config);
    let mapped = writer.write(AT, target.phys());

    guest::start(hv, 0, [task::UNMAPS, 0, 0], &[requesters(hv)[0]]);
    let there = wait_for(hv, PATIENCE_US, || report(hv, 0, 0) > 0);
    let failures = || hv.failures.with(|(count, _)| *count);
    let before = failures();
    let unmapped = space.remove(hv, &share, AT, PAGE_SIZE).map_err(no)?;
    let tag = GroupTag { pasid: None, index: 0 };
    let (ticket, stopped, stale) = {
        // This is the service core: as long as it is masked nobody takes the queue out of its error.
        let _masked = cpu::mask();
        let answer = PageResponse { stream, tag, outcome: Outcome::Invalid };
        let behind = Invalidation::covering(space.attachment, AT, PAGE_SIZE);
        hv.commands
            .with(|commands| {
                commands.respond(answer).map_err(|_| "the driver did not take the answer")?;
                let ticket =
                    commands.submit(&[behind]).map_err(|_| "the driver did not take what comes behind")?;
                let stopped = commands.poll(ticket) == Completion::Pending;
                Ok::<_, Unexpected>((ticket, stopped, writer.write(Iova(AT.0 + 8), target.phys() + 8)))
            })
            // What the guest unmaps meanwhile waits behind the error, which is none of its own.
            .inspect(|_| stand_still())?
    };
    let unmaps_behind = report(hv, 0, 0);
    let recovered = wait_for(hv, PATIENCE_US, || failures() > before);
    let completion = || hv.commands.with(|commands| commands.poll(ticket));
    let executed = wait_for(hv, PATIENCE_US, || completion() != Completion::Pending);
    let completion = completion();
    let refused = writer.write(Iova(AT.0 + 16), target.phys() + 16);
    let goes_on = wait_for(hv, PATIENCE_US, || report(hv, 0, 0) > unmaps_behind + 1);
    hv.homes[0].task[0].store(task::RELEASE, SeqCst);
    let passed = passes(hv, 0);
    let forgotten = space.forget(hv, &share, AT, PAGE_SIZE, unmapped);

    writer.device.function.disable_bus_master(&hv.config);
    let leaving = control::block(hv, stream).map_err(no)?;
    space.end(hv, &share).map_err(no)?;
    hv.tables.with(|tables| tables.finish(leaving));
    target.release(hv);
    let failure = hv.failures.with(|(_, last)| *last);
    seen.count("failures", failures() - before);
    let unmapped = hv.homes[0].unmapped.load(Relaxed);
    seen.count("unmaps", 1 + unmapped);
    expect(there, "the guest unmaps nothing")?;
    expect(goes_on, "what the guest unmapped behind the error was not done")?;
    passed?;
    expect(mapped == Writer::DONE, "the device was refused although its page is mapped")?;
    expect(stopped, "the queue did not stop")?;
    expect(stale == Writer::DONE, "what was queued behind the error was executed before anybody recovered")?;
    expect(recovered, "nobody recovered the queue")?;
    let refusal = failure.is_some_and(|failure| failure.cause == FailureCause::Refused);
    expect(refusal, "the queue stopped for another reason")?;
    expect(executed && completion == Completion::Done, "what was queued behind the error was not executed")?;
    expect(refused == Writer::REFUSED, "the device was not refused after the invalidation behind the error")?;
    expect(forgotten.is_ok() && failures() == before + 1, "the queue does not go on")?;
    Ok(
        "the unit refused a command and stopped; the command was taken out, the invalidation behind it executed, the queue goes on",
    )
}
