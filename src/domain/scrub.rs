//! Names inside of text that is kept: whole words, whatever their case, the longest name first.
//!
//! What stands in place of a name is left alone from then on, so that a text that was scrubbed stays as it is.

use std::ops::Range;

use unicode_normalization::UnicodeNormalization;
use unicode_normalization::char::is_combining_mark;
use unicode_segmentation::UnicodeSegmentation;

/// Shorter values are no names: they are found everywhere. In characters.
const SHORTEST: usize = 2;

/// What takes the place of a name, and the marks of earlier tools.
#[derive(Clone, Copy)]
pub struct Marks<'a> {
    pub placeholder: &'a str,
    pub others: &'a [String],
}

impl<'a> Marks<'a> {
    fn all(self) -> impl Iterator<Item = &'a str> {
        std::iter::once(self.placeholder).chain(self.others.iter().map(String::as_str))
    }

    /// How many of them stand in a text.
    pub fn count(self, text: &str) -> usize {
        self.all()
            .filter(|m| !m.is_empty())
            .map(|m| text.matches(m).count())
            .sum()
    }
}

/// Values that are looked for, each as its words; those with most words first.
#[derive(Debug, Default)]
pub struct Names(Vec<Vec<String>>);

impl Names {
    /// The names among some values.
    pub fn of<'v>(values: impl Iterator<Item = &'v str>, marks: Marks<'_>) -> Self {
        let mut names: Vec<Vec<String>> = values
            .map(str::trim)
            .filter(|v| v.chars().count() >= SHORTEST && marks.all().all(|m| m != *v))
            .map(only_words)
            .filter(|words| !words.is_empty())
            .collect();
        let length = |name: &Vec<String>| (name.len(), name.iter().map(String::len).sum::<usize>());
        names.sort_by(|a, b| length(b).cmp(&length(a)).then_with(|| a.cmp(b)));
        names.dedup();
        Self(names)
    }

    /// The text without these names, cut where it becomes longer than the column may hold.
    pub fn scrub(&self, text: &str, marks: Marks<'_>, room: Option<usize>) -> String {
        let mut text = text.to_owned();
        // Where an end is cut off, a shorter word may be left that is a name.
        for _ in 0..ROUNDS {
            let mut next = self.once(&text, marks);
            if let Some(room) = room
                && next.chars().count() > room
            {
                next = next.chars().take(room).collect();
            }
            if next == text {
                return text;
            }
            text = next;
        }
        marks.placeholder.chars().take(room.unwrap_or(usize::MAX)).collect()
    }

    fn once(&self, text: &str, marks: Marks<'_>) -> String {
        let mut words = words(text, marks);
        let mut found: Vec<Range<usize>> = Vec::new();
        for name in &self.0 {
            let mut at = 0;
            while at + name.len() <= words.len() {
                let part = &mut words[at..at + name.len()];
                let together = part.iter().all(|w| w.piece == part[0].piece);
                if together
                    && part
                        .iter()
                        .zip(name)
                        .all(|(word, name)| !word.taken && word.folded == *name)
                {
                    found.push(part[0].place.start..part[name.len() - 1].place.end);
                    part.iter_mut().for_each(|w| w.taken = true);
                    at += name.len();
                } else {
                    at += 1;
                }
            }
        }
        found.sort_by_key(|f| f.start);
        let mut out = String::with_capacity(text.len());
        let mut end = 0;
        for place in found {
            out.push_str(&text[end..place.start]);
            out.push_str(marks.placeholder);
            end = place.end;
        }
        out.push_str(&text[end..]);
        out
    }
}

/// Rounds after which a text goes as a whole.
const ROUNDS: usize = 5;

/// A word of a text.
struct Word {
    place: Range<usize>,
    folded: String,
    /// Which piece between marks it is in.
    piece: usize,
    /// It is part of a mark, or of a name that was found.
    taken: bool,
}

