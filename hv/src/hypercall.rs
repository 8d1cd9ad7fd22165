//! The guest's calls. Every argument is a guest's: what names nothing of its own is refused by name, and what lies in its
//! memory is copied once before it is looked at.

use crate::{
    control::{self, Given},
    guest::{ATTACHMENTS, CHANNEL, Guest, REGISTERS, WINDOW},
    hypervisor::{Ending, Inbox, SERVICE_CORE},
};
use arch::{
    cpu,
    interrupts::{self, Source},
};
use broker::{Cookie, Settled};
use channel::{
    call::{
        ARRAY, Call, Code, DEADLINE_MAX_US, DEADLINE_US, NONE, REPORTS, REQUESTS, Status, VERSION, WRITABLE,
    },
    counters::{COUNTERS_WORDS, Counter, TO_CHANNEL_WORD},
    host::Host,
    invalidate::{self, ENTRY_WORDS, Handled, Layout, Range, Refusal, Request},
};
use core::sync::atomic::Ordering::{AcqRel, Relaxed, Release};
use heapless::Vec;
use iommu::{Attachment, FirstStage, Gpa, Invalidation, Iova, Outcome, PAGE_SIZE, Pasid, Perms, Stages};

/// Bytes that one call maps or unmaps, at most: 64 pages.
const RANGE: u64 = 64 * PAGE_SIZE;
/// Bytes of a line that a guest says.
const LINE: usize = 128;
/// The longest sleep, in microseconds.
const SLEEP_US: u64 = 10_000_000;

const _: () =
    assert!(broker::BUCKETS == channel::counters::BUCKETS, "the broker counts as the channel shows it");

/// What a call returns besides its status.
type Values = [u64; 3];

impl From<control::Error> for Refused {
    fn from(error: control::Error) -> Self {
        Self(match error {
            control::Error::Unit(iommu::Error::Timeout { .. } | iommu::Error::QueueFull { .. }) => {
                Status::TimedOut
            }
            control::Error::Unit(iommu::Error::PasidOutOfRange { .. } | iommu::Error::Unsupported { .. }) => {
                Status::Malformed
            }
            control::Error::Unit(iommu::Error::Exhausted { .. })
            | control::Error::Tables(pgtable::Error::NoFrame) => Status::NoRoom,
            control::Error::Tables(pgtable::Error::Range { .. } | pgtable::Error::Permissions) => {
                Status::Malformed
            }
            _ => Status::WrongState,
        })
    }
}

/// A call that was not done.
struct Refused(Status);

impl Guest {
    /// Handles one call. Returns how the guest ended, if the call ended it.
    pub fn call(&mut self, operation: u64, arguments: [u64; 4], inbox: &mut Inbox) -> Option<Ending> {
        if Call::from_number(operation) == Some(Call::Finish) {
            return Some(Ending::Finished { passed: arguments[0] == 1 });
        }
        let (status, [first, second, third]) = match self.dispatch(operation, arguments, inbox) {
            Ok(values) => (Status::Done, values),
            Err(Refused(status)) => {
                defmt::debug!("guest {=usize}: call {=u64:#x} refused: {}", self.index, operation, status);
                self.home().refused_calls.fetch_add(1, Relaxed);
                (status, [0; 3])
            }
        };
        self.vcpu.answer([status as u64, first, second, third]);
        None
    }

