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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// Columns for people
    #[default]
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
    /// Those of them that are cut where the terminal ends: text to read. What one copies is never cut.
    const TEXT: &'static [&'static str] = &[];

    /// As many as there are columns.
    fn cells(&self) -> Vec<String>;
}

/// Prints a list to stdout: on a terminal no wider than that, as far as its columns can be cut.
pub(crate) fn list<R: Row>(format: Format, rows: &[R]) -> anyhow::Result<()> {
    let cells = rows.iter().map(Row::cells);
    to_stdout(|out| match format {
        Format::Table => Ok(narrow_table(out, R::HEADER, R::TEXT, cells, line_width())?),
        Format::Json | Format::Yaml => value(out, format, &rows),
    })
}

/// How wide a line of a table may be: as the terminal, or without one as it likes.
pub(crate) fn line_width() -> usize {
    let terminal = terminal_size::terminal_size().filter(|_| io::stdout().is_terminal());
    terminal.map_or(usize::MAX, |(width, _)| usize::from(width.0))
}

/// Prints a list, with nothing cut.
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

/// Prints one item of a stream: its text, mostly one line, or a YAML document.
pub(crate) fn item<T: Serialize + Display>(
    out: &mut impl Write,
    format: Format,
    thing: &T,
) -> anyhow::Result<()> {
    match format {
        Format::Table => lines(out, thing.to_string().lines())?,
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
    narrow_table(out, header, &[], rows, usize::MAX)
}

/// The same, with columns of `text` that are cut until a line has `line_width`, or only short ones are left.
pub(crate) fn narrow_table(
    out: &mut impl Write,
    header: &[&str],
    text: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
    line_width: usize,
) -> io::Result<()> {
    let mut lines = vec![header.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()];
    lines.extend(rows.map(|cells| cells.iter().map(|cell| shown(cell)).collect()));
    let mut widths: Vec<usize> = (0..header.len())
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
        .collect();
    let gaps = 2 * header.len().saturating_sub(1);
    let (cuttable, whole): (Vec<_>, Vec<_>) =
        widths.iter_mut().zip(header).partition(|(_, name)| text.contains(name));
    let taken = whole.into_iter().map(|(width, _)| *width).sum::<usize>() + gaps;
    narrow(cuttable.into_iter().map(|(width, _)| width).collect(), line_width.saturating_sub(taken));
    for line in &lines {
        let padded: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| cut(cell, *width)).collect();
        writeln!(out, "{}", padded.join("  ").trim_end())?;
    }
    Ok(())
}

/// Takes from the widest until they fit beside each other, and from none that is short.
fn narrow(mut widths: Vec<&mut usize>, room: usize) {
    while widths.iter().map(|width| **width).sum::<usize>() > room {
        match widths.iter_mut().max() {
            Some(widest) if **widest > COLUMN_WIDTH_MIN => **widest -= 1,
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

/// The same, and the last lines of what it is about.
pub(crate) fn note_with(text: impl Display, output: &str) {
    note(text);
    let lines = quoted(output);
    // Without a stderr there is nobody to tell.
    let _ = io::stderr().write_all(lines.as_bytes());
}

/// What a program wrote, set off from what is said of it.
pub(crate) fn quoted(output: &str) -> String {
    output.lines().map(|line| format!("    | {}\n", printable(line))).collect()
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
            let header = ["REVISION", "CHANGE", "MESSAGE"];
            narrow_table(&mut out, &header, &header[1..], [row()].into_iter(), width).unwrap();
            String::from_utf8(out).unwrap().lines().last().unwrap().to_owned()
        };
        assert_eq!(narrowed(80), "1042      pods: a, b, c, d, e, f, g, h  lease of n1 ended");
        assert_eq!(narrowed(44), "1042      pods: a, b, c, …  lease of n1 end…");
        assert_eq!(narrowed(3), "1042      pods: a, b,…  lease of n1…");
    }

    #[test]
    fn what_one_copies_is_never_cut() {
        let row =
            vec!["fd12:3456:789a:1:2:3:4:5".to_owned(), "it waits for what is not there yet".to_owned()];
        let mut out = Vec::new();
        narrow_table(&mut out, &["ADDRESS", "WHY"], &["WHY"], [row].into_iter(), 20).unwrap();
        assert!(String::from_utf8(out).unwrap().ends_with("\nfd12:3456:789a:1:2:3:4:5  it waits fo…\n"));
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
