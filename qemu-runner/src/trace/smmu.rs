//! Arm SMMUv3 in QEMU's trace (`smmu*`).
//!
//! The hypervisor gives each domain a number of its own, which is its VMID and, where it has first-stage tables, its ASID
//! as well. QEMU caches a translation under both. Where the unit has no VMIDs, the trace has -1 for each.
//!
//! Of `CMD_ATC_INV` the trace has the name alone: that a device was told to forget something, but not which, and not what.

use super::{PAGE, Sight, Step, Taken};
use crate::scenes::hex;

/// Offset of the register `SMMU_CR0`.
const CR0: u64 = 0x20;
/// Offset of the register `SMMU_GERRORN`.
const GERRORN: u64 = 0x64;
/// Offset of the register `SMMU_CMDQ_PROD`.
const CMDQ_PROD: u64 = 0x98;
/// `SMMU_CR0.SMMUEN`: devices are translated.
const SMMUEN: u64 = 1;

/// Reads an event of an SMMUv3: its name and what follows that.
pub(super) fn read(event: &str, text: &str) -> Option<Sight> {
    match event {
        "smmuv3_write_mmio" => register(text),
        // By a stream table entry, and by a unit that is off and does not abort.
        "smmuv3_translate_bypass" | "smmuv3_translate_disable" => {
            let stream = text.split(' ').find_map(|word| hex(word.strip_prefix("sid=")?));
            Some(Sight::Bypass(stream))
        }
        "smmuv3_cmdq_opcode" => match text {
            // QEMU has executed all that stands before a CMD_SYNC in the queue when it comes to that.
            "<--- SMMU_CMD_SYNC" => Some(Sight::Completion { drained: false }),
            "<--- SMMU_CMD_ATC_INV" => Some(Sight::Taken(Taken::all(Step::DeviceTlb))),
            _ => None,
        },
        _ => taken(event, text).map(Sight::Taken),
    }
}

/// Reads a write of a register: `addr: 0x20 val:0xf size: 0x4(0)`.
fn register(text: &str) -> Option<Sight> {
    let (addr, rest) = text.strip_prefix("addr: ")?.split_once(" val:")?;
    let (value, size) = rest.split_once(" size: ")?;
    // In brackets, whether the unit took the write.
    match hex(addr)? {
        CR0 if size.ends_with("(0)") => Some(Sight::Translation(hex(value)? & SMMUEN != 0)),
        // Traced when the commands have been executed. A queue that stopped goes on when its error is acknowledged.
        CMDQ_PROD | GERRORN => Some(Sight::Doorbell),
        _ => None,
    }
}

