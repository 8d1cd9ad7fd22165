// SPDX-License-Identifier: GPL-2.0-or-later
//! QEMU's side of the border: every function, layout and number of QEMU's that the device relies on.
//!
//! None of this is a stable interface. The functions are those that QEMU's own devices call, declared in its headers
//! `qom/object.h`, `hw/qdev-core.h`, `hw/sysbus.h`, `hw/irq.h`, `hw/pci/{pci,pcie,msi}.h`, `system/memory.h`,
//! `system/{system,reset}.h` and `qemu/timer.h`; a QEMU that is built with modules exports them, for its
//! modules. `vtd_find_add_as` alone is VT-d's own. What is declared here was checked against QEMU 11.1.3 by running it.
//! Two things keep another QEMU from being called blindly: the plugin interface version, which QEMU compares before it
//! calls us, and the names, all of which must be there. Beyond that there is the guest, to which a layout that has
//! changed mostly shows as a wrong `MAGIC`.
#![expect(unsafe_code, reason = "QEMU is C; each block names the promise that makes the call good")]

mod arm;

use crate::{
    operation::{Access, PAGE_BYTES, Pasid},
    tlb::Translation,
};
pub(crate) use arm::ArmSmmu;
use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    ptr::{NonNull, null_mut},
};

/// An errno, positive.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Errno(pub(crate) u16);

impl Errno {
    /// Operation not permitted.
    pub(crate) const PERM: Self = Self(1);
    /// No such device: also "no longer on its bus".
    pub(crate) const NODEV: Self = Self(19);
    /// No space left.
    pub(crate) const NOSPC: Self = Self(28);

    /// Returns what a QEMU function that answers with zero or a negative errno said.
    fn check(result: c_int) -> Result<(), Self> {
        if result < 0 { Err(Self::of(result as isize)) } else { Ok(()) }
    }

    /// Returns the errno that a QEMU function returned in place of a count; 0 if it was a count of 0.
    fn of(negative: isize) -> Self {
        Self(u16::try_from(negative.unsigned_abs()).unwrap_or(u16::MAX))
    }
}

/// A failed memory transaction, as `MemTxResult` (error 1, decode error 2, access error 4).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct MemTx(pub(crate) u16);

impl MemTx {
    pub(crate) const ACCESS_ERROR: Self = Self(4);
}

/// Opaque: `ObjectClass`, which is also the start of `DeviceClass` and `PCIDeviceClass`.
#[repr(C)]
pub(crate) struct Class([u8; 0]);
/// Opaque: `PCIDevice`, which starts with `DeviceState`, which starts with `Object`.
#[repr(C)]
pub(crate) struct PciDevice([u8; 0]);
/// Opaque: `Error`.
#[repr(C)]
pub(crate) struct Error([u8; 0]);
#[repr(C)]
struct AddressSpace([u8; 0]);
#[repr(C)]
struct Bus([u8; 0]);
#[repr(C)]
struct Irq([u8; 0]);
#[repr(C)]
struct Object([u8; 0]);
#[repr(C)]
struct VtdAddressSpace([u8; 0]);

/// `DeviceRealize`.
pub(crate) type Realize = unsafe extern "C" fn(*mut PciDevice, *mut *mut Error);
/// `PCIConfigWriteFunc`.
pub(crate) type WriteConfig = unsafe extern "C" fn(*mut PciDevice, u32, u32, c_int);
/// `QEMUTimerCB` and `QEMUResetHandler`.
pub(crate) type Callback = unsafe extern "C" fn(*mut c_void);
/// `IOMMUNotify`.
type IotlbNotify = unsafe extern "C" fn(*mut IotlbNotifier, *const IotlbEntry);

/// `TypeInfo`: what `type_register_static` is told of a type.
#[repr(C)]
pub(crate) struct TypeInfo {
    pub(crate) name: *const c_char,
    pub(crate) parent: *const c_char,
    /// Zero: as the parent's.
    pub(crate) instance_size: usize,
    pub(crate) instance_align: usize,
    pub(crate) instance_init: Option<Callback>,
    pub(crate) instance_post_init: Option<Callback>,
    pub(crate) instance_finalize: Option<Callback>,
    pub(crate) is_abstract: bool,
    /// Zero: as the parent's.
    pub(crate) class_size: usize,
    pub(crate) class_init: Option<unsafe extern "C" fn(*mut Class, *const c_void)>,
    pub(crate) class_base_init: Option<unsafe extern "C" fn(*mut Class, *const c_void)>,
    pub(crate) class_data: *const c_void,
    /// Ends with a null name.
    pub(crate) interfaces: *const InterfaceInfo,
}

/// `InterfaceInfo`.
#[repr(C)]
pub(crate) struct InterfaceInfo(pub(crate) *const c_char);

/// `MemoryRegionOps`. The functions with attributes, and `accepts`, are never given, so their types do not matter.
#[repr(C)]
pub(crate) struct MemoryRegionOps {
    pub(crate) read: unsafe extern "C" fn(*mut c_void, u64, c_uint) -> u64,
    pub(crate) write: unsafe extern "C" fn(*mut c_void, u64, u64, c_uint),
    pub(crate) read_with_attrs: Option<Callback>,
    pub(crate) write_with_attrs: Option<Callback>,
    pub(crate) endianness: c_uint,
    pub(crate) valid: ValidSizes,
    pub(crate) implemented: Sizes,
}

