/* Fuzz targets of qwen3.h, all in one program; the environment variable FUZZ_TARGET chooses (see targets[]).

       tests/fuzz/run.sh SECONDS            all with libFuzzer; BUILD=afl: with AFL++; see there for how it is built
       cc -DFUZZ_MAIN ... && FUZZ_TARGET=json ./fuzz FILE...                run files again
       cc -DFUZZ_MAIN ... && ./fuzz --seeds tests/fuzz/seeds                write the seeds

   Besides what the sanitizers see, a violated promise is a trap: memory out of proportion, a leak, an error
   without a message, tokens that do not give the text back. */
#include <stdint.h>
#include <stddef.h>
#define QWEN3_IMPLEMENTATION
#include "../../qwen3.h"
#include "../tiny_gguf.h"
#include "../tiny_packed.h"
#include "../short.h"
#include <sys/types.h>

static void must(int ok, int line, const char *what) {
    if (ok) return;
    fprintf(stderr, "fuzz.c:%d: violated: %s\n", line, what);
    __builtin_trap();
}
#define MUST(x) must(!!(x), __LINE__, #x)

/* ---- memory under watch -------------------------------------------------------------------------------- */
typedef struct heap { size_t now, peak; } heap;
static heap memory;

static void *heap_alloc(size_t size, void *user) {
    void *p = size < (size_t)1 << 30 ? malloc(size) : NULL;
    (void)user;
    if (p) memory.now += size;
    if (memory.now > memory.peak) memory.peak = memory.now;
    return p;
}
static void heap_free(void *p, size_t size, void *user) {
    (void)user;
    memory.now -= size;
    free(p);
}

/* ---- what a model that loads is put through -------------------------------------------------------------- */
static const char sample[] = "abab The e\xCC\x81 \xF0\x9F\x98\x80<|im_end|> <think>\xFF 12\n\n";

static void use(const qwen3_model *m) {
    qwen3_ctx_desc d;
    qwen3_ctx *ctx = NULL;
    qwen3_item item;
    qwen3_token tokens[256];
    qwen3_sampler s = qwen3_sampler_preset(QWEN3_THINKING, 1);
    int n = qwen3_encode(m, sample, sizeof sample - 1, QWEN3_PARSE_SPECIAL, tokens, 256, NULL, 0), i;
    MUST(n > 0 || n == QWEN3_ERR_UNSUPPORTED);
    for (i = 0; i < n && i < 256; i++) MUST(tokens[i] >= 0 && tokens[i] < qwen3_get_info(m).n_tokens);
    memset(&d, 0, sizeof d);
    d.threads = 1;
    d.max_ctx = 8;
    d.prefill_chunk = 2;
    if (qwen3_get_info(m).n_vocab > 100000 || qwen3_ctx_create(&ctx, m, &d, NULL, 0) != QWEN3_OK) return;
    memset(&item, 0, sizeof item);
    tokens[0] = tokens[1] = tokens[2] = 0;
    item.tokens = tokens;
    item.n = 3;
    MUST(qwen3_eval(ctx, &item, 1) == QWEN3_OK);
    MUST(qwen3_next(ctx, 0, &s, tokens) >= QWEN3_ERR_ARG);
    qwen3_ctx_free(ctx);
}

/* Load the files; whatever happens must be in order. */
static void load_files(const qwen3_file *files, int n, size_t size, int flags) {
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    qwen3_result r;
    char err[300] = "";
    memset(&d, 0, sizeof d);
    d.n_files = n;
    d.files = files;
    d.flags = flags;
#ifdef FUZZ_CUDA
    d.backend = qwen3_cuda_backend();
#endif
    d.allocator.alloc = heap_alloc;
    d.allocator.free = heap_free;
    memory.now = memory.peak = 0;
    r = qwen3_load(&m, &d, err, sizeof err);
    MUST(memory.peak <= 8 * size + 24 * 1024 + sizeof(qwen3i_tokenizer));
    MUST(r == QWEN3_OK || r == QWEN3_ERR_FORMAT || r == QWEN3_ERR_UNSUPPORTED || r == QWEN3_ERR_IO);
    MUST((r == QWEN3_OK) == (m != NULL) && (r == QWEN3_OK) == !err[0]);
    MUST(r == QWEN3_OK || strstr(err, ".json") || strstr(err, ".safetensors") || strstr(err, "merges.txt") ||
         strstr(err, "the tokenizer has ids") || strstr(err, "the index names it") || strstr(err, ".gguf") || strstr(err, "CUDA: "));
    if (m) use(m);
    qwen3_free(m);
    MUST(memory.now == 0);
}

static void load(const tiny_model *t, int flags) {
    qwen3_file files[TINY_FILES];
    load_files(files, tiny_list(t, files), tiny_size(t), flags);
}

