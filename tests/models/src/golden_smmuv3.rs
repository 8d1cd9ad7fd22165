//! Golden words of SMMUv3: what the architecture's structures look like in memory and registers, bit by bit.
//!
//! Each constant was worked out from the architecture's field tables; a test here adds the fields up once more.
//! Encoders are tested against them, decoders fed with them. Layouts of page requests, CMD_PRI_RESP, CMD_ATC_INV and
//! CMD_STALL_TERM were cross-checked against fewer independent sources than the rest.

// Registers.

/// CR1, tables and queues inner-shareable and write-back.
pub const CR1: u64 = 0x0000_0000_0000_0D75;

/// CR0, SMMUEN, PRIQEN, EVENTQEN, CMDQEN, ATSCHK.
pub const CR0: u64 = 0x0000_0000_0000_001F;

/// STRTAB_BASE, ADDR 0x8020_0000, RA.
pub const STRTAB_BASE: u64 = 0x4000_0000_8020_0000;

/// STRTAB_BASE_CFG, two levels, SPLIT 8, LOG2SIZE 16.
pub const STRTAB_BASE_CFG_TWO_LEVEL: u64 = 0x0000_0000_0001_0210;

/// STRTAB_BASE_CFG, linear, LOG2SIZE 8.
pub const STRTAB_BASE_CFG: u64 = 0x0000_0000_0000_0008;

/// CMDQ_BASE, ADDR 0x8010_0000, LOG2SIZE 8, RA.
pub const CMDQ_BASE: u64 = 0x4000_0000_8010_0008;

/// EVENTQ_BASE, ADDR 0x8010_2000, LOG2SIZE 7, WA.
pub const EVENTQ_BASE: u64 = 0x4000_0000_8010_2007;

/// PRIQ_BASE, ADDR 0x8010_4000, LOG2SIZE 9, WA.
pub const PRIQ_BASE: u64 = 0x4000_0000_8010_4009;

/// GBPA, UPDATE, ABORT, SHCFG 1: what 0x1000 after reset becomes.
pub const GBPA_ABORT: u64 = 0x0000_0000_8010_1000;

/// EVENTQ_PROD of a full queue of 2^7 entries, with EVENTQ_CONS zero.
pub const EVENTQ_PROD_FULL: u64 = 0x0000_0000_0000_0080;

/// The same after one more event was dropped: OVFLG.
pub const EVENTQ_PROD_OVERFLOW: u64 = 0x0000_0000_8000_0080;

/// EVENTQ_CONS after everything was read and the overflow acknowledged: OVACKFLG.
pub const EVENTQ_CONS_ACKNOWLEDGED: u64 = 0x0000_0000_8000_0080;

// Stream table entries.

/// STE, V, Config abort.
pub const STE_ABORT: [u64; 8] = [0x0000_0000_0000_0001, 0, 0, 0, 0, 0, 0, 0];

/// STE, V, Config bypass, SHCFG 1.
pub const STE_BYPASS: [u64; 8] = [0x0000_0000_0000_0009, 0x0000_1000_0000_0000, 0, 0, 0, 0, 0, 0];

/// STE, stage 1, one CD at 0x8812_3000, write-back and inner-shareable, S1STALLD.
pub const STE_STAGE_1: [u64; 8] = [0x0000_0000_8812_300B, 0x0000_0000_0800_00D4, 0, 0, 0, 0, 0, 0];

/// STE, stage 1, S1Fmt 2, S1CDMax 20, L1CD at 0x9_0000_0000, S1DSS 2, EATS 1.
pub const STE_TWO_LEVEL_CDS: [u64; 8] = [0xA000_0009_0000_002B, 0x0000_0000_1000_00D6, 0, 0, 0, 0, 0, 0];

/// STE, as [`STE_TWO_LEVEL_CDS`], but S1CDMax 16 and STRW 2.
pub const STE_EL2: [u64; 8] = [0x8000_0009_0000_002B, 0x0000_0000_9000_00D6, 0, 0, 0, 0, 0, 0];

/// STE, stage 1, S1CDMax 1, CDs at 0x8820_0000, S1DSS 1, EATS 1, S1STALLD, SHCFG 1.
pub const STE_IDENTITY_ATS: [u64; 8] = [0x0800_0000_8820_000B, 0x0000_1000_1800_00D5, 0, 0, 0, 0, 0, 0];

/// STE, stage 2, VMID 0x2A, T0SZ 24, SL0 1, S2PS 2, S2PTW, S2R, S2TTB 0x1_4000_0000, SHCFG 1.
pub const STE_STAGE_2: [u64; 8] =
    [0x0000_0000_0000_000D, 0x0000_1000_0000_0000, 0x044A_3558_0000_002A, 0x0000_0001_4000_0000, 0, 0, 0, 0];

/// STE, stage 2, VMID 7, T0SZ 16, SL0 2, S2PS 5, S2FWB, S2PTW, S2R, S2TTB 0x2_0000_1000, SHCFG 1.
pub const STE_STAGE_2_FWB: [u64; 8] =
    [0x0000_0000_0000_000D, 0x0000_1000_0200_0000, 0x044D_3590_0000_0007, 0x0000_0002_0000_1000, 0, 0, 0, 0];

/// STE, stage 2, VMID 0x1FF, T0SZ 22, S2TG 64 KiB, SL0 1, S2PS 3, S2PTW, S2R, S2TTB 0x3_0000_0000, SHCFG 1.
pub const STE_STAGE_2_64K: [u64; 8] =
    [0x0000_0000_0000_000D, 0x0000_1000_0000_0000, 0x044B_7556_0000_01FF, 0x0000_0003_0000_0000, 0, 0, 0, 0];

/// STE, both stages, S1Fmt 2, S1CDMax 16, L1CD at IPA 0xA000_0000, S1DSS 2, EATS 1, S1STALLD, MEV, SHCFG 1,
/// stage 2 as in [`STE_STAGE_2`].
pub const STE_NESTED: [u64; 8] =
    [0x8000_0000_A000_002F, 0x0000_1000_1808_00D6, 0x044A_3558_0000_002A, 0x0000_0001_4000_0000, 0, 0, 0, 0];