impl MemoryRegionOps {
    /// `DEVICE_LITTLE_ENDIAN`.
    pub(crate) const LITTLE_ENDIAN: c_uint = 2;
}

/// `MemoryRegionOps.valid`: a struct of its own, aligned as its last field.
#[repr(C)]
pub(crate) struct ValidSizes {
    pub(crate) sizes: Sizes,
    pub(crate) accepts: Option<Callback>,
}

/// Access sizes in bytes, from `MemoryRegionOps`.
#[repr(C)]
pub(crate) struct Sizes {
    pub(crate) min: c_uint,
    pub(crate) max: c_uint,
    pub(crate) unaligned: bool,
}

/// Room for a `MemoryRegion`, which has 0x110 bytes in QEMU 11.1; zeroed, as QEMU's own are at first.
#[repr(C, align(16))]
pub(crate) struct MemoryRegion([u64; 256]);

impl MemoryRegion {
    pub(crate) const ZEROED: Self = Self([0; 256]);
}

/// Room for an `IOMMUNotifier`, which has about 64 bytes; QEMU fills it in and links it into a list.
#[repr(C, align(16))]
pub(crate) struct IotlbNotifier([u64; 32]);

impl IotlbNotifier {
    pub(crate) const ZEROED: Self = Self([0; 32]);
}

/// Room for a `QEMUTimer`, which has 48 bytes; zeroed, as QEMU's own are at first.
#[repr(C, align(16))]
pub(crate) struct Timer([u64; 32]);

impl Timer {
    pub(crate) const ZEROED: Self = Self([0; 32]);
}

/// `Notifier`, as an element of the list that QEMU calls when the machine is complete.
#[repr(C)]
pub(crate) struct MachineDone {
    pub(crate) notify: unsafe extern "C" fn(*mut MachineDone, *mut c_void),
    pub(crate) links: [*mut c_void; 2],
}

/// `IOMMUPRINotifier`.
#[repr(C)]
pub(crate) struct PriNotifier {
    pub(crate) notify: unsafe extern "C" fn(*mut PriNotifier, *const PriResponse),
}

/// `IOMMUPRIResponse`.
#[repr(C)]
pub(crate) struct PriResponse {
    /// 0 success, 1 invalid request, 2 response failure.
    pub(crate) code: c_uint,
    pub(crate) prgi: u16,
}

/// `IOMMUTLBEntry`.
#[repr(C)]
pub(crate) struct IotlbEntry {
    target: *mut AddressSpace,
    pub(crate) iova: u64,
    translated: u64,
    pub(crate) mask: u64,
    /// Bit 0 read, bit 1 write.
    permissions: c_uint,
    _pasid: u32,
}

/// Room for one `IOMMUTLBEntry` and for what a later QEMU may add to it.
#[repr(C)]
struct IotlbAnswer(IotlbEntry, [u64; 4]);

impl IotlbAnswer {
    /// Returns the translation of `page` in this answer, if there is one that permits `access`.
    fn translation(&self, access: Access, page: u64) -> Option<Translation> {
        let Self(entry, _) = self;
        let translation = Translation {
            space: Space(NonNull::new(entry.target)?),
            iova: page,
            translated: entry.translated,
            mask: entry.mask | (PAGE_BYTES - 1),
            read: entry.permissions & 1 != 0,
            write: entry.permissions & 2 != 0,
        };
        translation.permits(access).then_some(translation)
    }
}

/// `QEMU_CLOCK_VIRTUAL`, which stands still with the guest.
const VIRTUAL_CLOCK: c_uint = 1;
/// `PCI_NO_PASID`.
const NO_PASID: u32 = u32::MAX;
/// `MEMTXATTRS_UNSPECIFIED`: of the eight bytes of `MemTxAttrs`, passed in a register, the fifth is `unspecified`.
const UNSPECIFIED: u64 = 1 << 32;

unsafe extern "C" {
    /// The C library's: finds a symbol of the process.
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// Returns the address of a symbol of this process, or null.
fn symbol(name: &'static CStr) -> *mut c_void {
    // `RTLD_DEFAULT` is null in glibc and musl.
    // SAFETY: `name` is a C string.
    unsafe { dlsym(null_mut(), name.as_ptr()) }
}

/// Turns a name that ends with a NUL into a C string; for constants, in which the panic is a compile error.
const fn c_name(name: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(name.as_bytes()) {
        Ok(name) => name,
        Err(_) => panic!("the name does not end with its only NUL"),
    }
}

macro_rules! symbols {
    (
        required { $($name:ident: $type:ty,)* }
        optional { $($extra:ident: $extra_type:ty,)* }
    ) => {
        /// The functions of QEMU's that the device calls.
        pub(crate) struct Qemu {
            $($name: $type,)*
            $($extra: Option<$extra_type>,)*
        }

        impl Qemu {
            /// Finds every function, or returns the names of those that this process does not have.
            ///
            /// # Safety
            ///
            /// In this process, functions of these names have the types that are declared here.
            pub(crate) unsafe fn find() -> Result<Self, Vec<&'static str>> {
                $(let $name = symbol(const { c_name(concat!(stringify!($name), "\0")) });)*
                $(let $extra = symbol(const { c_name(concat!(stringify!($extra), "\0")) });)*
                let missing: Vec<_> =
                    [$((stringify!($name), $name)),*].iter().filter(|it| it.1.is_null()).map(|it| it.0).collect();
                if !missing.is_empty() {
                    return Err(missing);
                }
                Ok(Self {
                    // SAFETY: not null, and by our own promise a function of this type.
                    $($name: unsafe { std::mem::transmute::<*mut c_void, $type>($name) },)*
                    // SAFETY: by our own promise a function of this type; null is `None`.
                    $($extra: unsafe { std::mem::transmute::<*mut c_void, Option<$extra_type>>($extra) },)*
                })
            }
        }
    };
}

