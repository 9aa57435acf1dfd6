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

static void formats_vector(qwen3i_type type, int blocks, uint64_t wanted, double first, double last) {
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
        for (int level = 0; i % 16 == 5 && qwen3i_simd_level(level); level++) {
            qwen3i_simd_level(level)->load(z, b, type, f->elements);
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
        formats_vector(type, blocks, sum, first, last);
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

/* ---- quantised directories ---------------------------------------------------------------------------------
   A model whose matrices are made of whole numbers, zeros and scales is written as each kind of directory has it, and
   with the values that its format defines in float32: both must give the same logits, to the bit. */
typedef enum formats_kind { FORMATS_PLAIN, FORMATS_FP8, FORMATS_FP8_ROWS, FORMATS_FP8_ONE, FORMATS_AWQ, FORMATS_GPTQ,
                            FORMATS_GPTQ_V2, FORMATS_CT, FORMATS_CT_ZEROS } formats_kind;

typedef struct formats_scheme { formats_kind kind; int bits, group, bf16; const char *config; } formats_scheme;

static const formats_scheme formats_schemes[] = {
    {FORMATS_FP8, 8, 128, 1, "{\"quant_method\":\"fp8\",\"fmt\":\"e4m3\",\"activation_scheme\":\"dynamic\",\"weight_block_size\":[128,128]}"},
    {FORMATS_FP8_ROWS, 8, 0, 1, "{\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\",\"config_groups\":{\"group_0\":"
        "{\"input_activations\":{\"num_bits\":8,\"strategy\":\"token\"},\"weights\":{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"channel\"}}}}"},
    {FORMATS_FP8_ONE, 8, 0, 1, "{\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\",\"config_groups\":{\"group_0\":"
        "{\"weights\":{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"tensor\"}}}}"},
    {FORMATS_AWQ, 4, 128, 0, "{\"quant_method\":\"awq\",\"bits\":4,\"group_size\":128,\"zero_point\":true,\"version\":\"gemm\"}"},
    {FORMATS_AWQ, 4, 64, 1, "{\"quant_method\":\"awq\",\"w_bit\":4,\"q_group_size\":64,\"zero_point\":true,\"version\":\"GEMM\"}"},
    {FORMATS_GPTQ, 4, 128, 0, "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"desc_act\":false,\"sym\":true,\"checkpoint_format\":\"gptq\"}"},
    {FORMATS_GPTQ, 4, 32, 0, "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":32}"},
    {FORMATS_GPTQ, 8, 128, 0, "{\"quant_method\":\"gptq\",\"bits\":8,\"group_size\":128}"},
    {FORMATS_GPTQ, 8, 0, 0, "{\"quant_method\":\"gptq\",\"bits\":8,\"group_size\":-1}"},
    {FORMATS_GPTQ_V2, 4, 128, 0, "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"checkpoint_format\":\"gptq_v2\"}"},
    {FORMATS_GPTQ_V2, 8, 128, 0, "{\"quant_method\":\"gptq\",\"bits\":8,\"group_size\":128,\"checkpoint_format\":\"gptq_v2\"}"},
    {FORMATS_CT, 4, 128, 1, "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":{\"input_activations\":null,"
        "\"weights\":{\"num_bits\":4,\"group_size\":128,\"strategy\":\"group\",\"symmetric\":true,\"type\":\"int\"}}},\"ignore\":[\"lm_head\"]}"},
    {FORMATS_CT, 8, 0, 1, "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":"
        "{\"weights\":{\"num_bits\":8,\"group_size\":null,\"strategy\":\"channel\",\"symmetric\":true,\"type\":\"int\"}}}}"},
    {FORMATS_CT_ZEROS, 4, 32, 0, "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":"
        "{\"weights\":{\"num_bits\":4,\"group_size\":32,\"strategy\":\"group\",\"symmetric\":false,\"type\":\"int\"}}}}"}
};

static const struct { const char *name; int rows, cols; } formats_tensors[] = {     /* rows 0: gains */
    {"model.norm", 0, 256}, {"model.layers.0.input_layernorm", 0, 256}, {"model.layers.0.post_attention_layernorm", 0, 256},
    {"model.layers.0.self_attn.q_norm", 0, 64}, {"model.layers.0.self_attn.k_norm", 0, 64}, {"model.embed_tokens", 64, 256},
    {"model.layers.0.self_attn.q_proj", 128, 256}, {"model.layers.0.self_attn.k_proj", 64, 256},
    {"model.layers.0.self_attn.v_proj", 64, 256}, {"model.layers.0.self_attn.o_proj", 256, 128},
    {"model.layers.0.mlp.gate_proj", 384, 256}, {"model.layers.0.mlp.up_proj", 384, 256}, {"model.layers.0.mlp.down_proj", 256, 384}
};

/* What matrix t consists of */
static uint32_t formats_hash(int t, int what, int row, int col) {
    uint32_t h = (uint32_t)(t * 7 + what) * 2654435761u ^ (uint32_t)row * 40503u ^ (uint32_t)col * 2246822519u;
    h = (h ^ h >> 15) * 2246822519u;
    h = (h ^ h >> 13) * 3266489917u;
    return h ^ h >> 16;
}
static unsigned formats_q(const formats_scheme *s, int t, int row, int col) {
    unsigned q = formats_hash(t, 0, row, col) & ((1u << s->bits) - 1);
    return s->kind <= FORMATS_FP8_ONE && (q & 0x7F) >= 0x60 ? q & 0xDF : q;      /* FP8: no NaN, and of a usual size */
}
static unsigned formats_z(const formats_scheme *s, int t, int row, int group) {
    if (s->kind == FORMATS_CT) return 1u << (s->bits - 1);
    return formats_hash(t, 1, row, group) & ((1u << s->bits) - 1);
}
static float formats_scale(const formats_scheme *s, int t, int row, int group, uint16_t *bits) {
    float f = (float)(1 + formats_hash(t, 2, row, group) % 100) * (s->bits == 8 ? 0.00001f : 0.0002f);
    uint16_t h = s->bf16 ? qwen3i_f32_to_bf16(f) : qwen3i_f32_to_f16(f);
    if (bits) *bits = h;
    return s->bf16 ? qwen3i_bf16_to_f32(h) : qwen3i_f16_to_f32(h);
}

static int formats_is_fp8(const formats_scheme *s) { return s->kind == FORMATS_FP8 || s->kind == FORMATS_FP8_ROWS || s->kind == FORMATS_FP8_ONE; }

/* By the definition of each kind */
static float formats_value(const formats_scheme *s, int t, int row, int col, int cols) {
    unsigned q = formats_q(s, t, row, col);
    int group = s->group ? s->group : cols;
    if (!formats_is_fp8(s)) return formats_scale(s, t, row, col / group, NULL) * (float)((int)q - (int)formats_z(s, t, row, col / group));
    double size = (q >> 3 & 15) == 0 ? (q & 7) / 512.0 : (1 + (q & 7) / 8.0) * pow(2, (int)(q >> 3 & 15) - 7);
    float scale = s->kind == FORMATS_FP8 ? formats_scale(s, t, row / 128, col / 128, NULL) : formats_scale(s, t, s->kind == FORMATS_FP8_ONE ? 0 : row, 0, NULL);
    return (float)((q & 0x80 ? -size : size) * (double)scale);
}

typedef struct formats_file { tiny_text header, data; } formats_file;

static void formats_add(formats_file *f, const char *name, const char *part, const char *dtype, int d0, int d1, const void *p, size_t bytes) {
    char shape[32];
    snprintf(shape, sizeof shape, d1 < 0 ? "%d" : "%d,%d", d0, d1);
    tiny_printf(&f->header, "%s\"%s.%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%lu,%lu]}", f->header.n ? "," : "{", name, part, dtype, shape,
                (unsigned long)f->data.n, (unsigned long)(f->data.n + bytes));
    tiny_append(&f->data, p, bytes);
}

static void formats_put(uint32_t *words, size_t word, int bits, int field, unsigned value) { words[word] |= value << bits * field; }

static void formats_add_quantised(formats_file *f, const formats_scheme *s, int t) {
    static const int order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    const char *name = formats_tensors[t].name;
    const int rows = formats_tensors[t].rows, cols = formats_tensors[t].cols, group = s->group ? s->group : cols, n = (cols + group - 1) / group, per = 32 / s->bits;
    const char *dtype = s->bf16 ? "BF16" : "F16";
    uint32_t *words = (uint32_t *)calloc((size_t)(rows * cols), 4), *zeros = (uint32_t *)calloc((size_t)(rows * n), 4);
    uint16_t *scales = (uint16_t *)calloc((size_t)(rows * n), 2);
    if (formats_is_fp8(s)) {
        for (int i = 0; i < rows * cols; i++) ((uint8_t *)words)[i] = (uint8_t)formats_q(s, t, i / cols, i % cols);
        formats_add(f, name, "weight", "F8_E4M3", rows, cols, words, (size_t)(rows * cols));
        int down = s->kind == FORMATS_FP8 ? (rows + 127) / 128 : s->kind == FORMATS_FP8_ONE ? 1 : rows;
        for (int i = 0; i < down; i++) for (int g = 0; g < n; g++) formats_scale(s, t, i, g, &scales[i * n + g]);
        if (s->kind == FORMATS_FP8) formats_add(f, name, "weight_scale_inv", dtype, down, n, scales, (size_t)(down * n) * 2);
        else formats_add(f, name, "weight_scale", dtype, down, s->kind == FORMATS_FP8_ONE ? -1 : 1, scales, (size_t)down * 2);
    } else if (s->kind == FORMATS_AWQ) {
        for (int i = 0; i < cols; i++) for (int c = 0; c < rows / 8; c++) for (int k = 0; k < 8; k++)
            formats_put(words, (size_t)(i * (rows / 8) + c), 4, k, formats_q(s, t, 8 * c + order[k], i));
        for (int g = 0; g < n; g++) for (int c = 0; c < rows / 8; c++) for (int k = 0; k < 8; k++)
            formats_put(zeros, (size_t)(g * (rows / 8) + c), 4, k, formats_z(s, t, 8 * c + order[k], g));
        for (int g = 0; g < n; g++) for (int o = 0; o < rows; o++) formats_scale(s, t, o, g, &scales[g * rows + o]);
        formats_add(f, name, "qweight", "I32", cols, rows / 8, words, (size_t)(cols * rows / 2));
        formats_add(f, name, "qzeros", "I32", n, rows / 8, zeros, (size_t)(n * rows / 2));
        formats_add(f, name, "scales", dtype, n, rows, scales, (size_t)(n * rows) * 2);
    } else if (s->kind == FORMATS_GPTQ || s->kind == FORMATS_GPTQ_V2) {
        const unsigned less = s->kind == FORMATS_GPTQ, mask = (1u << s->bits) - 1;
        for (int i = 0; i < cols; i++) for (int o = 0; o < rows; o++) formats_put(words, (size_t)(i / per * rows + o), s->bits, i % per, formats_q(s, t, o, i));
        for (int g = 0; g < n; g++) for (int o = 0; o < rows; o++)
            formats_put(zeros, (size_t)(g * (rows / per) + o / per), s->bits, o % per, (formats_z(s, t, o, g) - less) & mask);
        for (int g = 0; g < n; g++) for (int o = 0; o < rows; o++) formats_scale(s, t, o, g, &scales[g * rows + o]);
        formats_add(f, name, "qweight", "I32", cols / per, rows, words, (size_t)(cols / per * rows) * 4);
        formats_add(f, name, "qzeros", "I32", n, rows / per, zeros, (size_t)(n * (rows / per)) * 4);
        formats_add(f, name, "scales", dtype, n, rows, scales, (size_t)(n * rows) * 2);
        uint32_t *index = (uint32_t *)calloc((size_t)(cols > 0 ? cols : 0), 4);
        for (int i = 0; i < cols; i++) index[i] = (uint32_t)(i / group);
        if (t % 2) formats_add(f, name, "g_idx", "I32", cols, -1, index, (size_t)cols * 4);      /* it may be absent */
        free(index);
    } else {
        for (int o = 0; o < rows; o++) for (int i = 0; i < cols; i++) formats_put(words, (size_t)(o * (cols / per) + i / per), s->bits, i % per, formats_q(s, t, o, i));
        for (int o = 0; o < rows; o++) for (int g = 0; g < n; g++) {
            formats_put(zeros, (size_t)(o / per * n + g), s->bits, o % per, formats_z(s, t, o, g));
            formats_scale(s, t, o, g, &scales[o * n + g]);
        }
        const int64_t shape[2] = {rows, cols};
        formats_add(f, name, "weight_packed", "I32", rows, cols / per, words, (size_t)(rows * (cols / per)) * 4);
        formats_add(f, name, "weight_scale", dtype, rows, n, scales, (size_t)(rows * n) * 2);
        formats_add(f, name, "weight_shape", "I64", 2, -1, shape, sizeof shape);
        if (s->kind == FORMATS_CT_ZEROS) formats_add(f, name, "weight_zero_point", "I32", rows / per, n, zeros, (size_t)(rows / per * n) * 4);
    }
    free(words); free(zeros); free(scales);
}

/* The weights' file of a scheme, or, as float32, of its twin */
static tiny_text formats_weights(const formats_scheme *s, int twin) {
    formats_file f;
    tiny_text file;
    unsigned char length[8];
    memset(&f, 0, sizeof f);
    memset(&file, 0, sizeof file);
    for (int t = 0; t < (int)(sizeof formats_tensors / sizeof *formats_tensors); t++) {
        const int rows = formats_tensors[t].rows ? formats_tensors[t].rows : 1, cols = formats_tensors[t].cols;
        if (t > 5 && !twin) { formats_add_quantised(&f, s, t); continue; }
        float *w = (float *)malloc((size_t)(rows * cols) * 4);
        for (int i = 0; i < rows * cols; i++)
            w[i] = t > 5 ? formats_value(s, t, i / cols, i % cols, cols) : t < 5 ? 1.0f + (float)(i % 7) * 0.1f : (float)(formats_hash(t, 3, i, 0) % 2001) * 0.001f - 1.0f;
        formats_add(&f, formats_tensors[t].name, "weight", "F32", formats_tensors[t].rows ? rows : cols, formats_tensors[t].rows ? cols : -1, w, (size_t)(rows * cols) * 4);
        free(w);
    }
    tiny_printf(&f.header, "}");
    for (int i = 0; i < 8; i++) length[i] = (unsigned char)((uint64_t)f.header.n >> 8 * i);
    tiny_append(&file, length, 8);
    tiny_append(&file, f.header.p, f.header.n);
    tiny_append(&file, f.data.p, f.data.n);
    free(f.header.p); free(f.data.p);
    return file;
}

static qwen3_result formats_load(qwen3_model **m, const char *quantization, const tiny_text *weights, char err[512]) {
    char config[1600];
    qwen3_file files[2];
    qwen3_load_desc d;
    snprintf(config, sizeof config, "{\"architectures\":[\"Qwen3ForCausalLM\"],\"model_type\":\"qwen3\",\"num_hidden_layers\":1,\"hidden_size\":256,"
        "\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":64,\"intermediate_size\":384,\"vocab_size\":64,\"max_position_embeddings\":32,"
        "\"rms_norm_eps\":1e-6,\"rope_theta\":10000,\"tie_word_embeddings\":true,\"quantization_config\":%s}", quantization);
    files[0].name = "config.json"; files[0].data = config; files[0].size = strlen(config);
    files[1].name = "model.safetensors"; files[1].data = weights->p; files[1].size = weights->n;
    memset(&d, 0, sizeof d);
    d.files = files; d.n_files = 2; d.flags = QWEN3_LOAD_CHECK;
    return qwen3_load(m, &d, err, 512);
}

/* Logits [64] after five tokens at once and one more */
static int formats_logits(const qwen3_model *m, float *out) {
    static const qwen3_token tokens[6] = {3, 60, 17, 22, 9, 41};
    qwen3_ctx_desc d;
    qwen3_ctx *c = NULL;
    qwen3_item item;
    memset(&d, 0, sizeof d);
    d.threads = 2;
    if (!CHECK(qwen3_ctx_create(&c, m, &d, NULL, 0) == QWEN3_OK)) return 0;
    memset(&item, 0, sizeof item);
    item.tokens = tokens; item.n = 5;
    int ok = qwen3_eval(c, &item, 1) == QWEN3_OK;
    item.tokens = tokens + 5; item.n = 1;
    ok = ok && qwen3_eval(c, &item, 1) == QWEN3_OK;
    if (CHECK(ok)) memcpy(out, qwen3_logits(c, 0), 64 * sizeof *out);
    qwen3_ctx_free(c);
    return ok;
}

static void test_formats_directories(void) {
    for (int i = 0; i < (int)(sizeof formats_schemes / sizeof *formats_schemes); i++) {
        const formats_scheme *s = &formats_schemes[i];
        tiny_text files[2];
        float logits[2][64];
        char err[512];
        int ok = 1;
        for (int twin = 0; twin < 2; twin++) {
            qwen3_model *m = NULL;
            files[twin] = formats_weights(s, twin);
            ok = CHECK_MSG(formats_load(&m, twin ? "null" : s->config, &files[twin], err) == QWEN3_OK, "scheme %d: %s", i, err) && formats_logits(m, logits[twin]) && ok;
            if (!twin && m) CHECK_MSG(m->info.weight_bytes < files[0].n * 5 / 4, "scheme %d is widened", i);
            qwen3_free(m);
        }
        if (ok) CHECK_MSG(cpu_same(logits[0], logits[1], 64) && cpu_finite(logits[0], 64), "scheme %d: the logits differ", i);
        free(files[0].p); free(files[1].p);
    }
}

/* Each is refused, by name. */
static void test_formats_refused(void) {
    static const struct { int scheme; const char *config, *from, *to, *message; } cases[] = {
        {3, "{\"quant_method\":\"bitsandbytes\",\"load_in_4bit\":true}", NULL, NULL, "bitsandbytes"},
        {3, "{\"quant_method\":\"awq\",\"bits\":4,\"group_size\":128,\"version\":\"gemv\"}", NULL, NULL, "gemv"},
        {3, "{\"quant_method\":\"awq\",\"bits\":3,\"group_size\":128,\"version\":\"gemm\"}", NULL, NULL, "3 bits"},
        {11, "{\"quant_method\":\"compressed-tensors\",\"format\":\"nvfp4-pack-quantized\"}", NULL, NULL, "nvfp4-pack-quantized"},
        {5, "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":24}", NULL, NULL, "groups of 24"},
        {5, "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":64}", NULL, NULL, "qzeros"},
        {5, NULL, "q_proj.qzeros\"", "q_proj.qzerox\"", "q_proj.qzeros"},
        {5, NULL, "q_proj.scales\":{\"dtype\":\"F16\"", "q_proj.scales\":{\"dtype\":\"I16\"", "dtype I16"},
        {0, NULL, "q_proj.weight_scale_inv\"", "q_proj.weight_scale_inw\"", "q_proj.weight_scale"},
        {0, "null", NULL, NULL, "F8_E4M3"}
    };
    for (int i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        tiny_text file = formats_weights(&formats_schemes[cases[i].scheme], 0);
        char err[512] = "";
        qwen3_model *m = NULL;
        for (size_t at = 8; cases[i].from && at + strlen(cases[i].from) < file.n; at++)
            if (!memcmp(file.p + at, cases[i].from, strlen(cases[i].from))) memcpy(file.p + at, cases[i].to, strlen(cases[i].to));
        qwen3_result r = formats_load(&m, cases[i].config ? cases[i].config : formats_schemes[cases[i].scheme].config, &file, err);
        CHECK_MSG(r < 0 && !m && strstr(err, cases[i].message), "case %d: %d, '%s'", i, (int)r, err);
        qwen3_free(m);
        free(file.p);
    }
    /* inputs in another order */
    tiny_text file = formats_weights(&formats_schemes[5], 0);
    char err[512] = "", *g_idx = NULL;
    qwen3_model *m = NULL;
    for (size_t at = 8; at + 20 < file.n; at++) if (!memcmp(file.p + at, "g_idx\":", 7)) { g_idx = file.p + at; break; }
    if (CHECK(g_idx != NULL)) {
        unsigned long begin = 0;
        uint64_t header = 0;
        sscanf(strstr(g_idx, "offsets\":[") + 10, "%lu", &begin);
        for (int i = 7; i >= 0; i--) header = header << 8 | (unsigned char)file.p[i];
        file.p[8 + header + begin] = 1;
        CHECK(formats_load(&m, formats_schemes[5].config, &file, err) == QWEN3_ERR_UNSUPPORTED && !m);
        CHECK_MSG(strstr(err, "g_idx") != NULL, "%s", err);
    }
    free(file.p);
}

static void suite_formats(void) {
    const fenv_t mode = qwen3i_float_enter();   /* as evaluation has it: -ffast-math makes zeros of subnormal numbers */
    RUN(test_formats_vectors);
    RUN(test_formats_products);
    RUN(test_formats_embed);
    RUN(test_formats_directories);
    RUN(test_formats_refused);
    qwen3i_float_leave(mode);
}
#endif
