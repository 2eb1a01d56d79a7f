//! Runs a command on several ranks that are processes, never longer than a limit.

use std::{
    fmt,
    io::{BufRead, BufReader, ErrorKind, Read},
    net::TcpListener,
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

/// The variable by which this program knows that it is a rank.
pub(crate) const TASK: &str = "RING_PROCESSES_TASK";
/// How a rank tells its exit status.
const ENDED: &str = "ended with ";
/// No launch takes longer.
const LIMIT: Duration = Duration::from_secs(240);

/// Who starts the processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Launcher {
    /// This program, as torchrun does: connected by TCP.
    Torchrun,
    /// `mpirun`: connected by MPI.
    #[cfg(feature = "mpi")]
    Mpirun,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Launcher::Torchrun => "tcp",
            #[cfg(feature = "mpi")]
            Launcher::Mpirun => "mpi",
        })
    }
}

/// How a launch ended.
pub(crate) struct Outcome {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// All `ranks` ended well.
    pub(crate) fn expect_success(&self, ranks: usize) {
        let Self { stdout, stderr } = self;
        assert_eq!(self.statuses(), vec!["0"; ranks], "{stdout}\n{stderr}");
    }

    /// The exit statuses of the ranks, sorted.
    pub(crate) fn statuses(&self) -> Vec<&str> {
        let ends = self
            .stdout
            .lines()
            .filter_map(|line| line.strip_prefix(ENDED));
        let mut statuses: Vec<&str> = ends.collect();
        statuses.sort_unstable();
        statuses
    }
}

impl Launcher {
    /// Runs a line of shell on every rank, in which `$RANK` is its number.
    pub(crate) fn run(self, ranks: usize, line: &str) -> Outcome {
        self.run_watched(ranks, line, |_| {})
    }

    /// As [`run`](Self::run), and shows every line of standard output to `watch` as it comes.
    pub(crate) fn run_watched(
        self,
        ranks: usize,
        line: &str,
        watch: impl FnMut(&str) + Send,
    ) -> Outcome {
        // mpirun does not report how ranks end when one may go on without another, so they say it themselves.
        let script = format!("{line}; echo {ENDED}$?");
        let mut commands = match self {
            Launcher::Torchrun => one_by_one(ranks, &script),
            #[cfg(feature = "mpi")]
            Launcher::Mpirun => vec![under_mpirun(ranks, &script)],
        };
        let children = commands.iter_mut().map(start).collect();
        wait_for(children, watch)
    }
}

fn one_by_one(ranks: usize, script: &str) -> Vec<Command> {
    // Free a moment ago, and in nobody's hands most likely.
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .unwrap()
        .port();
    let command = |rank: usize| {
        let mut command = Command::new("sh");
        command
            .args(["-c", script])
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", ranks.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string())
            .env("RING_JOB_TOKEN", "not very secret");
        command
    };
    (0..ranks).map(command).collect()
}

#[cfg(feature = "mpi")]
fn under_mpirun(ranks: usize, script: &str) -> Command {
    let mut mpirun = Command::new("mpirun");
    mpirun.args(["--allow-run-as-root", "--oversubscribe"]);
    // A rank that dies must not take the others with it, or nobody would see what they say.
    mpirun.args(["--bind-to", "none", "--enable-recovery"]);
    mpirun.args(["-n", &ranks.to_string()]);
    if let Ok(options) = std::env::var("RING_MPIRUN_OPTIONS") {
        mpirun.args(options.split_whitespace());
    }
    let script = script.replace("$RANK", "$OMPI_COMM_WORLD_RANK");
    mpirun.args(["sh", "-c", &script]);
    mpirun
}

fn start(command: &mut Command) -> Child {
    command
        // What a shell has started ends with it, or its pipes would stay open.
        .process_group(0)
        .env(TASK, "")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.spawn().unwrap_or_else(|error| match error.kind() {
        ErrorKind::NotFound => panic!("mpirun is missing: install an MPI library, Open MPI say"),
        _ => panic!("{command:?} does not start: {error}"),
    })
}

fn wait_for(mut children: Vec<Child>, watch: impl FnMut(&str) + Send) -> Outcome {
    let watched = Mutex::new((watch, String::new()));
    let complaints = Mutex::new(String::new());
    let in_time = thread::scope(|scope| {
        for child in &mut children {
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            scope.spawn(|| {
                for line in lines.map_while(Result::ok) {
                    let (watch, text) = &mut *watched.lock().unwrap();
                    watch(&line);
                    *text += &line;
                    text.push('\n');
                }
            });
            let mut stderr = child.stderr.take().unwrap();
            let complaints = &complaints;
            scope.spawn(move || {
                let mut bytes = Vec::new();
                let _ = stderr.read_to_end(&mut bytes);
                *complaints.lock().unwrap() += &String::from_utf8_lossy(&bytes);
            });
        }
        wait(&mut children)
    });
    let stdout = watched.into_inner().unwrap().1;
    let stderr = complaints.into_inner().unwrap();
    assert!(in_time, "longer than {LIMIT:?}\n{stdout}\n{stderr}");
    Outcome { stdout, stderr }
}

/// Whether all end in time; those that do not are ended.
fn wait(children: &mut [Child]) -> bool {
    let expiry = Instant::now() + LIMIT;
    while Instant::now() < expiry {
        if children
            .iter_mut()
            .all(|child| child.try_wait().unwrap().is_some())
        {
            return true;
        }
        thread::sleep(Duration::from_millis(5));
    }
    // mpirun passes the signal on to its processes, unless it hangs itself.
    children.iter().for_each(|child| signal(child, "-TERM"));
    thread::sleep(Duration::from_secs(3));
    for child in children {
        signal(child, "-KILL");
        child.wait().unwrap();
    }
    false
}

/// Sends it to the child and all that it has started.
fn signal(child: &Child, signal: &str) {
    let group = format!("-{}", child.id());
    let _ = Command::new("kill").args([signal, "--", &group]).status();
}
