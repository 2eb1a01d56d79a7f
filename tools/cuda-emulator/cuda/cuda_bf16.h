// bf16: the upper half of an f32, rounded to the nearest, ties to even.
#pragma once

#include "halves.h"

struct __nv_bfloat16 {
    uint16_t bits;

    __nv_bfloat16() = default;
    __nv_bfloat16(float x) : bits(round(x)) {}
    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
    __nv_bfloat16(T x) : bits(round(to_odd(x))) {}
    operator float() const { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

    static __nv_bfloat16 from_bits(uint16_t bits) {
        __nv_bfloat16 half;
        half.bits = bits;
        return half;
    }

private:
    static uint16_t round(float x) {
        const uint32_t all = __builtin_bit_cast(uint32_t, x);
        if (isnan(x)) return 0x7FFF;
        return (all + 0x7FFF + (all >> 16 & 1)) >> 16;
    }

    // To an f32 whose last bit tells of what was cut off, so that the second rounding is right.
    template <class T>
    static float to_odd(T x) {
        const double wide = x;
        const float near = wide;
        if (near == wide || isnan(near) || isinf(near)) return near;
        const float cut = fabs(double(near)) > fabs(wide) ? nextafterf(near, 0.0f) : near;
        return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, cut) | 1u);
    }
};

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

CUDA_EMULATOR_HALVES(__nv_bfloat16, __nv_bfloat162)

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t x) { return __nv_bfloat16::from_bits(x); }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
