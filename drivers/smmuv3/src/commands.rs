//! What the unit is told through the command queue: commands, in the order of their opcodes, and batches of them.
//!
//! The layouts are those of the SMMUv3 architecture specification (Arm IHI 0070), "Commands".

use crate::{
    STALLING,
    queue::CommandQueue,
    regs::{self, CR0, ERRORS, GERROR, GONE, INDEX, LOSSES},
    stalls, tables,
};
use heapless::{Deque, Vec};
use iommu::{
    Attachment, Bus, Completion, Error, Failure, FailureCause, Field, Invalidation, Iova, Outcome, PAGE_SIZE,
    PageResponse, Pasid, PhysAddr, Stages, StreamId, Ticket, Words, descriptor,
};
use tock_registers::fields::FieldValue;

descriptor! {
    /// One entry of the command queue.
    pub struct Command([u64; 2]);
}

/// How much of the way to a page is forgotten with it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    /// Its leaf entry alone: that of a table changed, and nothing above.
    Leaf,
    /// Leaf and tables.
    Way,
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
    const ADDRESS: Field<Self> = Field::bits(127, 76);
    const SUBSTREAM_VALID: Field<Self> = Field::bit(11);
    const SUBSTREAM: Field<Self> = Field::bits(31, 12);

    /// Forgets the configuration of one stream, context descriptors included; and unless `leaf`, the entry of the first
    /// level of the stream table that led to it (`CMD_CFGI_STE`).
    pub fn cfgi_ste(stream: StreamId, leaf: bool) -> Self {
        Self::default()
            .with(Self::OPCODE, 0x03)
            .with(Self::STREAM, stream.0.into())
            .with(Self::LEAF, leaf.into())
    }

    /// Forgets one context descriptor of a stream, and how it was found (`CMD_CFGI_CD`, the way included).
    pub fn cfgi_cd(stream: StreamId, pasid: Pasid) -> Self {
        Self::default()
            .with(Self::OPCODE, 0x05)
            .with(Self::SUBSTREAM, pasid.value().into())
            .with(Self::STREAM, stream.0.into())
    }

    /// Forgets all context descriptors of a stream (`CMD_CFGI_CD_ALL`).
    pub fn cfgi_cd_all(stream: StreamId) -> Self {
        Self::default().with(Self::OPCODE, 0x06).with(Self::STREAM, stream.0.into())
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

    /// Forgets the stage 1 translations of an ASID, but for those that its tables call global (`CMD_TLBI_NH_ASID`).
    pub fn tlbi_nh_asid(vmid: u16, asid: u16) -> Self {
        Self::default().with(Self::OPCODE, 0x11).with(Self::VMID, vmid.into()).with(Self::ASID, asid.into())
    }

    /// Forgets the stage 1 translation of one page, by its ASID or global (`CMD_TLBI_NH_VA`); of its leaf, or also of the
    /// tables that lead there.
    pub fn tlbi_nh_va(vmid: u16, asid: u16, iova: Iova, part: Part) -> Self {
        Self::default()
            .with(Self::OPCODE, 0x12)
            .with(Self::VMID, vmid.into())
            .with(Self::ASID, asid.into())
            .page(iova, part)
    }

    /// The same, whatever its ASID (`CMD_TLBI_NH_VAA`).
    pub fn tlbi_nh_vaa(vmid: u16, iova: Iova, part: Part) -> Self {
        Self::default().with(Self::OPCODE, 0x13).with(Self::VMID, vmid.into()).page(iova, part)
    }

    /// Forgets all translations of a VMID (`CMD_TLBI_S12_VMALL`).
    pub fn tlbi_s12_vmall(vmid: u16) -> Self {
        Self::default().with(Self::OPCODE, 0x28).with(Self::VMID, vmid.into())
    }

    /// Forgets the stage 2 translation of one page (`CMD_TLBI_S2_IPA`, leaf entries only).
    ///
    /// Address bits from 56 on are reserved, and no second stage has a page there.
    pub fn tlbi_s2_ipa(vmid: u16, iova: Iova) -> Self {
        const ADDRESS: Field<Command> = Field::bits(119, 76);
        Self::default()
            .with(Self::OPCODE, 0x2A)
            .with(Self::VMID, vmid.into())
            .with(Self::LEAF, 1)
            .with_address(ADDRESS, iova.0)
    }

    /// Forgets all translations that are neither Secure nor of the hypervisor's own streams (`CMD_TLBI_NSNH_ALL`).
    pub fn tlbi_nsnh_all() -> Self {
        Self::default().with(Self::OPCODE, 0x30)
    }

    fn page(self, iova: Iova, part: Part) -> Self {
        self.with(Self::LEAF, (part == Part::Leaf).into()).with_address(Self::ADDRESS, iova.0)
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

    /// Forgets, in the device, 2^`size` pages around `iova`; 52 is everything (`CMD_ATC_INV`). Without PASID it forgets what
    /// it has for any PASID, too.
    pub fn atc_inv(stream: StreamId, pasid: Option<Pasid>, iova: Iova, size: u8) -> Self {
        const SIZE: Field<Command> = Field::bits(69, 64);
        Self::default()
            .with(Self::OPCODE, 0x40)
            .with(Self::SUBSTREAM_VALID, pasid.is_some().into())
            .with(Self::SUBSTREAM, pasid.map_or(0, Pasid::value).into())
            .with(Self::STREAM, stream.0.into())
            .with(SIZE, size.into())
            .with_address(Self::ADDRESS, iova.0)
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

    /// Ends a stalled access, or has it tried again (`CMD_RESUME`).
    ///
    /// `Invalid` aborts it; `Failure` completes it without effect, where the unit can (`IDR0.TERM_MODEL`).
    pub fn resume(response: &PageResponse) -> Self {
        const RETRY: Field<Command> = Field::bit(12);
        const ABORT: Field<Command> = Field::bit(13);
        const TAG: Field<Command> = Field::bits(79, 64);
        Self::default()
            .with(Self::OPCODE, 0x44)
            .with(RETRY, (response.outcome == Outcome::Success).into())
            .with(ABORT, (response.outcome == Outcome::Invalid).into())
            .with(Self::STREAM, response.stream.0.into())
            .with(TAG, response.tag.index.into())
    }

    /// Aborts all stalled accesses of a stream, of which the unit lets nothing new through (`CMD_STALL_TERM`).
    pub fn stall_term(stream: StreamId) -> Self {
        Self::default().with(Self::OPCODE, 0x45).with(Self::STREAM, stream.0.into())
    }

    /// Returns whose configuration, device TLB or access it is about.
    fn stream(&self) -> Option<StreamId> {
        let of_one = matches!(self.get(Self::OPCODE), 0x03 | 0x05 | 0x06 | 0x40 | 0x41 | 0x44 | 0x45);
        of_one.then(|| StreamId(self.get(Self::STREAM) as u32))
    }

    /// Whether it asks a device to forget something.
    fn is_atc_inv(&self) -> bool {
        self.get(Self::OPCODE) == 0x40
    }

    fn is_sync(&self) -> bool {
        self.get(Self::OPCODE) == 0x46
    }

    const SIGNAL: Field<Self> = Field::bits(13, 12);

    /// Is consumed when everything before it has completed, and lets nothing start before (`CMD_SYNC`, no signal).
    pub fn sync() -> Self {
        Self::default().with(Self::OPCODE, 0x46)
    }

    /// The same, and then sends an event to the cores that wait for one, as the instruction `SEV` does (`CMD_SYNC`,
    /// CS = SIG_SEV). Needs `IDR0.SEV`; else it sends nothing.
    pub fn sync_with_event() -> Self {
        Self::sync().with(Self::SIGNAL, 2)
    }

    /// As [`sync`](Self::sync), and then writes `data` to `address` (`CMD_SYNC`, CS = SIG_IRQ), a multiple of 4 below 2^56: memory that is
    /// inner shareable and cached, as the CPU has it. The wire for it, where a part has one, is pulsed as well.
    pub fn sync_with_message(address: PhysAddr, data: u32) -> Self {
        const SHAREABILITY: Field<Command> = Field::bits(23, 22);
        const ATTRIBUTES: Field<Command> = Field::bits(27, 24);
        const DATA: Field<Command> = Field::bits(63, 32);
        const ADDRESS: Field<Command> = Field::bits(119, 66);
        Self::sync()
            .with(Self::SIGNAL, 1)
            .with(SHAREABILITY, 3)
            .with(ATTRIBUTES, 0xF)
            .with(DATA, data.into())
            .with_address(ADDRESS, address.0)
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

/// Batches on their way at one time, at most.
const TICKETS: usize = 256;
/// Tickets that failed and are known one by one, at most.
const FAILED: usize = 32;

/// What the commands of a unit depend on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    /// `IDR0.S2P`: stage 1 translations are cached under a VMID, too. Otherwise the field is reserved.
    pub(crate) vmid: bool,
    /// `IDR3.RIL`: pages can be invalidated by range.
    pub(crate) ranges: bool,
    /// The stream table has two levels: the first is forgotten along with what it leads to.
    pub(crate) two_levels: bool,
    /// `IDR0.PRI`: devices may ask for pages.
    pub(crate) page_requests: bool,
    /// `IDR0.STALL_MODEL`: faults may stall.
    pub(crate) stalls: bool,
}

/// A list of commands that refuses rather than cuts off.
struct Batch {
    commands: Vec<Command, BATCH>,
    /// Whose device TLB is to forget something.
    device: Option<StreamId>,
}

impl Batch {
    fn new() -> Self {
        Self { commands: Vec::new(), device: None }
    }

    fn push(&mut self, command: Command) -> Result<(), Error> {
        self.commands.push(command).map_err(|_| Error::Exhausted { what: "commands in a batch" })
    }

    /// Everything before completes before anything after begins.
    fn then(&mut self) -> Result<(), Error> {
        match self.commands.last() {
            Some(last) if !last.is_sync() => self.push(Command::sync()),
            _ => Ok(()),
        }
    }

    /// What a device is to forget, once the unit has.
    fn push_to_device(
        &mut self,
        stream: StreamId,
        pasid: Option<Pasid>,
        iova: Iova,
        size: u8,
    ) -> Result<(), Error> {
        if self.device.is_some_and(|other| other != stream) {
            // A `CMD_SYNC` that fails does not say whose answer is missing.
            return Err(Error::Exhausted { what: "devices asked in a batch" });
        }
        self.then()?;
        self.device = Some(stream);
        self.push(Command::atc_inv(stream, pasid, iova, size))
    }
}

/// What may be on its way once at a time.
const DEVICE_TLB: &str = "invalidation of a device TLB";

/// A batch that the unit has not done yet, in one word: there are many.
#[derive(Clone, Copy, Debug)]
struct Underway(u64);

impl Underway {
    /// Bits for the commands in it.
    const LENGTH: u32 = 6;

    /// A batch of `length` commands, after which `end` commands were queued; of some `device` is to forget something.
    fn new(end: u64, length: usize, device: bool) -> Self {
        Self(end << (Self::LENGTH + 1) | (length as u64) << 1 | u64::from(device))
    }

    /// Returns its ticket.
    fn end(self) -> u64 {
        self.0 >> (Self::LENGTH + 1)
    }

    /// Returns how many commands were queued before it.
    fn start(self) -> u64 {
        self.end() - (self.0 >> 1 & ((1 << Self::LENGTH) - 1))
    }

    /// Whether a device is to forget something.
    fn asks_a_device(&self) -> bool {
        self.0 & 1 != 0
    }
}

const _: () = assert!(BATCH < 1 << Underway::LENGTH, "the length of a batch fits");

/// Tickets that failed: the newest by themselves, and all up to one that is older.
///
/// To call a ticket failed that was done is harmless: its commands are submitted again.
#[derive(Debug)]
struct Failures {
    /// In their order.
    known: Deque<u64, FAILED>,
    /// The newest of all: what is newer has not failed.
    newest: u64,
    /// Tickets up to this one may have failed.
    before: u64,
}

impl Failures {
    const fn new() -> Self {
        Self { known: Deque::new(), newest: 0, before: 0 }
    }

    fn add(&mut self, ticket: u64) {
        if self.known.back() == Some(&ticket) {
            return;
        }
        if self.known.is_full() {
            self.before = self.known.pop_front().unwrap_or(ticket);
        }
        // There is room: the oldest went.
        let _ = self.known.push_back(ticket);
        self.newest = self.newest.max(ticket);
    }

    fn contain(&self, ticket: u64) -> bool {
        ticket <= self.newest && (ticket <= self.before || self.known.iter().any(|&failed| failed == ticket))
    }
}

/// The command side of a unit; see [`iommu::Commands`].
///
/// Completion is a `CMD_SYNC` that was consumed: that happens only when everything before it has completed. Where the unit's
/// messages reach memory, the last one of a batch writes how far the queue has come to a word there, and `poll` looks at that;
/// else, and when a message is late, at `CMDQ_CONS`. After a message that was lost there are no more.
///
/// Where there are no messages, and the unit [wakes](crate::Found::wakes) cores, the end of each batch sends an event: one who
/// waits for a ticket may sleep between looks (`WFE`), after a look that found it pending. The event may come before it sleeps,
/// which then ends at once; or for somebody else's ticket. None comes of a queue that is stopped, nor when room is made in one
/// that was full. So no such sleep may be without an end of its own, as that by the event stream of the generic timer.
///
/// A command that the unit refuses, or a device that does not answer, stops the queue there, until
/// [`recover`](iommu::Commands::recover).
///
/// As a `CMD_SYNC` that fails does not tell which device was silent, one device at a time is asked to forget something:
/// `submit` refuses a batch that asks two ([`Error::Exhausted`]), and one that asks while another is on its way
/// ([`Error::Busy`]), until that has answered or was given up.
///
/// It alone writes `GERRORN`: errors are acknowledged by `recover`, those that lose reports by
/// [`told`](iommu::Commands::told), and by nobody else. In service it alone writes `CR0`.
///
/// Worst case of a call: two reads of `CMDQ_CONS`, `BATCH` commands stored and published, one write of `CMDQ_PROD`; of
/// `recover` five reads of registers, a look at `BATCH` commands, one of them stored, and two writes of registers.
#[derive(Debug)]
pub struct Commands<B> {
    bus: B,
    queue: CommandQueue,
    abilities: Abilities,
    /// Entries kept free for answers to page requests.
    reserve: usize,
    /// Devices whose faults stall.
    stalling: Vec<StreamId, STALLING>,
    /// Batches that may not be done, oldest first.
    underway: Deque<Underway, TICKETS>,
    /// A ticket that was done, as `CMDQ_CONS` said, before its message came.
    untold: Option<u64>,
    failures: Failures,
    /// Where the queue last had to be helped on, and since when.
    helped: Option<(u64, u64)>,
    /// Nothing more is executed.
    stopped: bool,
}

impl<B: Bus> Commands<B> {
    pub(crate) fn new(
        bus: B,
        queue: CommandQueue,
        abilities: Abilities,
        reserve: usize,
        stalling: Vec<StreamId, STALLING>,
    ) -> Self {
        Self {
            bus,
            queue,
            abilities,
            reserve,
            stalling,
            underway: Deque::new(),
            untold: None,
            failures: Failures::new(),
            helped: None,
            stopped: false,
        }
    }

    /// Returns how the unit is reached.
    pub(crate) fn bus(&self) -> &B {
        &self.bus
    }

    /// Encodes one invalidation.
    ///
    /// What a later step must not find stale is made certain by a `CMD_SYNC` before it: translations are fetched through
    /// the configuration, and what the device asks for anew comes from the unit's translations.
    fn encode(&self, batch: &mut Batch, invalidation: &Invalidation) -> Result<(), Error> {
        match *invalidation {
            Invalidation::All => {
                batch.push(Command::cfgi_all())?;
                batch.push(Command::sync())?;
                batch.push(Command::tlbi_nsnh_all())
            }
            Invalidation::Device { stream, device_tlb } => {
                batch.push(self.configuration(stream))?;
                if device_tlb {
                    batch.push_to_device(stream, None, Iova(0), EVERYTHING)?;
                }
                Ok(())
            }
            Invalidation::Attachment(at) => {
                batch.push(match at.pasid {
                    // The stream's entry leads to those of its other PASIDs as well.
                    Some(pasid) if at.stages != Stages::Nested => Command::cfgi_cd(at.stream, pasid),
                    _ => self.configuration(at.stream),
                })?;
                batch.push(Command::sync())?;
                self.forget_all(batch, at)
            }
            Invalidation::Pages { attachment: at, iova, pages } => self.pages(batch, at, iova, pages),
            Invalidation::FirstStage { attachment: at, asid, pages } => {
                self.nested(at)?;
                let (vmid, _) = self.tags(at);
                match pages {
                    // A guest's pages may have any size, so none is named (TG): its ranges are told page by page.
                    Some((iova, pages)) if pages <= SINGLE_PAGES => {
                        for iova in each(iova, pages) {
                            batch.push(match asid {
                                Some(asid) => Command::tlbi_nh_va(vmid, asid, iova, Part::Way),
                                None => Command::tlbi_nh_vaa(vmid, iova, Part::Way),
                            })?;
                        }
                        Ok(())
                    }
                    // Of pages that are too many, it may be global entries that changed: those stay when it is by ASID.
                    Some(_) => batch.push(Command::tlbi_nh_all(vmid)),
                    None => batch.push(
                        asid.map_or(Command::tlbi_nh_all(vmid), |asid| Command::tlbi_nh_asid(vmid, asid)),
                    ),
                }
            }
            Invalidation::Contexts { attachment: at, pasid } => {
                self.nested(at)?;
                batch.push(match pasid {
                    Some(pasid) => Command::cfgi_cd(at.stream, pasid),
                    None => Command::cfgi_cd_all(at.stream),
                })
            }
            Invalidation::DeviceTlb { attachment: at, pasid, pages } => {
                if !at.device_tlb {
                    return Err(Error::Unsupported { feature: "a device TLB of this attachment" });
                }
                let (iova, size) =
                    pages.map_or((Iova(0), EVERYTHING), |(iova, pages)| (iova, block(iova, pages)));
                batch.push_to_device(at.stream, pasid, iova, size)
            }
            // There is no command for it. Page requests and the answer to CMD_ATC_INV are posted messages, which stay in
            // order on the link; so the CMD_SYNC after the device's own invalidation is what there is to wait for. And a
            // CMD_SYNC makes visible what stalled before.
            Invalidation::PageRequestDrain => Ok(()),
            Invalidation::Stalls { stream } => {
                if !self.stalling.contains(&stream) {
                    return Ok(());
                }
                // What would stall from here on is refused: the configuration that says so is known to the unit.
                batch.then()?;
                batch.push(Command::stall_term(stream))
            }
            // The vocabulary may grow; what this driver does not know must not pass for done.
            _ => Err(Error::Unsupported { feature: "this invalidation" }),
        }
    }

    /// Pages of an attachment whose leaves changed.
    fn pages(&self, batch: &mut Batch, at: Attachment, iova: Iova, pages: u64) -> Result<(), Error> {
        match Range::covering(pages) {
            Some(range) if self.abilities.ranges => batch.push(self.page(at, iova).over(range))?,
            _ if pages <= SINGLE_PAGES => {
                for iova in each(iova, pages) {
                    batch.push(self.page(at, iova))?;
                }
            }
            _ => return self.forget_all(batch, at),
        }
        if at.stages == Stages::Nested {
            // What came of both stages together is cached by the first's addresses, in unit and device.
            batch.then()?;
            batch.push(Command::tlbi_nh_all(self.tags(at).0))?;
            return self.forget_in_device(batch, at);
        }
        if at.device_tlb {
            batch.push_to_device(at.stream, at.pasid, iova, block(iova, pages))?;
        }
        Ok(())
    }

    /// The configuration of a stream. An entry of the first level becomes valid once, so leaving it would do for all but
    /// the first time; but it costs the unit one word to read, and nobody has to know when the first time is.
    fn configuration(&self, stream: StreamId) -> Command {
        Command::cfgi_ste(stream, !self.abilities.two_levels)
    }

    /// Checks that a guest owns the first stage of an attachment.
    fn nested(&self, at: Attachment) -> Result<(), Error> {
        match at.stages {
            Stages::Nested => Ok(()),
            _ => Err(Error::Unsupported { feature: "a guest's first stage of this attachment" }),
        }
    }

    /// Returns VMID and ASID under which the translations of an attachment are cached.
    fn tags(&self, at: Attachment) -> (u16, u16) {
        let vmid = if self.abilities.vmid { tables::vmid(at.domain) } else { 0 };
        (vmid, at.domain.0)
    }

    /// One page of an attachment, in the unit.
    fn page(&self, at: Attachment, iova: Iova) -> Command {
        let (vmid, asid) = self.tags(at);
        if at.stages == Stages::First {
            Command::tlbi_nh_va(vmid, asid, iova, Part::Leaf)
        } else {
            Command::tlbi_s2_ipa(vmid, iova)
        }
    }

    /// All translations of an attachment: in the unit, then in the device.
    fn forget_all(&self, batch: &mut Batch, at: Attachment) -> Result<(), Error> {
        let (vmid, asid) = self.tags(at);
        match (at.stages, at.pasid) {
            // Nothing of it is cached as translations of tables.
            (Stages::None, _) => {}
            // Tables of a PASID have no global entries: those would serve the device's other PASIDs, too.
            (Stages::First, Some(_)) => batch.push(Command::tlbi_nh_asid(vmid, asid))?,
            // Not by ASID: that would keep entries that tables mark as global.
            (Stages::First, None) => batch.push(Command::tlbi_nh_all(vmid))?,
            (Stages::Second | Stages::Nested, _) => batch.push(Command::tlbi_s12_vmall(vmid))?,
        }
        self.forget_in_device(batch, at)
    }

    /// All that the device remembers of an attachment.
    fn forget_in_device(&self, batch: &mut Batch, at: Attachment) -> Result<(), Error> {
        if at.device_tlb { batch.push_to_device(at.stream, at.pasid, Iova(0), EVERYTHING) } else { Ok(()) }
    }

    /// Has no more messages sent: that the next ticket is done is certain when the last of them has come.
    pub(crate) fn without_messages(&mut self) {
        self.queue.without_messages();
    }

    /// Queues what most invalidations are: pages that one command names, of an attachment without a device TLB, for a queue
    /// with room. `None` if anything is unusual; then nothing was done.
    #[inline(always)]
    fn submit_range(&mut self, invalidations: &[Invalidation]) -> Option<Ticket> {
        let [Invalidation::Pages { attachment: at, iova, pages }] = *invalidations else { return None };
        if at.device_tlb || at.stages == Stages::Nested || self.stopped || self.underway.is_full() {
            return None;
        }
        let page = self.page(at, iova);
        let command = match pages {
            1 => page,
            _ if self.abilities.ranges => page.over(Range::covering(pages)?),
            _ => return None,
        };
        if !self.queue.has_room_in_row(2, self.reserve) {
            return None;
        }
        let sync = self.queue.end(self.queue.produced() + 2);
        let end = self.queue.push_row(&self.bus, [command, sync]);
        // There is room.
        let _ = self.underway.push_back(Underway::new(end, 2, false));
        Some(Ticket(end))
    }

    /// Queues any invalidations, or none of them.
    #[inline(never)]
    fn submit_list(&mut self, invalidations: &[Invalidation]) -> Result<Ticket, Error> {
        let mut batch = Batch::new();
        for invalidation in invalidations {
            self.encode(&mut batch, invalidation)?;
        }
        let needed = batch.commands.len() + 1;
        batch.push(self.queue.end(self.queue.produced() + needed as u64))?;
        if self.stopped {
            return Err(Error::Failed { ticket: Ticket(self.queue.produced()) });
        }
        let device = batch.device.is_some();
        if self.underway.is_full() || device && self.underway.iter().any(Underway::asks_a_device) {
            self.consumed();
        }
        if device && self.underway.iter().any(Underway::asks_a_device) {
            return Err(Error::Busy { what: DEVICE_TLB });
        }
        if self.underway.is_full() {
            return Err(Error::QueueFull { needed, free: 0 });
        }
        let end = self.queue.push(&self.bus, &batch.commands, self.reserve)?;
        // There is room.
        let _ = self.underway.push_back(Underway::new(end, needed, device));
        Ok(Ticket(end))
    }

    /// Returns how many commands the unit has consumed, and forgets the batches that are done.
    #[inline(always)]
    fn consumed(&mut self) -> u64 {
        if self.queue.told().is_some() {
            return self.consumed_by_messages();
        }
        let consumed = self.queue.read_consumed(&self.bus);
        if consumed == self.queue.produced() {
            self.underway.clear();
        } else {
            self.forget_done(consumed);
        }
        consumed
    }

    #[inline(never)]
    fn consumed_by_messages(&mut self) -> u64 {
        let due = self.underway.back().map_or(0, |batch| batch.end());
        let consumed = self.queue.consumed(&self.bus, due);
        self.forget_done(consumed);
        consumed
    }

    /// Forgets the batches that are done, and notes whose message has not come.
    #[inline(never)]
    fn forget_done(&mut self, consumed: u64) {
        while let Some(batch) = self.underway.front().filter(|batch| batch.end() <= consumed) {
            let ticket = batch.end();
            self.underway.pop_front();
            let Some(told) = self.queue.told() else { continue };
            if self.untold.is_some_and(|late| told < late) {
                // A `CMD_SYNC` has completed the message of the one before. So that was lost, and others may be.
                self.queue.without_messages();
            }
            self.untold = Some(ticket).filter(|&ticket| told < ticket);
        }
    }

    /// Acknowledges `errors`, which are active. ORDER: after the command that took the place of a bad one.
    fn acknowledge(&self, kept: u32, errors: u32) {
        // Only bits that are active may turn.
        if errors != 0 {
            regs::GERRORN.set(&self.bus, kept ^ errors);
        }
    }

    /// What becomes of a queue that cannot go on: it is switched off, so that no error of it comes again.
    fn stop(&mut self) -> Failure {
        self.stopped = true;
        self.queue.without_messages();
        let kept = regs::CR0.read(&self.bus).get();
        regs::CR0.set(&self.bus, kept & !CR0::CMDQEN::SET.value);
        Failure { cause: FailureCause::Stopped, stream: None, ticket: None }
    }

    /// Helps the queue past the command at which it stopped; returns what was wrong with that, unless it was told before.
    fn help(&mut self, code: u32) -> Option<Failure> {
        let at = self.queue.read_consumed(&self.bus);
        let now_us = self.bus.now_us();
        let since_us = self.helped.filter(|&(place, _)| place == at).map(|(_, since_us)| since_us);
        self.helped = Some((at, since_us.unwrap_or(now_us)));
        let Some(command) = self.queue.command(at) else { return Some(self.stop()) };
        let batch = self.underway.iter().find(|batch| at < batch.end());
        let ticket = batch.filter(|batch| batch.start() <= at).map(|batch| batch.end());
        let (cause, stream) = match (code, since_us) {
            (ILLEGAL, None) => (FailureCause::Refused, command.stream()),
            (SILENT_DEVICE, None) => (FailureCause::Unanswered, self.silent(at)),
            // The manual does not say that a `CMD_SYNC` is consumed when it is tried again: that may fail as long as the device
            // is silent, and each command to it may have its own turn to be too late. It is the same device, which was named.
            (SILENT_DEVICE, Some(since_us)) if now_us.saturating_sub(since_us) < RETRY_LIMIT_US => {
                return None;
            }
            // What took the place of the command is refused as well; or a device is silent for longer than any may be;
            // CERROR_ABT; nothing that the manual knows.
            _ => return Some(self.stop()),
        };
        if let Some(ticket) = ticket {
            self.failures.add(ticket);
        }
        if code == ILLEGAL {
            // Without a message, even in place of one that had one: it is failed, and the next message is past it.
            self.queue.replace(&self.bus, at, self.queue.nothing());
        }
        Some(Failure { cause, stream, ticket: ticket.map(Ticket) })
    }

    /// Returns the device that is asked to forget something before the `CMD_SYNC` at `at`, and after the one before that.
    fn silent(&self, at: u64) -> Option<StreamId> {
        let before = (1..=BATCH as u64).filter_map(|back| self.queue.command(at.checked_sub(back)?));
        let asked = before.take_while(|command| !command.is_sync()).find(Command::is_atc_inv);
        asked.and_then(|command| command.stream())
    }
}

/// How long the unit may say of one `CMD_SYNC` that a device is silent, in microseconds, before it is taken for stopped.
///
/// PCI Express, "Address Translation Services", gives a device one minute to answer an invalidation, and half as much more.
pub const RETRY_LIMIT_US: u64 = 90_000_000;

/// `CMDQ_CONS.ERR`: the command is not legal (`CERROR_ILL`).
const ILLEGAL: u32 = 1;
/// A device did not answer before the `CMD_SYNC` (`CERROR_ATC_INV_SYNC`).
const SILENT_DEVICE: u32 = 3;

/// Returns the first bytes of `pages` pages from `iova`.
fn each(iova: Iova, pages: u64) -> impl Iterator<Item = Iova> {
    (0..pages).map(move |page| Iova(iova.0.wrapping_add(page * PAGE_SIZE)))
}

impl<B: Bus> iommu::Commands for Commands<B> {
    /// Of device TLBs, one device's at a time: [`Error::Busy`] until the one before has answered.
    #[inline(always)]
    fn submit(&mut self, invalidations: &[Invalidation]) -> Result<Ticket, Error> {
        match self.submit_range(invalidations) {
            Some(ticket) => Ok(ticket),
            None => self.submit_list(invalidations),
        }
    }

    fn queue_response(&mut self, response: PageResponse) -> Result<(), (PageResponse, Error)> {
        let Abilities { page_requests, stalls, .. } = self.abilities;
        let command = match stalls::waiting(&response, &self.stalling) {
            Some(stalled) if stalls => Command::resume(&stalled),
            None if page_requests => Command::pri_resp(&response),
            _ => return Err((response, Error::Unsupported { feature: "answers of this kind" })),
        };
        if self.stopped {
            return Err((response, Error::Failed { ticket: Ticket(self.queue.produced()) }));
        }
        self.queue.append(&self.bus, &[command], 0).map(drop).map_err(|error| (response, error))
    }

    fn ring(&mut self) {
        self.queue.ring(&self.bus);
    }

    #[inline(always)]
    fn poll(&mut self, ticket: Ticket) -> Completion {
        let done = self.consumed() >= ticket.0;
        if self.failures.contain(ticket.0) || self.stopped && !done {
            Completion::Failed
        } else if done {
            Completion::Done
        } else {
            Completion::Pending
        }
    }

    /// A command that the unit refuses is replaced by one that does nothing, a device that did not answer is named once, and
    /// the queue goes on: what is behind is executed, answers included. A unit that cannot read its queue, that is in service
    /// failure mode or gone, or waits for a device for longer than one may take ([`RETRY_LIMIT_US`]), is told of once, and
    /// refuses everything from then on.
    ///
    /// Acknowledges all other errors, too, but for those that lose reports: who calls may not have looked for them yet.
    fn recover(&mut self) -> Option<Failure> {
        let kept = regs::GERRORN.read(&self.bus).get();
        let now = regs::GERROR.read(&self.bus).get();
        let active = (now ^ kept) & ERRORS;
        let is = |error: FieldValue<u32, GERROR::Register>| active & error.value != 0;
        let mut failure = None;
        if !self.stopped && (now == GONE || is(GERROR::SFM_ERR::SET)) {
            failure = Some(self.stop());
        } else if !self.stopped && is(GERROR::CMDQ_ERR::SET) {
            // While the error is active, this says which; and the unit consumes nothing.
            let code = regs::CMDQ.cons.read(&self.bus).read(INDEX::ERR);
            failure = self.help(code);
        }
        if is(GERROR::MSI_CMDQ_ABT_ERR::SET) {
            self.queue.without_messages();
        }
        self.acknowledge(kept, active & !LOSSES);
        failure
    }

    fn told(&mut self, status: u32) {
        let kept = regs::GERRORN.read(&self.bus).get();
        let active = regs::GERROR.read(&self.bus).get() ^ kept;
        self.acknowledge(kept, active & status & LOSSES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::GroupTag;

    const SID: StreamId = StreamId(0x108);

    /// The commands of facts/smmuv3.md, section 11.5, rows K3, K5 to K7, K9 to K11, K14, K19, K20, K22 to K25, K27 to K34, K37; but for
    /// K6, whose way is forgotten here, too.
    #[test]
    fn commands_are_the_words_of_the_manual() {
        let answer = |pasid, index, outcome| {
            let tag = GroupTag { pasid, index };
            Command::pri_resp(&PageResponse { stream: SID, tag, outcome })
        };
        let stall = |outcome| {
            let tag = GroupTag { pasid: None, index: 0x42 };
            Command::resume(&PageResponse { stream: SID, tag, outcome })
        };
        for (command, words) in [
            (Command::cfgi_ste(SID, true), [0x0000_0108_0000_0003, 0x1]),
            (Command::cfgi_ste(SID, false), [0x0000_0108_0000_0003, 0]),
            (Command::cfgi_all(), [0x04, 0x1F]),
            (Command::tlbi_nh_all(0x2A), [0x0000_002A_0000_0010, 0]),
            (
                Command::tlbi_nh_va(0x2A, 7, Iova(0x4020_1000), Part::Leaf),
                [0x0007_002A_0000_0012, 0x4020_1001],
            ),
            (Command::cfgi_cd(SID, Pasid::from_low_bits(5)), [0x0000_0108_0000_5005, 0]),
            (Command::cfgi_cd_all(SID), [0x0000_0108_0000_0006, 0]),
            (Command::tlbi_nh_asid(0x2A, 7), [0x0007_002A_0000_0011, 0]),
            (
                Command::tlbi_nh_vaa(0x2A, Iova(0xFFFF_0000_1234_5000), Part::Way),
                [0x0000_002A_0000_0013, 0xFFFF_0000_1234_5000],
            ),
            (
                Command::atc_inv(SID, Pasid::new(5), Iova(0x2000_0000), 9),
                [0x0000_0108_0000_5840, 0x2000_0009],
            ),
            (stall(Outcome::Success), [0x0000_0108_0000_1044, 0x42]),
            (stall(Outcome::Invalid), [0x0000_0108_0000_2044, 0x42]),
            (stall(Outcome::Failure), [0x0000_0108_0000_0044, 0x42]),
            (Command::stall_term(SID), [0x0000_0108_0000_0045, 0]),
            (Command::tlbi_s12_vmall(0x2A), [0x0000_002A_0000_0028, 0]),
            (Command::tlbi_s2_ipa(0x2A, Iova(0x8020_0000)), [0x0000_002A_0000_002A, 0x8020_0001]),
            (Command::tlbi_nsnh_all(), [0x30, 0]),
            (Command::atc_inv(SID, None, Iova(0x1000_0000), 2), [0x0000_0108_0000_0040, 0x1000_0002]),
            (Command::atc_inv(SID, None, Iova(0), 52), [0x0000_0108_0000_0040, 0x34]),
            (answer(Pasid::new(5), 0x1A3, Outcome::Success), [0x0000_0108_0000_5841, 0x21A3]),
            (answer(None, 3, Outcome::Failure), [0x0000_0108_0000_0041, 0x0003]),
            (answer(None, 3, Outcome::Invalid), [0x0000_0108_0000_0041, 0x1003]),
            (Command::sync(), [0x46, 0]),
            // CS [13:12] is 2; what is about messages stays 0, which K36 has not.
            (Command::sync_with_event(), [0x2046, 0]),
            (
                Command::sync_with_message(PhysAddr(0x8010_3F40), 0xCAFE),
                [0x0000_CAFE_0FC0_1046, 0x0000_0000_8010_3F40],
            ),
        ] {
            assert_eq!(command.0, words, "{command:#x?}");
        }
    }

    /// Rows K12, K13 and K21, but for TTL, which is left open here.
    #[test]
    fn a_range_is_told_by_granule_number_and_scale() {
        let over = |command: Command, count, scale| command.over(Range { count, scale }).0;
        let first_stage = Command::tlbi_nh_va(0x2A, 7, Iova(0x4020_0000), Part::Leaf);
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
