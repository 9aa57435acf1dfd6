/* Checkpoints as people make them: what the files of transformers and its kin mean, and that what would change the
   result is computed or refused. Expected numbers and ids are those of transformers 5.24. */
#ifndef QWEN3_TESTS_CHECKPOINTS_H
#define QWEN3_TESTS_CHECKPOINTS_H

#define BAD  QWEN3_ERR_FORMAT
#define NOT  QWEN3_ERR_UNSUPPORTED
#define GOOD QWEN3_OK

/* ---- configuration ------------------------------------------------------------------------------------- */
/* Qwen3RotaryEmbedding's attention_scaling and inv_freq at 1, 30, 40 and 63 for each configuration */
static void test_checkpoints_rotation(void) {
    static const struct { const char *text; float scale, freqs[4]; } cases[] = {
        {"\"rope_theta\":1000000,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4,\"mscale\":1,\"mscale_all_dim\":1,"
         "\"original_max_position_embeddings\":32768}", 1, {0.805842221f, 0.00106436096f, 4.44569851e-05f, 3.10234441e-07f}},
        {"\"rope_theta\":1000000,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4,\"mscale\":0.707,"
         "\"mscale_all_dim\":1.5,\"original_max_position_embeddings\":32768}", 0.908991535f,
         {0.805842221f, 0.00106436096f, 4.44569851e-05f, 3.10234441e-07f}},
        {"\"rope_theta\":1000000,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4,\"mscale\":2,"
         "\"original_max_position_embeddings\":32768}", 1.13862944f,
         {0.805842221f, 0.00106436096f, 4.44569851e-05f, 3.10234441e-07f}},
        {"\"rope_theta\":1000000,\"rope_scaling\":{\"rope_type\":\"yarn\",\"factor\":4,\"mscale\":2,\"mscale_all_dim\":1,"
         "\"attention_factor\":1.5,\"original_max_position_embeddings\":32768}", 1.5f,
         {0.805842221f, 0.00106436096f, 4.44569851e-05f, 3.10234441e-07f}},
        {"\"rope_theta\":10000,\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":5000000}", 1,
         {0.785830021f, 0.000724198821f, 6.50344882e-05f, 2.54507967e-07f}},
        {"\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":5000000},\"rope_theta\":10000", 1,
         {0.785830021f, 0.000724198821f, 6.50344882e-05f, 2.54507967e-07f}},
        {"\"rope_theta\":1000000,\"original_max_position_embeddings\":8192,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2}",
         1.06931472f, {0.805842221f, 0.000951131107f, 8.89139701e-05f, 6.20468882e-07f}},
        {"\"rope_theta\":1000000,\"original_max_position_embeddings\":8192,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2,"
         "\"original_max_position_embeddings\":32768}", 1.06931472f,
         {0.805842221f, 0.000951131107f, 8.89139701e-05f, 6.20468882e-07f}},
        {"\"rope_theta\":1000000,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2,\"original_max_position_embeddings\":4096,"
         "\"truncate\":false}", 1.06931472f, {0.805842221f, 0.000770822749f, 8.89139701e-05f, 6.20468882e-07f}},
        {"\"rope_theta\":1000000,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":null,"
         "\"original_max_position_embeddings\":4096}", 1.23025851f,
         {0.805842221f, 0.000230988997f, 1.77827933e-05f, 1.24093773e-07f}},
        {"\"rope_theta\":1000000,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2,\"original_max_position_embeddings\":4096},"
         "\"rope_parameters\":{\"rope_type\":\"default\",\"rope_theta\":20000}", 1.06931472f,
         {0.805842221f, 0.000812739017f, 8.89139701e-05f, 6.20468882e-07f}},
        {"\"rope_theta\":1000000,\"rope_scaling\":null,\"rope_parameters\":{\"rope_type\":\"yarn\",\"factor\":3,"
         "\"beta_fast\":16,\"beta_slow\":2,\"rope_theta\":20000}", 1.10986123f,
         {0.856636167f, 0.00963589735f, 0.00186821818f, 1.9455947e-05f}},
        {"\"rope_theta\":1000000,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":1}", 1,
         {0.805842221f, 0.00153992651f, 0.00017782794f, 1.24093776e-06f}}
    };
    static const int index[4] = {1, 30, 40, 63};
    float freqs[64], scale;
    size_t i;
    int k;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        tiny_text t = {NULL, 0};
        qwen3_model m;
        qwen3i_blob b;
        memset(&m, 0, sizeof m);
        memset(&b, 0, sizeof b);
        tiny_printf(&t, "{\"architectures\":[\"Qwen3ForCausalLM\"],\"model_type\":\"qwen3\",\"num_hidden_layers\":1,"
                    "\"hidden_size\":64,\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":128,"
                    "\"intermediate_size\":6,\"vocab_size\":264,\"max_position_embeddings\":40960,"
                    "\"rms_norm_eps\":1e-6,\"tie_word_embeddings\":true,%s}", cases[i].text);
        b.data = (const unsigned char *)t.p;
        b.size = t.n;
        if (CHECK_MSG(qwen3i_parse_config(&m, "config.json", &b, NULL) == QWEN3_OK, "%s", cases[i].text)) {
            scale = qwen3i_rope_freqs(freqs, &m.config, 0);
            CHECK_MSG(cpu_ulps(scale, cases[i].scale) <= 1, "%s: %.9g", cases[i].text, (double)scale);
            for (k = 0; k < 4; k++)
                CHECK_MSG(cpu_ulps(freqs[index[k]], cases[i].freqs[k]) <= 2, "%s: [%d] %.9g", cases[i].text, index[k],
                          (double)freqs[index[k]]);
        }
        free(t.p);
    }
}

