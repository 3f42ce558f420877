//! Everything that can go wrong, one fault at a time and often several at once.

use rand::{
    Rng as _,
    seq::{IndexedRandom as _, IteratorRandom as _},
};

use crate::{
    clock::Time,
    machine::{Machine, Witness},
    network::{End, Host},
    shared::{Shared, What},
    world::World,
};

/// What ends a fault.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Healing {
    Direction(Host, End),
    /// A machine says of others what is so.
    Witness(usize),
}

impl World {
    pub(crate) fn fail(&mut self) {
        self.shared.figures.faults += 1;
        match self.shared.rng.random_range(0..109) {
            0..=4 => self.server.crash(false, &mut self.shared),
            5..=6 => self.server.crash(true, &mut self.shared),
            7..=9 => self.freeze_server(),
            10..=21 => self.with_machine(|machine, shared| machine.crash(false, shared)),
            22..=27 => self.with_machine(|machine, shared| machine.crash(true, shared)),
            28..=31 => self.freeze_machine(),
            32..=45 => self.cut(),
            46..=55 => self.break_stream(),
            56..=69 => self.lose_process(),
            70..=73 => self.jump_clocks(),
            74..=81 => self.disturb_balancer(),
            82..=89 => self.conflict(),
            90..=93 => self.compact(),
            94..=99 => self.mislead(),
            100..=103 => self.with_machine(|machine, shared| machine.take_down(shared)),
            104..=105 => self.server.back_up(&mut self.shared),
            _ => self.restore(),
        }
    }

    fn with_machine(&mut self, fault: impl FnOnce(&mut Machine, &mut Shared)) {
        let number = self.shared.rng.random_range(0..self.machines.len());
        fault(&mut self.machines[number], &mut self.shared);
    }

    /// Stopped, as by a debugger or a snapshot of its virtual machine.
    fn freeze_server(&mut self) {
        self.server.frozen_until = frozen(&mut self.shared, "server");
    }

    fn freeze_machine(&mut self) {
        self.with_machine(|machine, shared| machine.frozen_until = frozen(shared, &machine.name));
    }

    /// One direction or both, for a moment or for many leases.
    fn cut(&mut self) {
        let host = self.any_host();
        self.cut_off(host);
    }

    fn cut_off(&mut self, host: Host) {
        let ends = [vec![End::Server], vec![End::Client], vec![End::Server, End::Client]];
        let ends = ends.choose(&mut self.shared.rng).cloned().unwrap_or_default();
        let wait = if self.shared.chance(0.5) {
            self.shared.between(50, 3_000)
        } else {
            self.shared.between(3_000, 60_000)
        };
        self.shared.note(format!("{host:?} is cut for {} ms: to {ends:?}", wait.as_millis()));
        for end in ends {
            self.shared.network.cut(host, end);
            self.shared.plan(wait, What::Heal(Healing::Direction(host, end)));
        }
        for stream in self.shared.network.streams_of(host) {
            for end in [End::Server, End::Client] {
                let patience = self.shared.between(10_000, 20_000);
                self.shared.plan(patience, What::GiveUp(stream, end));
            }
        }
    }

    fn any_host(&mut self) -> Host {
        let (machines, balancers) = (self.machines.len(), self.balancers.len());
        let number = self.shared.rng.random_range(0..machines + balancers);
        if number < machines { Host::Node(number) } else { Host::Balancer(number - machines) }
    }

    pub(crate) fn heal(&mut self, healing: Healing) {
        match healing {
            Healing::Direction(host, end) => {
                self.shared.note(format!("{host:?} is reached again: to {end:?}"));
                self.shared.network.heal(host, end);
            }
            Healing::Witness(number) => self.machines[number].witness = Witness::Honest,
        }
    }

    /// A stream is reset, as by a firewall that forgot it.
    fn break_stream(&mut self) {
        let streams = self.shared.network.all();
        let Some(stream) = streams.choose(&mut self.shared.rng).copied() else { return };
        self.shared.note(format!("stream {stream} is reset"));
        self.give_up(stream, End::Server);
        self.give_up(stream, End::Client);
    }

