//! The log: defmt frames through a PL011, at the rate that firmware left; and the last words of a panic.
//!
//! One frame at a time leaves, whichever core it comes from, with interrupts masked meanwhile. Cores take turns: none waits
//! for more than two frames of each other core. If one that hangs keeps the console, the others give their frames up after
//! a second each; how many were lost is told with the next frame that leaves, or at the end. Before the device tree has
//! said where the UART is, nothing is logged.
#![expect(unsafe_code, reason = "the UART is reached by address, and defmt asks for a lock by hand")]

use crate::cpu::{CORES, core, exit, mask_interrupts, now_us, relax, unmask_interrupts};
use core::{
    cell::UnsafeCell,
    panic::PanicInfo,
    ptr,
    sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
};

defmt::timestamp!("{=u64:us}", now_us());

/// Registers, by their distance from the first.
const DATA: usize = 0x00;
const FLAGS: usize = 0x18;
const LINE_CONTROL: usize = 0x2C;
const CONTROL: usize = 0x30;
const INTERRUPT_MASK: usize = 0x38;
/// Bytes of the registers.
pub(crate) const BYTES: u64 = 0x1000;

/// `BUSY` of `UARTFR`: bytes are still leaving.
const BUSY: u32 = 1 << 3;
/// `TXFF` of `UARTFR`: there is no room for another byte.
const FULL: u32 = 1 << 5;
/// Polls, of 0.1 us and more each, before a byte is dropped: at 115200 baud a byte leaves in 87 us.
const POLLS: u32 = 100_000;

/// Where the registers are; 0 until the device tree has said so.
static BASE: AtomicUsize = AtomicUsize::new(0);

fn register(base: usize, offset: usize) -> *mut u32 {
    ptr::with_exposed_provenance_mut(base + offset)
}

fn read(base: usize, offset: usize) -> u32 {
    // SAFETY: `init` was given a UART, whose registers are mapped as a device and do nothing to memory.
    unsafe { register(base, offset).read_volatile() }
}

fn write(base: usize, offset: usize, value: u32) {
    // SAFETY: as above.
    unsafe { register(base, offset).write_volatile(value) };
}

/// Sets up the UART at `base`, and begins to log. Its rate stays: the tree does not always tell its clock.
///
/// # Safety
///
/// There is a PL011 at `base`, mapped as a device.
pub(crate) unsafe fn init(base: usize) {
    write(base, CONTROL, 0);
    write(base, INTERRUPT_MASK, 0);
    // `WLEN` and `FEN`: 8 bits without parity, FIFOs on.
    write(base, LINE_CONTROL, 0x70);
    // `TXE` and `UARTEN`.
    write(base, CONTROL, 1 << 8 | 1);
    BASE.store(base, Ordering::Relaxed);
}

fn wait_while(base: usize, flag: u32) -> bool {
    for _ in 0..POLLS {
        if read(base, FLAGS) & flag == 0 {
            return true;
        }
        relax();
    }
    false
}

fn write_bytes(bytes: &[u8]) {
    let base = BASE.load(Ordering::Relaxed);
    if base == 0 {
        return;
    }
    for &byte in bytes {
        if wait_while(base, FULL) {
            write(base, DATA, byte.into());
        }
    }
}

/// How long a core waits for the console, in microseconds.
///
/// Since cores take turns, only a core that hangs lets another wait that long: a frame takes some milliseconds.
const LIMIT_US: u64 = 1_000_000;

/// Which core is sending a frame: its index and 1, or 0 for none.
static OWNER: AtomicUsize = AtomicUsize::new(0);
static ENCODER: Encoder = Encoder(UnsafeCell::new(defmt::Encoder::new()));
/// Which cores wait for the console: the owner passes it on to the next one after itself.
static WAITING: [AtomicBool; CORES] = [const { AtomicBool::new(false) }; CORES];
/// Whether a core had interrupts unmasked before its frame.
static WERE_ENABLED: [AtomicBool; CORES] = [const { AtomicBool::new(false) }; CORES];
/// Frames that were given up.
static LOST: AtomicU32 = AtomicU32::new(0);

struct Encoder(UnsafeCell<defmt::Encoder>);

