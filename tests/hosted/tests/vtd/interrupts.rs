//! Interrupt remapping of the VT-d driver against the modelled unit: who interrupts whom, and when that is really over.

use crate::HARDWARE;
use hosted::{Machine, Moment, Random, Tapped, needs};
use iommu::{Bus, Error, Event, FaultReason, Invalidation, Message, PhysAddr, StreamId};
use models::{
    golden,
    vtd::{Arrived, Config, Refusal, VtdUnit},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};
use vtd::{
    Remapping,
    remap::{self, Delivery, Destination, Handle, Interrupt, Pin, Source},
};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
/// IRTA: base in 63:12.
const IRTA: usize = 0xB8;

const fn fixed(id: u32, vector: u8) -> Interrupt {
    Interrupt::fixed(Destination::Physical(id), vector)
}

/// What the model is expected to deliver for `fixed(id, vector)`.
const fn arrived(destination: u32, vector: u8) -> Arrived {
    Arrived { destination, logical: false, hint: false, delivery: 0, vector, level: false, remapped: true }
}

const fn refused(reason: u8) -> Result<Arrived, Refusal> {
    Err(Refusal::Fault(reason))
}

fn remapping<B: Bus + Clone>(machine: &mut Machine<B>) -> &mut Remapping<B> {
    machine.vtd.remapping.as_mut().expect("the unit remaps")
}

/// A block of 2^`log2` entries for `stream`.
fn allocate<B: Bus + Clone>(machine: &mut Machine<B>, stream: StreamId, log2: u8) -> Handle {
    remapping(machine).allocate(Source::Function(stream), log2).expect("there is room")
}

/// Sets message `number`, and waits until the unit knows.
fn set<B: Bus + Clone>(machine: &mut Machine<B>, handle: &Handle, number: u16, interrupt: Interrupt) {
    let invalidations = remapping(machine).set(handle, number, interrupt).expect("it can be");
    machine.invalidate(&invalidations);
}

/// The message by which a device sends number `number`.
fn message<B: Bus + Clone>(machine: &mut Machine<B>, handle: &Handle, number: u16) -> Message {
    remapping(machine).message(handle, number).expect("it is in the block")
}

/// Releases a block, and waits until hardware has let go.
fn release<B: Bus + Clone>(machine: &mut Machine<B>, handle: Handle) {
    let (leaving, invalidations) = remapping(machine).release(handle);
    machine.invalidate(&invalidations);
    remapping(machine).finish(leaving);
}

/// The faults of one pass: device, code and index.
fn faults(machine: &mut Machine) -> Vec<(StreamId, u16, u64)> {
    let fault = |event| match event {
        Event::Fault(fault) => {
            assert_eq!(fault.reason, FaultReason::Interrupt);
            (fault.stream, fault.code, fault.iova.0 >> 48)
        }
        other => panic!("{other:?} is no fault"),
    };
    machine.pass().into_iter().map(fault).collect()
}

#[test]
fn a_device_interrupts_by_its_own_entry_and_by_no_other() {
    let mut machine = HARDWARE.machine(Config::full());
    let disk = allocate(&mut machine, DISK, 0);
    let nic = allocate(&mut machine, NIC, 0);
    let (of_disk, of_nic) = (message(&mut machine, &disk, 0), message(&mut machine, &nic, 0));

    assert_eq!(machine.unit.interrupt(DISK, of_disk), refused(0x22), "nothing was set");
    set(&mut machine, &disk, 0, fixed(3, 0x41));
    set(&mut machine, &nic, 0, fixed(0x1_0000, 0x52));

    assert_eq!(machine.unit.interrupt(DISK, of_disk), Ok(arrived(3, 0x41)));
    assert_eq!(machine.unit.interrupt(NIC, of_nic), Ok(arrived(0x1_0000, 0x52)));
    assert_eq!(machine.unit.interrupt(NIC, of_disk), refused(0x26));
    assert_eq!(machine.unit.interrupt(DISK, of_nic), refused(0x26));
    let past = remap::message(0x100, false, 0);
    assert_eq!(machine.unit.interrupt(DISK, past), refused(0x21));
    let (disk, nic) = (u64::from(disk.first()), u64::from(nic.first()));
    let told = faults(&mut machine);
    assert_eq!(
        told,
        [(DISK, 0x22, disk), (NIC, 0x26, disk), (DISK, 0x26, nic), (DISK, 0x21, 0x100)],
        "device, reason and index"
    );
    machine.assert_lawful();
}

