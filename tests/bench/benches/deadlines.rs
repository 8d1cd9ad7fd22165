//! What it costs to arm a deadline and take it back, and to expire one, among many.

use bench::Row;
use broker::{Deadlines, Due, TICK_US};
use hierarchical_hash_wheel_timer::wheels::{
    TimerEntryWithDelay,
    cancellable::{CancellableTimerEntry, QuadWheelWithOverflow},
};
use std::{collections::BTreeMap, hint::black_box, rc::Rc, time::Duration};
use tm_wheel::{TimerDriver, TimerHandle};

/// Deadlines that are armed and taken back, one after the other.
const ARMED: usize = 1_000;
/// The others are spread over so many ticks.
const TICKS: u64 = 1_000;
/// How far away those are that are armed and taken back, in ticks.
const AHEAD: u64 = 98;
const FEW: usize = 1_000;
const MANY: usize = 64_000;

/// Deadlines in ticks, of entries that are called by numbers.
trait Wheel {
    fn empty() -> Self;
    /// Arms `entry`, and takes that back.
    fn arm_and_settle(&mut self, entry: u32, at: u64);
    fn arm(&mut self, entry: u32, at: u64);
    /// Lets a tick come; counts the entries that were due.
    fn expire(&mut self, tick: u64, due: &mut usize);
}

struct Ours(Box<Deadlines<{ MANY + 1 }>>);

impl Wheel for Ours {
    fn empty() -> Self {
        Self(Box::new(Deadlines::new()))
    }
    #[inline(always)]
    fn arm_and_settle(&mut self, entry: u32, at: u64) {
        self.arm(entry, at);
        self.0.disarm(entry);
    }
    #[inline(always)]
    fn arm(&mut self, entry: u32, at: u64) {
        self.0.arm(entry, 0, at * TICK_US);
    }
    #[inline(always)]
    fn expire(&mut self, tick: u64, due: &mut usize) {
        self.0.tell(tick * TICK_US);
        loop {
            match self.0.pop() {
                Due::Entry(_) => *due += 1,
                Due::Later => {}
                Due::Nothing => return,
            }
        }
    }
}

struct TmWheel(Box<TimerDriver<u32, 4, 64>>);

impl TmWheel {
    #[inline(always)]
    fn insert(&mut self, entry: u32, at: u64) -> TimerHandle {
        self.0.insert(entry, at)
    }
}

impl Wheel for TmWheel {
    fn empty() -> Self {
        let mut wheel = Box::new(TimerDriver::default());
        wheel.reserve(MANY + 1);
        Self(wheel)
    }
    #[inline(always)]
    fn arm_and_settle(&mut self, entry: u32, at: u64) {
        let handle = self.insert(entry, at);
        self.0.remove(handle);
    }
    #[inline(always)]
    fn arm(&mut self, entry: u32, at: u64) {
        self.insert(entry, at);
    }
    #[inline(always)]
    fn expire(&mut self, tick: u64, due: &mut usize) {
        *due += self.0.advance_to(tick).count();
    }
}

struct Tree(BTreeMap<(u64, u32), ()>);

impl Wheel for Tree {
    fn empty() -> Self {
        Self(BTreeMap::new())
    }
    #[inline(always)]
    fn arm_and_settle(&mut self, entry: u32, at: u64) {
        self.arm(entry, at);
        self.0.remove(&(at, entry));
    }
    #[inline(always)]
    fn arm(&mut self, entry: u32, at: u64) {
        self.0.insert((at, entry), ());
    }
    #[inline(always)]
    fn expire(&mut self, tick: u64, due: &mut usize) {
        while self.0.first_key_value().is_some_and(|(&(at, _), ())| at <= tick) {
            self.0.pop_first();
            *due += 1;
        }
    }
}

#[derive(Debug)]
struct Timer {
    entry: u32,
    delay: Duration,
}

impl CancellableTimerEntry for Timer {
    type Id = u32;
    fn id(&self) -> &u32 {
        &self.entry
    }
}

impl TimerEntryWithDelay for Timer {
    fn delay(&self) -> Duration {
        self.delay
    }
}

/// Its tick is a millisecond.
struct Hierarchical(QuadWheelWithOverflow<Timer>);

impl Wheel for Hierarchical {
    fn empty() -> Self {
        Self(QuadWheelWithOverflow::new())
    }
    #[inline(always)]
    fn arm_and_settle(&mut self, entry: u32, at: u64) {
        self.arm(entry, at);
        let _ = self.0.cancel(&entry);
    }
    #[inline(always)]
    fn arm(&mut self, entry: u32, at: u64) {
        let _ = self.0.insert_ref(Rc::new(Timer { entry, delay: Duration::from_millis(at) }));
    }
    #[inline(always)]
    fn expire(&mut self, _tick: u64, due: &mut usize) {
        *due += self.0.tick().len();
    }
}