symbols! {
    required {
        // Types and objects.
        type_register_static: unsafe extern "C" fn(*const TypeInfo) -> *mut c_void,
        object_class_by_name: unsafe extern "C" fn(*const c_char) -> *mut Class,
        object_resolve_path_type: unsafe extern "C" fn(*const c_char, *const c_char, *mut bool) -> *mut Object,
        object_ref: unsafe extern "C" fn(*mut PciDevice) -> *mut PciDevice,
        object_property_get_link: unsafe extern "C" fn(
            *mut MemoryRegion, *const c_char, *mut *mut Error
        ) -> *mut MemoryRegion,
        object_property_get_uint: unsafe extern "C" fn(
            *mut MemoryRegion, *const c_char, *mut *mut Error
        ) -> u64,
        sysbus_mmio_get_region: unsafe extern "C" fn(*mut Object, c_int) -> *mut MemoryRegion,
        sysbus_get_connected_irq: unsafe extern "C" fn(*mut Object, c_int) -> *mut Irq,
        device_class_set_parent_realize: unsafe extern "C" fn(*mut Class, Realize, *mut Option<Realize>),
        qdev_get_parent_bus: unsafe extern "C" fn(*mut PciDevice) -> *mut Bus,
        // The device as such.
        pci_register_bar: unsafe extern "C" fn(*mut PciDevice, c_int, u8, *mut MemoryRegion),
        pci_requester_id: unsafe extern "C" fn(*mut PciDevice) -> u16,
        pci_default_read_config: unsafe extern "C" fn(*mut PciDevice, u32, c_int) -> u32,
        pci_default_write_config: WriteConfig,
        pcie_endpoint_cap_init: unsafe extern "C" fn(*mut PciDevice, u8) -> c_int,
        pcie_cap_flr_init: unsafe extern "C" fn(*mut PciDevice),
        pcie_cap_flr_write_config: WriteConfig,
        pcie_ats_init: unsafe extern "C" fn(*mut PciDevice, u16, bool),
        pcie_ats_enabled: unsafe extern "C" fn(*const PciDevice) -> bool,
        pcie_pasid_init: unsafe extern "C" fn(*mut PciDevice, u16, u8, bool, bool),
        pcie_pri_init: unsafe extern "C" fn(*mut PciDevice, u16, u32, bool),
        msi_init: unsafe extern "C" fn(*mut PciDevice, u8, c_uint, bool, bool, *mut *mut Error) -> c_int,
        msi_enabled: unsafe extern "C" fn(*const PciDevice) -> bool,
        msi_notify: unsafe extern "C" fn(*mut PciDevice, c_uint),
        // What it says to the IOMMU.
        pci_ats_request_translation: unsafe extern "C" fn(
            *mut PciDevice, u32, bool, bool, u64, usize, bool, *mut IotlbEntry, usize, *mut u32
        ) -> isize,
        pci_pri_request_page: unsafe extern "C" fn(
            *mut PciDevice, u32, bool, bool, u64, bool, u16, bool, bool
        ) -> c_int,
        pci_pri_register_notifier: unsafe extern "C" fn(*mut PciDevice, u32, *mut PriNotifier) -> c_int,
        pci_pri_unregister_notifier: unsafe extern "C" fn(*mut PciDevice, u32),
        pci_iommu_init_iotlb_notifier: unsafe extern "C" fn(
            *mut PciDevice, *mut IotlbNotifier, IotlbNotify, *mut c_void
        ) -> c_int,
        pci_iommu_register_iotlb_notifier: unsafe extern "C" fn(*mut PciDevice, u32, *mut IotlbNotifier) -> c_int,
        pci_device_iommu_address_space: unsafe extern "C" fn(*mut PciDevice) -> *mut AddressSpace,
        // Memory.
        memory_region_init_io: unsafe extern "C" fn(
            *mut MemoryRegion, *mut PciDevice, *const MemoryRegionOps, *mut c_void, *const c_char, u64
        ),
        address_space_get_iotlb_entry: unsafe extern "C" fn(*mut AddressSpace, u64, bool, u64) -> IotlbAnswer,
        memory_region_add_subregion_overlap: unsafe extern "C" fn(
            *mut MemoryRegion, u64, *mut MemoryRegion, c_int
        ),
        memory_region_dispatch_read: unsafe extern "C" fn(
            *mut MemoryRegion, u64, *mut u64, c_uint, u64
        ) -> u32,
        memory_region_dispatch_write: unsafe extern "C" fn(*mut MemoryRegion, u64, u64, c_uint, u64) -> u32,
        address_space_rw: unsafe extern "C" fn(*mut AddressSpace, u64, u64, *mut c_void, u64, bool) -> u32,
        // Its resets, interrupts and clocks.
        qemu_register_reset: unsafe extern "C" fn(Callback, *mut c_void),
        qemu_add_machine_init_done_notifier: unsafe extern "C" fn(*mut MachineDone),
        qemu_set_irq: unsafe extern "C" fn(*mut Irq, c_int),
        qemu_clock_get_ns: unsafe extern "C" fn(c_uint) -> i64,
        timer_init_full: unsafe extern "C" fn(
            *mut Timer, *mut c_void, c_uint, c_int, c_int, Callback, *mut c_void
        ),
        timer_mod: unsafe extern "C" fn(*mut Timer, i64),
        // The C library's, which QEMU's allocator is made of.
        malloc_usable_size: unsafe extern "C" fn(*mut Class) -> usize,
    }
    optional {
        // Only the x86 QEMU has VT-d.
        vtd_find_add_as: unsafe extern "C" fn(*mut Object, *mut Bus, c_int, u32) -> *mut VtdAddressSpace,
    }
}