#[test]
fn the_compatibility_format_reaches_nobody() {
    for config in [Config::qemu(), Config { ecap: Config::qemu().ecap & !(1 << 4), ..Config::qemu() }] {
        let mut machine = HARDWARE.machine(config);

        let plain = Message { address: 0xFEE0_0000, data: 0x41 };
        assert_eq!(machine.unit.interrupt(DISK, plain), refused(0x25));
        assert_eq!(faults(&mut machine), [(DISK, 0x25, 0)]);
        assert_eq!(machine.unit.pin(StreamId(0xFF00), 0x41), refused(0x25));
        assert_eq!(faults(&mut machine), [(StreamId(0xFF00), 0x25, 0)]);

        machine.assert_lawful();
    }
}

#[test]
fn a_function_with_several_messages_adds_their_number_to_one_block() {
    let mut machine = HARDWARE.machine(Config::full());
    let _before = allocate(&mut machine, NIC, 0);
    let block = allocate(&mut machine, DISK, 3);
    assert_eq!((block.first(), block.count()), (8, 8), "a multiple of its size");
    for number in [0, 5, 7] {
        set(&mut machine, &block, number, fixed(1, 0x40 + number as u8));
    }

    let Message { address, data } = message(&mut machine, &block, 0);
    assert_eq!(data, 0, "the function puts the number into the low bits");
    for number in 0..8 {
        let sent = machine.unit.interrupt(DISK, Message { address, data: data | number });
        let expected = match number {
            0 | 5 | 7 => Ok(arrived(1, 0x40 + number as u8)),
            _ => refused(0x22),
        };
        assert_eq!(sent, expected, "{number}");
        assert_eq!(message(&mut machine, &block, number as u16), Message { address, data: number });
    }
    assert!(remapping(&mut machine).message(&block, 8).is_err());
    assert!(remapping(&mut machine).set(&block, 8, fixed(1, 0x40)).is_err());
    machine.assert_lawful();
}

/// XSA-36: the entry from before a change went on interrupting.
#[test]
fn a_change_takes_effect_when_its_invalidation_completes_and_not_before() {
    let mut machine = HARDWARE.machine(Config::full());
    let handle = allocate(&mut machine, DISK, 0);
    set(&mut machine, &handle, 0, fixed(1, 0x41));
    let sent = message(&mut machine, &handle, 0);
    assert_eq!(machine.unit.interrupt(DISK, sent), Ok(arrived(1, 0x41)));

    let moved = remapping(&mut machine).set(&handle, 0, fixed(2, 0x52)).expect("it can be");
    assert_eq!(moved[..], [Invalidation::InterruptEntry { index: handle.first(), log2: 0 }]);
    assert_eq!(machine.unit.interrupt(DISK, sent), Ok(arrived(1, 0x41)), "the unit remembers");
    machine.invalidate(&moved);
    assert_eq!(machine.unit.interrupt(DISK, sent), Ok(arrived(2, 0x52)));

    let blocked = remapping(&mut machine).block(&handle, 0).expect("it is in the block");
    assert_eq!(machine.unit.interrupt(DISK, sent), Ok(arrived(2, 0x52)));
    machine.invalidate(&blocked);
    assert_eq!(machine.unit.interrupt(DISK, sent), refused(0x22));

    set(&mut machine, &handle, 0, fixed(1, 0x41));
    assert_eq!(machine.unit.interrupt(DISK, sent), Ok(arrived(1, 0x41)));
    let (leaving, invalidations) = remapping(&mut machine).release(handle);
    assert_eq!(machine.unit.interrupt(DISK, sent), Ok(arrived(1, 0x41)));
    machine.invalidate(&invalidations);
    assert_eq!(machine.unit.interrupt(DISK, sent), refused(0x22));
    remapping(&mut machine).finish(leaving);
    assert_eq!(machine.unit.interrupt(DISK, sent), refused(0x22));
    machine.assert_lawful();
}

