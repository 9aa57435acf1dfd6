/* bench - measures how fast a model is evaluated, beside limits measured in the same run. See bench --help.
   Build: cc -O3 bench.c -o bench -lm -lpthread      (the Makefile adds CUDA where nvcc is found)            */
#define QWEN3_IMPLEMENTATION
#include "qwen3.h"
#include <ctype.h>
#include "tests/cuda_lab.h"

#ifdef QWEN3_WITH_CUDA
enum { HAVE_CUDA = 1 };
#else
enum { HAVE_CUDA = 0 };
static const qwen3_backend *no_backend(void) { return NULL; }
static const cuda_lab_functions *no_lab(void) { return NULL; }
#define qwen3_cuda_backend no_backend
#define cuda_lab_standard  no_backend
#define cuda_lab           no_lab
#endif
#ifdef QWEN3_WITH_FUSED_BASELINE
extern const char *lab_fused_baseline(const char *size);         /* tools/kernels.cu */
#endif

static const char usage[] =
    "usage: bench [MODEL | --random SIZE] [options]\n"
    "  --random SIZE   0.6B 1.7B 4B 8B 14B 32B 30B-A3B 235B-A22B: random weights made in memory (default: 0.6B)\n"
    "  --layers N      of random weights: so many layers (default: all)\n"
    "  --type T        of random weights: bf16 f16 f32 q8_0 q4_0 q4_k_m or another format of GGUF files (default bf16)\n"
    "  --tests LIST    ppN[@CTX] prefill of N tokens, tgN[@CTX] decode of N, after CTX tokens\n"
    "                  (default pp512,pp2048,tg128@512, of these what fits the model's positions)\n"
    "  --batch LIST    sequences decoded at once (default 1)\n"
    "  --sample        decode with temperature 0.6, top-k 20, top-p 0.95 instead of greedily\n"
    "  --repeat N      measurements of each test; the median counts (default 5)\n"
    "  --kernels LIST  with CUDA, single operations for N rows of one sequence, or, as N@CTX, one row of each of N\n"
    "                  sequences of CTX tokens: bytes, FLOP, and share of the limits (1@512,64@512,2048; \"\": none)\n"
    "  --first         time to the first token, in parts (--start: with CUDA's own start before, apart)\n"
    "  --draft LIST    decode once more with up to 8 guesses a step, of which this share is right, e.g. 0,0.6,0.8,1\n"
    "  --devices LIST  GPUs that share the model, as in 0,1 (shares of the stream are then of all of them)\n"
    "  --grammar FILE  decode once more, each batch, held to a JSON Schema: by turns with and without it\n"
    "  --tokenizer FILE    of random weights: a tokenizer.json, which a grammar needs\n"
    "  --draft-model M a directory or SIZE, which is asked for these guesses first: what asking costs, not what it says\n"
    "  --unpack        quantised weights become F16 on the GPU when they are loaded (QWEN3_LOAD_UNPACK)\n"
    "  --invariant     a token's bits are the same alone and among others (CUDA; see qwen3_ctx_desc)\n"
    "  --bf16          inputs of BF16 matrices are BF16, too (CPU; see qwen3_ctx_desc)\n"
    "  --chunk N --threads N --kv f32|f16|bf16|q8_0 --standard --cuda --cpu\n"
    "  --json          one JSON object a line\n"
    "  --fused-baseline    only: RMSNorm + QKV on the GPU beside a kernel that fuses them, for --random SIZE or all\n"
    "                  (make build/bench_fused makes a bench that has it)\n";

typedef struct options {
    const char *path, *random, *type, *tests, *batch, *kernels, *draft, *draft_model, *devices, *grammar, *tokenizer;
    int layers, invariant, unpack, bf16, own_tests, first, start, sample, repeat, chunk, threads, kv, standard, cuda, cpu, json, fused;
} options;

static void die(const char *what, const char *detail) {
    fprintf(stderr, "bench: %s%s%s\n", what, detail ? ": " : "", detail ? detail : "");
    exit(1);
}

static int whole(const char *flag, const char *value) {
    char *end;
    long v = value ? strtol(value, &end, 10) : 0;
    if (!value || *end || v < 0 || v > 1 << 30) die("bad or missing value after", flag);
    return (int)v;
}

static int kv_of(const char *name) {
    if (name && !strcmp(name, "f32"))  return QWEN3_KV_F32;
    if (name && !strcmp(name, "f16"))  return QWEN3_KV_F16;
    if (name && !strcmp(name, "bf16")) return QWEN3_KV_BF16;
    if (name && !strcmp(name, "q8_0")) return QWEN3_KV_Q8_0;
    die("bad or missing value after", "--kv");
    return 0;
}