/// Where `PCIDeviceClass` keeps `vendor_id`, as an index of 16-bit words; the other identifiers follow it, and `config_write`
/// is the pointer before it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct IdsAt(usize);

impl IdsAt {
    /// Returns `config_write` of the class with these 16-bit words, if it has a place that pointers may have.
    fn config_write(self, class: &[u16]) -> Option<u64> {
        let Self(ids) = self;
        let words = class.get(ids.checked_sub(4)?..ids)?;
        ids.is_multiple_of(4).then(|| words.iter().rev().fold(0, |all, word| all << 16 | u64::from(*word)))
    }
}

/// PCI identifiers of a device class, each as in the configuration space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ids {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    pub(crate) revision: u8,
    pub(crate) class: u16,
}

impl Qemu {
    /// Finds where a PCI device class keeps its identifiers, in two of QEMU's own whose identifiers are known.
    ///
    /// The layout is private to QEMU and moves between releases, so it is measured, and a measurement that is not
    /// unique is no measurement.
    ///
    /// # Safety
    ///
    /// QEMU has registered its types, and the caller holds the big QEMU lock.
    pub(crate) unsafe fn find_ids(&self) -> Option<IdsAt> {
        // SAFETY: passed on.
        let edu = unsafe { self.class_words(c"edu") }?;
        // SAFETY: passed on.
        let testdev = unsafe { self.class_words(c"pci-testdev") }?;
        // SAFETY: passed on.
        let port = unsafe { self.class_words(c"pcie-root-port") }?;
        // A root port has a function of its own for writes to its configuration space, and `edu` the usual one: none.
        let fits =
            |at: &IdsAt| at.config_write(&edu) == Some(0) && at.config_write(&port).is_some_and(|it| it != 0);
        only(shared_places((edu.clone(), [0x1234, 0x11e8]), (testdev, [0x1b36, 0x0005]))).filter(fits)
    }

    /// Returns the memory of a class as 16-bit words.
    ///
    /// # Safety
    ///
    /// QEMU has registered its types, and the caller holds the big QEMU lock.
    unsafe fn class_words(&self, name: &CStr) -> Option<Vec<u16>> {
        // SAFETY: types can be looked up, as promised.
        let class = NonNull::new(unsafe { (self.object_class_by_name)(name.as_ptr()) })?;
        // SAFETY: classes are allocated with the C library's allocator and never freed.
        let bytes = unsafe { (self.malloc_usable_size)(class.as_ptr()) };
        let words = class.as_ptr().cast::<u16>();
        let word = |at| {
            // SAFETY: inside the allocation, which is aligned for any C type.
            let word = unsafe { words.add(at) };
            // SAFETY: the same; a class that exists does not change under the lock.
            unsafe { word.read() }
        };
        Some((0..bytes / 2).map(word).collect())
    }

    /// Registers a type.
    ///
    /// # Safety
    ///
    /// QEMU has registered its own types and no machine exists yet; `info` is a `TypeInfo` whose functions and
    /// strings are good, by the rules of QEMU's object model, for as long as QEMU runs.
    pub(crate) unsafe fn register_type(&self, info: &'static TypeInfo) {
        // SAFETY: passed on.
        unsafe { (self.type_register_static)(info) };
    }

