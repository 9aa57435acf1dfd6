/* Calls of tools: replies taken apart, and calls that are held to the tools in every way of generating. */
#ifndef QWEN3_TESTS_TEST_TOOLS_H
#define QWEN3_TESTS_TEST_TOOLS_H
#include "test_grammar.h"

/* ---- replies taken apart ----------------------------------------------------------------------------------- */
#define CALL(name, arguments) "<tool_call>\n{\"name\": \"" name "\", \"arguments\": " arguments "}\n</tool_call>"
typedef struct reply_case { const char *text, *thinking, *answer, *calls, *why; int kind; } reply_case;     /* calls: name arguments; */

static void test_reply_parts(void) {
    static const reply_case cases[] = {
        {"", "", "", "", "", 0},
        {"Hello!\n", "", "Hello!\n", "", "", 0},
        {"<think>\n\n</think>\n\nHi", "", "Hi", "", "", 0},
        {"<think>\na\n\nb\n</think>\n\nHi", "a\n\nb", "Hi", "", "", 0},
        {"a, so\n</think>\n\nHi", "a, so", "Hi", "", "", 0},                   /* the prompt ended in <think> */
        {"broken of", "broken of", "", "", "", QWEN3_TEXT_THINKING},
        {"<think>broken of", "broken of", "", "", "", 0},
        {"<think>no " CALL("a", "{}") "</think>Hi", "no " CALL("a", "{}"), "Hi", "", "", 0},
        {CALL("price", "{\"item\": \"rope\"}"), "", "", "price {\"item\": \"rope\"};", "", 0},
        {"<think>\nhm\n</think>\n\nWait.\n" CALL("a", "{}") "\n" CALL("b", "{\"x\":[1,{}]}"), "hm", "Wait.", "a {};b {\"x\":[1,{}]};", "", 0},
        {"Wait.\n\n" CALL("a", "{}") "\nDone", "", "Wait.\n\nDone", "a {};", "", 0},
        {"<tool_call>{\"arguments\":{\"s\":\"</tool_call>\\\"<think>\"},\"name\":\"a\\u00e9\\n\",\"id\":7}</tool_call>", "", "",
         "a\xC3\xA9\n {\"s\":\"</tool_call>\\\"<think>\"};", "", 0},
        {"<tool_call>{\"name\":\"a\"}", "", "", "a {};", "", 0},               /* not closed, but whole */
        {"<tool_call>{\"name\":\"a\"}\n<tool_call>{\"name\":\"b\"}</tool_call>", "", "", "a {};b {};", "", 0},
        {"<tool_call>\n{\"name\": \"a\", \"arguments\": {", "", "<tool_call>\n{\"name\": \"a\", \"arguments\": {", "", "call 1: ", 0},
        {"x\n<tool_call>{1}</tool_call>\n" CALL("a", "{}"), "", "x\n<tool_call>{1}</tool_call>", "a {};", "call 1: a string was expected at its byte 1", 0},
        {CALL("a", "{}") "<tool_call>{\"name\": 1}</tool_call>", "", "<tool_call>{\"name\": 1}</tool_call>", "a {};", "call 2: the name is not a string", 0},
        {"<tool_call>{\"arguments\":{}}</tool_call>", "", "<tool_call>{\"arguments\":{}}</tool_call>", "", "it has no name", 0},
        {"<tool_call>{\"name\":\"a\",\"arguments\":\"{}\"}</tool_call>", "", "<tool_call>{\"name\":\"a\",\"arguments\":\"{}\"}</tool_call>", "", "not an object", 0},
        {"<tool_call>{\"name\":\"a\",\"arguments\":{\"x\":NaN}}</tool_call>", "", "<tool_call>{\"name\":\"a\",\"arguments\":{\"x\":NaN}}</tool_call>", "", "not JSON", 0},
        {"<tool_call>{\"name\":\"a\",\"arguments\":{\"N\":\"I\\\"N\"}}</tool_call>", "", "", "a {\"N\":\"I\\\"N\"};", "", 0},
        {"<tool_call>{\"name\":\"a\"} and more</tool_call>", "", "<tool_call>{\"name\":\"a\"} and more</tool_call>", "", "text follows it", 0},
        {"stray </tool_call> and <tool_calls>", "", "stray </tool_call> and <tool_calls>", "", "", 0},
        {"bytes \xFF\xC3", "", "bytes \xEF\xBF\xBD\xEF\xBF\xBD", "", "", 0},
        {"<tool_call>{\"name\":\"\\u0000\\ud800\"}", "", "", "\xEF\xBF\xBD\xEF\xBF\xBD {};", "", 0}
    };
    char memory[1024], err[200], calls[512];
    qwen3_msg m;
    int i, k, need;
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        const reply_case *c = &cases[i];
        need = qwen3_reply_parse(c->text, strlen(c->text), c->kind, &m, memory, sizeof memory, err, sizeof err);
        if (!CHECK_MSG(need > 0 && need <= (int)sizeof memory && m.role == QWEN3_ASSISTANT, "case %d: %d", i, need)) continue;
        CHECK_MSG(strcmp(m.reasoning, c->thinking) == 0, "case %d: thinking '%s'", i, m.reasoning);
        CHECK_MSG(strcmp(m.text, c->answer) == 0, "case %d: answer '%s'", i, m.text);
        CHECK_MSG(c->why[0] ? strstr(err, c->why) != NULL : !err[0], "case %d: says '%s'", i, err);
        for (calls[0] = '\0', k = 0; k < m.n_calls; k++)
            snprintf(calls + strlen(calls), sizeof calls - strlen(calls), "%s %s;", m.calls[k].name, m.calls[k].arguments);
        CHECK_MSG(strcmp(calls, c->calls) == 0, "case %d: calls '%s'", i, calls);
    }
    CHECK(qwen3_reply_parse(NULL, 1, 0, &m, memory, sizeof memory, err, sizeof err) == QWEN3_ERR_ARG && err[0]);
    CHECK(qwen3_reply_parse("x", 1, 0, NULL, memory, sizeof memory, NULL, 0) == QWEN3_ERR_ARG);
    CHECK(qwen3_reply_parse("x", 1, 0, &m, NULL, 8, NULL, 0) == QWEN3_ERR_ARG);
    CHECK(qwen3_reply_parse(NULL, 0, 0, &m, NULL, 0, NULL, 0) > 0 && !m.text);
}

