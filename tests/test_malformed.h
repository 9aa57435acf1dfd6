/* Files and states that are wrong in every way we know: each is refused with the right result and a message
   that names the file, the key or tensor and the reason; none takes memory out of proportion, and nothing
   leaks. What still loads must run. Run under sanitizers this also shows that nothing is read out of bounds. */
#ifndef QWEN3_TESTS_TEST_MALFORMED_H
#define QWEN3_TESTS_TEST_MALFORMED_H
#include "fixture.h"
#include "tiny.h"

/* ---- loading under watch ------------------------------------------------------------------------------ */
typedef struct malformed_heap { test_heap h; long long peak; } malformed_heap;

static void *malformed_alloc(size_t size, void *user) {
    malformed_heap *m = (malformed_heap *)user;
    void *p = size > (size_t)1 << 30 ? NULL : heap_alloc(size, &m->h);      /* a gigabyte: surely a mistake */
    if (m->h.bytes > m->peak) m->peak = m->h.bytes;
    if (!p) m->peak = (long long)size;
    return p;
}
static void malformed_free(void *p, size_t size, void *user) { heap_free(p, size, &((malformed_heap *)user)->h); }

#define MALFORMED_FACTOR 8              /* memory taken for a byte of the files, at most ... */
#define MALFORMED_FIXED  (24 * 1024 + (long long)sizeof(qwen3i_tokenizer))     /* ... and besides */

static int malformed_count;             /* loads that were tried */
static double malformed_factor;         /* the largest so far */

/* A token and a text, in what a damaged file has become. */
static void malformed_use(const qwen3_model *m) {
    static const char text[] = "abab \xC3\xA9\xCC\x81 <|im_end|>\xFF 12";
    qwen3_ctx_desc d = ctx_desc(4, 1, 0, QWEN3_KV_F32);
    qwen3_token tokens[64];
    qwen3_ctx *ctx = NULL;
    int n = qwen3_encode(m, text, sizeof text - 1, QWEN3_PARSE_SPECIAL, tokens, 64, NULL, 0);
    CHECK(n > 0 || n == QWEN3_ERR_UNSUPPORTED);
    if (qwen3_ctx_create(&ctx, m, &d, NULL, 0) == QWEN3_OK) {
        tokens[0] = 0;
        CHECK_OK(ctx, eval(ctx, 0, tokens, 1, NULL));
        CHECK(qwen3_next(ctx, 0, NULL, tokens) >= QWEN3_ERR_ARG);           /* ARG: the logits are not numbers */
    }
    qwen3_ctx_free(ctx);
}

/* Load a list of files; *err gets the message. */
static qwen3_result malformed_load_files(const qwen3_file *files, int n, size_t size, char err[512]) {
    malformed_heap heap;
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    qwen3_result r;
    memset(&heap, 0, sizeof heap);
    memset(&d, 0, sizeof d);
    d.files = files;
    d.n_files = n;
    d.allocator.alloc = malformed_alloc;
    d.allocator.free = malformed_free;
    d.allocator.user = &heap;
    err[0] = '\0';
    r = qwen3_load(&m, &d, err, 512);
    malformed_count++;
    CHECK_MSG(heap.peak <= MALFORMED_FACTOR * (long long)size + MALFORMED_FIXED, "%lld bytes for files of %lu: %s",
              heap.peak, (unsigned long)size, err);
    if ((double)(heap.peak - MALFORMED_FIXED) > malformed_factor * (double)size)
        malformed_factor = (double)(heap.peak - MALFORMED_FIXED) / (double)size;
    CHECK_MSG((r == QWEN3_OK) == (m != NULL) && (r == QWEN3_OK) == !err[0], "%s: '%s'", qwen3_result_string(r), err);
    if (m) malformed_use(m);
    qwen3_free(m);
    CHECK_MSG(heap.h.live == 0 && heap.h.bad == 0, "%ld blocks leak, %ld wrong frees: %s", heap.h.live, heap.h.bad,
              err);
    return r;
}

/* The files are copied to where they just fit, so that reading on is seen. */
static qwen3_result malformed_load(const tiny_model *m, char err[512]) {
    qwen3_file files[TINY_FILES];
    void *copy[TINY_FILES];
    int i, n = tiny_list(m, files);
    qwen3_result r;
    for (i = 0; i < n; i++) {
        copy[i] = malloc(files[i].size ? files[i].size : 1);
        memcpy(copy[i], files[i].data, files[i].size);
        files[i].data = copy[i];
    }
    r = malformed_load_files(files, n, tiny_size(m), err);
    for (i = 0; i < n; i++) free(copy[i]);
    return r;
}

/* Does the message hold all of these words, with | between them? */
static int malformed_says(const char *err, const char *words) {
    char word[128];
    for (;;) {
        const char *bar = strchr(words, '|');
        snprintf(word, sizeof word, "%.*s", bar ? (int)(bar - words) : (int)strlen(words), words);
        if (!strstr(err, word)) return 0;
        if (!bar) return 1;
        words = bar + 1;
    }
}

/* Append a text in which {N*x} stands for N times x. */
static void malformed_append(tiny_text *out, const char *text) {
    int times, used;
    while (*text) {
        used = 0;
        if (*text == '{' && text[1] >= '1' && text[1] <= '9' && sscanf(text, "{%d*%n", &times, &used) == 1 && used) {
            const char *stop = strchr(text, '}');
            for (; times > 0; times--) tiny_append(out, text + used, (size_t)(stop - text - used));
            text = stop + 1;
        } else {
            size_t plain = 1 + strcspn(text + 1, "{");
            tiny_append(out, text, plain);
            text += plain;
        }
    }
}

/* The text with the first `from` replaced; no from: all of it. */
static tiny_text malformed_replace(const char *text, size_t n, const char *from, const char *to) {
    tiny_text out = {NULL, 0};
    const char *hit = from ? strstr(text, from) : text;
    tiny_append(&out, "", 0);
    if (!CHECK_MSG(hit != NULL, "there is no '%s' to replace", from)) return out;
    tiny_append(&out, text, (size_t)(hit - text));
    malformed_append(&out, to);
    if (from) tiny_append(&out, hit + strlen(from), n - (size_t)(hit - text) - strlen(from));
    return out;
}

typedef struct malformed_case { const char *from, *to; qwen3_result result; const char *words; } malformed_case;

/* Does the model, with this one replacement in one of its files, load as the case says? file: named in the message. */
static void malformed_check(tiny_model *m, const malformed_case *c, const char *file) {
    char err[512];
    qwen3_result r = malformed_load(m, err);
    int named = r == QWEN3_OK || !file || strstr(err, file);
    CHECK_MSG(r == c->result && named && malformed_says(err, c->words), "'%.60s' -> '%.60s': %s: '%s'; not '%s' and %s",
              c->from ? c->from : "all", c->to, qwen3_result_string(r), err, c->words, file ? file : "");
}

/* Cases of a file that is text. */
static void malformed_texts(tiny_model *m, int which, const malformed_case *cases, size_t n) {
    const tiny_text whole = m->file[which];
    size_t i;
    for (i = 0; i < n; i++) {
        m->file[which] = malformed_replace(whole.p, whole.n, cases[i].from, cases[i].to);
        malformed_check(m, &cases[i], tiny_names[which]);
        free(m->file[which].p);
    }
    m->file[which] = whole;
}
#define MALFORMED_TEXTS(m, which, cases) malformed_texts(m, which, cases, sizeof cases / sizeof *cases)

#define BAD  QWEN3_ERR_FORMAT
#define NOT  QWEN3_ERR_UNSUPPORTED
#define NONE QWEN3_ERR_IO
#define GOOD QWEN3_OK

