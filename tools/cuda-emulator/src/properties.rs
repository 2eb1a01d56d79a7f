//! What the device says of itself: what CubeCL's CUDA runtime says of compute capability 9.0, as far as it is emulated.

use cubecl::cmma::MatrixLayout;
use cubecl::ir::features::{MmaConfig, Plane, TypeUsage};
use cubecl::ir::{
    AddressType, ContiguousElements, DeviceIdentity, DeviceProperties, ElemType, FloatKind,
    HardwareProperties, IntKind, MemoryDeviceProperties, MmaProperties, OpaqueType,
    TargetProperties, UIntKind, VectorSize,
};
use cubecl_common::profile::TimingMethod;
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::mma::{CudaCmmaCompiler, manual::contiguous_elements_cuda};
use cubecl_cpp::cuda::supported_mma_combinations;
use cubecl_cpp::shared::{
    CompilationOptions, CppSupportedFeatures, register_mma_features, register_wmma_features,
};

use crate::memory::ALIGNMENT;

/// Threads of a warp.
const WARP: u32 = 32;

/// Shared memory that a block of an H100 may ask for, in bytes.
pub(crate) const SHARED_MEMORY: usize = 227 * 1024;

/// Threads of a block.
const THREADS: u32 = 1024;

/// Bytes of the largest allocation.
const LARGEST_ALLOCATION: u64 = 1 << 40;

const ARCHITECTURE: CudaArchitecture = CudaArchitecture {
    version: 90,
    tensor_cores: true,
};

/// How CubeCL's CUDA runtime has kernels compiled for the architecture.
pub(crate) fn compilation_options() -> CompilationOptions {
    CompilationOptions {
        warp_size: WARP as usize,
        supports_features: CppSupportedFeatures {
            grid_constants: true,
            clusters: true,
            fast_math: true,
            fast_tanh: true,
            elect_sync: true,
            dp4a: true,
        },
        ..Default::default()
    }
}

/// What the instructions of the architecture promise.
pub(crate) fn target_properties() -> TargetProperties {
    TargetProperties {
        mma: MmaProperties {
            register_size_bits: 32,
            const_plane_size: WARP,
            register_layout_a: MatrixLayout::RowMajor,
            register_layout_b: MatrixLayout::ColMajor,
            register_layout_acc: MatrixLayout::RowMajor,
            register_duplication_a: 1,
            register_duplication_b: 1,
            register_duplication_acc: 1,
            contiguous_elements: ContiguousElements::new(contiguous_elements_cuda),
        },
    }
}

/// Sizes, limits and features.
pub(crate) fn device_properties() -> DeviceProperties {
    let mut properties = DeviceProperties::new(
        Default::default(),
        MemoryDeviceProperties::new(LARGEST_ALLOCATION, ALIGNMENT as u64),
        hardware(),
        TimingMethod::System,
        DeviceIdentity {
            name: "emulated CUDA device of compute capability 9.0".to_string(),
            fingerprint: "emulated_sm90".to_string(),
            physical: None,
        },
    );
    register_types(&mut properties);
    let features = &mut properties.features;
    for half in halves() {
        features.matmul.ldmatrix.insert(half);
        features.matmul.stmatrix.insert(half);
    }
    features.copy_async = true;
    features.memory_reinterpret = true;
    features.alignment = true;
    features.device_memory_scope = true;
    features.plane.insert(Plane::Ops);
    features.plane.insert(Plane::Sync);
    properties.register_opaque_type(OpaqueType::Barrier);
    let cmma = CudaCmmaCompiler::Cpp.supported_cmma_combinations(&ARCHITECTURE);
    register_wmma_features(emulated(cmma), &mut properties);
    register_mma_features(
        emulated(supported_mma_combinations(&ARCHITECTURE)),
        &mut properties,
    );
    properties
}

/// The types that the headers have: no 8-bit floats, and nothing atomic.
fn register_types(properties: &mut DeviceProperties) {
    properties.register_address_type(AddressType::U32);
    properties.register_address_type(AddressType::U64);
    let unsigned = [UIntKind::U8, UIntKind::U16, UIntKind::U32, UIntKind::U64];
    let signed = [IntKind::I8, IntKind::I16, IntKind::I32, IntKind::I64];
    let floats = [
        FloatKind::BF16,
        FloatKind::F16,
        FloatKind::F32,
        FloatKind::Flex32,
        FloatKind::F64,
    ];
    let types = [ElemType::Index, ElemType::Bool]
        .into_iter()
        .chain(unsigned.map(ElemType::UInt))
        .chain(signed.map(ElemType::Int))
        .chain(floats.map(ElemType::Float));
    for element in types {
        properties.register_type_usage(element, TypeUsage::all());
    }
}

fn hardware() -> HardwareProperties {
    HardwareProperties {
        load_width: 128,
        vector_register_count: None,
        plane_size_min: WARP,
        plane_size_max: WARP,
        max_bindings: 1024,
        max_shared_memory_size: SHARED_MEMORY,
        max_cube_count: (i32::MAX as u32, 65535, 65535),
        max_units_per_cube: THREADS,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: Some(132),
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        num_cpu_cores: None,
        last_level_cache_size: None,
        max_vector_size: VectorSize::MAX,
        cube_mma_reserved_shared_memory: 0,
    }
}

fn halves() -> [ElemType; 2] {
    [FloatKind::F16, FloatKind::BF16].map(ElemType::Float)
}

/// Those products of matrices that the headers have: f16 and bf16, with f32 sums.
fn emulated(all: Vec<MmaConfig>) -> Vec<MmaConfig> {
    all.into_iter()
        .filter(|config| {
            halves().contains(&config.a_type)
                && config.b_type == config.a_type
                && config.cd_type == ElemType::Float(FloatKind::F32)
        })
        .collect()
}
