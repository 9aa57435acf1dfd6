/* Grammars: what they accept and refuse, masks against the machine token by token, replies that parse. */
#ifndef QWEN3_TESTS_TEST_GRAMMAR_H
#define QWEN3_TESTS_TEST_GRAMMAR_H
#include "fixture.h"

typedef struct grammar_case { const char *grammar, *yes, *no; } grammar_case;   /* texts apart by newlines */

typedef struct grammar_bench { fixture f; qwen3_grammar *g; qwen3i_masker *k; qwen3i_guide guide; qwen3_allocator a; } grammar_bench;

static int grammar_open(grammar_bench *b) {
    memset(b, 0, sizeof *b);
    return fixture_open(&b->f, "chat");
}

static qwen3_result grammar_set(grammar_bench *b, int kind, const char *text, int flags, char *err, size_t size) {
    qwen3_grammar_desc desc;
    qwen3_result r;
    memset(&desc, 0, sizeof desc);
    desc.kind = (qwen3_grammar_kind)kind;
    desc.text = text;
    desc.n_bytes = strlen(text);
    desc.flags = flags;
    qwen3_grammar_free(b->g);
    r = qwen3_grammar_create(&b->g, b->f.model, &desc, err, size);
    if (r == QWEN3_OK && !b->k) b->k = qwen3i_masker_make(&b->a, b->g->vocab);
    return r;
}

static void grammar_close(grammar_bench *b) {
    qwen3_grammar_free(b->g);
    qwen3i_masker_free(&b->a, b->k);
    fixture_close(&b->f);
}

/* Is the text, byte by byte, whole and of the grammar? The cost of its end must shrink to 0. */
static int grammar_accepts(grammar_bench *b, const char *text, size_t n) {
    size_t i;
    qwen3i_span set;
    qwen3i_guide_begin(b->k, &b->guide, b->g);
    for (i = 0; i < n; i++) if (!qwen3i_guide_bytes(b->k, &b->guide, text + i, 1)) return 0;
    set = qwen3i_guide_load(b->k, &b->guide);
    return qwen3i_set_may_end(&b->k->m, set);
}

static void grammar_expect(grammar_bench *b, const grammar_case *c, const char *texts, int want) {
    while (texts && *texts) {
        const char *end = strchr(texts, '\n');
        const size_t n = end ? (size_t)(end - texts) : strlen(texts);
        CHECK_MSG(grammar_accepts(b, texts, n) == want, "%s: %s '%.*s'", c->grammar, want ? "refuses" : "accepts", (int)n, texts);
        texts = end ? end + 1 : NULL;
    }
}

static void grammar_run(int kind, const grammar_case *cases, int n) {
    grammar_bench b;
    char err[400] = "";
    int i;
    if (!grammar_open(&b)) return;
    for (i = 0; i < n; i++) {
        if (!CHECK_MSG(grammar_set(&b, kind, cases[i].grammar, 0, err, sizeof err) == QWEN3_OK, "%s: %s", cases[i].grammar, err)) continue;
        grammar_expect(&b, &cases[i], cases[i].yes, 1);
        grammar_expect(&b, &cases[i], cases[i].no, 0);
    }
    grammar_close(&b);
}

