//! The service core's routine: drain the unit, admit what it reports, expire what nobody answered.
//!
//! It runs in the interrupt handler of the service core alone, never waits, and does a bounded amount of work: at most
//! [`PASS`] requests, [`FAULTS`] faults and [`EXPIRIES`] deadlines a pass. Each costs the same however many there are, and, if
//! it ends in an answer, one hold of the command lock, for which the other cores' short holds may have to end; what it
//! prints is bounded by [`LOG_LINES`]. What is left makes it interrupt itself, since the unit will not interrupt for it
//! again.
//!
//! A device that has more faults than it may is warned of, and then blocked and silenced by a home core (`control.rs`), so that
//! faults do not come for ever either.
//!
//! A group whose guest is silent is therefore answered at its deadline, plus interrupt latency, plus the passes before.

use crate::hypervisor::{
    self, Broker, Due, GUESTS, Hypervisor, Notice, Notices, QUEUES, SERVICE_CORE, home_of,
};
use arch::{
    cpu::{self, OfCore},
    interrupts::{self, Source},
    unit,
};
use broker::{Expiry, Faulted, Restraint, Verdict};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use iommu::{Commands as _, Event, Events as _, FailureCause, FaultRecord, PageRequest, Stages, StreamId};

/// Page requests that one pass takes, at most: as many as may be outstanding, and one more report.
const PASS: usize = unit::OUTSTANDING + 1;
/// Deadlines that one pass looks at, at most.
const EXPIRIES: usize = 64;
/// Faults that one pass takes, at most: fewer, since no device waits for them.
const FAULTS: usize = 16;
/// Microseconds after which answers that the unit did not take are tried again.
const RETRY_US: u64 = 1_000;
/// Lines that what devices do may put into the log in [`LOG_PERIOD_US`]. More are counted.
const LOG_LINES: u32 = 32;
/// Microseconds after which the routine may log again.
const LOG_PERIOD_US: u64 = 100_000;

/// What the routine owns: nobody else takes it, and nothing is held for it.
static ROUTINE: OfCore<Routine> =
    OfCore::new(SERVICE_CORE, Routine { broker: Broker::new(&hypervisor::LEDGER), service: None });

struct Routine {
    /// What it owns of the page requests. It is here from the start, so that it never passes over a stack.
    broker: Broker,
    /// The rest, once there is a unit.
    service: Option<Service>,
}

struct Service {
    hv: &'static Hypervisor,
    events: unit::Events,
    notices: [Notices; GUESTS],
    log: LogBudget,
    /// When this pass took the requests that it deals with, in microseconds.
    now_us: u64,
    /// The owners of queues that there is news for: bit n set, that of queue n.
    kicks: u32,
    /// When the timer comes, at the latest, in microseconds.
    timer_us: u64,
    /// When answers that the unit did not take are tried again, in microseconds.
    retry_us: u64,
    /// The timer may have to come earlier: a group may have got a deadline, or somebody else wants to be woken.
    rearm: bool,
    /// Whose the last fault of this pass was, unless a loss was told since.
    faulted: Option<StreamId>,
}
const _: () = assert!(QUEUES < u32::BITS as usize, "there is a bit for each queue");
/// The bits of [`Service::kicks`] that are somebody's.
const HOMES: u32 = (1 << QUEUES) - 1;

/// Why the unit is not served.
#[derive(Clone, Copy, Debug, defmt::Format)]
pub enum Failure {
    /// There is no memory for the rings.
    NoMemory,
    /// The unit does not let itself be told where to interrupt.
    Unit(iommu::Error),
    /// This is not the service core.
    Elsewhere,
}

