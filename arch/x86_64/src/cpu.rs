//! The cores: which there are, starting them, their interrupt mask, time, locks and the end.
#![expect(
    unsafe_code,
    reason = "per-core data, what is of one core, the interrupt flag and the start of cores are the processor's"
)]

use crate::{
    apic, console,
    entry::{self, APIC_IDS},
    machine::{Boot, Error},
};
use core::{
    arch::asm,
    arch::x86_64::CpuidResult,
    cell::UnsafeCell,
    marker::PhantomData,
    ptr,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, compiler_fence},
};
use spin::mutex::TicketMutex;
use x86_64::{
    VirtAddr,
    instructions::{interrupts, port::Port},
    registers::model_specific::GsBase,
};

pub use crate::clock::{now_us, ticks};

/// The most cores that this build serves.
pub const CORES: usize = 3;

/// What the GS base of each core points at: its index.
static INDEX: [usize; CORES] = {
    let mut index = [0; CORES];
    let mut core = 0;
    while core < CORES {
        index[core] = core;
        core += 1;
    }
    index
};

static PRESENT: AtomicUsize = AtomicUsize::new(1);
/// Physical address of the page below 1 MiB where started cores begin.
static TRAMPOLINE: AtomicU64 = AtomicU64::new(0);

/// Returns the index of this core, from 0, below [`CORES`]. The core that booted is 0.
pub fn core() -> usize {
    let core;
    // SAFETY: `set_index` ran first on every core, so GS points at a word of `INDEX`.
    unsafe { asm!("mov {}, gs:[0]", out(reg) core, options(pure, readonly, nostack, preserves_flags)) };
    core
}

/// Says to this core which one it is.
pub(crate) fn set_index(core: usize) {
    GsBase::write(VirtAddr::from_ptr(&raw const INDEX[core]));
}

/// Returns the number of cores that can be started, this one included; at most [`CORES`].
pub fn cores_present() -> usize {
    PRESENT.load(Ordering::Relaxed)
}

/// Notes which cores the MADT lists, and puts their first code where they can reach it.
pub(crate) fn find(boot: &Boot) -> Result<(), Error> {
    let own = apic::id();
    let mut ids = heapless::Vec::<u32, CORES>::new();
    let others = boot.apic_ids().filter(|&id| id != own && id <= apic::MAX_ID);
    for id in core::iter::once(own).chain(others) {
        // Cores past the table stay asleep.
        let _ = ids.push(id);
    }
    for (place, &id) in APIC_IDS.iter().zip(&ids) {
        place.store(id, Ordering::Relaxed);
    }
    PRESENT.store(ids.len(), Ordering::Relaxed);

    let page = boot.page_below_1_mib().ok_or(Error::NoMemory { what: "the start of cores, below 1 MiB" })?;
    let code = entry::trampoline();
    let to = core::ptr::with_exposed_provenance_mut::<u8>(page as usize);
    // SAFETY: `to` is a free page of RAM, mapped to itself, and the code is far shorter than it.
    unsafe { to.copy_from_nonoverlapping(code.as_ptr(), code.len()) };
    TRAMPOLINE.store(page, Ordering::Relaxed);
    Ok(())
}

/// What a core that was started finds to do; the slot is the whole handshake.
enum Start {
    Asleep,
    /// `start` waits for the core to take this.
    Asked(fn() -> !),
    Running,
}

static STARTS: [Locked<Start>; CORES] = [const { Locked::new(Start::Asleep) }; CORES];

/// How long a core may take to say that it is up, in microseconds.
const START_LIMIT_US: u64 = 100_000;
/// How long to wait between the messages that start a core, in microseconds.
///
/// The manual's 10 ms after INIT are for processors that needed an APIC on a chip of its own.
const START_STEP_US: u64 = 200;

