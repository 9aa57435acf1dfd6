/* Speculation: with guesses the same text, sampler and state as without, and what becomes of the guesses. */
#ifndef QWEN3_TESTS_TEST_SPECULATION_H
#define QWEN3_TESTS_TEST_SPECULATION_H
#include "test_grammar.h"

/* All that a reply leaves behind. */
typedef struct outcome {
    qwen3_result result;
    qwen3_token  tokens[300];
    int          n, stopped_by;
    heard        text;
    qwen3_sampler sampler;
    uint64_t     saved;         /* a checksum of the saved state: tokens, logits, keys and values */
} outcome;

static uint64_t state_checksum(qwen3_ctx *ctx, int seq) {
    const uint64_t size = state_size(ctx, seq);
    unsigned char *p = (unsigned char *)malloc((size_t)size + 1);
    uint64_t sum = 14695981039346656037u, i, written = 0;
    CHECK(p && state_save(ctx, seq, p, size, &written) == QWEN3_OK && written == size);
    for (i = 0; p && i < size; i++) sum = (sum ^ p[i]) * 1099511628211u;
    free(p);
    return sum;
}

/* A reply to a prompt of random tokens, a part of which stands there twice. */
static void reply_to(qwen3_ctx *ctx, int n_vocab, uint64_t seed, qwen3_gen_desc gen, const qwen3_sampler *sampler,
                     outcome *o) {
    qwen3_token prompt[24];
    const qwen3_token *tokens;
    memset(o, 0, sizeof *o);
    random_tokens(&seed, prompt, 16, n_vocab);
    memcpy(prompt + 16, prompt + 2, 8 * sizeof *prompt);
    o->sampler = *sampler;
    gen.sampler = &o->sampler;
    gen.stopped_by = &o->stopped_by;
    gen.on_text = hear;
    gen.user = &o->text;
    CHECK_OK(ctx, qwen3_seq_truncate(ctx, 0, 0));
    CHECK_OK(ctx, eval(ctx, 0, prompt, 24, NULL));
    o->result = qwen3_generate(ctx, 0, &gen);
    tokens = qwen3_seq_tokens(ctx, 0, &o->n);
    CHECK(o->n >= 24 && o->n <= 300);
    memcpy(o->tokens, tokens, (size_t)o->n * sizeof *tokens);
    o->saved = state_checksum(ctx, 0);
}

static void check_same(const outcome *a, const outcome *b, int which, int draft_tokens) {
    CHECK_MSG(a->result == b->result && a->n == b->n && a->stopped_by == b->stopped_by,
              "case %d, %d guesses: result %d and %d, %d and %d tokens", which, draft_tokens, a->result, b->result,
              a->n, b->n);
    CHECK(memcmp(a->tokens, b->tokens, sizeof a->tokens) == 0);
    CHECK(strcmp(a->text.all, b->text.all) == 0 && strcmp(a->text.thinking, b->text.thinking) == 0);
    CHECK(a->sampler.rng == b->sampler.rng);
    CHECK_MSG(a->saved == b->saved, "case %d, %d guesses: another state", which, draft_tokens);
}

/* Greedy and sampled, with penalties, bias, stop strings, budgets and limits; guesses from the text, from the same
   model, which are always right when greedy, and from another one, which hardly ever are. */