/// XSA-360: entries that were never given back.
#[test]
fn a_block_is_not_given_again_before_hardware_has_let_go_of_it() {
    let mut machine = HARDWARE.machine(Config::full());
    let handle = allocate(&mut machine, DISK, 2);
    let first = handle.first();
    set(&mut machine, &handle, 1, fixed(1, 0x41));

    let (leaving, invalidations) = remapping(&mut machine).release(handle);
    let other = allocate(&mut machine, NIC, 2);
    assert_ne!(other.first(), first);
    machine.invalidate(&invalidations);
    let third = allocate(&mut machine, NIC, 2);
    assert!(![first, other.first()].contains(&third.first()), "completed is not yet finished");
    remapping(&mut machine).finish(leaving);

    let again = allocate(&mut machine, NIC, 2);
    assert_eq!(again.first(), first);
    set(&mut machine, &again, 1, fixed(2, 0x52));
    let sent = message(&mut machine, &again, 1);
    assert_eq!(machine.unit.interrupt(NIC, sent), Ok(arrived(2, 0x52)));
    assert_eq!(machine.unit.interrupt(DISK, sent), refused(0x26), "the last owner is nobody here");
    machine.assert_lawful();
}

#[test]
fn what_left_without_its_invalidation_is_never_given_again() {
    let mut machine = HARDWARE.machine(Config::full());
    for _ in 0..64 {
        let handle = allocate(&mut machine, DISK, 2);
        // The token is lost, as it is where the unit gave no answer.
        let _ = remapping(&mut machine).release(handle);
    }

    let none = remapping(&mut machine).allocate(Source::Function(NIC), 0).err();

    assert!(matches!(none, Some(Error::Exhausted { what }) if what.contains("interrupts")), "{none:?}");
}

/// Words of table entry `index`, as the unit sees them.
fn entry(unit: &VtdUnit, memory: &models::memory::Memory, index: u16) -> [u64; 2] {
    let at = (unit.read64(IRTA) & !0xFFF) + u64::from(index) * 16;
    [0, 8].map(|word| memory.device_load(PhysAddr(at + word)).expect("inside"))
}

#[test]
fn after_every_store_an_entry_is_absent_or_whole() {
    // Worked out from 2.6: P, V, DST; SID, SVT 1.
    let whole =
        |stream: StreamId, id: u64, vector: u64| [1 | vector << 16 | id << 32, u64::from(stream.0) | 1 << 18];
    let allowed = [whole(DISK, 1, 0x41), whole(DISK, 2, 0x52), whole(NIC, 3, 0x63)];
    let (unit, memory) = HARDWARE.unit(Config::full());
    let seen = Arc::<Mutex<Vec<[u64; 2]>>>::default();
    let (kept, looked) = (Arc::clone(&seen), memory.clone());
    let bus = Tapped::new(unit, move |unit, moment| {
        if moment == Moment::Published && unit.read64(IRTA) != 0 {
            kept.lock().expect("no test panics here").push(entry(unit, &looked, 0));
        }
    });
    let parts = needs(&memory);
    let mut machine = HARDWARE.enable(unit, memory, bus, parts).expect("it comes into service");

    let handle = allocate(&mut machine, DISK, 0);
    set(&mut machine, &handle, 0, fixed(1, 0x41));
    set(&mut machine, &handle, 0, fixed(2, 0x52));
    let blocked = remapping(&mut machine).block(&handle, 0).expect("it is in the block");
    machine.invalidate(&blocked);
    set(&mut machine, &handle, 0, fixed(1, 0x41));
    release(&mut machine, handle);
    let handle = allocate(&mut machine, NIC, 0);
    assert_eq!(handle.first(), 0);
    set(&mut machine, &handle, 0, fixed(3, 0x63));

    let seen = seen.lock().expect("no test panics here");
    for words in seen.iter() {
        assert!(words[0] & 1 == 0 || allowed.contains(words), "{words:x?}");
    }
    assert!(allowed.iter().all(|words| seen.contains(words)), "each was seen");
    machine.assert_lawful();
}

/// A unit need not remember entries: one that reads the table for each interrupt sees every store. QEMU's is one.
#[test]
fn an_interrupt_that_moves_is_present_after_every_store() {
    let (unit, memory) = HARDWARE.unit(Config::full());
    let seen = Arc::<Mutex<Vec<[u64; 2]>>>::default();
    let (kept, looked) = (Arc::clone(&seen), memory.clone());
    let bus = Tapped::new(unit, move |unit, moment| {
        if moment == Moment::Published && unit.read64(IRTA) != 0 {
            kept.lock().expect("no test panics here").push(entry(unit, &looked, 0));
        }
    });
    let parts = needs(&memory);
    let mut machine = HARDWARE.enable(unit, memory, bus, parts).expect("it comes into service");
    let handle = allocate(&mut machine, DISK, 0);
    set(&mut machine, &handle, 0, fixed(0, 0x50));
    seen.lock().expect("no test panics here").clear();

    for number in 1..16 {
        set(&mut machine, &handle, 0, fixed(number, 0x50 + number as u8));
    }

    // 2.6: P, V 0x50 + n, DST n; SID 0x20, SVT 1.
    let whole = |n: u64| [1 | (0x50 + n) << 16 | n << 32, 0x4_0020];
    let seen = seen.lock().expect("no test panics here");
    assert!(seen.iter().all(|words| (0..16).any(|n| *words == whole(n))), "{seen:x?}");
    assert!((1..16).all(|n| seen.contains(&whole(n))));
    machine.assert_lawful();
}

