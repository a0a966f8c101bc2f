//! The plaintext of one archived version of a record: the cells that held PII, as their types' exact text forms.
//!
//! Layout: the tag, the number of cells, then for each cell in the order of names: name, type, 0 (NULL) or 1 and the text.
//! Numbers and lengths are little-endian base 128. Everything is text, so no value can change on its way.

use std::fmt;
use std::ops::Range;

use zeroize::Zeroizing;

/// Ends with the version of the layout.
const TAG: &[u8; 4] = b"APD\x01";

/// One archived value.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Cell<'a> {
    /// The bare name of its column.
    pub name: &'a str,
    /// The type as `format_type` names it.
    pub type_name: &'a str,
    /// What the type's output function printed, `None` for NULL.
    pub text: Option<&'a str>,
}

/// A document that was read: its cells in the order of their names.
pub struct Document {
    texts: Zeroizing<String>,
    cells: Vec<Place>,
}

/// Where the parts of a cell are.
struct Place {
    name: Range<usize>,
    type_name: Range<usize>,
    text: Option<Range<usize>>,
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

/// Cells as the bytes of a document, in a buffer that never moves while it grows: a moved one would leave a copy behind.
pub fn encode(mut cells: Vec<Cell<'_>>) -> Zeroizing<Vec<u8>> {
    cells.sort_unstable_by_key(|cell| cell.name);
    let mut size = Counter(0);
    write(&cells, &mut size);
    let mut out = Zeroizing::new(Vec::with_capacity(size.0));
    write(&cells, &mut *out);
    out
}

fn write(cells: &[Cell<'_>], out: &mut impl Sink) {
    out.put(TAG);
    write_number(out, cells.len());
    for cell in cells {
        write_text(out, cell.name);
        write_text(out, cell.type_name);
        match cell.text {
            None => write_number(out, 0),
            Some(text) => {
                write_number(out, 1);
                write_text(out, text);
            }
        }
    }
}

impl Document {
    /// Reads back what [`encode`] wrote, and nothing else.
    pub fn decode(bytes: &[u8]) -> Result<Self, DocumentError> {
        let (tag, mut rest) = bytes.split_at_checked(TAG.len()).ok_or(DocumentError::Malformed)?;
        if tag[..3] != TAG[..3] {
            return Err(DocumentError::Malformed);
        }
        if tag[3] != TAG[3] {
            return Err(DocumentError::UnknownFormat(tag[3]));
        }
        let count = read_number(&mut rest)?;
        // Room for all, so that it never moves either.
        let mut texts = Zeroizing::new(String::with_capacity(rest.len()));
        let mut cells: Vec<Place> = Vec::new();
        for _ in 0..count {
            let name = read_text(&mut rest, &mut texts)?;
            let type_name = read_text(&mut rest, &mut texts)?;
            let text = match read_number(&mut rest)? {
                0 => None,
                1 => Some(read_text(&mut rest, &mut texts)?),
                _ => return Err(DocumentError::Malformed),
            };
            // One document has one encoding: names ascend.
            if cells
                .last()
                .is_some_and(|last| texts[last.name.clone()] >= texts[name.clone()])
            {
                return Err(DocumentError::Malformed);
            }
            cells.push(Place { name, type_name, text });
        }
        if rest.is_empty() {
            Ok(Document { texts, cells })
        } else {
            Err(DocumentError::Malformed)
        }
    }

    /// Its cells, in the order of their names.
    pub fn cells(&self) -> impl ExactSizeIterator<Item = Cell<'_>> {
        self.cells.iter().map(|place| self.at(place))
    }

    /// The cell of that column.
    pub fn cell(&self, name: &str) -> Option<Cell<'_>> {
        let found = self
            .cells
            .binary_search_by(|place| self.texts[place.name.clone()].cmp(name));
        found.ok().map(|i| self.at(&self.cells[i]))
    }

