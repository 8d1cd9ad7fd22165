//! What the unit is told through the invalidation queue: descriptors, in the order of their types, and batches of them.
//!
//! The layouts are those of the VT-d architecture specification, "Queued Invalidation Interface" and "Page Group
//! Response Descriptor". Words 2 and 3 are zero in all of them.

use crate::queue::InvalidationQueue;
use heapless::Vec;
use iommu::{
    Attachment, Bus, Completion, DmaBuf, Error, Failure, Field, Invalidation, Iova, Outcome, PAGE_SIZE,
    PageResponse, Pasid, PhysAddr, Stages, StreamId, Ticket, Words, descriptor,
};

descriptor! {
    /// One entry of the invalidation queue, in its 256-bit form (`IQA.DW` = 1).
    pub struct Descriptor([u64; 4]);
}

/// A power of two of pages, aligned to its size: what one page-selective invalidation covers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Block {
    pub(crate) iova: Iova,
    /// The manual's address mask: 2^`mask` pages.
    pub(crate) mask: u8,
}

impl Block {
    /// Returns the largest block that starts at page `page` and has no more than `pages` pages and 2^`limit` pages.
    pub(crate) fn largest(page: u64, pages: u64, limit: u8) -> Self {
        let aligned = page.trailing_zeros();
        let fitting = pages.max(1).ilog2();
        let mask = aligned.min(fitting).min(limit.into());
        Self { iova: Iova(page.wrapping_mul(PAGE_SIZE)), mask: mask as u8 }
    }
}

impl Descriptor {
    const TYPE: Field<Self> = Field::bits(3, 0);
    const GRANULARITY: Field<Self> = Field::bits(5, 4);
    const DOMAIN: Field<Self> = Field::bits(31, 16);

    /// Context-cache invalidation of everything (type 1, global).
    pub fn all_contexts() -> Self {
        Self::default().with(Self::TYPE, 1).with(Self::GRANULARITY, 1)
    }

    /// Context-cache invalidation of one device (type 1, device-selective, all bits of the source-id compared).
    ///
    /// In scalable mode hardware ignores the domain, so it is zero.
    pub fn context(stream: StreamId) -> Self {
        const SOURCE: Field<Descriptor> = Field::bits(47, 32);
        Self::default().with(Self::TYPE, 1).with(Self::GRANULARITY, 3).with(SOURCE, source_id(stream))
    }

    /// Drain writes, then drain reads.
    const DRAIN: Field<Self> = Field::bits(7, 6);
    const ADDRESS_MASK: Field<Self> = Field::bits(69, 64);
    const ADDRESS: Field<Self> = Field::bits(127, 76);

    /// IOTLB invalidation of everything (type 2, global); `drain` has bit 0 for writes and bit 1 for reads.
    pub fn all_translations(drain: u64) -> Self {
        Self::default().with(Self::TYPE, 2).with(Self::GRANULARITY, 1).with(Self::DRAIN, drain)
    }

    /// IOTLB invalidation of one domain (type 2, domain-selective).
    pub fn domain(domain: u16, drain: u64) -> Self {
        Self::default()
            .with(Self::TYPE, 2)
            .with(Self::GRANULARITY, 2)
            .with(Self::DRAIN, drain)
            .with(Self::DOMAIN, domain.into())
    }

    /// IOTLB invalidation of some pages of a domain (type 2, page-selective); needs `CAP.PSI`.
    pub(crate) fn domain_pages(domain: u16, block: Block, drain: u64) -> Self {
        Self::default()
            .with(Self::TYPE, 2)
            .with(Self::GRANULARITY, 3)
            .with(Self::DRAIN, drain)
            .with(Self::DOMAIN, domain.into())
            .with(Self::ADDRESS_MASK, block.mask.into())
            .with_address(Self::ADDRESS, block.iova.0)
    }

    /// Device-TLB invalidation of everything that was translated without PASID (type 3); PASIDs are invalidated one by one.
    ///
    /// `physical` is the physical function that `stream` belongs to (PFSID), where `ECAP.DIT` is set; else it is zero.
    pub fn device_tlb(stream: StreamId, physical: StreamId) -> Self {
        Self::device_tlb_range(stream, physical, u64::MAX >> 1, true)
    }

