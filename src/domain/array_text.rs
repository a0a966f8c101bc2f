//! PostgreSQL's text form of arrays: `{a,"b c",NULL}`, nested, with bounds (`[2:3]={a,b}`) or without.

use std::ops::Range;

/// Braces in braces, at most: PostgreSQL's own limit of dimensions.
const MAX_DIMENSIONS: usize = 6;

/// The text is no array. Never holds anything of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("text is not a valid array")]
pub struct ArrayError;

/// An element and where its text stands, quotes included.
struct Element {
    span: Range<usize>,
    text: Option<String>,
}

/// Rewrites every element but NULLs and empty ones with `f`. Bounds, nesting and the elements that `f` returns
/// unchanged stay as they are; new ones are quoted as PostgreSQL's output would.
pub fn redact_array(text: &str, delim: char, f: impl Fn(&str) -> String) -> Result<String, ArrayError> {
    let mut out = String::with_capacity(text.len());
    let mut done = 0;
    for Element { span, text: element } in parse(text, delim)? {
        let Some(old) = element.filter(|old| !old.is_empty()) else {
            continue;
        };
        let new = f(&old);
        if new != old {
            out.push_str(&text[done..span.start]);
            quote(&mut out, &new, delim);
            done = span.end;
        }
    }
    out.push_str(&text[done..]);
    Ok(out)
}

/// The elements in storage order, NULL as `None`.
pub fn elements(text: &str, delim: char) -> Result<Vec<Option<String>>, ArrayError> {
    Ok(parse(text, delim)?.into_iter().map(|element| element.text).collect())
}

