//! Who may interrupt the processor, and by what.

use super::{PATIENCE_US, Seen, Unexpected, doorbell, expect, passes, report, requesters, task, wait_for};
use crate::{
    guest,
    hypervisor::{Device, Hypervisor, SERVICE_CORE, home_of},
    memory::{self, Share},
};
use arch::{
    cpu::Locked,
    interrupts::Source,
    unit::{InterruptHandle, REFUSALS, Remapping},
};
use core::sync::atomic::Ordering::Relaxed;
use iommu::{Bus, FaultRecord, Invalidation, Message};

/// What the unit reports of a message that names no entry at all, where there are such.
const COMPATIBILITY_FORMAT: u16 = 0x25;
/// Frames for the tables of the devices that reach their doorbell.
const TABLE_FRAMES: usize = 16;
/// How long nothing may happen until nothing has happened, in microseconds.
const QUIET_US: u64 = 20_000;

/// A `sva-dev` of the hypervisor's own, which it has send its message.
pub struct Sender<'h> {
    hv: &'h Hypervisor,
    /// Which it is.
    pub device: &'h Device,
    registers: arch::bus::Mmio,
}

/// What became of a message.
#[derive(Eq, PartialEq)]
pub enum Became {
    /// It interrupted this core, and no other.
    Arrived(usize),
    /// The unit refused it, and reported this.
    Refused(FaultRecord),
    /// Nobody was interrupted, and nothing reported.
    Dropped,
    /// More than one of these.
    Unclear,
}

impl<'h> Sender<'h> {
    /// `CONTROL` and `STATUS` of lane 0.
    const CONTROL: usize = 0x118;
    const STATUS: usize = 0x11C;
    const GO: u32 = 1;
    const BUSY: u32 = 1;

    fn new(hv: &'h Hypervisor, number: usize) -> Result<Self, Unexpected> {
        let device = hv.devices.get(number).ok_or("there is no such device")?;
        let registers = memory::device(device.registers.clone()).ok_or("a device is out of reach")?;
        Ok(Self { hv, device, registers })
    }

    /// Has the device send `message` from now on.
    pub fn use_message(&self, message: Message) -> Result<(), Unexpected> {
        self.device.function.enable_bus_master(&self.hv.config);
        let enabled = self.device.function.enable_messages(&self.hv.config, message, 0);
        enabled.map_err(|_| "a device does not take its message")
    }

    /// Has the device send the message once.
    ///
    /// An operation of no length ends at once, and as every operation it ends with the message. It touches no memory.
    pub fn start(&self) {
        self.registers.write32(Self::CONTROL, Self::GO);
    }

    /// Sends the message once; returns what became of it.
    pub fn send(&self) -> Became {
        let arrivals = || self.hv.device_interrupts.each_ref().map(|count| count.load(Relaxed));
        let faults = || self.hv.unowned.with(|&mut (count, last)| (count, last));
        let (arrived_before, (faults_before, _)) = (arrivals(), faults());
        self.start();
        // What comes of it comes at once, and perhaps more.
        let _ = wait_for(self.hv, QUIET_US, || false);
        if self.registers.read32(Self::STATUS) & 0xFF == Self::BUSY {
            return Became::Unclear;
        }
        let arrived = arrivals();
        let cores = || (0..arrived.len()).filter(|&core| arrived[core] != arrived_before[core]);
        let once = cores().count() == 1 && cores().all(|core| arrived[core] == arrived_before[core] + 1);
        match (once, faults()) {
            (true, (count, _)) if count == faults_before => {
                cores().next().map_or(Became::Unclear, Became::Arrived)
            }
            (false, (count, Some(last))) if arrived == arrived_before && count == faults_before + 1 => {
                Became::Refused(last)
            }
            (false, (count, _)) if arrived == arrived_before && count == faults_before => Became::Dropped,
            _ => Became::Unclear,
        }
    }

    /// Sends the message once; returns whether it was refused, and where the unit reports that, for `code` and by the entry's
    /// number.
    fn is_refused(&self, code: Option<u16>, number: u16) -> bool {
        match (code, self.send()) {
            (None, became) => became == Became::Dropped,
            (Some(code), Became::Refused(fault)) => {
                let named = arch::unit::refused_interrupt(&fault).map(|(_, number)| number);
                fault.stream == self.device.function.id && fault.code == code && named == Some(number)
            }
            _ => false,
        }
    }

    /// Lets the device send and reach nothing any more.
    pub fn stop(&self) {
        self.device.function.disable_messages(&self.hv.config);
        self.device.function.disable_bus_master(&self.hv.config);
    }
}

/// Takes an entry for a device, and the message that names it.
fn allocate(
    remapping: &Locked<Remapping>,
    sender: &Sender<'_>,
) -> Result<(InterruptHandle, Message), Unexpected> {
    remapping.with(|remapping| {
        let handle = remapping.allocate(sender.device.function.id).map_err(|_| "there is no entry")?;
        let message = remapping.message(&handle).map_err(|_| "there is no message")?;
        Ok((handle, message))
    })
}

/// Lets the interrupt reach `core`, and waits until the unit knows.
fn open(
    hv: &Hypervisor,
    remapping: &Locked<Remapping>,
    handle: &InterruptHandle,
    core: usize,
) -> Result<(), Unexpected> {
    let told = remapping.with(|remapping| remapping.open(handle, Source::Device, core));
    let told = told.map_err(|_| "an entry could not be set")?;
    invalidate(hv, &told)
}

