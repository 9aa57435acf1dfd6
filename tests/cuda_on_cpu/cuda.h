/* The part of the driver's interface that qwen3_cuda.cu names: tensor maps, which no kernel here can use. */
#ifndef CUDA_ON_CPU_DRIVER_H
#define CUDA_ON_CPU_DRIVER_H
#include "cuda_runtime.h"
typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
struct alignas(64) CUtensorMap { cuuint64_t words[16]; };
enum CUresult { CUDA_SUCCESS = 0 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault };
static inline cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **f, unsigned, unsigned long long,
                                                           cudaDriverEntryPointQueryResult *found) {
    *f = NULL;
    *found = cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
#endif
