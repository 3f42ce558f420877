//! Which machine speaks for a node, when two say that they are it: a copy of a disk has the node's name, key and
//! certificate, too.
//!
//! The first that came keeps the name for as long as it may live, by its own signs of life or by what its neighbours say.
//! A machine that boots again is another by what it says, and is let in when the claim of the boot before has ended.

use std::{fmt, net::Ipv6Addr, time::Duration};

use crate::{node::Node, time::Moment};

/// The longest word for a machine.
pub const MACHINE_LEN_MAX: usize = 128;

/// Who asks to speak for a node.
#[derive(Clone, Copy, Debug)]
pub struct Claimant<'a> {
    /// Which machine it is, in this boot of it; empty when it does not say.
    pub machine: &'a str,
    /// Which hardware it runs on; empty when it cannot tell.
    pub hardware: &'a str,
    /// Its underlay address; none when only what it said itself counts.
    pub underlay: Option<Ipv6Addr>,
}

/// A machine's claim to a node's name.
#[derive(Clone, Debug, Default)]
pub struct Claim {
    machine: String,
    hardware: String,
    underlay: Option<Ipv6Addr>,
    /// Until when it counts as alive by what it said itself.
    until: Moment,
    /// Until when something answers at its address.
    seen: Moment,
    /// Who was refused last.
    refused: String,
}

/// Who has a name now that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    /// The machine that had it before.
    Again,
    /// Another: nothing that the one before says counts any more.
    Anew,
}

/// The name is another machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub struct IsCopy {
    /// Where the machine is that has it, if it has said so.
    pub served: Option<Ipv6Addr>,
    /// Who asks was told so the last time, too.
    pub again: bool,
    /// How long the other's lease runs, if it gives no other sign of life.
    pub wait: Duration,
}

impl fmt::Display for IsCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("another machine with the same name and key is served")?;
        if let Some(served) = self.served {
            write!(f, ", at {served}")?;
        }
        f.write_str(
            "; this one looks like a copy of its disk, and starts no pods. If it is a copy: `netctl node down` here, \
             remove the state folder, and join with a new token and a new name. If it is to take the other's place: \
             `netctl node down` there. If it has only booted again: it is let in as soon as the lease from before has ended",
        )
    }
}

impl Claim {
    /// What the state holds of it. A server that starts gives the machine until then to come back.
    #[must_use]
    pub fn of(node: &Node, until: Moment) -> Claim {
        Claim {
            machine: node.machine.clone(),
            hardware: node.hardware.clone(),
            underlay: node.underlay,
            until,
            ..Claim::default()
        }
    }

    /// The machine has given a sign of life.
    pub fn renewed(&mut self, until: Moment) {
        self.until = until.max(self.until);
    }

    /// Something answers at the machine's address.
    pub fn seen(&mut self, until: Moment) {
        self.seen = until.max(self.seen);
    }

