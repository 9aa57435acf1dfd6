/* Streams: kinds of text, replies step by step, several together, deadlines. */
#ifndef QWEN3_TESTS_TEST_STREAM_H
#define QWEN3_TESTS_TEST_STREAM_H
#include "test_api.h"

/* What a stream delivered, each kind's text apart and all in order. */
typedef struct heard {
    char answer[2048], thinking[2048], call[2048], tags[2048], all[4096];
    int calls;
} heard;

static int hear(const char *utf8, int n, int kind, void *user) {
    heard *h = (heard *)user;
    char *to = kind & QWEN3_TEXT_TAG ? h->tags : kind == QWEN3_TEXT_THINKING ? h->thinking :
               kind == QWEN3_TEXT_CALL ? h->call : h->answer;
    strncat(to, utf8, (size_t)n);
    strncat(h->all, utf8, (size_t)n);
    h->calls++;
    return !valid_utf8(utf8, n) || strlen(h->all) > 2000;
}

static void script(talk *t, int base) {
    t->script.tokens = t->tokens;
    t->script.n = t->n;
    t->script.base = base;
    t->script.broken = 0;
}

/* Generate a text, after which the turn ends, onto sequence 0 with its 3 tokens. */
static void say_and_hear(talk *t, const char *text, int by_bytes, heard *h) {
    t->n = 0;
    memset(h, 0, sizeof *h);
    if (by_bytes) say_bytes(t, text); else say_text(t, text);
    say_token(t, t->f.info.im_end);
    t->gen.on_text = hear;
    t->gen.user = h;
    CHECK_OK(t->ctx, qwen3_seq_truncate(t->ctx, 0, 3));
    script(t, 3);
    CHECK(qwen3_generate(t->ctx, 0, &t->gen) == QWEN3_END);
}

/* Each kind of text arrives as what it is; tags take the newlines that the chat format puts around them. */
static void test_stream_kinds(void) {
    static const struct { const char *said, *answer, *thinking, *call; } cases[] = {
        {"<think>\nthe fox\n</think>\n\nyes", "yes", "the fox", ""},
        {"<think>\n\n  two\n\nlines\n\n</think>\nyes\n", "yes\n", "  two\n\nlines\n", ""},
        {"<think>\nabout <tool_call>s</tool_call>\n</think>\n\n<tool_call>\n{\"a\": 1}\n</tool_call>", "",
         "about <tool_call>s</tool_call>", "{\"a\": 1}"},
        {"first\n<tool_call>\n{1}\n</tool_call>\n<tool_call>\n{2}\n</tool_call>", "first", "", "{1}{2}"},
        {"first\n\n<tool_call>{1}</tool_call>\nthen", "first\nthen", "", "{1}"},
        {"\na\n\nb\n", "\na\n\nb\n", "", ""}, {"yes</think>no", "yesno", "", ""}
    };
    talk t;
    heard h;
    int i;
    if (!talk_open(&t)) return;
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        say_and_hear(&t, cases[i].said, 0, &h);
        CHECK_MSG(strcmp(h.answer, cases[i].answer) == 0, "case %d: answer '%s'", i, h.answer);
        CHECK_MSG(strcmp(h.thinking, cases[i].thinking) == 0, "case %d: thinking '%s'", i, h.thinking);
        CHECK_MSG(strcmp(h.call, cases[i].call) == 0, "case %d: call '%s'", i, h.call);
        CHECK_MSG(strcmp(h.all, cases[i].said) == 0, "case %d: all '%s'", i, h.all);
    }
    talk_close(&t);
}

/* A beginning of a stop string that is held back when thinking begins is answer, not thinking. */
static void test_stream_held_text(void) {
    static const char *const stop = "STOP";
    talk t;
    heard h;
    int hit = 77;
    if (!talk_open(&t)) return;
    t.gen.stop = &stop;
    t.gen.n_stop = 1;
    t.gen.stopped_by = &hit;
    say_and_hear(&t, "a STO<think>\nb ST\n</think>\n\nc S", 0, &h);
    CHECK_MSG(strcmp(h.answer, "a STOc S") == 0 && strcmp(h.thinking, "b ST") == 0, "'%s', '%s'", h.answer, h.thinking);
    CHECK(hit == -1);
    say_and_hear(&t, "a STOP b", 1, &h);
    CHECK_MSG(strcmp(h.all, "a ") == 0 && hit == 0, "'%s', %d", h.all, hit);
    talk_close(&t);
}

static const qwen3_msg stream_msgs[2] = {
    {QWEN3_SYSTEM, "You keep a shop and answer in a few words, always friendly, never rude.", NULL, NULL, 0},
    {QWEN3_USER, "the quick brown fox jumps over the lazy dog: yes or no?", NULL, NULL, 0}
};