/* ---- config.json ---------------------------------------------------------------------------------------- */
static void test_malformed_config(void) {
    static const malformed_case cases[] = {
        {NULL, "", BAD, "object"}, {NULL, "{", BAD, "string"}, {NULL, "[]", BAD, "object"},
        {NULL, "null", BAD, "object"},
        {NULL, "{}", BAD, "model_type|missing"}, {NULL, "{\"model_type\":\"qwen3\"}", NOT, "architectures"},
        {NULL, "\xEF\xBB\xBF{}", BAD, "byte 0|byte order mark"}, {NULL, "{\"x\":{60000*[}", BAD, "'x'|nested too deeply"},
        {NULL, "{\"x\":{20000*{\"y\":}", BAD, "'x'|nested too deeply"},
        {NULL, "{{60000*\"a\":1,}", BAD, "string was expected"},
        {"}", "}}", BAD, "after the end"}, {"}", "} x", BAD, "after the end"}, {"}", ",}", BAD, "string was expected"},
        {"\"head_dim\":2", "\"head_dim\":2,,", BAD, "string was expected"},
        {"\"head_dim\":2", "\"head_dim\":+2", BAD, "'head_dim'|number"},
        {"\"head_dim\":2", "\"head_dim\" 2", BAD, "':' was expected"},
        {"\"head_dim\":2", "\"head_dim\":02", BAD, "'head_dim'|starts with 0"},
        {"\"head_dim\":2", "\"head_dim\":2.", BAD, "'head_dim'|decimal point"},
        {"\"head_dim\":2", "\"head_dim\":2e", BAD, "'head_dim'|exponent"},
        {"\"head_dim\":2", "\"head_dim\":2.5", BAD, "'head_dim'|whole number"},
        {"\"head_dim\":2", "\"head_dim\":\"2\"", BAD, "'head_dim'|number"},
        {"\"head_dim\":2", "\"head_dim\":[2]", BAD, "'head_dim'|number"},
        {"\"head_dim\":2", "\"head_dim\":null", BAD, "'head_dim'|number"},
        {"\"head_dim\":2", "\"head_dim\":0", BAD, "'head_dim'|0|16777216"},
        {"\"head_dim\":2", "\"head_dim\":-2", BAD, "'head_dim'|-2"},
        {"\"head_dim\":2", "\"head_dim\":9223372036854775808", BAD, "'head_dim'|whole number"},
        {"\"head_dim\":2", "\"head_dim\":1e308", BAD, "'head_dim'|whole number"},
        {"\"head_dim\":2", "\"head_dim\":{5000*9}", BAD, "'head_dim'|whole number"},
        {"\"head_dim\":2", "\"head_dim\":2e999999999999", BAD, "'head_dim'|whole number"},
        {"\"head_dim\":2", "\"head_dim\":NaN", BAD, "'head_dim'|number"},
        {"\"head_dim\":2", "\"head_dim\":4294967298", BAD, "'head_dim'|4294967298"},
        {"\"head_dim\":2", "\"head_dim\":3", NOT, "head_dim|odd"},
        {"\"head_dim\":2", "\"head_dim\":16777216", BAD, "head_dim|out of range"},
        {"\"head_dim\":2,", "", BAD, "'head_dim'|missing"},
        {"\"num_key_value_heads\":1", "\"num_key_value_heads\":3", BAD, "2 attention heads|3 key/value heads"},
        {"\"num_key_value_heads\":1", "\"num_key_value_heads\":0", BAD, "'num_key_value_heads'|0"},
        {"\"rms_norm_eps\":1e-6", "\"rms_norm_eps\":0", BAD, "'rms_norm_eps'"},
        {"\"rms_norm_eps\":1e-6", "\"rms_norm_eps\":-1", BAD, "'rms_norm_eps'"},
        {"\"rms_norm_eps\":1e-6", "\"rms_norm_eps\":1e999", BAD, "'rms_norm_eps'"},
        {"\"rms_norm_eps\":1e-6,", "", BAD, "'rms_norm_eps'|missing"},
        {"\"rope_theta\":10000", "\"rope_theta\":0", BAD, "'rope_theta'"},
        {"\"rope_theta\":10000", "\"rope_theta\":1e40", BAD, "'rope_theta'"},
        {"\"rope_theta\":10000", "\"rope_theta\":true", BAD, "'rope_theta'|number"},
        {"\"rope_theta\":10000,", "", BAD, "'rope_theta'|missing"},
        {"\"tie_word_embeddings\":true,", "", BAD, "'tie_word_embeddings'|missing"},
        {"\"tie_word_embeddings\":true", "\"tie_word_embeddings\":1", BAD, "'tie_word_embeddings'|true or false"},
        {"\"attention_bias\":false", "\"attention_bias\":true", NOT, "'attention_bias'|biases"},
        {"\"attention_bias\":false", "\"attention_bias\":\"no\"", BAD, "'attention_bias'|true or false"},
        {"\"use_sliding_window\":false", "\"use_sliding_window\":true", NOT, "'use_sliding_window'"},
        {"\"silu\"", "\"gelu\"", NOT, "'hidden_act'|silu"}, {"\"silu\"", "3", BAD, "'hidden_act'|string"},
        {"\"qwen3\"", "\"llama\"", NOT, "model_type is 'llama'"},
        {"\"qwen3\"", "\"{3000*q}\"", NOT, "model_type is 'qqq"},
        {"\"qwen3\"", "7", BAD, "'model_type'|string"}, {"\"qwen3\"", "\"qwen\\u0033\\q\"", BAD, "'model_type'|escape"},
        {"\"qwen3\"", "\"\x1B[2J\"", BAD, "control character"}, {"\"qwen3\"", "\"qwen3", BAD, "','"},
        {"\"qwen3\"", "\"\x7F\"", NOT, "model_type is '?'"},
        {"\"qwen3\"", "\"qwen\\u33\"", BAD, "'model_type'|\\u escape"},
        {"\"Qwen3ForCausalLM\"", "\"LlamaForCausalLM\"", NOT, "Qwen3ForCausalLM"},
        {"[\"Qwen3ForCausalLM\"]", "\"Qwen3ForCausalLM\"", BAD, "'architectures'|array"},
        {"[\"Qwen3ForCausalLM\"]", "[[\"Qwen3ForCausalLM\"]]", BAD, "'architectures'|string"},
        {"[\"Qwen3ForCausalLM\"]", "{}", BAD, "'architectures'|array"},
        {"\"rope_scaling\":null", "\"rope_scaling\":7", BAD, "'rope_scaling'|object"},
        {"\"rope_scaling\":null", "\"rope_scaling\":{\"type\":\"linear\"}", NOT, "'rope_type'|yarn"},
        {"\"rope_scaling\":null", "\"rope_scaling\":{\"type\":\"yarn\"}", NOT, "factor"},
        {"\"rope_scaling\":null", "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":-4}", NOT, "factor"},
        {"\"rope_scaling\":null", "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":1e300}", NOT, "factor"},
        {"\"rope_scaling\":null", "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,\"attention_factor\":1e300}", NOT,
         "attention_factor"},
        {"\"rope_scaling\":null", "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":\"4\"}", BAD,
         "'rope_scaling'|number"},
        {"\"rope_scaling\":null", "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":4,\"more\":[1]}", GOOD, ""},
        {"\"rope_scaling\":null", "\"rope_scaling\":{\"type\":7}", BAD, "'rope_scaling'|string"},
        {"\"rope_scaling\":null", "\"quantization_config\":{\"bits\":4}", NOT, "quantization_config"},
        {"\"rope_scaling\":null", "\"layer_types\":[\"sliding_attention\"]", NOT, "'layer_types'"},
        {"\"rope_scaling\":null", "\"layer_types\":[3]", BAD, "'layer_types'|string"},
        {"\"eos_token_id\":257", "\"eos_token_id\":\"257\"", BAD, "'eos_token_id'|number"},
        {"\"eos_token_id\":257", "\"eos_token_id\":{}", BAD, "'eos_token_id'|number"},
        {"\"eos_token_id\":257", "\"eos_token_id\":[257,]", BAD, "'eos_token_id'|number"},
        {"\"eos_token_id\":257", "\"eos_token_id\":-1", GOOD, ""},
        {"\"eos_token_id\":257", "\"eos_token_id\":9007199254740992", GOOD, ""},
        {"\"eos_token_id\":257", "\"eos_token_id\":[{5000*1,}1]", GOOD, ""},
        {"\"eos_token_id\":257", "\"eos_token_id\":null", GOOD, ""},
        {"\"eos_token_id\":257", "\"x\":[{63*[}{63*]}]", GOOD, ""},
        {"\"eos_token_id\":257", "\"x\":{256*[}{256*]}", GOOD, ""},
        {"\"eos_token_id\":257", "\"x\":{257*[}{257*]}", BAD, "'x'|nested too deeply"},
        {"\"eos_token_id\":257", "\"x\":[1,2", BAD, "'x'"}, {"\"eos_token_id\":257", "\"x\":[1 2]", BAD, "'x'|','"},
        {"\"eos_token_id\":257", "\"x\":[1}", BAD, "'x'|','"},
        {"\"eos_token_id\":257", "\"x\":tru", BAD, "'x'|value"}, {"\"eos_token_id\":257", "\"x\":-", BAD, "'x'|number"},
        {"\"eos_token_id\":257", "\"x\":.5", BAD, "'x'|value"},
        {"\"eos_token_id\":257", "\"{20000*k}\":1", GOOD, ""},
        {"\"eos_token_id\":257", "\"x\":\"{20000*\\u00e9}\"", GOOD, ""},
        {"\"vocab_size\":264", "\"vocab_size\":300", BAD, "model.embed_tokens.weight|[264, 4]|[300, 4]"},
        {"\"vocab_size\":264", "\"vocab_size\":258", BAD, "ids up to 259|258 rows"},
        {"\"vocab_size\":264", "\"vocab_size\":1e999", BAD, "'vocab_size'|whole number"},
        {"\"hidden_size\":4", "\"hidden_size\":5", BAD, "model.embed_tokens.weight|[264, 4]|[264, 5]"},
        {"\"intermediate_size\":6", "\"intermediate_size\":16777216", BAD, "gate_proj|[6, 4]|[16777216, 4]"},
        {"\"num_hidden_layers\":1", "\"num_hidden_layers\":2", BAD, "model.layers.1.input_layernorm.weight|missing"},
        {"\"num_hidden_layers\":1", "\"num_hidden_layers\":8000000", BAD, "num_hidden_layers is 8000000|13 tensors"},
        {"\"num_hidden_layers\":1", "\"num_hidden_layers\":1,\"num_hidden_layers\":-1", BAD, "'num_hidden_layers'|-1"},
        {"\"tie_word_embeddings\":true", "\"tie_word_embeddings\":false", BAD, "lm_head.weight|missing"},
        {"\"max_position_embeddings\":32", "\"max_position_embeddings\":16777217", BAD, "'max_position_embeddings'"},
        {"\"max_position_embeddings\":32", "\"max_position_embeddings\":16777216", GOOD, ""}
    };
    tiny_model m;
    size_t i;
    tiny_make(&m, 0, 0);
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {    /* the last: when the weights are held against it */
        const tiny_text whole = m.file[TINY_CONFIG];
        m.file[TINY_CONFIG] = malformed_replace(whole.p, whole.n, cases[i].from, cases[i].to);
        malformed_check(&m, &cases[i],
                        strstr(cases[i].words, "weight") || strstr(cases[i].words, "proj") ? "model.safetensors" :
                        strstr(cases[i].words, "ids up") ? NULL : "config.json");
        free(m.file[TINY_CONFIG].p);
        m.file[TINY_CONFIG] = whole;
    }
    tiny_free(&m);
}

