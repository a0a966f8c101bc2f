#![allow(clippy::unwrap_used)]

use policy::Treatment as T;

use super::*;

const MARK: &str = "[Redacted]";

fn list(items: &[&str]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

fn key(parts: &[&str]) -> Vec<Option<String>> {
    parts.iter().map(|part| Some(part.to_string())).collect()
}

fn compile(treatment: &T, shape: Shape, nullable: bool) -> Result<Treatment, TreatmentProblem> {
    Treatment::compile(treatment, shape, nullable, MARK, &list(&["****", "(gelöscht)"]), false)
}

fn apply(treatment: &T, shape: Shape, cell: &str) -> Outcome<'static> {
    let compiled = compile(treatment, shape, true).unwrap();
    match compiled.apply(Some(cell), &key(&["4", "a b"])).unwrap() {
        Outcome::Text(text) => Outcome::Text(text.into_owned().into()),
        Outcome::Keep => Outcome::Keep,
        Outcome::Null => Outcome::Null,
        Outcome::Sql => Outcome::Sql,
        Outcome::Scrub => Outcome::Scrub,
    }
}

fn text(text: &str) -> Outcome<'_> {
    Outcome::Text(text.into())
}

fn all() -> Vec<T> {
    vec![
        T::Default,
        T::Placeholder,
        T::Null,
        T::Value(Value::from("gone")),
        T::Value(Value::from("")),
        T::Value(Value::from(0)),
        T::Value(Value::Bool(true)),
        T::Value(Value::Null),
        T::Unique("redacted-{key}@redacted.invalid".to_string()),
        T::Unique("{key}{key}".to_string()),
        T::Json(list(&["$.a", "$..name", "$[?@.t=='B'].n"])),
        T::Json(list(&["$"])),
        T::JsonKeep(list(&["$.id", "$.a.b"])),
        T::JsonKeep(vec![]),
        T::ArrayPlaceholder,
        T::Prefix(1),
        T::Prefix(3),
        T::Prefix(40),
        T::Sql("lower(x)".to_string()),
    ]
}

const NASTY: &[&str] = &[
    " ",
    "   ",
    "\t",
    "x",
    "x ",
    " x",
    "a b  c",
    "Jane",
    "[Redacted]",
    "[Redacted] ",
    " [Redacted]",
    "[redacted]",
    "\"[Redacted]\"",
    "****",
    "(gelöscht)",
    "null",
    "NULL",
    "true",
    "0",
    "-1.50",
    "004912",
    "4912345",
    "1e999",
    "'; DROP TABLE x; --",
    "{key}",
    "$1",
    "\\",
    "\"",
    "''",
    "äöü",
    "e\u{301}a",
    "\u{1f600}\u{1f600}\u{1f600}\u{1f600}",
    "\u{200b}",
    "\u{feff}{}",
    "line\nbreak",
    "\u{1}",
    "{}",
    "[]",
    "{",
    "[[[",
    "[1,\"x\"]",
    "{\"a\":\"x\",\"id\":1}",
    "{\"a\":{\"b\":1.10,\"name\":\"y\"},\"a\":2}",
    " { \"name\" : \"\" } ",
    "[{\"t\":\"B\",\"n\":\"x\"}]",
    "{\"a\":\"\\ud800\"}",
    "\"Jane\"",
    "\"\"",
    "{a,b}",
    "{\"a b\",NULL,\"\"}",
    "{{a},{NULL}}",
    "[2:3]={a,b}",
    "{NULL}",
    "{[Redacted],****}",
    "redacted-4-a b@redacted.invalid",
];

// Broken: redaction archives its own output again and again.
#[test]
fn every_treatment_is_a_fixed_point() {
    let key = key(&["4", "a b"]);
    let mut written = 0;
    for treatment in all() {
        for shape in [Shape::Text, Shape::Json, Shape::TextArray, Shape::Other] {
            for (blank_padded, placeholder) in [
                (false, MARK),
                (true, MARK),
                (false, "0"),
                (false, "a, \"b\" {"),
                (true, "x  "),
                (false, "null"),
            ] {
                let Ok(compiled) =
                    Treatment::compile(&treatment, shape, true, placeholder, &list(&["****"]), blank_padded)
                else {
                    continue;
                };
                for cell in NASTY {
                    let Ok(Outcome::Text(result)) = compiled.apply(Some(cell), &key) else {
                        continue;
                    };
                    written += 1;
                    let context = format!("{treatment:?} on {shape:?} {cell:?} with {placeholder:?}");
                    assert_eq!(compiled.apply(Some(&result), &key), Ok(Outcome::Keep), "{context}");
                    let padded = format!("{result:<60}");
                    if blank_padded && shape == Shape::Text {
                        assert_eq!(
                            compiled.apply(Some(&padded), &key),
                            Ok(Outcome::Keep),
                            "padded, {context}"
                        );
                    }
                }
            }
        }
    }
    assert!(written > 2000, "{written}");
}

