/* The public functions: what they promise, what they refuse, and texts end to end. */
#ifndef QWEN3_TESTS_TEST_API_H
#define QWEN3_TESTS_TEST_API_H
#include "fixture.h"
#include "tiny.h"

/* ---- facts ------------------------------------------------------------------------------------------ */
static void test_api_version(void) {
    int r;
    CHECK(qwen3_version() == QWEN3_VERSION);
    for (r = -20; r <= 10; r++) {
        const char *s = qwen3_result_string((qwen3_result)r);
        CHECK(s && s[0]);
    }
    CHECK(strcmp(qwen3_result_string(QWEN3_ERR_MEMORY), qwen3_result_string(QWEN3_ERR_IO)) != 0);
}

static void test_api_other_version(void) {
    static qwen3_load_desc d;
    qwen3_model *m = NULL;
    char err[128];
    CHECK(qwen3_load_for(QWEN3_VERSION + 10, &m, &d, err, sizeof err) == QWEN3_ERR_MISMATCH && !m);
    CHECK(strcmp(err, "the program was compiled for version 1.1, the library is version 1.0") == 0);
    CHECK(qwen3_load_for(QWEN3_VERSION + 100, NULL, NULL, NULL, 0) == QWEN3_ERR_MISMATCH);
    CHECK(qwen3_load_for(QWEN3_VERSION + 1, &m, &d, err, sizeof err) == QWEN3_ERR_ARG);     /* nothing to load */
}

static void test_api_info(void) {
    fixture f;
    qwen3_info i;
    if (!fixture_open(&f, "sharded")) return;
    i = f.info;
    CHECK(i.n_layer == 2 && i.n_embd == 48 && i.n_head == 4 && i.n_head_kv == 1 && i.head_dim == 64 && i.n_ff == 80 && i.n_vocab == 224);
    CHECK(i.max_ctx == 512 && i.n_tokens == 0 && i.im_start == -1 && i.im_end == -1 && i.think_end == -1);
    CHECK(i.sampler.temperature == 0.6f && i.sampler.top_k == 20 && i.sampler.top_p == 0.95f && i.sampler.rng == 0);
    /* embedding, head, final norm; a layer: q and o, k and v, MLP, norms */
    CHECK(i.n_params == 2u * 224 * 48 + 48 + 2u * (2 * 256 * 48 + 2 * 64 * 48 + 3 * 80 * 48 + 2 * 48 + 2 * 64));
    CHECK(i.weight_bytes == 2 * i.n_params);
    CHECK(i.backend_name && strcmp(i.backend_name, "cpu") == 0 && i.device_name && i.device_name[0]);
    fixture_close(&f);
    if (!fixture_open(&f, "chat")) return;
    i = f.info;
    CHECK(i.n_vocab == 344 && i.n_tokens == 336 && i.end_of_text == 310 && i.im_start == 311 && i.im_end == 312);
    CHECK(i.think_begin == 334 && i.think_end == 335 && i.chat_style == QWEN3_STYLE_HYBRID);
    CHECK(token_id(f.model, "<|im_end|>") == 312 && token_id(f.model, "<|no such|>") == -1);
    fixture_close(&f);
}

static void test_api_fingerprints(void) {
    uint64_t seen[N_MODELS];
    int i, k;
    for (i = 0; i < N_MODELS; i++) {
        fixture f;
        if (!fixture_open(&f, model_names[i])) return;
        seen[i] = f.info.fingerprint;
        CHECK(seen[i] != 0);
        for (k = 0; k < i; k++) CHECK(seen[k] != seen[i]);
        fixture_close(&f);
    }
}

/* Saved states must not cross between models that compute differently from the same weights. */
static void test_api_fingerprint_of_config(void) {
    static const char *const edits[][2] = {
        {"\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 1e-05"}, {"\"rope_theta\": 1000000", "\"rope_theta\": 5000000"},
        {"\"factor\": 4.0", "\"factor\": 2.0"}, {"\"original_max_position_embeddings\": 4096", "\"original_max_position_embeddings\": 2048"}
    };
    uint64_t seen[5];
    int i, k;
    for (i = 0; i < 5; i++) {
        model_files files;
        qwen3_model *m;
        if (!model_files_read(&files, "yarn")) return;
        if (i < 4) CHECK(model_files_edit(&files, "config.json", edits[i][0], edits[i][1]));
        m = model_files_load(&files);
        seen[i] = m ? qwen3_get_info(m).fingerprint : 0;
        for (k = 0; k < i; k++) CHECK_MSG(seen[k] != seen[i], "configurations %d and %d have one fingerprint", k, i);
        qwen3_free(m);
        model_files_free(&files);
    }
}

/* ---- loading ---------------------------------------------------------------------------------------- */
typedef struct load_io { model_files files; long calls, fail_at; } load_io;

static const qwen3_file *load_io_find(const load_io *io, const char *name) {
    int i;
    for (i = 0; i < io->files.n; i++) if (strcmp(io->files.file[i].name, name) == 0) return &io->files.file[i];
    return NULL;
}
static int64_t load_io_size(void *user, const char *name) {
    const qwen3_file *f = load_io_find((const load_io *)user, name);
    return f ? (int64_t)f->size : -1;
}
static int load_io_read(void *user, const char *name, uint64_t offset, void *dst, size_t size) {
    load_io *io = (load_io *)user;
    const qwen3_file *f = load_io_find(io, name);
    if (++io->calls == io->fail_at || !f || offset > f->size || size > f->size - offset) return 1;
    memcpy(dst, (const char *)f->data + offset, size);
    return 0;
}

static qwen3_load_desc load_desc_io(load_io *io) {
    qwen3_load_desc d;
    memset(&d, 0, sizeof d);
    d.io.size = load_io_size;
    d.io.read = load_io_read;
    d.io.user = io;
    return d;
}

/* Load with a descriptor and compare the last logits of the first two prompts with the fixture's. */
static void check_same_model(const fixture *f, const qwen3_load_desc *d) {
    char err[512] = "";
    qwen3_model *m = NULL;
    qwen3_result r = qwen3_load(&m, d, err, sizeof err);
    int i, n;
    if (!CHECK_MSG(r == QWEN3_OK, "%s: %s", qwen3_result_string(r), err)) return;
    for (i = 0; i < 2; i++) {
        const qwen3_token *tokens = ref_tokens(&f->ref, i, "tokens", &n);
        float *a, *b;
        if (!tokens) break;
        a = plain_logits(f->model, tokens, n, QWEN3_KV_F16);
        b = plain_logits(m, tokens, n, QWEN3_KV_F16);
        CHECK(same_floats(a, b, n * f->info.n_vocab));
        free(a);
        free(b);
    }
    CHECK(qwen3_get_info(m).fingerprint == f->info.fingerprint && qwen3_get_info(m).n_tokens == f->info.n_tokens);
    qwen3_free(m);
}

/* The files that the header lists, in its order. Without any but config.json, so that the others are asked
   for, but what belongs to one that is not there (merges.txt, chat_template.jinja) */
typedef struct asked_files { model_files files; char names[600]; } asked_files;
static int64_t asked_size(void *user, const char *name) {
    asked_files *asked = (asked_files *)user;
    int i;
    if (!strstr(asked->names, name)) {
        strcat(asked->names, name);
        strcat(asked->names, " ");
    }
    for (i = 0; i < asked->files.n && strcmp(name, "config.json") == 0; i++)
        if (strcmp(asked->files.file[i].name, name) == 0) return (int64_t)asked->files.file[i].size;
    return -1;
}
static int asked_read(void *user, const char *name, uint64_t offset, void *dst, size_t size) {
    load_io io;
    memset(&io, 0, sizeof io);
    io.files = ((asked_files *)user)->files;
    return load_io_read(&io, name, offset, dst, size);
}

static void test_api_load_files_asked(void) {
    asked_files asked;
    qwen3_load_desc d;
    qwen3_model *m;
    char err[256] = "";
    memset(&asked, 0, sizeof asked);
    if (!model_files_read(&asked.files, "chat")) return;
    memset(&d, 0, sizeof d);
    d.io.size = asked_size;
    d.io.read = asked_read;
    d.io.user = &asked;
    CHECK(qwen3_load(&m, &d, err, sizeof err) == QWEN3_ERR_IO && strstr(err, "model.safetensors"));
    CHECK_MSG(strcmp(asked.names, "config.json generation_config.json modules.json 1_Pooling/config.json "
                     "tokenizer_config.json added_tokens.json tokenizer.json vocab.json "
                     "model.safetensors model.safetensors.index.json ") == 0, "%s: %s", asked.names, err);
    model_files_free(&asked.files);
}

static void test_api_load_sources(void) {
    static const char *const models[] = {"sharded", "mixed", "chat"};
    int i;
    for (i = 0; i < 3; i++) {
        fixture f;
        load_io io;
        qwen3_load_desc d;
        char path[1024];
        memset(&io, 0, sizeof io);
        if (!fixture_open(&f, models[i]) || !model_files_read(&io.files, models[i])) return;
        d = load_desc_io(&io);
        check_same_model(&f, &d);
        d.flags = QWEN3_LOAD_CHECK;
        check_same_model(&f, &d);
        CHECK(io.calls > 0);
        memset(&d, 0, sizeof d);
        d.files = io.files.file;
        d.n_files = io.files.n;
        check_same_model(&f, &d);
        memset(&d, 0, sizeof d);
        model_path(path, sizeof path, models[i], "");
        d.path = path;
        d.flags = QWEN3_LOAD_NO_MMAP | QWEN3_LOAD_CHECK;
        check_same_model(&f, &d);
        strcat(path, "/");
        d.flags = 0;
        check_same_model(&f, &d);
        fixture_close(&f);
        model_files_free(&io.files);
    }
}

/* Weights that do not lie aligned to their elements in memory. */
static void test_api_load_unaligned(void) {
    static const char *const models[] = {"odd", "mixed", "plain"};
    int i, k;
    for (i = 0; i < 3; i++) {
        fixture f;
        model_files files;
        qwen3_load_desc d;
        if (!fixture_open(&f, models[i]) || !model_files_read(&files, models[i])) return;
        for (k = 0; k < files.n; k++) {
            unsigned char *moved = (unsigned char *)malloc(files.file[k].size + 1);
            memcpy(moved + 1, files.owned[k], files.file[k].size);
            free(files.owned[k]);
            files.owned[k] = moved;
            files.file[k].data = moved + 1;
        }
        memset(&d, 0, sizeof d);
        d.files = files.file;
        d.n_files = files.n;
        check_same_model(&f, &d);
        fixture_close(&f);
        model_files_free(&files);
    }
}

