#ifndef CUDA_ON_CPU_BF16_H
#define CUDA_ON_CPU_BF16_H
#include "cuda_runtime.h"
struct __nv_bfloat16 { unsigned short bits; };
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
static inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float((unsigned)h.bits << 16); }
static inline __nv_bfloat16 __float2bfloat16_rn(float f) {
    const unsigned u = __float_as_uint(f);
    __nv_bfloat16 h;
    h.bits = (u & 0x7FFFFFFFu) > 0x7F800000u ? (unsigned short)0x7FFF : (unsigned short)((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
    return h;
}
#endif
