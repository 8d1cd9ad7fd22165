//! The hypervisor's log: defmt frames in, text with time, level, file and line out.

use std::{fmt, path::Path};

use defmt_decoder::{DecodeError, Frame, Locations, StreamDecoder, Table};

use crate::error::Error;

/// How important the hypervisor found a line, least first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Level {
    Trace,
    Debug,
    Info,
    Warn,
    Error,
}

impl Level {
    fn named(name: &str) -> Self {
        match name {
            "trace" => Self::Trace,
            "debug" => Self::Debug,
            "warn" => Self::Warn,
            "error" => Self::Error,
            // `info`, and `defmt::println!`, which has no level and is meant to be seen.
            _ => Self::Info,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Trace => "TRACE",
            Self::Debug => "DEBUG",
            Self::Info => "INFO",
            Self::Warn => "WARN",
            Self::Error => "ERROR",
        }
    }
}

/// One line that the hypervisor logged.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Line {
    /// Virtual time as the hypervisor displays it: seconds with six decimals.
    pub(crate) time: String,
    pub(crate) level: Level,
    pub(crate) text: String,
    /// File and line of the statement, the file relative to the workspace where it lies inside.
    pub(crate) place: Option<(String, u64)>,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>12} {:<5} {}", self.time, self.level.name(), self.text)?;
        match &self.place {
            Some((file, line)) => write!(f, "  ({file}:{line})"),
            None => Ok(()),
        }
    }
}

/// What is needed to decode the log of one hypervisor image.
pub(crate) struct Dictionary {
    table: Table,
    places: Locations,
}

impl Dictionary {
    /// Reads the strings and places of log statements out of `elf`, the bytes of the image at `path`.
    pub(crate) fn read(path: &Path, elf: &[u8]) -> Result<Self, Error> {
        let unusable = |said: String| Error::Image(format!("{}: {said}", path.display()));
        let table = Table::parse(elf)
            .map_err(|reason| unusable(format!("its log cannot be decoded: {reason:#}")))?
            .ok_or_else(|| {
                unusable("it has no .defmt section, so it logs nothing; is it the hypervisor?".into())
            })?;
        if !table.encoding().can_recover() {
            return Err(unusable("its log is not framed (defmt's encoding must be rzcobs)".into()));
        }
        // Without debug information there are no places, and the text is still worth reading.
        let places = table.get_locations(elf).unwrap_or_default();
        Ok(Self { table, places })
    }

    /// Starts decoding the bytes of one boot; places inside `root` are shown relative to it.
    pub(crate) fn decoder<'d>(&'d self, root: &'d Path) -> Decoder<'d> {
        Decoder { dictionary: self, root, frames: self.table.new_stream_decoder(), began: false, lost: 0 }
    }
}

/// Decodes what the serial port carries during one boot.
pub(crate) struct Decoder<'d> {
    dictionary: &'d Dictionary,
    root: &'d Path,
    frames: Box<dyn StreamDecoder + Send + Sync + 'd>,
    began: bool,
    lost: u64,
}

impl Decoder<'_> {
    /// Takes in `bytes` and returns the lines that they complete.
    pub(crate) fn decode(&mut self, bytes: &[u8]) -> Vec<Line> {
        let mut lines = Vec::new();
        self.frames.received(bytes);
        loop {
            match self.frames.decode() {
                Ok(frame) => {
                    self.began = true;
                    lines.push(line(self.dictionary, self.root, &frame));
                }
                Err(DecodeError::UnexpectedEof) => return lines,
                // What the firmware printed stands before the first frame.
                Err(DecodeError::Malformed) => self.lost += u64::from(self.began),
            }
        }
    }

    /// Number of frames that came damaged, after the first good one.
    pub(crate) fn lost(&self) -> u64 {
        self.lost
    }
}

fn line(dictionary: &Dictionary, root: &Path, frame: &Frame<'_>) -> Line {
    let place = dictionary.places.get(&frame.index()).map(|place| {
        let file = place.file.strip_prefix(root).unwrap_or(&place.file);
        (file.display().to_string(), place.line)
    });
    Line {
        time: frame.display_timestamp().map(|time| time.to_string()).unwrap_or_default(),
        level: frame.level().map_or(Level::Info, |level| Level::named(level.as_str())),
        text: frame.display_message().to_string(),
        place,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_shown_with_time_level_and_place() {
        let line = Line {
            time: "12.345678".into(),
            level: Level::Info,
            text: "unit enabled".into(),
            place: Some(("hv/src/main.rs".into(), 7)),
        };

        assert_eq!(line.to_string(), "   12.345678 INFO  unit enabled  (hv/src/main.rs:7)");
    }

    #[test]
    fn a_file_that_is_no_image_is_refused_by_name() {
        let refused = Dictionary::read(Path::new("notes.txt"), b"not an ELF file");

        assert!(refused.err().unwrap().to_string().starts_with("notes.txt: "));
    }

    #[test]
    fn levels_are_ordered_by_importance() {
        assert!(Level::Trace < Level::Debug && Level::Debug < Level::Info);
        assert!(Level::named("warn") > Level::named("info") && Level::named("error") > Level::named("warn"));
    }
}