/* The tiny model with one file replaced. */
static void load_with(int which, const uint8_t *data, size_t n, int sharded, int vocab_files) {
    tiny_model t;
    tiny_make(&t, sharded, vocab_files);
    free(t.file[which].p);
    t.file[which].p = (char *)malloc(n ? n : 1);        /* exactly: reading on is seen */
    if (n) memcpy(t.file[which].p, data, n);
    t.file[which].n = n;
    load(&t, 0);
    tiny_free(&t);
}

/* ---- targets: files ---------------------------------------------------------------------------------------- */
static void fuzz_config(const uint8_t *data, size_t n)      { load_with(TINY_CONFIG, data, n, 0, 0); }
static void fuzz_generation(const uint8_t *data, size_t n)  { load_with(TINY_GENERATION, data, n, 0, 0); }
static void fuzz_safetensors(const uint8_t *data, size_t n) { load_with(TINY_WEIGHTS, data, n, 0, 0); }
static void fuzz_index(const uint8_t *data, size_t n)       { load_with(TINY_INDEX, data, n, 1, 0); }
static void fuzz_tokenizer(const uint8_t *data, size_t n)   { load_with(TINY_TOKENIZER, data, n, 0, 0); }

static void fuzz_gguf(const uint8_t *data, size_t n) {
    char *copy = (char *)malloc(n ? n : 1);             /* exactly: reading on is seen */
    qwen3_file file;
    if (n) memcpy(copy, data, n);
    file.name = "m.gguf";
    file.data = copy;
    file.size = n;
    load_files(&file, 1, n, 0);
    free(copy);
}

/* The first byte says which of the files it is, and which vocabulary it lies beside. */
static void fuzz_vocab(const uint8_t *data, size_t n) {
    static const int which[6] = {TINY_VOCAB, TINY_MERGES, TINY_TOKENIZER_CONFIG, TINY_ADDED_TOKENS, TINY_TOKENIZER_CONFIG,
                                 TINY_ADDED_TOKENS};
    if (n > 0) load_with(which[data[0] % 6], data + 1, n - 1, 0, data[0] % 6 < 4);
}

/* Skipping a value and reading it say the same about it; every string in it can be unescaped. */
static void fuzz_json(const uint8_t *data, size_t n) {
    char *copy = (char *)malloc(n ? n : 1), *text = (char *)malloc(n + 1);
    qwen3i_json skip, j;
    qwen3i_json_iter stack[QWEN3I_JSON_DEPTH];
    qwen3i_str s;
    double number;
    int depth = 0, more = 1;
    if (n) memcpy(copy, data, n);
    skip = j = qwen3i_json_begin(copy, n);
    qwen3i_json_skip(&skip);
    while (more && !j.error) {
        char c = qwen3i_json_peek(&j);
        if (c == '{' || c == '[') {
            if (depth == QWEN3I_JSON_DEPTH) break;
            qwen3i_json_open(&j, c, &stack[depth++]);
        } else if (c == '"') {
            if (qwen3i_json_string(&j, &s)) {
                MUST(qwen3i_json_unescape(s, text) <= s.n);
                qwen3i_json_is(s, "model_type");
            }
        } else if (c == '-' ? j.end - j.p < 2 || j.p[1] != 'I' : c >= '0' && c <= '9') {      /* -Infinity is a word */
            if (qwen3i_json_number(&j, &number)) MUST(number >= -DBL_MAX && number <= DBL_MAX);
        } else qwen3i_json_scalar(&j);
        while ((more = depth > 0) != 0 && !qwen3i_json_next(&j, &stack[depth - 1], &s)) {
            if (j.error) break;
            depth--;
        }
        MUST(j.p >= j.start && j.p <= j.end);
    }
    if (more && !j.error) MUST(skip.error != NULL);             /* too deep */
    else MUST(!skip.error == !j.error && skip.p == j.p);
    free(copy);
    free(text);
}

/* ---- targets: text --------------------------------------------------------------------------------------------- */
static qwen3_model *shared_model(void) {
    static qwen3_model *m;
    static tiny_model t;
    qwen3_file files[TINY_FILES];
    qwen3_load_desc d;
    if (m) return m;
    tiny_make(&t, 0, 0);
    memset(&d, 0, sizeof d);
    d.n_files = tiny_list(&t, files);
    d.files = files;
    MUST(qwen3_load(&m, &d, NULL, 0) == QWEN3_OK);
    return m;
}

