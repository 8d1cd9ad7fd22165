//! What the unit is told through the command queue: commands, in the order of their opcodes, and batches of them.
//!
//! The layouts are those of the SMMUv3 architecture specification (Arm IHI 0070), "Commands".

use crate::queue::CommandQueue;
use heapless::Vec;
use iommu::{
    Attachment, Bus, Completion, DomainId, Error, Failure, Field, Invalidation, Iova, Outcome, PAGE_SIZE,
    PageResponse, Pasid, Stages, StreamId, Ticket, Words, descriptor,
};

descriptor! {
    /// One entry of the command queue.
    pub struct Command([u64; 2]);
}

/// Pages that one command covers: `count` times 2^`scale`, and at least as many as were asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Range {
    count: u64,
    scale: u64,
}

impl Range {
    /// Returns the smallest range of `pages` pages or more, or `None` if no command can name one.
    fn covering(pages: u64) -> Option<Self> {
        let bits = u64::from(u64::BITS - pages.saturating_sub(1).leading_zeros());
        // NUM + 1 is at most 32.
        let scale = bits.saturating_sub(5);
        (scale <= 31).then(|| Self { count: pages.div_ceil(1 << scale).max(1), scale })
    }
}

impl Command {
    const OPCODE: Field<Self> = Field::bits(7, 0);
    const STREAM: Field<Self> = Field::bits(63, 32);
    const LEAF: Field<Self> = Field::bit(64);

    /// Forgets the configuration of one stream, context descriptors included; and unless `leaf`, the entry of the first
    /// level of the stream table that led to it (`CMD_CFGI_STE`).
    pub fn cfgi_ste(stream: StreamId, leaf: bool) -> Self {
        Self::default()
            .with(Self::OPCODE, 0x03)
            .with(Self::STREAM, stream.0.into())
            .with(Self::LEAF, leaf.into())
    }

    /// Forgets the configuration of all streams (`CMD_CFGI_ALL`).
    pub fn cfgi_all() -> Self {
        const RANGE: Field<Command> = Field::bits(68, 64);
        Self::default().with(Self::OPCODE, 0x04).with(RANGE, 31)
    }

    const VMID: Field<Self> = Field::bits(47, 32);
    const ASID: Field<Self> = Field::bits(63, 48);

    /// Forgets all stage 1 translations of a VMID, global ones included (`CMD_TLBI_NH_ALL`).
    pub fn tlbi_nh_all(vmid: u16) -> Self {
        Self::default().with(Self::OPCODE, 0x10).with(Self::VMID, vmid.into())
    }

    /// Forgets the stage 1 translation of one page (`CMD_TLBI_NH_VA`, leaf entries only).
    pub fn tlbi_nh_va(vmid: u16, asid: u16, iova: Iova) -> Self {
        Self::default()
            .with(Self::OPCODE, 0x12)
            .with(Self::VMID, vmid.into())
            .with(Self::ASID, asid.into())
            .leaf(iova)
    }

    /// Forgets all translations of a VMID (`CMD_TLBI_S12_VMALL`).
    pub fn tlbi_s12_vmall(vmid: u16) -> Self {
        Self::default().with(Self::OPCODE, 0x28).with(Self::VMID, vmid.into())
    }

    /// Forgets the stage 2 translation of one page (`CMD_TLBI_S2_IPA`, leaf entries only).
    pub fn tlbi_s2_ipa(vmid: u16, iova: Iova) -> Self {
        Self::default().with(Self::OPCODE, 0x2A).with(Self::VMID, vmid.into()).leaf(iova)
    }

    /// Forgets all translations that are neither Secure nor of the hypervisor's own streams (`CMD_TLBI_NSNH_ALL`).
    pub fn tlbi_nsnh_all() -> Self {
        Self::default().with(Self::OPCODE, 0x30)
    }

    fn leaf(self, iova: Iova) -> Self {
        const ADDRESS: Field<Command> = Field::bits(127, 76);
        self.with(Self::LEAF, 1).with_address(ADDRESS, iova.0)
    }