/// Reads a command that makes the unit forget configuration or translations.
///
/// `CMD_TLBI_NH_ASID` is not one: it leaves global translations in place.
fn taken(event: &str, text: &str) -> Option<Taken> {
    let field = |name: &str| text.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    let number = |name: &str| field(name)?.parse::<u64>().ok();
    match event {
        "smmuv3_cmdq_cfgi_ste_range" if text == "start=0x0 - end=0xffffffff" => {
            Some(Taken::all(Step::Configuration))
        }
        "smmuv3_cmdq_cfgi_ste" | "smmuv3_cmdq_cfgi_cd" => {
            // `streamid= 0x18` and `sid=0x18`.
            let (_, stream) = text.split_once('=')?;
            Some(Taken { stream: Some(hex(stream.trim_start())?), ..Taken::all(Step::Configuration) })
        }
        "smmuv3_cmdq_tlbi_nsnh" => Some(Taken::all(Step::Translations)),
        "smmuv3_cmdq_tlbi_nh" | "smmuv3_cmdq_tlbi_s12_vmid" => {
            Some(Taken { domain: Some(number("vmid")?), ..Taken::all(Step::Translations) })
        }
        // QEMU splits a command for a range into ranges of a power of two pages, each with an event of its own.
        "smmuv3_range_inval" => {
            let domain = match (field("stage")?, field("vmid")?) {
                ("1", "-1") => number("asid")?,
                ("1", vmid) if field("asid")? == vmid => number("asid")?,
                ("2", _) => number("vmid")?,
                _ => return None,
            };
            let start = hex(field("addr")?)?;
            // Without a granule the command is about whatever translates the address, a page at least.
            let page = match number("tg")? {
                0 => PAGE,
                granule @ 1..=3 => 1 << (10 + 2 * granule),
                _ => return None,
            };
            let end = super::end(start, hex(field("num_pages")?)?, page)?;
            Some(Taken { domain: Some(domain), range: (start, end), ..Taken::all(Step::Translations) })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOMAIN: Taken = Taken { domain: Some(5), ..Taken::all(Step::Translations) };

    fn range(start: u64, end: u64) -> Option<Taken> {
        Some(Taken { range: (start, end), ..DOMAIN })
    }

    #[test]
    fn commands_are_executed_by_the_doorbell_or_when_an_error_is_acknowledged() {
        for register in ["0x98", "0x64"] {
            let text = format!("addr: {register} val:0x1 size: 0x4(0)");

            assert_eq!(read("smmuv3_write_mmio", &text), Some(Sight::Doorbell));
        }
        assert_eq!(read("smmuv3_write_mmio", "addr: 0x9c val:0x1 size: 0x4(0)"), None);
    }

    #[test]
    fn configuration_is_forgotten_by_stream_or_as_a_whole() {
        let all = Taken::all(Step::Configuration);
        let stream = Taken { stream: Some(0x18), ..all };

        assert_eq!(taken("smmuv3_cmdq_cfgi_ste", "streamid= 0x18"), Some(stream));
        assert_eq!(taken("smmuv3_cmdq_cfgi_cd", "sid=0x18"), Some(stream));
        assert_eq!(taken("smmuv3_cmdq_cfgi_ste_range", "start=0x0 - end=0xffffffff"), Some(all));
        assert_eq!(taken("smmuv3_cmdq_cfgi_ste_range", "start=0x0 - end=0x1f"), None);
    }

    #[test]
    fn of_a_device_tlb_the_trace_says_that_one_was_told_and_not_which() {
        let told = read("smmuv3_cmdq_opcode", "<--- SMMU_CMD_ATC_INV");

        assert_eq!(told, Some(Sight::Taken(Taken::all(Step::DeviceTlb))));
    }

    #[test]
    fn each_write_of_cmdq_prod_ends_what_was_submitted_together() {
        assert_eq!(read("smmuv3_write_mmio", "addr: 0x98 val:0x6 size: 0x4(0)"), Some(Sight::Doorbell));
    }

    #[test]
    fn each_way_to_forget_translations_is_read() {
        assert_eq!(taken("smmuv3_cmdq_tlbi_nsnh", ""), Some(Taken::all(Step::Translations)));
        assert_eq!(taken("smmuv3_cmdq_tlbi_nh", "vmid=5"), Some(DOMAIN));
        assert_eq!(taken("smmuv3_cmdq_tlbi_s12_vmid", "vmid=5"), Some(DOMAIN));
        for (text, meant) in [
            (
                "vmid=5 asid=5 addr=0x40000000 tg=0 num_pages=0x1 ttl=0 leaf=1 stage=1",
                range(0x4000_0000, 0x4000_1000),
            ),
            (
                "vmid=-1 asid=5 addr=0x40000000 tg=0 num_pages=0x1 ttl=0 leaf=1 stage=1",
                range(0x4000_0000, 0x4000_1000),
            ),
            (
                "vmid=5 asid=-1 addr=0x12345000 tg=0 num_pages=0x1 ttl=0 leaf=0 stage=2",
                range(0x1234_5000, 0x1234_6000),
            ),
            (
                "vmid=5 asid=5 addr=0x40000000 tg=1 num_pages=0x4 ttl=3 leaf=1 stage=1",
                range(0x4000_0000, 0x4000_4000),
            ),
            (
                "vmid=5 asid=5 addr=0x40000000 tg=3 num_pages=0x2 ttl=3 leaf=1 stage=1",
                range(0x4000_0000, 0x4002_0000),
            ),
        ] {
            assert_eq!(taken("smmuv3_range_inval", text), meant, "{text}");
        }
    }

    #[test]
    fn what_leaves_translations_of_a_domain_in_place_is_no_step() {
        for (event, text) in [
            // Another VMID than that under which the translations of the ASID are cached.
            ("smmuv3_range_inval", "vmid=0 asid=5 addr=0x40000000 tg=0 num_pages=0x1 ttl=0 leaf=1 stage=1"),
            ("smmuv3_range_inval", "vmid=5 asid=5 addr=0x40000000 tg=0 num_pages=0x1 ttl=0 leaf=1"),
            (
                "smmuv3_range_inval",
                "vmid=5 asid=5 addr=0xfffffffffffff000 tg=1 num_pages=0x2 ttl=0 leaf=1 stage=1",
            ),
            ("smmuv3_cmdq_tlbi_nh_asid", "asid=5"),
            ("smmu_iotlb_inv_asid_vmid", "IOTLB invalidate asid=5 vmid=5"),
            ("smmu_config_cache_inv", "Config cache INV for sid=0x18"),
            ("smmuv3_cmdq_tlbi_nh", "vmid="),
        ] {
            assert_eq!(taken(event, text), None, "{event} {text}");
        }
    }

    #[test]
    fn the_unit_is_switched_by_smmuen_in_cr0_alone() {
        let write = |text| read("smmuv3_write_mmio", text);

        assert_eq!(write("addr: 0x20 val:0xd size: 0x4(0)"), Some(Sight::Translation(true)));
        assert_eq!(write("addr: 0x20 val:0xe size: 0x4(0)"), Some(Sight::Translation(false)));
        for text in [
            "addr: 0x20 val:0xd size: 0x4(2)",
            "addr: 0x24 val:0xd size: 0x4(0)",
            "addr: 0x2c val:0x1 size: 0x4(0)",
            "addr: 0x20 val:d size: 0x4(0)",
            "addr: 0x20",
        ] {
            assert_eq!(write(text), None, "{text}");
        }
    }

    #[test]
    fn every_way_past_translation_is_a_bypass() {
        let region = "smmuv3-iommu-memory-region-24-0 sid=0x18";
        for (event, text) in [
            ("smmuv3_translate_bypass", format!("{region} STE bypass iova:0x1000 is_write=0")),
            ("smmuv3_translate_disable", format!("{region} bypass (smmu disabled) iova:0x1000 is_write=1")),
        ] {
            assert_eq!(read(event, &text), Some(Sight::Bypass(Some(0x18))), "{event}");
        }
        for event in ["smmuv3_translate_abort", "smmuv3_translate_success"] {
            assert_eq!(read(event, region), None, "{event}");
        }
    }

    #[test]
    fn only_a_sync_completes() {
        assert_eq!(
            read("smmuv3_cmdq_opcode", "<--- SMMU_CMD_SYNC"),
            Some(Sight::Completion { drained: false })
        );
        for opcode in ["<--- SMMU_CMD_TLBI_NH_VA", "<--- SMMU_CMD_CFGI_STE", "<--- INVALID"] {
            assert_eq!(read("smmuv3_cmdq_opcode", opcode), None, "{opcode}");
        }
    }
}
