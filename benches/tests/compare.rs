//! The comparison works, but for PyTorch: every case without it at tiny sizes, from the command to the page and the picture.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use ring_benches::{
    compare::{
        catalogue::{Size, cases},
        footprint::{Probe, of_program},
        pairs,
        stage::Stage,
    },
    work::Work,
};

fn compare(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_compare"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn a_run_without_pytorch_writes_a_page_and_a_picture() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let output = compare(&["--quick", "--no-torch", "--out", out]);
    let progress = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{progress}");

    let page = fs::read_to_string(folder.path().join("cpu.md")).unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), page);
    assert!(
        page.contains("(cpu.svg)") && page.contains("- PyTorch: not used\n"),
        "{page}"
    );
    let wanted: Vec<_> = cases(Size::Tiny)
        .into_iter()
        .filter(|case| !case.needs_torch())
        .collect();
    for case in &wanted {
        assert!(progress.contains(&case.name()), "{progress}");
        assert!(page.contains(&case.description()), "{page}");
    }
    let picture = fs::read_to_string(folder.path().join("cpu.svg")).unwrap();
    // Beside the background, one rectangle for each case.
    assert_eq!(picture.matches("<rect").count(), wanted.len() + 1);
}

#[test]
fn a_run_that_is_not_complete_leaves_the_results_alone() {
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("results/cpu.md");
    let before = fs::read_to_string(&results).ok();
    let output = compare(&["--quick", "--no-torch", "--only", "module"]);
    assert!(output.status.success());
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("nothing was written")
    );
    assert_eq!(fs::read_to_string(&results).ok(), before);
}

#[test]
fn both_sides_run_as_often_as_they_are_asked() {
    let mut stage = Stage::new(None, env!("CARGO_BIN_EXE_compare").into());
    let case = &cases(Size::Tiny)
        .into_iter()
        .find(|case| case.name() == "ring-efficiency-d64-causal-both-r2")
        .unwrap();
    let mut told = Vec::new();
    let outcome = pairs::run(case, 3, &mut stage, |ratio| told.push(ratio)).unwrap();
    assert_eq!((outcome.ours.len(), outcome.theirs.len()), (3, 3));
    assert_eq!(told, outcome.ratios());
    assert!(
        outcome
            .ours
            .iter()
            .chain(&outcome.theirs)
            .all(|&seconds| seconds > 0.0)
    );
}

#[test]
fn a_case_with_pytorch_says_so_where_there_is_none() {
    let mut stage = Stage::new(None, env!("CARGO_BIN_EXE_compare").into());
    let all = cases(Size::Tiny);
    let case = all.iter().find(|case| case.needs_torch()).unwrap();
    let error = pairs::run(case, 1, &mut stage, |_| ()).unwrap_err();
    assert_eq!(error.to_string(), "this case needs PyTorch");
}

#[test]
fn memory_is_measured_in_a_fresh_process() {
    const LENGTH: usize = 1 << 16;
    let work = Work::full(4, LENGTH, 64).dilated(&[64], &[1]);
    let output = (4 * LENGTH * 64 * size_of::<f32>()) as f64;
    let probe = Probe {
        work,
        ranks: 1,
        threads: 1,
    };
    let bytes = of_program(env!("CARGO_BIN_EXE_compare").as_ref(), &probe).unwrap();
    assert!(
        (output..2.0 * output).contains(&bytes),
        "{bytes} bytes for an output of {output}"
    );
}
