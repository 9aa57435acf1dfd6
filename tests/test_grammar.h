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
        {"{\"type\":\"array\",\"uniqueItems\":true,\"items\":{\"enum\":[\"a\",\"ab\",\"\\n\"]},\"minItems\":2}",
         "[\"a\",\"ab\"]\n[ \"ab\" , \"\\n\", \"a\" ]", "[]\n[\"a\"]\n[\"a\",\"a\"]\n[\"a\",\"ab\",\"a\"]\n[\"a\",\"ab\",\"\\n\",\"a\"]\n[\"b\",\"a\"]\n[,\"a\"]\n[\"a\":1]"},
        {"{\"type\":\"array\",\"uniqueItems\":true,\"items\":{\"allOf\":[{\"enum\":[\"a\",\"b\",\"c\",1]},{\"type\":\"string\",\"not\":{\"const\":\"b\"}}]},\"maxItems\":9}",
         "[]\n[\"a\"]\n[\"c\",\"a\"]", "[\"b\"]\n[1]\n[\"c\",\"c\"]\n[\"a\",\"c\",\"b\"]\n{}"},
        {"{\"type\":\"array\",\"uniqueItems\":true,\"items\":{\"type\":\"string\"},\"maxItems\":1}", "[]\n[\"a\"]", "[\"a\",\"b\"]"},
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
        {"{\"type\":\"object\",\"oneOf\":[{\"properties\":{\"a\":{}},\"additionalProperties\":false},{\"properties\":{\"b\":{}},\"additionalProperties\":false}]}",
         "{\"a\":1}\n{\"b\":{}}", "{}\n{\"a\":1,\"b\":1}\n{\"c\":1}"},
        {"{\"enum\":[{\"a\":1}],\"not\":{\"additionalProperties\":{\"type\":\"boolean\"}}}", "{\"a\":1}", "{}\n{\"a\":true}"},
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
        {0, "{\"type\":\"string\",\"pattern\":\"[0-9]{6,6}\",\"minLength\":6,\"maxLength\":7}", "\"123456\""},
        {0, "{\"type\":\"object\",\"properties\":{\"the\":{\"type\":\"integer\"}},\"maxProperties\":2}", "{\"the\": 12, \"x\": {}}"},
        {0, "{\"type\":\"object\",\"properties\":{\"the\":{}},\"required\":[\"the\"],\"maxProperties\":1}", "{\"the\": 12}"},
        {0, "{\"type\":\"object\",\"properties\":{\"the\":{},\"A-1\":{}},\"patternProperties\":{\"^[a-z]+$\":{}},\"additionalProperties\":false}",
         "{\"the\": 1, \"fox\": 2, \"A-1\": 3}"},
        {1, "([a-z]+ )*[a-z]+[.!?]", "the quick fox."},
        {2, "root ::= l\nl ::= \"(\" [a-z ]+ (l | \".\")* \")\"", "(the fox(jumps).)"},
        {0, "{\"items\":{\"enum\":[\"the\",\"they\",\"them\"]},\"uniqueItems\":true,\"minItems\":2,\"type\":\"array\"}", "[\"they\", \"the\", \"them\"]"},
        {0, "{\"anyOf\":[{\"required\":[\"a\"]},{\"required\":[\"b\"]},{\"minProperties\":3}],\"type\":\"object\",\"additionalProperties\":{\"items\":{}}}",
         "{\"z\": [\"the\", {}], \"b\": 12}"},
        {2, "root ::= x \"a.\" | x \" the\" | \"(\" x\nx ::= \"(\" x \")\" | [0-9]+", "((12)) the"}
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

