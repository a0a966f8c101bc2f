//! Names that are safe to stand in a statement. SQL text is composed of these types and of fixed words only.

use std::fmt;

use pgrx::pg_sys;

/// An identifier; `Display` quotes it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ident(String);

impl Ident {
    /// Takes a bare name, as the catalog stores it.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// The bare name.
    pub fn bare(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Ident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.replace('"', "\"\""))
    }
}

/// A table with its schema; `Display` gives both, quoted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    pub oid: pg_sys::Oid,
    pub schema: Ident,
    pub name: Ident,
}

impl fmt::Display for Relation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.schema, self.name)
    }
}

impl Relation {
    /// The name for messages and for the archive: quoted only where SQL needs it.
    pub fn shown(&self) -> String {
        let part = |i: &Ident| {
            let plain = i
                .bare()
                .chars()
                .enumerate()
                .all(|(n, c)| c.is_ascii_lowercase() || c == '_' || (n > 0 && c.is_ascii_digit()));
            if plain && !i.bare().is_empty() {
                i.bare().to_owned()
            } else {
                i.to_string()
            }
        };
        format!("{}.{}", part(&self.schema), part(&self.name))
    }
}

/// An SQL expression of a policy that has passed [`Expr::parse`]; `Display` puts it in parentheses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expr(String);

impl Expr {
    /// Accepts a text only if it is one expression, so that none can close a parenthesis or a statement of ours.
    ///
    /// # Errors
    /// `None` when the text is no single expression.
    pub fn parse(text: &str) -> Option<Self> {
        // Inside the parentheses and outside of them it must be one statement with one result column:
        // `true) OR (true` passes the first test only, `1; DROP TABLE t` neither.
        let good = !text.contains('\0')
            && super::sql::is_single_select(&format!("SELECT ({text}\n)"))
            && super::sql::is_single_select(&format!("SELECT {text}\n"));
        good.then(|| Self(text.to_owned()))
    }

    /// A bare column.
    pub fn column(name: &str) -> Self {
        Self(Ident::new(name).to_string())
    }

    /// The condition that a number has Amazon's 3-7-7 form.
    pub fn amazon_number(number: &Self) -> Self {
        let form = crate::domain::number::AMAZON_NUMBER_REGEX;
        Self(format!("{number}::pg_catalog.text OPERATOR(pg_catalog.~) '{form}'"))
    }

    /// The expression as text, for a search by what people type. A bare column of a text type keeps its index.
    pub fn as_text(&self) -> Self {
        Self(format!("{self}::pg_catalog.text"))
    }

    /// As CREATE INDEX takes it: a bare column, or an expression in parentheses.
    pub fn index_text(&self) -> String {
        let column = self.0.len() > 1 && self.0.starts_with('"') && !self.0[1..self.0.len() - 1].contains('"');
        if column {
            self.0.clone()
        } else {
            format!("({})", self.0)
        }
    }

    /// Both conditions.
    pub fn both(a: &Self, b: &Self) -> Self {
        Self(format!("{a} AND {b}"))
    }

    /// Whether the server's own print of an expression says the same, but for parentheses and casts, which it adds.
    pub fn same_text(&self, shown: &str) -> bool {
        let bare = |s: &str| {
            let s: String = s
                .chars()
                .filter(|c| !c.is_whitespace() && !matches!(c, '(' | ')'))
                .collect();
            let mut parts = s.split("::");
            let mut out = parts.next().unwrap_or_default().to_owned();
            out.extend(
                parts.map(|p| p.trim_start_matches(|c: char| c.is_alphanumeric() || matches!(c, '_' | '.' | '"'))),
            );
            out
        };
        bare(&self.0) == bare(shown)
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The line feed ends a `--` comment at the end of the text.
        write!(f, "({}\n)", self.0)
    }
}

/// The text under which a value of any type leaves: its output function's.
/// `format('%s', …)` calls that function, a cast to text need not (char(n), user casts); NULL stays NULL.
pub fn out(expression: impl fmt::Display) -> String {
    format!(
        "(CASE WHEN {expression} IS NOT DISTINCT FROM NULL THEN NULL \
         ELSE pg_catalog.format('%s', {expression}) END COLLATE pg_catalog.\"C\")"
    )
}
