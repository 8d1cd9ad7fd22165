//! Instructions of the translation tables' operations.

use iommu::PhysAddr;
use pgtable::{ENTRIES, Frames, Tree, VTD_FIRST_STAGE};

/// Translations that are counted together.
const TRANSLATIONS: u64 = 100_000;

/// Frames in a row; a frame's address is its number, in pages.
struct Arena(Vec<[u64; ENTRIES]>);

impl Frames for Arena {
    fn take(&mut self) -> Option<PhysAddr> {
        self.0.push([0; ENTRIES]);
        Some(PhysAddr((self.0.len() as u64 - 1) * 4096))
    }
    fn give_back(&mut self, _frame: PhysAddr) {}
    fn load(&self, frame: PhysAddr, index: usize) -> u64 {
        self.0[(frame.0 / 4096) as usize][index]
    }
    fn store(&mut self, frame: PhysAddr, index: usize, value: u64) {
        self.0[(frame.0 / 4096) as usize][index] = value;
    }
}

fn empty() -> (Tree, Arena) {
    let mut arena = Arena(Vec::new());
    let Ok(tree) = Tree::new(&mut arena, VTD_FIRST_STAGE) else { unreachable!("the arena grows") };
    (tree, arena)
}

mod counted {
    use super::{Arena, TRANSLATIONS, Tree, empty};
    use gungraun::{library_benchmark, library_benchmark_group};

    #[library_benchmark]
    #[bench::nothing_mapped(empty())]
    fn translate((tree, arena): (Tree, Arena)) -> u64 {
        (0..TRANSLATIONS).filter(|page| tree.translate(&arena, page * 4096).is_some()).count() as u64
    }

    library_benchmark_group!(name = ours, benchmarks = [translate]);
    gungraun::main!(library_benchmark_groups = ours);

    pub fn run() {
        main();
    }
}

fn main() {
    bench::tools_or_exit();
    counted::run();
}
