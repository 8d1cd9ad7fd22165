//! What the unit is told through the invalidation queue: descriptors, in the order of their types, and batches of them.
//!
//! The layouts are those of the VT-d architecture specification, "Queued Invalidation Interface" and "Page Group
//! Response Descriptor". Words 2 and 3 are zero in all of them.

use crate::{
    queue::InvalidationQueue,
    regs::{self, CCMD, FSTS, GLOBAL, IOTLB, IQERCD},
    tables::Mode,
    tickets::{Batch, PENDING, Tickets},
};
use heapless::Vec;
use iommu::{
    Attachment, Bus, Completion, DmaBuf, Error, Failure, FailureCause, Field, Invalidation, Iova, Outcome,
    PAGE_SIZE, PageResponse, Pasid, PhysAddr, Stages, StreamId, Ticket, Words, bus::wait_until, descriptor,
};

descriptor! {
    /// One entry of the invalidation queue, in its 256-bit form (`IQA.DW` = 1). The 128-bit form has the lower half.
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

    /// Returns `pages` pages from page `page`, if they are one block of no more than 2^`limit` pages.
    #[inline(always)]
    fn whole(page: u64, pages: u64, limit: u8) -> Option<Self> {
        let mask = pages.trailing_zeros();
        // Of no pages at all the mask is 64, and no limit is that high.
        let is_one = (page | pages) & pages.wrapping_sub(1) == 0 && mask <= limit.into();
        is_one.then_some(Self { iova: Iova(page.wrapping_mul(PAGE_SIZE)), mask: mask as u8 })
    }
}

/// What is left of a range: the fewest blocks that it can be cut into.
#[derive(Clone, Debug)]
struct Blocks {
    page: u64,
    left: u64,
    limit: u8,
}

impl Iterator for Blocks {
    type Item = Block;

    fn next(&mut self) -> Option<Block> {
        if self.left == 0 {
            return None;
        }
        let block = Block::largest(self.page, self.left, self.limit);
        self.page = self.page.wrapping_add(1 << block.mask);
        self.left = self.left.saturating_sub(1 << block.mask);
        Some(block)
    }
}

impl Descriptor {
    const TYPE: Field<Self> = Field::bits(3, 0);
    const GRANULARITY: Field<Self> = Field::bits(5, 4);
    const DOMAIN: Field<Self> = Field::bits(31, 16);

    const CONTEXT_SOURCE: Field<Self> = Field::bits(47, 32);

    /// The caches fill each other in this order, and a unit may execute what lies between two fences in any: contexts,
    /// PASID entries, translations, what devices remember. Interrupt entries stand alone.
    fn stage(&self) -> u8 {
        match self.get(Self::TYPE) {
            1 | 4 => 0,
            7 => 1,
            2 | 6 => 2,
            _ => 3,
        }
    }

    /// Context-cache invalidation of everything (type 1, global).
    pub fn all_contexts() -> Self {
        Self::default().with(Self::TYPE, 1).with(Self::GRANULARITY, 1)
    }

    /// Context-cache invalidation of one device (type 1, device-selective, all bits of the source-id compared).
    ///
    /// In scalable mode hardware ignores the domain, so it is zero. In legacy mode zero is that of what is not present.
    pub fn context(stream: StreamId) -> Self {
        Self::default()
            .with(Self::TYPE, 1)
            .with(Self::GRANULARITY, 3)
            .with(Self::CONTEXT_SOURCE, source_id(stream))
    }