    /// Puts `realize`, `write_config` and `ids` into a class; returns the parent class's `realize`.
    ///
    /// # Safety
    ///
    /// `class` is one of PCI devices, in its `class_init`; `at` comes from [`Self::find_ids`].
    pub(crate) unsafe fn init_class(
        &self,
        class: *mut Class,
        realize: Realize,
        write_config: WriteConfig,
        at: IdsAt,
        ids: Ids,
    ) -> Option<Realize> {
        let mut parent = None;
        // SAFETY: a device class, as promised; the result has room.
        unsafe { (self.device_class_set_parent_realize)(class, realize, &raw mut parent) };
        let bytes = [
            &ids.vendor.to_ne_bytes()[..],
            &ids.device.to_ne_bytes(),
            // `revision` is one byte; one of padding follows.
            &[ids.revision, 0],
            &ids.class.to_ne_bytes(),
        ]
        .concat();
        // SAFETY: every class of PCI devices is at least as large as the one that was measured.
        let place = unsafe { class.cast::<u16>().add(at.0) };
        // SAFETY: the same: the identifiers lie in a row, and nothing else reads the class in its `class_init`.
        unsafe { place.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        // SAFETY: the pointer before the identifiers lies in the class as well.
        let before = unsafe { place.cast::<WriteConfig>().sub(1) };
        // SAFETY: the same; `find_ids` has seen that it is aligned, and what it is for.
        unsafe { before.write(write_config) };
        parent
    }

    /// Has `reset` called with `opaque` at every reset of the machine.
    ///
    /// # Safety
    ///
    /// `reset` may be called with `opaque`, under the big QEMU lock, for as long as QEMU runs.
    pub(crate) unsafe fn on_reset(&self, reset: Callback, opaque: *mut c_void) {
        // SAFETY: passed on.
        unsafe { (self.qemu_register_reset)(reset, opaque) };
    }

    /// Has `notifier` called once, when the machine is complete.
    ///
    /// # Safety
    ///
    /// No machine exists yet; `notifier` stays for as long as QEMU runs, and may be called with itself under the big
    /// QEMU lock.
    pub(crate) unsafe fn on_machine_done(&self, notifier: *mut MachineDone) {
        // SAFETY: passed on; QEMU fills in the links.
        unsafe { (self.qemu_add_machine_init_done_notifier)(notifier) };
    }

    /// Makes `timer` one that calls `callback` with `opaque`.
    ///
    /// # Safety
    ///
    /// `timer` stays for as long as QEMU runs, and `callback` may be called with `opaque` under the big QEMU lock.
    pub(crate) unsafe fn init_timer(&self, timer: *mut Timer, callback: Callback, opaque: *mut c_void) {
        /// `SCALE_NS`.
        const NANOSECONDS: c_int = 1;
        // SAFETY: passed on; null is the main loop's timers, and there are no attributes.
        unsafe {
            (self.timer_init_full)(timer, null_mut(), VIRTUAL_CLOCK, NANOSECONDS, 0, callback, opaque);
        }
    }

    /// Has `timer` call once, `after_ns` nanoseconds of the guest's time from now, and not before.
    ///
    /// # Safety
    ///
    /// `timer` comes from [`Self::init_timer`].
    pub(crate) unsafe fn set_timer(&self, timer: *mut Timer, after_ns: i64) {
        // SAFETY: clocks exist before any machine.
        let now = unsafe { (self.qemu_clock_get_ns)(VIRTUAL_CLOCK) };
        // SAFETY: passed on.
        unsafe { (self.timer_mod)(timer, now.saturating_add(after_ns)) };
    }
}

/// Returns every index at which both classes have the two words that are known of each.
fn shared_places(one: (Vec<u16>, [u16; 2]), other: (Vec<u16>, [u16; 2])) -> impl Iterator<Item = usize> {
    let [one, other] = [one, other]
        .map(|(words, known)| move |at: usize| words.get(at..).is_some_and(|rest| rest.starts_with(&known)));
    (0..u16::MAX.into()).filter(move |at| one(*at) && other(*at))
}

fn only(mut places: impl Iterator<Item = usize>) -> Option<IdsAt> {
    let first = places.next()?;
    places.next().is_none().then_some(IdsAt(first))
}

/// An address space of QEMU's; it lives as long as the machine.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Space(NonNull<AddressSpace>);

impl Space {
    /// Returns a space that a test can tell from others, and that nothing may access.
    #[cfg(test)]
    pub(crate) fn fake(number: u8) -> Self {
        Self(NonNull::without_provenance(std::num::NonZero::<usize>::MIN.saturating_add(number.into())))
    }
}

/// A page request message, or with neither `read` nor `write` a stop marker.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct PageRequest {
    /// The page's first address.
    pub(crate) page: u64,
    pub(crate) pasid: Pasid,
    /// Privileged Mode Requested.
    pub(crate) privileged: bool,
    pub(crate) read: bool,
    pub(crate) write: bool,
    /// Last Request in Page Request Group.
    pub(crate) last: bool,
    /// Page Request Group Index, 9 bits.
    pub(crate) prgi: u16,
}

/// One PCI device of QEMU's, and what it can ask of QEMU.
///
/// A device can leave its bus (its guest can switch off the slot) at any call that reaches guest-controlled memory.
/// Most of QEMU's functions must then not be called, so each method looks first whether the device is still there.
pub(crate) struct Pci {
    qemu: &'static Qemu,
    device: *mut PciDevice,
}

impl Pci {
    const EXPRESS_AT: u16 = 0x80;
    const ATS_AT: u16 = 0x100;
    const PASID_AT: u16 = 0x108;
    const PRI_AT: u16 = 0x110;

