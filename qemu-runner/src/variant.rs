//! The boots of a demonstration: each machine as it comes, and variants of it.
//!
//! A variant is a boot of its own because QEMU needs other options for it, or because its scenes leave the unit unlike they
//! found it. The hypervisor is one image for all: it looks what the unit can do, and does what its command line says, in
//! words `name=value` before the names of the scenes.

use std::fmt;

use crate::machine::Machine;

/// A boot: a machine, how QEMU is to make it, and the scenes that it is to show.
#[derive(Debug)]
pub(crate) struct Variant {
    pub(crate) machine: Machine,
    /// What sets it apart from the machine as it comes; `None` for that.
    pub(crate) name: Option<&'static str>,
    /// The IOMMU as a device of QEMU's; `None` is the one that is part of the machine.
    pub(crate) unit: Option<&'static str>,
    /// What is added to `unit` for page requests, where the plugin makes them possible.
    pub(crate) unit_with_requests: &'static str,
    /// Further devices.
    pub(crate) devices: &'static [&'static str],
    /// Options of the plugin, each after a comma.
    pub(crate) plugin: &'static str,
    /// What the hypervisor is told besides the names of the scenes.
    pub(crate) told: &'static str,
    /// Which tables the hypervisor translates devices by.
    pub(crate) tables: Tables,
    /// Requester IDs of the devices that keep translations of their own.
    pub(crate) with_device_tlb: &'static [u64],
    /// Requester IDs of the devices that the hypervisor is told to trust: they may get past translation.
    pub(crate) trusted: &'static [u64],
    /// Whether the unit is taken over from a life of the hypervisor before this one.
    pub(crate) restarts: bool,
    /// What it shows, in order.
    pub(crate) scenes: &'static [Scene],
}

/// Tables that a unit translates devices by, as its own trace tells them apart.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Tables {
    /// First-stage tables, in scalable mode on VT-d.
    First,
    /// Second-stage tables, in scalable mode on VT-d.
    Second,
    /// Second-stage tables in VT-d's legacy mode.
    Legacy,
}

/// What is known about a scene before it is run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Scene {
    pub(crate) name: &'static str,
    /// Whether it needs the devices of the plugin `sva-device`: they issue page requests, which QEMU's own do not.
    pub(crate) page_requests: bool,
    /// Whether something that the scene is evidence about is our own model in place of QEMU's.
    pub(crate) test_double: bool,
    /// What QEMU itself must have said when it was shown, in its trace or on standard error; nothing if empty.
    pub(crate) witness: &'static str,
}

impl Scene {
    const fn plain(name: &'static str) -> Self {
        Self { name, page_requests: false, test_double: false, witness: "" }
    }

    /// Passes only if QEMU said `witness`.
    const fn witnessed(self, witness: &'static str) -> Self {
        Self { witness, ..self }
    }

    /// Needs the plugin's devices. On [`Machine::X86_64`] the plugin adds those alone: translation, page request queue,
    /// interrupt and response are those of QEMU's VT-d.
    const fn requests(name: &'static str) -> Self {
        Self { page_requests: true, ..Self::plain(name) }
    }

    /// Rests on page requests of [`Machine::Aarch64`]: QEMU's SMMUv3 has none, and the plugin's PRI queue stands in.
    const fn doubled(name: &'static str) -> Self {
        Self { test_double: true, ..Self::requests(name) }
    }
}

/// Devices interrupt by entries of their own. QEMU names both devices when one of them uses the other's.
const INTERRUPTS: Scene =
    Scene::requests("interrupts").witnessed("invalid IRTE SID (index=1, sid=40, source_id=32)");

/// The same, where QEMU's ITS takes messages: one of the second device came there, with the event of the first.
const INTERRUPTS_BY_ITS: Scene = Scene::requests("interrupts")
    .witnessed("TRANSLATER write: offset 0x40 data 0x1 size 4 requester_id 0x28");

/// QEMU's VT-d with first-stage tables, and interrupts for x2APIC IDs.
const VTD_FIRST: &str = "intel-iommu,scalable-mode=on,fsts=on,device-iotlb=on,pasid-bits=20,eim=on";
/// The same with second-stage tables, which QEMU has instead; page requests it then has none.
const VTD_SECOND: &str = "intel-iommu,scalable-mode=on";

/// The same in legacy mode, with second-stage tables.
const VTD_LEGACY: &str = "intel-iommu";

/// A second device that writes when it is told to, which nobody trusts; and the first, in words to the hypervisor.
const SECOND_WRITER: &[&str] = &["iommu-testdev,addr=6"];
const TRUST_FIRST_WRITER: &str = "trusted=0x18";

