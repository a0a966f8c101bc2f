//! The reason that a person gives for looking at personal data, which must not become personal data itself.

use super::policy::ReasonRule;

/// The longest reason, in characters.
const LONGEST: usize = 50;
/// As many digits in a run make a phone number.
const PHONE_DIGITS: usize = 7;
/// Stands for a number that is no phone number; breaks a run of digits.
const HARMLESS: char = '#';

/// Why a reason is refused. Never repeats it: it may hold what must not be logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReasonError {
    /// There is none.
    #[error("a reason is required")]
    Missing,
    /// It is too long.
    #[error("reason is longer than {LONGEST} characters")]
    TooLong,
    /// It holds characters that cannot be seen.
    #[error("reason holds control characters")]
    Control,
    /// It holds an e-mail address.
    #[error("reason holds an e-mail address")]
    Email,
    /// It holds a phone number, or what could be one.
    #[error("reason holds a phone number")]
    Phone,
}

impl ReasonError {
    /// What would be right, as a sentence.
    pub fn hint(self) -> &'static str {
        match self {
            Self::Missing => "Say in a few words what the data is needed for.",
            Self::TooLong => "Shorten it, or name a ticket.",
            Self::Control => "Use one line of plain text.",
            Self::Email | Self::Phone => "Name a ticket or an order number; leave the buyer's data out.",
        }
    }
}

/// Checks a reason and returns it trimmed; empty if there is none and none is required.
///
/// # Errors
/// Which rule it breaks.
pub fn check(reason: Option<&str>, rule: ReasonRule) -> Result<String, ReasonError> {
    let reason = reason.unwrap_or_default().trim();
    if reason.is_empty() && rule == ReasonRule::Required {
        return Err(ReasonError::Missing);
    }
    if reason.chars().any(is_unseen) {
        return Err(ReasonError::Control);
    }
    if reason.chars().count() > LONGEST {
        return Err(ReasonError::TooLong);
    }
    // Joiners are part of some scripts' words, but must not hide an address or a number.
    let seen: Vec<char> = reason.chars().filter(|c| !is_joiner(*c)).map(plain).collect();
    if holds_email(&seen) {
        return Err(ReasonError::Email);
    }
    if holds_phone(&seen) {
        return Err(ReasonError::Phone);
    }
    Ok(reason.to_owned())
}

/// Control characters, line separators, and marks that change how text reads without being seen.
fn is_unseen(c: char) -> bool {
    let formats = matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}');
    c.is_control() || formats
}

fn is_joiner(c: char) -> bool {
    matches!(c, '\u{200c}' | '\u{200d}')
}

/// The ASCII character that one of another script stands for, where it matters here.
fn plain(c: char) -> char {
    match c {
        '\u{2010}'..='\u{2015}' | '\u{2212}' | '\u{fe58}' | '\u{fe63}' | '\u{ff0d}' => '\u{2010}',
        '\u{ff01}'..='\u{ff5e}' => char::from_u32(u32::from(c) - 0xfee0).unwrap_or(c),
        '\u{fe6b}' => '@',
        '-' => '-',
        _ if c.is_whitespace() => ' ',
        _ => c,
    }
}

/// An at sign between a name and a host; with blanks around it, only if the host has a dot.
fn holds_email(text: &[char]) -> bool {
    text.iter().enumerate().filter(|(_, c)| **c == '@').any(|(at, _)| {
        let (before, after) = (&text[..at], &text[at + 1..]);
        let name = before.iter().rev().find(|c| **c != ' ');
        let host: String = after
            .iter()
            .skip_while(|c| **c == ' ')
            .take_while(|c| **c != ' ')
            .collect();
        let tight = before.last() != Some(&' ') && after.first() != Some(&' ');
        let dotted = host.split_once('.').is_some_and(|(label, domain)| {
            !label.is_empty() && domain.chars().take(2).filter(|c| c.is_alphabetic()).count() == 2
        });
        name.is_some_and(|c| c.is_alphanumeric() || ".!#$%&'*+/=?^_`{|}~\"-".contains(*c))
            && host.starts_with(|c: char| c.is_alphanumeric() || c == '[')
            && (tight || dotted)
    })
}

/// Seven digits with nothing but a phone number's punctuation between them; Amazon's order numbers and dates aside.
fn holds_phone(text: &[char]) -> bool {
    let mut digits = 0;
    let mut at = 0;
    while at < text.len() {
        let harmless = harmless(text, at);
        let c = if harmless > 0 { HARMLESS } else { text[at] };
        if c.is_numeric() {
            digits += 1;
        } else if !" -\u{2010}.()/+".contains(c) {
            digits = 0;
        }
        if digits >= PHONE_DIGITS {
            return true;
        }
        at += harmless.max(1);
    }
    false
}

