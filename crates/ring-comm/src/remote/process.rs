//! Whether a process on the same machine is still alive.
//!
//! A network may need long to find that a peer is dead, or never tell. The system knows at once, if the peer runs on the same one.

use std::{env, fs, process};

use serde::{Deserialize, Serialize};

/// Tells a process from all others, on this machine and on others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessIdentity {
    /// The running kernel and the space in which it numbers processes.
    machine: String,
    number: u32,
    /// When it was started, in ticks since the kernel was.
    started: u64,
}

impl ProcessIdentity {
    /// This process; `None` where the system does not tell, or where `RING_PROCESS_WATCH=off` says that peers shall not look: to test
    /// what the network itself finds.
    pub(crate) fn own() -> Option<Self> {
        if env::var("RING_PROCESS_WATCH").is_ok_and(|value| value == "off") {
            return None;
        }
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let space = fs::read_link("/proc/self/ns/pid").ok()?;
        let number = process::id();
        Some(Self {
            machine: format!("{} {}", boot.trim(), space.display()),
            number,
            started: running_since(number)?,
        })
    }

    /// Whether the two can see each other's processes.
    pub(crate) fn shares_machine_with(&self, other: &Self) -> bool {
        self.machine == other.machine
    }

    /// Whether it is still running. Only right if it [shares its machine](Self::shares_machine_with) with this process.
    pub(crate) fn is_alive(&self) -> bool {
        running_since(self.number) == Some(self.started)
    }

    /// Its number.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }
}

/// When a process was started; `None` if there is none of this number, or one that has ended and is only not yet cleared away.
fn running_since(process: u32) -> Option<u64> {
    const STARTED: usize = 19; // field 22 of proc(5), counted from field 3
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name, in parentheses, may hold anything, also spaces and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.clone().next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    fields.nth(STARTED)?.parse().ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn this_process_is_alive() {
        let own = ProcessIdentity::own().unwrap();
        assert!(own.is_alive() && own.shares_machine_with(&own));
    }

    #[test]
    fn a_process_that_has_ended_is_not_alive_even_before_it_is_cleared_away() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let identity = ProcessIdentity {
            started: running_since(child.id()).unwrap(),
            number: child.id(),
            ..ProcessIdentity::own().unwrap()
        };
        assert!(identity.is_alive());
        child.kill().unwrap();
        while identity.is_alive() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!identity.is_alive());
    }

    #[test]
    fn a_number_used_again_is_another_process() {
        let own = ProcessIdentity::own().unwrap();
        let earlier = ProcessIdentity {
            started: own.started - 1,
            ..own
        };
        assert!(!earlier.is_alive());
    }
}
