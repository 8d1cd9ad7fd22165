//! The interrupt controller, GICv3: distributor, redistributors, and this core's interface to them. What turns messages of
//! devices into interrupts is beside it ([`its`](crate::its)).
#![expect(unsafe_code, reason = "the interrupt controller is reached by address")]

use crate::{
    clock::now_us,
    cpu::{CORES, affinity, cores_present},
    machine::Error,
    registers::{
        ICC_BPR1_EL1, ICC_CTLR_EL1, ICC_EOIR1_EL1, ICC_IAR1_EL1, ICC_IGRPEN1_EL1, ICC_PMR_EL1, ICC_SGI1R_EL1,
        ICC_SRE_EL1,
    },
    tree::Controller,
};
use aarch64_cpu::{
    asm::barrier,
    registers::{ICC_SRE_EL2, ID_AA64PFR0_EL1, Readable, Writeable},
};
use core::{
    ptr,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
};

/// Bytes of the distributor's registers.
pub(crate) const DISTRIBUTOR_BYTES: u64 = 0x1_0000;
/// Bytes of a frame of registers of a redistributor: one for itself, one for its SGIs and PPIs, two more with virtual LPIs.
const FRAME: usize = 0x1_0000;

/// Registers of the distributor; those for interrupts below 32 are in the redistributor's second frame, at the same places.
const CONTROL: usize = 0x0000;
const TYPE: usize = 0x0004;
const GROUP: usize = 0x0080;
const ENABLE: usize = 0x0100;
const DISABLE: usize = 0x0180;
const CLEAR_PENDING: usize = 0x0280;
const PRIORITY: usize = 0x0400;
const CONFIGURATION: usize = 0x0C00;
const GROUP_MODIFIER: usize = 0x0D00;
const ROUTE: usize = 0x6000;

/// Registers of a redistributor.
const REDISTRIBUTOR_TYPE: usize = 0x0008;
const WAKER: usize = 0x0014;
const LPI_CONFIGURATION: usize = 0x0070;
const LPI_PENDING: usize = 0x0078;

/// `ARE` and `EnableGrp1` of `GICD_CTLR`, or as a controller with two security states shows them to us, `ARE_NS` and
/// `EnableGrp1A`: they have the same places.
const AFFINITY_ROUTING: u32 = 1 << 4;
const ENABLE_GROUP_1: u32 = 1 << 1;
/// `RWP`: a write has not taken effect everywhere yet.
const WRITE_PENDING: u32 = 1 << 31;
/// `ProcessorSleep` and `ChildrenAsleep` of `GICR_WAKER`.
const SLEEP: u32 = 1 << 1;
const ASLEEP: u32 = 1 << 2;
/// `LPIS` and `IDbits` of `GICD_TYPER`.
const HAS_LPIS: u32 = 1 << 17;
const ID_BITS_SHIFT: u32 = 19;
/// `EnableLPIs` and `RWP` of `GICR_CTLR`.
const ENABLE_LPIS: u32 = 1 << 0;
const REDISTRIBUTOR_WRITE_PENDING: u32 = 1 << 3;
/// `PTZ` of `GICR_PENDBASER`: the table holds zeros.
const PENDING_NONE: u64 = 1 << 62;
/// Normal memory that is not cached, of `GICR_PROPBASER` and `GICR_PENDBASER`.
const NOT_CACHED: u64 = 0b001 << 7;
/// `VLPIS` and `Last` of `GICR_TYPER`.
const HAS_VIRTUAL_LPIS: u64 = 1 << 1;
const IS_LAST: u64 = 1 << 4;

/// The priority of all interrupts, in each byte of a word; `ICC_PMR_EL1` lets everything above 0xFF through.
const PRIORITIES: u32 = 0xA0A0_A0A0;
/// How long the controller may take to acknowledge a write, in microseconds.
///
/// The manual sets no bound. 100 ms is short enough for a log to say what failed.
const ACK_LIMIT_US: u64 = 100_000;
/// The first number that is no interrupt, but says why there is none.
const NONE: u32 = 1020;
const NONE_END: u32 = 1024;
/// Numbers of interrupts that are no messages, extended ranges aside.
pub(crate) const NUMBERS: usize = NONE as usize;
/// The first number of an interrupt that is a message (LPI), and how many there are: as many as fit 14 bits.
pub(crate) const FIRST_LPI: u32 = 8192;
pub(crate) const LPIS: usize = 8192;
const LPI_BITS: u32 = 14;

