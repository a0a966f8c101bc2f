use serde_json::{Value, json};

use super::*;

#[test]
fn anchors() {
    let linked = json!([link("parcels", json!({}))]);
    let mut document = with("/linked", linked);
    document["orders"]["anchor"] =
        json!(["shipped_at", {"linked": "parcels", "at": "sent", "where": "ok", "complete": "done"}]);
    let [first, second] = &parse(&document).unwrap().orders.anchor[..] else {
        panic!("two anchors")
    };
    assert_eq!(first, &Anchor::Expression("shipped_at".into()));
    let (filter, complete) = (Some("ok".into()), Some("done".into()));
    assert_eq!(
        second,
        &Anchor::Linked {
            linked: "parcels".into(),
            at: "sent".into(),
            filter,
            complete
        }
    );
    document["orders"]["anchor"][1]["linked"] = json!("parcel");
    assert_refused(
        &document,
        "orders.anchor[1].linked",
        "no entry is named \"parcel\"",
        "\"parcels\"",
    );
    document["orders"]["anchor"] = json!({"linked": "parcel", "at": "sent"});
    assert_refused(&document, "orders.anchor.linked", "no entry", "\"parcels\"");
    assert_refused(&with("/orders/anchor", json!(7)), "orders.anchor", "must be a text", "");
}

#[test]
fn aliases() {
    let document = with(
        "/linked",
        json!([link("shop.Address", json!({})), link("\"My Shop\".\"A.B\"", json!({}))]),
    );
    let policy = parse(&document).unwrap();
    assert_eq!(
        (policy.linked[0].alias.as_str(), policy.linked[1].alias.as_str()),
        ("address", "A.B")
    );
    let twice = with("/linked", json!([link("a.x", json!({})), link("b.X", json!({}))]));
    assert_refused(&twice, "linked[1].as", "has the name of linked[0]", "\"as\"");
    let named = with(
        "/linked",
        json!([link("a.x", json!({})), link("a.x", json!({"as": "y"}))]),
    );
    assert_eq!(parse(&named).unwrap().linked.len(), 2);
}

#[test]
fn the_customer() {
    let customer = |more: Value| {
        let mut entry = link("a.customers", json!({"role": "customer"}));
        entry.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        entry
    };
    let policy = parse(&with(
        "/linked",
        json!([
            link("a.x", json!({})),
            customer(json!({"merge": "refuse", "duplicate_by": ["name", "lower(city)"]}))
        ]),
    ));
    let policy = policy.unwrap();
    let found = policy.customer().unwrap();
    assert_eq!((found.alias.as_str(), found.merge), ("customers", Merge::Refuse));
    assert_eq!(found.duplicate_by, ["name", "lower(city)"]);
    assert_eq!(policy.orders.manual_orders, ManualOrders::Allow);

    let merge = json!({"merge": "refuse"});
    let twice = with(
        "/linked",
        json!([customer(json!({"as": "other"})), customer(merge.clone())]),
    );
    assert_refused(&twice, "linked[1].merge", "there are 2", "\"role\": \"customer\"");
    let below = json!({"merge": "refuse", "parent": "x"});
    let below = with("/linked", json!([link("a.x", json!({})), customer(below)]));
    assert_refused(
        &below,
        "linked[1].merge",
        "hangs on another entry",
        "orders table itself",
    );
    let other = with("/linked", json!([link("a.x", json!({"duplicate_by": ["name"]}))]));
    assert_refused(
        &other,
        "linked[0].duplicate_by",
        "is for the customer's entry",
        "\"role\"",
    );
    let none = with("/orders/manual_orders", json!("warn"));
    assert_refused(&none, "orders.manual_orders", "there are 0", "customers table");
    assert_refused(
        &with("/orders/manual_orders", json!("forbid")),
        "orders.manual_orders",
        "unknown word",
        "",
    );
    // Without such a key nobody counts.
    assert!(
        parse(&with(
            "/linked",
            json!([customer(json!({"as": "other"})), customer(json!({}))])
        ))
        .unwrap()
        .customer()
        .is_none()
    );
}

#[test]
fn parents_come_first() {
    let entry = |name: &str, parent: &str| {
        link(
            name,
            if parent.is_empty() {
                json!({})
            } else {
                json!({"parent": parent})
            },
        )
    };
    let entries = [("d", "c"), ("x", ""), ("c", "b"), ("b", ""), ("e", "b"), ("y", "")];
    let document = with(
        "/linked",
        entries.iter().map(|(name, parent)| entry(name, parent)).collect(),
    );
    let policy = parse(&document).unwrap();
    let order: Vec<_> = policy.linked.iter().map(|l| l.alias.as_str()).collect();
    for (at, entry) in policy.linked.iter().enumerate() {
        assert!(
            entry.parent.as_ref().is_none_or(|p| order[..at].contains(&p.as_str())),
            "{order:?}"
        );
    }
    assert_eq!(order, ["x", "b", "c", "d", "e", "y"]);
}

