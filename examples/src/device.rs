//! Where attention is computed: the option `--device`.

use std::{fmt, str::FromStr};

use crate::command_line::Failure;

/// What computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// This machine's processor.
    #[default]
    Cpu,
    /// A GPU, or what passes for one.
    Gpu {
        /// Through what it is driven.
        runtime: Runtime,
        /// Which of them.
        which: Which,
    },
}

/// What drives GPUs; each is a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// NVIDIA's own.
    Cuda,
    /// AMD's own.
    Rocm,
    /// Apple's own.
    Metal,
    /// Any GPU with a Vulkan driver, by SPIR-V.
    Vulkan,
    /// Whatever the machine has: Vulkan, Metal, DirectX 12 or OpenGL.
    Wgpu,
}

/// One of several devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// The ranks of a machine take its CUDA or ROCm GPUs in turn; of others, all take the one that the system prefers.
    Default,
    /// The discrete GPU of this number, for all ranks of the machine.
    Number(usize),
    /// A driver that is a program on the processor, such as Mesa's lavapipe.
    Software,
}

impl Runtime {
    const ALL: [Runtime; 5] = [
        Runtime::Cuda,
        Runtime::Rocm,
        Runtime::Metal,
        Runtime::Vulkan,
        Runtime::Wgpu,
    ];

    const fn name(self) -> &'static str {
        match self {
            Runtime::Cuda => "cuda",
            Runtime::Rocm => "rocm",
            Runtime::Metal => "metal",
            Runtime::Vulkan => "vulkan",
            Runtime::Wgpu => "wgpu",
        }
    }

    /// Whether it may be a program on the processor.
    const fn has_software(self) -> bool {
        matches!(self, Runtime::Vulkan | Runtime::Wgpu)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Device::Gpu { runtime, which } = self else {
            return f.pad("cpu");
        };
        match which {
            Which::Default => f.pad(runtime.name()),
            Which::Number(number) => write!(f, "{}:{number}", runtime.name()),
            Which::Software => write!(f, "{}:cpu", runtime.name()),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "cpu" {
            return Ok(Device::Cpu);
        }
        let (name, which) = match text.split_once(':') {
            Some((name, which)) => (name, Some(which)),
            None => (text, None),
        };
        let runtime = Runtime::ALL
            .into_iter()
            .find(|runtime| runtime.name() == name)
            .ok_or("valid: cpu, cuda, rocm, metal, vulkan, wgpu; the number of a GPU may follow, as in cuda:1")?;
        let which = match which {
            None => Which::Default,
            Some("cpu") if runtime.has_software() => Which::Software,
            Some(number) => Which::Number(number.parse().map_err(|_| {
                format!("after \"{name}:\" comes the number of a GPU, or, for vulkan and wgpu, cpu")
            })?),
        };
        Ok(Device::Gpu { runtime, which })
    }
}

impl Device {
    /// Checks that there is such a device.
    ///
    /// # Errors
    /// [`Failure::Unsupported`] if its runtime is not compiled in, [`Failure::Input`] if the machine has none.
    pub fn check(&self) -> Result<(), Failure> {
        match self {
            Device::Cpu => Ok(()),
            #[cfg(feature = "cube")]
            Device::Gpu { .. } => self.of_rank(0).map(drop),
            #[cfg(not(feature = "cube"))]
            Device::Gpu { runtime, .. } => Err(not_compiled_in(*runtime)),
        }
    }
}

fn not_compiled_in(runtime: Runtime) -> Failure {
    Failure::Unsupported(format!(
        "--device {0}: it is not compiled in; build with the feature `{0}`",
        runtime.name()
    ))
}

#[cfg(feature = "cube")]
mod gpu {
    use ring_kernels::cubecl::{
        self,
        device::{DeviceUnavailable, WgpuDeviceKind},
    };

    use super::{Device, Runtime, Which, not_compiled_in};
    use crate::command_line::Failure;

    impl Device {
        /// The device of a rank, by its number among the ranks of this machine; none for the processor.
        ///
        /// # Errors
        /// As [`check`](Self::check).
        pub fn of_rank(&self, rank: usize) -> Result<Option<cubecl::Device>, Failure> {
            let &Device::Gpu { runtime, which } = self else {
                return Ok(None);
            };
            let found = match which {
                Which::Number(number) => find(runtime, number),
                Which::Software => software(runtime),
                Which::Default => in_turn(runtime, rank),
            };
            found.map(Some).map_err(|error| match error {
                DeviceUnavailable::NotLinked(_) => not_compiled_in(runtime),
                DeviceUnavailable::NoSuchDevice { available, .. } => Failure::Input(format!(
                    "--device {self}: there is no such device, this machine has {available} of that kind"
                )),
            })
        }
    }

    type Found = Result<cubecl::Device, DeviceUnavailable>;

    fn find(runtime: Runtime, number: usize) -> Found {
        match runtime {
            Runtime::Cuda => cubecl::Device::cuda(number),
            Runtime::Rocm => cubecl::Device::rocm(number),
            Runtime::Metal => cubecl::Device::metal_msl(WgpuDeviceKind::DiscreteGpu(number)),
            Runtime::Vulkan => cubecl::Device::vulkan(WgpuDeviceKind::DiscreteGpu(number)),
            Runtime::Wgpu => cubecl::Device::wgpu(WgpuDeviceKind::DiscreteGpu(number)),
        }
    }

    fn software(runtime: Runtime) -> Found {
        match runtime {
            Runtime::Vulkan => cubecl::Device::vulkan(WgpuDeviceKind::Cpu),
            _ => cubecl::Device::wgpu(WgpuDeviceKind::Cpu),
        }
    }

    fn in_turn(runtime: Runtime, rank: usize) -> Found {
        match runtime {
            Runtime::Cuda | Runtime::Rocm => {
                let count = (0..=rank)
                    .take_while(|&number| find(runtime, number).is_ok())
                    .count();
                find(runtime, rank % count.max(1))
            }
            Runtime::Metal => cubecl::Device::metal_msl(WgpuDeviceKind::DefaultDevice),
            Runtime::Vulkan => cubecl::Device::vulkan(WgpuDeviceKind::DefaultDevice),
            Runtime::Wgpu => cubecl::Device::wgpu(WgpuDeviceKind::DefaultDevice),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for name in [
            "cpu",
            "cuda",
            "cuda:1",
            "rocm:0",
            "metal",
            "vulkan:cpu",
            "wgpu:cpu",
            "wgpu:2",
        ] {
            assert_eq!(name.parse::<Device>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn other_names_are_refused() {
        for name in ["", "gpu", "cuda:", "cuda:cpu", "cuda:x", "cpu:1"] {
            assert!(name.parse::<Device>().is_err(), "{name}");
        }
    }

    #[cfg(not(feature = "cube"))]
    #[test]
    fn what_is_not_compiled_in_says_how_to_get_it() {
        let failure = "cuda".parse::<Device>().unwrap().check().unwrap_err();
        assert!(failure.to_string().contains("feature `cuda`"), "{failure}");
    }
}
