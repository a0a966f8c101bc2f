//! A JSON document that was redacted, got a new leaf and was archived again holds our own marks. What they stand for is in
//! the version before.

use serde_json::Value;

/// The newer document with every mark of ours replaced by what the older one has in its place; `None` when there is
/// nothing to replace, or when one of them is no JSON container.
pub fn merge(newer: &str, older: &str, marks: &[&str]) -> Option<String> {
    let mut new: Value = serde_json::from_str(newer).ok()?;
    let old: Value = serde_json::from_str(older).ok()?;
    if !(new.is_object() || new.is_array()) {
        return None;
    }
    fill(&mut new, &old, marks).then(|| new.to_string())
}

/// Whether anything was replaced.
fn fill(new: &mut Value, old: &Value, marks: &[&str]) -> bool {
    match (new, old) {
        (Value::Object(new), Value::Object(old)) => {
            let mut changed = false;
            for (key, value) in new.iter_mut() {
                if let Some(old) = old.get(key) {
                    changed |= fill(value, old, marks);
                }
            }
            changed
        }
        (Value::Array(new), Value::Array(old)) if new.len() == old.len() => new
            .iter_mut()
            .zip(old)
            .fold(false, |changed, (n, o)| fill(n, o, marks) || changed),
        // Redaction makes null of numbers and booleans.
        (new, old) => {
            let ours = match (&*new, old) {
                (Value::String(mark), Value::String(value)) => marks.contains(&mark.as_str()) && mark != value,
                (Value::Null, Value::Number(_) | Value::Bool(_)) => true,
                _ => false,
            };
            if ours {
                *new = old.clone();
            }
            ours
        }
    }
}

#[cfg(test)]
mod tests {
    use super::merge;

    const MARKS: &[&str] = &["[Redacted]"];

    #[test]
    fn marks_give_way_to_what_they_stand_for() {
        let newer = r#"{"name":"[Redacted]","n":null,"note":"new","list":[{"a":"[Redacted]"},2]}"#;
        let older = r#"{"name":"Ada","n":1.10,"list":[{"a":"x"},1]}"#;
        let expected = r#"{"name":"Ada","n":1.10,"note":"new","list":[{"a":"x"},2]}"#;
        assert_eq!(merge(newer, older, MARKS).as_deref(), Some(expected));
    }

    #[test]
    fn what_was_written_anew_stays() {
        assert_eq!(merge(r#"{"a":"b"}"#, r#"{"a":"c"}"#, MARKS), None);
        assert_eq!(merge(r#"["[Redacted]"]"#, r#"["a","b"]"#, MARKS), None);
        assert_eq!(merge(r#""[Redacted]""#, r#""a""#, MARKS), None);
        assert_eq!(merge("no json", "{}", MARKS), None);
    }
}
