/* Mixtures of experts: five models of transformers, within the bound of the dense ones; mistakes that exceed it; the same
   bits however rows come; as GGUF files, in blocks of every format, quantised while they are loaded; what is wrong with
   a file. */
#ifndef QWEN3_TESTS_EXPERTS_H
#define QWEN3_TESTS_EXPERTS_H
#include "fixture.h"
#include "tiny_gguf.h"
#include "test_gguf.h"
#include "test_packed.h"
#include "test_quantize.h"
#include "test_formats.h"

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

/* The logits of 16 sequences, which step in groups of `group`: [16, n_vocab] */
static float *experts_grouped(qwen3_model *model, const qwen3_token *tokens, int n, int group) {
    qwen3_ctx_desc desc = ctx_desc(64, 16, 0, QWEN3_KV_F32);
    const size_t n_vocab = (size_t)model->info.n_vocab;
    float *out = floats(16 * n_vocab);
    qwen3_item items[16];
    qwen3_ctx *ctx;
    int i, s;
    desc.threads = group % 2 + 1;
    ctx = ctx_open_desc(model, &desc);
    for (s = 0; s < 16; s++) {
        items[s] = item_of(s, tokens + s % n, qwen3i_min(3, n - s % n));
        CHECK_OK(ctx, qwen3_eval(ctx, items + s, 1));
        items[s] = item_of(s, tokens + s * 5 % n, 1);
    }
    for (s = 0; s < 16; s += group) {
        const int m = qwen3i_min(group, 16 - s);
        CHECK_OK(ctx, qwen3_eval(ctx, items + s, m));
        for (i = s; i < s + m; i++) memcpy(out + (size_t)i * n_vocab, qwen3_logits(ctx, i), n_vocab * sizeof *out);
    }
    qwen3_ctx_free(ctx);
    return out;
}

/* A row of a step has the bits that it has alone, whichever experts the other 1 to 15 choose. */
static void test_experts_neighbours(void) {
    for (int i = 0; i < N_EXPERTS_MODELS; i++) {
        const qwen3_token *tokens;
        fixture f;
        float *alone;
        int n;
        if (!fixture_open(&f, experts_names[i])) continue;
        tokens = ref_tokens(&f.ref, 1, "tokens", &n);
        alone = experts_grouped(f.model, tokens, n, 1);
        for (int group = 2; group <= 16; group++) {
            float *among = experts_grouped(f.model, tokens, n, group);
            CHECK_MSG(memcmp(among, alone, (size_t)(16 * f.info.n_vocab) * sizeof *alone) == 0, "%s: groups of %d differ", experts_names[i], group);
            free(among);
        }
        free(alone);
        fixture_close(&f);
    }
}

/* Each mistake shows: weights that are or are not made to add up to 1 (which softmax after the choice would do, too), one
   expert fewer, two experts swapped. */
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

/* ---- GGUF files, made of a model that is loaded --------------------------------------------------------------- */
static void experts_add_all(gg_file *f, const char *name, const qwen3i_matrix *first, const qwen3i_matrix *second, int n) {
    tiny_text data = {NULL, 0};
    gg_tensor *t;
    int i, k;
    for (i = 0; i < n; i++) for (k = 0; k < (second ? 2 : 1); k++) {
        const qwen3i_matrix *w = k ? &second[i] : &first[i];
        tiny_append(&data, w->data, (size_t)w->rows * (size_t)qwen3i_row_bytes(w->type, w->cols));
    }
    t = gg_add(f, name, first->rows * (second ? 2 : 1), first->cols, (uint32_t)qwen3i_format_of(first->type)->gguf, data.p, data.n);
    t->rank = 3;
    t->dims[2] = (uint64_t)n;
    free(data.p);
}

static void experts_add(gg_file *f, int layer, const char *part, const qwen3i_matrix *w) {
    char name[80];
    snprintf(name, sizeof name, layer < 0 ? "%.0d%s.weight" : "blk.%d.%s.weight", layer < 0 ? 0 : layer, part);
    gg_add(f, name, w->rows, w->cols, (uint32_t)qwen3i_format_of(w->type)->gguf, w->data, (size_t)w->rows * (size_t)qwen3i_row_bytes(w->type, w->cols));
}

static void experts_add_gain(gg_file *f, int layer, const char *part, const float *gain, int n) {
    char name[80];
    snprintf(name, sizeof name, layer < 0 ? "%.0d%s.weight" : "blk.%d.%s.weight", layer < 0 ? 0 : layer, part);
    gg_add(f, name, 0, n, 0, gain, (size_t)n * 4);
}

