//! Commands whose completion the unit tells by message: a word of memory, of which nothing says when it comes, or whether.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use hosted::{
    Moment, Random,
    smmu::{COMMANDS, Machine, Stage, StreamTable, Tapped, needs, unit},
};
use iommu::{
    Attachment, Bus, Commands, Completion, DomainId, Error, FailureCause, Features, GroupTag, Invalidation,
    Iova, Outcome, PageResponse, Perms, PhysAddr, Stages, StreamId, Ticket,
};
use models::smmuv3::{Config, SmmuUnit};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

const DISK: StreamId = StreamId(0x108);
const NIC: StreamId = StreamId(0x28);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: false };
const OF_DISK: Invalidation = Invalidation::Device { stream: DISK, device_tlb: false };
const ASK_DISK: Invalidation = Invalidation::Device { stream: DISK, device_tlb: true };

/// `CMD_SYNC` without a signal; and CS = SIG_IRQ, inner shareable, write-back.
const SYNC: [u64; 2] = [0x46, 0];
const SIGNAL: u64 = 0x0FC0_1046;

const GERROR: usize = 0x060;
const GERRORN: usize = 0x064;
const CMDQ_BASE: usize = 0x090;
const CMDQ_CONS: usize = 0x09C;
const MSI_CMDQ_ABT_ERR: u32 = 1 << 4;

/// Longer than the driver waits for a message alone, in microseconds.
const LONG: u64 = 2000;

fn config() -> Config {
    let full = Config::full();
    Config { idr0: full.idr0 | 1 << 13, ..full }
}

/// A machine, where in memory its unit tells what is done, and how many accesses to registers there were.
struct Bench {
    machine: Machine<Tapped>,
    word: PhysAddr,
    accesses: Arc<AtomicUsize>,
}

fn bench_with(config: Config, prepare: fn(&SmmuUnit)) -> Bench {
    let (unit, memory) = unit(config);
    prepare(unit);
    let accesses = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&accesses);
    let bus = Tapped::new(unit, move |_, moment| {
        if matches!(moment, Moment::Access) {
            counted.fetch_add(1, SeqCst);
        }
    });
    let parts = needs(StreamTable::Linear, &memory);
    let word = parts.status.phys();
    let mut machine = Machine::enable(unit, memory, bus, parts).expect("it comes into service");
    machine.assign(DISK, ALL);
    machine.assign(NIC, ALL);
    Bench { machine, word, accesses }
}

fn bench() -> Bench {
    bench_with(config(), |_| ())
}

impl Bench {
    fn submit(&mut self, invalidation: Invalidation) -> Ticket {
        self.machine.smmu.commands.submit(&[invalidation]).expect("there is room")
    }

    fn poll(&mut self, ticket: Ticket) -> Completion {
        self.machine.smmu.commands.poll(ticket)
    }

    /// Returns what `poll` says, and how often it reached for registers.
    fn counted_poll(&mut self, ticket: Ticket) -> (Completion, usize) {
        let before = self.accesses.load(SeqCst);
        let completion = self.poll(ticket);
        (completion, self.accesses.load(SeqCst) - before)
    }

    /// The last command that the unit consumed.
    fn last(&self) -> [u64; 2] {
        *self.machine.unit.executed().last().expect("bring-up sends some")
    }

    /// Overwrites the command that is `ahead` of the next to be consumed by one that there is not.
    fn spoil(&self, ahead: u64) {
        let queue = self.machine.unit.read64(CMDQ_BASE) & 0x00FF_FFFF_FFFF_FFE0;
        let at = (u64::from(self.machine.unit.read32(CMDQ_CONS)) + ahead) % COMMANDS as u64;
        self.machine.memory.device_store(PhysAddr(queue + at * 16), 0xFF).expect("inside");
    }

    /// Takes a message for lost: looks until `ticket` is done.
    fn wait_long(&mut self, ticket: Ticket) {
        assert_eq!(self.poll(ticket), Completion::Pending, "nothing said so");
        self.machine.unit.advance(LONG);
        assert_eq!(self.poll(ticket), Completion::Done);
    }
}

/// What goes into the queue by itself: a page of a device without a TLB.
const PAGE: Invalidation = Invalidation::Pages {
    attachment: Attachment {
        serial: 1,
        stream: NIC,
        pasid: None,
        domain: DomainId(0x2A),
        stages: Stages::First,
        device_tlb: false,
    },
    iova: Iova(0x7000),
    pages: 1,
};

