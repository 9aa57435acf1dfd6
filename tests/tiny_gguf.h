/* GGUF files made in memory: a writer whose every number can be made wrong, and the model of tiny.h in its form. */
#ifndef QWEN3_TESTS_TINY_GGUF_H
#define QWEN3_TESTS_TINY_GGUF_H
#include <stdint.h>
#include "tiny.h"

/* ---- the writer ----------------------------------------------------------------------------------------- */
enum { GG_U8, GG_I8, GG_U16, GG_I16, GG_U32, GG_I32, GG_F32, GG_BOOL, GG_STR, GG_ARR, GG_U64, GG_I64, GG_F64 };
#define GG_AUTO ((uint64_t)0x5A5A5A5A5A5A5A5A)      /* a number that the writer fills in */

typedef struct gg_key { const char *name; uint32_t kind; tiny_text value; } gg_key;
typedef struct gg_tensor { char name[80]; uint32_t rank; uint64_t dims[5]; uint32_t type; uint64_t offset; tiny_text data; } gg_tensor;
typedef struct gg_file {
    uint32_t  version;
    uint64_t  said_tensors, said_keys;              /* GG_AUTO: as many as there are */
    gg_key    keys[48];
    int       n_keys;
    gg_tensor tensors[40];
    int       n_tensors;
} gg_file;

static void gg_number(tiny_text *t, uint64_t v, int n) {
    unsigned char b[8];
    int i;
    for (i = 0; i < n; i++) b[i] = (unsigned char)(v >> (8 * i));
    tiny_append(t, b, (size_t)n);
}

static void gg_string(tiny_text *t, const char *p, size_t n) {
    gg_number(t, n, 8);
    tiny_append(t, p, n);
}

/* The key's entry: an old one of that name is emptied, a new one made. */
static gg_key *gg_at(gg_file *f, const char *name, uint32_t kind) {
    gg_key *k;
    int i;
    for (i = 0; i < f->n_keys && strcmp(f->keys[i].name, name) != 0; i++) {}
    k = &f->keys[i];
    if (i == f->n_keys) f->n_keys++; else free(k->value.p);
    memset(k, 0, sizeof *k);
    k->name = name;
    k->kind = kind;
    tiny_append(&k->value, "", 0);
    return k;
}

static void gg_set(gg_file *f, const char *name, uint32_t kind, uint64_t v) {
    static const int sizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    gg_number(&gg_at(f, name, kind)->value, v, sizes[kind]);
}

static void gg_set_float(gg_file *f, const char *name, double value) {
    float v = (float)value;
    uint32_t bits;
    memcpy(&bits, &v, 4);
    gg_set(f, name, GG_F32, bits);
}

static void gg_set_string(gg_file *f, const char *name, const char *text) {
    gg_string(&gg_at(f, name, GG_STR)->value, text, strlen(text));
}

static tiny_text *gg_set_array(gg_file *f, const char *name, uint32_t item, uint64_t n) {
    tiny_text *t = &gg_at(f, name, GG_ARR)->value;
    gg_number(t, item, 4);
    gg_number(t, n, 8);
    return t;
}

/* rows 0: one dimension */
static gg_tensor *gg_add(gg_file *f, const char *name, int rows, int cols, uint32_t type, const void *data, size_t n) {
    gg_tensor *t = &f->tensors[f->n_tensors++];
    memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "%s", name);
    t->rank = rows ? 2 : 1;
    t->dims[0] = (uint64_t)cols;
    t->dims[1] = (uint64_t)rows;
    t->type = type;
    t->offset = GG_AUTO;
    tiny_append(&t->data, data, n);
    return t;
}

static void gg_pad(tiny_text *t) { while (t->n % 32) tiny_append(t, "", 1); }