/// Where the distributor is, and each core's redistributor; set by [`init`].
static DISTRIBUTOR: AtomicUsize = AtomicUsize::new(0);
static REDISTRIBUTORS: [AtomicUsize; CORES] = [const { AtomicUsize::new(0) }; CORES];
/// What names each core in `ICC_SGI1R_EL1`; 0 for one that there is not.
static TARGETS: [AtomicU64; CORES] = [const { AtomicU64::new(0) }; CORES];
/// Where the configuration of LPIs is, and which of them wait for each core; 0 while there are none.
static LPI_TABLES: [[AtomicU64; 2]; CORES] = [const { [const { AtomicU64::new(0) }; 2] }; CORES];

fn read(base: usize, offset: usize) -> u32 {
    // SAFETY: `init` found the registers in the device tree, where they are mapped as a device.
    unsafe { ptr::with_exposed_provenance::<u32>(base + offset).read_volatile() }
}

fn write(base: usize, offset: usize, value: u32) {
    // SAFETY: as above. What the controller does to memory is to interrupt, and handlers are safe at any time.
    unsafe { ptr::with_exposed_provenance_mut::<u32>(base + offset).write_volatile(value) };
}

fn read_wide(base: usize, offset: usize) -> u64 {
    // SAFETY: as for `read`.
    unsafe { ptr::with_exposed_provenance::<u64>(base + offset).read_volatile() }
}

fn write_wide(base: usize, offset: usize, value: u64) {
    // SAFETY: as for `write`.
    unsafe { ptr::with_exposed_provenance_mut::<u64>(base + offset).write_volatile(value) };
}

/// Waits until `flag` of a register is clear.
fn wait_clear(register: &'static str, base: usize, offset: usize, flag: u32) -> Result<(), Error> {
    let start_us = now_us();
    loop {
        let waited_us = now_us() - start_us;
        if read(base, offset) & flag == 0 {
            return Ok(());
        }
        if waited_us >= ACK_LIMIT_US {
            return Err(Error::Silent { register, waited_us });
        }
        core::hint::spin_loop();
    }
}

/// Finds the controller and takes its distributor into service, with every shared interrupt off.
pub(crate) fn init(gic: &Controller) -> Result<(), Error> {
    if ID_AA64PFR0_EL1.get() >> 24 & 0xF == 0 {
        return Err(Error::Unsupported { feature: "system registers for GICv3 (ID_AA64PFR0_EL1.GIC)" });
    }
    for (core, place) in REDISTRIBUTORS.iter().enumerate().take(cores_present()) {
        let found = gic.redistributors.iter().find_map(|region| {
            redistributor(region.start as usize, (region.end - region.start) as usize, affinity(core))
        });
        let base = found.ok_or(Error::NoRedistributor { core })?;
        // Firmware may have left it with tables of its own, which it stores to when it is told to stop. They are no one's yet.
        if read(base, CONTROL) & ENABLE_LPIS != 0 {
            write(base, CONTROL, read(base, CONTROL) & !ENABLE_LPIS);
            wait_clear("GICR_CTLR.RWP", base, CONTROL, REDISTRIBUTOR_WRITE_PENDING)?;
        }
        place.store(base, Ordering::Relaxed);
        TARGETS[core].store(target(affinity(core)), Ordering::Relaxed);
    }
    let base = gic.distributor.start as usize;
    DISTRIBUTOR.store(base, Ordering::Relaxed);
    write(base, CONTROL, AFFINITY_ROUTING);
    wait_clear("GICD_CTLR.RWP", base, CONTROL, WRITE_PENDING)?;
    // `ITLinesNumber`: words of 32 interrupts, the first of which are the redistributors'.
    for word in 1..=(read(base, TYPE) as usize & 0x1F) {
        write(base, DISABLE + word * 4, u32::MAX);
    }
    wait_clear("GICD_CTLR.RWP", base, CONTROL, WRITE_PENDING)?;
    write(base, CONTROL, AFFINITY_ROUTING | ENABLE_GROUP_1);
    wait_clear("GICD_CTLR.RWP", base, CONTROL, WRITE_PENDING)
}

