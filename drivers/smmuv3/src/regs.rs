//! Registers of a unit, in the order of the manual's register map: page 0, then page 1.

use crate::interrupts::MessageRegisters;
use core::fmt;
use iommu::{Ro, Rw};
use tock_registers::register_bitfields;

register_bitfields![u32,
    /// Identification Register 0.
    pub(crate) IDR0 [
        /// Stage 2 is there.
        S2P OFFSET(0) NUMBITS(1) [],
        /// Stage 1 is there.
        S1P OFFSET(1) NUMBITS(1) [],
        /// VMSAv8-64 tables are there: the upper bit of TTF.
        TTF_AARCH64 OFFSET(3) NUMBITS(1) [],
        /// Accesses of the unit itself are coherent.
        COHACC OFFSET(4) NUMBITS(1) [],
        /// Receives the CPU's broadcast TLB maintenance.
        BTM OFFSET(5) NUMBITS(1) [],
        /// Device TLBs (ATS).
        ATS OFFSET(10) NUMBITS(1) [],
        /// ASIDs have 16 bits, not 8.
        ASID16 OFFSET(12) NUMBITS(1) [],
        /// Interrupts can be messages.
        MSI OFFSET(13) NUMBITS(1) [],
        /// `CMD_SYNC` can send an event to waiting cores, as `SEV` does.
        SEV OFFSET(14) NUMBITS(1) [],
        /// Page requests (PRI).
        PRI OFFSET(16) NUMBITS(1) [],
        /// Tables of context descriptors may have two levels.
        CD2L OFFSET(19) NUMBITS(1) [],
        /// Somebody else can ask for translations, by a page of registers of its own (VATOS).
        VATOS OFFSET(20) NUMBITS(1) [],
        /// Endianness of tables.
        TTENDIAN OFFSET(21) NUMBITS(2) [
            Big = 0b11,
        ],
        /// Errors met by ATS translation requests can be recorded.
        ATSRECERR OFFSET(23) NUMBITS(1) [],
        /// Whether faults can stall.
        STALL_MODEL OFFSET(24) NUMBITS(2) [
            Chosen = 0b00,
            Forced = 0b10,
        ],
        /// Whether stream tables may have two levels.
        ST_LEVEL OFFSET(27) NUMBITS(2) [
            TwoLevel = 0b01,
        ],
    ],
    /// Identification Register 1.
    pub(crate) IDR1 [
        /// Bits of a StreamID.
        SIDSIZE OFFSET(0) NUMBITS(6) [],
        /// Bits of a SubstreamID.
        SSIDSIZE OFFSET(6) NUMBITS(5) [],
        /// Log2 of the entries of the PRI queue, at most.
        PRIQS OFFSET(11) NUMBITS(5) [],
        /// Log2 of the entries of the event queue, at most.
        EVENTQS OFFSET(16) NUMBITS(5) [],
        /// Log2 of the entries of the command queue, at most.
        CMDQS OFFSET(21) NUMBITS(5) [],
        /// The attributes that an access comes with can be overridden.
        ATTR_TYPES_OVR OFFSET(27) NUMBITS(1) [],
        /// Queue addresses are fixed.
        QUEUES_PRESET OFFSET(29) NUMBITS(1) [],
        /// Table addresses are fixed.
        TABLES_PRESET OFFSET(30) NUMBITS(1) [],
    ],
    /// Identification Register 2.
    pub(crate) IDR2 [
        /// Where the page of VATOS is, in 64 KiB behind the two of the unit.
        BA_VATOS OFFSET(0) NUMBITS(10) [],
    ],
    /// Identification Register 3.
    pub(crate) IDR3 [
        /// The second stage can decide alone how memory is cached (S2FWB).
        FWB OFFSET(8) NUMBITS(1) [],
        /// Translations can be invalidated by range.
        RIL OFFSET(10) NUMBITS(1) [],
    ],
    /// Identification Register 5.
    pub(crate) IDR5 [
        /// Output address size.
        OAS OFFSET(0) NUMBITS(3) [],
        /// 4 KiB granule.
        GRAN4K OFFSET(4) NUMBITS(1) [],
        /// Stalled accesses that are recorded and not answered, at most.
        STALL_MAX OFFSET(16) NUMBITS(16) [],
    ],
    /// Control Register 0, and its acknowledgement.
    pub(crate) CR0 [
        /// Translation enable.
        SMMUEN OFFSET(0) NUMBITS(1) [],
        /// PRI queue enable.
        PRIQEN OFFSET(1) NUMBITS(1) [],
        /// Event queue enable.
        EVENTQEN OFFSET(2) NUMBITS(1) [],
        /// Command queue enable.
        CMDQEN OFFSET(3) NUMBITS(1) [],
        /// Translated traffic is checked against its stream table entry.
        ATSCHK OFFSET(4) NUMBITS(1) [],
    ],
    /// Control Register 1: how the unit accesses its own queues and tables.
    pub(crate) CR1 [
        QUEUE_IC OFFSET(0) NUMBITS(2) [WriteBack = 1],
        QUEUE_OC OFFSET(2) NUMBITS(2) [WriteBack = 1],
        QUEUE_SH OFFSET(4) NUMBITS(2) [Inner = 3],
        TABLE_IC OFFSET(6) NUMBITS(2) [WriteBack = 1],
        TABLE_OC OFFSET(8) NUMBITS(2) [WriteBack = 1],
        TABLE_SH OFFSET(10) NUMBITS(2) [Inner = 3],
    ],
    /// Control Register 2.
    pub(crate) CR2 [
        /// Record accesses of streams that are past the end of the stream table.
        RECINVSID OFFSET(1) NUMBITS(1) [],
        /// Ignore the CPU's broadcast TLB maintenance.
        PTM OFFSET(2) NUMBITS(1) [],
        /// Record what is wrong with the configuration when an ATS translation request meets it.
        REC_CFG_ATS OFFSET(3) NUMBITS(1) [],
    ],
    /// Global Bypass Attribute Register: what becomes of accesses while translation is off.
    pub(crate) GBPA [
        /// They are refused.
        ABORT OFFSET(20) NUMBITS(1) [],
        /// Take the register over; reads as 1 until that is done.
        UPDATE OFFSET(31) NUMBITS(1) [],
    ],
    /// Interrupt Control, and its acknowledgement.
    pub(crate) IRQ_CTRL [
        GERROR OFFSET(0) NUMBITS(1) [],
        PRIQ OFFSET(1) NUMBITS(1) [],
        EVENTQ OFFSET(2) NUMBITS(1) [],
    ],
    /// Global Error; an error is active while its bit differs from that of `GERRORN`.
    pub(crate) GERROR [
        /// The command queue stopped at a command.
        CMDQ_ERR OFFSET(0) NUMBITS(1) [],
        /// A write to the event queue was aborted.
        EVENTQ_ABT_ERR OFFSET(2) NUMBITS(1) [],
        /// A write to the PRI queue was aborted.
        PRIQ_ABT_ERR OFFSET(3) NUMBITS(1) [],
        /// The message of a `CMD_SYNC` was aborted.
        MSI_CMDQ_ABT_ERR OFFSET(4) NUMBITS(1) [],
        /// The event queue's message was aborted.
        MSI_EVENTQ_ABT_ERR OFFSET(5) NUMBITS(1) [],
        /// The PRI queue's message was aborted.
        MSI_PRIQ_ABT_ERR OFFSET(6) NUMBITS(1) [],
        /// The message about an error was aborted.
        MSI_GERROR_ABT_ERR OFFSET(7) NUMBITS(1) [],
        /// Service failure mode: the unit does nothing any more.
        SFM_ERR OFFSET(8) NUMBITS(1) [],
        /// A command queue of the enhanced kind stopped.
        CMDQP_ERR OFFSET(9) NUMBITS(1) [],
        /// An access by a device was refused by the device permission table.
        DPT_ERR OFFSET(10) NUMBITS(1) [],
    ],
    /// Stream Table Base Configuration.
    pub(crate) STRTAB_BASE_CFG [
        /// Log2 of the number of entries, of all tables of the second level together.
        LOG2SIZE OFFSET(0) NUMBITS(6) [],
        /// Log2 of the entries of a table of the second level.
        SPLIT OFFSET(6) NUMBITS(5) [],
        /// Linear, or of two levels.
        FMT OFFSET(16) NUMBITS(2) [
            TwoLevel = 0b01,
        ],
    ],
    /// PROD and CONS of a queue.
    pub(crate) INDEX [
        /// Index, and above it the wrap flag; both end where the queue's size says.
        INDEX OFFSET(0) NUMBITS(20) [],
        /// Of CMDQ_CONS: why the queue stopped, while it is stopped.
        ERR OFFSET(24) NUMBITS(7) [],
        /// OVFLG of PROD, OVACKFLG of CONS: the queue lost entries while they differ.
        OVERFLOW OFFSET(31) NUMBITS(1) [],
    ],
    /// How a message is written.
    pub(crate) IRQ_CFG2 [
        /// Memory type, as the second stage encodes it.
        MEMATTR OFFSET(0) NUMBITS(4) [
            Device = 0b0001,
        ],
        /// Of PRIQ_IRQ_CFG2: interrupt for each last request, not when the queue becomes non-empty.
        LO OFFSET(31) NUMBITS(1) [],
    ],
];