static void fuzz_encode(const uint8_t *data, size_t n) {
    const qwen3_model *m = shared_model();
    const char *text = (const char *)data + 1;
    qwen3_token *tokens, few[4] = {-7, -7, -7, -7};
    int flags, count, i, k, ascii = 1;
    size_t at = 0;
    if (n < 1) return;
    flags = data[0] & 1;
    n--;
    count = qwen3_encode(m, text, n, flags, NULL, 0, NULL, 0);
    MUST(count >= 0 && (size_t)count <= 9 * n);                 /* at most 3 characters of 3 bytes for one */
    tokens = (qwen3_token *)malloc(((size_t)count + 1) * sizeof *tokens);
    MUST(qwen3_encode(m, text, n, flags, tokens, count, NULL, 0) == count);
    MUST(qwen3_encode(m, text, n, flags, few, 3, NULL, 0) == count && few[3] == -7);
    for (i = 0; i < 3 && i < count; i++) MUST(few[i] == tokens[i]);
    for (at = 0; at < n; at++) ascii &= (unsigned char)text[at] < 0x80;
    for (i = 0, at = 0; i < count; i++) {
        const char *p = qwen3_token_bytes(m, tokens[i], &k);
        MUST(p && k > 0 && (flags || tokens[i] < 257));         /* no control tokens out of plain text */
        if (ascii) MUST(at + (size_t)k <= n && memcmp(text + at, p, (size_t)k) == 0);
        at += (size_t)k;
    }
    if (ascii) MUST(at == n);
    MUST(qwen3i_utf8_complete(text, (int)n) <= (int)n && qwen3i_utf8_complete(text, (int)n) >= (int)n - 3);
    free(tokens);
}

/* Lines of text: the first character of each says what it is. */
static void fuzz_chat(const uint8_t *data, size_t n) {
    const qwen3_model *m = shared_model();
    char *text = (char *)malloc(n + 1), *p, *line;
    qwen3_msg msgs[8];
    qwen3_tool_call calls[8];
    const char *tools[4];
    qwen3_chat_desc chat;
    qwen3_token few[4];
    int n_calls = 0, count;
    memset(&chat, 0, sizeof chat);
    memset(msgs, 0, sizeof msgs);
    if (n) memcpy(text, data, n);
    text[n] = '\0';
    for (p = text; (line = p) != NULL;) {
        qwen3_msg *last = chat.n_msgs > 0 ? &msgs[chat.n_msgs - 1] : NULL;
        p = strchr(line, '\x1E');
        if (p) *p++ = '\0';
        if (*line >= '0' && *line <= '4' && chat.n_msgs < 8) {
            msgs[chat.n_msgs].role = (qwen3_role)(*line - '0');
            msgs[chat.n_msgs++].text = line + 1;
        } else if (*line == 't' && chat.n_tools < 4) tools[chat.n_tools++] = line + 1;
        else if (*line == 'r' && last) last->reasoning = line + 1;
        else if (*line == 'c' && last && n_calls < 8) {
            if (last->n_calls == 0) last->calls = &calls[n_calls];
            calls[n_calls].name = "f";
            calls[n_calls++].arguments = line + 1;
            last->n_calls++;
        } else if (*line == 'f') chat.flags = line[1] & 15;
        if (last && last->n_calls && last->calls + last->n_calls > calls + n_calls) last->n_calls = 0;
    }
    chat.msgs = msgs;
    chat.tools = tools;
    count = qwen3_chat_render(m, &chat, NULL, 0, NULL, 0);
    MUST(count >= QWEN3_ERR_ARG);
    if (count >= 0) {
        qwen3_token *tokens = (qwen3_token *)malloc(((size_t)count + 1) * sizeof *tokens);
        int i, opened = 0;
        MUST(qwen3_chat_render(m, &chat, tokens, count, NULL, 0) == count && qwen3_chat_render(m, &chat, few, 4, NULL, 0) == count);
        for (i = 0; i < count; i++) opened += tokens[i] == 258;
        MUST(opened <= chat.n_msgs + 2);                        /* nobody's text opened a turn */
        free(tokens);
    }
    free(text);
}

/* ---- targets: grammars, and replies taken apart ------------------------------------------------------------------ */
/* A random text of the grammar, led to its end: each mask is what the machine takes, and the end is reached in time. */
static void walk_grammar(const qwen3_model *m, const qwen3_grammar *g, qwen3i_masker *k, uint64_t seed) {
    static qwen3i_guide guide, before;
    static uint32_t mask[16];
    int i, steps, n, cost, left;
    qwen3i_guide_begin(k, &guide, g);
    for (steps = 0; steps < 40; steps++) {
        qwen3_token list[264], t;
        int n_list = 0;
        const int ends = qwen3i_guide_mask(k, &guide);
        memcpy(mask, k->mask, (size_t)k->v->n_words * sizeof *mask);
        for (t = 0; t < 257; t++) if (mask[t >> 5] >> (t & 31) & 1u) list[n_list++] = t;
        MUST(n_list > 0 || ends);
        before = guide;
        for (i = 0; i < 4; i++) {               /* some tokens, allowed or not */
            const char *p = qwen3_token_bytes(m, t = (qwen3_token)(qwen3i_random(&seed) % 257), &n);
            MUST(qwen3i_guide_bytes(k, &guide, p, n) == (int)(mask[t >> 5] >> (t & 31) & 1u));
            guide = before;
        }
        if (n_list == 0) return;
        t = list[qwen3i_random(&seed) % (uint64_t)n_list];
        MUST(qwen3i_guide_bytes(k, &guide, qwen3_token_bytes(m, t, &n), n));
    }
    cost = qwen3i_guide_cost(k, &guide, NULL, 0);
    for (left = cost; left >= 0 && cost < 4000; left--) {
        const qwen3_token t = qwen3i_guide_shortest(k, &guide);
        if (t < 0) break;
        MUST(qwen3i_guide_bytes(k, &guide, qwen3_token_bytes(m, t, &n), n));
    }
    MUST(cost >= 4000 || qwen3i_guide_mask(k, &guide));
}

