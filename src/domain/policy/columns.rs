//! Columns that a document names by their bare names: all that may be found again under another.

use super::{Anchor, Policy, Redact, RetrieveOnInsert, Source, Treatment};

impl Policy {
    /// The name under which the table of the history is one of the policy's.
    pub const HISTORY: &str = "history.table";

    /// The name of the `i`th entry of `by_age`, which is also its place in the document.
    pub fn by_age_name(i: usize) -> String {
        format!("by_age[{i}]")
    }

    /// Gives each text of the document that may be a column's bare name to `name`, with the name of its entry (empty: the
    /// orders table), and puts in its place what that returns. Names inside of expressions are out of reach.
    pub fn rename_columns(&mut self, mut name: impl FnMut(&str, &str) -> Option<String>) {
        let mut put = |entry: &str, text: &mut String| {
            if let Some(new) = name(entry, text) {
                *text = new;
            }
        };
        let orders = &mut self.orders;
        orders.key.iter_mut().flatten().for_each(|text| put("", text));
        let expressions = [
            &mut orders.number,
            &mut orders.amazon,
            &mut orders.replaces,
            &mut orders.files,
        ];
        let moments = [&mut orders.placed, &mut orders.effective_from];
        for text in expressions.into_iter().chain(moments).flatten() {
            put("", text);
        }
        for anchor in &mut orders.anchor {
            match anchor {
                Anchor::Expression(text) => put("", text),
                Anchor::Linked {
                    linked,
                    at,
                    filter,
                    complete,
                } => {
                    put(linked, at);
                    filter.iter_mut().for_each(|text| put(linked, text));
                    complete.iter_mut().for_each(|text| put("", text));
                }
            }
        }
        let entries = std::iter::once("").chain(self.linked.iter().map(|entry| entry.alias.as_str()));
        let aliases: Vec<String> = entries.map(str::to_owned).collect();
        scrubbed(&mut orders.redact, &aliases, &mut put);
        treated(&mut orders.redact, |text| put("", text));
        orders.keep.iter_mut().for_each(|text| put("", text));
        for (column, expression) in &mut orders.mark {
            put("", column);
            put("", expression);
        }
        if let Some(assign) = &mut orders.assign_customer {
            put("", &mut assign.column);
        }
        for entry in &mut self.linked {
            let (alias, parent) = (&entry.alias, entry.parent.as_deref().unwrap_or_default());
            entry.key.iter_mut().flatten().for_each(|text| put(alias, text));
            for (child, above) in &mut entry.on {
                put(alias, child);
                put(parent, above);
            }
            for text in [&mut entry.filter, &mut entry.number, &mut entry.not_before]
                .into_iter()
                .flatten()
            {
                put(alias, text);
            }
            entry.files.iter_mut().for_each(|text| put(alias, text));
            entry.duplicate_by.iter_mut().for_each(|text| put(alias, text));
            if let RetrieveOnInsert::When(text) = &mut entry.retrieve_on_insert {
                put(alias, text);
            }
            scrubbed(&mut entry.redact, &aliases, &mut put);
            treated(&mut entry.redact, |text| put(alias, text));
            entry.keep.iter_mut().for_each(|text| put(alias, text));
            for (column, expression) in &mut entry.mark {
                put(alias, column);
                put(alias, expression);
            }
        }
        for (column, source) in self.history.iter_mut().flat_map(|history| &mut history.columns) {
            put(Self::HISTORY, column);
            if let Source::Order(text) = source {
                put("", text);
            }
        }
        for (i, entry) in self.by_age.iter_mut().enumerate() {
            let name = &Self::by_age_name(i);
            entry.key.iter_mut().flatten().for_each(|text| put(name, text));
            put(name, &mut entry.at);
            entry.filter.iter_mut().for_each(|text| put(name, text));
            treated(&mut entry.redact, |text| put(name, text));
            entry.keep.iter_mut().for_each(|text| put(name, text));
        }
    }
}

