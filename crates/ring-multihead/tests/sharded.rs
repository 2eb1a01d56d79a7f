//! One rank or many: the same numbers, in the modules, the model, and training.

use std::{sync::Arc, time::Duration};

use burn::{
    data::{
        dataloader::{DataLoader, DataLoaderIterator, Progress},
        dataset::DatasetError,
    },
    lr_scheduler::constant::ConstantLr,
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    optim::{GradientsParams, SgdConfig},
    tensor::{Device, Distribution, Tensor, TensorData},
    train::{
        InferenceStep, Interrupter, Learner, SupervisedTraining, TrainOutput, TrainStep,
        TrainingStrategy, logger::InMemoryMetricLogger, metric::LossMetric,
        renderer::CliMetricsRenderer,
    },
};
use ring_burn::{
    Communicator, HilbertOrder, HostBuffer, Loopback, Ring, RingError, RingStrategy, SequenceItem,
    Sharding, shard_tensor, sum_gradients,
};
use ring_multihead::{
    AttentionKind, LongNet, LongNetConfig, MultiheadDilatedAttentionConfig, SequenceLoss,
    TokenWindows, create_multihead_dilated_attention,
};

const DEADLINE: Duration = Duration::from_secs(60);

fn config() -> LongNetConfig {
    LongNetConfig::new(vec![16, 32, 64], vec![1, 2, 4])
        .with_embed_dim(32)
        .with_num_layers(2)
        .with_num_kv_heads(Some(2))
        .with_sub_layer_norm(true)
}

fn init(config: &LongNetConfig) -> LongNet {
    let device = Device::flex().autodiff();
    config.try_init(&device).unwrap().materialize()
}

fn model(dropout: f64) -> LongNet {
    init(&config().with_dropout(dropout))
}

fn windows() -> TokenWindows {
    let text: Vec<u8> = (0..500_u32).map(|i| (i * i % 251) as u8).collect();
    TokenWindows::new(text.into(), vec![3, 200], 70, 11)
}

/// Every gradient of a model, one after the other.
struct Collect<'a>(&'a mut GradientsParams, Vec<f32>);

impl ModuleVisitor for Collect<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self
            .0
            .remove::<D>(param.id)
            .expect("every parameter has a gradient");
        self.1.extend(gradient.into_data().iter::<f32>());
    }
}

/// Loss and gradients over so many ranks; rank 0's, after checking that all ranks hold the same.
fn loss_and_gradients(model: &LongNet, ranks: usize, sharding: Sharding) -> (f32, Vec<f32>) {
    let results = Loopback::run::<HostBuffer, _>(ranks, DEADLINE, |endpoint| {
        let ring = Ring::new(Communicator::new(Arc::new(endpoint)), sharding, 0).unwrap();
        let model = model.clone().fork(&Device::flex().autodiff());
        let TrainOutput { grads, item } = TrainStep::step(&model, windows().on_rank(&ring));
        let mut gradients = sum_gradients(&model, grads, ring.communicator()).unwrap();
        let mut collect = Collect(&mut gradients, Vec::new());
        model.visit(&mut collect);
        (item.loss.into_scalar::<f32>(), collect.1)
    });
    let mut results: Vec<(f32, Vec<f32>)> = results.into_iter().map(Result::unwrap).collect();
    let first = results.swap_remove(0);
    assert!(results.iter().all(|other| *other == first), "ranks differ");
    first
}

fn assert_near(got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    let norm = expected.iter().map(|x| x * x).sum::<f32>().sqrt();
    let error = got
        .iter()
        .zip(expected)
        .map(|(a, b)| (a - b).powi(2))
        .sum::<f32>()
        .sqrt();
    assert!(error <= 1e-4 * norm, "off by {}", error / norm);
}

#[test]
fn loss_and_gradients_do_not_depend_on_the_number_of_ranks() {
    // With dropout too: it is keyed by global position.
    let masked = config()
        .with_window(Some((40, 0)))
        .with_softcap(Some(2.0))
        .with_alibi(true)
        .with_attention_dropout(0.3);
    for model in [model(0.0), model(0.2), init(&masked)] {
        let (loss, gradients) = loss_and_gradients(&model, 1, Sharding::Contiguous);
        assert!(loss.is_finite() && gradients.iter().all(|x| x.is_finite()));
        for (ranks, sharding) in [
            (2, Sharding::Zigzag),
            (3, Sharding::Contiguous),
            (
                4,
                Sharding::Striped {
                    chunk_size: Some(3),
                },
            ),
        ] {
            let (other_loss, other_gradients) = loss_and_gradients(&model, ranks, sharding);
            assert!(
                (loss - other_loss).abs() < 1e-5 * loss,
                "{loss} {other_loss}"
            );
            assert_near(&other_gradients, &gradients);
        }
    }
}

