//! The ACPI table `DMAR` against tables made by hand.
//!
//! Bytes are from the VT-d specification's chapter "BIOS Considerations": type and length in two bytes each,
//! then the fields that each comment names, low byte first. A scope entry is type, length, flags, reserved,
//! enumeration ID, start bus, then pairs of device and function.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use iommu::{PhysAddr, StreamId};
use std::{cell::Cell, ops::RangeInclusive};
use vtd::dmar::{Ats, Dmar, Error, Region, Requester, Reserved, ScopeKind, Structure, Unit, UsedByFirmware};

/// A header: signature, length, 28 bytes of ACPI's, host address width less one, flags, ten reserved bytes.
fn table_with(address_bits: u8, flags: u8, structures: &[&[u8]]) -> Vec<u8> {
    let mut table = [b"DMAR".as_slice(), &[0; 32], &[address_bits - 1, flags], &[0; 10]].concat();
    table.extend(structures.concat());
    set_length(&mut table);
    table
}

fn table(structures: &[&[u8]]) -> Vec<u8> {
    table_with(39, 1, structures)
}

fn set_length(table: &mut [u8]) {
    let length = table.len() as u32;
    table[4..8].copy_from_slice(&length.to_le_bytes());
}

fn device(bus: u8, device: u8, function: u8) -> Requester {
    Requester::new(0, bus, device, function)
}

fn read(table: &[u8]) -> Dmar<'_> {
    Dmar::new(table).expect("a DMAR table without a mistake")
}

type Buses = Option<RangeInclusive<u8>>;

/// No bridge leads anywhere.
fn nowhere(_: Requester) -> Buses {
    None
}

/// Registers of a unit, of which there is one at each address.
fn base(unit: Option<Unit<'_>>) -> Option<u64> {
    unit.map(|unit| unit.base.0)
}

fn bases(regions: impl Iterator<Item = Region<'static>>) -> Vec<u64> {
    regions.map(|region| region.base.0).collect()
}

// QEMU 11.1.3, `q35` with `intel-iommu,intremap=on,device-iotlb=on`, a root port on bus 0 and one on an
// expander bus 0x10.

/// A unit at 0xFED9_0000: no flags, one page, segment 0.
const QEMU_UNIT: [u8; 16] = [0, 0, 56, 0, 0, 0, 0, 0, 0x00, 0x00, 0xD9, 0xFE, 0, 0, 0, 0];
/// I/O APIC 0 as ff:00.0; endpoint 00:00.0; bridge 00:01.0; endpoint 00:04.0; bridge 10:00.0.
const QEMU_SCOPES: [u8; 40] = [
    3, 8, 0, 0, 0, 0xFF, 0, 0, 1, 8, 0, 0, 0, 0, 0, 0, 2, 8, 0, 0, 0, 0, 1, 0, 1, 8, 0, 0, 0, 0, 4, 0, 2, 8,
    0, 0, 0, 0x10, 0, 0,
];
/// ATS on all root ports of segment 0.
const ALL_PORTS: [u8; 8] = [2, 0, 8, 0, 1, 0, 0, 0];

fn qemu() -> Vec<u8> {
    table_with(48, 1, &[&QEMU_UNIT, &QEMU_SCOPES, &ALL_PORTS])
}

/// 00:01.0 leads to bus 1, 10:00.0 to buses 0x11 and 0x12.
fn qemu_buses(bridge: Requester) -> Buses {
    match bridge.id.0 {
        0x0008 => Some(1..=1),
        0x1000 => Some(0x11..=0x12),
        _ => None,
    }
}

// A laptop: a unit for graphics with its stolen memory, a unit for the rest.

/// A unit at 0xFED9_0000: no flags, 2^3 pages, segment 0; endpoint 00:02.0.
const GRAPHICS: [u8; 24] =
    [0, 0, 24, 0, 0x00, 3, 0, 0, 0x00, 0x00, 0xD9, 0xFE, 0, 0, 0, 0, 1, 8, 0, 0, 0, 0, 2, 0];
/// The unit for all the rest at 0xFED9_1000; I/O APIC 2 as f0:1e.7, timer 0 as f0:1e.6.
const REST: [u8; 32] = [
    0, 0, 32, 0, 0x01, 0, 0, 0, 0x00, 0x10, 0xD9, 0xFE, 0, 0, 0, 0, 3, 8, 0, 0, 2, 0xF0, 0x1E, 7, 4, 8, 0, 0,
    0, 0xF0, 0x1E, 6,
];
/// 0x7B80_0000 to 0x7FFF_FFFF for the graphics at 00:02.0.
const STOLEN: [u8; 32] = [
    1, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x7B, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0x7F, 0, 0, 0, 0, 1, 8, 0, 0, 0,
    0, 2, 0,
];
/// 0x7000_0000 to 0x7000_FFFF for 00:14.0 and 00:1d.0.
const USB: [u8; 40] = [
    1, 0, 40, 0, 0, 0, 0, 0, 0, 0, 0, 0x70, 0, 0, 0, 0, 0xFF, 0xFF, 0, 0x70, 0, 0, 0, 0, 1, 8, 0, 0, 0, 0,
    0x14, 0, 1, 8, 0, 0, 0, 0, 0x1D, 0,
];
/// 0x7000_8000 to 0x7001_7FFF for 00:14.0: overlaps the one before.
const USB_MORE: [u8; 32] = [
    1, 0, 32, 0, 0, 0, 0, 0, 0, 0x80, 0, 0x70, 0, 0, 0, 0, 0xFF, 0x7F, 1, 0x70, 0, 0, 0, 0, 1, 8, 0, 0, 0, 0,
    0x14, 0,
];