static void test_api_vocab_only(void) {
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    qwen3_ctx *ctx = NULL;
    qwen3_memory memory;
    char path[1024], err[256] = "";
    memset(&d, 0, sizeof d);
    model_path(path, sizeof path, "chat", "");
    d.path = path;
    d.flags = QWEN3_LOAD_VOCAB_ONLY;
    if (!CHECK(qwen3_load(&m, &d, err, sizeof err) == QWEN3_OK)) return;
    CHECK(qwen3_encode(m, "yes no", 6, 0, NULL, 0, NULL, 0) > 0 && qwen3_get_info(m).n_layer == 2);
    CHECK(qwen3_ctx_create(&ctx, m, NULL, err, sizeof err) < 0 && !ctx && err[0]);
    memory = qwen3_ctx_memory(m, NULL);
    CHECK(memory.host_bytes == 0 && memory.device_bytes == 0);
    qwen3_free(m);
}

static void expect_load_error(const qwen3_load_desc *d, qwen3_result want, const char *word) {
    char err[256] = "";
    qwen3_model *m = (qwen3_model *)&err;
    qwen3_result r = qwen3_load(&m, d, err, sizeof err);
    CHECK_MSG(r == want && m == NULL && strstr(err, word), "%s: '%s', not an error with '%s'", qwen3_result_string(r), err, word);
    if (r == QWEN3_OK) qwen3_free(m);
    m = (qwen3_model *)&err;
    CHECK(qwen3_load(&m, d, NULL, 0) == want && m == NULL);         /* err may be NULL */
    memset(err, 'x', sizeof err);
    qwen3_load(&m, d, err, 4);                                      /* or tiny */
    CHECK(memchr(err, '\0', 4) != NULL && err[4] == 'x');
}

static void *nowhere_alloc(size_t size, void *user) { (void)size; (void)user; return NULL; }

static void test_api_load_rejects(void) {
    qwen3_load_desc d;
    load_io io;
    qwen3_model *m = NULL;
    char path[1024];
    memset(&io, 0, sizeof io);
    if (!model_files_read(&io.files, "plain")) return;
    CHECK(qwen3_load(NULL, NULL, NULL, 0) == QWEN3_ERR_ARG);
    CHECK(qwen3_load(&m, NULL, NULL, 0) == QWEN3_ERR_ARG && m == NULL);
    memset(&d, 0, sizeof d);
    expect_load_error(&d, QWEN3_ERR_ARG, "path");                   /* no source */
    model_path(path, sizeof path, "plain", "");
    d = load_desc_io(&io);
    d.path = path;
    expect_load_error(&d, QWEN3_ERR_ARG, "path");                   /* two */
    d.path = NULL;
    d.io.size = NULL;
    expect_load_error(&d, QWEN3_ERR_ARG, "size");
    memset(&d, 0, sizeof d);
    d.path = path;
    d.flags = 0x4000;
    expect_load_error(&d, QWEN3_ERR_ARG, "flags");
    d.flags = 0;
    d.allocator.alloc = nowhere_alloc;
    expect_load_error(&d, QWEN3_ERR_ARG, "allocator");
    d.allocator.alloc = NULL;
    d.path = "no/such/directory";
    expect_load_error(&d, QWEN3_ERR_IO, "no/such/directory");
    model_path(path, sizeof path, "", "");
    d.path = path;
    expect_load_error(&d, QWEN3_ERR_IO, "config.json");             /* a directory, but not of a model */
    d.path = NULL;
    d.files = io.files.file;
    d.n_files = 1;
    expect_load_error(&d, QWEN3_ERR_IO, "model.safetensors");
    d.n_files = -1;
    expect_load_error(&d, QWEN3_ERR_ARG, "n_files");
    model_files_free(&io.files);
}

/* Changed configurations: refused with the key's name, not run wrongly. */
static void test_api_config_rejects(void) {
    static const struct { const char *from, *to, *word; } edits[] = {
        {"\"rms_norm_eps\": 1e-06,", "", "rms_norm_eps"}, {"\"rope_theta\": 1000000,", "", "rope_theta"},
        {"\"head_dim\": 16,", "", "head_dim"}, {"\"num_key_value_heads\": 2,", "", "num_key_value_heads"},
        {"\"tie_word_embeddings\": true,", "", "tie_word_embeddings"}, {"\"vocab_size\": 256", "\"vocab_size\": 300", "embed_tokens"},
        {"\"attention_bias\": false", "\"attention_bias\": true", "attention_bias"}, {"\"silu\"", "\"gelu\"", "hidden_act"},
        {"\"model_type\": \"qwen3\"", "\"model_type\": \"qwen3_moe\"", "num_experts"}, {"\"head_dim\": 16", "\"head_dim\": 15", "head_dim"},
        {"\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4", "model.layers.3"}, {"\"hidden_size\": 64", "\"hidden_size\": 65", "embed_tokens"},
        {"\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "heads"}, {"\"num_hidden_layers\": 3", "\"num_hidden_layers\": 8000000", "num_hidden_layers"},
        {"\"intermediate_size\": 96", "\"intermediate_size\": -96", "intermediate_size"}, {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2}", "rope"},
        {"\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"yarn\"}", "factor"}, {"\"use_cache\": true", "\"use_cache\": truth", "config.json"},
        {"\"use_sliding_window\": false", "\"use_sliding_window\": true, \"layer_types\": [\"sliding_attention\"]", "sliding"}, {"\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false", "lm_head"}
    };
    size_t i;
    for (i = 0; i < sizeof edits / sizeof *edits; i++) {
        model_files files;
        qwen3_load_desc d;
        char err[256] = "";
        qwen3_model *m = NULL;
        qwen3_result r;
        if (!model_files_read(&files, "plain")) return;
        memset(&d, 0, sizeof d);
        if (CHECK_MSG(model_files_edit(&files, "config.json", edits[i].from, edits[i].to), "edit %s", edits[i].from)) {
            d.files = files.file;
            d.n_files = files.n;
            r = qwen3_load(&m, &d, err, sizeof err);
            CHECK_MSG((r == QWEN3_ERR_FORMAT || r == QWEN3_ERR_UNSUPPORTED) && !m && strstr(err, edits[i].word),
                      "%s -> %s: %s: '%s'", edits[i].from, edits[i].to, qwen3_result_string(r), err);
            qwen3_free(m);
        }
        model_files_free(&files);
    }
}

static void test_api_load_check(void) {
    model_files files;
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    char err[256] = "";
    if (!model_files_read(&files, "plain")) return;
    memset(&d, 0, sizeof d);
    d.files = files.file;
    d.n_files = files.n;
    memset(files.owned[files.n - 1] + files.file[files.n - 1].size - 2, 0xFF, 2);       /* a NaN in the last tensor */
    CHECK(qwen3_load(&m, &d, err, sizeof err) == QWEN3_OK);
    qwen3_free(m);
    d.flags = QWEN3_LOAD_CHECK;
    CHECK(qwen3_load(&m, &d, err, sizeof err) == QWEN3_ERR_FORMAT && !m && strstr(err, "NaN"));
    model_files_free(&files);
}

/* ---- contexts and evaluation -------------------------------------------------------------------------- */
static void test_api_ctx_rejects(void) {
    fixture f;
    int i;
    if (!fixture_open(&f, "plain")) return;
    for (i = 0; i < 10; i++) {
        qwen3_ctx_desc d = ctx_desc(32, 2, 0, QWEN3_KV_F16);
        qwen3_ctx *ctx = (qwen3_ctx *)&d;
        char err[256] = "";
        qwen3_memory memory;
        if (i == 0) d.max_ctx = -1;
        if (i == 1) d.max_ctx = 513;                    /* the model has 512 positions */
        if (i == 2) d.max_seqs = -1;
        if (i == 3) d.prefill_chunk = -1;
        if (i == 4) d.kv_type = 9;
        if (i == 5) d.kv_type = 5;
        if (i == 6) d.threads = -2;
        if (i == 7) d.yarn_factor = -1;
        if (i == 8) d.allocator.alloc = nowhere_alloc;
        if (i == 9) d.kv_type = -1;
        CHECK_MSG(qwen3_ctx_create(&ctx, f.model, &d, err, sizeof err) == QWEN3_ERR_ARG && !ctx && err[0], "descriptor %d", i);
        memory = qwen3_ctx_memory(f.model, &d);
        CHECK_MSG(memory.host_bytes == 0 && memory.device_bytes == 0, "descriptor %d", i);
    }
    {
        qwen3_ctx *ctx = NULL;
        CHECK(qwen3_ctx_create(NULL, f.model, NULL, NULL, 0) == QWEN3_ERR_ARG);
        CHECK(qwen3_ctx_create(&ctx, NULL, NULL, NULL, 0) == QWEN3_ERR_ARG);
        CHECK(qwen3_ctx_create(&ctx, f.model, NULL, NULL, 0) == QWEN3_OK && ctx);       /* all defaults */
        CHECK(qwen3_ctx_error(ctx)[0] == '\0');
        qwen3_ctx_free(ctx);
        qwen3_ctx_free(NULL);
        qwen3_free(NULL);
    }
    fixture_close(&f);
}

/* ---- messages ---------------------------------------------------------------------------------------- */
static void message_is(size_t cap, const char *want, const char *format, const char *text, size_t n) {
    char room[64];
    qwen3i_err err;
    memset(room, 'x', sizeof room);
    err.text = room;
    err.cap = cap;
    qwen3i_fail(&err, QWEN3_ERR_FORMAT, format, (int)n, text);
    CHECK_MSG(strcmp(room, want) == 0 && (cap == sizeof room || room[cap] == 'x'), "'%s', not '%s'", room, want);
}

