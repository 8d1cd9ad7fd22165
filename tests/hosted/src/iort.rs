//! Two `IORT` tables, written by hand, field by field.
//!
//! Layouts: ACPICA's `actbl2.h` and EDK2's `IoRemappingTable.h`, which agree in every field used here, for
//! Arm DEN 0049 up to revision E.e; and the fact sheet, section 10.1. The first word of a node is type |
//! length << 8 | revision << 24.

/// Bytes of words, little-endian.
pub fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A header (ACPI's 36 bytes, then the number of nodes and where the first is), and the nodes.
pub fn table(revision: u8, count: u32, nodes: &[u32]) -> Vec<u8> {
    let mut table = b"IORT".to_vec();
    table.extend_from_slice(&(48 + nodes.len() as u32 * 4).to_le_bytes());
    // Revision and checksum; OEM's names and revisions.
    table.extend_from_slice(&[revision, 0]);
    table.extend_from_slice(&[b'x'; 26]);
    table.extend_from_slice(&bytes(&[count, 48, 0]));
    table.extend_from_slice(&bytes(nodes));
    table
}

/// What QEMU describes of `virt` with an SMMUv3 (notes on QEMU): event 0x6A, PRI 0x6B, errors 0x6D, sync
/// 0x6C; bus 0 goes through the unit, and all others do not.
pub const QEMU: &[&[u32]] = &[
    // 0x30: ITS group, 24 bytes, revision 1; no mappings; one identifier, 0.
    &[0x0100_1800, 0, 0, 0, 1, 0],
    // 0x48: SMMUv3, 88 bytes, revision 4; one mapping, at 68.
    &[0x0400_5804, 1, 1, 68],
    // Base, flags (COHACC override), reserved, VATOS, model, event, PRI, errors, sync, proximity, index.
    &[0x0905_0000, 0, 1, 0, 0, 0, 0, 0x6A, 0x6B, 0x6D, 0x6C, 0, 0],
    // IDs 0 to 0xFFFF (the field holds one less than their number), output 0 of the node at 0x30.
    &[0, 0xFFFF, 0, 0x30, 0],
    // 0xA0: root complex, 76 bytes, revision 3; two mappings, at 36. Coherent; CPM and DACS; no ATS; segment
    // 0; 64 bits.
    &[0x0300_4C02, 2, 2, 36, 1, 0x0300_0000, 0, 0, 64],
    &[0, 0xFF, 0, 0x48, 0],
    &[0x100, 0xFEFF, 0x100, 0x30, 0],
];

/// Where the nodes of [`EVERYTHING`] are.
pub const OFFSETS: [usize; 12] =
    [0x30, 0x48, 0x64, 0xD0, 0x120, 0x184, 0x1BC, 0x220, 0x278, 0x2A0, 0x2B4, 0x2E8];

/// A table with every type of node up to revision E.e, two units, and revisions old and new.
pub const EVERYTHING: &[&[u32]] = &[
    // 0x30 and 0x48: ITS groups of one identifier, 0, and of two, 1 and 2.
    &[0x0100_1800, 0, 0, 0, 1, 0],
    &[0x0100_1C00, 1, 0, 0, 2, 1, 2],
    // 0x64: SMMUv3, 108 bytes, revision 5, two mappings at 68. Flags: COHACC 1, HTTU 2 << 1, proximity 1 <<
    // 3, index 1 << 4. It interrupts by messages: no GSIVs. Proximity 3, index 1.
    &[0x0500_6C04, 2, 2, 68],
    &[0x2B40_0000, 0, 0x1D, 0, 0, 0, 0, 0, 0, 0, 0, 3, 1],
    &[0, 0xFFFF, 0, 0x30, 0],
    // Single, for itself: DeviceID 0x8000_0007 of the second group.
    &[0, 0, 0x8000_0007, 0x48, 1],
    // 0xD0: SMMUv3, 80 bytes, revision 0, which ends after sync; one mapping at 60. Model 2, wires 0x40 to
    // 0x43.
    &[0x0000_5004, 3, 1, 60],
    &[0x4000_0000, 1, 0, 0, 0, 0, 2, 0x40, 0x41, 0x42, 0x43],
    &[0, 0xFFFF, 0x2_0000, 0x48, 0],
    // 0x120: root complex, 100 bytes, revision 4, three mappings at 40. ATS 1, PRI 2, PASIDs 4; segment 1; 48
    // bits (byte 32), 20 bits of PASID (bytes 33 and 34); flags.
    &[0x0400_6402, 4, 3, 40, 1, 0x0300_0000, 7, 1, 0x0000_1430, 0],
    &[0, 0xFF, 0x100, 0x64, 0],
    &[0x100, 0xFF, 0, 0xD0, 0],
    &[0x200, 0xFF, 0x200, 0x30, 0],
    // 0x184: root complex, 56 bytes, revision 1, one mapping at 36: single, stream 0x55. Segment 0; not
    // coherent; 40 bits.
    &[0x0100_3802, 5, 1, 36, 0, 0, 0, 0, 40],
    &[0, 1, 0x55, 0xD0, 1],
    // 0x1BC: named component, 100 bytes, revision 4, three mappings at 40. Stalls 1, PASIDs of 8 bits 8 << 1;
    // coherent; 44 bits (byte 28), then the name `\_SB.DMA0`.
    &[0x0400_6401, 6, 3, 40, 0x11, 1, 0x0100_0000],
    &[0x535F_5C2C, 0x4D44_2E42, 0x0000_3041],
    &[0, 0, 0x300, 0x64, 1],
    &[0, 0, 0x99, 0x48, 1],
    &[0, 3, 0x310, 0xD0, 0],
    // 0x220: RMR, 88 bytes, revision 3, one mapping at 28: streams 0x104 and 0x105. Flags: remap 1,
    // privileged 2, write-back 5 << 2. Two regions at 48.
    &[0x0300_5806, 7, 1, 28, 0x17, 2, 48],
    &[0, 1, 0x104, 0x64, 0],
    &[0x8000_0000, 0, 0x2_0000, 0, 0],
    &[0x9000_0000, 1, 0x1_0000, 0, 0],
    // 0x278: PMCG, 40 bytes, revision 2: page 0, interrupt, the node that it counts for, page 1.
    &[0x0200_2805, 8, 0, 0, 0x2B42_0000, 0, 0x50, 0x64, 0x2B43_0000, 0],
    // 0x2A0: SMMUv2, cut down to 20 bytes: nobody reads it.
    &[0x0300_1403, 9, 0, 0, 0xFFFF_FFFF],
    // 0x2B4: root complex, 52 bytes, revision 0, which ends after the segment, 2; one mapping at 32.
    &[0x0000_3402, 10, 1, 32, 1, 0, 1, 2],
    &[0, 0xFFFF, 0, 0x2A0, 0],
];