fn laptop() -> Vec<u8> {
    table(&[&GRAPHICS, &REST, &STOLEN, &USB, &USB_MORE])
}

// A server: two segments, bridges behind bridges, and every type of structure.

/// A unit at 0x12_FED9_1000, segment 1: everything behind 00:1c.0 of bus 0x40, and a function two bridges
/// down: 40:01.0, on the bus behind it 00.0, on the bus behind that 03.1.
const FAR: [u8; 36] = [
    0, 0, 36, 0, 0x00, 0, 1, 0, 0x00, 0x10, 0xD9, 0xFE, 0x12, 0, 0, 0, 2, 8, 0, 0, 0, 0x40, 0x1C, 0, 1, 12,
    0, 0, 0, 0x40, 1, 0, 0, 0, 3, 1,
];
/// The rest of segment 1, at 0x12_FED9_2000; the ACPI device 3 as 40:15.0.
const FAR_REST: [u8; 24] =
    [0, 0, 24, 0, 0x01, 0, 1, 0, 0x00, 0x20, 0xD9, 0xFE, 0x12, 0, 0, 0, 5, 8, 0, 0, 3, 0x40, 0x15, 0];
/// The rest of segment 0, at 0xFED9_1000; no scopes.
const NEAR_REST: [u8; 16] = [0, 0, 16, 0, 0x01, 0, 0, 0, 0x00, 0x10, 0xD9, 0xFE, 0, 0, 0, 0];
/// ATS on the root ports 40:01.0 and 40:1c.0 of segment 1.
const TWO_PORTS: [u8; 24] =
    [2, 0, 24, 0, 0, 0, 1, 0, 2, 8, 0, 0, 0, 0x40, 1, 0, 2, 8, 0, 0, 0, 0x40, 0x1C, 0];
/// The unit at 0x12_FED9_1000 is near memory of domain 0x0203.
const NEAR: [u8; 20] = [3, 0, 20, 0, 0, 0, 0, 0, 0x00, 0x10, 0xD9, 0xFE, 0x12, 0, 0, 0, 3, 2, 0, 0];
/// ACPI device 3 is `\_SB.D`, and two bytes more after the zero.
const NAME: [u8; 17] = [4, 0, 17, 0, 0, 0, 0, 3, b'\\', b'_', b'S', b'B', b'.', b'D', 0, 0xAA, 0xBB];
/// 40:02.0 of segment 1 works only with ATS; 40:03.0 may.
const SOC_REQUIRED: [u8; 16] = [5, 0, 16, 0, 1, 0, 1, 0, 1, 8, 0, 0, 0, 0x40, 2, 0];
const SOC_ALLOWED: [u8; 16] = [5, 0, 16, 0, 0, 0, 1, 0, 1, 8, 0, 0, 0, 0x40, 3, 0];
/// 40:02.0 of segment 1 has the properties 5.
const PROPERTIES: [u8; 16] = [6, 0, 16, 0, 0, 0, 1, 0, 1, 8, 5, 0, 0, 0x40, 2, 0];
/// A type that there is not, with an odd length.
const UNKNOWN: [u8; 5] = [0x7F, 0, 5, 0, 0xEE];

fn server() -> Vec<u8> {
    let structures: [&[u8]; 10] = [
        &FAR,
        &FAR_REST,
        &UNKNOWN,
        &NEAR_REST,
        &TWO_PORTS,
        &NEAR,
        &NAME,
        &SOC_REQUIRED,
        &SOC_ALLOWED,
        &PROPERTIES,
    ];
    table(&structures)
}

/// Segment 1: 40:01.0 leads to buses 0x41 to 0x44, of which 41:00.0 to 0x43 and 0x44; 40:1c.0 leads to 0x50
/// to 0x5F.
fn server_buses(bridge: Requester) -> Buses {
    match (bridge.segment, bridge.id.0) {
        (1, 0x4008) => Some(0x41..=0x44),
        (1, 0x4100) => Some(0x43..=0x44),
        (1, 0x40E0) => Some(0x50..=0x5F),
        _ => None,
    }
}

fn far(bus: u8, device: u8, function: u8) -> Requester {
    Requester::new(1, bus, device, function)
}

fn golden() -> [Vec<u8>; 3] {
    [qemu(), laptop(), server()]
}

