//! Lets something else happen in the middle of an operation, at a moment that a test chooses.
//!
//! Lock-free code is interrupted, or runs beside another core, between any two of its atomic accesses. The atomics in
//! [`crate::sync`] stand in for the real ones: before each access they ask here whether the moment has come. What
//! happens then happens as a whole, so each run has one interruption, and a test tries all of them.

use std::cell::RefCell;

/// What is to happen, and how many accesses before it.
struct Plan {
    left: usize,
    what: Box<dyn FnOnce()>,
}

thread_local! {
    static PLAN: RefCell<Option<Plan>> = const { RefCell::new(None) };
}

/// Does `run`, and `interruption` before its access number `moment`, counted from 0.
///
/// Returns what `run` returned, and whether it had that many accesses.
pub fn interrupted<R>(
    moment: usize,
    interruption: impl FnOnce() + 'static,
    run: impl FnOnce() -> R,
) -> (R, bool) {
    PLAN.set(Some(Plan { left: moment, what: Box::new(interruption) }));
    let result = run();
    (result, PLAN.take().is_none())
}

/// Does `run`, and returns how many accesses it took.
pub fn accesses<R>(run: impl FnOnce() -> R) -> (R, usize) {
    PLAN.set(Some(Plan { left: usize::MAX, what: Box::new(|| {}) }));
    let result = run();
    (result, PLAN.take().map_or(0, |plan| usize::MAX - plan.left))
}

/// An atomic access is about to be made.
pub(crate) fn access() {
    let due = PLAN.with_borrow_mut(|plan| match plan {
        Some(Plan { left: 0, .. }) => plan.take(),
        Some(Plan { left, .. }) => {
            *left -= 1;
            None
        }
        None => None,
    });
    if let Some(Plan { what, .. }) = due {
        what();
    }
}