static void fuzz_grammar(qwen3_grammar_kind kind, const uint8_t *data, size_t n) {
    static qwen3i_masker *k;
    static qwen3_allocator a;
    const qwen3_model *m = shared_model();
    qwen3_grammar_desc d;
    qwen3_grammar *g = NULL;
    qwen3_result r;
    char err[300] = "", *copy = (char *)malloc(n ? n : 1);
    memset(&d, 0, sizeof d);
    if (n) memcpy(copy, data, n);
    d.kind = kind;
    d.text = copy;
    d.n_bytes = n;
    d.flags = n % 3 == 0 ? QWEN3_GRAMMAR_COMPACT : 0;
    d.max_steps = 300000;
    d.max_bytes = 1 << 20;
    r = qwen3_grammar_create(&g, m, &d, err, sizeof err);
    MUST(r == QWEN3_OK || r == QWEN3_ERR_FORMAT || r == QWEN3_ERR_UNSUPPORTED);
    MUST((r == QWEN3_OK) == (g != NULL) && (r == QWEN3_OK) == !err[0]);
    if (g && !k) k = qwen3i_masker_make(&a, g->vocab);
    if (g) walk_grammar(m, g, k, qwen3i_hash(1, copy, n));
    qwen3_grammar_free(g);
    free(copy);
}
static void fuzz_schema(const uint8_t *data, size_t n) { fuzz_grammar(QWEN3_GRAMMAR_JSON_SCHEMA, data, n); }
static void fuzz_regex(const uint8_t *data, size_t n)  { fuzz_grammar(QWEN3_GRAMMAR_REGEX, data, n); }
static void fuzz_gbnf(const uint8_t *data, size_t n)   { fuzz_grammar(QWEN3_GRAMMAR_GBNF, data, n); }

static void fuzz_reply(const uint8_t *data, size_t n) {
    char *copy = (char *)malloc(n ? n : 1), *memory;
    qwen3_msg msg;
    int need, i;
    if (n) memcpy(copy, data, n);
    need = qwen3_reply_parse(copy, n, 0, &msg, NULL, 0, NULL, 0);
    MUST(need > 0 && !msg.text);
    memory = (char *)malloc((size_t)need);
    MUST(qwen3_reply_parse(copy, n, 0, &msg, memory, (size_t)need, NULL, 0) == need && msg.text && msg.reasoning);
    for (i = 0; i < msg.n_calls; i++) {
        qwen3i_json j = qwen3i_json_begin(msg.calls[i].arguments, strlen(msg.calls[i].arguments));
        MUST(qwen3i_json_skip(&j) && qwen3i_json_end(&j));
    }
    free(memory);
    free(copy);
}

/* ---- targets: states and whole models -------------------------------------------------------------------------- */
static qwen3_ctx *shared_ctx(unsigned char **state, size_t *size) {
    static qwen3_ctx *ctx;
    static unsigned char *saved;
    static size_t saved_size;
    static const qwen3_token tokens[5] = {10, 20, 30, 40, 50};
    qwen3_ctx_desc d;
    qwen3_item item;
    if (!ctx) {
        memset(&d, 0, sizeof d);
        memset(&item, 0, sizeof item);
        d.threads = 1;
        d.max_ctx = 16;
        MUST(qwen3_ctx_create(&ctx, shared_model(), &d, NULL, 0) == QWEN3_OK);
        item.tokens = tokens;
        item.n = 5;
        MUST(qwen3_eval(ctx, &item, 1) == QWEN3_OK);
        saved_size = (size_t)state_size(ctx, 0);
        saved = (unsigned char *)malloc(saved_size);
        MUST(state_save(ctx, 0, saved, saved_size, NULL) == QWEN3_OK);
    }
    *state = saved;
    *size = saved_size;
    return ctx;
}

