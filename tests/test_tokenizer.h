/* Tokenizer: UTF-8, normalisation, words, BPE, added tokens, and files that are not what they should be. The expected
   results in tests/data/tokenizer are those of Hugging Face tokenizers (tools/make_tokenizer_tests.py). */
#ifndef QWEN3_TESTS_TEST_TOKENIZER_H
#define QWEN3_TESTS_TEST_TOKENIZER_H
#include "test.h"
#include "fixture.h"

/* A whole file with a NUL behind it, or NULL; free it. */
static char *tokenizer_read(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    char *data;
    long size;
    *n = 0;
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    size = ftell(f);
    rewind(f);
    data = (char *)malloc((size_t)size + 1);
    *n = fread(data, 1, (size_t)size, f);
    data[*n] = '\0';
    fclose(f);
    return data;
}

/* The same for a file of tests/data/tokenizer. */
static char *tokenizer_data(const char *name, size_t *n) {
    char path[1024];
    snprintf(path, sizeof path, "%s/tokenizer/%s", test_data, name);
    return tokenizer_read(path, n);
}

static qwen3i_blob tokenizer_blob(const void *data, size_t n) {
    qwen3i_blob b;
    b.data = (const unsigned char *)data;
    b.size = n;
    b.kind = QWEN3I_BORROWED;
    return b;
}

static qwen3_result tokenizer_from_json(qwen3_model *m, const void *data, size_t n, const qwen3i_err *err) {
    qwen3i_vocab_files f;
    memset(&f, 0, sizeof f);
    f.json = tokenizer_blob(data, n);
    return qwen3i_tokenizer_read(&m->tokenizer, &m->allocator, &f, err);
}

static qwen3_result tokenizer_from_vocab(qwen3_model *m, const char *vocab, const char *merges, size_t merges_n,
                                         const char *config, size_t config_n, const qwen3i_err *err) {
    qwen3i_vocab_files f;
    memset(&f, 0, sizeof f);
    f.vocab = tokenizer_blob(vocab, strlen(vocab));
    f.merges = tokenizer_blob(merges, merges_n);
    f.config = tokenizer_blob(config, config_n);
    return qwen3i_tokenizer_read(&m->tokenizer, &m->allocator, &f, err);
}

/* A model that is only a tokenizer; message gets the error. */
static qwen3_result tokenizer_open(qwen3_model *m, const char *data, size_t n, char message[256]) {
    qwen3i_err err;
    err.text = message;
    err.cap = 256;
    message[0] = '\0';
    memset(m, 0, sizeof *m);
    return tokenizer_from_json(m, data, n, &err);
}

static int tokenizer_open_small(qwen3_model *m) {
    char message[256];
    size_t n;
    char *data = tokenizer_data("tokenizer.json", &n);
    int ok = CHECK(data != NULL) && CHECK_MSG(tokenizer_open(m, data, n, message) == QWEN3_OK, "%s", message);
    free(data);
    return ok;
}

/* Undo the escapes \xHH of a test file, in place; the new length. */
static size_t tokenizer_unescape(char *s, size_t n) {
    size_t i, out = 0;
    for (i = 0; i < n; i++) {
        if (s[i] == '\\' && i + 3 < n) { s[out++] = (char)(qwen3i_hex(s[i + 2]) * 16 + qwen3i_hex(s[i + 3])); i += 3; }
        else s[out++] = s[i];
    }
    s[out] = '\0';
    return out;
}

/* The line at *p, NUL-terminated in place, or NULL; *p moves on. */
static char *tokenizer_line(char **p) {
    char *line = *p, *stop;
    if (!line || !*line) return NULL;
    stop = strchr(line, '\n');
    if (stop) *stop = '\0';
    *p = stop ? stop + 1 : NULL;
    return line;
}

/* Are these the ids in this text ("1 2 3", or "#count hash")? */
static int tokenizer_ids_equal(const char *expected, const qwen3_token *ids, int n) {
    unsigned long hash = 0, count;
    int i;
    char *end;
    if (*expected == '#') {
        for (i = 0; i < n; i++) hash = (hash * 31 + (unsigned long)ids[i] + 1) & 0xFFFFFFFFul;
        count = strtoul(expected + 1, &end, 10);
        return count == (unsigned long)n && strtoul(end, NULL, 10) == hash;
    }
    for (i = 0; *expected; i++) {
        long id = strtol(expected, &end, 10);
        if (end == expected || i >= n || ids[i] != (qwen3_token)id) return 0;
        expected = end;
    }
    return i == n;
}

