//! YAML as a tree that knows where each value stands, so that every error can say so.
//!
//! Reads YAML 1.2 from people, with bounds: depth, number of values (aliases counted as often as they are
//! used), no tags, no key twice in a map. Output is not its job; that is `serde_norway`'s.

mod deserialize;

use std::{collections::BTreeMap, fmt, rc::Rc};

use saphyr_parser::{Event, Parser, ScalarStyle, Span, StrInput};

/// The most values in one file, aliases counted as often as they are used.
const VALUES_MAX: usize = 100_000;

/// How deep maps and lists may be nested.
const DEPTH_MAX: usize = 32;

/// A place in a file, both counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mark {
    pub(crate) line: usize,
    pub(crate) column: usize,
}

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct YamlError {
    pub(crate) message: String,
    pub(crate) mark: Option<Mark>,
}

/// A value and where it starts.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) mark: Mark,
    value: Rc<Value>,
    /// Values in it, itself included.
    size: usize,
    /// Levels in it, itself included.
    depth: usize,
}

#[derive(Debug)]
enum Value {
    /// `plain` tells an unquoted scalar, which may be a number, from a string.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    Map(Vec<(Node, Node)>),
}

/// Reads every document of `text`; documents without content are left out.
pub(crate) fn parse(text: &str) -> Result<Vec<Node>, YamlError> {
    let mut reader = Reader { events: Parser::new_from_str(text), anchors: BTreeMap::new(), values: 0 };
    let mut documents = Vec::new();
    while let Some((event, span)) = reader.next()? {
        match event {
            Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing => {}
            Event::StreamEnd => break,
            event => {
                let node = reader.node(event, span, 1)?;
                if !node.is_null() {
                    documents.push(node);
                }
                reader.anchors.clear();
            }
        }
    }
    Ok(documents)
}

impl Node {
    /// Where the value at `path` stands, or the nearest value above it; `groups.web.tasks[0]`.
    pub(crate) fn mark_of(&self, path: &str) -> Mark {
        let mut mark = self.mark;
        let mut node = self;
        for step in path.split(['.', '[', ']']).filter(|step| !step.is_empty()) {
            let Some((found, child)) = node.child(step) else { break };
            (mark, node) = (found, child);
        }
        mark
    }

    /// A child, and the mark of its key.
    fn child(&self, step: &str) -> Option<(Mark, &Node)> {
        match &*self.value {
            Value::Map(entries) => entries
                .iter()
                .find(|(key, _)| matches!(&*key.value, Value::Scalar { text, .. } if text == step))
                .map(|(key, value)| (key.mark, value)),
            Value::List(items) => items.get(step.parse::<usize>().ok()?).map(|item| (item.mark, item)),
            Value::Scalar { .. } => None,
        }
    }

    fn is_null(&self) -> bool {
        matches!(&*self.value, Value::Scalar { text, plain: true } if is_null_text(text))
    }
}

fn is_null_text(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
}

impl From<Span> for Mark {
    fn from(span: Span) -> Mark {
        Mark { line: span.start.line(), column: span.start.col() + 1 }
    }
}

impl YamlError {
    fn at(mark: Mark, message: impl Into<String>) -> YamlError {
        YamlError { message: message.into(), mark: Some(mark) }
    }

    /// Adds the place, unless a nearer one is known.
    fn or_at(self, mark: Mark) -> YamlError {
        YamlError { mark: self.mark.or(Some(mark)), ..self }
    }
}

impl fmt::Display for YamlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for YamlError {}

struct Reader<'a> {
    events: Parser<'a, StrInput<'a>>,
    /// By the parser's anchor id. Id 0 is "no anchor".
    anchors: BTreeMap<usize, Node>,
    values: usize,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<Option<(Event<'a>, Span)>, YamlError> {
        self.events.next_event().transpose().map_err(|error| {
            let mark = Mark { line: error.marker().line(), column: error.marker().col() + 1 };
            YamlError::at(mark, format!("not YAML: {}", error.info()))
        })
    }

    fn expect_next(&mut self, mark: Mark) -> Result<(Event<'a>, Span), YamlError> {
        self.next()?.ok_or_else(|| YamlError::at(mark, "not YAML: it ends in the middle of this value"))
    }

    fn node(&mut self, event: Event<'a>, span: Span, level: usize) -> Result<Node, YamlError> {
        let mark = Mark::from(span);
        if level > DEPTH_MAX {
            return Err(YamlError::at(mark, format!("nested deeper than {DEPTH_MAX} levels")));
        }
        let (node, anchor) = match event {
            Event::Alias(id) => (self.alias(id, mark, level)?, 0),
            Event::Scalar(text, style, anchor, tag) => {
                refuse_tag(tag.is_some(), mark)?;
                let plain = matches!(style, ScalarStyle::Plain);
                (Node::new(mark, Value::Scalar { text: text.into_owned(), plain }), anchor)
            }
            Event::SequenceStart(anchor, tag) => {
                refuse_tag(tag.is_some(), mark)?;
                (self.list(mark, level)?, anchor)
            }
            Event::MappingStart(anchor, tag) => {
                refuse_tag(tag.is_some(), mark)?;
                (self.map(mark, level)?, anchor)
            }
            _ => return Err(YamlError::at(mark, "not YAML: a value was expected here")),
        };
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    /// Counts a value, and those behind an alias.
    fn count(&mut self, values: usize, mark: Mark) -> Result<(), YamlError> {
        self.values = self.values.saturating_add(values);
        if self.values > VALUES_MAX {
            return Err(YamlError::at(
                mark,
                format!("more than {VALUES_MAX} values, aliases counted as used"),
            ));
        }
        Ok(())
    }

    fn alias(&mut self, id: usize, mark: Mark, level: usize) -> Result<Node, YamlError> {
        let target = self.anchors.get(&id).cloned();
        let node = target.ok_or_else(|| YamlError::at(mark, "an alias inside of its own anchor"))?;
        self.count(node.size, mark)?;
        if level + node.depth > DEPTH_MAX {
            return Err(YamlError::at(mark, format!("nested deeper than {DEPTH_MAX} levels")));
        }
        Ok(Node { mark, ..node })
    }

    fn list(&mut self, mark: Mark, level: usize) -> Result<Node, YamlError> {
        let mut items = Vec::new();
        loop {
            match self.expect_next(mark)? {
                (Event::SequenceEnd, _) => return Ok(Node::new(mark, Value::List(items))),
                (event, span) => {
                    self.count(1, span.into())?;
                    items.push(self.node(event, span, level + 1)?);
                }
            }
        }
    }

    fn map(&mut self, mark: Mark, level: usize) -> Result<Node, YamlError> {
        let mut entries: Vec<(Node, Node)> = Vec::new();
        let mut seen = BTreeMap::new();
        loop {
            let (event, span) = self.expect_next(mark)?;
            if matches!(event, Event::MappingEnd) {
                return Ok(Node::new(mark, Value::Map(entries)));
            }
            self.count(2, span.into())?;
            let key = self.node(event, span, level + 1)?;
            refuse_second(&mut seen, &key)?;
            let (event, span) = self.expect_next(mark)?;
            let value = self.node(event, span, level + 1)?;
            entries.push((key, value));
        }
    }
}