static void test_grammar_schema(void) {
    static const grammar_case cases[] = {
        {"{}", "1\n\"a\"\n{\"a\":[1,{}]}\n[ 1 , 2 ]\nnull\n-0.5e+3", "01\n{\"a\":}\n[1,]\nnul\n\"\\x\"\n1 \n.5\n\"\\ud800\""},
        {"true", "{}\n3", "{"},
        {"{\"type\":\"integer\"}", "0\n-7\n12", "1.0\n1e3\n-\n\"1\"\n01"},
        {"{\"type\":[\"null\",\"boolean\"]}", "null\ntrue\nfalse", "0\n\"\"\ntru"},
        {"{\"minimum\":-3,\"maximum\":12.5,\"type\":\"number\"}", "-3\n-2.999\n0\n12.5\n12.49\n3.25", "-3.01\n12.51\n13\n100\n-4\n1e1"},
        {"{\"exclusiveMinimum\":0,\"exclusiveMaximum\":1,\"type\":\"number\"}", "0.5\n0.0001\n0.999", "0\n1\n0.0\n1.0\n-0\n-0.5"},
        {"{\"minimum\":0,\"exclusiveMinimum\":true,\"type\":\"integer\"}", "1\n10", "0\n-1\n-0"},
        {"{\"type\":\"integer\",\"minimum\":95,\"maximum\":1203}", "95\n99\n100\n999\n1000\n1203", "94\n1204\n2000\n9\n10000"},
        {"{\"type\":\"integer\",\"multipleOf\":7,\"minimum\":0}", "0\n7\n14\n7007", "1\n8\n-7"},
        {"{\"enum\":[1,\"a\\\"\\u00e9\",null,{\"k\":[2,true]}]}", "1\n\"a\\\"\xC3\xA9\"\nnull\n{\"k\":[2,true]}\n{ \"k\" : [ 2, true ] }",
         "2\n\"a\"\n{}\n{\"k\":[2]}\n{\"k\":[2,true,1]}\ntrue"},
        {"{\"const\":\"x\"}", "\"x\"", "\"y\"\n\"xx\"\n\"\""},
        {"{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}", "\"ab\"\n\"abc\"\n\"\\n\\u00e9\"\n\"\xF0\x9F\x98\x80z\"", "\"a\"\n\"abcd\"\n\"\""},
        {"{\"type\":\"string\",\"maxLength\":65536}", "\"\"\n\"abc\"", "1"},
        {"{\"type\":\"string\",\"pattern\":\"^[a-z]{2,65536}$\"}", "\"ab\"\n\"abcabc\"", "\"a\"\n\"aB\"\n\"\""},
        {"{\"type\":\"string\",\"pattern\":\"b+$|^x\"}", "\"b\"\n\"aab\"\n\"xyz\"", "\"a\"\n\"bx\"\n\"\""},
        {"{\"type\":\"string\",\"pattern\":\"^(ab)*$\",\"minLength\":3,\"maxLength\":4}", "\"abab\"", "\"ab\"\n\"ababab\"\n\"aba\""},
        {"{\"type\":\"string\",\"format\":\"date\"}", "\"2024-02-29\"\n\"1999-12-31\"", "\"2023-02-29\"\n\"2024-13-01\"\n\"0000-01-01\"\n\"24-1-1\""},
        {"{\"type\":\"string\",\"format\":\"date-time\"}", "\"2024-02-29T10:00:00Z\"\n\"2024-01-01T23:59:59.125+01:00\"", "\"2024-01-01\"\n\"2024-01-01T24:00:00Z\""},
        {"{\"type\":\"string\",\"format\":\"ipv4\"}", "\"1.2.3.4\"\n\"255.0.255.0\"", "\"256.1.1.1\"\n\"1.2.3\"\n\"01.2.3.4\""},
        {"{\"type\":\"string\",\"format\":\"ipv6\"}", "\"::\"\n\"::1\"\n\"1:2:3:4:5:6:7:8\"\n\"fe80::1:2\"", "\":1\"\n\"1::2::3\"\n\"12345::\""},
        {"{\"type\":\"string\",\"format\":\"uri\"}", "\"https://a.b/c?d=e#f\"\n\"urn:x:y\"\n\"mailto:a@b.c\"", "\"//a\"\n\"a b:c\"\n\"x\""},
        {"{\"type\":\"string\",\"format\":\"email\"}", "\"a.b+c@d.example\"", "\"a@\"\n\"@b\"\n\"a b@c\""},
        {"{\"type\":\"string\",\"format\":\"no-such-format\"}", "\"anything\"", "1"},
        {"{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},\"ab\":{\"type\":\"boolean\"}},\"required\":[\"a\"]}",
         "{\"a\":1}\n{\"ab\":true,\"a\":2}\n{\"x\":{},\"a\":1}", "{}\n{\"ab\":true}\n{\"a\":1,\"a\":2}\n{\"a\":\"1\"}\n{\"ab\":1,\"a\":1}\n{\"a\":1,}\n{\"\\u0061\":1}"},
        {"{\"type\":\"object\",\"properties\":{\"a\":{},\"ab\":{}},\"additionalProperties\":false}", "{}\n{\"ab\":1,\"a\":2}", "{\"b\":1}\n{\"a\":1,\"a\":1}\n{\"a\":1,\"b\":1}"},
        {"{\"type\":\"object\",\"patternProperties\":{\"^n_\":{\"type\":\"number\"},\"_s$\":{\"type\":\"integer\"}},\"additionalProperties\":{\"type\":\"string\"}}",
         "{\"n_a\":1.5,\"x\":\"y\",\"n_s\":3}", "{\"n_a\":\"x\"}\n{\"x\":1}\n{\"n_s\":1.5}"},
        {"{\"type\":\"object\",\"propertyNames\":{\"pattern\":\"^[a-c]+$\"},\"minProperties\":1}", "{\"a\":1}\n{\"abc\":1,\"c\":2}", "{}\n{\"d\":1}\n{\"\":1}"},
        {"{\"type\":\"object\",\"properties\":{\"a\":{},\"b\":{},\"c\":{}},\"required\":[\"c\"],\"additionalProperties\":false,\"maxProperties\":2}",
         "{\"c\":1}\n{\"a\":1,\"c\":1}", "{\"a\":1}\n{\"a\":1,\"b\":1}\n{\"a\":1,\"b\":1,\"c\":1}"},
        {"{\"type\":\"object\",\"properties\":{\"a\":{},\"b\":{},\"c\":{}},\"minProperties\":2,\"additionalProperties\":false}", "{\"a\":1,\"b\":2}", "{}\n{\"a\":1}"},
        {"{\"type\":\"array\",\"items\":{\"type\":\"integer\"},\"minItems\":1,\"maxItems\":3}", "[1]\n[1,2,3]", "[]\n[1,2,3,4]\n[true]\n[1,]"},
        {"{\"type\":\"array\",\"prefixItems\":[{\"type\":\"string\"},{\"const\":1}],\"items\":false}", "[]\n[\"a\"]\n[\"a\",1]", "[1]\n[\"a\",2]\n[\"a\",1,1]"},
        {"{\"type\":\"array\",\"items\":[{\"type\":\"null\"}],\"additionalItems\":{\"type\":\"boolean\"}}", "[]\n[null,true]", "[true]\n[null,null]"},
        {"{\"allOf\":[{\"properties\":{\"a\":{\"minimum\":2}}},{\"properties\":{\"a\":{\"type\":\"integer\"}},\"required\":[\"a\"]}],\"type\":\"object\"}",
         "{\"a\":2}\n{\"b\":1,\"a\":30}", "{\"a\":1}\n{\"a\":2.5}\n{}"},
        {"{\"anyOf\":[{\"type\":\"string\",\"maxLength\":2},{\"type\":\"integer\"},{\"enum\":[\"long one\"]}]}", "\"ab\"\n7\n\"long one\"", "\"abc\"\n1.5\n\"long\""},
        {"{\"oneOf\":[{\"type\":\"integer\"},{\"type\":\"number\",\"minimum\":2}]}", "1\n2.5\n3.5", "3\n1.5\n\"\""},
        {"{\"type\":\"object\",\"oneOf\":[{\"required\":[\"a\"]},{\"required\":[\"b\"]}]}", "{\"a\":1}\n{\"b\":1,\"c\":2}", "{}\n{\"a\":1,\"b\":1}\n{\"c\":1}"},
        {"{\"not\":{\"type\":[\"object\",\"string\",\"array\"]}}", "1\nnull\ntrue", "\"\"\n{}\n[]"},
        {"{\"type\":\"string\",\"not\":{\"enum\":[\"a\",\"b\"]}}", "\"c\"\n\"ab\"\n\"\"", "\"a\"\n\"b\""},
        {"{\"type\":\"integer\",\"not\":{\"const\":5}}", "4\n55\n-5", "5"},
        {"{\"type\":\"object\",\"properties\":{\"k\":{\"enum\":[\"x\",\"y\"]}},\"required\":[\"k\"],\"if\":{\"properties\":{\"k\":{\"const\":\"x\"}}},"
         "\"then\":{\"required\":[\"v\"]},\"else\":{\"properties\":{\"v\":false}}}", "{\"k\":\"x\",\"v\":1}\n{\"k\":\"y\"}", "{\"k\":\"x\"}\n{\"k\":\"y\",\"v\":1}"},
        {"{\"type\":\"object\",\"dependencies\":{\"a\":[\"b\"],\"c\":{\"required\":[\"d\"]}}}", "{}\n{\"b\":1}\n{\"b\":1,\"a\":1}\n{\"c\":1,\"d\":1}", "{\"a\":1}\n{\"c\":1}"},
        {"{\"$defs\":{\"t\":{\"type\":\"object\",\"properties\":{\"next\":{\"$ref\":\"#/$defs/t\"}},\"additionalProperties\":false}},\"$ref\":\"#/$defs/t\"}",
         "{}\n{\"next\":{\"next\":{}}}", "{\"next\":1}\n{\"x\":{}}"},
        {"{\"$schema\":\"http://json-schema.org/draft-07/schema#\",\"definitions\":{\"a/b\":{\"type\":\"null\"}},\"$ref\":\"#/definitions/a~1b\",\"type\":\"string\"}", "null", "\"\""}
    };
    grammar_run(QWEN3_GRAMMAR_JSON_SCHEMA, cases, (int)(sizeof cases / sizeof *cases));
}

