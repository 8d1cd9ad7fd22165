//! Golden words: what the manual's structures look like in memory and registers, bit by bit.
//!
//! Each constant was worked out by hand from the manual's field tables; a test here adds the fields up once more.
//! Encoders are tested against them, decoders fed with them. Descriptors of the invalidation queue are
//! given with 256 bits; their 128-bit form is the first two words.

// Tables.

/// Scalable root entry, LP with LCTP 0x1_0000, UP with UCTP 0x1_1000.
pub const SCALABLE_ROOT: [u64; 2] = [0x0000_0000_0001_0001, 0x0000_0000_0001_1001];

/// Scalable root entry, only UP, UCTP 0xF_EDCB_A000.
pub const SCALABLE_ROOT_UPPER: [u64; 2] = [0, 0x0000_000F_EDCB_A001];

/// Scalable context entry, DTE, PASIDE, PRE, PDTS 2, PASIDDIRPTR 0x2468_A000, RID_PASID 0.
pub const SCALABLE_CONTEXT: [u64; 4] = [0x0000_0000_2468_A41D, 0, 0, 0];

/// Scalable context entry, PASIDE, PDTS 7, PASIDDIRPTR 0x3000, RID_PASID 0xFFFFF, RID_PRIV.
pub const SCALABLE_CONTEXT_RID_PASID: [u64; 4] = [0x0000_0000_0000_3E09, 0x0000_0000_001F_FFFF, 0, 0];

/// PASID directory entry, P, SMPTBLPTR 0x777_7000.
pub const PASID_DIRECTORY: u64 = 0x0000_0000_0777_7001;

/// PASID directory entry, not present, FPD.
pub const PASID_DIRECTORY_FPD: u64 = 0x0000_0000_0000_0002;

/// PASID table entry, first stage, AW 2, DID 6, PWSNP, SRE, WPE, 4 levels, FSPTPTR 0x5555_5000.
pub const PASID_FIRST_STAGE: [u64; 8] =
    [0x0000_0000_0000_0049, 0x0000_0000_0080_0006, 0x0000_0000_5555_5011, 0, 0, 0, 0, 0];

/// PASID table entry, first stage, AW 3, DID 0xABC, PGSNP, SRE, 5 levels, EAFE, FSPTPTR 0x1000.
pub const PASID_FIRST_STAGE_5_LEVELS: [u64; 8] =
    [0x0000_0000_0000_004D, 0x0000_0000_0100_0ABC, 0x0000_0000_0000_1085, 0, 0, 0, 0, 0];

/// PASID table entry, nested, AW 3, SSPTPTR 0x80_0000, DID 0x1001, SRE, WPE, 5 levels, FSPTPTR 0x90_0000 (the guest's).
pub const PASID_NESTED: [u64; 8] =
    [0x0000_0000_0080_00CD, 0x0000_0000_0000_1001, 0x0000_0000_0090_0015, 0, 0, 0, 0, 0];

/// First-stage entry, P, R/W, U/S, A, pointing at the table 0xAB_C000.
pub const FIRST_STAGE_TABLE: u64 = 0x0000_0000_00AB_C027;

/// First-stage 4 KiB leaf, P, R/W, U/S, A, D, XD, page 0xDE_F000.
pub const FIRST_STAGE_PAGE: u64 = 0x8000_0000_00DE_F067;

// Invalidation queue.

/// Context-cache invalidation, global.
pub const CONTEXT_GLOBAL: [u64; 4] = [0x0000_0000_0000_0011, 0, 0, 0];

/// Context-cache invalidation, device 03:1f.2, DID 7, FM 0.
pub const CONTEXT_DEVICE: [u64; 4] = [0x0000_03FA_0007_0031, 0, 0, 0];

/// Interrupt entry cache invalidation, global.
pub const INTERRUPT_GLOBAL: [u64; 4] = [0x0000_0000_0000_0004, 0, 0, 0];

