//! A kernel made of sets: applies operations to an [`Observed`] and panics where the kernel would refuse.

use super::*;

pub(super) struct Model(Observed);

impl Model {
    pub(super) fn apply(observed: &Observed, ops: &[Op]) -> Observed {
        let mut model = Self(observed.clone());
        for op in ops {
            model.one(op);
        }
        model.0
    }

    fn one(&mut self, op: &Op) {
        let pod = op.pod.as_deref();
        match &op.action {
            Action::ProtocolRegister => self.0.protocol_name = ProtocolName::Ours,
            Action::ProtocolUnregister => self.0.protocol_name = ProtocolName::Missing,
            Action::SysctlSet { key, value } => self.set_sysctl(op, key, value),
            Action::SysctlRestore { key, value } => self.restore_sysctl(key, value),
            Action::NetnsAdd => {
                let taken = self.0.pods.insert(pod.unwrap().to_owned(), ObservedPod::default());
                assert_eq!(taken, None, "{op}");
            }
            Action::NetnsDelete => {
                let gone = self.0.pods.remove(pod.unwrap()).expect("deleted namespace must exist");
                assert_eq!(gone.eth0, None, "{op}: its link must go first");
            }
            Action::LinkAdd { dev, host_mac, pod_mac, mtu_bytes } => {
                self.add_link(pod.unwrap(), dev, *host_mac, *pod_mac, *mtu_bytes);
            }
            Action::LinkSet { dev, link } => self.set_link(op, dev, link),
            Action::LinkDelete { dev } => {
                assert!(self.0.links.contains_key(dev), "{op}");
                self.0.remove_link(dev);
            }
            Action::LoopbackUp => self.0.pods.get_mut(pod.unwrap()).unwrap().lo_up = true,
            Action::AddressAdd(address) => {
                self.stack(op).addresses.insert(address.clone());
            }
            Action::AddressDelete(address) => assert!(self.stack(op).addresses.remove(address), "{op}"),
            Action::RouteAdd(route) => {
                let routes = &mut self.stack(op).routes;
                assert!(routes.iter().all(|other| other.key() != route.key()), "{op}: exists");
                routes.insert(route.clone());
            }
            Action::RouteReplace(route) => {
                let routes = &mut self.stack(op).routes;
                routes.retain(|other| other.key() != route.key());
                routes.insert(route.clone());
            }
            Action::RouteDelete(route) => assert!(self.stack(op).routes.remove(route), "{op}"),
            Action::NeighbourSet(neighbour) => {
                let neighbours = &mut self.stack(op).neighbours;
                neighbours.retain(|n| (&n.dev, n.address) != (&neighbour.dev, neighbour.address));
                neighbours.insert(neighbour.clone());
            }
            Action::NeighbourDelete(neighbour) => {
                assert!(self.stack(op).neighbours.remove(neighbour), "{op}")
            }
            Action::ProxyAdd { dev, address } => {
                self.0.proxies.insert((dev.clone(), *address));
            }
            Action::ProxyDelete { dev, address } => {
                assert!(self.0.proxies.remove(&(dev.clone(), *address)), "{op}");
            }
            Action::NftSet(table) => self.0.nft = Some(table.clone()),
            Action::NftExitSet(table) => self.0.nft_exit = Some(table.clone()),
            Action::NftExitDelete => assert!(self.0.nft_exit.take().is_some(), "{op}"),
            Action::NftDelete => assert!(self.0.nft.take().is_some(), "{op}"),
            _ => self.change_bpf(op),
        }
    }

    fn change_bpf(&mut self, op: &Op) {
        let links = &self.0.links;
        let bpf = self.0.bpf.as_mut().expect("the plan must not use BPF where there is none");
        // Loading the object pins its maps: whatever changes BPF leaves something pinned.
        bpf.pinned = op.action != Action::Unpin;
        match &op.action {
            Action::Attach { program, dev } => {
                assert!(dev == "eth0" || links.contains_key(dev), "{op}: no such device");
                bpf.attachments.insert((*program, dev.clone()));
            }
            Action::Detach { program, dev } => {
                // With its device a program has gone, and only its pin is left.
                let had = bpf.attachments.remove(&(*program, dev.clone()));
                assert!(had || !links.contains_key(dev), "{op}");
            }
            Action::NdpSet { address, mac } => {
                bpf.ndp.insert(*address, *mac);
            }
            Action::NdpDelete { address } => assert!(bpf.ndp.remove(address).is_some(), "{op}"),
            Action::GuardSet { dev, guard } => {
                assert!(links.contains_key(dev), "{op}: no such device");
                bpf.guards.insert(dev.clone(), *guard);
            }
            Action::GuardDelete { dev } => assert!(bpf.guards.remove(dev).is_some(), "{op}"),
            Action::MasqueradeSet(masquerade) => bpf.masquerade = Some(masquerade.clone()),
            Action::MasqueradeDelete => assert!(bpf.masquerade.take().is_some(), "{op}"),
            Action::Unpin => assert_eq!(*bpf, ObservedBpf::default(), "{op}: all must be gone"),
            _ => unreachable!("{op} is not about BPF"),
        }
    }