/* Whatever a file holds, a message is whole characters that a terminal shows. */
static void test_api_messages(void) {
    static const struct { const char *text, *want; } cases[] = {
        {"caf\xC3\xA9 \xE6\x97\xA5 \xF0\x9F\x98\x80", "caf\xC3\xA9 \xE6\x97\xA5 \xF0\x9F\x98\x80"}, {"a\x1B[2Jb\n\t\x7F", "a?[2Jb???"},
        {"\xC2\x9B" "31m", "?31m"}, {"a\xFF\xFE" "b\x80", "a??b?"}, {"\xED\xA0\x80", "???"}, {"\xC0\xAF", "??"},
        {"\xF0\x9F\x98 x", "??? x"}, {"\xEF\xBF\xBD", "\xEF\xBF\xBD"}, {"exe.\xE2\x80\xAE" "txt", "exe.?txt"},
        {"\xE2\x81\xA6\xE2\x81\xA9\xE2\x80\xA8\xD8\x9C\xE2\x80\x8F", "?????"}, {"\xC3", "?"}
    };
    uint64_t seed = 12;
    size_t i, k;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) message_is(64, cases[i].want, "%.*s", cases[i].text, strlen(cases[i].text));
    message_is(3, "a", "%.*s", "a\xC3\xA9", 3);                        /* cut within a character */
    message_is(4, "a\xC3\xA9", "%.*s", "a\xC3\xA9z", 4);
    message_is(5, "ab", "%.*s", "ab\xF0\x9F\x98\x80", 6);
    CHECK(qwen3i_shown("a\xC3\xA9z", 4, 2) == 1 && qwen3i_shown("a\xC3\xA9z", 4, 3) == 3 && qwen3i_shown("ab", 2, 60) == 2);
    for (i = 0; i < 20000; i++) {       /* any bytes */
        char text[33], room[24];
        qwen3i_err err;
        for (k = 0; k < 32; k++) text[k] = (char)(test_random(&seed) % 8 ? test_random(&seed) | 0x80u : test_random(&seed));
        text[32] = '\0';
        err.text = room;
        err.cap = 1 + test_random(&seed) % sizeof room;
        qwen3i_fail(&err, QWEN3_ERR_FORMAT, "%s", text);
        for (k = 0; room[k];) {
            uint32_t c;
            int n = qwen3i_utf8_get(room + k, room + strlen(room), &c);
            if (!CHECK(!qwen3i_is_control(c) && (c != QWEN3I_REPLACEMENT || n == 3))) return;
            k += (size_t)n;
        }
    }
}

/* ---- sizes, beside exact arithmetic ----------------------------------------------------------------- */
typedef struct big { uint32_t digit[8]; } big;  /* a number of 256 bits, lowest digit first */

/* sum += a * b * c, rounded up to 64 */
static void big_add_product(big *sum, uint64_t a, uint64_t b, uint64_t c) {
    const uint32_t factor[6] = {(uint32_t)a, (uint32_t)(a >> 32), (uint32_t)b, (uint32_t)(b >> 32), (uint32_t)c, (uint32_t)(c >> 32)};
    big p = {{1}}, q;
    uint64_t carry;
    int f, half, i;
    for (f = 0; f < 6; f += 2) {
        memset(&q, 0, sizeof q);
        for (half = 0; half < 2; half++)
            for (carry = 0, i = 0; i + half < 8; i++) {
                carry += (uint64_t)p.digit[i] * factor[f + half] + q.digit[i + half];
                q.digit[i + half] = (uint32_t)carry;
                carry >>= 32;
            }
        p = q;
    }
    for (carry = 63, i = 0; i < 8; i++) {
        carry += p.digit[i];
        p.digit[i] = (uint32_t)carry;
        carry >>= 32;
    }
    p.digit[0] &= ~(uint32_t)63;
    for (carry = 0, i = 0; i < 8; i++) {
        carry += (uint64_t)sum->digit[i] + p.digit[i];
        sum->digit[i] = (uint32_t)carry;
        carry >>= 32;
    }
}

static uint64_t big_value(const big *b) {
    int i;
    for (i = 2; i < 8; i++) if (b->digit[i]) return UINT64_MAX;
    return (uint64_t)b->digit[1] << 32 | b->digit[0];
}

/* The arrays of a context, as the comments at qwen3i_cpu and qwen3_ctx say, and the two structs. */
static uint64_t exact_context_bytes(const qwen3i_config *g, const qwen3_ctx_desc *d) {
    const uint64_t seqs = (uint64_t)d->max_seqs, rows = (uint64_t)qwen3i_max(d->prefill_chunk, d->max_seqs), ctx = (uint64_t)d->max_ctx;
    const uint64_t q_dim = (uint64_t)g->n_head * (uint64_t)g->head_dim, kv_dim = (uint64_t)g->n_head_kv * (uint64_t)g->head_dim;
    const uint64_t half = (uint64_t)g->head_dim / 2, vocab = (uint64_t)g->n_vocab, scores = (ctx + 15) / 16 * 16 + 16;
    big sum = {{0}};
    int i;
    for (i = 0; i < 2; i++) {
        big_add_product(&sum, (uint64_t)g->n_layer * seqs, ctx, d->kv_type == QWEN3_KV_Q8_0 ? kv_dim / 32 * 34 : kv_dim * (d->kv_type == QWEN3_KV_F32 ? 4 : 2));
        big_add_product(&sum, rows, (uint64_t)g->n_embd, 4);            /* x, h */
        big_add_product(&sum, rows, q_dim, 4);                          /* q, a */
        big_add_product(&sum, rows, kv_dim, 4);                         /* key, value */
        big_add_product(&sum, rows, half, 4);                           /* cosines, sines */
        big_add_product(&sum, 64, 1, 1);                                /* for two blocks to start at 64 */
    }
    big_add_product(&sum, seqs, vocab, 4);
    big_add_product(&sum, rows, (uint64_t)g->n_ff, 4);
    big_add_product(&sum, half, 1, 4);
    big_add_product(&sum, rows < 16 ? rows : 16, vocab, 4);
    big_add_product(&sum, (uint64_t)qwen3i_pool_lanes(d), 24 * (scores + 2 * (uint64_t)g->head_dim) + 64 * (uint64_t)g->head_dim, 4);
    big_add_product(&sum, (uint64_t)qwen3i_pool_lanes(d), 64 * (1024 + 16), 4);        /* panels */
    const uint64_t most = q_dim > (uint64_t)g->n_ff ? q_dim : (uint64_t)g->n_ff;
    big_add_product(&sum, rows, ((most > (uint64_t)g->n_embd ? most : (uint64_t)g->n_embd) + 15) / 16, 48);  /* rows of x as whole numbers */
    big_add_product(&sum, seqs, 1, sizeof(qwen3i_seq));
    big_add_product(&sum, seqs, ctx, sizeof(qwen3_token));
    big_add_product(&sum, ctx, 1, sizeof(qwen3_token));
    for (i = 0; i < 3; i++) big_add_product(&sum, rows, 1, 4);          /* tokens, sequences, positions */
    big_add_product(&sum, rows, 1, sizeof(qwen3i_out));
    big_add_product(&sum, seqs, 1, sizeof(qwen3i_next));
    big_add_product(&sum, seqs, 1, sizeof(qwen3_item));
    big_add_product(&sum, seqs, 1, 8);
    big_add_product(&sum, vocab, 1, 4);
    big_add_product(&sum, vocab, 1, sizeof(qwen3i_candidate));
    return big_value(&sum);
}

/* A number from 1 to most; small and large ones are equally likely. */
static int random_size(uint64_t *seed, int most) {
    const int bits = (int)(test_random(seed) % 32);
    return 1 + (int)(test_random(seed) % ((uint64_t)1 << bits)) % most;
}

/* qwen3_ctx_memory is exact whatever the sizes are, on hosts of 32 bits, too. What cannot be allocated is refused. */
static void test_api_sizes(void) {
    qwen3_model m;
    qwen3i_layer layer;
    uint64_t seed = 11;
    int i, refused = 0, saturated = 0;
    memset(&m, 0, sizeof m);
    memset(&layer, 0, sizeof layer);
    m.backend = qwen3i_cpu_backend();
    m.weights.layers = &layer;
    for (i = 0; i < 10000; i++) {
        qwen3i_config *g = &m.config;
        qwen3_ctx_desc d, full;
        qwen3_memory said;
        uint64_t want, core;
        memset(&d, 0, sizeof d);
        g->n_layer = random_size(&seed, 1 << 24); g->n_embd = random_size(&seed, 1 << 24); g->n_ff = random_size(&seed, 1 << 24);
        g->n_vocab = random_size(&seed, 1 << 24); g->head_dim = 2 * random_size(&seed, 1 << 10);
        g->n_head = random_size(&seed, (1 << 24) / g->head_dim); g->n_head_kv = random_size(&seed, g->n_head);
        g->max_ctx = random_size(&seed, 1 << 24); g->yarn_original_ctx = g->max_ctx;
        d.yarn_factor = (float)random_size(&seed, 1024);
        d.max_ctx = random_size(&seed, INT_MAX - 1); d.max_seqs = random_size(&seed, 4096);
        d.prefill_chunk = random_size(&seed, 65536); d.threads = random_size(&seed, 64);
        d.kv_type = QWEN3_KV_F32 + (int)(test_random(&seed) % 4);
        said = qwen3_ctx_memory(&m, &d);
        if (qwen3i_resolve_ctx(&m, &d, &full, NULL) != QWEN3_OK) {
            CHECK(said.host_bytes == 0);
            refused++;
            continue;
        }
        want = exact_context_bytes(g, &full);
        if (want < UINT64_MAX - sizeof(qwen3_ctx) - sizeof(qwen3i_cpu)) want += sizeof(qwen3_ctx) + sizeof(qwen3i_cpu);
        else { want = UINT64_MAX; saturated++; }
        CHECK_MSG(said.host_bytes == want, "case %d: %llu bytes, exactly %llu", i, (unsigned long long)said.host_bytes,
                  (unsigned long long)want);
        core = qwen3i_ctx_bytes(&m, &full);     /* which is allocated first, and filled by the tests' heap */
        if (want > (size_t)-1 / 2 && (core < 1 << 20 || core > (size_t)-1 / 2)) {
            qwen3_ctx *ctx = (qwen3_ctx *)&m;
            CHECK(qwen3_ctx_create(&ctx, &m, &d, NULL, 0) == QWEN3_ERR_MEMORY && !ctx);
        }
    }
    CHECK_MSG(refused < 8000 && saturated > 20, "%d refused, %d beyond 64 bits", refused, saturated);
}