#[test]
fn what_is_done_is_read_from_memory_and_from_no_register() {
    let mut bench = bench();

    for invalidation in [OF_DISK, PAGE].into_iter().cycle().take(3 * COMMANDS) {
        let before = bench.accesses.load(SeqCst);
        let ticket = bench.submit(invalidation);
        assert_eq!(bench.accesses.load(SeqCst) - before, 1, "CMDQ_PROD");
        assert_eq!(bench.counted_poll(ticket), (Completion::Done, 0));
        assert_eq!(bench.last(), [ticket.0 << 32 | SIGNAL, bench.word.0]);
    }

    bench.machine.assert_lawful();
}

#[test]
fn a_unit_whose_messages_do_not_reach_memory_is_asked_for_none() {
    for without in [1 << 13, 1 << 4] {
        let mut bench = bench_with(Config { idr0: config().idr0 & !without, ..config() }, |_| ());

        let ticket = bench.submit(OF_DISK);

        assert_eq!(bench.counted_poll(ticket), (Completion::Done, 1), "CMDQ_CONS");
        assert_eq!((bench.last(), bench.machine.unit.messages()), (SYNC, vec![]));
        bench.machine.assert_lawful();
    }
}

#[test]
fn nothing_is_done_before_its_last_command_is() {
    for hold in [false, true] {
        let mut bench = bench();
        bench.machine.unit.hold_messages(hold);
        bench.machine.unit.pause();
        let first = bench.submit(ASK_DISK);
        let second = bench.submit(Invalidation::Device { stream: NIC, device_tlb: false });

        for _ in 0..12 {
            let executed = bench.machine.unit.executed().len() as u64;
            for ticket in [first, second] {
                let done = bench.poll(ticket) == Completion::Done;
                assert!(!done || executed >= ticket.0, "{executed} {ticket:?}");
                assert!(done || hold || executed < ticket.0, "{executed} {ticket:?}");
            }
            bench.machine.unit.execute(1);
        }

        bench.machine.unit.advance(LONG);
        bench.poll(second);
        assert_eq!(bench.poll(second), Completion::Done);
        bench.machine.assert_lawful();
    }
}

#[test]
fn a_later_message_speaks_for_the_earlier_ones() {
    let mut bench = bench();
    let tickets = [OF_DISK; 5].map(|invalidation| bench.submit(invalidation));

    assert_eq!(bench.counted_poll(tickets[4]), (Completion::Done, 0));
    for ticket in tickets {
        assert_eq!(bench.counted_poll(ticket), (Completion::Done, 0));
    }
}

#[test]
fn a_late_message_holds_up_its_ticket_for_a_while_and_no_register_is_read_until_then() {
    let mut bench = bench();
    bench.machine.unit.hold_messages(true);
    let first = bench.submit(OF_DISK);
    assert_eq!(bench.counted_poll(first), (Completion::Pending, 0));
    // The message of the one before is complete when a `CMD_SYNC` is.
    let second = bench.submit(OF_DISK);
    assert_eq!(bench.counted_poll(first), (Completion::Done, 0));
    assert_eq!(bench.counted_poll(second), (Completion::Pending, 0));

    bench.machine.unit.advance(LONG);

    assert_eq!(bench.counted_poll(second), (Completion::Done, 1), "CMDQ_CONS");
    let third = bench.submit(OF_DISK);
    assert_eq!(bench.last()[0], third.0 << 32 | SIGNAL, "late is not lost");
    bench.machine.unit.hold_messages(false);
    assert_eq!(bench.counted_poll(third), (Completion::Done, 0));
    bench.machine.assert_lawful();
}

#[test]
fn a_late_message_takes_nothing_back() {
    let mut bench = bench();
    bench.machine.unit.hold_messages(true);
    let ticket = bench.submit(OF_DISK);
    bench.wait_long(ticket);

    // The word is behind what CMDQ_CONS said, and then no more.
    assert_eq!(bench.poll(ticket), Completion::Done);
    bench.machine.unit.hold_messages(false);
    assert_eq!(bench.poll(ticket), Completion::Done);
}

#[test]
fn a_message_that_is_lost_is_the_last_once_its_error_was_met() {
    let mut bench = bench();
    bench.machine.unit.fail_messages(true);
    let ticket = bench.submit(OF_DISK);
    assert_eq!(bench.machine.unit.read32(GERROR) ^ bench.machine.unit.read32(GERRORN), MSI_CMDQ_ABT_ERR);

    assert_eq!(bench.machine.recover(), [], "no ticket fails for it");

    assert_eq!(bench.machine.unit.read32(GERROR), bench.machine.unit.read32(GERRORN));
    assert_eq!(bench.counted_poll(ticket), (Completion::Done, 1), "CMDQ_CONS");
    let next = bench.submit(OF_DISK);
    assert_eq!(bench.last(), SYNC);
    assert_eq!(bench.counted_poll(next), (Completion::Done, 1));
    bench.machine.assert_lawful();
}