static void test_grammar_regex(void) {
    static const grammar_case cases[] = {
        {"a(b|c)*d?", "a\nabcd\nacc", "b\nad d\nabdd\n"},
        {"^[^a-c\\d]{2}$", "xy\n\xC3\xA9!", "ax\nx1\nx\nxyz"},
        {"(?:\\u0041|\\x42)\\.\\w\\s", "A.x \nB._\t", "C.x \nA.- "},
        {"(?<name>a{2,3}){2}", "aaaa\naaaaaa", "aaa\naaaaaaa"},
        {"a{,2}|]", "a{,2}\n]", "aa"}
    };
    grammar_run(QWEN3_GRAMMAR_REGEX, cases, (int)(sizeof cases / sizeof *cases));
}

static void test_grammar_gbnf(void) {
    static const grammar_case cases[] = {
        {"root ::= \"a\" [0-9]+ (\"x\" | \"y\")?  # a comment\n", "a1\na12x\na0y", "a\na1z\n1"},
        {"root ::= expr\nexpr ::= term (\" + \" term)*\nterm ::= [a-z]+ |\n  \"(\" expr \")\"\n", "a\na + b\n(a + (bc)) + d", "a +\n(a\na)\n()"},
        {"root ::= \"[\" (root (\",\" root)*)? \"]\"", "[]\n[[],[[]]]", "[[]\n[],\n[,]"},
        {"root ::= \"\\x41\\n\" . [^\\n]{2,3}", "", "A"},
        {"root ::= s\ns ::= \"a\" s \"b\" | \"\"", "ab\naabb\naaabbb", "aab\nabb\nba"}
    };
    grammar_run(QWEN3_GRAMMAR_GBNF, cases, (int)(sizeof cases / sizeof *cases));
}