static void test_speculation_same(void) {
    static const char *const stop[] = {"e", "th"};
    static const int counts[] = {1, 3, 16};
    static outcome plain, guessed;
    const qwen3_bias bias = {70, 3.0f};
    fixture f, other;
    qwen3_ctx *a, *b, *draft, *foreign;
    qwen3_stats stats;
    int i, k, from, compared = 0;
    if (!fixture_open(&f, "chat")) return;
    if (!fixture_open(&other, "chat")) { fixture_close(&f); return; }
    a = ctx_open(f.model, 120, 1, 0, QWEN3_KV_F32);
    b = ctx_open(f.model, 120, 1, 0, QWEN3_KV_F32);
    draft = ctx_open(other.model, 110, 1, 0, QWEN3_KV_F16);
    foreign = ctx_open(other.model, 40, 1, 5, QWEN3_KV_F16);
    if (b) b->pace.always_guess = 1;
    for (i = 0; a && b && draft && foreign && i < 24; i++) {
        qwen3_gen_desc gen;
        qwen3_sampler sampler = qwen3_sampler_preset(i % 3 == 0 ? QWEN3_GREEDY : QWEN3_THINKING, (uint64_t)i);
        memset(&gen, 0, sizeof gen);
        gen.max_tokens = i % 4 == 0 ? 0 : 60;
        gen.think_budget = i % 5 == 0 ? 7 : 0;
        if (i % 6 == 1) { gen.stop = stop; gen.n_stop = 2; }
        if (i % 4 == 2) sampler.repeat_penalty = 1.1f;
        if (i % 4 == 3) { sampler.bias = &bias; sampler.n_bias = 1; sampler.presence_penalty = 0.5f; }
        reply_to(a, f.info.n_vocab, (uint64_t)i, gen, &sampler, &plain);
        for (k = 0; k < 3; k++) for (from = 0; from < 3; from++, compared++) {
            gen.draft_tokens = counts[k];
            gen.draft = from == 1 ? draft : from == 2 ? foreign : NULL;
            reply_to(b, f.info.n_vocab, (uint64_t)i, gen, &sampler, &guessed);
            check_same(&plain, &guessed, i, counts[k]);
        }
    }
    CHECK(compared == 24 * 9);
    stats = qwen3_ctx_stats(b);
    CHECK_MSG(stats.n_accepted > 100 && stats.n_accepted < stats.n_drafted, "%d of %d guesses", (int)stats.n_accepted,
              (int)stats.n_drafted);
    CHECK(qwen3_ctx_stats(a).n_drafted == 0);
    qwen3_ctx_free(a); qwen3_ctx_free(b); qwen3_ctx_free(draft); qwen3_ctx_free(foreign);
    fixture_close(&f); fixture_close(&other);
}

/* Biases that let no turn end. */
static int never_ends(const qwen3_model *m, qwen3_bias *bias) {
    int i;
    for (i = 0; i < m->n_eos && i < 4; i++) { bias[i].token = m->eos[i]; bias[i].bias = -1e30f; }
    return i;
}

/* n prompts and up to 256 tokens each, greedy and sampled, with all that a sampler can do; other: the same model. */
static void speculate_on_prompts(grammar_bench *b, const fixture *other, int n) {
    static outcome plain, guessed;
    qwen3_bias bias[5] = {{70, 3.0f}};
    qwen3_ctx_desc d = ctx_desc(280, 1, 0, 0);
    qwen3_ctx *ctx[2], *draft;
    char err[400];
    qwen3_token answer[300];
    int i, k, n_tokens = 0, n_ended = 0;
    d.yarn_factor = 2;
    d.invariant = 1;
    for (k = 0; k < 2; k++) ctx[k] = ctx_open_desc(b->f.model, &d);
    draft = ctx_open_desc(other->model, &d);
    if (ctx[1]) ctx[1]->pace.always_guess = 1;
    CHECK(grammar_set(b, 0, grammar_order, 0, err, sizeof err) == QWEN3_OK);
    for (i = 0; ctx[0] && ctx[1] && draft && i < n; i++) {
        qwen3_sampler sampler = qwen3_sampler_preset(i % 2 ? QWEN3_GREEDY : QWEN3_THINKING, (uint64_t)i);
        qwen3_gen_desc gen;
        memset(&gen, 0, sizeof gen);
        gen.max_tokens = 256;
        sampler.bias = bias + (i % 3 > 0);
        sampler.n_bias = i % 8 == 0 ? 0 : never_ends(b->f.model, bias + 1) + (i % 3 == 0);
        if (i % 5 == 0) { sampler.repeat_penalty = 1.2f; sampler.penalty_last_n = 20; }
        if (i % 7 == 0) sampler.presence_penalty = 0.4f;
        if (i % 11 == 0) sampler.min_p = 0.02f;
        if (i % 13 == 0) gen.grammar = b->g;
        if (i % 17 == 0) gen.think_budget = 30;
        reply_to(ctx[0], b->f.info.n_vocab, (uint64_t)(900 + i), gen, &sampler, &plain);
        gen.draft_tokens = 1 + i % 16;
        gen.draft = i % 4 < 2 ? draft : NULL;
        if (i % 8 == 0) {               /* all of it is guessed, its end, too, and more */
            for (k = 0; k < 300; k++) answer[k] = k < plain.n ? plain.tokens[k] : b->f.model->eos[0];
            ctx[1]->pace.answer = answer;
        }
        reply_to(ctx[1], b->f.info.n_vocab, (uint64_t)(900 + i), gen, &sampler, &guessed);
        ctx[1]->pace.answer = NULL;
        check_same(&plain, &guessed, i, gen.draft_tokens);
        n_ended += plain.result == QWEN3_END;
        n_tokens += guessed.n - 24;
    }
    if (test_verbose && ctx[1]) {
        const qwen3_stats stats = qwen3_ctx_stats(ctx[1]);
        printf("    %d prompts, %d tokens, %d of %d guesses right\n", i, n_tokens, (int)stats.n_accepted,
               (int)stats.n_drafted);
    }
    CHECK_MSG(n < 200 || (n_tokens > 40000 && n_ended > 10), "%d tokens, %d replies ended", n_tokens, n_ended);
    for (k = 0; k < 2; k++) qwen3_ctx_free(ctx[k]);
    qwen3_ctx_free(draft);
}

