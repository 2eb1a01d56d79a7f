//! Trains a LongNet language model with its sequence sharded over several ranks.

mod args;
mod curve;
mod evaluation;
mod feed;
mod progress;
mod sample;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Instant,
};

use burn::{
    grad_clipping::GradientClippingConfig,
    lr_scheduler::{
        LrSchedulerConfig, LrSchedulerRecord, composed::ComposedLrSchedulerConfig,
        cosine::CosineAnnealingLrSchedulerConfig, linear::LinearLrSchedulerConfig,
    },
    module::Module,
    optim::{AdamWConfig, OptimizerRecord},
    tensor::Device,
    train::{
        Interrupter, Learner, SupervisedTraining, TrainingStrategy,
        checkpoint::KeepLastNCheckpoints,
        renderer::{MetricsRenderer, default_renderer},
    },
};
use ring_burn::{Auto, Pattern, RingError, RingStrategy, Shape, Strategy, parameter_checksum};
use ring_core::AttentionSpec;
use ring_examples::{
    command_line::{self, Failure},
    placement::{Placement, Ranks},
    strategy_option::Wanted,
};
use ring_multihead::{LongNet, LongNetConfig};

use args::Args;
use curve::{BitsPerByteMetric, Curve};
use feed::{Feed, Text};

fn main() -> ExitCode {
    command_line::run(|args: &Args| {
        let prepared = prepare(args)?;
        run(args, prepared).map_err(Failure::Run)
    })
}

/// Everything that can be wrong with the input has been checked.
struct Prepared {
    text: Text,
    model: LongNet,
    placement: Placement,
    /// Ranks that share a sequence.
    ranks: usize,
    strategy: RingStrategy,
}

fn prepare(args: &Args) -> Result<Prepared, Failure> {
    args.check().map_err(Failure::Input)?;
    // Before anything that may be wrong in one process alone: the others would wait for it until the deadline.
    let (placement, ranks) = args.placement()?;
    prepare_on(args, placement.clone(), ranks).inspect_err(|failure| placement.abort(failure))
}

fn prepare_on(args: &Args, placement: Placement, ranks: usize) -> Result<Prepared, Failure> {
    let text = Text::read(args.data.as_deref(), args.seq_length).map_err(Failure::Input)?;
    let devices = devices(args, &placement)?;
    let model = initial_model(args, &devices[0]).map_err(Failure::input)?;
    if let Some(epoch) = args.resume {
        check_checkpoint(args, epoch, &model).map_err(Failure::Input)?;
    }
    let checksum = format!("{} bytes, {:016x}", text.bytes.len(), text.checksum());
    let mut terms = args.unseen();
    terms.push(("the text", checksum));
    placement.agree("train", &terms)?;
    let strategy = strategy(args, &placement, ranks, devices).map_err(Failure::input)?;
    #[cfg(feature = "cube")]
    let strategy = with_gpu(args, &placement, strategy)?;
    if placement.has_first_rank() {
        fs::create_dir_all(&args.artifacts).map_err(|error| {
            Failure::Input(format!("cannot make {}: {error}", args.artifacts.display()))
        })?;
    }
    Ok(Prepared {
        text,
        model,
        placement,
        ranks,
        strategy,
    })
}

/// The model before training on a device: the same parameters on every device, so drawn on one that is everywhere.
fn initial_model(args: &Args, device: &Device) -> Result<LongNet, RingError> {
    let everywhere = Device::flex().autodiff();
    everywhere.seed(args.seed);
    device.seed(args.seed);
    let model = model_config(args).try_init(&everywhere)?.materialize();
    // Parameters are drawn when they are first looked at.
    parameter_checksum(&model);
    Ok(match *device == everywhere {
        true => model,
        false => model.fork(device),
    })
}

/// The autodiff devices of the ranks of this process.
fn devices(args: &Args, placement: &Placement) -> Result<Vec<Device>, Failure> {
    let ranks = match &placement.ranks {
        Ranks::Threads(ranks) => 0..*ranks,
        Ranks::Processes(everyone) => everyone.rank()..everyone.rank() + 1,
    };
    let device = |rank| burn_device(args, placement.rank_on_this_machine(rank));
    ranks
        .map(|rank| device(rank).map(Device::autodiff))
        .collect()
}

#[cfg(feature = "cube")]
fn burn_device(args: &Args, rank: usize) -> Result<Device, Failure> {
    let gpu = args.device.of_rank(rank)?;
    Ok(gpu.map_or_else(Device::flex, Device::new))
}

/// Has a rank that is a process exchange the memory of its GPU as the transport does.
#[cfg(feature = "cube")]
fn with_gpu(
    args: &Args,
    placement: &Placement,
    strategy: RingStrategy,
) -> Result<RingStrategy, Failure> {
    let Ranks::Processes(everyone) = &placement.ranks else {
        return Ok(strategy);
    };
    match placement.gpu(&args.device, everyone)? {
        Some((device, communicator)) => strategy
            .with_device_communicator(device, communicator)
            .map_err(Failure::input),
        None => Ok(strategy),
    }
}