static void test_malformed_generation(void) {
    static const malformed_case cases[] = {
        {NULL, "", BAD, "object"}, {NULL, "7", BAD, "object"}, {NULL, "{\"temperature\":\"hot\"}", BAD, "number"},
        {"\"do_sample\":true", "\"do_sample\":7", BAD, "true or false"}, {"[257,259]", "[257,\"259\"]", BAD, "number"},
        {"0.6", "-5", GOOD, ""}, {"0.6", "1e400", GOOD, ""}, {"\"top_k\":20", "\"top_k\":1e300", GOOD, ""},
        {"0.95", "-0.0", GOOD, ""},
        {"[257,259]", "[{3000*-1,}99999999999]", GOOD, ""}, {"}", "", BAD, "byte"}
    };
    tiny_model m;
    tiny_make(&m, 0, 0);
    MALFORMED_TEXTS(&m, TINY_GENERATION, cases);
    tiny_free(&m);
}

/* ---- model.safetensors ------------------------------------------------------------------------------------ */
static void test_malformed_safetensors(void) {
    static const char norm[] = "\"model.norm.weight\":{\"dtype\":\"BF16\",\"shape\":[4],\"data_offsets\":[0,8]}";
    static const malformed_case cases[] = {     /* changes of the header; the data stay as they are */
        {NULL, "", BAD, "start with {"}, {NULL, "[]", BAD, "start with {"}, {NULL, "\"x\"", BAD, "start with {"},
        {NULL, "{}", BAD, "end at byte 0|the file at 2384"},
        {NULL, " {}", BAD, "start with {"}, {NULL, "{{60000*[}", BAD, "string"},
        {NULL, "{\"x\":{60000*[}", BAD, "'x'|object"}, {NULL, "{\"x\":{\"y\":{60000*[}", BAD, "'x'|nested too deeply"},
        {"}}", "}} x", BAD, "after the end"}, {"}}", "}}       ", GOOD, ""}, {"}}", "},}", BAD, "string"},
        {"{\"format\":\"pt\"}", "{\"format\":7}", BAD, "string"}, {"{\"format\":\"pt\"}", "[]", BAD, "object"},
        {"{\"format\":\"pt\"}", "{{3000*\"a\":\"b\",}\"c\":\"d\"}", GOOD, ""},
        {"\"__metadata__\":{\"format\":\"pt\"}", "\"__metadata__\":{},\"__metadata__\":{}", BAD,
         "__metadata__ appears twice"},
        {"\"__metadata__\":{\"format\":\"pt\"},", "", GOOD, ""},
        {"\"__metadata__\":{\"format\":\"pt\"}", "\"__metadata__\":null", GOOD, ""},
        {"\"BF16\"", "\"BF17\"", NOT, "model.norm.weight|BF17"}, {"\"BF16\"", "16", BAD, "'model.norm.weight'|string"},
        {"\"BF16\"", "\"I16\"", NOT, "model.norm.weight|I16|not supported"},
        {"\"BF16\"", "\"F32\"", BAD, "model.norm.weight|needs 16 bytes|has 8"},
        {"\"BF16\"", "\"F8_E4M3\"", BAD, "needs 4 bytes|has 8"}, {"\"BF16\"", "\"F16\"", GOOD, ""},
        {"\"BF16\"", "\"{5000*B}\"", NOT, "model.norm.weight|BBBB"},
        {"\"dtype\":\"BF16\",", "", BAD, "'model.norm.weight'|missing"},
        {"\"shape\":[4],", "", BAD, "'model.norm.weight'|missing"},
        {",\"data_offsets\":[0,8]", "", BAD, "'model.norm.weight'|missing"},
        {"\"dtype\":\"BF16\",", "\"dtype\":\"BF16\",\"dtype\":\"BF16\",", BAD, "'model.norm.weight'|twice"},
        {"\"shape\":[4],", "\"shape\":[4],\"shape\":[4],", BAD, "twice"},
        {"\"shape\":[4],", "\"shape\":[4],\"more\":[{\"x\":0}],", GOOD, ""},
        {"\"shape\":[4]", "\"shape\":[]", BAD, "model.norm.weight|needs 2 bytes"},
        {"\"shape\":[4]", "\"shape\":4", BAD, "array"}, {"\"shape\":[4]", "\"shape\":[[4]]", BAD, "number"},
        {"\"shape\":[4]", "\"shape\":[2,2]", BAD, "model.norm.weight|[2, 2]|[4]"},
        {"\"shape\":[4]", "\"shape\":[1,1,1,1,1,1,1,4]", BAD, "[1, 1, 1, 1, 1, 1, 1, 4]"},
        {"\"shape\":[4]", "\"shape\":[1,1,1,1,1,1,1,1,4]", BAD, "more than 8"},
        {"\"shape\":[4]", "\"shape\":[{50000*1,}4]", BAD, "more than 8"},
        {"\"shape\":[4]", "\"shape\":[-4]", BAD, "'model.norm.weight'|negative"},
        {"\"shape\":[4]", "\"shape\":[4.5]", BAD, "whole number"},
        {"\"shape\":[4]", "\"shape\":[\"4\"]", BAD, "number"},
        {"\"shape\":[4]", "\"shape\":[0]", BAD, "needs 0 bytes|has 8"},
        {"\"shape\":[4]", "\"shape\":[18446744073709551620]", BAD, "whole number"},
        {"\"shape\":[4]", "\"shape\":[9007199254740992,2048]", BAD, "model.norm.weight|overflows"},
        {"\"shape\":[4]", "\"shape\":[4294967296,4294967296]", BAD, "model.norm.weight|overflows"},
        {"\"shape\":[4]", "\"shape\":[2097152,2097152,2097153]", BAD, "model.norm.weight|overflows"},
        {"\"shape\":[4]", "\"shape\":[1125899906842624]", BAD, "needs 2251799813685248 bytes"},
        {"[0,8]", "[0]", BAD, "'model.norm.weight'|missing"}, {"[0,8]", "[]", BAD, "missing"},
        {"[0,8]", "[0,8,9]", BAD, "more than 2"}, {"[0,8]", "{}", BAD, "array"},
        {"[0,8]", "[8,0]", BAD, "model.norm.weight|outside"}, {"[0,8]", "[-8,0]", BAD, "negative"},
        {"[0,8]", "[0,7]", BAD, "needs 8 bytes|has 7"}, {"[0,8]", "[1,9]", BAD, "starts at byte 1"},
        {"[0,8]", "[0,9223372036854775807]", BAD, "whole number"},
        {"[0,8]", "[0,9007199254740992]", BAD, "model.norm.weight|outside"},
        {"[0,8]", "[9007199254740984,9007199254740992]", BAD, "starts at byte 8"},
        {"[8,16]", "[8,20]", BAD, "input_layernorm"}, {"[8,16]", "[0,8]", BAD, "starts at byte 0"},
        {"[8,16]", "[4,12]", BAD, "starts at byte 4"}, {"[8,16]", "[12,20]", BAD, "starts at byte"},
        {"[272,2384]", "[272,2385]", BAD, "model.embed_tokens.weight|outside"},
        {"[272,2384]", "[2720,4832]", BAD, "outside"},
        {"[264,4],\"data_offsets\":[272,2384]", "[263,4],\"data_offsets\":[272,2376]", BAD,
         "end at byte 2376|the file at 2384"},
        {"\"model.norm.weight\"", "\"model.norm.w\"", BAD, "model.norm.weight|missing"},
        {"\"model.norm.weight\"", "\"model.norm\\u002eweight\"", BAD, "model.norm.weight|missing"},
        {"\"model.norm.weight\"", "\"{70000*n}\"", BAD, "model.norm.weight|missing"},
        {"\"model.norm.weight\"", "\"\"", BAD, "missing"}, {"\"model.norm.weight\"", "7", BAD, "string"},
        {"\"model.norm.weight\"", "\"model.layers.0.mlp.up_proj.weight\"", BAD,
         "model.layers.0.mlp.up_proj.weight|twice"},
        {"\"model.norm.weight\"", "\"\x9B\"", BAD, "missing"},
        {norm, "\"e\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},"
               "\"e\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}", BAD, "input_layernorm"},
        {"\"model.norm", "\"e\":{\"dtype\":\"F32\",\"shape\":[0,9],\"data_offsets\":[0,0]},\"model.norm", GOOD, ""},
        {"\"model.norm", "\"e\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]},"
                        "\"e\":{\"dtype\":\"I8\",\"shape\":[0],\"data_offsets\":[0,0]},\"model.norm", BAD, "'e'|twice"},
        {"\"model.norm", "\"e\":7,\"model.norm", BAD, "'e'|object"},
        {"\"model.norm", "\"e\":null,\"model.norm", BAD, "'e'|object"},
        {"\"model.norm", "\"e\":[],\"model.norm", BAD, "'e'|object"},
        {"q_proj.weight\":{\"dtype\":\"BF16\",\"shape\":[4,4]", "q_proj.weight\":{\"dtype\":\"BF16\",\"shape\":[2,8]",
         BAD, "q_proj|[2, 8]|[4, 4]"}
    };
    tiny_model m;
    tiny_text header = {NULL, 0}, changed;
    size_t i, n = tiny_header(&header, 0, TINY_TENSORS);
    tiny_make(&m, 0, 0);
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        changed = malformed_replace(header.p, header.n, cases[i].from, cases[i].to);
        tiny_remove(&m, TINY_WEIGHTS);
        m.file[TINY_WEIGHTS] = tiny_safetensors(changed.p, changed.n, n);
        malformed_check(&m, &cases[i], "model.safetensors");
        free(changed.p);
    }
    free(header.p);
    tiny_free(&m);
}

