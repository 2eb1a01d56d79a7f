//! The program `plan`.

use std::{
    fs,
    process::{Command, Output},
    time::{Duration, Instant},
};

use ring_examples::plan::{Comparison, Survey};

fn plan(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_plan"))
        .args(arguments)
        .output()
        .unwrap()
}

fn text(arguments: &[&str]) -> String {
    let result = plan(arguments);
    let error = String::from_utf8(result.stderr).unwrap();
    assert!(
        result.status.success() && error.is_empty(),
        "{arguments:?}: {error}"
    );
    String::from_utf8(result.stdout).unwrap()
}

fn survey(arguments: &[&str]) -> Survey {
    let text = text(&[arguments, &["--json"]].concat());
    serde_json::from_str(&text).unwrap()
}

const LONGNET: [&str; 9] = [
    "--length",
    "64K",
    "--ranks",
    "4",
    "--segment-lengths",
    "4K,16K,64K",
    "--dilation-rates",
    "1,4,16",
    "--heads=8",
];

#[test]
fn the_table_says_who_holds_sends_and_computes_what() {
    let table = text(&LONGNET);
    for words in [
        "65,536 tokens on 4 ranks, contiguous",
        "8 query heads",
        "0..16,384",
        "49,152..65,536",
        "recv fwd",
        "sent bwd",
        "imbalance (slowest / mean) 1.000",
        "segments of 16K, rate 4",
        "exchange slots",
        "reduction",
        "median",
    ] {
        assert!(table.contains(words), "{words} is not in\n{table}");
    }
}

#[test]
fn many_ranks_are_shortened_unless_all_are_wanted() {
    let arguments = ["--length", "1M", "--ranks", "40", "--heads", "2"];
    let short = text(&arguments);
    assert!(
        short.contains("(32 more)") && !short.contains("\n20 "),
        "{short}"
    );
    let all = text(&[&arguments[..], &["--all"]].concat());
    assert!(all.contains("\n20 ") && !all.contains(" more)"), "{all}");
}

#[test]
fn one_rank_is_shown_with_its_steps() {
    let table = text(&[&LONGNET[..], &["--rank", "2"]].concat());
    for words in [
        "rank 2 of 4",
        "step 0",
        "receive",
        "this rank",
        "memory of rank 2",
    ] {
        assert!(table.contains(words), "{words} is not in\n{table}");
    }
    let survey = survey(&[&LONGNET[..], &["--rank", "2"]].concat());
    assert_eq!(survey.per_rank.len(), 1);
    assert_eq!(survey.plan.unwrap().rank(), 2);
}

#[test]
fn sums_hold() {
    for sharding in ["contiguous", "zigzag", "striped"] {
        for causal in [&[][..], &["--causal"]] {
            let survey = survey(&[&LONGNET[..], &["--sharding", sharding], causal].concat());
            let totals = survey.totals.unwrap();
            let sum = |value: &dyn Fn(&ring_core::CommunicationEstimate) -> u64| -> u64 {
                let ranks = survey.per_rank.iter();
                ranks.map(|rank| value(&rank.communication)).sum()
            };
            assert_eq!(sum(&|bytes| bytes.forward_sent), totals.forward_received);
            assert_eq!(sum(&|bytes| bytes.backward_sent), totals.backward_received);
            assert_eq!(
                totals.received_per_branch.iter().sum::<u64>(),
                totals.forward_received
            );
            assert_eq!(
                survey
                    .per_rank
                    .iter()
                    .map(|rank| rank.tokens)
                    .sum::<usize>(),
                65_536
            );
            let pairs = survey.per_rank.iter().map(|rank| rank.pairs);
            assert_eq!(pairs.clone().sum::<u128>(), totals.pairs);
            let mean = totals.pairs as f64 / 4.0;
            let imbalance = pairs.max().unwrap() as f64 / mean;
            assert!((imbalance - survey.imbalance.unwrap().pairs).abs() < 1e-9);
            for rank in &survey.per_rank {
                let memory = &rank.backward_memory;
                let sum = memory.query
                    + memory.key_value
                    + memory.output
                    + memory.gradients
                    + memory.divided_heads
                    + memory.exchange_slots
                    + memory.scratch;
                assert_eq!(sum, memory.total);
            }
        }
    }
}

/// Of 8 ranks, with 8 heads.
const STRATEGIES: [&str; 7] = [
    "ring",
    "ring-query",
    "all-gather",
    "head-parallel",
    "mesh:2",
    "mesh:4",
    "one-rank",
];

