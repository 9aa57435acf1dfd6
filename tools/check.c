/* check - is a model's cache precise enough? How large its numbers get, and what rounding keys and values does to the
   next token. usage: build/check MODEL_DIR [-p TEXT | -f FILE] [--threads N]
   Exit status: 0 it can be used as it is, 1 it cannot be loaded, 2 wrong usage, 3 it should not be used as it is.

   The text is evaluated on the CPU three times, side by side, with caches of F32, F16 and BF16. A token's choice is
   that of the largest logit; its lead is how far the next one is behind. Rounding changes the choice if it moves the
   two against each other by more than the lead. How often that is to be expected follows from all movements and all
   leads in the text, each with each. docs/QWEN3_NUMERICAL_STABILITY_GUIDE.md explains the table. */
#define QWEN3_IMPLEMENTATION
#include "../qwen3.h"

enum { STEP = 256, MOST = 4096, N_VALUES = QWEN3_VALUE_RESIDUAL + 1 };
#define HALF_MOST 65504.0               /* F16 ends there */
#define NEAR_TIE  0.05                  /* a lead, in nats: two tokens as probable as one another, to a twentieth */
#define RARE      1e-4                  /* changes that are expected in a smaller share of the tokens are none */
#define MANY      1e-2                  /* ... and from this on they are no matter of near ties any more */

static const char sample[] =            /* to evaluate if there is nothing better */
    "The quick brown fox jumps over the lazy dog. int main(void) { return 42; } In 1687 Newton published the "
    "Principia; sqrt(2) is 1.41421356... \xE4\xBD\xA0\xE5\xA5\xBD\xEF\xBC\x8C\xE4\xB8\x96\xE7\x95\x8C";

typedef struct layer { double value[N_VALUES], score; } layer;

typedef struct rounding {               /* what a cache of 16 bits does, beside one of F32 */
    const char *name;
    int         kv_type;
    qwen3_ctx  *ctx;
    int         changed;                /* choices */
    double      surest;                 /* the largest lead that was lost */
    float      *moved;                  /* [MOST] the first two against each other */
} rounding;

typedef struct check {
    const qwen3_model *model;
    layer       *layers;                /* [n_layer] */
    const float *q;                     /* of the layer being shown */
    float       *scores;                /* [STEP] */
    int          broken;                /* first layer with a value that is not finite, counted from 1 */
    qwen3_ctx   *exact;
    rounding     by[2];
    float       *logits, *other;        /* [STEP, n_vocab] */
    float       *lead;                  /* [MOST] */
    int          n;                     /* tokens so far */
} check;

static void die(int status, const char *what, const char *detail) {
    fprintf(stderr, "check: %s%s%s\n", what, detail ? ": " : "", detail ? detail : "");
    exit(status);
}

static void *room(size_t n, size_t size) {
    void *p = calloc(n, size);
    if (!p) die(1, "out of memory", NULL);
    return p;
}

/* ---- how large the numbers get ---------------------------------------------------------------------- */
/* The largest |v|; infinite if one is not a number. */
static double most(const float *v, size_t n) {
    double largest = 0;
    for (size_t i = 0; i < n; i++) {
        const double size = fabs((double)v[i]);
        if (!(size <= FLT_MAX)) return HUGE_VAL;
        if (size > largest) largest = size;
    }
    return largest;
}

static double largest_score(const check *c, const float *k, int n, int kv_dim) {
    const qwen3i_config *g = &c->model->config;
    const qwen3i_simd *simd = qwen3i_simd_level(0);
    const int group = g->n_head / g->n_head_kv, q_dim = g->n_head * g->head_dim;
    double largest = 0;
    for (int i = 0; i < n; i++)
        for (int h = 0; h < g->n_head; h++) {
            const float *q = c->q + (size_t)i * (size_t)q_dim + (size_t)(h * g->head_dim);
            simd->dot(c->scores, 0, k + (size_t)(h / group * g->head_dim), (size_t)kv_dim, QWEN3I_F32, i + 1, q, 0, 1,
                      g->head_dim, 0);
            const double s = most(c->scores, (size_t)i + 1) / sqrt((double)g->head_dim);
            if (s > largest) largest = s;
        }
    return largest;
}

static void show(int at, qwen3_value what, const float *data, int n_rows, int width, void *user) {
    check *c = (check *)user;
    layer *l = &c->layers[at];
    const double size = most(data, (size_t)n_rows * (size_t)width);
    if (size > l->value[what]) l->value[what] = size;
    if (size > FLT_MAX && !c->broken) c->broken = at + 1;
    if (what == QWEN3_VALUE_Q) c->q = data;
    if (what != QWEN3_VALUE_K) return;
    const double score = largest_score(c, data, n_rows, width);
    if (score > l->score) l->score = score;
}

