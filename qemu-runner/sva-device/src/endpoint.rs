// SPDX-License-Identifier: GPL-2.0-or-later
//! The device type `sva-dev`, and one device of it: what QEMU calls, and what is done with it.
//!
//! QEMU makes every call of this file under its big lock: type and device set-up, accesses to BAR 0, timers,
//! reset handlers, and the notifiers, which run inside the guest's write to the invalidation queue's tail (or, called
//! by [`crate::overlay`], to that of the command queue). So the state needs no lock of its own. It does need to expect
//! calls within calls; see [`crate::engine`].
#![expect(unsafe_code, reason = "QEMU calls with raw pointers; each block names the promise behind one")]

use crate::{
    device::{Device, Turn},
    engine::{self, Link},
    operation::{Access, Pasid},
    overlay::{Machine, Overlay, without_pasid},
    qemu::{
        Class, Errno, Error, Ids, IdsAt, InterfaceInfo, IotlbEntry, IotlbNotifier, MemTx, MemoryRegion,
        MemoryRegionOps, PageRequest, Pci, PciDevice, PriNotifier, PriResponse, Qemu, Realize, Sizes, Space,
        Timer, TypeInfo, ValidSizes,
    },
    registers::BAR_BYTES,
    say,
    tlb::Translation,
};
use std::{
    cell::{RefCell, UnsafeCell},
    ffi::{c_int, c_uint, c_void},
    fmt::Arguments,
    ptr::{from_ref, null},
    sync::OnceLock,
};

/// Most PASIDs (counting "none" as one) that a device uses in its life.
const PASIDS_MAX: usize = 16;

const IDS: Ids = Ids { vendor: 0x1b36, device: 0x5a5a, revision: 1, class: 0x00ff };

/// What the type needs to know; it is handed to `class_init`.
pub(crate) struct Type {
    pub(crate) qemu: &'static Qemu,
    pub(crate) machine: &'static Machine,
    pub(crate) ids_at: IdsAt,
    pub(crate) verbose: bool,
}

/// The initialised class.
static CLASS: OnceLock<(&'static Type, Realize)> = OnceLock::new();

/// Registers the device type.
///
/// # Safety
///
/// This is QEMU's call of `qemu_plugin_install`, and the first of this function.
pub(crate) unsafe fn register(of: Type) {
    let of: &'static Type = Box::leak(Box::new(of));
    let interfaces =
        Box::leak(Box::new([InterfaceInfo(c"pci-express-device".as_ptr()), InterfaceInfo(null())]));
    let info = Box::leak(Box::new(TypeInfo {
        name: c"sva-dev".as_ptr(),
        parent: c"pci-device".as_ptr(),
        instance_size: 0,
        instance_align: 0,
        instance_init: None,
        instance_post_init: None,
        instance_finalize: None,
        is_abstract: false,
        class_size: 0,
        class_init: Some(class_init),
        class_base_init: None,
        class_data: from_ref(of).cast(),
        interfaces: interfaces.as_ptr(),
    }));
    // SAFETY: plugins are installed after QEMU's types and before the machine; what `info` points to is leaked.
    unsafe { of.qemu.register_type(info) };
}

/// # Safety
///
/// QEMU initialises the class `class`; `data` is the `class_data` of [`register`].
unsafe extern "C" fn class_init(class: *mut Class, data: *const c_void) {
    // SAFETY: `data` is a leaked `Type`, as promised.
    let of: &'static Type = unsafe { &*data.cast() };
    // SAFETY: we are in the `class_init` of a PCI device.
    let parent = unsafe { of.qemu.init_class(class, realize, write_config, of.ids_at, IDS) };
    if let Some(parent) = parent {
        // A class is initialised once, so that the cell is empty.
        let _ = CLASS.set((of, parent));
    }
}

/// # Safety
///
/// QEMU realizes `device`, of our class, and takes an error at `errp`.
unsafe extern "C" fn realize(device: *mut PciDevice, errp: *mut *mut Error) {
    // The class comes before its devices, and every PCI device's parent class can be realized.
    let Some((of, parent)) = CLASS.get() else { return };
    // SAFETY: these are the arguments that it takes.
    unsafe { parent(device, errp) };
    // SAFETY: QEMU passes the address of an error that is null so far.
    if !errp.is_null() && !unsafe { errp.read() }.is_null() {
        return;
    }
    // SAFETY: a PCI device; see the head of the file for the lock.
    let pci = unsafe { Pci::new(of.qemu, device) };
    // Never freed: a call that QEMU has on its way may come at any time, even after the device was unplugged.
    let endpoint: &'static Endpoint = Box::leak(Box::new(Endpoint {
        pci,
        machine: of.machine,
        verbose: of.verbose,
        device: RefCell::default(),
        listeners: RefCell::default(),
        region: UnsafeCell::new(MemoryRegion::ZEROED),
    }));
    let opaque = from_ref(endpoint).cast_mut().cast();
    // SAFETY: the parent is realized; the endpoint, and the region in it, stay; `OPS` expects an endpoint.
    unsafe { endpoint.pci.realize(endpoint.region.get(), &OPS, opaque, BAR_BYTES) };
    // SAFETY: `reset` expects an endpoint.
    unsafe { of.qemu.on_reset(reset, opaque) };
    of.machine.add(endpoint);
    endpoint.say(format_args!("realized"));
}