    /// Extends the invalidation of one page to several; needs `IDR3.RIL`. The level of the entries stays open (TTL = 0).
    fn over(self, range: Range) -> Self {
        const NUM: Field<Command> = Field::bits(16, 12);
        const SCALE: Field<Command> = Field::bits(24, 20);
        const GRANULE: Field<Command> = Field::bits(75, 74);
        if range == (Range { count: 1, scale: 0 }) {
            // A range of one page with an open level is not a legal one.
            return self;
        }
        self.with(NUM, range.count - 1).with(SCALE, range.scale).with(GRANULE, 1)
    }

    const SUBSTREAM_VALID: Field<Self> = Field::bit(11);
    const SUBSTREAM: Field<Self> = Field::bits(31, 12);

    /// Forgets, in the device, 2^`size` pages around `iova`; 52 is everything (`CMD_ATC_INV`, without PASID).
    pub fn atc_inv(stream: StreamId, iova: Iova, size: u8) -> Self {
        const SIZE: Field<Command> = Field::bits(69, 64);
        const ADDRESS: Field<Command> = Field::bits(127, 76);
        Self::default()
            .with(Self::OPCODE, 0x40)
            .with(Self::STREAM, stream.0.into())
            .with(SIZE, size.into())
            .with_address(ADDRESS, iova.0)
    }

    /// Answers a group of page requests (`CMD_PRI_RESP`).
    pub fn pri_resp(response: &PageResponse) -> Self {
        const GROUP: Field<Command> = Field::bits(72, 64);
        const CODE: Field<Command> = Field::bits(77, 76);
        let code = match response.outcome {
            Outcome::Failure => 0b00,
            Outcome::Invalid => 0b01,
            Outcome::Success => 0b10,
        };
        Self::default()
            .with(Self::OPCODE, 0x41)
            .with(Self::SUBSTREAM_VALID, response.tag.pasid.is_some().into())
            .with(Self::SUBSTREAM, response.tag.pasid.map_or(0, Pasid::value).into())
            .with(Self::STREAM, response.stream.0.into())
            .with(GROUP, u64::from(response.tag.index) & 0x1FF)
            .with(CODE, code)
    }

    /// Is consumed when everything before it has completed, and lets nothing start before (`CMD_SYNC`, no signal).
    pub fn sync() -> Self {
        Self::default().with(Self::OPCODE, 0x46)
    }
}

/// The size with which `CMD_ATC_INV` covers the whole address space.
const EVERYTHING: u8 = 52;

/// Returns log2 of the pages of the smallest aligned block that holds `pages` pages from `iova`.
fn block(iova: Iova, pages: u64) -> u8 {
    let first = iova.0 / PAGE_SIZE;
    let last = first.saturating_add(pages.saturating_sub(1));
    let size = u64::BITS - (first ^ last).leading_zeros();
    size.min(EVERYTHING.into()) as u8
}

/// Commands in one batch, at most; a batch that needs more is refused whole.
pub(crate) const BATCH: usize = 32;

/// Pages that a unit without ranges is told one by one; more invalidate the whole attachment.
const SINGLE_PAGES: u64 = 8;

/// What the commands of a unit depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    /// `IDR0.S2P`: stage 1 translations are cached under a VMID, too. Otherwise the field is reserved.
    pub(crate) vmid: bool,
    /// `IDR3.RIL`: pages can be invalidated by range.
    pub(crate) ranges: bool,
    /// The stream table has two levels: the first is forgotten along with what it leads to.
    pub(crate) two_levels: bool,
}

/// A list of commands that refuses rather than cuts off.
struct Batch(Vec<Command, BATCH>);

impl Batch {
    fn push(&mut self, command: Command) -> Result<(), Error> {
        self.0.push(command).map_err(|_| Error::Exhausted { what: "commands in a batch" })
    }
}

/// The command side of a unit; see [`iommu::Commands`].
///
/// Completion is where `CMDQ_CONS` stands: it passes a `CMD_SYNC` only when everything before that has completed. A command
/// that the unit refuses, or a device that does not answer, stops it there for good.
///
/// Worst case of a call: one read of `CMDQ_CONS`, `BATCH` commands stored and published, one write of `CMDQ_PROD`.
#[derive(Debug)]
pub struct Commands<B> {
    bus: B,
    queue: CommandQueue,
    abilities: Abilities,
    /// Entries kept free for answers to page requests.
    reserve: usize,
}

