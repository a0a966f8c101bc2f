//! What of an archived value is looked for: the texts that redaction takes away, not what it leaves.

use serde_json::Value;

use super::array_text::elements;
use super::treatment::Outcome;

/// Calls `f` with each text of an archived cell that redaction replaces. `treated` is what its treatment makes of it; `None`
/// where the cell went as it was.
pub fn texts(type_name: &str, text: &str, treated: Option<&Outcome>, mut f: impl FnMut(&str)) {
    // Words of a tsvector are in its sources too, and bytes are not compared.
    if matches!(type_name, "bytea" | "bytea[]" | "tsvector" | "tsquery" | "boolean") || treated == Some(&Outcome::Keep)
    {
        return;
    }
    let json = || serde_json::from_str(text).ok().filter(is_container);
    match treated {
        Some(Outcome::Text(result)) => {
            let both = json().and_then(|old: Value| Some((old, serde_json::from_str(result).ok()?)));
            if let Some((old, new)) = both {
                return replaced(&old, &new, &mut f);
            }
        }
        // Without its treatment nobody knows which values in it were personal data.
        None if type_name.starts_with("json") => return,
        _ => {}
    }
    if let Some(Ok(items)) = type_name.ends_with("[]").then(|| elements(text, ',')) {
        return items.iter().flatten().for_each(|item| f(item));
    }
    match json() {
        Some(document) if type_name.starts_with("json") => replaced(&document, &Value::Null, &mut f),
        _ => f(text),
    }
}

fn is_container(value: &Value) -> bool {
    value.is_object() || value.is_array()
}

/// The leaves that have another value in the newer document.
fn replaced(old: &Value, new: &Value, f: &mut impl FnMut(&str)) {
    match old {
        Value::Object(map) => map
            .iter()
            .for_each(|(key, old)| replaced(old, new.get(key).unwrap_or(&Value::Null), f)),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .for_each(|(i, old)| replaced(old, new.get(i).unwrap_or(&Value::Null), f)),
        Value::String(text) if old != new => f(text),
        Value::Number(number) if old != new => f(number.as_str()),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(type_name: &str, text: &str, treated: Option<Outcome>) -> Vec<String> {
        let mut found = Vec::new();
        texts(type_name, text, treated.as_ref(), |t| found.push(t.to_owned()));
        found
    }

    fn to(text: &str) -> Option<Outcome<'_>> {
        Some(Outcome::Text(text.into()))
    }

    // Broken: what stays in a document is taken for personal data, and found wherever it is rightly.
    #[test]
    fn of_json_only_what_goes() {
        let (old, new) = (
            r#"{"id": "302-1", "buyer": {"name": "Ada", "phone": 495551234567}, "tags": ["a", "b"], "gift": true}"#,
            r#"{"id": "302-1", "buyer": {"name": "[Redacted]", "phone": null}, "tags": ["a", "[Redacted]"], "gift": null}"#,
        );
        for type_name in ["jsonb", "json", "text", "character varying(4000)"] {
            assert_eq!(of(type_name, old, to(new)), ["Ada", "495551234567", "b"], "{type_name}");
        }
        // Gone as a whole.
        assert_eq!(of("jsonb", r#"["a", {"b": 1}]"#, Some(Outcome::Null)), ["a", "1"]);
        assert_eq!(of("jsonb", r#"["a", {"b": 1}]"#, to(r#"{}"#)), ["a", "1"]);
        assert_eq!(of("text", "[no json", to("[Redacted]")), ["[no json"]);
        // Of a table whose rows are removed.
        assert!(of("jsonb", r#"["a"]"#, None).is_empty());
    }

    #[test]
    fn of_arrays_their_elements() {
        assert_eq!(of("text[]", r#"{Ada,"B C",NULL}"#, to("{x,x,NULL}")), ["Ada", "B C"]);
    }

    #[test]
    fn of_anything_else_the_text() {
        assert_eq!(of("text", "Ada", to("[Redacted]")), ["Ada"]);
        assert_eq!(of("date", "1990-01-01", Some(Outcome::Null)), ["1990-01-01"]);
        assert_eq!(of("text", "Ada", Some(Outcome::Sql)), ["Ada"]);
        assert_eq!(of("text", "Ada", None), ["Ada"]);
    }

    #[test]
    fn nothing_of_marks_and_bytes() {
        assert!(of("text", "[Redacted]", Some(Outcome::Keep)).is_empty());
        assert!(of("bytea", "\\x00", Some(Outcome::Null)).is_empty());
        assert!(of("tsvector", "'ada':1", Some(Outcome::Sql)).is_empty());
    }
}