#[test]
fn every_strategy_is_planned_told_and_drawn() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("plan.svg");
    let request = |strategy| {
        let more = ["--ranks=8", "--heads=8", "--causal", "--strategy", strategy];
        let branches = ["--segment-lengths=4K,64K", "--dilation-rates=1,4"];
        [&["--length=64K"], &branches[..], &more].concat()
    };
    let mut pictures = Vec::new();
    for strategy in STRATEGIES {
        let survey = survey(&request(strategy));
        assert_eq!(survey.strategy, strategy);
        let totals = survey.totals.clone().unwrap();
        let sum = |value: &dyn Fn(&ring_core::CommunicationEstimate) -> u64| -> u64 {
            let ranks = survey.per_rank.iter();
            ranks.map(|rank| value(&rank.communication)).sum()
        };
        assert_eq!(sum(&|bytes| bytes.forward_sent), totals.forward_received);
        assert_eq!(sum(&|bytes| bytes.backward_sent), totals.backward_received);
        let by_branch = totals.received_per_branch.iter().sum::<u64>();
        let is_ring = strategy.starts_with("ring");
        assert_eq!(by_branch == totals.forward_received, is_ring, "{strategy}");
        let divides = !is_ring && strategy != "all-gather";
        assert_eq!(totals.forward_regrouped > 0, divides, "{strategy}");
        // The comparison is of the same strategy, its numbers those of a survey.
        for cost in &survey.comparison.as_ref().unwrap().shardings {
            let other = [&request(strategy)[..], &["--sharding", &cost.sharding]].concat();
            let other = self::survey(&other).totals.unwrap();
            assert_eq!(cost.forward_received, other.forward_received);
        }

        let table = text(&request(strategy));
        assert!(
            table.contains(&format!("contiguous, {strategy}\n")),
            "{table}"
        );
        let parts = ["segments of 64K, rate 4", "keys and values of all branches"];
        assert_eq!(parts.map(|part| table.contains(part)), [is_ring, !is_ring]);

        let svg = ["--svg", file.to_str().unwrap()];
        let told = text(&[&request(strategy)[..], &["--rank=3"], &svg].concat());
        assert!(told.contains(&format!("rank 3 of 8, {strategy}")), "{told}");
        assert_eq!(told.contains("after: outputs return"), divides, "{told}");
        pictures.push(fs::read_to_string(&file).unwrap());
        assert_well_formed(&pictures[0]);
    }
    assert!(pictures.iter().all(|picture| *picture == pictures[0]));
}

#[test]
fn what_ranks_exchange_to_divide_heads_is_told() {
    let request = ["--length=64K", "--ranks=4", "--heads=4", "--rank=1"];
    let of = |strategy| [&request[..], &["--strategy", strategy]].concat();
    let table = text(&of("mesh:2"));
    for words in [
        "before: gather key/value heads 2..4",
        "before: own rows of key/value heads 0..2 to rank 0",
        "with rank 3",
        "rows of divided heads",
    ] {
        assert!(table.contains(words), "{words} is not in\n{table}");
    }
    let plan = survey(&of("mesh:2")).plan.unwrap();
    let members = &plan.regroup().unwrap().members;
    let ranks: Vec<_> = members.iter().map(|member| member.rank).collect();
    assert_eq!(ranks, [0, 1]);
    let table = text(&of("one-rank"));
    assert!(table.contains("before: all own rows leave"), "{table}");
    // Queries travel in the backward, where they are fewer bytes.
    let table = text(&of("ring-query"));
    assert!(table.contains("receive queries: "), "{table}");
}

#[test]
fn memory_follows_from_what_a_strategy_gathers() {
    let of = |strategy: &str, rank: usize| {
        let request = ["--length=64K", "--ranks=8", "--heads=8", "--strategy"];
        survey(&[&request[..], &[strategy]].concat()).per_rank[rank].clone()
    };
    let ring = of("ring", 0).backward_memory;
    for strategy in STRATEGIES {
        let memory = of(strategy, 0).backward_memory;
        let parts = memory.query + memory.key_value + memory.output + memory.gradients;
        let parts = parts + memory.divided_heads + memory.exchange_slots + memory.scratch;
        assert_eq!(parts, memory.total, "{strategy}");
        assert_eq!(memory.single_device_total, ring.single_device_total);
    }
    // All keys and values, and their gradients in messages.
    let gathered = of("all-gather", 0);
    assert!(gathered.forward_memory.exchange_slots >= 7 * gathered.forward_memory.key_value);
    // One rank holds at least what one device would; the others hold less than in a ring.
    let one = of("one-rank", 0).backward_memory;
    assert!(one.total > one.single_device_total);
    let other = of("one-rank", 1).backward_memory;
    assert!(other.total < ring.total);
    // Dividing heads needs own rows twice, and no more than a ring in proportion.
    for strategy in ["head-parallel", "mesh:2", "mesh:4"] {
        let memory = of(strategy, 5).backward_memory;
        assert!(memory.divided_heads > 0 && memory.total < 4 * ring.total);
    }
}

