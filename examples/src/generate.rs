//! `generate`: a trained model continues a text, its cache sharded over ranks.

mod comparison;
mod options;

use std::{fs, path::PathBuf, sync::Arc};

use burn::tensor::Device;
use ring_burn::{Communicator, HostBuffer, Loopback, Ring, parameter_checksum};
use ring_comm::checksum::Fnv1a;
use ring_multihead::LongNet;

pub use self::options::Options;
use crate::{
    command_line::{self, Failure},
    continuation::{Sampling, continue_text},
    placement::{Placement, Ranks},
};

/// Runs the program.
///
/// # Errors
/// [`Failure`] for options that make no sense, a model that cannot be read, or a group that failed.
pub fn run(options: &Options) -> Result<(), Failure> {
    options.check()?;
    // Before anything that may be wrong in one process alone: the others would wait for it until the deadline.
    let placement = options.placement()?;
    run_on(options, &placement).inspect_err(|failure| placement.abort(failure))
}

fn run_on(options: &Options, placement: &Placement) -> Result<(), Failure> {
    if !options.compare.is_empty() {
        let model = new_model(options)?;
        placement.agree("generate --compare", &terms(options, &model, &[]))?;
        return on_ranks(options, placement, |ring| {
            comparison::run(&model, &options.compare, ring)
        });
    }
    let model = trained_model(options)?;
    let prompt = options.prompt()?;
    placement.agree("generate", &terms(options, &model, &prompt))?;
    on_ranks(options, placement, |ring| {
        generate(options, &model, &prompt, ring)
    })
}

/// Does `work` on every rank of this process.
fn on_ranks(
    options: &Options,
    placement: &Placement,
    work: impl Fn(&Ring) -> Result<(), Failure> + Sync,
) -> Result<(), Failure> {
    let on_rank = |communicator: Communicator<HostBuffer>| {
        let ring = Ring::new(communicator, options.sharding, 0);
        let ring = ring.and_then(|ring| match options.threads {
            Some(threads) => ring.with_threads(threads),
            None => Ok(ring),
        });
        work(&ring.map_err(Failure::input)?)
    };
    match &placement.ranks {
        Ranks::Processes(everyone) => on_rank(everyone.clone()),
        Ranks::Threads(ranks) => {
            let results = Loopback::run(*ranks, placement.deadline, |endpoint| {
                on_rank(Communicator::new(Arc::new(endpoint)))
            });
            results
                .into_iter()
                .try_for_each(|result| result.map_err(|panic| Failure::Run(panic.to_string()))?)
        }
    }
}

/// Prints the prompt, then each byte as it comes; rank 0 does, and tells how long it took.
fn generate(options: &Options, model: &LongNet, prompt: &[u8], ring: &Ring) -> Result<(), Failure> {
    let prints = ring.rank() == 0;
    let print = |bytes: &[u8]| match prints {
        true => command_line::print(bytes),
        false => Ok(()),
    };
    print(prompt)?;
    let sampling = Sampling {
        bytes: options.bytes,
        temperature: options.temperature,
        seed: options.seed,
    };
    let timing = continue_text(model, prompt, sampling, ring, |byte| print(&[byte]))?;
    print(b"\n")?;
    if prints {
        let seconds = timing.bytes.as_secs_f64();
        eprintln!(
            "prompt of {} bytes in {:.3} s; then {} bytes in {seconds:.3} s: {:.1} tokens per second, {} ranks",
            prompt.len(),
            timing.prompt.as_secs_f64(),
            options.bytes,
            options.bytes as f64 / seconds,
            ring.world_size(),
        );
    }
    Ok(())
}

/// What must be the same in all processes.
fn terms(options: &Options, model: &LongNet, prompt: &[u8]) -> Vec<(&'static str, String)> {
    vec![
        ("the model", format!("{:016x}", parameter_checksum(model))),
        ("the prompt", format!("{:016x}", Fnv1a::of(prompt))),
        ("--sharding", options.sharding.to_string()),
        ("--bytes", options.bytes.to_string()),
        ("--temperature", options.temperature.to_string()),
        ("--seed", options.seed.to_string()),
        ("--compare", format!("{:?}", options.compare)),
    ]
}

fn new_model(options: &Options) -> Result<LongNet, Failure> {
    let device = Device::flex();
    device.seed(options.seed);
    let config = options.model.config();
    let model = config.try_init(&device).map_err(Failure::input)?;
    // Parameters are drawn when they are first looked at.
    parameter_checksum(&model);
    Ok(model)
}

/// The model that `train` saved.
fn trained_model(options: &Options) -> Result<LongNet, Failure> {
    use burn::module::Module;
    let file = checkpoint(options)?;
    let config = options.model.config();
    let model = config.try_init(&Device::flex()).map_err(Failure::input)?;
    model.try_load_file(&file).map_err(|error| {
        let reason: String = error.to_string().chars().take(200).collect();
        Failure::Input(format!(
            "cannot load {} with these options (they must describe the model that was trained): {reason}",
            file.display()
        ))
    })
}

/// The file of the checkpoint that was asked for, or of the latest.
fn checkpoint(options: &Options) -> Result<PathBuf, Failure> {
    let directory = options.artifacts.join("checkpoint");
    let epoch = match options.epoch {
        Some(epoch) => epoch,
        None => {
            let cannot =
                |error| Failure::Input(format!("cannot read {}: {error}", directory.display()));
            let entries = fs::read_dir(&directory).map_err(cannot)?;
            let epoch_of = |name: &str| -> Option<usize> {
                name.strip_prefix("model-")?
                    .strip_suffix(".bpk")?
                    .parse()
                    .ok()
            };
            let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            names.filter_map(|name| epoch_of(&name)).max().ok_or_else(|| {
                Failure::Input(format!(
                    "{} holds no model-EPOCH.bpk: train one first, or name its directory with --artifacts",
                    directory.display()
                ))
            })?
        }
    };
    Ok(directory.join(format!("model-{epoch}.bpk")))
}
