//! Reads the place of a process from environment variables.

use std::{ffi::OsString, time::Duration};

use super::{DEFAULT_DEADLINE, Launch, LaunchError, Launcher, Origin, Rendezvous, Setting, Token};
use crate::transport::Rank;

const RENDEZVOUS: &str = "RING_RENDEZVOUS";
const TOKEN: &str = "RING_JOB_TOKEN";
const DEADLINE: &str = "RING_DEADLINE_SECONDS";
const MASTER: [&str; 2] = ["MASTER_ADDR", "MASTER_PORT"];
/// `True` if torchrun itself listens on the master port.
const AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";
/// Set for the tasks of a step, not for the batch script.
const SLURM_STEP: &str = "SLURM_STEP_ID";

/// The variables by which one launcher tells a process its place. Lists of one, to serve as [`Origin`].
#[derive(Clone, Copy, Debug)]
struct Variables {
    rank: &'static [&'static str; 1],
    world_size: &'static [&'static str; 1],
    local_rank: &'static [&'static str; 1],
    job_id: Option<&'static [&'static str; 1]>,
}

const EXPLICIT: Variables = Variables {
    rank: &["RING_RANK"],
    world_size: &["RING_WORLD_SIZE"],
    local_rank: &["RING_LOCAL_RANK"],
    job_id: None,
};
const TORCHRUN: Variables = Variables {
    rank: &["RANK"],
    world_size: &["WORLD_SIZE"],
    local_rank: &["LOCAL_RANK"],
    job_id: Some(&["TORCHELASTIC_RUN_ID"]),
};
const OPEN_MPI: Variables = Variables {
    rank: &["OMPI_COMM_WORLD_RANK"],
    world_size: &["OMPI_COMM_WORLD_SIZE"],
    local_rank: &["OMPI_COMM_WORLD_LOCAL_RANK"],
    job_id: None,
};
const PMI: Variables = Variables {
    rank: &["PMI_RANK"],
    world_size: &["PMI_SIZE"],
    local_rank: &["MPI_LOCALRANKID"],
    job_id: None,
};
const SLURM: Variables = Variables {
    rank: &["SLURM_PROCID"],
    world_size: &["SLURM_NTASKS"],
    local_rank: &["SLURM_LOCALID"],
    job_id: Some(&["SLURM_JOB_ID"]),
};

/// Whose variable the rank of a process is.
pub(super) fn launcher(rank: Origin) -> Launcher {
    let Origin::Variables(&[name]) = rank else {
        return Launcher::None;
    };
    let known = [
        (EXPLICIT, Launcher::Explicit),
        (TORCHRUN, Launcher::Torchrun),
        (OPEN_MPI, Launcher::OpenMpi),
        (PMI, Launcher::Pmi),
        (SLURM, Launcher::Slurm),
    ];
    let found = known
        .iter()
        .find(|(variables, _)| *variables.rank == [name]);
    found.map_or(Launcher::None, |&(_, launcher)| launcher)
}

/// What one launcher says.
#[derive(Clone, Copy, Debug)]
struct Place {
    launcher: Variables,
    rank: Rank,
    world_size: usize,
}

/// The place of this process, from its environment. The [module](super) says which variables count.
///
/// # Errors
/// [`LaunchError`] if a variable is malformed, one of two that belong together is missing, or launchers contradict each
/// other.
pub fn from_env() -> Result<Launch, LaunchError> {
    from_variables(|name| std::env::var_os(name))
}