#[test]
fn parents_that_cannot_be() {
    let parents = |pairs: &[(&str, &str)]| {
        with(
            "/linked",
            pairs
                .iter()
                .map(|(name, parent)| link(name, json!({"parent": parent})))
                .collect(),
        )
    };
    assert_refused(&parents(&[("a", "a")]), "linked[0].parent", "circle", "");
    assert_refused(
        &parents(&[("a", "b"), ("b", "c"), ("c", "b")]),
        "linked[1].parent",
        "circle",
        "",
    );
    assert_refused(
        &parents(&[("a", "orders")]),
        "linked[0].parent",
        "no entry is named \"orders\"",
        "Leave \"parent\" out",
    );
    assert_refused(
        &parents(&[("a", "invoice"), ("b", "a")]),
        "linked[0].parent",
        "no entry is named",
        "",
    );
    assert_refused(
        &parents(&[("b", "a"), ("a", "invoice")]),
        "linked[1].parent",
        "no entry is named",
        "",
    );
}

#[test]
fn one_column_has_one_treatment() {
    let entries = |first: Value, second: Value| {
        with(
            "/linked",
            json!([
                link("S.a", json!({"redact": first})),
                link("s.\"a\"", json!({"as": "b", "redact": second}))
            ]),
        )
    };
    let conflict = entries(
        json!({"zip": {"prefix": 2}}),
        json!({"name": "null", "zip": "placeholder"}),
    );
    assert_refused(
        &conflict,
        "linked[1].redact.zip",
        "differs from that in linked[0]",
        "one treatment",
    );
    assert_refused(
        &entries(json!(["zip"]), json!({"zip": {"prefix": 2}})),
        "linked[1].redact.zip",
        "differs",
        "",
    );
    for (first, second) in [
        (json!({"zip": {"prefix": 2}}), json!({"zip": {"prefix": 2}})),
        (json!(["zip"]), json!({"zip": "placeholder"})),
        (json!(["zip"]), json!(["zip", "name"])),
        (json!({"zip": "null"}), json!({"name": "placeholder"})),
    ] {
        assert!(parse(&entries(first, second)).is_ok());
    }
    let mut with_orders = with("/linked", json!([link("orders", json!({"redact": {"note": "null"}}))]));
    with_orders["orders"]["redact"] = json!({"note": "placeholder"});
    assert_refused(&with_orders, "linked[0].redact.note", "differs from that in orders", "");
}

#[test]
fn what_identifies_is_not_redacted() {
    let mut document = with("/orders/redact", json!(["id", "no", "customer_email"]));
    document["orders"]["key"] = json!("id");
    assert_refused(&document, "orders.key", "serves as key", "");
    document["orders"]["key"] = json!(["pk"]);
    document["orders"]["number"] = json!("no");
    assert_refused(&document, "orders.number", "serves as number", "");
    document["orders"]["number"] = json!("external_no");
    document["linked"] = json!([{"table": "c", "on": {"email": "customer_email"}}]);
    assert_refused(
        &document,
        "linked[0].on.email",
        "serves as link and is redacted in orders",
        "",
    );
    // Another entry of the same table redacts it.
    document["linked"] = json!([
        {"table": "c", "on": {"email": "pk"}},
        {"table": "c", "as": "c2", "on": {"id": "pk"}, "redact": ["email"]}
    ]);
    assert_refused(
        &document,
        "linked[0].on.email",
        "serves as link and is redacted in linked[1]",
        "",
    );
    document["linked"] = json!([
        {"table": "b", "as": "child", "parent": "c", "on": {"mail": "email"}},
        {"table": "c", "on": {"id": "pk"}, "redact": ["email"]}
    ]);
    assert_refused(&document, "linked[0].on.mail", "redacted in linked[1]", "");
}

#[test]
fn quotas() {
    let policy = parse(&small()).unwrap();
    assert_eq!(
        (policy.limits, policy.require_actor),
        (Limits::new(None, None, None), false)
    );
    let mut document = with("/retrievals_per_day", json!(50));
    document["user_retrievals_per_day"] = json!(400);
    document["alarm_per_day"] = json!(30);
    document["require_actor"] = json!(true);
    let policy = parse(&document).unwrap();
    assert_eq!(policy.limits, Limits::new(Some(50), Some(400), Some(30)));
    assert!(policy.require_actor);
    document["user_retrievals_per_day"] = json!(49);
    assert_refused(
        &document,
        "user_retrievals_per_day",
        "lower than \"retrievals_per_day\"",
        "higher",
    );
    for key in ["retrievals_per_day", "user_retrievals_per_day", "alarm_per_day"] {
        for wrong in [json!(0), json!(-1), json!(1.5)] {
            assert_refused(&with(&format!("/{key}"), wrong), key, "whole number, 1 or more", "");
        }
        assert_refused(
            &with(&format!("/{key}"), json!("50")),
            key,
            "must be a number, not a text",
            "",
        );
    }
    assert_refused(&with("/require_actor", json!(1)), "require_actor", "true or false", "");
    assert_refused(
        &with("/retrieval_per_day", json!(1)),
        "retrieval_per_day",
        "unknown key",
        "retrievals_per_day",
    );
}
