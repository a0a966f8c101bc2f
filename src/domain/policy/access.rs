//! Who may have how many orders opened.

use super::PolicyError;
use super::document::{Node, Object};
use crate::domain::quota::Limits;

/// What a day allows.
pub(super) fn limits(document: &Object<'_>) -> Result<Limits, PolicyError> {
    let count = |key: &str| document.get(key).map(|node| count(&node)).transpose();
    let (person, user) = (count("retrievals_per_day")?, count("user_retrievals_per_day")?);
    if let (Some(person), Some(user)) = (person, user)
        && user < person
    {
        return Err(document
            .need("user_retrievals_per_day")?
            .error("is lower than \"retrievals_per_day\"")
            .with_hint("It bounds what all actors of one database user have together: give it a higher number."));
    }
    Ok(Limits::new(person, user, count("alarm_per_day")?))
}

fn count(node: &Node<'_>) -> Result<i64, PolicyError> {
    node.count().map(|count| i64::try_from(count).unwrap_or(i64::MAX))
}
