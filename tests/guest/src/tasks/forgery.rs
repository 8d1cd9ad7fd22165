//! FORGERY: only what is outstanding can be answered, only by its own cookie, only once.

use super::{Bench, REFUSED};
use crate::{
    calls::report,
    ensure,
    memory::PAGES,
    say::Failed,
    serve::{Answer, respond},
};
use channel::{Code, call::DEADLINE_MAX_US};

const FIRST_PAGE: u64 = 0x4200_0000;
const SECOND_PAGE: u64 = 0x4200_1000;

/// Reports: forged tries, how many were refused, groups answered, stray responses. `foreign` is the cookie of another
/// guest's group, which is outstanding.
pub fn run(foreign: u64) -> Result<(), Failed> {
    // The deadline is another task's matter.
    let mut bench = Bench::set_up(0xF0_46E4, DEADLINE_MAX_US)?;
    let mut forger = Forger { tries: 0, refused: 0 };
    PAGES[0].fill(1);
    PAGES[1].fill(2);

    bench.assigned.start_read(0, FIRST_PAGE, 0)?;
    let first = bench.wait_read(FIRST_PAGE)?;
    let cookie = first.cookie;
    for forged in [cookie.wrapping_add(1 << 8), cookie | 0xFF, cookie ^ 1 << 60, foreign, 0, u64::MAX] {
        ensure!(forged != cookie, "{forged:#x} is the guest's own cookie and no forgery");
        forger.try_answer(forged, Code::Success as u64)?;
        bench.assigned.expect_busy(0)?;
    }
    for code in [2, 14] {
        forger.try_answer(cookie, code)?;
        bench.assigned.expect_busy(0)?;
    }
    bench.assigned.repair_read(&first, 0, FIRST_PAGE, &PAGES[0])?;
    forger.try_answer(cookie, Code::Success as u64)?;

    bench.assigned.start_read(0, SECOND_PAGE, 0)?;
    let second = bench.wait_read(SECOND_PAGE)?;
    forger.try_answer(cookie, Code::Success as u64)?;
    bench.assigned.expect_busy(0)?;
    bench.assigned.repair_read(&second, 0, SECOND_PAGE, &PAGES[1])?;

    bench.assigned.unmap(FIRST_PAGE, 2)?;
    bench.assigned.detach()?;
    let stray = bench.assigned.device.stray();
    ensure!(stray == 0, "{stray} responses that the device did not wait for");
    report(&[forger.tries, forger.refused, bench.server.groups, stray])
}

struct Forger {
    tries: u64,
    refused: u64,
}

impl Forger {
    /// Answers `code` for `cookie`, which must be refused.
    fn try_answer(&mut self, cookie: u64, code: u64) -> Result<(), Failed> {
        self.tries += 1;
        let answered = respond(&[Answer { cookie, code }])?;
        ensure!(answered == REFUSED, "code {code} for the cookie {cookie:#x}: {answered:?}");
        self.refused += 1;
        Ok(())
    }
}
