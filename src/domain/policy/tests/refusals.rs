use serde_json::{Value, json};

use super::*;

#[test]
fn unknown_keys_name_the_nearest() {
    assert_refused(
        &with("/archive_afer", json!("1 day")),
        "archive_afer",
        "unknown key",
        "\"archive_after\"",
    );
    assert_refused(
        &with("/orders/anchr", json!("x")),
        "orders.anchr",
        "unknown key \"anchr\"",
        "\"anchor\"",
    );
    assert_refused(
        &with("/window", json!({"form": "01:00"})),
        "window.form",
        "unknown key",
        "\"from\"",
    );
    assert_refused(
        &with("/archive", json!({"shema": "a"})),
        "archive.shema",
        "unknown key",
        "\"schema\"",
    );
    let linked = with(
        "/linked",
        json!([
            link("a", json!({})),
            link("b", json!({"role": "customer", "not_befor": "x"}))
        ]),
    );
    assert_refused(&linked, "linked[1].not_befor", "unknown key", "\"not_before\"");
    let anchor = with("/orders/anchor", json!([{"linked": "a", "at": "b", "compleet": "c"}]));
    assert_refused(&anchor, "orders.anchor[0].compleet", "unknown key", "\"complete\"");
    let treatment = with("/orders/redact", json!({"Full Name": {"prefx": 2}}));
    assert_refused(&treatment, "orders.redact.Full Name.prefx", "unknown key", "\"prefix\"");
    assert_refused(&with("/zzz", json!(1)), "zzz", "unknown key", "Known here: \"policy\"");
}

#[test]
fn unknown_words_name_the_nearest() {
    assert_refused(
        &with("/when_retrieved", json!("ignor")),
        "when_retrieved",
        "unknown word",
        "\"ignore\"",
    );
    assert_refused(
        &with("/on_reimport", json!("refused")),
        "on_reimport",
        "unknown word",
        "\"refuse\"",
    );
    assert_refused(
        &with("/reason", json!("Required")),
        "reason",
        "unknown word",
        "\"required\"",
    );
    assert_refused(
        &with("/deadline", json!("wiat")),
        "deadline",
        "unknown word",
        "\"wait\"",
    );
    let marked = with("/linked", json!([link("a", json!({"mark": {"done": "true"}}))]));
    assert_refused(&marked, "linked[0].mark", "nothing is redacted", "\"redact\"");
    assert_refused(
        &with("/orders/redact", json!({"memo": {"scrub": "customers.name"}})),
        "orders.redact.memo.scrub",
        "a list",
        "",
    );
    for (key, word, near) in [
        ("shared", "amzon", "amazon"),
        ("role", "custmer", "customer"),
        ("on_redact", "delet", "delete"),
    ] {
        let document = with("/linked", json!([link("a", json!({key: word}))]));
        assert_refused(&document, &format!("linked[0].{key}"), "unknown word", near);
    }
    let stale = json!({"table": "o", "anchor": "a", "placed": "p", "stale_after": "1 day", "stale": "reprt"});
    assert_refused(&with("/orders", stale), "orders.stale", "unknown word", "\"report\"");
    assert_refused(
        &with("/orders/redact", json!({"a": "placehoder"})),
        "orders.redact.a",
        "unknown treat",
        "\"placeholder\"",
    );
}

