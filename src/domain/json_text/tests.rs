#![allow(clippy::unwrap_used)]

use super::*;

const MARK: &str = "[Redacted]";

fn list(paths: &[&str]) -> Vec<String> {
    paths.iter().map(ToString::to_string).collect()
}

fn redact(paths: &[&str], text: &str) -> String {
    let rule = JsonRule::redacting(&list(paths), MARK, &[]).unwrap();
    let once = rule.apply(text).unwrap();
    assert_eq!(
        rule.apply(&once).unwrap(),
        once,
        "not a fixed point: {paths:?} on {text}"
    );
    once
}

fn keep(paths: &[&str], text: &str) -> String {
    let rule = JsonRule::keeping(&list(paths), MARK, &[]).unwrap();
    let once = rule.apply(text).unwrap();
    assert_eq!(
        rule.apply(&once).unwrap(),
        once,
        "not a fixed point: {paths:?} on {text}"
    );
    once
}

// Broken: a json column's blanks, key order, digits or escapes change beside the redacted values.
#[test]
fn every_other_byte_stays() {
    let text = " {\"z\" : 1.10,\n\t\"a\":{\"Name\":\"J\\u00e4ne\" , \"big\":123456789012345678901234567890.50,\"e\":1E+400},\"\\u006eame\":\"x\",\"u\":\"\\ud83d\\ude00\\/\"} \r\n";
    assert_eq!(
        redact(&["$.a.Name", "$.name"], text),
        " {\"z\" : 1.10,\n\t\"a\":{\"Name\":\"[Redacted]\" , \"big\":123456789012345678901234567890.50,\"e\":1E+400},\"\\u006eame\":\"[Redacted]\",\"u\":\"\\ud83d\\ude00\\/\"} \r\n"
    );
    assert_eq!(redact(&["$.nowhere", "$[0]", "$.z[0]"], text), text);
}

#[test]
fn leaves_by_kind() {
    let text = r#"{"p":{"s":"x","n":-0.5,"t":true,"f":false,"u":null,"e":"","o":{},"l":[],"deep":[["y",[1]],{"k":"z"}]},"q":1}"#;
    assert_eq!(
        redact(&["$.p"], text),
        r#"{"p":{"s":"[Redacted]","n":null,"t":null,"f":null,"u":null,"e":"","o":{},"l":[],"deep":[["[Redacted]",[null]],{"k":"[Redacted]"}]},"q":1}"#
    );
    assert_eq!(redact(&["$"], "\"x\""), "\"[Redacted]\"");
    assert_eq!(redact(&["$"], " 12 "), " null ");
    assert_eq!(redact(&["$.x"], "\"x\""), "\"x\"");
}

#[test]
fn paths_of_the_standard() {
    let text = r#"{"items":[{"id":1,"gift":"a"},{"id":2},{"id":3.0,"gift":"b"}],"tax":[{"t":"BUYER","n":"c"},{"t":"SELLER","n":"d"}],"x":{"name":"e","y":[{"name":"f"}]},"o'k":"g"}"#;
    let gone = |paths: &[&str]| {
        let out = redact(paths, text);
        ["a", "b", "c", "d", "e", "f", "g"]
            .into_iter()
            .filter(|leaf| !out.contains(&format!("\"{leaf}\"")))
            .collect::<String>()
    };
    assert_eq!(gone(&["$.items[*].gift"]), "ab");
    assert_eq!(gone(&["$.items[-1].gift", "$.items[0:1].gift"]), "ab");
    assert_eq!(gone(&["$.items[?@.id==3].gift"]), "b");
    assert_eq!(gone(&["$.items[?@.id<1.5 && @.gift].gift"]), "a");
    assert_eq!(gone(&["$.tax[?@.t=='BUYER'].n"]), "c");
    assert_eq!(gone(&["$.tax[?@.t!='BUYER']['n']"]), "d");
    assert_eq!(gone(&["$..name"]), "ef");
    assert_eq!(gone(&["$['o\\'k']", "$.x.*"]), "efg");
    assert_eq!(gone(&["$..[?match(@.t, 'S.*')].n"]), "d");
    assert_eq!(gone(&["$.tax[?$.items[0].id==1].n"]), "cd");
}