/* Replies of several sequences, step by step under budgets of any size, are those of qwen3_chat. */
static void test_stream_step(void) {
    enum { N = 3 };
    static const int64_t budgets[] = {0, 1, 300, 5000};
    fixture f;
    qwen3_ctx *a, *b;
    qwen3_chat_desc chat;
    qwen3_gen_desc gen;
    qwen3_sampler sampler[N];
    qwen3_stream stream[N], *list[N];
    heard want[N], got[N];
    int i, k, steps;
    memset(&chat, 0, sizeof chat);
    memset(&gen, 0, sizeof gen);
    if (!fixture_open(&f, "chat")) return;
    a = ctx_open(f.model, 256, N, 0, 0);
    b = ctx_open(f.model, 256, N, 0, 0);
    chat.msgs = stream_msgs;
    gen.on_text = hear;
    gen.max_tokens = 25;
    memset(want, 0, sizeof want);
    for (i = 0; a && b && i < N; i++) {
        sampler[i] = qwen3_sampler_preset(QWEN3_THINKING, (uint64_t)i);
        gen.sampler = &sampler[i];
        gen.user = &want[i];
        chat.n_msgs = 1 + i % 2;
        CHECK(qwen3_chat(a, i, &chat, &gen) >= 0);
    }
    for (k = 0; a && b && k < 4; k++) {
        memset(got, 0, sizeof got);
        for (i = 0; i < N; i++) {
            sampler[i] = qwen3_sampler_preset(QWEN3_THINKING, (uint64_t)i);
            gen.sampler = &sampler[i];
            gen.user = &got[i];
            chat.n_msgs = 1 + i % 2;
            list[i] = &stream[i];
            CHECK_OK(b, qwen3_stream_begin(b, i, &chat, &gen, &stream[i]));
            CHECK(stream[i].n_prompt > 10 && stream[i].result == QWEN3_MORE);
        }
        for (steps = 1; qwen3_stream_step(b, list, N, budgets[k]) == QWEN3_MORE && steps < 1000; steps++) {}
        CHECK_MSG(k == 0 ? steps == 1 : steps < 1000, "%d steps", steps);
        for (i = 0; i < N; i++) {
            CHECK_MSG(strcmp(want[i].all, got[i].all) == 0, "'%s', not '%s'", got[i].all, want[i].all);
            CHECK((stream[i].result == QWEN3_OK && stream[i].n_tokens == 25) || stream[i].result == QWEN3_END);
            CHECK(same_logits(b, i, qwen3_logits(a, i), f.info.n_vocab));
            CHECK_OK(b, qwen3_seq_truncate(b, i, 0));
        }
    }
    qwen3_ctx_free(a);
    qwen3_ctx_free(b);
    fixture_close(&f);
}

/* What qwen3_generate does, by hand: qwen3_next, the stream's text, what the budget forces. */
static void test_stream_feed(void) {
    talk t;
    heard push, pull;
    qwen3_stream s;
    qwen3_token token;
    qwen3_item item;
    int i;
    if (!talk_open(&t)) return;
    t.gen.think_budget = 6;
    say_and_hear(&t, "<think>\nthe quick brown fox jumps over the lazy dog and the fox", 0, &push);
    t.gen.user = &pull;
    memset(&pull, 0, sizeof pull);
    CHECK_OK(t.ctx, qwen3_seq_truncate(t.ctx, 0, 3));
    CHECK_OK(t.ctx, qwen3_stream_begin(t.ctx, 0, NULL, &t.gen, &s));
    for (i = 0; i < 200 && s.result == QWEN3_MORE; i++) {
        if (s.forced >= 0) {
            memset(&item, 0, sizeof item);
            item.tokens = &s.forced;
            item.n = 1;
            token = s.forced;
            CHECK_OK(t.ctx, qwen3_eval(t.ctx, &item, 1));
        } else if (!CHECK(qwen3_next(t.ctx, 0, t.gen.sampler, &token) >= 0)) break;
        qwen3_stream_feed(&s, token);
    }
    CHECK(s.result == QWEN3_END && s.stopped_by == -1 && s.n_thinking == 6);
    CHECK_MSG(strcmp(push.all, pull.all) == 0 && strstr(push.all, "</think>"), "'%s', not '%s'", pull.all, push.all);
    CHECK(qwen3_stream_feed(&s, token) == QWEN3_END && qwen3_stream_feed(NULL, token) == QWEN3_ERR_ARG);
    talk_close(&t);
}