    fn dispatch(
        &mut self,
        operation: u64,
        arguments: [u64; 4],
        inbox: &mut Inbox,
    ) -> Result<Values, Refused> {
        let [first, second, third, fourth] = arguments;
        match Call::from_number(operation).ok_or(Refused(Status::UnknownCall))? {
            Call::Probe => self.probe(first),
            Call::OpenChannel if self.channel.is_some() => Err(Refused(Status::WrongState)),
            Call::OpenChannel => {
                self.open_channel().ok_or(Refused(Status::NoRoom))?;
                Ok([CHANNEL.0, 0, 0])
            }
            Call::Attach => self.call_attach(first, second, third, fourth),
            Call::Bind => self.call_bind(first, second, third),
            Call::Detach => match self.detach(first) {
                Some(Ok(())) => Ok([0; 3]),
                Some(Err(error)) => Err(error.into()),
                None => Err(Refused(Status::NotYours)),
            },
            Call::Map => {
                let owned = self.owned(first & !WRITABLE).ok_or(Refused(Status::NotYours))?;
                let perms = if first & WRITABLE != 0 { Perms::READ_WRITE } else { Perms::READ };
                whole_pages(second | third, fourth)?;
                let grant = self.ram.grant(Gpa(third), fourth).ok_or(Refused(Status::NotYours))?;
                self.map(owned, Iova(second), &grant, perms)?;
                Ok([0; 3])
            }
            Call::Unmap => {
                let owned = self.owned(first).ok_or(Refused(Status::NotYours))?;
                whole_pages(second, third)?;
                self.unmap(owned, Iova(second), third)?;
                Ok([0; 3])
            }
            Call::Respond => self.respond(first, second),
            Call::Task => Ok([0, 1, 2].map(|at: usize| self.home().task[at].load(Relaxed))),
            Call::Say => {
                let line = self.line(first, second)?;
                defmt::info!(
                    "guest {=usize}: {=str}",
                    self.index,
                    core::str::from_utf8(&line).unwrap_or("(not UTF-8)")
                );
                Ok([0; 3])
            }
            Call::Report => {
                let at = usize::try_from(first)
                    .ok()
                    .filter(|&at| at < REPORTS)
                    .ok_or(Refused(Status::Malformed))?;
                self.home().reports[at].store(second, Release);
                // One interrupt for each time that someone waits, however often the guest reports.
                if self.hv.control_waits.swap(false, AcqRel) {
                    interrupts::kick(SERVICE_CORE, Source::Kick);
                }
                Ok([0; 3])
            }
            Call::Sleep => {
                self.sleep(inbox, cpu::now_us().saturating_add(first.min(SLEEP_US)));
                Ok([0; 3])
            }
            Call::Invalidate => self.invalidate(first, second, third),
            Call::Counters => self.counters(first, second, third),
            // Answered before; it has no answer.
            Call::Finish => Ok([0; 3]),
        }
    }

    fn probe(&self, which: u64) -> Result<Values, Refused> {
        let Some(at) = which.checked_sub(1) else {
            // PASID 0 stands for accesses without one in some units.
            let first_pasid = if self.hv.capabilities.pasid_bits > 0 { 1 } else { NONE };
            return Ok([VERSION, self.devices.len() as u64, first_pasid]);
        };
        let given =
            usize::try_from(at).ok().and_then(|at| self.devices.get(at)).ok_or(Refused(Status::NotYours))?;
        let device = self.hv.devices.get(given.number).ok_or(Refused(Status::NotYours))?;
        let bytes = device.registers.end.0 - device.registers.start.0;
        let identity = u64::from(device.function.vendor) | u64::from(device.function.device) << 16;
        let requests = if self.asks_for_pages(device) { REQUESTS } else { 0 };
        Ok([REGISTERS.0 + at * WINDOW, bytes, identity | requests])
    }

    fn call_attach(
        &mut self,
        device: u64,
        pasid: u64,
        opaque: u64,
        deadline: u64,
    ) -> Result<Values, Refused> {
        if device == 0 || device > self.devices.len() as u64 {
            return Err(Refused(Status::NotYours));
        }
        let pasid = match pasid {
            NONE => None,
            number => {
                let number = u32::try_from(number).ok().and_then(Pasid::new);
                Some(number.ok_or(Refused(Status::Malformed))?)
            }
        };
        let deadline_us = match deadline {
            NONE => DEADLINE_US,
            us if us <= DEADLINE_MAX_US => us,
            _ => return Err(Refused(Status::Malformed)),
        };
        if self.attachments.iter().all(Option::is_some) {
            return Err(Refused(Status::NoRoom));
        }
        Ok([self.attach(device as u32, pasid, opaque, deadline_us)?, 0, 0])
    }

    /// Binds a first stage of the guest's own: its entry is copied, and the driver takes from the copy what is a guest's.
    fn call_bind(&mut self, device: u64, entry: u64, opaque: u64) -> Result<Values, Refused> {
        if device == 0 || device > self.devices.len() as u64 {
            return Err(Refused(Status::NotYours));
        }
        if !self.hv.capabilities.nested {
            return Err(Refused(Status::UnknownCall));
        }
        if self.attachments.iter().all(Option::is_some) {
            return Err(Refused(Status::NoRoom));
        }
        let mut words = Vec::<u64, 8>::new();
        self.copy_words(entry, 8, &mut words)?;
        let entry = words.into_array().map_err(|_| Refused(Status::Malformed))?;
        Ok([self.bind(device as u32, FirstStage::Contexts { entry }, opaque)?, 0, 0])
    }