static void experts_layer(gg_file *f, int i, const qwen3i_layer *w, const qwen3i_config *c, int fused) {
    char name[80];
    experts_add_gain(f, i, "attn_norm", w->attn_norm, c->n_embd);
    experts_add_gain(f, i, "ffn_norm", w->mlp_norm, c->n_embd);
    experts_add_gain(f, i, "attn_q_norm", w->q_norm, c->head_dim);
    experts_add_gain(f, i, "attn_k_norm", w->k_norm, c->head_dim);
    experts_add(f, i, "attn_q", &w->wq);
    experts_add(f, i, "attn_k", &w->wk);
    experts_add(f, i, "attn_v", &w->wv);
    experts_add(f, i, "attn_output", &w->wo);
    experts_add(f, i, "ffn_gate_inp", &w->experts->router);
    snprintf(name, sizeof name, "blk.%d.ffn_gate%s_exps.weight", i, fused ? "_up" : "");
    experts_add_all(f, name, w->experts->gate, fused ? w->experts->up : NULL, c->n_expert);
    snprintf(name, sizeof name, "blk.%d.ffn_up_exps.weight", i);
    if (!fused) experts_add_all(f, name, w->experts->up, NULL, c->n_expert);
    snprintf(name, sizeof name, "blk.%d.ffn_down_exps.weight", i);
    experts_add_all(f, name, w->experts->down, NULL, c->n_expert);
}

static void experts_make(gg_file *f, const qwen3_model *m, int fused) {
    const qwen3i_config *c = &m->config;
    const int values[] = {c->n_layer, c->n_embd, c->n_head, c->n_head_kv, c->head_dim, c->n_ff, c->max_ctx, c->n_vocab, c->n_expert,
                          c->n_expert_used, c->n_ff_expert};
    static const char *const names[] = {"qwen3moe.block_count", "qwen3moe.embedding_length", "qwen3moe.attention.head_count",
        "qwen3moe.attention.head_count_kv", "qwen3moe.attention.key_length", "qwen3moe.feed_forward_length", "qwen3moe.context_length",
        "qwen3moe.vocab_size", "qwen3moe.expert_count", "qwen3moe.expert_used_count", "qwen3moe.expert_feed_forward_length"};
    int i;
    memset(f, 0, sizeof *f);
    f->version = 3;
    f->said_keys = f->said_tensors = GG_AUTO;
    gg_set_string(f, "general.architecture", "qwen3moe");
    gg_set_string(f, "tokenizer.ggml.model", "no_vocab");
    for (i = 0; i < QWEN3I_COUNT(names); i++) gg_set(f, names[i], GG_U32, (uint64_t)values[i]);
    gg_set_float(f, "qwen3moe.attention.layer_norm_rms_epsilon", (double)c->rms_eps);
    gg_set_float(f, "qwen3moe.rope.freq_base", c->rope_theta);
    experts_add(f, -1, "token_embd", &m->weights.embed);
    experts_add_gain(f, -1, "output_norm", m->weights.final_norm, c->n_embd);
    if (!c->tied) experts_add(f, -1, "output", &m->weights.head);
    for (i = 0; i < c->n_layer; i++) experts_layer(f, i, &m->weights.layers[i], c, fused);
}

/* Logits of a few tokens [6, n_vocab]; free them. */
static float *experts_logits(const qwen3_model *m) {
    static const qwen3_token tokens[] = {5, 40, 17, 3, 61, 22};
    qwen3_ctx_desc d = ctx_desc(16, 1, 0, QWEN3_KV_F32);
    qwen3_ctx *ctx = NULL;
    float *out = NULL;
    if (!m) return NULL;
    out = floats(6 * (size_t)m->config.n_vocab);
    if (CHECK(qwen3_ctx_create(&ctx, m, &d, NULL, 0) == QWEN3_OK)) CHECK_OK(ctx, eval(ctx, 0, tokens, 6, out));
    qwen3_ctx_free(ctx);
    return out;
}

/* The same bits as the directory; three tensors of experts, or two. */
static void test_experts_gguf(void) {
    static const char *const names[] = {"experts8", "fused128"};
    int i, fused;
    for (i = 0; i < 2; i++) for (fused = 0; fused < 2; fused++) {
        fixture f;
        gg_file g;
        tiny_text bytes;
        qwen3_model *m;
        float *a, *b;
        if (!fixture_open(&f, names[i])) return;
        experts_make(&g, f.model, fused);
        m = gg_model_of(&g, &bytes);
        a = experts_logits(f.model);
        b = experts_logits(m);
        if (m) CHECK(m->info.n_expert == f.info.n_expert && m->info.n_expert_used == f.info.n_expert_used && m->info.n_params == f.info.n_params);
        CHECK_MSG(same_floats(a, b, 6 * f.info.n_vocab), "%s, %d: other bits", names[i], fused);
        free(a);
        free(b);
        qwen3_free(m);
        free(bytes.p);
        gg_free(&g);
        fixture_close(&f);
    }
}

