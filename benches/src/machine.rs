//! The machine that measures, as far as its system tells.

use std::{
    fs,
    path::Path,
    process::{self, Command},
    thread::available_parallelism,
    time::Duration,
};

/// Model of the processor.
pub fn processor() -> String {
    output("lscpu", &[])
        .lines()
        .find_map(|line| line.strip_prefix("Model name:"))
        .map_or_else(|| "unknown processor".into(), |name| name.trim().into())
}

/// Cores that this process may use.
pub fn cores() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// Bytes of memory of the machine.
pub fn memory_bytes() -> Option<u64> {
    kibibytes(Path::new("/proc/meminfo"), "MemTotal")
}

/// Name and version of the operating system.
pub fn operating_system() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .map_or_else(|| "unknown system".into(), |name| name.replace('"', ""));
    format!("{name}, {}", output("uname", &["-s", "-r"]))
}

/// Today, in UTC.
pub fn date() -> String {
    output("date", &["-u", "+%Y-%m-%d"])
}

/// Bytes of this process that are in memory now (Linux: `proc(5)`, `VmRSS`).
pub fn resident_bytes() -> Option<u64> {
    kibibytes(Path::new("/proc/self/status"), "VmRSS")
}

/// Most bytes of this process that ever were in memory (Linux: `proc(5)`, `VmHWM`).
pub fn peak_bytes() -> Option<u64> {
    kibibytes(Path::new("/proc/self/status"), "VmHWM")
}

/// Ticks of processor time that a process has used, of which there are 100 a second (Linux: `proc(5)`).
pub fn processor_ticks(process: &process::Child) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.id())).ok()?;
    // The second field, the program's name in parentheses, may hold spaces. User and system time are fields 14 and 15.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

/// Time for which this thread was on a processor (Linux: `/proc/thread-self/schedstat`).
pub fn thread_time() -> Option<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds = text.split_whitespace().next()?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

fn kibibytes(file: &Path, field: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    let number = line.strip_prefix(':')?.trim().strip_suffix("kB")?;
    Some(number.trim().parse::<u64>().ok()? * 1024)
}

/// What a program prints, or nothing if it cannot be run.
fn output(program: &str, arguments: &[&str]) -> String {
    Command::new(program)
        .args(arguments)
        .output()
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_string())
        .unwrap_or_default()
}