// Broken: P6, empty stays empty.
#[test]
fn empty_cells_stay() {
    for treatment in all() {
        for shape in [Shape::Text, Shape::Json, Shape::TextArray, Shape::Other] {
            if let Ok(compiled) = compile(&treatment, shape, true) {
                assert_eq!(compiled.apply(None, &[]), Ok(Outcome::Keep));
                assert_eq!(compiled.apply(Some(""), &[]), Ok(Outcome::Keep));
            }
        }
    }
}

#[test]
fn defaults_by_shape() {
    assert_eq!(apply(&T::Default, Shape::Text, "Jane"), text(MARK));
    assert_eq!(apply(&T::Default, Shape::Text, "   "), text(MARK));
    assert_eq!(
        apply(&T::Default, Shape::TextArray, "{a,NULL,\"\",****}"),
        text("{[Redacted],NULL,\"\",****}")
    );
    assert_eq!(apply(&T::Default, Shape::Other, "1970-01-01"), Outcome::Null);
    assert!(
        compile(&T::Default, Shape::Json, true)
            .unwrap_err()
            .hint
            .contains("json")
    );
    assert!(
        compile(&T::Default, Shape::Other, false)
            .unwrap_err()
            .hint
            .contains("value")
    );
}

#[test]
fn constants() {
    assert_eq!(apply(&T::Value(Value::from("n/a")), Shape::Text, "Jane"), text("n/a"));
    assert_eq!(apply(&T::Value(Value::from("n/a")), Shape::Text, "n/a"), Outcome::Keep);
    let exact = serde_json::from_str("123456789012345678901234567890.10").unwrap();
    assert_eq!(
        apply(&T::Value(exact), Shape::Other, "1"),
        text("123456789012345678901234567890.10")
    );
    assert_eq!(apply(&T::Value(Value::Null), Shape::Text, "Jane"), Outcome::Null);
    assert_eq!(apply(&T::Value(Value::from("n/a")), Shape::Json, "{}"), text("\"n/a\""));
    assert_eq!(
        apply(&T::Value(serde_json::json!({"a": [1]})), Shape::Json, "1"),
        text("{\"a\":[1]}")
    );
    assert!(
        compile(&T::Value(serde_json::json!([1])), Shape::TextArray, true)
            .unwrap_err()
            .hint
            .contains("string")
    );
    assert!(compile(&T::Value(Value::Null), Shape::Text, false).is_err());
    let mut flag = compile(&T::Value(Value::Bool(true)), Shape::Other, true).unwrap();
    assert_eq!(flag.constant(), Some("true"));
    flag.set_constant("t".to_string());
    assert_eq!(flag.apply(Some("t"), &[]), Ok(Outcome::Keep));
    assert_eq!(flag.apply(Some("f"), &[]), Ok(text("t")));
}

#[test]
fn unique_values_hold_the_key() {
    let treatment = T::Unique("redacted-{key}@redacted.invalid".to_string());
    assert_eq!(
        apply(&treatment, Shape::Text, "jane@example.com"),
        text("redacted-4-a b@redacted.invalid")
    );
    assert_eq!(
        apply(&treatment, Shape::Text, "redacted-4-a b@redacted.invalid"),
        Outcome::Keep
    );
    assert_eq!(
        apply(&treatment, Shape::Text, "redacted-5@redacted.invalid"),
        text("redacted-4-a b@redacted.invalid")
    );
    let compiled = compile(&treatment, Shape::Text, false).unwrap();
    assert_eq!(compiled.apply(Some("jane@example.com"), &[]), Err(TreatError::NoKey));
    assert!(
        compile(&T::Unique("x@redacted.invalid".to_string()), Shape::Text, true)
            .unwrap_err()
            .problem
            .contains("{key}")
    );
}