    /// Answers groups: each word of the array is loaded once, and looked at then.
    fn respond(&mut self, array: u64, length: u64) -> Result<Values, Refused> {
        if length > ARRAY {
            return Err(Refused(Status::Malformed));
        }
        let mut words = self.ram.words(Gpa(array), 2 * length as usize).ok_or(Refused(Status::NotYours))?;
        let (mut refused, mut gave_up) = (0, false);
        // The last refusal, for the log: nothing is logged while the lock is held.
        let mut why = None;
        let (ledger, now_us) = (self.hv.ledger, cpu::now_us());
        self.hv.answer_all(core::iter::from_fn(|| {
            loop {
                let (cookie, code) = (Cookie(words.next()?), words.next()?);
                let outcome = match Code::from_number(code) {
                    Some(Code::Success) => Outcome::Success,
                    Some(Code::Invalid) => Outcome::Invalid,
                    Some(Code::Failure) => Outcome::Failure,
                    None => {
                        (refused, why) = (refused + 1, Some((cookie, None)));
                        continue;
                    }
                };
                gave_up |= outcome == Outcome::Failure;
                match ledger.settle(self.queue, cookie, outcome, now_us) {
                    Ok(Settled::Now(answer)) => return Some(answer),
                    Ok(Settled::Held) => {}
                    Err(refusal) => (refused, why) = (refused + 1, Some((cookie, Some(refusal)))),
                }
            }
        }));
        drop(words);
        match why {
            Some((cookie, Some(refusal))) => {
                defmt::debug!("guest {=usize}: {} refused: {}", self.index, cookie, refusal);
            }
            Some((cookie, None)) => {
                defmt::debug!("guest {=usize}: {} refused: its code is none", self.index, cookie);
            }
            None => {}
        }
        // A guest that says failure gives up its device's page requests.
        if gave_up {
            self.restrain_devices();
        }
        Ok([length, refused, 0])
    }

    /// Copies `count` words, at most `N`, out of the guest's memory: each is loaded once.
    fn copy_words<const N: usize>(
        &self,
        from: u64,
        count: usize,
        words: &mut Vec<u64, N>,
    ) -> Result<(), Refused> {
        let from = self.ram.words(Gpa(from), count).ok_or(Refused(Status::NotYours))?;
        // No more than there is room for.
        words.extend(from.take(N));
        Ok(())
    }

    /// Makes the unit forget what an array names: one batch, and one wait, for all of a call that the unit takes at once.
    fn invalidate(&mut self, layout: u64, array: u64, entries: u64) -> Result<Values, Refused> {
        // Commands are about the guest's own first stages; where none is bound there is nothing that they could name.
        let layout = Layout::from_number(layout).filter(|layout| match layout {
            Layout::Pages => true,
            Layout::SmmuCommand => self.bound().next().is_some(),
            Layout::VtdStage1 => false,
        });
        let layout = layout.ok_or(Refused(Status::UnknownType))?;
        let count = entries.min(ARRAY) as usize;
        let mut words = Vec::<u64, { ARRAY as usize * ENTRY_WORDS }>::new();
        self.copy_words(array, count * layout.words(), &mut words)?;
        // Of a command, one for each of the guest's first stages.
        let mut batch = Vec::<Invalidation, { ARRAY as usize * ATTACHMENTS }>::new();
        let Handled { handled, refusal, .. } = invalidate::handle(layout, &words, count, |request| {
            let not_yours = Refusal { why: invalidate::Refused::NotYours, word: 0, bits: 0 };
            match request {
                Request::Attachment { attachment: name, range: Range::Pages { first, pages }, .. } => {
                    let attachment = self.owned(name).ok_or(not_yours)?.space.attachment;
                    if attachment.stages == Stages::Nested {
                        return Err(not_yours);
                    }
                    // There is room, here and below: the batch has as many as the array for each attachment.
                    let _ = batch.push(Invalidation::Pages { attachment, iova: first, pages });
                }
                Request::Stage1 { asid, range, .. } => {
                    let pages = match range {
                        Range::All => None,
                        Range::Pages { first, pages } => Some((first, pages)),
                    };
                    for attachment in self.bound() {
                        let _ = batch.push(Invalidation::FirstStage { attachment, asid, pages });
                    }
                }
                Request::Contexts { device, pasid, .. } => {
                    let of_device = |attachment: &Attachment| self.device_of(attachment) == Some(device.0);
                    for attachment in self.bound().filter(of_device) {
                        let _ = batch.push(Invalidation::Contexts { attachment, pasid });
                    }
                }
                // A bound device keeps no translations of its own: it was not told that it may.
                _ => return Err(not_yours),
            }
            Ok(())
        });
        if !batch.is_empty() {
            self.invalidate_all(&batch).map_err(control::Error::Unit)?;
            for (entry, invalidation) in batch.iter().enumerate() {
                control::tell_invalidated(entry, invalidation);
            }
        }
        let home = &self.hv.homes[self.index];
        home.invalidated.fetch_add(handled as u64, Relaxed);
        home.refused_invalidations.fetch_add(refusal.is_some().into(), Relaxed);
        let [why, bits] = refusal.map_or([0; 2], Refusal::values);
        Ok([handled as u64, why, bits])
    }