/// A wheel in which `many` entries wait.
fn among<W: Wheel>(many: usize) -> W {
    let mut wheel = W::empty();
    // Neighbours in time are no neighbours in number.
    (0..many as u64).for_each(|entry| wheel.arm(entry as u32, 1 + entry * 617 % TICKS));
    wheel
}

// One function for each wheel, so that each operation is called in one place, as by whoever uses a wheel.
#[inline(never)]
fn arm_and_settle<W: Wheel>(wheel: &mut W) {
    for n in 0..ARMED as u64 {
        wheel.arm_and_settle(MANY as u32, black_box(AHEAD + n % 3));
    }
}

#[inline(never)]
fn expire_all<W: Wheel>(wheel: &mut W) -> usize {
    let mut due = 0;
    // Not `1..=TICKS`: for the end of that the compiler calls in a place of its own.
    (1..TICKS + 1).for_each(|tick| wheel.expire(tick, &mut due));
    due
}

mod counted {
    use super::{FEW, Hierarchical, MANY, Ours, TmWheel, Tree, among, arm_and_settle, expire_all};
    use gungraun::{library_benchmark, library_benchmark_group};
    use std::hint::black_box;

    macro_rules! counted {
        ($($wheel:ty: $settle:ident, $expire:ident;)*) => {
            $(
                #[library_benchmark]
                #[bench::few(among(FEW))]
                #[bench::many(among(MANY))]
                fn $settle(mut wheel: $wheel) -> $wheel {
                    arm_and_settle(black_box(&mut wheel));
                    wheel
                }

                #[library_benchmark]
                #[bench::few(among(FEW))]
                #[bench::many(among(MANY))]
                fn $expire(mut wheel: $wheel) -> (usize, $wheel) {
                    let expired = expire_all(black_box(&mut wheel));
                    (expired, wheel)
                }
            )*
        };
    }

    counted! {
        Ours: settle_ours, expire_ours;
        TmWheel: settle_tm_wheel, expire_tm_wheel;
        Tree: settle_btreemap, expire_btreemap;
        Hierarchical: settle_hierarchical, expire_hierarchical;
    }

    library_benchmark_group!(
        name = all,
        benchmarks = [
            settle_ours,
            expire_ours,
            settle_tm_wheel,
            expire_tm_wheel,
            settle_btreemap,
            expire_btreemap,
            settle_hierarchical,
            expire_hierarchical
        ]
    );
    gungraun::main!(library_benchmark_groups = all);

    pub fn run() {
        main();
    }
}

const NAMES: [&str; 4] = ["ours", "tm_wheel", "btreemap", "hierarchical"];

fn time_settle<W: Wheel>(many: usize) -> Option<f64> {
    bench::nanoseconds(ARMED, || among(many), |wheel: &mut W| arm_and_settle(wheel))
}

fn time_expire<W: Wheel>(many: usize) -> Option<f64> {
    bench::nanoseconds(many, || among(many), |wheel: &mut W| assert_eq!(expire_all(wheel), many))
}

fn main() {
    bench::tools_or_exit();
    counted::run();
    if bench::is_counted() {
        return;
    }
    let cases = [("few", FEW), ("many", MANY)];
    let count = |operation: &str, case: &str, operations: usize| {
        let count = |name| bench::instructions("deadlines", &format!("{operation}_{name}"), case, operations);
        NAMES.map(count).to_vec()
    };
    let settle = |&(case, many): &(&str, usize)| Row {
        what: format!("arm and settle among {many}"),
        costs: count("settle", case, ARMED),
        goal: Some(100.0),
    };
    let expire = |&(case, many): &(&str, usize)| Row {
        what: format!("expire one of {many}"),
        costs: count("expire", case, many),
        goal: Some(40.0),
    };
    let rows: Vec<_> = cases.iter().map(settle).chain(cases.iter().map(expire)).collect();
    bench::print("instructions", &NAMES, &rows);

    let settle = |&(_, many): &(&str, usize)| Row {
        what: format!("arm and settle among {many}"),
        costs: vec![
            time_settle::<Ours>(many),
            time_settle::<TmWheel>(many),
            time_settle::<Tree>(many),
            time_settle::<Hierarchical>(many),
        ],
        goal: None,
    };
    let expire = |&(_, many): &(&str, usize)| Row {
        what: format!("expire one of {many}"),
        costs: vec![
            time_expire::<Ours>(many),
            time_expire::<TmWheel>(many),
            time_expire::<Tree>(many),
            time_expire::<Hierarchical>(many),
        ],
        goal: None,
    };
    let rows: Vec<_> = cases.iter().map(settle).chain(cases.iter().map(expire)).collect();
    bench::print("nanoseconds", &NAMES, &rows);
}
