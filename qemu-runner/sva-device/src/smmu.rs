// SPDX-License-Identifier: GPL-2.0-or-later
//! What QEMU's SMMUv3 lacks for a device that sends page requests, after Arm IHI 0070: our own test double.
//!
//! QEMU's SMMUv3 has neither ATS nor PRI for emulated devices. An [`Smmu`] stands in front of its registers: it answers
//! for those of the PRI queue, changes what a few others say, and leaves the rest, translation included, to QEMU. It
//! writes page requests to the guest's PRI queue, and watches the command queue, of which QEMU takes `CMD_PRI_RESP` and
//! `CMD_ATC_INV` without doing anything about them. Nothing here calls QEMU: [`Beneath`] does.
//!
//! The registers are `Cell`s, and none is kept borrowed: what the [`Beneath`] does can come back here, when a guest has
//! put a queue where registers are.

use crate::{
    priq::{PRIQS, PriQueue, QueueWord, entry},
    qemu::{Errno, PageRequest},
};
use std::{cell::Cell, fmt::Arguments};

/// Bytes of registers: pages 0 and 1, of 64 KiB each.
pub(crate) const REGISTER_BYTES: u64 = 0x2_0000;

const PAGE_1: u64 = 0x1_0000;

/// Offsets of registers.
mod at {
    pub(super) const IDR0: u64 = 0x00;
    pub(super) const IDR1: u64 = 0x04;
    pub(super) const CR0: u64 = 0x20;
    pub(super) const CR0ACK: u64 = 0x24;
    pub(super) const IRQ_CTRLACK: u64 = 0x54;
    pub(super) const GERROR: u64 = 0x60;
    pub(super) const GERRORN: u64 = 0x64;
    pub(super) const STRTAB_BASE: u64 = 0x80;
    pub(super) const STRTAB_BASE_CFG: u64 = 0x88;
    pub(super) const CMDQ_BASE: u64 = 0x90;
    pub(super) const CMDQ_PROD: u64 = 0x98;
    pub(super) const CMDQ_CONS: u64 = 0x9c;
    pub(super) const EVENTQ_PROD: u64 = super::PAGE_1 + 0xa8;
    pub(super) const EVENTQ_CONS: u64 = super::PAGE_1 + 0xac;
    pub(super) const PRIQ_BASE: u64 = 0xc0;
    pub(super) const PRIQ_BASE_HIGH: u64 = 0xc4;
    pub(super) const PRIQ_PROD: u64 = super::PAGE_1 + 0xc8;
    pub(super) const PRIQ_CONS: u64 = super::PAGE_1 + 0xcc;
}

const IDR0_ATS: u32 = 1 << 10;
/// No split-stage ATS.
const IDR0_NS1ATS: u32 = 1 << 11;
const IDR0_PRI: u32 = 1 << 16;
const IDR1_PRIQS_SHIFT: u32 = 11;
const CR0_SMMUEN: u32 = 1 << 0;
const CR0_PRIQEN: u32 = 1 << 1;
const CR0_EVENTQEN: u32 = 1 << 2;
const CR0_ATSCHK: u32 = 1 << 4;
const IRQ_CTRL_GERROR: u32 = 1 << 0;
const IRQ_CTRL_PRIQ: u32 = 1 << 1;
const GERROR_PRIQ_ABT_ERR: u32 = 1 << 3;
/// Addresses in registers and structures of an SMMU with 52-bit addresses or fewer.
const ADDRESS: u64 = (1 << 52) - 1;
const CMD_ATC_INV: u64 = 0x40;
const CMD_PRI_RESP: u64 = 0x41;
/// An opcode that no SMMU knows.
const CMD_UNKNOWN: u64 = 0xff;

/// How a page request group was answered, by the codes that the device reports.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Response {
    Success = 0,
    InvalidRequest = 1,
    Failure = 2,
}

/// A page group response message, without PASID.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Answer {
    pub(crate) stream: u32,
    pub(crate) prgi: u16,
    pub(crate) response: Response,
}

/// An interrupt output; each interrupt is a pulse.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Line {
    PriQueue,
    GlobalError,
}