/* What a context's yarn_factor stretches: the positions that the model was trained with. */
static void test_checkpoints_yarn_by_desc(void) {
    static const struct { const char *positions; int original; } cases[] = {
        {"\"max_position_embeddings\":40960", 32768}, {"\"max_position_embeddings\":32768", 32768},
        {"\"max_position_embeddings\":262144", 262144}
    };
    size_t i;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        tiny_text t = malformed_replace(tiny_config, strlen(tiny_config), "\"max_position_embeddings\":32", cases[i].positions);
        qwen3_model m;
        qwen3i_blob b;
        memset(&m, 0, sizeof m);
        memset(&b, 0, sizeof b);
        b.data = (const unsigned char *)t.p;
        b.size = t.n;
        CHECK(qwen3i_parse_config(&m, "config.json", &b, NULL) == QWEN3_OK);
        CHECK_MSG(m.config.yarn_original_ctx == cases[i].original, "%d", m.config.yarn_original_ctx);
        CHECK(qwen3i_max_positions(&m.config, 4) == 4 * cases[i].original);
        free(t.p);
    }
}

/* Keys that mean what is computed anyway, and keys that do not. */
static void test_checkpoints_config(void) {
    static const malformed_case cases[] = {
        {"\"silu\"", "\"swish\"", GOOD, ""}, {"\"silu\"", "\"gelu\"", NOT, "'hidden_act'|silu"},
        {"\"use_sliding_window\":false", "\"use_sliding_window\":true,\"max_window_layers\":1", GOOD, ""},
        {"\"use_sliding_window\":false", "\"use_sliding_window\":true,\"max_window_layers\":0", NOT, "'use_sliding_window'"},
        {"\"use_sliding_window\":false", "\"use_sliding_window\":true", NOT, "'use_sliding_window'"},
        {"\"use_sliding_window\":false", "\"use_sliding_window\":true,\"sliding_window\":null", GOOD, ""},
        {"\"use_sliding_window\":false", "\"use_sliding_window\":true,\"sliding_window\":4096,\"max_window_layers\":0,"
         "\"layer_types\":[\"full_attention\"]", GOOD, ""},
        {"\"use_sliding_window\":false", "\"use_sliding_window\":true,\"layer_types\":[\"sliding_attention\"]", NOT,
         "'layer_types'"},
        {"\"use_sliding_window\":false", "\"use_sliding_window\":false,\"sliding_window\":4096,\"max_window_layers\":0",
         GOOD, ""},
        {"\"rope_scaling\":null", "\"is_causal\":true,\"partial_rotary_factor\":1.0", GOOD, ""},
        {"\"rope_scaling\":null", "\"is_causal\":false", NOT, "'is_causal'|causal"},
        {"\"rope_scaling\":null", "\"partial_rotary_factor\":0.5", NOT, "'partial_rotary_factor'"},
        {"\"rope_scaling\":null", "\"rope_parameters\":{\"partial_rotary_factor\":0.25}", NOT, "'partial_rotary_factor'"},
        {"\"rope_scaling\":null", "\"rope_parameters\":{\"rope_type\":\"llama3\"}", NOT, "'rope_type'"},
        {"\"rope_scaling\":null", "\"quantization\":{\"group_size\":64,\"bits\":4}", NOT, "'quantization'|quantised"},
        {"\"rope_scaling\":null", "\"original_max_position_embeddings\":0.5,\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2}",
         NOT, "'original_max_position_embeddings'"},
        {"\"rope_scaling\":null", "\"rope_scaling\":{\"type\":\"yarn\",\"factor\":2,\"mscale\":-1}", NOT, "'mscale'"},
        {"\"rope_scaling\":null", "\"x\":Infinity,\"y\":[-Infinity,NaN]", GOOD, ""},
        {"\"rope_theta\":10000", "\"rope_theta\":Infinity", BAD, "'rope_theta'|number"}
    };
    tiny_model m;
    tiny_make(&m, 0, 0);
    MALFORMED_TEXTS(&m, TINY_CONFIG, cases);
    tiny_free(&m);
}

