//! What a guest answers with.

/// Names one group of page requests towards its guest: a slot, counted within the guest, and the slot's generation.
///
/// The hypervisor makes it, and the guest gives it back. A generation is used once: a cookie that is stale, or was
/// answered, or was made up, names nothing.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[cfg_attr(feature = "defmt", derive(defmt::Format))]
pub struct Cookie(pub u64);

/// Bits of the slot, below the generation.
const SLOT_BITS: u32 = 12;
/// Slots of a queue, at most.
pub(crate) const SLOTS: usize = 1 << SLOT_BITS;
/// Generations wrap at 2^52: at a group each microsecond that is 142 years.
pub(crate) const GENERATION: u64 = u64::MAX >> SLOT_BITS;

impl Cookie {
    pub(crate) fn new(slot: u16, generation: u64) -> Self {
        Self(generation << SLOT_BITS | u64::from(slot))
    }

    pub(crate) fn slot(self) -> u16 {
        (self.0 & (SLOTS as u64 - 1)) as u16
    }

    pub(crate) fn generation(self) -> u64 {
        self.0 >> SLOT_BITS
    }
}
