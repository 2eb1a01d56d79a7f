// What kernels and the scheduler know of each other: threads are fibers, in warps, in a block.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
    uint32_t x, y, z;
};
using dim3 = uint3;

namespace cuda_emulator {
struct Fiber;
}

// The running fiber.
extern "C" __thread cuda_emulator::Fiber* cuda_emulator_fiber;

namespace cuda_emulator {

constexpr uint32_t WARP = 32;

// Bytes that a lane can give to, and get from, an operation of its warp.
constexpr size_t LANE_BYTES = 128;

enum class State : uint32_t { ready, at_block_barrier, at_warp_operation, polling, exited };

struct Warp;
struct Block;

struct Fiber {
    void* stack_pointer;
    Warp* warp;
    Block* block;
    uint3 thread;
    uint32_t index;
    uint32_t lane;
    State state;
    // Where it waits: the operation, and its line in the source.
    const char* operation;
    uint32_t line;
};

// A warp, and the memory through which its lanes exchange registers. There are two halves, used in turn: who gives to one
// operation may still be read by slower lanes of the operation before.
struct Warp {
    uint32_t lanes;
    uint32_t exited_mask;
    uint32_t arrived_mask;
    uint32_t turn;
    const char* operation;
    uint32_t line;
    alignas(16) unsigned char given[2][WARP][LANE_BYTES];
    alignas(16) unsigned char taken[2][WARP][LANE_BYTES];
};

// Memory and threads of the block that runs on this thread of the operating system.
struct Block {
    uint3 grid;
    uint3 dimensions;
    uint3 index;
    char* shared;
    uint32_t shared_bytes;
    uint32_t threads;
    uint32_t arrived;
    uint32_t exited;
    // Grows whenever something happens that a polling fiber may wait for.
    uint64_t events;
};

// Called when the lanes of a warp have all arrived: makes `taken` from `given`.
using Combine = void (*)(Warp& warp, unsigned char (*given)[LANE_BYTES], unsigned char (*taken)[LANE_BYTES]);

inline Fiber& fiber() {
    return *cuda_emulator_fiber;
}

inline Block& block() {
    return *cuda_emulator_fiber->block;
}

// Lanes of the warp that have not returned.
inline uint32_t live_lanes(const Warp& warp) {
    const uint32_t all = warp.lanes == WARP ? ~0u : (1u << warp.lanes) - 1;
    return all & ~warp.exited_mask;
}

}  // namespace cuda_emulator

// Ends the launch with an error. A format of printf, and its arguments.
extern "C" [[noreturn]] void cuda_emulator_fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// All threads of the block arrive, then all go on.
extern "C" void cuda_emulator_block_barrier(uint32_t line);

// All lanes of the warp arrive with what they give, `combine` runs once (it may be null), and all go on. Returns the half of the
// warp's memory in which what was given, and is to be taken, lies until the next operation but one.
extern "C" uint32_t cuda_emulator_warp_operation(
    const char* operation, uint32_t line, const void* given, size_t bytes, cuda_emulator::Combine combine);

// Lets other fibers run, until something has happened.
extern "C" void cuda_emulator_poll(uint32_t line);

// Begins a copy of this thread, of `read` bytes and zeros up to `bytes`. Until it is done, the destination holds NaN.
extern "C" void cuda_emulator_begin_copy(void* destination, const void* source, uint32_t bytes, uint32_t read);

// The copies that this thread has begun since it last did this: they are done when somebody waits for `barrier`, or, if that is
// null, when the thread itself waits for its groups of copies.
extern "C" void cuda_emulator_commit_copies(const void* barrier);

// Does the copies that belong to a barrier. Returns how often they were committed.
extern "C" uint32_t cuda_emulator_complete_copies(const void* barrier);

// Does the copies of this thread, but for its `last` groups.
extern "C" void cuda_emulator_complete_groups(uint32_t last);