static void malformed_edit(tiny_model *m, int which, const char *from, const char *to) {
    tiny_text edited = malformed_replace(m->file[which].p, m->file[which].n, from, to);
    free(m->file[which].p);
    m->file[which] = edited;
}

/* ---- tokenizer.json, safetensors and their index --------------------------------------------------------- */
static void test_checkpoints_tokenizer_settings(void) {
    static const malformed_case cases[] = {
        {"{\"type\":\"NFC\"}", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFC\"}]}", GOOD, ""},
        {"{\"type\":\"NFC\"}", "{\"type\":\"Sequence\",\"normalizers\":[]}", GOOD, ""},
        {"{\"type\":\"NFC\"}", "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"NFKC\"}]}", NOT, "normalizers|NFKC"},
        {"{\"type\":\"NFC\"}", "{\"type\":\"Sequence\",\"normalizers\":7}", BAD, "array"},
        {"\"type\":\"BPE\"", "\"type\":\"BPE\",\"dropout\":0.0", GOOD, ""},
        {"\"type\":\"BPE\"", "\"type\":\"BPE\",\"dropout\":0.1", NOT, "dropout"}
    };
    tiny_model m;
    tiny_make(&m, 0, 0);
    MALFORMED_TEXTS(&m, TINY_TOKENIZER, cases);
    tiny_free(&m);
}

/* A vocabulary that lists an added token, too, whichever comes first; the ids of the text after it. */
static void test_checkpoints_listed_twice(void) {
    static const char *const order[2] = {"added", "model"};
    char err[512];
    int i;
    for (i = 0; i < 2; i++) {
        tiny_text whole = tiny_tokenizer(), json;
        qwen3_model m;
        qwen3_token ids[4];
        json = malformed_replace(whole.p, whole.n, "\"ab\":256", "\"ab\":256,\"<|im_end|>\":257");
        if (i == 1) {                   /* added tokens behind the model, where they are not written */
            const char *a = strstr(json.p, "\"added_tokens\""), *b = strchr(a, ']') + 2;
            tiny_text moved = {NULL, 0};
            tiny_append(&moved, json.p, (size_t)(a - json.p));
            tiny_append(&moved, b, json.n - 1 - (size_t)(b - json.p));
            tiny_append(&moved, ",", 1);
            tiny_append(&moved, a, (size_t)(b - a) - 1);
            tiny_append(&moved, "}", 1);
            free(json.p);
            json = moved;
        }
        if (CHECK_MSG(tokenizer_open(&m, json.p, json.n, err) == QWEN3_OK, "%s first: %s", order[i], err)) {
            CHECK(qwen3_encode(&m, "a<|im_end|>", 11, QWEN3_PARSE_SPECIAL, ids, 4, NULL, 0) == 2);
            CHECK(ids[0] == 'a' && ids[1] == 257);
        }
        qwen3i_tokenizer_free(m.tokenizer);
        free(json.p);
        free(whole.p);
    }
}