mod structures {
    use super::*;

    #[test]
    fn qemu_describes_one_unit_and_ats_on_all_ports() {
        let table = qemu();
        let dmar = read(&table);

        assert_eq!(dmar.address_bits(), 48);
        let found: Vec<_> = dmar.structures().collect();
        let [Structure::Unit(unit), Structure::Atsr { segment: 0, all_ports: true, scopes }] = found[..]
        else {
            panic!("{found:?}")
        };
        assert_eq!((unit.base, unit.bytes, unit.segment), (PhysAddr(0xFED9_0000), 4096, 0));
        assert!(!unit.include_pci_all);
        let kinds: Vec<_> = unit.scopes.map(|scope| (scope.kind, scope.start_bus)).collect();
        let [apic, endpoint, bridge] = [ScopeKind::IoApic, ScopeKind::Endpoint, ScopeKind::Bridge];
        assert_eq!(kinds, [(apic, 0xFF), (endpoint, 0), (bridge, 0), (endpoint, 0), (bridge, 0x10)]);
        assert_eq!(scopes.count(), 0);
    }

    #[test]
    fn every_type_says_what_its_bytes_say() {
        let table = server();
        let found: Vec<_> = read(&table).structures().collect();

        assert_eq!(found.len(), 10);
        let Structure::Unit(unit) = found[0] else { panic!("{found:?}") };
        assert_eq!((unit.base, unit.segment), (PhysAddr(0x12_FED9_1000), 1));
        assert_eq!(found[2], Structure::Other(0x7F));
        let Structure::Unit(rest) = found[3] else { panic!("{found:?}") };
        assert!(rest.include_pci_all && rest.scopes.count() == 0);
        let Structure::Atsr { segment: 1, all_ports: false, scopes } = found[4] else { panic!("{found:?}") };
        assert_eq!(scopes.count(), 2);
        assert_eq!(found[5], Structure::Rhsa { base: PhysAddr(0x12_FED9_1000), domain: 0x0203 });
        assert_eq!(found[6], Structure::Andd { number: 3, name: br"\_SB.D" });
        assert!(matches!(found[7], Structure::Satc { segment: 1, required: true, .. }));
        assert!(matches!(found[8], Structure::Satc { segment: 1, required: false, .. }));
        let Structure::Sidp { segment: 1, scopes } = found[9] else { panic!("{found:?}") };
        assert_eq!(scopes.map(|scope| scope.flags).collect::<Vec<_>>(), [5]);
    }

    #[test]
    fn a_region_ends_behind_its_limit() {
        let table = laptop();
        let region = read(&table).structures().find_map(|structure| match structure {
            Structure::Region(region) => Some(region),
            _ => None,
        });

        let region = region.expect("stolen memory");
        assert_eq!(region.range(), PhysAddr(0x7B80_0000)..PhysAddr(0x8000_0000));
    }

    #[test]
    fn flags_of_the_header_are_told_one_by_one() {
        // Discrepancy 21: bit 2 is the platform's wish for protection, not x2APIC.
        for (flags, expected) in
            [(1, [true, false, false]), (2, [false, true, false]), (4, [false, false, true])]
        {
            let table = table_with(39, flags, &[]);
            let dmar = read(&table);

            assert_eq!(
                [dmar.remaps_interrupts(), dmar.refuses_x2apic(), dmar.asks_for_protection()],
                expected
            );
        }
    }

    #[test]
    fn a_size_of_zero_is_one_page_as_in_older_tables() {
        // Discrepancy 20.
        let table = laptop();
        let sizes: Vec<_> = read(&table).units().map(|unit| unit.bytes).collect();

        assert_eq!(sizes, [8 * 4096, 4096]);
    }

    #[test]
    fn a_scope_of_an_unknown_kind_is_skipped_by_its_length() {
        // Kind 9 with three bytes after its fixed part; then endpoint 00:02.0.
        let mut unit = GRAPHICS.to_vec();
        unit.splice(16..16, [9, 9, 0, 0, 0, 0, 0xFF, 0xFF, 0xFF]);
        unit[2] += 9;
        let table = table(&[&unit]);
        let dmar = read(&table);

        let kinds: Vec<_> = dmar.units().flat_map(|unit| unit.scopes).map(|scope| scope.kind).collect();
        assert_eq!(kinds, [ScopeKind::Other(9), ScopeKind::Endpoint]);
        assert_eq!(base(dmar.unit_of(device(0, 2, 0), nowhere)), Some(0xFED9_0000));
    }

    #[test]
    fn bytes_behind_the_length_of_the_header_are_not_the_tables() {
        let mut table = laptop();
        let whole: Vec<u8> = table.clone();
        table.extend([0xFF; 7]);

        assert!(read(&table).structures().eq(read(&whole).structures()));
    }
}

mod units {
    use super::*;

