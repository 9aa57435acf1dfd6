/* Make a smaller model: quantize MODEL OUT.gguf TYPE [threads]

       make build/quantize
       build/quantize models/Qwen3-0.6B Qwen3-0.6B-Q4_K_M.gguf Q4_K_M

   MODEL is a directory or a GGUF file with weights in BF16, F16 or F32, a mixture of experts too; TYPE one of Q8_0, Q6_K, Q5_K_M,
   Q4_K_M, Q4_0; or AS_IS, which makes one GGUF file of a directory.
   The result holds the tokenizer and the chat template, too: qwen3.h and llama.cpp load it.

   Measured on the demo model and held-out dialogues of it: mean KL divergence from the 16-bit model (llama-perplexity),
   of files from here and from llama-quantize without importance matrix.

               Q8_0     Q6_K     Q5_K_M   Q4_K_M   Q4_0
       here    0.00100  0.00540  0.01380  0.0589   0.0745
       there   0.00112  0.00575  0.01386  0.0624   0.0860
   and on text that the model does not know (perplexity 9,332), where Q4_K_M is worse:
       here    0.00122  0.00783  0.0203   0.0767   0.106
       there   0.00132  0.00816  0.0213   0.0680   0.140 */
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"
#include <stdio.h>

/* ---- what is to be written ----------------------------------------------------------------------------- */
typedef struct kind { const char *name; qwen3i_mix mix; int file_type; } kind;   /* file_type: its number in GGUF files */
static const kind kinds[] = {
    {"Q8_0", QWEN3I_MIX_Q8_0, 7}, {"Q6_K", QWEN3I_MIX_Q6_K, 18}, {"Q5_K_M", QWEN3I_MIX_Q5_K_M, 17},
    {"Q4_K_M", QWEN3I_MIX_Q4_K_M, 15}, {"Q4_0", QWEN3I_MIX_Q4_0, 2}, {"AS_IS", QWEN3I_MIX_NONE, -1}
};

/* all: of a mixture's experts, whose matrices follow each other; from then has the rows of all and no data */
typedef struct tensor { char name[QWEN3I_NAME]; qwen3i_matrix from; const qwen3i_matrix *all; qwen3i_type type; int rank; } tensor;

typedef struct job {
    qwen3_model *model;
    const char  *path;
    const kind  *to;
    int          threads;
    tensor      *tensors;
    int          n_tensors;
    qwen3i_buf   keys;          /* written one after the other */
    uint64_t     n_keys;
    FILE        *out;
    uint64_t     written;
} job;

static const qwen3_allocator heap;

static int fail(const char *what, const char *detail) {
    fprintf(stderr, "quantize: %s%s%s\n", what, *detail ? ": " : "", detail);
    return 1;
}

/* rank 1: gains, which stay float32 */
static void add_tensor(job *j, int layer, int weight, int rank, const void *data, qwen3i_type type, int rows, int cols) {
    tensor *t = &j->tensors[j->n_tensors++];
    qwen3i_weight_name(t->name, &qwen3i_gguf_file, layer, weight);
    t->from.data = data; t->from.type = type; t->from.rows = rows; t->from.cols = cols;
    t->rank = rank;
    t->type = rank == 2 && weight != QWEN3I_W_RANK ? qwen3i_mix_type(j->to->mix, weight, layer, &j->model->config, cols) : QWEN3I_NO_TYPE;
    if (!t->type) t->type = type;
}

/* What all of each matrix is multiplied by, if anything: beside the tensor that was added last */
static void add_factors(job *j, const qwen3i_matrix *list, int n) {
    const tensor *of = &j->tensors[j->n_tensors - 1];
    float *factors = NULL;
    for (int i = 0; i < n; i++) {
        if (list[i].factor == 0) continue;
        if (!factors) {
            factors = (float *)malloc((size_t)n * sizeof *factors);     /* to the end */
            if (!factors) exit(fail("out of memory", ""));
            for (int k = 0; k < n; k++) factors[k] = 1;
        }
        factors[i] = list[i].factor;
    }
    if (!factors) return;
    add_tensor(j, 0, QWEN3I_W_FINAL_NORM, 1, factors, QWEN3I_F32, 1, n);
    snprintf(j->tensors[j->n_tensors - 1].name, sizeof of->name, "%.*sscale", (int)(strlen(of->name) - strlen("weight")), of->name);
}

