//! Figures: what something costs, beside what it costs others, in one file for all who measure.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// How much more of something may be needed than before, in percent, until that is a failure.
///
/// Instructions move a little when anything else in the image does: the compiler joins and places functions anew.
const INSTRUCTIONS_MARGIN: f64 = 2.0;
/// Instructions that are within the margin however few there were.
const INSTRUCTIONS_ALWAYS: f64 = 5.0;

/// One figure.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// What was done.
    pub name: String,
    /// Where: a machine of QEMU's, or [`HOST`].
    pub machine: String,
    /// What is counted.
    pub unit: String,
    /// What it costs here.
    pub ours: f64,
    /// What it costs others.
    pub peer: Option<f64>,
    /// Who they are, and where their figure is from.
    pub peer_name: Option<String>,
    /// What it may cost here.
    pub goal: Option<f64>,
}

/// Machine of the figures that are measured without one.
pub const HOST: &str = "host";
/// Unit of figures that count instructions.
pub const INSTRUCTIONS: &str = "instructions";
/// Unit of figures that count accesses to an IOMMU's registers.
pub const MMIO: &str = "MMIO accesses";
/// Unit of sizes.
pub const BYTES: &str = "bytes";

impl Row {
    /// A figure of ours alone.
    pub fn new(name: &str, machine: &str, unit: &str, ours: f64) -> Self {
        let (name, machine, unit) = (name.into(), machine.into(), unit.into());
        Self { name, machine, unit, ours, peer: None, peer_name: None, goal: None }
    }

    /// The same beside a peer's.
    #[must_use]
    pub fn beside(self, peer: f64, peer_name: &str) -> Self {
        Self { peer: Some(peer), peer_name: Some(peer_name.into()), ..self }
    }

    /// The same with what it may cost.
    #[must_use]
    pub fn aiming_at(self, goal: f64) -> Self {
        Self { goal: Some(goal), ..self }
    }

    /// Whether `other` is the same figure of another time.
    fn is_of(&self, other: &Self) -> bool {
        (&self.name, &self.machine, &self.unit) == (&other.name, &other.machine, &other.unit)
    }

    /// Whether it is compared with what was kept: counts are, and times never.
    fn is_kept(&self) -> bool {
        [INSTRUCTIONS, MMIO, BYTES].contains(&self.unit.as_str())
    }

    /// The most that it may be now, if it was `kept` before; sizes may be anything.
    fn limit(&self) -> f64 {
        match self.unit.as_str() {
            INSTRUCTIONS => self.ours + INSTRUCTIONS_ALWAYS.max(self.ours * INSTRUCTIONS_MARGIN / 100.0),
            MMIO => self.ours,
            _ => f64::INFINITY,
        }
    }
}

/// Figures, in the order in which they are shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows(pub Vec<Row>);

