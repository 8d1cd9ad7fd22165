//! From the boot loader's 32-bit world to Rust in long mode, for the first core and for those it starts.
#![expect(unsafe_code, reason = "the first instructions of a core, and the call into the hypervisor")]

use crate::{clock, console, cpu, machine::Boot, paging, segments};
use core::{
    arch::global_asm,
    cell::UnsafeCell,
    sync::atomic::{AtomicU32, Ordering},
};

/// Bytes of a core's stack: what bring-up needs where values are moved by copies, as in builds without optimisation.
const STACK_BYTES: usize = 1024 * 1024;
/// Bytes below each stack that are never mapped, so that an overflow faults instead of reaching its neighbour.
pub(crate) const GUARD_BYTES: usize = 4096;

/// A core's stack, which grows down towards its guard.
#[repr(C, align(4096))]
pub(crate) struct Stack {
    _guard: [u8; GUARD_BYTES],
    _bytes: UnsafeCell<[u8; STACK_BYTES]>,
}

// SAFETY: no reference to the bytes is ever made; each core runs on its own.
unsafe impl Sync for Stack {}

/// The stacks, by core.
pub(crate) static STACKS: [Stack; cpu::CORES] =
    [const { Stack { _guard: [0; GUARD_BYTES], _bytes: UnsafeCell::new([0; STACK_BYTES]) } }; cpu::CORES];

/// The local APIC ID of each core that this build serves; all ones for none.
///
/// A core that wakes up looks itself up here, so that one which comes too late cannot take another's stack.
pub(crate) static APIC_IDS: [AtomicU32; cpu::CORES] = [const { AtomicU32::new(u32::MAX) }; cpu::CORES];

// The boot page tables are the only ones: `paging` refines them in place. Until then everything below 4 GiB is mapped
// to itself, writable and executable.
//
// Far jumps are spelled in bytes because the assembler's Intel syntax cannot express them; a `push` of an address in
// 32-bit code would come out 16 bits wide.
global_asm!(
    r#"
.section .note.Xen, "a", @note
.p2align 2
    .long 4                         # bytes of the name
    .long 4                         # bytes of the value
    .long 18                        # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long pvh_entry

.section .rodata.boot, "a", @progbits
.p2align 3
boot_gdt:
    .quad 0
    .quad 0x00af9b000000ffff        # 0x08: 64-bit code
    .quad 0x00cf93000000ffff        # 0x10: data
    .quad 0x00cf9b000000ffff        # 0x18: 32-bit code
boot_gdt_end:

# Copied to a page below 1 MiB; a started core begins here in real mode, with CS at the page.
.code16
.global trampoline, trampoline_end
trampoline:
    cli
    cld
    .byte 0x2e, 0x66, 0x0f, 0x01, 0x16          # lgdt cs:[boot_gdt_pointer], 32-bit base
    .word boot_gdt_pointer - trampoline
    mov eax, cr0
    or al, 1                                    # PE
    mov cr0, eax
    .byte 0x66, 0xea                            # jmp 0x18:other_entry
    .long other_entry
    .word 0x18
boot_gdt_pointer:
    .word boot_gdt_end - boot_gdt - 1
    .long boot_gdt
trampoline_end:

.section .data.boot_tables, "aw", @progbits
.p2align 12
.global boot_pml4, boot_pd
boot_pml4:
    .quad boot_pdpt + 0x3                       # present, writable
    .zero 4096 - 8
boot_pdpt:
    .quad boot_pd + 0x0003, boot_pd + 0x1003, boot_pd + 0x2003, boot_pd + 0x3003
    .zero 4096 - 32
boot_pd:
    .set page, 0
    .rept 2048
    .quad page + 0x83                           # present, writable, 2 MiB
    .set page, page + 0x200000
    .endr

.section .text.entry, "ax", @progbits
.code32
.global pvh_entry
pvh_entry:
    cli
    cld
    mov edi, ebx                                # hvm_start_info
    mov esi, offset first_core
    jmp long_mode

other_entry:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esi, offset other_core

# Enters long mode and continues at esi; keeps edi, needs no stack.
long_mode:
    mov eax, offset boot_pml4
    mov cr3, eax
    mov eax, cr4
    or eax, 0x660                               # PAE, MCE, OSFXSR, OSXMMEXCPT (for FXSAVE)
    mov cr4, eax
    mov ecx, 0xc0000080                         # EFER
    rdmsr
    or eax, 0x900                               # LME, NXE
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffff3                         # without CD and NW (INIT sets them), EM, TS
    or eax, 0x80010023                          # PG, WP, NE, MP, PE
    mov cr0, eax
    lgdt [boot_gdt_pointer]
    .byte 0xea                                  # jmp 0x08:long_mode_64
    .long long_mode_64
    .word 0x08

.code64
long_mode_64:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor eax, eax
    mov fs, ax
    mov gs, ax
    xor ebp, ebp                                # ends the chain of frames
    mov esi, esi
    jmp rsi

first_core:
    mov edi, edi
    lea rsp, [{stacks} + {stack_bytes}]
    call {first}
    ud2

# Finds its local APIC ID as CPUID tells it, and its place in the table.
other_core:
    xor eax, eax
    cpuid
    cmp eax, 0xb
    jb 1f
    mov eax, 0xb
    xor ecx, ecx
    cpuid                                       # edx: x2APIC ID, if ebx is not 0
    test ebx, ebx
    jnz 2f
1:  mov eax, 1
    cpuid
    shr ebx, 24
    mov edx, ebx
2:  xor edi, edi
3:  cmp edx, [{apic_ids} + rdi * 4]
    je 4f
    inc edi
    cmp edi, {cores}
    jb 3b
5:  cli                                         # nobody's core
    hlt
    jmp 5b
4:  lea eax, [rdi + 1]
    imul rax, rax, {stack_bytes}
    lea rsp, [{stacks} + rax]
    call {other}
    ud2
"#,
    stacks = sym STACKS,
    stack_bytes = const size_of::<Stack>(),
    apic_ids = sym APIC_IDS,
    cores = const cpu::CORES,
    first = sym first,
    other = sym other,
);