/* What is wrong with the keys or the tensors is said. */
static void test_experts_gguf_malformed(void) {
    fixture f;
    gg_file g;
    gg_tensor *t, keep;
    if (!fixture_open(&f, "experts8")) return;
    experts_make(&g, f.model, 0);
    gg_check(&g, QWEN3_OK, "");
#define WRONG(key, value, was, says) \
    gg_set(&g, key, GG_U32, value); gg_check(&g, QWEN3_ERR_FORMAT, says); gg_set(&g, key, GG_U32, was)
    WRONG("qwen3moe.expert_count", 9, 8, "ffn_gate_inp.weight|[8, 24]|[9, 24]");
    WRONG("qwen3moe.expert_count", 0, 8, "qwen3moe.expert_count|possible");
    WRONG("qwen3moe.expert_used_count", 9, 2, "9 of 8 experts");
    WRONG("qwen3moe.expert_feed_forward_length", 11, 12, "blk.0.ffn_gate_exps.weight|[8, 12, 24]|[8, 11, 24]");
    WRONG("qwen3moe.block_count", 8000000, 2, "qwen3moe.block_count|8000000");
#undef WRONG
    gg_remove(&g, "qwen3moe.expert_count");
    gg_check(&g, QWEN3_ERR_FORMAT, "qwen3moe.expert_count|missing");
    gg_set(&g, "qwen3moe.expert_count", GG_U32, 8);
    t = gg_tensor_at(&g, "blk.1.ffn_up_exps.weight");
    t->name[6] = 'x';
    gg_check(&g, QWEN3_ERR_FORMAT, "blk.1.ffn_up_exps.weight|missing");
    t->name[6] = 'f';
    keep = *t;
    t->rank = 2;
    t->dims[1] *= 8;
    gg_check(&g, QWEN3_ERR_FORMAT, "blk.1.ffn_up_exps.weight|[96, 24]|[8, 12, 24]");
    *t = keep;
    gg_check(&g, QWEN3_OK, "");
    gg_free(&g);
    fixture_close(&f);
}

/* ---- experts in blocks: of GGUF files every format, beside a twin in float32 ---------------------------------- */
enum { EX_EMBD = 256, EX_FF = 256, EX_N = 5 };

/* Blocks with scales of about 1/1000 */
static void experts_blocks(uint8_t *b, qwen3i_type type, int n, uint32_t *state) {
    const qwen3i_format *f = qwen3i_format_of(type);
    const int *at = formats_halves(type);
    int i, k;
    for (i = 0; i < n; i++, b += f->bytes) {
        formats_block(b, type, (uint32_t)i, state);
        for (k = 0; k < 2 && at[k] >= 0; k++) b[at[k] + 1] = (uint8_t)(type == QWEN3I_Q4_1 || type == QWEN3I_Q5_1 || k == 0 ? 0x14 : 0x0C);
        if (type == QWEN3I_MXFP4) b[0] = 118;
        for (k = 0; type == QWEN3I_NVFP4 && k < 4; k++) b[k] = (uint8_t)(8 + k);
    }
}

typedef struct experts_model {          /* one layer; everything but experts in float32 */
    gg_file file;
    tiny_text bytes;
    qwen3_model *model;
} experts_model;

enum { EX_UP = 2, EX_TWIN = 7 };