register_bitfields![u64,
    /// Stream Table Base.
    pub(crate) STRTAB_BASE [
        /// Address, in 64 bytes.
        ADDR OFFSET(6) NUMBITS(50) [],
        /// Read-allocate hint.
        RA OFFSET(62) NUMBITS(1) [],
    ],
    /// Where a message goes; zero is no message.
    pub(crate) IRQ_CFG0 [
        /// Address, in 4 bytes.
        ADDR OFFSET(2) NUMBITS(54) [],
    ],
    /// Base of a queue.
    pub(crate) QUEUE_BASE [
        /// Log2 of the number of entries.
        LOG2SIZE OFFSET(0) NUMBITS(5) [],
        /// Address, in 32 bytes.
        ADDR OFFSET(5) NUMBITS(51) [],
        /// Allocate hint: RA of the command queue, WA of the others.
        ALLOCATE OFFSET(62) NUMBITS(1) [],
    ],
];

pub(crate) const IDR0: Ro<u32, IDR0::Register> = Ro::at(0x000);
pub(crate) const IDR1: Ro<u32, IDR1::Register> = Ro::at(0x004);
pub(crate) const IDR2: Ro<u32, IDR2::Register> = Ro::at(0x008);
pub(crate) const IDR3: Ro<u32, IDR3::Register> = Ro::at(0x00C);
pub(crate) const IDR4: Ro<u32> = Ro::at(0x010);
pub(crate) const IDR5: Ro<u32, IDR5::Register> = Ro::at(0x014);
pub(crate) const IIDR: Ro<u32> = Ro::at(0x018);
pub(crate) const AIDR: Ro<u32> = Ro::at(0x01C);
pub(crate) const CR0: Rw<u32, CR0::Register> = Rw::at(0x020);
pub(crate) const CR0ACK: Ro<u32, CR0::Register> = Ro::at(0x024);
pub(crate) const CR1: Rw<u32, CR1::Register> = Rw::at(0x028);
pub(crate) const CR2: Rw<u32, CR2::Register> = Rw::at(0x02C);
pub(crate) const GBPA: Rw<u32, GBPA::Register> = Rw::at(0x044);
pub(crate) const IRQ_CTRL: Rw<u32, IRQ_CTRL::Register> = Rw::at(0x050);
pub(crate) const IRQ_CTRLACK: Ro<u32, IRQ_CTRL::Register> = Ro::at(0x054);
pub(crate) const GERROR: Ro<u32, GERROR::Register> = Ro::at(0x060);
pub(crate) const GERRORN: Rw<u32, GERROR::Register> = Rw::at(0x064);
pub(crate) const GERROR_IRQ: MessageRegisters = message_registers(0x068);
pub(crate) const STRTAB_BASE: Rw<u64, STRTAB_BASE::Register> = Rw::at(0x080);
pub(crate) const STRTAB_BASE_CFG: Rw<u32, STRTAB_BASE_CFG::Register> = Rw::at(0x088);
pub(crate) const EVENTQ_IRQ: MessageRegisters = message_registers(0x0B0);
pub(crate) const PRIQ_IRQ: MessageRegisters = message_registers(0x0D0);