    #[test]
    fn a_device_belongs_to_the_unit_that_claims_it_else_to_the_one_for_the_rest() {
        let table = laptop();
        let dmar = read(&table);

        assert_eq!(base(dmar.unit_of(device(0, 2, 0), nowhere)), Some(0xFED9_0000));
        for other in [device(0, 0, 0), device(0, 0x1F, 7), device(0xFF, 2, 0)] {
            assert_eq!(base(dmar.unit_of(other, nowhere)), Some(0xFED9_1000), "{other:?}");
        }
    }

    #[test]
    fn a_unit_of_qemu_claims_functions_root_ports_and_what_is_behind_them() {
        let table = qemu();
        let dmar = read(&table);

        for claimed in [
            device(0, 0, 0),
            device(0, 1, 0),
            device(0, 4, 0),
            device(1, 9, 3),
            device(0x10, 0, 0),
            device(0x12, 0, 0),
        ] {
            assert_eq!(base(dmar.unit_of(claimed, qemu_buses)), Some(0xFED9_0000), "{claimed:?}");
        }
        for free in
            [device(0, 2, 0), device(0, 4, 1), device(0x10, 1, 0), device(0x13, 0, 0), device(2, 0, 0)]
        {
            assert_eq!(dmar.unit_of(free, qemu_buses), None, "{free:?}");
        }
    }

    #[test]
    fn with_default_bus_bypass_of_qemu_no_device_has_a_unit() {
        // Only the scope of the I/O APIC is left.
        let mut unit = QEMU_UNIT;
        unit[2] = 24;
        let table = table(&[&unit, &QEMU_SCOPES[..8]]);
        let dmar = read(&table);

        for function in 0..8 {
            assert_eq!(dmar.unit_of(device(0, 1, function), qemu_buses), None);
        }
        assert_eq!(dmar.unit_of(device(0xFF, 0, 0), qemu_buses), None, "an I/O APIC is no device");
    }

    #[test]
    fn asterinas_3920_the_last_unit_is_not_the_only_one() {
        let (laptop, server) = (laptop(), server());

        let units = |table| read(table).units().map(|unit| unit.base.0).collect::<Vec<_>>();
        assert_eq!(units(&laptop), [0xFED9_0000, 0xFED9_1000]);
        assert_eq!(units(&server), [0x12_FED9_1000, 0x12_FED9_2000, 0xFED9_1000]);
    }

    #[test]
    fn acrn_4143_each_step_of_a_path_is_on_the_bus_behind_the_bridge_before() {
        let table = server();
        let dmar = read(&table);

        // 40:01.0 leads to bus 0x41, and 41:00.0 to bus 0x43.
        assert_eq!(base(dmar.unit_of(far(0x43, 3, 1), server_buses)), Some(0x12_FED9_1000));
        for other in [far(0x40, 3, 1), far(0x41, 3, 1), far(0, 3, 1), far(0x43, 3, 0), far(0x43, 1, 0)] {
            assert_eq!(base(dmar.unit_of(other, server_buses)), Some(0x12_FED9_2000), "{other:?}");
        }
    }

    #[test]
    fn acrn_4150_a_bridge_claims_itself_and_each_bus_behind_it() {
        let table = server();
        let dmar = read(&table);

        for bus in 0x40..=0x60 {
            let expected = if (0x50..=0x5F).contains(&bus) { 0x12_FED9_1000 } else { 0x12_FED9_2000 };
            assert_eq!(base(dmar.unit_of(far(bus, 0, 0), server_buses)), Some(expected), "bus {bus:#x}");
        }
        assert_eq!(base(dmar.unit_of(far(0x40, 0x1C, 0), server_buses)), Some(0x12_FED9_1000), "itself");
        assert_eq!(base(dmar.unit_of(far(0x40, 0x1C, 1), server_buses)), Some(0x12_FED9_2000));
    }

    #[test]
    fn acrn_4979_the_unit_for_the_rest_takes_nothing_from_others_where_firmware_lists_it_first() {
        let table = table(&[&REST, &GRAPHICS]);

        assert_eq!(base(read(&table).unit_of(device(0, 2, 0), nowhere)), Some(0xFED9_0000));
        assert_eq!(base(read(&table).unit_of(device(0, 3, 0), nowhere)), Some(0xFED9_1000));
    }

    #[test]
    fn acrn_5907_each_segment_has_a_unit_for_its_own_rest() {
        let table = server();
        let dmar = read(&table);

        let rest = |segment| base(dmar.unit_of(Requester::new(segment, 9, 9, 1), server_buses));
        assert_eq!([rest(0), rest(1), rest(2)], [Some(0xFED9_1000), Some(0x12_FED9_2000), None]);
        // The same requester ID on another segment is another device.
        let claimed = device(0x50, 0, 0);
        assert_eq!(base(dmar.unit_of(claimed, |_| Some(0x50..=0x5F))), Some(0xFED9_1000));
    }