/// What an [`Smmu`] stands in front of, and the way from it to memory, interrupts and devices.
pub(crate) trait Beneath {
    /// Reads the register of QEMU's SMMU at `offset`.
    fn read(&self, offset: u64) -> u32;
    /// Writes the register of QEMU's SMMU at `offset`.
    fn write(&self, offset: u64, value: u32);
    /// Reads physical memory; `None` when the access aborts.
    fn load(&self, address: u64) -> Option<u64>;
    /// Writes physical memory; returns whether the access succeeded.
    fn store(&self, address: u64, bytes: &[u8]) -> bool;
    /// Pulses an interrupt output.
    fn pulse(&self, line: Line);
    /// Sends software's answer to its device at once.
    fn respond(&self, answer: Answer);
    /// Sends an answer of the SMMU's own to its device, after a while.
    fn respond_later(&self, answer: Answer);
    /// Sends an invalidation of the addresses `first` to `last`, without PASID, to the device of `stream`.
    fn invalidate(&self, stream: u32, first: u64, last: u64);
    /// Says what happens, to whoever asked to be told.
    fn say(&self, line: Arguments<'_>);
}

/// The state of what stands in front of one SMMU.
#[derive(Default)]
pub(crate) struct Smmu {
    queue: Cell<PriQueue>,
    /// `SMMU_GERROR.PRIQ_ABT_ERR`, in place.
    error: Cell<u32>,
    /// `SMMU_GERRORN.PRIQ_ABT_ERR`, in place.
    acknowledged: Cell<u32>,
    /// Answers to this stream become a command that no SMMU knows, before QEMU's SMMU comes to them.
    spoiled: Option<u32>,
}

impl Smmu {
    /// What stands in front of an SMMU that is to refuse answers to `spoiled`.
    pub(crate) fn new(spoiled: Option<u32>) -> Self {
        Self { spoiled, ..Self::default() }
    }

    /// Returns to the state of power-on.
    pub(crate) fn power_on(&self) {
        self.queue.set(PriQueue::default());
        self.error.set(0);
        self.acknowledged.set(0);
    }

    /// Returns the 4 bytes at `offset`, a multiple of 4.
    pub(crate) fn read(&self, beneath: &impl Beneath, offset: u64) -> u32 {
        if let Some(word) = queue_word(offset) {
            return self.queue.get().read(word);
        }
        if is_reserved(offset) {
            return 0;
        }
        let value = beneath.read(offset);
        match offset {
            at::IDR0 => value | IDR0_ATS | IDR0_NS1ATS | IDR0_PRI,
            at::IDR1 => value | PRIQS << IDR1_PRIQS_SHIFT,
            at::GERROR => value & !GERROR_PRIQ_ABT_ERR | self.error.get(),
            at::GERRORN => value & !GERROR_PRIQ_ABT_ERR | self.acknowledged.get(),
            _ => value,
        }
    }

    /// Stores 4 bytes at `offset`, a multiple of 4.
    pub(crate) fn write(&self, beneath: &impl Beneath, offset: u64, value: u32) {
        if let Some(word) = queue_word(offset) {
            let enabled = (beneath.read(at::CR0) | beneath.read(at::CR0ACK)) & CR0_PRIQEN != 0;
            return self.change_queue(|queue| queue.write(word, value, enabled));
        }
        match offset {
            _ if is_reserved(offset) => {}
            // QEMU's SMMU consumes commands within these writes, and within no others.
            at::CR0 => self.watch(beneath, || beneath.write(offset, value)),
            at::CMDQ_PROD => {
                self.spoil(beneath, value);
                self.watch(beneath, || beneath.write(offset, value));
            }
            at::GERRORN => {
                self.acknowledged.set(value & GERROR_PRIQ_ABT_ERR);
                self.watch(beneath, || beneath.write(offset, value & !GERROR_PRIQ_ABT_ERR));
            }
            _ => beneath.write(offset, value),
        }
    }

    fn change_queue<T>(&self, change: impl FnOnce(&mut PriQueue) -> T) -> T {
        let mut queue = self.queue.get();
        let result = change(&mut queue);
        self.queue.set(queue);
        result
    }

    /// Does `write`, and then acts on the commands that it made QEMU's SMMU consume.
    fn watch(&self, beneath: &impl Beneath, write: impl FnOnce()) {
        let before = beneath.read(at::CMDQ_CONS);
        write();
        let after = beneath.read(at::CMDQ_CONS);
        for place in commands(beneath, before, after) {
            if let (Some(low), Some(high)) = (beneath.load(place), beneath.load(place + 8)) {
                obey(beneath, low, high);
            }
        }
    }

    /// Spoils the commands up to `end` that are answers to a stream whose answers are to be refused.
    fn spoil(&self, beneath: &impl Beneath, end: u32) {
        let Some(stream) = self.spoiled else { return };
        for place in commands(beneath, beneath.read(at::CMDQ_CONS), end) {
            let is_one = |low: &u64| low & 0xff == CMD_PRI_RESP && low >> 32 == u64::from(stream);
            if let Some(low) = beneath.load(place).filter(is_one) {
                beneath.store(place, &(low & !0xff | CMD_UNKNOWN).to_le_bytes());
                beneath.say(format_args!("an answer to stream {stream:#x} is spoiled"));
            }
        }
    }

