//! From CUDA source to a shared object: the C++ compiler and the cache of what it made.

use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::EmulatorError;
use crate::translate;

/// The variable that names a folder for compiled kernels.
const CACHE: &str = "CUDA_EMULATOR_CACHE";

/// The variable that names a folder for the sources of kernels.
const SOURCES: &str = "CUDA_EMULATOR_SOURCES";

/// The headers, by the names under which sources include them.
pub(crate) const HEADERS: &[(&str, &str)] = &[
    ("cuda_emulator.h", include_str!("../cuda/cuda_emulator.h")),
    ("runtime.h", include_str!("../cuda/runtime.h")),
    ("warp.h", include_str!("../cuda/warp.h")),
    ("math.cuh", include_str!("../cuda/math.cuh")),
    ("ptx.h", include_str!("../cuda/ptx.h")),
    ("matrix.h", include_str!("../cuda/matrix.h")),
    ("mma.h", include_str!("../cuda/mma.h")),
    ("barrier.h", include_str!("../cuda/barrier.h")),
    ("cuda/barrier", "#include \"barrier.h\"\n"),
    ("cooperative_groups.h", "#include \"barrier.h\"\n"),
    (
        "cooperative_groups/memcpy_async.h",
        "#include \"barrier.h\"\n",
    ),
    ("halves.h", include_str!("../cuda/halves.h")),
    ("cuda_fp16.h", include_str!("../cuda/cuda_fp16.h")),
    ("cuda_bf16.h", include_str!("../cuda/cuda_bf16.h")),
];

const RUNTIME: &str = include_str!("../cuda/runtime.cpp");

const UNKNOWN_INSTRUCTION: &str = " (the emulator does not know a PTX instruction in it)";

/// Options of every compilation. A misaligned access, or an index beyond a local array, traps.
const OPTIONS: &[&str] = &[
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-exceptions",
    "-w",
];

/// Further options for kernels.
const KERNEL_OPTIONS: &[&str] = &[
    "-fsanitize=alignment,bounds,integer-divide-by-zero",
    "-fsanitize-undefined-trap-on-error",
    "-include",
    "cuda_emulator.h",
];

/// The shared object with the runtime.
pub(crate) fn runtime() -> Result<PathBuf, EmulatorError> {
    object("runtime", RUNTIME, &["-pthread"])
}

/// A kernel as CubeCL's CUDA compiler writes it.
pub(crate) struct Source<'a> {
    /// The name of its function.
    pub(crate) name: &'a str,
    /// What tells it from kernels that were made of the same function.
    pub(crate) variant: &'a str,
    /// The text.
    pub(crate) cuda: &'a str,
    /// Bytes of shared memory that a launch asks for.
    pub(crate) shared_bytes: usize,
}

/// The shared object of a kernel.
pub(crate) fn kernel(source: &Source<'_>) -> Result<PathBuf, EmulatorError> {
    let cuda = translate::renumber(source.cuda);
    dump(source, &cuda)?;
    build(source.name, &cuda)
}

fn build(name: &str, cuda: &str) -> Result<PathBuf, EmulatorError> {
    let translated = translate::translate(cuda, name)?;
    object(name, &translated, KERNEL_OPTIONS)
}

/// Writes a source to the folder for sources, if there is one. Its last lines tell what the text does not.
fn dump(source: &Source<'_>, cuda: &str) -> Result<(), EmulatorError> {
    let Some(folder) = std::env::var_os(SOURCES).map(PathBuf::from) else {
        return Ok(());
    };
    let mut hasher = Fnv::default();
    cuda.hash(&mut hasher);
    let name = short(source.name);
    let path = folder.join(format!("{name}-{:016x}.cu", hasher.finish()));
    fs::create_dir_all(&folder).map_err(file(&folder))?;
    let variant: Vec<_> = source.variant.split_whitespace().collect();
    let text = format!(
        "{cuda}\n// shared memory: {} bytes\n// variant: {}\n",
        source.shared_bytes,
        variant.join(" ")
    );
    write_at_once(&path, &text)
}

/// Compiles, if the cache does not have it.
fn object(name: &str, source: &str, options: &[&str]) -> Result<PathBuf, EmulatorError> {
    let compiler = Compiler::get()?;
    let mut hasher = Fnv::default();
    (
        source,
        OPTIONS,
        options,
        &compiler.arguments,
        &compiler.version,
        HEADERS,
    )
        .hash(&mut hasher);
    let folder = cache_folder();
    let path = folder.join(format!("{}-{:016x}.so", short(name), hasher.finish()));
    if path.exists() {
        return Ok(path);
    }
    let headers = write_headers(&folder)?;
    let source_path = path.with_extension("cpp");
    write_at_once(&source_path, source)?;
    let unfinished = unique(&path);
    compiler.run(
        OPTIONS
            .iter()
            .chain(options)
            .map(Path::new)
            .chain([Path::new("-I"), &headers, Path::new("-o"), &unfinished])
            .chain([source_path.as_path()]),
        &source_path,
    )?;
    fs::rename(&unfinished, &path).map_err(file(&path))?;
    Ok(path)
}