/* The eight bytes before the header, and what is in the data. */
static void test_malformed_safetensors_bytes(void) {
    static const struct { unsigned char bytes[9]; const char *words; } lengths[] = {
        {"\0\0\0\0\0\0\0\0", "start with {"}, {"\1\0\0\0\0\0\0\0", "string was expected"},
        {"\0\0\0\0\0\0\0\x80", "9223372036854775808"},
        {"\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", "18446744073709551615"}, {"\xF8\xFF\xFF\xFF\xFF\xFF\xFF\xFF", "truncated"},
        {"\1\xE1\xF5\5\0\0\0\0", "100000001"}, {"\0\0\1\0\0\0\0\0", "65536"},
        {"GGUF\3\0\0\0", "not a safetensors file"},
        {"PK\3\4\0\0\0\0", "not a safetensors file"}, {"\x80\2\x8A\nl\xFC\x9C", "not a safetensors file"},
        {"<!DOCTYP", "not a safetensors file"}
    };
    const malformed_case bad = {NULL, "the length", BAD, "not"};
    malformed_case c = bad;
    tiny_model m;
    tiny_text f;
    size_t i, length;
    tiny_make(&m, 0, 0);
    f = m.file[TINY_WEIGHTS];
    for (i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        char old[8];
        memcpy(old, f.p, 8);
        memcpy(f.p, lengths[i].bytes, 8);
        c.words = lengths[i].words;
        malformed_check(&m, &c, "model.safetensors");
        memcpy(f.p, old, 8);
    }
    for (length = 0; length < 17; length++) {       /* shorter than a header's length, and not much longer */
        m.file[TINY_WEIGHTS].n = length;
        c.words = length < 8 ? "truncated" : "the file has";
        malformed_check(&m, &c, "model.safetensors");
    }
    m.file[TINY_WEIGHTS] = f;
    tiny_append(&m.file[TINY_WEIGHTS], "", 1);      /* and longer than it should be */
    c.words = "end at byte 2384|the file at 2385";
    malformed_check(&m, &c, "model.safetensors");
    tiny_set_weights(&m, TINY_WEIGHTS, 0, TINY_TENSORS);
    f = m.file[TINY_WEIGHTS];
    memset(f.p + f.n - 2384, 0xFF, 2384);           /* all NaN: loads, runs, and cannot be sampled from */
    c.result = QWEN3_OK;
    c.words = "";
    malformed_check(&m, &c, NULL);
    for (i = f.n - 2384; i < f.n; i += 2) memcpy(f.p + i, "\x7F\x7F", 2);   /* all the largest */
    malformed_check(&m, &c, NULL);
    tiny_free(&m);
}

/* Headers that are as large as they can be for what they say. */
static void test_malformed_many(void) {
    static const char *const many[] = {
        "\"\":{},", "\"\":0,", "\"a\":[],", "\"\":{\"dtype\":\"\",\"shape\":[],\"data_offsets\":[0,0]},", "\"\":\"\","
    };
    char err[512];
    tiny_model m;
    size_t i, k;
    tiny_make(&m, 0, 0);
    for (i = 0; i < sizeof many / sizeof *many; i++) {
        tiny_text header = {NULL, 0};
        tiny_append(&header, "{", 1);
        for (k = 0; k < 400000; k += strlen(many[i])) tiny_append(&header, many[i], strlen(many[i]));
        header.p[header.n - 1] = '}';
        tiny_remove(&m, TINY_WEIGHTS);
        m.file[TINY_WEIGHTS] = tiny_safetensors(header.p, header.n, 0);
        CHECK_MSG(malformed_load(&m, err) == QWEN3_ERR_FORMAT && strstr(err, "model.safetensors"), "%s: %s", many[i],
                  err);
        free(header.p);
    }
    tiny_free(&m);
}

/* Tokenizers that ask for as much memory as they can: many short tokens and merges, a large id, many added tokens. */
static void test_malformed_large_tokenizer(void) {
    enum { TOKENS = 20000, KINDS = 4 };
    char err[512];
    tiny_model m;
    tiny_text whole;
    int kind, i;
    tiny_make(&m, 0, 0);
    whole = m.file[TINY_TOKENIZER];
    for (kind = 0; kind < KINDS; kind++) {
        tiny_text *t = &m.file[TINY_TOKENIZER], extra = {NULL, 0};
        static const char *const from[KINDS] = {"\"vocab\":{", "[\"a\",\"b\"]", "\"vocab\":{", "\"added_tokens\":["};
        static const char *const want[KINDS] = {"ids up to 20259", "not there", "ids up to 50000", "ids up to 20259"};
        tiny_append(&extra, from[kind], strlen(from[kind]));
        for (i = 0; i < TOKENS; i++) {
            if (kind == 0)
                tiny_printf(&extra, "\"%c%c%c\":%d,", 'A' + i % 26, 'A' + i / 26 % 26, 'a' + i / 676, 260 + i);
            if (kind == 1) tiny_printf(&extra, ",\"a b\"");
            if (kind == 2) tiny_append(&extra, "          ", 10);
            if (kind == 3) tiny_printf(&extra, "{\"id\":%d,\"content\":\"<%d\"},", 260 + i, i);
        }
        if (kind == 1) tiny_printf(&extra, ",\"a c\"");
        if (kind == 2) tiny_printf(&extra, "\"far\":50000,");
        *t = malformed_replace(whole.p, whole.n, from[kind], extra.p);
        CHECK_MSG(malformed_load(&m, err) == QWEN3_ERR_FORMAT && strstr(err, want[kind]), "%d: %s", kind, err);
        free(t->p);
        free(extra.p);
    }
    m.file[TINY_TOKENIZER] = whole;
    tiny_free(&m);
}