/* The first byte: 0: the bytes as they are; 1: with a right checksum; else: changes to a good state, sealed. */
static void fuzz_state(const uint8_t *data, size_t n) {
    unsigned char *good, *bytes;
    size_t size, i;
    qwen3_ctx *ctx = shared_ctx(&good, &size);
    qwen3i_state_header h;
    qwen3_token t;
    qwen3_result r;
    int mode = n > 0 ? data[0] % 3 : 0, before;
    if (n > 0) { data++; n--; }
    if (mode == 2) {
        bytes = (unsigned char *)malloc(size);
        memcpy(bytes, good, size);
        for (i = 0; i + 3 <= n; i += 3) bytes[((size_t)data[i] << 8 | data[i + 1]) % size] ^= data[i + 2];
    } else {
        size = n;
        bytes = (unsigned char *)malloc(n ? n : 1);
        if (n) memcpy(bytes, data, n);
    }
    if (mode > 0 && size >= sizeof h) {
        memcpy(&h, bytes, sizeof h);
        if (mode == 1) h.total = size;
        memcpy(bytes, &h, sizeof h);
        h.checksum = qwen3i_hash(h.fingerprint, bytes + QWEN3I_CHECKSUM_FROM, size - QWEN3I_CHECKSUM_FROM);
        memcpy(bytes, &h, sizeof h);
    }
    before = seq_len(ctx, 0);
    r = state_load(ctx, 0, bytes, size);
    if (r == QWEN3_OK) MUST(seq_len(ctx, 0) == 0 || qwen3_next(ctx, 0, NULL, &t) >= QWEN3_ERR_CONTEXT_FULL);
    else MUST((r == QWEN3_ERR_FORMAT || r == QWEN3_ERR_MISMATCH || r == QWEN3_ERR_CONTEXT_FULL) &&
              qwen3_ctx_error(ctx)[0] && seq_len(ctx, 0) == before);
    free(bytes);
}

/* Almost valid models: shapes, types, rope and sharding from the first bytes, then changes of single bytes. */
static void fuzz_model(const uint8_t *data, size_t n) {
    static const char *const types[4] = {"BF16", "F16", "F32", "I8"};
    static const int sizes[4] = {2, 2, 4, 1};
    uint8_t b[12] = {0};
    tiny_model t;
    tiny_text header = {NULL, 0}, *config;
    int i, n_embd, n_kv, n_head, head_dim, n_ff, layers, layer, vocab = 264;
    size_t at = 0, k;
    for (i = 0; i < 12 && n > 0; i++, n--) b[i] = *data++;
    n_embd = 1 + b[0] % 35; n_kv = 1 + b[1] % 3; n_head = n_kv * (1 + b[2] % 5);
    head_dim = 2 + 2 * (b[3] % 12) + (b[3] == 255);
#ifdef FUZZ_CUDA
    if (b[3] & 15) head_dim = 8 * head_dim % 144;              /* multiples of 8 can be run, up to 128 */
#endif
    n_ff = 1 + b[4] % 40; layers = 1 + b[5] % 3;
    tiny_make(&t, 0, b[6] & 1);
    tiny_remove(&t, TINY_CONFIG);
    config = &t.file[TINY_CONFIG];
    tiny_printf(config, "{\"architectures\":[\"Qwen3ForCausalLM\"],\"model_type\":\"qwen3\",\"rms_norm_eps\":1e-6");
    tiny_printf(config, ",\"num_hidden_layers\":%d,\"hidden_size\":%d,\"num_attention_heads\":%d", layers, n_embd,
                n_head);
    tiny_printf(config, ",\"num_key_value_heads\":%d,\"head_dim\":%d,\"intermediate_size\":%d", n_kv, head_dim, n_ff);
    tiny_printf(config, ",\"vocab_size\":%d,\"max_position_embeddings\":%d,\"rope_theta\":%d", vocab, 1 + b[7],
                1 + 100 * b[8]);
    tiny_printf(config, ",\"tie_word_embeddings\":%s", b[6] & 2 ? "true" : "false");
    if (b[6] & 4)
        tiny_printf(config, ",\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":%d.%d,"
                    "\"original_max_position_embeddings\":%d,\"beta_fast\":%d}", b[9] % 16, b[9] / 16, b[10], b[11]);
    tiny_printf(config, "}");
    tiny_printf(&header, "{");
    for (layer = -1; layer < layers; layer++) for (i = 0; i < (layer < 0 ? 3 : 11); i++) {
        const char *const names[11] = {
            "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_norm",
            "self_attn.k_norm", "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
            "mlp.down_proj"
        };
        const char *const outer[3] = {"model.norm", "model.embed_tokens", "lm_head"};
        const int q_dim = n_head * head_dim, kv_dim = n_kv * head_dim;
        const int rows[11] = {0, q_dim, kv_dim, kv_dim, 0, 0, n_embd, 0, n_ff, n_ff, n_embd};
        const int cols[11] = {n_embd, n_embd, n_embd, n_embd, head_dim, head_dim, q_dim, n_embd, n_embd, n_embd, n_ff};
        int r = layer < 0 ? (i ? vocab : 0) : rows[i], c = layer < 0 ? n_embd : cols[i], type = b[6] >> 3 & 3;
        size_t size;
        if (b[6] & 32 && (i + layer) % 2) type = b[11] & 3;
        if (type == 3) type = b[11] == 77 ? 3 : 0;
        size = (size_t)sizes[type] * (size_t)(r ? r : 1) * (size_t)c;
        tiny_printf(&header, header.n > 1 ? ",\"" : "\"");
        if (layer < 0) tiny_printf(&header, "%s.weight", outer[i]);
        else tiny_printf(&header, "model.layers.%d.%s.weight", layer, names[i]);
        tiny_printf(&header, "\":{\"dtype\":\"%s\",\"shape\":[", types[type]);
        if (r) tiny_printf(&header, "%d,", r);
        tiny_printf(&header, "%d],\"data_offsets\":[%lu,%lu]}", c, (unsigned long)at, (unsigned long)(at + size));
        at += size;
    }
    tiny_printf(&header, "}%.*s", b[6] >> 6, "   ");            /* padding: unaligned data */
    tiny_remove(&t, TINY_WEIGHTS);
    t.file[TINY_WEIGHTS] = tiny_safetensors(header.p, header.n, at);
    for (; n >= 4; data += 4, n -= 4) {
        tiny_text *f = &t.file[data[0] % 4 == 1 ? TINY_WEIGHTS : data[0] % TINY_FILES];
        k = (size_t)data[1] << 8 | data[2];
        if (f->n > 0) f->p[(data[0] & 16 ? k * 13 : k) % f->n] ^= (char)data[3];
    }
    load(&t, b[10] & QWEN3_LOAD_CHECK);
    free(header.p);
    tiny_free(&t);
}

