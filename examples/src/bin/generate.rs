//! A trained model continues a text. See `generate --help`.

use std::process::ExitCode;

use ring_examples::{command_line, generate};

fn main() -> ExitCode {
    command_line::run(generate::run)
}