/* The file of a model whose experts have the type or, of gate, up and down those whose bits are set, its values */
static void experts_of_type(experts_model *out, qwen3i_type type, int values_of) {
    const size_t row = (size_t)qwen3i_row_bytes(type, EX_EMBD), n = (size_t)EX_N * EX_FF;
    static float dense[EX_EMBD * EX_EMBD], values[3][EX_N * EX_FF * EX_EMBD];
    float ones[EX_EMBD];
    uint8_t *blocks = (uint8_t *)malloc(3 * n * row);
    uint32_t state = 7;
    uint64_t rng = 5;
    qwen3i_matrix w[3][EX_N];
    qwen3i_experts e;
    qwen3i_layer l;
    qwen3_model m;
    size_t i;
    int k, x;
    memset(&m, 0, sizeof m);
    memset(&l, 0, sizeof l);
    m.config.n_layer = 1; m.config.n_embd = EX_EMBD; m.config.n_head = 2; m.config.n_head_kv = 1; m.config.head_dim = 128; m.config.n_ff = EX_FF;
    m.config.max_ctx = 32; m.config.n_vocab = 64; m.config.n_expert = EX_N; m.config.n_expert_used = 3; m.config.n_ff_expert = EX_FF;
    m.config.rms_eps = 1e-6f; m.config.rope_theta = 10000; m.config.tied = 1;
    for (i = 0; i < EX_EMBD; i++) ones[i] = 1;
    for (i = 0; i < EX_EMBD * EX_EMBD; i++) dense[i] = ((float)random_below(&rng, 2001) - 1000) * 1e-4f;
    l.attn_norm = l.mlp_norm = l.q_norm = l.k_norm = m.weights.final_norm = ones;
    l.wq.data = dense; l.wq.rows = l.wq.cols = EX_EMBD; l.wq.type = QWEN3I_F32;
    l.wo = l.wk = l.wv = m.weights.embed = e.router = l.wq;
    l.wk.rows = l.wv.rows = 128;
    m.weights.embed.rows = 64;
    e.router.rows = EX_N;
    l.experts = &e;
    m.weights.layers = &l;
    e.gate = w[0]; e.up = w[1]; e.down = w[2];
    for (k = 0; k < 3; k++) {
        uint8_t *b = blocks + (size_t)k * n * row;
        experts_blocks(b, type, (int)(n * row / (size_t)qwen3i_format_of(type)->bytes), &state);
        for (i = 0; i < n; i++) qwen3i_decode(values[k] + i * EX_EMBD, b + i * row, type, EX_EMBD);
        for (x = 0; x < EX_N; x++) {
            w[k][x].rows = EX_FF; w[k][x].cols = EX_EMBD; w[k][x].type = values_of >> k & 1 ? QWEN3I_F32 : type;
            w[k][x].data = values_of >> k & 1 ? (const void *)(values[k] + x * EX_FF * EX_EMBD) : (const void *)(b + (size_t)x * EX_FF * row);
        }
    }
    experts_make(&out->file, &m, 0);
    free(blocks);
    out->model = gg_model_of(&out->file, &out->bytes);
}

static void experts_free(experts_model *m) {
    qwen3_free(m->model);
    free(m->bytes.p);
    gg_free(&m->file);
}

static double experts_off(const float *a, const float *b, int n) {
    double off = 0, all = 0;
    int i;
    for (i = 0; i < n; i++) {
        off += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
        all += (double)b[i] * (double)b[i];
    }
    return sqrt(off / all);
}

static void test_experts_formats(void) {
    int type;
    for (type = QWEN3I_Q8_0; type < QWEN3I_N_TYPES; type++) {
        experts_model x, twin;
        float *a, *b;
        if (qwen3i_format_of((qwen3i_type)type)->gguf < 0) continue;
        experts_of_type(&x, (qwen3i_type)type, 0);
        experts_of_type(&twin, (qwen3i_type)type, EX_TWIN);
        a = experts_logits(x.model);
        b = experts_logits(twin.model);
        if (a && b) CHECK_MSG(experts_off(a, b, 6 * 64) < 0.01 && cpu_finite(b, 6 * 64), "%s: off by %g", qwen3i_format_of((qwen3i_type)type)->name, experts_off(a, b, 6 * 64));
        if (test_verbose && a && b) printf("      %-8s off by %.1e\n", qwen3i_format_of((qwen3i_type)type)->name, experts_off(a, b, 6 * 64));
        free(a);
        free(b);
        experts_free(&x);
        experts_free(&twin);
    }
}

/* A factor of each expert, in NVFP4 as files have it; the twin's values are multiplied by it, and rounded. */
static void experts_factors(gg_file *f, const char *name, int multiply) {
    const float factors[EX_N] = {0.3f, -1.7f, 1.0f, 2.5f, 0.01f};
    char tensor[80];
    int i;
    snprintf(tensor, sizeof tensor, "blk.0.%s.%s", name, multiply ? "weight" : "scale");
    if (!multiply) { gg_add(f, tensor, 0, EX_N, 0, factors, sizeof factors); return; }
    float *values = (float *)(void *)gg_tensor_at(f, tensor)->data.p;
    for (i = 0; i < EX_N * EX_FF * EX_EMBD; i++) values[i] *= factors[i / (EX_FF * EX_EMBD)];
}