static void add_matrix(job *j, int layer, int weight, const qwen3i_matrix *m) {
    add_tensor(j, layer, weight, 2, m->data, m->type, m->rows, m->cols);
    add_factors(j, m, 1);
}

/* A matrix of each expert; as: the weight whose type they get */
static void add_experts(job *j, int layer, int weight, int as, const qwen3i_matrix *list) {
    const int n = j->model->config.n_expert;
    tensor *t = &j->tensors[j->n_tensors];
    add_tensor(j, layer, as, 2, NULL, list[0].type, n * list[0].rows, list[0].cols);
    qwen3i_weight_name(t->name, &qwen3i_gguf_file, layer, weight);
    t->all = list;
    t->rank = 3;
    add_factors(j, list, n);
}

static void add_gains(job *j, int layer, int weight, const float *gains, int n) {
    add_tensor(j, layer, weight, 1, gains, QWEN3I_F32, 1, n);
}

static int list_tensors(job *j) {
    const qwen3_model *m = j->model;
    const qwen3i_weights *w = &m->weights;
    const qwen3i_config *c = &m->config;
    j->tensors = (tensor *)calloc(2 * (size_t)c->n_layer * 12 + 6, sizeof *j->tensors);
    if (!j->tensors) return fail("out of memory", "");
    add_matrix(j, -1, QWEN3I_W_EMBED, &w->embed);
    add_gains(j, -1, QWEN3I_W_FINAL_NORM, w->final_norm, c->n_embd);
    if (!c->tied) add_matrix(j, -1, QWEN3I_W_HEAD, &w->head);
    if (m->rank) add_tensor(j, -1, QWEN3I_W_RANK, 2, m->rank, QWEN3I_F32, 2, c->n_embd);
    for (int i = 0; i < c->n_layer; i++) {
        const qwen3i_layer *l = &w->layers[i];
        add_gains(j, i, QWEN3I_W_ATTN_NORM, l->attn_norm, c->n_embd);
        add_matrix(j, i, QWEN3I_W_Q, &l->wq);
        add_matrix(j, i, QWEN3I_W_K, &l->wk);
        add_matrix(j, i, QWEN3I_W_V, &l->wv);
        add_gains(j, i, QWEN3I_W_Q_NORM, l->q_norm, c->head_dim);
        add_gains(j, i, QWEN3I_W_K_NORM, l->k_norm, c->head_dim);
        add_matrix(j, i, QWEN3I_W_O, &l->wo);
        add_gains(j, i, QWEN3I_W_MLP_NORM, l->mlp_norm, c->n_embd);
        if (!l->experts != !c->n_expert || (c->n_expert && !c->norm_topk))
            return fail("GGUF files have no such mixture: all layers have experts, whose weights add up to 1", "");
        if (l->experts) {
            const qwen3i_matrix *router = &l->experts->router;
            tensor *t = &j->tensors[j->n_tensors];
            add_tensor(j, i, QWEN3I_W_ROUTER, 2, router->data, router->type, router->rows, router->cols);
            t->type = router->type;     /* never in blocks */
            add_experts(j, i, QWEN3I_W_ALL_GATE, QWEN3I_W_GATE, l->experts->gate);
            add_experts(j, i, QWEN3I_W_ALL_UP, QWEN3I_W_UP, l->experts->up);
            add_experts(j, i, QWEN3I_W_ALL_DOWN, QWEN3I_W_DOWN, l->experts->down);
            for (int k = 1; k < c->n_expert; k++)
                if (l->experts->gate[k].type != l->experts->gate[0].type || l->experts->up[k].type != l->experts->up[0].type ||
                    l->experts->down[k].type != l->experts->down[0].type) return fail("experts of one layer differ in type", "");
            continue;
        }
        add_matrix(j, i, QWEN3I_W_GATE, &l->w_gate);
        add_matrix(j, i, QWEN3I_W_UP, &l->w_up);
        add_matrix(j, i, QWEN3I_W_DOWN, &l->w_down);
    }
    for (int i = 0; i < j->n_tensors; i++)
        if (j->tensors[i].type != j->tensors[i].from.type && qwen3i_is_block(j->tensors[i].from.type))
            return fail("the model is quantised already: start from the one with 16 bits", j->tensors[i].name);
    return 0;
}