/* Alternatives that differ only in what follows are one thread until it does, however deep they are. */
static void test_grammar_forks(void) {
    enum { WAYS = 60, DEEP = 100 };
    static char schema[WAYS * 200], text[DEEP * 8 + 100];
    grammar_bench b;
    char err[400];
    int i, n = sprintf(schema, "{\"$defs\":{\"v\":{\"type\":[\"array\",\"integer\"],\"items\":{\"$ref\":\"#/$defs/v\"}}},\"anyOf\":[");
    for (i = 0; i < WAYS; i++)
        n += sprintf(schema + n, "%s{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#/$defs/v\"},\"k%d\":{\"const\":%d}},"
                     "\"required\":[\"k%d\"],\"additionalProperties\":false}", i ? "," : "", i, i, i);
    sprintf(schema + n, "]}");
    if (!grammar_open(&b)) return;
    CHECK_MSG(grammar_set(&b, 0, schema, 0, err, sizeof err) == QWEN3_OK, "%s", err);
    for (i = 0; b.g && i < WAYS; i++) {
        n = sprintf(text, "{\"a\":-");
        CHECK(!grammar_accepts(&b, text, (size_t)n) && b.guide.n_threads == 1);
        n = sprintf(text, "{\"a\":");
        memset(text + n, '[', DEEP);
        n += DEEP;
        CHECK(!grammar_accepts(&b, text, (size_t)n) && b.guide.n_threads == 2);      /* an item, or the list's end */
        memset(text + n, ']', DEEP);
        n += DEEP;
        n += sprintf(text + n, ",\"k%d\":%d}", i, i);
        CHECK_MSG(grammar_accepts(&b, text, (size_t)n), "refused: %s", text);
        text[n - 2]++;
        CHECK_MSG(!grammar_accepts(&b, text, (size_t)n), "accepted: %s", text);
    }
    grammar_close(&b);
}

/* The shortest way to the end is as long as it is said to be at every step, and no longer. */
static void test_grammar_shortest(void) {
    static const char *const cases[] = {
        "{\"patternProperties\":{\"^.*$\":{\"type\":\"object\",\"required\":[\"path\"]}},\"required\":[\"zz\"],\"type\":\"object\"}",
        "{\"type\":\"object\",\"properties\":{\"a\":{\"const\":123456}},\"required\":[\"a\",\"b\"],\"additionalProperties\":{\"type\":\"array\",\"minItems\":3}}",
        "{\"items\":{\"enum\":[\"the\",\"they\",\"them\",\"a\"]},\"uniqueItems\":true,\"minItems\":3,\"type\":\"array\"}",
        "{\"anyOf\":[{\"minProperties\":1,\"maxProperties\":0,\"type\":\"object\"},{\"required\":[\"the\"],\"type\":\"object\"}]}",
        "{\"type\":\"array\",\"items\":{\"anyOf\":[{\"type\":\"string\",\"minLength\":9},{\"minimum\":1000,\"type\":\"integer\"}]},\"minItems\":2}"
    };
    grammar_bench b;
    char err[400];
    int i, n, cost, room;
    if (!grammar_open(&b)) return;
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        if (!CHECK_MSG(grammar_set(&b, 0, cases[i], 0, err, sizeof err) == QWEN3_OK, "%s: %s", cases[i], err)) continue;
        qwen3i_guide_begin(b.k, &b.guide, b.g);
        for (room = 200; (cost = qwen3i_guide_cost(b.k, &b.guide, NULL, 0)) > 0 && room > 0; room--) {
            const qwen3_token t = qwen3i_guide_shortest(b.k, &b.guide);
            const char *p = t < 0 ? NULL : qwen3i_token_bytes(b.f.model, t, &n);
            if (!CHECK(p && qwen3i_guide_bytes(b.k, &b.guide, p, n))) break;
            CHECK_MSG(qwen3i_guide_cost(b.k, &b.guide, NULL, 0) <= cost - n, "%s", cases[i]);
        }
        CHECK_MSG(cost == 0, "%s: no end", cases[i]);
    }
    grammar_close(&b);
}