    /// Device-TLB invalidation of some pages (type 3).
    pub(crate) fn device_tlb_pages(stream: StreamId, physical: StreamId, block: Block) -> Self {
        let (address, several) = device_tlb_address(block);
        Self::device_tlb_range(stream, physical, address, several)
    }

    fn device_tlb_range(stream: StreamId, physical: StreamId, address: u64, several: bool) -> Self {
        const PHYSICAL_LOW: Field<Descriptor> = Field::bits(15, 12);
        const SOURCE: Field<Descriptor> = Field::bits(47, 32);
        const PHYSICAL_HIGH: Field<Descriptor> = Field::bits(63, 52);
        const SEVERAL: Field<Descriptor> = Field::bit(64);
        Self::default()
            .with(Self::TYPE, 3)
            .with(PHYSICAL_LOW, source_id(physical) & 0xF)
            .with(SOURCE, source_id(stream))
            .with(PHYSICAL_HIGH, source_id(physical) >> 4)
            .with(SEVERAL, several.into())
            .with_address(Self::ADDRESS, address)
    }

    /// Interrupt-entry-cache invalidation of everything (type 4, global).
    pub fn all_interrupt_entries() -> Self {
        Self::default().with(Self::TYPE, 4)
    }

    /// Interrupt-entry-cache invalidation of 2^`mask` entries from `index`, a multiple of that (type 4, index-selective).
    pub fn interrupt_entries(index: u16, mask: u8) -> Self {
        const SELECTIVE: Field<Descriptor> = Field::bit(4);
        const INDEX_MASK: Field<Descriptor> = Field::bits(31, 27);
        const INDEX: Field<Descriptor> = Field::bits(47, 32);
        Self::default()
            .with(Self::TYPE, 4)
            .with(SELECTIVE, 1)
            .with(INDEX_MASK, u64::from(mask) & 0x1F)
            .with(INDEX, index.into())
    }

    const WAIT_STATUS_WRITE: Field<Self> = Field::bit(5);
    const WAIT_FENCE: Field<Self> = Field::bit(6);
    const WAIT_PAGE_REQUEST_DRAIN: Field<Self> = Field::bit(7);
    const WAIT_STATUS_DATA: Field<Self> = Field::bits(63, 32);
    const WAIT_STATUS_ADDRESS: Field<Self> = Field::bits(127, 66);

    /// Wait (type 5): when all before it has completed, writes `data` to `status`, and only then lets later ones start.
    pub fn wait(status: PhysAddr, data: u32, drain_page_requests: bool) -> Self {
        Self::default()
            .with(Self::TYPE, 5)
            .with(Self::WAIT_STATUS_WRITE, 1)
            .with(Self::WAIT_FENCE, 1)
            .with(Self::WAIT_PAGE_REQUEST_DRAIN, drain_page_requests.into())
            .with(Self::WAIT_STATUS_DATA, data.into())
            .with_address(Self::WAIT_STATUS_ADDRESS, status.0)
    }

    const PASID: Field<Self> = Field::bits(51, 32);

    /// PASID-based IOTLB invalidation of a whole PASID (type 6).
    pub fn pasid(domain: u16, pasid: Pasid) -> Self {
        Self::default()
            .with(Self::TYPE, 6)
            .with(Self::GRANULARITY, 2)
            .with(Self::DOMAIN, domain.into())
            .with(Self::PASID, pasid.value().into())
    }

    /// PASID-based IOTLB invalidation of some pages (type 6, page-selective).
    pub(crate) fn pasid_pages(domain: u16, pasid: Pasid, block: Block) -> Self {
        Self::default()
            .with(Self::TYPE, 6)
            .with(Self::GRANULARITY, 3)
            .with(Self::DOMAIN, domain.into())
            .with(Self::PASID, pasid.value().into())
            .with(Self::ADDRESS_MASK, block.mask.into())
            .with_address(Self::ADDRESS, block.iova.0)
    }

    /// PASID-cache invalidation of everything (type 7, global).
    pub fn all_pasid_entries() -> Self {
        Self::default().with(Self::TYPE, 7).with(Self::GRANULARITY, 3)
    }

