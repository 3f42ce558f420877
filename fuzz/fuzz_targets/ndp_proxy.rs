//! Neighbour solicitations on the uplink; the property is in `tests/properties/`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| hextet_properties::ndp_proxy::holds(data));
