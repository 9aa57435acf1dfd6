/* What the suites share: the data folder, reference arrays, models and contexts, a counting heap. */
#ifndef QWEN3_TESTS_FIXTURE_H
#define QWEN3_TESTS_FIXTURE_H
#include "test.h"
#include "short.h"
#include <math.h>

static const char *test_data = "tests/data";

/* ---- a heap that counts, checks sizes and can fail: behind QWEN3_MALLOC and behind the hooks ------ */
typedef struct test_heap {
    long calls;                 /* allocations asked for */
    long fail_at;               /* the one that fails, counted from 1; 0: none */
    long failed;                /* allocations refused */
    long live;                  /* blocks not yet freed */
    long bad;                   /* frees of a foreign block or with a wrong size */
    long bytes;                 /* in live blocks */
} test_heap;
static test_heap heap_default;  /* what the library's default allocator uses */

typedef struct heap_block { void *base; size_t size, check; } heap_block;   /* in front of each block, at a multiple of 16 */
#define HEAP_CHECK ((size_t)0x5AFE5AFE)
#define HEAP_MOST  ((size_t)1 << 30)                            /* nothing here needs a gigabyte */

#if defined(__GNUC__)           /* contexts of several threads may share a heap */
  #define HEAP_ADD(x, n) __atomic_add_fetch(&(x), (n), __ATOMIC_RELAXED)
#else
  #define HEAP_ADD(x, n) ((x) += (n))
#endif

static void *heap_alloc(size_t size, void *user) {
    test_heap *h = (test_heap *)user;
    heap_block *b;
    char *base, *block;
    if (HEAP_ADD(h->calls, 1) == h->fail_at) { HEAP_ADD(h->failed, 1); return NULL; }
    base = size < HEAP_MOST ? (char *)malloc(sizeof *b + 15 + size) : NULL;
    if (!base) return NULL;
    block = base + sizeof *b;           /* not every malloc aligns to 16 bytes */
    block += (16 - (uintptr_t)block % 16) % 16;
    b = (heap_block *)(void *)block - 1;
    b->base = base;
    b->size = size;
    b->check = HEAP_CHECK ^ size;
    memset(b + 1, 0xA5, size);  /* nobody may count on zeros */
    HEAP_ADD(h->live, 1);
    HEAP_ADD(h->bytes, (long)size);
    return b + 1;
}

#if defined(__GNUC__)           /* inlined where another allocator's block could come from, compilers warn */
__attribute__((noinline))
#endif
static void heap_release(void *p, size_t size, int size_known, test_heap *h) {
    heap_block *b = (heap_block *)p - 1;
    void *base;
    if (!p) return;
    if (b->check != (HEAP_CHECK ^ b->size) || (size_known && b->size != size)) { HEAP_ADD(h->bad, 1); return; }
    HEAP_ADD(h->live, -1);
    HEAP_ADD(h->bytes, -(long)b->size);
    base = b->base;
    memset(b, 0xDD, sizeof *b + b->size);
    free(base);
}
static void heap_free(void *p, size_t size, void *user) { heap_release(p, size, 1, (test_heap *)user); }

static void *test_malloc(size_t size) { return heap_alloc(size, &heap_default); }
static void test_free(void *p) { heap_release(p, 0, 0, &heap_default); }

/* ---- files --------------------------------------------------------------------------------------- */
/* The whole file with a zero after it, or NULL. free() it. */
static unsigned char *read_file(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    unsigned char *data = NULL;
    long n;
    if (!f) return NULL;
    if (fseek(f, 0, SEEK_END) == 0 && (n = ftell(f)) >= 0 && fseek(f, 0, SEEK_SET) == 0 &&
        (data = (unsigned char *)malloc((size_t)n + 1)) != NULL) {
        *size = fread(data, 1, (size_t)n, f);
        data[*size] = 0;
    }
    fclose(f);
    return data;
}

/* ---- reference arrays: the format is described in tools/make_reference.py ------------------------- */
enum { REF_I32 = 1, REF_F32 = 2, REF_TEXT = 3 };
typedef struct ref_file { unsigned char *data; size_t size; } ref_file;

static int ref_open(ref_file *r, const char *path) {
    r->data = read_file(path, &r->size);
    return CHECK_MSG(r->data && r->size >= 8 && memcmp(r->data, "QWEN3REF", 8) == 0, "%s: no reference data", path);
}

static void ref_close(ref_file *r) { free(r->data); r->data = NULL; }