#[cfg(not(feature = "cube"))]
fn burn_device(args: &Args, _rank: usize) -> Result<Device, Failure> {
    args.device.check().map(|()| Device::flex())
}

fn strategy(
    args: &Args,
    placement: &Placement,
    ranks: usize,
    devices: Vec<Device>,
) -> Result<RingStrategy, RingError> {
    let device = devices[0].clone();
    let strategy = match &placement.ranks {
        Ranks::Threads(_) => RingStrategy::new(ranks, args.sharding, device)?,
        Ranks::Processes(everyone) => {
            RingStrategy::of_process(everyone.clone(), args.sharding, device)?
        }
    };
    let strategy = strategy
        .with_devices(devices)?
        .with_deadline(placement.deadline)
        .with_data_parallel(args.data_parallel)?;
    let strategy = match args.strategy.strategy {
        Wanted::Auto => strategy.with_auto(Auto::default()),
        Wanted::This(how) => {
            check_strategy(args, how, ranks)?;
            strategy.with_attention_strategy(how)
        }
    };
    Ok(match args.threads {
        Some(threads) => strategy.with_threads_per_rank(threads),
        None => strategy,
    })
}

/// Says before the first step whether attention can be divided so.
fn check_strategy(args: &Args, how: Strategy, ranks: usize) -> Result<(), RingError> {
    let shape = Shape {
        batch: args.batch,
        query_heads: args.model.heads,
        kv_heads: args.model.kv_heads.unwrap_or(args.model.heads),
        head_dim: 1,
    };
    AttentionSpec::new(Pattern::full(), shape, args.seq_length)?
        .sharded(args.sharding, ranks)?
        .with_strategy(how)?;
    Ok(())
}

/// burn-train panics on a checkpoint it cannot load; this says beforehand what is wrong.
fn check_checkpoint(args: &Args, epoch: usize, model: &LongNet) -> Result<(), String> {
    let file = |part: &str| {
        args.artifacts
            .join(format!("checkpoint/{part}-{epoch}.bpk"))
    };
    let cannot = |file: &Path, error: &dyn std::fmt::Display| {
        let mut reason = error.to_string();
        if let Some((end, _)) = reason.char_indices().nth(200) {
            reason.truncate(end);
            reason.push_str("...");
        }
        format!(
            "cannot resume from {} with these options (they must describe the model of the run that wrote it): {reason}",
            file.display()
        )
    };
    let weights = file("model");
    model
        .clone()
        .try_load_file(&weights)
        .map_err(|error| cannot(&weights, &error))?;
    let optimizer = file("optim");
    OptimizerRecord::load(&optimizer).map_err(|error| cannot(&optimizer, &error))?;
    let schedule = file("scheduler");
    LrSchedulerRecord::load(&schedule).map_err(|error| cannot(&schedule, &error))?;
    Ok(())
}

fn model_config(args: &Args) -> LongNetConfig {
    let config = args.model.config();
    config
        .with_dropout(args.dropout)
        .with_attention_dropout(args.attention_dropout)
}

fn run(args: &Args, prepared: Prepared) -> Result<(), String> {
    let Prepared {
        text,
        model,
        placement,
        ranks,
        strategy,
    } = prepared;
    let reports = placement.has_first_rank();
    if reports {
        println!(
            "{} parameters; {} training bytes, {} held out; {}, {} sharding, sequence length {}, segments {:?}, rates {:?}",
            model.num_params(),
            text.train_len(),
            text.held_out_len(),
            describe(args, &placement, ranks),
            args.sharding,
            args.seq_length,
            args.model.segment_lengths,
            args.model.dilation_rates,
        );
    }
    let curve = Curve::default();
    let started = Instant::now();
    let trained = train(args, model, strategy, &text, &curve, &placement)?;
    let seconds = started.elapsed().as_secs_f64();
    let scored = Instant::now();
    let bits = evaluation::bits_per_byte(&trained, &text, args, &placement, ranks)?;
    let evaluation_seconds = scored.elapsed().as_secs_f64();
    let peaks = placement
        .of_all_processes("peak memory", peak_memory_mb().unwrap_or(f64::NAN))
        .map_err(|failure| failure.to_string())?;
    // The processes part here: what follows is rank 0's.
    let ranks_in_words = describe(args, &placement, ranks);
    drop(placement);
    if !reports {
        return Ok(());
    }
    let steps = curve.train_losses();
    let tokens = steps.len() * args.batch * args.seq_length;
    let picture = write_losses(args, &steps, &ranks_in_words)?;
    println!(
        "held out: {bits:.4} bits per byte over all {} bytes of the last 5% ({evaluation_seconds:.1} s)",
        text.held_out_len(),
    );
    println!(
        "trained {} steps, {tokens} tokens in {seconds:.1} s: {:.0} tokens per second",
        steps.len(),
        tokens as f64 / seconds
    );
    report_memory(&peaks, &ranks_in_words);
    println!("loss curve: {}", picture.display());
    if args.sample_bytes > 0 {
        let text = sample::generate(&trained, &text, args)?;
        println!("sample (temperature {}):\n{text}", args.temperature);
    }
    Ok(())
}

