//! Amazon's order numbers.

/// The form of an Amazon order number, for PostgreSQL's `~` operator.
///
/// `[0-9]` and not `\d`, which matches the digits of every script under some locales.
pub const AMAZON_NUMBER_REGEX: &str = "^[0-9]{3}-[0-9]{7}-[0-9]{7}$";

/// Whether a text is an Amazon order number and nothing else: 3, 7 and 7 digits, with hyphens between them.
#[cfg(test)]
pub fn is_amazon_number(s: &str) -> bool {
    let bytes = s.as_bytes();
    bytes.len() == 19
        && bytes.iter().enumerate().all(|(at, byte)| match at {
            3 | 11 => *byte == b'-',
            _ => byte.is_ascii_digit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_three_seven_seven() {
        assert!(is_amazon_number("302-1234567-7654321"));
        assert!(is_amazon_number("000-0000000-0000000"));
    }

    #[test]
    fn takes_nothing_else() {
        for other in [
            "",
            " 302-1234567-7654321",
            "302-1234567-7654321 ",
            "302-1234567-7654321\n",
            "3021-234567-7654321",
            "302-12345677654321",
            "302-1234567-765432",
            "302-1234567-76543210",
            "302-1234567-765432x",
            "302–1234567–7654321",
            "S02-1234567-7654321",
            "٣٠٢-1234567-7654321",
        ] {
            assert!(!is_amazon_number(other), "{other:?}");
        }
    }
}
