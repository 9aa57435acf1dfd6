/* A context lives long: tokens are generated, its caller shifts it, saves, restores, copies, cancels, at random.
   What each sequence must hold is kept beside it in a plain list, and now and then its logits are compared with
   those of the same tokens evaluated at once in a fresh context. */
#ifndef QWEN3_TESTS_LONG_RUN_H
#define QWEN3_TESTS_LONG_RUN_H
#include "tiny.h"
#include "short.h"

typedef struct long_run_result {
    int  ok;
    char what[256];
    long tokens, steps, shifts, restores, copies, cancels, bytes_first, bytes_last;
} long_run_result;

enum { LONG_SEQS = 3, LONG_CTX = 32, LONG_VOCAB = 264 };

typedef struct long_world {
    qwen3_ctx     *ctx, *fresh;
    qwen3_token    seq[LONG_SEQS][LONG_CTX];    /* what they must hold */
    int            len[LONG_SEQS];
    unsigned char *state;                       /* a saved one, and what it holds */
    uint64_t       state_size;
    qwen3_token    saved[LONG_CTX];
    int            n_saved;
    int            cancel_after;                /* polls until the cancel; 0: never */
    uint64_t       random;
    long           bytes;                       /* in use */
    long_run_result r;
} long_world;

static void *long_alloc(size_t size, void *user) { ((long_world *)user)->bytes += (long)size; return malloc(size); }
static void long_free(void *p, size_t size, void *user) { ((long_world *)user)->bytes -= (long)size; free(p); }
static int long_cancel(void *user) {
    long_world *w = (long_world *)user;
    return w->cancel_after > 0 && --w->cancel_after == 0;
}

static int long_below(long_world *w, int n) {
    w->random = w->random * 6364136223846793005u + 1442695040888963407u;
    return (int)((uint32_t)(w->random >> 33) % (uint32_t)n);
}

static void long_fail(long_world *w, const char *what, qwen3_result r) {
    if (w->r.ok)
        snprintf(w->r.what, sizeof w->r.what, "step %ld: %s: %s: %.100s", w->r.steps, what, qwen3_result_string(r),
                 qwen3_ctx_error(w->ctx));
    w->r.ok = 0;
}

/* Does the sequence hold what it must, and do its logits follow from that? */
static void long_check(long_world *w, int s) {
    const float *a, *b;
    if (seq_len(w->ctx, s) != w->len[s] ||
        memcmp(qwen3_seq_tokens(w->ctx, s, NULL), w->seq[s], (size_t)w->len[s] * sizeof(qwen3_token)) != 0) {
        long_fail(w, "a sequence holds other tokens", QWEN3_OK);
        return;
    }
    if (w->len[s] == 0) return;
    a = qwen3_logits(w->ctx, s);
    qwen3_seq_truncate(w->fresh, 0, 0);
    if (qwen3_sync(w->fresh, 0, w->seq[s], w->len[s], 0) != QWEN3_OK || (b = qwen3_logits(w->fresh, 0)) == NULL || !a ||
        memcmp(a, b, LONG_VOCAB * sizeof *a) != 0) long_fail(w, "logits have diverged", QWEN3_OK);
}

static void long_generate(long_world *w, int s) {
    qwen3_sampler sampler = qwen3_sampler_preset(QWEN3_THINKING, w->random);
    qwen3_token t;
    qwen3_result r;
    int i, n = 1 + long_below(w, 8);
    if (w->len[s] == LONG_CTX) {                /* full: keep the first four and the last half, as callers do */
        qwen3_token kept[LONG_CTX];
        memcpy(kept, w->seq[s], 4 * sizeof *kept);
        memcpy(kept + 4, w->seq[s] + LONG_CTX / 2, LONG_CTX / 2 * sizeof *kept);
        w->len[s] = 4 + LONG_CTX / 2;
        memcpy(w->seq[s], kept, (size_t)w->len[s] * sizeof *kept);
        r = qwen3_sync(w->ctx, s, kept, w->len[s], 0);
        if (r != QWEN3_OK) long_fail(w, "shift", r);
        w->r.shifts++;
    }
    for (i = 0; i < n; i++) {
        r = qwen3_next(w->ctx, s, &sampler, &t);
        if (r == QWEN3_ERR_CONTEXT_FULL || r == QWEN3_END) break;
        if (r != QWEN3_OK || w->len[s] >= LONG_CTX) { long_fail(w, "generate", r); return; }
        w->seq[s][w->len[s]++] = t;
        w->r.tokens++;
    }
}

static void long_append(long_world *w, int s, int cancelled) {
    qwen3_item item;
    qwen3_result r;
    int n = 1 + long_below(w, LONG_CTX / 2), i, len = w->len[s];
    if (len + n > LONG_CTX) return;
    for (i = 0; i < n; i++) w->seq[s][len + i] = long_below(w, 250);
    memset(&item, 0, sizeof item);
    item.seq = s;
    item.tokens = w->seq[s] + len;
    item.n = n;
    w->cancel_after = cancelled ? 1 + long_below(w, 6) : 0;
    r = qwen3_eval(w->ctx, &item, 1);
    w->cancel_after = 0;
    w->len[s] = r == QWEN3_STOPPED ? seq_len(w->ctx, s) : len + n;        /* the steps that were completed stay */
    w->r.cancels += r == QWEN3_STOPPED;
    w->r.tokens += w->len[s] - len;
    if (w->len[s] < len || w->len[s] > len + n || (r != QWEN3_OK && (r != QWEN3_STOPPED || !cancelled)))
        long_fail(w, "append", r);
}