/// Interrupt entry cache invalidation, index 0x1230, IM 3 (8 entries).
pub const INTERRUPT_INDEX: [u64; 4] = [0x0000_1230_1800_0014, 0, 0, 0];

/// Invalidation wait, SW, STDATA 2, STADDR 0x1000_0040.
pub const WAIT_STATUS: [u64; 4] = [0x0000_0002_0000_0025, 0x0000_0000_1000_0040, 0, 0];

/// Invalidation wait, IF.
pub const WAIT_INTERRUPT: [u64; 4] = [0x0000_0000_0000_0015, 0, 0, 0];

/// Invalidation wait, FN alone.
pub const WAIT_FENCE: [u64; 4] = [0x0000_0000_0000_0045, 0, 0, 0];

/// Invalidation wait, SW, FN, PD, STDATA 1, STADDR 0x9008.
pub const WAIT_DRAIN: [u64; 4] = [0x0000_0001_0000_00E5, 0x0000_0000_0000_9008, 0, 0];

/// PASID-based IOTLB invalidation, all of DID 0x10, PASID 0x12345.
pub const PASID_IOTLB_ALL: [u64; 4] = [0x0001_2345_0010_0026, 0, 0, 0];

/// PASID-based IOTLB invalidation, DID 0x10, PASID 1, ADDR 0x20_0000, AM 9, IH 0.
pub const PASID_IOTLB_PAGES: [u64; 4] = [0x0000_0001_0010_0036, 0x0000_0000_0020_0009, 0, 0];

/// PASID cache invalidation, all of DID 0x11.
pub const PASID_CACHE_DOMAIN: [u64; 4] = [0x0000_0000_0011_0007, 0, 0, 0];

/// PASID cache invalidation, DID 0x11, PASID 0xABCDE.
pub const PASID_CACHE_PASID: [u64; 4] = [0x000A_BCDE_0011_0017, 0, 0, 0];

/// PASID cache invalidation, global.
pub const PASID_CACHE_GLOBAL: [u64; 4] = [0x0000_0000_0000_0037, 0, 0, 0];

/// PASID-based device-TLB invalidation, page 0xFFFF_8000_0000_1000, SID 0x0108, PASID 5, PFSID 0x0100, MIP 8.
pub const PASID_DEVICE_TLB_PAGE: [u64; 4] = [0x0100_0005_0108_0088, 0xFFFF_8000_0000_1000, 0, 0];

/// PASID-based device-TLB invalidation, all addresses, SID 0x00FA, PASID 0x12345, PFSID 0x00F9.
pub const PASID_DEVICE_TLB_ALL: [u64; 4] = [0x00F1_2345_00FA_9008, 0x7FFF_FFFF_FFFF_F800, 0, 0];

/// PASID-based device-TLB invalidation, 2 MiB at 0x4000_0000, G, SID 0x0200, PASID 7, PFSID 0x0200.
pub const PASID_DEVICE_TLB_2M: [u64; 4] = [0x0200_0007_0200_0008, 0x0000_0000_400F_F801, 0, 0];

/// Page group response, success, RID 0x20, PASID 5, PRGI 2.
pub const PAGE_GROUP_RESPONSE: [u64; 4] = [0x0000_0005_0020_0019, 0x0000_0000_0000_0010, 0, 0];

// Page requests.

/// Page request, RID 0x20, PASID 5, RD, LPIG, PRGI 2, address 0x40_0000_0000.
pub const PAGE_REQUEST: [u64; 4] = [0x0000_0005_0020_0101, 0x0000_0040_0000_0015, 0, 0];

/// Page request, RID 0x0108, PASID 0x12345, PMR, RD, WR, not the last, PRGI 0x1FF, address 0x7F00_0000_1000.
pub const PAGE_REQUEST_PRIVILEGED: [u64; 4] = [0x0021_2345_0108_0101, 0x0000_7F00_0000_1FFB, 0, 0];