static void test_stream_arguments(void) {
    talk t;
    qwen3_stream s, u, *list[3];
    qwen3_chat_desc chat;
    heard h;
    memset(&chat, 0, sizeof chat);
    chat.msgs = stream_msgs;
    chat.n_msgs = 2;
    if (!talk_open(&t)) return;
    memset(&h, 0, sizeof h);
    memset(&u, 0, sizeof u);
    t.gen.on_text = hear;
    t.gen.user = &h;
    t.gen.sampler = NULL;
    t.gen.max_tokens = 3;
    CHECK(qwen3_stream_begin(NULL, 0, NULL, &t.gen, &s) == QWEN3_ERR_ARG);
    CHECK(qwen3_stream_begin(t.ctx, 0, NULL, &t.gen, NULL) == QWEN3_ERR_ARG);
    CHECK(qwen3_stream_begin(t.ctx, 2, NULL, &t.gen, &s) == QWEN3_ERR_ARG);
    CHECK(qwen3_stream_begin(t.ctx, 0, NULL, NULL, &s) == QWEN3_ERR_ARG && s.result == QWEN3_ERR_ARG);
    list[0] = list[1] = &s;
    CHECK(qwen3_stream_step(t.ctx, list, 1, 0) == QWEN3_ERR_ARG);           /* not begun */
    CHECK_OK(t.ctx, qwen3_stream_begin(t.ctx, 0, &chat, &t.gen, &s));
    CHECK(qwen3_stream_step(t.ctx, list, 2, 0) == QWEN3_ERR_ARG && strstr(qwen3_ctx_error(t.ctx), "both"));
    CHECK(qwen3_stream_step(t.ctx, list, 3, 0) == QWEN3_ERR_ARG && qwen3_stream_step(t.ctx, NULL, 1, 0) == QWEN3_ERR_ARG);
    list[0] = &u;
    CHECK(qwen3_stream_step(t.ctx, list, 1, 0) == QWEN3_ERR_ARG);
    CHECK_OK(t.ctx, qwen3_stream_step(t.ctx, NULL, 0, 0));
    list[0] = &s;
    CHECK(qwen3_stream_step(t.ctx, list, 1, 1) == QWEN3_MORE && s.n_prompt > 0);
    CHECK_OK(t.ctx, qwen3_seq_truncate(t.ctx, 0, 1));                       /* behind its back */
    CHECK(qwen3_stream_step(t.ctx, list, 1, 0) == QWEN3_ERR_ARG && strstr(qwen3_ctx_error(t.ctx), "changed"));
    CHECK_OK(t.ctx, qwen3_stream_begin(t.ctx, 0, &chat, &t.gen, &s));
    CHECK_OK(t.ctx, qwen3_stream_step(t.ctx, list, 1, 0));
    CHECK(s.result == QWEN3_OK && s.n_tokens == 3 && s.n_prompt == 0);
    CHECK_OK(t.ctx, qwen3_stream_step(t.ctx, list, 1, 0));                  /* complete: nothing is done */
    CHECK(s.n_tokens == 3);
    talk_close(&t);
}

/* ---- prompts by pieces ------------------------------------------------------------------------------------- */
/* A cancel hook of which a step of one row needs about so many polls before it is complete. */
typedef struct deadline { int polls, most; } deadline;
static int deadline_over(void *user) { deadline *d = (deadline *)user; return ++d->polls > d->most; }

/* Calls under any deadline get on, however short it is: prompts, steps by hand, replies. */
static void test_stream_deadlines(void) {
    fixture f;
    qwen3_ctx_desc d = ctx_desc(128, 1, 32, 0);
    deadline limit;
    qwen3_ctx *ctx;
    qwen3_token tokens[100], t;
    qwen3_result r;
    float *plain;
    uint64_t seed = 3;
    int most, calls, left, len;
    if (!fixture_open(&f, "plain")) return;
    random_tokens(&seed, tokens, 100, f.info.n_vocab);
    plain = plain_logits(f.model, tokens, 100, QWEN3_KV_F16);
    d.cancel = deadline_over;
    d.cancel_user = &limit;
    for (most = 0; most < 40; most += 1 + most / 4) {
        ctx = ctx_open_desc(f.model, &d);
        if (!ctx) break;
        limit.most = most;
        for (calls = 1; calls < 1000; calls++) {
            limit.polls = 0;
            left = qwen3_sync(ctx, 0, tokens, 100, 0);
            if (left <= 0) break;
            CHECK(left == 100 - seq_len(ctx, 0));
        }
        CHECK_MSG(left == 0 && calls < 110, "%d polls: %d tokens to come after %d calls", most, left, calls);
        CHECK_MSG(qwen3_ctx_stats(ctx).n_prefill + qwen3_ctx_stats(ctx).n_decode == 100, "%d tokens were counted",
                  (int)(qwen3_ctx_stats(ctx).n_prefill + qwen3_ctx_stats(ctx).n_decode));
        CHECK(qwen3_ctx_stats(ctx).n_reused == 0);
        limit.polls = -1000;
        CHECK(same_logits(ctx, 0, plain + 99 * f.info.n_vocab, f.info.n_vocab));
        for (calls = 0, len = 100; calls < 60 && len < 120; calls++) {
            limit.polls = 0;
            r = qwen3_next(ctx, 0, NULL, &t);
            if (r == QWEN3_END) break;
            CHECK(r == QWEN3_OK || r == QWEN3_STOPPED);
            CHECK(seq_len(ctx, 0) == len + (r == QWEN3_OK));
            len = seq_len(ctx, 0);
        }
        CHECK_MSG(len == 120 || r == QWEN3_END, "%d polls: %d tokens after %d calls", most, len - 100, calls);
        qwen3_ctx_free(ctx);
    }
    free(plain);
    fixture_close(&f);
}

/* The same by the clock. A slow model is one whose hook takes its time. */
typedef struct clock_deadline { double end, each; } clock_deadline;
static int clock_over(void *user) {
    const clock_deadline *d = (const clock_deadline *)user;
    const double until = qwen3i_now_ms() + d->each;
    while (qwen3i_now_ms() < until) {}
    return qwen3i_now_ms() > d->end;
}

