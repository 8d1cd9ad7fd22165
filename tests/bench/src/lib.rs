//! What the benches share. How to run them, and what they need: `README.md` beside this package.

pub mod pgtable;

use qemu_runner::{HOST, Row as Figure, Rows};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

/// The programs that count instructions, and what installs each.
const TOOLS: [(&str, &str); 2] = [
    ("valgrind", "apt install valgrind, or the like for your system"),
    ("gungraun-runner", "cargo install gungraun-runner --version 0.20.0 --locked"),
];

/// Ends the process, and says what to install, if a program that counts instructions is missing.
pub fn tools_or_exit() {
    // The process that is counted is started by one that has looked.
    if is_counted() {
        return;
    }
    let missing = TOOLS.iter().filter(|(name, _)| {
        // Whoever says where its runner is has one.
        let elsewhere = *name == "gungraun-runner" && option_env!("GUNGRAUN_RUNNER").is_some();
        !elsewhere && Command::new(name).arg("--version").output().is_err()
    });
    let missing: Vec<_> =
        missing.map(|(name, how)| format!("{name} is missing; install it: {how}")).collect();
    if !missing.is_empty() {
        eprintln!("instructions cannot be counted:\n  {}", missing.join("\n  "));
        std::process::exit(1);
    }
}

/// Returns whether this process was started to have one case counted, and is to do nothing else.
pub fn is_counted() -> bool {
    std::env::args().any(|arg| arg.starts_with("--gungraun-run"))
}

/// One line of a table: the same operation by us and by others, instructions or nanoseconds of each operation.
pub struct Row {
    /// The operation.
    pub what: String,
    /// Ours first; `None` is printed as a dash.
    pub costs: Vec<Option<f64>>,
    /// What ours may cost.
    pub goal: Option<f64>,
}

/// Prints a table whose columns are called `names`, and puts its first column beside the best of the others into
/// `portcullis/measure.json` of cargo's build directory; `unit` is what is counted.
pub fn print(unit: &str, names: &[&str], rows: &[Row]) {
    show(unit, names, rows);
    keep(unit, names, rows);
}

/// Puts what [`print`] would print among the figures, and prints nothing.
pub fn keep(unit: &str, names: &[&str], rows: &[Row]) {
    record(figures(unit, names, rows));
}

/// Turns a table into figures.
fn figures(unit: &str, names: &[&str], rows: &[Row]) -> Rows {
    let figure = |row: &Row| {
        let figure = Figure::new(&row.what, HOST, unit, row.costs.first().copied().flatten()?);
        let others = names.iter().zip(&row.costs).skip(1);
        let best =
            others.filter_map(|(name, cost)| Some((name, (*cost)?))).min_by(|a, b| a.1.total_cmp(&b.1));
        let figure = match best {
            Some((name, cost)) => figure.beside(cost, name),
            None => figure,
        };
        Some(match row.goal {
            Some(goal) => figure.aiming_at(goal),
            None => figure,
        })
    };
    Rows(rows.iter().filter_map(figure).collect())
}

/// Puts `rows` among the figures of this build.
pub fn record(rows: Rows) {
    let path = qemu_runner::rows_path(&target());
    let merged = Rows::read(&path).and_then(|mut all| {
        all.renew(rows);
        if let Some(directory) = path.parent() {
            // If it cannot be made, the file cannot be written, and that is told.
            let _ = fs::create_dir_all(directory);
        }
        all.write(&path)
    });
    if let Err(error) = merged {
        eprintln!("the figures are not recorded: {error}");
        std::process::exit(1);
    }
}

/// Cargo's build directory.
fn target() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    std::env::var_os("CARGO_TARGET_DIR").map_or(root.join("target"), Into::into)
}

fn show(title: &str, names: &[&str], rows: &[Row]) {
    let what = rows.iter().map(|row| row.what.len()).chain([title.len()]).max().unwrap_or(0);
    let widths: Vec<_> = names.iter().map(|name| name.len().max(8)).collect();
    print!("\n{title:what$}");
    names.iter().zip(&widths).for_each(|(name, width)| print!("  {name:>width$}"));
    println!("      goal");
    for row in rows {
        print!("{:what$}", row.what);
        for (cost, width) in row.costs.iter().zip(&widths) {
            match cost {
                Some(cost) => print!("  {cost:>width$.1}"),
                None => print!("  {:>width$}", "-"),
            }
        }
        match (row.goal, row.costs.first().copied().flatten()) {
            // To the digit that is printed: a thousandth is what surrounds a run of a thousand.
            (Some(goal), Some(ours)) if ours < goal + 0.05 => println!("  {goal:>8}  met"),
            (Some(goal), Some(ours)) => println!("  {goal:>8}  missed by {:.1}", ours - goal),
            _ => println!("         -"),
        }
    }
}

/// Returns the instructions that were counted for each of `operations` in `case` of `function`, in this run.
///
/// `None` if that cannot be read.
pub fn instructions(bench: &str, function: &str, case: &str, operations: usize) -> Option<f64> {
    let case = format!("gungraun/bench/{bench}/counted/all/{function}.{case}/summary.json");
    let summary: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(target().join(case)).ok()?).ok()?;
    let counted = summary.pointer("/profiles/0/data/total/metrics/Ir/values/new")?.as_f64()?;
    Some(counted / operations as f64)
}

/// Returns the nanoseconds that each of `operations` takes in `measured`, after `set_up`: the median of 31 tries.
pub fn nanoseconds<S>(
    operations: usize,
    mut set_up: impl FnMut() -> S,
    mut measured: impl FnMut(&mut S),
) -> Option<f64> {
    let mut tries: Vec<_> = (0..31)
        .map(|_| {
            let mut stage = set_up();
            let start = Instant::now();
            measured(&mut stage);
            start.elapsed().as_nanos()
        })
        .collect();
    tries.sort_unstable();
    Some(*tries.get(tries.len() / 2)? as f64 / operations as f64)
}