/// STE, stage 2 that stalls: VMID 3, S2S, S2R, otherwise as in [`STE_STAGE_2`].
pub const STE_STALL: [u64; 8] =
    [0x0000_0000_0000_000D, 0, 0x064A_3558_0000_0003, 0x0000_0001_4000_0000, 0, 0, 0, 0];

/// STE, [`STE_STALL`] with EATS 1, which is illegal.
pub const STE_STALL_ATS: [u64; 8] =
    [0x0000_0000_0000_000D, 0x0000_0000_1000_0000, 0x064A_3558_0000_0003, 0x0000_0001_4000_0000, 0, 0, 0, 0];

/// L1 stream table descriptor, L2Ptr 0x8800_4000, Span 9.
pub const L1_STREAMS: u64 = 0x0000_0000_8800_4009;

/// L1 stream table descriptor, L2Ptr 0x8800_5000, Span 7.
pub const L1_STREAMS_64: u64 = 0x0000_0000_8800_5007;

// Context descriptors.

/// L1 context descriptor, V, L2Ptr 0xB001_0000.
pub const L1_CDS: u64 = 0x0000_0000_B001_0001;

/// CD, T0SZ 16, EPD1, IPS 5, R, A, ASET, ASID 1, TTB0 0x1_0203_0000, MAIR 0xF404_FF44.
pub const CD: [u64; 8] = [0x0001_E205_C000_3510, 0x0000_0001_0203_0000, 0, 0x0000_0000_F404_FF44, 0, 0, 0, 0];

/// CD, T0SZ 25, EPD1, IPS 2, S, R, A, ASET, ASID 0x1234, TTB0 0x8004_0000, MAIR 0xF404_FF44.
pub const CD_STALL: [u64; 8] =
    [0x1234_F202_C000_3519, 0x0000_0000_8004_0000, 0, 0x0000_0000_F404_FF44, 0, 0, 0, 0];

/// CD, T0SZ 22, TG0 64 KiB, EPD1, IPS 4, HA, HD, R, A, ASET, ASID 5, TTB0 0x9000_0000, MAIR 0xF404_FF44.
pub const CD_64K: [u64; 8] =
    [0x0005_EE04_C000_3556, 0x0000_0000_9000_0000, 0, 0x0000_0000_F404_FF44, 0, 0, 0, 0];

/// CD, EPD0, EPD1, IPS 5, A, ASET, ASID 9, MAIR 0xF404_FF44.
pub const CD_NO_WALKS: [u64; 8] = [0x0009_C205_C000_4000, 0, 0, 0x0000_0000_F404_FF44, 0, 0, 0, 0];

/// CD, T0SZ 17, TG0 16 KiB, EPD1, IPS 5, R, A, ASET, ASID 0x20, TTB0 0x8810_0000.
pub const CD_16K: [u64; 8] = [0x0020_E205_C000_3591, 0x0000_0000_8810_0000, 0, 0, 0, 0, 0, 0];

// Commands.

/// CMD_PREFETCH_CONFIG, SID 0x108.
pub const PREFETCH_CONFIG: [u64; 2] = [0x0000_0108_0000_0001, 0];

/// CMD_PREFETCH_ADDR, SID 0x108, SSID 5, 8 pages at 0x1234_5000.
pub const PREFETCH_ADDR: [u64; 2] = [0x0000_0108_0000_5802, 0x0000_0000_1234_5003];

/// CMD_CFGI_STE, SID 0x108, Leaf.
pub const CFGI_STE: [u64; 2] = [0x0000_0108_0000_0003, 0x0000_0000_0000_0001];

/// CMD_CFGI_STE_RANGE, SID 0x100, Range 7: 256 entries.
pub const CFGI_STE_RANGE: [u64; 2] = [0x0000_0100_0000_0004, 0x0000_0000_0000_0007];

/// CMD_CFGI_ALL.
pub const CFGI_ALL: [u64; 2] = [0x0000_0000_0000_0004, 0x0000_0000_0000_001F];

/// CMD_CFGI_CD, SID 0x108, SSID 5, Leaf.
pub const CFGI_CD: [u64; 2] = [0x0000_0108_0000_5005, 0x0000_0000_0000_0001];

/// CMD_CFGI_CD_ALL, SID 0x108.
pub const CFGI_CD_ALL: [u64; 2] = [0x0000_0108_0000_0006, 0];

/// CMD_CFGI_VMS_PIDM, VMID 0x2A.
pub const CFGI_VMS_PIDM: [u64; 2] = [0x0000_002A_0000_0007, 0];

/// CMD_TLBI_NH_ALL, VMID 0x2A.
pub const TLBI_NH_ALL: [u64; 2] = [0x0000_002A_0000_0010, 0];

/// CMD_TLBI_NH_ASID, VMID 0x2A, ASID 7.
pub const TLBI_NH_ASID: [u64; 2] = [0x0007_002A_0000_0011, 0];

/// CMD_TLBI_NH_VA, VMID 0x2A, ASID 7, 0x4020_1000, Leaf.
pub const TLBI_NH_VA: [u64; 2] = [0x0007_002A_0000_0012, 0x0000_0000_4020_1001];

/// CMD_TLBI_NH_VA, VMID 0x2A, ASID 7, 512 pages (SCALE 9) at 0x4020_0000, TG 1, TTL 3, Leaf.
pub const TLBI_NH_VA_512: [u64; 2] = [0x0007_002A_0090_0012, 0x0000_0000_4020_0701];

/// CMD_TLBI_NH_VA, VMID 0, ASID 7, 5 pages (NUM 4) at 0x4020_5000, TG 1, TTL 3, Leaf.
pub const TLBI_NH_VA_5: [u64; 2] = [0x0007_0000_0000_4012, 0x0000_0000_4020_5701];