    #[test]
    fn acrn_5240_a_device_of_a_unit_that_is_not_used_is_not_told_to_be_anothers() {
        // Whoever leaves the unit for graphics out has to ask first: there is no other for the graphics.
        let table = table(&[&GRAPHICS]);
        let dmar = read(&table);

        assert_eq!(base(dmar.unit_of(device(0, 2, 0), nowhere)), Some(0xFED9_0000));
        assert_eq!(dmar.unit_of(device(0, 3, 0), nowhere), None);
    }

    #[test]
    fn acrn_8639_a_unit_has_as_many_scopes_as_fit_its_length() {
        // 256 endpoints, 00:00.0 to 00:1f.7.
        let mut unit = GRAPHICS[..16].to_vec();
        for function in 0..=0xFF {
            unit.extend([1, 8, 0, 0, 0, 0, function >> 3, function & 7]);
        }
        let length = unit.len() as u16;
        unit[2..4].copy_from_slice(&length.to_le_bytes());
        let table = table(&[&unit, &REST]);
        let dmar = read(&table);

        for id in 0..=0x100 {
            let found = dmar.unit_of(Requester { segment: 0, id: StreamId(id) }, nowhere);
            assert_eq!(base(found), Some(if id < 0x100 { 0xFED9_0000 } else { 0xFED9_1000 }));
        }
    }

    #[test]
    fn xsa_449_a_scope_of_one_function_says_nothing_about_the_others() {
        let table = laptop();
        let dmar = read(&table);

        for function in 1..8 {
            assert_eq!(base(dmar.unit_of(device(0, 2, function), nowhere)), Some(0xFED9_1000));
        }
    }

    #[test]
    fn a_bridge_that_nobody_has_set_up_owns_no_bus() {
        let table = qemu();
        let dmar = read(&table);

        // 0 to 0 as after reset; its own bus; the wrong way round; all ones of a bridge that is gone.
        for wrong in [0..=0, 0..=0xFF, 0x10..=0x12, RangeInclusive::new(5, 3)] {
            let buses = |_| Some(wrong.clone());
            assert_eq!(dmar.unit_of(device(0, 2, 0), buses), None, "{wrong:?}");
            assert_eq!(base(dmar.unit_of(device(0x10, 0, 0), buses)), Some(0xFED9_0000), "itself");
        }
        // Through such a bridge no path leads anywhere.
        let server = server();
        let far_function = read(&server).unit_of(far(0, 3, 1), |_| Some(0..=0));
        assert_eq!(base(far_function), Some(0x12_FED9_2000));
    }

    #[test]
    fn a_question_asks_no_more_of_bridges_than_the_table_has_steps() {
        let table = server();
        let dmar = read(&table);
        let asked = Cell::new(0);

        let unit = dmar.unit_of(far(0x99, 0, 0), |bridge| {
            asked.set(asked.get() + 1);
            server_buses(bridge)
        });

        // What is behind 40:1c.0; behind 40:01.0, behind 41:00.0.
        assert_eq!((base(unit), asked.get()), (Some(0x12_FED9_2000), 3));
    }

    #[test]
    fn interrupt_controllers_and_timers_have_a_source_and_a_unit() {
        let (qemu, laptop, server) = (qemu(), laptop(), server());

        let source = |table, kind, id| {
            read(table).source(kind, id, server_buses).map(|(unit, of)| (unit.base.0, of.segment, of.id.0))
        };
        assert_eq!(source(&qemu, ScopeKind::IoApic, 0), Some((0xFED9_0000, 0, 0xFF00)));
        assert_eq!(source(&laptop, ScopeKind::IoApic, 2), Some((0xFED9_1000, 0, 0xF0F7)));
        assert_eq!(source(&laptop, ScopeKind::Timer, 0), Some((0xFED9_1000, 0, 0xF0F6)));
        assert_eq!(source(&laptop, ScopeKind::IoApic, 0), None);
        assert_eq!(source(&server, ScopeKind::Named, 3), Some((0x12_FED9_2000, 1, 0x40A8)));
    }
}

mod regions {
    use super::*;

    /// A table that lives for as long as the test.
    fn laptop_regions(of: Requester) -> Vec<u64> {
        let table: &'static [u8] = Box::leak(laptop().into_boxed_slice());
        bases(read(table).regions_of(of, nowhere))
    }

    #[test]
    fn asterinas_2090_the_memory_that_graphics_go_on_using_is_told() {
        assert_eq!(laptop_regions(device(0, 2, 0)), [0x7B80_0000]);
        assert_eq!(laptop_regions(device(0, 3, 0)), [0; 0]);
        assert_eq!(laptop_regions(Requester::new(1, 0, 2, 0)), [0; 0], "another segment");
    }

    #[test]
    fn qubes_2530_a_region_that_two_devices_share_is_told_to_both() {
        assert_eq!(laptop_regions(device(0, 0x1D, 0)), [0x7000_0000]);
        let table = laptop();
        let region = read(&table).regions_of(device(0, 0x1D, 0), nowhere).next().expect("one");

        assert_eq!(region.scopes.count(), 2, "that it is shared can be seen");
    }

