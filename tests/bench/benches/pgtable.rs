//! Instructions of the operations on translation tables: ours beside others', each counted inside the operation alone.
//!
//! The numbers are of all leaves together; `pgtable_table` divides them.

mod counted {
    use bench::pgtable::{BLOCKS_1G, BLOCKS_2M, Operation, PAGES, Subject, Who};
    use gungraun::{library_benchmark, library_benchmark_group};

    macro_rules! operation {
        ($name:ident, $operation:expr) => {
            #[library_benchmark]
            #[bench::ours_long_mode(Who::OursLongMode.ready_for($operation))]
            #[bench::ours_stage_2(Who::OursStage2.ready_for($operation))]
            #[bench::aarch64_paging(Who::Aarch64Paging.ready_for($operation))]
            #[bench::multiarch(Who::Multiarch.ready_for($operation))]
            #[bench::x86_64(Who::X86_64.ready_for($operation))]
            #[bench::nobody(Who::Nobody.ready_for($operation))]
            fn $name(mut subject: Box<dyn Subject>) {
                let _ = $operation.run(&mut *subject);
                // To take the tables down is not part of it.
                std::mem::forget(subject);
            }
        };
    }

    operation!(map_pages_in_one_call, Operation::MapAll(PAGES));
    operation!(map_pages_one_by_one, Operation::MapEach(PAGES));
    operation!(map_2m_in_one_call, Operation::MapAll(BLOCKS_2M));
    operation!(map_2m_one_by_one, Operation::MapEach(BLOCKS_2M));
    operation!(map_1g_in_one_call, Operation::MapAll(BLOCKS_1G));
    operation!(map_1g_one_by_one, Operation::MapEach(BLOCKS_1G));
    operation!(unmap_pages_in_one_call, Operation::UnmapAll(PAGES));
    operation!(unmap_pages_one_by_one, Operation::UnmapEach(PAGES));
    operation!(protect_pages_in_one_call, Operation::ProtectAll(PAGES));
    operation!(protect_pages_one_by_one, Operation::ProtectEach(PAGES));
    operation!(translate_random_pages, Operation::Translate);

    library_benchmark_group!(
        name = tables,
        benchmarks = [
            map_pages_in_one_call,
            map_pages_one_by_one,
            map_2m_in_one_call,
            map_2m_one_by_one,
            map_1g_in_one_call,
            map_1g_one_by_one,
            unmap_pages_in_one_call,
            unmap_pages_one_by_one,
            protect_pages_in_one_call,
            protect_pages_one_by_one,
            translate_random_pages,
        ]
    );
    gungraun::main!(library_benchmark_groups = tables);

    pub fn run() {
        main();
    }
}

fn main() {
    bench::tools_or_exit();
    counted::run();
}
