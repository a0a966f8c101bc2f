//! The plaintext of one archived version of a record: the cells that held PII, as their types' exact text forms.
//!
//! Layout: the tag, the number of cells, then for each cell in the order of names: name, type, 0 (NULL) or 1 and the text.
//! Numbers and lengths are little-endian base 128. Everything is text, so no value can change on its way.

use std::collections::BTreeMap;
use std::fmt;

use zeroize::Zeroizing;

/// Ends with the version of the layout.
const TAG: &[u8; 4] = b"APD\x01";

/// The cells of a record, by column name.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Document {
    /// Cells by the bare name of their column.
    pub cells: BTreeMap<String, Cell>,
}

/// One archived value.
#[derive(Clone, PartialEq, Eq)]
pub struct Cell {
    /// The type as `format_type` names it.
    pub type_name: String,
    /// What the type's output function printed, `None` for NULL.
    pub text: Option<String>,
}

/// A plaintext that is no document. Never holds anything of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// Not of our making, or cut off, or followed by something.
    #[error("archived document is malformed")]
    Malformed,
    /// Written by a version of the extension that this one does not know.
    #[error("archived document has the unknown format {0}")]
    UnknownFormat(u8),
}

impl Document {
    /// The document as bytes, in a buffer that never moves while it grows: a moved one would leave a copy behind.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut size = Counter(0);
        self.write(&mut size);
        let mut out = Zeroizing::new(Vec::with_capacity(size.0));
        self.write(&mut *out);
        out
    }

    /// Reads back what [`encode`](Self::encode) wrote, and nothing else.
    pub fn decode(bytes: &[u8]) -> Result<Self, DocumentError> {
        let (tag, mut rest) = bytes.split_at_checked(TAG.len()).ok_or(DocumentError::Malformed)?;
        if tag[..3] != TAG[..3] {
            return Err(DocumentError::Malformed);
        }
        if tag[3] != TAG[3] {
            return Err(DocumentError::UnknownFormat(tag[3]));
        }
        let count = read_number(&mut rest)?;
        let mut cells = BTreeMap::new();
        for _ in 0..count {
            let name = read_text(&mut rest)?;
            let type_name = read_text(&mut rest)?;
            let text = match read_number(&mut rest)? {
                0 => None,
                1 => Some(read_text(&mut rest)?),
                _ => return Err(DocumentError::Malformed),
            };
            // One document has one encoding: names ascend.
            if cells.last_key_value().is_some_and(|(last, _)| *last >= name) {
                return Err(DocumentError::Malformed);
            }
            cells.insert(name, Cell { type_name, text });
        }
        if rest.is_empty() {
            Ok(Document { cells })
        } else {
            Err(DocumentError::Malformed)
        }
    }

    fn write(&self, out: &mut impl Sink) {
        out.put(TAG);
        write_number(out, self.cells.len());
        for (name, cell) in &self.cells {
            write_text(out, name);
            write_text(out, &cell.type_name);
            match &cell.text {
                None => write_number(out, 0),
                Some(text) => {
                    write_number(out, 1);
                    write_text(out, text);
                }
            }
        }
    }
}

// By hand, so that no value gets into a log by way of `{:?}`.
impl fmt::Debug for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Document").field("cells", &self.cells).finish()
    }
}

impl fmt::Debug for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = if self.text.is_some() { "<withheld>" } else { "NULL" };
        f.debug_struct("Cell")
            .field("type_name", &self.type_name)
            .field("text", &format_args!("{text}"))
            .finish()
    }
}

trait Sink {
    fn put(&mut self, bytes: &[u8]);
}

impl Sink for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}

struct Counter(usize);

impl Sink for Counter {
    fn put(&mut self, bytes: &[u8]) {
        self.0 += bytes.len();
    }
}

fn write_number(out: &mut impl Sink, mut number: usize) {
    while number >= 0x80 {
        out.put(&[(number & 0x7f) as u8 | 0x80]);
        number >>= 7;
    }
    out.put(&[number as u8]);
}

