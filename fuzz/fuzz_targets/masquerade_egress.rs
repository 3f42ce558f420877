//! Packets that leave by the uplink; the property is in `tests/properties/`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hextet_properties::masquerade::egress_holds(data));
