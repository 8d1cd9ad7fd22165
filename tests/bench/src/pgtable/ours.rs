//! `pgtable`.

use super::{Arena, Leaves, PAGE, START, Subject, random_addresses};
use core::sync::atomic::AtomicU64;
use iommu::{Grant, Perms, PhysAddr};
use pgtable::{Format, Frames, Gather, Limits, Tree, Words};
use std::ops::Range;

impl Words for Arena {
    type Table = &'static [AtomicU64; 512];

    #[inline(always)]
    fn table(&self, frame: PhysAddr) -> Self::Table {
        // SAFETY: frames come from the arena, which outlives its tree.
        unsafe { &*(frame.0 as *const [AtomicU64; 512]) }
    }
}

impl Frames for Arena {
    fn take(&mut self, bytes: usize) -> Option<PhysAddr> {
        (bytes == 4096).then(|| self.take_zeroed()).flatten().map(PhysAddr)
    }
    fn give_back(&mut self, frame: PhysAddr, _bytes: usize) {
        Arena::give_back(self, frame.0);
    }
    #[inline(always)]
    fn publish(&self, _range: Range<PhysAddr>) {}
}

pub struct Ours<F: Format> {
    small: Tree<F>,
    large: Tree<F>,
    arena: Arena,
}

fn grant(phys: u64, bytes: u64) -> Grant {
    // SAFETY: nothing walks the tables.
    unsafe { Grant::new(PhysAddr(phys)..PhysAddr(phys + bytes)) }
}

impl<F: Format> Ours<F> {
    pub fn new() -> Self {
        let mut arena = Arena::new();
        let mut tree = |limits| match Tree::new(&mut arena, limits) {
            Ok(tree) => tree,
            Err(error) => panic!("{error}"),
        };
        Self { small: tree(Limits::PAGES), large: tree(Limits::NONE), arena }
    }

    /// One call for each leaf, of a size that the compiler knows, as it does in a caller that lends pages.
    fn map_each<const BYTES: u64>(&mut self, leaves: Leaves) -> Option<()> {
        let tree = if BYTES == PAGE { &self.small } else { &self.large };
        for at in leaves.each() {
            let grant = grant(leaves.memory() + at, BYTES);
            tree.map(&mut self.arena, START + at, &grant, Perms::READ_WRITE).ok()?;
        }
        Some(())
    }

    fn unmap_each<const BYTES: u64>(&mut self, leaves: Leaves) -> Option<()> {
        let tree = if BYTES == PAGE { &self.small } else { &self.large };
        let mut gather = Gather::new();
        for at in leaves.each() {
            tree.unmap(&mut self.arena, START + at, BYTES, &mut gather).ok()?;
        }
        gather.give_back(&mut self.arena);
        Some(())
    }

    fn protect_each<const BYTES: u64>(&mut self, leaves: Leaves) -> Option<()> {
        let tree = if BYTES == PAGE { &self.small } else { &self.large };
        let mut gather = Gather::new();
        for at in leaves.each() {
            tree.protect(&mut self.arena, START + at, BYTES, Perms::READ, &mut gather).ok()?;
        }
        gather.give_back(&mut self.arena);
        Some(())
    }
}

impl<F: Format> Subject for Ours<F> {
    #[inline(never)]
    fn map_all(&mut self, leaves: Leaves) -> Option<()> {
        let tree = if leaves.bytes == PAGE { &self.small } else { &self.large };
        tree.map(&mut self.arena, START, &grant(leaves.memory(), leaves.total()), Perms::READ_WRITE).ok()
    }
    #[inline(never)]
    fn map_each(&mut self, leaves: Leaves) -> Option<()> {
        match leaves.bytes {
            PAGE => self.map_each::<PAGE>(leaves),
            0x20_0000 => self.map_each::<0x20_0000>(leaves),
            _ => self.map_each::<0x4000_0000>(leaves),
        }
    }
    #[inline(never)]
    fn unmap_all(&mut self, leaves: Leaves) -> Option<()> {
        let tree = if leaves.bytes == PAGE { &self.small } else { &self.large };
        let mut gather = Gather::new();
        tree.unmap(&mut self.arena, START, leaves.total(), &mut gather).ok()?;
        gather.give_back(&mut self.arena);
        Some(())
    }
    #[inline(never)]
    fn unmap_each(&mut self, leaves: Leaves) -> Option<()> {
        match leaves.bytes {
            PAGE => self.unmap_each::<PAGE>(leaves),
            0x20_0000 => self.unmap_each::<0x20_0000>(leaves),
            _ => self.unmap_each::<0x4000_0000>(leaves),
        }
    }
    #[inline(never)]
    fn protect_all(&mut self, leaves: Leaves) -> Option<()> {
        let tree = if leaves.bytes == PAGE { &self.small } else { &self.large };
        let mut gather = Gather::new();
        tree.protect(&mut self.arena, START, leaves.total(), Perms::READ, &mut gather).ok()?;
        gather.give_back(&mut self.arena);
        Some(())
    }
    #[inline(never)]
    fn protect_each(&mut self, leaves: Leaves) -> Option<()> {
        match leaves.bytes {
            PAGE => self.protect_each::<PAGE>(leaves),
            0x20_0000 => self.protect_each::<0x20_0000>(leaves),
            _ => self.protect_each::<0x4000_0000>(leaves),
        }
    }
    #[inline(never)]
    fn translate(&mut self) -> Option<u64> {
        let mut sum = 0_u64;
        for address in random_addresses() {
            sum = sum.wrapping_add(self.small.translate(&self.arena, address)?.phys().0);
        }
        Some(sum)
    }
}