/// The three registers of an interrupt, from `CFG0` on.
const fn message_registers(at: usize) -> MessageRegisters {
    MessageRegisters { cfg0: Rw::at(at), cfg1: Rw::at(at + 8), cfg2: Rw::at(at + 12) }
}

/// The three registers of a queue. Its driver writes PROD of the command queue, and CONS of the others.
pub(crate) struct QueueRegisters {
    pub(crate) base: Rw<u64, QUEUE_BASE::Register>,
    pub(crate) prod: Rw<u32, INDEX::Register>,
    pub(crate) cons: Rw<u32, INDEX::Register>,
}

impl fmt::Debug for QueueRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("QueueRegisters")
    }
}

/// `CMDQ_BASE`, `CMDQ_PROD`, `CMDQ_CONS`.
pub(crate) const CMDQ: QueueRegisters =
    QueueRegisters { base: Rw::at(0x090), prod: Rw::at(0x098), cons: Rw::at(0x09C) };
/// `EVENTQ_BASE`, and in page 1 `EVENTQ_PROD`, `EVENTQ_CONS`.
pub(crate) const EVENTQ: QueueRegisters =
    QueueRegisters { base: Rw::at(0x0A0), prod: Rw::at(0x1_00A8), cons: Rw::at(0x1_00AC) };
/// `PRIQ_BASE`, and in page 1 `PRIQ_PROD`, `PRIQ_CONS`.
pub(crate) const PRIQ: QueueRegisters =
    QueueRegisters { base: Rw::at(0x0C0), prod: Rw::at(0x1_00C8), cons: Rw::at(0x1_00CC) };