/// CMD_TLBI_NH_VAA, VMID 0x2A, 0xFFFF_0000_1234_5000.
pub const TLBI_NH_VAA: [u64; 2] = [0x0000_002A_0000_0013, 0xFFFF_0000_1234_5000];

/// CMD_TLBI_EL2_ALL.
pub const TLBI_EL2_ALL: [u64; 2] = [0x0000_0000_0000_0020, 0];

/// CMD_TLBI_EL2_ASID, ASID 0x33.
pub const TLBI_EL2_ASID: [u64; 2] = [0x0033_0000_0000_0021, 0];

/// CMD_TLBI_EL2_VA, ASID 0x33, 0x7F00_0000_1000, Leaf.
pub const TLBI_EL2_VA: [u64; 2] = [0x0033_0000_0000_0022, 0x0000_7F00_0000_1001];

/// CMD_TLBI_EL2_VAA, 0x7F00_0000_1000.
pub const TLBI_EL2_VAA: [u64; 2] = [0x0000_0000_0000_0023, 0x0000_7F00_0000_1000];

/// CMD_TLBI_S12_VMALL, VMID 0x2A.
pub const TLBI_S12_VMALL: [u64; 2] = [0x0000_002A_0000_0028, 0];

/// CMD_TLBI_S2_IPA, VMID 0x2A, 0x8020_0000, Leaf.
pub const TLBI_S2_IPA: [u64; 2] = [0x0000_002A_0000_002A, 0x0000_0000_8020_0001];

/// CMD_TLBI_S2_IPA, VMID 0x2A, 1 GiB (SCALE 18) at 0x8000_0000, TG 1, TTL 2, Leaf.
pub const TLBI_S2_IPA_1G: [u64; 2] = [0x0000_002A_0120_002A, 0x0000_0000_8000_0601];

/// CMD_TLBI_NSNH_ALL.
pub const TLBI_NSNH_ALL: [u64; 2] = [0x0000_0000_0000_0030, 0];

/// CMD_ATC_INV, SID 0x108, Size 2 at 0x1000_0000.
pub const ATC_INV_16K: [u64; 2] = [0x0000_0108_0000_0040, 0x0000_0000_1000_0002];

/// CMD_ATC_INV, SID 0x108, Size 52: everything.
pub const ATC_INV_ALL: [u64; 2] = [0x0000_0108_0000_0040, 0x0000_0000_0000_0034];

/// CMD_ATC_INV, SID 0x108, SSID 5, Size 9 at 0x2000_0000.
pub const ATC_INV_PASID: [u64; 2] = [0x0000_0108_0000_5840, 0x0000_0000_2000_0009];

/// CMD_ATC_INV, SID 0x108, SSV, Global, Size 52.
pub const ATC_INV_GLOBAL: [u64; 2] = [0x0000_0108_0000_0A40, 0x0000_0000_0000_0034];

/// CMD_PRI_RESP, SID 0x108, SSID 5, PRGIndex 0x1A3, Success.
pub const PRI_RESP_SUCCESS: [u64; 2] = [0x0000_0108_0000_5841, 0x0000_0000_0000_21A3];

/// CMD_PRI_RESP, SID 0x108, PRGIndex 3, Response Failure.
pub const PRI_RESP_FAILURE: [u64; 2] = [0x0000_0108_0000_0041, 0x0000_0000_0000_0003];

/// CMD_PRI_RESP, SID 0x108, PRGIndex 3, Invalid Request.
pub const PRI_RESP_INVALID: [u64; 2] = [0x0000_0108_0000_0041, 0x0000_0000_0000_1003];

/// CMD_RESUME, SID 0x108, STAG 0x42, retry.
pub const RESUME_RETRY: [u64; 2] = [0x0000_0108_0000_1044, 0x0000_0000_0000_0042];

/// CMD_RESUME, SID 0x108, STAG 0x42, abort.
pub const RESUME_ABORT: [u64; 2] = [0x0000_0108_0000_2044, 0x0000_0000_0000_0042];

/// CMD_RESUME, SID 0x108, STAG 0x42, terminate.
pub const RESUME_TERMINATE: [u64; 2] = [0x0000_0108_0000_0044, 0x0000_0000_0000_0042];

/// CMD_STALL_TERM, SID 0x108.
pub const STALL_TERM: [u64; 2] = [0x0000_0108_0000_0045, 0];

/// CMD_SYNC, no signal.
pub const SYNC: [u64; 2] = [0x0000_0000_0000_0046, 0];

/// CMD_SYNC, no signal, MSH 3, MSIAttr 0xF.
pub const SYNC_ATTRIBUTES: [u64; 2] = [0x0000_0000_0FC0_0046, 0];

/// CMD_SYNC, SEV, MSH 3, MSIAttr 0xF.
pub const SYNC_SEV: [u64; 2] = [0x0000_0000_0FC0_2046, 0];

/// CMD_SYNC, IRQ, MSH 3, MSIAttr 0xF, MSIData 0xCAFE, MSIAddress 0x8010_3F40.
pub const SYNC_IRQ: [u64; 2] = [0x0000_CAFE_0FC0_1046, 0x0000_0000_8010_3F40];

/// CMD_SYNC, CS 3, which is illegal.
pub const SYNC_RESERVED: [u64; 2] = [0x0000_0000_0000_3046, 0];

/// CMD_CFGI_STE, SSec, which is illegal in a Non-secure queue; SID 0x108, Leaf 0.
pub const CFGI_STE_SECURE: [u64; 2] = [0x0000_0108_0000_0403, 0];

/// CMD_TLBI_NH_VA, TG 1 with NUM, SCALE and TTL zero, which is illegal; VMID 0x2A, ASID 7, 0x4020_1000, Leaf.
pub const TLBI_NH_VA_EMPTY_RANGE: [u64; 2] = [0x0007_002A_0000_0012, 0x0000_0000_4020_1401];