#[test]
fn a_unit_that_remembers_absence_is_told_of_what_becomes_present_and_no_other_is() {
    for (config, told) in [(Config::full().with_caching_mode(), 1), (Config::full(), 0)] {
        let mut machine = HARDWARE.machine(config);
        let handle = allocate(&mut machine, DISK, 0);
        let sent = message(&mut machine, &handle, 0);
        assert_eq!(machine.unit.interrupt(DISK, sent), refused(0x22));

        let invalidations = remapping(&mut machine).set(&handle, 0, fixed(1, 0x41)).expect("it can be");
        assert_eq!(invalidations.len(), told);
        machine.invalidate(&invalidations);

        assert_eq!(machine.unit.interrupt(DISK, sent), Ok(arrived(1, 0x41)));
        machine.assert_lawful();
    }
}

#[test]
fn the_last_of_the_table_can_be_taken_and_one_more_is_refused() {
    let mut machine = HARDWARE.machine(Config::full());
    let blocks: Vec<_> = (0..8).map(|_| allocate(&mut machine, DISK, 5)).collect();
    assert_eq!(blocks.iter().map(Handle::first).collect::<Vec<_>>(), [0, 32, 64, 96, 128, 160, 192, 224]);
    for log2 in [0, 5, 8] {
        let none = remapping(&mut machine).allocate(Source::Function(NIC), log2);
        assert!(matches!(none, Err(Error::Exhausted { .. })), "{none:?}");
    }
    set(&mut machine, &blocks[7], 31, fixed(1, 0x41));
    let last = message(&mut machine, &blocks[7], 31);
    assert_eq!(machine.unit.interrupt(DISK, last), Ok(arrived(1, 0x41)));

    for block in blocks {
        release(&mut machine, block);
    }
    for log2 in [9, 16, 17, 63, 64, 255] {
        assert!(remapping(&mut machine).allocate(Source::Function(NIC), log2).is_err(), "{log2}");
    }
    let whole = allocate(&mut machine, NIC, 8);
    assert_eq!((whole.first(), whole.count()), (0, 256));
    machine.assert_lawful();
}

#[test]
fn destinations_are_as_wide_as_the_unit_s_mode() {
    let without = Config { ecap: Config::full().ecap & !(1 << 4), ..Config::full() };
    for (config, extended) in [(Config::full(), true), (without, false)] {
        let mut machine = HARDWARE.machine(config);
        assert_eq!(remapping(&mut machine).is_x2apic(), extended);
        let handle = allocate(&mut machine, DISK, 0);
        let sent = message(&mut machine, &handle, 0);

        let wide = remapping(&mut machine).set(&handle, 0, fixed(0x1234_5678, 0x41));
        assert_eq!(wide.is_ok(), extended);
        machine.invalidate(&wide.unwrap_or_default());
        let expected = if extended { Ok(arrived(0x1234_5678, 0x41)) } else { refused(0x22) };
        assert_eq!(machine.unit.interrupt(DISK, sent), expected, "what was refused changed nothing");

        set(&mut machine, &handle, 0, fixed(0xFE, 0x41));
        assert_eq!(machine.unit.interrupt(DISK, sent), Ok(arrived(0xFE, 0x41)));
        let logical = Interrupt {
            destination: Destination::Logical(0x0F),
            delivery: Delivery::LowestPriority,
            vector: 0x30,
            level: false,
        };
        set(&mut machine, &handle, 0, logical);
        let lowest = Arrived { logical: true, hint: true, delivery: 1, ..arrived(0x0F, 0x30) };
        assert_eq!(machine.unit.interrupt(DISK, sent), Ok(lowest));
        set(&mut machine, &handle, 0, Interrupt { delivery: Delivery::Nmi, ..fixed(1, 0x41) });
        assert_eq!(machine.unit.interrupt(DISK, sent), Ok(Arrived { delivery: 4, ..arrived(1, 0) }));
        machine.assert_lawful();
    }
}