    /// PASID-cache invalidation of one PASID in a domain (type 7, PASID-selective).
    pub fn pasid_entry(domain: u16, pasid: Pasid) -> Self {
        Self::default()
            .with(Self::TYPE, 7)
            .with(Self::GRANULARITY, 1)
            .with(Self::DOMAIN, domain.into())
            .with(Self::PASID, pasid.value().into())
    }

    /// PASID-based device-TLB invalidation of a whole PASID (type 8); `physical` as in [`device_tlb`](Self::device_tlb).
    pub fn pasid_device_tlb(stream: StreamId, physical: StreamId, pasid: Pasid) -> Self {
        Self::pasid_device_tlb_range(stream, physical, pasid, u64::MAX >> 1, true)
    }

    /// PASID-based device-TLB invalidation of some pages (type 8).
    pub(crate) fn pasid_device_tlb_pages(
        stream: StreamId,
        physical: StreamId,
        pasid: Pasid,
        block: Block,
    ) -> Self {
        let (address, several) = device_tlb_address(block);
        Self::pasid_device_tlb_range(stream, physical, pasid, address, several)
    }

    fn pasid_device_tlb_range(
        stream: StreamId,
        physical: StreamId,
        pasid: Pasid,
        address: u64,
        several: bool,
    ) -> Self {
        const PHYSICAL_LOW: Field<Descriptor> = Field::bits(15, 12);
        const SOURCE: Field<Descriptor> = Field::bits(31, 16);
        const PHYSICAL_HIGH: Field<Descriptor> = Field::bits(63, 52);
        const SEVERAL: Field<Descriptor> = Field::bit(75);
        Self::default()
            .with(Self::TYPE, 8)
            .with(PHYSICAL_LOW, source_id(physical) & 0xF)
            .with(SOURCE, source_id(stream))
            .with(Self::PASID, pasid.value().into())
            .with(PHYSICAL_HIGH, source_id(physical) >> 4)
            .with(SEVERAL, several.into())
            .with_address(Self::ADDRESS, address)
    }

    /// Page group response (type 9).
    pub fn page_group_response(response: &PageResponse) -> Self {
        const PASID_PRESENT: Field<Descriptor> = Field::bit(4);
        const CODE: Field<Descriptor> = Field::bits(15, 12);
        const REQUESTER: Field<Descriptor> = Field::bits(31, 16);
        const GROUP: Field<Descriptor> = Field::bits(75, 67);
        let code = match response.outcome {
            Outcome::Success => 0b0000,
            Outcome::Invalid => 0b0001,
            Outcome::Failure => 0b1111,
        };
        Self::default()
            .with(Self::TYPE, 9)
            .with(PASID_PRESENT, response.tag.pasid.is_some().into())
            .with(CODE, code)
            .with(REQUESTER, source_id(response.stream))
            .with(Self::PASID, response.tag.pasid.map_or(0, Pasid::value).into())
            .with(GROUP, u64::from(response.tag.index) & 0x1FF)
    }
}

/// A source-id has 16 bits: bus, device, function.
fn source_id(stream: StreamId) -> u64 {
    u64::from(stream.0) & 0xFFFF
}

/// Encodes a block the way of device TLBs: its size is told by how many ones follow bit 12 of its address.
fn device_tlb_address(block: Block) -> (u64, bool) {
    match block.mask {
        0 => (block.iova.0, false),
        mask => (block.iova.0 | ((1 << (mask - 1)) - 1) << 12, true),
    }
}

/// Descriptors in one batch, at most; a batch that needs more is refused whole.
pub(crate) const BATCH: usize = 32;

/// Blocks that a range is cut into, at most; a range that needs more invalidates the whole attachment.
const BLOCKS: usize = 4;

/// What the descriptors of a unit depend on, from `CAP`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    /// Drain writes (bit 0) and reads (bit 1) with second-stage invalidations.
    pub(crate) drain: u64,
    /// `CAP.MAMV`: page-selective invalidations cover at most 2^`mask_limit` pages.
    pub(crate) mask_limit: u8,
    /// `ECAP.MHMV`: index-selective invalidations cover at most 2^`interrupt_mask_limit` interrupt entries.
    pub(crate) interrupt_mask_limit: u8,
    /// `CAP.PSI`: second-stage translations can be invalidated by page.
    pub(crate) second_stage_pages: bool,
    /// `ECAP.DIT`: device-TLB invalidations name the physical function. Otherwise the field is reserved.
    pub(crate) physical_function: bool,
}