#[test]
fn the_sharded_layer_equals_the_whole_one() {
    let device = Device::flex();
    let config = MultiheadDilatedAttentionConfig::new(24, 4, vec![8, 32], vec![1, 2])
        .with_num_kv_heads(Some(2))
        .with_causal(true)
        .with_rotary_base(Some(100.0));
    let layer = config.init(&device);
    let input = Tensor::<3>::random([2, 33, 24], Distribution::Default, &device);
    let whole = layer.forward(input.clone(), &Ring::single(33).unwrap());
    let parts = Loopback::run::<HostBuffer, _>(3, DEADLINE, |endpoint| {
        let ring = Ring::new(Communicator::new(Arc::new(endpoint)), Sharding::Zigzag, 33).unwrap();
        let own = layer.forward(shard_tensor(input.clone(), 1, &ring).unwrap(), &ring);
        let expected = shard_tensor(whole.clone(), 1, &ring).unwrap();
        (own - expected).abs().max().into_scalar::<f32>()
    });
    for part in parts {
        assert!(part.unwrap() < 1e-5);
    }
}

/// The options reach the attention: each of them changes the output, for full and for dilated attention.
#[test]
fn options_of_the_configuration_count() {
    let device = Device::flex().autodiff();
    let input = Tensor::<3>::random([1, 24, 16], Distribution::Default, &device);
    let ring = Ring::single(24).unwrap();
    for lengths in [vec![], vec![24]] {
        let rates = vec![1; lengths.len()];
        let plain = MultiheadDilatedAttentionConfig::new(16, 4, lengths, rates);
        let base = plain.init(&device).materialize();
        let output = |config: &MultiheadDilatedAttentionConfig| {
            let layer = create_multihead_dilated_attention(AttentionKind::Auto, config, &device);
            // The same weights: a record knows nothing of options.
            let layer = layer.unwrap().load_record(base.clone().into_record());
            layer.forward(input.clone(), &ring).into_data()
        };
        let expected = output(&plain);
        assert_eq!(output(&plain), expected);
        for changed in [
            plain.clone().with_causal(true),
            plain.clone().with_window(Some((3, 5))),
            plain.clone().with_softcap(Some(0.01)),
            plain.clone().with_alibi(true),
            plain.clone().with_attention_dropout(0.5),
        ] {
            assert_ne!(output(&changed), expected, "{changed}");
        }
    }
}

#[test]
fn self_attention_refuses_a_ring_for_cross_attention() {
    let layer = MultiheadDilatedAttentionConfig::new(8, 2, vec![], vec![]).init(&Device::flex());
    let input = Tensor::<3>::zeros([1, 6, 8], &Device::flex());
    let ring = || Ring::single(6).unwrap();
    for ring in [
        ring().with_keys(Sharding::Contiguous, 7),
        ring().with_keys(Sharding::Zigzag, 6),
        ring().with_query_offset(2),
    ] {
        let error = layer.try_forward(input.clone(), &ring).unwrap_err();
        assert!(error.to_string().contains("self-attention"), "{error}");
    }
    layer
        .try_forward(input, &ring().with_key_lengths(vec![4]))
        .unwrap();
}

