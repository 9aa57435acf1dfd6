/* What tests/cuda_lab.cu gives to tests, bench and tools beside the library's backend: the standard path, and the CUDA
   backend's operations one by one. Include qwen3.h with its implementation before this. */
#ifndef QWEN3_TESTS_CUDA_LAB_H
#define QWEN3_TESTS_CUDA_LAB_H

/* The kernels of qwen3_cuda.cu one by one, for tests and benches: a model of any shape with a context, whose
   float32 buffers can be set and read, and the operations on them. Rows: as in a batch. */
typedef enum lab_buffer {        /* [n_rows, width] float32 */
    LAB_X, LAB_H, LAB_Q, LAB_A, LAB_M, LAB_LOGITS
} lab_buffer;                    /* n_embd, n_embd, q_dim, q_dim, n_ff, n_vocab (of the first 32 rows, or as many as sequences) */
typedef enum lab_op {
    LAB_EMBED,                   /* X = rows of the embedding                      qwen3i_embed */
    LAB_NORM,                    /* H = rmsnorm(X) with the layer's attn_norm      qwen3i_rmsnorm */
    LAB_QKV_ROPE,                /* Q, and K and V in the cache, from H            qwen3i_matmul_qkv, _rmsnorm_heads, _rope */
    LAB_NORM_QKV,               /* the same from X, with the norm where a step has it     qwen3i_rmsnorm, ... */
    LAB_ATTENTION,               /* A from Q and the cache                         qwen3i_attention */
    LAB_O_PROJ,                  /* X += Wo A                                      qwen3i_matmul_add */
    LAB_MLP,                     /* M = silu(Wgate H) * (Wup H)                    qwen3i_swiglu */
    LAB_NORM_MLP,               /* the same from X                                       qwen3i_rmsnorm, ... */
    LAB_DOWN,                    /* X += Wdown M                                   qwen3i_matmul_add */
    LAB_HEAD,                    /* LOGITS = head rmsnorm(X)                       qwen3i_rmsnorm, qwen3i_matmul */
    LAB_FIRST_HALF,              /* X = the layer's first half of X, and K and V, where a step takes two kernels a layer */
    LAB_SECOND_HALF,             /* X = the second half of X                       qwen3i_rmsnorm, qwen3i_swiglu, ... */
    LAB_STEP                     /* all of a decode step, as next() does it        */
} lab_op;
typedef struct cuda_lab_functions {
    const char  *(*no_device)(void);    /* NULL if device 0 can be used, else why not */
    int          (*two_kernels)(const void *ctx);           /* does one row take two kernels a layer? */
    int          (*own_products)(const void *ctx, int rows);    /* do products of so many rows go without cuBLASLt? */
    /* Row-wise RMSNorm by itself, from and to host memory; x of any type, in place on the device if it is F32. */
    qwen3_result (*rmsnorm)(float *y, const void *x, qwen3i_type type, const float *gain, int n, int width, float eps,
                            int repeat, float *us, const qwen3i_err *err);
    /* ctx is the ctx_state of the backend's functions. Rows of the batch that the operations then work on. */
    qwen3_result (*rows)(void *ctx, const qwen3i_batch *batch, const qwen3i_err *err);
    qwen3_result (*put)(void *ctx, lab_buffer buffer, const float *from, const qwen3i_err *err);
    qwen3_result (*get)(void *ctx, lab_buffer buffer, float *to, const qwen3i_err *err);
    /* Run it `repeat` times on a layer (-1: on each in turn); us (may be NULL): mean microseconds by the device's clock. */
    qwen3_result (*run)(void *ctx, lab_op op, int layer, int repeat, float *us, const qwen3i_err *err);
    /* What the device can do: bytes read, and multiplications and additions of a large F16 product, in a second. */
    qwen3_result (*limits)(void *ctx, double *bytes, double *flop, const qwen3i_err *err);
} cuda_lab_functions;

#ifdef __cplusplus
extern "C" {
#endif
enum { LAB_FUSED, LAB_STANDARD };
extern const cuda_lab_functions *cuda_lab(void);
/* The CUDA backend whose contexts take the standard path: cuBLASLt and one plain kernel for each operation. */
extern const qwen3_backend *cuda_lab_standard(void);
#ifdef __cplusplus
}
#endif
#endif
