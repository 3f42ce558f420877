//! From a pod to a host on the IPv4 internet: Hextet's masquerade, the kernel's (nftables), and plain
//! forwarding without translation.

use anyhow::{Context, Result};
use hextet_tests::topology::Place;

use crate::{
    Bench,
    pods::{self, load},
    report::OURS,
    traffic::Path,
};

const TABLE: &str = "pod to an IPv4 host";

/// Measures all four loads on the three paths.
pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    let all = pods::pods(bench)?;
    let from = all.iter().find(|pod| pod.node == "n1").context("no pod on n1")?;
    let wan = Place::Wan.addresses().expect("wan has addresses").v4.into();
    let (cluster, by_hand) = (&bench.cluster, &bench.by_hand);
    let beyond = |testbed: &hextet_tests::Testbed| testbed.netns("wan");
    let paths = [
        (OURS, Path { from: cluster.netns(&from.id), to: beyond(cluster), address: wan }),
        ("nftables", Path { from: by_hand.pod(0), to: beyond(&by_hand.testbed), address: wan }),
        ("not translated", Path { from: by_hand.pod(1), to: beyond(&by_hand.testbed), address: wan }),
    ];
    load(bench, TABLE, &paths)
}
