//! The programs on wgpu's CPU adapter (Mesa's lavapipe), several ranks on one device.

mod golden_cases;
mod small_training;

use golden_cases::{Case, RESULTS, ROUNDINGS, TOLERANCE, distance};
use small_training::{assert_agree, losses, workplace};

const ON_GPU: [&str; 2] = ["--device", "wgpu:cpu"];

#[test]
fn golden_numbers_come_out_for_every_number_of_ranks_and_sharding() {
    for case in Case::all() {
        for (ranks, sharding) in [("1", "contiguous"), ("2", "zigzag"), ("4", "striped:5")] {
            let mut options = ON_GPU.to_vec();
            options.extend(["--ranks", ranks, "--sharding", sharding]);
            let got = case.compute(&options);
            case.check(&got, &format!("on {ranks} ranks of a GPU, {sharding}"));
        }
    }
}

#[test]
fn rounded_inputs_give_what_the_oracle_says_of_them() {
    let (dtype, round) = ROUNDINGS[1];
    assert_eq!(dtype, "f16");
    for case in Case::some_to_round() {
        let expected = case.oracle(&[], round);
        let mut options = ON_GPU.to_vec();
        options.extend(["--dtype", dtype, "--ranks", "3"]);
        let got = case.compute(&options);
        for name in RESULTS {
            let distance = distance(&got[name], &expected[name]);
            let tolerance = if name == "lse" { TOLERANCE } else { 2e-3 };
            assert!(
                distance <= tolerance,
                "{name} of {} in {dtype}: {distance:e}",
                case.name
            );
        }
    }
}

#[test]
fn losses_do_not_depend_on_the_device() {
    let (directory, _) = workplace();
    let run = |name: &str, device: &str, ranks: &str| {
        let extra = ["--steps", "6", "--ranks", ranks, "--device", device];
        losses(directory.path(), name, &extra)
    };
    let expected = run("cpu", "cpu", "1");
    assert_agree(&run("one", "wgpu:cpu", "1"), &expected);
    assert_agree(&run("two", "wgpu:cpu", "2"), &expected);
}
