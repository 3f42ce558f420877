//! Whether neighbours on a link are there, by what the kernel finds out. Independent of [`crate::Dataplane`], so that
//! nothing that it does delays an answer.

use std::{io, net::Ipv6Addr, time::Duration};

use tokio::time::sleep;

use crate::netlink::{Netlink, NetlinkError, Reachability};

/// A lost frame is not a lost neighbour: it is asked so often.
const SOLICITATIONS: u32 = 3;
/// After each it is looked so often whether it has answered, ...
const LOOKS: u32 = 4;
/// ... after waiting for so long.
const LOOK_AFTER: Duration = Duration::from_millis(33);

/// Asks the kernel for neighbours.
pub struct Neighbours(Netlink);

impl Neighbours {
    /// Opens a socket of its own, in the calling thread's network namespace and on its runtime.
    ///
    /// # Errors
    /// The kernel has no more sockets.
    pub fn open() -> io::Result<Neighbours> {
        Netlink::open().map(Neighbours)
    }

    /// Whether somebody answers for `address` on a device: at once when it does, after 400 ms when it does not. Nothing when
    /// the device has no carrier.
    ///
    /// # Errors
    /// [`NetlinkError`] when there is no such device, or the kernel refuses.
    pub async fn is_there(&self, dev: &str, address: Ipv6Addr) -> Result<Option<bool>, NetlinkError> {
        for _ in 0..SOLICITATIONS {
            self.0.probe_neighbour(dev, address).await?;
            for _ in 0..LOOKS {
                sleep(LOOK_AFTER).await;
                let known = self.0.reachability(dev).await?;
                if known.get(&address) == Some(&Reachability::Reachable) {
                    return Ok(Some(true));
                }
            }
        }
        Ok(self.0.has_carrier(dev).await?.then_some(false))
    }
}
