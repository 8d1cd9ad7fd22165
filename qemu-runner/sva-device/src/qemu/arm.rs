// SPDX-License-Identifier: GPL-2.0-or-later
//! QEMU's SMMUv3: its registers, its interrupt outputs, and a place in front of it.

use super::{Irq, MemoryRegion, MemoryRegionOps, Object, Qemu, Space, UNSPECIFIED, symbol};
use std::{
    ffi::{c_int, c_uint, c_void},
    ptr::{NonNull, null_mut},
};

/// `MO_32`: in `memory_region_dispatch_*`, an access of four bytes in the byte order of a little-endian host.
const FOUR_BYTES: c_uint = 2;

/// The one SMMUv3 of a machine.
pub(crate) struct ArmSmmu {
    qemu: &'static Qemu,
    registers: NonNull<MemoryRegion>,
    /// The region that `registers` is in, and where.
    container: NonNull<MemoryRegion>,
    address: u64,
    priq: NonNull<Irq>,
    gerror: NonNull<Irq>,
    /// Physical memory.
    memory: Space,
}

impl ArmSmmu {
    /// Finds the SMMU; `None` in a machine without one.
    ///
    /// # Safety
    ///
    /// The machine is complete, and the big QEMU lock is held here and at every call of every method.
    pub(crate) unsafe fn find(qemu: &'static Qemu) -> Result<Option<Self>, &'static str> {
        // Outputs of the SMMU, in QEMU's order.
        const PRIQ: c_int = 1;
        const GERROR: c_int = 3;
        let mut several = false;
        // SAFETY: both strings are good, and there is room for the answer to whether there are several.
        let smmu = unsafe {
            (qemu.object_resolve_path_type)(c"".as_ptr(), c"arm-smmuv3".as_ptr(), &raw mut several)
        };
        let Some(smmu) = NonNull::new(smmu) else {
            return if several { Err("there are several") } else { Ok(None) };
        };
        let smmu: *mut Object = smmu.as_ptr();
        // SAFETY: an SMMU is a system bus device with one region.
        let registers = NonNull::new(unsafe { (qemu.sysbus_mmio_get_region)(smmu, 0) });
        let registers = registers.ok_or("it has no registers")?;
        // SAFETY: a region has this property; no error is wanted.
        let container =
            unsafe { (qemu.object_property_get_link)(registers.as_ptr(), c"container".as_ptr(), null_mut()) };
        let container = NonNull::new(container).ok_or("its registers are not mapped")?;
        // SAFETY: the same.
        let address =
            unsafe { (qemu.object_property_get_uint)(registers.as_ptr(), c"addr".as_ptr(), null_mut()) };
        let output = |n| {
            // SAFETY: a system bus device; it need not have the output.
            NonNull::new(unsafe { (qemu.sysbus_get_connected_irq)(smmu, n) })
        };
        let priq = output(PRIQ).ok_or("its PRI queue interrupt is not wired")?;
        let gerror = output(GERROR).ok_or("its global error interrupt is not wired")?;
        let memory = symbol(c"address_space_memory").cast();
        let memory =
            NonNull::new(memory).map(Space).ok_or("this QEMU does not export address_space_memory")?;
        Ok(Some(Self { qemu, registers, container, address, priq, gerror, memory }))
    }

    /// Whether `space` is physical memory.
    pub(crate) fn is_memory(&self, space: Space) -> bool {
        space == self.memory
    }

    /// Puts a region of `bytes` in front of the registers: accesses reach it instead of them.
    ///
    /// # Safety
    ///
    /// `region` and `opaque` stay for as long as QEMU runs, and are good for `ops`.
    pub(crate) unsafe fn cover(
        &self,
        region: *mut MemoryRegion,
        ops: &'static MemoryRegionOps,
        opaque: *mut c_void,
        bytes: u64,
    ) {
        /// Above what QEMU's machines use themselves.
        const PRIORITY: c_int = 10;
        // Without an owner: if the SMMU owned it, QEMU would take what is forwarded for a device accessing itself.
        // SAFETY: all of it stays, as promised.
        unsafe {
            let name = c"sva-dev-smmu".as_ptr();
            (self.qemu.memory_region_init_io)(region, null_mut(), ops, opaque, name, bytes);
        }
        // SAFETY: the region was just made, and the other is one that others are in.
        unsafe {
            let container = self.container.as_ptr();
            (self.qemu.memory_region_add_subregion_overlap)(container, self.address, region, PRIORITY);
        }
    }

    /// Reads the four bytes of a register.
    pub(crate) fn read(&self, offset: u64) -> u32 {
        let mut value = 0;
        // SAFETY: the region exists; there is room for the value. A refusal leaves it 0.
        unsafe {
            (self.qemu.memory_region_dispatch_read)(
                self.registers.as_ptr(),
                offset,
                &raw mut value,
                FOUR_BYTES,
                UNSPECIFIED,
            )
        };
        value as u32
    }

    /// Writes the four bytes of a register.
    pub(crate) fn write(&self, offset: u64, value: u32) {
        // SAFETY: the region exists. A refusal is no write.
        unsafe {
            (self.qemu.memory_region_dispatch_write)(
                self.registers.as_ptr(),
                offset,
                value.into(),
                FOUR_BYTES,
                UNSPECIFIED,
            )
        };
    }

    /// Reads physical memory; `None` when the access aborts.
    pub(crate) fn load(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        // SAFETY: the bytes are ours to write.
        let result = unsafe { self.access(address, bytes.as_mut_ptr(), bytes.len(), false) };
        (result == 0).then_some(u64::from_le_bytes(bytes))
    }

    /// Writes physical memory; returns whether the access succeeded.
    pub(crate) fn store(&self, address: u64, bytes: &[u8]) -> bool {
        // SAFETY: the bytes are ours to read, and a write of memory does not write them.
        unsafe { self.access(address, bytes.as_ptr().cast_mut(), bytes.len(), true) == 0 }
    }

    /// # Safety
    ///
    /// `bytes` is good for `count` bytes, to be read, or if `write` is false to be written.
    unsafe fn access(&self, address: u64, bytes: *mut u8, count: usize, write: bool) -> u32 {
        let Space(space) = self.memory;
        // SAFETY: the space lives as long as QEMU; the bytes are good, as promised.
        unsafe {
            (self.qemu.address_space_rw)(
                space.as_ptr(),
                address,
                UNSPECIFIED,
                bytes.cast(),
                count as u64,
                write,
            )
        }
    }

    /// Pulses the interrupt output of the PRI queue.
    pub(crate) fn pulse_priq(&self) {
        self.pulse(self.priq);
    }

    /// Pulses the interrupt output of global errors.
    pub(crate) fn pulse_gerror(&self) {
        self.pulse(self.gerror);
    }

    fn pulse(&self, output: NonNull<Irq>) {
        for level in [1, 0] {
            // SAFETY: an interrupt line lives as long as the machine.
            unsafe { (self.qemu.qemu_set_irq)(output.as_ptr(), level) };
        }
    }
}
