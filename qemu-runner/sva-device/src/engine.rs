// SPDX-License-Identifier: GPL-2.0-or-later
//! What a lane does with its turn: translates, asks for what is missing, moves data.
//!
//! The engine borrows the [`Device`] only between calls of the [`Link`], never across one: such a call can come back
//! to the device (a response, an invalidation, a DMA into its own registers), which then finds it free.

use crate::{
    device::{Cause, Device, Failure, Job, Turn},
    operation::{Access, Kind, Operation, PAGE_BYTES, Pasid, checksum},
    qemu::{Errno, MemTx, PageRequest, Space},
    tlb::Translation,
};
use std::{cell::RefCell, fmt::Arguments};

/// Most groups that one operation sends before it gives up.
const ROUNDS_MAX: u32 = 8;

/// The device's way to the rest of the machine.
pub(crate) trait Link {
    /// Has responses and invalidations for `pasid` brought to the device from now on.
    fn listen(&self, pasid: Pasid) -> Result<(), Errno>;
    /// Whether ATS is enabled.
    fn ats_enabled(&self) -> bool;
    /// Asks for the translation of `page` (ATS); `None` when there is none that permits `access`.
    fn translate(&self, access: Access, page: u64) -> Result<Option<Translation>, Errno>;
    /// Sends a page request message, or a stop marker.
    fn request_page(&self, request: PageRequest) -> Result<(), Errno>;
    /// Returns the address space of untranslated requests, if the machine has one.
    fn untranslated_space(&self, pasid: Pasid) -> Option<Space>;
    /// Reads memory.
    fn load(&self, space: Space, address: u64, bytes: &mut [u8]) -> Result<(), MemTx>;
    /// Writes memory.
    fn store(&self, space: Space, address: u64, bytes: &[u8]) -> Result<(), MemTx>;
    /// Sends the interrupt that says that an operation ended.
    fn interrupt(&self);
    /// Says what happens, to whoever asked to be told.
    fn say(&self, line: Arguments<'_>);
}

/// How a turn ended.
enum Progress {
    /// There is nothing to do before a response comes.
    Waits,
    /// The operation is done; with the new `DATA` if it read memory.
    Done(Option<u64>),
}

/// A run of bytes that is contiguous where it is accessed.
struct Piece {
    space: Space,
    address: u64,
    bytes: usize,
}

/// Runs `turn`, if it is still due.
pub(crate) fn run(device: &RefCell<Device>, turn: Turn, link: &impl Link) {
    let Some(job) = device.borrow_mut().take(turn) else { return };
    let outcome = match advance(device, turn, job, link) {
        Ok(Progress::Waits) => return,
        Ok(Progress::Done(data)) => Ok(data),
        Err(failure) => Err(failure),
    };
    if device.borrow_mut().end(turn, outcome) {
        match outcome {
            Ok(_) => link.say(format_args!("lane {}: done", turn.lane)),
            Err(Failure { cause, detail }) => {
                link.say(format_args!("lane {}: failed, {cause:?} {detail}", turn.lane));
            }
        }
        link.interrupt();
    }
}

fn advance(device: &RefCell<Device>, turn: Turn, job: Job, link: &impl Link) -> Result<Progress, Failure> {
    let Some(operation) = job.operation else { return fail(Cause::BadParameters, 0) };
    match job.answer {
        None => {
            let Operation { kind, access, address, length, .. } = operation;
            link.say(format_args!("lane {}: {kind:?} {access}, {length} bytes at {address:#x}", turn.lane));
        }
        Some(0) => {}
        Some(1) => return fail(Cause::InvalidResponse, 1),
        Some(code) => return fail(Cause::FailureResponse, u16::try_from(code).unwrap_or(u16::MAX)),
    }
    match operation.kind {
        Kind::Untranslated => {
            let Some(space) = link.untranslated_space(operation.access.pasid) else {
                return fail(Cause::Unsupported, 0);
            };
            let whole = Piece { space, address: operation.address, bytes: operation.length };
            transfer(&operation, &[whole], link)
        }
        Kind::Raw { .. } if job.answer.is_some() => Ok(Progress::Done(None)),
        Kind::Raw { .. } => {
            listen(operation.access, link)?;
            let pages: Vec<u64> = operation.pages().collect();
            send_group(device, turn, &operation, &pages, link)
        }
        Kind::StopMarker => {
            listen(operation.access, link)?;
            // The message has room for a page, although a marker means none.
            send_group(device, turn, &operation, &[operation.address], link)
        }
        Kind::Translated { cache, page_requests } => {
            let (pieces, missing) = translate_all(device, &operation, cache, link)?;
            if missing.is_empty() {
                transfer(&operation, &pieces, link)
            } else if !page_requests {
                fail(Cause::NotMapped, 0)
            } else if job.rounds >= ROUNDS_MAX {
                fail(Cause::TooManyRounds, 0)
            } else {
                send_group(device, turn, &operation, &missing, link)
            }
        }
    }
}

fn fail<T>(cause: Cause, detail: u16) -> Result<T, Failure> {
    Err(Failure { cause, detail })
}

fn listen(access: Access, link: &impl Link) -> Result<(), Failure> {
    link.listen(access.pasid).or_else(|Errno(errno)| fail(Cause::RequestRefused, errno))
}

/// Translates every page of `operation`; returns what to access, in order, and the pages that are missing.
fn translate_all(
    device: &RefCell<Device>,
    operation: &Operation,
    cache: bool,
    link: &impl Link,
) -> Result<(Vec<Piece>, Vec<u64>), Failure> {
    let access = operation.access;
    if !link.ats_enabled() {
        // A function whose ATS is off may hold no translations.
        device.borrow_mut().forget_translations();
    }
    let (mut pieces, mut missing) = (Vec::new(), Vec::new());
    let (mut address, mut left) = (operation.address, operation.length);
    for page in operation.pages() {
        let bytes = left.min((PAGE_BYTES - (address - page)) as usize);
        let cached = if cache { device.borrow().lookup(access, page) } else { None };
        let translation = match cached {
            Some(translation) => Some(translation),
            None => ask(device, access, page, cache, link)?,
        };
        match translation {
            Some(it) => pieces.push(Piece { space: it.space, address: it.of(address), bytes }),
            None => missing.push(page),
        }
        left -= bytes;
        // After the very last page this wraps, and is not used.
        address = address.wrapping_add(bytes as u64);
    }
    Ok((pieces, missing))
}

/// Asks ATS for the translation of `page`, and keeps the answer if `cache`.
fn ask(
    device: &RefCell<Device>,
    access: Access,
    page: u64,
    cache: bool,
    link: &impl Link,
) -> Result<Option<Translation>, Failure> {
    let translation = link.translate(access, page).or_else(|Errno(errno)| fail(Cause::AtsRefused, errno))?;
    // Before the translation is kept or the page requested; after ATS, whose refusal is the better reason.
    listen(access, link)?;
    match translation {
        Some(it) => link.say(format_args!("{page:#x} is {:#x} for a {access}", it.of(page))),
        None => link.say(format_args!("{page:#x} is missing for a {access}")),
    }
    if let (Some(translation), true) = (translation, cache) {
        device.borrow_mut().fill(access, translation);
    }
    Ok(translation)
}

/// Sends one page request for each of `pages`, or one stop marker, as a group.
fn send_group(
    device: &RefCell<Device>,
    turn: Turn,
    operation: &Operation,
    pages: &[u64],
    link: &impl Link,
) -> Result<Progress, Failure> {
    let Access { pasid, privileged, write } = operation.access;
    let marker = operation.kind == Kind::StopMarker;
    let closes = operation.kind != Kind::Raw { last: false };
    let answered = closes && !marker;
    let Some(prgi) = device.borrow_mut().open_group(turn, operation.access, answered) else {
        // The device was reset from within one of our calls, and knows nothing of this operation.
        return Ok(Progress::Waits);
    };
    for (n, &page) in pages.iter().enumerate() {
        let last = closes && n + 1 == pages.len();
        let (read, write) = (!write && !marker, write && !marker);
        let what = if marker { "stop marker" } else { "page request" };
        let place = if last { ", last" } else { "" };
        link.say(format_args!(
            "lane {}: {what} for {page:#x} in group {prgi} with {pasid}{place}",
            turn.lane
        ));
        let request = PageRequest { page, pasid, privileged, read, write, last, prgi };
        link.request_page(request).or_else(|Errno(errno)| fail(Cause::RequestRefused, errno))?;
        device.borrow_mut().sent(turn, last && answered);
    }
    Ok(if answered { Progress::Waits } else { Progress::Done(None) })
}

/// Moves the operation's data between the device and `pieces`, which are in order.
fn transfer(operation: &Operation, pieces: &[Piece], link: &impl Link) -> Result<Progress, Failure> {
    let mut data = if operation.access.write { operation.pattern() } else { vec![0; operation.length] };
    let mut rest = &mut data[..];
    for piece in pieces {
        let (run, after) = rest.split_at_mut(piece.bytes.min(rest.len()));
        let result = if operation.access.write {
            link.store(piece.space, piece.address, run)
        } else {
            link.load(piece.space, piece.address, run)
        };
        link.say(format_args!("{} bytes moved at {:#x}: {result:?}", run.len(), piece.address));
        if let Err(MemTx(result)) = result {
            return fail(Cause::DmaError, result);
        }
        rest = after;
    }
    Ok(Progress::Done((!operation.access.write).then(|| checksum(&data))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registers::control;
    use std::{
        cell::Cell,
        collections::{BTreeMap, HashSet},
    };

    const PLAIN: u8 = 0;
    const PHYSICAL: u8 = 1;

    /// A machine with an IOMMU that maps what a test says, and memory that is all zero at first.
    #[derive(Default)]
    struct Machine {
        /// Page to translation, and whether writes are permitted.
        mapped: RefCell<BTreeMap<u64, (u64, bool)>>,
        memory: RefCell<BTreeMap<u64, u8>>,
        asked: RefCell<Vec<u64>>,
        requests: RefCell<Vec<PageRequest>>,
        heard: RefCell<HashSet<Option<u32>>>,
        interrupts: Cell<u32>,
        ats_off: bool,
        deaf: bool,
        /// The request, counted from 0, that is refused.
        refuses: Option<usize>,
        broken_memory: bool,
        no_untranslated_space: bool,
    }

    impl Machine {
        fn map(&self, page: u64, to: u64) {
            self.mapped.borrow_mut().insert(page, (to, true));
        }

        fn word(&self, address: u64) -> u64 {
            let memory = self.memory.borrow();
            u64::from_le_bytes(std::array::from_fn(|n| {
                memory.get(&(address + n as u64)).copied().unwrap_or(0)
            }))
        }

        fn set_word(&self, address: u64, value: u64) {
            self.memory.borrow_mut().extend((address..).zip(value.to_le_bytes()));
        }
    }

    impl Link for Machine {
        fn listen(&self, pasid: Pasid) -> Result<(), Errno> {
            if self.deaf {
                return Err(Errno(16));
            }
            self.heard.borrow_mut().insert(pasid.0);
            Ok(())
        }

        fn ats_enabled(&self) -> bool {
            !self.ats_off
        }

        fn translate(&self, access: Access, page: u64) -> Result<Option<Translation>, Errno> {
            if self.ats_off {
                return Err(Errno(1));
            }
            self.asked.borrow_mut().push(page);
            let mapped = self.mapped.borrow();
            Ok(mapped
                .get(&page)
                .map(|(translated, write)| Translation {
                    space: Space::fake(PHYSICAL),
                    iova: page,
                    translated: *translated,
                    mask: 0xfff,
                    read: true,
                    write: *write,
                })
                .filter(|it| it.permits(access)))
        }

        fn request_page(&self, request: PageRequest) -> Result<(), Errno> {
            if self.refuses == Some(self.requests.borrow().len()) {
                return Err(Errno::NOSPC);
            }
            self.requests.borrow_mut().push(request);
            Ok(())
        }

        fn untranslated_space(&self, _pasid: Pasid) -> Option<Space> {
            (!self.no_untranslated_space).then_some(Space::fake(PLAIN))
        }

        fn load(&self, _space: Space, address: u64, bytes: &mut [u8]) -> Result<(), MemTx> {
            if self.broken_memory {
                return Err(MemTx(2));
            }
            let memory = self.memory.borrow();
            bytes
                .iter_mut()
                .zip(address..)
                .for_each(|(byte, at)| *byte = memory.get(&at).copied().unwrap_or(0));
            Ok(())
        }

        fn store(&self, space: Space, address: u64, bytes: &[u8]) -> Result<(), MemTx> {
            assert!(space == Space::fake(PLAIN) || space == Space::fake(PHYSICAL));
            if self.broken_memory {
                return Err(MemTx(2));
            }
            self.memory.borrow_mut().extend((address..).zip(bytes.iter().copied()));
            Ok(())
        }

        fn interrupt(&self) {
            self.interrupts.set(self.interrupts.get() + 1);
        }

        fn say(&self, _line: Arguments<'_>) {}
    }

    /// Begins an operation on `lane` in PASID 5, and runs its first turn.
    fn go(device: &RefCell<Device>, machine: &Machine, lane: u64, bits: u32, address: u64, length: u64) {
        let base = 0x100 + lane * 0x40;
        device.borrow_mut().write(base, address, 8);
        device.borrow_mut().write(base + 8, 0x1000, 8);
        device.borrow_mut().write(base + 0x10, 5 << 32 | length, 8);
        let turn = device.borrow_mut().write(base + 0x18, (control::GO | bits).into(), 4);
        run(device, turn.expect("the lane is idle"), machine);
    }

    /// Answers the last group, and runs the turn that this makes due.
    fn answer(device: &RefCell<Device>, machine: &Machine, code: u32) {
        let prgi = machine.requests.borrow().last().expect("there was a request").prgi;
        let turn = device.borrow_mut().respond(Pasid(Some(5)), prgi, code);
        run(device, turn.expect("the group is outstanding"), machine);
    }

    fn status(device: &RefCell<Device>, lane: u64) -> u64 {
        device.borrow().read(0x100 + lane * 0x40 + 0x1c, 4)
    }

    fn failed(cause: Cause, detail: u64) -> u64 {
        detail << 16 | (cause as u64) << 8 | 3
    }

    const BUSY: u64 = 1;
    const DONE: u64 = 2;

    #[test]
    fn a_read_of_mapped_pages_leaves_their_checksum_and_asks_for_nothing() {
        let (device, machine) = (RefCell::default(), Machine::default());
        machine.map(0x4000, 0x9000);
        machine.map(0x5000, 0x7000);
        machine.set_word(0x9ff8, 10);
        machine.set_word(0x7000, 100);

        go(&device, &machine, 0, 0, 0x4ff8, 16);

        assert_eq!(status(&device, 0), DONE);
        assert_eq!(device.borrow().read(0x108, 8), 10 + 3 * 100);
        assert!(machine.requests.borrow().is_empty());
        assert_eq!(machine.interrupts.get(), 1);
    }

    #[test]
    fn the_missing_pages_of_an_operation_become_one_group_in_ascending_order() {
        let (device, machine) = (RefCell::default(), Machine::default());
        machine.map(0x5000, 0x7000);

        go(&device, &machine, 0, control::WRITE | control::PRIVILEGED, 0x4000, 4 * 4096);

        let request = |page, last| PageRequest {
            page,
            pasid: Pasid(Some(5)),
            privileged: true,
            read: false,
            write: true,
            last,
            prgi: 0,
        };
        assert_eq!(
            *machine.requests.borrow(),
            [request(0x4000, false), request(0x6000, false), request(0x7000, true)]
        );
        assert_eq!(status(&device, 0), BUSY);
        assert_eq!(device.borrow().read(0x018, 4), 1, "OUTSTANDING");
        assert_eq!(device.borrow().read(0x01c, 4), 1, "GROUPS");
        assert_eq!(device.borrow().read(0x020, 4), 3, "REQUESTS");
        assert_eq!(machine.interrupts.get(), 0);
    }

    #[test]
    fn no_byte_moves_before_every_page_translates() {
        let (device, machine) = (RefCell::default(), Machine::default());
        machine.map(0x4000, 0x9000);

        go(&device, &machine, 0, control::WRITE, 0x4ff8, 16);
        assert!(machine.memory.borrow().is_empty());
        machine.map(0x5000, 0x7000);
        answer(&device, &machine, 0);

        assert_eq!(status(&device, 0), DONE);
        assert_eq!((machine.word(0x9ff8), machine.word(0x7000)), (0x1000, 0x1001));
    }

    #[test]
    fn a_word_may_cross_into_another_page() {
        let (device, machine) = (RefCell::default(), Machine::default());
        machine.map(0x4000, 0x9000);
        machine.map(0x5000, 0x7000);

        go(&device, &machine, 0, control::WRITE, 0x4ffc, 8);

        assert_eq!((machine.word(0x9ffc), machine.word(0x7000)), (0x1000, 0));
        go(&device, &machine, 1, 0, 0x4ffc, 8);
        assert_eq!(device.borrow().read(0x148, 8), 0x1000);
    }

    #[test]
    fn a_page_that_is_read_only_is_missing_for_a_write() {
        let (device, machine) = (RefCell::default(), Machine::default());
        machine.mapped.borrow_mut().insert(0x4000, (0x9000, false));

        go(&device, &machine, 0, control::WRITE, 0x4000, 8);

        assert_eq!(machine.requests.borrow().len(), 1);
        assert_eq!(status(&device, 0), BUSY);
    }

    #[test]
    fn two_lanes_wait_for_a_group_each() {
        let (device, machine) = (RefCell::default(), Machine::default());

        go(&device, &machine, 0, 0, 0x4000, 8);
        go(&device, &machine, 7, 0, 0x6000, 8);
        machine.map(0x6000, 0x7000);
        answer(&device, &machine, 0);

        assert_eq!((status(&device, 0), status(&device, 7)), (BUSY, DONE));
        assert_eq!(device.borrow().read(0x018, 4), 1, "OUTSTANDING");
    }

    #[test]
    fn an_answer_that_repairs_nothing_is_believed_eight_times() {
        let (device, machine) = (RefCell::default(), Machine::default());

        go(&device, &machine, 0, 0, 0x4000, 8);
        for _ in 0..8 {
            assert_eq!(status(&device, 0), BUSY);
            answer(&device, &machine, 0);
        }

        assert_eq!(status(&device, 0), failed(Cause::TooManyRounds, 0));
        assert_eq!(device.borrow().read(0x124, 4), 8, "ROUNDS");
    }

    #[test]
    fn the_response_code_decides_how_an_operation_fails() {
        for (code, expected) in [
            (1, failed(Cause::InvalidResponse, 1)),
            (2, failed(Cause::FailureResponse, 2)),
            (15, failed(Cause::FailureResponse, 15)),
        ] {
            let (device, machine) = (RefCell::default(), Machine::default());

            go(&device, &machine, 0, 0, 0x4000, 8);
            machine.map(0x4000, 0x9000);
            answer(&device, &machine, code);

            assert_eq!(status(&device, 0), expected);
            assert_eq!(machine.interrupts.get(), 1);
        }
    }

    #[test]
    fn without_page_requests_a_missing_page_fails_the_operation() {
        let (device, machine) = (RefCell::default(), Machine::default());

        go(&device, &machine, 0, control::NO_PRI, 0x4000, 8);

        assert_eq!(status(&device, 0), failed(Cause::NotMapped, 0));
        assert!(machine.requests.borrow().is_empty());
    }

    #[test]
    fn a_group_that_is_refused_midway_is_not_outstanding() {
        let (device, machine) = (RefCell::default(), Machine { refuses: Some(2), ..Machine::default() });

        go(&device, &machine, 0, 0, 0x4000, 4 * 4096);

        assert_eq!(status(&device, 0), failed(Cause::RequestRefused, 28));
        assert_eq!(device.borrow().read(0x018, 8), 0, "OUTSTANDING and GROUPS");
        assert_eq!(device.borrow().read(0x020, 4), 2, "REQUESTS");
    }

    #[test]
    fn a_cached_translation_is_used_until_it_is_invalidated() {
        let (device, machine) = (RefCell::default(), Machine::default());
        machine.map(0x4000, 0x9000);
        machine.set_word(0x9000, 1);
        machine.set_word(0x7000, 2);
        let read = || {
            go(&device, &machine, 0, control::CACHE, 0x4000, 8);
            device.borrow().read(0x108, 8)
        };

        assert_eq!(read(), 1);
        machine.map(0x4000, 0x7000);
        assert_eq!(read(), 1);
        assert_eq!(device.borrow_mut().invalidate(Pasid(Some(5)), 0x4000, 0x4fff), 1);

        assert_eq!(read(), 2);
        assert_eq!(*machine.asked.borrow(), [0x4000, 0x4000]);
        assert_eq!(device.borrow().read(0x014, 4), 1, "INVALIDATIONS");
    }

    #[test]
    fn a_translation_whose_invalidation_would_not_be_heard_is_neither_used_nor_kept() {
        let (device, mut machine) = (RefCell::default(), Machine { deaf: true, ..Machine::default() });
        machine.map(0x4000, 0x9000);

        go(&device, &machine, 0, control::CACHE | control::WRITE, 0x4000, 8);
        assert_eq!(status(&device, 0), failed(Cause::RequestRefused, 16));
        assert!(machine.memory.borrow().is_empty());
        machine.deaf = false;
        go(&device, &machine, 0, control::CACHE, 0x4000, 8);

        assert_eq!(machine.asked.borrow().len(), 2);
    }

    #[test]
    fn without_cache_ats_is_asked_each_time() {
        let (device, machine) = (RefCell::default(), Machine::default());
        machine.map(0x4000, 0x9000);

        go(&device, &machine, 0, control::CACHE, 0x4000, 8);
        go(&device, &machine, 0, 0, 0x4000, 8);

        assert_eq!(machine.asked.borrow().len(), 2);
    }

    #[test]
    fn a_device_whose_ats_is_switched_off_forgets_its_translations() {
        let (device, mut machine) = (RefCell::default(), Machine::default());
        machine.map(0x4000, 0x9000);
        go(&device, &machine, 0, control::CACHE, 0x4000, 8);

        machine.ats_off = true;
        go(&device, &machine, 0, control::CACHE, 0x4000, 8);

        assert_eq!(status(&device, 0), failed(Cause::AtsRefused, 1));
    }

    #[test]
    fn untranslated_dma_asks_nobody() {
        let (device, machine) = (RefCell::default(), Machine::default());

        go(&device, &machine, 0, control::UNTRANSLATED | control::WRITE, 0x4ff8, 16);

        assert_eq!(status(&device, 0), DONE);
        assert_eq!((machine.word(0x4ff8), machine.word(0x5000)), (0x1000, 0x1001));
        assert!(machine.asked.borrow().is_empty() && machine.heard.borrow().is_empty());
    }

    #[test]
    fn untranslated_dma_without_an_address_space_is_unsupported() {
        let (device, machine) =
            (RefCell::default(), Machine { no_untranslated_space: true, ..Machine::default() });

        go(&device, &machine, 0, control::UNTRANSLATED, 0x4000, 8);

        assert_eq!(status(&device, 0), failed(Cause::Unsupported, 0));
    }

    #[test]
    fn a_failed_memory_transaction_fails_the_operation_and_keeps_data() {
        let (device, machine) = (RefCell::default(), Machine { broken_memory: true, ..Machine::default() });

        go(&device, &machine, 0, control::UNTRANSLATED, 0x4000, 8);

        assert_eq!(status(&device, 0), failed(Cause::DmaError, 2));
        assert_eq!(device.borrow().read(0x108, 8), 0x1000, "DATA");
    }

    #[test]
    fn raw_requests_ask_no_ats_and_end_with_the_response() {
        let (device, machine) = (RefCell::default(), Machine::default());
        machine.map(0x4000, 0x9000);

        go(&device, &machine, 0, control::RAW, 0x4008, 8192);
        let pages: Vec<_> = machine.requests.borrow().iter().map(|it| (it.page, it.last)).collect();
        assert_eq!(pages, [(0x4000, false), (0x5000, true)]);
        assert_eq!(status(&device, 0), BUSY);
        answer(&device, &machine, 0);

        assert_eq!(status(&device, 0), DONE);
        assert!(machine.asked.borrow().is_empty() && machine.memory.borrow().is_empty());
    }

    #[test]
    fn raw_requests_without_a_last_one_end_at_once_and_await_nothing() {
        let (device, machine) = (RefCell::default(), Machine::default());

        go(&device, &machine, 0, control::RAW | control::NOT_LAST, 0x4000, 8192);

        assert_eq!(status(&device, 0), DONE);
        assert!(machine.requests.borrow().iter().all(|it| it.read && !it.last));
        assert_eq!(device.borrow().read(0x018, 8), 0, "OUTSTANDING and GROUPS");
        assert_eq!(device.borrow().read(0x020, 4), 2, "REQUESTS");
    }

    #[test]
    fn a_stop_marker_is_last_and_neither_read_nor_write() {
        for write in [0, control::WRITE] {
            let (device, machine) = (RefCell::default(), Machine::default());

            go(&device, &machine, 0, control::RAW | control::STOP_MARKER | write, 0, 0);

            assert_eq!(status(&device, 0), DONE);
            let requests = machine.requests.borrow();
            assert!(matches!(
                requests[..],
                [PageRequest { read: false, write: false, last: true, pasid: Pasid(Some(5)), .. }]
            ));
            assert_eq!(device.borrow().read(0x018, 8), 0, "OUTSTANDING and GROUPS");
        }
    }

    #[test]
    fn registers_that_describe_no_operation_fail_it() {
        let (device, machine) = (RefCell::default(), Machine::default());

        go(&device, &machine, 0, 0, 0x4000, 12);

        assert_eq!(status(&device, 0), failed(Cause::BadParameters, 0));
        assert_eq!(machine.interrupts.get(), 1);
    }

    #[test]
    fn a_reset_while_a_lane_waits_voids_its_operation() {
        let (device, machine) = (RefCell::default(), Machine::default());
        go(&device, &machine, 0, 0, 0x4000, 8);
        let prgi = machine.requests.borrow()[0].prgi;
        let turn = device.borrow_mut().respond(Pasid(Some(5)), prgi, 0).expect("the group is outstanding");

        device.borrow_mut().write(0x028, 1, 4);
        run(&device, turn, &machine);

        assert_eq!(status(&device, 0), 0);
        assert_eq!(machine.requests.borrow().len(), 1);
        assert_eq!(machine.interrupts.get(), 0);
    }
}
