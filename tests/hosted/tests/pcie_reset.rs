//! Function-level reset, virtual functions, bridges and dead functions against configuration spaces that are
//! written down register by register.
//!
//! Offsets and bits are those of the PCI Express Base specification: Command 0x04, BARs 0x10, capability
//! pointer 0x34; of the PCI Express capability (0x10) Device Capabilities +4, Device Control +8, Device
//! Status +10; of Advanced Features (0x13) length +2, capabilities +3, control +4, status +5.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use iommu::{Completion, StreamId};
use pcie::{ConfigSpace, Error, Function, Reset, buses_behind};
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
};
use vtd::dmar::{Dmar, Requester};

const CARD: StreamId = StreamId(0x0100);

const EXPRESS: u16 = 0x60;
const DEVICE_CONTROL: u16 = EXPRESS + 8;
const ADVANCED: u16 = 0x90;
const ATS: u16 = 0x100;
const PASID: u16 = 0x110;
const PRI: u16 = 0x120;
const SRIOV: u16 = 0x140;

/// A register: what it reads, and which of its bits a write changes or clears.
#[derive(Clone, Copy)]
struct Register {
    value: u32,
    writable: u32,
    write_1_to_clear: u32,
    after_reset: u32,
}

fn fixed(value: u32) -> Register {
    Register { value, writable: 0, write_1_to_clear: 0, after_reset: value }
}

