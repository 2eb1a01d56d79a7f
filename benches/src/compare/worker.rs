//! PyTorch's processes: they live through the whole comparison, and rest while they are not asked.

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use crate::{
    compare::{
        CompareError,
        protocol::{Answer, Numbers, Request},
    },
    machine,
    work::Work,
};

const PROCESS: &str = "PyTorch";

/// A process that answers requests.
struct Worker {
    process: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    fn start(mut command: Command) -> Result<Self, CompareError> {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|source| CompareError::Program {
                program: PathBuf::from(command.get_program()),
                source,
            })?;
        let requests = process.stdin.take().expect("standard input is piped");
        let answers = process.stdout.take().expect("standard output is piped");
        Ok(Self {
            process,
            requests,
            answers: BufReader::new(answers),
        })
    }

    fn ask(&mut self, request: &Request) -> Result<(), CompareError> {
        let mut line = serde_json::to_string(request).expect("requests are plain data");
        line.push('\n');
        let sent = self.requests.write_all(line.as_bytes());
        sent.map_err(|_| CompareError::ProcessEnded(PROCESS))
    }

    fn answer(&mut self) -> Result<Answer, CompareError> {
        let mut line = String::new();
        match self.answers.read_line(&mut line) {
            Ok(length) if length > 0 => Answer::parse(PROCESS, &line),
            _ => Err(CompareError::ProcessEnded(PROCESS)),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Either may fail only because the process has ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// PyTorch in one process, or its ring in several.
pub struct Workers {
    workers: Vec<Worker>,
    version: String,
    /// Where the ranks of a ring meet.
    _meeting_place: tempfile::TempDir,
}

impl Workers {
    /// `world_size` processes with `threads` threads each, of the interpreter at `python`.
    ///
    /// # Errors
    /// [`CompareError::Program`] and other errors of a process that does not come up.
    pub fn start(python: &Path, world_size: usize, threads: usize) -> Result<Self, CompareError> {
        let meeting_place = tempfile::tempdir().map_err(|source| CompareError::Write {
            file: std::env::temp_dir(),
            source,
        })?;
        let store = meeting_place.path().join("ranks");
        let workers = (0..world_size)
            .map(|rank| {
                let mut command = command(python, world_size, threads);
                command.arg("--rank").arg(rank.to_string());
                command.arg("--store").arg(&store);
                Worker::start(command)
            })
            .collect::<Result<Vec<Worker>, CompareError>>()?;
        let mut group = Self {
            workers,
            version: String::new(),
            _meeting_place: meeting_place,
        };
        for answer in group.answers()? {
            match answer {
                Answer::Torch(version) => group.version = version,
                other => return Err(other.unexpected(PROCESS, "its version")),
            }
        }
        Ok(group)
    }

    /// Version of PyTorch.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Draws tensors for `work`.
    ///
    /// # Errors
    /// [`CompareError`], as all of these requests, if a process fails.
    pub fn prepare(&mut self, work: &Work) -> Result<(), CompareError> {
        self.command(&Request::Prepare { work: work.clone() })
    }

    /// One pass, not timed.
    ///
    /// # Errors
    /// [`CompareError`]
    pub fn warm_up(&mut self) -> Result<(), CompareError> {
        self.command(&Request::WarmUp)
    }

    /// Seconds of one pass, of the slowest process.
    ///
    /// # Errors
    /// [`CompareError`]
    pub fn time(&mut self) -> Result<f64, CompareError> {
        let mut slowest: f64 = 0.0;
        for answer in self.ask(&Request::Time)? {
            match answer {
                Answer::Seconds(seconds) => slowest = slowest.max(seconds),
                other => return Err(other.unexpected(PROCESS, "seconds")),
            }
        }
        Ok(slowest)
    }

    /// Bytes that one pass needed, of all processes together.
    ///
    /// # Errors
    /// [`CompareError`]
    pub fn peak(&mut self) -> Result<u64, CompareError> {
        let mut sum = 0;
        for answer in self.ask(&Request::Peak)? {
            match answer {
                Answer::Bytes(bytes) => sum += bytes,
                other => return Err(other.unexpected(PROCESS, "bytes")),
            }
        }
        Ok(sum)
    }

    /// Results for each process's request.
    ///
    /// # Errors
    /// [`CompareError`]
    pub fn compute(&mut self, requests: &[Request]) -> Result<Vec<Numbers>, CompareError> {
        for (worker, request) in self.workers.iter_mut().zip(requests) {
            worker.ask(request)?;
        }
        let numbers = self.answers()?.into_iter().map(|answer| match answer {
            Answer::Numbers(numbers) => Ok(numbers),
            other => Err(other.unexpected(PROCESS, "numbers")),
        });
        numbers.collect()
    }

    /// Processor time that the processes have used so far.
    pub fn processor_ticks(&self) -> Option<u64> {
        let ticks = self.workers.iter();
        ticks
            .map(|worker| machine::processor_ticks(&worker.process))
            .sum()
    }

    fn command(&mut self, request: &Request) -> Result<(), CompareError> {
        for answer in self.ask(request)? {
            if answer != Answer::Ready {
                return Err(answer.unexpected(PROCESS, "ready"));
            }
        }
        Ok(())
    }

    fn ask(&mut self, request: &Request) -> Result<Vec<Answer>, CompareError> {
        for worker in &mut self.workers {
            worker.ask(request)?;
        }
        self.answers()
    }

    fn answers(&mut self) -> Result<Vec<Answer>, CompareError> {
        self.workers.iter_mut().map(Worker::answer).collect()
    }
}

fn command(python: &Path, world_size: usize, threads: usize) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/worker.py");
    let mut command = Command::new(python);
    command
        .arg(script)
        .args(["--threads", &threads.to_string()])
        .args(["--world-size", &world_size.to_string()])
        .env("OMP_NUM_THREADS", threads.to_string())
        .env("PYTHONDONTWRITEBYTECODE", "1");
    // Unbound, two threads often share a core; bound, processes or a single thread would all take the first.
    if world_size == 1 && threads > 1 {
        command.env("OMP_PROC_BIND", "true");
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Worker {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Worker::start(command).unwrap()
    }

    #[test]
    fn every_request_is_one_line_and_so_is_its_answer() {
        let mut worker = shell(r#"while read line; do echo '{"bytes": '${#line}'}'; done"#);
        for _ in 0..2 {
            worker.ask(&Request::Time).unwrap();
            let length = r#"{"do":"time"}"#.len() as u64;
            assert_eq!(worker.answer().unwrap(), Answer::Bytes(length));
        }
    }

    #[test]
    fn a_process_that_ends_is_an_error() {
        let mut worker = shell("exit 3");
        assert!(matches!(
            worker.answer(),
            Err(CompareError::ProcessEnded(_))
        ));
    }

    #[test]
    fn a_program_that_does_not_exist_is_named() {
        let missing = Worker::start(Command::new("no-such-interpreter"));
        let error = missing.err().unwrap().to_string();
        assert!(error.contains("no-such-interpreter"), "{error}");
    }
}
