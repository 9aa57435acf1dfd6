/* GGUF files: the same model as the directory's, bit for bit; every way to be wrong that we know is refused by
   name. The files are made here, in memory, of the small model of tiny.h. */
#ifndef QWEN3_TESTS_TEST_GGUF_H
#define QWEN3_TESTS_TEST_GGUF_H
#include "fixture.h"
#include "tiny_gguf.h"
#include "test_malformed.h"
#include "test_tokenizer.h"

#define BAD  QWEN3_ERR_FORMAT
#define NOT  QWEN3_ERR_UNSUPPORTED
#define NONE QWEN3_ERR_IO
#define GOOD QWEN3_OK

static void gg_remove(gg_file *f, const char *name) {
    int i;
    for (i = 0; i < f->n_keys && strcmp(f->keys[i].name, name) != 0; i++) {}
    if (!CHECK_MSG(i < f->n_keys, "no key %s", name)) return;
    free(f->keys[i].value.p);
    f->keys[i] = f->keys[--f->n_keys];
}


static gg_tensor *gg_tensor_at(gg_file *f, const char *name) {
    int i;
    for (i = 0; i < f->n_tensors && strcmp(f->tensors[i].name, name) != 0; i++) {}
    return CHECK_MSG(i < f->n_tensors, "no tensor %s", name) ? &f->tensors[i] : &f->tensors[0];
}


/* ---- loading ------------------------------------------------------------------------------------------------ */
static qwen3_result gg_load_files(const tiny_text *parts, const char *const *names, int n, char err[512]) {
    qwen3_file files[4];
    void *copy[4];
    size_t size = 0;
    qwen3_result r;
    int i;
    memset(files, 0, sizeof files);
    for (i = 0; i < n; i++) {           /* where it just fits, so that reading on is seen */
        copy[i] = malloc(parts[i].n ? parts[i].n : 1);
        memcpy(copy[i], parts[i].p, parts[i].n);
        files[i].name = names[i];
        files[i].data = copy[i];
        files[i].size = parts[i].n;
        size += parts[i].n;
    }
    r = malformed_load_files(files, n, size, err);
    for (i = 0; i < n; i++) free(copy[i]);
    return r;
}

static qwen3_result gg_load_bytes(const tiny_text *file, char err[512]) {
    static const char *const name[] = {"m.gguf"};
    return gg_load_files(file, name, 1, err);
}

static void gg_check(const gg_file *f, qwen3_result want, const char *words) {
    tiny_text file = gg_write(f);
    char err[512];
    qwen3_result r = gg_load_bytes(&file, err);
    CHECK_MSG(r == want && malformed_says(err, words) && (r == QWEN3_OK || strstr(err, "m.gguf")), "%s: '%s'; not '%s'",
              qwen3_result_string(r), err, words);
    free(file.p);
}

/* A model of the files for good, or NULL; free them after it. */
static qwen3_model *gg_model(const qwen3_file *files, int n) {
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    char err[512] = "";
    memset(&d, 0, sizeof d);
    d.files = files;
    d.n_files = n;
    CHECK_MSG(qwen3_load(&m, &d, err, sizeof err) == QWEN3_OK, "%s", err);
    return m;
}

static qwen3_model *gg_model_of(const gg_file *f, tiny_text *bytes) {
    qwen3_file file;
    *bytes = gg_write(f);
    file.name = "m.gguf";
    file.data = bytes->p;
    file.size = bytes->n;
    return gg_model(&file, 1);
}

static void gg_logits(const qwen3_model *m, float *out) {
    static const qwen3_token tokens[] = {97, 256, 3, 200, 257, 98, 12};
    const int n = (int)(sizeof tokens / sizeof *tokens);
    qwen3_ctx_desc d = ctx_desc(16, 1, 0, QWEN3_KV_F32);
    qwen3_ctx *ctx = NULL;
    memset(out, 0xFF, sizeof(float) * 264 * (size_t)n);
    if (m && CHECK(qwen3_ctx_create(&ctx, m, &d, NULL, 0) == QWEN3_OK)) CHECK_OK(ctx, eval(ctx, 0, tokens, n, out));
    qwen3_ctx_free(ctx);
}
#define GG_LOGITS (264 * 7)

/* What a user sees of two models must be the same. */
static void gg_same(const qwen3_model *a, const qwen3_model *b, int same_info) {
    static const char text[] = "abab \xC3\xA9\xCC\x81 e\xCC\x81 <|im_end|><think>\xFF 12 don't\r\n\n  x";
    static float x[GG_LOGITS], y[GG_LOGITS];
    qwen3_token s[64], t[64];
    qwen3_info p = qwen3_get_info(a), q = qwen3_get_info(b);
    int n, k;
    if (!a || !b) return;
    gg_logits(a, x);
    gg_logits(b, y);
    CHECK(memcmp(x, y, sizeof x) == 0);
    for (k = 0; k < 2; k++) {
        n = qwen3_encode(a, text, sizeof text - 1, k, s, 64, NULL, 0);
        CHECK(n > 0 && n == qwen3_encode(b, text, sizeof text - 1, k, t, 64, NULL, 0) && memcmp(s, t, (size_t)n * sizeof *s) == 0);
    }
    if (!same_info) return;
    CHECK(p.n_tokens == q.n_tokens && p.chat_style == q.chat_style && p.im_end == q.im_end && p.max_ctx == q.max_ctx);
    CHECK(memcmp(&p.sampler, &q.sampler, sizeof p.sampler) == 0);
    CHECK(a->n_eos == b->n_eos && memcmp(a->eos, b->eos, (size_t)a->n_eos * sizeof *a->eos) == 0);
    CHECK(p.n_params == q.n_params);
}

static qwen3_model *gg_directory(const tiny_model *t) {
    qwen3_file files[TINY_FILES];
    return gg_model(files, tiny_list(t, files));
}

