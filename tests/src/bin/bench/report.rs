//! Numbers as they come, and the table of their medians.

use std::fmt;

use serde::Serialize;

/// Which way a number is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) enum Better {
    /// Rates.
    More,
    /// Times and sizes.
    Less,
}

/// The variant that the others are compared with.
pub(crate) const OURS: &str = "hextet";

/// What a number tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Metric {
    /// The table that it is a row of.
    pub(crate) table: &'static str,
    /// The row.
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) better: Better,
}

/// All samples of one metric for one way of doing it.
#[derive(Debug, Serialize)]
struct Series {
    #[serde(flatten)]
    metric: Metric,
    variant: &'static str,
    samples: Vec<f64>,
}

/// All numbers of one run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    rounds: u32,
    machine: String,
    notes: Vec<String>,
    series: Vec<Series>,
}

impl Report {
    /// An empty one.
    pub(crate) fn new(rounds: u32, machine: String) -> Self {
        Self { rounds, machine, notes: Vec::new(), series: Vec::new() }
    }

    /// Adds one sample.
    pub(crate) fn add(&mut self, metric: Metric, variant: &'static str, sample: f64) {
        let found =
            self.series.iter_mut().find(|series| series.metric == metric && series.variant == variant);
        match found {
            Some(series) => series.samples.push(sample),
            None => self.series.push(Series { metric, variant, samples: vec![sample] }),
        }
    }

    /// Adds a line that the reader of the numbers must know.
    pub(crate) fn note(&mut self, line: String) {
        if !self.notes.contains(&line) {
            self.notes.push(line);
        }
    }

    fn tables(&self) -> Vec<&'static str> {
        distinct(self.series.iter().map(|series| series.metric.table))
    }

    fn variants(&self, table: &str) -> Vec<&'static str> {
        distinct(
            self.series.iter().filter(|series| series.metric.table == table).map(|series| series.variant),
        )
    }

    fn metrics(&self, table: &str) -> Vec<Metric> {
        distinct(self.series.iter().map(|series| series.metric).filter(|metric| metric.table == table))
    }

    fn samples(&self, metric: Metric, variant: &str) -> &[f64] {
        let found = self.series.iter().find(|series| series.metric == metric && series.variant == variant);
        found.map_or(&[], |series| &series.samples)
    }

    /// Notes what one row is of another, for each way of doing it.
    pub(crate) fn compare(&mut self, metric: Metric, other: Metric) {
        let variants = self.variants(metric.table).into_iter();
        let line = |variant| {
            let shown = ratio(self.samples(metric, variant), self.samples(other, variant));
            (shown != NOTHING).then(|| format!("{variant} {shown}"))
        };
        let shown: Vec<String> = variants.filter_map(line).collect();
        self.note(format!("{} / {}: {}", metric.name, other.name, shown.join(", ")));
    }

    /// The rows of one table: the head, then one for each metric.
    fn rows(&self, table: &'static str) -> Vec<Vec<String>> {
        let variants = self.variants(table);
        let (first, others) = variants.split_first().expect("a table has a series");
        // Elsewhere the columns are different things, not different ways to do one.
        let others = if *first == OURS { others } else { &[] };
        let mut head = vec![table.to_owned()];
        head.extend(variants.iter().map(|variant| (*variant).to_owned()));
        head.extend(others.iter().map(|other| format!("{first} / {other}")));
        let mut rows = vec![head];
        for metric in self.metrics(table) {
            let mine = self.samples(metric, first);
            let less = if metric.better == Better::Less { " (less is better)" } else { "" };
            let mut row = vec![format!("{}, {}{less}", metric.name, metric.unit)];
            row.extend(variants.iter().map(|variant| number(median(self.samples(metric, variant)))));
            row.extend(others.iter().map(|other| ratio(mine, self.samples(metric, other))));
            rows.push(row);
        }
        rows
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}; medians of {} rounds", self.machine, self.rounds)?;
        for table in self.tables() {
            writeln!(f)?;
            write_table(f, &self.rows(table))?;
        }
        if !self.notes.is_empty() {
            writeln!(f)?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}

fn write_table(f: &mut fmt::Formatter<'_>, rows: &[Vec<String>]) -> fmt::Result {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    for row in rows {
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            match column {
                0 => write!(f, "{cell:<width$}")?,
                _ => write!(f, "  {cell:>width$}")?,
            }
        }
        writeln!(f)?;
    }
    Ok(())
}

/// Three digits that matter, or whole numbers.
fn number(value: Option<f64>) -> String {
    match value {
        None => NOTHING.to_owned(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

/// What a cell shows that has no number.
const NOTHING: &str = "-";

/// The median of the rounds' ratios, and the lowest and the highest: what else the machine did in a round met
/// both.
fn ratio(mine: &[f64], other: &[f64]) -> String {
    let rounds = mine.iter().zip(other).filter(|(_, other)| **other > 0.0);
    let mut ratios: Vec<f64> = rounds.map(|(mine, other)| mine / other).collect();
    ratios.sort_by(f64::total_cmp);
    match (median(&ratios), &ratios[..]) {
        (Some(middle), [low, .., high]) => format!("{middle:.2} ({low:.2} to {high:.2})"),
        (Some(middle), _) => format!("{middle:.2}"),
        (None, _) => NOTHING.to_owned(),
    }
}

/// The value in the middle; the mean of the two in the middle.
pub(crate) fn median(samples: &[f64]) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[half]),
        _ => Some(f64::midpoint(sorted[half - 1], sorted[half])),
    }
}

/// The smallest sample that is not below `percent` of all (nearest rank).
pub(crate) fn percentile(samples: &[f64], percent: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted.get(rank - 1).copied()
}

fn distinct<T: PartialEq>(items: impl Iterator<Item = T>) -> Vec<T> {
    items.fold(Vec::new(), |mut found, item| {
        if !found.contains(&item) {
            found.push(item);
        }
        found
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Metric = Metric { table: "pods", name: "TCP", unit: "Gbit/s", better: Better::More };

    #[test]
    fn the_table_shows_medians_and_what_they_are_of_the_others() {
        let mut report = Report::new(3, "kernel 6.12".to_owned());
        for (mine, other) in [(30.0, 31.0), (9.0, 40.0), (31.0, 30.0)] {
            report.add(RATE, "hextet", mine);
            report.add(RATE, "by hand", other);
        }
        let text = report.to_string();
        assert!(text.contains("TCP, Gbit/s    30.0     31.0  0.97 (0.23 to 1.03)"), "{text}");
    }

    #[test]
    fn rows_are_compared_for_each_way_round_by_round() {
        const MANY: Metric = Metric { name: "TCP, 1M flows", ..RATE };
        let mut report = Report::new(1, String::new());
        for (metric, sample) in [(RATE, 30.0), (MANY, 27.0)] {
            report.add(metric, "hextet", sample);
        }
        report.add(RATE, "by hand", 30.0);
        report.compare(MANY, RATE);
        assert_eq!(report.notes, ["TCP, 1M flows / TCP: hextet 0.90"]);
    }

    #[test]
    fn the_median_of_an_even_number_is_between_two() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_percentile_is_a_sample() {
        let samples: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(percentile(&samples, 50.0), Some(100.0));
        assert_eq!(percentile(&samples, 99.0), Some(198.0));
        assert_eq!(percentile(&[], 99.0), None);
    }
}