/* What qwen3_ctx_memory says is what a context takes, and it takes nothing later. */
static void test_api_memory(void) {
    fixture f;
    test_heap heap;
    qwen3_ctx_desc d = ctx_desc(64, 3, 16, QWEN3_KV_BF16);
    qwen3_ctx *ctx;
    qwen3_memory said;
    qwen3_token t = 3;
    long calls;
    int i;
    memset(&heap, 0, sizeof heap);
    if (!fixture_open(&f, "plain")) return;
    said = qwen3_ctx_memory(f.model, &d);
    d.allocator.alloc = heap_alloc;
    d.allocator.free = heap_free;
    d.allocator.user = &heap;
    ctx = ctx_open_desc(f.model, &d);
    if (ctx) {
        CHECK_MSG(heap.live > 0 && (uint64_t)heap.bytes <= said.host_bytes && said.host_bytes < (uint64_t)heap.bytes + (1 << 16),
                  "%ld bytes were taken, %llu announced", heap.bytes, (unsigned long long)said.host_bytes);
        CHECK(said.device_bytes == 0);
        calls = heap.calls;
        CHECK_OK(ctx, eval(ctx, 0, &t, 1, NULL));
        for (i = 0; i < 40; i++) {
            qwen3_sampler s = qwen3_sampler_preset(QWEN3_THINKING, (uint64_t)i);
            qwen3_result r = qwen3_next(ctx, 0, &s, &t);
            CHECK(r == QWEN3_OK || r == QWEN3_END);
        }
        CHECK(qwen3_logits(ctx, 0) != NULL);
        CHECK_MSG(heap.calls == calls, "evaluating allocated memory");
    }
    qwen3_ctx_free(ctx);
    CHECK(heap.live == 0 && heap.bytes == 0 && heap.bad == 0);
    fixture_close(&f);
}

