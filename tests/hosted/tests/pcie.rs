//! The configuration-space driver against a modelled function that watches the order of its enables.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

use broker::{Ledger, Limits};
use iommu::StreamId;
use models::endpoint::{Abilities, ConfigurationSpace};
use pcie::{Error, Function};

const DISK: StreamId = StreamId(0x20);

fn space(abilities: Abilities) -> (ConfigurationSpace, Function) {
    let space = ConfigurationSpace::new();
    space.add(DISK, abilities);
    let function = Function::find(&space, DISK).expect("it answers");
    (space, function)
}

fn assert_lawful(space: &ConfigurationSpace) {
    assert_eq!(space.violations(), [""; 0]);
}

#[test]
fn page_requests_go_on_and_off_in_the_order_of_the_specification() {
    // Freshly reset, and as firmware or an owner before may have left it.
    for left_enabled in [false, true] {
        let (space, function) = space(Abilities { left_enabled, ..Abilities::FULL });

        for allocation in [32, 1000] {
            let enabled = function.enable_page_requests(&space, allocation, true).expect("it has all three");

            assert_eq!(enabled.allocation, allocation.min(64), "no more than its capacity");
            assert_eq!(enabled.pasid_bits, 20);
            let state = space.enabled(DISK).expect("it is there");
            assert!(state.ats && state.pasid && state.page_requests && !state.bus_master);
            assert_eq!(state.allocation, enabled.allocation);
        }
        function.disable_page_requests(&space);

        let state = space.enabled(DISK).expect("it is there");
        assert!(!state.ats && !state.pasid && !state.page_requests);
        assert_lawful(&space);
    }
}

#[test]
fn a_function_that_still_waits_for_answers_is_refused_and_left_off() {
    let (space, function) = space(Abilities::FULL);
    space.set_waiting(DISK, true);

    assert_eq!(function.enable_page_requests(&space, 32, true), Err(Error::NotStopped { function: DISK }));

    let state = space.enabled(DISK).expect("it is there");
    assert!(!state.page_requests && !state.ats && !state.pasid, "{state:?}");
    assert_lawful(&space);
}

#[test]
fn a_function_that_was_refused_for_good_starts_anew() {
    let (space, function) = space(Abilities::FULL);
    assert!(function.enable_page_requests(&space, 32, true).is_ok());
    space.response_failure(DISK);

    assert!(function.enable_page_requests(&space, 32, true).is_ok());

    assert!(space.enabled(DISK).is_some_and(|state| state.page_requests));
    // Page Request Status at 0x126: Response Failure is bit 0.
    let status = pcie::ConfigSpace::read32(&space, DISK, 0x124) >> 16;
    assert_eq!(status & 1, 0);
    assert_lawful(&space);
}

#[test]
fn a_function_without_one_of_the_three_is_refused_by_its_name() {
    let without_pasid = Abilities { pasid_bits: None, ..Abilities::FULL };
    let without_requests = Abilities { page_requests: None, ..Abilities::FULL };
    for (abilities, name) in [(without_pasid, "PASID"), (without_requests, "PRI")] {
        let (space, function) = space(abilities);

        assert!(!function.has_page_requests());
        let refused = function.enable_page_requests(&space, 32, true);
        let Err(Error::Unsupported { capability, .. }) = refused else { panic!("{refused:?}") };

        assert!(capability.contains(name), "{capability}");
        let state = space.enabled(DISK).expect("it is there");
        assert!(!state.ats && !state.pasid && !state.page_requests);
        assert_lawful(&space);
    }
}

#[test]
fn a_function_that_is_taken_out_is_absent_and_neither_on_nor_stopped() {
    let (space, function) = space(Abilities::FULL);
    space.remove(DISK);

    let absent = Error::Absent { function: DISK };
    assert_eq!(function.enable_page_requests(&space, 32, true), Err(absent));
    assert_eq!(function.enable_ats(&space), Err(absent));
    assert_eq!(function.page_requests_stopped(&space), Err(absent));
    assert_eq!(function.device_tlb(&space), Err(absent));
    function.disable_page_requests(&space);
    function.enable_bus_master(&space);
    assert_eq!(Function::find(&space, DISK), None);
}

#[test]
fn page_requests_have_stopped_once_they_are_off_and_all_answered() {
    let (space, function) = space(Abilities::FULL);
    assert_eq!(function.page_requests_stopped(&space), Ok(true), "freshly reset");
    assert!(function.enable_page_requests(&space, 32, true).is_ok());
    space.set_waiting(DISK, true);

    assert_eq!(function.page_requests_stopped(&space), Ok(false), "on");
    function.disable_page_requests_alone(&space);
    assert_eq!(function.page_requests_stopped(&space), Ok(false), "off, and owed answers");
    space.set_waiting(DISK, false);
    assert_eq!(function.page_requests_stopped(&space), Ok(true));
    assert_lawful(&space);
}

#[test]
fn ats_goes_on_alone() {
    let (space, function) = space(Abilities { left_enabled: true, ..Abilities::FULL });

    assert_eq!(function.enable_ats(&space), Ok(()));

    let state = space.enabled(DISK).expect("it is there");
    assert!(state.ats && !state.pasid && !state.page_requests, "{state:?}");
    assert_lawful(&space);
}

#[test]
fn an_invalidate_queue_depth_of_zero_is_32() {
    for (field, depth) in [(0, 32), (1, 1), (31, 31)] {
        let (space, function) = space(Abilities { invalidate_queue_depth: field, ..Abilities::FULL });

        let tlb = function.device_tlb(&space).expect("it has one");

        assert_eq!((tlb.invalidate_queue_depth, tlb.physical), (depth, DISK));
        assert!(tlb.page_aligned && !tlb.global_invalidate);
    }
}

#[test]
fn what_functions_may_have_outstanding_fits_the_queue_while_the_ledger_takes_them() {
    // A queue of 127 entries; each function asks for 15 page requests, and has as many stop markers.
    const ENTRIES: u32 = 127;
    let ledger: Ledger<1, 64, 16, 16> = Ledger::new(ENTRIES);
    let space = ConfigurationSpace::new();
    let mut outstanding = 0;
    let mut taken = 0;
    for id in (0..10).map(|device| StreamId(device << 3)) {
        // The third has fewer than were asked for.
        let page_requests = Some(if id.0 == 0x10 { 4 } else { 64 });
        space.add(id, Abilities { page_requests, ..Abilities::FULL });
        let function = Function::find(&space, id).expect("it answers");
        if ledger.add_device(id, &Limits::with_requests(15)).is_err() {
            continue;
        }
        taken += 1;
        outstanding += function.enable_page_requests(&space, 15, true).expect("it has all three").allocation;
    }

    assert_eq!((taken, outstanding), (4, 3 * 15 + 4), "four times 2 x 15 fit 127, five times do not");
    assert!(2 * outstanding <= ENTRIES);
    assert_lawful(&space);
}
