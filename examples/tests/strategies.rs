//! Every strategy gives the golden numbers, or says why it cannot serve.

mod golden_cases;

use std::{num::NonZero, thread};

use golden_cases::Case;
use ring_examples::{
    attend::{self, Input},
    command_line::Failure,
};

const SHARDINGS: [&str; 2] = ["contiguous", "zigzag"];

/// All strategies but the default one, on so many ranks, and whether they can serve so many key/value heads.
fn strategies(ranks: usize, kv_heads: usize) -> Vec<(String, bool)> {
    let always = ["ring-query", "all-gather", "one-rank"];
    let mut all: Vec<(String, bool)> = always.map(|name| (name.into(), true)).into();
    all.push(("head-parallel".into(), kv_heads.is_multiple_of(ranks)));
    all.extend((0..=ranks + 1).map(|head_ranks| {
        let divides = |number: usize| head_ranks > 0 && number.is_multiple_of(head_ranks);
        (
            format!("mesh:{head_ranks}"),
            divides(ranks) && divides(kv_heads),
        )
    }));
    all
}

/// Returns how many computations there were.
fn check(case: &Case) -> usize {
    let kv_heads = Input::open(&case.request(&[])).unwrap().shape().kv_heads;
    let mut computed = 0;
    for ranks in 1..=8 {
        for (strategy, serves) in strategies(ranks, kv_heads) {
            for sharding in SHARDINGS {
                let number = ranks.to_string();
                let more = ["--ranks", &number, "--sharding", sharding];
                let more = [&more[..], &["--strategy", &strategy]].concat();
                if serves {
                    let how = format!("on {ranks} ranks, {sharding}, {strategy}");
                    case.check(&case.compute(&more), &how);
                    computed += 1;
                } else {
                    let Err(Failure::Input(line)) = attend::compute(&case.request(&more)) else {
                        panic!("{strategy} served {} on {ranks} ranks", case.name)
                    };
                    assert!(line.contains(&strategy), "{line}");
                }
            }
        }
    }
    computed
}

#[test]
fn golden_numbers_come_out_of_every_strategy() {
    let cases = Case::all();
    let parts = thread::available_parallelism().map_or(1, NonZero::get);
    let computed: usize = thread::scope(|scope| {
        let part = |part: usize| {
            let own = cases.iter().skip(part).step_by(parts);
            own.map(check).sum::<usize>()
        };
        let threads: Vec<_> = (0..parts)
            .map(|index| scope.spawn(move || part(index)))
            .collect();
        let counts = threads.into_iter().map(|thread| thread.join().unwrap());
        counts.sum()
    });
    // At least those that serve any heads, and the mesh of 1.
    assert!(computed >= cases.len() * 8 * SHARDINGS.len() * 4);
}
