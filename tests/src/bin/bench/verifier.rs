//! What the kernel's verifier makes of each program: how long loading takes, and how many instructions it
//! looks at. The only group for which Hextet's code is linked.

use std::{fs, path::PathBuf, time::Instant};

use anyhow::{Context, Result, bail};
use aya::{EbpfLoader, programs};
use dataplane::bpf::{OBJECT, Program};
use hextet_tests::machine;

use crate::{
    Bench,
    report::{Better, Metric},
    say,
};

const TABLE: &str = "verifier";
const VERIFIED: Metric = metric("instructions looked at", "");
const SIZE: Metric = metric("size of the program", "instructions");
const TIME: Metric = metric("time to verify and compile", "ms");

const fn metric(name: &'static str, unit: &'static str) -> Metric {
    Metric { table: TABLE, name, unit, better: Better::Less }
}

/// Bytes of one BPF instruction.
const INSTRUCTION_BYTES: u32 = 8;

/// A folder for the pins of maps that nobody else uses.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        // The testbed's own end reports what is left below.
        fs::remove_dir_all(&self.0).ok();
    }
}

/// Loads all programs anew, round after round.
pub(crate) fn measure(bench: &mut Bench) -> Result<()> {
    say(&format!("{TABLE}: {} rounds", bench.rounds));
    let pins = Pins(PathBuf::from(machine::PINS).join(format!("{}-verifier", crate::CLUSTER)));
    fs::create_dir_all(&pins.0).with_context(|| format!("cannot make {}", pins.0.display()))?;
    for _ in 0..bench.rounds {
        let mut loader = EbpfLoader::new();
        let mut object =
            loader.default_map_pin_directory(&pins.0).load(OBJECT).context("cannot make the maps")?;
        for program in Program::ALL {
            let name = program.as_str();
            let Some(programs::Program::SchedClassifier(classifier)) = object.program_mut(name) else {
                bail!("the object has no program {name}");
            };
            let start = Instant::now();
            classifier.load().with_context(|| format!("cannot load {name}"))?;
            bench.report.add(TIME, name, start.elapsed().as_secs_f64() * 1e3);
            let info = classifier.info().with_context(|| format!("cannot ask about {name}"))?;
            let verified = info.verified_instruction_count().context("the kernel does not count (5.16)")?;
            bench.report.add(VERIFIED, name, f64::from(verified));
            let bytes = info.size_translated().context("the kernel does not show its translation")?;
            bench.report.add(SIZE, name, f64::from(bytes / INSTRUCTION_BYTES));
        }
    }
    Ok(())
}
