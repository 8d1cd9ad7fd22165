//! Registers of a unit, in the order of the manual's register map.

use iommu::{Ro, Rw, W1c};
use tock_registers::register_bitfields;

register_bitfields![u64,
    /// Capability Register.
    pub(crate) CAP [
        /// Number of domains: 2^(4 + 2 ND).
        ND OFFSET(0) NUMBITS(3) [],
        /// Required write-buffer flushing.
        RWBF OFFSET(4) NUMBITS(1) [],
        /// Protected low-memory region.
        PLMR OFFSET(5) NUMBITS(1) [],
        /// Protected high-memory region.
        PHMR OFFSET(6) NUMBITS(1) [],
        /// Caching mode: not-present entries may be cached.
        CM OFFSET(7) NUMBITS(1) [],
        /// Supported adjusted guest address widths.
        SAGAW OFFSET(8) NUMBITS(5) [],
        /// Fault-recording register offset, in 16 bytes.
        FRO OFFSET(24) NUMBITS(10) [],
        /// Large pages of second-stage tables: bit 0 of 2 MiB, bit 1 of 1 GiB.
        SSLPS OFFSET(34) NUMBITS(4) [],
        /// Page-selective invalidation of second-stage translations.
        PSI OFFSET(39) NUMBITS(1) [],
        /// Number of fault-recording registers, minus one.
        NFR OFFSET(40) NUMBITS(8) [],
        /// Maximum address mask value.
        MAMV OFFSET(48) NUMBITS(6) [],
        /// Write draining.
        DWD OFFSET(54) NUMBITS(1) [],
        /// Read draining.
        DRD OFFSET(55) NUMBITS(1) [],
        /// First-stage pages of 1 GiB.
        FS1GP OFFSET(56) NUMBITS(1) [],
        /// First-stage 5-level paging.
        FS5LP OFFSET(60) NUMBITS(1) [],
        /// Setting the root table pointer invalidates all caches.
        ESRTPS OFFSET(63) NUMBITS(1) [],
    ],
    /// Extended Capability Register.
    pub(crate) ECAP [
        /// Page walks snoop the CPU's caches: root, context and PASID tables, and paging structures of legacy mode.
        C OFFSET(0) NUMBITS(1) [],
        /// Queued invalidation.
        QI OFFSET(1) NUMBITS(1) [],
        /// Device TLBs.
        DT OFFSET(2) NUMBITS(1) [],
        /// Interrupt remapping.
        IR OFFSET(3) NUMBITS(1) [],
        /// Pass-through.
        PT OFFSET(6) NUMBITS(1) [],
        /// Snoop control: accesses can be made to snoop the CPU's caches.
        SC OFFSET(7) NUMBITS(1) [],
        /// IOTLB register offset, in 16 bytes.
        IRO OFFSET(8) NUMBITS(10) [],
        /// Nested translation.
        NEST OFFSET(26) NUMBITS(1) [],
        /// Extended interrupt mode: x2APIC destinations.
        EIM OFFSET(4) NUMBITS(1) [],
        /// Maximum handle mask value: of index-selective interrupt entry invalidations.
        MHMV OFFSET(20) NUMBITS(4) [],
        /// Page requests.
        PRS OFFSET(29) NUMBITS(1) [],
        /// PASID width, minus one.
        PSS OFFSET(35) NUMBITS(5) [],
        /// Requests with PASID.
        PASID OFFSET(40) NUMBITS(1) [],
        /// Device-TLB invalidation throttle: the physical function of a device is named.
        DIT OFFSET(41) NUMBITS(1) [],
        /// Page-request drain.
        PDS OFFSET(42) NUMBITS(1) [],
        /// Scalable mode.
        SMTS OFFSET(43) NUMBITS(1) [],
        /// Second-stage translation in scalable mode.
        SSTS OFFSET(46) NUMBITS(1) [],
        /// First-stage translation.
        FSTS OFFSET(47) NUMBITS(1) [],
        /// Scalable-mode page walks snoop the CPU's caches.
        SMPWCS OFFSET(48) NUMBITS(1) [],
    ],
    /// Root Table Address Register.
    pub(crate) RTADDR [
        /// Translation table mode.
        TTM OFFSET(10) NUMBITS(2) [
            Legacy = 0b00,
            Scalable = 0b01,
        ],
        /// Root table address, in 4 KiB.
        RTA OFFSET(12) NUMBITS(52) [],
    ],
    /// Invalidation Queue Head, and Tail.
    pub(crate) IQ [
        /// Byte offset of a descriptor, in 16 bytes.
        INDEX OFFSET(4) NUMBITS(15) [],
    ],
    /// Invalidation Queue Error Record.
    pub(crate) IQERCD [
        /// Source-id of the device that did not answer; 0 where the unit does not tell.
        ITESID OFFSET(32) NUMBITS(16) [],
        /// Source-id of the device whose answer nobody waited for.
        ICESID OFFSET(48) NUMBITS(16) [],
    ],
    /// Context Command Register.
    pub(crate) CCMD [
        /// What was invalidated: 0 is nothing.
        CAIG OFFSET(59) NUMBITS(2) [],
        /// Invalidate; cleared when done.
        ICC OFFSET(63) NUMBITS(1) [],
    ],
    /// IOTLB Invalidate Register.
    pub(crate) IOTLB [
        /// What was invalidated: 0 is nothing.
        IAIG OFFSET(57) NUMBITS(2) [],
        /// Invalidate; cleared when done.
        IVT OFFSET(63) NUMBITS(1) [],
    ],
    /// Invalidation Queue Address Register.
    pub(crate) IQA [
        /// Queue size: 2^QS pages.
        QS OFFSET(0) NUMBITS(3) [],
        /// Descriptor width: 256 bits.
        DW OFFSET(11) NUMBITS(1) [],
        /// Base address, in 4 KiB.
        BASE OFFSET(12) NUMBITS(52) [],
    ],
    /// Interrupt Remapping Table Address Register.
    pub(crate) IRTA [
        /// Size: 2^(S + 1) entries.
        S OFFSET(0) NUMBITS(4) [],
        /// Extended interrupt mode enable: destinations are x2APIC IDs.
        EIME OFFSET(11) NUMBITS(1) [],
        /// Base address, in 4 KiB.
        BASE OFFSET(12) NUMBITS(52) [],
    ],
    /// Page Request Queue Head, and Tail.
    pub(crate) PQ [
        /// Byte offset of a descriptor, in 32 bytes.
        INDEX OFFSET(5) NUMBITS(14) [],
    ],
    /// Page Request Queue Address Register.
    pub(crate) PQA [
        /// Queue size: 2^PQS pages.
        PQS OFFSET(0) NUMBITS(3) [],
        /// Base address, in 4 KiB.
        BASE OFFSET(12) NUMBITS(52) [],
    ],
];