/* ---- shards ------------------------------------------------------------------------------------------------- */
static void test_malformed_index(void) {
    static const malformed_case cases[] = {
        {NULL, "", BAD, "object"}, {NULL, "{}", BAD, "'weight_map' is missing"}, {NULL, "[]", BAD, "object"},
        {NULL, "{\"weight_map\":{}}", BAD, "names no file"},
        {NULL, "{\"weight_map\":[]}", BAD, "object"}, {NULL, "{\"weight_map\":\"x\"}", BAD, "object"},
        {NULL, "{\"weight_map\":{60000*{\"x\":}", BAD, "string"},
        {NULL, "{\"x\":{60000*[}", BAD, "nested too deeply"}, {NULL, "{\"weight_map\":{\"a\":{}}}", BAD, "string"},
        {NULL, "{\"weight_map\":{\"a\":7}}", BAD, "string"},
        {NULL, "{\"weight_map\":{\"a\":\"part-1.safetensors\"},\"weight_map\":{}}", BAD, "weight_map appears twice"},
        {"part-1", "../part-1", BAD, "model.norm.weight|../part-1|plain file name"},
        {"part-1", "../../../../etc/passwd", BAD, "plain file name"},
        {"part-1", "/etc/passwd", BAD, "plain file name"}, {"part-1", "C:part-1", BAD, "plain file name"},
        {"part-1", "..\\\\part-1", BAD, "plain file name"},
        {"part-1", "a\\u002fb", BAD, "plain file name"}, {"part-1", "x\\u0000", BAD, "plain file name"},
        {"part-1.safetensors", "", BAD, "plain file name"},
        {"part-1.safetensors", "..", BAD, "plain file name"}, {"part-1", ".hidden", BAD, "plain file name"},
        {"part-1", "{201*x}", BAD, "plain file name"},
        {"part-1", "a//b", BAD, "plain file name"},
        {"\"metadata\":{\"total_size\":2384}", "\"metadata\":{60000*[}", BAD, "nested too deeply"},
        {"}}", "}}}", BAD, "after the end"}, {"}}", "}", BAD, "byte"}
    };
    static const malformed_case others[] = {    /* what is found in or missing from other files */
        {"part-1", "part-9", NONE, "part-9.safetensors|cannot open|index"},
        {"part-1", "model", NONE, "model.safetensors|cannot open"},
        {"model.norm.weight\":\"part-1", "model.norm.weight\":\"part-2", BAD,
         "part-2.safetensors|model.norm.weight|missing"},
        {"\"model.norm.weight\"", "\"model.norm\"", BAD, "part-1.safetensors|'model.norm'|missing"},
        {"\"weight_map\":{", "\"weight_map\":{\"x.weight\":\"part-2.safetensors\",", BAD,
         "part-2.safetensors|x.weight|missing"},
        {"\"weight_map\":{", "\"weight_map\":{\"{5000*x}\":\"part-2.safetensors\",", BAD,
         "part-2.safetensors|xxxx|missing"},
        {"\"weight_map\":{", "\"weight_map\":{\"x\":\"config.json\",", BAD, "config.json|not a safetensors file"},
        {"\"weight_map\":{", "\"weight_map\":{\"x\":\"model.safetensors.index.json\",", BAD,
         "index.json|not a safetensors file"},
        /* a tensor that the index does not name is there all the same */
        {"\"model.norm.weight\":\"part-1.safetensors\",", "", GOOD, ""}
    };
    tiny_model m;
    char err[512];
    size_t i;
    int k;
    tiny_make(&m, 1, 0);
    CHECK_MSG(malformed_load(&m, err) == QWEN3_OK, "%s", err);
    MALFORMED_TEXTS(&m, TINY_INDEX, cases);
    for (i = 0; i < sizeof others / sizeof *others; i++) {
        const tiny_text whole = m.file[TINY_INDEX];
        m.file[TINY_INDEX] = malformed_replace(whole.p, whole.n, others[i].from, others[i].to);
        malformed_check(&m, &others[i], NULL);
        free(m.file[TINY_INDEX].p);
        m.file[TINY_INDEX] = whole;
    }
    tiny_set_weights(&m, TINY_SHARD_2, 0, TINY_SPLIT);      /* the same tensors in both shards */
    CHECK_MSG(malformed_load(&m, err) == QWEN3_ERR_FORMAT && malformed_says(err, "part-|appears twice"), "%s", err);
    tiny_remove(&m, TINY_SHARD_2);
    CHECK_MSG(malformed_load(&m, err) == QWEN3_ERR_IO && malformed_says(err, "part-2.safetensors"), "%s", err);
    tiny_remove(&m, TINY_INDEX);
    /* more files than there may be */
    tiny_printf(&m.file[TINY_INDEX], "{\"weight_map\":{\"a\":\"part-1.safetensors\"");
    for (k = 0; k < 300; k++) tiny_printf(&m.file[TINY_INDEX], ",\"%d\":\"%d\"", k, k);
    tiny_printf(&m.file[TINY_INDEX], "}}");
    CHECK_MSG(malformed_load(&m, err) == QWEN3_ERR_UNSUPPORTED && strstr(err, "256 weight files"), "%s", err);
    tiny_remove(&m, TINY_INDEX);
    CHECK_MSG(malformed_load(&m, err) == QWEN3_ERR_IO && malformed_says(err, "model.safetensors|index.json"), "%s",
              err);
    tiny_free(&m);
}

/* ---- the tokenizer's files ------------------------------------------------------------------------------------ */
static void test_malformed_tokenizer(void) {
    static const malformed_case cases[] = {
        {NULL, "", BAD, "object"}, {NULL, "{}", BAD, "no pre_tokenizer"}, {NULL, "[]", BAD, "object"},
        {NULL, "{\"pre_tokenizer\":null}", NOT, "pre_tokenizer"},
        {NULL, "{\"x\":{60000*[}", BAD, "nested too deeply"}, {NULL, "{\"added_tokens\":{60000*[}", BAD, "object"},
        {NULL, "{\"model\":{60000*{\"vocab\":}", BAD, "nested too deeply"},
        {NULL, "{\"model\":{\"vocab\":{60000*[}", BAD, "nested too deeply"},
        {NULL, "{\"pre_tokenizer\":{60000*[}", BAD, "object"},
        {NULL, "{\"normalizer\":{\"normalizers\":{60000*[}", BAD, "nested too deeply"},
        {"\"NFC\"", "\"NFKC\"", NOT, "normalizer|NFKC"}, {"{\"type\":\"NFC\"}", "[]", BAD, "object"},
        {"\"Split\"", "\"Digits\"", NOT, "pre_tokenizer|Digits"}, {"\"Isolated\"", "\"Removed\"", NOT, "behavior"},
        {"\\\\p{N}|", "\\\\p{N}+|", NOT, "pattern"},
        {"{\"Regex\":", "{\"String\":", NOT, "pattern"}, {"\"invert\":false", "\"invert\":true", NOT, "invert"},
        {"\"use_regex\":false", "\"use_regex\":true", NOT, "use_regex"},
        {"\"pretokenizers\":[", "\"pretokenizers\":[{5000*[],}", BAD, "object"},
        {"\"pretokenizers\":[", "\"pretokenizers\":{},\"x\":[", BAD, "array"},
        {"\"BPE\"", "\"Unigram\"", NOT, "Unigram"}, {"\"BPE\"", "[]", NOT, "model: type is []"},
        {"\"dropout\":null", "\"dropout\":0.5", NOT, "dropout"},
        {"\"byte_fallback\":false", "\"byte_fallback\":true", NOT, "byte_fallback"},
        {"\"ignore_merges\":false", "\"ignore_merges\":0", NOT, "ignore_merges"},
        {"\"type\":\"BPE\",", "", BAD, "lacks its type"}, {"\"vocab\":{", "\"vocab\":null,\"v\":{", BAD, "object"},
        {"\"vocab\":{", "\"vocab\":{\"new\":-1,", BAD, "\"new\"|-1|out of range"},
        {"\"vocab\":{", "\"vocab\":{\"new\":16777216,", BAD, "\"new\"|16777216|out of range"},
        {"\"vocab\":{", "\"vocab\":{\"new\":9223372036854775808,", BAD, "whole number"},
        {"\"vocab\":{", "\"vocab\":{\"new\":1e300,", BAD, "whole number"},
        {"\"vocab\":{", "\"vocab\":{\"new\":null,", BAD, "number"},
        {"\"vocab\":{", "\"vocab\":{\"new\":[1],", BAD, "number"},
        {"\"vocab\":{", "\"vocab\":{\"\":260,", BAD, "260 is empty"},
        {"\"vocab\":{", "\"vocab\":{\"A\":260,", BAD, "\"A\"|twice"},
        {"\"vocab\":{", "\"vocab\":{\"new\":5,", BAD, "id 5 of another"},
        {"\"vocab\":{", "\"vocab\":{\"new\":257,", BAD, "id 257 of another"},
        {"\"vocab\":{", "\"vocab\":{\"new\":264,", BAD, "ids up to 264|264 rows"},
        {"\"vocab\":{", "\"vocab\":{\"{200000*x}\":260,", GOOD, ""},
        {"\"vocab\":{", "\"vocab\":{\"{40000*\\u0000}\":260,", GOOD, ""},
        {"\"vocab\":{", "\"vocab\":{\"{50000*\\ud800}\":260,", GOOD, ""},
        {"\"!\":33,", "", BAD, "no token for the byte 0x21"},
        {"\"!\":33,", "\"!!\":33,", BAD, "no token for the byte 0x21"},
        {"[[\"a\",\"b\"]]", "[[\"a\",\"\"]]", BAD, "merge 0|not there"},
        {"[[\"a\",\"b\"]]", "[[\"a\",\"c\"]]", BAD, "merge 0|\"a\" \"c\"|not there"},
        {"[[\"a\",\"b\"]]", "[[\"a\",\"b\",\"c\"]]", BAD, "merge 0|two parts"},
        {"[[\"a\",\"b\"]]", "[[\"a\"]]", BAD, "merge 0|two parts"},
        {"[[\"a\",\"b\"]]", "[[]]", BAD, "merge 0|two parts"}, {"[[\"a\",\"b\"]]", "[[1,2]]", BAD, "string"},
        {"[[\"a\",\"b\"]]", "[\"a b\",7]", BAD, "array"},
        {"[[\"a\",\"b\"]]", "[\"a b c\"]", BAD, "two parts"}, {"[[\"a\",\"b\"]]", "[\"ab\"]", BAD, "two parts"},
        {"[[\"a\",\"b\"]]", "[\" b\"]", BAD, "two parts"}, {"[[\"a\",\"b\"]]", "[{60000*[}", BAD, "deeply"},
        {"[[\"a\",\"b\"]]", "[{30000*\"a b\",}\"a b\"]", GOOD, ""},
        {"[[\"a\",\"b\"]]", "[[\"{100000*a}\",\"b\"]]", BAD, "merge 0|aaaa|not there"},
        {"[[\"a\",\"b\"]]", "{}", BAD, "array"},
        {"\"id\":257", "\"id\":-1", BAD, "<|im_end|>|-1|out of range"},
        {"\"id\":257", "\"id\":9007199254740992", BAD, "<|im_end|>|out of range"},
        {"\"id\":257", "\"id\":1.5", BAD, "whole number"},
        {"\"id\":257", "\"id\":258", BAD, "<|im_start|>|id 258 of another"},
        {"\"id\":257,", "", BAD, "<|im_end|>|-1|out of range"}, {"\"id\":257", "\"id\":65", BAD, "id 65 of another"},
        {"\"content\":\"<|im_end|>\"", "\"content\":\"\"", BAD, "257 is empty"},
        {"\"content\":\"<|im_end|>\"", "\"content\":\"<|im_start|>\"", BAD, "<|im_start|>|twice"},
        {"\"content\":\"<|im_end|>\"", "\"content\":\"{1025*x}\"", NOT, "xxxx|too long"},
        {"\"content\":\"<|im_end|>\"", "\"content\":[]", BAD, "string"},
        {"\"content\":\"<|im_end|>\"", "\"content\":\"\\u001b]0;x\\u0007\",\"lstrip\":true", NOT, "?]0;x?"},
        {"\"lstrip\":false", "\"lstrip\":true", NOT, "<|im_end|>|lstrip"},
        {"\"special\":true", "\"special\":1", BAD, "true or false"},
        {"\"added_tokens\":[", "\"added_tokens\":[7,", BAD, "object"},
        {"\"added_tokens\":[", "\"added_tokens\":7,\"x\":[", BAD, "array"},
        {"\"normalized\":false", "\"normalized\":true", GOOD, ""},
        {"\"content\":\"<|im_end|>\",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false",
         "\"content\":\"e\xCC\x81\",\"normalized\":true", NOT, "normalised"},
        {"\"added_tokens\"", "\"normalizer\":null,\"added_tokens\"", BAD, "normalizer is there twice"},
        {"\"version\":\"1.0\"", "\"version\":tru", BAD, "value"},
        {"\"version\":\"1.0\"", "\"version\":{200000* }1", GOOD, ""},
        {"\"id\":259", "\"id\":1500", BAD, "<think>|1500"}
    };
    tiny_model m;
    size_t i;
    tiny_make(&m, 0, 0);
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        const tiny_text whole = m.file[TINY_TOKENIZER];
        m.file[TINY_TOKENIZER] = malformed_replace(whole.p, whole.n, cases[i].from, cases[i].to);
        malformed_check(&m, &cases[i], strstr(cases[i].words, "ids up") ? NULL : "tokenizer.json");
        free(m.file[TINY_TOKENIZER].p);
        m.file[TINY_TOKENIZER] = whole;
    }
    tiny_free(&m);
}

