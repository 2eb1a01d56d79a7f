//! What can be wrong with the environment of a rank.

use thiserror::Error;

use super::store::StoreError;
use crate::transport::Rank;

/// Why the place of this process could not be told, or its store not be opened.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LaunchError {
    /// A variable that must hold a number holds something else.
    #[error("{variable}={value:?} must be a whole number, 0 or more")]
    NotANumber {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
    },
    /// A variable is not Unicode.
    #[error("{variable} is not valid Unicode: {value}")]
    NotUnicode {
        /// The variable.
        variable: &'static str,
        /// Its value, as far as it can be shown.
        value: String,
    },
    /// Of two variables that belong together, one is missing.
    #[error("{present}={value} is set, but {missing} is not: set both or neither")]
    Missing {
        /// The variable that is set.
        present: &'static str,
        /// Its value.
        value: String,
        /// The one that is not.
        missing: &'static str,
    },
    /// A rank that the group does not have.
    #[error("{rank_variable}={rank} must be less than {size_variable}={world_size}")]
    RankOutOfRange {
        /// The variable with the rank.
        rank_variable: &'static str,
        /// Its value.
        rank: Rank,
        /// Where the world size came from.
        size_variable: String,
        /// The world size.
        world_size: usize,
    },
    /// A group without ranks.
    #[error("{variable}=0: a group has at least one rank")]
    NoRanks {
        /// The variable with the world size.
        variable: &'static str,
    },
    /// Two launchers say different things.
    #[error(
        "{first}={first_value} contradicts {second}={second_value}: unset those of the launcher that did not start this"
    )]
    Contradiction {
        /// A variable.
        first: &'static str,
        /// Its value.
        first_value: usize,
        /// The variable of another launcher for the same thing.
        second: &'static str,
        /// Its value.
        second_value: usize,
    },
    /// An address of another form.
    #[error(
        "{variable}={value:?} must be host:port, [IPv6 address]:port, with a port of 1 to 65535"
    )]
    BadAddress {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
    },
    /// A port out of range.
    #[error("{variable}={value:?} must be a port, 1 to 65535")]
    BadPort {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
    },
    /// A deadline that is no time.
    #[error("{variable}={value:?} must be a number of seconds, more than 0")]
    BadDeadline {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
    },
    /// A variable that must say something and is empty.
    #[error("{variable} is empty: give it a value or unset it")]
    Empty {
        /// The variable.
        variable: &'static str,
    },
    /// Several ranks, and nothing says where they meet.
    #[error(
        "{world_size} ranks need a place to meet: set RING_RENDEZVOUS=host:port, the same on all of them"
    )]
    NoRendezvous {
        /// Number of ranks.
        world_size: usize,
    },
    /// The store could not be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
}
