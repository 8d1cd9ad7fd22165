//! NESTED: has its device go through first-stage tables of the guest's own, and repairs a fault in them.

use super::DEVICE;
use crate::{
    calls::{Refusal, ask, demand, report},
    device::{DMA_ERROR, Device, NO_PASID, Operation, Status, UNTRANSLATED, WRITE},
    ensure,
    memory::{PAGES, Page},
    say::Failed,
    serve::Server,
};
use channel::{
    Call, Status as Answer,
    invalidate::{Layout, Refused},
    record::Reason,
};
use iommu::PAGE_SIZE;

const OPAQUE: u64 = 0x2E57ED;
/// Where the device sees its pages, one after the other.
const FIRST: u64 = 0x5500_0000;
const LATER: u64 = FIRST + PAGE_SIZE;
const OUTSIDE: u64 = FIRST + 2 * PAGE_SIZE;
const ABSENT: u64 = FIRST + 3 * PAGE_SIZE;
/// The guest's own number of the address space.
const ASID: u64 = 7;

/// Tables of four levels, and what names them. The device writes into the pages before.
const TABLES: [usize; 4] = [10, 11, 12, 13];
const DESCRIPTORS: usize = 14;

/// A valid page for everybody, writable, normal memory, of this address space alone (VMSAv8-64).
const PAGE: u64 = 0xF43;
/// A valid table.
const TABLE: u64 = 0x3;
/// Stream table entry: valid, first stage, one context descriptor; its memory is write-back, inner shareable.
const ENTRY: [u64; 2] = [0x0B, 0xD4];
/// Context descriptor: 48 bits by 4 KiB, upper half off, valid, 44 bits of address, AArch64, faults recorded and aborted.
const CONTEXT: u64 = 0x0000_E204_C000_3510;
/// Bits of a stream table entry that are the hypervisor's: the second stage's root, its VMID, the Config of both stages.
const FOREIGN: [(usize, u64); 3] = [(3, 0x1000), (2, 5), (0, 2 << 1)];