static void test_stream_clock(void) {
    static const double ms[] = {0.1, 0.3, 1, 3, 10}, each[] = {0, 0.02, 0.2};
    fixture f;
    qwen3_ctx_desc d = ctx_desc(64, 1, 32, 0);
    clock_deadline limit;
    qwen3_ctx *ctx;
    qwen3_token tokens[40];
    uint64_t seed = 3;
    int i, calls, left;
    if (!fixture_open(&f, "plain")) return;
    random_tokens(&seed, tokens, 40, f.info.n_vocab);
    d.cancel = clock_over;
    d.cancel_user = &limit;
    for (i = 0; i < 15; i++) {
        ctx = ctx_open_desc(f.model, &d);
        if (!ctx) break;
        limit.each = each[i / 5];
        for (calls = 0, left = 1; left > 0 && calls < 100; calls++) {
            limit.end = qwen3i_now_ms() + ms[i % 5];
            left = qwen3_sync(ctx, 0, tokens, 40, 0);
        }
        CHECK_MSG(left == 0, "%g ms, %g a poll: %d tokens to come after %d calls", ms[i % 5], limit.each, left, calls);
        qwen3_ctx_free(ctx);
    }
    fixture_close(&f);
}

/* By pieces of any size; reuse is counted once. */
static void test_stream_sync_pieces(void) {
    fixture f;
    qwen3_ctx *ctx;
    qwen3_token tokens[60];
    float *plain;
    uint64_t seed = 4;
    int piece, left, want;
    if (!fixture_open(&f, "plain")) return;
    random_tokens(&seed, tokens, 60, f.info.n_vocab);
    plain = plain_logits(f.model, tokens, 60, QWEN3_KV_F16);
    for (piece = 1; piece < 70; piece += 7) {
        ctx = ctx_open(f.model, 64, 1, 16, 0);
        if (!ctx) break;
        CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens, 20, 0));
        for (want = 40; want > 0; want = left) {
            left = qwen3_sync(ctx, 0, tokens, 60, piece);
            if (!CHECK(left == (want > piece ? want - piece : 0))) break;
        }
        CHECK(qwen3_ctx_stats(ctx).n_reused == 20);
        CHECK(qwen3_ctx_stats(ctx).n_prefill + qwen3_ctx_stats(ctx).n_decode == 60);
        CHECK(same_logits(ctx, 0, plain + 59 * f.info.n_vocab, f.info.n_vocab));
        CHECK(qwen3_sync(ctx, 0, tokens, 60, -1) == QWEN3_ERR_ARG);
        qwen3_ctx_free(ctx);
    }
    free(plain);
    fixture_close(&f);
}

/* ---- a state with all that belongs to a character ------------------------------------------------------------ */
static void test_stream_state_file(void) {
    static char path[] = "build_state.tmp";
    fixture f;
    qwen3_ctx *ctx;
    qwen3_token tokens[30], a[10], b[10];
    qwen3_sampler s = qwen3_sampler_preset(QWEN3_THINKING, 5), other = qwen3_sampler_preset(QWEN3_GREEDY, 0);
    qwen3_state st;
    char mood[8] = "";
    unsigned char *bytes;
    size_t size;
    uint64_t seed = 5;
    int i;
    if (!fixture_open(&f, "theta")) return;
    ctx = ctx_open(f.model, 64, 2, 0, 0);
    random_tokens(&seed, tokens, 30, f.info.n_vocab);
    if (ctx) {
        CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens, 30, 0));
        memset(&st, 0, sizeof st);
        st.path = path;
        st.sampler = &s;
        st.user = (void *)(uintptr_t)"grumpy";
        st.user_size = 6;
        CHECK_OK(ctx, qwen3_seq_save(ctx, 0, &st));
        for (i = 0; i < 10; i++) qwen3_next(ctx, 0, &s, &a[i]);
        bytes = read_file(path, &size);
        CHECK(bytes && size == st.size);
        free(bytes);
        memset(&st, 0, sizeof st);
        st.path = path;
        st.sampler = &other;
        st.user = mood;
        st.user_size = 3;
        CHECK(qwen3_seq_load(ctx, 1, &st) == QWEN3_ERR_ARG && st.user_size == 6 && seq_len(ctx, 1) == 0);
        CHECK(other.temperature < 0.1f && !mood[0]);
        CHECK_OK(ctx, qwen3_seq_load(ctx, 1, &st));
        CHECK(strcmp(mood, "grumpy") == 0 && st.user_size == 6 && other.temperature > 0.5f && other.top_k == 20);
        for (i = 0; i < 10; i++) qwen3_next(ctx, 1, &other, &b[i]);
        CHECK(memcmp(a, b, sizeof a) == 0 && other.rng == s.rng);
        st.path = "no/such/directory/state";
        CHECK(qwen3_seq_save(ctx, 1, &st) == QWEN3_ERR_IO && strstr(qwen3_ctx_error(ctx), "no/such/directory"));
        CHECK(qwen3_seq_load(ctx, 1, &st) == QWEN3_ERR_IO && strstr(qwen3_ctx_error(ctx), "no such file"));
        st.data = mood;
        CHECK(qwen3_seq_save(ctx, 1, &st) == QWEN3_ERR_ARG && qwen3_seq_load(ctx, 1, &st) == QWEN3_ERR_ARG);
    }
    remove(path);
    qwen3_ctx_free(ctx);
    fixture_close(&f);
}

