/* Models of one layer whose matrices are made of whole numbers, zeros and scales: written as each kind of quantised
   directory has it, and, the twin, with the values in float32 that the kind defines. */
#ifndef QWEN3_TESTS_TINY_PACKED_H
#define QWEN3_TESTS_TINY_PACKED_H
#include "tiny.h"
#include <math.h>

typedef enum packed_kind { PACKED_FP8, PACKED_FP8_ROWS, PACKED_FP8_ONE, PACKED_AWQ, PACKED_GPTQ, PACKED_GPTQ_V2,
                           PACKED_GPTQ_ORDER, PACKED_CT, PACKED_CT_ZEROS, PACKED_CT_ORDER } packed_kind;

typedef struct packed_scheme { packed_kind kind; int bits, group, bf16; const char *config; } packed_scheme;

static const packed_scheme packed_schemes[] = {
    {PACKED_FP8, 8, 128, 1, "{\"quant_method\":\"fp8\",\"fmt\":\"e4m3\",\"activation_scheme\":\"dynamic\",\"weight_block_size\":[128,128]}"},
    {PACKED_FP8_ROWS, 8, 0, 1, "{\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\",\"config_groups\":{\"group_0\":"
        "{\"input_activations\":{\"num_bits\":8,\"strategy\":\"token\"},\"weights\":{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"channel\"}}}}"},
    {PACKED_FP8_ONE, 8, 0, 1, "{\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\",\"config_groups\":{\"group_0\":"
        "{\"weights\":{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"tensor\"}}}}"},
    {PACKED_AWQ, 4, 128, 0, "{\"quant_method\":\"awq\",\"bits\":4,\"group_size\":128,\"zero_point\":true,\"version\":\"gemm\"}"},
    {PACKED_AWQ, 4, 64, 1, "{\"quant_method\":\"awq\",\"w_bit\":4,\"q_group_size\":64,\"zero_point\":true,\"version\":\"GEMM\"}"},
    {PACKED_GPTQ, 4, 128, 0, "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"desc_act\":false,\"sym\":true,\"checkpoint_format\":\"gptq\"}"},
    {PACKED_GPTQ, 4, 32, 0, "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":32}"},
    {PACKED_GPTQ, 8, 128, 0, "{\"quant_method\":\"gptq\",\"bits\":8,\"group_size\":128}"},
    {PACKED_GPTQ, 8, 0, 0, "{\"quant_method\":\"gptq\",\"bits\":8,\"group_size\":-1}"},
    {PACKED_GPTQ_V2, 4, 128, 0, "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"checkpoint_format\":\"gptq_v2\"}"},
    {PACKED_GPTQ_V2, 8, 128, 0, "{\"quant_method\":\"gptq\",\"bits\":8,\"group_size\":128,\"checkpoint_format\":\"gptq_v2\"}"},
    {PACKED_GPTQ_ORDER, 4, 128, 0, "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"desc_act\":true}"},
    {PACKED_GPTQ_ORDER, 4, 32, 0, "{\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":32,\"desc_act\":true,\"static_groups\":true}"},
    {PACKED_GPTQ_ORDER, 8, 128, 0, "{\"quant_method\":\"gptq\",\"bits\":8,\"group_size\":128,\"desc_act\":true}"},
    {PACKED_CT, 4, 128, 1, "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":{\"input_activations\":null,"
        "\"weights\":{\"num_bits\":4,\"group_size\":128,\"strategy\":\"group\",\"symmetric\":true,\"type\":\"int\"}}},\"ignore\":[\"lm_head\"]}"},
    {PACKED_CT, 8, 0, 1, "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":"
        "{\"weights\":{\"num_bits\":8,\"group_size\":null,\"strategy\":\"channel\",\"symmetric\":true,\"type\":\"int\"}}}}"},
    {PACKED_CT_ZEROS, 4, 32, 0, "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":"
        "{\"weights\":{\"num_bits\":4,\"group_size\":32,\"strategy\":\"group\",\"symmetric\":false,\"type\":\"int\"}}}}"},
    {PACKED_CT_ORDER, 4, 32, 0, "{\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{\"group_0\":"
        "{\"weights\":{\"num_bits\":4,\"group_size\":32,\"strategy\":\"group\",\"symmetric\":false,\"actorder\":\"group\",\"type\":\"int\"}}}}"}
};

#define PACKED_SCHEMES ((int)(sizeof packed_schemes / sizeof *packed_schemes))

/* experts: of a mixture, with the router and, of each, gate, up and down in place of the last three; 0: dense */
typedef struct packed_shape { int embd, heads, kv_heads, head_dim, ff, vocab; const char *prefix; int experts; } packed_shape;
static const packed_shape packed_usual   = {256, 2, 1, 64, 384, 64, "model.", 0};  /* two groups of 128 and more */
static const packed_shape packed_wrapped = {256, 2, 1, 64, 384, 64, "wrapper.language_model.model.", 0};
static const packed_shape packed_least   = {32, 2, 1, 16, 64, 8, "model.", 0};
static const packed_shape packed_experts = {256, 2, 1, 64, 128, 64, "model.", 8};
static const packed_shape packed_few     = {32, 2, 1, 16, 64, 8, "model.", 8};

typedef struct packed_tensor { char name[48]; int rows, cols; } packed_tensor;      /* rows 0: gains */
#define PACKED_TENSORS 35               /* at most */
#define PACKED_GAINS    5               /* so many of them come first, then the embedding; the others are quantised */

/* How many there are */
static int packed_list(packed_tensor out[PACKED_TENSORS], const packed_shape *s) {
    const int q = s->heads * s->head_dim, kv = s->kv_heads * s->head_dim;
    static const char *const parts[3] = {"gate", "up", "down"};
    const packed_tensor list[13] = {
        {"norm", 0, s->embd}, {"layers.0.input_layernorm", 0, s->embd},
        {"layers.0.post_attention_layernorm", 0, s->embd}, {"layers.0.self_attn.q_norm", 0, s->head_dim},
        {"layers.0.self_attn.k_norm", 0, s->head_dim}, {"embed_tokens", s->vocab, s->embd},
        {"layers.0.self_attn.q_proj", q, s->embd}, {"layers.0.self_attn.k_proj", kv, s->embd},
        {"layers.0.self_attn.v_proj", kv, s->embd}, {"layers.0.self_attn.o_proj", s->embd, q},
        {"layers.0.mlp.gate_proj", s->ff, s->embd}, {"layers.0.mlp.up_proj", s->ff, s->embd},
        {"layers.0.mlp.down_proj", s->embd, s->ff}
    };
    memcpy(out, list, sizeof list);
    if (!s->experts) return 13;
    snprintf(out[10].name, sizeof out[10].name, "layers.0.mlp.gate");
    out[10].rows = s->experts;
    for (int i = 0; i < 3 * s->experts; i++) {
        packed_tensor *t = &out[11 + i];
        snprintf(t->name, sizeof t->name, "layers.0.mlp.experts.%d.%s_proj", i / 3, parts[i % 3]);
        t->rows = i % 3 < 2 ? s->ff : s->embd;
        t->cols = i % 3 < 2 ? s->embd : s->ff;
    }
    return 11 + 3 * s->experts;
}

/* ---- what matrix t consists of ----------------------------------------------------------------------------- */
static uint32_t packed_hash(int t, int what, int row, int col) {
    uint32_t h = (uint32_t)(t * 7 + what) * 2654435761u ^ (uint32_t)row * 40503u ^ (uint32_t)col * 2246822519u;
    h = (h ^ h >> 15) * 2246822519u;
    h = (h ^ h >> 13) * 3266489917u;
    return h ^ h >> 16;
}

static int packed_is_fp8(const packed_scheme *s) { return s->kind <= PACKED_FP8_ONE; }
static int packed_is_ordered(const packed_scheme *s) { return s->kind == PACKED_GPTQ_ORDER || s->kind == PACKED_CT_ORDER; }

static unsigned packed_q(const packed_scheme *s, int t, int row, int col) {
    unsigned q = packed_hash(t, 0, row, col) & ((1u << s->bits) - 1);
    return packed_is_fp8(s) && (q & 0x7F) >= 0x60 ? q & 0xDF : q;      /* FP8: no NaN, and of a usual size */
}

static unsigned packed_z(const packed_scheme *s, int t, int row, int group) {
    if (s->kind == PACKED_CT) return 1u << (s->bits - 1);
    return packed_hash(t, 1, row, group) & ((1u << s->bits) - 1);
}

static float packed_scale(const packed_scheme *s, int t, int row, int group, uint16_t *bits) {
    float f = (float)(1 + packed_hash(t, 2, row, group) % 100) * (s->bits == 8 ? 0.00001f : 0.0002f);
    uint16_t h = s->bf16 ? qwen3i_f32_to_bf16(f) : qwen3i_f32_to_f16(f);
    if (bits) *bits = h;
    return s->bf16 ? qwen3i_bf16_to_f32(h) : qwen3i_f16_to_f32(h);
}

/* The group of an input. In order of activation: of matrices with the same inputs the same */
static int packed_group(const packed_scheme *s, int col, int cols) {
    const int group = s->group && s->group < cols ? s->group : cols;
    return (packed_is_ordered(s) ? col * 37 % cols : col) / group;      /* 37 has no factor in common with cols */
}

/* By the definition of each kind */
static float packed_value(const packed_scheme *s, int t, int row, int col, int cols) {
    const unsigned q = packed_q(s, t, row, col);
    const int group = packed_group(s, col, cols);
    if (!packed_is_fp8(s)) return packed_scale(s, t, row, group, NULL) * (float)((int)q - (int)packed_z(s, t, row, group));
    const double size = (q >> 3 & 15) == 0 ? (q & 7) / 512.0 : (1 + (q & 7) / 8.0) * pow(2, (int)(q >> 3 & 15) - 7);
    const float scale = s->kind == PACKED_FP8 ? packed_scale(s, t, row / 128, col / 128, NULL) :
                        packed_scale(s, t, s->kind == PACKED_FP8_ONE ? 0 : row, 0, NULL);
    return (float)((q & 0x80 ? -size : size) * (double)scale);
}

/* ---- the file ---------------------------------------------------------------------------------------------- */
typedef struct packed_file { const char *prefix; tiny_text header, data; } packed_file;

static void packed_add(packed_file *f, const char *name, const char *part, const char *dtype, int d0, int d1, const void *p, size_t bytes) {
    char shape[32];
    snprintf(shape, sizeof shape, d1 < 0 ? "%d" : "%d,%d", d0, d1);
    tiny_printf(&f->header, "%s\"%s%s.%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%lu,%lu]}", f->header.n ? "," : "{", f->prefix, name, part, dtype,
                shape, (unsigned long)f->data.n, (unsigned long)(f->data.n + bytes));
    tiny_append(&f->data, p, bytes);
}

static void packed_put(uint32_t *words, int word, int bits, int field, unsigned value) { words[word] |= value << bits * field; }

typedef struct packed_parts {           /* of one matrix */
    const packed_scheme *s;
    const packed_tensor *m;
    int t, rows, cols, n, per;          /* n groups, per fields a word */
    uint32_t *words, *zeros;
    uint16_t *scales;
    const char *dtype;                  /* of the scales */
} packed_parts;

static void packed_add_fp8(packed_file *f, const packed_parts *p) {
    const int down = p->s->kind == PACKED_FP8 ? (p->rows + 127) / 128 : p->s->kind == PACKED_FP8_ONE ? 1 : p->rows;
    for (int i = 0; i < p->rows * p->cols; i++) ((uint8_t *)p->words)[i] = (uint8_t)packed_q(p->s, p->t, i / p->cols, i % p->cols);
    packed_add(f, p->m->name, "weight", "F8_E4M3", p->rows, p->cols, p->words, (size_t)(p->rows * p->cols));
    for (int i = 0; i < down; i++) for (int g = 0; g < p->n; g++) packed_scale(p->s, p->t, i, g, &p->scales[i * p->n + g]);
    if (p->s->kind == PACKED_FP8) packed_add(f, p->m->name, "weight_scale_inv", p->dtype, down, p->n, p->scales, (size_t)(down * p->n) * 2);
    else packed_add(f, p->m->name, "weight_scale", p->dtype, down, p->s->kind == PACKED_FP8_ONE ? -1 : 1, p->scales, (size_t)down * 2);
}

static void packed_add_awq(packed_file *f, const packed_parts *p) {
    static const int order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    const int across = p->rows / 8;
    for (int i = 0; i < p->cols; i++) for (int c = 0; c < across; c++) for (int k = 0; k < 8; k++)
        packed_put(p->words, i * across + c, 4, k, packed_q(p->s, p->t, 8 * c + order[k], i));
    for (int g = 0; g < p->n; g++) for (int c = 0; c < across; c++) for (int k = 0; k < 8; k++)
        packed_put(p->zeros, g * across + c, 4, k, packed_z(p->s, p->t, 8 * c + order[k], g));
    for (int g = 0; g < p->n; g++) for (int o = 0; o < p->rows; o++) packed_scale(p->s, p->t, o, g, &p->scales[g * p->rows + o]);
    packed_add(f, p->m->name, "qweight", "I32", p->cols, across, p->words, (size_t)(p->cols * across) * 4);
    packed_add(f, p->m->name, "qzeros", "I32", p->n, across, p->zeros, (size_t)(p->n * across) * 4);
    packed_add(f, p->m->name, "scales", p->dtype, p->n, p->rows, p->scales, (size_t)(p->n * p->rows) * 2);
}

static void packed_add_order(packed_file *f, const packed_parts *p, const char *part) {
    uint32_t *index = (uint32_t *)calloc((size_t)p->cols, 4);
    for (int i = 0; i < p->cols; i++) index[i] = (uint32_t)packed_group(p->s, i, p->cols);
    packed_add(f, p->m->name, part, "I32", p->cols, -1, index, (size_t)p->cols * 4);
    free(index);
}

static void packed_add_gptq(packed_file *f, const packed_parts *p) {
    const unsigned less = p->s->kind != PACKED_GPTQ_V2, mask = (1u << p->s->bits) - 1;
    const int bits = p->s->bits, per = p->per, rows = p->rows;
    for (int i = 0; i < p->cols; i++) for (int o = 0; o < rows; o++) packed_put(p->words, i / per * rows + o, bits, i % per, packed_q(p->s, p->t, o, i));
    for (int g = 0; g < p->n; g++) for (int o = 0; o < rows; o++)
        packed_put(p->zeros, g * (rows / per) + o / per, bits, o % per, (packed_z(p->s, p->t, o, g) - less) & mask);
    for (int g = 0; g < p->n; g++) for (int o = 0; o < rows; o++) packed_scale(p->s, p->t, o, g, &p->scales[g * rows + o]);
    packed_add(f, p->m->name, "qweight", "I32", p->cols / per, rows, p->words, (size_t)(p->cols / per * rows) * 4);
    packed_add(f, p->m->name, "qzeros", "I32", p->n, rows / per, p->zeros, (size_t)(p->n * (rows / per)) * 4);
    packed_add(f, p->m->name, "scales", p->dtype, p->n, rows, p->scales, (size_t)(p->n * rows) * 2);
    if (p->t % 2 || packed_is_ordered(p->s)) packed_add_order(f, p, "g_idx");       /* it may be absent */
}

static void packed_add_compressed(packed_file *f, const packed_parts *p) {
    const int64_t shape[2] = {p->rows, p->cols};
    const int per = p->per, across = p->cols / per;
    for (int o = 0; o < p->rows; o++) for (int i = 0; i < p->cols; i++) packed_put(p->words, o * across + i / per, p->s->bits, i % per, packed_q(p->s, p->t, o, i));
    for (int o = 0; o < p->rows; o++) for (int g = 0; g < p->n; g++) {
        packed_put(p->zeros, o / per * p->n + g, p->s->bits, o % per, packed_z(p->s, p->t, o, g));
        packed_scale(p->s, p->t, o, g, &p->scales[o * p->n + g]);
    }
    packed_add(f, p->m->name, "weight_packed", "I32", p->rows, across, p->words, (size_t)(p->rows * across) * 4);
    packed_add(f, p->m->name, "weight_scale", p->dtype, p->rows, p->n, p->scales, (size_t)(p->rows * p->n) * 2);
    packed_add(f, p->m->name, "weight_shape", "I64", 2, -1, shape, sizeof shape);
    if (p->s->kind != PACKED_CT) packed_add(f, p->m->name, "weight_zero_point", "I32", p->rows / per, p->n, p->zeros, (size_t)(p->rows / per * p->n) * 4);
    if (packed_is_ordered(p->s)) packed_add_order(f, p, "weight_g_idx");
}

static void packed_add_quantised(packed_file *f, const packed_scheme *s, const packed_tensor *m, int t) {
    packed_parts p;
    p.s = s; p.m = m; p.t = t; p.rows = m->rows; p.cols = m->cols; p.per = 32 / s->bits;
    p.n = s->group && s->group < p.cols ? (p.cols + s->group - 1) / s->group : 1;
    p.dtype = s->bf16 ? "BF16" : "F16";
    p.words = (uint32_t *)calloc((size_t)(p.rows * p.cols), 4);
    p.zeros = (uint32_t *)calloc((size_t)(p.rows * p.n), 4);
    p.scales = (uint16_t *)calloc((size_t)(p.rows * p.n), 2);
    if (packed_is_fp8(s)) packed_add_fp8(f, &p);
    else if (s->kind == PACKED_AWQ) packed_add_awq(f, &p);
    else if (s->kind < PACKED_CT) packed_add_gptq(f, &p);
    else packed_add_compressed(f, &p);
    free(p.words); free(p.zeros); free(p.scales);
}

/* The weights' file of a scheme, or, as float32, of its twin */
static tiny_text packed_weights(const packed_scheme *s, const packed_shape *shape, int twin) {
    packed_tensor list[PACKED_TENSORS];
    packed_file f;
    tiny_text file;
    unsigned char length[8];
    memset(&f, 0, sizeof f);
    memset(&file, 0, sizeof file);
    const int n = packed_list(list, shape);
    f.prefix = shape->prefix;
    for (int t = 0; t < n; t++) {
        const int rows = list[t].rows ? list[t].rows : 1, cols = list[t].cols;
        if (t > PACKED_GAINS && !twin) { packed_add_quantised(&f, s, &list[t], t); continue; }
        float *w = (float *)malloc((size_t)(rows * cols) * 4);
        for (int i = 0; i < rows * cols; i++)
            w[i] = t > PACKED_GAINS ? packed_value(s, t, i / cols, i % cols, cols) :
                   t < PACKED_GAINS ? 1.0f + (float)(i % 7) * 0.1f : (float)(packed_hash(t, 3, i, 0) % 2001) * 0.001f - 1.0f;
        packed_add(&f, list[t].name, "weight", "F32", list[t].rows ? rows : cols, list[t].rows ? cols : -1, w, (size_t)(rows * cols) * 4);
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

static tiny_text packed_config(const packed_shape *s, const char *quantization) {
    tiny_text t = {NULL, 0};
    tiny_printf(&t, s->experts ? "{\"architectures\":[\"Qwen3MoeForCausalLM\"],\"model_type\":\"qwen3_moe\",\"num_experts\":%d,"
                "\"num_experts_per_tok\":3,\"moe_intermediate_size\":%d,\"norm_topk_prob\":true," :
                "{\"architectures\":[\"Qwen3ForCausalLM\"],\"model_type\":\"qwen3\",", s->experts, s->ff);
    tiny_printf(&t, "\"num_hidden_layers\":1,\"hidden_size\":%d,"
                "\"num_attention_heads\":%d,\"num_key_value_heads\":%d,\"head_dim\":%d,\"intermediate_size\":%d,\"vocab_size\":%d,",
                s->embd, s->heads, s->kv_heads, s->head_dim, s->ff, s->vocab);
    tiny_printf(&t, "\"max_position_embeddings\":32,\"rms_norm_eps\":1e-6,\"rope_theta\":10000,\"tie_word_embeddings\":true,"
                "\"quantization_config\":");
    tiny_append(&t, quantization, strlen(quantization));
    tiny_printf(&t, "}");
    return t;
}
#endif
