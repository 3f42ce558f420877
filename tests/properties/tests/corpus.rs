//! What the fuzzers have found worth keeping still does no harm. Needs no fuzzer.

use hextet_properties::{TARGETS, corpus};

/// A corpus that was lost would prove nothing.
const INPUTS_MIN: usize = 8;

//= RFC 6980 5/receive
#[test]
fn every_property_holds_for_its_corpus() {
    for (target, holds) in TARGETS {
        let inputs = corpus(target);
        assert!(inputs.len() >= INPUTS_MIN, "the corpus of {target} has {} inputs", inputs.len());
        for (path, bytes) in inputs {
            // A panic names the input by this line.
            println!("{}", path.display());
            holds(&bytes);
        }
    }
}

#[test]
fn every_truncation_of_a_small_input_is_survived() {
    const LEN_MAX: usize = 256;
    for (target, holds) in TARGETS {
        for (path, bytes) in corpus(target).into_iter().filter(|(_, bytes)| bytes.len() <= LEN_MAX) {
            println!("{target} {}", path.display());
            (0..bytes.len()).for_each(|len| holds(&bytes[..len]));
        }
    }
}