static void long_save(long_world *w, int s) {
    qwen3_result r;
    w->state_size = state_size(w->ctx, s);
    free(w->state);
    w->state = (unsigned char *)malloc((size_t)w->state_size);
    r = state_save(w->ctx, s, w->state, w->state_size, NULL);
    if (r != QWEN3_OK) long_fail(w, "save", r);
    w->n_saved = w->len[s];
    memcpy(w->saved, w->seq[s], sizeof w->saved);
}

static void long_restore(long_world *w, int s, int damaged) {
    const size_t at = w->state_size ? (size_t)long_below(w, (int)w->state_size) : 0;
    qwen3_result r;
    if (!w->state) return;
    if (damaged) w->state[at] ^= 1;
    r = state_load(w->ctx, s, w->state, w->state_size);
    if (damaged) { w->state[at] ^= 1; if (r == QWEN3_OK) long_fail(w, "a damaged state was taken", r); return; }
    if (r != QWEN3_OK) long_fail(w, "restore", r);
    w->len[s] = w->n_saved;
    memcpy(w->seq[s], w->saved, sizeof w->saved);
    w->r.restores++;
}

static void long_step(long_world *w) {
    int s = long_below(w, LONG_SEQS), to = long_below(w, LONG_SEQS), what = long_below(w, 100);
    qwen3_result r = QWEN3_OK;
    w->r.steps++;
    if (w->len[s] == 0 || what < 15) long_append(w, s, what < 5);
    else if (what < 75) long_generate(w, s);
    else if (what < 80) { w->len[s] = long_below(w, w->len[s] + 1); r = qwen3_seq_truncate(w->ctx, s, w->len[s]); }
    else if (what < 85) long_save(w, s);
    else if (what < 90) long_restore(w, s, what == 89);
    else if (what < 95) {
        r = qwen3_seq_copy(w->ctx, to, s);
        w->len[to] = w->len[s];
        if (to != s) memcpy(w->seq[to], w->seq[s], sizeof w->seq[s]);
        w->r.copies++;
    } else long_check(w, s);
    if (r != QWEN3_OK) long_fail(w, "truncate or copy", r);
    if (w->r.steps == 100) w->r.bytes_first = w->bytes;
}

/* Until so many tokens are evaluated. */
static long_run_result long_run(long n_tokens, uint64_t seed) {
    tiny_model t;
    qwen3_file files[TINY_FILES];
    qwen3_load_desc d;
    qwen3_ctx_desc c;
    qwen3_model *model = NULL;
    long_world w;
    qwen3_result r;
    int s;
    memset(&w, 0, sizeof w);
    memset(&d, 0, sizeof d);
    memset(&c, 0, sizeof c);
    w.r.ok = 1;
    w.random = seed;
    tiny_make(&t, 0, 0);
    d.n_files = tiny_list(&t, files);
    d.files = files;
    d.allocator.alloc = c.allocator.alloc = long_alloc;
    d.allocator.free = c.allocator.free = long_free;
    d.allocator.user = c.allocator.user = c.cancel_user = &w;
    c.cancel = long_cancel;
    c.max_ctx = LONG_CTX;
    c.max_seqs = LONG_SEQS;
    c.prefill_chunk = 3;
    c.threads = 1;
    r = qwen3_load(&model, &d, w.r.what, sizeof w.r.what);
    if (r == QWEN3_OK) r = qwen3_ctx_create(&w.ctx, model, &c, w.r.what, sizeof w.r.what);
    c.max_seqs = 1;
    c.prefill_chunk = 0;
    c.cancel = NULL;
    if (r == QWEN3_OK) r = qwen3_ctx_create(&w.fresh, model, &c, w.r.what, sizeof w.r.what);
    if (r != QWEN3_OK) w.r.ok = 0;
    while (w.r.ok && w.r.tokens < n_tokens) long_step(&w);
    for (s = 0; w.r.ok && s < LONG_SEQS; s++) long_check(&w, s);
    w.r.bytes_last = w.bytes;
    if (w.r.ok && w.r.bytes_first && w.r.bytes_last != w.r.bytes_first) long_fail(&w, "memory has grown", QWEN3_OK);
    qwen3_ctx_free(w.ctx);
    qwen3_ctx_free(w.fresh);
    qwen3_free(model);
    if (w.r.ok && w.bytes != 0) { w.r.ok = 0; snprintf(w.r.what, sizeof w.r.what, "%ld bytes leak", w.bytes); }
    free(w.state);
    tiny_free(&t);
    return w.r;
}
#endif