/// Lets the routine serve the unit, on this core.
pub fn start(hv: &'static Hypervisor, mut events: unit::Events) -> Result<(), Failure> {
    interrupts::on(Source::IommuFault, || run(Source::IommuFault));
    interrupts::on(Source::PageRequest, || run(Source::PageRequest));
    interrupts::on(Source::IommuError, || run(Source::IommuError));
    interrupts::on(Source::Timer, || run(Source::Timer));
    // A kick ends a sleep, or brings a guest out; what it is about is looked up by whoever was interrupted.
    interrupts::on(Source::Kick, || {});
    interrupts::on(Source::Device, count_device_interrupt);
    // No interrupt finds the routine half made.
    let _masked = cpu::mask();
    let made = ROUTINE.with(|routine| {
        let notices = hv.connect(&mut routine.broker).ok_or(Failure::NoMemory)?;
        unit::enable_interrupts(&mut events, SERVICE_CORE).map_err(Failure::Unit)?;
        routine.service = Some(Service {
            hv,
            events,
            notices,
            log: LogBudget::new(),
            now_us: 0,
            kicks: 0,
            timer_us: u64::MAX,
            retry_us: u64::MAX,
            rearm: false,
            faulted: None,
        });
        Ok(())
    });
    made.unwrap_or(Err(Failure::Elsewhere))?;
    // The first pass takes what was reported before anybody listened.
    hv.due.tell(Due::ALL);
    Ok(())
}

/// Wakes the control core at `at_us`: the service core's timer serves both.
fn wake_control_at(hv: &Hypervisor, at_us: u64) {
    hv.control_wakes_us.store(at_us, Relaxed);
    hv.due.tell(Due::WAKE);
}

/// Sleeps until `done`, with the routine at work; returns whether it came in time. The service core alone sleeps like this, as
/// the core that controls: its timer is the routine's.
pub fn wait_for(hv: &Hypervisor, limit_us: u64, mut done: impl FnMut() -> bool) -> bool {
    let end_us = cpu::now_us().saturating_add(limit_us);
    wake_control_at(hv, end_us);
    let _masked = cpu::mask();
    let came = loop {
        hv.control_waits.store(true, SeqCst);
        let late = cpu::now_us() >= end_us;
        if done() {
            break true;
        }
        if late {
            break false;
        }
        cpu::wait_for_interrupt();
    };
    hv.control_wakes_us.store(u64::MAX, Relaxed);
    came
}

/// The handler of everything that the service core serves.
///
/// Elsewhere it does nothing: there the timer only ends a sleep, and a message that claims to be the unit's is not.
fn run(source: Source) {
    ROUTINE.with(|Routine { broker, service }| {
        if let Some(service) = service {
            service.pass(broker, source);
        }
    });
}

/// The handler of devices' interrupts, on any core: they are counted, and the control core looks.
fn count_device_interrupt() {
    let Some(hv) = hypervisor::get() else { return };
    if let Some(count) = hv.device_interrupts.get(cpu::core()) {
        count.fetch_add(1, Relaxed);
    }
    interrupts::kick(SERVICE_CORE, Source::Kick);
}

impl Service {
    /// Does what `source` interrupts for: requests, faults, or what time has brought.
    fn pass(&mut self, broker: &mut Broker, source: Source) {
        let due = self.hv.due.take();
        if due != 0 || source == Source::IommuError {
            return self.pass_over_more(broker, source, due);
        }
        let done = match source {
            Source::PageRequest => self.take_requests(broker),
            Source::IommuFault => self.take_faults(broker),
            Source::Timer => {
                (self.timer_us, self.rearm) = (u64::MAX, true);
                self.expire(broker)
            }
            _ => true,
        };
        self.finish(broker, if done { 0 } else { Due::ALL });
    }

