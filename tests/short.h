/* The shapes in which tests ask for a sequence's length, a token's id, and saved states in memory. */
#ifndef QWEN3_TESTS_SHORT_H
#define QWEN3_TESTS_SHORT_H
#include <string.h>
#if defined(__GNUC__)
  #define SHORT_HELPER static __attribute__((unused))
#else
  #define SHORT_HELPER static
#endif

SHORT_HELPER int seq_len(const qwen3_ctx *ctx, int seq) {
    int n = -7;
    qwen3_seq_tokens(ctx, seq, &n);
    return n;
}

/* -1: there is no such added token. */
SHORT_HELPER qwen3_token token_id(const qwen3_model *m, const char *added) {
    return m && m->tokenizer && added ? qwen3i_added_id(m->tokenizer, added) : -1;
}

SHORT_HELPER qwen3_state state_at(void *data, uint64_t size) {
    qwen3_state st;
    memset(&st, 0, sizeof st);
    st.data = data;
    st.size = size;
    return st;
}

SHORT_HELPER uint64_t state_size(qwen3_ctx *ctx, int seq) {
    qwen3_state st = state_at(NULL, 0);
    return qwen3_seq_save(ctx, seq, &st) == QWEN3_OK ? st.size : 0;
}

SHORT_HELPER qwen3_result state_save(qwen3_ctx *ctx, int seq, void *dst, uint64_t cap, uint64_t *written) {
    qwen3_state st = state_at(dst, cap);
    qwen3_result r = qwen3_seq_save(ctx, seq, &st);
    if (written) *written = st.size;
    return r;
}

SHORT_HELPER qwen3_result state_load(qwen3_ctx *ctx, int seq, const void *src, uint64_t size) {
    union { const void *in; void *out; } p;     /* only read */
    qwen3_state st;
    p.in = src;
    st = state_at(p.out, size);
    return qwen3_seq_load(ctx, seq, &st);
}
#endif