static void test_speculation_prompts(void) {
    grammar_bench b;
    fixture other;
    if (!grammar_open(&b)) return;
    if (fixture_open(&other, "chat")) {
        speculate_on_prompts(&b, &other, test_short ? 20 : 200);
        fixture_close(&other);
    }
    grammar_close(&b);
}

/* A reply that is saved in the middle of its guesses and goes on in another context. */
static void test_speculation_moves(void) {
    enum { ALL = 80 };
    fixture f;
    qwen3_ctx *a, *b, *c;
    qwen3_gen_desc gen;
    qwen3_sampler start = qwen3_sampler_preset(QWEN3_THINKING, 3), sampler;
    qwen3_bias bias[4];
    qwen3_token prompt[24];
    const qwen3_token *want, *got;
    uint64_t seed = 8;
    int steps, n, len, moved = 0;
    memset(&gen, 0, sizeof gen);
    if (!fixture_open(&f, "chat")) return;
    random_tokens(&seed, prompt, 16, f.info.n_vocab);
    memcpy(prompt + 16, prompt + 2, 8 * sizeof *prompt);
    a = ctx_open(f.model, 120, 1, 0, 0);
    b = ctx_open(f.model, 120, 1, 0, 0);
    c = ctx_open(f.model, 120, 1, 0, 0);
    gen.max_tokens = ALL;
    gen.sampler = &sampler;
    start.n_bias = never_ends(f.model, bias);
    start.bias = bias;
    sampler = start;
    if (!a || !b || !c || !CHECK_OK(a, eval(a, 0, prompt, 24, NULL)) || !CHECK(qwen3_generate(a, 0, &gen) == QWEN3_OK))
        goto done;
    want = qwen3_seq_tokens(a, 0, &n);
    for (steps = 1; steps < 12; steps += 2) {
        qwen3_stream s, *list = &s;
        uint64_t size;
        void *state;
        int i;
        sampler = start;
        b->pace.always_guess = c->pace.always_guess = 1;
        gen.max_tokens = ALL;
        gen.draft_tokens = 6;
        CHECK_OK(b, qwen3_seq_truncate(b, 0, 0));
        CHECK_OK(b, eval(b, 0, prompt, 24, NULL));
        CHECK_OK(b, qwen3_stream_begin(b, 0, NULL, &gen, &s));
        for (i = 0; i < steps; i++) CHECK(qwen3_stream_step(b, &list, 1, -1) == QWEN3_MORE);
        size = state_size(b, 0);
        state = malloc((size_t)size);
        CHECK_OK(b, state_save(b, 0, state, size, NULL));
        CHECK_OK(c, state_load(c, 0, state, size));
        free(state);
        gen.max_tokens = ALL + 24 - seq_len(c, 0);
        moved += seq_len(c, 0) > 24 && gen.max_tokens > 0;
        CHECK(qwen3_generate(c, 0, &gen) == QWEN3_OK);
        got = qwen3_seq_tokens(c, 0, &len);
        CHECK_MSG(len == n && memcmp(got, want, (size_t)n * sizeof *got) == 0, "moved after %d steps: another text", steps);
        CHECK(same_logits(c, 0, qwen3_logits(a, 0), f.info.n_vocab));
    }
    CHECK(moved > 3);
done:
    qwen3_ctx_free(a);
    qwen3_ctx_free(b);
    qwen3_ctx_free(c);
    fixture_close(&f);
}

