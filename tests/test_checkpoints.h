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

static void test_checkpoints_weights_settings(void) {
    static const malformed_case index[] = {
        {"\"weight_map\":{", "\"weight_map\":{\"lm_head.weight\":\"part-1.safetensors\",", GOOD, ""}
    };
    tiny_model m;
    tiny_make(&m, 1, 0);
    MALFORMED_TEXTS(&m, TINY_INDEX, index);
    tiny_free(&m);
}

static void suite_checkpoints(void) {
    RUN(test_checkpoints_rotation);
    RUN(test_checkpoints_yarn_by_desc);
    RUN(test_checkpoints_config);
    RUN(test_checkpoints_tokenizer_settings);
    RUN(test_checkpoints_weights_settings);
}

#undef BAD
#undef NOT
#undef GOOD

#endif