#[test]
fn wrong_types_and_empty_texts() {
    assert_refused(&json!([]), "", "must be an object, not a list", "");
    assert_refused(&with("/policy", json!(5)), "policy", "must be a text, not a number", "");
    assert_refused(
        &with("/enabled", json!("yes")),
        "enabled",
        "must be true or false, not a text",
        "",
    );
    assert_refused(&with("/window", Value::Null), "window", "not null", "Leave the key out");
    assert_refused(
        &with("/linked", json!({})),
        "linked",
        "must be a list of tables, not an object",
        "",
    );
    assert_refused(
        &with("/orders/key", json!(["id", 1])),
        "orders.key[1]",
        "must be a text",
        "",
    );
    assert_refused(&with("/orders/key", json!([])), "orders.key", "empty list", "");
    assert_refused(
        &with("/orders/key", json!(["id", "id"])),
        "orders.key[1]",
        "appears twice",
        "",
    );
    assert_refused(&with("/orders/table", json!(" ")), "orders.table", "is empty", "");
    assert_refused(&with("/orders/anchor", json!([])), "orders.anchor", "empty list", "");
    assert_refused(&with("/placeholder", json!("")), "placeholder", "is empty", "");
    assert_refused(&with("/also_redacted", json!([""])), "also_redacted[0]", "is empty", "");
    assert_refused(&with("/orders/redact", json!([])), "orders.redact", "empty list", "");
    assert_refused(
        &with("/orders/redact", json!({})),
        "orders.redact",
        "names no column",
        "",
    );
    assert_refused(
        &with("/orders/redact", json!("name")),
        "orders.redact",
        "must be a list of columns",
        "",
    );
    assert_refused(
        &with("/orders/redact", json!(["a", "a"])),
        "orders.redact[1]",
        "appears twice",
        "",
    );
    assert_refused(
        &with("/orders/redact", json!({"": "null"})),
        "orders.redact",
        "empty name",
        "",
    );
    assert_refused(&with("/orders/number", json!("a\0b")), "orders.number", "NUL", "");
    let joins = |on: Value| with("/linked", json!([{"table": "a", "on": on}]));
    assert_refused(&joins(json!({})), "linked[0].on", "joins nothing", "");
    assert_refused(&joins(json!({"a": ""})), "linked[0].on.a", "is empty", "");
    assert_refused(&joins(json!(["a"])), "linked[0].on", "must be an object", "");
}

#[test]
fn missing_keys() {
    assert_refused(&json!({}), "policy", "is missing", "");
    assert_refused(&json!({"policy": "p"}), "orders", "is missing", "");
    assert_refused(
        &json!({"policy": "p", "orders": {"table": "o"}}),
        "orders.anchor",
        "is missing",
        "",
    );
    assert_refused(
        &with("/linked", json!([{"table": "a"}])),
        "linked[0].on",
        "is missing",
        "",
    );
    assert_refused(
        &with("/window", json!({"from": "01:00"})),
        "window.to",
        "is missing",
        "",
    );
    assert_refused(
        &with("/orders/anchor", json!({"linked": "a"})),
        "orders.anchor.at",
        "is missing",
        "",
    );
}