/* ---- round trips: what was streamed, handed back ------------------------------------------------------------- */
typedef struct round_trip { qwen3_msg msgs[12]; qwen3_tool_call call; heard h[12]; qwen3_chat_desc chat; talk t; } round_trip;

/* The model says a text, as these tokens of it or byte by byte; what was heard joins the conversation. Returns how
   many of the tokens that the sequence held were not reused. */
static int round_trip_say(round_trip *w, const char *text, int by_bytes) {
    const int held = seq_len(w->t.ctx, 0), i = w->chat.n_msgs;
    const qwen3_stats before = qwen3_ctx_stats(w->t.ctx);
    qwen3_msg *m = &w->msgs[i];
    int n = qwen3_chat_render(w->t.f.model, &w->chat, NULL, 0, NULL, 0), lost;
    qwen3_stream s, *list = &s;
    char *quote;
    w->t.n = 0;
    if (by_bytes) { say_text(&w->t, "<think>"); say_bytes(&w->t, text); } else say_text(&w->t, text);
    say_token(&w->t, w->t.f.info.im_end);
    w->t.gen.on_text = hear;
    w->t.gen.user = &w->h[i];
    CHECK_OK(w->t.ctx, qwen3_stream_begin(w->t.ctx, 0, &w->chat, &w->t.gen, &s));
    CHECK(s.n_prompt <= n);
    script(&w->t, seq_len(w->t.ctx, 0) + s.n_prompt);
    CHECK_OK(w->t.ctx, qwen3_stream_step(w->t.ctx, &list, 1, 0));
    CHECK_MSG(s.result == QWEN3_END && !w->t.script.broken, "%s", qwen3_result_string(s.result));
    lost = held - (int)(qwen3_ctx_stats(w->t.ctx).n_reused - before.n_reused);
    m->role = QWEN3_ASSISTANT;
    m->text = w->h[i].answer;
    m->reasoning = w->h[i].thinking;
    if (w->h[i].call[0]) {              /* {"name": "look", "arguments": {...}} */
        w->call.name = "look";
        w->call.arguments = strstr(w->h[i].call, "\"arguments\": ") + 13;
        quote = strrchr(w->h[i].call, '}');
        *quote = '\0';
        m->calls = &w->call;
        m->n_calls = 1;
    }
    w->chat.n_msgs++;
    return lost;
}

static void round_trip_add(round_trip *w, qwen3_role role, const char *text) {
    w->msgs[w->chat.n_msgs].role = role;
    w->msgs[w->chat.n_msgs++].text = text;
}

/* Whole conversations with thinking and tools: nothing is evaluated twice. */
static void test_stream_round_trip(void) {
    static round_trip w;
    int quiet;
    for (quiet = 0; quiet < 2; quiet++) {
        memset(&w, 0, sizeof w);
        if (!talk_open(&w.t)) return;
        qwen3_ctx_free(w.t.ctx);
        w.t.ctx = ctx_open(w.t.f.model, 512, 1, 0, 0);
        if (!w.t.ctx) break;
        w.chat.msgs = w.msgs;
        w.chat.flags = QWEN3_CHAT_KEEP_THINKING | (quiet ? QWEN3_CHAT_NO_THINK | QWEN3_CHAT_KEEP_TAGS : 0);
        round_trip_add(&w, QWEN3_USER, "the fox?");
        CHECK(round_trip_say(&w, quiet ? "no\n<tool_call>\n{\"name\": \"look\", \"arguments\": {\"at\": 1}}\n</tool_call>"
            : "<think>\nquick or lazy?\n</think>\n\nno\n<tool_call>\n{\"name\": \"look\", \"arguments\": {\"at\": 1}}\n</tool_call>",
            0) == 0);
        CHECK(strcmp(w.h[1].answer, "no") == 0 && strcmp(w.call.arguments, "{\"at\": 1}") == 0);
        round_trip_add(&w, QWEN3_TOOL, "a dog");
        CHECK(round_trip_say(&w, quiet ? "the dog\n" : "<think>\n the dog?\n\nyes!\n</think>\n\nyes", 0) == 0);
        round_trip_add(&w, QWEN3_USER, "<think>sure?</think>");
        CHECK(round_trip_say(&w, quiet ? "yes, the\n\ndog" : "<think>\nhm\n</think>\n\nyes, the\n\ndog", 0) == 0);
        round_trip_add(&w, QWEN3_USER, "really?");
        CHECK(round_trip_say(&w, "the fox jumps over", 0) == 0);
        talk_close(&w.t);
    }
}

/* The model said it with other tokens than the tokenizer would have taken: they are kept. */
static void test_stream_round_trip_bytes(void) {
    static round_trip w;
    int n;
    memset(&w, 0, sizeof w);
    if (!talk_open(&w.t)) return;
    CHECK_OK(w.t.ctx, qwen3_seq_truncate(w.t.ctx, 0, 0));
    w.chat.msgs = w.msgs;
    w.chat.flags = QWEN3_CHAT_KEEP_THINKING;
    round_trip_add(&w, QWEN3_USER, "the fox?");
    round_trip_say(&w, "\nthe quick brown fox", 1);
    w.msgs[1].reasoning = "<think>\nthe quick brown fox\n</think>\n\n";    /* as streamed, tags and all */
    n = seq_len(w.t.ctx, 0);
    round_trip_add(&w, QWEN3_USER, "yes?");
    n = round_trip_say(&w, "no", 0);
    CHECK_MSG(n == 0, "%d tokens were evaluated again", n);
    talk_close(&w.t);
}