    /// Takes a reference to `device` that is never given back, so that the memory stays.
    ///
    /// # Safety
    ///
    /// `device` is a PCI device of this QEMU, and the big QEMU lock is held here and at every call of every method.
    pub(crate) unsafe fn new(qemu: &'static Qemu, device: *mut PciDevice) -> Self {
        // SAFETY: an object of QEMU's, as promised.
        unsafe { (qemu.object_ref)(device) };
        Self { qemu, device }
    }

    /// Returns the bus that the device is on.
    fn bus(&self) -> Option<NonNull<Bus>> {
        // SAFETY: the device's memory is ours to keep (`new`); this function only reads a field.
        NonNull::new(unsafe { (self.qemu.qdev_get_parent_bus)(self.device) })
    }

    /// Returns the device while it is on a bus.
    fn device(&self) -> Option<*mut PciDevice> {
        self.bus().map(|_| self.device)
    }

    /// Adds PCI Express, MSI, ATS, PASID and PRI capabilities and BAR 0, in the device's `realize`.
    ///
    /// # Safety
    ///
    /// The parent's `realize` succeeded. `region` and `opaque` stay for as long as QEMU runs, and are good for `ops`.
    pub(crate) unsafe fn realize(
        &self,
        region: *mut MemoryRegion,
        ops: &'static MemoryRegionOps,
        opaque: *mut c_void,
        bytes: u64,
    ) {
        let (qemu, device) = (self.qemu, self.device);
        // It can only fail for want of room, of which a new configuration space has plenty past its header.
        // SAFETY: the device is being realized, and is PCI Express by its interface.
        unsafe { (qemu.pcie_endpoint_cap_init)(device, Self::EXPRESS_AT as u8) };
        // SAFETY: as before; the capability is there.
        unsafe { (qemu.pcie_cap_flr_init)(device) };
        // It fails in a machine that has no MSI; then there is no capability, and the guest polls.
        // SAFETY: as before; QEMU picks the offset. One vector, 64-bit address, no mask bit, no error wanted.
        unsafe { (qemu.msi_init)(device, 0, 1, true, false, null_mut()) };
        // SAFETY: as before; extended capabilities start at 0x100, in a row. Aligned requests only.
        unsafe { (qemu.pcie_ats_init)(device, Self::ATS_AT, true) };
        // SAFETY: as before. 20 bits of PASID, no execute permission, privileged mode.
        unsafe { (qemu.pcie_pasid_init)(device, Self::PASID_AT, 20, false, true) };
        // SAFETY: as before. Up to 512 outstanding requests; responses carry the PASID.
        unsafe { (qemu.pcie_pri_init)(device, Self::PRI_AT, 512, true) };
        // SAFETY: all of it stays, as promised; the device owns the region.
        unsafe {
            (qemu.memory_region_init_io)(region, device, ops, opaque, c"sva-dev".as_ptr(), bytes);
        }
        // SAFETY: the region was just made; type 0 is 32-bit memory.
        unsafe { (qemu.pci_register_bar)(device, 0, 0, region) };
    }

    /// Has `callback` called with `opaque` once, `after_ns` nanoseconds of the guest's time from now, by `timer`.
    ///
    /// # Safety
    ///
    /// `timer` is zeroed and stays until `callback` is called with `opaque`, which may be under the big QEMU lock.
    pub(crate) unsafe fn schedule_after(
        &self,
        timer: *mut Timer,
        after_ns: i64,
        callback: Callback,
        opaque: *mut c_void,
    ) {
        // SAFETY: passed on.
        unsafe { self.qemu.init_timer(timer, callback, opaque) };
        // SAFETY: it was just made.
        unsafe { self.qemu.set_timer(timer, after_ns) };
    }

    /// Returns the requester id: bus 15:8, device 7:3, function 2:0.
    pub(crate) fn requester_id(&self) -> Option<u16> {
        let device = self.device()?;
        // SAFETY: the device is on a bus.
        Some(unsafe { (self.qemu.pci_requester_id)(device) })
    }

    /// Whether this is `device`.
    pub(crate) fn is(&self, device: *mut PciDevice) -> bool {
        self.device == device
    }

    /// Writes the configuration space as the guest does; returns whether that asks for a function-level reset.
    pub(crate) fn write_config(&self, at: u32, value: u32, bytes: c_int) -> bool {
        const DEVICE_CONTROL: u32 = 8;
        const INITIATE_RESET: u32 = 1 << 15;
        let Some(device) = self.device() else { return false };
        // SAFETY: the device is on a bus.
        unsafe { (self.qemu.pci_default_write_config)(device, at, value, bytes) };
        self.config(u32::from(Self::EXPRESS_AT) + DEVICE_CONTROL) & INITIATE_RESET != 0
    }

    /// Has QEMU reset its part of the device: configuration space, BAR and MSI.
    pub(crate) fn reset_function(&self) {
        let Some(device) = self.device() else { return };
        // SAFETY: the device is on a bus; the function looks at the register alone, not at what was written.
        unsafe { (self.qemu.pcie_cap_flr_write_config)(device, 0, 0, 0) };
    }

