//! A fixed number of seeds; that a seed plays the same twice; and that mistakes made on purpose are found.

use hextet_simulation::{Broken, Options, Outcome, play, play_several};

const SEEDS: u64 = 12;
/// Seeds in which a mistake must show.
const SEEDS_PER_MISTAKE: u64 = 200;

#[test]
fn what_must_hold_holds_after_every_step_and_everything_converges() {
    println!("seeds 0 to {}: each again with `cargo xtask simulate --seeds 1 --seed N`", SEEDS - 1);
    let (mut left, mut restored, mut deploys) = (0, 0, [0, 0]);
    for seed in 0..SEEDS {
        let outcome = play(seed, &Options::default());
        println!("seed {seed}: {:016x} {:?}", outcome.hash, outcome.figures);
        assert!(outcome.failure.is_none(), "{}", told(seed, &outcome));
        let figures = outcome.figures;
        assert!(figures.revisions > 50 && figures.acknowledged > 10 && figures.faults > 20, "{figures:?}");
        left += figures.left;
        restored += figures.restored;
        deploys = [deploys[0] + figures.deploys[0], deploys[1] + figures.deploys[1]];
    }
    assert!(left > 10 && deploys[0] > 10 && deploys[1] > 10, "{left} were taken down, deploys {deploys:?}");
    assert!(restored > 5, "{restored} backups were restored");
}

#[test]
fn several_servers_lose_nothing_and_are_never_two_that_write() {
    println!("seeds 0 to {} of several servers", SEEDS - 1);
    let (mut copies, mut astray) = (0, 0);
    for seed in 0..SEEDS {
        let outcome = play_several(seed, &Options::default());
        println!("seed {seed}: {:016x} {:?}", outcome.hash, outcome.figures);
        assert!(outcome.failure.is_none(), "{}", told(seed, &outcome));
        let figures = outcome.figures;
        assert!(figures.revisions > 50 && figures.acknowledged > 10 && figures.faults > 20, "{figures:?}");
        (copies, astray) = (copies + figures.copies, astray + figures.astray);
    }
    assert!(copies > 20 && astray > 2, "{copies} led with a copy, {astray} copies were of no use");
}

#[test]
fn mistakes_of_several_servers_are_found() {
    for broken in Broken::OF_SEVERAL {
        let options = Options { broken: Some(broken), ..Options::default() };
        let found =
            (0..SEEDS_PER_MISTAKE).find_map(|seed| Some((seed, play_several(seed, &options).failure?)));
        let (seed, failure) = found.unwrap_or_else(|| panic!("{broken:?} is not found"));
        println!("{broken:?}: seed {seed}: {}", failure.what);
    }
}

#[test]
fn a_seed_plays_the_same_every_time() {
    for seed in [3, 1_000_003] {
        let [one, two] = [0, 1].map(|_| play(seed, &Options::default()));
        assert_eq!((one.hash, one.figures), (two.hash, two.figures));
        let [one, two] = [0, 1].map(|_| play_several(seed, &Options::default()));
        assert_eq!((one.hash, one.figures), (two.hash, two.figures));
    }
    let [one, two] = [3, 4].map(|seed| play(seed, &Options::default()).hash);
    assert_ne!(one, two);
}

#[test]
fn mistakes_made_on_purpose_are_found() {
    for broken in Broken::ALL {
        let options = Options { broken: Some(broken), ..Options::default() };
        let found = (0..SEEDS_PER_MISTAKE).find_map(|seed| Some((seed, play(seed, &options).failure?)));
        let (seed, failure) = found.unwrap_or_else(|| panic!("{broken:?} is not found"));
        println!("{broken:?}: seed {seed}: {}", failure.what);
    }
}

fn told(seed: u64, outcome: &Outcome) -> String {
    let failure = outcome.failure.as_ref();
    failure
        .map(|failure| format!("seed {seed}: {}\n{}", failure.what, failure.trace.join("\n")))
        .unwrap_or_default()
}
