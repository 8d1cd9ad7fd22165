//! What is x86 about the guest: how it starts, calls the hypervisor, takes interrupts, survives refused accesses.
//!
//! It is entered in 32-bit protected mode with flat segments, paging off and interrupts off, at the first byte of the
//! image, and goes to long mode with the first 4 GiB mapped at their own addresses.
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
/// Where a store would be an interrupt message, if the guest could reach it: the local APIC's window.
pub const MESSAGES: u64 = 0xFEE0_0000;

const STACK_BYTES: usize = 64 * 1024;
const EXCEPTIONS: usize = 32;
const GENERAL_PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;
/// The channel's interrupt.
const CHANNEL_VECTOR: usize = 0x50;

#[repr(C, align(4096))]
struct Stack(UnsafeCell<[u8; STACK_BYTES]>);

// SAFETY: no reference to the bytes is ever made; the only core runs on it.
unsafe impl Sync for Stack {}

static STACK: Stack = Stack(UnsafeCell::new([0; STACK_BYTES]));

/// Interrupts taken so far.
static INTERRUPTS: AtomicU64 = AtomicU64::new(0);

/// The interrupt descriptor table: two words for each vector.
static IDT: [[AtomicU64; 2]; CHANNEL_VECTOR + 1] =
    [const { [const { AtomicU64::new(0) }; 2] }; CHANNEL_VECTOR + 1];

// The far jump is spelled in bytes because the assembler's Intel syntax cannot express it.
global_asm!(
    r#"
.section .text.entry, "ax", @progbits
.code32
.global entry
entry:
    cli
    cld
    mov edi, offset bss_start
    mov ecx, offset bss_end
    sub ecx, edi
    shr ecx, 2
    xor eax, eax
    rep stosd

    mov eax, offset page_directory_pointers + 3 # present, writable
    mov [page_map], eax
    mov eax, offset page_directories + 3
    xor ecx, ecx
1:  mov [page_directory_pointers + ecx * 8], eax
    add eax, 4096
    inc ecx
    cmp ecx, 4
    jb 1b
    mov eax, 0x83                               # present, writable, 2 MiB
    xor ecx, ecx
2:  mov [page_directories + ecx * 8], eax
    add eax, 0x200000
    inc ecx
    cmp ecx, 2048
    jb 2b

    mov eax, offset page_map
    mov cr3, eax
    mov eax, cr4
    or eax, 0x20                                # PAE
    mov cr4, eax
    mov ecx, 0xc0000080                         # EFER
    rdmsr
    or eax, 0x100                               # LME
    wrmsr
    mov eax, cr0
    or eax, 0x80010001                          # PG, WP, PE
    mov cr0, eax
    lgdt [gdt_pointer]
    .byte 0xea                                  # jmp 0x08:long_mode
    .long long_mode
    .word 0x08

.code64
long_mode:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor ebp, ebp                                # ends the chain of frames
    lea rsp, [{stack} + {stack_bytes}]
    call {set_up}
    ud2

.section .rodata.gdt, "a", @progbits
.p2align 3
gdt:
    .quad 0
    .quad 0x00af9b000000ffff                    # 0x08: 64-bit code
    .quad 0x00cf93000000ffff                    # 0x10: data
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long gdt

.section .bss.page_tables, "aw", @nobits
.p2align 12
page_map:
    .zero 4096
page_directory_pointers:
    .zero 4096
page_directories:
    .zero 4 * 4096

.section .text, "ax", @progbits
# One stub of 16 bytes for each exception; those that come without an error code get one.
.p2align 4
.global exception_stubs
exception_stubs:
    .set vector, 0
    .rept {exceptions}
    .p2align 4
    .if ((0x60227d00 >> vector) & 1) == 0
    push 0
    .endif
    push vector
    jmp 3f
    .set vector, vector + 1
    .endr
3:  push rax
    push rcx
    push rdx
    push rsi
    push rdi
    push r8
    push r9
    push r10
    push r11
    cld
    lea rdi, [rsp + 9 * 8]
    call {exception}
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdi
    pop rsi
    pop rdx
    pop rcx
    pop rax
    add rsp, 16                                 # vector and error code
    iretq

.global channel_interrupt
channel_interrupt:
    lock inc qword ptr [{interrupts}]
    iretq

# extern "sysv64" fn(address: u64, value: &mut u64) -> bool
.global load_word, load_word_access
load_word:
load_word_access:
    mov rax, [rdi]
    mov [rsi], rax
    mov eax, 1
    ret

# extern "sysv64" fn(address: u64, value: u64) -> bool
.global store_word, store_word_access
store_word:
store_word_access:
    mov [rdi], rsi
    mov eax, 1
    ret

# Where both continue if their access is refused.
.global access_refused
access_refused:
    xor eax, eax
    ret
"#,
    stack = sym STACK,
    stack_bytes = const STACK_BYTES,
    set_up = sym set_up,
    exceptions = const EXCEPTIONS,
    exception = sym exception,
    interrupts = sym INTERRUPTS,
);