static qwen3_token checkpoints_token_after_x(tiny_model *t, const char *text, char err[512]) {
    qwen3_file files[TINY_FILES];
    qwen3_load_desc d;
    qwen3_model *m = NULL;
    qwen3_token ids[32];
    int n;
    memset(&d, 0, sizeof d);
    d.n_files = tiny_list(t, files);
    d.files = files;
    if (qwen3_load(&m, &d, err, 512) != QWEN3_OK) return -2;
    n = qwen3_encode(m, text, strlen(text), QWEN3_PARSE_SPECIAL, ids, 32, NULL, 0);
    qwen3_free(m);
    return n == 2 ? ids[1] : -1;        /* -1: it is not one token */
}

/* Added tokens that the files beside the vocabulary tell; tokenizer.json goes first, then tokenizer_config.json. */
static void test_checkpoints_added_beside(void) {
    static const char config[] = "{\"added_tokens_decoder\":{\"260\":{\"content\":\"<tool_call>\",\"special\":false},"
                                 "\"258\":{\"content\":\"<other>\"},\"261\":{\"content\":\"<|im_end|>\"}}}";
    static const char added[] = "{\"<tool_call>\":260,\"<|x|>\":261,\"<|im_start|>\":258}";
    char err[512] = "";
    int vocab_files;
    for (vocab_files = 0; vocab_files < 2; vocab_files++) {
        tiny_model m;
        tiny_make(&m, 0, vocab_files);
        if (!vocab_files) tiny_set(&m, TINY_TOKENIZER_CONFIG, config, sizeof config - 1);
        else tiny_set(&m, TINY_TOKENIZER_CONFIG, "{}", 2);
        tiny_set(&m, TINY_ADDED_TOKENS, added, sizeof added - 1);
        CHECK_MSG(checkpoints_token_after_x(&m, "x<tool_call>", err) == 260, "%s", err);
        CHECK_MSG(checkpoints_token_after_x(&m, "x<|im_start|>", err) == 258, "%s", err);
        CHECK_MSG(checkpoints_token_after_x(&m, "x<|x|>", err) == (vocab_files ? 261 : -1), "%s", err);
        CHECK_MSG(checkpoints_token_after_x(&m, "x<other>", err) == -1, "%s", err);     /* 258 has a text already */
        CHECK_MSG(checkpoints_token_after_x(&m, "x<|im_end|>", err) == (vocab_files ? -1 : 257), "%s", err);
        tiny_free(&m);
    }
}

static void test_checkpoints_added_malformed(void) {
    static const malformed_case cases[] = {
        {NULL, "", BAD, "object"}, {NULL, "[]", BAD, "object"}, {NULL, "{\"a\":\"b\"}", BAD, "number"},
        {NULL, "{\"a\":-1}", BAD, "out of range"}, {NULL, "{\"a\":9007199254740992}", BAD, "out of range"},
        {NULL, "{\"<x>\":260}x", BAD, "after the end"}, {NULL, "{\"<x>\":260}", GOOD, ""}, {NULL, "{\"\":260}", BAD, "empty"}
    };
    tiny_model m;
    tiny_make(&m, 0, 0);
    tiny_set(&m, TINY_ADDED_TOKENS, "{}", 2);
    MALFORMED_TEXTS(&m, TINY_ADDED_TOKENS, cases);
    tiny_free(&m);
}

/* The most memory for its size: a line of four bytes is a merge of twelve. */
static void test_checkpoints_merges_twice(void) {
    const int n = (1 << 18) + 1;
    tiny_model m;
    char err[512];
    int i;
    tiny_make(&m, 0, 1);
    tiny_remove(&m, TINY_MERGES);
    for (i = 0; i < n; i++) tiny_append(&m.file[TINY_MERGES], "a b\n", 4);
    CHECK_MSG(malformed_load(&m, err) == QWEN3_OK, "%s", err);
    tiny_free(&m);
}

static void test_checkpoints_weights_settings(void) {
    static const malformed_case index[] = {
        {"\"weight_map\":{", "\"weight_map\":{\"lm_head.weight\":\"part-1.safetensors\",", GOOD, ""}
    };
    tiny_model m;
    tiny_make(&m, 1, 0);
    MALFORMED_TEXTS(&m, TINY_INDEX, index);
    tiny_free(&m);
}

static void pooling_warned(qwen3_log_level level, const char *message, void *user) {
    *(int *)user += level == QWEN3_LOG_WARN && strstr(message, "does not say that it was made for it");
}