/// One device.
pub(crate) struct Endpoint {
    pci: Pci,
    machine: &'static Machine,
    verbose: bool,
    device: RefCell<Device>,
    /// The PASIDs that QEMU tells us of.
    listeners: RefCell<Vec<Pasid>>,
    region: UnsafeCell<MemoryRegion>,
}

static OPS: MemoryRegionOps = MemoryRegionOps {
    read,
    write,
    read_with_attrs: None,
    write_with_attrs: None,
    endianness: MemoryRegionOps::LITTLE_ENDIAN,
    valid: ValidSizes { sizes: Sizes { min: 4, max: 8, unaligned: false }, accepts: None },
    implemented: Sizes { min: 4, max: 8, unaligned: false },
};

/// # Safety
///
/// `opaque` is the one of [`realize`].
unsafe extern "C" fn read(opaque: *mut c_void, offset: u64, bytes: c_uint) -> u64 {
    // SAFETY: a leaked endpoint, as promised.
    let endpoint: &'static Endpoint = unsafe { &*opaque.cast() };
    endpoint.device.borrow().read(offset, bytes)
}

/// # Safety
///
/// `opaque` is the one of [`realize`].
unsafe extern "C" fn write(opaque: *mut c_void, offset: u64, value: u64, bytes: c_uint) {
    // SAFETY: a leaked endpoint, as promised.
    let endpoint: &'static Endpoint = unsafe { &*opaque.cast() };
    let turn = endpoint.device.borrow_mut().write(offset, value, bytes);
    endpoint.schedule(turn);
}

/// # Safety
///
/// `device` is of our class, and realized; the guest writes `bytes` bytes of its configuration space.
unsafe extern "C" fn write_config(device: *mut PciDevice, at: u32, value: u32, bytes: c_int) {
    // Before it is realized nobody writes there.
    let endpoint = CLASS.get().and_then(|(of, _)| of.machine.endpoint_of(device));
    if let Some(endpoint) = endpoint
        && endpoint.pci.write_config(at, value, bytes)
    {
        endpoint.device.borrow_mut().reset_function();
        endpoint.pci.clear_enables();
        endpoint.pci.reset_function();
        endpoint.say(format_args!("function-level reset"));
    }
}

/// # Safety
///
/// `opaque` is the one of [`realize`].
unsafe extern "C" fn reset(opaque: *mut c_void) {
    // SAFETY: a leaked endpoint, as promised.
    let endpoint: &'static Endpoint = unsafe { &*opaque.cast() };
    endpoint.device.borrow_mut().power_on();
    endpoint.pci.clear_enables();
    endpoint.say(format_args!("reset"));
}

/// How long the device takes to begin a turn, in nanoseconds of the guest's time.
const BEGIN_NS: i64 = 1_000;