    /// Context-cache invalidation of one device that was cached under `domain`, in legacy mode.
    pub fn context_of(domain: u16, stream: StreamId) -> Self {
        Self::context(stream).with(Self::DOMAIN, domain.into())
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

    /// Says how many invalidations the device of a device-TLB invalidation takes at one time (MIP): 1 to 32.
    pub fn at_most(self, outstanding: u8) -> Self {
        const OF_TYPE_3: Field<Descriptor> = Field::bits(20, 16);
        const OF_TYPE_8: Field<Descriptor> = Field::bits(8, 4);
        let field = if self.get(Self::TYPE) == 8 { OF_TYPE_8 } else { OF_TYPE_3 };
        // 32 is told as 0, and so is what nobody knows.
        self.with(field, u64::from(outstanding) & 0x1F)
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

    /// Wait (type 5) that holds nothing back: it writes zero to `nowhere`, which nobody reads.
    ///
    /// It takes the place of a descriptor that the unit refused. Every unit knows it, unlike one that does nothing at all.
    pub fn nothing(nowhere: PhysAddr) -> Self {
        Self::default()
            .with(Self::TYPE, 5)
            .with(Self::WAIT_STATUS_WRITE, 1)
            .with_address(Self::WAIT_STATUS_ADDRESS, nowhere.0)
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

    const RESPONSE_REQUESTER: Field<Self> = Field::bits(31, 16);

    /// Page group response (type 9).
    pub fn page_group_response(response: &PageResponse) -> Self {
        const PASID_PRESENT: Field<Descriptor> = Field::bit(4);
        const CODE: Field<Descriptor> = Field::bits(15, 12);
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
            .with(Self::RESPONSE_REQUESTER, source_id(response.stream))
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

/// Devices whose invalidations need to say more than the device's own name, at most.
const DESCRIBED: usize = 16;

/// Errors that are dealt with one after the other, without any progress between them, before the queue is given up.
const ATTEMPTS: u32 = 8;

/// How long a unit may take for an invalidation through its registers, in microseconds. The manual sets no bound.
const REGISTER_LIMIT_US: u64 = 100_000;

/// What the descriptors of a unit depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    /// Which tables the unit walks; those of scalable mode have PASIDs.
    pub(crate) mode: Mode,
    /// Drain writes (bit 0) and reads (bit 1) with second-stage invalidations.
    pub(crate) drain: u64,
    /// `CAP.MAMV`: page-selective invalidations cover at most 2^`mask_limit` pages.
    pub(crate) mask_limit: u8,
    /// `ECAP.MHMV`: index-selective invalidations cover at most 2^`interrupt_mask_limit` interrupt entries.
    pub(crate) interrupt_mask_limit: u8,
    /// `CAP.PSI`: second-stage translations can be invalidated by page.
    pub(crate) second_stage_pages: bool,
    /// `ECAP.PDS`: a wait can drain page requests.
    pub(crate) request_drain: bool,
    /// `ECAP.DIT`: device-TLB invalidations name the physical function and how many the device takes at one time.
    /// Otherwise the fields are reserved.
    pub(crate) throttle: bool,
    /// Where the registers of register-based invalidation are, in bytes (16 `ECAP.IRO`).
    pub(crate) registers: usize,
}

/// What is put into the queue together: a list that refuses rather than cuts off.
struct Descriptors {
    list: Vec<Descriptor, BATCH>,
    /// Whose device TLB is to forget something.
    asked: Option<StreamId>,
}

impl Descriptors {
    const FULL: Error = Error::Exhausted { what: "descriptors in a batch" };

    /// Adds a descriptor, behind those that must come before it. Most come in their order.
    fn push(&mut self, descriptor: Descriptor) -> Result<(), Error> {
        let stage = descriptor.stage();
        let at = match self.list.last() {
            Some(last) if last.stage() > stage => {
                self.list.iter().position(|other| other.stage() > stage).unwrap_or(self.list.len())
            }
            _ => return self.list.push(descriptor).map_err(|_| Self::FULL),
        };
        self.insert(at, descriptor)
    }

    /// Puts `fence` wherever what follows must not start before all else is done.
    fn fence(&mut self, fence: Descriptor) -> Result<(), Error> {
        let mut at = 1;
        while let Some([before, next]) = self.list.get(at - 1..=at) {
            if next.stage() > before.stage() {
                self.insert(at, fence)?;
                at += 1;
            }
            at += 1;
        }
        Ok(())
    }

    fn insert(&mut self, at: usize, descriptor: Descriptor) -> Result<(), Error> {
        self.list.insert(at, descriptor).map_err(|_| Self::FULL)
    }
}

/// What a device's invalidations say beside its name.
#[derive(Clone, Copy, Debug)]
struct Described {
    stream: StreamId,
    physical: StreamId,
    outstanding: u8,
}

/// The command side of a unit; see [`iommu::Commands`].
///
/// Worst case of a call: one read of `IQH`, `BATCH` descriptors stored and published, one write of `IQT`. After a device
/// that did not answer [`recover`](iommu::Commands::recover) does that once more for each ticket whose descriptors the unit
/// had fetched. A unit without queued invalidation is told through its registers, and waited for.
///
/// At most one ticket at a time waits for a device TLB, of one device: a device that does not answer holds back the queue until
/// the unit gives it up, and no second one may add to that. `submit` refuses a batch that asks two ([`Error::Exhausted`]), and
/// one that asks while another is on its way ([`Error::Busy`]).
///
/// What a unit is at for [too long](crate::HEAD_LIMIT_US) has failed; what waits behind that has not.
#[derive(Debug)]
pub struct Commands<B> {
    bus: B,
    /// `None` where the unit is told through its registers.
    queue: Option<InvalidationQueue>,
    /// Word 0 is what every wait writes its sequence number to, word 1 what nobody reads; it lives as long as the unit.
    status: DmaBuf,
    abilities: Abilities,
    tickets: Tickets,
    /// Entries kept free for page group responses.
    reserve: usize,
    described: Vec<Described, DESCRIBED>,
    /// The ticket that took too long, until [`iommu::Commands::recover`] tells it.
    overdue: Option<Failure>,
    /// Errors met in a row while the head was here and so much was done.
    attempts: (u32, usize, u64),
    /// The queue could not be brought to go on.
    stopped: bool,
}

impl<B: Bus> Commands<B> {
    pub(crate) fn new(
        bus: B,
        queue: Option<InvalidationQueue>,
        mut status: DmaBuf,
        abilities: Abilities,
        reserve: usize,
    ) -> Self {
        status.clear();
        bus.publish(status.range(0, 2));
        Self {
            bus,
            queue,
            status,
            abilities,
            tickets: Tickets::new(),
            reserve,
            described: Vec::new(),
            overdue: None,
            attempts: (0, 0, 0),
            stopped: false,
        }
    }

    /// Notes what device-TLB invalidations of `stream` are to say: the physical function that it belongs to, and how many
    /// it takes at one time. A function that is its own needs no note.
    ///
    /// Units that do not ask for it (`ECAP.DIT`) are not told.
    pub fn describe(&mut self, stream: StreamId, physical: StreamId, outstanding: u8) -> Result<(), Error> {
        self.described.retain(|known| known.stream != stream);
        self.described
            .push(Described { stream, physical, outstanding })
            .map_err(|_| Error::Exhausted { what: "notes about devices" })
    }

    /// Encodes one invalidation.
    fn encode(&self, batch: &mut Descriptors, invalidation: &Invalidation) -> Result<(), Error> {
        let drain = self.abilities.drain;
        let scalable = self.abilities.mode == Mode::Scalable;
        match *invalidation {
            Invalidation::All => {
                batch.push(Descriptor::all_contexts())?;
                if scalable {
                    batch.push(Descriptor::all_pasid_entries())?;
                }
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
                if scalable {
                    batch.push(Descriptor::context(stream))?;
                } else {
                    // A context of legacy mode is found by device and domain, and here nobody says which domain.
                    batch.push(Descriptor::all_contexts())?;
                    batch.push(Descriptor::all_translations(drain))?;
                }
                if device_tlb { self.ask(batch, stream, None, None) } else { Ok(()) }
            }
            Invalidation::Attachment(at) => {
                batch.push(if scalable {
                    Descriptor::pasid_entry(at.domain.0, number(at))
                } else {
                    Descriptor::context_of(at.domain.0, at.stream)
                })?;
                self.forget_all(batch, at)
            }
            Invalidation::Pages { attachment: at, iova, pages } => self.forget_pages(batch, at, iova, pages),
            Invalidation::FirstStage { asid: Some(_), .. } => {
                Err(Error::Unsupported { feature: "address spaces of a guest by number: they have PASIDs" })
            }
            Invalidation::FirstStage { attachment: at, asid: None, pages } => {
                if at.stages != Stages::Nested || !scalable {
                    return Err(Error::Unsupported { feature: "a first stage of the guest's own" });
                }
                self.forget_first_stage(batch, at, pages)
            }
            Invalidation::DeviceTlb { attachment: at, pasid, pages } => {
                if !at.device_tlb {
                    return Err(Error::Unsupported { feature: "a device TLB of this device" });
                }
                if pasid != at.pasid {
                    return Err(Error::Unsupported {
                        feature: "a device TLB under the PASID of another attachment",
                    });
                }
                let blocks = pages.and_then(|(iova, pages)| self.cut(iova, pages));
                self.ask(batch, at.stream, at.pasid, blocks)
            }
            Invalidation::PageRequestDrain if !self.abilities.request_drain => {
                Err(Error::Unsupported { feature: "ECAP.PDS (page request drain)" })
            }
            Invalidation::PageRequestDrain => Ok(()),
            Invalidation::Contexts { .. } => {
                Err(Error::Unsupported { feature: "tables of context descriptors, which are SMMUv3's" })
            }
            // Faults do not stall here.
            Invalidation::Stalls { .. } => Ok(()),
            // The vocabulary may grow; what this driver does not know must not pass for done.
            _ => Err(Error::Unsupported { feature: "this invalidation" }),
        }
    }

    /// All translations of an attachment: in the unit, then in the device.
    fn forget_all(&self, batch: &mut Descriptors, at: Attachment) -> Result<(), Error> {
        let scalable = self.abilities.mode == Mode::Scalable;
        if !scalable || matches!(at.stages, Stages::Second | Stages::Nested) {
            batch.push(Descriptor::domain(at.domain.0, self.abilities.drain))?;
        }
        // What has no second stage is cached by its PASID.
        if scalable && at.stages != Stages::Second {
            batch.push(Descriptor::pasid(at.domain.0, number(at)))?;
        }
        if at.device_tlb { self.ask(batch, at.stream, at.pasid, None) } else { Ok(()) }
    }

    fn forget_pages(
        &self,
        batch: &mut Descriptors,
        at: Attachment,
        iova: Iova,
        pages: u64,
    ) -> Result<(), Error> {
        let Some(blocks) = self.cut(iova, pages).filter(|_| self.has_pages(at)) else {
            return self.forget_all(batch, at);
        };
        for block in blocks.clone() {
            batch.push(self.block(at, block))?;
        }
        // Nobody knows which addresses the guest's first stage gave to these pages.
        let nested = at.stages == Stages::Nested;
        if nested {
            batch.push(Descriptor::pasid(at.domain.0, number(at)))?;
        }
        if at.device_tlb { self.ask(batch, at.stream, at.pasid, (!nested).then_some(blocks)) } else { Ok(()) }
    }

    /// Whether the unit caches an attachment's translations by domain alone: what has a second stage.
    #[inline]
    fn is_by_domain(&self, at: Attachment) -> bool {
        self.abilities.mode == Mode::Legacy || matches!(at.stages, Stages::Second | Stages::Nested)
    }

    /// Whether pages of an attachment can be forgotten, and not only all of it.
    #[inline]
    fn has_pages(&self, at: Attachment) -> bool {
        !self.is_by_domain(at) || self.abilities.second_stage_pages
    }

    /// One block of an attachment, in the unit.
    #[inline(always)]
    fn block(&self, at: Attachment, block: Block) -> Descriptor {
        if self.is_by_domain(at) {
            Descriptor::domain_pages(at.domain.0, block, self.abilities.drain)
        } else {
            Descriptor::pasid_pages(at.domain.0, number(at), block)
        }
    }

    fn forget_first_stage(
        &self,
        batch: &mut Descriptors,
        at: Attachment,
        pages: Option<(Iova, u64)>,
    ) -> Result<(), Error> {
        let Some(blocks) = pages.and_then(|(iova, pages)| self.cut(iova, pages)) else {
            return batch.push(Descriptor::pasid(at.domain.0, number(at)));
        };
        for block in blocks {
            batch.push(Descriptor::pasid_pages(at.domain.0, number(at), block))?;
        }
        Ok(())
    }

    /// Cuts a range into the fewest blocks, or returns `None` if all is to be forgotten instead.
    fn cut(&self, iova: Iova, pages: u64) -> Option<Blocks> {
        blocks(iova, pages, self.abilities.mask_limit)
    }

    /// What the device itself remembers: in `blocks`, or all.
    fn ask(
        &self,
        batch: &mut Descriptors,
        stream: StreamId,
        pasid: Option<Pasid>,
        blocks: Option<Blocks>,
    ) -> Result<(), Error> {
        if batch.asked.is_some_and(|other| other != stream) {
            // Not every unit names the one that is silent.
            return Err(Error::Exhausted { what: "devices asked in a batch" });
        }
        let own = Described { stream, physical: stream, outstanding: 0 };
        let told = self.described.iter().find(|known| known.stream == stream).copied().unwrap_or(own);
        let (physical, outstanding) =
            if self.abilities.throttle { (told.physical, told.outstanding) } else { (StreamId(0), 0) };
        let mut push = |descriptor: Descriptor| batch.push(descriptor.at_most(outstanding));
        match (&blocks, pasid) {
            (None, None) => push(Descriptor::device_tlb(stream, physical))?,
            (None, Some(pasid)) => push(Descriptor::pasid_device_tlb(stream, physical, pasid))?,
            (Some(blocks), pasid) => {
                for block in blocks.clone() {
                    push(match pasid {
                        Some(pasid) => Descriptor::pasid_device_tlb_pages(stream, physical, pasid, block),
                        None => Descriptor::device_tlb_pages(stream, physical, block),
                    })?;
                }
            }
        }
        if blocks.is_none_or(|blocks| blocks.left > 0) {
            batch.asked = Some(stream);
        }
        Ok(())
    }

    /// Queues what most invalidations are: one block of pages, of an attachment without a device TLB, for a queue with room.
    /// `None` if anything is unusual; then nothing was done.
    #[inline(always)]
    fn submit_block(&mut self, invalidations: &[Invalidation]) -> Option<Ticket> {
        let [Invalidation::Pages { attachment: at, iova, pages }] = *invalidations else { return None };
        let block = Block::whole(iova.0 / PAGE_SIZE, pages, self.abilities.mask_limit)?;
        if at.device_tlb || at.stages == Stages::Nested || !self.has_pages(at) || self.stopped {
            return None;
        }
        let descriptor = self.block(at, block);
        let queue = self.queue.as_mut()?;
        if !queue.has_room_in_row(2, self.reserve) || !self.tickets.has_room() {
            return None;
        }
        let sequence = self.tickets.next();
        let wait = Descriptor::wait(self.status.phys(), sequence as u32, false);
        let (ticket, done_at, asked) = (Ticket(sequence), sequence, None);
        let start = queue.push_row(&self.bus, [descriptor, wait]);
        let end = queue.tail();
        self.tickets.took();
        self.tickets.add(Batch { ticket, done_at, start, end, asked, drains: false, failed: false });
        Some(ticket)
    }

    /// Queues any invalidations, or none of them.
    #[inline(never)]
    fn submit_list(&mut self, invalidations: &[Invalidation]) -> Result<Ticket, Error> {
        self.is_stopped()?;
        let mut batch = Descriptors { list: Vec::new(), asked: None };
        for invalidation in invalidations {
            self.encode(&mut batch, invalidation)?;
        }
        let sequence = self.tickets.next();
        let ticket = Ticket(sequence);
        if self.queue.is_none() {
            self.execute(&batch.list)?;
            self.tickets.took();
            return Ok(ticket);
        }
        let drains = invalidations.iter().any(|asked| matches!(asked, Invalidation::PageRequestDrain));
        batch.fence(Descriptor::wait(self.nowhere(), 0, false))?;
        batch.push(Descriptor::wait(self.status.phys(), sequence as u32, drains))?;
        let needed = batch.list.len();
        let asks = batch.asked.is_some();
        let room = self.queue.as_ref().is_some_and(|queue| queue.has_room(needed + self.reserve));
        if !room || !self.tickets.has_room() || asks && self.tickets.waits_for_device() {
            // What has completed is looked at only when what is known does not suffice.
            self.settle();
        }
        if asks && self.tickets.waits_for_device() {
            return Err(Error::Busy { what: "device-TLB invalidation" });
        }
        if !self.tickets.has_room() {
            return Err(Error::QueueFull { needed, free: 0 });
        }
        let Some(queue) = &mut self.queue else { return Err(Error::Failed { ticket }) };
        let kept = |queue: &_| Self::kept(&self.tickets, queue);
        let start = queue.push(&self.bus, &batch.list, self.reserve, kept)?;
        let end = queue.tail();
        self.tickets.took();
        let done_at = sequence;
        self.tickets.add(Batch { ticket, done_at, start, end, asked: batch.asked, drains, failed: false });
        Ok(ticket)
    }

    /// A word that waits write to because they must write somewhere.
    fn nowhere(&self) -> PhysAddr {
        PhysAddr(self.status.phys().0 + 8)
    }

    /// The oldest place in the queue that belongs to a ticket without an end.
    fn kept(tickets: &Tickets, queue: &InvalidationQueue) -> Option<usize> {
        tickets.pending().iter().map(|batch| batch.start).min_by_key(|&start| queue.age(start))
    }

    /// Looks at what has completed.
    #[inline]
    fn settle(&mut self) {
        self.bus.observe(self.status.range(0, 1));
        self.tickets.observe(self.status.load(0) as u32);
    }

    /// Takes a ticket for failed that has taken too long, and notes it for `recover`.
    #[inline(never)]
    fn look_for_overdue(&mut self) {
        let Some((late, at_head)) = self.tickets.overdue(self.bus.now_us()) else { return };
        // What is not at the head was asked of no device yet.
        let stream = late.asked.filter(|_| at_head);
        let cause = if stream.is_some() { FailureCause::Unanswered } else { FailureCause::Stopped };
        // Of several the one that names a device is told: it is the one to act upon.
        if self.overdue.is_none_or(|earlier| earlier.stream.is_none()) {
            self.overdue = Some(Failure { cause, stream, ticket: Some(late.ticket) });
        }
    }

    /// The unit does nothing any more, as far as this driver can tell.
    fn is_stopped(&self) -> Result<(), Error> {
        let ticket = Ticket(self.tickets.next());
        if self.stopped { Err(Error::Failed { ticket }) } else { Ok(()) }
    }

    /// Gives up: nothing that is queued will be executed. The queue goes off, so that it does not fail again once its errors
    /// are cleared, which the next call does.
    fn stop(&mut self) -> Failure {
        self.stopped = true;
        let kept = regs::GSTS.read(&self.bus).get() & !regs::ONE_SHOT;
        regs::GCMD.set(&self.bus, kept & !GLOBAL::QIE::SET.value);
        let mut last = None;
        while let Some(ticket) = self.tickets.pending().first().map(|batch| batch.ticket) {
            self.tickets.end(ticket);
            last = Some(ticket);
        }
        Failure { cause: FailureCause::Stopped, stream: None, ticket: last }
    }

    fn clear_errors(&self) {
        regs::FSTS.clear(&self.bus, FSTS::IQE::SET + FSTS::ITE::SET + FSTS::ICE::SET);
    }

    /// Deals with `FSTS.IQE`: the head is at a descriptor that the unit does not take.
    ///
    /// It is replaced; a wait by one that writes the same number, so that what comes behind it stays in its order.
    fn replace_refused(&mut self) -> Option<Failure> {
        let queue = self.queue.as_mut()?;
        let at = queue.read_head(&self.bus);
        let is_here = |batch: &Batch| {
            let first = queue.age(batch.start);
            (first..=queue.age(queue.before(batch.end))).contains(&queue.age(at))
        };
        let batch = self.tickets.pending().iter().find(|batch| is_here(batch)).copied();
        let mut stream = batch.and_then(|batch| batch.asked);
        if queue.age(at) < queue.age(queue.tail()) {
            let refused = Descriptor([queue.first_word(at), 0, 0, 0]);
            if batch.is_none() && refused.get(Descriptor::TYPE) == 9 {
                stream = Some(StreamId(refused.get(Descriptor::RESPONSE_REQUESTER) as u32));
            }
            let status = self.status.phys();
            let replacement = match batch {
                Some(batch) if queue.before(batch.end) == at => {
                    Descriptor::wait(status, batch.done_at as u32, false)
                }
                _ => Descriptor::nothing(PhysAddr(status.0 + 8)),
            };
            queue.put(&self.bus, at, replacement);
        }
        let ticket = batch.map(|batch| batch.ticket);
        if let Some(ticket) = ticket {
            self.tickets.fail(ticket);
        }
        regs::FSTS.clear(&self.bus, FSTS::IQE::SET);
        // Some units go on when the tail is written, and not before.
        queue.ring_doorbell(&self.bus);
        Some(Failure { cause: FailureCause::Refused, stream, ticket })
    }

    /// Deals with `FSTS.ITE`: a device did not answer, and every wait that was fetched is aborted.
    ///
    /// The ticket that waited for the device has failed. All else that was begun is queued again: its own wait will not be
    /// written, and of the fences in it nobody knows.
    fn resubmit_aborted(&mut self, errors: IqErrors) -> Option<Failure> {
        self.settle();
        let queue = self.queue.as_mut()?;
        let head = queue.read_head(&self.bus);
        let was_fetched = |at: usize| queue.age(at) < queue.age(head);
        let mut begun: Vec<Ticket, PENDING> = Vec::new();
        let mut unanswered = None;
        for &batch in self.tickets.pending().iter().filter(|batch| was_fetched(batch.start)) {
            if batch.asked.is_some() {
                unanswered = Some(batch);
            } else if !batch.failed {
                // There is room: as many as can be pending.
                let _ = begun.push(batch.ticket);
            }
        }
        if let Some(batch) = unanswered {
            if was_fetched(queue.before(batch.end)) {
                self.tickets.end(batch.ticket);
            } else {
                // Its wait is still to come, and will be written.
                self.tickets.fail(batch.ticket);
                self.tickets.moved(batch.ticket, |batch| batch.start = head);
            }
        }
        regs::FSTS.clear(&self.bus, FSTS::ITE::SET);
        // What was fetched is not needed any more, but for being read once more. The tail follows behind that.
        queue.release_fetched(head);
        queue.ring_doorbell(&self.bus);
        for ticket in begun {
            let Some(Batch { start, end, drains, .. }) = self.tickets.find(ticket) else { continue };
            let done_at = self.tickets.next();
            let mut list: Vec<Descriptor, BATCH> = queue.between(start, end).collect();
            list.pop();
            let _ = list.push(Descriptor::wait(self.status.phys(), done_at as u32, drains));
            match queue.push(&self.bus, &list, 0, |_| None) {
                Ok(start) => {
                    let end = queue.tail();
                    self.tickets.took();
                    self.tickets.moved(ticket, |batch| {
                        (batch.done_at, batch.start, batch.end) = (done_at, start, end);
                    });
                }
                Err(_) => self.tickets.end(ticket),
            }
        }
        self.tickets.restart_clock();
        // One device at most was waited for, so its name is known even where the unit does not tell it.
        let stream = unanswered.and_then(|batch| batch.asked).or(errors.unanswered);
        let ticket = unanswered.map(|batch| batch.ticket);
        Some(Failure { cause: FailureCause::Unanswered, stream, ticket })
    }

    /// Counts an error; returns whether there were too many without any progress.
    fn is_hopeless(&mut self) -> bool {
        let Some(queue) = &self.queue else { return true };
        let place = (queue.read_head(&self.bus), self.tickets.completed());
        let (count, at, done) = self.attempts;
        let count = if (at, done) == place { count + 1 } else { 1 };
        self.attempts = (count, place.0, place.1);
        count > ATTEMPTS
    }

    /// Executes `descriptors` through the registers, one by one.
    fn execute(&self, descriptors: &[Descriptor]) -> Result<(), Error> {
        let bus = &self.bus;
        let iotlb = regs::IotlbRegisters::at(self.abilities.registers);
        for descriptor in descriptors {
            let field = |field| descriptor.get(field);
            let granularity = field(Descriptor::GRANULARITY);
            let domain = field(Descriptor::DOMAIN);
            // What a unit was told before and has not done must be done before it is told more.
            match field(Descriptor::TYPE) {
                1 => {
                    let idle = || !regs::CCMD.read(bus).is_set(CCMD::ICC);
                    wait_until(bus, "CCMD.ICC", REGISTER_LIMIT_US, idle)?;
                    let source = field(Descriptor::CONTEXT_SOURCE);
                    regs::CCMD.set(bus, 1 << 63 | granularity << 61 | source << 16 | domain);
                    wait_until(bus, "CCMD.ICC", REGISTER_LIMIT_US, idle)?;
                    self.was_done(regs::CCMD.read(bus).read(CCMD::CAIG))?;
                }
                2 => {
                    let idle = || !iotlb.command.read(bus).is_set(IOTLB::IVT);
                    wait_until(bus, "IOTLB.IVT", REGISTER_LIMIT_US, idle)?;
                    iotlb.address.set(bus, descriptor.0[1]);
                    let drain = field(Descriptor::DRAIN);
                    iotlb.command.set(bus, 1 << 63 | granularity << 60 | drain << 48 | domain << 32);
                    wait_until(bus, "IOTLB.IVT", REGISTER_LIMIT_US, idle)?;
                    self.was_done(iotlb.command.read(bus).read(IOTLB::IAIG))?;
                }
                _ => return Err(Error::Unsupported { feature: "ECAP.QI (queued invalidation)" }),
            }
        }
        Ok(())
    }

    /// `granularity` is what the unit says that it did: 0 is nothing, more than was asked for is fine.
    fn was_done(&self, granularity: u64) -> Result<(), Error> {
        let ticket = Ticket(self.tickets.next());
        if granularity == 0 { Err(Error::Failed { ticket }) } else { Ok(()) }
    }
}

/// What `IQERCD` tells. It is read before the error is cleared.
#[derive(Clone, Copy, Debug)]
struct IqErrors {
    unanswered: Option<StreamId>,
    unexpected: Option<StreamId>,
}

impl IqErrors {
    fn read<B: Bus>(bus: &B) -> Self {
        let record = regs::IQERCD.read(bus);
        // Zero is what units say that do not tell.
        let named = |sid: u64| (sid != 0).then_some(StreamId(sid as u32));
        Self {
            unanswered: named(record.read(IQERCD::ITESID)),
            unexpected: named(record.read(IQERCD::ICESID)),
        }
    }
}

impl<B: Bus> iommu::Commands for Commands<B> {
    #[inline(always)]
    fn submit(&mut self, invalidations: &[Invalidation]) -> Result<Ticket, Error> {
        match self.submit_block(invalidations) {
            Some(ticket) => Ok(ticket),
            None => self.submit_list(invalidations),
        }
    }

    fn queue_response(&mut self, response: PageResponse) -> Result<(), (PageResponse, Error)> {
        if let Err(error) = self.is_stopped() {
            return Err((response, error));
        }
        let Some(queue) = &mut self.queue else {
            return Err((response, Error::Unsupported { feature: "ECAP.QI (queued invalidation)" }));
        };
        let descriptor = Descriptor::page_group_response(&response);
        let kept = |queue: &_| Self::kept(&self.tickets, queue);
        match queue.append(&self.bus, &[descriptor], 0, kept) {
            Ok(_) => Ok(()),
            Err(error) => Err((response, error)),
        }
    }

    fn ring(&mut self) {
        if let Some(queue) = &mut self.queue {
            queue.ring(&self.bus);
        }
    }

    #[inline(always)]
    fn poll(&mut self, ticket: Ticket) -> Completion {
        self.settle();
        // The clock is for what is not done.
        if !self.tickets.pending().is_empty() {
            self.look_for_overdue();
        }
        self.tickets.completion(ticket)
    }

    fn recover(&mut self) -> Option<Failure> {
        if let Some(late) = self.overdue.take() {
            return Some(late);
        }
        self.queue.as_ref()?;
        if self.stopped {
            // Until the queue is off it may fail again.
            self.clear_errors();
            return None;
        }
        let status = regs::FSTS.read(&self.bus);
        if !status.any_matching_bits_set(FSTS::IQE::SET + FSTS::ITE::SET + FSTS::ICE::SET) {
            self.attempts.0 = 0;
            return None;
        }
        if status.get() == regs::GONE || self.is_hopeless() {
            return Some(self.stop());
        }
        let errors = IqErrors::read(&self.bus);
        if status.is_set(FSTS::ITE) {
            return self.resubmit_aborted(errors);
        }
        if status.is_set(FSTS::IQE) {
            return self.replace_refused();
        }
        regs::FSTS.clear(&self.bus, FSTS::ICE::SET);
        Some(Failure { cause: FailureCause::Unexpected, stream: errors.unexpected, ticket: None })
    }
}

/// The PASID under which the unit caches an attachment: accesses without one use entry 0 (`RID_PASID`).
pub(crate) fn number(attachment: Attachment) -> Pasid {
    attachment.pasid.unwrap_or(Pasid::from_low_bits(0))
}

/// Cuts a range into the fewest blocks, or returns `None` if there would be too many.
fn blocks(iova: Iova, pages: u64, limit: u8) -> Option<Blocks> {
    let blocks = Blocks { page: iova.0 / PAGE_SIZE, left: pages, limit };
    blocks.clone().nth(BLOCKS).is_none().then_some(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_cut_into_the_fewest_blocks() {
        let masks = |iova, pages| {
            blocks(Iova(iova), pages, 18)
                .map(|all| all.map(|b| (b.iova.0, b.mask)).collect::<std::vec::Vec<_>>())
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