#[test]
fn keeping_redacts_all_the_rest() {
    let text = r#"{"id":7,"buyer":{"name":"x","country":"DE"},"items":[{"sku":"a","note":"y"}],"amount":{"c":"EUR","v":1.10}}"#;
    assert_eq!(
        keep(&["$.id", "$.buyer.country", "$.items[*].sku", "$.amount"], text),
        r#"{"id":7,"buyer":{"name":"[Redacted]","country":"DE"},"items":[{"sku":"a","note":"[Redacted]"}],"amount":{"c":"EUR","v":1.10}}"#
    );
    assert_eq!(
        keep(&[], text),
        r#"{"id":null,"buyer":{"name":"[Redacted]","country":"[Redacted]"},"items":[{"sku":"[Redacted]","note":"[Redacted]"}],"amount":{"c":"[Redacted]","v":null}}"#
    );
    assert_eq!(keep(&["$"], text), text);
}

// Broken: a path sees one of several equal keys only, and the others' PII stays.
#[test]
fn repeated_keys_are_all_redacted() {
    assert_eq!(
        redact(&["$.a"], r#"{"a":"x","b":1,"a":"y","a":2}"#),
        r#"{"a":"[Redacted]","b":1,"a":"[Redacted]","a":null}"#
    );
    let text = r#"{"a":{"n":"x","n":"y"},"a":{"m":{"n":"z"}},"a":[{"n":"w","k":1}]}"#;
    let all =
        r#"{"a":{"n":"[Redacted]","n":"[Redacted]"},"a":{"m":{"n":"[Redacted]"}},"a":[{"n":"[Redacted]","k":1}]}"#;
    assert_eq!(redact(&["$..n"], text), all);
    assert_eq!(redact(&["$.a.n", "$.a.m.n", "$.a[0].n"], text), all);
    assert_eq!(
        redact(&["$[?@.t=='B'].n"], r#"[{"t":"B","t":"S","n":"x"}]"#),
        r#"[{"t":"B","t":"S","n":"[Redacted]"}]"#
    );
    assert_eq!(
        redact(&["$.a"], r#"{"\u0061":"x","a":"y"}"#),
        r#"{"\u0061":"[Redacted]","a":"[Redacted]"}"#
    );
    assert_eq!(
        redact(&["$[?@.n=='x'].n"], r#"[{"n":"x","n":"y"}]"#),
        r#"[{"n":"[Redacted]","n":"[Redacted]"}]"#
    );
    // To be kept, a value must be selected whichever of the equal keys counts.
    assert_eq!(
        keep(&["$[?@.t=='S'].n"], r#"[{"t":"B","t":"S","n":"x"}]"#),
        r#"[{"t":"[Redacted]","t":"[Redacted]","n":"[Redacted]"}]"#
    );
    assert_eq!(
        keep(&["$.a.k"], r#"{"a":{"k":"x","n":"y"},"a":{"k":"z"}}"#),
        r#"{"a":{"k":"x","n":"[Redacted]"},"a":{"k":"z"}}"#
    );
    assert_eq!(
        keep(&["$[?@.t=='S'].n"], r#"[{"t":"S","t":"B","n":"x"}]"#),
        r#"[{"t":"[Redacted]","t":"[Redacted]","n":"[Redacted]"}]"#
    );
    let many = format!("{{{}}}", vec![r#""a":{"b":1,"b":"x"}"#; 8000].join(","));
    let rule = JsonRule::redacting(&list(&["$.a.b"]), MARK, &[]).unwrap();
    assert_eq!(rule.apply(&many), Err(JsonError::TooManyRepeatedKeys));
    let some = format!("{{{}}}", vec![r#""a":{"b":1,"b":"x"}"#; 200].join(","));
    assert_eq!(rule.apply(&some).unwrap().matches("[Redacted]").count(), 200);
}

// Broken: a json column with an escape that is no character cannot be redacted at all.
#[test]
fn reads_what_the_server_accepts() {
    assert_eq!(
        redact(&["$.a"], r#"{"a":"\ud800","b":"\u0000\udc00x"}"#),
        r#"{"a":"[Redacted]","b":"\u0000\udc00x"}"#
    );
    assert_eq!(
        redact(&["$.a"], r#"{"a":"\ud800\ud83d\ude00"}"#),
        r#"{"a":"[Redacted]"}"#
    );
    let rule = JsonRule::redacting(&list(&["$"]), MARK, &list(&["\u{fffd}\u{1f600}"])).unwrap();
    let read = r#""\udc00\ud83d\ude00""#;
    assert_eq!(rule.apply(read).unwrap(), read);
    let read = r#""\ud800\ud83d\ude00""#;
    assert_eq!(rule.apply(read).unwrap(), read);
    // This key is how a number of any length travels inside serde_json.
    assert_eq!(
        redact(
            &["$.a"],
            r#"{"a":{"$serde_json::private::Number":"Jane"},"b":{"$serde_json::private::Number":"1"}}"#
        ),
        r#"{"a":{"$serde_json::private::Number":"[Redacted]"},"b":{"$serde_json::private::Number":"1"}}"#
    );
    assert_eq!(redact(&["$.a"], "{\"a\":1e999999999999999999999}"), "{\"a\":null}");
}

#[test]
fn refuses_what_is_no_json() {
    let rule = JsonRule::redacting(&list(&["$..*"]), MARK, &[]).unwrap();
    for bad in [
        "",
        " ",
        "Jane",
        "{",
        "[1",
        "[1,]",
        "{\"a\"}",
        "{\"a\":}",
        "{a:1}",
        "{\"a\":1,}",
        "01",
        "-",
        "1.",
        ".5",
        "1e",
        "+1",
        "\"a",
        "\"\\x\"",
        "\"\\u12g4\"",
        "\"\\u123",
        "\"a\nb\"",
        "\"\u{1}\"",
        "nul",
        "nullx",
        "true false",
        "1 2",
        "[1]]",
        "\u{feff}{}",
        "{\"a\":1 \"b\":2}",
        "'a'",
        "\u{a0}1",
        "NaN",
        "\"\\ud800\\u12",
    ] {
        let error = rule.apply(bad).unwrap_err();
        assert_eq!(error, JsonError::Invalid, "{bad}");
        assert_eq!(error.to_string(), "text is not valid JSON");
    }
}

// Broken: a deeply nested document overflows the stack and takes the server down.
#[test]
fn depth_is_limited() {
    let nested = |depth: usize| format!("{}\"x\"{}", "[".repeat(depth), "]".repeat(depth));
    let rule = JsonRule::redacting(&list(&["$..*"]), MARK, &[]).unwrap();
    assert_eq!(rule.apply(&nested(512)).unwrap(), nested(512).replace('x', MARK));
    assert_eq!(rule.apply(&nested(513)), Err(JsonError::TooDeep));
    assert_eq!(rule.apply(&"[".repeat(5_000_000)), Err(JsonError::TooDeep));
    assert_eq!(rule.apply(&"{\"a\":".repeat(5_000_000)), Err(JsonError::TooDeep));
    let objects = format!("{}\"x\"{}", "{\"a\":".repeat(512), "}".repeat(512));
    assert_eq!(rule.apply(&objects).unwrap(), objects.replace('x', MARK));
}

#[test]
fn placeholders_are_escaped_and_marks_stay() {
    let odd = "a\"b\\c\n\u{1}ü";
    let rule = JsonRule::redacting(&list(&["$..*"]), odd, &list(&["****"])).unwrap();
    let out = rule.apply(r#"["x","****","****1"]"#).unwrap();
    let [first, second, third]: [String; 3] = serde_json::from_str(&out).unwrap();
    assert_eq!([first.as_str(), second.as_str(), third.as_str()], [odd, "****", odd]);
    assert_eq!(rule.apply(&out).unwrap(), out);
    // The same string under another spelling is the placeholder as well.
    assert_eq!(redact(&["$"], r#""\u005bRedacted]""#), r#""\u005bRedacted]""#);
}

#[test]
fn bare_values_of_text_columns() {
    let rule = JsonRule::redacting(&list(&["$.a"]), MARK, &[]).unwrap();
    assert_eq!(rule.apply_to_text(" \"Jane\" ").unwrap(), " \"[Redacted]\" ");
    assert_eq!(rule.apply_to_text("004912").unwrap_err(), JsonError::Invalid);
    assert_eq!(rule.apply_to_text("4912").unwrap(), "null");
    assert_eq!(rule.apply_to_text("[\"b\",{\"a\":1}]").unwrap(), "[\"b\",{\"a\":1}]");
    assert_eq!(
        JsonRule::keeping(&list(&["$"]), MARK, &[])
            .unwrap()
            .apply_to_text("1")
            .unwrap(),
        "1"
    );
}

#[test]
fn bad_paths_are_named() {
    for bad in ["", "a", "$.", "$.a[", "$[?@.a=1]", "$ .a "] {
        let error = JsonRule::redacting(&list(&["$.fine", bad]), MARK, &[]).unwrap_err();
        assert!(
            matches!(&error, JsonError::Path { path, .. } if path == bad),
            "{bad}: {error}"
        );
    }
}

// Broken: a filter over its own redacted value goes unnoticed by whoever registers it.
#[test]
fn moving_rules_show_when_applied_twice() {
    let rule = JsonRule::redacting(&list(&["$[*].t", "$[?@.t=='[Redacted]'].n"]), MARK, &[]).unwrap();
    let once = rule.apply(r#"[{"t":"x","n":"y"}]"#).unwrap();
    assert_ne!(rule.apply(&once).unwrap(), once);
}
