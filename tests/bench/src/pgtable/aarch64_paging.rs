//! `aarch64-paging`, stage 2. Unmapping is mapping without the valid bit; it has no call for one translation.

use super::{Arena, Leaves, PAGE, START, Subject, random_addresses};
use aarch64_paging::{
    Mapping,
    descriptor::{PhysicalAddress, Stage2Attributes, UpdatableDescriptor},
    paging::{Constraints, MemoryRegion, PageTable, Stage2, Translation},
};
use std::ptr::NonNull;

const READ: Stage2Attributes = Stage2Attributes::VALID
    .union(Stage2Attributes::MEMATTR_NORMAL_OUTER_WB)
    .union(Stage2Attributes::MEMATTR_NORMAL_INNER_WB)
    .union(Stage2Attributes::S2AP_ACCESS_RO)
    .union(Stage2Attributes::SH_INNER)
    .union(Stage2Attributes::ACCESS_FLAG);
const READ_WRITE: Stage2Attributes = READ.union(Stage2Attributes::S2AP_ACCESS_WO);

impl Translation<Stage2Attributes> for Arena {
    fn allocate_table(&mut self) -> (NonNull<PageTable<Stage2Attributes>>, PhysicalAddress) {
        let frame = self.take_zeroed().unwrap_or_default();
        let Some(table) = NonNull::new(frame as *mut PageTable<Stage2Attributes>) else {
            panic!("the arena is used up")
        };
        (table, PhysicalAddress(frame as usize))
    }
    unsafe fn deallocate_table(&mut self, table: NonNull<PageTable<Stage2Attributes>>) {
        self.give_back(table.as_ptr() as u64);
    }
    fn physical_to_virtual(&self, frame: PhysicalAddress) -> NonNull<PageTable<Stage2Attributes>> {
        NonNull::new(frame.0 as *mut PageTable<Stage2Attributes>).unwrap_or(NonNull::dangling())
    }
}

pub struct Theirs(Mapping<Arena, Stage2>);

fn region(offset: u64, bytes: u64) -> MemoryRegion {
    let start = (START + offset) as usize;
    MemoryRegion::new(start, start + bytes as usize)
}

impl Theirs {
    pub fn new() -> Self {
        Self(Mapping::new(Arena::new(), 0, Stage2))
    }

    #[inline(always)]
    fn map(&mut self, leaves: Leaves, offset: u64, bytes: u64, flags: Stage2Attributes) -> Option<()> {
        let constraints = match leaves.bytes {
            PAGE => Constraints::NO_BLOCK_MAPPINGS | Constraints::NO_CONTIGUOUS_HINT,
            _ => Constraints::NO_CONTIGUOUS_HINT,
        };
        let phys = PhysicalAddress((leaves.memory() + offset) as usize);
        self.0.map_range(&region(offset, bytes), phys, flags, constraints).ok()
    }

    #[inline(always)]
    fn protect(&mut self, offset: u64, bytes: u64) -> Option<()> {
        let read_only = |_: &MemoryRegion, descriptor: &mut UpdatableDescriptor<Stage2Attributes>| {
            if descriptor.is_table() || !descriptor.flags().contains(Stage2Attributes::VALID) {
                return Ok(());
            }
            descriptor.modify_flags(Stage2Attributes::empty(), Stage2Attributes::S2AP_ACCESS_WO)
        };
        self.0.modify_range(&region(offset, bytes), &read_only).ok()
    }
}

impl Subject for Theirs {
    #[inline(never)]
    fn map_all(&mut self, leaves: Leaves) -> Option<()> {
        self.map(leaves, 0, leaves.total(), READ_WRITE)
    }
    #[inline(never)]
    fn map_each(&mut self, leaves: Leaves) -> Option<()> {
        leaves.each().try_for_each(|at| self.map(leaves, at, leaves.bytes, READ_WRITE))
    }
    #[inline(never)]
    fn unmap_all(&mut self, leaves: Leaves) -> Option<()> {
        self.map(leaves, 0, leaves.total(), Stage2Attributes::empty())
    }
    #[inline(never)]
    fn unmap_each(&mut self, leaves: Leaves) -> Option<()> {
        leaves.each().try_for_each(|at| self.map(leaves, at, leaves.bytes, Stage2Attributes::empty()))
    }
    #[inline(never)]
    fn protect_all(&mut self, leaves: Leaves) -> Option<()> {
        self.protect(0, leaves.total())
    }
    #[inline(never)]
    fn protect_each(&mut self, leaves: Leaves) -> Option<()> {
        leaves.each().try_for_each(|at| self.protect(at, leaves.bytes))
    }
    #[inline(never)]
    fn translate(&mut self) -> Option<u64> {
        let mut sum = 0_u64;
        for address in random_addresses() {
            let at = address as usize;
            let mut found = |region: &MemoryRegion,
                             descriptor: &aarch64_paging::descriptor::Descriptor<_>,
                             level: usize| {
                if level == 3 {
                    let offset = at - region.start().0;
                    sum = sum.wrapping_add((descriptor.output_address().0 + offset) as u64);
                }
                Ok(())
            };
            self.0.walk_range(&MemoryRegion::new(at, at + 1), &mut found).ok()?;
        }
        Some(sum)
    }
}