#[test]
fn causal_zigzag_is_balanced_and_causal_contiguous_is_not() {
    let imbalance = |sharding| {
        let arguments = [
            "--length",
            "64K",
            "--ranks",
            "8",
            "--causal",
            "--sharding",
            sharding,
        ];
        survey(&arguments).imbalance.unwrap().pairs
    };
    assert!(imbalance("zigzag") < 1.01);
    assert!(imbalance("contiguous") > 1.5);
}

#[test]
fn shardings_are_compared() {
    const SIZES: [&str; 6] = ["--length", "64K", "--ranks", "8", "--batch", "2"];
    let compared = |more: &[&str], sharding: &str| {
        let arguments = |sharding| [&SIZES[..], more, &["--sharding", sharding]].concat();
        let comparison = survey(&arguments(sharding)).comparison.unwrap();
        for cost in &comparison.shardings {
            let alone = survey(&arguments(&cost.sharding));
            let totals = alone.totals.unwrap();
            assert_eq!(cost.forward_received, totals.forward_received);
            assert_eq!(cost.imbalance, alone.imbalance.unwrap().pairs);
            let pairs = alone.per_rank.iter().map(|rank| rank.pairs);
            assert_eq!(cost.slowest_pairs, pairs.max().unwrap());
        }
        comparison
    };
    let names = |comparison: &Comparison| -> Vec<String> {
        let shardings = comparison.shardings.iter();
        shardings.map(|cost| cost.sharding.clone()).collect()
    };
    let causal = compared(&["--causal"], "contiguous");
    assert_eq!(names(&causal), ["contiguous", "zigzag", "striped"]);
    assert_eq!(causal.best, "zigzag");
    // Equal work everywhere: the bytes decide.
    let local = compared(
        &["--segment-lengths", "1K", "--dilation-rates", "1"],
        "zigzag",
    );
    assert_eq!(local.best, "contiguous");
    // A window makes work even where causality made it uneven.
    assert_eq!(
        compared(&["--window", "511,0"], "striped").best,
        "contiguous"
    );
    let documents = compared(&["--document-lengths", "64000,1536"], "striped:100");
    assert_eq!(names(&documents)[3], "striped:100");

    let table = text(&["--length", "64K", "--ranks", "8", "--causal"]);
    assert!(
        table.contains("slowest / mean") && table.contains("best: zigzag"),
        "{table}"
    );
    let many = ["--length", "64K", "--ranks", "65"];
    assert!(survey(&many).comparison.is_none());
    assert!(
        survey(&[&many[..], &["--compare"]].concat())
            .comparison
            .is_some()
    );
    assert!(
        survey(&["--length", "64K", "--ranks", "1"])
            .comparison
            .is_none()
    );
}

#[test]
fn the_table_names_the_masks() {
    let arguments = [
        ["--length", "1000"],
        ["--ranks", "2"],
        ["--batch", "2"],
        ["--window", "99,-1"],
        ["--document-lengths", "400,600;1000"],
        ["--key-lengths", "900,1000"],
    ];
    let table = text(arguments.as_flattened());
    for words in [
        "window 99,all",
        "documents: 2; 1 (of each batch entry)",
        "key lengths: 900; 1,000 (of each batch entry)",
    ] {
        assert!(table.contains(words), "{words} is not in\n{table}");
    }
}

#[test]
fn windows_documents_and_padding_leave_less_to_compute() {
    let pairs = |more: &[&str]| {
        let arguments = [
            &[
                "--length", "1000", "--ranks", "3", "--heads", "1", "--batch", "2",
            ],
            more,
        ];
        survey(&arguments.concat()).totals.unwrap().pairs
    };
    assert_eq!(pairs(&[]), 2 * 1000 * 1000);
    assert_eq!(
        pairs(&["--window", "9,-1", "--causal"]),
        2 * (1000 * 10 - 45)
    );
    let squares = 2 * (400 * 400 + 600 * 600);
    assert_eq!(pairs(&["--document-lengths", "400,600"]), squares);
    let squares = 400 * 400 + 600 * 600 + 1000 * 1000;
    assert_eq!(pairs(&["--document-lengths", "400,600;1e3"]), squares);
    assert_eq!(
        pairs(&["--key-lengths", "1000,10"]),
        1000 * 1000 + 1000 * 10
    );
}

/// Tags open and close in order, text is escaped, every number is one.
fn assert_well_formed(svg: &str) {
    let mut open = Vec::new();
    let mut rest = svg;
    while let Some(start) = rest.find('<') {
        assert!(
            !rest[..start].contains('>'),
            "a stray > before {}",
            &rest[start..][..20]
        );
        let end = start + rest[start..].find('>').expect("a tag that ends");
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        if tag.starts_with(['?', '!']) {
            continue;
        }
        assert!(
            !tag.contains("NaN") && tag.matches('"').count().is_multiple_of(2),
            "{tag}"
        );
        let name = |tag: &str| tag.split_whitespace().next().unwrap_or("").to_string();
        if let Some(closed) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name(closed)));
        } else if !tag.ends_with('/') {
            open.push(name(tag));
        }
    }
    assert!(open.is_empty(), "{open:?} never end");
}