/// Starts `core`, which runs `entry` with interrupts masked. Waits at most 100 ms for it to say that it is up.
///
/// A core that comes later than that finds nothing to do and sleeps again.
pub fn start(core: usize, entry: fn() -> !) -> Result<(), Error> {
    let present = cores_present();
    let slot = STARTS.get(core).filter(|_| core < present && core != 0);
    let slot = slot.ok_or(Error::UnknownCore { core, present })?;
    slot.with(|start| match start {
        Start::Asleep => {
            *start = Start::Asked(entry);
            Ok(())
        }
        _ => Err(Error::CoreRunning { core }),
    })?;
    let is_up = || slot.with(|start| matches!(start, Start::Running));
    let id = entry::apic_id(core);
    let began_us = now_us();
    apic::send_init(id);
    wait_until(began_us + START_STEP_US, || false);
    // The manual asks for a second start-up message in case the first was lost; a running core ignores it.
    apic::send_startup(id, TRAMPOLINE.load(Ordering::Relaxed));
    if !wait_until(now_us() + START_STEP_US, is_up) {
        apic::send_startup(id, TRAMPOLINE.load(Ordering::Relaxed));
        wait_until(began_us + START_LIMIT_US, is_up);
    }
    slot.with(|start| match start {
        Start::Running => Ok(()),
        _ => {
            *start = Start::Asleep;
            Err(Error::CoreSilent { core, waited_us: now_us() - began_us })
        }
    })
}

/// Waits for `done`, until `end_us` at the latest; returns whether it came.
fn wait_until(end_us: u64, done: impl Fn() -> bool) -> bool {
    loop {
        let late = now_us() >= end_us;
        if done() {
            return true;
        }
        if late {
            return false;
        }
        relax();
    }
}

/// Takes up the work that `core` was started for, on `core`.
pub(crate) fn arrive(core: usize) -> ! {
    let asked = STARTS[core].with(|start| match *start {
        Start::Asked(entry) => {
            *start = Start::Running;
            Some(entry)
        }
        _ => None,
    });
    match asked {
        Some(entry) => entry(),
        None => halt(),
    }
}

/// Tells the processor that this is a waiting loop (PAUSE).
pub fn relax() {
    core::hint::spin_loop();
}

/// Runs a hundred instructions that do nothing: what is counted for them says what is counted.
#[inline(always)]
pub fn hundred_instructions() {
    // SAFETY: they do nothing.
    unsafe { asm!(".rept 100", "nop", ".endr", options(nomem, nostack, preserves_flags)) };
}

/// Sleeps until an interrupt comes, and handles it. Called with interrupts masked; returns with them masked.
///
/// An interrupt that came since they were masked ends the sleep at once, so what was checked before is still true or
/// its interrupt has been handled. NMI ends it too.
pub fn wait_for_interrupt() {
    // The instruction after STI runs before any interrupt is taken, so none fits between it and the HLT.
    // SAFETY: interrupt handlers keep all registers, and the flag is masked again at the end as it was.
    unsafe { asm!("sti", "hlt", "cli", options(nostack)) };
}

/// Handles the interrupts that are pending on this core. Called with interrupts masked; returns with them masked.
pub fn take_interrupts() {
    // SAFETY: interrupt handlers keep all registers, and the flag is masked again at the end as it was.
    unsafe { asm!("sti", "nop", "cli", options(nostack)) };
}

/// What a stack is filled with to see how far down it comes to be used.
const PAINT: u64 = 0x5AA5_5AA5_5AA5_5AA5;
/// Bytes that are not painted: the frames of what paints and looks.
const UNPAINTED: usize = 256;

/// Returns how many bytes of this core's stack `f` used, by painting what is free of it before.
///
/// The first 256 count as used, whether they are or not.
#[inline(never)]
pub fn stack_used_by(f: impl FnOnce()) -> usize {
    let here = 0_u64;
    let top = (&raw const here).addr() & !7;
    let bottom = entry::stack_bottom(core());
    let words = top.saturating_sub(UNPAINTED).saturating_sub(bottom) / 8;
    let word = |at: usize| ptr::with_exposed_provenance_mut::<u64>(bottom + at * 8);
    for at in 0..words {
        // SAFETY: on this core's own stack, below everything that is live on it; no interrupt comes in between.
        unsafe { word(at).write_volatile(PAINT) };
    }
    f();
    // SAFETY: as above, and only what was painted is looked at.
    let untouched = (0..words).take_while(|&at| unsafe { word(at).read_volatile() } == PAINT).count();
    top - (bottom + untouched * 8)
}