/* A keyword that would not be enforced is an error that says where. */
static void test_grammar_refusals(void) {
    static const struct { int kind; const char *grammar; qwen3_result result; const char *says; } cases[] = {
        {0, "{\"properties\":{\"a\":{\"unevaluatedProperties\":false}}}", QWEN3_ERR_UNSUPPORTED, "/properties/a/unevaluatedProperties"},
        {0, "{\"items\":{\"type\":\"string\",\"format\":\"regex\"}}", QWEN3_ERR_UNSUPPORTED, "/items/format"},
        {0, "{\"anyOf\":[{},{\"type\":\"text\"}]}", QWEN3_ERR_FORMAT, "/anyOf/1/type"},
        {0, "{\"type\":\"string\",\"pattern\":\"a(b\"}", QWEN3_ERR_FORMAT, "/pattern"},
        {0, "{\"type\":\"string\",\"pattern\":\"(a)\\\\1\"}", QWEN3_ERR_UNSUPPORTED, "/pattern"},
        {0, "{\"$ref\":\"#/definitions/none\"}", QWEN3_ERR_UNSUPPORTED, "/$ref"},
        {0, "{\"$ref\":\"#\"}", QWEN3_ERR_UNSUPPORTED, "without end"},
        {0, "{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#\"}},\"required\":[\"a\"]}", QWEN3_ERR_FORMAT, "nothing finite"},
        {0, "{\"type\":\"integer\",\"enum\":[\"a\"]}", QWEN3_ERR_FORMAT, "nothing"},
        {0, "{\"a\":1", QWEN3_ERR_FORMAT, "byte 6"},
        {2, "root ::= root \"a\" | \"b\"", QWEN3_ERR_UNSUPPORTED, "\"root\": left recursion"},
        {2, "root ::= a\na ::= (b? )* \"x\"\nb ::= \"(\" a \")\" | c\nc ::= b", QWEN3_ERR_UNSUPPORTED, "left recursion"},
        {2, "root ::= x", QWEN3_ERR_FORMAT, "\"x\" is not defined"}, {2, "a ::= \"x\"", QWEN3_ERR_FORMAT, "\"root\""},
        {2, "root ::= \"a\"\nroot ::= \"b\"", QWEN3_ERR_FORMAT, "line 2"}, {2, "root ::= \"a", QWEN3_ERR_FORMAT, "not closed"},
        {2, "root ::= \"a\" root", QWEN3_ERR_FORMAT, "nothing finite"},
        {1, "a{3,1}", QWEN3_ERR_FORMAT, "byte"},
        {1, "(?=a)b", QWEN3_ERR_UNSUPPORTED, "lookahead"},
        {1, "(a|aa){1,9000}b{1,9000}", QWEN3_ERR_UNSUPPORTED, "too complex"}
    };
    grammar_bench b;
    char err[400];
    int i;
    if (!grammar_open(&b)) return;
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        const qwen3_result r = grammar_set(&b, cases[i].kind, cases[i].grammar, 0, err, sizeof err);
        CHECK_MSG(r == cases[i].result && strstr(err, cases[i].says), "%s: %d, %s", cases[i].grammar, r, err);
    }
    grammar_close(&b);
}