/// Returns the lowest address of the stack of `core`, above its guard.
///
/// PANICS: when there is no such core.
pub(crate) fn stack_bottom(core: usize) -> usize {
    (&raw const STACKS[core]).expose_provenance() + GUARD_BYTES
}

unsafe extern "Rust" {
    /// The hypervisor, defined by the binary.
    fn hypervisor(boot: Boot) -> !;
}

/// The first core, on its stack in long mode.
extern "sysv64" fn first(start_info: u64) -> ! {
    set_up_core(0);
    console::init();
    let boot = match start(start_info) {
        Ok(boot) => boot,
        Err(error) => {
            defmt::error!("cannot start: {}", defmt::Display2Format(&error));
            cpu::exit(false)
        }
    };
    // SAFETY: the binary defines `hypervisor` with this signature, as the crate's documentation asks.
    unsafe { hypervisor(boot) }
}

fn start(start_info: u64) -> Result<Boot, crate::machine::Error> {
    clock::init()?;
    let boot = Boot::read(start_info)?;
    paging::protect(boot.top_of_ram());
    cpu::find(&boot)?;
    Ok(boot)
}

/// Any other core, on its stack in long mode; `core` is its place in [`APIC_IDS`].
extern "sysv64" fn other(core: usize) -> ! {
    set_up_core(core);
    cpu::arrive(core)
}

fn set_up_core(core: usize) {
    cpu::set_index(core);
    segments::load(core);
    crate::interrupts::load();
    paging::set_memory_types();
}

/// Returns the code that a started core runs first; it may be copied to any page below 1 MiB.
pub(crate) fn trampoline() -> &'static [u8] {
    unsafe extern "C" {
        static trampoline: u8;
        static trampoline_end: u8;
    }
    let start = &raw const trampoline;
    let bytes = (&raw const trampoline_end).addr() - start.addr();
    // SAFETY: both symbols delimit read-only data of this image.
    unsafe { core::slice::from_raw_parts(start, bytes) }
}

/// Returns the local APIC ID of `core`; all ones for none.
pub(crate) fn apic_id(core: usize) -> u32 {
    APIC_IDS.get(core).map_or(u32::MAX, |id| id.load(Ordering::Relaxed))
}