/* Any bytes, any length, any room, at any address: what comes is valid, and nothing beyond it is touched. */
static void test_reply_bytes(void) {
    static const char whole[] = "<think>\nhm\n</think>\n\nWait.\n" CALL("a\\n", "{\"x\": \"\\u00e9\xC3\xA9\"}") "\n" CALL("b", "{}") "and";
    static char text[256], block[2048];
    uint64_t seed = 11;
    int round, i, k, need, n, at;
    for (round = 0; round < 3000; round++) {
        qwen3_msg m;
        char *memory = block + round % 8;
        n = round < (int)sizeof whole ? round : (int)sizeof whole - 1;
        memcpy(text, whole, (size_t)n);
        for (k = round < (int)sizeof whole ? 0 : 1 + round % 4; k > 0; k--) text[random_below(&seed, n)] = (char)random_below(&seed, 256);
        need = qwen3_reply_parse(text, (size_t)n, 0, &m, NULL, 0, NULL, 0);
        if (!CHECK(need > 0 && need < 2000 && !m.text && !m.calls && m.n_calls == 0)) return;
        memset(block, 'x', sizeof block);
        at = random_below(&seed, need);
        CHECK(qwen3_reply_parse(text, (size_t)n, 0, &m, memory, (size_t)at, NULL, 0) == need && !m.text && memory[at] == 'x');
        CHECK(qwen3_reply_parse(text, (size_t)n, 0, &m, memory, (size_t)need, NULL, 0) == need && m.text && memory[need] == 'x');
        CHECK(valid_utf8(m.text, (int)strlen(m.text)) && valid_utf8(m.reasoning, (int)strlen(m.reasoning)));
        for (i = 0; i < m.n_calls; i++) {
            qwen3i_json j = qwen3i_json_begin(m.calls[i].arguments, strlen(m.calls[i].arguments));
            CHECK(qwen3i_json_skip(&j) && qwen3i_json_end(&j) && valid_utf8(m.calls[i].name, (int)strlen(m.calls[i].name)));
        }
    }
}

