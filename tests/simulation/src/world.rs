//! The whole simulated cluster, and its one loop.

use std::time::Duration;

use hextet_address::ClusterPrefix;
use scheduler_core::{
    cluster::Cluster,
    deploy::Order,
    event::{Event, Texts},
    time::WallTime,
};

use crate::{
    Options,
    balancer::Balancer,
    check::Checks,
    clock::{Time, ms},
    deploy,
    join::{self, LAN},
    machine::{Machine, Witness},
    network::{End, Host, Packet, StreamId},
    operator::Operators,
    rollout,
    server::Server,
    shared::{Shared, What},
};

/// How long before peace the last fault happens.
const LAST_FAULT: Duration = Duration::from_secs(5);
/// How long everything has to converge when faults have stopped.
const CALM: Duration = Duration::from_secs(120);
/// And then nothing is written any more.
const SILENCE: Duration = Duration::from_secs(30);
/// Deploys that cannot go back for want of room do so in place after so long in peace.
const LATE: Duration = Duration::from_secs(60);
/// How long a deploy in peace may take.
const DEPLOY: Duration = Duration::from_secs(90);
/// What the tasks of its pods are told.
const DEPLOYED: u32 = 8;
/// And a step of a rollout has come to its end.
const ROLLOUT: Duration = Duration::from_secs(20);

pub(crate) struct World {
    pub(crate) shared: Shared,
    pub(crate) server: Server,
    pub(crate) machines: Vec<Machine>,
    pub(crate) balancers: Vec<Balancer>,
    cluster: Cluster,
    operators: Operators,
    checks: Checks,
    /// Since when there are no faults, or since the last deploy in peace began.
    peace: Time,
    /// Somebody wanted a deploy to go back in place.
    restarts_in_place: bool,
}

impl World {
    pub(crate) fn new(seed: u64, options: Options) -> World {
        let mut shared = Shared::new(seed, options);
        let cluster = Cluster {
            prefix: ClusterPrefix::generate(&mut shared.rng),
            pod_prefix: Some(LAN.parse().expect("a prefix")),
            pod_ipv4: "10.254.0.0/20".parse().expect("a network"),
            id_key: seed,
            created: WallTime(0),
        };
        let mut server = Server::new(cluster.clone(), &mut shared);
        let machines = (0..options.nodes)
            .map(|number| join::found(number, &cluster, &mut server, &mut shared))
            .collect();
        let selectors = ["j0", "j1/g0", "j0/g1"].map(|text| text.parse().expect("a selector"));
        let checks = Checks::new(&selectors);
        let balancers = selectors
            .into_iter()
            .enumerate()
            .map(|(number, selector)| Balancer::new(number, selector))
            .collect();
        World {
            shared,
            server,
            machines,
            balancers,
            cluster,
            operators: Operators::default(),
            checks,
            peace: Time::default(),
            restarts_in_place: false,
        }
    }

    /// Plays with faults, then in peace, and says what did not hold.
    pub(crate) fn play(&mut self) -> Result<(), String> {
        self.begin();
        while self.shared.figures.steps < self.shared.options.steps {
            self.step()?;
        }
        if self.shared.chance(0.5) {
            self.lose_all_for_a_moment();
            self.play_for(LAST_FAULT)?;
        }
        self.make_peace();
        self.play_for(CALM)?;
        self.checks.has_converged(&self.server, &self.machines, &self.balancers)?;
        let before = self.server.disk.revision();
        self.play_for(SILENCE)?;
        let after = self.server.disk.revision();
        if after != before {
            return Err(format!("revisions {before} to {after} were written although nothing happened"));
        }
        self.checks.has_converged(&self.server, &self.machines, &self.balancers)?;
        self.deploy_in_peace()?;
        self.roll_in_peace()
    }

    /// A deploy while nothing goes wrong: never do fewer pods serve than before, and its pods are those of its end.
    fn deploy_in_peace(&mut self) -> Result<(), String> {
        let Some(job) = deploy::chosen(self.server.disk.state(), DEPLOYED) else { return Ok(()) };
        let (floor, alive) =
            (deploy::floor(&job, self.server.disk.state()), rollout::alive_of(&job, &self.machines));
        let schedule = deploy::schedule(&mut self.shared);
        (self.peace, self.restarts_in_place) = (self.shared.now, schedule.in_place);
        self.operators.asked += 1;
        self.server.operate(self.operators.asked, Event::Deploy(job, schedule), &mut self.shared);
        let end = self.shared.now + DEPLOY;
        while self.shared.now < end {
            self.step()?;
            if !self.restarts_in_place {
                deploy::holds(&floor, self.server.disk.state())?;
                rollout::holds(&alive, &self.machines)?;
            }
        }
        self.checks.has_converged(&self.server, &self.machines, &self.balancers)
    }

