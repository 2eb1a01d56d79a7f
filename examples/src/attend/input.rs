//! Where the ranks' rows come from: a safetensors file, or a seed.
//!
//! Nobody holds a whole tensor: of a file only the header is read at first, and every rank reads, or draws, its own rows.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use ring_comm::buffer::{DType, HostBuffer};
use ring_core::{Shape, Span};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};

use super::Options;
use crate::command_line::Failure;

/// Whole tensors of which every rank takes its rows.
#[derive(Clone, Debug)]
pub struct Input {
    shape: Shape,
    query_length: usize,
    key_length: usize,
    gradient: bool,
    alibi_slopes: Option<Vec<f32>>,
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    File(InputFile),
    Random { seed: u64 },
}

/// The header of a safetensors file.
#[derive(Clone, Debug)]
struct InputFile {
    path: PathBuf,
    /// Where each tensor begins in the file.
    starts: BTreeMap<InputTensor, u64>,
    unused: Vec<String>,
}

/// The tensors of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum InputTensor {
    Query,
    Key,
    Value,
    GradOutput,
}

impl InputTensor {
    const ALL: [Self; 4] = [Self::Query, Self::Key, Self::Value, Self::GradOutput];

    fn name(self) -> &'static str {
        match self {
            Self::Query => "q",
            Self::Key => "k",
            Self::Value => "v",
            Self::GradOutput => "grad_out",
        }
    }
}

/// Names that an input may bear because it is also somebody's output.
const RESULT_NAMES: [&str; 5] = ["out", "lse", "grad_q", "grad_k", "grad_v"];

/// The tensor of ALiBi's slopes, `[query heads]`.
const SLOPES: &str = "alibi_slopes";

/// Longest header that safetensors allows.
const MAX_HEADER: u64 = 100_000_000;

impl Input {
    /// The input that `options` name.
    ///
    /// # Errors
    /// [`Failure`] for a file that cannot be read, is no safetensors file or lacks tensors of matching shapes.
    pub fn open(options: &Options) -> Result<Self, Failure> {
        if let Some(random) = options.random {
            return Self::random(options, random.shape, random.length);
        }
        let Some(path) = &options.input else {
            return Err(Failure::Input("there is no input".to_string()));
        };
        let input = Self::from_file(path)?;
        if options.backward && !input.gradient {
            return Err(Failure::Input(format!(
                "--backward needs a tensor \"grad_out\" in {}",
                path.display()
            )));
        }
        Ok(input)
    }

    fn random(options: &Options, shape: Shape, length: usize) -> Result<Self, Failure> {
        let elements = [shape.batch, shape.query_heads.max(shape.kv_heads), length]
            .into_iter()
            .try_fold(shape.head_dim, usize::checked_mul)
            .filter(|&elements| elements <= isize::MAX as usize / 32);
        if elements.is_none() {
            return Err(Failure::Input(
                "--random asks for more elements than can be addressed".to_string(),
            ));
        }
        Ok(Self {
            shape,
            query_length: length,
            key_length: length,
            gradient: options.backward,
            alibi_slopes: None,
            source: Source::Random { seed: options.seed },
        })
    }

    fn from_file(path: &Path) -> Result<Self, Failure> {
        let (metadata, data_start) = read_header(path)?;
        let alibi_slopes = metadata
            .info(SLOPES)
            .map(|info| read_slopes(path, info, data_start))
            .transpose()?;
        let mut shapes = BTreeMap::new();
        let mut starts = BTreeMap::new();
        for tensor in InputTensor::ALL {
            match metadata.info(tensor.name()) {
                Some(info) => {
                    shapes.insert(tensor, checked_shape(path, tensor.name(), info)?);
                    starts.insert(tensor, data_start + info.data_offsets.0 as u64);
                }
                None if tensor == InputTensor::GradOutput => {}
                None => {
                    return Err(Failure::Input(format!(
                        "{} has no tensor \"{}\"; it has {}",
                        path.display(),
                        tensor.name(),
                        names(&metadata).join(", ")
                    )));
                }
            }
        }
        let known = |name: &String| {
            name == SLOPES
                || RESULT_NAMES.contains(&name.as_str())
                || InputTensor::ALL.iter().any(|tensor| tensor.name() == name)
        };
        let unused = names(&metadata)
            .into_iter()
            .filter(|name| !known(name))
            .collect();
        let [batch, query_heads, query_length, head_dim] = shapes[&InputTensor::Query];
        let [_, kv_heads, key_length, _] = shapes[&InputTensor::Key];
        let query = [batch, query_heads, query_length, head_dim];
        let key = [batch, kv_heads, key_length, head_dim];
        for (tensor, expected, why) in [
            (InputTensor::Key, key, "batch and head size are those of q"),
            (
                InputTensor::Value,
                key,
                "batch and head size are those of q, the rest that of k",
            ),
            (InputTensor::GradOutput, query, "the shape of q"),
        ] {
            let got = shapes.get(&tensor).copied().unwrap_or(expected);
            if got != expected {
                return Err(Failure::Input(format!(
                    "tensor \"{}\" has shape {got:?}, expected {expected:?}: {why}",
                    tensor.name()
                )));
            }
        }
        Ok(Self {
            shape: Shape {
                batch,
                query_heads,
                kv_heads,
                head_dim,
            },
            query_length,
            key_length,
            gradient: shapes.contains_key(&InputTensor::GradOutput),
            alibi_slopes,
            source: Source::File(InputFile {
                path: path.to_path_buf(),
                starts,
                unused,
            }),
        })
    }