/// Page request without PASID, RID 0x0300, WR, LPIG, PRGI 3, address 0x1234_5000.
pub const PAGE_REQUEST_WITHOUT_PASID: [u64; 4] = [0x0000_0000_0300_0001, 0x0000_0000_1234_501E, 0, 0];

/// Stop marker, RID 0x20, PASID 5.
pub const STOP_MARKER: [u64; 4] = [0x0000_0005_0020_0101, 0x0000_0000_0000_0004, 0, 0];

// Fault records.

/// Fault record, write, FR 0x05, SID 0x0108, FI 0x1234_5000.
pub const FAULT_WRITE: [u64; 2] = [0x0000_0000_1234_5000, 0x8000_0005_0000_0108];

/// Fault record, read, FR 0x79, SID 0x00FA, PASID 0x12345, PRIV, FI 0xFFFF_8000_0000_1000.
pub const FAULT_READ_PASID: [u64; 2] = [0xFFFF_8000_0000_1000, 0xC123_4579_A000_00FA];

/// Fault record, page request, FR 0x47, SID 0x20, PASID 5, FI 0x40_0000_0000.
pub const FAULT_PAGE_REQUEST: [u64; 2] = [0x0000_0040_0000_0000, 0x8000_0547_9000_0020];

/// Fault record, AtomicOp, FR 0x86, SID 0x0300, FI 0x1_0000.
pub const FAULT_ATOMIC: [u64; 2] = [0x0000_0000_0001_0000, 0xC000_0086_1000_0300];

/// Fault record, ATS translation request for a read, FR 0x44, SID 0x0108, FI 0xA000.
pub const FAULT_TRANSLATION_REQUEST: [u64; 2] = [0x0000_0000_0000_A000, 0xD000_0044_0000_0108];

/// Fault record, interrupt, FR 0x26, index 0x1234, SID 0xF0F8.
pub const FAULT_INTERRUPT: [u64; 2] = [0x1234_0000_0000_0000, 0x8000_0026_0000_F0F8];

// Interrupt remapping.

/// IRTE, x2APIC destination 0x1234_5678, vector 0x41, fixed, edge, SVT 1, SQ 0, SID 0x0108.
pub const REMAP_X2APIC: [u64; 2] = [0x1234_5678_0041_0001, 0x0000_0000_0004_0108];

/// IRTE, xAPIC destination 0x0F, logical, RH, level, lowest priority, vector 0x30, SVT 1, SID 0xF0F8.
pub const REMAP_XAPIC: [u64; 2] = [0x0000_0F00_0030_003D, 0x0000_0000_0004_F0F8];

/// IRTE, buses 0x02 to 0x05 (SVT 2), FPD, vector 0x55, x2APIC destination 7.
pub const REMAP_BUSES: [u64; 2] = [0x0000_0007_0055_0003, 0x0000_0000_0008_0205];

/// IRTE, SVT 1, SQ 3 (the function is ignored), SID 0x0200, vector 0x66, x2APIC destination 1.
pub const REMAP_FUNCTIONS: [u64; 2] = [0x0000_0001_0066_0001, 0x0000_0000_0007_0200];

/// IRTE, posted (IM): URG, vector 0xF2, descriptor 0x1_2345_6780, SVT 1, SID 0x0108.
pub const REMAP_POSTED: [u64; 2] = [0x2345_6780_00F2_C001, 0x0000_0001_0004_0108];

/// I/O APIC redirection entry, remappable, index 0x1234, vector 0x31, level, active low.
pub const PIN_LEVEL: u64 = 0x2469_0000_0000_A031;

/// I/O APIC redirection entry, remappable, index 0x8001, vector 0x52, edge, masked.
pub const PIN_MASKED: u64 = 0x0003_0000_0001_0852;

/// Address of a remappable message, handle 0x5, SHV 0.
pub const MESSAGE: u64 = 0xFEE0_00B0;

/// Address of a remappable message, handle 0x5, SHV 1.
pub const MESSAGE_SUBHANDLE: u64 = 0xFEE0_00B8;

