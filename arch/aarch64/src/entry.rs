//! From the boot loader's world to Rust at EL2 with translation and caches on, for the first core and for those it starts.
#![expect(unsafe_code, reason = "the first instructions of a core, and the call into the hypervisor")]

use crate::{
    clock, console, cpu, interrupts,
    machine::{Boot, Error},
    paging,
    tree::Tree,
};
use core::{arch::global_asm, cell::UnsafeCell};

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

/// `HCR_EL2` of a core without guests: EL1 would be AArch64 (`RW`), interrupts come here (`AMO`, `IMO`, `FMO`), `E2H` = 0.
pub(crate) const HCR_HOST: u64 = 1 << 31 | 1 << 5 | 1 << 4 | 1 << 3;
/// `MAIR_EL2`: attribute 0 is a device (nGnRE), attribute 1 is write-back memory.
const MEMORY_ATTRIBUTES: u64 = 0xFF04;
/// `TCR_EL2` but for `PS`: 39 bits of address, tables of 4 KiB that are write-back and inner shareable.
const TRANSLATION_CONTROL: u64 = 1 << 31 | 1 << 23 | 0b11 << 12 | 1 << 10 | 1 << 8 | (64 - 39);
/// `SCTLR_EL2`: the bits that are one, and `I`, `SA`, `C`, `M`.
const SYSTEM_CONTROL: u64 = 0x30C5_0830 | 1 << 12 | 1 << 3 | 1 << 2 | 1;
/// `CPTR_EL2`: no floating point, vectors or trace, for anyone. The bits that are one, and `TFP`, `TTA`, `TAM`.
pub(crate) const NO_VECTORS: u64 = 0x33FF | 1 << 10 | 1 << 20 | 1 << 30;

// Until `paging` has made the tables that stay, the GiB of the image is memory, readable, writable and executable, and all
// else is devices. The table is complete in the file: nothing is stored before caches are on, so nothing can be stale.
global_asm!(
    r#"
.section .text.head, "ax", @progbits
.global head
head:
    b entry                                 // the header of the arm64 Linux boot protocol
    .long 0
    .quad 0                                 // from where the loader puts images
    .quad image_bytes
    .quad 0b0010                            // little-endian, pages of 4 KiB
    .quad 0, 0, 0
    .ascii "ARM\x64"
    .long 0

.section .data.boot_table, "aw", @progbits
.p2align 12
boot_table:
    .set at, 0
    .rept 512
    .if at == {image_gib}
    .quad at + 0x745                        // block, attribute 1, inner shareable, accessed
    .else
    .quad at + 0x0040000000000441           // block, attribute 0, accessed, never executed
    .endif
    .set at, at + 0x40000000
    .endr

.section .text.entry, "ax", @progbits
entry:
    msr daifset, #15
    mov x19, x0                             // the device tree, or 0
    mrs x1, CurrentEL
    cmp x1, #(2 << 2)
    b.ne park
    adr x1, entry                           // near, as the first byte need not be
    ldr x2, =entry
    cmp x1, x2                              // the image runs where it is linked
    b.ne park
    ldr x20, =first_core
    ldr x0, =boot_table
    b translation_on

// Where PSCI starts a core; x0 is its index.
.global other_entry
other_entry:
    msr daifset, #15
    mov x19, x0
    ldr x20, =other_core
    ldr x0, ={tables}

// Turns translation and caches on with the tables at x0, and continues at x20; keeps x19, needs no stack.
translation_on:
    ldr x1, ={hcr}
    msr hcr_el2, x1
    isb                                     // E2H first: the registers below change with it
    ldr x1, ={no_vectors}
    msr cptr_el2, x1
    mov x1, #{mair}
    msr mair_el2, x1
    mrs x2, id_aa64mmfr0_el1
    and x2, x2, #0xf                        // PARange
    cmp x2, #5                              // 48 bits are the most that tables of this format can name
    mov x3, #5
    csel x2, x2, x3, ls
    ldr x1, ={tcr}
    orr x1, x1, x2, lsl #16                 // PS
    msr tcr_el2, x1
    msr ttbr0_el2, x0
    ldr x1, =vectors
    msr vbar_el2, x1
    msr spsel, #1
    dsb sy
    tlbi alle2
    ic iallu
    dsb nsh
    isb
    ldr x1, ={sctlr}
    msr sctlr_el2, x1
    isb
    mov x29, xzr                            // ends the chain of frames
    br x20

first_core:
    ldr x1, =bss_start
    ldr x2, =bss_end
1:  stp xzr, xzr, [x1], #16
    cmp x1, x2
    b.lo 1b
    ldr x1, ={stacks} + {stack_bytes}
    mov sp, x1
    mov x0, x19
    bl {first}

other_core:
    cmp x19, #{cores}
    b.hs park
    ldr x1, ={stacks}
    ldr x2, ={stack_bytes}
    add x3, x19, #1
    madd x1, x2, x3, x1
    mov sp, x1
    mov x0, x19
    bl {other}

// Nobody's core, or one that cannot run here.
park:
    wfi
    b park
"#,
    image_gib = const paging::IMAGE_GIB,
    tables = sym paging::ROOT,
    hcr = const HCR_HOST,
    no_vectors = const NO_VECTORS,
    mair = const MEMORY_ATTRIBUTES,
    tcr = const TRANSLATION_CONTROL,
    sctlr = const SYSTEM_CONTROL,
    stacks = sym STACKS,
    stack_bytes = const size_of::<Stack>(),
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

/// Where QEMU puts the device tree for an ELF image, which is entered without a word about it.
const TREE_OF_QEMU: u64 = 0x4000_0000;

/// The first core, on its stack.
extern "C" fn first(tree: u64) -> ! {
    set_up_core(0);
    let boot = match start(if tree == 0 { TREE_OF_QEMU } else { tree }) {
        Ok(boot) => boot,
        Err(error) => {
            defmt::error!("cannot start: {}", defmt::Display2Format(&error));
            cpu::exit(false)
        }
    };
    // SAFETY: the binary defines `hypervisor` with this signature, as the crate's documentation asks.
    unsafe { hypervisor(boot) }
}

fn start(tree: u64) -> Result<Boot, Error> {
    let tree = Tree::read(tree)?;
    let uart = tree.console()?;
    // SAFETY: the tree says that a PL011 is there, and what is not the image's GiB is mapped as a device by now.
    unsafe { console::init(uart as usize) };
    clock::init(tree.counter_hz())?;
    let boot = Boot::new(tree)?;
    paging::protect(boot.ram())?;
    cpu::find(&boot)?;
    interrupts::init(&boot)?;
    Ok(boot)
}

/// Any other core, on its stack; `core` is its index.
extern "C" fn other(core: usize) -> ! {
    set_up_core(core);
    cpu::arrive(core)
}

fn set_up_core(core: usize) {
    cpu::set_index(core);
    cpu::unmask_errors();
}

/// Returns the physical address where PSCI is to start a core.
pub(crate) fn other_entry() -> u64 {
    unsafe extern "C" {
        safe static other_entry: u8;
    }
    (&raw const other_entry).addr() as u64
}
