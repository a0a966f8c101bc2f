//! Names of tables as SQL writes them.

use super::PolicyError;

/// The longest name that PostgreSQL keeps, in bytes.
const LONGEST: usize = 63;

/// A table's name, with its schema if that was given, as the catalogs hold it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QualifiedName {
    /// The schema.
    pub schema: Option<String>,
    /// The bare name.
    pub name: String,
}

impl QualifiedName {
    /// Reads `table` or `schema.table`: unquoted parts are folded to lower case, quoted ones are taken as they are.
    ///
    /// # Errors
    /// What SQL would not read as such a name. The error's path is empty.
    pub fn parse(s: &str) -> Result<Self, PolicyError> {
        let mut parts = Vec::new();
        let mut rest = s.trim();
        loop {
            let (part, after) = part(rest)?;
            if part.len() > LONGEST {
                return Err(PolicyError::new("", format!("a name is longer than {LONGEST} bytes")));
            }
            parts.push(part);
            let after = after.trim_start();
            match after.strip_prefix('.') {
                Some(next) => rest = next.trim_start(),
                None if after.is_empty() => break,
                None => return Err(malformed("table name is not a name as in SQL")),
            }
        }
        let mut parts = parts.into_iter();
        match (parts.next(), parts.next(), parts.next()) {
            (Some(name), None, None) => Ok(Self { schema: None, name }),
            (Some(schema), Some(name), None) => Ok(Self {
                schema: Some(schema),
                name,
            }),
            _ => Err(PolicyError::new("", "table name has more than two parts")
                .with_hint("Write \"schema.table\"; quote a part that itself holds a dot.")),
        }
    }
}

/// Takes the first part of a name; returns it and what follows.
fn part(text: &str) -> Result<(String, &str), PolicyError> {
    if let Some(mut rest) = text.strip_prefix('"') {
        let mut name = String::new();
        loop {
            let Some(quote) = rest.find('"') else {
                return Err(malformed("table name has a quote that is not closed"));
            };
            name.push_str(&rest[..quote]);
            rest = &rest[quote + 1..];
            match rest.strip_prefix('"') {
                Some(next) => {
                    name.push('"');
                    rest = next;
                }
                None => break,
            }
        }
        if name.is_empty() {
            return Err(malformed("table name has an empty part"));
        }
        if name.contains('\0') {
            return Err(malformed("table name holds a NUL character"));
        }
        return Ok((name, rest));
    }
    // PostgreSQL takes every character beyond ASCII for a letter, and folds only ASCII in UTF-8 databases.
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_' || !c.is_ascii();
    let end = text
        .find(|c: char| !(letter(c) || c.is_ascii_digit() || c == '$'))
        .unwrap_or(text.len());
    let name = &text[..end];
    match name.chars().next() {
        None if text.is_empty() || text.starts_with('.') => Err(malformed("table name has an empty part")),
        Some(first) if letter(first) => Ok((name.to_ascii_lowercase(), &text[end..])),
        _ => Err(malformed("table name is not a name as in SQL")),
    }
}

fn malformed(problem: &str) -> PolicyError {
    PolicyError::new("", problem)
        .with_hint("Write names as in SQL: shop.orders, or \"My Shop\".\"Orders\" with quotes.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_names_as_in_sql() {
        let name = |schema: Option<&str>, name: &str| QualifiedName {
            schema: schema.map(str::to_owned),
            name: name.to_owned(),
        };
        for (text, expected) in [
            ("orders", name(None, "orders")),
            (" Shop.Orders ", name(Some("shop"), "orders")),
            ("shop . \"Orders\"", name(Some("shop"), "Orders")),
            ("\"My Shop\".\"Or\"\"d.ers\"", name(Some("My Shop"), "Or\"d.ers")),
            ("_a1$.ÄBC", name(Some("_a1$"), "Äbc")),
            ("\" \"", name(None, " ")),
        ] {
            assert_eq!(QualifiedName::parse(text), Ok(expected), "{text}");
        }
        let long = "a".repeat(64);
        for text in [
            "", ".", "a.", ".a", "a..b", "a.b.c", "my shop", "my-shop", "1a", "$a", "\"a", "\"\"", "\"a\"b", "a\"b\"",
            "a;b", "a.b'", &long,
        ] {
            assert!(QualifiedName::parse(text).is_err(), "{text}");
        }
    }
}
