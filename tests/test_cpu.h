/* The CPU backend: number formats, vector kernels, threads, each operation of the decoder layer against
   double precision, bit-identity whatever the batch, chunk, threads and neighbours, and whole forward
   passes of a small random model. Arrays are allocated at their exact size, so that a sanitizer sees
   every access beyond them. */
#ifndef QWEN3_TESTS_TEST_CPU_H
#define QWEN3_TESTS_TEST_CPU_H
#include "test.h"
#include <math.h>

static uint32_t cpu_seed = 1;

static double cpu_uniform(void) {               /* -1 .. 1 */
    cpu_seed = cpu_seed * 1664525u + 1013904223u;
    return (double)(cpu_seed >> 8) / 8388608.0 - 1.0;
}

static float *cpu_floats(size_t n, double scale) {
    float *p = (float *)malloc(n * 4 + (n == 0));
    size_t i;
    for (i = 0; i < n; i++) p[i] = (float)(scale * (cpu_uniform() + cpu_uniform()));
    return p;
}

static const qwen3i_type cpu_types[] = {QWEN3I_F32, QWEN3I_F16, QWEN3I_BF16};

static double cpu_at(const void *p, qwen3i_type type, size_t i) {
    if (type == QWEN3I_F16)  return (double)qwen3i_f16_to_f32(((const uint16_t *)p)[i]);
    if (type == QWEN3I_BF16) return (double)qwen3i_bf16_to_f32(((const uint16_t *)p)[i]);
    return (double)((const float *)p)[i];
}

static void cpu_put(void *p, qwen3i_type type, size_t i, double v) {
    if (type == QWEN3I_F16)       ((uint16_t *)p)[i] = qwen3i_f32_to_f16((float)v);
    else if (type == QWEN3I_BF16) ((uint16_t *)p)[i] = qwen3i_f32_to_bf16((float)v);
    else                          ((float *)p)[i] = (float)v;
}

static void *cpu_typed(size_t n, qwen3i_type type, double scale) {
    void *p = malloc(n * qwen3i_type_size(type) + (n == 0));
    size_t i;
    for (i = 0; i < n; i++) cpu_put(p, type, i, scale * cpu_uniform());
    return p;
}

static qwen3i_matrix cpu_matrix(int rows, int cols, qwen3i_type type, double scale) {
    qwen3i_matrix m;
    m.data = cpu_typed((size_t)rows * (size_t)cols, type, scale);
    m.rows = rows; m.cols = cols; m.type = type; m.factor = 0;
    return m;
}

static void cpu_matrix_free(qwen3i_matrix *m) {
    union { const void *in; void *out; } p;
    p.in = m->data;
    free(p.out);
}

/* The same bits; with -ffast-math the compiler may break that promise, but only so far. */
static int cpu_same(const float *a, const float *b, size_t n) {
#ifdef __FAST_MATH__
    size_t i;
    for (i = 0; i < n; i++)
        if (fabs((double)a[i] - (double)b[i]) > 1e-3 * (1 + fabs((double)a[i]))) return 0;
    return 1;
#else
    return memcmp(a, b, n * 4) == 0;
#endif
}
static float *cpu_copy(const float *p, size_t n) { float *q = (float *)malloc(n * 4); memcpy(q, p, n * 4); return q; }
static int cpu_finite(const float *p, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) if ((qwen3i_bits_from_float(p[i]) & 0x7F800000u) == 0x7F800000u) return 0;
    return 1;
}

/* ---- number formats ------------------------------------------------------------------------------ */
static void test_cpu_formats_roundtrip(void) {
    uint32_t i;
    for (i = 0; i < 65536; i++) {
        uint16_t h = (uint16_t)i;
        if ((h & 0x7C00u) != 0x7C00u) CHECK_MSG(qwen3i_f32_to_f16(qwen3i_f16_to_f32(h)) == h, "f16 %04x", i);
        if ((h & 0x7F80u) != 0x7F80u) CHECK_MSG(qwen3i_f32_to_bf16(qwen3i_bf16_to_f32(h)) == h, "bf16 %04x", i);
    }
    CHECK(qwen3i_f16_to_f32(0x3C00) == 1.0f && qwen3i_f16_to_f32(0x0001) == ldexpf(1.0f, -24));
    CHECK(qwen3i_f16_to_f32(0xC000) == -2.0f && qwen3i_f16_to_f32(0x03FF) == ldexpf(1023.0f, -24));
    CHECK(qwen3i_bf16_to_f32(0x3F80) == 1.0f && qwen3i_bf16_to_f32(0xC040) == -3.0f);
}

/* Between two neighbours of the format, everything goes to the nearer one, and ties to the even one. */
static void test_cpu_formats_rounding(void) {
    uint32_t i;
    for (i = 0; i < 0x7BFF; i++) {
        double low = (double)qwen3i_f16_to_f32((uint16_t)i), high = (double)qwen3i_f16_to_f32((uint16_t)(i + 1));
        float middle = (float)((low + high) / 2);
        CHECK(qwen3i_f32_to_f16(middle) == (uint16_t)(i + (i & 1)));
        CHECK(qwen3i_f32_to_f16(nextafterf(middle, 0.0f)) == (uint16_t)i);
        CHECK(qwen3i_f32_to_f16(-nextafterf(middle, 1e9f)) == (uint16_t)(0x8000u | (i + 1)));
    }
    for (i = 0; i < 0x7F7F; i++) {
        uint32_t middle = (i << 16) | 0x8000u;
        CHECK(qwen3i_f32_to_bf16(qwen3i_float_from_bits(middle)) == (uint16_t)(i + (i & 1)));
        CHECK(qwen3i_f32_to_bf16(qwen3i_float_from_bits(middle - 1)) == (uint16_t)i);
        CHECK(qwen3i_f32_to_bf16(qwen3i_float_from_bits(0x80000000u | (middle + 1))) == (uint16_t)(0x8000u | (i + 1)));
    }
    CHECK(qwen3i_f32_to_f16(65504.0f) == 0x7BFF && qwen3i_f32_to_f16(65520.0f) == 0x7BFF);
    CHECK(qwen3i_f32_to_f16(1e30f) == 0x7BFF && qwen3i_f32_to_f16(-1e30f) == 0xFBFF);
    CHECK(qwen3i_f32_to_bf16(FLT_MAX) == 0x7F7F && qwen3i_f32_to_bf16(-FLT_MAX) == 0xFF7F);
}

/* Rows of every length: each instruction set converts like the functions above. */
static void test_cpu_formats_rows(void) {
    const qwen3i_simd *simd;
    int level, i, n, t;
    for (level = 0; (simd = qwen3i_simd_level(level)) != NULL; level++)
        for (t = 0; t < 3; t++)
            for (n = 0; n < 70; n++) {
                float *x = cpu_floats((size_t)n, n % 3 == 0 ? 1e5 : n % 3 == 1 ? 1.0 : 1e-6),
                    *back = cpu_floats((size_t)n, 0);
                void *y = cpu_typed((size_t)n, cpu_types[t], 0), *expected = cpu_typed((size_t)n, cpu_types[t], 0);
                for (i = 0; i < n; i++) cpu_put(expected, cpu_types[t], (size_t)i, (double)x[i]);
                simd->store(y, x, cpu_types[t], n);
                CHECK_MSG(memcmp(y, expected, (size_t)n * qwen3i_type_size(cpu_types[t])) == 0, "%s store, %d",
                    simd->name, n);
                simd->load(back, y, cpu_types[t], n);
                for (i = 0; i < n; i++) CHECK((double)back[i] == cpu_at(y, cpu_types[t], (size_t)i));
                free(x); free(back); free(y); free(expected);
            }
}

/* ---- kernels -------------------------------------------------------------------------------------- */
#ifdef __FAST_MATH__                /* the compiler may join the two steps that reduce exp's argument in plain C: 4e-6 */
  #define CPU_EXP_BOUND  1e-5
  #define CPU_SILU_BOUND 1e-5
#else
  #define CPU_EXP_BOUND  1.5e-7     /* 2 ulp: 1.2e-7 to 2.4e-7 */
  #define CPU_SILU_BOUND 1e-6