register_bitfields![u32,
    /// Version Register.
    pub(crate) VER [
        /// Major version.
        MAX OFFSET(4) NUMBITS(4) [],
    ],
    /// Global Command, and Global Status.
    pub(crate) GLOBAL [
        /// Compatibility format interrupts pass.
        CFI OFFSET(23) NUMBITS(1) [],
        /// Set interrupt remap table pointer; one-shot.
        SIRTP OFFSET(24) NUMBITS(1) [],
        /// Interrupt remapping enable.
        IRE OFFSET(25) NUMBITS(1) [],
        /// Queued invalidation enable.
        QIE OFFSET(26) NUMBITS(1) [],
        /// Write buffer flush; one-shot.
        WBF OFFSET(27) NUMBITS(1) [],
        /// Set fault log; one-shot.
        SFL OFFSET(29) NUMBITS(1) [],
        /// Set root table pointer; one-shot.
        SRTP OFFSET(30) NUMBITS(1) [],
        /// Translation enable.
        TE OFFSET(31) NUMBITS(1) [],
    ],
    /// Fault Status Register.
    pub(crate) FSTS [
        /// Primary fault overflow.
        PFO OFFSET(0) NUMBITS(1) [],
        /// Primary pending fault: some fault record has F set. Read-only.
        PPF OFFSET(1) NUMBITS(1) [],
        /// Invalidation queue error.
        IQE OFFSET(4) NUMBITS(1) [],
        /// Invalidation completion error.
        ICE OFFSET(5) NUMBITS(1) [],
        /// Invalidation time-out error.
        ITE OFFSET(6) NUMBITS(1) [],
        /// Fault record index: the first record that was filled.
        FRI OFFSET(8) NUMBITS(8) [],
    ],
    /// Protected Memory Enable Register.
    pub(crate) PMEN [
        /// Protected region status. Read-only.
        PRS OFFSET(0) NUMBITS(1) [],
        /// Enable protected memory.
        EPM OFFSET(31) NUMBITS(1) [],
    ],
    /// Event Control Registers: fault, invalidation, page request.
    pub(crate) ECTL [
        /// Interrupt message mask.
        IM OFFSET(31) NUMBITS(1) [],
    ],
    /// Page Request Status Register.
    pub(crate) PRS [
        /// Pending page request.
        PPR OFFSET(0) NUMBITS(1) [],
        /// Page request overflow.
        PRO OFFSET(1) NUMBITS(1) [],
    ],
    /// The top 32 bits of a fault-recording register.
    pub(crate) FRCD_TOP [
        /// Fault: the record is valid.
        F OFFSET(31) NUMBITS(1) [],
    ],
];