/* ---- keys ------------------------------------------------------------------------------------------------ */
static void put(qwen3i_buf *b, uint64_t v, int n) {
    char bytes[8];
    for (int i = 0; i < n; i++) bytes[i] = (char)(v >> 8 * i);
    if (!qwen3i_buf_add(b, bytes, (size_t)n)) exit(fail("out of memory", ""));
}

static void put_bytes(qwen3i_buf *b, const void *p, size_t n) {
    if (!qwen3i_buf_add(b, (const char *)p, n)) exit(fail("out of memory", ""));
}

static void put_string(qwen3i_buf *b, const char *p, size_t n) {
    put(b, n, 8);
    put_bytes(b, p, n);
}

static void put_key(job *j, const char *key, qwen3i_gguf_kind k) {
    put_string(&j->keys, key, strlen(key));
    put(&j->keys, (uint64_t)k, 4);
    j->n_keys++;
}

static void key_string(job *j, const char *key, const char *p, size_t n) { put_key(j, key, QWEN3I_GGUF_STRING); put_string(&j->keys, p, n); }
static void key_text(job *j, const char *key, const char *text) { key_string(j, key, text, strlen(text)); }
static void key_u32(job *j, const char *key, int v) { put_key(j, key, QWEN3I_GGUF_U32); put(&j->keys, (uint64_t)v, 4); }
static void key_float(job *j, const char *key, double v) { put_key(j, key, QWEN3I_GGUF_F32); put(&j->keys, qwen3i_bits_from_float((float)v), 4); }

static void key_array(job *j, const char *key, qwen3i_gguf_kind item, uint64_t n) {
    put_key(j, key, QWEN3I_GGUF_ARRAY);
    put(&j->keys, (uint64_t)item, 4);
    put(&j->keys, n, 8);
}

/* What the quantisation itself says */
static void put_own_keys(job *j) {
    const int as_is = j->model->weights.embed.type == QWEN3I_F32 ? 0 : j->model->weights.embed.type == QWEN3I_F16 ? 1 : 32;
    key_u32(j, "general.file_type", j->to->mix ? j->to->file_type : as_is);
    key_u32(j, "general.quantization_version", 2);
}

/* ---- keys of a GGUF file: as they are ------------------------------------------------------------------------ */
static int is_own_key(qwen3i_str key) {
    static const char *const own[] = {"general.file_type", "general.quantization_version", "general.alignment"};
    for (int i = 0; i < QWEN3I_COUNT(own); i++) if (qwen3i_compare_str(key, qwen3i_str_of(own[i])) == 0) return 1;
    return key.n >= 6 && memcmp(key.p, "split.", 6) == 0;
}

static size_t value_bytes(const qwen3i_gguf_value *v) {
    const unsigned char *p = v->p;
    if (v->item != QWEN3I_GGUF_STRING) return (size_t)v->n * (size_t)qwen3i_gguf_kind_size(v->item);
    for (uint64_t i = 0; i < v->n; i++) (void)qwen3i_gguf_next_string(&p);
    return (size_t)(p - v->p);
}

static int put_gguf_keys(job *j) {
    char text[256] = "";
    const qwen3i_err err = {text, sizeof text};
    qwen3i_gguf g;
    const qwen3_result r = qwen3i_gguf_begin(&g, &j->model->shards[0], &heap, &err);
    for (uint64_t i = 0; r == QWEN3_OK && i < g.n_values; i++) {
        const qwen3i_gguf_value *v = &g.values[i];
        if (is_own_key(v->key)) continue;
        put_string(&j->keys, v->key.p, v->key.n);
        put(&j->keys, v->kind, 4);
        if (v->kind == QWEN3I_GGUF_ARRAY) { put(&j->keys, v->item, 4); put(&j->keys, v->n, 8); }
        put_bytes(&j->keys, v->p, value_bytes(v));
        j->n_keys++;
    }
    qwen3i_gguf_free(&heap, &g);
    return r == QWEN3_OK ? 0 : fail("cannot read the keys", text);
}

