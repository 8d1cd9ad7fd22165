//! A storm of unrecoverable faults, on either unit, and a hypervisor that does what the broker says: the device is warned of,
//! then blocked and silenced, and costs nobody anything any more.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use broker::{DeviceId, FaultLimits, Ledger, Limits, Owner, Policy, Restraint};
use hosted::{
    Hardware, Machine as Vtd,
    smmu::{Machine as Smmu, StreamTable},
};
use iommu::{Event, Features, GroupTag, Iova, Leaving, PageRequest, Perms, StreamId, Tables};
use models::{smmuv3, vtd};

const DISK: StreamId = StreamId(0x20);
const NIC: StreamId = StreamId(0x28);
const HERE: Iova = Iova(0x4000_0000);
const LIMITS: FaultLimits = FaultLimits { period_us: 100_000, warn: 50, block: 300 };
/// Reads of a device between two passes: more than either unit has room to record.
const BURST: usize = 200;

/// A unit in service, with what the test does to it.
trait Unit {
    /// Gives `stream` tables of its own, in which everything is blocked.
    fn assign(&mut self, stream: StreamId);
    /// The device reads, and is refused.
    fn refused_read(&self, stream: StreamId);
    /// The device asks for a page.
    fn ask(&self, request: PageRequest) -> bool;
    fn pass(&mut self) -> Vec<Event>;
    fn block(&mut self, stream: StreamId) -> Leaving;
    fn silence(&mut self, stream: StreamId);
    fn finish(&mut self, leaving: Leaving);
}

macro_rules! unit {
    ($machine:ty, $driver:ident, $queued:path) => {
        impl Unit for $machine {
            fn assign(&mut self, stream: StreamId) {
                let all = Features { device_tlb: true, page_requests: true, pasid: true };
                self.assign(stream, all);
            }
            fn refused_read(&self, stream: StreamId) {
                assert!(self.read(stream, None, HERE).is_err());
            }
            fn ask(&self, request: PageRequest) -> bool {
                self.unit.page_request(request) == $queued
            }
            fn pass(&mut self) -> Vec<Event> {
                self.pass()
            }
            fn block(&mut self, stream: StreamId) -> Leaving {
                let (leaving, invalidations) = self.$driver.tables.block(stream).expect("it is assigned");
                self.invalidate(&invalidations);
                leaving
            }
            fn silence(&mut self, stream: StreamId) {
                let invalidations = self.$driver.tables.silence(stream).expect("it is blocked");
                self.invalidate(&invalidations);
            }
            fn finish(&mut self, leaving: Leaving) {
                self.$driver.tables.finish(leaving);
            }
        }
    };
}

unit!(Vtd, vtd, vtd::Requested::Queued);
unit!(Smmu, smmu, smmuv3::Requested::Queued);

/// A hypervisor, as far as it deals with faults.
struct Host<U> {
    unit: U,
    ledger: Ledger<1, 8, 8, 8>,
    disk: DeviceId,
    nic: DeviceId,
    /// The device of the last fault.
    last: Option<StreamId>,
    /// What the devices were held to, with the faults and losses seen until then.
    told: Vec<(StreamId, Restraint, u64)>,
    faults: u64,
    losses: u64,
    requests: Vec<PageRequest>,
    now_us: u64,
}

impl<U: Unit> Host<U> {
    fn new(mut unit: U) -> Self {
        let ledger = Ledger::new(127);
        let queue = ledger.open(Owner::Guest(1)).expect("there is one");
        let mut add = |stream, name| {
            unit.assign(stream);
            let limits = Limits { faults: LIMITS, ..Limits::with_requests(8) };
            let device = ledger.add_device(stream, &limits).expect("there is room");
            let policy = Policy { stream, requests: None.into(), device, queue, name, opaque: 7 };
            ledger.attach(&policy).expect("there is room");
            device
        };
        let (disk, nic) = (add(DISK, 1), add(NIC, 2));
        let (told, requests) = (Vec::new(), Vec::new());
        Self { unit, ledger, disk, nic, last: None, told, faults: 0, losses: 0, requests, now_us: 1 << 40 }
    }