    /// Where an object goes; its device must be there and, for routes and neighbours, up.
    fn stack(&mut self, op: &Op) -> &mut Stack {
        match op.place {
            Place::Host => {
                let dev = dev_of(&op.action);
                let up = |dev: &str| dev == "eth0" || self.0.links.get(dev).is_some_and(|link| link.up);
                assert!(op.removes() || dev.is_none_or(up), "{op}: device must be up");
                &mut self.0.host
            }
            Place::Pod => {
                let pod = self.0.pods.get_mut(op.pod.as_deref().unwrap()).expect("namespace must exist");
                assert!(pod.eth0.as_ref().is_some_and(|eth0| eth0.up), "{op}: eth0 must be up");
                &mut pod.stack
            }
        }
    }

    fn set_sysctl(&mut self, op: &Op, key: &str, value: &str) {
        if op.pod.is_none() {
            let old = self.0.host.sysctls.get(key).expect("a sysctl that is set must exist").clone();
            self.0.journal.entry(key.to_owned()).or_insert(old);
        }
        if op.pod.is_none() && key == ALL_FORWARDING {
            self.journal_and_set_forwarding(value);
        }
        let stack = match op.place {
            Place::Host => &mut self.0.host,
            Place::Pod => &mut self.0.pods.get_mut(op.pod.as_deref().unwrap()).unwrap().stack,
        };
        stack.sysctls.insert(key.to_owned(), value.to_owned());
    }

    fn journal_and_set_forwarding(&mut self, value: &str) {
        let forwarding = self.0.host.sysctls.iter_mut().filter(|(key, _)| is_ipv6_forwarding(key));
        for (key, current) in forwarding {
            self.0.journal.entry(key.clone()).or_insert(current.clone());
            *current = value.to_owned();
        }
    }

    fn restore_sysctl(&mut self, key: &str, value: &str) {
        if key == ALL_FORWARDING {
            let forwarding = self.0.host.sysctls.iter_mut().filter(|(key, _)| is_ipv6_forwarding(key));
            forwarding.for_each(|(_, current)| *current = value.to_owned());
        }
        assert_eq!(self.0.journal.remove(key).as_deref(), Some(value));
        self.0.host.sysctls.insert(key.to_owned(), value.to_owned());
    }

    fn add_link(&mut self, id: &str, dev: &str, host_mac: Mac, pod_mac: Mac, mtu_bytes: u32) {
        let link = |mac| Link { mac, mtu_bytes, up: false, addrgen_none: false, alias: None };
        let taken =
            self.0.links.insert(dev.to_owned(), Link { alias: Some(id.to_owned()), ..link(host_mac) });
        assert_eq!(taken, None, "{dev} exists");
        let pod = self.0.pods.get_mut(id).expect("namespace must exist");
        assert_eq!(pod.eth0.replace(link(pod_mac)), None, "eth0 exists in {id}");
    }

    fn set_link(&mut self, op: &Op, dev: &str, link: &Link) {
        let target = match op.place {
            Place::Host => self.0.links.get_mut(dev),
            Place::Pod => self.0.pods.get_mut(op.pod.as_deref().unwrap()).unwrap().eth0.as_mut(),
        };
        *target.unwrap_or_else(|| panic!("{op}: no such link")) = link.clone();
    }
}

fn dev_of(action: &Action) -> Option<&str> {
    match action {
        Action::RouteAdd(route) | Action::RouteReplace(route) => route.dev(),
        Action::NeighbourSet(neighbour) => Some(&neighbour.dev),
        Action::AddressAdd(address) => Some(&address.dev),
        _ => None,
    }
}