static void print_layers(const check *c) {
    const qwen3i_config *g = &c->model->config;
    puts("         gains of the norms           largest value                                     score\n"
         "layer  input     q     k   mlp     q      k      v mlp in product residual");
    for (int i = 0; i < g->n_layer; i++) {
        const qwen3i_layer *w = &c->model->weights.layers[i];
        const layer *l = &c->layers[i];
        printf("%5d  %5.3g %5.3g %5.3g %5.3g", i, most(w->attn_norm, (size_t)g->n_embd),
               most(w->q_norm, (size_t)g->head_dim), most(w->k_norm, (size_t)g->head_dim),
               most(w->mlp_norm, (size_t)g->n_embd));
        for (int k = 0; k < N_VALUES; k++)
            if (k != QWEN3_VALUE_ATTENTION) printf(" %*.4g", k == QWEN3_VALUE_RESIDUAL ? 8 : k > 3 ? 7 : 6, l->value[k]);
        printf(" %8.4g\n", l->score);
    }
}

/* ---- what rounding does to the next token ----------------------------------------------------------- */
static int largest_but(const float *v, int n, int but) {
    int best = -1;
    for (int i = 0; i < n; i++) if (i != but && (best < 0 || v[i] > v[best])) best = i;
    return best;
}

/* Token number `at`: its logits as they are and as a rounding makes them */
static void compare(check *c, rounding *r, int at, const float *z, const float *rounded) {
    const int n = c->model->config.n_vocab, first = largest_but(z, n, -1), second = n > 1 ? largest_but(z, n, first) : first;
    c->lead[at] = z[first] - z[second];
    r->moved[at] = fabsf((rounded[first] - rounded[second]) - c->lead[at]);
    if (largest_but(rounded, n, -1) == first) return;
    r->changed++;
    if ((double)c->lead[at] > r->surest) r->surest = (double)c->lead[at];
}

static void evaluate(qwen3_ctx *ctx, const qwen3_token *tokens, int n, float *logits) {
    qwen3_item item;
    memset(&item, 0, sizeof item);
    item.tokens = tokens; item.n = n; item.all_logits = logits;
    if (qwen3_eval(ctx, &item, 1) != QWEN3_OK) die(1, "cannot evaluate", qwen3_ctx_error(ctx));
}

static void step(check *c, const qwen3_token *tokens, int n) {
    const size_t n_vocab = (size_t)c->model->config.n_vocab;
    evaluate(c->exact, tokens, n, c->logits);
    for (int k = 0; k < 2; k++) {
        evaluate(c->by[k].ctx, tokens, n, c->other);
        for (int i = 0; i < n; i++)
            compare(c, &c->by[k], c->n + i, c->logits + (size_t)i * n_vocab, c->other + (size_t)i * n_vocab);
    }
    c->n += n;
}

/* In how many of all pairs of a movement and a lead is the lead the smaller one? Half of them go that way. */
static double expected(const check *c, const rounding *r) {
    double pairs = 0;
    for (int i = 0; i < c->n; i++)
        for (int k = 0; k < c->n; k++) pairs += r->moved[i] > c->lead[k];
    return pairs / 2 / c->n / c->n;
}

static int is_fine(const check *c, const rounding *r) { return r->changed == 0 && expected(c, r) < RARE; }

static void print_rounding(const check *c, const rounding *r) {
    double moved = 0;
    for (int i = 0; i < c->n; i++) if ((double)r->moved[i] > moved) moved = (double)r->moved[i];
    printf("%-4s cache: moves the first two tokens by up to %.2g nats; changes %d of %d next tokens", r->name, moved,
           r->changed, c->n);
    if (r->changed) printf(", with leads of up to %.2g", r->surest);
    printf("; %.2g in 10,000 are to be expected\n", 1e4 * expected(c, r));
}

/* ---- the verdict ------------------------------------------------------------------------------------ */
static double most_of(const check *c, qwen3_value what) {
    double largest = 0;
    for (int i = 0; i < c->model->config.n_layer; i++)
        if (c->layers[i].value[what] > largest) largest = c->layers[i].value[what];
    return largest;
}

