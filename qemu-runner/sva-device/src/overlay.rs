// SPDX-License-Identifier: GPL-2.0-or-later
//! Puts an [`Smmu`] in front of the SMMU of an Arm machine, between it, its guest and the devices behind it.
//!
//! QEMU makes every call of this file under its big lock, as it does those of [`crate::endpoint`]; what is said there
//! of the state and of calls within calls holds here.
#![expect(unsafe_code, reason = "QEMU calls with raw pointers; each block names the promise behind one")]

use crate::{
    endpoint::Endpoint,
    operation::{Access, Pasid},
    qemu::{
        ArmSmmu, Errno, MachineDone, MemoryRegion, MemoryRegionOps, PageRequest, Pci, PciDevice, Qemu, Sizes,
        Timer, ValidSizes,
    },
    say,
    smmu::{Answer, Beneath, Line, REGISTER_BYTES, Smmu},
    tlb::Translation,
};
use std::{
    cell::{OnceCell, RefCell, UnsafeCell},
    ffi::{c_uint, c_void},
    fmt::Arguments,
    mem::take,
    ptr::{from_ref, null_mut},
};

/// How long the SMMU's own answers take, in nanoseconds of the guest's time.
///
/// An answer to a lost request asks the device to try again. At once it would use up its tries before software had any
/// time to make room in the queue.
const OWN_ANSWER_NS: i64 = 1_000_000;

/// The devices of the machine, and the overlay of its SMMU.
pub(crate) struct Machine {
    qemu: &'static Qemu,
    verbose: bool,
    /// The stream whose answers the SMMU is to refuse.
    spoiled: Option<u32>,
    endpoints: RefCell<Vec<&'static Endpoint>>,
    overlay: OnceCell<Overlay>,
}

// SAFETY: whoever calls its methods has been called by QEMU, which holds the big lock: no two threads at a time.
unsafe impl Sync for Machine {}

/// What stands in front of one SMMU.
pub(crate) struct Overlay {
    machine: &'static Machine,
    beneath: ArmSmmu,
    smmu: Smmu,
    /// Answers of the SMMU's own that are on their way.
    answers: RefCell<Vec<Answer>>,
    timer: UnsafeCell<Timer>,
    region: UnsafeCell<MemoryRegion>,
}

/// What QEMU calls when the machine is complete. The first field is what QEMU knows.
#[repr(C)]
struct Completion {
    notifier: MachineDone,
    machine: &'static Machine,
}

impl Machine {
    /// Returns the machine to be, whose SMMU will get an overlay.
    ///
    /// # Safety
    ///
    /// This is QEMU's call of `qemu_plugin_install`.
    pub(crate) unsafe fn new(qemu: &'static Qemu, verbose: bool, spoiled: Option<u32>) -> &'static Self {
        let machine = Box::leak(Box::new(Self {
            qemu,
            verbose,
            spoiled,
            endpoints: RefCell::default(),
            overlay: OnceCell::new(),
        }));
        let completion = Box::into_raw(Box::new(Completion {
            notifier: MachineDone { notify: complete, links: [null_mut(); 2] },
            machine,
        }));
        // SAFETY: plugins are installed before the machine; the completion is leaked, and starts with its notifier.
        unsafe { qemu.on_machine_done(completion.cast()) };
        machine
    }

    /// Notes a device.
    pub(crate) fn add(&self, endpoint: &'static Endpoint) {
        self.endpoints.borrow_mut().push(endpoint);
    }

    /// Returns the overlay, once the machine is complete, if it has an SMMU.
    pub(crate) fn overlay(&self) -> Option<&Overlay> {
        self.overlay.get()
    }

    /// Returns the device that QEMU calls `device`.
    pub(crate) fn endpoint_of(&self, device: *mut PciDevice) -> Option<&'static Endpoint> {
        self.endpoints.borrow().iter().copied().find(|it| it.is(device))
    }

    /// Returns the device that is `stream` now.
    fn endpoint(&self, stream: u32) -> Option<&'static Endpoint> {
        self.endpoints
            .borrow()
            .iter()
            .copied()
            .find(|it| it.stream().is_some_and(|id| u32::from(id) == stream))
    }
}

/// # Safety
///
/// `notifier` is the start of a `Completion`, and the machine is complete.
unsafe extern "C" fn complete(notifier: *mut MachineDone, _: *mut c_void) {
    // SAFETY: the start of a leaked completion, as promised.
    let machine = unsafe { &*notifier.cast::<Completion>() }.machine;
    // SAFETY: the machine is complete, as promised; see the head of the file for the lock.
    let beneath = match unsafe { ArmSmmu::find(machine.qemu) } {
        Ok(Some(beneath)) => beneath,
        Ok(None) => return,
        Err(why) => return say(format_args!("smmu: it gets no PRI queue: {why}")),
    };
    let overlay = machine.overlay.get_or_init(|| Overlay {
        machine,
        beneath,
        smmu: Smmu::new(machine.spoiled),
        answers: RefCell::default(),
        timer: UnsafeCell::new(Timer::ZEROED),
        region: UnsafeCell::new(MemoryRegion::ZEROED),
    });
    let opaque = from_ref(overlay).cast_mut().cast();
    // SAFETY: the machine, and the overlay in it, stay; `OPS` expects an overlay.
    unsafe { overlay.beneath.cover(overlay.region.get(), &OPS, opaque, REGISTER_BYTES) };
    // SAFETY: the same; `answer` expects an overlay.
    unsafe { machine.qemu.init_timer(overlay.timer.get(), answer, opaque) };
    // SAFETY: the same; `reset` expects an overlay.
    unsafe { machine.qemu.on_reset(reset, opaque) };
    overlay.say(format_args!("it has a PRI queue now"));
}

