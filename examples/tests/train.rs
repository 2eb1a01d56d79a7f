//! The `train` program, run as a user runs it, on a small text and a small model.

mod small_training;

use std::{fs, process::Command};

use small_training::{SMALL, assert_agree, losses, train, workplace};

#[test]
fn losses_do_not_depend_on_ranks_or_sharding() {
    let (directory, _) = workplace();
    let run = |name: &str, ranks: &str, sharding: &str| {
        let extra = ["--steps", "50", "--ranks", ranks, "--sharding", sharding];
        losses(directory.path(), name, &extra)
    };
    let expected = run("one", "1", "contiguous");
    assert_eq!(expected.len(), 50);
    assert!(
        expected[49] < 0.8 * expected[0],
        "nothing was learned: {expected:?}"
    );
    for (ranks, sharding) in [
        ("2", "contiguous"),
        ("2", "zigzag"),
        ("4", "contiguous"),
        ("4", "zigzag"),
    ] {
        assert_agree(
            &run(&format!("{ranks}-{sharding}"), ranks, sharding),
            &expected,
        );
    }
}

#[test]
fn losses_do_not_depend_on_how_attention_is_divided() {
    let (directory, _) = workplace();
    let run = |strategy: &str| {
        let extra = ["--steps=20", "--ranks=2", "--strategy", strategy];
        losses(directory.path(), strategy, &extra)
    };
    let expected = run("ring");
    for strategy in ["ring-query", "head-parallel", "all-gather", "auto"] {
        assert_agree(&run(strategy), &expected);
    }
    // It does reach the attention: outputs travel only if heads are divided.
    let travels = |strategy: &str| {
        let extra = ["--steps=1", "--ranks=2", "--strategy", strategy];
        let status = Command::new(env!("CARGO_BIN_EXE_train"))
            .current_dir(directory.path())
            .env("RING_TRACE", "trace.json")
            .args(SMALL)
            .args(extra)
            .args(["--artifacts", &format!("traced-{strategy}")])
            .status();
        assert!(status.unwrap().success());
        fs::read_to_string(directory.path().join("trace.json")).unwrap()
    };
    assert!(travels("head-parallel").contains("send outputs"));
    assert!(!travels("ring").contains("send outputs"));
}

/// The same batch on one group and divided among several, evenly or not, with dropout.
#[test]
fn losses_do_not_depend_on_data_groups() {
    let (directory, _) = workplace();
    let run = |name: &str, ranks: &str, groups: &str| {
        let extra = [
            ["--steps", "25"],
            ["--batch", "3"],
            ["--dropout", "0.1"],
            ["--ranks", ranks],
            ["--data-parallel", groups],
        ];
        losses(directory.path(), name, extra.as_flattened())
    };
    let expected = run("one", "1", "1");
    assert_eq!(expected.len(), 25);
    for (ranks, groups) in [("1", "3"), ("2", "2")] {
        let got = run(&format!("{ranks}-{groups}"), ranks, groups);
        assert_agree(&got, &expected);
    }
}

#[test]
fn losses_with_window_softcap_alibi_and_attention_dropout_do_not_depend_on_ranks_or_groups() {
    let (directory, _) = workplace();
    let run = |name: &str, more: &[&str]| {
        let options = [
            "--steps=10",
            "--batch=2",
            "--window=100,0",
            "--softcap=5",
            "--alibi",
            "--attention-dropout=0.2",
        ];
        losses(directory.path(), name, &[&options, more].concat())
    };
    let expected = run("one", &["--ranks=1"]);
    for (name, more) in [
        ("three", ["--ranks=3", "--sharding=zigzag"]),
        ("groups", ["--ranks=2", "--data-parallel=2"]),
    ] {
        assert_agree(&run(name, &more), &expected);
    }
    // Each of them counts: without it other losses come out.
    let first = |more: &[&str]| {
        losses(
            directory.path(),
            "part",
            &[&["--steps=2", "--batch=2", "--ranks=1"], more].concat(),
        )[0]
    };
    let plain = first(&[]);
    for option in [
        "--window=10,0",
        "--softcap=0.01",
        "--alibi",
        "--attention-dropout=0.2",
    ] {
        assert_ne!(first(&[option]), plain, "{option}");
    }
}

