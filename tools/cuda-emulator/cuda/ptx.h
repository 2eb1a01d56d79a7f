// PTX instructions, by name with `_` for what is no letter or digit. Registers that are written come first.
#pragma once

#include "barrier.h"
#include "matrix.h"

inline uint32_t __cvta_generic_to_shared(const void* pointer, uint32_t line = __builtin_LINE()) {
    const ptrdiff_t offset = static_cast<const char*>(pointer) - ::cuda_emulator::block().shared;
    if (offset < 0 || offset > ::cuda_emulator::block().shared_bytes) {
        cuda_emulator_fail("%p is no address of shared memory (line %u)", pointer, line);
    }
    return offset;
}

namespace cuda_emulator::ptx {

template <class Half>
void product(float& d0, float& d1, float& d2, float& d3, const ProductInput& input, uint32_t line) {
    Fiber& own = fiber();
    if (own.warp->lanes != WARP) cuda_emulator_fail("mma.sync (line %u) in a warp of %u lanes", line, own.warp->lanes);
    const uint32_t turn = cuda_emulator_warp_operation("mma.sync", line, &input, sizeof(input), multiply<Half>);
    float d[4];
    memcpy(d, own.warp->taken[turn][own.lane], sizeof(d));
    d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
}

#define CUDA_EMULATOR_PRODUCT(name, Half)                                                                              \
    inline void name(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,   \
                     uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3,                                 \
                     uint32_t line = __builtin_LINE()) {                                                               \
        product<Half>(d0, d1, d2, d3, ProductInput{{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}}, line);               \
    }

CUDA_EMULATOR_PRODUCT( mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, __half)
CUDA_EMULATOR_PRODUCT( mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, __nv_bfloat16)
#undef CUDA_EMULATOR_PRODUCT

#define CUDA_EMULATOR_MATRICES(suffix, transposed)                                                                     \
    inline void ldmatrix_sync_aligned_m8n8_x1##suffix(uint32_t& r0, uint32_t address, uint32_t line = __builtin_LINE()) { \
        uint32_t r[1];                                                                                                 \
        load_matrices<transposed>(r, address, line);                                                                   \
        r0 = r[0];                                                                                                     \
    }                                                                                                                  \
    inline void ldmatrix_sync_aligned_m8n8_x2##suffix(uint32_t& r0, uint32_t& r1, uint32_t address,                    \
                                                      uint32_t line = __builtin_LINE()) {                              \
        uint32_t r[2];                                                                                                 \
        load_matrices<transposed>(r, address, line);                                                                   \
        r0 = r[0], r1 = r[1];                                                                                          \
    }                                                                                                                  \
    inline void ldmatrix_sync_aligned_m8n8_x4##suffix(uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3,          \
                                                      uint32_t address, uint32_t line = __builtin_LINE()) {            \
        uint32_t r[4];                                                                                                 \
        load_matrices<transposed>(r, address, line);                                                                   \
        r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3];                                                                    \
    }                                                                                                                  \
    inline void stmatrix_sync_aligned_m8n8_x1##suffix(uint32_t address, uint32_t r0, uint32_t line = __builtin_LINE()) { \
        store_matrices<transposed>({r0}, address, line);                                                               \
    }                                                                                                                  \
    inline void stmatrix_sync_aligned_m8n8_x2##suffix(uint32_t address, uint32_t r0, uint32_t r1,                      \
                                                      uint32_t line = __builtin_LINE()) {                              \
        store_matrices<transposed>({r0, r1}, address, line);                                                           \
    }                                                                                                                  \
    inline void stmatrix_sync_aligned_m8n8_x4##suffix(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,         \
                                                      uint32_t r3, uint32_t line = __builtin_LINE()) {                 \
        store_matrices<transposed>({r0, r1, r2, r3}, address, line);                                                   \
    }