static void test_malformed_vocab(void) {
    static const malformed_case vocab[] = {
        {NULL, "", BAD, "object"}, {NULL, "[]", BAD, "object"}, {NULL, "{}", BAD, "merge 0|not there"},
        {NULL, "{60000*{\"x\":}", BAD, "number"}, {"{\"", "{\"A\":300,\"", BAD, "\"A\"|twice"},
        {"{\"", "{\"x\":-1,\"", BAD, "-1|out of range"}, {"{\"", "{\"x\":16777215,\"", BAD, "16777215|out of range"},
        {"{\"", "{\"\":300,\"", BAD, "empty"}, {"{\"", "{\"new\":5,\"", BAD, "id 5 of another"},
        {"256}", "256}}", BAD, "after the end"}
    };
    static const malformed_case merges[] = {
        {NULL, "", GOOD, ""}, {NULL, "#version: 0.2", GOOD, ""}, {NULL, "a b", GOOD, ""},
        {NULL, "a b\r\n\r\n", GOOD, ""}, {NULL, "a", BAD, "merge 0|two parts"}, {NULL, "a b c", BAD, "two parts"},
        {NULL, "a  b", BAD, "two parts"},
        {NULL, " a b", BAD, "two parts"}, {NULL, "a b\na z\n", BAD, "merge 1|\"a\" \"z\"|not there"},
        {NULL, "a \x1B[2J", BAD, "?[2J|not there"}, {NULL, "{200000*x}", BAD, "two parts"},
        {NULL, "{100000*\n}", GOOD, ""},
        {NULL, "{50000*a b\n}", GOOD, ""}, {NULL, "\xFF\xFE \xFF", BAD, "not there"}
    };
    static const malformed_case config[] = {
        {NULL, "", BAD, "unexpected end"}, {NULL, "{}", GOOD, ""}, {NULL, "7", BAD, "object"},
        {NULL, "{\"added_tokens_decoder\":7}", BAD, "array"}, {"\"257\"", "\"x\"", BAD, "<|im_end|>|out of range"},
        {"\"257\"", "\"99999999999999999999\"", BAD, "out of range"}, {"\"257\"", "\"-1\"", BAD, "out of range"},
        {"\"257\"", "\"\"", BAD, "out of range"}, {"\"257\"", "\"3\"", BAD, "id 3 of another"},
        {"\"257\"", "\"258\"", BAD, "id 258 of another"},
        {"{\"content\":\"<|im_end|>\"", "{\"rstrip\":true,\"content\":\"<|im_end|>\"", NOT, "<|im_end|>|rstrip"},
        {"\"{{ enable", "\"{{ \\x enable", BAD, "escape"}, {"}}\"}", "", BAD, "does not end"},
        {"{", "{\"chat_template\":{},", GOOD, ""}, {"{", "{\"chat_template\":[{\"name\":7}],", GOOD, ""},
        {"{\"257\":", "{\"257\":{60000*[}", BAD, "nested too deeply"}
    };
    tiny_model m;
    char err[512];
    size_t i;
    tiny_make(&m, 0, 1);
    CHECK_MSG(malformed_load(&m, err) == QWEN3_OK, "%s", err);
    for (i = 0; i < sizeof vocab / sizeof *vocab; i++) {
        const tiny_text whole = m.file[TINY_VOCAB];
        m.file[TINY_VOCAB] = malformed_replace(whole.p, whole.n, vocab[i].from, vocab[i].to);
        malformed_check(&m, &vocab[i], strstr(vocab[i].words, "merge") ? "merges.txt" : "vocab.json");
        free(m.file[TINY_VOCAB].p);
        m.file[TINY_VOCAB] = whole;
    }
    MALFORMED_TEXTS(&m, TINY_MERGES, merges);
    MALFORMED_TEXTS(&m, TINY_TOKENIZER_CONFIG, config);
    tiny_remove(&m, TINY_MERGES);
    CHECK_MSG(malformed_load(&m, err) == QWEN3_ERR_IO && malformed_says(err, "merges.txt|missing"), "%s", err);
    tiny_free(&m);
}

/* ---- every cut and every flipped bit ---------------------------------------------------------------------------- */
/* Each file of the model cut off after every byte. */
static void malformed_cut(int sharded, int vocab_files) {
    tiny_model m;
    char err[512];
    size_t cut;
    int i;
    tiny_make(&m, sharded, vocab_files);
    for (i = 0; i < TINY_FILES; i++) {
        const tiny_text whole = m.file[i];
        for (cut = 0; cut < whole.n; cut++) {
            qwen3_result r;
            m.file[i].n = cut;
            r = malformed_load(&m, err);
            if (i == TINY_MERGES && r == QWEN3_OK) continue;            /* lines that are whole are fine */
            CHECK_MSG(r == QWEN3_ERR_FORMAT && strstr(err, tiny_names[i]), "%s cut to %lu of %lu bytes: %s '%s'",
                      tiny_names[i], (unsigned long)cut, (unsigned long)whole.n, qwen3_result_string(r), err);
        }
        m.file[i] = whole;
    }
    tiny_free(&m);
}

static void test_malformed_cut(void) {
    malformed_cut(0, 0);
    malformed_cut(1, 1);
}

/* Single bits: all of configuration, header and index, and some of the vocabulary and of the data. */
static void test_malformed_flips(void) {
    tiny_model m;
    char err[512];
    size_t at, end;
    int i, form, loaded = 0, tried = 0;
    for (form = 0; form < 2; form++) {
        tiny_make(&m, form, form);
        for (i = 0; i < TINY_FILES; i++) {
            const size_t n = m.file[i].n, step = i == TINY_VOCAB || i == TINY_TOKENIZER ? 37 : 3;
            end = i == TINY_WEIGHTS || i == TINY_SHARD_1 || i == TINY_SHARD_2 ?
                8 + (n > 8 ? ref_u32((const unsigned char *)m.file[i].p) : 0) : n;
            for (at = 0; at < 8 * n; at += at < 8 * end ? step : 509) {
                qwen3_result r;
                m.file[i].p[at / 8] = (char)(m.file[i].p[at / 8] ^ 1 << at % 8);
                r = malformed_load(&m, err);
                m.file[i].p[at / 8] = (char)(m.file[i].p[at / 8] ^ 1 << at % 8);
                CHECK_MSG(r == QWEN3_OK || r == QWEN3_ERR_FORMAT || r == QWEN3_ERR_UNSUPPORTED || r == QWEN3_ERR_IO,
                          "%s, bit %lu: %s '%s'", tiny_names[i], (unsigned long)at, qwen3_result_string(r), err);
                loaded += r == QWEN3_OK;
                tried++;
            }
        }
        tiny_free(&m);
    }
    CHECK_MSG(loaded > 100 && loaded < tried / 2, "%d of %d models with a flipped bit load", loaded, tried);
}