/* The mask of each place in a text is what the machine accepts, token by token. */
static void test_grammar_masks(void) {
    static const struct { int kind; const char *grammar, *text; } cases[] = {
        {0, "{}", "{\"a b\": [1.5, \"x\\n\", true], \"c\": null}"},
        {0, "{\"type\":\"string\",\"maxLength\":9,\"minLength\":3}", "\"the fox\""},
        {0, "{\"type\":\"string\",\"pattern\":\"^[a-z ]+$\"}", "\"the quick\""},
        {0, "{\"type\":\"object\",\"properties\":{\"the\":{},\"they\":{\"type\":\"integer\"}},\"additionalProperties\":false}", "{\"they\": 12, \"the\": {}}"},
        {0, "{\"type\":\"object\",\"properties\":{\"the\":{\"type\":\"integer\"}},\"maxProperties\":2}", "{\"the\": 12, \"x\": {}}"},
        {1, "([a-z]+ )*[a-z]+[.!?]", "the quick fox."},
        {2, "root ::= l\nl ::= \"(\" [a-z ]+ (l | \".\")* \")\"", "(the fox(jumps).)"}
    };
    static uint32_t mask[1 << 12];
    static qwen3i_guide before;
    grammar_bench b;
    char err[400];
    int i, t, n;
    size_t at;
    if (!grammar_open(&b)) return;
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        if (!CHECK_MSG(grammar_set(&b, cases[i].kind, cases[i].grammar, 0, err, sizeof err) == QWEN3_OK, "%s", err)) continue;
        qwen3i_guide_begin(b.k, &b.guide, b.g);
        for (at = 0; at <= strlen(cases[i].text); at++) {
            int wrong = 0;
            qwen3i_guide_mask(b.k, &b.guide);
            memcpy(mask, b.k->mask, (size_t)b.k->v->n_words * sizeof *mask);
            before = b.guide;
            for (t = 0; t < b.f.info.n_tokens; t++) {
                const char *p = qwen3i_added_of(b.f.model->tokenizer, t) ? NULL : qwen3i_token_bytes(b.f.model, t, &n);
                const int fits = p && n > 0 && qwen3i_guide_bytes(b.k, &b.guide, p, n);
                wrong += fits != (int)(mask[t >> 5] >> (t & 31) & 1u);
                b.guide = before;
            }
            CHECK_MSG(wrong == 0, "%s after %d bytes: %d tokens", cases[i].grammar, (int)at, wrong);
            if (at < strlen(cases[i].text)) CHECK(qwen3i_guide_bytes(b.k, &b.guide, cases[i].text + at, 1));
        }
    }
    grammar_close(&b);
}

