//! Windows, documents, padding, softcap, ALiBi, dropout and cross-attention.

mod judged;

use std::{sync::Arc, time::Duration};

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use judged::{Problem, ROWS, dropped};
use ring_burn::{
    Communicator, DilatedAttentionConfig, Documents, HostBuffer, Loopback, PatternError, Ring,
    RingAttention, RingAttentionConfig, RingError, Sharding, SpecError,
};
use ring_core::Shape;

const DEADLINE: Duration = Duration::from_secs(60);

#[test]
fn everything_together_is_what_the_oracle_says() {
    judged::everything_together(&Device::flex());
}

#[test]
fn cross_attention_is_what_the_oracle_says() {
    judged::cross_attention(&Device::flex());
}

#[test]
fn what_is_dropped_depends_on_seed_stream_entry_head_and_positions_alone() {
    judged::dropped_weights(&Device::flex());
}

#[test]
fn nothing_is_dropped_outside_of_training() {
    let attention = RingAttentionConfig::new().with_dropout(0.5).init();
    let ring = Ring::single(ROWS).unwrap();
    let (plain, autodiff) = (Device::flex(), Device::flex().autodiff());
    let any = |attention: &RingAttention, device: &Device| {
        dropped(attention, 1, &ring, device).contains(&true)
    };
    assert!(any(&attention, &autodiff));
    assert!(!any(&attention, &plain), "without autodiff");
    let valid = attention.clone().valid();
    assert!(!any(&valid, &autodiff), "when validating");
    assert!(any(&valid.train(), &autodiff));
}

#[test]
fn checkpointing_drops_the_same() {
    let problem = Problem {
        shape: Shape {
            batch: 1,
            query_heads: 2,
            kv_heads: 2,
            head_dim: 8,
        },
        queries: 24,
        keys: 24,
    };
    let gradients = |device: Device| {
        let leaves = [0, 1, 2].map(|tensor| {
            Tensor::<4>::from_data(problem.tensor(tensor).into_data(), &device).require_grad()
        });
        let [query, key, value] = leaves.clone().map(|leaf| leaf * 2.0);
        let attention = RingAttentionConfig::new().with_dropout(0.5).init();
        let ring = Ring::single(24).unwrap().with_seed(8);
        let output = attention.forward(query, key, value, &ring);
        let mut gradients = output.exp().sum().backward();
        leaves.map(|leaf| {
            let gradient = leaf.grad_remove(&mut gradients).unwrap().into_data();
            gradient.iter::<f32>().collect::<Vec<f32>>()
        })
    };
    let plain = gradients(Device::flex().autodiff());
    let checkpointed = gradients(Device::flex().autodiff().gradient_checkpointing());
    assert_eq!(plain, checkpointed);
}

#[test]
fn configurations_that_contradict_themselves_are_refused() {
    let spec = |error: SpecError| RingError::Spec(error);
    let new = RingAttentionConfig::new;
    let cases = [
        (
            new().with_window(Some((-2, 0))),
            RingError::Window { left: -2, right: 0 },
        ),
        (
            new().with_window(Some((3, i64::MIN))),
            RingError::Window {
                left: 3,
                right: i64::MIN,
            },
        ),
        (
            new().with_causal(true).with_window(Some((3, 2))),
            spec(PatternError::Contradiction { right: 2 }.into()),
        ),
        (new().with_softcap(Some(0.0)), spec(SpecError::Softcap(0.0))),
        (
            new().with_softcap(Some(-1.0)),
            spec(SpecError::Softcap(-1.0)),
        ),
        (
            new().with_softcap(Some(f64::INFINITY)),
            spec(SpecError::Softcap(f32::INFINITY)),
        ),
        (new().with_dropout(1.0), spec(SpecError::Dropout(1.0))),
        (new().with_dropout(-0.5), spec(SpecError::Dropout(-0.5))),
        (
            new().with_alibi_slopes(Some(vec![0.5, f64::INFINITY])),
            spec(SpecError::Slope {
                index: 1,
                slope: f32::INFINITY,
            }),
        ),
    ];
    for (config, error) in cases {
        assert_eq!(config.try_init().unwrap_err(), error, "{config}");
        let dilated = DilatedAttentionConfig::new(vec![8, 16], vec![1, 2])
            .with_causal(config.causal)
            .with_window(config.window)
            .with_softcap(config.softcap)
            .with_alibi_slopes(config.alibi_slopes)
            .with_dropout(config.dropout);
        assert_eq!(dilated.try_init().unwrap_err(), error);
    }
    for window in [(3, 0), (3, -1), (-1, 0), (-1, -1), (i64::MAX, 0)] {
        let config = new().with_causal(true).with_window(Some(window));
        config.try_init().unwrap();
    }
}

