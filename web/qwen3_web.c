/* The library as the page's worker (worker.js) calls it: files into memory, a model from them, one conversation.
   Pointers and sizes are of the program's own memory. A function that fails leaves its reason in web_error(). */
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"
#include <emscripten.h>

enum { MAX_FILES = 256, CONTEXT = 4096 };

static struct {
    qwen3_file files[MAX_FILES]; int n_files;
    qwen3_model *model;
    qwen3_ctx *ctx;
    qwen3_msg *msgs; int n_msgs;        /* the conversation: the system prompt first, if there is one */
    qwen3_sampler sampler;
    qwen3_stream stream;                /* the reply that is being written */
    char *answer, *thought;             /* its text so far */
    char about[256], error[512];
} web;

EM_JS(void, deliver, (int kind, const char *text, int n), { self.onText(kind, UTF8ToString(text, n)); })

static int fail(const char *where, const char *why) {
    snprintf(web.error, sizeof web.error, "%s%s%s", where, *where ? ": " : "", why);
    return -1;
}

static int failed(qwen3_result r) { return fail("", *qwen3_ctx_error(web.ctx) ? qwen3_ctx_error(web.ctx) : qwen3_result_string(r)); }

static char *copy_text(const char *text) {
    char *copy = (char *)malloc(strlen(text) + 1);
    return copy ? strcpy(copy, text) : NULL;
}

EMSCRIPTEN_KEEPALIVE const char *web_error(void) { return web.error; }

/* ---- files: the worker asks for room, writes the bytes there, and says how many there were ------------------ */
EMSCRIPTEN_KEEPALIVE int web_file(const char *name) {
    if (web.n_files == MAX_FILES || (web.files[web.n_files].name = copy_text(name)) == NULL) return -1;
    return web.n_files++;
}

EMSCRIPTEN_KEEPALIVE int web_file_room(int i, double size) {
    void *data = size < 4294967295.0 ? realloc((void *)web.files[i].data, size > 0 ? (size_t)size : 1) : NULL;
    if (data) web.files[i].data = data;
    return data != NULL;
}

EMSCRIPTEN_KEEPALIVE void *web_file_data(int i) { return (void *)web.files[i].data; }
EMSCRIPTEN_KEEPALIVE void  web_file_end(int i, double size) { web.files[i].size = (size_t)size; }

static const char *find_text(const char *name) {       /* a file's text, as far as a system prompt is long; "" */
    static char text[4096];
    int i;
    text[0] = 0;
    for (i = 0; i < web.n_files; i++)
        if (!strcmp(web.files[i].name, name))
            snprintf(text, sizeof text, "%.*s", (int)(web.files[i].size < 4096 ? web.files[i].size : 4095),
                     (const char *)web.files[i].data);
    return text;
}

EMSCRIPTEN_KEEPALIVE const char *web_system(void) { return find_text("system.txt"); }

/* ---- the model --------------------------------------------------------------------------------------------- */
EMSCRIPTEN_KEEPALIVE int web_load(int threads) {
    static qwen3_load_desc load;
    static qwen3_ctx_desc desc;
    load.files = web.files;
    load.n_files = web.n_files;
    if (qwen3_load(&web.model, &load, web.error, sizeof web.error) < 0) return -1;
    desc.threads = threads;
    desc.max_ctx = qwen3_get_info(web.model).max_ctx < CONTEXT ? 0 : CONTEXT;
    if (qwen3_ctx_create(&web.ctx, web.model, &desc, web.error, sizeof web.error) < 0) return -1;
    web.sampler = qwen3_get_info(web.model).sampler;
    web.sampler.rng = (uint64_t)emscripten_get_now() + 1;
    return 0;
}

EMSCRIPTEN_KEEPALIVE const char *web_about(void) {
    qwen3_info info = qwen3_get_info(web.model);
    double millions = (double)info.n_params / 1e6, megabytes = (double)info.weight_bytes / 1e6;
    snprintf(web.about, sizeof web.about, "%.1f %s parameters, %.0f MB (%s)", millions < 1000 ? millions : millions / 1000,
             millions < 1000 ? "million" : "billion", megabytes, info.device_name);
    return web.about;
}

/* ---- the conversation -------------------------------------------------------------------------------------- */
static int add_message(qwen3_role role, char *text, char *reasoning) {
    qwen3_msg *more = (qwen3_msg *)realloc(web.msgs, (size_t)(web.n_msgs + 1) * sizeof *more);
    if (!more || !text) return fail("", "there is no memory left");
    memset(&more[web.n_msgs], 0, sizeof *more);
    more[web.n_msgs].role = role;
    more[web.n_msgs].text = text;
    more[web.n_msgs].reasoning = reasoning;
    web.msgs = more;
    web.n_msgs++;
    return 0;
}

static void drop_message(void) {
    web.n_msgs--;
    free((void *)web.msgs[web.n_msgs].text);
    free((void *)web.msgs[web.n_msgs].reasoning);
}

EMSCRIPTEN_KEEPALIVE void web_reset(void) { while (web.n_msgs) drop_message(); }

static int append(char **to, const char *text, int n) {
    size_t used = *to ? strlen(*to) : 0;
    char *more = (char *)realloc(*to, used + (size_t)n + 1);
    if (!more) return 1;
    memcpy(more + used, text, (size_t)n);
    more[used + (size_t)n] = 0;
    *to = more;
    return 0;
}

static int on_text(const char *utf8, int n_bytes, int kind, void *user) {
    (void)user;
    if (kind & QWEN3_TEXT_TAG) return 0;
    deliver(kind, utf8, n_bytes);
    return append(kind & QWEN3_TEXT_THINKING ? &web.thought : &web.answer, utf8, n_bytes);
}

/* The user's message; system: the prompt of a conversation that begins with it. */
EMSCRIPTEN_KEEPALIVE int web_say(const char *text, const char *system, int think) {
    static qwen3_chat_desc chat;
    static qwen3_gen_desc gen;
    qwen3_result r;
    if (!web.n_msgs && *system && add_message(QWEN3_SYSTEM, copy_text(system), NULL)) return -1;
    if (add_message(QWEN3_USER, copy_text(text), NULL)) return -1;
    chat.msgs = web.msgs;
    chat.n_msgs = web.n_msgs;
    chat.flags = think ? 0 : QWEN3_CHAT_NO_THINK;
    gen.sampler = &web.sampler;
    gen.on_text = on_text;
    web.answer = web.thought = NULL;
    r = qwen3_stream_begin(web.ctx, 0, &chat, &gen, &web.stream);
    if (r < 0) drop_message();
    return r < 0 ? failed(r) : 0;
}

/* Work for about so many milliseconds. 1: more to come; 0: the reply is complete; below 0: an error. */
EMSCRIPTEN_KEEPALIVE int web_step(int milliseconds) {
    qwen3_stream *stream = &web.stream;
    qwen3_result r = qwen3_stream_step(web.ctx, &stream, 1, (int64_t)milliseconds * 1000);
    if (r == QWEN3_OK) r = stream->result;
    return r < 0 ? failed(r) : r == QWEN3_MORE;
}

/* The reply, whole or stopped, becomes part of the conversation. Returns its tokens. */
EMSCRIPTEN_KEEPALIVE int web_finish(void) {
    if (web.answer || web.thought) add_message(QWEN3_ASSISTANT, web.answer ? web.answer : copy_text(""), web.thought);
    else drop_message();                /* nothing was said: the question is taken back */
    web.answer = web.thought = NULL;
    return web.stream.n_tokens;
}
