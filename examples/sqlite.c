/* sqlite.c - a language model in SQL: an extension for SQLite.
   cc -O2 -fPIC -shared -I. examples/sqlite.c -o qwen3_sqlite.so -lm -lpthread
   sqlite3> .load ./qwen3_sqlite
   sqlite3> SELECT qwen3_open('demo');                         -- a model's directory, once
   sqlite3> SELECT qwen3_ask('You keep a shop.', question) FROM questions;
   sqlite3> SELECT text FROM notes ORDER BY qwen3_distance(vector, qwen3_vector('rope')) LIMIT 3;  */
#include <sqlite3ext.h>
SQLITE_EXTENSION_INIT1
#define QWEN3_STATIC
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"

typedef struct state { qwen3_model *model; qwen3_ctx *ctx; sqlite3_str *answer; } state;

static void state_close(void *p) {
    state *s = (state *)p;
    qwen3_ctx_free(s->ctx);
    qwen3_free(s->model);
    s->ctx = NULL, s->model = NULL;
}
static void state_free(void *p) { state_close(p); sqlite3_free(p); }
static const char *text_of(sqlite3_value *v) {
    return v && sqlite3_value_text(v) ? (const char *)sqlite3_value_text(v) : "";
}

static state *opened(sqlite3_context *sql) {
    state *s = (state *)sqlite3_user_data(sql);
    if (!s->ctx) sqlite3_result_error(sql, "call qwen3_open first", -1);
    return s->ctx ? s : NULL;
}

static void sql_open(sqlite3_context *sql, int n, sqlite3_value **v) {
    state *s = (state *)sqlite3_user_data(sql);
    qwen3_load_desc load;
    char err[256] = "";
    (void)n;
    memset(&load, 0, sizeof load);
    load.path = text_of(v[0]);
    state_close(s);
    if (qwen3_load(&s->model, &load, err, sizeof err) != QWEN3_OK ||
        qwen3_ctx_create(&s->ctx, s->model, NULL, err, sizeof err) != QWEN3_OK)
        sqlite3_result_error(sql, err, -1);
}

static int hear(const char *utf8, int n_bytes, int kind, void *user) {
    if (kind == QWEN3_TEXT_ANSWER) sqlite3_str_append(((state *)user)->answer, utf8, n_bytes);
    return sqlite3_str_errcode(((state *)user)->answer);
}

static void sql_ask(sqlite3_context *sql, int n, sqlite3_value **v) {
    state *s = opened(sql);
    qwen3_msg msgs[2] = {{QWEN3_SYSTEM, text_of(v[0]), NULL, NULL, 0},
                         {QWEN3_USER, text_of(v[1]), NULL, NULL, 0}};
    qwen3_chat_desc chat = {msgs, 2, NULL, 0, QWEN3_CHAT_NO_THINK, 0, NULL, NULL};
    qwen3_gen_desc gen;
    (void)n;
    if (!s) return;
    memset(&gen, 0, sizeof gen);
    gen.max_tokens = 500; gen.on_text = hear; gen.user = s;
    s->answer = sqlite3_str_new(NULL);
    if (qwen3_chat(s->ctx, 0, &chat, &gen) < 0) sqlite3_result_error(sql, qwen3_ctx_error(s->ctx), -1);
    else sqlite3_result_text(sql, sqlite3_str_value(s->answer), -1, SQLITE_TRANSIENT);
    sqlite3_free(sqlite3_str_finish(s->answer));
}

static void sql_vector(sqlite3_context *sql, int n, sqlite3_value **v) {
    state *s = opened(sql);
    const int size = s ? qwen3_get_info(s->model).n_embd * (int)sizeof(float) : 0;
    float *vector = s ? (float *)sqlite3_malloc(size) : NULL;
    if (!vector) return;
    if (qwen3_embed(s->ctx, 0, n > 1 ? text_of(v[1]) : NULL, n > 0 ? text_of(v[0]) : "", vector) == QWEN3_OK)
        sqlite3_result_blob(sql, vector, size, sqlite3_free);
    else { sqlite3_result_error(sql, qwen3_ctx_error(s->ctx), -1); sqlite3_free(vector); }
}

static void sql_distance(sqlite3_context *sql, int n, sqlite3_value **v) {     /* 0: the same; 2: opposite */
    const float *a = (const float *)sqlite3_value_blob(v[0]), *b = (const float *)sqlite3_value_blob(v[1]);
    int i, count = sqlite3_value_bytes(v[0]) / (int)sizeof(float);
    double sum = 0;
    (void)n;
    for (i = 0; i < count && sqlite3_value_bytes(v[1]) == 4 * count; i++) sum += (double)a[i] * b[i];
    if (i == count) sqlite3_result_double(sql, 1 - sum);
    else sqlite3_result_error(sql, "vectors of two sizes", -1);
}

int sqlite3_extension_init(sqlite3 *db, char **err, const sqlite3_api_routines *api) {
    state *s;
    (void)err;
    SQLITE_EXTENSION_INIT2(api);
    s = (state *)sqlite3_malloc(sizeof *s);
    if (!s) return SQLITE_NOMEM;
    memset(s, 0, sizeof *s);
    sqlite3_create_function_v2(db, "qwen3_ask", 2, SQLITE_UTF8, s, sql_ask, NULL, NULL, NULL);
    sqlite3_create_function_v2(db, "qwen3_vector", -1, SQLITE_UTF8, s, sql_vector, NULL, NULL, NULL);
    sqlite3_create_function_v2(db, "qwen3_distance", 2, SQLITE_UTF8, s, sql_distance, NULL, NULL, NULL);
    return sqlite3_create_function_v2(db, "qwen3_open", 1, SQLITE_UTF8, s, sql_open, NULL, NULL, state_free);
}