/* ---- targets: quantised directories ------------------------------------------------------------------------ */
/* Bytes 0 and 1: the scheme and the flags of loading. Then changes: where, two bytes of the place, what is changed. */
static void fuzz_packed(const uint8_t *data, size_t n, packed_kind first, packed_kind last) {
    tiny_text file[2];
    qwen3_file files[2];
    int schemes[PACKED_SCHEMES], count = 0, flags, i;
    const packed_scheme *s;
    for (i = 0; i < PACKED_SCHEMES; i++)
        if (packed_schemes[i].kind >= first && packed_schemes[i].kind <= last) schemes[count++] = i;
    if (n < 2) return;
    s = &packed_schemes[schemes[data[0] % count]];
    flags = data[1] & QWEN3_LOAD_CHECK;
    file[0] = packed_config(&packed_least, s->config);
    file[1] = packed_weights(s, &packed_least, 0);
    for (data += 2, n -= 2; n >= 4; data += 4, n -= 4) {
        const size_t header = 8 + (size_t)(unsigned char)file[1].p[0] + ((size_t)(unsigned char)file[1].p[1] << 8);
        tiny_text *f = &file[data[0] & 1];
        const size_t in = (data[0] & 2) && header < f->n ? header : f->n;       /* the header, or all of it */
        f->p[((size_t)data[1] << 8 | data[2]) % in] = (char)(data[0] & 4 ? data[3] : f->p[((size_t)data[1] << 8 | data[2]) % in] ^ data[3]);
    }
    for (i = 0; i < 2; i++) {
        void *copy = malloc(file[i].n);                 /* exactly: reading on is seen */
        memcpy(copy, file[i].p, file[i].n);
        files[i].name = i ? "model.safetensors" : "config.json";
        files[i].data = copy;
        files[i].size = file[i].n;
        free(file[i].p);
    }
    load_files(files, 2, files[0].size + files[1].size, flags);
    for (i = 0; i < 2; i++) free((void *)(uintptr_t)files[i].data);
}

static void fuzz_fp8(const uint8_t *data, size_t n)        { fuzz_packed(data, n, PACKED_FP8, PACKED_FP8_ONE); }
static void fuzz_awq(const uint8_t *data, size_t n)        { fuzz_packed(data, n, PACKED_AWQ, PACKED_AWQ); }
static void fuzz_gptq(const uint8_t *data, size_t n)       { fuzz_packed(data, n, PACKED_GPTQ, PACKED_GPTQ_ORDER); }
static void fuzz_compressed(const uint8_t *data, size_t n) { fuzz_packed(data, n, PACKED_CT, PACKED_CT_ORDER); }

