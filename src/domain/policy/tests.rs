mod entries;
mod refusals;

use chrono::NaiveTime;
use chrono_tz::Tz;
use serde_json::{Value, json};

use super::*;

/// The example of the design.
const SHOP: &str = r#"{
  "policy": "shop",
  "orders": {
    "table": "shop.orders", "key": ["id"], "number": "external_no", "amazon": "channel = 'amazon'",
    "anchor": "shipped_at", "redact": {"gift_message": "placeholder", "shop_note": "placeholder"}
  },
  "linked": [
    {"table": "shop.addresses", "on": {"order_id": "id"}, "redact": ["name", "line1", "city"]},
    {"table": "shop.customers", "on": {"id": "customer_id"}, "redact": ["first_name", "email"], "role": "customer"},
    {"table": "shop.invoices", "as": "invoices", "on": {"order_id": "id"}, "number": "invoice_no",
     "not_before": "invoiced_at", "redact": ["bill_to", "bill_line1"]},
    {"table": "shop.invoice_lines", "parent": "invoices", "on": {"invoice_id": "id"}, "redact": ["note"]}
  ],
  "placeholder": "[Redacted]",
  "archive_after": "29 days", "redact_after": "30 days", "retrieved_for": "30 days", "archive_for": "10 years",
  "archive": {"schema": "amazon_pii_archive"},
  "window": {"from": "01:00", "to": "05:00", "timezone": "Europe/Berlin"},
  "enabled": false
}"#;

/// The smallest policy.
fn small() -> Value {
    json!({"policy": "p", "orders": {"table": "orders", "anchor": "shipped_at"}})
}

fn parse(document: &Value) -> Result<Policy, PolicyError> {
    Policy::parse(&document.to_string())
}

/// The smallest policy with one value put at a JSON pointer.
fn with(pointer: &str, value: Value) -> Value {
    let mut document = small();
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    document.pointer_mut(parent).unwrap()[key] = value;
    document
}

fn refused(document: &Value) -> (String, String, String) {
    let error = parse(document).unwrap_err();
    (error.path, error.problem, error.hint.unwrap_or_default())
}

#[track_caller]
fn assert_refused(document: &Value, path: &str, problem: &str, hint: &str) {
    let (at, what, help) = refused(document);
    assert_eq!(at, path, "{what}");
    assert!(what.contains(problem), "{what}");
    assert!(help.contains(hint), "{help}");
}

fn treatment(value: Value) -> Result<Treatment, PolicyError> {
    let policy = parse(&with("/orders/redact", json!({"c": value})))?;
    Ok(policy.orders.redact.columns().next().unwrap().1.clone())
}

fn link(table: &str, more: Value) -> Value {
    let mut entry = json!({"table": table, "on": {"order_id": "id"}});
    entry.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    entry
}

#[test]
fn example_of_the_design() {
    let policy = Policy::parse(SHOP).unwrap();
    assert_eq!(policy.policy, "shop");
    assert_eq!(policy.orders.anchor, [Anchor::Expression("shipped_at".into())]);
    assert_eq!(policy.orders.key.as_deref(), Some(&["id".to_owned()][..]));
    let aliases: Vec<_> = policy.linked.iter().map(|l| l.alias.as_str()).collect();
    assert_eq!(aliases, ["addresses", "customers", "invoices", "invoice_lines"]);
    assert_eq!(policy.linked[1].on, [("id".to_owned(), "customer_id".to_owned())]);
    assert_eq!(policy.linked[1].role, Some(Role::Customer));
    assert_eq!(policy.linked[3].parent.as_deref(), Some("invoices"));
    let (from, to) = (
        NaiveTime::from_hms_opt(1, 0, 0).unwrap(),
        NaiveTime::from_hms_opt(5, 0, 0).unwrap(),
    );
    assert_eq!(
        policy.window,
        Some(Window {
            from,
            to,
            timezone: Tz::Europe__Berlin
        })
    );
}