/* The bytes of tokens, joined; free them. */
static char *tokenizer_decode(const qwen3_model *m, const qwen3_token *ids, int n, size_t *out_n) {
    size_t total = 0;
    int i, k;
    char *out;
    for (i = 0; i < n; i++) { qwen3_token_bytes(m, ids[i], &k); total += (size_t)k; }
    out = (char *)malloc(total + 1);
    for (*out_n = 0, i = 0; i < n; i++) {
        const char *p = qwen3_token_bytes(m, ids[i], &k);
        if (p) memcpy(out + *out_n, p, (size_t)k);
        *out_n += (size_t)k;
    }
    return out;
}

/* ---- UTF-8 and Unicode ------------------------------------------------------------------------------------ */
static void test_utf8_complete(void) {
    static const struct { const char *text; int complete; } cases[] = {
        { "", 0 }, { "a", 1 }, { "\xC3", 0 }, { "\xC3\xA9", 2 }, { "ab\xE4\xB8", 2 }, { "\xE4\xB8\xAD", 3 },
            { "x\xF0\x9F\x98", 1 },
        { "\xF0\x9F\x98\x80", 4 }, { "\xF0", 0 }, { "\x80", 1 }, { "\x80\x80\x80\x80", 4 }, { "\xFF", 1 },
            { "\xC0", 1 },
        { "\xED\xA0", 2 }, { "\xED\x9F", 0 }, { "\xE0\x80", 2 }, { "\xE0\xA0", 0 }, { "\xF4\x90", 2 },
            { "\xF4\x8F", 0 },
        { "\xF0\x8F", 2 }, { "\xC3\xC3", 1 }, { "\xE4\x61", 2 }, { "a\x80\x80\x80", 4 } };
    int i;
    for (i = 0; i < QWEN3I_COUNT(cases); i++)
        CHECK_MSG(qwen3i_utf8_complete(cases[i].text, (int)strlen(cases[i].text)) == cases[i].complete, "case %d", i);
}

/* text in normal form C is expected. */
static int unicode_is(const unsigned char *classes, const char *text, const char *expected) {
    static const qwen3_allocator a = { NULL, NULL, NULL };
    qwen3i_nfc w = qwen3i_nfc_make(&a);
    size_t n;
    const char *p = qwen3i_normalize(&w, classes, 1, text, strlen(text), &n);
    int ok = p && n == strlen(expected) && memcmp(p, expected, n) == 0;
    qwen3i_nfc_free(&w);
    return ok;
}

static void test_unicode(void) {
    static const char *const pairs[][2] = {
        { "plain", "plain" }, { "e\xCC\x81", "\xC3\xA9" }, { "\xE2\x84\xAB", "\xC3\x85" },          /* Angstrom sign */
        /* reordered, then composed */
        { "a\xCC\x81\xCC\xA3", "\xE1\xBA\xA1\xCC\x81" },
        /* Hangul */
        { "\xE1\x84\x80\xE1\x85\xA1\xE1\x86\xA8", "\xEA\xB0\x81" }, { "\xEA\xB0\x80\xE1\x86\xA8", "\xEA\xB0\x81" },
        /* excluded from composition */
        { "\xE0\xA5\x98", "\xE0\xA4\x95\xE0\xA4\xBC" },
        { "x\xFFy\xE4\xB8", "x\xEF\xBF\xBDy\xEF\xBF\xBD" }, { "\xED\xA0\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD" },
        { "\xF0\x9F\x98!", "\xEF\xBF\xBD!" }, { "\xCC\x81""a", "\xCC\x81""a" }, { "\xEF\xBF\xBD", "\xEF\xBF\xBD" },
        { ">\xCC\xB8", "\xE2\x89\xAF" }, { "\xEF\xA4\x80", "\xE8\xB1\x88" } };
    unsigned char *classes = (unsigned char *)malloc(QWEN3I_CLASSES_LOW);
    int i;
    uint32_t c;
    qwen3i_classes_fill(classes);
    for (i = 0; i < QWEN3I_COUNT(pairs); i++) CHECK_MSG(unicode_is(classes, pairs[i][0], pairs[i][1]), "case %d", i);
    for (c = 0; c < 0x110000; c++)      /* the table and the search agree, and class is at most SPACE | UNSAFE */
        if (qwen3i_class(classes, c) != (qwen3i_uc_property(c) & 7)) { CHECK_MSG(0, "U+%04X", (unsigned)c); break; }
    for (c = 0; c < 0x110000; c++) {    /* every decomposition composes again, or is excluded for good */
        uint32_t x[4];
        size_t n = (size_t)qwen3i_decompose(c, x), k;
        for (k = 0; k < n; k++) x[k] |= (uint32_t)(qwen3i_uc_property(x[k]) >> 3) << 24;
        if (n == 1 && x[0] == c) continue;
        k = qwen3i_compose_all(x, n);
        if (!((k == 1 && QWEN3I_CODE(x[0]) == c) ||
                qwen3i_class(classes, c) & QWEN3I_UNSAFE)) { CHECK_MSG(0, "U+%04X", (unsigned)c); break; }
    }
    CHECK((qwen3i_class(classes, 0x0378) & QWEN3I_CLASS) == 0 &&
            (qwen3i_class(classes, 0x31350) & QWEN3I_CLASS) == QWEN3I_LETTER);
    CHECK((qwen3i_class(classes, 0x1C) & QWEN3I_CLASS) == 0 &&
            (qwen3i_class(classes, 0x85) & QWEN3I_CLASS) == QWEN3I_SPACE);
    free(classes);
}

