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

typedef struct state { qwen3_model *model; qwen3_ctx *ctx; } state;

static void close_model(void *p) {
    state *s = (state *)p;
    qwen3_ctx_free(s->ctx);
    qwen3_free(s->model);
    *s = (state){NULL, NULL};
}
static void state_free(void *p) { close_model(p); sqlite3_free(p); }

static const char *text_of(sqlite3_value *v) {
    const char *text = (const char *)sqlite3_value_text(v);
    return text ? text : "";
}

static void sql_open(sqlite3_context *sql, int n, sqlite3_value **v) {
    state *s = (state *)sqlite3_user_data(sql);
    const qwen3_load_desc load = {.path = text_of(v[n - 1])};
    char err[256] = "";
    close_model(s);
    if (qwen3_load(&s->model, &load, err, sizeof err) != QWEN3_OK ||
        qwen3_ctx_create(&s->ctx, s->model, NULL, err, sizeof err) != QWEN3_OK)
        sqlite3_result_error(sql, err, -1);
}

static int hear(const char *utf8, int n_bytes, int kind, void *user) {
    if (kind == QWEN3_TEXT_ANSWER) sqlite3_str_append((sqlite3_str *)user, utf8, n_bytes);
    return sqlite3_str_errcode((sqlite3_str *)user);
}

static void sql_ask(sqlite3_context *sql, int n, sqlite3_value **v) {
    state *s = (state *)sqlite3_user_data(sql);
    const qwen3_msg msgs[2] = {{.role = QWEN3_SYSTEM, .text = text_of(v[0])},
                               {.role = QWEN3_USER, .text = text_of(v[n - 1])}};
    const qwen3_chat_desc chat = {.msgs = msgs, .n_msgs = 2, .flags = QWEN3_CHAT_NO_THINK};
    const qwen3_gen_desc gen = {.max_tokens = 500, .on_text = hear, .user = sqlite3_str_new(NULL)};
    const qwen3_result r = qwen3_chat(s->ctx, 0, &chat, &gen);
    char *answer = sqlite3_str_finish((sqlite3_str *)gen.user);
    if (r >= 0) sqlite3_result_text(sql, answer, -1, SQLITE_TRANSIENT);
    else sqlite3_result_error(sql, s->ctx ? qwen3_ctx_error(s->ctx) : "call qwen3_open first", -1);
    sqlite3_free(answer);
}

static void sql_vector(sqlite3_context *sql, int n, sqlite3_value **v) {
    state *s = (state *)sqlite3_user_data(sql);
    const int size = s->model ? qwen3_get_info(s->model).n_embd * (int)sizeof(float) : 1;
    float *vector = (float *)sqlite3_malloc(size);
    if (qwen3_embed(s->ctx, 0, NULL, text_of(v[n - 1]), vector) == QWEN3_OK)
        sqlite3_result_blob(sql, vector, size, SQLITE_TRANSIENT);
    else sqlite3_result_error(sql, s->ctx ? qwen3_ctx_error(s->ctx) : "call qwen3_open first", -1);
    sqlite3_free(vector);
}

static void sql_distance(sqlite3_context *sql, int n, sqlite3_value **v) {      /* 0: the same; 2: opposite */
    const float *a = (const float *)sqlite3_value_blob(v[0]);
    const float *b = (const float *)sqlite3_value_blob(v[n - 1]);
    const int size = sqlite3_value_bytes(v[0]);
    double sum = 0;
    if (sqlite3_value_bytes(v[1]) != size) { sqlite3_result_error(sql, "vectors of two sizes", -1); return; }
    for (int i = 0; i < size / (int)sizeof(float); i++) sum += (double)a[i] * b[i];
    sqlite3_result_double(sql, 1 - sum);
}

int sqlite3_extension_init(sqlite3 *db, char **err, const sqlite3_api_routines *api) {
    (void)err;
    SQLITE_EXTENSION_INIT2(api);
    state *s = (state *)sqlite3_malloc(sizeof *s);
    if (!s) return SQLITE_NOMEM;
    *s = (state){NULL, NULL};
    sqlite3_create_function_v2(db, "qwen3_ask", 2, SQLITE_UTF8, s, sql_ask, NULL, NULL, NULL);
    sqlite3_create_function_v2(db, "qwen3_vector", 1, SQLITE_UTF8, s, sql_vector, NULL, NULL, NULL);
    sqlite3_create_function_v2(db, "qwen3_distance", 2, SQLITE_UTF8, s, sql_distance, NULL, NULL, NULL);
    return sqlite3_create_function_v2(db, "qwen3_open", 1, SQLITE_UTF8, s, sql_open, NULL, NULL, state_free);
}