/* Where a mask may not take the steps it needs, some tokens are left out; those that are there go on, to an end. */
static void test_grammar_mask_steps(void) {
    static const char grammar[] = "root ::= (a | b | c)* \".\"\na ::= [a-z]* b\nb ::= [b-y]* c\nc ::= \" \" | [c-x]+ \"-\" | \"(\" root \")\"";
    grammar_bench b;
    qwen3_grammar_desc desc;
    char err[400];
    int i, n, t, whole = 0, cut = 0;
    if (!grammar_open(&b)) return;
    memset(&desc, 0, sizeof desc);
    desc.kind = QWEN3_GRAMMAR_GBNF;
    desc.text = grammar;
    desc.n_bytes = sizeof grammar - 1;
    for (desc.mask_steps = 0; desc.mask_steps < 2; desc.mask_steps++) {
        CHECK(qwen3_grammar_create(&b.g, b.f.model, &desc, err, sizeof err) == QWEN3_OK);
        if (!b.k) b.k = qwen3i_masker_make(&b.a, b.g->vocab);
        qwen3i_guide_begin(b.k, &b.guide, b.g);
        qwen3i_guide_mask(b.k, &b.guide);
        for (t = 0; t < b.f.info.n_tokens; t++)
            if (b.k->mask[t >> 5] >> (t & 31) & 1u) { if (desc.mask_steps) cut++; else whole++; }
        for (i = 0; i < 40; i++) {
            const char *p;
            qwen3i_guide_mask(b.k, &b.guide);
            for (t = i * 7 % b.f.info.n_tokens; !(b.k->mask[t >> 5] >> (t & 31) & 1u); t = (t + 1) % b.f.info.n_tokens) {}
            p = qwen3i_token_bytes(b.f.model, t, &n);
            CHECK_MSG(qwen3i_guide_bytes(b.k, &b.guide, p, n), "step %d: %.*s", i, n, p);
        }
        while ((t = qwen3i_guide_shortest(b.k, &b.guide)) >= 0 && i++ < 400) {
            const char *p = qwen3i_token_bytes(b.f.model, t, &n);
            CHECK_MSG(qwen3i_guide_bytes(b.k, &b.guide, p, n), "step %d: %.*s", i, n, p);
        }
        CHECK(qwen3i_guide_mask(b.k, &b.guide));
        qwen3_grammar_free(b.g);
        b.g = NULL;
    }
    CHECK_MSG(cut > 0 && cut < whole, "%d of %d", cut, whole);
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

/* A host's name has at most 253 characters. */
static void test_grammar_hostname(void) {
    char text[300];
    grammar_bench b;
    int i, n;
    if (!grammar_open(&b)) return;
    CHECK(grammar_set(&b, 0, "{\"type\":\"string\",\"format\":\"hostname\"}", 0, text, sizeof text) == QWEN3_OK);
    for (n = 252; n < 256; n++) {
        for (i = 0; i < n; i++) text[1 + i] = i % 50 == 49 ? '.' : 'a';
        text[0] = text[n + 1] = '"';
        CHECK_MSG(grammar_accepts(&b, text, (size_t)n + 2) == (n <= 253), "%d", n);
    }
    grammar_close(&b);
}

/* ---- thinking, prefixes, forced tokens ----------------------------------------------------------------------- */
typedef struct grammar_talk { grammar_bench b; qwen3_ctx *ctx; qwen3_msg msg; qwen3_chat_desc chat; qwen3_gen_desc gen; qwen3_sampler dice;
                              qwen3_bias bias[2]; grammar_text answer, all; } grammar_talk;

static int grammar_hear_both(const char *utf8, int n, int kind, void *user) {
    grammar_talk *t = (grammar_talk *)user;
    grammar_hear(utf8, n, kind & QWEN3_TEXT_TAG ? 0 : kind, &t->all);
    return kind == QWEN3_TEXT_ANSWER ? grammar_hear(utf8, n, kind, &t->answer) : 0;
}

static int grammar_talk_open(grammar_talk *t, const char *schema) {
    char err[400];
    memset(t, 0, sizeof *t);
    if (!grammar_open(&t->b)) return 0;
    t->ctx = ctx_open(t->b.f.model, 300, 3, 0, 0);
    CHECK(grammar_set(&t->b, 0, schema, 0, err, sizeof err) == QWEN3_OK);
    t->msg.role = QWEN3_USER;
    t->msg.text = "an order";
    t->chat.msgs = &t->msg;
    t->chat.n_msgs = 1;
    t->gen.grammar = t->b.g;
    t->gen.sampler = &t->dice;
    t->gen.on_text = grammar_hear_both;
    t->gen.user = t;
    return t->ctx != NULL;
}

static void grammar_talk_dice(grammar_talk *t, int seed) {
    t->dice = qwen3_sampler_preset(QWEN3_GREEDY, (uint64_t)seed);
    t->dice.temperature = 2;
    t->answer.n = t->all.n = 0;
    t->answer.p[0] = t->all.p[0] = '\0';
}

/* A model that thinks, of each style: whatever it thinks, and however that ends, the answer is of the grammar. */
static void test_grammar_after_thinking(void) {
    static const qwen3_chat_style styles[] = {QWEN3_STYLE_HYBRID, QWEN3_STYLE_THINKING, QWEN3_STYLE_INSTRUCT, QWEN3_STYLE_NO_THINK};
    static const char *const stop[1] = {"\"apple\""};
    grammar_talk t;
    int i, style, thoughts = 0, by = 0, stopped = 0;
    qwen3_result r;
    if (!grammar_talk_open(&t, grammar_order)) return;
    for (i = 0; i < 80; i++) {
        style = i % 4;
        t.b.f.model->info.chat_style = styles[style];
        grammar_talk_dice(&t, i);
        if (style == 0) {                       /* it would like to think, and to end that, sooner or later */
            t.bias[0].token = t.b.f.info.think_begin;
            t.bias[0].bias = 40;
            t.dice.bias = t.bias;
            t.dice.n_bias = 1;
        }
        t.gen.think_budget = i % 3 ? 0 : 5;
        t.gen.max_tokens = 50 + i;
        t.gen.stop = stop;
        t.gen.n_stop = i % 5 == 4;
        t.gen.stopped_by = &by;
        r = qwen3_chat(t.ctx, 0, &t.chat, &t.gen);
        CHECK_MSG(r == QWEN3_OK || r == QWEN3_END, "%s: %s", qwen3_result_string(r), qwen3_ctx_error(t.ctx));
        thoughts += t.all.n > t.answer.n;
        stopped += t.gen.n_stop && by == 0;
        if (t.gen.n_stop && by == 0) continue;          /* cut off: what came before is a beginning */
        CHECK_MSG(grammar_accepts(&t.b, t.answer.p, (size_t)t.answer.n), "style %d, seed %d: '%s' of '%s'", style, i, t.answer.p, t.all.p);
    }
    CHECK_MSG(thoughts > 30 && stopped > 0, "%d, %d", thoughts, stopped);
    qwen3_ctx_free(t.ctx);
    grammar_close(&t.b);
}

/* A beginning that was put into the model's mouth is part of the text, if it fits. */
static void test_grammar_prefix(void) {
    static const char prefix[] = "{\"count\": 7, ";
    qwen3_token tokens[200];
    grammar_talk t;
    int i, n;
    if (!grammar_talk_open(&t, grammar_order)) return;
    t.chat.flags = QWEN3_CHAT_NO_THINK;
    n = qwen3_chat_render(t.b.f.model, &t.chat, tokens, 200, NULL, 0);
    n += qwen3_encode(t.b.f.model, prefix, strlen(prefix), 0, tokens + n, 200 - n, NULL, 0);
    for (i = 1; i < 12 && CHECK(n < 150); i++) {
        char whole[5000];
        grammar_talk_dice(&t, i);
        CHECK(qwen3_sync(t.ctx, 0, tokens, n, 0) == 0);
        t.gen.max_tokens = 60;
        CHECK(qwen3_generate(t.ctx, 0, &t.gen) >= 0);
        snprintf(whole, sizeof whole, "%s%s", prefix, t.answer.p);
        CHECK_MSG(grammar_accepts(&t.b, whole, strlen(whole)), "%s", whole);
    }
    qwen3_ctx_free(t.ctx);
    grammar_close(&t.b);
}

/* Tokens without an alternative are evaluated together: fewer steps, and the tokens that come one by one. */
static void test_grammar_forced(void) {
    static const char schema[] = "{\"type\":\"object\",\"properties\":{\"QXZ#QXZ#QXZ\":{\"enum\":[\"KJVKJVKJV\",\"#ZQ#ZQ#ZQ\"]},\"VVVWWWVVV\":{\"const\":true}},"
        "\"required\":[\"QXZ#QXZ#QXZ\",\"VVVWWWVVV\"],\"additionalProperties\":false}";
    qwen3_token said[300], prompt[100], out;
    grammar_talk t;
    qwen3_stats before, after;
    const qwen3_token *tokens;
    int i, k, n, n_prompt, together = 0;
    if (!grammar_talk_open(&t, schema)) return;
    t.chat.flags = QWEN3_CHAT_NO_THINK;
    n_prompt = qwen3_chat_render(t.b.f.model, &t.chat, prompt, 100, NULL, 0);
    for (i = 0; i < 12; i++) {
        qwen3_result r = QWEN3_OK;
        grammar_talk_dice(&t, i);
        t.dice.temperature = i == 0 ? 0.0f : (float)i;
        CHECK(qwen3_sync(t.ctx, 0, prompt, n_prompt, 0) == 0);
        before = qwen3_ctx_stats(t.ctx);
        CHECK(qwen3_generate(t.ctx, 0, &t.gen) == QWEN3_END);
        after = qwen3_ctx_stats(t.ctx);
        tokens = qwen3_seq_tokens(t.ctx, 0, &n);
        n -= n_prompt;
        memcpy(said, tokens + n_prompt, (size_t)n * sizeof *said);
        together += (int)(after.n_prefill - before.n_prefill);
        grammar_talk_dice(&t, i);
        t.dice.temperature = i == 0 ? 0.0f : (float)i;
        t.dice.grammar = t.b.g;
        CHECK(qwen3_sync(t.ctx, 1, prompt, n_prompt, 0) == 0);
        for (k = 0; k < n && r == QWEN3_OK; k++) {
            r = qwen3_next(t.ctx, 1, &t.dice, &out);
            CHECK_MSG(r == QWEN3_OK && out == said[k], "seed %d, token %d of %d: %d, not %d", i, k, n, (int)out, (int)said[k]);
        }
        CHECK(qwen3_next(t.ctx, 1, &t.dice, &out) == QWEN3_END);
    }
    CHECK_MSG(together > 12 * 10, "%d tokens were said together", together);
    qwen3_ctx_free(t.ctx);
    grammar_close(&t.b);
}

/* ---- limits, warnings, failing memory ------------------------------------------------------------------------ */
static int grammar_warned;
static char grammar_warning[400];
static void grammar_log(qwen3_log_level level, const char *message, void *user) {
    (void)user;
    if (level == QWEN3_LOG_WARN && ++grammar_warned) snprintf(grammar_warning, sizeof grammar_warning, "%s", message);
}

/* What is not enforced says nothing, with a warning; the rest holds. */
static void test_grammar_warnings(void) {
    static const struct { const char *schema, *says, *yes, *no; } cases[] = {
        {"{\"type\":\"array\",\"uniqueItems\":true,\"maxItems\":2}", "/uniqueItems", "[1,1]", "[1,1,1]"},
        {"{\"type\":\"string\",\"maxLength\":3,\"pattern\":\"^(?=a)\"}", "/pattern: lookahead", "\"b\"", "\"abcd\""},
        {"{\"type\":\"string\",\"format\":\"regex\"}", "/format", "\"(\"", "1"},
        {"{\"type\":\"integer\",\"multipleOf\":5000,\"minimum\":2}", "/multipleOf", "3", "1"},
        {"{\"properties\":{\"a\":{\"$ref\":\"other.json\",\"type\":\"null\"}},\"type\":\"object\"}", "/properties/a/$ref", "{\"a\":null}", "{\"a\":1}"},
        {"{\"type\":\"object\",\"patternProperties\":{\"(?!x)\":{}},\"maxProperties\":1}", "/patternProperties/(?!x)", "{\"a\":1}", "{\"a\":1,\"b\":2}"},
        {"{\"type\":\"integer\",\"not\":{\"contains\":1,\"const\":5}}", "/not/contains", "4", "5"}
    };
    grammar_bench b;
    char err[400];
    int i;
    if (!grammar_open(&b)) return;
    b.f.model->logger.log = grammar_log;
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        grammar_case c = {cases[i].schema, cases[i].yes, cases[i].no};
        grammar_warned = 0;
        CHECK(grammar_set(&b, 0, c.grammar, 0, err, sizeof err) == QWEN3_ERR_UNSUPPORTED && grammar_warned == 0);
        b.g = NULL;
        if (!CHECK_MSG(grammar_set(&b, 0, c.grammar, QWEN3_GRAMMAR_WARN, err, sizeof err) == QWEN3_OK, "%s: %s", c.grammar, err)) continue;
        CHECK_MSG(grammar_warned >= 1 && strstr(grammar_warning, cases[i].says), "%s: %d, %s", c.grammar, grammar_warned, grammar_warning);
        grammar_expect(&b, &c, c.yes, 1);
        grammar_expect(&b, &c, c.no, 0);
    }
    CHECK(grammar_set(&b, 0, "{\"type\":\"text\"}", QWEN3_GRAMMAR_WARN, err, sizeof err) == QWEN3_ERR_FORMAT);
    b.g = NULL;
    grammar_close(&b);
}