/* ---- encoding ------------------------------------------------------------------------------------------------ */
/* Of a vocabulary of tests/data. Its token <norm..>, looked for in normalised text, is one that GGUF files cannot tell
   from others. */
static void tokenizer_check_strings(const qwen3_model *m, int gguf) {
    size_t file_n;
    char *file = tokenizer_data("strings.txt", &file_n), *at = file, *line;
    int count = 0;
    if (!CHECK(file != NULL)) return;
    while ((line = tokenizer_line(&at)) != NULL) {
        int special = line[0] == '1', n, again;
        long repeat = strtol(line + 2, &line, 10), i;
        char *text = line + 1, *expected = strchr(text, '\t');
        size_t unit;
        char *all;
        qwen3_token *ids;
        if (!CHECK(expected != NULL)) break;
        *expected++ = '\0';
        if (gguf && strstr(text, "<norm")) continue;
        unit = tokenizer_unescape(text, strlen(text));
        all = (char *)malloc(unit * (size_t)repeat + 1);
        for (i = 0; i < repeat; i++) memcpy(all + (size_t)i * unit, text, unit);
        n = qwen3_encode(m, all, unit * (size_t)repeat, special, NULL, 0, NULL, 0);
        ids = (qwen3_token *)malloc(sizeof *ids * (size_t)(n > 0 ? n + 1 : 1));
        if (n > 0) ids[n] = -7;
        again = qwen3_encode(m, all, unit * (size_t)repeat, special, ids, n > 0 ? n : 0, NULL, 0);
        CHECK_MSG(n >= 0 && again == n && tokenizer_ids_equal(expected, ids, n) && (n == 0 || ids[n] == -7),
                  "line %d: %d tokens, expected %.60s", count + 1, n, expected);
        free(ids);
        free(all);
        count++;
    }
    CHECK(count > 400);
    free(file);
}

static void test_tokenizer_strings(void) {
    qwen3_model m;
    if (!tokenizer_open_small(&m)) return;
    tokenizer_check_strings(&m, 0);
    qwen3i_tokenizer_free(m.tokenizer);
}

/* Text in normal form comes back from its tokens, and so does the text of every token. */
static void test_tokenizer_round_trip(void) {
    static const char text[] = "It's 12.5 \xC2\xB0""C; \xE4\xBD\xA0\xE5\xA5\xBD \xF0\x9F\x98\x80\r\n\r\n"
                               "\t x = [1,2]; <|im_end|> \xEA\xB0\x81";
    qwen3_model m;
    qwen3_token ids[256];
    int n, i, length;
    size_t back_n;
    char *back;
    if (!tokenizer_open_small(&m)) return;
    n = qwen3_encode(&m, text, sizeof text - 1, 0, ids, 256, NULL, 0);
    CHECK(n > 10 && n <= 256);
    back = tokenizer_decode(&m, ids, n, &back_n);
    CHECK(back_n == sizeof text - 1 && memcmp(back, text, back_n) == 0);
    free(back);
    for (i = 0; i < qwen3i_tokenizer_size(m.tokenizer); i++) {
        const char *p = qwen3_token_bytes(&m, i, &length);
        if (!CHECK(p != NULL && length > 0)) break;
        /* may be part of a character */
        if ((unsigned char)p[0] >= 0x80 || (unsigned char)p[length - 1] >= 0x80) continue;
        n = qwen3_encode(&m, p, (size_t)length, 0, ids, 256, NULL, 0);
        back = tokenizer_decode(&m, ids, n, &back_n);
        CHECK_MSG(back_n == (size_t)length && memcmp(back, p, back_n) == 0, "token %d", i);
        free(back);
    }
    qwen3i_tokenizer_free(m.tokenizer);
}