/// As [`from_env`], from variables that `lookup` gives.
///
/// # Errors
/// As [`from_env`].
///
/// ```
/// use ring_comm::launch::{Origin, from_variables};
///
/// let launch = from_variables(|name| match name {
///     "RANK" => Some("2".into()),
///     "WORLD_SIZE" => Some("4".into()),
///     _ => None,
/// })?;
/// assert_eq!(launch.rank.value, 2);
/// assert_eq!(launch.rank.origin, Origin::Variables(&["RANK"]));
/// # Ok::<(), ring_comm::launch::LaunchError>(())
/// ```
pub fn from_variables(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Launch, LaunchError> {
    Environment { lookup }.launch()
}

struct Environment<F> {
    lookup: F,
}

impl<F: Fn(&str) -> Option<OsString>> Environment<F> {
    fn launch(&self) -> Result<Launch, LaunchError> {
        let places = self.places()?;
        for other in places.iter().skip(1) {
            agree(&places[0], other)?;
        }
        let (rank, world_size) = match places.first() {
            Some(place) => (
                variable(place.rank, place.launcher.rank),
                variable(place.world_size, place.launcher.world_size),
            ),
            None => (default(0), default(1)),
        };
        Ok(Launch {
            rank,
            world_size,
            local_rank: self.local_rank(&places, &world_size)?,
            rendezvous: self.rendezvous()?,
            job_id: self.job_id(&places)?,
            token: self.token()?,
            deadline: self.deadline()?,
        })
    }

    /// What the launchers that are set say, the one that decides first.
    fn places(&self) -> Result<Vec<Place>, LaunchError> {
        let mut places = Vec::new();
        for launcher in [EXPLICIT, TORCHRUN, OPEN_MPI, PMI] {
            places.extend(self.place(launcher)?);
        }
        if places.is_empty() && self.is_slurm_task()? {
            places.extend(self.place(SLURM)?);
        }
        Ok(places)
    }

    fn place(&self, launcher: Variables) -> Result<Option<Place>, LaunchError> {
        let [rank_name] = *launcher.rank;
        let [size_name] = *launcher.world_size;
        match (self.number(rank_name)?, self.number(size_name)?) {
            (None, None) => Ok(None),
            (Some(rank), None) => Err(missing(rank_name, rank, size_name)),
            (None, Some(size)) => Err(missing(size_name, size, rank_name)),
            (Some(_), Some(0)) => Err(LaunchError::NoRanks {
                variable: size_name,
            }),
            (Some(rank), Some(world_size)) => {
                in_range(rank_name, rank, size_name, world_size)?;
                Ok(Some(Place {
                    launcher,
                    rank,
                    world_size,
                }))
            }
        }
    }

    /// Whether SLURM started this process as a task, rather than as the batch script or a shell.
    fn is_slurm_task(&self) -> Result<bool, LaunchError> {
        let [rank_name] = *SLURM.rank;
        Ok(match self.number(rank_name)? {
            None => false,
            Some(0) => self.text(SLURM_STEP)?.is_some(),
            Some(_) => true,
        })
    }

    fn local_rank(
        &self,
        places: &[Place],
        world_size: &Setting<usize>,
    ) -> Result<Option<Setting<Rank>>, LaunchError> {
        let launchers = places.iter().map(|place| place.launcher);
        for launcher in std::iter::once(EXPLICIT).chain(launchers) {
            let [name] = *launcher.local_rank;
            if let Some(local_rank) = self.number(name)? {
                let size_name = world_size.origin.to_string();
                in_range(name, local_rank, &size_name, world_size.value)?;
                return Ok(Some(variable(local_rank, launcher.local_rank)));
            }
        }
        Ok((world_size.value == 1).then(|| default(0)))
    }

    fn rendezvous(&self) -> Result<Option<Setting<Rendezvous>>, LaunchError> {
        if let Some(value) = self.text(RENDEZVOUS)? {
            let rendezvous = parse_address(&value).ok_or(LaunchError::BadAddress {
                variable: RENDEZVOUS,
                value,
            })?;
            return Ok(Some(variable(rendezvous, &[RENDEZVOUS])));
        }
        let [host_name, port_name] = MASTER;
        match (self.text(host_name)?, self.text(port_name)?) {
            (None, None) => Ok(None),
            (Some(host), None) => Err(missing(host_name, host, port_name)),
            (None, Some(port)) => Err(missing(port_name, port, host_name)),
            (Some(host), Some(_)) if host.is_empty() => Err(LaunchError::Empty {
                variable: host_name,
            }),
            (Some(host), Some(port)) => {
                let port = self.own_port(parse_port(&port).ok_or(LaunchError::BadPort {
                    variable: port_name,
                    value: port,
                })?)?;
                Ok(Some(variable(Rendezvous { host, port }, &MASTER)))
            }
        }
    }

    /// A port beside torchrun's if that listens on `port` itself.
    fn own_port(&self, port: u16) -> Result<u16, LaunchError> {
        Ok(match self.text(AGENT_STORE)?.as_deref() {
            Some("True") => port.checked_add(1).unwrap_or(port - 1),
            _ => port,
        })
    }

    fn job_id(&self, places: &[Place]) -> Result<Option<Setting<String>>, LaunchError> {
        let Some(names) = places.first().and_then(|place| place.launcher.job_id) else {
            return Ok(None);
        };
        let [name] = *names;
        Ok(self.text(name)?.map(|job_id| variable(job_id, names)))
    }

    fn token(&self) -> Result<Option<Setting<Token>>, LaunchError> {
        match self.text(TOKEN)? {
            Some(token) if token.is_empty() => Err(LaunchError::Empty { variable: TOKEN }),
            token => Ok(token.map(|token| variable(Token::new(token), &[TOKEN]))),
        }
    }

    fn deadline(&self) -> Result<Setting<Duration>, LaunchError> {
        let Some(value) = self.text(DEADLINE)? else {
            return Ok(default(DEFAULT_DEADLINE));
        };
        let seconds = value.trim().parse().ok();
        seconds
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .filter(|deadline| !deadline.is_zero())
            .map(|deadline| variable(deadline, &[DEADLINE]))
            .ok_or(LaunchError::BadDeadline {
                variable: DEADLINE,
                value,
            })
    }

    fn number(&self, name: &'static str) -> Result<Option<usize>, LaunchError> {
        let Some(value) = self.text(name)? else {
            return Ok(None);
        };
        match value.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(LaunchError::NotANumber {
                variable: name,
                value,
            }),
        }
    }

    fn text(&self, name: &'static str) -> Result<Option<String>, LaunchError> {
        (self.lookup)(name)
            .map(OsString::into_string)
            .transpose()
            .map_err(|value| LaunchError::NotUnicode {
                variable: name,
                value: value.to_string_lossy().into_owned(),
            })
    }
}