    /// Batch and heads.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Number of queries.
    pub fn query_length(&self) -> usize {
        self.query_length
    }

    /// Number of keys.
    pub fn key_length(&self) -> usize {
        self.key_length
    }

    /// Whether there is a gradient of the output.
    pub fn has_gradient(&self) -> bool {
        self.gradient
    }

    /// ALiBi's slopes, if the file has any.
    pub fn alibi_slopes(&self) -> Option<&[f32]> {
        self.alibi_slopes.as_deref()
    }

    /// Names of the file's tensors that mean nothing here.
    pub fn unused(&self) -> &[String] {
        match &self.source {
            Source::File(file) => &file.unused,
            Source::Random { .. } => &[],
        }
    }

    /// Elements of all tensors.
    pub fn elements(&self) -> usize {
        let row = self.shape.batch * self.shape.head_dim;
        let query = row * self.shape.query_heads * self.query_length;
        let key = row * self.shape.kv_heads * self.key_length;
        query * (1 + usize::from(self.gradient)) + 2 * key
    }

    /// One rank's rows of a tensor: `[batch, heads, rows, head_dim]`, contiguous, rounded to `dtype`.
    pub(super) fn shard(
        &self,
        tensor: InputTensor,
        spans: &[Span],
        dtype: DType,
    ) -> Result<HostBuffer, String> {
        let (heads, length) = match tensor {
            InputTensor::Query | InputTensor::GradOutput => {
                (self.shape.query_heads, self.query_length)
            }
            InputTensor::Key | InputTensor::Value => (self.shape.kv_heads, self.key_length),
        };
        let (outer, dim) = (self.shape.batch * heads, self.shape.head_dim);
        let rows: usize = spans.iter().map(Span::len).sum();
        let mut shard = Shard::with_capacity(dtype, outer * rows * dim).map_err(|bytes| {
            format!("could not allocate {bytes} bytes for \"{}\"", tensor.name())
        })?;
        // Element ranges of the whole tensor, in the order of the shard.
        let ranges = (0..outer).flat_map(|head| {
            spans.iter().map(move |span| {
                let first = (head * length + span.start) * dim;
                first..first + span.len() * dim
            })
        });
        match &self.source {
            Source::Random { seed } => {
                let stream = mix(seed.wrapping_mul(4).wrapping_add(tensor as u64));
                shard.extend(ranges.flatten().map(|index| uniform(stream, index as u64)));
            }
            Source::File(file) => file
                .read(tensor, ranges, |values| shard.extend(values))
                .map_err(|error| format!("cannot read {}: {error}", file.path.display()))?,
        }
        Ok(shard.0)
    }
}

impl InputFile {
    /// Reads ranges of elements, bit by bit.
    fn read(
        &self,
        tensor: InputTensor,
        ranges: impl Iterator<Item = std::ops::Range<usize>>,
        mut take: impl FnMut(&mut dyn Iterator<Item = f32>),
    ) -> std::io::Result<()> {
        const BYTES_AT_ONCE: usize = 1 << 16;
        let mut file = File::open(&self.path)?;
        let mut bytes = vec![0; BYTES_AT_ONCE];
        for range in ranges {
            file.seek(SeekFrom::Start(
                self.starts[&tensor] + 4 * range.start as u64,
            ))?;
            let mut left = 4 * range.len();
            while left > 0 {
                let part = &mut bytes[..left.min(BYTES_AT_ONCE)];
                file.read_exact(part)?;
                left -= part.len();
                let (words, _) = part.as_chunks::<4>();
                take(&mut words.iter().map(|word| f32::from_le_bytes(*word)));
            }
        }
        Ok(())
    }
}

/// A buffer that is being filled, elements rounded on their way in.
struct Shard(HostBuffer);

impl Shard {
    fn with_capacity(dtype: DType, len: usize) -> Result<Self, usize> {
        let mut buffer = HostBuffer::zeros(dtype, 0);
        let reserved = match &mut buffer {
            HostBuffer::F32(values) => values.try_reserve_exact(len),
            HostBuffer::F16(values) => values.try_reserve_exact(len),
            HostBuffer::BF16(values) => values.try_reserve_exact(len),
        };
        match reserved {
            Ok(()) => Ok(Self(buffer)),
            Err(_) => Err(len.saturating_mul(dtype.size())),
        }
    }

