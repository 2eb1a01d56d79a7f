//! What every rank would hold, send, receive and compute. See `plan --help`.

use std::process::ExitCode;

use ring_examples::{command_line, plan};

fn main() -> ExitCode {
    command_line::run(plan::run)
}
