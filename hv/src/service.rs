//! The service core's routine: drain the unit, admit what it reports, expire what nobody answered.
//!
//! It runs in the interrupt handler of the service core alone, never waits, and does a bounded amount of work: at most
//! [`PASS`] requests, [`FAULTS`] faults and [`PASS`] expiries a pass. Each costs a search over the attachments and one
//! guest's slots, and, if it ends in an answer, one hold of the command lock, for which the other cores' short holds may
//! have to end; what it prints is bounded by [`LOG_LINES`]. What is left makes it interrupt itself, since the unit will not
//! interrupt for it again.
//!
//! A group whose guest is silent is therefore answered at its deadline, plus interrupt latency, plus the passes before.

use crate::hypervisor::{ATTACHMENTS, GUESTS, Hypervisor, Notice, Outbox, SERVICE_CORE, SLOTS, home_of};
use arch::{
    cpu::{self, Locked},
    interrupts::{self, Source},
    unit,
};
use broker::{Broker, Verdict};
use core::sync::atomic::Ordering::{AcqRel, Relaxed};
use iommu::{Event, Events as _, FaultRecord, PageRequest};

/// Page requests that one pass takes, at most, and expiries.
const PASS: usize = 64;
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

struct Service {
    hv: &'static Hypervisor,
    events: unit::Events,
    broker: Broker<'static, GUESTS, SLOTS, ATTACHMENTS>,
    outboxes: [Outbox; GUESTS],
    log: LogBudget,
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
    interrupts::on(Source::IommuFault, run);
    interrupts::on(Source::PageRequest, run);
    interrupts::on(Source::Timer, run);
    // A kick ends a sleep, or brings a guest out; what it is about is looked up by whoever was interrupted.
    interrupts::on(Source::Kick, || {});
    let outboxes = hv.connect().ok_or(Failure::NoMemory)?;
    let [first, second] = hv.queues;
    let broker = Broker::new([first, second], hv.attachments);
    unit::enable_interrupts(&mut events, SERVICE_CORE).map_err(Failure::Unit)?;
    SERVICE.with(|service| *service = Some(Service { hv, events, broker, outboxes, log: LogBudget::new() }));
    // The first pass takes what was reported before anybody listened.
    interrupts::kick(SERVICE_CORE, Source::PageRequest);
    Ok(())
}

/// Wakes the control core at `at_us`: the service core's timer serves both.
pub fn wake_control_at(hv: &Hypervisor, at_us: u64) {
    hv.control_wakes_us.store(at_us, Relaxed);
    interrupts::kick(SERVICE_CORE, Source::PageRequest);
}

/// The handler of everything that the service core serves.
///
/// Elsewhere it does nothing: there the timer only ends a sleep, and a message that claims to be the unit's is not.
fn run() {
    if cpu::core() != SERVICE_CORE {
        return;
    }
    SERVICE.with(|service| {
        if let Some(service) = service {
            service.pass();
        }
    });
}

impl Service {
    fn pass(&mut self) {
        let asked = self.hv.drains.asked();
        let all_sent = self.hv.send_unsent();
        self.events.acknowledge();
        let no_requests = self.take_up_to(PASS, |events| events.next_request());
        let no_faults = self.take_up_to(FAULTS, |events| events.next_fault());
        let none_due = self.expire();
        if no_requests {
            // Faults do not hold up a drain: nobody waits for an answer to one.
            self.broker.discard_leaving();
            self.hv.drains.done(asked);
        }
        if no_requests && no_faults && none_due {
            self.arm_timer(all_sent);
        } else {
            interrupts::kick(SERVICE_CORE, Source::PageRequest);
        }
    }

