// Included before the source of every kernel: what CUDA has without an include.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#include <math.h>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::cuda_emulator::fiber().thread)
#define blockIdx (::cuda_emulator::block().index)
#define blockDim (::cuda_emulator::block().dimensions)
#define gridDim (::cuda_emulator::block().grid)
constexpr int warpSize = 32;

inline void __syncthreads(uint32_t line = __builtin_LINE()) {
    cuda_emulator_block_barrier(line);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

namespace cuda_emulator {

// The shared memory of the block.
inline char* shared_memory(size_t alignment) {
    char* const start = block().shared;
    if (reinterpret_cast<uintptr_t>(start) % alignment != 0) {
        cuda_emulator_fail("shared memory is not aligned to %zu bytes", alignment);
    }
    return start;
}

}  // namespace cuda_emulator

#include "warp.h"
#include "math.cuh"
#include "ptx.h"
#include "mma.h"

namespace cuda_emulator {

// Calls a kernel as CUDA's driver does: every argument by its address.
template <class... Arguments, size_t... Index>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<Index...>) {
    kernel(*static_cast<std::remove_const_t<Arguments>*>(arguments[Index])...);
}

template <class... Arguments>
void call(void (*kernel)(Arguments...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<Arguments...>{});
}

// How many arguments a kernel has, or the size of one of them.
template <class... Arguments>
size_t size_of_argument(void (*)(Arguments...), size_t index) {
    const size_t sizes[] = {sizeof(Arguments)..., 0};
    return index < sizeof...(Arguments) ? sizes[index] : 0;
}

}  // namespace cuda_emulator

#define CUDA_EMULATOR_ENTRY(kernel)                                                                                   \
    extern "C" void cuda_emulator_entry(void** arguments) { ::cuda_emulator::call(&kernel, arguments); }              \
    extern "C" size_t cuda_emulator_argument(size_t index) { return ::cuda_emulator::size_of_argument(&kernel, index); }

// Kernels declare the fixed widths themselves, as CUDA's compiler for strings wants it. These two are other types than here.
#define uint64_t cuda_uint64_t
#define int64_t cuda_int64_t