/* ---- calls held to the tools --------------------------------------------------------------------------------- */
static const char *const tools_list[] = {
    "{\"type\": \"function\", \"function\": {\"name\": \"look\", \"parameters\": {\"type\": \"object\", \"properties\": {\"at\": {\"$ref\": \"#/$defs/place\"}},"
    "\"required\": [\"at\"], \"additionalProperties\": false, \"$defs\": {\"place\": {\"enum\": [\"fox\", \"dog\"]}}}}}",
    "{\"name\": \"sell\", \"parameters\": {\"properties\": {\"n\": {\"type\": \"integer\", \"minimum\": 1, \"maximum\": 9}}, \"required\": [\"n\"],"
    "\"additionalProperties\": false}}",
    "{\"type\": \"function\", \"function\": {\"name\": \"is it\\\"\\n?\"}}"
};
typedef struct tools_bench { grammar_bench b; qwen3_ctx *ctx; qwen3_msg msg; qwen3_chat_desc chat; qwen3_gen_desc gen; qwen3_sampler sampler;
                             qwen3_bias bias; grammar_text said; } tools_bench;

static int tools_hear(const char *utf8, int n, int kind, void *user) {
    grammar_text *t = (grammar_text *)user;
    (void)kind;
    if (t->n + n < (int)sizeof t->p) { memcpy(t->p + t->n, utf8, (size_t)n); t->n += n; }
    t->p[t->n] = '\0';
    return 0;
}

static int tools_open(tools_bench *t, int flags) {
    qwen3_ctx_desc d;
    memset(t, 0, sizeof *t);
    if (!grammar_open(&t->b)) return 0;
    d = ctx_desc(2000, 3, 0, 0);
    d.yarn_factor = 4;                  /* for a long prompt */
    t->ctx = ctx_open_desc(t->b.f.model, &d);
    t->msg.role = QWEN3_USER;
    t->msg.text = "the fox?";
    t->chat.msgs = &t->msg;
    t->chat.n_msgs = 1;
    t->chat.tools = tools_list;
    t->chat.n_tools = 3;
    t->chat.flags = flags;
    t->gen.sampler = &t->sampler;
    t->gen.on_text = tools_hear;
    t->gen.user = &t->said;
    return t->ctx != NULL;
}
static void tools_close(tools_bench *t) { qwen3_ctx_free(t->ctx); grammar_close(&t->b); }

/* The model would like (bias > 0) or hate to call. */
static void tools_dice(tools_bench *t, int seed, float bias) {
    t->sampler = qwen3_sampler_preset(QWEN3_GREEDY, (uint64_t)seed);
    t->sampler.temperature = seed ? 1.0f + (float)(seed % 7) : 0;
    t->bias.token = token_id(t->b.f.model, "<tool_call>");
    t->bias.bias = bias;
    t->sampler.bias = &t->bias;
    t->sampler.n_bias = bias < 0 || bias > 0;
    t->said.n = 0;
    t->said.p[0] = '\0';
}

/* What was said is calls of the tools and nothing else, or -1. Returns how many. */
static int tools_calls(tools_bench *t, qwen3_msg *m, char *memory, size_t size) {
    static const char *const parameters[] = {"{\"type\":\"object\",\"properties\":{\"at\":{\"enum\":[\"fox\",\"dog\"]}},\"required\":[\"at\"],\"additionalProperties\":false}",
        "{\"type\":\"object\",\"properties\":{\"n\":{\"enum\":[1,2,3,4,5,6,7,8,9]}},\"required\":[\"n\"],\"additionalProperties\":false}", "{\"type\":\"object\"}"};
    static const char *const names[] = {"look", "sell", "is it\"\n?"};
    char err[300];
    int i, k;
    CHECK(qwen3_reply_parse(t->said.p, (size_t)t->said.n, 0, m, memory, size, err, sizeof err) <= (int)size);
    CHECK_MSG(!err[0], "%s: %s", err, t->said.p);
    for (i = 0; i < m->n_calls; i++) {
        for (k = 0; k < 3 && strcmp(names[k], m->calls[i].name) != 0;) k++;
        if (!CHECK_MSG(k < 3, "no tool %s", m->calls[i].name)) continue;
        CHECK(grammar_set(&t->b, 0, parameters[k], 0, err, sizeof err) == QWEN3_OK);
        CHECK_MSG(grammar_accepts(&t->b, m->calls[i].arguments, strlen(m->calls[i].arguments)), "%s %s", m->calls[i].name, m->calls[i].arguments);
    }
    return m->n_calls;
}