/* ---- what must work ---------------------------------------------------------------------------------------- */
static void test_gguf_same_as_directory(void) {
    static const char yarn[] = "\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4.0,\"original_max_position_embeddings\":8}";
    qwen3_model *a, *b;
    tiny_model t;
    tiny_text bytes;
    gg_file f;
    int i;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    for (i = 0; i < 3; i++) {
        a = gg_directory(&t);
        b = gg_model_of(&f, &bytes);
        gg_same(a, b, 1);
        qwen3_free(a);
        qwen3_free(b);
        free(bytes.p);
        if (i == 0) f.version = 2;
        if (i == 1) {                   /* YaRN */
            tiny_text config = malformed_replace(t.file[TINY_CONFIG].p, t.file[TINY_CONFIG].n, "\"rope_scaling\":null", yarn);
            free(t.file[TINY_CONFIG].p);
            t.file[TINY_CONFIG] = config;
            gg_set_string(&f, "qwen3.rope.scaling.type", "yarn");
            gg_set_float(&f, "qwen3.rope.scaling.factor", 4);
            gg_set(&f, "qwen3.rope.scaling.original_context_length", GG_U32, 8);
            gg_set(&f, "qwen3.vocab_size", GG_U64, 264);
        }
    }
    gg_free(&f);
    tiny_free(&t);
}

/* q, k and v as the rows of one; an output matrix of its own that equals the embedding; no lengths of keys */
static void test_gguf_forms(void) {
    static const char *const parts[] = {"blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"};
    qwen3_model *a, *b;
    tiny_text bytes, again, fused = {NULL, 0};
    const gg_tensor *e;
    tiny_model t;
    gg_file f;
    int i;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    a = gg_model_of(&f, &bytes);
    for (i = 0; i < 3; i++) {
        gg_tensor *w = gg_tensor_at(&f, parts[i]);
        tiny_append(&fused, w->data.p, w->data.n);
        free(w->data.p);
        *w = f.tensors[--f.n_tensors];
    }
    gg_add(&f, "blk.0.attn_qkv.weight", 8, 4, 30, fused.p, fused.n);
    e = gg_tensor_at(&f, "token_embd.weight");
    gg_add(&f, "output.weight", 264, 4, 30, e->data.p, e->data.n);
    gg_remove(&f, "qwen3.attention.key_length");
    gg_remove(&f, "qwen3.attention.value_length");
    b = gg_model_of(&f, &again);
    gg_same(a, b, 0);
    CHECK(a && b && !b->config.tied && a->config.tied);
    qwen3_free(a);
    qwen3_free(b);
    free(bytes.p);
    free(again.p);
    free(fused.p);
    gg_free(&f);
    tiny_free(&t);
}