/* Grammars that would take for ever: an error, within the default limits and within smaller ones. */
static void test_grammar_limits(void) {
    static const struct { int kind; const char *begin, *each, *end; int n; } cases[] = {
        {0, "", "{\"not\":", "", 300}, {0, "", "[", "", 100000}, {0, "{\"enum\":[0", ",\"a long value of it, over and over\"", "]}", 40000},
        {0, "{\"allOf\":[{}", ",{\"anyOf\":[{\"minimum\":1},{\"maxLength\":2},{\"required\":[\"a\"]}]}", "]}", 40},
        {0, "{\"$ref\":\"#/a\",\"a\":{\"anyOf\":[", "{\"$ref\":\"#/a\"},", "{\"$ref\":\"#\"}]}}", 30},
        {0, "{\"pattern\":\"", "(a|b|ab)*c.{0,60}", "\"}", 20}, {0, "{\"oneOf\":[{}", ",{\"properties\":{\"a\":{\"minimum\":1}}}", "]}", 60},
        {1, "", "(a|a?){200}", "", 50}, {1, "", "(((a{99}){99}){99}){99}", "", 1}, {1, "", "(", "", 5000}, {1, "(x|y)*x", ".", "", 100},
        {1, "", "[^a]*a", "", 20000}, {2, "root ::= a\n", "a ::= a | b\nb ::= c a\nc ::= \"\" | root\n", "", 1}, {2, "root ::= ", "(", "", 100000},
        {2, "root ::= ", "r | ", "\"x\"\nr ::= \"(\" root \")\"", 3000}, {2, "root ::= \"x\" ", "r? ", "\nr ::= \"(\" root \")\"", 3000},
        {2, "r0 ::= \"a\"\n", "root ::= (root){100000} \"y\"", "", 1}
    };
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
    const double longest = 120;    /* seconds of processor time: a guard against hours, not a timing */
#else
    const double longest = 8;
#endif
    grammar_bench b;
    qwen3_grammar_desc desc;
    char err[400], *text;
    int i, k, way;
    if (!grammar_open(&b)) return;
    CHECK(grammar_set(&b, 0, "{}", 0, err, sizeof err) == QWEN3_OK);    /* the index is made */
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        const size_t n = strlen(cases[i].begin) + strlen(cases[i].end) + (size_t)cases[i].n * strlen(cases[i].each);
        text = (char *)malloc(n + 1);
        strcpy(text, cases[i].begin);
        for (k = 0; k < cases[i].n; k++) strcpy(text + strlen(cases[i].begin) + (size_t)k * strlen(cases[i].each), cases[i].each);
        strcat(text, cases[i].end);
        for (way = 0; way < 3; way++) {
            qwen3_grammar *g = NULL;
            const clock_t start = clock();
            const long bytes = heap_default.bytes;
            qwen3_result r;
            memset(&desc, 0, sizeof desc);
            desc.kind = (qwen3_grammar_kind)cases[i].kind;
            desc.text = text;
            desc.n_bytes = n;
            desc.max_steps = way == 1 ? 20000 : 0;
            desc.max_bytes = way == 2 ? 10000 : 0;
            r = qwen3_grammar_create(&g, b.f.model, &desc, err, sizeof err);
            CHECK_MSG(r == QWEN3_OK || r == QWEN3_ERR_UNSUPPORTED || r == QWEN3_ERR_FORMAT, "case %d: %d", i, r);
            CHECK_MSG((double)(clock() - start) / CLOCKS_PER_SEC < longest, "case %d: %.1f s", i, (double)(clock() - start) / CLOCKS_PER_SEC);
            if (test_verbose) printf("  case %d.%d: %.2f s, %ld KB, %s\n", i, way, (double)(clock() - start) / CLOCKS_PER_SEC, g ? (heap_default.bytes - bytes) / 1024 : 0L, g ? "" : err);
            CHECK(way != 2 || !g || heap_default.bytes - bytes < 40000);    /* arrays have room to grow */
            qwen3_grammar_free(g);
            CHECK(heap_default.bytes == bytes);
        }
        free(text);
    }
    grammar_close(&b);
}

