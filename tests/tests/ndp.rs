//! What an agent says of its pods on the LAN, and what it hears there. The rest of neighbour discovery is tested
//! below the agent, in `dataplane/tests/ndp.rs`.

use std::time::Duration;

use anyhow::{Result, ensure};
use hextet_tests::capture::{Capture, Packet};
use hextet_tests::frame::{self, Frame};
use hextet_tests::scenario::{BUSYBOX, Needs, TCPDUMP, check, scenario};
use hextet_tests::wait::wait_until;
use hextet_tests::{Options, Pod, Testbed, jobs};

const NEEDS: Needs = Needs { programs: &[BUSYBOX, TCPDUMP] };
const SOON: Duration = Duration::from_secs(20);
/// RFC 4861 section 10.
const MAX_NEIGHBOR_ADVERTISEMENT: usize = 3;

#[test]
fn an_agent_announces_its_pods_ebpf() {
    run_with("an_agent_announces_its_pods_ebpf", "ebpf");
}

#[test]
fn an_agent_announces_its_pods_kernel() {
    run_with("an_agent_announces_its_pods_kernel", "kernel");
}

fn run_with(name: &str, ndp: &str) {
    let node_args = vec!["--ndp".into(), ndp.into()];
    scenario(name, NEEDS, Options { nodes: 1, node_args, ..Options::default() }, run);
}

fn run(testbed: &Testbed) -> Result<()> {
    let client = testbed.netns("client");
    let unsolicited = "icmp6 and ip6[40] == 136 and dst host ff02::1";
    let heard = Capture::start(&client, "eth0", unsolicited)?;
    let pods = check("a new pod is announced to its neighbours three times", || {
        testbed.apply(&jobs::hello(1))?;
        let pods = testbed.wait_running("hello", 1, SOON)?;
        heard.wait_packets(SOON, MAX_NEIGHBOR_ADVERTISEMENT, |packet| overrides(packet, &pods[0]))?;
        Ok(pods)
    })?;
    let agent = testbed.agent("n1");
    check("an agent that is killed and started again announces nothing", || {
        agent.kill9()?;
        agent.start_until_ready()?;
        // Whatever the new one had to say it would say before it answers for another pod.
        testbed.apply(&jobs::hello(2))?;
        let all = testbed.wait_running("hello", 2, SOON)?;
        let new = all.iter().find(|pod| pod.id != pods[0].id).expect("there are two");
        heard.wait_packets(SOON, MAX_NEIGHBOR_ADVERTISEMENT, |packet| overrides(packet, new))?;
        let old = heard.packets()?.iter().filter(|packet| overrides(packet, &pods[0])).count();
        ensure!(old == MAX_NEIGHBOR_ADVERTISEMENT, "the first pod was announced {old} times");
        Ok(())
    })?;
    check("an agent says who claims a pod's address", || {
        let mac = frame::mac_of(&client, "eth0")?;
        let claim = Frame::claim(mac, "2001:db8:1::100".parse()?, pods[0].address());
        frame::send(&client, "eth0", &[claim.bytes()])?;
        wait_until(SOON, "a line in the agent's log", || {
            agent.log().lines().any(|line| {
                line.contains("is claimed by another host") && line.contains(&pods[0].address().to_string())
            })
        })?;
        Ok(())
    })
}

/// An advertisement for the pod with O=1.
fn overrides(packet: &Packet, pod: &Pod) -> bool {
    const FLAGS: usize = 58;
    const TARGET: usize = 62;
    let Some(bytes) = packet.bytes.get(..TARGET + 16) else { return false };
    bytes[FLAGS] & 0x20 != 0 && bytes[TARGET..] == pod.address().octets()
}
