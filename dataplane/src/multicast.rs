//! Multicast groups that devices of the calling thread's network namespace are in.
//!
//! A join is made and kept as an address with `autojoin`. When the device goes down the kernel drops the address
//! and keeps the join, and then refuses to add the address again (`EADDRINUSE`, Linux 6.18). So the membership is
//! what counts, not the address. After such an outage nothing can end the membership any more but the end of the
//! device: teardown leaves it. The kernel's own `proxy_ndp` joins the group for each proxied neighbour, too.

use std::{fs, io, net::Ipv6Addr};

/// Whether `dev` is in `group`.
pub(crate) fn is_member(dev: &str, group: Ipv6Addr) -> io::Result<bool> {
    let groups = fs::read_to_string("/proc/thread-self/net/igmp6")?;
    Ok(groups.lines().any(|line| is_line_of(line, dev, group)))
}

/// Lines read `2    eth0            ff0200000000000000000001ffabcdef     1 00000004 0`.
fn is_line_of(line: &str, dev: &str, group: Ipv6Addr) -> bool {
    let mut words = line.split_whitespace().skip(1);
    words.next() == Some(dev) && words.next() == Some(&format!("{:032x}", group.to_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_names_its_device_and_group() {
        let line = "2    eth0            ff0200000000000000000001ffabcdef     1 00000004 0";
        let group = "ff02::1:ffab:cdef".parse().unwrap();
        assert!(is_line_of(line, "eth0", group));
        assert!(!is_line_of(line, "eth1", group));
        assert!(!is_line_of(line, "eth0", "ff02::1:ffab:cde0".parse().unwrap()));
        assert!(!is_line_of("", "eth0", group));
    }
}
