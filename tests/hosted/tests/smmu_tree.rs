//! What the SMMUv3 driver makes of device trees: QEMU's, one with everything, and those with something wrong in them.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use hosted::{Random, tree::Node};
use iommu::{PhysAddr, StreamId};
use smmuv3::tree::{Error, MessageParent, Tree, Unit, Wire};

/// The unit of QEMU's `virt` machine with `iommu=smmuv3`, as its tree has it.
fn qemu_unit() -> Node {
    Node::new("smmuv3@9050000")
        .texts("compatible", &["arm,smmu-v3"])
        .cells("reg", &[0, 0x0905_0000, 0, 0x2_0000])
        .cells("interrupts", &[0, 74, 1, 0, 75, 1, 0, 76, 1, 0, 77, 1])
        .texts("interrupt-names", &["eventq", "priq", "cmdq-sync", "gerror"])
        .flag("dma-coherent")
        .cells("#iommu-cells", &[1])
        .cells("phandle", &[0x8005])
}

fn pcie() -> Node {
    Node::new("pcie@10000000")
        .texts("compatible", &["pci-host-ecam-generic"])
        .texts("device_type", &["pci"])
        .cells("linux,pci-domain", &[0])
        .cells("iommu-map", &[0, 0x8005, 0, 0x1_0000])
}

fn root() -> Node {
    Node::new("").cells("#address-cells", &[2]).cells("#size-cells", &[2])
}

fn qemu() -> Node {
    root().child(qemu_unit()).child(pcie())
}

/// Another unit, with a device whose faults stall and one whose do not.
fn other_unit() -> Node {
    Node::new("iommu@2b400000")
        .texts("compatible", &["vendor,smmu", "arm,smmu-v3"])
        .cells("reg", &[0, 0x2B40_0000, 0, 0x2_0000])
        .cells("msi-parent", &[0x8001, 0xFF_0000])
        .cells("interrupts", &[0, 112, 4, 1, 3, 8])
        .texts("interrupt-names", &["gerror", "eventq"])
        .cells("#iommu-cells", &[1])
        .cells("phandle", &[0x8006])
}

fn everything() -> Node {
    let bus = Node::new("soc")
        .cells("#address-cells", &[2])
        .cells("#size-cells", &[2])
        .flag("ranges")
        .child(other_unit())
        .child(
            Node::new("dma@1000")
                .cells("iommus", &[0x8006, 0x42, 0x8006, 0x43, 0x8005, 0x44])
                .flag("dma-can-stall"),
        )
        .child(Node::new("disk@2000").cells("iommus", &[0x8006, 0x50]))
        .child(Node::new("dma@3000").cells("iommus", &[0x8006, 0x42, 0x8006, 0x45]).flag("dma-can-stall"))
        .child(
            Node::new("dma@4000")
                .cells("iommus", &[0x8006, 0x46])
                .flag("dma-can-stall")
                .texts("status", &["disabled"]),
        );
    let second = Node::new("pcie@40000000")
        .texts("device_type", &["pci"])
        .cells("linux,pci-domain", &[1])
        .cells("iommu-map-mask", &[0xFFF8])
        // Bus 1 on the first unit, bus 2 on the other, with another stream; bus 3 on something that is no SMMUv3.
        .cells(
            "iommu-map",
            &[0x100, 0x8005, 0x100, 0x100, 0x200, 0x8006, 0x1_0000, 0x100, 0x300, 0x8007, 0, 0x100],
        );
    let foreign = Node::new("iommu@5000").cells("#iommu-cells", &[0]).cells("phandle", &[0x8007]);
    qemu().child(bus).child(second).child(foreign)
}

fn units<'t>(tree: &Tree<'t>) -> Vec<Unit<'t>> {
    tree.units().map(|unit| unit.expect("it is whole")).collect()
}

