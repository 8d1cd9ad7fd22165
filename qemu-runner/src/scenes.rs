//! What the hypervisor says about its scenes, and what follows from it.
//!
//! Some lines of the log are a protocol. At level info:
//!
//! ```text
//! scene begin name=repair
//! scene count name=repair key=answers value=12
//! scene end name=repair passed=true seen=<free text to the end of the line>
//! scene skip name=repair reason=<free text to the end of the line>
//! demonstration end scenes=8 passed=8
//! ```
//!
//! and at any level, each time a mapping has been removed, an address space detached, or an entry of a guest's own array of
//! invalidations handled, and the invalidation has completed:
//!
//! ```text
//! unmap stream=0x18 pasid=0x1 domain=0x5 iova=0x40000000 pages=4
//! detach stream=0x18 pasid=0x1 domain=0x5
//! invalidate stream=0x18 pasid=0x1 domain=0x5 iova=0x40000000 pages=4 entry=0
//! ```
//!
//! For accesses without PASID, a detachment has `pasid=0xffffffff` and the others `pasid=0x0`.

use std::collections::BTreeMap;

use crate::{
    log::{Level, Line},
    trace::{Part, Removal},
};

/// A line of the protocol.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Message<'l> {
    Begin { name: &'l str },
    Count { name: &'l str, key: &'l str, value: u64 },
    End { name: &'l str, passed: bool, seen: &'l str },
    Skip { name: &'l str, reason: &'l str },
    DemonstrationEnd { scenes: u64, passed: u64 },
    Removal(Removal),
}

impl<'l> Message<'l> {
    /// Reads `line`: `Ok(None)` if it is not of the protocol, an error if it means to be and is malformed.
    pub(crate) fn read(line: &'l Line) -> Result<Option<Self>, String> {
        let text = line.text.as_str();
        let message = if let Some(fields) = text.strip_prefix("unmap stream=") {
            unmap(fields)
        } else if let Some(fields) = text.strip_prefix("detach stream=") {
            detach(fields)
        } else if let Some(fields) = text.strip_prefix("block stream=") {
            block(fields)
        } else if let Some(fields) = text.strip_prefix("invalidate stream=") {
            invalidate(fields)
        } else if line.level != Level::Info {
            return Ok(None);
        } else if let Some(rest) = text.strip_prefix("scene ") {
            scene(rest)
        } else if let Some(fields) = text.strip_prefix("demonstration end ") {
            demonstration_end(fields)
        } else {
            return Ok(None);
        };
        message.map(Some).ok_or_else(|| format!("a line of the scene protocol is malformed: `{text}`"))
    }
}

fn scene(rest: &str) -> Option<Message<'_>> {
    let (verb, fields) = rest.split_once(' ')?;
    let (name, fields) =
        fields.strip_prefix("name=").map(|name| name.split_once(' ').unwrap_or((name, "")))?;
    match verb {
        _ if name.is_empty() => None,
        "begin" if fields.is_empty() => Some(Message::Begin { name }),
        "count" => {
            let (key, value) = fields.strip_prefix("key=")?.split_once(" value=")?;
            Some(Message::Count { name, key, value: value.parse().ok()? })
        }
        "end" => {
            let (passed, seen) = fields.strip_prefix("passed=")?.split_once(" seen=")?;
            Some(Message::End { name, passed: passed.parse().ok()?, seen })
        }
        "skip" => Some(Message::Skip { name, reason: fields.strip_prefix("reason=")? }),
        _ => None,
    }
}

fn demonstration_end(fields: &str) -> Option<Message<'_>> {
    let (scenes, passed) = fields.strip_prefix("scenes=")?.split_once(" passed=")?;
    Some(Message::DemonstrationEnd { scenes: scenes.parse().ok()?, passed: passed.parse().ok()? })
}

/// Reads the fields of `unmap stream=…` after the `=`.
fn unmap(fields: &str) -> Option<Message<'static>> {
    let (stream, rest) = fields.split_once(" pasid=")?;
    let (pasid, rest) = rest.split_once(" domain=")?;
    let (domain, rest) = rest.split_once(" iova=")?;
    let (iova, pages) = rest.split_once(" pages=")?;
    let part = Part::Pages { iova: hex(iova)?, pages: pages.parse().ok()? };
    Some(Message::Removal(Removal { stream: hex(stream)?, pasid: hex(pasid)?, domain: hex(domain)?, part }))
}

