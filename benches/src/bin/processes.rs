//! Measures ranks that are processes: what a shift costs under a computation, and a ring of two processes against one process
//! with two threads.
//!
//! `cargo run --release --features mpi --bin processes`

use std::{env, error::Error, sync::Arc, time::Duration};

use ring_benches::overlap::{self, Computation, Times};
use ring_comm::{Communicator, Loopback, TransportKind, buffer::HostBuffer, launch};

fn main() -> Result<(), Box<dyn Error>> {
    let deadline = Duration::from_secs(60);
    let report =
        |communicator: Communicator<HostBuffer>, what: &str| -> Result<(), Box<dyn Error>> {
            for milliseconds in [100, 200, 500] {
                let computation = Computation::lasting(Duration::from_millis(milliseconds))
                    .agreed(&communicator)?;
                let times = overlap::measure(&communicator, &computation, 9)?;
                if communicator.rank() == 0 {
                    let median = |pick: fn(&Times) -> f64| {
                        let mut all: Vec<f64> = times.iter().map(pick).collect();
                        all.sort_by(f64::total_cmp);
                        all[all.len() / 2]
                    };
                    println!(
                        "{what}: computation {:.1} ms, shift {:.1} ms, both {:.1} ms, ratio {:.4}",
                        1e3 * median(|times| times.computation.as_secs_f64()),
                        1e3 * median(|times| times.shift.as_secs_f64()),
                        1e3 * median(|times| times.both.as_secs_f64()),
                        median(|times| times.both.as_secs_f64() / times.computation.as_secs_f64()),
                    );
                }
            }
            Ok(())
        };
    let launch = launch::from_env()?;
    if launch.world_size.value > 1 || env::args().nth(1).is_some() {
        let communicator = Communicator::connect(TransportKind::fitting(&launch), &launch)?;
        return report(communicator, "mpi");
    }
    for result in Loopback::run(2, deadline, |endpoint| {
        report(Communicator::new(Arc::new(endpoint)), "loopback").map_err(|error| error.to_string())
    }) {
        result??;
    }
    Ok(())
}