    /// Somebody looks after the deploys that wait for somebody.
    fn attend(&mut self) {
        let is_late = self.shared.now > self.peace + LATE;
        if let Some(event) = deploy::attended(self.server.disk.state(), is_late) {
            self.restarts_in_place |= matches!(event, Event::DeployOrder(_, Order::Abort { now: true }));
            self.operators.asked += 1;
            self.server.operate(self.operators.asked, event, &mut self.shared);
        }
        self.shared.plan(ms(1_000), What::Attend);
    }

    /// A rollout while nothing goes wrong: never do fewer pods live than before, and it comes to its end.
    fn roll_in_peace(&mut self) -> Result<(), String> {
        for percent_next in [30, 100] {
            let Some(job) = rollout::chosen(self.server.disk.state(), percent_next) else { return Ok(()) };
            let floor = rollout::floor(&job, &self.machines);
            self.operators.asked += 1;
            self.server.operate(self.operators.asked, Event::ApplyJob(job, Texts::new()), &mut self.shared);
            let end = self.shared.now + ROLLOUT;
            while self.shared.now < end {
                self.step()?;
                rollout::holds(&floor, &self.machines)?;
            }
            self.checks.has_converged(&self.server, &self.machines, &self.balancers)?;
        }
        Ok(())
    }

    fn begin(&mut self) {
        self.server.start(&mut self.shared);
        self.machines.iter_mut().for_each(|machine| machine.start(&mut self.shared));
        self.balancers.iter_mut().for_each(|balancer| balancer.restart(&mut self.shared));
        self.shared.plan(ms(100), What::Operate);
        self.shared.plan(ms(3_000), What::Fault);
    }

    /// Faults stop, and what is down comes up.
    fn make_peace(&mut self) {
        self.shared.note("peace");
        self.shared.faulty = false;
        self.peace = self.shared.now;
        self.shared.plan(ms(1_000), What::Attend);
        self.shared.network.heal_all();
        let now = self.shared.now;
        self.server.frozen_until = now;
        for machine in &mut self.machines {
            (machine.frozen_until, machine.witness) = (now, Witness::Honest);
        }
        self.balancers.iter_mut().for_each(|balancer| balancer.busy_until = now);
    }

