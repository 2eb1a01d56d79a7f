//! What ranks compare before they act together: the terms of an operation, as named values.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{error::Disagreement, transport::Rank};

/// A topic and its fields, in an order that does not depend on who lists them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Terms {
    topic: String,
    fields: BTreeMap<String, String>,
}

impl Terms {
    pub(crate) fn new(topic: &str, fields: &[(String, String)]) -> Self {
        Self {
            topic: topic.to_owned(),
            fields: fields.iter().cloned().collect(),
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings can always be written as JSON")
    }

    /// Bytes that are no terms come from a rank that does something else; they decode to empty terms, which differ.
    pub(crate) fn decode(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).unwrap_or_default()
    }

    fn disagreement(&self, culprit: Rank, theirs: &Terms) -> Option<Disagreement> {
        if self.topic != theirs.topic {
            return Some(Disagreement {
                culprit,
                reference: 0,
                field: "topic".to_owned(),
                theirs: theirs.topic.clone(),
                ours: self.topic.clone(),
            });
        }
        let names: BTreeSet<_> = self.fields.keys().chain(theirs.fields.keys()).collect();
        let name = names
            .into_iter()
            .find(|&name| self.fields.get(name) != theirs.fields.get(name))?;
        Some(Disagreement {
            culprit,
            reference: 0,
            field: name.clone(),
            theirs: theirs.value_or_absent(name),
            ours: self.value_or_absent(name),
        })
    }

    fn value_or_absent(&self, name: &str) -> String {
        self.fields
            .get(name)
            .map_or_else(|| "(absent)".to_owned(), String::clone)
    }
}

/// Compares the terms of all ranks with rank 0's: the first rank that differs, in its topic or else in the first field by
/// name.
pub(crate) fn first_disagreement(terms: &[Terms]) -> Option<Disagreement> {
    let ours = terms.first()?;
    let mut ranks = terms.iter().enumerate();
    ranks.find_map(|(rank, theirs)| ours.disagreement(rank, theirs))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(fields: &[(&str, &str)]) -> Terms {
        let fields: Vec<_> = fields
            .iter()
            .map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        Terms::new("forward", &fields)
    }

    #[test]
    fn order_of_fields_does_not_matter() {
        let one = terms(&[("heads", "4"), ("dtype", "f32")]);
        let other = terms(&[("dtype", "f32"), ("heads", "4")]);
        assert_eq!(one.encode(), other.encode());
        assert_eq!(Terms::decode(&one.encode()), other);
    }

    #[test]
    fn first_rank_and_field_that_differ_are_named_with_both_values() {
        let zero = terms(&[("dtype", "f32"), ("heads", "4")]);
        let other = terms(&[("dtype", "f32"), ("heads", "8"), ("window", "3")]);
        let another = terms(&[("dtype", "bf16")]);
        assert_eq!(
            first_disagreement(&[zero.clone(), zero.clone(), other, another]),
            Some(Disagreement {
                culprit: 2,
                reference: 0,
                field: "heads".to_owned(),
                theirs: "8".to_owned(),
                ours: "4".to_owned(),
            })
        );
        assert_eq!(first_disagreement(&[zero.clone(), zero]), None);
    }

    #[test]
    fn missing_field_is_absent_and_foreign_bytes_differ_in_topic() {
        let zero = terms(&[("dtype", "f32")]);
        let missing = zero.disagreement(1, &terms(&[])).unwrap();
        assert_eq!(
            missing.to_string(),
            "rank 1 has dtype = (absent), rank 0 has f32"
        );

        let foreign = Terms::decode(b"\xff");
        assert_eq!(zero.disagreement(1, &foreign).unwrap().field, "topic");
    }
}