typedef struct grammar_text { char p[4096]; int n; } grammar_text;

static int grammar_hear(const char *utf8, int n, int kind, void *user) {
    grammar_text *t = (grammar_text *)user;
    if (kind & QWEN3_TEXT_TAG) return 0;
    if (t->n + n < (int)sizeof t->p) { memcpy(t->p + t->n, utf8, (size_t)n); t->n += n; }
    t->p[t->n] = '\0';
    return 0;
}

static const char grammar_order[] =
    "{\"type\":\"object\",\"properties\":{\"item\":{\"enum\":[\"apple\",\"bread\"]},\"count\":{\"type\":\"integer\",\"minimum\":1,\"maximum\":20},"
    "\"note\":{\"type\":\"string\",\"maxLength\":12}},\"required\":[\"item\",\"count\"],\"additionalProperties\":false}";

/* Whatever the model says, whatever room it has: a reply that ends is a text of the grammar. */
static void test_grammar_replies(void) {
    grammar_bench b;
    qwen3_ctx *ctx;
    qwen3_chat_desc chat;
    qwen3_gen_desc gen;
    qwen3_msg msg;
    qwen3_sampler sampler;
    static grammar_text text;
    char err[400];
    int i, room;
    if (!grammar_open(&b)) return;
    memset(&chat, 0, sizeof chat);
    memset(&gen, 0, sizeof gen);
    memset(&msg, 0, sizeof msg);
    msg.role = QWEN3_USER;
    msg.text = "an order, please";
    chat.msgs = &msg;
    chat.n_msgs = 1;
    chat.flags = QWEN3_CHAT_NO_THINK;
    ctx = ctx_open(b.f.model, 256, 1, 0, 0);
    CHECK(grammar_set(&b, 0, grammar_order, 0, err, sizeof err) == QWEN3_OK);
    gen.grammar = b.g;
    gen.on_text = grammar_hear;
    gen.user = &text;
    for (i = 0; ctx && i < 40; i++) {
        sampler = qwen3_sampler_preset(QWEN3_GREEDY, (uint64_t)i);
        sampler.temperature = 1.0f + (float)i;
        gen.sampler = i ? &sampler : NULL;
        room = gen.max_tokens = 34 + i;
        text.n = 0;
        CHECK(qwen3_chat(ctx, 0, &chat, &gen) >= 0);
        CHECK_MSG(grammar_accepts(&b, text.p, (size_t)text.n), "in %d tokens: '%s'", room, text.p);
    }
    qwen3_ctx_free(ctx);
    grammar_close(&b);
}

