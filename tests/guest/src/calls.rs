//! What the guest asks of the hypervisor.

use crate::{ensure, machine, memory::COUNTS, say, say::Failed};
use channel::{
    Call, Status,
    counters::{BUCKETS, COUNTERS_WORDS, Counter, TO_ANSWER_WORD},
};

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

/// The longest wait for the channel, in microseconds.
const WAIT_US: u64 = 2_000_000;

/// Sleeps until the channel has interrupted the guest and `found` gives something; it gives nothing if no interrupt came
/// within 2 s, and none of its records may have come then.
///
/// From the look until the sleep the guest is masked: a record that comes in between leaves its interrupt pending, and that
/// ends the sleep at once.
pub fn wait_interrupted<T>(
    mut found: impl FnMut() -> Result<Option<T>, Failed>,
) -> Result<Option<T>, Failed> {
    loop {
        let taken = machine::interrupts();
        machine::mask();
        let looked = found();
        let slept = if matches!(looked, Ok(None)) { sleep(WAIT_US) } else { Ok(()) };
        machine::unmask();
        if let Some(found) = looked? {
            return Ok(Some(found));
        }
        slept?;
        if machine::interrupts() == taken {
            ensure!(found()?.is_none(), "the channel has a record and sent no interrupt");
            return Ok(None);
        }
    }
}

/// The counters of a device, as they were.
pub struct Counters([u64; COUNTERS_WORDS]);

impl Counters {
    /// Returns one of them.
    pub fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize]
    }

    /// Returns the bucket of the time that an answer took, if there was one answer since `before`.
    pub fn answered_since(&self, before: &Self) -> Option<usize> {
        let counts = |counters: &Self| -> [u64; BUCKETS] {
            core::array::from_fn(|bucket| counters.0[TO_ANSWER_WORD + bucket])
        };
        let (now, before) = (counts(self), counts(before));
        let more = |bucket: usize| now[bucket] - before[bucket];
        let all: u64 = (0..BUCKETS).map(more).sum();
        (0..BUCKETS).find(|&bucket| more(bucket) == 1 && all == 1)
    }
}

/// Reads the counters of a device.
pub fn counters(device: u64) -> Result<Counters, Failed> {
    const BYTES: u64 = COUNTERS_WORDS as u64 * 8;
    let [written, ..] = demand(Call::Counters, [device, COUNTS.address(), BYTES, 0])?;
    ensure!(written == BYTES, "{written} bytes of counters instead of {BYTES}");
    Ok(Counters(core::array::from_fn(|word| COUNTS.load(word).unwrap_or(0))))
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
