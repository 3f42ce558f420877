//! The node's own traffic beside its pods'.

use hextet_conformance::{
    World, each_backend,
    socket::{crosses, exchange, tcp_from, tcp_listen, udp},
    world::{NODE, OTHER_REMOTE, REMOTE},
};

each_backend! {
    a_port_of_the_nodes_own_socket_stays_its_own,
    a_pods_flow_goes_on_when_the_node_takes_its_port,
    the_nodes_own_port_range_is_left_to_it,
    a_service_of_the_node_is_reached,
}

//= RFC 4787 REQ-3
fn a_port_of_the_nodes_own_socket_stays_its_own(world: &World) {
    let remote = udp(&world.net(), (REMOTE, 7));
    let node = udp(&world.node(), (NODE, 5000));
    assert_eq!(exchange(&node, &remote).port(), 5000);
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    let outside = exchange(&pod, &remote);
    assert_ne!(outside.port(), 5000);
    assert_eq!(exchange(&node, &remote).port(), 5000, "the node's flow goes on");
    crosses(&remote, (NODE, outside.port()), &pod, "the pod's goes on, too");
}

//= RFC 4787 REQ-3
fn a_pods_flow_goes_on_when_the_node_takes_its_port(world: &World) {
    let (remote, other) = (udp(&world.net(), (REMOTE, 7)), udp(&world.net(), (OTHER_REMOTE, 7)));
    let pod = udp(&world.pod(1), (World::pod_ipv4(1), 5000));
    let outside = exchange(&pod, &remote);
    let node = udp(&world.node(), (NODE, outside.port()));
    assert_eq!(exchange(&node, &other), outside, "the node's packets are not touched");
    assert_eq!(exchange(&pod, &remote), outside, "nor are the pod's");
}

/// What the kernel gives to the node's own sockets (`ip_local_port_range`).
//= RFC 4787 REQ-3, RFC 5382 REQ-7, RFC 7422 2/reserved
fn the_nodes_own_port_range_is_left_to_it(world: &World) {
    const RANGE: std::ops::RangeInclusive<u16> = 32_768..=60_999;
    let remote = udp(&world.net(), (REMOTE, 7));
    let listener = tcp_listen(&world.net(), (REMOTE, 80));
    for port in [32_768, 40_000, 40_001, 60_999] {
        let outside = exchange(&udp(&world.pod(1), (World::pod_ipv4(1), port)), &remote);
        assert!(!RANGE.contains(&outside.port()), "UDP {port} has {outside}");
        let _pod =
            tcp_from(&world.pod(1), (World::pod_ipv4(1), port), (REMOTE, 80)).expect("the pod connects");
        let outside = listener.accept().expect("the pod's connection").1;
        assert!(!RANGE.contains(&outside.port()), "TCP {port} has {outside}");
    }
}

//= RFC 4787 REQ-11
fn a_service_of_the_node_is_reached(world: &World) {
    let remote = udp(&world.net(), (REMOTE, 7));
    exchange(&udp(&world.pod(1), (World::pod_ipv4(1), 5000)), &remote);
    let service = udp(&world.node(), (NODE, 5353));
    let from = crosses(&remote, (NODE, 5353), &service, "a question");
    crosses(&service, (*from.ip(), from.port()), &remote, "an answer");
    let listener = tcp_listen(&world.node(), (NODE, 22));
    let mut client = tcp_from(&world.net(), (REMOTE, 5000), (NODE, 22)).expect("the remote connects");
    let (mut served, peer) = listener.accept().expect("the remote's connection");
    assert_eq!(peer.to_string(), format!("{REMOTE}:5000"));
    hextet_conformance::socket::carries(&mut client, &mut served);
}