/// Output and gradient of the input of one layer of a kind, whole, computed on so many ranks, and the bytes that they received
/// together.
fn of_kind(kind: AttentionKind, ranks: usize) -> (Vec<f32>, u64) {
    let device = Device::flex().autodiff();
    let config = MultiheadDilatedAttentionConfig::new(24, 4, vec![8, 40], vec![1, 2])
        .with_causal(true)
        .with_rotary_base(Some(100.0))
        .with_grid((kind == AttentionKind::Hilbert).then(|| HilbertOrder::new(&[5, 8]).unwrap()));
    let fixed = config.clone().init(&device).materialize();
    let record = fixed.map(&mut Deterministic(0.3)).into_record();
    let input = Tensor::<3>::from_data(
        TensorData::new(
            (0..40 * 24)
                .map(|i| ((i * 37 % 101) as f32) / 50.0 - 1.0)
                .collect::<Vec<_>>(),
            [1, 40, 24],
        ),
        &Device::flex(),
    );
    let parts = Loopback::run::<HostBuffer, _>(ranks, DEADLINE, |endpoint| {
        let communicator = Communicator::new(Arc::new(endpoint));
        let ring = Ring::new(communicator, Sharding::Zigzag, 40).unwrap();
        let device = Device::flex().autodiff();
        let layer = create_multihead_dilated_attention(kind, &config, &device)
            .unwrap()
            .load_record(record.clone());
        let own = shard_tensor(input.clone(), 1, &ring).unwrap();
        let own = Tensor::<3>::from_data(own.into_data(), &device).require_grad();
        let output = layer.try_forward(own.clone(), &ring).unwrap();
        let gradients = (output.clone() * output.clone()).sum().backward();
        let explained = layer.explain(1, &ring).unwrap();
        assert!(explained.contains("because"), "{explained}");
        let numbers = |tensor: Tensor<3>| tensor.into_data().iter::<f32>().collect::<Vec<_>>();
        (
            ring.positions(),
            numbers(output.inner()),
            numbers(own.grad(&gradients).unwrap()),
            ring.communicator().traffic().bytes_received,
        )
    });
    let mut whole = vec![f32::NAN; 2 * 40 * 24];
    let mut received = 0;
    for part in parts {
        let (positions, output, gradient, bytes) = part.unwrap();
        received += bytes;
        for (row, position) in positions.into_iter().enumerate() {
            let own = row * 24..(row + 1) * 24;
            whole[position * 24..][..24].copy_from_slice(&output[own.clone()]);
            whole[(40 + position) * 24..][..24].copy_from_slice(&gradient[own]);
        }
    }
    (whole, received)
}

/// Sets every parameter to numbers that follow from its size alone.
struct Deterministic(f32);

impl ModuleMapper for Deterministic {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let scale = self.0;
        param.map(|tensor| {
            let shape = tensor.dims();
            let count: usize = shape.iter().product();
            let numbers = (0..count).map(|i| scale * (((i * 29 + 7) % 83) as f32 / 41.0 - 1.0));
            let data = TensorData::new(numbers.collect::<Vec<f32>>(), shape);
            Tensor::from_data(data, &tensor.device())
        })
    }
}

#[test]
fn kinds_give_the_same_numbers_on_any_number_of_ranks() {
    let (expected, _) = of_kind(AttentionKind::Standard, 1);
    let mut received = Vec::new();
    for (kind, ranks) in [
        ("auto", 4),
        ("auto", 1),
        ("ring", 4),
        ("ring-query", 4),
        ("all-gather", 4),
        ("head-parallel", 4),
        ("mesh:2", 4),
        ("production", 2),
    ] {
        let (got, bytes) = of_kind(kind.parse().unwrap(), ranks);
        received.push(bytes);
        for (got, expected) in got.iter().zip(&expected) {
            assert!((got - expected).abs() < 1e-5, "{kind} on {ranks} ranks");
        }
    }
    // They do differ: in what travels, on four ranks.
    for (index, bytes) in received[2..7].iter().enumerate() {
        assert!(!received[2..7][..index].contains(bytes), "{received:?}");
    }
    // So short a sequence is left to one rank: as much travels as if heads were divided, but all of it to that one and back.
    assert_eq!(received[0], received[5], "{received:?}");
    // Other positions, other numbers; but the same on any number of ranks.
    let (on_one, _) = of_kind(AttentionKind::Hilbert, 1);
    assert_ne!(on_one, expected);
    for (got, expected) in of_kind(AttentionKind::Hilbert, 3).0.iter().zip(&on_one) {
        assert!((got - expected).abs() < 1e-5);
    }
}

#[test]
fn layers_of_kind_production_share_a_recovery() {
    let device = Device::flex();
    let config = MultiheadDilatedAttentionConfig::new(16, 2, vec![8], vec![1]);
    let production = AttentionKind::Production;
    let layer = create_multihead_dilated_attention(production, &config, &device).unwrap();
    let other = create_multihead_dilated_attention(production, &config, &device).unwrap();
    let ring = Ring::single(9).unwrap();
    let input = Tensor::<3>::zeros([1, 9, 16], &device);
    other.forward(layer.forward(input, &ring), &ring.clone());
    let recovering = ring.recovering();
    assert_eq!(recovering.recovery().unwrap().statistics().passes, 2);
}

