//! The output file: whole, or not there.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use super::Outcome;
use crate::command_line::Failure;

/// A file under a temporary name beside its final one; removed when dropped before it was written.
pub(super) struct OutputFile {
    draft: PathBuf,
    path: PathBuf,
}

impl OutputFile {
    /// Makes the draft.
    pub(super) fn create(path: &Path) -> Result<Self, Failure> {
        let unwritable =
            |why: &str| Failure::Input(format!("cannot write {}: {why}", path.display()));
        if fs::metadata(path).is_ok_and(|existing| !existing.is_file()) {
            return Err(unwritable("there is something that is not a file"));
        }
        let name = path
            .file_name()
            .ok_or_else(|| unwritable("it names no file"))?
            .to_string_lossy();
        let draft = path.with_file_name(format!(".{name}.{}.draft", std::process::id()));
        File::create(&draft).map_err(|error| unwritable(&error.to_string()))?;
        Ok(Self {
            draft,
            path: path.to_path_buf(),
        })
    }

    /// Writes the results and gives the file its name.
    pub(super) fn write(self, outcome: &Outcome) -> Result<(), Failure> {
        let unwritable = |why: &dyn std::fmt::Display| {
            Failure::Run(format!("cannot write {}: {why}", self.path.display()))
        };
        safetensors::serialize_to_file(outcome.tensors(), None, &self.draft)
            .map_err(|error| unwritable(&error))?;
        fs::rename(&self.draft, &self.path).map_err(|error| unwritable(&error))
    }
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        // After the renaming there is nothing to remove.
        let _ = fs::remove_file(&self.draft);
    }
}
