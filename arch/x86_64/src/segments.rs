//! The segment tables that long mode still wants: one GDT and one TSS for each core.
#![expect(unsafe_code, reason = "descriptor tables are loaded into the processor")]

use crate::cpu::CORES;
use core::cell::UnsafeCell;
use spin::Once;
use x86_64::{
    PrivilegeLevel, VirtAddr,
    instructions::tables::load_tss,
    registers::segmentation::{CS, DS, ES, SS, Segment, SegmentSelector},
    structures::{
        gdt::{Descriptor, GlobalDescriptorTable},
        tss::TaskStateSegment,
    },
};

/// The interrupt stack (`IST`) on which a double fault is reported: the stack it came from may be the cause.
pub(crate) const DOUBLE_FAULT_STACK: u16 = 0;
/// The interrupt stack (`IST`) for NMI, which may come while a stack is being switched.
pub(crate) const NMI_STACK: u16 = 1;

/// Selector of the GDT's code segment, which is where the boot GDT has it too.
const CODE: SegmentSelector = SegmentSelector::new(1, PrivilegeLevel::Ring0);

const IST_BYTES: usize = 8192;

#[repr(C, align(16))]
struct IstStack(UnsafeCell<[u8; IST_BYTES]>);

// SAFETY: no reference to the bytes is ever made; only the core that owns it runs on it.
unsafe impl Sync for IstStack {}

static IST_STACKS: [[IstStack; 2]; CORES] =
    [const { [const { IstStack(UnsafeCell::new([0; IST_BYTES])) }; 2] }; CORES];
static TSS: [Once<TaskStateSegment>; CORES] = [const { Once::new() }; CORES];
static GDT: [Once<GlobalDescriptorTable>; CORES] = [const { Once::new() }; CORES];

/// Loads the segments of `core`, on `core`.
pub(crate) fn load(core: usize) {
    let tss = TSS[core].call_once(|| {
        let mut tss = TaskStateSegment::new();
        for (ist, stack) in IST_STACKS[core].iter().enumerate() {
            tss.interrupt_stack_table[ist] = VirtAddr::from_ptr(stack) + IST_BYTES as u64;
        }
        tss
    });
    let mut data = SegmentSelector::NULL;
    let mut task = SegmentSelector::NULL;
    let gdt = GDT[core].call_once(|| {
        let mut gdt = GlobalDescriptorTable::new();
        gdt.append(Descriptor::kernel_code_segment());
        data = gdt.append(Descriptor::kernel_data_segment());
        task = gdt.append(Descriptor::tss_segment(tss));
        gdt
    });
    gdt.load();
    // SAFETY: the first descriptor appended above is the 64-bit code segment.
    unsafe { CS::set_reg(CODE) };
    // SAFETY: `data` selects the flat data segment appended above.
    unsafe { SS::set_reg(data) };
    // SAFETY: as above.
    unsafe { DS::set_reg(data) };
    // SAFETY: as above.
    unsafe { ES::set_reg(data) };
    // SAFETY: `task` selects the TSS of this core, which no core has loaded before.
    unsafe { load_tss(task) };
}
