//! ISOLATION: neither the guest's code, nor its calls, nor its device reach what is not the guest's.

use super::{Access, Bench, entries};
use crate::{
    calls::{Refusal, ask, ask_number, demand, report},
    device::{DMA_ERROR, INVALID_RESPONSE, NO_PASID, Operation, UNSUPPORTED, UNTRANSLATED, WRITE},
    ensure, machine,
    memory::{PAGES, try_write},
    say,
    say::Failed,
    serve::answer_all,
};
use channel::{
    Call, Code,
    Status::{Malformed, NotYours, UnknownCall},
    call::{NONE, WRITABLE},
    ring::FRAMES,
};
use core::fmt::Arguments;
use iommu::{PAGE_SIZE, Pasid};

/// What the guest tries to write where it must not.
const INTRUSION: u64 = 0xBAD0_1DEA_BAD0_1DEA;
/// Where the device would see memory that the guest tries to map.
const IOVA: u64 = 0x4500_0000;
/// A call that does not exist.
const UNKNOWN_CALL: u64 = 0xDEAD;

/// Tries, and how many of them were refused.
#[derive(Default)]
struct Tally {
    tries: u64,
    refused: u64,
}

impl Tally {
    /// Counts a try; says `what` it was if it was not refused.
    fn count(&mut self, refused: bool, what: Arguments<'_>) {
        self.tries += 1;
        self.refused += u64::from(refused);
        if !refused {
            say!("not refused: {what}");
        }
    }
}

/// Reports: tries, how many were refused, tries by code, by call, by device. `targets` are host-physical addresses: of the
/// hypervisor's memory, of another guest's.
pub fn run(targets: [u64; 2]) -> Result<(), Failed> {
    let mut bench = Bench::set_up(0x1501A7E, NONE)?;
    let page_past = machine::RAM.end;
    for address in [targets[0], targets[1], page_past] {
        let own = machine::RAM.contains(&address)
            || bench.server.window().contains(address)
            || bench.assigned.device.registers().contains(address);
        ensure!(!own, "{address:#x} is the guest's own, it cannot be tried");
    }
    let code = by_code(&bench, [targets[0], targets[1], machine::MESSAGES, page_past]);
    let call = by_call(&bench)?;
    let device = by_device(&mut bench, targets)?;
    entries::the_good_ones_are_done(&bench)?;
    bench.assigned.detach()?;

    let tries = code.tries + call.tries + device.tries;
    let refused = code.refused + call.refused + device.refused;
    report(&[tries, refused, code.tries, call.tries, device.tries])?;
    ensure!(refused == tries, "{} of {tries} tries were not refused", tries - refused);
    Ok(())
}

/// Loads from and stores to `targets`, and stores to what the guest may only read.
fn by_code(bench: &Bench, targets: [u64; 4]) -> Tally {
    let mut tally = Tally::default();
    for address in targets {
        tally.count(machine::try_read(address).is_none(), format_args!("a load from {address:#x}"));
        tally.count(!try_write(address, INTRUSION), format_args!("a store to {address:#x}"));
    }
    for address in bench.server.read_only_frames() {
        let refused = !try_write(address, INTRUSION);
        tally.count(refused, format_args!("a store to the channel's frame at {address:#x}"));
    }
    tally
}

/// Makes calls that name what is not the guest's, or nothing at all.
fn by_call(bench: &Bench) -> Result<Tally, Failed> {
    let [_, devices, _] = demand(Call::Probe, [0; 4])?;
    let channel = bench.server.window().base();
    let attachment = bench.assigned.attachment;
    let made_up = attachment ^ 1 << 40;
    let pasid = bench.assigned.pasid.map_or(NONE, |pasid| u64::from(pasid.value()) + 1);
    let end = machine::RAM.end;
    let own = PAGES[0].address();
    let map = |attachment, address, bytes| (Call::Map, [attachment | WRITABLE, IOVA, address, bytes]);
    let tries = [
        map(attachment, end, PAGE_SIZE),
        map(attachment, end - PAGE_SIZE, 2 * PAGE_SIZE),
        map(attachment, own + 8, PAGE_SIZE),
        map(attachment, PAGE_SIZE.wrapping_neg(), 2 * PAGE_SIZE),
        map(attachment, channel, FRAMES as u64 * PAGE_SIZE),
        map(made_up, own, PAGE_SIZE),
        (Call::Unmap, [made_up, IOVA, PAGE_SIZE, 0]),
        (Call::Detach, [made_up, 0, 0, 0]),
        (Call::Attach, [99, pasid, 0, NONE]),
        (Call::Attach, [devices + 1, pasid, 0, NONE]),
        (Call::Respond, [end, 1, 0, 0]),
        (Call::Say, [end, 16, 0, 0]),
    ];
    let mut tally = Tally::default();
    for (call, arguments) in tries {
        let answer = ask(call, arguments);
        let refused = matches!(answer, Err(Refusal::For(NotYours | Malformed)));
        tally.count(refused, format_args!("{call:?}{arguments:x?}: {answer:x?}"));
    }
    for (call, arguments, status) in entries::refused_calls(devices) {
        let answer = ask(call, arguments);
        let refused = answer == Err(Refusal::For(status));
        tally.count(refused, format_args!("{call:?}{arguments:x?}: {answer:x?}"));
    }
    for (entry, why, word, bits) in entries::refused_entries(bench) {
        let answer = entries::invalidate(&[entry]);
        let refused = answer == entries::refused_at(0, why, word, bits);
        tally.count(refused, format_args!("the entry {entry:x?}: {answer:x?}"));
    }
    let answer = ask_number(UNKNOWN_CALL, [0; 4]);
    let refused = answer == Err(Refusal::For(UnknownCall));
    tally.count(refused, format_args!("call {UNKNOWN_CALL:#x}: {answer:x?}"));
    Ok(tally)
}

/// Has the device write to `targets`.
fn by_device(bench: &mut Bench, targets: [u64; 2]) -> Result<Tally, Failed> {
    let Bench { server, assigned } = bench;
    // Where the machine has no PASIDs, a device that sends one all the same gets nowhere either.
    let own = assigned.pasid.map_or(1, Pasid::value);
    let mut tally = Tally::default();
    for address in targets {
        for (pasid, control, with) in [(0, NO_PASID, "no"), (own, 0, "its"), (own + 1, 0, "nobody's")] {
            let control = UNTRANSLATED | WRITE | control;
            let operation = Operation { address, bytes: 8, pasid, data: INTRUSION, control };
            assigned.device.start(0, &operation)?;
            let status = assigned.device.wait(0)?;
            // A machine without PASIDs takes no such request from the device in the first place.
            let refused = status.is_failure(DMA_ERROR) || status.is_failure(UNSUPPORTED);
            tally.count(refused, format_args!("a write to {address:#x} with {with} PASID: {status:?}"));
        }
        if !assigned.device.asks_for_pages {
            continue;
        }
        // With ATS, the device asks before it writes: in the guest's own channel.
        assigned.start_write(0, address, 8, INTRUSION)?;
        let group = server.wait_group()?;
        assigned.check_requests(&group, &[address & !(PAGE_SIZE - 1)], Access::Write)?;
        answer_all(&[group.answer(Code::Invalid)])?;
        let status = assigned.device.wait(0)?;
        let refused = status.is_failure(INVALID_RESPONSE);
        tally.count(refused, format_args!("a translated write to {address:#x}: {status:?}"));
    }
    Ok(tally)
}
