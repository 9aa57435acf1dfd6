#ifndef CUDA_ON_CPU_FP16_H
#define CUDA_ON_CPU_FP16_H
#include "cuda_runtime.h"
struct __half { unsigned short bits; };
static inline __half __ushort_as_half(unsigned short u) { __half h; h.bits = u; return h; }
static inline unsigned short __half_as_ushort(__half h) { return h.bits; }

static inline float __half2float(__half h) {
    const unsigned sign = (unsigned)(h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31u, fraction = h.bits & 1023u;
    if (exponent == 31) return __uint_as_float(sign | 0x7F800000u | fraction << 13);
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 5.9604644775390625e-8f;
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}

/* Round to nearest, ties to even. */
static inline __half __float2half_rn(float f) {
    const unsigned u = __float_as_uint(f), sign = u >> 16 & 0x8000u, a = u & 0x7FFFFFFFu;
    if (a > 0x7F800000u) return __ushort_as_half(0x7FFF);
    if (a >= 0x477FF000u) return __ushort_as_half((unsigned short)(sign | 0x7C00u));
    if (a < 0x38800000u) return __ushort_as_half((unsigned short)(sign | (unsigned)lrintf(__uint_as_float(a) * 16777216.0f)));
    return __ushort_as_half((unsigned short)(sign | (a - 0x38000000u + 0xFFFu + (a >> 13 & 1u)) >> 13));
}
#endif