#[test]
fn kinds_that_cannot_run_say_why() {
    let device = Device::flex();
    let config = MultiheadDilatedAttentionConfig::new(16, 2, vec![8], vec![1]);
    let input = Tensor::<3>::zeros([1, 9, 16], &device);
    let make =
        |kind: &str| create_multihead_dilated_attention(kind.parse().unwrap(), &config, &device);
    let error = make("hilbert").unwrap_err().to_string();
    assert!(error.contains("grid"), "{error}");
    for (kind, told) in [
        ("standard", "one rank"),
        ("head-parallel", "2 key/value heads"),
        ("mesh:2", "3 ranks"),
    ] {
        let layer = make(kind).unwrap();
        let refused = Loopback::run::<HostBuffer, _>(3, DEADLINE, |endpoint| {
            let communicator = Communicator::new(Arc::new(endpoint));
            let ring = Ring::new(communicator, Sharding::Contiguous, 9).unwrap();
            let own = shard_tensor(input.clone(), 1, &ring).unwrap();
            layer.try_forward(own, &ring).unwrap_err().to_string()
        });
        for error in refused {
            let error = error.unwrap();
            assert!(error.contains(told), "{error}");
        }
    }
}

#[test]
fn bad_sizes_are_refused() {
    let device = Device::flex();
    let good = MultiheadDilatedAttentionConfig::new(16, 4, vec![8], vec![1]);
    for bad in [
        MultiheadDilatedAttentionConfig::new(15, 4, vec![8], vec![1]),
        MultiheadDilatedAttentionConfig::new(16, 0, vec![8], vec![1]),
        MultiheadDilatedAttentionConfig::new(16, 4, vec![8], vec![1, 2]),
        MultiheadDilatedAttentionConfig::new(16, 4, vec![8], vec![0]),
        good.clone().with_num_kv_heads(Some(3)),
        good.clone().with_dropout(1.0),
        good.clone().with_dropout(f64::NAN),
        good.clone().with_attention_dropout(1.0),
        good.clone().with_softcap(Some(0.0)),
        good.clone().with_window(Some((-2, 0))),
        good.clone().with_causal(true).with_window(Some((2, 1))),
        MultiheadDilatedAttentionConfig::new(12, 4, vec![8], vec![1]).with_rotary_base(Some(10.0)),
        good.clone().with_rotary_base(Some(0.0)),
    ] {
        assert!(bad.try_init(&device).is_err(), "{bad}");
    }
    let layer = good.init(&device);
    for shape in [[1, 7, 16], [1, 8, 15]] {
        let input = Tensor::<3>::zeros(shape, &device);
        assert!(matches!(
            layer.try_forward(input, &Ring::single(8).unwrap()),
            Err(RingError::Shape { .. })
        ));
    }
}

/// Hands out the same windows over and over.
struct Loader<T> {
    item: T,
    steps: usize,
}

struct Items<'a, T> {
    loader: &'a Loader<T>,
    done: usize,
}

impl<T: Clone> Iterator for Items<'_, T> {
    type Item = Result<T, DatasetError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.done += 1;
        (self.done <= self.loader.steps).then(|| Ok(self.loader.item.clone()))
    }
}

impl<T: Clone> DataLoaderIterator<T> for Items<'_, T> {
    fn progress(&self) -> Progress {
        Progress::new(self.done, self.loader.steps, None)
    }
}

impl<T: Clone + Send + Sync + 'static> DataLoader<T> for Loader<T> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<T> + 'a> {
        Box::new(Items {
            loader: self,
            done: 0,
        })
    }

    fn num_items(&self) -> usize {
        self.steps
    }

    fn to_device(&self, _: &Device) -> Arc<dyn DataLoader<T>> {
        Arc::new(Self {
            item: self.item.clone(),
            steps: self.steps,
        })
    }

    fn slice(&self, _: usize, _: usize) -> Arc<dyn DataLoader<T>> {
        self.to_device(&Device::flex())
    }
}

/// All parameters of a model, one after the other.
struct Parameters(Vec<f32>);

