use super::{NoKey, Reader, Tombstone, What, code_of};
use crate::domain::vault::MasterKeys;

fn keys(list: &[u8]) -> MasterKeys {
    let text: Vec<String> = list.iter().map(|b| hex::encode([*b; 32])).collect();
    MasterKeys::parse(&text.join("\n")).expect("keys")
}

fn tombstone(n: i64) -> Tombstone {
    Tombstone {
        id: format!("{n:032x}"),
        at: "2026-01-02 03:04:05+00".to_owned(),
        what: What::Shredded,
        policy: "shop".to_owned(),
        lineage: "a".to_owned(),
        home: "1:2".to_owned(),
        orders: vec![(format!("[\"{n}\"]"), 1), ("[\"9\"]".to_owned(), 2)],
        of: None,
    }
}

/// A file of `count` lines, by these keys.
fn file(count: i64, keys: &MasterKeys) -> Vec<String> {
    let mut after = String::new();
    (1..=count)
        .map(|n| {
            let line = tombstone(n).line(&after, &keys.current().signer());
            after = code_of(line.trim_end().as_bytes()).expect("a code");
            line.trim_end().to_owned()
        })
        .collect()
}

/// How many of these are tombstones, and the flaws that were found.
fn read(lines: &[String], keys: &MasterKeys) -> (usize, usize) {
    let mut reader = Reader::new(keys, String::new());
    let found = lines
        .iter()
        .filter(|l| matches!(reader.read(l.as_bytes()), Ok(Some(_))));
    (found.count(), reader.flaws())
}

#[test]
fn lines_say_what_was_written() {
    let keys = keys(&[1]);
    let void = Tombstone {
        what: What::Void,
        orders: Vec::new(),
        of: Some(tombstone(1).id),
        ..tombstone(2)
    };
    let first = tombstone(1).line("", &keys.current().signer());
    let code = code_of(first.trim_end().as_bytes()).expect("a code");
    let second = void.line(&code, &keys.current().signer());
    let mut reader = Reader::new(&keys, String::new());
    assert_eq!(reader.read(first.trim_end().as_bytes()), Ok(Some(tombstone(1))));
    assert_eq!(reader.read(second.trim_end().as_bytes()), Ok(Some(void)));
    assert_eq!(reader.flaws(), 0);
}

#[test]
fn times_are_read() {
    let at = "1970-01-01 00:00:01.500000+00";
    assert_eq!(Tombstone::micros(at), Some(1_500_000));
    assert_eq!(Tombstone::micros("yesterday"), None);
}

#[test]
fn whatever_is_done_to_a_line_shows() {
    let keys = keys(&[1]);
    let whole = file(4, &keys);
    assert_eq!(read(&whole, &keys), (4, 0));
    for (from, to) in [
        ("[\\\"2\\\"]", "[\\\"5\\\"]"),
        ("\",1]", "\",3]"),
        ("shredded", "purged"),
        ("\"shop\"", "\"shop2\""),
        ("\"1:2\"", "\"1:3\""),
        ("03:04", "03:05"),
        ("\"a\"", "\"b\""),
    ] {
        let mut changed = whole.clone();
        changed[1] = changed[1].replace(from, to);
        assert_ne!(changed[1], whole[1], "{from}");
        let (found, flaws) = read(&changed, &keys);
        assert!(found == 3 && flaws > 0, "{from}: {found} {flaws}");
        // The last one, too.
        let (found, flaws) = read(&changed[..2], &keys);
        assert!(found == 1 && flaws > 0, "{from}: {found} {flaws}");
    }
    let without = [&whole[..1], &whole[2..]].concat();
    assert_eq!(read(&without, &keys), (3, 1));
    assert_eq!(read(&whole[1..], &keys), (3, 1));
    let mut swapped = whole.clone();
    swapped.swap(1, 2);
    assert!(read(&swapped, &keys).1 > 0);
    let twice = [&whole[..2], &whole[1..]].concat();
    assert!(read(&twice, &keys).1 > 0);
}

#[test]
fn a_write_that_was_cut_off_is_no_flaw() {
    let keys = keys(&[1]);
    let whole = file(3, &keys);
    let half = whole[1][..40].to_owned();
    let torn = [&whole[..1], &[half][..], &whole[1..]].concat();
    assert_eq!(read(&torn, &keys), (3, 0));
    let mut reader = Reader::new(&keys, String::new());
    assert_eq!(reader.read(&whole[0].as_bytes()[..40]), Ok(None));
    assert_eq!(reader.flaws(), 1);
}

#[test]
fn lines_by_a_former_key_hold_while_it_is_at_hand() {
    let old = keys(&[1]);
    let mut lines = file(2, &old);
    let both = keys(&[2, 1]);
    let after = code_of(lines[1].as_bytes()).expect("a code");
    lines.push(
        tombstone(3)
            .line(&after, &both.current().signer())
            .trim_end()
            .to_owned(),
    );
    assert_eq!(read(&lines, &both), (3, 0));
    let alone = keys(&[2]);
    let mut reader = Reader::new(&alone, String::new());
    assert_eq!(
        reader.read(lines[0].as_bytes()),
        Err(NoKey(old.current().id().to_owned()))
    );
}

#[test]
fn no_key_but_ours_makes_a_line() {
    let (ours, theirs) = (keys(&[1]), keys(&[2]));
    let line = file(1, &theirs).remove(0);
    let line = line.replace(theirs.current().id(), ours.current().id());
    assert_eq!(read(&[line], &ours), (0, 1));
}