impl<B: Bus> Commands<B> {
    pub(crate) fn new(bus: B, queue: CommandQueue, abilities: Abilities, reserve: usize) -> Self {
        Self { bus, queue, abilities, reserve }
    }

    /// Encodes one invalidation.
    ///
    /// What a later step must not find stale is made certain by a `CMD_SYNC` before it: translations are fetched through
    /// the configuration, and what the device asks for anew comes from the unit's translations.
    fn encode(&self, batch: &mut Batch, invalidation: Invalidation) -> Result<(), Error> {
        match invalidation {
            Invalidation::All => {
                batch.push(Command::cfgi_all())?;
                batch.push(Command::sync())?;
                batch.push(Command::tlbi_nsnh_all())
            }
            Invalidation::Device { stream, device_tlb } => {
                batch.push(self.configuration(stream))?;
                if device_tlb {
                    batch.push(Command::sync())?;
                    batch.push(Command::atc_inv(stream, Iova(0), EVERYTHING))?;
                }
                Ok(())
            }
            Invalidation::Attachment(at) => {
                batch.push(self.configuration(at.stream))?;
                batch.push(Command::sync())?;
                self.forget_all(batch, at)
            }
            Invalidation::Pages { attachment: at, iova, pages } => {
                match Range::covering(pages) {
                    Some(range) if self.abilities.ranges => {
                        batch.push(self.page(at, iova).over(range))?;
                    }
                    _ if pages <= SINGLE_PAGES => {
                        for page in 0..pages {
                            let iova = Iova(iova.0.wrapping_add(page * PAGE_SIZE));
                            batch.push(self.page(at, iova))?;
                        }
                    }
                    _ => return self.forget_all(batch, at),
                }
                if at.device_tlb {
                    batch.push(Command::sync())?;
                    batch.push(Command::atc_inv(at.stream, iova, block(iova, pages)))?;
                }
                Ok(())
            }
            // There is no command for it. Page requests and the answer to CMD_ATC_INV are posted messages, which stay in
            // order on the link; so the CMD_SYNC after the device's own invalidation is what there is to wait for.
            Invalidation::PageRequestDrain => Ok(()),
            // The vocabulary may grow; what this driver does not know must not pass for done.
            _ => Err(Error::Unsupported { feature: "this invalidation" }),
        }
    }

    /// The configuration of a stream. An entry of the first level becomes valid once, so leaving it would do for all but
    /// the first time; but it costs the unit one word to read, and nobody has to know when the first time is.
    fn configuration(&self, stream: StreamId) -> Command {
        Command::cfgi_ste(stream, !self.abilities.two_levels)
    }

    fn vmid(&self, domain: DomainId) -> u16 {
        if self.abilities.vmid { crate::tables::vmid(domain) } else { 0 }
    }

    /// One page of an attachment, in the unit.
    fn page(&self, at: Attachment, iova: Iova) -> Command {
        let vmid = self.vmid(at.domain);
        if at.stages == Stages::First {
            Command::tlbi_nh_va(vmid, at.domain.0, iova)
        } else {
            Command::tlbi_s2_ipa(vmid, iova)
        }
    }