/// XSA-33: sources behind a bridge were compared too laxly.
#[test]
fn a_bridge_sends_for_its_buses_and_a_device_for_its_phantom_functions() {
    for (source, inside, outside) in [
        (Source::Buses { first: 2, last: 5 }, &[0x200, 0x3FF, 0x5FF][..], &[0x1FF, 0x600, 0x20][..]),
        (Source::Phantoms { function: StreamId(0x11), bits: 1 }, &[0x11, 0x15], &[0x10, 0x13, 0x19]),
        (Source::Phantoms { function: StreamId(0x11), bits: 2 }, &[0x11, 0x13, 0x17], &[0x10, 0x19]),
        (Source::Phantoms { function: StreamId(0x11), bits: 3 }, &[0x10, 0x17], &[0x0F, 0x18]),
        (Source::Function(StreamId(0x11)), &[0x11], &[0x10, 0x15, 0x111]),
    ] {
        let mut machine = HARDWARE.machine(Config::full());
        let handle = remapping(&mut machine).allocate(source, 0).expect("there is room");
        set(&mut machine, &handle, 0, fixed(1, 0x41));
        let sent = message(&mut machine, &handle, 0);

        for &id in inside {
            assert_eq!(
                machine.unit.interrupt(StreamId(id), sent),
                Ok(arrived(1, 0x41)),
                "{source:?} {id:#x}"
            );
        }
        for &id in outside {
            assert_eq!(machine.unit.interrupt(StreamId(id), sent), refused(0x26), "{source:?} {id:#x}");
        }
        machine.assert_lawful();
    }
}

#[test]
fn a_source_that_does_not_exist_takes_nothing() {
    let mut machine = HARDWARE.machine(Config::full());

    for source in [
        Source::Function(StreamId(0x1_0000)),
        Source::Phantoms { function: DISK, bits: 4 },
        Source::Buses { first: 5, last: 2 },
    ] {
        assert!(remapping(&mut machine).allocate(source, 0).is_err());
    }

    assert_eq!(allocate(&mut machine, DISK, 8).first(), 0, "every entry is free");
}

#[test]
fn a_pin_of_an_io_apic_has_the_vector_and_trigger_of_its_entry() {
    const IO_APIC: StreamId = StreamId(0xFF00);
    let mut machine = HARDWARE.machine(Config::full());
    let handle = allocate(&mut machine, IO_APIC, 1);
    let open = Pin { active_low: true, masked: false };
    assert!(remapping(&mut machine).redirection(&handle, 1, open).is_err(), "nothing was set");
    set(&mut machine, &handle, 1, Interrupt { level: true, ..fixed(1, 0x41) });

    let entry = remapping(&mut machine).redirection(&handle, 1, open).expect("it is set");

    // 2.8: V 0x41, active low 1<<13, level 1<<15, remappable 1<<48, index 1<<49.
    assert_eq!(entry, 0x41 | 1 << 13 | 1 << 15 | 1 << 48 | 1 << 49);
    assert_eq!(machine.unit.pin(IO_APIC, entry), Ok(Arrived { level: true, ..arrived(1, 0x41) }));
    assert_eq!(machine.unit.pin(DISK, entry), refused(0x26));
    let masked = Pin { active_low: true, masked: true };
    let masked = remapping(&mut machine).redirection(&handle, 1, masked).expect("it is set");
    assert_eq!(masked ^ entry, 1 << 16);
    machine.assert_lawful();
}

#[test]
fn a_block_is_forgotten_by_one_command_as_far_as_the_unit_s_masks_reach() {
    // ECAP.MHMV: bits 23:20.
    for (limit, log2, expected) in [
        (15, 3, [0x8_1800_0014, 0, 0, 0]),
        (3, 3, [0x8_1800_0014, 0, 0, 0]),
        (2, 3, golden::INTERRUPT_GLOBAL),
        (0, 0, [0x1_0000_0014, 0, 0, 0]),
    ] {
        let config = Config { ecap: Config::full().ecap & !(0xF << 20) | limit << 20, ..Config::full() };
        let mut machine = HARDWARE.machine(config);
        // Counts what was executed.
        machine.unit.resume();
        let _before = allocate(&mut machine, NIC, 0);
        let block = allocate(&mut machine, DISK, log2);
        let last = block.count() as u16 - 1;
        set(&mut machine, &block, last, fixed(1, 0x41));
        let sent = message(&mut machine, &block, last);
        assert_eq!(machine.unit.interrupt(DISK, sent), Ok(arrived(1, 0x41)));
        let before = machine.unit.executed().len();

        release(&mut machine, block);

        assert_eq!(machine.unit.executed()[before], expected, "MHMV {limit}");
        assert_eq!(machine.unit.interrupt(DISK, sent), refused(0x22));
        machine.assert_lawful();
    }
}

