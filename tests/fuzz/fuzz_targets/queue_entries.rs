//! Entries of the queues of both units.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hosted::fuzz::queue_entries(data));