/* Numbers of any kind, and a model without a vocabulary */
static void test_gguf_kinds(void) {
    static const uint32_t kinds[] = {GG_U8, GG_I8, GG_U16, GG_I16, GG_U32, GG_I32, GG_U64, GG_I64};
    static const char *const tokenizer[] = {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"};
    const double half = 1e-6;
    uint64_t bits;
    tiny_model t;
    tiny_text bytes;
    qwen3_model *m;
    gg_file f;
    size_t i;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    for (i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        gg_set(&f, "qwen3.feed_forward_length", kinds[i], 6);
        gg_check(&f, GOOD, "");
    }
    memcpy(&bits, &half, 8);
    gg_set(&f, "qwen3.attention.layer_norm_rms_epsilon", GG_F64, bits);
    gg_number(gg_set_array(&f, "some.array", GG_U16, 2), 0x12345678, 4);
    gg_set(&f, "general.alignment", GG_U32, 32);
    gg_check(&f, GOOD, "");
    gg_set_string(&f, "tokenizer.ggml.model", "no_vocab");
    gg_check(&f, GOOD, "");
    for (i = 0; i < 3; i++) gg_remove(&f, tokenizer[i]);
    gg_check(&f, BAD, "qwen3.vocab_size|missing");
    gg_set(&f, "qwen3.vocab_size", GG_U32, 264);
    m = gg_model_of(&f, &bytes);
    CHECK(m && qwen3_get_info(m).n_tokens == 0);
    qwen3_free(m);
    free(bytes.p);
    gg_free(&f);
    tiny_free(&t);
}

/* A reranker's two rows: the score is that of the last token's state. */
static void test_gguf_rank(void) {
    static const float rows[8] = {0.5f, -1, 2, 0.25f, -0.5f, 1, 0.125f, 3};
    qwen3_ctx_desc d = ctx_desc(32, 1, 0, QWEN3_KV_F32);
    qwen3_token tokens[] = {97, 98, 99};
    float state[4], score = 0, want;
    int length = 0;
    qwen3_model *m;
    qwen3_ctx *ctx = NULL;
    qwen3_item item;
    tiny_text bytes;
    tiny_model t;
    gg_file f;
    double yes = 0, no = 0;
    int i;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    gg_add(&f, "cls.output.weight", 2, 4, 0, rows, sizeof rows);
    gg_set(&f, "qwen3.pooling_type", GG_U32, 4);
    m = gg_model_of(&f, &bytes);
    if (m && CHECK(qwen3_ctx_create(&ctx, m, &d, NULL, 0) == QWEN3_OK)) {
        qwen3i_err err = qwen3i_ctx_err(ctx);
        memset(&item, 0, sizeof item);
        item.tokens = tokens; item.n = 3; item.hidden = state;
        CHECK_OK(ctx, qwen3_eval(ctx, &item, 1));
        for (i = 0; i < 4; i++) { yes += (double)rows[i] * (double)state[i]; no += (double)rows[4 + i] * (double)state[i]; }
        want = (float)(exp(yes) / (exp(yes) + exp(no)));
        CHECK_OK(ctx, qwen3i_yes_or_no(ctx, 0, &score, &err));
        CHECK_MSG(fabs((double)score - (double)want) < 1e-6 && score != 0.5f, "%g, not %g", (double)score, (double)want);
        CHECK(qwen3_seq_tokens(ctx, 0, &length) && length == 3);
    }
    qwen3_ctx_free(ctx);
    qwen3_free(m);
    free(bytes.p);
    gg_free(&f);
    tiny_free(&t);
}

/* ---- where it comes from -------------------------------------------------------------------------------------- */
typedef struct gg_io { const tiny_text *parts; const char *const *names; int n; } gg_io;

static int64_t gg_io_size(void *user, const char *name) {
    const gg_io *io = (const gg_io *)user;
    int i;
    for (i = 0; i < io->n; i++) if (strcmp(name, io->names[i]) == 0) return (int64_t)io->parts[i].n;
    return -1;
}

static int gg_io_read(void *user, const char *name, uint64_t offset, void *dst, size_t size) {
    const gg_io *io = (const gg_io *)user;
    int i;
    for (i = 0; i < io->n; i++) if (strcmp(name, io->names[i]) == 0) { memcpy(dst, io->parts[i].p + offset, size); return 0; }
    return 1;
}

static const char *const gg_part_names[] = {"q-00001-of-00003.gguf", "q-00002-of-00003.gguf", "q-00003-of-00003.gguf"};

/* The model in three parts */
static void gg_split(gg_file *f, tiny_text parts[3]) {
    const int n = f->n_keys;
    int i, k;
    gg_set(f, "split.count", GG_U16, 3);
    gg_set(f, "split.tensors.count", GG_I32, (uint64_t)f->n_tensors);
    for (i = 0; i < 3; i++) {
        gg_file part = *f;
        gg_set(&part, "split.no", GG_U16, (uint64_t)i);
        if (i > 0) {                    /* only the first part has the other keys */
            for (k = n; k < part.n_keys; k++) part.keys[k - n] = part.keys[k];
            part.n_keys -= n;
        }
        parts[i] = gg_write_part(&part, i * f->n_tensors / 3, (i + 1) * f->n_tensors / 3);
        free(part.keys[part.n_keys - 1].value.p);
    }
}

/* A model from this descriptor, compared with that one. */
static void gg_same_loaded(const qwen3_model *a, const qwen3_load_desc *d) {
    qwen3_model *b = NULL;
    char err[512] = "";
    if (CHECK_MSG(qwen3_load(&b, d, err, sizeof err) == QWEN3_OK, "%s", err)) gg_same(a, b, 1);
    qwen3_free(b);
}

static void test_gguf_sources(void) {
    static const char *const one_name[] = {"model.gguf"};
    qwen3_file files[3];
    tiny_text whole, parts[3];
    qwen3_load_desc d;
    qwen3_model *a;
    tiny_model t;
    gg_io one, three;
    gg_file f;
    int i;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    a = gg_model_of(&f, &whole);
    gg_split(&f, parts);
    one.parts = &whole; one.names = one_name; one.n = 1;
    three.parts = parts; three.names = gg_part_names; three.n = 3;
    for (i = 0; i < 3; i++) { files[i].name = gg_part_names[2 - i]; files[i].data = parts[2 - i].p; files[i].size = parts[2 - i].n; }
    memset(&d, 0, sizeof d);
    d.io.size = gg_io_size; d.io.read = gg_io_read; d.io.user = &one;
    gg_same_loaded(a, &d);
    d.io.user = &three;
    d.path = gg_part_names[0];
    gg_same_loaded(a, &d);
    memset(&d, 0, sizeof d);
    d.files = files; d.n_files = 3;
    gg_same_loaded(a, &d);
    d.path = gg_part_names[0];
    gg_same_loaded(a, &d);
    d.path = "elsewhere.gguf";
    qwen3_free(a);
    CHECK(qwen3_load(&a, &d, NULL, 0) == QWEN3_ERR_IO && !a);
    for (i = 0; i < 3; i++) free(parts[i].p);
    free(whole.p);
    gg_free(&f);
    tiny_free(&t);
}

#if !defined(_WIN32)
static void test_gguf_path(void) {
    char dir[64], path[4][160], err[512];
    tiny_text whole, parts[3];
    qwen3_load_desc d;
    qwen3_model *a;
    tiny_model t;
    gg_file f;
    int i, flags;
    snprintf(dir, sizeof dir, "/tmp/qwen3-gguf-%ld", (long)getpid());
    if (!CHECK_MSG(mkdir(dir, 0700) == 0, "cannot make %s", dir)) return;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    a = gg_model_of(&f, &whole);
    gg_split(&f, parts);
    for (i = 0; i < 4; i++) snprintf(path[i], sizeof path[i], "%s/%s", dir, i < 3 ? gg_part_names[i] : "one");
    for (i = 0; i < 3; i++) malformed_write(dir, gg_part_names[i], &parts[i]);
    malformed_write(dir, "one", &whole);
    memset(&d, 0, sizeof d);
    for (flags = 0; flags <= QWEN3_LOAD_NO_MMAP; flags += QWEN3_LOAD_NO_MMAP) for (i = 0; i < 4; i += 3) {
        d.path = path[i];
        d.flags = flags;
        gg_same_loaded(a, &d);
    }
    CHECK(malformed_load_dir(path[1], 0, err) == BAD && strstr(err, "part 2 of 3") && strstr(err, gg_part_names[1]));
    unlink(path[2]);
    CHECK(malformed_load_dir(path[0], 0, err) == NONE && strstr(err, gg_part_names[2]));
    CHECK(malformed_load_dir("no/such.gguf", 0, err) == NONE && strstr(err, "no/such.gguf"));
    for (i = 0; i < 4; i++) unlink(path[i]);
    rmdir(dir);
    for (i = 0; i < 3; i++) free(parts[i].p);
    qwen3_free(a);
    free(whole.p);
    gg_free(&f);
    tiny_free(&t);
}
#endif

/* Files that gguf-py wrote (tools/make_small_gguf.py): blocks of six formats give what gguf-py's float32 of them gives. */
static void test_gguf_of_gguf_py(void) {
    static const char *const names[2] = {"small.gguf", "small-f32.gguf"};
    static float logits[2][GG_LOGITS];
    qwen3_token s[8];
    double off = 0, top = 0;
    int i, k;
    for (i = 0; i < 2; i++) {
        char path[1024], err[512] = "";
        qwen3_load_desc d;
        qwen3_model *m = NULL;
        memset(&d, 0, sizeof d);
        snprintf(path, sizeof path, "%s/gguf/%s", test_data, names[i]);
        d.path = path;
        d.flags = QWEN3_LOAD_CHECK;
        if (!CHECK_MSG(qwen3_load(&m, &d, err, sizeof err) == QWEN3_OK, "%s", err)) return;
        CHECK(qwen3_get_info(m).n_tokens == 260 && qwen3_get_info(m).im_end == 257 && qwen3_get_info(m).chat_style == QWEN3_STYLE_HYBRID);       /* without the four that are padding */
        CHECK(qwen3_encode(m, "abx<think>", 10, QWEN3_PARSE_SPECIAL, s, 8, NULL, 0) == 3 && s[0] == 256 && s[1] == 'x' && s[2] == 259);
        gg_logits(m, logits[i]);
        qwen3_free(m);
    }
    for (k = 0; k < GG_LOGITS; k++) {
        off = fabs((double)logits[0][k] - (double)logits[1][k]) > off ? fabs((double)logits[0][k] - (double)logits[1][k]) : off;
        top = fabs((double)logits[1][k]) > top ? fabs((double)logits[1][k]) : top;
    }
    CHECK_MSG(top > 1 && off <= 1e-4 * top, "off by %g of %g", off, top);
}

/* ---- the vocabulary of tests/data/tokenizer: the ids that Hugging Face's tokenizers give every string there ---- */
static void gg_text(tiny_text *out, const char *p, size_t n) {
    tiny_text word = {NULL, 0};
    size_t i;
    tiny_append(&word, "", 0);
    for (i = 0; i < n; i++) {           /* without JSON's escapes */
        if (p[i] == '"' || p[i] == '\\') tiny_append(&word, p + i, 1);
        else tiny_byte(&word, (unsigned char)p[i]);
    }
    tiny_append(out, word.p, word.n);
    free(word.p);
}

/* The bytes of a token, which is not an added one */
static void gg_text_of(tiny_text *out, const qwen3i_tokenizer *t, uint32_t id) {
    gg_text(out, t->bytes.p + t->texts[id].start, t->texts[id].length & ~QWEN3I_WHOLE);
}

static const qwen3i_added *gg_added(const qwen3i_tokenizer *t, int id) {
    int i;
    for (i = 0; i < t->n_added; i++) if (t->added[i].id == id) return &t->added[i];
    return NULL;
}

static void gg_set_tokenizer(gg_file *f, const qwen3i_tokenizer *t, int n) {
    tiny_text *tokens = gg_set_array(f, "tokenizer.ggml.tokens", GG_STR, (uint64_t)n), *types, *merges;
    int i;
    for (i = 0; i < n; i++) {
        const qwen3i_added *a = gg_added(t, i);
        tiny_text word = {NULL, 0};
        tiny_append(&word, "", 0);
        if (a) tiny_append(&word, a->p, a->length); else gg_text_of(&word, t, (uint32_t)i);
        gg_string(tokens, word.p, word.n);
        free(word.p);
    }
    types = gg_set_array(f, "tokenizer.ggml.token_type", GG_I32, (uint64_t)n);
    for (i = 0; i < n; i++) gg_number(types, !gg_added(t, i) ? 1 : gg_added(t, i)->kinds & QWEN3I_ADDED_SPECIAL ? 3 : 4, 4);
    merges = gg_set_array(f, "tokenizer.ggml.merges", GG_STR, t->n_pairs);
    for (i = 0; i < (int)t->n_pairs; i++) {
        tiny_text pair = {NULL, 0};
        gg_text_of(&pair, t, t->pairs[i].left);
        tiny_append(&pair, " ", 1);
        gg_text_of(&pair, t, t->pairs[i].right);
        gg_string(merges, pair.p, pair.n);
        free(pair.p);
    }
}

static void test_gguf_tokenizer(void) {
    qwen3_model from, *m;
    tiny_text bytes;
    tiny_model t;
    gg_tensor *embed;
    gg_file f;
    int i, n;
    if (!tokenizer_open_small(&from)) return;
    n = from.tokenizer->n_tokens;
    for (i = 0; i < from.tokenizer->n_added; i++) n = qwen3i_max(n, from.tokenizer->added[i].id + 1);
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    gg_set_tokenizer(&f, from.tokenizer, n);
    embed = gg_tensor_at(&f, "token_embd.weight");
    for (i = (int)embed->dims[1]; i < n; i++) tiny_append(&embed->data, "\0\0\0\0\0\0\0\0", 8);
    embed->dims[1] = (uint64_t)n;
    m = gg_model_of(&f, &bytes);
    if (m) tokenizer_check_strings(m, 1);
    qwen3_free(m);
    free(bytes.p);
    qwen3i_tokenizer_free(from.tokenizer);
    gg_free(&f);
    tiny_free(&t);
}

/* ---- factors of whole tensors ---------------------------------------------------------------------------- */
/* The tensor becomes a quarter of itself, with a factor of 4 beside it: no bit of any sum changes. */
static void gg_give_factor(gg_file *f, int i) {
    gg_tensor *w = &f->tensors[i];
    const size_t size = w->type ? 2 : 4;        /* of an element, BF16 or F32; its exponent is high in the last byte */
    char name[sizeof w->name];
    size_t k;
    for (k = size - 1; k < w->data.n; k += size) if (w->data.p[k] & 0x7F) w->data.p[k] = (char)(w->data.p[k] - 1);
    snprintf(name, sizeof name, "%.*sscale", (int)(strlen(w->name) - strlen("weight")), w->name);
    gg_add(f, name, 0, 1, 0, "\0\0\x80\x40", 4);
}

static void test_gguf_factors(void) {
    static float want[GG_LOGITS], got[GG_LOGITS];
    tiny_model t;
    gg_file f;
    int i, n;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    for (i = 0, n = f.n_tensors; i <= n; i++) {
        tiny_text bytes;
        qwen3_model *m = gg_model_of(&f, &bytes);
        gg_logits(m, i ? got : want);
        if (i) CHECK_MSG(memcmp(got, want, sizeof want) == 0, "%s has a factor: other logits", f.tensors[i - 1].name);
        qwen3_free(m);
        free(bytes.p);
        if (i < n) gg_give_factor(&f, i);
    }
    gg_free(&f);
    tiny_free(&t);
}

static void test_gguf_factors_refused(void) {
    qwen3_backend without = *qwen3i_cpu_backend();
    qwen3_model *m = NULL;
    qwen3_load_desc d;
    qwen3_file file;
    tiny_text bytes;
    tiny_model t;
    gg_file f;
    char err[256] = "";
    without.factors = 0;
    without.name = "small";
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    gg_give_factor(&f, 2);
    bytes = gg_write(&f);
    memset(&d, 0, sizeof d);
    file.name = "m.gguf"; file.data = bytes.p; file.size = bytes.n;
    d.files = &file; d.n_files = 1; d.backend = &without;
    CHECK_MSG(qwen3_load(&m, &d, err, sizeof err) == NOT && malformed_says(err, "m.gguf|blk.0.attn_q.scale|the small backend"), "%s", err);
    free(bytes.p);
    gg_free(&f);
    tiny_free(&t);
}

/* ---- what must be refused --------------------------------------------------------------------------------------- */
static void gg_case(const gg_file *f, const char *name, uint32_t kind, uint64_t v, qwen3_result want, const char *words) {
    gg_file copy = *f;                  /* shares the texts: only what is set is its own */
    int i;
    for (i = 0; i < f->n_keys && strcmp(f->keys[i].name, name) != 0; i++) {}
    memset(&copy.keys[i], 0, sizeof *copy.keys);
    copy.keys[i].name = name;
    if (i == f->n_keys) copy.n_keys++;
    if (kind == GG_STR) gg_set_string(&copy, name, (const char *)(uintptr_t)v);
    else gg_set(&copy, name, kind, v);
    gg_check(&copy, want, words);
    free(copy.keys[i].value.p);
}
#define GG_TEXT(s) GG_STR, (uint64_t)(uintptr_t)(s)

static void test_gguf_bad_keys(void) {
    static const char *const needed[] = {
        "qwen3.block_count", "qwen3.embedding_length", "qwen3.attention.head_count", "qwen3.feed_forward_length",
        "qwen3.context_length", "qwen3.attention.layer_norm_rms_epsilon", "qwen3.rope.freq_base", "general.architecture",
        "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
    };
    const uint64_t nan32 = 0x7FC00000u;
    tiny_model t;
    gg_file f;
    size_t i;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    for (i = 0; i < sizeof needed / sizeof *needed; i++) {
        char words[96];
        gg_file copy = f;
        int k;
        for (k = 0; strcmp(f.keys[k].name, needed[i]) != 0; k++) {}
        copy.keys[k] = copy.keys[--copy.n_keys];
        snprintf(words, sizeof words, "%s|missing", i == 8 ? "qwen3.vocab_size" : needed[i]);
        gg_check(&copy, BAD, words);
    }
    gg_case(&f, "general.architecture", GG_TEXT("qwen35moe"), NOT, "general.architecture|'qwen35moe'");
    gg_case(&f, "general.architecture", GG_U32, 3, BAD, "general.architecture|uint32|string");
    gg_case(&f, "general.type", GG_TEXT("adapter"), NOT, "general.type|adapter");
    gg_case(&f, "general.alignment", GG_TEXT("32"), BAD, "general.alignment|string|uint32");
    gg_case(&f, "general.alignment", GG_U32, 0, BAD, "general.alignment|0");
    gg_case(&f, "general.alignment", GG_U32, 48, BAD, "general.alignment|48");
    gg_case(&f, "general.alignment", GG_U32, 64, BAD, "starts at byte");
    gg_case(&f, "general.alignment", GG_U32, 0x80000000u, BAD, "starts at byte");
    gg_case(&f, "qwen3.block_count", GG_U32, 8000000, BAD, "qwen3.block_count|8000000");
    gg_case(&f, "qwen3.block_count", GG_I64, (uint64_t)-1, BAD, "qwen3.block_count|-1");
    gg_case(&f, "qwen3.block_count", GG_U64, (uint64_t)-1, BAD, "qwen3.block_count|possible");
    gg_case(&f, "qwen3.block_count", GG_U32, 2, BAD, "blk.1.attn_norm.weight|missing");
    gg_case(&f, "qwen3.block_count", GG_TEXT("1"), BAD, "qwen3.block_count|string|number");
    gg_case(&f, "qwen3.embedding_length", GG_U32, 8, BAD, "[264, 4]|[264, 8]");
    gg_case(&f, "qwen3.vocab_size", GG_U32, 263, BAD, "token_embd.weight|[264, 4]|[263, 4]");
    gg_case(&f, "qwen3.vocab_size", GG_U32, 100, BAD, "eos_token_id|257|100");
    gg_case(&f, "qwen3.attention.head_count", GG_U32, 3, BAD, "blk.0.attn_output.weight|[4, 4]|[4, 6]");
    gg_case(&f, "qwen3.attention.head_count_kv", GG_U32, 0, BAD, "head_count_kv|0");
    gg_case(&f, "qwen3.attention.value_length", GG_U32, 4, NOT, "value_length|4");
    gg_case(&f, "qwen3.rope.dimension_count", GG_U32, 1, NOT, "dimension_count|1");
    gg_case(&f, "qwen3.pooling_type", GG_U32, 1, NOT, "pooling_type|1");
    gg_case(&f, "qwen3.rope.scaling.type", GG_TEXT("longrope"), NOT, "rope.scaling.type");
    gg_case(&f, "qwen3.rope.freq_base", GG_F32, nan32, BAD, "rope.freq_base");
    gg_case(&f, "qwen3.attention.layer_norm_rms_epsilon", GG_F32, nan32, BAD, "epsilon");
    gg_case(&f, "tokenizer.ggml.model", GG_TEXT("llama"), NOT, "tokenizer.ggml.model|llama|gpt2");
    gg_case(&f, "tokenizer.ggml.pre", GG_TEXT("qwen35"), NOT, "tokenizer.ggml.pre|qwen35");
    gg_case(&f, "tokenizer.ggml.eos_token_id", GG_U32, 264, BAD, "eos_token_id|264");
    gg_case(&f, "tokenizer.ggml.eos_token_id", GG_I32, (uint64_t)-1, BAD, "eos_token_id|-1");
    gg_case(&f, "tokenizer.ggml.tokens", GG_TEXT("a"), BAD, "tokens|string|array of string");
    gg_case(&f, "tokenizer.chat_template", GG_U32, 1, BAD, "chat_template|uint32");
    gg_case(&f, "general.sampling.temp", GG_TEXT("hot"), BAD, "general.sampling.temp|string");
    gg_case(&f, "split.no", GG_U16, 1, BAD, "part 2");
    gg_case(&f, "split.count", GG_U16, 2, BAD, "split.count|2|-00001-of-00002.gguf");
    gg_case(&f, "split.count", GG_U16, 60000, NOT, "split.count|60000");
    gg_case(&f, "split.tensors.count", GG_I32, 14, BAD, "split.tensors.count|14|13");
    gg_free(&f);
    tiny_free(&t);
}

static void test_gguf_bad_tokens(void) {
    tiny_model t;
    gg_file f;
    tiny_text *a;
    int i;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    a = gg_set_array(&f, "tokenizer.ggml.merges", GG_STR, 1);
    gg_string(a, "a zz", 4);
    gg_check(&f, BAD, "merge 0|\"zz\"|not there");
    a = gg_set_array(&f, "tokenizer.ggml.merges", GG_STR, 1);
    gg_string(a, "ab", 2);
    gg_check(&f, BAD, "merge 0|two parts");
    gg_set_array(&f, "tokenizer.ggml.merges", GG_I32, 0);
    gg_check(&f, BAD, "merges|array of int32|array of string");
    gg_make_tokens(&f);
    a = gg_set_array(&f, "tokenizer.ggml.token_type", GG_F32, 264);
    for (i = 0; i < 264; i++) gg_number(a, 0, 4);
    gg_check(&f, BAD, "token_type|array of float32|array of int32");
    a = gg_set_array(&f, "tokenizer.ggml.token_type", GG_I32, 263);
    for (i = 0; i < 263; i++) gg_number(a, 1, 4);
    gg_check(&f, BAD, "token_type|263|264");
    a = gg_set_array(&f, "tokenizer.ggml.token_type", GG_I32, 264);
    for (i = 0; i < 264; i++) gg_number(a, 7, 4);
    gg_check(&f, BAD, "token_type|token 0|7");
    gg_make_tokens(&f);
    a = gg_set_array(&f, "tokenizer.ggml.tokens", GG_STR, 264);
    for (i = 0; i < 264; i++) gg_string(a, "a", 1);
    gg_check(&f, BAD, "\"a\"|twice");
    a = gg_set_array(&f, "tokenizer.ggml.tokens", GG_STR, 264);
    for (i = 0; i < 264; i++) gg_string(a, "", 0);
    gg_check(&f, BAD, "token 0 is empty");
    gg_free(&f);
    tiny_free(&t);
}

/* One tensor with something wrong; what was right is put back. */
static void test_gguf_bad_tensors(void) {
    static const uint64_t huge = (uint64_t)1 << 62, offset = 0x7FFFFFFFFFFFFFC0u;
    tiny_model t;
    gg_tensor *w, was;
    gg_file f;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    w = gg_tensor_at(&f, "blk.0.attn_q.weight");
    was = *w;
    w->rank = 5; gg_check(&f, BAD, "attn_q|5 dimensions"); *w = was;
    w->rank = 0; gg_check(&f, BAD, "attn_q|[]|[4, 4]"); *w = was;
    w->dims[1] = 0; gg_check(&f, BAD, "attn_q|dimension of 0"); *w = was;
    w->dims[1] = (uint64_t)-1; gg_check(&f, BAD, "attn_q|dimension of -1"); *w = was;
    w->dims[0] = huge; w->dims[1] = 16; gg_check(&f, BAD, "attn_q|overflows"); *w = was;
    w->dims[1] = huge / 16; gg_check(&f, BAD, "attn_q|outside the file"); *w = was;
    w->dims[1] = 3; gg_check(&f, BAD, "attn_q|[3, 4]|[4, 4]"); *w = was;
    w->rank = 3; w->dims[2] = 1; gg_check(&f, BAD, "attn_q|[1, 4, 4]|[4, 4]"); *w = was;
    w->type = 12; gg_check(&f, BAD, "attn_q|4 elements|Q4_K"); *w = was;
    w->type = 4; gg_check(&f, NOT, "attn_q|type 4"); *w = was;
    w->type = 0xFFFFFFFFu; gg_check(&f, NOT, "attn_q|type 4294967295"); *w = was;
    w->type = 25; gg_check(&f, NOT, "attn_q|I16"); *w = was;
    w->offset = 8; gg_check(&f, BAD, "attn_q|starts at byte 8"); *w = was;
    w->offset = 0; gg_check(&f, BAD, "attn_q|starts at byte 0"); *w = was;
    w->offset = offset; gg_check(&f, BAD, "attn_q|starts at byte 9223372036854775744"); *w = was;
    snprintf(w->name, sizeof w->name, "blk.0.attn_k.weight"); gg_check(&f, BAD, "attn_k.weight|twice"); *w = was;
    memset(w->name, 'x', 65); w->name[65] = 0; gg_check(&f, BAD, "65 bytes"); *w = was;
    w->name[0] = 0; gg_check(&f, BAD, "name of 0 bytes"); *w = was;
    snprintf(w->name, sizeof w->name, "blk.0.attn_p.weight"); gg_check(&f, BAD, "blk.0.attn_q.weight|missing"); *w = was;
    gg_add(&f, "blk.0.attn_q.bias", 0, 1, 0, "\0\0\0", 4); gg_check(&f, NOT, "attn_q.bias|biases");
    free(f.tensors[--f.n_tensors].data.p);
    gg_add(&f, "blk.0.attn_q.scale", 0, 1, 0, "\0\0\x80\x3F", 4); gg_check(&f, GOOD, "");
    w = gg_tensor_at(&f, "blk.0.attn_q.scale");
    w->data.p[3] = 0x40; w->data.p[2] = 0; gg_check(&f, GOOD, "");          /* 2, 0, infinity, NaN */
    w->data.p[3] = 0; gg_check(&f, BAD, "attn_q.scale|0, NaN");
    memcpy(w->data.p, "\0\0\x80\x7F", 4); gg_check(&f, BAD, "attn_q.scale|Inf");
    memcpy(w->data.p, "\0\0\xC0\x7F", 4); gg_check(&f, BAD, "attn_q.scale|NaN");
    w->type = 26; gg_check(&f, NOT, "attn_q.scale|I32|F32"); w->type = 0;
    w->rank = 2; w->dims[1] = 1; gg_check(&f, BAD, "attn_q.scale|[1, 1], not [1]"); w->rank = 1;
    snprintf(w->name, sizeof w->name, "blk.0.attn_x.scale"); gg_check(&f, NOT, "attn_x.scale|multiplies none");
    gg_free(&f);
    tiny_free(&t);
}

/* Numbers in the header: the file's first bytes, as they are and not */
static void test_gguf_bad_header(void) {
    char words[64], err[512];
    static const uint32_t versions[] = {0, 1, 4, 0x03000000u, 0xFFFFFFFFu};
    static const uint64_t counts[] = {(uint64_t)-1, (uint64_t)1 << 63, 1000000, (uint64_t)1 << 32};
    tiny_text file = {NULL, 0};
    tiny_model t;
    gg_file f;
    gg_key *k;
    int i;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    for (i = 0; i < 5; i++) {
        f.version = versions[i];
        snprintf(words, sizeof words, i == 3 ? "version %lu|big-endian" : "version %lu", (unsigned long)versions[i]);
        gg_check(&f, NOT, words);
    }
    f.version = 3;
    for (i = 0; i < 4; i++) { f.said_keys = counts[i]; gg_check(&f, BAD, "keys cannot be in"); }
    f.said_keys = GG_AUTO;
    for (i = 0; i < 4; i++) { f.said_tensors = counts[i]; gg_check(&f, BAD, "tensors cannot be in"); }
    f.said_tensors = GG_AUTO;
    k = gg_at(&f, "x", GG_STR);
    gg_number(&k->value, (uint64_t)-1, 8); gg_check(&f, BAD, "'x'|ends in");
    k = gg_at(&f, "x", GG_STR);
    gg_number(&k->value, (uint64_t)1 << 63, 8); gg_check(&f, BAD, "'x'|ends in");
    gg_set_array(&f, "x", GG_ARR, 1); gg_check(&f, BAD, "'x'|array of arrays");
    gg_set_array(&f, "x", GG_U64, (uint64_t)1 << 61); gg_check(&f, BAD, "'x'|ends in");
    gg_set_array(&f, "x", GG_STR, (uint64_t)-1); gg_check(&f, BAD, "'x'|ends in");
    gg_set_array(&f, "x", 13, 1); gg_check(&f, BAD, "'x'|type 13|unknown");
    k = gg_at(&f, "x", GG_F64 + 1); gg_check(&f, BAD, "'x'|type 13|unknown");
    gg_at(&f, "x", GG_U8)->name = ""; gg_number(&f.keys[f.n_keys - 1].value, 0, 1); gg_check(&f, BAD, "key of 0 bytes");
    f.keys[f.n_keys - 1].name = "qwen3.block_count"; gg_check(&f, BAD, "qwen3.block_count|twice");
    gg_free(&f);
    tiny_append(&file, "GGML\3\0\0\0", 8);
    CHECK(gg_load_bytes(&file, err) == BAD && strstr(err, "not a GGUF file"));
    file.n = 0;
    CHECK(gg_load_bytes(&file, err) == BAD && strstr(err, "not a GGUF file"));
    free(file.p);
    tiny_free(&t);
}

/* Cut off at each byte, the file is never a model. The last tensor's padding may be missing. */
static void test_gguf_truncated(void) {
    tiny_model t;
    tiny_text file;
    gg_file f;
    char err[512];
    size_t n, whole, step = test_short ? 17 : 1;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    file = gg_write(&f);
    whole = file.n;
    for (n = 0; n < whole - 31; n += step) {
        file.n = n;
        CHECK_MSG(gg_load_bytes(&file, err) == BAD, "%lu bytes: %s", (unsigned long)n, err);
    }
    free(file.p);
    gg_free(&f);
    tiny_free(&t);
}

/* Matrices in blocks: cut off at each byte, and a bit of each byte inverted, scales and all. */
static void test_gguf_blocks(void) {
    tiny_text file;
    gg_file f;
    char err[512];
    size_t i, n, step = test_short ? 17 : 1;
    int loaded = 0;
    gg_make_blocks(&f);
    file = gg_write(&f);
    CHECK_MSG(gg_load_bytes(&file, err) == GOOD, "%s", err);
    for (i = 0, n = file.n; i + 32 < n; i += step) {
        const char was = file.p[i];
        file.n = i;
        CHECK_MSG(gg_load_bytes(&file, err) == BAD, "%lu bytes: %s", (unsigned long)i, err);
        file.n = n;
        file.p[i] = (char)(was ^ 1 << (i * 5 + i / 8) % 8);
        loaded += gg_load_bytes(&file, err) == GOOD;
        file.p[i] = was;
    }
    CHECK(loaded > 0);
    free(file.p);
    gg_free(&f);
}

/* A bit of each byte of the header inverted, by turns which: whatever comes of it is an error or runs. */
static void test_gguf_bits(void) {
    tiny_model t;
    tiny_text file;
    gg_file f;
    char err[512];
    size_t i, n, step = test_short ? 17 : 1;
    int loaded = 0, count = 0;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    file = gg_write(&f);
    n = file.n - 264 * 8;               /* the embedding is last */
    for (i = 0; i < n; i += step, count++) {
        const char bit = (char)(1 << (i * 5 + i / 8) % 8);
        file.p[i] = (char)(file.p[i] ^ bit);
        loaded += gg_load_bytes(&file, err) == QWEN3_OK;
        file.p[i] = (char)(file.p[i] ^ bit);
    }
    CHECK_MSG(loaded > 0 && loaded < count, "%d of %d load", loaded, count);
    free(file.p);
    gg_free(&f);
    tiny_free(&t);
}

static void test_gguf_bad_parts(void) {
    static const char *const names[] = {"q-00001-of-00003.gguf", "q-00002-of-00003.gguf", "q-00003-of-00003.gguf"};
    tiny_text parts[3], swapped[3];
    tiny_model t;
    gg_file f;
    char err[512];
    int i;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    gg_split(&f, parts);
    CHECK_MSG(gg_load_files(parts, names, 3, err) == GOOD, "%s", err);
    CHECK(gg_load_files(parts, names, 2, err) == NONE && strstr(err, names[2]));
    for (i = 0; i < 3; i++) swapped[i] = parts[i == 0 ? 0 : 3 - i];
    CHECK_MSG(gg_load_files(swapped, names, 3, err) == BAD && malformed_says(err, "q-00002-of-00003.gguf|part 3 of 3|not part 2"), "%s", err);
    swapped[1] = swapped[2] = parts[0];
    CHECK_MSG(gg_load_files(swapped, names, 3, err) == BAD && malformed_says(err, "q-00002-of-00003.gguf|part 1 of 3"), "%s", err);
    swapped[1] = parts[1];
    swapped[2].p = (char *)"";
    swapped[2].n = 0;
    CHECK_MSG(gg_load_files(swapped, names, 3, err) == BAD && malformed_says(err, "q-00003-of-00003.gguf|not a GGUF"), "%s", err);
    for (i = 0; i < 3; i++) {
        size_t n = parts[i].n;
        for (parts[i].n = 0; parts[i].n + 32 < n; parts[i].n += 97)
            CHECK_MSG(gg_load_files(parts, names, 3, err) == BAD && strstr(err, names[i]), "part %d of %lu bytes: %s", i + 1,
                      (unsigned long)parts[i].n, err);
        parts[i].n = n;
    }
    for (i = 0; i < 3; i++) free(parts[i].p);
    gg_free(&f);
    tiny_free(&t);
}

/* Memory that runs out at each allocation: an error, and nothing leaks. */
static void test_gguf_memory(void) {
    qwen3_file files[3];
    qwen3_load_desc d;
    tiny_text parts[3];
    tiny_model t;
    gg_file f;
    int i;
    tiny_make(&t, 0, 0);
    gg_make(&f, &t);
    gg_split(&f, parts);
    for (i = 0; i < 3; i++) { files[i].name = gg_part_names[i]; files[i].data = parts[i].p; files[i].size = parts[i].n; }
    memset(&d, 0, sizeof d);
    d.files = files;
    d.n_files = 3;
    check_load_without_memory(&d, "three parts");
    for (i = 0; i < 3; i++) free(parts[i].p);
    gg_free(&f);
    tiny_free(&t);
}

static void suite_gguf(void) {
    RUN(test_gguf_same_as_directory);
    RUN(test_gguf_forms);
    RUN(test_gguf_kinds);
    RUN(test_gguf_rank);
    RUN(test_gguf_sources);
#if !defined(_WIN32)
    RUN(test_gguf_path);
#endif
    RUN(test_gguf_of_gguf_py);
    RUN(test_gguf_bad_header);
    RUN(test_gguf_bad_keys);
    RUN(test_gguf_bad_tokens);
    RUN(test_gguf_bad_tensors);
    RUN(test_gguf_tokenizer);
    RUN(test_gguf_factors);
    RUN(test_gguf_factors_refused);
    RUN(test_gguf_bad_parts);
    RUN(test_gguf_truncated);
    RUN(test_gguf_blocks);
    RUN(test_gguf_bits);
    RUN(test_gguf_memory);
}
#undef BAD
#undef NOT
#undef NONE
#undef GOOD
#endif