#[test]
fn json_kept_in_text_stays_parseable() {
    let treatment = T::Json(list(&["$.name"]));
    assert_eq!(
        apply(&treatment, Shape::Text, " {\"name\":\"Jane\",\"v\":1.10}"),
        text(" {\"name\":\"[Redacted]\",\"v\":1.10}")
    );
    assert_eq!(apply(&treatment, Shape::Text, "{\"v\":1.10}"), Outcome::Keep);
    assert_eq!(apply(&treatment, Shape::Text, "Jane Doe"), text(MARK));
    assert_eq!(apply(&treatment, Shape::Text, &"[".repeat(100_000)), text(MARK));
    assert_eq!(
        apply(&treatment, Shape::Text, "\"{\\\"name\\\":\\\"Jane\\\"}\""),
        text("\"[Redacted]\"")
    );
    assert_eq!(apply(&treatment, Shape::Text, "4912345"), text("null"));
    assert_eq!(apply(&treatment, Shape::Json, "4912345"), Outcome::Keep);
    assert_eq!(
        apply(&treatment, Shape::Json, "{\"name\": \"(gelöscht)\"}"),
        Outcome::Keep
    );
    let compiled = compile(&treatment, Shape::Json, true).unwrap();
    let error = compiled.apply(Some("{\"name\":\"Jane\""), &[]).unwrap_err();
    assert_eq!(error, TreatError::Json(JsonError::Invalid));
    assert!(!error.to_string().contains("Jane"));
}

#[test]
fn prefixes_count_characters() {
    assert_eq!(apply(&T::Prefix(2), Shape::Text, "10115"), text("10"));
    assert_eq!(apply(&T::Prefix(2), Shape::Text, "äöü"), text("äö"));
    assert_eq!(apply(&T::Prefix(2), Shape::Text, "10"), Outcome::Keep);
    assert_eq!(apply(&T::Prefix(2), Shape::Text, MARK), Outcome::Keep);
}

// Broken: char(n) cells, always padded, never count as redacted nor as empty.
#[test]
fn blanks_of_char_mean_nothing() {
    let padded =
        |treatment: &T| Treatment::compile(treatment, Shape::Text, true, MARK, &list(&["****"]), true).unwrap();
    for cell in ["          ", "[Redacted]     ", "****  "] {
        for treatment in [
            T::Default,
            T::Null,
            T::Prefix(2),
            T::Value(Value::from("x")),
            T::Json(list(&["$.a"])),
        ] {
            assert_eq!(
                padded(&treatment).apply(Some(cell), &[]),
                Ok(Outcome::Keep),
                "{treatment:?} {cell:?}"
            );
        }
    }
    assert_eq!(padded(&T::Default).apply(Some(" [Redacted]"), &[]), Ok(text(MARK)));
    assert_eq!(padded(&T::Default).apply(Some("Jane   "), &[]), Ok(text(MARK)));
    assert_eq!(padded(&T::Prefix(2)).apply(Some("10     "), &[]), Ok(Outcome::Keep));
    let array = Treatment::compile(&T::Default, Shape::TextArray, true, MARK, &[], true).unwrap();
    assert_eq!(array.apply(Some(r#"{"   ","[Redacted]  "}"#), &[]), Ok(Outcome::Keep));
    assert_eq!(
        padded(&T::Sql("x".to_string())).apply(Some("   "), &[]),
        Ok(Outcome::Keep)
    );
}

#[test]
fn marks_of_earlier_tools_stay() {
    assert_eq!(apply(&T::Default, Shape::Text, "****"), Outcome::Keep);
    assert_eq!(apply(&T::Null, Shape::Other, "****"), Outcome::Keep);
    assert_eq!(apply(&T::Default, Shape::Text, "*****"), text(MARK));
    assert_eq!(apply(&T::Sql("x".to_string()), Shape::Text, "****"), Outcome::Sql);
}

#[test]
fn misfits_are_refused_with_a_way_out() {
    let refused = [
        (T::Placeholder, Shape::Other),
        (T::Placeholder, Shape::Json),
        (T::Placeholder, Shape::TextArray),
        (T::Unique("{key}".to_string()), Shape::Other),
        (T::Json(list(&["$.a"])), Shape::TextArray),
        (T::Json(list(&["$.a["])), Shape::Json),
        (T::Json(vec![]), Shape::Json),
        (T::JsonKeep(list(&["$.a"])), Shape::Other),
        (T::ArrayPlaceholder, Shape::Text),
        (T::Prefix(2), Shape::Json),
        (T::Prefix(0), Shape::Text),
    ];
    for (treatment, shape) in refused {
        let problem = compile(&treatment, shape, true).unwrap_err();
        assert!(
            !problem.problem.ends_with('.') && problem.hint.ends_with('.'),
            "{problem:?}"
        );
    }
    let problem = compile(&T::Null, Shape::Text, false).unwrap_err();
    assert!(
        problem.hint.contains("placeholder") && !problem.hint.contains("null"),
        "{problem:?}"
    );
}
