//! Other programs: started, limited in time, and never left behind.

use std::{
    env,
    ffi::OsStr,
    io::{self, Read, Write},
    path::PathBuf,
    process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::error::Error;

/// How often a running program is asked whether it has ended.
const POLL: Duration = Duration::from_millis(5);

/// Tells the user on standard error what is about to be done.
///
/// Standard output is left to what was asked for.
pub(crate) fn say(text: &str) {
    // Whoever closed standard error does not want to know.
    let _ = writeln!(io::stderr(), "portcullis: {text}");
}

/// A program that runs, and is killed and reaped when this value goes.
pub(crate) struct Running {
    child: Child,
    program: String,
}

impl Running {
    /// Starts `command`.
    pub(crate) fn start(command: &mut Command) -> Result<Self, Error> {
        let program = command.get_program().to_string_lossy().into_owned();
        match command.spawn() {
            Ok(child) => Ok(Self { child, program }),
            Err(source) => Err(Error::Io { doing: format!("starting {program}"), source }),
        }
    }

    /// Takes the pipe that carries standard output, where `command` asked for one.
    pub(crate) fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Takes the pipe that carries standard error, where `command` asked for one.
    pub(crate) fn stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// Waits for the end of the program; returns `None` if `deadline` comes first.
    pub(crate) fn wait_until(&mut self, deadline: Instant) -> Result<Option<ExitStatus>, Error> {
        loop {
            let ended = self.child.try_wait();
            match ended
                .map_err(|source| Error::Io { doing: format!("waiting for {}", self.program), source })?
            {
                Some(status) => return Ok(Some(status)),
                None if Instant::now() >= deadline => return Ok(None),
                None => thread::sleep(POLL),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only where the program has already ended and been reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a program that has ended said.
pub(crate) struct Captured {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Reads `stream` to its end on a thread of its own, so that the program on the other side never waits.
fn collect(stream: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            // A pipe that breaks ends the text, as its end does; what came before is kept.
            let _ = stream.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// Runs `command` with nothing on its standard input, for `limit` at most, and returns what it said, whatever its status.
pub(crate) fn output(command: &mut Command, limit: Duration) -> Result<Captured, Error> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running::start(command)?;
    let (stdout, stderr) = (collect(running.stdout()), collect(running.stderr()));

    let Some(status) = running.wait_until(Instant::now() + limit)? else {
        let said = format!("did not end within {} s and was stopped", limit.as_secs());
        return Err(Error::Program { program: running.program.clone(), said });
    };
    let text = |collected: thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&collected.join().unwrap_or_default()).into_owned()
    };
    Ok(Captured { status, stdout: text(stdout), stderr: text(stderr) })
}

/// Runs `command` as [`output`] does and returns its standard output; a status other than 0 is an error.
pub(crate) fn checked(command: &mut Command, limit: Duration) -> Result<String, Error> {
    let captured = output(command, limit)?;
    if captured.status.success() {
        return Ok(captured.stdout);
    }
    let program = command.get_program().to_string_lossy().into_owned();
    let said = match captured.stderr.trim() {
        "" => format!("ended with {}", captured.status),
        said => said.to_owned(),
    };
    Err(Error::Program { program, said })
}

/// Returns the file that `PATH` names `program`.
pub(crate) fn on_path(program: impl AsRef<OsStr>) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|dir| dir.join(program.as_ref())).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn a_program_that_does_not_end_is_stopped_at_its_limit() {
        let started = Instant::now();

        let ended = output(Command::new("sleep").arg("60"), Duration::from_millis(100));

        assert!(matches!(ended, Err(Error::Program { said, .. }) if said.contains("did not end")));
        assert!(started.elapsed() < LONG);
    }

    #[test]
    fn a_program_that_fails_is_quoted() {
        let failed = checked(Command::new("sh").args(["-c", "echo no such luck >&2; exit 3"]), LONG);

        assert_eq!(failed.unwrap_err().to_string(), "sh: no such luck");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let failed = checked(&mut Command::new("no-such-program-here"), LONG);

        assert!(failed.unwrap_err().to_string().starts_with("starting no-such-program-here: "));
    }

    #[test]
    fn both_streams_are_captured_in_full() {
        let loud = "for i in 1 2 3; do head -c 100000 /dev/zero; head -c 100000 /dev/zero >&2; done";

        let captured = output(Command::new("sh").args(["-c", loud]), LONG).unwrap();

        assert_eq!((captured.stdout.len(), captured.stderr.len()), (300_000, 300_000));
    }
}