/// Reports: words that arrived, events, words by a translation that the unit remembered, writes past the guest's memory that
/// were refused, bindings that were refused, and where those writes went. `target` is a host-physical address that is not the guest's.
pub fn run(target: u64) -> Result<(), Failed> {
    let mut server = Server::open()?;
    let device = Device::find(DEVICE)?;
    let table = |level: usize| &PAGES[TABLES[level]];
    for level in 0..3 {
        let index = (FIRST >> (39 - 9 * level)) as usize & 0x1FF;
        table(level).store(index, table(level + 1).address() | TABLE);
    }
    let set = |address: u64, to: u64| table(3).store((address >> 12) as usize & 0x1FF, to);
    set(FIRST, PAGES[0].address() | PAGE);
    set(OUTSIDE, target & !(PAGE_SIZE - 1) | PAGE);
    let descriptors = &PAGES[DESCRIPTORS];
    let (context, entry) = (descriptors.address(), descriptors.address() + 0x100);
    for (at, word) in [(0, CONTEXT | ASID << 48), (1, table(0).address()), (3, 0xFF)] {
        descriptors.store(at, word);
    }
    descriptors.store(32, ENTRY[0] | context);
    descriptors.store(33, ENTRY[1]);

    let mut bindings = 0;
    for (word, bits) in FOREIGN {
        let right = descriptors.load(32 + word).unwrap_or(0);
        descriptors.store(32 + word, right | bits);
        let answer = ask(Call::Bind, [DEVICE, entry, OPAQUE, 0]);
        ensure!(answer == Err(Refusal::For(Answer::Malformed)), "word {word} with {bits:#x}: {answer:x?}");
        descriptors.store(32 + word, right);
        bindings += 1;
    }
    let [attachment, ..] = demand(Call::Bind, [DEVICE, entry, OPAQUE, 0])?;
    let mapped = ask(Call::Map, [attachment, LATER, PAGES[1].address(), PAGE_SIZE]);
    ensure!(mapped == Err(Refusal::For(Answer::WrongState)), "a map into the guest's own: {mapped:x?}");

    let mut arrived = 0;
    writes(&device, FIRST, 0xA1)?;
    arrived += holds(&PAGES[0], 0xA1)?;

    // Not there, until the guest repairs it: what is absent is not remembered.
    fails(&device, LATER)?;
    told(&mut server, LATER)?;
    set(LATER, PAGES[1].address() | PAGE);
    writes(&device, LATER, 0xA2)?;
    arrived += holds(&PAGES[1], 0xA2)?;

    // Another page behind the same address: the unit remembers the old one until it is told.
    set(FIRST, PAGES[2].address() | PAGE);
    writes(&device, FIRST, 0xA3)?;
    let stale = holds(&PAGES[0], 0xA3)?;
    // TLBI_NH_VA of another address space and of the device's, then one with a bit that no command has.
    let by_page = |asid: u64| [0x12 | asid << 48, FIRST | 1];
    let commands = [by_page(ASID + 1), by_page(ASID), [0x12 | 1 << 63, FIRST | 1 << 4]];
    let array = commands.as_ptr().addr() as u64;
    let [handled, why, _] = demand(Call::Invalidate, [Layout::SmmuCommand as u64, array, 3, 0])?;
    let refusal = (handled, why as u32);
    ensure!(refusal == (2, Refused::Bits as u32), "an array of commands: {refusal:?}");
    writes(&device, FIRST, 0xA4)?;
    arrived += holds(&PAGES[2], 0xA4)?;

    // Past the guest's memory the second stage has nothing, and that is not told: the next event is of the next fault.
    fails(&device, OUTSIDE)?;
    fails(&device, ABSENT)?;
    told(&mut server, ABSENT)?;
    set(OUTSIDE, PAGES[3].address() | PAGE);
    writes(&device, OUTSIDE, 0xA5)?;
    arrived += holds(&PAGES[3], 0xA5)?;

    demand(Call::Detach, [attachment, 0, 0, 0])?;
    fails(&device, FIRST)?;
    report(&[arrived, server.events, stale, 1, bindings, OUTSIDE])
}

fn start(device: &Device, address: u64, data: u64) -> Result<Status, Failed> {
    let control = UNTRANSLATED | WRITE | NO_PASID;
    device.start(0, &Operation { address, bytes: 8, pasid: 0, data, control })?;
    device.wait(0)
}

fn writes(device: &Device, address: u64, data: u64) -> Result<(), Failed> {
    let status = start(device, address, data)?;
    ensure!(status == Status::Done, "a write to {address:#x} ended as {status:?}");
    Ok(())
}

fn fails(device: &Device, address: u64) -> Result<(), Failed> {
    let status = start(device, address, 0xBAD)?;
    ensure!(status.is_failure(DMA_ERROR), "a write to {address:#x} ended as {status:?}");
    Ok(())
}

/// Checks that `page` starts with `data`; counts one.
fn holds(page: &Page, data: u64) -> Result<u64, Failed> {
    let found = page.load(0);
    ensure!(found == Some(data), "{found:x?} instead of {data:#x} at {:#x}", page.address());
    Ok(1)
}

/// Waits for the event of a write to `address`, of which a machine may report several.
fn told(server: &mut Server, address: u64) -> Result<(), Failed> {
    let event = server.wait_event()?;
    let right = (event.iova.0, event.reason, event.opaque) == (address, Reason::NotMapped, OPAQUE);
    ensure!(right, "an event at {:#x} for {:?} instead of {address:#x}", event.iova.0, event.reason);
    while let Some(more) = server.next_event() {
        ensure!(more.iova.0 == address, "an event at {:#x} besides {address:#x}", more.iova.0);
    }
    Ok(())
}