/// The name and the words of an error, whose offset is that of the name in `bytes`.
fn named(bytes: &[u8], error: Error) -> (String, &'static str) {
    assert!(error.to_string().contains("at offset 0x"), "{error}");
    let Error::Node { offset, name, what } = error else { panic!("{error:?}") };
    assert_eq!(bytes[offset..offset + 4], [0, 0, 0, 1], "a node begins there");
    assert_eq!(&bytes[offset + 4..offset + 4 + name.len()], name.as_bytes());
    (name.as_str().to_owned(), what)
}

#[test]
fn the_unit_that_qemu_describes_is_found_with_its_wires() {
    let bytes = qemu().tree();
    let tree = Tree::new(&bytes).expect("it is one");

    let [unit] = &units(&tree)[..] else { panic!("one unit") };

    assert_eq!(unit.registers, PhysAddr(0x0905_0000)..PhysAddr(0x0907_0000));
    assert!(unit.coherent);
    assert_eq!(unit.message_parent(), Ok(None));
    // SPI 74 is INTID 106, by its edge.
    for (name, number) in [("eventq", 106), ("priq", 107), ("cmdq-sync", 108), ("gerror", 109)] {
        assert_eq!(unit.wire(name), Ok(Some(Wire { number, edge: true })), "{name}");
    }
    assert_eq!(unit.wire("combined"), Ok(None));
    let bridge = tree.bridges().next().expect("there is one");
    assert_eq!(bridge.segment(), Ok(Some(0)));
    for requester in [0, 8, 0xFF, 0xFFFF] {
        let (unit, stream) = bridge.endpoint(requester).expect("it is whole").expect("it is translated");
        assert_eq!((unit.registers.start.0, stream.0), (0x0905_0000, requester.into()));
    }
    assert_eq!(tree.stalling(unit).expect("it is whole").len(), 0);
}

#[test]
fn several_units_are_told_apart() {
    let bytes = everything().tree();
    // A tree may lie in more memory than it takes.
    let bytes = [&bytes[..], &[0xEE; 32]].concat();
    let tree = Tree::new(&bytes).expect("it is one");

    let [first, second] = &units(&tree)[..] else { panic!("two units") };

    assert_eq!((first.phandle, second.phandle), (Some(0x8005), Some(0x8006)));
    assert_eq!(second.registers.start, PhysAddr(0x2B40_0000));
    assert!(!second.coherent);
    assert_eq!(second.message_parent(), Ok(Some(MessageParent { phandle: 0x8001, device: Some(0xFF_0000) })));
    // SPI 112 by its level; PPI 3 is INTID 19.
    assert_eq!(second.wire("gerror"), Ok(Some(Wire { number: 144, edge: false })));
    assert_eq!(second.wire("eventq"), Ok(Some(Wire { number: 19, edge: false })));
    let stalling = |unit| tree.stalling(unit).expect("it is whole").to_vec();
    assert_eq!(stalling(second), [0x42, 0x43, 0x45].map(StreamId), "each once, and none that is not in use");
    assert_eq!(stalling(first), [StreamId(0x44)]);
    let devices: Vec<_> = tree
        .devices()
        .map(|device| (device.name(), device.can_stall, device.streams(second).expect("it is whole").len()))
        .collect();
    assert_eq!(devices, [("dma@1000", true, 2), ("disk@2000", false, 1), ("dma@3000", true, 2)]);

    let bridge = tree.bridges().nth(1).expect("there are two");
    let place = |requester| {
        let found = bridge.endpoint(requester).expect("it is whole");
        found.map(|(unit, stream)| (unit.phandle.expect("it has one"), stream.0))
    };
    assert_eq!(bridge.segment(), Ok(Some(1)));
    assert_eq!(place(0x0FF), None, "before all entries");
    // The mask leaves out functions: 01:00.7 counts as 01:00.0.
    assert_eq!(place(0x107), Some((0x8005, 0x100)));
    assert_eq!(place(0x108), Some((0x8005, 0x108)));
    assert_eq!(place(0x2FF), Some((0x8006, 0x1_00F8)));
    assert_eq!(place(0x300), None, "another kind of unit");
    assert_eq!(place(0x400), None, "after all entries");
}