/* Every call with wrong arguments: ERR_ARG, a message, and nothing changed. */
#define REJECTED(call) do { \
        CHECK_MSG((call) == QWEN3_ERR_ARG, "%s", #call); \
        CHECK_MSG(qwen3_ctx_error(ctx)[0], "no message: %s", #call); \
        CHECK_MSG(seq_len(ctx, 0) == 5 && seq_len(ctx, 1) == 0, "%s", #call); \
        CHECK_MSG(same_logits(ctx, 0, before, vocab), "%s", #call); \
    } while (0)

static void test_api_rejects(void) {
    fixture f;
    qwen3_ctx *ctx;
    qwen3_token tokens[8] = {1, 2, 3, 4, 5, 6, 7, 8}, bad[3] = {1, -1, 2}, high[2] = {1, 256}, out[4];
    qwen3_item items[3];
    qwen3_prob probs[4];
    qwen3_result results[4];
    float *before, vector[64], score;
    char state[64];
    int vocab, seqs[3] = {0, 0, 5}, i;
    if (!fixture_open(&f, "plain")) return;
    vocab = f.info.n_vocab;
    ctx = ctx_open(f.model, 16, 2, 0, QWEN3_KV_F16);
    before = floats((size_t)vocab);
    if (ctx) {
        CHECK_OK(ctx, eval(ctx, 0, tokens, 5, NULL));
        memcpy(before, qwen3_logits(ctx, 0), (size_t)vocab * sizeof *before);
        for (i = -1; i < 9; i += 3) {                   /* -1, 2, 5, 8: no such sequences */
            items[0] = item_of(i, tokens, 1);
            REJECTED(qwen3_eval(ctx, items, 1));
            REJECTED(qwen3_sync(ctx, i, tokens, 2, 0));
            REJECTED(qwen3_seq_truncate(ctx, i, 0));
            REJECTED(qwen3_seq_copy(ctx, i, 0));
            REJECTED(qwen3_seq_copy(ctx, 0, i));
            REJECTED(qwen3_sample(ctx, i, NULL, out));
            REJECTED((qwen3_result)qwen3_top_probs(ctx, i, probs, 2));
            REJECTED(qwen3_next(ctx, i, NULL, out));
            REJECTED(qwen3_generate(ctx, i, NULL));
            REJECTED(state_save(ctx, i, state, sizeof state, NULL));
            REJECTED(state_load(ctx, i, state, sizeof state));
            CHECK(qwen3_logits(ctx, i) == NULL && seq_len(ctx, i) == -1 && qwen3_seq_tokens(ctx, i, NULL) == NULL && state_size(ctx, i) == 0);
        }
        items[0] = item_of(0, NULL, 1);       REJECTED(qwen3_eval(ctx, items, 1));
        items[0] = item_of(0, tokens, -1);    REJECTED(qwen3_eval(ctx, items, 1));
        items[0] = item_of(0, bad, 3);        REJECTED(qwen3_eval(ctx, items, 1));
        items[0] = item_of(0, high, 2);       REJECTED(qwen3_eval(ctx, items, 1));
        items[0] = item_of(0, tokens, 1);
        items[1] = item_of(0, tokens, 1);     REJECTED(qwen3_eval(ctx, items, 2));      /* a sequence twice */
        items[1] = item_of(1, high, 2);       REJECTED(qwen3_eval(ctx, items, 2));      /* the second is wrong */
        REJECTED(qwen3_eval(ctx, NULL, 1));
        REJECTED(qwen3_eval(ctx, items, -1));
        REJECTED(qwen3_sync(ctx, 0, bad, 3, 0));
        REJECTED(qwen3_sync(ctx, 0, NULL, 3, 0));
        REJECTED(qwen3_sync(ctx, 0, tokens, -1, 0));
        REJECTED(qwen3_seq_truncate(ctx, 0, -1));
        REJECTED(qwen3_seq_truncate(ctx, 0, 6));
        REJECTED(qwen3_sample(ctx, 0, NULL, NULL));
        REJECTED(qwen3_sample(ctx, 1, NULL, out));      /* empty: nothing to follow */
        REJECTED(qwen3_next(ctx, 1, NULL, out));
        REJECTED((qwen3_result)qwen3_top_probs(ctx, 0, NULL, 2));
        REJECTED((qwen3_result)qwen3_top_probs(ctx, 0, probs, -1));
        REJECTED((qwen3_result)qwen3_top_probs(ctx, 1, probs, 1));
        REJECTED(qwen3_next_batch(ctx, NULL, 1, NULL, out, NULL));
        REJECTED(qwen3_next_batch(ctx, seqs, 2, NULL, out, results));                   /* a sequence twice */
        REJECTED(qwen3_next_batch(ctx, seqs + 2, 1, NULL, out, results));
        REJECTED(qwen3_next_batch(ctx, seqs, -1, NULL, out, results));
        REJECTED(qwen3_next_batch(ctx, seqs, 1, NULL, NULL, results));
        REJECTED(qwen3_seq_save(ctx, 0, NULL));
        REJECTED(qwen3_seq_load(ctx, 0, NULL));
        REJECTED(state_save(ctx, 0, state, 10, NULL));                              /* too small */
        REJECTED(state_load(ctx, 0, NULL, 100));
        REJECTED(qwen3_embed(ctx, 1, NULL, NULL, vector));
        REJECTED(qwen3_embed(ctx, 1, NULL, "a", NULL));
        REJECTED(qwen3_rerank(ctx, 1, NULL, "a", NULL, &score));
        REJECTED(qwen3_rerank(ctx, 1, NULL, "a", "b", NULL));
        REJECTED(qwen3_chat(ctx, 1, NULL, NULL));
        CHECK(qwen3_logits(ctx, 1) == NULL);
        CHECK_OK(ctx, qwen3_eval(ctx, NULL, 0));        /* nothing to do is no error */
        CHECK_OK(ctx, eval(ctx, 0, NULL, 0, NULL));
        CHECK(same_logits(ctx, 0, before, vocab) && qwen3_top_probs(ctx, 0, NULL, 0) == 0);
    }
    free(before);
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

/* No context at all: an answer, not a crash. */
static void test_api_null(void) {
    qwen3_token t = 0;
    qwen3_item it = item_of(0, &t, 1);
    qwen3_gen_desc gen;
    qwen3_chat_desc chat;
    qwen3_prob p;
    float x;
    memset(&gen, 0, sizeof gen);
    memset(&chat, 0, sizeof chat);
    CHECK(qwen3_eval(NULL, &it, 1) == QWEN3_ERR_ARG && qwen3_sync(NULL, 0, &t, 1, 0) == QWEN3_ERR_ARG);
    CHECK(qwen3_logits(NULL, 0) == NULL && seq_len(NULL, 0) == -1 && qwen3_seq_tokens(NULL, 0, NULL) == NULL);
    CHECK(qwen3_seq_truncate(NULL, 0, 0) == QWEN3_ERR_ARG && qwen3_seq_copy(NULL, 0, 0) == QWEN3_ERR_ARG);
    CHECK(state_size(NULL, 0) == 0 && state_save(NULL, 0, &t, 4, NULL) == QWEN3_ERR_ARG && state_load(NULL, 0, &t, 4) == QWEN3_ERR_ARG);
    CHECK(qwen3_sample(NULL, 0, NULL, &t) == QWEN3_ERR_ARG && qwen3_top_probs(NULL, 0, &p, 1) == QWEN3_ERR_ARG);
    CHECK(qwen3_next(NULL, 0, NULL, &t) == QWEN3_ERR_ARG && qwen3_next_batch(NULL, &t, 1, NULL, &t, NULL) == QWEN3_ERR_ARG);
    CHECK(qwen3_generate(NULL, 0, &gen) == QWEN3_ERR_ARG && qwen3_chat(NULL, 0, &chat, &gen) == QWEN3_ERR_ARG);
    CHECK(qwen3_embed(NULL, 0, NULL, "a", &x) == QWEN3_ERR_ARG && qwen3_rerank(NULL, 0, NULL, "a", "b", &x) == QWEN3_ERR_ARG);
    CHECK(qwen3_ctx_error(NULL) != NULL && qwen3_ctx_stats(NULL).n_prefill == 0);
    CHECK(qwen3_encode(NULL, "a", 1, 0, &t, 1, NULL, 0) < 0 && qwen3_token_bytes(NULL, 0, NULL) == NULL && token_id(NULL, "a") == -1);
    CHECK(qwen3_chat_render(NULL, &chat, &t, 1, NULL, 0) < 0 && qwen3_ctx_memory(NULL, NULL).host_bytes == 0);
}

/* Calls that need a tokenizer, on a model without one. */
static void test_api_no_tokenizer(void) {
    fixture f;
    qwen3_ctx *ctx;
    qwen3_chat_desc chat;
    qwen3_gen_desc gen;
    qwen3_msg msg;
    float vector[64], score;
    int n = 7;
    memset(&chat, 0, sizeof chat);
    memset(&gen, 0, sizeof gen);
    memset(&msg, 0, sizeof msg);
    msg.role = QWEN3_USER;
    msg.text = "hello";
    chat.msgs = &msg;
    chat.n_msgs = 1;
    if (!fixture_open(&f, "plain")) return;
    ctx = ctx_open(f.model, 16, 1, 0, 0);
    CHECK(qwen3_encode(f.model, "a", 1, 0, NULL, 0, NULL, 0) == QWEN3_ERR_UNSUPPORTED);
    CHECK(qwen3_chat_render(f.model, &chat, NULL, 0, NULL, 0) == QWEN3_ERR_UNSUPPORTED);
    CHECK(qwen3_token_bytes(f.model, 3, &n) == NULL && n == 0 && token_id(f.model, "<think>") == -1);
    if (ctx) {
        CHECK(qwen3_chat(ctx, 0, &chat, &gen) == QWEN3_ERR_UNSUPPORTED && qwen3_ctx_error(ctx)[0]);
        gen.stop = &msg.text;
        gen.n_stop = 1;
        CHECK(qwen3_generate(ctx, 0, &gen) == QWEN3_ERR_UNSUPPORTED && strstr(qwen3_ctx_error(ctx), "no text"));
        CHECK(qwen3_embed(ctx, 0, NULL, "a", vector) == QWEN3_ERR_UNSUPPORTED);
        CHECK(qwen3_rerank(ctx, 0, NULL, "a", "b", &score) == QWEN3_ERR_UNSUPPORTED);
    }
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

/* A vocabulary of bytes: "yes" is three tokens. The template, in a file of its own, shows how the model thinks. */
static void test_api_tiny_model(void) {
    static const char jinja[] = "{{- '<|im_start|>assistant\\n<think>\\n' }}";
    tiny_model t;
    qwen3_file files[TINY_FILES + 1];
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    qwen3_ctx *ctx;
    const char *max_ctx = strstr(tiny_config, ":32,");
    float score = 7;
    tiny_make(&t, 0, 1);
    tiny_remove(&t, TINY_CONFIG);
    tiny_printf(&t.file[TINY_CONFIG], "%.*s:1024%s", (int)(max_ctx - tiny_config), tiny_config, max_ctx + 3);
    memset(&d, 0, sizeof d);
    d.n_files = tiny_list(&t, files);
    d.files = files;
    CHECK(qwen3_load(&m, &d, NULL, 0) == QWEN3_OK && qwen3_get_info(m).chat_style == QWEN3_STYLE_HYBRID);
    qwen3_free(m);
    files[d.n_files].name = "chat_template.jinja";
    files[d.n_files].data = jinja;
    files[d.n_files++].size = sizeof jinja - 1;
    CHECK(qwen3_load(&m, &d, NULL, 0) == QWEN3_OK && qwen3_get_info(m).chat_style == QWEN3_STYLE_THINKING);
    ctx = ctx_open(m, 1024, 1, 0, QWEN3_KV_F32);
    CHECK(qwen3_rerank(ctx, 0, NULL, "a", "b", &score) == QWEN3_ERR_UNSUPPORTED && score == 7);
    CHECK_MSG(strstr(qwen3_ctx_error(ctx), "yes") != NULL, "%s", qwen3_ctx_error(ctx));
    qwen3_ctx_free(ctx);
    qwen3_free(m);
    tiny_free(&t);
}

static void test_api_context_full(void) {
    fixture f;
    qwen3_ctx *ctx;
    qwen3_token tokens[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, t = -5;
    qwen3_item items[2];
    float *before;
    if (!fixture_open(&f, "plain")) return;
    ctx = ctx_open(f.model, 8, 2, 3, QWEN3_KV_F32);
    before = floats((size_t)f.info.n_vocab);
    if (ctx) {
        CHECK(eval(ctx, 0, tokens, 9, NULL) == QWEN3_ERR_CONTEXT_FULL && seq_len(ctx, 0) == 0 && qwen3_ctx_error(ctx)[0]);
        CHECK(qwen3_sync(ctx, 0, tokens, 9, 0) == QWEN3_ERR_CONTEXT_FULL && seq_len(ctx, 0) == 0);
        CHECK_OK(ctx, eval(ctx, 0, tokens, 8, NULL));
        memcpy(before, qwen3_logits(ctx, 0), (size_t)f.info.n_vocab * sizeof *before);
        CHECK(eval(ctx, 0, tokens, 1, NULL) == QWEN3_ERR_CONTEXT_FULL);
        items[0] = item_of(1, tokens, 2);
        items[1] = item_of(0, tokens, 1);
        CHECK(qwen3_eval(ctx, items, 2) == QWEN3_ERR_CONTEXT_FULL && seq_len(ctx, 1) == 0);
        CHECK(qwen3_next(ctx, 0, NULL, &t) == QWEN3_ERR_CONTEXT_FULL && qwen3_ctx_error(ctx)[0]);
        CHECK(qwen3_sample(ctx, 0, NULL, &t) == QWEN3_OK && t >= 0);   /* choosing needs no room */
        CHECK(seq_len(ctx, 0) == 8 && same_logits(ctx, 0, before, f.info.n_vocab));
        CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, 7));
        CHECK_OK(ctx, eval(ctx, 0, tokens + 7, 1, NULL));
        CHECK(same_logits(ctx, 0, before, f.info.n_vocab));
    }
    free(before);
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

static double log_sum_exp(const float *row, int n) {
    double top = row[0], sum = 0;
    int i;
    for (i = 1; i < n; i++) if (row[i] > top) top = row[i];
    for (i = 0; i < n; i++) sum += exp(row[i] - top);
    return top + log(sum);
}

static int near_log(double a, double b) { return fabs(a - b) <= 2e-6 * (1 + fabs(b)); }

/* logprobs, hidden and all_hidden of an item, in chunks, on an empty sequence and on one that holds something. */
static void test_api_item_outputs(void) {
    static const int chunks[] = {0, 1, 7}, starts[] = {0, 1, 13};
    fixture f;
    const qwen3_token *tokens;
    int a, b, i, n, vocab, embd;
    float *logits, *states;
    if (!fixture_open(&f, "plain")) return;
    vocab = f.info.n_vocab;
    embd = f.info.n_embd;
    tokens = ref_tokens(&f.ref, 2, "tokens", &n);
    logits = floats((size_t)n * (size_t)vocab);
    states = floats((size_t)n * (size_t)embd);
    for (a = 0; tokens && a < 3; a++) for (b = 0; b < 3; b++) {
        qwen3_ctx *ctx = ctx_open(f.model, n, 1, chunks[a], QWEN3_KV_F32);
        qwen3_item it = item_of(0, tokens, n);
        int s = starts[b];
        float *got = floats((size_t)n), *hidden = floats((size_t)embd);
        if (!ctx) break;
        it.all_logits = logits;
        it.all_hidden = states;
        it.hidden = hidden;
        CHECK_OK(ctx, qwen3_eval(ctx, &it, 1));
        CHECK(same_floats(hidden, states + (size_t)(n - 1) * (size_t)embd, embd));
        CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, s));
        it = item_of(0, tokens + s, n - s);
        it.logprobs = got;
        it.hidden = hidden;
        memset(hidden, 0, (size_t)embd * sizeof *hidden);
        CHECK_OK(ctx, qwen3_eval(ctx, &it, 1));
        CHECK(same_floats(hidden, states + (size_t)(n - 1) * (size_t)embd, embd));
        for (i = s; i < n; i++) {
            const float *row = i > 0 ? logits + (size_t)(i - 1) * (size_t)vocab : NULL;
            double want = row ? row[tokens[i]] - log_sum_exp(row, vocab) : 0;
            CHECK_MSG(near_log(got[i - s], want), "ln P of token %d is %.7f, not %.7f", i, (double)got[i - s], want);
        }
        free(got);
        free(hidden);
        qwen3_ctx_free(ctx);
    }
    free(logits);
    free(states);
    fixture_close(&f);
}

static void test_api_top_probs(void) {
    fixture f;
    qwen3_ctx *ctx;
    const qwen3_token *tokens;
    qwen3_prob *top;
    int i, k, n, vocab;
    if (!fixture_open(&f, "odd")) return;
    vocab = f.info.n_vocab;
    tokens = ref_tokens(&f.ref, 2, "tokens", &n);
    ctx = ctx_open(f.model, n, 1, 0, QWEN3_KV_F32);
    top = (qwen3_prob *)malloc((size_t)(vocab + 10) * sizeof *top);
    if (ctx && tokens && top) {
        double sum = 0, lse;
        const float *logits;
        CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens, n, 0));
        CHECK(qwen3_top_probs(ctx, 0, top, vocab + 10) == vocab);
        logits = qwen3_logits(ctx, 0);
        lse = log_sum_exp(logits, vocab);
        for (i = 0; i < vocab; i++) {
            CHECK(near_log(top[i].logprob, logits[top[i].token] - lse));
            CHECK(i == 0 || logits[top[i].token] < logits[top[i - 1].token] || (logits[top[i].token] == logits[top[i - 1].token] && top[i].token > top[i - 1].token));
            sum += exp(top[i].logprob);
        }
        CHECK(fabs(sum - 1) < 1e-5);
        for (k = 1; k < 20; k++) {
            qwen3_prob some[20];
            CHECK(qwen3_top_probs(ctx, 0, some, k) == k);
            for (i = 0; i < k; i++) CHECK(some[i].token == top[i].token && some[i].logprob == top[i].logprob);
        }
    }
    free(top);
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

static void test_api_stats(void) {
    fixture f;
    qwen3_ctx *ctx;
    qwen3_token tokens[10] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, t;
    qwen3_stats s;
    int i;
    if (!fixture_open(&f, "plain")) return;
    ctx = ctx_open(f.model, 32, 1, 4, QWEN3_KV_F16);
    if (ctx) {
        CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens, 10, 0));
        for (i = 0; i < 3; i++) CHECK_OK(ctx, eval(ctx, 0, tokens + i, 1, NULL));
        CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens, 10, 0));
        s = qwen3_ctx_stats(ctx);
        CHECK(s.n_prefill == 10 && s.n_decode >= 3 && s.n_reused == 10 && s.prefill_ms >= 0 && s.decode_ms >= 0);
        CHECK_OK(ctx, qwen3_sample(ctx, 0, NULL, &t));
    }
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

