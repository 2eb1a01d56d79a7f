//! `generate` as a user runs it, on a model that `train` made.

mod small_training;

use std::{
    path::Path,
    process::{Command, Output},
};

use small_training::{SMALL, losses, workplace};

fn generate(directory: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_generate"))
        .current_dir(directory)
        .args(arguments)
        .output()
        .unwrap()
}

/// The options of the small model, as `train` has them.
fn model() -> &'static [&'static str] {
    &SMALL[4..12]
}

#[test]
fn any_number_of_ranks_continues_a_text_alike() {
    assert_eq!((model()[0], model()[6]), ("--segment-lengths", "--layers"));
    let (directory, text) = workplace();
    losses(directory.path(), "run", &["--steps", "60", "--ranks", "2"]);
    let text = text.to_str().unwrap();
    let common = [
        "--artifacts",
        "run",
        "--temperature",
        "0.2",
        "--bytes",
        "40",
    ];
    let texts = [
        vec!["--ranks", "1"],
        vec!["--ranks", "3"],
        vec!["--ranks", "4", "--sharding", "striped", "--threads", "1"],
        vec!["--ranks", "1", "--epoch", "3"],
    ]
    .map(|options| {
        let prompt = ["--prompt", "the quick brown fox jumps over the la"];
        let options = [model(), &common, &prompt, &options].concat();
        let output = generate(directory.path(), &options);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{error}");
        assert!(error.contains("tokens per second"), "{error}");
        String::from_utf8(output.stdout).unwrap()
    });
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
    // It was trained on nothing else.
    assert!(texts[0].starts_with("the quick brown fox jumps over the la"));
    assert_eq!(texts[0].len(), 37 + 40 + 1);
    let drawn = &texts[0].as_bytes()[37..];
    let known = |byte: &u8| b"abcdefghijklmnopqrstuvwxyz ;\n".contains(byte);
    assert!(drawn.iter().all(known), "{texts:?}");
    // A prompt far longer than the model was trained on.
    let file = ["--prompt-file", text, "--ranks", "2"];
    let output = generate(directory.path(), &[model(), &common, &file].concat());
    assert!(output.status.success());
    assert_eq!(output.stdout.len(), 45 * 150 + 40 + 1);
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let (directory, _) = workplace();
    losses(directory.path(), "run", &["--steps", "1", "--ranks", "1"]);
    for (options, reason) in [
        (vec!["--artifacts", "run"], "must describe the model"),
        (
            vec!["--artifacts", "nowhere"],
            "cannot read nowhere/checkpoint",
        ),
        (vec!["--artifacts", "."], "cannot read"),
        (vec!["--prompt", ""], "the prompt is empty"),
        (vec!["--prompt-file", "none.txt"], "cannot read none.txt"),
        (vec!["--temperature", "0"], "must be positive"),
        (vec!["--ranks", "0"], "at least 1"),
        (vec!["--compare", "0"], "at least 1"),
        (vec!["--dilation-rates", "1"], "one rate for each length"),
    ] {
        let fits = ["--artifacts", "run"];
        let asks_for_model = options[0] == "--artifacts" || options[0] == "--dilation-rates";
        let all = match asks_for_model {
            true => options,
            false => [model(), &fits, &options].concat(),
        };
        let output = generate(directory.path(), &all);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{all:?}: {error}");
        assert!(error.contains(reason), "{error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn the_cache_gives_the_scores_of_the_whole_text() {
    let (directory, _) = workplace();
    let options = ["--compare", "20,1K", "--ranks", "2", "--threads", "1"];
    let output = generate(directory.path(), &[model(), &options].concat());
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Vec<&str>> = text
        .lines()
        .skip(2)
        .map(|line| line.split_whitespace().collect())
        .collect();
    let prompts: Vec<&str> = lines.iter().map(|line| line[0]).collect();
    assert_eq!(prompts, ["20", "1024"]);
    for line in lines {
        let off: f64 = line[4].parse().unwrap();
        assert!(off < 1e-4, "{text}");
    }
}
