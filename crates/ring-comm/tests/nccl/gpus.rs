//! The suite, and what happens to processes, on true GPUs.

use std::{env, process::Command, time::Duration};

use ring_comm::{
    Nccl,
    conformance::Hosted,
    launch::from_env,
    nccl::{CudaBuffer, CudaDevice, NcclEndpoint, Version},
};

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
    let nccl = Nccl::init(&from_env().unwrap(), Some(device)).unwrap();
    let group = |deadline: Duration| -> Hosted<CudaBuffer, NcclEndpoint> {
        let endpoint = nccl.group_within(PATIENT, deadline).unwrap();
        Hosted::new(endpoint, nccl.device().clone())
    };
    match task {
        "conformance" => conform(nccl.world_size(), &group),
        scenario => faults::perform(scenario, group),
    }
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
