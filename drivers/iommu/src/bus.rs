//! How a driver reaches its unit: registers, ordering, time.

use crate::{PhysAddr, unit::Error};
use core::{marker::PhantomData, ops::Range};
use tock_registers::{LocalRegisterCopy, RegisterLongName, fields::FieldValue};

/// How a driver reaches its unit: registers, the ordering of shared memory, and time.
///
/// Bare metal implements it over mapped registers; tests implement it over a model of the unit. It is shared by the
/// three halves of a unit, so all methods take `&self`.
///
/// A register read comes before the CPU's later loads, and a register write after its earlier loads: what is read from a
/// queue was there when its index was read, and is read before its place is given back.
pub trait Bus {
    /// Reads the 32-bit register at `offset` bytes from the unit's base.
    fn read32(&self, offset: usize) -> u32;
    /// Writes the 32-bit register at `offset` bytes from the unit's base.
    fn write32(&self, offset: usize, value: u32);
    /// Reads the 64-bit register at `offset` bytes from the unit's base.
    fn read64(&self, offset: usize) -> u64;
    /// Writes the 64-bit register at `offset` bytes from the unit's base.
    fn write64(&self, offset: usize, value: u64);
    /// Makes the CPU's earlier stores to `range` visible to the unit, before any later store or register write.
    ///
    /// On a unit that snoops this is a barrier; on one that does not, it also cleans the cache lines of `range`.
    fn publish(&self, range: Range<PhysAddr>);
    /// Makes the CPU's earlier stores to `range` visible to a unit that looks into the CPU's caches, before any later store
    /// or register write: [`publish`](Self::publish) without what that costs for the sake of units that do not.
    ///
    /// A driver calls it where its unit reports coherent walks. Who has nothing cheaper leaves it as it is.
    fn order(&self, range: Range<PhysAddr>) {
        self.publish(range);
    }
    /// Makes the unit's earlier stores to `range` visible to the CPU's later loads.
    ///
    /// What the CPU stored there was [published](Self::publish) before the unit could store: this may write cache lines back
    /// before it drops them, and what was left in them would go over what the unit stored.
    fn observe(&self, range: Range<PhysAddr>);
    /// Microseconds since an arbitrary start; never decreases.
    fn now_us(&self) -> u64;
}

impl<T: Bus + ?Sized> Bus for &T {
    fn read32(&self, offset: usize) -> u32 {
        (**self).read32(offset)
    }
    fn write32(&self, offset: usize, value: u32) {
        (**self).write32(offset, value);
    }
    fn read64(&self, offset: usize) -> u64 {
        (**self).read64(offset)
    }
    fn write64(&self, offset: usize, value: u64) {
        (**self).write64(offset, value);
    }
    fn publish(&self, range: Range<PhysAddr>) {
        (**self).publish(range);
    }
    fn order(&self, range: Range<PhysAddr>) {
        (**self).order(range);
    }
    fn observe(&self, range: Range<PhysAddr>) {
        (**self).observe(range);
    }
    fn now_us(&self) -> u64 {
        (**self).now_us()
    }
}

/// Waits until `done` holds, for at most `limit_us` microseconds; the one bounded wait of the drivers.
///
/// `register` is the name, in the manual, of what is waited for; it goes into the error.
pub fn wait_until<B: Bus + ?Sized>(
    bus: &B,
    register: &'static str,
    limit_us: u64,
    mut done: impl FnMut() -> bool,
) -> Result<(), Error> {
    let start = bus.now_us();
    loop {
        // The clock is read first: a wait that was preempted for long still looks once more before it gives up.
        let waited_us = bus.now_us().saturating_sub(start);
        if done() {
            return Ok(());
        }
        if waited_us >= limit_us {
            return Err(Error::Timeout { register, waited_us });
        }
        core::hint::spin_loop();
    }
}

/// A width that one register access moves: `u32` or `u64`.
pub trait Width: tock_registers::UIntLike {
    /// Reads a register of this width.
    fn read<B: Bus + ?Sized>(bus: &B, offset: usize) -> Self;
    /// Writes a register of this width.
    fn write<B: Bus + ?Sized>(self, bus: &B, offset: usize);
}

impl Width for u32 {
    fn read<B: Bus + ?Sized>(bus: &B, offset: usize) -> Self {
        bus.read32(offset)
    }
    fn write<B: Bus + ?Sized>(self, bus: &B, offset: usize) {
        bus.write32(offset, self);
    }
}

impl Width for u64 {
    fn read<B: Bus + ?Sized>(bus: &B, offset: usize) -> Self {
        bus.read64(offset)
    }
    fn write<B: Bus + ?Sized>(self, bus: &B, offset: usize) {
        bus.write64(offset, self);
    }
}

/// A read-only register of width `T` with the fields of `R`.
#[derive(Debug)]
pub struct Ro<T, R = ()>(usize, PhantomData<(T, R)>);
/// A register of width `T` with the fields of `R` that reads back what was written.
#[derive(Debug)]
pub struct Rw<T, R = ()>(usize, PhantomData<(T, R)>);
/// A register of width `T` whose bits read as status and are cleared by writing ones to them.
///
/// It is a type of its own because a bit that is written back by accident clears a report nobody has read.
#[derive(Debug)]
pub struct W1c<T, R = ()>(usize, PhantomData<(T, R)>);

impl<T: Width, R: RegisterLongName> Ro<T, R> {
    /// The register at `offset` bytes.
    pub const fn at(offset: usize) -> Self {
        Self(offset, PhantomData)
    }
    /// Reads the register.
    pub fn read<B: Bus + ?Sized>(&self, bus: &B) -> LocalRegisterCopy<T, R> {
        LocalRegisterCopy::new(T::read(bus, self.0))
    }
}

impl<T: Width, R: RegisterLongName> Rw<T, R> {
    /// The register at `offset` bytes.
    pub const fn at(offset: usize) -> Self {
        Self(offset, PhantomData)
    }
    /// Reads the register.
    pub fn read<B: Bus + ?Sized>(&self, bus: &B) -> LocalRegisterCopy<T, R> {
        LocalRegisterCopy::new(T::read(bus, self.0))
    }
    /// Writes `value` as it is.
    pub fn set<B: Bus + ?Sized>(&self, bus: &B, value: T) {
        value.write(bus, self.0);
    }
    /// Writes `fields`, and zero elsewhere.
    pub fn write<B: Bus + ?Sized>(&self, bus: &B, fields: FieldValue<T, R>) {
        fields.value.write(bus, self.0);
    }
}

impl<T: Width, R: RegisterLongName> W1c<T, R> {
    /// The register at `offset` bytes.
    pub const fn at(offset: usize) -> Self {
        Self(offset, PhantomData)
    }
    /// Reads the status.
    pub fn read<B: Bus + ?Sized>(&self, bus: &B) -> LocalRegisterCopy<T, R> {
        LocalRegisterCopy::new(T::read(bus, self.0))
    }
    /// Clears exactly the bits that are set in `fields`.
    pub fn clear<B: Bus + ?Sized>(&self, bus: &B, fields: FieldValue<T, R>) {
        fields.value.write(bus, self.0);
    }
}