impl Node {
    fn new(mark: Mark, value: Value) -> Node {
        let (size, depth) = match &value {
            Value::Scalar { .. } => (1, 1),
            Value::List(items) => extent(items.iter()),
            Value::Map(entries) => extent(entries.iter().flat_map(|(key, value)| [key, value])),
        };
        Node { mark, value: Rc::new(value), size, depth }
    }
}

fn extent<'a>(children: impl Iterator<Item = &'a Node>) -> (usize, usize) {
    children
        .fold((1, 1), |(size, depth), child| (size.saturating_add(child.size), depth.max(child.depth + 1)))
}

fn refuse_tag(tagged: bool, mark: Mark) -> Result<(), YamlError> {
    if tagged {
        Err(YamlError::at(mark, "tags (`!name`) have no meaning here: leave it out"))
    } else {
        Ok(())
    }
}

fn refuse_second(seen: &mut BTreeMap<String, Mark>, key: &Node) -> Result<(), YamlError> {
    let Value::Scalar { text, .. } = &*key.value else {
        return Err(YamlError::at(key.mark, "a key must be a plain word"));
    };
    match seen.insert(text.clone(), key.mark) {
        Some(first) => {
            Err(YamlError::at(key.mark, format!("`{text}` is given twice: first in line {}", first.line)))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        let error = parse(text).expect_err("this is refused");
        let mark = error.mark.expect("every error has a place");
        format!("{}:{}: {}", mark.line, mark.column, error.message)
    }

    #[test]
    fn documents_without_content_are_left_out() {
        assert_eq!(parse("").unwrap().len(), 0);
        assert_eq!(parse("# only a comment\n---\n---\na: 1\n---\nb: 2\n").unwrap().len(), 2);
    }

    #[test]
    fn paths_lead_to_marks() {
        let node = &parse("job: hello\ngroups:\n  web:\n    exec: [a, b]\n").unwrap()[0];
        let at = |path| {
            let mark = node.mark_of(path);
            (mark.line, mark.column)
        };
        assert_eq!(at("groups.web"), (3, 3));
        assert_eq!(at("groups.web.exec[1]"), (4, 15));
        assert_eq!(at("groups.web.nothing.there"), (3, 3));
        assert_eq!(at(""), (1, 1));
    }

    #[test]
    fn a_key_given_twice_is_refused() {
        assert_eq!(error("a: 1\nb: 2\na: 3\n"), "3:1: `a` is given twice: first in line 1");
    }

    #[test]
    fn syntax_errors_have_a_place() {
        assert!(error("a: [1, 2\nb: 3\n").starts_with("2:"), "{}", error("a: [1, 2\nb: 3\n"));
        assert!(error("a: \"x\n").contains("not YAML"));
    }

    #[test]
    fn tags_and_keys_that_are_no_words_are_refused() {
        assert!(error("a: !!str 1\n").contains("tags"));
        assert!(error("[a, b]: 1\n").contains("plain word"));
    }

    #[test]
    fn aliases_are_followed() {
        let node = &parse("a: &x [1, 2]\nb: *x\n").unwrap()[0];
        assert_eq!(node.child("b").unwrap().1.child("1").unwrap().1.mark, Mark { line: 1, column: 11 });
    }

    /// Nine levels of nine aliases each would be 387 million values.
    #[test]
    fn an_alias_bomb_is_refused() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
        for level in 1..9 {
            let item = format!("*a{}", level - 1);
            text.push_str(&format!("a{level}: &a{level} [{}]\n", [item.as_str(); 9].join(", ")));
        }
        assert!(error(&text).contains("more than 100000 values"), "{}", error(&text));
    }

    #[test]
    fn deep_nesting_is_refused() {
        for level in ["[", "- ", "{a: "] {
            assert!(error(&level.repeat(100)).contains("nested deeper"), "{}", error(&level.repeat(100)));
        }
        // The parser has a bound of its own, for what it reads ahead.
        assert!(error(&"[".repeat(100_000)).contains("recursion limit"));
    }
}