    /// All translations of an attachment: in the unit, then in the device.
    fn forget_all(&self, batch: &mut Batch, at: Attachment) -> Result<(), Error> {
        let vmid = self.vmid(at.domain);
        batch.push(if at.stages == Stages::First {
            // Not by ASID: that would keep entries that tables mark as global.
            Command::tlbi_nh_all(vmid)
        } else {
            Command::tlbi_s12_vmall(vmid)
        })?;
        if at.device_tlb {
            batch.push(Command::sync())?;
            batch.push(Command::atc_inv(at.stream, Iova(0), EVERYTHING))?;
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
        batch.push(Command::sync())?;
        self.queue.push(&self.bus, &batch.0, self.reserve).map(Ticket)
    }

    fn respond(&mut self, response: PageResponse) -> Result<(), (PageResponse, Error)> {
        let command = Command::pri_resp(&response);
        self.queue.push(&self.bus, &[command], 0).map(drop).map_err(|error| (response, error))
    }

    fn poll(&mut self, ticket: Ticket) -> Completion {
        if self.queue.consumed(&self.bus) >= ticket.0 { Completion::Done } else { Completion::Pending }
    }

    /// A queue that stopped stays stopped.
    fn recover(&mut self) -> Option<Failure> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::GroupTag;

    const SID: StreamId = StreamId(0x108);

    /// The commands of facts/smmuv3.md, section 11.5, rows K3, K5, K9, K11, K19, K20, K22 to K24, K27 to K29, K34.
    #[test]
    fn commands_are_the_words_of_the_manual() {
        let answer = |pasid, index, outcome| {
            let tag = GroupTag { pasid, index };
            Command::pri_resp(&PageResponse { stream: SID, tag, outcome })
        };
        for (command, words) in [
            (Command::cfgi_ste(SID, true), [0x0000_0108_0000_0003, 0x1]),
            (Command::cfgi_ste(SID, false), [0x0000_0108_0000_0003, 0]),
            (Command::cfgi_all(), [0x04, 0x1F]),
            (Command::tlbi_nh_all(0x2A), [0x0000_002A_0000_0010, 0]),
            (Command::tlbi_nh_va(0x2A, 7, Iova(0x4020_1000)), [0x0007_002A_0000_0012, 0x4020_1001]),
            (Command::tlbi_s12_vmall(0x2A), [0x0000_002A_0000_0028, 0]),
            (Command::tlbi_s2_ipa(0x2A, Iova(0x8020_0000)), [0x0000_002A_0000_002A, 0x8020_0001]),
            (Command::tlbi_nsnh_all(), [0x30, 0]),
            (Command::atc_inv(SID, Iova(0x1000_0000), 2), [0x0000_0108_0000_0040, 0x1000_0002]),
            (Command::atc_inv(SID, Iova(0), 52), [0x0000_0108_0000_0040, 0x34]),
            (answer(Pasid::new(5), 0x1A3, Outcome::Success), [0x0000_0108_0000_5841, 0x21A3]),
            (answer(None, 3, Outcome::Failure), [0x0000_0108_0000_0041, 0x0003]),
            (answer(None, 3, Outcome::Invalid), [0x0000_0108_0000_0041, 0x1003]),
            (Command::sync(), [0x46, 0]),
        ] {
            assert_eq!(command.0, words, "{command:#x?}");
        }
    }

    /// Rows K12, K13 and K21, but for TTL, which is left open here.
    #[test]
    fn a_range_is_told_by_granule_number_and_scale() {
        let over = |command: Command, count, scale| command.over(Range { count, scale }).0;
        let first_stage = Command::tlbi_nh_va(0x2A, 7, Iova(0x4020_0000));
        let second_stage = Command::tlbi_s2_ipa(0x2A, Iova(0x8000_0000));

        assert_eq!(over(first_stage, 1, 9), [0x0007_002A_0090_0012, 0x4020_0401]);
        assert_eq!(over(first_stage, 5, 0), [0x0007_002A_0000_4012, 0x4020_0401]);
        assert_eq!(over(second_stage, 1, 18), [0x0000_002A_0120_002A, 0x8000_0401]);
        assert_eq!(over(first_stage, 1, 0), first_stage.0, "one page needs no range");
    }

    #[test]
    fn a_range_covers_what_was_asked_for_and_little_more() {
        let covered = |pages| Range::covering(pages).map(|r| (r.count << r.scale, r.count));

        assert_eq!(covered(1), Some((1, 1)));
        assert_eq!(covered(32), Some((32, 32)));
        assert_eq!(covered(33), Some((34, 17)));
        assert_eq!(covered(1 << 36), Some((1 << 36, 32)));
        assert_eq!(covered((1 << 36) + 1), None);
        for pages in 1..5000 {
            let (all, count) = covered(pages).unwrap();
            assert!(all >= pages && all - pages <= pages / 16 && count <= 32, "{pages}: {all}");
        }
    }

    #[test]
    fn a_device_tlb_block_holds_the_whole_range() {
        assert_eq!(block(Iova(0x1000), 1), 0);
        assert_eq!(block(Iova(0x1000), 2), 2, "pages 1 and 2 share a block of four");
        assert_eq!(block(Iova(0x4000), 4), 2);
        assert_eq!(block(Iova(0), u64::MAX), EVERYTHING);
    }
}
