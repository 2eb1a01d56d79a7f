//! Starts this program again as the ranks of a group, never for longer than a limit.

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
pub(crate) const TASK: &str = "RING_TEST_TASK";
/// The variable that names the folder in which ranks leave what they found.
const FINDINGS: &str = "RING_TEST_FINDINGS";
/// No launch takes longer.
const LIMIT: Duration = Duration::from_secs(240);

/// Has so many ranks perform a task.
pub(crate) type Launch = fn(&str, usize) -> Outcome;

/// How a launch ended.
pub(crate) struct Outcome {
    /// Of each process that was started.
    pub(crate) statuses: Vec<ExitStatus>,
    pub(crate) took: Duration,
    output: String,
    have_all_ended: bool,
    /// By rank, what it found; `None` if it did not come that far.
    pub(crate) findings: Vec<Option<String>>,
}

impl Outcome {
    /// All ranks have come to the end of their task. `mpirun` may call it a success if they have not.
    pub(crate) fn expect_success(&self) {
        let (statuses, output) = (&self.statuses, &self.output);
        assert!(
            self.have_all_ended,
            "a rank has failed: {statuses:?}\n{output}"
        );
        let is_success = statuses.iter().all(ExitStatus::success);
        assert!(is_success, "{statuses:?}\n{output}");
    }

    /// What `rank` found.
    pub(crate) fn finding(&self, rank: usize) -> &str {
        match &self.findings[rank] {
            Some(finding) => finding,
            None => panic!(
                "rank {rank} found nothing: {:?}\n{}",
                self.statuses, self.output
            ),
        }
    }
}

/// A command that starts this program.
pub(crate) fn this_program() -> Command {
    Command::new(env::current_exe().unwrap())
}

/// Starts `commands`, which start `world_size` ranks that perform `task`.
pub(crate) fn run(commands: Vec<Command>, task: &str, world_size: usize) -> Outcome {
    run_and(commands, task, world_size, |_| ())
}

/// As [`run`], and does something `meanwhile`, with the folder of the findings.
pub(crate) fn run_and(
    commands: Vec<Command>,
    task: &str,
    world_size: usize,
    meanwhile: impl FnOnce(&Path),
) -> Outcome {
    let folder = env::temp_dir().join(format!("ring-{}-{task}-{world_size}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let start = Instant::now();
    let (mut children, mut streams) = (Vec::new(), Vec::new());
    for mut command in commands {
        command.env(TASK, task).env(FINDINGS, &folder);
        let mut child = spawn(command);
        streams.push(collect(child.stdout.take().unwrap()));
        streams.push(collect(child.stderr.take().unwrap()));
        children.push(child);
    }
    let staged = catch_unwind(AssertUnwindSafe(|| meanwhile(&folder)));
    let statuses = wait(&mut children);
    let took = start.elapsed();
    let output: Vec<String> = streams
        .into_iter()
        .map(|stream| stream.join().unwrap())
        .collect();
    let output = output.concat();
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
        statuses: statuses.unwrap_or_else(|| panic!("{task} took longer than {LIMIT:?}\n{output}")),
        took,
        output,
        have_all_ended,
        findings,
    }
}

/// The number of this process, as its launcher tells it.
pub(crate) fn launched_rank() -> usize {
    let number = |name| env::var(name).ok()?.parse().ok();
    ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"]
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

fn spawn(mut command: Command) -> Child {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.spawn().unwrap_or_else(|error| {
        let program = command.get_program();
        match error.kind() {
            ErrorKind::NotFound => panic!("{program:?} is missing: is it installed?"),
            _ => panic!("{program:?} does not start: {error}"),
        }
    })
}

/// `None` if it took too long and was ended.
fn wait(children: &mut [Child]) -> Option<Vec<ExitStatus>> {
    let expiry = Instant::now() + LIMIT;
    loop {
        let ended = children.iter_mut().map(|child| child.try_wait().unwrap());
        if let Some(statuses) = ended.collect() {
            return Some(statuses);
        }
        if Instant::now() >= expiry {
            end(children);
            return None;
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn end(children: &mut [Child]) {
    for child in &mut *children {
        // mpirun passes the signal on to its processes, unless it hangs itself.
        let _ = Command::new("kill").arg(child.id().to_string()).status();
    }
    thread::sleep(Duration::from_secs(3));
    for child in children {
        let _ = child.kill();
        child.wait().unwrap();
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