/* ---- decoding ------------------------------------------------------------------------------------------ */
/* qwen3_next is qwen3_sample, then qwen3_eval. */
static void test_api_next(void) {
    fixture f;
    qwen3_ctx *a, *b;
    qwen3_sampler s = qwen3_sampler_preset(QWEN3_THINKING, 99), r = s;
    const qwen3_token *tokens;
    qwen3_token x = -1, y = -2;
    int i, n, ended = 0;
    if (!fixture_open(&f, "theta")) return;
    tokens = ref_tokens(&f.ref, 1, "tokens", &n);
    a = ctx_open(f.model, 256, 1, 0, 0);
    b = ctx_open(f.model, 256, 1, 0, 0);
    if (a && b && tokens) {
        CHECK_OK(a, qwen3_sync(a, 0, tokens, n, 0));
        CHECK_OK(b, qwen3_sync(b, 0, tokens, n, 0));
        for (i = 0; i < 40 && !ended; i++) {
            qwen3_result got = qwen3_next(a, 0, &s, &x);
            CHECK_OK(b, qwen3_sample(b, 0, &r, &y));
            CHECK(seq_len(b, 0) == n + i);                /* not appended */
            CHECK(x == y && s.rng == r.rng);
            ended = got == QWEN3_END;
            if (ended) { CHECK((x == 0 || x == 2) && seq_len(a, 0) == n + i); break; }
            if (!CHECK_MSG(got == QWEN3_OK, "%s", qwen3_ctx_error(a))) break;
            CHECK_OK(b, eval(b, 0, &y, 1, NULL));
            CHECK(qwen3_seq_tokens(a, 0, NULL)[n + i] == x);
        }
        CHECK(same_logits(a, 0, qwen3_logits(b, 0), f.info.n_vocab));
    }
    qwen3_ctx_free(a);
    qwen3_ctx_free(b);
    fixture_close(&f);
}

/* A batch of sequences gives each what it would get alone; ended and full ones do not disturb the others. */
static void test_api_next_batch(void) {
    enum { N = 6 };
    fixture f;
    qwen3_ctx *together, *alone;
    qwen3_sampler s[N], r[N];
    qwen3_sampler *list[N];
    qwen3_token prompt[N][20], out[N], one;
    qwen3_result results[N];
    int seqs[N], len[N], i, step, ends = 0, fulls = 0;
    uint64_t seed = 8;
    if (!fixture_open(&f, "sharded")) return;
    together = ctx_open(f.model, 40, N, 0, 0);
    alone = ctx_open(f.model, 40, N, 0, 0);
    for (i = 0; together && alone && i < N; i++) {
        len[i] = 4 + 3 * i;
        seqs[i] = N - 1 - i;
        random_tokens(&seed, prompt[i], len[i], f.info.n_vocab);
        s[i] = r[i] = qwen3_sampler_preset(i % 2 ? QWEN3_THINKING : QWEN3_NON_THINKING, (uint64_t)i);
        list[i] = i == 3 ? NULL : &s[i];                        /* one greedy */
        CHECK_OK(together, qwen3_sync(together, seqs[i], prompt[i], len[i], 0));
        CHECK_OK(alone, qwen3_sync(alone, i, prompt[i], len[i], 0));
    }
    for (step = 0; together && alone && step < 50; step++) {
        qwen3_result got = qwen3_next_batch(together, seqs, N, list, out, results);
        if (!CHECK_MSG(got == QWEN3_OK, "%s: %s", qwen3_result_string(got), qwen3_ctx_error(together))) break;
        for (i = 0; i < N; i++) {
            qwen3_result want = qwen3_next(alone, i, i == 3 ? NULL : &r[i], &one);
            if (!CHECK_MSG(results[i] == want && (want == QWEN3_ERR_CONTEXT_FULL || out[i] == one), "step %d, sequence %d: %d, not %d", step, i, results[i], want)) goto done;
            CHECK(s[i].rng == r[i].rng && seq_len(together, seqs[i]) == seq_len(alone, i));
            ends += want == QWEN3_END;
            fulls += want == QWEN3_ERR_CONTEXT_FULL;
            if (want == QWEN3_END) {                            /* go on with something else */
                qwen3_token t = 7;
                if (seq_len(alone, i) < 40) {
                    CHECK_OK(together, eval(together, seqs[i], &t, 1, NULL));
                    CHECK_OK(alone, eval(alone, i, &t, 1, NULL));
                }
            }
        }
    }
    for (i = 0; i < N; i++) CHECK(same_logits(together, seqs[i], qwen3_logits(alone, i), f.info.n_vocab));
    CHECK_MSG(fulls > 0, "no sequence became full");
    if (together && alone) CHECK_OK(together, qwen3_next_batch(together, seqs, 0, NULL, NULL, NULL));
done:
    (void)ends;
    qwen3_ctx_free(together);
    qwen3_ctx_free(alone);
    fixture_close(&f);
}

/* ---- texts: a filter forces the tokens, so that a random model says what the test wants ------------------ */
typedef struct talk_script {
    const qwen3_token *tokens;      /* to be generated, */
    int n, base;                    /* from this length of the sequence on */
    int broken;                     /* the filter saw something that it should not */
    qwen3_ctx *ctx;
} talk_script;

static void script_filter(float *logits, int n_vocab, const qwen3_token *seq, int n, void *user) {
    talk_script *s = (talk_script *)user;
    int i, at = n - s->base;
    qwen3_token only = at >= 0 && at < s->n ? s->tokens[at] : s->tokens[s->n - 1];
    if (at < 0 || !seq) s->broken = 1;
    for (i = 0; i < n_vocab; i++) if (i != only) logits[i] = -1e30f;
}

typedef struct talk_stream {
    char text[4096], thinking[4096];
    int n_text, n_thinking, calls, stop_after, invalid;
} talk_stream;

static int valid_utf8(const char *s, int n) {
    int i = 0;
    while (i < n) {
        unsigned char c = (unsigned char)s[i];
        int k, len = c < 0x80 ? 1 : c >= 0xC2 && c < 0xE0 ? 2 : c >= 0xE0 && c < 0xF0 ? 3 : c >= 0xF0 && c < 0xF5 ? 4 : 0;
        if (len == 0 || i + len > n) return 0;
        for (k = 1; k < len; k++) if (((unsigned char)s[i + k] & 0xC0) != 0x80) return 0;
        if ((c == 0xE0 && (unsigned char)s[i + 1] < 0xA0) || (c == 0xED && (unsigned char)s[i + 1] > 0x9F) ||
            (c == 0xF0 && (unsigned char)s[i + 1] < 0x90) || (c == 0xF4 && (unsigned char)s[i + 1] > 0x8F)) return 0;
        i += len;
    }
    return 1;
}

static int stream_put(const char *utf8, int n, int thinking, void *user) {
    talk_stream *s = (talk_stream *)user;
    char *dst = thinking ? s->thinking : s->text;
    int *at = thinking ? &s->n_thinking : &s->n_text;
    if (n <= 0 || !valid_utf8(utf8, n) || *at + n >= 4096) { s->invalid++; return 1; }
    memcpy(dst + *at, utf8, (size_t)n);
    *at += n;
    dst[*at] = '\0';
    return ++s->calls == s->stop_after;
}

typedef struct talk { fixture f; qwen3_ctx *ctx; qwen3_token tokens[600]; int n; talk_script script; talk_stream stream; qwen3_sampler sampler; qwen3_gen_desc gen; } talk;

/* A context on the chat model, whose sequence 0 holds a prompt; what follows is scripted. */
static int talk_open(talk *t) {
    static const qwen3_token prompt[] = {10, 20, 30};
    memset(t, 0, sizeof *t);
    if (!fixture_open(&t->f, "chat")) return 0;
    t->ctx = ctx_open(t->f.model, 256, 2, 0, 0);
    if (!t->ctx || !CHECK_OK(t->ctx, eval(t->ctx, 0, prompt, 3, NULL))) return 0;
    t->sampler.filter = script_filter;
    t->sampler.filter_user = &t->script;
    t->gen.sampler = &t->sampler;
    t->gen.on_text = stream_put;
    t->gen.user = &t->stream;
    return 1;
}
static void talk_close(talk *t) { qwen3_ctx_free(t->ctx); fixture_close(&t->f); }

static void say_token(talk *t, qwen3_token token) { t->tokens[t->n++] = token; }

/* Every byte a token of its own, so that characters and stop strings are spread over tokens. */
static void say_bytes(talk *t, const char *text) {
    for (; *text; text++) {
        qwen3_token k;
        for (k = 0; k < t->f.info.n_tokens; k++) {
            int n = 0;
            const char *bytes = qwen3_token_bytes(t->f.model, k, &n);
            if (n == 1 && bytes[0] == *text) break;
        }
        CHECK_MSG(k < t->f.info.n_tokens, "no token for byte %d", *text & 255);
        say_token(t, k);
    }
}

static void say_text(talk *t, const char *text) {
    int n = qwen3_encode(t->f.model, text, strlen(text), QWEN3_PARSE_SPECIAL, t->tokens + t->n, 600 - t->n, NULL, 0);
    if (CHECK(n >= 0)) t->n += n;
}

/* Generate what was scripted onto sequence 0, as it is after the prompt of 3 tokens. */
static qwen3_result talk_run(talk *t) {
    CHECK_OK(t->ctx, qwen3_seq_truncate(t->ctx, 0, 3));
    memset(&t->stream, 0, sizeof t->stream);
    t->script.tokens = t->tokens;
    t->script.n = t->n;
    t->script.base = 3;
    t->script.broken = 0;
    return qwen3_generate(t->ctx, 0, &t->gen);
}

static void check_said(talk *t, qwen3_result got, qwen3_result want, const char *text, const char *thinking) {
    CHECK_MSG(got == want, "%s, not %s: %s", qwen3_result_string(got), qwen3_result_string(want), qwen3_ctx_error(t->ctx));
    CHECK_MSG(strcmp(t->stream.text, text) == 0, "text '%s', not '%s'", t->stream.text, text);
    CHECK_MSG(strcmp(t->stream.thinking, thinking) == 0, "thinking '%s', not '%s'", t->stream.thinking, thinking);
    CHECK(!t->stream.invalid && !t->script.broken);
}