    fn extend(&mut self, numbers: impl Iterator<Item = f32>) {
        match &mut self.0 {
            HostBuffer::F32(values) => values.extend(numbers),
            HostBuffer::F16(values) => values.extend(numbers.map(f16::from_f32)),
            HostBuffer::BF16(values) => values.extend(numbers.map(bf16::from_f32)),
        }
    }
}

/// The header of a safetensors file, and where its data begin.
fn read_header(path: &Path) -> Result<(Metadata, u64), Failure> {
    let unreadable =
        |error: std::io::Error| Failure::Input(format!("cannot read {}: {error}", path.display()));
    let malformed = |why: String| {
        Failure::Input(format!(
            "{} is not a safetensors file: {why}",
            path.display()
        ))
    };
    let mut file = File::open(path).map_err(unreadable)?;
    let size = file.metadata().map_err(unreadable)?.len();
    let mut length = [0; 8];
    if size < length.len() as u64 {
        return Err(malformed(format!("it has only {size} bytes")));
    }
    file.read_exact(&mut length).map_err(unreadable)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER.min(size - 8) {
        return Err(malformed(format!(
            "a header of {length} bytes cannot be in a file of {size}"
        )));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(unreadable)?;
    let metadata: Metadata =
        serde_json::from_slice(&header).map_err(|error| malformed(error.to_string()))?;
    let data_start = 8 + length;
    let expected = data_start.saturating_add(metadata.data_len() as u64);
    if expected != size {
        return Err(malformed(format!(
            "its header describes {expected} bytes, it has {size}"
        )));
    }
    Ok((metadata, data_start))
}

fn names(metadata: &Metadata) -> Vec<String> {
    let mut names: Vec<String> = metadata.tensors().into_keys().collect();
    names.sort();
    names
}

/// The four sizes of a tensor.
fn checked_shape(path: &Path, name: &str, info: &TensorInfo) -> Result<[usize; 4], Failure> {
    checked_sizes(
        path,
        name,
        info,
        "four sizes [batch, heads, length, head size]",
    )
}

/// The sizes of an f32 tensor that should have so many of them.
fn checked_sizes<const D: usize>(
    path: &Path,
    name: &str,
    info: &TensorInfo,
    expected: &str,
) -> Result<[usize; D], Failure> {
    let bad =
        |what: String| Failure::Input(format!("tensor \"{name}\" of {} {what}", path.display()));
    if info.dtype != Dtype::F32 {
        return Err(bad(format!(
            "has element type {:?}, expected F32 (see --dtype for rounding)",
            info.dtype
        )));
    }
    let shape: [usize; D] = info
        .shape
        .as_slice()
        .try_into()
        .map_err(|_| bad(format!("has shape {:?}, expected {expected}", info.shape)))?;
    let bytes = shape.into_iter().try_fold(4, usize::checked_mul);
    if bytes != info.data_offsets.1.checked_sub(info.data_offsets.0) {
        return Err(bad(format!(
            "has shape {shape:?} but {:?} as its range of bytes",
            info.data_offsets
        )));
    }
    Ok(shape)
}

/// The slopes in a file whose data begin at `data_start`.
fn read_slopes(path: &Path, info: &TensorInfo, data_start: u64) -> Result<Vec<f32>, Failure> {
    let [_] = checked_sizes(path, SLOPES, info, "one size [query heads]")?;
    let (first, end) = info.data_offsets;
    let mut bytes = vec![0; end - first];
    File::open(path)
        .and_then(|mut file| {
            file.seek(SeekFrom::Start(data_start + first as u64))?;
            file.read_exact(&mut bytes)
        })
        .map_err(|error| Failure::Input(format!("cannot read {}: {error}", path.display())))?;
    let (words, _) = bytes.as_chunks::<4>();
    Ok(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
}

/// Element `index` of a stream: uniform in (-sqrt 3, sqrt 3), so that the variance is 1.
fn uniform(stream: u64, index: u64) -> f32 {
    let bits = mix(stream ^ index.wrapping_mul(0x9E37_79B9_7F4A_7C15)) >> 40;
    ((bits as f32 + 0.5) / (1 << 23) as f32 - 1.0) * 3_f32.sqrt()
}

/// The finaliser of splitmix64.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawn_numbers_have_mean_0_and_variance_1() {
        let count = 100_000;
        let numbers: Vec<f64> = (0..count).map(|i| f64::from(uniform(mix(7), i))).collect();
        let mean = numbers.iter().sum::<f64>() / count as f64;
        let variance = numbers.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count as f64;
        assert!(
            mean.abs() < 0.01 && (variance - 1.0).abs() < 0.01,
            "{mean} {variance}"
        );
    }
}