impl Rows {
    /// Reads the figures in the file at `path`; there are none if there is no file.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = match fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            text => text.map_err(Error::io("reading", path))?,
        };
        serde_json::from_str(&text)
            .map(Self)
            .map_err(|reason| Error::Figures(format!("{} does not hold figures: {reason}", path.display())))
    }

    /// Writes the figures into the file at `path`, one a line.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let lines: Result<Vec<String>, _> = self.0.iter().map(serde_json::to_string).collect();
        let lines = lines.map_err(|reason| Error::Figures(reason.to_string()))?;
        fs::write(path, format!("[\n{}\n]\n", lines.join(",\n"))).map_err(Error::io("writing", path))
    }

    /// Puts `rows` in the place of the same figures of another time, and behind all others what was never there.
    pub fn renew(&mut self, rows: Self) {
        for row in rows.0 {
            match self.0.iter_mut().find(|old| old.is_of(&row)) {
                Some(old) => *old = row,
                None => self.0.push(row),
            }
        }
    }

    /// Puts `rows` in the place of all figures of the machines that they are of.
    pub fn replace(&mut self, rows: Self) {
        self.0.retain(|old| !rows.0.iter().any(|row| row.machine == old.machine));
        self.0.extend(rows.0);
    }

    /// The figures that are kept.
    #[must_use]
    pub fn kept(&self) -> Self {
        Self(self.0.iter().filter(|row| row.is_kept()).cloned().collect())
    }

    /// Returns the figures as a table.
    #[must_use]
    pub fn table(&self) -> String {
        let names = self.0.iter().map(|row| row.name.chars().count());
        let width = names.max().unwrap_or(0).max("figure".len());
        let mut table = format!(
            "{:<width$}  {:<8} {:<14} {:>11} {:>11} {:>9}\n",
            "figure", "machine", "unit", "ours", "peer", "goal"
        );
        for row in &self.0 {
            let optional = |value: Option<f64>| value.map_or("-".into(), number);
            let verdict = match row.goal {
                Some(goal) if row.ours <= goal => "met".into(),
                Some(goal) => format!("missed by {}", number(row.ours - goal)),
                None => String::new(),
            };
            let Row { name, machine, unit, ours, peer, peer_name, goal } = row;
            let (ours, peer, goal) = (number(*ours), optional(*peer), optional(*goal));
            let line = format!(
                "{name:<width$}  {machine:<8} {unit:<14} {ours:>11} {peer:>11} {goal:>9}  {verdict:<14} {}",
                peer_name.as_deref().unwrap_or("")
            );
            let _ = writeln!(table, "{}", line.trim_end());
        }
        table
    }

    /// Says how these figures differ from those that were `kept`, and whether none is worse than it may be.
    ///
    /// What was kept of a machine that nobody measured now is not missing, nor a hosted figure; of a machine that was
    /// measured, it is.
    #[must_use]
    pub fn compare(&self, kept: &Self) -> Comparison {
        let mut comparison = Comparison::default();
        let now = self.kept();
        for old in &kept.0 {
            match now.0.iter().find(|row| row.is_of(old)) {
                Some(row) if row.ours == old.ours => comparison.same += 1,
                Some(row) => {
                    let worse = row.ours > old.limit();
                    comparison.worse += usize::from(worse);
                    let change = (row.ours - old.ours) * 100.0 / old.ours.max(1.0);
                    comparison.lines.push(format!(
                        "{}: {}: {} {}, before {} ({change:+.1} %)",
                        if worse { "WORSE" } else { "changed" },
                        titled(row),
                        number(row.ours),
                        row.unit,
                        number(old.ours),
                    ));
                }
                // The benches are run one by one, and some need programs that a host may lack.
                None if old.machine != HOST && now.0.iter().any(|row| row.machine == old.machine) => {
                    comparison.worse += 1;
                    comparison.lines.push(format!("MISSING: {} ({})", titled(old), old.unit));
                }
                None => comparison.not_measured += 1,
            }
        }
        comparison.new = now.0.iter().filter(|row| !kept.0.iter().any(|old| old.is_of(row))).count();
        comparison
    }
}

fn titled(row: &Row) -> String {
    format!("{}: {}", row.machine, row.name)
}

/// Whole numbers without a fraction, others with one digit of it.
fn number(value: f64) -> String {
    if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.1}") }
}

/// How figures differ from those of another time.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Comparison {
    /// What differs, a line each.
    pub lines: Vec<String>,
    /// How many are the same.
    pub same: usize,
    /// How many are worse than they may be, or are not there any more.
    pub worse: usize,
    /// How many were never kept.
    pub new: usize,
    /// How many are of machines that were not measured.
    pub not_measured: usize,
}

impl Comparison {
    /// Whether nothing is worse than it may be.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.worse == 0
    }

    /// Returns it in words.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text: String = self.lines.iter().map(|line| format!("{line}\n")).collect();
        let _ = writeln!(
            text,
            "{} figures are as they were kept, {} are not, {} of them worse than they may be (instructions by \
             more than the larger of {INSTRUCTIONS_MARGIN} % and {INSTRUCTIONS_ALWAYS}, accesses by any); {} were never kept, \
             {} of those kept were not measured now.",
            self.same,
            self.lines.len(),
            self.worse,
            self.new,
            self.not_measured
        );
        text
    }
}