#[test]
fn of_lost_messages_that_nobody_tells_one_is_waited_for() {
    let mut bench = bench();
    bench.machine.unit.fail_messages(true);
    let first = bench.submit(OF_DISK);
    bench.wait_long(first);

    // The second shows that the first was not late: its `CMD_SYNC` would have completed it.
    let second = bench.submit(OF_DISK);
    assert_eq!(bench.counted_poll(second), (Completion::Done, 1));

    let third = bench.submit(OF_DISK);
    assert_eq!((bench.last(), bench.poll(third)), (SYNC, Completion::Done));
}

#[test]
fn a_unit_whose_messages_are_lost_from_the_start_comes_into_service() {
    let mut bench = bench_with(config(), |unit| unit.fail_messages(true));

    bench.machine.invalidate(&[ASK_DISK]);

    bench.machine.recover();
    bench.machine.assert_lawful();
}

#[test]
fn a_lost_message_keeps_no_device_from_being_asked() {
    let mut bench = bench();
    bench.machine.unit.fail_messages(true);
    let _ = bench.submit(ASK_DISK);
    let again = bench.machine.smmu.commands.submit(&[ASK_DISK]);
    assert!(matches!(again, Err(Error::Busy { .. })), "{again:?}");

    bench.machine.unit.advance(LONG);

    let _ = bench.submit(ASK_DISK);
}

#[test]
fn a_device_that_is_silent_for_longer_than_a_message_may_take_is_not_done() {
    let mut bench = bench();
    bench.machine.unit.hold_device_tlb(DISK);
    let stuck = bench.submit(ASK_DISK);
    let behind = bench.submit(OF_DISK);
    for _ in 0..10 {
        bench.machine.unit.advance(LONG);
        assert_eq!(bench.poll(stuck), Completion::Pending);
        assert_eq!(bench.poll(behind), Completion::Pending);
    }
    bench.machine.unit.advance(60_000);

    let failures = bench.machine.recover();

    assert_eq!(failures.len(), 1);
    assert_eq!((failures[0].stream, failures[0].ticket), (Some(DISK), Some(stuck)));
    // The `CMD_SYNC` is tried again, with its message.
    assert_eq!(bench.counted_poll(stuck).0, Completion::Failed);
    assert_eq!(bench.counted_poll(behind), (Completion::Done, 0));
    bench.machine.assert_lawful();
}

#[test]
fn the_command_in_place_of_a_refused_one_writes_no_message() {
    // The first command of a batch, or its last, which has the message.
    for (spoiled, messages) in [(0, 2), (1, 1)] {
        let mut bench = bench();
        bench.machine.unit.messages();
        bench.machine.unit.pause();
        let bad = bench.submit(OF_DISK);
        let behind = bench.submit(OF_DISK);
        bench.spoil(spoiled);
        bench.machine.unit.resume();

        let failures = bench.machine.recover();

        assert_eq!(failures.len(), 1);
        assert_eq!((failures[0].cause, failures[0].ticket), (FailureCause::Refused, Some(bad)));
        assert_eq!(bench.poll(bad), Completion::Failed);
        assert_eq!(bench.counted_poll(behind), (Completion::Done, 0));
        let written: Vec<u64> =
            bench.machine.unit.messages().iter().map(|message| message.1.into()).collect();
        assert_eq!(written, [bad.0, behind.0][2 - messages..]);
        bench.machine.assert_lawful();
    }
}

#[test]
fn which_command_was_refused_is_known_without_messages() {
    let mut bench = bench();
    bench.machine.unit.hold_messages(true);
    bench.machine.unit.pause();
    let [done, bad, behind] = [OF_DISK; 3].map(|invalidation| bench.submit(invalidation));
    bench.spoil(2);
    bench.machine.unit.resume();

    let failures = bench.machine.recover();

    assert_eq!(failures.iter().map(|failure| failure.ticket).collect::<Vec<_>>(), [Some(bad)]);
    assert_eq!(bench.poll(done), Completion::Done);
    assert_eq!(bench.poll(bad), Completion::Failed);
    bench.machine.unit.hold_messages(false);
    assert_eq!(bench.poll(behind), Completion::Done);
}

#[test]
fn of_a_queue_that_stopped_what_was_done_is_done_and_nothing_else() {
    // It cannot be read; service failure mode (SFM_ERR).
    let stops: [fn(&SmmuUnit); 2] = [|unit| unit.fail_fetches(true), |unit| unit.raise_errors(1 << 8)];
    for stop in stops {
        let mut bench = bench();
        bench.machine.unit.hold_messages(true);
        let done = bench.submit(OF_DISK);
        bench.machine.unit.pause();
        let never = bench.submit(OF_DISK);
        stop(bench.machine.unit);
        bench.machine.unit.execute(1);

        let causes: Vec<_> = bench.machine.recover().iter().map(|failure| failure.cause).collect();

        assert_eq!(causes, [FailureCause::Stopped]);
        assert_eq!(bench.poll(done), Completion::Done);
        assert_eq!(bench.poll(never), Completion::Failed);
    }
}

