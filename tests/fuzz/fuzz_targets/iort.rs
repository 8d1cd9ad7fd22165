//! An `IORT` table of firmware.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hosted::fuzz::iort(data));
