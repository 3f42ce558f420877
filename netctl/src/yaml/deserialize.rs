//! serde's side of the tree: a value becomes a type, an error gets the place of the value it is about.
//!
//! Where a type asks for text, an unquoted number or `yes` is that text, as it is written: `PORT: 8080` in
//! an environment needs no quotes.

use serde::de::{
    self, DeserializeSeed, Deserializer, Error as _, Expected, IntoDeserializer as _, MapAccess, SeqAccess,
    Unexpected, Visitor, value::StrDeserializer,
};

use super::{Mark, Node, Value, YamlError, is_null_text};

impl Node {
    /// Makes a `T` of it.
    pub(crate) fn read<T: de::DeserializeOwned>(&self) -> Result<T, YamlError> {
        T::deserialize(self)
    }

    fn unexpected(&self) -> Unexpected<'_> {
        match &*self.value {
            Value::List(_) => Unexpected::Seq,
            Value::Map(_) => Unexpected::Map,
            Value::Scalar { text, plain: true } if is_null_text(text) => Unexpected::Unit,
            Value::Scalar { text, plain: true } => Unexpected::Other(text),
            Value::Scalar { text, .. } => Unexpected::Str(text),
        }
    }

    fn wrong(&self, expected: &dyn Expected) -> YamlError {
        YamlError::invalid_type(self.unexpected(), expected).or_at(self.mark)
    }

    fn text(&self) -> Option<&str> {
        match &*self.value {
            Value::Scalar { text, plain } if !(*plain && is_null_text(text)) => Some(text),
            _ => None,
        }
    }

    fn visit_scalar<'de, V: Visitor<'de>>(text: &str, visitor: V) -> Result<V::Value, YamlError> {
        match text {
            text if is_null_text(text) => visitor.visit_unit(),
            "true" | "True" | "TRUE" => visitor.visit_bool(true),
            "false" | "False" | "FALSE" => visitor.visit_bool(false),
            text => visit_number_or_text(text, visitor),
        }
    }
}

fn visit_number_or_text<'de, V: Visitor<'de>>(text: &str, visitor: V) -> Result<V::Value, YamlError> {
    let radix = |prefix, radix| {
        text.strip_prefix(prefix).and_then(|digits: &str| u64::from_str_radix(digits, radix).ok())
    };
    if let Some(number) = text.parse::<u64>().ok().or_else(|| radix("0x", 16)).or_else(|| radix("0o", 8)) {
        return visitor.visit_u64(number);
    }
    if let Ok(number) = text.parse::<i64>() {
        return visitor.visit_i64(number);
    }
    match text.parse::<f64>() {
        // Rust reads `infinity` and `nan` as numbers; YAML does not.
        Ok(number) if text.contains(|c: char| c.is_ascii_digit()) => visitor.visit_f64(number),
        _ => visitor.visit_str(text),
    }
}

impl<'de> Deserializer<'de> for &Node {
    type Error = YamlError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, YamlError> {
        let read = match &*self.value {
            Value::Scalar { text, plain: true } => Node::visit_scalar(text, visitor),
            Value::Scalar { text, plain: false } => visitor.visit_str(text),
            Value::List(items) => visitor.visit_seq(Items(items.iter())),
            Value::Map(entries) => visitor.visit_map(Entries { rest: entries.iter(), value: None }),
        };
        read.map_err(|error| error.or_at(self.mark))
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, YamlError> {
        match self.text() {
            Some(text) => visitor.visit_str(text).map_err(|error: YamlError| error.or_at(self.mark)),
            None => Err(self.wrong(&visitor)),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, YamlError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, YamlError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, YamlError> {
        if self.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, YamlError> {
        visitor.visit_newtype_struct(self).map_err(|error: YamlError| error.or_at(self.mark))
    }

    /// serde would also take a list for the fields in their order.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, YamlError> {
        match &*self.value {
            Value::Map(_) => self.deserialize_any(visitor),
            _ => Err(self.wrong(&visitor)),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, YamlError> {
        let Some(text) = self.text() else { return Err(self.wrong(&"a word")) };
        let word: StrDeserializer<'_, YamlError> = text.into_deserializer();
        visitor.visit_enum(word).map_err(|error| error.or_at(self.mark))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, YamlError> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit unit_struct seq tuple
        tuple_struct map
    }
}

struct Items<'a>(std::slice::Iter<'a, Node>);

impl<'de> SeqAccess<'de> for Items<'_> {
    type Error = YamlError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, YamlError> {
        self.0.next().map(|node| seed.deserialize(node).map_err(|error| error.or_at(node.mark))).transpose()
    }
}

struct Entries<'a> {
    rest: std::slice::Iter<'a, (Node, Node)>,
    value: Option<&'a Node>,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = YamlError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, YamlError> {
        let Some((key, value)) = self.rest.next() else { return Ok(None) };
        self.value = Some(value);
        seed.deserialize(key).map(Some).map_err(|error| error.or_at(key.mark))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, YamlError> {
        let node = self.value.take().expect("serde asks for a value after its key");
        seed.deserialize(node).map_err(|error| error.or_at(node.mark))
    }
}

impl de::Error for YamlError {
    fn custom<T: std::fmt::Display>(message: T) -> YamlError {
        YamlError { message: message.to_string(), mark: None::<Mark> }
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> YamlError {
        YamlError::custom(format!("expected {}, found {}", in_words(expected), found_in_words(found)))
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> YamlError {
        YamlError::invalid_type(found, expected)
    }

    fn unknown_field(field: &str, known: &'static [&'static str]) -> YamlError {
        YamlError::custom(unknown("field", field, known))
    }

    fn unknown_variant(word: &str, known: &'static [&'static str]) -> YamlError {
        YamlError::custom(unknown("word", word, known))
    }

    fn missing_field(field: &'static str) -> YamlError {
        YamlError::custom(format!("field `{field}` is missing"))
    }
}

fn unknown(what: &str, word: &str, known: &[&str]) -> String {
    let list: Vec<String> = known.iter().map(|word| format!("`{word}`")).collect();
    let expected = match list.as_slice() {
        [] => "none is known here".to_owned(),
        [only] => format!("expected {only}"),
        several => format!("expected one of {}", several.join(", ")),
    };
    match nearest(word, known) {
        Some(near) => format!("unknown {what} `{word}`, {expected}; did you mean `{near}`?"),
        None => format!("unknown {what} `{word}`, {expected}"),
    }
}

/// The known word that was probably meant.
fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    // One slip in a short word, two in a longer one; a swap of neighbours is one slip.
    let slips_max = if word.chars().count() <= 4 { 1 } else { 2 };
    known
        .iter()
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), *candidate))
        .filter(|(slips, candidate)| *slips <= slips_max || candidate.starts_with(word))
        .min()
        .map(|(_, candidate)| candidate)
}