/* The description of the quantisation, beside the weights that the first byte chooses */
static void fuzz_quantization(const uint8_t *data, size_t n) {
    char *text = (char *)malloc(n + 1);
    qwen3_file files[2];
    tiny_text config, weights;
    if (n) memcpy(text, data + 1, n - 1);
    text[n ? n - 1 : 0] = '\0';
    config = packed_config(&packed_least, text);
    weights = packed_weights(&packed_schemes[n ? data[0] % PACKED_SCHEMES : 0], &packed_least, 0);
    files[0].name = "config.json"; files[0].data = config.p; files[0].size = config.n;
    files[1].name = "model.safetensors"; files[1].data = weights.p; files[1].size = weights.n;
    load_files(files, 2, config.n + weights.n, 0);
    free(text);
    free(config.p);
    free(weights.p);
}

/* ---- choosing ------------------------------------------------------------------------------------------------ */
typedef struct target { const char *name; void (*run)(const uint8_t *data, size_t n); } target;
static const target targets[] = {
    {"json", fuzz_json}, {"config", fuzz_config}, {"generation", fuzz_generation}, {"safetensors", fuzz_safetensors},
    {"index", fuzz_index}, {"tokenizer", fuzz_tokenizer}, {"vocab", fuzz_vocab}, {"encode", fuzz_encode},
    {"chat", fuzz_chat}, {"state", fuzz_state}, {"model", fuzz_model}, {"gguf", fuzz_gguf},
    {"schema", fuzz_schema}, {"regex", fuzz_regex}, {"gbnf", fuzz_gbnf}, {"reply", fuzz_reply},
    {"fp8", fuzz_fp8}, {"awq", fuzz_awq}, {"gptq", fuzz_gptq}, {"compressed", fuzz_compressed}, {"quantization", fuzz_quantization}
};

static const target *chosen(void) {
    const char *name = getenv("FUZZ_TARGET");
    size_t i;
    for (i = 0; name && i < sizeof targets / sizeof *targets; i++)
        if (strcmp(name, targets[i].name) == 0) return &targets[i];
    fprintf(stderr, "FUZZ_TARGET is not one of:");
    for (i = 0; i < sizeof targets / sizeof *targets; i++) fprintf(stderr, " %s", targets[i].name);
    fprintf(stderr, "\n");
    exit(2);
}

#ifdef __cplusplus
extern "C"
#endif
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    static const target *t;
    if (!t) t = chosen();
    t->run(data, n);
    return 0;
}

#ifdef FUZZ_MAIN
#include <sys/stat.h>
static void write_seed(const char *dir, const char *name, const char *target_name, const void *p, size_t n) {
    char path[512];
    FILE *f;
    snprintf(path, sizeof path, "%s/%s", dir, target_name);
    mkdir(path, 0755);
    snprintf(path, sizeof path, "%s/%s/%s", dir, target_name, name);
    f = fopen(path, "wb");
    MUST(f && fwrite(p, 1, n, f) == n);
    fclose(f);
}