    /// The service core's pass.
    fn service(&mut self) {
        self.now_us += 100;
        for event in self.unit.pass() {
            let (stream, restraint) = match event {
                Event::Fault(fault) => {
                    self.faults += 1;
                    self.last = Some(fault.stream);
                    let faulted = self.ledger.faulted(fault.stream, fault.pasid, self.now_us);
                    let faulted = faulted.expect("it is attached");
                    assert_eq!(faulted.owner, (0, fault.stream.0 / 8 - 3, 7));
                    (fault.stream, faulted.restraint)
                }
                Event::FaultsLost => {
                    self.losses += 1;
                    let Some(stream) = self.last.take() else { continue };
                    (stream, self.ledger.device_faulted(stream, self.now_us).expect("it is there"))
                }
                Event::PageRequest(request) => {
                    self.requests.push(request);
                    continue;
                }
                other => panic!("{other:?}"),
            };
            if let Some(restraint) = restraint {
                self.told.push((stream, restraint, self.faults + self.losses));
            }
        }
    }
}

/// `heard_unassigned`: the unit remembers nothing of what is not there.
fn a_storm_ends(unit: impl Unit, heard_unassigned: bool) {
    let mut host = Host::new(unit);
    let tag = GroupTag { pasid: None, index: 1 };
    let request = PageRequest { stream: NIC, tag, iova: HERE, perms: Perms::READ, last: true };
    assert!(host.unit.ask(request));
    let mut passes = 0;
    while host.ledger.restraint(host.disk) != Restraint::Blocked {
        (0..BURST).for_each(|_| host.unit.refused_read(DISK));
        host.service();
        passes += 1;
        assert!(passes < 1_000, "the storm goes on");
    }
    assert!(host.losses > 0, "there was room for every fault");
    assert_eq!(host.requests, [request], "the neighbour's request is there");
    // By exactly so many; what was recorded in the same pass came behind.
    let expected = [(DISK, Restraint::Warned, 50), (DISK, Restraint::Blocked, 300)];
    assert_eq!(host.told, expected);
    assert!(host.faults + host.losses < 300 + 128, "{} faults, {} losses", host.faults, host.losses);
    let tally = host.ledger.tally(host.disk).expect("it is there");
    assert_eq!(tally.faults, host.faults + host.losses);
    assert_eq!(host.ledger.restraint(host.nic), Restraint::None);

    // It goes on meanwhile, so that the unit remembers what it was until each step is done.
    host.unit.refused_read(DISK);
    let leaving = host.unit.block(DISK);
    host.unit.refused_read(DISK);
    host.unit.silence(DISK);
    host.service();
    let (faults, losses) = (host.faults, host.losses);
    for _ in 0..10 {
        (0..BURST).for_each(|_| host.unit.refused_read(DISK));
        host.unit.refused_read(NIC);
        host.service();
    }
    assert_eq!((host.faults, host.losses), (faults + 10, losses), "the neighbour's ten are all there is");
    assert_eq!(host.ledger.tally(host.nic).map(|tally| tally.faults), Some(10));
    assert_eq!(host.told, expected, "and nobody is told again");

    // It is given back, and reset.
    host.ledger.quiesce_device(host.disk);
    host.unit.finish(leaving);
    host.ledger.resume_device(host.disk);
    assert_eq!(host.ledger.restraint(host.disk), Restraint::None);
    let before = host.faults;
    if heard_unassigned {
        host.unit.refused_read(DISK);
        host.service();
        assert_eq!(host.faults, before + 1, "it is heard although it is nobody's");
    }
    host.unit.assign(DISK);
    (0..2).for_each(|_| host.unit.refused_read(DISK));
    host.service();
    assert_eq!(host.faults, before + 2 + u64::from(heard_unassigned));
    assert_eq!(host.ledger.restraint(host.disk), Restraint::None);
    assert_eq!(host.told, expected);
}

#[test]
fn a_storm_of_faults_is_silenced_on_vtd_within_so_many_records_and_heard_again_after_a_reset() {
    a_storm_ends(Vtd::new(vtd::Config::full()), true);
    a_storm_ends(Vtd::new(vtd::Config::full().with_caching_mode()), false);
}

#[test]
fn a_storm_of_faults_is_silenced_on_smmuv3_within_so_many_records_and_heard_again_after_a_reset() {
    a_storm_ends(Hardware::Prompt.smmu(StreamTable::Linear, smmuv3::Config::full()), false);
    a_storm_ends(Hardware::Prompt.smmu(StreamTable::TwoLevels, smmuv3::Config::full()), false);
}