static void test_tokenizer_api(void) {
    qwen3_model m, none;
    qwen3_token ids[8] = { 0 };
    int n = 5;
    memset(&none, 0, sizeof none);
    CHECK(qwen3_encode(&none, "a", 1, 0, NULL, 0, NULL, 0) == QWEN3_ERR_UNSUPPORTED);
    CHECK(qwen3_token_bytes(&none, 0, &n) == NULL && n == 0 && token_id(&none, "<think>") == -1);
    if (!tokenizer_open_small(&m)) return;
    CHECK(qwen3_encode(NULL, "a", 1, 0, NULL, 0, NULL, 0) == QWEN3_ERR_ARG &&
            qwen3_encode(&m, NULL, 1, 0, NULL, 0, NULL, 0) == QWEN3_ERR_ARG);
    CHECK(qwen3_encode(&m, "a", 1, 2, NULL, 0, NULL, 0) == QWEN3_ERR_ARG &&
            qwen3_encode(&m, "a", 1, 0, NULL, 1, NULL, 0) == QWEN3_ERR_ARG);
    CHECK(qwen3_encode(&m, "a", 1, 0, ids, -1, NULL, 0) == QWEN3_ERR_ARG && qwen3_encode(&m, NULL, 0, 0, NULL, 0, NULL, 0) == 0);
    CHECK(qwen3_encode(&m, "\0", 1, 0, ids, 8, NULL, 0) == 1);                    /* NUL is a byte like others */
    CHECK(qwen3_encode(&m, "123456", 6, 0, ids, 2, NULL, 0) == 6 && ids[2] == 0); /* no more than cap is written */
    CHECK(token_id(&m, "<think>") > 0 && token_id(&m, "<thin") == -1 && token_id(&m, "") == -1);
    CHECK(token_id(&m, "the") == -1 && token_id(&m, "<think>x") == -1 && token_id(&m, NULL) == -1);
    CHECK(qwen3_token_bytes(&m, -1, &n) == NULL && qwen3_token_bytes(&m, 1 << 30, NULL) == NULL);
    CHECK(qwen3_encode(&m, "<|im_end|>", 10, QWEN3_PARSE_SPECIAL, ids, 8, NULL, 0) == 1 &&
            ids[0] == token_id(&m, "<|im_end|>"));
    n = qwen3_encode(&m, "<|im_end|>", 10, 0, ids, 8, NULL, 0);
    CHECK(n > 1);
    while (n > 0) { n--; CHECK(n >= 8 || ids[n] != token_id(&m, "<|im_end|>")); }
    qwen3i_tokenizer_free(m.tokenizer);
}

/* ---- files ----------------------------------------------------------------------------------------------------- */
/* data with the first occurrence of from replaced; free it. */
static char *tokenizer_edit(const char *data, const char *from, const char *to, size_t *n) {
    const char *hit = strstr(data, from);
    size_t before, from_n = strlen(from), to_n = strlen(to), after;
    char *out;
    if (!CHECK_MSG(hit != NULL, "the test file has no %s", from)) return NULL;
    before = (size_t)(hit - data);
    after = strlen(hit + from_n);
    out = (char *)malloc(before + to_n + after + 1);
    memcpy(out, data, before);
    memcpy(out + before, to, to_n);
    memcpy(out + before + to_n, hit + from_n, after + 1);
    *n = before + to_n + after;
    return out;
}