/// ACRN 25c0e3817: an index that nobody checked.
#[test]
fn a_handle_of_a_larger_table_reaches_nothing_in_a_smaller_one() {
    let (large, memory) = HARDWARE.unit(Config::full());
    let interrupts = memory.take(2048, 2048);
    let parts = vtd::Memory { interrupts, ..needs(&memory) };
    let mut large = HARDWARE.enable(large, memory, large, parts).expect("it comes into service");
    let mut small = HARDWARE.machine(Config::full());
    let _below = allocate(&mut large, DISK, 8);
    let foreign = allocate(&mut large, DISK, 8);

    assert_eq!(foreign.first(), 256);
    assert!(remapping(&mut small).set(&foreign, 0, fixed(1, 0x41)).is_err());
    assert!(remapping(&mut small).block(&foreign, 0).is_err());
    assert!(remapping(&mut small).message(&foreign, 0).is_err());
}

/// What an entry is to be: whose, and what it raises.
type Oracle = BTreeMap<u16, (StreamId, Option<(u32, u8)>)>;

#[test]
fn whatever_is_done_in_whatever_order_devices_reach_exactly_what_is_set() {
    const DEVICES: [StreamId; 3] = [DISK, NIC, StreamId(0x108)];
    for seed in 0..20 {
        let mut random = Random::new(seed);
        let mut below = |limit: u64| random.below(limit);
        let mut machine = HARDWARE.machine(match seed % 2 {
            0 => Config::full(),
            _ => Config::full().with_caching_mode(),
        });
        let mut oracle = Oracle::new();
        let mut held: Vec<(Handle, StreamId)> = Vec::new();
        for _ in 0..120 {
            match below(4) {
                0 => {
                    let stream = DEVICES[below(3) as usize];
                    let block = remapping(&mut machine).allocate(Source::Function(stream), below(4) as u8);
                    if let Ok(block) = block {
                        for at in 0..block.count() as u16 {
                            let taken = oracle.insert(block.first() + at, (stream, None));
                            assert_eq!(taken, None, "an entry was given twice");
                        }
                        held.push((block, stream));
                    }
                }
                1 if !held.is_empty() => {
                    let (block, _) = held.swap_remove(below(held.len() as u64) as usize);
                    for at in 0..block.count() as u16 {
                        oracle.remove(&(block.first() + at));
                    }
                    release(&mut machine, block);
                }
                2 if !held.is_empty() => {
                    let (block, stream) = &held[below(held.len() as u64) as usize];
                    let number = below(block.count() as u64) as u16;
                    let (id, vector) = (below(1 << 32) as u32, 32 + below(224) as u8);
                    set(&mut machine, block, number, fixed(id, vector));
                    oracle.insert(block.first() + number, (*stream, Some((id, vector))));
                }
                3 if !held.is_empty() => {
                    let (block, stream) = &held[below(held.len() as u64) as usize];
                    let number = below(block.count() as u64) as u16;
                    let blocked = remapping(&mut machine).block(block, number).expect("it is in the block");
                    machine.invalidate(&blocked);
                    oracle.insert(block.first() + number, (*stream, None));
                }
                _ => {}
            }
            let index = below(64) as u16;
            for stream in DEVICES {
                let expected = match oracle.get(&index) {
                    Some(&(owner, Some((id, vector)))) if owner == stream => Ok(arrived(id, vector)),
                    Some((_, Some(_))) => refused(0x26),
                    _ => refused(0x22),
                };
                // 2.8, without SHV: handle 14:0 in 19:5.
                let address = 0xFEE0_0010 | u64::from(index) << 5;
                let sent = machine.unit.interrupt(stream, Message { address, data: 0 });
                assert_eq!(sent, expected, "seed {seed}, index {index}, {stream:?}");
            }
        }
        machine.assert_lawful();
    }
}