#[test]
fn a_word_that_no_message_wrote_is_not_believed() {
    let mut bench = bench();
    bench.machine.unit.pause();
    let ticket = bench.submit(OF_DISK);
    let past = ticket.0 as u32;

    for garbage in [past + 1, past + 100, past | 1 << 31, u32::MAX, 0] {
        bench.machine.memory.device_store32(bench.word, garbage).expect("inside");
        assert_eq!(bench.poll(ticket), Completion::Pending, "{garbage:#x}");
    }

    bench.machine.unit.resume();
    assert_eq!(bench.counted_poll(ticket), (Completion::Done, 0));
}

#[test]
fn what_a_part_writes_beside_its_message_is_not_looked_at() {
    let mut bench = bench();
    let ticket = bench.submit(OF_DISK);
    bench.machine.memory.device_store32(PhysAddr(bench.word.0 + 4), 0xFFFF_FFFF).expect("inside");

    assert_eq!(bench.counted_poll(ticket), (Completion::Done, 0));
}

#[test]
fn answers_without_a_message_leave_what_is_done_to_memory() {
    let mut bench = bench();
    let ticket = bench.submit(OF_DISK);
    let tag = GroupTag { pasid: None, index: 7 };
    let response = PageResponse { stream: DISK, tag, outcome: Outcome::Success };
    bench.machine.smmu.commands.respond(response).expect("there is room");

    for _ in 0..3 {
        assert_eq!(bench.counted_poll(ticket), (Completion::Done, 0));
        bench.machine.unit.advance(LONG);
    }
}

#[test]
fn a_page_is_out_of_reach_when_the_message_is_there() {
    let mut bench = bench();
    let here = Iova(0x4_5000);
    for n in 0..10 {
        let tree = bench.machine.tree(Stage::One);
        bench.machine.map(&tree, here, n, Perms::READ);
        let attachment = bench.machine.attach(DISK, Stage::One, &tree);
        assert_eq!(bench.machine.ats_read(DISK, here), Ok(n));
        bench.machine.unmap(&tree, here, 1);
        let ticket = bench.submit(Invalidation::covering(attachment, here, 4096));
        assert_eq!(bench.counted_poll(ticket), (Completion::Done, 0));
        assert!(bench.machine.ats_read(DISK, here).is_err());
        bench.machine.detach(attachment);
    }
    bench.machine.assert_lawful();
}

#[test]
fn nothing_is_written_to_memory_of_a_unit_that_was_stopped() {
    let Bench { mut machine, word, .. } = bench();
    machine.unit.hold_messages(true);
    let _ = machine.smmu.commands.submit(&[OF_DISK]).expect("there is room");

    machine.smmu.stop().expect("it stops");

    machine.memory.device_store(word, 0x5555).expect("inside");
    machine.unit.hold_messages(false);
    assert_eq!(machine.memory.device_load(word), Ok(0x5555));
}

#[test]
fn whatever_becomes_of_messages_every_ticket_is_done_in_time_and_none_early() {
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let mut bench = bench();
        let mut open: Vec<Ticket> = Vec::new();
        for _ in 0..600 {
            let unit = bench.machine.unit;
            match random.below(12) {
                0 => unit.hold_messages(true),
                1 | 2 => unit.hold_messages(false),
                3 if seed % 2 == 0 => unit.fail_messages(random.below(2) == 0),
                4 => unit.pause(),
                5 => unit.resume(),
                6 => drop(unit.execute(random.below(4) as usize)),
                7 => unit.advance(random.below(1500)),
                8 if seed % 4 == 0 => drop(bench.machine.recover()),
                9 | 10 => open.extend(bench.machine.smmu.commands.submit(&[OF_DISK]).ok()),
                _ => {}
            }
            let executed = unit.executed().len() as u64;
            open.retain(|&ticket| {
                let done = bench.machine.smmu.commands.poll(ticket) == Completion::Done;
                assert!(!done || executed >= ticket.0, "{ticket:?} is done early");
                !done
            });
        }
        bench.machine.unit.resume();
        for _ in 0..2 {
            open.retain(|&ticket| bench.machine.smmu.commands.poll(ticket) != Completion::Done);
            bench.machine.unit.advance(LONG);
        }
        assert!(open.is_empty(), "seed {seed}: {open:?}");
        bench.machine.assert_lawful();
    }
}