    /// Takes up to `limit` reports; returns whether there are no more.
    fn take_up_to(&mut self, limit: usize, next: impl Fn(&mut unit::Events) -> Option<Event>) -> bool {
        for _ in 0..limit {
            match next(&mut self.events) {
                Some(event) => self.take(event),
                None => return true,
            }
        }
        false
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::PageRequest(request) => self.admit(request),
            Event::StopMarker { stream, pasid } => {
                defmt::debug!("{} sends no more requests for {}", stream, pasid)
            }
            Event::RequestsLost => {
                defmt::warn!("page requests were lost: half-seen groups are discarded");
                self.broker.overflowed(cpu::now_us());
            }
            Event::Fault(fault) => self.fault(fault),
            Event::FaultsLost => defmt::warn!("an unknown number of faults was lost"),
            Event::Malformed { words: [low, high] } => {
                defmt::warn!("the unit reports {=u64:#x} {=u64:#x}, which is nothing known", low, high);
            }
            Event::CommandsFailed { status } => {
                defmt::error!("the unit reports a command error, status {=u32:#x}", status);
            }
            _ => defmt::warn!("the unit reports something that the hypervisor does not know"),
        }
    }

    fn admit(&mut self, request: PageRequest) {
        let now_us = cpu::now_us();
        if self.log.allows(now_us) {
            defmt::debug!("page request: {}", request);
        }
        match self.broker.admit(request, now_us) {
            Verdict::Forward { queue, slot } => {
                let index = usize::from(queue);
                if let Some(reported) = self.hv.homes[index].reported_us.get(usize::from(slot)) {
                    reported.store(now_us, Relaxed);
                }
                // ORDER: the group was completed before the bit is set; whoever clears the bit sees the group.
                let on_its_way = self.hv.homes[index].announced.fetch_or(1 << slot, AcqRel) & 1 << slot != 0;
                if !on_its_way && self.outboxes[index].slots.enqueue(slot).is_err() {
                    defmt::error!("slot {=u8} of guest {=usize} found its ring full", slot, index);
                }
                interrupts::kick(home_of(index), Source::Kick);
            }
            Verdict::Answer(response) => {
                if self.log.allows(now_us) {
                    defmt::debug!("refused at once: {}", response);
                }
                self.hv.respond(response);
            }
            Verdict::Nothing => {}
        }
    }

    /// Hands a fault to whoever owns its device.
    fn fault(&mut self, fault: FaultRecord) {
        if self.log.allows(cpu::now_us()) {
            defmt::info!("fault: {}", fault);
        }
        let owner = self.hv.attachments.find(fault.stream, fault.pasid);
        let owner = owner.or_else(|| self.hv.attachments.find_device(fault.stream));
        let Some((_, policy)) = owner.filter(|(_, policy)| usize::from(policy.queue) < GUESTS) else {
            self.hv.unowned.with(|(count, last)| {
                *count += 1;
                *last = Some(fault);
            });
            return;
        };
        let index = usize::from(policy.queue);
        let (Some(outbox), Some(home)) = (self.outboxes.get_mut(index), self.hv.homes.get(index)) else {
            return;
        };
        let notice = Notice { fault, device: policy.device, opaque: policy.opaque };
        if outbox.notices.enqueue(notice).is_err() {
            home.notices_lost.fetch_add(1, Relaxed);
        }
        interrupts::kick(home_of(index), Source::Kick);
    }

    /// Answers what nobody answered in time; returns whether nothing is left.
    fn expire(&mut self) -> bool {
        for _ in 0..PASS {
            let now_us = cpu::now_us();
            let due = self.broker.next_deadline_us().filter(|&at| at <= now_us);
            let Some(due_us) = due else { return true };
            if let Some(answer) = self.broker.expire(now_us) {
                let late_us = now_us - due_us;
                self.hv.latest_expiry_us.fetch_max(late_us, Relaxed);
                if self.log.allows(now_us) {
                    defmt::info!(
                        "nobody answered in time, {=u64} us after the deadline it is: {}",
                        late_us,
                        answer.response()
                    );
                }
                self.hv.answer(answer);
            }
        }
        false
    }

    /// Interrupts this core when the next group runs out of time, when the control core wants to be woken, or when answers
    /// are to be tried again.
    fn arm_timer(&self, all_sent: bool) {
        let control = self.hv.control_wakes_us.load(Relaxed);
        let retry = if all_sent { u64::MAX } else { cpu::now_us().saturating_add(RETRY_US) };
        let next = self.broker.next_deadline_us().unwrap_or(u64::MAX).min(control).min(retry);
        if next == u64::MAX {
            interrupts::disarm_timer();
        } else {
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
                defmt::warn!("{=u32} reports were not logged", self.suppressed);
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
