//! The arguments of hypercalls, and arrays of invalidations.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hosted::fuzz::invalidation(data));
