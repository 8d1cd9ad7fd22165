//! Commands whose completion the unit tells by an event, as `SEV` sends one: whoever waits sleeps, and looks only then.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use hosted::smmu::{COMMANDS, Machine, StreamTable, needs, unit};
use iommu::{Bus, Commands, Completion, FailureCause, Features, Invalidation, PhysAddr, StreamId, Ticket};
use models::smmuv3::{Config, SmmuUnit};
use smmuv3::Found;

const DISK: StreamId = StreamId(0x108);
const NIC: StreamId = StreamId(0x28);
const ALL: Features = Features { device_tlb: true, page_requests: true, pasid: false };
const OF_DISK: Invalidation = Invalidation::Device { stream: DISK, device_tlb: false };
const OF_NIC: Invalidation = Invalidation::Device { stream: NIC, device_tlb: false };
const ASK_DISK: Invalidation = Invalidation::Device { stream: DISK, device_tlb: true };

/// `IDR0.SEV`, `IDR0.MSI`.
const SEV: u32 = 1 << 14;
const MSI: u32 = 1 << 13;

/// `CMD_SYNC` [7:0]: no signal; CS [13:12] = 2 (SIG_SEV), and nothing of a message.
const SYNC: [u64; 2] = [0x46, 0];
const SYNC_EVENT: [u64; 2] = [0x2046, 0];

const CMDQ_BASE: usize = 0x090;
const CMDQ_CONS: usize = 0x09C;

fn config() -> Config {
    let full = Config::full();
    Config { idr0: full.idr0 | SEV, ..full }
}

fn machine(config: Config) -> Machine {
    let (unit, memory) = unit(config);
    let parts = needs(StreamTable::Linear, &memory);
    let mut machine = Machine::enable(unit, memory, unit, parts).expect("it comes into service");
    machine.assign(DISK, ALL);
    machine.assign(NIC, ALL);
    machine
}

fn submit(machine: &mut Machine, invalidation: Invalidation) -> Ticket {
    machine.smmu.commands.submit(&[invalidation]).expect("there is room")
}

/// The last command that the unit consumed.
fn last(unit: &SmmuUnit) -> [u64; 2] {
    *unit.executed().last().expect("bring-up sends some")
}

/// Overwrites the command that is `ahead` of the next to be consumed by one that there is not.
fn spoil(machine: &Machine, ahead: u64) {
    let queue = machine.unit.read64(CMDQ_BASE) & 0x00FF_FFFF_FFFF_FFE0;
    let at = (u64::from(machine.unit.read32(CMDQ_CONS)) + ahead) % COMMANDS as u64;
    machine.memory.device_store(PhysAddr(queue + at * 16), 0xFF).expect("inside");
}

/// A core that waits, with what it knows of events: its event register.
struct Core {
    seen: u64,
}

impl Core {
    /// A core to which no event has come yet.
    fn new(unit: &SmmuUnit) -> Self {
        Self { seen: unit.wakes() }
    }

    /// `WFE`: returns at once if an event came since the last time; else the unit, which is paused, has to send one.
    ///
    /// The service routine runs meanwhile: it helps a queue that stopped.
    fn sleep(&mut self, machine: &mut Machine) {
        while machine.unit.wakes() == self.seen {
            let worked = machine.unit.execute(1) == 1 || !machine.recover().is_empty();
            assert!(worked, "nothing ever ends the sleep");
        }
        self.seen = machine.unit.wakes();
    }

    /// Waits for `ticket`, and looks after events alone.
    fn wait(&mut self, machine: &mut Machine, ticket: Ticket) -> Completion {
        loop {
            match machine.smmu.commands.poll(ticket) {
                Completion::Pending => self.sleep(machine),
                resolved => return resolved,
            }
        }
    }
}

#[test]
fn the_end_of_a_batch_sends_an_event_and_no_other_command_does() {
    let mut machine = machine(config());
    let (before, events) = (machine.unit.executed().len(), machine.unit.wakes());

    let ticket = submit(&mut machine, ASK_DISK);

    let executed = machine.unit.executed();
    let syncs: Vec<_> = executed[before..].iter().filter(|words| words[0] & 0xFF == 0x46).collect();
    assert_eq!(syncs, [&SYNC, &SYNC_EVENT]);
    assert_eq!(last(machine.unit), SYNC_EVENT);
    assert_eq!(machine.unit.wakes() - events, 1);
    assert_eq!(machine.smmu.commands.poll(ticket), Completion::Done);
    machine.assert_lawful();
}

#[test]
fn whoever_looks_only_after_an_event_finds_every_ticket_done() {
    let mut machine = machine(config());
    machine.unit.pause();
    for _ in 0..COMMANDS {
        let mut core = Core::new(machine.unit);
        let ticket = submit(&mut machine, ASK_DISK);

        assert_eq!(core.wait(&mut machine, ticket), Completion::Done);
        assert_eq!(machine.unit.executed().len() as u64, ticket.0, "and no event comes late");
    }
    machine.assert_lawful();
}

#[test]
fn of_two_who_wait_neither_takes_the_event_of_the_other() {
    let mut machine = machine(config());
    machine.unit.pause();
    let mut cores = [Core::new(machine.unit), Core::new(machine.unit)];
    let tickets = [submit(&mut machine, OF_DISK), submit(&mut machine, OF_NIC)];

    // The later one first: it is woken for the earlier ticket as well, and sleeps again.
    for at in [1, 0] {
        assert_eq!(cores[at].wait(&mut machine, tickets[at]), Completion::Done);
    }

    assert_eq!(machine.unit.wakes() - cores[0].seen, 2, "it had no need to sleep");
    machine.assert_lawful();
}