static void test_tokenizer_malformed(void) {
    static const struct { const char *from, *to, *message; qwen3_result result; } cases[] = {
        { "\"NFC\"", "\"NFKC\"", "normalizer", QWEN3_ERR_UNSUPPORTED },
        { "{\"type\":\"NFC\"}", "7", "object", QWEN3_ERR_FORMAT },
        { "|\\\\p{N}|", "|\\\\p{N}{1,3}|", "pattern", QWEN3_ERR_UNSUPPORTED },
        { "\"Isolated\"", "\"Removed\"", "behavior", QWEN3_ERR_UNSUPPORTED },
        { "\"Split\"", "\"Digits\"", "type", QWEN3_ERR_UNSUPPORTED },
        { "\"use_regex\":false", "\"use_regex\":true", "use_regex", QWEN3_ERR_UNSUPPORTED },
        { "\"type\":\"Sequence\"", "\"type\":\"Whitespace\"", "type", QWEN3_ERR_UNSUPPORTED },
        { "\"pretokenizers\":[", "\"pretokenizers\":[[],", "object", QWEN3_ERR_FORMAT },
        { "\"pre_tokenizer\"", "\"pre-tokenizer\"", "pre_tokenizer", QWEN3_ERR_FORMAT },
        { "\"type\":\"BPE\"", "\"type\":\"WordPiece\"", "type", QWEN3_ERR_UNSUPPORTED },
        { "\"byte_fallback\":false", "\"byte_fallback\":true", "byte_fallback", QWEN3_ERR_UNSUPPORTED },
        { "\"dropout\":null", "\"dropout\":0.1", "dropout", QWEN3_ERR_UNSUPPORTED },
        { "\"end_of_word_suffix\":\"\"", "\"end_of_word_suffix\":\"</w>\"", "end_of_word_suffix",
                QWEN3_ERR_UNSUPPORTED },
        { "\"vocab\":{", "\"vocab\":{\"!\":300,", "twice", QWEN3_ERR_FORMAT },
        { "\"vocab\":{", "\"vocab\":{\"quite new\":0,", "id 0 of another", QWEN3_ERR_FORMAT },
        { "\"vocab\":{", "\"vocab\":{\"new\":-1,", "out of range", QWEN3_ERR_FORMAT },
        { "\"vocab\":{", "\"vocab\":{\"new\":16000000,", "out of range", QWEN3_ERR_FORMAT },
        { "\"vocab\":{", "\"vocab\":{\"new\":1e300,", "whole number", QWEN3_ERR_FORMAT },
        { "\"vocab\":{", "\"vocab\":{\"new\":\"7\",", "number", QWEN3_ERR_FORMAT },
        { "\"vocab\":{", "\"vocab\":{\"\":2000,", "empty", QWEN3_ERR_FORMAT },
        { "\"vocab\":{", "\"vocab\":7,\"other\":{", "object", QWEN3_ERR_FORMAT },
        { "\"#\":", "\"#new\":", "", QWEN3_ERR_FORMAT },
        { "\"merges\":[", "\"merges\":[[\"q\",\"qqq\"],", "merge 0 (\"q\" \"qqq\")", QWEN3_ERR_FORMAT },
        { "\"merges\":[", "\"merges\":[\"\xE4\xB8\xAD a\",", "merge 0", QWEN3_ERR_FORMAT },
        { "\"merges\":[", "\"merges\":[\"ab\",", "two parts", QWEN3_ERR_FORMAT },
        { "\"merges\":[", "\"merges\":[[\"a\"],", "two parts", QWEN3_ERR_FORMAT },
        { "\"merges\":[", "\"merges\":[[\"a\",\"b\",\"c\"],", "two parts", QWEN3_ERR_FORMAT },
        { "\"merges\":[", "\"merges\":[17,", "array", QWEN3_ERR_FORMAT },
        { "\"model\":", "\"model\":{},\"model\":", "model", QWEN3_ERR_FORMAT },
        { "\"lstrip\":false", "\"lstrip\":true", "<|endoftext|>", QWEN3_ERR_UNSUPPORTED },
        { "\"single_word\":false", "\"single_word\":true", "<|endoftext|>", QWEN3_ERR_UNSUPPORTED },
        { "\"content\":\"<|im_start|>\"", "\"content\":\"<|endoftext|>\"", "<|endoftext|>", QWEN3_ERR_FORMAT },
        { "\"content\":\"<|im_start|>\"", "\"content\":\"\"", "empty", QWEN3_ERR_FORMAT },
        { "<norm\xC3\xA9>", "<norme\xCC\x81>", "normalised", QWEN3_ERR_UNSUPPORTED },
        { "\"added_tokens\":[", "\"added_tokens\":[{\"content\":\"<x>\"},", "<x>", QWEN3_ERR_FORMAT },
        { "{", "[", "object", QWEN3_ERR_FORMAT } };
    char message[256], *bad, *deep;
    qwen3_model m;
    size_t n, k;
    char *data = tokenizer_data("tokenizer.json", &n);
    int i;
    if (!CHECK(data != NULL)) return;
    for (i = 0; i < QWEN3I_COUNT(cases); i++) {
        bad = tokenizer_edit(data, cases[i].from, cases[i].to, &k);
        if (!bad) continue;
        CHECK_MSG(tokenizer_open(&m, bad, k, message) == cases[i].result &&
                m.tokenizer == NULL, "case %d: %s", i, message);
        CHECK_MSG(strstr(message, cases[i].message) && strstr(message, "tokenizer.json"), "case %d: %s", i, message);
        free(bad);
    }
    CHECK(tokenizer_open(&m, "", 0, message) == QWEN3_ERR_FORMAT);
    for (k = 0; k < n; k += n / 200 + 1)
        if (!CHECK_MSG(tokenizer_open(&m, data, k, message) < 0 &&
                m.tokenizer == NULL, "cut at %lu", (unsigned long)k)) break;
    deep = (char *)malloc(60000);
    memset(deep, '[', 60000);
    memcpy(deep, "{\"x\":", 5);
    CHECK(tokenizer_open(&m, deep, 60000, message) == QWEN3_ERR_FORMAT && strstr(message, "deep"));
    free(deep);
    free(data);
}