#[test]
fn defaults() {
    let policy = parse(&small()).unwrap();
    assert_eq!(policy.placeholder, "[Redacted]");
    let times = [
        &policy.archive_after,
        &policy.redact_after,
        &policy.retrieved_for,
        &policy.archive_for,
        &policy.audit_for,
    ];
    assert_eq!(times, ["29 days", "30 days", "30 days", "10 years", "10 years"]);
    assert_eq!(
        (policy.archive.schema.as_str(), policy.timezone.as_str()),
        ("amazon_pii_archive", "UTC")
    );
    assert_eq!(
        (policy.when_retrieved, policy.on_reimport, policy.reason),
        (WhenRetrieved::Refuse, OnReimport::Redact, ReasonRule::Required)
    );
    assert_eq!(
        (policy.orders.stale, policy.orders.redact),
        (Stale::Report, Redact::Nothing)
    );
    assert!(!policy.enabled && policy.window.is_none() && policy.linked.is_empty() && policy.also_redacted.is_empty());
    let entry = &parse(&with("/linked", json!([link("a", json!({}))]))).unwrap().linked[0];
    assert_eq!(
        (entry.on_redact, entry.shared, entry.role),
        (OnRedact::Update, Shared::Any, None)
    );
}

#[test]
fn words_become_variants() {
    let mut document = with(
        "/linked",
        json!([link("a", json!({"on_redact": "delete", "shared": "amazon"}))]),
    );
    document["when_retrieved"] = json!("ignore");
    document["on_reimport"] = json!("keep");
    document["reason"] = json!("optional");
    document["deadline"] = json!("wait");
    document["enabled"] = json!(true);
    document["also_redacted"] = json!(["****"]);
    document["orders"]["placed"] = json!("placed_at");
    document["orders"]["stale_after"] = json!("60 days");
    document["orders"]["stale"] = json!("redact");
    let policy = parse(&document).unwrap();
    assert_eq!(
        (policy.when_retrieved, policy.on_reimport, policy.reason),
        (WhenRetrieved::Ignore, OnReimport::Keep, ReasonRule::Optional)
    );
    assert_eq!(
        (policy.linked[0].on_redact, policy.linked[0].shared),
        (OnRedact::Delete, Shared::Amazon)
    );
    assert_eq!((policy.orders.stale, policy.enabled), (Stale::Redact, true));
    assert_eq!(policy.also_redacted, ["****"]);
}

#[test]
fn policy_names() {
    for name in ["p", "shop_2", &"a".repeat(40)] {
        assert_eq!(parse(&with("/policy", json!(name))).unwrap().policy, name);
    }
    for name in ["Shop", "2shop", "_shop", "my-shop", "über", "a b", &"a".repeat(41)] {
        assert_refused(&with("/policy", json!(name)), "policy", "is not a policy's name", "40");
    }
}

#[test]
fn stale_needs_its_companions() {
    assert_refused(
        &with("/orders/stale_after", json!("1 day")),
        "orders.stale_after",
        "needs \"placed\"",
        "",
    );
    assert_refused(
        &with("/orders/stale", json!("redact")),
        "orders.stale",
        "needs \"stale_after\"",
        "",
    );
}

#[test]
fn every_treatment() {
    let cases = [
        (json!("placeholder"), Treatment::Placeholder),
        (json!("null"), Treatment::Null),
        (json!({"value": null}), Treatment::Null),
        (json!({"value": ""}), Treatment::Value(json!(""))),
        (json!({"value": {"a": [1]}}), Treatment::Value(json!({"a": [1]}))),
        (
            json!({"unique": "r-{key}@x.invalid"}),
            Treatment::Unique("r-{key}@x.invalid".into()),
        ),
        (
            json!({"json": ["$.a", "$.b[*].c"]}),
            Treatment::Json(vec!["$.a".into(), "$.b[*].c".into()]),
        ),
        (
            json!({"json": {"keep": ["$.id"]}}),
            Treatment::JsonKeep(vec!["$.id".into()]),
        ),
        (json!({"json": {"keep": []}}), Treatment::JsonKeep(vec![])),
        (
            json!({"sql": "to_tsvector('')"}),
            Treatment::Sql("to_tsvector('')".into()),
        ),
        (json!({"array": "placeholder"}), Treatment::ArrayPlaceholder),
        (json!({"prefix": 2}), Treatment::Prefix(2)),
    ];
    for (document, expected) in cases {
        assert_eq!(treatment(document.clone()), Ok(expected), "{document}");
    }
    let exact = SHOP.replace(
        r#""gift_message": "placeholder""#,
        r#""n": {"value": 12345678901234567890.10}"#,
    );
    let policy = Policy::parse(&exact).unwrap();
    let Some((_, Treatment::Value(number))) = policy.orders.redact.columns().next() else {
        panic!("a value")
    };
    assert_eq!(number.to_string(), "12345678901234567890.10");
}