/* The tensors [from, to) with all keys; to be freed */
static tiny_text gg_write_part(const gg_file *f, int from, int to) {
    tiny_text out = {NULL, 0};
    uint64_t at = 0;
    uint32_t d;
    int i;
    tiny_append(&out, "GGUF", 4);
    gg_number(&out, f->version, 4);
    gg_number(&out, f->said_tensors == GG_AUTO ? (uint64_t)(to - from) : f->said_tensors, 8);
    gg_number(&out, f->said_keys == GG_AUTO ? (uint64_t)f->n_keys : f->said_keys, 8);
    for (i = 0; i < f->n_keys; i++) {
        gg_string(&out, f->keys[i].name, strlen(f->keys[i].name));
        gg_number(&out, f->keys[i].kind, 4);
        tiny_append(&out, f->keys[i].value.p, f->keys[i].value.n);
    }
    for (i = from; i < to; i++) {
        const gg_tensor *t = &f->tensors[i];
        gg_string(&out, t->name, strlen(t->name));
        gg_number(&out, t->rank, 4);
        for (d = 0; d < t->rank && d < 5; d++) gg_number(&out, t->dims[d], 8);
        gg_number(&out, t->type, 4);
        gg_number(&out, t->offset == GG_AUTO ? at : t->offset, 8);
        at += (t->data.n + 31) / 32 * 32;
    }
    gg_pad(&out);
    for (i = from; i < to; i++) {
        tiny_append(&out, f->tensors[i].data.p, f->tensors[i].data.n);
        gg_pad(&out);
    }
    return out;
}
static tiny_text gg_write(const gg_file *f) { return gg_write_part(f, 0, f->n_tensors); }

static void gg_free(gg_file *f) {
    int i;
    for (i = 0; i < f->n_keys; i++) free(f->keys[i].value.p);
    for (i = 0; i < f->n_tensors; i++) free(f->tensors[i].data.p);
    memset(f, 0, sizeof *f);
}

/* ---- the tiny model --------------------------------------------------------------------------------------- */
static const char *const gg_names[TINY_TENSORS] = {     /* in the order of tiny_tensors */
    "output_norm", "blk.0.attn_norm", "blk.0.attn_q", "blk.0.attn_k", "blk.0.attn_v", "blk.0.attn_q_norm", "blk.0.attn_k_norm",
    "blk.0.attn_output", "blk.0.ffn_norm", "blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down", "token_embd"
};

static void gg_make_tensors(gg_file *f, const tiny_model *m) {
    const tiny_text *w = &m->file[TINY_WEIGHTS];
    const unsigned char *data = (const unsigned char *)w->p + 8 + ((size_t)(unsigned char)w->p[0] | (size_t)(unsigned char)w->p[1] << 8);
    int i, k;
    for (i = 0; i < TINY_TENSORS; i++) {
        const tiny_tensor *t = &tiny_tensors[i];
        const int n = (t->rows ? t->rows : 1) * t->cols;
        tiny_text wide = {NULL, 0};
        char name[80];
        snprintf(name, sizeof name, "%s.weight", gg_names[i]);
        for (k = 0; k < n && !t->rows; k++) gg_number(&wide, (uint64_t)data[2 * k] << 16 | (uint64_t)data[2 * k + 1] << 24, 4);
        if (t->rows) gg_add(f, name, t->rows, t->cols, 30, data, 2 * (size_t)n);
        else gg_add(f, name, 0, t->cols, 0, wide.p, wide.n);        /* norms are float32 */
        free(wide.p);
        data += 2 * n;
    }
}

/* A byte as vocabularies write it, without JSON's escapes */
static void gg_byte(tiny_text *out, int byte) {
    tiny_text t = {NULL, 0};
    tiny_byte(&t, byte);
    if (t.p[0] == '\\') gg_string(out, t.p + 1, t.n - 1); else gg_string(out, t.p, t.n);
    free(t.p);
}

static void gg_make_tokens(gg_file *f) {
    static const char *const added[] = {"<|im_end|>", "<|im_start|>", "<think>", "[PAD260]", "[PAD261]", "[PAD262]", "[PAD263]"};
    static const int types[] = {3, 3, 4, 5, 5, 5, 5};
    tiny_text *t;
    int i;
    gg_set_string(f, "tokenizer.ggml.model", "gpt2");
    gg_set_string(f, "tokenizer.ggml.pre", "qwen2");
    t = gg_set_array(f, "tokenizer.ggml.tokens", GG_STR, 264);
    for (i = 0; i < 256; i++) gg_byte(t, i);
    gg_string(t, "ab", 2);
    for (i = 0; i < 7; i++) gg_string(t, added[i], strlen(added[i]));
    t = gg_set_array(f, "tokenizer.ggml.token_type", GG_I32, 264);
    for (i = 0; i < 264; i++) gg_number(t, i < 257 ? 1 : (uint64_t)types[i - 257], 4);
    t = gg_set_array(f, "tokenizer.ggml.merges", GG_STR, 1);
    gg_string(t, "a b", 3);
    gg_set(f, "tokenizer.ggml.eos_token_id", GG_U32, 257);
    gg_set(f, "tokenizer.ggml.eot_token_id", GG_U32, 259);
    gg_set_string(f, "tokenizer.chat_template", "{{ enable_thinking }}");
}