static void test_tools_required(void) {
    static char memory[8192];
    tools_bench t;
    qwen3_msg m;
    qwen3_result r;
    int i, n, most = 0, named = 0;
    if (!tools_open(&t, QWEN3_CHAT_TOOLS_REQUIRED | QWEN3_CHAT_NO_THINK)) return;
    for (i = 0; i < 40; i++) {
        tools_dice(&t, i, i % 3 ? -50.0f : 50.0f);
        t.gen.max_tokens = 60 + i;      /* led to the end of a call in time */
        t.chat.tool = i % 4 == 3 ? "sell" : NULL;
        r = qwen3_chat(t.ctx, 0, &t.chat, &t.gen);
        CHECK_MSG(r == QWEN3_END || r == QWEN3_OK, "%s: %s", qwen3_result_string(r), qwen3_ctx_error(t.ctx));
        n = tools_calls(&t, &m, memory, sizeof memory);
        CHECK_MSG(n >= 1 && !m.text[0], "%d calls: %s", n, t.said.p);
        most = n > most ? n : most;
        for (; i % 4 == 3 && n > 0; n--, named++) CHECK(strcmp(m.calls[n - 1].name, "sell") == 0);
    }
    CHECK(most > 1 && named >= 10);
    tools_close(&t);
}

static void test_tools_auto_and_none(void) {
    static char memory[8192];
    tools_bench t;
    qwen3_msg m;
    int i, calls = 0, texts = 0;
    char err[200];
    if (!tools_open(&t, QWEN3_CHAT_TOOLS_AUTO | QWEN3_CHAT_NO_THINK)) return;
    t.gen.max_tokens = 70;
    for (i = 1; i < 30; i++) {
        tools_dice(&t, i, i % 2 ? 8.0f : 0.0f);
        CHECK(qwen3_chat(t.ctx, 0, &t.chat, &t.gen) >= 0);
        calls += tools_calls(&t, &m, memory, sizeof memory);
        texts += m.text[0] != '\0';
    }
    CHECK_MSG(calls > 5 && texts > 5, "%d calls, %d texts", calls, texts);
    t.chat.flags = QWEN3_CHAT_TOOLS_NONE | QWEN3_CHAT_NO_THINK;
    for (i = 0; i < 10; i++) {
        tools_dice(&t, i, 50);
        CHECK(qwen3_chat(t.ctx, 0, &t.chat, &t.gen) >= 0);
        CHECK(tools_calls(&t, &m, memory, sizeof memory) == 0);     /* thinking may talk about them */
    }
    /* an answer of a grammar, or calls */
    CHECK(grammar_set(&t.b, 0, "{\"enum\":[\"yes\",\"no\"]}", 0, err, sizeof err) == QWEN3_OK);
    t.chat.flags = QWEN3_CHAT_TOOLS_AUTO | QWEN3_CHAT_NO_THINK;
    for (calls = 0, i = 1; i < 20; i++) {
        qwen3_grammar *g = t.b.g;
        tools_dice(&t, i, i % 2 ? 8.0f : -50.0f);
        t.gen.grammar = g;
        CHECK(qwen3_chat(t.ctx, 0, &t.chat, &t.gen) >= 0);
        t.b.g = NULL;
        if (tools_calls(&t, &m, memory, sizeof memory) == 0) CHECK_MSG(strcmp(m.text, "\"yes\"") == 0 || strcmp(m.text, "\"no\"") == 0, "%s", m.text);
        else calls++;
        qwen3_grammar_free(t.b.g);
        t.b.g = g;
    }
    CHECK_MSG(calls > 4 && calls < 15, "%d calls", calls);
    tools_close(&t);
}