/// Returns the redistributor of the core with `affinity`, if it is in the `bytes` bytes at `base`.
fn redistributor(base: usize, bytes: usize, affinity: u64) -> Option<usize> {
    // `Affinity_Value` has `Aff3` next to the others.
    let wanted = affinity & 0xFF_FFFF | affinity >> 8 & 0xFF00_0000;
    let mut at = 0;
    while at + 2 * FRAME <= bytes {
        let kind = read_wide(base + at, REDISTRIBUTOR_TYPE);
        if kind >> 32 == wanted {
            return Some(base + at);
        }
        if kind & IS_LAST != 0 {
            return None;
        }
        at += if kind & HAS_VIRTUAL_LPIS != 0 { 4 * FRAME } else { 2 * FRAME };
    }
    None
}

/// Opens this core for the SGIs below `sgis` and for `ppis`, which are signalled by level.
pub(crate) fn init_core(core: usize, sgis: u32, ppis: &[u32]) -> Result<(), Error> {
    let base = REDISTRIBUTORS[core].load(Ordering::Relaxed);
    write(base, WAKER, read(base, WAKER) & !SLEEP);
    wait_clear("GICR_WAKER.ChildrenAsleep", base, WAKER, ASLEEP)?;
    let frame = base + FRAME;
    write(frame, DISABLE, u32::MAX);
    wait_clear("GICR_CTLR.RWP", base, CONTROL, REDISTRIBUTOR_WRITE_PENDING)?;
    write(frame, CLEAR_PENDING, u32::MAX);
    write(frame, GROUP, u32::MAX);
    write(frame, GROUP_MODIFIER, 0);
    for word in 0..8 {
        write(frame, PRIORITY + word * 4, PRIORITIES);
    }
    // The second word is that of the PPIs; zeros are levels.
    write(frame, CONFIGURATION + 4, 0);
    let ppis = ppis.iter().fold(0, |bits, ppi| bits | 1 << (ppi % 32));
    write(frame, ENABLE, ((1 << sgis) - 1) | ppis);

    // `SRE`, `DFB`, `DIB`. Without `Enable`, a guest that asks for something else is trapped.
    ICC_SRE_EL2.set(0b0111);
    barrier::isb(barrier::SY);
    ICC_SRE_EL1.set(0b111);
    barrier::isb(barrier::SY);
    // `EOImode` = 0: one write ends an interrupt.
    ICC_CTLR_EL1.set(0);
    ICC_BPR1_EL1.set(0);
    ICC_PMR_EL1.set(0xFF);
    ICC_IGRPEN1_EL1.set(1);
    barrier::isb(barrier::SY);
    enable_lpis(core)
}

/// Returns whether there are LPIs, of as many bits as are used.
pub(crate) fn has_lpis() -> bool {
    let kind = read(DISTRIBUTOR.load(Ordering::Relaxed), TYPE);
    kind & HAS_LPIS != 0 && 1 + (kind >> ID_BITS_SHIFT & 0x1F) >= LPI_BITS
}

/// Names the tables of LPIs for `core`, which it uses from [`enable_lpis`] on: the configuration, a byte for each, and
/// 64 KiB of zeros for those that wait.
pub(crate) fn set_lpi_tables(core: usize, configuration: u64, pending: u64) {
    let [first, second] = &LPI_TABLES[core];
    first.store(configuration, Ordering::Relaxed);
    second.store(pending, Ordering::Release);
}

/// Lets `core` take LPIs, if it has tables for that. What took them before, with other tables, ends.
pub(crate) fn enable_lpis(core: usize) -> Result<(), Error> {
    let [configuration, pending] = &LPI_TABLES[core];
    let (pending, configuration) = (pending.load(Ordering::Acquire), configuration.load(Ordering::Relaxed));
    if pending == 0 {
        return Ok(());
    }
    let base = REDISTRIBUTORS[core].load(Ordering::Relaxed);
    // The tables can be changed only while it is off, and a controller need not let itself be switched off.
    write(base, CONTROL, read(base, CONTROL) & !ENABLE_LPIS);
    wait_clear("GICR_CTLR.RWP", base, CONTROL, REDISTRIBUTOR_WRITE_PENDING)?;
    if read(base, CONTROL) & ENABLE_LPIS != 0 {
        return Err(Error::Unsupported {
            feature: "LPIs whose tables can be changed (GICR_CTLR.EnableLPIs)",
        });
    }
    write_wide(base, LPI_CONFIGURATION, configuration | NOT_CACHED | u64::from(LPI_BITS - 1));
    write_wide(base, LPI_PENDING, pending | NOT_CACHED | PENDING_NONE);
    write(base, CONTROL, read(base, CONTROL) | ENABLE_LPIS);
    wait_clear("GICR_CTLR.RWP", base, CONTROL, REDISTRIBUTOR_WRITE_PENDING)
}