/// Rust's names of types, as people say them.
fn in_words(expected: &dyn Expected) -> String {
    let text = expected.to_string();
    match text.as_str() {
        "u8" => "a whole number from 0 to 255".to_owned(),
        "u16" => "a whole number from 0 to 65535".to_owned(),
        "u32" => format!("a whole number from 0 to {}", u32::MAX),
        "u64" | "usize" => "a whole number, 0 or more".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".to_owned(),
        "f32" | "f64" => "a number".to_owned(),
        "a boolean" => "true or false".to_owned(),
        "a string" => "text".to_owned(),
        "a sequence" => "a list".to_owned(),
        text if text.starts_with("struct ") => "fields (`name: value`)".to_owned(),
        text => text.to_owned(),
    }
}

fn found_in_words(found: Unexpected<'_>) -> String {
    match found {
        Unexpected::Unit | Unexpected::Option => "nothing".to_owned(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a map".to_owned(),
        Unexpected::Str(text) | Unexpected::Other(text) => format!("`{}`", shortened(text)),
        Unexpected::Bool(value) => format!("`{value}`"),
        Unexpected::Unsigned(value) => format!("`{value}`"),
        Unexpected::Signed(value) => format!("`{value}`"),
        Unexpected::Float(value) => format!("`{value}`"),
        other => other.to_string(),
    }
}

fn shortened(text: &str) -> String {
    const CHARS_MAX: usize = 40;
    let line = text.lines().next().unwrap_or_default();
    if line.chars().count() > CHARS_MAX || line.len() < text.len() {
        line.chars().take(CHARS_MAX).chain("...".chars()).collect()
    } else {
        line.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::super::parse;

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Sample {
        count: u32,
        env: BTreeMap<String, String>,
        exec: Vec<String>,
        mode: Mode,
        maybe: Option<u16>,
        weight: f64,
        on: bool,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Mode {
        #[default]
        Node,
        Pack,
    }

    fn read(text: &str) -> Sample {
        parse(text).unwrap()[0].read().unwrap()
    }

    fn error(text: &str) -> String {
        let error = parse(text).unwrap()[0].read::<Sample>().expect_err("this is refused");
        let mark = error.mark.expect("every error has a place");
        format!("{}:{}: {}", mark.line, mark.column, error.message)
    }

    #[test]
    fn values_take_the_type_that_is_asked_for() {
        let sample = read(
            "count: 0x10\nenv: {PORT: 8080, ON: yes, Q: '1'}\nexec: [/bin/sleep, 1e3]\nmode: pack\nmaybe: ~\n\
             weight: 1\non: true\n",
        );
        assert_eq!(sample.count, 16);
        assert_eq!(sample.env["PORT"], "8080");
        assert_eq!(sample.env["ON"], "yes");
        assert_eq!(sample.exec, ["/bin/sleep", "1e3"]);
        assert_eq!((sample.mode, sample.maybe, sample.on), (Mode::Pack, None, true));
        assert_eq!(sample.weight, 1.0);
    }

    #[test]
    fn unknown_fields_name_the_nearest_known_one() {
        assert_eq!(
            error("exec: []\ncuont: 3\n"),
            "2:1: unknown field `cuont`, expected one of `count`, `env`, `exec`, `mode`, `maybe`, `weight`, \
             `on`; did you mean `count`?"
        );
        assert!(!error("colour: 3\n").contains("did you mean"));
    }

    #[test]
    fn unknown_words_name_the_known_ones() {
        assert_eq!(
            error("mode: pak\n"),
            "1:7: unknown word `pak`, expected one of `node`, `pack`; did you mean `pack`?"
        );
    }

    #[test]
    fn wrong_types_say_what_was_expected() {
        assert_eq!(
            error("count: three\n"),
            "1:8: expected a whole number from 0 to 4294967295, found `three`"
        );
        assert_eq!(error("count: -1\n"), "1:8: expected a whole number from 0 to 4294967295, found `-1`");
        assert_eq!(error("exec:\n  - a\n  - [b]\n"), "3:5: expected text, found a list");
        assert_eq!(error("exec: /bin/true\n"), "1:7: expected a list, found `/bin/true`");
        assert_eq!(error("env: {A: }\n"), "1:8: expected text, found nothing");
        assert_eq!(error("on: maybe\n"), "1:5: expected true or false, found `maybe`");
        assert_eq!(error("- a\n"), "1:1: expected fields (`name: value`), found a list");
    }
}
