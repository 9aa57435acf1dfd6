/* Mixtures of experts: five models of transformers, within the bound of the dense ones; mistakes that exceed it; the same
   bits however rows come; what is wrong with a file. */
#ifndef QWEN3_TESTS_EXPERTS_H
#define QWEN3_TESTS_EXPERTS_H

static const char *const experts_names[] = {"experts8", "experts128", "experts64", "fused", "fused128"};
#define N_EXPERTS_MODELS ((int)(sizeof experts_names / sizeof *experts_names))

static void test_experts_parity(void) {
    int i, p, n;
    for (i = 0; i < N_EXPERTS_MODELS; i++) {
        qwen3_ctx_desc desc = ctx_desc(256, 1, 0, QWEN3_KV_F32);
        fixture f;
        qwen3_ctx *ctx;
        double logits, hidden;
        if (!fixture_open(&f, experts_names[i])) continue;
        fixture_errors(&f, &desc, &logits, &hidden);
        CHECK_MSG(logits <= PARITY && hidden <= PARITY, "%s: logits %.2e, hidden %.2e", experts_names[i], logits, hidden);
        if (test_verbose) printf("      %-10s logits %.1e  hidden %.1e\n", experts_names[i], logits, hidden);
        ctx = ctx_open_desc(f.model, &desc);
        for (p = 0; ctx && ref_tokens(&f.ref, p, "tokens", &n); p++) greedy_case(&f, ctx, p, experts_names[i]);
        qwen3_ctx_free(ctx);
        fixture_close(&f);
    }
}

/* Chunks, threads and other sequences beside it do not change a bit. */
static void test_experts_same_bits(void) {
    int i, way, n;
    for (i = 0; i < N_EXPERTS_MODELS; i++) {
        fixture f;
        float *first = NULL;
        const qwen3_token *tokens;
        if (!fixture_open(&f, experts_names[i])) continue;
        tokens = ref_tokens(&f.ref, 1, "tokens", &n);
        for (way = 0; way < 5; way++) {
            static const int chunk[] = {0, 1, 7, 64, 5}, threads[] = {1, 1, 3, 4, 2};
            qwen3_ctx_desc desc = ctx_desc(256, 2, chunk[way], QWEN3_KV_F16);
            qwen3_ctx *ctx;
            qwen3_item items[2];
            const float *logits;
            size_t size = (size_t)f.info.n_vocab * sizeof(float);
            desc.threads = threads[way];
            ctx = ctx_open_desc(f.model, &desc);
            items[0] = item_of(0, tokens, n);
            items[1] = item_of(1, tokens + 3, n - 5);
            CHECK_OK(ctx, qwen3_eval(ctx, items, way == 4 ? 2 : 1));
            logits = qwen3_logits(ctx, 0);
            if (!first) { first = floats((size_t)f.info.n_vocab); memcpy(first, logits, size); }
            CHECK_MSG(memcmp(first, logits, size) == 0, "%s: way %d differs", experts_names[i], way);
            qwen3_ctx_free(ctx);
        }
        free(first);
        fixture_close(&f);
    }
}

/* Each mistake shows: weights that are or are not made to add up to 1, one expert fewer, the experts of another layer. */
static void test_experts_tell_mistakes(void) {
    static const struct { const char *model, *from, *to; } edits[] = {
        {"experts8", "\"norm_topk_prob\": true", "\"norm_topk_prob\": false"},
        {"experts64", "\"norm_topk_prob\": false", "\"norm_topk_prob\": true"},
        {"fused", "\"norm_topk_prob\": false", "\"norm_topk_prob\": true"},
        {"experts8", "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 1"},
        {"experts64", "\"num_experts_per_tok\": 4", "\"num_experts_per_tok\": 5"},
        {"experts8", "experts.2.gate_proj", "experts.5.gate_proj"}
    };
    int i;
    for (i = 0; i < QWEN3I_COUNT(edits); i++) {
        qwen3_ctx_desc desc = ctx_desc(256, 1, 0, QWEN3_KV_F32);
        model_files files;
        fixture f;
        double right, wrong, hidden;
        if (!fixture_open(&f, edits[i].model) || !model_files_read(&files, edits[i].model)) return;
        fixture_errors(&f, &desc, &right, &hidden);
        qwen3_free(f.model);
        if (i == 5) {                   /* two experts' gates change places: names of one length, in the header */
            int k;
            char *p, *q, *data = NULL;
            for (k = 0; k < files.n; k++) if (strstr(files.file[k].name, ".safetensors")) {
                data = (char *)malloc(files.file[k].size);
                memcpy(data, files.file[k].data, files.file[k].size);
                files.file[k].data = data;
            }
            for (p = data + 8; memcmp(p, edits[i].from, strlen(edits[i].from)) != 0; p++) { }
            for (q = data + 8; memcmp(q, edits[i].to, strlen(edits[i].to)) != 0; q++) { }
            p[8] = '5';
            q[8] = '2';
            f.model = model_files_load(&files);
            if (f.model) fixture_errors(&f, &desc, &wrong, &hidden);
            else wrong = 0;
            CHECK_MSG(wrong > 10 * PARITY, "swapped experts would pass: %.1e", wrong);
            fixture_close(&f);
            model_files_free(&files);
            free(data);
            continue;
        }
        CHECK(model_files_edit(&files, "config.json", edits[i].from, edits[i].to));
        f.model = model_files_load(&files);
        if (f.model) {
            fixture_errors(&f, &desc, &wrong, &hidden);
            CHECK_MSG(right <= PARITY && wrong > 10 * PARITY, "%s would pass: %.1e, right %.1e", edits[i].to, wrong, right);
        }
        fixture_close(&f);
        model_files_free(&files);
    }
}