/// Reads the fields of `invalidate stream=…` after the `=`.
fn invalidate(fields: &str) -> Option<Message<'static>> {
    let (pages, number) = fields.split_once(" entry=")?;
    let Message::Removal(Removal { part: Part::Pages { iova, pages }, stream, pasid, domain }) =
        unmap(pages)?
    else {
        return None;
    };
    let part = Part::Entry { number: number.parse().ok()?, iova, pages };
    Some(Message::Removal(Removal { stream, pasid, domain, part }))
}

/// Reads the fields of `detach stream=…` after the `=`.
fn detach(fields: &str) -> Option<Message<'static>> {
    let (stream, rest) = fields.split_once(" pasid=")?;
    let (pasid, domain) = rest.split_once(" domain=")?;
    let pasid = Some(hex(pasid)?).filter(|&pasid| pasid != NO_PASID).unwrap_or(0);
    Some(Message::Removal(Removal { stream: hex(stream)?, pasid, domain: hex(domain)?, part: Part::All }))
}

/// Reads the field of `block stream=…` after the `=`.
fn block(stream: &str) -> Option<Message<'static>> {
    let (stream, part) = (hex(stream)?, Part::Device);
    Some(Message::Removal(Removal { stream, pasid: 0, domain: 0, part }))
}

/// How a detachment says that it is about accesses without PASID.
const NO_PASID: u64 = 0xffff_ffff;

/// Whether `line` is what a guest said: `guest 0: …` at level info.
fn is_of_guest(line: &Line) -> bool {
    let number = line.text.strip_prefix("guest ").and_then(|rest| rest.split_once(": "));
    line.level == Level::Info && number.is_some_and(|(number, _)| number.parse::<u64>().is_ok())
}

/// Reads a hexadecimal number with its `0x`.
pub(crate) fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

/// How far a scene came.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Progress {
    /// It began, and has not ended.
    Began,
    /// It ended; `seen` says what there was to see.
    Ended { passed: bool, seen: String },
    /// The hypervisor did not show it.
    Skipped { reason: String },
}

/// All that the hypervisor has said about one scene.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Record {
    pub(crate) name: String,
    pub(crate) progress: Progress,
    pub(crate) counts: BTreeMap<String, u64>,
    /// Mappings that were removed while it ran.
    pub(crate) unmaps: u64,
    /// The last line that a guest said while it ran.
    pub(crate) guest: Option<String>,
}

/// What the hypervisor has said during one boot.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    /// Scenes in the order in which they began.
    pub(crate) scenes: Vec<Record>,
    /// Scenes shown and scenes passed, as the hypervisor counts them at its end.
    pub(crate) end: Option<(u64, u64)>,
    /// What was removed, in order.
    pub(crate) removals: Vec<Removal>,
    /// The last line logged that is not of the protocol, since a scene last began.
    pub(crate) last: Option<String>,
    /// What the hypervisor said that contradicts the protocol.
    pub(crate) complaints: Vec<String>,
}

impl Transcript {
    /// Takes in what was read from `line`.
    pub(crate) fn note(&mut self, line: &Line, message: &Result<Option<Message<'_>>, String>) {
        let contradiction = match message {
            Err(malformed) => Some(malformed.clone()),
            Ok(None) => {
                self.last = Some(line.to_string().trim_start().to_owned());
                if let Some(record) = self.scenes.last_mut().filter(|_| is_of_guest(line)) {
                    record.guest = Some(line.text.clone());
                }
                None
            }
            Ok(Some(message)) => self.take(message).err(),
        };
        self.complaints.extend(contradiction);
    }

    fn take(&mut self, message: &Message<'_>) -> Result<(), String> {
        match *message {
            Message::Begin { name } => self.start(name, Progress::Began),
            Message::Skip { name, reason } => {
                self.start(name, Progress::Skipped { reason: reason.to_owned() })
            }
            Message::Count { name, key, value } => {
                self.running(name, "counted something")?.counts.insert(key.to_owned(), value);
                Ok(())
            }
            Message::End { name, passed, seen } => {
                self.running(name, "ended")?.progress = Progress::Ended { passed, seen: seen.to_owned() };
                Ok(())
            }
            Message::DemonstrationEnd { scenes, passed } => match self.end.replace((scenes, passed)) {
                None => Ok(()),
                Some(_) => Err("the demonstration ended twice".into()),
            },
            Message::Removal(removal) => {
                self.removals.push(removal);
                let running = self.scenes.last_mut().filter(|record| record.progress == Progress::Began);
                if let (Some(record), Part::Pages { .. }) = (running, removal.part) {
                    record.unmaps += 1;
                }
                Ok(())
            }
        }
    }

