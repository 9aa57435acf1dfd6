/* The part of cuBLASLt that qwen3_cuda.cu calls: y = alpha op(w) x, column-major, float32 sums. */
#ifndef CUDA_ON_CPU_CUBLASLT_H
#define CUDA_ON_CPU_CUBLASLT_H
#include "cuda_runtime.h"
enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_ALLOC_FAILED = 3, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cudaDataType_t { CUDA_R_32F, CUDA_R_16F };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_PEDANTIC };
enum {
    CUBLASLT_MATMUL_DESC_TRANSA,
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
    CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE
};
struct emulated_layout { cudaDataType_t type; uint64_t rows, cols; int64_t ld; };
struct emulated_op { cublasOperation_t a; };
struct emulated_wish { uint32_t align_in, align_out; };
typedef emulated_layout *cublasLtMatrixLayout_t;
typedef emulated_op *cublasLtMatmulDesc_t;
typedef emulated_wish *cublasLtMatmulPreference_t;
typedef struct emulated_handle { int live; } *cublasLtHandle_t;
struct cublasLtMatmulAlgo_t { uint32_t align_in, align_out; };
struct cublasLtMatmulHeuristicResult_t { cublasLtMatmulAlgo_t algo; };

static inline cublasStatus_t emulated_status() {
    return emulated_call() == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}
template <class T> cublasStatus_t emulated_new(T **p, const T &v) {
    *p = NULL;
    if (emulated_status() != CUBLAS_STATUS_SUCCESS) return CUBLAS_STATUS_ALLOC_FAILED;
    *p = new T(v);
    emulated_live++;
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) { return emulated_new(h, emulated_handle()); }
static inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t h) {
    emulated_live--;
    delete h;
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *d, cublasComputeType_t, cudaDataType_t) {
    return emulated_new(d, emulated_op());
}
static inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t d) {
    emulated_live--;
    delete d;
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, int, const void *v, size_t n) {
    memcpy(&d->a, v, n);
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *l, cudaDataType_t type, uint64_t rows,
                                                        uint64_t cols, int64_t ld) {
    const emulated_layout v = {type, rows, cols, ld};
    return emulated_new(l, v);
}
static inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t l) {
    emulated_live--;
    delete l;
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *p) {
    return emulated_new(p, emulated_wish());
}
static inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) {
    emulated_live--;
    delete p;
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, int what, const void *v,
                                                                  size_t) {
    if (what == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES) memcpy(&p->align_in, v, 4);
    if (what == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES) memcpy(&p->align_out, v, 4);
    return CUBLAS_STATUS_SUCCESS;
}
static inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                                            cublasLtMatrixLayout_t w, cublasLtMatrixLayout_t x,
                                                            cublasLtMatrixLayout_t y, cublasLtMatrixLayout_t,
                                                            cublasLtMatmulPreference_t wish, int,
                                                            cublasLtMatmulHeuristicResult_t *found, int *n) {
    *n = w->rows == x->rows && y->rows == w->cols && y->cols == x->cols;
    found->algo.align_in = wish->align_in;
    found->algo.align_out = wish->align_out;
    return *n ? emulated_status() : CUBLAS_STATUS_NOT_SUPPORTED;
}
static inline float emulated_load(const void *p, size_t i, cudaDataType_t type) {
    return type == CUDA_R_32F ? ((const float *)p)[i] : __half2float(((const __half *)p)[i]);
}
static inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const float *alpha, const void *w,
                                            cublasLtMatrixLayout_t wl, const void *x, cublasLtMatrixLayout_t xl,
                                            const float *beta, const void *, cublasLtMatrixLayout_t, float *y,
                                            cublasLtMatrixLayout_t yl, const cublasLtMatmulAlgo_t *algo, void *, size_t,
                                            cudaStream_t s) {
    const emulated_layout a = *wl, b = *xl, d = *yl;
    const float scale = *alpha, add = *beta;
    if (a.type != b.type) return CUBLAS_STATUS_NOT_SUPPORTED;
    if ((uintptr_t)w % algo->align_in || (uintptr_t)x % algo->align_in || (uintptr_t)y % algo->align_out ||
        (uint64_t)d.ld * 4 % algo->align_out || (uint64_t)a.ld * (a.type == CUDA_R_32F ? 4 : 2) % algo->align_in)
        emulated::die("a matrix product is not aligned as was promised");
    return emulated_enqueue(s, [=] {
        std::vector<float> column(b.rows);
        for (uint64_t j = 0; j < b.cols; j++) {
            for (uint64_t k = 0; k < b.rows; k++) column[k] = emulated_load(x, k + j * (uint64_t)b.ld, b.type);
            for (uint64_t i = 0; i < a.cols; i++) {
                float sum = 0;
                for (uint64_t k = 0; k < a.rows; k++)
                    sum += emulated_load(w, k + i * (uint64_t)a.ld, a.type) * column[k];
                float &to = y[i + j * (uint64_t)d.ld];
                to = scale * sum + (add != 0 ? add * to : 0);
            }
        }
    }) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}
#endif