    fn play_for(&mut self, time: Duration) -> Result<(), String> {
        let end = self.shared.now + time;
        while self.shared.now < end {
            self.step()?;
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), String> {
        let Some(what) = self.shared.next() else { return Err("nothing happens any more".to_owned()) };
        self.shared.figures.steps += 1;
        self.happen(what);
        self.checks.after_step(&self.server, &self.machines, &self.shared)?;
        self.shared.figures.deploys = self.checks.deploys;
        self.cast_out();
        self.shared.broken.take().map_or(Ok(()), Err)
    }

    fn happen(&mut self, what: What) {
        let frozen_until = self.frozen_until(&what);
        if frozen_until > self.shared.now {
            let wait = Duration::from_micros(frozen_until.0 - self.shared.now.0);
            return self.shared.plan(wait, what);
        }
        let server_listens = self.server.process.is_some() && self.server.frozen_until <= self.shared.now;
        match what {
            What::Arrive(stream, end) => self.arrive(stream, end),
            What::StartServer => self.server.start(&mut self.shared),
            What::Server(life, due) if life == self.server.life => self.server.due(due, &mut self.shared),
            What::Supervisors(number) => self.machines[number].look_at_lease(&mut self.shared),
            What::Rejoin(number) => self.rejoin(number),
            What::NodeUp(number) => self.machines[number].bring_up(&mut self.shared),
            What::StartAgent(number) => self.machines[number].start(&mut self.shared),
            What::Agent(number, life, due) if life == self.machines[number].life => {
                self.machines[number].due(due, server_listens, &mut self.shared);
            }
            What::Balancer(number, life) if life == self.balancers[number].life => {
                self.balancers[number].connect(server_listens, &mut self.shared);
            }
            What::Operate => self.operate(),
            What::Attend => self.attend(),
            What::Fault => self.fail_again(),
            What::Cut(host, end) => self.shared.network.cut(host, end),
            What::Heal(healing) => self.heal(healing),
            What::GiveUp(stream, end) => self.give_up_if_cut(stream, end),
            What::Server(..) | What::Agent(..) | What::Balancer(..) => {}
        }
    }

    /// What happens to one who is stopped happens when it goes on.
    fn frozen_until(&self, what: &What) -> Time {
        match what {
            What::Server(..) => self.server.frozen_until,
            What::Agent(number, ..) => self.machines[*number].frozen_until,
            What::Arrive(stream, end) => match (end, self.shared.network.client(*stream)) {
                (End::Server, _) => self.server.frozen_until,
                (End::Client, Some(Host::Node(number))) => self.machines[number].frozen_until,
                (End::Client, Some(Host::Balancer(number))) => self.balancers[number].busy_until,
                (End::Client, None) => Time::default(),
            },
            _ => Time::default(),
        }
    }

    fn arrive(&mut self, stream: StreamId, end: End) {
        let Some(client) = self.shared.network.client(stream) else { return };
        if self.shared.network.is_cut(client, end) {
            let wait = self.shared.between(100, 600);
            return self.shared.plan(wait, What::Arrive(stream, end));
        }
        let Some((packet, more)) = self.shared.network.arrive(stream, end) else { return };
        if more {
            let wait = self.shared.travel();
            self.shared.plan(wait, What::Arrive(stream, end));
        }
        self.shared.figures.messages += 1;
        match (end, client) {
            (End::Server, _) => self.server.receive(stream, packet, &mut self.shared),
            (End::Client, Host::Node(number)) => {
                let alive: Vec<bool> = self.machines.iter().map(|machine| machine.has_power).collect();
                self.machines[number].receive(stream, packet, &alive, &mut self.shared);
            }

            (End::Client, Host::Balancer(number)) => self.arrive_at_balancer(number, stream, packet),
        }
    }

    fn arrive_at_balancer(&mut self, number: usize, stream: StreamId, packet: Packet) {
        let balancer = &mut self.balancers[number];
        if balancer.receive(stream, packet, &mut self.shared)
            && let Err(what) = self.checks.knows(balancer)
        {
            self.shared.wrong(format!("balancer {number}: {what}"));
        }
    }

    fn give_up_if_cut(&mut self, stream: StreamId, end: End) {
        let Some(client) = self.shared.network.client(stream) else { return };
        let network = &mut self.shared.network;
        let is_alone =
            !network.is_listening(stream, End::Server) || !network.is_listening(stream, End::Client);
        if is_alone || network.is_cut_off(client) {
            self.give_up(stream, end);
        }
    }

    /// An end closes a stream because it hears nothing, or because it was told that it is broken.
    pub(crate) fn give_up(&mut self, stream: StreamId, end: End) {
        match (end, self.shared.network.client(stream)) {
            (_, None) => {}
            (End::Server, _) => self.server.hang_up(stream, false, &mut self.shared),
            (End::Client, Some(Host::Node(number))) => self.machines[number].detach(stream, &mut self.shared),
            (End::Client, Some(Host::Balancer(number))) => {
                self.balancers[number].detach(stream, &mut self.shared)
            }
        }
    }

    fn operate(&mut self) {
        if !self.shared.faulty {
            return;
        }
        let shown = self.server.process.as_ref().map(|process| process.shown.clone()).unwrap_or_default();
        let (number, event) = self.operators.wish(&shown, &mut self.shared);
        self.server.operate(number, event, &mut self.shared);
        let wait = self.shared.between(100, 4_000);
        self.shared.plan(wait, What::Operate);
    }

    /// Machines whose node was deleted, or that a restored cluster does not know, end and come back from an empty disk.
    fn cast_out(&mut self) {
        let nodes = self.server.disk.state().nodes();
        for machine in &mut self.machines {
            let node = nodes.get(&machine.name);
            machine.is_stranger = node.is_some_and(|node| !machine.is(node));
            if node.is_some() && !machine.is_stranger {
                continue;
            }
            if !std::mem::replace(&mut machine.is_outcast, true) {
                let wait = self.shared.between(10, 20_000);
                self.shared.plan(wait, What::Rejoin(machine.number));
            }
        }
    }

    /// Asks for a place in the cluster until it has one.
    fn rejoin(&mut self, number: usize) {
        let machine = &mut self.machines[number];
        machine.wipe(&mut self.shared);
        let nodes = self.server.disk.state().nodes();
        if let Some(node) = nodes.get(&machine.name) {
            let identity = join::identity(&machine.name, node, &self.cluster);
            return machine.reborn(identity, &mut self.shared);
        }
        for event in join::events(number, self.operators.asked, &mut self.shared) {
            self.operators.asked += 1;
            self.server.operate(self.operators.asked, event, &mut self.shared);
        }
        self.shared.plan(ms(2_000), What::Rejoin(number));
    }

    fn fail_again(&mut self) {
        if !self.shared.faulty {
            return;
        }
        self.fail();
        let wait = self.shared.between(50, 3_000);
        self.shared.plan(wait, What::Fault);
    }
}