#[test]
fn a_unit_that_is_wrong_is_named_with_its_place() {
    let wrong = |unit: Node| {
        let bytes = root().child(unit).child(pcie()).tree();
        let tree = Tree::new(&bytes).expect("it is one");
        let error = tree.units().next().expect("there is one").expect_err("it is wrong");
        let (name, what) = named(&bytes, error);
        assert_eq!(name, "smmuv3@9050000");
        // Whoever comes by way of the host bridge is told the same.
        let bridge = tree.bridges().next().expect("there is one");
        assert_eq!(named(&bytes, bridge.endpoint(0).expect_err("it is wrong")).1, what);
        what
    };
    assert!(wrong(qemu_unit().without("#iommu-cells")).contains("#iommu-cells"));
    assert!(wrong(qemu_unit().cells("#iommu-cells", &[2])).contains("#iommu-cells"));
    assert!(wrong(qemu_unit().bytes("#iommu-cells", &[1])).contains("#iommu-cells"));
    assert!(wrong(qemu_unit().without("reg")).contains("reg"));
    assert!(wrong(qemu_unit().cells("reg", &[0, 0x0905_0000])).contains("reg"));
    assert!(wrong(qemu_unit().cells("reg", &[u32::MAX, 0xFFFF_0000, 0, 0x2_0000])).contains("reg"));
    assert!(wrong(qemu_unit().cells("reg", &[0, 0x0905_0000, 0, 0x1_0000])).contains("64 KiB"));
    assert!(wrong(qemu_unit().cells("reg", &[0, 0x0905_1000, 0, 0x2_0000])).contains("64 KiB"));
    let bus = |unit: Node| {
        let bus = Node::new("soc").cells("#address-cells", &[2]).cells("#size-cells", &[2]);
        root().child(bus.cells("ranges", &[0, 0, 0, 0x1000_0000, 0, 0x1000_0000]).child(unit)).tree()
    };
    let bytes = bus(qemu_unit());
    let found = Tree::new(&bytes).expect("it is one").units().next().expect("there is one");
    assert!(named(&bytes, found.expect_err("its addresses are others")).1.contains("bus"));
}

#[test]
fn wires_and_receivers_that_are_wrong_are_named() {
    let of = |unit: Node, check: &dyn Fn(&Unit<'_>) -> Option<Error>| {
        let bytes = root().child(unit).tree();
        let tree = Tree::new(&bytes).expect("it is one");
        let unit = &units(&tree)[0];
        check(unit).map(|error| named(&bytes, error).1)
    };
    let gerror = |unit: &Unit<'_>| unit.wire("gerror").err();
    for unit in [
        qemu_unit().without("interrupts"),
        qemu_unit().cells("interrupts", &[0, 74, 1, 0, 75, 1, 0, 76, 1]),
        qemu_unit().cells("interrupts", &[0, 74, 1, 0, 75, 1, 0, 76, 1, 0, 77, 1, 0]),
        qemu_unit().cells("interrupts", &[0, 74, 1, 0, 75, 1, 0, 76, 1, 2, 77, 1]),
        qemu_unit().cells("interrupts", &[0, 74, 1, 0, 75, 1, 0, 76, 1, 0, 988, 1]),
        qemu_unit().cells("interrupts", &[0, 74, 1, 0, 75, 1, 0, 76, 1, 1, 16, 1]),
        qemu_unit().bytes("interrupt-names", b"eventq\0priq\0cmdq-sync\0gerror"),
    ] {
        assert!(of(unit, &gerror).expect("it is wrong").contains("interrupt"));
    }
    let receiver = |unit: &Unit<'_>| unit.message_parent().err();
    for bytes in [&[][..], &[0; 3], &[0; 6], &[0; 12]] {
        assert!(
            of(qemu_unit().bytes("msi-parent", bytes), &receiver)
                .expect("it is wrong")
                .contains("msi-parent")
        );
    }
}