#[test]
fn broken_json_and_duplicate_keys() {
    assert!(
        Policy::parse("{")
            .unwrap_err()
            .problem
            .starts_with("policy is not valid JSON")
    );
    assert!(
        Policy::parse(&"[".repeat(100_000))
            .unwrap_err()
            .problem
            .starts_with("policy is not valid JSON")
    );
    let twice = SHOP
        .replace(r#""bill_to""#, r#""b""#)
        .replace(r#""not_before""#, r#""number": "n", "not_before""#);
    let error = Policy::parse(&twice).unwrap_err();
    assert_eq!(
        (error.path.as_str(), error.problem.as_str()),
        ("linked[2].number", "key appears twice")
    );
    assert_eq!(error.to_string(), "linked[2].number: key appears twice");
    // serde_json's own marker of a number is no way around the types.
    let marker = with(
        "/orders/redact",
        json!({"c": {"value": {"$serde_json::private::Number": "x"}}}),
    );
    assert!(parse(&marker).is_err());
    // The escaped key is the same key.
    let escaped = r#"{"policy": "p", "polic\u0079": "p", "orders": {"table": "o", "anchor": "a"}}"#;
    assert_eq!(Policy::parse(escaped).unwrap_err().path, "policy");
}

#[test]
fn foreign_archives() {
    let foreign = |table: &str| with("/archive", json!({"foreign_table": table}));
    let policy = Policy::parse(&foreign("Cold.\"Doc\"").to_string()).unwrap();
    assert_eq!(
        (policy.archive.foreign_table, policy.deadline),
        (Some(("cold".to_owned(), "Doc".to_owned())), Deadline::Wait)
    );
    assert_refused(
        &foreign("document"),
        "archive.foreign_table",
        "needs its schema",
        "cold.document",
    );
    assert_refused(
        &foreign("a.b.c"),
        "archive.foreign_table",
        "more than two parts",
        "schema.table",
    );
    assert_refused(
        &with("/deadline", json!("spool")),
        "deadline",
        "needs a foreign archive",
        "foreign_table",
    );
    let mut spool = foreign("cold.document");
    spool["deadline"] = json!("spool");
    assert_eq!(Policy::parse(&spool.to_string()).unwrap().deadline, Deadline::Spool);
    let mut by_itself = foreign("cold.document");
    by_itself["linked"] = json!([link("returns", json!({"retrieve_on_insert": true}))]);
    assert!(Policy::parse(&by_itself.to_string()).is_ok());
    let mut orphan = foreign("cold.document");
    orphan["linked"] = json!([link(
        "customers",
        json!({"role": "customer", "on": {"id": "customer_id"}})
    )]);
    orphan["orders"]["assign_customer"] = json!({"column": "customer_id", "to": "1"});
    assert!(Policy::parse(&orphan.to_string()).is_ok());
    orphan["orders"]["assign_customer"]["orphan"] = json!("now");
    assert_refused(
        &orphan,
        "orders.assign_customer.orphan",
        "foreign table",
        "with its order",
    );
}

#[test]
fn rows_by_age_say_that_they_are_not_archived() {
    let aged = |changes: Value| {
        let mut entry = json!({"table": "shop.raw_mail", "at": "received_at", "after": "30 days", "on_redact": "delete", "archive": false});
        for (key, value) in changes.as_object().unwrap() {
            match value {
                Value::Null => drop(entry.as_object_mut().unwrap().remove(key)),
                _ => entry[key] = value.clone(),
            }
        }
        with("/by_age", json!([entry]))
    };
    assert!(Policy::parse(&aged(json!({})).to_string()).is_ok());
    assert_refused(
        &aged(json!({"archive": null})),
        "by_age[0].archive",
        "is missing",
        "\"archive\": false",
    );
    assert_refused(
        &aged(json!({"archive": true})),
        "by_age[0].archive",
        "cannot be archived",
        "may go for good",
    );
    assert_refused(
        &aged(json!({"on_redact": null})),
        "by_age[0]",
        "says nothing",
        "\"redact\"",
    );
    assert_refused(
        &aged(json!({"redact": ["body"]})),
        "by_age[0].redact",
        "are deleted",
        "Leave",
    );
    assert_refused(&aged(json!({"at": null})), "by_age[0].at", "is missing", "");
    assert_refused(
        &aged(json!({"on_redact": null, "redact": {"body": {"scrub": ["people.name"]}}})),
        "by_age[0].redact.body",
        "scrubs names",
        "as a whole",
    );
    assert_refused(
        &aged(json!({"aftr": "x"})),
        "by_age[0].aftr",
        "unknown key",
        "\"after\"",
    );
    let key = json!({"on_redact": null, "redact": ["id"], "key": ["id"]});
    assert_refused(
        &aged(key),
        "by_age[0].redact.id",
        "serves as key or age",
        "no personal data",
    );
}

#[test]
fn files_and_archive_belong_to_rows_that_are_treated() {
    let linked = |more: Value| with("/linked", json!([link("a", more)]));
    let read = |more: Value| Policy::parse(&linked(more).to_string()).unwrap().linked.remove(0);
    let entry = read(json!({"redact": ["x"], "archive": false, "files": "path"}));
    assert_eq!((entry.archive, entry.files.as_deref()), (false, Some("path")));
    let entry = read(json!({"on_redact": "delete"}));
    assert_eq!((entry.archive, entry.files), (true, None));
    assert_refused(
        &linked(json!({"archive": false})),
        "linked[0].archive",
        "stay as they are",
        "\"redact\"",
    );
    assert_refused(
        &linked(json!({"files": "path"})),
        "linked[0].files",
        "stay as they are",
        "\"redact\"",
    );
    let more = json!({"redact": ["x"], "archive": "false"});
    assert_refused(&linked(more), "linked[0].archive", "true or false", "");
    assert_refused(
        &with("/linked", json!([link("a", json!({"as": "by_age[0]"}))])),
        "linked[0].as",
        "reserved",
        "another",
    );
}