/// The ranks, in words.
fn describe(args: &Args, placement: &Placement, ranks: usize) -> String {
    let groups = match args.data_parallel {
        1 => String::new(),
        groups => format!("{groups} groups of "),
    };
    let kind = match placement.ranks {
        Ranks::Threads(_) => String::new(),
        Ranks::Processes(_) => format!(" ({} processes)", placement.transport),
    };
    format!("{groups}{ranks} ranks{kind}")
}

/// The losses as a file and as a picture, of which it gives the path.
fn write_losses(args: &Args, steps: &[f64], ranks: &str) -> Result<PathBuf, String> {
    if steps.is_empty() {
        return Err("no step was trained: the checkpoint is already at the last step".into());
    }
    let file = args.artifacts.join("losses.csv");
    let (first, losses) = curve::whole_run(&file, args.first_step(), steps);
    curve::write_csv(&file, first, &losses)
        .map_err(|error| format!("cannot write the losses: {error}"))?;
    let picture = args.artifacts.join("loss.svg");
    let title = format!(
        "LongNet over {ranks}, {} positions: training loss",
        args.seq_length
    );
    curve::draw(&picture, &title, first, &losses)
        .map_err(|error| format!("cannot draw the losses: {error}"))?;
    Ok(picture)
}

fn report_memory(peaks: &[f64], ranks: &str) {
    let sum: f64 = peaks.iter().sum();
    let most = peaks.iter().copied().fold(0.0, f64::max);
    match peaks.len() {
        _ if sum.is_nan() => {}
        1 => println!("peak memory of the process, {ranks} together: {sum:.0} MB"),
        _ => println!("peak memory, {ranks}: {most:.0} MB at most, {sum:.0} MB together"),
    }
}

fn train(
    args: &Args,
    model: LongNet,
    strategy: RingStrategy,
    text: &Text,
    curve: &Curve,
    placement: &Placement,
) -> Result<LongNet, String> {
    let optimizer = AdamWConfig::new()
        .with_beta_2(0.98)
        .with_epsilon(1e-8)
        .with_weight_decay(0.01)
        .with_grad_clipping(Some(GradientClippingConfig::Norm(1.0)))
        .init();
    let schedule = learning_rate(args)
        .init()
        .map_err(|error| format!("learning rate: {error}"))?;
    let interrupter = Interrupter::new();
    // What mpirun gives a process as a terminal is none that one can draw on.
    let dashboard = matches!(placement.ranks, Ranks::Threads(_));
    let mut training = SupervisedTraining::new(
        &args.artifacts,
        Arc::new(Feed::train(text, args)),
        Arc::new(Feed::validation(text, args)),
    )
    .with_training_strategy(TrainingStrategy::Custom(Arc::new(strategy)))
    .with_interrupter(interrupter.clone())
    .num_epochs(args.epochs())
    .with_default_checkpointers()
    .with_checkpointing_strategy(KeepLastNCheckpoints::new(2))
    .metric_train_numeric(BitsPerByteMetric::train(curve))
    .metric_valid_numeric(BitsPerByteMetric::validation(curve))
    .renderer(renderer(args, curve, interrupter, dashboard));
    if !placement.has_first_rank() {
        training = training.with_application_logger(None);
    }
    if let Some(epoch) = args.resume {
        training = training.checkpoint(epoch);
    }
    let result = training.launch(Learner::new(model, optimizer, schedule));
    match result.error {
        Some(error) => Err(error.to_string()),
        None => Ok(result.model),
    }
}

/// Linear warm-up, then half a cosine down to a tenth.
fn learning_rate(args: &Args) -> ComposedLrSchedulerConfig {
    let warm_up = (args.steps / 20).clamp(1, 200);
    ComposedLrSchedulerConfig::new().with_schedulers(vec![
        LrSchedulerConfig::from(LinearLrSchedulerConfig::new(1e-3, 1.0, warm_up)),
        LrSchedulerConfig::from(
            CosineAnnealingLrSchedulerConfig::new(args.learning_rate, args.steps.max(1))
                .with_min_lr(args.learning_rate / 10.0),
        ),
    ])
}

fn renderer(
    args: &Args,
    curve: &Curve,
    interrupter: Interrupter,
    dashboard: bool,
) -> Box<dyn MetricsRenderer> {
    use std::io::IsTerminal;
    if args.plain || !dashboard || !std::io::stdout().is_terminal() {
        Box::new(progress::Lines::new(args, curve))
    } else {
        default_renderer(interrupter, args.resume)
    }
}

/// The most memory this process has held, where the system tells.
fn peak_memory_mb() -> Option<f64> {
    let status = fs::read_to_string(Path::new("/proc/self/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes / 1024.0)
}