/* Several sequences in steps, some of which speculate; a deadline that cancels steps; the same texts. */
static void test_speculation_together(void) {
    enum { N = 3 };
    static heard want[N], got[N];
    fixture f;
    deadline limit;
    qwen3_ctx_desc d = ctx_desc(200, N, 0, 0);
    qwen3_ctx *a, *b;
    qwen3_chat_desc chat;
    qwen3_gen_desc gen;
    qwen3_sampler sampler[N];
    qwen3_stream stream[N], *list[N];
    qwen3_result r;
    int i, most, calls;
    memset(&chat, 0, sizeof chat);
    memset(&gen, 0, sizeof gen);
    if (!fixture_open(&f, "chat")) return;
    memset(&limit, 0, sizeof limit);
    limit.most = INT_MAX;
    d.cancel = deadline_over;
    d.cancel_user = &limit;
    a = ctx_open(f.model, 200, N, 0, 0);
    b = ctx_open_desc(f.model, &d);
    chat.msgs = stream_msgs;
    gen.on_text = hear;
    gen.max_tokens = 40;
    memset(want, 0, sizeof want);
    for (i = 0; a && b && i < N; i++) {
        sampler[i] = qwen3_sampler_preset(i ? QWEN3_THINKING : QWEN3_GREEDY, (uint64_t)i);
        gen.sampler = &sampler[i];
        gen.user = &want[i];
        chat.n_msgs = 1 + i % 2;
        CHECK(qwen3_chat(a, i, &chat, &gen) >= 0);
    }
    if (b) b->pace.always_guess = 1;
    for (most = 3; a && b && most < 400; most *= 2) {
        memset(got, 0, sizeof got);
        for (i = 0; i < N; i++) {
            sampler[i] = qwen3_sampler_preset(i ? QWEN3_THINKING : QWEN3_GREEDY, (uint64_t)i);
            gen.sampler = &sampler[i];
            gen.user = &got[i];
            gen.draft_tokens = 4 * (i != 1);
            chat.n_msgs = 1 + i % 2;
            list[i] = &stream[i];
            CHECK_OK(b, qwen3_stream_begin(b, i, &chat, &gen, &stream[i]));
        }
        for (calls = 0, r = QWEN3_MORE; r != QWEN3_OK && calls < 5000; calls++) {
            limit.most = most;
            limit.polls = 0;
            r = qwen3_stream_step(b, list, N, calls % 2);
            CHECK(r == QWEN3_OK || r == QWEN3_MORE || r == QWEN3_STOPPED);
        }
        limit.most = INT_MAX;
        CHECK_MSG(r == QWEN3_OK, "not complete after %d calls of %d polls", calls, most);
        for (i = 0; i < N; i++) {
            CHECK_MSG(strcmp(want[i].all, got[i].all) == 0, "'%s', not '%s'", got[i].all, want[i].all);
            CHECK(same_logits(b, i, qwen3_logits(a, i), f.info.n_vocab));
            CHECK_OK(b, qwen3_seq_truncate(b, i, 0));
        }
    }
    qwen3_ctx_free(a);
    qwen3_ctx_free(b);
    fixture_close(&f);
}

/* Held to a grammar, near the end of the room, too. */
static void test_speculation_grammar(void) {
    grammar_bench b;
    qwen3_ctx *ctx[2];
    qwen3_chat_desc chat;
    qwen3_gen_desc gen;
    qwen3_sampler sampler[2];
    static heard text[2];
    char err[400];
    int i, k;
    if (!grammar_open(&b)) return;
    memset(&chat, 0, sizeof chat);
    memset(&gen, 0, sizeof gen);
    chat.msgs = stream_msgs;
    chat.n_msgs = 1;
    chat.flags = QWEN3_CHAT_NO_THINK;
    for (k = 0; k < 2; k++) ctx[k] = ctx_open(b.f.model, 256, 1, 0, 0);
    CHECK(grammar_set(&b, 0, grammar_order, 0, err, sizeof err) == QWEN3_OK);
    gen.grammar = b.g;
    gen.on_text = hear;
    if (ctx[1]) ctx[1]->pace.always_guess = 1;
    for (i = 0; ctx[0] && ctx[1] && i < 20; i++) {
        for (k = 0; k < 2; k++) {
            memset(&text[k], 0, sizeof text[k]);
            sampler[k] = qwen3_sampler_preset(i % 2 ? QWEN3_GREEDY : QWEN3_THINKING, (uint64_t)i);
            gen.sampler = &sampler[k];
            gen.user = &text[k];
            gen.max_tokens = 34 + 2 * i;
            gen.draft_tokens = k * (1 + i % 5);
            CHECK(qwen3_chat(ctx[k], 0, &chat, &gen) >= 0);
        }
        CHECK_MSG(strcmp(text[0].all, text[1].all) == 0, "'%s', not '%s'", text[1].all, text[0].all);
        CHECK(sampler[0].rng == sampler[1].rng && state_checksum(ctx[0], 0) == state_checksum(ctx[1], 0));
    }
    for (k = 0; k < 2; k++) qwen3_ctx_free(ctx[k]);
    grammar_close(&b);
}

/* How long n tokens take, with one a step as 1, where each guess makes a step longer by so much and such a share of
   them is right. */
