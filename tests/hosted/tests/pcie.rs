//! The configuration-space driver against a modelled function that watches the order of its enables.
#![expect(clippy::expect_used, reason = "a test that is surprised has failed")]

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
fn a_function_that_is_taken_out_does_no_harm() {
    let (space, function) = space(Abilities::FULL);
    space.remove(DISK);

    // All ones is not "stopped", nor anything else: what counts is that it ends, and says something.
    let _ = function.enable_page_requests(&space, 32, true);
    function.disable_page_requests(&space);
    function.enable_bus_master(&space);
    assert_eq!(Function::find(&space, DISK), None);
}
