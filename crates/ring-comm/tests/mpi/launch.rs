//! Runs this program under `mpirun`, never longer than a limit.

use std::{
    any::Any,
    env, fs,
    io::{ErrorKind, Read},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

/// The variable that tells a rank its task.
pub(crate) const TASK: &str = "RING_MPI_TASK";
/// The variable that names the folder in which ranks leave what they found.
const FINDINGS: &str = "RING_MPI_FINDINGS";
/// How Open MPI starts ranks. One that dies must not take the others with it.
const MPIRUN: &str = "mpirun --allow-run-as-root --oversubscribe --bind-to none --enable-recovery";
/// No launch takes longer.
const LIMIT: Duration = Duration::from_secs(240);

/// How a launch ended.
pub(crate) struct Outcome {
    pub(crate) status: ExitStatus,
    pub(crate) took: Duration,
    output: String,
    have_all_ended: bool,
    /// By rank, what it found; `None` if it did not come that far.
    pub(crate) findings: Vec<Option<String>>,
}

impl Outcome {
    /// All ranks have come to the end of their task. `mpirun` may call it a success if they have not.
    pub(crate) fn expect_success(&self) {
        let (status, output) = (self.status, &self.output);
        assert!(self.have_all_ended, "a rank has failed: {status}\n{output}");
        assert!(status.success(), "{status}\n{output}");
    }

    /// What `rank` found.
    pub(crate) fn finding(&self, rank: usize) -> &str {
        match &self.findings[rank] {
            Some(finding) => finding,
            None => panic!(
                "rank {rank} found nothing: {}\n{}",
                self.status, self.output
            ),
        }
    }
}

/// Has `world_size` ranks perform `task`.
pub(crate) fn launch(task: &str, world_size: usize) -> Outcome {
    launch_and(task, world_size, |_| ())
}

/// As [`launch`], and does something `meanwhile`, with the folder of the findings.
pub(crate) fn launch_and(task: &str, world_size: usize, meanwhile: impl FnOnce(&Path)) -> Outcome {
    let command = env::var("RING_MPIRUN").unwrap_or_else(|_| MPIRUN.to_owned());
    let mut words = command.split_whitespace();
    let mut mpirun = Command::new(words.next().expect("the name of a program"));
    mpirun.args(words).args(["-n", &world_size.to_string()]);
    if let Ok(options) = env::var("RING_MPIRUN_OPTIONS") {
        mpirun.args(options.split_whitespace());
    }
    mpirun.arg(env::current_exe().unwrap());
    run(mpirun, task, world_size, meanwhile)
}

/// Has one process perform `task` without `mpirun`.
pub(crate) fn launch_alone(task: &str) -> Outcome {
    run(Command::new(env::current_exe().unwrap()), task, 1, |_| ())
}

fn run(
    mut command: Command,
    task: &str,
    world_size: usize,
    meanwhile: impl FnOnce(&Path),
) -> Outcome {
    let folder = env::temp_dir().join(format!(
        "ring-mpi-{}-{task}-{world_size}",
        std::process::id()
    ));
    fs::create_dir_all(&folder).unwrap();
    command.env(TASK, task).env(FINDINGS, &folder);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().unwrap_or_else(|error| match error.kind() {
        ErrorKind::NotFound => panic!("mpirun is missing: install an MPI library, Open MPI say"),
        _ => panic!("mpirun does not start: {error}"),
    });
    let streams = [
        collect(child.stdout.take().unwrap()),
        collect(child.stderr.take().unwrap()),
    ];
    let staged = catch_unwind(AssertUnwindSafe(|| meanwhile(&folder)));
    let status = wait(&mut child);
    let took = start.elapsed();
    let output = streams.map(|stream| stream.join().unwrap()).concat();
    let finding = |rank| fs::read_to_string(folder.join(format!("rank-{rank}"))).ok();
    let findings = (0..world_size).map(finding).collect();
    let has_ended = |rank| folder.join(end_of(rank)).exists();
    let have_all_ended = (0..world_size).all(has_ended);
    fs::remove_dir_all(&folder).unwrap();
    if let Err(payload) = staged {
        eprintln!("{output}");
        resume_unwind(payload);
    }
    Outcome {
        status: status.unwrap_or_else(|| panic!("{task} took longer than {LIMIT:?}\n{output}")),
        took,
        output,
        have_all_ended,
        findings,
    }
}

/// The number of this process, as its launcher tells it, before MPI is started.
pub(crate) fn launched_rank() -> usize {
    let number = |name| env::var(name).ok()?.parse().ok();
    ["OMPI_COMM_WORLD_RANK", "PMI_RANK"]
        .into_iter()
        .find_map(number)
        .unwrap_or(0)
}

/// The file with which a rank says that it has come to the end of its task.
fn end_of(rank: usize) -> String {
    format!("ended-{rank}")
}

/// Says that this rank has come to the end of its task.
pub(crate) fn report_end() {
    fs::write(folder().join(end_of(launched_rank())), "").unwrap();
}

/// `None` if it took too long and was ended.
fn wait(child: &mut Child) -> Option<ExitStatus> {
    let expiry = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if Instant::now() >= expiry {
            // mpirun passes the signal on to its processes, unless it hangs itself.
            let _ = Command::new("kill").arg(child.id().to_string()).status();
            thread::sleep(Duration::from_secs(3));
            let _ = child.kill();
            child.wait().unwrap();
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn collect(mut stream: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Where the ranks of one launch leave files for one another and for the launching process.
pub(crate) fn folder() -> PathBuf {
    PathBuf::from(env::var_os(FINDINGS).unwrap())
}

/// Leaves what this rank found.
pub(crate) fn report(rank: usize, finding: &str) {
    fs::write(folder().join(format!("rank-{rank}")), finding).unwrap();
}

pub(crate) fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("(no message)").to_owned()
}
