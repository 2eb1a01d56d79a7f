//! A store whose ranks are processes: this test, and children that are this test again.

use std::{
    env,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use ring_comm::launch::{
    from_env,
    store::{Failure, FailureKind, Membership, Store},
};

const DEADLINE: Duration = Duration::from_secs(30);
/// How soon everybody must know of a failure.
const SOON: Duration = Duration::from_secs(1);
/// Says to a child what it is to do.
const ROLE: &str = "RING_TEST_ROLE";
const TOKEN: &str = "sesame";

/// A process of this test, ended with it.
struct Rank {
    child: Child,
    lines: Receiver<String>,
}

impl Rank {
    /// Starts rank `rank` of three, which does what `role` says within the test `test`.
    fn start(test: &str, role: &str, rank: usize, rendezvous: &str) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(ROLE, role)
            .env("RING_RANK", rank.to_string())
            .env("RING_WORLD_SIZE", "3")
            .env("RING_RENDEZVOUS", rendezvous)
            .env("RING_JOB_TOKEN", TOKEN)
            .env("RING_DEADLINE_SECONDS", "30")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            stderr
                .lines()
                .map_while(Result::ok)
                .try_for_each(|line| sender.send(line))
        });
        Self { child, lines }
    }

    /// What follows `word` on the next line that the child begins with it.
    fn says(&self, word: &str, timeout: Duration) -> Result<String, RecvTimeoutError> {
        let until = Instant::now() + timeout;
        loop {
            let remaining = until.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(remaining)?;
            if let Some(rest) = line.strip_prefix(word) {
                return Ok(rest.to_owned());
            }
        }
    }

    /// The failure of which the child hears.
    fn hears(&self) -> String {
        self.says("heard ", SOON).unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether this process is a child; it then does its part.
fn is_child() -> bool {
    let Ok(role) = env::var(ROLE) else {
        return false;
    };
    let store = match role.as_str() {
        "serve" => {
            let store = open("127.0.0.1:0", 0);
            eprintln!("serving {}", store.address());
            store
        }
        _ => from_env().unwrap().open_store().unwrap(),
    };
    store.barrier("everybody is here", DEADLINE).unwrap();
    eprintln!("ready");
    match role.as_str() {
        "listen" => {
            let failure = store.wait_for_failure(DEADLINE).unwrap();
            eprintln!("heard {failure}");
        }
        "abort" => {
            store.abort("no more memory");
            // Without a goodbye.
            std::process::exit(3);
        }
        "leave" => {
            store.barrier("everybody leaves", DEADLINE).unwrap();
            eprintln!("left");
        }
        // Until it is killed, or its parent has ended.
        _ => {
            let _ = std::io::stdin().read(&mut [0]);
        }
    }
    true
}

fn open(address: &str, rank: usize) -> Store {
    let membership = Membership::new(rank, 3).token(ring_comm::launch::Token::new(TOKEN));
    Store::open(address, membership, DEADLINE).unwrap()
}

fn is_lost(failure: &Failure, rank: usize) -> bool {
    failure.rank == rank && matches!(failure.kind, FailureKind::Lost(_))
}

/// Rank 0, in this process, with two children.
fn with_children(test: &str, roles: [&str; 2]) -> (Store, [Rank; 2]) {
    let zero = open("127.0.0.1:0", 0);
    let address = zero.address().to_string();
    let children = [1, 2].map(|rank| Rank::start(test, roles[rank - 1], rank, &address));
    zero.barrier("everybody is here", DEADLINE).unwrap();
    for child in &children {
        child.says("ready", DEADLINE).unwrap();
    }
    (zero, children)
}

#[test]
fn processes_meet_and_part() {
    if is_child() {
        return;
    }
    let (zero, mut children) = with_children("processes_meet_and_part", ["leave"; 2]);
    zero.barrier("everybody leaves", DEADLINE).unwrap();
    for child in &mut children {
        child.says("left", DEADLINE).unwrap();
        assert!(child.child.wait().unwrap().success());
    }
    assert_eq!(zero.failure(), None);
}

#[test]
fn a_killed_rank_is_noticed_by_all() {
    if is_child() {
        return;
    }
    let (zero, [listener, mut victim]) =
        with_children("a_killed_rank_is_noticed_by_all", ["listen", "wait"]);
    victim.kill();
    let failure = zero.wait_for_failure(SOON).unwrap();
    assert!(is_lost(&failure, 2), "{failure}");
    assert_eq!(listener.hears(), failure.to_string());
}

#[test]
fn a_killed_rank_zero_is_noticed_by_all() {
    if is_child() {
        return;
    }
    let test = "a_killed_rank_zero_is_noticed_by_all";
    let mut zero = Rank::start(test, "serve", 0, "127.0.0.1:1");
    let address = zero.says("serving ", DEADLINE).unwrap();
    let two = Rank::start(test, "listen", 2, &address);
    let one = open(&address, 1);
    one.barrier("everybody is here", DEADLINE).unwrap();
    two.says("ready", DEADLINE).unwrap();
    zero.kill();
    let failure = one.wait_for_failure(SOON).unwrap();
    assert!(is_lost(&failure, 0), "{failure}");
    assert!(two.hears().starts_with("rank 0 was lost"));
}

#[test]
fn a_process_that_aborts_and_exits_is_heard() {
    if is_child() {
        return;
    }
    let test = "a_process_that_aborts_and_exits_is_heard";
    let (zero, [listener, _aborting]) = with_children(test, ["listen", "abort"]);
    let failure = zero.wait_for_failure(SOON).unwrap();
    assert_eq!(failure.to_string(), "rank 2 aborted: no more memory");
    assert_eq!(listener.hears(), failure.to_string());
}