fn write_text(out: &mut impl Sink, text: &str) {
    write_number(out, text.len());
    out.put(text.as_bytes());
}

fn read_number(rest: &mut &[u8]) -> Result<usize, DocumentError> {
    let mut number: usize = 0;
    for shift in (0..usize::BITS).step_by(7) {
        let (&byte, tail) = rest.split_first().ok_or(DocumentError::Malformed)?;
        *rest = tail;
        let part = usize::from(byte & 0x7f);
        if part << shift >> shift != part {
            return Err(DocumentError::Malformed);
        }
        number |= part << shift;
        if byte & 0x80 == 0 {
            // A zero after other bytes would be a second form of the same number.
            return if byte == 0 && shift > 0 {
                Err(DocumentError::Malformed)
            } else {
                Ok(number)
            };
        }
    }
    Err(DocumentError::Malformed)
}

fn read_text(rest: &mut &[u8]) -> Result<String, DocumentError> {
    let length = read_number(rest)?;
    let (text, tail) = rest.split_at_checked(length).ok_or(DocumentError::Malformed)?;
    *rest = tail;
    std::str::from_utf8(text)
        .map(str::to_string)
        .map_err(|_| DocumentError::Malformed)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample() -> Document {
        let cell = |type_name: &str, text: Option<&str>| Cell {
            type_name: type_name.to_string(),
            text: text.map(str::to_string),
        };
        let cells = [
            ("Full \"Name\"", cell("text", Some("Ämil \u{1f600} O'Neill\n"))),
            ("amount", cell("numeric(40,20)", Some("1.10000000000000000000"))),
            ("empty", cell("text", Some(""))),
            ("nothing", cell("jsonb", None)),
            ("long", cell("text", Some(&"secret ".repeat(40_000)))),
        ];
        Document {
            cells: cells.into_iter().map(|(name, cell)| (name.to_string(), cell)).collect(),
        }
    }

    // Broken: a restored value differs from the archived one, NULL from '' included.
    #[test]
    fn reads_back_what_it_wrote() {
        for document in [sample(), Document::default()] {
            let bytes = document.encode();
            assert_eq!(bytes.len(), bytes.capacity(), "the buffer moved");
            assert_eq!(Document::decode(&bytes).unwrap(), document);
        }
    }

    #[test]
    fn refuses_what_it_did_not_write() {
        let mut document = sample();
        document.cells.remove("long");
        let bytes = document.encode();
        for length in 0..bytes.len() {
            assert_eq!(
                Document::decode(&bytes[..length]),
                Err(DocumentError::Malformed),
                "cut at {length}"
            );
        }
        let mut longer = bytes.to_vec();
        longer.push(0);
        assert_eq!(Document::decode(&longer), Err(DocumentError::Malformed));
        let mut newer = bytes.to_vec();
        newer[3] = 9;
        assert_eq!(Document::decode(&newer), Err(DocumentError::UnknownFormat(9)));
        assert_eq!(Document::decode(b"APD\x01\x80\x00"), Err(DocumentError::Malformed));
        assert_eq!(
            Document::decode(&[b"APD\x01".as_slice(), &[0xff; 12]].concat()),
            Err(DocumentError::Malformed)
        );
        assert_eq!(
            Document::decode(b"APD\x01\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
            Err(DocumentError::Malformed)
        );
        let twice = b"APD\x01\x02\x01a\x01t\x00\x01a\x01t\x00";
        assert_eq!(Document::decode(twice), Err(DocumentError::Malformed));
        assert!(Document::decode(b"APD\x01\x01\x01a\x01t\x00").is_ok());
        for at in 0..bytes.len() {
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 0x15;
            assert_ne!(Document::decode(&flipped).ok(), Some(document.clone()), "byte {at}");
        }
    }

    // Broken: a value gets into a log by way of `{:?}`.
    #[test]
    fn debug_holds_no_value() {
        let shown = format!("{:?}", sample());
        assert!(shown.contains("amount") && shown.contains("NULL"));
        for value in ["secret", "Neill", "1.1000"] {
            assert!(!shown.contains(value));
        }
    }
}