/// What every register reads as where there is no unit any more; bits are reserved in each that is read in service.
pub(crate) const GONE: u32 = u32::MAX;

/// All errors that the manual knows: bits 0, and 2 to 10.
pub(crate) const ERRORS: u32 = 0x7FD;
/// Those that lose reports: `EVENTQ_ABT_ERR` and `PRIQ_ABT_ERR`.
pub(crate) const LOSSES: u32 = GERROR::EVENTQ_ABT_ERR::SET.value | GERROR::PRIQ_ABT_ERR::SET.value;

/// What `CR1` says of a unit whose accesses are coherent: all of them inner shareable, write-back.
pub(crate) const COHERENT: u32 = CR1::QUEUE_IC::WriteBack.value
    | CR1::QUEUE_OC::WriteBack.value
    | CR1::QUEUE_SH::Inner.value
    | CR1::TABLE_IC::WriteBack.value
    | CR1::TABLE_OC::WriteBack.value
    | CR1::TABLE_SH::Inner.value;

#[cfg(test)]
mod tests {
    use super::*;
    use tock_registers::{LocalRegisterCopy, fields::FieldValue};

    /// The registers of facts/smmuv3.md, section 11.1, rows R1, R3 to R8.
    #[test]
    fn control_and_base_registers_hold_the_words_of_the_manual() {
        let stream_table = |fields: FieldValue<u64, STRTAB_BASE::Register>| fields.value;
        let queue = |fields: FieldValue<u64, QUEUE_BASE::Register>| fields.value;

        assert_eq!(COHERENT, 0xD75);
        assert_eq!(
            stream_table(STRTAB_BASE::RA::SET + STRTAB_BASE::ADDR.val(0x8020_0000 >> 6)),
            0x4000_0000_8020_0000
        );
        assert_eq!(STRTAB_BASE_CFG::LOG2SIZE.val(8).value, 8);
        let two_levels = STRTAB_BASE_CFG::FMT::TwoLevel + STRTAB_BASE_CFG::SPLIT.val(8);
        assert_eq!((two_levels + STRTAB_BASE_CFG::LOG2SIZE.val(16)).value, 0x0001_0210);
        for (address, log2, word) in [
            (0x8010_0000, 8, 0x4000_0000_8010_0008),
            (0x8010_2000, 7, 0x4000_0000_8010_2007),
            (0x8010_4000, 9, 0x4000_0000_8010_4009),
        ] {
            let base = QUEUE_BASE::ALLOCATE::SET
                + QUEUE_BASE::ADDR.val(address >> 5)
                + QUEUE_BASE::LOG2SIZE.val(log2);
            assert_eq!(queue(base), word);
        }
    }

    /// The identification registers of QEMU 11.1.3, `-machine virt,iommu=smmuv3`.
    #[test]
    fn identification_decodes_as_measured() {
        let idr0 = LocalRegisterCopy::<u32, IDR0::Register>::new(0x0D44_101B);
        let idr1 = LocalRegisterCopy::<u32, IDR1::Register>::new(0x0273_0010);
        let idr3 = LocalRegisterCopy::<u32, IDR3::Register>::new(0x0000_1414);
        let idr5 = LocalRegisterCopy::<u32, IDR5::Register>::new(0x0000_0074);

        assert!(idr0.is_set(IDR0::S1P) && idr0.is_set(IDR0::S2P) && idr0.is_set(IDR0::TTF_AARCH64));
        assert!(idr0.is_set(IDR0::COHACC) && !idr0.is_set(IDR0::BTM) && !idr0.is_set(IDR0::MSI));
        assert!(!idr0.is_set(IDR0::SEV) && !idr0.is_set(IDR0::VATOS));
        assert!(idr0.matches_all(IDR0::ST_LEVEL::TwoLevel));
        assert!(!idr0.is_set(IDR0::ATS) && !idr0.is_set(IDR0::PRI) && !idr0.is_set(IDR0::ATSRECERR));
        assert_eq!((idr0.read(IDR0::TTENDIAN), idr0.read(IDR0::STALL_MODEL)), (2, 1));
        assert_eq!((idr1.read(IDR1::SIDSIZE), idr1.read(IDR1::PRIQS)), (16, 0));
        assert_eq!((idr1.read(IDR1::EVENTQS), idr1.read(IDR1::CMDQS)), (19, 19));
        assert!(!idr1.is_set(IDR1::ATTR_TYPES_OVR));
        assert!(idr3.is_set(IDR3::RIL));
        assert_eq!((idr5.read(IDR5::OAS), idr5.is_set(IDR5::GRAN4K)), (4, true));
    }
}
