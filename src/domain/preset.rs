//! Policies for the systems whose published guides this extension follows, to start one's own from.

use super::policy::PolicyError;

/// Name and document of each.
const PRESETS: [(&str, &str); 2] = [
    ("cin7", include_str!("../../presets/cin7.json")),
    ("pixi", include_str!("../../presets/pixi.json")),
];

/// The document of that name.
///
/// # Errors
/// There is none.
pub fn document(name: &str) -> Result<&'static str, PolicyError> {
    let found = PRESETS.iter().find(|(known, _)| *known == name);
    found.map(|(_, text)| *text).ok_or_else(|| {
        let known: Vec<String> = PRESETS.iter().map(|(known, _)| format!("\"{known}\"")).collect();
        PolicyError::new("", format!("there is no preset \"{name}\""))
            .with_hint(format!("Known are {}.", known.join(" and ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::policy::Policy;

    #[test]
    fn every_preset_is_a_policy_of_its_name() {
        for (name, text) in PRESETS {
            assert_eq!(Policy::parse(text).expect(name).policy, name);
        }
    }

    #[test]
    fn an_unknown_name_is_refused_with_those_that_are_known() {
        let error = document("ebay").expect_err("no such preset");
        assert_eq!(error.hint.as_deref(), Some("Known are \"cin7\" and \"pixi\"."));
    }
}