/* Any damage gives an error or a tokenizer that works, never anything else. */
static void test_tokenizer_damaged(void) {
    static const char text[] = "The capital of France isn't 12; \xE4\xBD\xA0\xE5\xA5\xBD <|im_end|>\n\n";
    char message[256];
    qwen3_model m;
    qwen3_token ids[100];
    uint32_t x = 1;
    size_t n;
    char *data = tokenizer_data("tokenizer.json", &n);
    int i, k;
    if (!CHECK(data != NULL)) return;
    for (i = 0; i < 200; i++) {
        size_t at[3];
        char old[3];
        for (k = 0; k < 3; k++) {
            x = x * 1664525u + 1013904223u;
            at[k] = (size_t)(x >> 4) % n;
            old[k] = data[at[k]];
            data[at[k]] = (char)(x >> 24);
        }
        if (tokenizer_open(&m, data, n, message) == QWEN3_OK) {
            CHECK(qwen3_encode(&m, text, sizeof text - 1, QWEN3_PARSE_SPECIAL, ids, 100, NULL, 0) > 0);
            qwen3i_tokenizer_free(m.tokenizer);
        } else CHECK(m.tokenizer == NULL && message[0]);
        for (k = 2; k >= 0; k--) data[at[k]] = old[k];
    }
    free(data);
}

/* An allocator that fails at the n-th call, and counts what is in use. */
typedef struct tokenizer_heap { long calls, fail_at, in_use, peak; } tokenizer_heap;

static void *tokenizer_heap_alloc(size_t size, void *user) {
    tokenizer_heap *h = (tokenizer_heap *)user;
    if (h->calls++ == h->fail_at) return NULL;
    h->in_use += (long)size;
    if (h->in_use > h->peak) h->peak = h->in_use;
    return malloc(size);
}

static void tokenizer_heap_free(void *p, size_t size, void *user) {
    ((tokenizer_heap *)user)->in_use -= (long)size;
    free(p);
}

/* A model without anything but this allocator. */
static void tokenizer_heap_model(qwen3_model *m, tokenizer_heap *heap) {
    memset(m, 0, sizeof *m);
    m->allocator.alloc = tokenizer_heap_alloc;
    m->allocator.free = tokenizer_heap_free;
    m->allocator.user = heap;
}

static void test_tokenizer_memory(void) {
    static char text[3000];
    char message[256];
    qwen3i_err err;
    qwen3_model m;
    tokenizer_heap heap = { 0, -1, 0, 0 };
    size_t n;
    char *data = tokenizer_data("tokenizer.json", &n);
    qwen3_result r;
    int count;
    long before;
    if (!CHECK(data != NULL)) return;
    tokenizer_heap_model(&m, &heap);
    err.text = message;
    err.cap = sizeof message;
    do {
        heap.calls = 0;
        heap.fail_at++;
        r = tokenizer_from_json(&m, data, n, &err);
        if (!CHECK(r == QWEN3_OK || (r == QWEN3_ERR_MEMORY && heap.in_use == 0 && m.tokenizer == NULL))) break;
    } while (r != QWEN3_OK && heap.fail_at < 1000);
    CHECK(heap.fail_at > 10);
    free(data);
    if (r != QWEN3_OK) return;
    memset(text, 'e', sizeof text);                     /* one long word, and marks */
    memcpy(text + 1000, "\xCC\x81\xCC\xA3", 4);
    before = heap.in_use;
    heap.fail_at = -1;
    do {
        heap.calls = 0;
        heap.fail_at++;
        count = qwen3_encode(&m, text, sizeof text, QWEN3_PARSE_SPECIAL, NULL, 0, NULL, 0);
        if (!CHECK((count > 0 || count == QWEN3_ERR_MEMORY) && heap.in_use == before)) break;
    } while (count < 0 && heap.fail_at < 1000);
    CHECK(heap.fail_at >= 3);
    heap.fail_at = -1;
    qwen3i_tokenizer_free(m.tokenizer);
    CHECK(heap.in_use == 0);
}

/* Encode n bytes of a pattern so many times: the tokens, and the processor's seconds, which tick slowly on some systems. */
static int tokenizer_time(const qwen3_model *m, const char *pattern, size_t n, int times, double *seconds) {
    size_t i, k = strlen(pattern);
    char *text = (char *)malloc(n);
    clock_t start;
    int count = 0;
    for (i = 0; i < n; i++) text[i] = pattern[i % k];
    start = clock();
    while (times-- > 0) count = qwen3_encode(m, text, n, QWEN3_PARSE_SPECIAL, NULL, 0, NULL, 0);
    *seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    free(text);
    return count;
}

/* Memory in proportion to the text, and time, too, whatever it is made of: one word, spaces, marks to be ordered,
   Hangul to be composed, digits, invalid bytes, tokens, halves of tokens. */