/* ---- keys of a directory ------------------------------------------------------------------------------------- */
static const char *last_part(const char *path) {
    const char *name = path;
    for (; *path; path++) if ((*path == '/' || *path == '\\') && path[1]) name = path + 1;
    return name;
}

static const char *own_key(const qwen3i_config *c, char name[80], const char *key) {
    snprintf(name, 80, "%s.%s", c->n_expert ? "qwen3moe" : "qwen3", key);
    return name;
}

static void put_config_keys(job *j) {
    const qwen3i_config *c = &j->model->config;
    char name[80];
    const qwen3_sampler *s = &j->model->info.sampler;
    const double own = c->yarn_factor > 1 ? 0.1 * log(c->yarn_factor) + 1 : 1;
    key_text(j, "general.architecture", c->n_expert ? "qwen3moe" : "qwen3");
    key_text(j, "general.type", "model");
    key_text(j, "general.name", last_part(j->path));
    key_u32(j, own_key(c, name, "block_count"), c->n_layer);
    key_u32(j, own_key(c, name, "context_length"), c->max_ctx);
    key_u32(j, own_key(c, name, "embedding_length"), c->n_embd);
    key_u32(j, own_key(c, name, "feed_forward_length"), c->n_ff);
    key_u32(j, own_key(c, name, "vocab_size"), c->n_vocab);
    key_u32(j, own_key(c, name, "attention.head_count"), c->n_head);
    key_u32(j, own_key(c, name, "attention.head_count_kv"), c->n_head_kv);
    key_u32(j, own_key(c, name, "attention.key_length"), c->head_dim);
    key_u32(j, own_key(c, name, "attention.value_length"), c->head_dim);
    key_float(j, own_key(c, name, "attention.layer_norm_rms_epsilon"), (double)c->rms_eps);
    key_float(j, own_key(c, name, "rope.freq_base"), c->rope_theta);
    if (c->n_expert) {
        key_u32(j, own_key(c, name, "expert_count"), c->n_expert);
        key_u32(j, own_key(c, name, "expert_used_count"), c->n_expert_used);
        key_u32(j, own_key(c, name, "expert_feed_forward_length"), c->n_ff_expert);
    }
    if (c->yarn_factor > 0) {
        key_text(j, own_key(c, name, "rope.scaling.type"), "yarn");
        key_float(j, own_key(c, name, "rope.scaling.factor"), c->yarn_factor);
        key_u32(j, own_key(c, name, "rope.scaling.original_context_length"), c->yarn_original_ctx);
        key_float(j, own_key(c, name, "rope.scaling.yarn_beta_fast"), c->yarn_beta_fast);
        key_float(j, own_key(c, name, "rope.scaling.yarn_beta_slow"), c->yarn_beta_slow);
        if (fabs(c->yarn_attn_factor - own) > 1e-6) key_float(j, own_key(c, name, "rope.scaling.attn_factor"), c->yarn_attn_factor / own);
    }
    if (s->temperature <= 0) return;
    key_float(j, "general.sampling.temp", (double)s->temperature);
    if (s->top_k) key_u32(j, "general.sampling.top_k", s->top_k);
    if (s->top_p > 0) key_float(j, "general.sampling.top_p", (double)s->top_p);
    if (s->min_p > 0) key_float(j, "general.sampling.min_p", (double)s->min_p);
}

/* Bytes as vocabularies write them */
static void put_word(qwen3i_buf *b, const qwen3i_tokenizer *t, uint32_t id) {
    static char alphabet[256][4];
    const char *p = t->bytes.p + t->texts[id].start;
    const uint32_t n = t->texts[id].length & ~QWEN3I_WHOLE;
    const int filled = alphabet[0xAD][0] != 0;      /* the last one */
    for (uint32_t c = 0; c < 0x144 && !filled; c++)
        if (qwen3i_alphabet(c) >= 0) qwen3i_utf8_put(alphabet[qwen3i_alphabet(c)], c);
    for (uint32_t i = 0; i < n; i++) put_bytes(b, alphabet[(unsigned char)p[i]], strlen(alphabet[(unsigned char)p[i]]));
}

