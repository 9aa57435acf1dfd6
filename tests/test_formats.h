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
    }
    w.data = data; w.rows = rows; w.cols = cols; w.type = type;
    return w;
}

/* y = W x for rows of x together, for each alone, by two threads, and in double precision */
static void formats_product(const qwen3i_simd *simd, qwen3i_type type, int rows, int cols, int n) {
    qwen3i_matrix w = formats_matrix(type, rows, cols);
    size_t row_bytes = (size_t)qwen3i_row_bytes(type, cols), count = (size_t)(rows * n);
    float *x = cpu_floats((size_t)(n * cols), 1.0), *y = cpu_floats(count, 1.0), *one = cpu_copy(y, count), *row = cpu_floats((size_t)cols, 1);
    float *panels = cpu_floats(QWEN3I_PANEL_ROWS * QWEN3I_PANEL_LD, 1);
    qwen3i_pool pool;
    qwen3i_exec e;
    memset(&pool, 0, sizeof pool);
    pool.n_lanes = 1;
    e.pool = &pool; e.simd = simd; e.panels = panels;
    float *before = cpu_copy(y, count);
    qwen3i_matmul_add(&e, y, &w, x, n);
    for (int t = 0; t < n; t++) qwen3i_matmul_add(&e, one + t * rows, &w, x + t * cols, 1);
    CHECK_MSG(cpu_same(y, one, count), "%s, %s, %d x %d x %d: depends on the batch", simd->name, qwen3i_format_of(type)->name, rows, cols, n);
    for (int r = 0; r < rows; r++) {
        qwen3i_decode(row, (const char *)w.data + (size_t)r * row_bytes, type, cols);
        for (int t = 0; t < n; t++) {
            double sum = (double)before[t * rows + r], size = fabs(sum);
            for (int k = 0; k < cols; k++) {
                double p = (double)row[k] * (double)x[t * cols + k];
                sum += p;
                size += fabs(p);
            }
            CHECK_MSG(fabs(sum - (double)y[t * rows + r]) <= 1e-6 * size, "%s, %s: %g, not %g", simd->name,
                      qwen3i_format_of(type)->name, (double)y[t * rows + r], sum);
        }
    }
    cpu_matrix_free(&w);
    free(x); free(y); free(one); free(row); free(panels); free(before);
}

static void test_formats_products(void) {
    const qwen3i_simd *simd;
    for (int level = 0; (simd = qwen3i_simd_level(level)) != NULL; level++)
        for (int type = QWEN3I_BF16 + 1; type < QWEN3I_N_TYPES; type++) {
            formats_product(simd, (qwen3i_type)type, 5, 256, 3);
            formats_product(simd, (qwen3i_type)type, 70, 1536, 7);
            formats_product(simd, (qwen3i_type)type, 66, 1024, 1);
            if (type < QWEN3I_FP8) continue;
            formats_product(simd, (qwen3i_type)type, 9, 328, 3);    /* blocks that are not full */
            formats_product(simd, (qwen3i_type)type, 5, 1100, 2);
        }
}

/* An embedding's rows */
static void test_formats_embed(void) {
    static const qwen3_token tokens[3] = {4, 0, 6};
    float y[3 * 256], row[256];
    for (int type = QWEN3I_BF16 + 1; type < QWEN3I_N_TYPES; type++) {
        qwen3i_matrix w = formats_matrix((qwen3i_type)type, 7, 256);
        qwen3i_exec e;
        e.pool = NULL; e.simd = qwen3i_simd_level(0); e.panels = NULL;
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
    RUN(test_formats_products);
    RUN(test_formats_embed);
    qwen3i_float_leave(mode);
}
#endif