/// Address of a remappable message, handle 0x8001, SHV 1.
pub const MESSAGE_HIGH: u64 = 0xFEE0_003C;

/// Address of a remappable message, handle 0xFFFF, SHV 0.
pub const MESSAGE_LAST: u64 = 0xFEEF_FFF4;

// Registers.

/// RTADDR, root table 0x5000, TTM 01 (scalable).
pub const RTADDR_SCALABLE: u64 = 0x0000_0000_0000_5400;

/// RTADDR, root table 0x5000, TTM 11 (abort DMA).
pub const RTADDR_ABORT: u64 = 0x0000_0000_0000_5C00;

/// IQA, base 0x6000, DW (256-bit descriptors), QS 0.
pub const IQA_256_BITS: u64 = 0x0000_0000_0000_6800;

/// IQA, base 0x8_0000, 128-bit descriptors, QS 7.
pub const IQA_128_BITS: u64 = 0x0000_0000_0008_0007;

/// IRTA, base 0x10_0000, EIME, S 15.
pub const IRTA: u64 = 0x0000_0000_0010_080F;

/// PQA, base 0x20_0000, PQS 5.
pub const PQA: u64 = 0x0000_0000_0020_0005;

/// CCMD, ICC, global.
pub const CCMD_GLOBAL: u64 = 0xA000_0000_0000_0000;

/// CCMD, ICC, device, FM 2, SID 0x0108, DID 7.
pub const CCMD_DEVICE: u64 = 0xE000_0002_0108_0007;

/// IOTLB, IVT, domain, DR, DW, DID 0x42.
pub const IOTLB_DOMAIN: u64 = 0xA003_0042_0000_0000;

/// IVA, address 0x1234_0000, AM 4, IH.
pub const IVA: u64 = 0x0000_0000_1234_0044;

/// GSTS with TES, RTPS, QIES, IRES and IRTPS.
pub const GSTS: u32 = 0xC700_0000;
/// What goes to GCMD for a write-buffer flush (WBF) while GSTS is [`GSTS`].
pub const GCMD_FLUSH: u32 = 0x8E00_0000;
/// What goes to GCMD to turn IRE off while GSTS is [`GSTS`].
pub const GCMD_WITHOUT_IRE: u32 = 0x8400_0000;

/// FSTS with PPF and FRI 5.
pub const FSTS: u32 = 0x0000_0502;

#[cfg(test)]
mod tests {
    use super::*;

    /// A field, by its highest and lowest bit in the whole structure, and its value.
    type Field = (u32, u32, u64);