#endif

static void test_cpu_exp(void) {
#ifdef __FAST_MATH__
    const double range = 80;        /* below, parts of the result are denormal and count as zero */
#else
    const double range = 87.3;
#endif
    const qwen3i_simd *simd;
    float x[997], y[997], z[997];
    int level, i, pass;
    for (level = 0; (simd = qwen3i_simd_level(level)) != NULL; level++) {
        double worst = 0;
        for (pass = 0; pass < 60; pass++) {
            for (i = 0; i < 997; i++) x[i] = (float)(pass < 30 ? range * cpu_uniform() : 1.5 * cpu_uniform());
            simd->exp(y, x, 0.0f, 997);
            for (i = 0; i < 997; i++) {
                double error = fabs((double)y[i] / exp((double)x[i]) - 1);
                if (error > worst) worst = error;
            }
            simd->exp(z, x + 3, 0.0f, 5);       /* the place in a vector makes no difference */
            CHECK(cpu_same(y + 3, z, 5));
        }
        CHECK_MSG(worst < CPU_EXP_BOUND, "%s: relative error %g", simd->name, worst);
        x[0] = 0.0f; x[1] = -88.0f; x[2] = -1e30f; x[3] = 1000.0f; x[4] = -0.0f; x[5] = -1e-40f;
        simd->exp(y, x, 0.0f, 6);
        CHECK(y[0] == 1.0f && y[1] == 0.0f && y[2] == 0.0f && y[3] > 1e38f && y[4] == 1.0f && y[5] == 1.0f);
        CHECK(cpu_finite(y, 6));
        simd->exp(y, x, 3.0f, 1);
        CHECK(fabs((double)y[0] - exp(-3.0)) < 1e-8);
    }
}

/* Every element of a product of any shape equals, bit for bit, the product of its own two rows. */
static void cpu_dot_case(const qwen3i_simd *simd, qwen3i_type type, int n_w, int n_x, int cols) {
    void *w = cpu_typed((size_t)n_w * (size_t)cols, type, 1.0);
    float *x = cpu_floats((size_t)n_x * (size_t)cols, 1.0), *y = cpu_floats((size_t)n_w * (size_t)n_x, 1.0), one;
    int r, t, k;
    simd->dot(y, (size_t)n_w, w, (size_t)cols, type, n_w, x, (size_t)cols, n_x, cols, 0);
    for (t = 0; t < n_x; t++)
        for (r = 0; r < n_w; r++) {
            const char *row = (const char *)w + (size_t)r * (size_t)cols * qwen3i_type_size(type);
            double sum = 0, size = 0;
            for (k = 0; k < cols; k++) {
                double p = cpu_at(row, type, (size_t)k) * (double)x[t * cols + k];
                sum += p;
                size += fabs(p);
            }
            simd->dot(&one, 1, row, (size_t)cols, type, 1, x + t * cols, (size_t)cols, 1, cols, 0);
            CHECK_MSG(cpu_same(&one, &y[t * n_w + r], 1), "%s, type %d, %d x %d x %d: depends on the tile",
                simd->name, type, n_w, n_x, cols);
            CHECK_MSG(fabs(sum - (double)one) <= 1e-6 * size, "%s, type %d, %d columns: %g, not %g", simd->name, type,
                cols, (double)one, sum);
        }
    free(w); free(x); free(y);
}

static void test_cpu_dot(void) {
    static const int cols[] = {1, 2, 15, 16, 17, 63, 64, 65, 80, 128, 1000};
    const qwen3i_simd *simd;
    int level, c, t, n;
    for (level = 0; (simd = qwen3i_simd_level(level)) != NULL; level++)
        for (t = 0; t < 3; t++) {
            for (c = 0; c < 11; c++)
                for (n = 1; n <= 9; n++) cpu_dot_case(simd, cpu_types[t], 1 + (n * 5 + c) % 9, n, cols[c]);
            cpu_dot_case(simd, cpu_types[t], 11, 29, 50);
            cpu_dot_case(simd, cpu_types[t], 6, 14, 1024);
            cpu_dot_case(simd, cpu_types[t], 6, 14, 1025);
            cpu_dot_case(simd, cpu_types[t], 5, 13, 3000);
        }
}

/* Both sides in BF16: y += W x of any shape equals, bit for bit, the sums of each element's own two rows. */
static void cpu_pairs_case(const qwen3i_pairs *pairs, int n_w, int n_x, int cols) {
    uint16_t *w = (uint16_t *)cpu_typed((size_t)n_w * (size_t)cols, QWEN3I_BF16, 1.0);
    uint16_t *x = (uint16_t *)malloc((size_t)n_x * (size_t)cols * sizeof *x);
    float *from = cpu_floats((size_t)n_x * (size_t)cols, 1.0), *y = cpu_floats((size_t)n_w * (size_t)n_x, 1.0);
    float *before = cpu_copy(y, (size_t)n_w * (size_t)n_x), one;
    int r, t, k;
    pairs->round(x, from, n_x * cols);
    for (k = 0; k < n_x * cols; k++) CHECK(x[k] == qwen3i_f32_to_bf16(from[k]));
    pairs->dot(y, (size_t)n_w, w, n_w, x, n_x, cols, 1);
    for (t = 0; t < n_x; t++)
        for (r = 0; r < n_w; r++) {
            double sum = 0, size = 0;
            for (k = 0; k < cols; k++) {
                double p = (double)qwen3i_bf16_to_f32(w[r * cols + k]) * (double)qwen3i_bf16_to_f32(x[t * cols + k]);
                sum += p;
                size += fabs(p);
            }
            pairs->dot(&one, 1, w + r * cols, 1, x + t * cols, 1, cols, 0);
            CHECK_MSG(fabs(sum - (double)one) <= 1e-6 * size, "%d columns: %g, not %g", cols, (double)one, sum);
            one += cols > 2 * QWEN3I_K_BLOCK ? 0 : before[t * n_w + r];
            if (cols <= 2 * QWEN3I_K_BLOCK) CHECK_MSG(cpu_same(&one, &y[t * n_w + r], 1), "%d x %d x %d: depends on the tile", n_w, n_x, cols);
            else CHECK(fabs((double)y[t * n_w + r] - (double)before[t * n_w + r] - sum) <= 1e-6 * size);
        }
    free(w); free(x); free(from); free(y); free(before);
}

static void test_cpu_pairs(void) {
    static const float odd[16] = {0.0f, -0.0f, 1e-40f, 3.4e38f, 1.00390625f, 1.01171875f};
    static const int cols[] = {32, 64, 96, 1024, 2048, 4128};
    const qwen3i_pairs *pairs = qwen3i_find_pairs();
    uint16_t y[16];
    int c, n;
    if (!pairs) return;                 /* this machine has no such instructions */
    for (c = 0; c < 6; c++)
        for (n = 1; n <= 9; n++) cpu_pairs_case(pairs, 1 + (n * 5 + c) % 9, n, cols[c]);
    cpu_pairs_case(pairs, 11, 29, 64);
    pairs->round(y, odd, 16);           /* halves to even; what is too large and too small */
    CHECK(y[0] == 0 && y[1] == 0x8000 && y[2] == 0 && y[3] == 0x7F80 && y[4] == 0x3F80 && y[5] == 0x3F82);
}

