//! A strict JSON reader that remembers where each value stands in the text.
//!
//! A general parser would lose what an exact rewrite needs: positions, repeated keys, and strings that PostgreSQL's `json`
//! accepts although they are no text (`"\ud800"`).

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::JsonError;

/// Containers in containers, at most. Every walk below is recursive and relies on it.
pub(super) const MAX_DEPTH: usize = 512;

/// Index of a node in [`Scan::nodes`].
pub(super) type Id = usize;

pub(super) struct Node {
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) kind: Kind,
    /// Nodes at the same location, which only repeated keys make possible, share a place.
    pub(super) place: Id,
    /// How many readings it takes until every value below was part of one.
    readings: usize,
}

pub(super) enum Kind {
    Null,
    Bool(bool),
    Number,
    String(String),
    Array(Vec<Id>),
    /// In the order of the text; of a repeated key only the first, see [`Scan::twins`].
    Object(Vec<(String, Id)>),
}

/// A document as nodes.
pub(super) struct Scan<'a> {
    text: &'a str,
    pub(super) nodes: Vec<Node>,
    pub(super) root: Id,
    /// By the first value of a repeated key: all its values, the first included.
    pub(super) twins: HashMap<Id, Vec<Id>>,
}

impl<'a> Scan<'a> {
    pub(super) fn new(text: &'a str) -> Result<Self, JsonError> {
        let mut reader = Reader {
            text,
            bytes: text.as_bytes(),
            at: 0,
            nodes: Vec::new(),
            twins: HashMap::new(),
        };
        let root = reader.value(0)?;
        reader.blanks();
        if reader.at != text.len() {
            return Err(JsonError::Invalid);
        }
        let mut scan = Scan {
            text,
            nodes: reader.nodes,
            root,
            twins: reader.twins,
        };
        if !scan.twins.is_empty() {
            let mut places = HashMap::new();
            scan.assign_places(root, root, &mut places);
        }
        Ok(scan)
    }

    /// Paths see one value a key. With repeated keys the document has several readings, and together they show every value.
    pub(super) fn readings(&self) -> usize {
        self.nodes[self.root].readings
    }

    /// All values that stand for one entry of an object.
    pub(super) fn all_of<'s>(&'s self, first: &'s Id) -> &'s [Id] {
        self.twins.get(first).map_or(std::slice::from_ref(first), Vec::as_slice)
    }

    /// The value that reading number `reading` sees for an entry, and the number to read that value with.
    pub(super) fn chosen(&self, first: Id, mut reading: usize) -> (Id, usize) {
        let Some(values) = self.twins.get(&first) else {
            return (first, reading);
        };
        let mut last = first;
        for &id in values {
            let own = self.nodes[id].readings;
            if reading < own {
                return (id, reading);
            }
            reading -= own;
            last = id;
        }
        (last, self.nodes[last].readings - 1)
    }

    /// The document as reading number `reading` sees it.
    pub(super) fn value(&self, id: Id, reading: usize) -> Value {
        let node = &self.nodes[id];
        match &node.kind {
            Kind::Null => Value::Null,
            Kind::Bool(b) => Value::Bool(*b),
            // What the number type cannot hold is compared with nothing; its digits stay in the text.
            Kind::Number => self.text[node.start..node.end]
                .parse()
                .map_or(Value::Null, Value::Number),
            Kind::String(s) => Value::String(s.clone()),
            Kind::Array(items) => Value::Array(items.iter().map(|&item| self.value(item, reading)).collect()),
            Kind::Object(members) => {
                let mut map = Map::with_capacity(members.len());
                for (key, first) in members {
                    let (id, reading) = self.chosen(*first, reading);
                    map.insert(key.clone(), self.value(id, reading));
                }
                Value::Object(map)
            }
        }
    }

    fn assign_places(&mut self, id: Id, place: Id, places: &mut HashMap<(Id, Step), Id>) {
        self.nodes[id].place = place;
        let below: Vec<(Step, Id)> = match &self.nodes[id].kind {
            Kind::Array(items) => items
                .iter()
                .enumerate()
                .map(|(i, &item)| (Step::Index(i), item))
                .collect(),
            Kind::Object(members) => members
                .iter()
                .flat_map(|(key, first)| self.all_of(first).iter().map(|&id| (Step::Name(key.clone()), id)))
                .collect(),
            _ => return,
        };
        for (step, child) in below {
            let place = *places.entry((place, step)).or_insert(child);
            self.assign_places(child, place, places);
        }
    }
}

#[derive(PartialEq, Eq, Hash)]
enum Step {
    Name(String),
    Index(usize),
}

struct Reader<'a> {
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    twins: HashMap<Id, Vec<Id>>,
}