/// Returns whether `core` takes LPIs.
pub(crate) fn takes_lpis(core: usize) -> bool {
    let base = REDISTRIBUTORS[core].load(Ordering::Relaxed);
    read(base, CONTROL) & ENABLE_LPIS != 0
}

/// Returns how commands of an ITS name the redistributor of `core`: by its address, or by its number.
pub(crate) fn message_target(core: usize, by_address: bool) -> u64 {
    let base = REDISTRIBUTORS[core].load(Ordering::Relaxed);
    // `Processor_Number` has 16 bits. Addresses are those of frames.
    if by_address { base as u64 } else { (read_wide(base, REDISTRIBUTOR_TYPE) >> 8 & 0xFFFF) << 16 }
}

/// Sets up the shared interrupt `number`, signalled by `edge` or by level, and sends it to `core`.
pub(crate) fn route(number: u32, edge: bool, core: usize) {
    let base = DISTRIBUTOR.load(Ordering::Relaxed);
    let (bit, word) = (1 << (number % 32), number as usize / 32 * 4);
    let change = |register: usize, mask: u32, value: u32| {
        write(base, register, read(base, register) & !mask | value);
    };
    write(base, DISABLE + word, bit);
    change(GROUP + word, bit, bit);
    change(GROUP_MODIFIER + word, bit, 0);
    let shift = number % 4 * 8;
    change(PRIORITY + number as usize / 4 * 4, 0xFF << shift, PRIORITIES & 0xFF << shift);
    let shift = number % 16 * 2;
    change(CONFIGURATION + number as usize / 16 * 4, 0b11 << shift, u32::from(edge) << (shift + 1));
    write_wide(base, ROUTE + number as usize * 8, affinity(core));
    write(base, ENABLE + word, bit);
}

/// Returns whether `number` is a shared interrupt of this controller.
pub(crate) fn is_shared(number: u32) -> bool {
    let words = read(DISTRIBUTOR.load(Ordering::Relaxed), TYPE) & 0x1F;
    (32..NONE.min((words + 1) * 32)).contains(&number)
}

/// Returns what names the core with `affinity` in `ICC_SGI1R_EL1`.
fn target(affinity: u64) -> u64 {
    let (aff0, aff1, aff2, aff3) =
        (affinity & 0xFF, affinity >> 8 & 0xFF, affinity >> 16 & 0xFF, affinity >> 32 & 0xFF);
    // The target list names 16 cores, from 16 times `RS`.
    1 << (aff0 % 16) | (aff0 / 16) << 44 | aff1 << 16 | aff2 << 32 | aff3 << 48
}

/// Sends SGI `number` to `core`. What this core stored before is visible to the other when it takes it.
///
/// PANICS: when there is no such core.
pub(crate) fn send(core: usize, number: u32) {
    let target = TARGETS[core].load(Ordering::Relaxed);
    assert!(target != 0, "no such core");
    // ORDER: a write to a system register waits for no store.
    barrier::dsb(barrier::ISHST);
    ICC_SGI1R_EL1.set(target | u64::from(number & 0xF) << 24);
    barrier::isb(barrier::SY);
}

/// Takes the interrupt that this core was interrupted for; `None` if it went away.
pub(crate) fn take() -> Option<u32> {
    let number = ICC_IAR1_EL1.get() as u32 & 0xFF_FFFF;
    // ORDER: the controller knows that it is taken before anything that the handler does.
    barrier::dsb(barrier::SY);
    barrier::isb(barrier::SY);
    (!(NONE..NONE_END).contains(&number)).then_some(number)
}

/// Ends the interrupt that [`take`] gave.
pub(crate) fn end(number: u32) {
    // ORDER: what quietened the line has reached its device.
    barrier::dsb(barrier::SY);
    ICC_EOIR1_EL1.set(number.into());
    barrier::isb(barrier::SY);
}
