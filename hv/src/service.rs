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

use crate::hypervisor::{self, Broker, GUESTS, Hypervisor, Notice, Notices, QUEUES, SERVICE_CORE, home_of};
use arch::{
    cpu::{self, Locked},
    interrupts::{self, Source},
    unit,
};
use broker::{Expiry, Faulted, Restraint, Verdict};
use core::sync::atomic::Ordering::{AcqRel, Relaxed, SeqCst};
use heapless::Deque;
use iommu::{Commands as _, Event, Events as _, FailureCause, FaultRecord, PageRequest, Stages, StreamId};

/// Page requests that one pass takes, at most: as many as the unit's queue may hold.
const PASS: usize = 128;
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

/// What the routine owns. The lock is never contended: the service core alone takes it, with interrupts masked.
static SERVICE: Locked<Option<Service>> = Locked::new(None);
/// What it owns of the page requests. It lies beside the rest so that it never passes over a stack.
static BROKER: Locked<Broker> = Locked::new(Broker::new(&hypervisor::LEDGER));

struct Service {
    hv: &'static Hypervisor,
    events: unit::Events,
    notices: [Notices; GUESTS],
    log: LogBudget,
    /// Page requests that were taken, and not yet dealt with.
    batch: Deque<Event, PASS>,
    /// When this pass took what it deals with, in microseconds.
    now_us: u64,
    /// A group may have got a deadline since the timer was armed.
    admitted: bool,
    /// The owners of queues that there is news for.
    kicks: [bool; QUEUES],
    /// When the timer comes, at the latest, in microseconds.
    timer_us: u64,
    /// Another pass is due, for everything.
    behind: bool,
    /// Whose the last fault of this pass was, unless a loss was told since.
    faulted: Option<StreamId>,
}

/// Why the unit is not served.
#[derive(Clone, Copy, Debug, defmt::Format)]
pub enum Failure {
    /// There is no memory for the rings.
    NoMemory,
    /// The unit does not let itself be told where to interrupt.
    Unit(iommu::Error),
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
    let notices = BROKER.with(|broker| hv.connect(broker)).ok_or(Failure::NoMemory)?;
    unit::enable_interrupts(&mut events, SERVICE_CORE).map_err(Failure::Unit)?;
    SERVICE.with(|service| {
        *service = Some(Service {
            hv,
            events,
            notices,
            log: LogBudget::new(),
            batch: Deque::new(),
            now_us: 0,
            admitted: false,
            kicks: [false; QUEUES],
            timer_us: u64::MAX,
            behind: true,
            faulted: None,
        })
    });
    // The first pass takes what was reported before anybody listened.
    interrupts::kick(SERVICE_CORE, Source::PageRequest);
    Ok(())
}