static void write_seeds(const char *dir) {
    static const char json[] = "{\"a\":[1,-2.5e3,0.125,true,false,null,{}],\"\\u00e9\\ud83d\\ude00\\n\":\"\\\"\\\\/\"}";
    static const char text[] = "\1The e\xCC\x81 \xEA\xB0\x80 don't WON'T 12  \r\n\n x<|im_end|><think> "
        "\xF0\x9F\x98\x80 abab\xFF\xC3";
    static const char chat[] = "0You are\x1E"
        "t{\"type\":\"function\",\"function\":{\"name\":\"f\",\"x\":[1.50,-0.0,1e-9]}}\x1E" "1Hi <|im_end|>\x1E"
        "2<think>\nhm\n</think>\n\nyes\x1E" "c{\"a\":1}\x1E" "342\x1E" "3<tool_response>\x1E"
        "1<tool_response>x</tool_response>\x1E" "f1";
    static const char *const grammars[][3] = {
        {"schema", "object", "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\",\"minimum\":-3,\"maximum\":120},\"b\":{\"enum\":[\"x\",1,null]}},"
         "\"required\":[\"a\"],\"patternProperties\":{\"^c+$\":{\"type\":\"boolean\"}},\"additionalProperties\":false,\"minProperties\":2}"},
        {"schema", "list", "{\"type\":\"array\",\"prefixItems\":[{\"const\":{\"k\":[true]}}],\"items\":{\"$ref\":\"#/$defs/s\"},\"minItems\":2,\"maxItems\":5,"
         "\"$defs\":{\"s\":{\"anyOf\":[{\"type\":\"string\",\"format\":\"date\"},{\"type\":\"number\",\"multipleOf\":3},{\"pattern\":\"^a{2,4}\",\"maxLength\":9}]}}}"},
        {"schema", "logic", "{\"oneOf\":[{\"type\":\"string\",\"not\":{\"enum\":[\"a\"]}},{\"if\":{\"minimum\":3},\"then\":{\"type\":\"integer\"},\"else\":{\"type\":\"null\"}}]}"},
        {"regex", "words", "^(?:[a-z]+ ){1,20}(\\d|\\u00e9|[^x-z\\s])*\\.$"}, {"regex", "choice", "(a|ab)(c|bcd)(d*)?|\\x41{2}"},
        {"gbnf", "list", "root ::= \"[\" ws (root (\",\" ws root)*)? \"]\" ws\nws ::= [ \\t\\n]{0,3} # blanks\n"},
        {"gbnf", "terms", "root ::= t (\"+\" t)* | \"\"\nt ::= [0-9a-f]+ |\n \"(\" root \")\"\n"},
        {"reply", "calls", "<think>\nhm\n</think>\n\nso\n<tool_call>\n{\"name\": \"f\\u00e9\", \"arguments\": {\"a\": [1, \"</tool_call>\"]}}\n</tool_call>\n<tool_call>{}"}
    };
    unsigned char *state, whole[4096] = {0};
    size_t size;
    tiny_model t;
    gg_file gguf;
    tiny_text file;
    int form, i;
    for (form = 0; form < 2; form++) {
        static const char *const of[TINY_FILES] = {
            "config", "generation", "safetensors", "tokenizer", "index", NULL, NULL, "vocab", "vocab", "vocab"
        };
        tiny_make(&t, form, form);
        for (i = 0; i < TINY_FILES; i++) {
            tiny_text f = {NULL, 0};
            char name[8];
            if (!of[i] || !t.file[i].p) continue;
            snprintf(name, sizeof name, "%d", i);
            if (i >= TINY_VOCAB) tiny_printf(&f, "%c", '0' + i - TINY_VOCAB);
            tiny_append(&f, t.file[i].p, t.file[i].n);
            write_seed(dir, name, of[i], f.p, f.n);
            free(f.p);
        }
        tiny_free(&t);
    }
    tiny_make(&t, 0, 0);
    gg_make(&gguf, &t);
    file = gg_write(&gguf);
    write_seed(dir, "tiny", "gguf", file.p, file.n);
    free(file.p);
    gg_free(&gguf);
    gg_make_blocks(&gguf);
    file = gg_write(&gguf);
    write_seed(dir, "blocks", "gguf", file.p, file.n);
    free(file.p);
    gg_free(&gguf);
    tiny_free(&t);
    for (i = 0; i < PACKED_SCHEMES; i++) {
        static const char *const of[] = {"fp8", "fp8", "fp8", "awq", "gptq", "gptq", "gptq", "compressed", "compressed", "compressed"};
        char name[8];
        snprintf(name, sizeof name, "%d", i);
        file.p = NULL;
        file.n = 0;
        tiny_printf(&file, "%c%s", 'A' + (i + PACKED_SCHEMES - 'A' % PACKED_SCHEMES) % PACKED_SCHEMES, packed_schemes[i].config);
        write_seed(dir, name, "quantization", file.p, file.n);
        free(file.p);
        write_seed(dir, name, of[packed_schemes[i].kind], (char[]){(char)i, 0, 1, 0, (char)(9 * i), 4}, 6);
    }
    shared_ctx(&state, &size);
    memcpy(whole + 1, state, size);
    write_seed(dir, "whole", "state", whole, size + 1);
    whole[0] = 1;
    write_seed(dir, "sealed", "state", whole, size + 1);
    write_seed(dir, "changed", "state", "\2\0\60\7\0\100\377", 7);
    write_seed(dir, "json", "json", json, sizeof json - 1);
    for (i = 0; i < (int)(sizeof grammars / sizeof *grammars); i++)
        write_seed(dir, grammars[i][1], grammars[i][0], grammars[i][2], strlen(grammars[i][2]));
    write_seed(dir, "text", "encode", text, sizeof text - 1);
    write_seed(dir, "chat", "chat", chat, sizeof chat - 1);
    write_seed(dir, "plain", "model", "\3\0\1\0\5\0\3\37\144\4\0\0", 12);
    write_seed(dir, "yarn", "model", "\7\1\1\3\37\1\6\37\144\104\20\40", 12);
    write_seed(dir, "mixed", "model", "\40\1\2\7\11\2\355\377\144\4\4\2\1\0\10\1\1\0\200\100", 20);
}

int main(int argc, char **argv) {
    int i;
    if (argc == 3 && strcmp(argv[1], "--seeds") == 0) { write_seeds(argv[2]); return 0; }
    for (i = 1; i < argc; i++) {
        FILE *f = fopen(argv[i], "rb");
        tiny_text t = {NULL, 0};
        char part[4096];
        size_t n;
        if (!f) { fprintf(stderr, "cannot open %s\n", argv[i]); return 2; }
        while ((n = fread(part, 1, sizeof part, f)) > 0) tiny_append(&t, part, n);
        fclose(f);
        LLVMFuzzerTestOneInput((const uint8_t *)(t.p ? t.p : ""), t.n);
        free(t.p);
    }
    return 0;
}
#endif