static uint32_t ref_u32(const unsigned char *p) {
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

/* The elements of an array, or NULL. */
static const void *ref_find(const ref_file *r, const char *name, uint32_t type, int *count) {
    size_t at = 8;
    while (r->data && at + 32 <= r->size) {
        uint32_t t = ref_u32(r->data + at + 24), n = ref_u32(r->data + at + 28);
        if (t == type && strncmp((const char *)r->data + at, name, 24) == 0) {
            *count = (int)n;
            return r->data + at + 32;
        }
        at += 32 + (t == REF_TEXT ? ((size_t)n + 3) / 4 * 4 : (size_t)n * 4);
    }
    *count = 0;
    return NULL;
}

/* The array "<i>.<name>". */
static const void *ref_item(const ref_file *r, int i, const char *name, uint32_t type, int *count) {
    char full[32];
    snprintf(full, sizeof full, "%d.%s", i, name);
    return ref_find(r, full, type, count);
}

static const float *ref_f32(const ref_file *r, int i, const char *name, int *count) {
    return (const float *)ref_item(r, i, name, REF_F32, count);
}
static const qwen3_token *ref_tokens(const ref_file *r, int i, const char *name, int *count) {
    return (const qwen3_token *)ref_item(r, i, name, REF_I32, count);
}

/* A text, as a string to free(). */
static char *ref_text(const ref_file *r, const char *name) {
    int n;
    const void *p = ref_find(r, name, REF_TEXT, &n);
    char *s = (char *)malloc((size_t)n + 1);
    if (!CHECK_MSG(p != NULL, "no text %s", name)) n = 0;
    if (n) memcpy(s, p, (size_t)n);
    s[n] = '\0';
    return s;
}

/* ---- models ---------------------------------------------------------------------------------------- */
static const char *const model_names[] = {
    "plain", "hot", "sharded", "odd", "mixed", "yarn", "theta", "controls", "chat"
};
#define N_MODELS ((int)(sizeof model_names / sizeof *model_names))

static qwen3_allocator heap_allocator(test_heap *h) {
    qwen3_allocator a;
    memset(h, 0, sizeof *h);
    a.alloc = heap_alloc;
    a.free = heap_free;
    a.user = h;
    return a;
}

/* Memory that runs out at each allocation of a model's loading in turn: an error, and nothing leaks. */
static void check_load_without_memory(const qwen3_load_desc *desc, const char *what) {
    long at;
    for (at = 1; at < 1000; at++) {
        test_heap h;
        qwen3_load_desc d = *desc;
        qwen3_model *m = NULL;
        char err[512] = "";
        qwen3_result r;
        d.allocator = heap_allocator(&h);
        h.fail_at = at;
        r = qwen3_load(&m, &d, err, sizeof err);
        if (h.failed == 0) { CHECK(r == QWEN3_OK && at > 10); qwen3_free(m); break; }
        CHECK_MSG(r == QWEN3_ERR_MEMORY && !m && err[0], "%s, call %ld: %s: '%s'", what, at, qwen3_result_string(r), err);
        CHECK_MSG(h.live == 0 && h.bad == 0, "%s, call %ld: %ld blocks leak", what, at, h.live);
    }
    CHECK(at < 1000);
}

static void model_path(char *path, size_t cap, const char *model, const char *file) {
    snprintf(path, cap, "%s/models/%s%s%s", test_data, model, file[0] ? "/" : "", file);
}

typedef struct fixture { qwen3_model *model; qwen3_info info; ref_file ref; } fixture;

static int fixture_open_on(fixture *f, const char *name, const qwen3_backend *backend) {
    char path[1024], err[512] = "";
    qwen3_load_desc desc;
    qwen3_result r;
    memset(f, 0, sizeof *f);
    memset(&desc, 0, sizeof desc);
    model_path(path, sizeof path, name, "reference.ref");
    if (!ref_open(&f->ref, path)) return 0;
    model_path(path, sizeof path, name, "");
    desc.path = path;
    desc.backend = backend;
    r = qwen3_load(&f->model, &desc, err, sizeof err);
    if (!CHECK_MSG(r == QWEN3_OK, "%s: %s: %s", path, qwen3_result_string(r), err)) { ref_close(&f->ref); return 0; }
    f->info = qwen3_get_info(f->model);
    return 1;
}

static int fixture_open(fixture *f, const char *name) { return fixture_open_on(f, name, NULL); }

static void fixture_close(fixture *f) {
    qwen3_free(f->model);
    ref_close(&f->ref);
    memset(f, 0, sizeof *f);
}

/* The files of a model in memory, for qwen3_load_desc.files and to change them. */
typedef struct model_files { qwen3_file file[8]; unsigned char *owned[8]; int n; } model_files;

static int model_files_read(model_files *m, const char *model) {
    static const char *const names[] = {
        "config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json",
        "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"
    };
    char path[1024];
    int i;
    memset(m, 0, sizeof *m);
    for (i = 0; i < 8; i++) {
        size_t size = 0;
        unsigned char *data;
        model_path(path, sizeof path, model, names[i]);
        data = read_file(path, &size);
        if (!data) continue;
        m->owned[m->n] = data;
        m->file[m->n].name = names[i];
        m->file[m->n].data = data;
        m->file[m->n++].size = size;
    }
    return CHECK_MSG(m->n >= 2, "%s: no model there", model);
}

static void model_files_free(model_files *m) {
    int i;
    for (i = 0; i < m->n; i++) free(m->owned[i]);
    memset(m, 0, sizeof *m);
}

/* Replace the first occurrence of a text in one of the files. */
static int model_files_edit(model_files *m, const char *name, const char *from, const char *to) {
    int i;
    for (i = 0; i < m->n; i++) {
        char *old = (char *)m->owned[i], *hit, *made;
        size_t n;
        if (strcmp(m->file[i].name, name) != 0) continue;
        hit = strstr(old, from);
        if (!hit) break;
        n = m->file[i].size - strlen(from) + strlen(to);
        made = (char *)malloc(n + 1);
        memcpy(made, old, (size_t)(hit - old));
        memcpy(made + (hit - old), to, strlen(to));
        strcpy(made + (hit - old) + strlen(to), hit + strlen(from));
        free(old);
        m->owned[i] = (unsigned char *)made;
        m->file[i].data = made;
        m->file[i].size = n;
        return 1;
    }
    return CHECK_MSG(0, "%s: there is no '%s' to replace", name, from);
}

static qwen3_model *model_files_load(const model_files *m) {
    qwen3_load_desc desc;
    qwen3_model *model = NULL;
    char err[512] = "";
    qwen3_result r;
    memset(&desc, 0, sizeof desc);
    desc.files = m->file;
    desc.n_files = m->n;
    r = qwen3_load(&model, &desc, err, sizeof err);
    CHECK_MSG(r == QWEN3_OK, "load from memory: %s: %s", qwen3_result_string(r), err);
    return model;
}

/* ---- contexts -------------------------------------------------------------------------------------- */
static qwen3_ctx_desc ctx_desc(int max_ctx, int max_seqs, int chunk, int kv_type) {
    qwen3_ctx_desc d;
    memset(&d, 0, sizeof d);
    d.max_ctx = max_ctx;
    d.max_seqs = max_seqs;
    d.prefill_chunk = chunk;
    d.kv_type = kv_type;
    d.threads = 1;
    return d;
}

static qwen3_ctx *ctx_open_desc(const qwen3_model *model, const qwen3_ctx_desc *d) {
    qwen3_ctx *ctx = NULL;
    char err[512] = "";
    qwen3_result r = qwen3_ctx_create(&ctx, model, d, err, sizeof err);
    CHECK_MSG(r == QWEN3_OK && ctx, "qwen3_ctx_create: %s: %s", qwen3_result_string(r), err);
    return ctx;
}

static qwen3_ctx *ctx_open(const qwen3_model *model, int max_ctx, int max_seqs, int chunk, int kv_type) {
    qwen3_ctx_desc d = ctx_desc(max_ctx, max_seqs, chunk, kv_type);
    return ctx_open_desc(model, &d);
}

#define CHECK_OK(ctx, call) check_ok((call), (ctx), #call, __FILE__, __LINE__)
static int check_ok(int r, const qwen3_ctx *ctx, const char *what, const char *file, int line) {
    return test_check(r == QWEN3_OK, file, line, "%s: %s: %s", what, qwen3_result_string((qwen3_result)r), qwen3_ctx_error(ctx));
}

static qwen3_item item_of(int seq, const qwen3_token *tokens, int n) {
    qwen3_item it;
    memset(&it, 0, sizeof it);
    it.seq = seq;
    it.tokens = tokens;
    it.n = n;
    return it;
}

/* Append tokens to a sequence; logits [n, n_vocab] may be NULL. */
static qwen3_result eval(qwen3_ctx *ctx, int seq, const qwen3_token *tokens, int n, float *all_logits) {
    qwen3_item it = item_of(seq, tokens, n);
    it.all_logits = all_logits;
    return qwen3_eval(ctx, &it, 1);
}

static float *floats(size_t n) {
    float *p = (float *)malloc((n ? n : 1) * sizeof *p);
    if (p) memset(p, 0x7F, n * sizeof *p);     /* large values: what is never written shows */
    return p;
}

/* The logits at every position of a prompt, evaluated plainly: [n, n_vocab] to free(). What all else must equal. */
static float *plain_logits(const qwen3_model *model, const qwen3_token *tokens, int n, int kv_type) {
    qwen3_ctx *ctx = ctx_open(model, n, 1, 0, kv_type);
    float *out = floats((size_t)n * (size_t)qwen3_get_info(model).n_vocab);
    if (ctx) CHECK_OK(ctx, eval(ctx, 0, tokens, n, out));
    qwen3_ctx_free(ctx);
    return out;
}

static int same_floats(const float *a, const float *b, int n) {
    return a && b && memcmp(a, b, (size_t)n * sizeof *a) == 0;
}

/* Do the logits that follow the sequence equal this row, bit for bit? */
static int same_logits(qwen3_ctx *ctx, int seq, const float *row, int n_vocab) {
    return same_floats(qwen3_logits(ctx, seq), row, n_vocab);
}

/* A small generator for tests, so that nothing depends on the C library's. */
static uint32_t test_random(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}
static int random_below(uint64_t *state, int n) { return (int)(test_random(state) % (uint32_t)n); }

static void random_tokens(uint64_t *state, qwen3_token *out, int n, int n_vocab) {
    int i;
    for (i = 0; i < n; i++) out[i] = random_below(state, n_vocab);
}
#endif