    #[test]
    fn xsa_378_regions_of_a_device_that_overlap_are_all_told() {
        assert_eq!(laptop_regions(device(0, 0x14, 0)), [0x7000_0000, 0x7000_8000]);
    }

    /// What has to stay mapped for `of`, as pairs of the first address and the one behind the last.
    fn kept(table: &[u8], of: Requester, policy: Reserved) -> Result<Vec<(u64, u64)>, UsedByFirmware> {
        let kept = read(table).kept_mapped(of, policy, nowhere)?;
        Ok(kept.map(|range| (range.start.0, range.end.0)).collect())
    }

    #[test]
    fn a_device_that_firmware_uses_is_refused_or_keeps_its_regions_and_no_more() {
        let table = laptop();

        // 00:02.0 has one; 00:1d.0 shares one; those of 00:14.0 overlap; 00:03.0 has none.
        for (of, regions) in [
            (device(0, 2, 0), vec![(0x7B80_0000, 0x8000_0000)]),
            (device(0, 0x1D, 0), vec![(0x7000_0000, 0x7001_0000)]),
            (device(0, 0x14, 0), vec![(0x7000_0000, 0x7001_8000)]),
        ] {
            let error = kept(&table, of, Reserved::Refuse).expect_err("firmware uses it");
            assert_eq!(error.base.0, regions[0].0);
            assert!(error.end > error.base && error.to_string().contains(&format!("{:#x}", error.base.0)));
            assert_eq!(kept(&table, of, Reserved::KeepMapped), Ok(regions));
        }
        for policy in [Reserved::Refuse, Reserved::KeepMapped] {
            assert_eq!(kept(&table, device(0, 3, 0), policy), Ok(vec![]));
            assert_eq!(kept(&table, Requester::new(1, 0, 2, 0), policy), Ok(vec![]), "another segment");
        }
    }

    #[test]
    fn regions_that_stay_mapped_come_once_and_in_order_however_they_are_listed() {
        let of = device(0, 2, 0);
        let region = |(base, end): (u64, u64)| {
            let mut region = STOLEN;
            region[8..16].copy_from_slice(&base.to_le_bytes());
            region[16..24].copy_from_slice(&(end - 1).to_le_bytes());
            region
        };
        let merged = |list: &[(u64, u64)]| {
            let regions: Vec<_> = list.iter().copied().map(region).collect();
            let structures: Vec<&[u8]> = regions.iter().map(|region| region.as_slice()).collect();
            kept(&table(&structures), of, Reserved::KeepMapped).expect("it may be given away")
        };

        assert_eq!(merged(&[(0x5000, 0x6000), (0x1000, 0x2000)]), [(0x1000, 0x2000), (0x5000, 0x6000)]);
        assert_eq!(merged(&[(0x1000, 0x2000), (0x2000, 0x3000)]), [(0x1000, 0x3000)], "side by side");
        assert_eq!(merged(&[(0x2000, 0x3000), (0x1000, 0x5000), (0x2000, 0x3000)]), [(0x1000, 0x5000)]);
        let chain = [(0x3000, 0x6000), (0x9000, 0xA000), (0x5000, 0x9000), (0x1000, 0x4000)];
        assert_eq!(merged(&chain), [(0x1000, 0xA000)]);
        assert_eq!(merged(&[(0, 0x1000), (0x7F_FFFF_F000, 0x80_0000_0000)]).len(), 2);
    }

    #[test]
    fn a_region_of_a_bridge_is_for_each_device_behind_it() {
        let mut region = STOLEN;
        region[24] = 2;
        let table = table(&[&region]);
        let buses = |bridge: Requester| (bridge == device(0, 2, 0)).then_some(4..=5);

        for (bus, expected) in [(3, 0), (4, 1), (5, 1), (6, 0)] {
            assert_eq!(read(&table).regions_of(device(bus, 1, 1), buses).count(), expected, "bus {bus}");
        }
    }

    #[test]
    fn an_impossible_region_is_refused_with_its_offset() {
        // Base and limit: the wrong way round, empty, off a page at either end, above 2^39, to the end of 64
        // bits.
        let all = u64::MAX;
        for (base, limit) in [
            (0x5000, 0x3FFF),
            (0x5000, 0x4FFF),
            (0x5001, 0x5FFF),
            (0x5000, 0x5FFE),
            (0x5000, 0x6000),
            (0x80_0000_0000, 0x80_0000_0FFF),
            (0x7F_FFFF_F000, 0x80_0000_0FFF),
            (0, all),
        ] {
            let mut region = STOLEN;
            region[8..16].copy_from_slice(&u64::to_le_bytes(base));
            region[16..24].copy_from_slice(&u64::to_le_bytes(limit));

            let error = Dmar::new(&table(&[&REST, &region])).expect_err("it is impossible");

            assert_eq!(error, Error::Region { offset: 80, base: PhysAddr(base), limit: PhysAddr(limit) });
            assert!(error.to_string().contains("0x50"), "{error}");
        }
        let mut last = STOLEN;
        last[8..16].copy_from_slice(&u64::to_le_bytes(0x7F_FFFF_F000));
        last[16..24].copy_from_slice(&u64::to_le_bytes(0x7F_FFFF_FFFF));
        assert!(Dmar::new(&table(&[&last])).is_ok(), "the last page of 39 bits");
        // A width of 64 bits or more holds any region but one that ends with them.
        for (bits, limit, fits) in [(64, all - 4096, true), (64, all, false), (255, all - 4096, true)] {
            last[16..24].copy_from_slice(&limit.to_le_bytes());
            assert_eq!(Dmar::new(&table_with(bits, 0, &[&last])).is_ok(), fits);
        }
    }
}

