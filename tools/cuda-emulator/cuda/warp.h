// What the lanes of a warp do together. All lanes must take part; an operation is a barrier of the warp.
#pragma once

inline uint32_t __activemask() {
    return ::cuda_emulator::live_lanes(*::cuda_emulator::fiber().warp);
}

inline void __syncwarp(uint32_t mask = 0xFFFFFFFFu, uint32_t line = __builtin_LINE()) {
    (void)mask;
    cuda_emulator_warp_operation("__syncwarp", line, nullptr, 0, nullptr);
}

namespace cuda_emulator {

// The lanes that a mask names must be all that there are.
inline void check_mask(const char* operation, uint32_t mask, uint32_t line) {
    const uint32_t live = live_lanes(*fiber().warp);
    if ((mask & live) != live) {
        cuda_emulator_fail("%s (line %u) of some lanes, mask 0x%08x: the emulator has it of all lanes only", operation, line,
                           mask);
    }
}

// What lane `source` gives.
template <class T>
T from_lane(const char* operation, uint32_t mask, T value, uint32_t source, uint32_t line) {
    static_assert(sizeof(T) <= LANE_BYTES && std::is_trivially_copyable_v<T>);
    check_mask(operation, mask, line);
    Warp& warp = *fiber().warp;
    const uint32_t turn = cuda_emulator_warp_operation(operation, line, &value, sizeof(T), nullptr);
    if (source >= warp.lanes) {
        cuda_emulator_fail("%s (line %u) reads lane %u, which the warp does not have", operation, line, source);
    }
    memcpy(&value, warp.given[turn][source], sizeof(T));
    return value;
}

// The lanes whose predicate holds.
inline uint32_t ballot(const char* operation, uint32_t mask, bool predicate, uint32_t line) {
    check_mask(operation, mask, line);
    Warp& warp = *fiber().warp;
    const uint32_t turn = cuda_emulator_warp_operation(operation, line, &predicate, sizeof(bool), nullptr);
    uint32_t lanes = 0;
    for (uint32_t lane = 0; lane < warp.lanes; ++lane) {
        lanes |= static_cast<uint32_t>(warp.given[turn][lane][0]) << lane;
    }
    return lanes;
}

}  // namespace cuda_emulator

template <class T>
T __shfl_sync(uint32_t mask, T value, uint32_t source, uint32_t line = __builtin_LINE()) {
    return ::cuda_emulator::from_lane("__shfl_sync", mask, value, source % 32, line);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, uint32_t lanes, uint32_t line = __builtin_LINE()) {
    const uint32_t own = ::cuda_emulator::fiber().lane;
    const uint32_t source = own ^ lanes;
    return ::cuda_emulator::from_lane("__shfl_xor_sync", mask, value, source < 32 ? source : own, line);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t delta, uint32_t line = __builtin_LINE()) {
    const uint32_t own = ::cuda_emulator::fiber().lane;
    return ::cuda_emulator::from_lane("__shfl_up_sync", mask, value, own >= delta ? own - delta : own, line);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t delta, uint32_t line = __builtin_LINE()) {
    const uint32_t own = ::cuda_emulator::fiber().lane;
    return ::cuda_emulator::from_lane("__shfl_down_sync", mask, value, own + delta < 32 ? own + delta : own, line);
}

inline uint32_t __ballot_sync(uint32_t mask, bool predicate, uint32_t line = __builtin_LINE()) {
    return ::cuda_emulator::ballot("__ballot_sync", mask, predicate, line);
}

inline int __all_sync(uint32_t mask, bool predicate, uint32_t line = __builtin_LINE()) {
    return ::cuda_emulator::ballot("__all_sync", mask, predicate, line) == __activemask();
}

inline int __any_sync(uint32_t mask, bool predicate, uint32_t line = __builtin_LINE()) {
    return ::cuda_emulator::ballot("__any_sync", mask, predicate, line) != 0;
}