static const qwen3i_added *added_of(const qwen3i_tokenizer *t, int id) {
    for (int i = 0; i < t->n_added; i++) if (t->added[i].id == id) return &t->added[i];
    return NULL;
}

/* Length, then text: the text comes first into the buffer `word`. */
static void put_token(job *j, qwen3i_buf *word, int id) {
    const qwen3i_tokenizer *t = j->model->tokenizer;
    const qwen3i_added *added = added_of(t, id);
    char pad[24];
    word->n = 0;
    snprintf(pad, sizeof pad, "[PAD%d]", id);
    if (added) put_bytes(word, added->p, added->length);
    else if (id < t->n_tokens && t->texts[id].length) put_word(word, t, (uint32_t)id);
    else put_bytes(word, pad, strlen(pad));
    put_string(&j->keys, word->p, word->n);
}

static int token_type(const qwen3i_tokenizer *t, int id) {
    const qwen3i_added *added = added_of(t, id);
    if (added) return added->kinds & QWEN3I_ADDED_SPECIAL ? QWEN3I_GGUF_CONTROL : QWEN3I_GGUF_USER;
    return id < t->n_tokens && t->texts[id].length ? QWEN3I_GGUF_NORMAL : QWEN3I_GGUF_UNUSED;
}

static void put_tokenizer_keys(job *j) {
    const qwen3_model *m = j->model;
    const qwen3i_tokenizer *t = m->tokenizer;
    const int n = m->config.n_vocab;
    qwen3i_buf word = qwen3i_buf_make(&heap);
    key_text(j, "tokenizer.ggml.model", t ? "gpt2" : "no_vocab");
    if (!t) return;
    key_text(j, "tokenizer.ggml.pre", "qwen2");
    key_array(j, "tokenizer.ggml.tokens", QWEN3I_GGUF_STRING, (uint64_t)n);
    for (int i = 0; i < n; i++) put_token(j, &word, i);
    key_array(j, "tokenizer.ggml.token_type", QWEN3I_GGUF_I32, (uint64_t)n);
    for (int i = 0; i < n; i++) put(&j->keys, (uint64_t)token_type(t, i), 4);
    key_array(j, "tokenizer.ggml.merges", QWEN3I_GGUF_STRING, t->n_pairs);
    for (uint32_t i = 0; i < t->n_pairs; i++) {
        word.n = 0;
        put_word(&word, t, t->pairs[i].left);
        put_bytes(&word, " ", 1);
        put_word(&word, t, t->pairs[i].right);
        put_string(&j->keys, word.p, word.n);
    }
    if (m->n_eos) key_u32(j, "tokenizer.ggml.eos_token_id", m->eos[0]);
    if (m->n_eos > 1) key_u32(j, "tokenizer.ggml.eot_token_id", m->eos[1]);
    if (m->info.end_of_text >= 0) key_u32(j, "tokenizer.ggml.padding_token_id", m->info.end_of_text);
    put_key(j, "tokenizer.ggml.add_bos_token", QWEN3I_GGUF_BOOL);
    put(&j->keys, 0, 1);
    qwen3i_buf_free(&word);
}

/* The file's bytes into b; nothing if there is none. */
static void read_beside(job *j, const char *name, qwen3i_buf *b) {
    char path[4096], part[4096];
    snprintf(path, sizeof path, "%s/%s", j->path, name);
    FILE *f = fopen(path, "rb");
    for (size_t n = 1; f && n > 0;) { n = fread(part, 1, sizeof part, f); put_bytes(b, part, n); }
    if (f) fclose(f);
}