static void gg_make(gg_file *f, const tiny_model *m) {
    memset(f, 0, sizeof *f);
    f->version = 3;
    f->said_keys = f->said_tensors = GG_AUTO;
    gg_set_string(f, "general.architecture", "qwen3");
    gg_set_string(f, "general.type", "model");
    gg_set(f, "qwen3.block_count", GG_U32, 1);
    gg_set(f, "qwen3.embedding_length", GG_U32, 4);
    gg_set(f, "qwen3.attention.head_count", GG_U32, 2);
    gg_set(f, "qwen3.attention.head_count_kv", GG_U32, 1);
    gg_set(f, "qwen3.attention.key_length", GG_U32, 2);
    gg_set(f, "qwen3.attention.value_length", GG_U32, 2);
    gg_set(f, "qwen3.feed_forward_length", GG_U32, 6);
    gg_set(f, "qwen3.context_length", GG_U32, 32);
    gg_set_float(f, "qwen3.attention.layer_norm_rms_epsilon", 1e-6);
    gg_set_float(f, "qwen3.rope.freq_base", 10000);
    gg_set_float(f, "general.sampling.temp", 0.6);
    gg_set_float(f, "general.sampling.top_p", 0.95);
    gg_set(f, "general.sampling.top_k", GG_I32, 20);
    gg_make_tokens(f);
    gg_make_tensors(f, m);
}

/* ---- a model whose matrices lie in blocks of 32: one of each such format ----------------------------------- */
static void gg_add_blocks(gg_file *f, const char *name, int rows, uint32_t type, int bytes) {
    unsigned char *data = (unsigned char *)calloc((size_t)rows, (size_t)bytes);
    int i;
    for (i = 0; i < rows * bytes; i++) data[i] = (unsigned char)(i * 151 >> 2);
    for (i = 0; i < rows; i++) {        /* a scale of about 0.01; that of MXFP4 is a byte, and where others have an offset, it is as small */
        data[i * bytes] = 120;
        data[i * bytes + 1] = 0x21;
        if (type == 3 || type == 7) data[i * bytes + 3] = 0x21;
    }
    gg_add(f, name, rows, 32, type, data, (size_t)(rows * bytes));
    free(data);
}

static void gg_make_blocks(gg_file *f) {
    static const uint64_t values[] = {1, 32, 2, 1, 16, 16, 32, 32, 8};
    static const char *const gains[] = {"output_norm", "blk.0.attn_norm", "blk.0.ffn_norm", "blk.0.attn_q_norm", "blk.0.attn_k_norm"};
    static const char *const names[9] = {"qwen3.block_count", "qwen3.embedding_length", "qwen3.attention.head_count",
        "qwen3.attention.head_count_kv", "qwen3.attention.key_length", "qwen3.attention.value_length", "qwen3.feed_forward_length",
        "qwen3.context_length", "qwen3.vocab_size"};
    float ones[32];
    char name[64];
    int i;
    memset(f, 0, sizeof *f);
    f->version = 3;
    f->said_keys = f->said_tensors = GG_AUTO;
    gg_set_string(f, "general.architecture", "qwen3");
    for (i = 0; i < 9; i++) gg_set(f, names[i], GG_U32, values[i]);
    gg_set_float(f, "qwen3.attention.layer_norm_rms_epsilon", 1e-6);
    gg_set_float(f, "qwen3.rope.freq_base", 10000);
    gg_set_string(f, "tokenizer.ggml.model", "no_vocab");
    for (i = 0; i < 32; i++) ones[i] = 1;
    for (i = 0; i < 5; i++) {
        snprintf(name, sizeof name, "%s.weight", gains[i]);
        gg_add(f, name, 0, i < 3 ? 32 : 16, 0, ones, i < 3 ? 128 : 64);
    }
    gg_add_blocks(f, "blk.0.attn_q.weight", 32, 2, 18);
    gg_add_blocks(f, "blk.0.attn_k.weight", 16, 3, 20);
    gg_add_blocks(f, "blk.0.attn_v.weight", 16, 6, 22);
    gg_add_blocks(f, "blk.0.attn_output.weight", 32, 7, 24);
    gg_add_blocks(f, "blk.0.ffn_gate.weight", 32, 20, 18);
    gg_add_blocks(f, "blk.0.ffn_up.weight", 32, 39, 17);
    gg_add_blocks(f, "blk.0.ffn_down.weight", 32, 8, 34);
    gg_add(f, "blk.0.attn_q.scale", 0, 1, 0, "\0\0\0\x40", 4);       /* twice */
    gg_add_blocks(f, "token_embd.weight", 8, 8, 34);
}
#endif
