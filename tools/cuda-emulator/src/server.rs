//! The server of the device, as CubeCL asks for it. Launches are done when they return.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cubecl::{CubeCount, define_kernel};
use cubecl_common::device::{DeviceId, DeviceService, ServerUtilitiesHandle, ServiceId};
use cubecl_common::{bytes::Bytes, profile::ProfileDuration};
use cubecl_cpp::shared::CppCompiler;
use cubecl_cpp::target::Cuda;
use cubecl_environment::backtrace::BackTrace;
use cubecl_environment::future::DynFut;
use cubecl_environment::stream::StreamId;
use cubecl_server::allocator::ContiguousMemoryLayoutPolicy;
use cubecl_server::compiler::CompilationError;
use cubecl_server::dry_run::LaunchMode;
use cubecl_server::id::KernelId;
use cubecl_server::kernel::{BufferIOAttr, CompiledKernel, CubeKernel};
use cubecl_server::logging::ServerLogger;
use cubecl_server::memory_management::{
    ManagedMemoryHandle, ManagedMemoryId, MemoryAllocationMode, StreamMemoryReport,
};
use cubecl_server::server::{
    BufferBinding, CopyDescriptor, IoError, KernelArguments, KernelResource, LaunchError,
    ProfileError, ProfilingToken, ResourceLimitError, Server, ServerCommunication, ServerError,
    ServerStorage, ServerUtilities,
};
use cubecl_server::storage::ManagedResource;
use cubecl_server::timestamp_profiler::TimestampProfiler;
use cubecl_server::validation::{validate_cube_dim, validate_units};

use crate::compile::Source;
use crate::error::EmulatorError;
use crate::kernel::{Argument, Grid, Kernel};
use crate::memory::{ALIGNMENT, GuardedMemory, Resource};
use crate::order::Order;
use crate::properties;
use crate::storage::Storage;

/// Memory that somebody has a handle of.
struct Allocation {
    handle: ManagedMemoryHandle,
    memory: Option<Arc<GuardedMemory>>,
    /// Why what should have been written here was not.
    failure: Option<ServerError>,
}

/// A kernel, and what it does with each buffer.
struct Loaded {
    kernel: Kernel,
    io: Option<Vec<BufferIOAttr>>,
}

/// The device.
pub(crate) struct EmulatorServer {
    utilities: Arc<ServerUtilities>,
    allocations: HashMap<ManagedMemoryId, Allocation>,
    kernels: HashMap<KernelId, Arc<Loaded>>,
    profiler: TimestampProfiler,
    device: DeviceId,
}

impl std::fmt::Debug for EmulatorServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmulatorServer")
            .field("allocations", &self.allocations.len())
            .field("kernels", &self.kernels.len())
            .finish()
    }
}

impl DeviceService for EmulatorServer {
    fn init(device_id: DeviceId) -> Self {
        let (utilities, _no_captures) = ServerUtilities::init(
            ServiceId::of::<Self>(device_id),
            "emulated cuda",
            properties::device_properties(),
            properties::target_properties(),
            Arc::new(ServerLogger::default()),
            ContiguousMemoryLayoutPolicy::new(ALIGNMENT),
        );
        Self {
            utilities: Arc::new(utilities),
            allocations: HashMap::new(),
            kernels: HashMap::new(),
            profiler: TimestampProfiler::default(),
            device: device_id,
        }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone()
    }
}

impl EmulatorServer {
    /// The memory of a binding, whatever it holds.
    fn resource(&self, binding: &BufferBinding) -> Result<Resource, IoError> {
        let range = binding.range();
        self.allocations
            .get(&binding.memory.id())
            .and_then(|allocation| allocation.memory.clone())
            .and_then(|memory| Resource::new(memory, range.start as usize, range.end as usize))
            .ok_or_else(|| IoError::NotFound {
                backtrace: BackTrace::capture(),
                reason: "the emulator has no such memory".into(),
            })
    }

