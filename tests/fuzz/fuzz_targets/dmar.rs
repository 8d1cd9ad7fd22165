//! The ACPI table `DMAR`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hosted::fuzz::dmar(data));