/// A turn that is to come.
struct Scheduled {
    endpoint: &'static Endpoint,
    turn: Turn,
    /// QEMU is done with it before it calls.
    timer: Timer,
}

/// # Safety
///
/// `opaque` is a `Scheduled` that was boxed for this call.
unsafe extern "C" fn run(opaque: *mut c_void) {
    // SAFETY: boxed for us, as promised, and QEMU calls once.
    let Scheduled { endpoint, turn, .. } = *unsafe { Box::<Scheduled>::from_raw(opaque.cast()) };
    engine::run(&endpoint.device, turn, &endpoint);
}

impl Endpoint {
    /// Has the engine run `turn`, if there is one, a moment of the guest's time from now.
    ///
    /// Not at once: the guest is in the middle of a register access, its own or one of the IOMMU, in which QEMU
    /// refuses to deliver an interrupt or to enter the IOMMU again. And not by a bottom half of QEMU's main loop, which
    /// comes when the host has time for it: where the guest's clock jumps while the guest sleeps, any limit of the
    /// guest's may have passed by then.
    fn schedule(&'static self, turn: Option<Turn>) {
        let Some(turn) = turn else { return };
        let after_ns = i64::from(self.device.borrow().delay_us(turn)) * 1000 + BEGIN_NS;
        let scheduled = Box::into_raw(Box::new(Scheduled { endpoint: self, turn, timer: Timer::ZEROED }));
        // SAFETY: boxed above, and not freed before `run`.
        let timer = unsafe { &raw mut (*scheduled).timer };
        // SAFETY: `run` expects what was just boxed, of which the timer is a part: it stays until `run` frees both.
        unsafe { self.pci.schedule_after(timer, after_ns, run, scheduled.cast()) };
    }

    /// Takes a page group response.
    pub(crate) fn respond(&'static self, pasid: Pasid, prgi: u16, code: u32) {
        let turn = self.device.borrow_mut().respond(pasid, prgi, code);
        match turn {
            Some(Turn { lane, .. }) => {
                self.say(format_args!("lane {lane}: response {code} to group {prgi} with {pasid}"));
            }
            None => self.say(format_args!("stray response {code} to group {prgi} with {pasid}")),
        }
        self.schedule(turn);
    }

    /// Takes a device-TLB invalidation of the addresses `first` to `last`.
    pub(crate) fn invalidate(&self, pasid: Pasid, first: u64, last: u64) {
        let dropped = self.device.borrow_mut().invalidate(pasid, first, last);
        self.say(format_args!(
            "invalidation of {first:#x} to {last:#x} with {pasid}, {dropped} translations dropped"
        ));
    }

    /// Returns the device's stream, as an SMMU numbers it.
    pub(crate) fn stream(&self) -> Option<u16> {
        self.pci.requester_id()
    }

    /// Returns the overlay of the SMMU that the device is behind; QEMU's own functions serve other devices.
    fn overlay(&self) -> Option<&'static Overlay> {
        self.machine.overlay().filter(|overlay| overlay.is_before(&self.pci))
    }

    /// Whether QEMU calls this device `device`.
    pub(crate) fn is(&self, device: *mut PciDevice) -> bool {
        self.pci.is(device)
    }

    /// Refuses an access to memory by translated address that the SMMU does not let pass.
    fn check(&self, space: Space) -> Result<(), MemTx> {
        let Some(overlay) = self.overlay() else { return Ok(()) };
        let translated = self.pci.untranslated_space(Pasid(None)) != Some(space);
        if translated && !overlay.passes_translated(&self.pci) { Err(MemTx::ACCESS_ERROR) } else { Ok(()) }
    }

    fn say(&self, line: Arguments<'_>) {
        if self.verbose {
            match self.pci.requester_id() {
                Some(id) => say(format_args!("{:02x}:{:02x}.{}: {line}", id >> 8, id >> 3 & 0x1f, id & 7)),
                None => say(format_args!("unplugged: {line}")),
            }
        }
    }
}

/// What QEMU calls when a response comes for one PASID. The first field is what QEMU knows.
#[repr(C)]
struct PriListener {
    notifier: PriNotifier,
    endpoint: &'static Endpoint,
    pasid: Pasid,
}