/// Requester IDs of the plugin's devices, the only ones with a device TLB: bus 0, slots 4 and 5.
pub(crate) const PLUGIN_DEVICES: [u64; 2] = [4 << 3, 5 << 3];

const X86_64: Variant = Variant {
    machine: Machine::X86_64,
    name: None,
    unit: Some(VTD_FIRST),
    unit_with_requests: ",svm=on",
    devices: &[],
    plugin: "",
    told: "",
    tables: Tables::First,
    with_device_tlb: &PLUGIN_DEVICES,
    trusted: &[],
    restarts: false,
    scenes: &[
        Scene::plain("deny"),
        Scene::plain("allow"),
        Scene::requests("event"),
        Scene::requests("repair"),
        Scene::requests("silence"),
        Scene::requests("forgery"),
        Scene::requests("restraint"),
        Scene::requests("claims"),
        Scene::requests("departure"),
        Scene::requests("isolation"),
        Scene::requests("pager"),
        INTERRUPTS,
    ],
};

const AARCH64: Variant = Variant {
    machine: Machine::Aarch64,
    name: None,
    unit: None,
    unit_with_requests: "",
    devices: &[],
    plugin: "",
    told: "",
    tables: Tables::First,
    with_device_tlb: &PLUGIN_DEVICES,
    trusted: &[],
    restarts: false,
    scenes: &[
        Scene::plain("deny"),
        Scene::plain("allow"),
        Scene::requests("event"),
        Scene::doubled("repair"),
        Scene::doubled("silence"),
        Scene::doubled("forgery"),
        Scene::doubled("restraint"),
        Scene::doubled("claims"),
        Scene::doubled("departure"),
        Scene::requests("isolation"),
        Scene::doubled("pager"),
        INTERRUPTS_BY_ITS,
    ],
};

/// Every boot of a demonstration, in order: first each machine as it comes.
pub(crate) static VARIANTS: &[Variant] = &[
    X86_64,
    AARCH64,
    Variant {
        name: Some("second-stage"),
        unit: Some(VTD_SECOND),
        unit_with_requests: "",
        devices: SECOND_WRITER,
        told: TRUST_FIRST_WRITER,
        tables: Tables::Second,
        with_device_tlb: &[],
        trusted: &[3 << 3],
        scenes: &[
            Scene::plain("deny"),
            Scene::plain("allow"),
            Scene::requests("event"),
            Scene::requests("isolation"),
            Scene::plain("trust").witnessed("(iommu enabled=0)"),
            // By xAPIC IDs.
            INTERRUPTS,
        ],
        ..X86_64
    },
    Variant {
        name: Some("legacy"),
        unit: Some(VTD_LEGACY),
        unit_with_requests: "",
        devices: SECOND_WRITER,
        told: TRUST_FIRST_WRITER,
        tables: Tables::Legacy,
        with_device_tlb: &[],
        trusted: &[3 << 3],
        scenes: &[
            Scene::plain("deny"),
            Scene::plain("allow"),
            Scene::requests("event"),
            Scene::requests("isolation"),
            Scene::plain("trust").witnessed("(iommu enabled=0)"),
        ],
        ..X86_64
    },
    Variant {
        name: Some("second-stage"),
        unit: Some("arm-smmuv3,primary-bus=pcie.0,stage=2"),
        devices: SECOND_WRITER,
        told: TRUST_FIRST_WRITER,
        tables: Tables::Second,
        trusted: &[3 << 3],
        scenes: &[
            Scene::plain("deny"),
            Scene::plain("allow"),
            Scene::requests("event"),
            Scene::doubled("repair"),
            Scene::requests("isolation"),
            Scene::plain("trust").witnessed("sid=0x18 STE bypass"),
            INTERRUPTS_BY_ITS,
        ],
        ..AARCH64
    },
    Variant {
        name: Some("pressure"),
        devices: SECOND_WRITER,
        scenes: &[
            Scene::requests("recovery").witnessed("Page group response without PASID"),
            Scene::requests("storm").witnessed("new fault is not recorded, set PFO field"),
            Scene::requests("escalation").witnessed("vtd_fault_disabled"),
            Scene::requests("overflow"),
            Scene::requests("staleness"),
            Scene::requests("batch"),
        ],
        ..X86_64
    },
    Variant {
        name: Some("pressure"),
        devices: SECOND_WRITER,
        plugin: ",spoil=0x18",
        scenes: &[
            // GERROR.CMDQ_ERR. The plugin makes the command wrong; refusal and recovery are QEMU's own.
            Scene::doubled("recovery").witnessed("smmuv3_write_gerror toggled=0x1"),
            // GERROR.EVENTQ_ABT_ERR.
            Scene::requests("storm").witnessed("smmuv3_write_gerror toggled=0x4"),
            // Config = abort: no event.
            Scene::doubled("escalation").witnessed("smmuv3_translate_abort"),
            Scene::doubled("overflow"),
            Scene::doubled("staleness"),
            Scene::doubled("batch"),
        ],
        ..AARCH64
    },
    Variant {
        name: Some("nested"),
        told: "stage=2",
        tables: Tables::Second,
        scenes: &[
            Scene::plain("allow").witnessed("smmu_ptw_level stage=2"),
            Scene::doubled("repair"),
            Scene::requests("nested").witnessed("smmu_ptw_level stage=3 level=0 iova=0x55000000"),
        ],
        ..AARCH64
    },
    Variant {
        name: Some("restart"),
        told: "restart=warm",
        restarts: true,
        scenes: &[Scene::requests("restart"), Scene::requests("repair")],
        ..X86_64
    },
    Variant {
        name: Some("restart"),
        told: "restart=warm",
        restarts: true,
        scenes: &[Scene::requests("restart"), Scene::doubled("repair")],
        ..AARCH64
    },
];

