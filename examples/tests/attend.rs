//! The program `attend`: independent numbers, the oracle, and everything that can be wrong with a request.

mod golden_cases;

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use clap::Parser;
use golden_cases::{Case, RESULTS, ROUNDINGS, SHARDINGS, TOLERANCE, distance, golden, path, read};
use ring_core::{CommunicationEstimate, Plan, Sharding};
use ring_examples::attend::{self, Input, Measurement, Options};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

/// A tensor to be written.
type NamedShape<'a> = (&'a str, &'a [usize]);

fn attend(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_attend"))
        .args(arguments)
        .output()
        .unwrap()
}

/// Exit status 2, one line on standard error, nothing on standard output; returns the line.
fn refused(arguments: &[&str]) -> String {
    let result = attend(arguments);
    let error = String::from_utf8(result.stderr).unwrap();
    assert_eq!(result.status.code(), Some(2), "{arguments:?}: {error}");
    assert_eq!(error.lines().count(), 1, "{arguments:?}: {error}");
    assert!(result.stdout.is_empty(), "{arguments:?}");
    error
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).unwrap().next().is_none()
}

#[test]
fn golden_numbers_come_out_for_every_number_of_ranks_and_sharding() {
    for case in Case::all() {
        for ranks in ["1", "2", "3", "4", "5", "6", "7", "8"] {
            for sharding in SHARDINGS {
                let got = case.compute(&["--ranks", ranks, "--sharding", sharding]);
                case.check(&got, &format!("on {ranks} ranks, {sharding}"));
            }
        }
    }
}

#[test]
fn the_program_writes_the_golden_numbers() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.safetensors");
    for case in Case::all() {
        let file = case.file();
        let mut arguments = vec!["--input", path(&file), "--output", path(&output)];
        arguments.extend(case.options.iter().map(String::as_str));
        arguments.extend(["--ranks", "3", "--sharding", "zigzag", "--threads", "2"]);
        let result = attend(&arguments);
        let error = String::from_utf8(result.stderr).unwrap();
        assert!(result.status.success(), "{}: {error}", case.name);
        assert!(result.stdout.is_empty() && error.is_empty(), "{error}");
        let (got, expected) = (read(&output), read(&file));
        assert_eq!(got.len(), RESULTS.len());
        for name in RESULTS {
            assert!(
                distance(&got[name], &expected[name]) <= TOLERANCE,
                "{name} of {}",
                case.name
            );
        }
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            1,
            "no draft is left"
        );
        let bytes = fs::read(&output).unwrap();
        let input = fs::read(&file).unwrap();
        let (output, input) = (
            SafeTensors::deserialize(&bytes).unwrap(),
            SafeTensors::deserialize(&input).unwrap(),
        );
        for name in RESULTS {
            let shape = |tensors: &SafeTensors<'_>| tensors.tensor(name).unwrap().shape().to_vec();
            assert_eq!(shape(&output), shape(&input), "{name}");
        }
    }
}

#[test]
fn without_an_incoming_gradient_there_are_no_gradients() {
    let directory = tempfile::tempdir().unwrap();
    let (input, output) = (directory.path().join("in"), directory.path().join("out"));
    write(
        &input,
        &[
            ("q", &[1, 2, 6, 4]),
            ("k", &[1, 1, 6, 4]),
            ("v", &[1, 1, 6, 4]),
        ],
    );
    let result = attend(&[
        "--input",
        path(&input),
        "--output",
        path(&output),
        "--ranks",
        "2",
    ]);
    assert!(result.status.success());
    let names: Vec<String> = read(&output).into_keys().collect();
    assert_eq!(names, ["lse", "out"]);
    let line = refused(&[
        "--input",
        path(&input),
        "--output",
        path(&output),
        "--backward",
    ]);
    assert!(line.contains("grad_out"), "{line}");
}