/// The columns whose values are taken out of others, which a document names with their entry: `customers.last_name`.
fn scrubbed(redact: &mut Redact, aliases: &[String], put: &mut impl FnMut(&str, &mut String)) {
    let Redact::Treatments(columns) = redact else { return };
    let names = columns.iter_mut().filter_map(|(_, treatment)| match treatment {
        Treatment::Scrub(names) => Some(names),
        _ => None,
    });
    for name in names.flatten() {
        for alias in aliases {
            let shown = if alias.is_empty() { "orders" } else { alias };
            let column = name.strip_prefix(shown).and_then(|rest| rest.strip_prefix('.'));
            if let Some(mut column) = column.map(str::to_owned) {
                put(alias, &mut column);
                *name = format!("{shown}.{column}");
                break;
            }
        }
    }
}

fn treated(redact: &mut Redact, mut put: impl FnMut(&mut String)) {
    match redact {
        Redact::Nothing => {}
        Redact::Columns(columns) => columns.iter_mut().for_each(put),
        Redact::Treatments(columns) => {
            for (column, treatment) in columns {
                put(column);
                if let Treatment::Sql(text) = treatment {
                    put(text);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bare_name_is_found_with_its_entry() {
        let mut policy = Policy::parse(
            r#"{"policy": "p", "orders": {"table": "orders", "key": ["id"], "number": "no", "amazon": "is_amazon",
                "anchor": ["sent", {"linked": "parcels", "at": "at", "where": "counts", "complete": "done"}],
                "replaces": "replaces", "placed": "placed", "stale_after": "1 day", "effective_from": "starts",
                "redact": {"note": "placeholder", "hash": {"sql": "salt"}}, "keep": ["status"], "files": "path",
                "mark": {"marked": "mark_by"}, "assign_customer": {"column": "buyer", "to": 1}},
              "by_age": [{"table": "mails", "key": "mid", "at": "got", "after": "1 day", "where": "raw", "redact": ["body"], "keep": ["kind"],
                "archive": false}],
              "linked": [
                {"table": "parcels", "on": {"order_id": "oid"}},
                {"table": "buyers", "on": {"bid": "buyer"}, "role": "customer",
                 "redact": {"name": "placeholder", "memo": {"scrub": ["buyers.name", "orders.note"]}}, "mark": {"gone": "gone_by"}},
                {"table": "lines", "parent": "parcels", "key": "lid", "on": {"parcel": "pid"}, "where": "open", "number": "lno",
                 "not_before": "since", "retrieve_on_insert": "kind", "redact": ["text"], "keep": ["sku"]}]}"#,
        )
        .unwrap();
        let mut seen = Vec::new();
        policy.rename_columns(|entry, text| {
            seen.push(format!("{entry}.{text}"));
            Some(format!("{text}2"))
        });
        seen.sort();
        let expected = [
            ".buyer",
            ".buyer",
            ".done",
            ".hash",
            ".id",
            ".is_amazon",
            ".mark_by",
            ".marked",
            ".no",
            ".note",
            ".note",
            ".oid",
            ".path",
            ".placed",
            ".replaces",
            ".salt",
            ".sent",
            ".starts",
            ".status",
            "buyers.bid",
            "buyers.gone",
            "buyers.gone_by",
            "buyers.memo",
            "buyers.name",
            "buyers.name",
            "by_age[0].body",
            "by_age[0].got",
            "by_age[0].kind",
            "by_age[0].mid",
            "by_age[0].raw",
            "lines.kind",
            "lines.lid",
            "lines.lno",
            "lines.open",
            "lines.parcel",
            "lines.since",
            "lines.sku",
            "lines.text",
            "parcels.at",
            "parcels.counts",
            "parcels.order_id",
            "parcels.pid",
        ];
        assert_eq!(seen, expected);
        let mut again = Vec::new();
        policy.rename_columns(|entry, text| {
            again.push(format!("{entry}.{text}"));
            None
        });
        again.sort();
        assert_eq!(again, expected.map(|name| format!("{name}2")));
    }
}
