//! Results on stdout: tables for people, JSON and YAML for programs.
//!
//! Printers write to any writer and take what they print as plain data, so that tests see what users see.

use std::{
    fmt::Display,
    io::{self, IsTerminal as _, Write},
};

use serde::Serialize;

/// A column that is not wider is not cut.
const COLUMN_WIDTH_MIN: usize = 12;

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

/// Prints a list, in a table no wider than the terminal: the widest columns are cut. Without a terminal nothing is.
pub(crate) fn narrow_rows<R: Row>(out: &mut impl Write, format: Format, rows: &[R]) -> anyhow::Result<()> {
    let width = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
    match (format, width.filter(|_| io::stdout().is_terminal())) {
        (Format::Table, Some(width)) => Ok(narrow_table(out, R::HEADER, rows.iter().map(Row::cells), width)?),
        _ => self::rows(out, format, rows),
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
    narrow_table(out, header, rows, usize::MAX)
}

/// The same, with columns that are cut until a line has `line_width`, or only short ones are left.
fn narrow_table(
    out: &mut impl Write,
    header: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
    line_width: usize,
) -> io::Result<()> {
    let mut lines = vec![header.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()];
    lines.extend(rows.map(|cells| cells.iter().map(|cell| shown(cell)).collect()));
    let mut widths: Vec<usize> = (0..header.len())
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
        .collect();
    narrow(&mut widths, line_width);
    for line in &lines {
        let padded: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| cut(cell, *width)).collect();
        writeln!(out, "{}", padded.join("  ").trim_end())?;
    }
    Ok(())
}

/// Takes from the widest until they fit beside each other, and from none that is short.
fn narrow(widths: &mut [usize], line_width: usize) {
    let gaps = 2 * widths.len().saturating_sub(1);
    while widths.iter().sum::<usize>() + gaps > line_width {
        match widths.iter_mut().max() {
            Some(widest) if *widest > COLUMN_WIDTH_MIN => *widest -= 1,
            _ => return,
        }
    }
}

/// A cell as wide as its column.
fn cut(cell: &str, width: usize) -> String {
    if cell.chars().count() <= width {
        return format!("{cell:<width$}");
    }
    let kept: String = cell.chars().take(width.saturating_sub(1)).collect();
    format!("{kept}…")
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

    #[test]
    fn a_line_is_as_wide_as_the_terminal_and_says_where_it_is_cut() {
        let row = || {
            vec!["1042".to_owned(), "pods: a, b, c, d, e, f, g, h".to_owned(), "lease of n1 ended".to_owned()]
        };
        let narrowed = |width| {
            let mut out = Vec::new();
            narrow_table(&mut out, &["REVISION", "CHANGE", "MESSAGE"], [row()].into_iter(), width).unwrap();
            String::from_utf8(out).unwrap().lines().last().unwrap().to_owned()
        };
        assert_eq!(narrowed(80), "1042      pods: a, b, c, d, e, f, g, h  lease of n1 ended");
        assert_eq!(narrowed(44), "1042      pods: a, b, c, …  lease of n1 end…");
        assert_eq!(narrowed(3), "1042      pods: a, b,…  lease of n1…");
    }

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