/* Reasoning renders the same with its tags and without. */
static void test_stream_reasoning_tags(void) {
    static const char *const forms[] = {"a\n\nb", "<think>\na\n\nb\n</think>\n\n", "\n<think>a\n\nb</think>", "<think>\na\n\nb\n"};
    qwen3_msg msgs[3];
    qwen3_chat_desc chat;
    fixture f;
    qwen3_token want[200], got[200];
    int i, n = 0, k;
    memset(msgs, 0, sizeof msgs);
    memset(&chat, 0, sizeof chat);
    if (!fixture_open(&f, "chat")) return;
    msgs[0].role = msgs[2].role = QWEN3_USER;
    msgs[1].role = QWEN3_ASSISTANT;
    chat.msgs = msgs;
    chat.n_msgs = 3;
    chat.flags = QWEN3_CHAT_KEEP_THINKING;
    for (i = 0; i < 4; i++) {
        msgs[1].reasoning = forms[i];
        k = qwen3_chat_render(f.model, &chat, i ? got : want, 200, NULL, 0);
        if (i == 0) n = k;
        CHECK_MSG(k == n && n < 200 && (i == 0 || memcmp(want, got, (size_t)n * sizeof *got) == 0), "form %d: %d tokens, not %d", i, k, n);
    }
    fixture_close(&f);
}

/* The oldest turns go when the context is full, whole, and seldom; the system prompt and the last turn stay. */
static void test_stream_forget(void) {
    enum { TURNS = 40, MAX = 200 };
    static qwen3_msg msgs[2 * TURNS + 1];
    qwen3_chat_desc chat;
    fixture f;
    qwen3_token ids[MAX + 1];
    int i, n, forgotten = 0, last = 0, jumps = 0, most = 0;
    memset(msgs, 0, sizeof msgs);
    memset(&chat, 0, sizeof chat);
    if (!fixture_open(&f, "chat")) return;
    chat.msgs = msgs;
    chat.n_forgotten = &forgotten;
    msgs[0].role = QWEN3_SYSTEM;
    msgs[0].text = "the quick brown fox";
    for (i = 0; i < TURNS; i++) {
        msgs[2 * i + 1].role = QWEN3_USER;
        msgs[2 * i + 1].text = i % 3 ? "yes?" : "the lazy dog jumps over the fox";
        msgs[2 * i + 2].role = QWEN3_ASSISTANT;
        msgs[2 * i + 2].text = "no";
        chat.n_msgs = 2 * i + 2;
        chat.max_prompt = 0;
        n = qwen3_chat_render(f.model, &chat, NULL, 0, NULL, 0);
        chat.max_prompt = MAX;
        if (n <= MAX) { CHECK(qwen3_chat_render(f.model, &chat, ids, MAX, NULL, 0) == n && forgotten == 0); continue; }
        n = qwen3_chat_render(f.model, &chat, ids, MAX, NULL, 0);
        CHECK_MSG(n > 0 && n <= MAX, "%d tokens", n);
        CHECK(forgotten >= last && forgotten % 2 == 0 && forgotten <= 2 * i && msgs[1 + forgotten].role == QWEN3_USER);
        jumps += forgotten > last;
        last = forgotten;
        most = n > most ? n : most;
    }
    CHECK_MSG(jumps >= 2 && jumps <= 12, "%d times something was forgotten", jumps);
    CHECK(most > MAX / 2);
    chat.n_msgs = 2;                                        /* one turn that does not fit alone */
    chat.max_prompt = 5;
    CHECK(qwen3_chat_render(f.model, &chat, NULL, 0, NULL, 0) > 5 && forgotten == 0);
    fixture_close(&f);
}

/* ---- text and messages ---------------------------------------------------------------------------------------- */
static void test_stream_detokenize(void) {
    static const char text[] = "h\xC3\xA9llo <think>\nthe fox</think>";
    fixture f;
    qwen3_token ids[64];
    char out[64] = "";
    int n;
    if (!fixture_open(&f, "chat")) return;
    n = qwen3_encode(f.model, text, sizeof text - 1, QWEN3_PARSE_SPECIAL, ids, 60, NULL, 0);
    ids[n] = f.info.im_end;
    CHECK(qwen3_detokenize(f.model, ids, n + 1, 0, out, 64) == (int)sizeof text - 1 && strcmp(out, text) == 0);
    CHECK(qwen3_detokenize(f.model, ids, n + 1, 0, NULL, 0) == (int)sizeof text - 1);
    CHECK(qwen3_detokenize(f.model, ids, n + 1, 0, out, 5) == (int)sizeof text - 1 && strcmp(out, "h\xC3\xA9l") == 0);
    CHECK(qwen3_detokenize(f.model, ids, n + 1, QWEN3_SHOW_SPECIAL, out, 64) == (int)sizeof text - 1 + 10);
    CHECK(strstr(out, "</think><|im_end|>") != NULL);
    ids[0] = -5;
    ids[1] = 1 << 30;
    CHECK(qwen3_detokenize(f.model, ids, 2, 0, out, 64) == 0 && out[0] == '\0');
    CHECK(qwen3_detokenize(f.model, NULL, 1, 0, out, 64) == QWEN3_ERR_ARG);
    CHECK(qwen3_detokenize(f.model, ids, 1, QWEN3_PARSE_SPECIAL, out, 64) == QWEN3_ERR_ARG);
    fixture_close(&f);
}

