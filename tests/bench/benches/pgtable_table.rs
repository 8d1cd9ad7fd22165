//! Time of the operations on translation tables, beside the instructions that `--bench pgtable` counted last, for each leaf.

use bench::{
    Row,
    pgtable::{BLOCKS_1G, BLOCKS_2M, Operation, PAGES, Who},
};
use std::{path::PathBuf, time::Instant};

/// The operations, by the names under which `--bench pgtable` files them.
const OPERATIONS: [(&str, Operation); 11] = [
    ("map_pages_in_one_call", Operation::MapAll(PAGES)),
    ("map_pages_one_by_one", Operation::MapEach(PAGES)),
    ("map_2m_in_one_call", Operation::MapAll(BLOCKS_2M)),
    ("map_2m_one_by_one", Operation::MapEach(BLOCKS_2M)),
    ("map_1g_in_one_call", Operation::MapAll(BLOCKS_1G)),
    ("map_1g_one_by_one", Operation::MapEach(BLOCKS_1G)),
    ("unmap_pages_in_one_call", Operation::UnmapAll(PAGES)),
    ("unmap_pages_one_by_one", Operation::UnmapEach(PAGES)),
    ("protect_pages_in_one_call", Operation::ProtectAll(PAGES)),
    ("protect_pages_one_by_one", Operation::ProtectEach(PAGES)),
    ("translate_random_pages", Operation::Translate),
];

/// Those that are ours, and those that are not: both columns of what is kept among the figures.
const OURS: [Who; 2] = [Who::OursLongMode, Who::OursStage2];
const OTHERS: [Who; 3] = [Who::Aarch64Paging, Who::Multiarch, Who::X86_64];

/// Runs of an operation, of which the median counts.
const RUNS: usize = 9;

/// Nanoseconds for each leaf, and how many leaves; `None` where the subject has no such operation.
fn time(who: Who, operation: Operation) -> Option<(f64, u64)> {
    let mut taken = Vec::new();
    let mut leaves = 0;
    for _ in 0..RUNS {
        let mut subject = who.ready_for(operation);
        let start = Instant::now();
        leaves = operation.run(&mut *subject)?;
        taken.push(start.elapsed().as_secs_f64() * 1e9 / leaves as f64);
    }
    taken.sort_by(f64::total_cmp);
    Some((taken[RUNS / 2], leaves))
}

/// Where `--bench pgtable` files its counts: beside the build.
fn counts() -> Option<PathBuf> {
    let program = std::env::current_exe().ok()?;
    Some(program.ancestors().nth(3)?.join("gungraun/bench/pgtable/counted"))
}

/// Instructions that were counted of all leaves together.
fn counted(operation: &str, who: Who) -> Option<u64> {
    let folder = counts()?.join("tables").join(format!("{operation}.{}", who.name()));
    let file = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("callgrind.") && name.ends_with(".out")
    })?;
    let text = std::fs::read_to_string(file).ok()?;
    let total =
        text.lines().find_map(|line| line.strip_prefix("summary:").or(line.strip_prefix("totals:")))?;
    total.split_whitespace().next()?.parse().ok()
}

fn main() {
    println!(
        "for each leaf, or translation: instructions (as `--bench pgtable` counted them last) and ns (median of {RUNS})\n"
    );
    println!("{:<26}{}", "", Who::ALL.map(|who| format!("{:>20}", who.name())).concat());
    let mut rows: [Vec<Row>; 2] = Default::default();
    for (name, operation) in OPERATIONS {
        let costs = Who::ALL.map(|who| {
            let (ns, leaves) = time(who, operation)?;
            Some((ns, counted(name, who).map(|all| all as f64 / leaves as f64)))
        });
        let cells = costs.map(|cost| match cost {
            Some((ns, count)) => {
                let count = count.map_or("-".into(), |count| format!("{count:.1}"));
                format!("{count:>11} {ns:>8.2}")
            }
            None => format!("{:>20}", "-"),
        });
        println!("{name:<26}{}", cells.concat());
        // Each of ours beside all others.
        let count =
            |of: Who| Who::ALL.iter().zip(costs).find(|&(&who, _)| who == of).and_then(|(_, cost)| cost?.1);
        for (ours, rows) in OURS.into_iter().zip(&mut rows) {
            let what =
                format!("{}, {}, for each leaf", name.replace('_', " "), ours.name().replace('_', " "));
            rows.push(Row { what, costs: [ours].into_iter().chain(OTHERS).map(count).collect(), goal: None });
        }
    }
    let names: Vec<_> = ["ours"].into_iter().chain(OTHERS.iter().map(|who| who.name())).collect();
    for rows in &rows {
        bench::keep("instructions", &names, rows);
    }
}