/// Wakes the control core at `at_us`: the service core's timer serves both.
fn wake_control_at(hv: &Hypervisor, at_us: u64) {
    hv.control_wakes_us.store(at_us, Relaxed);
    interrupts::kick(SERVICE_CORE, Source::PageRequest);
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
    if cpu::core() != SERVICE_CORE {
        return;
    }
    SERVICE.with(|service| {
        if let Some(service) = service {
            BROKER.with(|broker| service.pass(broker, source));
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
    /// Does what `source` interrupts for: requests, faults, or what time has brought. A pass after one that left something
    /// does all of it, so that nothing waits behind what keeps coming; and so does one for an error, which may have lost any
    /// of it.
    fn pass(&mut self, broker: &mut Broker, source: Source) {
        let all = core::mem::take(&mut self.behind) || source == Source::IommuError;
        if all {
            self.events.look_for_errors();
        }
        let asked = self.hv.drains.asked();
        let all_sent = self.hv.send_unsent();
        if self.hv.failed.swap(false, AcqRel) {
            self.recover();
        }
        let mut done = true;
        if all || source == Source::PageRequest {
            self.events.acknowledge();
            done &= self.take_requests(broker);
            if done && self.hv.drains.are_waited_for(asked) {
                // Faults do not hold up a drain: nobody waits for an answer to one.
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
        for (index, kick) in self.kicks.iter_mut().enumerate() {
            if core::mem::take(kick) {
                interrupts::kick(home_of(index), Source::Kick);
            }
        }
        self.behind |= !done;
        if self.behind {
            interrupts::kick(SERVICE_CORE, Source::PageRequest);
        } else if all || source != Source::IommuFault || core::mem::take(&mut self.admitted) || !all_sent {
            self.arm_timer(broker, all_sent);
        }
    }

    /// Takes up to [`PASS`] page requests; returns whether there are no more.
    ///
    /// All are taken before the first is dealt with: a device that is answered may ask again at once, and there is room.
    fn take_requests(&mut self, broker: &mut Broker) -> bool {
        let mut empty = false;
        while !self.batch.is_full() && !empty {
            match self.events.next_request() {
                // There is room: it was looked for.
                Some(event) => drop(self.batch.push_back(event)),
                None => empty = true,
            }
        }
        // What is taken together is reported at one time.
        self.now_us = cpu::now_us();
        while let Some(event) = self.batch.pop_front() {
            self.take(broker, event);
        }
        empty
    }

    /// Takes up to [`FAULTS`] faults; returns whether there are no more.
    fn take_faults(&mut self, broker: &mut Broker) -> bool {
        self.now_us = cpu::now_us();
        self.faulted = None;
        for _ in 0..FAULTS {
            match self.events.next_fault() {
                Some(event) => self.take(broker, event),
                None => return true,
            }
        }
        false
    }

    fn take(&mut self, broker: &mut Broker, event: Event) {
        match event {
            Event::PageRequest(request) => self.admit(broker, request),
            Event::StopMarker { stream, pasid } => {
                defmt::debug!("{} sends no more requests for {}", stream, pasid)
            }
            Event::RequestsLost => {
                self.hv.lost.requests.fetch_add(1, Relaxed);
                defmt::warn!("page requests were lost: half-seen groups are discarded");
                broker.overflowed(self.now_us);
            }
            Event::Fault(fault) => self.fault(fault),
            Event::FaultsLost => {
                self.hv.lost.faults.fetch_add(1, Relaxed);
                if self.log.allows(self.now_us) {
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

    fn admit(&mut self, broker: &mut Broker, request: PageRequest) {
        let now_us = self.now_us;
        self.admitted = true;
        if self.log.allows(now_us) {
            defmt::debug!("page request: {}", request);
        }
        match broker.admit(&request, now_us) {
            Verdict::Forward { queue } => self.kick(queue),
            Verdict::Refuse(response) => {
                if self.log.allows(now_us) {
                    defmt::debug!("refused at once: {}", response);
                }
                self.hv.respond(response);
            }
            Verdict::End(answer) => {
                if self.log.allows(now_us) {
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
        self.behind = true;
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
        if self.log.allows(self.now_us) {
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
                if let Some(kick) = self.kicks.get_mut(index) {
                    *kick = true;
                }
            }
        }
    }

    /// Notes that there is news for a home: it is told once, when the pass is over.
    fn kick(&mut self, home: usize) {
        if let Some(kick) = self.kicks.get_mut(home) {
            *kick = true;
        }
    }

    /// Answers what nobody answered in time, and what was held back until now; returns whether nothing is left.
    fn expire(&mut self, broker: &mut Broker) -> bool {
        for _ in 0..EXPIRIES {
            let now_us = cpu::now_us();
            match broker.expire(now_us) {
                Expiry::Done => return true,
                Expiry::Nothing => {}
                Expiry::Held(answer) => {
                    if self.log.allows(now_us) {
                        defmt::debug!("held back until now: {}", answer.response());
                    }
                    self.hv.answer(answer);
                }
                Expiry::Expired { answer, late_us, restraint } => {
                    self.hv.latest_expiry_us.fetch_max(late_us, Relaxed);
                    if self.log.allows(now_us) {
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
    fn arm_timer(&mut self, broker: &Broker, all_sent: bool) {
        let control = self.hv.control_wakes_us.load(Relaxed);
        let retry = if all_sent { u64::MAX } else { cpu::now_us().saturating_add(RETRY_US) };
        let next = broker.next_deadline_us().unwrap_or(u64::MAX).min(control).min(retry);
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

    fn allows(&mut self, now_us: u64) -> bool {
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