    /// Clears what QEMU lets survive a reset: the enable bits of ATS, PASID and PRI, and PRI's allocation.
    pub(crate) fn clear_enables(&self) {
        let Some(device) = self.device() else { return };
        for (at, bytes) in
            [(Self::PRI_AT + 4, 2), (Self::PRI_AT + 12, 4), (Self::PASID_AT + 6, 2), (Self::ATS_AT + 6, 2)]
        {
            // SAFETY: the device is on a bus, and has these registers since `realize`.
            unsafe { (self.qemu.pci_default_write_config)(device, at.into(), 0, bytes) };
        }
    }

    /// Whether the guest enabled ATS.
    pub(crate) fn ats_enabled(&self) -> bool {
        // SAFETY: the device is on a bus.
        self.device().is_some_and(|device| unsafe { (self.qemu.pcie_ats_enabled)(device) })
    }

    /// Whether the guest enabled PRI.
    pub(crate) fn pri_enabled(&self) -> bool {
        self.config(u32::from(Self::PRI_AT) + 4) & 1 != 0
    }

    /// Whether the guest lets the device send requests, of any kind.
    pub(crate) fn masters_bus(&self) -> bool {
        const COMMAND: u32 = 4;
        const BUS_MASTER: u32 = 1 << 2;
        self.config(COMMAND) & BUS_MASTER != 0
    }

    /// Returns the 16-bit register at `offset` of the configuration space; 0 when the device is on no bus.
    fn config(&self, offset: u32) -> u32 {
        // SAFETY: the device is on a bus.
        self.device().map_or(0, |device| unsafe { (self.qemu.pci_default_read_config)(device, offset, 2) })
    }

    /// Asks for the translation of an untranslated request for `page`, without PASID; `None` when there is none that
    /// permits `access`. The IOMMU treats the question like the request: it may record a fault.
    pub(crate) fn translate_untranslated(&self, access: Access, page: u64) -> Option<Translation> {
        let Space(space) = self.untranslated_space(Pasid(None))?;
        // SAFETY: the space lives as long as the machine.
        let mut answer = unsafe {
            (self.qemu.address_space_get_iotlb_entry)(space.as_ptr(), page, access.write, UNSPECIFIED)
        };
        // QEMU says "both" when one was asked for and found.
        answer.0.permissions &= if access.write { 2 } else { 1 };
        answer.translation(access, page)
    }

    /// Sends MSI 0 if the guest enabled MSI.
    pub(crate) fn interrupt(&self) {
        let Some(device) = self.device() else { return };
        // SAFETY: the device is on a bus.
        if unsafe { (self.qemu.msi_enabled)(device) } {
            // SAFETY: the same; there is one vector.
            unsafe { (self.qemu.msi_notify)(device, 0) };
        }
    }

    /// Asks for the translation of `page` (ATS); `None` when there is none that permits `access`.
    pub(crate) fn translate(&self, access: Access, page: u64) -> Result<Option<Translation>, Errno> {
        let device = self.device().ok_or(Errno::NODEV)?;
        let entry =
            IotlbEntry { target: null_mut(), iova: 0, translated: 0, mask: 0, permissions: 0, _pasid: 0 };
        let mut answer = IotlbAnswer(entry, [0; 4]);
        let mut missing = 0;
        // SAFETY: the device is on a bus; there is room for one entry, and for the count of what is missing.
        let count = unsafe {
            (self.qemu.pci_ats_request_translation)(
                device,
                access.pasid.0.unwrap_or(NO_PASID),
                access.privileged,
                false,
                page,
                PAGE_BYTES as usize,
                !access.write,
                (&raw mut answer).cast(),
                1,
                &raw mut missing,
            )
        };
        if count < 1 {
            return Err(Errno::of(count));
        }
        Ok(answer.translation(access, page).filter(|_| missing == 0))
    }

    /// Sends a page request message (PRI).
    pub(crate) fn request_page(&self, request: PageRequest) -> Result<(), Errno> {
        let device = self.device().ok_or(Errno::NODEV)?;
        // SAFETY: the device is on a bus.
        let result = unsafe {
            (self.qemu.pci_pri_request_page)(
                device,
                request.pasid.0.unwrap_or(NO_PASID),
                request.privileged,
                false,
                request.page,
                request.last,
                request.prgi,
                request.read,
                request.write,
            )
        };
        Errno::check(result)
    }

    /// Has responses and device-TLB invalidations for `pasid` told to `pri` and, through `invalidated`, to `iotlb`.
    ///
    /// # Safety
    ///
    /// When this succeeds, both stay in place for as long as QEMU runs, and their functions may be called with
    /// them under the big QEMU lock.
    pub(crate) unsafe fn listen(
        &self,
        pasid: Pasid,
        pri: *mut PriNotifier,
        iotlb: *mut IotlbNotifier,
        invalidated: IotlbNotify,
    ) -> Result<(), Errno> {
        let device = self.device().ok_or(Errno::NODEV)?;
        let pasid = pasid.0.unwrap_or(NO_PASID);
        // SAFETY: the device is on a bus; QEMU only sets fields of `iotlb`.
        Errno::check(unsafe {
            (self.qemu.pci_iommu_init_iotlb_notifier)(device, iotlb, invalidated, null_mut())
        })?;
        // SAFETY: the device is on a bus; `pri` stays, or is unregistered below.
        Errno::check(unsafe { (self.qemu.pci_pri_register_notifier)(device, pasid, pri) })?;
        // SAFETY: the device is on a bus; `iotlb` stays if this succeeds, and was set up above.
        let result = unsafe { (self.qemu.pci_iommu_register_iotlb_notifier)(device, pasid, iotlb) };
        Errno::check(result).inspect_err(|_| {
            // SAFETY: the device is on a bus: refusing a notifier does not take it off.
            unsafe { (self.qemu.pci_pri_unregister_notifier)(device, pasid) };
        })
    }