/* y += p v, alone and in any grouping of rows of p and v. */
static void cpu_mix_case(const qwen3i_simd *simd, qwen3i_type type, int n_p, int n_v, int cols) {
    void *v = cpu_typed((size_t)n_v * (size_t)cols, type, 1.0);
    float *p = cpu_floats((size_t)n_p * (size_t)n_v, 1.0), *y = cpu_floats((size_t)n_p * (size_t)cols, 1.0);
    float *before = cpu_copy(y, (size_t)n_p * (size_t)cols), *split = cpu_copy(y, (size_t)n_p * (size_t)cols);
    int t, r, d, half = n_v / 3;
    const char *rest = (const char *)v + (size_t)half * (size_t)cols * qwen3i_type_size(type);
    simd->mix(y, (size_t)cols, p, (size_t)n_v, n_p, v, (size_t)cols, type, n_v, cols);
    for (t = 0; t < n_p; t++) {
        simd->mix(split + t * cols, (size_t)cols, p + t * n_v, (size_t)n_v, 1, v, (size_t)cols, type, half, cols);
        simd->mix(split + t * cols, (size_t)cols, p + t * n_v + half, (size_t)n_v, 1, rest, (size_t)cols, type,
            n_v - half, cols);
        for (d = 0; d < cols; d++) {
            double sum = (double)before[t * cols + d], size = fabs(sum);
            for (r = 0; r < n_v; r++) {
                double term = (double)p[t * n_v + r] * cpu_at(v, type, (size_t)(r * cols + d));
                sum += term;
                size += fabs(term);
            }
            CHECK(fabs(sum - (double)y[t * cols + d]) <= 1e-6 * size);
        }
    }
    CHECK_MSG(cpu_same(y, split, (size_t)(n_p * cols)), "%s, type %d, %d x %d x %d", simd->name, type, n_p, n_v, cols);
    free(v); free(p); free(y); free(before); free(split);
}

static void test_cpu_mix(void) {
    static const int cols[] = {1, 2, 16, 30, 64, 80, 128, 131};
    const qwen3i_simd *simd;
    int level, c, t, n;
    for (level = 0; (simd = qwen3i_simd_level(level)) != NULL; level++)
        for (t = 0; t < 3; t++)
            for (c = 0; c < 8; c++)
                for (n = 1; n <= 13; n++) cpu_mix_case(simd, cpu_types[t], n, 1 + n * 7 % 19, cols[c]);
}

static void test_cpu_softmax(void) {
    const qwen3i_simd *simd;
    int level, n, i;
    for (level = 0; (simd = qwen3i_simd_level(level)) != NULL; level++)
        for (n = 1; n <= 300; n += n < 70 ? 1 : 23) {
            float *s = cpu_floats((size_t)(n + 15) / 16 * 16, n % 5 == 0 ? 1e4 : n % 5 == 1 ? 0.0 : 3.0),
                *x = cpu_copy(s, (size_t)n);
            double top = -1e300, sum = 0, total = 0;
            for (i = 0; i < n; i++) if ((double)x[i] * 0.125 > top) top = (double)x[i] * 0.125;
            for (i = 0; i < n; i++) sum += exp((double)x[i] * 0.125 - top);
            simd->softmax(s, n, 0.125f);
            for (i = 0; i < n; i++) {
                CHECK(fabs((double)s[i] - exp((double)x[i] * 0.125 - top) / sum) < (n % 5 == 0 ? 1e-4 : 1e-6));
                total += (double)s[i];
            }
            CHECK_MSG(fabs(total - 1) < 1e-5, "%s, %d: sum %g", simd->name, n, total);
            free(s); free(x);
        }
}