CUDA_EMULATOR_MATRICES(_shared__cta_b16, false)
CUDA_EMULATOR_MATRICES(_trans_shared__cta_b16, true)
CUDA_EMULATOR_MATRICES(_shared_b16, false)
CUDA_EMULATOR_MATRICES(_trans_shared_b16, true)
#undef CUDA_EMULATOR_MATRICES

// The first lane is elected.
inline void elect_sync(uint32_t& elected, uint32_t line = __builtin_LINE()) {
    cuda_emulator_warp_operation("elect.sync", line, nullptr, 0, nullptr);
    elected = fiber().lane == 0;
}

inline void ex2_approx_f32(float& d, float a) { d = exp2f(a); }
inline void ex2_approx_ftz_f32(float& d, float a) { d = exp2f(a); }
inline void lg2_approx_f32(float& d, float a) { d = log2f(a); }
inline void lg2_approx_ftz_f32(float& d, float a) { d = log2f(a); }
inline void rcp_approx_f32(float& d, float a) { d = 1.0f / a; }
inline void rcp_approx_ftz_f32(float& d, float a) { d = 1.0f / a; }

// Copies from global to shared memory that go on by themselves.
inline void cp_async(uint32_t shared, const void* global, uint32_t bytes, uint32_t read, uint32_t line) {
    cuda_emulator_begin_copy(shared_address("cp.async", shared, bytes, line), global, bytes, read);
}

#define CUDA_EMULATOR_COPY(name)                                                                                       \
    inline void name(uint32_t shared, const void* global, uint32_t bytes, uint32_t read,                               \
                     uint32_t line = __builtin_LINE()) {                                                               \
        cp_async(shared, global, bytes, read, line);                                                                   \
    }                                                                                                                  \
    inline void name(uint32_t shared, const void* global, uint32_t bytes) {                                            \
        cp_async(shared, global, bytes, bytes, 0);                                                                     \
    }

CUDA_EMULATOR_COPY(cp_async_ca_shared__cta_global)
CUDA_EMULATOR_COPY(cp_async_cg_shared__cta_global)
CUDA_EMULATOR_COPY(cp_async_ca_shared_global)
CUDA_EMULATOR_COPY(cp_async_cg_shared_global)
#undef CUDA_EMULATOR_COPY

inline void cp_async_commit_group() { cuda_emulator_commit_copies(nullptr); }
inline void cp_async_wait_group(uint32_t last) { cuda_emulator_complete_groups(last); }
inline void cp_async_wait_all() {
    cuda_emulator_commit_copies(nullptr);
    cuda_emulator_complete_groups(0);
}

// The copies that the thread has begun arrive at the barrier when they are done; it waits for that too.
inline void cp_async_mbarrier_arrive_shared__cta_b64(uint32_t address, uint32_t line = __builtin_LINE()) {
    using Barrier = ::cuda::barrier<::cuda::thread_scope_block>;
    auto* const barrier = reinterpret_cast<Barrier*>(shared_address("cp.async.mbarrier", address, 8, line));
    cuda_emulator_commit_copies(barrier);
    barrier->add_pending(1);
}

// Two f32 to two halves in a register: `a` becomes the upper one.
inline void cvt_rn_f16x2_f32(uint32_t& d, float a, float b) { d = __half(b).bits | __half(a).bits << 16; }
inline void cvt_rn_bf16x2_f32(uint32_t& d, float a, float b) { d = __nv_bfloat16(b).bits | __nv_bfloat16(a).bits << 16; }

// Sums and differences that stop at the ends of the range.
inline void add_sat_s32(int32_t& d, int32_t a, int32_t b) {
    if (__builtin_add_overflow(a, b, &d)) d = b < 0 ? INT32_MIN : INT32_MAX;
}
inline void sub_sat_s32(int32_t& d, int32_t a, int32_t b) {
    if (__builtin_sub_overflow(a, b, &d)) d = b < 0 ? INT32_MAX : INT32_MIN;
}

}  // namespace cuda_emulator::ptx
