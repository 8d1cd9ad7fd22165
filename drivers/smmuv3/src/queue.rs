//! The rings that the unit and its driver share.
//!
//! An index has one bit more than the ring needs, the manual's wrap flag: equal indices are an empty ring, indices that
//! differ in that bit alone a full one.

use crate::{
    commands::Command,
    regs::{self, INDEX, QueueRegisters},
};
use core::ops::Range;
use iommu::{Bus, DmaBuf, Error, PhysAddr};

/// 64-bit words of a command, of an event record, and of a page request.
pub(crate) const COMMAND_WORDS: usize = 2;
pub(crate) const EVENT_WORDS: usize = 4;
pub(crate) const REQUEST_WORDS: usize = 2;

/// How long no message may come, in microseconds, before CONS is looked at as well: it may be lost.
///
/// The manual sets no bound. Most waits are over long before; those for a device are not, and then a read matters little.
pub(crate) const MESSAGE_LIMIT_US: u64 = 1000;

/// The command queue: the driver fills it at PROD, the unit empties it at CONS.
///
/// Both ends are counted in 64 bits from bring-up on; registers and messages show the low bits of these counts.
#[derive(Debug)]
pub(crate) struct CommandQueue {
    ring: DmaBuf,
    /// The last place. There is a power of two of places, so this is also what reduces a count to one.
    last: u64,
    produced: u64,
    /// As far as CONS is known to have come; the unit can only be further.
    consumed: u64,
    /// As many commands as the unit was told of.
    rung: u64,
    /// Where messages are written, if the unit sends any: the low half of a word. The upper half is nobody's, as there are
    /// parts that write 8 bytes.
    word: Option<DmaBuf>,
    /// Where there are no messages, the end of a batch sends an event.
    wakes: bool,
    /// As far as messages had come when they were last looked at.
    told: u64,
    /// Since when at least no message came, while one was due.
    quiet_since_us: Option<u64>,
}

impl CommandQueue {
    /// A queue that fills `ring`, whose size is a power of two; `word` is where messages are to go, if there shall be any,
    /// and without them cores are woken if it `wakes`.
    pub(crate) fn new<B: Bus>(bus: &B, ring: DmaBuf, mut word: Option<DmaBuf>, wakes: bool) -> Self {
        if let Some(word) = &mut word {
            word.store(0, 0);
            bus.publish(word.range(0, 1));
        }
        let last = (ring.words() / COMMAND_WORDS).saturating_sub(1) as u64;
        Self { ring, last, produced: 0, consumed: 0, rung: 0, word, wakes, told: 0, quiet_since_us: None }
    }

    /// Entries that can be pushed as far as is known.
    #[inline]
    fn free(&self) -> u64 {
        self.last + 1 - (self.produced - self.consumed)
    }

    /// Returns the command that ends `count` commands: all that were queued since bring-up, itself included.
    #[inline]
    pub(crate) fn end(&self, count: u64) -> Command {
        match &self.word {
            Some(word) => Command::sync_with_message(word.phys(), count as u32),
            None => self.nothing(),
        }
    }

    /// Returns a command that does nothing, but that it wakes whoever may wait for the one whose place it takes.
    pub(crate) fn nothing(&self) -> Command {
        if self.wakes { Command::sync_with_event() } else { Command::sync() }
    }

    /// Has no more messages sent, and trusts none that was.
    pub(crate) fn without_messages(&mut self) {
        self.word = None;
    }

    /// Returns how many commands were consumed, as far as messages told; `None` where there are none.
    #[inline]
    pub(crate) fn told(&self) -> Option<u64> {
        self.word.is_some().then_some(self.told)
    }

    /// Returns how many commands the unit has consumed since bring-up, as far as is known, when the last message that is
    /// due comes with `due`. Where messages tell, no register is read; unless one is late.
    pub(crate) fn consumed<B: Bus>(&mut self, bus: &B, due: u64) -> u64 {
        let before = self.told;
        if self.look(bus) {
            if self.told > before || self.consumed >= due {
                self.quiet_since_us = None;
                return self.consumed;
            }
            let now = bus.now_us();
            let since = *self.quiet_since_us.get_or_insert(now);
            if now.saturating_sub(since) < MESSAGE_LIMIT_US {
                return self.consumed;
            }
            self.read_consumed(bus);
            // What is behind a `CMD_SYNC` that was consumed came by now.
            self.look(bus);
            return self.consumed;
        }
        self.read_consumed(bus)
    }

