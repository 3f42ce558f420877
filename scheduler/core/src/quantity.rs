//! Amounts of CPU and memory as people write them: `100m`, `2`, `64Mi`, `1G`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Thousandths of one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cpu(pub u32);

/// Bytes of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Memory(pub u64);

/// What a task or pod asks for, or a node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Processor time.
    pub cpu: Cpu,
    /// Main memory.
    pub memory: Memory,
}

/// Why a text is not an amount.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not an amount of CPU.
    #[error("`{0}` is not an amount of CPU: write thousandths such as `500m`, or CPUs such as `2` or `0.5`")]
    Cpu(String),
    /// Not an amount of memory.
    #[error(
        "`{0}` is not an amount of memory: write bytes, or a number and Ki, Mi, Gi, Ti, K, M, G or T, such as `64Mi`"
    )]
    Memory(String),
}

const MEMORY_UNITS: [(&str, u64); 8] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("K", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
];

impl Memory {
    /// A reading for people of what is missing: rounded up to whole mebibytes.
    #[must_use]
    pub fn rounded_up(self) -> Memory {
        Memory(self.0.div_ceil(1 << 20) << 20)
    }

    /// A reading for people: rounded down to whole mebibytes where there is one.
    #[must_use]
    pub fn rounded(self) -> Memory {
        const MEBI: u64 = 1 << 20;
        if self.0 < MEBI { self } else { Memory(self.0 / MEBI * MEBI) }
    }
}

impl FromStr for Cpu {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Cpu, QuantityError> {
        let millis = match text.strip_suffix('m') {
            Some(number) => digits(number),
            None => decimal_thousandths(text),
        };
        let millis = millis.and_then(|millis| u32::try_from(millis).ok());
        millis.map(Cpu).ok_or_else(|| QuantityError::Cpu(excerpt(text)))
    }
}

impl FromStr for Memory {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Memory, QuantityError> {
        let (number, unit) = MEMORY_UNITS
            .iter()
            .find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|number| (number, *unit)))
            .unwrap_or((text, 1));
        let bytes = digits(number).and_then(|number| number.checked_mul(unit));
        bytes.map(Memory).ok_or_else(|| QuantityError::Memory(excerpt(text)))
    }
}

fn excerpt(text: &str) -> String {
    text.chars().take(40).collect()
}

/// A number of ASCII digits alone: `u64::from_str` would also take a plus sign.
fn digits(text: &str) -> Option<u64> {
    let all = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if all { text.parse().ok() } else { None }
}

/// `2`, `0.5` or `1.125` as thousandths.
fn decimal_thousandths(text: &str) -> Option<u64> {
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    if fraction.len() > 3 {
        return None;
    }
    let thousandths = digits(&format!("{fraction:0<3}")).filter(|_| !fraction.is_empty())?;
    digits(whole)?.checked_mul(1000)?.checked_add(thousandths)
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}m", self.0)
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let binary = MEMORY_UNITS[..4].iter().rev();
        let fits = |unit: &u64| self.0 != 0 && self.0.is_multiple_of(*unit);
        match binary.into_iter().find(|(_, unit)| fits(unit)) {
            Some((suffix, unit)) => write!(f, "{}{suffix}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

macro_rules! serde_as_text {
    ($amount:ty, $expecting:literal) => {
        impl Serialize for $amount {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $amount {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                struct Visitor;
                impl de::Visitor<'_> for Visitor {
                    type Value = $amount;

                    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                        f.write_str($expecting)
                    }

                    fn visit_str<E: de::Error>(self, text: &str) -> Result<$amount, E> {
                        text.parse().map_err(E::custom)
                    }

                    fn visit_u64<E: de::Error>(self, number: u64) -> Result<$amount, E> {
                        self.visit_str(&number.to_string())
                    }

                    fn visit_f64<E: de::Error>(self, number: f64) -> Result<$amount, E> {
                        self.visit_str(&number.to_string())
                    }
                }
                deserializer.deserialize_any(Visitor)
            }
        }
    };
}

serde_as_text!(Cpu, "an amount of CPU such as `500m` or `2`");
serde_as_text!(Memory, "an amount of memory such as `64Mi`");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_is_read_in_thousandths_and_in_cpus() {
        for (text, millis) in [("100m", 100), ("0m", 0), ("2", 2000), ("0.5", 500), ("1.125", 1125)] {
            assert_eq!(text.parse(), Ok(Cpu(millis)), "{text}");
        }
    }

    #[test]
    fn memory_is_read_with_binary_and_decimal_units() {
        for (text, bytes) in [("0", 0), ("17", 17), ("64Mi", 64 << 20), ("1Gi", 1 << 30), ("2K", 2000)] {
            assert_eq!(text.parse(), Ok(Memory(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        for text in
            ["", "m", "+1", "-1", "1.", ".5", "1.2345", "1e3", "1 ", "99999999999999999999", "5000000"]
        {
            assert_eq!(text.parse::<Cpu>(), Err(QuantityError::Cpu(text.to_owned())), "{text}");
        }
        for text in ["", "Mi", "64mi", "64MiB", "-1", "1.5Gi", "99999999999Ti"] {
            assert_eq!(text.parse::<Memory>(), Err(QuantityError::Memory(text.to_owned())), "{text}");
        }
    }

    #[test]
    fn amounts_print_as_they_are_read() {
        assert_eq!(Cpu(1500).to_string(), "1500m");
        for bytes in [0, 1, 1000, 1 << 10, 64 << 20, 3 << 40, u64::MAX] {
            assert_eq!(Memory(bytes).to_string().parse(), Ok(Memory(bytes)));
        }
        assert_eq!(Memory(64 << 20).to_string(), "64Mi");
    }

    #[test]
    fn yaml_numbers_are_amounts_too() {
        let read = |text: &str| serde_norway::from_str::<Cpu>(text).map_err(|error| error.to_string());
        assert_eq!(read("2"), Ok(Cpu(2000)));
        assert_eq!(read("0.5"), Ok(Cpu(500)));
        assert_eq!(read("250m"), Ok(Cpu(250)));
        assert!(read("[]").unwrap_err().contains("an amount of CPU such as"));
        assert!(read("a lot").unwrap_err().contains("write thousandths such as `500m`"));
    }
}