pub(crate) const VER: Ro<u32, VER::Register> = Ro::at(0x000);
pub(crate) const CAP: Ro<u64, CAP::Register> = Ro::at(0x008);
pub(crate) const ECAP: Ro<u64, ECAP::Register> = Ro::at(0x010);
pub(crate) const GCMD: Rw<u32, GLOBAL::Register> = Rw::at(0x018);
pub(crate) const GSTS: Ro<u32, GLOBAL::Register> = Ro::at(0x01C);
pub(crate) const RTADDR: Rw<u64, RTADDR::Register> = Rw::at(0x020);
pub(crate) const CCMD: Rw<u64, CCMD::Register> = Rw::at(0x028);
pub(crate) const FSTS: W1c<u32, FSTS::Register> = W1c::at(0x034);
pub(crate) const PMEN: Rw<u32, PMEN::Register> = Rw::at(0x064);
pub(crate) const IQH: Ro<u64, IQ::Register> = Ro::at(0x080);
pub(crate) const IQT: Rw<u64, IQ::Register> = Rw::at(0x088);
pub(crate) const IQA: Rw<u64, IQA::Register> = Rw::at(0x090);
pub(crate) const IQERCD: Ro<u64, IQERCD::Register> = Ro::at(0x0B0);
pub(crate) const IRTA: Rw<u64, IRTA::Register> = Rw::at(0x0B8);
pub(crate) const PQH: Rw<u64, PQ::Register> = Rw::at(0x0C0);
pub(crate) const PQT: Rw<u64, PQ::Register> = Rw::at(0x0C8);
pub(crate) const PQA: Rw<u64, PQA::Register> = Rw::at(0x0D0);
pub(crate) const PRS: W1c<u32, PRS::Register> = W1c::at(0x0DC);

/// What every register reads as where there is no unit any more; bits are reserved in each that is read in service.
pub(crate) const GONE: u32 = u32::MAX;

/// The one-shot bits of `GCMD`; they read back as status and must not be written back.
pub(crate) const ONE_SHOT: u32 = 1 << 24 | 1 << 27 | 1 << 29 | 1 << 30;

/// The end of the registers that have a fixed place, as far as the driver uses them.
pub(crate) const FIXED_BYTES: usize = 0x0F0;

/// The four registers of one event: control, data, address, upper address.
pub(crate) struct EventRegisters {
    pub(crate) control: Rw<u32, ECTL::Register>,
    pub(crate) data: Rw<u32>,
    pub(crate) address: Rw<u32>,
    pub(crate) upper_address: Rw<u32>,
}

impl EventRegisters {
    const fn at(offset: usize) -> Self {
        Self {
            control: Rw::at(offset),
            data: Rw::at(offset + 0x4),
            address: Rw::at(offset + 0x8),
            upper_address: Rw::at(offset + 0xC),
        }
    }
}

/// Fault event: `FECTL`, `FEDATA`, `FEADDR`, `FEUADDR`.
pub(crate) const FAULT_EVENT: EventRegisters = EventRegisters::at(0x038);
/// Invalidation event: `IECTL`, `IEDATA`, `IEADDR`, `IEUADDR`.
pub(crate) const INVALIDATION_EVENT: EventRegisters = EventRegisters::at(0x0A0);
/// Page request event: `PECTL`, `PEDATA`, `PEADDR`, `PEUADDR`.
pub(crate) const PAGE_REQUEST_EVENT: EventRegisters = EventRegisters::at(0x0E0);

/// The registers of register-based invalidation at an offset that the unit reports: what, and the command.
pub(crate) struct IotlbRegisters {
    pub(crate) address: Rw<u64>,
    pub(crate) command: Rw<u64, IOTLB::Register>,
}

impl IotlbRegisters {
    /// Those at `offset` bytes (16 `ECAP.IRO`).
    pub(crate) fn at(offset: usize) -> Self {
        Self { address: Rw::at(offset), command: Rw::at(offset + 8) }
    }
}