static double time_with_guesses(double each, double share, int n) {
    qwen3i_pace pace;
    qwen3i_draft d;
    uint64_t rng = 1;
    double time = 0;
    int k, done = 0;
    memset(&pace, 0, sizeof pace);
    memset(&d, 0, sizeof d);
    qwen3i_draft_start(&d);
    while (done < n) {
        d.idle++;
        qwen3i_draft_settle(&pace, &d, d.right);
        d.right = 0;
        d.n = qwen3i_draft_count(&pace, &d, 8, 0);
        if (d.n > 0) qwen3i_guessed(&pace, &d);
        pace.step_ms[d.n] = 1 + each * d.n;
        time += pace.step_ms[d.n];
        for (k = 0; k < d.n && (double)(qwen3i_random(&rng) % 1000) < 1000 * share; k++) {
            qwen3i_learn(&d, 1);
            d.right++;
        }
        if (k < d.n) qwen3i_learn(&d, 0);
        done += 1 + d.right;
    }
    return time / done;
}

/* Guesses never cost more than a twentieth, and bring most of what they could. */
static void test_speculation_pace(void) {
    static const double each[] = {0.001, 0.05, 0.3, 0.7, 1, 3};
    int i, k;
    for (i = 0; i < 6; i++)
        for (k = 0; k <= 10; k++) {
            const double time = time_with_guesses(each[i], 0.1 * k, 400);
            CHECK_MSG(time < 1.05, "%g a guess, %d %% right: %.3f of plain", each[i], 10 * k, time);
            if (each[i] <= 0.05 && k >= 6) CHECK_MSG(time < 0.62, "%g a guess, %d %% right: %.3f of plain", each[i], 10 * k, time);
        }
}

/* What is refused, and memory that is not there. */
static void test_speculation_refusals(void) {
    const qwen3_token start[3] = {1, 2, 3};
    fixture f, other;
    test_heap heap;
    qwen3_ctx_desc d = ctx_desc(64, 2, 0, 0);
    qwen3_ctx *ctx, *draft;
    qwen3_gen_desc gen;
    qwen3_stream s;
    memset(&gen, 0, sizeof gen);
    memset(&heap, 0, sizeof heap);
    if (!fixture_open(&f, "chat")) return;
    if (!fixture_open(&other, "plain")) { fixture_close(&f); return; }
    d.allocator.alloc = heap_alloc;
    d.allocator.free = heap_free;
    d.allocator.user = &heap;
    ctx = ctx_open_desc(f.model, &d);
    draft = ctx_open(other.model, 64, 1, 0, 0);
    if (ctx && draft) {
        CHECK_OK(ctx, eval(ctx, 1, start, 3, NULL));
        gen.draft_tokens = -1;
        CHECK(qwen3_stream_begin(ctx, 1, NULL, &gen, &s) == QWEN3_ERR_ARG);
        gen.draft_tokens = 4;
        gen.draft = ctx;
        CHECK(qwen3_stream_begin(ctx, 1, NULL, &gen, &s) == QWEN3_ERR_ARG && strstr(qwen3_ctx_error(ctx), "to guess for"));
        gen.draft = draft;
        CHECK(qwen3_stream_begin(ctx, 1, NULL, &gen, &s) == QWEN3_ERR_ARG && strstr(qwen3_ctx_error(ctx), "no sequence 1"));
        CHECK(qwen3_stream_begin(ctx, 0, NULL, &gen, &s) == QWEN3_ERR_ARG && strstr(qwen3_ctx_error(ctx), "vocabulary"));
        gen.draft = NULL;
        heap.fail_at = heap.calls + 1;
        CHECK(qwen3_stream_begin(ctx, 1, NULL, &gen, &s) == QWEN3_ERR_MEMORY);
        gen.draft_tokens = 1000;        /* as many as there is room for */
        CHECK_OK(ctx, qwen3_stream_begin(ctx, 1, NULL, &gen, &s));
        gen.max_tokens = 10;
        CHECK(qwen3_generate(ctx, 1, &gen) == QWEN3_OK);
        CHECK(seq_len(ctx, 1) == 13);
    }
    qwen3_ctx_free(ctx);
    qwen3_ctx_free(draft);
    CHECK(heap.live == 0 && heap.bad == 0);
    fixture_close(&f);
    fixture_close(&other);
}

static void suite_speculation(void) {
    RUN(test_speculation_same);
    RUN(test_speculation_prompts);
    RUN(test_speculation_moves);
    RUN(test_speculation_together);
    RUN(test_speculation_grammar);
    RUN(test_speculation_pace);
    RUN(test_speculation_refusals);
}
#endif