/// A list of descriptors that refuses rather than cuts off.
struct Batch(Vec<Descriptor, BATCH>);

impl Batch {
    fn push(&mut self, descriptor: Descriptor) -> Result<(), Error> {
        self.0.push(descriptor).map_err(|_| Error::Exhausted { what: "descriptors in a batch" })
    }
}

/// The command side of a unit; see [`iommu::Commands`].
///
/// Worst case of a call: one read of `IQH`, `BATCH` descriptors stored and published, one write of `IQT`.
#[derive(Debug)]
pub struct Commands<B> {
    bus: B,
    queue: InvalidationQueue,
    /// The word that every wait descriptor writes its sequence number to; it lives as long as the unit.
    status: DmaBuf,
    abilities: Abilities,
    /// The sequence number of the last wait that was queued.
    submitted: u64,
    /// Entries kept free for page group responses.
    reserve: usize,
}

impl<B: Bus> Commands<B> {
    pub(crate) fn new(
        bus: B,
        queue: InvalidationQueue,
        mut status: DmaBuf,
        abilities: Abilities,
        reserve: usize,
    ) -> Self {
        status.clear();
        bus.publish(status.range(0, 1));
        Self { bus, queue, status, abilities, submitted: 0, reserve }
    }

    /// Encodes one invalidation.
    fn encode(&self, batch: &mut Batch, invalidation: Invalidation) -> Result<(), Error> {
        let drain = self.abilities.drain;
        match invalidation {
            Invalidation::All => {
                batch.push(Descriptor::all_contexts())?;
                batch.push(Descriptor::all_pasid_entries())?;
                batch.push(Descriptor::all_translations(drain))
            }
            Invalidation::Interrupts => batch.push(Descriptor::all_interrupt_entries()),
            Invalidation::InterruptEntry { index, log2 } => {
                batch.push(match log2 <= self.abilities.interrupt_mask_limit {
                    true => Descriptor::interrupt_entries(index, log2),
                    false => Descriptor::all_interrupt_entries(),
                })
            }
            Invalidation::Device { stream, device_tlb } => {
                batch.push(Descriptor::context(stream))?;
                if device_tlb {
                    batch.push(Descriptor::device_tlb(stream, self.physical(stream)))
                } else {
                    Ok(())
                }
            }
            // The unit's own caches first: what the device asks for anew must not come from a stale entry.
            Invalidation::Attachment(at) => {
                batch.push(Descriptor::pasid_entry(at.domain.0, number(at)))?;
                self.forget_all(batch, at)
            }
            Invalidation::Pages { attachment: at, iova, pages } => {
                match blocks(iova, pages, self.abilities.mask_limit) {
                    Some(blocks) if at.stages == Stages::First || self.abilities.second_stage_pages => {
                        for &block in &blocks {
                            batch.push(if at.stages == Stages::First {
                                Descriptor::pasid_pages(at.domain.0, number(at), block)
                            } else {
                                Descriptor::domain_pages(at.domain.0, block, drain)
                            })?;
                        }
                        if at.device_tlb {
                            let physical = self.physical(at.stream);
                            for &block in &blocks {
                                batch.push(match at.pasid {
                                    Some(pasid) => {
                                        Descriptor::pasid_device_tlb_pages(at.stream, physical, pasid, block)
                                    }
                                    None => Descriptor::device_tlb_pages(at.stream, physical, block),
                                })?;
                            }
                        }
                        Ok(())
                    }
                    _ => self.forget_all(batch, at),
                }
            }
            Invalidation::PageRequestDrain => Ok(()),
            // The vocabulary may grow; what this driver does not know must not pass for done.
            _ => Err(Error::Unsupported { feature: "this invalidation" }),
        }
    }

    /// The physical function of a device: itself, since no virtual function is ever assigned.
    fn physical(&self, stream: StreamId) -> StreamId {
        if self.abilities.physical_function { stream } else { StreamId(0) }
    }