    /// Takes a page request message of `stream`, which has no PASID.
    pub(crate) fn request(&self, beneath: &impl Beneath, stream: u16, request: PageRequest) {
        let answer = |response| {
            let PageRequest { prgi, .. } = request;
            beneath
                .say(format_args!("answering {response:?} to group {prgi} of stream {stream:#x} by itself"));
            beneath.respond_later(Answer { stream: stream.into(), prgi, response });
        };
        let on = CR0_SMMUEN | CR0_PRIQEN;
        if beneath.read(at::CR0ACK) & on != on || self.error != self.acknowledged {
            return answer(Response::Failure);
        }
        let Some(place) = self.queue.get().place() else {
            self.change_queue(PriQueue::overflow);
            beneath.say(format_args!("PRI queue overflow"));
            if request.last {
                answer(Response::Success);
            }
            return;
        };
        if !beneath.store(place, &entry(stream, request)) {
            self.error.set(self.error.get() ^ GERROR_PRIQ_ABT_ERR);
            if beneath.read(at::IRQ_CTRLACK) & IRQ_CTRL_GERROR != 0 {
                beneath.pulse(Line::GlobalError);
            }
            return answer(Response::Failure);
        }
        let was_empty = self.change_queue(PriQueue::push);
        if was_empty && beneath.read(at::IRQ_CTRLACK) & IRQ_CTRL_PRIQ != 0 {
            beneath.pulse(Line::PriQueue);
        }
    }

    /// Asks QEMU's SMMU for a translation, as ATS does: only if the stream may use ATS, and without recording an
    /// event when there is none.
    pub(crate) fn translate<T>(
        &self,
        beneath: &impl Beneath,
        stream: u16,
        ask: impl FnOnce() -> T,
    ) -> Result<T, Errno> {
        if beneath.read(at::CR0ACK) & CR0_SMMUEN == 0 || !has_ats(beneath, stream) {
            beneath
                .say(format_args!("stream {stream:#x} has no ATS: SMMUEN is 0, or EATS of its entry not 1"));
            return Err(Errno::PERM);
        }
        // There is no other way to tell QEMU's SMMU not to record; under the big lock nobody sees the difference.
        let cr0 = beneath.read(at::CR0);
        beneath.write(at::CR0, cr0 & !CR0_EVENTQEN);
        let answer = ask();
        beneath.write(at::CR0, cr0);
        Ok(answer)
    }

