//! Runs programs under `mpirun`, never longer than a limit.

use std::{
    env,
    io::{BufRead, BufReader, ErrorKind, Read},
    process::{Child, Command, ExitStatus, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// The variable by which this program knows that it is a rank.
pub(crate) const TASK: &str = "RING_PROCESSES_TASK";
/// How a rank tells its exit status.
const ENDED: &str = "ended with ";
/// No launch takes longer.
const LIMIT: Duration = Duration::from_secs(240);

/// How a launch ended.
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    pub(crate) fn expect_success(&self) {
        let Self {
            status,
            stdout,
            stderr,
        } = self;
        assert!(status.success(), "{status}\n{stdout}\n{stderr}");
    }

    /// The exit statuses of the ranks that [`each`] ran.
    pub(crate) fn statuses(&self) -> Vec<&str> {
        let ends = self
            .stdout
            .lines()
            .filter_map(|line| line.strip_prefix(ENDED));
        ends.collect()
    }
}

/// Runs `command` on so many ranks, with these variables.
pub(crate) fn mpirun(ranks: usize, command: &[&str], variables: &[(&str, &str)]) -> Outcome {
    mpirun_watched(ranks, command, variables, |_| {})
}

/// Runs a line of shell on every rank; its variables can tell the ranks apart. `mpirun` does not report how ranks end when one
/// may go on without another, so they say it themselves.
pub(crate) fn each(ranks: usize, line: &str) -> Outcome {
    each_watched(ranks, line, |_| {})
}

/// As [`each`], and shows every line of standard output to `watch` as it comes.
pub(crate) fn each_watched(ranks: usize, line: &str, watch: impl FnMut(&str) + Send) -> Outcome {
    let script = format!("{line}; echo {ENDED}$?");
    mpirun_watched(ranks, &["sh", "-c", &script], &[], watch)
}

/// As [`mpirun`], and shows every line of standard output to `watch` as it comes.
fn mpirun_watched(
    ranks: usize,
    command: &[&str],
    variables: &[(&str, &str)],
    mut watch: impl FnMut(&str) + Send,
) -> Outcome {
    let mut mpirun = Command::new("mpirun");
    mpirun.args(["--allow-run-as-root", "--oversubscribe"]);
    // A rank that dies must not take the others with it, or nobody would see what they say.
    mpirun.args(["--bind-to", "none", "--enable-recovery"]);
    mpirun.args(["-n", &ranks.to_string()]);
    if let Ok(options) = env::var("RING_MPIRUN_OPTIONS") {
        mpirun.args(options.split_whitespace());
    }
    mpirun.args(command).envs(variables.iter().copied());
    mpirun
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = mpirun.spawn().unwrap_or_else(|error| match error.kind() {
        ErrorKind::NotFound => panic!("mpirun is missing: install an MPI library, Open MPI say"),
        _ => panic!("mpirun does not start: {error}"),
    });
    let stderr = collect(child.stderr.take().unwrap());
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (status, stdout) = thread::scope(|scope| {
        let stdout = scope.spawn(move || {
            let mut text = String::new();
            for line in lines.map_while(Result::ok) {
                watch(&line);
                text += &line;
                text.push('\n');
            }
            text
        });
        let status = wait(&mut child);
        (status, stdout.join().unwrap())
    });
    let stderr = stderr.join().unwrap();
    Outcome {
        status: status.unwrap_or_else(|| panic!("longer than {LIMIT:?}\n{stdout}\n{stderr}")),
        stdout,
        stderr,
    }
}

/// `None` if it took too long and was ended.
fn wait(child: &mut Child) -> Option<ExitStatus> {
    let expiry = Instant::now() + LIMIT;
    while Instant::now() < expiry {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(5));
    }
    // mpirun passes the signal on to its processes, unless it hangs itself.
    let _ = Command::new("kill").arg(child.id().to_string()).status();
    thread::sleep(Duration::from_secs(3));
    let _ = child.kill();
    child.wait().unwrap();
    None
}

fn collect(mut stream: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