#[test]
fn rows_beyond_the_sequence_and_empty_shards_are_no_trouble() {
    let directory = tempfile::tempdir().unwrap();
    let (input, output) = (directory.path().join("in"), directory.path().join("out"));
    for (queries, keys) in [(0, 0), (3, 0), (0, 3), (1, 2)] {
        let query: [usize; 4] = [1, 2, queries, 4];
        let key: [usize; 4] = [1, 2, keys, 4];
        write(
            &input,
            &[
                ("q", &query),
                ("k", &key),
                ("v", &key),
                ("grad_out", &query),
            ],
        );
        let result = attend(&[
            "--input",
            path(&input),
            "--output",
            path(&output),
            "--ranks",
            "5",
        ]);
        let error = String::from_utf8(result.stderr).unwrap();
        assert!(result.status.success(), "{error}");
        let got = read(&output);
        assert_eq!(got["out"].len(), 8 * queries);
        assert_eq!(got["grad_k"].len(), 8 * keys);
        if keys == 0 {
            assert!(got["lse"].iter().all(|&lse| lse == f32::NEG_INFINITY));
            assert!(got["out"].iter().all(|&out| out == 0.0));
        }
    }
}

#[test]
fn rounded_inputs_give_what_the_oracle_says_of_them() {
    for case in Case::some_to_round() {
        for (dtype, round) in ROUNDINGS {
            let expected = case.oracle(&[], round);
            for ranks in ["1", "3"] {
                let got = case.compute(&["--dtype", dtype, "--ranks", ranks]);
                for name in RESULTS {
                    let distance = distance(&got[name], &expected[name]);
                    assert!(
                        distance <= 5e-3,
                        "{name} of {} in {dtype}: {distance:e}",
                        case.name
                    );
                    if name == "lse" {
                        assert!(distance <= TOLERANCE, "state is f32: {distance:e}");
                    }
                }
            }
        }
    }
}

/// Options that no golden case has, on top of golden cases: what the options ask for is what the oracle is told.
#[test]
fn combined_options_give_what_the_oracle_says() {
    let cases = Case::all();
    let named = |name: &str| cases.iter().find(|case| case.name == name).unwrap();
    let requests: [(&str, &[&str]); 8] = [
        ("full_causal", &["--dropout=0.3", "--dropout-seed=5"]),
        ("full_causal", &["--key-lengths=53,11", "--alibi"]),
        (
            "full_causal",
            &["--document-lengths=20,33;1,0,51,1", "--window=-1,0"],
        ),
        (
            "dilated_gqa_causal",
            &[
                "--window=20,0",
                "--softcap=3",
                "--alibi",
                "--dropout=0.5",
                "--document-lengths=30,34",
                "--key-lengths=60",
            ],
        ),
        ("head_groups_causal", &["--dropout=0.2", "--softcap=2"]),
        ("full_cross", &["--query-offset=-7", "--causal"]),
        ("full_cross", &["--query-offset=60", "--window=10,5"]),
        ("full_cross", &["--causal", "--key-sharding=zigzag"]),
    ];
    for (name, options) in requests {
        let case = named(name);
        let expected = case.oracle(options, |x| x);
        for (ranks, sharding) in [("1", "contiguous"), ("3", "zigzag"), ("4", "striped:5")] {
            let more = [options, &["--ranks", ranks, "--sharding", sharding]].concat();
            let got = case.compute(&more);
            for result in RESULTS {
                let distance = distance(&got[result], &expected[result]);
                assert!(
                    distance <= TOLERANCE,
                    "{result} of {name} with {options:?} off by {distance:e} on {ranks} ranks"
                );
            }
        }
        // Each option counts, or the oracle would have been told as little of it as the program.
        for (index, option) in options.iter().enumerate() {
            // The seed needs its dropout, is tested below, and so is who owns the keys, which changes no number; and the case is
            // causal without the window.
            let alone = [
                "--dropout=0.3",
                "--dropout-seed=5",
                "--key-sharding=zigzag",
                "--window=-1,0",
            ];
            if alone.contains(option) {
                continue;
            }
            let others = [&options[..index], &options[index + 1..]].concat();
            let without = case.oracle(&others, |x| x);
            assert!(
                distance(&without["grad_v"], &expected["grad_v"]) > 1e-3,
                "{option} of {options:?} changes nothing of {name}"
            );
        }
    }
    let plain = named("full_causal");
    let dropped = plain.oracle(&["--dropout=0.3"], |x| x);
    assert!(distance(&dropped["out"], &plain.oracle(&[], |x| x)["out"]) > 0.1);
    let request = named("full_cross").request(&["--key-sharding=zigzag", "--ranks=2"]);
    let spec = request.spec(&Input::open(&request).unwrap(), 2).unwrap();
    assert_eq!(
        (spec.query_sharding, spec.key_sharding),
        (Sharding::Contiguous, Sharding::Zigzag)
    );
}

