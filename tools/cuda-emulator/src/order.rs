//! In what order the threads of a block take turns.

use cubecl_common::device::DeviceId;

use crate::error::EmulatorError;

/// The variable that says so.
const VARIABLE: &str = "CUDA_EMULATOR_ORDER";

/// The device whose order the variable tells.
pub(crate) const DEVICE_OF_ENVIRONMENT: DeviceId = DeviceId {
    type_id: 0,
    index_id: 0,
};

/// In what order the threads of a block take turns, each until it has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The first thread first.
    Ascending,
    /// The last thread first.
    Descending,
    /// A new order in every round.
    Random {
        /// The same seed gives the same orders.
        seed: u16,
    },
}

impl Order {
    /// The device with this order.
    pub(crate) fn device(self) -> DeviceId {
        let (type_id, index_id) = match self {
            Self::Ascending => (1, 0),
            Self::Descending => (1, 1),
            Self::Random { seed } => (2, seed),
        };
        DeviceId { type_id, index_id }
    }

    /// The order of a device.
    pub(crate) fn of(device: DeviceId) -> Result<Self, EmulatorError> {
        match (device.type_id, device.index_id) {
            (1, 0) => Ok(Self::Ascending),
            (1, 1) => Ok(Self::Descending),
            (2, seed) => Ok(Self::Random { seed }),
            _ => Self::from_env(),
        }
    }

    /// What the variable says.
    fn from_env() -> Result<Self, EmulatorError> {
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
            Self::Random { seed } => (2, seed.into()),
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
