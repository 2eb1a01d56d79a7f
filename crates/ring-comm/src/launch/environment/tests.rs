use std::{collections::HashMap, os::unix::ffi::OsStringExt};

use super::*;

/// What an environment with these variables makes of a process.
fn launch(variables: &[(&str, &str)]) -> Result<Launch, LaunchError> {
    let variables: HashMap<&str, &str> = variables.iter().copied().collect();
    from_variables(|name| variables.get(name).map(OsString::from))
}

fn error(variables: &[(&str, &str)]) -> LaunchError {
    launch(variables).unwrap_err()
}

fn place(launch: &Launch) -> (Rank, usize, Option<Rank>) {
    let local_rank = launch.local_rank.as_ref().map(|setting| setting.value);
    (launch.rank.value, launch.world_size.value, local_rank)
}

#[test]
fn nothing_set_is_a_single_rank() {
    let launch = launch(&[]).unwrap();
    assert_eq!(place(&launch), (0, 1, Some(0)));
    assert_eq!(launch.rank.origin, Origin::Default);
    assert_eq!(launch.rendezvous, None);
    assert_eq!(launch.job_id, None);
    assert_eq!(launch.token, None);
    assert_eq!(launch.deadline, default(DEFAULT_DEADLINE));
}

#[test]
fn every_launcher_is_understood() {
    let cases: [([&str; 3], Option<&str>); 5] = [
        (["RING_RANK", "RING_WORLD_SIZE", "RING_LOCAL_RANK"], None),
        (
            ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
            Some("TORCHELASTIC_RUN_ID"),
        ),
        (
            [
                "OMPI_COMM_WORLD_RANK",
                "OMPI_COMM_WORLD_SIZE",
                "OMPI_COMM_WORLD_LOCAL_RANK",
            ],
            None,
        ),
        (["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"], None),
        (
            ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"],
            Some("SLURM_JOB_ID"),
        ),
    ];
    for ([rank, size, local], job) in cases {
        let mut variables = vec![(rank, "5"), (size, "8"), (local, "1")];
        variables.extend(job.map(|name| (name, "job 7")));
        let launch = launch(&variables).unwrap();
        assert_eq!(place(&launch), (5, 8, Some(1)), "{rank}");
        assert_eq!(launch.rank.origin.to_string(), rank);
        assert_eq!(launch.world_size.origin.to_string(), size);
        assert_eq!(launch.local_rank.unwrap().origin.to_string(), local);
        let job_id = launch.job_id.map(|setting| setting.value);
        assert_eq!(job_id.as_deref(), job.map(|_| "job 7"), "{rank}");
    }
}

#[test]
fn a_local_rank_that_is_not_told_is_unknown() {
    let launch = launch(&[("RANK", "1"), ("WORLD_SIZE", "2")]).unwrap();
    assert_eq!(launch.local_rank, None);
}

#[test]
fn launchers_that_agree_are_one() {
    let launch = launch(&[
        ("PMI_RANK", "1"),
        ("PMI_SIZE", "4"),
        ("MPI_LOCALRANKID", "0"),
        ("RING_RANK", "1"),
        ("RING_WORLD_SIZE", "4"),
    ])
    .unwrap();
    assert_eq!(place(&launch), (1, 4, Some(0)));
    assert_eq!(launch.rank.origin.to_string(), "RING_RANK");
}

#[test]
fn launchers_that_contradict_each_other_are_an_error() {
    let names = [
        ("RING_RANK", "RING_WORLD_SIZE"),
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    ];
    for (index, &(rank, size)) in names.iter().enumerate() {
        for &(other_rank, other_size) in &names[index + 1..] {
            let of_rank = error(&[
                (rank, "1"),
                (size, "4"),
                (other_rank, "2"),
                (other_size, "4"),
            ]);
            assert!(
                of_rank
                    .to_string()
                    .starts_with(&format!("{rank}=1 contradicts {other_rank}=2")),
                "{of_rank}"
            );
            let of_size = error(&[
                (rank, "1"),
                (size, "4"),
                (other_rank, "1"),
                (other_size, "3"),
            ]);
            assert!(
                of_size
                    .to_string()
                    .starts_with(&format!("{size}=4 contradicts {other_size}=3")),
                "{of_size}"
            );
        }
    }
}