/* The place in the grammar follows copies, truncation and saved states. */
static void test_grammar_follows(void) {
    enum { N = 24 };
    grammar_bench b;
    qwen3_ctx *a, *other;
    qwen3_sampler s;
    qwen3_token want[N], t;
    qwen3_state st;
    static char state[1 << 20];
    char err[400];
    int i, k, prompt;
    qwen3_item item;
    qwen3_token begin[8];
    if (!grammar_open(&b)) return;
    CHECK(grammar_set(&b, 0, "{\"type\":\"array\",\"items\":{\"type\":\"string\",\"minLength\":2},\"minItems\":30}", 0, err, sizeof err) == QWEN3_OK);
    a = ctx_open(b.f.model, 256, 2, 0, 0);
    other = ctx_open(b.f.model, 256, 2, 0, 0);
    memset(&item, 0, sizeof item);
    item.tokens = begin;
    item.n = prompt = qwen3_encode(b.f.model, "a list:", 7, 0, begin, 8, NULL, 0);
    memset(&st, 0, sizeof st);
    st.data = state;
    st.size = sizeof state;
    for (k = 0; a && other && k < 4; k++) {
        s = qwen3_sampler_preset(QWEN3_GREEDY, 3);
        s.temperature = 3;
        s.grammar = b.g;
        if (k == 0) CHECK_OK(a, qwen3_eval(a, &item, 1));
        for (i = 0; i < N; i++) {
            const int seq = k == 1 && i >= N / 2;
            if (i == N / 2 && k == 1) CHECK_OK(a, qwen3_seq_copy(a, 1, 0));
            if (i == N / 2 && k == 2) { st.size = sizeof state; CHECK_OK(a, qwen3_seq_save(a, 0, &st)); CHECK_OK(other, qwen3_seq_load(other, 0, &st)); }
            if (i == N / 2 && k == 3) {         /* a detour, and back */
                qwen3_sampler detour = s;
                int steps;
                for (detour.rng = 99, steps = 0; steps < 5; steps++) CHECK(qwen3_next(a, 0, &detour, &t) >= 0);
                CHECK_OK(a, qwen3_seq_truncate(a, 0, prompt + N / 2));
            }
            CHECK(qwen3_next(k == 2 && i >= N / 2 ? other : a, seq, &s, &t) >= 0);
            if (k == 0) want[i] = t;
            CHECK_MSG(t == want[i], "way %d, token %d: %d, not %d", k, i, (int)t, (int)want[i]);
        }
        CHECK_OK(a, qwen3_seq_truncate(a, 0, prompt));
    }
    qwen3_ctx_free(a);
    qwen3_ctx_free(other);
    grammar_close(&b);
}

/* Allocation fails at every call in turn: an error, nothing lost, and then it works. */
static void test_grammar_memory(void) {
    grammar_bench b;
    qwen3_grammar_desc desc;
    qwen3_grammar *g;
    long fail, live;
    qwen3_result r = QWEN3_ERR_MEMORY;
    char err[400];
    if (!grammar_open(&b)) return;
    memset(&desc, 0, sizeof desc);
    desc.text = grammar_order;
    desc.n_bytes = strlen(grammar_order);
    live = heap_default.live;
    for (fail = 1; r != QWEN3_OK && fail < 2000; fail++) {
        heap_default.calls = 0;
        heap_default.fail_at = fail;
        r = qwen3_grammar_create(&g, b.f.model, &desc, err, sizeof err);
        heap_default.fail_at = 0;
        if (r == QWEN3_OK) break;
        CHECK_MSG(r == QWEN3_ERR_MEMORY && err[0] && !g, "call %ld: %d", fail, r);
    }
    CHECK(r == QWEN3_OK && fail > 20);
    qwen3_grammar_free(g);
    CHECK(heap_default.live - live <= 32 && heap_default.bad == 0);     /* the vocabulary's index stays with the model */
    grammar_close(&b);
}

static void suite_grammar(void) {
    RUN(test_grammar_schema);
    RUN(test_grammar_regex);
    RUN(test_grammar_gbnf);
    RUN(test_grammar_refusals);
    RUN(test_grammar_masks);
    RUN(test_grammar_replies);
    RUN(test_grammar_follows);
    RUN(test_grammar_memory);
}
#endif