/* What sentence-transformers would make of the hidden states is the last token's, or an error of qwen3_embed. A model
   without these files is warned of. */
static void test_checkpoints_pooling(void) {
    static const struct { int file; const char *text, *why; } cases[] = {
        {TINY_MODULES, "[{\"idx\":0,\"name\":\"0\",\"path\":\"\",\"type\":\"sentence_transformers.models.Transformer\"},"
         "{\"idx\":1,\"path\":\"1_Pooling\",\"type\":\"sentence_transformers.models.Pooling\"},"
         "{\"type\":\"sentence_transformers.models.Normalize\"}]", NULL},
        {TINY_MODULES, "[{\"type\":\"sentence_transformers.models.Dense\"}]", "modules.json: 'sentence_transformers.models.Dense'"},
        {TINY_POOLING, "{\"word_embedding_dimension\":4,\"pooling_mode_cls_token\":false,\"pooling_mode_mean_tokens\":false,"
         "\"pooling_mode_lasttoken\":true,\"include_prompt\":true}", NULL},
        {TINY_POOLING, "{\"pooling_mode_mean_tokens\":true,\"pooling_mode_lasttoken\":false}", "pooling_mode_"},
        {TINY_POOLING, "{\"pooling_mode_mean_tokens\":true}", "pooling_mode_mean_tokens"},
        {TINY_ADDED_TOKENS, "{}", NULL},
        {TINY_POOLING, "{\"pooling_mode\":\"lasttoken\"}", NULL}, {TINY_POOLING, "{\"pooling_mode\":\"mean\"}", "mean"}
    };
    static const malformed_case modules[] = {{NULL, "{}", BAD, "array"}, {NULL, "[{\"type\":7}]", BAD, "string"}, {NULL, "[]x", BAD, "end"}};
    static const malformed_case pooling[] = {{NULL, "[]", BAD, "object"}, {NULL, "{\"pooling_mode_max_tokens\":7}", BAD, "true or"}};
    size_t i;
    tiny_model t;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        qwen3_file files[TINY_FILES];
        qwen3_load_desc d;
        qwen3_ctx_desc cd;
        qwen3_model *m = NULL;
        qwen3_ctx *ctx = NULL;
        float vector[4];
        qwen3_result r;
        int warned = 0;
        tiny_make(&t, 0, 0);
        tiny_set(&t, cases[i].file, cases[i].text, strlen(cases[i].text));
        malformed_edit(&t, TINY_TOKENIZER, "<|im_start|>", "<|endoftext|>");
        memset(&d, 0, sizeof d);
        memset(&cd, 0, sizeof cd);
        d.n_files = tiny_list(&t, files);
        d.files = files;
        d.logger.log = pooling_warned;
        d.logger.user = &warned;
        cd.max_ctx = 16;
        cd.threads = 1;
        if (CHECK(qwen3_load(&m, &d, NULL, 0) == QWEN3_OK && qwen3_ctx_create(&ctx, m, &cd, NULL, 0) == QWEN3_OK)) {
            r = qwen3_embed(ctx, 0, NULL, "ab", vector);
            CHECK_MSG(r == (cases[i].why ? QWEN3_ERR_UNSUPPORTED : QWEN3_OK), "%s: %s", cases[i].text, qwen3_ctx_error(ctx));
            CHECK_MSG(!cases[i].why || strstr(qwen3_ctx_error(ctx), cases[i].why), "%s: %s", cases[i].text, qwen3_ctx_error(ctx));
            CHECK_MSG(warned == (cases[i].file == TINY_ADDED_TOKENS), "%s: %d warnings", cases[i].text, warned);
        }
        qwen3_ctx_free(ctx);
        qwen3_free(m);
        tiny_free(&t);
    }
    tiny_make(&t, 0, 0);
    tiny_set(&t, TINY_MODULES, "[]", 2);
    MALFORMED_TEXTS(&t, TINY_MODULES, modules);
    tiny_set(&t, TINY_POOLING, "{}", 2);
    MALFORMED_TEXTS(&t, TINY_POOLING, pooling);
    tiny_free(&t);
}

