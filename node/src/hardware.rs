//! Which hardware this node runs on: what stays the same when the machine boots again, and a copy of its disk does not have.
//!
//! # Source
//! The firmware's UUID as Linux shows it (SMBIOS 3.6 section 7.2.1), and the MAC address of the uplink: some boards have
//! the same UUID as others of their kind, or none.

use std::fs;

use dataplane_core::Mac;

/// Root alone can read it.
const UUID_FILE: &str = "/sys/class/dmi/id/product_uuid";
const UUID_LEN_MAX: usize = 64;

/// Names the hardware; empty when there is nothing to tell it by.
pub(crate) fn hardware(uplink: Mac) -> String {
    name(&fs::read_to_string(UUID_FILE).unwrap_or_default(), uplink)
}

fn name(uuid: &str, uplink: Mac) -> String {
    if uplink == Mac([0; 6]) {
        return String::new();
    }
    let uuid: String = uuid.trim().chars().filter(char::is_ascii_graphic).take(UUID_LEN_MAX).collect();
    format!("{}/{uplink}", uuid.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_is_told_by_its_uuid_and_its_mac_address() {
        let mac = Mac([2, 0, 0, 0, 0, 1]);
        assert_eq!(name("4C4C4544-0042\n", mac), "4c4c4544-0042/02:00:00:00:00:01");
        assert_eq!(name("", mac), "/02:00:00:00:00:01");
        assert_eq!(name("4C4C4544-0042\n", Mac([0; 6])), "", "a device without an address is like any other");
        assert!(name(&"x".repeat(1000), mac).len() <= 128);
    }
}