/* Thinking first, with a budget or until there is only room for a call; a call that is only talked about is none. */
static void test_tools_after_thinking(void) {
    static char memory[8192];
    tools_bench t;
    qwen3_msg m;
    int i, thoughts = 0;
    if (!tools_open(&t, QWEN3_CHAT_TOOLS_REQUIRED)) return;
    for (i = 1; i < 20; i++) {
        tools_dice(&t, i, i % 4 == 0 ? 3.0f : 0.0f);
        if (i % 4) { t.bias.token = t.b.f.info.think_begin; t.bias.bias = 60; t.sampler.n_bias = 1; }
        t.gen.think_budget = i % 3 ? 12 : 0;
        t.gen.max_tokens = 120;
        CHECK_MSG(qwen3_chat(t.ctx, 0, &t.chat, &t.gen) >= 0, "%s", qwen3_ctx_error(t.ctx));
        CHECK_MSG(tools_calls(&t, &m, memory, sizeof memory) >= 1 && !m.text[0], "%s", t.said.p);
        thoughts += m.reasoning[0] != '\0';
    }
    CHECK_MSG(thoughts > 10, "%d", thoughts);
    tools_close(&t);
}

/* The same tokens pushed, pulled one by one, in a batch, and with those that are forced said together. */
static void test_tools_every_way(void) {
    enum { N = 120 };
    static qwen3_token pushed[N], pulled[N], prompt[1500];
    tools_bench t;
    qwen3_grammar_desc desc;
    qwen3_grammar *g = NULL;
    char list[2048], err[300] = "";
    int i, k, n, n_prompt, n_pushed, seqs[3] = {0, 1, 2};
    const qwen3_token *tokens;
    if (!tools_open(&t, QWEN3_CHAT_TOOLS_REQUIRED | QWEN3_CHAT_NO_THINK)) return;
    n_prompt = qwen3_chat_render(t.b.f.model, &t.chat, prompt, 1500, err, sizeof err);
    snprintf(list, sizeof list, "[%s,%s,%s]", tools_list[0], tools_list[1], tools_list[2]);
    memset(&desc, 0, sizeof desc);
    desc.kind = QWEN3_GRAMMAR_TOOLS;
    desc.text = list;
    desc.n_bytes = strlen(list);
    desc.flags = QWEN3_GRAMMAR_CALL;
    CHECK_MSG(qwen3_grammar_create(&g, t.b.f.model, &desc, err, sizeof err) == QWEN3_OK, "%s", err);
    for (i = 1; i < 8 && g && n_prompt > 0; i++) {
        qwen3_sampler dice[3], *samplers[3];
        qwen3_token out[3];
        qwen3_result each[3], r;
        tools_dice(&t, i, 0);
        t.gen.max_tokens = N;
        r = qwen3_chat(t.ctx, 0, &t.chat, &t.gen);
        tokens = qwen3_seq_tokens(t.ctx, 0, &n_pushed);
        n_pushed = n_pushed - n_prompt < N ? n_pushed - n_prompt : N;
        memcpy(pushed, tokens + n_prompt, (size_t)n_pushed * sizeof *pushed);
        CHECK(r >= 0 && n_pushed > 10);
        tools_dice(&t, i, 0);                   /* with guesses, nothing changes */
        t.gen.draft_tokens = 4;
        CHECK(qwen3_chat(t.ctx, 0, &t.chat, &t.gen) == r);
        t.gen.draft_tokens = 0;
        tokens = qwen3_seq_tokens(t.ctx, 0, &n);
        CHECK(n >= n_prompt + n_pushed && memcmp(tokens + n_prompt, pushed, (size_t)n_pushed * sizeof *pushed) == 0);
        for (k = 0; k < 3; k++) {
            tools_dice(&t, i, 0);
            dice[k] = t.sampler;
            dice[k].grammar = g;
            dice[k].rng += (uint64_t)k / 2;         /* the third says something else */
            samplers[k] = &dice[k];
            CHECK(qwen3_sync(t.ctx, k, prompt, n_prompt, 0) == 0);
        }
        for (n = 0; n < n_pushed && n < N - 50; n++) {      /* pushed, it is led to its end after that */
            CHECK(qwen3_next_batch(t.ctx, seqs, 2 + (n == 0 || each[2] == QWEN3_OK), samplers, out, each) == QWEN3_OK);
            CHECK_MSG(out[0] == pushed[n] && out[1] == pushed[n], "seed %d, token %d: %d and %d, not %d", i, n, (int)out[0], (int)out[1], (int)pushed[n]);
            pulled[n] = out[0];
        }
    }
    (void)pulled;
    qwen3_grammar_free(g);
    tools_close(&t);
}

