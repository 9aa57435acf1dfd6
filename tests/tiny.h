/* A whole model of 9 KB, made in memory: what the malformed files and the fuzzers start from. Its files are
   text until the last moment, so that a case is "this text instead of that one". */
#ifndef QWEN3_TESTS_TINY_H
#define QWEN3_TESTS_TINY_H
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct tiny_text { char *p; size_t n; } tiny_text;      /* malloc'ed, with a zero after it */

static size_t tiny_room(size_t n) {     /* a power of two */
    size_t room = 64;
    while (room < n) room *= 2;
    return room;
}

static void tiny_append(tiny_text *t, const void *p, size_t n) {
    if (!t->p || tiny_room(t->n + 1) < t->n + n + 1) t->p = (char *)realloc(t->p, tiny_room(t->n + n + 1));
    if (n) memcpy(t->p + t->n, p, n);
    t->n += n;
    t->p[t->n] = '\0';
}

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void tiny_printf(tiny_text *t, const char *format, ...) {
    char line[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof line, format, args);
    va_end(args);
    tiny_append(t, line, strlen(line));
}

static const char tiny_config[] =
    "{\"architectures\":[\"Qwen3ForCausalLM\"],\"model_type\":\"qwen3\",\"num_hidden_layers\":1,\"hidden_size\":4,"
    "\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":2,\"intermediate_size\":6,\"vocab_size\":264,"
    "\"max_position_embeddings\":32,\"rms_norm_eps\":1e-6,\"rope_theta\":10000,\"tie_word_embeddings\":true,"
    "\"attention_bias\":false,\"use_sliding_window\":false,\"hidden_act\":\"silu\",\"rope_scaling\":null,"
    "\"eos_token_id\":257}";

static const char tiny_generation[] =
    "{\"do_sample\":true,\"eos_token_id\":[257,259],\"temperature\":0.6,\"top_k\":20,\"top_p\":0.95}";

typedef struct tiny_tensor { const char *name; int rows, cols; } tiny_tensor;   /* rows 0: one dimension */
static const tiny_tensor tiny_tensors[] = {
    {"model.norm", 0, 4}, {"model.layers.0.input_layernorm", 0, 4}, {"model.layers.0.self_attn.q_proj", 4, 4},
    {"model.layers.0.self_attn.k_proj", 2, 4}, {"model.layers.0.self_attn.v_proj", 2, 4},
    {"model.layers.0.self_attn.q_norm", 0, 2}, {"model.layers.0.self_attn.k_norm", 0, 2},
    {"model.layers.0.self_attn.o_proj", 4, 4}, {"model.layers.0.post_attention_layernorm", 0, 4},
    {"model.layers.0.mlp.gate_proj", 6, 4}, {"model.layers.0.mlp.up_proj", 6, 4},
    {"model.layers.0.mlp.down_proj", 4, 6}, {"model.embed_tokens", 264, 4}
};
#define TINY_TENSORS ((int)(sizeof tiny_tensors / sizeof *tiny_tensors))