    /// Whether what should have been written to the memory was.
    fn written<'a>(
        &self,
        bindings: impl IntoIterator<Item = &'a BufferBinding>,
    ) -> Result<(), ServerError> {
        let failure = bindings.into_iter().find_map(|binding| {
            let allocation = self.allocations.get(&binding.memory.id());
            allocation.and_then(|allocation| allocation.failure.clone())
        });
        failure.map_or(Ok(()), Err)
    }

    /// Notes for each binding whether it was written.
    fn mark(&mut self, bindings: &[BufferBinding], failure: Option<&ServerError>) {
        for binding in bindings {
            if let Some(allocation) = self.allocations.get_mut(&binding.memory.id()) {
                allocation.failure = failure.cloned();
            }
        }
        if let Some(failure) = failure {
            self.profiler.failure(failure);
        }
    }

    fn load(&mut self, kernel: &dyn CubeKernel) -> Result<Arc<Loaded>, ServerError> {
        let id = kernel.id();
        if let Some(loaded) = self.kernels.get(&id) {
            return Ok(loaded.clone());
        }
        validate_cube_dim(&self.utilities.properties, &id)?;
        validate_units(&self.utilities.properties, &id)?;
        let compiled = compile(kernel).map_err(LaunchError::from)?;
        let shared = compiled.repr.as_ref();
        let shared = shared.map_or(0, |kernel| kernel.shared_memory_size);
        if shared > properties::SHARED_MEMORY {
            return Err(LaunchError::from(ResourceLimitError::SharedMemory {
                requested: shared,
                max: properties::SHARED_MEMORY,
                backtrace: BackTrace::capture(),
            })
            .into());
        }
        let (x, y, z) = compiled.cube_dim.into();
        let source = Source {
            name: &compiled.entrypoint_name,
            variant: &id.to_string(),
            cuda: &compiled.source,
            shared_bytes: shared,
        };
        let kernel =
            Kernel::load(&source, [x, y, z]).map_err(|error| LaunchError::from(refused(&error)))?;
        let loaded = Arc::new(Loaded {
            kernel,
            io: compiled.io,
        });
        self.kernels.insert(id, loaded.clone());
        Ok(loaded)
    }

    /// The blocks of a launch.
    fn grid(&self, count: &CubeCount) -> Result<[u32; 3], ServerError> {
        let blocks = match count {
            CubeCount::Static(x, y, z) => [*x, *y, *z],
            CubeCount::Dynamic(binding) => {
                self.written([binding])?;
                let bytes = self.resource(binding)?.read();
                let words: Vec<u32> = bytemuck::pod_collect_to_vec(&bytes);
                words
                    .get(..3)
                    .and_then(|words| words.try_into().ok())
                    .ok_or_else(|| generic("a count of cubes takes three words".to_string()))?
            }
        };
        let (x, y, z) = self.utilities.properties.hardware.max_cube_count;
        let fits = blocks
            .iter()
            .zip([x, y, z])
            .all(|(&asked, most)| asked <= most);
        fits.then_some(blocks).ok_or_else(|| {
            generic(format!(
                "a grid of {blocks:?} blocks, the device launches at most ({x}, {y}, {z})"
            ))
        })
    }

    fn run(
        &self,
        loaded: &Loaded,
        count: &CubeCount,
        arguments: &KernelArguments,
    ) -> Result<(), ServerError> {
        self.written(arguments.buffers_read(loaded.io.as_deref()))?;
        let blocks = self.grid(count)?;
        if blocks.contains(&0) {
            return Ok(());
        }
        let order = Order::of(self.device).map_err(|error| generic(error.to_string()))?;
        let mut pointers = Vec::new();
        for resource in &arguments.resources {
            let KernelResource::Buffer(binding) = resource else {
                return Err(generic("tensor maps are not emulated".to_string()));
            };
            pointers.push(self.resource(binding)?.start());
        }
        // Shapes and strides lie in memory of their own, scalars are passed as they are; CUDA's runtime does the same.
        let info = &arguments.info;
        let mut constant = info.data.clone();
        let dynamic = info.data.get(info.dynamic_metadata_offset..);
        let mut dynamic = dynamic.unwrap_or_default().to_vec();
        if !dynamic.is_empty() {
            pointers.push(dynamic.as_mut_ptr().cast());
        }
        let mut passed: Vec<Argument> = pointers
            .iter_mut()
            .map(|pointer| Argument {
                address: std::ptr::from_mut(pointer).cast::<c_void>(),
                bytes: size_of::<*mut u8>(),
            })
            .collect();
        passed.push(Argument {
            address: constant.as_mut_ptr().cast(),
            bytes: size_of_val(constant.as_slice()),
        });
        let grid = Grid { blocks, order };
        // SAFETY: these are the arguments that the kernel's definition asks for, in its order; their memory outlives the launch.
        unsafe { loaded.kernel.launch(&grid, &passed) }.map_err(|error| generic(error.to_string()))
    }
}

fn compile(kernel: &dyn CubeKernel) -> Result<CompiledKernel<CppCompiler<Cuda>>, CompilationError> {
    let definition = define_kernel(kernel)?;
    CompiledKernel::compile(
        kernel,
        definition,
        &mut CppCompiler::default(),
        &properties::compilation_options(),
    )
}

fn refused(error: &EmulatorError) -> CompilationError {
    CompilationError::Generic {
        reason: error.to_string(),
        backtrace: BackTrace::capture(),
    }
}

fn generic(reason: String) -> ServerError {
    ServerError::Generic {
        reason,
        backtrace: BackTrace::capture(),
    }
}

fn at_once<T: Send + 'static>(result: T) -> DynFut<T> {
    Box::pin(async move { result })
}

