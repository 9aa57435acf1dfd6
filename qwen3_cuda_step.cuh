/* qwen3_cuda_step.cuh - a decode step of one row in one launch, for QWEN3_CUDA_ONE_LAUNCH (sm_90a; an experiment, off
   by default: see docs/PERFORMANCE.md). One block for each multiprocessor, all running at once: 16 warps that compute
   and one that fetches this block's share of the weights, through all phases, into a ring in shared memory. So weights
   are on their way while the blocks wait for each other's results. These they exchange as values with tags: a reader
   polls the value itself, which needs no barrier, no fence and no reset.

   Rooms: helpers, products, attention, the kernel. */
#ifndef QWEN3_CUDA_STEP_CUH
#define QWEN3_CUDA_STEP_CUH

namespace {

#ifndef QWEN3_CUDA_EMULATED
/* Values that blocks of one launch exchange: each comes with a tag, in one access, so that who reads the expected tag
   has the value. */
struct tagged { float value; unsigned tag; };
struct tagged_pair { float first; unsigned first_tag; float second; unsigned second_tag; };

#ifdef QWEN3_WGMMA
/* A multiple of 16 bytes to shared memory, counted by the barrier. */
static __device__ __forceinline__ void fetch_bulk(void *dst, const void *src, unsigned bytes, mbarrier *r) {
    asm volatile("{ .reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
                 "[%3], once; }"
                 ::"r"(shared_address(dst)), "l"(src), "r"(bytes), "r"(shared_address(r)) : "memory");
}
static __device__ __forceinline__ void store_tagged(tagged *p, float value, unsigned tag) {
    const u64 both = (u64)tag << 32 | __float_as_uint(value);
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(both) : "memory");
}
static __device__ __forceinline__ tagged_pair load_tagged(const tagged *p) {
    u64 a, b;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(p) : "memory");
    const tagged_pair v = {__uint_as_float((unsigned)a), (unsigned)(a >> 32), __uint_as_float((unsigned)b),
                           (unsigned)(b >> 32)};
    return v;
}
static __device__ __forceinline__ float load_value(const tagged *p) {
    float v;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
/* Three values with one tag: 16 bytes in one access, too. */
static __device__ __forceinline__ void store_part(uint4 *p, float a, float b, float c, unsigned tag) {
    asm volatile("{ .reg .b64 x, y; .reg .b128 v; mov.b64 x, {%1, %2}; mov.b64 y, {%3, %4}; mov.b128 v, {x, y};\n"
                 "st.relaxed.gpu.global.b128 [%0], v; }"
                 ::"l"(p), "r"(__float_as_uint(a)), "r"(__float_as_uint(b)), "r"(__float_as_uint(c)), "r"(tag)
                 : "memory");
}
static __device__ __forceinline__ uint4 load_part(const uint4 *p) {
    uint4 v;
    asm volatile("{ .reg .b64 x, y; .reg .b128 v; ld.relaxed.gpu.global.b128 v, [%4]; mov.b128 {x, y}, v;\n"
                 "mov.b64 {%0, %1}, x; mov.b64 {%2, %3}, y; }"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
#endif
#endif

const int STEP_WARPS    = 16;
const int STEP_THREADS  = 32 * STEP_WARPS;      /* and a warp that fetches */
const int STEP_SUMS     = 64;           /* rows of a block's share whose sums are completed at a time */
const int STEP_SLOTS    = 32;           /* most slots of the ring */
const int STEP_SPLITS   = 32;           /* most parts of the positions */
const int STEP_VECTORS  = 7;            /* most vectors of 8 weights of a row that a lane takes */

enum step_phase { STEP_QKV, STEP_ATTENTION, STEP_JOIN, STEP_O_PROJ, STEP_MLP, STEP_DOWN, STEP_PHASES };

struct step_layer {                     /* of the products below, in this order; the head is one more layer's first */
    const half_t *w[4];
    float         scale[4];
    const float  *attn_norm, *mlp_norm, *q_norm, *k_norm;
};

enum step_kind { STEP_K_QKV, STEP_K_O, STEP_K_MLP, STEP_K_DOWN, STEP_K_HEAD, STEP_KINDS };

/* y = W x: what it connects, and how it is shared: rows by the blocks, vectors of each row by the warps of a team. */
struct step_product {
    const tagged *from, *residual;      /* residual NULL: nothing is added */
    tagged       *to;                   /* NULL: the logits */
    int           n, k, ld;             /* W [n, ld], zero from k on; with pairs [2 n, ld], rows i and n + i a pair */
    int           each, extra;          /* rows a block, and how many blocks have one more */
    int           pairs, team, teams, vectors;  /* warps that share a row, their number, vectors of a lane in a row */
    int           fetch, group;         /* rows or pairs fetched at a time, completed at a time */
    int           norm, next;           /* 0: none, 1: attn_norm, 2: mlp_norm before; y is the next layer's */
};

struct step_args {
    const step_layer *layers;           /* [n_layer + 1] */
    int           n_layer, n_head, n_head_kv, head_dim, splits;
    float         eps, attention_scale;
    step_product  products[STEP_KINDS];
    const half_t *embed;
    float         embed_scale;
    const float2 *rope;
    const row_info *rows;
    kv_layer      kv;                   /* of layer 0 ... */
    size_t        kv_layer_bytes;       /* ... and on to the next */
    int           kv_type;              /* 0: float32, 1: F16, 2: BF16 */
    tagged       *x, *x2, *q, *a, *m;   /* residual before attention and before the MLP; q, k, v; attention; MLP */
    uint4        *parts;                /* [n_head_kv, group * head_dim, splits]: see step_attention */
    unsigned      tag;                  /* of layer 0 */
    float        *logits;               /* [slots, n_vocab] */
    int           from, to;             /* phases: 0 embed, 1 + STEP_PHASES * layer + step_phase, last the head */
    const float  *plain_in;             /* not NULL: a single operation from here ... */
    float        *plain_out;            /* ... to here, x += included */
    int           slots, slot_bytes, in_flight;         /* of the ring */
    int           scratch_at, ring_at;  /* in shared memory */
};

/* Shared memory: */
const int STEP_BARRIERS = 32 * STEP_SLOTS, STEP_FULL_AT = 896, STEP_EMPTY_AT = STEP_FULL_AT + STEP_BARRIERS,
          STEP_SQUARES_AT = STEP_EMPTY_AT + STEP_BARRIERS,
          STEP_SUMS_AT = STEP_SQUARES_AT + 4 * STEP_WARPS,
          STEP_LAYERS_AT = STEP_SUMS_AT + 2 * 4 * STEP_WARPS * STEP_SUMS;
static_assert(sizeof(step_args) <= STEP_FULL_AT, "the arguments come first");

/* Which record of weights is next, and which of two arrays takes the next sums. */
struct step_turn { int slot; unsigned parity; int sums; };

#if defined(QWEN3_CUDA_EMULATED)
#define QWEN3_APART
#else
#define QWEN3_APART __noinline__        /* has registers of its own */
#endif

struct step_rows_of { int begin, end; };

static __device__ __forceinline__ step_rows_of step_share(const step_product &p) {
    const int b = block_x(), begin = b * p.each + (b < p.extra ? b : p.extra);
    const step_rows_of r = {begin, begin + p.each + (b < p.extra)};
    return r;
}

static __device__ __forceinline__ int step_kind_of(const step_args &a, int phase) {
    const int kind = (phase - 1) % STEP_PHASES;
    return (phase - 1) / STEP_PHASES == a.n_layer ? STEP_K_HEAD
           : kind == STEP_QKV                     ? STEP_K_QKV
           : kind == STEP_O_PROJ                  ? STEP_K_O
           : kind == STEP_MLP                     ? STEP_K_MLP
                                                  : STEP_K_DOWN;
}

#ifdef QWEN3_WGMMA
static __device__ __forceinline__ void next_slot(step_turn &t, const step_args &a) {
    if (++t.slot == a.slots) { t.slot = 0; t.parity ^= 1u; }
}

/* N times 2 values with this tag from i on, step apart, to `to`, times gain (NULL: 1), zero up to ld. Adds up the
   squares of this thread's. */
template <int N> static __device__ __forceinline__ void step_gather(float &sum, float *to, const tagged *from,
                                                                    unsigned tag, const float *gain, int i, int n,
                                                                    int ld) {
    const int step = 2 * STEP_THREADS;
    tagged_pair v[N];
    float2 g[N];
#pragma unroll
    for (int u = 0; u < N; u++) {
        const int at = i + u * step;
        g[u] = make_float2(1, 1);
        if (gain && at < n) g[u] = make_float2(__ldcg(gain + at), at + 1 < n ? __ldcg(gain + at + 1) : 0.0f);
    }
#pragma unroll
    for (int u = 0; u < N; u++) v[u] = load_tagged(from + (i + u * step < n ? i + u * step : 0));
#pragma unroll
    for (int u = 0; u < N; u++) {
        const int at = i + u * step;
        float a = 0, b = 0;
        if (at < n) {
            while (v[u].first_tag != tag || (v[u].second_tag != tag && at + 1 < n)) v[u] = load_tagged(from + at);
            a = v[u].first;
            b = at + 1 < n ? v[u].second : 0.0f;
        }
        sum += a * a + b * b;
        if (at < ld) *(float2 *)(void *)(to + at) = make_float2(a * g[u].x, b * g[u].y);
    }
}

/* The input of a product to shared memory. */
static __device__ __forceinline__ float step_input(float *to, const tagged *from, unsigned tag, const float *plain,
                                                   const float *gain, int n, int ld) {
    float sum = 0;
    int i = 2 * tid();
    if (plain) {
        for (; i < ld; i += 2 * STEP_THREADS)
            *(float2 *)(void *)(to + i) = make_float2(i < n ? plain[i] : 0.0f, i + 1 < n ? plain[i + 1] : 0.0f);
        return 0;
    }
    for (; i - 2 * tid() + 6 * STEP_THREADS < ld; i += 8 * STEP_THREADS)
        step_gather<4>(sum, to, from, tag, gain, i, n, ld);
    for (; i - 2 * tid() + 2 * STEP_THREADS < ld; i += 4 * STEP_THREADS)
        step_gather<2>(sum, to, from, tag, gain, i, n, ld);
    if (i - 2 * tid() < ld) step_gather<1>(sum, to, from, tag, gain, i, n, ld);
    return sum;
}

/* acc[j] of N rows, summed over the warp: the lanes from 32 / N j on have row j. */
static __device__ __forceinline__ float sum_rows(const float (&acc)[4]) {
    const bool high = lane_id() & 16, odd = lane_id() & 8;
    const float a = (high ? acc[2] : acc[0]) + __shfl_xor_sync(ALL, high ? acc[0] : acc[2], 16);
    const float b = (high ? acc[3] : acc[1]) + __shfl_xor_sync(ALL, high ? acc[1] : acc[3], 16);
    float v = (odd ? b : a) + __shfl_xor_sync(ALL, odd ? a : b, 8);
#pragma unroll
    for (int o = 4; o > 0; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
    return v;
}
static __device__ __forceinline__ float sum_rows(const float (&acc)[2]) {
    const bool high = lane_id() & 16;
    float v = (high ? acc[1] : acc[0]) + __shfl_xor_sync(ALL, high ? acc[0] : acc[1], 16);
#pragma unroll
    for (int o = 8; o > 0; o >>= 1) v += __shfl_xor_sync(ALL, v, o);
    return v;
}

/* N rows of a record (rows at .. at + (N - 1) step, those past the last one again) times x. */
template <int U, int N>
static __device__ __forceinline__ float step_rows(const unsigned char *record, int at, int step, int last,
                                                  int row_bytes, const int (&offset)[U], const float (&x)[U][8]) {
    float acc[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
        const int row = at + j * step;
        const unsigned char *w = record + (row < last ? row : last) * row_bytes;
        acc[j] = 0;
#pragma unroll
        for (int u = 0; u < U; u++) {
            float f[8];
            unpack(f, *(const uint4 *)(const void *)(w + offset[u]), half_t());
#pragma unroll
            for (int i = 0; i < 8; i++) acc[j] += f[i] * x[u][i];
        }
    }
    return sum_rows(acc);
}

/* Completes row (or pair) `row` = first + tid(): y = residual + sum, or silu(gate) * up. */
static __device__ __forceinline__ void step_finish(const step_args &a, const step_product &p, float scale, unsigned tag,
                                                   const float *sums, int row, float residual) {
    const int team = p.team;
    float v = 0, up = 0;
    sums += tid();
    for (int i = 0; i < team; i++) v += sums[i * STEP_SUMS];
    v *= scale;
    if (p.pairs) {
        for (int i = 0; i < team; i++) up += sums[i * STEP_SUMS + STEP_SUMS / 2];
        v = silu(v) * (up * scale);
    }
    v += residual;
    if (!p.to) a.logits[(size_t)(a.plain_in ? 0 : a.rows[0].out_slot) * p.n + row] = v;
    else if (a.plain_out) a.plain_out[row] = v;
    else store_tagged(p.to + row, v, tag + (unsigned)p.next);
}

/* A product: y = W x, with its norm before, and the residual or SwiGLU after. U: vectors of x that a lane has. */
template <int U> static __device__ QWEN3_APART step_turn step_project(int kind, int layer, step_turn t) {
    QWEN3_DYNAMIC_SHARED(memory);
    const step_args &a = *(const step_args *)(const void *)memory;
    mbarrier *full = (mbarrier *)(void *)(memory + STEP_FULL_AT), *empty = (mbarrier *)(void *)(memory + STEP_EMPTY_AT);
    float *squares = (float *)(void *)(memory + STEP_SQUARES_AT), *scratch = (float *)(void *)(memory + a.scratch_at);
    const step_layer &l = ((const step_layer *)(const void *)(memory + STEP_LAYERS_AT))[layer];
    const step_product &p = a.products[kind];
    const step_rows_of share = step_share(p);
    const int lane = lane_id(), team = warp_id() / p.team, part = warp_id() % p.team;
    const int row_bytes = p.ld * (int)sizeof(half_t), teams = p.teams, fetch = p.fetch, pairs = p.pairs;
    const float scale = l.scale[kind % 4], *gain = p.norm == 1 ? l.attn_norm : l.mlp_norm;
    const unsigned tag = a.tag + (unsigned)layer;
    const bool norm = p.norm && !a.plain_in;
    float x[U][8], r = 1;
    int offset[U];
    float sum = step_input(scratch, p.from, tag, a.plain_in, norm ? gain : NULL, p.k, p.ld);
    if (norm) {
        sum = warp_sum(sum);
        if (lane == 0) squares[warp_id()] = sum;
    }
    group_sync(1, STEP_THREADS);
    if (norm) {
        sum = 0;
#pragma unroll
        for (int i = 0; i < STEP_WARPS; i++) sum += squares[i];
        r = 1.0f / sqrtf(sum / (float)p.k + a.eps);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int at = ((u * p.team + part) * 32 + lane) * 8;
        const bool mine = at < p.ld && team < teams;
        offset[u] = mine ? at * (int)sizeof(half_t) : 0;        /* where it has none, 0 times something finite */
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            float4 v = make_float4(0, 0, 0, 0);
            if (mine) v = *(const float4 *)(const void *)(scratch + at + i);
            x[u][i] = v.x * r; x[u][i + 1] = v.y * r; x[u][i + 2] = v.z * r; x[u][i + 3] = v.w * r;
        }
    }
    for (int first = share.begin; first < share.end; first += p.group) {
        const int last = first + p.group < share.end ? first + p.group : share.end;
        float *sums = (float *)(void *)(memory + STEP_SUMS_AT) + t.sums * (STEP_WARPS * STEP_SUMS), residual = 0;
        t.sums ^= 1;
        if (p.residual && first + tid() < last)
            residual = a.plain_out ? a.plain_out[first + tid()] : load_value(p.residual + first + tid());
        for (int row = first; row < last; row += fetch) {
            const int n = row + fetch < last ? fetch : last - row, rows = pairs ? 2 * n : n;
            const unsigned char *record = memory + a.ring_at + t.slot * a.slot_bytes;
            float *to = sums + part * STEP_SUMS + row - first;
            barrier_wait(&full[t.slot], t.parity);
            for (int i = team; i < rows && team < teams; i += 4 * teams) {
                if (i + 2 * teams < rows) {
                    const float v = step_rows<U, 4>(record, i, teams, rows - 1, row_bytes, offset, x);
                    const int k = i + lane / 8 * teams;
                    if (lane % 8 == 0 && k < rows) to[k < n ? k : k - n + STEP_SUMS / 2] = v;
                } else {
                    const float v = step_rows<U, 2>(record, i, teams, rows - 1, row_bytes, offset, x);
                    const int k = i + lane / 16 * teams;
                    if (lane % 16 == 0 && k < rows) to[k < n ? k : k - n + STEP_SUMS / 2] = v;
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(&empty[t.slot]);
            next_slot(t, a);
        }
        group_sync(1, STEP_THREADS);
        if (first + tid() < last) step_finish(a, p, scale, tag, sums, first + tid(), residual);
    }
    return t;
}

/* The warp that fetches: all records of this block's shares, in the order in which they are used. Not more than a few
   are on their way at a time: they would be in the way of the exchanges. */
static __device__ QWEN3_APART void step_fetch() {
    QWEN3_DYNAMIC_SHARED(memory);
    const step_args &a = *(const step_args *)(const void *)memory;
    mbarrier *full = (mbarrier *)(void *)(memory + STEP_FULL_AT), *empty = (mbarrier *)(void *)(memory + STEP_EMPTY_AT);
    const step_layer *layers = (const step_layer *)(const void *)(memory + STEP_LAYERS_AT);
    step_turn t = {0, 0, 0}, landed = {0, 0, 0};
    int on_way = 0;
    for (int phase = a.from > 0 ? a.from : 1; phase < a.to; phase++) {
        const int kind = (phase - 1) % STEP_PHASES;
        if ((phase - 1) / STEP_PHASES < a.n_layer && (kind == STEP_ATTENTION || kind == STEP_JOIN)) continue;
        const step_product &p = a.products[step_kind_of(a, phase)];
        const step_rows_of share = step_share(p);
        const half_t *w = layers[(phase - 1) / STEP_PHASES].w[step_kind_of(a, phase) % 4];
        for (int first = share.begin; first < share.end; first += p.group) {
            const int last = first + p.group < share.end ? first + p.group : share.end;
            for (int row = first; row < last; row += p.fetch) {
                const int n = row + p.fetch < last ? p.fetch : last - row;
                const unsigned bytes = (unsigned)(n * p.ld) * (unsigned)sizeof(half_t);
                unsigned char *to = memory + a.ring_at + t.slot * a.slot_bytes;
                if (on_way == a.in_flight) {
                    barrier_wait(&full[landed.slot], landed.parity);
                    next_slot(landed, a);
                    on_way--;
                }
                barrier_wait(&empty[t.slot], t.parity ^ 1u);
                barrier_expect(&full[t.slot], p.pairs ? 2 * bytes : bytes);
                fetch_bulk(to, w + (size_t)row * p.ld, bytes, &full[t.slot]);
                if (p.pairs) fetch_bulk(to + bytes, w + (size_t)(p.n + row) * p.ld, bytes, &full[t.slot]);
                next_slot(t, a);
                on_way++;
            }
        }
    }
}

/* x = the embedding of the row's token, each block its share. */
static __device__ __forceinline__ void step_embed(const step_args &a) {
    const step_product &p = a.products[STEP_K_QKV];
    const int from = (int)((long long)block_x() * p.k / (int)gridDim.x),
              to = (int)((long long)(block_x() + 1) * p.k / (int)gridDim.x);
    const half_t *row = a.embed + (size_t)a.rows[0].token * p.ld;
    for (int i = from + tid(); i < to; i += STEP_THREADS)
        store_tagged(a.x + i, to_float(row[i]) * a.embed_scale, a.tag);
}

/* Head `head` of q, k and v (in this order), by one warp: two pairs of neighbours a turn, to lo and hi. */
static __device__ __forceinline__ void step_head(float2 (&lo)[TURNS], float2 (&hi)[TURNS], const step_args &a, int head,
                                                 unsigned tag) {
    const int half = a.head_dim / 2;
#pragma unroll
    for (int t = 0; t < TURNS; t++) {
        const int i = 2 * lane_id() + 64 * t;
        lo[t] = hi[t] = make_float2(0, 0);
        if (i >= half) continue;
        const tagged *from = a.q + (size_t)head * a.head_dim + i;
        tagged_pair x = load_tagged(from), y = load_tagged(from + half);
        while (x.first_tag != tag || x.second_tag != tag) x = load_tagged(from);
        while (y.first_tag != tag || y.second_tag != tag) y = load_tagged(from + half);
        lo[t] = make_float2(x.first, x.second);
        hi[t] = make_float2(y.first, y.second);
    }
}

/* This block's part of the positions, of kv head h. */
struct step_part { int h, split, begin, end, n; };

static __device__ __forceinline__ int step_length(const step_args &a, int n) {
    return round_up(ceil_div(n, a.splits), 8);
}
static __device__ __forceinline__ step_part step_part_of(const step_args &a) {
    step_part p;
    p.n = a.rows[0].position + 1;
    const int length = step_length(a, p.n);
    p.h = block_x() / a.splits;
    p.split = block_x() % a.splits;
    p.begin = p.split * length;
    p.end = p.begin + length < p.n ? p.begin + length : p.n;
    return p;
}

/* What attention needs of q, k and v of this row: q to shared memory [group, head_dim], times the scale of the
   scores; k and v, once rounded, to the cache and to shared memory [2, head_dim] if this part ends with them. */
template <class T> static __device__ __forceinline__ void step_rotate(const step_args &a, const step_layer &l,
                                                                      const step_part &p, const kv_layer &kv,
                                                                      const row_turn &turn, float *q, T *new_kv,
                                                                      unsigned tag) {
    const int group = a.n_head / a.n_head_kv, half = a.head_dim / 2, last = p.end == p.n ? group + 2 : group;
    const float scale = a.attention_scale * LOG2E;
    if (a.plain_in) {
        for (int i = tid(); i < group * a.head_dim; i += STEP_THREADS)
            q[i] = a.plain_in[(size_t)p.h * group * a.head_dim + i] * scale;
        return;
    }
    for (int g = warp_id(); g < last; g += STEP_WARPS) {
        const int kind = g < group ? 0 : g - group + 1;         /* q, k, v */
        const int head = kind == 0 ? p.h * group + g : kind == 1 ? a.n_head + p.h : a.n_head + a.n_head_kv + p.h;
        const size_t at = kv_at(kv, turn.seq, turn.position) + (size_t)p.h * a.head_dim;
        float2 lo[TURNS], hi[TURNS], gain_lo[TURNS], gain_hi[TURNS];
#pragma unroll
        for (int t = 0; t < TURNS; t++) {
            const int i = 2 * lane_id() + 64 * t;
            gain_lo[t] = gain_hi[t] = make_float2(0, 0);
            if (i >= half || kind == 2) continue;
            const float *gain = kind == 0 ? l.q_norm : l.k_norm;
            gain_lo[t] = *(const float2 *)(const void *)(gain + i);
            gain_hi[t] = *(const float2 *)(const void *)(gain + i + half);
        }
        step_head(lo, hi, a, head, tag);
        if (kind < 2) norm_rope(lo, hi, gain_lo, gain_hi, turn, a.head_dim, a.eps, 1.0f);
#pragma unroll
        for (int t = 0; t < TURNS; t++) {
            const int i = 2 * lane_id() + 64 * t;
            if (i >= half) continue;
            if (kind == 0) {
                store_2(q + g * a.head_dim + i, lo[t].x * scale, lo[t].y * scale);
                store_2(q + g * a.head_dim + i + half, hi[t].x * scale, hi[t].y * scale);
            } else {
                T *cache = (T *)(kind == 1 ? kv.k : kv.v) + at, *copy = new_kv + (kind - 1) * a.head_dim;
                store_2(cache + i, lo[t].x, lo[t].y);
                store_2(cache + i + half, hi[t].x, hi[t].y);
                store_2(copy + i, lo[t].x, lo[t].y);
                store_2(copy + i + half, hi[t].x, hi[t].y);
            }
        }
    }
}

/* Attention over this block's part of the positions: of its kv head's group G query heads at a time share the reads
   of k and v. The cache is read before q is there. parts[h, g, d, split] = unscaled sum, top, sum of weights, tag. */
template <class T, int G> static __device__ QWEN3_APART void step_attention_of(int layer) {
    QWEN3_DYNAMIC_SHARED(memory);
    const step_args &a = *(const step_args *)(const void *)memory;
    const step_layer &l = ((const step_layer *)(const void *)(memory + STEP_LAYERS_AT))[layer];
    const int U = sizeof(T) == 2 && G == 2 ? 2 : 1, dim = a.head_dim, group = a.n_head / a.n_head_kv;
    const int warp = warp_id(), lane = lane_id();
    const step_part part = step_part_of(a);
    const unsigned tag = a.tag + (unsigned)layer;
    if (part.h >= a.n_head_kv || part.begin >= part.n) return;
    int lanes = 1;
    while (lanes * 8 < dim) lanes *= 2;
    const int at = lane % lanes * 8, sub = lane / lanes, each = 32 / lanes, turn_positions = U * each * STEP_WARPS;
    const bool owner = at < dim;
    kv_layer kv = a.kv;
    kv.k = (char *)kv.k + (size_t)layer * a.kv_layer_bytes;
    kv.v = (char *)kv.v + (size_t)layer * a.kv_layer_bytes;
    qkv_args where;
    where.rope = a.rope; where.rows = a.rows; where.head_dim = dim;
    const int seq = a.rows[0].seq;
    const T *k = (const T *)kv.k + kv_at(kv, seq, 0) + (size_t)part.h * dim + at;
    const T *v = (const T *)kv.v + kv_at(kv, seq, 0) + (size_t)part.h * dim + at;
    const int old = a.plain_in ? part.n : part.n - 1;   /* positions that the cache has already */
    float *q = (float *)(void *)(memory + a.scratch_at), *out = q + round_up(group * dim, 4) + dim * 2,
          *out_top = out + STEP_WARPS * 2 * dim, *out_sum = out_top + STEP_WARPS * 2;
    T *new_kv = (T *)(void *)(q + round_up(group * dim, 4));
    kv_vector<T> kr[U], vr[U], next_k[U], next_v[U];
#define QWEN3_LOAD(p0)                                                                                                 \
    _Pragma("unroll") for (int u = 0; u < U; u++) {                                                                    \
        const int p = (p0) + (u * STEP_WARPS + warp) * each + sub;                                                     \
        next_k[u] = kv_load<T>(k + (size_t)p * kv.kv_dim, owner && p < part.end && p < old);                           \
        next_v[u] = kv_load<T>(v + (size_t)p * kv.kv_dim, owner && p < part.end && p < old);                           \
    }
    for (int g0 = 0; g0 < group; g0 += G) {
        QWEN3_LOAD(part.begin);
        if (g0 == 0) {
            step_rotate<T>(a, l, part, kv, load_turn(where, 0), q, new_kv, tag);
            group_sync(1, STEP_THREADS);
        }
        split_state<T, G> st;
#pragma unroll
        for (int g = 0; g < G; g++) {
            st.top[g] = LOWEST;
            st.sum[g] = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                st.o[g][i] = 0;
                st.q[g][i] = owner && g0 + g < group ? q[(g0 + g) * dim + at + i] : 0.0f;
            }
        }
        for (int p0 = part.begin; p0 < part.end; p0 += turn_positions) {
            const int first = p0 + warp * each + sub;
#pragma unroll
            for (int u = 0; u < U; u++) { kr[u] = next_k[u]; vr[u] = next_v[u]; }
            if (p0 + turn_positions < part.end) QWEN3_LOAD(p0 + turn_positions);
#pragma unroll
            for (int u = 0; u < U; u++)
                if (first + u * STEP_WARPS * each == old && owner && part.end > old) {
                    kr[u] = kv_load<T>(new_kv + at, true);
                    vr[u] = kv_load<T>(new_kv + dim + at, true);
                }
            split_scores<T, G, U>(st, kr, vr, part.end - first, STEP_WARPS * each, lanes);
        }
#pragma unroll
        for (int g1 = 0; g1 < G; g1 += 2) {     /* two heads at a time: joins the warps */
            if (g0 + g1 >= group) break;
            const int heads = group - g0 - g1 < 2 ? 1 : 2;
#pragma unroll
            for (int g = g1; g < g1 + 2; g++) {
                split_fold<T, G>(st, g, lanes);
                float *to = out + (warp * 2 + g - g1) * dim + at;
                if (lane < lanes && owner)
#pragma unroll
                    for (int i = 0; i < 8; i++) to[i] = st.o[g][i];
                if (lane == 0) { out_top[warp * 2 + g - g1] = st.top[g]; out_sum[warp * 2 + g - g1] = st.sum[g]; }
            }
            group_sync(1, STEP_THREADS);
            for (int i = tid(); i < heads * dim; i += STEP_THREADS) {
                const int g = i / dim, d = i % dim;
                float top = LOWEST, sum = 0, o = 0;
#pragma unroll
                for (int w = 0; w < STEP_WARPS; w++) top = fmaxf(top, out_top[w * 2 + g]);
#pragma unroll
                for (int w = 0; w < STEP_WARPS; w++) {
                    const float keep = exp2f(out_top[w * 2 + g] - top);
                    sum += out_sum[w * 2 + g] * keep;
                    o += out[(w * 2 + g) * dim + d] * keep;
                }
                store_part(a.parts + ((size_t)(part.h * group + g0 + g1 + g) * dim + d) * a.splits + part.split, o, top,
                           sum, tag);
            }
            group_sync(1, STEP_THREADS);
        }
    }
#undef QWEN3_LOAD
}

/* Joins the parts of this block's share of a kv head's outputs: a lane a part, added by exchange. */
static __device__ QWEN3_APART void step_join(int layer) {
    QWEN3_DYNAMIC_SHARED(memory);
    const step_args &a = *(const step_args *)(const void *)memory;
    const step_part part = step_part_of(a);
    if (part.h >= a.n_head_kv) return;
    const int n = a.n_head / a.n_head_kv * a.head_dim, active = ceil_div(part.n, step_length(a, part.n));
    const unsigned tag = a.tag + (unsigned)layer;
    int lanes = 1;
    while (lanes < a.splits) lanes *= 2;
    const int split = lane_id() % lanes, end = (part.split + 1) * n / a.splits, each = 32 / lanes;
    for (int base = part.split * n / a.splits + warp_id() * each; base < end; base += STEP_WARPS * each) {
        const int i = part.h * n + base + lane_id() / lanes;
        const bool mine = base + lane_id() / lanes < end && split < active;
        float o = 0, top = LOWEST, sum = 0;
        if (mine) {
            uint4 v = load_part(a.parts + (size_t)i * a.splits + split);
            while (v.w != tag) v = load_part(a.parts + (size_t)i * a.splits + split);
            o = __uint_as_float(v.x);
            top = __uint_as_float(v.y);
            sum = __uint_as_float(v.z);
        }
        float highest = top;
        for (int d = lanes / 2; d > 0; d >>= 1) highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, d));
        const float keep = mine ? exp2f(top - highest) : 0.0f;
        o *= keep;
        sum *= keep;
        for (int d = lanes / 2; d > 0; d >>= 1) {
            o += __shfl_xor_sync(ALL, o, d);
            sum += __shfl_xor_sync(ALL, sum, d);
        }
        if (split != 0 || !mine) continue;
        if (a.plain_out) a.plain_out[i] = o / sum;
        else store_tagged(a.a + i, o / sum, tag);
    }
}

static __device__ __forceinline__ void step_attention(const step_args &a, int layer) {
    const bool two = a.n_head <= 2 * a.n_head_kv;
    switch (2 * a.kv_type + two) {
        case 0:  step_attention_of<float, 4>(layer); break;
        case 1:  step_attention_of<float, 2>(layer); break;
        case 2:  step_attention_of<half_t, 4>(layer); break;
        case 3:  step_attention_of<half_t, 2>(layer); break;
        case 4:  step_attention_of<bf16_t, 4>(layer); break;
        default: step_attention_of<bf16_t, 2>(layer);
    }
}

static __device__ __forceinline__ step_turn step_run(const step_args &a, int phase, step_turn t) {
    const int layer = (phase - 1) / STEP_PHASES, kind = step_kind_of(a, phase);
    if (layer < a.n_layer && (phase - 1) % STEP_PHASES == STEP_ATTENTION) { step_attention(a, layer); return t; }
    if (layer < a.n_layer && (phase - 1) % STEP_PHASES == STEP_JOIN) { step_join(layer); return t; }
    switch (a.products[kind].vectors) {
        case 1:  return step_project<1>(kind, layer, t);
        case 2:  return step_project<2>(kind, layer, t);
        case 3:  return step_project<3>(kind, layer, t);
        case 4:  return step_project<4>(kind, layer, t);
        case 5:  return step_project<5>(kind, layer, t);
        case 6:  return step_project<6>(kind, layer, t);
        default: return step_project<STEP_VECTORS>(kind, layer, t);
    }
}
#endif

/* step: phases [from, to) of a decode step of one row; see step_args. Grid: one block for each multiprocessor, all
   running at once; STEP_THREADS + 32 threads. Order of the sums: lanes of a team's warps by exchange, then its warps in
   order; parts of the positions by exchange. Equals embed, rmsnorm, qkv_rope, attention, o_proj, mlp, down and the
   head's matvec, one after another. */
static __global__ void __launch_bounds__(STEP_THREADS + 32, 1) step_kernel(const step_args given) {
#ifdef QWEN3_WGMMA
    QWEN3_DYNAMIC_SHARED(memory);
    const step_args &a = *(const step_args *)(const void *)memory;
    step_layer *layers = (step_layer *)(void *)(memory + STEP_LAYERS_AT);
    for (int i = tid(); i <= given.n_layer; i += n_threads()) layers[i] = given.layers[i];
    if (threadIdx.x == 0) {
        *(step_args *)(void *)memory = given;
        for (int i = 0; i < given.slots; i++) {
            barrier_init((mbarrier *)(void *)(memory + STEP_FULL_AT) + i, 1);
            barrier_init((mbarrier *)(void *)(memory + STEP_EMPTY_AT) + i, STEP_WARPS);
        }
        barriers_ready();
    }
    __syncthreads();
    if (warp_id() == STEP_WARPS) {
        if (lane_id() == 0) step_fetch();
        return;
    }
    step_turn t = {0, 0, 0};
    if (a.from == 0) step_embed(a);
    for (int phase = a.from > 0 ? a.from : 1; phase < a.to; phase++) t = step_run(a, phase, t);
#else
    (void)given;
#endif
}

} /* namespace */
#endif
