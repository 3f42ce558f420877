//! What a server with a damaged store cannot show: each list has a line for it.

use hextet_api::v1;
use serde::Serialize;

use crate::print::{self, Row};

/// A line of a list.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Line<R> {
    /// An item.
    Shown(R),
    /// One that cannot be read, or several of which not even the names can.
    Unreadable {
        /// Its name; or the two keys between which they are.
        unreadable: String,
        why: String,
    },
}

impl<R: Row> Row for Line<R> {
    const HEADER: &'static [&'static str] = R::HEADER;

    fn cells(&self) -> Vec<String> {
        match self {
            Line::Shown(row) => row.cells(),
            Line::Unreadable { unreadable, .. } => cells(unreadable, R::HEADER.len()),
        }
    }
}

/// The cells of what cannot be read, in a table of so many columns.
pub(crate) fn cells(name: &str, columns: usize) -> Vec<String> {
    let mut cells = vec![name.to_owned(), "unreadable".to_owned()];
    cells.resize(columns, String::new());
    cells
}

/// The items, and after them what cannot be read.
pub(crate) fn lines<R>(rows: Vec<R>, unreadable: Vec<v1::Unreadable>) -> Vec<Line<R>> {
    let lost = unreadable
        .into_iter()
        .map(|lost| Line::Unreadable { unreadable: name(&lost).to_owned(), why: lost.why });
    rows.into_iter().map(Line::Shown).chain(lost).collect()
}

/// An object's name without its kind. Of a part of all keys the ends are told with theirs.
pub(crate) fn name(lost: &v1::Unreadable) -> &str {
    match lost.key.split_once('/') {
        Some((_, name)) if !lost.key.contains(" .. ") => name,
        _ => &lost.key,
    }
}

/// Says on stderr that something is missing and why.
pub(crate) fn tell(unreadable: &[v1::Unreadable]) {
    if let Some(first) = unreadable.first() {
        print::note(format!(
            "the server's store is damaged, not everything can be read ({}: {}); `netctl server status` says what is damaged",
            first.key, first.why
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::print::Format;

    #[derive(Serialize)]
    struct Pod {
        pod: &'static str,
    }

    impl Row for Pod {
        const HEADER: &'static [&'static str] = &["POD", "NODE", "STATE"];

        fn cells(&self) -> Vec<String> {
            vec![self.pod.into(), "n1".into(), "running".into()]
        }
    }

    #[test]
    fn what_cannot_be_read_has_a_line_in_every_form() {
        let lost = |key: &str| v1::Unreadable { key: key.into(), why: "why".into() };
        let lines = lines(vec![Pod { pod: "a" }], vec![lost("pod/b"), lost("pod/c .. token/d")]);
        let printed = |format| {
            let mut out = Vec::new();
            print::rows(&mut out, format, &lines).unwrap();
            String::from_utf8(out).unwrap()
        };
        expect_test::expect![[r"
            POD               NODE        STATE
            a                 n1          running
            b                 unreadable  -
            pod/c .. token/d  unreadable  -
        "]]
        .assert_eq(&printed(Format::Table));
        let json: serde_json::Value = serde_json::from_str(&printed(Format::Json)).unwrap();
        assert_eq!((&json[0]["pod"], &json[1]["unreadable"]), (&"a".into(), &"b".into()));
    }
}
