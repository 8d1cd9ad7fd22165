//! What the guest asks of the hypervisor.

use crate::{machine, say, say::Failed};
use channel::{Call, Status};

/// The hypervisor did not do what it was asked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// For this reason.
    For(Status),
    /// With a status that this version does not know.
    Unknown(u64),
}

/// Performs the call `number`; returns its values.
pub fn ask_number(number: u64, arguments: [u64; 4]) -> Result<[u64; 3], Refusal> {
    let [status, values @ ..] = machine::call(number, arguments);
    match Status::from_number(status) {
        Some(Status::Done) => Ok(values),
        Some(status) => Err(Refusal::For(status)),
        None => Err(Refusal::Unknown(status)),
    }
}

/// Performs `call`; returns its values.
pub fn ask(call: Call, arguments: [u64; 4]) -> Result<[u64; 3], Refusal> {
    ask_number(call as u64, arguments)
}

/// Performs `call`, which must be done; returns its values.
pub fn demand(call: Call, arguments: [u64; 4]) -> Result<[u64; 3], Failed> {
    ask(call, arguments).map_err(|refusal| {
        let [first, second, third, fourth] = arguments;
        say!("{call:?}({first:#x}, {second:#x}, {third:#x}, {fourth:#x}) was refused: {refusal:?}");
        Failed
    })
}

/// Waits for an interrupt, or for `micros` microseconds.
pub fn sleep(micros: u64) -> Result<(), Failed> {
    demand(Call::Sleep, [micros, 0, 0, 0]).map(drop)
}

/// Reports `values`, numbered from 0.
pub fn report(values: &[u64]) -> Result<(), Failed> {
    (0..).zip(values).try_for_each(|(which, value)| demand(Call::Report, [which, *value, 0, 0]).map(drop))
}

/// Sleeps in steps of `step_us` microseconds, at most `steps` times, until `done` gives something.
///
/// It gives nothing if the time passed; how long that is, is for the hypervisor's clock to say.
pub fn sleep_until<T>(
    step_us: u64,
    steps: u64,
    mut done: impl FnMut() -> Result<Option<T>, Failed>,
) -> Result<Option<T>, Failed> {
    for _ in 0..steps {
        if let Some(found) = done()? {
            return Ok(Some(found));
        }
        sleep(step_us)?;
    }
    done()
}