static options parse(int argc, char **argv) {
    options o;
    int i;
    memset(&o, 0, sizeof o);
    o.type = "bf16"; o.batch = "1"; o.repeat = 5;
    for (i = 1; i < argc; i++) {
        const char *a = argv[i], *v = i + 1 < argc ? argv[i + 1] : NULL;
        if      (!strcmp(a, "--sample"))   o.sample = 1;
        else if (!strcmp(a, "--first"))    o.first = 1;
        else if (!strcmp(a, "--start"))    o.start = 1;
        else if (!strcmp(a, "--invariant")) o.invariant = 1;
        else if (!strcmp(a, "--unpack")) o.unpack = 1;
        else if (!strcmp(a, "--bf16"))      o.bf16 = 1;
        else if (!strcmp(a, "--standard")) o.standard = 1;
        else if (!strcmp(a, "--cuda"))     o.cuda = 1;
        else if (!strcmp(a, "--cpu"))      o.cpu = 1;
        else if (!strcmp(a, "--json"))     o.json = 1;
        else if (!strcmp(a, "--fused-baseline")) o.fused = 1;
        else if (!strcmp(a, "--help") || !strcmp(a, "-h")) { fputs(usage, stdout); exit(0); }
        else if (a[0] != '-' && !o.path)   o.path = a;
        else {
            if      (!strcmp(a, "--random"))  o.random = v;
            else if (!strcmp(a, "--type"))    o.type = v;
            else if (!strcmp(a, "--tests"))   o.tests = v;
            else if (!strcmp(a, "--kernels")) o.kernels = v;
            else if (!strcmp(a, "--batch"))   o.batch = v;
            else if (!strcmp(a, "--draft"))   o.draft = v;
            else if (!strcmp(a, "--devices")) o.devices = v;
            else if (!strcmp(a, "--grammar")) o.grammar = v;
            else if (!strcmp(a, "--tokenizer")) o.tokenizer = v;
            else if (!strcmp(a, "--draft-model")) o.draft_model = v;
            else if (!strcmp(a, "--layers"))  o.layers = whole(a, v);
            else if (!strcmp(a, "--repeat"))  o.repeat = whole(a, v);
            else if (!strcmp(a, "--chunk"))   o.chunk = whole(a, v);
            else if (!strcmp(a, "--threads")) o.threads = whole(a, v);
            else if (!strcmp(a, "--kv"))      o.kv = kv_of(v);
            else die("unknown argument (see --help)", a);
            if (!v) die("missing value after", a);
            i++;
        }
    }
    o.own_tests = !o.tests;
    if (!o.tests) o.tests = "pp512,pp2048,tg128@512";
    if (!o.path && !o.random && !o.fused) o.random = "0.6B";
    if (o.repeat < 1 || o.repeat > 100) die("--repeat is 1 to 100", NULL);
    return o;
}

/* ---- random models: the files of a checkpoint, made in memory --------------------------------------------- */
typedef struct shape { const char *name; int layers, embd, ff, heads, kv, tied, experts, used, expert_ff; } shape;
static const shape shapes[] = {         /* of the published models; head_dim 128, vocabulary 151,936 */
    {"0.6B", 28, 1024, 3072, 16, 8, 1, 0, 0, 0}, {"1.7B", 28, 2048, 6144, 16, 8, 1, 0, 0, 0}, {"4B", 36, 2560, 9728, 32, 8, 1, 0, 0, 0},
    {"8B", 36, 4096, 12288, 32, 8, 0, 0, 0, 0}, {"14B", 40, 5120, 17408, 40, 8, 0, 0, 0, 0}, {"32B", 64, 5120, 25600, 64, 8, 0, 0, 0, 0},
    {"30B-A3B", 48, 2048, 6144, 32, 4, 0, 128, 8, 768}, {"235B-A22B", 94, 4096, 12288, 64, 4, 0, 128, 8, 1536}
};
enum { VOCAB = 151936, HEAD = 128, POOL = 1 << 22 };

typedef struct builder { char *header; size_t at, cap, offset; const shape *s; const char *type; } builder;

/* What a matrix is stored as: q4_0 and q4_k_m are mixes, in which the embedding, and in q4_k_m some values and
   down-projections (part -1: none of these), have six bits. */
static qwen3i_type type_of(const builder *b, int layer, int part) {
    char name[16];
    qwen3i_str s;
    int i, n = b->s->layers, more = layer < n / 8 || layer >= 7 * n / 8 || (layer - n / 8) % 3 == 2;
    if (!strcmp(b->type, "q4_0") && layer < 0) return QWEN3I_Q6_K;
    if (!strcmp(b->type, "q4_k_m")) return layer < 0 || ((part == 6 || part == 10) && more) ? QWEN3I_Q6_K : QWEN3I_Q4_K;
    for (i = 0; b->type[i] && i < 15; i++) name[i] = (char)toupper((unsigned char)b->type[i]);
    s.p = name;
    s.n = (size_t)i;
    return qwen3i_type_of(s);
}

/* stack 0: [rows, cols]; rows 0, too: [cols] */
static void add_stack(builder *b, const char *name, int stack, int rows, int cols, qwen3i_type type) {
    size_t n = (size_t)(stack ? stack : 1) * (size_t)(rows ? rows : 1) * (size_t)qwen3i_row_bytes(type, cols);
    char dims[48];
    snprintf(dims, sizeof dims, stack ? "%d,%d,%d" : rows ? "%.0d%d,%d" : "%.0d%.0d%d", stack, rows, cols);
    b->at += (size_t)snprintf(b->header + b->at, b->cap - b->at, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%llu,%llu]}",
                              b->at > 1 ? "," : "", name, qwen3i_format_of(type)->name, dims, (unsigned long long)b->offset,
                              (unsigned long long)(b->offset + n));
    b->offset += n;
}

static void add_tensor(builder *b, const char *name, int rows, int cols, qwen3i_type type) {
    add_stack(b, name, 0, rows, cols, type);
}

/* In place of an MLP, all experts in two tensors. A router is never in blocks. */
static void add_experts(builder *b, int i) {
    const shape *s = b->s;
    char name[96];
    snprintf(name, sizeof name, "model.layers.%d.mlp.gate.weight", i);
    add_tensor(b, name, s->experts, s->embd, qwen3i_is_block(type_of(b, i, 0)) ? QWEN3I_F16 : type_of(b, i, 0));
    snprintf(name, sizeof name, "model.layers.%d.mlp.experts.gate_up_proj", i);
    add_stack(b, name, s->experts, 2 * s->expert_ff, s->embd, type_of(b, i, 8));
    snprintf(name, sizeof name, "model.layers.%d.mlp.experts.down_proj", i);
    add_stack(b, name, s->experts, s->embd, s->expert_ff, type_of(b, i, 10));
}