// Events.

/// F_TRANSLATION of stage 1, SID 0x108, read, CLASS IN, 0x4020_1ABC.
pub const F_TRANSLATION: [u64; 4] = [0x0000_0108_0000_0010, 0x0000_0208_0000_0000, 0x0000_0000_4020_1ABC, 0];

/// F_PERMISSION of stage 1, SID 0x108, SSID 5, privileged write, CLASS IN, stalled with STAG 0x42,
/// 0x7F00_0000_1000.
pub const F_PERMISSION_STALLED: [u64; 4] =
    [0x0000_0108_0000_5813, 0x0000_0202_8000_0042, 0x0000_7F00_0000_1000, 0];

/// C_BAD_STE, SID 0x108.
pub const C_BAD_STE: [u64; 4] = [0x0000_0108_0000_0004, 0, 0, 0];

/// C_BAD_STREAMID, SID 0x1FF.
pub const C_BAD_STREAMID: [u64; 4] = [0x0000_01FF_0000_0002, 0, 0, 0];

/// F_CD_FETCH, SID 0x108, SSID 5, FetchAddr 0xB001_0140.
pub const F_CD_FETCH: [u64; 4] = [0x0000_0108_0000_5809, 0, 0, 0x0000_0000_B001_0140];

/// F_STE_FETCH, SID 0x108, FetchAddr 0x8800_4200.
pub const F_STE_FETCH: [u64; 4] = [0x0000_0108_0000_0003, 0, 0, 0x0000_0000_8800_4200];

/// F_TRANSLATION of stage 2, SID 0x108, read, CLASS IN, 0x4020_1ABC, IPA 0x9020_1000.
pub const F_TRANSLATION_STAGE_2: [u64; 4] =
    [0x0000_0108_0000_0010, 0x0000_0288_0000_0000, 0x0000_0000_4020_1ABC, 0x0000_0000_9020_1000];

/// F_TRANSLATION of stage 2, SID 0x108, read, CLASS TT, 0x4020_1ABC, IPA 0x9100_0000.
pub const F_TRANSLATION_OF_TABLE: [u64; 4] =
    [0x0000_0108_0000_0010, 0x0000_0188_0000_0000, 0x0000_0000_4020_1ABC, 0x0000_0000_9100_0000];

/// F_TRANSLATION of stage 2, SID 0x108, read, CLASS CD, 0x4020_1ABC, IPA 0xA000_0000.
pub const F_TRANSLATION_OF_CD: [u64; 4] =
    [0x0000_0108_0000_0010, 0x0000_0088_0000_0000, 0x0000_0000_4020_1ABC, 0x0000_0000_A000_0000];

/// F_WALK_EABT of stage 1, SID 0x108, read, CLASS TT, 0x4020_1ABC, FetchAddr 0x1_0203_00A8.
pub const F_WALK_EABT: [u64; 4] =
    [0x0000_0108_0000_000B, 0x0000_0108_0000_0000, 0x0000_0000_4020_1ABC, 0x0000_0001_0203_00A8];

/// C_BAD_SUBSTREAMID, SID 0x108, SSID 0x20.
pub const C_BAD_SUBSTREAMID: [u64; 4] = [0x0000_0108_0002_0008, 0, 0, 0];

/// F_ADDR_SIZE of stage 2, SID 0x108, write, CLASS IN, 0x1000, IPA 0x100_0000_1000.
pub const F_ADDR_SIZE_STAGE_2: [u64; 4] =
    [0x0000_0108_0000_0011, 0x0000_0280_0000_0000, 0x0000_0000_0000_1000, 0x0000_0100_0000_1000];

// Page requests.

/// Page request, SID 0x108, SSID 5, R, W, Last, PRGIndex 0x1A3, 0x7F00_0000_1000.
pub const PAGE_REQUEST: [u64; 2] = [0xF000_0005_0000_0108, 0x0000_7F00_0000_11A3];

/// Page request without PASID, SID 0x108, R, not the last, PRGIndex 3, 0x4020_1000.
pub const PAGE_REQUEST_FIRST: [u64; 2] = [0x1000_0000_0000_0108, 0x0000_0000_4020_1003];

/// Page request without PASID, SID 0x108, R, Last, PRGIndex 3, 0x4020_2000.
pub const PAGE_REQUEST_LAST: [u64; 2] = [0x5000_0000_0000_0108, 0x0000_0000_4020_2003];

/// Stop marker, SID 0x108, SSID 5.
pub const STOP_MARKER: [u64; 2] = [0xC000_0005_0000_0108, 0];

// Page descriptors.

/// Stage-1 page 0x8000_0000, AttrIndx 1, `AP[1]`, inner-shareable, AF, nG.
pub const STAGE_1_PAGE: u64 = 0x0000_0000_8000_0F47;

/// The same with `AP[2]`, PXN and UXN.
pub const STAGE_1_PAGE_READ_ONLY: u64 = 0x0060_0000_8000_0FC7;

/// Stage-1 block of 2 MiB 0x8020_0000, AttrIndx 1, `AP[1]`, `AP[2]`, inner-shareable, AF, nG, DBM.
pub const STAGE_1_BLOCK: u64 = 0x0008_0000_8020_0FC5;

/// Table descriptor, 0x8000_1000.
pub const TABLE: u64 = 0x0000_0000_8000_1003;

/// Stage-2 page 0x8000_0000, MemAttr 0xF, read, write, inner-shareable, AF.
pub const STAGE_2_PAGE: u64 = 0x0000_0000_8000_07FF;

/// Stage-2 page 0x8000_0000, MemAttr 6 (S2FWB), read, inner-shareable, AF.
pub const STAGE_2_PAGE_FWB: u64 = 0x0000_0000_8000_075B;

/// Stage-2 page 0x0900_0000, MemAttr 1, read, write, outer-shareable, AF, XN 2.
pub const STAGE_2_DEVICE_PAGE: u64 = 0x0040_0000_0900_06C7;