impl Reader<'_> {
    fn value(&mut self, depth: usize) -> Result<Id, JsonError> {
        self.blanks();
        let start = self.at;
        let mut readings = 1;
        let kind = match self.peek() {
            Some(b'{' | b'[') if depth == MAX_DEPTH => return Err(JsonError::TooDeep),
            Some(b'{') => self.object(depth, &mut readings)?,
            Some(b'[') => self.array(depth, &mut readings)?,
            Some(b'"') => Kind::String(self.string()?),
            Some(b't') => self.word("true", Kind::Bool(true))?,
            Some(b'f') => self.word("false", Kind::Bool(false))?,
            Some(b'n') => self.word("null", Kind::Null)?,
            _ => self.number()?,
        };
        let id = self.nodes.len();
        self.nodes.push(Node {
            start,
            end: self.at,
            kind,
            place: id,
            readings,
        });
        Ok(id)
    }

    fn object(&mut self, depth: usize, readings: &mut usize) -> Result<Kind, JsonError> {
        self.at += 1;
        let mut members: Vec<(String, Id)> = Vec::new();
        self.blanks();
        if self.take(b'}') {
            return Ok(Kind::Object(members));
        }
        loop {
            self.blanks();
            if self.peek() != Some(b'"') {
                return Err(JsonError::Invalid);
            }
            let key = self.string()?;
            self.blanks();
            if !self.take(b':') {
                return Err(JsonError::Invalid);
            }
            let id = self.value(depth + 1)?;
            members.push((key, id));
            self.blanks();
            if self.take(b'}') {
                break;
            }
            if !self.take(b',') {
                return Err(JsonError::Invalid);
            }
        }
        self.join_twins(&mut members);
        for (_, first) in &members {
            let values = self.twins.get(first).map_or(std::slice::from_ref(first), Vec::as_slice);
            *readings = values
                .iter()
                .map(|&id| self.nodes[id].readings)
                .sum::<usize>()
                .max(*readings);
        }
        Ok(Kind::Object(members))
    }

    fn join_twins(&mut self, members: &mut Vec<(String, Id)>) {
        let mut order: Vec<usize> = (0..members.len()).collect();
        order.sort_by(|&a, &b| members[a].0.cmp(&members[b].0));
        let mut repeated = vec![false; members.len()];
        for run in order
            .chunk_by(|&a, &b| members[a].0 == members[b].0)
            .filter(|run| run.len() > 1)
        {
            let ids: Vec<Id> = run.iter().map(|&member| members[member].1).collect();
            self.twins.insert(ids[0], ids);
            for &member in &run[1..] {
                repeated[member] = true;
            }
        }
        let mut repeated = repeated.into_iter();
        members.retain(|_| !repeated.next().unwrap_or(false));
    }

    fn array(&mut self, depth: usize, readings: &mut usize) -> Result<Kind, JsonError> {
        self.at += 1;
        let mut items = Vec::new();
        self.blanks();
        if self.take(b']') {
            return Ok(Kind::Array(items));
        }
        loop {
            let id = self.value(depth + 1)?;
            *readings = self.nodes[id].readings.max(*readings);
            items.push(id);
            self.blanks();
            if self.take(b']') {
                return Ok(Kind::Array(items));
            }
            if !self.take(b',') {
                return Err(JsonError::Invalid);
            }
        }
    }

    fn string(&mut self) -> Result<String, JsonError> {
        self.at += 1;
        let mut out = String::new();
        loop {
            let from = self.at;
            while self.peek().is_some_and(|b| b != b'"' && b != b'\\' && b >= 0x20) {
                self.at += 1;
            }
            // Both ends are next to an ASCII byte, so the slice ends at characters.
            out.push_str(&self.text[from..self.at]);
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(out);
                }
                Some(b'\\') => {
                    self.at += 1;
                    out.push(self.escape()?);
                }
                _ => return Err(JsonError::Invalid),
            }
        }
    }

    fn escape(&mut self) -> Result<char, JsonError> {
        let byte = self.peek().ok_or(JsonError::Invalid)?;
        self.at += 1;
        Ok(match byte {
            b'"' | b'\\' | b'/' => char::from(byte),
            b'b' => '\u{8}',
            b'f' => '\u{c}',
            b'n' => '\n',
            b'r' => '\r',
            b't' => '\t',
            b'u' => {
                let unit = self.four_digits()?;
                if (0xD800..0xDC00).contains(&unit) && self.bytes[self.at..].starts_with(b"\\u") {
                    let back = self.at;
                    self.at += 2;
                    let low = self.four_digits()?;
                    if (0xDC00..0xE000).contains(&low) {
                        let code = 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00);
                        return Ok(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
                    }
                    self.at = back;
                }
                char::from_u32(unit).unwrap_or(char::REPLACEMENT_CHARACTER)
            }
            _ => return Err(JsonError::Invalid),
        })
    }

    fn four_digits(&mut self) -> Result<u32, JsonError> {
        let mut unit = 0;
        for _ in 0..4 {
            let digit = self
                .peek()
                .and_then(|b| char::from(b).to_digit(16))
                .ok_or(JsonError::Invalid)?;
            unit = unit * 16 + digit;
            self.at += 1;
        }
        Ok(unit)
    }

    fn number(&mut self) -> Result<Kind, JsonError> {
        self.take(b'-');
        if !self.take(b'0') {
            self.digits()?;
        }
        if self.take(b'.') {
            self.digits()?;
        }
        if self.take(b'e') || self.take(b'E') {
            let _ = self.take(b'+') || self.take(b'-');
            self.digits()?;
        }
        Ok(Kind::Number)
    }

    fn digits(&mut self) -> Result<(), JsonError> {
        let from = self.at;
        while self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
        if self.at == from {
            Err(JsonError::Invalid)
        } else {
            Ok(())
        }
    }

    fn word(&mut self, word: &str, kind: Kind) -> Result<Kind, JsonError> {
        if !self.bytes[self.at..].starts_with(word.as_bytes()) {
            return Err(JsonError::Invalid);
        }
        self.at += word.len();
        Ok(kind)
    }

    fn blanks(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        let there = self.peek() == Some(byte);
        self.at += usize::from(there);
        there
    }
}