    /// Returns the address space of untranslated requests, with a PASID or without; `None` if the machine has none.
    pub(crate) fn untranslated_space(&self, pasid: Pasid) -> Option<Space> {
        let device = self.device()?;
        // SAFETY: the device is on a bus.
        let plain = NonNull::new(unsafe { (self.qemu.pci_device_iommu_address_space)(device) })?;
        match pasid.0 {
            None => Some(Space(plain)),
            Some(pasid) => self.vtd_space(plain, pasid),
        }
    }

    /// Returns VT-d's address space of `pasid`.
    ///
    /// QEMU has no call for a device's untranslated request with PASID. VT-d has the address space, though, inside a
    /// structure of its own, whose counterpart without PASID holds `plain`: at the same offset.
    fn vtd_space(&self, plain: NonNull<AddressSpace>, pasid: u32) -> Option<Space> {
        let find = self.qemu.vtd_find_add_as?;
        let bus = self.bus()?.as_ptr();
        let devfn = c_int::from(self.requester_id()? & 0xff);
        // SAFETY: both strings are good, and no answer is wanted to whether there are several.
        let vtd = unsafe {
            (self.qemu.object_resolve_path_type)(c"".as_ptr(), c"intel-iommu".as_ptr(), null_mut())
        };
        let vtd = NonNull::new(vtd)?.as_ptr();
        // SAFETY: an `intel-iommu`, and a bus with the number of a device on it.
        let without = NonNull::new(unsafe { find(vtd, bus, devfn, NO_PASID) })?.cast::<u8>();
        // Far apart means that `plain` is not VT-d's: the IOMMU is bypassed, or a bridge stands in for the device.
        let offset = plain.as_ptr().addr().checked_sub(without.as_ptr().addr()).filter(|it| *it < 256)?;
        // SAFETY: as before.
        let with = NonNull::new(unsafe { find(vtd, bus, devfn, pasid) })?.cast::<u8>();
        // SAFETY: the structure is of the type in which `plain` was found at `offset`.
        Some(Space(unsafe { with.add(offset) }.cast()))
    }

    /// Reads memory.
    pub(crate) fn load(&self, space: Space, address: u64, bytes: &mut [u8]) -> Result<(), MemTx> {
        // SAFETY: the bytes are ours to write.
        unsafe { self.copy(space, address, bytes.as_mut_ptr(), bytes.len(), false) }
    }

    /// Writes memory.
    pub(crate) fn store(&self, space: Space, address: u64, bytes: &[u8]) -> Result<(), MemTx> {
        // SAFETY: the bytes are ours to read, and a write of memory does not write them.
        unsafe { self.copy(space, address, bytes.as_ptr().cast_mut(), bytes.len(), true) }
    }

    /// # Safety
    ///
    /// `bytes` is good for `count` bytes, to be read, or if `write` is false to be written.
    unsafe fn copy(
        &self,
        space: Space,
        address: u64,
        bytes: *mut u8,
        count: usize,
        write: bool,
    ) -> Result<(), MemTx> {
        // These address spaces lie behind the switch that QEMU puts bus mastering into.
        if !self.masters_bus() {
            return Err(MemTx::ACCESS_ERROR);
        }
        // SAFETY: the space lives as long as the machine; the bytes are good, as promised.
        let result = unsafe {
            (self.qemu.address_space_rw)(
                space.0.as_ptr(),
                address,
                UNSPECIFIED,
                bytes.cast(),
                count as u64,
                write,
            )
        };
        if result == 0 { Ok(()) } else { Err(MemTx(u16::try_from(result).unwrap_or(u16::MAX))) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_not_qemu_is_told_every_name_it_lacks() {
        // SAFETY: the test process has none of QEMU's functions, and `malloc_usable_size` is the C library's.
        let missing = unsafe { Qemu::find() }.err().expect("this is not QEMU");

        assert!(missing.contains(&"type_register_static"));
        assert!(missing.contains(&"pci_pri_request_page"));
        assert!(!missing.contains(&"vtd_find_add_as"), "it is optional");
    }

    #[test]
    fn identifiers_are_where_both_known_classes_have_theirs() {
        let edu = vec![9, 0x1234, 0x11e8, 0x1234, 0x11e8, 0];
        let testdev = vec![0x1b36, 0x0005, 7, 0x1b36, 0x0005, 0];

        assert_eq!(only(shared_places((edu, [0x1234, 0x11e8]), (testdev, [0x1b36, 0x0005]))), Some(IdsAt(3)));
    }

    #[test]
    fn two_possible_places_or_none_are_no_measurement() {
        assert_eq!(only([3, 5].into_iter()), None);
        assert_eq!(only([].into_iter()), None);
    }
}