    fn lose_process(&mut self) {
        let supervisor = self.shared.chance(0.4);
        self.with_machine(|machine, shared| {
            let pods: Vec<_> = machine.processes.keys().cloned().collect();
            if let Some(pod) = pods.choose(&mut shared.rng) {
                machine.lose_process(pod, supervisor, shared);
            }
        });
    }

    fn conflict(&mut self) {
        self.with_machine(|machine, shared| {
            let pods: Vec<_> = machine.kernel.keys().cloned().collect();
            if let Some(pod) = pods.choose(&mut shared.rng) {
                machine.lose_address(pod, shared);
            }
        });
    }

    /// The wall clocks of the server and of a machine are set, by minutes or by years.
    fn jump_clocks(&mut self) {
        let by_ms = self.shared.rng.random_range(-40_000_000_000_i64..40_000_000_000);
        self.shared.note(format!("wall clocks jump by {} s", by_ms / 1000));
        self.server.clock.jump(by_ms);
        self.with_machine(|machine, _| machine.clock.jump(-by_ms));
    }

    fn disturb_balancer(&mut self) {
        let number = self.shared.rng.random_range(0..self.balancers.len());
        let balancer = &mut self.balancers[number];
        if self.shared.chance(0.4) {
            balancer.restart(&mut self.shared)
        } else {
            balancer.be_busy(&mut self.shared)
        }
    }

    /// What machines say of each other is late or not so, for a while.
    fn mislead(&mut self) {
        let all = [Witness::Slow, Witness::SeesNobody, Witness::SeesEverybody];
        let witness = all[self.shared.rng.random_range(0..all.len())];
        let few = self.shared.chance(0.5);
        self.shared.note(format!("{} as witnesses: {witness:?}", if few { "some" } else { "all" }));
        let wait = self.shared.between(2_000, 40_000);
        for machine in &mut self.machines {
            if !few || self.shared.chance(0.5) {
                machine.witness = witness;
                self.shared.plan(wait, What::Heal(Healing::Witness(machine.number)));
            }
        }
        // So that there is something to be asked about.
        self.cut();
    }

    /// No node is reached for some seconds, and each says of the others that they are dead: what nobody touches afterwards
    /// must come back by itself.
    pub(crate) fn lose_all_for_a_moment(&mut self) {
        self.shared.note("all are cut, and say of each other that they are dead");
        let wait = self.shared.between(2_000, 4_500);
        for machine in &mut self.machines {
            machine.witness = Witness::SeesNobody;
            self.shared.plan(wait, What::Heal(Healing::Witness(machine.number)));
        }
        for number in 0..self.machines.len() {
            // One after the other, so that there are some to be asked.
            let (begin, wait) = (self.shared.between(0, 2_000), self.shared.between(1_500, 3_000));
            self.shared.plan(begin, What::Cut(Host::Node(number), End::Server));
            self.shared.plan(begin + wait, What::Heal(Healing::Direction(Host::Node(number), End::Server)));
        }
    }

    /// Somebody restores the last backup. A machine that runs what there may only be one of may hear of that late.
    fn restore(&mut self) {
        self.server.restore(&mut self.shared);
        let wait = self.shared.between(50, 2_000);
        self.shared.plan(wait, What::StartServer);
        let runs_single =
            |machine: &&Machine| machine.processes.values().any(|process| process.is_single && process.lives);
        let machine = self.machines.iter().filter(runs_single).choose(&mut self.shared.rng);
        if let Some(number) = machine.map(|machine| machine.number) {
            self.cut_off(Host::Node(number));
        }
    }

    fn compact(&mut self) {
        let behind = self.shared.rng.random_range(0..40);
        let oldest = self.server.disk.revision().saturating_sub(behind);
        self.shared.note(format!("the log is compacted up to {oldest}"));
        self.server.disk.compact(oldest);
    }
}

fn frozen(shared: &mut Shared, who: &str) -> Time {
    let wait = shared.between(200, 10_000);
    shared.note(format!("{who} is stopped for {} ms", wait.as_millis()));
    shared.now + wait
}