#[test]
fn pictures_are_well_formed_and_small() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("plan.svg");
    let cases: [&[&str]; 6] = [
        &[
            "--length",
            "1e9",
            "--ranks",
            "1024",
            "--rank",
            "3",
            "--heads",
            "4",
            "--segment-lengths",
            "2048,64K,2M,64M,1e9",
            "--dilation-rates",
            "1,32,1024,32768,1048576",
        ],
        &[
            "--length",
            "100",
            "--ranks",
            "3",
            "--segment-lengths",
            "10,100",
            "--dilation-rates",
            "1,7",
        ],
        &[
            "--length",
            "64K",
            "--ranks",
            "12",
            "--sharding",
            "striped:100",
            "--causal",
        ],
        &[
            "--length",
            "64K",
            "--ranks",
            "6",
            "--sharding",
            "zigzag",
            "--mixing",
            "head-groups",
            "--segment-lengths",
            "1K,8K,64K",
            "--dilation-rates",
            "1,2,4",
        ],
        &["--length", "0"],
        &["--length", "1", "--ranks", "1"],
    ];
    for arguments in cases {
        text(&[arguments, &["--svg", file.to_str().unwrap()]].concat());
        let svg = fs::read_to_string(&file).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("position (tokens)"));
        assert!(
            svg.len() < 1_000_000,
            "{} bytes for {arguments:?}",
            svg.len()
        );
        assert_well_formed(&svg);
    }
}

#[test]
fn a_thousand_million_tokens_are_planned_quickly() {
    let started = Instant::now();
    let survey = survey(&[
        "--length",
        "1e9",
        "--ranks",
        "128",
        "--segment-lengths",
        "2048,64K,2M,64M,1e9",
        "--dilation-rates",
        "1,32,1024,32768,1048576",
        "--causal",
        "--dtype",
        "bf16",
    ]);
    assert_eq!(survey.per_rank.len(), 128);
    assert!(
        started.elapsed() < Duration::from_secs(120),
        "{:?}",
        started.elapsed()
    );
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let length = ["--length", "64K"];
    let cases: [(&[&str], &str); 23] = [
        (&[], "--length"),
        (&["--length", "many"], "whole number"),
        (&["--length", "2e12"], "largest"),
        (&["--length", "64K", "--ranks", "0"], "1 to"),
        (
            &["--length", "64K", "--ranks", "4", "--rank", "4"],
            "0 to 3",
        ),
        (
            &["--length", "64K", "--heads", "5", "--kv-heads", "2"],
            "not a multiple",
        ),
        (&["--length", "64K", "--heads", "0"], "at least 1"),
        (&["--length", "64K", "--head-dim", "1000000000"], "at most"),
        (
            &["--length", "64K", "--segment-lengths", "4"],
            "0 dilation rates",
        ),
        (
            &[
                "--length",
                "64K",
                "--segment-lengths",
                "4",
                "--dilation-rates",
                "0",
            ],
            "is 0",
        ),
        (&["--length", "64K", "--window", "4,-2"], "no bound"),
        (
            &["--length", "64K", "--window", "4,4", "--causal"],
            "causal",
        ),
        (
            &["--length", "64K", "--document-lengths", "32K,31K"],
            "64512 positions",
        ),
        (
            &["--length", "64K", "--document-lengths", "64K;64K;64K"],
            "3 batch entries",
        ),
        (&["--length", "64K", "--key-lengths", "65K"], "66560"),
        (&["--length", "64K", "--softcap", "3"], "--softcap"),
        (
            &["--length", "64K", "--rank", "1", "--compare"],
            "--compare",
        ),
        (&["--length", "64K", "--sharding", "ring"], "zigzag"),
        (&["--length", "64K", "--rank", "1", "--all"], "--all"),
        (
            &["--length", "64K", "--strategy", "best"],
            "mesh:HEAD_RANKS",
        ),
        (
            &[
                "--length",
                "64K",
                "--heads",
                "4",
                "--strategy",
                "head-parallel",
            ],
            "among 8 ranks",
        ),
        (&["--length", "64K", "--strategy", "mesh:3"], "groups of 3"),
        (
            &["--length", "64K", "--svg", "no/such/folder/plan.svg"],
            "cannot write",
        ),
    ];
    assert!(plan(&length).status.success());
    for (arguments, word) in cases {
        let result = plan(arguments);
        let error = String::from_utf8(result.stderr).unwrap();
        assert_eq!(result.status.code(), Some(2), "{arguments:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(error.contains(word), "{error}");
        assert!(result.stdout.is_empty());
    }
}
