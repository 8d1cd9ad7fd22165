//! Tables that ours wrote, read by the walkers of others: they agree on what is mapped where, and how.
#![expect(unsafe_code, reason = "the others' walkers take pointers to tables")]
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use aarch64_paging::{
    Mapping,
    descriptor::{Descriptor, El1Attributes, PagingAttributes, PhysicalAddress, Stage2Attributes},
    paging::{El1And0, MemoryRegion, PageTable as ArmTable, Stage2 as ArmStage2, TranslationRegime, VaRange},
};
use hosted::{Random, grant};
use iommu::{PAGE_SIZE, Perms, PhysAddr};
use pgtable::{Format, Frames, Gather, Limits, LongMode, Stage1, Stage2, Tree, Words};
use std::{
    collections::BTreeMap,
    mem::ManuallyDrop,
    ops::Range,
    ptr::{self, NonNull},
    sync::atomic::AtomicU64,
};
use x86_64::{
    VirtAddr,
    structures::paging::{
        MappedPageTable, PageTable, PageTableFlags, PhysFrame, Translate,
        mapper::{MappedFrame, PageTableFrameMapping, TranslateResult},
    },
};

#[repr(align(4096))]
struct Page([AtomicU64; 512]);

/// Frames whose physical addresses are their host addresses. They last as long as the process.
#[derive(Default)]
struct HostFrames(BTreeMap<PhysAddr, &'static Page>);

impl Words for HostFrames {
    type Table = &'static [AtomicU64; 512];

    fn table(&self, frame: PhysAddr) -> Self::Table {
        &self.0.get(&frame).expect("it was taken").0
    }
}

impl Frames for HostFrames {
    fn take(&mut self, bytes: usize) -> Option<PhysAddr> {
        assert_eq!(bytes, 4096);
        let page: &'static Page = Box::leak(Box::new(Page([const { AtomicU64::new(0) }; 512])));
        let phys = PhysAddr(ptr::from_ref(page).expose_provenance() as u64);
        self.0.insert(phys, page);
        Some(phys)
    }
    fn give_back(&mut self, _frame: PhysAddr, _bytes: usize) {}
    fn publish(&self, _range: Range<PhysAddr>) {}
}

/// What a walker finds at an address: the memory, and whether it may be written and executed.
type Found = Option<(u64, bool, bool)>;

/// Maps and unmaps at random, and compares what `theirs` finds at addresses all around.
fn agree<F: Format>(theirs: impl Fn(PhysAddr, u64) -> Found) {
    let mut frames = HostFrames::default();
    let tree = Tree::<F>::new(&mut frames, Limits::NONE).expect("a frame");
    let mut random = Random::new(11);
    let starts = [0_u64, 1 << 21, 1 << 30, 1 << 39, (1 << 47) - (4 << 30)];
    let (mut mapped, mut present, mut absent) = (0, 0, 0);

    for _ in 0..2_000 {
        let start = starts[random.below(5) as usize] + random.below(4) * PAGE_SIZE;
        let bytes = [PAGE_SIZE, 3 * PAGE_SIZE, 2 << 20, 4 << 20, 1 << 30][random.below(5) as usize];
        let phys = (random.below(1 << 8) << 30) + start % (1 << 30);
        let perms = Perms { write: random.below(2) == 0, execute: random.below(2) == 0, ..Perms::READ };
        if random.below(2) == 0 {
            mapped += i32::from(tree.map(&mut frames, start, &grant(phys, bytes / PAGE_SIZE), perms).is_ok());
        } else {
            let mut gather = Gather::new();
            let _ = tree.unmap(&mut frames, start, bytes, &mut gather);
            gather.give_back(&mut frames);
        }
        for _ in 0..8 {
            let address = start + random.below(2 * bytes) - bytes.min(start) * random.below(2);
            let ours = tree.translate(&frames, address).map(|leaf| {
                let perms = leaf.attributes().perms;
                (leaf.phys().0, perms.write, perms.execute)
            });
            assert_eq!(theirs(tree.root(), address), ours, "{address:#x}");
            if ours.is_some() { present += 1 } else { absent += 1 }
        }
    }
    assert!(mapped > 50 && present > 500 && absent > 500, "{mapped} {present} {absent}");
}

struct Straight;

// SAFETY: the physical addresses of these tables are host addresses.
unsafe impl PageTableFrameMapping for Straight {
    fn frame_to_pointer(&self, frame: PhysFrame) -> *mut PageTable {
        ptr::with_exposed_provenance_mut(frame.start_address().as_u64() as usize)
    }
}

#[test]
fn x86_64_reads_long_mode_tables_as_they_were_meant() {
    agree::<LongMode>(|root, address| {
        let top = ptr::with_exposed_provenance_mut::<PageTable>(root.0 as usize);
        // SAFETY: a top table of this process, which nobody else reaches while it is read.
        let top = unsafe { &mut *top };
        // SAFETY: all tables below it are host memory at their addresses, too.
        let tables = unsafe { MappedPageTable::new(top, Straight) };
        match tables.translate(VirtAddr::new(address)) {
            TranslateResult::Mapped { frame, offset, flags } => {
                let large = !matches!(frame, MappedFrame::Size4KiB(_));
                assert_eq!(flags.contains(PageTableFlags::HUGE_PAGE), large);
                let write = flags.contains(PageTableFlags::WRITABLE);
                let execute = !flags.contains(PageTableFlags::NO_EXECUTE);
                Some((frame.start_address().as_u64() + offset, write, execute))
            }
            TranslateResult::NotMapped => None,
            TranslateResult::InvalidFrameAddress(frame) => panic!("{frame:?}"),
        }
    });
}

/// Hands out one table that is there already, and takes none back.
struct OneTable(u64);

impl<A: PagingAttributes> aarch64_paging::paging::Translation<A> for OneTable {
    fn allocate_table(&mut self) -> (NonNull<ArmTable<A>>, PhysicalAddress) {
        let root = PhysicalAddress(self.0 as usize);
        (self.physical_to_virtual(root), root)
    }
    unsafe fn deallocate_table(&mut self, _table: NonNull<ArmTable<A>>) {
        unreachable!("the tables are read, and that is all")
    }
    fn physical_to_virtual(&self, frame: PhysicalAddress) -> NonNull<ArmTable<A>> {
        NonNull::new(ptr::with_exposed_provenance_mut(frame.0)).expect("no table lies at 0")
    }
}

fn arm_walk<R: TranslationRegime>(
    tables: &Mapping<OneTable, R>,
    address: u64,
    perms: impl Fn(R::Attributes) -> (bool, bool),
) -> Found {
    let at = address as usize;
    let mut found = None;
    let mut look = |_: &MemoryRegion, descriptor: &Descriptor<R::Attributes>, level: usize| {
        if descriptor.is_valid() && (level == 3) == descriptor.is_table_or_page() {
            let low = (1 << (12 + 9 * (3 - level))) - 1;
            let (write, execute) = perms(descriptor.flags());
            found = Some(((descriptor.output_address().0 | at & low) as u64, write, execute));
        }
        Ok(())
    };
    tables.walk_range(&MemoryRegion::new(at, at + 1), &mut look).expect("it is in range");
    found
}

#[test]
fn aarch64_paging_reads_stage_1_tables_as_they_were_meant() {
    agree::<Stage1>(|root, address| {
        let tables = Mapping::with_asid_and_va_range(OneTable(root.0), 1, 0, El1And0, VaRange::Lower);
        arm_walk(&ManuallyDrop::new(tables), address, |flags: El1Attributes| {
            let execute = !flags.intersects(El1Attributes::PXN | El1Attributes::UXN);
            assert!(
                flags.contains(El1Attributes::USER | El1Attributes::ACCESSED | El1Attributes::NON_GLOBAL)
            );
            assert!(flags.contains(El1Attributes::INNER_SHAREABLE));
            (!flags.contains(El1Attributes::READ_ONLY), execute)
        })
    });
}

#[test]
fn aarch64_paging_reads_stage_2_tables_as_they_were_meant() {
    agree::<Stage2>(|root, address| {
        let tables = Mapping::new(OneTable(root.0), 0, ArmStage2);
        arm_walk(&ManuallyDrop::new(tables), address, |flags: Stage2Attributes| {
            let write_back =
                Stage2Attributes::MEMATTR_NORMAL_OUTER_WB | Stage2Attributes::MEMATTR_NORMAL_INNER_WB;
            assert!(flags.contains(write_back | Stage2Attributes::SH_INNER | Stage2Attributes::ACCESS_FLAG));
            assert!(flags.contains(Stage2Attributes::S2AP_ACCESS_RO), "it may be read");
            (flags.contains(Stage2Attributes::S2AP_ACCESS_WO), !flags.contains(Stage2Attributes::XN))
        })
    });
}