/* The same for all kinds; and in a context, where each allocation fails in turn until a reply comes. */
static void test_grammar_memory_everywhere(void) {
    static const struct { int kind; const char *grammar; } cases[] = {
        {0, "{\"type\":\"object\",\"properties\":{\"a\":{\"oneOf\":[{\"type\":\"string\",\"format\":\"date\"},{\"type\":\"number\",\"minimum\":1.5}]},"
            "\"b\":{\"type\":\"array\",\"items\":{\"$ref\":\"#\"}}},\"patternProperties\":{\"^x\":{\"pattern\":\"a{2,5}$\"}},\"propertyNames\":{\"minLength\":1}}"},
        {1, "([a-z]+, ){1,20}(\\d|\\u00e9)*"}, {2, "root ::= l\nl ::= \"(\" (l | [a-z]*)* \")\""},
        {3, "[{\"name\":\"f\",\"parameters\":{\"properties\":{\"x\":{\"type\":\"integer\"}}}},{\"name\":\"g\"}]"}
    };
    static const char *const tools[] = {"{\"name\":\"f\",\"parameters\":{\"properties\":{\"x\":{\"type\":\"integer\"}}}}"};
    grammar_bench b;
    qwen3_grammar_desc desc;
    qwen3_grammar *g;
    qwen3_ctx_desc d;
    test_heap heap;
    char err[400];
    long fail, live;
    int i;
    if (!grammar_open(&b)) return;
    CHECK(grammar_set(&b, 0, "{}", 0, err, sizeof err) == QWEN3_OK);
    for (i = 0; i < (int)(sizeof cases / sizeof *cases); i++) {
        qwen3_result r = QWEN3_ERR_MEMORY;
        memset(&desc, 0, sizeof desc);
        desc.kind = (qwen3_grammar_kind)cases[i].kind;
        desc.text = cases[i].grammar;
        desc.n_bytes = strlen(cases[i].grammar);
        live = heap_default.live;
        for (fail = 1; r != QWEN3_OK && fail < 3000; fail++) {
            heap_default.calls = 0;
            heap_default.fail_at = fail;
            r = qwen3_grammar_create(&g, b.f.model, &desc, err, sizeof err);
            heap_default.fail_at = 0;
            CHECK_MSG(r == QWEN3_OK || (r == QWEN3_ERR_MEMORY && err[0] && !g && heap_default.live == live), "kind %d, call %ld: %d, %s", i, fail, r, err);
            if (r != QWEN3_OK && r != QWEN3_ERR_MEMORY) break;
        }
        CHECK(r == QWEN3_OK && fail > 10);
        qwen3_grammar_free(g);
    }
    for (fail = 1, i = 0; i < 3 && fail < 3000; fail++) {        /* i: replies that came */
        qwen3_msg msg;
        qwen3_chat_desc chat;
        qwen3_gen_desc gen;
        qwen3_ctx *ctx;
        qwen3_result r = QWEN3_OK;
        memset(&heap, 0, sizeof heap);
        memset(&msg, 0, sizeof msg);
        memset(&chat, 0, sizeof chat);
        memset(&gen, 0, sizeof gen);
        msg.role = QWEN3_USER;
        msg.text = "the fox";
        chat.msgs = &msg;
        chat.n_msgs = 1;
        chat.flags = QWEN3_CHAT_NO_THINK | (i ? QWEN3_CHAT_TOOLS_REQUIRED : 0);
        chat.tools = tools;
        chat.n_tools = i > 0;
        gen.grammar = i == 1 ? NULL : b.g;
        gen.max_tokens = 30;
        d = ctx_desc(800, 1, 0, 0);
        d.yarn_factor = 2;
        d.allocator.alloc = heap_alloc;
        d.allocator.free = heap_free;
        d.allocator.user = &heap;
        ctx = ctx_open_desc(b.f.model, &d);
        if (!ctx) break;
        heap.calls = 0;
        heap.fail_at = fail;
        r = qwen3_chat(ctx, 0, &chat, &gen);
        CHECK_MSG(r >= 0 || (r == QWEN3_ERR_MEMORY && qwen3_ctx_error(ctx)[0]), "way %d, call %ld: %d, %s", i, fail, r, qwen3_ctx_error(ctx));
        heap.fail_at = 0;
        if (r < 0) CHECK_MSG(qwen3_chat(ctx, 0, &chat, &gen) >= 0, "%s", qwen3_ctx_error(ctx));      /* nothing is spoilt */
        else { CHECK(fail > 2); i++; fail = 0; }
        qwen3_ctx_free(ctx);
        CHECK(heap.live == 0 && heap.bad == 0);
    }
    CHECK(i == 3);
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
    RUN(test_grammar_hostname);
    RUN(test_grammar_after_thinking);
    RUN(test_grammar_prefix);
    RUN(test_grammar_forced);
    RUN(test_grammar_memory);
    RUN(test_grammar_memory_everywhere);
    RUN(test_grammar_warnings);
    RUN(test_grammar_limits);
    RUN(test_grammar_forks);
    RUN(test_grammar_shortest);
    RUN(test_grammar_mask_steps);
}
#endif
