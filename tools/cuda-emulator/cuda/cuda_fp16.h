// f16, as the compiler's own `_Float16` rounds it.
#pragma once

#include "halves.h"

struct __half {
    uint16_t bits;

    __half() = default;
    __half(float x) : bits(round(x)) {}
    template <class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>
    __half(T x) : bits(round(x)) {}
    operator float() const { return __builtin_bit_cast(_Float16, bits); }

    static __half from_bits(uint16_t bits) {
        __half half;
        half.bits = bits;
        return half;
    }

private:
    template <class T>
    static uint16_t round(T x) {
        return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
    }
};

struct alignas(4) __half2 {
    __half x, y;
};

using half = __half;
using half2 = __half2;

CUDA_EMULATOR_HALVES(__half, __half2)

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return x; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half __low2half(__half2 x) { return x.x; }
inline __half __high2half(__half2 x) { return x.y; }
inline __half __ushort_as_half(uint16_t x) { return __half::from_bits(x); }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
