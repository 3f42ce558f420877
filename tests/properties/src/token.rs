//! Join tokens: what is read as one prints as one that means the same.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};

use crate::api::token::{TOKEN_LEN_MAX, Token};

const PREFIX: &str = "hx1-";

/// The property, of the input as a text and of the token with the input as its bytes.
///
/// # Panics
/// When it does not hold.
pub fn holds(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        text_holds(text);
    }
    text_holds(&format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(data)));
}

fn text_holds(text: &str) {
    match text.parse::<Token>() {
        Ok(token) => {
            assert!(text.trim().len() <= PREFIX.len() + TOKEN_LEN_MAX, "longer than a token may be");
            assert!(!token.servers.is_empty(), "a token without servers");
            let printed = token.to_string();
            assert_eq!(printed.parse().as_ref(), Ok(&token), "{text:?} prints as {printed:?}");
        }
        // An error that repeats the input would carry it into logs and terminals.
        Err(error) => assert!(error.to_string().len() < 1024, "an endless error: {error}"),
    }
}