    /// Whether no machine is known that has the name.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.machine.is_empty()
    }

    /// The machine has given up the name, or it was taken from it.
    pub fn free(&mut self) {
        *self = Claim::default();
    }

    /// What any other machine is told while this one counts as alive.
    #[must_use]
    pub fn held(&self, now: Moment) -> Option<IsCopy> {
        let is_held = !self.machine.is_empty() && now < self.until;
        is_held.then(|| IsCopy { served: self.underlay, again: false, wait: self.until - now })
    }

    /// Whether `by` may have the name, and whether it had it before.
    ///
    /// What answers at the machine's address is the machine itself, unless who asks has this address now: then it is the
    /// same machine after another boot, or has been given the other's place. One piece of hardware runs one machine at a
    /// time: when that `is_silent`, another on the same hardware is its next boot, and need not wait.
    ///
    /// # Errors
    /// Another machine has it and may be alive.
    pub fn check(&self, by: Claimant<'_>, is_silent: bool, now: Moment) -> Result<Taken, IsCopy> {
        if self.machine == by.machine {
            return Ok(Taken::Again);
        }
        if is_silent && !by.hardware.is_empty() && self.hardware == by.hardware {
            return Ok(Taken::Anew);
        }
        let is_elsewhere = by.underlay.is_some() && by.underlay != self.underlay;
        let answers = !self.machine.is_empty() && is_elsewhere && now < self.seen;
        if self.held(now).is_some() || answers {
            let again = self.refused == by.machine;
            return Err(IsCopy { served: self.underlay, again, wait: self.until - now });
        }
        Ok(Taken::Anew)
    }

    /// Gives the name to `by`, until then.
    ///
    /// # Errors
    /// As [`Claim::check`]; the machine that has the name keeps it.
    pub fn take(
        &mut self,
        by: Claimant<'_>,
        is_silent: bool,
        now: Moment,
        until: Moment,
    ) -> Result<Taken, IsCopy> {
        let taken = self.check(by, is_silent, now);
        let taken = taken.inspect_err(|_| by.machine.clone_into(&mut self.refused))?;
        if taken == Taken::Anew {
            self.free();
            self.machine = by.machine.to_owned();
        }
        by.hardware.clone_into(&mut self.hardware);
        self.underlay = by.underlay.or(self.underlay);
        self.renewed(until);
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: &str = "2001:db8::1";
    const THERE: &str = "2001:db8::2";

    #[test]
    fn the_second_is_refused_while_the_first_may_live_and_told_where_that_is() {
        let mut claim = claimed();
        let seconds = Duration::from_secs;
        let refused = IsCopy { served: Some(HERE.parse().unwrap()), again: true, wait: seconds(1) };
        let first = IsCopy { again: false, wait: seconds(2), ..refused };
        assert_eq!(claim.take(by("copy", THERE), false, at(8), at(18)), Err(first));
        assert_eq!(claim.take(by("copy", THERE), false, at(9), at(19)), Err(refused));
        assert_eq!(claim.take(by("first", HERE), false, at(9), at(19)), Ok(Taken::Again), "it is unharmed");
        assert_eq!(claim.take(by("copy", THERE), false, at(18), at(28)), Err(refused));
        assert!(refused.to_string().contains("at 2001:db8::1; this one looks like a copy"), "{refused}");
    }

    #[test]
    fn the_same_machine_is_let_in_at_once() {
        assert_eq!(claimed().take(by("first", THERE), false, at(1), at(11)), Ok(Taken::Again));
    }

    #[test]
    fn a_machine_that_boots_again_is_let_in_when_the_claim_of_the_boot_before_has_ended() {
        let mut claim = claimed();
        // What its neighbours see is itself.
        claim.seen(at(60));
        assert!(claim.check(by("second boot", HERE), false, at(9)).is_err());
        assert_eq!(claim.take(by("second boot", HERE), false, at(10), at(20)), Ok(Taken::Anew));
        assert!(claim.check(by("first", HERE), false, at(11)).is_err(), "the boot before is over");
    }

    #[test]
    fn what_answers_at_the_firsts_address_keeps_its_name_from_a_machine_elsewhere() {
        let mut claim = claimed();
        claim.seen(at(60));
        assert!(claim.check(by("copy", THERE), false, at(59)).is_err());
        assert!(
            claim.check(Claimant { underlay: None, ..by("copy", HERE) }, false, at(59)).is_ok(),
            "not asked for"
        );
        assert_eq!(claim.take(by("copy", THERE), false, at(60), at(70)), Ok(Taken::Anew));
        assert!(claim.check(by("first", HERE), false, at(61)).is_err());
    }

    #[test]
    fn agents_that_do_not_say_which_machine_they_are_take_over_from_one_another() {
        let mut claim = Claim::default();
        assert_eq!(claim.take(by("", HERE), false, at(0), at(10)), Ok(Taken::Again));
        assert_eq!(claim.take(by("", THERE), false, at(1), at(11)), Ok(Taken::Again));
        assert_eq!(claim.take(by("first", HERE), false, at(2), at(12)), Ok(Taken::Anew), "a newer agent");
        assert!(claim.check(by("", THERE), false, at(3)).is_err());
    }

    #[test]
    fn a_name_that_was_given_up_is_free() {
        let mut claim = claimed();
        claim.free();
        assert_eq!(claim.take(by("copy", THERE), false, at(1), at(11)), Ok(Taken::Anew));
    }

    #[test]
    fn the_next_boot_of_the_same_hardware_need_not_wait_once_the_one_before_is_silent() {
        let on = |machine, hardware| Claimant { hardware, ..by(machine, HERE) };
        let mut claim = Claim::default();
        claim.take(on("first", "board"), false, at(0), at(10)).unwrap();
        assert!(claim.check(on("second boot", "board"), false, at(2)).is_err(), "the first is heard");
        assert!(claim.check(on("copy", "another board"), true, at(2)).is_err());
        assert!(claim.check(on("copy", ""), true, at(2)).is_err());
        assert_eq!(claim.take(on("second boot", "board"), true, at(2), at(12)), Ok(Taken::Anew));
        assert!(claim.check(on("first", "board"), false, at(3)).is_err());
        let mut cannot_tell = claimed();
        assert!(cannot_tell.take(by("second boot", HERE), true, at(2), at(12)).is_err());
    }

    fn claimed() -> Claim {
        let mut claim = Claim::default();
        claim.take(by("first", HERE), false, at(0), at(10)).unwrap();
        claim
    }

    fn by<'a>(machine: &'a str, underlay: &str) -> Claimant<'a> {
        Claimant { machine, hardware: "", underlay: Some(underlay.parse().unwrap()) }
    }

    fn at(seconds: u64) -> Moment {
        Moment(Duration::from_secs(seconds))
    }
}