#[test]
fn a_map_that_is_wrong_is_named_and_no_stream_is_guessed() {
    for (bridge, requester, words) in [
        (pcie().bytes("iommu-map", &[0; 15]), 0, "whole entries"),
        (pcie().cells("iommu-map", &[0, 0x8009, 0, 0x100]), 0, "not there"),
        (pcie().cells("iommu-map", &[0, 0x8005, u32::MAX, 2]), 1, "past the last"),
        (pcie().cells("iommu-map", &[0, 0x8005, 0, 0x100, 0, 0x8005, 1, 0x100]), 5, "two streams"),
        (pcie().cells("iommu-map", &[1, 0x8005, 0, 1]).cells("iommu-map-mask", &[0xFFFE]), 0, "leaves out"),
        (pcie().cells("iommu-map-mask", &[0, 0]), 0, "iommu-map-mask"),
    ] {
        let bytes = root().child(qemu_unit()).child(bridge).tree();
        let tree = Tree::new(&bytes).expect("it is one");

        let error = tree.bridges().next().expect("there is one").endpoint(requester).expect_err(words);

        let (name, what) = named(&bytes, error);
        assert!(name == "pcie@10000000" && what.contains(words), "{name}: {what}");
    }
    // What both entries say alike is no contradiction.
    let twice = pcie().cells("iommu-map", &[0, 0x8005, 0, 0x100, 0x80, 0x8005, 0x80, 0x100]);
    let bytes = root().child(qemu_unit()).child(twice).tree();
    let tree = Tree::new(&bytes).expect("it is one");
    let found = tree.bridges().next().expect("there is one").endpoint(0x90).expect("it is whole");
    assert_eq!(found.map(|(_, stream)| stream), Some(StreamId(0x90)));
}

#[test]
fn devices_that_are_wrong_are_named() {
    for (device, words) in [
        (Node::new("dma@1000").bytes("iommus", &[0; 3]), "whole entries"),
        (Node::new("dma@1000").cells("iommus", &[0x8005]), "whole entries"),
        (Node::new("dma@1000").cells("iommus", &[0x8009, 1]), "not there"),
        (
            Node::new("dma@1000").cells("iommus", &(0..65).flat_map(|n| [0x8005, n]).collect::<Vec<_>>()),
            "more streams",
        ),
    ] {
        let bytes = root().child(qemu_unit()).child(device.flag("dma-can-stall")).tree();
        let tree = Tree::new(&bytes).expect("it is one");
        let unit = &units(&tree)[0];
        let device = tree.devices().next().expect("there is one");

        for error in [tree.stalling(unit).expect_err(words), device.streams(unit).expect_err(words)] {
            let (name, what) = named(&bytes, error);
            assert!(name == "dma@1000" && what.contains(words), "{name}: {what}");
        }
    }
}

#[test]
fn what_is_no_tree_is_refused() {
    let whole = qemu().tree();
    for length in 0..whole.len() {
        assert_eq!(Tree::new(&whole[..length]).err(), Some(Error::NotTree), "{length} bytes");
    }
    assert_eq!(Tree::new(&[0; 64]).err(), Some(Error::NotTree));
}

#[test]
fn no_bytes_make_the_reader_panic_or_run_for_ever() {
    let whole = everything().tree();
    let mut random = Random::new(11);
    for round in 0..4000 {
        let mut bytes = whole.clone();
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len() as u64) as usize;
            let word = [0u32, 1, 2, 3, 4, 9, 0xFF, 0x8000_0000, u32::MAX, random.number() as u32];
            if round % 2 == 0 {
                bytes[at] = random.number() as u8;
            } else if let Some(place) = bytes.get_mut(at & !3..(at & !3) + 4) {
                place.copy_from_slice(&word[random.below(10) as usize].to_be_bytes());
            }
        }
        let Ok(tree) = Tree::new(&bytes) else { continue };
        for unit in tree.units().take(100).flatten() {
            let _ = (unit.wire("gerror"), unit.message_parent(), tree.stalling(&unit));
        }
        for bridge in tree.bridges().take(100) {
            let _ = (bridge.segment(), bridge.endpoint(0), bridge.endpoint(0x210));
        }
    }
}