/// The length of an order number or a date that begins here and stands alone; 0 if there is none.
fn harmless(text: &[char], at: usize) -> usize {
    let attached = |c: &char| c.is_numeric() || "-\u{2010}./+".contains(*c);
    let before = &text[..at];
    if before.last().is_some_and(attached) {
        return 0;
    }
    const SHAPES: [&str; 4] = ["ddd-ddddddd-ddddddd", "dddd-dd-dd", "dd.dd.dddd", "d.d.dddd"];
    let lengths = SHAPES.iter().chain(&["dd.d.dddd", "d.dd.dddd", "dd/dd/dddd"]);
    lengths
        .filter(|shape| fits(shape, &text[at..]))
        .map(|shape| shape.len())
        .find(|length| {
            let after = &text[at + length..];
            let ends = match after {
                [] => true,
                [c, next, ..] if "-\u{2010}./)".contains(*c) => !next.is_numeric(),
                [c, ..] => !c.is_numeric(),
            };
            ends && (*length == 19 || is_date(&text[at..at + length]))
        })
        .unwrap_or(0)
}

fn fits(shape: &str, text: &[char]) -> bool {
    text.len() >= shape.len()
        && shape
            .chars()
            .zip(text)
            .all(|(s, c)| if s == 'd' { c.is_ascii_digit() } else { s == *c })
}

/// Whether the numbers can be a day, a month and a year of our time, in any order in which people write them.
fn is_date(text: &[char]) -> bool {
    let text: String = text.iter().collect();
    let parts: Vec<u32> = text
        .split(['-', '.', '/'])
        .filter_map(|part| part.parse().ok())
        .collect();
    let [a, b, c] = parts[..] else { return false };
    let (year, x, y) = if a > 31 { (a, b, c) } else { (c, a, b) };
    let day_and_month = (1..=12).contains(&x.min(y)) && (1..=31).contains(&x.max(y));
    (1900..=2100).contains(&year) && day_and_month
}

#[cfg(test)]
mod tests {
    use super::*;

    fn required(reason: &str) -> Result<String, ReasonError> {
        check(Some(reason), ReasonRule::Required)
    }

    #[test]
    fn required_unless_optional() {
        for nothing in [None, Some(""), Some("  \t ")] {
            assert_eq!(check(nothing, ReasonRule::Required), Err(ReasonError::Missing));
            assert_eq!(check(nothing, ReasonRule::Optional), Ok(String::new()));
        }
    }

    #[test]
    fn comes_back_trimmed() {
        assert_eq!(required("  return of a parcel ").as_deref(), Ok("return of a parcel"));
    }

    #[test]
    fn fifty_characters_not_bytes() {
        assert!(required(&"ü".repeat(50)).is_ok());
        assert_eq!(required(&"x".repeat(51)), Err(ReasonError::TooLong));
    }

    #[test]
    fn no_control_characters() {
        for text in [
            "a\nb",
            "a\0b",
            "a\u{1b}[31mb",
            "a\u{202e}b",
            "a\u{200b}b",
            "a\u{2028}b",
            "a\u{85}b",
        ] {
            assert_eq!(required(text), Err(ReasonError::Control), "{text:?}");
        }
    }

    #[test]
    fn no_email_addresses() {
        for text in [
            "bob@example.com",
            "asked by <bob.smith+x@mail.example.co.uk>",
            "bob @ example.com",
            "bob@localhost",
            "x bob＠example.com",
            "jürgen@müller.de",
            "bob\u{200d}@\u{200d}example.com",
        ] {
            assert_eq!(required(text), Err(ReasonError::Email), "{text}");
        }
    }

    #[test]
    fn at_signs_that_are_no_address() {
        for text in ["3 @ 5.00 EUR", "ask @home", "ticket 5 @ desk", "@", "a@ b"] {
            assert!(required(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn no_phone_numbers() {
        for text in [
            "call +49 171 2345678",
            "0171/2345678",
            "(030) 123-4567",
            "030.123.45.67",
            "1234567",
            "00 49 30 1 2 3 4",
            "0171–2345678",
            "０１７１２３４５",
            "٠١٢٣٤٥٦٧",
            "012\u{200d}345\u{200d}67",
            "0171-2026-11-22",
            "2026-11-22-0171",
            "+49 2026-11-22 0171 234 56",
            "302-1234567-12345678",
            "+302-1234567-1234567",
            "9999-11-22",
            "2026-13-22",
        ] {
            assert_eq!(required(text), Err(ReasonError::Phone), "{text}");
        }
    }

    #[test]
    fn numbers_that_are_no_phone_number() {
        for text in [
            "order 302-1234567-7654321",
            "302-1234567-7654321 302-1234567-7654322",
            "302-1234567-7654321, return 2026-11-22",
            "(302-1234567-7654321)",
            "returned 2026-11-22.",
            "since 22.11.2026 10:30",
            "on 1.2.2026 and 11/22/2026",
            "2026-11-22 10:30:15",
            "123456 parcels",
            "ticket 4711, 815 and 42",
        ] {
            assert!(required(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn errors_do_not_repeat_the_reason() {
        let error = required("bob@example.com").unwrap_err();
        assert!(!format!("{error} {error:?} {}", error.hint()).contains("bob"));
    }
}