static void expect_render(const fixture *f, const qwen3_chat_desc *chat, const char *words) {
    char err[200];
    int n = qwen3_chat_render(f->model, chat, NULL, 0, err, sizeof err);
    CHECK_MSG(n == QWEN3_ERR_ARG && strcmp(err, words) == 0, "%d '%s', not '%s'", n, err, words);
}

/* Each cause has its own words. */
static void test_stream_messages(void) {
    static const char *const tools[2] = {"{}", "{\"a\": 1,}"};
    fixture f;
    qwen3_msg msgs[2];
    qwen3_tool_call calls[2] = {{"look", "{}"}, {"look", NULL}};
    qwen3_chat_desc chat;
    qwen3_token t;
    char err[200];
    memset(msgs, 0, sizeof msgs);
    memset(&chat, 0, sizeof chat);
    if (!fixture_open(&f, "chat")) return;
    expect_render(&f, NULL, "chat is NULL");
    expect_render(&f, &chat, "msgs is NULL, or n_msgs (0) not positive");
    chat.msgs = msgs;
    chat.n_msgs = 2;
    memset(&msgs[1].role, 9, sizeof msgs[1].role);
    expect_render(&f, &chat, "msgs[1].role is 151587081");
    msgs[1].role = QWEN3_ASSISTANT;
    msgs[1].calls = calls;
    msgs[1].n_calls = 2;
    expect_render(&f, &chat, "msgs[1].calls[1].arguments is NULL");
    msgs[1].n_calls = 0;
    chat.tools = tools;
    chat.n_tools = 2;
    CHECK(qwen3_chat_render(f.model, &chat, NULL, 0, err, sizeof err) == QWEN3_ERR_ARG);
    CHECK_MSG(strncmp(err, "tools[1] is not a JSON object: ", 31) == 0 && strstr(err, "at byte 8"), "'%s'", err);
    chat.flags = 1024;
    expect_render(&f, &chat, "flags has unknown bits: 1024");
    CHECK(qwen3_encode(f.model, "a", 1, 512, &t, 1, err, sizeof err) == QWEN3_ERR_ARG);
    CHECK_MSG(strcmp(err, "flags has unknown bits: 512") == 0, "'%s'", err);
    fixture_close(&f);
}

/* ---- hooks, and what a new user meets first ------------------------------------------------------------------- */
static void *odd_alloc(size_t size, void *user) {       /* as sqlite3_malloc: aligned to 8 */
    char *p = (char *)malloc(size + 32);
    (void)user;
    return p ? p + 8 : NULL;
}
static void odd_free(void *p, size_t size, void *user) {
    (void)size; (void)user;
    if (p) free((char *)p - 8);
}

static void test_stream_odd_allocator(void) {
    fixture f;
    qwen3_load_desc d;
    qwen3_ctx_desc k = ctx_desc(32, 1, 0, 0);
    qwen3_model *m = NULL;
    qwen3_ctx *ctx = NULL;
    char path[1024], err[200];
    if (!fixture_open(&f, "plain")) return;
    memset(&d, 0, sizeof d);
    model_path(path, sizeof path, "plain", "");
    d.path = path;
    d.allocator.alloc = k.allocator.alloc = odd_alloc;
    d.allocator.free = k.allocator.free = odd_free;
    CHECK(qwen3_load(&m, &d, err, sizeof err) == QWEN3_ERR_ARG && strstr(err, "aligned to 16 bytes"));
    CHECK(qwen3_ctx_create(&ctx, f.model, &k, err, sizeof err) == QWEN3_ERR_ARG && strstr(err, "aligned to 16 bytes"));
    fixture_close(&f);
}

typedef struct job_count { int calls, most; } job_count;
static void count_jobs(void *user, int count, void (*fn)(void *arg, int index), void *arg) {
    job_count *j = (job_count *)user;
    int i;
    j->calls++;
    if (count > j->most) j->most = count;
    for (i = count - 1; i >= 0; i--) fn(arg, i);
}

static void test_stream_jobs(void) {
    fixture f;
    qwen3_ctx_desc d = ctx_desc(64, 1, 0, 0);
    qwen3_ctx *ctx;
    qwen3_token tokens[50];
    job_count j;
    uint64_t seed = 9;
    if (!fixture_open(&f, "plain")) return;
    random_tokens(&seed, tokens, 50, f.info.n_vocab);
    d.jobs.parallel_for = count_jobs;
    d.jobs.user = &j;
    for (d.threads = 1; d.threads <= 3; d.threads++) {
        memset(&j, 0, sizeof j);
        ctx = ctx_open_desc(f.model, &d);
        if (ctx) CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens, 50, 0));
        CHECK_MSG(d.threads == 1 ? j.calls == 0 : j.calls > 0 && j.most <= d.threads, "%d threads: %d calls, %d at most",
                  d.threads, j.calls, j.most);
        qwen3_ctx_free(ctx);
    }
    fixture_close(&f);
}

