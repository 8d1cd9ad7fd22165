//! The cores: which there are, starting them, their interrupt mask, time, locks and the end.
#![expect(
    unsafe_code,
    reason = "what is of one core, the interrupt mask, the start of cores and the debugger are the processor's"
)]

use crate::{
    console, entry,
    machine::{Boot, Error},
    psci,
};
use aarch64_cpu::registers::{DAIF, MPIDR_EL1, Readable, TPIDR_EL2, Writeable};
use core::{
    arch::asm,
    cell::UnsafeCell,
    marker::PhantomData,
    ptr,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, compiler_fence},
};
use spin::mutex::TicketMutex;

pub use crate::clock::{now_us, ticks};

/// The most cores that this build serves.
pub const CORES: usize = 3;

/// The affinity of each core that this build serves, as `MPIDR_EL1` has it; all ones for none.
static AFFINITIES: [AtomicU64; CORES] = [const { AtomicU64::new(u64::MAX) }; CORES];
static PRESENT: AtomicUsize = AtomicUsize::new(1);

/// Returns the index of this core, from 0, below [`CORES`]. The core that booted is 0.
pub fn core() -> usize {
    // `set_index` ran first on every core.
    TPIDR_EL2.get() as usize
}

/// Says to this core which one it is.
pub(crate) fn set_index(core: usize) {
    TPIDR_EL2.set(core as u64);
}

/// Returns the number of cores that can be started, this one included; at most [`CORES`].
pub fn cores_present() -> usize {
    PRESENT.load(Ordering::Relaxed)
}

/// Returns the affinity of `core`: `Aff3` to `Aff0`, where `MPIDR_EL1` has them. All ones for none.
pub(crate) fn affinity(core: usize) -> u64 {
    AFFINITIES.get(core).map_or(u64::MAX, |affinity| affinity.load(Ordering::Relaxed))
}

/// Notes which cores the device tree lists.
pub(crate) fn find(boot: &Boot) -> Result<(), Error> {
    /// `Aff3` and `Aff2` to `Aff0`.
    const AFFINITY: u64 = 0xFF_00FF_FFFF;
    let own = MPIDR_EL1.get() & AFFINITY;
    let mut present = 0;
    let others = boot.tree().affinities().filter(|&affinity| affinity != own);
    // Cores past the table stay off.
    for (place, affinity) in AFFINITIES.iter().zip(core::iter::once(own).chain(others)) {
        place.store(affinity, Ordering::Relaxed);
        present += 1;
    }
    PRESENT.store(present, Ordering::Relaxed);
    if present > 1 { boot.tree().check_psci() } else { Ok(()) }
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

/// Starts `core`, which runs `entry` with interrupts masked. Waits at most 100 ms for it to say that it is up.
///
/// A core that comes later than that finds nothing to do and switches itself off again.
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
    let began_us = now_us();
    // SAFETY: this is the code for it, and `core` is in range.
    let asked = unsafe { psci::cpu_on(affinity(core), entry::other_entry(), core as u64) };
    while asked.is_ok() && !slot.with(|start| matches!(start, Start::Running)) {
        if now_us() - began_us >= START_LIMIT_US {
            break;
        }
        relax();
    }
    slot.with(|start| match (&start, asked) {
        (Start::Running, _) => Ok(()),
        (_, result) => {
            *start = Start::Asleep;
            Err(match result {
                Ok(()) => Error::CoreSilent { core, waited_us: now_us() - began_us },
                Err(psci::ALREADY_ON | psci::ON_PENDING) => Error::CoreRunning { core },
                Err(code) => Error::CoreRefused { core, code },
            })
        }
    })
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
        None => {
            psci::cpu_off();
            halt()
        }
    }
}

/// Tells the processor that this is a waiting loop.
///
/// It does not sleep until an event (`WFE`), though a unit may send one when its commands are done: where the event does not
/// come, only the event stream of the generic timer ends such a sleep, and QEMU has neither. A wait is to be seen to end.
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
/// its interrupt has been handled. The processor may also end it for reasons of its own.
pub fn wait_for_interrupt() {
    // ORDER: WFI waits for no store, and what this core has stored must not wait for its sleep to end.
    // SAFETY: an interrupt ends the sleep although it is masked.
    unsafe { asm!("dsb sy", "wfi", options(nostack)) };
    take_interrupts();
}

/// Handles the interrupts that are pending on this core. Called with interrupts masked; returns with them masked.
pub fn take_interrupts() {
    // SAFETY: interrupt handlers keep all registers, and the flag is masked again at the end as it was.
    unsafe { asm!("msr daifclr, #2", "isb", "msr daifset, #2", options(nostack)) };
}

/// Lets this core take system errors and fast interrupts, which are the end, so that none goes unseen.
pub(crate) fn unmask_errors() {
    // SAFETY: their vectors are in place before the first core comes here.
    unsafe { asm!("msr daifclr, #5", options(nostack)) };
}

/// Masks interrupts on this core; returns whether they were open.
pub(crate) fn mask_interrupts() -> bool {
    let were_enabled = !DAIF.is_set(DAIF::I);
    // SAFETY: masking breaks nothing that memory safety rests on.
    unsafe { asm!("msr daifset, #2", options(nostack)) };
    were_enabled
}

/// Opens interrupts on this core.
pub(crate) fn unmask_interrupts() {
    // SAFETY: interrupt handlers keep all registers.
    unsafe { asm!("msr daifclr, #2", options(nostack)) };
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
            unmask_interrupts();
        }
    }
}

/// Masks interrupts on this core.
pub fn mask() -> Masked {
    Masked { were_enabled: mask_interrupts(), _core: PhantomData }
}

/// Opens interrupts on this core for the first time; every core begins with them masked.
pub fn unmask_forever() {
    unmask_interrupts();
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

/// Whether the machine is being ended: an exception on the way means that there is no debugger to tell.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Ends the machine: tells the semihosting of QEMU 0x10 (passed) or 0x11, once the log is out. Elsewhere the core halts.
pub fn exit(passed: bool) -> ! {
    /// `SYS_EXIT_EXTENDED`, and its reason `ADP_Stopped_ApplicationExit`.
    const EXIT: u64 = 0x20;
    const APPLICATION_EXIT: u64 = 0x2_0026;
    mask_interrupts();
    console::finish();
    ENDING.store(true, Ordering::Relaxed);
    let block = [APPLICATION_EXIT, if passed { 0x10 } else { 0x11 }];
    // SAFETY: the debugger only reads the block. Without one the instruction is undefined, and its exception halts.
    unsafe { asm!("hlt #0xf000", in("x0") EXIT, in("x1") block.as_ptr(), options(nostack)) };
    halt()
}

/// Returns whether [`exit`] has had its say, on any core.
pub(crate) fn is_ending() -> bool {
    ENDING.load(Ordering::Relaxed)
}

/// Sleeps for ever, with interrupts masked.
pub(crate) fn halt() -> ! {
    loop {
        // SAFETY: with everything masked nothing comes after this.
        unsafe { asm!("msr daifset, #15", "wfi", options(nomem, nostack)) };
    }
}