static void test_tokenizer_proportion(void) {
    static const char *const patterns[] = {
        "a", "the ", " ", "\n", " \n\t", "1", "e\xCC\x81", "\xCC\xA3\xCC\x81", "\xE1\x84\x80\xE1\x85\xA1", "\xFF",
        "\xF0\x9F\x98\x80", "<|im_end|>", "<|im_en", "'s", "ab1 .\n"
    };
    enum { N = 9000 };                  /* 4 N is just more than a power of two: the worst for buffers that double */
    const size_t n_patterns = sizeof patterns / sizeof *patterns;
    tokenizer_heap heap = { 0, -1, 0, 0 };
    char message[256];
    qwen3i_err err;
    qwen3_model m;
    size_t n, i;
    char *data = tokenizer_data("tokenizer.json", &n);
    double most = 0, slowest = 0;
    if (!CHECK(data != NULL)) return;
    tokenizer_heap_model(&m, &heap);
    err.text = message;
    err.cap = sizeof message;
    if (CHECK(tokenizer_from_json(&m, data, n, &err) == QWEN3_OK))
        for (i = 0; i < n_patterns; i++) {
            const long before = heap.peak = heap.in_use;
            double parts = 0, whole = 0;/* as much text in short pieces and in long ones */
            CHECK(tokenizer_time(&m, patterns[i], N, 16, &parts) > 0 && tokenizer_time(&m, patterns[i], 4 * N, 4, &whole) > 0);
            CHECK_MSG(heap.peak - before <= 260L * 4 * N, "pattern %d: %ld bytes for a text of %d", (int)i,
                      heap.peak - before, 4 * N);
            CHECK_MSG(whole < 2.5 * parts + 0.01, "pattern %d: %g s, and %g s in pieces four times as long", (int)i,
                      parts, whole);
            if ((double)(heap.peak - before) / (4 * N) > most) most = (double)(heap.peak - before) / (4 * N);
            if (whole > slowest) slowest = whole;
        }
    if (test_verbose)
        printf("      at most %.0f bytes and %.0f ns for a byte of text\n", most, 1e9 * slowest / (16 * N));
    qwen3i_tokenizer_free(m.tokenizer);
    free(data);
}

/* ---- the real vocabulary, where it is at hand -------------------------------------------------- */
#define TOKENIZER_REAL "../shared/qwen3-tokenizer/"

/* added_tokens.json ({"text": id}) as tokenizer_config.json has it; all are called special here. Free it. */
static char *tokenizer_real_config(const char *added, size_t n) {
    qwen3i_json j = qwen3i_json_begin(added, n);
    qwen3i_json_iter it;
    qwen3i_str key;
    int64_t id;
    size_t used, cap = 8 * n + 256;
    char *out = (char *)malloc(cap);
    used = (size_t)snprintf(out, cap, "{\"added_tokens_decoder\":{");
    if (qwen3i_json_open(&j, '{', &it)) while (qwen3i_json_next(&j, &it, &key) && qwen3i_json_int(&j, &id))
        used += (size_t)snprintf(out + used, cap - used, "%s\"%d\":{\"content\":\"%.*s\",\"special\":true}",
                                 out[used - 1] == '{' ? "" : ",", (int)id, (int)key.n, key.p);
    snprintf(out + used, cap - used, "}}");
    return out;
}

static void tokenizer_real_cases(const qwen3_model *m) {
    static const char mark[] = "\n__ggml_vocab_test__\n";
    size_t in_n, out_n;
    char *in = tokenizer_read(TOKENIZER_REAL "cases.inp", &in_n),
        *out = tokenizer_read(TOKENIZER_REAL "cases.out", &out_n);
    char *text = in, *lines = out, *line, *stop;
    qwen3_token ids[512];
    int count = 0, n;
    while (in && out && text && (line = lines, lines && *lines)) {
        char *end = strchr(line, '\n');
        if (end) *end = '\0';
        lines = end ? end + 1 : NULL;
        stop = strstr(text, mark);
        n = qwen3_encode(m, text, stop ? (size_t)(stop - text) : strlen(text), 0, ids, 512, NULL, 0);
        CHECK_MSG(tokenizer_ids_equal(line, ids, n), "case %d: %s", count, line);
        text = stop ? stop + sizeof mark - 1 : NULL;
        count++;
    }
    CHECK_MSG(count == 46, "%d cases", count);
    free(in);
    free(out);
}