/* Returns 0 if the model should not be used as it is. */
static int verdict(const check *c) {
    const rounding *f16 = &c->by[0];
    if (c->broken) {
        printf("verdict: BROKEN. Layer %d computes values that are not finite; its weights are damaged.\n", c->broken - 1);
        return 0;
    }
    print_rounding(c, &c->by[0]);
    print_rounding(c, &c->by[1]);
    if (most_of(c, QWEN3_VALUE_PRODUCT) > HALF_MOST || most_of(c, QWEN3_VALUE_RESIDUAL) > HALF_MOST)
        puts("note: values beyond 65504. Programs that compute in half precision fail on this model; this one does not.");
    if (most_of(c, QWEN3_VALUE_K) > HALF_MOST || most_of(c, QWEN3_VALUE_V) > HALF_MOST) {
        puts("verdict: keys or values do not fit into an F16 cache. Set qwen3_ctx_desc.kv_type to QWEN3_KV_F32.");
        return 0;
    }
    if (is_fine(c, f16)) {
        printf("verdict: fine. An F16 cache, the default, changes no next token of this text%s\n",
               is_fine(c, &c->by[1]) ? "; nor does BF16." : "; BF16 does, or may.");
        return 1;
    }
    if (f16->surest < NEAR_TIE && expected(c, f16) < MANY) {
        puts("verdict: near ties. An F16 cache, the default, changes next tokens only where the first two are about as "
             "probable\nas one another. To get all of them as float32 does, set qwen3_ctx_desc.kv_type to QWEN3_KV_F32.");
        return 1;
    }
    puts("verdict: an F16 cache changes next tokens. Set qwen3_ctx_desc.kv_type to QWEN3_KV_F32.");
    return 0;
}

/* ---- start ------------------------------------------------------------------------------------------ */
static qwen3_ctx *create(check *c, int kv_type, int n, int threads) {
    static qwen3_ctx_desc d;
    char err[512];
    qwen3_ctx *ctx;
    d.max_ctx = n;
    d.prefill_chunk = STEP;
    d.kv_type = kv_type;
    d.threads = threads;
    d.probe.show = kv_type == QWEN3_KV_F32 ? show : NULL;
    d.probe.user = c;
    if (qwen3_ctx_create(&ctx, c->model, &d, err, sizeof err) != QWEN3_OK) die(1, err, NULL);
    return ctx;
}

static char *read_file(const char *path) {
    FILE *f = fopen(path, "rb");
    char *bytes = (char *)room(1 << 20, 1);
    if (!f) die(2, "cannot read", path);
    bytes[fread(bytes, 1, (1 << 20) - 1, f)] = '\0';
    fclose(f);
    return bytes;
}

int main(int argc, char **argv) {
    static check c;
    static qwen3_load_desc load;
    static qwen3_token tokens[MOST];
    const char *text = sample;
    char err[512] = "", *file = NULL;
    qwen3_model *model;
    int threads = 0;
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (argv[i][0] != '-' && !load.path) { load.path = argv[i]; continue; }
        if (strcmp(argv[i], "-p") == 0 && value)             text = value;
        else if (strcmp(argv[i], "-f") == 0 && value)        text = file = read_file(value);
        else if (strcmp(argv[i], "--threads") == 0 && value) threads = atoi(value);
        else die(2, "usage: check MODEL_DIR [-p TEXT | -f FILE] [--threads N]", NULL);
        i++;
    }
    if (!load.path) die(2, "usage: check MODEL_DIR [-p TEXT | -f FILE] [--threads N]", NULL);
    if (qwen3_load(&model, &load, err, sizeof err) != QWEN3_OK) die(1, err, NULL);
    const qwen3_info f = qwen3_get_info(model);
    const int most_tokens = f.max_ctx < MOST ? f.max_ctx : MOST, wanted = qwen3_encode(model, text, strlen(text), 0, tokens, MOST, NULL, 0);
    const int n = wanted < most_tokens ? wanted : most_tokens;
    if (n <= 0) die(2, "there is no text, or no tokenizer, to check the model with", NULL);
    c.model = model;
    c.layers = (layer *)room((size_t)f.n_layer, sizeof *c.layers);
    c.scores = (float *)room(STEP, sizeof *c.scores);
    c.lead = (float *)room(3 * MOST, sizeof *c.lead);
    c.logits = (float *)room((size_t)f.n_vocab, 2 * STEP * sizeof *c.logits);
    c.other = c.logits + (size_t)f.n_vocab * STEP;
    c.exact = create(&c, QWEN3_KV_F32, n, threads);
    for (int k = 0; k < 2; k++) {
        c.by[k].name = k ? "BF16" : "F16";
        c.by[k].ctx = create(&c, k ? QWEN3_KV_BF16 : QWEN3_KV_F16, n, threads);
        c.by[k].moved = c.lead + (k + 1) * MOST;
    }
    printf("%d tokens%s, evaluated in float32 on the CPU; absolute values\n", n, n < wanted ? " (the text is cut there)" : "");
    for (int at = 0; at < n && !c.broken; at += STEP) step(&c, tokens + at, n - at < STEP ? n - at : STEP);
    print_layers(&c);
    const int fine = verdict(&c);
    qwen3_ctx_free(c.exact);
    qwen3_ctx_free(c.by[0].ctx);
    qwen3_ctx_free(c.by[1].ctx);
    qwen3_free(model);
    free(c.layers); free(c.scores); free(c.lead); free(c.logits); free(file);
    return fine ? 0 : 3;
}