    /// Returns the guest's name for the device of an attachment.
    fn device_of(&self, attachment: &Attachment) -> Option<u32> {
        let is_its = |given: &Given| {
            self.hv.devices.get(given.number).is_some_and(|device| device.function.id == attachment.stream)
        };
        self.devices.iter().position(is_its).map(|at| at as u32 + 1)
    }

    /// Makes the unit forget all of a batch: in one submission, or in as few as the unit takes so much in.
    fn invalidate_all(&self, batch: &[Invalidation]) -> Result<(), iommu::Error> {
        match self.hv.invalidate(batch) {
            Err(iommu::Error::Exhausted { .. }) if batch.len() > 1 => {
                let (first, rest) = batch.split_at(batch.len() / 2);
                self.invalidate_all(first)?;
                self.invalidate_all(rest)
            }
            invalidated => invalidated,
        }
    }

    /// Writes what was counted of a device into the guest's memory.
    fn counters(&mut self, device: u64, to: u64, bytes: u64) -> Result<Values, Refused> {
        let at = device.checked_sub(1).and_then(|at| usize::try_from(at).ok());
        let id = at.and_then(|at| self.devices.get(at)).ok_or(Refused(Status::NotYours))?.id;
        let ledger = self.hv.ledger;
        let (Some(tally), Some(latencies)) = (ledger.tally(id), ledger.latencies(id)) else {
            return Err(Refused(Status::NotYours));
        };
        let missed = ledger.missed(self.queue);
        let value = |counter| match counter {
            Counter::Requests => tally.requests,
            Counter::Groups => tally.opened,
            Counter::Succeeded => tally.succeeded,
            Counter::Declined => tally.declined,
            Counter::Expired => tally.expired,
            Counter::Evicted => tally.evicted,
            Counter::Refused => tally.refused,
            Counter::Poisoned => tally.poisoned,
            Counter::Discarded => tally.discarded,
            Counter::Duplicates => tally.duplicates,
            Counter::Overflows => ledger.overflows(),
            Counter::Late => missed.late,
            Counter::Stale => missed.stale,
            Counter::Unknown => missed.unknown,
            Counter::OutOfRange => missed.out_of_range,
            Counter::LostEvents => self.channel.as_ref().map_or(0, Host::events_lost),
            Counter::Failed => tally.failed,
            Counter::Unrepaired => tally.unrepaired,
            Counter::Held => tally.held,
            Counter::Outstanding => ledger.outstanding_requests(id),
        };
        let counts = (0..TO_CHANNEL_WORD as u64).map(|number| Counter::from_number(number).map_or(0, value));
        let words: Vec<u64, COUNTERS_WORDS> =
            counts.chain(latencies.delivery).chain(latencies.answer).collect();
        let wanted = words.len().min(usize::try_from(bytes / 8).unwrap_or(usize::MAX));
        let end = to.checked_add(wanted as u64 * 8).filter(|&end| end <= self.ram.bytes());
        if !to.is_multiple_of(8) || end.is_none() {
            return Err(Refused(Status::NotYours));
        }
        for (at, &word) in words.iter().take(wanted).enumerate() {
            self.ram.store(Gpa(to + at as u64 * 8), word);
        }
        Ok([wanted as u64 * 8, 0, 0])
    }

    /// Copies a line out of the guest's memory.
    fn line(&self, from: u64, bytes: u64) -> Result<Vec<u8, LINE>, Refused> {
        if bytes > LINE as u64 {
            return Err(Refused(Status::Malformed));
        }
        let mut line = Vec::new();
        for at in 0..bytes {
            let gpa = from.checked_add(at).ok_or(Refused(Status::NotYours))?;
            let word = self.ram.load(Gpa(gpa & !7)).ok_or(Refused(Status::NotYours))?;
            // There is room: the length was checked.
            let _ = line.push((word >> (gpa % 8 * 8)) as u8);
        }
        Ok(line)
    }
}

/// Checks that addresses and length are those of whole pages, and that one call may take so many.
fn whole_pages(addresses: u64, bytes: u64) -> Result<(), Refused> {
    let whole = (addresses | bytes).is_multiple_of(PAGE_SIZE);
    if whole && bytes != 0 && bytes <= RANGE { Ok(()) } else { Err(Refused(Status::Malformed)) }
}