impl ModuleVisitor for Parameters {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.extend(param.val().into_data().iter::<f32>());
    }
}

fn launch<M>(
    model: M,
    item: TokenWindows,
    ranks: usize,
    accumulation: usize,
) -> burn::train::LearningResult<M>
where
    M: TrainStep<Input = TokenWindows, Output = SequenceLoss>
        + InferenceStep<Input = TokenWindows, Output = SequenceLoss>
        + Module
        + std::fmt::Display
        + Send
        + 'static,
{
    let strategy = RingStrategy::new(ranks, Sharding::Zigzag, Device::flex().autodiff())
        .unwrap()
        .with_deadline(DEADLINE);
    launch_with(strategy, model, item, 3, accumulation, Interrupter::new())
}

fn launch_with<M>(
    strategy: RingStrategy,
    model: M,
    item: TokenWindows,
    steps: usize,
    accumulation: usize,
    interrupter: Interrupter,
) -> burn::train::LearningResult<M>
where
    M: TrainStep<Input = TokenWindows, Output = SequenceLoss>
        + InferenceStep<Input = TokenWindows, Output = SequenceLoss>
        + Module
        + std::fmt::Display
        + Send
        + 'static,
{
    let directory = tempfile::tempdir().unwrap();
    SupervisedTraining::new(
        directory.path(),
        Arc::new(Loader {
            item: item.clone(),
            steps,
        }),
        Arc::new(Loader { item, steps: 1 }),
    )
    .with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)))
    .with_interrupter(interrupter)
    .with_application_logger(None)
    .with_metric_logger(InMemoryMetricLogger::new())
    .renderer(Box::new(CliMetricsRenderer::new()))
    .metric_train_numeric(LossMetric::new())
    .metric_valid_numeric(LossMetric::new())
    .grads_accumulation(accumulation)
    .num_epochs(2)
    .launch(Learner::new(
        model,
        SgdConfig::new().init(),
        ConstantLr::new(0.1),
    ))
}

#[test]
fn training_gives_the_same_model_on_any_number_of_ranks() {
    let model = model(0.1);
    for accumulation in [1, 2] {
        let trained: Vec<Vec<f32>> = [1, 2, 3]
            .into_iter()
            .map(|ranks| {
                let result = launch(model.clone(), windows(), ranks, accumulation);
                assert!(result.error.is_none());
                let mut parameters = Parameters(Vec::new());
                result.model.visit(&mut parameters);
                parameters.0
            })
            .collect();
        let mut before = Parameters(Vec::new());
        model.visit(&mut before);
        assert_ne!(before.0, trained[0], "nothing was learned");
        for other in &trained[1..] {
            let difference = |a: &[f32], b: &[f32]| {
                a.iter()
                    .zip(b)
                    .map(|(a, b)| (a - b).abs())
                    .fold(0.0, f32::max)
            };
            let moved = difference(&before.0, &trained[0]);
            assert!(difference(other, &trained[0]) < 1e-3 * moved);
        }
    }
}

/// What a process is given: each rank has its own model, items and number of steps, and is led by rank 0.
fn launch_processes(
    own: impl Fn(usize) -> (LongNet, TokenWindows, usize) + Sync,
) -> Vec<Result<LongNet, String>> {
    let results = Loopback::run::<HostBuffer, _>(3, DEADLINE, |endpoint| {
        let everyone = Communicator::new(Arc::new(endpoint));
        let (model, item, steps) = own(everyone.rank());
        let device = Device::flex().autodiff();
        let strategy = RingStrategy::of_process(everyone, Sharding::Zigzag, device).unwrap();
        let result = launch_with(strategy, model, item, steps, 2, Interrupter::new());
        match result.error {
            None => Ok(result.model),
            Some(error) => Err(error.to_string()),
        }
    });
    results.into_iter().map(Result::unwrap).collect()
}

#[test]
fn ranks_with_loops_of_their_own_train_the_same_model() {
    let model = model(0.1);
    let parameters = |model: &LongNet| {
        let mut parameters = Parameters(Vec::new());
        model.visit(&mut parameters);
        parameters.0
    };
    let expected = parameters(&launch(model.clone(), windows(), 3, 2).model);
    for trained in launch_processes(|_| (model.clone(), windows(), 3)) {
        assert_eq!(parameters(&trained.unwrap()), expected);
    }
}