    /// Does what `source` interrupts for, and what is due besides. A pass after one that left something does everything, so that
    /// nothing waits behind what keeps coming; and so does one for an error, which may have lost any of it.
    #[cold]
    fn pass_over_more(&mut self, broker: &mut Broker, source: Source, due: u32) {
        let all = due & Due::ALL != 0 || source == Source::IommuError;
        // Before anything is taken: whoever asked by now is served by what this pass takes.
        let mut drain = (due & Due::DRAIN != 0).then(|| self.hv.drains.asked());
        if all {
            self.events.look_for_errors();
        }
        self.retry_us = u64::MAX;
        if due & Due::UNSENT != 0 && !self.hv.send_unsent() {
            self.hv.due.note(Due::UNSENT);
            self.retry_us = cpu::now_us().saturating_add(RETRY_US);
        }
        if due & Due::FAILED != 0 {
            self.recover();
        }
        let mut done = true;
        if all || source == Source::PageRequest || drain.is_some() {
            done &= self.take_requests(broker);
            // Faults do not hold up a drain: nobody waits for an answer to one.
            if done && let Some(asked) = drain.take() {
                broker.discard_leaving();
                self.hv.drains.done(asked);
            }
        }
        if all || source == Source::IommuFault {
            done &= self.take_faults(broker);
        }
        if source == Source::Timer {
            self.timer_us = u64::MAX;
        }
        if all || source == Source::Timer {
            done &= self.expire(broker);
        }
        self.rearm = true;
        let left = if done { 0 } else { Due::ALL } | if drain.is_some() { Due::DRAIN } else { 0 };
        self.finish(broker, left);
    }

    /// Tells the homes that there is news for, sees to another pass if something is `left`, and to the timer.
    #[inline]
    fn finish(&mut self, broker: &Broker, left: u32) {
        let mut kicks = core::mem::take(&mut self.kicks) & HOMES;
        while kicks != 0 {
            interrupts::kick(home_of(kicks.trailing_zeros() as usize), Source::Kick);
            kicks &= kicks - 1;
        }
        if left != 0 {
            self.hv.due.tell(left);
        }
        if core::mem::take(&mut self.rearm) {
            self.arm_timer(broker);
        }
    }

    /// Takes up to [`PASS`] page requests; returns whether there are no more.
    ///
    /// Each is dealt with before the next is taken, although a device that is answered may ask again at once: the unit's queue
    /// has room for that, see [`unit::OUTSTANDING`].
    fn take_requests(&mut self, broker: &mut Broker) -> bool {
        self.events.acknowledge();
        // What is taken together is reported at one time.
        self.now_us = cpu::now_us();
        for _ in 0..PASS {
            if let Some(request) = self.events.next_ordinary() {
                self.admit(broker, request);
                continue;
            }
            match self.events.next_request() {
                Some(event) => self.take(broker, event),
                None => return true,
            }
        }
        false
    }

    /// Takes up to [`FAULTS`] faults; returns whether there are no more.
    fn take_faults(&mut self, broker: &mut Broker) -> bool {
        for count in 0..FAULTS {
            let Some(event) = self.events.next_fault() else { return true };
            if count == 0 {
                (self.now_us, self.faulted) = (cpu::now_us(), None);
            }
            match event {
                Event::Fault(fault) => self.fault(fault),
                event => self.take(broker, event),
            }
        }
        false
    }

    /// Deals with a report of any kind.
    #[inline(never)]
    fn take(&mut self, broker: &mut Broker, event: Event) {
        match event {
            Event::PageRequest(request) => self.admit(broker, request),
            Event::Fault(fault) => self.fault(fault),
            Event::StopMarker { stream, pasid } => {
                defmt::debug!("{} sends no more requests for {}", stream, pasid)
            }
            Event::RequestsLost => {
                self.hv.lost.requests.fetch_add(1, Relaxed);
                defmt::warn!("page requests were lost: half-seen groups are discarded");
                broker.overflowed(self.now_us);
            }
            Event::FaultsLost => {
                self.hv.lost.faults.fetch_add(1, Relaxed);
                if self.log.allows() {
                    defmt::warn!("an unknown number of faults was lost");
                }
                self.lose_faults();
                // There was no room because of those that were there. Whose the last of them was answers for one more, so that
                // nobody answers for more of others' than of its own.
                if let Some(stream) = self.faulted.take() {
                    self.count_fault(stream);
                }
            }
            Event::Malformed { words: [low, high], group } => {
                defmt::warn!("the unit reports {=u64:#x} {=u64:#x}, which is nothing known", low, high);
                if let Some((stream, tag)) = group {
                    broker.malformed(stream, tag, self.now_us);
                }
            }
            Event::CommandsFailed { status } => {
                defmt::error!("the unit reports a command error, status {=u32:#x}", status);
                self.hv.commands.with(|commands| commands.told(status));
                self.recover();
            }
            _ => defmt::warn!("the unit reports something that the hypervisor does not know"),
        }
    }