/// Whether elements lie one after the other, which is all that the layouts of this device ask for.
fn contiguous(descriptor: &CopyDescriptor) -> Result<(), IoError> {
    let mut expected = 1;
    let axes = descriptor.shape.iter().zip(descriptor.strides.iter());
    for (&length, &stride) in axes.rev() {
        if length != 1 && stride != expected {
            return Err(IoError::UnsupportedStrides {
                backtrace: BackTrace::capture(),
            });
        }
        expected *= length;
    }
    Ok(())
}

impl Server for EmulatorServer {
    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities> {
        self.utilities.clone()
    }

    fn initialize_memory(
        &mut self,
        handle: ManagedMemoryHandle,
        size: u64,
        _stream_id: StreamId,
    ) -> Result<(), ServerError> {
        self.allocations
            .retain(|_, allocation| !allocation.handle.is_free());
        let bytes = usize::try_from(size).unwrap_or(usize::MAX);
        let memory = GuardedMemory::new(bytes).map_err(|_| {
            ServerError::from(IoError::OutOfMemory {
                size,
                backtrace: BackTrace::capture(),
            })
        });
        let failure = memory.as_ref().err().cloned();
        self.allocations.insert(
            handle.clone().binding().id(),
            Allocation {
                handle,
                memory: memory.ok().map(Arc::new),
                failure: failure.clone(),
            },
        );
        failure.map_or(Ok(()), Err)
    }

    fn read(
        &mut self,
        descriptors: Vec<CopyDescriptor>,
        _stream_id: StreamId,
    ) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let read = |descriptor: &CopyDescriptor| {
            self.written([&descriptor.handle])?;
            contiguous(descriptor)?;
            let bytes = self.resource(&descriptor.handle)?.read();
            Ok(Bytes::from_bytes_vec(bytes))
        };
        at_once(descriptors.iter().map(read).collect())
    }

    fn write(&mut self, descriptors: Vec<(CopyDescriptor, Bytes)>, _stream_id: StreamId) {
        for (descriptor, data) in descriptors {
            let result = contiguous(&descriptor)
                .and_then(|()| self.resource(&descriptor.handle))
                .map_err(ServerError::from)
                .and_then(|resource| {
                    let fits = resource.write(&data);
                    fits.then_some(()).ok_or_else(|| {
                        generic(format!(
                            "{} bytes are written to memory of {}",
                            data.len(),
                            resource.len()
                        ))
                    })
                });
            self.mark(&[descriptor.handle], result.as_ref().err());
        }
    }

    fn sync(
        &mut self,
        handles: Vec<BufferBinding>,
        _stream_id: StreamId,
    ) -> DynFut<Result<(), ServerError>> {
        at_once(self.written(&handles))
    }

    fn check(
        &mut self,
        handles: Vec<BufferBinding>,
        _stream_id: StreamId,
    ) -> Result<(), ServerError> {
        self.written(&handles)
    }

    unsafe fn launch(
        &mut self,
        kernel: Box<dyn CubeKernel>,
        count: CubeCount,
        arguments: KernelArguments,
        _stream_id: StreamId,
        mode: LaunchMode,
    ) {
        let loaded = self.load(kernel.as_ref());
        if mode.is_skipped() {
            return;
        }
        let io = loaded.as_ref().ok().and_then(|loaded| loaded.io.as_deref());
        let written: Vec<_> = arguments.buffers_written(io).cloned().collect();
        let result = loaded
            .as_ref()
            .map_err(ServerError::clone)
            .and_then(|loaded| self.run(loaded, &count, &arguments));
        self.mark(&written, result.as_ref().err());
    }

    fn flush(&mut self, _stream_id: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn memory_report(&mut self, _stream_id: StreamId) -> Option<StreamMemoryReport> {
        None
    }

    fn memory_cleanup(&mut self, _stream_id: StreamId) -> Result<(), ServerError> {
        self.allocations
            .retain(|_, allocation| !allocation.handle.is_free());
        Ok(())
    }

    fn start_profile(&mut self, _stream_id: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(self.profiler.start())
    }

    fn end_profile(
        &mut self,
        _stream_id: StreamId,
        token: ProfilingToken,
    ) -> Result<ProfileDuration, ProfileError> {
        self.profiler.stop(token)
    }

    fn allocation_mode(&mut self, _mode: MemoryAllocationMode, _stream_id: StreamId) {}
}

impl ServerCommunication for EmulatorServer {}

impl ServerStorage for EmulatorServer {
    type Storage = Storage;

    fn get_resource(
        &mut self,
        binding: BufferBinding,
        _stream_id: StreamId,
    ) -> Result<ManagedResource<Resource>, ServerError> {
        self.written([&binding])?;
        let resource = self.resource(&binding)?;
        Ok(ManagedResource::new(binding.memory, resource))
    }
}