/* The reply goes back into the conversation as it was taken apart, and is found in the sequence. */
static void test_tools_handed_back(void) {
    static char memory[8192];
    tools_bench t;
    qwen3_msg msgs[3];
    qwen3_stats before, after;
    int i, held;
    if (!tools_open(&t, QWEN3_CHAT_TOOLS_REQUIRED | QWEN3_CHAT_NO_THINK | QWEN3_CHAT_KEEP_TAGS)) return;
    memset(msgs, 0, sizeof msgs);
    for (i = 1; i < 6; i++) {
        tools_dice(&t, i, 0);
        t.chat.msgs = msgs;
        msgs[0] = t.msg;
        t.chat.n_msgs = 1;
        t.gen.max_tokens = 120;
        CHECK(qwen3_chat(t.ctx, 0, &t.chat, &t.gen) >= 0);
        CHECK(tools_calls(&t, &msgs[1], memory, sizeof memory) > 0);
        msgs[2].role = QWEN3_TOOL;
        msgs[2].text = "3 coins";
        t.chat.n_msgs = 3;
        held = seq_len(t.ctx, 0);
        before = qwen3_ctx_stats(t.ctx);
        t.gen.max_tokens = 1;
        CHECK(qwen3_chat(t.ctx, 0, &t.chat, &t.gen) >= 0);
        after = qwen3_ctx_stats(t.ctx);
        CHECK_MSG(after.n_reused - before.n_reused == held || strstr(t.said.p, "is it"), "%d of %d reused: %s", (int)(after.n_reused - before.n_reused), held, t.said.p);
    }
    tools_close(&t);
}

static void test_tools_refusals(void) {
    static const struct { const char *tool, *only, *says; int flags; qwen3_result result; } cases[] = {
        {"{\"name\": \"a\"}", "b", "no tool b", QWEN3_CHAT_TOOLS_REQUIRED, QWEN3_ERR_ARG},
        {"{\"name\": \"a\"}", NULL, "several", QWEN3_CHAT_TOOLS_REQUIRED | QWEN3_CHAT_TOOLS_NONE, QWEN3_ERR_ARG},
        {NULL, NULL, "no tools", QWEN3_CHAT_TOOLS_AUTO, QWEN3_ERR_ARG},
        {"{\"title\": \"a\"}", NULL, "\"name\"", QWEN3_CHAT_TOOLS_AUTO, QWEN3_ERR_FORMAT},
        {"{\"function\": {\"name\": \"a\", \"parameters\": {\"properties\": {\"x\": {\"contains\": 1}}}}}", NULL, "/0/function/parameters/properties/x/contains",
         QWEN3_CHAT_TOOLS_AUTO, QWEN3_ERR_UNSUPPORTED},
        {"{\"name\": \"a\", \"parameters\": {\"type\": \"string\"}}", NULL, "nothing", QWEN3_CHAT_TOOLS_AUTO, QWEN3_ERR_FORMAT}
    };
    tools_bench t;
    int i;
    if (!tools_open(&t, 0)) return;
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        qwen3_result r;
        t.chat.tools = &cases[i].tool;
        t.chat.n_tools = cases[i].tool != NULL;
        t.chat.flags = cases[i].flags;
        t.chat.tool = cases[i].only;
        r = qwen3_chat(t.ctx, 0, &t.chat, &t.gen);
        CHECK_MSG(r == cases[i].result && strstr(qwen3_ctx_error(t.ctx), cases[i].says), "case %d: %d, %s", i, r, qwen3_ctx_error(t.ctx));
    }
    t.chat.flags = QWEN3_CHAT_TOOLS_NONE;       /* needs no schema that can be held to */
    t.gen.max_tokens = 2;
    CHECK(qwen3_chat(t.ctx, 0, &t.chat, &t.gen) >= 0);
    tools_close(&t);
}

static void suite_tools(void) {
    RUN(test_reply_parts);
    RUN(test_reply_bytes);
    RUN(test_tools_required);
    RUN(test_tools_auto_and_none);
    RUN(test_tools_after_thinking);
    RUN(test_tools_every_way);
    RUN(test_tools_handed_back);
    RUN(test_tools_refusals);
}
#endif
