//! What is Arm about the guest: how it starts, calls the hypervisor, takes interrupts, survives refused accesses.
//!
//! It is entered at EL1 with its own stack pointer, translation and caches off and everything masked, at the first byte of
//! the image, and turns translation and caches on with the first 4 GiB mapped at their own addresses.
#![expect(
    unsafe_code,
    reason = "the first instructions, the call instruction, interrupts and refused accesses"
)]

use core::{
    arch::{asm, global_asm},
    cell::UnsafeCell,
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

/// The guest's memory, by guest-physical address; all that Rust owns lies in it.
pub const RAM: Range<u64> = 0..0x20_0000;
/// Where the addresses end that are mapped to themselves.
pub const MAPPED_END: u64 = 1 << 32;
/// Where a store would be an interrupt message, if the guest could reach it: `GITS_TRANSLATER` of QEMU's machine `virt`.
pub const MESSAGES: u64 = 0x0809_0040;

const STACK_BYTES: usize = 64 * 1024;
/// The class (`ESR_EL1.EC`) of a load or store that was refused, made at EL1.
const DATA_ABORT: u64 = 0x25;

/// `MAIR_EL1`: attribute 0 is write-back memory, attribute 1 is a device (nGnRE).
const MEMORY_ATTRIBUTES: u64 = 0x04FF;
/// `TCR_EL1`: 32 bits of address, tables of 4 KiB that are write-back and inner shareable, nothing in the upper half.
const TRANSLATION_CONTROL: u64 = 1 << 23 | 0b11 << 12 | 1 << 10 | 1 << 8 | 32;
/// `SCTLR_EL1`: the bits that are one, and `I`, `SA`, `C`, `M`.
const SYSTEM_CONTROL: u64 = 0x30D0_0980 | 1 << 12 | 1 << 3 | 1 << 2 | 1;

#[repr(C, align(4096))]
struct Stack(UnsafeCell<[u8; STACK_BYTES]>);

// SAFETY: no reference to the bytes is ever made; the only core runs on it.
unsafe impl Sync for Stack {}

static STACK: Stack = Stack(UnsafeCell::new([0; STACK_BYTES]));

/// Interrupts taken so far.
static INTERRUPTS: AtomicU64 = AtomicU64::new(0);

// The tables are complete in the file: nothing is stored before caches are on, so nothing can be stale. The channel lies
// at 0x8000_0000 and is memory; from 0x9000_0000 on there are registers of devices.
global_asm!(
    r#"
.section .text.entry, "ax", @progbits
.global entry
entry:
    ldr x0, ={mair}
    msr mair_el1, x0
    ldr x0, ={tcr}
    msr tcr_el1, x0
    ldr x0, =gibs
    msr ttbr0_el1, x0
    ldr x0, =vectors
    msr vbar_el1, x0
    dsb sy
    tlbi vmalle1
    dsb nsh
    isb
    ldr x0, ={sctlr}
    msr sctlr_el1, x0
    isb
    ldr x0, =bss_start
    ldr x1, =bss_end
1:  stp xzr, xzr, [x0], #16
    cmp x0, x1
    b.lo 1b
    ldr x0, ={stack} + {stack_bytes}
    mov sp, x0
    mov x29, xzr                                // ends the chain of frames
    bl {set_up}

.section .rodata.tables, "a", @progbits
.p2align 12
gibs:
    .quad 0x0000000000000701                    // memory: block, inner shareable, accessed
    .quad 0x0060000040000701                    // never executed
    .quad blocks + 3                            // table
    .quad 0x00600000c0000405                    // device: attribute 1
.p2align 12
blocks:
    .set at, 0x80000000
    .rept 512
    .if at < 0x90000000
    .quad at + 0x0060000000000701
    .else
    .quad at + 0x0060000000000405
    .endif
    .set at, at + 0x200000
    .endr

.section .text, "ax", @progbits
.macro save
    sub sp, sp, #176
    stp x0, x1, [sp]
    stp x2, x3, [sp, #16]
    stp x4, x5, [sp, #32]
    stp x6, x7, [sp, #48]
    stp x8, x9, [sp, #64]
    stp x10, x11, [sp, #80]
    stp x12, x13, [sp, #96]
    stp x14, x15, [sp, #112]
    stp x16, x17, [sp, #128]
    stp x18, x30, [sp, #144]
.endm

// 16 entries of 128 bytes; the second four are for what happens here.
.p2align 11
vectors:
    .rept 4
    .p2align 7
    b unexpected
    .endr
    .p2align 7
    b exception_entry
    .p2align 7
    b interrupt_entry
    .rept 10
    .p2align 7
    b unexpected
    .endr

.p2align 7
unexpected:
exception_entry:
    save
    mrs x0, elr_el1
    mrs x1, spsr_el1
    stp x0, x1, [sp, #160]
    mrs x1, esr_el1
    mrs x2, far_el1
    bl {exception}                              // returns where to continue
    ldr x1, [sp, #168]
    msr elr_el1, x0
    msr spsr_el1, x1
    ldp x0, x1, [sp]
    ldp x2, x3, [sp, #16]
    ldp x4, x5, [sp, #32]
    ldp x6, x7, [sp, #48]
    ldp x8, x9, [sp, #64]
    ldp x10, x11, [sp, #80]
    ldp x12, x13, [sp, #96]
    ldp x14, x15, [sp, #112]
    ldp x16, x17, [sp, #128]
    ldp x18, x30, [sp, #144]
    add sp, sp, #176
    eret

interrupt_entry:
    stp x0, x1, [sp, #-32]!
    str x2, [sp, #16]
    mrs x0, icc_iar1_el1
    cmp x0, #1020                               // from here on: none
    b.hs 1f
    ldr x1, ={interrupts}
    ldr x2, [x1]                                // nobody else stores there
    add x2, x2, #1
    str x2, [x1]
    msr icc_eoir1_el1, x0
1:  ldr x2, [sp, #16]
    ldp x0, x1, [sp], #32
    eret

// extern "C" fn(address: u64, value: &mut u64) -> bool
.global load_word, load_word_access
load_word:
load_word_access:
    ldr x0, [x0]
    str x0, [x1]
    mov x0, #1
    ret

// extern "C" fn(address: u64, value: u64) -> bool
.global store_word, store_word_access
store_word:
store_word_access:
    str x1, [x0]
    mov x0, #1
    ret

// Where both continue if their access is refused.
.global access_refused
access_refused:
    mov x0, #0
    ret
"#,
    mair = const MEMORY_ATTRIBUTES,
    tcr = const TRANSLATION_CONTROL,
    sctlr = const SYSTEM_CONTROL,
    stack = sym STACK,
    stack_bytes = const STACK_BYTES,
    set_up = sym set_up,
    exception = sym exception,
    interrupts = sym INTERRUPTS,
);

unsafe extern "C" {
    /// Loads the word at `address`; returns whether that was possible.
    fn load_word(address: u64, value: &mut u64) -> bool;
    /// Stores a word at `address`; returns whether that was possible.
    fn store_word(address: u64, value: u64) -> bool;

    static load_word_access: u8;
    static store_word_access: u8;
    static access_refused: u8;
}

/// On the stack, with translation and caches on.
extern "C" fn set_up() -> ! {
    // SAFETY: all priorities, and interrupts of group 1; their handler is in place.
    unsafe {
        asm!(
            "msr icc_pmr_el1, {priorities}",
            "msr icc_igrpen1_el1, {group}",
            "isb",
            "msr daifclr, #2",
            priorities = in(reg) 0xFF_u64,
            group = in(reg) 1_u64,
            options(nomem, nostack),
        );
    }
    crate::start()
}

/// An exception: a refused access continues where its function says so, anything else is the end of the guest.
extern "C" fn exception(at: u64, syndrome: u64, address: u64) -> u64 {
    let accesses = [(&raw const load_word_access).addr(), (&raw const store_word_access).addr()];
    if syndrome >> 26 == DATA_ABORT && accesses.contains(&(at as usize)) {
        return (&raw const access_refused).addr() as u64;
    }
    crate::say!("guest met an exception at {at:#x}, ESR {syndrome:#x}, FAR {address:#x}");
    crate::finish(false)
}

/// Calls the hypervisor: a number and four arguments; returns a status and three values.
///
/// It is safe because no call makes the hypervisor write to memory that Rust owns other than as atomics: the only memory
/// that this program offers to a device, or for counters, is made of those ([`Page`](crate::memory::Page)).
pub fn call(number: u64, arguments: [u64; 4]) -> [u64; 4] {
    let [first, second, third, fourth] = arguments;
    let mut results = [0; 4];
    // SAFETY: the call changes the four registers of its results and, as said above, no memory of Rust's.
    unsafe {
        asm!(
            "hvc #0",
            inlateout("x0") number => results[0],
            inlateout("x1") first => results[1],
            inlateout("x2") second => results[2],
            inlateout("x3") third => results[3],
            in("x4") fourth,
            options(nostack),
        );
    }
    results
}

/// Takes no interrupts until [`unmask`].
pub fn mask() {
    // SAFETY: the handler only counts, and code that is not interrupted is as good. The call orders memory, so that
    // nothing that is looked at after it is loaded before.
    unsafe { asm!("msr daifset, #2", options(nostack)) };
}

/// Takes interrupts again; one that is pending before this returns.
pub fn unmask() {
    // SAFETY: the vectors are in place.
    unsafe { asm!("msr daifclr, #2", "isb", options(nostack)) };
}

/// Returns the number of interrupts taken so far.
pub fn interrupts() -> u64 {
    INTERRUPTS.load(Ordering::Relaxed)
}

/// Loads the word at `address`, unless that is refused.
pub fn try_read(address: u64) -> Option<u64> {
    let mut value = 0;
    // SAFETY: a load changes nothing, and one that is refused ends in `access_refused`.
    unsafe { load_word(address, &mut value) }.then_some(value)
}

/// Stores `value` at `address`, unless that is refused; returns whether it was stored.
///
/// # Safety
///
/// Nothing that Rust owns is at `address`.
pub unsafe fn try_write(address: u64, value: u64) -> bool {
    // SAFETY: the caller promises that no Rust object changes; a store that is refused ends in `access_refused`.
    unsafe { store_word(address, value) }
}

/// Stops for ever.
pub fn stop() -> ! {
    loop {
        // SAFETY: with everything masked, nothing but a new start of the machine comes after this.
        unsafe { asm!("msr daifset, #15", "wfi", options(nomem, nostack)) };
    }
}