/// The folder with the headers, written if it is not there.
fn write_headers(folder: &Path) -> Result<PathBuf, EmulatorError> {
    let mut hasher = Fnv::default();
    HEADERS.hash(&mut hasher);
    let headers = folder.join(format!("headers-{:016x}", hasher.finish()));
    if !headers.exists() {
        let unfinished = unique(&headers);
        fs::create_dir_all(&unfinished).map_err(file(&unfinished))?;
        for (name, text) in HEADERS {
            write_at_once(&unfinished.join(name), text)?;
        }
        // Whoever was first has written the same.
        if fs::rename(&unfinished, &headers).is_err() {
            fs::remove_dir_all(&unfinished).map_err(file(&unfinished))?;
        }
    }
    Ok(headers)
}

fn cache_folder() -> PathBuf {
    std::env::var_os(CACHE)
        .map_or_else(|| std::env::temp_dir().join("cuda-emulator"), PathBuf::from)
}

/// Another name beside `path`, of this thread alone.
fn unique(path: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    path.with_extension(format!("{}-{number}", std::process::id()))
}

fn write_at_once(path: &Path, text: &str) -> Result<(), EmulatorError> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(file(folder))?;
    }
    let unfinished = unique(path);
    fs::write(&unfinished, text).map_err(file(&unfinished))?;
    fs::rename(&unfinished, path).map_err(file(path))
}

fn file(path: &Path) -> impl FnOnce(std::io::Error) -> EmulatorError {
    let path = path.to_path_buf();
    |source| EmulatorError::File { path, source }
}

/// A name for files: letters, digits and `_`, not too many.
fn short(name: &str) -> String {
    name.chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .take(80)
        .collect()
}

/// The C++ compiler.
struct Compiler {
    command: String,
    arguments: Vec<&'static str>,
    version: String,
}

impl Compiler {
    fn get() -> Result<&'static Self, EmulatorError> {
        static COMPILER: OnceLock<Compiler> = OnceLock::new();
        if let Some(compiler) = COMPILER.get() {
            return Ok(compiler);
        }
        let command = std::env::var("CXX").unwrap_or_else(|_| "c++".to_string());
        let compiler = Self::find(command)?;
        Ok(COMPILER.get_or_init(|| compiler))
    }

    fn find(command: String) -> Result<Self, EmulatorError> {
        let output = Command::new(&command)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|source| EmulatorError::NoCompiler {
                command: command.clone(),
                source,
            })?;
        Ok(Self {
            command,
            arguments: processor_options(),
            version: String::from_utf8_lossy(&output.stdout).into_owned(),
        })
    }

    fn run<'a>(
        &self,
        arguments: impl Iterator<Item = &'a Path>,
        source: &Path,
    ) -> Result<(), EmulatorError> {
        let output = Command::new(&self.command)
            .args(&self.arguments)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .map_err(|source| EmulatorError::NoCompiler {
                command: self.command.clone(),
                source,
            })?;
        if !output.status.success() {
            let messages = String::from_utf8_lossy(&output.stderr).into_owned();
            let unknown = messages.contains("cuda_emulator::ptx");
            return Err(EmulatorError::Refused {
                path: source.to_path_buf(),
                hint: if unknown { UNKNOWN_INSTRUCTION } else { "" },
                messages,
            });
        }
        Ok(())
    }
}

/// Options for what the processor has: conversion of f16, and fused multiply-add for the sources that ask for it.
fn processor_options() -> Vec<&'static str> {
    let mut options = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx2") {
            options.push("-mavx2");
        }
        if std::arch::is_x86_feature_detected!("fma") {
            options.push("-mfma");
        }
        if std::arch::is_x86_feature_detected!("f16c") {
            options.push("-mf16c");
        }
    }
    options
}

/// FNV-1a: the same names in every run, unlike the standard library's hashes.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xCBF2_9CE4_8422_2325)
    }
}

impl Hasher for Fnv {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_compiler_is_named() {
        let error = Compiler::find("/nowhere/c++".to_string()).err().unwrap();
        let text = error.to_string();
        assert!(text.contains("`/nowhere/c++` cannot be started"), "{text}");
    }

    #[test]
    fn unknown_instructions_and_functions_do_not_compile() {
        let compile = |body: &str| {
            let cuda =
                format!("extern \"C\" __global__ void broken(unsigned* const v1) {{ {body} }}");
            build("broken", &cuda).map_err(|error| error.to_string())
        };
        let error =
            compile("asm(\"frobnicate.u32 %0, %1;\" : \"=r\"(*v1) : \"r\"(*v1));").unwrap_err();
        assert!(error.contains("does not know a PTX instruction"), "{error}");
        assert!(error.contains("frobnicate_u32"), "{error}");
        let error = compile("*v1 = __match_any_sync(1, 2);").unwrap_err();
        assert!(error.contains("__match_any_sync"), "{error}");
        assert!(compile("*v1 = __popc(3);").is_ok());
    }
}