    fn start(&mut self, name: &str, progress: Progress) -> Result<(), String> {
        if self.record(name).is_some() {
            return Err(format!("scene {name} began twice"));
        }
        self.last = None;
        let counts = BTreeMap::new();
        self.scenes.push(Record { name: name.to_owned(), progress, counts, unmaps: 0, guest: None });
        Ok(())
    }

    fn running(&mut self, name: &str, did: &str) -> Result<&mut Record, String> {
        self.scenes
            .iter_mut()
            .find(|record| record.name == name && record.progress == Progress::Began)
            .ok_or_else(|| format!("scene {name} {did} while it was not running"))
    }

    /// Returns what was said about the scene called `name`.
    pub(crate) fn record(&self, name: &str) -> Option<&Record> {
        self.scenes.iter().find(|record| record.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(level: Level, text: &str) -> Line {
        Line { time: "0.000001".into(), level, text: text.into(), place: None }
    }

    fn transcript(lines: &[&str]) -> Transcript {
        let mut transcript = Transcript::default();
        for text in lines {
            let line = logged(Level::Info, text);
            transcript.note(&line, &Message::read(&line));
        }
        transcript
    }

    #[test]
    fn free_text_runs_to_the_end_of_the_line() {
        let line = logged(Level::Info, "scene end name=repair passed=true seen=2 pages, seen=by both guests");

        let message = Message::read(&line).unwrap().unwrap();

        assert_eq!(
            message,
            Message::End { name: "repair", passed: true, seen: "2 pages, seen=by both guests" }
        );
    }

    #[test]
    fn every_kind_of_line_is_read() {
        let read = |text| {
            let line = logged(Level::Info, text);
            Message::read(&line).unwrap().map(|message| format!("{message:?}"))
        };

        assert_eq!(read("scene begin name=deny").unwrap(), r#"Begin { name: "deny" }"#);
        assert_eq!(
            read("scene count name=deny key=faults value=18446744073709551615").unwrap(),
            r#"Count { name: "deny", key: "faults", value: 18446744073709551615 }"#
        );
        assert_eq!(
            read("scene skip name=deny reason=no device").unwrap(),
            r#"Skip { name: "deny", reason: "no device" }"#
        );
        assert_eq!(
            read("demonstration end scenes=8 passed=7").unwrap(),
            "DemonstrationEnd { scenes: 8, passed: 7 }"
        );
        assert_eq!(read("the scene is set"), None);
    }

    #[test]
    fn an_unmap_is_read_at_any_level() {
        let line = logged(Level::Trace, "unmap stream=0x18 pasid=0x1 domain=0x5 iova=0x40000000 pages=4");

        let message = Message::read(&line).unwrap().unwrap();

        let part = Part::Pages { iova: 0x4000_0000, pages: 4 };
        assert_eq!(message, Message::Removal(Removal { stream: 0x18, pasid: 1, domain: 5, part }));
    }

    #[test]
    fn an_entry_of_a_guests_array_is_read() {
        let text = "invalidate stream=0x18 pasid=0x1 domain=0x5 iova=0x40000000 pages=4 entry=2";
        let line = logged(Level::Debug, text);

        let message = Message::read(&line).unwrap().unwrap();

        let part = Part::Entry { number: 2, iova: 0x4000_0000, pages: 4 };
        assert_eq!(message, Message::Removal(Removal { stream: 0x18, pasid: 1, domain: 5, part }));
    }

    #[test]
    fn a_detachment_is_read_at_any_level_with_a_pasid_or_without() {
        for (text, pasid) in [
            ("detach stream=0x18 pasid=0x1 domain=0x5", 1),
            ("detach stream=0x18 pasid=0xffffffff domain=0x5", 0),
        ] {
            let line = logged(Level::Debug, text);

            let message = Message::read(&line).unwrap().unwrap();

            let detachment = Removal { stream: 0x18, pasid, domain: 5, part: Part::All };
            assert_eq!(message, Message::Removal(detachment));
        }
    }

    #[test]
    fn a_device_that_is_blocked_is_read() {
        let line = logged(Level::Debug, "block stream=0x18");

        let message = Message::read(&line).unwrap().unwrap();

        let blocked = Removal { stream: 0x18, pasid: 0, domain: 0, part: Part::Device };
        assert_eq!(message, Message::Removal(blocked));
    }

    #[test]
    fn a_scene_keeps_how_many_mappings_were_removed_while_it_ran() {
        let unmap = "unmap stream=0x18 pasid=0x1 domain=0x5 iova=0x40000000 pages=4";
        let detach = "detach stream=0x18 pasid=0x1 domain=0x5";
        let end = "scene end name=repair passed=true seen=x";
        let transcript = transcript(&[unmap, "scene begin name=repair", unmap, unmap, detach, end, unmap]);

        assert_eq!(transcript.record("repair").unwrap().unmaps, 2);
        assert_eq!(transcript.removals.len(), 5);
    }

    #[test]
    fn a_scene_keeps_the_last_line_that_a_guest_said() {
        let lines = [
            "scene begin name=repair",
            "guest 0: first",
            "guest 1: the data is wrong",
            "guest 0 may not reach Gpa(0x1000)",
            "guest of honour: nobody",
            "fault: none of its words",
        ];

        let transcript = transcript(&lines);

        assert_eq!(transcript.record("repair").unwrap().guest.as_deref(), Some("guest 1: the data is wrong"));
    }

    #[test]
    fn a_scene_line_below_info_is_ordinary_text() {
        assert_eq!(Message::read(&logged(Level::Debug, "scene begin name=deny")), Ok(None));
    }

    #[test]
    fn a_malformed_line_is_a_complaint_that_quotes_it() {
        for text in [
            "scene begin",
            "scene begin name=",
            "scene begin name=deny twice",
            "scene count name=deny key=faults value=-1",
            "scene end name=deny passed=maybe seen=x",
            "scene end name=deny passed=true",
            "scene pause name=deny",
            "demonstration end scenes=8",
            "unmap stream=18 pasid=0x1 domain=0x5 iova=0x0 pages=4",
            "unmap stream=0x18 pasid=0x1 domain=0x5 pages=4",
            "detach stream=0x18 pasid=none domain=0x5",
            "invalidate stream=0x18 pasid=0x1 domain=0x5 iova=0x0 pages=4",
            "detach stream=0x18 pasid=0x1 domain=0x5 iova=0x0",
            "block stream=18",
        ] {
            let complaints = transcript(&[text]).complaints;

            assert!(complaints.len() == 1 && complaints[0].contains(text), "{text}: {complaints:?}");
        }
    }

    #[test]
    fn a_scene_keeps_what_it_counted_and_how_it_ended() {
        let transcript = transcript(&[
            "scene begin name=repair",
            "scene count name=repair key=answers value=12",
            "scene end name=repair passed=false seen=nothing",
        ]);

        let record = transcript.record("repair").unwrap();

        assert_eq!(record.counts["answers"], 12);
        assert_eq!(record.progress, Progress::Ended { passed: false, seen: "nothing".into() });
        assert!(transcript.complaints.is_empty());
    }

    #[test]
    fn a_scene_cannot_end_unbegun_or_twice() {
        let once = ["scene begin name=deny", "scene end name=deny passed=true seen=x"];

        assert_eq!(transcript(&once[1..]).complaints, ["scene deny ended while it was not running"]);
        assert_eq!(transcript(&[once[0], once[1], once[1]]).complaints.len(), 1);
        assert_eq!(transcript(&[once[0], once[0]]).complaints, ["scene deny began twice"]);
    }

    #[test]
    fn the_last_ordinary_line_of_a_scene_is_remembered() {
        let lines =
            ["scene begin name=deny", "about to divide by zero", "scene count name=deny key=faults value=1"];

        let during = transcript(&lines);
        let after = transcript(&[&lines[..], &["scene begin name=allow"]].concat());

        assert_eq!(during.last.as_deref(), Some("0.000001 INFO  about to divide by zero"));
        assert_eq!(during.record("deny").unwrap().progress, Progress::Began);
        assert_eq!(after.last, None);
    }
}