static void test_tokenizer_real(void) {
    size_t vocab_n, merges_n, added_n;
    char *vocab = tokenizer_read(TOKENIZER_REAL "vocab.json", &vocab_n),
        *merges = tokenizer_read(TOKENIZER_REAL "merges.txt", &merges_n);
    char *added = tokenizer_read(TOKENIZER_REAL "added_tokens.json", &added_n), *config, message[256] = "";
    qwen3i_err err;
    qwen3_model m;
    qwen3_token ids[4];
    memset(&m, 0, sizeof m);
    err.text = message;
    err.cap = sizeof message;
    if (CHECK(vocab && merges && added)) {
        config = tokenizer_real_config(added, added_n);
        CHECK_MSG(tokenizer_from_vocab(&m, vocab, merges, merges_n, config, strlen(config), &err) == QWEN3_OK, "%s", message);
        free(config);
    }
    if (m.tokenizer) {
        CHECK(qwen3i_tokenizer_size(m.tokenizer) == 151669 && token_id(&m, "<|im_end|>") == 151645);
        CHECK(qwen3_encode(&m, "<think>\n", 8, QWEN3_PARSE_SPECIAL, ids, 4, NULL, 0) == 2 && ids[0] == 151667 && ids[1] == 198);
        tokenizer_real_cases(&m);
    }
    qwen3i_tokenizer_free(m.tokenizer);
    free(vocab);
    free(merges);
    free(added);
}

/* vocab.json and merges.txt: also what is wrong with them. */
static void test_tokenizer_vocab(void) {
    static const char good[] = "#version: 0.2\nh e\nl l\r\nhe ll\n", absent[] = "q e\n", three[] = "h e l\n";
    static const char config[] = "{\"x\":1,\"added_tokens_decoder\":{\"300\":{\"content\":\"<a>\",\"special\":true}}}";
    char vocab[8192], message[256];
    size_t used = 1, i;
    qwen3i_err err;
    qwen3_model m;
    qwen3_token ids[8];
    vocab[0] = '{';
    for (i = 0; i < 256; i++) {         /* the 256 bytes, as \u escapes of their characters */
        static const unsigned char other[] = { 0x7F, 0xAD };
        uint32_t c = 0x100, k;
        if (qwen3i_alphabet((uint32_t)i) == (int)i) c = (uint32_t)i;
        else for (k = 0x100; k < 0x144; k++) if (qwen3i_alphabet(k) == (int)i) c = k;
        CHECK(qwen3i_alphabet(c) == (int)i || i == other[0]);
        used += (size_t)snprintf(vocab + used, sizeof vocab - used, "\"\\u%04x\":%d,", (unsigned)c, (int)i);
    }
    snprintf(vocab + used, sizeof vocab - used, "\"he\":256,\"ll\":257,\"hell\":258}");
    err.text = message;
    err.cap = sizeof message;
    memset(&m, 0, sizeof m);
#define FROM_VOCAB(merges, n, config, config_n) \
    tokenizer_from_vocab(&m, vocab, merges, n, config, config_n, &err)
    CHECK(FROM_VOCAB(absent, sizeof absent - 1, NULL, 0) == QWEN3_ERR_FORMAT && strstr(message, "merges.txt") &&
            strstr(message, "\"q\" \"e\""));
    CHECK(FROM_VOCAB(three, sizeof three - 1, NULL, 0) == QWEN3_ERR_FORMAT && strstr(message, "two parts"));
    CHECK(FROM_VOCAB(good, sizeof good - 1, "{", 1) == QWEN3_ERR_FORMAT && strstr(message, "tokenizer_config.json"));
    CHECK(FROM_VOCAB(good, sizeof good - 1, "{}", 2) == QWEN3_OK);
    qwen3i_tokenizer_free(m.tokenizer);
    if (!CHECK_MSG(FROM_VOCAB(good, sizeof good - 1, config, sizeof config - 1) == QWEN3_OK, "%s", message)) return;
#undef FROM_VOCAB
    CHECK(qwen3_encode(&m, "hello<a>", 8, QWEN3_PARSE_SPECIAL, ids, 8, NULL, 0) == 3);
    CHECK(ids[0] == 258 && ids[1] == 'o' && ids[2] == 300 && qwen3i_tokenizer_size(m.tokenizer) == 301);
    CHECK(qwen3_token_bytes(&m, 299, NULL) == NULL);    /* a hole */
    qwen3i_tokenizer_free(m.tokenizer);
}

static void suite_tokenizer(void) {
    FILE *real = fopen(TOKENIZER_REAL "vocab.json", "rb");
    RUN(test_utf8_complete);
    RUN(test_unicode);
    RUN(test_tokenizer_strings);
    RUN(test_tokenizer_round_trip);
    RUN(test_tokenizer_api);
    RUN(test_tokenizer_malformed);
    RUN(test_tokenizer_damaged);
    RUN(test_tokenizer_memory);
    RUN(test_tokenizer_proportion);
    RUN(test_tokenizer_vocab);
    if (real) { fclose(real); RUN(test_tokenizer_real); }
    else test_skip("test_tokenizer_real", "the real vocabulary is not here");
}
#endif