/// The words of a text: as Unicode segments it, and then at whatever is neither letter nor digit, so that `Doe's` and
/// `jane.doe` have two each.
fn words(text: &str, marks: Marks<'_>) -> Vec<Word> {
    let mut kept: Vec<Range<usize>> = marks
        .all()
        .filter(|m| !m.is_empty())
        .flat_map(|m| text.match_indices(m).map(|(at, m)| at..at + m.len()))
        .collect();
    kept.sort_by_key(|k| k.start);
    let mut out = Vec::new();
    let mut add = |place: Range<usize>| {
        let word = &text[place.clone()];
        out.push(Word {
            folded: folded(word),
            piece: kept.iter().filter(|k| k.start < place.start).count(),
            taken: kept.iter().any(|k| k.start < place.end && place.start < k.end),
            place,
        });
    };
    for (start, segment) in text.unicode_word_indices() {
        let mut from = None;
        for (at, c) in segment.char_indices() {
            let inside = c.is_alphanumeric() || (from.is_some() && is_combining_mark(c));
            match (from, inside) {
                (None, true) => from = Some(at),
                (Some(begun), false) => {
                    add(start + begun..start + at);
                    from = None;
                }
                _ => {}
            }
        }
        if let Some(begun) = from {
            add(start + begun..start + segment.len());
        }
    }
    out
}

/// One spelling of a word, whatever its case and composition: `Straße` and `STRASSE` are the same.
fn folded(word: &str) -> String {
    let plain: String = word.nfkc().collect();
    plain.to_uppercase().to_lowercase().nfkc().collect()
}

fn only_words(text: &str) -> Vec<String> {
    let none = Marks {
        placeholder: "",
        others: &[],
    };
    words(text, none).into_iter().map(|w| w.folded).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKS: Marks<'_> = Marks {
        placeholder: "[Redacted]",
        others: &[],
    };

    fn scrubbed(text: &str, names: &[&str]) -> String {
        let names = Names::of(names.iter().copied(), MARKS);
        let out = names.scrub(text, MARKS, None);
        assert_eq!(names.scrub(&out, MARKS, None), out, "not a fixed point");
        out
    }

    #[test]
    fn whole_words_in_any_case() {
        assert_eq!(
            scrubbed("Manual Payment: INV/7 Jane Doe", &["Jane Doe"]),
            "Manual Payment: INV/7 [Redacted]"
        );
        assert_eq!(
            scrubbed("JANE paid; jane.doe@x, Doe's parcel", &["Jane", "Doe"]),
            "[Redacted] paid; [Redacted].[Redacted]@x, [Redacted]'s parcel"
        );
        assert_eq!(scrubbed("Janet and Doerte", &["Jane", "Doe"]), "Janet and Doerte");
        assert_eq!(
            scrubbed("Jane  Doe, (Jane,Doe) Jane\nDoe", &["Jane Doe"]),
            "[Redacted], ([Redacted]) [Redacted]"
        );
        assert_eq!(
            scrubbed("STRASSE Jose\u{301} ÉLODIE", &["Straße", "José", "Élodie"]),
            "[Redacted] [Redacted] [Redacted]"
        );
        assert_eq!(
            scrubbed("山田太郎様 für O’Brien", &["山田太郎", "O'Brien"]),
            "[Redacted]様 für [Redacted]"
        );
    }

    #[test]
    fn the_longest_first() {
        assert_eq!(
            scrubbed("Jane Mary Doe", &["Jane", "Jane Mary Doe", "Mary"]),
            "[Redacted]"
        );
        assert_eq!(
            scrubbed("a Jane b Mary c", &["Mary c", "Jane b Mary"]),
            "a [Redacted] c"
        );
    }

    #[test]
    fn what_is_no_name() {
        assert_eq!(
            scrubbed("A b [Redacted] redacted", &["A", " b ", "", "[Redacted]", "--"]),
            "A b [Redacted] redacted"
        );
        assert_eq!(scrubbed("Jo was here", &["Jo"]), "[Redacted] was here");
    }

    #[test]
    fn what_stands_in_place_of_a_name_is_left_alone() {
        let marks = Marks {
            placeholder: "Jane was removed",
            others: &["**Doe**".to_owned()],
        };
        let names = Names::of(["Jane", "was removed Jane", "Doe"].into_iter(), marks);
        let out = names.scrub("Jane Doe **Doe** x", marks, None);
        assert_eq!(out, "Jane was removed Jane was removed **Doe** x");
        assert_eq!(names.scrub(&out, marks, None), out);
        assert_eq!(marks.count(&out), 3);
    }

    #[test]
    fn what_has_no_room_is_cut() {
        let names = Names::of(["Jo", "Ann"].into_iter(), MARKS);
        assert_eq!(names.scrub("Jo Annex", MARKS, Some(12)), "[Redacted] A");
        assert_eq!(names.scrub("Jo", MARKS, Some(4)), "[Red");
        let out = names.scrub("Jo Annex", MARKS, Some(14));
        assert_eq!(names.scrub(&out, MARKS, Some(14)), out);
        assert!(!out.contains("Ann"));
    }
}