    /// Looks at the word that messages are written to; returns whether there is one.
    fn look<B: Bus>(&mut self, bus: &B) -> bool {
        if self.word.is_some() && self.produced - self.told > u64::from(u32::MAX / 2) {
            // Half a count says no more which of two it is.
            self.word = None;
        }
        let Some(word) = &self.word else { return false };
        bus.observe(word.range(0, 1));
        let low = word.load(0) as u32;
        // ORDER: whoever learns that a command was consumed sees what devices stored before it was.
        bus.observe(self.ring.range(0, 0));
        self.told = whole(low, self.told, self.produced);
        self.consumed = self.consumed.max(self.told);
        true
    }

    /// Reads CONS, and returns how many commands the unit has consumed since bring-up.
    #[inline(always)]
    pub(crate) fn read_consumed<B: Bus>(&mut self, bus: &B) -> u64 {
        let cons = regs::CMDQ.cons.read(bus);
        if cons.get() == regs::GONE {
            return self.consumed;
        }
        let index = u64::from(cons.read(INDEX::INDEX));
        // ORDER: whoever learns that a command was consumed sees what devices stored before it was.
        bus.observe(self.ring.range(0, 0));
        let behind = self.produced.wrapping_sub(index) & (2 * self.last + 1);
        // CONS moves between where it was and PROD. An index outside is no progress: hardware wrote something else.
        if behind <= self.produced - self.consumed {
            self.consumed = self.produced - behind;
        }
        self.consumed
    }

    /// Returns how many commands have been queued since bring-up.
    #[inline]
    pub(crate) fn produced(&self) -> u64 {
        self.produced
    }

    /// Returns where in the ring a command is, unless its place was used again.
    fn place(&self, at: u64) -> Option<usize> {
        let kept = at < self.produced && self.produced - at <= self.last + 1;
        kept.then(|| self.index(at) * COMMAND_WORDS)
    }

    /// Returns the command before which `at` others were queued, if it is still in the ring.
    pub(crate) fn command(&self, at: u64) -> Option<Command> {
        let place = self.place(at)?;
        Some(Command(core::array::from_fn(|i| self.ring.load(place + i))))
    }

    /// Puts `command` in the place of the one before which `at` others were queued. The unit has stopped there.
    pub(crate) fn replace<B: Bus>(&mut self, bus: &B, at: u64, command: Command) {
        if let Some(place) = self.place(at) {
            let stored = self.store(place / COMMAND_WORDS, &[command]);
            bus.publish(stored);
        }
    }

    /// Appends `commands` and rings the doorbell once; see [`append`](Self::append).
    pub(crate) fn push<B: Bus>(
        &mut self,
        bus: &B,
        commands: &[Command],
        reserve: usize,
    ) -> Result<u64, Error> {
        let end = self.append(bus, commands, reserve)?;
        self.ring(bus);
        Ok(end)
    }

    /// Appends `commands`, if `reserve` entries remain free after them; [`ring`](Self::ring) tells the unit.
    ///
    /// Returns how many commands have been queued since bring-up.
    pub(crate) fn append<B: Bus>(
        &mut self,
        bus: &B,
        commands: &[Command],
        reserve: usize,
    ) -> Result<u64, Error> {
        let needed = (commands.len() + reserve) as u64;
        if self.free() < needed {
            // The register is read only when what is known does not suffice.
            self.read_consumed(bus);
        }
        let free = self.free();
        if free < needed {
            let free = (free as usize).saturating_sub(reserve);
            return Err(Error::QueueFull { needed: commands.len(), free });
        }
        let up_to_end = commands.len().min(self.up_to_end(self.produced));
        let (first, rest) = commands.split_at(up_to_end);
        self.store(self.index(self.produced), first);
        if !rest.is_empty() {
            self.store(0, rest);
        }
        self.produced += commands.len() as u64;
        Ok(self.produced)
    }