#[test]
fn the_seed_chooses_what_is_dropped() {
    let cases = Case::all();
    let case = &cases[0];
    let out = |seed: &str| case.compute(&["--dropout=0.5", "--dropout-seed", seed])["out"].clone();
    assert_eq!(out("3"), out("3"));
    assert!(distance(&out("3"), &out("4")) > 0.1);
}

#[test]
fn features_that_are_not_compiled_in_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.safetensors");
    for option in ["--transport=nccl", "--device=cuda"] {
        let line = refused(&["--random", "1,1,1,8,4", option, "--output", path(&output)]);
        assert!(line.starts_with("not supported: "), "{line}");
    }
    assert!(is_empty(directory.path()));
}

/// Writes f32 tensors of ones.
fn write(file: &Path, tensors: &[NamedShape<'_>]) {
    write_as(file, tensors, Dtype::F32);
}

fn write_as(file: &Path, tensors: &[NamedShape<'_>], dtype: Dtype) {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape)| match dtype {
            Dtype::F32 => 1_f32.to_le_bytes().repeat(shape.iter().product()),
            _ => vec![0; 2 * shape.iter().product::<usize>()],
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
        let view = TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
        (name.to_string(), view)
    });
    safetensors::serialize_to_file(views, None, file).unwrap();
}

#[test]
fn files_that_make_no_sense_are_refused() {
    let inputs = tempfile::tempdir().unwrap();
    let outputs = tempfile::tempdir().unwrap();
    let output = outputs.path().join("out.safetensors");
    let file = inputs.path().join("in.safetensors");
    let q: NamedShape<'_> = ("q", &[1, 4, 8, 4]);
    let k: NamedShape<'_> = ("k", &[1, 2, 8, 4]);
    let v: NamedShape<'_> = ("v", &[1, 2, 8, 4]);
    let refused_file = |words: &[&str]| {
        let line = refused(&["--input", path(&file), "--output", path(&output)]);
        for word in words {
            assert!(line.contains(word), "{line}");
        }
    };

    refused_file(&["cannot read"]);
    fs::create_dir(&file).unwrap();
    refused_file(&[]);
    fs::remove_dir(&file).unwrap();
    for garbage in [
        &b""[..],
        b"short",
        b"no safetensors file, only text",
        &[255; 64],
    ] {
        fs::write(&file, garbage).unwrap();
        refused_file(&["not a safetensors file"]);
    }
    let cases: [(&[NamedShape<'_>], &[&str]); 12] = [
        (&[], &["\"q\""]),
        (&[q, k], &["\"v\"", "has k, q"]),
        (
            &[("q", &[4, 8, 4]), k, v],
            &["\"q\"", "[4, 8, 4]", "four sizes"],
        ),
        (&[q, k, ("v", &[1, 2, 7, 4])], &["\"v\"", "[1, 2, 7, 4]"]),
        (&[q, ("k", &[2, 2, 8, 4]), v], &["\"k\"", "[2, 2, 8, 4]"]),
        (&[q, ("k", &[1, 2, 8, 5]), v], &["\"k\"", "head size"]),
        (&[q, k, v, ("grad_out", &[1, 4, 8, 5])], &["\"grad_out\""]),
        (
            &[q, ("k", &[1, 3, 8, 4]), ("v", &[1, 3, 8, 4])],
            &["4 query heads", "3 key/value"],
        ),
        (
            &[
                ("q", &[1, 4, 8, 0]),
                ("k", &[1, 2, 8, 0]),
                ("v", &[1, 2, 8, 0]),
            ],
            &["head size"],
        ),
        (
            &[q, k, v, ("alibi_slopes", &[3])],
            &["3 ALiBi slopes for 4 query heads"],
        ),
        (
            &[q, k, v, ("alibi_slopes", &[])],
            &["\"alibi_slopes\"", "one size"],
        ),
        (
            &[q, k, v, ("alibi_slopes", &[1, 4])],
            &["\"alibi_slopes\"", "[1, 4]"],
        ),
    ];
    for (tensors, words) in cases {
        write(&file, tensors);
        refused_file(words);
    }
    write_as(&file, &[q, k, v], Dtype::BF16);
    refused_file(&["\"q\"", "BF16", "F32"]);
    write(&file, &[q, k, v]);
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() - 4]).unwrap();
    refused_file(&["not a safetensors file"]);
    assert!(is_empty(outputs.path()));
}