    /// All translations of an attachment: in the unit, then in the device.
    fn forget_all(&self, batch: &mut Batch, at: Attachment) -> Result<(), Error> {
        batch.push(if at.stages == Stages::First {
            Descriptor::pasid(at.domain.0, number(at))
        } else {
            Descriptor::domain(at.domain.0, self.abilities.drain)
        })?;
        if at.device_tlb {
            let physical = self.physical(at.stream);
            batch.push(match at.pasid {
                Some(pasid) => Descriptor::pasid_device_tlb(at.stream, physical, pasid),
                None => Descriptor::device_tlb(at.stream, physical),
            })?;
        }
        Ok(())
    }
}

impl<B: Bus> iommu::Commands for Commands<B> {
    fn submit(&mut self, invalidations: &[Invalidation]) -> Result<Ticket, Error> {
        let mut batch = Batch(Vec::new());
        for &invalidation in invalidations {
            self.encode(&mut batch, invalidation)?;
        }
        let drain = invalidations.contains(&Invalidation::PageRequestDrain);
        let sequence = self.submitted + 1;
        batch.push(Descriptor::wait(self.status.phys(), sequence as u32, drain))?;
        self.queue.push(&self.bus, &batch.0, self.reserve)?;
        self.submitted = sequence;
        Ok(Ticket(sequence))
    }

    fn respond(&mut self, response: PageResponse) -> Result<(), (PageResponse, Error)> {
        let descriptor = Descriptor::page_group_response(&response);
        self.queue.push(&self.bus, &[descriptor], 0).map_err(|error| (response, error))
    }

    fn poll(&mut self, ticket: Ticket) -> Completion {
        self.bus.observe(self.status.range(0, 1));
        // Waits complete in order (each fences), so the word holds the low half of the latest sequence number. It is
        // at most a queue's length behind, so a distance that is larger is no distance: hardware wrote something else.
        let behind = (self.submitted as u32).wrapping_sub(self.status.load(0) as u32);
        let done = self.submitted.checked_sub(behind.into());
        if done.is_some_and(|done| done >= ticket.0) { Completion::Done } else { Completion::Pending }
    }

    /// A queue that stopped stays stopped.
    fn recover(&mut self) -> Option<Failure> {
        None
    }
}

/// The PASID under which the unit caches an attachment: accesses without one use entry 0 (`RID_PASID`).
pub(crate) fn number(attachment: Attachment) -> Pasid {
    attachment.pasid.unwrap_or(Pasid::from_low_bits(0))
}

/// Cuts a range into the fewest blocks, or returns `None` if there would be too many.
fn blocks(iova: Iova, pages: u64, limit: u8) -> Option<Vec<Block, BLOCKS>> {
    let mut blocks = Vec::new();
    let mut page = iova.0 / PAGE_SIZE;
    let mut left = pages;
    while left > 0 {
        let block = Block::largest(page, left, limit);
        blocks.push(block).ok()?;
        page = page.wrapping_add(1 << block.mask);
        left = left.saturating_sub(1 << block.mask);
    }
    Some(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_into_the_fewest_blocks() {
        let masks = |iova, pages| {
            blocks(Iova(iova), pages, 18)
                .map(|all| all.iter().map(|b| (b.iova.0, b.mask)).collect::<std::vec::Vec<_>>())
        };

        assert_eq!(masks(0x1000, 3), Some(vec![(0x1000, 0), (0x2000, 1)]));
        assert_eq!(masks(0x4000_0000, 512), Some(vec![(0x4000_0000, 9)]));
        assert_eq!(masks(0x1000, 0xFF), None, "eight blocks are too many");
        assert_eq!(masks(0, 0), Some(vec![]));
    }

    #[test]
    fn a_block_is_as_large_as_alignment_and_length_allow() {
        let largest = |page, pages, limit| {
            let block = Block::largest(page, pages, limit);
            (block.iova.0, block.mask)
        };

        assert_eq!(largest(0x10, 16, 18), (0x1_0000, 4));
        assert_eq!(largest(0x11, 16, 18), (0x1_1000, 0));
        assert_eq!(largest(0x10, 7, 18), (0x1_0000, 2));
        assert_eq!(largest(0, u64::MAX, 18), (0, 18));
        assert_eq!(largest(0x10, 0, 18), (0x1_0000, 0));
    }
}
