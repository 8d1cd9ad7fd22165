//! What firmware left on, and how it ends without a moment in which a device reaches what it could not before.
//!
//! Translation and interrupt remapping stay on while their tables are replaced by empty ones; only the invalidation queue
//! goes off, and on again.

use crate::{
    ACK_LIMIT_US, Found,
    commands::Descriptor,
    queue::{ENTRY_WORDS, InvalidationQueue, NARROW_WORDS},
    regs::{self, GLOBAL, IQA, RTADDR},
    tables::Mode,
};
use core::ops::Range;
use iommu::{Bus, DmaBuf, Error, PhysAddr, bus::wait_until};

/// What firmware's last wait is to write.
const ENDED: u64 = 1;

impl<B: Bus + Clone> Found<B> {
    /// Returns where the invalidation queue is that firmware left in use.
    pub fn old_queue(&self) -> Option<Range<PhysAddr>> {
        let iqa = regs::IQA.read(&self.bus);
        let base = iqa.read(IQA::BASE) << 12;
        let in_use = regs::GSTS.read(&self.bus).is_set(GLOBAL::QIE);
        in_use.then(|| PhysAddr(base)..PhysAddr(base.saturating_add(4096 << iqa.read(IQA::QS))))
    }

    /// Lends the memory of the [`old queue`](Self::old_queue), so that it can be ended by a wait.
    ///
    /// Some units (QEMU's) let a queue go off only after one, and firmware may not have put one there.
    pub fn with_old_queue(self, queue: DmaBuf) -> Self {
        Self { old_queue: Some(queue), ..self }
    }

    /// Turns off translation that firmware left on by tables of another mode: those cannot be replaced while it is on.
    ///
    /// From here on devices reach all of memory, until [`enable`](Self::enable) has it on again. It is for a caller that
    /// has turned their bus masters off.
    pub fn end_translation(&self) -> Result<(), Error> {
        self.command_off(GLOBAL::TE::SET.value, "GSTS.TES")
    }

    /// Refuses what cannot be taken over without a gap.
    pub(crate) fn check_left(&self) -> Result<(), Error> {
        let left = regs::RTADDR.read(&self.bus).read(RTADDR::TTM);
        let ours = match self.mode {
            Mode::Legacy => RTADDR::TTM::Legacy,
            Mode::Scalable => RTADDR::TTM::Scalable,
        };
        if regs::GSTS.read(&self.bus).is_set(GLOBAL::TE) && left != ours.value >> 10 {
            return Err(Error::InUse {
                what: "translation by tables of another mode (GSTS.TES, RTADDR.TTM)",
            });
        }
        Ok(())
    }

    /// Writes `GCMD` with one bit less, and waits until `GSTS` shows it.
    pub(crate) fn command_off(&self, bit: u32, status: &'static str) -> Result<(), Error> {
        let kept = regs::GSTS.read(&self.bus).get() & !regs::ONE_SHOT;
        if kept & bit == 0 {
            return Ok(());
        }
        regs::GCMD.set(&self.bus, kept & !bit);
        wait_until(&self.bus, status, ACK_LIMIT_US, || regs::GSTS.read(&self.bus).get() & bit == 0)
    }

    /// Ends the invalidation queue that firmware left on: it is empty, and off.
    ///
    /// `status` is memory that nothing else uses yet.
    pub(crate) fn end_old_queue(&mut self, status: &mut DmaBuf) -> Result<(), Error> {
        let Some(Range { start, end }) = self.old_queue() else { return Ok(()) };
        let bus = &self.bus;
        let idle = || regs::IQH.read(bus).get() == regs::IQT.read(bus).get();
        wait_until(bus, "IQH", ACK_LIMIT_US, idle)?;
        if let Some(ring) = self.old_queue.take() {
            let (words, needed) = (ring.words(), ((end.0 - start.0) / 8) as usize);
            if ring.phys() != start || words != needed {
                return Err(Error::Memory { purpose: "the old invalidation queue", words, needed });
            }
            let wide = regs::IQA.read(bus).is_set(IQA::DW);
            let width = if wide { ENTRY_WORDS } else { NARROW_WORDS };
            let mut queue = InvalidationQueue::left(bus, ring, width);
            status.store(0, 0);
            bus.publish(status.range(0, 1));
            let wait = Descriptor::wait(status.phys(), ENDED as u32, false);
            queue.push(bus, &[wait], 0, |_| None)?;
            wait_until(bus, "the old invalidation queue", ACK_LIMIT_US, || {
                bus.observe(status.range(0, 1));
                status.load(0) as u32 == ENDED as u32
            })?;
        }
        self.command_off(GLOBAL::QIE::SET.value, "GSTS.QIES")
    }
}