#[test]
fn treatments_that_are_none() {
    let cases = [
        (json!({}), "", "exactly one treatment"),
        (json!({"prefix": 2, "sql": "x"}), "", "exactly one treatment"),
        (json!(3), "", "is not a treatment"),
        (json!({"unique": "redacted"}), ".unique", "has no \"{key}\""),
        (json!({"json": []}), ".json", "empty list"),
        (json!({"json": ["$.a", "b"]}), ".json[1]", "is not a JSON path"),
        (json!({"json": {"keep": ["b"]}}), ".json.keep[0]", "is not a JSON path"),
        (json!({"json": {"kept": []}}), ".json.kept", "unknown key"),
        (json!({"array": "null"}), ".array", "unknown word"),
        (json!({"prefix": 0}), ".prefix", "1 or more"),
        (json!({"prefix": -1}), ".prefix", "1 or more"),
        (json!({"prefix": 1.5}), ".prefix", "1 or more"),
        (json!({"prefix": "2"}), ".prefix", "must be a number"),
        (json!({"sql": " "}), ".sql", "is empty"),
    ];
    for (document, path, problem) in cases {
        let error = treatment(document.clone()).unwrap_err();
        assert_eq!(error.path, format!("orders.redact.c{path}"), "{document}");
        assert!(error.problem.contains(problem), "{error}");
    }
}

#[test]
fn columns_keep_the_documents_order() {
    let names = |policy: &Policy| {
        policy
            .orders
            .redact
            .columns()
            .map(|(c, _)| c.to_owned())
            .collect::<Vec<_>>()
    };
    let map = json!({"z": "null", "a": "placeholder", "m": {"prefix": 1}});
    assert_eq!(names(&parse(&with("/orders/redact", map)).unwrap()), ["z", "a", "m"]);
    let list = parse(&with("/orders/redact", json!(["z", "Full Name", "a"]))).unwrap();
    assert_eq!(names(&list), ["z", "Full Name", "a"]);
    assert!(
        list.orders
            .redact
            .columns()
            .all(|(_, treatment)| *treatment == Treatment::Default)
    );
}

#[test]
fn windows_and_zones() {
    let window = |from: &str, to: &str| with("/window", json!({"from": from, "to": to}));
    let mut document = window("22:00", "04:30:15");
    document["timezone"] = json!("America/New_York");
    let policy = parse(&document).unwrap();
    assert_eq!(policy.timezone, "America/New_York");
    assert_eq!(policy.window.unwrap().timezone, Tz::America__New_York);
    assert_refused(&window("01:00", "01:00:00"), "window", "begins when it ends", "");
    for time in ["24:00", "1am", "01:60", "01:00:60", "01"] {
        assert_refused(&window("03:00", time), "window.to", "is not a time of day", "");
    }
    assert_refused(
        &with("/timezone", json!("europe/berlin")),
        "timezone",
        "unknown time zone",
        "\"Europe/Berlin\"",
    );
    assert_refused(
        &with("/timezone", json!("Europe/Berln")),
        "timezone",
        "unknown time zone",
        "\"Europe/Berlin\"",
    );
    let zone = json!({"from": "01:00", "to": "02:00", "timezone": "Moon"});
    assert_refused(
        &with("/window", zone),
        "window.timezone",
        "unknown time zone \"Moon\"",
        "",
    );
}

#[test]
fn table_names_are_refused_with_their_place() {
    assert_refused(
        &with("/orders/table", json!("db.shop.orders")),
        "orders.table",
        "more than two parts",
        "quote",
    );
}
