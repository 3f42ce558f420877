//! Numbers as fixed-width hexadecimal text.

use crate::AddressError;

/// Parses one to `digits` hexadecimal digits, without sign or `0x`.
pub(crate) fn parse(text: &str, digits: usize) -> Result<u32, AddressError> {
    let plain = (1..=digits).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit());
    let number = if plain { u32::from_str_radix(text, 16).ok() } else { None };
    number.ok_or_else(|| AddressError::NotHex { text: text.to_owned(), digits })
}

/// Gives a type that has `Display` and `FromStr` the traits with which serde writes it as text.
macro_rules! text_serde {
    ($type:ty) => {
        impl TryFrom<String> for $type {
            type Error = $crate::AddressError;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
    };
}
pub(crate) use text_serde;