    fn at(&self, place: &Place) -> Cell<'_> {
        Cell {
            name: &self.texts[place.name.clone()],
            type_name: &self.texts[place.type_name.clone()],
            text: place.text.clone().map(|range| &self.texts[range]),
        }
    }
}

// By hand, so that no value gets into a log by way of `{:?}`.
impl fmt::Debug for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.cells()).finish()
    }
}

impl fmt::Debug for Cell<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = if self.text.is_some() { "<withheld>" } else { "NULL" };
        f.debug_struct("Cell")
            .field("name", &self.name)
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

/// Moves a text to the end of `texts`. Returns where it is.
fn read_text(rest: &mut &[u8], texts: &mut String) -> Result<Range<usize>, DocumentError> {
    let length = read_number(rest)?;
    let (text, tail) = rest.split_at_checked(length).ok_or(DocumentError::Malformed)?;
    *rest = tail;
    let from = texts.len();
    texts.push_str(std::str::from_utf8(text).map_err(|_| DocumentError::Malformed)?);
    Ok(from..texts.len())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sample(long: &str) -> Vec<Cell<'_>> {
        let cell = |name, type_name, text| Cell { name, type_name, text };
        vec![
            cell("nothing", "jsonb", None),
            cell("Full \"Name\"", "text", Some("Ämil \u{1f600} O'Neill\n")),
            cell("amount", "numeric(40,20)", Some("1.10000000000000000000")),
            cell("long", "text", Some(long)),
            cell("empty", "text", Some("")),
        ]
    }

    // Broken: a restored value differs from the archived one, NULL from '' included.
    #[test]
    fn reads_back_what_it_wrote() {
        let long = "secret ".repeat(40_000);
        for mut cells in [sample(&long), Vec::new()] {
            let bytes = encode(cells.clone());
            assert_eq!(bytes.len(), bytes.capacity(), "the buffer moved");
            let document = Document::decode(&bytes).unwrap();
            cells.sort_by_key(|cell| cell.name);
            assert_eq!(document.cells().collect::<Vec<_>>(), cells);
            for cell in &cells {
                assert_eq!(document.cell(cell.name), Some(*cell));
            }
            assert_eq!(document.cell("mount"), None);
        }
    }

    #[test]
    fn refuses_what_it_did_not_write() {
        let mut cells = sample("");
        cells.retain(|cell| cell.name != "long");
        let bytes = encode(cells);
        let malformed = |bytes: &[u8]| matches!(Document::decode(bytes), Err(DocumentError::Malformed));
        for length in 0..bytes.len() {
            assert!(malformed(&bytes[..length]), "cut at {length}");
        }
        let mut longer = bytes.to_vec();
        longer.push(0);
        assert!(malformed(&longer));
        let mut newer = bytes.to_vec();
        newer[3] = 9;
        assert_eq!(Document::decode(&newer).err(), Some(DocumentError::UnknownFormat(9)));
        assert!(malformed(b"APD\x01\x80\x00"));
        assert!(malformed(&[b"APD\x01".as_slice(), &[0xff; 12]].concat()));
        assert!(malformed(b"APD\x01\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"));
        assert!(malformed(b"APD\x01\x02\x01a\x01t\x00\x01a\x01t\x00"));
        assert!(!malformed(b"APD\x01\x01\x01a\x01t\x00"));
        for at in 0..bytes.len() {
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 0x15;
            let read = Document::decode(&flipped).map(|document| encode(document.cells().collect()));
            assert_ne!(read.ok().as_deref(), Some(&*bytes), "byte {at}");
        }
    }

    // Broken: a value gets into a log by way of `{:?}`.
    #[test]
    fn debug_holds_no_value() {
        let document = Document::decode(&encode(sample("secret"))).unwrap();
        let shown = format!("{document:?} {:?}", sample("secret"));
        assert!(shown.contains("amount") && shown.contains("NULL"));
        for value in ["secret", "Neill", "1.1000"] {
            assert!(!shown.contains(value));
        }
    }
}