#[test]
fn ranks_that_are_given_different_things_end_with_errors_that_say_so() {
    let model = model(0.0);
    let failures = |own: &(dyn Fn(usize) -> (LongNet, TokenWindows, usize) + Sync)| {
        let failures = launch_processes(own).into_iter().map(Result::unwrap_err);
        failures.collect::<Vec<_>>()
    };
    let other = TokenWindows::new(vec![1; 500].into(), vec![0, 3], 70, 0);
    let said = failures(&|rank| match rank {
        2 => (model.clone(), other.clone(), 3),
        _ => (model.clone(), windows(), 3),
    });
    let expected = "the loader of rank 2 gives another item than that of rank 0";
    assert!(said.iter().all(|said| said.contains(expected)), "{said:?}");

    let said = failures(&|rank| (model.clone(), windows(), if rank == 1 { 2 } else { 3 }));
    let expected = "the loader of rank 1 has fewer items than that of rank 0";
    assert!(said.iter().all(|said| said.contains(expected)), "{said:?}");

    let another = crate::model(0.0);
    let said = failures(&|rank| match rank {
        1 => (another.clone(), windows(), 3),
        _ => (model.clone(), windows(), 3),
    });
    let expected = "ranks start from different parameters";
    assert!(said.iter().all(|said| said.contains(expected)), "{said:?}");
}

/// Of data that cannot be read, a checkpoint that cannot be written and the like rank 0 alone knows.
#[test]
fn a_training_that_fails_beside_the_ranks_ends_with_an_error_on_all() {
    let model = model(0.0);
    let results = Loopback::run::<HostBuffer, _>(3, DEADLINE, |endpoint| {
        let everyone = Communicator::new(Arc::new(endpoint));
        let interrupter = Interrupter::new();
        if everyone.rank() == 0 {
            interrupter.fail(DatasetError::new(std::io::Error::other("no such disk")));
        }
        let device = Device::flex().autodiff();
        let strategy = RingStrategy::of_process(everyone, Sharding::Zigzag, device).unwrap();
        let result = launch_with(strategy, model.clone(), windows(), 3, 1, interrupter);
        result.error.map(|error| error.to_string())
    });
    for said in results {
        let said = said.unwrap().unwrap_or_default();
        assert!(said.contains("no such disk"), "{said:?}");
    }
}

/// A model that panics on one rank in the middle of a training step.
#[derive(Module, Debug)]
struct Faulty {
    inner: LongNet,
}

impl TrainStep for Faulty {
    type Input = TokenWindows;
    type Output = SequenceLoss;

    fn step(&self, windows: TokenWindows) -> TrainOutput<SequenceLoss> {
        let output = TrainStep::step(&self.inner, windows);
        if std::thread::current().name() == Some("rank-1") {
            panic!("out of luck");
        }
        TrainOutput {
            grads: output.grads,
            item: output.item,
        }
    }
}

impl InferenceStep for Faulty {
    type Input = TokenWindows;
    type Output = SequenceLoss;

    fn step(&self, windows: TokenWindows) -> SequenceLoss {
        InferenceStep::step(&self.inner, windows)
    }
}

#[test]
fn a_rank_that_panics_ends_training_with_errors_that_name_it() {
    let result = launch(Faulty { inner: model(0.0) }, windows(), 3, 1);
    let error = result.error.expect("training failed").to_string();
    assert!(error.contains("device 1 failed: out of luck"), "{error}");
    // The other ranks say whose fault it was.
    assert_eq!(
        error.matches("rank 1 aborted: out of luck").count(),
        2,
        "{error}"
    );
}

#[test]
#[should_panic(expected = "reaches beyond 500 tokens")]
fn windows_must_lie_in_the_text() {
    let _ = TokenWindows::new(vec![0; 500].into(), vec![430], 70, 0);
}

#[test]
fn a_model_on_whole_data_is_a_model_on_one_rank() {
    let model = model(0.0).valid();
    let expected = loss_and_gradients(&model.clone().train(), 2, Sharding::Contiguous).0;
    let item = InferenceStep::step(&model, windows());
    let data: TensorData = item.loss.into_data();
    let loss = data.iter::<f32>().next().unwrap();
    assert!((loss - expected).abs() < 1e-4, "{loss} {expected}");
}