    /// Whether a translated transaction of `stream` may pass.
    pub(crate) fn passes_translated(&self, beneath: &impl Beneath, stream: u16) -> bool {
        let cr0 = beneath.read(at::CR0ACK);
        cr0 & CR0_SMMUEN != 0 && (cr0 & CR0_ATSCHK == 0 || has_ats(beneath, stream))
    }
}

/// Returns where the commands from index `from` to before index `to` are.
fn commands<B: Beneath>(beneath: &B, from: u32, to: u32) -> impl Iterator<Item = u64> + use<B> {
    let base = read64(beneath, at::CMDQ_BASE);
    // QEMU's SMMU has `SMMU_IDR1.CMDQS` 19.
    let indices = (2 << (base as u32 & 0x1f).min(19)) - 1;
    let count = to.wrapping_sub(from) & indices;
    (0..count).map(move |n| {
        let index = from.wrapping_add(n) & indices >> 1;
        (base & ADDRESS & !0x1f) + u64::from(index) * 16
    })
}

fn queue_word(offset: u64) -> Option<QueueWord> {
    Some(match offset {
        at::PRIQ_BASE => QueueWord::BaseLow,
        at::PRIQ_BASE_HIGH => QueueWord::BaseHigh,
        at::PRIQ_PROD => QueueWord::Prod,
        at::PRIQ_CONS => QueueWord::Cons,
        _ => return None,
    })
}

/// Whether `offset` is in page 1 and no register of that page.
///
/// QEMU's page 1 is an alias of page 0. The architecture allows that, and it allows this, which finds more mistakes.
fn is_reserved(offset: u64) -> bool {
    offset >= PAGE_1 && !matches!(offset, at::EVENTQ_PROD | at::EVENTQ_CONS)
}

/// Acts on a command, if it is one of the two that QEMU's SMMU ignores and devices wait for.
fn obey(beneath: &impl Beneath, low: u64, high: u64) {
    let opcode = low & 0xff;
    if !matches!(opcode, CMD_ATC_INV | CMD_PRI_RESP) || beneath.read(at::CR0ACK) & CR0_SMMUEN == 0 {
        return;
    }
    let stream = (low >> 32) as u32;
    if low & 1 << 11 != 0 {
        beneath.say(format_args!("command {opcode:#x} for stream {stream:#x} has SSV, and no effect"));
    } else if opcode == CMD_ATC_INV {
        let size = high & 0x3f;
        if size > 52 {
            // The span is unknown, and may be nothing.
            return beneath.say(format_args!("CMD_ATC_INV for stream {stream:#x} has Size {size}, above 52"));
        }
        let rest = ((1 << size) - 1) << 12 | 0xfff;
        beneath.invalidate(stream, high & !rest, high | rest);
    } else {
        let prgi = (high & 0x1ff) as u16;
        let response = match high >> 12 & 3 {
            0 => Response::Failure,
            1 => Response::InvalidRequest,
            2 => Response::Success,
            _ => {
                return beneath
                    .say(format_args!("CMD_PRI_RESP for stream {stream:#x} has the reserved Resp 3"));
            }
        };
        beneath.respond(Answer { stream, prgi, response });
    }
}

/// Whether the stream table lets `stream` use full ATS: a valid entry that translates, with `EATS` 1.
fn has_ats(beneath: &impl Beneath, stream: u16) -> bool {
    let Some(entry) = stream_table_entry(beneath, stream) else { return false };
    let (Some(low), Some(high)) = (beneath.load(entry), beneath.load(entry + 8)) else { return false };
    let (valid, config, eats) = (low & 1 != 0, low >> 1 & 7, high >> 28 & 3);
    valid && config > 4 && eats == 1
}

/// Returns the address of the stream table entry of `stream`, if the table is large enough.
fn stream_table_entry(beneath: &impl Beneath, stream: u16) -> Option<u64> {
    const ENTRY_BYTES: u64 = 64;
    let base = read64(beneath, at::STRTAB_BASE) & ADDRESS & !0x3f;
    let config = beneath.read(at::STRTAB_BASE_CFG);
    let stream = u64::from(stream);
    // Streams have 16 bits (`SMMU_IDR1.SIDSIZE`).
    if stream >> (config & 0x3f).min(16) != 0 {
        return None;
    }
    if config >> 16 & 3 != 1 {
        return Some(base + stream * ENTRY_BYTES);
    }
    let split = match config >> 6 & 0x1f {
        split @ (8 | 10) => split,
        _ => 6,
    };
    let descriptor = beneath.load(base + (stream >> split) * 8)?;
    let (span, index) = (descriptor as u32 & 0x1f, stream & ((1 << split) - 1));
    let entries = 1u64 << span.checked_sub(1).filter(|log2| *log2 <= split)?;
    (index < entries).then_some((descriptor & ADDRESS & !0x3f) + index * ENTRY_BYTES)
}

fn read64(beneath: &impl Beneath, offset: u64) -> u64 {
    u64::from(beneath.read(offset)) | u64::from(beneath.read(offset + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::Pasid;
    use std::{cell::RefCell, collections::BTreeMap};

    const ON: u32 = CR0_SMMUEN | CR0_PRIQEN | CR0_EVENTQEN | 1 << 3;
    const STREAM: u16 = 0x20;
    const QUEUE: u64 = 0x8010_4000;
    const COMMANDS: u64 = 0x8010_0000;
    const TABLE: u64 = 0x8020_0000;
    const IRQ_CTRL: u64 = 0x50;

    #[derive(Debug, Eq, PartialEq)]
    enum Did {
        Pulse(Line),
        Respond(Answer),
        RespondLater(Answer),
        Invalidate(u32, u64, u64),
    }

    /// QEMU's SMMU: what was written is there, control registers are acknowledged, commands consumed, at once.
    #[derive(Default)]
    struct Qemu {
        registers: RefCell<BTreeMap<u64, u32>>,
        memory: RefCell<BTreeMap<u64, u64>>,
        /// Where in the command queue an error is.
        stops_at: Cell<Option<u32>>,
        /// Whether writes of memory abort.
        aborts: Cell<bool>,
        did: RefCell<Vec<Did>>,
    }

    impl Beneath for Qemu {
        fn read(&self, offset: u64) -> u32 {
            self.registers.borrow().get(&offset).copied().unwrap_or(0)
        }

        fn write(&self, offset: u64, value: u32) {
            let copied = match offset {
                at::CR0 => Some(at::CR0ACK),
                IRQ_CTRL => Some(at::IRQ_CTRLACK),
                _ => None,
            };
            self.registers.borrow_mut().extend([offset].into_iter().chain(copied).map(|it| (it, value)));
            if matches!(offset, at::CR0 | at::CMDQ_PROD | at::GERRORN) {
                let cons = self.stops_at.get().unwrap_or(self.read(at::CMDQ_PROD));
                self.registers.borrow_mut().insert(at::CMDQ_CONS, cons);
            }
        }

        fn load(&self, address: u64) -> Option<u64> {
            self.memory.borrow().get(&address).copied()
        }

        fn store(&self, address: u64, bytes: &[u8]) -> bool {
            let words = bytes.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
            self.memory.borrow_mut().extend((address..).step_by(8).zip(words));
            !self.aborts.get()
        }

        fn pulse(&self, line: Line) {
            self.did.borrow_mut().push(Did::Pulse(line));
        }

        fn respond(&self, answer: Answer) {
            self.did.borrow_mut().push(Did::Respond(answer));
        }

        fn respond_later(&self, answer: Answer) {
            self.did.borrow_mut().push(Did::RespondLater(answer));
        }

        fn invalidate(&self, stream: u32, first: u64, last: u64) {
            self.did.borrow_mut().push(Did::Invalidate(stream, first, last));
        }

        fn say(&self, _line: Arguments<'_>) {}
    }

    /// An SMMU that is on: a PRI queue of 2 entries, a command queue of 4, interrupts, a linear stream table of 64
    /// entries in which `STREAM` has stage 2 and full ATS.
    fn running() -> (Smmu, Qemu) {
        let (smmu, qemu) = (Smmu::default(), Qemu::default());
        smmu.write(&qemu, at::PRIQ_BASE, QUEUE as u32 | 1);
        smmu.write(&qemu, at::CMDQ_BASE, COMMANDS as u32 | 2);
        smmu.write(&qemu, at::STRTAB_BASE, TABLE as u32);
        smmu.write(&qemu, at::STRTAB_BASE_CFG, 6);
        smmu.write(&qemu, IRQ_CTRL, 7);
        smmu.write(&qemu, at::CR0, ON);
        set_entry(&qemu, TABLE + u64::from(STREAM) * 64, 1 | 6 << 1, 1);
        (smmu, qemu)
    }

    fn set_entry(qemu: &Qemu, at: u64, low: u64, eats: u64) {
        qemu.memory.borrow_mut().extend([(at, low), (at + 8, eats << 28)]);
    }

    fn read_of(page: u64, last: bool) -> PageRequest {
        PageRequest { page, pasid: Pasid(None), privileged: false, read: true, write: false, last, prgi: 3 }
    }

    fn answer(response: Response) -> Answer {
        Answer { stream: STREAM.into(), prgi: 3, response }
    }

    /// Appends `commands` to the command queue.
    fn submit(smmu: &Smmu, qemu: &Qemu, commands: &[[u64; 2]]) {
        let mut prod = smmu.read(qemu, at::CMDQ_PROD);
        for command in commands {
            let place = COMMANDS + u64::from(prod & 3) * 16;
            qemu.memory.borrow_mut().extend([(place, command[0]), (place + 8, command[1])]);
            prod = (prod + 1) & 7;
        }
        smmu.write(qemu, at::CMDQ_PROD, prod);
    }

    fn did(qemu: &Qemu) -> Vec<Did> {
        qemu.did.take()
    }

    #[test]
    fn the_identification_says_ats_without_split_stage_and_pri_and_keeps_the_rest() {
        let (smmu, qemu) = (Smmu::default(), Qemu::default());
        qemu.registers.borrow_mut().extend([(at::IDR0, 0x0d44_101b), (at::IDR1, 0x0273_0010)]);

        assert_eq!(smmu.read(&qemu, at::IDR0), 0x0d45_1c1b);
        assert_eq!(smmu.read(&qemu, at::IDR1), 0x0273_5010);
    }

    #[test]
    fn other_registers_are_those_of_qemu() {
        let (smmu, qemu) = (Smmu::default(), Qemu::default());

        for offset in [0x28, at::STRTAB_BASE_CFG, at::EVENTQ_PROD, at::EVENTQ_CONS] {
            smmu.write(&qemu, offset, 0xd75);

            assert_eq!(qemu.read(offset), 0xd75, "{offset:#x}");
            assert_eq!(smmu.read(&qemu, offset), 0xd75, "{offset:#x}");
        }
    }

    #[test]
    fn page_1_is_no_alias_of_page_0() {
        let (smmu, qemu) = running();

        for offset in [at::CR0, at::PRIQ_BASE, at::CMDQ_PROD] {
            smmu.write(&qemu, PAGE_1 + offset, 1);

            assert_eq!(qemu.read(PAGE_1 + offset), 0, "{offset:#x}");
            assert_eq!(smmu.read(&qemu, PAGE_1 + offset), 0, "{offset:#x}");
        }
    }

    #[test]
    fn the_queue_can_move_only_while_it_is_off() {
        let (smmu, qemu) = running();

        smmu.write(&qemu, at::PRIQ_BASE, 0x9000_0000);
        assert_eq!(smmu.read(&qemu, at::PRIQ_BASE), QUEUE as u32 | 1);
        smmu.write(&qemu, at::CR0, ON & !CR0_PRIQEN);
        smmu.write(&qemu, at::PRIQ_BASE, 0x9000_0000);

        assert_eq!(smmu.read(&qemu, at::PRIQ_BASE), 0x9000_0000);
    }

    #[test]
    fn a_request_becomes_an_entry_and_the_first_an_interrupt() {
        let (smmu, qemu) = running();

        smmu.request(&qemu, STREAM, read_of(0x4000, false));
        smmu.request(&qemu, STREAM, read_of(0x5000, true));

        assert_eq!(did(&qemu), [Did::Pulse(Line::PriQueue)]);
        assert_eq!(smmu.read(&qemu, at::PRIQ_PROD), 2);
        assert_eq!(qemu.load(QUEUE), Some(0x1000_0000_0000_0020));
        assert_eq!(qemu.load(QUEUE + 8), Some(0x4003));
        assert_eq!(qemu.load(QUEUE + 16), Some(0x5000_0000_0000_0020));
        assert_eq!(qemu.load(QUEUE + 24), Some(0x5003));
    }

    #[test]
    fn an_interrupt_that_is_not_enabled_is_not_sent() {
        let (smmu, qemu) = running();
        smmu.write(&qemu, IRQ_CTRL, !IRQ_CTRL_PRIQ);

        smmu.request(&qemu, STREAM, read_of(0x4000, true));

        assert_eq!(did(&qemu), []);
    }

    #[test]
    fn while_the_queue_is_off_every_request_is_answered_with_failure() {
        for cr0 in [ON & !CR0_SMMUEN, ON & !CR0_PRIQEN] {
            let (smmu, qemu) = running();
            smmu.write(&qemu, at::CR0, cr0);

            smmu.request(&qemu, STREAM, read_of(0x4000, false));

            assert_eq!(did(&qemu), [Did::RespondLater(answer(Response::Failure))], "{cr0:#x}");
            assert_eq!(smmu.read(&qemu, at::PRIQ_PROD), 0, "{cr0:#x}");
        }
    }

    #[test]
    fn of_lost_requests_the_last_is_answered_with_success() {
        let (smmu, qemu) = running();
        smmu.request(&qemu, STREAM, read_of(0x4000, false));
        smmu.request(&qemu, STREAM, read_of(0x5000, false));
        did(&qemu);

        smmu.request(&qemu, STREAM, read_of(0x6000, false));
        assert_eq!(did(&qemu), []);
        assert_eq!(smmu.read(&qemu, at::PRIQ_PROD), 1 << 31 | 2);
        smmu.request(&qemu, STREAM, read_of(0x7000, true));

        assert_eq!(did(&qemu), [Did::RespondLater(answer(Response::Success))]);
        assert_eq!(qemu.load(QUEUE + 8), Some(0x4003));
    }

    #[test]
    fn after_an_overflow_requests_are_lost_until_it_is_acknowledged() {
        let (smmu, qemu) = running();
        for page in [0x4000, 0x5000, 0x6000] {
            smmu.request(&qemu, STREAM, read_of(page, false));
        }
        did(&qemu);

        smmu.write(&qemu, at::PRIQ_CONS, 2);
        smmu.request(&qemu, STREAM, read_of(0x7000, false));
        assert_eq!(smmu.read(&qemu, at::PRIQ_PROD), 1 << 31 | 2);
        smmu.write(&qemu, at::PRIQ_CONS, 1 << 31 | 2);
        smmu.request(&qemu, STREAM, read_of(0x8000, true));

        assert_eq!(did(&qemu), [Did::Pulse(Line::PriQueue)]);
        assert_eq!(smmu.read(&qemu, at::PRIQ_PROD), 1 << 31 | 3);
        assert_eq!(qemu.load(QUEUE + 8), Some(0x8003));
    }

    #[test]
    fn a_queue_that_cannot_be_written_is_an_error_until_that_is_acknowledged() {
        let (smmu, qemu) = running();
        qemu.aborts.set(true);

        smmu.request(&qemu, STREAM, read_of(0x4000, false));
        assert_eq!(did(&qemu), [Did::Pulse(Line::GlobalError), Did::RespondLater(answer(Response::Failure))]);
        assert_eq!(smmu.read(&qemu, at::GERROR), GERROR_PRIQ_ABT_ERR);
        qemu.aborts.set(false);
        smmu.request(&qemu, STREAM, read_of(0x4000, false));
        assert_eq!(did(&qemu), [Did::RespondLater(answer(Response::Failure))]);
        smmu.write(&qemu, at::GERRORN, GERROR_PRIQ_ABT_ERR);
        smmu.request(&qemu, STREAM, read_of(0x4000, false));

        assert_eq!(did(&qemu), [Did::Pulse(Line::PriQueue)]);
        assert_eq!(smmu.read(&qemu, at::GERRORN), GERROR_PRIQ_ABT_ERR);
        assert_eq!(qemu.read(at::GERRORN), 0, "QEMU does not know this error");
        assert_eq!(smmu.read(&qemu, at::PRIQ_PROD), 1);
    }

    #[test]
    fn errors_of_qemu_show_beside_ours() {
        let (smmu, qemu) = running();
        qemu.registers.borrow_mut().insert(at::GERROR, 1);

        assert_eq!(smmu.read(&qemu, at::GERROR), 1);
        smmu.write(&qemu, at::GERRORN, 1);

        assert_eq!((smmu.read(&qemu, at::GERRORN), qemu.read(at::GERRORN)), (1, 1));
    }

    #[test]
    fn responses_reach_their_device_with_the_code_that_their_command_has() {
        let (smmu, qemu) = running();

        submit(
            &smmu,
            &qemu,
            &[[0x20_0000_0041, 3], [0x20_0000_0041, 0x1003], [0x46, 0], [0x20_0000_0041, 0x2003]],
        );

        let expected = [Response::Failure, Response::InvalidRequest, Response::Success];
        assert_eq!(did(&qemu), expected.map(|it| Did::Respond(answer(it))));
    }

    #[test]
    fn commands_take_effect_when_they_are_consumed_and_once() {
        let (smmu, qemu) = running();
        submit(&smmu, &qemu, &[[0x46, 0]; 3]);
        qemu.stops_at.set(Some(4));

        submit(&smmu, &qemu, &[[0x20_0000_0041, 0x2003], [0xff, 0], [0x20_0000_0041, 0x1003]]);
        assert_eq!(did(&qemu), [Did::Respond(answer(Response::Success))]);
        qemu.stops_at.set(None);
        smmu.write(&qemu, at::GERRORN, 1);
        assert_eq!(did(&qemu), [Did::Respond(answer(Response::InvalidRequest))]);
        smmu.write(&qemu, at::CR0, ON);

        assert_eq!(did(&qemu), []);
    }

    #[test]
    fn answers_to_a_stream_that_is_to_be_refused_are_no_command_any_more() {
        let (_, qemu) = running();
        let smmu = Smmu::new(Some(0x18));

        submit(&smmu, &qemu, &[[0x18_0000_0041, 0x2003], [0x20_0000_0041, 0x2003], [0x46, 0]]);

        assert_eq!(qemu.load(COMMANDS), Some(0x18_0000_00ff));
        assert_eq!(did(&qemu), [Did::Respond(answer(Response::Success))]);
    }

    #[test]
    fn commands_that_wait_for_the_queue_to_be_enabled_take_effect_then() {
        let (smmu, qemu) = running();
        smmu.write(&qemu, at::CR0, 0);
        qemu.stops_at.set(Some(0));
        submit(&smmu, &qemu, &[[0x20_0000_0041, 0x2003]]);
        qemu.stops_at.set(None);
        assert_eq!(did(&qemu), []);

        smmu.write(&qemu, at::CR0, ON);

        assert_eq!(did(&qemu), [Did::Respond(answer(Response::Success))]);
    }

    #[test]
    fn commands_with_ssv_or_reserved_values_have_no_effect() {
        let (smmu, qemu) = running();

        submit(&smmu, &qemu, &[[0x20_0000_5841, 0x2003], [0x20_0000_0041, 0x3003]]);
        submit(&smmu, &qemu, &[[0x20_0000_5840, 0], [0x20_0000_0040, 53]]);

        assert_eq!(did(&qemu), []);
    }

    #[test]
    fn commands_have_no_effect_while_the_smmu_is_off() {
        let (smmu, qemu) = running();
        smmu.write(&qemu, at::CR0, ON & !CR0_SMMUEN);

        submit(&smmu, &qemu, &[[0x20_0000_0041, 0x2003], [0x20_0000_0040, 52]]);

        assert_eq!(did(&qemu), []);
    }

    #[test]
    fn an_invalidation_covers_the_aligned_span_of_its_size() {
        for (operand, first, last) in [
            (0x1000_0000, 0x1000_0000, 0x1000_0fff),
            (0x1000_7002, 0x1000_4000, 0x1000_7fff),
            (52, 0, u64::MAX),
        ] {
            let (smmu, qemu) = running();

            submit(&smmu, &qemu, &[[0x108_0000_0040, operand]]);

            assert_eq!(did(&qemu), [Did::Invalidate(0x108, first, last)]);
        }
    }

    #[test]
    fn a_translation_is_asked_for_while_no_event_can_be_recorded() {
        let (smmu, qemu) = running();

        let cr0 = smmu.translate(&qemu, STREAM, || qemu.read(at::CR0));

        assert_eq!(cr0, Ok(ON & !CR0_EVENTQEN));
        assert_eq!(qemu.read(at::CR0), ON);
    }

    #[test]
    fn ats_needs_an_entry_that_is_valid_and_translates_with_eats_1() {
        let entries = [
            (1 | 5 << 1, 1, true),
            (1 | 6 << 1, 1, true),
            (1 | 7 << 1, 1, true),
            (6 << 1, 1, false),
            (1, 1, false),
            (1 | 4 << 1, 1, false),
            (1 | 6 << 1, 0, false),
            (1 | 6 << 1, 2, false),
        ];
        for (low, eats, expected) in entries {
            let (smmu, qemu) = running();

            set_entry(&qemu, TABLE + u64::from(STREAM) * 64, low, eats);

            assert_eq!(smmu.translate(&qemu, STREAM, || ()).is_ok(), expected, "{low:#x} {eats}");
        }
    }

    #[test]
    fn ats_needs_an_smmu_that_is_on() {
        let (smmu, qemu) = running();

        smmu.write(&qemu, at::CR0, ON & !CR0_SMMUEN);

        assert_eq!(smmu.translate(&qemu, STREAM, || ()), Err(Errno::PERM));
    }

    #[test]
    fn a_stream_beyond_the_table_has_no_entry() {
        let (smmu, qemu) = running();
        set_entry(&qemu, TABLE + 64 * 64, 1 | 6 << 1, 1);

        assert_eq!(stream_table_entry(&qemu, 63), Some(TABLE + 63 * 64));
        assert_eq!(stream_table_entry(&qemu, 64), None);

        assert_eq!(smmu.translate(&qemu, 64, || ()), Err(Errno::PERM));
    }

    #[test]
    fn a_table_of_two_levels_has_entries_as_far_as_the_spans_say() {
        let (smmu, qemu) = running();
        smmu.write(&qemu, at::STRTAB_BASE_CFG, 1 << 16 | 8 << 6 | 16);
        qemu.memory.borrow_mut().extend([
            (TABLE, 0),
            (TABLE + 8, 0x8800_4009),
            (TABLE + 16, 0x8800_8003),
            (TABLE + 24, 0x8800_800a),
        ]);

        for (stream, expected) in [
            (0x0ff, None),
            (0x108, Some(0x8800_4200)),
            (0x1ff, Some(0x8800_4000 + 0xff * 64)),
            (0x203, Some(0x8800_80c0)),
            (0x204, None),
            (0x300, None),
            (0x400, None),
        ] {
            assert_eq!(stream_table_entry(&qemu, stream), expected, "{stream:#x}");
        }
    }

    #[test]
    fn translated_transactions_are_checked_only_under_atschk() {
        let (smmu, qemu) = running();
        let cases = [
            (STREAM, 0, true),
            (STREAM, CR0_ATSCHK, true),
            (STREAM + 1, 0, true),
            (STREAM + 1, CR0_ATSCHK, false),
        ];
        for (stream, atschk, expected) in cases {
            smmu.write(&qemu, at::CR0, ON | atschk);

            assert_eq!(smmu.passes_translated(&qemu, stream), expected, "{stream:#x} {atschk:#x}");
        }
        smmu.write(&qemu, at::CR0, ON & !CR0_SMMUEN);
        assert!(!smmu.passes_translated(&qemu, STREAM));
    }

    #[test]
    fn power_on_clears_the_queue_and_the_error() {
        let (smmu, qemu) = running();
        qemu.aborts.set(true);
        smmu.request(&qemu, STREAM, read_of(0x4000, false));

        smmu.power_on();

        for offset in [at::PRIQ_BASE, at::PRIQ_PROD, at::PRIQ_CONS, at::GERROR, at::GERRORN] {
            assert_eq!(smmu.read(&qemu, offset), 0, "{offset:#x}");
        }
    }
}