fn invalidate(hv: &Hypervisor, invalidations: &[Invalidation]) -> Result<(), Unexpected> {
    hv.invalidate(invalidations).map_err(|_| "the unit did not forget an entry")
}

/// A device interrupts by its own entry alone, for as long as that is there; what others try is refused, and reported where
/// the machine reports it. Where messages are translated as other writes are, it also has to reach the page for that.
pub fn interrupts(hv: &Hypervisor, seen: &Seen) -> Result<&'static str, Unexpected> {
    let remapping = hv.remapping.as_ref().ok_or("the unit does not remap interrupts")?;
    let devices = requesters(hv);
    let [owner, other] = [Sender::new(hv, devices[0])?, Sender::new(hv, devices[1])?];
    let share = Share::new(TABLE_FRAMES);
    let shown = match &hv.doorbell {
        None => show(hv, seen, remapping, &owner, &other, |message| {
            told_to_its_owner(hv, seen, &other, devices[1], message)
        }),
        Some(page) => doorbell::show(hv, seen, remapping, &share, page.start, [&owner, &other], devices[1]),
    };
    owner.stop();
    other.stop();
    shown
}

/// Devices that reach their doorbell, or need none, and a device that a guest owns.
pub fn show(
    hv: &Hypervisor,
    seen: &Seen,
    remapping: &Locked<Remapping>,
    owner: &Sender<'_>,
    other: &Sender<'_>,
    of_a_guest: impl FnOnce([Message; 2]) -> Result<(), Unexpected>,
) -> Result<&'static str, Unexpected> {
    let [(others, others_message), (handle, message)] =
        [allocate(remapping, other)?, allocate(remapping, owner)?];
    let number = remapping.with(|remapping| remapping.number(&handle));
    let [not_present, wrong_source] = [REFUSALS.map(|(code, _)| code), REFUSALS.map(|(_, code)| code)];
    owner.use_message(message)?;
    seen.count("entry", number.into());

    let absent = owner.is_refused(not_present, number);
    expect(absent, "a message was not refused although its entry was not present")?;
    for core in [SERVICE_CORE, home_of(0)] {
        open(hv, remapping, &handle, core)?;
        expect(
            owner.send() == Became::Arrived(core),
            "a message did not reach the core that its entry names",
        )?;
        seen.count("arrived_at_core", core as u64);
    }

    other.use_message(others_message)?;
    open(hv, remapping, &others, SERVICE_CORE)?;
    expect(other.send() == Became::Arrived(SERVICE_CORE), "the other device's own message did not arrive")?;
    other.use_message(message)?;
    let foreign = other.is_refused(wrong_source, number);
    expect(foreign, "a message through another device's entry was not refused, or not reported")?;
    seen.count("refused_from_stream", other.device.function.id.0.into());
    if let Some(code) = wrong_source {
        seen.count("refused_for", code.into());
    }
    expect(owner.send() == Became::Arrived(home_of(0)), "the owner cannot interrupt any more")?;

    of_a_guest([others_message, message])?;

    // The manual has the unit refuse it (CFIS is clear), and the unit of our own model does. QEMU's does not look.
    let mut let_through = false;
    if let Some(message) = remapping.with(|r| r.compatibility_message(Source::Device, SERVICE_CORE)) {
        other.use_message(message)?;
        let_through = match other.send() {
            Became::Arrived(SERVICE_CORE) => {
                defmt::warn!(
                    "a message in the compatibility format came through: QEMU's unit does not refuse them"
                );
                true
            }
            Became::Refused(fault) if fault.code == COMPATIBILITY_FORMAT => false,
            _ => return Err("what became of a message in the compatibility format is unclear"),
        };
        seen.count("compatibility_format_let_through", let_through.into());
    }

    for handle in [handle, others] {
        let (leaving, invalidations) = remapping.with(|remapping| remapping.release(handle));
        invalidate(hv, &invalidations)?;
        remapping.with(|remapping| remapping.finish(leaving));
    }
    expect(
        owner.is_refused(not_present, number),
        "a message was not refused although its entry was given back",
    )?;
    Ok(match (wrong_source, let_through) {
        (None, _) => {
            "each device's message arrived by its own event, and the other's event was dropped; without the doorbell in its own tables it was refused and reported; neither a guest's CPU nor a device without messages reaches the doorbell"
        }
        (Some(_), false) => {
            "each device's message arrived by its own entry; through the other's it was refused and reported, to its owner as well, and so was the compatibility format"
        }
        (Some(_), true) => {
            "each device's message arrived by its own entry; through the other's it was refused and reported (0x26), to its owner as well; QEMU lets the compatibility format through"
        }
    })
}

/// Once more, with the other device a guest's: then the guest is told.
fn told_to_its_owner(
    hv: &Hypervisor,
    seen: &Seen,
    other: &Sender<'_>,
    number: usize,
    [_, message]: [Message; 2],
) -> Result<(), Unexpected> {
    guest::start(hv, 1, [task::REFUSED_INTERRUPT, 0, 0], &[number]);
    let waits = wait_for(hv, PATIENCE_US, || report(hv, 1, 0) == 1);
    let arrived = || hv.device_interrupts.iter().map(|count| count.load(Relaxed)).sum::<u64>();
    let before = arrived();
    other.use_message(message)?;
    other.start();
    let told = passes(hv, 1);
    expect(waits, "the guest is not ready to be told")?;
    told?;
    seen.count("events_of_the_owner", report(hv, 1, 1));
    expect(arrived() == before, "a message through another device's entry arrived")
}