fn variable<T>(value: T, names: &'static [&'static str]) -> Setting<T> {
    Setting {
        value,
        origin: Origin::Variables(names),
    }
}

fn default<T>(value: T) -> Setting<T> {
    Setting {
        value,
        origin: Origin::Default,
    }
}

fn missing(present: &'static str, value: impl ToString, missing: &'static str) -> LaunchError {
    LaunchError::Missing {
        present,
        value: value.to_string(),
        missing,
    }
}

fn in_range(
    rank_variable: &'static str,
    rank: Rank,
    size_variable: &str,
    world_size: usize,
) -> Result<(), LaunchError> {
    if rank < world_size {
        return Ok(());
    }
    Err(LaunchError::RankOutOfRange {
        rank_variable,
        rank,
        size_variable: size_variable.to_owned(),
        world_size,
    })
}

fn agree(a: &Place, b: &Place) -> Result<(), LaunchError> {
    let pairs = [
        (a.launcher.rank, a.rank, b.launcher.rank, b.rank),
        (
            a.launcher.world_size,
            a.world_size,
            b.launcher.world_size,
            b.world_size,
        ),
    ];
    for (&[first], first_value, &[second], second_value) in pairs {
        if first_value != second_value {
            return Err(LaunchError::Contradiction {
                first,
                first_value,
                second,
                second_value,
            });
        }
    }
    Ok(())
}

fn parse_address(text: &str) -> Option<Rendezvous> {
    let (host, port) = text.trim().rsplit_once(':')?;
    let bracketed = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let host = match bracketed {
        Some(host) => host,
        None if host.contains(':') => return None,
        None => host,
    };
    let port = parse_port(port)?;
    (!host.is_empty()).then(|| Rendezvous {
        host: host.to_owned(),
        port,
    })
}

fn parse_port(text: &str) -> Option<u16> {
    text.trim().parse().ok().filter(|&port| port > 0)
}

#[cfg(test)]
mod tests;