    /// Returns whether `count` more commands can be pushed as far as is known, side by side, while `reserve` entries remain free;
    /// and the unit knows of all before.
    #[inline]
    pub(crate) fn has_room_in_row(&self, count: usize, reserve: usize) -> bool {
        let is_told = self.rung == self.produced;
        self.free() >= (count + reserve) as u64 && count <= self.up_to_end(self.produced) && is_told
    }

    /// Appends commands for which there [is room](Self::has_room_in_row), and rings the doorbell once.
    ///
    /// Returns how many commands have been queued since bring-up.
    #[inline(always)]
    pub(crate) fn push_row<B: Bus, const N: usize>(&mut self, bus: &B, commands: [Command; N]) -> u64 {
        let stored = self.store(self.index(self.produced), &commands);
        bus.publish(stored);
        self.produced += N as u64;
        self.ring_doorbell(bus);
        self.produced
    }

    /// Tells the unit of what was appended since it was told last. There is nothing to tell of nothing.
    pub(crate) fn ring<B: Bus>(&mut self, bus: &B) {
        let count = (self.produced - self.rung) as usize;
        if count == 0 {
            return;
        }
        // Published together: up to the end of the ring, and from its start what is left.
        let up_to_end = count.min(self.up_to_end(self.rung));
        bus.publish(self.ring.range(self.index(self.rung) * COMMAND_WORDS, up_to_end * COMMAND_WORDS));
        if up_to_end < count {
            bus.publish(self.ring.range(0, (count - up_to_end) * COMMAND_WORDS));
        }
        self.ring_doorbell(bus);
    }

    /// The place of the command before which `count` others were queued.
    #[inline]
    fn index(&self, count: u64) -> usize {
        (count & self.last) as usize
    }

    /// Places from there to the end of the ring.
    #[inline]
    fn up_to_end(&self, count: u64) -> usize {
        self.last as usize + 1 - self.index(count)
    }

    /// Stores `commands` from place `at` on; returns where they are.
    #[inline(always)]
    fn store(&mut self, at: usize, commands: &[Command]) -> Range<PhysAddr> {
        self.ring.store_rows(at * COMMAND_WORDS, commands.iter().map(|command| command.0))
    }

    #[inline(always)]
    fn ring_doorbell<B: Bus>(&mut self, bus: &B) {
        // ORDER: `publish` put every command before this write.
        let index = self.produced & (2 * self.last + 1);
        regs::CMDQ.prod.write(bus, INDEX::INDEX.val(index as u32));
        self.rung = self.produced;
    }
}

/// Returns the count whose low half is `low`, from `told` to `produced`, which are less than 2^32 apart.
///
/// Another is no progress: somebody wrote something else.
fn whole(low: u32, told: u64, produced: u64) -> u64 {
    let behind = u64::from((produced as u32).wrapping_sub(low));
    if behind <= produced - told { produced - behind } else { told }
}

/// A queue of reports, events or page requests: the unit fills it at PROD, the driver empties it at CONS.
#[derive(Debug)]
pub(crate) struct ReportQueue<const WORDS: usize> {
    ring: DmaBuf,
    /// The last place. There is a power of two of places, so this is also what reduces a number to one.
    last: u32,
    registers: &'static QueueRegisters,
    /// CONS, with the wrap flag.
    cons: u32,
    /// PROD as it was last read, with the wrap flag.
    prod: u32,
    /// The overflow flag of PROD as it was last read, and that of CONS, which acknowledges it.
    overflow: (bool, bool),
    /// PROD was just read, and there was nothing.
    is_known_empty: bool,
}

impl<const WORDS: usize> ReportQueue<WORDS> {
    /// A queue that empties `ring`, whose size is a power of two.
    pub(crate) fn new(ring: DmaBuf, registers: &'static QueueRegisters) -> Self {
        let last = (ring.words() / WORDS).saturating_sub(1) as u32;
        Self { ring, last, registers, cons: 0, prod: 0, overflow: (false, false), is_known_empty: false }
    }

    /// Returns an index with its wrap flag, reduced.
    #[inline]
    fn wrapped(&self, index: u32) -> u32 {
        index & (2 * self.last + 1)
    }

    /// Takes the oldest entry, copied out.
    pub(crate) fn pop<B: Bus>(&mut self, bus: &B) -> Option<[u64; WORDS]> {
        let is_known_empty = core::mem::take(&mut self.is_known_empty);
        if self.cons == self.prod && (is_known_empty || !self.look(bus)) {
            return None;
        }
        let entry = self.oldest();
        self.take(bus);
        Some(entry)
    }

