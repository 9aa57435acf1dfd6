/* Weight formats: what each block decodes to, by every instruction set, and products with matrices that lie in blocks.
   tests/data/formats.ref is gguf-py's decoding (tools/make_formats.py). */
#ifndef QWEN3_TESTS_TEST_FORMATS_H
#define QWEN3_TESTS_TEST_FORMATS_H
#include "test.h"
#include "tiny.h"

/* Where a format's blocks have scales in half precision; -1: none */
static const int *formats_halves(qwen3i_type type) {
    static const int none[2] = {-1, -1}, first[2] = {0, -1}, both[2] = {0, 2}, q2[2] = {80, 82}, q3[2] = {108, -1}, q6[2] = {208, -1};
    switch (type) {
        case QWEN3I_MXFP4: case QWEN3I_NVFP4: case QWEN3I_FP8: case QWEN3I_INT4: case QWEN3I_INT4S: case QWEN3I_INT8: return none;
        case QWEN3I_Q4_1: case QWEN3I_Q5_1: case QWEN3I_Q4_K: case QWEN3I_Q5_K: return both;
        case QWEN3I_Q2_K: return q2;
        case QWEN3I_Q3_K: return q3;
        case QWEN3I_Q6_K: return q6;
        default: return first;
    }
}

/* Block i as tools/make_formats.py has it; *state goes on from block to block. */
static void formats_block(uint8_t *b, qwen3i_type type, uint32_t i, uint32_t *state) {
    const qwen3i_format *f = qwen3i_format_of(type);
    const int *at = formats_halves(type);
    for (int k = 0; k < f->bytes; k++) b[k] = (uint8_t)((*state = *state * 1664525u + 1013904223u) >> 24);
    for (int k = 0; k < 2 && at[k] >= 0; k++) {
        uint32_t half = k == 0 ? i & 0xFFFF : i * 40503u & 0xFFFF;
        if ((half & 0x7C00) == 0x7C00) half &= 0x83FF;
        b[at[k]] = (uint8_t)half;
        b[at[k] + 1] = (uint8_t)(half >> 8);
    }
    if (type == QWEN3I_MXFP4) b[0] = (uint8_t)i;
    for (int k = 0; type == QWEN3I_NVFP4 && k < 4; k++) b[k] = (uint8_t)((4 * i + (uint32_t)k) & 0x7F);
}

static void formats_vector(const qwen3i_simd *const *levels, qwen3i_type type, int blocks, uint64_t wanted, double first, double last) {
    const qwen3i_format *f = qwen3i_format_of(type);
    uint8_t b[256];
    float y[256], z[256];
    uint32_t state = (uint32_t)f->gguf;
    uint64_t sum = 0, n = 0;
    int bad = 0;
    for (int i = 0; i < blocks; i++) {
        formats_block(b, type, (uint32_t)i, &state);
        qwen3i_decode(y, b, type, f->elements);
        for (int k = 0; k < f->elements; k++) sum += qwen3i_bits_from_float(y[k] + 0.0f) * (n++ * 0x9E3779B97F4A7C15u + 1);
        if (i == 0) CHECK_MSG((double)y[0] == first, "%s: begins with %g, not %g", f->name, (double)y[0], first);
        for (int level = 0; i % 16 == 5 && levels[level]; level++) {
            levels[level]->load(z, b, type, f->elements);
            bad += !cpu_same(y, z, (size_t)f->elements);
        }
    }
    CHECK_MSG((double)y[f->elements - 1] == last, "%s: ends with %g, not %g", f->name, (double)y[f->elements - 1], last);
  #ifndef __FAST_MATH__                 /* which has no zeros with a sign */
    CHECK_MSG(sum == wanted, "%s: the sum of all bits is %llx, not %llx", f->name, (unsigned long long)sum, (unsigned long long)wanted);
  #else
    (void)sum; (void)wanted;
  #endif
    CHECK_MSG(bad == 0, "%s: %d blocks depend on the instruction set", f->name, bad);
}