/// A fault-recording register (`FRCD`), 128 bits wide, at an offset that the unit reports.
pub(crate) struct FaultRecording {
    pub(crate) low: Ro<u64>,
    pub(crate) high: Ro<u64>,
    pub(crate) top: W1c<u32, FRCD_TOP::Register>,
}

impl FaultRecording {
    /// Record `index` of those that start at `first` bytes (16 `CAP.FRO`).
    pub(crate) fn at(first: usize, index: usize) -> Self {
        let offset = first + index * 16;
        Self { low: Ro::at(offset), high: Ro::at(offset + 8), top: W1c::at(offset + 12) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::Bus;
    use tock_registers::{LocalRegisterCopy, fields::FieldValue};

    /// The registers of facts/vtd.md, section 8, rows 71, 73, 75, 76.
    #[test]
    fn address_registers_hold_the_words_of_the_manual() {
        let value = |fields: FieldValue<u64, RTADDR::Register>| fields.value;
        assert_eq!(value(RTADDR::TTM::Scalable + RTADDR::RTA.val(0x5)), 0x5400);
        let value = |fields: FieldValue<u64, IQA::Register>| fields.value;
        assert_eq!(value(IQA::DW::SET + IQA::BASE.val(0x6) + IQA::QS.val(0)), 0x6800);
        let value = |fields: FieldValue<u64, IRTA::Register>| fields.value;
        assert_eq!(value(IRTA::S.val(15) + IRTA::EIME.val(1) + IRTA::BASE.val(0x100)), 0x0010_080F);
        let value = |fields: FieldValue<u64, PQA::Register>| fields.value;
        assert_eq!(value(PQA::PQS.val(5) + PQA::BASE.val(0x200)), 0x0020_0005);
    }

    /// The capabilities that QEMU 11.1.3 reports with page requests on.
    #[test]
    fn capabilities_decode_as_measured() {
        let cap = LocalRegisterCopy::<u64, CAP::Register>::new(0x81D2_008C_222F_0606);
        let ecap = LocalRegisterCopy::<u64, ECAP::Register>::new(0x8D9A_20F0_0F5E);

        assert_eq!((cap.read(CAP::ND), cap.read(CAP::FRO), cap.read(CAP::NFR)), (6, 0x22, 0));
        assert_eq!((cap.read(CAP::MAMV), cap.is_set(CAP::PSI), cap.is_set(CAP::CM)), (18, true, false));
        assert!(cap.is_set(CAP::ESRTPS) && cap.is_set(CAP::DWD) && cap.is_set(CAP::DRD));
        assert!(!cap.is_set(CAP::RWBF) && !cap.is_set(CAP::FS5LP));
        assert!(ecap.is_set(ECAP::QI) && ecap.is_set(ECAP::DT) && ecap.is_set(ECAP::PRS));
        assert!(ecap.is_set(ECAP::PASID) && ecap.is_set(ECAP::PDS) && ecap.is_set(ECAP::SMTS));
        assert!(ecap.is_set(ECAP::FSTS) && !ecap.is_set(ECAP::SSTS) && !ecap.is_set(ECAP::SMPWCS));
        assert_eq!((ecap.read(ECAP::PSS), ecap.read(ECAP::MHMV)), (19, 15));
        assert!(ecap.is_set(ECAP::IR) && ecap.is_set(ECAP::EIM));
    }

    /// The bits `high` to `low`, as the sheet names fields.
    const fn bits(high: u32, low: u32) -> u64 {
        (u64::MAX >> (63 - high)) & (u64::MAX << low)
    }

    /// Every field that the driver knows, beside its bits in facts/vtd.md, sections 1.2 to 1.7 and 4.1.
    #[test]
    fn every_field_of_every_register_is_where_the_manual_has_it() {
        macro_rules! fields {
            ($($register:ident { $($field:ident $high:literal : $low:literal),* })*) => {$($(
                let field = $register::$field;
                let found = u64::from(field.mask) << field.shift;
                assert_eq!(found, bits($high, $low), "{}.{}", stringify!($register), stringify!($field));
            )*)*};
        }
        fields! {
            CAP {
                ND 2:0, RWBF 4:4, PLMR 5:5, PHMR 6:6, CM 7:7, SAGAW 12:8, FRO 33:24, SSLPS 37:34, PSI 39:39, NFR 47:40,
                MAMV 53:48, DWD 54:54, DRD 55:55, FS1GP 56:56, FS5LP 60:60, ESRTPS 63:63
            }
            ECAP {
                C 0:0, QI 1:1, DT 2:2, IR 3:3, EIM 4:4, PT 6:6, SC 7:7, IRO 17:8, MHMV 23:20, NEST 26:26, PRS 29:29,
                PSS 39:35, PASID 40:40, DIT 41:41, PDS 42:42, SMTS 43:43, SSTS 46:46, FSTS 47:47, SMPWCS 48:48
            }
            RTADDR { TTM 11:10, RTA 63:12 }
            CCMD { CAIG 60:59, ICC 63:63 }
            IOTLB { IAIG 58:57, IVT 63:63 }
            IQ { INDEX 18:4 }
            IQA { QS 2:0, DW 11:11, BASE 63:12 }
            IQERCD { ITESID 47:32, ICESID 63:48 }
            IRTA { S 3:0, EIME 11:11, BASE 63:12 }
            PQ { INDEX 18:5 }
            PQA { PQS 2:0, BASE 63:12 }
            VER { MAX 7:4 }
            GLOBAL { CFI 23:23, SIRTP 24:24, IRE 25:25, QIE 26:26, WBF 27:27, SFL 29:29, SRTP 30:30, TE 31:31 }
            FSTS { PFO 0:0, PPF 1:1, IQE 4:4, ICE 5:5, ITE 6:6, FRI 15:8 }
            PMEN { PRS 0:0, EPM 31:31 }
            ECTL { IM 31:31 }
            PRS { PPR 0:0, PRO 1:1 }
            FRCD_TOP { F 31:31 }
        }
        // 30, 29, 27 and 24 of GCMD.
        assert_eq!(!ONE_SHOT, 0x96FF_FFFF);
    }

    /// A bus that answers every read of a register with its offset and width.
    struct Places;

    impl Bus for Places {
        fn read32(&self, offset: usize) -> u32 {
            32 << 16 | offset as u32
        }
        fn write32(&self, _offset: usize, _value: u32) {}
        fn read64(&self, offset: usize) -> u64 {
            64 << 16 | offset as u64
        }
        fn write64(&self, _offset: usize, _value: u64) {}
        fn publish(&self, _range: core::ops::Range<iommu::PhysAddr>) {}
        fn observe(&self, _range: core::ops::Range<iommu::PhysAddr>) {}
        fn now_us(&self) -> u64 {
            0
        }
    }

    /// The map of facts/vtd.md, section 1.1.
    #[test]
    fn every_register_is_where_the_manual_has_it_and_as_wide() {
        macro_rules! places {
            ($($width:literal { $($register:expr => $offset:literal),* })*) => {$($(
                let found = u64::from($register.read(&Places).get());
                assert_eq!((found >> 16, found & 0xFFFF), ($width, $offset), "{}", stringify!($register));
            )*)*};
        }
        places! {
            32 {
                VER => 0x000, GCMD => 0x018, GSTS => 0x01C, FSTS => 0x034, PMEN => 0x064, PRS => 0x0DC,
                FAULT_EVENT.control => 0x038, FAULT_EVENT.data => 0x03C, FAULT_EVENT.address => 0x040,
                FAULT_EVENT.upper_address => 0x044, INVALIDATION_EVENT.control => 0x0A0,
                INVALIDATION_EVENT.data => 0x0A4, INVALIDATION_EVENT.address => 0x0A8,
                INVALIDATION_EVENT.upper_address => 0x0AC, PAGE_REQUEST_EVENT.control => 0x0E0,
                PAGE_REQUEST_EVENT.data => 0x0E4, PAGE_REQUEST_EVENT.address => 0x0E8,
                PAGE_REQUEST_EVENT.upper_address => 0x0EC, FaultRecording::at(0x220, 0).top => 0x22C,
                FaultRecording::at(0x220, 3).top => 0x25C
            }
            64 {
                CAP => 0x008, ECAP => 0x010, RTADDR => 0x020, CCMD => 0x028, IQH => 0x080, IQT => 0x088, IQA => 0x090,
                IQERCD => 0x0B0, IRTA => 0x0B8, PQH => 0x0C0, PQT => 0x0C8, PQA => 0x0D0,
                IotlbRegisters::at(0xF00).address => 0xF00, IotlbRegisters::at(0xF00).command => 0xF08,
                FaultRecording::at(0x220, 3).low => 0x250, FaultRecording::at(0x220, 3).high => 0x258
            }
        }
    }

    #[test]
    fn fault_status_decodes_as_in_the_manual() {
        let fsts = LocalRegisterCopy::<u32, FSTS::Register>::new(0x0502);

        assert!(fsts.is_set(FSTS::PPF) && !fsts.is_set(FSTS::PFO));
        assert_eq!(fsts.read(FSTS::FRI), 5);
    }
}