static void test_cpu_rmsnorm(void) {
    static const int sizes[] = {1, 2, 15, 16, 17, 63, 64, 65, 80, 128, 1000, 1001};
    static const double scales[] = {1.0, 0.0, 1e-42, 1e-20, 1e4, 3e17};
    const qwen3i_simd *simd;
    int level, c, s, i;
    for (level = 0; (simd = qwen3i_simd_level(level)) != NULL; level++)
        for (c = 0; c < 12; c++)
            for (s = 0; s < 6; s++) {
                int n = sizes[c];
                float *x = cpu_floats((size_t)n, scales[s]), *gain = cpu_floats((size_t)n, 50.0),
                    *y = cpu_floats((size_t)n, 1.0);
                double sum = 0;
                if (s == 0) x[n / 2] = 1e4f;                        /* one channel sticks out */
                for (i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
                simd->rmsnorm(y, x, gain, n, 1e-6f);
                for (i = 0; i < n; i++) {
                    double expected = (double)x[i] / sqrt(sum / n + 1e-6) * (double)gain[i];
                    CHECK_MSG(fabs((double)y[i] - expected) <= 1e-6 * fabs(expected) + 1e-44, "%s, %d: %g, not %g",
                        simd->name, n, (double)y[i], expected);
                }
                simd->rmsnorm(x, x, gain, n, 1e-6f);                /* in place */
                CHECK(cpu_same(x, y, (size_t)n));
                free(x); free(gain); free(y);
            }
}

static void test_cpu_silu_mul(void) {
    static const double scales[] = {1.0, 20.0, 1000.0, 1e-30, 0.0};
    const qwen3i_simd *simd;
    int level, n, s, i;
    for (level = 0; (simd = qwen3i_simd_level(level)) != NULL; level++)
        for (n = 1; n <= 1000; n += n < 70 ? 1 : 93)
            for (s = 0; s < 5; s++) {
                float *gate = cpu_floats((size_t)n, scales[s]), *up = cpu_floats((size_t)n, 1e5),
                    *y = cpu_floats((size_t)n, 1.0);
                simd->silu_mul(y, gate, up, n);
                for (i = 0; i < n; i++) {
                    double g = (double)gate[i], expected = g / (1 + exp(-g)) * (double)up[i];
                    CHECK_MSG(fabs((double)y[i] - expected) <= CPU_SILU_BOUND * fabs(expected) + 1e-28,
                        "%s, silu(%g): %g, not %g", simd->name, g, (double)y[i], expected);
                }
                free(gate); free(up); free(y);
            }
}

/* The instruction sets with fused multiply-add agree bit for bit. */
static void test_cpu_simd_agree(void) {
    const qwen3i_simd *first = qwen3i_simd_level(0), *simd;
    float *w = cpu_floats(7 * 1500, 1.0), *x = cpu_floats(8 * 1500, 1.0), y[56], z[56], s[160], e[160];
    int level;
    for (level = 1; (simd = qwen3i_simd_level(level)) != NULL && simd != &qwen3i_plain_kernels; level++) {
        first->dot(y, 7, w, 1500, QWEN3I_F32, 7, x, 1500, 8, 1500, 0);
        simd->dot(z, 7, w, 1500, QWEN3I_F32, 7, x, 1500, 8, 1500, 0);
        CHECK(cpu_same(y, z, 56));
        memcpy(s, x, sizeof s); memcpy(e, x, sizeof e);
        first->softmax(s, 150, 2.0f);
        simd->softmax(e, 150, 2.0f);
        CHECK(cpu_same(s, e, 150));
        first->silu_mul(s, x, w, 150);
        simd->silu_mul(e, x, w, 150);
        CHECK(cpu_same(s, e, 150));
    }
    free(w); free(x);
}

/* ---- rotary embedding ------------------------------------------------------------------------------- */
static int cpu_ulps(float a, float b) {
#ifdef __FAST_MATH__
    return fabs((double)a - (double)b) > 0.02 * fabs((double)b) ? 1000 : 0;     /* an angle of 31337, 1 ulp off */
#else
    int64_t d = (int64_t)qwen3i_bits_from_float(a) - (int64_t)qwen3i_bits_from_float(b);
    return (int)(d < 0 ? -d : d);
#endif
}

/* Numbers from transformers' Qwen3RotaryEmbedding in float32. */
static void test_cpu_rope_freqs(void) {
    static const int index[7] = {0, 1, 7, 32, 37, 62, 63}, index64[7] = {0, 1, 7, 16, 21, 30, 31};
    static const float plain[7] = {1.0f, 0.805842221f, 0.220673397f, 0.00100000005f, 0.000339820836f, 1.53992653e-06f,
        1.24093776e-06f};
    static const float yarn[7]  = {1.0f, 0.805842221f, 0.220673397f, 0.000602941145f, 0.00012993149f, 3.84981632e-07f,
        3.10234441e-07f};
    static const float other[7] = {1.0f, 0.749894202f, 0.133352146f, 0.0073333336f, 0.000948549539f, 7.11311732e-05f,
        5.33408565e-05f};
    float freqs[64];
    qwen3i_config c;
    int i;
    memset(&c, 0, sizeof c);
    c.head_dim = 128; c.rope_theta = 1e6; c.yarn_original_ctx = 32768; c.yarn_beta_fast = 32; c.yarn_beta_slow = 1;
    CHECK(qwen3i_rope_freqs(freqs, &c, 0) == 1.0f);
    for (i = 0; i < 7; i++) CHECK(cpu_ulps(freqs[index[i]], plain[i]) <= 1);
    CHECK(cpu_ulps(qwen3i_rope_freqs(freqs, &c, 4), 1.138629436111989f) <= 1);
    for (i = 0; i < 7; i++) CHECK(cpu_ulps(freqs[index[i]], yarn[i]) <= 1);
    c.head_dim = 64; c.rope_theta = 1e4;
    c.yarn_factor = 2.5; c.yarn_original_ctx = 4096; c.yarn_beta_fast = 16; c.yarn_beta_slow = 2;
    c.yarn_attn_factor = 1.25;
    CHECK(qwen3i_rope_freqs(freqs, &c, 0) == 1.25f);
    for (i = 0; i < 7; i++) CHECK(cpu_ulps(freqs[index64[i]], other[i]) <= 2);
}

static void test_cpu_rope(void) {
    static const int32_t positions[3] = {0, 1, 31337};
    float freqs[64], cosines[192], sines[192], x[2 * 128], y[2 * 128];
    qwen3i_config c;
    int i, j;
    memset(&c, 0, sizeof c);
    c.head_dim = 128; c.rope_theta = 1e6; c.max_ctx = 40960;
    qwen3i_rope_angles(cosines, sines, positions, 3, freqs, 64, qwen3i_rope_freqs(freqs, &c, 0));
    for (i = 0; i < 64; i++) CHECK(cosines[i] == 1.0f && sines[i] == 0.0f);
    CHECK(cpu_ulps(cosines[128], -0.926151276f) <= 1);
    CHECK(cpu_ulps(sines[128], 0.377152264f) <= 1);
    CHECK(cpu_ulps(cosines[128 + 32], 0.996887028f) <= 1 && cpu_ulps(sines[128 + 32], -0.0788428187f) <= 1);
    for (i = 0; i < 256; i++) y[i] = x[i] = (float)cpu_uniform();
    qwen3i_rope(y, cosines + 128, sines + 128, 2, 128);
    for (j = 0; j < 256; j += 128)
        for (i = 0; i < 64; i++) {              /* pairs are (i, i + 64): the plane is turned by the angle */
            double angle = (double)(31337.0f * freqs[i]), a = (double)x[j + i], b = (double)x[j + i + 64];
            CHECK(fabs((double)y[j + i] - (a * cos(angle) - b * sin(angle))) < 1e-6);
            CHECK(fabs((double)y[j + i + 64] - (a * sin(angle) + b * cos(angle))) < 1e-6);
        }
}

/* ---- threads -------------------------------------------------------------------------------------------- */
typedef struct cpu_count { int *hits; volatile int bad; int n_lanes; } cpu_count;

static void cpu_count_items(void *arg, int begin, int end, int lane) {
    cpu_count *c = (cpu_count *)arg;
    int i;
    if (lane < 0 || lane >= c->n_lanes || begin >= end) c->bad = 1;
    for (i = begin; i < end; i++) c->hits[i]++;
}

static void cpu_jobs_backwards(void *user, int count, void (*fn)(void *arg, int index), void *arg) {
    ++*(int *)user;
    while (count-- > 0) fn(arg, count);
}

static void test_cpu_threads(void) {
    int hits[300], threads, loop, i, n_jobs = 0;
    for (threads = 1; threads <= 6; threads++) {
        qwen3_ctx_desc desc;
        qwen3i_pool *pool = (qwen3i_pool *)malloc(sizeof *pool);
        cpu_count c;
        memset(&desc, 0, sizeof desc);
        desc.threads = threads;
        if (threads == 6) { desc.jobs.parallel_for = cpu_jobs_backwards; desc.jobs.user = &n_jobs; }
        CHECK(qwen3i_pool_create(pool, &desc, NULL) == QWEN3_OK);
        c.hits = hits; c.bad = 0; c.n_lanes = pool->n_lanes;
        for (loop = 0; loop < 400; loop++) {
            int n = loop * 7 % 301, grain = loop % 11, ok = 1;
            memset(hits, 0, sizeof hits);
            qwen3i_parallel(pool, n, grain, cpu_count_items, &c);
            for (i = 0; i < 300; i++) ok &= hits[i] == (i < n);
            CHECK_MSG(ok && !c.bad, "%d threads, %d items by %d", threads, n, grain);
        }
        qwen3i_pool_destroy(pool);
        free(pool);
    }
    CHECK(n_jobs > 300);
}

/* ---- operations ------------------------------------------------------------------------------------------- */
typedef struct cpu_bench { qwen3i_pool pool; qwen3i_exec exec; } cpu_bench;   /* something to compute on */

static cpu_bench *cpu_bench_create(int threads, int level) {
    cpu_bench *b = (cpu_bench *)malloc(sizeof *b);
    qwen3_ctx_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.threads = threads;
    CHECK(qwen3i_pool_create(&b->pool, &desc, NULL) == QWEN3_OK);
    b->exec.pool = &b->pool;
    b->exec.simd = qwen3i_simd_level(level);
    return b;
}

static void cpu_bench_free(cpu_bench *b) { qwen3i_pool_destroy(&b->pool); free(b); }

static void cpu_ref_matmul(double *y, const qwen3i_matrix *w, const float *x, int n) {
    int t, r, k;
    for (t = 0; t < n; t++)
        for (r = 0; r < w->rows; r++) {
            double sum = 0;
            for (k = 0; k < w->cols; k++)
                sum += cpu_at(w->data, w->type, (size_t)r * (size_t)w->cols + (size_t)k) * (double)x[t * w->cols + k];
            y[t * w->rows + r] = sum;
        }
}

/* Batches of 1 .. 30 rows on 1, 2 and 3 threads: all the same bits, and right. */
static void test_cpu_matmul(void) {
    enum { ROWS = 37, FF = 70, COLS = 65, N = 30 };
    int t, threads, n, i;
    for (t = 0; t < 3; t++) {
        qwen3i_layer layer;
        float *x = cpu_floats(N * COLS, 1.0), *start = cpu_floats(N * ROWS, 1.0), *y = cpu_floats(N * ROWS, 1.0);
        float *first = NULL, *added = NULL, *glu = NULL, *ff = cpu_floats(N * FF, 1.0);
        float *q = cpu_floats(N * ROWS, 1.0), *k = cpu_floats(N * FF, 1.0), *v = cpu_floats(N * FF, 1.0);
        double *expected = (double *)malloc(N * FF * 2 * 8);
        memset(&layer, 0, sizeof layer);
        layer.wq = cpu_matrix(ROWS, COLS, cpu_types[t], 0.3);
        layer.wk = layer.w_gate = cpu_matrix(FF, COLS, cpu_types[t], 0.3);
        layer.wv = layer.w_up = cpu_matrix(FF, COLS, cpu_types[(t + 1) % 3], 0.3);
        for (threads = 1; threads <= 3; threads++) {
            cpu_bench *b = cpu_bench_create(threads, 0);
            for (n = N; n >= 1; n = n > 9 ? 9 : n - 1) {
                qwen3i_matmul(&b->exec, y, &layer.wq, x, n);
                if (!first) {
                    first = cpu_copy(y, N * ROWS);
                    cpu_ref_matmul(expected, &layer.wq, x, N);
                    for (i = 0; i < N * ROWS; i++) CHECK(fabs((double)y[i] - expected[i]) < 1e-5);
                }
                CHECK(cpu_same(y, first, (size_t)n * ROWS));
                memcpy(y, start, (size_t)n * ROWS * 4);
                qwen3i_matmul_add(&b->exec, y, &layer.wq, x, n);
                if (!added) {
                    added = cpu_copy(y, N * ROWS);
                    for (i = 0; i < N * ROWS; i++) CHECK(fabs((double)added[i] - (double)start[i] - (double)first[i]) < 1e-5);
                }
                CHECK(cpu_same(y, added, (size_t)n * ROWS));
                qwen3i_matmul_qkv(&b->exec, q, k, v, &layer, x, n);
                CHECK(cpu_same(q, first, (size_t)n * ROWS));
                qwen3i_swiglu(&b->exec, ff, &layer.w_gate, &layer.w_up, x, n);
                if (!glu) {
                    glu = cpu_copy(ff, N * FF);
                    cpu_ref_matmul(expected, &layer.w_gate, x, N);
                    cpu_ref_matmul(expected + N * FF, &layer.w_up, x, N);
                    for (i = 0; i < N * FF; i++) {
                        double g = expected[i], u = expected[N * FF + i];
                        CHECK(fabs((double)k[i] - g) < 1e-5 && fabs((double)v[i] - u) < 1e-5);
                        CHECK(fabs((double)ff[i] - g / (1 + exp(-g)) * u) < 1e-4);
                    }
                }
                CHECK(cpu_same(ff, glu, (size_t)n * FF));
            }
            cpu_bench_free(b);
        }
        cpu_matrix_free(&layer.wq); cpu_matrix_free(&layer.wk); cpu_matrix_free(&layer.wv);
        free(x); free(start); free(y); free(first); free(added); free(glu); free(ff); free(q); free(k); free(v);
        free(expected);
    }
}

static void test_cpu_embed(void) {
    static const qwen3_token tokens[4] = {6, 0, 3, 3};
    cpu_bench *b = cpu_bench_create(1, 0);
    int t, i;
    for (t = 0; t < 3; t++) {
        qwen3i_matrix table = cpu_matrix(7, 21, cpu_types[t], 1.0);
        float *x = cpu_floats(4 * 21, 1.0);
        qwen3i_embed(&b->exec, x, &table, tokens, 4);
        for (i = 0; i < 4 * 21; i++)
            CHECK((double)x[i] == cpu_at(table.data, table.type, (size_t)(tokens[i / 21] * 21 + i % 21)));
        cpu_matrix_free(&table);
        free(x);
    }
    cpu_bench_free(b);
}

/* One attention call in double precision for row i of a. */
static void cpu_ref_attention(double *out, const qwen3i_attention_args *a, int i, int h) {
    int dim = a->head_dim, n = a->positions[i] + 1, p, d;
    size_t head = (size_t)a->seqs[i] * (size_t)a->n_head_kv + (size_t)(h / (a->n_head / a->n_head_kv));
    size_t base = head * (size_t)a->max_ctx * (size_t)dim;      /* of the KV head in the cache */
    double *s = (double *)malloc((size_t)n * 8), top = -1e300, sum = 0;
    for (p = 0; p < n; p++) {
        for (s[p] = 0, d = 0; d < dim; d++)
            s[p] += (double)a->q[(i * a->n_head + h) * dim + d] * cpu_at(a->k, a->type, base + (size_t)(p * dim + d));
        s[p] /= sqrt((double)dim);
        if (s[p] > top) top = s[p];
    }
    for (p = 0; p < n; p++) sum += s[p] = exp(s[p] - top);
    for (d = 0; d < dim; d++)
        for (out[d] = 0, p = 0; p < n; p++)
            out[d] += s[p] / sum * cpu_at(a->v, a->type, base + (size_t)(p * dim + d));
    free(s);
}

/* Rows [0, n) in one call, and each row in a call of its own on other threads: the same bits. */
static void cpu_attention_case(int n_head, int n_head_kv, int dim, qwen3i_type type, int n_past, int n_a, int n_b,
    double k_scale, int level) {
    int max_ctx = n_past + qwen3i_max(n_a, n_b) + 3, n = n_a + n_b, width = n_head * dim, i, h, d;
    size_t cache = (size_t)2 * (size_t)n_head_kv * (size_t)max_ctx * (size_t)dim;
    void *k = cpu_typed(cache, type, k_scale), *v = cpu_typed(cache, type, 1.0);
    float *q = cpu_floats((size_t)(n * width), 0.7), *out = cpu_floats((size_t)(n * width), 1.0),
        *one = cpu_floats((size_t)width, 1.0);
    int32_t *seqs = (int32_t *)malloc((size_t)n * 4), *positions = (int32_t *)malloc((size_t)n * 4);
    double *expected = (double *)malloc((size_t)dim * 8);
    cpu_bench *b = cpu_bench_create(1 + n % 3, level), *lone = cpu_bench_create(1 + (n + 1) % 3, level);
    qwen3i_attention_args a;
    for (i = 0; i < n; i++) {
        seqs[i] = i < n_a;                      /* first rows of sequence 1, then of sequence 0 */
        positions[i] = n_past + (i < n_a ? i : i - n_a);
    }
    memset(&a, 0, sizeof a);
    a.a = out; a.q = q; a.k = k; a.v = v; a.type = type; a.seqs = seqs; a.positions = positions;
    a.n = n; a.n_head = n_head; a.n_head_kv = n_head_kv; a.head_dim = dim; a.max_ctx = max_ctx;
    a.scratch = cpu_floats(3 * (size_t)qwen3i_attention_scratch(max_ctx, dim), 1e30);
    qwen3i_attention(&b->exec, &a);
    CHECK(cpu_finite(out, (size_t)(n * width)));
    for (i = 0; i < n; i++) {
        qwen3i_attention_args r = a;
        r.a = one; r.q = q + i * width; r.seqs = seqs + i; r.positions = positions + i; r.n = 1;
        qwen3i_attention(&lone->exec, &r);
        CHECK_MSG(cpu_same(one, out + i * width, (size_t)width), "row %d of %d depends on its batch", i, n);
        for (h = i % 3; h < n_head; h += 3) {
            cpu_ref_attention(expected, &a, i, h);
            for (d = 0; d < dim; d++)
                CHECK_MSG(fabs((double)out[i * width + h * dim + d] - expected[d]) < (k_scale > 100 ? 1e-2 : 2e-6),
                          "%d/%d heads of %d, type %d, position %d: %g, not %g", n_head, n_head_kv, dim, type,
                              positions[i],
                          (double)out[i * width + h * dim + d], expected[d]);
        }
    }
    cpu_bench_free(b); cpu_bench_free(lone);
    free(k); free(v); free(q); free(out); free(one); free(seqs); free(positions); free(expected); free(a.scratch);
}

static void test_cpu_attention(void) {
    static const int dims[4] = {16, 64, 128, 80}, groups[4] = {1, 2, 4, 8};
    int i, level;
    for (i = 0; i < 64; i++)
        cpu_attention_case(groups[i / 4 % 4] * (1 + i % 2), 1 + i % 2, dims[i % 4], cpu_types[i % 3], i * 37 % 290,
            1 + i % 11, i % 5, 1.0, 0);
    for (i = 0; i < 30; i++) cpu_attention_case(4, 2, 16, QWEN3I_F16, i * 10, 1, 0, 1.0, 0);
    cpu_attention_case(30, 1, 16, QWEN3I_F32, 5, 3, 2, 1.0, 0);         /* more heads in a group than a tile has rows */
    cpu_attention_case(14, 2, 6, QWEN3I_F32, 20, 40, 9, 1.0, 0);
    cpu_attention_case(4, 2, 64, QWEN3I_BF16, 100, 5, 2, 1000.0, 0);    /* K gains gone wild */
    for (level = 1; qwen3i_simd_level(level); level++) {
        cpu_attention_case(8, 2, 80, QWEN3I_F16, 70, 7, 3, 1.0, level);
        cpu_attention_case(4, 2, 128, QWEN3I_BF16, 200, 2, 1, 1.0, level);
    }
}

/* ---- whole forward passes ---------------------------------------------------------------------------------- */
enum { CPU_LAYERS = 3, CPU_EMBD = 40, CPU_HEADS = 6, CPU_KV_HEADS = 2, CPU_DIM = 12, CPU_FF = 50, CPU_VOCAB = 67 };

typedef double cpu_kv[100][CPU_KV_HEADS * CPU_DIM];     /* of one layer, by position */

typedef struct cpu_model {
    qwen3_model  model;
    qwen3i_layer layers[CPU_LAYERS];
    void        *owned[64];
    int          n_owned;
} cpu_model;

static qwen3i_matrix cpu_model_matrix(cpu_model *m, int rows, int cols, qwen3i_type type) {
    qwen3i_matrix w = cpu_matrix(rows, cols, type, 2.0 / sqrt((double)cols));
    union { const void *in; void *out; } p;
    p.in = w.data;
    m->owned[m->n_owned++] = p.out;
    return w;
}

static const float *cpu_model_gain(cpu_model *m, int n, float top) {
    float *g = cpu_floats((size_t)n, 0.2);
    int i;
    for (i = 0; i < n; i++) g[i] += 1.0f;
    g[n / 3] = top;
    m->owned[m->n_owned++] = g;
    return g;
}

static cpu_model *cpu_model_create(qwen3i_type type, float k_gain) {
    cpu_model *m = (cpu_model *)calloc(1, sizeof *m);
    qwen3i_config *c = &m->model.config;
    int i;
    cpu_seed = 7;
    c->n_layer = CPU_LAYERS; c->n_embd = CPU_EMBD; c->n_head = CPU_HEADS; c->n_head_kv = CPU_KV_HEADS;
    c->head_dim = CPU_DIM;
    c->n_ff = CPU_FF; c->n_vocab = CPU_VOCAB; c->max_ctx = 1024; c->rms_eps = 1e-6f; c->rope_theta = 1e6; c->tied = 1;
    for (i = 0; i < CPU_LAYERS; i++) {
        qwen3i_layer *l = &m->layers[i];
        l->attn_norm = cpu_model_gain(m, CPU_EMBD, 3.0f);
        l->mlp_norm  = cpu_model_gain(m, CPU_EMBD, 3.0f);
        l->q_norm    = cpu_model_gain(m, CPU_DIM, 4.0f);
        l->k_norm    = cpu_model_gain(m, CPU_DIM, k_gain);
        l->wq     = cpu_model_matrix(m, CPU_HEADS * CPU_DIM, CPU_EMBD, type);
        l->wk     = cpu_model_matrix(m, CPU_KV_HEADS * CPU_DIM, CPU_EMBD, type);
        l->wv     = cpu_model_matrix(m, CPU_KV_HEADS * CPU_DIM, CPU_EMBD, type);
        l->wo     = cpu_model_matrix(m, CPU_EMBD, CPU_HEADS * CPU_DIM, type);
        l->w_gate = cpu_model_matrix(m, CPU_FF, CPU_EMBD, type);
        l->w_up   = cpu_model_matrix(m, CPU_FF, CPU_EMBD, type);
        l->w_down = cpu_model_matrix(m, CPU_EMBD, CPU_FF, type);
    }
    m->model.weights.embed = m->model.weights.head = cpu_model_matrix(m, CPU_VOCAB, CPU_EMBD, type);
    m->model.weights.final_norm = cpu_model_gain(m, CPU_EMBD, 5.0f);
    m->model.weights.layers = m->layers;
    return m;
}

static void cpu_model_free(cpu_model *m) {
    while (m->n_owned > 0) free(m->owned[--m->n_owned]);
    free(m);
}

static qwen3_ctx_desc cpu_desc(int threads, int chunk, int kv_type) {
    qwen3_ctx_desc d;
    memset(&d, 0, sizeof d);
    d.max_ctx = 100; d.max_seqs = 3; d.prefill_chunk = chunk; d.kv_type = kv_type; d.threads = threads;
    return d;
}

static qwen3i_cpu *cpu_ctx(const cpu_model *m, const qwen3_ctx_desc *d) {
    void *state = NULL;
    CHECK(qwen3i_cpu_backend()->ctx_create(&state, NULL, &m->model, d, NULL) == QWEN3_OK);
    return (qwen3i_cpu *)state;
}

/* Evaluate tokens [pos, pos + n) of a sequence; logits [n, n_vocab] of each row. */
static qwen3_result cpu_eval(qwen3i_cpu *c, int seq, const qwen3_token *tokens, int pos, int n, float *logits) {
    int32_t seqs[128], positions[128];
    qwen3i_out outs[128];
    qwen3i_batch batch;
    int i;
    memset(&batch, 0, sizeof batch);
    memset(outs, 0, sizeof outs);
    for (i = 0; i < n; i++) {
        seqs[i] = seq;
        positions[i] = pos + i;
        outs[i].row = i; outs[i].keep_seq = i == n - 1 ? seq : -1; outs[i].logits = logits + i * CPU_VOCAB;
    }
    batch.tokens = tokens + pos; batch.seqs = seqs; batch.positions = positions; batch.n_rows = n; batch.outs = outs;
    batch.n_outs = n;
    return qwen3i_cpu_backend()->forward(c, &batch, NULL);
}

static void cpu_ref_norm(double *y, const double *x, const float *gain, int n) {
    double sum = 0;
    int i;
    for (i = 0; i < n; i++) sum += x[i] * x[i];
    for (i = 0; i < n; i++) y[i] = x[i] / sqrt(sum / n + (double)1e-6f) * (double)gain[i];
}

static void cpu_ref_product(double *y, const qwen3i_matrix *w, const double *x, int add) {
    int r, k;
    for (r = 0; r < w->rows; r++) {
        double sum = add ? y[r] : 0;
        for (k = 0; k < w->cols; k++) sum += cpu_at(w->data, w->type, (size_t)(r * w->cols + k)) * x[k];
        y[r] = sum;
    }
}

static void cpu_ref_rope(double *x, int pos) {
    int j, half = CPU_DIM / 2;
    for (j = 0; j < half; j++) {
        double angle = pos * pow(1e6, -2.0 * j / (double)CPU_DIM), a = x[j], b = x[j + half];
        x[j] = a * cos(angle) - b * sin(angle);
        x[j + half] = a * sin(angle) + b * cos(angle);
    }
}

/* The model in double precision, one token: k and v [layers] grow by it. */
static void cpu_ref_forward(const cpu_model *m, cpu_kv *k, cpu_kv *v,
                            qwen3_token token, int pos, double *logits) {
    double x[CPU_EMBD], h[CPU_EMBD], q[CPU_HEADS * CPU_DIM], a[CPU_HEADS * CPU_DIM], gate[CPU_FF], up[CPU_FF], s[100];
    int l, i, d, p;
    const qwen3i_matrix *e = &m->model.weights.embed;
    for (i = 0; i < CPU_EMBD; i++) x[i] = cpu_at(e->data, e->type, (size_t)(token * CPU_EMBD + i));
    for (l = 0; l < CPU_LAYERS; l++) {
        const qwen3i_layer *w = &m->layers[l];
        cpu_ref_norm(h, x, w->attn_norm, CPU_EMBD);
        cpu_ref_product(q, &w->wq, h, 0);
        cpu_ref_product(k[l][pos], &w->wk, h, 0);
        cpu_ref_product(v[l][pos], &w->wv, h, 0);
        for (i = 0; i < CPU_HEADS; i++) {
            cpu_ref_norm(q + i * CPU_DIM, q + i * CPU_DIM, w->q_norm, CPU_DIM);
            cpu_ref_rope(q + i * CPU_DIM, pos);
        }
        for (i = 0; i < CPU_KV_HEADS; i++) {
            cpu_ref_norm(k[l][pos] + i * CPU_DIM, k[l][pos] + i * CPU_DIM, w->k_norm, CPU_DIM);
            cpu_ref_rope(k[l][pos] + i * CPU_DIM, pos);
        }
        for (i = 0; i < CPU_HEADS; i++) {
            int kv = i / (CPU_HEADS / CPU_KV_HEADS) * CPU_DIM;
            double top = -1e300, sum = 0;
            for (p = 0; p <= pos; p++) {
                for (s[p] = 0, d = 0; d < CPU_DIM; d++)
                    s[p] += q[i * CPU_DIM + d] * k[l][p][kv + d] / sqrt((double)CPU_DIM);
                if (s[p] > top) top = s[p];
            }
            for (p = 0; p <= pos; p++) sum += s[p] = exp(s[p] - top);
            for (d = 0; d < CPU_DIM; d++)
                for (a[i * CPU_DIM + d] = 0, p = 0; p <= pos; p++) a[i * CPU_DIM + d] += s[p] / sum * v[l][p][kv + d];
        }
        cpu_ref_product(x, &w->wo, a, 1);
        cpu_ref_norm(h, x, w->mlp_norm, CPU_EMBD);
        cpu_ref_product(gate, &w->w_gate, h, 0);
        cpu_ref_product(up, &w->w_up, h, 0);
        for (i = 0; i < CPU_FF; i++) up[i] *= gate[i] / (1 + exp(-gate[i]));
        cpu_ref_product(x, &w->w_down, up, 1);
    }
    cpu_ref_norm(h, x, m->model.weights.final_norm, CPU_EMBD);
    cpu_ref_product(logits, &m->model.weights.head, h, 0);
}

static void cpu_tokens(qwen3_token *tokens, int n) {
    int i;
    for (i = 0; i < n; i++) tokens[i] = (qwen3_token)((i * 31 + i * i * 7 + 5) % CPU_VOCAB);
}

/* Largest difference from the double-precision model, relative to the largest logit. */
static double cpu_forward_error(const cpu_model *m, qwen3i_cpu *c, int n) {
    cpu_kv *k = (cpu_kv *)malloc(CPU_LAYERS * sizeof(cpu_kv));
    cpu_kv *v = (cpu_kv *)malloc(CPU_LAYERS * sizeof(cpu_kv));
    double expected[CPU_VOCAB], worst = 0, top = 0;
    float *logits = cpu_floats((size_t)(n * CPU_VOCAB), 1.0);
    qwen3_token tokens[100];
    int i, j;
    cpu_tokens(tokens, n);
    CHECK(cpu_eval(c, 1, tokens, 0, n, logits) == QWEN3_OK);
    CHECK(cpu_finite(logits, (size_t)(n * CPU_VOCAB)));
    for (i = 0; i < n; i++) {
        cpu_ref_forward(m, k, v, tokens[i], i, expected);
        for (j = 0; j < CPU_VOCAB; j++) {
            double d = fabs((double)logits[i * CPU_VOCAB + j] - expected[j]);
            if (d > worst) worst = d;
            if (fabs(expected[j]) > top) top = fabs(expected[j]);
        }
    }
    free(k); free(v); free(logits);
    return worst / top;
}

static void test_cpu_forward(void) {
    static const double limit[4] = {0, 1e-4, 5e-2, 3e-1};       /* by KV type */
    int t, kv, level;
    for (t = 0; t < 3; t++) {
        cpu_model *m = cpu_model_create(cpu_types[t], 10.0f);
        for (kv = QWEN3_KV_F32; kv <= QWEN3_KV_BF16; kv++)
            for (level = 0; qwen3i_simd_level(level); level++) {
                qwen3_ctx_desc d = cpu_desc(2, 64, kv);
                qwen3i_cpu *c = cpu_ctx(m, &d);
                double error;
                c->exec.simd = qwen3i_simd_level(level);
                error = cpu_forward_error(m, c, 60);
                CHECK_MSG(error < limit[kv], "weights %d, KV %d, %s: %g", cpu_types[t], kv, c->exec.simd->name, error);
                qwen3i_cpu_free(c);
            }
        cpu_model_free(m);
    }
}

/* The same tokens in chunks of any size on any number of threads, alone or among others: the same bits. */
static void test_cpu_forward_same_bits(void) {
    static const int chunks[] = {60, 1, 2, 3, 7, 24, 33};
    qwen3_token tokens[60];
    float *first = NULL, *logits = cpu_floats(60 * CPU_VOCAB, 1.0);
    cpu_model *m = cpu_model_create(QWEN3I_BF16, 10.0f);
    int i, pos, threads;
    cpu_tokens(tokens, 60);
    for (threads = 1; threads <= 4; threads++)
        for (i = 0; i < 7; i++) {
            int n_jobs = 0;
            qwen3_ctx_desc d = cpu_desc(qwen3i_min(threads, 3), chunks[i], QWEN3_KV_F16);
            qwen3i_cpu *c;
            const float *kept = NULL;
            if (threads == 4) { d.jobs.parallel_for = cpu_jobs_backwards; d.jobs.user = &n_jobs; }
            c = cpu_ctx(m, &d);
            for (pos = 0; pos < 60; pos += chunks[i])
                CHECK(cpu_eval(c, i % 3, tokens, pos, qwen3i_min(chunks[i], 60 - pos),
                    logits + pos * CPU_VOCAB) == QWEN3_OK);
            if (!first) first = cpu_copy(logits, 60 * CPU_VOCAB);
            CHECK_MSG(cpu_same(first, logits, 60 * CPU_VOCAB), "chunks of %d, %d threads", chunks[i], threads);
            CHECK(qwen3i_cpu_backend()->logits(c, i % 3, &kept, NULL) == QWEN3_OK);
            CHECK(cpu_same(kept, first + 59 * CPU_VOCAB, CPU_VOCAB));
            qwen3i_cpu_free(c);
        }
    cpu_model_free(m);
    free(first); free(logits);
}

/* Three sequences in one batch, with all kinds of output, against each on its own. */
static void test_cpu_forward_batch(void) {
    static const int lengths[3] = {5, 1, 9};
    qwen3_token tokens[60], flat[15];
    int32_t seqs[15], positions[15];
    float alone[15 * CPU_VOCAB], logits[3][CPU_VOCAB], hidden[3][CPU_EMBD], logprob[3];
    cpu_model *m = cpu_model_create(QWEN3I_F16, 10.0f);
    qwen3_ctx_desc d = cpu_desc(2, 16, QWEN3_KV_F16);
    qwen3i_cpu *c = cpu_ctx(m, &d), *other = cpu_ctx(m, &d);
    qwen3i_out outs[3];
    qwen3i_batch batch;
    const float *kept = NULL;
    int s, i, n = 0;
    cpu_tokens(tokens, 60);
    memset(outs, 0, sizeof outs);
    memset(&batch, 0, sizeof batch);
    for (s = 0; s < 3; s++) {
        CHECK(cpu_eval(other, s, tokens + 10 * s, 0, lengths[s], alone + n * CPU_VOCAB) == QWEN3_OK);
        for (i = 0; i < lengths[s]; i++, n++) { flat[n] = tokens[10 * s + i]; seqs[n] = s; positions[n] = i; }
        outs[s].row = n - 1; outs[s].keep_seq = s == 1 ? -1 : s; outs[s].target = (qwen3_token)(s * 20);
        outs[s].logits = s == 2 ? NULL : logits[s]; outs[s].hidden = hidden[s]; outs[s].logprob = &logprob[s];
    }
    batch.tokens = flat; batch.seqs = seqs; batch.positions = positions; batch.n_rows = n; batch.outs = outs;
    batch.n_outs = 3;
    CHECK(qwen3i_cpu_backend()->forward(c, &batch, NULL) == QWEN3_OK);
    for (s = 0; s < 3; s++) {
        const float *row = alone + outs[s].row * CPU_VOCAB;
        double sum = 0, expected[CPU_VOCAB];
        if (outs[s].logits) CHECK(cpu_same(outs[s].logits, row, CPU_VOCAB));
        if (s != 1)
            CHECK(qwen3i_cpu_backend()->logits(c, s, &kept, NULL) == QWEN3_OK && cpu_same(kept, row, CPU_VOCAB));
        for (i = 0; i < CPU_VOCAB; i++) sum += exp((double)row[i]);
        CHECK(fabs((double)logprob[s] - ((double)row[s * 20] - log(sum))) < 1e-5);
        cpu_ref_matmul(expected, &m->model.weights.head, hidden[s], 1);
        for (i = 0; i < CPU_VOCAB; i++) CHECK(fabs(expected[i] - (double)row[i]) < 1e-4);
    }
    qwen3i_cpu_free(c); qwen3i_cpu_free(other);
    cpu_model_free(m);
}

/* A copied sequence, and one carried over through kv_read and kv_write, go on like the original. */
static void test_cpu_forward_copies(void) {
    qwen3_token tokens[60];
    float logits[20 * CPU_VOCAB], again[CPU_VOCAB];
    cpu_model *m = cpu_model_create(QWEN3I_F32, 10.0f);
    qwen3_ctx_desc d = cpu_desc(2, 20, QWEN3_KV_F16), small = d;
    const qwen3_backend *b = qwen3i_cpu_backend();
    qwen3i_cpu *c = cpu_ctx(m, &d), *other;
    uint16_t k[20 * CPU_KV_HEADS * CPU_DIM], v[20 * CPU_KV_HEADS * CPU_DIM];
    const float *kept = NULL;
    int l;
    small.max_ctx = 33; small.max_seqs = 2;
    other = cpu_ctx(m, &small);
    cpu_tokens(tokens, 60);
    CHECK(cpu_eval(c, 0, tokens, 0, 20, logits) == QWEN3_OK);
    CHECK(b->seq_copy(c, 2, 0, 20, NULL) == QWEN3_OK);
    CHECK(b->logits(c, 2, &kept, NULL) == QWEN3_OK && cpu_same(kept, logits + 19 * CPU_VOCAB, CPU_VOCAB));
    for (l = 0; l < CPU_LAYERS; l++) {
        CHECK(b->kv_read(c, 0, l, 20, k, v, NULL) == QWEN3_OK);
        CHECK(b->kv_write(other, 1, l, 20, k, v, NULL) == QWEN3_OK);
    }
    CHECK(b->set_logits(other, 1, kept, NULL) == QWEN3_OK);
    CHECK(b->logits(other, 1, &kept, NULL) == QWEN3_OK && cpu_same(kept, logits + 19 * CPU_VOCAB, CPU_VOCAB));
    CHECK(cpu_eval(c, 0, tokens, 20, 1, logits) == QWEN3_OK);
    CHECK(cpu_eval(c, 2, tokens, 20, 1, again) == QWEN3_OK && cpu_same(logits, again, CPU_VOCAB));
    CHECK(cpu_eval(other, 1, tokens, 20, 1, again) == QWEN3_OK && cpu_same(logits, again, CPU_VOCAB));
    qwen3i_cpu_free(c); qwen3i_cpu_free(other);
    cpu_model_free(m);
}

/* Gains of 1000 on K, an embedding with one huge channel, of zeros, of denormals: finite, and right. */
static void test_cpu_forward_extremes(void) {
    cpu_model *m = cpu_model_create(QWEN3I_F32, 1000.0f);
    qwen3_ctx_desc d = cpu_desc(1, 64, QWEN3_KV_F32), half = cpu_desc(1, 64, QWEN3_KV_F16);
    qwen3i_cpu *c = cpu_ctx(m, &d), *h = cpu_ctx(m, &half);
    union { const void *in; float *out; } embed;
    double error;
    int i;
    error = cpu_forward_error(m, c, 40);
    CHECK_MSG(error < 1e-3, "K gains of 1000: %g", error);
    cpu_forward_error(m, h, 40);                        /* checks that all is finite */
    embed.in = m->model.weights.embed.data;
    for (i = 0; i < CPU_VOCAB; i++) embed.out[i * CPU_EMBD + 7] = 1e4f;
    for (i = 0; i < CPU_EMBD; i++) { embed.out[5 * CPU_EMBD + i] = 0.0f; embed.out[43 * CPU_EMBD + i] = 1e-41f; }
    error = cpu_forward_error(m, c, 40);
    CHECK_MSG(error < 1e-3, "one channel of 10,000: %g", error);
    qwen3i_cpu_free(c); qwen3i_cpu_free(h);
    cpu_model_free(m);
}

static int cpu_cancel_at(void *user) { return --*(int *)user < 0; }

static void test_cpu_cancel(void) {
    qwen3_token tokens[60];
    float logits[20 * CPU_VOCAB], again[20 * CPU_VOCAB];
    cpu_model *m = cpu_model_create(QWEN3I_BF16, 10.0f);
    qwen3_ctx_desc d = cpu_desc(2, 20, QWEN3_KV_F16);
    qwen3i_cpu *c;
    int left = 1000, polls;
    d.cancel = cpu_cancel_at; d.cancel_user = &left;
    c = cpu_ctx(m, &d);
    cpu_tokens(tokens, 60);
    CHECK(cpu_eval(c, 0, tokens, 0, 20, logits) == QWEN3_OK);
    polls = 1000 - left;
    CHECK(polls > CPU_LAYERS);
    while (polls-- > 0) {
        left = polls;
        CHECK(cpu_eval(c, 0, tokens, 0, 20, again) == QWEN3_STOPPED);
    }
    left = 1000;
    CHECK(cpu_eval(c, 0, tokens, 0, 20, again) == QWEN3_OK && cpu_same(logits, again, 20 * CPU_VOCAB));
    qwen3i_cpu_free(c);
    cpu_model_free(m);
}

typedef struct cpu_ledger { uint64_t bytes, most; int n_left; } cpu_ledger;

static void *cpu_ledger_alloc(size_t size, void *user) {
    cpu_ledger *l = (cpu_ledger *)user;
    if (l->n_left-- == 0) return NULL;
    l->bytes += size;
    if (l->bytes > l->most) l->most = l->bytes;
    return test_malloc(size);
}

static void cpu_ledger_free(void *p, size_t size, void *user) {
    ((cpu_ledger *)user)->bytes -= size;
    test_free(p);
}

/* The context takes what ctx_memory says, while it is created and never again; the Nth allocation fails. */
static void test_cpu_memory(void) {
    qwen3_token tokens[60];
    float logits[20 * CPU_VOCAB];
    cpu_model *m = cpu_model_create(QWEN3I_BF16, 10.0f);
    const qwen3_backend *b = qwen3i_cpu_backend();
    int chunk, fail;
    cpu_tokens(tokens, 60);
    for (chunk = 1; chunk <= 20; chunk += 19) {
        cpu_ledger ledger = {0, 0, -1};
        qwen3_ctx_desc d = cpu_desc(3, chunk, QWEN3_KV_BF16);
        qwen3i_cpu *c;
        d.allocator.alloc = cpu_ledger_alloc; d.allocator.free = cpu_ledger_free; d.allocator.user = &ledger;
        c = cpu_ctx(m, &d);
        CHECK(ledger.bytes == b->ctx_memory(NULL, &m->model, &d).host_bytes && ledger.bytes > 0);
        CHECK(cpu_eval(c, 0, tokens, 0, chunk, logits) == QWEN3_OK);
        CHECK(ledger.most == b->ctx_memory(NULL, &m->model, &d).host_bytes);
        qwen3i_cpu_free(c);
        CHECK(ledger.bytes == 0);
        for (fail = 0; ; fail++) {
            void *state = &ledger;
            qwen3_result r;
            ledger.n_left = fail;
            r = b->ctx_create(&state, NULL, &m->model, &d, NULL);
            if (r == QWEN3_OK) { b->ctx_free(state); break; }
            CHECK(r == QWEN3_ERR_MEMORY && state == NULL && ledger.bytes == 0);
        }
        CHECK(fail >= 1 && ledger.bytes == 0);
        d.max_ctx = 1 << 30; d.max_seqs = 1 << 30; d.kv_type = QWEN3_KV_F32; m->model.config.n_layer = 1 << 20;
        CHECK(b->ctx_memory(NULL, &m->model, &d).host_bytes == UINT64_MAX);     /* does not fit 64 bits */
        m->model.config.n_layer = CPU_LAYERS;
    }
    cpu_model_free(m);
}

static void suite_cpu(void) {
    RUN(test_cpu_formats_roundtrip);
    RUN(test_cpu_formats_rounding);
    RUN(test_cpu_formats_rows);
    RUN(test_cpu_exp);
    RUN(test_cpu_dot);
    RUN(test_cpu_pairs);
    RUN(test_cpu_mix);
    RUN(test_cpu_softmax);
    RUN(test_cpu_rmsnorm);
    RUN(test_cpu_silu_mul);
    RUN(test_cpu_simd_agree);
    RUN(test_cpu_rope_freqs);
    RUN(test_cpu_rope);
    RUN(test_cpu_threads);
    RUN(test_cpu_matmul);
    RUN(test_cpu_embed);
    RUN(test_cpu_attention);
    RUN(test_cpu_forward);
    RUN(test_cpu_forward_same_bits);
    RUN(test_cpu_forward_batch);
    RUN(test_cpu_forward_copies);
    RUN(test_cpu_forward_extremes);
    RUN(test_cpu_cancel);
    RUN(test_cpu_memory);
}
#endif