unsafe extern "sysv64" {
    /// Loads the word at `address`; returns whether that was possible.
    fn load_word(address: u64, value: &mut u64) -> bool;
    /// Stores a word at `address`; returns whether that was possible.
    fn store_word(address: u64, value: u64) -> bool;
}

unsafe extern "C" {
    static exception_stubs: u8;
    static channel_interrupt: u8;
    static load_word_access: u8;
    static store_word_access: u8;
    static access_refused: u8;
}

/// What the processor and the stubs push for an exception.
#[repr(C)]
struct ExceptionFrame {
    vector: u64,
    error_code: u64,
    rip: u64,
}

/// In long mode, on the stack.
extern "sysv64" fn set_up() -> ! {
    for vector in 0..EXCEPTIONS {
        set_gate(vector, (&raw const exception_stubs).addr() + vector * 16);
    }
    set_gate(CHANNEL_VECTOR, (&raw const channel_interrupt).addr());

    #[repr(C, packed)]
    struct Pointer {
        limit: u16,
        base: u64,
    }
    let pointer = Pointer { limit: (size_of_val(&IDT) - 1) as u16, base: IDT.as_ptr().addr() as u64 };
    // SAFETY: the table is static; each present gate leads to code above that saves what it changes.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(readonly, nostack)) };
    // SAFETY: the table is in place, so an interrupt finds its handler.
    unsafe { asm!("sti", options(nomem, nostack)) };
    crate::start()
}

/// Makes `vector` lead to the code at `handler`, with interrupts off.
fn set_gate(vector: usize, handler: usize) {
    const CODE_SELECTOR: u64 = 0x08;
    const PRESENT_INTERRUPT_GATE: u64 = 0x8E00;
    let handler = handler as u64;
    let low = handler & 0xFFFF
        | CODE_SELECTOR << 16
        | PRESENT_INTERRUPT_GATE << 32
        | (handler >> 16 & 0xFFFF) << 48;
    IDT[vector][0].store(low, Ordering::Relaxed);
    IDT[vector][1].store(handler >> 32, Ordering::Relaxed);
}

/// An exception: a refused access continues where its function says so, anything else is the end of the guest.
extern "sysv64" fn exception(frame: &mut ExceptionFrame) {
    let accesses = [(&raw const load_word_access).addr(), (&raw const store_word_access).addr()];
    if matches!(frame.vector, GENERAL_PROTECTION | PAGE_FAULT) && accesses.contains(&(frame.rip as usize)) {
        frame.rip = (&raw const access_refused).addr() as u64;
        return;
    }
    let address: u64;
    // SAFETY: reading CR2 changes nothing.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack, preserves_flags)) };
    let ExceptionFrame { vector, error_code, rip } = *frame;
    crate::say!("guest met exception {vector} at {rip:#x}, error code {error_code:#x}, CR2 {address:#x}");
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
            "vmmcall",
            inlateout("rax") number => results[0],
            inlateout("rdi") first => results[1],
            inlateout("rsi") second => results[2],
            inlateout("rdx") third => results[3],
            in("rcx") fourth,
            options(nostack),
        );
    }
    results
}

/// Takes no interrupts until [`unmask`].
pub fn mask() {
    // SAFETY: the handler only counts, and code that is not interrupted is as good. The call orders memory, so that
    // nothing that is looked at after it is loaded before.
    unsafe { asm!("cli", options(nostack)) };
}

/// Takes interrupts again; one that is pending before the next instruction but one.
pub fn unmask() {
    // SAFETY: the table is in place. Behind `sti` one more instruction goes uninterrupted: the second.
    unsafe { asm!("sti", "nop", options(nostack)) };
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
        // SAFETY: with interrupts off, nothing but a new start of the machine comes after this.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
