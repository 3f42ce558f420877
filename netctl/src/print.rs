//! Results on stdout: tables for people, JSON and YAML for programs.
//!
//! Printers write to any writer and take what they print as plain data, so that tests see what users see.

use std::{
    fmt::Display,
    io::{self, Write},
};

use serde::Serialize;

/// The shape of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Columns for people
    Table,
    /// One JSON value; streams give one per line
    Json,
    /// YAML; streams give one document per item
    Yaml,
}

/// One line of a table and one item of a list.
pub(crate) trait Row: Serialize {
    /// The names of the columns.
    const HEADER: &'static [&'static str];

    /// As many as there are columns.
    fn cells(&self) -> Vec<String>;
}

/// Prints a list.
pub(crate) fn rows<R: Row>(out: &mut impl Write, format: Format, rows: &[R]) -> anyhow::Result<()> {
    match format {
        Format::Table => Ok(table(out, R::HEADER, rows.iter().map(Row::cells))?),
        Format::Json | Format::Yaml => value(out, format, &rows),
    }
}

/// Prints one thing: its text, which may have several lines, or its value.
pub(crate) fn one<T: Serialize + Display>(
    out: &mut impl Write,
    format: Format,
    thing: &T,
) -> anyhow::Result<()> {
    match format {
        Format::Table => Ok(lines(out, thing.to_string().lines())?),
        Format::Json | Format::Yaml => value(out, format, thing),
    }
}

/// Prints lines of text.
pub(crate) fn lines<'a>(out: &mut impl Write, mut lines: impl Iterator<Item = &'a str>) -> io::Result<()> {
    lines.try_for_each(|line| writeln!(out, "{}", printable(line)))
}

/// Prints one item of a stream: a line, or a YAML document.
pub(crate) fn item<T: Serialize + Display>(
    out: &mut impl Write,
    format: Format,
    thing: &T,
) -> anyhow::Result<()> {
    match format {
        Format::Table => writeln!(out, "{}", printable(&thing.to_string()))?,
        Format::Json => writeln!(out, "{}", serde_json::to_string(thing)?)?,
        Format::Yaml => write!(out, "---\n{}", serde_norway::to_string(thing)?)?,
    }
    Ok(out.flush()?)
}

/// Prints a value as JSON, or as YAML if that was asked for.
pub(crate) fn value<T: Serialize>(out: &mut impl Write, format: Format, value: &T) -> anyhow::Result<()> {
    match format {
        Format::Yaml => write!(out, "{}", serde_norway::to_string(value)?)?,
        Format::Table | Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(value)?)?,
    }
    Ok(())
}

/// Columns as wide as what is in them, two spaces apart; an empty cell is `-`.
pub(crate) fn table(
    out: &mut impl Write,
    header: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
) -> io::Result<()> {
    let mut lines = vec![header.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()];
    lines.extend(rows.map(|cells| cells.iter().map(|cell| shown(cell)).collect()));
    let widths: Vec<usize> = (0..header.len())
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
        .collect();
    for line in &lines {
        let padded: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        writeln!(out, "{}", padded.join("  ").trim_end())?;
    }
    Ok(())
}

fn shown(cell: &str) -> String {
    if cell.is_empty() { "-".to_owned() } else { printable(cell) }
}

/// What a pod or node says reaches the terminal without control characters.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Writes what `print` makes to stdout, at once.
pub(crate) fn to_stdout(print: impl FnOnce(&mut Vec<u8>) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut bytes = Vec::new();
    print(&mut bytes)?;
    let mut out = io::stdout().lock();
    out.write_all(&bytes)?;
    Ok(out.flush()?)
}

/// Says something on stderr that is not a result.
pub(crate) fn note(text: impl Display) {
    // Without a stderr there is nobody to tell.
    let _ = writeln!(io::stderr(), "note: {}", printable(&text.to_string()));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Fruit {
        name: &'static str,
        colour: Option<&'static str>,
    }

    impl Row for Fruit {
        const HEADER: &'static [&'static str] = &["NAME", "COLOUR"];

        fn cells(&self) -> Vec<String> {
            vec![self.name.into(), self.colour.unwrap_or_default().into()]
        }
    }

    const FRUITS: [Fruit; 2] =
        [Fruit { name: "banana", colour: Some("yellow") }, Fruit { name: "fig", colour: None }];

    fn printed(format: Format) -> String {
        let mut out = Vec::new();
        rows(&mut out, format, &FRUITS).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn columns_are_as_wide_as_their_cells() {
        assert_eq!(printed(Format::Table), "NAME    COLOUR\nbanana  yellow\nfig     -\n");
    }

    #[test]
    fn lists_are_json_and_yaml_values() {
        let json: serde_json::Value = serde_json::from_str(&printed(Format::Json)).unwrap();
        assert_eq!(json[1]["name"], "fig");
        assert_eq!(printed(Format::Yaml), "- name: banana\n  colour: yellow\n- name: fig\n  colour: null\n");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let mut out = Vec::new();
        table(&mut out, &["A"], [vec!["x\x1b[2Jy\n".to_owned()]].into_iter()).unwrap();
        assert_eq!(out, b"A\nx?[2Jy?\n");
    }
}