static void test_formats_vectors(void) {
    char path[1024], name[16];
    int gguf, elements, bytes, blocks, seen = 0;
    unsigned long long sum;
    double first, last;
    const qwen3i_simd *levels[8];       /* asked for once: virtual machines take microseconds to say what their processor has */
    for (int i = 0; i < 8; i++) levels[i] = qwen3i_simd_level(i);
    snprintf(path, sizeof path, "%s/formats.ref", test_data);
    FILE *file = fopen(path, "r");
    if (!CHECK_MSG(file != NULL, "cannot open %s", path)) return;
    for (; fscanf(file, "%15s %d %d %d %d %llx %lf %lf", name, &gguf, &elements, &bytes, &blocks, &sum, &first, &last) == 8; seen++) {
        qwen3i_str s;
        s.p = name;
        s.n = strlen(name);
        qwen3i_type type = qwen3i_type_of(s);
        if (!CHECK_MSG(qwen3i_is_block(type), "%s is unknown", name)) continue;
        const qwen3i_format *f = qwen3i_format_of(type);
        CHECK_MSG(f->gguf == gguf && f->elements == elements && f->bytes == bytes, "%s: not as in ggml", name);
        formats_vector(levels, type, blocks, sum, first, last);
    }
    fclose(file);
    CHECK(seen == QWEN3I_FP8 - QWEN3I_BF16 - 1);  /* the rest is of this library */
}

/* Blocks of a matrix whose values are of a usual size */
static qwen3i_matrix formats_matrix(qwen3i_type type, int rows, int cols) {
    const qwen3i_format *f = qwen3i_format_of(type);
    const int *at = formats_halves(type);
    size_t size = (size_t)rows * (size_t)qwen3i_row_bytes(type, cols);
    uint8_t *data = (uint8_t *)malloc(size);
    uint32_t state = 1;
    qwen3i_matrix w;
    for (size_t i = 0; i < size; i += (size_t)f->bytes) {
        formats_block(data + i, type, (uint32_t)(i * 7), &state);
        for (int k = 0; k < 2 && at[k] >= 0; k++) data[i + (size_t)at[k] + 1] = (uint8_t)((data[i + (size_t)at[k] + 1] & 0x83) | 0x18);
        if (type == QWEN3I_MXFP4) data[i] = (uint8_t)(120 + i % 5);
        for (int k = 0; type == QWEN3I_NVFP4 && k < 4; k++) data[i + (size_t)k] &= 0x3F;
        if (type >= QWEN3I_FP8) data[i + 3] = 0x3C, data[i + 2] &= 0x7F;
        if (type == QWEN3I_INT4 || type == QWEN3I_INT4S) data[i] %= 17;     /* zeros as files have them */
    }
    w.data = data; w.rows = rows; w.cols = cols; w.type = type; w.factor = 0;
    return w;
}

/* x as products with blocks take it: 15 bits of the largest of 16 columns are kept. */
static void formats_round(const qwen3i_simd *simd, double *y, const float *x, int n) {
    static const int order[4] = {0, 2, 1, 3};
    const int digits = strstr(simd->name, "VNNI") != NULL;
    for (int k = 0; k < n; k += QWEN3I_PART) {
        qwen3i_rounded r;
        const int m = n - k < QWEN3I_PART ? n - k : QWEN3I_PART;
        float top = 0;
        int sum = 0;
        simd->round_row(&r, x + k, m);
        for (int i = 0; i < m; i++) top = fmaxf(top, fabsf(x[k + i]));
        CHECK((double)r.d <= (double)top / 32600);
        for (int i = 0; i < QWEN3I_PART; i++) {
            const int8_t *bytes = (const int8_t *)r.q + i / 4 * 8 + i % 4;
            const int q = digits ? bytes[0] * 256 + bytes[4] : r.q[i / 4 * 4 + order[i % 4]];
            sum += q;
            if (i >= m) { CHECK(q == 0); continue; }
            y[k + i] = (double)r.d * q;
            CHECK_MSG(fabs(y[k + i] - (double)x[k + i]) <= 0.51 * (double)r.d, "%s: %g becomes %g", simd->name, (double)x[k + i], y[k + i]);
        }
        CHECK(r.sum == sum);
    }
}

