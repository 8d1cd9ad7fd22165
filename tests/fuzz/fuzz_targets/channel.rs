//! A guest's consumer page, and what the hypervisor shows meanwhile.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hosted::fuzz::channel(data));