#[test]
fn arguments_that_make_no_sense_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.safetensors");
    let (output, file) = (path(&output), golden("full.safetensors"));
    let from_file = ["--input", path(&file), "--output", output];
    let drawn = ["--random", "1,4,2,16,4", "--output", output];
    let cases: [(&[&str], &str); 54] = [
        (&["--segment-lengths", "4,8"], "0 dilation rates"),
        (&["--dilation-rates", "1,2"], "0 segment lengths"),
        (
            &["--segment-lengths", "4", "--dilation-rates", "1,2"],
            "1 segment lengths but 2",
        ),
        (
            &["--segment-lengths", "4,8", "--dilation-rates", "1,0"],
            "dilation rate 1 is 0",
        ),
        (
            &["--segment-lengths", "0", "--dilation-rates", "1"],
            "segment length 0 is 0",
        ),
        (
            &["--segment-lengths", "4,-8", "--dilation-rates", "1,2"],
            "-8",
        ),
        (
            &["--segment-lengths", "4,,8", "--dilation-rates", "1,2,3"],
            "whole number",
        ),
        (
            &["--segment-lengths", "", "--dilation-rates", ""],
            "whole number",
        ),
        (&["--window", "4"], "LEFT,RIGHT"),
        (&["--window", "4,"], "-1"),
        (&["--window", "-2,0"], "\"-2\" is neither"),
        (&["--window", "0,-3"], "\"-3\" is neither"),
        (&["--window", "1,2,3"], "neither"),
        (
            &["--window", "4,1", "--causal"],
            "reaches 1 positions after",
        ),
        (&["--document-lengths", "7,8"], "15 positions together"),
        (&["--document-lengths", "7,-8"], "whole number"),
        (&["--document-lengths", ""], "whole number"),
        (&["--document-lengths", "16;16;16"], "3 batch entries"),
        (&["--key-lengths", "16,16,16"], "3 batch entries"),
        (&["--key-lengths", "1000"], "key length 1000"),
        (&["--key-lengths", "-1"], "whole number"),
        (&["--softcap", "0"], "positive"),
        (&["--softcap", "-1"], "positive"),
        (&["--softcap", "nan"], "NaN"),
        (&["--dropout", "1"], "[0, 1)"),
        (&["--dropout", "-0.1"], "[0, 1)"),
        (&["--dropout", "nan"], "NaN"),
        (&["--dropout-seed", "3"], "--dropout"),
        (&["--query-offset", "2000000000000"], "largest"),
        (&["--query-offset", "x"], "--query-offset"),
        (&["--key-sharding", "ring"], "zigzag"),
        (&["--scale", "nan"], "NaN"),
        (&["--scale", "inf"], "finite"),
        (&["--scale", "big"], "big"),
        (&["--ranks", "0"], "1 to"),
        (&["--ranks", "-1"], "-1"),
        (&["--threads", "0"], "1 to"),
        (&["--deadline", "0"], "positive"),
        (&["--deadline", "nan"], "positive"),
        (&["--repeat", "0"], "1 to"),
        (&["--sharding", "ring"], "zigzag"),
        (&["--sharding", "striped:0"], "striped"),
        (&["--offsets", "round"], "cyclic"),
        (&["--mixing", "best"], "longnet"),
        (&["--dtype", "f8"], "bf16"),
        (&["--transport", "pigeon"], "loopback"),
        (&["--strategy", "ulysses"], "mesh:HEAD_RANKS"),
        (&["--strategy", "mesh"], "mesh:HEAD_RANKS"),
        (&["--strategy", "mesh:-1"], "mesh:HEAD_RANKS"),
        (&["--strategy", "mesh:0"], "at least 1"),
        (&["--strategy", "mesh:3", "--ranks", "4"], "groups of 3"),
        (&["--strategy", "mesh:8", "--ranks", "8"], "among 8 ranks"),
        (
            &["--strategy", "head-parallel", "--ranks", "8"],
            "among 8 ranks",
        ),
        (&["--colour", "red"], "--colour"),
    ];
    for (arguments, word) in cases {
        for source in [from_file, drawn] {
            let line = refused(&[&source[..], arguments].concat());
            assert!(line.contains(word), "{line}");
        }
    }
    let cases: [(&[&str], &str); 12] = [
        (&[], "--input"),
        (&["--output", output], "--random"),
        (&["--input", path(&file)], "--output"),
        (
            &[
                "--input",
                path(&file),
                "--random",
                "1,1,1,8,4",
                "--output",
                output,
            ],
            "--random",
        ),
        (
            &["--input", path(&file), "--output", output, "--seed", "1"],
            "--seed",
        ),
        (&["--random", "1,2,3,4"], "5"),
        (&["--random", "1,3,2,16,4"], "not a multiple"),
        (&["--random", "1,0,2,16,4"], "at least 1"),
        (&["--random", "1,2,2,16,0"], "at least 1"),
        (&["--random", "1e9,1e9,1e9,1e9,4"], "--random"),
        (
            &["--random", "1,2,2,16,4", "--output", path(directory.path())],
            "cannot write",
        ),
        (
            &["--random", "1,2,2,16,4", "--output", "no/such/folder/out"],
            "cannot write",
        ),
    ];
    for (arguments, word) in cases {
        let line = refused(arguments);
        assert!(line.contains(word), "{line}");
    }
    let slopes = golden("alibi_causal.safetensors");
    let line = refused(&["--input", path(&slopes), "--output", output, "--alibi"]);
    assert!(line.contains("--alibi"), "{line}");
    let line = refused(&[
        "--random",
        "1,2,2,16,4",
        "--mixing",
        "head-groups",
        "--segment-lengths",
        "4,8,16",
        "--dilation-rates",
        "1,2,4",
        "--output",
        output,
    ]);
    assert!(line.contains("head groups"), "{line}");
    assert!(is_empty(directory.path()));
}