#[test]
fn half_of_a_launcher_is_an_error_that_names_the_other_half() {
    let names = [
        ("RING_RANK", "RING_WORLD_SIZE"),
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
    ];
    for (rank, size) in names {
        for (present, missing) in [(rank, size), (size, rank)] {
            assert_eq!(
                error(&[(present, "3")]).to_string(),
                format!("{present}=3 is set, but {missing} is not: set both or neither")
            );
        }
    }
    assert_eq!(
        error(&[("SLURM_PROCID", "3")]),
        missing("SLURM_PROCID", 3, "SLURM_NTASKS")
    );
}

#[test]
fn numbers_that_are_none_are_an_error_with_variable_and_value() {
    for value in ["", "two", "-1", "1.5", "99999999999999999999999"] {
        assert_eq!(
            error(&[("RANK", value), ("WORLD_SIZE", "4")]),
            LaunchError::NotANumber {
                variable: "RANK",
                value: value.into()
            }
        );
    }
    assert_eq!(
        error(&[("PMI_RANK", "0"), ("PMI_SIZE", "x")]).to_string(),
        "PMI_SIZE=\"x\" must be a whole number, 0 or more"
    );
}

#[test]
fn values_that_are_not_unicode_are_an_error() {
    let error =
        from_variables(|name| (name == "RANK").then(|| OsString::from_vec(vec![b'1', 0xff])))
            .unwrap_err();
    assert!(matches!(
        error,
        LaunchError::NotUnicode {
            variable: "RANK",
            ..
        }
    ));
}