static int warnings;
static char warning[300];
static void count_warnings(qwen3_log_level level, const char *message, void *user) {
    (void)user;
    if (level != QWEN3_LOG_WARN) return;
    warnings++;
    snprintf(warning, sizeof warning, "%s", message);
}

static void count_others(qwen3_log_level level, const char *message, void *user) {
    if (level == QWEN3_LOG_WARN && *message) ++*(int *)user;
}

/* Embedding with a chat model, and a model without a tokenizer, are warned of. */
static void test_stream_warnings(void) {
    model_files files;
    qwen3_load_desc d;
    qwen3_ctx_desc k = ctx_desc(64, 1, 0, 0);
    qwen3_model *m = NULL;
    qwen3_ctx *ctx = NULL;
    qwen3_info info;
    float *vector;
    char err[200];
    int i, others = 0;
    if (!model_files_read(&files, "chat")) return;
    memset(&d, 0, sizeof d);
    d.files = files.file;
    d.n_files = files.n;
    d.logger.log = count_warnings;
    warnings = 0;
    CHECK_MSG(qwen3_load(&m, &d, err, sizeof err) == QWEN3_OK && warnings == 0, "%s %s", err, warning);
    if (m && qwen3_ctx_create(&ctx, m, &k, err, sizeof err) == QWEN3_OK) {
        info = qwen3_get_info(m);
        vector = floats((size_t)info.n_embd);
        CHECK_OK(ctx, qwen3_embed(ctx, 0, NULL, "the fox", vector));
        CHECK_MSG(warnings == 1 && strstr(warning, "does not say"), "%d: %s", warnings, warning);
        qwen3_ctx_free(ctx);
        ctx = NULL;
        k.logger.log = count_others;    /* a context's own logger gets them instead */
        k.logger.user = &others;
        CHECK(qwen3_ctx_create(&ctx, m, &k, err, sizeof err) == QWEN3_OK);
        if (ctx) CHECK_OK(ctx, qwen3_embed(ctx, 0, NULL, "the fox", vector));
        CHECK_MSG(warnings == 1 && others == 1, "%d and %d", warnings, others);
        free(vector);
    }
    qwen3_ctx_free(ctx);
    qwen3_free(m);
    m = NULL;
    for (i = 0; i < files.n; i++) {
        if (strcmp(files.file[i].name, "tokenizer.json") != 0) continue;
        files.file[i].size /= 2;
        CHECK(qwen3_load(&m, &d, err, sizeof err) == QWEN3_ERR_FORMAT);
        CHECK_MSG(strstr(err, "tokenizer.json: the file ends in the midst of its JSON") != NULL, "'%s'", err);
        files.file[i].name = "other";
    }
    warnings = 0;
    CHECK(qwen3_load(&m, &d, err, sizeof err) == QWEN3_OK);
    CHECK_MSG(warnings == 1 && strstr(warning, "no tokenizer.json"), "%d: %s", warnings, warning);
    qwen3_free(m);
    model_files_free(&files);
}

#ifndef QWEN3_NO_STDIO
static void expect_no_directory(const char *path, const char *words) {
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    char err[300];
    memset(&d, 0, sizeof d);
    d.path = path;
    CHECK(qwen3_load(&m, &d, err, sizeof err) == QWEN3_ERR_IO);
    CHECK_MSG(strstr(err, words) && strstr(err, path), "'%s', not '%s'", err, words);
}

/* A path that is no directory: what it is instead. */
static void test_stream_not_a_directory(void) {
    char path[1024];
    model_path(path, sizeof path, "chat", "model.safetensors");
    expect_no_directory(path, "is a safetensors file: the directory");
    model_path(path, sizeof path, "chat", "config.json");
    expect_no_directory(path, "is a JSON file");
    model_path(path, sizeof path, "chat", "reference.ref");
    expect_no_directory(path, "is a file: the directory");
    expect_no_directory("no/such/thing", "there is no such directory");
}
#endif

static void suite_stream(void) {
    RUN(test_stream_odd_allocator);
    RUN(test_stream_jobs);
    RUN(test_stream_warnings);
#ifndef QWEN3_NO_STDIO
    RUN(test_stream_not_a_directory);
#endif
    RUN(test_stream_deadlines);
    RUN(test_stream_clock);
    RUN(test_stream_sync_pieces);
    RUN(test_stream_state_file);
    RUN(test_stream_round_trip);
    RUN(test_stream_round_trip_bytes);
    RUN(test_stream_reasoning_tags);
    RUN(test_stream_forget);
    RUN(test_stream_detokenize);
    RUN(test_stream_messages);
    RUN(test_stream_kinds);
    RUN(test_stream_held_text);
    RUN(test_stream_step);
    RUN(test_stream_feed);
    RUN(test_stream_arguments);
}
#endif