#[test]
fn a_failed_rank_is_named_and_leaves_no_file() {
    let directory = tempfile::tempdir().unwrap();
    let output = directory.path().join("out.safetensors");
    // More memory than there is.
    let result = attend(&[
        "--random",
        "1000,1000,1000,1e9,1",
        "--ranks",
        "2",
        "--output",
        path(&output),
    ]);
    let error = String::from_utf8(result.stderr).unwrap();
    assert_eq!(result.status.code(), Some(1), "{error}");
    assert!(
        error.starts_with("error: rank ") && error.contains("could not allocate"),
        "{error}"
    );
    assert_eq!(error.lines().count(), 1, "{error}");
    assert!(is_empty(directory.path()));
}

#[test]
fn random_runs_print_one_line_whose_bytes_are_the_plans() {
    let arguments = [
        "--random",
        "1,4,2,96,8",
        "--segment-lengths",
        "16,64,96",
        "--dilation-rates",
        "1,2,4",
        "--causal",
        "--ranks",
        "3",
        "--sharding",
        "zigzag",
        "--repeat",
        "2",
        "--backward",
        "--threads",
        "2",
        "--dtype",
        "bf16",
    ];
    let result = attend(&arguments);
    assert!(result.status.success() && result.stderr.is_empty());
    let text = String::from_utf8(result.stdout).unwrap();
    assert_eq!(text.lines().count(), 1);
    let line: Measurement = serde_json::from_str(&text).unwrap();

    let options = Options::try_parse_from(["attend"].iter().chain(&arguments)).unwrap();
    let spec = options
        .spec(&Input::open(&options).unwrap(), options.ranks.unwrap_or(1))
        .unwrap();
    let estimates: Vec<CommunicationEstimate> = (0..3)
        .map(|rank| CommunicationEstimate::new(&Plan::new(&spec, rank).unwrap()))
        .collect();
    let forward: Vec<u64> = estimates
        .iter()
        .map(|bytes| bytes.forward_received)
        .collect();
    let backward: Vec<u64> = estimates
        .iter()
        .map(|bytes| bytes.backward_received)
        .collect();
    assert!(forward.iter().sum::<u64>() > 0);
    assert_eq!(line.bytes_received, forward);
    assert_eq!(line.backward_bytes_received, Some(backward));
    assert_eq!((line.ranks, line.threads, line.repeat), (3, 2, 2));
    assert_eq!((line.dtype.as_str(), line.shape.queries), ("bf16", 96));
    assert!((line.input_mb - 2e-6 * 96.0 * 8.0 * 12.0).abs() < 1e-12);
    let backward = line.backward_s.unwrap();
    for times in [line.forward_s, backward] {
        assert!(0.0 < times.min && times.min <= times.median);
    }
    assert!(line.peak_rss_mb.is_none_or(|peak| peak > line.input_mb));
}

