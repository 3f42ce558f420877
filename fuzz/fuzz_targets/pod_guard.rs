//! Packets of a pod; the property is in `tests/properties/`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hextet_properties::pod_guard::holds(data));