static float *experts_logits_with_factors(experts_model *x, int multiply) {
    static const char *const names[] = {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"};
    int i;
    for (i = 0; i < 3; i++) experts_factors(&x->file, names[i], multiply);
    qwen3_free(x->model);
    free(x->bytes.p);
    x->model = gg_model_of(&x->file, &x->bytes);
    return experts_logits(x->model);
}

static void test_experts_gguf_factors(void) {
    experts_model x, twin;
    float *a, *b;
    experts_of_type(&x, QWEN3I_NVFP4, 0);
    experts_of_type(&twin, QWEN3I_NVFP4, EX_TWIN);
    a = experts_logits_with_factors(&x, 0);
    b = experts_logits_with_factors(&twin, 1);
    if (a && b) CHECK_MSG(experts_off(a, b, 6 * 64) < 1e-3 && cpu_finite(b, 6 * 64), "off by %g", experts_off(a, b, 6 * 64));
    if (test_verbose && a && b) printf("      off by %.1e\n", experts_off(a, b, 6 * 64));
    free(a);
    free(b);
    experts_free(&x);
    experts_free(&twin);
}

/* ---- quantised directories: each kind, the router, too --------------------------------------------------------- */
static void test_experts_packed(void) {
    int i;
    for (i = 0; i < PACKED_SCHEMES; i++) {
        const packed_scheme *s = &packed_schemes[i];
        char err[512] = "";
        if (!packed_is_ordered(s)) packed_compare(&packed_experts, i);
        else {
            tiny_text file = packed_weights(s, &packed_experts, 0);
            qwen3_model *m = NULL;
            CHECK_MSG(packed_load_from(&m, &packed_experts, s->config, &file, err) == QWEN3_ERR_UNSUPPORTED && !m &&
                      strstr(err, "layers.0.mlp.gate.weight") && strstr(err, "order of activation"), "scheme %d: %s", i, err);
            free(file.p);
        }
    }
}

/* ---- load.quantize --------------------------------------------------------------------------------------------- */
static void test_experts_quantize(void) {
    const qwen3i_type want[] = {QWEN3I_NO_TYPE, QWEN3I_Q8_0, QWEN3I_Q4_K};
    experts_model x;
    float *logits[3];
    uint64_t fingerprint[3];
    int how;
    experts_of_type(&x, QWEN3I_Q8_0, EX_TWIN);
    for (how = 0; how < 3; how++) {
        qwen3_model *m = NULL;
        qwen3_load_desc d;
        qwen3_file file;
        char err[256] = "";
        memset(&d, 0, sizeof d);
        file.name = "m.gguf"; file.data = x.bytes.p; file.size = x.bytes.n;
        d.files = &file;
        d.n_files = 1;
        d.quantize = how;
        logits[how] = NULL;
        if (!CHECK_MSG(qwen3_load(&m, &d, err, sizeof err) == QWEN3_OK, "%s", err)) continue;
        if (how) memset(x.bytes.p, 0xFF, x.bytes.n);        /* nothing of the file is used any more */
        logits[how] = experts_logits(m);
        fingerprint[how] = m->info.fingerprint;
        if (how) CHECK(m->weights.layers[0].experts->gate[1].type == want[how] && m->weights.layers[0].experts->router.type == QWEN3I_F32);
        if (how) CHECK(m->weights.layers[0].experts->down[EX_N - 1].type == (how == 2 ? QWEN3I_Q6_K : want[how]));
        if (how && logits[0] && logits[how]) CHECK_MSG(experts_off(logits[how], logits[0], 6 * 64) < (how == 1 ? 0.02 : 0.2) &&
            (how == 1 || experts_off(logits[how], logits[0], 6 * 64) > 0.001) && fingerprint[how] != fingerprint[0], "%d: off by %g", how, experts_off(logits[how], logits[0], 6 * 64));
        qwen3_free(m);
        if (how) { tiny_text again = gg_write(&x.file); memcpy(x.bytes.p, again.p, again.n); free(again.p); }
    }
    for (how = 0; how < 3; how++) free(logits[how]);
    experts_free(&x);
}

/* A mixture of one layer from memory that runs out at each allocation: an error, and nothing leaks. */
static void test_experts_memory(void) {
    tiny_text file = packed_weights(packed_schemes, &packed_few, 0);
    packed_load_without_memory(&packed_few, packed_schemes[0].config, &file);
    free(file.p);
}

static void suite_experts(void) {
    RUN(test_experts_parity);
    RUN(test_experts_same_bits);
    RUN(test_experts_neighbours);
    RUN(test_experts_tell_mistakes);
    RUN(test_experts_pick);
    RUN(test_experts_malformed);
    RUN(test_experts_gguf);
    RUN(test_experts_gguf_malformed);
    RUN(test_experts_formats);
    RUN(test_experts_gguf_factors);
    RUN(test_experts_packed);
    RUN(test_experts_quantize);
    RUN(test_experts_memory);
}
#endif