static void formats_round_odd(const qwen3i_simd *simd) {
    static const float odd[8] = {0.0f, 1e-38f, 3e38f, -1.0f, FLT_MIN, 1e-30f, 7.0f, -3e38f};
    float *x = cpu_floats(1000, 3);
    double y[1000];
    qwen3i_rounded r[3];
    formats_round(simd, y, x, 1000);
    formats_round(simd, y, x, 997);
    memset(x, 0, 64 * sizeof *x);
    simd->round_row(r, x, 33);
    CHECK(r[1].d == 0 && r[1].q[7] == 0 && r[2].d == 0 && r[2].q[0] == 0);
    for (int i = 0; i < 8; i++) {
        x[5] = odd[i];
        simd->round_row(r, x, 33);
        x[5] = fabsf(x[5]);
        const double most = (double)r[0].d * QWEN3I_ROUNDED_MAX;
        CHECK(fabs(most - (double)x[5]) <= 1e-6 * (double)x[5] + 1e-38 && (r[0].sum != 0 || x[5] <= 1e-30f));
    }
  #ifndef __FAST_MATH__                 /* which knows no such numbers */
    for (int i = 0; i < 2; i++) {
        x[5] = i ? NAN : -INFINITY;
        simd->round_row(r, x, 33);
        CHECK(!(fabsf(r[0].d) <= FLT_MAX) && r[0].q[6] == 0 && r[0].sum == 0);
    }
  #endif
    free(x);
}

static void test_formats_round(void) {
    for (int level = 0; qwen3i_simd_level(level); level++) formats_round_odd(qwen3i_simd_level(level));
}

typedef struct formats_bench { qwen3i_exec exec; qwen3i_pool pool; void *memory; } formats_bench;

static formats_bench *formats_open(const qwen3i_simd *simd, int n, int cols) {
    formats_bench *b = (formats_bench *)calloc(1, sizeof *b);
    b->memory = malloc(sizeof(qwen3i_panels) + 64);
    b->pool.n_lanes = 1;
    b->exec.pool = &b->pool; b->exec.simd = simd;
    b->exec.panels = (qwen3i_panels *)(((uintptr_t)b->memory + 63) / 64 * 64);
    b->exec.parts = (qwen3i_rounded *)malloc((size_t)(n * qwen3i_parts(cols)) * sizeof(qwen3i_rounded));
    return b;
}

static void formats_close(formats_bench *b) { free(b->memory); free(b->exec.parts); free(b); }

/* The same numbers each time, some columns much larger than others */
static float *formats_floats(size_t n) {
    float *x = (float *)malloc(n * sizeof *x);
    uint32_t state = 1;
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        x[i] = (float)((int)(state >> 8 & 0xFFFF) - 0x8000) * (i % 37 == 5 ? 1e-3f : 3e-5f);
    }
    return x;
}

/* y += W x for rows of x together and for each alone, and in double precision with x as it is taken; the first
   instruction set's result is kept in *same, which the others must equal. */
static void formats_product(const qwen3i_simd *simd, qwen3i_type type, int rows, int cols, int n, float **same) {
    qwen3i_matrix w = formats_matrix(type, rows, cols);
    const size_t row_bytes = (size_t)qwen3i_row_bytes(type, cols), count = (size_t)(rows * n);
    float *x = formats_floats((size_t)(n * cols)), *y = formats_floats(count), *one = cpu_copy(y, count), *row = formats_floats((size_t)cols);
    double *taken = (double *)malloc((size_t)(n * cols) * sizeof *taken);
    formats_bench *b = formats_open(simd, n, cols);
    float *before = cpu_copy(y, count);
    for (int t = 0; t < n; t++) formats_round(simd, taken + t * cols, x + t * cols, cols);
    for (int i = 0; qwen3i_is_bytes(type) && i < n * cols; i++) taken[i] = (double)x[i];
    qwen3i_matmul_add(&b->exec, y, &w, x, n);
    for (int t = 0; t < n; t++) qwen3i_matmul_add(&b->exec, one + t * rows, &w, x + t * cols, 1);
    CHECK_MSG(cpu_same(y, one, count), "%s, %s, %d x %d x %d: depends on the batch", simd->name, qwen3i_format_of(type)->name, rows, cols, n);
  #if !defined(FP_FAST_FMAF) || defined(__FAST_MATH__)
    if (simd != &qwen3i_plain_kernels)  /* it has no fused multiply-adds */
  #endif
    {
        if (!*same) *same = cpu_copy(y, count);
        CHECK_MSG(cpu_same(y, *same, count), "%s, %s: not the bits of %s", simd->name, qwen3i_format_of(type)->name, qwen3i_simd_level(0)->name);
    }
    for (int r = 0; r < rows; r++) {
        qwen3i_decode(row, (const char *)w.data + (size_t)r * row_bytes, type, cols);
        for (int t = 0; t < n; t++) {
            double sum = (double)before[t * rows + r], size = fabs(sum);
            for (int k = 0; k < cols; k++) {
                double p = (double)row[k] * taken[t * cols + k];
                sum += p;
                size += fabs(p);
            }
            CHECK_MSG(fabs(sum - (double)y[t * rows + r]) <= 1e-6 * size, "%s, %s: %g, not %g", simd->name,
                      qwen3i_format_of(type)->name, (double)y[t * rows + r], sum);
        }
    }
    formats_close(b);
    cpu_matrix_free(&w);
    free(x); free(y); free(one); free(row); free(taken); free(before);
}

