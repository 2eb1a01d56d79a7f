// CUDA's functions of numbers. The fast ones are the accurate ones here.
#pragma once

#define CUDA_EMULATOR_INTEGERS(T)                              \
    inline T min(T a, T b) { return b < a ? b : a; }           \
    inline T max(T a, T b) { return a < b ? b : a; }

CUDA_EMULATOR_INTEGERS(int)
CUDA_EMULATOR_INTEGERS(unsigned)
CUDA_EMULATOR_INTEGERS(long)
CUDA_EMULATOR_INTEGERS(unsigned long)
CUDA_EMULATOR_INTEGERS(long long)
CUDA_EMULATOR_INTEGERS(unsigned long long)
#undef CUDA_EMULATOR_INTEGERS

inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rhypotf(float x, float y) { return 1.0f / hypotf(x, y); }
inline double rhypot(double x, double y) { return 1.0 / hypot(x, y); }

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __clzll(uint64_t x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(x); }
inline int __ffsll(uint64_t x) { return __builtin_ffsll(x); }
inline int __mulhi(int a, int b) { return static_cast<int64_t>(a) * b >> 32; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline int64_t __mul64hi(int64_t a, int64_t b) { return static_cast<__int128>(a) * b >> 64; }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return static_cast<unsigned __int128>(a) * b >> 64; }

inline uint32_t __brev(uint32_t x) {
    uint32_t reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
    return reversed;
}

inline uint64_t __brevll(uint64_t x) {
    return static_cast<uint64_t>(__brev(x)) << 32 | __brev(x >> 32);
}