/// `value` now, `writable` bits of which a reset clears.
fn writable(value: u32, writable: u32) -> Register {
    Register { value, writable, write_1_to_clear: 0, after_reset: value & !writable }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Access {
    Read(u16),
    Write(u16, u32),
}

/// A board with functions, of which one, `CARD`, can be reset.
struct Board {
    registers: RefCell<BTreeMap<(StreamId, u16), Register>>,
    /// What was done to `CARD`.
    accesses: RefCell<Vec<Access>>,
    now_us: Cell<u64>,
    /// When a reset of `CARD` began, as the card sees it.
    reset_us: Cell<Option<u64>>,
    /// After the reset the card says so long that it is not ready.
    ready_after_us: Cell<u64>,
    /// The card is gone after so many accesses to it.
    gone_after: Cell<usize>,
    /// The card does not reset what it is told to reset.
    deaf: Cell<bool>,
}

impl Board {
    /// A card as its owner leaves it: everything on, 64 KiB of memory at 0x3_FE00_0000.
    fn new() -> Self {
        let board = Self {
            registers: RefCell::default(),
            accesses: RefCell::default(),
            now_us: Cell::new(5_000_000),
            reset_us: Cell::new(None),
            ready_after_us: Cell::new(0),
            gone_after: Cell::new(usize::MAX),
            deaf: Cell::new(false),
        };
        // Status: a capability list, and Received Master Abort, write-one-to-clear. Command: memory, bus
        // master, no INTx.
        let command = writable(0x2010_0406, 0x0547);
        board.set(0x04, Register { write_1_to_clear: 0xF900_0000, ..command });
        for (offset, register) in [
            (0x00, fixed(0x0001_1234)),
            (0x0C, fixed(0)),
            (0x10, writable(0xFE00_000C, 0xFFFF_0000)),
            (0x14, writable(3, u32::MAX)),
            (0x18, writable(0xFD00_0000, 0xFFFF_F000)),
            (0x34, fixed(0x40)),
            // Power management, then PCI Express, then Advanced Features.
            (0x40, fixed(0x0003_6001)),
            (EXPRESS, fixed(0x0002_9010)),
            (EXPRESS + 4, fixed(1 << 28 | 0x8002)),
            (ADVANCED, fixed(0x0306_0013)),
            (ADVANCED + 4, writable(0, 0)),
            (ATS, fixed(0x1101_000F)),
            (ATS + 4, writable(0x8000_0065, 0x801F_0000)),
            (PASID, fixed(0x1201_001B)),
            (PASID + 4, writable(0x0001_1400, 0x0007_0000)),
            (PRI, fixed(0x1401_0013)),
            (PRI + 4, writable(0x8100_0001, 0x0000_0001)),
            (PRI + 8, fixed(64)),
            (PRI + 12, writable(64, u32::MAX)),
            (SRIOV, fixed(0x0001_0010)),
            (SRIOV + 0x08, writable(0, 0x1F)),
            (SRIOV + 0x0C, fixed(0x0004_0004)),
            (SRIOV + 0x10, fixed(4)),
            // First VF Offset 0x80, VF Stride 2; VF Device ID 0x10CA.
            (SRIOV + 0x14, fixed(0x0002_0080)),
            (SRIOV + 0x18, fixed(0x10CA_0000)),
        ] {
            board.set(offset, register);
        }
        // Device Control: Max Read Request Size 512, Max Payload Size 256. Device Status: an error was
        // detected.
        let control = Register { after_reset: 0x2010, ..writable(0x0004_2030, 0x7FFF) };
        board.set(DEVICE_CONTROL, Register { write_1_to_clear: 0x000F_0000, ..control });
        board
    }

    fn set(&self, offset: u16, register: Register) {
        self.registers.borrow_mut().insert((CARD, offset), register);
    }

    fn value(&self, offset: u16) -> u32 {
        self.registers.borrow()[&(CARD, offset)].value
    }

    fn card(&self) -> Function {
        let card = Function::find(self, CARD).expect("it answers");
        self.accesses.borrow_mut().clear();
        card
    }

    fn writes_to(&self, offset: u16) -> Vec<u32> {
        let value = |access: &Access| match *access {
            Access::Write(at, value) if at == offset => Some(value),
            _ => None,
        };
        self.accesses.borrow().iter().filter_map(value).collect()
    }

    /// Notes an access, and returns whether the card is there.
    fn note(&self, function: StreamId, access: Access) -> bool {
        if function != CARD {
            return true;
        }
        let mut accesses = self.accesses.borrow_mut();
        accesses.push(access);
        let since = self.reset_us.get().map(|at| self.now_us.get() - at);
        assert!(since.is_none_or(|since| since >= 100_000), "{access:?} {since:?} us after the reset");
        accesses.len() <= self.gone_after.get()
    }

    fn is_ready(&self) -> bool {
        self.reset_us.get().is_none_or(|at| self.now_us.get() - at >= self.ready_after_us.get())
    }

    fn reset(&self) {
        self.reset_us.set(Some(self.now_us.get()));
        if !self.deaf.get() {
            for register in self.registers.borrow_mut().values_mut() {
                register.value = register.after_reset;
            }
        }
    }

    /// Polls until the reset is over, with 10 ms in between.
    fn finish(&self, reset: &mut Reset) -> Result<(), Error> {
        for _ in 0..1000 {
            match reset.poll(self, self.now_us.get()) {
                Ok(Completion::Done) => return Ok(()),
                Ok(Completion::Failed) => panic!("a reset has no commands"),
                Ok(Completion::Pending) => self.now_us.set(self.now_us.get() + 10_000),
                Err(error) => return Err(error),
            }
        }
        panic!("the reset is never over");
    }

    fn run(&self, card: &Function) -> Result<(), Error> {
        let mut reset = Reset::begin(self, card, self.now_us.get())?;
        self.finish(&mut reset)
    }
}

impl ConfigSpace for Board {
    fn read32(&self, function: StreamId, offset: u16) -> u32 {
        if !self.note(function, Access::Read(offset)) {
            return u32::MAX;
        }
        if function == CARD && !self.is_ready() {
            return if offset == 0 { 0xFFFF_0001 } else { u32::MAX };
        }
        let registers = self.registers.borrow();
        // A function that has any register has zeros for the rest.
        let there = registers.keys().any(|&(id, _)| id == function);
        registers.get(&(function, offset)).map_or(if there { 0 } else { u32::MAX }, |register| register.value)
    }

    fn write32(&self, function: StreamId, offset: u16, value: u32) {
        if !self.note(function, Access::Write(offset, value)) || !self.is_ready() {
            return;
        }
        let mut registers = self.registers.borrow_mut();
        if let Some(register) = registers.get_mut(&(function, offset)) {
            let kept = register.value & !register.writable & !(value & register.write_1_to_clear);
            register.value = kept | value & register.writable;
        }
        drop(registers);
        let starts = match offset {
            DEVICE_CONTROL => value & 1 << 15 != 0 && self.value(EXPRESS + 4) & 1 << 28 != 0,
            offset => offset == ADVANCED + 4 && value & 1 != 0,
        };
        if function == CARD && starts {
            self.reset();
        }
    }
}

const ABSENT: Error = Error::Absent { function: CARD };
const NO_RESET: Error = Error::Unsupported { function: CARD, capability: "function-level reset" };

mod reset {
    use super::*;

    #[test]
    fn a_card_is_quiet_before_its_reset_and_has_its_configuration_after_it() {
        let board = Board::new();
        let card = board.card();

        let mut reset = Reset::begin(&board, &card, board.now_us.get()).expect("it can be reset");

        assert_eq!(board.value(0x04) & 0xFFFF, 0x0402, "no bus master");
        assert_eq!(
            [board.value(PRI + 4) & 1, board.value(ATS + 4) >> 31, board.value(PASID + 4) >> 16],
            [0; 3]
        );
        assert_eq!(board.reset_us.get(), None);
        assert_eq!(reset.poll(&board, board.now_us.get()), Ok(Completion::Pending));
        assert_eq!(board.reset_us.get(), Some(5_000_000));
        assert_eq!(board.writes_to(DEVICE_CONTROL), [0xA030], "Initiate FLR, and no error acknowledged");
        assert_eq!(board.finish(&mut reset), Ok(()));

        assert_eq!(board.now_us.get(), 5_100_000, "as soon as 100 ms are over");
        assert_eq!([0x10, 0x14, 0x18].map(|bar| board.value(bar)), [0xFE00_000C, 3, 0xFD00_0000]);
        assert_eq!(board.value(DEVICE_CONTROL) & 0xFFFF, 0x2030);
        assert_eq!(board.value(0x04), 0x2010_0402, "memory, no INTx, no bus master; Status as it was");
        assert_eq!(
            [board.value(PRI + 4) & 1, board.value(ATS + 4) >> 31, board.value(PASID + 4) >> 16],
            [0; 3]
        );
        let accesses = board.accesses.borrow().len();
        assert_eq!(reset.poll(&board, u64::MAX), Ok(Completion::Done), "it stays done");
        assert_eq!(board.accesses.borrow().len(), accesses);
    }

    #[test]
    fn memory_is_decoded_again_after_the_bars_and_not_before() {
        let board = Board::new();
        assert_eq!(board.run(&board.card()), Ok(()));

        let accesses = board.accesses.borrow();
        let last = |offset| accesses.iter().rposition(|a| matches!(a, Access::Write(at, _) if *at == offset));
        for bar in (0x10..0x28).step_by(4) {
            assert!(last(bar) < last(0x04), "{bar:#x}");
        }
        assert_eq!(board.writes_to(0x10).len(), 1, "BARs are written once");
    }

    #[test]
    fn nothing_is_reset_while_transactions_are_pending() {
        let board = Board::new();
        let card = board.card();
        let status = board.value(DEVICE_CONTROL);
        let pending = |on: u32| {
            let register = Register { write_1_to_clear: 0xF_0000, ..writable(status | on << 21, 0x7FFF) };
            board.set(DEVICE_CONTROL, register);
        };
        pending(1);
        let mut reset = Reset::begin(&board, &card, 5_000_000).expect("it can be reset");

        for now_us in [5_000_000, 5_500_000, 5_999_999] {
            assert_eq!(reset.poll(&board, now_us), Ok(Completion::Pending));
        }
        assert_eq!(board.reset_us.get(), None);
        pending(0);
        board.now_us.set(6_000_000);

        // Idle at the deadline is idle.
        assert_eq!(reset.poll(&board, 6_000_000), Ok(Completion::Pending));
        assert_eq!(board.reset_us.get(), Some(6_000_000));
        assert_eq!(board.finish(&mut reset), Ok(()));
        assert_eq!(board.now_us.get(), 6_100_000);
    }

    #[test]
    fn transactions_that_never_end_are_a_time_out_and_no_reset() {
        for advanced in [false, true] {
            let board = Board::new();
            if advanced {
                board.set(EXPRESS + 4, fixed(0));
                board.set(ADVANCED + 4, fixed(1 << 8));
            } else {
                board.set(DEVICE_CONTROL, writable(1 << 21, 0x7FFF));
            }
            let card = board.card();
            let mut reset = Reset::begin(&board, &card, 5_000_000).expect("it can be reset");

            let step = "Transactions Pending";
            let timeout = Error::Timeout { function: CARD, step, waited_us: 1_000_000 };
            assert_eq!(reset.poll(&board, 5_999_999), Ok(Completion::Pending));
            assert_eq!(reset.poll(&board, 6_000_000), Err(timeout));
            assert_eq!(reset.poll(&board, 9_000_000), Err(timeout), "it stays so");

            assert_eq!(board.reset_us.get(), None);
            assert_eq!(board.value(0x04) & 4, 0, "and the card issues nothing");
        }
    }

    #[test]
    fn advanced_features_reset_what_pci_express_cannot() {
        // Without the bit in Device Capabilities, and without the PCI Express capability.
        for without in [EXPRESS + 4, EXPRESS] {
            let board = Board::new();
            board.set(without, fixed(if without == EXPRESS { 0x0002_9009 } else { 0x8002 }));
            let card = board.card();

            assert_eq!(board.run(&card), Ok(()));

            assert_eq!(board.writes_to(ADVANCED + 4), [1]);
            assert_eq!(board.reset_us.get(), Some(5_000_000));
            assert!(board.writes_to(DEVICE_CONTROL).iter().all(|value| value & 1 << 15 == 0));
            assert_eq!(board.value(0x10), 0xFE00_000C);
        }
        let board = Board::new();
        assert_eq!(board.run(&board.card()), Ok(()));
        assert_eq!(board.writes_to(ADVANCED + 4), [0; 0], "PCI Express goes first");
    }

    #[test]
    fn a_function_without_a_reset_is_refused_untouched() {
        // Advanced Features absent; without the reset; without Transactions Pending; of another length. And a
        // bridge.
        for (offset, value) in
            [(ADVANCED, 0x13), (ADVANCED, 0x0106_0013), (ADVANCED, 0x0206_0013), (ADVANCED, 0x0308_0013)]
        {
            let board = Board::new();
            board.set(EXPRESS + 4, fixed(0x8002));
            board.set(offset, fixed(value));

            assert_eq!(board.run(&board.card()), Err(NO_RESET), "{value:#x}");
            assert!(board.accesses.borrow().iter().all(|access| matches!(access, Access::Read(_))));
        }
        for kind in [0x0001_0000, 0x0081_0000, 0x0002_0000] {
            let board = Board::new();
            board.set(0x0C, fixed(kind));

            assert_eq!(board.run(&board.card()), Err(NO_RESET), "header type {kind:#x}");
        }
        let board = Board::new();
        board.set(0x0C, fixed(0x0080_0000));
        assert_eq!(board.run(&board.card()), Ok(()), "one of several functions is no bridge");
    }

    #[test]
    fn a_physical_function_is_not_reset_under_its_virtual_ones() {
        let board = Board::new();
        board.set(SRIOV + 8, writable(1, 0x1F));
        let card = board.card();

        assert_eq!(board.run(&card), Err(Error::VirtualFunctions { function: CARD }));

        assert!(board.accesses.borrow().iter().all(|access| matches!(access, Access::Read(_))));
    }

    #[test]
    fn a_function_that_is_not_ready_is_asked_again_for_a_second() {
        for (ready_us, waited_us) in [(100_001, 110_000), (730_000, 730_000), (1_000_000, 1_000_000)] {
            let board = Board::new();
            board.ready_after_us.set(ready_us);

            assert_eq!(board.run(&board.card()), Ok(()));

            assert_eq!(board.now_us.get(), 5_000_000 + waited_us);
            assert_eq!(board.value(0x10), 0xFE00_000C);
        }
        let board = Board::new();
        board.ready_after_us.set(1_000_001);
        let timeout = Error::Timeout { function: CARD, step: "Request Retry Status", waited_us: 1_000_000 };
        assert_eq!(board.run(&board.card()), Err(timeout));
    }

    #[test]
    fn a_card_that_dies_at_any_access_is_absent_and_never_done() {
        let healthy = Board::new();
        assert_eq!(healthy.run(&healthy.card()), Ok(()));
        let accesses = healthy.accesses.borrow().len();

        for gone_after in 0..accesses {
            let board = Board::new();
            let card = board.card();
            board.gone_after.set(gone_after);

            assert_eq!(board.run(&card), Err(ABSENT), "after {gone_after} of {accesses}");

            assert!(board.now_us.get() <= 6_000_000, "no longer than the second that it has");
        }
        let board = Board::new();
        let card = board.card();
        board.gone_after.set(accesses);
        assert_eq!(board.run(&card), Ok(()));
    }

    #[test]
    fn another_card_than_before_is_not_given_the_configuration_of_the_first() {
        let board = Board::new();
        let card = board.card();
        let mut reset = Reset::begin(&board, &card, 5_000_000).expect("it can be reset");
        assert_eq!(reset.poll(&board, 5_000_000), Ok(Completion::Pending));
        board.set(0x00, fixed(0x0002_1234));
        board.now_us.set(5_100_000);

        assert_eq!(reset.poll(&board, 5_100_000), Err(Error::Replaced { function: CARD }));

        assert_eq!(board.writes_to(0x10), [0; 0]);
    }

    #[test]
    fn a_card_that_ignores_its_reset_is_found_out() {
        let board = Board::new();
        board.deaf.set(true);

        let rejected = Error::Rejected { function: CARD, capability: "function-level reset" };
        assert_eq!(board.run(&board.card()), Err(rejected));
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_ends_nothing() {
        let board = Board::new();
        let card = board.card();
        let mut reset = Reset::begin(&board, &card, 5_000_000).expect("it can be reset");

        for now_us in [5_000_000, 5_000_000, 0, 5_099_999] {
            // The first resets; none of the others may touch the card, which the board would notice.
            assert_eq!(reset.poll(&board, now_us), Ok(Completion::Pending), "{now_us}");
        }
        board.now_us.set(5_100_000);
        assert_eq!(reset.poll(&board, 5_100_000), Ok(Completion::Done));
    }
}

mod functions {
    use super::*;

    #[test]
    fn a_card_that_dies_at_any_access_is_not_taken_for_enabled() {
        let healthy = Board::new();
        let card = healthy.card();
        assert!(card.enable_page_requests(&healthy, 32, true).is_ok());
        let accesses = healthy.accesses.borrow().len();

        for gone_after in 0..accesses {
            let board = Board::new();
            let card = board.card();
            board.gone_after.set(gone_after);

            assert_eq!(card.enable_page_requests(&board, 32, true), Err(ABSENT), "after {gone_after}");
        }
    }

    #[test]
    fn a_capability_that_does_not_go_on_is_named_and_all_is_off() {
        // What each of the three can be told shrinks to nothing.
        for (at, name) in [(PASID, "PASID capability"), (ATS, "ATS capability"), (PRI, "PRI capability")] {
            let board = Board::new();
            let card = board.card();
            let off = board.value(at + 4) & !board.registers.borrow()[&(CARD, at + 4)].writable;
            board.set(at + 4, fixed(off));

            let rejected = Error::Rejected { function: CARD, capability: name };
            assert_eq!(card.enable_page_requests(&board, 32, true), Err(rejected));

            let on = [board.value(PRI + 4) & 1, board.value(ATS + 4) >> 31, board.value(PASID + 4) >> 16];
            assert_eq!(on, [0; 3], "{name}");
        }
    }

    #[test]
    fn bits_of_the_ats_capability_say_what_invalidations_need() {
        // Invalidate Queue Depth 4:0, Page Aligned Request 5, Global Invalidate Supported 6.
        for (bits, expected) in [(0x65, (5, true, true)), (0x24, (4, true, false)), (0x40, (32, false, true))]
        {
            let board = Board::new();
            board.set(ATS + 4, fixed(bits));

            let tlb = board.card().device_tlb(&board).expect("it has one");

            let found = (tlb.invalidate_queue_depth, tlb.page_aligned, tlb.global_invalidate);
            assert_eq!((found, tlb.physical), (expected, CARD));
        }
    }

    #[test]
    fn a_chain_of_capabilities_that_loops_ends() {
        let board = Board::new();
        board.set(ADVANCED, fixed(0x0306_4013));

        assert_eq!(board.run(&board.card()), Ok(()));
    }

    #[test]
    fn a_function_that_is_not_ready_is_not_found() {
        let board = Board::new();
        board.set(0x00, fixed(0xFFFF_0001));

        assert_eq!(Function::find(&board, CARD), None);
    }

    /// A board with virtual functions on: 01:10.0, 01:10.2, 01:10.4, 01:10.6, of which the second is
    /// described.
    fn with_virtual_functions() -> Board {
        let board = Board::new();
        board.set(SRIOV + 8, writable(1, 0x1F));
        let mut registers = board.registers.borrow_mut();
        for (offset, register) in [
            // Vendor ID and Device ID are all ones. No memory enable of its own.
            (0x00, fixed(u32::MAX)),
            (0x04, writable(0x0010_0004, 0x0004)),
            (0x34, fixed(EXPRESS.into())),
            (EXPRESS, fixed(0x0002_0010)),
            (EXPRESS + 4, fixed(1 << 28)),
            (DEVICE_CONTROL, writable(0, 0)),
            (ATS, fixed(0x0001_000F)),
            (ATS + 4, writable(1 << 5, 1 << 31)),
        ] {
            registers.insert((StreamId(0x0182), offset), register);
        }
        drop(registers);
        board
    }

    #[test]
    fn a_virtual_function_is_found_by_its_number() {
        let board = with_virtual_functions();
        let card = board.card();

        assert_eq!(Function::find(&board, StreamId(0x0182)), None, "it has no Vendor ID of its own");
        let second = card.virtual_function(&board, 2).expect("it is enabled");

        assert_eq!((second.id, second.vendor, second.device), (StreamId(0x0182), 0x1234, 0x10CA));
        assert_eq!(card.virtual_function(&board, 3), Err(Error::Absent { function: StreamId(0x0184) }));
        for number in [0, 5, u16::MAX] {
            let none = Error::NoVirtualFunction { function: CARD, number };
            assert_eq!(card.virtual_function(&board, number), Err(none));
        }
        // Requester IDs past the last bus; one that is the physical function's own; none enabled.
        for (offset, value, number) in
            [(0x14, 0xFFFF_0080, 3), (0x14, 0x0000_FFFF, 1), (0x14, 0, 1), (0x14, 0, 4), (0x08, 0, 1)]
        {
            board.set(SRIOV + offset, fixed(value));
            let none = Error::NoVirtualFunction { function: CARD, number };
            assert_eq!(card.virtual_function(&board, number), Err(none), "{offset:#x}: {value:#x}");
        }
        assert_eq!(
            second.virtual_function(&board, 1),
            Err(Error::Unsupported { function: second.id, capability: "SR-IOV capability" })
        );
    }

    #[test]
    fn a_virtual_function_shares_the_invalidations_of_its_physical_one() {
        let board = with_virtual_functions();
        let second = board.card().virtual_function(&board, 2).expect("it is enabled");

        let tlb = second.device_tlb(&board).expect("it has one");

        // Depth 5 of the physical function, and not 32 for its own zero; the other bits are its own.
        assert_eq!((tlb.invalidate_queue_depth, tlb.physical), (5, CARD));
        assert!(tlb.page_aligned && !tlb.global_invalidate);
    }

    #[test]
    fn a_virtual_function_has_ats_in_units_of_its_physical_one() {
        let board = with_virtual_functions();
        let second = board.card().virtual_function(&board, 2).expect("it is enabled");
        let ats = |board: &Board| board.registers.borrow()[&(StreamId(0x0182), ATS + 4)].value;

        assert_eq!(second.enable_ats(&board), Ok(()));
        assert_eq!(ats(&board), 1 << 31 | 1 << 5);

        // The physical function translates in units of 8 KiB.
        board.set(ATS + 4, fixed(0x8001_0065));
        let capability = "translation unit of 4 KiB";
        assert_eq!(second.enable_ats(&board), Err(Error::Unsupported { function: CARD, capability }));
        assert_eq!(ats(&board), 1 << 5, "and ATS is off");
        let refused = second.enable_page_requests(&board, 8, false);
        let capability = "PASID capability";
        assert_eq!(refused, Err(Error::Unsupported { function: second.id, capability }));
    }

    #[test]
    fn a_virtual_function_is_reset_though_it_has_no_vendor() {
        let board = with_virtual_functions();
        let second = board.card().virtual_function(&board, 2).expect("it is enabled");
        let mut reset = Reset::begin(&board, &second, 0).expect("it can be reset");

        assert_eq!(reset.poll(&board, 0), Ok(Completion::Pending));
        assert_eq!(reset.poll(&board, 99_999), Ok(Completion::Pending));
        assert_eq!(reset.poll(&board, 100_000), Ok(Completion::Done));

        assert_eq!(board.registers.borrow()[&(StreamId(0x0182), 0x04)].value, 0x0010_0000, "no bus master");
    }
}

mod bridges {
    use super::*;

    /// A bridge at 00:01.0 with these bus numbers: primary, secondary, subordinate.
    fn bridge(header_type: u8, numbers: [u8; 3]) -> Board {
        let board = Board::new();
        let [primary, secondary, subordinate] = numbers;
        let mut registers = board.registers.borrow_mut();
        registers.insert((StreamId(8), 0x0C), fixed(u32::from(header_type) << 16));
        registers
            .insert((StreamId(8), 0x18), fixed(u32::from_le_bytes([primary, secondary, subordinate, 0x40])));
        drop(registers);
        board
    }

    #[test]
    fn a_bridge_says_which_buses_are_behind_it() {
        for (header_type, numbers, expected) in [
            (1, [0, 1, 1], Some(1..=1)),
            (0x81, [0, 2, 9], Some(2..=9)),
            // An endpoint; numbers that nobody has set; the wrong way round.
            (0, [0, 1, 1], None),
            (1, [0, 0, 0], None),
            (1, [0, 5, 4], None),
        ] {
            assert_eq!(buses_behind(&bridge(header_type, numbers), StreamId(8)), expected);
        }
        assert_eq!(buses_behind(&bridge(1, [0, 1, 1]), StreamId(0x10)), None, "nobody answers");
    }

    #[test]
    fn a_dmar_table_and_configuration_space_together_say_whose_a_device_is() {
        // A unit at 0xFED9_0000 for what is behind the bridge 00:01.0.
        let unit = [0, 0, 24, 0, 0, 0, 0, 0, 0, 0, 0xD9, 0xFE, 0, 0, 0, 0, 2, 8, 0, 0, 0, 0, 1, 0];
        let table = [b"DMAR".as_slice(), &[72, 0, 0, 0], &[0; 28], &[38, 1], &[0; 10], &unit].concat();
        let dmar = Dmar::new(&table).expect("a DMAR table");
        let board = bridge(1, [0, 1, 2]);
        let is_claimed = |id| {
            let device = Requester { segment: 0, id };
            dmar.unit_of(device, |bridge| buses_behind(&board, bridge.id)).is_some()
        };

        assert!(is_claimed(StreamId(8)) && is_claimed(CARD) && is_claimed(StreamId(0x02FF)));
        assert!(!is_claimed(StreamId(0x0300)) && !is_claimed(StreamId(0x10)));
    }
}
