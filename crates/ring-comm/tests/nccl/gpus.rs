//! The suite, and what happens to processes, on true GPUs.

use std::{env, process::Command, time::Duration};

use ring_comm::{
    Nccl,
    conformance::Hosted,
    launch::from_env,
    nccl::{CudaBuffer, CudaDevice, NcclEndpoint, Version},
};

#[cfg(feature = "mpi")]
use crate::processes::launch::this_program;
use crate::{
    processes::{
        PATIENT, Test, conform, faults,
        launch::{Outcome, run},
    },
    ranks,
};

/// Tells a rank the number of its GPU.
const DEVICE: &str = "RING_TEST_DEVICE";
/// Ranks in a scenario of a failure.
const RANKS_OF_FAULTS: usize = 3;

/// What one rank does, in host memory that is copied to its GPU.
pub(crate) fn perform(task: &str) {
    let device: usize = env::var(DEVICE).unwrap().parse().unwrap();
    let nccl = init(device);
    let group = |deadline: Duration| -> Hosted<CudaBuffer, NcclEndpoint> {
        let endpoint = nccl.group_within(PATIENT, deadline).unwrap();
        Hosted::new(endpoint, nccl.device().clone())
    };
    match task {
        "conformance" => conform(nccl.world_size(), &group),
        scenario => faults::perform(scenario, group),
    }
}

#[cfg(not(feature = "mpi"))]
fn init(device: usize) -> Nccl {
    Nccl::init(&from_env().unwrap(), Some(device)).unwrap()
}

/// Over MPI if `mpirun` has started this.
#[cfg(feature = "mpi")]
fn init(device: usize) -> Nccl {
    let launch = from_env().unwrap();
    let init = match env::var("OMPI_COMM_WORLD_RANK") {
        Ok(_) => Nccl::init_over_mpi,
        Err(_) => Nccl::init,
    };
    init(&launch, Some(device)).unwrap()
}

/// The ranks are started by `mpirun`, all on one GPU or alone.
#[cfg(feature = "mpi")]
fn launch_under_mpi(world_size: usize) -> Outcome {
    let mut mpirun = Command::new("mpirun");
    mpirun
        .args(["--allow-run-as-root", "--oversubscribe", "-n"])
        .arg(world_size.to_string())
        .arg(this_program().get_program())
        .env(DEVICE, "0")
        .env("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        .env("NCCL_MAX_CTAS", "4");
    run(vec![mpirun], "conformance", world_size)
}

/// What this machine has the GPUs for; says what is left out.
pub(crate) fn tests(version: Version) -> Vec<Test> {
    let Ok(count) = CudaDevice::count() else {
        return Vec::new();
    };
    let can_share = version >= Version::MULTI_RANK;
    let most = if can_share { 4 } else { count.min(4) };
    println!("found {count} GPUs; at most {most} ranks");
    if most < RANKS_OF_FAULTS {
        println!(
            "not run: groups of more than {most} ranks, failures of processes, because NCCL {version} wants a GPU for each rank, and several on one \
             take NCCL {}",
            Version::MULTI_RANK
        );
    }
    let conformance = (1..=most).map(|world_size| {
        let run = move || launch("conformance", world_size).expect_success();
        Test::new(format!("nccl conforms with {world_size} ranks"), run)
    });
    let mut tests: Vec<Test> = conformance.collect();
    #[cfg(feature = "mpi")]
    for world_size in if can_share { 1..=2 } else { 1..=1 } {
        let run = move || launch_under_mpi(world_size).expect_success();
        let name = format!("nccl conforms with {world_size} ranks under mpirun");
        tests.push(Test::new(name, run));
    }
    if most >= RANKS_OF_FAULTS {
        tests.extend(faults::tests(launch));
    }
    tests
}

/// Has `world_size` ranks perform `task`, on a GPU each as far as there are so many.
fn launch(task: &str, world_size: usize) -> Outcome {
    let count = CudaDevice::count().unwrap();
    let on_gpu = |(rank, mut command): (usize, Command)| {
        command.env(DEVICE, (rank % count).to_string());
        if world_size > count {
            command
                .env("NCCL_MULTI_RANK_GPU_ENABLE", "1")
                // Kernels of all of them must fit on the GPU at the same time.
                .env("NCCL_MAX_CTAS", "4");
        }
        command
    };
    let ranks = ranks(world_size).into_iter().enumerate().map(on_gpu);
    run(ranks.collect(), task, world_size)
}