#[test]
fn a_checkpoint_resumes_on_another_number_of_ranks() {
    let (directory, _) = workplace();
    let whole = losses(
        directory.path(),
        "whole",
        &["--steps", "50", "--ranks", "2"],
    );
    // As if the run had been stopped after its first checkpoint.
    fs::remove_file(directory.path().join("whole/checkpoint/model-2.bpk")).unwrap();
    let rest = losses(
        directory.path(),
        "whole",
        &["--steps", "50", "--ranks", "3", "--resume", "1"],
    );
    // The losses before the checkpoint are kept.
    assert_agree(&rest, &whole);
}

#[test]
fn a_checkpoint_that_does_not_fit_is_refused() {
    let (directory, _) = workplace();
    losses(
        directory.path(),
        "artifacts",
        &["--steps", "25", "--ranks", "1"],
    );
    let resume = |changed: usize, value: &'static str| {
        let mut arguments = SMALL.to_vec();
        arguments[changed] = value;
        arguments.extend(["--steps", "50", "--ranks", "1", "--resume", "1"]);
        let output = train(directory.path(), &arguments);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.starts_with("error: cannot resume"), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    };
    assert_eq!((SMALL[8], SMALL[10]), ("--embed-dim", "--layers"));
    resume(9, "64");
    resume(11, "1");
    resume(11, "3");
    for part in ["scheduler", "optim", "model"] {
        let file = directory
            .path()
            .join(format!("artifacts/checkpoint/{part}-1.bpk"));
        fs::write(file, "garbage").unwrap();
        resume(9, "32");
    }
}

#[test]
fn a_run_ends_with_its_figures_and_a_picture() {
    let (directory, _) = workplace();
    let mut arguments = SMALL.to_vec();
    arguments.extend(["--steps", "4", "--ranks", "3"]);
    arguments[15] = "20";
    let output = train(directory.path(), &arguments);
    let text = String::from_utf8(output.stdout).unwrap();
    // Every byte of the last 5% is scored.
    let held_out = 150 * 45 / 20;
    assert!(
        text.contains(&format!("bits per byte over all {held_out} bytes")),
        "{text}"
    );
    for expected in [
        "tokens per second",
        "peak memory",
        "loss.svg",
        "sample (temperature",
    ] {
        assert!(text.contains(expected), "{expected} is missing in {text}");
    }
    let picture = fs::read_to_string(directory.path().join("artifacts/loss.svg")).unwrap();
    assert!(picture.contains("<svg") && picture.contains("bits per byte"));
}

#[test]
fn bad_input_is_one_line_and_status_2() {
    let (directory, _) = workplace();
    fs::write(directory.path().join("empty.txt"), "").unwrap();
    for bad in [
        &["--data", "missing.txt"][..],
        &["--data", "empty.txt"],
        &["--data", "."],
        &["--ranks", "0"],
        &["--ranks", "1025"],
        &["--ranks", "2", "--data-parallel", "9223372036854775808"],
        &["--steps", "0"],
        &["--seq-length", "0"],
        &["--seq-length", "100000000"],
        &["--heads", "3"],
        &["--kv-heads", "3"],
        &["--segment-lengths", "64"],
        &["--segment-lengths", "64,0,1"],
        &["--dilation-rates", "1,0,1"],
        &["--dropout", "1"],
        &["--attention-dropout", "1"],
        &["--attention-dropout", "-0.1"],
        &["--window", "16,1"],
        &["--window", "-2,0"],
        &["--window", "16"],
        &["--softcap", "0"],
        &["--softcap", "nan"],
        &["--document-lengths", "1024,1024"],
        &["--key-lengths", "100"],
        &["--learning-rate", "NaN"],
        &["--temperature", "0"],
        &["--sharding", "diagonal"],
        &["--resume", "1"],
        &["--deadline", "0"],
        &["--layers", "0"],
        &["--embed-dim", "12", "--heads", "4"],
    ] {
        let output = train(directory.path(), bad);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{bad:?}: {message}");
        assert!(
            message.starts_with("error: ") && !message.contains("panicked"),
            "{bad:?}: {message}"
        );
        assert!(
            !directory.path().join("artifacts").exists(),
            "{bad:?} left something behind"
        );
    }
}