mod ats {
    use super::*;

    fn ats(table: &[u8], of: Requester) -> Ats {
        read(table).ats_of(of, server_buses)
    }

    #[test]
    fn ats_is_allowed_behind_the_root_ports_that_are_listed() {
        let table = server();

        for allowed in [far(0x41, 0, 0), far(0x44, 1, 0), far(0x5F, 0, 0), far(0x40, 1, 0)] {
            assert_eq!(ats(&table, allowed), Ats::Allowed, "{allowed:?}");
        }
        for other in
            [far(0x40, 4, 0), far(0x45, 0, 0), far(0x4F, 0, 0), device(0x41, 0, 0), device(0x50, 0, 0)]
        {
            assert_eq!(ats(&table, other), Ats::NotListed, "{other:?}");
        }
    }

    #[test]
    fn all_ports_are_those_of_one_segment() {
        let table = qemu();

        assert_eq!(ats(&table, device(1, 0, 0)), Ats::Allowed);
        assert_eq!(ats(&table, far(1, 0, 0)), Ats::NotListed);
    }

    #[test]
    fn a_device_of_the_soc_says_whether_it_needs_ats() {
        let table = server();
        assert_eq!(ats(&table, far(0x40, 2, 0)), Ats::Required);
        assert_eq!(ats(&table, far(0x40, 3, 0)), Ats::Allowed);
        assert_eq!(ats(&table, device(0x40, 2, 0)), Ats::NotListed, "another segment");

        // Needed stays needed, wherever all ports are listed.
        let mut ports = ALL_PORTS;
        ports[6] = 1;
        for order in [[&ports[..], &SOC_REQUIRED], [&SOC_REQUIRED, &ports]] {
            assert_eq!(ats(&super::table(&order), far(0x40, 2, 0)), Ats::Required);
        }
    }

    #[test]
    fn a_table_without_a_word_about_ats_lists_nobody() {
        let table = laptop();

        assert_eq!(ats(&table, device(0, 2, 0)), Ats::NotListed);
    }
}

mod malformed {
    use super::*;

    /// Where each structure of a table starts, by the lengths alone, and where the last one ends.
    fn starts(table: &[u8]) -> Vec<usize> {
        let mut starts = vec![48];
        while let Some(&at) = starts.last().filter(|&&at| at < table.len()) {
            starts.push(at + usize::from(u16::from_le_bytes([table[at + 2], table[at + 3]])));
        }
        starts
    }

    #[test]
    fn a_table_of_another_name_or_shorter_than_a_header_is_refused() {
        let mut wrong = laptop();
        wrong[3] = b'S';

        assert_eq!(Dmar::new(&wrong).err(), Some(Error::NotDmar));
        assert_eq!(Dmar::new(&table(&[])[..47]).err(), Some(Error::NotDmar));
        assert_eq!(Dmar::new(&[]).err(), Some(Error::NotDmar));
        assert_eq!(read(&table(&[])).structures().count(), 0);
    }

    #[test]
    fn a_header_that_claims_more_than_there_is_or_less_than_itself_is_refused() {
        for claimed in [0, 47, laptop().len() as u32 + 1, u32::MAX] {
            let mut table = laptop();
            table[4..8].copy_from_slice(&claimed.to_le_bytes());

            let error = Dmar::new(&table).expect_err("the length is wrong");
            assert_eq!(error, Error::Length { claimed, found: table.len() });
        }
    }

    #[test]
    fn every_cut_of_every_table_is_refused_or_ends_with_a_structure() {
        for whole in golden() {
            let starts = starts(&whole);
            for end in 0..whole.len() {
                // The header still claims the whole.
                assert!(Dmar::new(&whole[..end]).is_err(), "{end}");
                if end < 48 {
                    continue;
                }
                let mut cut = whole[..end].to_vec();
                set_length(&mut cut);

                let complete = starts.iter().filter(|&&start| start <= end).count() - 1;
                match Dmar::new(&cut) {
                    Ok(dmar) => {
                        assert!(starts.contains(&end), "{end} is inside a structure");
                        assert!(dmar.structures().eq(read(&whole).structures().take(complete)));
                    }
                    Err(Error::Structure { offset, .. }) => assert_eq!(offset, starts[complete], "{end}"),
                    Err(other) => panic!("{other:?} at {end}"),
                }
                assert_eq!(starts.contains(&end), Dmar::new(&cut).is_ok());
            }
        }
    }