/* Ties go to the lower index; what is picked is in order of index; extremes are no numbers' enemy. */
static void test_experts_pick(void) {
    static const float tied[6] = {0.1f, 0.3f, 0.1f, 0.3f, 0.1f, 0.1f}, one[4] = {0, 0, 1, 0};
    int32_t picked[6];
    float share[6], p[16] = {88.0f, -3.0e38f, 3.0e38f, -88.0f};
    qwen3i_pick_experts(tied, 6, 3, 0, picked, share);
    CHECK(picked[0] == 0 && picked[1] == 1 && picked[2] == 3);
    CHECK(share[0] == 0.1f && share[1] == 0.3f && share[2] == 0.3f);
    qwen3i_pick_experts(tied, 6, 6, 1, picked, share);
    CHECK(picked[0] == 0 && picked[5] == 5 && fabs((double)(share[0] + share[1] + share[2] + share[3] + share[4] + share[5]) - 1) < 1e-6);
    qwen3i_pick_experts(one, 4, 2, 1, picked, share);
    CHECK(picked[0] == 0 && picked[1] == 2 && share[0] == 0 && share[1] == 1);
    qwen3i_simd_level(0)->softmax(p, 4, 1.0f);
    qwen3i_pick_experts(p, 4, 2, 1, picked, share);
    CHECK(picked[0] == 0 && picked[1] == 2 && share[0] == 0 && share[1] == 1);
}

/* What is wrong with a mixture's configuration or files is said. */
static void test_experts_malformed(void) {
    static const struct { const char *model, *from, *to; qwen3_result result; const char *word; } edits[] = {
        {"experts8", "\"num_experts\": 8,", "", QWEN3_ERR_FORMAT, "'num_experts' is missing"},
        {"experts8", "\"num_experts_per_tok\": 2,", "", QWEN3_ERR_FORMAT, "'num_experts_per_tok' is missing"},
        {"experts8", "\"norm_topk_prob\": true,", "", QWEN3_ERR_FORMAT, "'norm_topk_prob' is missing"},
        {"experts8", "\"num_experts\": 8", "\"num_experts\": 9", QWEN3_ERR_FORMAT, "mlp.gate.weight"},
        {"experts8", "\"num_experts\": 8", "\"num_experts\": 4097", QWEN3_ERR_FORMAT, "1 to 4096"},
        {"experts8", "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 9", QWEN3_ERR_FORMAT, "9 of 8 experts"},
        {"experts8", "\"moe_intermediate_size\": 12", "\"moe_intermediate_size\": 13", QWEN3_ERR_FORMAT, "experts.0.gate_proj"},
        {"experts8", "\"decoder_sparse_step\": 1", "\"decoder_sparse_step\": 2", QWEN3_ERR_FORMAT, "layers.0.mlp.gate_proj"},
        {"experts8", "\"mlp_only_layers\": []", "\"mlp_only_layers\": [1]", QWEN3_ERR_FORMAT, "layers.1.mlp.gate_proj"},
        {"experts8", "\"mlp_only_layers\": []", "\"mlp_only_layers\": [-1]", QWEN3_ERR_FORMAT, "a layer's number"},
        {"fused", "\"moe_intermediate_size\": 9", "\"moe_intermediate_size\": 18", QWEN3_ERR_FORMAT, "[8, 36, 21]"},
        {"fused", "\"num_experts\": 8", "\"num_experts\": 4", QWEN3_ERR_FORMAT, "mlp.gate.weight"}
    };
    qwen3_backend other = *qwen3i_cpu_backend();
    size_t i;
    for (i = 0; i <= sizeof edits / sizeof *edits; i++) {
        const int refused = i == sizeof edits / sizeof *edits;
        model_files files;
        qwen3_load_desc d;
        qwen3_model *m = NULL;
        char err[512] = "";
        qwen3_result r;
        if (!model_files_read(&files, refused ? "experts8" : edits[i].model)) return;
        memset(&d, 0, sizeof d);
        if (!refused) CHECK_MSG(model_files_edit(&files, "config.json", edits[i].from, edits[i].to), "edit %s", edits[i].from);
        d.files = files.file;
        d.n_files = files.n;
        other.experts = 0;
        if (refused) d.backend = &other;
        r = qwen3_load(&m, &d, err, sizeof err);
        CHECK_MSG(r == (refused ? QWEN3_ERR_UNSUPPORTED : edits[i].result) && strstr(err, refused ? "does not run mixtures" : edits[i].word),
                  "%s: %s: '%s'", refused ? "a backend without" : edits[i].to, qwen3_result_string(r), err);
        qwen3_free(m);
        model_files_free(&files);
    }
}

static void suite_experts(void) {
    RUN(test_experts_parity);
    RUN(test_experts_same_bits);
    RUN(test_experts_tell_mistakes);
    RUN(test_experts_pick);
    RUN(test_experts_malformed);
}
#endif
