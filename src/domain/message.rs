//! What a code is made over: parts one after the other, each with its length, so that no two lists of parts read the same.

/// The message of a code.
#[derive(Debug, Default)]
pub struct Message(Vec<u8>);

impl Message {
    /// Adds a text, or that there is none.
    #[must_use]
    pub fn text(self, text: Option<&str>) -> Self {
        self.bytes(text.map(str::as_bytes))
    }

    /// Adds bytes, or that there are none.
    #[must_use]
    pub fn bytes(mut self, bytes: Option<&[u8]>) -> Self {
        match bytes {
            None => self.0.push(0),
            Some(bytes) => {
                self.0.push(1);
                self.0.extend((bytes.len() as u64).to_be_bytes());
                self.0.extend(bytes);
            }
        }
        self
    }

    /// Adds a number.
    #[must_use]
    pub fn number(self, number: i64) -> Self {
        self.text(Some(&number.to_string()))
    }

    /// All of it.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::Message;

    #[test]
    fn no_two_lists_of_parts_read_the_same() {
        let of = |parts: &[Option<&str>]| {
            let message = parts.iter().fold(Message::default(), |m, part| m.text(*part));
            message.as_bytes().to_vec()
        };
        let lists: &[&[Option<&str>]] = &[
            &[],
            &[None],
            &[Some("")],
            &[Some("ab")],
            &[Some("a"), Some("b")],
            &[Some("a"), None, Some("b")],
            &[None, Some("ab")],
            &[Some("ab"), None],
        ];
        for (at, list) in lists.iter().enumerate() {
            assert!(lists[..at].iter().all(|other| of(other) != of(list)), "{list:?}");
        }
        assert_eq!(of(&[Some("12")]), Message::default().number(12).as_bytes());
    }
}