static void test_formats_products(void) {
    static const int shapes[7][3] = {{5, 256, 3}, {70, 1536, 7}, {66, 1024, 1}, {11, 1280, 13}, {6, 1280, 33}, {9, 328, 3}, {5, 1100, 2}};
    for (int type = QWEN3I_BF16 + 1; type < QWEN3I_N_TYPES; type++)
        for (int i = 0; i < (type < QWEN3I_FP8 ? 5 : 7); i++) {    /* in the last ones, blocks are not full */
            const qwen3i_simd *simd;
            float *same = NULL;
            for (int level = 0; (simd = qwen3i_simd_level(level)) != NULL; level++)
                formats_product(simd, (qwen3i_type)type, shapes[i][0], shapes[i][1], shapes[i][2], &same);
            free(same);
        }
}

/* One column at a time: what a product gives is that column of the blocks, exactly as decoded, whatever the instruction set. */
static void test_formats_columns(void) {
    float x[256], y[19], row[19][256];
    for (int type = QWEN3I_BF16 + 1; type < QWEN3I_N_TYPES; type++) {
        qwen3i_matrix w = formats_matrix((qwen3i_type)type, 19, 256);
        for (int r = 0; r < 19; r++) qwen3i_decode(row[r], (const char *)w.data + (size_t)r * (size_t)qwen3i_row_bytes(w.type, 256), w.type, 256);
        for (int level = 0; qwen3i_simd_level(level); level++) {
            formats_bench *b = formats_open(qwen3i_simd_level(level), 1, 256);
            double worst = 0;
            for (int k = 0; k < 256; k++) {
                memset(x, 0, sizeof x);
                x[k] = QWEN3I_ROUNDED_MAX;      /* the scale is 1 */
                qwen3i_matmul(&b->exec, y, &w, x, 1);
                for (int r = 0; r < 19; r++) {
                    const double right = (double)x[k] * (double)row[r][k], size = fabs(right) + (qwen3i_has_offsets(w.type) ? (double)x[k] : 0);
                    worst = fmax(worst, fabs((double)y[r] - right) / (size + 1e-30));
                }
            }
            CHECK_MSG(worst <= 2e-7, "%s, %s: %g", b->exec.simd->name, qwen3i_format_of(w.type)->name, worst);
            formats_close(b);
        }
        cpu_matrix_free(&w);
    }
}

/* An embedding's rows */
static void test_formats_embed(void) {
    static const qwen3_token tokens[3] = {4, 0, 6};
    float y[3 * 256], row[256];
    for (int type = QWEN3I_BF16 + 1; type < QWEN3I_N_TYPES; type++) {
        qwen3i_matrix w = formats_matrix((qwen3i_type)type, 7, 256);
        qwen3i_exec e;
        e.pool = NULL; e.simd = qwen3i_simd_level(0); e.panels = NULL; e.parts = NULL;
        qwen3i_embed(&e, y, &w, tokens, 3);
        for (int i = 0; i < 3; i++) {
            qwen3i_decode(row, (const char *)w.data + (size_t)tokens[i] * (size_t)qwen3i_row_bytes(w.type, 256), w.type, 256);
            CHECK_MSG(cpu_same(row, y + 256 * i, 256), "%s", qwen3i_format_of(w.type)->name);
        }
        cpu_matrix_free(&w);
    }
}

static void suite_formats(void) {
    const fenv_t mode = qwen3i_float_enter();   /* as evaluation has it: -ffast-math makes zeros of subnormal numbers */
    RUN(test_formats_vectors);
    RUN(test_formats_round);
    RUN(test_formats_products);
    RUN(test_formats_columns);
    RUN(test_formats_embed);
    qwen3i_float_leave(mode);
}
#endif