    #[test]
    fn every_shorter_length_of_every_structure_is_refused_or_leaves_the_rest_as_it_was() {
        for whole in golden() {
            for (n, pair) in starts(&whole).windows(2).enumerate() {
                let (start, end) = (pair[0], pair[1]);
                for length in 0..end - start {
                    let mut table = whole.clone();
                    table.splice(start + length.max(4)..end, []);
                    table[start + 2..start + 4].copy_from_slice(&(length as u16).to_le_bytes());
                    set_length(&mut table);

                    match Dmar::new(&table) {
                        Ok(dmar) => {
                            let others = |(at, _): &(usize, Structure<'_>)| *at != n;
                            let left = dmar.structures().enumerate().filter(others);
                            assert!(left.eq(read(&whole).structures().enumerate().filter(others)));
                        }
                        Err(Error::Structure { offset, length: claimed, .. }) => {
                            assert_eq!((offset, usize::from(claimed)), (start, length));
                        }
                        Err(Error::Scope { offset, .. }) => {
                            assert!((start..start + length).contains(&offset), "{offset:#x}");
                        }
                        Err(other) => panic!("{other:?}"),
                    }
                }
            }
        }
    }

    #[test]
    fn acrn_8494_a_wrong_length_says_which_structure_and_where() {
        // Shorter than type and length; shorter than the fixed part of a unit; past the end of the table.
        for length in [0, 3, 15, 33, 0xFF] {
            let mut last = REST;
            last[2] = length;

            let error = Dmar::new(&table(&[&ALL_PORTS, &last])).expect_err("the length is wrong");

            assert_eq!(error, Error::Structure { offset: 56, kind: 0, length: length.into() });
            assert!(error.to_string().contains("0x38"), "{error}");
        }
        let shorter: [(&[u8], u8); 6] =
            [(&STOLEN, 23), (&ALL_PORTS, 7), (&NEAR, 19), (&NAME, 8), (&SOC_REQUIRED, 7), (&PROPERTIES, 7)];
        for (structure, length) in shorter {
            let mut structure = structure[..length.into()].to_vec();
            structure[2] = length;

            let error = Dmar::new(&table(&[&structure])).expect_err("the fixed part is not whole");

            let kind = structure[0].into();
            assert_eq!(error, Error::Structure { offset: 48, kind, length: length.into() });
        }
    }

    #[test]
    fn a_scope_with_a_wrong_length_or_path_is_refused_with_its_offset() {
        // The scope of the timer is at 24 of `REST`, which is at 72. Shorter than its fixed part, without a
        // path, half a step, past the end of its structure; and device 32, function 8.
        for (at, value) in [(1, 0), (1, 5), (1, 6), (1, 7), (1, 9), (1, 0xFF), (6, 32), (7, 8), (7, 0xFF)] {
            let mut rest = REST;
            rest[24 + at] = value;

            let error = Dmar::new(&table(&[&GRAPHICS, &rest, &ALL_PORTS])).expect_err("the scope is wrong");

            assert_eq!(error, Error::Scope { offset: 96, kind: 0, length: rest[25] }, "{at} {value}");
            assert!(error.to_string().contains("0x60"), "{error}");
        }
    }

    #[test]
    fn a_name_without_an_end_is_refused() {
        let mut name = NAME;
        name[14] = b'E';

        let error = Dmar::new(&table(&[&name])).expect_err("there is no zero");

        assert_eq!(error, Error::Structure { offset: 48, kind: 4, length: 17 });
    }

    #[test]
    fn registers_that_cannot_be_are_refused() {
        // Zero, off a page, past 39 bits, and a window that wraps.
        for base in [0, 0xFED9_0800, 0x80_0000_0000, 0x7F_FFFF_F000, 0xFFFF_FFFF_FFFF_F000] {
            let mut unit = GRAPHICS;
            unit[8..16].copy_from_slice(&u64::to_le_bytes(base));

            let error = Dmar::new(&table(&[&unit])).expect_err("there can be no registers");

            assert_eq!(error, Error::Registers { offset: 48, base: PhysAddr(base) });
        }
    }

    #[test]
    fn no_byte_of_a_table_can_make_the_reader_panic_or_run_for_ever() {
        for good in golden() {
            for at in 0..good.len() {
                for value in [0, 1, 0x7F, 0x80, 0xFF] {
                    let mut bad = good.clone();
                    bad[at] = value;
                    if let Ok(dmar) = Dmar::new(&bad) {
                        // Each structure has 4 bytes or more.
                        assert!(dmar.structures().count() <= good.len() / 4);
                        let _ = dmar.unit_of(device(1, 0, 0), qemu_buses);
                    }
                }
            }
        }
    }
}
