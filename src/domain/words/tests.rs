use std::collections::HashSet;

use super::*;

fn finds(value: &str, text: &str) -> bool {
    let hashing = Hashing::new();
    let mut there = HashSet::new();
    let mut look = |text: &str| hashing.windows(text, |h| _ = there.insert(h));
    look(text);
    if let Some(text) = unescaped(text) {
        look(&text);
    }
    let sought = hashing.sought(value).expect("a telling value");
    assert!(sought.hashes().count() <= PARTS + 2);
    sought.is_there(|h| there.contains(&h))
}

// Broken: a value is overlooked that a person would see.
#[test]
fn finds_a_value_whatever_stands_around_it() {
    for text in [
        "Ada Invented",
        "ADA  INVENTED",
        "Dear Ada\nInvented, thank you",
        "{\"name\": \"Ada Invented\", \"x\": 1}",
        "{\"Ada Invented\",Bob}",
        "<name>Ada Invented</name>",
        "{\"note\": \"for\\nAda\\u0020Invented\\n\"}",
        &in_order("'ada':1 'invented':2"),
    ] {
        assert!(finds("Ada Invented", text), "{text}");
    }
    assert!(finds("Zoë Ünvented", "{\"n\": \"zo\\u00eb \\u00dcnvented\"}"));
    assert!(finds("ada@example.invalid", "mailto:Ada@Example.invalid?subject=x"));
    assert!(finds("Straße 1a", "Straße 1a, 2. Etage"));
}

// Broken: everything is an alarm.
#[test]
fn finds_nothing_else() {
    for text in [
        "",
        "Ada",
        "Invented Ada",
        "Ada Uninvented",
        "Adam Invented",
        "Ada B Invented",
        "A da Invented",
    ] {
        assert!(!finds("Ada Invented", text), "{text}");
    }
    assert!(!finds("Town 1", "Town 12"));
    assert!(!finds("123456", "1234567"));
}

#[test]
fn short_values_tell_nothing() {
    let hashing = Hashing::new();
    for value in [
        "",
        "Ada",
        "12345",
        "...... 1 ......",
        "Ümläu",
        "1 2 3",
        "🙂🙂🙂🙂🙂🙂🙂",
    ] {
        assert_eq!(hashing.sought(value), None, "{value}");
    }
    for value in ["123456", "Jo Lee", "Ümläut"] {
        assert!(hashing.sought(value).is_some(), "{value}");
    }
}

// Broken: a phone number is found only if it is written in the same way.
#[test]
fn finds_phone_numbers_by_their_digits() {
    let phone = "+49 555 1234-567";
    for text in [
        "495551234567",
        "call +49 (555) 123 45 67, or write",
        "+49/555/1234567",
        "{\"phone\": \"+49-555-1234567\"}",
        "12345, +49 555 1234567 99",
    ] {
        assert!(finds(phone, text), "{text}");
    }
    for text in [
        "4955512345678",
        "0495551234567",
        "49555 x 1234567",
        "49555 ---- 1234567",
        "495551234568",
    ] {
        assert!(!finds(phone, text), "{text}");
    }
    // What is no phone number is no mere sequence of digits.
    assert!(!finds("Nr. 12 34 56", "123456"));
}

// Broken: a letter that begins with the same words is taken for another.
#[test]
fn a_long_value_must_be_found_as_a_whole() {
    let words = |range: std::ops::Range<usize>| range.map(|n| format!("word{}", n + 10)).collect::<Vec<_>>().join(" ");
    let value = words(0..30);
    assert!(finds(&value, &format!("before {value} after")));
    assert!(!finds(&value, &words(0..29)));
    assert!(!finds(&value, &format!("{} other {}", words(0..12), words(13..30))));
    for length in 1..=20 {
        assert!(finds(&words(0..length), &words(0..25)), "{length} words");
        assert!(!finds(&words(0..length), &words(1..25)), "{length} words");
    }
    // A very long one is known by its beginning and its end.
    assert!(finds(&words(0..5000), &words(0..5000)));
}

#[test]
fn rows_are_told_apart_by_table_and_key() {
    let hashing = Hashing::new();
    let rows = [("a", "[\"1\"]"), ("a", "[\"2\"]"), ("b", "[\"1\"]"), ("a[", "\"1\"]")];
    let hashes: HashSet<u64> = rows.iter().map(|(t, k)| hashing.row(t, k)).collect();
    assert_eq!(hashes.len(), rows.len());
    assert_eq!(hashing.row("a", "[\"1\"]"), hashing.row("a", "[\"1\"]"));
    assert_ne!(Hashing::new().row("a", "[\"1\"]"), hashing.row("a", "[\"1\"]"));
}

#[test]
fn a_vector_is_read_in_the_order_of_its_positions() {
    assert_eq!(
        in_order("'ada':2A,5 'dear':1 'o''neill':3B 'x\\\\y':4"),
        "dear ada o'neill x\\y ada"
    );
    assert_eq!(in_order("'ada' 'bob'"), "ada bob");
    assert_eq!(in_order(""), "");
}

#[test]
fn escapes_are_undone() {
    assert_eq!(unescaped("plain"), None);
    assert_eq!(unescaped("a\\nb\\u00e9\\ud83d\\ude42\\\\").as_deref(), Some("a bé🙂\\"));
    assert_eq!(unescaped("\\u12").as_deref(), Some("12"));
    assert_eq!(unescaped("\\").as_deref(), Some(" "));
}