    #[inline]
    fn admit(&mut self, broker: &mut Broker, request: PageRequest) {
        let now_us = self.now_us;
        self.rearm = true;
        if self.log.allows() {
            defmt::debug!("page request: {}", request);
        }
        match broker.admit(&request, now_us) {
            Verdict::Forward { queue } => self.kick(queue),
            Verdict::Refuse(response) => {
                if self.log.allows() {
                    defmt::debug!("refused at once: {}", response);
                }
                self.hv.respond(response);
            }
            Verdict::End(answer) => {
                if self.log.allows() {
                    defmt::warn!("a device uses one number for two groups; both get {}", answer.response());
                }
                self.hv.answer(answer);
            }
            Verdict::Nothing => {}
        }
    }

    /// Lets the unit go on with its commands, and quarantines devices that do not answer it: their owners' home cores block
    /// them. Another pass follows: what is left, and what happened meanwhile, does not interrupt.
    fn recover(&mut self) {
        self.hv.due.tell(Due::ALL);
        for _ in 0..FAULTS {
            let Some(failure) = self.hv.commands.with(|commands| commands.recover()) else { return };
            defmt::error!("{}", failure);
            self.hv.failures.with(|(count, last)| {
                *count += 1;
                *last = Some(failure);
            });
            if let (FailureCause::Unanswered, Some(stream)) = (failure.cause, failure.stream) {
                self.hv.note_silent(stream);
                self.hv.ledger.quarantine(stream);
                if let Some((index, _)) = self.hv.owner_of(stream) {
                    self.kick(index);
                }
            }
        }
    }

    /// Hands a fault to whoever owns the tables that it failed in.
    fn fault(&mut self, fault: FaultRecord) {
        if self.log.allows() {
            match unit::refused_interrupt(&fault) {
                Some((why, number)) => {
                    defmt::info!("interrupt {=u16} of {} was refused: {=str}", number, fault.stream, why);
                }
                None => defmt::info!("fault: {}", fault),
            }
        }
        self.faulted = Some(fault.stream);
        let attached = self.hv.ledger.faulted(fault.stream, fault.pasid, self.now_us);
        match attached {
            Some(Faulted { restraint: None, .. }) => {}
            Some(Faulted { restraint: Some(restraint), .. }) => self.too_many_faults(fault.stream, restraint),
            None => self.count_fault(fault.stream),
        }
        if self.hv.is_bound(fault.stream) && self.is_behind_guest(&fault) {
            return;
        }
        let attached = attached.map(|attached| attached.owner);
        let owner = attached.or_else(|| self.hv.owner_of(fault.stream).map(|(guest, name)| (guest, name, 0)));
        let notices = owner.and_then(|(index, ..)| self.notices.get_mut(index));
        let (Some((index, device, opaque)), Some(notices)) = (owner, notices) else {
            self.hv.unowned.with(|(count, last)| {
                *count += 1;
                *last = Some(fault);
            });
            return;
        };
        notices.send(Notice { fault, device, opaque });
        self.kick(index);
    }

    /// Returns whether a fault was behind a guest's own tables: what they lead to is the hypervisor's, and is not told.
    ///
    /// Where it may have been either stage, it was a permission, and the second gives all of them or none: it was the guest's.
    #[inline(never)]
    fn is_behind_guest(&mut self, fault: &FaultRecord) -> bool {
        let is_behind = self.events.refused_by(fault) == Stages::Second;
        if is_behind {
            self.hv.second_stage.with(|(count, last)| {
                *count += 1;
                *last = Some(*fault);
            });
        }
        is_behind
    }