/* ---- saved states ------------------------------------------------------------------------------------------------ */
static void malformed_state_seal(unsigned char *state, size_t size) {   /* a checksum that is right */
    qwen3i_state_header h;
    if (size < sizeof h) return;
    memcpy(&h, state, sizeof h);
    h.checksum = qwen3i_hash(h.fingerprint, state + QWEN3I_CHECKSUM_FROM, size - QWEN3I_CHECKSUM_FROM);
    memcpy(state, &h, sizeof h);
}

static void test_malformed_state(void) {
    enum { F = QWEN3_ERR_FORMAT, X = QWEN3_ERR_MISMATCH, FULL = QWEN3_ERR_CONTEXT_FULL };
    static const struct { size_t at; uint32_t value; int result; const char *words; } cases[] = {
        {0, 0, F, "not a saved state"}, {4, 0x31455333, F, "another version"}, {8, 1, X, "another model"},
        {12, 7, X, "another model"}, {16, 0, F, "of 0"}, {16, 1, F, "bytes"},
        {20, 0x80000000u, F, "bytes"}, {32, 1, F, "damaged"}, {36, 1, F, "damaged"}, {32, 0xFFFFFFF0u, F, "damaged"},
        {40, 1, X, "KV type"}, {40, 0, X, "KV type"}, {40, 0xFFFFFFFFu, X, "KV type"},
        {44, 0, X, "another model"}, {44, 0xFFFFFFFFu, X, "another model"},
        {48, 0, X, "another model"}, {48, 0x7FFFFFFF, X, "another model"}, {52, 0, X, "another model"},
        {52, 0xFFFFFFFFu, X, "another model"}, {56, 0, F, "damaged"}, {56, 4, F, "damaged"},
        {56, 17, FULL, "17 tokens"}, {56, 0x80000000u, FULL, "2147483648 tokens"},
        {56, 0xFFFFFFFFu, FULL, "4294967295 tokens"}, {60, 0, F, "damaged"}, {60, 2, F, "damaged"},
        {60, 0xFFFFFFFFu, F, "damaged"},
        {64, 0x40800000, X, "yarn_factor"}, {64, 0x7FC00000, X, "yarn_factor"}, {68, 1, F, "damaged"}, {68, 2, F, "damaged"},
        {72, 7, F, "damaged"}, {72, 0xFFFFFFFFu, F, "damaged"}, {76, 1, F, "damaged"},
        {80, 0xFFFFFFFFu, F, "token 0 is -1"}, {84, 264, F, "token 1 is 264"}, {88, 0x7FFFFFFF, F, "token 2"}
    };
    const qwen3_token tokens[5] = {10, 20, 30, 40, 50};
    char err[512];
    tiny_model m;
    qwen3_file files[TINY_FILES];
    qwen3_load_desc d;
    qwen3_model *model = NULL;
    qwen3_ctx *ctx;
    unsigned char *state, *copy;
    float before[264];
    size_t size, i;
    tiny_make(&m, 0, 0);
    memset(&d, 0, sizeof d);
    d.n_files = tiny_list(&m, files);
    d.files = files;
    if (!CHECK_MSG(qwen3_load(&model, &d, err, sizeof err) == QWEN3_OK, "%s", err)) { tiny_free(&m); return; }
    ctx = ctx_open(model, 16, 1, 0, QWEN3_KV_F16);
    CHECK_OK(ctx, eval(ctx, 0, tokens, 5, NULL));
    size = (size_t)state_size(ctx, 0);
    state = (unsigned char *)malloc(size);
    copy = (unsigned char *)malloc(size);
    CHECK_OK(ctx, state_save(ctx, 0, state, size, NULL));
    CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens + 1, 3, 0));
    memcpy(before, qwen3_logits(ctx, 0), sizeof before);
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        qwen3_result r;
        memcpy(copy, state, size);
        memcpy(copy + cases[i].at, &cases[i].value, 4);
        malformed_state_seal(copy, size);
        r = state_load(ctx, 0, copy, size);
        CHECK_MSG((int)r == cases[i].result && strstr(qwen3_ctx_error(ctx), cases[i].words),
                  "byte %lu is %08x: %s '%s'", (unsigned long)cases[i].at, (unsigned)cases[i].value,
                  qwen3_result_string(r), qwen3_ctx_error(ctx));
        CHECK(seq_len(ctx, 0) == 3 && same_logits(ctx, 0, before, 264));
    }
    for (i = 0; i < size; i++) {                        /* cut, and said to be so */
        unsigned char *cut = (unsigned char *)malloc(i ? i : 1);
        uint64_t total = i;
        memcpy(cut, state, i);
        if (i >= 24) memcpy(cut + 16, &total, 8);
        malformed_state_seal(cut, i);
        CHECK(state_load(ctx, 0, cut, i) == QWEN3_ERR_FORMAT && seq_len(ctx, 0) == 3);
        free(cut);
    }
    CHECK(state_load(ctx, 0, NULL, 100) == QWEN3_ERR_ARG && same_logits(ctx, 0, before, 264));
    memcpy(copy, state, size);
    for (i = 80 + 5 * 4; i < size; i++) copy[i] = 0xFF; /* well formed, but all logits, keys and values are NaN */
    malformed_state_seal(copy, size);
    CHECK_OK(ctx, state_load(ctx, 0, copy, size));
    CHECK(qwen3_next(ctx, 0, NULL, (qwen3_token *)(void *)copy) == QWEN3_ERR_ARG &&
          strstr(qwen3_ctx_error(ctx), "not numbers"));
    CHECK_OK(ctx, eval(ctx, 0, tokens, 5, NULL));
    CHECK_OK(ctx, qwen3_sync(ctx, 0, tokens + 1, 3, 0));   /* and nothing of it stays */
    CHECK(same_logits(ctx, 0, before, 264));
    free(state);
    free(copy);
    qwen3_ctx_free(ctx);
    qwen3_free(model);
    tiny_free(&m);
}

/* ---- deep nesting, on a small stack ------------------------------------------------------------------------------ */
#if !defined(_WIN32) && !defined(QWEN3_NO_THREADS)
static void *malformed_deep(void *arg) {
    static const char *const opens[] = {"[", "{\"a\":", "[{\"a\":", "{\"a\":[", "[[],", "{\"\":{},\"a\":"};
    tiny_model m;
    char err[512];
    size_t i, k;
    int which;
    (void)arg;
    for (which = 0; which < TINY_FILES; which++) for (i = 0; i < sizeof opens / sizeof *opens; i++) {
        tiny_make(&m, which == TINY_INDEX, which >= TINY_VOCAB);
        if (m.file[which].p && which != TINY_WEIGHTS && which != TINY_MERGES) {
            tiny_remove(&m, which);
            tiny_printf(&m.file[which], "{\"deep\":");
            for (k = 0; k < 200000; k += strlen(opens[i])) tiny_append(&m.file[which], opens[i], strlen(opens[i]));
            CHECK_MSG(malformed_load(&m, err) == QWEN3_ERR_FORMAT && strstr(err, tiny_names[which]), "%s: %s",
                      tiny_names[which], err);
        }
        tiny_free(&m);
    }
    return NULL;
}

static void test_malformed_deep(void) {
    pthread_attr_t attr;
    pthread_t id;
    pthread_attr_init(&attr);
    CHECK(pthread_attr_setstacksize(&attr, 256 * 1024) == 0);
    if (CHECK(pthread_create(&id, &attr, malformed_deep, NULL) == 0)) pthread_join(id, NULL);
    pthread_attr_destroy(&attr);
}
#endif

/* ---- directories in which names are not what they should be ------------------------------------------------------ */
#if !defined(_WIN32) && !defined(QWEN3_NO_STDIO)
static void malformed_write(const char *dir, const char *name, const tiny_text *text) {
    char path[600];
    FILE *f;
    snprintf(path, sizeof path, "%s/%s", dir, name);
    f = fopen(path, "wb");
    if (!CHECK_MSG(f != NULL, "cannot write %s", path)) return;
    CHECK(fwrite(text->p, 1, text->n, f) == text->n);
    fclose(f);
}

static qwen3_result malformed_load_dir(const char *dir, int flags, char err[512]) {
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    qwen3_result r;
    memset(&d, 0, sizeof d);
    d.path = dir;
    d.flags = flags;
    r = qwen3_load(&m, &d, err, 512);
    qwen3_free(m);
    return r;
}

/* Each file in turn as a directory, a pipe and a link to nothing: an error, never a wait or a silent omission. */
int symlink(const char *target, const char *path);   /* POSIX, which -std=c99 hides */