#[test]
fn ranks_out_of_range_are_an_error() {
    assert_eq!(
        error(&[("RANK", "4"), ("WORLD_SIZE", "4")]).to_string(),
        "RANK=4 must be less than WORLD_SIZE=4"
    );
    assert_eq!(
        error(&[("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "9")]).to_string(),
        "LOCAL_RANK=9 must be less than WORLD_SIZE=4"
    );
    assert_eq!(
        error(&[("RANK", "0"), ("WORLD_SIZE", "0")]),
        LaunchError::NoRanks {
            variable: "WORLD_SIZE"
        }
    );
}

#[test]
fn a_batch_script_of_slurm_is_a_single_rank() {
    let script = [
        ("SLURM_PROCID", "0"),
        ("SLURM_NTASKS", "8"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_JOB_ID", "7"),
    ];
    let single = launch(&script).unwrap();
    assert_eq!(place(&single), (0, 1, Some(0)));
    assert_eq!(single.job_id, None);

    let mut task = script.to_vec();
    task.push(("SLURM_STEP_ID", "0"));
    assert_eq!(place(&launch(&task).unwrap()), (0, 8, Some(0)));
    // A shell of an allocation.
    assert_eq!(
        place(&launch(&[("SLURM_NTASKS", "8")]).unwrap()),
        (0, 1, Some(0))
    );
}

#[test]
fn what_slurm_says_of_the_parent_of_mpirun_or_torchrun_does_not_count() {
    let slurm = [
        ("SLURM_PROCID", "1"),
        ("SLURM_NTASKS", "2"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_JOB_ID", "7"),
    ];
    for [rank, size] in [
        ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"],
        ["RANK", "WORLD_SIZE"],
        ["PMI_RANK", "PMI_SIZE"],
    ] {
        let mut variables = slurm.to_vec();
        variables.extend([(rank, "5"), (size, "8")]);
        let launch = launch(&variables).unwrap();
        assert_eq!(place(&launch), (5, 8, None));
        assert_eq!(launch.job_id, None);
    }
}

#[test]
fn the_rendezvous_is_ours_or_that_of_torchrun() {
    let rendezvous = |variables: &[(&str, &str)]| {
        let rendezvous = launch(variables).unwrap().rendezvous.unwrap();
        (rendezvous.value.to_string(), rendezvous.origin.to_string())
    };
    let master = [("MASTER_ADDR", "node1"), ("MASTER_PORT", "29500")];
    assert_eq!(
        rendezvous(&master),
        ("node1:29500".into(), "MASTER_ADDR, MASTER_PORT".into())
    );
    let with = |extra| [master.as_slice(), &[extra]].concat();
    assert_eq!(
        rendezvous(&with(("TORCHELASTIC_USE_AGENT_STORE", "True"))).0,
        "node1:29501"
    );
    assert_eq!(
        rendezvous(&with(("TORCHELASTIC_USE_AGENT_STORE", "False"))).0,
        "node1:29500"
    );
    assert_eq!(
        rendezvous(&with(("RING_RENDEZVOUS", "[::1]:7"))),
        ("[::1]:7".into(), "RING_RENDEZVOUS".into())
    );
    let ipv6 = [("MASTER_ADDR", "::1"), ("MASTER_PORT", "65535")];
    assert_eq!(rendezvous(&ipv6).0, "[::1]:65535");
    let agent = [ipv6.as_slice(), &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
    assert_eq!(rendezvous(&agent).0, "[::1]:65534");
}

#[test]
fn a_rendezvous_that_is_none_is_an_error() {
    for value in [
        "",
        "node1",
        "node1:",
        ":29500",
        "node1:0",
        "node1:65536",
        "node1:x",
        "::1:29500",
        "[]:1",
    ] {
        assert_eq!(
            error(&[("RING_RENDEZVOUS", value)]),
            LaunchError::BadAddress {
                variable: "RING_RENDEZVOUS",
                value: value.into()
            }
        );
    }
    assert_eq!(
        error(&[("MASTER_ADDR", "node1")]),
        missing("MASTER_ADDR", "node1", "MASTER_PORT")
    );
    assert_eq!(
        error(&[("MASTER_PORT", "1")]),
        missing("MASTER_PORT", "1", "MASTER_ADDR")
    );
    assert_eq!(
        error(&[("MASTER_ADDR", "node1"), ("MASTER_PORT", "0")]),
        LaunchError::BadPort {
            variable: "MASTER_PORT",
            value: "0".into()
        }
    );
    assert_eq!(
        error(&[("MASTER_ADDR", ""), ("MASTER_PORT", "1")]),
        LaunchError::Empty {
            variable: "MASTER_ADDR"
        }
    );
}

#[test]
fn the_deadline_is_a_time() {
    let deadline = |value| launch(&[("RING_DEADLINE_SECONDS", value)]).map(|l| l.deadline.value);
    assert_eq!(deadline("30"), Ok(Duration::from_secs(30)));
    assert_eq!(deadline("0.25"), Ok(Duration::from_millis(250)));
    for value in ["", "0", "-1", "soon", "inf", "NaN", "1e300"] {
        assert_eq!(
            deadline(value),
            Err(LaunchError::BadDeadline {
                variable: "RING_DEADLINE_SECONDS",
                value: value.into()
            })
        );
    }
}

#[test]
fn the_token_is_never_printed() {
    let launch = launch(&[("RING_JOB_TOKEN", "sesame")]).unwrap();
    assert_eq!(launch.token.clone().unwrap().value, Token::new("sesame"));
    assert!(!format!("{launch:?}").contains("sesame"));
    assert!(!format!("{:?}", launch.membership()).contains("sesame"));
    assert_eq!(
        error(&[("RING_JOB_TOKEN", "")]),
        LaunchError::Empty {
            variable: "RING_JOB_TOKEN"
        }
    );
}

#[test]
fn a_single_rank_opens_a_store_of_its_own() {
    let store = launch(&[]).unwrap().open_store().unwrap();
    assert!(store.address().ip().is_loopback());
    store.barrier("alone", Duration::from_secs(10)).unwrap();
}

#[test]
fn several_ranks_need_a_rendezvous() {
    let launch = launch(&[("RANK", "0"), ("WORLD_SIZE", "2")]).unwrap();
    assert_eq!(
        launch.open_store().unwrap_err(),
        LaunchError::NoRendezvous { world_size: 2 }
    );
}
