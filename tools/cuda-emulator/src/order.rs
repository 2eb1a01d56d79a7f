//! In what order the threads of a block take turns.

use crate::error::EmulatorError;

/// The variable that says so.
const VARIABLE: &str = "CUDA_EMULATOR_ORDER";

/// In what order the threads of a block take turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Ascending,
    Descending,
    Random { seed: u64 },
}

impl Order {
    /// What the variable says.
    pub(crate) fn from_env() -> Result<Self, EmulatorError> {
        std::env::var(VARIABLE).map_or(Ok(Self::Ascending), |value| Self::parse(&value))
    }

    fn parse(value: &str) -> Result<Self, EmulatorError> {
        let seed = value.strip_prefix("random:").map(str::parse);
        match (value, seed) {
            ("ascending", _) => Ok(Self::Ascending),
            ("descending", _) => Ok(Self::Descending),
            (_, Some(Ok(seed))) => Ok(Self::Random { seed }),
            _ => Err(EmulatorError::Variable {
                variable: VARIABLE,
                value: value.to_string(),
                expected: "ascending, descending or random:SEED, such as random:7",
            }),
        }
    }

    /// The number by which the runtime knows the order, and its seed.
    pub(crate) fn code(self) -> (u32, u64) {
        match self {
            Self::Ascending => (0, 0),
            Self::Descending => (1, 0),
            Self::Random { seed } => (2, seed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_parsed() {
        assert_eq!(Order::parse("ascending").unwrap(), Order::Ascending);
        assert_eq!(Order::parse("descending").unwrap(), Order::Descending);
        assert_eq!(Order::parse("random:7").unwrap(), Order::Random { seed: 7 });
        for wrong in ["", "up", "random", "random:x"] {
            assert!(Order::parse(wrong).is_err(), "{wrong}");
        }
    }
}