static void put_template_key(job *j) {
    qwen3i_buf text = qwen3i_buf_make(&heap);
    qwen3i_str s;
    read_beside(j, "chat_template.jinja", &text);
    if (!text.n) {
        read_beside(j, "tokenizer_config.json", &text);
        qwen3i_json json = qwen3i_json_begin(text.p, text.n);
        s.n = 0;
        if (text.n && qwen3i_json_find(&json, "chat_template")) {
            if (qwen3i_json_peek(&json) == '[') s = qwen3i_template_of_list(&json);
            else if (!qwen3i_json_string(&json, &s)) s.n = 0;
        }
        text.n = s.n ? qwen3i_json_unescape(s, text.p) : 0;     /* it only ever shrinks */
    }
    if (text.n) key_string(j, "tokenizer.chat_template", text.p, text.n);
    qwen3i_buf_free(&text);
}

/* ---- tensors ------------------------------------------------------------------------------------------------- */
typedef struct part { const tensor *t; uint8_t *to; int begin, end; } part;      /* rows that a thread converts */

static void *convert(void *arg) {
    const part *p = (const part *)arg;
    const size_t from_row = (size_t)qwen3i_row_bytes(p->t->from.type, p->t->from.cols);
    const size_t to_row = (size_t)qwen3i_row_bytes(p->t->type, p->t->from.cols);
    for (int i = p->begin; i < p->end; i++) {
        const int rows = p->t->all ? p->t->all->rows : p->t->from.rows;
        const qwen3i_matrix *m = p->t->all ? &p->t->all[i / rows] : &p->t->from;
        const char *row = (const char *)m->data + (size_t)(i % rows) * from_row;
        if (p->t->type == p->t->from.type) memcpy(p->to + (size_t)i * to_row, row, to_row);
        else qwen3i_quantize(p->to + (size_t)i * to_row, p->t->type, row, p->t->from.type, p->t->from.cols);
    }
    return NULL;
}

static void convert_all(const job *j, const tensor *t, uint8_t *to) {
    part parts[64];
    const int n = j->threads, rows = t->from.rows;
    for (int i = 0; i < n; i++) {
        const part p = {t, to, (int)((int64_t)rows * i / n), (int)((int64_t)rows * (i + 1) / n)};
        parts[i] = p;
    }
#ifndef _WIN32
    pthread_t threads[64];
    int started = 0;
    for (int i = 1; i < n && pthread_create(&threads[i], NULL, convert, &parts[i]) == 0; i++) started = i;
    for (int i = started + 1; i < n; i++) convert(&parts[i]);
    convert(&parts[0]);
    for (int i = 1; i <= started; i++) pthread_join(threads[i], NULL);
#else
    for (int i = 0; i < n; i++) convert(&parts[i]);
#endif
}

static uint64_t tensor_bytes(const tensor *t) { return (uint64_t)t->from.rows * qwen3i_row_bytes(t->type, t->from.cols); }

static int write_bytes(job *j, const void *p, size_t n) {
    j->written += n;
    return n == 0 || fwrite(p, 1, n, j->out) == n;
}

static int write_padding(job *j) {
    static const char zeros[32] = {0};
    return write_bytes(j, zeros, (size_t)(-j->written % 32));
}

static int write_header(job *j) {
    qwen3i_buf b = qwen3i_buf_make(&heap);
    uint64_t at = 0;
    put_bytes(&b, "GGUF", 4);
    put(&b, 3, 4);
    put(&b, (uint64_t)j->n_tensors, 8);
    put(&b, j->n_keys, 8);
    put_bytes(&b, j->keys.p, j->keys.n);
    for (int i = 0; i < j->n_tensors; i++) {
        const tensor *t = &j->tensors[i];
        put_string(&b, t->name, strlen(t->name));
        put(&b, (uint64_t)t->rank, 4);
        put(&b, (uint64_t)t->from.cols, 8);
        if (t->rank > 1) put(&b, (uint64_t)(t->all ? t->all->rows : t->from.rows), 8);
        if (t->rank > 2) put(&b, (uint64_t)(t->from.rows / t->all->rows), 8);
        put(&b, (uint64_t)qwen3i_format_of(t->type)->gguf, 4);
        put(&b, at, 8);
        at += (tensor_bytes(t) + 31) / 32 * 32;
    }
    const int ok = write_bytes(j, b.p, b.n) && write_padding(j);
    qwen3i_buf_free(&b);
    return ok;
}