/* The header's text of tensors [from, to), in BF16 one after the other. Returns the bytes of their data. */
static size_t tiny_header(tiny_text *t, int from, int to) {
    size_t at = 0;
    int i;
    tiny_printf(t, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (i = from; i < to; i++) {
        const tiny_tensor *w = &tiny_tensors[i];
        const size_t size = 2 * (size_t)(w->rows ? w->rows : 1) * (size_t)w->cols;
        char shape[32];
        snprintf(shape, sizeof shape, w->rows ? "%d,%d" : "%.0d%d", w->rows, w->cols);
        tiny_printf(t, ",\"%s.weight\":{\"dtype\":\"BF16\",\"shape\":[%s],\"data_offsets\":[%lu,%lu]}", w->name, shape,
                    (unsigned long)at, (unsigned long)(at + size));
        at += size;
    }
    tiny_printf(t, "}");
    return at;
}

/* header -> a safetensors file: its length, itself, n bytes of data (small BF16 numbers). */
static tiny_text tiny_safetensors(const char *header, size_t header_n, size_t n) {
    tiny_text f = {NULL, 0};
    unsigned char word[8];
    size_t i;
    for (i = 0; i < 8; i++) word[i] = (unsigned char)((uint64_t)header_n >> (8 * i));
    tiny_append(&f, word, 8);
    tiny_append(&f, header, header_n);
    for (i = 0; i + 1 < n; i += 2) {
        word[0] = (unsigned char)(i * 37);
        word[1] = (unsigned char)(i % 6 ? 0x3E : 0xBD);
        tiny_append(&f, word, 2);
    }
    tiny_append(&f, "", n - i);         /* an odd byte */
    return f;
}

/* A byte as byte-level BPE vocabularies write it, escaped for JSON. */
static void tiny_byte(tiny_text *t, int byte) {
    int c = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE ? byte :
            byte <= 0x20 ? 0x100 + byte : byte <= 0xA0 ? 0x121 + byte - 0x7F : 0x143;
    if (c == '"' || c == '\\') tiny_printf(t, "\\");
    if (c < 0x80) tiny_printf(t, "%c", c);
    else tiny_printf(t, "%c%c", 0xC0 | c >> 6, 0x80 | (c & 63));
}

/* {"!":33, ...}: the 256 bytes and "ab" */
static void tiny_vocab(tiny_text *t) {
    int i;
    tiny_printf(t, "{");
    for (i = 0; i < 256; i++) { tiny_printf(t, i ? ",\"" : "\""); tiny_byte(t, i); tiny_printf(t, "\":%d", i); }
    tiny_printf(t, ",\"ab\":256}");
}

static const char tiny_merges[] = "#version: 0.2\na b\n";

static const char tiny_tokenizer_config[] =
    "{\"added_tokens_decoder\":{\"257\":{\"content\":\"<|im_end|>\",\"special\":true},"
    "\"258\":{\"content\":\"<|im_start|>\",\"special\":true},\"259\":{\"content\":\"<think>\",\"special\":false}},"
    "\"chat_template\":\"{{ enable_thinking }}\"}";

static tiny_text tiny_tokenizer(void) {
    static const char expression[] =
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}|"
        " ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+";
    tiny_text t = {NULL, 0};
    tiny_printf(&t, "{\"version\":\"1.0\",\"added_tokens\":["
        "{\"id\":257,\"content\":\"<|im_end|>\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,"
        "\"normalized\":false,\"special\":true},"
        "{\"id\":258,\"content\":\"<|im_start|>\",\"normalized\":false,\"special\":true},"
        "{\"id\":259,\"content\":\"<think>\",\"normalized\":false,\"special\":false}],"
        "\"normalizer\":{\"type\":\"NFC\"},");
    tiny_printf(&t, "\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":["
        "{\"type\":\"Split\",\"pattern\":{\"Regex\":\"%s\"},\"behavior\":\"Isolated\",\"invert\":false},"
        "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":false,\"use_regex\":false}]},",
        expression);
    tiny_printf(&t, "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"byte_fallback\":false,"
        "\"ignore_merges\":false,\"vocab\":");
    tiny_vocab(&t);
    tiny_printf(&t, ",\"merges\":[[\"a\",\"b\"]]}}");
    return t;
}

/* All files. A header's length and the data are added by tiny_files_of. */
enum { TINY_CONFIG, TINY_GENERATION, TINY_WEIGHTS, TINY_TOKENIZER, TINY_INDEX, TINY_SHARD_1, TINY_SHARD_2,
       TINY_VOCAB, TINY_MERGES, TINY_TOKENIZER_CONFIG, TINY_ADDED_TOKENS, TINY_MODULES, TINY_POOLING,
       TINY_FILES };
static const char *const tiny_names[TINY_FILES] = {
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "model.safetensors.index.json",
    "part-1.safetensors", "part-2.safetensors", "vocab.json", "merges.txt", "tokenizer_config.json",
    "added_tokens.json", "modules.json", "1_Pooling/config.json"
};
#define TINY_SPLIT 7                    /* tensors in the first shard */

typedef struct tiny_model { tiny_text file[TINY_FILES]; } tiny_model;     /* p NULL: there is no such file */

static void tiny_set(tiny_model *m, int which, const void *p, size_t n) {
    free(m->file[which].p);
    m->file[which].p = NULL;
    m->file[which].n = 0;
    tiny_append(&m->file[which], p, n);
}

static void tiny_remove(tiny_model *m, int which) {
    free(m->file[which].p);
    m->file[which].p = NULL;
    m->file[which].n = 0;
}

static void tiny_set_weights(tiny_model *m, int which, int from, int to) {
    tiny_text header = {NULL, 0};
    size_t n = tiny_header(&header, from, to);
    tiny_remove(m, which);
    m->file[which] = tiny_safetensors(header.p, header.n, n);
    free(header.p);
}

static void tiny_set_index(tiny_model *m) {
    int i;
    tiny_remove(m, TINY_INDEX);
    for (i = 0; i < TINY_TENSORS; i++)
        tiny_printf(&m->file[TINY_INDEX], "%s\"%s.weight\":\"%s\"",
                    i ? "," : "{\"metadata\":{\"total_size\":2384},\"weight_map\":{",
                    tiny_tensors[i].name, tiny_names[i < TINY_SPLIT ? TINY_SHARD_1 : TINY_SHARD_2]);
    tiny_printf(&m->file[TINY_INDEX], "}}");
}

static void tiny_make(tiny_model *m, int sharded, int vocab_files) {
    memset(m, 0, sizeof *m);
    tiny_set(m, TINY_CONFIG, tiny_config, sizeof tiny_config - 1);
    tiny_set(m, TINY_GENERATION, tiny_generation, sizeof tiny_generation - 1);
    if (sharded) {
        tiny_set_index(m);
        tiny_set_weights(m, TINY_SHARD_1, 0, TINY_SPLIT);
        tiny_set_weights(m, TINY_SHARD_2, TINY_SPLIT, TINY_TENSORS);
    } else tiny_set_weights(m, TINY_WEIGHTS, 0, TINY_TENSORS);
    if (vocab_files) {
        tiny_vocab(&m->file[TINY_VOCAB]);
        tiny_set(m, TINY_MERGES, tiny_merges, sizeof tiny_merges - 1);
        tiny_set(m, TINY_TOKENIZER_CONFIG, tiny_tokenizer_config, sizeof tiny_tokenizer_config - 1);
    } else m->file[TINY_TOKENIZER] = tiny_tokenizer();
}

static void tiny_free(tiny_model *m) {
    int i;
    for (i = 0; i < TINY_FILES; i++) free(m->file[i].p);
    memset(m, 0, sizeof *m);
}

static size_t tiny_size(const tiny_model *m) {
    size_t n = 0;
    int i;
    for (i = 0; i < TINY_FILES; i++) n += m->file[i].n;
    return n;
}

/* For qwen3_load_desc.files; returns how many there are. */
static int tiny_list(const tiny_model *m, qwen3_file out[TINY_FILES]) {
    int i, n = 0;
    for (i = 0; i < TINY_FILES; i++) {
        if (!m->file[i].p) continue;
        out[n].name = tiny_names[i];
        out[n].data = m->file[i].p;
        out[n++].size = m->file[i].n;
    }
    return n;
}
#endif