/* The tiny model with its tensors named otherwise, and with a head: 0 none, 1 a copy of the embedding, 2 another one. */
static void checkpoints_make(tiny_model *m, const char *prefix, int head, const char *config_from, const char *config_to) {
    tiny_text header = {NULL, 0}, renamed = {NULL, 0};
    size_t n = tiny_header(&header, 0, TINY_TENSORS), size = 2 * 264 * 4, at;
    const char *p, *hit;
    tiny_make(m, 0, 0);
    for (p = header.p; (hit = strstr(p, "\"model.")) != NULL; p = hit + 7) {
        tiny_append(&renamed, p, (size_t)(hit - p));
        tiny_printf(&renamed, "\"%s", prefix);
    }
    tiny_append(&renamed, p, strlen(p));
    if (head) {
        renamed.p[--renamed.n] = '\0';
        tiny_printf(&renamed, ",\"lm_head.weight\":{\"dtype\":\"BF16\",\"shape\":[264,4],\"data_offsets\":[%lu,%lu]}}",
                    (unsigned long)n, (unsigned long)(n + size));
    }
    tiny_remove(m, TINY_WEIGHTS);
    m->file[TINY_WEIGHTS] = tiny_safetensors(renamed.p, renamed.n, n + (head ? size : 0));
    at = 8 + renamed.n + n;
    if (head) memcpy(m->file[TINY_WEIGHTS].p + at, m->file[TINY_WEIGHTS].p + at - size, size);
    if (head == 2) m->file[TINY_WEIGHTS].p[at + 8 * 7] ^= 1;       /* one number in 264 rows */
    if (config_from) malformed_edit(m, TINY_CONFIG, config_from, config_to);
    free(header.p);
    free(renamed.p);
}

static int checkpoints_warned;
static void checkpoints_on_log(qwen3_log_level level, const char *text, void *user) {
    (void)user;
    if (level == QWEN3_LOG_WARN && strstr(text, "lm_head.weight differs")) checkpoints_warned = 1;
}

/* Load, evaluate and compare with the plain tiny model: 1 the same logits, 0 others, -1 UNSUPPORTED, -2 no model. */
static int checkpoints_compare(const tiny_model *t, char err[512]) {
    static const qwen3_token tokens[3] = {1, 7, 200};
    float logits[2][264], hidden[4];
    const float *out;
    tiny_model plain;
    int i, result = -2;
    tiny_make(&plain, 0, 0);
    for (i = 0; i < 2; i++) {
        qwen3_file files[TINY_FILES];
        qwen3_load_desc d;
        qwen3_ctx_desc cd;
        qwen3_model *m = NULL;
        qwen3_ctx *ctx = NULL;
        qwen3_item item;
        memset(&d, 0, sizeof d);
        memset(&cd, 0, sizeof cd);
        memset(&item, 0, sizeof item);
        d.n_files = tiny_list(i ? t : &plain, files);
        d.files = files;
        d.logger.log = checkpoints_on_log;
        checkpoints_warned = 0;
        cd.max_ctx = 16;
        cd.threads = 1;
        item.tokens = tokens;
        item.n = 3;
        item.hidden = hidden;
        if (qwen3_load(&m, &d, err, 512) != QWEN3_OK) break;
        CHECK(qwen3_ctx_create(&ctx, m, &cd, NULL, 0) == QWEN3_OK && qwen3_eval(ctx, &item, 1) == QWEN3_OK);
        out = qwen3_logits(ctx, 0);
        CHECK((out != NULL) == qwen3_get_info(m).has_head);
        if (out) memcpy(logits[i], out, sizeof logits[i]);
        else {
            qwen3_token next;
            CHECK(qwen3_next(ctx, 0, NULL, &next) == QWEN3_ERR_UNSUPPORTED && strstr(qwen3_ctx_error(ctx), "lm_head"));
            item.all_logits = logits[0];
            CHECK(qwen3_eval(ctx, &item, 1) == QWEN3_ERR_UNSUPPORTED);
        }
        if (i) result = !out ? -1 : memcmp(logits[0], logits[1], sizeof logits[0]) == 0;
        qwen3_ctx_free(ctx);
        qwen3_free(m);
    }
    tiny_free(&plain);
    return result;
}