    /// Returns the oldest entry, copied out. If there is none, a [`pop`](Self::pop) that follows does not look again.
    #[inline]
    pub(crate) fn peek<B: Bus>(&mut self, bus: &B) -> Option<[u64; WORDS]> {
        if self.cons == self.prod && !self.look(bus) {
            self.is_known_empty = true;
            return None;
        }
        Some(self.oldest())
    }

    /// Takes out the oldest entry, which is there. The places of all that are known of are given back with the last one.
    #[inline]
    pub(crate) fn take<B: Bus>(&mut self, bus: &B) {
        self.cons = self.wrapped(self.cons + 1);
        if self.cons == self.prod {
            self.write_cons(bus);
        }
    }

    fn oldest(&self) -> [u64; WORDS] {
        self.ring.load_all((self.cons & self.last) as usize * WORDS)
    }

    /// Forgets that nothing was found: what comes from here on is to be found.
    pub(crate) fn begin(&mut self) {
        self.is_known_empty = false;
    }

    /// Learns what the unit has queued by now, all that was known before having been taken; returns whether it is anything.
    fn look<B: Bus>(&mut self, bus: &B) -> bool {
        let prod = self.registers.prod.read(bus);
        if prod.get() == regs::GONE {
            return false;
        }
        // The value is reduced: what hardware says must not lead outside the ring.
        self.prod = self.wrapped(prod.read(INDEX::INDEX));
        self.overflow.0 = prod.is_set(INDEX::OVERFLOW);
        let count = self.wrapped(self.prod.wrapping_sub(self.cons)) as usize;
        if count == 0 {
            return false;
        }
        let start = (self.cons & self.last) as usize;
        // Observed together: up to the end of the ring, and from its start what is left.
        let up_to_end = self.last as usize + 1 - start;
        if count <= up_to_end {
            bus.observe(self.ring.range(start * WORDS, count * WORDS));
        } else {
            bus.observe(self.ring.range(start * WORDS, up_to_end * WORDS));
            // More than all is none that hardware tells.
            bus.observe(self.ring.range(0, (count - up_to_end).min(start) * WORDS));
        }
        true
    }

    /// Acknowledges that entries were lost, if they were; for when [`pop`](Self::pop) has just found nothing.
    ///
    /// Index and flag came from one read of PROD, so the queue was empty when the flag was seen. The page request queue
    /// takes nothing until the flag is acknowledged, so there it is empty still.
    pub(crate) fn take_overflow<B: Bus>(&mut self, bus: &B) -> bool {
        let (flag, acknowledged) = self.overflow;
        if flag != acknowledged {
            self.overflow.1 = flag;
            self.write_cons(bus);
        }
        flag != acknowledged
    }

    fn write_cons<B: Bus>(&self, bus: &B) {
        let index = INDEX::INDEX.val(self.cons);
        self.registers.cons.write(bus, index + INDEX::OVERFLOW.val(self.overflow.1.into()));
    }
}

#[cfg(test)]
mod tests {
    use super::whole;

    #[test]
    fn a_count_is_known_by_its_low_half() {
        const WRAP: u64 = 1 << 32;
        for (low, told, produced, count) in [
            (0, 0, 0, 0),
            (3, 0, 5, 3),
            (5, 5, 5, 5),
            // Across the end of the low half.
            (u32::MAX, WRAP - 9, WRAP + 7, WRAP - 1),
            (0, WRAP - 9, WRAP + 7, WRAP),
            (7, WRAP - 9, WRAP + 7, WRAP + 7),
            (2, 3 * WRAP, 3 * WRAP + 4, 3 * WRAP + 2),
            // Before what was told, and after what was queued.
            (4, 5, 9, 5),
            (10, 5, 9, 5),
            (8, WRAP - 9, WRAP + 7, WRAP - 9),
            (u32::MAX - 9, WRAP - 9, WRAP + 7, WRAP - 9),
        ] {
            assert_eq!(whole(low, told, produced), count, "{low:#x} from {told:#x} to {produced:#x}");
        }
    }
}