#[cfg(test)]
mod tests {
    use super::*;

    /// The fields of a structure: high bit, low bit, value.
    type Fields = [(u32, u32, u64)];

    #[test]
    fn the_words_are_the_sums_of_their_fields() {
        let structures: &[(&[u64], &Fields)] = &[
            (&[CR1], &[(11, 10, 0x3), (9, 8, 0x1), (7, 6, 0x1), (5, 4, 0x3), (3, 2, 0x1), (1, 0, 0x1)]),
            (&[CR0], &[(0, 0, 0x1), (1, 1, 0x1), (2, 2, 0x1), (3, 3, 0x1), (4, 4, 0x1)]),
            (&[STRTAB_BASE], &[(62, 62, 0x1), (55, 6, 0x2008000)]),
            (&[STRTAB_BASE_CFG_TWO_LEVEL], &[(17, 16, 0x1), (10, 6, 0x8), (5, 0, 0x10)]),
            (&[STRTAB_BASE_CFG], &[(5, 0, 0x8)]),
            (&[CMDQ_BASE], &[(62, 62, 0x1), (55, 5, 0x4008000), (4, 0, 0x8)]),
            (&[EVENTQ_BASE], &[(62, 62, 0x1), (55, 5, 0x4008100), (4, 0, 0x7)]),
            (&[PRIQ_BASE], &[(62, 62, 0x1), (55, 5, 0x4008200), (4, 0, 0x9)]),
            (&[GBPA_ABORT], &[(31, 31, 0x1), (20, 20, 0x1), (13, 12, 0x1)]),
            (&[EVENTQ_PROD_FULL], &[(19, 0, 0x80)]),
            (&[EVENTQ_PROD_OVERFLOW], &[(19, 0, 0x80), (31, 31, 0x1)]),
            (&[EVENTQ_CONS_ACKNOWLEDGED], &[(19, 0, 0x80), (31, 31, 0x1)]),
            (&STE_ABORT, &[(0, 0, 0x1)]),
            (&STE_BYPASS, &[(0, 0, 0x1), (3, 1, 0x4), (109, 108, 0x1)]),
            (
                &STE_STAGE_1,
                &[
                    (0, 0, 0x1),
                    (3, 1, 0x5),
                    (55, 6, 0x22048c0),
                    (67, 66, 0x1),
                    (69, 68, 0x1),
                    (71, 70, 0x3),
                    (91, 91, 0x1),
                ],
            ),
            (
                &STE_TWO_LEVEL_CDS,
                &[
                    (0, 0, 0x1),
                    (3, 1, 0x5),
                    (5, 4, 0x2),
                    (63, 59, 0x14),
                    (55, 6, 0x24000000),
                    (65, 64, 0x2),
                    (67, 66, 0x1),
                    (69, 68, 0x1),
                    (71, 70, 0x3),
                    (93, 92, 0x1),
                ],
            ),
            (
                &STE_EL2,
                &[
                    (0, 0, 0x1),
                    (3, 1, 0x5),
                    (5, 4, 0x2),
                    (63, 59, 0x10),
                    (55, 6, 0x24000000),
                    (65, 64, 0x2),
                    (67, 66, 0x1),
                    (69, 68, 0x1),
                    (71, 70, 0x3),
                    (93, 92, 0x1),
                    (95, 94, 0x2),
                ],
            ),
            (
                &STE_IDENTITY_ATS,
                &[
                    (0, 0, 0x1),
                    (3, 1, 0x5),
                    (63, 59, 0x1),
                    (55, 6, 0x2208000),
                    (65, 64, 0x1),
                    (67, 66, 0x1),
                    (69, 68, 0x1),
                    (71, 70, 0x3),
                    (93, 92, 0x1),
                    (91, 91, 0x1),
                    (109, 108, 0x1),
                ],
            ),
            (
                &STE_STAGE_2,
                &[
                    (0, 0, 0x1),
                    (3, 1, 0x6),
                    (109, 108, 0x1),
                    (143, 128, 0x2a),
                    (165, 160, 0x18),
                    (167, 166, 0x1),
                    (169, 168, 0x1),
                    (171, 170, 0x1),
                    (173, 172, 0x3),
                    (178, 176, 0x2),
                    (179, 179, 0x1),
                    (182, 182, 0x1),
                    (186, 186, 0x1),
                    (247, 196, 0x14000000),
                ],
            ),
            (
                &STE_STAGE_2_FWB,
                &[
                    (0, 0, 0x1),
                    (3, 1, 0x6),
                    (109, 108, 0x1),
                    (89, 89, 0x1),
                    (143, 128, 0x7),
                    (165, 160, 0x10),
                    (167, 166, 0x2),
                    (169, 168, 0x1),
                    (171, 170, 0x1),
                    (173, 172, 0x3),
                    (178, 176, 0x5),
                    (179, 179, 0x1),
                    (182, 182, 0x1),
                    (186, 186, 0x1),
                    (247, 196, 0x20000100),
                ],
            ),
            (
                &STE_STAGE_2_64K,
                &[
                    (0, 0, 0x1),
                    (3, 1, 0x6),
                    (109, 108, 0x1),
                    (143, 128, 0x1ff),
                    (165, 160, 0x16),
                    (167, 166, 0x1),
                    (169, 168, 0x1),
                    (171, 170, 0x1),
                    (173, 172, 0x3),
                    (178, 176, 0x3),
                    (179, 179, 0x1),
                    (175, 174, 0x1),
                    (182, 182, 0x1),
                    (186, 186, 0x1),
                    (247, 196, 0x30000000),
                ],
            ),
            (
                &STE_NESTED,
                &[
                    (0, 0, 0x1),
                    (3, 1, 0x7),
                    (5, 4, 0x2),
                    (63, 59, 0x10),
                    (55, 6, 0x2800000),
                    (65, 64, 0x2),
                    (67, 66, 0x1),
                    (69, 68, 0x1),
                    (71, 70, 0x3),
                    (93, 92, 0x1),
                    (91, 91, 0x1),
                    (83, 83, 0x1),
                    (109, 108, 0x1),
                    (143, 128, 0x2a),
                    (165, 160, 0x18),
                    (167, 166, 0x1),
                    (169, 168, 0x1),
                    (171, 170, 0x1),
                    (173, 172, 0x3),
                    (178, 176, 0x2),
                    (179, 179, 0x1),
                    (182, 182, 0x1),
                    (186, 186, 0x1),
                    (247, 196, 0x14000000),
                ],
            ),
            (
                &STE_STALL,
                &[
                    (0, 0, 0x1),
                    (3, 1, 0x6),
                    (143, 128, 0x3),
                    (165, 160, 0x18),
                    (167, 166, 0x1),
                    (169, 168, 0x1),
                    (171, 170, 0x1),
                    (173, 172, 0x3),
                    (178, 176, 0x2),
                    (179, 179, 0x1),
                    (182, 182, 0x1),
                    (185, 185, 0x1),
                    (186, 186, 0x1),
                    (247, 196, 0x14000000),
                ],
            ),
            (
                &STE_STALL_ATS,
                &[
                    (0, 0, 0x1),
                    (3, 1, 0x6),
                    (93, 92, 0x1),
                    (143, 128, 0x3),
                    (165, 160, 0x18),
                    (167, 166, 0x1),
                    (169, 168, 0x1),
                    (171, 170, 0x1),
                    (173, 172, 0x3),
                    (178, 176, 0x2),
                    (179, 179, 0x1),
                    (182, 182, 0x1),
                    (185, 185, 0x1),
                    (186, 186, 0x1),
                    (247, 196, 0x14000000),
                ],
            ),
            (&[L1_STREAMS], &[(4, 0, 0x9), (55, 6, 0x2200100)]),
            (&[L1_STREAMS_64], &[(4, 0, 0x7), (55, 6, 0x2200140)]),
            (&[L1_CDS], &[(0, 0, 0x1), (55, 12, 0xb0010)]),
            (
                &CD,
                &[
                    (5, 0, 0x10),
                    (9, 8, 0x1),
                    (11, 10, 0x1),
                    (13, 12, 0x3),
                    (30, 30, 0x1),
                    (31, 31, 0x1),
                    (34, 32, 0x5),
                    (41, 41, 0x1),
                    (45, 45, 0x1),
                    (46, 46, 0x1),
                    (47, 47, 0x1),
                    (63, 48, 0x1),
                    (119, 68, 0x10203000),
                    (223, 192, 0xf404ff44),
                ],
            ),
            (
                &CD_STALL,
                &[
                    (5, 0, 0x19),
                    (9, 8, 0x1),
                    (11, 10, 0x1),
                    (13, 12, 0x3),
                    (30, 30, 0x1),
                    (31, 31, 0x1),
                    (34, 32, 0x2),
                    (41, 41, 0x1),
                    (45, 45, 0x1),
                    (46, 46, 0x1),
                    (47, 47, 0x1),
                    (44, 44, 0x1),
                    (63, 48, 0x1234),
                    (119, 68, 0x8004000),
                    (223, 192, 0xf404ff44),
                ],
            ),
            (
                &CD_64K,
                &[
                    (5, 0, 0x16),
                    (7, 6, 0x1),
                    (9, 8, 0x1),
                    (11, 10, 0x1),
                    (13, 12, 0x3),
                    (30, 30, 0x1),
                    (31, 31, 0x1),
                    (34, 32, 0x4),
                    (41, 41, 0x1),
                    (45, 45, 0x1),
                    (46, 46, 0x1),
                    (47, 47, 0x1),
                    (42, 42, 0x1),
                    (43, 43, 0x1),
                    (63, 48, 0x5),
                    (119, 68, 0x9000000),
                    (223, 192, 0xf404ff44),
                ],
            ),
            (
                &CD_NO_WALKS,
                &[
                    (30, 30, 0x1),
                    (31, 31, 0x1),
                    (34, 32, 0x5),
                    (41, 41, 0x1),
                    (14, 14, 0x1),
                    (46, 46, 0x1),
                    (47, 47, 0x1),
                    (63, 48, 0x9),
                    (223, 192, 0xf404ff44),
                ],
            ),
            (
                &CD_16K,
                &[
                    (5, 0, 0x11),
                    (7, 6, 0x2),
                    (9, 8, 0x1),
                    (11, 10, 0x1),
                    (13, 12, 0x3),
                    (30, 30, 0x1),
                    (31, 31, 0x1),
                    (34, 32, 0x5),
                    (41, 41, 0x1),
                    (45, 45, 0x1),
                    (46, 46, 0x1),
                    (47, 47, 0x1),
                    (63, 48, 0x20),
                    (119, 68, 0x8810000),
                ],
            ),
            (&PREFETCH_CONFIG, &[(7, 0, 0x1), (63, 32, 0x108)]),
            (
                &PREFETCH_ADDR,
                &[
                    (7, 0, 0x2),
                    (11, 11, 0x1),
                    (31, 12, 0x5),
                    (63, 32, 0x108),
                    (68, 64, 0x3),
                    (127, 76, 0x12345),
                ],
            ),
            (&CFGI_STE, &[(7, 0, 0x3), (63, 32, 0x108), (64, 64, 0x1)]),
            (&CFGI_STE_RANGE, &[(7, 0, 0x4), (63, 32, 0x100), (68, 64, 0x7)]),
            (&CFGI_ALL, &[(7, 0, 0x4), (68, 64, 0x1f)]),
            (&CFGI_CD, &[(7, 0, 0x5), (31, 12, 0x5), (63, 32, 0x108), (64, 64, 0x1)]),
            (&CFGI_CD_ALL, &[(7, 0, 0x6), (63, 32, 0x108)]),
            (&CFGI_VMS_PIDM, &[(7, 0, 0x7), (47, 32, 0x2a)]),
            (&TLBI_NH_ALL, &[(7, 0, 0x10), (47, 32, 0x2a)]),
            (&TLBI_NH_ASID, &[(7, 0, 0x11), (47, 32, 0x2a), (63, 48, 0x7)]),
            (&TLBI_NH_VA, &[(7, 0, 0x12), (47, 32, 0x2a), (63, 48, 0x7), (64, 64, 0x1), (127, 76, 0x40201)]),
            (
                &TLBI_NH_VA_512,
                &[
                    (7, 0, 0x12),
                    (47, 32, 0x2a),
                    (63, 48, 0x7),
                    (25, 20, 0x9),
                    (64, 64, 0x1),
                    (73, 72, 0x3),
                    (75, 74, 0x1),
                    (127, 76, 0x40200),
                ],
            ),
            (
                &TLBI_NH_VA_5,
                &[
                    (7, 0, 0x12),
                    (63, 48, 0x7),
                    (16, 12, 0x4),
                    (64, 64, 0x1),
                    (73, 72, 0x3),
                    (75, 74, 0x1),
                    (127, 76, 0x40205),
                ],
            ),
            (&TLBI_NH_VAA, &[(7, 0, 0x13), (47, 32, 0x2a), (127, 76, 0xffff000012345)]),
            (&TLBI_EL2_ALL, &[(7, 0, 0x20)]),
            (&TLBI_EL2_ASID, &[(7, 0, 0x21), (63, 48, 0x33)]),
            (&TLBI_EL2_VA, &[(7, 0, 0x22), (63, 48, 0x33), (64, 64, 0x1), (127, 76, 0x7f0000001)]),
            (&TLBI_EL2_VAA, &[(7, 0, 0x23), (127, 76, 0x7f0000001)]),
            (&TLBI_S12_VMALL, &[(7, 0, 0x28), (47, 32, 0x2a)]),
            (&TLBI_S2_IPA, &[(7, 0, 0x2a), (47, 32, 0x2a), (64, 64, 0x1), (127, 76, 0x80200)]),
            (
                &TLBI_S2_IPA_1G,
                &[
                    (7, 0, 0x2a),
                    (47, 32, 0x2a),
                    (25, 20, 0x12),
                    (64, 64, 0x1),
                    (73, 72, 0x2),
                    (75, 74, 0x1),
                    (127, 76, 0x80000),
                ],
            ),
            (&TLBI_NSNH_ALL, &[(7, 0, 0x30)]),
            (&ATC_INV_16K, &[(7, 0, 0x40), (63, 32, 0x108), (69, 64, 0x2), (127, 76, 0x10000)]),
            (&ATC_INV_ALL, &[(7, 0, 0x40), (63, 32, 0x108), (69, 64, 0x34)]),
            (
                &ATC_INV_PASID,
                &[
                    (7, 0, 0x40),
                    (63, 32, 0x108),
                    (11, 11, 0x1),
                    (31, 12, 0x5),
                    (69, 64, 0x9),
                    (127, 76, 0x20000),
                ],
            ),
            (&ATC_INV_GLOBAL, &[(7, 0, 0x40), (63, 32, 0x108), (11, 11, 0x1), (9, 9, 0x1), (69, 64, 0x34)]),
            (
                &PRI_RESP_SUCCESS,
                &[
                    (7, 0, 0x41),
                    (63, 32, 0x108),
                    (11, 11, 0x1),
                    (31, 12, 0x5),
                    (72, 64, 0x1a3),
                    (77, 76, 0x2),
                ],
            ),
            (&PRI_RESP_FAILURE, &[(7, 0, 0x41), (63, 32, 0x108), (72, 64, 0x3)]),
            (&PRI_RESP_INVALID, &[(7, 0, 0x41), (63, 32, 0x108), (72, 64, 0x3), (77, 76, 0x1)]),
            (&RESUME_RETRY, &[(7, 0, 0x44), (63, 32, 0x108), (12, 12, 0x1), (79, 64, 0x42)]),
            (&RESUME_ABORT, &[(7, 0, 0x44), (63, 32, 0x108), (13, 13, 0x1), (79, 64, 0x42)]),
            (&RESUME_TERMINATE, &[(7, 0, 0x44), (63, 32, 0x108), (79, 64, 0x42)]),
            (&STALL_TERM, &[(7, 0, 0x45), (63, 32, 0x108)]),
            (&SYNC, &[(7, 0, 0x46)]),
            (&SYNC_ATTRIBUTES, &[(7, 0, 0x46), (23, 22, 0x3), (27, 24, 0xf)]),
            (&SYNC_SEV, &[(7, 0, 0x46), (13, 12, 0x2), (23, 22, 0x3), (27, 24, 0xf)]),
            (
                &SYNC_IRQ,
                &[
                    (7, 0, 0x46),
                    (13, 12, 0x1),
                    (23, 22, 0x3),
                    (27, 24, 0xf),
                    (63, 32, 0xcafe),
                    (119, 66, 0x20040fd0),
                ],
            ),
            (&SYNC_RESERVED, &[(7, 0, 0x46), (13, 12, 0x3)]),
            (&CFGI_STE_SECURE, &[(7, 0, 0x3), (10, 10, 0x1), (63, 32, 0x108)]),
            (
                &TLBI_NH_VA_EMPTY_RANGE,
                &[
                    (7, 0, 0x12),
                    (47, 32, 0x2a),
                    (63, 48, 0x7),
                    (64, 64, 0x1),
                    (75, 74, 0x1),
                    (127, 76, 0x40201),
                ],
            ),
            (
                &F_TRANSLATION,
                &[(7, 0, 0x10), (63, 32, 0x108), (99, 99, 0x1), (105, 104, 0x2), (191, 128, 0x40201abc)],
            ),
            (
                &F_PERMISSION_STALLED,
                &[
                    (7, 0, 0x13),
                    (11, 11, 0x1),
                    (31, 12, 0x5),
                    (63, 32, 0x108),
                    (79, 64, 0x42),
                    (95, 95, 0x1),
                    (97, 97, 0x1),
                    (105, 104, 0x2),
                    (191, 128, 0x7f0000001000),
                ],
            ),
            (&C_BAD_STE, &[(7, 0, 0x4), (63, 32, 0x108)]),
            (&C_BAD_STREAMID, &[(7, 0, 0x2), (63, 32, 0x1ff)]),
            (
                &F_CD_FETCH,
                &[(7, 0, 0x9), (11, 11, 0x1), (31, 12, 0x5), (63, 32, 0x108), (247, 195, 0x16002028)],
            ),
            (&F_STE_FETCH, &[(7, 0, 0x3), (63, 32, 0x108), (247, 195, 0x11000840)]),
            (
                &F_TRANSLATION_STAGE_2,
                &[
                    (7, 0, 0x10),
                    (63, 32, 0x108),
                    (99, 99, 0x1),
                    (103, 103, 0x1),
                    (105, 104, 0x2),
                    (191, 128, 0x40201abc),
                    (247, 204, 0x90201),
                ],
            ),
            (
                &F_TRANSLATION_OF_TABLE,
                &[
                    (7, 0, 0x10),
                    (63, 32, 0x108),
                    (99, 99, 0x1),
                    (103, 103, 0x1),
                    (105, 104, 0x1),
                    (191, 128, 0x40201abc),
                    (247, 204, 0x91000),
                ],
            ),
            (
                &F_TRANSLATION_OF_CD,
                &[
                    (7, 0, 0x10),
                    (63, 32, 0x108),
                    (99, 99, 0x1),
                    (103, 103, 0x1),
                    (191, 128, 0x40201abc),
                    (247, 204, 0xa0000),
                ],
            ),
            (
                &F_WALK_EABT,
                &[
                    (7, 0, 0xb),
                    (63, 32, 0x108),
                    (99, 99, 0x1),
                    (105, 104, 0x1),
                    (191, 128, 0x40201abc),
                    (247, 195, 0x20406015),
                ],
            ),
            (&C_BAD_SUBSTREAMID, &[(7, 0, 0x8), (31, 12, 0x20), (63, 32, 0x108)]),
            (
                &F_ADDR_SIZE_STAGE_2,
                &[
                    (7, 0, 0x11),
                    (63, 32, 0x108),
                    (103, 103, 0x1),
                    (105, 104, 0x2),
                    (191, 128, 0x1000),
                    (247, 204, 0x10000001),
                ],
            ),
            (
                &PAGE_REQUEST,
                &[
                    (31, 0, 0x108),
                    (51, 32, 0x5),
                    (60, 60, 0x1),
                    (61, 61, 0x1),
                    (62, 62, 0x1),
                    (63, 63, 0x1),
                    (72, 64, 0x1a3),
                    (127, 76, 0x7f0000001),
                ],
            ),
            (&PAGE_REQUEST_FIRST, &[(31, 0, 0x108), (60, 60, 0x1), (72, 64, 0x3), (127, 76, 0x40201)]),
            (
                &PAGE_REQUEST_LAST,
                &[(31, 0, 0x108), (60, 60, 0x1), (62, 62, 0x1), (72, 64, 0x3), (127, 76, 0x40202)],
            ),
            (&STOP_MARKER, &[(31, 0, 0x108), (51, 32, 0x5), (62, 62, 0x1), (63, 63, 0x1)]),
            (
                &[STAGE_1_PAGE],
                &[
                    (1, 0, 0x3),
                    (4, 2, 0x1),
                    (6, 6, 0x1),
                    (9, 8, 0x3),
                    (10, 10, 0x1),
                    (11, 11, 0x1),
                    (47, 12, 0x80000),
                ],
            ),
            (
                &[STAGE_1_PAGE_READ_ONLY],
                &[
                    (1, 0, 0x3),
                    (4, 2, 0x1),
                    (6, 6, 0x1),
                    (7, 7, 0x1),
                    (9, 8, 0x3),
                    (10, 10, 0x1),
                    (11, 11, 0x1),
                    (47, 12, 0x80000),
                    (53, 53, 0x1),
                    (54, 54, 0x1),
                ],
            ),
            (
                &[STAGE_1_BLOCK],
                &[
                    (1, 0, 0x1),
                    (4, 2, 0x1),
                    (6, 6, 0x1),
                    (7, 7, 0x1),
                    (9, 8, 0x3),
                    (10, 10, 0x1),
                    (11, 11, 0x1),
                    (47, 12, 0x80200),
                    (51, 51, 0x1),
                ],
            ),
            (&[TABLE], &[(1, 0, 0x3), (47, 12, 0x80001)]),
            (
                &[STAGE_2_PAGE],
                &[(1, 0, 0x3), (5, 2, 0xf), (7, 6, 0x3), (9, 8, 0x3), (10, 10, 0x1), (47, 12, 0x80000)],
            ),
            (
                &[STAGE_2_PAGE_FWB],
                &[(1, 0, 0x3), (5, 2, 0x6), (7, 6, 0x1), (9, 8, 0x3), (10, 10, 0x1), (47, 12, 0x80000)],
            ),
            (
                &[STAGE_2_DEVICE_PAGE],
                &[
                    (1, 0, 0x3),
                    (5, 2, 0x1),
                    (7, 6, 0x3),
                    (9, 8, 0x2),
                    (10, 10, 0x1),
                    (47, 12, 0x9000),
                    (54, 53, 0x2),
                ],
            ),
        ];
        for &(words, fields) in structures {
            let mut sum = vec![0; words.len()];
            for &(high, low, value) in fields {
                assert!(high / 64 == low / 64 && value <= u64::MAX >> (63 - (high - low)), "{high}:{low}");
                sum[(low / 64) as usize] += value << (low % 64);
            }
            assert_eq!(words, sum, "{fields:?}");
        }
    }
}
