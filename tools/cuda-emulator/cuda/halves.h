// What f16 and bf16 have in common: arithmetic in f32, rounded once. Two roundings of a sum, product, quotient or root of 11-bit
// numbers, first to 24 bits, are one; a multiply-add goes by way of f64 instead.
#pragma once

#define CUDA_EMULATOR_HALVES(Scalar, Pair)                                                                               \
    inline Scalar operator+(Scalar a, Scalar b) { return Scalar(float(a) + float(b)); }                                  \
    inline Scalar operator-(Scalar a, Scalar b) { return Scalar(float(a) - float(b)); }                                  \
    inline Scalar operator*(Scalar a, Scalar b) { return Scalar(float(a) * float(b)); }                                  \
    inline Scalar operator/(Scalar a, Scalar b) { return Scalar(float(a) / float(b)); }                                  \
    inline Scalar operator-(Scalar a) { return Scalar::from_bits(a.bits ^ 0x8000); }                                     \
    inline Scalar& operator+=(Scalar& a, Scalar b) { return a = a + b; }                                                 \
    inline Scalar& operator-=(Scalar& a, Scalar b) { return a = a - b; }                                                 \
    inline Scalar& operator*=(Scalar& a, Scalar b) { return a = a * b; }                                                 \
    inline Scalar& operator/=(Scalar& a, Scalar b) { return a = a / b; }                                                 \
    inline bool operator==(Scalar a, Scalar b) { return float(a) == float(b); }                                          \
    inline bool operator!=(Scalar a, Scalar b) { return float(a) != float(b); }                                          \
    inline bool operator<(Scalar a, Scalar b) { return float(a) < float(b); }                                            \
    inline bool operator>(Scalar a, Scalar b) { return float(a) > float(b); }                                            \
    inline bool operator<=(Scalar a, Scalar b) { return float(a) <= float(b); }                                          \
    inline bool operator>=(Scalar a, Scalar b) { return float(a) >= float(b); }                                          \
    inline Scalar __hfma(Scalar a, Scalar b, Scalar c) { return Scalar(double(float(a)) * float(b) + float(c)); }        \
    inline Scalar __habs(Scalar a) { return Scalar::from_bits(a.bits & 0x7FFF); }                                        \
    inline Scalar __hmin(Scalar a, Scalar b) { return Scalar(fminf(a, b)); }                                             \
    inline Scalar __hmax(Scalar a, Scalar b) { return Scalar(fmaxf(a, b)); }                                             \
    inline bool __hisnan(Scalar a) { return isnan(float(a)); }                                                           \
    inline int __hisinf(Scalar a) { return isinf(float(a)) ? (float(a) < 0 ? -1 : 1) : 0; }                              \
    inline Scalar __hmin_nan(Scalar a, Scalar b) { return __hisnan(a) ? a : __hisnan(b) ? b : __hmin(a, b); }            \
    inline Scalar __hmax_nan(Scalar a, Scalar b) { return __hisnan(a) ? a : __hisnan(b) ? b : __hmax(a, b); }            \
    inline Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }                                             \
    inline Pair operator-(Pair a, Pair b) { return {a.x - b.x, a.y - b.y}; }                                             \
    inline Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }                                             \
    inline Pair operator/(Pair a, Pair b) { return {a.x / b.x, a.y / b.y}; }                                             \
    inline Pair operator-(Pair a) { return {-a.x, -a.y}; }                                                               \
    inline Pair __hfma2(Pair a, Pair b, Pair c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }               \
    inline Pair __habs2(Pair a) { return {__habs(a.x), __habs(a.y)}; }                                                   \
    inline Pair __hmin2(Pair a, Pair b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }                                 \
    inline Pair __hmax2(Pair a, Pair b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                                 \
    inline Pair __hmin2_nan(Pair a, Pair b) { return {__hmin_nan(a.x, b.x), __hmin_nan(a.y, b.y)}; }                     \
    inline Pair __hmax2_nan(Pair a, Pair b) { return {__hmax_nan(a.x, b.x), __hmax_nan(a.y, b.y)}; }                     \
    CUDA_EMULATOR_HALF_FUNCTION(Scalar, Pair, exp, expf)                                                                 \
    CUDA_EMULATOR_HALF_FUNCTION(Scalar, Pair, log, logf)                                                                 \
    CUDA_EMULATOR_HALF_FUNCTION(Scalar, Pair, sin, sinf)                                                                 \
    CUDA_EMULATOR_HALF_FUNCTION(Scalar, Pair, cos, cosf)                                                                 \
    CUDA_EMULATOR_HALF_FUNCTION(Scalar, Pair, tanh, tanhf)                                                               \
    CUDA_EMULATOR_HALF_FUNCTION(Scalar, Pair, sqrt, sqrtf)                                                               \
    CUDA_EMULATOR_HALF_FUNCTION(Scalar, Pair, rsqrt, rsqrt)                                                              \
    CUDA_EMULATOR_HALF_FUNCTION(Scalar, Pair, ceil, ceilf)                                                               \
    CUDA_EMULATOR_HALF_FUNCTION(Scalar, Pair, trunc, truncf)                                                             \
    CUDA_EMULATOR_HALF_FUNCTION(Scalar, Pair, floor, floorf)                                                             \
    CUDA_EMULATOR_HALF_FUNCTION(Scalar, Pair, rint, rintf)

// A function of one and of two numbers: `hexp` and `h2exp`.
#define CUDA_EMULATOR_HALF_FUNCTION(Scalar, Pair, name, function)            \
    inline Scalar h##name(Scalar a) { return Scalar(function(float(a))); }   \
    inline Pair h2##name(Pair a) { return {h##name(a.x), h##name(a.y)}; }