#[test]
fn batches_that_do_not_fit_are_refused() {
    let ring = || Ring::single(16).unwrap();
    let tensor = || Tensor::<4>::zeros([2, 3, 16, 4], &Device::flex().autodiff());
    let refused = |config: &RingAttentionConfig, ring: Ring| {
        let attention = config.init();
        let error = attention.try_forward(tensor(), tensor(), tensor(), &ring);
        match error.unwrap_err() {
            RingError::Spec(error) => error,
            other => panic!("{other}"),
        }
    };
    let plain = RingAttentionConfig::new();
    let documents = |lengths: Vec<Vec<usize>>| ring().with_documents(Documents::per_entry(lengths));
    assert_eq!(
        refused(&plain, ring().with_documents(Documents::new(vec![7, 8]))),
        SpecError::DocumentLengths {
            entry: 0,
            total: 15,
            key_length: 16
        }
    );
    assert_eq!(
        refused(&plain, documents(vec![vec![16], vec![9, 8]])),
        SpecError::DocumentLengths {
            entry: 1,
            total: 17,
            key_length: 16
        }
    );
    assert_eq!(
        refused(&plain, documents(vec![vec![16]; 3])),
        SpecError::Entries {
            what: "document lengths",
            got: 3,
            batch: 2
        }
    );
    assert_eq!(
        refused(&plain, ring().with_key_lengths(vec![16])),
        SpecError::Entries {
            what: "key lengths",
            got: 1,
            batch: 2
        }
    );
    assert_eq!(
        refused(&plain, ring().with_key_lengths(vec![0, 17])),
        SpecError::KeyLength {
            entry: 1,
            length: 17,
            key_length: 16
        }
    );
    assert!(matches!(
        refused(&plain, ring().with_query_offset(i64::MIN)),
        SpecError::TooLong { .. }
    ));
    assert_eq!(
        refused(&plain.clone().with_alibi_slopes(Some(vec![0.5; 2])), ring()),
        SpecError::Slopes {
            got: 2,
            query_heads: 3
        }
    );
    let first = usize::MAX / 8;
    assert!(matches!(
        refused(
            &plain.clone().with_dropout(0.5),
            ring().with_first_batch_entry(first)
        ),
        SpecError::DropoutCounter { .. }
    ));
    // What is not dropped is not counted.
    let attention = plain.init();
    let ring = ring().with_first_batch_entry(first);
    attention
        .try_forward(tensor(), tensor(), tensor(), &ring)
        .unwrap();
}

#[test]
fn documents_that_differ_between_ranks_are_found_out() {
    let results = Loopback::run::<HostBuffer, _>(2, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let ring = Ring::new(communicator, Sharding::Contiguous, 16).unwrap();
        let first = 7 + ring.rank();
        let ring = ring.with_documents(Documents::new(vec![first, 16 - first]));
        let tensor = || Tensor::<4>::zeros([1, 2, 8, 4], &Device::flex());
        let attention = RingAttentionConfig::new().init();
        let error = attention.try_forward(tensor(), tensor(), tensor(), &ring);
        error.unwrap_err().to_string()
    });
    for result in results {
        let error = result.unwrap();
        assert!(
            error.contains("documents") && error.contains("8,8"),
            "{error}"
        );
    }
}