static void test_api_stream(void) {
    static const char text[] = "h\xC3\xA9llo \xF0\x9F\x98\x80 \xE4\xBD\xA0\xE5\xA5\xBD!";
    talk t;
    if (!talk_open(&t)) return;
    say_bytes(&t, text);
    say_token(&t, t.f.info.im_end);
    check_said(&t, talk_run(&t), QWEN3_END, text, "");
    CHECK(seq_len(t.ctx, 0) == 3 + t.n - 1);          /* all but the end stays */
    CHECK(memcmp(qwen3_seq_tokens(t.ctx, 0, NULL) + 3, t.tokens, (size_t)(t.n - 1) * sizeof *t.tokens) == 0);
    t.tokens[t.n - 1] = t.f.info.end_of_text;
    check_said(&t, talk_run(&t), QWEN3_END, text, "");
    t.gen.on_text = NULL;                                   /* nobody listens */
    CHECK(talk_run(&t) == QWEN3_END && seq_len(t.ctx, 0) == 3 + t.n - 1);
    talk_close(&t);
}

/* Bytes that are no UTF-8 come as U+FFFD, unfinished characters at the end too; the rest is untouched. */
static void test_api_stream_invalid(void) {
    static const char *const bytes[] = {"a\xFF" "b", "a\xC3" "b", "\x80z", "x\xF0\x9F\x98", "a\xED\xA0\x80z", "\xF5q", "\xC0\xAFq"};
    talk t;
    int i;
    if (!talk_open(&t)) return;
    for (i = 0; i < 7; i++) {
        const char *s, *end;
        t.n = 0;
        say_bytes(&t, bytes[i]);
        say_token(&t, t.f.info.im_end);
        CHECK(talk_run(&t) == QWEN3_END);
        CHECK_MSG(!t.stream.invalid && strstr(t.stream.text, "\xEF\xBF\xBD"), "case %d: '%s'", i, t.stream.text);
        for (s = bytes[i], end = t.stream.text; *s; s++)    /* every ASCII character arrived, in order */
            if ((unsigned char)*s < 0x80) { end = strchr(end, *s); if (!CHECK_MSG(end != NULL, "case %d lost '%c'", i, *s)) break; }
    }
    talk_close(&t);
}

static void test_api_stop_strings(void) {
    static const char *const stops[] = {"STOP", "\n\n", "\xF0\x9F\x98\x80"};
    static const struct { const char *said, *heard; qwen3_result result; } cases[] = {
        {"one STOP two", "one ", QWEN3_END}, {"one STO", "one STO", QWEN3_END}, {"one STOx STOP", "one STOx ", QWEN3_END},
        {"SSTOP", "S", QWEN3_END}, {"STSTOP!", "ST", QWEN3_END}, {"a\nb\n\nc", "a\nb", QWEN3_END}, {"STOP", "", QWEN3_END},
        {"hi \xF0\x9F\x98\x81 \xF0\x9F\x98\x80 x", "hi \xF0\x9F\x98\x81 ", QWEN3_END}, {"nothing", "nothing", QWEN3_END}
    };
    talk t;
    size_t i;
    int whole;
    if (!talk_open(&t)) return;
    t.gen.stop = stops;
    t.gen.n_stop = 3;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) for (whole = 0; whole < 2; whole++) {
        t.n = 0;
        if (whole) say_text(&t, cases[i].said); else say_bytes(&t, cases[i].said);
        say_token(&t, t.f.info.im_end);
        check_said(&t, talk_run(&t), cases[i].result, cases[i].heard, "");
    }
    talk_close(&t);
}

static void test_api_thinking(void) {
    talk t;
    if (!talk_open(&t)) return;
    say_text(&t, "<think>\nthe fox STOP\n</think>\n\nyes STOP no");
    say_token(&t, t.f.info.im_end);
    check_said(&t, talk_run(&t), QWEN3_END, "yes STOP no", "<think>\nthe fox STOP\n</think>\n\n");
    talk_close(&t);
}

/* The budget counts thinking tokens; then </think> comes, whatever the sampler wants. */
static void test_api_think_budget(void) {
    talk t;
    int i, begun = 0, inside = 0, closed = 0;
    if (!talk_open(&t)) return;
    say_token(&t, t.f.info.think_begin);
    for (i = 0; i < 30; i++) say_bytes(&t, "a");
    t.gen.think_budget = 5;
    t.gen.max_tokens = 20;
    CHECK(talk_run(&t) == QWEN3_OK && seq_len(t.ctx, 0) == 23);
    for (i = 3; i < seq_len(t.ctx, 0); i++) {
        qwen3_token k = qwen3_seq_tokens(t.ctx, 0, NULL)[i];
        if (k == t.f.info.think_begin) begun++;
        else if (k == t.f.info.think_end) closed++;
        else inside += !closed;
    }
    CHECK_MSG(begun == 1 && closed == 1 && inside >= 4 && inside <= 5, "%d tokens of thinking, </think> %d times", inside, closed);
    CHECK_MSG(strstr(t.stream.thinking, "</think>") && strstr(t.stream.text, "aaaa"), "thinking '%s', text '%s'", t.stream.thinking, t.stream.text);
    t.n = 1;                                                /* thinking that ends by itself in time */
    say_bytes(&t, "ab");
    say_token(&t, t.f.info.think_end);
    say_bytes(&t, "cdefghijkl");
    say_token(&t, t.f.info.im_end);
    CHECK(talk_run(&t) == QWEN3_END && strcmp(t.stream.thinking, "<think>ab</think>") == 0 && strcmp(t.stream.text, "cdefghijkl") == 0);
    talk_close(&t);
}

static void test_api_limits(void) {
    static const char *const stop = "hey", *const nothing = "";
    talk t;
    int i;
    if (!talk_open(&t)) return;
    for (i = 0; i < 300; i++) say_bytes(&t, "a");
    t.gen.max_tokens = 7;
    check_said(&t, talk_run(&t), QWEN3_OK, "aaaaaaa", "");
    CHECK(seq_len(t.ctx, 0) == 10);
    t.gen.max_tokens = 0;
    CHECK(talk_run(&t) == QWEN3_ERR_CONTEXT_FULL && t.stream.n_text == 253 && seq_len(t.ctx, 0) == 256);
    CHECK_OK(t.ctx, qwen3_seq_truncate(t.ctx, 0, 3));
    memset(&t.stream, 0, sizeof t.stream);
    t.stream.stop_after = 4;
    CHECK(qwen3_generate(t.ctx, 0, &t.gen) == QWEN3_STOPPED && t.stream.n_text == 4);
    CHECK(seq_len(t.ctx, 0) >= 7 && seq_len(t.ctx, 0) <= 8);
    t.n = 0;                                                /* held back for a stop string when the callback stops */
    say_text(&t, "no the");
    t.gen.stop = &stop;
    t.gen.n_stop = 1;
    talk_run(&t);
    for (i = 1; i <= 3; i++) {
        CHECK_OK(t.ctx, qwen3_seq_truncate(t.ctx, 0, 3));
        memset(&t.stream, 0, sizeof t.stream);
        t.stream.stop_after = i;
        CHECK(qwen3_generate(t.ctx, 0, &t.gen) == QWEN3_STOPPED);
        CHECK_MSG(t.stream.calls == i, "the callback asked to stop at call %d, and was called %d times", i, t.stream.calls);
    }
    t.gen.max_tokens = -1;
    CHECK(qwen3_generate(t.ctx, 0, &t.gen) == QWEN3_ERR_ARG);
    t.gen.max_tokens = 0;
    t.gen.stop = NULL;
    CHECK(qwen3_generate(t.ctx, 0, &t.gen) == QWEN3_ERR_ARG);
    t.gen.stop = &nothing;
    CHECK(qwen3_generate(t.ctx, 0, &t.gen) == QWEN3_ERR_ARG && strstr(qwen3_ctx_error(t.ctx), "stop[0]"));
    talk_close(&t);
}

/* A conversation of several turns: each reply continues exactly as a fresh evaluation of the transcript would. */
static void test_api_chat(void) {
    talk t;
    qwen3_msg msgs[5];
    qwen3_chat_desc chat;
    qwen3_token rendered[512];
    float *fresh;
    int turn, n;
    memset(msgs, 0, sizeof msgs);
    memset(&chat, 0, sizeof chat);
    if (!talk_open(&t)) return;
    msgs[0].role = QWEN3_SYSTEM;    msgs[0].text = "yes or no";
    msgs[1].role = QWEN3_USER;      msgs[1].text = "the fox?";
    msgs[2].role = QWEN3_ASSISTANT; msgs[2].text = "yes";
    msgs[3].role = QWEN3_USER;      msgs[3].text = "the dog <|im_end|>?";
    chat.msgs = msgs;
    chat.flags = QWEN3_CHAT_NO_THINK;
    for (turn = 0; turn < 2; turn++) {
        qwen3_stats before = qwen3_ctx_stats(t.ctx);
        chat.n_msgs = turn == 0 ? 2 : 4;
        n = qwen3_chat_render(t.f.model, &chat, rendered, 512, NULL, 0);
        if (!CHECK(n > 0 && n < 200)) break;
        t.n = 0;
        say_text(&t, turn == 0 ? "yes" : "no");
        say_token(&t, t.f.info.im_end);
        memset(&t.stream, 0, sizeof t.stream);
        t.script.tokens = t.tokens;
        t.script.n = t.n;
        t.script.base = n;
        t.script.broken = 0;
        check_said(&t, qwen3_chat(t.ctx, 0, &chat, &t.gen), QWEN3_END, turn == 0 ? "yes" : "no", "");
        CHECK(seq_len(t.ctx, 0) == n + t.n - 1 && memcmp(qwen3_seq_tokens(t.ctx, 0, NULL), rendered, (size_t)n * sizeof *rendered) == 0);
        if (turn == 1) CHECK_MSG(qwen3_ctx_stats(t.ctx).n_reused - before.n_reused > 20, "the first turn was not reused");
        memcpy(rendered + n, t.tokens, (size_t)(t.n - 1) * sizeof *rendered);
        n += t.n - 1;
        fresh = plain_logits(t.f.model, rendered, n, QWEN3_KV_F16);
        CHECK(same_logits(t.ctx, 0, fresh + (size_t)(n - 1) * (size_t)t.f.info.n_vocab, t.f.info.n_vocab));
        free(fresh);
    }
    chat.n_msgs = 4;
    chat.msgs = NULL;
    CHECK(qwen3_chat(t.ctx, 0, &chat, &t.gen) == QWEN3_ERR_ARG && qwen3_ctx_error(t.ctx)[0]);
    talk_close(&t);
}

