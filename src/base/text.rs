//! Text from others, made fit for one line of a log or a terminal.
//!
//! Owns the escaping. Does not know where the text goes. Invariant: what comes out has no control characters and no
//! characters that change the direction of writing; everything else stays as it is.

use std::borrow::Cow;

/// Escapes control and direction characters; quotes and other letters stay.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(is_harmful) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        if is_harmful(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    Cow::Owned(out)
}

/// Controls (C0, C1, DEL), line and paragraph separators, and the bidirectional controls of Unicode UAX #9.
fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controls_are_escaped_and_words_are_not() {
        assert_eq!(printable("no target \"x\", größer"), "no target \"x\", größer");
        assert_eq!(printable("a\r\n\u{1b}[31m\u{202e}b"), "a\\r\\n\\u{1b}[31m\\u{202e}b");
    }
}