    #[test]
    fn each_structure_is_the_sum_of_its_fields() {
        let structures: &[(&[u64], &[Field])] = &[
            (&SCALABLE_ROOT, &[(0, 0, 0x1), (63, 12, 0x10), (64, 64, 0x1), (127, 76, 0x11)]),
            (&SCALABLE_ROOT_UPPER, &[(64, 64, 0x1), (127, 76, 0xfedcba)]),
            (
                &SCALABLE_CONTEXT,
                &[(0, 0, 0x1), (2, 2, 0x1), (3, 3, 0x1), (4, 4, 0x1), (11, 9, 0x2), (63, 12, 0x2468a)],
            ),
            (
                &SCALABLE_CONTEXT_RID_PASID,
                &[(0, 0, 0x1), (3, 3, 0x1), (11, 9, 0x7), (63, 12, 0x3), (83, 64, 0xfffff), (84, 84, 0x1)],
            ),
            (&[PASID_DIRECTORY], &[(0, 0, 0x1), (63, 12, 0x7777)]),
            (&[PASID_DIRECTORY_FPD], &[(1, 1, 0x1)]),
            (
                &PASID_FIRST_STAGE,
                &[
                    (0, 0, 0x1),
                    (4, 2, 0x2),
                    (8, 6, 0x1),
                    (79, 64, 0x6),
                    (87, 87, 0x1),
                    (128, 128, 0x1),
                    (132, 132, 0x1),
                    (191, 140, 0x55555),
                ],
            ),
            (
                &PASID_NESTED,
                &[
                    (0, 0, 0x1),
                    (4, 2, 0x3),
                    (8, 6, 0x3),
                    (63, 12, 0x800),
                    (79, 64, 0x1001),
                    (128, 128, 0x1),
                    (131, 130, 0x1),
                    (132, 132, 0x1),
                    (191, 140, 0x900),
                ],
            ),
            (
                &PASID_FIRST_STAGE_5_LEVELS,
                &[
                    (0, 0, 0x1),
                    (4, 2, 0x3),
                    (8, 6, 0x1),
                    (79, 64, 0xabc),
                    (88, 88, 0x1),
                    (128, 128, 0x1),
                    (131, 130, 0x1),
                    (135, 135, 0x1),
                    (191, 140, 0x1),
                ],
            ),
            (&[FIRST_STAGE_TABLE], &[(0, 0, 0x1), (1, 1, 0x1), (2, 2, 0x1), (5, 5, 0x1), (51, 12, 0xabc)]),
            (
                &[FIRST_STAGE_PAGE],
                &[
                    (0, 0, 0x1),
                    (1, 1, 0x1),
                    (2, 2, 0x1),
                    (5, 5, 0x1),
                    (6, 6, 0x1),
                    (63, 63, 0x1),
                    (51, 12, 0xdef),
                ],
            ),
            (&CONTEXT_GLOBAL, &[(3, 0, 0x1), (5, 4, 0x1)]),
            (&CONTEXT_DEVICE, &[(3, 0, 0x1), (5, 4, 0x3), (31, 16, 0x7), (47, 32, 0x3fa)]),
            (&INTERRUPT_GLOBAL, &[(3, 0, 0x4)]),
            (&INTERRUPT_INDEX, &[(3, 0, 0x4), (4, 4, 0x1), (31, 27, 0x3), (47, 32, 0x1230)]),
            (&WAIT_STATUS, &[(3, 0, 0x5), (5, 5, 0x1), (63, 32, 0x2), (127, 66, 0x4000010)]),
            (&WAIT_INTERRUPT, &[(3, 0, 0x5), (4, 4, 0x1)]),
            (&WAIT_FENCE, &[(3, 0, 0x5), (6, 6, 0x1)]),
            (
                &WAIT_DRAIN,
                &[(3, 0, 0x5), (5, 5, 0x1), (6, 6, 0x1), (7, 7, 0x1), (63, 32, 0x1), (127, 66, 0x2402)],
            ),
            (&PASID_IOTLB_ALL, &[(3, 0, 0x6), (5, 4, 0x2), (31, 16, 0x10), (51, 32, 0x12345)]),
            (
                &PASID_IOTLB_PAGES,
                &[(3, 0, 0x6), (5, 4, 0x3), (31, 16, 0x10), (51, 32, 0x1), (69, 64, 0x9), (127, 76, 0x200)],
            ),
            (&PASID_CACHE_DOMAIN, &[(3, 0, 0x7), (31, 16, 0x11)]),
            (&PASID_CACHE_PASID, &[(3, 0, 0x7), (5, 4, 0x1), (31, 16, 0x11), (51, 32, 0xabcde)]),
            (&PASID_CACHE_GLOBAL, &[(3, 0, 0x7), (5, 4, 0x3)]),
            (
                &PASID_DEVICE_TLB_PAGE,
                &[
                    (3, 0, 0x8),
                    (8, 4, 0x8),
                    (31, 16, 0x108),
                    (51, 32, 0x5),
                    (63, 52, 0x10),
                    (127, 76, 0xffff800000001),
                ],
            ),
            (
                &PASID_DEVICE_TLB_ALL,
                &[
                    (3, 0, 0x8),
                    (31, 16, 0xfa),
                    (51, 32, 0x12345),
                    (15, 12, 0x9),
                    (63, 52, 0xf),
                    (75, 75, 0x1),
                    (127, 76, 0x7ffffffffffff),
                ],
            ),
            (
                &PASID_DEVICE_TLB_2M,
                &[
                    (3, 0, 0x8),
                    (31, 16, 0x200),
                    (51, 32, 0x7),
                    (63, 52, 0x20),
                    (64, 64, 0x1),
                    (75, 75, 0x1),
                    (127, 76, 0x400ff),
                ],
            ),
            (&PAGE_GROUP_RESPONSE, &[(3, 0, 0x9), (4, 4, 0x1), (31, 16, 0x20), (51, 32, 0x5), (75, 67, 0x2)]),
            (
                &PAGE_REQUEST,
                &[
                    (7, 0, 0x1),
                    (31, 16, 0x20),
                    (64, 64, 0x1),
                    (66, 66, 0x1),
                    (75, 67, 0x2),
                    (127, 76, 0x4000000),
                    (8, 8, 0x1),
                    (51, 32, 0x5),
                ],
            ),
            (
                &PAGE_REQUEST_PRIVILEGED,
                &[
                    (7, 0, 0x1),
                    (31, 16, 0x108),
                    (64, 64, 0x1),
                    (65, 65, 0x1),
                    (75, 67, 0x1ff),
                    (53, 53, 0x1),
                    (127, 76, 0x7f0000001),
                    (8, 8, 0x1),
                    (51, 32, 0x12345),
                ],
            ),
            (
                &PAGE_REQUEST_WITHOUT_PASID,
                &[
                    (7, 0, 0x1),
                    (31, 16, 0x300),
                    (65, 65, 0x1),
                    (66, 66, 0x1),
                    (75, 67, 0x3),
                    (127, 76, 0x12345),
                ],
            ),
            (&STOP_MARKER, &[(7, 0, 0x1), (31, 16, 0x20), (66, 66, 0x1), (8, 8, 0x1), (51, 32, 0x5)]),
            (&FAULT_WRITE, &[(63, 12, 0x12345), (79, 64, 0x108), (103, 96, 0x5), (127, 127, 0x1)]),
            (
                &FAULT_READ_PASID,
                &[
                    (63, 12, 0xffff800000001),
                    (79, 64, 0xfa),
                    (93, 93, 0x1),
                    (103, 96, 0x79),
                    (126, 126, 0x1),
                    (127, 127, 0x1),
                    (95, 95, 0x1),
                    (123, 104, 0x12345),
                ],
            ),
            (
                &FAULT_PAGE_REQUEST,
                &[
                    (63, 12, 0x4000000),
                    (79, 64, 0x20),
                    (92, 92, 0x1),
                    (103, 96, 0x47),
                    (127, 127, 0x1),
                    (95, 95, 0x1),
                    (123, 104, 0x5),
                ],
            ),
            (
                &FAULT_ATOMIC,
                &[
                    (63, 12, 0x10),
                    (79, 64, 0x300),
                    (92, 92, 0x1),
                    (103, 96, 0x86),
                    (126, 126, 0x1),
                    (127, 127, 0x1),
                ],
            ),
            (
                &FAULT_TRANSLATION_REQUEST,
                &[
                    (63, 12, 0xa),
                    (79, 64, 0x108),
                    (103, 96, 0x44),
                    (125, 124, 0x1),
                    (126, 126, 0x1),
                    (127, 127, 0x1),
                ],
            ),
            (&FAULT_INTERRUPT, &[(63, 48, 0x1234), (79, 64, 0xf0f8), (103, 96, 0x26), (127, 127, 0x1)]),
            (
                &REMAP_X2APIC,
                &[(0, 0, 0x1), (23, 16, 0x41), (63, 32, 0x1234_5678), (79, 64, 0x108), (83, 82, 0x1)],
            ),
            (
                &REMAP_XAPIC,
                &[
                    (0, 0, 0x1),
                    (2, 2, 0x1),
                    (3, 3, 0x1),
                    (4, 4, 0x1),
                    (7, 5, 0x1),
                    (23, 16, 0x30),
                    (47, 40, 0xf),
                    (79, 64, 0xf0f8),
                    (83, 82, 0x1),
                ],
            ),
            (
                &REMAP_BUSES,
                &[
                    (0, 0, 0x1),
                    (1, 1, 0x1),
                    (23, 16, 0x55),
                    (63, 32, 0x7),
                    (71, 64, 0x05),
                    (79, 72, 0x02),
                    (83, 82, 0x2),
                ],
            ),
            (
                &REMAP_FUNCTIONS,
                &[(0, 0, 0x1), (23, 16, 0x66), (63, 32, 0x1), (79, 64, 0x200), (81, 80, 0x3), (83, 82, 0x1)],
            ),
            (
                &REMAP_POSTED,
                &[
                    (0, 0, 0x1),
                    (14, 14, 0x1),
                    (15, 15, 0x1),
                    (23, 16, 0xf2),
                    (63, 38, 0x2345_6780 >> 6),
                    (79, 64, 0x108),
                    (83, 82, 0x1),
                    (127, 96, 0x1),
                ],
            ),
            (&[PIN_LEVEL], &[(7, 0, 0x31), (13, 13, 0x1), (15, 15, 0x1), (48, 48, 0x1), (63, 49, 0x1234)]),
            (&[PIN_MASKED], &[(7, 0, 0x52), (11, 11, 0x1), (16, 16, 0x1), (48, 48, 0x1), (63, 49, 0x1)]),
            (&[MESSAGE], &[(31, 20, 0xfee), (19, 5, 0x5), (4, 4, 0x1)]),
            (&[MESSAGE_SUBHANDLE], &[(31, 20, 0xfee), (19, 5, 0x5), (4, 4, 0x1), (3, 3, 0x1)]),
            (&[MESSAGE_HIGH], &[(31, 20, 0xfee), (19, 5, 0x1), (4, 4, 0x1), (3, 3, 0x1), (2, 2, 0x1)]),
            (&[MESSAGE_LAST], &[(31, 20, 0xfee), (19, 5, 0x7fff), (4, 4, 0x1), (2, 2, 0x1)]),
            (&[RTADDR_SCALABLE], &[(11, 10, 0x1), (63, 12, 0x5)]),
            (&[RTADDR_ABORT], &[(11, 10, 0x3), (63, 12, 0x5)]),
            (&[IQA_256_BITS], &[(11, 11, 0x1), (63, 12, 0x6)]),
            (&[IQA_128_BITS], &[(2, 0, 0x7), (63, 12, 0x80)]),
            (&[IRTA], &[(3, 0, 0xf), (11, 11, 0x1), (63, 12, 0x100)]),
            (&[PQA], &[(2, 0, 0x5), (63, 12, 0x200)]),
            (&[CCMD_GLOBAL], &[(63, 63, 0x1), (62, 61, 0x1)]),
            (&[CCMD_DEVICE], &[(63, 63, 0x1), (62, 61, 0x3), (33, 32, 0x2), (31, 16, 0x108), (15, 0, 0x7)]),
            (&[IOTLB_DOMAIN], &[(63, 63, 0x1), (61, 60, 0x2), (48, 48, 0x1), (49, 49, 0x1), (47, 32, 0x42)]),
            (&[IVA], &[(5, 0, 0x4), (6, 6, 0x1), (63, 12, 0x12340)]),
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

    #[test]
    fn a_command_carries_the_levels_that_are_on_and_one_change() {
        let (te, ire, qie, wbf) = (1 << 31, 1 << 25, 1 << 26, 1 << 27);

        // RTPS and IRTPS are one-shot commands, so they are not carried over.
        assert_eq!(GSTS, te | qie | ire | 1 << 30 | 1 << 24);
        assert_eq!(GCMD_FLUSH, te | qie | ire | wbf);
        assert_eq!(GCMD_WITHOUT_IRE, te | qie);
        assert_eq!(FSTS, 1 << 1 | 5 << 8);
    }
}