#[test]
fn without_backward_there_is_none_in_the_line() {
    let result = attend(&["--random", "1,2,2,32,4"]);
    let line: serde_json::Value = serde_json::from_slice(&result.stdout).unwrap();
    assert!(line["backward_s"].is_null() && line["backward_bytes_received"].is_null());
    assert_eq!(line["bytes_received"], serde_json::json!([0]));
}

#[test]
fn drawn_numbers_depend_on_the_seed_alone() {
    let draw = |more: &[&str]| {
        let fixed = [
            "attend",
            "--random",
            "1,2,1,40,4",
            "--output",
            "none",
            "--backward",
        ];
        let options = Options::try_parse_from(fixed.iter().chain(more)).unwrap();
        let outcome = attend::compute(&options).unwrap();
        let tensors = outcome.tensors().into_iter();
        tensors
            .map(|(_, tensor)| tensor.values())
            .collect::<Vec<_>>()
    };
    let one = draw(&["--seed", "7"]);
    let many = draw(&["--seed", "7", "--ranks", "4", "--sharding", "zigzag"]);
    for (one, many) in one.iter().zip(&many) {
        assert!(distance(many, one) <= TOLERANCE);
    }
    assert!(distance(&draw(&["--seed", "8"])[0], &one[0]) > 0.1);
}

#[test]
fn help_tells_what_is_computed_and_how_files_look() {
    let result = attend(&["--help"]);
    assert!(result.status.success());
    let text = String::from_utf8(result.stdout).unwrap();
    for word in [
        "softmax",
        "grad_out",
        "Examples:",
        "--segment-lengths",
        "alibi_slopes",
        "--window",
        "Exit status",
    ] {
        assert!(text.contains(word), "{word}");
    }
}