/// What QEMU calls when the device TLB is to forget addresses of one PASID. The first field is QEMU's to use.
#[repr(C)]
struct IotlbListener {
    notifier: UnsafeCell<IotlbNotifier>,
    endpoint: &'static Endpoint,
    pasid: Pasid,
}

/// # Safety
///
/// `notifier` is the start of a `PriListener`, and `response` is good for the call.
unsafe extern "C" fn responded(notifier: *mut PriNotifier, response: *const PriResponse) {
    // SAFETY: the start of a leaked listener, as promised.
    let PriListener { endpoint, pasid, .. } = unsafe { &*notifier.cast() };
    // SAFETY: good for the call.
    let PriResponse { code, prgi } = unsafe { response.read() };
    endpoint.respond(*pasid, prgi, code);
}

/// # Safety
///
/// `notifier` is the start of an `IotlbListener`, and `entry` is good for the call.
unsafe extern "C" fn invalidated(notifier: *mut IotlbNotifier, entry: *const IotlbEntry) {
    // SAFETY: the start of a leaked listener, as promised.
    let IotlbListener { endpoint, pasid, .. } = unsafe { &*notifier.cast() };
    // SAFETY: good for the call.
    let IotlbEntry { iova, mask, .. } = unsafe { &*entry };
    endpoint.invalidate(*pasid, iova & !mask, iova | mask);
}

impl Link for &'static Endpoint {
    fn listen(&self, pasid: Pasid) -> Result<(), Errno> {
        if self.overlay().is_some() {
            // It knows every device.
            return without_pasid(pasid);
        }
        if self.listeners.borrow().contains(&pasid) {
            return Ok(());
        }
        if self.listeners.borrow().len() >= PASIDS_MAX {
            return Err(Errno::NOSPC);
        }
        let endpoint = *self;
        let pri = Box::into_raw(Box::new(PriListener {
            notifier: PriNotifier { notify: responded },
            endpoint,
            pasid,
        }));
        let iotlb = Box::into_raw(Box::new(IotlbListener {
            notifier: UnsafeCell::new(IotlbNotifier::ZEROED),
            endpoint,
            pasid,
        }));
        // SAFETY: both are leaked unless this fails, and each starts with the notifier that its function expects.
        let result = unsafe { self.pci.listen(pasid, pri.cast(), iotlb.cast(), invalidated) };
        if result.is_err() {
            // SAFETY: boxed above, and QEMU did not keep it.
            drop(unsafe { Box::from_raw(pri) });
            // SAFETY: the same.
            drop(unsafe { Box::from_raw(iotlb) });
        } else {
            self.listeners.borrow_mut().push(pasid);
        }
        self.say(format_args!("listening for {pasid}: {result:?}"));
        result
    }

    fn ats_enabled(&self) -> bool {
        self.pci.ats_enabled()
    }

    fn translate(&self, access: Access, page: u64) -> Result<Option<Translation>, Errno> {
        match self.overlay() {
            Some(overlay) => overlay.translate(&self.pci, access, page),
            None => self.pci.translate(access, page),
        }
    }

    fn request_page(&self, request: PageRequest) -> Result<(), Errno> {
        match self.overlay() {
            Some(overlay) => overlay.request_page(&self.pci, request),
            None => self.pci.request_page(request),
        }
    }

    fn untranslated_space(&self, pasid: Pasid) -> Option<Space> {
        self.pci.untranslated_space(pasid)
    }

    fn load(&self, space: Space, address: u64, bytes: &mut [u8]) -> Result<(), MemTx> {
        self.check(space)?;
        self.pci.load(space, address, bytes)
    }

    fn store(&self, space: Space, address: u64, bytes: &[u8]) -> Result<(), MemTx> {
        self.check(space)?;
        self.pci.store(space, address, bytes)
    }

    fn interrupt(&self) {
        self.pci.interrupt();
    }

    fn say(&self, line: Arguments<'_>) {
        Endpoint::say(self, line);
    }
}