static OPS: MemoryRegionOps = MemoryRegionOps {
    read,
    write,
    read_with_attrs: None,
    write_with_attrs: None,
    endianness: MemoryRegionOps::LITTLE_ENDIAN,
    valid: ValidSizes { sizes: Sizes { min: 4, max: 8, unaligned: false }, accepts: None },
    // QEMU makes two accesses of one to a 64-bit register, low half first, as an SMMU may.
    implemented: Sizes { min: 4, max: 4, unaligned: false },
};

/// # Safety
///
/// `opaque` is the one of [`complete`].
unsafe extern "C" fn read(opaque: *mut c_void, offset: u64, _bytes: c_uint) -> u64 {
    // SAFETY: an overlay that stays, as promised.
    let overlay: &'static Overlay = unsafe { &*opaque.cast() };
    overlay.smmu.read(overlay, offset).into()
}

/// # Safety
///
/// `opaque` is the one of [`complete`].
unsafe extern "C" fn write(opaque: *mut c_void, offset: u64, value: u64, _bytes: c_uint) {
    // SAFETY: an overlay that stays, as promised.
    let overlay: &'static Overlay = unsafe { &*opaque.cast() };
    overlay.smmu.write(overlay, offset, value as u32);
}

/// # Safety
///
/// `opaque` is the one of [`complete`].
unsafe extern "C" fn reset(opaque: *mut c_void) {
    // SAFETY: an overlay that stays, as promised.
    let overlay: &'static Overlay = unsafe { &*opaque.cast() };
    overlay.smmu.power_on();
    overlay.answers.borrow_mut().clear();
    overlay.say(format_args!("reset"));
}

/// # Safety
///
/// `opaque` is the one of [`complete`].
unsafe extern "C" fn answer(opaque: *mut c_void) {
    // SAFETY: an overlay that stays, as promised.
    let overlay: &'static Overlay = unsafe { &*opaque.cast() };
    let answers = take(&mut *overlay.answers.borrow_mut());
    for answer in answers {
        overlay.respond(answer);
    }
}

impl Overlay {
    /// Whether the SMMU translates the device's untranslated requests.
    pub(crate) fn is_before(&self, pci: &Pci) -> bool {
        pci.untranslated_space(Pasid(None)).is_some_and(|space| !self.beneath.is_memory(space))
    }

    /// Asks for the translation of `page` (ATS); `None` when there is none that permits `access`.
    pub(crate) fn translate(
        &self,
        pci: &Pci,
        access: Access,
        page: u64,
    ) -> Result<Option<Translation>, Errno> {
        without_pasid(access.pasid)?;
        if !pci.ats_enabled() || !pci.masters_bus() {
            return Err(Errno::PERM);
        }
        let stream = pci.requester_id().ok_or(Errno::NODEV)?;
        self.smmu.translate(self, stream, || pci.translate_untranslated(access, page))
    }

    /// Takes a page request message.
    pub(crate) fn request_page(&self, pci: &Pci, request: PageRequest) -> Result<(), Errno> {
        without_pasid(request.pasid)?;
        if !pci.pri_enabled() || !pci.masters_bus() {
            return Err(Errno::PERM);
        }
        let stream = pci.requester_id().ok_or(Errno::NODEV)?;
        self.smmu.request(self, stream, request);
        Ok(())
    }

    /// Whether a translated transaction of the device may pass.
    pub(crate) fn passes_translated(&self, pci: &Pci) -> bool {
        pci.requester_id().is_some_and(|stream| self.smmu.passes_translated(self, stream))
    }
}

/// Refuses a PASID: the SMMU has no substreams.
pub(crate) fn without_pasid(pasid: Pasid) -> Result<(), Errno> {
    if pasid.0.is_none() { Ok(()) } else { Err(Errno::NODEV) }
}

impl Beneath for Overlay {
    fn read(&self, offset: u64) -> u32 {
        self.beneath.read(offset)
    }

    fn write(&self, offset: u64, value: u32) {
        self.beneath.write(offset, value);
    }

    fn load(&self, address: u64) -> Option<u64> {
        self.beneath.load(address)
    }

    fn store(&self, address: u64, bytes: &[u8]) -> bool {
        self.beneath.store(address, bytes)
    }

    fn pulse(&self, line: Line) {
        match line {
            Line::PriQueue => self.beneath.pulse_priq(),
            Line::GlobalError => self.beneath.pulse_gerror(),
        }
    }

    fn respond(&self, answer: Answer) {
        let Answer { stream, prgi, response } = answer;
        match self.machine.endpoint(stream) {
            Some(endpoint) => endpoint.respond(Pasid(None), prgi, response as u32),
            None => self
                .say(format_args!("{response:?} to group {prgi} of stream {stream:#x}, which is no device")),
        }
    }

    fn respond_later(&self, answer: Answer) {
        self.answers.borrow_mut().push(answer);
        // SAFETY: made a timer when the overlay was.
        unsafe { self.machine.qemu.set_timer(self.timer.get(), OWN_ANSWER_NS) };
    }

    fn invalidate(&self, stream: u32, first: u64, last: u64) {
        match self.machine.endpoint(stream) {
            Some(endpoint) => endpoint.invalidate(Pasid(None), first, last),
            None => self.say(format_args!("invalidation for stream {stream:#x}, which is no device")),
        }
    }

    fn say(&self, line: Arguments<'_>) {
        if self.machine.verbose {
            say(format_args!("smmu: {line}"));
        }
    }
}