    /// Counts a fault of a device that belongs to no attachment, or that some were lost behind one of the device's.
    #[inline(never)]
    fn count_fault(&mut self, stream: StreamId) {
        let counted = self.hv.ledger.device_faulted(stream, self.now_us);
        if let Some(restraint) = counted.unwrap_or_else(|_| self.hv.stray_fault(stream, self.now_us)) {
            self.too_many_faults(stream, restraint);
        }
    }

    /// Has a home core deal with a device that has more faults than it may.
    #[cold]
    fn too_many_faults(&mut self, stream: StreamId, restraint: Restraint) {
        defmt::warn!("{} has too many faults, and is {} from now on", stream, restraint);
        if let Some(home) = self.hv.note_flooding(stream) {
            self.kick(home);
        }
    }

    /// Tells every guest that owns a device: what the unit lost may have been about that.
    fn lose_faults(&mut self) {
        for (index, notices) in self.notices.iter_mut().enumerate() {
            if self.hv.owns_a_device(index) {
                notices.lose();
                self.kicks |= 1 << index;
            }
        }
    }

    /// Notes that there is news for a home: it is told once, when the pass is over.
    fn kick(&mut self, home: usize) {
        // What is no home's is left out when they are told.
        self.kicks |= 1_u32.wrapping_shl(home as u32);
    }

    /// Answers what nobody answered in time, and what was held back until now; returns whether nothing is left.
    fn expire(&mut self, broker: &mut Broker) -> bool {
        for _ in 0..EXPIRIES {
            let now_us = cpu::now_us();
            match broker.expire(now_us) {
                Expiry::Done => return true,
                Expiry::Nothing => {}
                Expiry::Held(answer) => {
                    if self.log.allows() {
                        defmt::debug!("held back until now: {}", answer.response());
                    }
                    self.hv.answer(answer);
                }
                Expiry::Expired { answer, late_us, restraint } => {
                    self.hv.latest_expiry_us.fetch_max(late_us, Relaxed);
                    if self.log.allows() {
                        defmt::info!(
                            "nobody answered in time, {=u64} us after the deadline it is: {}",
                            late_us,
                            answer.response()
                        );
                    }
                    let stream = answer.response().stream;
                    self.hv.answer(answer);
                    if let Some(restraint) = restraint {
                        defmt::warn!("{} is {} from now on", stream, restraint);
                        // Its owner's home core carries it out.
                        if let Some((index, _)) = self.hv.owner_of(stream) {
                            self.kick(index);
                        }
                    }
                }
            }
        }
        false
    }

    /// Lets the timer come when the next group runs out of time, when the control core wants to be woken, or when answers are
    /// to be tried again. One that comes too early only arms it anew, so it is never put off.
    fn arm_timer(&mut self, broker: &Broker) {
        let control = self.hv.control_wakes_us.load(Relaxed);
        let next = broker.next_deadline_us().unwrap_or(u64::MAX).min(control).min(self.retry_us);
        if next < self.timer_us {
            self.timer_us = next;
            // One microsecond at least: an interrupt for the past would come at once, and again.
            interrupts::arm_timer(next.saturating_sub(cpu::now_us()).max(1));
        }
    }
}

/// How much may still be logged. A storm costs its handling, not its printing.
struct LogBudget {
    period_start_us: u64,
    lines: u32,
    suppressed: u32,
}

impl LogBudget {
    const fn new() -> Self {
        Self { period_start_us: 0, lines: 0, suppressed: 0 }
    }

    fn allows(&mut self) -> bool {
        // All are below level error: where defmt builds none of them in, there is nothing to count.
        if matches!(option_env!("DEFMT_LOG"), Some("error" | "off")) {
            return false;
        }
        let now_us = cpu::now_us();
        if now_us.saturating_sub(self.period_start_us) >= LOG_PERIOD_US {
            if self.suppressed > 0 {
                defmt::warn!("{=u32} more lines about devices were left out of the log", self.suppressed);
            }
            *self = Self { period_start_us: now_us, lines: 0, suppressed: 0 };
        }
        let allowed = self.lines < LOG_LINES;
        if allowed {
            self.lines += 1;
        } else {
            self.suppressed += 1;
        }
        allowed
    }
}