/// Where the figures of one run are, below cargo's build directory `target`.
#[must_use]
pub fn rows_path(target: &Path) -> PathBuf {
    target.join("portcullis/measure.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, unit: &str, ours: f64) -> Row {
        Row::new(name, "x86_64", unit, ours)
    }

    fn worse(kept: Row, now: Row) -> usize {
        Rows(vec![now]).compare(&Rows(vec![kept])).worse
    }

    #[test]
    fn instructions_may_grow_by_the_margin_and_accesses_by_none() {
        for (unit, kept, now, is_worse) in [
            (INSTRUCTIONS, 1000.0, 1020.0, 0),
            (INSTRUCTIONS, 1000.0, 1021.0, 1),
            (INSTRUCTIONS, 100.0, 105.0, 0),
            (INSTRUCTIONS, 100.0, 106.0, 1),
            (INSTRUCTIONS, 1000.0, 10.0, 0),
            (MMIO, 4.0, 4.0, 0),
            (MMIO, 4.0, 3.0, 0),
            (MMIO, 4.0, 5.0, 1),
            (BYTES, 1.0, 1000.0, 0),
        ] {
            assert_eq!(worse(row("r", unit, kept), row("r", unit, now)), is_worse, "{unit} {kept} {now}");
        }
    }

    #[test]
    fn times_are_neither_kept_nor_compared() {
        let now = Rows(vec![row("r", "ns", 1000.0), row("r", INSTRUCTIONS, 1.0)]);

        assert_eq!(now.kept().0, [row("r", INSTRUCTIONS, 1.0)]);
        assert_eq!(now.compare(&now.kept()), Comparison { same: 1, ..Comparison::default() });
    }

    #[test]
    fn what_is_gone_is_worse_unless_its_machine_was_not_measured() {
        let kept = Rows(vec![
            row("gone", MMIO, 1.0),
            Row::new("far", "aarch64", MMIO, 1.0),
            Row::new("of another bench", HOST, INSTRUCTIONS, 1.0),
        ]);

        let now = Rows(vec![row("there", MMIO, 1.0), Row::new("of a bench", HOST, INSTRUCTIONS, 1.0)]);
        let comparison = now.compare(&kept);

        assert_eq!((comparison.worse, comparison.not_measured), (1, 2));
        assert!(comparison.text().contains("MISSING: x86_64: gone"), "{}", comparison.text());
        assert!(!comparison.passed());
    }

    #[test]
    fn a_figure_takes_the_place_of_the_one_before() {
        let mut rows = Rows(vec![row("a", MMIO, 1.0), row("b", MMIO, 2.0)]);

        rows.renew(Rows(vec![row("c", MMIO, 3.0), row("a", MMIO, 4.0)]));

        assert_eq!(rows.0, [row("a", MMIO, 4.0), row("b", MMIO, 2.0), row("c", MMIO, 3.0)]);
    }

    #[test]
    fn a_machine_that_was_measured_has_no_figure_of_another_time() {
        let far = Row::new("a", "aarch64", MMIO, 1.0);
        let mut rows = Rows(vec![row("gone", MMIO, 1.0), far.clone()]);

        rows.replace(Rows(vec![row("b", MMIO, 2.0)]));

        assert_eq!(rows.0, [far, row("b", MMIO, 2.0)]);
    }

    #[test]
    fn a_file_that_was_written_is_read_as_it_was_and_a_damaged_one_is_named() {
        let path = std::env::temp_dir().join(format!("portcullis-rows-{}.json", std::process::id()));
        let rows = Rows(vec![row("a", MMIO, 1.0).beside(2.5, "somebody").aiming_at(3.0)]);

        rows.write(&path).unwrap();
        let read = Rows::read(&path).unwrap();
        fs::write(&path, "[{\"name\": 1}]").unwrap();
        let damaged = Rows::read(&path).unwrap_err().to_string();
        fs::remove_file(&path).unwrap();

        assert_eq!(read, rows);
        assert!(damaged.contains("does not hold figures") && damaged.contains("line 1"), "{damaged}");
        assert_eq!(Rows::read(&path).unwrap(), Rows::default());
    }

    #[test]
    fn the_table_says_which_goals_are_missed() {
        let table =
            Rows(vec![row("a", MMIO, 4.0).aiming_at(3.0), row("b", MMIO, 1.5).aiming_at(2.0)]).table();

        assert!(table.contains("missed by 1") && table.contains("met"), "{table}");
    }
}