#[test]
fn an_event_that_comes_before_the_sleep_ends_it() {
    let mut machine = machine(config());
    machine.unit.pause();
    let mut core = Core::new(machine.unit);
    let ticket = submit(&mut machine, OF_DISK);
    assert_eq!(machine.smmu.commands.poll(ticket), Completion::Pending);
    machine.unit.execute(usize::MAX);

    core.sleep(&mut machine);

    assert_eq!(machine.smmu.commands.poll(ticket), Completion::Done);
}

#[test]
fn whoever_waits_for_a_command_that_is_refused_is_woken() {
    // The first command of the batch, or its last, which has the event.
    for spoiled in [0, 1] {
        let mut machine = machine(config());
        machine.unit.pause();
        let mut core = Core::new(machine.unit);
        let bad = submit(&mut machine, OF_DISK);
        let behind = submit(&mut machine, OF_NIC);
        spoil(&machine, spoiled);

        assert_eq!(core.wait(&mut machine, bad), Completion::Failed);
        assert!((machine.unit.executed().len() as u64) < behind.0, "by the event of its own batch");
        assert_eq!(core.wait(&mut machine, behind), Completion::Done);
        machine.assert_lawful();
    }
}

#[test]
fn whoever_waits_for_a_device_that_is_silent_is_woken_once_it_is_given_up() {
    let mut machine = machine(config());
    machine.unit.hold_device_tlb(DISK);
    machine.unit.pause();
    let mut core = Core::new(machine.unit);
    let stuck = submit(&mut machine, ASK_DISK);
    machine.unit.execute(usize::MAX);
    assert_eq!(machine.smmu.commands.poll(stuck), Completion::Pending);
    assert_eq!(machine.unit.wakes(), core.seen, "no event before the device is given up");
    machine.unit.advance(60_000);

    assert_eq!(core.wait(&mut machine, stuck), Completion::Failed);
    machine.assert_lawful();
}

#[test]
fn a_queue_that_stopped_sends_no_event_and_every_look_says_failed() {
    let mut machine = machine(config());
    machine.unit.pause();
    let ticket = submit(&mut machine, OF_DISK);
    let events = machine.unit.wakes();
    machine.unit.fail_fetches(true);
    machine.unit.execute(1);

    let causes: Vec<_> = machine.recover().iter().map(|failure| failure.cause).collect();

    assert_eq!(causes, [FailureCause::Stopped]);
    assert_eq!(machine.smmu.commands.poll(ticket), Completion::Failed);
    assert_eq!(machine.unit.wakes(), events, "which is why no sleep may be without an end of its own");
}

#[test]
fn a_message_takes_the_place_of_an_event_and_an_event_that_of_messages_that_are_lost() {
    let with_messages = Config { idr0: config().idr0 | MSI, ..config() };
    let mut machine = machine(with_messages);
    machine.invalidate(&[OF_DISK]);
    assert_eq!((last(machine.unit)[0] >> 12 & 3, machine.unit.wakes()), (1, 0));

    machine.unit.fail_messages(true);
    let _ = submit(&mut machine, OF_DISK);
    machine.recover();
    let mut core = Core::new(machine.unit);
    machine.unit.pause();
    let ticket = submit(&mut machine, OF_DISK);

    assert_eq!(core.wait(&mut machine, ticket), Completion::Done);
    assert_eq!(last(machine.unit), SYNC_EVENT);
    machine.assert_lawful();
}

/// IIDR of MMU-600 r0p2, of which Linux's driver knows that events get lost; of r0p3; of another's part; no SEV at all.
#[test]
fn events_are_asked_for_where_the_unit_has_them_and_they_can_be_relied_on() {
    for (idr0, iidr, wakes) in [
        (config().idr0, 0x4830_243B, false),
        (config().idr0, 0x4830_343B, true),
        (config().idr0, 0x4830_243A, true),
        (config().idr0 & !SEV, 0, false),
        (config().idr0 & !SEV | MSI, 0, false),
    ] {
        let config = Config { idr0, iidr, ..config() };
        assert_eq!(Found::probe(unit(config).0).expect("it is there").wakes(), wakes, "{iidr:#x}");
        let mut machine = machine(config);

        let ticket = submit(&mut machine, ASK_DISK);

        assert_eq!(machine.unit.executed().contains(&SYNC_EVENT), wakes, "{iidr:#x}");
        assert_eq!(machine.unit.wakes() != 0, wakes, "{iidr:#x}");
        assert_eq!(machine.smmu.commands.poll(ticket), Completion::Done);
        machine.assert_lawful();
    }
}

#[test]
fn a_unit_that_wakes_cores_is_stopped_and_taken_over() {
    let Machine { unit, memory, smmu, .. } = machine(config());

    let found = smmu.stop().expect("it stops");

    assert!(found.wakes());
    assert_eq!(last(unit), SYNC_EVENT);
    found.enable(needs(StreamTable::Linear, &memory)).expect("it comes into service again");
    assert_eq!(unit.violations(), [""; 0]);
}