// SAFETY: only the core that `OWNER` names touches the encoder.
unsafe impl Sync for Encoder {}

fn with_encoder(f: impl FnOnce(&mut defmt::Encoder)) {
    if OWNER.load(Ordering::Relaxed) == core() + 1 {
        // SAFETY: this core owns the encoder, with interrupts masked; what may still come in between, an exception, never
        // returns here.
        f(unsafe { &mut *ENCODER.0.get() });
    }
}

/// Waits until the console is this core's; false if it gives up.
fn take_turn(me: usize) -> bool {
    let start_us = now_us();
    WAITING[me].store(true, Ordering::Relaxed);
    loop {
        // ORDER: pairs with the stores of `pass_on`; what the owner before did to the encoder is visible.
        match OWNER.compare_exchange(0, me + 1, Ordering::Acquire, Ordering::Acquire) {
            Ok(_) => {
                WAITING[me].store(false, Ordering::Relaxed);
                return true;
            }
            Err(owner) if owner == me + 1 => return true,
            Err(_) => {}
        }
        // If nobody waits here any more, the console is on its way.
        if now_us() - start_us >= LIMIT_US && WAITING[me].swap(false, Ordering::Relaxed) {
            LOST.fetch_add(1, Ordering::Relaxed);
            return false;
        }
        relax();
    }
}

/// Gives the console, which is this core's, to the next core that waits, or to nobody.
fn pass_on(me: usize) {
    let next = (1..CORES)
        .map(|distance| (me + distance) % CORES)
        .find(|&core| WAITING[core].swap(false, Ordering::Relaxed));
    OWNER.store(next.map_or(0, |core| core + 1), Ordering::Release);
}

#[defmt::global_logger]
struct Uart;

// SAFETY: between `acquire` and `release` only the owner writes, and the frames of others are dropped.
unsafe impl defmt::Logger for Uart {
    fn acquire() {
        let me = core();
        let were_enabled = mask_interrupts();
        WERE_ENABLED[me].store(were_enabled, Ordering::Relaxed);
        if OWNER.load(Ordering::Relaxed) == me + 1 {
            // An exception or a panic in the middle of a frame. That frame will never be continued: it is left as it is,
            // and the fresh encoder begins with the separator that ends it.
            with_encoder(|encoder| *encoder = defmt::Encoder::new());
        } else if !take_turn(me) {
            return;
        }
        with_encoder(|encoder| encoder.start_frame(write_bytes));
    }

    unsafe fn flush() {}

    unsafe fn release() {
        let me = core();
        let were_enabled = WERE_ENABLED[me].load(Ordering::Relaxed);
        with_encoder(|encoder| encoder.end_frame(write_bytes));
        // Another frame, within this turn; it passes the console on itself.
        if OWNER.load(Ordering::Relaxed) == me + 1 && !tell_lost() {
            pass_on(me);
        }
        if were_enabled {
            unmask_interrupts();
        }
    }

    unsafe fn write(bytes: &[u8]) {
        with_encoder(|encoder| encoder.write(bytes, write_bytes));
    }
}

/// Tells how many lines were lost since this was last told; returns whether there were any.
fn tell_lost() -> bool {
    let lost = LOST.swap(0, Ordering::Relaxed);
    if lost != 0 {
        defmt::warn!("{=u32} lines of this log were lost", lost);
    }
    lost != 0
}

/// Waits until the log is out of the UART, after telling what it lacks.
pub(crate) fn finish() {
    tell_lost();
    let base = BASE.load(Ordering::Relaxed);
    if base != 0 {
        wait_while(base, BUSY);
    }
}

/// Returns whether this core may still speak: false once it has, since what it said may be what failed.
pub(crate) fn last_words() -> bool {
    static SPOKEN: [AtomicBool; CORES] = [const { AtomicBool::new(false) }; CORES];
    mask_interrupts();
    !SPOKEN[core()].swap(true, Ordering::Relaxed)
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    if last_words() {
        let (file, line) = info.location().map_or(("?", 0), |at| (at.file(), at.line()));
        defmt::error!("{=str}:{=u32}: {}", file, line, defmt::Display2Format(&info.message()));
    }
    exit(false)
}
