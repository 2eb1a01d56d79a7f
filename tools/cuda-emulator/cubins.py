#!/usr/bin/env python3
"""Compiles CUDA sources to cubins of sm_90 with NVRTC, and writes what ptxas says of each kernel as a Markdown table.

Usage: cubins.py SOURCES TABLE

SOURCES is a folder of .cu files as the emulator writes them (CUDA_EMULATOR_SOURCES), TABLE the file to write. Needs the packages
nvidia-cuda-nvrtc-cu12, nvidia-cuda-runtime-cu12, nvidia-cuda-cccl-cu12 and nvidia-cuda-nvcc-cu12 of Python's package index. Fails
if a source does not compile.
"""

import concurrent.futures
import ctypes
import pathlib
import re
import sys
import sysconfig

# Of a multiprocessor of compute capability 9.0.
REGISTERS = 65536
REGISTER_UNIT = 256
THREADS = 2048
BLOCKS = 32
SHARED_BYTES = 228 * 1024
# What every block takes of shared memory beside its own.
RESERVED_SHARED_BYTES = 1024

NVIDIA = pathlib.Path(sysconfig.get_paths()["purelib"]) / "nvidia"


def load_nvrtc():
    """NVRTC, from where its package lies."""
    return ctypes.CDLL(str(next(NVIDIA.glob("cuda_nvrtc/lib/libnvrtc.so.*"))))


def program_log(nvrtc, program):
    """What the compiler has said."""
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, text)
    return text.value.decode(errors="replace")


def compile_source(path):
    """The log of a compilation, and whether it made a cubin."""
    nvrtc = load_nvrtc()
    program = ctypes.c_void_p()
    source = path.read_bytes()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, path.name.encode(), 0, None, None)
    options = [
        "--gpu-architecture=sm_90a",
        "--ptxas-options=-v",
        f"--include-path={NVIDIA / 'cuda_runtime/include'}",
        f"--include-path={NVIDIA / 'cuda_cccl/include'}",
        f"--include-path={NVIDIA / 'cuda_nvcc/include'}",
    ]
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    failed = nvrtc.nvrtcCompileProgram(program, len(options), array)
    log = program_log(nvrtc, program)
    size = ctypes.c_size_t()
    made = not failed and nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0 and size.value > 0
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log, made


def figure(pattern, text):
    """The number in a log, or 0."""
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def occupancy(registers, threads, shared):
    """The part of a multiprocessor's threads that can be resident."""
    warps = -(-threads // 32)
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(
        BLOCKS,
        THREADS // (warps * 32),
        REGISTERS // max(1, per_warp * warps),
        SHARED_BYTES // (shared + RESERVED_SHARED_BYTES),
    )
    return blocks * warps * 32 / THREADS


def row(path, log):
    """A row of the table."""
    source = path.read_text()
    threads = figure(r"__launch_bounds__\((\d+)\)", source)
    dynamic = figure(r"// shared memory: (\d+) bytes", source)
    registers = figure(r"Used (\d+) registers", log)
    static = figure(r"(\d+) bytes smem", log)
    spills = figure(r"(\d+) bytes spill stores", log) + figure(r"(\d+) bytes spill loads", log)
    stack = figure(r"(\d+) bytes stack frame", log)
    resident = occupancy(registers, threads, static + dynamic)
    figures = [threads, registers, spills, stack, static, dynamic, f"{resident:.0%}"]
    variant = re.search(r"// variant: (.*)", source)
    variant = variant.group(1) if variant else ""
    # Buffers are the same in all.
    variant = re.sub(r"\w+: BufferCompilationArg {[^}]*},? ?", "", variant).replace("|", "\\|")
    return f"| `{path.stem}` | {variant} | " + " | ".join(map(str, figures)) + " |"


def main():
    sources, table = map(pathlib.Path, sys.argv[1:3])
    rows, spilling, failures = [], 0, []
    paths = sorted(sources.glob("*.cu"))
    # A process for each core: NVRTC compiles one source at a time.
    with concurrent.futures.ProcessPoolExecutor() as pool:
        compiled = list(pool.map(compile_source, paths))
    for path, (log, made) in zip(paths, compiled):
        if made:
            rows.append(row(path, log))
            spilling += figure(r"(\d+) bytes spill stores", log) > 0
        else:
            failures.append(f"{path}:\n{log}")
    head = "| kernel | variant | threads | registers | spill bytes | stack bytes | static shared | dynamic shared | occupancy |"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text("\n".join([head, "|---|" + "---|" * 8, *rows, ""]))
    print(f"{len(rows)} kernels compiled to sm_90, {len(failures)} failed, {spilling} spill registers; {table}")
    if failures:
        sys.exit("\n".join(failures))
    if not rows:
        sys.exit(f"{sources} has no sources")


if __name__ == "__main__":
    main()