static void add_layer(builder *b, int i) {
    const shape *s = b->s;
    static const char *const names[] = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm", "self_attn.q_proj",
        "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"};
    const int q = s->heads * HEAD, kv = s->kv * HEAD;
    const int rows[] = {0, 0, 0, 0, q, kv, kv, s->embd, s->ff, s->ff, s->embd};
    const int cols[] = {s->embd, s->embd, HEAD, HEAD, s->embd, s->embd, s->embd, q, s->embd, s->embd, s->ff};
    char name[96];
    int k;
    for (k = 0; k < (s->experts ? 8 : 11); k++) {
        snprintf(name, sizeof name, "model.layers.%d.%s.weight", i, names[k]);
        add_tensor(b, name, rows[k], cols[k], rows[k] ? type_of(b, i, k) : QWEN3I_F16);
    }
    if (s->experts) add_experts(b, i);
}

/* Values of about N(0, 0.02), in blocks scales and all of 2^-6 to 2^-7 as halves, repeated from a pool at odd distances:
   speed does not depend on them. */
static void fill_random(char *dst, size_t n, qwen3i_type type) {
    const size_t element = qwen3i_is_block(type) ? 2 : qwen3i_type_size(type), pool_bytes = POOL * element;
    char *pool = (char *)malloc(pool_bytes);
    uint64_t rng = 1;
    size_t i;
    if (!pool) die("out of memory", NULL);
    for (i = 0; i < POOL; i++) {
        uint64_t r = qwen3i_random(&rng);
        float f = ((float)(r & 0xFFFF) + (float)(r >> 16 & 0xFFFF) + (float)(r >> 32 & 0xFFFF) - 98302.5f) * (0.02f / 32768.0f);
        uint16_t h = type == QWEN3I_BF16 ? qwen3i_f32_to_bf16(f) : qwen3i_is_block(type) ? (uint16_t)(0x2424 + (r & 0x0303)) : qwen3i_f32_to_f16(f);
        if (type == QWEN3I_F32) memcpy(pool + 4 * i, &f, 4);
        else memcpy(pool + 2 * i, &h, 2);
    }
    for (i = 0; i < n; i += pool_bytes - 8191 * element)
        memcpy(dst + i, pool, n - i < pool_bytes ? n - i : pool_bytes);
    free(pool);
}

static qwen3_file make_weights(const shape *s, const char *type) {
    builder b;
    qwen3_file f;
    char *data;
    uint64_t length;
    int i;
    memset(&b, 0, sizeof b);
    b.s = s;
    b.type = type;
    if (!type_of(&b, -1, -1)) die("unknown --type", type);
    b.cap = 200u * (11u * (size_t)s->layers + 4u);
    b.header = (char *)malloc(b.cap);
    if (!b.header) die("out of memory", NULL);
    b.header[b.at++] = '{';
    add_tensor(&b, "model.embed_tokens.weight", VOCAB, s->embd, type_of(&b, -1, -1));
    for (i = 0; i < s->layers; i++) add_layer(&b, i);
    add_tensor(&b, "model.norm.weight", 0, s->embd, QWEN3I_F16);
    if (!s->tied) add_tensor(&b, "lm_head.weight", VOCAB, s->embd, type_of(&b, -1, -1));
    b.header[b.at++] = '}';
    while (b.at % 64 != 56) b.header[b.at++] = ' ';
    f.name = "model.safetensors";
    f.size = 8 + b.at + b.offset;
    data = (char *)malloc(f.size);
    if (!data) die("out of memory for random weights", s->name);
    length = b.at;
    memcpy(data, &length, 8);
    memcpy(data + 8, b.header, b.at);
    fill_random(data + 8 + b.at, b.offset, type_of(&b, 0, 0));
    f.data = data;
    free(b.header);
    return f;
}

static qwen3_file make_config(const shape *s, char *text, size_t cap) {
    qwen3_file f;
    int n;
    f.name = "config.json";
    f.data = text;
    n = snprintf(text, cap, s->experts ? "{\"model_type\":\"qwen3_moe\",\"architectures\":[\"Qwen3MoeForCausalLM\"],\"num_experts\":%d,"
        "\"num_experts_per_tok\":%d,\"moe_intermediate_size\":%d,\"norm_topk_prob\":true," :
        "{\"model_type\":\"qwen3\",\"architectures\":[\"Qwen3ForCausalLM\"],", s->experts, s->used, s->expert_ff);
    n += snprintf(text + n, cap - (size_t)n, "\"num_hidden_layers\":%d,\"hidden_size\":%d,"
        "\"intermediate_size\":%d,\"num_attention_heads\":%d,\"num_key_value_heads\":%d,\"head_dim\":%d,\"vocab_size\":%d,\"tie_word_embeddings\":%s,"
        "\"max_position_embeddings\":40960,\"rms_norm_eps\":1e-6,\"rope_theta\":1000000}", s->layers, s->embd, s->ff, s->heads, s->kv, HEAD, VOCAB, s->tied ? "true" : "false");
    f.size = (size_t)n;
    return f;
}

/* A file, kept until the program ends. */
static qwen3_file read_file(const char *path, const char *name) {
    enum { MOST = 1 << 24 };
    qwen3_file f;
    FILE *in = fopen(path, "rb");
    char *data = (char *)malloc(MOST);
    if (!in || !data) die("cannot read", path);
    f.name = name;
    f.size = fread(data, 1, MOST, in);
    f.data = data;
    fclose(in);
    return f;
}

/* Bytes of the experts that one row does not pick */
static uint64_t idle_bytes(const qwen3_model *m) {
    const qwen3i_config *c = &m->config;
    uint64_t bytes = 0;
    int i, k;
    for (i = 0; i < c->n_layer; i++) {
        const qwen3i_experts *e = m->weights.layers[i].experts;
        for (k = 0; e && k < 3; k++) {
            const qwen3i_matrix *w = k == 0 ? e->gate : k == 1 ? e->up : e->down;
            bytes += (uint64_t)(c->n_expert - c->n_expert_used) * (uint64_t)w->rows * qwen3i_row_bytes(w->type, w->cols);
        }
    }
    return bytes;
}