/* A conversation that does not fit is refused before anything is lost. */
static void test_api_chat_too_long(void) {
    fixture f;
    qwen3_ctx *ctx;
    qwen3_msg msg;
    qwen3_chat_desc chat;
    qwen3_gen_desc gen;
    char text[400];
    qwen3_token before[3] = {1, 2, 3};
    memset(&msg, 0, sizeof msg);
    memset(&chat, 0, sizeof chat);
    memset(&gen, 0, sizeof gen);
    memset(text, 'q', sizeof text);
    text[399] = '\0';
    msg.role = QWEN3_USER;
    msg.text = text;
    chat.msgs = &msg;
    chat.n_msgs = 1;
    if (!fixture_open(&f, "chat")) return;
    ctx = ctx_open(f.model, 64, 1, 0, 0);
    if (ctx) {
        CHECK_OK(ctx, eval(ctx, 0, before, 3, NULL));
        CHECK(qwen3_chat(ctx, 0, &chat, &gen) == QWEN3_ERR_CONTEXT_FULL && qwen3_ctx_error(ctx)[0]);
        CHECK(seq_len(ctx, 0) == 3);
    }
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

/* ---- saved states ---------------------------------------------------------------------------------------- */
static void expect_state_error(qwen3_ctx *ctx, const void *state, uint64_t size, const float *row, int vocab, const char *what) {
    qwen3_result r = state_load(ctx, 0, state, size);
    CHECK_MSG((r == QWEN3_ERR_FORMAT || r == QWEN3_ERR_MISMATCH) && qwen3_ctx_error(ctx)[0], "%s: %s", what, qwen3_result_string(r));
    CHECK_MSG(seq_len(ctx, 0) == 4 && same_logits(ctx, 0, row, vocab), "%s: the sequence has changed", what);
}

static void test_api_state_damaged(void) {
    fixture f, g;
    qwen3_ctx *ctx, *small, *f32, *other;
    qwen3_token tokens[12] = {9, 8, 7, 6, 5, 4, 3, 2, 1, 10, 11, 12};
    uint64_t size, at, written = 0;
    unsigned char *state, *copy;
    float *row;
    int vocab;
    if (!fixture_open(&f, "plain") || !fixture_open(&g, "theta")) return;
    vocab = f.info.n_vocab;
    ctx = ctx_open(f.model, 32, 1, 0, QWEN3_KV_F16);
    small = ctx_open(f.model, 8, 1, 0, QWEN3_KV_F16);
    f32 = ctx_open(f.model, 32, 1, 0, QWEN3_KV_F32);
    other = ctx_open(g.model, 32, 1, 0, QWEN3_KV_F16);
    row = floats((size_t)vocab);
    if (ctx && small && f32 && other) {
        CHECK_OK(ctx, eval(ctx, 0, tokens, 12, NULL));
        size = state_size(ctx, 0);
        CHECK(size > 12 * 4);
        state = (unsigned char *)malloc((size_t)size);
        CHECK_OK(ctx, state_save(ctx, 0, state, size, &written));
        CHECK(written == size);
        written = 77;
        CHECK(state_save(ctx, 0, state, size - 1, &written) == QWEN3_ERR_ARG);
        CHECK_OK(ctx, state_save(ctx, 0, state, size, NULL));
        CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens + 5, 4, 0));
        memcpy(row, qwen3_logits(ctx, 0), (size_t)vocab * sizeof *row);
        for (at = 0; at < size; at += at < 256 ? 1 : 97) {          /* any one byte */
            copy = (unsigned char *)malloc((size_t)size);
            memcpy(copy, state, (size_t)size);
            copy[at] ^= (unsigned char)(1u << (at % 8));
            expect_state_error(ctx, copy, size, row, vocab, "a flipped bit");
            free(copy);
        }
        for (at = 0; at < size; at += at < 256 ? 1 : 97) {          /* truncated: the copy makes overreads show */
            copy = (unsigned char *)malloc((size_t)at + 1);
            memcpy(copy, state, (size_t)at);
            expect_state_error(ctx, copy, at, row, vocab, "a truncated state");
            free(copy);
        }
        copy = (unsigned char *)malloc((size_t)size + 8);
        memcpy(copy, state, (size_t)size);
        memset(copy + size, 0, 8);
        expect_state_error(ctx, copy, size + 8, row, vocab, "a state with more after it");
        free(copy);
        CHECK(state_load(f32, 0, state, size) == QWEN3_ERR_MISMATCH && seq_len(f32, 0) == 0);
        CHECK(state_load(other, 0, state, size) == QWEN3_ERR_MISMATCH && seq_len(other, 0) == 0);
        CHECK(state_load(small, 0, state, size) == QWEN3_ERR_CONTEXT_FULL && seq_len(small, 0) == 0);
        CHECK_OK(ctx, state_load(ctx, 0, state, size));
        CHECK(seq_len(ctx, 0) == 12);
        CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, 0));               /* an empty sequence can be saved, too */
        size = state_size(ctx, 0);
        CHECK_OK(ctx, state_save(ctx, 0, state, size, &written));
        CHECK_OK(ctx, eval(ctx, 0, tokens, 2, NULL));
        CHECK_OK(ctx, state_load(ctx, 0, state, size));
        CHECK(seq_len(ctx, 0) == 0 && qwen3_logits(ctx, 0) == NULL);
        free(state);
    }
    free(row);
    qwen3_ctx_free(ctx); qwen3_ctx_free(small); qwen3_ctx_free(f32); qwen3_ctx_free(other);
    fixture_close(&f);
    fixture_close(&g);
}

/* A state saved before any logits were fetched, after a truncation, goes on as the sequence would have. */
static void test_api_state_after_truncate(void) {
    fixture f;
    qwen3_ctx *ctx;
    qwen3_token tokens[12] = {9, 8, 7, 6, 5, 4, 3, 2, 1, 10, 11, 12};
    float *plain;
    uint64_t size, written;
    void *state;
    if (!fixture_open(&f, "plain")) return;
    ctx = ctx_open(f.model, 32, 2, 0, QWEN3_KV_F16);
    plain = plain_logits(f.model, tokens, 12, QWEN3_KV_F16);
    if (ctx) {
        CHECK_OK(ctx, eval(ctx, 0, tokens, 12, NULL));
        CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, 6));
        size = state_size(ctx, 0);
        state = malloc((size_t)size);
        CHECK_OK(ctx, state_save(ctx, 0, state, size, &written));
        CHECK_OK(ctx, state_load(ctx, 1, state, size));
        CHECK(seq_len(ctx, 1) == 6 && same_logits(ctx, 1, plain + 5 * f.info.n_vocab, f.info.n_vocab));
        CHECK(same_logits(ctx, 0, plain + 5 * f.info.n_vocab, f.info.n_vocab));
        free(state);
    }
    free(plain);
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

/* ---- threads: many contexts on one model ------------------------------------------------------------------- */
#if !defined(_WIN32) && !defined(QWEN3_NO_THREADS)
typedef struct worker { const qwen3_model *model; const qwen3_token *tokens; int n; float *logits; int encoded; } worker;

static void *worker_run(void *arg) {
    worker *w = (worker *)arg;
    int round;
    for (round = 0; round < 5; round++) {
        free(w->logits);
        w->logits = plain_logits(w->model, w->tokens, w->n, QWEN3_KV_F16);
        w->encoded = qwen3_encode(w->model, "the quick brown fox", 19, 0, NULL, 0, NULL, 0);
    }
    return NULL;
}

static void test_api_threads(void) {
    fixture f;
    worker w[4];
    pthread_t id[4];
    int i, n, encoded;
    float *want;
    const qwen3_token *tokens;
    if (!fixture_open(&f, "chat")) return;
    tokens = ref_tokens(&f.ref, 1, "tokens", &n);
    want = plain_logits(f.model, tokens, n, QWEN3_KV_F16);
    encoded = qwen3_encode(f.model, "the quick brown fox", 19, 0, NULL, 0, NULL, 0);
    memset(w, 0, sizeof w);
    for (i = 0; i < 4; i++) {
        w[i].model = f.model;
        w[i].tokens = tokens;
        w[i].n = n;
        CHECK(pthread_create(&id[i], NULL, worker_run, &w[i]) == 0);
    }
    for (i = 0; i < 4; i++) {
        pthread_join(id[i], NULL);
        CHECK(same_floats(w[i].logits, want, n * f.info.n_vocab) && w[i].encoded == encoded && encoded > 0);
        free(w[i].logits);
    }
    free(want);
    fixture_close(&f);
}
#endif

/* Nothing that earlier tests did may have leaked from the library's default allocator. */
static void test_api_no_leaks(void) {
    CHECK_MSG(heap_default.live == 0 && heap_default.bytes == 0, "%ld blocks of %ld bytes are not freed", heap_default.live, heap_default.bytes);
    CHECK_MSG(heap_default.bad == 0, "%ld wrong frees", heap_default.bad);
}

static void suite_api(void) {
    RUN(test_api_version);
    RUN(test_api_other_version);
    RUN(test_api_info);
    RUN(test_api_fingerprints);
    RUN(test_api_fingerprint_of_config);
    RUN(test_api_load_files_asked);
    RUN(test_api_load_sources);
    RUN(test_api_load_unaligned);
    RUN(test_api_vocab_only);
    RUN(test_api_load_rejects);
    RUN(test_api_config_rejects);
    RUN(test_api_load_check);
    RUN(test_api_ctx_rejects);
    RUN(test_api_memory);
    RUN(test_api_sizes);
    RUN(test_api_messages);
    RUN(test_api_rejects);
    RUN(test_api_null);
    RUN(test_api_no_tokenizer);
    RUN(test_api_tiny_model);
    RUN(test_api_context_full);
    RUN(test_api_item_outputs);
    RUN(test_api_top_probs);
    RUN(test_api_stats);
    RUN(test_api_next);
    RUN(test_api_next_batch);
    RUN(test_api_stream);
    RUN(test_api_stream_invalid);
    RUN(test_api_stop_strings);
    RUN(test_api_thinking);
    RUN(test_api_think_budget);
    RUN(test_api_limits);
    RUN(test_api_chat);
    RUN(test_api_chat_too_long);
    RUN(test_api_state_damaged);
    RUN(test_api_state_after_truncate);
#if !defined(_WIN32) && !defined(QWEN3_NO_THREADS)
    RUN(test_api_threads);
#endif
    RUN(test_api_no_leaks);
}
#endif