/* Tensors as wrappers and models without a head name them; a head that is not the embedding in spite of the configuration */
static void test_checkpoints_names(void) {
    static const char tied[] = "\"tie_word_embeddings\":true", untied[] = "\"tie_word_embeddings\":false";
    static const char both[] = "\"Qwen3ForCausalLM\"]", base[] = "\"Qwen3Model\"]";
    static const struct { const char *prefix; int head; const char *from, *to; int result, warned; } cases[] = {
        {"", 0, NULL, NULL, 1, 0}, {"_orig_mod.model.", 0, NULL, NULL, 1, 0}, {"base_model.model.model.", 1, NULL, NULL, 1, 0},
        {"model.language_model.", 1, tied, untied, 1, 0}, {"", 0, tied, untied, -1, 0}, {"model.", 0, both, base, 1, 0},
        {"model.", 0, tied, untied, -2, 0}, {"model.", 1, NULL, NULL, 1, 0}, {"model.", 2, NULL, NULL, 0, 1},
        {"model.", 2, tied, untied, 0, 0}, {"x.y.", 2, NULL, NULL, 0, 1}
    };
    char err[512] = "";
    tiny_model m;
    size_t i;
    for (i = 0; i < sizeof cases / sizeof *cases; i++) {
        int result;
        checkpoints_make(&m, cases[i].prefix, cases[i].head, cases[i].from, cases[i].to);
        result = checkpoints_compare(&m, err);
        CHECK_MSG(result == cases[i].result && (result < 0 || checkpoints_warned == cases[i].warned), "case %lu: %d: %s",
                  (unsigned long)i, result, err);
        tiny_free(&m);
    }
    checkpoints_make(&m, "model.", 0, tied, untied);
    malformed_edit(&m, TINY_CONFIG, both, base);
    CHECK_MSG(checkpoints_compare(&m, err) == -1, "%s", err);
    tiny_free(&m);
    checkpoints_make(&m, "encoder.model.", 0, "\"num_hidden_layers\":1", "\"num_hidden_layers\":2");
    CHECK_MSG(checkpoints_compare(&m, err) == -2 && strstr(err, "there is '"), "%s", err);
    tiny_free(&m);
}

/* Packed weights: their type is what is wrong with them, and not the shape. */
static void test_checkpoints_packed(void) {
    tiny_text header = {NULL, 0}, packed;
    tiny_model m;
    char err[512];
    size_t n = tiny_header(&header, 0, TINY_TENSORS);
    tiny_make(&m, 0, 0);
    packed = malformed_replace(header.p, header.n, "q_proj.weight\":{\"dtype\":\"BF16\",\"shape\":[4,4]",
                               "q_proj.weight\":{\"dtype\":\"U32\",\"shape\":[4,2]");
    tiny_remove(&m, TINY_WEIGHTS);
    m.file[TINY_WEIGHTS] = tiny_safetensors(packed.p, packed.n, n);
    CHECK_MSG(malformed_load(&m, err) == QWEN3_ERR_UNSUPPORTED && malformed_says(err, "q_proj.weight|U32"), "%s", err);
    tiny_free(&m);
    free(header.p);
    free(packed.p);
}

/* What git leaves of a large file that was not fetched */
static void test_checkpoints_lfs_pointer(void) {
    static const malformed_case cases[] = {
        {NULL, "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 311\n", BAD, "Git LFS pointer"}
    };
    static const int which[] = {TINY_WEIGHTS, TINY_TOKENIZER, TINY_CONFIG};
    tiny_model m;
    int i;
    tiny_make(&m, 0, 0);
    for (i = 0; i < 3; i++) MALFORMED_TEXTS(&m, which[i], cases);
    tiny_free(&m);
}

static void suite_checkpoints(void) {
    RUN(test_checkpoints_rotation);
    RUN(test_checkpoints_yarn_by_desc);
    RUN(test_checkpoints_config);
    RUN(test_checkpoints_tokenizer_settings);
    RUN(test_checkpoints_listed_twice);
    RUN(test_checkpoints_added_beside);
    RUN(test_checkpoints_added_malformed);
    RUN(test_checkpoints_merges_twice);
    RUN(test_checkpoints_weights_settings);
    RUN(test_checkpoints_names);
    RUN(test_checkpoints_packed);
    RUN(test_checkpoints_pooling);
    RUN(test_checkpoints_lfs_pointer);
}

#undef BAD
#undef NOT
#undef GOOD

#endif