/// Interrupts are masked on this core until this is dropped; then they are as they were before.
#[must_use = "interrupts stay masked only as long as this lives"]
pub struct Masked {
    were_enabled: bool,
    /// The mask is this core's, so it must not go to another.
    _core: PhantomData<*const ()>,
}

impl Drop for Masked {
    fn drop(&mut self) {
        if self.were_enabled {
            interrupts::enable();
        }
    }
}

/// Masks interrupts on this core.
pub fn mask() -> Masked {
    let were_enabled = interrupts::are_enabled();
    interrupts::disable();
    Masked { were_enabled, _core: PhantomData }
}

/// Opens interrupts on this core for the first time; every core begins with them masked.
pub fn unmask_forever() {
    interrupts::enable();
}

/// A value that one core at a time may use, with interrupts masked: cores are served in the order in which they ask.
///
/// Since no interrupt comes while it is held, a handler may use it too. It must not be used within itself.
pub struct Locked<T>(TicketMutex<T>);

impl<T> Locked<T> {
    /// Locks `value` away.
    pub const fn new(value: T) -> Self {
        Self(TicketMutex::new(value))
    }

    /// Returns what `f` makes of the value. `f` is short: other cores spin meanwhile.
    pub fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        let _masked = mask();
        f(&mut self.0.lock())
    }
}

/// A value that one core alone uses, so that nobody is waited for and nothing is masked.
pub struct OfCore<T> {
    core: usize,
    in_use: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached in `with` alone, on one core, by one borrower at a time; and it may be sent to that core.
unsafe impl<T: Send> Sync for OfCore<T> {}

impl<T> OfCore<T> {
    /// Sets `value` aside for `core`.
    pub const fn new(core: usize, value: T) -> Self {
        Self { core, in_use: AtomicBool::new(false), value: UnsafeCell::new(value) }
    }

    /// Returns what `f` makes of the value; `None` on other cores, and while the value is in use already: by what this was
    /// called from, or by what was interrupted.
    pub fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> Option<R> {
        // Of the other cores none gets further. On this one an interrupt that comes between the look and the mark has ended,
        // and its use with it, before the mark is made.
        if core() != self.core || self.in_use.load(Ordering::Relaxed) {
            return None;
        }
        self.in_use.store(true, Ordering::Relaxed);
        // ORDER: for an interrupt on this core, which sees what was done as the program has it, if the compiler does not mix it.
        compiler_fence(Ordering::SeqCst);
        // SAFETY: this core is the only one that comes here, and no reference was made that has not ended: `in_use`.
        let result = f(unsafe { &mut *self.value.get() });
        compiler_fence(Ordering::SeqCst);
        self.in_use.store(false, Ordering::Relaxed);
        Some(result)
    }
}

/// Ends the machine: tells QEMU's `isa-debug-exit` 0x10 (passed) or 0x11, once the log is out. Elsewhere the core halts.
pub fn exit(passed: bool) -> ! {
    interrupts::disable();
    console::finish();
    let mut debug_exit = Port::<u32>::new(0xF4);
    // SAFETY: nothing else answers at this port on a PC.
    unsafe { debug_exit.write(if passed { 0x10 } else { 0x11 }) };
    halt()
}

/// Sleeps for ever, with interrupts masked.
pub(crate) fn halt() -> ! {
    loop {
        interrupts::disable();
        x86_64::instructions::hlt();
    }
}

/// Returns what CPUID says for `leaf` and `subleaf`.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    core::arch::x86_64::__cpuid_count(leaf, subleaf)
}
