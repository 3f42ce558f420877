//! Walks a [`Graph`]: what happened and when in, what is to start, to stop or was given up out.
//!
//! Forwards, a step begins when all that it needs is done and all that it comes after has come to an end. Backwards,
//! it is undone when nothing that comes after it is left. What can go at the same time does. Times are measured from
//! an origin of the caller's, on a clock that only goes forwards.

use std::{sync::Arc, time::Duration};

use crate::{
    graph::{Graph, Node},
    status::bounded,
    step::Owner,
};

/// One walk over a graph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub(crate) graph: Arc<Graph>,
    pub(crate) steps: Vec<Progress>,
    /// When it was first told to go up, after all was down.
    pub(crate) since: Option<Duration>,
}

/// How far a step is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) state: State,
    /// Whether it is to be done, or else undone.
    pub(crate) wanted: bool,
    /// Something of it may be there.
    pub(crate) touched: bool,
    /// What it needs was lost while it was under way: its end counts for nothing.
    stale: bool,
    /// What waits for it was done before it came: nobody waits for it.
    pub(crate) late: bool,
    /// When its first attempt began since it was down, and when its last did.
    pub(crate) first: Option<Duration>,
    pub(crate) began: Option<Duration>,
    pub(crate) ended: Option<Duration>,
    pub(crate) attempts: u32,
    /// In a row.
    failures: u32,
    pub(crate) retry_at: Option<Duration>,
    pub(crate) error: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum State {
    /// Not begun, or undone.
    #[default]
    Idle,
    Starting,
    Done,
    /// It is tried again when `retry_at` says so; without that it has failed for good.
    Failed,
    Stopping,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Everything is to be done.
    Up,
    /// Everything is to be undone.
    Down,
    /// This step and all that comes after it are to be undone.
    DownFrom(&'a str),
    /// What was ordered of the step has succeeded.
    Done(&'a str),
    /// It has not yet, and whoever does it goes on by himself.
    Tried(&'a str, &'a str),
    /// It has failed.
    Failed(&'a str, &'a str),
    /// It was done and is no more. What was done on top of it went with it, and is done anew.
    Lost(&'a str, &'a str),
    /// It was done, and whoever did it does it once more. What was done on top of it is done anew.
    Anew(&'a str),
    /// What made it fail may be over: it is tried at once, and counts anew.
    Again(&'a str),
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Command {
    /// Begin the step.
    Start(String),
    /// Undo it, or end it when it is under way.
    Stop(String),
    /// Its time is over: whatever is under way for it is to end.
    TimedOut(String),
}

/// What became of a step, as far as others depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Open,
    Done,
    /// It is optional and will not be done.
    Skipped,
    /// It will not be done.
    Barred,
}

impl Run {
    /// A walk that has not begun.
    #[must_use]
    pub fn new(graph: Arc<Graph>) -> Run {
        let steps = graph.nodes().iter().map(|_| Progress::default()).collect();
        Run { graph, steps, since: None }
    }

    /// Its graph.
    #[must_use]
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// Takes note of what happened; what is to be done now. A step that the graph does not have is nobody's.
    pub fn handle(&mut self, event: Event<'_>, now: Duration) -> Vec<Command> {
        let mut commands = Vec::new();
        match event {
            Event::Up => self.want(|_| true, true, now),
            Event::Down => self.want(|_| true, false, now),
            Event::DownFrom(name) => self.down_from(name, now),
            Event::Done(name) => self.each(name, |run, index| run.done(index, now)),
            Event::Tried(name, why) => {
                self.each(name, |run, index| run.steps[index].error = Some(bounded(why)))
            }
            Event::Failed(name, why) => self.each(name, |run, index| run.failed(index, why, now)),
            Event::Lost(name, why) => self.each(name, |run, index| run.lost(index, why, now)),
            Event::Anew(name) => self.each(name, |run, index| run.anew(index, now)),
            Event::Again(name) => self.each(name, |run, index| run.steps[index].again(now)),
            Event::Tick => {}
        }
        self.expire(now, &mut commands);
        while self.advance(now, &mut commands) {}
        commands
    }

    /// Something of these steps may be there already: it is undone on the way down, also when they never began.
    pub fn assume(&mut self, names: &[&str]) {
        names.iter().for_each(|name| self.each(name, |run, index| run.steps[index].touched = true));
    }

    /// What comes before this step was done before this walk began, as far as it is no part of Hextet's own: it is looked
    /// for or done again, and nobody waits for it. Then [`Event::Tick`].
    pub fn pass(&mut self, name: &str) {
        let Some(index) = self.place(name) else { return };
        for earlier in self.earlier(index) {
            self.steps[earlier].late |= self.graph.nodes()[earlier].step.owner != Owner::Node;
        }
    }

    /// Goes on by another graph. A step that both have with the same text stays as far as it is; one that only the
    /// old one had is forgotten. One that is new and comes before what is done already, or is under way, is done
    /// nevertheless, and nobody waits for it.
    pub fn replace(&mut self, graph: Arc<Graph>) {
        let wanted = self.steps.iter().any(|step| step.wanted);
        let old = std::mem::replace(self, Run { since: self.since, ..Run::new(graph) });
        for index in 0..self.steps.len() {
            let step = &self.graph.nodes()[index].step;
            let same = |other: &Node| {
                other.step.name == step.name && (step.owner == Owner::Node || other.step == *step)
            };
            let before = old.graph.nodes().iter().position(same).map(|index| old.steps[index].clone());
            self.steps[index] = before.unwrap_or(Progress { wanted, late: true, ..Progress::default() });
        }
        let is_new = |step: &Progress| step.late && step.began.is_none();
        for index in (0..self.steps.len()).filter(|index| is_new(&self.steps[*index])).collect::<Vec<_>>() {
            let later = self.later(index, |node| &node.then);
            let is_there = |later: &usize| matches!(self.steps[*later].state, State::Starting | State::Done);
            self.steps[index].late = later.iter().any(is_there);
        }
    }

    /// When [`Event::Tick`] has something to do, at the latest.
    #[must_use]
    pub fn due(&self) -> Option<Duration> {
        let due = |(index, step): (usize, &Progress)| match step.state {
            State::Failed if !step.wanted => None,
            State::Failed | State::Stopping if step.retry_at.is_some() => step.retry_at,
            State::Starting | State::Stopping => self.deadline(index),
            _ => None,
        };
        self.steps.iter().enumerate().filter_map(due).min()
    }

    /// Whether the step is done.
    #[must_use]
    pub fn is_done(&self, name: &str) -> bool {
        self.place(name).is_some_and(|index| self.steps[index].state == State::Done)
    }

    /// Whether the step was begun and nothing came of it yet.
    #[must_use]
    pub fn is_under_way(&self, name: &str) -> bool {
        self.place(name).is_some_and(|index| self.steps[index].state == State::Starting)
    }

    /// Whether the step was begun since all was down, and something of it may be there.
    #[must_use]
    pub fn was_begun(&self, name: &str) -> bool {
        self.place(name).is_some_and(|index| self.steps[index].touched && self.steps[index].began.is_some())
    }

    /// Whether the step is being undone.
    #[must_use]
    pub fn is_stopping(&self, name: &str) -> bool {
        self.place(name).is_some_and(|index| self.steps[index].state == State::Stopping)
    }

    /// Whether nothing of any step is left.
    #[must_use]
    pub fn is_down(&self) -> bool {
        self.steps.iter().all(|step| !step.touched && step.state == State::Idle)
    }

    /// Whether nothing of the step is left, nor of what comes after it.
    #[must_use]
    pub fn is_down_from(&self, name: &str) -> bool {
        let Some(index) = self.place(name) else { return true };
        self.later(index, |node| &node.then).iter().all(|index| !self.steps[*index].touched)
    }

    /// The step's last error.
    #[must_use]
    pub fn error(&self, name: &str) -> Option<&str> {
        self.place(name).and_then(|index| self.steps[index].error.as_deref())
    }

    /// Failures of the step in a row.
    #[must_use]
    pub fn failures(&self, name: &str) -> u32 {
        self.place(name).map_or(0, |index| self.steps[index].failures)
    }

    /// Whether nobody waits for the step: the rest was there before it.
    #[must_use]
    pub fn is_late(&self, name: &str) -> bool {
        self.place(name).is_some_and(|index| self.steps[index].late)
    }

    /// Steps that are waited for and have failed for good.
    pub fn failed_for_good(&self) -> impl Iterator<Item = (&str, &str)> {
        let nodes = self.graph.nodes().iter().zip(&self.steps);
        let failed =
            nodes.filter(|(node, step)| step.is_failed_for_good() && !node.step.optional && !step.late);
        failed.map(|(node, step)| (node.step.name.as_str(), step.error.as_deref().unwrap_or("it failed")))
    }

    pub(crate) fn outcomes(&self) -> Vec<Outcome> {
        let mut outcomes: Vec<Outcome> = Vec::with_capacity(self.steps.len());
        for (node, step) in self.graph.nodes().iter().zip(&self.steps) {
            let barred = node.needs.iter().any(|index| outcomes[*index] == Outcome::Barred);
            let outcome = match step.state {
                State::Done => Outcome::Done,
                State::Failed if step.retry_at.is_none() => Outcome::Barred,
                State::Idle | State::Failed if barred => Outcome::Barred,
                _ => Outcome::Open,
            };
            let skipped = match outcome {
                Outcome::Barred => node.step.optional || step.late,
                Outcome::Open => step.late,
                Outcome::Done | Outcome::Skipped => false,
            };
            outcomes.push(if skipped { Outcome::Skipped } else { outcome });
        }
        outcomes
    }

    fn place(&self, name: &str) -> Option<usize> {
        self.graph.place(name)
    }

    fn each(&mut self, name: &str, act: impl FnOnce(&mut Run, usize)) {
        if let Some(index) = self.place(name) {
            act(self, index);
        }
    }

    fn want(&mut self, which: impl Fn(usize) -> bool, wanted: bool, now: Duration) {
        if wanted && self.is_down() {
            *self = Run { since: Some(now), ..Run::new(self.graph.clone()) };
        }
        for (_, step) in self.steps.iter_mut().enumerate().filter(|(index, _)| which(*index)) {
            if step.wanted != wanted {
                (step.wanted, step.failures) = (wanted, 0);
            }
        }
    }

    fn down_from(&mut self, name: &str, now: Duration) {
        let Some(index) = self.place(name) else { return };
        let later = self.later(index, |node| &node.then);
        self.want(|index| later.contains(&index), false, now);
    }

    /// The step and all that comes after it, by the edges that `next` names.
    fn later(&self, index: usize, next: impl Fn(&Node) -> &Vec<usize>) -> Vec<usize> {
        let mut later = vec![index];
        let mut at = 0;
        while let Some(index) = later.get(at) {
            let more: Vec<usize> = next(&self.graph.nodes()[*index]).clone();
            more.into_iter().for_each(|index| {
                if !later.contains(&index) {
                    later.push(index)
                }
            });
            at += 1;
        }
        later
    }

    /// Everything that the step waits for, itself or by way of others.
    fn earlier(&self, index: usize) -> Vec<usize> {
        let (mut earlier, mut at) = (vec![index], 0);
        while let Some(index) = earlier.get(at) {
            let node = &self.graph.nodes()[*index];
            let more: Vec<usize> = node.needs.iter().chain(&node.after).copied().collect();
            earlier.extend(more.into_iter().filter(|index| !earlier.contains(index)).collect::<Vec<_>>());
            at += 1;
        }
        earlier.split_off(1)
    }

    fn done(&mut self, index: usize, now: Duration) {
        let step = &mut self.steps[index];
        match step.state {
            State::Stopping => {
                step.error = None;
                step.undone(now);
            }
            State::Starting if step.stale => step.forget(),
            State::Starting | State::Failed => {
                step.began = step.began.or(Some(now));
                step.first = step.first.or(step.began);
                (step.state, step.ended, step.retry_at) = (State::Done, Some(now), None);
                (step.failures, step.touched) = (0, true);
            }
            State::Idle | State::Done => {}
        }
    }

    fn failed(&mut self, index: usize, why: &str, now: Duration) {
        let retry = self.graph.nodes()[index].step.retry;
        let step = &mut self.steps[index];
        if !matches!(step.state, State::Starting | State::Stopping) {
            return;
        }
        step.error = Some(bounded(why));
        if step.stale {
            return step.forget();
        }
        step.failures = step.failures.saturating_add(1);
        let again = retry.attempts_max.is_none_or(|max| step.failures < max);
        step.retry_at = again.then(|| now + retry.wait(step.failures));
        match step.state {
            // The way down goes on after a failure.
            State::Stopping if !again => step.undone(now),
            State::Stopping => {}
            _ => (step.state, step.ended) = (State::Failed, Some(now)),
        }
    }

    fn lost(&mut self, index: usize, why: &str, now: Duration) {
        if self.steps[index].state == State::Done {
            self.steps[index].state = State::Starting;
        }
        self.failed(index, why, now);
        self.forget_what_leans_on(index);
    }

    fn anew(&mut self, index: usize, now: Duration) {
        let step = &mut self.steps[index];
        if step.state != State::Done {
            return;
        }
        (step.state, step.ended, step.error) = (State::Starting, None, None);
        (step.first, step.began, step.attempts) = (Some(now), Some(now), 1);
        self.forget_what_leans_on(index);
    }

    fn forget_what_leans_on(&mut self, index: usize) {
        let mut later = self.later(index, |node| &node.then);
        later.retain(|later| *later != index && self.graph.place_leans_on(*later, index));
        for later in later {
            let step = &mut self.steps[later];
            match step.state {
                State::Done => step.forget(),
                State::Starting => step.stale = true,
                State::Idle | State::Failed | State::Stopping => {}
            }
        }
    }

    /// Gives up what has taken too long.
    fn expire(&mut self, now: Duration, commands: &mut Vec<Command>) {
        for index in 0..self.steps.len() {
            let waits = self.steps[index].retry_at.is_some();
            let under_way = matches!(self.steps[index].state, State::Starting | State::Stopping) && !waits;
            if under_way && self.deadline(index).is_some_and(|deadline| deadline <= now) {
                let step = &self.graph.nodes()[index].step;
                let why =
                    format!("it was not done within {} s", step.deadline.unwrap_or_default().as_secs_f32());
                commands.push(Command::TimedOut(step.name.clone()));
                self.failed(index, &why, now);
            }
        }
    }

    fn deadline(&self, index: usize) -> Option<Duration> {
        Some(self.steps[index].began? + self.graph.nodes()[index].step.deadline?)
    }

    /// Moves every step that can be moved; whether any was.
    fn advance(&mut self, now: Duration, commands: &mut Vec<Command>) -> bool {
        let mut moved = false;
        for index in
            (0..self.steps.len()).rev().filter(|index| !self.steps[*index].wanted).collect::<Vec<_>>()
        {
            moved |= self.go_down(index, now, commands);
        }
        let outcomes = self.outcomes();
        for index in 0..self.steps.len() {
            if self.steps[index].wanted && self.is_ready(index, &outcomes) {
                moved |= self.go_up(index, now, commands);
            }
        }
        moved
    }

    fn is_ready(&self, index: usize, outcomes: &[Outcome]) -> bool {
        let node = &self.graph.nodes()[index];
        // What was done before an earlier step went down must be gone before anything is done on it again.
        let stays = |index: &usize| self.steps[*index].wanted;
        let needs = node
            .needs
            .iter()
            .all(|need| stays(need) && matches!(outcomes[*need], Outcome::Done | Outcome::Skipped));
        needs && node.after.iter().all(|earlier| stays(earlier) && outcomes[*earlier] != Outcome::Open)
    }

    fn go_up(&mut self, index: usize, now: Duration, commands: &mut Vec<Command>) -> bool {
        let node = &self.graph.nodes()[index];
        let step = &mut self.steps[index];
        let due = match step.state {
            State::Idle => true,
            State::Failed => step.retry_at.is_some_and(|at| at <= now),
            State::Starting | State::Done | State::Stopping => false,
        };
        if !due {
            return false;
        }
        if step.state != State::Failed {
            (step.first, step.attempts) = (None, 0);
        }
        step.first = step.first.or(Some(now));
        (step.began, step.ended, step.retry_at) = (Some(now), None, None);
        step.stale = false;
        if node.step.is_target {
            (step.state, step.ended) = (State::Done, Some(now));
        } else {
            (step.state, step.touched) = (State::Starting, true);
            step.attempts = step.attempts.saturating_add(1);
            commands.push(Command::Start(node.step.name.clone()));
        }
        true
    }

    fn go_down(&mut self, index: usize, now: Duration, commands: &mut Vec<Command>) -> bool {
        let node = &self.graph.nodes()[index];
        let is_left = |later: &usize| self.steps[*later].touched || self.steps[*later].state != State::Idle;
        // Also by way of steps of which nothing is left: they may not have been begun yet.
        if self.later(index, |node| &node.then)[1..].iter().any(is_left) {
            return false;
        }
        let step = &mut self.steps[index];
        let under_way = matches!(step.state, State::Starting | State::Stopping);
        match step.state {
            State::Idle if !step.touched => return false,
            State::Stopping if step.retry_at.is_none_or(|at| at > now) => return false,
            _ if step.touched && (node.step.undo || under_way) => {
                step.first = step.first.filter(|_| step.state == State::Stopping).or(Some(now));
                (step.state, step.began, step.ended, step.retry_at) =
                    (State::Stopping, Some(now), None, None);
                commands.push(Command::Stop(node.step.name.clone()));
            }
            _ => step.undone(now),
        }
        true
    }
}

impl Progress {
    pub(crate) fn is_failed_for_good(&self) -> bool {
        self.state == State::Failed && self.retry_at.is_none()
    }

    fn again(&mut self, now: Duration) {
        if self.state == State::Failed {
            (self.failures, self.retry_at) = (0, Some(now));
            (self.first, self.attempts) = (None, 0);
        }
    }

    /// As if it had not begun; what is known of it stays.
    fn forget(&mut self) {
        (self.state, self.stale, self.retry_at) = (State::Idle, false, None);
    }

    fn undone(&mut self, now: Duration) {
        self.forget();
        (self.touched, self.ended, self.failures, self.late) = (false, Some(now), 0, false);
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