static void show(double done, const tensor *t) {
    char bar[41];
    const int n = (int)(done * 40);
    for (int i = 0; i < 40; i++) bar[i] = i < n ? '#' : ' ';
    bar[40] = '\0';
    fprintf(stderr, "\r[%s] %3d%%  %-28s %-5s", bar, (int)(done * 100), t ? t->name : "", t ? qwen3i_format_of(t->type)->name : "");
    if (!t) fprintf(stderr, "\n");
}

static int write_tensors(job *j, int terminal) {
    uint64_t all = 0, done = 0;
    for (int i = 0; i < j->n_tensors; i++) all += (uint64_t)j->tensors[i].from.rows * (uint64_t)j->tensors[i].from.cols;
    for (int i = 0; i < j->n_tensors; i++) {
        const tensor *t = &j->tensors[i];
        const size_t n = (size_t)tensor_bytes(t);
        uint8_t *to = (uint8_t *)malloc(n);
        if (!to) return fail("out of memory", t->name);
        if (terminal) show((double)done / (double)all, t);
        convert_all(j, t, to);
        const int ok = write_bytes(j, to, n) && write_padding(j);
        free(to);
        if (!ok) return fail("cannot write", strerror(errno));
        done += (uint64_t)t->from.rows * (uint64_t)t->from.cols;
    }
    if (terminal) show(1, NULL);
    return 0;
}

/* ---- the program --------------------------------------------------------------------------------------------- */
/* To a file beside first, so that what has the name is whole. */
static int write_file(job *j, const char *name) {
    char path[4096];
    int terminal = 0, bad;
#ifndef _WIN32
    terminal = isatty(2);
#endif
    snprintf(path, sizeof path, "%s.part", name);
    j->out = fopen(path, "wb");
    if (!j->out) return fail(path, strerror(errno));
    bad = write_header(j) ? write_tensors(j, terminal) : fail("cannot write", strerror(errno));
    if (fclose(j->out) != 0 && !bad) bad = fail("cannot write", strerror(errno));
    if (!bad && rename(path, name) != 0) bad = fail(name, strerror(errno));
    if (bad) remove(path);
    return bad;
}

static int quantize(job *j, const char *out) {
    const qwen3_info info = qwen3_get_info(j->model);
    j->keys = qwen3i_buf_make(&heap);
    int bad = list_tensors(j);
    if (!bad && !qwen3i_is_directory(&heap, j->path)) bad = put_gguf_keys(j);
    else if (!bad) {
        put_config_keys(j);
        put_tokenizer_keys(j);
        put_template_key(j);
    }
    put_own_keys(j);
    if (!bad) bad = write_file(j, out);
    if (!bad) printf("%s: %s, %.1f MB, %.2f bits a weight (was %.1f MB)\n", out, j->to->name, (double)j->written / 1e6,
                     8.0 * (double)j->written / (double)info.n_params, (double)info.weight_bytes / 1e6);
    qwen3i_buf_free(&j->keys);
    free(j->tensors);
    return bad;
}

int main(int argc, char **argv) {
    char err[512];
    qwen3_load_desc d;
    job j;
    memset(&d, 0, sizeof d);
    memset(&j, 0, sizeof j);
    for (int i = 0; argc >= 4 && i < QWEN3I_COUNT(kinds); i++) if (strcmp(argv[3], kinds[i].name) == 0) j.to = &kinds[i];
    if (argc < 4 || argc > 5 || !j.to) {
        fprintf(stderr, "usage: %s MODEL OUT.gguf Q8_0|Q6_K|Q5_K_M|Q4_K_M|Q4_0|AS_IS [threads]\n", argv[0]);
        return 2;
    }
    d.path = j.path = argv[1];
    j.threads = argc == 5 ? qwen3i_max(1, qwen3i_min(atoi(argv[4]), 64)) : 1;
#ifndef _WIN32
    if (argc == 4) j.threads = (int)qwen3i_max(1, qwen3i_min((int)sysconf(_SC_NPROCESSORS_ONLN), 64));
#endif
    if (qwen3_load(&j.model, &d, err, sizeof err) != QWEN3_OK) return fail("cannot load", err);
    const int bad = quantize(&j, argv[2]);
    qwen3_free(j.model);
    return bad;
}