/// Returns `machine` as it comes.
pub(crate) fn ordinary(machine: Machine) -> &'static Variant {
    match machine {
        Machine::X86_64 => &VARIANTS[0],
        Machine::Aarch64 => &VARIANTS[1],
    }
}

/// What the machine as it comes is called where a variant has its name.
pub(crate) const ORDINARY: &str = "ordinary";

impl Variant {
    /// Name of the variant in options.
    pub(crate) fn name(&self) -> &'static str {
        self.name.unwrap_or(ORDINARY)
    }

    /// Returns the scene called `name`, if it shows one.
    pub(crate) fn scene(&self, name: &str) -> Option<&'static Scene> {
        self.scenes.iter().find(|scene| scene.name == name)
    }

    /// Name of the boot among all of a demonstration, of characters that a file name may have.
    pub(crate) fn label(&self) -> String {
        self.to_string().replace(' ', "-")
    }
}

impl fmt::Display for Variant {
    /// The machine, and what sets the boot apart.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.machine.name())?;
        self.name.map_or(Ok(()), |name| write!(f, " {name}"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_machine_as_it_comes_is_booted_first_and_no_boot_is_named_twice() {
        let names: BTreeSet<String> = VARIANTS.iter().map(Variant::to_string).collect();

        assert_eq!(names.len(), VARIANTS.len());
        for (machine, variant) in Machine::ALL.into_iter().zip(VARIANTS) {
            assert_eq!((variant.machine, variant.name), (machine, None));
        }
        assert_eq!(VARIANTS.iter().filter(|variant| variant.name.is_none()).count(), Machine::ALL.len());
    }

    #[test]
    fn no_scene_is_shown_twice_in_one_boot_or_is_taken_for_an_option() {
        for variant in VARIANTS {
            let names: BTreeSet<&str> = variant.scenes.iter().map(|scene| scene.name).collect();

            assert_eq!(names.len(), variant.scenes.len(), "{variant}");
            assert!(names.iter().all(|name| !name.contains([' ', '='])), "{variant}: {names:?}");
            assert!(variant.told.split_whitespace().all(|word| word.contains('=')), "{variant}");
        }
    }

    #[test]
    fn both_machines_show_the_same_ordinary_scenes_in_the_same_order() {
        let names = |variant: &Variant| -> Vec<(&str, bool)> {
            variant.scenes.iter().map(|scene| (scene.name, scene.page_requests)).collect()
        };

        assert_eq!(names(&VARIANTS[0]), names(&VARIANTS[1]));
    }

    #[test]
    fn only_what_rests_on_our_own_page_request_queue_is_a_test_double() {
        let doubles = |variant: &Variant| -> Vec<&str> {
            variant.scenes.iter().filter(|scene| scene.test_double).map(|scene| scene.name).collect()
        };

        for variant in VARIANTS {
            assert!(variant.machine == Machine::Aarch64 || doubles(variant).is_empty(), "{variant}");
        }
        assert_eq!(
            doubles(&VARIANTS[1]),
            ["repair", "silence", "forgery", "restraint", "claims", "departure", "pager"]
        );
    }
}