/* ---- limits ------------------------------------------------------------------------------------------------- */
typedef struct stream_job { const uint64_t *data; volatile uint64_t sink; } stream_job;

static void stream_part(void *arg, int begin, int end, int lane) {
    stream_job *job = (stream_job *)arg;
    uint64_t sum[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    size_t i, k;
    (void)lane;
    for (i = (size_t)begin << 17; i < (size_t)end << 17; i += 8) for (k = 0; k < 8; k++) sum[k] += job->data[i + k];
    job->sink += sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
}

static int compare_doubles(const void *a, const void *b) {
    return (*(const double *)a > *(const double *)b) - (*(const double *)a < *(const double *)b);
}

/* Bytes a second that all threads together read from memory: the limit of CPU decoding. */
static double cpu_stream(int threads) {
    enum { MIB = 1024 };
    qwen3_ctx_desc d;
    qwen3i_pool pool;
    stream_job job;
    uint64_t *data = (uint64_t *)malloc((size_t)MIB << 20);
    double best = 0;
    int i;
    memset(&d, 0, sizeof d);
    d.threads = threads;
    if (!data || qwen3i_pool_create(&pool, &d, NULL) != QWEN3_OK) die("out of memory", NULL);
    memset(data, 1, (size_t)MIB << 20);
    job.data = data;
    job.sink = 0;
    for (i = 0; i < 5; i++) {
        double t = qwen3i_now_ms();
        qwen3i_parallel(&pool, MIB, 8, stream_part, &job);
        t = (double)((size_t)MIB << 20) / (qwen3i_now_ms() - t) * 1e3;
        if (t > best) best = t;
    }
    qwen3i_pool_destroy(&pool);
    free(data);
    return best;
}

/* ---- tests ---------------------------------------------------------------------------------------------------- */
typedef struct bench {
    options opt;
    qwen3_model *model, *draft_model;
    qwen3_info info;
    qwen3_ctx *ctx, *draft;
    double stream;                      /* bytes a second; 0: not measured */
    double product;                     /* multiplications and additions a second, of a large F16 product; as above */
    uint64_t step_bytes;                /* weights read for one decode step */
    int n_devices;
    qwen3_grammar *grammar;             /* of --grammar; */
    int held;                           /* is decoding held to it? */
} bench;

static void must(const bench *b, qwen3_result r, const char *what) {
    if (r < 0) { fprintf(stderr, "bench: %s: %s: %s\n", what, qwen3_result_string(r), b->ctx ? qwen3_ctx_error(b->ctx) : ""); exit(1); }
}

/* Bring a sequence to n pseudo-random tokens. */
static void fill_sequence(bench *b, int seq, int n) {
    uint64_t rng = (uint64_t)seq;
    int i, have;
    qwen3_token *tokens;
    qwen3_item item;
    qwen3_seq_tokens(b->ctx, seq, &have);
    if (have >= n) { must(b, qwen3_seq_truncate(b->ctx, seq, n), "truncate"); return; }
    tokens = (qwen3_token *)malloc((size_t)n * sizeof *tokens);
    if (!tokens) die("out of memory", NULL);
    for (i = 0; i < n; i++) tokens[i] = (qwen3_token)(qwen3i_random(&rng) % (uint64_t)b->info.n_vocab);
    memset(&item, 0, sizeof item);
    item.seq = seq;
    item.tokens = tokens + have;
    item.n = n - have;
    must(b, qwen3_eval(b->ctx, &item, 1), "prefill");
    if (!qwen3_logits(b->ctx, seq)) must(b, QWEN3_ERR_DEVICE, "logits");     /* waits for the device */
    free(tokens);
}

/* Seconds for a prefill of n tokens after ctx others. */
static double time_prefill(bench *b, int n, int ctx) {
    double start;
    fill_sequence(b, 0, ctx);
    start = qwen3i_now_ms();
    fill_sequence(b, 0, ctx + n);
    return (qwen3i_now_ms() - start) * 1e-3;
}

/* Seconds for n decode steps of batch sequences, each ctx tokens long. */
static double time_decode(bench *b, int n, int ctx, int batch) {
    qwen3_sampler samplers[64], *list[64];
    int seqs[64], i;
    qwen3_token out[64];
    double start;
    for (i = 0; i < batch; i++) {
        fill_sequence(b, i, ctx > 0 ? ctx : 1);
        memset(&samplers[i], 0, sizeof samplers[i]);
        if (b->opt.sample) samplers[i] = qwen3_sampler_preset(QWEN3_THINKING, (uint64_t)i);
        if (b->held) samplers[i].grammar = b->grammar;
        list[i] = &samplers[i];
        seqs[i] = i;
    }
    must(b, qwen3_next_batch(b->ctx, seqs, batch, list, out, NULL), "decode");  /* captures graphs, refreshes logits */
    start = qwen3i_now_ms();
    for (i = 0; i < n; i++) must(b, qwen3_next_batch(b->ctx, seqs, batch, list, out, NULL), "decode");
    return (qwen3i_now_ms() - start) * 1e-3;
}

/* Seconds for n tokens of one reply, by streams; guesses: at most so many a step. */
static double time_reply(bench *b, int n, int ctx, int guesses) {
    qwen3_sampler sampler;
    qwen3_gen_desc gen;
    double start;
    fill_sequence(b, 0, ctx > 0 ? ctx : 1);
    if (!qwen3_logits(b->ctx, 0)) must(b, QWEN3_ERR_DEVICE, "logits");
    memset(&sampler, 0, sizeof sampler);
    if (b->opt.sample) sampler = qwen3_sampler_preset(QWEN3_THINKING, 1);
    memset(&gen, 0, sizeof gen);
    gen.sampler = &sampler;
    gen.max_tokens = n;
    gen.draft_tokens = guesses;
    gen.draft = guesses > 0 ? b->draft : NULL;
    start = qwen3i_now_ms();
    must(b, qwen3_generate(b->ctx, 0, &gen), "generate");
    return (qwen3i_now_ms() - start) * 1e-3;
}

/* The same reply without and with guesses of which a share is right, by turns; the fastest of each counts. */
static void run_draft(bench *b, const char *name, int n, int ctx, double share) {
    const int most = ctx + n + 2;
    qwen3_token *answer = (qwen3_token *)calloc((size_t)most + 16, sizeof *answer);
    const qwen3_token *tokens;
    double plain = 1e30, drafted = 1e30, t;
    uint64_t rng = 1;
    qwen3_stats before, after;
    int i, k, len;
    if (!answer) die("out of memory", NULL);
    time_reply(b, n, ctx, 0);
    tokens = qwen3_seq_tokens(b->ctx, 0, &len);
    for (i = 0; i < len; i++) {
        const int wrong = (double)(qwen3i_random(&rng) % 1000) >= 1000 * share;
        answer[i] = wrong ? (tokens[i] + 1) % b->info.n_vocab : tokens[i];
    }
    for (k = 0; k < b->opt.repeat; k++) {
        t = time_reply(b, n, ctx, 0);
        if (t < plain) plain = t;
        b->ctx->pace.answer = answer;
        before = qwen3_ctx_stats(b->ctx);
        t = time_reply(b, n, ctx, 8);
        after = qwen3_ctx_stats(b->ctx);
        b->ctx->pace.answer = NULL;
        if (t < drafted) drafted = t;
    }
    printf("%-14s guesses right %.2f: %10.1f tok/s, without %.1f: %.2f times; %d of %d accepted\n", name, share, n / drafted,
           n / plain, plain / drafted, (int)(after.n_accepted - before.n_accepted), (int)(after.n_drafted - before.n_drafted));
    printf("    a guess %.2f ms, a step with 0, 1, ... guesses", b->ctx->pace.draft_ms);
    for (i = 0; i <= 8; i++) printf(" %.2f", b->ctx->pace.step_ms[i]);
    printf(" ms (0: not tried)\n");
    fflush(stdout);
    free(answer);
}

static void run_drafts(bench *b, const char *name, int n, int ctx) {
    const char *at = b->opt.draft;
    char *end;
    while (at && *at) {
        const double share = strtod(at, &end);
        if (end == at || !(share >= 0 && share <= 1)) die("--draft is shares of 0 to 1", b->opt.draft);
        run_draft(b, name, n, ctx, share);
        at = *end ? end + 1 : end;
    }
}

/* The same steps without and with the grammar, by turns; the fastest of each counts. */
static void run_held(bench *b, const char *name, int n, int ctx, int batch) {
    double best[2] = {1e30, 1e30}, t;
    int i;
    for (i = -2; i < 2 * b->opt.repeat; i++) {          /* the first two warm up */
        b->held = i & 1;
        t = time_decode(b, n, ctx, batch);
        if (i >= 0 && t < best[i & 1]) best[i & 1] = t;
    }
    b->held = 0;
    printf("%-14s batch %-3d held to a grammar: %.1f tok/s, without %.1f: %.2f %% slower\n", name, batch,
           n * batch / best[1], n * batch / best[0], 100 * (best[1] / best[0] - 1));
    fflush(stdout);
}

static void make_grammar(bench *b) {
    const qwen3_file f = read_file(b->opt.grammar, "schema");
    qwen3_grammar_desc d;
    char err[256];
    memset(&d, 0, sizeof d);
    d.kind = QWEN3_GRAMMAR_JSON_SCHEMA;
    d.flags = QWEN3_GRAMMAR_MAY_BREAK_OFF | QWEN3_GRAMMAR_COMPACT;      /* never room for an end, nor only blanks */
    d.text = (const char *)f.data;
    d.n_bytes = f.size;
    if (qwen3_grammar_create(&b->grammar, b->model, &d, err, sizeof err) != QWEN3_OK) die(b->opt.grammar, err);
}

static void report(const bench *b, const char *name, int batch, int tokens, double *seconds, int n) {
    double median, limit = 0;
    qsort(seconds, (size_t)n, sizeof *seconds, compare_doubles);
    median = seconds[n / 2];
    if (name[0] == 't' && b->stream > 0) limit = (double)b->step_bytes * tokens / batch / median / b->stream;
    if (b->opt.json)
        printf("{\"test\":\"%s\",\"batch\":%d,\"backend\":\"%s\",\"device\":\"%s\",\"tokens_per_s\":%.2f,\"min\":%.2f,\"max\":%.2f,\"repeats\":%d,"
               "\"weight_bytes\":%llu,\"stream_bytes_per_s\":%.4g,\"share_of_stream\":%.4f}\n", name, batch, b->info.backend_name, b->info.device_name,
               tokens / median, tokens / seconds[n - 1], tokens / seconds[0], n, (unsigned long long)b->step_bytes, b->stream, limit);
    else if (limit > 0) printf("%-14s batch %-3d %10.1f tok/s  (%.1f to %.1f)  %5.1f %% of the stream limit\n", name, batch, tokens / median, tokens / seconds[n - 1], tokens / seconds[0], 100 * limit);
    else                printf("%-14s batch %-3d %10.1f tok/s  (%.1f to %.1f)\n", name, batch, tokens / median, tokens / seconds[n - 1], tokens / seconds[0]);
    fflush(stdout);
}

static void create_ctx(qwen3_ctx **out, const qwen3_model *model, const qwen3_ctx_desc *d) {
    char err[256];
    qwen3_ctx_free(*out);
    *out = NULL;
    if (model && qwen3_ctx_create(out, model, d, err, sizeof err) != QWEN3_OK) die("cannot create a context", err);
}

static void create(bench *b, int ctx, int batch) {
    qwen3_ctx_desc d;
    memset(&d, 0, sizeof d);
    d.max_ctx = ctx;
    d.max_seqs = batch;
    d.prefill_chunk = b->opt.chunk;
    d.kv_type = b->opt.kv;
    d.threads = b->opt.threads;
    create_ctx(&b->draft, b->draft_model, &d);
    d.invariant = b->opt.invariant;
    d.bf16 = b->opt.bf16;
    create_ctx(&b->ctx, b->model, &d);
}

/* ---- single operations of the CUDA backend ------------------------------------------------------------------------ */
typedef struct kernel_cost { double bytes, flop; } kernel_cost;     /* the least that must be moved, and computed */

static kernel_cost cost_of(const bench *b, lab_op op, int rows, int ctx) {
    const qwen3i_config *c = &b->model->config;
    const double n = rows, embd = c->n_embd, ff = c->n_ff, q = (double)c->n_head * c->head_dim,
                 kv = (double)c->n_head_kv * c->head_dim;
    const double w = (double)qwen3i_row_bytes(b->model->weights.layers[0].wq.type, 256) / 256,
                 cache = (double)qwen3i_type_size((qwen3i_type)b->ctx->desc.kv_type), act = rows > 8 && w < 4 ? 2 : 4;
    const double seen = ctx > 0 ? n * (ctx + 1) : n * (n + 1) / 2;  /* pairs of a row and a position that it sees */
    const double held = ctx > 0 ? seen : n;                         /* positions that must be read */
    const double most_rows = ctx > 0 ? 64 : 32, head_rows = n < most_rows ? n : most_rows, vocab = c->n_vocab;
    const double used = c->n_expert_used, experts = c->n_expert, wide = (double)c->n_ff_expert;
    kernel_cost k = {0, 0};
    if (experts > 0 && op == LAB_MLP) {         /* all of it; of weights what that many rows pick if they pick evenly */
        k.flop = 6 * n * used * embd * wide;
        k.bytes = 3 * w * embd * wide * experts * (1 - pow(1 - used / experts, n)) + n * embd * (8 + act);
        return k;
    }
    switch (op) {
        case LAB_NORM:      k.bytes = n * embd * (4 + act); break;
        case LAB_QKV_ROPE:  k.flop = 2 * n * embd * (q + 2 * kv);
                                   k.bytes = w * embd * (q + 2 * kv) + n * (embd * act + q * act + 2 * kv * cache); break;
        case LAB_ATTENTION: k.flop = 4 * seen * q; k.bytes = 2 * held * kv * cache + 2 * n * q * act; break;
        case LAB_O_PROJ:    k.flop = 2 * n * embd * q; k.bytes = w * embd * q + n * (q * act + 8 * embd); break;
        case LAB_MLP:       k.flop = 4 * n * embd * ff; k.bytes = 2 * w * embd * ff + n * (embd + ff) * act; break;
        case LAB_DOWN:      k.flop = 2 * n * embd * ff; k.bytes = w * embd * ff + n * (ff * act + 8 * embd); break;
        case LAB_HEAD:      k.flop = 2 * head_rows * embd * vocab;
                                   k.bytes = w * embd * vocab + head_rows * 4 * (embd + vocab); break;
        default: break;
    }
    return k;
}

static void time_kernel(bench *b, const char *name, lab_op op, int rows, int ctx) {
    const cuda_lab_functions *k = cuda_lab();
    const kernel_cost cost = cost_of(b, op, rows, ctx);
    double us[100], median, moved, computed;
    qwen3i_err err = qwen3i_ctx_err(b->ctx);
    int i;
    for (i = -1; i < b->opt.repeat; i++) {
        float t = 0;
        must(b, k->run(b->ctx->state, op, -1, 2 * b->info.n_layer, &t, &err), name);
        if (i >= 0) us[i] = (double)t;
    }
    qsort(us, (size_t)b->opt.repeat, sizeof *us, compare_doubles);
    median = us[b->opt.repeat / 2];
    moved = cost.bytes / (median * 1e-6 * b->stream);
    computed = cost.flop / (median * 1e-6 * b->product);
    if (b->opt.json)
        printf("{\"kernel\":\"%s\",\"rows\":%d,\"ctx\":%d,\"us\":%.3f,\"min\":%.3f,\"max\":%.3f,\"repeats\":%d,"
               "\"bytes\":%.0f,\"flop\":%.0f,\"share_of_stream\":%.4f,\"share_of_product\":%.4f}\n", name, rows, ctx, median, us[0],
               us[b->opt.repeat - 1], b->opt.repeat, cost.bytes, cost.flop, moved, computed);
    else
        printf("  %-10s %10.2f us (%.2f to %.2f) %9.2f MB %6.1f %% of the stream %9.3f GFLOP %6.1f %% of the product\n",
               name, median, us[0], us[b->opt.repeat - 1], cost.bytes * 1e-6, 100 * moved, cost.flop * 1e-9, 100 * computed);
    fflush(stdout);
}

/* Rows of a batch as the table's operations work on it: one of each sequence after ctx tokens, or all of one. */
static void set_rows(bench *b, int rows, int ctx) {
    qwen3i_err err = qwen3i_ctx_err(b->ctx);
    qwen3i_batch batch;
    int32_t *seqs = (int32_t *)malloc(3 * (size_t)rows * sizeof *seqs), *positions, *tokens;
    int i;
    if (!seqs) die("out of memory", NULL);
    positions = seqs + rows;
    tokens = positions + rows;
    memset(&batch, 0, sizeof batch);
    for (i = 0; i < rows; i++) {
        seqs[i] = ctx > 0 ? i : 0;
        positions[i] = ctx > 0 ? ctx : i;
        tokens[i] = 1 + i * 37 % (b->info.n_vocab - 1);
    }
    batch.tokens = tokens;
    batch.seqs = seqs;
    batch.positions = positions;
    batch.n_rows = rows;
    must(b, cuda_lab()->rows(b->ctx->state, &batch, &err), "rows");
    free(seqs);
}

static void run_kernels(bench *b, int rows, int ctx) {
    static const struct { const char *name; lab_op op; } ops[] = {
        {"norm", LAB_NORM}, {"qkv_rope", LAB_QKV_ROPE}, {"attention", LAB_ATTENTION},
        {"o_proj", LAB_O_PROJ}, {"mlp", LAB_MLP}, {"down", LAB_DOWN}, {"head", LAB_HEAD}
    };
    qwen3i_err err;
    int i;
    if (!b->opt.chunk && ctx == 0) b->opt.chunk = rows;
    create(b, ctx > 0 ? ctx + 2 : rows + 1, ctx > 0 ? rows : 1);
    err = qwen3i_ctx_err(b->ctx);
    if (b->product <= 0) {
        must(b, cuda_lab()->limits(b->ctx->state, &b->stream, &b->product, &err), "limits");
        b->stream *= b->n_devices;
        b->product *= b->n_devices;
        if (b->opt.json)
            printf("{\"limits\":\"%s\",\"stream_bytes_per_s\":%.5g,\"product_flop_per_s\":%.5g}\n", b->info.device_name,
                   b->stream, b->product);
        else
            printf("limits: stream read %.3f TB/s, F16 product %.1f TFLOP/s\n", b->stream * 1e-12, b->product * 1e-12);
    }
    if (b->n_devices > 1) return;       /* operations are of one device: the others would have to join in */
    for (i = 0; i < (ctx > 0 ? rows : 1); i++) fill_sequence(b, i, ctx > 0 ? ctx : rows);      /* nothing on zeros */
    set_rows(b, rows, ctx);
    must(b, cuda_lab()->run(b->ctx->state, LAB_EMBED, 0, 1, NULL, &err), "embed");
    if (!b->opt.json) printf("%d rows%s, microseconds by the device's clock, weights of all layers in turn\n", rows,
                             ctx > 0 ? " of as many sequences" : "");
    for (i = 0; i < QWEN3I_COUNT(ops); i++)
        if (ops[i].op != LAB_DOWN || !b->info.n_expert) time_kernel(b, ops[i].name, ops[i].op, rows, ctx);
}

static void all_kernels(bench *b) {
    char list[256], *at;
    const int chunk = b->opt.chunk;
    if (!b->opt.kernels || !*b->opt.kernels) return;
    if (strcmp(b->info.backend_name, "cuda")) die("--kernels needs the CUDA backend", NULL);
    snprintf(list, sizeof list, "%s", b->opt.kernels);
    for (at = strtok(list, ","); at; at = strtok(NULL, ",")) {
        int rows = 0, ctx = 0;
        if (sscanf(at, "%d@%d", &rows, &ctx) < 1 || rows < 1 || ctx < 0) die("--kernels takes N or N@CTX, not", at);
        run_kernels(b, rows, ctx);
        b->opt.chunk = chunk;
    }
}

/* ---- the first token ------------------------------------------------------------------------------------------- */
/* From the start of main(): loading, a context, a prompt, the first token and the one after it, which brings graphs. */
static void first_token(bench *b, double start, double loaded) {
    double at[5];
    qwen3_token t;
    int i;
    at[0] = loaded;
    if (b->info.max_ctx < 128) die("--first takes 128 positions; the model has fewer", NULL);
    create(b, 128, 1);
    at[1] = qwen3i_now_ms();
    fill_sequence(b, 0, 64);
    at[2] = qwen3i_now_ms();
    for (i = 3; i < 5; i++) {
        must(b, qwen3_next(b->ctx, 0, NULL, &t), "decode");
        at[i] = qwen3i_now_ms();
    }
    if (b->opt.json)
        printf("{\"first_token_ms\":%.1f,\"load\":%.1f,\"context\":%.1f,\"prompt_of_64\":%.1f,\"token\":%.1f,"
               "\"second_token\":%.1f}\n", at[3] - start, at[0] - start, at[1] - at[0], at[2] - at[1], at[3] - at[2], at[4] - at[3]);
    else
        printf("first token after %.0f ms: load %.0f, context %.0f, prompt of 64 tokens %.0f, token %.1f; the next one %.1f\n",
               at[3] - start, at[0] - start, at[1] - at[0], at[2] - at[1], at[3] - at[2], at[4] - at[3]);
}

/* One test: ppN[@CTX] or tgN[@CTX]. */
static void run_test(bench *b, const char *name, int batch) {
    double seconds[100];
    int n = 0, ctx = 0, i, decode = name[0] == 't', room;
    if (sscanf(name, decode ? "tg%d@%d" : "pp%d@%d", &n, &ctx) < 1 || n < 1 || n > 1 << 24 || ctx < 0 || ctx > 1 << 24)
        die("a test is ppN, ppN@CTX, tgN or tgN@CTX", name);
    room = ctx + n + 2;                                         /* decode looks so far ahead */
    if (!decode && room > b->info.max_ctx) room = ctx + n;
    if (room > b->info.max_ctx) {
        fprintf(stderr, "bench: %s needs %d positions, the model has %d: %s\n", name, room, b->info.max_ctx,
                b->opt.own_tests ? "left out" : "give --tests that fit");
        if (b->opt.own_tests) return;
        exit(1);
    }
    if (!decode) batch = 1;
    create(b, room, batch);
    if (decode) time_decode(b, 4, ctx, batch); else time_prefill(b, n, ctx);        /* warm up */
    for (i = 0; i < b->opt.repeat; i++) seconds[i] = decode ? time_decode(b, n, ctx, batch) : time_prefill(b, n, ctx);
    report(b, name, batch, n * batch, seconds, b->opt.repeat);
    if (decode && batch == 1) run_drafts(b, name, n, ctx);
    if (decode && b->grammar) run_held(b, name, n, ctx, batch);
}

static void run_batches(bench *b, const char *name) {
    char list[256], *at;
    snprintf(list, sizeof list, "%s", b->opt.batch);
    for (at = strtok(list, ","); at; at = strtok(NULL, ",")) {
        int batch = whole("--batch", at);
        if (batch < 1 || batch > 64) die("--batch is 1 to 64", at);
        run_test(b, name, batch);
        if (name[0] == 'p') return;     /* prefill is one sequence */
    }
}

static const shape *shape_of(const char *name) {
    int i;
    for (i = 0; i < QWEN3I_COUNT(shapes); i++) if (!strcmp(shapes[i].name, name)) return &shapes[i];
    return NULL;
}

/* The model in a directory, or of random weights. */
static qwen3_model *load_model(const options *o, const char *path, const char *random, int *n_devices) {
    qwen3_model *model = NULL;
    qwen3_load_desc d;
    qwen3_file files[3];
    char config[1024], err[512], *end;
    const char *at;
    qwen3_result r = QWEN3_ERR_DEVICE;
    int devices[16];
    memset(&d, 0, sizeof d);
    d.path = path;
    if (!path) {
        const shape *known = shape_of(random);
        shape s;
        if (!known) die("--random: sizes are 0.6B 1.7B 4B 8B 14B 32B 30B-A3B 235B-A22B, not", random);
        s = *known;
        if (o->layers) s.layers = o->layers;
        files[0] = make_config(&s, config, sizeof config);
        files[1] = make_weights(&s, o->type);
        d.files = files;
        if (o->tokenizer) files[2] = read_file(o->tokenizer, "tokenizer.json");
        d.n_files = 2 + (o->tokenizer != NULL);
    }
    for (at = o->devices; at && *at && d.n_devices < 16; at = *end == ',' ? end + 1 : end) {
        devices[d.n_devices++] = (int)strtol(at, &end, 10);
        if (end == at) die("--devices: numbers with commas between them, not", o->devices);
    }
    d.devices = devices;
    if (o->unpack) d.flags |= QWEN3_LOAD_UNPACK;
    if (HAVE_CUDA && !o->cpu) {
        d.backend = o->standard ? cuda_lab_standard() : qwen3_cuda_backend();
        r = qwen3_load(&model, &d, err, sizeof err);
    } else if (o->cuda) die("--cuda: this program was built without CUDA", NULL);
    if (r == QWEN3_ERR_DEVICE && !o->cuda) { d.backend = NULL; r = qwen3_load(&model, &d, err, sizeof err); }
    if (r != QWEN3_OK) die(qwen3_result_string(r), err);
    *n_devices = d.n_devices > 1 ? d.n_devices : 1;
    return model;
}

static void load(bench *b) {
    const options *o = &b->opt;
    const char *draft = o->draft_model;
    int n;
    b->model = load_model(o, o->path, o->random, &b->n_devices);
    if (draft) b->draft_model = load_model(o, shape_of(draft) ? NULL : draft, draft, &n);
    b->info = qwen3_get_info(b->model);
    b->step_bytes = b->info.weight_bytes - idle_bytes(b->model);
    if (b->model->weights.head.data != b->model->weights.embed.data)            /* an embedding of its own is looked up, not read */
        b->step_bytes -= (uint64_t)b->info.n_vocab * qwen3i_row_bytes(b->model->weights.embed.type, b->info.n_embd);
}

static void fused_baseline(const char *size) {
#ifdef QWEN3_WITH_FUSED_BASELINE
    const char *error = lab_fused_baseline(size);
    if (error) die("--fused-baseline", error);
#else
    (void)size;
    die("--fused-baseline: this program was built without it; build/bench_fused has it (make build/bench_fused)", NULL);
#endif
}

/* CUDA's own start, which the first program that uses a device pays; when it is over. */
static double start_cuda(double start) {
#ifdef QWEN3_WITH_CUDA
    const char *why = cuda_lab()->no_device();
    const double over = qwen3i_now_ms();
    if (why) die("--start", why);
    printf("CUDA's start: %.0f ms\n", over - start);
    return over;
#else
    return start;
#endif
}

int main(int argc, char **argv) {
    static bench b;
    char list[512], *name, *next;
    double start = qwen3i_now_ms(), loaded, pause;
    b.opt = parse(argc, argv);
    if (b.opt.fused) { fused_baseline(b.opt.random); return 0; }
    if (b.opt.start) start = start_cuda(start);
    load(&b);
    loaded = qwen3i_now_ms();
    if (b.opt.grammar) make_grammar(&b);
    if (!strcmp(b.info.backend_name, "cpu")) b.stream = cpu_stream(b.opt.threads);
    pause = qwen3i_now_ms() - loaded;                           /* is no part of the first token's time */
    if (!b.opt.json)
        printf("%s: %.2f billion parameters, %s, %.2f GB read a step; %s (%s)%s%.1f%s\n", b.opt.path ? b.opt.path : b.opt.random, (double)b.info.n_params * 1e-9,
               b.info.weight_type, (double)b.step_bytes * 1e-9, b.info.backend_name, b.info.device_name, b.stream > 0 ? "; memory stream " : "; ", b.stream * 1e-9, b.stream > 0 ? " GB/s" : "");
    if (b.opt.first) first_token(&b, start + pause, loaded + pause);
    all_kernels(&b);
    snprintf(list, sizeof list, "%s", b.opt.tests);
    for (name = list; name && *name; name = next) {
        next = strchr(name, ',');
        if (next) *next++ = '\0';
        run_batches(&b, name);
    }
    qwen3_ctx_free(b.ctx);
    qwen3_grammar_free(b.grammar);
    qwen3_ctx_free(b.draft);
    qwen3_free(b.model);
    qwen3_free(b.draft_model);
    return 0;
}