fn quote(out: &mut String, element: &str, delim: char) {
    let special = |c: char| matches!(c, '"' | '\\' | '{' | '}') || c == delim || blank(c);
    if !element.is_empty() && !element.eq_ignore_ascii_case("null") && !element.contains(special) {
        out.push_str(element);
        return;
    }
    out.push('"');
    for c in element.chars() {
        if matches!(c, '"' | '\\') {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('"');
}

fn blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r' | '\u{b}' | '\u{c}')
}

fn parse(text: &str, delim: char) -> Result<Vec<Element>, ArrayError> {
    let mut reader = Reader {
        text,
        at: 0,
        delim,
        found: Vec::new(),
    };
    reader.bounds()?;
    reader.level(1)?;
    reader.blanks();
    if reader.at == text.len() {
        Ok(reader.found)
    } else {
        Err(ArrayError)
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    delim: char,
    found: Vec<Element>,
}

impl Reader<'_> {
    /// `[2:3][-1:0]=`, or nothing.
    fn bounds(&mut self) -> Result<(), ArrayError> {
        self.blanks();
        let mut any = false;
        while self.take('[') {
            any = true;
            let end = self.text[self.at..].find(']').ok_or(ArrayError)?;
            let inside = &self.text[self.at..self.at + end];
            if !inside.split(':').all(|bound| bound.trim().parse::<i64>().is_ok()) {
                return Err(ArrayError);
            }
            self.at += end + 1;
            self.blanks();
        }
        if any && !self.take('=') {
            return Err(ArrayError);
        }
        Ok(())
    }

    fn level(&mut self, depth: usize) -> Result<(), ArrayError> {
        self.blanks();
        if depth > MAX_DIMENSIONS || !self.take('{') {
            return Err(ArrayError);
        }
        self.blanks();
        if self.take('}') {
            return Ok(());
        }
        loop {
            self.blanks();
            match self.peek() {
                Some('{') => self.level(depth + 1)?,
                Some('"') => self.quoted()?,
                _ => self.bare()?,
            }
            self.blanks();
            if self.take('}') {
                return Ok(());
            }
            if !self.take(self.delim) {
                return Err(ArrayError);
            }
        }
    }

    fn quoted(&mut self) -> Result<(), ArrayError> {
        let start = self.at;
        self.at += 1;
        let mut element = String::new();
        loop {
            match self.next()? {
                '"' => break,
                '\\' => element.push(self.next()?),
                c => element.push(c),
            }
        }
        self.found.push(Element {
            span: start..self.at,
            text: Some(element),
        });
        Ok(())
    }

    fn bare(&mut self) -> Result<(), ArrayError> {
        let start = self.at;
        let (mut end, mut element, mut kept, mut escaped) = (start, String::new(), 0, false);
        while let Some(c) = self.peek() {
            if c == self.delim || c == '}' {
                break;
            }
            self.at += c.len_utf8();
            match c {
                '{' | '"' => return Err(ArrayError),
                '\\' => {
                    element.push(self.next()?);
                    escaped = true;
                }
                c => element.push(c),
            }
            // Blanks at the end belong to the array's text, not to the element.
            if !blank(c) {
                (end, kept) = (self.at, element.len());
            }
        }
        element.truncate(kept);
        if element.is_empty() {
            return Err(ArrayError);
        }
        let null = !escaped && element.eq_ignore_ascii_case("null");
        self.found.push(Element {
            span: start..end,
            text: (!null).then_some(element),
        });
        Ok(())
    }

    fn blanks(&mut self) {
        while let Some(c) = self.peek().filter(|&c| blank(c)) {
            self.at += c.len_utf8();
        }
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Result<char, ArrayError> {
        let c = self.peek().ok_or(ArrayError)?;
        self.at += c.len_utf8();
        Ok(c)
    }

    fn take(&mut self, c: char) -> bool {
        let there = self.peek() == Some(c);
        if there {
            self.at += c.len_utf8();
        }
        there
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn mark(text: &str) -> String {
        redact_array(text, ',', |_| "[Redacted]".to_string()).unwrap()
    }

    // Broken: shape, bounds, NULLs or empty elements change with the elements.
    #[test]
    fn only_elements_change() {
        assert_eq!(mark("{}"), "{}");
        assert_eq!(
            mark(r#"{a,"b c",NULL,"","NULL","null"}"#),
            r#"{[Redacted],[Redacted],NULL,"",[Redacted],[Redacted]}"#
        );
        assert_eq!(mark("[2:3]={a,b}"), "[2:3]={[Redacted],[Redacted]}");
        assert_eq!(mark("[-1:0][2:2]={{a},{NULL}}"), "[-1:0][2:2]={{[Redacted]},{NULL}}");
        assert_eq!(
            mark(r#"{"a\"b","c\\d","{e}","f,g"}"#),
            "{[Redacted],[Redacted],[Redacted],[Redacted]}"
        );
        assert_eq!(
            mark(&mark(r#"{{ä,"x y"},{NULL,""}}"#)),
            mark(r#"{{ä,"x y"},{NULL,""}}"#)
        );
    }

    // Broken: a placeholder with special characters makes an array of another shape.
    #[test]
    fn quotes_as_the_server_does() {
        for (plain, quoted) in [
            ("x", "x"),
            ("x y", r#""x y""#),
            ("null", r#""null""#),
            ("", r#""""#),
            (r#"a"b\c"#, r#""a\"b\\c""#),
            ("{x}", r#""{x}""#),
            ("x,y", r#""x,y""#),
            ("\u{b}", "\"\u{b}\""),
            ("\u{a0}ü", "\u{a0}ü"),
        ] {
            let out = redact_array("{old}", ',', |_| plain.to_string()).unwrap();
            assert_eq!(out, format!("{{{quoted}}}"));
            assert_eq!(elements(&out, ',').unwrap(), [Some(plain.to_string())]);
        }
        assert_eq!(
            redact_array("{a;b}", ';', |_| "x;y".to_string()).unwrap(),
            r#"{"x;y";"x;y"}"#
        );
        assert_eq!(redact_array("{a;b}", ';', |_| "x,y".to_string()).unwrap(), "{x,y;x,y}");
    }

    #[test]
    fn reads_elements() {
        let some = |s: &str| Some(s.to_string());
        assert_eq!(
            elements(r#"{ a b , "c\"" ,null, "" }"#, ',').unwrap(),
            [some("a b"), some("c\""), None, some("")]
        );
        assert_eq!(elements(r"{a\,b,x\ }", ',').unwrap(), [some("a,b"), some("x ")]);
        assert_eq!(elements("[0:1]={1,2}", ',').unwrap(), [some("1"), some("2")]);
        assert!(elements("{}", ',').unwrap().is_empty());
    }

    #[test]
    fn refuses_what_is_no_array() {
        for bad in [
            "",
            "a",
            "{",
            "{a",
            "{a,}",
            "{,a}",
            r#"{"a}"#,
            "{a}x",
            "[2:3]{a}",
            "[x]={a}",
            "{a{b}}",
            r#"{a"b"}"#,
            "{{{{{{{a}}}}}}}",
            r"{a\",
        ] {
            assert_eq!(elements(bad, ','), Err(ArrayError), "{bad}");
        }
    }
}
