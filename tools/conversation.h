/* conversation.h - the messages of a chat, and the file that /save and /load keep them in: each as its role, its
   length and its text, then the evaluated sequence, so that nothing need be evaluated again. Needs qwen3.h, cli.h. */
#ifndef QWEN3_CONVERSATION_H
#define QWEN3_CONVERSATION_H

typedef struct conversation { qwen3_msg *msgs; int n, cap; } conversation;     /* texts are copies of its own */

static void conversation_add(conversation *v, qwen3_role role, const char *text) {
    cli_string copy = {NULL, 0, 0};
    if (v->n == v->cap) {
        v->cap = v->cap * 2 + 16;
        v->msgs = (qwen3_msg *)realloc(v->msgs, (size_t)v->cap * sizeof *v->msgs);
        if (!v->msgs) cli_die(3, "out of memory", NULL);
    }
    cli_append(&copy, text, strlen(text));
    memset(&v->msgs[v->n], 0, sizeof *v->msgs);
    v->msgs[v->n].role = role;
    v->msgs[v->n++].text = copy.bytes;
}

static void conversation_cut(conversation *v, int keep) {
    while (v->n > keep) free((char *)(uintptr_t)v->msgs[--v->n].text);
}

static void conversation_free(conversation *v) {
    conversation_cut(v, 0);
    free(v->msgs);
}

/* The messages and sequence 0 to a file, and a line about it to stderr */
static void conversation_save(const conversation *v, qwen3_ctx *ctx, const char *path) {
    qwen3_state s = {NULL, NULL, 0, NULL, NULL, 0};
    FILE *f = fopen(path, "wb");
    int i, ok = f && qwen3_seq_save(ctx, 0, &s) == QWEN3_OK && (s.data = malloc((size_t)s.size)) != NULL &&
                qwen3_seq_save(ctx, 0, &s) == QWEN3_OK;
    if (ok) fprintf(f, "qwen3-chat %d\n", v->n);
    for (i = 0; ok && i < v->n; i++) {
        const qwen3_msg *m = &v->msgs[i];
        ok = fprintf(f, "%d %lu\n%s\n", (int)m->role, (unsigned long)strlen(m->text), m->text) > 0;
    }
    ok = ok && fwrite(s.data, 1, (size_t)s.size, f) == s.size;
    if (f) ok = fclose(f) == 0 && ok;
    free(s.data);
    fprintf(stderr, "%s %s\n", ok ? "saved to" : "cannot save to", path);
}

/* And back. What was there is gone once the file is known to be a saved chat. */
static void conversation_load(conversation *v, qwen3_ctx *ctx, const char *path) {
    FILE *f = fopen(path, "rb");
    int role = 0, count = 0, ok = f && fscanf(f, "qwen3-chat %d", &count) == 1;
    unsigned long n = 0;
    cli_string s = {NULL, 0, 0};
    qwen3_state state = {NULL, NULL, 0, NULL, NULL, 0};
    if (ok) conversation_cut(v, 0);
    while (ok && v->n < count) {
        ok = fscanf(f, "%d %lu", &role, &n) == 2 && getc(f) == '\n' && role >= 0 && role <= QWEN3_TOOL;
        if (ok) s = cli_read(f, n);
        ok = ok && s.n == n;
        if (ok) conversation_add(v, (qwen3_role)role, s.bytes);
        free(s.bytes);
        s.bytes = NULL, s.n = s.cap = 0;
    }
    if (ok && getc(f) == '\n' && getc(f) != EOF) { fseek(f, -1, SEEK_CUR); s = cli_read(f, CLI_ALL); }
    state.data = s.bytes;
    state.size = s.n;
    if (!ok) fprintf(stderr, "cannot read %s, or it is not a saved chat\n", path);
    else if (qwen3_seq_load(ctx, 0, &state) != QWEN3_OK)
        fprintf(stderr, "the messages were loaded, the evaluated state was not: %s\n", qwen3_ctx_error(ctx));
    else fprintf(stderr, "loaded %s: %d messages\n", path, count);
    free(s.bytes);
    if (f) fclose(f);
}
#endif
