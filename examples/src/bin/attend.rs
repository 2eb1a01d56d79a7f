//! Attention of tensors on disk, or of random ones, on one or more ranks. See `attend --help`.

use std::process::ExitCode;

use ring_examples::{attend, command_line};

fn main() -> ExitCode {
    command_line::run(attend::run)
}
