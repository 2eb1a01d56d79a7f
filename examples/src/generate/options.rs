//! The command line of `generate`.

use std::{fs, path::PathBuf, time::Duration};

use clap::Parser;
use ring_burn::Sharding;
use ring_comm::TransportKind;

use crate::{
    command_line::Failure,
    length::parse_length,
    model_options::ModelOptions,
    placement::{MAX_RANKS, Placement, Wishes},
};

/// Continue a text with a model that `train` has saved, byte by byte.
///
/// The prompt is computed as in training, its sequence sharded over the ranks. Each byte after it is attended to all before it, whose
/// keys and values every rank keeps its share of, and printed as it comes. The options of the model must be those that `train` was given.
/// A line about the time follows on standard error.
#[derive(Parser, Clone, Debug)]
#[command(name = "generate", version, after_help = EXAMPLES)]
pub struct Options {
    /// What kind of model was trained.
    #[command(flatten)]
    pub model: ModelOptions,

    /// The directory that `train` wrote to
    #[arg(long, default_value = "artifacts")]
    pub artifacts: PathBuf,

    /// Which of its checkpoints [default: the latest]
    #[arg(long)]
    pub epoch: Option<usize>,

    /// The text to continue
    #[arg(long, default_value = "In the beginning ")]
    pub prompt: String,

    /// A file with the text to continue, any bytes
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompt_file: Option<PathBuf>,

    /// Bytes to generate
    #[arg(long, default_value_t = 300)]
    pub bytes: usize,

    /// Temperature: lower is more likely text
    #[arg(long, default_value_t = 0.8)]
    pub temperature: f64,

    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Ranks that share the prompt and the cache [default: 1 thread, or all processes of a group]
    #[arg(long)]
    pub ranks: Option<usize>,

    /// How ranks exchange rows: loopback, tcp, mpi [default: loopback, or what fits how the process was started]
    #[arg(long)]
    pub transport: Option<TransportKind>,

    /// Who owns which positions of the prompt: contiguous, zigzag, striped, striped:CHUNK_SIZE
    #[arg(long, default_value = "zigzag")]
    pub sharding: Sharding,

    /// Kernel threads of each rank [default: cores divided by ranks on the machine]
    #[arg(long)]
    pub threads: Option<usize>,

    /// Longest wait of a rank for another, in seconds [default: RING_DEADLINE_SECONDS, or 600]
    #[arg(long)]
    pub deadline: Option<u64>,

    /// Instead: after prompts of so many bytes, time a token decoded against one for which the whole sequence is computed again, and
    /// compare their scores; with a model that was not trained, since that does not matter
    #[arg(long, value_name = "N,N,..", value_delimiter = ',', value_parser = parse_length)]
    pub compare: Vec<usize>,
}

const EXAMPLES: &str = "\
Examples:
  generate --prompt \"And God said\" --bytes 500   after `train` with its defaults, in the same directory
  generate --prompt-file book.txt --ranks 4      a long prompt, shared by four threads
  mpirun -n 4 generate --temperature 0.5         ranks are processes
  generate --compare 1K,4K,16K                   what the cache is good for";

impl Options {
    /// Checks what no type checks.
    ///
    /// # Errors
    /// [`Failure::Input`] that says what must be otherwise.
    pub fn check(&self) -> Result<(), Failure> {
        self.model.check()?;
        let positive = [
            ("--ranks", self.ranks.unwrap_or(1)),
            ("--threads", self.threads.unwrap_or(1)),
            ("--deadline", self.deadline.unwrap_or(1) as usize),
            ("--compare", self.compare.iter().copied().min().unwrap_or(1)),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(Failure::Input(format!("{name} must be at least 1")));
        }
        if self.ranks.is_some_and(|ranks| ranks > MAX_RANKS) {
            let message = format!("more than {MAX_RANKS} ranks are a mistake");
            return Err(Failure::Input(message));
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(Failure::Input(format!(
                "--temperature is {}, must be positive",
                self.temperature
            )));
        }
        Ok(())
    }

    /// The ranks.
    pub(super) fn placement(&self) -> Result<Placement, Failure> {
        Placement::join(&Wishes {
            transport: self.transport,
            ranks: self.ranks,
            threads: 1,
            deadline: self.deadline.map(Duration::from_secs),
        })
    }

    /// The text to continue.
    pub(super) fn prompt(&self) -> Result<Vec<u8>, Failure> {
        let prompt = match &self.prompt_file {
            Some(file) => fs::read(file).map_err(|error| {
                Failure::Input(format!("cannot read {}: {error}", file.display()))
            })?,
            None => self.prompt.clone().into_bytes(),
        };
        if prompt.is_empty() {
            let message = "the prompt is empty; it must have a byte at least";
            return Err(Failure::Input(message.into()));
        }
        Ok(prompt)
    }
}