static void test_malformed_directory(void) {
    char dir[64], path[600], err[512];
    tiny_model m;
    int i, kind;
    snprintf(dir, sizeof dir, "/tmp/qwen3-test-%ld", (long)getpid());
    if (!CHECK_MSG(mkdir(dir, 0700) == 0, "cannot make %s", dir)) return;
    tiny_make(&m, 0, 0);
    for (i = 0; i < TINY_FILES; i++) if (m.file[i].p) malformed_write(dir, tiny_names[i], &m.file[i]);
    CHECK_MSG(malformed_load_dir(dir, 0, err) == QWEN3_OK, "%s", err);
    for (i = 0; i <= TINY_TOKENIZER; i++) for (kind = 0; kind < 2; kind++) {
        snprintf(path, sizeof path, "%s/%s", dir, tiny_names[i]);
        unlink(path);
        if (!CHECK((kind ? mkfifo(path, 0600) : mkdir(path, 0700)) == 0)) continue;
        CHECK_MSG(malformed_load_dir(dir, 0, err) == QWEN3_ERR_IO && strstr(err, tiny_names[i]), "%s: %s",
                  tiny_names[i], err);
        if (kind) unlink(path); else rmdir(path);
        malformed_write(dir, tiny_names[i], &m.file[i]);
    }
    CHECK_MSG(malformed_load_dir(dir, QWEN3_LOAD_NO_MMAP, err) == QWEN3_OK, "%s", err);
    snprintf(path, sizeof path, "%s/%s", dir, tiny_names[TINY_CONFIG]);     /* the system's reason: a link to itself */
    unlink(path);
    if (CHECK(symlink(path, path) == 0))
        CHECK_MSG(malformed_load_dir(dir, 0, err) == QWEN3_ERR_IO && strstr(err, strerror(ELOOP)), "%s", err);
    unlink(path);
    malformed_write(dir, tiny_names[TINY_CONFIG], &m.file[TINY_CONFIG]);
    /* a file instead of a directory */
    CHECK(malformed_load_dir(path, 0, err) == QWEN3_ERR_IO && strstr(err, "the directory of a Qwen3 model"));
    for (i = 0; i <= TINY_TOKENIZER; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, tiny_names[i]);
        unlink(path);
    }
    CHECK(rmdir(dir) == 0);
    tiny_free(&m);
}

/* Files of 5 GB of nothing: refused for what is wrong with them, or, by a host of 32 bits, for their size. */
static void test_malformed_large_file(void) {
    static const int which[] = {TINY_CONFIG, TINY_WEIGHTS};
  #ifdef QWEN3_NO_MMAP
    const int maps = 0;                 /* 5 GB are then to be read into memory: the test's has no room for them */
  #else
    const int maps = sizeof(void *) > 4;
  #endif
    char dir[64], path[600], command[700], err[512] = "";
    tiny_model m;
    int i;
    snprintf(dir, sizeof dir, "/tmp/qwen3-test-%ld", (long)getpid());
    if (!CHECK_MSG(mkdir(dir, 0700) == 0, "cannot make %s", dir)) return;
    tiny_make(&m, 0, 0);
    for (i = 0; i < 2; i++) {
        qwen3_result r;
        malformed_write(dir, tiny_names[TINY_CONFIG], &m.file[TINY_CONFIG]);
        malformed_write(dir, tiny_names[TINY_WEIGHTS], &m.file[TINY_WEIGHTS]);
        snprintf(path, sizeof path, "%s/%s", dir, tiny_names[which[i]]);
        snprintf(command, sizeof command, "truncate -s 5G %s", path);
        if (system(command) != 0) continue;
        if (sizeof(void *) > 4 && i == 0) { unlink(path); continue; }  /* 5 GB of JSON might even fit */
        r = malformed_load_dir(dir, 0, err);
        if (maps) CHECK_MSG(r == QWEN3_ERR_FORMAT, "%s: %s", qwen3_result_string(r), err);
        else CHECK_MSG((r == QWEN3_ERR_IO || r == QWEN3_ERR_MEMORY) && strstr(err, tiny_names[which[i]]), "%s: %s",
                       qwen3_result_string(r), err);
        unlink(path);
    }
    for (i = 0; i < 2; i++) {
        snprintf(path, sizeof path, "%s/%s", dir, tiny_names[which[i]]);
        unlink(path);
    }
    CHECK(rmdir(dir) == 0);
    tiny_free(&m);
}

/* A weight file that loses its end while it is read: seen, because it is not mapped. */
static const char *malformed_shrinking;
static int malformed_shrink(float done, void *user) {
    FILE *f = *(int *)user ? NULL : fopen(malformed_shrinking, "wb");
    (void)done;
    if (f) fclose(f);
    *(int *)user = 1;
    return 0;
}

static void test_malformed_shrinking_file(void) {
    char dir[64], path[600], err[512] = "";
    tiny_model m;
    qwen3_load_desc d;
    qwen3_model *model = NULL;
    FILE *f;
    int shrunk = 0;
    snprintf(dir, sizeof dir, "/tmp/qwen3-test-%ld", (long)getpid());
    if (!CHECK_MSG(mkdir(dir, 0700) == 0, "cannot make %s", dir)) return;
    tiny_make(&m, 0, 0);
    malformed_write(dir, "config.json", &m.file[TINY_CONFIG]);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    f = fopen(path, "wb");
    if (CHECK(f && fseek(f, 20 << 20, SEEK_SET) == 0 && fputc(0, f) == 0 && fclose(f) == 0)) {
        memset(&d, 0, sizeof d);
        d.path = dir;
        d.flags = QWEN3_LOAD_NO_MMAP;
        d.progress = malformed_shrink;
        d.progress_user = &shrunk;
        malformed_shrinking = path;
        CHECK_MSG(qwen3_load(&model, &d, err, sizeof err) == QWEN3_ERR_IO && shrunk &&
                  malformed_says(err, "model.safetensors|cannot read"), "%s", err);
        qwen3_free(model);
    }
    unlink(path);
    snprintf(path, sizeof path, "%s/config.json", dir);
    unlink(path);
    CHECK(rmdir(dir) == 0);
    tiny_free(&m);
}
#endif

/* Descriptors that are wrong, and what is said along the way. */
static void malformed_log(qwen3_log_level level, const char *message, void *user) {
    if (level == QWEN3_LOG_INFO && strstr(message, "loaded")) ++*(int *)user;
}

static void test_malformed_descriptor(void) {
    qwen3_backend other = *qwen3i_cpu_backend();
    qwen3_file files[TINY_FILES];
    qwen3_load_desc d;
    qwen3_model *model = NULL;
    tiny_model m;
    char err[512] = "";
    int lines = 0;
    tiny_make(&m, 0, 0);
    memset(&d, 0, sizeof d);
    d.n_files = tiny_list(&m, files);
    d.files = files;
    d.logger.log = malformed_log;
    d.logger.user = &lines;
    CHECK_MSG(qwen3_load(&model, &d, err, sizeof err) == QWEN3_OK && lines == 1, "%d lines, '%s'", lines, err);
    qwen3_free(model);
    other.version++;
    d.backend = &other;
    CHECK_MSG(qwen3_load(&model, &d, err, sizeof err) == QWEN3_ERR_ARG && !model && strstr(err, "version"), "%s", err);
    d.backend = NULL;
    err[8] = 'x';
    tiny_set(&m, TINY_CONFIG, "{}", 2);         /* a message is cut off where the buffer ends */
    d.n_files = tiny_list(&m, files);
    CHECK(qwen3_load(&model, &d, err, 8) == QWEN3_ERR_FORMAT && strcmp(err, "config.") == 0 && err[8] == 'x');
    CHECK(qwen3_load(&model, &d, NULL, 100) == QWEN3_ERR_FORMAT && qwen3_load(&model, &d, err, 0) == QWEN3_ERR_FORMAT);
    CHECK(qwen3_get_info(NULL).n_layer == 0);
    tiny_free(&m);
}

/* How many there were, and that none of it took too much. */
static void test_malformed_summary(void) {
    if (test_verbose)
        printf("      %d malformed models; memory at most %.2f x their files + %d KB\n", malformed_count,
               malformed_factor, (int)(MALFORMED_FIXED / 1024));
}

static void suite_malformed(void) {
    RUN(test_malformed_config);
    RUN(test_malformed_generation);
    RUN(test_malformed_safetensors);
    RUN(test_malformed_safetensors_bytes);
    RUN(test_malformed_many);
    RUN(test_malformed_large_tokenizer);
    RUN(test_malformed_index);
    RUN(test_malformed_tokenizer);
    RUN(test_malformed_vocab);
    RUN(test_malformed_cut);
    RUN(test_malformed_flips);
    RUN(test_malformed_state);
#if !defined(_WIN32) && !defined(QWEN3_NO_THREADS)
    RUN(test_malformed_deep);
#endif
#if !defined(_WIN32) && !defined(QWEN3_NO_STDIO)
    RUN(test_malformed_directory);
    RUN(test_malformed_large_file);
    RUN(test_malformed_shrinking_file);
#endif
    RUN(test_malformed_descriptor);
    RUN(test_malformed_summary);
}
#undef BAD
#undef NOT
#undef NONE
#undef GOOD
#endif
