/* qwen3.h - run Qwen3 language models from C. One file; MIT or public domain (see the end).

   DO THIS in exactly one C or C++ file, to create the implementation:

       #define QWEN3_IMPLEMENTATION
       #include "qwen3.h"

   Every other file just includes "qwen3.h". Nothing to link but the C library, its maths
   library and threads:  cc -O2 app.c -lm -lpthread      (for an i486, -latomic, too)

   HELLO WORLD (complete; `cc -O2 hello.c -lm -lpthread && ./a.out path/to/Qwen3-0.6B`)

    #include <stdio.h>
    #define QWEN3_IMPLEMENTATION
    #include "qwen3.h"

    static int put(const char *utf8, int n_bytes, int kind, void *user) {
        (void)kind; (void)user;
        return fwrite(utf8, 1, (size_t)n_bytes, stdout) == 0 || fflush(stdout) != 0;
    }

    int main(int argc, char **argv) {
        static qwen3_load_desc load; static qwen3_ctx_desc desc;   // all zero: all defaults
        static qwen3_chat_desc chat; static qwen3_gen_desc gen; static qwen3_msg msg;
        qwen3_sampler sampler = qwen3_sampler_preset(QWEN3_NON_THINKING, 42);
        qwen3_model *model = NULL; qwen3_ctx *ctx = NULL; char err[256] = "";
        qwen3_result r;

        load.path = argc > 1 ? argv[1] : "Qwen3-0.6B";
        msg.role = QWEN3_USER; msg.text = "What is the capital of France?";
        chat.msgs = &msg; chat.n_msgs = 1; chat.flags = QWEN3_CHAT_NO_THINK;
        gen.sampler = &sampler; gen.on_text = put;

        r = qwen3_load(&model, &load, err, sizeof err);
        if (r == QWEN3_OK) r = qwen3_ctx_create(&ctx, model, &desc, err, sizeof err);
        if (r == QWEN3_OK) r = qwen3_chat(ctx, 0, &chat, &gen);
        if (r < 0) fprintf(stderr, "%s: %s\n", qwen3_result_string(r), ctx ? qwen3_ctx_error(ctx) : err);
        qwen3_ctx_free(ctx); qwen3_free(model);
        return r < 0;
    }

   RECIPES: model, ctx (max_seqs 3), err and put as above; keep appends to a string; n, r: int, qwen3_result

    // Recipe: a reply by the frame, a token or a piece of the prompt at a time
    qwen3_msg msgs[2] = {{QWEN3_SYSTEM, "You keep a small shop."}, {QWEN3_USER, "What do you sell?"}};
    qwen3_chat_desc chat = {msgs, 2};
    qwen3_gen_desc gen = {NULL};
    qwen3_stream reply, *replies[1] = {&reply};
    gen.on_text = put;
    r = qwen3_stream_begin(ctx, 0, &chat, &gen, &reply);            // evaluates nothing yet
    while (r >= 0 && (r = qwen3_stream_step(ctx, replies, 1, 4000)) == QWEN3_MORE)
        draw_frame();                                               // at most 4 ms each frame

    // Recipe: several characters with one model and a shared system prompt
    qwen3_msg msgs[2] = {{QWEN3_SYSTEM, "You live in a village."}, {QWEN3_USER, "Hello!"}};
    qwen3_chat_desc shared = {msgs, 1, NULL, 0, QWEN3_CHAT_NO_REPLY_HEADER}, chat = {msgs, 2};
    qwen3_gen_desc gen = {NULL};
    qwen3_token tokens[512]; qwen3_stream reply[3], *replies[3];
    n = qwen3_chat_render(model, &shared, tokens, 512, err, sizeof err);
    r = (qwen3_result)qwen3_sync(ctx, 0, tokens, n, 0);             // evaluated once,
    for (int i = 0; i < 3 && r >= 0; i++) {
        r = qwen3_seq_copy(ctx, i, 0);                              // kept three times
        if (r >= 0) r = qwen3_stream_begin(ctx, i, &chat, &gen, replies[i] = &reply[i]);
    }
    while (r >= 0 && (r = qwen3_stream_step(ctx, replies, 3, 4000)) == QWEN3_MORE) draw_frame();

    // Recipe: save and restore a character, in the midst of a sentence if need be
    qwen3_sampler dice = qwen3_sampler_preset(QWEN3_NON_THINKING, 7);
    qwen3_token hello[3] = {40, 41, 42}, next;
    char mood[16] = "cheerful";
    qwen3_state state = {"character.state", NULL, 0, &dice, mood, sizeof mood};
    n = qwen3_sync(ctx, 0, hello, 3, 0);
    r = qwen3_seq_save(ctx, 0, &state);                             // tokens, cache, dice and mood
    if (r == QWEN3_OK) r = qwen3_seq_load(ctx, 1, &state);          // all as it was
    if (r == QWEN3_OK) r = qwen3_next(ctx, 1, &dice, &next);        // what would have followed

    // Recipe: tools; calls are held to the parameters, and taken out of the reply
    const char *tools[1] = {"{\"name\": \"price\", \"parameters\": {\"required\": [\"item\"], "
                            "\"properties\": {\"item\": {\"enum\": [\"rope\", \"lamp\"]}}}}"};
    char said[4096] = "", memory[8192];
    qwen3_msg msgs[3] = {{QWEN3_USER, "What is a rope?"}, {QWEN3_ASSISTANT}, {QWEN3_TOOL, "3 coins"}};
    qwen3_chat_desc chat = {msgs, 1, tools, 1, QWEN3_CHAT_TOOLS_REQUIRED};      // or _AUTO
    qwen3_gen_desc gen = {NULL};
    gen.max_tokens = 200; gen.on_text = keep; gen.user = said;
    r = qwen3_chat(ctx, 0, &chat, &gen);                            // the model asks,
    n = qwen3_reply_parse(said, strlen(said), 0, &msgs[1], memory, sizeof memory, err, sizeof err);
    for (int i = 0; i < msgs[1].n_calls; i++)
        printf("%s %s\n", msgs[1].calls[i].name, msgs[1].calls[i].arguments);
    chat.n_msgs = 3; chat.flags = QWEN3_CHAT_TOOLS_NONE; gen.on_text = put;
    if (r >= 0) r = qwen3_chat(ctx, 0, &chat, &gen);                // and goes on with the result

    // Recipe: an answer that is one of a few words, as JSON
    static const char schema[] = "{\"type\": \"object\", \"properties\": {\"action\": {\"enum\": "
        "[\"wait\", \"follow\", \"flee\"]}}, \"required\": [\"action\"], \"additionalProperties\": false}";
    qwen3_grammar_desc desc = {QWEN3_GRAMMAR_JSON_SCHEMA, schema, sizeof schema - 1, 0};
    qwen3_msg msg = {QWEN3_USER, "A wolf comes. What do you do?"}; qwen3_chat_desc chat = {&msg, 1};
    qwen3_gen_desc gen = {NULL}; qwen3_grammar *grammar = NULL;
    r = qwen3_grammar_create(&grammar, model, &desc, err, sizeof err);          // once
    gen.grammar = grammar; gen.on_text = put;
    if (r == QWEN3_OK) r = qwen3_chat(ctx, 0, &chat, &gen);         // {"action": "flee"}
    qwen3_grammar_free(grammar);

    // Recipe: embeddings and search (a Qwen3-Embedding model)
    const char *texts[2] = {"Rope, 3 coins", "A lamp with oil"};
    int size = qwen3_get_info(model).n_embd, best = 0;
    float *query = (float *)malloc(3 * (size_t)size * sizeof *query), score[2] = {0, 0};
    r = qwen3_embed(ctx, 0, "Find goods", "something to climb with", query);
    for (int i = 0; i < 2 && r == QWEN3_OK; i++) {                  // texts have no task
        float *text = query + (1 + i) * size;
        r = qwen3_embed(ctx, 0, NULL, texts[i], text);
        for (int k = 0; k < size; k++) score[i] += query[k] * text[k];      // cosine
    }
    if (score[1] > score[0]) best = 1;
    free(query); printf("%s\n", texts[best]);

    // Recipe: a model from a pak file in memory, mapped or read: weights are used where they are
    qwen3_file files[3]; qwen3_load_desc load = {NULL}; qwen3_model *packed = NULL;
    const char *names[3] = {"config.json", "tokenizer.json", "model.safetensors"};
    for (int i = 0; i < 3; i++) {
        files[i].name = names[i];
        files[i].data = pak_find(names[i], &files[i].size);
    }
    load.files = files; load.n_files = 3;
    r = qwen3_load(&packed, &load, err, sizeof err);
    qwen3_free(packed);                                             // then the pak may go

    // Recipe: your allocator and job system
    qwen3_ctx_desc own = {0}; qwen3_ctx *small = NULL; qwen3_token tokens[3] = {40, 41, 42};
    own.max_ctx = 256;
    own.allocator.alloc = my_alloc; own.allocator.free = my_free;   // aligned to 16 bytes
    own.jobs.parallel_for = my_parallel_for; own.threads = 2;       // no thread is created
    qwen3_memory needs = qwen3_ctx_memory(model, &own);             // known beforehand
    r = qwen3_ctx_create(&small, model, &own, err, sizeof err);
    if (r == QWEN3_OK) r = (qwen3_result)qwen3_sync(small, 0, tokens, 3, 0);
    if (r == QWEN3_OK) printf("%d KB\n", (int)(needs.host_bytes >> 10));
    qwen3_ctx_free(small);

    // Recipe: words that never come
    qwen3_bias never[8]; qwen3_token bad[8];
    qwen3_sampler polite = qwen3_sampler_preset(QWEN3_NON_THINKING, 1);
    qwen3_gen_desc gen = {&polite}; qwen3_msg msg = {QWEN3_USER, "Well?"}; qwen3_chat_desc chat = {&msg, 1};
    n = qwen3_encode(model, " damn", 5, 0, bad, 8, err, sizeof err);
    if (n > 0) { never[0].token = bad[0]; never[0].bias = -1e30f; } // its first token, in any case
    polite.bias = never; polite.n_bias = n > 0;                     // or .filter, with all logits
    gen.on_text = put;
    r = qwen3_chat(ctx, 0, &chat, &gen);

    // Recipe: continue a text (a base model), a line at most
    const char *text = "The shop was dark, and", *stop[1] = {"\n"};
    qwen3_token tokens[512]; qwen3_gen_desc gen = {NULL};
    n = qwen3_encode(model, text, strlen(text), 0, tokens, 512, err, sizeof err);
    gen.max_tokens = 40; gen.stop = stop; gen.n_stop = 1; gen.on_text = put;
    r = n < 0 ? (qwen3_result)n : (qwen3_result)qwen3_sync(ctx, 0, tokens, n, 0);
    if (r == QWEN3_OK) r = qwen3_generate(ctx, 0, &gen);

    // Recipe: words put into the model's mouth
    qwen3_msg msg = {QWEN3_USER, "Do you have a lamp?"}; qwen3_chat_desc chat = {&msg, 1};
    qwen3_token tokens[512]; qwen3_gen_desc gen = {NULL};
    gen.max_tokens = 60; gen.on_text = put;
    n = qwen3_chat_render(model, &chat, tokens, 500, err, sizeof err);
    if (n > 0 && n <= 500) n += qwen3_encode(model, "Aye, ", 5, 0, tokens + n, 512 - n, err, sizeof err);
    r = n < 0 ? (qwen3_result)n : (qwen3_result)qwen3_sync(ctx, 0, tokens, n, 0);
    if (r == QWEN3_OK) r = qwen3_generate(ctx, 0, &gen);            // it goes on from "Aye, "

    // Recipe: token by token, where ctx's cancel stops a call now and then
    qwen3_token token = 40; qwen3_item item = {0, &token, 1};
    char piece[64];
    for (r = qwen3_eval(ctx, &item, 1), n = 0; r >= 0 && r != QWEN3_END && n < 20;) {
        r = qwen3_next(ctx, 0, NULL, &token);
        if (r == QWEN3_STOPPED) continue;                           // nothing was changed: call again
        if (r == QWEN3_OK && ++n) qwen3_detokenize(model, &token, 1, 0, piece, sizeof piece);
    }

    // Recipe: a long conversation forgets its oldest turns, never the system prompt
    qwen3_msg msgs[41] = {{QWEN3_SYSTEM, "You keep a small shop."}};
    qwen3_chat_desc chat = {msgs, 40}; qwen3_gen_desc gen = {NULL}; int forgotten = 0;
    for (int i = 1; i < 40; i++) {
        msgs[i].text = "Hm.";
        msgs[i].role = i % 2 ? QWEN3_USER : QWEN3_ASSISTANT;
    }
    chat.max_prompt = 200; chat.n_forgotten = &forgotten;           // the rest is for the answer
    gen.on_text = put;
    r = qwen3_chat(ctx, 0, &chat, &gen);
    if (forgotten) printf("[%d messages forgotten]\n", forgotten);  // you may drop them, too

   WHAT IT RUNS
     Dense Qwen3 in Hugging Face layout (0.6B to 32B, base, chat, Thinking-2507, Instruct-2507,
     Embedding, Reranker): config.json, model.safetensors or shards with an index, tokenizer.json or
     vocab.json + merges.txt; weights in BF16, F16 or F32. The same models as a GGUF file, or the
     parts of a split one (load.path names the first). Mixtures of experts (30B-A3B,
     235B-A22B, Coder) in both layouts; on GPUs, experts in BF16, F16 or F32.
     The CPU backend below is the reference. qwen3_cuda.cu beside this file adds NVIDIA GPUs:
     compile it with nvcc, link it, and set load.backend = qwen3_cuda_backend(). Compiled with
     QWEN3_CUDA_NCCL (link NCCL, too) it divides a model among several: load.devices.

   MACROS, each defined (or not) before the include
     QWEN3_IMPLEMENTATION   emit the implementation in this file
     QWEN3_STATIC           make every function static: a private copy in this file
     QWEN3_MALLOC(size), QWEN3_FREE(ptr)    default allocator (malloc, free); define both or neither
     QWEN3_ASSERT(x)        checks for bugs of the library itself (assert); never for input
     QWEN3_NO_STDIO         no file access at all: load through desc.files or desc.io
     QWEN3_NO_MMAP          read files into memory instead of mapping them
     QWEN3_NO_THREADS       no thread pool; qwen3_ctx_desc.jobs still works
     QWEN3_NO_SIMD          plain C dot products only
     QWEN3_NO_GRAMMAR       no grammars, and no calls that are held to tools: both are ERR_UNSUPPORTED
     QWEN3_UNALIGNED_MOVES  MinGW's gcc: vector kernels, too; compile with -Wa,-muse-unaligned-vector-move,
                            as this compiler does not align the stack for them

   CONCEPTS
     A *model* is weights and tokenizer: immutable once loaded. A *context* holds the KV cache and
     the scratch memory of one user of a model; it contains max_seqs independent *sequences*, each a
     list of tokens that have been evaluated. Hand qwen3_chat the whole conversation each time: what
     the sequence already holds is found and not evaluated again.

   WORDS, as the comments use them
     row       the vector of one token in a batch; or a row of a weight matrix, one of its outputs
     batch     the rows that are evaluated in one step, of one sequence or of several
     chunk     the tokens of a long text that one step takes (prefill_chunk)
     step      one pass of a batch through all layers
     tile      rows of weights and rows of a batch that are multiplied together, in registers
     block     quantised weights that share a scale, 16 to 256 of them
     lane      a worker of a context: lane 0 is the caller's thread; of a vector register: one number
     group     the query heads that share a key/value head
     gain      the factors that a norm multiplies its result by
     kept      the logits after a sequence's last token, which the backend holds for the next choice

   THREADS
     Any number of threads may use one model at once (all functions that take a const qwen3_model).
     A context belongs to one thread at a time. Callbacks run on the calling thread, inside the call,
     and must not call functions on the same context. There are no globals.
     A context's own threads start with all signals blocked. After fork() the child can go on with a
     context, or free it: the CPU backend then works on the caller's thread alone. The calling thread
     needs 64 KB of stack, and 256 KB to compile a grammar (QWEN3_CHAT_TOOLS_*, too). Whatever its
     floating-point mode is, evaluation and choice use C's default.

   MEMORY
     Weights are mapped from the file and used in place. A context takes all its memory when it is
     created; evaluating, sampling and generating allocate nothing, but for the first use of a grammar in a
     sequence. Encoding and chat rendering allocate temporaries; a chat whose calls are held to tools keeps
     their grammar with the sequence. Everything goes through the allocator in the descriptor.

   ERRORS
     The library never prints, exits or aborts. A function that can fail returns a qwen3_result:
     0 or more is not an error, below 0 is. Details: the err buffer of qwen3_load and
     qwen3_ctx_create, qwen3_ctx_error() for everything on a context. A failed or cancelled
     call leaves a sequence with its tokens from before the call plus those whose evaluation was
     completed (qwen3_sync and qwen3_chat: the common prefix plus those); it can go on from there.
     Model files, saved states and text may hold any bytes.                                        */

#ifndef QWEN3_H
#define QWEN3_H
#include <stddef.h>
#include <stdint.h>

#define QWEN3_VERSION 100              /* 1.0.0: major * 100 + minor * 10 + patch */

#ifndef QWEN3_API
  #if defined(QWEN3_STATIC)
    #if defined(__GNUC__)
      #define QWEN3_API static __attribute__((unused))
    #else
      #define QWEN3_API static
    #endif
  #else
    #define QWEN3_API extern
  #endif
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t qwen3_token;
typedef struct qwen3_model   qwen3_model;    /* weights + tokenizer; immutable after load */
typedef struct qwen3_ctx     qwen3_ctx;      /* KV cache + scratch; one thread at a time  */
typedef struct qwen3_grammar qwen3_grammar;  /* what a text must be; immutable, safe from any thread */
typedef struct qwen3_backend qwen3_backend;  /* NULL means the CPU reference backend      */

/* ---- results ------------------------------------------------------------------------------- */
typedef enum qwen3_result {
    QWEN3_OK              =  0,
    QWEN3_END             =  1,  /* not an error: the model ended its turn, or a stop string came  */
    QWEN3_STOPPED         =  2,  /* not an error: a callback asked to stop                         */
    QWEN3_MORE            =  3,  /* not an error: there is more to come, call again                */
    QWEN3_ERR_ARG         = -1,  /* a parameter is out of range; nothing was done                  */
    QWEN3_ERR_MEMORY      = -2,  /* host allocation failed                                         */
    QWEN3_ERR_DEVICE_MEMORY = -3,/* device allocation failed                                       */
    QWEN3_ERR_DEVICE      = -4,  /* no usable device, or a CUDA error; free the context            */
    QWEN3_ERR_IO          = -5,  /* a file is missing or cannot be read                            */
    QWEN3_ERR_FORMAT      = -6,  /* not a model file, or damaged                                   */
    QWEN3_ERR_UNSUPPORTED = -7,  /* a valid file, but not a model that this build runs             */
    QWEN3_ERR_CONTEXT_FULL = -8, /* the sequence has no room for the tokens                        */
    QWEN3_ERR_MISMATCH    = -9   /* saved state belongs to another model, KV type or version       */
} qwen3_result;

/* ---- hooks: every field may be zero ---------------------------------------------------------- */
typedef struct qwen3_allocator {        /* set both functions or neither; called from the thread   */
    void *(*alloc)(size_t size, void *user);            /* that calls the library; at least 16-byte */
    void  (*free)(void *ptr, size_t size, void *user);  /* aligned; size is that given to alloc     */
    void   *user;                       /* An allocator that keeps less is refused (sqlite3_malloc) */
} qwen3_allocator;

typedef enum qwen3_log_level {
    QWEN3_LOG_ERROR = 1, QWEN3_LOG_WARN = 2, QWEN3_LOG_INFO = 3, QWEN3_LOG_DEBUG = 4
} qwen3_log_level;
typedef struct qwen3_logger {           /* no function: silence. One line a call, no newline */
    void (*log)(qwen3_log_level level, const char *message, void *user);
    void  *user;
} qwen3_logger;

/* The files of a model, in the order in which they are asked for: config.json; if they are there
   generation_config.json, tokenizer_config.json, added_tokens.json; tokenizer.json, or else vocab.json and
   merges.txt (without either the model has no text); chat_template.jinja if it is there; then
   model.safetensors, or else model.safetensors.index.json and the shards that it names. */
typedef struct qwen3_file {             /* a model file that is already in memory; borrowed: keep it */
    const char *name;                   /* alive until qwen3_free. The name has no directory:        */
    const void *data;                   /* "config.json", "model.safetensors", ...                   */
    size_t      size;                   /* Weights are used where they are: data may point into a    */
} qwen3_file;                           /* mapped archive, and nothing is copied                     */

typedef struct qwen3_io {               /* read callbacks: pak files, archives, network */
    int64_t (*size)(void *user, const char *name);     /* bytes in the file, or -1: there is none */
    int     (*read)(void *user, const char *name, uint64_t offset, void *dst, size_t size); /* 0 = ok */
    void   *user;
} qwen3_io;

typedef struct qwen3_jobs {             /* the host's job system, instead of threads of our own.   */
    void (*parallel_for)(void *user, int count, void (*fn)(void *arg, int index), void *arg);
    void  *user;                        /* calls fn(arg, 0..count-1), in any order, on any threads, */
} qwen3_jobs;                           /* and returns when all have returned. count is at most     */
                                        /* qwen3_ctx_desc.threads; with one it is never called      */

/* ---- model --------------------------------------------------------------------------------- */
enum {
    QWEN3_LOAD_VOCAB_ONLY = 1,          /* tokenizer and configuration only; no weights             */
    QWEN3_LOAD_NO_MMAP    = 2,          /* read the weights into memory: safe if the file changes   */
    QWEN3_LOAD_CHECK      = 4           /* also look for NaN and Inf in every weight (reads it all) */
};

enum {                                  /* how weights of 16 or 32 bits are kept; llama.cpp's mix of types */
    QWEN3_Q8_0   = 1,                   /* 8.5 bits a weight */
    QWEN3_Q4_K_M = 2                    /* 4.9 bits a weight or so: Q4_K, the more delicate ones in Q6_K */
};

typedef struct qwen3_load_desc {
    const char       *path;             /* exactly one of: a model directory or GGUF file (UTF-8) ... */
    const qwen3_file *files; int n_files;  /* ... its files in memory ...                           */
    qwen3_io          io;               /* ... or callbacks that read them. Of these two the path    */
                                        /* may name the GGUF file; else config.json is looked for,  */
                                        /* then any .gguf in files, or model.gguf through io        */
    const qwen3_backend *backend;       /* NULL: CPU; or qwen3_cuda_backend()                       */
    int               device;           /* index of the CUDA device; or ...                         */
    const int        *devices; int n_devices;  /* ... of several that share each layer's work: the widths  */
                                        /* of the model are divided by their number. Cancelling is  */
                                        /* then asked for between steps                             */
    int               rank, n_ranks;    /* this process is one of n_ranks, each with its device, that */
    const void       *nccl_id;          /* share a model; all have the same ncclUniqueId and make the */
                                        /* same calls in the same order. It is read while loading   */
    int               flags;            /* QWEN3_LOAD_*                                             */
    int               quantize;         /* 0: weights as they are; QWEN3_Q8_0 or QWEN3_Q4_K_M: smaller. */
                                        /* Takes a fraction of a microsecond a weight; tools/quantize.c */
                                        /* does it once for all                                     */
    int               threads;          /* for that, and for putting quantised directories into blocks; */
                                        /* 0: as many as contexts have. The result is the same      */
    int             (*progress)(float done, void *user);  /* done 0..1; nonzero return cancels      */
    void             *progress_user;
    qwen3_allocator   allocator;
    qwen3_logger      logger;
} qwen3_load_desc;

typedef enum qwen3_chat_style {         /* which chat template the model was trained with          */
    QWEN3_STYLE_HYBRID   = 0,           /* Qwen3: thinks unless QWEN3_CHAT_NO_THINK                */
    QWEN3_STYLE_THINKING = 1,           /* Thinking-2507: always thinks, prompt ends in <think>     */
    QWEN3_STYLE_INSTRUCT = 2,           /* Instruct-2507: never thinks                              */
    QWEN3_STYLE_NO_THINK = 3            /* never thinks: each prompt ends in a closed <think>       */
} qwen3_chat_style;

typedef struct qwen3_bias { qwen3_token token; float bias; } qwen3_bias;

/* Sampling parameters and state: a plain struct that the caller owns; all zero is greedy.
   Order: logit += bias; penalties; filter; temperature; top_k; top_p; min_p; draw.
     repeat_penalty r    of tokens seen in the last penalty_last_n: logit > 0 ? logit / r : logit * r
     presence_penalty    subtracted once from tokens seen there          (OpenAI's definition)
     top_k               keep the k most probable
     top_p               then the fewest of them whose probabilities add up to top_p
     min_p               then those with at least min_p times the largest probability
   Ties are broken towards the lower token id. The same logits, parameters and rng give the same
   token on every platform and backend: after the temperature the arithmetic is in integers.        */
typedef struct qwen3_sampler {
    float    temperature;               /* 0: greedy                                               */
    float    top_p;                     /* 0 or 1: off                                             */
    float    min_p;                     /* 0: off                                                  */
    int      top_k;                     /* 0: off                                                  */
    float    repeat_penalty;            /* 0 or 1: off                                             */
    float    presence_penalty;          /* 0: off                                                  */
    int      penalty_last_n;            /* tokens looked back at; 0: 256; -1: the whole sequence   */
    uint64_t rng;                       /* seed in, state out: keep it to replay                   */
    const qwen3_bias *bias; int n_bias; /* logit bias, e.g. -1e30f bans a token; borrowed           */
    void   (*filter)(float *logits, int n_vocab, const qwen3_token *seq, int n, void *user);
    void    *filter_user;               /* bans and the like: set logits to -1e30f (or -INFINITY) or so */
    const qwen3_grammar *grammar;       /* NULL, or what the answer must be; borrowed                      */
} qwen3_sampler;

typedef enum qwen3_preset {             /* Qwen's published recommendations */
    QWEN3_GREEDY       = 0,
    QWEN3_THINKING     = 1,             /* temperature 0.6, top_p 0.95, top_k 20 */
    QWEN3_NON_THINKING = 2              /* temperature 0.7, top_p 0.8,  top_k 20 */
} qwen3_preset;

typedef struct qwen3_info {
    int n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab;
    int max_ctx;                        /* positions the model was made for                        */
    int n_tokens;                       /* tokens with a text: ids 0 .. n_tokens-1; 0: no tokenizer */
    qwen3_token im_start, im_end, end_of_text, think_begin, think_end;  /* -1: the model has none   */
    qwen3_chat_style chat_style;
    qwen3_sampler sampler;              /* what generation_config.json or a GGUF's keys advise; rng 0 */
    uint64_t n_params, weight_bytes;
    const char *weight_type;            /* of most weights: "BF16", "Q4_K", ...; NULL: none are loaded     */
    uint64_t fingerprint;               /* of configuration and weights; ties saved states to them */
    int n_expert, n_expert_used;        /* of layers that are mixtures of experts; 0: all are dense */
    int has_head;                       /* 0: it makes embeddings only; logits are UNSUPPORTED      */
    const char *backend_name;           /* "cpu", "cuda"                                           */
    const char *device_name;            /* of the GPU, or the CPU's instruction set in use          */
} qwen3_info;

/* The version that the implementation was compiled from (QWEN3_VERSION). */
QWEN3_API int          qwen3_version(void);

/* A short static English name of r, e.g. "out of memory". Never NULL. */
QWEN3_API const char  *qwen3_result_string(qwen3_result r);

/* Load a model. On success *out owns everything and needs qwen3_free. On failure *out is NULL,
   everything is released and err (may be NULL) holds a message of at most err_size - 1 bytes that
   names the file, the key or tensor, and the reason. QWEN3_STOPPED when progress cancels. Without
   tokenizer files the model loads for token-level use. Blocking; safe from any thread.             */
QWEN3_API qwen3_result qwen3_load(qwen3_model **out, const qwen3_load_desc *desc, char *err, size_t err_size);

/* What files that only declare the library call instead: it first compares the QWEN3_VERSION that they
   were compiled with. MISMATCH if that is of another major or minor version than the library. */
QWEN3_API qwen3_result qwen3_load_for(int version, qwen3_model **out, const qwen3_load_desc *desc,
                                      char *err, size_t err_size);
#ifndef QWEN3_IMPLEMENTATION
  #define qwen3_load(out, desc, err, err_size) qwen3_load_for(QWEN3_VERSION, out, desc, err, err_size)
#endif

/* Release a model. NULL is fine. All of its contexts must have been freed before. */
QWEN3_API void         qwen3_free(qwen3_model *model);

/* Facts about a model, by value; the strings live as long as the model. */
QWEN3_API qwen3_info   qwen3_get_info(const qwen3_model *model);

/* Defined in qwen3_cuda.cu: link that file if you call this. Never NULL; without a usable GPU
   qwen3_load then fails with QWEN3_ERR_DEVICE and says why. */
extern const qwen3_backend *qwen3_cuda_backend(void);

/* ---- tokenizer: pure functions of the model, safe from any thread ----------------------------- */
enum {
    QWEN3_PARSE_SPECIAL = 1,            /* encode; default: "<|im_end|>" in text is plain text      */
    QWEN3_SHOW_SPECIAL  = 2             /* detokenize; default: control tokens are left out         */
};

/* Text (n_bytes of it, any bytes; invalid UTF-8 is read as U+FFFD) to tokens. Writes at most cap
   tokens to out (which may be NULL if cap is 0) and returns how many there are in all, which may be
   more than cap; or a negative qwen3_result, and then says why in err (may be NULL). With
   QWEN3_PARSE_SPECIAL, "<|im_end|>" and other added tokens in it are these tokens. */
QWEN3_API int          qwen3_encode(const qwen3_model *model, const char *text, size_t n_bytes, int flags,
                                    qwen3_token *out, int cap, char *err, size_t err_size);

/* Tokens to text. Writes at most cap bytes to out, the last of them a NUL, and returns how many there
   are in all without it; or ERR_ARG. Control tokens have no text unless flags has QWEN3_SHOW_SPECIAL.
   May begin or end within a character: streams deliver whole ones. */
QWEN3_API int          qwen3_detokenize(const qwen3_model *model, const qwen3_token *tokens, int n, int flags,
                                        char *out, int cap);

/* The bytes of a token, not NUL-terminated and perhaps not whole characters; owned by the model.
   NULL (and 0) for ids without text. */
QWEN3_API const char  *qwen3_token_bytes(const qwen3_model *model, qwen3_token token, int *n_bytes);

/* ---- chat ------------------------------------------------------------------------------------ */
typedef enum qwen3_role { QWEN3_SYSTEM = 0, QWEN3_USER = 1, QWEN3_ASSISTANT = 2, QWEN3_TOOL = 3 } qwen3_role;

typedef struct qwen3_tool_call {
    const char *name;
    const char *arguments;              /* a JSON object as text, inserted as it is */
} qwen3_tool_call;

typedef struct qwen3_msg {              /* strings are NUL-terminated UTF-8, borrowed for the call */
    qwen3_role  role;
    const char *text;                   /* NULL: empty. An assistant's may hold <think>...</think> */
    const char *reasoning;              /* assistant: its thinking, if kept apart from the text;    */
                                        /* with or without its tags                                 */
    const qwen3_tool_call *calls; int n_calls;  /* assistant: tool calls it made                  */
} qwen3_msg;

enum {
    QWEN3_CHAT_NO_THINK        = 1,     /* answer at once (the template's enable_thinking = false)   */
    QWEN3_CHAT_KEEP_THINKING   = 2,     /* leave the reasoning of earlier turns in the transcript.   */
                                        /* The template does not: the last turn is then evaluated    */
                                        /* again without it                                          */
    QWEN3_CHAT_NO_REPLY_HEADER = 4,     /* do not open the assistant's turn at the end               */
    QWEN3_CHAT_KEEP_TAGS       = 8,     /* the same for the empty tags that NO_THINK puts before a   */
                                        /* reply: leave them there                                   */
    /* Calls of tools, one of these at most; without any, whatever the model says. Held to: from <tool_call>
       to </tool_call> the text is a call of one of the tools, its arguments an object of that tool's
       "parameters" (a JSON Schema, see qwen3_grammar_create). Several calls may follow one another. */
    QWEN3_CHAT_TOOLS_NONE      = 16,    /* no call; the model is told of the tools all the same      */
    QWEN3_CHAT_TOOLS_AUTO      = 32,    /* calls or not; calls are held to the tools                 */
    QWEN3_CHAT_TOOLS_REQUIRED  = 64     /* the answer is one call or several, held to the tools      */
};

typedef struct qwen3_chat_desc {
    const qwen3_msg   *msgs;  int n_msgs;
    const char *const *tools; int n_tools;  /* each a JSON object as text: {"type": "function", ...} */
    int                flags;               /* QWEN3_CHAT_*                                         */
    int                max_prompt;          /* 0: all messages; else so many tokens at most: the    */
                                            /* oldest turns (a user's message and what follows it)  */
                                            /* are forgotten, never a system prompt or the last     */
                                            /* turn. Half of the room is freed at once, so that     */
                                            /* turns that follow find the rest evaluated            */
    int               *n_forgotten;         /* NULL, or out: messages that were left out for that   */
    const char        *tool;                /* NULL, or the name of the only one that may be called */
} qwen3_chat_desc;                          /* with TOOLS_AUTO and TOOLS_REQUIRED                   */

/* A conversation to tokens, exactly as the model's chat template renders it; the text of messages
   cannot produce control tokens. Returns the count needed, as qwen3_encode does, or a negative
   qwen3_result and in err (may be NULL) which part is wrong, e.g. "msgs[3].calls[0].arguments is
   NULL". Safe from any thread. */
QWEN3_API int          qwen3_chat_render(const qwen3_model *model, const qwen3_chat_desc *chat,
                                         qwen3_token *out, int cap, char *err, size_t err_size);

/* ---- context --------------------------------------------------------------------------------- */
enum { QWEN3_KV_DEFAULT = 0, QWEN3_KV_F32 = 1, QWEN3_KV_F16 = 2, QWEN3_KV_BF16 = 3,
       QWEN3_KV_Q8_0 = 4 }; /* on the CPU: 32 numbers of 8 bits share a scale; 53 % of F16's memory */

/* What a layer computes, in this order, for a probe: [n_rows, width] float32 */
typedef enum qwen3_value {
    QWEN3_VALUE_Q,          /* queries, normed and rotated: width n_head * head_dim                    */
    QWEN3_VALUE_K,          /* keys likewise, not yet rounded to the KV type: n_head_kv * head_dim     */
    QWEN3_VALUE_V,          /* values: n_head_kv * head_dim                                            */
    QWEN3_VALUE_ATTENTION,  /* what attention makes of these: n_head * head_dim                        */
    QWEN3_VALUE_MLP_INPUT,  /* the residual stream with that added, normalised: n_embd                 */
    QWEN3_VALUE_PRODUCT,    /* silu(gate) * up: n_ff                                                   */
    QWEN3_VALUE_RESIDUAL    /* the residual stream after the layer: n_embd                             */
} qwen3_value;
typedef struct qwen3_probe {
    void (*show)(int layer, qwen3_value what, const float *data, int n_rows, int width, void *user);
    void  *user;
} qwen3_probe;

typedef struct qwen3_ctx_desc {
    int   max_ctx;          /* positions in a sequence; 0: 4096, or the model's limit if lower        */
    int   max_seqs;         /* sequences; 0: 1                                                       */
    int   prefill_chunk;    /* tokens evaluated in one step; 0: the backend's choice                 */
    int   kv_type;          /* QWEN3_KV_*; default F16 (values beyond its range are clamped). Q8_0 needs */
                            /* the CPU and heads of a multiple of 32                                 */
    int   threads;          /* CPU threads, the caller's included; 0: as many as can run at once: affinity  */
                            /* and control groups are respected, slow cores of hybrid chips left out     */
    void *stream;           /* CUDA: a cudaStream_t of the caller's to work on; NULL: one of our own  */
    int   invariant;        /* CUDA: 1: a token's logits are the same bits alone and in a step with up to */
                            /* 15 others, of whatever sequences: a reply does not depend on who else */
                            /* is served, and speculation is exact. Steps of one token are slower    */
                            /* then. The CPU always does so, for steps of any size                   */
    float yarn_factor;      /* 0: as config.json says; else YaRN scaling, e.g. 4 for 131,072 positions */
    int (*cancel)(void *user);  /* polled often while evaluating; nonzero: the call returns STOPPED. */
    void *cancel_user;          /* Steps that are complete are kept. A step that is cancelled is lost, */
                                /* and the next call makes smaller ones; where even one token's was  */
                                /* cancelled, the next call carries its first through: calls with a  */
                                /* deadline always get on                                            */
    qwen3_probe     probe;      /* CPU: is shown what each layer computes, once a step */
    qwen3_jobs      jobs;
    qwen3_allocator allocator;  /* zero: the model's */
    qwen3_logger    logger;     /* zero: the model's */
} qwen3_ctx_desc;

/* device_bytes: of each device */
typedef struct qwen3_memory { uint64_t host_bytes, device_bytes; } qwen3_memory;
typedef struct qwen3_stats {
    int64_t n_prefill, n_decode;        /* tokens evaluated: in batches, and one by one (of guesses  */
                                        /* those that were right)                                   */
    int64_t n_reused;                   /* tokens that qwen3_sync and qwen3_chat did not have to     */
    double  prefill_ms, decode_ms;      /* wall time of those                                       */
    int64_t n_drafted, n_accepted;      /* tokens guessed and evaluated; of these right: see        */
                                        /* qwen3_gen_desc.draft_tokens                              */
} qwen3_stats;

/* What qwen3_ctx_create would take with this descriptor: exact, also where the host could not allocate it;
   UINT64_MAX for what 64 bits cannot say. Both 0 if the descriptor is not valid. */
QWEN3_API qwen3_memory qwen3_ctx_memory(const qwen3_model *model, const qwen3_ctx_desc *desc);

/* Create a context on a model, which must outlive it; desc may be NULL (all defaults). On failure
   *out is NULL and err (may be NULL) says why. */
QWEN3_API qwen3_result qwen3_ctx_create(qwen3_ctx **out, const qwen3_model *model, const qwen3_ctx_desc *desc,
                                        char *err, size_t err_size);
QWEN3_API void         qwen3_ctx_free(qwen3_ctx *ctx);              /* NULL is fine                        */
QWEN3_API const char  *qwen3_ctx_error(const qwen3_ctx *ctx);   /* detail of its last failure; "" if none */
QWEN3_API qwen3_stats  qwen3_ctx_stats(const qwen3_ctx *ctx);       /* since it was created                 */

/* ---- sequences and evaluation ------------------------------------------------------------------ */
typedef struct qwen3_item {             /* append n tokens to a sequence and evaluate them */
    int    seq;                         /* 0 .. max_seqs - 1; at most one item a sequence  */
    const qwen3_token *tokens; int n;
    float *all_logits;                  /* NULL, or [n, n_vocab] out                               */
    float *all_hidden;                  /* NULL, or [n, n_embd] out: states after the final norm   */
    float *hidden;                      /* NULL, or [n_embd] out: that of the last token           */
    float *logprobs;                    /* NULL, or [n] out: ln P(tokens[i] | all before it); 0 for */
                                        /* the first token of an empty sequence. No [n, n_vocab]    */
                                        /* is held: use this to score long texts                    */
    int    more;                        /* 1: the last token's logits are not needed, more follows  */
} qwen3_item;

/* Evaluate items, of several sequences at once if need be, in steps of prefill_chunk tokens. On
   STOPPED or an error the sequences keep the tokens of the steps that were completed. */
QWEN3_API qwen3_result qwen3_eval(qwen3_ctx *ctx, const qwen3_item *items, int n_items);

/* Make a sequence hold exactly these tokens, evaluating only what follows the common prefix: all of it
   (max_new 0), or at most max_new tokens, so that a long prompt can be brought in by pieces. Returns
   how many are still to come, 0 when it is done, or a negative qwen3_result. Cancelled, it returns
   that too: call again with the same tokens. */
QWEN3_API int          qwen3_sync(qwen3_ctx *ctx, int seq, const qwen3_token *tokens, int n, int max_new);

/* Logits [n_vocab] that follow the sequence's last token; NULL if it is empty or on error. Owned by
   ctx, valid until the next call on it. */
QWEN3_API const float *qwen3_logits(qwen3_ctx *ctx, int seq);

/* The tokens of a sequence; *n (n may be NULL) is how many. Owned by ctx, valid until the sequence
   changes. NULL and -1: there is no such sequence. */
QWEN3_API const qwen3_token *qwen3_seq_tokens(const qwen3_ctx *ctx, int seq, int *n);

/* Forget all tokens from position len on (0: all). Costs nothing. */
QWEN3_API qwen3_result qwen3_seq_truncate(qwen3_ctx *ctx, int seq, int len);

/* Make dst a copy of src, e.g. to share an evaluated system prompt. */
QWEN3_API qwen3_result qwen3_seq_copy(qwen3_ctx *ctx, int dst, int src);

/* Save a sequence and restore it: into any context of the same model with the same KV type, on either
   backend, in another process. Generation goes on bit for bit. What goes with it is up to the caller.
   A damaged or foreign state is an error (FORMAT, MISMATCH) and leaves everything as it was. A file is
   replaced in one piece, when all of it is written. */
typedef struct qwen3_state {
    const char *path;                   /* a file (UTF-8), ...                                      */
    void       *data;                   /* ... or memory. Save with neither: only tell the size     */
    uint64_t    size;                   /* in: bytes at data; out: bytes of the state               */
    qwen3_sampler *sampler;             /* NULL, or its numbers go with it; pointers in it stay     */
    void       *user;                   /* NULL, or bytes of the caller's: names, moods, a transcript */
    size_t      user_size;              /* save: how many. load: in: room at user; out: how many there */
} qwen3_state;                          /* are, which with a user of NULL is all that is done       */
QWEN3_API qwen3_result qwen3_seq_save(qwen3_ctx *ctx, int seq, qwen3_state *state);
QWEN3_API qwen3_result qwen3_seq_load(qwen3_ctx *ctx, int seq, qwen3_state *state);

/* ---- sampling -------------------------------------------------------------------------------- */
typedef struct qwen3_prob { qwen3_token token; float logprob; } qwen3_prob;

QWEN3_API qwen3_sampler qwen3_sampler_preset(qwen3_preset preset, uint64_t seed);

/* Choose the token to follow the sequence, without appending it. sampler NULL: greedy. ERR_ARG if
   bias or filter ban every token. */
QWEN3_API qwen3_result  qwen3_sample(qwen3_ctx *ctx, int seq, qwen3_sampler *sampler, qwen3_token *out);

/* The k most probable next tokens, best first, with natural-log probabilities under the plain
   distribution (temperature 1, nothing cut). Returns how many were written, or a negative result. */
QWEN3_API int           qwen3_top_probs(qwen3_ctx *ctx, int seq, qwen3_prob *out, int k);

/* ---- grammars: output that always parses ------------------------------------------------------- */
typedef enum qwen3_grammar_kind {
    QWEN3_GRAMMAR_JSON_SCHEMA = 0,      /* drafts 4 to 2020-12                                     */
    QWEN3_GRAMMAR_REGEX       = 1,      /* ECMAScript's, as schemas use it; matches the whole text */
    QWEN3_GRAMMAR_GBNF        = 2,      /* llama.cpp's notation, from the rule "root" on            */
    QWEN3_GRAMMAR_TOOLS       = 3       /* a JSON array of tools: what QWEN3_CHAT_TOOLS_AUTO makes of */
} qwen3_grammar_kind;                   /* them, for callers of qwen3_next                          */

enum {
    QWEN3_GRAMMAR_COMPACT       = 1,    /* JSON without white space; default: where the model likes    */
    QWEN3_GRAMMAR_MAY_BREAK_OFF = 2,    /* do not lead the text to its shortest end where room gets short */
    QWEN3_GRAMMAR_CALL          = 4,    /* TOOLS: as QWEN3_CHAT_TOOLS_REQUIRED                      */
    QWEN3_GRAMMAR_WARN          = 8     /* a keyword that is not enforced is no error, but a warning to the */
};                                      /* model's logger: then texts may come that the schema refuses  */

typedef struct qwen3_grammar_desc {
    qwen3_grammar_kind kind;
    const char *text; size_t n_bytes;   /* the schema, expression or grammar                        */
    int         flags;                  /* QWEN3_GRAMMAR_*                                          */
    int64_t     max_steps;              /* that compiling may take, some 10 ns each; 0: 40 million  */
    size_t      max_bytes;              /* of the compiled grammar; 0: 64 MiB. Compiling needs a few times */
} qwen3_grammar_desc;                   /* that for itself                                          */

/* A grammar holds for the answer: while the model thinks, everything may come. A reply ends only where its
   grammar may end. Near max_tokens or the end of the context it is led to its shortest end in time. Names of
   an object come in any order, none twice. What a sequence holds of an answer already, such as a beginning
   that was put there, is part of the grammar if it fits, else the grammar begins behind it. Where calls are
   held to tools, too (QWEN3_CHAT_TOOLS_AUTO), the answer is of the grammar, or calls. */

/* Compile a grammar for a model's vocabulary; the model must outlive it. A keyword that would not be
   enforced is an error (UNSUPPORTED) that names its place, as is a grammar that is too complex; one
   that is wrong, or that nothing satisfies, is FORMAT. Safe from any thread. */
QWEN3_API qwen3_result qwen3_grammar_create(qwen3_grammar **out, const qwen3_model *model,
                                            const qwen3_grammar_desc *desc, char *err, size_t err_size);
QWEN3_API void         qwen3_grammar_free(qwen3_grammar *grammar);  /* NULL is fine; no sequence may use it */

/* ---- generation ------------------------------------------------------------------------------ */
enum {                                  /* what a piece of text is: bits */
    QWEN3_TEXT_ANSWER   = 0,
    QWEN3_TEXT_THINKING = 1,            /* from <think> to </think>                                 */
    QWEN3_TEXT_CALL     = 2,            /* from <tool_call> to </tool_call>: the call as JSON       */
    QWEN3_TEXT_TAG      = 4             /* with one of these: such a tag itself, and the newlines   */
};                                      /* that the chat format puts around it                      */

typedef struct qwen3_gen_desc {
    qwen3_sampler     *sampler;         /* NULL: greedy                                             */
    const qwen3_grammar *grammar;       /* NULL: the sampler's, if it has one                       */
    int                max_tokens;      /* thinking included; 0: until the turn ends or the context */
                                        /* is full                                                  */
    int                think_budget;    /* tokens of thinking, then </think> is forced; 0: no limit */
    const char *const *stop; int n_stop;    /* texts of 1 to 1,024 bytes that end the reply, in     */
                                        /* answer, thinking or call. Not delivered; their tokens    */
                                        /* stay in the sequence                                     */
    int               *stopped_by;      /* NULL, or out: the index of the stop string that ended    */
                                        /* the reply; -1: none did (END: the model ended its turn)  */
    int              (*on_text)(const char *utf8, int n_bytes, int kind, void *user);
    void              *user;            /* on_text gets whole, valid UTF-8 characters; kind is of   */
                                        /* QWEN3_TEXT_*; nonzero return stops                       */
    /* Speculation: up to draft_tokens (0: none; at most 16) are guessed and evaluated together with the next
       token, and kept as far as they are what is then chosen from their own logits. So text and sampler are
       those of one token at a time, bit for bit on the CPU and, with qwen3_ctx_desc.invariant, on a GPU,
       where steps of several tokens otherwise round differently. Guesses come from the last place where
       the sequence said the same, which pays where text is quoted; where there is none from draft (may be
       NULL), a context of a smaller model of the same vocabulary, whose sequence of the same number is
       used. How many is adapted to what they cost and bring. Takes 4 * n_vocab bytes a guess for each
       such sequence, when it first begins. */
    int                draft_tokens;
    qwen3_ctx         *draft;
} qwen3_gen_desc;

/* Pull: choose the next token, append it to the sequence and evaluate it. Returns OK, or END when
   the token ends the turn (it is then not appended), or CONTEXT_FULL before anything is chosen. When
   cancelled, sequence and sampler are as they were: call again. */
QWEN3_API qwen3_result qwen3_next(qwen3_ctx *ctx, int seq, qwen3_sampler *sampler, qwen3_token *out);

/* The same for n different sequences in one step. samplers[i] may be NULL (greedy), as may samplers.
   results (may be NULL) gets each one's OK, END or CONTEXT_FULL. Returns OK, or else STOPPED or an
   error, which then stands in all results. */
QWEN3_API qwen3_result qwen3_next_batch(qwen3_ctx *ctx, const int *seqs, int n,
                                        qwen3_sampler *const *samplers, qwen3_token *out,
                                        qwen3_result *results);

/* Push: generate until the turn ends (END), a callback stops it (STOPPED), max_tokens are made (OK)
   or the context is full (ERR_CONTEXT_FULL; all text so far was delivered). The tokens generated
   stay in the sequence. */
QWEN3_API qwen3_result qwen3_generate(qwen3_ctx *ctx, int seq, const qwen3_gen_desc *gen);

/* Render the conversation, bring the sequence up to date with it, and generate the reply. Handing back
   what was streamed (thinking as reasoning, answer as text, calls as calls) with the next message finds
   it in the sequence: nothing is evaluated twice. */
QWEN3_API qwen3_result qwen3_chat(qwen3_ctx *ctx, int seq, const qwen3_chat_desc *chat,
                                  const qwen3_gen_desc *gen);

/* Take a reply apart: text as on_text got it, tags and all (n_bytes of it, any bytes), into thinking
   (out->reasoning), answer (out->text) and calls (out->calls: names, and arguments as JSON text), as the
   message that goes into the conversation. kind: what the text begins with, QWEN3_TEXT_ANSWER if in doubt. A
   call that is malformed stays in the text with its tags, and err (may be NULL) says what is wrong with the
   first one; else err is "". A call without arguments has "{}". The strings are valid UTF-8 without
   a NUL in it (U+FFFD stands for what is not) and lie, as the calls do, in memory, which is the caller's.
   Returns how many bytes that takes: if more than size, out is empty. ERR_ARG: a NULL, or more than
   256 MiB of text. */
QWEN3_API int          qwen3_reply_parse(const char *text, size_t n_bytes, int kind, qwen3_msg *out,
                                         void *memory, size_t size, char *err, size_t err_size);

/* A reply in the making: a plain struct that the caller owns. qwen3_generate and qwen3_chat are
   begin and step without a budget; in a game, step once a frame. */
typedef struct qwen3_stream {
    qwen3_result result;                /* MORE; in the end what qwen3_generate returns             */
    int          n_prompt;              /* tokens of the prompt still to be evaluated               */
    int          n_tokens, n_thinking;  /* generated so far; of these between <think> and </think>  */
    int          stopped_by;            /* the stop string that ended it, or -1                     */
    qwen3_token  forced;                /* >= 0: for callers of qwen3_stream_feed: the token that   */
                                        /* has to come next (qwen3_eval), the thinking being over   */
    qwen3_ctx     *ctx;                 /* From here on the library's own.                          */
    qwen3_gen_desc gen;
    int  seq, kind, tag;                /* what text is now; what newlines are now; 0: text         */
    int  closed;                        /* the callback wants no more                               */
    int  tools;                         /* QWEN3_CHAT_TOOLS_*                                       */
    int  n_pending;                     /* bytes not delivered yet                                  */
    char pending[2048];
} qwen3_stream;

/* Begin a reply: chat as in qwen3_chat, or NULL to continue what the sequence holds. Nothing is
   evaluated yet. Both descriptors are copied; what gen points to has to stay until the end. */
QWEN3_API qwen3_result qwen3_stream_begin(qwen3_ctx *ctx, int seq, const qwen3_chat_desc *chat,
                                          const qwen3_gen_desc *gen, qwen3_stream *stream);

/* Work on n replies of different sequences of ctx for about budget_us microseconds (0: until all are
   complete): prompts by pieces, answers together, a token each in a step. At least one step is made,
   whatever the budget, and none begun that by the last ones' time would not fit. Allocates nothing.
   MORE: call again; OK: all are complete, each result says how. STOPPED (ctx's cancel) and errors:
   nothing is lost, call again or give up; there is nothing to free. */
QWEN3_API qwen3_result qwen3_stream_step(qwen3_ctx *ctx, qwen3_stream *const *streams, int n,
                                         int64_t budget_us);

/* For callers of qwen3_next and qwen3_eval: the text of a token that they put into the sequence, or of
   one that ended the turn. Returns stream->result. */
QWEN3_API qwen3_result qwen3_stream_feed(qwen3_stream *stream, qwen3_token token);

/* ---- embeddings and reranking ------------------------------------------------------------------ */
/* Embedding of a text with a Qwen3-Embedding model: the last-token state, L2-normalised, [n_embd]
   floats to out. With task not NULL the text is a query: "Instruct: {task}\nQuery:{text}". Uses, and
   afterwards empties, sequence seq. It warns (logger) unless the files say that the model was made for
   this: modules.json, 1_Pooling/config.json or a GGUF file's pooling_type. ERR_FORMAT where the model
   computes what is not a number, here and in qwen3_rerank and qwen3_top_probs. */
QWEN3_API qwen3_result qwen3_embed(qwen3_ctx *ctx, int seq, const char *task, const char *text, float *out);

/* Relevance 0..1 of a document to a query with a Qwen3-Reranker model: P("yes") against P("no").
   task NULL: web search retrieval. Uses sequence seq; the prompt's common part is reused. */
QWEN3_API qwen3_result qwen3_rerank(qwen3_ctx *ctx, int seq, const char *task, const char *query,
                                    const char *document, float *score);

#ifdef __cplusplus
}
#endif
#endif /* QWEN3_H */

/* ================================================================================================
   STOP HERE if you only want the API. What follows is the implementation.
   ================================================================================================ */
#if defined(QWEN3_IMPLEMENTATION) || defined(QWEN3_BACKEND_INTERFACE)
#ifndef QWEN3I_INTERFACE
#define QWEN3I_INTERFACE

/* ================================================================================================
   BACKEND INTERFACE: what the decoder loop asks of a backend, and what a backend sees of a model.
   qwen3_cuda.cu reads this section alone, with QWEN3_BACKEND_INTERFACE defined.
   ================================================================================================ */

/* The formats of weights: X(name, function, number in GGUF files, elements of a block, its bytes). The first
   three are numbers that stand by themselves, and the formats of a KV cache too; the others are unpacked by a
   function. */
#define QWEN3I_BLOCK_TYPES(X) \
    X(Q8_0, q8_0, 8, 32, 34)       X(Q4_0, q4_0, 2, 32, 18)       X(Q4_1, q4_1, 3, 32, 20) \
    X(Q5_0, q5_0, 6, 32, 22)       X(Q5_1, q5_1, 7, 32, 24)       X(Q2_K, q2_k, 10, 256, 84) \
    X(Q3_K, q3_k, 11, 256, 110)    X(Q4_K, q4_k, 12, 256, 144)    X(Q5_K, q5_k, 13, 256, 176) \
    X(Q6_K, q6_k, 14, 256, 210)    X(IQ4_NL, iq4_nl, 20, 32, 18)  X(IQ4_XS, iq4_xs, 23, 256, 136) \
    X(MXFP4, mxfp4, 39, 32, 17)    X(NVFP4, nvfp4, 40, 64, 36)    X(FP8, fp8, -1, 128, 132) \
    X(INT4, int4, -1, 128, 68)     X(INT4S, int4s, -1, 32, 20)    X(INT8, int8, -1, 128, 132)
#define QWEN3I_TYPES(X) \
    X(F32, f32, 0, 1, 4)  X(F16, f16, 1, 1, 2)  X(BF16, bf16, 30, 1, 2)  QWEN3I_BLOCK_TYPES(X)

#define QWEN3I_TYPE_ENUM(name, function, gguf, elements, bytes) QWEN3I_##name,
typedef enum qwen3i_type { QWEN3I_NO_TYPE, QWEN3I_TYPES(QWEN3I_TYPE_ENUM) QWEN3I_N_TYPES } qwen3i_type;

/* y[rows] = W x[cols]; row-major: see qwen3i_row_bytes; numbers are aligned */
typedef struct qwen3i_matrix {
    const void *data;
    int         rows, cols;
    qwen3i_type type;
} qwen3i_matrix;

typedef struct qwen3i_experts {         /* of a layer whose MLP is a mixture */
    qwen3i_matrix        router;        /* [n_expert, n_embd] */
    const qwen3i_matrix *gate, *up;     /* n_expert of them: [n_ff_expert, n_embd] */
    const qwen3i_matrix *down;          /* n_expert of them: [n_embd, n_ff_expert] */
} qwen3i_experts;

typedef struct qwen3i_layer {           /* norm gains are float32 copies: [n_embd] or [head_dim] */
    const float  *attn_norm, *q_norm, *k_norm, *mlp_norm;
    qwen3i_matrix wq, wk, wv;           /* [n_head * head_dim | n_head_kv * head_dim, n_embd] */
    qwen3i_matrix wo;                   /* [n_embd, n_head * head_dim] */
    qwen3i_matrix w_gate, w_up;         /* [n_ff, n_embd] */
    qwen3i_matrix w_down;               /* [n_embd, n_ff] */
    const qwen3i_experts *experts;      /* NULL: dense, by the three matrices above */
    /* column j of the matrices is for input order[j]; NULL: for input j */
    const int32_t *qkv_order, *o_order, *mlp_order, *down_order;
} qwen3i_layer;

typedef struct qwen3i_config {
    int    n_layer, n_embd, n_head, n_head_kv, head_dim, n_ff, n_vocab, max_ctx;
    int    tied;                        /* the head is the embedding */
    float  rms_eps;
    double rope_theta;
    double yarn_factor;                 /* 0: plain RoPE */
    double yarn_beta_fast, yarn_beta_slow, yarn_attn_factor;
    int    yarn_original_ctx, yarn_untruncated;
    int    n_expert, n_expert_used, n_ff_expert;    /* of layers with experts; 0: all are dense */
    int    norm_topk;                   /* the weights of the experts that are used add up to 1 */
    int    sparse_step;                 /* layers sparse_step - 1, 2 * sparse_step - 1, ... have experts, */
    int    n_dense, dense[64];          /* but for these */
    int    ordered;                     /* some layer has an order of inputs */
} qwen3i_config;

typedef struct qwen3i_weights {
    qwen3i_matrix embed, head;          /* [n_vocab, n_embd]; the same data if tied */
    const float  *final_norm;           /* [n_embd] */
    const qwen3i_layer *layers;         /* [n_layer] */
} qwen3i_weights;

/* where a message goes; text may be NULL */
typedef struct qwen3i_err { char *text; size_t cap; } qwen3i_err;

typedef struct qwen3i_out {             /* what is wanted of one row of a batch; NULL: not wanted */
    int    row;
    int    keep_seq;                    /* >= 0: these logits become that sequence's; -1: no */
    float *logits;                      /* [n_vocab] */
    float *hidden;                      /* [n_embd], after the final norm */
    float *logprob;                     /* ln P(target) under this row's logits */
    qwen3_token target;
} qwen3i_out;

typedef struct qwen3i_batch {           /* rows of one sequence are consecutive and in order */
    const qwen3_token *tokens;          /* [n_rows], each 0 .. n_vocab - 1 (checked) */
    const int32_t *seqs, *positions;    /* [n_rows], checked: seq < max_seqs, pos < max_ctx */
    int            n_rows;              /* 1 .. prefill_chunk, or max_seqs if that is more */
    const qwen3i_out *outs;             /* in order of row */
    int            n_outs;
} qwen3i_batch;

typedef struct qwen3i_next {            /* one sequence's part of a decode step */
    int                seq;
    const qwen3_token *tokens;          /* [n] what it holds; tokens[n-1]'s logits are kept */
    int                n;
    qwen3_sampler     *sampler;         /* NULL: greedy. rng is advanced by the backend */
    const qwen3_grammar *grammar;       /* NULL: the sampler's */
    const qwen3_grammar *calls;         /* NULL, or that of calls of tools */
    int                tools;           /* QWEN3_CHAT_TOOLS_* */
    const uint32_t    *mask;            /* NULL, or [n_vocab / 32, rounded up] bits: may the token come? */
    int                guided;          /* the mask is that of the sequence's place in a grammar */
    /* tokens that may still come, this one included; 0: as the context has positions */
    int                room;
    qwen3_token        out;             /* the choice */
    int                ended;           /* set if out ends the turn: it was not evaluated */
} qwen3i_next;

/* All functions return 0 or a negative code and then say why in err; QWEN3_STOPPED when the context's
   cancel hook said so. model_state and ctx_state are the backend's own. */
struct qwen3_backend {
    int         version;                /* QWEN3_VERSION it was compiled with: checked by qwen3_load */
    const char *name;
    int         default_chunk;
    qwen3_result (*model_create)(void **model_state, const qwen3_model *model, const qwen3_load_desc *desc,
                                 const qwen3i_err *err);
    void         (*model_free)(void *model_state);
    const char  *(*device_name)(const void *model_state);
    qwen3_memory (*ctx_memory)(const void *model_state, const qwen3_model *model, const qwen3_ctx_desc *desc);
    qwen3_result (*ctx_create)(void **ctx_state, void *model_state, const qwen3_model *model,
                               /* desc: defaults filled in */
                               const qwen3_ctx_desc *desc, const qwen3i_err *err);
    void         (*ctx_free)(void *ctx_state);
    /* Evaluate rows: write their K and V, and deliver outs. May return before the device is done,
       unless outs asks for host memory. */
    qwen3_result (*forward)(void *ctx_state, const qwen3i_batch *batch, const qwen3i_err *err);
    /* The kept logits of a sequence, [n_vocab] on the host, valid until the next call. */
    qwen3_result (*logits)(void *ctx_state, int seq, const float **out, const qwen3i_err *err);
    /* Sample and evaluate on the device. NULL, or QWEN3_ERR_UNSUPPORTED (nothing was done): the core does it
       with logits() and forward(). Never called with a sampler that has a filter.
       May run ahead; every other call on a sequence then drops what was not handed out. */
    qwen3_result (*next)(void *ctx_state, qwen3i_next *items, int n, const qwen3i_err *err);
    /* Keep the first n_pos positions of src in dst, and its kept logits. */
    qwen3_result (*seq_copy)(void *ctx_state, int dst, int src, int n_pos, const qwen3i_err *err);
    /* Positions [0, n_pos) of one layer to or from the host: K then V, each [n_pos, n_head_kv * head_dim]
       in the context's KV type. */
    qwen3_result (*kv_read)(void *ctx_state, int seq, int layer, int n_pos, void *k, void *v,
                            const qwen3i_err *err);
    qwen3_result (*kv_write)(void *ctx_state, int seq, int layer, int n_pos, const void *k, const void *v,
                             const qwen3i_err *err);
    qwen3_result (*set_logits)(void *ctx_state, int seq, const float *logits, const qwen3i_err *err);
    int         block_types;            /* does it multiply by any format? 0: only F32, F16 and BF16 */
    int         experts;                /* does it run layers whose MLP is a mixture of experts? */
    int         orders;                 /* does it run layers with an order of inputs? */
    int         devices;                /* does it run on several devices? */
    /* The device starts, on a thread of its own, while files are read; what fails there model_create()
       reports.
       NULL, or it returns NULL: there is nothing to wait for. started() waits, in any case. */
    void       *(*start)(const qwen3_load_desc *desc);
    void         (*started)(void *starting);
};

/* ---- sizes: 64-bit arithmetic in which UINT64_MAX stands for all that does not fit ---- */
static inline uint64_t qwen3i_size_add(uint64_t a,
                                       uint64_t b) { return a > UINT64_MAX - b ? UINT64_MAX : a + b; }
static inline uint64_t qwen3i_size_mul(uint64_t a, uint64_t b) {
    return b != 0 && a > UINT64_MAX / b ? UINT64_MAX : a * b;
}

/* Can a block of so many bytes exist on this host? */
static inline int qwen3i_size_fits(uint64_t n) { return n <= (size_t)-1 / 2; }

/* A block of memory that is handed out in pieces. With no base it only counts: one function measures a
   layout, and then, on a block of that size, lays it out. */
typedef struct qwen3i_arena {
    char    *base;                      /* NULL: count; else at a multiple of align */
    uint64_t used, align;               /* bytes so far; each piece starts at a multiple of align */
} qwen3i_arena;

static inline qwen3i_arena qwen3i_arena_at(void *block, uint64_t align) {
    qwen3i_arena m;
    m.base = block ? (char *)block + (align - (uintptr_t)block % align) % align : NULL;
    m.used = 0;
    m.align = align;
    return m;
}

/* [n, rows, size] bytes; NULL while it counts. Its own caller has seen to it that the block is large
   enough. */
static inline void *qwen3i_arena_take(qwen3i_arena *m, uint64_t n, uint64_t rows, uint64_t size) {
    void *piece = m->base ? m->base + m->used : NULL;
    uint64_t end = qwen3i_size_add(m->used, qwen3i_size_mul(qwen3i_size_mul(n, rows), size));
    m->used = end > UINT64_MAX - m->align ? UINT64_MAX : (end + m->align - 1) / m->align * m->align;
    return piece;
}

/* What to allocate for it: with room to align the block. */
static inline uint64_t qwen3i_arena_size(const qwen3i_arena *m) { return qwen3i_size_add(m->used, m->align); }

/* Services for backends, defined with the implementation. */
#ifdef __cplusplus
extern "C" {
#endif
typedef struct qwen3i_model_view {
    const qwen3i_config *config; const qwen3i_weights *weights; const qwen3_allocator *allocator;
                                   const qwen3_token *eos; int n_eos; int n_tokens; } qwen3i_model_view;
QWEN3_API qwen3i_model_view qwen3_backend_view(const qwen3_model *model);
/* freqs [head_dim / 2]: radians a position; yarn_factor 0: as the configuration says. Returns the factor for
   cosines and sines. */
QWEN3_API float qwen3_backend_rotation(float *freqs, const qwen3i_config *cfg, double yarn_factor);
#ifdef __cplusplus
}
#endif

/* ---- what a backend and the core share: here once, for the host and, under nvcc, for the device ---- */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>      /* vsnprintf; files unless QWEN3_NO_STDIO */
#include <string.h>

#ifdef __CUDACC__
  #define QWEN3I_SHARED static inline __host__ __device__
#else
  #define QWEN3I_SHARED static inline
#endif
#if defined(__GNUC__)
  #define QWEN3I_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
  #define QWEN3I_COLD __attribute__((cold))     /* runs rarely: compiled for size, as what it alone calls */
#else
  #define QWEN3I_PRINTF(fmt, args)
  #define QWEN3I_COLD
#endif

#define QWEN3I_REPLACEMENT 0xFFFDu      /* what stands for bytes that are no character */

/* The character at p, which is before end; returns its bytes. Invalid UTF-8 is U+FFFD once for each
   maximal subpart, which is what Unicode recommends and Python does. *truncated: it is cut off by end. */
static inline int qwen3i_utf8_scan(const char *p, const char *end, uint32_t *c, int *truncated) {
    unsigned lead = (unsigned char)*p, low = 0x80, high = 0xBF, byte;
    int i, n = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
    uint32_t value = lead & (0x7Fu >> n);
    *truncated = 0;
    *c = lead;
    if (lead < 0x80) return 1;
    *c = QWEN3I_REPLACEMENT;
    if (lead < 0xC2 || lead > 0xF4) return 1;
    if (lead == 0xE0) low = 0xA0;       /* no overlong forms, surrogates, or values past 10FFFF */
    if (lead == 0xED) high = 0x9F;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
    for (i = 1; i < n; i++) {
        if (p + i == end) { *truncated = 1; return i; }
        byte = (unsigned char)p[i];
        if (byte < low || byte > high) return i;
        value = value << 6 | (byte & 63);
        low = 0x80; high = 0xBF;
    }
    *c = value;
    return n;
}

/* Characters that a terminal obeys instead of showing them: controls, line separators, and those that turn
   the direction of text around, so that it reads otherwise than it is. */
static inline int qwen3i_is_control(uint32_t c) {
    return c < 0x20 || (c >= 0x7F && c < 0xA0) || c == 0x061C || c == 0x200E || c == 0x200F ||
           (c >= 0x2028 && c <= 0x202E) ||
           (c >= 0x2066 && c <= 0x2069);
}

/* Names and texts from files stand in messages, and messages on terminals: '?' for every byte that is not
   valid UTF-8, and for control characters. cut: the end of the text did not fit; a character that lost bytes
   there goes. */
static inline void qwen3i_printable(char *text, int cut) {
    const char *p = text, *end = text + strlen(text);
    char *to = text;
    while (p < end) {
        uint32_t c;
        int truncated, n = qwen3i_utf8_scan(p, end, &c, &truncated), i;
        const int valid = c != QWEN3I_REPLACEMENT || (n == 3 && memcmp(p, "\xEF\xBF\xBD", 3) == 0);
        if (truncated && cut) break;
        if (valid && qwen3i_is_control(c)) *to++ = '?';
        else for (i = 0; i < n; i++) *to++ = valid ? p[i] : '?';
        p += n;
    }
    *to = '\0';
}

/* Format a message into room for cap bytes. */
static inline void qwen3i_message(char *text, size_t cap, const char *format, va_list args) {
    const int n = vsnprintf(text, cap, format, args);
    qwen3i_printable(text, n < 0 || (size_t)n >= cap);
}

/* How many of n bytes stand in a message: at most so many, and whole characters. */
static inline int qwen3i_shown(const char *p, size_t n, size_t most) {
    int back;
    if (n <= most) return (int)n;
    for (back = 0; back < 3 && ((unsigned char)p[most] & 0xC0) == 0x80; back++) most--;
    return (int)most;
}

static inline qwen3i_err qwen3i_err_begin(char *text, size_t cap) {
    qwen3i_err e;
    e.text = text;
    e.cap = cap;
    if (text && cap) *text = '\0';
    return e;
}

/* Write the message and return the code, so that a failure is one statement. */
QWEN3I_PRINTF(3, 4) QWEN3I_COLD
static inline qwen3_result qwen3i_fail(const qwen3i_err *e, qwen3_result code, const char *format, ...) {
    va_list args;
    if (!e || !e->text || e->cap == 0) return code;
    va_start(args, format);
    qwen3i_message(e->text, e->cap, format, args);
    va_end(args);
    return code;
}

/* ---- number formats: bfloat16 and half precision to and from float32 ---- */
/* of a number */
QWEN3I_SHARED size_t qwen3i_type_size(qwen3i_type type) { return type == QWEN3I_F32 ? 4 : 2; }

QWEN3I_SHARED float qwen3i_float_from_bits(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

QWEN3I_SHARED uint32_t qwen3i_bits_from_float(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

QWEN3I_SHARED float qwen3i_bf16_to_f32(uint16_t h) { return qwen3i_float_from_bits((uint32_t)h << 16); }

/* Round to nearest even; what would round beyond the largest bf16 stays at it. */
QWEN3I_SHARED uint16_t qwen3i_f32_to_bf16(float f) {
    uint32_t bits = qwen3i_bits_from_float(f), sign = bits & 0x80000000u, size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u) return (uint16_t)((sign | 0x7FC00000u) >> 16);
    if (size > 0x7F7F0000u) size = 0x7F7F0000u;
    return (uint16_t)((sign | (size + 0x7FFFu + ((size >> 16) & 1u))) >> 16);
}

QWEN3I_SHARED float qwen3i_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3FFu;
    float tiny;
    if (exponent == 31) return qwen3i_float_from_bits(sign | 0x7F800000u | (fraction << 13));
    if (exponent != 0) return qwen3i_float_from_bits(sign | ((exponent + 112u) << 23) | (fraction << 13));
    tiny = (float)fraction * (1.0f / 16777216.0f);
    return sign ? -tiny : tiny;
}

/* Round to nearest even; what lies beyond +-65504 becomes +-65504. */
QWEN3I_SHARED uint16_t qwen3i_f32_to_f16(float f) {
    uint32_t bits = qwen3i_bits_from_float(f), sign = (bits >> 16) & 0x8000u, size = bits & 0x7FFFFFFFu;
    uint32_t shift, half, rest;
    if (size > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (size >= 0x477FE000u) return (uint16_t)(sign | 0x7BFFu);
    if (size < 0x33000000u) return (uint16_t)sign;              /* below half the smallest subnormal */
    /* subnormals lose bits; 24 of them are exact */
    shift = size >= 0x38800000u ? 13u : 126u - (size >> 23);
    half = size >= 0x38800000u ? size - 0x38000000u : (size & 0x7FFFFFu) | 0x800000u;
    rest = half & ((1u << shift) - 1u);
    half >>= shift;
    if (rest > (1u << (shift - 1)) || (rest == (1u << (shift - 1)) && (half & 1u))) half++;
    return (uint16_t)(sign | half);
}

/* Element i of an array of any type */
QWEN3I_SHARED float qwen3i_value(const void *data, qwen3i_type type, int i) {
    if (type == QWEN3I_F32) return ((const float *)data)[i];
    return type == QWEN3I_BF16 ? qwen3i_bf16_to_f32(((const uint16_t *)data)[i])
                               : qwen3i_f16_to_f32(((const uint16_t *)data)[i]);
}

/* ---- the choice of a token: integers after the temperature, so that all platforms agree ------- */
#define QWEN3I_SAME_ROWS  16            /* in a step of an invariant context, whose bits are those alone */
#define QWEN3I_BANNED     (-1e30f)      /* this and below, NaN included: never sampled */
#define QWEN3I_OCTAVES    39            /* below the largest logit weights end */
#define QWEN3I_WEIGHT_ONE ((uint64_t)1 << QWEN3I_OCTAVES)       /* the weight of the largest logit */

/* splitmix64 (Steele, Lea, Flood 2014): one step a choice, so a state can be moved ahead by n steps at
   once. */
#define QWEN3I_RNG_STEP 0x9E3779B97F4A7C15u

/* The random number that is drawn when the state has been moved ahead by so many steps. */
QWEN3I_SHARED uint64_t qwen3i_random_at(uint64_t state, int steps) {
    uint64_t z = state + (uint64_t)steps * QWEN3I_RNG_STEP;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static inline uint64_t qwen3i_random(uint64_t *state) {
    return qwen3i_random_at(*state += QWEN3I_RNG_STEP, 0);
}

/* floor(a * b / 2^64) */
QWEN3I_SHARED uint64_t qwen3i_mul_high(uint64_t a, uint64_t b) {
    const uint64_t a0 = a & 0xFFFFFFFFu, a1 = a >> 32, b0 = b & 0xFFFFFFFFu, b1 = b >> 32;
    const uint64_t mid = a1 * b0 + (a0 * b0 >> 32);
    return a1 * b1 + (mid >> 32) + ((a0 * b1 + (mid & 0xFFFFFFFFu)) >> 32);
}

/* floor(total * share) for a share of 0..1 */
QWEN3I_SHARED uint64_t qwen3i_share_of(uint64_t total, float share) {
    const uint64_t s = (uint64_t)((double)share * 4294967296.0);
    return (total >> 32) * s + ((total & 0xFFFFFFFFu) * s >> 32);
}

/* How many times a logit's probability is halved from the largest one's on. */
QWEN3I_SHARED float qwen3i_octaves_below(float logit, float top, float temperature) {
    const float below = top - logit;
    return below / temperature * 1.44269504f;
}

/* Probability weight 2^-octaves as an integer, 2^39 for 0; 0 from 39 octaves down. The sum over the largest
   vocabulary (QWEN3I_MAX_DIM) fits 63 bits. 2^-f on [0, 1): polynomial fitted to a relative error of 5e-9. */
QWEN3I_SHARED uint64_t qwen3i_weight(float octaves) {
    const uint32_t c[5] = {1488521986u, 515877902u, 119165493u, 20571132u, 2737501u};
    uint64_t p = 234126u;
    uint32_t fixed, f;
    int i;
    if (!(octaves < (float)QWEN3I_OCTAVES)) return 0;
    fixed = (uint32_t)(octaves * 1048576.0f);
    f = fixed & 0xFFFFFu;
    for (i = 4; i >= 0; i--) p = c[i] - (p * f >> 20);
    return (2147483648u - (p * f >> 20)) << (QWEN3I_OCTAVES - 31) >> (fixed >> 20);
}

/* Neither NaN nor Inf, by its bits: this must hold under -ffast-math, too. */
QWEN3I_SHARED int qwen3i_is_number(float x) {
    return (qwen3i_bits_from_float(x) & 0x7F800000u) != 0x7F800000u;
}

/* May a token with this logit be sampled? */
QWEN3I_SHARED int qwen3i_allowed(float logit) { return qwen3i_is_number(logit) && logit > QWEN3I_BANNED; }

/* The logit of a token that was there already. What is banned stays so. One rounding of the product, as no
   compiler's contraction could change that. */
QWEN3I_SHARED float qwen3i_penalised(float logit, float repeat, float presence) {
    const float by = repeat > 0 ? repeat : 1.0f;
    if (!qwen3i_allowed(logit)) return logit;
    return logit > 0 ? logit / by - presence : fmaf(logit, by, -presence);
}

static inline int qwen3i_penalises(const qwen3_sampler *s) {
    return s->presence_penalty < 0 || s->presence_penalty > 0 ||
           (s->repeat_penalty > 0 && (s->repeat_penalty < 1 || s->repeat_penalty > 1));
}

/* Where in n tokens those begin that are penalised. */
static inline int qwen3i_penalty_begin(const qwen3_sampler *s, int n) {
    const int last = s->penalty_last_n == 0 ? 256 : s->penalty_last_n;
    return last < 0 || last > n ? 0 : n - last;
}
#endif /* QWEN3I_INTERFACE */
#endif

#ifdef QWEN3_IMPLEMENTATION
#ifndef QWEN3I_IMPLEMENTED
#define QWEN3I_IMPLEMENTED
#undef qwen3_load       /* declared before without the implementation */
/* ================================================================================================
   PLATFORM, MEMORY AND ERRORS
   ================================================================================================ */
#include <errno.h>
#include <fenv.h>
#include <float.h>
#include <limits.h>
#include <stdlib.h>

#ifdef QWEN3_NO_STDIO
  #undef  QWEN3_NO_MMAP
  #define QWEN3_NO_MMAP
#endif
#if defined(__EMSCRIPTEN__) && !defined(__EMSCRIPTEN_PTHREADS__) && !defined(QWEN3_NO_THREADS)
  #define QWEN3_NO_THREADS              /* without -pthread, pthread_create only ever fails */
#endif
#if defined(_WIN32)
  #ifndef WIN32_LEAN_AND_MEAN
    #define WIN32_LEAN_AND_MEAN
  #endif
  #ifndef NOMINMAX
    #define NOMINMAX
  #endif
  #ifndef NOGDI         /* Rectangle, CloseWindow and the like are names of graphics libraries, too: */
    #define NOGDI       /* who wants those of Windows in this file includes windows.h first */
  #endif
  #ifndef NOUSER
    #define NOUSER
  #endif
  #include <windows.h>
#else
  #include <sys/time.h>
  #include <unistd.h>
  #include <fcntl.h>
  #include <sys/stat.h>
  #ifndef QWEN3_NO_MMAP
    #include <sys/mman.h>
  #endif
  #ifndef QWEN3_NO_THREADS
    #include <pthread.h>
    #include <signal.h>
  #endif
  #ifdef __linux__
    #include <sched.h>
  #endif
  #ifdef __APPLE__
    #include <sys/sysctl.h>
  #endif
#endif

#if defined(QWEN3_MALLOC) != defined(QWEN3_FREE)
  #error "qwen3.h: define both QWEN3_MALLOC and QWEN3_FREE, or neither"
#endif
#ifndef QWEN3_MALLOC
  #define QWEN3_MALLOC(size) malloc(size)
  #define QWEN3_FREE(ptr)    free(ptr)
#endif
#ifndef QWEN3_ASSERT
  #include <assert.h>
  #define QWEN3_ASSERT(x) assert(x)
#endif

#if defined(__GNUC__) || defined(__clang__)
  #define QWEN3I_UNUSED __attribute__((unused))
  #define QWEN3I_INLINE static inline __attribute__((always_inline, unused))
#elif defined(_MSC_VER)
  #define QWEN3I_UNUSED
  #define QWEN3I_INLINE static __forceinline
#else
  #define QWEN3I_UNUSED
  #define QWEN3I_INLINE static inline
#endif
#define QWEN3I_COUNT(a) ((int)(sizeof(a) / sizeof *(a)))
#ifdef QWEN3_NO_GRAMMAR
  #define QWEN3I_GRAMMARS 0             /* what only grammars need is then never reached, and left out */
#else
  #define QWEN3I_GRAMMARS 1
#endif

static int     qwen3i_min(int a, int b)         { return a < b ? a : b; }
static int     qwen3i_max(int a, int b)         { return a > b ? a : b; }
static size_t  qwen3i_min_size(size_t a, size_t b) { return a < b ? a : b; }

/* *out = a * b, or 0 if that overflows: sizes from files are multiplied with nothing else. */
static int qwen3i_mul_u64(uint64_t a, uint64_t b, uint64_t *out) {
    if (b != 0 && a > UINT64_MAX / b) return 0;
    *out = a * b;
    return 1;
}

static int qwen3i_little_endian(void) {
    const uint16_t one = 1;
    unsigned char first;
    memcpy(&first, &one, 1);
    return first == 1;
}

static double qwen3i_now_ms(void) {
#if defined(_WIN32)
    LARGE_INTEGER t, f;
    QueryPerformanceCounter(&t);
    QueryPerformanceFrequency(&f);
    return 1e3 * (double)t.QuadPart / (double)f.QuadPart;
#else
    struct timeval t;
    gettimeofday(&t, NULL);
    return 1e3 * (double)t.tv_sec + 1e-3 * (double)t.tv_usec;
#endif
}

/* ---- floating-point mode: C's default while the library computes, whatever the caller's is ---- */
static fenv_t qwen3i_float_enter(void) {
    fenv_t callers;
    fegetenv(&callers);
    fesetenv(FE_DFL_ENV);
    return callers;
}
static void qwen3i_float_leave(fenv_t callers) { fesetenv(&callers); }

/* ---- memory: the allocator in effect has both functions, or neither for the default ---------- */
/* NULL also for what a caller's allocator gives with less than the alignment that it has to keep. */
static void *qwen3i_alloc(const qwen3_allocator *a, size_t size) {
    void *p;
    if (size == 0) size = 1;
    if (!a->alloc) return QWEN3_MALLOC(size);
    p = a->alloc(size, a->user);
    if (((uintptr_t)p & 15) == 0) return p;
    a->free(p, size, a->user);
    return NULL;
}

static void qwen3i_free(const qwen3_allocator *a, const void *ptr, size_t size) {
    union { const void *in; void *out; } p;     /* frees what is const to everyone else */
    if (!ptr) return;
    p.in = ptr;
    if (a->free) a->free(p.out, size ? size : 1, a->user);
    else QWEN3_FREE(p.out);
}

/* n elements, or NULL also if n * size overflows. */
static void *qwen3i_alloc_array(const qwen3_allocator *a, size_t n, size_t size) {
    if (size != 0 && n > (size_t)-1 / size) return NULL;
    return qwen3i_alloc(a, n * size);
}

static void *qwen3i_alloc_zero(const qwen3_allocator *a, size_t n, size_t size) {
    void *p = qwen3i_alloc_array(a, n, size);
    if (p) memset(p, 0, n * size);
    return p;
}

/* ---- errors ------------------------------------------------------------------------------------ */
QWEN3I_COLD
static qwen3_result qwen3i_no_memory(const qwen3i_err *e, const char *what, uint64_t bytes) {
    return qwen3i_fail(e, QWEN3_ERR_MEMORY, "%llu bytes for %s", (unsigned long long)bytes, what);
}

QWEN3I_PRINTF(3, 4) QWEN3I_COLD
static void qwen3i_log(const qwen3_logger *logger, qwen3_log_level level, const char *format, ...) {
    char line[512];
    va_list args;
    if (!logger->log) return;
    va_start(args, format);
    qwen3i_message(line, sizeof line, format, args);
    va_end(args);
    logger->log(level, line, logger->user);
}

QWEN3_API const char *qwen3_result_string(qwen3_result r) {
    switch (r) {
        case QWEN3_OK:                return "ok";
        case QWEN3_END:               return "end of turn";
        case QWEN3_STOPPED:           return "stopped by a callback";
        case QWEN3_MORE:              return "more to come";
        case QWEN3_ERR_ARG:           return "invalid argument";
        case QWEN3_ERR_MEMORY:        return "out of memory";
        case QWEN3_ERR_DEVICE_MEMORY: return "out of device memory";
        case QWEN3_ERR_DEVICE:        return "device error";
        case QWEN3_ERR_IO:            return "cannot read file";
        case QWEN3_ERR_FORMAT:        return "malformed data";
        case QWEN3_ERR_UNSUPPORTED:   return "unsupported";
        case QWEN3_ERR_CONTEXT_FULL:  return "context full";
        case QWEN3_ERR_MISMATCH:      return "saved state does not match";
    }
    return "unknown result";
}

QWEN3_API int qwen3_version(void) { return QWEN3_VERSION; }

/* ================================================================================================
   BASICS: slices, lists and buffers that grow, sorting and searching, hashing, UTF-8
   ================================================================================================ */
/* ---- slices -------------------------------------------------------------------------------------- */
/* n bytes, borrowed; JSON's are still escaped */
typedef struct qwen3i_str { const char *p; size_t n; } qwen3i_str;

/* printf arguments for "%.*s" */
#define QWEN3I_STR(s) qwen3i_shown((s).p, (s).n, 120), (s).p

static qwen3i_str qwen3i_str_of(const char *text) {
    qwen3i_str s;
    s.p = text ? text : "";
    s.n = strlen(s.p);
    return s;
}

static int qwen3i_compare_str(qwen3i_str a, qwen3i_str b) {
    int c = memcmp(a.p, b.p, qwen3i_min_size(a.n, b.n));
    return c ? c : (a.n > b.n) - (a.n < b.n);
}

/* Where it begins, the first or the last of them; s.n: nowhere. */
static size_t qwen3i_str_find(qwen3i_str s, const char *wanted, int last) {
    size_t k = strlen(wanted), i, hit = s.n;
    for (i = 0; i + k <= s.n; i++)
        if (s.p[i] == *wanted && memcmp(s.p + i, wanted, k) == 0) {
            hit = i;
            if (!last) break;
        }
    return hit;
}

static qwen3i_str qwen3i_str_from(qwen3i_str s, size_t at) {
    s.p += at;
    s.n -= at;
    return s;
}

static int qwen3i_contains(const char *text, size_t n, const char *wanted) {
    size_t k = strlen(wanted), i;
    for (i = 0; i + k <= n; i++)
        if (text[i] == *wanted && memcmp(text + i, wanted, k) == 0) return 1;
    return 0;
}

/* ---- lists that grow --------------------------------------------------------------------------- */
/* Room for `need` elements of this size in a list that holds n and has room for *cap: the list, moved if need
   be. NULL: no memory, and nothing has changed. Growth by half keeps what is held meanwhile to 2.5 times the
   list. */
static void *qwen3i_grow(const qwen3_allocator *a, void *list, size_t n, size_t *cap, size_t need,
                         size_t size) {
    const size_t half_more = *cap + *cap / 2, least = size < 256 ? 256 / size : 1;
    size_t room = need < half_more ? half_more : need;
    void *grown;
    if (need <= *cap) return list;
    if (room < least) room = least;
    grown = qwen3i_alloc_array(a, room, size);
    if (!grown) return NULL;
    if (n) memcpy(grown, list, n * size);
    qwen3i_free(a, list, *cap * size);
    *cap = room;
    return grown;
}

/* Bytes that grow. Every failure is that of memory: 0. */
typedef struct qwen3i_buf { const qwen3_allocator *allocator; char *p; size_t n, cap; } qwen3i_buf;

static qwen3i_buf qwen3i_buf_make(const qwen3_allocator *a) {
    qwen3i_buf b;
    b.allocator = a;
    b.p = NULL;
    b.n = b.cap = 0;
    return b;
}

static void qwen3i_buf_free(qwen3i_buf *b) {
    qwen3i_free(b->allocator, b->p, b->cap);
    *b = qwen3i_buf_make(b->allocator);
}

/* Room for extra more bytes. */
static int qwen3i_buf_reserve(qwen3i_buf *b, size_t extra) {
    char *p;
    if (extra <= b->cap - b->n) return 1;
    if (extra > (size_t)-1 - b->n) return 0;
    p = (char *)qwen3i_grow(b->allocator, b->p, b->n, &b->cap, b->n + extra, 1);
    if (!p) return 0;
    b->p = p;
    return 1;
}

static int qwen3i_buf_add(qwen3i_buf *b, const char *p, size_t n) {
    if (!qwen3i_buf_reserve(b, n)) return 0;
    if (n) memcpy(b->p + b->n, p, n);
    b->n += n;
    return 1;
}

/* ---- sorting and searching ------------------------------------------------------------------- */
/* Heapsort: in place, no recursion, no worst case. swap space: the elements are at most 192 bytes. */
static void qwen3i_sort(void *base, size_t n, size_t size, int (*compare)(const void *, const void *)) {
    char *a = (char *)base, tmp[192];
    size_t start = n / 2, end = n, root, child;
    QWEN3_ASSERT(size <= sizeof tmp);
    while (end > 1) {
        if (start > 0) start--;         /* first build the heap, */
        else {                          /* then take its top off, again and again */
            end--;
            memcpy(tmp, a, size);
            memcpy(a, a + end * size, size);
            memcpy(a + end * size, tmp, size);
        }
        for (root = start; (child = 2 * root + 1) < end; root = child) {
            if (child + 1 < end && compare(a + child * size, a + (child + 1) * size) < 0) child++;
            if (compare(a + root * size, a + child * size) >= 0) break;
            memcpy(tmp, a + root * size, size);
            memcpy(a + root * size, a + child * size, size);
            memcpy(a + child * size, tmp, size);
        }
    }
}

/* The first of n sorted elements that does not come before key; n if all do. */
static size_t qwen3i_search(const void *base, size_t n, size_t size, const void *key,
                            int (*compare)(const void *, const void *)) {
    size_t low = 0, high = n;
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (compare((const char *)base + middle * size, key) < 0) low = middle + 1; else high = middle;
    }
    return low;
}

/* ---- hashing: fingerprints, checksums and lookup tables ------------------------------------------ */
/* 64-bit multiply-xorshift over 8-byte words; not cryptographic. Equal on every little-endian host. */
static uint64_t qwen3i_hash(uint64_t seed, const void *data, size_t n) {
    const unsigned char *p = (const unsigned char *)data;
    uint64_t h = seed ^ ((uint64_t)n * 0x9E3779B97F4A7C15u), w;
    for (; n >= 8; p += 8, n -= 8) {
        memcpy(&w, p, 8);
        h = (h ^ w) * 0xFF51AFD7ED558CCDu;
        h ^= h >> 32;
    }
    w = 0;
    memcpy(&w, p, n);
    h = (h ^ w) * 0xC4CEB9FE1A85EC53u;
    return h ^ (h >> 29);
}

/* ---- UTF-8 of any bytes ---------------------------------------------------------------------- */
/* Append a code point as UTF-8; returns the bytes written (1..4). */
static int qwen3i_utf8_put(char *dst, uint32_t c) {
    if (c < 0x80) { dst[0] = (char)c; return 1; }
    if (c < 0x800) { dst[0] = (char)(0xC0 | (c >> 6)); dst[1] = (char)(0x80 | (c & 63)); return 2; }
    if (c < 0x10000) {
        dst[0] = (char)(0xE0 | (c >> 12)); dst[1] = (char)(0x80 | ((c >> 6) & 63));
        dst[2] = (char)(0x80 | (c & 63));
        return 3;
    }
    dst[0] = (char)(0xF0 | (c >> 18)); dst[1] = (char)(0x80 | ((c >> 12) & 63));
    dst[2] = (char)(0x80 | ((c >> 6) & 63)); dst[3] = (char)(0x80 | (c & 63));
    return 4;
}

static int qwen3i_utf8_get(const char *p, const char *end, uint32_t *c) {
    int truncated;
    return qwen3i_utf8_scan(p, end, c, &truncated);
}

/* How many of the n bytes form whole characters: the rest, at most 3 bytes, is the start of one still to
   come. */
static int qwen3i_utf8_complete(const char *bytes, int n) {
    int back, truncated;
    uint32_t c;
    for (back = 1; back <= 3 && back <= n; back++) {
        const char *p = bytes + n - back;
        if (((unsigned char)*p & 0xC0) == 0x80) continue;   /* not a first byte */
        return qwen3i_utf8_scan(p, bytes + n, &c, &truncated) == back && truncated ? n - back : n;
    }
    return n;
}

/* ================================================================================================
   JSON READER: pulls values from memory. No allocation, no recursion, no trust.
   After any error every call returns 0 and j->error says what was wrong at j->p.
   ================================================================================================ */
#define QWEN3I_JSON_DEPTH 256

typedef struct qwen3i_json { const char *p, *end, *start, *error; } qwen3i_json;
typedef struct qwen3i_json_iter { char close; int started; } qwen3i_json_iter;

static qwen3i_json qwen3i_json_begin(const void *data, size_t n) {
    qwen3i_json j;
    j.start = j.p = data ? (const char *)data : "";      /* NULL + 0 is undefined in C */
    j.end = j.p + n;
    j.error = n >= 3 && memcmp(j.p, "\xEF\xBB\xBF", 3) == 0 ? "a byte order mark stands before the text" :
              NULL;
    return j;
}

static int qwen3i_json_bad(qwen3i_json *j, const char *what) {
    if (!j->error) j->error = what;
    return 0;
}

static size_t qwen3i_json_offset(const qwen3i_json *j) { return (size_t)(j->p - j->start); }

/* The first byte of the next value or punctuation, 0 at the end or after an error. */
static char qwen3i_json_peek(qwen3i_json *j) {
    if (j->error) return 0;
    while (j->p < j->end && (*j->p == ' ' || *j->p == '\n' || *j->p == '\r' || *j->p == '\t')) j->p++;
    return j->p < j->end ? *j->p : '\0';
}

static int qwen3i_json_expect(qwen3i_json *j, char c, const char *what) {
    if (qwen3i_json_peek(j) != c) return qwen3i_json_bad(j, what);
    j->p++;
    return 1;
}

static int qwen3i_hex(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

/* Four hex digits at p, or -1. */
static int qwen3i_json_hex4(const char *p, const char *end) {
    int i, v = 0;
    if (end - p < 4) return -1;
    for (i = 0; i < 4; i++) {
        int h = qwen3i_hex(p[i]);
        if (h < 0) return -1;
        v = v * 16 + h;
    }
    return v;
}

/* A string token: out is the slice between the quotes, checked but still escaped. */
static int qwen3i_json_string(qwen3i_json *j, qwen3i_str *out) {
    if (!qwen3i_json_expect(j, '"', "a string was expected")) return 0;
    out->p = j->p;
    for (; j->p < j->end && *j->p != '"'; j->p++) {
        if ((unsigned char)*j->p < 0x20) return qwen3i_json_bad(j, "control character in a string");
        if (*j->p != '\\') continue;
        if (++j->p == j->end) break;
        if (*j->p == 'u') {
            if (qwen3i_json_hex4(j->p + 1, j->end) < 0) return qwen3i_json_bad(j, "bad \\u escape");
            j->p += 4;
        } else if (!strchr("\"\\/bfnrt", *j->p) || !*j->p)
            return qwen3i_json_bad(j, "bad escape in a string");
    }
    if (j->p >= j->end) return qwen3i_json_bad(j, "a string does not end");
    out->n = (size_t)(j->p++ - out->p);
    return 1;
}

/* The escape sequence at p (after its backslash); advances p. A lone surrogate becomes U+FFFD. */
static uint32_t qwen3i_json_escape(const char **p, const char *end) {
    static const char from[] = "bfnrt", to[] = "\b\f\n\r\t";
    const char *hit;
    int c, low;
    if (**p != 'u') {
        hit = strchr(from, **p);
        c = hit ? to[hit - from] : **p;
        ++*p;
        return (uint32_t)(unsigned char)c;
    }
    c = qwen3i_json_hex4(*p + 1, end);
    *p += 5;
    if (c < 0xD800 || c > 0xDFFF) return (uint32_t)c;
    if (c < 0xDC00 && end - *p >= 6 && (*p)[0] == '\\' && (*p)[1] == 'u') {
        low = qwen3i_json_hex4(*p + 2, end);
        if (low >= 0xDC00 && low <= 0xDFFF) {
            *p += 6;
            return 0x10000u + (((uint32_t)c - 0xD800u) << 10) + ((uint32_t)low - 0xDC00u);
        }
    }
    return 0xFFFD;
}

/* Unescape s into dst, which has room for s.n bytes (escapes only ever shrink). Returns the length. */
static size_t qwen3i_json_unescape(qwen3i_str s, char *dst) {
    const char *p = s.p, *end = s.p + s.n;
    char *d = dst;
    while (p < end) {
        const char *plain = p;
        while (p < end && *p != '\\') p++;
        memmove(d, plain, (size_t)(p - plain));
        d += p - plain;
        if (p < end) { p++; d += qwen3i_utf8_put(d, qwen3i_json_escape(&p, end)); }
    }
    return (size_t)(d - dst);
}

/* Does the (still escaped) string equal this literal? */
static int qwen3i_json_is(qwen3i_str s, const char *literal) {
    char buf[256];
    if (s.n > sizeof buf) return 0;
    s.n = qwen3i_json_unescape(s, buf);
    return s.n == strlen(literal) && memcmp(buf, literal, s.n) == 0;
}

/* Open an object ('{') or array ('['), then step through it:
       if (qwen3i_json_open(j, '{', &it)) while (qwen3i_json_next(j, &it, &key)) ...read or skip it... */
static int qwen3i_json_open(qwen3i_json *j, char open, qwen3i_json_iter *it) {
    it->close = open == '{' ? '}' : ']';
    it->started = 0;
    return qwen3i_json_expect(j, open, open == '{' ? "an object was expected" : "an array was expected");
}

/* 1: another element follows (for objects, *key is set). 0: closed, or an error. key may be NULL for
   arrays. */
static int qwen3i_json_next(qwen3i_json *j, qwen3i_json_iter *it, qwen3i_str *key) {
    char c = qwen3i_json_peek(j);
    if (j->error) return 0;
    if (c == it->close) { j->p++; return 0; }
    if (it->started && !qwen3i_json_expect(j, ',', "',' or the end of the list was expected")) return 0;
    it->started = 1;
    if (it->close == ']') return qwen3i_json_peek(j) ? 1 : qwen3i_json_bad(j, "unexpected end");
    return qwen3i_json_string(j, key) && qwen3i_json_expect(j, ':', "':' was expected");
}

/* A number by its grammar; the value is correctly rounded up to 15 digits and exponents within 22. */
static int qwen3i_json_number(qwen3i_json *j, double *out) {
    const char *p, *digits;
    double v = 0, scale = 1;
    int negative, e = 0, exponent = 0, exponent_negative = 0;
    qwen3i_json_peek(j);
    if (j->error) return 0;
    p = j->p;
    negative = p < j->end && *p == '-';
    if (negative) p++;
    digits = p;
    if (p == j->end || *p < '0' || *p > '9') return qwen3i_json_bad(j, "a number was expected");
    for (; p < j->end && *p >= '0' && *p <= '9'; p++) v = v * 10 + (*p - '0');
    if (*digits == '0' && p - digits > 1) return qwen3i_json_bad(j, "a number starts with 0");
    if (p < j->end && *p == '.') {
        digits = ++p;
        for (; p < j->end && *p >= '0' && *p <= '9'; p++)
            if (p - digits < 300) { v = v * 10 + (*p - '0'); e--; }
        if (p == digits) return qwen3i_json_bad(j, "digits are missing after the decimal point");
    }
    if (p < j->end && (*p == 'e' || *p == 'E')) {
        p++;
        if (p < j->end && (*p == '+' || *p == '-')) exponent_negative = *p++ == '-';
        digits = p;
        for (; p < j->end && *p >= '0' && *p <= '9'; p++)
            if (exponent < 10000) exponent = exponent * 10 + (*p - '0');
        if (p == digits) return qwen3i_json_bad(j, "digits are missing in an exponent");
    }
    e += exponent_negative ? -exponent : exponent;
    for (; e > 0 && scale < 1e300; e--) scale *= 10;
    for (; e < 0 && scale < 1e300; e++) { scale *= 10; exponent_negative = 2; }
    v = exponent_negative == 2 ? v / scale : v * scale;
    if (!(v <= DBL_MAX)) v = DBL_MAX;
    j->p = p;
    *out = negative ? -v : v;
    return 1;
}

/* A whole number; fractions and values beyond 2^53 are errors. */
static int qwen3i_json_int(qwen3i_json *j, int64_t *out) {
    double v;
    if (!qwen3i_json_number(j, &v)) return 0;
    if (v < -9007199254740992.0 || v > 9007199254740992.0 || v != floor(v))
        return qwen3i_json_bad(j, "a whole number was expected");
    *out = (int64_t)v;
    return 1;
}

static int qwen3i_json_word(qwen3i_json *j, const char *word) {
    size_t n = strlen(word);
    qwen3i_json_peek(j);
    if (j->error || (size_t)(j->end - j->p) < n || memcmp(j->p, word, n) != 0) return 0;
    j->p += n;
    return 1;
}

static int qwen3i_json_bool(qwen3i_json *j, int *out) {
    if (qwen3i_json_word(j, "true"))  { *out = 1; return 1; }
    if (qwen3i_json_word(j, "false")) { *out = 0; return 1; }
    return qwen3i_json_bad(j, "true or false was expected");
}

static int qwen3i_json_scalar(qwen3i_json *j) {
    double number;
    qwen3i_str text;
    switch (qwen3i_json_peek(j)) {
        case '"': return qwen3i_json_string(j, &text);
        case 't': if (qwen3i_json_word(j, "true")) return 1; break;
        case 'f': if (qwen3i_json_word(j, "false")) return 1; break;
        case 'n': if (qwen3i_json_word(j, "null")) return 1; break;
        case 'N': if (qwen3i_json_word(j, "NaN")) return 1; break;         /* as Python writes them */
        case 'I': if (qwen3i_json_word(j, "Infinity")) return 1; break;
        case '\0': return qwen3i_json_bad(j, "unexpected end");
        default: return qwen3i_json_word(j, "-Infinity") || qwen3i_json_number(j, &number);
    }
    return qwen3i_json_bad(j, "a value was expected");
}

/* Skip the next value, whatever it is, checking its grammar. */
static int qwen3i_json_skip(qwen3i_json *j) {
    qwen3i_json_iter stack[QWEN3I_JSON_DEPTH];
    qwen3i_str key;
    int depth = 0;
    for (;;) {
        char c = qwen3i_json_peek(j);
        if (c == '{' || c == '[') {
            if (depth == QWEN3I_JSON_DEPTH) return qwen3i_json_bad(j, "nested too deeply");
            if (!qwen3i_json_open(j, c, &stack[depth++])) return 0;
        } else if (!qwen3i_json_scalar(j)) return 0;
        while (depth > 0 && !qwen3i_json_next(j, &stack[depth - 1], &key)) {
            if (j->error) return 0;
            depth--;
        }
        if (depth == 0) return 1;
    }
}

/* Nothing but white space may follow the document. */
static int qwen3i_json_end(qwen3i_json *j) {
    qwen3i_json_peek(j);
    if (j->error) return 0;
    return j->p == j->end ? 1 : qwen3i_json_bad(j, "unexpected text after the end");
}

static qwen3_result qwen3i_json_fail(const qwen3i_err *err, const char *file, const qwen3i_json *j) {
    return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: byte %lu: %s", file, (unsigned long)qwen3i_json_offset(j),
                       j->error ? j->error : "malformed");
}

/* The top-level key of an object: 1, and j stands at its value. 0: it is not there, or j->error is set. */
static int qwen3i_json_find(qwen3i_json *j, const char *wanted) {
    qwen3i_json_iter it;
    qwen3i_str key;
    if (qwen3i_json_open(j, '{', &it)) while (qwen3i_json_next(j, &it, &key)) {
        if (qwen3i_json_is(key, wanted)) return 1;
        qwen3i_json_skip(j);
    }
    return 0;
}

/* ================================================================================================
   THE MODEL OBJECT: what a loaded model is, and what the functions of one qwen3_load share
   ================================================================================================ */
typedef struct qwen3i_tokenizer qwen3i_tokenizer;
typedef struct qwen3i_shard qwen3i_shard;
typedef struct qwen3i_gguf qwen3i_gguf;
typedef struct qwen3i_source qwen3i_source;

typedef struct qwen3i_block {           /* memory that lives as long as the model; payload follows */
    struct qwen3i_block *next;
    size_t               size;
} qwen3i_block;
#define QWEN3I_BLOCK_HEAD 64            /* keeps the payload aligned for vector loads */

#define QWEN3I_MAX_EOS 8

typedef enum qwen3i_packing { QWEN3I_NOT_PACKED, QWEN3I_FLOAT8, QWEN3I_AWQ, QWEN3I_GPTQ,
                              QWEN3I_PACKED } qwen3i_packing;

typedef struct qwen3i_quantization {    /* of a directory: quantization_config */
    char           method[32], format[32];
    qwen3i_packing packing;
    int            bits, group;         /* group 0: all inputs */
    int            block[2];            /* of FP8 */
    int            v2, per_tensor;      /* GPTQ: zeros are stored as they are; FP8: one scale */
} qwen3i_quantization;

struct qwen3_model {
    qwen3_allocator      allocator;
    qwen3_logger         logger;
    qwen3_info           info;
    qwen3i_config        config;
    qwen3i_quantization  quantization;
    qwen3i_weights       weights;
    /* [2, n_embd] of a reranker without a head: rows of yes and no; or NULL */
    const float         *rank;
    qwen3i_tokenizer    *tokenizer;     /* NULL: the directory has none */
    qwen3_token          eos[QWEN3I_MAX_EOS];
    int                  n_eos;
    const qwen3_backend *backend;
    void                *backend_state;
    qwen3i_shard        *shards;        /* [n_shards] weight files */
    int                  n_shards;
    qwen3i_block        *blocks;        /* everything else that was allocated */
    int                  no_causal;     /* the configuration names Qwen3Model and not Qwen3ForCausalLM */
    int                  no_head;
    /* why embeddings are not what the files ask for; empty: they are */
    char                 no_embedding[160];
    int                  says_pooling;  /* the files say that hidden states make an embedding */
    /* an atomic word: the index of the vocabulary that grammars share, or 0 */
    void                *vocab;
};

typedef struct qwen3i_loader {          /* what the functions of one qwen3_load share */
    const qwen3_load_desc *desc;
    qwen3_model           *model;
    const qwen3i_err      *err;
    float                  done, step;  /* progress before the current file, and its share */
    const qwen3i_source   *source;      /* the layout of the files */
    const char            *gguf_name;   /* of a GGUF file, of its first part; else NULL */
    qwen3i_gguf           *gguf;        /* that part, being read */
    size_t                 folder;      /* bytes of desc->path that name the directory of the files */
    struct qwen3i_pool    *pool;        /* its threads start with the first loop; before, it has no lanes */
} qwen3i_loader;

/* Memory owned by the model; NULL if there is none. */
static void *qwen3i_model_alloc(qwen3_model *m, size_t n, size_t size) {
    qwen3i_block *b;
    if (size != 0 && n > ((size_t)-1 - QWEN3I_BLOCK_HEAD) / size) return NULL;
    b = (qwen3i_block *)qwen3i_alloc(&m->allocator, QWEN3I_BLOCK_HEAD + n * size);
    if (!b) return NULL;
    b->size = QWEN3I_BLOCK_HEAD + n * size;
    b->next = m->blocks;
    m->blocks = b;
    return (char *)b + QWEN3I_BLOCK_HEAD;
}

/* Tell the caller how far the load is; QWEN3_STOPPED if it wants no more. */
static qwen3_result qwen3i_progress(const qwen3i_loader *l, double share) {
    float done = l->done + l->step * (float)share;
    if (!l->desc->progress || l->desc->progress(done, l->desc->progress_user) == 0) return QWEN3_OK;
    return qwen3i_fail(l->err, QWEN3_STOPPED, "loading was cancelled");
}

/* ================================================================================================
   FILES: a model's files from a directory, from memory or through callbacks, as blobs of bytes
   ================================================================================================ */
typedef enum qwen3i_blob_kind { QWEN3I_BORROWED, QWEN3I_OWNED, QWEN3I_MAPPED } qwen3i_blob_kind;
typedef struct qwen3i_blob {
    const unsigned char *data;          /* NULL: there is no such file */
    size_t               size;
    qwen3i_blob_kind     kind;
} qwen3i_blob;

struct qwen3i_shard { const char *name; qwen3i_blob blob; };

/* Read n bytes in slices, so that a load can be cancelled: read_slice(handle, offset, dst, n) gives 0 on
   success. */
typedef int (*qwen3i_read_slice)(void *handle, uint64_t offset, void *dst, size_t n);

static qwen3_result qwen3i_read_all(const qwen3i_loader *l, const char *name, uint64_t size,
                                    qwen3i_read_slice read_slice, void *handle, qwen3i_blob *out) {
    const size_t slice = (size_t)8 << 20;
    const qwen3_allocator *a = &l->model->allocator;
    unsigned char *data = NULL;
    qwen3_result r = QWEN3_OK;
    size_t at, n;
    if (size < (size_t)-1) data = (unsigned char *)qwen3i_alloc(a, (size_t)size);
    if (!data) return qwen3i_no_memory(l->err, name, size);
    for (at = 0; at < size && r == QWEN3_OK; at += n) {
        n = qwen3i_min_size(slice, (size_t)size - at);
        if (read_slice(handle, at, data + at, n) != 0)
            r = qwen3i_fail(l->err, QWEN3_ERR_IO,
                            "%s: cannot read %lu bytes at offset %lu (the file has %llu)",
                            name, (unsigned long)n, (unsigned long)at, (unsigned long long)size);
        else if (size > slice) r = qwen3i_progress(l, (double)(at + n) / (double)size);
    }
    if (r != QWEN3_OK) { qwen3i_free(a, data, (size_t)size); return r; }
    out->data = data;
    out->size = (size_t)size;
    out->kind = QWEN3I_OWNED;
    return QWEN3_OK;
}

#ifndef QWEN3_NO_STDIO
#if defined(_WIN32)
typedef HANDLE qwen3i_handle;

/* A path as Windows wants it; the caller frees *bytes. NULL: no memory, or it is not UTF-8. */
static WCHAR *qwen3i_wide_path(const qwen3_allocator *a, const char *path, size_t *bytes) {
    const int n = MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, NULL, 0);
    WCHAR *wide;
    *bytes = (size_t)n * sizeof *wide;
    wide = n > 0 ? (WCHAR *)qwen3i_alloc(a, *bytes) : NULL;
    if (!wide) return NULL;
    MultiByteToWideChar(CP_UTF8, MB_ERR_INVALID_CHARS, path, -1, wide, n);
    for (int i = 0; i < n; i++)         /* paths that begin with \\?\ know no other separator */
        if (wide[i] == L'/') wide[i] = L'\\';
    return wide;
}

/* 1; 0: there is no such file; -1: it cannot be opened; -2: it is no regular file */
static int qwen3i_handle_open(const qwen3_allocator *a, qwen3i_handle *h, const char *path, uint64_t *size) {
    size_t bytes;
    WCHAR *wide = qwen3i_wide_path(a, path, &bytes);
    LARGE_INTEGER n;
    DWORD reason;
    if (!wide) return -1;
    *h = CreateFileW(wide, GENERIC_READ, FILE_SHARE_READ, NULL, OPEN_EXISTING, FILE_ATTRIBUTE_NORMAL, NULL);
    reason = GetLastError();
    qwen3i_free(a, wide, bytes);
    SetLastError(reason);
    if (*h == INVALID_HANDLE_VALUE)
        return GetLastError() == ERROR_FILE_NOT_FOUND || GetLastError() == ERROR_PATH_NOT_FOUND ? 0 : -1;
    if (GetFileType(*h) == FILE_TYPE_DISK && GetFileSizeEx(*h, &n)) {
        *size = (uint64_t)n.QuadPart;
        return 1;
    }
    CloseHandle(*h);
    return -2;
}
static const char *qwen3i_open_reason(int found) {
    const DWORD code = GetLastError();
    if (found == -2) return "it is no regular file";
    return code == ERROR_ACCESS_DENIED ? "access is denied" :
           code == ERROR_SHARING_VIOLATION ? "another program uses it" :
           "the system refuses";
}
static void qwen3i_handle_close(qwen3i_handle h) { CloseHandle(h); }

/* Write all of a file. 0, or -1. */
static int qwen3i_write_all(const qwen3_allocator *a, const char *path, const char *p, size_t n) {
    size_t bytes;
    WCHAR *wide = qwen3i_wide_path(a, path, &bytes);
    HANDLE h;
    DWORD got = 1;
    if (!wide) return -1;
    h = CreateFileW(wide, GENERIC_WRITE, 0, NULL, CREATE_ALWAYS, FILE_ATTRIBUTE_NORMAL, NULL);
    qwen3i_free(a, wide, bytes);
    if (h == INVALID_HANDLE_VALUE) return -1;
    for (; n > 0 && got > 0; p += got, n -= got)
        if (!WriteFile(h, p, (DWORD)qwen3i_min_size(n, (size_t)1 << 26), &got, NULL)) break;
    return CloseHandle(h) && n == 0 ? 0 : -1;
}

/* Put one file in the place of another. 0, or -1. */
static int qwen3i_replace_file(const qwen3_allocator *a, const char *from, const char *to) {
    size_t from_bytes, to_bytes;
    WCHAR *from_wide = qwen3i_wide_path(a, from, &from_bytes), *to_wide = qwen3i_wide_path(a, to, &to_bytes);
    const int done = from_wide && to_wide && MoveFileExW(from_wide, to_wide,
                                                         MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH);
    qwen3i_free(a, from_wide, from_bytes);
    qwen3i_free(a, to_wide, to_bytes);
    return done ? 0 : -1;
}

static int qwen3i_handle_read(void *handle, uint64_t offset, void *dst, size_t n) {
    DWORD got = 0;
    (void)offset;                       /* slices come in order */
    return !ReadFile(*(qwen3i_handle *)handle, dst, (DWORD)n, &got, NULL) || got != n;
}

static int qwen3i_is_directory(const qwen3_allocator *a, const char *path) {
    size_t bytes;
    WCHAR *wide = qwen3i_wide_path(a, path, &bytes);
    DWORD attributes = INVALID_FILE_ATTRIBUTES;
    if (wide) attributes = GetFileAttributesW(wide);
    qwen3i_free(a, wide, bytes);
    return attributes != INVALID_FILE_ATTRIBUTES && (attributes & FILE_ATTRIBUTE_DIRECTORY) != 0;
}

#ifndef QWEN3_NO_MMAP
static const void *qwen3i_map(qwen3i_handle h, size_t size) {
    const void *p;
    HANDLE mapping = CreateFileMappingW(h, NULL, PAGE_READONLY, 0, 0, NULL);
    (void)size;
    if (!mapping) return NULL;
    p = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
    CloseHandle(mapping);               /* the view keeps it alive */
    return p;
}
static void qwen3i_unmap(const void *p, size_t size) { (void)size; UnmapViewOfFile(p); }
#endif

#else /* POSIX */
typedef int qwen3i_handle;

#if defined(O_CLOEXEC)
  #define QWEN3I_CLOEXEC O_CLOEXEC
#elif defined(__O_CLOEXEC)              /* glibc's, which -std=c99 hides */
  #define QWEN3I_CLOEXEC __O_CLOEXEC
#else
  #define QWEN3I_CLOEXEC 0
#endif
/* Not to wait for a pipe's writer, not to take a terminal, not to be passed on to other programs. */
#define QWEN3I_OPEN_FLAGS (O_RDONLY | O_NONBLOCK | O_NOCTTY | QWEN3I_CLOEXEC)

/* 1; 0: there is no such file; -1: it cannot be opened; -2: it is no regular file */
static int qwen3i_handle_open(const qwen3_allocator *a, qwen3i_handle *h, const char *path, uint64_t *size) {
    struct stat st;
    (void)a;
    do *h = open(path, QWEN3I_OPEN_FLAGS); while (*h < 0 && errno == EINTR);
    if (*h < 0) return errno == ENOENT ? 0 : -1;
    if (fstat(*h, &st) == 0 && S_ISREG(st.st_mode) && st.st_size >= 0) {
        *size = (uint64_t)st.st_size;
        return 1;
    }
    close(*h);
    return -2;
}
static const char *qwen3i_open_reason(int found) {
    return found == -2 ? "it is no regular file" : strerror(errno);
}
static void qwen3i_handle_close(qwen3i_handle h) { close(h); }

/* Write all of a file. 0, or -1. */
static int qwen3i_write_all(const qwen3_allocator *a, const char *path, const char *p, size_t n) {
    const int h = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_NOCTTY | QWEN3I_CLOEXEC, 0666);
    int failed;
    (void)a;
    if (h < 0) return -1;
    while (n > 0) {
        const ssize_t put = write(h, p, qwen3i_min_size(n, (size_t)1 << 26));
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) break;
        p += put;
        n -= (size_t)put;
    }
    failed = n > 0 || fsync(h) != 0;
    return close(h) == 0 && !failed ? 0 : -1;
}

/* Put one file in the place of another. 0, or -1. */
static int qwen3i_replace_file(const qwen3_allocator *a, const char *from, const char *to) {
    (void)a;
    return rename(from, to);
}

static int qwen3i_handle_read(void *handle, uint64_t offset, void *dst, size_t n) {
    char *p = (char *)dst;
    (void)offset;                       /* slices come in order */
    while (n > 0) {
        ssize_t got = read(*(qwen3i_handle *)handle, p, n);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return 1;         /* an error, or the file has shrunk */
        p += got;
        n -= (size_t)got;
    }
    return 0;
}

static int qwen3i_is_directory(const qwen3_allocator *a, const char *path) {
    struct stat st;
    (void)a;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

#ifndef QWEN3_NO_MMAP
static const void *qwen3i_map(qwen3i_handle h, size_t size) {
    void *p = mmap(NULL, size, PROT_READ, MAP_SHARED, h, 0);
    return p == MAP_FAILED ? NULL : p;
}
static void qwen3i_unmap(const void *p, size_t size) {
    union { const void *in; void *out; } u;
    u.in = p;
    munmap(u.out, size);
}
#endif
#endif

/* Write a file beside the one that it then replaces: a crash leaves one of them whole. */
static qwen3_result qwen3i_write_file(const qwen3_allocator *a, const char *path, const char *data,
                                      size_t size, const qwen3i_err *err) {
    const size_t n = strlen(path) + 6;
    char *part = (char *)qwen3i_alloc(a, n);
    int failed, reason;
    if (!part) return qwen3i_no_memory(err, "a path", n);
    snprintf(part, n, "%s.part", path);
    failed = qwen3i_write_all(a, part, data, size) != 0 || qwen3i_replace_file(a, part, path) != 0;
    reason = errno;
    if (failed) remove(part);
    qwen3i_free(a, part, n);
    return failed ? qwen3i_fail(err, QWEN3_ERR_IO, "%s: cannot be written: %s", path, strerror(reason)) :
           QWEN3_OK;
}

/* The bytes of a file, for qwen3i_free. */
static qwen3_result qwen3i_read_file(const qwen3_allocator *a, const char *path, char **data, uint64_t *size,
                                     const qwen3i_err *err) {
    qwen3i_handle h;
    uint64_t at, n;
    const int found = qwen3i_handle_open(a, &h, path, size);
    if (found <= 0) return qwen3i_fail(err, QWEN3_ERR_IO, "%s: %s", path,
                                       found ? qwen3i_open_reason(found) : "there is no such file");
    *data = *size < (size_t)-1 ? (char *)qwen3i_alloc(a, (size_t)*size) : NULL;
    for (at = 0; *data && at < *size; at += n) {
        n = *size - at < 1u << 26 ? *size - at : 1u << 26;
        if (qwen3i_handle_read(&h, at, *data + at, (size_t)n) == 0) continue;
        qwen3i_handle_close(h);
        qwen3i_free(a, *data, (size_t)*size);
        *data = NULL;
        return qwen3i_fail(err, QWEN3_ERR_IO, "%s: cannot be read", path);
    }
    qwen3i_handle_close(h);
    return *data ? QWEN3_OK : qwen3i_no_memory(err, path, *size);
}

static qwen3_result qwen3i_open_path(const qwen3i_loader *l, const char *name, int map, qwen3i_blob *out) {
    const qwen3_allocator *a = &l->model->allocator;
    size_t n = l->folder + strlen(name) + 2;
    char *path = (char *)qwen3i_alloc(a, n);
    qwen3i_handle h;
    uint64_t size = 0;
    qwen3_result r = QWEN3_OK;
    int found;
    if (!path) return qwen3i_no_memory(l->err, "a path", n);
    memcpy(path, l->desc->path, l->folder);
    snprintf(path + l->folder, n - l->folder, "%s%s", l->gguf_name ? "" : "/", name);
    found = qwen3i_handle_open(a, &h, path, &size);
    if (found < 0)
        r = qwen3i_fail(l->err, QWEN3_ERR_IO, "%s: cannot be opened: %s", name, qwen3i_open_reason(found));
    qwen3i_free(a, path, n);
    if (found <= 0) return r;
#ifndef QWEN3_NO_MMAP
    if (map && size > 0 && size < (size_t)-1 && !(l->desc->flags & QWEN3_LOAD_NO_MMAP)) {
        out->data = (const unsigned char *)qwen3i_map(h, (size_t)size);
        if (out->data) { out->size = (size_t)size; out->kind = QWEN3I_MAPPED; }     /* else it is read */
    }
#endif
    (void)map;
    if (!out->data) r = qwen3i_read_all(l, name, size, qwen3i_handle_read, &h, out);
    qwen3i_handle_close(h);
    return r;
}
#else
static qwen3_result qwen3i_write_file(const qwen3_allocator *a, const char *path, const char *data,
                                      size_t size, const qwen3i_err *err) {
    (void)a; (void)data; (void)size;
    return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "%s: the library was compiled with QWEN3_NO_STDIO", path);
}

static qwen3_result qwen3i_read_file(const qwen3_allocator *a, const char *path, char **data, uint64_t *size,
                                     const qwen3i_err *err) {
    (void)a; (void)data; (void)size;
    return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "%s: the library was compiled with QWEN3_NO_STDIO", path);
}
#endif /* QWEN3_NO_STDIO */

typedef struct qwen3i_io_file { const qwen3_io *io; const char *name; } qwen3i_io_file;

static int qwen3i_io_read(void *handle, uint64_t offset, void *dst, size_t n) {
    const qwen3i_io_file *f = (const qwen3i_io_file *)handle;
    return f->io->read(f->io->user, f->name, offset, dst, n);
}

/* Get a file by name. If there is none, out->data is NULL and the result is OK. map: mapping is worth it. */
static qwen3_result qwen3i_open_any(const qwen3i_loader *l, const char *name, int map, qwen3i_blob *out) {
    const qwen3_load_desc *d = l->desc;
    int i;
    memset(out, 0, sizeof *out);
    if (d->io.read) {
        qwen3i_io_file f;
        int64_t size = d->io.size(d->io.user, name);
        if (size < 0) return QWEN3_OK;
        f.io = &d->io;
        f.name = name;
        return qwen3i_read_all(l, name, (uint64_t)size, qwen3i_io_read, &f, out);
    }
    for (i = 0; i < d->n_files; i++) {
        if (strcmp(d->files[i].name, name) != 0) continue;
        out->data = d->files[i].data ? (const unsigned char *)d->files[i].data : (const unsigned char *)"";
        out->size = d->files[i].data ? d->files[i].size : 0;
        return QWEN3_OK;
    }
#ifndef QWEN3_NO_STDIO
    if (!d->files) return qwen3i_open_path(l, name, map, out);
#endif
    (void)map;
    return QWEN3_OK;
}

static void qwen3i_close(const qwen3_allocator *a, qwen3i_blob *b) {
    if (b->kind == QWEN3I_OWNED) qwen3i_free(a, b->data, b->size);
#ifndef QWEN3_NO_MMAP
    if (b->kind == QWEN3I_MAPPED) qwen3i_unmap(b->data, b->size);
#endif
    memset(b, 0, sizeof *b);
}

/* The same, which is not the stand-in that git leaves of a large file that was not fetched. */
QWEN3I_COLD
static qwen3_result qwen3i_open(const qwen3i_loader *l, const char *name, int map, qwen3i_blob *out) {
    static const char pointer[] = "version https://git-lfs";
    qwen3_result r = qwen3i_open_any(l, name, map, out);
    if (r != QWEN3_OK || !out->data || out->size < sizeof pointer ||
        memcmp(out->data, pointer, sizeof pointer - 1) != 0) return r;
    qwen3i_close(&l->model->allocator, out);
    return qwen3i_fail(l->err, QWEN3_ERR_FORMAT, "%s: a Git LFS pointer, not the file itself: fetch it with "
                                                 "git lfs pull", name);
}

/* ================================================================================================
   WEIGHT FORMATS: numbers by themselves, and blocks of small whole numbers with scales. The layouts are those
   of GGUF files (ggml-common.h of ggml-org/ggml). One format is one function, and its line in QWEN3I_TYPES.
   ================================================================================================ */
#define QWEN3I_MAX_BLOCK 256            /* elements */

/* A part of a row: element e is d[g] * q[e], or d[g] * q[e] + m[g] in formats with offsets, for its group g =
   e / qwen3i_group_of(type). The product is exact in float32, so that only the sum is rounded. */
typedef struct qwen3i_unpacked {
    int8_t q[QWEN3I_MAX_BLOCK];
    float d[QWEN3I_MAX_BLOCK / 16], m[QWEN3I_MAX_BLOCK / 16];
} qwen3i_unpacked;

/* One block b, to where its elements and groups begin */
typedef void (*qwen3i_unpack)(int8_t *q, float *d, float *m, const uint8_t *b);

/* Elements that share a scale */
static int qwen3i_group_of(qwen3i_type type) {
    return type == QWEN3I_Q2_K || type == QWEN3I_Q3_K || type == QWEN3I_Q6_K ||
           type == QWEN3I_NVFP4 ? 16 : 32;
}

static int qwen3i_has_offsets(qwen3i_type type) {
    return type == QWEN3I_Q4_1 || type == QWEN3I_Q5_1 || type == QWEN3I_Q2_K || type == QWEN3I_Q4_K ||
           type == QWEN3I_Q5_K || type == QWEN3I_INT8;
}

/* ---- what blocks are made of: eight bytes at a time ------------------------------------------ */
static float qwen3i_half_at(const uint8_t *b) { return qwen3i_f16_to_f32((uint16_t)(b[0] | b[1] << 8)); }

QWEN3I_INLINE uint64_t qwen3i_eight(const void *b) {
    uint64_t v;
    memcpy(&v, b, 8);
    return v;
}

/* The bits of mask out of each byte shifted right */
QWEN3I_INLINE uint64_t qwen3i_eight_fields(uint64_t v, int shift, unsigned mask) {
    return v >> shift & mask * 0x0101010101010101u;
}

/* Bytes below 128 less a number up to 128 */
QWEN3I_INLINE uint64_t qwen3i_eight_less(uint64_t v, unsigned less) {
    const uint64_t top = 0x8080808080808080u;
    return ((v | top) - less * 0x0101010101010101u) ^ top;
}

/* n bytes hold 2 n elements: the low halves n of them, the high halves the next n. */
QWEN3I_INLINE void qwen3i_unpack_nibbles(int8_t *q, const uint8_t *b, int n, unsigned less) {
    for (int i = 0; i < n; i += 8) {
        const uint64_t v = qwen3i_eight(b + i);
        const uint64_t low = qwen3i_eight_less(qwen3i_eight_fields(v, 0, 15), less);
        const uint64_t high = qwen3i_eight_less(qwen3i_eight_fields(v, 4, 15), less);
        memcpy(q + i, &low, 8);
        memcpy(q + n + i, &high, 8);
    }
}

/* Upper bits of n elements: the fields of b that begin at `shift`, moved left by `left`; then the
   elements become less. */
QWEN3I_INLINE void qwen3i_unpack_upper(int8_t *q, const uint8_t *b, int n, int shift, unsigned mask, int left,
                                       unsigned less) {
    for (int i = 0; i < n; i += 8) {
        uint64_t v = qwen3i_eight(q + i) | qwen3i_eight_fields(qwen3i_eight(b + i), shift, mask) << left;
        v = qwen3i_eight_less(v, less);
        memcpy(q + i, &v, 8);
    }
}

/* 32 bytes hold 128 elements of two bits: the lowest of all bytes first. */
static void qwen3i_unpack_pairs(int8_t *q, const uint8_t *b) {
    memset(q, 0, 128);
    for (int k = 0; k < 4; k++) qwen3i_unpack_upper(q + 32 * k, b, 32, 2 * k, 3, 0, 0);
}

/* The six-bit scales and minimums of eight groups in Q4_K and Q5_K, from 12 bytes */
static void qwen3i_unpack_scales_k(float *d, float *m, const uint8_t *b) {
    const uint8_t *s = b + 4;
    const float scale = qwen3i_half_at(b), minimum = -qwen3i_half_at(b + 2);
    for (int j = 0; j < 4; j++) {
        d[j] = scale * (float)(s[j] & 63);
        m[j] = minimum * (float)(s[j + 4] & 63);
        d[j + 4] = scale * (float)((s[j + 8] & 15) | (s[j] >> 6) << 4);
        m[j + 4] = minimum * (float)((s[j + 8] >> 4) | (s[j + 4] >> 6) << 4);
    }
}

/* A value out of 16 for four bits */
static const int8_t qwen3i_iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69,
                                             89, 113};
static const int8_t qwen3i_q4_0_values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
/* twice E2M1's */
static const int8_t qwen3i_fp4_values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static void qwen3i_unpack_values(int8_t *q, int n, const int8_t *values) {
    for (int i = 0; i < n; i++) q[i] = values[q[i]];
}

/* E4M3 without a sign, of which 0x7F is 0 */
static float qwen3i_ue4m3_to_f32(unsigned x) {
    unsigned exponent = x >> 3 & 15, fraction = x & 7;
    if ((x & 0x7F) == 0x7F) return 0;
    return exponent == 0 ? (float)fraction / 512 :
           qwen3i_float_from_bits((exponent + 120) << 23 | fraction << 20);
}

/* ---- blocks of 32 and 64 --------------------------------------------------------------------- */
static void qwen3i_unpack_q8_0(int8_t *q, float *d, float *m, const uint8_t *b) {
    (void)m;
    memcpy(q, b + 2, 32);
    d[0] = qwen3i_half_at(b);
}

static void qwen3i_unpack_q4_0(int8_t *q, float *d, float *m, const uint8_t *b) {
    (void)m;
    qwen3i_unpack_nibbles(q, b + 2, 16, 8);
    d[0] = qwen3i_half_at(b);
}

static void qwen3i_unpack_q4_1(int8_t *q, float *d, float *m, const uint8_t *b) {
    qwen3i_unpack_nibbles(q, b + 4, 16, 0);
    d[0] = qwen3i_half_at(b);
    m[0] = qwen3i_half_at(b + 2);
}

/* The fifth bits of 32 elements lie in a word of their own. */
static void qwen3i_unpack_fives(int8_t *q, const uint8_t *fifth, const uint8_t *b, int less) {
    qwen3i_unpack_nibbles(q, b, 16, 0);
    for (int i = 0; i < 32; i++) q[i] = (int8_t)((q[i] | (fifth[i / 8] >> i % 8 & 1) << 4) - less);
}

static void qwen3i_unpack_q5_0(int8_t *q, float *d, float *m, const uint8_t *b) {
    (void)m;
    qwen3i_unpack_fives(q, b + 2, b + 6, 16);
    d[0] = qwen3i_half_at(b);
}

static void qwen3i_unpack_q5_1(int8_t *q, float *d, float *m, const uint8_t *b) {
    qwen3i_unpack_fives(q, b + 4, b + 8, 0);
    d[0] = qwen3i_half_at(b);
    m[0] = qwen3i_half_at(b + 2);
}

static void qwen3i_unpack_iq4_nl(int8_t *q, float *d, float *m, const uint8_t *b) {
    (void)m;
    qwen3i_unpack_nibbles(q, b + 2, 16, 0);
    qwen3i_unpack_values(q, 32, qwen3i_iq4_values);
    d[0] = qwen3i_half_at(b);
}

/* Half of the number of E8M0: 2^(x - 128), below 2^-126 a subnormal number */
static float qwen3i_e8m0_half(unsigned x) {
    return qwen3i_float_from_bits(x < 2 ? (uint32_t)0x200000 << x : (uint32_t)(x - 1) << 23);
}

static void qwen3i_unpack_mxfp4(int8_t *q, float *d, float *m, const uint8_t *b) {
    (void)m;
    qwen3i_unpack_nibbles(q, b + 1, 16, 0);
    qwen3i_unpack_values(q, 32, qwen3i_fp4_values);
    d[0] = qwen3i_e8m0_half(b[0]);
}

static void qwen3i_unpack_nvfp4(int8_t *q, float *d, float *m, const uint8_t *b) {
    (void)m;
    for (int i = 0; i < 4; i++) {
        qwen3i_unpack_nibbles(q + 16 * i, b + 4 + 8 * i, 8, 0);
        d[i] = qwen3i_ue4m3_to_f32(b[i]) / 2;
    }
    qwen3i_unpack_values(q, 64, qwen3i_fp4_values);
}

/* ---- blocks that this library makes of the tensors of quantised directories ------------------ */
/* Scale and zero in one word: a scale that was F16 or BF16 leaves the last 8 bits of its float32 free. */
static float qwen3i_packed_scale(const uint8_t *b, unsigned *zero) {
    uint32_t word;
    memcpy(&word, b, 4);
    *zero = word & 255;
    return qwen3i_float_from_bits(word & ~(uint32_t)255);
}

static void qwen3i_unpack_int4(int8_t *q, float *d, float *m, const uint8_t *b) {
    unsigned zero;
    (void)m;
    d[0] = d[1] = d[2] = d[3] = qwen3i_packed_scale(b, &zero);
    for (int k = 0; k < 4; k++) qwen3i_unpack_nibbles(q + 32 * k, b + 4 + 16 * k, 16, zero & 127);
}

static void qwen3i_unpack_int4s(int8_t *q, float *d, float *m, const uint8_t *b) {
    unsigned zero;
    (void)m;
    d[0] = qwen3i_packed_scale(b, &zero);
    qwen3i_unpack_nibbles(q, b + 4, 16, zero & 127);
}

static void qwen3i_unpack_int8(int8_t *q, float *d, float *m, const uint8_t *b) {
    unsigned zero;
    d[0] = d[1] = d[2] = d[3] = qwen3i_packed_scale(b, &zero);
    m[0] = m[1] = m[2] = m[3] = -d[0] * (float)((int)zero - 128);
    memcpy(q, b + 4, 128);
}

static float qwen3i_f32_at(const uint8_t *b) {
    float f;
    memcpy(&f, b, 4);
    return f;
}

/* Here q are numbers in E4M3, whose products are rounded. */
static void qwen3i_unpack_fp8(int8_t *q, float *d, float *m, const uint8_t *b) {
    (void)m;
    memcpy(q, b + 4, 128);
    d[0] = d[1] = d[2] = d[3] = qwen3i_f32_at(b);
}

static float qwen3i_e4m3_to_f32(unsigned x) {
    unsigned exponent = x >> 3 & 15, fraction = x & 7;
    float size = exponent == 0 ? (float)fraction / 512 :
                 qwen3i_float_from_bits((exponent + 120) << 23 | fraction << 20);
    return x & 0x80 ? -size : size;
}

/* ---- blocks of 256 --------------------------------------------------------------------------- */
static void qwen3i_unpack_q2_k(int8_t *q, float *d, float *m, const uint8_t *b) {
    const float scale = qwen3i_half_at(b + 80), minimum = -qwen3i_half_at(b + 82);
    for (int i = 0; i < 2; i++) qwen3i_unpack_pairs(q + 128 * i, b + 16 + 32 * i);
    for (int i = 0; i < 16; i++) {
        d[i] = scale * (float)(b[i] & 15);
        m[i] = minimum * (float)(b[i] >> 4);
    }
}

static void qwen3i_unpack_q3_k(int8_t *q, float *d, float *m, const uint8_t *b) {
    const float scale = qwen3i_half_at(b + 108);
    (void)m;
    for (int i = 0; i < 2; i++) qwen3i_unpack_pairs(q + 128 * i, b + 32 + 32 * i);
    for (int k = 0; k < 8; k++) qwen3i_unpack_upper(q + 32 * k, b, 32, k, 1, 2, 4);
    for (int i = 0; i < 16; i++) {
        int low = b[96 + i % 8] >> 4 * (i / 8) & 15, high = b[104 + i % 4] >> 2 * (i / 4) & 3;
        d[i] = scale * (float)((low | high << 4) - 32);
    }
}

static void qwen3i_unpack_q4_k(int8_t *q, float *d, float *m, const uint8_t *b) {
    for (int k = 0; k < 4; k++) qwen3i_unpack_nibbles(q + 64 * k, b + 16 + 32 * k, 32, 0);
    qwen3i_unpack_scales_k(d, m, b);
}

static void qwen3i_unpack_q5_k(int8_t *q, float *d, float *m, const uint8_t *b) {
    for (int k = 0; k < 4; k++) qwen3i_unpack_nibbles(q + 64 * k, b + 48 + 32 * k, 32, 0);
    for (int k = 0; k < 8; k++) qwen3i_unpack_upper(q + 32 * k, b + 16, 32, k, 1, 4, 0);
    qwen3i_unpack_scales_k(d, m, b);
}

static void qwen3i_unpack_q6_k(int8_t *q, float *d, float *m, const uint8_t *b) {
    const float scale = qwen3i_half_at(b + 208);
    (void)m;
    for (int h = 0; h < 2; h++) {       /* of 128 elements: low halves of 64 bytes, high pairs of 32 */
        qwen3i_unpack_nibbles(q + 128 * h, b + 64 * h, 64, 0);
        for (int k = 0; k < 4; k++)
            qwen3i_unpack_upper(q + 128 * h + 32 * k, b + 128 + 32 * h, 32, 2 * k, 3, 4, 32);
    }
    for (int i = 0; i < 16; i++) d[i] = scale * (float)(int8_t)b[192 + i];
}

static void qwen3i_unpack_iq4_xs(int8_t *q, float *d, float *m, const uint8_t *b) {
    const float scale = qwen3i_half_at(b);
    (void)m;
    for (int k = 0; k < 8; k++) {
        int low = b[4 + k / 2] >> 4 * (k % 2) & 15, high = (b[2] | b[3] << 8) >> 2 * k & 3;
        qwen3i_unpack_nibbles(q + 32 * k, b + 8 + 16 * k, 16, 0);
        d[k] = scale * (float)((low | high << 4) - 32);
    }
    qwen3i_unpack_values(q, 256, qwen3i_iq4_values);
}

/* ---- the table ------------------------------------------------------------------------------- */
typedef struct qwen3i_format {
    const char *name;
    int gguf, elements, bytes;
    qwen3i_unpack unpack;
} qwen3i_format;

/* Of a valid type. unpack is NULL for numbers. */
static const qwen3i_format *qwen3i_format_of(qwen3i_type type) {
    #define QWEN3I_FORMAT(name, function, gguf, elements, bytes) \
        {#name, gguf, elements, bytes, qwen3i_unpack_##function},
    static const qwen3i_format formats[] = {
        {"none", -1, 1, 0, NULL}, {"F32", 0, 1, 4, NULL}, {"F16", 1, 1, 2, NULL}, {"BF16", 30, 1, 2, NULL},
        QWEN3I_BLOCK_TYPES(QWEN3I_FORMAT)
    };
    #undef QWEN3I_FORMAT
    return &formats[type];
}

static int qwen3i_is_block(qwen3i_type type) { return type > QWEN3I_BF16; }

/* Blocks of bytes, which are multiplied as float32: FP8 for its range, Q8_0 because memory is
   its limit anyway */
static int qwen3i_is_bytes(qwen3i_type type) { return type == QWEN3I_Q8_0 || type == QWEN3I_FP8; }

/* By its name in a safetensors file or as ggml calls it; QWEN3I_NO_TYPE for what is not supported. */
static qwen3i_type qwen3i_type_of(qwen3i_str name) {
    int i;
    for (i = QWEN3I_F32; i < QWEN3I_FP8; i++)       /* the rest is made here */
        if (qwen3i_json_is(name, qwen3i_format_of((qwen3i_type)i)->name)) return (qwen3i_type)i;
    return QWEN3I_NO_TYPE;
}

/* Bytes of a row of n elements; a block that is not full takes as much as a full one. */
static uint64_t qwen3i_row_bytes(qwen3i_type type, int n) {
    const qwen3i_format *f = qwen3i_format_of(type);
    return ((uint64_t)n + (uint64_t)f->elements - 1) / (uint64_t)f->elements * (uint64_t)f->bytes;
}

/* n elements of a row to float32, from the beginning of a block on */
static void qwen3i_decode(float *y, const void *row, qwen3i_type type, int n) {
    const qwen3i_format *f = qwen3i_format_of(type);
    const int group = qwen3i_group_of(type), offsets = qwen3i_has_offsets(type);
    const uint8_t *b = (const uint8_t *)row;
    qwen3i_unpacked u;
    if (!f->unpack) {
        for (int i = 0; i < n; i++) y[i] = qwen3i_value(row, type, i);
        return;
    }
    for (; n > 0; n -= f->elements, b += f->bytes) {
        const int end = n < f->elements ? n : f->elements;
        f->unpack(u.q, u.d, u.m, b);
        for (int i = 0; i < end; i++) {
            const float q = type == QWEN3I_FP8 ? qwen3i_e4m3_to_f32((uint8_t)u.q[i]) : (float)u.q[i];
            const int g = group == 16 ? i / 16 : i / 32;
            *y++ = offsets ? u.d[g] * q + u.m[g] : u.d[g] * q;
        }
    }
}

/* ================================================================================================
   QUANTISER: numbers to blocks. The scale and offset of a group of elements are those of least squares
   for the whole numbers that they give, found by turns, from several starts; then what the groups of
   a block share is fitted to all of them.
   ================================================================================================ */
/* of q; offset: x = scale q - offset, >= 0 */
typedef struct qwen3i_range { int low, high, offset; } qwen3i_range;
typedef struct qwen3i_fit { float scale, offset, error; } qwen3i_fit;

/* What an element's squared error counts: large ones more, as more of the output hangs on them. Of eight such
   weights this one gave the least divergence of a whole model. */
static void qwen3i_importance(float *w, const float *x, int n) {
    float mean = 0;
    for (int i = 0; i < n; i++) mean += x[i] * x[i];
    mean /= (float)n;
    for (int i = 0; i < n; i++) w[i] = 2 * mean + x[i] * x[i];
}

/* Sums go in 16 lanes, n being 16 or 32: so compilers make vectors of them. */
static float qwen3i_fit_sum(const float *lanes) {
    float s[4];
    for (int k = 0; k < 4; k++) s[k] = (lanes[k] + lanes[4 + k]) + (lanes[8 + k] + lanes[12 + k]);
    return (s[0] + s[1]) + (s[2] + s[3]);
}

/* The nearest q for a scale and offset, and the error that is left. What is no number becomes the lowest. */
static float qwen3i_fit_round(float *q, const float *x, const float *w, int n, const qwen3i_range *r,
                              float scale, float offset) {
    const float inverse = scale != 0 ? 1 / scale : 0, low = (float)r->low, span = (float)(r->high - r->low);
    float error[16] = {0};
    for (int i = 0; i < n; i += 16) for (int k = 0; k < 16; k++) {
        float v = (x[i + k] + offset) * inverse - low;
        v = v > 0 ? v : 0;
        v = v < span ? v : span;
        const float whole = (float)(int)(v + 0.5f) + low, e = x[i + k] - (scale * whole - offset);
        q[i + k] = whole;
        error[k] += w[i + k] * e * e;
    }
    return qwen3i_fit_sum(error);
}

/* The scale and offset of least squares for these q */
static void qwen3i_fit_solve(qwen3i_fit *f, const float *q, const float *x, const float *w, int n,
                             const qwen3i_range *r) {
    float lanes[5][16] = {{0}};
    for (int i = 0; i < n; i += 16) for (int k = 0; k < 16; k++) {
        const float wk = w[i + k], wx = wk * x[i + k], wq = wk * q[i + k];
        lanes[0][k] += wk; lanes[1][k] += wq; lanes[2][k] += wq * q[i + k]; lanes[3][k] += wx;
        lanes[4][k] += wx * q[i + k];
    }
    const float sw = qwen3i_fit_sum(lanes[0]), sq = qwen3i_fit_sum(lanes[1]), sqq = qwen3i_fit_sum(lanes[2]);
    const float sx = qwen3i_fit_sum(lanes[3]), sxq = qwen3i_fit_sum(lanes[4]);
    const float det = sw * sqq - sq * sq;
    f->offset = 0;
    if (r->offset && det > 0) {
        f->scale = (sw * sxq - sx * sq) / det;
        f->offset = (sqq * -sx + sq * sxq) / det;
        if (f->offset >= 0) return;
        f->offset = 0;
    }
    if (sqq > 0) f->scale = sxq / sqq;
}

/* From one start by turns; *best is replaced if this is better. */
static void qwen3i_fit_from(qwen3i_fit *best, const float *x, const float *w, int n, const qwen3i_range *r,
                            float scale, float offset) {
    float q[32];
    qwen3i_fit f;
    f.scale = scale;
    f.offset = offset;
    for (int turn = 0; turn < 3; turn++) {
        f.error = qwen3i_fit_round(q, x, w, n, r, f.scale, f.offset);
        if (f.error < best->error) *best = f;
        qwen3i_fit_solve(&f, q, x, w, n, r);
    }
}

/* Of a group: starts are scales that give the extremes about the last q. */
static qwen3i_fit qwen3i_fit_group(const float *x, const float *w, int n, const qwen3i_range *r) {
    qwen3i_fit best;
    float low = 0, high = 0;
    for (int i = 0; i < n; i++) { low = x[i] < low ? x[i] : low; high = x[i] > high ? x[i] : high; }
    best.scale = best.offset = 0;
    best.error = FLT_MAX;
    if (!(high - low > 0 && high - low < FLT_MAX)) return best;
    for (int k = 0; k < 8 && r->offset; k++)
        qwen3i_fit_from(&best, x, w, n, r, (high - low) / ((float)r->high - 1.2f + 0.3f * (float)k), -low);
    for (int k = 0; k < 6 && !r->offset; k++) {
        const float extreme = high > -low ? high : low, steps = (float)k * 0.3f - 0.8f;
        qwen3i_fit_from(&best, x, w, n, r, extreme / ((float)r->low - steps), 0);
        if (k % 3 == 1) qwen3i_fit_from(&best, x, w, n, r, extreme / ((float)r->high + steps), 0);
    }
    return best;
}

static void qwen3i_put_half(uint8_t *b, float v) {
    const uint16_t h = qwen3i_f32_to_f16(v);
    b[0] = (uint8_t)h;
    b[1] = (uint8_t)(h >> 8);
}

static float qwen3i_as_half(float v) { return qwen3i_f16_to_f32(qwen3i_f32_to_f16(v)); }

/* ---- blocks of one group --------------------------------------------------------------------- */
/* q of 32 elements; the scale is a half already. */
static float qwen3i_pack_group(int8_t *q, const float *x, const qwen3i_range *r) {
    float w[32], whole[32];
    qwen3i_importance(w, x, 32);
    const qwen3i_fit f = qwen3i_fit_group(x, w, 32, r);
    const float scale = qwen3i_as_half(f.scale);
    qwen3i_fit_round(whole, x, w, 32, r, scale, 0);
    for (int i = 0; i < 32; i++) q[i] = (int8_t)whole[i];
    return scale;
}

static void qwen3i_pack_q8_0(uint8_t *b, const float *x) {
    static const qwen3i_range range = {-127, 127, 0};
    int8_t q[32];
    qwen3i_put_half(b, qwen3i_pack_group(q, x, &range));
    memcpy(b + 2, q, 32);
}

/* The same by the largest number alone, without a search: for what is rounded while a model runs */
static void qwen3i_round_q8_0(uint8_t *b, const float *x) {
    static const qwen3i_range range = {-127, 127, 0};
    float ones[32], whole[32], most = 0;
    for (int i = 0; i < 32; i++) {
        ones[i] = 1;
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
    }
    const float scale = qwen3i_as_half(most / 127);
    qwen3i_fit_round(whole, x, ones, 32, &range, scale, 0);
    qwen3i_put_half(b, scale);
    for (int i = 0; i < 32; i++) b[2 + i] = (uint8_t)(int8_t)whole[i];
}

static void qwen3i_pack_q4_0(uint8_t *b, const float *x) {
    static const qwen3i_range range = {-8, 7, 0};
    int8_t q[32];
    qwen3i_put_half(b, qwen3i_pack_group(q, x, &range));
    for (int i = 0; i < 16; i++) b[2 + i] = (uint8_t)((q[i] + 8) | (q[16 + i] + 8) << 4);
}

/* ---- blocks of 256 --------------------------------------------------------------------------- */
/* Groups with whole-number scales and offsets, times d and m that they share: x = d scale[g] q - m
   offset[g] */
typedef struct qwen3i_shared {
    qwen3i_range range;
    int   size, scale_low, scale_high;  /* elements of a group; the limits of the whole-number scales */
    float d, m, error;
    int   scale[16], offset[16];
    int8_t q[256];
} qwen3i_shared;

static int qwen3i_nearest(float v, int low, int high) {
    v = v > (float)low ? v : (float)low;
    v = v < (float)high ? v : (float)high;
    return (int)floorf(v + 0.5f);
}

/* The best whole scale and offset of group g about these; adds to the error. */
static void qwen3i_shared_group(qwen3i_shared *s, int g, const float *x, const float *w, float scale,
                                float offset) {
    const int first = s->d != 0 ? qwen3i_nearest(scale / s->d, s->scale_low, s->scale_high) : 0;
    const int first_offset = s->m > 0 ? qwen3i_nearest(offset / s->m, 0, 63) : 0;
    float best = FLT_MAX, q[32];
    for (int i = -1; i <= 1; i++) for (int k = -1; k <= 1; k++) {
        const int a = first + i, o = first_offset + k;
        if (a < s->scale_low || a > s->scale_high || o < 0 || o > 63 || (k && s->m == 0)) continue;
        const float error = qwen3i_fit_round(q, x, w, s->size, &s->range, s->d * (float)a, s->m * (float)o);
        if (!(error < best) && best < FLT_MAX) continue;
        best = error;
        s->scale[g] = a;
        s->offset[g] = o;
        for (int e = 0; e < s->size; e++) s->q[g * s->size + e] = (int8_t)q[e];
    }
    s->error += best;
}

/* d and m of least squares for these scales, offsets and q */
static void qwen3i_shared_solve(qwen3i_shared *s, const float *x, const float *w) {
    double a = 0, b = 0, c = 0, p = 0, r = 0;
    for (int i = 0; i < 256; i++) {
        const double u = s->scale[i / s->size] * s->q[i], v = s->offset[i / s->size],
                     wx = (double)w[i] * (double)x[i];
        a += (double)w[i] * u * u; b += (double)w[i] * u * v; c += (double)w[i] * v * v;
        p += wx * u; r += wx * v;
    }
    const double det = a * c - b * b;
    double d = a > 0 ? p / a : (double)s->d, m = 0;
    if (det > 1e-9 * a * c && (p * b - r * a) / det > 0) {
        d = (p * c - r * b) / det;
        m = (p * b - r * a) / det;
    }
    s->d = qwen3i_as_half((float)d);
    s->m = qwen3i_as_half((float)m);
}

/* Fit 256 elements; *s comes with what its format fixes. */
static void qwen3i_shared_fit(qwen3i_shared *s, const float *x) {
    const int groups = 256 / s->size;
    qwen3i_shared now;
    qwen3i_fit fits[16];
    float w[256], scale = 0, offset = 0;
    for (int g = 0; g < groups; g++) {
        const int at = g * s->size;
        qwen3i_importance(w + at, x + at, s->size);
        fits[g] = qwen3i_fit_group(x + at, w + at, s->size, &s->range);
        if (fabsf(fits[g].scale) > fabsf(scale)) scale = fits[g].scale;
        if (fits[g].offset > offset) offset = fits[g].offset;
    }
    now = *s;
    now.d = qwen3i_as_half(s->scale_low < 0 ? fabsf(scale) / (float)s->scale_high :
                           scale / (float)s->scale_high);
    now.m = qwen3i_as_half(offset / 63);
    s->error = FLT_MAX;
    for (int turn = 0; turn < 3; turn++) {
        now.error = 0;
        for (int g = 0; g < groups; g++)
            qwen3i_shared_group(&now, g, x + g * s->size, w + g * s->size, fits[g].scale, fits[g].offset);
        if (turn == 0 || now.error < s->error) *s = now;
        qwen3i_shared_solve(&now, x, w);
    }
}

/* Q4_K and Q5_K begin alike: d, m and the six-bit scales and offsets in 12 bytes. */
static void qwen3i_pack_scales_k(uint8_t *b, const qwen3i_shared *s) {
    qwen3i_put_half(b, s->d);
    qwen3i_put_half(b + 2, s->m);
    for (int j = 0; j < 4; j++) {
        b[4 + j]  = (uint8_t)(s->scale[j] | (s->scale[j + 4] >> 4) << 6);
        b[8 + j]  = (uint8_t)(s->offset[j] | (s->offset[j + 4] >> 4) << 6);
        b[12 + j] = (uint8_t)((s->scale[j + 4] & 15) | (s->offset[j + 4] & 15) << 4);
    }
}

static void qwen3i_pack_fit_k(qwen3i_shared *s, uint8_t *b, const float *x, int high) {
    memset(s, 0, sizeof *s);
    s->range.high = high;
    s->range.offset = 1;
    s->size = 32;
    s->scale_high = 63;
    qwen3i_shared_fit(s, x);
    qwen3i_pack_scales_k(b, s);
}

static void qwen3i_pack_q4_k(uint8_t *b, const float *x) {
    qwen3i_shared s;
    qwen3i_pack_fit_k(&s, b, x, 15);
    for (int i = 0; i < 128; i++) {
        const int at = i / 32 * 64 + i % 32;
        b[16 + i] = (uint8_t)(s.q[at] | s.q[at + 32] << 4);
    }
}

static void qwen3i_pack_q5_k(uint8_t *b, const float *x) {
    qwen3i_shared s;
    qwen3i_pack_fit_k(&s, b, x, 31);
    memset(b + 16, 0, 32);
    for (int i = 0; i < 256; i++) b[16 + i % 32] = (uint8_t)(b[16 + i % 32] | (s.q[i] >> 4) << i / 32);
    for (int i = 0; i < 128; i++) {
        const int at = i / 32 * 64 + i % 32;
        b[48 + i] = (uint8_t)((s.q[at] & 15) | (s.q[at + 32] & 15) << 4);
    }
}

static void qwen3i_pack_q6_k(uint8_t *b, const float *x) {
    qwen3i_shared s;
    memset(&s, 0, sizeof s);
    s.range.low = -32;
    s.range.high = 31;
    s.size = 16;
    s.scale_low = -128;
    s.scale_high = 127;
    qwen3i_shared_fit(&s, x);
    qwen3i_put_half(b + 208, s.d);
    for (int g = 0; g < 16; g++) b[192 + g] = (uint8_t)s.scale[g];
    for (int h = 0; h < 2; h++) for (int l = 0; l < 32; l++) {
        int q[4];
        for (int k = 0; k < 4; k++) q[k] = s.q[128 * h + 32 * k + l] + 32;
        b[64 * h + l]       = (uint8_t)((q[0] & 15) | (q[2] & 15) << 4);
        b[64 * h + 32 + l]  = (uint8_t)((q[1] & 15) | (q[3] & 15) << 4);
        b[128 + 32 * h + l] = (uint8_t)(q[0] >> 4 | (q[1] >> 4) << 2 | (q[2] >> 4) << 4 | (q[3] >> 4) << 6);
    }
}

/* ---- rows and mixes -------------------------------------------------------------------------- */
typedef void (*qwen3i_pack)(uint8_t *b, const float *x);

/* NULL: this type is read and not written. */
static qwen3i_pack qwen3i_pack_of(qwen3i_type type) {
    switch (type) {
        case QWEN3I_Q8_0: return qwen3i_pack_q8_0;
        case QWEN3I_Q4_0: return qwen3i_pack_q4_0;
        case QWEN3I_Q4_K: return qwen3i_pack_q4_k;
        case QWEN3I_Q5_K: return qwen3i_pack_q5_k;
        case QWEN3I_Q6_K: return qwen3i_pack_q6_k;
        default: return NULL;
    }
}

/* n elements of a row of any type to blocks of another: whole blocks */
static void qwen3i_quantize(uint8_t *to, qwen3i_type to_type, const void *row, qwen3i_type type, int n) {
    const qwen3i_format *f = qwen3i_format_of(to_type);
    const qwen3i_pack pack = qwen3i_pack_of(to_type);
    const char *from = (const char *)row;
    float x[QWEN3I_MAX_BLOCK];
    for (int i = 0; i < n; i += f->elements, to += f->bytes) {
        qwen3i_decode(x, from + (size_t)qwen3i_row_bytes(type, i), type, f->elements);
        pack(to, x);
    }
}

/* ================================================================================================
   SAFETENSORS: the header of each weight file, checked to the last byte
   ================================================================================================ */
#define QWEN3I_MAX_RANK 8
#define QWEN3I_MAX_SHARDS 256
#define QWEN3I_MAX_HEADER 100000000u    /* the format's own limit */

typedef struct qwen3i_tensor {
    qwen3i_str           name;          /* in the file's header */
    uint64_t             shape[QWEN3I_MAX_RANK];
    int                  rank;
    qwen3i_str           dtype;
    uint64_t             begin, end;    /* offsets into the data section */
    const unsigned char *data;
    const char          *file;
} qwen3i_tensor;

typedef struct qwen3i_tensors { qwen3i_tensor *list; size_t n, cap; } qwen3i_tensors;

static int qwen3i_compare_names(const void *a, const void *b) {
    return qwen3i_compare_str(((const qwen3i_tensor *)a)->name, ((const qwen3i_tensor *)b)->name);
}

static int qwen3i_compare_offsets(const void *a, const void *b) {
    const qwen3i_tensor *x = (const qwen3i_tensor *)a, *y = (const qwen3i_tensor *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);   /* empty tensors first */
}

static const qwen3i_tensor *qwen3i_find_tensor(const qwen3i_tensors *t, qwen3i_str name) {
    qwen3i_tensor key;
    size_t i;
    key.name = name;
    i = qwen3i_search(t->list, t->n, sizeof key, &key, qwen3i_compare_names);
    return i < t->n && qwen3i_compare_names(&t->list[i], &key) == 0 ? &t->list[i] : NULL;
}

/* Bytes of an element, 0 for dtypes that this library does not know (they may lie in the file unused). */
static unsigned qwen3i_dtype_size(qwen3i_str dtype) {
    static const struct { const char *name; unsigned size; } known[] = {
        {"F64", 8}, {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4}, {"U32", 4},
        {"F16", 2}, {"BF16", 2}, {"I16", 2},
        {"U16", 2}, {"I8", 1}, {"U8", 1}, {"BOOL", 1}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1}
    };
    int i;
    for (i = 0; i < QWEN3I_COUNT(known); i++) if (qwen3i_json_is(dtype, known[i].name)) return known[i].size;
    return 0;
}

/* One tensor's description: {"dtype": .., "shape": [..], "data_offsets": [begin, end]} */
QWEN3I_COLD
static int qwen3i_parse_tensor(qwen3i_json *j, qwen3i_tensor *t) {
    qwen3i_json_iter object, array;
    qwen3i_str key;
    int64_t v, offsets[2] = {0, 0};
    int seen = 0, n = 0;
    t->rank = 0;
    if (!qwen3i_json_open(j, '{', &object)) return 0;
    while (qwen3i_json_next(j, &object, &key)) {
        int what = qwen3i_json_is(key, "dtype") ? 1 : qwen3i_json_is(key, "shape") ? 2 :
                   qwen3i_json_is(key, "data_offsets") ? 4 : 0;
        if (what & seen) return qwen3i_json_bad(j, "a key appears twice");
        seen |= what;
        if (what == 0) { if (!qwen3i_json_skip(j)) return 0; }
        else if (what == 1) { if (!qwen3i_json_string(j, &t->dtype)) return 0; }
        else {
            if (!qwen3i_json_open(j, '[', &array)) return 0;
            while (qwen3i_json_next(j, &array, NULL)) {
                if (!qwen3i_json_int(j, &v)) return 0;
                if (v < 0) return qwen3i_json_bad(j, "a size or offset is negative");
                if (what == 2) {
                    if (t->rank == QWEN3I_MAX_RANK) return qwen3i_json_bad(j, "more than 8 dimensions");
                    t->shape[t->rank++] = (uint64_t)v;
                } else if (n < 2) offsets[n++] = v;
                else return qwen3i_json_bad(j, "data_offsets has more than 2 numbers");
            }
        }
    }
    if (j->error) return 0;
    if (seen != 7 || n != 2) return qwen3i_json_bad(j, "dtype, shape or data_offsets is missing");
    t->begin = (uint64_t)offsets[0];
    t->end = (uint64_t)offsets[1];
    return 1;
}

/* A file's header being read: its tensors one by one. */
typedef struct qwen3i_header { qwen3i_json j; qwen3i_json_iter it; int metadata; } qwen3i_header;

static qwen3i_header qwen3i_header_begin(const unsigned char *file, uint64_t size) {
    qwen3i_header h;
    memset(&h, 0, sizeof h);
    h.j = qwen3i_json_begin(file, 8 + (size_t)size);
    h.j.p += 8;
    if (size == 0 || *h.j.p != '{') qwen3i_json_bad(&h.j, "the header does not start with {");
    qwen3i_json_open(&h.j, '{', &h.it);
    return h;
}

/* "__metadata__": {"text": "text", ...} or null, once */
static int qwen3i_header_metadata(qwen3i_header *h) {
    qwen3i_json_iter it;
    qwen3i_str s;
    if (h->metadata++) return qwen3i_json_bad(&h->j, "__metadata__ appears twice");
    if (qwen3i_json_word(&h->j, "null")) return 1;
    if (qwen3i_json_open(&h->j, '{', &it)) while (qwen3i_json_next(&h->j, &it, &s) &&
                                                  qwen3i_json_string(&h->j, &s)) {}
    return !h->j.error;
}

/* 1: *t is the next tensor. 0: there is none, or h->j has an error. */
static int qwen3i_header_next(qwen3i_header *h, qwen3i_tensor *t) {
    t->name.n = 0;                      /* of which tensor an error is */
    while (qwen3i_json_next(&h->j, &h->it, &t->name)) {
        if (!qwen3i_json_is(t->name, "__metadata__")) return qwen3i_parse_tensor(&h->j, t);
        if (!qwen3i_header_metadata(h)) return 0;
        t->name.n = 0;
    }
    return 0;
}

/* How many tensors there are, and that all of them can be read. */
static qwen3_result qwen3i_count_tensors(qwen3i_header h, const char *file, size_t *n,
                                         const qwen3i_err *err) {
    qwen3i_tensor t;
    for (*n = 0; qwen3i_header_next(&h, &t); ++*n) {}
    qwen3i_json_end(&h.j);
    if (!h.j.error) return QWEN3_OK;
    if (t.name.n == 0) return qwen3i_json_fail(err, file, &h.j);
    return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: tensor '%.*s': byte %lu: %s", file, QWEN3I_STR(t.name),
                       (unsigned long)qwen3i_json_offset(&h.j), h.j.error);
}

/* Every tensor's bytes must be those that its shape asks for, and all tensors must tile the data exactly. */
static qwen3_result qwen3i_check_layout(qwen3i_tensor *list, size_t n, const char *file, uint64_t data_size,
                                        const qwen3i_err *err) {
    uint64_t at = 0;
    size_t i;
    int k;
    qwen3i_sort(list, n, sizeof *list, qwen3i_compare_offsets);
    for (i = 0; i < n; i++) {
        const qwen3i_tensor *t = &list[i];
        uint64_t bytes = qwen3i_dtype_size(t->dtype);
        if (t->end < t->begin || t->end > data_size)
            return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: tensor '%.*s' lies outside the file", file,
                               QWEN3I_STR(t->name));
        if (t->begin != at)
            return qwen3i_fail(err, QWEN3_ERR_FORMAT,
                               "%s: tensor '%.*s' starts at byte %llu of the data, not at %llu "
                               "where the one before it ends", file, QWEN3I_STR(t->name),
                               (unsigned long long)t->begin, (unsigned long long)at);
        if (bytes) {
            for (k = 0; k < t->rank; k++)
                if (!qwen3i_mul_u64(bytes, t->shape[k], &bytes))
                    return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: the size of tensor '%.*s' overflows",
                                       file, QWEN3I_STR(t->name));
            if (bytes != t->end - t->begin)
                return qwen3i_fail(err, QWEN3_ERR_FORMAT,
                                   "%s: tensor '%.*s' needs %llu bytes for its shape but has %llu",
                                   file, QWEN3I_STR(t->name), (unsigned long long)bytes,
                                       (unsigned long long)(t->end - t->begin));
        }
        at = t->end;
    }
    if (at != data_size)
        return qwen3i_fail(err, QWEN3_ERR_FORMAT,
                           "%s: the tensors end at byte %llu of the data, the file at %llu",
                           file, (unsigned long long)at, (unsigned long long)data_size);
    return QWEN3_OK;
}

static qwen3_result qwen3i_grow_tensors(qwen3i_tensors *t, size_t more, const qwen3_allocator *a,
                                        const qwen3i_err *err) {
    qwen3i_tensor *list;
    if (t->n + more == 0) return QWEN3_OK;
    list = (qwen3i_tensor *)qwen3i_grow(a, t->list, t->n, &t->cap, t->n + more, sizeof *list);
    if (!list) return qwen3i_no_memory(err, "the list of tensors", (uint64_t)(t->n + more) * sizeof *list);
    t->list = list;
    return QWEN3_OK;
}

/* Add the tensors of one safetensors file to the list. */
QWEN3I_COLD
static qwen3_result qwen3i_parse_safetensors(const qwen3i_shard *s, qwen3i_tensors *t,
                                             const qwen3_allocator *a, const qwen3i_err *err) {
    const unsigned char *file = s->blob.data;
    uint64_t header = 0, data_size;
    qwen3i_header h;
    qwen3i_tensor *first;
    qwen3_result r;
    size_t n, k;
    int i;
    for (i = 7; i >= 0 && s->blob.size >= 8; i--) header = header << 8 | file[i];
    if (s->blob.size < 8 || header > QWEN3I_MAX_HEADER || header > s->blob.size - 8)
        return qwen3i_fail(err, QWEN3_ERR_FORMAT,
                           "%s: not a safetensors file, or truncated: the header is said to have %llu "
                           "bytes, the file has %llu",
                           s->name, (unsigned long long)header, (unsigned long long)s->blob.size);
    h = qwen3i_header_begin(file, header);
    r = qwen3i_count_tensors(h, s->name, &n, err);
    if (r == QWEN3_OK) r = qwen3i_grow_tensors(t, n, a, err);
    if (r != QWEN3_OK) return r;
    data_size = s->blob.size - 8 - header;
    first = t->list + t->n;
    for (k = 0; k < n && qwen3i_header_next(&h, &first[k]); k++) {
        first[k].file = s->name;
        first[k].data = file + 8 + header + (first[k].begin <= data_size ? first[k].begin : 0);
    }
    if (k < n) return qwen3i_fail(err, QWEN3_ERR_IO, "%s: the file was changed while it was read", s->name);
    r = qwen3i_check_layout(first, n, s->name, data_size, err);
    if (r == QWEN3_OK) t->n += n;
    return r;
}

/* Sort by name, refusing duplicates. */
static qwen3_result qwen3i_index_tensors(qwen3i_tensors *t, const qwen3i_err *err) {
    size_t i;
    qwen3i_sort(t->list, t->n, sizeof *t->list, qwen3i_compare_names);
    for (i = 1; i < t->n; i++)
        if (qwen3i_compare_names(&t->list[i - 1], &t->list[i]) == 0)
            return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: tensor '%.*s' appears twice", t->list[i].file,
                               QWEN3I_STR(t->list[i].name));
    return QWEN3_OK;
}

/* Shards lie beside their index: a name with a directory in it is an attack or a mistake. */
static int qwen3i_shard_name_ok(qwen3i_str s) {
    size_t i;
    if (s.n == 0 || s.n > 200 || s.p[0] == '.') return 0;
    for (i = 0; i < s.n; i++) if (strchr("/\\:", s.p[i]) || (unsigned char)s.p[i] < 0x20) return 0;
    return 1;
}

/* Open a shard unless it is open already. Repeated names are mostly the last one seen. */
QWEN3I_COLD
static qwen3_result qwen3i_add_shard(qwen3i_loader *l, qwen3i_str name) {
    qwen3_model *m = l->model;
    char *copy;
    int i;
    for (i = m->n_shards - 1; i >= 0; i--)
        if (strlen(m->shards[i].name) == name.n && memcmp(m->shards[i].name, name.p, name.n) == 0)
            return QWEN3_OK;
    if (m->n_shards == QWEN3I_MAX_SHARDS)
        return qwen3i_fail(l->err, QWEN3_ERR_UNSUPPORTED, "more than %d weight files", QWEN3I_MAX_SHARDS);
    if (!m->shards) {
        m->shards = (qwen3i_shard *)qwen3i_model_alloc(m, QWEN3I_MAX_SHARDS, sizeof *m->shards);
        if (!m->shards)
            return qwen3i_no_memory(l->err, "the list of weight files",
                                    QWEN3I_MAX_SHARDS * sizeof *m->shards);
    }
    copy = (char *)qwen3i_model_alloc(m, name.n + 1, 1);
    if (!copy) return qwen3i_no_memory(l->err, "a file name", name.n + 1);
    memcpy(copy, name.p, name.n);
    copy[name.n] = '\0';
    m->shards[m->n_shards].name = copy;
    memset(&m->shards[m->n_shards].blob, 0, sizeof(qwen3i_blob));
    m->n_shards++;
    return QWEN3_OK;
}

/* Step through the index's weight_map: {"tensor": "file", ...}. visit gets each pair. */
typedef qwen3_result (*qwen3i_visit_weight)(qwen3i_loader *l, qwen3i_str tensor, qwen3i_str file, void *arg);

QWEN3I_COLD
static qwen3_result qwen3i_walk_index(qwen3i_loader *l, const char *name, const qwen3i_blob *index,
                                      qwen3i_visit_weight visit, void *arg) {
    qwen3i_json j = qwen3i_json_begin(index->data, index->size);
    qwen3i_json_iter object, map;
    qwen3i_str key, file;
    qwen3_result r;
    int found = 0;
    if (qwen3i_json_open(&j, '{', &object))
        while (qwen3i_json_next(&j, &object, &key)) {
            if (!qwen3i_json_is(key, "weight_map")) { qwen3i_json_skip(&j); continue; }
            if (found++) return qwen3i_fail(l->err, QWEN3_ERR_FORMAT, "%s: weight_map appears twice", name);
            if (!qwen3i_json_open(&j, '{', &map)) break;
            while (qwen3i_json_next(&j, &map, &key)) {
                if (!qwen3i_json_string(&j, &file)) break;
                if (!qwen3i_shard_name_ok(file))
                    return qwen3i_fail(l->err, QWEN3_ERR_FORMAT,
                                       "%s: tensor '%.*s' is said to be in '%.*s', which is not a plain "
                                       "file name",
                                       name, QWEN3I_STR(key), QWEN3I_STR(file));
                r = visit(l, key, file, arg);
                if (r != QWEN3_OK) return r;
            }
        }
    qwen3i_json_end(&j);
    if (j.error) return qwen3i_json_fail(l->err, name, &j);
    if (!found) return qwen3i_fail(l->err, QWEN3_ERR_FORMAT, "%s: key 'weight_map' is missing", name);
    return QWEN3_OK;
}

static qwen3_result qwen3i_visit_shard(qwen3i_loader *l, qwen3i_str tensor, qwen3i_str file, void *arg) {
    (void)tensor; (void)arg;
    return qwen3i_add_shard(l, file);
}

static int qwen3i_str_ends(qwen3i_str s, const char *end) {
    size_t n = strlen(end);
    return s.n >= n && memcmp(s.p + s.n - n, end, n) == 0;
}

/* The index must not promise what the shards do not hold, but for the head of a tied model. */
static qwen3_result qwen3i_visit_check(qwen3i_loader *l, qwen3i_str tensor, qwen3i_str file, void *arg) {
    const qwen3i_tensors *t = (const qwen3i_tensors *)arg;
    const qwen3i_tensor *hit = qwen3i_find_tensor(t, tensor);
    if (!hit && l->model->config.tied && qwen3i_str_ends(tensor, "lm_head.weight")) return QWEN3_OK;
    if (hit && strlen(hit->file) == file.n && memcmp(hit->file, file.p, file.n) == 0) return QWEN3_OK;
    return qwen3i_fail(l->err, QWEN3_ERR_FORMAT, "%.*s: tensor '%.*s' is missing from it, though the index "
                                                 "names it",
                       QWEN3I_STR(file), QWEN3I_STR(tensor));
}

static qwen3_result qwen3i_open_shards(qwen3i_loader *l, qwen3i_tensors *t) {
    qwen3_model *m = l->model;
    qwen3_result r = QWEN3_OK;
    float share = l->step / (float)m->n_shards;
    int i;
    for (i = 0; i < m->n_shards && r == QWEN3_OK; i++) {
        l->step = share;
        r = qwen3i_open(l, m->shards[i].name, 1, &m->shards[i].blob);
        if (r == QWEN3_OK && !m->shards[i].blob.data)
            r = qwen3i_fail(l->err, QWEN3_ERR_IO,
                            "%s: cannot open this weight file, though the index names it", m->shards[i].name);
        if (r == QWEN3_OK) r = qwen3i_parse_safetensors(&m->shards[i], t, &m->allocator, l->err);
        if (r == QWEN3_OK) r = qwen3i_progress(l, 1);
        l->done += share;
    }
    return r == QWEN3_OK ? qwen3i_index_tensors(t, l->err) : r;
}

static qwen3_result qwen3i_open_sharded(qwen3i_loader *l, const char *index_name, const qwen3i_blob *index,
                                        qwen3i_tensors *t) {
    qwen3_result r = qwen3i_walk_index(l, index_name, index, qwen3i_visit_shard, NULL);
    if (r != QWEN3_OK) return r;
    if (l->model->n_shards == 0)
        return qwen3i_fail(l->err, QWEN3_ERR_FORMAT, "%s: weight_map names no file", index_name);
    r = qwen3i_open_shards(l, t);
    return r == QWEN3_OK ? qwen3i_walk_index(l, index_name, index, qwen3i_visit_check, t) : r;
}

/* Open model.safetensors, or the shards that model.safetensors.index.json names, and list their tensors. */
QWEN3I_COLD
static qwen3_result qwen3i_open_weights(qwen3i_loader *l, qwen3i_tensors *t) {
    static const char single[] = "model.safetensors", index_name[] = "model.safetensors.index.json";
    qwen3i_blob index;
    qwen3i_str name;
    qwen3_result r;
    name.p = single;
    name.n = sizeof single - 1;
    r = qwen3i_add_shard(l, name);
    if (r == QWEN3_OK) r = qwen3i_open(l, single, 1, &l->model->shards[0].blob);
    if (r != QWEN3_OK) return r;
    if (l->model->shards[0].blob.data) {
        r = qwen3i_parse_safetensors(&l->model->shards[0], t, &l->model->allocator, l->err);
        return r == QWEN3_OK ? qwen3i_index_tensors(t, l->err) : r;
    }
    l->model->n_shards = 0;
    r = qwen3i_open(l, index_name, 0, &index);
    if (r != QWEN3_OK) return r;
    if (!index.data)
        return qwen3i_fail(l->err, QWEN3_ERR_IO, "neither %s nor %s can be opened%s%s", single, index_name,
                           l->desc->path ? " in " : "", l->desc->path ? l->desc->path : "");
    r = qwen3i_open_sharded(l, index_name, &index, t);
    qwen3i_close(&l->model->allocator, &index);
    return r;
}
/* ================================================================================================
   GGUF: the keys and the list of tensors of each part of a model in one file or several, checked to
   the last byte. Versions 2 and 3 of the format (docs/gguf.md of ggml-org/ggml).
   ================================================================================================ */
#define QWEN3I_GGUF_KEY      65535u     /* bytes in a key, tensor name and number of dimensions: limits */
#define QWEN3I_GGUF_NAME     64u
#define QWEN3I_GGUF_RANK     4u

/* The format's types of tensors by number: what a block holds and takes. No name: a number without a type. */
typedef struct qwen3i_gguf_type { const char *name; int elements, bytes; } qwen3i_gguf_type;

static const qwen3i_gguf_type *qwen3i_gguf_type_of(uint32_t number) {
    static const qwen3i_gguf_type types[] = {
        {"F32", 1, 4},          {"F16", 1, 2},          {"Q4_0", 32, 18},       {"Q4_1", 32, 20},
        {NULL, 0, 0},           {NULL, 0, 0},           {"Q5_0", 32, 22},       {"Q5_1", 32, 24},
        {"Q8_0", 32, 34},       {"Q8_1", 32, 36},       {"Q2_K", 256, 84},      {"Q3_K", 256, 110},
        {"Q4_K", 256, 144},     {"Q5_K", 256, 176},     {"Q6_K", 256, 210},     {"Q8_K", 256, 292},
        {"IQ2_XXS", 256, 66},   {"IQ2_XS", 256, 74},    {"IQ3_XXS", 256, 98},   {"IQ1_S", 256, 50},
        {"IQ4_NL", 32, 18},     {"IQ3_S", 256, 110},    {"IQ2_S", 256, 82},     {"IQ4_XS", 256, 136},
        {"I8", 1, 1},           {"I16", 1, 2},          {"I32", 1, 4},          {"I64", 1, 8},
        {"F64", 1, 8},          {"IQ1_M", 256, 56},     {"BF16", 1, 2},         {NULL, 0, 0},
        {NULL, 0, 0},           {NULL, 0, 0},           {"TQ1_0", 256, 54},     {"TQ2_0", 256, 66},
        {NULL, 0, 0},           {NULL, 0, 0},           {NULL, 0, 0},           {"MXFP4", 32, 17},
        {"NVFP4", 64, 36},      {"Q1_0", 128, 18},      {"Q2_0", 64, 18}
    };
    return number < (uint32_t)QWEN3I_COUNT(types) && types[number].name ? &types[number] : NULL;
}

typedef enum qwen3i_gguf_kind {         /* of values, by the format's numbers */
    QWEN3I_GGUF_U8, QWEN3I_GGUF_I8, QWEN3I_GGUF_U16, QWEN3I_GGUF_I16, QWEN3I_GGUF_U32, QWEN3I_GGUF_I32,
    QWEN3I_GGUF_F32, QWEN3I_GGUF_BOOL, QWEN3I_GGUF_STRING, QWEN3I_GGUF_ARRAY, QWEN3I_GGUF_U64,
    QWEN3I_GGUF_I64, QWEN3I_GGUF_F64,
    QWEN3I_GGUF_KINDS
} qwen3i_gguf_kind;

typedef struct qwen3i_gguf_value {      /* a key and its value, which stays in the file */
    qwen3i_str           key;
    uint32_t             kind, item;    /* item: of an array's elements; else kind again */
    uint64_t             n;             /* elements, of an array */
    const unsigned char *p;
} qwen3i_gguf_value;

struct qwen3i_gguf {                    /* a part being read */
    const char          *file;          /* in messages */
    const qwen3i_err    *err;
    const unsigned char *start, *p, *end;
    int                  cut;           /* something reached beyond the end: all later reads give 0 */
    uint64_t             n_tensors, n_values, alignment;
    qwen3i_gguf_value   *values;        /* [n_values] ordered by key */
    int                  n_parts;       /* that the model has: all say so */
};

static void qwen3i_gguf_free(const qwen3_allocator *a, qwen3i_gguf *g) {
    qwen3i_free(a, g->values, (size_t)g->n_values * sizeof *g->values);
    g->values = NULL;
}

/* ---- bytes ----------------------------------------------------------------------------------- */
static unsigned long qwen3i_gguf_at(const qwen3i_gguf *g) { return (unsigned long)(g->p - g->start); }

static uint64_t qwen3i_gguf_left(const qwen3i_gguf *g) { return (uint64_t)(g->end - g->p); }

/* The next n bytes, or NULL. */
static const unsigned char *qwen3i_gguf_take(qwen3i_gguf *g, uint64_t n) {
    const unsigned char *p = g->p;
    g->cut |= n > qwen3i_gguf_left(g);
    if (g->cut) return NULL;
    g->p += (size_t)n;
    return p;
}

static uint64_t qwen3i_little(const unsigned char *p, int n) {
    uint64_t v = 0;
    for (; n > 0; n--) v = v << 8 | p[n - 1];
    return v;
}

/* A number of n bytes; 0 if the file ends before. */
static uint64_t qwen3i_gguf_number(qwen3i_gguf *g, int n) {
    const unsigned char *p = qwen3i_gguf_take(g, (uint64_t)n);
    return p ? qwen3i_little(p, n) : 0;
}

/* A text; empty if the file ends before. */
static qwen3i_str qwen3i_gguf_string(qwen3i_gguf *g) {
    uint64_t n = qwen3i_gguf_number(g, 8);
    const char *p = (const char *)qwen3i_gguf_take(g, n);
    qwen3i_str s;
    s.p = p ? p : "";
    s.n = p ? (size_t)n : 0;
    return s;
}

static qwen3_result qwen3i_gguf_ends(const qwen3i_gguf *g, const char *in, qwen3i_str name) {
    return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: the file ends in %s%.*s%s, or a length there is "
                                                 "damaged (byte %lu of %lu)",
                       g->file, in, QWEN3I_STR(name), name.n ? "'" : "", qwen3i_gguf_at(g),
                           (unsigned long)(g->end - g->start));
}

/* ---- keys and values ------------------------------------------------------------------------- */
static const char *qwen3i_gguf_kind_name(uint32_t kind) {
    static const char *const names[QWEN3I_GGUF_KINDS] = {
        "uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "bool", "string", "array",
            "uint64", "int64", "float64"
    };
    return kind < QWEN3I_GGUF_KINDS ? names[kind] : "unknown";
}

static int qwen3i_gguf_kind_size(uint32_t kind) {   /* strings: of their length */
    static const unsigned char sizes[QWEN3I_GGUF_KINDS] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};
    return sizes[kind];
}

static qwen3_result qwen3i_gguf_read_value(qwen3i_gguf *g, qwen3i_gguf_value *v) {
    uint64_t i;
    v->key = qwen3i_gguf_string(g);
    if (g->cut) return qwen3i_gguf_ends(g, "the list of keys", v->key);
    if (v->key.n == 0 || v->key.n > QWEN3I_GGUF_KEY)
        return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: byte %lu: a key of %lu bytes", g->file,
                           qwen3i_gguf_at(g), (unsigned long)v->key.n);
    v->kind = v->item = (uint32_t)qwen3i_gguf_number(g, 4);
    v->n = 1;
    if (v->kind == QWEN3I_GGUF_ARRAY) {
        v->item = (uint32_t)qwen3i_gguf_number(g, 4);
        v->n = qwen3i_gguf_number(g, 8);
    }
    if (v->item >= QWEN3I_GGUF_KINDS || v->item == QWEN3I_GGUF_ARRAY)
        return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: key '%.*s' has a value of type %lu%s", g->file,
                           QWEN3I_STR(v->key),
                           (unsigned long)v->item, v->item == QWEN3I_GGUF_ARRAY ? ", an array of arrays" :
                               ", which is unknown");
    v->p = g->p;
    g->cut |= v->n > qwen3i_gguf_left(g) / (uint64_t)qwen3i_gguf_kind_size(v->item);
    if (v->item == QWEN3I_GGUF_STRING) for (i = 0; i < v->n && !g->cut; i++) (void)qwen3i_gguf_string(g);
    else qwen3i_gguf_take(g, g->cut ? 0 : v->n * (uint64_t)qwen3i_gguf_kind_size(v->item));
    return g->cut ? qwen3i_gguf_ends(g, "the value of key '", v->key) : QWEN3_OK;
}

static int qwen3i_gguf_compare(const void *a, const void *b) {
    return qwen3i_compare_str(((const qwen3i_gguf_value *)a)->key, ((const qwen3i_gguf_value *)b)->key);
}

static const qwen3i_gguf_value *qwen3i_gguf_find(const qwen3i_gguf *g, const char *key) {
    qwen3i_gguf_value wanted;
    size_t i;
    wanted.key = qwen3i_str_of(key);
    i = qwen3i_search(g->values, (size_t)g->n_values, sizeof wanted, &wanted, qwen3i_gguf_compare);
    return i < g->n_values && qwen3i_gguf_compare(&g->values[i], &wanted) == 0 ? &g->values[i] : NULL;
}

static qwen3_result qwen3i_gguf_wrong(const qwen3i_gguf *g, const qwen3i_gguf_value *v,
                                      const char *expected) {
    return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: key '%.*s' has a value of type %s%s; %s was expected",
                       g->file, QWEN3I_STR(v->key),
                       v->kind == QWEN3I_GGUF_ARRAY ? "array of " : "", qwen3i_gguf_kind_name(v->item),
                           expected);
}

/* Element i of a value of numbers or truth values. */
static double qwen3i_gguf_element(const qwen3i_gguf_value *v, uint64_t i) {
    const int size = qwen3i_gguf_kind_size(v->item);
    const uint64_t bits = qwen3i_little(v->p + (size_t)i * (size_t)size, size);
    double d;
    switch (v->item) {
        case QWEN3I_GGUF_I8:  return (double)(int8_t)bits;
        case QWEN3I_GGUF_I16: return (double)(int16_t)bits;
        case QWEN3I_GGUF_I32: return (double)(int32_t)bits;
        case QWEN3I_GGUF_I64: return (double)(int64_t)bits;
        case QWEN3I_GGUF_F32:           /* by their bits: this must hold under -ffast-math, too */
            return (bits & 0x7F800000u) == 0x7F800000u ? -1 : (double)qwen3i_float_from_bits((uint32_t)bits);
        case QWEN3I_GGUF_F64:
            memcpy(&d, &bits, 8);
            return (bits >> 52 & 0x7FF) == 0x7FF ? -1 : d;
        default: return (double)bits;
    }
}

/* The number that a key has, if it is there: then *found is 1. */
static qwen3_result qwen3i_gguf_get_number(const qwen3i_gguf *g, const char *key, double *out, int *found) {
    const qwen3i_gguf_value *v = qwen3i_gguf_find(g, key);
    *found = v != NULL;
    if (!v) return QWEN3_OK;
    if (v->kind == QWEN3I_GGUF_STRING || v->kind == QWEN3I_GGUF_ARRAY)
        return qwen3i_gguf_wrong(g, v, "a number");
    *out = qwen3i_gguf_element(v, 0);
    return QWEN3_OK;
}

/* The text that a key has; empty if it is not there. */
static qwen3_result qwen3i_gguf_get_string(const qwen3i_gguf *g, const char *key, qwen3i_str *out) {
    const qwen3i_gguf_value *v = qwen3i_gguf_find(g, key);
    out->p = v ? (const char *)v->p + 8 : "";
    out->n = 0;
    if (v && v->kind != QWEN3I_GGUF_STRING) return qwen3i_gguf_wrong(g, v, "string");
    if (v) out->n = (size_t)qwen3i_little(v->p, 8);
    return QWEN3_OK;
}

/* The array of such elements that a key has; *out is NULL if it is not there. */
static qwen3_result qwen3i_gguf_get_array(const qwen3i_gguf *g, const char *key, uint32_t item,
                                          const qwen3i_gguf_value **out) {
    const qwen3i_gguf_value *v = qwen3i_gguf_find(g, key);
    char expected[32];
    *out = v;
    if (!v || (v->kind == QWEN3I_GGUF_ARRAY && v->item == item)) return QWEN3_OK;
    snprintf(expected, sizeof expected, "array of %s", qwen3i_gguf_kind_name(item));
    return qwen3i_gguf_wrong(g, v, expected);
}

/* Step through an array of strings: *p starts at its elements. */
static qwen3i_str qwen3i_gguf_next_string(const unsigned char **p) {
    qwen3i_str s;
    s.p = (const char *)*p + 8;
    s.n = (size_t)qwen3i_little(*p, 8);
    *p += 8 + s.n;
    return s;
}

static qwen3_result qwen3i_gguf_read_values(qwen3i_gguf *g, const qwen3_allocator *a) {
    const uint64_t n = g->n_values;
    qwen3_result r = QWEN3_OK;
    uint64_t i;
    g->n_values = 0;
    if (n > qwen3i_gguf_left(g) / 13)   /* the least that a key takes */
        return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: %llu keys cannot be in %llu bytes", g->file,
                           (unsigned long long)n,
                           (unsigned long long)qwen3i_gguf_left(g));
    g->values = (qwen3i_gguf_value *)qwen3i_alloc_array(a, (size_t)n, sizeof *g->values);
    if (!g->values) return qwen3i_no_memory(g->err, "the list of keys", n * sizeof *g->values);
    g->n_values = n;
    for (i = 0; i < n && r == QWEN3_OK; i++) r = qwen3i_gguf_read_value(g, &g->values[i]);
    if (r != QWEN3_OK) return r;
    qwen3i_sort(g->values, (size_t)n, sizeof *g->values, qwen3i_gguf_compare);
    for (i = 1; i < n; i++)
        if (qwen3i_gguf_compare(&g->values[i - 1], &g->values[i]) == 0)
            return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: key '%.*s' is there twice", g->file,
                               QWEN3I_STR(g->values[i].key));
    return QWEN3_OK;
}

/* ---- tensors --------------------------------------------------------------------------------- */
/* Up to the alignment; beyond 2^64 - alignment: no such number. */
static uint64_t qwen3i_gguf_padded(const qwen3i_gguf *g, uint64_t n) {
    return n > UINT64_MAX - g->alignment ? UINT64_MAX : (n + g->alignment - 1) & ~(g->alignment - 1);
}

/* The bytes that a tensor takes by its type and shape. */
static qwen3_result qwen3i_gguf_tensor_size(const qwen3i_gguf *g, const qwen3i_tensor *t,
                                            const qwen3i_gguf_type *type, uint64_t *bytes) {
    const uint64_t row = t->rank ? t->shape[t->rank - 1] : 1, block = (uint64_t)type->elements;
    int i, ok = 1;
    if (row % block)
        return qwen3i_fail(g->err, QWEN3_ERR_FORMAT,
                           "%s: tensor '%.*s' has rows of %llu elements, which are not whole blocks of %s "
                           "(%d)",
                           g->file, QWEN3I_STR(t->name), (unsigned long long)row, type->name, type->elements);
    *bytes = (uint64_t)type->bytes;
    for (i = 0; i < t->rank && ok; i++) {
        if (t->shape[i] == 0 || t->shape[i] > INT64_MAX)
            return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: tensor '%.*s' has a dimension of %lld",
                               g->file, QWEN3I_STR(t->name),
                               (long long)t->shape[i]);
        ok = qwen3i_mul_u64(*bytes, i == t->rank - 1 ? row / block : t->shape[i], bytes);
    }
    if (ok) return QWEN3_OK;
    return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: the size of tensor '%.*s' overflows", g->file,
                       QWEN3I_STR(t->name));
}

/* What stands in the list about the next tensor, which is to start at *at; then *at is where the one after it
   does. */
static qwen3_result qwen3i_gguf_read_tensor(qwen3i_gguf *g, qwen3i_tensor *t, uint64_t *at) {
    const qwen3i_gguf_type *type;
    uint64_t rank, number, bytes = 0, i;
    qwen3_result r;
    t->name = qwen3i_gguf_string(g);
    rank = qwen3i_gguf_number(g, 4);
    if (!g->cut && (t->name.n == 0 || t->name.n > QWEN3I_GGUF_NAME || rank > QWEN3I_GGUF_RANK))
        return qwen3i_fail(g->err, QWEN3_ERR_FORMAT,
                           "%s: tensor '%.*s' has a name of %lu bytes and %lu dimensions; 1 to %u and at "
                           "most %u are possible",
                           g->file, QWEN3I_STR(t->name), (unsigned long)t->name.n, (unsigned long)rank,
                               QWEN3I_GGUF_NAME, QWEN3I_GGUF_RANK);
    t->rank = (int)rank;
    /* the file has the row's length first */
    for (i = rank; i > 0 && !g->cut; i--) t->shape[i - 1] = qwen3i_gguf_number(g, 8);
    number = qwen3i_gguf_number(g, 4);
    t->begin = qwen3i_gguf_number(g, 8);
    if (g->cut)
        return qwen3i_gguf_ends(g, t->name.n ? "the description of tensor '" : "the list of tensors",
                                t->name);
    type = qwen3i_gguf_type_of((uint32_t)number);
    if (!type)
        return qwen3i_fail(g->err, QWEN3_ERR_UNSUPPORTED,
                           "%s: tensor '%.*s' has the type %llu, which is unknown", g->file,
                           QWEN3I_STR(t->name), (unsigned long long)number);
    t->dtype.p = type->name;
    t->dtype.n = strlen(type->name);
    t->file = g->file;
    r = qwen3i_gguf_tensor_size(g, t, type, &bytes);
    if (r != QWEN3_OK) return r;
    if (t->begin != *at)
        return qwen3i_fail(g->err, QWEN3_ERR_FORMAT,
                           "%s: tensor '%.*s' starts at byte %llu of the data, not at %llu where the one "
                           "before it ends",
                           g->file, QWEN3I_STR(t->name), (unsigned long long)t->begin,
                               (unsigned long long)*at);
    t->end = t->begin + bytes;
    if (bytes > UINT64_MAX - t->begin || t->end > (uint64_t)(g->end - g->start))
        return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: tensor '%.*s' of %llu bytes lies outside the file",
                           g->file, QWEN3I_STR(t->name),
                           (unsigned long long)bytes);
    *at = qwen3i_gguf_padded(g, t->end);
    return QWEN3_OK;
}

/* Add the tensors of the part to the list. Their data follows on the list, aligned. */
QWEN3I_COLD
static qwen3_result qwen3i_gguf_read_tensors(qwen3i_gguf *g, qwen3i_tensors *t, const qwen3_allocator *a) {
    const uint64_t size = (uint64_t)(g->end - g->start);
    uint64_t at = 0, data, i;
    qwen3i_tensor *first;
    qwen3_result r;
    if (g->n_tensors == 0) return QWEN3_OK;
    if (g->n_tensors > qwen3i_gguf_left(g) / 25)    /* the least that one takes */
        return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: %llu tensors cannot be in %llu bytes", g->file,
                           (unsigned long long)g->n_tensors,
                           (unsigned long long)qwen3i_gguf_left(g));
    r = qwen3i_grow_tensors(t, (size_t)g->n_tensors, a, g->err);
    if (r != QWEN3_OK) return r;
    first = t->list + t->n;
    for (i = 0; i < g->n_tensors && r == QWEN3_OK; i++) r = qwen3i_gguf_read_tensor(g, &first[i], &at);
    if (r != QWEN3_OK) return r;
    data = qwen3i_gguf_padded(g, (uint64_t)qwen3i_gguf_at(g));
    for (i = 0; i < g->n_tensors; i++) {
        if (data > size || first[i].end > size - data)
            return qwen3i_fail(g->err, QWEN3_ERR_FORMAT,
                               "%s: tensor '%.*s' ends at byte %llu, the file at %llu", g->file,
                                   QWEN3I_STR(first[i].name),
                               (unsigned long long)(data + first[i].end), (unsigned long long)size);
        first[i].data = g->start + (size_t)(data + first[i].begin);
    }
    t->n += (size_t)g->n_tensors;
    return QWEN3_OK;
}

/* ---- a part ---------------------------------------------------------------------------------- */
/* The header's fixed start. */
static qwen3_result qwen3i_gguf_read_start(qwen3i_gguf *g) {
    const unsigned char *magic = qwen3i_gguf_take(g, 4);
    uint32_t version;
    if (!magic || memcmp(magic, "GGUF", 4) != 0)
        return qwen3i_fail(g->err, QWEN3_ERR_FORMAT,
                           "%s: not a GGUF file: it does not start with these letters", g->file);
    version = (uint32_t)qwen3i_gguf_number(g, 4);
    g->n_tensors = qwen3i_gguf_number(g, 8);
    g->n_values = qwen3i_gguf_number(g, 8);
    if (g->cut) {
        g->n_values = 0;
        return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: the file ends in its header", g->file);
    }
    if (version == 2 || version == 3) return QWEN3_OK;
    g->n_values = 0;
    return qwen3i_fail(g->err, QWEN3_ERR_UNSUPPORTED, "%s: GGUF version %lu%s; 2 and 3 are supported",
                       g->file, (unsigned long)version,
                       version && (version & 0xFFFFu) == 0 ? ": the file is of a big-endian machine" : "");
}

static qwen3_result qwen3i_gguf_read_alignment(qwen3i_gguf *g) {
    const qwen3i_gguf_value *v = qwen3i_gguf_find(g, "general.alignment");
    g->alignment = 32;
    if (!v) return QWEN3_OK;
    if (v->kind != QWEN3I_GGUF_U32) return qwen3i_gguf_wrong(g, v, "uint32");
    g->alignment = qwen3i_little(v->p, 4);
    if (g->alignment >= 8 && (g->alignment & (g->alignment - 1)) == 0) return QWEN3_OK;
    return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: key 'general.alignment' is %lu; a power of two from 8 "
                                                 "on is possible", g->file,
                       (unsigned long)g->alignment);
}

/* Read everything before the list of tensors. Free g afterwards, whatever the result. */
static qwen3_result qwen3i_gguf_begin(qwen3i_gguf *g, const qwen3i_shard *s, const qwen3_allocator *a,
                                      const qwen3i_err *err) {
    qwen3_result r;
    memset(g, 0, sizeof *g);
    g->file = s->name;
    g->err = err;
    g->start = g->p = s->blob.data;
    g->end = g->start + s->blob.size;
    r = qwen3i_gguf_read_start(g);
    if (r == QWEN3_OK) r = qwen3i_gguf_read_values(g, a);
    return r == QWEN3_OK ? qwen3i_gguf_read_alignment(g) : r;
}

/* ---- the parts of a model -------------------------------------------------------------------- */
/* Open the next part and read its keys. *g is the caller's to free. */
QWEN3I_COLD
static qwen3_result qwen3i_gguf_open_part(qwen3i_loader *l, qwen3i_str name, qwen3i_gguf *g) {
    qwen3_model *m = l->model;
    qwen3i_shard *s;
    int first;
    qwen3_result r = qwen3i_add_shard(l, name);
    if (r != QWEN3_OK) return r;
    s = &m->shards[m->n_shards - 1];
    first = m->n_shards == 1;
    r = qwen3i_open(l, s->name, 1, &s->blob);
    if (r == QWEN3_OK && !s->blob.data)
        r = qwen3i_fail(l->err, QWEN3_ERR_IO, "%s: there is no such file%s", first &&
                        l->desc->path ? l->desc->path : s->name,
                                                            first ? ": a model is a directory or a .gguf "
                                                                    "file" : "");
    if (r == QWEN3_OK) r = qwen3i_progress(l, 1);
    return r == QWEN3_OK ? qwen3i_gguf_begin(g, s, &m->allocator, l->err) : r;
}

/* A part says which of how many it is, and is the only one if it says nothing. n_parts: as the first one
   says */
static qwen3_result qwen3i_gguf_check_part(qwen3i_gguf *g, int number, int n_parts) {
    double no = 0, n = 1;
    int found;
    qwen3_result r = qwen3i_gguf_get_number(g, "split.count", &n, &found);
    if (r == QWEN3_OK) r = qwen3i_gguf_get_number(g, "split.no", &no, &found);
    if (r != QWEN3_OK) return r;
    if (!(n >= 1 && n <= QWEN3I_MAX_SHARDS && n == floor(n)))
        return qwen3i_fail(g->err, QWEN3_ERR_UNSUPPORTED,
                           "%s: key 'split.count' is %.17g; 1 to %d are supported", g->file, n,
                               QWEN3I_MAX_SHARDS);
    if (no != number || (number > 0 && n != n_parts))
        return qwen3i_fail(g->err, QWEN3_ERR_FORMAT,
                           "%s: this is part %.17g of %.17g (split.no, split.count), not part %d%s", g->file,
                           no + 1, n, number + 1, number == 0 ? ", which a model is loaded by" : "");
    g->n_parts = (int)n;
    return QWEN3_OK;
}

static qwen3_result qwen3i_gguf_open(qwen3i_loader *l) {
    qwen3_result r;
    l->step = 0.3f;
    r = qwen3i_gguf_open_part(l, qwen3i_str_of(l->gguf_name), l->gguf);
    l->done = 0.3f;
    l->step = 0;
    return r == QWEN3_OK ? qwen3i_gguf_check_part(l->gguf, 0, 0) : r;
}

/* Add the tensors of the parts after the first, whose name ends in -00001-of-00003.gguf or so. */
QWEN3I_COLD
static qwen3_result qwen3i_gguf_list_parts(qwen3i_loader *l, qwen3i_tensors *t) {
    const int count = l->gguf->n_parts;
    const size_t n = strlen(l->gguf_name), tail = strlen("-00001-of-00003.gguf");
    char name[256], number[40];
    qwen3_result r = QWEN3_OK;
    qwen3i_gguf g;
    int i;
    snprintf(number, sizeof number, "-%05d-of-%05d.gguf", 1, count);
    if (n < tail || n >= sizeof name || strcmp(l->gguf_name + n - tail, number) != 0)
        return qwen3i_fail(l->err, QWEN3_ERR_FORMAT,
                           "%s: key 'split.count' is %d, but the name does not end in %s", l->gguf_name,
                               count, number);
    for (i = 1; i < count && r == QWEN3_OK; i++) {
        snprintf(number, sizeof number, "-%05d-of-%05d.gguf", i + 1, count);
        snprintf(name, sizeof name, "%.*s%s", (int)(n - tail), l->gguf_name, number);
        l->done = 0.3f + 0.1f * (float)i / (float)count;
        memset(&g, 0, sizeof g);
        r = qwen3i_gguf_open_part(l, qwen3i_str_of(name), &g);
        if (r == QWEN3_OK) r = qwen3i_gguf_check_part(&g, i, count);
        if (r == QWEN3_OK) r = qwen3i_gguf_read_tensors(&g, t, &l->model->allocator);
        qwen3i_gguf_free(&l->model->allocator, &g);
    }
    return r;
}

/* Tensors that this library would leave out of the computation: biases, and factors of whole tensors but
   1. */
static qwen3_result qwen3i_gguf_check_names(const qwen3i_tensors *t, const qwen3i_err *err) {
    static const unsigned char one[4] = {0, 0, 0x80, 0x3F};     /* 1 as float32 */
    size_t i;
    for (i = 0; i < t->n; i++) {
        const qwen3i_tensor *w = &t->list[i];
        const int is_scale = qwen3i_str_ends(w->name, ".scale");
        if (is_scale && w->end - w->begin == 4 && memcmp(w->data, one, 4) == 0) continue;
        if (is_scale || qwen3i_str_ends(w->name, ".bias"))
            return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "%s: tensor '%.*s': %s are not supported",
                               w->file, QWEN3I_STR(w->name),
                               is_scale ? "factors of whole tensors" : "biases");
    }
    return QWEN3_OK;
}

/* The tensors of all parts, ordered by name. Without an output matrix the embedding is it. */
QWEN3I_COLD
static qwen3_result qwen3i_gguf_list(qwen3i_loader *l, qwen3i_tensors *t) {
    qwen3i_gguf *g = l->gguf;
    int found;
    double total = 0;
    qwen3_result r = qwen3i_gguf_read_tensors(g, t, &l->model->allocator);
    l->step = 0.1f / (float)g->n_parts;
    if (r == QWEN3_OK && g->n_parts > 1) r = qwen3i_gguf_list_parts(l, t);
    if (r == QWEN3_OK) r = qwen3i_gguf_get_number(g, "split.tensors.count", &total, &found);
    if (r == QWEN3_OK && found && total != (double)t->n)
        r = qwen3i_fail(l->err, QWEN3_ERR_FORMAT,
                        "%s: key 'split.tensors.count' is %.17g, but the parts hold %lu tensors", g->file,
                            total, (unsigned long)t->n);
    if (r == QWEN3_OK) r = qwen3i_index_tensors(t, l->err);
    if (r == QWEN3_OK) r = qwen3i_gguf_check_names(t, l->err);
    l->model->config.tied = !qwen3i_find_tensor(t, qwen3i_str_of("output.weight"));
    return r;
}

/* ================================================================================================
   UNICODE: UTF-8 of any bytes, character classes, normal form C.
   The classes are those of Unicode 16 and the normal form is that of Unicode 9: so it is in the
   tokenizer that the models were trained with.
   ================================================================================================ */
enum { QWEN3I_LETTER = 1, QWEN3I_NUMBER = 2, QWEN3I_SPACE = 3, QWEN3I_CLASS = 3, QWEN3I_UNSAFE = 4 };
#define QWEN3I_CLASSES_LOW 0x20000u     /* characters below are looked up, the others searched */

/* generated by tools/gen_unicode.py: begin */
/* Properties of characters, from each code at which they change: code << 11 | combining class << 3 |
   flags. */
static const uint32_t qwen3i_uc_props[2142] = {
    0, 18435, 28672, 65539, 67584, 98306, 118784, 133121, 186368, 198657, 251904, 272387, 274432, 327683,
    329728, 348161, 350208, 364546, 368640, 370689, 372736, 378882, 380929, 382976, 385026, 391168, 393217,
    440320, 442369, 505856, 507905, 1445888, 1454081, 1478656, 1507329, 1517568, 1531905, 1533952, 1536001,
    1538048, 1574708, 1617732, 1619684, 1627972, 1629892, 1631972, 1642068, 1646308, 1654356, 1658596,
    1679372, 1691364, 1699636, 1716100, 1718068, 1720036, 1726260, 1732324, 1734656, 1738548, 1744612,
    1752884, 1754948, 1756900, 1761076, 1763148, 1765204, 1769292, 1771348, 1775436, 1777460, 1802241,
    1810437, 1812480, 1814529, 1818624, 1822721, 1830916, 1832961, 1835008, 1847297, 1849348, 1851393,
    1857536, 1859585, 1861632, 1863681, 1904640, 1906689, 2076672, 2078721, 2363392, 2367284, 2375680,
    2379777, 2719744, 2721793, 2799616, 2803713, 2805760, 2818049, 2902016, 2920164, 2922292, 2930404,
    2932532, 2938612, 2940644, 2942772, 2954980, 2967348, 2971364, 2973492, 2977524, 2979620, 2981684,
    2981972, 2984028, 2986084, 2988140, 2990196, 2992252, 2994308, 2996364, 2998420, 3000476, 3004580,
    3006636, 3008692, 3010560, 3012796, 3014656, 3016900, 3018956, 3020800, 3024692, 3026660, 3026944,
    3029140, 3031040, 3047425, 3102720, 3110913, 3119104, 3180340, 3195124, 3197180, 3199236, 3201024,
    3211265, 3299548, 3301604, 3303660, 3305716, 3307772, 3309828, 3311884, 3313940, 3317556, 3321572,
    3325748, 3335908, 3338036, 3342052, 3342338, 3362816, 3371009, 3375388, 3377153, 3579904, 3581953,
    3585844, 3598336, 3604276, 3612388, 3614516, 3614721, 3620660, 3622912, 3626724, 3628852, 3632868,
    3633153, 3637250, 3657729, 3663872, 3667969, 3670016, 3702785, 3705124, 3706881, 3770164, 3772132,
    3774260, 3778276, 3780404, 3784420, 3790644, 3792612, 3796788, 3798756, 3800884, 3806948, 3809076,
    3811044, 3813172, 3815140, 3817268, 3819236, 3821364, 3823616, 3827713, 4009984, 4032513, 4034560,
    4063234, 4083713, 4153140, 4167396, 4169524, 4169729, 4173824, 4182017, 4184064, 4194305, 4241204,
    4247553, 4251444, 4268033, 4271924, 4276225, 4280116, 4288512, 4325377, 4378340, 4382720, 4390913,
    4413440, 4423681, 4472832, 4474881, 4487168, 4521985, 4608000, 4630324, 4657152, 4660964, 4663092,
    4667108, 4669236, 4673252, 4675380, 4681444, 4686044, 4688100, 4690156, 4693812, 4699876, 4702004,
    4706020, 4710196, 4718592, 4726785, 4837376, 4841532, 4843521, 4845568, 4876364, 4878336, 4882433,
    4886324, 4888292, 4890420, 4892672, 4898821, 4915201, 4919296, 4927490, 4947968, 4950017, 4982784,
    4990977, 5007360, 5011457, 5015552, 5019649, 5064704, 5066753, 5081088, 5083137, 5085184, 5091329,
    5099520, 5103676, 5105665, 5107716, 5109760, 5138508, 5140481, 5142528, 5158916, 5160960, 5169157,
    5173248, 5175301, 5177345, 5181440, 5189634, 5210113, 5214208, 5218306, 5230592, 5234689, 5236736,
    5253121, 5265408, 5273601, 5277696, 5281793, 5326848, 5328897, 5343232, 5345281, 5347333, 5349376,
    5351425, 5353477, 5355520, 5357569, 5361664, 5365820, 5367808, 5400652, 5402624, 5425157, 5431297,
    5433344, 5435397, 5437440, 5451778, 5472256, 5476353, 5482496, 5515265, 5533696, 5535745, 5541888,
    5543937, 5588992, 5591041, 5605376, 5607425, 5611520, 5613569, 5623808, 5627964, 5629953, 5632000,
    5662796, 5664768, 5668865, 5670912, 5701633, 5705728, 5713922, 5734400, 5752833, 5754880, 5777409,
    5793792, 5797889, 5801984, 5806081, 5851136, 5853185, 5867520, 5869569, 5873664, 5875713, 5885952,
    5890108, 5892097, 5894148, 5896192, 5924940, 5926912, 5943300, 5947392, 5955589, 5959680, 5961729,
    5967872, 5976066, 5996544, 5998593, 6000642, 6012928, 6035457, 6037504, 6039553, 6051840, 6057985,
    6064128, 6066177, 6074368, 6080513, 6084608, 6086657, 6088704, 6090753, 6094848, 6100993, 6105088,
    6111233, 6117376, 6123521, 6148096, 6156292, 6158336, 6187084, 6189056, 6193153, 6195200, 6207492,
    6209536, 6238210, 6264832, 6301697, 6318080, 6320129, 6326272, 6328321, 6375424, 6377473, 6410240,
    6416385, 6418432, 6449228, 6451200, 6466212, 6468316, 6469632, 6471681, 6477824, 6481921, 6483968,
    6488065, 6492160, 6500354, 6520832, 6537218, 6551552, 6553601, 6555648, 6563841, 6580224, 6582273,
    6588416, 6590465, 6637568, 6639617, 6660096, 6662145, 6672384, 6676540, 6678529, 6680576, 6688772,
    6690816, 6711372, 6713344, 6727684, 6731776, 6744065, 6748160, 6750209, 6754304, 6762498, 6782976,
    6785025, 6789120, 6823937, 6842368, 6844417, 6850560, 6852609, 6936576, 6940673, 6942724, 6944768,
    6973516, 6975489, 6977536, 6987777, 6993924, 6995970, 7010305, 7016448, 7024642, 7063552, 7065601,
    7077888, 7088129, 7124992, 7131137, 7180288, 7182337, 7200768, 7202817, 7204864, 7208961, 7223296,
    7229516, 7231488, 7239684, 7241728, 7272452, 7274496, 7286786, 7307264, 7342081, 7440384, 7442433,
    7446528, 7455548, 7458892, 7460864, 7471105, 7485440, 7488348, 7495680, 7503874, 7524352, 7604225,
    7608320, 7610369, 7612416, 7614465, 7624704, 7626753, 7675904, 7677953, 7680000, 7682049, 7702528,
    7704577, 7708672, 7717812, 7720960, 7727105, 7729152, 7733249, 7743488, 7745537, 7747584, 7750612,
    7757824, 7766018, 7786496, 7790593, 7798784, 7864321, 7866368, 7915236, 7917568, 7929858, 7970816,
    7974628, 7974912, 7978724, 7979008, 7982788, 7983104, 7995393, 8001541, 8003585, 8011776, 8013825,
    8022021, 8024065, 8032261, 8034305, 8042501, 8044545, 8052741, 8054785, 8079365, 8081409, 8087552,
    8096780, 8098836, 8099844, 8102948, 8103940, 8108032, 8110084, 8112128, 8115220, 8122368, 8127508,
    8128516, 8132404, 8134732, 8136704, 8140596, 8142849, 8153088, 8165380, 8167424, 8185860, 8187904,
    8196100, 8198144, 8206340, 8208384, 8216580, 8218624, 8243204, 8245248, 8271588, 8271872, 8388609,
    8476672, 8482820, 8484864, 8501308, 8503296, 8505420, 8509440, 8517633, 8519682, 8540160, 8552449,
    8564736, 8572929, 8581120, 8587265, 8589312, 8595457, 8599552, 8613889, 8620032, 8628225, 8654848,
    8679140, 8679425, 8681472, 8683522, 8704000, 8716289, 8794112, 8796161, 8798208, 8808449, 8810496,
    8814593, 8902656, 8904705, 9111557, 9154561, 9256965, 9312257, 9586688, 9588737, 9596928, 9601025,
    9615360, 9617409, 9619456, 9621505, 9629696, 9633793, 9717760, 9719809, 9728000, 9732097, 9799680,
    9801729, 9809920, 9814017, 9828352, 9830401, 9832448, 9834497, 9842688, 9846785, 9877504, 9879553,
    9996288, 9998337, 10006528, 10010625, 10147840, 10153780, 10158080, 10176514, 10217472, 10223617,
    10256384, 10289153, 10465280, 10469377, 10481664, 10487809, 11757568, 11761665, 11796483, 11798529,
    11851776, 11862017, 12015616, 12021762, 12027905, 12044288, 12058625, 12095488, 12099660, 12101632,
    12122113, 12161024, 12165196, 12167168, 12189697, 12226560, 12255233, 12281856, 12283905, 12290048,
    12320769, 12427264, 12488780, 12490752, 12498945, 12500992, 12509185, 12513076, 12513280, 12517378,
    12537856, 12550146, 12570624, 12615682, 12636160, 12648449, 12830720, 12845057, 12855296, 12859393,
    12930852, 12931073, 12933120, 12943361, 13086720, 13107201, 13170688, 13225716, 13227828, 13229796,
    13230080, 13250562, 13271041, 13332480, 13336577, 13346816, 13369345, 13459456, 13467649, 13520896,
    13533186, 13555712, 13631489, 13680436, 13682404, 13682688, 13697025, 13805568, 13828172, 13830144,
    13872948, 13887488, 13893348, 13893634, 13914112, 13926402, 13946880, 13973505, 13975552, 13993780,
    14003940, 14016308, 14020324, 14020608, 14166017, 14262332, 14264324, 14266368, 14295116, 14297089,
    14313472, 14319618, 14340096, 14376756, 14378724, 14380852, 14393344, 14424065, 14485504, 14504012,
    14508032, 14512129, 14516226, 14536705, 14626876, 14628864, 14651468, 14655488, 14680065, 14753792,
    14792764, 14794752, 14811138, 14831616, 14837761, 14843906, 14864385, 14938112, 14942209, 14964736,
    14974977, 15063040, 15067137, 15073280, 15107892, 15112192, 15114252, 15118052, 15128372, 15132388,
    15140660, 15140864, 15142924, 15157249, 15167204, 15167489, 15181620, 15181825, 15185920, 15189812,
    15192065, 15194112, 15204353, 15599412, 15603428, 15605556, 15619812, 15621940, 15626068, 15627956,
    15630052, 15631956, 15634228, 15708160, 15720244, 15722316, 15724260, 15726388, 15728356, 15728641,
    16297984, 16302081, 16314368, 16318465, 16396288, 16400385, 16412672, 16416769, 16433152, 16435201,
    16437248, 16439297, 16441344, 16443393, 16445440, 16447489, 16484357, 16486401, 16488453, 16490497,
    16492549, 16494593, 16496645, 16498689, 16500741, 16502785, 16504837, 16506881, 16508933, 16510976,
    16515073, 16623616, 16625665, 16635909, 16637953, 16640000, 16642053, 16644096, 16650241, 16656384,
    16658433, 16664581, 16666625, 16668677, 16670721, 16672768, 16678913, 16685061, 16687104, 16691201,
    16701445, 16703488, 16711681, 16717829, 16719873, 16734213, 16736257, 16738304, 16740356, 16744448,
    16748545, 16754688, 16756737, 16762885, 16764929, 16766981, 16769025, 16771076, 16773120, 16777223,
    16781315, 16799744, 16859139, 16863232, 16873475, 16875520, 16971779, 16973824, 17006594, 17008641,
    17010688, 17014786, 17027072, 17037313, 17039362, 17059840, 17072129, 17098752, 17205044, 17207308,
    17213236, 17219596, 17227572, 17229824, 17239860, 17240064, 17246220, 17252148, 17254116, 17256244,
    17256460, 17262308, 17270580, 17270784, 17305601, 17307648, 17315841, 17317888, 17321985, 17342464,
    17344513, 17346560, 17352705, 17362944, 17375233, 17377280, 17379333, 17381376, 17383425, 17385472,
    17387525, 17391617, 17395712, 17397761, 17420288, 17424385, 17432576, 17442817, 17453056, 17461249,
    17463296, 17465346, 17569793, 17573890, 17584128, 18434052, 18438144, 19070978, 19193856, 19353602,
    19398656, 20688898, 20750336, 22470660, 22472704, 23068673, 23537664, 23549953, 23559988, 23564289,
    23568384, 23586818, 23588864, 23592961, 23670784, 23672833, 23674880, 23685121, 23687168, 23691265,
    23805952, 23820289, 23822336, 23853132, 23855105, 23902208, 23920641, 23934976, 23937025, 23951360,
    23953409, 23967744, 23969793, 23984128, 23986177, 24000512, 24002561, 24016896, 24018945, 24033280,
    24035329, 24049664, 24053556, 24117248, 24213505, 24215552, 25165827, 25167872, 25176065, 25180162,
    25182208, 25233410, 25253588, 25255716, 25257796, 25259764, 25261828, 25264128, 25266177, 25276416,
    25280514, 25286657, 25290752, 25298945, 25475072, 25479236, 25483264, 25487361, 25493504, 25495553,
    25679872, 25681921, 25690112, 25700353, 25788416, 25790465, 25982976, 25989122, 25997312, 26017793,
    26083328, 26181633, 26214400, 26279938, 26300416, 26361858, 26378240, 26380290, 26411008, 26476546,
    26497024, 26576898, 26607616, 27262977, 40763392, 40894465, 86272000, 86409217, 86503424, 86507521,
    87058432, 87064577, 87097346, 87117825, 87121920, 87162881, 87260980, 87261184, 87271220, 87289856,
    87291905, 87357236, 87359489, 87502850, 87525172, 87527424, 87603201, 87621632, 87625729, 87836672,
    87840769, 87977984, 87982081, 87986176, 87988225, 87990272, 87992321, 88008704, 88051713, 88084480,
    88086529, 88092748, 88094721, 88102912, 88104961, 88152064, 88178690, 88190976, 88211457, 88317952,
    88346625, 88449024, 88481868, 88483840, 88506370, 88526848, 88540980, 88576001, 88588288, 88594433,
    88596480, 88598529, 88602624, 88604674, 88625153, 88682496, 88694500, 88698880, 88702977, 88750080,
    88774732, 88776704, 88801281, 88860672, 88875009, 88971324, 88973312, 88997964, 88999936, 89028609,
    89030658, 89051136, 89063425, 89073664, 89075713, 89096194, 89116673, 89126912, 89128961, 89212928,
    89260033, 89266176, 89268225, 89284608, 89292802, 89313280, 89325569, 89372672, 89378817, 89380864,
    89387009, 89491252, 89491457, 89495348, 89499364, 89499649, 89505588, 89507841, 89519924, 89522177,
    89526068, 89526273, 89528320, 89577473, 89583616, 89587713, 89610240, 89624577, 89630720, 89632844,
    89634816, 89655297, 89667584, 89671681, 89683968, 89688065, 89700352, 89718785, 89733120, 89735169,
    89749504, 89751553, 89839616, 89841665, 89870336, 89882625, 90118144, 90138700, 90140672, 90144770,
    90165248, 90177537, 113057792, 113082369, 113129472, 113137665, 113238016, 130547717, 131100673,
    131104773, 131106817, 131108869, 131110913, 131115013, 131135489, 131137541, 131139585, 131141637,
    131143681, 131147781, 131151873, 131158021, 131297280, 131301381, 131518464, 131596289, 131610624,
    131635201, 131645440, 131655685, 131657940, 131659781, 131661825, 131680256, 131682309, 131708928,
    131710981, 131721216, 131723269, 131725312, 131727365, 131731456, 131733509, 131737600, 131739653,
    131758081, 131960832, 132028417, 132771840, 132808705, 132939776, 132943873, 133054464, 133136385,
    133160960, 133236532, 133250788, 133265204, 133267456, 133398529, 133408768, 133410817, 133687296,
    133726210, 133746688, 133761025, 133814272, 133826561, 133879808, 133902337, 134084608, 134090753,
    134103040, 134107137, 134119424, 134123521, 134135808, 134139905, 134146048, 134217729, 134242304,
    134244353, 134297600, 134299649, 134338560, 134340609, 134344704, 134346753, 134377472, 134381569,
    134410240, 134479873, 134731776, 134756354, 134848512, 134873090, 134989824, 135024642, 135028736,
    135261924, 135262208, 135528449, 135587840, 135593985, 135694336, 135726820, 135727106, 135782400,
    135790593, 135856130, 135864320, 135882753, 135923714, 135925761, 135942146, 135944192, 135954433,
    136034100, 136042496, 136052737, 136114176, 136118273, 136192000, 136200193, 136216576, 136218626,
    136228864, 136314881, 136638464, 136642562, 136663040, 136675329, 136749056, 136757249, 136830976,
    136839169, 136921088, 136937473, 137043968, 137068545, 137091072, 137093121, 137123840, 137125889,
    137140224, 137142273, 137146368, 137148417, 137170944, 137172993, 137203712, 137205761, 137220096,
    137222145, 137226240, 137232385, 137338880, 137363457, 138000384, 138018817, 138063872, 138084353,
    138100736, 138149889, 138162176, 138164225, 138250240, 138252289, 138270720, 138412033, 138424320,
    138428417, 138430464, 138432513, 138522624, 138524673, 138528768, 138534913, 138536960, 138541057,
    138588160, 138592258, 138608641, 138655744, 138659842, 138674177, 138737664, 138754050, 138772480,
    138870785, 138909696, 138911745, 138915840, 138926082, 138936321, 138981378, 138993664, 139001857,
    139055104, 139198465, 139313152, 139321346, 139325441, 139329538, 139362304, 139366402, 139460609,
    139462656, 139488996, 139489280, 139493172, 139493377, 139501568, 139503617, 139509760, 139511809,
    139571200, 139577140, 139577356, 139581156, 139581440, 139589708, 139591682, 139610112, 139657217,
    139716610, 139720704, 139722753, 139782146, 139788288, 139853825, 139870208, 139872257, 139931444,
    139933412, 139933696, 139941890, 139952128, 139984897, 140095488, 140115969, 140161024, 140165122,
    140181505, 140220416, 140230658, 140247041, 140283904, 140331010, 140345344, 140509185, 140658688,
    140771329, 140875776, 140902401, 141006848, 141021186, 141033473, 141107200, 141131778, 141152256,
    141164546, 141185025, 141242368, 141260801, 141307904, 141754370, 141817856, 141819905, 141905920,
    141918209, 141922304, 141955073, 141961216, 142082049, 142141442, 142161921, 142163968, 142180353,
    142225408, 142247938, 142256128, 142311425, 142348288, 142442497, 142485506, 142499840, 142540801,
    142587904, 142612481, 142721024, 142749772, 142751744, 142774274, 142835712, 142837761, 142841856,
    142845953, 142848000, 142866508, 142868480, 142874625, 142966784, 142985292, 142987324, 142989312,
    143032321, 143083520, 143097858, 143118336, 143132468, 143136769, 143210500, 143212544, 143235148,
    143239168, 143241218, 143261696, 143269889, 143271936, 143276033, 143278080, 143294465, 143366204,
    143368192, 143372289, 143374336, 143398913, 143497216, 143523916, 143525889, 143534080, 143544380,
    143546368, 143556610, 143577089, 143579136, 143581185, 143583232, 143591426, 143632384, 143654913,
    143691776, 143693825, 143745024, 143763532, 143765564, 143767552, 143783937, 143788032, 143917057,
    143931392, 143933441, 143935488, 143937537, 143945728, 143947777, 143978496, 143980545, 144001024,
    144015361, 144111616, 144132156, 144134220, 144136192, 144146434, 144166912, 144189441, 144205824,
    144209921, 144214016, 144218113, 144263168, 144265217, 144279552, 144281601, 144285696, 144287745,
    144297984, 144302140, 144304129, 144306180, 144308224, 144336972, 144338944, 144343041, 144345088,
    144357380, 144359424, 144369665, 144379904, 144389940, 144402432, 144410420, 144418816, 144441345,
    144461824, 144463873, 144465920, 144470017, 144472064, 144474113, 144551936, 144553985, 144556032,
    144607233, 144609280, 144611329, 144613376, 144703489, 144812032, 144838732, 144840704, 144846908,
    144848897, 144857088, 144867330, 144887808, 144898049, 144904192, 144965633, 145063940, 145065984,
    145084420, 145086464, 145090564, 145092608, 145100876, 145102908, 145104897, 145108992, 145111041,
    145113088, 145129474, 145149952, 145489921, 145586180, 145588224, 145619020, 145621052, 145623040,
    145670145, 145678336, 145752065, 145850368, 145881164, 145883136, 145891329, 145893376, 145915906,
    145936384, 146014209, 146102272, 146124876, 146126908, 146128897, 146130944, 146145282, 146165760,
    146178050, 146219008, 146276353, 146331648, 146364492, 146366464, 146374658, 146399232, 146407425,
    146421760, 146800641, 146890752, 147128321, 147259394, 147298304, 147322881, 147339264, 147343361,
    147345408, 147349505, 147365888, 147367937, 147372032, 147374081, 147423232, 147453953, 147456000,
    147458049, 147460096, 147488770, 147509248, 147652609, 147668992, 147673089, 147752960, 147785729,
    147787776, 147789825, 147791872, 147849217, 147851264, 147871745, 147953664, 147968001, 147970048,
    148013057, 148015104, 148037633, 148131840, 148170753, 148172800, 148209665, 148359168, 148766721,
    148834304, 148865026, 148885504, 148897793, 148916224, 148918273, 148994048, 149026892, 149028865,
    149030912, 149061634, 149121024, 149131265, 149192704, 149422081, 149436416, 149438465, 149442560,
    149444609, 149522432, 149565441, 149567488, 149585922, 149606400, 149618689, 149630976, 149633025,
    149637120, 149639169, 149704704, 149733377, 149735424, 149749762, 149770240, 150405121, 150444032,
    150474753, 150476800, 150478849, 150505472, 150507521, 150577152, 150634498, 150654976, 150831105,
    150833152, 150863874, 150906880, 150994945, 152883200, 153092098, 153319424, 153354241, 153755648,
    159154177, 159352832, 159383553, 161579008, 161613825, 161626112, 161677313, 169859072, 169869313,
    171063296, 185073665, 185135104, 185171970, 185192448, 188743681, 189908992, 189923329, 189986816,
    189988866, 190009344, 190021633, 190183424, 190185474, 190205952, 190218241, 190279680, 190283788,
    190294016, 190316545, 190416692, 190429184, 190447617, 190455808, 190480386, 190500864, 190502914,
    190517248, 190519297, 190562304, 190572545, 190611456, 191496193, 191588352, 191594498, 191614976,
    192020481, 192151554, 192198656, 192413697, 192567296, 192577537, 192579584, 192714753, 192741376,
    192872449, 192876544, 192878593, 192880640, 192937985, 205504512, 205520897, 208056320, 208140289,
    208160768, 226459649, 226467840, 226469889, 226484224, 226486273, 226490368, 226492417, 227088384,
    227119105, 227121152, 227180545, 227186688, 227190785, 227192832, 227221505, 227229696, 227246081,
    228057088, 232783873, 233003008, 233013249, 233039872, 233046017, 233064448, 233078785, 233099264,
    233107468, 233109504, 241664002, 241684480, 243986436, 244002500, 244004876, 244011008, 244018964,
    244020932, 244029440, 244047588, 244062208, 244068148, 244078308, 244080640, 244143924, 244150272,
    244176900, 244189184, 244455220, 244459520, 244711426, 244752384, 244776962, 244817920, 245039106,
    245090304, 245366785, 245540864, 245542913, 245688320, 245690369, 245694464, 245698561, 245700608,
    245704705, 245708800, 245712897, 245721088, 245723137, 245747712, 245749761, 245751808, 245753857,
    245768192, 245770241, 245903360, 245905409, 245913600, 245917697, 245934080, 245936129, 245950464,
    245952513, 246009856, 246011905, 246020096, 246022145, 246032384, 246034433, 246036480, 246042625,
    246056960, 246059009, 246755328, 246759425, 246810624, 246812673, 246863872, 246865921, 246929408,
    246931457, 246982656, 246984705, 247048192, 247050241, 247101440, 247103489, 247166976, 247169025,
    247220224, 247222273, 247285760, 247287809, 247339008, 247341057, 247357440, 247361538, 247463936,
    251133953, 251197440, 251209729, 251222016, 251660084, 251672576, 251676468, 251709440, 251715380,
    251727872, 251731764, 251734016, 251737908, 251746304, 251756545, 251883520, 252182529, 252274688,
    252295169, 252309504, 252313602, 252334080, 252342273, 252344320, 253001729, 253063168, 253100033,
    253190144, 253198338, 253218816, 254181377, 254238720, 254246914, 254267392, 254705665, 254767104,
    254771201, 254773250, 254793728, 255787009, 255801344, 255803393, 255811584, 255813633, 255817728,
    255819777, 255850496, 255852545, 256256000, 256260098, 256280292, 256292864, 256376833, 256517940,
    256528444, 256530433, 256532480, 256540674, 256561152, 258181122, 258301952, 258304002, 258310144,
    258312194, 258320384, 258476034, 258568192, 258570242, 258600960, 258998273, 259006464, 259008513,
    259063808, 259065857, 259069952, 259072001, 259074048, 259078145, 259080192, 259082241, 259102720,
    259104769, 259112960, 259115009, 259117056, 259119105, 259121152, 259133441, 259135488, 259143681,
    259145728, 259147777, 259149824, 259151873, 259153920, 259155969, 259162112, 259164161, 259168256,
    259170305, 259172352, 259176449, 259178496, 259180545, 259182592, 259184641, 259186688, 259188737,
    259190784, 259192833, 259194880, 259196929, 259201024, 259203073, 259205120, 259209217, 259217408,
    259219457, 259233792, 259235841, 259244032, 259246081, 259254272, 259256321, 259258368, 259260417,
    259280896, 259282945, 259317760, 259328001, 259334144, 259336193, 259346432, 259348481, 259383296,
    260571138, 260597760, 266305538, 266326016, 268435457, 355926016, 355991553, 364498944, 364511233,
    364965888, 364969985, 376770560, 376799233, 392103936, 392134657, 393408512, 398458885, 399568896,
    402653185, 412768256, 412778497, 421363712,
};
/* Canonical decompositions: runs of consecutive codes as (first code, index), then [index] -> first less
   its plane, and plane + 3 * index of the second among all (0: none); and the indices of those that NFC
   composes, ordered by (first, second). */
static const uint32_t qwen3i_uc_runs[462] = {
    192, 0, 199, 6, 209, 15, 217, 21, 224, 26, 231, 32, 241, 41, 249, 47, 255, 52, 274, 69, 296, 89, 308,
    98, 313, 102, 323, 108, 332, 114, 340, 120, 360, 138, 416, 161, 431, 163, 461, 165, 478, 181, 486, 187,
    500, 198, 504, 200, 542, 236, 550, 238, 832, 252, 835, 254, 884, 256, 894, 257, 901, 258, 908, 264, 910,
    265, 938, 268, 970, 275, 979, 280, 1024, 282, 1027, 284, 1031, 285, 1036, 286, 1049, 289, 1081, 290,
    1104, 291, 1107, 293, 1111, 294, 1116, 295, 1142, 298, 1217, 300, 1232, 302, 1238, 306, 1242, 308, 1250,
    314, 1258, 320, 1272, 332, 1570, 334, 1728, 339, 1730, 340, 1747, 341, 2345, 342, 2353, 343, 2356, 344,
    2392, 345, 2507, 353, 2524, 355, 2527, 357, 2611, 358, 2614, 359, 2649, 360, 2654, 363, 2888, 364, 2891,
    365, 2908, 367, 2964, 369, 3018, 370, 3144, 373, 3264, 374, 3271, 375, 3274, 377, 3402, 379, 3546, 382,
    3548, 383, 3907, 386, 3917, 387, 3922, 388, 3927, 389, 3932, 390, 3945, 391, 3955, 392, 3957, 393, 3960,
    395, 3969, 396, 3987, 397, 3997, 398, 4002, 399, 4007, 400, 4012, 401, 4025, 402, 4134, 403, 6918, 404,
    6920, 405, 6922, 406, 6924, 407, 6926, 408, 6930, 409, 6971, 410, 6973, 411, 6976, 412, 6979, 414, 7680,
    415, 7835, 569, 7840, 570, 7936, 660, 7960, 682, 7968, 688, 8008, 726, 8016, 732, 8025, 740, 8027, 741,
    8029, 742, 8031, 743, 8064, 774, 8118, 827, 8126, 834, 8129, 835, 8134, 839, 8150, 853, 8157, 859, 8178,
    878, 8182, 881, 8192, 889, 8486, 891, 8490, 892, 8602, 894, 8622, 896, 8653, 897, 8708, 900, 8713, 901,
    8716, 902, 8740, 903, 8742, 904, 8769, 905, 8772, 906, 8775, 907, 8777, 908, 8800, 909, 8802, 910, 8813,
    911, 8820, 916, 8824, 918, 8832, 920, 8836, 922, 8840, 924, 8876, 926, 8928, 930, 8938, 934, 9001, 938,
    10972, 940, 12364, 941, 12366, 942, 12368, 943, 12370, 944, 12372, 945, 12374, 946, 12376, 947, 12378,
    948, 12380, 949, 12382, 950, 12384, 951, 12386, 952, 12389, 953, 12391, 954, 12393, 955, 12400, 956,
    12403, 958, 12406, 960, 12409, 962, 12412, 964, 12436, 966, 12446, 967, 12460, 968, 12462, 969, 12464,
    970, 12466, 971, 12468, 972, 12470, 973, 12472, 974, 12474, 975, 12476, 976, 12478, 977, 12480, 978,
    12482, 979, 12485, 980, 12487, 981, 12489, 982, 12496, 983, 12499, 985, 12502, 987, 12505, 989, 12508,
    991, 12532, 993, 12535, 994, 12542, 998, 63744, 999, 64016, 1269, 64018, 1270, 64021, 1271, 64032, 1281,
    64034, 1282, 64037, 1283, 64042, 1285, 64112, 1353, 64285, 1459, 64287, 1460, 64298, 1461, 64312, 1474,
    64318, 1479, 64320, 1480, 64323, 1482, 64326, 1484, 69786, 1493, 69788, 1494, 69803, 1495, 69934, 1496,
    70475, 1498, 70843, 1500, 70846, 1502, 71098, 1503, 119134, 1505, 119227, 1512, 194560, 1518, 1114112,
    2060,
};
static const uint16_t qwen3i_uc_first[2060] = {
    65, 65, 65, 65, 65, 65, 67, 69, 69, 69, 69, 73, 73, 73, 73, 78, 79, 79, 79, 79, 79, 85, 85, 85, 85, 89,
    97, 97, 97, 97, 97, 97, 99, 101, 101, 101, 101, 105, 105, 105, 105, 110, 111, 111, 111, 111, 111, 117,
    117, 117, 117, 121, 121, 65, 97, 65, 97, 65, 97, 67, 99, 67, 99, 67, 99, 67, 99, 68, 100, 69, 101, 69,
    101, 69, 101, 69, 101, 69, 101, 71, 103, 71, 103, 71, 103, 71, 103, 72, 104, 73, 105, 73, 105, 73, 105,
    73, 105, 73, 74, 106, 75, 107, 76, 108, 76, 108, 76, 108, 78, 110, 78, 110, 78, 110, 79, 111, 79, 111,
    79, 111, 82, 114, 82, 114, 82, 114, 83, 115, 83, 115, 83, 115, 83, 115, 84, 116, 84, 116, 85, 117, 85,
    117, 85, 117, 85, 117, 85, 117, 85, 117, 87, 119, 89, 121, 89, 90, 122, 90, 122, 90, 122, 79, 111, 85,
    117, 65, 97, 73, 105, 79, 111, 85, 117, 220, 252, 220, 252, 220, 252, 220, 252, 196, 228, 550, 551, 198,
    230, 71, 103, 75, 107, 79, 111, 490, 491, 439, 658, 106, 71, 103, 78, 110, 197, 229, 198, 230, 216, 248,
    65, 97, 65, 97, 69, 101, 69, 101, 73, 105, 73, 105, 79, 111, 79, 111, 82, 114, 82, 114, 85, 117, 85,
    117, 83, 115, 84, 116, 72, 104, 65, 97, 69, 101, 214, 246, 213, 245, 79, 111, 558, 559, 89, 121, 768,
    769, 787, 776, 697, 59, 168, 913, 183, 917, 919, 921, 927, 933, 937, 970, 921, 933, 945, 949, 951, 953,
    971, 953, 965, 959, 965, 969, 978, 978, 1045, 1045, 1043, 1030, 1050, 1048, 1059, 1048, 1080, 1077,
    1077, 1075, 1110, 1082, 1080, 1091, 1140, 1141, 1046, 1078, 1040, 1072, 1040, 1072, 1045, 1077, 1240,
    1241, 1046, 1078, 1047, 1079, 1048, 1080, 1048, 1080, 1054, 1086, 1256, 1257, 1069, 1101, 1059, 1091,
    1059, 1091, 1059, 1091, 1063, 1095, 1067, 1099, 1575, 1575, 1608, 1575, 1610, 1749, 1729, 1746, 2344,
    2352, 2355, 2325, 2326, 2327, 2332, 2337, 2338, 2347, 2351, 2503, 2503, 2465, 2466, 2479, 2610, 2616,
    2582, 2583, 2588, 2603, 2887, 2887, 2887, 2849, 2850, 2962, 3014, 3015, 3014, 3142, 3263, 3270, 3270,
    3270, 3274, 3398, 3399, 3398, 3545, 3545, 3548, 3545, 3906, 3916, 3921, 3926, 3931, 3904, 3953, 3953,
    4018, 4019, 3953, 3986, 3996, 4001, 4006, 4011, 3984, 4133, 6917, 6919, 6921, 6923, 6925, 6929, 6970,
    6972, 6974, 6975, 6978, 65, 97, 66, 98, 66, 98, 66, 98, 199, 231, 68, 100, 68, 100, 68, 100, 68, 100,
    68, 100, 274, 275, 274, 275, 69, 101, 69, 101, 552, 553, 70, 102, 71, 103, 72, 104, 72, 104, 72, 104,
    72, 104, 72, 104, 73, 105, 207, 239, 75, 107, 75, 107, 75, 107, 76, 108, 7734, 7735, 76, 108, 76, 108,
    77, 109, 77, 109, 77, 109, 78, 110, 78, 110, 78, 110, 78, 110, 213, 245, 213, 245, 332, 333, 332, 333,
    80, 112, 80, 112, 82, 114, 82, 114, 7770, 7771, 82, 114, 83, 115, 83, 115, 346, 347, 352, 353, 7778,
    7779, 84, 116, 84, 116, 84, 116, 84, 116, 85, 117, 85, 117, 85, 117, 360, 361, 362, 363, 86, 118, 86,
    118, 87, 119, 87, 119, 87, 119, 87, 119, 87, 119, 88, 120, 88, 120, 89, 121, 90, 122, 90, 122, 90, 122,
    104, 116, 119, 121, 383, 65, 97, 65, 97, 194, 226, 194, 226, 194, 226, 194, 226, 7840, 7841, 258, 259,
    258, 259, 258, 259, 258, 259, 7840, 7841, 69, 101, 69, 101, 69, 101, 202, 234, 202, 234, 202, 234, 202,
    234, 7864, 7865, 73, 105, 73, 105, 79, 111, 79, 111, 212, 244, 212, 244, 212, 244, 212, 244, 7884, 7885,
    416, 417, 416, 417, 416, 417, 416, 417, 416, 417, 85, 117, 85, 117, 431, 432, 431, 432, 431, 432, 431,
    432, 431, 432, 89, 121, 89, 121, 89, 121, 89, 121, 945, 945, 7936, 7937, 7936, 7937, 7936, 7937, 913,
    913, 7944, 7945, 7944, 7945, 7944, 7945, 949, 949, 7952, 7953, 7952, 7953, 917, 917, 7960, 7961, 7960,
    7961, 951, 951, 7968, 7969, 7968, 7969, 7968, 7969, 919, 919, 7976, 7977, 7976, 7977, 7976, 7977, 953,
    953, 7984, 7985, 7984, 7985, 7984, 7985, 921, 921, 7992, 7993, 7992, 7993, 7992, 7993, 959, 959, 8000,
    8001, 8000, 8001, 927, 927, 8008, 8009, 8008, 8009, 965, 965, 8016, 8017, 8016, 8017, 8016, 8017, 933,
    8025, 8025, 8025, 969, 969, 8032, 8033, 8032, 8033, 8032, 8033, 937, 937, 8040, 8041, 8040, 8041, 8040,
    8041, 945, 940, 949, 941, 951, 942, 953, 943, 959, 972, 965, 973, 969, 974, 7936, 7937, 7938, 7939,
    7940, 7941, 7942, 7943, 7944, 7945, 7946, 7947, 7948, 7949, 7950, 7951, 7968, 7969, 7970, 7971, 7972,
    7973, 7974, 7975, 7976, 7977, 7978, 7979, 7980, 7981, 7982, 7983, 8032, 8033, 8034, 8035, 8036, 8037,
    8038, 8039, 8040, 8041, 8042, 8043, 8044, 8045, 8046, 8047, 945, 945, 8048, 945, 940, 945, 8118, 913,
    913, 913, 902, 913, 953, 168, 8052, 951, 942, 951, 8134, 917, 904, 919, 905, 919, 8127, 8127, 8127, 953,
    953, 970, 912, 953, 970, 921, 921, 921, 906, 8190, 8190, 8190, 965, 965, 971, 944, 961, 961, 965, 971,
    933, 933, 933, 910, 929, 168, 901, 96, 8060, 969, 974, 969, 8182, 927, 908, 937, 911, 937, 180, 8194,
    8195, 937, 75, 197, 8592, 8594, 8596, 8656, 8660, 8658, 8707, 8712, 8715, 8739, 8741, 8764, 8771, 8773,
    8776, 61, 8801, 8781, 60, 62, 8804, 8805, 8818, 8819, 8822, 8823, 8826, 8827, 8834, 8835, 8838, 8839,
    8866, 8872, 8873, 8875, 8828, 8829, 8849, 8850, 8882, 8883, 8884, 8885, 12296, 12297, 10973, 12363,
    12365, 12367, 12369, 12371, 12373, 12375, 12377, 12379, 12381, 12383, 12385, 12388, 12390, 12392, 12399,
    12399, 12402, 12402, 12405, 12405, 12408, 12408, 12411, 12411, 12358, 12445, 12459, 12461, 12463, 12465,
    12467, 12469, 12471, 12473, 12475, 12477, 12479, 12481, 12484, 12486, 12488, 12495, 12495, 12498, 12498,
    12501, 12501, 12504, 12504, 12507, 12507, 12454, 12527, 12528, 12529, 12530, 12541, 35912, 26356, 36554,
    36040, 28369, 20018, 21477, 40860, 40860, 22865, 37329, 21895, 22856, 25078, 30313, 32645, 34367, 34746,
    35064, 37007, 27138, 27931, 28889, 29662, 33853, 37226, 39409, 20098, 21365, 27396, 29211, 34349, 40478,
    23888, 28651, 34253, 35172, 25289, 33240, 34847, 24266, 26391, 28010, 29436, 37070, 20358, 20919, 21214,
    25796, 27347, 29200, 30439, 32769, 34310, 34396, 36335, 38706, 39791, 40442, 30860, 31103, 32160, 33737,
    37636, 40575, 35542, 22751, 24324, 31840, 32894, 29282, 30922, 36034, 38647, 22744, 23650, 27155, 28122,
    28431, 32047, 32311, 38475, 21202, 32907, 20956, 20940, 31260, 32190, 33777, 38517, 35712, 25295, 27138,
    35582, 20025, 23527, 24594, 29575, 30064, 21271, 30971, 20415, 24489, 19981, 27852, 25976, 32034, 21443,
    22622, 30465, 33865, 35498, 27578, 36784, 27784, 25342, 33509, 25504, 30053, 20142, 20841, 20937, 26753,
    31975, 33391, 35538, 37327, 21237, 21570, 22899, 24300, 26053, 28670, 31018, 38317, 39530, 40599, 40654,
    21147, 26310, 27511, 36706, 24180, 24976, 25088, 25754, 28451, 29001, 29833, 31178, 32244, 32879, 36646,
    34030, 36899, 37706, 21015, 21155, 21693, 28872, 35010, 35498, 24265, 24565, 25467, 27566, 31806, 29557,
    20196, 22265, 23527, 23994, 24604, 29618, 29801, 32666, 32838, 37428, 38646, 38728, 38936, 20363, 31150,
    37300, 38584, 24801, 20102, 20698, 23534, 23615, 26009, 27138, 29134, 30274, 34044, 36988, 40845, 26248,
    38446, 21129, 26491, 26611, 27969, 28316, 29705, 30041, 30827, 32016, 39006, 20845, 25134, 38520, 20523,
    23833, 28138, 36650, 24459, 24900, 26647, 29575, 38534, 21033, 21519, 23653, 26131, 26446, 26792, 27877,
    29702, 30178, 32633, 35023, 35041, 37324, 38626, 21311, 28346, 21533, 29136, 29848, 34298, 38563, 40023,
    40607, 26519, 28107, 33256, 31435, 31520, 31890, 29376, 28825, 35672, 20160, 33590, 21050, 20999, 24230,
    25299, 31958, 23429, 27934, 26292, 36667, 34892, 38477, 35211, 24275, 20800, 21952, 22618, 26228, 20958,
    29482, 30410, 31036, 31070, 31077, 31119, 38742, 31934, 32701, 34322, 35576, 36920, 37117, 39151, 39164,
    39208, 40372, 37086, 38583, 20398, 20711, 20813, 21193, 21220, 21329, 21917, 22022, 22120, 22592, 22696,
    23652, 23662, 24724, 24936, 24974, 25074, 25935, 26082, 26257, 26757, 28023, 28186, 28450, 29038, 29227,
    29730, 30865, 31038, 31049, 31048, 31056, 31062, 31069, 31117, 31118, 31296, 31361, 31680, 32244, 32265,
    32321, 32626, 32773, 33261, 33401, 33401, 33879, 35088, 35222, 35585, 35641, 36051, 36104, 36790, 36920,
    38627, 38911, 38971, 24693, 17134, 33304, 20006, 20917, 20840, 20352, 20805, 20864, 21191, 21242, 21917,
    21845, 21913, 21986, 22618, 22707, 22852, 22868, 23138, 23336, 24274, 24281, 24425, 24493, 24792, 24910,
    24840, 24974, 24928, 25074, 25140, 25540, 25628, 25682, 25942, 26228, 26391, 26395, 26454, 27513, 27578,
    27969, 28379, 28363, 28450, 28702, 29038, 30631, 29237, 29359, 29482, 29809, 29958, 30011, 30237, 30239,
    30410, 30427, 30452, 30538, 30528, 30924, 31409, 31680, 31867, 32091, 32244, 32574, 32773, 33618, 33775,
    34681, 35137, 35206, 35222, 35519, 35576, 35531, 35585, 35582, 35565, 35641, 35722, 36104, 36664, 36978,
    37273, 37494, 38524, 38627, 38742, 38875, 38911, 38923, 38971, 39698, 40860, 10314, 10308, 13269, 15261,
    16408, 16441, 21065, 23760, 32467, 40771, 40846, 1497, 1522, 1513, 1513, 64329, 64329, 1488, 1488, 1488,
    1489, 1490, 1491, 1492, 1493, 1494, 1496, 1497, 1498, 1499, 1500, 1502, 1504, 1505, 1507, 1508, 1510,
    1511, 1512, 1513, 1514, 1493, 1489, 1499, 1508, 4249, 4251, 4261, 4401, 4402, 4935, 4935, 5305, 5305,
    5305, 5560, 5561, 53591, 53592, 53599, 53599, 53599, 53599, 53599, 53689, 53690, 53691, 53692, 53691,
    53692, 20029, 20024, 20033, 290, 20320, 20398, 20411, 20482, 20602, 20633, 20711, 20687, 13470, 1594,
    20813, 20820, 20836, 20855, 1308, 13497, 20839, 20877, 1355, 20887, 20900, 20172, 20908, 20917, 37343,
    20981, 20995, 13535, 21051, 21062, 21106, 21111, 13589, 21191, 21193, 21220, 21242, 21253, 21254, 21271,
    21321, 21329, 21338, 21363, 21373, 21375, 21375, 21375, 2604, 28784, 21450, 21471, 2915, 21483, 21489,
    21510, 21662, 21560, 21576, 21608, 21666, 21750, 21776, 21843, 21859, 21892, 21892, 21913, 21931, 21939,
    21954, 22294, 22022, 22295, 22097, 22132, 20999, 22766, 22478, 22516, 22541, 22411, 22578, 22577, 22700,
    5348, 22770, 22775, 22790, 22810, 22818, 22882, 5800, 5866, 23020, 23067, 23079, 23000, 23142, 14062,
    14076, 23304, 23358, 23358, 6600, 23491, 23512, 23527, 23539, 6936, 23551, 23558, 24403, 23586, 14209,
    23648, 23662, 23744, 23693, 7652, 23875, 7654, 23918, 23915, 23932, 24033, 24034, 14383, 24061, 24104,
    24125, 24169, 14434, 8579, 14460, 24240, 24243, 24246, 24266, 41874, 24318, 9009, 9009, 33281, 24354,
    24354, 14535, 12984, 25050, 24418, 24427, 14563, 24474, 24525, 24535, 24569, 24705, 14650, 14620, 24724,
    9940, 24775, 24904, 24908, 24910, 24908, 24954, 24974, 25010, 24996, 25007, 25054, 25074, 25078, 25104,
    25115, 25181, 25265, 25300, 25424, 11020, 25405, 25340, 25448, 25475, 25572, 11249, 25634, 25541, 25513,
    14894, 25705, 25726, 25757, 25719, 14956, 25935, 25964, 12298, 26083, 26360, 26185, 15129, 26257, 15112,
    15076, 20882, 20885, 26368, 26268, 32941, 17369, 26391, 26395, 26401, 26462, 26451, 13251, 15177, 26618,
    26501, 26706, 26757, 13421, 26766, 26655, 26900, 15261, 26946, 27043, 27114, 27304, 13987, 27355, 15384,
    27425, 14503, 27476, 15438, 27506, 27551, 27578, 27579, 14989, 7435, 15098, 27726, 15548, 27839, 27853,
    27751, 27926, 27966, 28023, 27969, 28009, 28024, 28037, 15646, 27956, 28207, 28270, 15667, 28363, 28359,
    16081, 28153, 28526, 16222, 16270, 28614, 28729, 28702, 28699, 15766, 28746, 28797, 28791, 28845, 1317,
    28997, 16995, 29084, 17323, 29224, 29237, 29264, 17928, 29312, 29333, 18229, 18452, 29562, 29579, 16044,
    29605, 16056, 16056, 29767, 29788, 29809, 29829, 29898, 16155, 29988, 19510, 30014, 19602, 30064, 8607,
    30224, 20385, 20408, 20548, 16380, 16392, 30452, 20723, 20722, 20761, 20787, 30494, 30495, 30495, 30538,
    16441, 30603, 16454, 16534, 21533, 30798, 30860, 30924, 16611, 22054, 31062, 22170, 22213, 31119, 31211,
    16687, 31296, 31306, 31311, 22908, 23207, 23207, 31470, 16898, 23467, 31686, 31689, 16935, 23680, 31954,
    17056, 31976, 31971, 32000, 24454, 32099, 17153, 32199, 32258, 32325, 17204, 25128, 25159, 17241, 25305,
    32634, 25406, 32661, 32762, 32773, 25818, 25891, 32864, 26024, 32880, 13151, 17365, 32946, 33027, 17419,
    33086, 23221, 26535, 26549, 13203, 13212, 33281, 33284, 36766, 17515, 33425, 33419, 33437, 21171, 33457,
    33459, 33469, 33510, 27452, 33509, 33565, 33635, 33709, 33571, 33725, 33767, 33879, 33619, 33738, 33740,
    33756, 27702, 28011, 27861, 17707, 34033, 34035, 34070, 29642, 34148, 28460, 17757, 17761, 28593, 28882,
    17771, 34384, 34396, 34407, 34409, 34473, 34440, 34574, 34530, 34681, 34600, 34667, 34694, 17879, 34785,
    34817, 17913, 34912, 34915, 30311, 35031, 35038, 17973, 35066, 13499, 30894, 31078, 18110, 18119, 35488,
    35565, 35722, 35925, 31912, 36011, 36033, 36123, 36215, 32559, 2052, 36299, 36284, 36336, 2270, 36564,
    36664, 34258, 34285, 37012, 37105, 37137, 34606, 37147, 37432, 37591, 37592, 37500, 37881, 37909, 35834,
    38283, 18837, 38327, 36215, 18918, 38595, 23986, 38691, 37189, 37402, 19054, 19062, 38880, 37898, 19122,
    38038, 38923, 38923, 38953, 38326, 39138, 19251, 39209, 39335, 39362, 39422, 19406, 39728, 39698, 40000,
    40189, 19662, 19693, 40295, 41166, 19704, 41221, 41486, 41617, 40635, 19798, 40697, 40702, 40709, 40719,
    40726, 40763, 42496,
};
static const uint8_t qwen3i_uc_pairs[2060] = {
    3, 6, 9, 12, 24, 30, 66, 3, 6, 9, 24, 3, 6, 9, 24, 12, 3, 6, 9, 12, 24, 3, 6, 9, 24, 6, 3, 6, 9, 12, 24,
    30, 66, 3, 6, 9, 24, 3, 6, 9, 24, 12, 3, 6, 9, 12, 24, 3, 6, 9, 24, 6, 24, 15, 15, 18, 18, 69, 69, 6, 6,
    9, 9, 21, 21, 36, 36, 36, 36, 15, 15, 18, 18, 21, 21, 69, 69, 36, 36, 9, 9, 18, 18, 21, 21, 66, 66, 9,
    9, 12, 12, 15, 15, 18, 18, 69, 69, 21, 9, 9, 66, 66, 6, 6, 66, 66, 36, 36, 6, 6, 66, 66, 36, 36, 15, 15,
    18, 18, 33, 33, 6, 6, 66, 66, 36, 36, 6, 6, 9, 9, 66, 66, 36, 36, 66, 66, 36, 36, 12, 12, 15, 15, 18,
    18, 30, 30, 33, 33, 69, 69, 9, 9, 9, 9, 24, 6, 6, 21, 21, 36, 36, 51, 51, 51, 51, 36, 36, 36, 36, 36,
    36, 36, 36, 15, 15, 6, 6, 36, 36, 3, 3, 15, 15, 15, 15, 15, 15, 36, 36, 36, 36, 69, 69, 15, 15, 36, 36,
    36, 6, 6, 3, 3, 6, 6, 6, 6, 6, 6, 39, 39, 42, 42, 39, 39, 42, 42, 39, 39, 42, 42, 39, 39, 42, 42, 39,
    39, 42, 42, 39, 39, 42, 42, 63, 63, 63, 63, 36, 36, 21, 21, 66, 66, 15, 15, 15, 15, 21, 21, 15, 15, 15,
    15, 0, 0, 0, 6, 0, 0, 6, 6, 0, 6, 6, 6, 6, 6, 6, 6, 24, 24, 6, 6, 6, 6, 6, 24, 24, 6, 6, 6, 6, 24, 3,
    24, 6, 24, 6, 3, 18, 18, 18, 3, 24, 6, 24, 6, 3, 18, 39, 39, 18, 18, 18, 18, 24, 24, 18, 18, 24, 24, 24,
    24, 24, 24, 15, 15, 24, 24, 24, 24, 24, 24, 24, 24, 15, 15, 24, 24, 33, 33, 24, 24, 24, 24, 117, 120,
    120, 123, 120, 120, 120, 120, 126, 126, 126, 126, 126, 126, 126, 126, 126, 126, 126, 132, 135, 129, 129,
    129, 138, 138, 138, 138, 138, 138, 147, 144, 150, 141, 141, 156, 153, 153, 156, 159, 165, 165, 168, 162,
    165, 171, 171, 174, 177, 180, 177, 183, 198, 198, 198, 198, 198, 195, 186, 189, 192, 192, 192, 198, 198,
    198, 198, 198, 195, 201, 204, 204, 204, 204, 204, 204, 204, 204, 204, 204, 204, 60, 60, 21, 21, 54, 54,
    81, 81, 6, 6, 21, 21, 54, 54, 81, 81, 66, 66, 72, 72, 3, 3, 6, 6, 72, 72, 78, 78, 18, 18, 21, 21, 15,
    15, 21, 21, 54, 54, 24, 24, 66, 66, 75, 75, 78, 78, 6, 6, 6, 6, 54, 54, 81, 81, 54, 54, 15, 15, 81, 81,
    72, 72, 6, 6, 21, 21, 54, 54, 21, 21, 54, 54, 81, 81, 72, 72, 6, 6, 24, 24, 3, 3, 6, 6, 6, 6, 21, 21,
    21, 21, 54, 54, 15, 15, 81, 81, 21, 21, 54, 54, 21, 21, 21, 21, 21, 21, 21, 21, 54, 54, 81, 81, 72, 72,
    57, 57, 78, 78, 72, 72, 6, 6, 24, 24, 12, 12, 54, 54, 3, 3, 6, 6, 24, 24, 21, 21, 54, 54, 21, 21, 24,
    24, 21, 21, 9, 9, 54, 54, 81, 81, 81, 24, 30, 30, 21, 54, 54, 27, 27, 6, 6, 3, 3, 27, 27, 12, 12, 9, 9,
    6, 6, 3, 3, 27, 27, 12, 12, 18, 18, 54, 54, 27, 27, 12, 12, 6, 6, 3, 3, 27, 27, 12, 12, 9, 9, 27, 27,
    54, 54, 54, 54, 27, 27, 6, 6, 3, 3, 27, 27, 12, 12, 9, 9, 6, 6, 3, 3, 27, 27, 12, 12, 54, 54, 54, 54,
    27, 27, 6, 6, 3, 3, 27, 27, 12, 12, 54, 54, 3, 3, 54, 54, 27, 27, 12, 12, 45, 48, 3, 3, 6, 6, 87, 87,
    45, 48, 3, 3, 6, 6, 87, 87, 45, 48, 3, 3, 6, 6, 45, 48, 3, 3, 6, 6, 45, 48, 3, 3, 6, 6, 87, 87, 45, 48,
    3, 3, 6, 6, 87, 87, 45, 48, 3, 3, 6, 6, 87, 87, 45, 48, 3, 3, 6, 6, 87, 87, 45, 48, 3, 3, 6, 6, 45, 48,
    3, 3, 6, 6, 45, 48, 3, 3, 6, 6, 87, 87, 48, 3, 6, 87, 45, 48, 3, 3, 6, 6, 87, 87, 45, 48, 3, 3, 6, 6,
    87, 87, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90,
    90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90, 90,
    90, 90, 90, 90, 90, 90, 90, 90, 90, 18, 15, 90, 90, 90, 87, 90, 18, 15, 3, 0, 90, 0, 87, 90, 90, 90, 87,
    90, 3, 0, 3, 0, 90, 3, 6, 87, 18, 15, 3, 0, 87, 87, 18, 15, 3, 0, 3, 6, 87, 18, 15, 3, 0, 45, 48, 87,
    87, 18, 15, 3, 0, 48, 3, 0, 0, 90, 90, 90, 87, 90, 3, 0, 3, 0, 90, 0, 0, 0, 0, 0, 0, 84, 84, 84, 84, 84,
    84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84,
    84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 84, 0, 0, 84, 207, 207, 207, 207, 207, 207, 207, 207,
    207, 207, 207, 207, 207, 207, 207, 207, 210, 207, 210, 207, 210, 207, 210, 207, 210, 207, 207, 207, 207,
    207, 207, 207, 207, 207, 207, 207, 207, 207, 207, 207, 207, 207, 207, 210, 207, 210, 207, 210, 207, 210,
    207, 210, 207, 207, 207, 207, 207, 207, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 0, 0, 0, 2, 2, 2, 0, 0, 93, 96, 111, 114, 111, 114, 96, 99, 105, 105,
    105, 105, 105, 105, 105, 105, 105, 105, 105, 105, 105, 105, 105, 105, 105, 105, 105, 105, 105, 105, 102,
    108, 108, 108, 214, 214, 214, 217, 217, 220, 223, 229, 226, 232, 235, 235, 238, 238, 241, 244, 247, 250,
    253, 238, 238, 241, 241, 244, 244, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 2,
    0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0,
    0, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 2, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 0, 2, 2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0,
    0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 2, 2, 2, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0,
    0, 2, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 2, 0, 2, 0, 0, 0, 2, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 2, 0, 2, 0, 2, 0, 2, 2, 2, 0, 0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0,
    2, 0, 2, 2, 0, 0, 0, 0, 0, 0, 2, 2, 2, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 2, 2, 0,
    2, 0, 2, 0, 0, 0, 2, 2, 0, 2, 0, 2, 0, 0, 0, 0, 0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 2, 0, 0, 0, 0, 2, 0, 2, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 2,
    0, 0, 2, 2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 2, 0, 2, 0, 0, 0,
    2, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 2, 0, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2,
};
static const uint32_t qwen3i_uc_seconds[85] = {
    0, 768, 769, 770, 771, 772, 774, 775, 776, 777, 778, 779, 780, 783, 785, 787, 788, 795, 803, 804, 805,
    806, 807, 808, 813, 814, 816, 817, 824, 834, 837, 1460, 1463, 1464, 1465, 1468, 1471, 1473, 1474, 1619,
    1620, 1621, 2364, 2492, 2494, 2519, 2620, 2876, 2878, 2902, 2903, 3006, 3031, 3158, 3266, 3285, 3286,
    3390, 3415, 3530, 3535, 3551, 3954, 3956, 3968, 4021, 4023, 4142, 6965, 12441, 12442, 69818, 69927,
    70462, 70487, 70832, 70842, 70845, 71087, 119141, 119150, 119151, 119152, 119153, 119154,
};
static const uint16_t qwen3i_uc_compose[940] = {
    912, 909, 913, 0, 1, 2, 3, 53, 55, 238, 4, 572, 5, 165, 208, 210, 570, 415, 57, 417, 419, 421, 59, 61,
    63, 65, 6, 425, 67, 427, 431, 433, 429, 7, 8, 9, 598, 69, 71, 73, 10, 596, 77, 212, 214, 594, 240, 75,
    439, 441, 445, 198, 79, 447, 81, 83, 187, 85, 87, 449, 453, 236, 451, 455, 457, 11, 12, 13, 89, 91, 93,
    97, 14, 610, 167, 216, 218, 612, 95, 459, 98, 463, 189, 465, 100, 467, 102, 106, 469, 104, 475, 473,
    477, 479, 481, 200, 108, 15, 483, 112, 485, 110, 489, 487, 16, 17, 18, 19, 114, 116, 246, 20, 616, 118,
    169, 220, 222, 161, 614, 191, 499, 501, 120, 503, 124, 224, 226, 505, 122, 509, 126, 128, 511, 132, 513,
    232, 130, 521, 136, 523, 234, 134, 527, 525, 21, 22, 23, 138, 140, 142, 24, 640, 144, 146, 171, 228,
    230, 163, 638, 529, 148, 533, 531, 539, 541, 543, 545, 150, 549, 547, 551, 553, 555, 652, 25, 152, 658,
    250, 557, 154, 656, 654, 155, 559, 157, 159, 561, 563, 26, 27, 28, 29, 54, 56, 239, 30, 573, 31, 166,
    209, 211, 571, 416, 58, 418, 420, 422, 60, 62, 64, 66, 32, 426, 68, 428, 432, 434, 430, 33, 34, 35, 599,
    70, 72, 74, 36, 597, 78, 213, 215, 595, 241, 76, 440, 442, 446, 199, 80, 448, 82, 84, 188, 86, 88, 450,
    454, 237, 452, 456, 458, 565, 37, 38, 39, 90, 92, 94, 40, 611, 168, 217, 219, 613, 96, 460, 99, 197,
    464, 190, 466, 101, 468, 103, 107, 470, 105, 476, 474, 478, 480, 482, 201, 109, 41, 484, 113, 486, 111,
    490, 488, 42, 43, 44, 45, 115, 117, 247, 46, 617, 119, 170, 221, 223, 162, 615, 192, 500, 502, 121, 504,
    125, 225, 227, 506, 123, 510, 127, 129, 512, 133, 514, 233, 131, 522, 566, 137, 524, 235, 135, 528, 526,
    47, 48, 49, 139, 141, 143, 50, 641, 145, 147, 172, 229, 231, 164, 639, 530, 149, 534, 532, 540, 542,
    544, 546, 151, 550, 548, 567, 552, 554, 556, 653, 51, 153, 659, 251, 558, 52, 657, 568, 655, 156, 560,
    158, 160, 562, 564, 875, 258, 835, 576, 574, 580, 578, 181, 202, 204, 185, 423, 602, 600, 606, 604, 461,
    620, 618, 624, 622, 491, 244, 493, 242, 206, 179, 175, 173, 177, 577, 575, 581, 579, 182, 203, 205, 186,
    424, 603, 601, 607, 605, 462, 621, 619, 625, 623, 492, 245, 494, 243, 207, 180, 176, 174, 178, 586, 584,
    590, 588, 587, 585, 591, 589, 435, 437, 436, 438, 495, 497, 496, 498, 515, 516, 517, 518, 535, 536, 537,
    538, 569, 630, 628, 634, 632, 636, 631, 629, 635, 633, 637, 644, 642, 648, 646, 650, 645, 643, 649, 647,
    651, 195, 193, 194, 183, 184, 443, 444, 248, 249, 196, 831, 259, 830, 829, 668, 669, 833, 841, 261, 682,
    683, 843, 262, 696, 697, 845, 857, 263, 856, 855, 268, 712, 713, 883, 264, 726, 727, 874, 872, 265, 871,
    870, 269, 740, 885, 266, 752, 753, 887, 826, 838, 760, 270, 823, 822, 660, 661, 827, 825, 762, 271, 676,
    677, 764, 272, 688, 689, 839, 837, 766, 273, 850, 849, 275, 704, 705, 853, 768, 277, 720, 721, 866, 867,
    770, 278, 863, 862, 276, 732, 733, 868, 772, 279, 744, 745, 881, 879, 851, 267, 854, 864, 274, 869, 880,
    280, 281, 285, 302, 304, 284, 282, 306, 283, 300, 310, 312, 287, 314, 289, 316, 286, 318, 324, 288, 326,
    328, 330, 332, 322, 303, 305, 293, 291, 307, 292, 301, 311, 313, 296, 315, 290, 317, 295, 319, 325, 297,
    327, 329, 331, 333, 323, 294, 298, 299, 308, 309, 320, 321, 334, 335, 337, 336, 338, 340, 341, 339, 342,
    343, 344, 353, 354, 365, 364, 366, 369, 370, 372, 371, 373, 374, 377, 375, 376, 378, 379, 381, 380, 382,
    383, 385, 384, 403, 404, 405, 406, 407, 408, 409, 410, 411, 412, 413, 414, 471, 472, 507, 508, 519, 520,
    582, 592, 583, 593, 608, 609, 626, 627, 662, 664, 666, 774, 663, 665, 667, 775, 776, 777, 778, 779, 780,
    781, 670, 672, 674, 782, 671, 673, 675, 783, 784, 785, 786, 787, 788, 789, 678, 680, 679, 681, 684, 686,
    685, 687, 690, 692, 694, 790, 691, 693, 695, 791, 792, 793, 794, 795, 796, 797, 698, 700, 702, 798, 699,
    701, 703, 799, 800, 801, 802, 803, 804, 805, 706, 708, 710, 707, 709, 711, 714, 716, 718, 715, 717, 719,
    722, 724, 723, 725, 728, 730, 729, 731, 734, 736, 738, 735, 737, 739, 741, 742, 743, 746, 748, 750, 806,
    747, 749, 751, 807, 808, 809, 810, 811, 812, 813, 754, 756, 758, 814, 755, 757, 759, 815, 816, 817, 818,
    819, 820, 821, 824, 836, 878, 828, 846, 847, 848, 840, 882, 859, 860, 861, 894, 895, 896, 897, 899, 898,
    900, 901, 902, 903, 904, 905, 906, 907, 908, 911, 910, 914, 915, 916, 917, 918, 919, 920, 921, 930, 931,
    922, 923, 924, 925, 932, 933, 926, 927, 928, 929, 934, 935, 936, 937, 966, 941, 942, 943, 944, 945, 946,
    947, 948, 949, 950, 951, 952, 953, 954, 955, 956, 957, 958, 959, 960, 961, 962, 963, 964, 965, 967, 993,
    968, 969, 970, 971, 972, 973, 974, 975, 976, 977, 978, 979, 980, 981, 982, 983, 984, 985, 986, 987, 988,
    989, 990, 991, 992, 994, 995, 996, 997, 998, 1493, 1494, 1495, 1496, 1497, 1498, 1499, 1501, 1500, 1502,
    1503, 1504,
};
/* generated by tools/gen_unicode.py: end */

/* ---- properties ------------------------------------------------------------------------------ */
/* Index of the last of n ascending keys that is not above key; keys[0] is. */
static int qwen3i_uc_search(const uint32_t *keys, int n, int stride, uint32_t key) {
    int low = 0, high = n;              /* keys[low] <= key < keys[high] */
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (keys[middle * stride] <= key) low = middle; else high = middle;
    }
    return low;
}

/* Combining class << 3 | UNSAFE | class. UNSAFE: normalisation may change it, or join it to what precedes. */
static int qwen3i_uc_property(uint32_t c) {
    int i = qwen3i_uc_search(qwen3i_uc_props, QWEN3I_COUNT(qwen3i_uc_props), 1, c << 11 | 0x7FF);
    return (int)(qwen3i_uc_props[i] & 0x7FF);
}

/* classes[QWEN3I_CLASSES_LOW]: the table that qwen3i_class reads. */
static void qwen3i_classes_fill(unsigned char *classes) {
    int i;
    for (i = 0; i + 1 < QWEN3I_COUNT(qwen3i_uc_props); i++) {
        uint32_t c = qwen3i_uc_props[i] >> 11, end = qwen3i_uc_props[i + 1] >> 11;
        for (; c < end && c < QWEN3I_CLASSES_LOW; c++) classes[c] = (unsigned char)(qwen3i_uc_props[i] & 7);
    }
}

static int qwen3i_class(const unsigned char *classes, uint32_t c) {
    return c < QWEN3I_CLASSES_LOW ? classes[c] : qwen3i_uc_property(c) & 7;
}

/* ---- normal form C --------------------------------------------------------------------------- */
enum { QWEN3I_S = 0xAC00, QWEN3I_L = 0x1100, QWEN3I_V = 0x1161, QWEN3I_T = 0x11A7,  /* Hangul is arithmetic */
       QWEN3I_LS = 19, QWEN3I_VS = 21, QWEN3I_TS = 28, QWEN3I_SS = 11172 };

static uint32_t qwen3i_uc_first_of(int i) {
    return qwen3i_uc_first[i] | (uint32_t)(qwen3i_uc_pairs[i] % 3) << 16;
}
static uint32_t qwen3i_uc_second_of(int i) { return qwen3i_uc_seconds[qwen3i_uc_pairs[i] / 3]; }

/* Canonical decomposition of c: 1 to 4 characters. */
static int qwen3i_decompose(uint32_t c, uint32_t out[4]) {
    uint32_t tail[3];
    int n = 0, n_tail = 0, run, i;
    if (c - QWEN3I_S < QWEN3I_SS) {
        c -= QWEN3I_S;
        out[n++] = QWEN3I_L + c / (QWEN3I_VS * QWEN3I_TS);
        out[n++] = QWEN3I_V + c / QWEN3I_TS % QWEN3I_VS;
        if (c % QWEN3I_TS) out[n++] = QWEN3I_T + c % QWEN3I_TS;
        return n;
    }
    while (n_tail < 3 && c >= qwen3i_uc_runs[0]) {
        run = 2 * qwen3i_uc_search(qwen3i_uc_runs, QWEN3I_COUNT(qwen3i_uc_runs) / 2, 2, c);
        i = (int)(qwen3i_uc_runs[run + 1] + (c - qwen3i_uc_runs[run]));
        if (run + 3 >= QWEN3I_COUNT(qwen3i_uc_runs) || i >= (int)qwen3i_uc_runs[run + 3]) break;
        if (qwen3i_uc_second_of(i)) tail[n_tail++] = qwen3i_uc_second_of(i);
        c = qwen3i_uc_first_of(i);
    }
    out[n++] = c;
    while (n_tail > 0) out[n++] = tail[--n_tail];
    return n;
}

/* The character that a followed by b is in normal form C, or 0. */
static uint32_t qwen3i_compose(uint32_t a, uint32_t b) {
    int low = 0, high = QWEN3I_COUNT(qwen3i_uc_compose);
    if (a - QWEN3I_L < QWEN3I_LS && b - QWEN3I_V < QWEN3I_VS)
        return QWEN3I_S + ((a - QWEN3I_L) * QWEN3I_VS + (b - QWEN3I_V)) * QWEN3I_TS;
    if (a - QWEN3I_S < QWEN3I_SS && (a - QWEN3I_S) % QWEN3I_TS == 0 && b - QWEN3I_T - 1 < QWEN3I_TS - 1)
        return a + (b - QWEN3I_T);
    while (low < high) {
        int middle = (low + high) / 2, i = qwen3i_uc_compose[middle];
        uint32_t first = qwen3i_uc_first_of(i), second = qwen3i_uc_second_of(i);
        if (first < a || (first == a && second < b)) low = middle + 1;
        else if (first > a || second > b) high = middle;
        else {
            int run = 2 * qwen3i_uc_search(qwen3i_uc_runs + 1, QWEN3I_COUNT(qwen3i_uc_runs) / 2, 2,
                                           (uint32_t)i);
            return qwen3i_uc_runs[run] + ((uint32_t)i - qwen3i_uc_runs[run + 1]);
        }
    }
    return 0;
}

/* While normalising, a character is code | combining class << 24. */
#define QWEN3I_CODE(x) ((x) & 0xFFFFFFu)
#define QWEN3I_CCC(x)  ((x) >> 24)

/* Put n marks in canonical order: a stable sort by combining class, linear also for long runs. */
static void qwen3i_order_marks(uint32_t *marks, size_t n, uint32_t *scratch) {
    size_t count[256], i, k;
    if (n <= 16) {
        for (i = 1; i < n; i++) {
            uint32_t mark = marks[i];
            for (k = i; k > 0 && QWEN3I_CCC(marks[k - 1]) > QWEN3I_CCC(mark); k--) marks[k] = marks[k - 1];
            marks[k] = mark;
        }
        return;
    }
    memset(count, 0, sizeof count);
    for (i = 0; i < n; i++) count[QWEN3I_CCC(marks[i])]++;
    for (i = 0, k = 0; i < 256; i++) { size_t here = count[i]; count[i] = k; k += here; }
    for (i = 0; i < n; i++) scratch[count[QWEN3I_CCC(marks[i])]++] = marks[i];
    memcpy(marks, scratch, n * sizeof *marks);
}

/* Compose n ordered characters in place; returns how many remain. */
static size_t qwen3i_compose_all(uint32_t *x, size_t n) {
    size_t i, kept = 0, starter = 0;
    int have_starter = 0;
    for (i = 0; i < n; i++) {
        int blocked = !have_starter || (kept != starter + 1 && QWEN3I_CCC(x[kept - 1]) >= QWEN3I_CCC(x[i]));
        uint32_t joined = blocked ? 0 : qwen3i_compose(QWEN3I_CODE(x[starter]), QWEN3I_CODE(x[i]));
        if (joined) { x[starter] = joined; continue; }
        if (QWEN3I_CCC(x[i]) == 0) { starter = kept; have_starter = 1; }
        x[kept++] = x[i];
    }
    return kept;
}

typedef struct qwen3i_nfc {             /* temporaries of qwen3i_normalize */
    qwen3i_buf text;                    /* the normalised text */
    qwen3i_buf codes, scratch;          /* uint32_t each: one region's characters */
} qwen3i_nfc;

static qwen3i_nfc qwen3i_nfc_make(const qwen3_allocator *a) {
    qwen3i_nfc w;
    w.text = w.codes = w.scratch = qwen3i_buf_make(a);
    return w;
}

static void qwen3i_nfc_free(qwen3i_nfc *w) {
    qwen3i_buf_free(&w->text);
    qwen3i_buf_free(&w->codes);
    qwen3i_buf_free(&w->scratch);
}

/* Decompose p..end into w->codes. */
static int qwen3i_nfc_decompose(qwen3i_nfc *w, const char *p, const char *end) {
    uint32_t c, parts[4];
    int i, n;
    w->codes.n = 0;
    while (p < end) {
        p += qwen3i_utf8_get(p, end, &c);
        n = qwen3i_decompose(c, parts);
        for (i = 0; i < n; i++) parts[i] |= (uint32_t)(qwen3i_uc_property(parts[i]) >> 3) << 24;
        if (!qwen3i_buf_add(&w->codes, (const char *)parts, (size_t)n * sizeof *parts)) return 0;
    }
    return 1;
}

/* Append the normal form of p..end, which starts with a character that nothing before can change. */
static int qwen3i_nfc_region(qwen3i_nfc *w, const char *p, const char *end) {
    uint32_t *x;                        /* [n] */
    size_t i, k, n;
    if (!qwen3i_nfc_decompose(w, p, end)) return 0;
    w->scratch.n = 0;
    if (!qwen3i_buf_reserve(&w->scratch, w->codes.n)) return 0;
    x = (uint32_t *)(void *)w->codes.p;
    n = w->codes.n / sizeof *x;
    for (i = 0; i < n; i = k + 1) {
        for (k = i; k < n && QWEN3I_CCC(x[k]); k++) {}
        qwen3i_order_marks(x + i, k - i, (uint32_t *)(void *)w->scratch.p);
    }
    n = qwen3i_compose_all(x, n);
    if (!qwen3i_buf_reserve(&w->text, 4 * n)) return 0;
    for (i = 0; i < n; i++) w->text.n += (size_t)qwen3i_utf8_put(w->text.p + w->text.n, QWEN3I_CODE(x[i]));
    return 1;
}

/* The first byte from p on that is not ASCII, or end. */
static const char *qwen3i_skip_ascii(const char *p, const char *end) {
    uint64_t w;
    for (; end - p >= 8; p += 8) {
        memcpy(&w, p, 8);
        if (w & 0x8080808080808080u) break;
    }
    while (p < end && (unsigned char)*p < 0x80) p++;
    return p;
}

/* text as valid UTF-8, in normal form C if nfc is set. Returns text itself if nothing changes, else what
   is then in w->text; NULL: no memory. Only the regions around characters that can change are touched. */
static const char *qwen3i_normalize(qwen3i_nfc *w, const unsigned char *classes, int nfc,
                                    const char *text, size_t n, size_t *out_n) {
    /* before: the last safe character */
    const char *p = text, *end = text + n, *copied = text, *before = text;
    w->text.n = 0;
    while (p < end) {
        uint32_t c;
        int length, unsafe, valid;
        if ((unsigned char)*p < 0x80) {
            p = qwen3i_skip_ascii(p, end);
            before = p - 1;
            if (p == end) break;
        }
        length = qwen3i_utf8_get(p, end, &c);
        unsafe = nfc && (qwen3i_class(classes, c) & QWEN3I_UNSAFE);
        valid = c != QWEN3I_REPLACEMENT || (length == 3 && (unsigned char)*p == 0xEF);
        if (unsafe) {
            if (!qwen3i_buf_add(&w->text, copied, (size_t)(before - copied))) return NULL;
            do p += length;
            while (p < end && (length = qwen3i_utf8_get(p, end, &c),
                               qwen3i_class(classes, c) & QWEN3I_UNSAFE));
            if (!qwen3i_nfc_region(w, before, p)) return NULL;
            copied = before = p;
        } else if (!valid) {
            if (!qwen3i_buf_add(&w->text, copied, (size_t)(p - copied)) ||
                !qwen3i_buf_add(&w->text, "\xEF\xBF\xBD", 3))
                return NULL;
            copied = before = p += length;
        } else { before = p; p += length; }
    }
    *out_n = n;
    if (copied == text) return text;
    if (!qwen3i_buf_add(&w->text, copied, (size_t)(end - copied))) return NULL;
    *out_n = w->text.n;
    return w->text.p;
}
/* ================================================================================================
   TOKENIZER: byte-level BPE. Text is normalised, cut into words, and the bytes of each word are merged.
   ================================================================================================ */
#define QWEN3I_MAX_ID      0xFFFFFFu    /* ids and ranks are below: 8 bits of the hash go with them */
#define QWEN3I_MAX_ADDED   1024         /* bytes in an added token: bounds the work at each byte of text */
#define QWEN3I_MAX_PROBES  2048         /* a table that needs more was made to be slow */
#define QWEN3I_SHORT_WORD  64           /* bytes up to which words are merged on the stack */
#define QWEN3I_NONE        0xFFFFFFFFu
#define QWEN3I_WHOLE       0x80000000u  /* flag of a length: BPE of these bytes gives this one token */

/* The expression that cuts text into words; qwen3i_word_end is this, by hand. */
#define QWEN3I_WORD_EXPRESSION "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|" \
                               " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

/* in bytes; length 0: there is no such token */
typedef struct qwen3i_text { uint32_t start, length; } qwen3i_text;
/* two tokens and what they merge to */
typedef struct qwen3i_pair { uint32_t left, right, id; } qwen3i_pair;
/* slot: tag << 24 | index, or NONE */
typedef struct qwen3i_table { uint32_t *slots, mask, used; } qwen3i_table;

enum { QWEN3I_ADDED_SPECIAL = 1, QWEN3I_ADDED_PLAIN = 2, QWEN3I_ADDED_RAW = 4, QWEN3I_ADDED_NORMALIZED = 8,
       QWEN3I_ADDED_UNSPOKEN = 16, QWEN3I_ADDED_ALL = 31 };
typedef struct qwen3i_added {
    const char *p; uint32_t length;
    int id, kinds;                      /* SPECIAL or PLAIN; RAW or NORMALIZED: the text that it is looked
                                           for in; UNSPOKEN: an assistant's text cannot make it */
} qwen3i_added;

struct qwen3i_tokenizer {               /* immutable once loaded */
    qwen3_allocator allocator;
    qwen3i_buf    bytes;                /* the bytes of all tokens */
    qwen3i_text  *texts;                /* [cap_texts] by id */
    int           n_tokens;
    size_t        cap_texts;
    qwen3i_table  words;                /* of the ids of texts, without added tokens */
    qwen3i_pair  *pairs;                /* [cap_pairs] by rank */
    uint32_t      n_pairs;
    size_t        cap_pairs;
    qwen3i_table  merges;               /* of the ranks of pairs */
    uint32_t      byte_id[256];
    qwen3i_added *added;                /* [n_added] ordered by text */
    int           n_added;
    size_t        cap_added;
    int           added_kinds;          /* of all of them */
    int           nfc;
    unsigned char added_first[256];     /* does an added token start with this byte? */
    unsigned char classes[QWEN3I_CLASSES_LOW];
};

static int qwen3i_tokenizer_size(const qwen3i_tokenizer *t) { return t->n_tokens; }

static void qwen3i_tokenizer_free(qwen3i_tokenizer *t) {
    qwen3_allocator a;
    if (!t) return;
    a = t->allocator;
    qwen3i_free(&a, t->bytes.p, t->bytes.cap);
    qwen3i_free(&a, t->texts, t->cap_texts * sizeof *t->texts);
    qwen3i_free(&a, t->words.slots, ((size_t)t->words.mask + 1) * sizeof *t->words.slots);
    qwen3i_free(&a, t->pairs, t->cap_pairs * sizeof *t->pairs);
    qwen3i_free(&a, t->merges.slots, ((size_t)t->merges.mask + 1) * sizeof *t->merges.slots);
    qwen3i_free(&a, t->added, t->cap_added * sizeof *t->added);
    qwen3i_free(&a, t, sizeof *t);
}

/* ---- lookup ---------------------------------------------------------------------------------- */
static uint32_t qwen3i_word_hash(const char *p, size_t n) {
    uint64_t h = qwen3i_hash(0, p, n);
    return (uint32_t)(h ^ (h >> 32));
}

static uint32_t qwen3i_pair_hash(uint32_t left, uint32_t right) {
    uint64_t h = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u;
    h = (h ^ (h >> 29)) * 0xBF58476D1CE4E5B9u;
    return (uint32_t)(h >> 32);
}

/* The slot of a word, or the free one where it belongs; NULL: that would be too far. */
static uint32_t *qwen3i_word_slot(const qwen3i_tokenizer *t, const char *p, size_t n, uint32_t hash) {
    uint32_t probe;
    for (probe = 0; probe < QWEN3I_MAX_PROBES; probe++) {
        uint32_t *slot = &t->words.slots[(hash + probe) & t->words.mask];
        const qwen3i_text *text;
        if (*slot == QWEN3I_NONE) return slot;
        if ((*slot ^ hash) >> 24) continue;
        text = &t->texts[*slot & QWEN3I_MAX_ID];
        if ((text->length & ~QWEN3I_WHOLE) == n && memcmp(t->bytes.p + text->start, p, n) == 0) return slot;
    }
    return NULL;
}

static uint32_t *qwen3i_pair_slot(const qwen3i_tokenizer *t, uint32_t left, uint32_t right, uint32_t hash) {
    uint32_t probe;
    for (probe = 0; probe < QWEN3I_MAX_PROBES; probe++) {
        uint32_t *slot = &t->merges.slots[(hash + probe) & t->merges.mask];
        const qwen3i_pair *pair;
        if (*slot == QWEN3I_NONE) return slot;
        if ((*slot ^ hash) >> 24) continue;
        pair = &t->pairs[*slot & QWEN3I_MAX_ID];
        if (pair->left == left && pair->right == right) return slot;
    }
    return NULL;
}

/* The id of a word, or NONE. */
static uint32_t qwen3i_word_id(const qwen3i_tokenizer *t, const char *p, size_t n) {
    const uint32_t *slot = qwen3i_word_slot(t, p, n, qwen3i_word_hash(p, n));
    return !slot || *slot == QWEN3I_NONE ? QWEN3I_NONE : *slot & QWEN3I_MAX_ID;
}

/* The rank of the merge of left and right, or NONE. */
static uint32_t qwen3i_rank(const qwen3i_tokenizer *t, uint32_t left, uint32_t right) {
    const uint32_t *slot = qwen3i_pair_slot(t, left, right, qwen3i_pair_hash(left, right));
    return !slot || *slot == QWEN3I_NONE ? QWEN3I_NONE : *slot & QWEN3I_MAX_ID;
}

/* The longest added token of these kinds that starts at p; NULL: none does. */
static const qwen3i_added *qwen3i_added_at(const qwen3i_tokenizer *t, const char *p, const char *end,
                                           int kinds) {
    int low = 0, high = t->n_added, middle, stop;
    uint32_t depth;
    const qwen3i_added *best = NULL, *shortest;
    /* [low, high): those that start with the bytes so far */
    for (depth = 0; low < high && p < end; depth++, p++) {
        unsigned char c = (unsigned char)*p;
        if (t->added[low].length == depth) low++;
        for (stop = high; low < stop;) {
            middle = low + (stop - low) / 2;
            if ((unsigned char)t->added[middle].p[depth] < c) low = middle + 1; else stop = middle;
        }
        for (stop = low; stop < high;) {
            middle = stop + (high - stop) / 2;
            if ((unsigned char)t->added[middle].p[depth] > c) high = middle; else stop = middle + 1;
        }
        shortest = &t->added[low];
        if (low < high && shortest->length == depth + 1 && (shortest->kinds & ~kinds) == 0) best = shortest;
    }
    return best;
}

/* The first added token of these kinds from p on: *at is where it starts, or end if there is none. */
static const qwen3i_added *qwen3i_added_next(const qwen3i_tokenizer *t, const char *p, const char *end,
                                             int kinds, const char **at) {
    for (; p < end; p++) {
        const qwen3i_added *hit;
        if (!t->added_first[(unsigned char)*p]) continue;
        hit = qwen3i_added_at(t, p, end, kinds);
        if (hit) { *at = p; return hit; }
    }
    *at = end;
    return NULL;
}

/* -1: there is no such token. */
static qwen3_token qwen3i_added_id(const qwen3i_tokenizer *t, const char *text) {
    size_t n = strlen(text);
    const qwen3i_added *hit = t ? qwen3i_added_at(t, text, text + n, QWEN3I_ADDED_ALL) : NULL;
    return hit && hit->length == n ? hit->id : -1;
}

/* NULL: it is a token of the vocabulary. */
static const qwen3i_added *qwen3i_added_of(const qwen3i_tokenizer *t, qwen3_token id) {
    int i;
    for (i = 0; i < t->n_added; i++) if (t->added[i].id == id) return &t->added[i];
    return NULL;
}

/* Does it control the model, rather than say something? */
static int qwen3i_is_special(const qwen3i_tokenizer *t, qwen3_token id) {
    const qwen3i_added *a = qwen3i_added_of(t, id);
    return a && (a->kinds & QWEN3I_ADDED_SPECIAL);
}

/* ---- words ----------------------------------------------------------------------------------- */
static int qwen3i_class_at(const qwen3i_tokenizer *t, const char *p, const char *end, int *length) {
    uint32_t c;
    *length = 1;
    if ((unsigned char)*p < 0x80) return t->classes[(unsigned char)*p] & QWEN3I_CLASS;
    *length = qwen3i_utf8_get(p, end, &c);
    return qwen3i_class(t->classes, c) & QWEN3I_CLASS;
}

/* The end of the run of characters of this class that starts at p. */
static const char *qwen3i_class_run(const qwen3i_tokenizer *t, const char *p, const char *end, int class_) {
    int length;
    while (p < end && qwen3i_class_at(t, p, end, &length) == class_) p += length;
    return p;
}

/* 's 't 're 've 'm 'll 'd in any case, after the apostrophe at p: its length in all, or 0. */
static int qwen3i_contraction(const char *p, const char *end) {
    int a = end - p > 1 ? (unsigned char)p[1] | 0x20 : 0, b = end - p > 2 ? (unsigned char)p[2] | 0x20 : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
    return end - p > 2 && memcmp(p + 1, "\xC5\xBF", 2) == 0 ? 3 : 0;    /* the long s is an s to (?i) */
}

/* White space at p: up to its last line break; else all of it at the end of the text; else all but the
   last character, which goes with what follows; but at least that one. */
static const char *qwen3i_space_end(const qwen3i_tokenizer *t, const char *p, const char *end) {
    const char *q = p, *line = NULL, *last = p;
    int length;
    for (; q < end && qwen3i_class_at(t, q, end, &length) == QWEN3I_SPACE; q += length) {
        last = q;
        if (*q == '\r' || *q == '\n') line = q + 1;
    }
    return line ? line : q == end || last == p ? q : last;
}

/* The end of the word at p < end: QWEN3I_WORD_EXPRESSION, alternative by alternative. Valid UTF-8. */
static const char *qwen3i_word_end(const qwen3i_tokenizer *t, const char *p, const char *end) {
    int length, next_length, class_ = qwen3i_class_at(t, p, end, &length), next;
    const char *q = p + length;
    if (class_ == QWEN3I_LETTER) return qwen3i_class_run(t, q, end, QWEN3I_LETTER);
    if (class_ == QWEN3I_NUMBER) return q;
    if (*p == '\'' && qwen3i_contraction(p, end)) return p + qwen3i_contraction(p, end);
    next = q < end ? qwen3i_class_at(t, q, end, &next_length) : QWEN3I_SPACE;
    if (next == QWEN3I_LETTER && *p != '\r' && *p != '\n') return qwen3i_class_run(t, q, end, QWEN3I_LETTER);
    if (class_ == QWEN3I_SPACE && (*p != ' ' || next != 0)) return qwen3i_space_end(t, p, end);
    q = qwen3i_class_run(t, q, end, 0);
    while (q < end && (*q == '\r' || *q == '\n')) q++;
    return q;
}

/* ---- merging --------------------------------------------------------------------------------- */
/* BPE of a word of at most QWEN3I_SHORT_WORD bytes into ids; returns how many. */
static int qwen3i_merge_short(const qwen3i_tokenizer *t, const char *p, int n, uint32_t *ids) {
    uint32_t rank[QWEN3I_SHORT_WORD];   /* [i]: of the merge of ids[i] and ids[i+1] */
    int i, best;
    for (i = 0; i < n; i++) ids[i] = t->byte_id[(unsigned char)p[i]];
    for (i = 0; i + 1 < n; i++) rank[i] = qwen3i_rank(t, ids[i], ids[i + 1]);
    while (n > 1) {
        for (best = 0, i = 1; i + 1 < n; i++) if (rank[i] < rank[best]) best = i;
        if (rank[best] == QWEN3I_NONE) break;
        ids[best] = t->pairs[rank[best]].id;
        n--;
        for (i = best + 1; i < n; i++) { ids[i] = ids[i + 1]; rank[i - 1] = rank[i]; }
        if (best + 1 < n) rank[best] = qwen3i_rank(t, ids[best], ids[best + 1]);
        if (best > 0) rank[best - 1] = qwen3i_rank(t, ids[best - 1], ids[best]);
    }
    return n;
}

/* Long words: a list of symbols and a heap of possible merges, by rank and then from the left. */
/* rank: of the merge with next */
typedef struct qwen3i_symbol { uint32_t id, previous, next, rank; } qwen3i_symbol;
typedef struct qwen3i_merger {
    const qwen3i_tokenizer *t;
    qwen3i_symbol *symbols;
    uint64_t      *heap;                /* rank << 32 | symbol; an entry whose rank has changed is void */
    size_t         n_heap;
} qwen3i_merger;

static void qwen3i_heap_push(uint64_t *heap, size_t *n, uint64_t x) {
    size_t i = (*n)++;
    for (; i > 0 && heap[(i - 1) / 2] > x; i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = x;
}

static uint64_t qwen3i_heap_pop(uint64_t *heap, size_t *n) {
    uint64_t top = heap[0], x = heap[--*n];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < *n) {
        if (child + 1 < *n && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= x) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = x;
    return top;
}

/* Find the merge of symbol i with its successor anew. */
static void qwen3i_merger_update(qwen3i_merger *m, uint32_t i) {
    qwen3i_symbol *s = &m->symbols[i];
    s->rank = s->next == QWEN3I_NONE ? QWEN3I_NONE : qwen3i_rank(m->t, s->id, m->symbols[s->next].id);
    if (s->rank != QWEN3I_NONE) qwen3i_heap_push(m->heap, &m->n_heap, (uint64_t)s->rank << 32 | i);
}

static void qwen3i_merger_run(qwen3i_merger *m) {
    while (m->n_heap > 0) {
        uint64_t top = qwen3i_heap_pop(m->heap, &m->n_heap);
        uint32_t i = (uint32_t)top, k;
        qwen3i_symbol *s = &m->symbols[i];
        if (s->rank != (uint32_t)(top >> 32)) continue;
        k = s->next;
        s->id = m->t->pairs[s->rank].id;
        s->next = m->symbols[k].next;
        m->symbols[k].rank = QWEN3I_NONE;
        if (s->next != QWEN3I_NONE) m->symbols[s->next].previous = i;
        qwen3i_merger_update(m, i);
        if (s->previous != QWEN3I_NONE) qwen3i_merger_update(m, s->previous);
    }
}

/* BPE of a word of any length: m->symbols[0] starts the list of the result. Every merge takes one symbol
   away and adds at most two entries, so 3 n entries are enough. */
static int qwen3i_merge_long(qwen3i_merger *m, qwen3i_buf *work, const char *p, size_t n) {
    const size_t each = sizeof *m->symbols + 3 * sizeof *m->heap;
    uint32_t i, last = (uint32_t)n - 1;
    work->n = 0;
    if (n >= INT_MAX || n > (size_t)-1 / each || !qwen3i_buf_reserve(work, n * each)) return 0;
    m->heap = (uint64_t *)(void *)work->p;
    m->symbols = (qwen3i_symbol *)(void *)(m->heap + 3 * n);
    m->n_heap = 0;
    for (i = 0; i <= last; i++) {
        m->symbols[i].id = m->t->byte_id[(unsigned char)p[i]];
        m->symbols[i].previous = i == 0 ? QWEN3I_NONE : i - 1;
        m->symbols[i].next = i == last ? QWEN3I_NONE : i + 1;
    }
    for (i = 0; i <= last; i++) qwen3i_merger_update(m, i);
    qwen3i_merger_run(m);
    return 1;
}

/* ---- encoding -------------------------------------------------------------------------------- */
typedef struct qwen3i_encoder {
    const qwen3i_tokenizer *t;
    qwen3_token *out;                   /* [cap] */
    int          cap;
    int64_t      n;                     /* tokens so far, written or not */
    qwen3i_nfc   nfc;
    qwen3i_buf   work;                  /* of long words */
} qwen3i_encoder;

static qwen3i_encoder qwen3i_encoder_make(const qwen3i_tokenizer *t, qwen3_token *out, int cap) {
    qwen3i_encoder e;
    e.t = t;
    e.out = out;
    e.cap = cap;
    e.n = 0;
    e.nfc = qwen3i_nfc_make(&t->allocator);
    e.work = qwen3i_buf_make(&t->allocator);
    return e;
}

/* Release the temporaries; the count, or what went wrong. */
static int qwen3i_encoder_end(qwen3i_encoder *e, qwen3_result r) {
    qwen3i_nfc_free(&e->nfc);
    qwen3i_buf_free(&e->work);
    if (r == QWEN3_OK && e->n > INT_MAX) r = QWEN3_ERR_ARG;
    return r == QWEN3_OK ? (int)e->n : (int)r;
}

static void qwen3i_put(qwen3i_encoder *e, uint32_t id) {
    if (e->n < e->cap) e->out[e->n] = (qwen3_token)id;
    e->n++;
}

static int qwen3i_encode_word(qwen3i_encoder *e, const char *p, size_t n) {
    uint32_t ids[QWEN3I_SHORT_WORD], i;
    qwen3i_merger m;
    uint32_t id = qwen3i_word_id(e->t, p, n);
    if (id != QWEN3I_NONE && (e->t->texts[id].length & QWEN3I_WHOLE)) { qwen3i_put(e, id); return 1; }
    if (n <= QWEN3I_SHORT_WORD) {
        uint32_t count = (uint32_t)qwen3i_merge_short(e->t, p, (int)n, ids);
        for (i = 0; i < count; i++) qwen3i_put(e, ids[i]);
        return 1;
    }
    m.t = e->t;
    if (!qwen3i_merge_long(&m, &e->work, p, n)) return 0;
    for (i = 0; i != QWEN3I_NONE; i = m.symbols[i].next) qwen3i_put(e, m.symbols[i].id);
    return 1;
}

/* Text that is already normalised and holds no added tokens. */
static qwen3_result qwen3i_encode_words(qwen3i_encoder *e, const char *p, const char *end) {
    while (p < end) {
        const char *q = qwen3i_word_end(e->t, p, end);
        if (!qwen3i_encode_word(e, p, (size_t)(q - p))) return QWEN3_ERR_MEMORY;
        p = q;
    }
    return QWEN3_OK;
}

/* Any bytes, in which added tokens are not looked for, or only those that are matched after normalisation. */
static qwen3_result qwen3i_encode_text(qwen3i_encoder *e, const char *text, size_t n, int kinds) {
    const char *p, *end, *at;
    const qwen3i_added *hit;
    qwen3_result r = QWEN3_OK;
    if (n == 0) return QWEN3_OK;
    p = qwen3i_normalize(&e->nfc, e->t->classes, e->t->nfc, text, n, &n);
    if (!p) return QWEN3_ERR_MEMORY;
    end = p + n;
    if (!(kinds & e->t->added_kinds & QWEN3I_ADDED_NORMALIZED)) return qwen3i_encode_words(e, p, end);
    for (; p < end && r == QWEN3_OK; p = at) {
        hit = qwen3i_added_next(e->t, p, end, kinds & ~QWEN3I_ADDED_RAW, &at);
        r = qwen3i_encode_words(e, p, at);
        if (hit && r == QWEN3_OK) { qwen3i_put(e, (uint32_t)hit->id); at += hit->length; }
    }
    return r;
}

/* The same, with added tokens. */
static qwen3_result qwen3i_encode_special(qwen3i_encoder *e, const char *p, size_t n) {
    const char *end = p + n, *at;
    qwen3_result r = QWEN3_OK;
    for (; p < end && r == QWEN3_OK; p = at) {
        const qwen3i_added *hit = qwen3i_added_next(e->t, p, end,
                                                    QWEN3I_ADDED_ALL & ~QWEN3I_ADDED_NORMALIZED, &at);
        r = qwen3i_encode_text(e, p, (size_t)(at - p), QWEN3I_ADDED_ALL);
        if (hit && r == QWEN3_OK) { qwen3i_put(e, (uint32_t)hit->id); at += hit->length; }
    }
    return r;
}

/* A count, or a negative result that err explains. */
static int qwen3i_encode(const qwen3_model *m, const char *text, size_t n_bytes, int flags, qwen3_token *out,
                         int cap, const qwen3i_err *err) {
    qwen3i_encoder e;
    int n;
    if (!m->tokenizer)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "the model was loaded without tokenizer files");
    if (n_bytes == 0) return 0;
    e = qwen3i_encoder_make(m->tokenizer, out, cap);
    n = qwen3i_encoder_end(&e, flags & QWEN3_PARSE_SPECIAL ? qwen3i_encode_special(&e, text, n_bytes)
                                                           : qwen3i_encode_text(&e, text, n_bytes, 0));
    if (n == QWEN3_ERR_MEMORY) return qwen3i_no_memory(err, "the temporaries of a text", n_bytes);
    return n < 0 ? qwen3i_fail(err, QWEN3_ERR_ARG, "the text has more than %d tokens", INT_MAX) : n;
}

QWEN3_API int qwen3_encode(const qwen3_model *m, const char *text, size_t n_bytes, int flags,
                           qwen3_token *out, int cap, char *err_text, size_t err_size) {
    const qwen3i_err err = qwen3i_err_begin(err_text, err_size);
    if (!m || (!text && n_bytes) || cap < 0 || (!out && cap))
        return qwen3i_fail(&err, QWEN3_ERR_ARG, "model, text or out is NULL, or cap (%d) negative", cap);
    if (flags & ~QWEN3_PARSE_SPECIAL)
        return qwen3i_fail(&err, QWEN3_ERR_ARG, "flags has unknown bits: %d", flags);
    return qwen3i_encode(m, text, n_bytes, flags, out, cap, &err);
}

static const char *qwen3i_token_bytes(const qwen3_model *m, qwen3_token token, int *n_bytes) {
    const qwen3i_tokenizer *t = m->tokenizer;
    int known = t && token >= 0 && token < t->n_tokens && (t->texts[token].length & ~QWEN3I_WHOLE) > 0;
    *n_bytes = known ? (int)(t->texts[token].length & ~QWEN3I_WHOLE) : 0;
    return known ? t->bytes.p + t->texts[token].start : NULL;
}

QWEN3_API const char *qwen3_token_bytes(const qwen3_model *model, qwen3_token token, int *n_bytes) {
    int n = 0;
    const char *bytes = model ? qwen3i_token_bytes(model, token, &n) : NULL;
    if (n_bytes) *n_bytes = n;
    return bytes;
}

/* Append bytes to a string of which only cap bytes are kept. */
static int qwen3i_append_text(char *out, int cap, int n, const char *bytes, int n_bytes) {
    const int room = n < cap ? qwen3i_min(n_bytes, cap - n) : 0;
    if (room > 0) memcpy(out + n, bytes, (size_t)room);
    return n_bytes > INT_MAX - 1 - n ? INT_MAX - 1 : n + n_bytes;
}

QWEN3_API int qwen3_detokenize(const qwen3_model *m, const qwen3_token *tokens, int n, int flags, char *out,
                               int cap) {
    int i, total = 0, n_bytes;
    if (!m || n < 0 || (n > 0 && !tokens) || cap < 0 || (cap > 0 && !out) || (flags & ~QWEN3_SHOW_SPECIAL))
        return QWEN3_ERR_ARG;
    if (!m->tokenizer) return QWEN3_ERR_UNSUPPORTED;
    for (i = 0; i < n; i++) {
        const char *bytes = qwen3i_token_bytes(m, tokens[i], &n_bytes);
        if (n_bytes == 0 || (!(flags & QWEN3_SHOW_SPECIAL) && qwen3i_is_special(m->tokenizer, tokens[i])))
            continue;
        total = qwen3i_append_text(out, cap, total, bytes, n_bytes);
    }
    if (cap > 0) out[qwen3i_min(total, cap - 1)] = '\0';
    return total;
}

/* ================================================================================================
   TOKENIZER LOADING: the vocabulary builder, and the readers of tokenizer.json, vocab.json and merges.txt
   ================================================================================================ */
/* The vocabulary builder. A reader of any format calls begin once, token for each token of the vocabulary,
   then merge for each merge in order of rank, added for each added token (before or after those), and end,
   which also releases what failed. Texts are written as vocabularies write bytes: in the alphabet of
   qwen3i_alphabet; those of added tokens are plain. They are copied. */
typedef struct qwen3i_vocab {
    qwen3i_tokenizer *t;
    const char       *file;             /* in messages: the reader sets it */
    const qwen3i_err *err;
    qwen3i_buf        text, joined;     /* of the token at hand, of a merge's two tokens */
    size_t            max_id;           /* ids beyond are damage: they would take memory out of proportion */
    int               whole;            /* ignore_merges: a word that is a token is never merged */
} qwen3i_vocab;

/* Bytes from the files that stand in messages: this many of them. */
#define QWEN3I_SHOW(p, n) qwen3i_shown(p, n, 60), p

static qwen3_result qwen3i_vocab_memory(const qwen3i_vocab *v) {
    return qwen3i_fail(v->err, QWEN3_ERR_MEMORY, "%s: the tokenizer does not fit", v->file);
}

static qwen3_result qwen3i_vocab_slow(const qwen3i_vocab *v) {
    return qwen3i_fail(v->err, QWEN3_ERR_UNSUPPORTED, "%s: the vocabulary cannot be hashed", v->file);
}

/* Twice the slots, if more than three quarters are taken. */
static int qwen3i_table_grow(const qwen3i_tokenizer *t, qwen3i_table *table, int of_words) {
    const uint32_t *old = table->slots;
    uint32_t old_n = old ? table->mask + 1 : 0, n = old ? 2 * old_n : 1024, i, k, hash, *slots;
    if (table->used < old_n / 4 * 3) return 1;
    slots = (uint32_t *)qwen3i_alloc_array(&t->allocator, n, sizeof *slots);
    if (!slots) return 0;
    memset(slots, 0xFF, n * sizeof *slots);     /* all free */
    for (i = 0; i < old_n; i++) {
        const uint32_t index = old[i] & QWEN3I_MAX_ID;
        if (old[i] == QWEN3I_NONE) continue;
        hash = of_words ? qwen3i_word_hash(t->bytes.p + t->texts[index].start, t->texts[index].length)
                        : qwen3i_pair_hash(t->pairs[index].left, t->pairs[index].right);
        for (k = hash & (n - 1); slots[k] != QWEN3I_NONE; k = (k + 1) & (n - 1)) {}
        slots[k] = old[i];
    }
    qwen3i_free(&t->allocator, old, old_n * sizeof *old);
    table->slots = slots;
    table->mask = n - 1;
    return 1;
}

/* Put index into the slot that was found for it. */
static void qwen3i_table_put(qwen3i_table *table, uint32_t *slot, uint32_t hash, uint32_t index) {
    table->used += *slot == QWEN3I_NONE;
    *slot = (hash & ~QWEN3I_MAX_ID) | index;
}

/* Room for n more pairs. */
static int qwen3i_pairs_grow(qwen3i_tokenizer *t, size_t n) {
    qwen3i_pair *p = (qwen3i_pair *)qwen3i_grow(&t->allocator, t->pairs, t->n_pairs, &t->cap_pairs,
                                                t->n_pairs + n,
                                                sizeof *p);
    if (p) t->pairs = p;
    return p != NULL;
}

/* Room for id in texts. */
static int qwen3i_texts_grow(qwen3i_tokenizer *t, int id) {
    const size_t old = t->cap_texts;
    qwen3i_text *p = (qwen3i_text *)qwen3i_grow(&t->allocator, t->texts, old, &t->cap_texts, (size_t)id + 1,
                                                sizeof *p);
    if (!p) return 0;
    memset(p + old, 0, (t->cap_texts - old) * sizeof *p);
    t->texts = p;
    return 1;
}

/* Give id the text in v->text. */
static qwen3_result qwen3i_vocab_text(qwen3i_vocab *v, int64_t id) {
    qwen3i_tokenizer *t = v->t;
    const qwen3i_buf *text = &v->text;
    if (id < 0 || id >= (int64_t)QWEN3I_MAX_ID || (uint64_t)id > v->max_id)
        return qwen3i_fail(v->err, QWEN3_ERR_FORMAT,
                           "%s: token \"%.*s\" has the id %lld, which is out of range",
                           v->file, QWEN3I_SHOW(text->p, text->n), (long long)id);
    if (text->n == 0)
        return qwen3i_fail(v->err, QWEN3_ERR_FORMAT, "%s: token %lld is empty", v->file, (long long)id);
    if (id < t->n_tokens && t->texts[id].length)
        return qwen3i_fail(v->err, QWEN3_ERR_FORMAT, "%s: token \"%.*s\" has the id %lld of another token",
                           v->file, QWEN3I_SHOW(text->p, text->n), (long long)id);
    if (t->bytes.n + text->n > INT_MAX)
        return qwen3i_fail(v->err, QWEN3_ERR_FORMAT, "%s: too large", v->file);
    if (!qwen3i_texts_grow(t, (int)id) || !qwen3i_buf_reserve(&t->bytes, text->n))
        return qwen3i_vocab_memory(v);
    t->texts[id].start = (uint32_t)t->bytes.n;
    t->texts[id].length = (uint32_t)text->n;
    qwen3i_buf_add(&t->bytes, text->p, text->n);
    t->n_tokens = qwen3i_max(t->n_tokens, (int)id + 1);
    return QWEN3_OK;
}

/* Does id have the text in v->text already? Vocabularies may list added tokens, too. */
static int qwen3i_vocab_has(const qwen3i_vocab *v, int64_t id) {
    const qwen3i_text *text = id >= 0 && id < v->t->n_tokens ? &v->t->texts[id] : NULL;
    return text && text->length > 0 && text->length == v->text.n &&
           memcmp(v->t->bytes.p + text->start, v->text.p, v->text.n) == 0;
}

/* The byte that a character of a vocabulary stands for, or -1: printable bytes stand for themselves, the
   others are written as U+0100 and up. */
static int qwen3i_alphabet(uint32_t c) {
    if ((c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xAC) || (c >= 0xAE && c <= 0xFF)) return (int)c;
    if (c < 0x100 || c > 0x143) return -1;
    c -= 0x100;
    return (int)(c <= 0x20 ? c : c < 0x43 ? c - 0x21 + 0x7F : 0xAD);
}

/* n bytes of vocabulary text to the bytes they stand for, appended to out. 1; 0: it has characters that stand
   for none, and is taken literally; -1: no memory. */
static int qwen3i_alphabet_decode(qwen3i_buf *out, const char *p, size_t n) {
    const char *q = p, *end = p + n;
    size_t start = out->n;
    uint32_t c;
    int byte;
    if (!qwen3i_buf_reserve(out, n)) return -1;
    while (q < end) {
        q += qwen3i_utf8_get(q, end, &c);
        byte = qwen3i_alphabet(c);
        if (byte < 0) { out->n = start; return qwen3i_buf_add(out, p, n) ? 0 : -1; }
        out->p[out->n++] = (char)byte;
    }
    return 1;
}

/* text: the token's, as the vocabulary writes it */
static qwen3_result qwen3i_vocab_token(qwen3i_vocab *v, qwen3i_str text, int64_t id) {
    qwen3i_tokenizer *t = v->t;
    uint32_t *slot, hash;
    qwen3_result r;
    int is_word;
    v->text.n = 0;
    is_word = qwen3i_alphabet_decode(&v->text, text.p, text.n);
    if (is_word < 0) return qwen3i_vocab_memory(v);
    r = qwen3i_vocab_has(v, id) ? QWEN3_OK : qwen3i_vocab_text(v, id);
    if (r != QWEN3_OK || !is_word) return r;
    if (!qwen3i_table_grow(t, &t->words, 1)) return qwen3i_vocab_memory(v);
    hash = qwen3i_word_hash(v->text.p, v->text.n);
    slot = qwen3i_word_slot(t, v->text.p, v->text.n, hash);
    if (!slot) return qwen3i_vocab_slow(v);
    if (*slot != QWEN3I_NONE)
        return qwen3i_fail(v->err, QWEN3_ERR_FORMAT, "%s: token \"%.*s\" is there twice", v->file,
                                                 QWEN3I_SHOW(text.p, text.n));
    qwen3i_table_put(&t->words, slot, hash, (uint32_t)id);
    if (v->text.n == 1) t->byte_id[(unsigned char)v->text.p[0]] = (uint32_t)id;
    return QWEN3_OK;
}

/* The token whose bytes are buf[from..], or NONE. */
static uint32_t qwen3i_vocab_find(const qwen3i_tokenizer *t, const qwen3i_buf *buf, size_t from) {
    const char *p = buf->p + from;
    size_t n = buf->n - from;
    return n ? qwen3i_word_id(t, p, n) : QWEN3I_NONE;
}

/* The next merge, of two tokens as the vocabulary writes them */
static qwen3_result qwen3i_vocab_merge(qwen3i_vocab *v, qwen3i_str left, qwen3i_str right) {
    qwen3i_tokenizer *t = v->t;
    qwen3i_buf *both = &v->joined;
    qwen3i_pair pair;
    uint32_t *slot, hash;
    size_t n;
    both->n = 0;
    if (qwen3i_alphabet_decode(both, left.p, left.n) < 0) return qwen3i_vocab_memory(v);
    n = both->n;
    pair.left = qwen3i_vocab_find(t, both, 0);
    if (qwen3i_alphabet_decode(both, right.p, right.n) < 0) return qwen3i_vocab_memory(v);
    pair.right = qwen3i_vocab_find(t, both, n);
    pair.id = qwen3i_vocab_find(t, both, 0);
    if (pair.left == QWEN3I_NONE || pair.right == QWEN3I_NONE || pair.id == QWEN3I_NONE)
        return qwen3i_fail(v->err, QWEN3_ERR_FORMAT,
                           "%s: merge %u (\"%.*s\" \"%.*s\") names a token that is not there",
                           v->file, (unsigned)t->n_pairs, QWEN3I_SHOW(left.p, left.n),
                               QWEN3I_SHOW(right.p, right.n));
    if (t->n_pairs == QWEN3I_MAX_ID) return qwen3i_vocab_slow(v);
    if (!qwen3i_pairs_grow(t, 1) || !qwen3i_table_grow(t, &t->merges, 0)) return qwen3i_vocab_memory(v);
    hash = qwen3i_pair_hash(pair.left, pair.right);
    slot = qwen3i_pair_slot(t, pair.left, pair.right, hash);
    if (!slot) return qwen3i_vocab_slow(v);
    t->pairs[t->n_pairs] = pair;
    /* of a merge that is there twice the last one counts */
    qwen3i_table_put(&t->merges, slot, hash, t->n_pairs++);
    return QWEN3_OK;
}

static qwen3_result qwen3i_vocab_unsplit(const qwen3i_vocab *v) {
    return qwen3i_fail(v->err, QWEN3_ERR_FORMAT, "%s: merge %u does not have two parts", v->file,
                       (unsigned)v->t->n_pairs);
}

/* The same from "left right" */
static qwen3_result qwen3i_vocab_merge_line(qwen3i_vocab *v, qwen3i_str line) {
    const char *space = line.n ? (const char *)memchr(line.p, ' ', line.n) : NULL;
    qwen3i_str left, right;
    if (!space) return qwen3i_vocab_unsplit(v);
    left.p = line.p;
    left.n = (size_t)(space - line.p);
    right.p = space + 1;
    right.n = line.n - left.n - 1;
    if (left.n == 0 || right.n == 0 || memchr(right.p, ' ', right.n)) return qwen3i_vocab_unsplit(v);
    return qwen3i_vocab_merge(v, left, right);
}

/* Room for n more added tokens. */
static int qwen3i_added_grow(qwen3i_tokenizer *t, size_t n) {
    const size_t have = (size_t)t->n_added;
    qwen3i_added *p = (qwen3i_added *)qwen3i_grow(&t->allocator, t->added, have, &t->cap_added, have + n,
                                                  sizeof *p);
    if (p) t->added = p;
    return p != NULL || have + n == 0;
}

/* text: its bytes as they are, up to QWEN3I_MAX_ADDED of them. kinds: QWEN3I_ADDED_SPECIAL or _PLAIN, with
   _NORMALIZED or _RAW */
static qwen3_result qwen3i_vocab_added(qwen3i_vocab *v, qwen3i_str text, int64_t id, int kinds) {
    qwen3i_added item;
    qwen3_result r = QWEN3_OK;
    v->text.n = 0;
    if (!qwen3i_buf_add(&v->text, text.p, text.n)) return qwen3i_vocab_memory(v);
    if (text.n > QWEN3I_MAX_ADDED)
        return qwen3i_fail(v->err, QWEN3_ERR_UNSUPPORTED, "%s: added token \"%.*s\" is too long", v->file,
                           QWEN3I_SHOW(text.p, text.n));
    item.p = NULL;
    item.length = (uint32_t)text.n;
    item.id = (int)id;
    item.kinds = kinds;
    if (!qwen3i_vocab_has(v, id)) r = qwen3i_vocab_text(v, id);
    if (r != QWEN3_OK) return r;
    if (!qwen3i_added_grow(v->t, 1)) return qwen3i_vocab_memory(v);
    v->t->added[v->t->n_added++] = item;
    return QWEN3_OK;
}

/* A token that is matched in normalised text must be in normal form itself, to be found as it is. */
static qwen3_result qwen3i_added_normal(const qwen3i_vocab *v, const qwen3i_added *item) {
    qwen3i_nfc w = qwen3i_nfc_make(&v->t->allocator);
    size_t n;
    const char *p = qwen3i_normalize(&w, v->t->classes, v->t->nfc, item->p, item->length, &n);
    int same = p && n == item->length && memcmp(p, item->p, n) == 0;
    qwen3i_nfc_free(&w);
    if (!p) return qwen3i_vocab_memory(v);
    if (same) return QWEN3_OK;
    return qwen3i_fail(v->err, QWEN3_ERR_UNSUPPORTED,
                       "%s: added token \"%.*s\" changes when it is normalised", v->file,
                       QWEN3I_SHOW(item->p, item->length));
}

static int qwen3i_added_compare(const void *x, const void *y) {
    const qwen3i_added *a = (const qwen3i_added *)x, *b = (const qwen3i_added *)y;
    int r = memcmp(a->p, b->p, a->length < b->length ? a->length : b->length);
    return r ? r : a->length < b->length ? -1 : a->length > b->length;
}

/* Put the added tokens in order of their texts; t->bytes does not move while that is used. */
static void qwen3i_added_index(qwen3i_tokenizer *t) {
    int i;
    for (i = 0; i < t->n_added; i++) t->added[i].p = t->bytes.p + t->texts[t->added[i].id].start;
    if (t->n_added) qwen3i_sort(t->added, (size_t)t->n_added, sizeof *t->added, qwen3i_added_compare);
}

/* What an assistant writes itself, and so what its text can make when a conversation is rendered again. */
static int qwen3i_added_spoken(const qwen3i_added *item) {
    static const char *const list[] = {"<think>", "</think>", "<tool_call>", "</tool_call>"};
    int i;
    for (i = 0; i < QWEN3I_COUNT(list); i++)
        if (strlen(list[i]) == item->length && memcmp(list[i], item->p, item->length) == 0) return 1;
    return 0;
}

/* All are there, and t->bytes no longer moves. */
static qwen3_result qwen3i_added_finish(qwen3i_vocab *v) {
    qwen3i_tokenizer *t = v->t;
    qwen3_result r = QWEN3_OK;
    int i;
    qwen3i_added_index(t);
    for (i = 0; i < t->n_added; i++) {
        if (!qwen3i_added_spoken(&t->added[i])) t->added[i].kinds |= QWEN3I_ADDED_UNSPOKEN;
        t->added_first[(unsigned char)t->added[i].p[0]] = 1;
        t->added_kinds |= t->added[i].kinds;
        if (t->added[i].kinds & QWEN3I_ADDED_NORMALIZED) r = qwen3i_added_normal(v, &t->added[i]);
        if (r != QWEN3_OK) return r;
    }
    for (i = 1; i < t->n_added; i++)
        if (qwen3i_added_compare(&t->added[i - 1], &t->added[i]) == 0)
            return qwen3i_fail(v->err, QWEN3_ERR_FORMAT, "%s: added token \"%.*s\" is there twice", v->file,
                               QWEN3I_SHOW(t->added[i].p, t->added[i].length));
    return QWEN3_OK;
}

/* max_id: no id is larger. Afterwards the reader sets t->nfc where text is to be in normal form C (Qwen3's
   is), and whole where the files say so. */
static qwen3_result qwen3i_vocab_begin(qwen3i_vocab *v, const qwen3_allocator *a, const char *file,
                                       size_t max_id, const qwen3i_err *err) {
    qwen3i_tokenizer *t = (qwen3i_tokenizer *)qwen3i_alloc_zero(a, 1, sizeof *t);
    memset(v, 0, sizeof *v);
    v->err = err;
    v->file = file;
    v->max_id = max_id;
    v->text = v->joined = qwen3i_buf_make(a);
    v->t = t;
    if (!t) return qwen3i_vocab_memory(v);
    t->allocator = *a;
    t->bytes = qwen3i_buf_make(&t->allocator);
    memset(t->byte_id, 0xFF, sizeof t->byte_id);
    qwen3i_classes_fill(t->classes);
    if (!qwen3i_table_grow(t, &t->words, 1) || !qwen3i_table_grow(t, &t->merges, 0))
        return qwen3i_vocab_memory(v);
    return QWEN3_OK;
}

/* Mark the words that BPE gives one token: most of the words of most texts need no merging. */
static void qwen3i_vocab_mark_whole(qwen3i_vocab *v) {
    qwen3i_tokenizer *t = v->t;
    uint32_t ids[QWEN3I_SHORT_WORD];
    int id;
    for (id = 0; id < t->n_tokens; id++) {
        qwen3i_text *text = &t->texts[id];
        if (v->whole || (text->length > 0 && text->length <= QWEN3I_SHORT_WORD &&
            qwen3i_merge_short(t, t->bytes.p + text->start, (int)text->length, ids) == 1 &&
                ids[0] == (uint32_t)id))
            text->length |= QWEN3I_WHOLE;
    }
}

/* Everything was read (r: how that went): finish the tables and hand over, or release; *out is then NULL. */
static qwen3_result qwen3i_vocab_end(qwen3i_vocab *v, qwen3_result r, qwen3i_tokenizer **out) {
    int i;
    if (r == QWEN3_OK) r = qwen3i_added_finish(v);
    for (i = 0; i < 256 && r == QWEN3_OK; i++)
        if (v->t->byte_id[i] == QWEN3I_NONE)
            r = qwen3i_fail(v->err, QWEN3_ERR_FORMAT, "%s: there is no token for the byte 0x%02X", v->file,
                            i);
    if (r == QWEN3_OK) qwen3i_vocab_mark_whole(v);
    qwen3i_buf_free(&v->text);
    qwen3i_buf_free(&v->joined);
    if (r != QWEN3_OK) qwen3i_tokenizer_free(v->t);
    *out = r == QWEN3_OK ? v->t : NULL;
    return r;
}

/* ---- tokenizer.json, vocab.json and merges.txt ----------------------------------------------- */
typedef struct qwen3i_vocab_reader {
    qwen3i_vocab v;
    qwen3i_json  json;
    qwen3i_buf   left, right;           /* what was unescaped */
    /* added tokens of tokenizer.json, in order, before those of other files; -1 */
    int          n_known;
} qwen3i_vocab_reader;

typedef struct qwen3i_vocab_files {     /* data NULL: there is no such file */
    qwen3i_blob json;                   /* tokenizer.json, or */
    qwen3i_blob vocab, merges;          /* vocab.json and merges.txt */
    qwen3i_blob config, added;          /* tokenizer_config.json and added_tokens.json */
} qwen3i_vocab_files;

static qwen3_result qwen3i_reader_begin(qwen3i_vocab_reader *l, const qwen3_allocator *a, const char *file,
                                        size_t size, const qwen3i_err *err) {
    memset(l, 0, sizeof *l);
    l->left = l->right = qwen3i_buf_make(a);
    l->n_known = -1;
    /* a token takes more than four bytes of the files */
    return qwen3i_vocab_begin(&l->v, a, file, size / 4, err);
}

static qwen3_result qwen3i_reader_end(qwen3i_vocab_reader *l, qwen3_result r, qwen3i_tokenizer **out) {
    qwen3i_buf_free(&l->left);
    qwen3i_buf_free(&l->right);
    return qwen3i_vocab_end(&l->v, r, out);
}

/* The reader found something wrong. */
static qwen3_result qwen3i_vocab_json(const qwen3i_vocab_reader *l) {
    const char *why = l->json.error ? l->json.error : "not understood";
    return qwen3i_fail(l->v.err, QWEN3_ERR_FORMAT, "%s: byte %llu: %s", l->v.file,
                       (unsigned long long)qwen3i_json_offset(&l->json), why);
}

/* s without JSON's escapes, in buf; 0: no memory */
static int qwen3i_unescaped(qwen3i_buf *buf, qwen3i_str *s) {
    buf->n = 0;
    if (!qwen3i_buf_reserve(buf, s->n + 1)) return 0;
    s->n = qwen3i_json_unescape(*s, buf->p);
    s->p = buf->p;
    return 1;
}

/* {"token": id, ...} */
static qwen3_result qwen3i_vocab_tokens(qwen3i_vocab_reader *l) {
    qwen3i_json_iter it;
    qwen3i_str key;
    int64_t id;
    qwen3_result r = QWEN3_OK;
    if (!qwen3i_json_open(&l->json, '{', &it)) return qwen3i_vocab_json(l);
    while (r == QWEN3_OK && qwen3i_json_next(&l->json, &it, &key)) {
        if (!qwen3i_json_int(&l->json, &id)) return qwen3i_vocab_json(l);
        r = qwen3i_unescaped(&l->left, &key) ? qwen3i_vocab_token(&l->v, key, id) :
            qwen3i_vocab_memory(&l->v);
    }
    return r != QWEN3_OK || !l->json.error ? r : qwen3i_vocab_json(l);
}

/* One element of "merges": ["a", "b"] or "a b". */
static qwen3_result qwen3i_vocab_merge_json(qwen3i_vocab_reader *l) {
    qwen3i_json *j = &l->json;
    qwen3i_json_iter it;
    qwen3i_str part[2];
    int n = 0;
    if (qwen3i_json_peek(j) == '"') {
        if (!qwen3i_json_string(j, &part[0])) return qwen3i_vocab_json(l);
        return qwen3i_unescaped(&l->left, &part[0]) ? qwen3i_vocab_merge_line(&l->v, part[0]) :
               qwen3i_vocab_memory(&l->v);
    }
    if (!qwen3i_json_open(j, '[', &it)) return qwen3i_vocab_json(l);
    while (qwen3i_json_next(j, &it, NULL)) {
        if (n == 2) return qwen3i_vocab_unsplit(&l->v);
        if (!qwen3i_json_string(j, &part[n++])) return qwen3i_vocab_json(l);
    }
    if (j->error) return qwen3i_vocab_json(l);
    if (n != 2) return qwen3i_vocab_unsplit(&l->v);
    if (!qwen3i_unescaped(&l->left, &part[0]) || !qwen3i_unescaped(&l->right, &part[1]))
        return qwen3i_vocab_memory(&l->v);
    return qwen3i_vocab_merge(&l->v, part[0], part[1]);
}

static qwen3_result qwen3i_vocab_merges(qwen3i_vocab_reader *l) {
    qwen3i_json_iter it;
    qwen3_result r = QWEN3_OK;
    if (!qwen3i_json_open(&l->json, '[', &it)) return qwen3i_vocab_json(l);
    while (r == QWEN3_OK && qwen3i_json_next(&l->json, &it, NULL)) r = qwen3i_vocab_merge_json(l);
    return r != QWEN3_OK || !l->json.error ? r : qwen3i_vocab_json(l);
}

/* merges.txt: a merge a line, after a line that starts with #version. */
static qwen3_result qwen3i_vocab_merge_lines(qwen3i_vocab *v, const char *p, size_t n) {
    const char *end = p + n, *stop;
    qwen3i_str line;
    qwen3_result r = QWEN3_OK;
    size_t lines = 1;                   /* at most: a merge has four bytes */
    for (stop = p; stop < end && (stop = (const char *)memchr(stop, '\n',
                                                              (size_t)(end - stop))) != NULL; stop++) lines++;
    if (!qwen3i_pairs_grow(v->t, qwen3i_min_size(lines, n / 4 + 1))) return qwen3i_vocab_memory(v);
    for (; p < end && r == QWEN3_OK; p = stop + 1) {
        stop = (const char *)memchr(p, '\n', (size_t)(end - p));
        if (!stop) stop = end;
        line.p = p;
        line.n = (size_t)(stop - p);
        if (line.n && p[line.n - 1] == '\r') line.n--;
        if (line.n == 0 || (line.n >= 8 && memcmp(p, "#version", 8) == 0)) continue;
        r = qwen3i_vocab_merge_line(v, line);
    }
    return r;
}

typedef struct qwen3i_added_fields {
    int64_t    id;
    qwen3i_str content;
    int        special, normalized, unusual;
} qwen3i_added_fields;

/* The object that describes an added token; the reader's error, if any, is left to the caller. */
static void qwen3i_added_read(qwen3i_json *j, qwen3i_added_fields *f) {
    qwen3i_json_iter it;
    qwen3i_str key;
    int flag;
    if (qwen3i_json_open(j, '{', &it)) while (qwen3i_json_next(j, &it, &key)) {
        flag = 0;
        if (qwen3i_json_is(key, "id")) qwen3i_json_int(j, &f->id);
        else if (qwen3i_json_is(key, "content")) qwen3i_json_string(j, &f->content);
        else if (qwen3i_json_is(key, "special")) qwen3i_json_bool(j, &f->special);
        else if (qwen3i_json_is(key, "normalized")) qwen3i_json_bool(j, &f->normalized);
        else if (qwen3i_json_is(key, "single_word") || qwen3i_json_is(key, "lstrip") ||
                 qwen3i_json_is(key, "rstrip")) {
            qwen3i_json_bool(j, &flag);
            f->unusual |= flag;
        } else qwen3i_json_skip(j);
    }
}

/* tokenizer.json goes before the files beside it: is this text one of its added tokens, or the id that of
   another? */
static int qwen3i_added_known(const qwen3i_vocab_reader *l, const qwen3i_added_fields *f) {
    const qwen3i_tokenizer *t = l->v.t;
    int low = 0, high = l->n_known, middle, order;
    qwen3i_added item;
    memset(&item, 0, sizeof item);
    item.p = f->content.p;
    item.length = (uint32_t)f->content.n;
    while (low < high) {
        middle = low + (high - low) / 2;
        order = qwen3i_added_compare(&t->added[middle], &item);
        if (order == 0) return 1;
        if (order < 0) low = middle + 1; else high = middle;
    }
    if (f->id < 0 || f->id >= t->n_tokens || !t->texts[f->id].length) return 0;
    return t->texts[f->id].length != item.length ||
           memcmp(t->bytes.p + t->texts[f->id].start, item.p, item.length) != 0;
}

QWEN3I_COLD
static qwen3_result qwen3i_added_token(qwen3i_vocab_reader *l, qwen3i_added_fields *f) {
    int kinds = (f->special ? QWEN3I_ADDED_SPECIAL : QWEN3I_ADDED_PLAIN) |
                (f->normalized ? QWEN3I_ADDED_NORMALIZED : QWEN3I_ADDED_RAW);
    if (!qwen3i_unescaped(&l->left, &f->content)) return qwen3i_vocab_memory(&l->v);
    if (f->unusual)
        return qwen3i_fail(l->v.err, QWEN3_ERR_UNSUPPORTED,
                           "%s: added token \"%.*s\" has lstrip, rstrip or single_word set",
                           l->v.file, QWEN3I_SHOW(f->content.p, f->content.n));
    if (l->n_known >= 0 && qwen3i_added_known(l, f)) return QWEN3_OK;
    return qwen3i_vocab_added(&l->v, f->content, f->id, kinds);
}

/* An id that is written as a key; -1 if it is none. */
static int64_t qwen3i_added_key(qwen3i_str key) {
    int64_t id = 0;
    size_t i;
    if (key.n == 0 || key.n > 9) return -1;
    for (i = 0; i < key.n; i++) {
        if (key.p[i] < '0' || key.p[i] > '9') return -1;
        id = id * 10 + (key.p[i] - '0');
    }
    return id;
}

/* "added_tokens": [{"id": 7, "content": "<x>", ...}] of tokenizer.json, or "added_tokens_decoder":
   {"7": {"content": "<x>", ...}} of tokenizer_config.json. */
QWEN3I_COLD
static qwen3_result qwen3i_added_tokens(qwen3i_vocab_reader *l) {
    qwen3i_json_iter it;
    qwen3i_str key;
    qwen3i_added_fields f;
    qwen3_result r = QWEN3_OK;
    int is_map = qwen3i_json_peek(&l->json) == '{';
    if (!qwen3i_json_open(&l->json, is_map ? '{' : '[', &it)) return qwen3i_vocab_json(l);
    while (r == QWEN3_OK && qwen3i_json_next(&l->json, &it, &key)) {
        memset(&f, 0, sizeof f);
        f.content.p = "";
        f.id = is_map ? qwen3i_added_key(key) : -1;
        qwen3i_added_read(&l->json, &f);
        r = l->json.error ? qwen3i_vocab_json(l) : qwen3i_added_token(l, &f);
    }
    return r != QWEN3_OK || !l->json.error ? r : qwen3i_vocab_json(l);
}

/* ---- settings of tokenizer.json -------------------------------------------------------------- */
typedef struct qwen3i_setting {
    const char *key;
    const char *allowed;                /* its values, as JSON with | between them; NULL: see where it is */
} qwen3i_setting;

static int qwen3i_one_of(qwen3i_str value, const char *list) {
    for (;; list++) {
        const char *bar = strchr(list, '|');
        size_t n = bar ? (size_t)(bar - list) : strlen(list);
        if (n == value.n && memcmp(list, value.p, n) == 0) return 1;
        if (!bar) return 0;
        list = bar;
    }
}

/* Read an object (name: in messages) and check those of its keys that are in list, which ends in a NULL; the
   others do not matter. *seen: a bit for each that is there; at[i]: where the value of the i-th is. */
QWEN3I_COLD
static qwen3_result qwen3i_vocab_settings(qwen3i_vocab_reader *l, const char *name,
                                          const qwen3i_setting *list, int *seen, qwen3i_json *at) {
    qwen3i_json_iter it;
    qwen3i_str key, value;
    int i;
    *seen = 0;
    if (!qwen3i_json_open(&l->json, '{', &it)) return qwen3i_vocab_json(l);
    while (qwen3i_json_next(&l->json, &it, &key)) {
        for (i = 0; list[i].key && !qwen3i_json_is(key, list[i].key); i++) {}
        qwen3i_json_peek(&l->json);
        value.p = l->json.p;
        if (list[i].key) { *seen |= 1 << i; at[i] = l->json; }
        if (!qwen3i_json_skip(&l->json)) break;
        value.n = (size_t)(l->json.p - value.p);
        if (list[i].key && list[i].allowed && !qwen3i_one_of(value, list[i].allowed))
            return qwen3i_fail(l->v.err, QWEN3_ERR_UNSUPPORTED, "%s: %s: %s is %.*s, supported is %s",
                               l->v.file, name,
                               list[i].key, QWEN3I_SHOW(value.p, value.n), list[i].allowed);
    }
    return l->json.error ? qwen3i_vocab_json(l) : QWEN3_OK;
}

/* NFC, or a sequence of it */
QWEN3I_COLD
static qwen3_result qwen3i_vocab_normalizer(qwen3i_vocab_reader *l) {
    static const qwen3i_setting one[] = { { "normalizers", NULL }, { "type", "\"NFC\"|\"Sequence\"" },
                                          { NULL, NULL } };
    static const qwen3i_setting nfc[] = { { "type", "\"NFC\"" }, { NULL, NULL } };
    qwen3i_json at[2], after;
    qwen3i_json_iter it;
    int seen;
    qwen3_result r;
    if (qwen3i_json_word(&l->json, "null")) return QWEN3_OK;
    r = qwen3i_vocab_settings(l, "normalizer", one, &seen, at);
    if (r != QWEN3_OK) return r;
    l->v.t->nfc = !(seen & 1);
    if (!(seen & 1)) return QWEN3_OK;
    after = l->json;
    l->json = at[0];
    if (qwen3i_json_open(&l->json, '[', &it)) while (r == QWEN3_OK && qwen3i_json_next(&l->json, &it, NULL)) {
        l->v.t->nfc = 1;
        r = qwen3i_vocab_settings(l, "normalizers", nfc, &seen, at);
    }
    if (r == QWEN3_OK && l->json.error) r = qwen3i_vocab_json(l);
    l->json = after;
    return r;
}

static qwen3_result qwen3i_vocab_unlike(qwen3i_vocab_reader *l, const char *why) {
    return qwen3i_fail(l->v.err, QWEN3_ERR_UNSUPPORTED, "%s: pre_tokenizer: %s", l->v.file, why);
}

/* The first step: Split by {"Regex": expression}, which has to be ours. */
static qwen3_result qwen3i_vocab_split(qwen3i_vocab_reader *l) {
    static const qwen3i_setting split[] = { { "type", "\"Split\"" }, { "behavior", "\"Isolated\"" },
                                            { "invert", "false" }, { "pattern", NULL }, { NULL, NULL } };
    static const qwen3i_setting pattern[] = { { "Regex", NULL }, { NULL, NULL } };
    qwen3i_json at[4], after;
    qwen3i_str expression;
    int seen;
    qwen3_result r = qwen3i_vocab_settings(l, "pre_tokenizer", split, &seen, at);
    if (r != QWEN3_OK) return r;
    if (seen != 15) return qwen3i_vocab_unlike(l, "Split lacks a setting");
    after = l->json;
    l->json = at[3];
    r = qwen3i_vocab_settings(l, "pre_tokenizer: pattern", pattern, &seen, at);
    if (r != QWEN3_OK) return r;
    if (!seen || !qwen3i_json_string(&at[0], &expression) ||
        !qwen3i_json_is(expression, QWEN3I_WORD_EXPRESSION))
        return qwen3i_vocab_unlike(l, "the pattern is not that of Qwen3");
    l->json = after;
    return QWEN3_OK;
}

/* A sequence of Split and ByteLevel, and nothing else. */
QWEN3I_COLD
static qwen3_result qwen3i_vocab_pre_tokenizer(qwen3i_vocab_reader *l) {
    static const qwen3i_setting sequence[] = { { "type", "\"Sequence\"" }, { "pretokenizers", NULL },
                                               { NULL, NULL } };
    static const qwen3i_setting bytes[] = { { "type", "\"ByteLevel\"" }, { "add_prefix_space", "false" },
                                            { "use_regex", "false" }, { NULL, NULL } };
    qwen3i_json at[3], after;
    qwen3i_json_iter it;
    int n = 0, seen;
    qwen3_result r;
    if (qwen3i_json_word(&l->json, "null")) return qwen3i_vocab_unlike(l, "not a sequence");
    r = qwen3i_vocab_settings(l, "pre_tokenizer", sequence, &seen, at);
    if (r != QWEN3_OK) return r;
    if (seen != 3) return qwen3i_vocab_unlike(l, "not a sequence");
    after = l->json;
    l->json = at[1];
    if (!qwen3i_json_open(&l->json, '[', &it)) return qwen3i_vocab_json(l);
    for (; r == QWEN3_OK && qwen3i_json_next(&l->json, &it, NULL); n++)
        r = n == 0 ? qwen3i_vocab_split(l) : qwen3i_vocab_settings(l, "pre_tokenizer", bytes, &seen, at);
    if (r == QWEN3_OK && l->json.error) r = qwen3i_vocab_json(l);
    if (r == QWEN3_OK && (n != 2 || seen != 7)) r = qwen3i_vocab_unlike(l, "not Split and then ByteLevel");
    l->json = after;
    return r;
}

/* Settings first, then vocabulary, then merges, in whatever order the file has them. */
QWEN3I_COLD
static qwen3_result qwen3i_vocab_model(qwen3i_vocab_reader *l) {
    static const qwen3i_setting model[] = {
        { "type", "\"BPE\"" }, { "vocab", NULL }, { "merges", NULL }, { "dropout", "null|0.0|0" },
        { "continuing_subword_prefix", "null|\"\"" }, { "end_of_word_suffix", "null|\"\"" },
        { "byte_fallback", "false" }, { "ignore_merges", "false|true" }, { NULL, NULL } };
    qwen3i_json at[8], after;
    int seen;
    qwen3_result r = qwen3i_vocab_settings(l, "model", model, &seen, at);
    if (r != QWEN3_OK) return r;
    if ((seen & 7) != 7)
        return qwen3i_fail(l->v.err, QWEN3_ERR_FORMAT, "%s: model lacks its type, vocab or merges",
                           l->v.file);
    if (seen & 128) qwen3i_json_bool(&at[7], &l->v.whole);
    after = l->json;
    l->json = at[1];
    r = qwen3i_vocab_tokens(l);
    if (r == QWEN3_OK) {
        l->json = at[2];
        r = qwen3i_vocab_merges(l);
    }
    l->json = after;
    return r;
}

/* ---- the whole ------------------------------------------------------------------------------- */
static qwen3_result qwen3i_vocab_document(qwen3i_vocab_reader *l) {
    static const qwen3i_setting top[] = {
        { "pre_tokenizer", NULL }, { "model", NULL }, { "normalizer", NULL },
                                          { "added_tokens", NULL }, { NULL, NULL } };
    typedef qwen3_result (*reader)(qwen3i_vocab_reader *);
    static const reader readers[] = { qwen3i_vocab_pre_tokenizer, qwen3i_vocab_model, qwen3i_vocab_normalizer,
                                      qwen3i_added_tokens };
    qwen3i_json_iter it;
    qwen3i_str key;
    qwen3_result r = QWEN3_OK;
    int i, seen = 0;
    if (!qwen3i_json_open(&l->json, '{', &it)) return qwen3i_vocab_json(l);
    while (r == QWEN3_OK && qwen3i_json_next(&l->json, &it, &key)) {
        for (i = 0; top[i].key && !qwen3i_json_is(key, top[i].key); i++) {}
        if (!top[i].key) { qwen3i_json_skip(&l->json); continue; }
        if (seen & 1 << i)
            return qwen3i_fail(l->v.err, QWEN3_ERR_FORMAT, "%s: %s is there twice", l->v.file, top[i].key);
        seen |= 1 << i;
        r = readers[i](l);
    }
    if (r != QWEN3_OK) return r;
    if (!qwen3i_json_end(&l->json)) return qwen3i_vocab_json(l);
    if ((seen & 3) == 3) return QWEN3_OK;
    return qwen3i_fail(l->v.err, QWEN3_ERR_FORMAT, "%s: there is no %s", l->v.file, seen & 1 ? "model" :
                       "pre_tokenizer");
}

/* added_tokens.json: {"<x>": 7, ...}, by which older files tell what tokenizer_config.json does not */
static qwen3_result qwen3i_added_map(qwen3i_vocab_reader *l) {
    qwen3i_json count = l->json;
    qwen3i_json_iter it;
    qwen3i_added_fields f;
    qwen3_result r = QWEN3_OK;
    qwen3i_str key;
    size_t n = 0;
    if (qwen3i_json_open(&count, '{', &it))
        while (qwen3i_json_next(&count, &it, &key) && qwen3i_json_skip(&count)) n++;
    if (!qwen3i_added_grow(l->v.t, n)) return qwen3i_vocab_memory(&l->v);
    if (!qwen3i_json_open(&l->json, '{', &it)) return qwen3i_vocab_json(l);
    while (r == QWEN3_OK && qwen3i_json_next(&l->json, &it, &key)) {
        memset(&f, 0, sizeof f);
        f.content = key;
        if (!qwen3i_json_int(&l->json, &f.id)) return qwen3i_vocab_json(l);
        f.special = key.n > 4 && memcmp(key.p, "<|", 2) == 0 && memcmp(key.p + key.n - 2, "|>", 2) == 0;
        f.normalized = !f.special;
        r = qwen3i_added_token(l, &f);
    }
    return r != QWEN3_OK || qwen3i_json_end(&l->json) ? r : qwen3i_vocab_json(l);
}

/* Added tokens that the files beside the vocabulary tell: those of tokenizer_config.json, or else of
   added_tokens.json */
static qwen3_result qwen3i_vocab_beside(qwen3i_vocab_reader *l, const qwen3i_vocab_files *f) {
    const qwen3i_blob *from = &f->config;
    l->v.file = "tokenizer_config.json";
    l->json = qwen3i_json_begin(from->data, from->size);
    if (!from->data || !qwen3i_json_find(&l->json, "added_tokens_decoder")) {
        if (from->data && l->json.error) return qwen3i_vocab_json(l);
        from = &f->added;
        l->v.file = "added_tokens.json";
        l->json = qwen3i_json_begin(from->data, from->size);
    }
    if (!from->data) return QWEN3_OK;
    if (f->json.data) {
        if (!qwen3i_buf_reserve(&l->v.t->bytes, from->size)) return qwen3i_vocab_memory(&l->v);
        qwen3i_added_index(l->v.t);
        l->n_known = l->v.t->n_added;
    }
    return from == &f->config ? qwen3i_added_tokens(l) : qwen3i_added_map(l);
}

/* The tokenizer of tokenizer.json, or of vocab.json and merges.txt. On success *out is the caller's. */
static qwen3_result qwen3i_tokenizer_read(qwen3i_tokenizer **out, const qwen3_allocator *a,
                                          const qwen3i_vocab_files *f,
                                          const qwen3i_err *err) {
    const qwen3i_blob *main = f->json.data ? &f->json : &f->vocab;
    const char *file = f->json.data ? "tokenizer.json" : "vocab.json";
    qwen3i_vocab_reader l;
    qwen3_result r = qwen3i_reader_begin(&l, a, file, main->size + f->config.size + f->added.size, err);
    if (r == QWEN3_OK && (main->size > INT_MAX || f->merges.size > INT_MAX || f->config.size > INT_MAX ||
                          f->added.size > INT_MAX))
        r = qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: too large, or a file beside it is", file);
    l.json = qwen3i_json_begin(main->data, main->size);
    if (r == QWEN3_OK && f->json.data) r = qwen3i_vocab_document(&l);
    else if (r == QWEN3_OK) {
        l.v.t->nfc = 1;
        r = qwen3i_vocab_tokens(&l);
        if (r == QWEN3_OK && !qwen3i_json_end(&l.json)) r = qwen3i_vocab_json(&l);
        l.v.file = "merges.txt";
        if (r == QWEN3_OK) r = qwen3i_vocab_merge_lines(&l.v, (const char *)f->merges.data, f->merges.size);
    }
    if (r == QWEN3_OK) r = qwen3i_vocab_beside(&l, f);
    if (r == QWEN3_OK) l.v.file = file;
    return qwen3i_reader_end(&l, r, out);
}

/* ---- the tokens of a GGUF file --------------------------------------------------------------- */
enum { QWEN3I_GGUF_NORMAL = 1, QWEN3I_GGUF_UNKNOWN, QWEN3I_GGUF_CONTROL, QWEN3I_GGUF_USER,
       QWEN3I_GGUF_UNUSED, QWEN3I_GGUF_BYTE };

static qwen3_result qwen3i_gguf_token(qwen3i_vocab *v, qwen3i_str text, int64_t id, int type) {
    switch (type) {
        case QWEN3I_GGUF_NORMAL: case QWEN3I_GGUF_UNKNOWN: case QWEN3I_GGUF_BYTE:
            return qwen3i_vocab_token(v, text, id);
        case QWEN3I_GGUF_CONTROL: return qwen3i_vocab_added(v, text, id,
                                                            QWEN3I_ADDED_SPECIAL | QWEN3I_ADDED_RAW);
        case QWEN3I_GGUF_USER:    return qwen3i_vocab_added(v, text, id,
                                                            QWEN3I_ADDED_PLAIN | QWEN3I_ADDED_RAW);
        case QWEN3I_GGUF_UNUSED:  return QWEN3_OK;      /* fills the embedding up */
        default: return qwen3i_fail(v->err, QWEN3_ERR_FORMAT,
                                    "%s: key 'tokenizer.ggml.token_type': token %lld has the type %d; 1 to "
                                    "6 are known",
                                    v->file, (long long)id, type);
    }
}

static qwen3_result qwen3i_gguf_tokens(qwen3i_vocab *v, const qwen3i_gguf *g,
                                       const qwen3i_gguf_value *tokens) {
    const qwen3i_gguf_value *types;
    const unsigned char *p = tokens->p;
    qwen3_result r = qwen3i_gguf_get_array(g, "tokenizer.ggml.token_type", QWEN3I_GGUF_I32, &types);
    uint64_t i;
    if (r == QWEN3_OK && types && types->n != tokens->n)
        r = qwen3i_fail(g->err, QWEN3_ERR_FORMAT,
                        "%s: key 'tokenizer.ggml.token_type' has %llu elements, 'tokenizer.ggml.tokens' %llu",
                        g->file, (unsigned long long)types->n, (unsigned long long)tokens->n);
    for (i = 0; i < tokens->n && r == QWEN3_OK; i++)
        r = qwen3i_gguf_token(v, qwen3i_gguf_next_string(&p), (int64_t)i,
                              types ? (int)qwen3i_gguf_element(types, i) : QWEN3I_GGUF_NORMAL);
    return r;
}

static qwen3_result qwen3i_gguf_merges(qwen3i_vocab *v, const qwen3i_gguf *g) {
    const qwen3i_gguf_value *merges;
    qwen3_result r = qwen3i_gguf_get_array(g, "tokenizer.ggml.merges", QWEN3I_GGUF_STRING, &merges);
    const unsigned char *p = merges ? merges->p : NULL;
    uint64_t i;
    if (r == QWEN3_OK && !merges)
        r = qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: key 'tokenizer.ggml.merges' is missing", g->file);
    for (i = 0; r == QWEN3_OK && i < merges->n; i++)
        r = qwen3i_vocab_merge_line(v, qwen3i_gguf_next_string(&p));
    return r;
}

/* Is the value of a key one of these, with | between them? */
static qwen3_result qwen3i_gguf_expect(const qwen3i_gguf *g, const char *key, const char *list) {
    qwen3i_str text;
    qwen3_result r = qwen3i_gguf_get_string(g, key, &text);
    if (r != QWEN3_OK || qwen3i_one_of(text, list)) return r;
    return qwen3i_fail(g->err, QWEN3_ERR_UNSUPPORTED, "%s: key '%s' is '%.*s'; supported is %s", g->file,
                       key, QWEN3I_STR(text), list);
}

/* The same from the keys of a GGUF file; *out is NULL if it has no vocabulary. The names of the way to cut
   words are those that ggml-org/llama.cpp gives to Qwen's. Normal form C is not among the keys: Qwen3's is
   said. */
static qwen3_result qwen3i_tokenizer_from_gguf(qwen3i_tokenizer **out, const qwen3_allocator *a,
                                               const qwen3i_gguf *g) {
    const qwen3i_gguf_value *tokens;
    qwen3i_str model;
    qwen3i_vocab v;
    qwen3_result r = qwen3i_gguf_get_string(g, "tokenizer.ggml.model", &model);
    *out = NULL;
    if (r != QWEN3_OK || qwen3i_one_of(model, "|none|no_vocab")) return r;
    r = qwen3i_gguf_expect(g, "tokenizer.ggml.model", "gpt2");
    if (r == QWEN3_OK) r = qwen3i_gguf_expect(g, "tokenizer.ggml.pre", "qwen2|deepseek-r1-qwen");
    if (r == QWEN3_OK) r = qwen3i_gguf_get_array(g, "tokenizer.ggml.tokens", QWEN3I_GGUF_STRING, &tokens);
    if (r != QWEN3_OK) return r;
    if (!tokens)
        return qwen3i_fail(g->err, QWEN3_ERR_FORMAT, "%s: key 'tokenizer.ggml.tokens' is missing", g->file);
    r = qwen3i_vocab_begin(&v, a, g->file, (size_t)tokens->n, g->err);
    if (r == QWEN3_OK) {
        v.t->nfc = 1;
        r = qwen3i_gguf_tokens(&v, g, tokens);
    }
    if (r == QWEN3_OK) r = qwen3i_gguf_merges(&v, g);
    return qwen3i_vocab_end(&v, r, out);
}

/* ================================================================================================
   CHAT STYLE: which chat template a model was trained with

   Templates are not run. What one puts before a reply is worked out for enable_thinking undefined, true and
   false, and tells the style; that it says nothing but what the library says is looked at in its texts.
   ================================================================================================ */
/* values of enable_thinking */
enum { QWEN3I_UNDEFINED = 1, QWEN3I_TRUE = 2, QWEN3I_FALSE = 4, QWEN3I_ANY = 7 };

/* what a template puts before a reply, for each of the three values */
typedef struct qwen3i_header_text {
    char text[3][96];
    int  n[3], odd;                     /* odd: something was not understood */
} qwen3i_header_text;

static qwen3i_str qwen3i_trimmed(qwen3i_str s) {
    for (; s.n > 0 && strchr(" \t\r\n-+", *s.p) && *s.p; s.n--) s.p++;
    while (s.n > 0 && strchr(" \t\r\n-+", s.p[s.n - 1]) && s.p[s.n - 1]) s.n--;
    return s;
}

/* If s begins with this word: 1, and it is taken off. */
static int qwen3i_take_word(qwen3i_str *s, const char *word) {
    size_t n = strlen(word);
    if (s->n < n || memcmp(s->p, word, n) != 0) return 0;
    if (s->n > n && ((s->p[n] >= 'a' && s->p[n] <= 'z') || s->p[n] == '_')) return 0;
    *s = qwen3i_trimmed(qwen3i_str_from(*s, n));
    return 1;
}

/* [not] enable_thinking [is|== [not] value]: the values for which it holds; -1: not understood */
static int qwen3i_condition_atom(qwen3i_str *s) {
    int negative = qwen3i_take_word(s, "not"), values;
    if (qwen3i_take_word(s, "add_generation_prompt") || qwen3i_take_word(s, "true")) values = QWEN3I_ANY;
    else if (!qwen3i_take_word(s, "enable_thinking")) return -1;
    else if (qwen3i_take_word(s, "is") || qwen3i_take_word(s, "==")) {
        negative ^= qwen3i_take_word(s, "not");
        if (qwen3i_take_word(s, "defined")) values = QWEN3I_TRUE | QWEN3I_FALSE;
        else if (qwen3i_take_word(s, "undefined")) values = QWEN3I_UNDEFINED;
        else if (qwen3i_take_word(s, "true") || qwen3i_take_word(s, "True")) values = QWEN3I_TRUE;
        else if (qwen3i_take_word(s, "false") || qwen3i_take_word(s, "False")) values = QWEN3I_FALSE;
        else return -1;
    } else values = QWEN3I_TRUE;
    return negative ? QWEN3I_ANY & ~values : values;
}

/* Atoms joined by `and`, and those by `or` */
QWEN3I_COLD
static int qwen3i_condition(qwen3i_str s) {
    int any = 0, all = QWEN3I_ANY, values;
    for (s = qwen3i_trimmed(s);;) {
        values = qwen3i_condition_atom(&s);
        if (values < 0) return -1;
        all &= values;
        if (qwen3i_take_word(&s, "and")) continue;
        any |= all;
        all = QWEN3I_ANY;
        if (!qwen3i_take_word(&s, "or")) return s.n == 0 ? any : -1;
    }
}

/* The next text in quotes in an expression, without its escapes, into out; how long it is, -1: there is
   none. */
static int qwen3i_quoted(qwen3i_str *s, char *out, int cap) {
    int n = 0;
    char quote;
    while (s->n > 0 && *s->p != '\'' && *s->p != '"') *s = qwen3i_str_from(*s, 1);
    if (s->n == 0) return -1;
    quote = *s->p;
    for (*s = qwen3i_str_from(*s, 1); s->n > 0 && *s->p != quote; *s = qwen3i_str_from(*s, 1)) {
        char c = *s->p;
        if (c == '\\' && s->n > 1) { *s = qwen3i_str_from(*s, 1); c = *s->p == 'n' ? '\n' : *s->p; }
        if (n < cap) out[n] = c;
        n++;
    }
    if (s->n > 0) *s = qwen3i_str_from(*s, 1);
    return qwen3i_min(n, cap);
}

/* {% ... %}, {{ ... }} or {# ... #} from p on: kind is its second character, inside what is between; 0: no
   more */
static char qwen3i_next_tag(qwen3i_str *s, qwen3i_str *inside) {
    size_t i, k;
    for (i = 0; i + 1 < s->n; i++)
        if (s->p[i] == '{' && (s->p[i + 1] == '%' || s->p[i + 1] == '{' || s->p[i + 1] == '#')) break;
    if (i + 1 >= s->n) return 0;
    inside->p = s->p + i + 2;
    for (k = i + 2; k + 1 < s->n; k++)
        if (s->p[k + 1] == '}' && s->p[k] == (s->p[i + 1] == '{' ? '}' : s->p[i + 1])) break;
    if (k + 1 >= s->n) return 0;
    inside->n = k - i - 2;
    *s = qwen3i_str_from(*s, k + 2);
    return inside->p[-1];
}

/* Where a word begins outside of quotes; s.n: nowhere */
static size_t qwen3i_unquoted(qwen3i_str s, const char *word) {
    const size_t n = strlen(word);
    size_t i;
    char quote = 0;
    for (i = 0; i < s.n; i++) {
        if (quote) { if (s.p[i] == '\\') i++; else if (s.p[i] == quote) quote = 0; }
        else if (s.p[i] == '\'' || s.p[i] == '"') quote = s.p[i];
        else if (i + n <= s.n && memcmp(s.p + i, word, n) == 0) return i;
    }
    return s.n;
}

static void qwen3i_header_texts(qwen3i_header_text *h, int values, qwen3i_str expression) {
    char text[96];
    int n, k;
    while ((n = qwen3i_quoted(&expression, text, (int)sizeof text)) >= 0)
        for (k = 0; k < 3; k++) {
            if (!(values >> k & 1)) continue;
            if (h->n[k] + n > (int)sizeof h->text[k]) { h->odd = 1; continue; }
            memcpy(h->text[k] + h->n[k], text, (size_t)n);
            h->n[k] += n;
        }
}

/* {{ texts }} or {{ texts if condition else texts }} */
static void qwen3i_header_add(qwen3i_header_text *h, int values, qwen3i_str expression) {
    size_t at = qwen3i_unquoted(expression, " if "), otherwise;
    qwen3i_str condition;
    int c;
    if (at == expression.n) { qwen3i_header_texts(h, values, expression); return; }
    condition = qwen3i_str_from(expression, at + 4);
    expression.n = at;
    otherwise = qwen3i_unquoted(condition, " else ");
    at = condition.n;
    condition.n = otherwise;
    c = qwen3i_condition(condition);
    if (c < 0) { h->odd = 1; return; }
    qwen3i_header_texts(h, values & c, expression);
    condition.n = at;
    qwen3i_header_texts(h, values & ~c, qwen3i_str_from(condition, otherwise));
}

/* What stands inside of the last {% if add_generation_prompt %}: s begins behind that tag. */
static qwen3i_header_text qwen3i_header_read(qwen3i_str s, int values) {
    enum { DEPTH = 8 };
    /* left: values that no branch was for so far */
    int outer[DEPTH], left[DEPTH], depth = 0, now = values, c;
    qwen3i_header_text h;
    qwen3i_str tag;
    char kind;
    memset(&h, 0, sizeof h);
    while (depth >= 0 && (kind = qwen3i_next_tag(&s, &tag)) != 0) {
        tag = qwen3i_trimmed(tag);
        if (kind == '{') qwen3i_header_add(&h, now, tag);
        else if (kind == '%' && qwen3i_take_word(&tag, "endif")) { if (--depth >= 0) now = outer[depth]; }
        else if (kind == '%' && qwen3i_take_word(&tag, "if")) {
            if (depth == DEPTH || (c = qwen3i_condition(tag)) < 0) { h.odd = 1; break; }
            outer[depth] = now;
            left[depth++] = now & ~c;
            now &= c;
        } else if (kind == '%' && depth > 0 && qwen3i_take_word(&tag, "else")) now = left[depth - 1];
        else if (kind == '%' && depth > 0 && qwen3i_take_word(&tag, "elif")) {
            if ((c = qwen3i_condition(tag)) < 0) { h.odd = 1; break; }
            now = left[depth - 1] & c;
            left[depth - 1] &= ~c;
        } else if (kind == '%') h.odd = 1;
    }
    return h;
}

/* What follows the header of a reply: 0 nothing, 1 an open <think>, 2 a closed one, -1 something else */
static int qwen3i_header_kind(const char *text, int n) {
    static const char header[] = "assistant\n";
    const int k = (int)sizeof header - 1;
    if (n < k) return -1;
    for (; n > k && memcmp(text, header, (size_t)k) != 0; n--) text++;
    if (memcmp(text, header, (size_t)k) != 0) return -1;
    text += k; n -= k;
    if (n == 0) return 0;
    if ((n == 7 || n == 8) && memcmp(text, "<think>\n", (size_t)n) == 0) return 1;
    return n == 19 && memcmp(text, "<think>\n\n</think>\n\n", 19) == 0 ? 2 : -1;
}

/* The style by what stands before a reply, or -1: it is none of them. */
static int qwen3i_chat_style_by_header(qwen3i_str text) {
    static const char name[] = "add_generation_prompt";
    size_t at = qwen3i_str_find(text, name, 1), begin = at;
    qwen3i_header_text h;
    qwen3i_str tag, rest;
    int kinds[3], i, c;
    if (at == text.n || qwen3i_contains(text.p, text.n, "set enable_thinking")) return -1;
    while (begin > 0 && text.p[begin] != '{') begin--;
    rest = qwen3i_str_from(text, begin);
    if (qwen3i_next_tag(&rest, &tag) != '%') return -1;
    tag = qwen3i_trimmed(tag);
    if (!qwen3i_take_word(&tag, "if") || (c = qwen3i_condition(tag)) < 0) return -1;
    h = qwen3i_header_read(rest, c);
    for (i = 0; i < 3; i++) kinds[i] = qwen3i_header_kind(h.text[i], h.n[i]);
    if (h.odd || kinds[0] < 0 || kinds[1] < 0 || kinds[2] < 0) return -1;
    if (kinds[0] == kinds[1] && kinds[0] == kinds[2])
        return kinds[0] == 0 ? QWEN3_STYLE_INSTRUCT : kinds[0] == 1 ? QWEN3_STYLE_THINKING :
               QWEN3_STYLE_NO_THINK;
    return kinds[0] == 0 && kinds[1] == 0 && kinds[2] == 2 ? QWEN3_STYLE_HYBRID : -1;
}

/* By words, for templates that are written in another way: one that asks enable_thinking is hybrid, one whose
   reply header opens <think> always thinks. */
static qwen3_chat_style qwen3i_chat_style_by_words(qwen3i_str text) {
    static const char *const headers[] = { "<|im_start|>assistant\n<think>",
                                           "<|im_start|>assistant\\n<think>" };
    static const char *const closed[] = { "<think>\n\n</think>", "<think>\\n\\n</think>" };
    int i;
    if (text.n == 0 || qwen3i_contains(text.p, text.n, "enable_thinking")) return QWEN3_STYLE_HYBRID;
    for (i = 0; i < 2; i++) if (qwen3i_contains(text.p, text.n, closed[i])) return QWEN3_STYLE_NO_THINK;
    for (i = 0; i < 2; i++) if (qwen3i_contains(text.p, text.n, headers[i])) return QWEN3_STYLE_THINKING;
    return QWEN3_STYLE_INSTRUCT;
}

/* All that the library puts into a conversation; a template's texts are parts of it. */
#define QWEN3I_TOOLS_BEGIN \
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n" \
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
#define QWEN3I_TOOLS_END \
    "\n</tools>\n\nFor each function call, return a json object with function name and " \
    "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, " \
    "\"arguments\": <args-json-object>}\n</tool_call>"

/* The first text of a template that is not the library's, into out; its length, 0: there is none */
static int qwen3i_template_foreign(qwen3i_str text, char *out, int cap) {
    static const char ours[] = "<|im_start|>system\n" QWEN3I_TOOLS_BEGIN QWEN3I_TOOLS_END "<|im_end|>\n|"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n|<|im_start|>user\n|"
        "\n<tool_response>\n|\n</tool_response>|\n\n|"
        "\n<tool_call>\n{\"name\": \"|\", \"arguments\": |}\n</tool_call>|"
        "tool|content|role|reasoning_content|tool_calls|function|name|arguments|string|text";
    qwen3i_str tag;
    char kind;
    int n;
    while ((kind = qwen3i_next_tag(&text, &tag)) != 0) {
        if (kind == '#' || qwen3i_contains(tag.p, tag.n, "raise_exception")) continue;
        while ((n = qwen3i_quoted(&tag, out, cap - 1)) >= 0) {
            out[n] = '\0';
            if (n > 0 && !qwen3i_contains(ours, sizeof ours - 1, out)) return n;
        }
    }
    return 0;
}

/* Take the style of a template's text; "": there is none. What the built-in format does not do is logged. */
QWEN3I_COLD
static void qwen3i_take_template(qwen3_model *m, qwen3i_str text) {
    static const char *const names[] = {"Qwen3's, which may think", "of a model that always thinks",
                                        "of a model that never thinks",
                                            "of a model whose thinking is closed for it"};
    char foreign[160];
    int style = qwen3i_chat_style_by_header(text);
    m->info.chat_style = style >= 0 ? (qwen3_chat_style)style : qwen3i_chat_style_by_words(text);
    if (text.n > 0 && style < 0)
        qwen3i_log(&m->logger, QWEN3_LOG_WARN, "the chat template begins replies in a way of its own; taken "
                                               "for it is "
                   "the one %s", names[m->info.chat_style]);
    if (qwen3i_template_foreign(text, foreign, (int)sizeof foreign))
        qwen3i_log(&m->logger, QWEN3_LOG_WARN, "the chat template says \"%s\", which the built-in one, %s, "
                                               "does not",
                   foreign, names[m->info.chat_style]);
}

/* Of a list of {"name": ..., "template": ...}: the one named default, or else the first. */
static qwen3i_str qwen3i_template_of_list(qwen3i_json *j) {
    qwen3i_json_iter list, it;
    qwen3i_str key, name, text, found;
    int take;
    found.p = NULL;
    found.n = 0;
    if (qwen3i_json_open(j, '[', &list)) while (qwen3i_json_next(j, &list, NULL)) {
        take = found.p == NULL;
        text = found;
        if (qwen3i_json_open(j, '{', &it)) while (qwen3i_json_next(j, &it, &key)) {
            if (qwen3i_json_is(key, "template")) qwen3i_json_string(j, &text);
            else if (!qwen3i_json_is(key, "name")) qwen3i_json_skip(j);
            else if (qwen3i_json_string(j, &name) && qwen3i_json_is(name, "default")) take = 1;
        }
        if (take) found = text;
    }
    return found;
}

/* By tokenizer_config.json (NULL: there is none), whose chat_template is a text or a list of named ones. */
static qwen3_result qwen3i_take_template_of_config(qwen3_model *m, const qwen3i_blob *config) {
    qwen3i_json j = qwen3i_json_begin(config->data, config->size);
    qwen3i_buf buf = qwen3i_buf_make(&m->allocator);
    qwen3i_str text = qwen3i_str_of(NULL);
    int found = config->data && qwen3i_json_find(&j, "chat_template");
    if (found && qwen3i_json_peek(&j) == '[') text = qwen3i_template_of_list(&j);
    else if (found && !qwen3i_json_string(&j, &text)) text.n = 0;
    found = qwen3i_unescaped(&buf, &text);
    if (found) qwen3i_take_template(m, text);
    qwen3i_buf_free(&buf);
    return found ? QWEN3_OK : QWEN3_ERR_MEMORY;
}
/* ================================================================================================
   THREAD POOL
   One parallel loop at a time, cut into chunks that the lanes grab. Lane 0 is the caller; the others
   are threads of the pool, or whatever the host's job system provides. A worker that wakes up late
   finds nothing left to grab and is not waited for. In a process that was forked off there are no such
   threads: the caller does it all.
   ================================================================================================ */
#if defined(_MSC_VER)
typedef volatile LONG64 qwen3i_atomic;
static uint64_t qwen3i_atomic_get(qwen3i_atomic *p) { return (uint64_t)InterlockedOr64(p, 0); }
static void     qwen3i_atomic_set(qwen3i_atomic *p, uint64_t v) { InterlockedExchange64(p, (LONG64)v); }
static uint64_t qwen3i_atomic_add(qwen3i_atomic *p, uint64_t v) {       /* the new value */
    return (uint64_t)InterlockedExchangeAdd64(p, (LONG64)v) + v;
}
static int      qwen3i_atomic_swap(qwen3i_atomic *p, uint64_t from, uint64_t to) {
    return (uint64_t)InterlockedCompareExchange64(p, (LONG64)to, (LONG64)from) == from;
}
static void     qwen3i_pause(void) { YieldProcessor(); }
#else
typedef uint64_t __attribute__((aligned(8))) qwen3i_atomic;    /* 32-bit ABIs would give it 4 */
static uint64_t qwen3i_atomic_get(qwen3i_atomic *p) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
static void     qwen3i_atomic_set(qwen3i_atomic *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
static uint64_t qwen3i_atomic_add(qwen3i_atomic *p, uint64_t v) {       /* the new value */
    return __atomic_add_fetch(p, v, __ATOMIC_SEQ_CST);
}
static int      qwen3i_atomic_swap(qwen3i_atomic *p, uint64_t from, uint64_t to) {
    return __atomic_compare_exchange_n(p, &from, to, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
static QWEN3I_UNUSED void qwen3i_pause(void) {
  #if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
  #elif defined(__aarch64__)
    __asm__ __volatile__("yield");
  #endif
}
#endif

#define QWEN3I_MAX_LANES 64
#define QWEN3I_SPIN      1000           /* pauses, about 30 microseconds, before a waiting thread sleeps */

typedef void (*qwen3i_loop_fn)(void *arg, int begin, int end, int lane);

/* `ticket` is the number of the loop (upper half) and the next chunk to grab (lower half), which is
   QWEN3I_NO_CHUNK while the next loop is being set up. Who has taken a chunk knows that the loop
   cannot end, and its fields cannot change, before that chunk is counted in `done`. */
#define QWEN3I_NO_CHUNK 0xFFFFFFFFu

struct qwen3i_pool;
typedef struct qwen3i_worker { struct qwen3i_pool *pool; int lane; } qwen3i_worker;

typedef struct qwen3i_pool {
    int               n_lanes;
    qwen3_jobs        jobs;             /* used instead of threads if it has a function */
    long              process;          /* that has the threads: after fork() another one has none */
    qwen3i_atomic     ticket, n_chunks, done, stop, n_asleep;
    qwen3i_loop_fn    fn;
    void             *arg;
    int               n_items, grain;
#ifndef QWEN3_NO_THREADS
    int               n_threads;        /* started */
  #if defined(_WIN32)
    SRWLOCK           lock;
    CONDITION_VARIABLE changed;
    HANDLE            threads[QWEN3I_MAX_LANES];
  #else
    pthread_mutex_t   lock;
    pthread_cond_t    changed;
    pthread_t         threads[QWEN3I_MAX_LANES];
  #endif
    qwen3i_worker     workers[QWEN3I_MAX_LANES];
#endif
} qwen3i_pool;

/* ---- how many threads: as many as this process can run at once ------------------------------- */
#if defined(__linux__)
#ifdef CPU_SETSIZE
typedef cpu_set_t qwen3i_cpu_set;
#else                                   /* <sched.h> shows these only to _GNU_SOURCE */
typedef struct qwen3i_cpu_set { unsigned long bits[1024 / (8 * sizeof(long))]; } qwen3i_cpu_set;
  #ifdef __cplusplus
extern "C"
  #endif
int sched_getaffinity(pid_t pid, size_t size, qwen3i_cpu_set *set);
#endif

static int qwen3i_cpu_in(const qwen3i_cpu_set *set, int cpu) {
    unsigned long word;
    memcpy(&word, (const char *)set + (size_t)cpu / (8 * sizeof word) * sizeof word, sizeof word);
    return (int)(word >> (size_t)cpu % (8 * sizeof word) & 1);
}

/* A small file of the system's as text; 0: there is none. root is "" but for tests. */
static int qwen3i_system_text(const char *root, const char *name, char *text, size_t cap) {
#ifdef QWEN3_NO_STDIO
    (void)root; (void)name; (void)text; (void)cap;
    return 0;
#else
    char path[1024];
    int file;
    ssize_t n;
    if (snprintf(path, sizeof path, "%s%s", root, name) >= (int)sizeof path) return 0;
    file = open(path, QWEN3I_OPEN_FLAGS);
    if (file < 0) return 0;
    n = read(file, text, cap - 1);
    close(file);
    text[n > 0 ? n : 0] = '\0';
    return n > 0;
#endif
}

/* Processors whose time a control group may use, rounded up; 0: no limit is set here. Version 2 of control
   groups says "quota period" in one file, version 1 in two. */
static int qwen3i_group_quota(const char *root, const char *group, int version) {
    char name[800], text[64];
    long quota = 0, period = 0;
    snprintf(name, sizeof name, version == 2 ? "/sys/fs/cgroup%s/cpu.max" :
             "/sys/fs/cgroup/cpu%s/cpu.cfs_quota_us", group);
    if (!qwen3i_system_text(root, name, text, sizeof text)) return 0;
    if (sscanf(text, "%ld %ld", &quota, &period) < 1) return 0;         /* "max" */
    if (version == 1) {
        snprintf(name, sizeof name, "/sys/fs/cgroup/cpu%s/cpu.cfs_period_us", group);
        if (!qwen3i_system_text(root, name, text, sizeof text) || sscanf(text, "%ld", &period) != 1) return 0;
    }
    if (quota <= 0 || period <= 0) return 0;
    return (int)(quota / period + (quota % period > 0) > INT_MAX ? INT_MAX :
                 quota / period + (quota % period > 0));
}

/* The smallest quota of the groups from this one up to the root. */
static int qwen3i_groups_quota(const char *root, char *group, int version) {
    int least = 0;
    for (;;) {
        char *slash = strrchr(group, '/');
        const int quota = qwen3i_group_quota(root, group, version);
        if (quota > 0 && (least == 0 || quota < least)) least = quota;
        if (!slash) return least;
        *slash = '\0';
    }
}

/* Lines of /proc/self/cgroup: "0::/group" of version 2, "4:cpu,cpuacct:/group" of version 1. 0: no quota. */
static int qwen3i_cpu_quota(const char *root) {
    char text[4096], *line, *next;
    int least = 0;
    if (!qwen3i_system_text(root, "/proc/self/cgroup", text, sizeof text)) return 0;
    for (line = text; line; line = next) {
        char *kinds = strchr(line, ':'), *group = kinds ? strchr(kinds + 1, ':') : NULL;
        int quota = 0;
        next = strchr(line, '\n');
        if (next) *next++ = '\0';
        if (!group || strlen(group) > 700) continue;
        *kinds = *group = ',';          /* ",cpu,cpuacct,/group" */
        if (group == kinds + 1) quota = qwen3i_groups_quota(root, group + 1, 2);
        else if (strstr(kinds, ",cpu,")) quota = qwen3i_groups_quota(root, group + 1, 1);
        if (quota > 0 && (least == 0 || quota < least)) least = quota;
    }
    return least;
}

/* Is a processor in a list like "0-7,16"? */
static int qwen3i_cpu_listed(const char *list, int cpu) {
    int first, last, used;
    for (; sscanf(list, "%d%n", &first, &used) == 1; list += *list == ',') {
        list += used;
        last = first;
        if (*list == '-' && sscanf(list + 1, "%d%n", &last, &used) == 1) list += 1 + used;
        if (cpu >= first && cpu <= last) return 1;
    }
    return 0;
}

/* How fast a processor is beside the fastest, which has 1024; 1024 where the system does not say. Arm and
   RISC-V have a file for each, hybrid chips of Intel's one list of those that are fast. */
static int qwen3i_cpu_capacity(const char *root, const char *fast, int cpu) {
    char name[80], text[32];
    int capacity;
    if (*fast) return qwen3i_cpu_listed(fast, cpu) ? 1024 : 0;
    snprintf(name, sizeof name, "/sys/devices/system/cpu/cpu%d/cpu_capacity", cpu);
    return qwen3i_system_text(root, name, text, sizeof text) &&
           sscanf(text, "%d", &capacity) == 1 ? capacity : 1024;
}

/* Of the processors in the set the fast ones: a slow one would be waited for at the end of each loop. */
static int qwen3i_cpus_fast(const char *root, const qwen3i_cpu_set *set) {
    char fast[256] = "";
    int cpu, all = 0, n = 0;
    qwen3i_system_text(root, "/sys/devices/cpu_core/cpus", fast, sizeof fast);
    for (cpu = 0; cpu < (int)(8 * sizeof *set); cpu++) {
        if (!qwen3i_cpu_in(set, cpu)) continue;
        all++;
        n += qwen3i_cpu_capacity(root, fast, cpu) > 512;
    }
    return n > 0 ? n : all;
}

QWEN3I_COLD
static int qwen3i_cpu_threads(const char *root) {
    const int online = (int)sysconf(_SC_NPROCESSORS_ONLN), quota = qwen3i_cpu_quota(root);
    qwen3i_cpu_set set;
    int n = online;
    memset(&set, 0, sizeof set);
    if (sched_getaffinity(0, sizeof set, &set) == 0) n = qwen3i_cpus_fast(root, &set);
    return qwen3i_max(1, quota > 0 ? qwen3i_min(quota, n) : n);
}
static int qwen3i_default_threads(void) { return qwen3i_cpu_threads(""); }

#elif defined(_WIN32)
static int qwen3i_default_threads(void) {
    DWORD_PTR mine = 0, all = 0;
    int n = 0;
    if (GetProcessAffinityMask(GetCurrentProcess(), &mine, &all)) for (; mine; mine &= mine - 1) n++;
    return qwen3i_max(1, n);            /* of one group of at most 64 processors, which a process starts in */
}

#else
static int qwen3i_default_threads(void) {
    int n = (int)sysconf(_SC_NPROCESSORS_ONLN);
  #ifdef __APPLE__                      /* the fast ones; absent where all are alike */
    int fast = 0;
    size_t size = sizeof fast;
    if (sysctlbyname("hw.perflevel0.logicalcpu", &fast, &size, NULL, 0) == 0 && fast > 0) n = fast;
  #endif
    return qwen3i_max(1, n);
}
#endif

/* How many lanes a context with this descriptor has. */
static int qwen3i_pool_lanes(const qwen3_ctx_desc *desc) {
    int n = desc->threads > 0 ? desc->threads : qwen3i_default_threads();
#ifdef QWEN3_NO_THREADS
    if (!desc->jobs.parallel_for) n = 1;
#endif
    return qwen3i_min(n, QWEN3I_MAX_LANES);
}

static long qwen3i_process(void) {
#if defined(_WIN32)
    return 0;                           /* which cannot fork */
#else
    return (long)getpid();
#endif
}

/* Grab chunks of the current loop until none is left. Returns 1 if it did the last one of the loop. */
static int qwen3i_pool_work(qwen3i_pool *p, int lane) {
    int last = 0;
    for (;;) {
        uint64_t ticket = qwen3i_atomic_get(&p->ticket), chunk = ticket & 0xFFFFFFFFu;
        uint64_t n_chunks = qwen3i_atomic_get(&p->n_chunks);
        int begin;
        if (chunk >= n_chunks) return last;
        if (!qwen3i_atomic_swap(&p->ticket, ticket, ticket + 1)) continue;
        begin = (int)chunk * p->grain;
        p->fn(p->arg, begin, begin + qwen3i_min(p->grain, p->n_items - begin), lane);
        last = qwen3i_atomic_add(&p->done, 1) == n_chunks;
    }
}

#ifndef QWEN3_NO_THREADS
#if defined(_WIN32)
static void qwen3i_pool_lock(qwen3i_pool *p)   { AcquireSRWLockExclusive(&p->lock); }
static void qwen3i_pool_unlock(qwen3i_pool *p) { ReleaseSRWLockExclusive(&p->lock); }
static void qwen3i_pool_sleep(qwen3i_pool *p)  { SleepConditionVariableSRW(&p->changed, &p->lock, INFINITE,
        0); }
static void qwen3i_pool_notify(qwen3i_pool *p) { WakeAllConditionVariable(&p->changed); }
#else
static void qwen3i_pool_lock(qwen3i_pool *p)   { pthread_mutex_lock(&p->lock); }
static void qwen3i_pool_unlock(qwen3i_pool *p) { pthread_mutex_unlock(&p->lock); }
static void qwen3i_pool_sleep(qwen3i_pool *p)  { pthread_cond_wait(&p->changed, &p->lock); }
static void qwen3i_pool_notify(qwen3i_pool *p) { pthread_cond_broadcast(&p->changed); }
#endif

/* After a change that a sleeper waits for. The sleeper counts itself before it looks a last time. */
static void qwen3i_pool_wake(qwen3i_pool *p) {
    if (qwen3i_atomic_get(&p->n_asleep) == 0) return;
    qwen3i_pool_lock(p);
    qwen3i_pool_notify(p);
    qwen3i_pool_unlock(p);
}

/* A new loop has been published (its number is not `seen`), or the pool is to stop. */
static int qwen3i_pool_has_work(qwen3i_pool *p, uint64_t seen) {
    return qwen3i_atomic_get(&p->ticket) >> 32 != seen || qwen3i_atomic_get(&p->stop);
}

static int qwen3i_pool_finished(qwen3i_pool *p, uint64_t seen) {
    (void)seen;
    return qwen3i_atomic_get(&p->done) == qwen3i_atomic_get(&p->n_chunks);
}

/* Wait until ready(p, seen): spin for a moment, because the next loop of an evaluation is near, then
   sleep. */
static void qwen3i_pool_wait(qwen3i_pool *p, int (*ready)(qwen3i_pool *p, uint64_t seen), uint64_t seen) {
    int i;
    for (i = 0; i < QWEN3I_SPIN; i++) {
        if (ready(p, seen)) return;
        qwen3i_pause();
    }
    qwen3i_pool_lock(p);
    qwen3i_atomic_add(&p->n_asleep, 1);
    while (!ready(p, seen)) qwen3i_pool_sleep(p);
    qwen3i_atomic_add(&p->n_asleep, (uint64_t)-1);
    qwen3i_pool_unlock(p);
}

static void qwen3i_pool_thread(qwen3i_worker *w) {
    qwen3i_pool *p = w->pool;
    uint64_t seen = 0;
    fesetenv(FE_DFL_ENV);               /* not what the thread that started this one has */
    for (;;) {
        qwen3i_pool_wait(p, qwen3i_pool_has_work, seen);
        if (qwen3i_atomic_get(&p->stop)) return;
        seen = qwen3i_atomic_get(&p->ticket) >> 32;
        if (qwen3i_pool_work(p, w->lane)) qwen3i_pool_wake(p);
    }
}

#if defined(_WIN32)
static DWORD WINAPI qwen3i_pool_main(void *worker) { qwen3i_pool_thread((qwen3i_worker *)worker); return 0; }
static int qwen3i_pool_start(qwen3i_pool *p, int i) {
    p->threads[i] = CreateThread(NULL, 0, qwen3i_pool_main, &p->workers[i], 0, NULL);
    return p->threads[i] != NULL;
}
static void qwen3i_pool_join(qwen3i_pool *p, int i) {
    WaitForSingleObject(p->threads[i], INFINITE);
    CloseHandle(p->threads[i]);
}
static int  qwen3i_pool_locks_create(qwen3i_pool *p) {
    InitializeSRWLock(&p->lock);
    InitializeConditionVariable(&p->changed);
    return 1;
}
static void qwen3i_pool_locks_destroy(qwen3i_pool *p) { (void)p; }
#else
static void *qwen3i_pool_main(void *worker) { qwen3i_pool_thread((qwen3i_worker *)worker); return NULL; }

#ifdef SIG_SETMASK
typedef sigset_t qwen3i_signals;
#else                                   /* glibc and musl under -std=c99 hide these */
typedef struct qwen3i_signals { unsigned long bits[1024 / (8 * sizeof(long))]; } qwen3i_signals;
  #define SIG_SETMASK (SIGBUS == 10 ? 3 : 2)    /* MIPS, whose SIGBUS is 10, and the others */
int sigfillset(qwen3i_signals *set);
int pthread_sigmask(int how, const qwen3i_signals *set, qwen3i_signals *old);
#endif

/* All signals off, for threads that are started meanwhile: the host's handlers run on the host's threads. */
static qwen3i_signals qwen3i_signals_block(void) {
    qwen3i_signals all, callers;
    sigfillset(&all);
    memset(&callers, 0, sizeof callers);
    pthread_sigmask(SIG_SETMASK, &all, &callers);
    return callers;
}
static void qwen3i_signals_restore(qwen3i_signals callers) { pthread_sigmask(SIG_SETMASK, &callers, NULL); }
static int  qwen3i_pool_start(qwen3i_pool *p, int i) {
    const qwen3i_signals callers = qwen3i_signals_block();
    const int started = pthread_create(&p->threads[i], NULL, qwen3i_pool_main, &p->workers[i]) == 0;
    qwen3i_signals_restore(callers);
    return started;
}
static void qwen3i_pool_join(qwen3i_pool *p, int i) { pthread_join(p->threads[i], NULL); }
static int  qwen3i_pool_locks_create(qwen3i_pool *p) {
    if (pthread_mutex_init(&p->lock, NULL) != 0) return 0;
    if (pthread_cond_init(&p->changed, NULL) == 0) return 1;
    pthread_mutex_destroy(&p->lock);
    return 0;
}
static void qwen3i_pool_locks_destroy(qwen3i_pool *p) {
    pthread_cond_destroy(&p->changed);
    pthread_mutex_destroy(&p->lock);
}
#endif

static void qwen3i_pool_threads_stop(qwen3i_pool *p) {
    int i;
    qwen3i_atomic_set(&p->stop, 1);
    qwen3i_pool_wake(p);
    for (i = 0; i < p->n_threads; i++) qwen3i_pool_join(p, i);
    qwen3i_pool_locks_destroy(p);
}

QWEN3I_COLD
static qwen3_result qwen3i_pool_threads_start(qwen3i_pool *p, const qwen3i_err *err) {
    if (!qwen3i_pool_locks_create(p)) return qwen3i_fail(err, QWEN3_ERR_MEMORY, "cannot create a lock");
    for (p->n_threads = 0; p->n_threads < p->n_lanes - 1; p->n_threads++) {
        qwen3i_worker *w = &p->workers[p->n_threads];
        w->pool = p;
        w->lane = p->n_threads + 1;
        if (qwen3i_pool_start(p, p->n_threads)) continue;
        qwen3i_pool_threads_stop(p);
        return qwen3i_fail(err, QWEN3_ERR_MEMORY, "cannot start thread %d of %d", w->lane + 1, p->n_lanes);
    }
    return QWEN3_OK;
}
#endif /* QWEN3_NO_THREADS */

/* Threads are started here; after a failure there is nothing to destroy. */
QWEN3I_COLD
static qwen3_result qwen3i_pool_create(qwen3i_pool *p, const qwen3_ctx_desc *desc, const qwen3i_err *err) {
    memset(p, 0, sizeof *p);
    p->jobs = desc->jobs;
    p->process = qwen3i_process();
    p->n_lanes = qwen3i_pool_lanes(desc);
#ifndef QWEN3_NO_THREADS
    if (!p->jobs.parallel_for && p->n_lanes > 1) return qwen3i_pool_threads_start(p, err);
#endif
    (void)err;
    return QWEN3_OK;
}

static void qwen3i_pool_destroy(qwen3i_pool *p) {
#ifndef QWEN3_NO_THREADS
    if (!p->jobs.parallel_for && p->n_lanes > 1 && p->process == qwen3i_process())
        qwen3i_pool_threads_stop(p);
#endif
    (void)p;
}

static void qwen3i_pool_job(void *pool, int lane) {
    const fenv_t callers = qwen3i_float_enter();
    qwen3i_pool_work((qwen3i_pool *)pool, lane);
    qwen3i_float_leave(callers);
}

/* fn(arg, begin, end, lane) over [0, n_items) in chunks of `grain`. Which lane gets which chunk is
   left to chance: results must not depend on it. Returns when all is done. */
static void qwen3i_parallel(qwen3i_pool *p, int n_items, int grain, qwen3i_loop_fn fn, void *arg) {
    uint64_t loop;
    int i;
    grain = qwen3i_max(1, grain);
    if (n_items <= grain || p->n_lanes == 1 || p->process != qwen3i_process()) {
        for (i = 0; i < n_items; i += grain) fn(arg, i, qwen3i_min(i + grain, n_items), 0);
        return;
    }
    loop = qwen3i_atomic_get(&p->ticket) >> 32;
    /* late workers grab nothing from here on */
    qwen3i_atomic_set(&p->ticket, loop << 32 | QWEN3I_NO_CHUNK);
    p->fn = fn;
    p->arg = arg;
    p->n_items = n_items;
    p->grain = grain;
    qwen3i_atomic_set(&p->done, 0);
    qwen3i_atomic_set(&p->n_chunks, (uint64_t)((n_items + grain - 1) / grain));
    qwen3i_atomic_set(&p->ticket, (loop + 1) << 32);
    if (p->jobs.parallel_for) {
        p->jobs.parallel_for(p->jobs.user, p->n_lanes, qwen3i_pool_job, p);
        return;
    }
#ifndef QWEN3_NO_THREADS
    qwen3i_pool_wake(p);
    qwen3i_pool_work(p, 0);
    qwen3i_pool_wait(p, qwen3i_pool_finished, 0);
#endif
}

/* ================================================================================================
   MODEL: configuration, weights, loading
   ================================================================================================ */
static const qwen3_backend *qwen3i_cpu_backend(void);

/* ---- which weights, and in which types a quantised model keeps them ---------------------------
   The mixes are those that go by these names for GGUF files (src/llama-quant.cpp of ggml-org/llama.cpp). */
typedef enum qwen3i_mix { QWEN3I_MIX_NONE, QWEN3I_MIX_Q8_0, QWEN3I_MIX_Q4_K_M, QWEN3I_MIX_Q5_K_M,
                          QWEN3I_MIX_Q6_K, QWEN3I_MIX_Q4_0 } qwen3i_mix;

typedef enum qwen3i_tensor_id {          /* first those of the model, then those of each layer */
    QWEN3I_W_EMBED, QWEN3I_W_FINAL_NORM, QWEN3I_W_HEAD, QWEN3I_W_RANK,
    QWEN3I_W_ATTN_NORM, QWEN3I_W_Q, QWEN3I_W_K, QWEN3I_W_V, QWEN3I_W_QKV, QWEN3I_W_Q_NORM, QWEN3I_W_K_NORM,
    QWEN3I_W_O,
    QWEN3I_W_MLP_NORM, QWEN3I_W_GATE, QWEN3I_W_UP, QWEN3I_W_DOWN, QWEN3I_W_ROUTER,
    QWEN3I_W_ALL_GATE_UP, QWEN3I_W_ALL_GATE, QWEN3I_W_ALL_UP, QWEN3I_W_ALL_DOWN,    /* of all experts */
    QWEN3I_WEIGHTS
} qwen3i_tensor_id;

/* Layers whose values and down projections get more bits: the first and last eighth, and every third
   between */
static int qwen3i_mix_more(int layer, int n_layer) {
    return layer < n_layer / 8 || layer >= 7 * n_layer / 8 || (layer - n_layer / 8) % 3 == 2;
}

/* The type for rows of cols elements. Where the rows are not whole blocks of it, Q8_0 takes its place; where
   they are not even blocks of that, the weight stays as it is: NO_TYPE. */
static qwen3i_type qwen3i_mix_type(qwen3i_mix mix, int weight, int layer, const qwen3i_config *cfg,
                                   int cols) {
    static const qwen3i_type types[] = {QWEN3I_NO_TYPE, QWEN3I_Q8_0, QWEN3I_Q4_K, QWEN3I_Q5_K, QWEN3I_Q6_K,
                                        QWEN3I_Q4_0};
    const int is_head = weight == QWEN3I_W_HEAD || (weight == QWEN3I_W_EMBED && cfg->tied);
    const int medium = mix == QWEN3I_MIX_Q4_K_M || mix == QWEN3I_MIX_Q5_K_M;
    qwen3i_type type = types[mix];
    if (is_head && mix > QWEN3I_MIX_Q8_0) type = QWEN3I_Q6_K;
    if (medium && (weight == QWEN3I_W_V || weight == QWEN3I_W_DOWN) && qwen3i_mix_more(layer, cfg->n_layer))
        type = QWEN3I_Q6_K;
    if (type && cols % qwen3i_format_of(type)->elements) type = QWEN3I_Q8_0;
    return cols % 32 ? QWEN3I_NO_TYPE : type;
}

/* ---- configuration: what the files say, and then what it means --------------------------------------
   The reader of a format fills a qwen3i_raw_config with qwen3i_config_set and judges nothing.
   qwen3i_config_check, which is the same for all formats, makes the model's configuration of it; messages
   name a key as the format spells it. */
typedef enum qwen3i_key {
    QWEN3I_KEY_LAYERS, QWEN3I_KEY_EMBD, QWEN3I_KEY_HEADS, QWEN3I_KEY_KV_HEADS, QWEN3I_KEY_HEAD_DIM,
    QWEN3I_KEY_FF, QWEN3I_KEY_VOCAB, QWEN3I_KEY_CTX,        /* whole numbers, 1 to QWEN3I_MAX_DIM */
    /* of a mixture */
    QWEN3I_KEY_EXPERTS, QWEN3I_KEY_EXPERTS_USED, QWEN3I_KEY_EXPERT_FF, QWEN3I_KEY_SPARSE_STEP,
    /* any whole number: layers before the first that slides */
    QWEN3I_KEY_WINDOW_LAYERS,
    QWEN3I_KEY_TIED, QWEN3I_KEY_BIAS, QWEN3I_KEY_CAUSAL, QWEN3I_KEY_NORM_TOPK,
    QWEN3I_KEY_SLIDING,                                     /* 0 or 1 */
    QWEN3I_KEY_WINDOW, QWEN3I_KEY_EPS,
    QWEN3I_KEY_THETA, QWEN3I_KEY_PARTIAL, QWEN3I_KEY_ORIGINAL_CTX,  /* of the rotation, as all below */
    QWEN3I_KEY_FACTOR, QWEN3I_KEY_BETA_FAST, QWEN3I_KEY_BETA_SLOW, QWEN3I_KEY_ATTN_FACTOR,
    QWEN3I_KEY_MSCALE, QWEN3I_KEY_MSCALE_ALL,
    QWEN3I_KEY_TRUNCATE,                                    /* 0 or 1 */
    QWEN3I_KEY_ROPE,                                        /* its type: 0 default, 1 YaRN, -1 another */
    QWEN3I_KEY_FAMILY, QWEN3I_KEY_ACT, QWEN3I_KEY_LAYER_TYPES,  /* texts: they have members of their own */
    QWEN3I_KEYS
} qwen3i_key;

#define QWEN3I_MAX_DIM (1 << 24)        /* products of two fit 64 bits with room */

typedef struct qwen3i_raw_config {
    const char        *file;            /* in messages */
    const char *const *keys;            /* [QWEN3I_KEYS] as the format spells them; NULL: none */
    double             values[QWEN3I_KEYS];
    uint64_t           seen;            /* bit k: values[k] was set; else it is 0 */
    char               family[64];      /* the kind of model, "qwen3"; empty: not said */
    int                class_ok;        /* the format names no class, or one of ours is among them */
    int                act_ok;          /* the activation is SiLU */
    int                slides;          /* of the layers: 1 some, 0 none; -1: not said */
    int                n_dense, dense[64];  /* layers of a mixture that are dense; n_dense may be above 64 */
} qwen3i_raw_config;

static void qwen3i_config_begin(qwen3i_raw_config *c, const char *file, const char *const *keys) {
    memset(c, 0, sizeof *c);
    c->file = file;
    c->keys = keys;
    c->class_ok = c->act_ok = 1;
    c->slides = -1;
}

static void qwen3i_config_set(qwen3i_raw_config *c, int key, double value) {
    c->values[key] = value;
    c->seen |= (uint64_t)1 << key;
}

static int qwen3i_config_has(const qwen3i_raw_config *c, int key) { return (int)(c->seen >> key & 1); }

static qwen3_result qwen3i_config_unsupported(const qwen3i_raw_config *c, int key, const char *why,
                                              const qwen3i_err *err) {
    return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "%s: key '%s': %s", c->file, c->keys[key], why);
}

static qwen3_result qwen3i_config_missing(const qwen3i_raw_config *c, int key, const char *or_what,
                                          const qwen3i_err *err) {
    return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: key '%s' is missing%s", c->file, c->keys[key], or_what);
}

static int qwen3i_config_is_mixture(const qwen3i_raw_config *c) {
    return strcmp(c->family, "qwen3_moe") == 0 || strcmp(c->family, "qwen3moe") == 0;
}

static qwen3_result qwen3i_config_family(const qwen3i_raw_config *c, const qwen3i_err *err) {
    int known = strcmp(c->family, "qwen3") == 0 || qwen3i_config_is_mixture(c);
    if (!c->family[0]) return qwen3i_config_missing(c, QWEN3I_KEY_FAMILY, "", err);
    if (known && c->class_ok) return QWEN3_OK;
    return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                       "%s: %s is '%s'%s; this library runs 'qwen3' (Qwen3ForCausalLM) and "
                       "'qwen3_moe' (Qwen3MoeForCausalLM)", c->file, c->keys[QWEN3I_KEY_FAMILY], c->family,
                       known ? " but architectures does not name Qwen3ForCausalLM" : "");
}

/* The keys of a mixture of experts; others do not look at them. */
static qwen3_result qwen3i_config_experts(qwen3i_config *cfg, const qwen3i_raw_config *c,
                                          const qwen3i_err *err) {
    int *const sizes[] = {&cfg->n_expert, &cfg->n_expert_used, &cfg->n_ff_expert, &cfg->sparse_step};
    int i;
    if (!qwen3i_config_is_mixture(c)) return QWEN3_OK;
    for (i = 0; i < 4; i++) {
        const int key = QWEN3I_KEY_EXPERTS + i;
        if (!qwen3i_config_has(c, key) && key != QWEN3I_KEY_SPARSE_STEP)
            return qwen3i_config_missing(c, key, "", err);
        *sizes[i] = 1;                  /* a step that is not said */
        if (!qwen3i_config_has(c, key)) continue;
        if (!(c->values[key] >= 1 && c->values[key] <= (i == 2 ? QWEN3I_MAX_DIM : 4096)))
            return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: key '%s' is %.17g; 1 to %d is possible", c->file,
                               c->keys[key],
                               c->values[key], i == 2 ? QWEN3I_MAX_DIM : 4096);
        *sizes[i] = (int)c->values[key];
    }
    if (cfg->n_expert_used > cfg->n_expert)
        return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: %d of %d experts cannot be used", c->file,
                           cfg->n_expert_used, cfg->n_expert);
    if (!qwen3i_config_has(c, QWEN3I_KEY_NORM_TOPK))
        return qwen3i_config_missing(c, QWEN3I_KEY_NORM_TOPK, "", err);
    if (c->n_dense > QWEN3I_COUNT(cfg->dense))
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "%s: more than %d layers of a mixture are dense",
                           c->file,
                           QWEN3I_COUNT(cfg->dense));
    cfg->norm_topk = c->values[QWEN3I_KEY_NORM_TOPK] != 0;
    cfg->n_dense = c->n_dense;
    memcpy(cfg->dense, c->dense, sizeof cfg->dense);
    return QWEN3_OK;
}

/* Does this layer have experts? */
static int qwen3i_has_experts(const qwen3i_config *cfg, int layer) {
    int i;
    if (cfg->n_expert == 0 || (layer + 1) % cfg->sparse_step != 0) return 0;
    for (i = 0; i < cfg->n_dense; i++) if (cfg->dense[i] == layer) return 0;
    return 1;
}

/* Does a layer attend to a window only? The list of layers says so; without it, those from the
   given one on do. */
static int qwen3i_config_slides(const qwen3i_raw_config *c) {
    if (c->slides >= 0 || c->values[QWEN3I_KEY_SLIDING] == 0) return c->slides > 0;
    if (qwen3i_config_has(c, QWEN3I_KEY_WINDOW) && c->values[QWEN3I_KEY_WINDOW] == 0) return 0;
    return !qwen3i_config_has(c, QWEN3I_KEY_WINDOW_LAYERS) ||
           c->values[QWEN3I_KEY_WINDOW_LAYERS] < c->values[QWEN3I_KEY_LAYERS];
}

/* Values that would mean another computation. */
static qwen3_result qwen3i_config_switches(const qwen3i_raw_config *c, const qwen3i_err *err) {
    const double *v = c->values;
    int sliding = c->slides > 0 ? QWEN3I_KEY_LAYER_TYPES : QWEN3I_KEY_SLIDING;
    if (v[QWEN3I_KEY_BIAS] != 0)
        return qwen3i_config_unsupported(c, QWEN3I_KEY_BIAS, "biases are not supported", err);
    if (qwen3i_config_has(c, QWEN3I_KEY_CAUSAL) && v[QWEN3I_KEY_CAUSAL] == 0)
        return qwen3i_config_unsupported(c, QWEN3I_KEY_CAUSAL, "only causal attention is supported", err);
    if (qwen3i_config_slides(c))
        return qwen3i_config_unsupported(c, sliding,
                                         "sliding windows are not supported, only full_attention", err);
    if (!c->act_ok) return qwen3i_config_unsupported(c, QWEN3I_KEY_ACT, "only 'silu' is supported", err);
    if (v[QWEN3I_KEY_ROPE] < 0)
        return qwen3i_config_unsupported(c, QWEN3I_KEY_ROPE,
                                         "only the types 'default' and 'yarn' are supported", err);
    if (qwen3i_config_has(c, QWEN3I_KEY_PARTIAL) && v[QWEN3I_KEY_PARTIAL] != 1)
        return qwen3i_config_unsupported(c, QWEN3I_KEY_PARTIAL, "heads are rotated whole", err);
    return QWEN3_OK;
}

static qwen3_result qwen3i_config_sizes(qwen3i_config *cfg, const qwen3i_raw_config *c,
                                        const qwen3i_err *err) {
    int *const sizes[] = {
        &cfg->n_layer, &cfg->n_embd, &cfg->n_head, &cfg->n_head_kv, &cfg->head_dim, &cfg->n_ff,
        &cfg->n_vocab, &cfg->max_ctx        /* in the order of qwen3i_key */
    };
    int i;
    for (i = 0; i <= QWEN3I_KEY_CTX; i++) {
        if (!qwen3i_config_has(c, i)) return qwen3i_config_missing(c, i, "", err);
        if (!(c->values[i] >= 1 && c->values[i] <= QWEN3I_MAX_DIM))
            return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: key '%s' is %.17g; 1 to %d is possible", c->file,
                               c->keys[i], c->values[i], QWEN3I_MAX_DIM);
        *sizes[i] = (int)c->values[i];
    }
    if (cfg->head_dim % 2)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "%s: head_dim %d is odd", c->file, cfg->head_dim);
    if (cfg->n_head % cfg->n_head_kv)
        return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: %d attention heads cannot share %d key/value heads",
                           c->file,
                           cfg->n_head, cfg->n_head_kv);
    if ((int64_t)cfg->n_head * cfg->head_dim > QWEN3I_MAX_DIM)
        return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: head_dim x heads is out of range", c->file);
    return QWEN3_OK;
}

/* YaRN's factor for cosines and sines, for positions that are factor times as many (Peng et al. 2023, section
   3.4) */
static double qwen3i_yarn_magnitude(double factor, double mscale) {
    return factor > 1 ? 0.1 * mscale * log(factor) + 1 : 1;
}

/* YaRN's defaults are those of the paper and of transformers; mscale counts only together with
   mscale_all_dim. */
static qwen3_result qwen3i_config_yarn(qwen3i_config *cfg, const qwen3i_raw_config *c,
                                       const qwen3i_err *err) {
    const double *v = c->values, original = v[QWEN3I_KEY_ORIGINAL_CTX], mscale = v[QWEN3I_KEY_MSCALE];
    double factor = v[QWEN3I_KEY_FACTOR], given = v[QWEN3I_KEY_ATTN_FACTOR], all = v[QWEN3I_KEY_MSCALE_ALL];
    cfg->yarn_beta_fast = 32;
    cfg->yarn_beta_slow = 1;
    /* Qwen3 counts 8,192 for the reply on top */
    cfg->yarn_original_ctx = cfg->max_ctx == 40960 ? 32768 : cfg->max_ctx;
    if (v[QWEN3I_KEY_ROPE] == 0) return QWEN3_OK;
    if (original > 0) {
        if (!(original >= 1 && original <= QWEN3I_MAX_DIM))
            return qwen3i_config_unsupported(c, QWEN3I_KEY_ORIGINAL_CTX, "out of range", err);
        if (!qwen3i_config_has(c, QWEN3I_KEY_FACTOR)) factor = cfg->max_ctx / original;
    }
    if (!(factor >= 1 && factor <= 1024))
        return qwen3i_config_unsupported(c, QWEN3I_KEY_FACTOR, "YaRN needs a factor from 1 to 1024", err);
    if (!(given >= 0 && given < 1e6))
        return qwen3i_config_unsupported(c, QWEN3I_KEY_ATTN_FACTOR, "out of range", err);
    if (!(mscale >= 0 && mscale < 1e6))
        return qwen3i_config_unsupported(c, QWEN3I_KEY_MSCALE, "out of range", err);
    if (!(all >= 0 && all < 1e6))
        return qwen3i_config_unsupported(c, QWEN3I_KEY_MSCALE_ALL, "out of range", err);
    cfg->yarn_factor = factor;
    cfg->yarn_original_ctx = original > 0 ? (int)original : cfg->max_ctx;
    if (v[QWEN3I_KEY_BETA_FAST] > 0) cfg->yarn_beta_fast = v[QWEN3I_KEY_BETA_FAST];
    if (v[QWEN3I_KEY_BETA_SLOW] > 0) cfg->yarn_beta_slow = v[QWEN3I_KEY_BETA_SLOW];
    cfg->yarn_untruncated = qwen3i_config_has(c, QWEN3I_KEY_TRUNCATE) && v[QWEN3I_KEY_TRUNCATE] == 0;
    if (given > 0) cfg->yarn_attn_factor = given;
    else if (mscale > 0 && all > 0)
        cfg->yarn_attn_factor = qwen3i_yarn_magnitude(factor, mscale) / qwen3i_yarn_magnitude(factor, all);
    else cfg->yarn_attn_factor = qwen3i_yarn_magnitude(factor, 1);
    return QWEN3_OK;
}

QWEN3I_COLD
static qwen3_result qwen3i_config_check(qwen3i_config *cfg, const qwen3i_raw_config *c,
                                        const qwen3i_err *err) {
    const double eps = c->values[QWEN3I_KEY_EPS], theta = c->values[QWEN3I_KEY_THETA];
    qwen3_result r = qwen3i_config_family(c, err);
    if (r == QWEN3_OK) r = qwen3i_config_switches(c, err);
    if (r == QWEN3_OK) r = qwen3i_config_sizes(cfg, c, err);
    if (r == QWEN3_OK) r = qwen3i_config_experts(cfg, c, err);
    if (r != QWEN3_OK) return r;
    if (!(eps > 0 && eps < 1))
        return qwen3i_config_missing(c, QWEN3I_KEY_EPS, " or not between 0 and 1", err);
    if (!(theta >= 1 && theta < 1e30))
        return qwen3i_config_missing(c, QWEN3I_KEY_THETA, " or out of range", err);
    if (c->keys[QWEN3I_KEY_TIED] && !qwen3i_config_has(c, QWEN3I_KEY_TIED))
        return qwen3i_config_missing(c, QWEN3I_KEY_TIED, "", err);
    cfg->tied = c->values[QWEN3I_KEY_TIED] != 0;
    cfg->rms_eps = (float)eps;
    cfg->rope_theta = theta;
    return qwen3i_config_yarn(cfg, c, err);
}

/* ---- config.json ----------------------------------------------------------------------------- */
static const char *const qwen3i_json_keys[QWEN3I_KEYS] = {
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "vocab_size", "max_position_embeddings", "num_experts", "num_experts_per_tok",
    "moe_intermediate_size", "decoder_sparse_step", "max_window_layers", "tie_word_embeddings",
    "attention_bias", "is_causal", "norm_topk_prob", "use_sliding_window", "sliding_window", "rms_norm_eps",
    "rope_theta",
    "partial_rotary_factor", "original_max_position_embeddings", "factor", "beta_fast", "beta_slow",
    "attention_factor", "mscale", "mscale_all_dim", "truncate", "rope_type", "model_type", "hidden_act",
    "layer_types"
};

typedef struct qwen3i_config_reader {
    qwen3i_json       j;
    qwen3i_raw_config raw;
    qwen3i_raw_config rope[2];          /* what rope_parameters says, and rope_scaling, which counts more */
    qwen3_model      *m;
} qwen3i_config_reader;

/* A whole number, a truth value or any number, by what the key holds. null: as if it was not there */
static void qwen3i_config_value(qwen3i_json *j, qwen3i_raw_config *raw, int key) {
    double number = 0;
    int64_t whole = 0;
    int flag = 0, ok;
    if (key > QWEN3I_KEY_CTX && qwen3i_json_word(j, "null")) {
        if (key == QWEN3I_KEY_WINDOW) qwen3i_config_set(raw, key, 0);   /* there is none, said */
        return;
    }
    if (key <= QWEN3I_KEY_WINDOW_LAYERS) { ok = qwen3i_json_int(j, &whole); number = (double)whole; }
    else if (key <= QWEN3I_KEY_SLIDING || key == QWEN3I_KEY_TRUNCATE) {
        ok = qwen3i_json_bool(j, &flag);
        number = flag;
    }
    else ok = qwen3i_json_number(j, &number);
    if (ok) qwen3i_config_set(raw, key, number);
}

/* The key among [from, to], or to + 1. */
static int qwen3i_config_find(qwen3i_str key, int from, int to) {
    while (from <= to && !qwen3i_json_is(key, qwen3i_json_keys[from])) from++;
    return from;
}

/* rope_scaling, or rope_parameters as newer files call it: {"rope_type": "yarn", "factor": 4, ...} */
QWEN3I_COLD
static void qwen3i_config_rope(qwen3i_json *j, qwen3i_raw_config *raw) {
    qwen3i_json_iter it;
    qwen3i_str key, type;
    int k;
    raw->seen = 0;
    if (qwen3i_json_word(j, "null") || !qwen3i_json_open(j, '{', &it)) return;
    while (qwen3i_json_next(j, &it, &key)) {
        if (qwen3i_json_is(key, "rope_type") || qwen3i_json_is(key, "type")) {
            if (!qwen3i_json_string(j, &type)) return;
            qwen3i_config_set(raw, QWEN3I_KEY_ROPE, qwen3i_json_is(type, "yarn") ? 1 :
                              qwen3i_json_is(type, "default") ? 0 : -1);
            continue;
        }
        k = qwen3i_config_find(key, QWEN3I_KEY_THETA, QWEN3I_KEY_TRUNCATE);
        if (k <= QWEN3I_KEY_TRUNCATE) qwen3i_config_value(j, raw, k);
        else qwen3i_json_skip(j);
    }
}

/* What the rotation's own object says goes before what stands outside, but for the original context. */
static void qwen3i_config_merge_rope(qwen3i_config_reader *c) {
    const qwen3i_raw_config *rope = c->rope[1].seen ? &c->rope[1] : &c->rope[0];
    int k;
    for (k = QWEN3I_KEY_THETA; k <= QWEN3I_KEY_ROPE; k++)
        if (qwen3i_config_has(rope, k) && !(k == QWEN3I_KEY_ORIGINAL_CTX && qwen3i_config_has(&c->raw, k)))
            qwen3i_config_set(&c->raw, k, rope->values[k]);
}

/* eos_token_id: a number, a list of numbers, or null. */
static void qwen3i_read_eos(qwen3i_json *j, qwen3_model *m) {
    qwen3i_json_iter it;
    int64_t id;
    int list = qwen3i_json_peek(j) == '[';
    if (qwen3i_json_word(j, "null")) return;
    if (list && !qwen3i_json_open(j, '[', &it)) return;
    while (!list || qwen3i_json_next(j, &it, NULL)) {
        if (!qwen3i_json_int(j, &id)) return;
        if (id >= 0 && id <= INT32_MAX && m->n_eos < QWEN3I_MAX_EOS) m->eos[m->n_eos++] = (qwen3_token)id;
        if (!list) return;
    }
}

/* A list of texts, or null: how many there are, and how many of them are a or b. */
static void qwen3i_config_list(qwen3i_json *j, const char *a, const char *b, int *n, int *hits) {
    qwen3i_json_iter it;
    qwen3i_str s;
    *n = *hits = 0;
    if (qwen3i_json_word(j, "null") || !qwen3i_json_open(j, '[', &it)) return;
    for (; qwen3i_json_next(j, &it, NULL) && qwen3i_json_string(j, &s); ++*n)
        *hits += qwen3i_json_is(s, a) || qwen3i_json_is(s, b);
}

/* quantization_config: what the tensors of quantised matrices are. Keys of any depth are taken together,
   except those about activations. */
QWEN3I_COLD
static void qwen3i_quantization_read(qwen3i_json *j, qwen3i_quantization *q, int depth) {
    qwen3i_json_iter it, list;
    qwen3i_str key, s;
    int64_t n;
    int i = 0;
    if (!qwen3i_json_open(j, '{', &it)) return;
    while (qwen3i_json_next(j, &it, &key)) {
        if (qwen3i_json_word(j, "null")) continue;
        if (qwen3i_json_is(key, "bits") || qwen3i_json_is(key, "w_bit") || qwen3i_json_is(key, "num_bits")) {
            if (qwen3i_json_int(j, &n)) q->bits = n > 0 && n < 64 ? (int)n : 0;
        } else if (qwen3i_json_is(key, "group_size") || qwen3i_json_is(key, "q_group_size")) {
            if (qwen3i_json_int(j, &n)) q->group = n > 0 && n < INT32_MAX ? (int)n : 0;
        } else if (qwen3i_json_is(key, "weight_block_size")) {
            if (qwen3i_json_open(j, '[', &list))
                while (qwen3i_json_next(j, &list, NULL) && qwen3i_json_int(j, &n))
                    if (i < 2) q->block[i++] = n > 0 && n < INT32_MAX ? (int)n : 128;
        } else if (qwen3i_json_is(key, "quant_method")) {
            if (qwen3i_json_string(j, &s)) snprintf(q->method, sizeof q->method, "%.*s", QWEN3I_STR(s));
        }
        else if (qwen3i_json_is(key, "format") || qwen3i_json_is(key, "version")) {
            if (qwen3i_json_string(j, &s)) snprintf(q->format, sizeof q->format, "%.*s", QWEN3I_STR(s));
        } else if (qwen3i_json_is(key, "checkpoint_format")) {
            if (qwen3i_json_string(j, &s)) q->v2 = qwen3i_json_is(s, "gptq_v2");
        }
        else if (qwen3i_json_is(key, "strategy")) {
            if (qwen3i_json_string(j, &s)) q->per_tensor = qwen3i_json_is(s, "tensor");
        }
        else if (qwen3i_json_peek(j) == '{' && depth < 4 && !qwen3i_json_is(key, "input_activations") &&
                 !qwen3i_json_is(key, "output_activations"))
            qwen3i_quantization_read(j, q, depth + 1);
        else qwen3i_json_skip(j);
    }
}

static qwen3_result qwen3i_quantization_check(qwen3i_quantization *q, const char *file,
                                              const qwen3i_err *err) {
    static const struct { const char *method, *format; qwen3i_packing packing; } known[] = {
        {"fp8", "", QWEN3I_FLOAT8}, {"awq", "", QWEN3I_AWQ}, {"awq", "gemm", QWEN3I_AWQ},
        {"awq", "GEMM", QWEN3I_AWQ}, {"gptq", NULL, QWEN3I_GPTQ},
        {"compressed-tensors", "float-quantized", QWEN3I_FLOAT8},
        {"compressed-tensors", "pack-quantized", QWEN3I_PACKED}
    };
    for (int i = 0; i < QWEN3I_COUNT(known); i++)
        if (!strcmp(q->method, known[i].method) && (!known[i].format || !strcmp(q->format, known[i].format)))
            q->packing = known[i].packing;
    if (q->packing) return QWEN3_OK;
    return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                       "%s: key 'quantization_config': method '%s'%s%s is not supported; fp8, awq (gemm), "
                       "gptq and compressed-tensors (pack-quantized, float-quantized) are", file, q->method,
                       *q->format ? ", format " : "", q->format);
}

/* A list of layers, or null */
static void qwen3i_config_dense(qwen3i_json *j, qwen3i_raw_config *raw) {
    qwen3i_json_iter it;
    int64_t layer;
    raw->n_dense = 0;
    if (qwen3i_json_word(j, "null") || !qwen3i_json_open(j, '[', &it)) return;
    while (qwen3i_json_next(j, &it, NULL) && qwen3i_json_int(j, &layer)) {
        if (layer < 0 || layer > QWEN3I_MAX_DIM) {
            qwen3i_json_bad(j, "a layer's number was expected");
            return;
        }
        if (raw->n_dense < QWEN3I_COUNT(raw->dense)) raw->dense[raw->n_dense] = (int)layer;
        if (raw->n_dense <= QWEN3I_COUNT(raw->dense)) raw->n_dense++;
    }
}

static qwen3_result qwen3i_config_key(qwen3i_config_reader *c, qwen3i_str key, const qwen3i_err *err) {
    qwen3i_raw_config *raw = &c->raw;
    qwen3i_json *j = &c->j;
    qwen3i_str s;
    int k = qwen3i_config_find(key, 0, QWEN3I_KEY_ORIGINAL_CTX), n, hits;
    if (k <= QWEN3I_KEY_ORIGINAL_CTX) qwen3i_config_value(j, raw, k);
    else if (qwen3i_json_is(key, "model_type")) {
        if (qwen3i_json_string(j, &s)) snprintf(raw->family, sizeof raw->family, "%.*s", QWEN3I_STR(s));
    } else if (qwen3i_json_is(key, "hidden_act")) {
        if (qwen3i_json_string(j, &s)) raw->act_ok = qwen3i_json_is(s, "silu") || qwen3i_json_is(s, "swish");
    } else if (qwen3i_json_is(key, "architectures")) {
        qwen3i_json again = *j;
        qwen3i_config_list(&again, "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", &n, &hits);
        c->m->no_causal = hits == 0;
        raw->class_ok = hits > 0;
        qwen3i_config_list(j, "Qwen3Model", "Qwen3MoeModel", &n, &hits);
        raw->class_ok |= hits > 0;
    } else if (qwen3i_json_is(key, "layer_types")) {
        qwen3i_config_list(j, "full_attention", "full_attention", &n, &hits);
        raw->slides = n == 0 ? -1 : hits < n;
    } else if (qwen3i_json_is(key, "mlp_only_layers")) {
        qwen3i_config_dense(j, raw);
    } else if (qwen3i_json_is(key, "quantization_config")) {
        qwen3i_quantization *q = &c->m->quantization;
        memset(q, 0, sizeof *q);
        q->block[0] = q->block[1] = 128;
        if (qwen3i_json_word(j, "null")) return QWEN3_OK;
        qwen3i_quantization_read(j, q, 0);
        return j->error ? QWEN3_OK : qwen3i_quantization_check(q, raw->file, err);
    } else if (qwen3i_json_is(key, "quantization")) {
        if (!qwen3i_json_word(j, "null"))
            return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                               "%s: key '%.*s': this kind of quantised checkpoint is not supported",
                               raw->file, QWEN3I_STR(key));
    } else if (qwen3i_json_is(key, "rope_parameters")) qwen3i_config_rope(j, &c->rope[0]);
    else if (qwen3i_json_is(key, "rope_scaling")) qwen3i_config_rope(j, &c->rope[1]);
    else if (qwen3i_json_is(key, "eos_token_id")) qwen3i_read_eos(j, c->m);
    else qwen3i_json_skip(j);
    return QWEN3_OK;
}

QWEN3I_COLD
static qwen3_result qwen3i_parse_config(qwen3_model *m, const char *file, const qwen3i_blob *b,
                                        const qwen3i_err *err) {
    qwen3i_config_reader c;
    qwen3i_json_iter it;
    qwen3i_str key;
    qwen3_result r = QWEN3_OK;
    memset(&c, 0, sizeof c);
    qwen3i_config_begin(&c.raw, file, qwen3i_json_keys);
    c.raw.class_ok = 0;                 /* architectures has to be there */
    c.j = qwen3i_json_begin(b->data, b->size);
    c.m = m;
    if (qwen3i_json_open(&c.j, '{', &it))
        while (r == QWEN3_OK && qwen3i_json_next(&c.j, &it, &key)) {
            r = qwen3i_config_key(&c, key, err);
            if (c.j.error) return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: key '%.*s': byte %lu: %s", file,
                                              QWEN3I_STR(key), (unsigned long)qwen3i_json_offset(&c.j),
                                                  c.j.error);
        }
    if (r != QWEN3_OK) return r;
    qwen3i_json_end(&c.j);
    if (c.j.error) return qwen3i_json_fail(err, file, &c.j);
    qwen3i_config_merge_rope(&c);
    return qwen3i_config_check(&m->config, &c.raw, err);
}

/* Advice from a file: what is out of range is off. */
static void qwen3i_advise(qwen3_sampler *s, double temperature, double top_p, double top_k, double min_p,
                          double repeat) {
    s->temperature = temperature >= 0 && temperature < 100 ? (float)temperature : 1.0f;
    s->top_p = top_p > 0 && top_p <= 1 ? (float)top_p : 0.0f;
    s->min_p = min_p > 0 && min_p <= 1 ? (float)min_p : 0.0f;
    s->top_k = top_k >= 1 && top_k < 1e6 ? (int)top_k : 0;
    s->repeat_penalty = repeat > 0 && repeat < 100 ? (float)repeat : 0.0f;
}

/* generation_config.json: sampling defaults and the tokens that end a turn. Its values are advice, so
   what is out of range is ignored; only broken JSON is an error. */
QWEN3I_COLD
static qwen3_result qwen3i_parse_generation(qwen3_model *m, const char *file, const qwen3i_blob *b,
                                            const qwen3i_err *err) {
    qwen3i_json j = qwen3i_json_begin(b->data, b->size);
    qwen3i_json_iter it;
    qwen3i_str key;
    double temperature = 1, top_p = 1, top_k = 50, min_p = 0, repeat = 1;   /* transformers' defaults */
    int sample = 0;
    if (qwen3i_json_open(&j, '{', &it))
        while (qwen3i_json_next(&j, &it, &key)) {
            double *number = qwen3i_json_is(key, "temperature") ? &temperature :
                             qwen3i_json_is(key, "top_p") ? &top_p :
                             qwen3i_json_is(key, "top_k") ? &top_k : qwen3i_json_is(key, "min_p") ? &min_p :
                             qwen3i_json_is(key, "repetition_penalty") ? &repeat : NULL;
            if (qwen3i_json_word(&j, "null")) continue;
            if (number) qwen3i_json_number(&j, number);
            else if (qwen3i_json_is(key, "do_sample")) qwen3i_json_bool(&j, &sample);
            else if (qwen3i_json_is(key, "eos_token_id")) { m->n_eos = 0; qwen3i_read_eos(&j, m); }
            else qwen3i_json_skip(&j);
        }
    qwen3i_json_end(&j);
    if (j.error) return qwen3i_json_fail(err, file, &j);
    if (sample) qwen3i_advise(&m->info.sampler, temperature, top_p, top_k, min_p, repeat);
    return QWEN3_OK;
}

static void qwen3i_add_eos(qwen3_model *m, qwen3_token id) {
    int i;
    if (id < 0 || m->n_eos == QWEN3I_MAX_EOS) return;
    for (i = 0; i < m->n_eos; i++) if (m->eos[i] == id) return;
    m->eos[m->n_eos++] = id;
}

/* ---- the keys of a GGUF file ----------------------------------------------------------------- */
/* Most names begin with the architecture: [0] qwen3, dense; [1] qwen3moe, a mixture of experts */
#define QWEN3I_GGUF_BOTH(name) {"qwen3." name, "qwen3moe." name}
typedef struct qwen3i_gguf_key { int key; const char *name[2]; } qwen3i_gguf_key;

static const qwen3i_gguf_key qwen3i_gguf_keys[] = {
    {QWEN3I_KEY_LAYERS,    QWEN3I_GGUF_BOTH("block_count")},
    {QWEN3I_KEY_EMBD,      QWEN3I_GGUF_BOTH("embedding_length")},
    {QWEN3I_KEY_HEADS,     QWEN3I_GGUF_BOTH("attention.head_count")},
    {QWEN3I_KEY_KV_HEADS,  QWEN3I_GGUF_BOTH("attention.head_count_kv")},
    {QWEN3I_KEY_HEAD_DIM,  QWEN3I_GGUF_BOTH("attention.key_length")},
    {QWEN3I_KEY_FF,        QWEN3I_GGUF_BOTH("feed_forward_length")},
    {QWEN3I_KEY_VOCAB,     QWEN3I_GGUF_BOTH("vocab_size")},
    {QWEN3I_KEY_CTX,       QWEN3I_GGUF_BOTH("context_length")},
    {QWEN3I_KEY_EXPERTS,   QWEN3I_GGUF_BOTH("expert_count")},
    {QWEN3I_KEY_EXPERTS_USED, QWEN3I_GGUF_BOTH("expert_used_count")},
    {QWEN3I_KEY_EXPERT_FF, QWEN3I_GGUF_BOTH("expert_feed_forward_length")},
    {QWEN3I_KEY_EPS,       QWEN3I_GGUF_BOTH("attention.layer_norm_rms_epsilon")},
    {QWEN3I_KEY_THETA,     QWEN3I_GGUF_BOTH("rope.freq_base")},
    {QWEN3I_KEY_FACTOR,    QWEN3I_GGUF_BOTH("rope.scaling.factor")},
    {QWEN3I_KEY_BETA_FAST, QWEN3I_GGUF_BOTH("rope.scaling.yarn_beta_fast")},
    {QWEN3I_KEY_BETA_SLOW, QWEN3I_GGUF_BOTH("rope.scaling.yarn_beta_slow")},
    {QWEN3I_KEY_ORIGINAL_CTX, QWEN3I_GGUF_BOTH("rope.scaling.original_context_length")},
    {QWEN3I_KEY_ATTN_FACTOR,  QWEN3I_GGUF_BOTH("rope.scaling.attn_factor")},
    {QWEN3I_KEY_ROPE,      QWEN3I_GGUF_BOTH("rope.scaling.type")}
};

/* A whole model, and not a part of one that goes with another. */
static qwen3_result qwen3i_gguf_check_type(const qwen3i_gguf *g) {
    qwen3i_str type;
    qwen3_result r = qwen3i_gguf_get_string(g, "general.type", &type);
    if (r != QWEN3_OK || type.n == 0 || qwen3i_compare_str(type, qwen3i_str_of("model")) == 0) return r;
    return qwen3i_fail(g->err, QWEN3_ERR_UNSUPPORTED,
                       "%s: key 'general.type' is '%.*s'; 'model' is supported", g->file, QWEN3I_STR(type));
}

/* What a key that is not there defaults to. */
static qwen3_result qwen3i_gguf_defaults(const qwen3i_gguf *g, qwen3i_raw_config *raw) {
    const double heads = raw->values[QWEN3I_KEY_HEADS];
    const qwen3i_gguf_value *tokens;
    qwen3_result r = qwen3i_gguf_get_array(g, "tokenizer.ggml.tokens", QWEN3I_GGUF_STRING, &tokens);
    if (r != QWEN3_OK) return r;
    if (!qwen3i_config_has(raw, QWEN3I_KEY_VOCAB) && tokens)
        qwen3i_config_set(raw, QWEN3I_KEY_VOCAB, (double)tokens->n);
    if (!qwen3i_config_has(raw, QWEN3I_KEY_KV_HEADS) && heads > 0)
        qwen3i_config_set(raw, QWEN3I_KEY_KV_HEADS, heads);
    if (!qwen3i_config_has(raw, QWEN3I_KEY_HEAD_DIM) && heads > 0)
        qwen3i_config_set(raw, QWEN3I_KEY_HEAD_DIM, floor(raw->values[QWEN3I_KEY_EMBD] / heads));
    if (!qwen3i_config_is_mixture(raw)) return QWEN3_OK;
    /* no file says so, but the weights of qwen3moe's experts add up to 1, and all layers have experts */
    qwen3i_config_set(raw, QWEN3I_KEY_NORM_TOPK, 1);
    if (!qwen3i_config_has(raw, QWEN3I_KEY_FF) && qwen3i_config_has(raw, QWEN3I_KEY_EXPERT_FF))
        qwen3i_config_set(raw, QWEN3I_KEY_FF, raw->values[QWEN3I_KEY_EXPERT_FF]);
    return QWEN3_OK;
}

static qwen3_result qwen3i_gguf_read_config(const qwen3i_gguf *g, qwen3i_raw_config *raw) {
    qwen3i_str text;
    double value = 0;
    int i, found;
    qwen3_result r = QWEN3_OK;
    for (i = 0; i < QWEN3I_KEY_ROPE && r == QWEN3_OK; i++) {
        if (!raw->keys[i]) continue;
        r = qwen3i_gguf_get_number(g, raw->keys[i], &value, &found);
        if (r == QWEN3_OK && found) qwen3i_config_set(raw, i, value);
    }
    text.n = 0;
    if (r == QWEN3_OK) r = qwen3i_gguf_get_string(g, raw->keys[QWEN3I_KEY_ROPE], &text);
    if (text.n && qwen3i_compare_str(text, qwen3i_str_of("none")) != 0)
        qwen3i_config_set(raw, QWEN3I_KEY_ROPE, qwen3i_compare_str(text, qwen3i_str_of("yarn")) == 0 ? 1 :
                          -1);
    /* here on top of YaRN's own */
    if (raw->values[QWEN3I_KEY_ATTN_FACTOR] > 0 && raw->values[QWEN3I_KEY_FACTOR] > 1)
        raw->values[QWEN3I_KEY_ATTN_FACTOR] *= 0.1 * log(raw->values[QWEN3I_KEY_FACTOR]) + 1;
    return r;
}

/* Keys that would mean another computation than that of head_dim rotated values. */
static qwen3_result qwen3i_gguf_check_width(const qwen3i_gguf *g, const char *key, int head_dim) {
    double width = 0;
    int found;
    qwen3_result r = qwen3i_gguf_get_number(g, key, &width, &found);
    if (r != QWEN3_OK || !found || width == head_dim) return r;
    return qwen3i_fail(g->err, QWEN3_ERR_UNSUPPORTED,
                       "%s: key '%s' is %.17g; only 'attention.key_length' (%d) is supported",
                       g->file, key, width, head_dim);
}

/* 0 none, 3 last token, 4 that of a reranker */
static qwen3_result qwen3i_gguf_read_pooling(const qwen3i_gguf *g, const char *key, qwen3_model *m) {
    double pooling = 0;
    int found;
    qwen3_result r = qwen3i_gguf_get_number(g, key, &pooling, &found);
    m->says_pooling = pooling == 3;
    if (r != QWEN3_OK || pooling == 0 || pooling == 3 || pooling == 4) return r;
    return qwen3i_fail(g->err, QWEN3_ERR_UNSUPPORTED,
                       "%s: key '%s' is %.17g; 0 (none), 3 (last token) and 4 (rank) are supported",
                       g->file, key, pooling);
}

/* The tokens that end a turn. */
static qwen3_result qwen3i_gguf_read_eos(const qwen3i_gguf *g, qwen3_model *m) {
    static const char *const keys[] = {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                                       "tokenizer.ggml.eom_token_id"};
    qwen3_result r = QWEN3_OK;
    double id = 0;
    int i, found;
    for (i = 0; i < QWEN3I_COUNT(keys) && r == QWEN3_OK; i++) {
        r = qwen3i_gguf_get_number(g, keys[i], &id, &found);
        if (r != QWEN3_OK || !found) continue;
        if (!(id >= 0 && id < m->config.n_vocab))
            return qwen3i_fail(g->err, QWEN3_ERR_FORMAT,
                               "%s: key '%s' is %.17g; the vocabulary has %d tokens", g->file, keys[i], id,
                                   m->config.n_vocab);
        qwen3i_add_eos(m, (qwen3_token)id);
    }
    return r;
}

/* general.sampling.*: advice. What is not said is off, but for the temperature. */
static qwen3_result qwen3i_gguf_read_sampling(const qwen3i_gguf *g, qwen3_model *m) {
    static const char *const keys[] = {
        "general.sampling.temp", "general.sampling.top_p", "general.sampling.top_k",
                                       "general.sampling.min_p", "general.sampling.penalty_repeat"};
    double v[QWEN3I_COUNT(keys)] = {1, 1, 0, 0, 1};
    qwen3_result r = QWEN3_OK;
    int i, found, any = 0;
    for (i = 0; i < QWEN3I_COUNT(keys) && r == QWEN3_OK; i++) {
        r = qwen3i_gguf_get_number(g, keys[i], &v[i], &found);
        any |= found;
    }
    if (r == QWEN3_OK && any) qwen3i_advise(&m->info.sampler, v[0], v[1], v[2], v[3], v[4]);
    return r;
}

QWEN3I_COLD
static qwen3_result qwen3i_gguf_configuration(qwen3i_loader *l) {
    static const char *const value_length[2] = QWEN3I_GGUF_BOTH("attention.value_length");
    static const char *const rotated[2] = QWEN3I_GGUF_BOTH("rope.dimension_count");
    static const char *const pooling[2] = QWEN3I_GGUF_BOTH("pooling_type");
    const char *keys[QWEN3I_KEYS];
    qwen3_model *m = l->model;
    qwen3i_gguf *g = l->gguf;
    qwen3i_raw_config raw;
    qwen3i_str family;
    qwen3_result r = qwen3i_gguf_open(l);
    int i, mixture;
    if (r == QWEN3_OK) r = qwen3i_gguf_check_type(g);
    if (r == QWEN3_OK) r = qwen3i_gguf_get_string(g, "general.architecture", &family);
    if (r != QWEN3_OK) return r;
    for (i = 0; i < QWEN3I_KEYS; i++) keys[i] = NULL;
    qwen3i_config_begin(&raw, g->file, keys);
    snprintf(raw.family, sizeof raw.family, "%.*s", QWEN3I_STR(family));
    mixture = qwen3i_config_is_mixture(&raw);
    for (i = 0; i < QWEN3I_COUNT(qwen3i_gguf_keys); i++)
        keys[qwen3i_gguf_keys[i].key] = qwen3i_gguf_keys[i].name[mixture];
    keys[QWEN3I_KEY_FAMILY] = "general.architecture";
    r = qwen3i_gguf_read_config(g, &raw);
    if (r == QWEN3_OK) r = qwen3i_gguf_defaults(g, &raw);
    if (r == QWEN3_OK) r = qwen3i_config_check(&m->config, &raw, l->err);
    if (r == QWEN3_OK) r = qwen3i_gguf_check_width(g, value_length[mixture], m->config.head_dim);
    if (r == QWEN3_OK) r = qwen3i_gguf_check_width(g, rotated[mixture], m->config.head_dim);
    if (r == QWEN3_OK) r = qwen3i_gguf_read_pooling(g, pooling[mixture], m);
    if (r == QWEN3_OK) r = qwen3i_gguf_read_eos(g, m);
    return r == QWEN3_OK ? qwen3i_gguf_read_sampling(g, m) : r;
}

/* ---- weights: tensors, found by name and held against the shapes of the configuration -------- */
struct qwen3i_source {                  /* a layout of a model's files */
    /* what the names of a layer's weights start with, before its number */
    const char *layers;
    const char *names[QWEN3I_WEIGHTS];  /* in the order of qwen3i_tensor_id; NULL: there is no such weight */
    /* in messages: where the configuration is; NULL: in the first file of weights */
    const char *config_file;
    const char *layers_key[2];          /* in it: how many layers, of a dense model and of a mixture */
    qwen3_result (*configuration)(qwen3i_loader *l);
    qwen3_result (*tokenizer)(qwen3i_loader *l);
    qwen3_result (*list)(qwen3i_loader *l, qwen3i_tensors *out);
};

static const char *qwen3i_config_file(const qwen3i_loader *l) {
    return l->source->config_file ? l->source->config_file : l->model->shards[0].name;
}

#define QWEN3I_NAME 128                 /* bytes that hold any weight's name */

/* layer -1: of none */
static void qwen3i_weight_name(char *dst, const qwen3i_source *s, int layer, int weight) {
    const char *end = weight < QWEN3I_W_ALL_GATE_UP ? ".weight" : "";       /* or in the name, if at all */
    if (weight < QWEN3I_W_ATTN_NORM) snprintf(dst, QWEN3I_NAME, "%s.weight", s->names[weight]);
    else snprintf(dst, QWEN3I_NAME, "%s%d.%s%s", s->layers, layer, s->names[weight], end);
}

typedef struct qwen3i_binder {
    qwen3i_loader        *l;
    const qwen3i_tensors *tensors;
    /* what the names have in place of "model."; some wrappers put more before it */
    qwen3i_str            prefix;
    qwen3i_str            head;         /* the name of lm_head.weight; n 0: it is as it should be */
    uint64_t              n_params, n_bytes, fingerprint;
    int                   in_place;     /* matrices that stay where the file is */
    qwen3i_layer         *layer;        /* that is being bound */
    /* of the matrix that was bound last, as qwen3i_layer has it; and the g_idx that the last one came from */
    const int32_t        *order, *made_order;
    const unsigned char  *g_idx;
    int                   n_g_idx;
    const char           *part_file;    /* of the last tensor that belongs to a matrix in blocks */
    uint64_t              of_type[QWEN3I_N_TYPES];  /* elements of matrices */
} qwen3i_binder;

/* The one tensor whose name is this, or ends in it behind a dot; several: NULL, too */
static const qwen3i_tensor *qwen3i_find_suffix(const qwen3i_tensors *t, const char *suffix) {
    const qwen3i_tensor *found = qwen3i_find_tensor(t, qwen3i_str_of(suffix));
    const size_t n = strlen(suffix);
    size_t i, hits = 0;
    if (found) return found;
    for (i = 0; i < t->n; i++) {
        const qwen3i_str name = t->list[i].name;
        if (name.n <= n || name.p[name.n - n - 1] != '.' || !qwen3i_str_ends(name, suffix)) continue;
        found = &t->list[i];
        hits++;
    }
    return hits == 1 ? found : NULL;
}

/* The names of Hugging Face's layout begin with "model."; those of a model without a head with nothing, and
   those of one that is wrapped with more. Where the embedding tells which, that is taken. */
static void qwen3i_find_prefix(qwen3i_binder *b) {
    static const char embed[] = "embed_tokens.weight";
    const qwen3i_tensor *t;
    b->prefix = qwen3i_str_of("model.");
    if (qwen3i_find_tensor(b->tensors, qwen3i_str_of("model.embed_tokens.weight"))) return;
    t = qwen3i_find_suffix(b->tensors, embed);
    if (!t || t->name.n > QWEN3I_NAME / 2) return;
    b->prefix = t->name;
    b->prefix.n -= sizeof embed - 1;
    t = qwen3i_find_suffix(b->tensors, "lm_head.weight");
    if (t) b->head = t->name;
}

static const qwen3i_tensor *qwen3i_find_weight(const qwen3i_binder *b, const char *name) {
    char actual[2 * QWEN3I_NAME];
    qwen3i_str key = qwen3i_str_of(name);
    if (b->head.n && strcmp(name, "lm_head.weight") == 0) key = b->head;
    else if (strncmp(name, "model.", 6) == 0) {
        snprintf(actual, sizeof actual, "%.*s%s", (int)b->prefix.n, b->prefix.p, name + 6);
        key = qwen3i_str_of(actual);
    }
    return qwen3i_find_tensor(b->tensors, key);
}

/* A tensor is missing: of those that are there, the one whose name is most like it stands in the message. */
static qwen3_result qwen3i_missing_tensor(const qwen3i_binder *b, const char *name) {
    const char *file = b->l->model->shards[0].name;
    const qwen3i_tensor *t = b->tensors->list, *best = t;
    size_t i, k, most = 0, n = strlen(name);
    for (i = 0; i < b->tensors->n; i++) {
        const qwen3i_str has = t[i].name;
        for (k = 0; k < n && k < has.n && has.p[k] == name[k]; k++) { }
        if (k > most) { most = k; best = &t[i]; }
    }
    if (!b->tensors->n)
        return qwen3i_fail(b->l->err, QWEN3_ERR_FORMAT, "%s: tensor '%s' is missing", file, name);
    return qwen3i_fail(b->l->err, QWEN3_ERR_FORMAT,
                       "%s: tensor '%s' is missing; there is '%.*s', for example", file, name,
                       QWEN3I_STR(best->name));
}

static void qwen3i_shape_string(char *dst, size_t cap, const uint64_t *shape, int rank) {
    size_t at = 1;
    int i;
    snprintf(dst, cap, "[");
    for (i = 0; i < rank && at < cap; i++)
        at += (size_t)snprintf(dst + at, cap - at, i ? ", %llu" : "%llu", (unsigned long long)shape[i]);
    if (at < cap) snprintf(dst + at, cap - at, "]");
}

/* A float that is NaN or Inf has all exponent bits set: this holds under -ffast-math, too. */
static int qwen3i_numbers_finite(const void *data, qwen3i_type type, uint64_t n) {
    const uint32_t mask = type == QWEN3I_F32 ? 0x7F800000u : type == QWEN3I_F16 ? 0x7C00u : 0x7F80u;
    uint64_t i;
    int bad = 0;
    if (type == QWEN3I_F32) for (i = 0; i < n; i++) bad |= (((const uint32_t *)data)[i] & mask) == mask;
    else                    for (i = 0; i < n; i++) bad |= (((const uint16_t *)data)[i] & mask) == mask;
    return !bad;
}

static int qwen3i_all_finite(const qwen3i_matrix *w) {
    const qwen3i_format *f = qwen3i_format_of(w->type);
    const uint8_t *b = (const uint8_t *)w->data, *end = b + (size_t)w->rows * qwen3i_row_bytes(w->type,
            w->cols);
    float y[QWEN3I_MAX_BLOCK];
    int ok = 1;
    if (!f->unpack) return qwen3i_numbers_finite(w->data, w->type, (uint64_t)w->rows * (uint64_t)w->cols);
    for (; ok && b < end; b += f->bytes) {
        qwen3i_decode(y, b, w->type, f->elements);
        ok = qwen3i_numbers_finite(y, QWEN3I_F32, (uint64_t)f->elements);
    }
    return ok;
}

/* Data that is not aligned to its element is copied: the only weights that are. */
static const void *qwen3i_align_tensor(qwen3_model *m, const qwen3i_tensor *t, size_t element) {
    void *copy;
    if ((uintptr_t)t->data % element == 0) return t->data;
    copy = qwen3i_model_alloc(m, (size_t)(t->end - t->begin), 1);
    if (copy) memcpy(copy, t->data, (size_t)(t->end - t->begin));
    return copy;
}

/* NVFP4 in GGUF files may have a number that multiplies the whole matrix, which blocks have no room for. */
static int qwen3i_has_scale(const qwen3i_binder *b, const char *name) {
    char scale[QWEN3I_NAME];
    snprintf(scale, sizeof scale, "%.*sscale", (int)(strlen(name) - strlen("weight")), name);
    return qwen3i_find_tensor(b->tensors, qwen3i_str_of(scale)) != NULL;
}

/* The matrix has a format that the backend multiplies by, and its bytes are as many as that
   format asks for. */
static qwen3_result qwen3i_check_type(const qwen3i_binder *b, const qwen3i_tensor *t, const char *name,
                                      const qwen3i_matrix *w) {
    const qwen3_backend *backend = b->l->model->backend;
    uint64_t bytes;
    if (!w->type)
        return qwen3i_fail(b->l->err, QWEN3_ERR_UNSUPPORTED,
                           "%s: tensor '%s' has type %.*s, which is not supported",
                           t->file, name, QWEN3I_STR(t->dtype));
    if (qwen3i_is_block(w->type) && !backend->block_types)
        return qwen3i_fail(b->l->err, QWEN3_ERR_UNSUPPORTED,
                           "%s: tensor '%s' has type %.*s; the %s backend supports "
                           "F32, F16 and BF16", t->file, name, QWEN3I_STR(t->dtype), backend->name);
    if (w->type == QWEN3I_NVFP4 && qwen3i_has_scale(b, name))
        return qwen3i_fail(b->l->err, QWEN3_ERR_UNSUPPORTED,
                           "%s: tensor '%s' has type NVFP4 and a scale of its own, which is not "
                           "supported", t->file, name);
    if (w->cols % qwen3i_format_of(w->type)->elements != 0)
        return qwen3i_fail(b->l->err, QWEN3_ERR_FORMAT,
                           "%s: tensor '%s' has type %.*s, but rows of %d elements, no multiple of %d",
                           t->file, name, QWEN3I_STR(t->dtype), w->cols, qwen3i_format_of(w->type)->elements);
    bytes = qwen3i_size_mul((uint64_t)w->rows, qwen3i_row_bytes(w->type, w->cols));
    if (t->end - t->begin == bytes) return QWEN3_OK;
    return qwen3i_fail(b->l->err, QWEN3_ERR_FORMAT,
                       "%s: tensor '%s' needs %llu bytes for its shape but has %llu", t->file, name,
                       (unsigned long long)bytes, (unsigned long long)(t->end - t->begin));
}

/* fn over n items, on the threads that help with loading */
static qwen3_result qwen3i_load_parallel(qwen3i_loader *l, int n, int grain, qwen3i_loop_fn fn, void *arg) {
    if (!l->pool->n_lanes) {
        qwen3_ctx_desc d;
        qwen3_result r;
        memset(&d, 0, sizeof d);
        d.threads = l->desc->threads;
        r = qwen3i_pool_create(l->pool, &d, l->err);
        if (r != QWEN3_OK) { l->pool->n_lanes = 0; return r; }
    }
    const fenv_t callers = qwen3i_float_enter();
    qwen3i_parallel(l->pool, n, grain, fn, arg);
    qwen3i_float_leave(callers);
    return QWEN3_OK;
}

/* ---- quantised matrices of directories: several tensors become one matrix in blocks -----------
   FP8 in blocks as Qwen's own, AWQ (gemm), GPTQ, and compressed-tensors as vLLM and transformers read
   them. Here the fields of four or eight bits lie in words, along the input or the output; each group of
   inputs has a scale and a zero: w = scale * (field - zero). */
typedef struct qwen3i_packed {          /* [rows, cols] as a file has it; tensors by their data */
    int                  rows, cols, bits, group, n_groups;
    qwen3i_packing       packing;
    const unsigned char *words, *zeros, *scales;    /* zeros NULL: the middle of what a field holds */
    qwen3i_type          scale_type;
    int                  zero_offset;   /* what a stored zero lacks */
    const int32_t       *order;         /* input i of the blocks is the file's order[i]; NULL: i */
} qwen3i_packed;

static uint32_t qwen3i_word_at(const unsigned char *words, uint64_t i) {
    return (uint32_t)qwen3i_little(words + 4 * i, 4);
}

/* Field `at` of those that are packed along a line of words, the first of them in the lowest bits */
static unsigned qwen3i_field(const unsigned char *words, uint64_t line, int bits, int at) {
    const int per_word = 32 / bits;
    return qwen3i_word_at(words, line + (uint64_t)(at / per_word)) >> bits * (at % per_word) &
           ((1u << bits) - 1);
}

/* AWQ: the columns of a word lie in the order 0 2 4 6 1 3 5 7. */
static unsigned qwen3i_field_awq(const unsigned char *words, uint64_t line, int at) {
    static const int nibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    return qwen3i_word_at(words, line + (uint64_t)(at / 8)) >> 4 * nibble[at % 8] & 15;
}

static unsigned qwen3i_packed_field(const qwen3i_packed *p, int row, int col) {
    const int per_word = 32 / p->bits;
    if (p->packing == QWEN3I_AWQ)
        return qwen3i_field_awq(p->words, (uint64_t)col * (uint64_t)(p->rows / 8), row);
    /* along the input, in the columns of a matrix [cols / per_word, rows] */
    if (p->packing == QWEN3I_GPTQ)
        return qwen3i_word_at(p->words, (uint64_t)(col / per_word) * (uint64_t)p->rows +
                              (uint64_t)row) >> p->bits * (col % per_word)
               & ((1u << p->bits) - 1);
    return qwen3i_field(p->words, (uint64_t)row * (uint64_t)((p->cols + per_word - 1) / per_word), p->bits,
                        col);
}

static int qwen3i_group_zero(const qwen3i_packed *p, int row, int group) {
    const int per_word = 32 / p->bits;
    if (!p->zeros) return 1 << (p->bits - 1);
    if (p->packing == QWEN3I_AWQ)
        return (int)qwen3i_field_awq(p->zeros, (uint64_t)group * (uint64_t)(p->rows / 8), row);
    if (p->packing == QWEN3I_GPTQ)
        return (int)((qwen3i_field(p->zeros, (uint64_t)group * (uint64_t)(p->rows / per_word), p->bits,
                                   row) + (unsigned)p->zero_offset)
                     & ((1u << p->bits) - 1));
    return (int)(qwen3i_word_at(p->zeros, (uint64_t)(row / per_word) * (uint64_t)p->n_groups +
                                (uint64_t)group)
                 >> p->bits * (row % per_word) & ((1u << p->bits) - 1));
}

static float qwen3i_group_scale(const qwen3i_packed *p, int row, int group) {
    uint64_t at = p->packing == QWEN3I_PACKED ? (uint64_t)row * (uint64_t)p->n_groups + (uint64_t)group
                                              : (uint64_t)group * (uint64_t)p->rows + (uint64_t)row;
    uint16_t h = (uint16_t)qwen3i_little(p->scales + 2 * at, 2);
    return p->scale_type == QWEN3I_F16 ? qwen3i_f16_to_f32(h) : qwen3i_bf16_to_f32(h);
}

/* Elements from, from + 1, ... of a row, all of one group, into a block; what a row lacks is never used. */
static void qwen3i_pack_block(uint8_t *b, const qwen3i_packed *p, const qwen3i_format *f, int row, int from) {
    const int group = from / p->group;
    const uint32_t word = qwen3i_bits_from_float(qwen3i_group_scale(p, row, group)) |
                          (uint32_t)qwen3i_group_zero(p, row, group);
    memcpy(b, &word, 4);
    memset(b + 4, 0, (size_t)f->bytes - 4);
    for (int e = 0; e < f->elements && from + e < p->cols; e++) {
        const unsigned q = qwen3i_packed_field(p, row, p->order ? p->order[from + e] : from + e);
        if (p->bits == 8) b[4 + e] = (uint8_t)(q ^ 128);
        else b[4 + e / 32 * 16 + e % 16] = (uint8_t)(b[4 + e / 32 * 16 + e % 16] | q << e % 32 / 16 * 4);
    }
}

/* Room for a matrix in blocks, whose type, rows and columns are set. */
static uint8_t *qwen3i_repacked(qwen3i_binder *b, const char *name, qwen3i_matrix *out, qwen3_result *r) {
    uint64_t bytes = qwen3i_size_mul((uint64_t)out->rows, qwen3i_row_bytes(out->type, out->cols));
    uint8_t *data = qwen3i_size_fits(bytes) ? (uint8_t *)qwen3i_model_alloc(b->l->model, (size_t)bytes, 1) :
                    NULL;
    if (!data) *r = qwen3i_no_memory(b->l->err, name, bytes);
    out->data = data;
    b->n_bytes += data ? bytes : 0;
    return data;
}

typedef struct qwen3i_repack_args {
    const qwen3i_packed *p;
    const qwen3i_format *f;
    uint8_t             *data;
} qwen3i_repack_args;

/* 16 rows at a time, because words that lie along the output hold several. */
static void qwen3i_repack_rows(void *args, int begin, int end, int lane) {
    const qwen3i_repack_args *a = (const qwen3i_repack_args *)args;
    const int blocks = (a->p->cols + a->f->elements - 1) / a->f->elements;
    (void)lane;
    for (int first = begin; first < end; first += 16)
        for (int c = 0; c < blocks; c++)
            for (int row = first; row < end && row < first + 16; row++)
                qwen3i_pack_block(a->data + ((size_t)row * (size_t)blocks + (size_t)c) * (size_t)a->f->bytes,
                                  a->p,
                                  a->f, row, c * a->f->elements);
}

static qwen3_result qwen3i_repack(qwen3i_binder *b, const char *name, const qwen3i_packed *p,
                                  qwen3i_matrix *out) {
    qwen3i_repack_args a;
    qwen3_result r = QWEN3_OK;
    out->type = p->bits == 8 ? QWEN3I_INT8 : p->group % 128 == 0 || p->group >= p->cols ? QWEN3I_INT4 :
                QWEN3I_INT4S;
    a.p = p;
    a.f = qwen3i_format_of(out->type);
    a.data = qwen3i_repacked(b, name, out, &r);
    return r == QWEN3_OK ? qwen3i_load_parallel(b->l, p->rows, 64, qwen3i_repack_rows, &a) : r;
}

/* A tensor that belongs to a matrix, of the dtypes that are listed ("I32", "F16 BF16") and of shape [d0, d1],
   or [d0] if d1 is -1. NULL: it is missing, and *r the failure unless it is optional; or it is not as it
   should be. */
static const qwen3i_tensor *qwen3i_part(qwen3i_binder *b, const char *name, const char *part,
                                        const char *dtypes, int64_t d0, int64_t d1, int optional,
                                            qwen3_result *r) {
    const uint64_t want[2] = {(uint64_t)d0, (uint64_t)d1};
    const int rank = d1 < 0 ? 1 : 2;
    char full[QWEN3I_NAME + 32], has[128], needs[64], dtype[16];
    if (*r != QWEN3_OK) return NULL;
    snprintf(full, sizeof full, "%.*s%s", (int)(strlen(name) - strlen("weight")), name, part);
    const qwen3i_tensor *t = qwen3i_find_weight(b, full);
    if (!t && optional) return NULL;
    if (!t) {
        *r = qwen3i_fail(b->l->err, QWEN3_ERR_FORMAT, "%s: tensor '%s' is missing",
                         b->l->model->shards[0].name, full);
        return NULL;
    }
    snprintf(dtype, sizeof dtype, "%.*s", QWEN3I_STR(t->dtype));
    if (!strstr(dtypes, dtype) || !qwen3i_dtype_size(t->dtype))
        *r = qwen3i_fail(b->l->err, QWEN3_ERR_UNSUPPORTED, "%s: tensor '%s' has dtype %s; supported: %s",
                         t->file, full, dtype, dtypes);
    else if (t->rank != rank || memcmp(t->shape, want, (size_t)rank * sizeof *want) != 0) {
        qwen3i_shape_string(has, sizeof has, t->shape, t->rank);
        qwen3i_shape_string(needs, sizeof needs, want, rank);
        *r = qwen3i_fail(b->l->err, QWEN3_ERR_FORMAT, "%s: tensor '%s' has shape %s, not %s", t->file, full,
                         has, needs);
    }
    if (*r != QWEN3_OK) return NULL;
    b->part_file = t->file;
    b->fingerprint = qwen3i_hash(b->fingerprint, t->data + (t->end - t->begin) / 2,
                                 qwen3i_min_size(64, (size_t)((t->end - t->begin + 1) / 2)));
    return t;
}

/* The order in which the inputs of each group follow each other; each group must be full. */
static qwen3_result qwen3i_make_order(qwen3i_binder *b, const qwen3i_tensor *t, const char *name,
                                      const qwen3i_packed *p) {
    const uint64_t n = (uint64_t)p->cols + (uint64_t)p->n_groups;
    int32_t *order = (int32_t *)qwen3i_model_alloc(b->l->model, (size_t)n, sizeof *order), *filled;
    if (!order) return qwen3i_no_memory(b->l->err, name, n * sizeof *order);
    filled = order + p->cols;           /* [n_groups] */
    memset(filled, 0, (size_t)p->n_groups * sizeof *filled);
    for (int i = 0; i < p->cols; i++) {
        const uint32_t group = qwen3i_word_at(t->data, (uint64_t)i);
        if (group >= (uint32_t)p->n_groups || filled[group] == p->group)
            return qwen3i_fail(b->l->err, QWEN3_ERR_FORMAT,
                               "%s: tensor '%.*s' puts input %d into group %lu, but there are %d groups "
                               "of %d",
                               t->file, QWEN3I_STR(t->name), i, (unsigned long)group, p->n_groups, p->group);
        order[group * (uint32_t)p->group + (uint32_t)filled[group]++] = i;
    }
    b->made_order = order;
    b->g_idx = t->data;
    b->n_g_idx = p->cols;
    return QWEN3_OK;
}

/* Where inputs do not lie in order of their groups, the matrix' columns are put in that order, and
   activations must follow. Matrices with the same inputs usually have the same g_idx, and then one order. */
static qwen3_result qwen3i_find_order(qwen3i_binder *b, const char *name, const char *part,
                                      qwen3i_packed *p) {
    qwen3_result r = QWEN3_OK;
    const qwen3i_tensor *t = qwen3i_part(b, name, part, "I32", p->cols, -1, 1, &r);
    int i = 0;
    while (t && i < p->cols && qwen3i_word_at(t->data, (uint64_t)i) == (uint32_t)(i / p->group)) i++;
    if (!t || i == p->cols) return r;
    if (!b->l->model->backend->orders)
        return qwen3i_fail(b->l->err, QWEN3_ERR_UNSUPPORTED,
                           "%s: '%s': the inputs are in order of activation (%s), which the %s backend "
                           "does not support", t->file, name, part, b->l->model->backend->name);
    if (b->n_g_idx != p->cols || memcmp(b->g_idx, t->data, 4 * (size_t)p->cols) != 0)
        r = qwen3i_make_order(b, t, name, p);
    b->order = p->order = b->made_order;
    return r;
}

/* Groups and fields must fit the matrix, and a block into a group. */
static qwen3_result qwen3i_check_groups(qwen3i_binder *b, const char *name, qwen3i_packed *p, int group) {
    p->group = group > 0 && group < p->cols ? group : p->cols;
    p->n_groups = (p->cols + p->group - 1) / p->group;
    if ((p->bits != 4 && p->bits != 8) || (p->packing == QWEN3I_AWQ && p->bits != 4))
        return qwen3i_fail(b->l->err, QWEN3_ERR_UNSUPPORTED,
                           "config.json: quantization_config: weights of %d bits are not supported", p->bits);
    if (p->n_groups > 1 && p->group % (p->bits == 8 ? 128 : 32) != 0)
        return qwen3i_fail(b->l->err, QWEN3_ERR_UNSUPPORTED,
                           "config.json: quantization_config: groups of %d inputs of %d bits are not "
                           "supported", p->group, p->bits);
    if (p->cols % p->group == 0 && p->cols % (32 / p->bits) == 0 && p->rows % (32 / p->bits) == 0)
        return QWEN3_OK;
    return qwen3i_fail(b->l->err, QWEN3_ERR_FORMAT,
                       "config.json: quantization_config: '%s': [%d, %d] does not consist of whole groups "
                       "of %d and whole words", name, p->rows, p->cols, p->group);
}

static qwen3_result qwen3i_bind_packed(qwen3i_binder *b, const char *name, qwen3i_matrix *out) {
    const qwen3i_quantization *q = &b->l->model->quantization;
    const int ct = q->packing == QWEN3I_PACKED;
    qwen3i_packed p;
    memset(&p, 0, sizeof p);
    p.rows = out->rows; p.cols = out->cols; p.packing = q->packing; p.bits = q->bits;
    p.zero_offset = q->packing == QWEN3I_GPTQ && !q->v2;
    qwen3_result r = qwen3i_check_groups(b, name, &p, q->group);
    if (r != QWEN3_OK) return r;
    const int per_word = 32 / p.bits, n = p.n_groups;
    const qwen3i_tensor *words = ct ? qwen3i_part(b, name, "weight_packed", "I32", p.rows, p.cols / per_word,
                                                  0, &r) :
        q->packing == QWEN3I_AWQ ? qwen3i_part(b, name, "qweight", "I32", p.cols, p.rows / 8, 0, &r) :
                                   qwen3i_part(b, name, "qweight", "I32", p.cols / per_word, p.rows, 0, &r);
    const qwen3i_tensor *zeros = ct ? qwen3i_part(b, name, "weight_zero_point", "I32", p.rows / per_word, n,
                                                  1, &r) :
                                      qwen3i_part(b, name, "qzeros", "I32", n, p.rows / per_word, 0, &r);
    const qwen3i_tensor *scales = qwen3i_part(b, name, ct ? "weight_scale" : "scales", "F16 BF16",
                                              ct ? p.rows : n, ct ? n : p.rows, 0, &r);
    if (r == QWEN3_OK) r = qwen3i_find_order(b, name, ct ? "weight_g_idx" : "g_idx", &p);
    if (r != QWEN3_OK) return r;
    p.words = words->data;
    p.zeros = zeros ? zeros->data : NULL;
    p.scales = scales->data;
    p.scale_type = qwen3i_type_of(scales->dtype);
    return qwen3i_repack(b, name, &p, out);
}

typedef struct qwen3i_fp8_args {
    const qwen3i_tensor *t, *scales;
    const qwen3i_matrix *out;
    int      block_rows, block_cols;    /* that have one scale */
    uint8_t *data;
    int      nan[QWEN3I_MAX_LANES];     /* a lane has met one */
} qwen3i_fp8_args;

static float qwen3i_fp8_scale(const qwen3i_fp8_args *a, int row, int col) {
    const size_t element = qwen3i_dtype_size(a->scales->dtype);
    const size_t across = ((size_t)a->out->cols + (size_t)a->block_cols - 1) / (size_t)a->block_cols;
    const size_t at = (size_t)(row / a->block_rows) * across + (size_t)(col / a->block_cols);
    unsigned char number[4];
    memcpy(number, a->scales->data + element * at, element);
    if (element == 4) return qwen3i_float_from_bits((uint32_t)qwen3i_little(number, 4));
    return qwen3i_type_of(a->scales->dtype) == QWEN3I_F16 ? qwen3i_half_at(number) :
           qwen3i_bf16_to_f32((uint16_t)qwen3i_little(number, 2));
}

static void qwen3i_fp8_rows(void *args, int begin, int end, int lane) {
    qwen3i_fp8_args *a = (qwen3i_fp8_args *)args;
    const int cols = a->out->cols;
    uint8_t *to = a->data + (size_t)begin * (size_t)qwen3i_row_bytes(QWEN3I_FP8, cols);
    for (int row = begin; row < end; row++) for (int c = 0; c < cols; c += 128, to += 132) {
        const unsigned char *from = a->t->data + (size_t)row * (size_t)cols + (size_t)c;
        const float scale = qwen3i_fp8_scale(a, row, c);
        const int n = qwen3i_min(128, cols - c);
        memcpy(to, &scale, 4);
        memset(to + 4, 0, 128);
        memcpy(to + 4, from, (size_t)n);
        for (int i = 0; i < n; i++) a->nan[lane] |= (from[i] & 0x7F) == 0x7F;
    }
}

/* FP8: scales of blocks (multiplied, whatever the name says), of rows, or of the whole */
static qwen3_result qwen3i_bind_fp8(qwen3i_binder *b, const char *name, const qwen3i_tensor *t,
                                    qwen3i_matrix *out) {
    const qwen3i_quantization *q = &b->l->model->quantization;
    qwen3i_fp8_args a;
    qwen3_result r = QWEN3_OK;
    int rows = q->block[0], cols = q->block[1], nan = 0;
    memset(&a, 0, sizeof a);
    a.t = t;
    a.out = out;
    a.scales = qwen3i_part(b, name, "weight_scale_inv", "F32 F16 BF16", (out->rows + rows - 1) / rows,
                           (out->cols + cols - 1) / cols, 1, &r);
    if (r == QWEN3_OK && !a.scales) {   /* compressed-tensors */
        cols = out->cols;
        rows = q->per_tensor ? out->rows : 1;
        a.scales = q->per_tensor ? qwen3i_part(b, name, "weight_scale", "F32 F16 BF16", 1, -1, 0, &r)
                                 : qwen3i_part(b, name, "weight_scale", "F32 F16 BF16", out->rows, 1, 0, &r);
    }
    if (r != QWEN3_OK) return r;
    if (cols < out->cols && cols % 128 != 0)
        return qwen3i_fail(b->l->err, QWEN3_ERR_UNSUPPORTED,
                           "config.json: quantization_config: blocks of %d inputs are not supported", cols);
    out->type = QWEN3I_FP8;
    a.block_rows = rows;
    a.block_cols = cols;
    a.data = qwen3i_repacked(b, name, out, &r);
    if (r == QWEN3_OK) r = qwen3i_load_parallel(b->l, out->rows, 64, qwen3i_fp8_rows, &a);
    for (int i = 0; i < QWEN3I_MAX_LANES; i++) nan |= a.nan[i];
    if (r == QWEN3_OK && nan)
        r = qwen3i_fail(b->l->err, QWEN3_ERR_FORMAT, "%s: tensor '%s' contains NaN", t->file, name);
    return r;
}

/* 1: the matrix is quantised, and *r says how binding it went. */
static int qwen3i_bind_quantised(qwen3i_binder *b, const char *name, const qwen3i_tensor *t,
                                 qwen3i_matrix *out, qwen3_result *r) {
    const qwen3i_packing packing = b->l->model->quantization.packing;
    const int fp8 = t && qwen3i_json_is(t->dtype, "F8_E4M3") && packing == QWEN3I_FLOAT8;
    if (fp8 ? t->rank != 2 || t->shape[0] != (uint64_t)out->rows || t->shape[1] != (uint64_t)out->cols : t ||
        packing < QWEN3I_AWQ) return 0;
    if (!b->l->model->backend->block_types)
        *r = qwen3i_fail(b->l->err, QWEN3_ERR_UNSUPPORTED,
                         "config.json: quantization_config: '%s' is quantised; the %s backend supports "
                         "F32, F16 and BF16", name, b->l->model->backend->name);
    else *r = fp8 ? qwen3i_bind_fp8(b, name, t, out) : qwen3i_bind_packed(b, name, out);
    if (*r == QWEN3_OK && (b->l->desc->flags & QWEN3_LOAD_CHECK) && !qwen3i_all_finite(out))
        *r = qwen3i_fail(b->l->err, QWEN3_ERR_FORMAT, "%s: '%s' contains NaN or Inf", b->part_file, name);
    b->n_params += (uint64_t)out->rows * (uint64_t)out->cols;
    return 1;
}

/* Find a tensor of shape [stack, rows, cols], as a matrix of stack * rows rows; stack 0: [rows, cols]; rows
   0, too: [cols] */
static qwen3_result qwen3i_bind_stack(qwen3i_binder *b, const char *name, int stack, int rows, int cols,
                                      qwen3i_matrix *out) {
    const qwen3i_err *err = b->l->err;
    const qwen3i_tensor *t = qwen3i_find_weight(b, name);
    const int dims[3] = {stack, rows, cols};
    uint64_t want[3], n = 1;
    int rank = 0, same, i;
    char has[128], needs[64];
    qwen3_result r;
    b->order = NULL;
    for (i = 0; i < 3; i++) if (dims[i]) { want[rank++] = (uint64_t)dims[i]; n *= (uint64_t)dims[i]; }
    if (n / (uint64_t)cols > INT_MAX)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "tensor '%s' is too large", name);
    out->rows = (int)(n / (uint64_t)cols);
    out->cols = cols;
    if (rows && b->l->model->quantization.packing && qwen3i_bind_quantised(b, name, t, out, &r)) return r;
    if (!t) return qwen3i_missing_tensor(b, name);
    out->type = qwen3i_type_of(t->dtype);
    /* before the shape, which packing changes */
    if (!out->type) return qwen3i_check_type(b, t, name, out);
    same = t->rank == rank && memcmp(t->shape, want, (size_t)rank * sizeof want[0]) == 0;
    if (!same) {
        qwen3i_shape_string(has, sizeof has, t->shape, t->rank);
        qwen3i_shape_string(needs, sizeof needs, want, rank);
        return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: tensor '%s' has shape %s; %s asks for %s", t->file,
                           name, has,
                           qwen3i_config_file(b->l), needs);
    }
    r = qwen3i_check_type(b, t, name, out);
    if (r != QWEN3_OK) return r;
    out->data = qwen3i_align_tensor(b->l->model, t,
                                    qwen3i_is_block(out->type) ? 1 : qwen3i_type_size(out->type));
    if (!out->data) return qwen3i_no_memory(err, name, t->end - t->begin);
    if ((b->l->desc->flags & QWEN3_LOAD_CHECK) && !qwen3i_all_finite(out))
        return qwen3i_fail(err, QWEN3_ERR_FORMAT, "%s: tensor '%s' contains NaN or Inf", t->file, name);
    b->n_params += n;
    b->n_bytes += t->end - t->begin;
    /* 64 bytes from the middle of each tensor tell checkpoints of one shape apart */
    b->fingerprint = qwen3i_hash(b->fingerprint + (uint64_t)out->type, t->data + (t->end - t->begin) / 2,
                                 qwen3i_min_size(64, (size_t)((t->end - t->begin + 1) / 2)));
    return QWEN3_OK;
}

/* Find a tensor of shape [rows, cols], or [cols] if rows is 0. */
static qwen3_result qwen3i_bind_tensor(qwen3i_binder *b, const char *name, int rows, int cols,
                                       qwen3i_matrix *out) {
    return qwen3i_bind_stack(b, name, 0, rows, cols, out);
}

typedef struct qwen3i_shrink_args {
    const char *from;
    uint8_t    *to;
    qwen3i_type from_type, to_type;
    int         cols;
} qwen3i_shrink_args;

static void qwen3i_shrink_rows(void *args, int begin, int end, int lane) {
    const qwen3i_shrink_args *a = (const qwen3i_shrink_args *)args;
    (void)lane;
    for (int i = begin; i < end; i++)
        qwen3i_quantize(a->to + (size_t)i * (size_t)qwen3i_row_bytes(a->to_type, a->cols), a->to_type,
                        a->from + (size_t)i * (size_t)qwen3i_row_bytes(a->from_type, a->cols),
                        a->from_type, a->cols);
}

/* Numbers to blocks of this type, in memory of the model's own. Between slices the caller may stop it. */
static qwen3_result qwen3i_shrink(qwen3i_binder *b, const char *name, int layer, qwen3i_type type,
                                  qwen3i_matrix *w) {
    const uint64_t from_row = qwen3i_row_bytes(w->type, w->cols), to_row = qwen3i_row_bytes(type, w->cols);
    const double at = layer < 0 ? 0 : (double)layer / b->l->model->config.n_layer;
    qwen3i_shrink_args a;
    qwen3_result r = QWEN3_OK;
    uint8_t *data = (uint8_t *)qwen3i_model_alloc(b->l->model, (size_t)w->rows, (size_t)to_row);
    if (!data) return qwen3i_no_memory(b->l->err, name, (uint64_t)w->rows * to_row);
    a.from_type = w->type; a.to_type = type; a.cols = w->cols;
    for (int first = 0, n; first < w->rows && r == QWEN3_OK; first += n) {
        n = qwen3i_min(w->rows - first, 1024);
        a.from = (const char *)w->data + (size_t)first * (size_t)from_row;
        a.to = data + (size_t)first * (size_t)to_row;
        r = qwen3i_load_parallel(b->l, n, 8, qwen3i_shrink_rows, &a);
        if (r == QWEN3_OK) r = qwen3i_progress(b->l, at);
    }
    w->data = data;
    w->type = type;
    b->n_bytes -= (uint64_t)w->rows * (from_row - to_row);
    b->fingerprint = qwen3i_hash(b->fingerprint + (uint64_t)type, data, (size_t)to_row);
    return r;
}

/* Where the order of this weight's inputs stands; NULL: no order is possible. */
static const int32_t **qwen3i_order_of(qwen3i_layer *w, int weight) {
    switch (w ? weight : QWEN3I_W_EMBED) {
        case QWEN3I_W_Q: case QWEN3I_W_K: case QWEN3I_W_V: case QWEN3I_W_QKV: return &w->qkv_order;
        case QWEN3I_W_O: return &w->o_order;
        case QWEN3I_W_GATE: case QWEN3I_W_UP: return &w->mlp_order;
        case QWEN3I_W_DOWN: return &w->down_order;
        default: return NULL;
    }
}

/* Matrices with the same inputs must have one order, which the first of them tells. */
static qwen3_result qwen3i_bind_order(qwen3i_binder *b, const char *name, int weight) {
    const int32_t **order = qwen3i_order_of(b->layer, weight);
    if (order && weight != QWEN3I_W_K && weight != QWEN3I_W_V && weight != QWEN3I_W_UP) *order = b->order;
    b->l->model->config.ordered |= b->order != NULL;
    if (b->order == (order ? *order : NULL)) return QWEN3_OK;
    return qwen3i_fail(b->l->err, QWEN3_ERR_UNSUPPORTED,
                       "%s: '%s': its inputs are in an order of activation (g_idx) of its own, "
                       "which is not supported", b->part_file, name);
}

/* A matrix that was found stays where it is, or becomes one in blocks if the caller wants them. */
static qwen3_result qwen3i_settle(qwen3i_binder *b, const char *name, int layer, int weight,
                                  qwen3i_matrix *w) {
    const qwen3i_type type = qwen3i_mix_type((qwen3i_mix)b->l->desc->quantize, weight, layer,
                                             &b->l->model->config, w->cols);
    qwen3_result r = QWEN3_OK;
    if (!type || qwen3i_is_block(w->type)) b->in_place++;
    else r = qwen3i_shrink(b, name, layer, type, w);
    b->of_type[w->type] += (uint64_t)w->rows * (uint64_t)w->cols;
    return r;
}

/* layer -1: of none */
static qwen3_result qwen3i_bind(qwen3i_binder *b, int layer, int weight, int rows, int cols,
                                qwen3i_matrix *out) {
    char name[QWEN3I_NAME];
    qwen3_result r;
    qwen3i_weight_name(name, b->l->source, layer, weight);
    r = qwen3i_bind_tensor(b, name, rows, cols, out);
    if (r == QWEN3_OK) r = qwen3i_bind_order(b, name, weight);
    return r == QWEN3_OK ? qwen3i_settle(b, name, layer, weight, out) : r;
}

/* A small tensor as float32: then every kernel reads one type. rows 0: of one dimension */
static qwen3_result qwen3i_bind_floats(qwen3i_binder *b, int layer, int weight, int rows, int cols,
                                       const float **out) {
    const int n = (rows ? rows : 1) * cols;
    qwen3i_matrix t;
    float *values;
    int i;
    char name[QWEN3I_NAME];
    qwen3_result r;
    qwen3i_weight_name(name, b->l->source, layer, weight);
    r = qwen3i_bind_tensor(b, name, rows, cols, &t);
    if (r != QWEN3_OK) return r;
    values = (float *)qwen3i_model_alloc(b->l->model, (size_t)n, sizeof *values);
    if (!values) return qwen3i_no_memory(b->l->err, name, (uint64_t)n * sizeof *values);
    for (i = 0; i < t.rows; i++)
        qwen3i_decode(values + (size_t)i * (size_t)cols,
                      (const char *)t.data + (size_t)i * (size_t)qwen3i_row_bytes(t.type, cols), t.type,
                          cols);
    *out = values;
    return QWEN3_OK;
}

/* Some of a matrix' rows */
static qwen3i_matrix qwen3i_rows_of(const qwen3i_matrix *whole, int first, int rows) {
    qwen3i_matrix m = *whole;
    m.data = (const char *)whole->data + (size_t)first * (size_t)qwen3i_row_bytes(whole->type, whole->cols);
    m.rows = rows;
    return m;
}

/* Queries, keys and values of a layer are three matrices, or, in some files, the rows of one. */
static qwen3_result qwen3i_bind_qkv(qwen3i_binder *b, int index, qwen3i_layer *w) {
    const qwen3i_config *cfg = &b->l->model->config;
    const qwen3i_source *s = b->l->source;
    const int q_dim = cfg->n_head * cfg->head_dim, kv_dim = cfg->n_head_kv * cfg->head_dim;
    qwen3i_matrix *const parts[3] = {&w->wq, &w->wk, &w->wv};
    qwen3i_matrix whole;
    char name[QWEN3I_NAME];
    qwen3_result r = QWEN3_OK;
    int i;
    if (s->names[QWEN3I_W_QKV]) {
        qwen3i_weight_name(name, s, index, QWEN3I_W_QKV);
        if (qwen3i_find_tensor(b->tensors, qwen3i_str_of(name))) {
            r = qwen3i_bind(b, index, QWEN3I_W_QKV, q_dim + 2 * kv_dim, cfg->n_embd, &whole);
            if (r != QWEN3_OK) return r;
            for (i = 0; i < 3; i++)
                *parts[i] = qwen3i_rows_of(&whole, i ? q_dim + (i - 1) * kv_dim : 0, i ? kv_dim : q_dim);
            return QWEN3_OK;
        }
    }
    for (i = 0; i < 3 && r == QWEN3_OK; i++)
        r = qwen3i_bind(b, index, QWEN3I_W_Q + i, i ? kv_dim : q_dim, cfg->n_embd, parts[i]);
    return r;
}

typedef struct qwen3i_binding {         /* one tensor of a layer: a matrix, or gains if rows is 0 */
    qwen3i_tensor_id weight;
    int            rows, cols;
    qwen3i_matrix *matrix;
    const float  **gains;
} qwen3i_binding;

static qwen3i_binding qwen3i_binding_of(qwen3i_tensor_id weight, int rows, int cols, qwen3i_matrix *matrix,
                                        const float **gains) {
    qwen3i_binding b;
    b.weight = weight; b.rows = rows; b.cols = cols; b.matrix = matrix; b.gains = gains;
    return b;
}

/* ---- experts: three tensors each, "mlp.experts.7.gate_proj.weight", or all in two or three ---- */
/* No order of inputs is possible: experts share theirs. stack 0: one matrix */
static qwen3_result qwen3i_bind_expert(qwen3i_binder *b, const char *name, int layer, int weight, int stack,
                                       int rows, int cols, qwen3i_matrix *out) {
    qwen3_result r = qwen3i_bind_stack(b, name, stack, rows, cols, out);
    if (r == QWEN3_OK) r = qwen3i_bind_order(b, name, QWEN3I_W_EMBED);
    return r == QWEN3_OK ? qwen3i_settle(b, name, layer, weight, out) : r;
}

static qwen3_result qwen3i_bind_each_expert(qwen3i_binder *b, int layer, qwen3i_matrix *list) {
    static const char *const parts[3] = {"gate", "up", "down"};
    const qwen3i_config *cfg = &b->l->model->config;
    char name[QWEN3I_NAME];
    qwen3_result r = QWEN3_OK;
    int i, k;
    if ((size_t)cfg->n_expert > b->tensors->n / 3)
        return qwen3i_fail(b->l->err, QWEN3_ERR_FORMAT,
                           "%s: num_experts is %d, but the files hold only %lu tensors",
                           qwen3i_config_file(b->l), cfg->n_expert, (unsigned long)b->tensors->n);
    for (i = 0; i < cfg->n_expert && r == QWEN3_OK; i++)
        for (k = 0; k < 3 && r == QWEN3_OK; k++) {
            snprintf(name, sizeof name, "model.layers.%d.mlp.experts.%d.%s_proj.weight", layer, i, parts[k]);
            r = qwen3i_bind_expert(b, name, layer, QWEN3I_W_GATE + k, 0,
                                   k < 2 ? cfg->n_ff_expert : cfg->n_embd,
                                   k < 2 ? cfg->n_embd : cfg->n_ff_expert, &list[k * cfg->n_expert + i]);
        }
    return r;
}

/* One of the tensors that hold a matrix of each expert, or, of gate and up in one, two: into lists of n, of
   which the second follows the first. */
static qwen3_result qwen3i_bind_all_experts(qwen3i_binder *b, int layer, int weight, qwen3i_matrix *list) {
    const qwen3i_config *cfg = &b->l->model->config;
    const int n = cfg->n_expert, two = weight == QWEN3I_W_ALL_GATE_UP, down = weight == QWEN3I_W_ALL_DOWN;
    const int rows = down ? cfg->n_embd : cfg->n_ff_expert, cols = down ? cfg->n_ff_expert : cfg->n_embd;
    char name[QWEN3I_NAME];
    qwen3i_matrix all;
    qwen3_result r;
    int i;
    qwen3i_weight_name(name, b->l->source, layer, weight);
    r = qwen3i_bind_expert(b, name, layer, down ? QWEN3I_W_DOWN : QWEN3I_W_GATE, n, (1 + two) * rows, cols,
                           &all);
    for (i = 0; i < (1 + two) * n && r == QWEN3_OK; i++)
        list[two ? i % 2 * n + i / 2 : i] = qwen3i_rows_of(&all, i * rows, rows);
    return r;
}

/* The router is multiplied in float32, whatever the others are: from blocks it is unpacked. Where a caller
   wants blocks, the files are let go of, so it is copied. */
static qwen3_result qwen3i_bind_router(qwen3i_binder *b, int layer, qwen3i_matrix *router) {
    const qwen3i_config *cfg = &b->l->model->config;
    const size_t n_embd = (size_t)cfg->n_embd;
    char name[QWEN3I_NAME];
    qwen3_result r;
    float *copy;
    size_t i;
    qwen3i_weight_name(name, b->l->source, layer, QWEN3I_W_ROUTER);
    r = qwen3i_bind_tensor(b, name, cfg->n_expert, cfg->n_embd, router);
    if (r == QWEN3_OK) r = qwen3i_bind_order(b, name, QWEN3I_W_EMBED);
    if (r != QWEN3_OK) return r;
    if (!b->l->desc->quantize && !qwen3i_is_block(router->type)) { b->in_place++; return QWEN3_OK; }
    copy = (float *)qwen3i_model_alloc(b->l->model, (size_t)cfg->n_expert * n_embd, sizeof *copy);
    if (!copy) return qwen3i_no_memory(b->l->err, name, (uint64_t)cfg->n_expert * n_embd * sizeof *copy);
    for (i = 0; i < (size_t)cfg->n_expert; i++)
        qwen3i_decode(copy + i * n_embd,
                      (const char *)router->data + i * (size_t)qwen3i_row_bytes(router->type, cfg->n_embd),
                      router->type, cfg->n_embd);
    router->data = copy;
    router->type = QWEN3I_F32;
    return QWEN3_OK;
}

/* Has the layer such a tensor? */
static int qwen3i_has_weight(const qwen3i_binder *b, int layer, int weight) {
    char name[QWEN3I_NAME];
    if (!b->l->source->names[weight]) return 0;
    qwen3i_weight_name(name, b->l->source, layer, weight);
    return qwen3i_find_weight(b, name) != NULL;
}

static qwen3_result qwen3i_bind_experts(qwen3i_binder *b, int layer, qwen3i_layer *w) {
    const int n = b->l->model->config.n_expert;
    const int two = qwen3i_has_weight(b, layer, QWEN3I_W_ALL_GATE_UP);
    qwen3i_experts *e;
    qwen3i_matrix *list, router;
    qwen3_result r = qwen3i_bind_router(b, layer, &router);     /* before memory is taken for so many */
    if (r != QWEN3_OK) return r;
    e = (qwen3i_experts *)qwen3i_model_alloc(b->l->model, 1, sizeof *e);
    list = (qwen3i_matrix *)qwen3i_model_alloc(b->l->model, 3 * (size_t)n, sizeof *list);
    if (!e || !list) return qwen3i_no_memory(b->l->err, "the experts", 3 * (uint64_t)n * sizeof *list);
    e->router = router;
    e->gate = list;
    e->up = list + n;
    e->down = list + 2 * n;
    w->experts = e;
    if (!two && !b->l->source->names[QWEN3I_W_ALL_GATE]) return qwen3i_bind_each_expert(b, layer, list);
    if (two) r = qwen3i_bind_all_experts(b, layer, QWEN3I_W_ALL_GATE_UP, list);
    else {
        r = qwen3i_bind_all_experts(b, layer, QWEN3I_W_ALL_GATE, list);
        if (r == QWEN3_OK) r = qwen3i_bind_all_experts(b, layer, QWEN3I_W_ALL_UP, list + n);
    }
    return r == QWEN3_OK ? qwen3i_bind_all_experts(b, layer, QWEN3I_W_ALL_DOWN, list + 2 * n) : r;
}

#define QWEN3I_LAYER_TENSORS 9          /* the fewest that a layer has */

static qwen3_result qwen3i_bind_layer(qwen3i_binder *b, int index, qwen3i_layer *w) {
    const qwen3i_config *cfg = &b->l->model->config;
    const int q_dim = cfg->n_head * cfg->head_dim;
    qwen3i_binding list[8];
    qwen3_result r = QWEN3_OK;
    int i, n = 0;
    list[n++] = qwen3i_binding_of(QWEN3I_W_ATTN_NORM, 0,         cfg->n_embd,   NULL, &w->attn_norm);
    list[n++] = qwen3i_binding_of(QWEN3I_W_Q_NORM,    0,         cfg->head_dim, NULL, &w->q_norm);
    list[n++] = qwen3i_binding_of(QWEN3I_W_K_NORM,    0,         cfg->head_dim, NULL, &w->k_norm);
    list[n++] = qwen3i_binding_of(QWEN3I_W_O,         cfg->n_embd, q_dim,       &w->wo, NULL);
    list[n++] = qwen3i_binding_of(QWEN3I_W_MLP_NORM,  0,         cfg->n_embd,   NULL, &w->mlp_norm);
    if (!qwen3i_has_experts(cfg, index)) {
        list[n++] = qwen3i_binding_of(QWEN3I_W_GATE, cfg->n_ff,   cfg->n_embd, &w->w_gate, NULL);
        list[n++] = qwen3i_binding_of(QWEN3I_W_UP,   cfg->n_ff,   cfg->n_embd, &w->w_up, NULL);
        list[n++] = qwen3i_binding_of(QWEN3I_W_DOWN, cfg->n_embd, cfg->n_ff,   &w->w_down, NULL);
    }
    for (i = 0; i < n && r == QWEN3_OK; i++)
        r = list[i].rows ? qwen3i_bind(b, index, (int)list[i].weight, list[i].rows, list[i].cols,
                                       list[i].matrix)
                         : qwen3i_bind_floats(b, index, (int)list[i].weight, 0, list[i].cols, list[i].gains);
    if (r == QWEN3_OK) r = qwen3i_bind_qkv(b, index, w);
    return r == QWEN3_OK && qwen3i_has_experts(cfg, index) ? qwen3i_bind_experts(b, index, w) : r;
}

/* The head: the embedding if it is tied, unless the files hold another one, which then counts as in
   transformers. A model that was saved without its head makes embeddings. */
static qwen3_result qwen3i_bind_head(qwen3i_binder *b) {
    qwen3_model *m = b->l->model;
    qwen3i_config *cfg = &m->config;
    const qwen3i_tensor *head, *embed;
    char name[QWEN3I_NAME];
    m->weights.head = m->weights.embed;
    qwen3i_weight_name(name, b->l->source, -1, QWEN3I_W_EMBED);
    embed = qwen3i_find_weight(b, name);
    qwen3i_weight_name(name, b->l->source, -1, QWEN3I_W_HEAD);
    head = qwen3i_find_weight(b, name);
    if (!head && !cfg->tied && (m->no_causal || b->prefix.n == 0)) { m->no_head = 1; return QWEN3_OK; }
    if (cfg->tied && (!head || !embed || (head->end - head->begin == embed->end - embed->begin &&
        memcmp(head->data, embed->data, (size_t)(head->end - head->begin)) == 0))) return QWEN3_OK;
    if (cfg->tied)
        qwen3i_log(&m->logger, QWEN3_LOG_WARN, "%s: tie_word_embeddings is set, but %s differs from the "
                                               "embedding: "
                            "it is used", qwen3i_config_file(b->l), name);
    cfg->tied = 0;
    return qwen3i_bind(b, -1, QWEN3I_W_HEAD, cfg->n_vocab, cfg->n_embd, &m->weights.head);
}

/* The weights outside the layers */
static qwen3_result qwen3i_bind_ends(qwen3i_binder *b) {
    qwen3_model *m = b->l->model;
    const qwen3i_config *cfg = &m->config;
    const qwen3i_source *s = b->l->source;
    qwen3i_weights *w = &m->weights;
    char name[QWEN3I_NAME];
    qwen3_result r = qwen3i_bind(b, -1, QWEN3I_W_EMBED, cfg->n_vocab, cfg->n_embd, &w->embed);
    if (r == QWEN3_OK) r = qwen3i_bind_floats(b, -1, QWEN3I_W_FINAL_NORM, 0, cfg->n_embd, &w->final_norm);
    if (r == QWEN3_OK) r = qwen3i_bind_head(b);
    if (r != QWEN3_OK || !s->names[QWEN3I_W_RANK]) return r;
    qwen3i_weight_name(name, s, -1, QWEN3I_W_RANK);
    if (!qwen3i_find_tensor(b->tensors, qwen3i_str_of(name))) return QWEN3_OK;
    return qwen3i_bind_floats(b, -1, QWEN3I_W_RANK, 2, cfg->n_embd, &m->rank);
}

static qwen3_result qwen3i_bind_model(qwen3i_binder *b) {
    qwen3_model *m = b->l->model;
    const qwen3i_config *cfg = &m->config;
    qwen3i_layer *layers;
    qwen3_result r = qwen3i_bind_ends(b);
    int i;
    if (r != QWEN3_OK) return r;
    /* before memory is taken for them */
    if ((size_t)cfg->n_layer > b->tensors->n / QWEN3I_LAYER_TENSORS + 1)
        return qwen3i_fail(b->l->err, QWEN3_ERR_FORMAT, "%s: %s is %d, but the files hold only %lu tensors",
                           qwen3i_config_file(b->l), b->l->source->layers_key[cfg->n_expert > 0],
                               cfg->n_layer,
                               (unsigned long)b->tensors->n);
    layers = (qwen3i_layer *)qwen3i_model_alloc(m, (size_t)cfg->n_layer, sizeof *layers);
    if (!layers) return qwen3i_no_memory(b->l->err, "the layers", (uint64_t)cfg->n_layer * sizeof *layers);
    memset(layers, 0, (size_t)cfg->n_layer * sizeof *layers);
    m->weights.layers = layers;
    for (i = 0; i < cfg->n_layer && r == QWEN3_OK; i++) {
        b->layer = &layers[i];
        r = qwen3i_bind_layer(b, i, b->layer);
        if (r == QWEN3_OK) r = qwen3i_progress(b->l, (i + 1.0) / cfg->n_layer);
    }
    return r;
}

/* ---- tokenizer files ------------------------------------------------------------------------- */
/* The template decides how the model was taught to think; it may also lie in a file of its own. */
static qwen3_result qwen3i_load_style(qwen3i_loader *l, const qwen3i_blob *config) {
    qwen3i_blob jinja;
    qwen3i_str text;
    qwen3_result r = qwen3i_open(l, "chat_template.jinja", 0, &jinja);
    if (r != QWEN3_OK) return r;
    text.p = (const char *)jinja.data;
    text.n = jinja.size;
    if (jinja.data) qwen3i_take_template(l->model, text);
    else r = qwen3i_take_template_of_config(l->model, config);
    qwen3i_close(&l->model->allocator, &jinja);
    return r == QWEN3_OK ? r : qwen3i_no_memory(l->err, "the chat template", config->size);
}

/* tokenizer_config.json is only searched, so that it is whole has to be seen first. */
static qwen3_result qwen3i_open_tokenizer_config(qwen3i_loader *l, qwen3i_blob *config) {
    static const char name[] = "tokenizer_config.json";
    qwen3i_json j;
    qwen3_result r = qwen3i_open(l, name, 0, config);
    if (r != QWEN3_OK || !config->data) return r;
    j = qwen3i_json_begin(config->data, config->size);
    return qwen3i_json_skip(&j) && qwen3i_json_end(&j) ? QWEN3_OK : qwen3i_json_fail(l->err, name, &j);
}

static qwen3_result qwen3i_open_vocab(qwen3i_loader *l, qwen3i_vocab_files *f) {
    qwen3_result r = qwen3i_open_tokenizer_config(l, &f->config);
    if (r == QWEN3_OK) r = qwen3i_open(l, "added_tokens.json", 0, &f->added);
    if (r == QWEN3_OK) r = qwen3i_open(l, "tokenizer.json", 1, &f->json);
    if (r != QWEN3_OK || f->json.data) return r;
    r = qwen3i_open(l, "vocab.json", 0, &f->vocab);
    if (r != QWEN3_OK || !f->vocab.data) return r;
    r = qwen3i_open(l, "merges.txt", 0, &f->merges);
    if (r != QWEN3_OK || f->merges.data) return r;
    return qwen3i_fail(l->err, QWEN3_ERR_IO, "merges.txt is missing beside vocab.json");
}

/* What is wrong with a file that was not read to its end may be that it is cut: then say that. */
static qwen3_result qwen3i_json_cut(const char *name, const qwen3i_blob *b, qwen3_result r,
                                    const qwen3i_err *err) {
    qwen3i_json j = qwen3i_json_begin(b->data, b->size);
    if (b->size == 0 || qwen3i_json_skip(&j) || j.p != j.end) return r;
    return qwen3i_fail(err, r, "%s: the file ends in the midst of its JSON, after %llu bytes", name,
                       (unsigned long long)b->size);
}

static void qwen3i_close_vocab(const qwen3_allocator *a, qwen3i_vocab_files *f) {
    qwen3i_close(a, &f->json);
    qwen3i_close(a, &f->vocab);
    qwen3i_close(a, &f->merges);
    qwen3i_close(a, &f->config);
    qwen3i_close(a, &f->added);
}

QWEN3I_COLD
static qwen3_result qwen3i_load_tokenizer(qwen3i_loader *l) {
    qwen3_model *m = l->model;
    qwen3i_vocab_files f;
    qwen3_result r;
    memset(&f, 0, sizeof f);
    r = qwen3i_open_vocab(l, &f);
    if (r == QWEN3_OK && (f.json.data || f.vocab.data))
        r = qwen3i_tokenizer_read(&m->tokenizer, &m->allocator, &f, l->err);
    else if (r == QWEN3_OK)
        qwen3i_log(&m->logger, QWEN3_LOG_WARN, "no tokenizer.json, or vocab.json and merges.txt: no text, "
                                               "only tokens");
    if (r == QWEN3_ERR_FORMAT && f.json.data) r = qwen3i_json_cut("tokenizer.json", &f.json, r, l->err);
    if (r == QWEN3_OK && m->tokenizer) r = qwen3i_load_style(l, &f.config);
    qwen3i_close_vocab(&m->allocator, &f);
    return r;
}

QWEN3I_COLD
static qwen3_result qwen3i_gguf_tokenizer(qwen3i_loader *l) {
    qwen3_model *m = l->model;
    qwen3i_str template_text;
    qwen3_result r = qwen3i_tokenizer_from_gguf(&m->tokenizer, &m->allocator, l->gguf);
    if (r != QWEN3_OK || !m->tokenizer) return r;
    r = qwen3i_gguf_get_string(l->gguf, "tokenizer.chat_template", &template_text);
    if (r == QWEN3_OK) qwen3i_take_template(m, template_text);
    return r;
}

static qwen3_result qwen3i_check_tokenizer(const qwen3i_loader *l) {
    const qwen3_model *m = l->model;
    if (!m->tokenizer || qwen3i_tokenizer_size(m->tokenizer) <= m->config.n_vocab) return QWEN3_OK;
    return qwen3i_fail(l->err, QWEN3_ERR_FORMAT, "the tokenizer has ids up to %d, the embedding only %d rows",
                       qwen3i_tokenizer_size(m->tokenizer) - 1, m->config.n_vocab);
}

/* ---- sentence-transformers: what becomes of the hidden states -------------------------------- */
static void qwen3i_no_embedding(qwen3_model *m, const char *file, qwen3i_str what) {
    snprintf(m->no_embedding, sizeof m->no_embedding,
             "%s: '%.*s' is not computed, only the last token's hidden state, "
             "normalised", file, QWEN3I_STR(what));
}

/* modules.json: [{"type": "sentence_transformers.models.Pooling", ...}, ...] */
QWEN3I_COLD
static qwen3_result qwen3i_parse_modules(qwen3_model *m, const char *file, const qwen3i_blob *b,
                                         const qwen3i_err *err) {
    static const char *const known[] = {".Transformer", ".Pooling", ".Normalize"};
    qwen3i_json j = qwen3i_json_begin(b->data, b->size);
    qwen3i_json_iter list, it;
    qwen3i_str key, type;
    int i;
    if (qwen3i_json_open(&j, '[', &list)) while (qwen3i_json_next(&j, &list, NULL) &&
                                                 qwen3i_json_open(&j, '{', &it))
        while (qwen3i_json_next(&j, &it, &key)) {
            if (!qwen3i_json_is(key, "type")) { qwen3i_json_skip(&j); continue; }
            if (!qwen3i_json_string(&j, &type)) break;
            for (i = 0; i < QWEN3I_COUNT(known) && !qwen3i_str_ends(type, known[i]); i++) { }
            if (i == QWEN3I_COUNT(known)) qwen3i_no_embedding(m, file, type);
        }
    m->says_pooling = 1;
    return qwen3i_json_end(&j) ? QWEN3_OK : qwen3i_json_fail(err, file, &j);
}

/* 1_Pooling/config.json: {"pooling_mode_lasttoken": true, ...}, or newer {"pooling_mode": "lasttoken"} */
QWEN3I_COLD
static qwen3_result qwen3i_parse_pooling(qwen3_model *m, const char *file, const qwen3i_blob *b,
                                         const qwen3i_err *err) {
    qwen3i_json j = qwen3i_json_begin(b->data, b->size);
    qwen3i_json_iter it;
    qwen3i_str key, mode;
    int on;
    if (qwen3i_json_open(&j, '{', &it)) while (qwen3i_json_next(&j, &it, &key)) {
        if (qwen3i_json_is(key, "pooling_mode") && qwen3i_json_peek(&j) == '"') {
            if (qwen3i_json_string(&j, &mode) && !qwen3i_json_is(mode, "lasttoken"))
                qwen3i_no_embedding(m, file, mode);
        } else if (key.n > 13 && memcmp(key.p, "pooling_mode_", 13) == 0) {
            if (qwen3i_json_bool(&j, &on) && on != qwen3i_json_is(key, "pooling_mode_lasttoken"))
                qwen3i_no_embedding(m, file, key);
        } else qwen3i_json_skip(&j);
    }
    m->says_pooling = 1;
    return qwen3i_json_end(&j) ? QWEN3_OK : qwen3i_json_fail(err, file, &j);
}

/* ---- loading --------------------------------------------------------------------------------- */
typedef qwen3_result (*qwen3i_parse_file)(qwen3_model *m, const char *file, const qwen3i_blob *b,
                                          const qwen3i_err *err);

static qwen3_result qwen3i_load_json(qwen3i_loader *l, const char *name, int required,
                                     qwen3i_parse_file parse) {
    qwen3i_blob b;
    const char *path = l->desc->path;
    qwen3_result r = qwen3i_open(l, name, 0, &b);
    if (r != QWEN3_OK) return r;
    if (b.data) r = parse(l->model, name, &b, l->err);
    else if (required)
        r = qwen3i_fail(l->err, QWEN3_ERR_IO, "no %s %s%s: a Qwen3 model directory holds config.json, "
                                              "model.safetensors and tokenizer.json",
                        name, path ? "in " : "given", path ? path : "");
    qwen3i_close(&l->model->allocator, &b);
    return r;
}

static void qwen3i_fill_info(qwen3_model *m) {
    const qwen3i_config *cfg = &m->config;
    qwen3_info *f = &m->info;
    f->n_layer = cfg->n_layer; f->n_embd = cfg->n_embd; f->n_head = cfg->n_head;
    f->n_head_kv = cfg->n_head_kv; f->head_dim = cfg->head_dim; f->n_ff = cfg->n_ff;
    f->n_vocab = cfg->n_vocab; f->max_ctx = cfg->max_ctx;
    f->n_tokens = m->tokenizer ? qwen3i_tokenizer_size(m->tokenizer) : 0;
    f->im_start = qwen3i_added_id(m->tokenizer, "<|im_start|>");
    f->im_end = qwen3i_added_id(m->tokenizer, "<|im_end|>");
    f->end_of_text = qwen3i_added_id(m->tokenizer, "<|endoftext|>");
    f->think_begin = qwen3i_added_id(m->tokenizer, "<think>");
    f->think_end = qwen3i_added_id(m->tokenizer, "</think>");
    f->n_expert = cfg->n_expert; f->n_expert_used = cfg->n_expert_used;
    f->has_head = !m->no_head;
    f->backend_name = m->backend->name;
    f->device_name = m->weights.layers ? m->backend->device_name(m->backend_state) : "none";
    qwen3i_add_eos(m, f->im_end);       /* both end a turn, whatever the files list */
    qwen3i_add_eos(m, f->end_of_text);
}

/* What the configuration adds to the computation besides the shapes. */
static uint64_t qwen3i_hash_numbers(uint64_t seed, const qwen3i_config *cfg) {
    double v[7];
    v[0] = cfg->rope_theta;     v[1] = (double)cfg->rms_eps;    v[2] = cfg->yarn_factor;
    v[3] = cfg->yarn_beta_fast; v[4] = cfg->yarn_beta_slow;     v[5] = cfg->yarn_attn_factor;
    v[6] = cfg->yarn_untruncated ? -cfg->yarn_original_ctx : cfg->yarn_original_ctx;
    return qwen3i_hash(seed, v, sizeof v);
}

/* The type of most weights, by name */
static const char *qwen3i_main_type(const uint64_t *of_type) {
    int i, most = QWEN3I_NO_TYPE;
    for (i = QWEN3I_F32; i < QWEN3I_N_TYPES; i++) if (of_type[i] > of_type[most]) most = i;
    return qwen3i_format_of((qwen3i_type)most)->name;
}

static qwen3_result qwen3i_load_weights(qwen3i_loader *l) {
    qwen3_model *m = l->model;
    qwen3i_tensors tensors;
    qwen3i_binder b;
    qwen3_result r;
    int i;
    memset(&tensors, 0, sizeof tensors);
    memset(&b, 0, sizeof b);
    b.l = l;
    b.tensors = &tensors;
    b.fingerprint = qwen3i_hash(QWEN3_VERSION / 100, &m->config.n_layer, 8 * sizeof(int));
    b.fingerprint = qwen3i_hash_numbers(b.fingerprint, &m->config);
    if (m->config.n_expert) {
        if (!m->backend->experts)
            return qwen3i_fail(l->err, QWEN3_ERR_UNSUPPORTED,
                               "%s: the %s backend does not run mixtures of experts; the CPU does",
                               qwen3i_config_file(l), m->backend->name);
        b.fingerprint = qwen3i_hash(b.fingerprint, &m->config.n_expert, 5 * sizeof(int));
    }
    l->step = 0.4f;
    r = l->source->list(l, &tensors);
    l->done = 0.4f;
    l->step = 0.1f;
    if (r == QWEN3_OK) qwen3i_find_prefix(&b);
    if (r == QWEN3_OK) r = qwen3i_bind_model(&b);
    qwen3i_free(&m->allocator, tensors.list, tensors.cap * sizeof *tensors.list);
    for (i = 0; i < m->n_shards && r == QWEN3_OK && b.in_place == 0; i++)
        qwen3i_close(&m->allocator, &m->shards[i].blob);
    m->info.n_params = b.n_params;
    m->info.weight_type = qwen3i_main_type(b.of_type);
    m->info.weight_bytes = b.n_bytes;
    m->info.fingerprint = b.fingerprint;
    l->done = 0.5f;
    if (r == QWEN3_OK) r = m->backend->model_create(&m->backend_state, m, l->desc, l->err);
    return r;
}

QWEN3I_COLD
static qwen3_result qwen3i_load_config(qwen3i_loader *l) {
    qwen3_result r = qwen3i_load_json(l, "config.json", 1, qwen3i_parse_config);
    if (r == QWEN3_OK) r = qwen3i_load_json(l, "generation_config.json", 0, qwen3i_parse_generation);
    if (r == QWEN3_OK) r = qwen3i_load_json(l, "modules.json", 0, qwen3i_parse_modules);
    if (r == QWEN3_OK) r = qwen3i_load_json(l, "1_Pooling/config.json", 0, qwen3i_parse_pooling);
    return r;
}

/* Hugging Face's layout: a directory */
static const qwen3i_source qwen3i_directory = {
    "model.layers.",
    {"model.embed_tokens", "model.norm", "lm_head", NULL, "input_layernorm",
     "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", NULL,
     "self_attn.q_norm", "self_attn.k_norm", "self_attn.o_proj", "post_attention_layernorm",
     "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate", "mlp.experts.gate_up_proj", NULL, NULL,
     "mlp.experts.down_proj"},
    "config.json", {"num_hidden_layers", "num_hidden_layers"}, qwen3i_load_config, qwen3i_load_tokenizer,
    qwen3i_open_weights
};

/* One file, or several parts */
static const qwen3i_source qwen3i_gguf_file = {
    "blk.",
    {"token_embd", "output_norm", "output", "cls.output", "attn_norm",
     "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_norm", "attn_k_norm", "attn_output", "ffn_norm",
     "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_inp", "ffn_gate_up_exps.weight",
     "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"},
    NULL, QWEN3I_GGUF_BOTH("block_count"), qwen3i_gguf_configuration, qwen3i_gguf_tokenizer, qwen3i_gguf_list
};

static int qwen3i_is_gguf_name(const char *name) {
    const size_t n = name ? strlen(name) : 0;
    return n > 5 && strcmp(name + n - 5, ".gguf") == 0;
}

/* A file by this name is among what the caller gives, or may be in the directory. */
static int qwen3i_is_given(const qwen3_load_desc *d, const char *name) {
    int i;
    if (d->io.read) return d->io.size(d->io.user, name) >= 0;
    for (i = 0; i < d->n_files && strcmp(d->files[i].name, name) != 0; i++) {}
    return i < d->n_files;
}

/* The model among the caller's files, by its name: NULL if there is none. Of a split one its first part */
static const char *qwen3i_gguf_among(const qwen3_file *files, int n) {
    const char *found = NULL;
    int i;
    for (i = 0; i < n; i++) {
        if (!qwen3i_is_gguf_name(files[i].name)) continue;
        found = files[i].name;
        if (strstr(found, "-00001-of-") || !strstr(found, "-of-")) return found;
    }
    return found;
}

/* Directory or GGUF: what is given decides. config.json comes first, for a directory may hold a GGUF file,
   too. */
static void qwen3i_choose_source(qwen3i_loader *l) {
    const qwen3_load_desc *d = l->desc;
    l->folder = d->path ? strlen(d->path) : 0;
    if (d->files || d->io.read) {
        if (d->path) l->gguf_name = d->path;
        else if (qwen3i_is_given(d, "config.json")) l->gguf_name = NULL;
        else if (d->files) l->gguf_name = qwen3i_gguf_among(d->files, d->n_files);
        else if (qwen3i_is_given(d, "model.gguf")) l->gguf_name = "model.gguf";
    }
#ifndef QWEN3_NO_STDIO
    else if (!qwen3i_is_directory(&d->allocator, d->path)) {
        while (l->folder > 0 && !strchr("/\\", d->path[l->folder - 1])) l->folder--;
        l->gguf_name = d->path + l->folder;
    }
#endif
    l->source = l->gguf_name ? &qwen3i_gguf_file : &qwen3i_directory;
}

/* A GPU takes as long to start as a tokenizer to read: both at once */
static qwen3_result qwen3i_load_all(qwen3i_loader *l) {
    const qwen3_backend *backend = l->model->backend;
    const int weights = !(l->desc->flags & QWEN3_LOAD_VOCAB_ONLY);
    void *starting = NULL;
    qwen3_result r = l->source->configuration(l);
    if (r == QWEN3_OK && weights && backend->start) starting = backend->start(l->desc);
    if (r == QWEN3_OK) r = l->source->tokenizer(l);
    if (r == QWEN3_OK) r = qwen3i_check_tokenizer(l);
    if (r == QWEN3_OK && weights) r = qwen3i_load_weights(l);
    if (starting) backend->started(starting);
    if (r != QWEN3_OK) return r;
    qwen3i_fill_info(l->model);
    l->done = 1;
    l->step = 0;
    return qwen3i_progress(l, 1);
}

static qwen3_result qwen3i_check_allocator(const qwen3_allocator *a, const qwen3i_err *err) {
    void *p;
    int aligned;
    if (!a->alloc != !a->free)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "allocator: set both alloc and free, or neither");
    if (!a->alloc) return QWEN3_OK;
    p = a->alloc(24, a->user);
    if (!p) return qwen3i_no_memory(err, "a first allocation", 24);
    aligned = ((uintptr_t)p & 15) == 0;
    a->free(p, 24, a->user);
    if (aligned) return QWEN3_OK;
    return qwen3i_fail(err, QWEN3_ERR_ARG, "allocator: its memory is not aligned to 16 bytes, which the "
                                           "library needs");
}

#ifndef QWEN3_NO_STDIO
/* A file has to be a GGUF file; of what else it may be, say what it is. */
static qwen3_result qwen3i_check_file(const qwen3_allocator *a, const char *path, const qwen3i_err *err) {
    static const struct { size_t at; const char *bytes, *kind; } kinds[] = {
        {8, "{\"", "a safetensors file"}, {0, "PK\3\4", "a zip archive or PyTorch checkpoint"},
        {0, "\x1F\x8B", "a gzip archive"}, {0, "{", "a JSON file"},
        {0, "version https://git-lfs", "a Git LFS pointer"}
    };
    char head[32] = "";
    uint64_t size = 0;
    qwen3i_handle h;
    int i;
    const int found = qwen3i_handle_open(a, &h, path, &size);
    if (found == 0) return qwen3i_fail(err, QWEN3_ERR_IO, "'%s': there is no such directory or file", path);
    if (found > 0) {
        if (qwen3i_handle_read(&h, 0, head, (size_t)(size < 31 ? size : 31)) != 0) head[0] = '\0';
        qwen3i_handle_close(h);
    }
    if (memcmp(head, "GGUF", 4) == 0) return QWEN3_OK;
    for (i = 0; i < QWEN3I_COUNT(kinds) - 1; i++)
        if (memcmp(head + kinds[i].at, kinds[i].bytes, strlen(kinds[i].bytes)) == 0) break;
    if (memcmp(head + kinds[i].at, kinds[i].bytes, strlen(kinds[i].bytes)) != 0)
        return qwen3i_fail(err, QWEN3_ERR_IO, "'%s' is a file: the directory of a Qwen3 model, or a GGUF "
                                              "file, was expected", path);
    return qwen3i_fail(err, QWEN3_ERR_IO, "'%s' is %s: the directory of a Qwen3 model, or a GGUF file, was "
                                          "expected", path, kinds[i].kind);
}
#endif

static qwen3_result qwen3i_check_devices(const qwen3_load_desc *d, const qwen3i_err *err) {
    if (d->n_devices < 0 || (d->n_devices > 0 && !d->devices))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "n_devices is %d%s", d->n_devices,
                           d->devices ? "" : ", devices is NULL");
    if (d->n_ranks < 0 || d->rank < 0 || (d->n_ranks ? d->rank >= d->n_ranks : d->rank > 0))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "rank is %d of %d", d->rank, d->n_ranks);
    if (d->n_ranks > 1 && !d->nccl_id)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "n_ranks is %d, nccl_id is NULL", d->n_ranks);
    if (d->n_ranks > 1 && d->n_devices > 1)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "one of several ranks has one device; n_devices is %d",
                           d->n_devices);
    if ((d->n_devices > 1 || d->n_ranks > 1) && (!d->backend || !d->backend->devices))
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "the %s backend runs on one device%s",
                           d->backend ? d->backend->name : "cpu",
                           d->backend ? "; compiled with QWEN3_CUDA_NCCL it runs on several" : "");
    return QWEN3_OK;
}

static qwen3_result qwen3i_check_load(const qwen3_load_desc *d, const qwen3i_err *err) {
    int sources = (d->path != NULL) + (d->files != NULL) + (d->io.read != NULL), i;
    qwen3_result r;
    /* path names one of them */
    if (sources == 2 && !(d->files && d->io.read) && qwen3i_is_gguf_name(d->path)) sources = 1;
    if (sources != 1)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "set exactly one of path, files and io; %d are set", sources);
    if (d->io.read && !d->io.size) return qwen3i_fail(err, QWEN3_ERR_ARG, "io: size is not set");
    if (d->files && d->n_files <= 0) return qwen3i_fail(err, QWEN3_ERR_ARG, "n_files is %d", d->n_files);
    for (i = 0; d->files && i < d->n_files; i++)
        if (!d->files[i].name) return qwen3i_fail(err, QWEN3_ERR_ARG, "files[%d] has no name", i);
    if (d->flags & ~(QWEN3_LOAD_VOCAB_ONLY | QWEN3_LOAD_NO_MMAP | QWEN3_LOAD_CHECK))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "unknown load flags 0x%x", (unsigned)d->flags);
    if (d->backend && d->backend->version != QWEN3_VERSION)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "the backend was compiled with version %d of qwen3.h, this "
                                               "is %d", d->backend->version, QWEN3_VERSION);
    if (d->quantize < 0 || d->quantize > QWEN3_Q4_K_M)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "quantize is %d", d->quantize);
    if (d->threads < 0) return qwen3i_fail(err, QWEN3_ERR_ARG, "threads is %d", d->threads);
    r = qwen3i_check_devices(d, err);
    if (r != QWEN3_OK) return r;
    if (d->quantize && d->backend && !d->backend->block_types)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "quantize: the %s backend supports F32, F16 and BF16",
                           d->backend->name);
    if (!qwen3i_little_endian())
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "big-endian machines are not supported");
    r = qwen3i_check_allocator(&d->allocator, err);
    if (r != QWEN3_OK) return r;
#ifdef QWEN3_NO_STDIO
    if (!d->files && !d->io.read)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                           "compiled with QWEN3_NO_STDIO: load from files or io instead of a path");
#else
    if (!d->files && !d->io.read && !qwen3i_is_directory(&d->allocator, d->path))
        return qwen3i_check_file(&d->allocator, d->path, err);
#endif
    return QWEN3_OK;
}

QWEN3I_COLD
QWEN3_API qwen3_result qwen3_load(qwen3_model **out, const qwen3_load_desc *desc, char *err_text,
                                  size_t err_size) {
    qwen3i_err err;
    qwen3i_loader l;
    qwen3i_gguf gguf;
    qwen3i_pool pool;
    qwen3_model *m;
    qwen3_result r;
    err.text = err_text;
    err.cap = err_size;
    if (err_text && err_size) err_text[0] = '\0';
    if (!out) return qwen3i_fail(&err, QWEN3_ERR_ARG, "out is NULL");
    *out = NULL;
    if (!desc) return qwen3i_fail(&err, QWEN3_ERR_ARG, "desc is NULL");
    r = qwen3i_check_load(desc, &err);
    if (r != QWEN3_OK) return r;
    m = (qwen3_model *)qwen3i_alloc_zero(&desc->allocator, 1, sizeof *m);
    if (!m) return qwen3i_no_memory(&err, "the model", sizeof *m);
    m->allocator = desc->allocator;
    m->logger = desc->logger;
    m->backend = desc->backend ? desc->backend : qwen3i_cpu_backend();
    memset(&l, 0, sizeof l);
    l.desc = desc;
    l.model = m;
    l.err = &err;
    memset(&gguf, 0, sizeof gguf);
    l.gguf = &gguf;
    pool.n_lanes = 0;
    l.pool = &pool;
    qwen3i_choose_source(&l);
    m->vocab = qwen3i_model_alloc(m, 1, sizeof(uint64_t));
    if (m->vocab) memset(m->vocab, 0, sizeof(uint64_t));
    r = m->vocab ? qwen3i_load_all(&l) : qwen3i_no_memory(&err, "the model", sizeof(uint64_t));
    qwen3i_gguf_free(&m->allocator, &gguf);
    if (pool.n_lanes) qwen3i_pool_destroy(&pool);
    if (r != QWEN3_OK) { qwen3_free(m); return r; }
    qwen3i_log(&m->logger, QWEN3_LOG_INFO, "loaded %llu parameters, %llu bytes, on %s (%s)%s",
               (unsigned long long)m->info.n_params,
               (unsigned long long)m->info.weight_bytes, m->info.backend_name, m->info.device_name,
                   m->tokenizer ? "" : "; no tokenizer files");
    *out = m;
    return QWEN3_OK;
}

QWEN3_API qwen3_result qwen3_load_for(int version, qwen3_model **out, const qwen3_load_desc *desc,
                                      char *err_text, size_t err_size) {
    qwen3i_err err;
    err.text = err_text;
    err.cap = err_size;
    if (version / 10 == QWEN3_VERSION / 10) return qwen3_load(out, desc, err_text, err_size);
    if (out) *out = NULL;
    return qwen3i_fail(&err, QWEN3_ERR_MISMATCH, "the program was compiled for version %d.%d, the library "
                                                 "is version %d.%d",
                       version / 100, version / 10 % 10, QWEN3_VERSION / 100, QWEN3_VERSION / 10 % 10);
}

static void qwen3i_index_drop(void *cell);

QWEN3I_COLD
QWEN3_API void qwen3_free(qwen3_model *m) {
    qwen3_allocator a;
    qwen3i_block *b, *next;
    int i;
    if (!m) return;
    a = m->allocator;
    if (m->backend_state) m->backend->model_free(m->backend_state);
    if (m->vocab) qwen3i_index_drop(m->vocab);
    qwen3i_tokenizer_free(m->tokenizer);
    for (i = 0; i < m->n_shards; i++) qwen3i_close(&a, &m->shards[i].blob);
    for (b = m->blocks; b; b = next) { next = b->next; qwen3i_free(&a, b, b->size); }
    qwen3i_free(&a, m, sizeof *m);
}

QWEN3_API qwen3_info qwen3_get_info(const qwen3_model *m) {
    qwen3_info none;
    if (m) return m->info;
    memset(&none, 0, sizeof none);
    return none;
}
/* ================================================================================================
   CHAT FORMAT: a conversation to tokens, as the models' chat templates have it. Template text may
   name control tokens, an assistant's text only those that are not special (<think>, <tool_call>),
   and the text of everyone else none at all.
   ================================================================================================ */
typedef struct qwen3i_chat {
    qwen3i_encoder e;
    qwen3i_buf     run;                 /* text since the last control token: it is encoded as a whole */
    qwen3i_buf     text;                /* a JSON string, unescaped */
    const qwen3i_err *err;
    qwen3_token    im_start, im_end;
    qwen3_result   result;              /* after a failure nothing more is done */
    int64_t       *starts;              /* NULL, or [n_msgs] out: tokens before each message */
    int            forget_from, n_forgotten;    /* messages that are left out */
} qwen3i_chat;

static void qwen3i_chat_text(qwen3i_chat *c, const char *p, size_t n) {
    if (c->result == QWEN3_OK && !qwen3i_buf_add(&c->run, p, n)) c->result = QWEN3_ERR_MEMORY;
}

static void qwen3i_chat_control(qwen3i_chat *c, int id) {
    if (c->result == QWEN3_OK) c->result = qwen3i_encode_text(&c->e, c->run.p, c->run.n, 0);
    c->run.n = 0;
    if (id >= 0) qwen3i_put(&c->e, (uint32_t)id);
}

/* Text in which added tokens of these kinds count. */
static void qwen3i_chat_marked(qwen3i_chat *c, qwen3i_str s, int kinds) {
    const char *p = s.p, *end = s.p + s.n, *at;
    for (; p < end; p = at) {
        const qwen3i_added *hit = qwen3i_added_next(c->e.t, p, end, kinds, &at);
        qwen3i_chat_text(c, p, (size_t)(at - p));
        if (hit) { qwen3i_chat_control(c, hit->id); at += hit->length; }
    }
}

static void qwen3i_chat_literal(qwen3i_chat *c, const char *text) {
    qwen3i_chat_marked(c, qwen3i_str_of(text), QWEN3I_ADDED_ALL);
}

static void qwen3i_chat_assistant_text(qwen3i_chat *c, qwen3i_str s) {
    qwen3i_chat_marked(c, s, QWEN3I_ADDED_ALL & ~QWEN3I_ADDED_UNSPOKEN);
}

static void qwen3i_chat_plain(qwen3i_chat *c, const char *text) {
    qwen3i_str s = qwen3i_str_of(text);
    qwen3i_chat_text(c, s.p, s.n);
}

static void qwen3i_chat_open(qwen3i_chat *c, const char *role) {
    qwen3i_chat_control(c, c->im_start);
    qwen3i_chat_plain(c, role);
}

static void qwen3i_chat_close(qwen3i_chat *c) {
    qwen3i_chat_control(c, c->im_end);
    qwen3i_chat_plain(c, "\n");
}

/* ---- JSON, written as Python's json.dumps(json.loads(text), ensure_ascii=False) does --------- */
static void qwen3i_chat_json_string(qwen3i_chat *c, qwen3i_str s) {
    static const char from[] = "\"\\\n\r\t\b\f", to[] = "\"\\nrtbf";
    char escape[8];
    size_t i, n, plain = 0;
    c->text.n = 0;
    if (!qwen3i_buf_reserve(&c->text, s.n + 1)) { c->result = QWEN3_ERR_MEMORY; return; }
    n = qwen3i_json_unescape(s, c->text.p);
    qwen3i_chat_text(c, "\"", 1);
    for (i = 0; i < n; i++) {
        unsigned char byte = (unsigned char)c->text.p[i];
        const char *hit = byte ? strchr(from, byte) : NULL;
        if (!hit && byte >= 0x20) continue;
        qwen3i_chat_text(c, c->text.p + plain, i - plain);
        plain = i + 1;
        if (hit) snprintf(escape, sizeof escape, "\\%c", to[hit - from]);
        else snprintf(escape, sizeof escape, "\\u%04x", (unsigned)byte);
        qwen3i_chat_plain(c, escape);
    }
    qwen3i_chat_text(c, c->text.p + plain, n - plain);
    qwen3i_chat_text(c, "\"", 1);
}

typedef struct qwen3i_decimal { char digits[32]; int n, point; } qwen3i_decimal;   /* 0.digits * 10^point */

/* The double nearest to a number that was checked, without its sign. strtod is given no decimal point, which
   would be the locale's. 0: no memory */
static int qwen3i_json_double(qwen3i_buf *buf, qwen3i_str s, double *v) {
    const char *p, *end = s.p + s.n;
    long exponent = 0, decimals = 0;
    int negative = 0, seen_point = 0;
    buf->n = 0;
    if (!qwen3i_buf_reserve(buf, s.n + 32)) return 0;
    for (p = s.p + (*s.p == '-'); p < end && *p != 'e' && *p != 'E'; p++) {
        if (*p == '.') { seen_point = 1; continue; }
        buf->p[buf->n++] = *p;
        decimals += seen_point;
    }
    if (p < end) {
        negative = *++p == '-';
        for (p += *p == '-' || *p == '+'; p < end; p++)
            if (exponent < 100000000) exponent = exponent * 10 + (*p - '0');
    }
    snprintf(buf->p + buf->n, 32, "e%ld", (negative ? -exponent : exponent) - decimals);
    *v = strtod(buf->p, NULL);
    return 1;
}

/* v with so many digits, correctly rounded; printf's decimal point is the locale's, and passed over */
static qwen3i_decimal qwen3i_decimal_of(double v, int digits) {
    qwen3i_decimal d;
    char text[64];
    const char *p;
    snprintf(text, sizeof text, "%.*e", digits - 1, v);
    for (p = text, d.n = 0; *p != 'e'; p++) if (*p >= '0' && *p <= '9') d.digits[d.n++] = *p;
    while (d.n > 1 && d.digits[d.n - 1] == '0') d.n--;
    d.point = (int)strtol(p + 1, NULL, 10) + 1;
    return d;
}

static double qwen3i_decimal_value(const qwen3i_decimal *d) {
    char text[64];
    snprintf(text, sizeof text, "%.*se%d", d->n, d->digits, d->point - d->n);
    return strtod(text, NULL);
}

/* The next larger one of so many digits, unless that would be another power of ten */
static qwen3i_decimal qwen3i_decimal_above(qwen3i_decimal d, int digits) {
    int i;
    while (d.n < digits) d.digits[d.n++] = '0';
    for (i = digits - 1; i > 0 && d.digits[i] == '9'; i--) d.n--;
    if (d.digits[i] < '9') d.digits[i]++;
    return d;
}

/* The fewest digits that mean v. Any 15 digits survive a double's 53 bits; subnormal numbers have fewer.
   Above a power of two doubles lie further apart than below: there the nearest decimal may mean another, and
   the next one v. */
static qwen3i_decimal qwen3i_decimal_shortest(double v) {
    int digits = v < 2.3e-308 ? 1 : 15;
    qwen3i_decimal d, above;
    for (;; digits++) {
        d = qwen3i_decimal_of(v, digits);
        if (digits == 17 || qwen3i_decimal_value(&d) == v) return d;
        above = qwen3i_decimal_above(d, digits);
        if (qwen3i_decimal_value(&above) == v) return above;
    }
}

/* Integers stay as they are written, of any size; other numbers are as Python prints a float. */
static void qwen3i_chat_json_number(qwen3i_chat *c, qwen3i_str s) {
    qwen3i_decimal d;
    double v = 0;
    char tail[16];
    int i, is_float = memchr(s.p, '.', s.n) || memchr(s.p, 'e', s.n) || memchr(s.p, 'E', s.n);
    if (s.n == 2 && s.p[0] == '-' && s.p[1] == '0') { qwen3i_chat_text(c, "0", 1); return; }
    if (!is_float) { qwen3i_chat_text(c, s.p, s.n); return; }
    if (!qwen3i_json_double(&c->text, s, &v)) { c->result = QWEN3_ERR_MEMORY; return; }
    if (*s.p == '-') qwen3i_chat_text(c, "-", 1);
    if (!(v <= DBL_MAX)) { qwen3i_chat_plain(c, "Infinity"); return; }
    if (v == 0) { qwen3i_chat_plain(c, "0.0"); return; }
    d = qwen3i_decimal_shortest(v);
    if (d.point < -3 || d.point > 16) {
        qwen3i_chat_text(c, d.digits, 1);
        if (d.n > 1) qwen3i_chat_text(c, ".", 1);
        qwen3i_chat_text(c, d.digits + 1, (size_t)d.n - 1);
        snprintf(tail, sizeof tail, "e%c%02d", d.point < 1 ? '-' : '+', d.point < 1 ? 1 - d.point :
                 d.point - 1);
        qwen3i_chat_plain(c, tail);
        return;
    }
    if (d.point <= 0) qwen3i_chat_text(c, "0.", 2);
    for (i = d.point; i < 0; i++) qwen3i_chat_text(c, "0", 1);
    for (i = 0; i < d.n || i <= d.point; i++) {
        if (i == d.point && i > 0) qwen3i_chat_text(c, ".", 1);
        qwen3i_chat_text(c, i < d.n ? d.digits + i : "0", 1);
    }
}

static void qwen3i_chat_json_scalar(qwen3i_chat *c, qwen3i_json *j) {
    qwen3i_str s;
    char first = qwen3i_json_peek(j);
    s.p = j->p;
    if (first == '"') { if (qwen3i_json_string(j, &s)) qwen3i_chat_json_string(c, s); return; }
    if (!qwen3i_json_scalar(j)) return;
    s.n = (size_t)(j->p - s.p);
    if (s.p[s.n - 1] >= '0' && s.p[s.n - 1] <= '9') qwen3i_chat_json_number(c, s);
    else qwen3i_chat_text(c, s.p, s.n);
}

/* A key of an object, and where its value is. Of keys that are there twice, the last value counts, in the
   place of the first: value is then where to read, or NULL: this one is left out. */
typedef struct qwen3i_member { const char *key, *value; uint64_t hash; uint32_t object; } qwen3i_member;

static int qwen3i_member_by_object(const void *x, const void *y) {
    const qwen3i_member *a = (const qwen3i_member *)x, *b = (const qwen3i_member *)y;
    if (a->object != b->object) return a->object < b->object ? -1 : 1;
    if (a->hash != b->hash) return a->hash < b->hash ? -1 : 1;
    return a->key < b->key ? -1 : a->key > b->key;
}

static int qwen3i_member_by_place(const void *x, const void *y) {
    const qwen3i_member *a = (const qwen3i_member *)x, *b = (const qwen3i_member *)y;
    return a->key < b->key ? -1 : a->key > b->key;
}

/* All members of all objects in a value, as far as there is room; how many there are. Checks the grammar. */
static size_t qwen3i_json_members(qwen3i_json *j, qwen3i_buf *text, qwen3i_member *list, size_t cap) {
    qwen3i_json_iter stack[QWEN3I_JSON_DEPTH];
    uint32_t object[QWEN3I_JSON_DEPTH], n_objects = 0;
    qwen3i_str key;
    size_t n = 0;
    int depth = 0;
    do {
        char c = qwen3i_json_peek(j);
        if (c != '{' && c != '[') qwen3i_json_scalar(j);
        else if (depth == QWEN3I_JSON_DEPTH) qwen3i_json_bad(j, "nested too deeply");
        else {
            object[depth] = n_objects++;
            qwen3i_json_open(j, c, &stack[depth++]);
        }
        while (depth > 0 && !qwen3i_json_next(j, &stack[depth - 1], &key) && !j->error) depth--;
        if (j->error || depth == 0 || stack[depth - 1].close == ']') continue;
        if (n < cap && qwen3i_buf_reserve(text, key.n + 1)) {
            list[n].key = key.p;
            list[n].value = j->p;
            list[n].hash = qwen3i_hash(0, text->p, qwen3i_json_unescape(key, text->p));
            list[n].object = object[depth - 1];
        }
        n++;
    } while (!j->error && depth > 0);
    return n;
}

/* Of the members, those whose key is there twice in their object, in order of place; how many they are. */
static size_t qwen3i_members_twice(qwen3i_member *list, size_t n) {
    size_t i, k, last, kept = 0;
    qwen3i_sort(list, n, sizeof *list, qwen3i_member_by_object);
    for (i = 0; i < n; i = last + 1) {
        for (last = i; last + 1 < n && list[last + 1].object == list[i].object &&
             list[last + 1].hash == list[i].hash;) last++;
        if (last == i) continue;
        list[i].value = list[last].value;
        for (k = i + 1; k <= last; k++) list[k].value = NULL;
        for (k = i; k <= last; k++) list[kept++] = list[k];
    }
    qwen3i_sort(list, kept, sizeof *list, qwen3i_member_by_place);
    return kept;
}

static const qwen3i_member *qwen3i_member_find(const qwen3i_member *list, size_t n, const char *key) {
    size_t low = 0, high = n, middle;
    while (low < high) {
        middle = low + (high - low) / 2;
        if (list[middle].key < key) low = middle + 1; else high = middle;
    }
    return low < n && list[low].key == key ? &list[low] : NULL;
}

typedef struct qwen3i_json_level { qwen3i_json_iter it; const char *resume; int n; } qwen3i_json_level;

/* Step to the next element that is written, and write what stands before its value. 0: there is none */
static int qwen3i_chat_json_element(qwen3i_chat *c, qwen3i_json *j, qwen3i_json_level *level,
                                    const qwen3i_member *twice, size_t n_twice) {
    const qwen3i_member *m;
    qwen3i_str key;
    for (;;) {
        /* its value was that of a later key */
        if (level->resume) { j->p = level->resume; level->resume = NULL; }
        if (!qwen3i_json_next(j, &level->it, &key)) return 0;
        m = level->it.close == '}' ? qwen3i_member_find(twice, n_twice, key.p) : NULL;
        if (!m || m->value) break;
        if (!qwen3i_json_skip(j)) return 0;
    }
    if (level->n++) qwen3i_chat_text(c, ", ", 2);
    if (level->it.close == ']') return 1;
    qwen3i_chat_json_string(c, key);
    qwen3i_chat_text(c, ": ", 2);
    if (!m) return 1;
    if (!qwen3i_json_skip(j)) return 0;
    level->resume = j->p;
    j->p = m->value;
    return 1;
}

/* The value at j, in a single line */
QWEN3I_COLD
static void qwen3i_chat_json_value(qwen3i_chat *c, qwen3i_json *j, const qwen3i_member *twice,
                                   size_t n_twice) {
    qwen3i_json_level stack[QWEN3I_JSON_DEPTH];
    int depth = 0;
    do {
        char open = qwen3i_json_peek(j);
        if (open != '{' && open != '[') qwen3i_chat_json_scalar(c, j);
        else {
            stack[depth].resume = NULL;
            stack[depth].n = 0;
            qwen3i_json_open(j, open, &stack[depth++].it);
            qwen3i_chat_text(c, &open, 1);
        }
        while (depth > 0 && !qwen3i_chat_json_element(c, j, &stack[depth - 1], twice, n_twice) && !j->error)
            qwen3i_chat_text(c, &stack[--depth].it.close, 1);
    } while (c->result == QWEN3_OK && !j->error && depth > 0);
}

/* The i-th tool: one JSON object, in a single line. */
static void qwen3i_chat_json(qwen3i_chat *c, const char *text, int i) {
    qwen3i_json j = qwen3i_json_begin(text, strlen(text)), again = j;
    qwen3i_member *list = NULL;
    size_t n, n_twice = 0;
    if (qwen3i_json_peek(&j) != '{') qwen3i_json_bad(&j, "an object was expected");
    n = qwen3i_json_members(&j, &c->text, NULL, 0);
    if (!qwen3i_json_end(&j)) {
        c->result = qwen3i_fail(c->err, QWEN3_ERR_ARG, "tools[%d] is not a JSON object: %s at byte %lu", i,
                                j.error,
                                (unsigned long)(j.p - text));
        return;
    }
    if (n > 0) {
        list = (qwen3i_member *)qwen3i_alloc_array(c->text.allocator, n, sizeof *list);
        if (!list || !qwen3i_buf_reserve(&c->text, strlen(text))) c->result = QWEN3_ERR_MEMORY;
        else {
            j = again;
            c->text.n = 0;
            qwen3i_json_members(&j, &c->text, list, n);
            n_twice = qwen3i_members_twice(list, n);
        }
    }
    if (c->result == QWEN3_OK) qwen3i_chat_json_value(c, &again, list, n_twice);
    qwen3i_free(c->text.allocator, list, n * sizeof *list);
}

/* ---- the template ---------------------------------------------------------------------------- */
static qwen3i_str qwen3i_str_strip(qwen3i_str s, int left, int right) {
    for (; left && s.n > 0 && s.p[0] == '\n'; s.n--) s.p++;
    while (right && s.n > 0 && s.p[s.n - 1] == '\n') s.n--;
    return s;
}

static int qwen3i_str_begins(qwen3i_str s, const char *with) {
    const size_t n = strlen(with);
    return s.n >= n && memcmp(s.p, with, n) == 0;
}

/* Reasoning without the pair of tags that it may have been streamed with. */
static qwen3i_str qwen3i_untagged(qwen3i_str text) {
    static const char begin[] = "<think>", end[] = "</think>";
    const size_t k = sizeof end - 1;
    qwen3i_str s = qwen3i_str_strip(text, 1, 1);
    const int opens = qwen3i_str_begins(s, begin), closes = s.n >= k && memcmp(s.p + s.n - k, end, k) == 0;
    if (!opens && !closes) return text;
    if (closes) s.n -= k;
    return qwen3i_str_strip(qwen3i_str_from(s, opens ? sizeof begin - 1 : 0), 1, 1);
}

/* An assistant's content, and its reasoning if that is part of the text. */
static void qwen3i_chat_split(const qwen3_msg *m, qwen3i_str *content, qwen3i_str *reasoning) {
    static const char begin[] = "<think>", end[] = "</think>";
    qwen3i_str text = qwen3i_str_of(m->text);
    size_t first, last, open;
    *content = text;
    *reasoning = qwen3i_untagged(qwen3i_str_of(m->reasoning));
    first = m->reasoning ? text.n : qwen3i_str_find(text, end, 0);
    if (first == text.n) return;
    last = qwen3i_str_find(text, end, 1) + sizeof end - 1;
    *content = qwen3i_str_strip(qwen3i_str_from(text, last), 1, 0);
    text.n = first;
    text = qwen3i_str_strip(text, 0, 1);
    open = qwen3i_str_find(text, begin, 1);
    if (open < text.n) text = qwen3i_str_from(text, open + sizeof begin - 1);
    *reasoning = qwen3i_str_strip(text, 1, 0);
}

/* show_thinking: 0: leave the reasoning out; 1: show it if there is any; 2: show that there is none, too. */
static void qwen3i_chat_assistant(qwen3i_chat *c, const qwen3_msg *m, qwen3_chat_style style,
                                  int show_thinking) {
    qwen3i_str content = qwen3i_str_of(m->text), reasoning = qwen3i_str_of(NULL);
    int i;
    if (style != QWEN3_STYLE_INSTRUCT) qwen3i_chat_split(m, &content, &reasoning);
    qwen3i_chat_open(c, "assistant\n");
    if (style != QWEN3_STYLE_INSTRUCT && (show_thinking == 2 || (show_thinking && reasoning.n > 0))) {
        qwen3i_chat_literal(c, "<think>\n");
        qwen3i_chat_assistant_text(c, qwen3i_str_strip(reasoning, 1, 1));
        qwen3i_chat_literal(c, "\n</think>\n\n");
        qwen3i_chat_assistant_text(c, qwen3i_str_strip(content, 1, 0));
    } else qwen3i_chat_assistant_text(c, content);
    for (i = 0; i < m->n_calls; i++) {
        if (i > 0 || content.n > 0) qwen3i_chat_plain(c, "\n");
        qwen3i_chat_literal(c, "<tool_call>\n{\"name\": \"");
        qwen3i_chat_assistant_text(c, qwen3i_str_of(m->calls[i].name));
        qwen3i_chat_plain(c, "\", \"arguments\": ");
        qwen3i_chat_assistant_text(c, qwen3i_str_of(m->calls[i].arguments));
        qwen3i_chat_literal(c, "}\n</tool_call>");
    }
    qwen3i_chat_close(c);
}

/* Consecutive tool results share one turn. */
static void qwen3i_chat_tool_result(qwen3i_chat *c, const qwen3_msg *m, int is_first, int is_last) {
    if (is_first) qwen3i_chat_open(c, "user");
    qwen3i_chat_literal(c, "\n<tool_response>\n");
    qwen3i_chat_plain(c, m->text);
    qwen3i_chat_literal(c, "\n</tool_response>");
    if (is_last) qwen3i_chat_close(c);
}

static void qwen3i_chat_system(qwen3i_chat *c, const qwen3_chat_desc *chat) {
    const char *text = chat->msgs[0].role == QWEN3_SYSTEM ? chat->msgs[0].text : NULL;
    int i;
    if (chat->n_tools == 0 && chat->msgs[0].role != QWEN3_SYSTEM) return;
    qwen3i_chat_open(c, "system\n");
    qwen3i_chat_plain(c, text);
    if (chat->n_tools > 0) {
        if (chat->msgs[0].role == QWEN3_SYSTEM) qwen3i_chat_plain(c, "\n\n");
        qwen3i_chat_literal(c, QWEN3I_TOOLS_BEGIN);
        for (i = 0; i < chat->n_tools; i++) {
            qwen3i_chat_plain(c, "\n");
            qwen3i_chat_json(c, chat->tools[i], i);
        }
        qwen3i_chat_literal(c, QWEN3I_TOOLS_END);
    }
    qwen3i_chat_close(c);
}

/* The last message of a user that does not only wrap a tool's result; the last message if there is none. */
static int qwen3i_chat_last_query(const qwen3_chat_desc *chat) {
    static const char open[] = "<tool_response>", close[] = "</tool_response>";
    int i;
    for (i = chat->n_msgs - 1; i >= 0; i--) {
        qwen3i_str s = qwen3i_str_of(chat->msgs[i].text);
        if (chat->msgs[i].role != QWEN3_USER) continue;
        if (s.n < sizeof close - 1 || memcmp(s.p, open, sizeof open - 1) != 0 ||
            memcmp(s.p + s.n - (sizeof close - 1), close, sizeof close - 1) != 0) return i;
    }
    return chat->n_msgs - 1;
}

/* Is an assistant's reasoning shown? See qwen3i_chat_assistant. */
static int qwen3i_chat_shows(const qwen3_chat_desc *chat, int i, int last_query) {
    if ((chat->flags & QWEN3_CHAT_KEEP_TAGS) || (i == chat->n_msgs - 1 && i > last_query)) return 2;
    return (chat->flags & QWEN3_CHAT_KEEP_THINKING) || i > last_query;
}

static void qwen3i_chat_messages(qwen3i_chat *c, const qwen3_chat_desc *chat, qwen3_chat_style style) {
    int i, n = chat->n_msgs, last_query = qwen3i_chat_last_query(chat);
    for (i = 0; i < n && c->result == QWEN3_OK; i++) {
        const qwen3_msg *m = &chat->msgs[i];
        if (i == c->forget_from) i += c->n_forgotten, m += c->n_forgotten;
        if (c->starts) { qwen3i_chat_control(c, -1); c->starts[i] = c->e.n; }
        if (m->role == QWEN3_ASSISTANT) {
            qwen3i_chat_assistant(c, m, style, qwen3i_chat_shows(chat, i, last_query));
        } else if (m->role == QWEN3_TOOL) {
            qwen3i_chat_tool_result(c, m, i == 0 || m[-1].role != QWEN3_TOOL, i == n - 1 ||
                                    m[1].role != QWEN3_TOOL);
        } else if (m->role == QWEN3_USER || i > 0) {
            qwen3i_chat_open(c, m->role == QWEN3_USER ? "user\n" : "system\n");
            qwen3i_chat_plain(c, m->text);
            qwen3i_chat_close(c);
        }
    }
    if (chat->flags & QWEN3_CHAT_NO_REPLY_HEADER) return;
    qwen3i_chat_open(c, "assistant\n");
    if (style == QWEN3_STYLE_THINKING) qwen3i_chat_literal(c, "<think>\n");
    if (style == QWEN3_STYLE_NO_THINK || (style == QWEN3_STYLE_HYBRID && (chat->flags & QWEN3_CHAT_NO_THINK)))
        qwen3i_chat_literal(c, "<think>\n\n</think>\n\n");
}

static qwen3_result qwen3i_chat_check_msg(const qwen3_msg *m, int i, const qwen3i_err *err) {
    int k, role;
    memcpy(&role, &m->role, sizeof role);       /* any value, though the type has but four */
    if (role < QWEN3_SYSTEM || role > QWEN3_TOOL)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "msgs[%d].role is %d", i, role);
    if (m->n_calls < 0 || (m->n_calls > 0 && !m->calls))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "msgs[%d].calls is NULL, or n_calls (%d) negative", i,
                           m->n_calls);
    for (k = 0; k < m->n_calls; k++)
        if (!m->calls[k].name || !m->calls[k].arguments)
            return qwen3i_fail(err, QWEN3_ERR_ARG, "msgs[%d].calls[%d].%s is NULL", i, k,
                               m->calls[k].name ? "arguments" : "name");
    return QWEN3_OK;
}

#define QWEN3I_CHAT_TOOLS (QWEN3_CHAT_TOOLS_NONE | QWEN3_CHAT_TOOLS_AUTO | QWEN3_CHAT_TOOLS_REQUIRED)

QWEN3I_COLD
static qwen3_result qwen3i_chat_check(const qwen3_chat_desc *chat, const qwen3i_err *err) {
    const int flags = QWEN3_CHAT_NO_THINK | QWEN3_CHAT_KEEP_THINKING | QWEN3_CHAT_NO_REPLY_HEADER |
                      QWEN3_CHAT_KEEP_TAGS | QWEN3I_CHAT_TOOLS;
    const int tools = chat ? chat->flags & QWEN3I_CHAT_TOOLS : 0;
    qwen3_result r = QWEN3_OK;
    int i;
    if (!chat) return qwen3i_fail(err, QWEN3_ERR_ARG, "chat is NULL");
    if (chat->n_msgs <= 0 || !chat->msgs)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "msgs is NULL, or n_msgs (%d) not positive", chat->n_msgs);
    if (chat->n_tools < 0 || (chat->n_tools > 0 && !chat->tools))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "tools is NULL, or n_tools (%d) negative", chat->n_tools);
    if (chat->max_prompt < 0) return qwen3i_fail(err, QWEN3_ERR_ARG, "max_prompt is negative");
    if (chat->flags & ~flags)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "flags has unknown bits: %d", chat->flags);
    if (tools & (tools - 1)) return qwen3i_fail(err, QWEN3_ERR_ARG, "flags has several QWEN3_CHAT_TOOLS_*");
    if ((tools & ~QWEN3_CHAT_TOOLS_NONE) && chat->n_tools == 0)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "flags wants calls held to tools, but there are no tools");
    for (i = 0; i < chat->n_tools; i++)
        if (!chat->tools[i]) return qwen3i_fail(err, QWEN3_ERR_ARG, "tools[%d] is NULL", i);
    for (i = 0; i < chat->n_msgs && r == QWEN3_OK; i++) r = qwen3i_chat_check_msg(&chat->msgs[i], i, err);
    return r;
}

/* Render all but what is forgotten. A count, or a negative result that err explains. */
QWEN3I_COLD
static int qwen3i_chat_write(qwen3i_chat *c, const qwen3_model *m, const qwen3_chat_desc *chat,
                             qwen3_token *out, int cap) {
    int n;
    c->e = qwen3i_encoder_make(m->tokenizer, out, cap);
    c->run = c->text = qwen3i_buf_make(&m->tokenizer->allocator);
    c->result = QWEN3_OK;
    qwen3i_chat_system(c, chat);
    qwen3i_chat_messages(c, chat, m->info.chat_style);
    qwen3i_chat_control(c, -1);         /* what remains */
    qwen3i_buf_free(&c->run);
    qwen3i_buf_free(&c->text);
    n = qwen3i_encoder_end(&c->e, c->result);
    if (n == QWEN3_ERR_MEMORY) return qwen3i_fail(c->err, QWEN3_ERR_MEMORY, "rendering the conversation");
    if (n < 0 && c->result == QWEN3_OK)
        return qwen3i_fail(c->err, QWEN3_ERR_ARG, "the conversation has more than %d tokens", INT_MAX);
    return n;
}

/* Forget turns as if max_prompt had been kept from the first turn on, so that what is forgotten changes
   seldom: each time that a turn did not fit, the oldest went until half of the room was free. starts[i] is
   where message i begins, starts[n] where the last ends. */
static void qwen3i_chat_forget(qwen3i_chat *c, const qwen3_chat_desc *chat, const int64_t *starts) {
    const int n = chat->n_msgs, first = chat->msgs[0].role == QWEN3_SYSTEM;
    const int64_t head = starts[first], room = chat->max_prompt;
    int begin, end, kept = first;       /* the turn [begin, end); messages from kept on are not forgotten */
    for (begin = first; begin < n; begin = end) {
        for (end = begin + 1; end < n && chat->msgs[end].role != QWEN3_USER;) end++;
        if (head + starts[end] - starts[kept] <= room) continue;
        while (kept < begin && head + 2 * (starts[end] - starts[kept]) > room) {
            do kept++; while (chat->msgs[kept].role != QWEN3_USER && kept < begin);
        }
    }
    c->forget_from = first;
    c->n_forgotten = kept - first;
}

/* A count, or a negative result that err explains. */
static int qwen3i_chat_render(const qwen3_model *m, const qwen3_chat_desc *chat, qwen3_token *out, int cap,
                              const qwen3i_err *err) {
    const qwen3_allocator *a;
    qwen3i_chat c;
    size_t n_starts;
    int n;
    qwen3_result r = qwen3i_chat_check(chat, err);
    if (r != QWEN3_OK) return r;
    if (!m->tokenizer)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "the model was loaded without tokenizer files");
    memset(&c, 0, sizeof c);
    c.err = err;
    c.forget_from = -1;
    c.im_start = qwen3i_added_id(m->tokenizer, "<|im_start|>");
    c.im_end = qwen3i_added_id(m->tokenizer, "<|im_end|>");
    if (c.im_start < 0 || c.im_end < 0)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "the tokenizer has no <|im_start|> and <|im_end|>");
    if (chat->n_forgotten) *chat->n_forgotten = 0;
    if (chat->max_prompt == 0) return qwen3i_chat_write(&c, m, chat, out, cap);
    a = &m->tokenizer->allocator;
    n_starts = (size_t)chat->n_msgs + 1;
    c.starts = (int64_t *)qwen3i_alloc_array(a, n_starts, sizeof *c.starts);
    if (!c.starts)
        return qwen3i_no_memory(err, "the conversation's turns", (uint64_t)n_starts * sizeof *c.starts);
    n = qwen3i_chat_write(&c, m, chat, out, cap);
    c.starts[chat->n_msgs] = n;
    if (n > chat->max_prompt) qwen3i_chat_forget(&c, chat, c.starts);
    qwen3i_free(a, c.starts, n_starts * sizeof *c.starts);
    c.starts = NULL;
    if (c.n_forgotten > 0) n = qwen3i_chat_write(&c, m, chat, out, cap);
    if (chat->n_forgotten) *chat->n_forgotten = c.n_forgotten;
    return n;
}

QWEN3_API int qwen3_chat_render(const qwen3_model *m, const qwen3_chat_desc *chat, qwen3_token *out, int cap,
                                char *err_text, size_t err_size) {
    const qwen3i_err err = qwen3i_err_begin(err_text, err_size);
    if (!m || cap < 0 || (!out && cap))
        return qwen3i_fail(&err, QWEN3_ERR_ARG, "model or out is NULL, or cap (%d) negative", cap);
    return qwen3i_chat_render(m, chat, out, cap, &err);
}

/* ================================================================================================
   VECTOR KERNELS
   Everything below computes on vectors of 16 lanes, whatever the instruction set. Of a product with numbers
   lane j of a sum takes elements j, j + 16, j + 32 ... in order, and lanes are added up in one fixed tree
   (j with j + 8, then + 4, + 2, + 1). Of one with blocks a lane is a row: see qwen3i_rounded. So a result
   never depends on how work was tiled, batched or split over threads, and AVX-512, AVX2 and NEON agree bit
   for bit; the plain C lanes differ from them only in that they have no fused multiply-add.
   ================================================================================================ */
#ifndef QWEN3_NO_SIMD
  #if defined(_M_X64) && defined(_MSC_VER)
    #define QWEN3I_X86
    #include <immintrin.h>
    #include <intrin.h>
    #if defined(__clang__)  /* in this mode it leaves out what the command line does not ask for */
      #include <smmintrin.h>
      #include <xsaveintrin.h>
      #include <avxintrin.h>
      #include <avx2intrin.h>
      #include <f16cintrin.h>
      #include <fmaintrin.h>
      #include <avx512fintrin.h>
      #include <avx512vlintrin.h>
      #include <avx512bwintrin.h>
      #include <avx512dqintrin.h>
      #include <avx512vlbwintrin.h>
      #include <avx512vldqintrin.h>
      #include <avx512vnniintrin.h>
    #endif
  #elif defined(__x86_64__) && defined(__GNUC__) && (!defined(__MINGW32__) || defined(__clang__) || defined(QWEN3_UNALIGNED_MOVES))
    #define QWEN3I_X86      /* MinGW's gcc does not align the stack for AVX registers: only where asked for */
    #include <cpuid.h>
    #include <immintrin.h>
  #elif defined(__aarch64__) && defined(__ARM_NEON) && defined(__GNUC__)
    #define QWEN3I_NEON
    #include <arm_neon.h>
  #elif defined(__wasm_simd128__)
    #define QWEN3I_WASM
    #include <wasm_simd128.h>
  #endif
#endif

/* Full unrolling keeps the accumulators of a tile in registers. */
#if defined(__clang__)
  #define QWEN3I_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
  #define QWEN3I_UNROLL _Pragma("GCC unroll 8")
#else
  #define QWEN3I_UNROLL
#endif

#if defined(__GNUC__)
  #define QWEN3I_PREFETCH(p) __builtin_prefetch(p)
  #define QWEN3I_PREFETCH_FAR(p) __builtin_prefetch(p, 0, 0)       /* to be used once */
#else
  #define QWEN3I_PREFETCH(p) ((void)(p))
  #define QWEN3I_PREFETCH_FAR(p) ((void)(p))
#endif

/* ---- what products of blocks are made of ------------------------------------------------------
   A row of x becomes whole numbers of 15 bits and a sign, once, from that row alone; w is unpacked to whole
   numbers of at most 8 bits. Sums of products of a group are then exact, whatever their order, and each enters
   the row's result by one product and one fused multiply-add, in order of columns. */
#define QWEN3I_PART 16                  /* columns of x with one scale */
#define QWEN3I_ROUNDED_MAX 32639        /* so that 256 times a signed byte and another one make up any number */
typedef struct qwen3i_rounded {
    int16_t q[QWEN3I_PART];             /* x = d * q. Of each four columns the order is 0, 2, 1, 3; or, as digits: the four
                                           upper bytes, then the four lower ones, from -128 to 127 */
    float   d;
    int32_t sum;                        /* of q */
} qwen3i_rounded;

/* 256 columns of 16 rows of w: qwen3i_unpacked with rows side by side */
typedef struct qwen3i_panel {
    int8_t q[QWEN3I_MAX_BLOCK / 4][16][4];
    float  d[16][16], m[16][16];        /* by group, then by row */
} qwen3i_panel;

static int qwen3i_parts(int cols) { return cols / QWEN3I_PART + (cols % QWEN3I_PART > 0); }

typedef struct qwen3i_strip {           /* 16 rows of w, ld bytes apart; what lies from next to end is fetched meanwhile */
    size_t         ld;
    const uint8_t *next, *end;
} qwen3i_strip;

/* In small portions: more at a time than the processor can wait for are dropped. */
QWEN3I_INLINE void qwen3i_fetch(qwen3i_strip *s, int bytes) {
    if (s->next >= s->end) return;
    QWEN3I_UNROLL for (int i = 0; i < bytes; i += 64) QWEN3I_PREFETCH_FAR(s->next + i);
    s->next += bytes;
}

/* Whole numbers as qwen3i_rounded has them */
static void qwen3i_order(int16_t *to, const int32_t *q) {
    static const int order[4] = {0, 2, 1, 3};
    for (int i = 0; i < QWEN3I_PART; i++) to[i] = (int16_t)q[i / 4 * 4 + order[i % 4]];
}

/* ---- the kernels of one instruction set ------------------------------------------------------- */
typedef struct qwen3i_simd {
    const char *name;
    /* y[t * ldy + r] = w[r] . x[t], or += if add, for n_w rows of w and n_x rows of x, all [n_cols]; ld* in
       elements; w of numbers: F32, F16 or BF16 */
    void (*dot)(float *y, size_t ldy, const void *w, size_t ldw, qwen3i_type type, int n_w,
                const float *x, size_t ldx, int n_x, int n_cols, int add);
    /* y[r] = w[r] . x, or += if add, for n_w rows of w in Q8_0 or FP8, all of whose blocks are full, and one row of
       x: the same bits as dot gives when they have become float32 */
    void (*dot_bytes)(float *y, const void *w, size_t row_bytes, qwen3i_type type, int n_w, const float *x,
                      int n_cols, int add);
    /* x [n] to parts, as dot_blocks wants them; columns beyond n are zeros. If x is not finite, neither are its products. */
    void (*round_row)(qwen3i_rounded *y, const float *x, int n);
    /* The same as dot with w in other blocks, of whole numbers, row_bytes apart, and x as round_row makes it; panels has
       room for QWEN3I_PANELS of them */
    void (*dot_blocks)(float *y, size_t ldy, const void *w, size_t row_bytes, qwen3i_type type, int n_w,
                       const qwen3i_rounded *x, size_t ldx, int n_x, int n_cols, int add, qwen3i_panel *panels);
    /* y[t * ldy + d] += sum over r of p[t * ldp + r] * v[r * ldv + d], in order of r; n_p rows of p, d <
       n_cols */
    void (*mix)(float *y, size_t ldy, const float *p, size_t ldp, int n_p,
                const void *v, size_t ldv, qwen3i_type type, int n_v, int n_cols);
    /* s = softmax(scale * s) over [n]; s has room for n rounded up to 16, which are overwritten */
    void (*softmax)(float *s, int n, float scale);
    /* y = x / sqrt(mean(x^2) + eps) * gain, all [n]; y may be x */
    void (*rmsnorm)(float *y, const float *x, const float *gain, int n, float eps);
    /* y = gate / (1 + exp(-gate)) * up, all [n]; y may be gate */
    void (*silu_mul)(float *y, const float *gate, const float *up, int n);
    /* y = exp(x - shift), both [n]; to 2 ulp; 0 where the result would be below 1.2e-38 */
    void (*exp)(float *y, const float *x, float shift, int n);
    /* n elements of any format to float32; in blocks, from the beginning of one */
    void (*load)(float *y, const void *x, qwen3i_type type, int n);
    /* n elements from float32 to type, rounded to nearest even and clamped to the finite range */
    void (*store)(void *y, const float *x, qwen3i_type type, int n);
} qwen3i_simd;

#define QWEN3I_MAX_ROW 288     /* bytes of 256 columns in blocks */
#define QWEN3I_PANELS  2       /* the most that a tile has */
#define QWEN3I_K_BLOCK 1024     /* columns that one tile sums up before they join the rest of the row:
                                   six rows of x then stay in the first-level cache */
#define QWEN3I_AHEAD   4096     /* bytes by which memory is fetched ahead */
#define QWEN3I_FEW_ROWS 12      /* rows of x for which w is read once, tile by tile */
#define QWEN3I_MIX_ROWS 48      /* rows of v that become float32 at a time: at most 12 KB on the stack */
#define QWEN3I_EXP_LOW  (-87.3f)
#define QWEN3I_EXP_HIGH 88.3f

/* The kernels, written once. V is the prefix of the instruction set's lane operations: the type V_v and the
   functions V_zero, set1, load, load_once (not again for each use), load_bf16, load_f16, load_i8, all_half (a half in all lanes), store,
   store_bf16, store_f16, add, mul, div, max, min, fma(a, b, c) = a * b + c, round, exp2i (2^n for whole n),
   drop_below (0 where x < low), sum (of R vectors, by the tree). A tile is R rows of w times up to C rows of
   x. */
#define QWEN3I_DEFINE_KERNELS(V, TARGET, R, C) \
/* n lanes, or all 16 if n is more; when loading, the others are 0 */ \
TARGET QWEN3I_INLINE V##_v V##_load_n(const float *p, int n) { \
    float part[16] = {0}; \
    if (n >= 16) return V##_load(p); \
    memcpy(part, p, (size_t)n * 4); \
    return V##_load(part); \
} \
TARGET QWEN3I_INLINE void V##_store_n(float *p, V##_v v, int n) { \
    float part[16]; \
    if (n >= 16) { V##_store(p, v); return; } \
    V##_store(part, v); \
    memcpy(p, part, (size_t)n * 4); \
} \
/* elements i .. i + 15 of a row */ \
TARGET QWEN3I_INLINE V##_v V##_from(const void *row, size_t i, qwen3i_type type) { \
    if (type == QWEN3I_BF16) return V##_load_bf16((const uint16_t *)row + i); \
    if (type == QWEN3I_F16)  return V##_load_f16((const uint16_t *)row + i); \
    return V##_load((const float *)row + i); \
} \
/* the same for n lanes */ \
TARGET QWEN3I_INLINE V##_v V##_from_n(const void *row, size_t i, qwen3i_type type, int n) { \
    float part[16] = {0};               /* of any type */ \
    if (n >= 16) return V##_from(row, i, type); \
    memcpy(part, (const char *)row + i * qwen3i_type_size(type), (size_t)n * qwen3i_type_size(type)); \
    return V##_from(part, 0, type); \
} \
TARGET QWEN3I_INLINE float V##_sum1(V##_v v) { \
    V##_v rows[R]; \
    float sums[R]; \
    int r; \
    for (r = 0; r < R; r++) rows[r] = v; \
    V##_sum(sums, rows); \
    return sums[0]; \
} \
/* 16 elements of a row in Q8_0 or FP8, at b, with their scale */ \
TARGET QWEN3I_INLINE V##_v V##_bytes(const uint8_t *b, V##_v d, qwen3i_type type) { \
    return V##_mul(type == QWEN3I_FP8 ? V##_e4m3(b) : V##_load_i8((const int8_t *)b), d); \
} \
TARGET static void V##_load_row(float *y, const void *x, qwen3i_type type, int n) { \
    const uint8_t *b = (const uint8_t *)x; \
    int i; \
    if (qwen3i_is_block(type) && !qwen3i_is_bytes(type)) { qwen3i_decode(y, x, type, n); return; } \
    for (i = 0; i < n; i += 16) { \
        V##_v v; \
        if (type == QWEN3I_FP8) v = V##_bytes(b + i / 128 * 132 + 4 + i % 128, V##_set1(qwen3i_f32_at(b + i / 128 * 132)), type); \
        else if (type == QWEN3I_Q8_0) v = V##_bytes(b + i / 32 * 34 + 2 + i % 32, V##_all_half(b + i / 32 * 34), type); \
        else v = V##_from_n(x, (size_t)i, type, n - i); \
        V##_store_n(y + i, v, n - i); \
    } \
} \
/* R rows in Q8_0 or FP8 at a time against one row of x: the sums of V_dot, without a panel. The type is a constant here. */ \
TARGET QWEN3I_INLINE void V##_dot_bytes_of(float *y, const uint8_t *w, size_t row_bytes, qwen3i_type type, int elements, \
                                           int head, int n_w, const float *x, int n_cols, int add) { \
    const uint8_t *next = w + 2 * R * row_bytes;    /* what is fetched meanwhile, in order of addresses */ \
    for (int r0 = 0; r0 < n_w; r0 += R) { \
        const uint8_t *at[R]; \
        QWEN3I_UNROLL for (int r = 0; r < R; r++) at[r] = w + (size_t)qwen3i_min(r0 + r, n_w - 1) * row_bytes; \
        for (int k = 0; k < n_cols; k += QWEN3I_K_BLOCK) { \
            V##_v acc[R]; \
            float sums[R]; \
            int end = qwen3i_min(k + QWEN3I_K_BLOCK, n_cols); \
            QWEN3I_UNROLL for (int r = 0; r < R; r++) acc[r] = V##_zero(); \
            for (int c = k; c < end; c += elements) { \
                QWEN3I_UNROLL for (int r = 0; r < R; r++) { \
                    const V##_v d = type == QWEN3I_FP8 ? V##_set1(qwen3i_f32_at(at[r])) : V##_all_half(at[r]); \
                    QWEN3I_UNROLL for (int j = 0; j < elements; j += 16) \
                        acc[r] = V##_fma(V##_bytes(at[r] + head + j, d, type), V##_load(x + c + j), acc[r]); \
                    at[r] += elements + head; \
                } \
                QWEN3I_UNROLL for (int i = 0; i < R * (elements + head); i += 64) QWEN3I_PREFETCH(next + i); \
                next += R * (elements + head); \
            } \
            V##_sum(sums, acc); \
            for (int r = 0; r < R && r0 + r < n_w; r++) \
                y[r0 + r] = add || k > 0 ? y[r0 + r] + sums[r] : sums[r]; \
        } \
    } \
} \
TARGET static void V##_dot_bytes(float *y, const void *w, size_t row_bytes, qwen3i_type type, int n_w, const float *x, \
                                 int n_cols, int add) { \
    if (type == QWEN3I_FP8) V##_dot_bytes_of(y, (const uint8_t *)w, row_bytes, QWEN3I_FP8, 128, 4, n_w, x, n_cols, add); \
    else V##_dot_bytes_of(y, (const uint8_t *)w, row_bytes, QWEN3I_Q8_0, 32, 2, n_w, x, n_cols, add); \
} \
/* One tile over n columns, a multiple of 16: n_w of at most R rows of w, `stride` bytes apart, whose results \
   belong `apart` floats apart: y[t * ldy + r * apart] = (add ? y : 0) + w[r] . x[t]. What lies `ahead` bytes \
   further on is fetched meanwhile. */ \
TARGET QWEN3I_INLINE void V##_tile(float *y, size_t ldy, int apart, const char *w, size_t stride, \
                                   size_t ahead, \
                                   qwen3i_type type, int n_w, const float *x, size_t ldx, int n_x, int n, \
                                       int add) { \
    V##_v acc[C][R], wv[R], xv; \
    float sums[R]; \
    size_t w_at[R], x_at[C], step = 16 * qwen3i_type_size(type);    /* bytes: few pointers, so that none is spilled */ \
    const char *xs = (const char *)x, *next = w + ahead, *end = w + (size_t)n / 16 * step; \
    int r, t; \
    QWEN3I_UNROLL for (r = 0; r < R; r++) w_at[r] = (size_t)qwen3i_min(r, n_w - 1) * stride; \
    QWEN3I_UNROLL for (t = 0; t < n_x; t++) x_at[t] = (size_t)t * ldx * 4; \
    QWEN3I_UNROLL for (t = 0; t < n_x; t++) { QWEN3I_UNROLL for (r = 0; r < R; r++) acc[t][r] = V##_zero(); } \
    for (; w != end; w += step, next += step, xs += 64) { \
        QWEN3I_UNROLL for (r = 0; r < R; r++) { \
            wv[r] = V##_from(w + w_at[r], 0, type); \
            if (ahead) QWEN3I_PREFETCH(next + w_at[r]); \
        } \
        QWEN3I_UNROLL for (t = 0; t < n_x; t++) { \
            xv = V##_load_once((const float *)(const void *)(xs + x_at[t])); \
            QWEN3I_UNROLL for (r = 0; r < R; r++) acc[t][r] = V##_fma(wv[r], xv, acc[t][r]); \
        } \
    } \
    QWEN3I_UNROLL for (t = 0; t < n_x; t++, y += ldy) { \
        V##_sum(sums, acc[t]); \
        if (n_w == R && apart == 1) { \
            QWEN3I_UNROLL for (r = 0; r < R; r++) y[r] = add ? y[r] + sums[r] : sums[r]; \
        } \
        else for (r = 0; r < n_w; r++) y[r * apart] = add ? y[r * apart] + sums[r] : sums[r]; \
    } \
} \
/* One tile of w against n_x rows of x. n_x becomes a constant, so that each size gets its own code; it is at most C \
   even in code that is never reached, for analysers. */ \
TARGET QWEN3I_INLINE void V##_tile_n(float *y, size_t ldy, int apart, const char *w, size_t stride, \
                                     size_t ahead, \
                                     qwen3i_type type, int n_w, const float *x, size_t ldx, int n_x, int n, \
                                         int add) { \
    if (n_x == C)               V##_tile(y, ldy, apart, w, stride, ahead, type, n_w, x, ldx, C, n, add); \
    else if (n_x == 4 && C > 4) \
        V##_tile(y, ldy, apart, w, stride, ahead, type, n_w, x, ldx, C > 4 ? 4 : 1, n, add); \
    else if (n_x == 2 && C > 2) \
        V##_tile(y, ldy, apart, w, stride, ahead, type, n_w, x, ldx, C > 2 ? 2 : 1, n, add); \
    else                        V##_tile(y, ldy, apart, w, stride, ahead, type, n_w, x, ldx, 1, n, add); \
} \
/* Many rows of x: a tile of them stays in the first-level cache while the block of w streams past it from \
   the second. Few: w comes from memory, and each tile of it meets all of x at once. One or two: memory is the \
   limit, and it likes R streams best, each through a part of the block. */ \
TARGET QWEN3I_INLINE void V##_dot_type(float *y, size_t ldy, const char *w, size_t row_bytes, \
                                       qwen3i_type type, \
                                       int n_w, const float *x, size_t ldx, int n_x, int n_cols, int add) { \
    int tiles = (n_w + R - 1) / R, few = n_x <= QWEN3I_FEW_ROWS, step = few ? 1 : tiles, i, j, t, k, m; \
    int apart = n_x <= 2 && (size_t)tiles * row_bytes >= 2 * QWEN3I_AHEAD ? tiles : 1; \
    size_t ahead = apart > 1 ? QWEN3I_AHEAD / 2 : type == QWEN3I_F32 && !few ? 512 : \
                   R * row_bytes > QWEN3I_AHEAD ? R * row_bytes : QWEN3I_AHEAD; \
    for (i = 0; i < tiles; i += step) \
        for (k = 0; k < n_cols; k += QWEN3I_K_BLOCK) \
            for (t = 0; t < n_x; t += m) { \
                m = n_x - t >= C && n_x - t != 8 ? C : n_x - t >= 4 && C > 4 ? 4 : n_x - t >= 2 ? 2 : 1; /* 8: 4 + 4 */ \
                for (j = i; j < i + step; j++) { \
                    int r = apart > 1 ? j : j * R; \
                    V##_tile_n(y + (size_t)t * ldy + r, ldy, apart, \
                               w + (size_t)r * row_bytes + (size_t)k * qwen3i_type_size(type), \
                               (size_t)apart * row_bytes, ahead, type, \
                                   qwen3i_min(R, (n_w - r + apart - 1) / apart), \
                               x + (size_t)t * ldx + k, ldx, m, qwen3i_min(QWEN3I_K_BLOCK, n_cols - k), \
                                   k > 0 || add); \
                } \
            } \
} \
/* The last columns of a number that is not a multiple of 16 join last. */ \
TARGET static void V##_dot_rest(float *y, size_t ldy, const char *w, size_t row_bytes, qwen3i_type type, \
                                int n_w, \
                                const float *x, size_t ldx, int n_x, int done, int n_cols, int add) { \
    float sum; \
    int r, t; \
    for (t = 0; t < n_x; t++, y += ldy, x += ldx) \
        for (r = 0; r < n_w; r++) { \
            sum = V##_sum1(V##_fma(V##_from_n(w + (size_t)r * row_bytes, (size_t)done, type, n_cols - done), \
                                   V##_load_n(x + done, n_cols - done), V##_zero())); \
            y[r] = add ? y[r] + sum : sum; \
        } \
} \
TARGET static void V##_dot(float *y, size_t ldy, const void *w, size_t ldw, qwen3i_type type, int n_w, \
                           const float *x, size_t ldx, int n_x, int n_cols, int add) { \
    const char *rows = (const char *)w; \
    size_t row_bytes = ldw * qwen3i_type_size(type); \
    int n = n_cols / 16 * 16; \
    switch (type) { \
        case QWEN3I_BF16: V##_dot_type(y, ldy, rows, row_bytes, QWEN3I_BF16, n_w, x, ldx, n_x, n, add); break; \
        case QWEN3I_F16:  V##_dot_type(y, ldy, rows, row_bytes, QWEN3I_F16, n_w, x, ldx, n_x, n, add); break; \
        default:          V##_dot_type(y, ldy, rows, row_bytes, QWEN3I_F32, n_w, x, ldx, n_x, n, add); break; \
    } \
    if (n < n_cols) V##_dot_rest(y, ldy, rows, row_bytes, type, n_w, x, ldx, n_x, n, n_cols, n > 0 || add); \
} \
/* n_p rows of y, 16 * R columns of each; v is [n_v, 16 * R] in float32 */ \
TARGET QWEN3I_INLINE void V##_mix_tile(float *y, size_t ldy, const float *p, size_t ldp, int n_p, \
                                       const float *v, int n_v) { \
    V##_v acc[C][R], vv[R], pv; \
    int t, c, r; \
    QWEN3I_UNROLL for (t = 0; t < n_p; t++) { QWEN3I_UNROLL for (c = 0; c < R; c++) \
        acc[t][c] = V##_load(y + (size_t)t * ldy + 16 * c); } \
    for (r = 0; r < n_v; r++, v += 16 * R) { \
        QWEN3I_UNROLL for (c = 0; c < R; c++) vv[c] = V##_load(v + 16 * c); \
        QWEN3I_UNROLL for (t = 0; t < n_p; t++) { \
            pv = V##_set1(p[(size_t)t * ldp + (size_t)r]); \
            QWEN3I_UNROLL for (c = 0; c < R; c++) acc[t][c] = V##_fma(pv, vv[c], acc[t][c]); \
        } \
    } \
    QWEN3I_UNROLL for (t = 0; t < n_p; t++) { QWEN3I_UNROLL for (c = 0; c < R; c++) \
        V##_store(y + (size_t)t * ldy + 16 * c, acc[t][c]); } \
} \
/* Up to 16 * R columns: the block of v becomes float32, then all rows of p meet it. */ \
TARGET static void V##_mix_block(float *y, size_t ldy, const float *p, size_t ldp, int n_p, \
                                 const char *v, size_t row_bytes, qwen3i_type type, int n_v, int n_cols) { \
    float block[QWEN3I_MIX_ROWS * 16 * R], part[C * 16 * R] = {0}; \
    size_t bytes = (size_t)n_cols * 4; \
    int r, t, m, i; \
    for (r = 0; r < n_v; r++) V##_load_row(block + 16 * R * r, v + (size_t)r * row_bytes, type, n_cols); \
    for (t = 0; t < n_p; t += m, y += (size_t)m * ldy, p += (size_t)m * ldp) { \
        float *to = n_cols == 16 * R ? y : part; \
        size_t ld = to == y ? ldy : 16 * R; \
        m = n_p - t >= C ? C : n_p - t >= 2 ? 2 : 1; \
        for (i = 0; to == part && i < m; i++) memcpy(part + 16 * R * i, y + (size_t)i * ldy, bytes); \
        if (m == C)               V##_mix_tile(to, ld, p, ldp, C, block, n_v); \
        else if (m == 2 && C > 2) V##_mix_tile(to, ld, p, ldp, C > 2 ? 2 : 1, block, n_v); \
        else                      V##_mix_tile(to, ld, p, ldp, 1, block, n_v); \
        for (i = 0; to == part && i < m; i++) memcpy(y + (size_t)i * ldy, part + 16 * R * i, bytes); \
    } \
} \
TARGET static void V##_mix(float *y, size_t ldy, const float *p, size_t ldp, int n_p, \
                           const void *v, size_t ldv, qwen3i_type type, int n_v, int n_cols) { \
    const char *rows = (const char *)v; \
    size_t size = qwen3i_type_size(type); \
    int d, r; \
    for (d = 0; d < n_cols; d += 16 * R) \
        for (r = 0; r < n_v; r += QWEN3I_MIX_ROWS) \
            V##_mix_block(y + d, ldy, p + r, ldp, n_p, rows + ((size_t)r * ldv + (size_t)d) * size, \
                          ldv * size, \
                          type, qwen3i_min(QWEN3I_MIX_ROWS, n_v - r), qwen3i_min(16 * R, n_cols - d)); \
} \
/* e^x = 2^n e^r with |r| <= ln(2) / 2; e^r by a polynomial of degree 6 (error 1e-8 before rounding) */ \
TARGET QWEN3I_INLINE V##_v V##_exp_v(V##_v x) { \
    V##_v c = V##_min(V##_max(x, V##_set1(QWEN3I_EXP_LOW)), V##_set1(QWEN3I_EXP_HIGH)); \
    V##_v n = V##_round(V##_mul(c, V##_set1(1.44269504f))); \
    V##_v r = V##_fma(n, V##_set1(-0.693359375f), c), p; \
    r = V##_fma(n, V##_set1(2.12194440e-4f), r); \
    p = V##_fma(V##_set1(1.3926376e-3f), r, V##_set1(8.3633335e-3f)); \
    p = V##_fma(p, r, V##_set1(4.1666552e-2f)); \
    p = V##_fma(p, r, V##_set1(0.16666576f)); \
    p = V##_fma(p, r, V##_set1(0.5f)); \
    p = V##_add(V##_fma(V##_mul(r, r), p, r), V##_set1(1.0f)); \
    return V##_drop_below(V##_mul(p, V##_exp2i(n)), x, QWEN3I_EXP_LOW); \
} \
TARGET static void V##_exp(float *y, const float *x, float shift, int n) { \
    V##_v minus = V##_set1(-shift); \
    int i; \
    for (i = 0; i < n; i += 16) \
        V##_store_n(y + i, V##_exp_v(V##_add(V##_load_n(x + i, n - i), minus)), n - i); \
} \
TARGET static void V##_softmax(float *s, int n, float scale) { \
    V##_v best = V##_set1(-FLT_MAX), sum = V##_zero(), by = V##_set1(scale), minus; \
    float lanes[16], top; \
    int i, padded = (n + 15) / 16 * 16; \
    for (i = n; i < padded; i++) s[i] = -1e30f;     /* their exponential is 0 */ \
    for (i = 0; i < padded; i += 16) best = V##_max(best, V##_load(s + i)); \
    V##_store(lanes, best); \
    for (top = lanes[0], i = 1; i < 16; i++) top = lanes[i] > top ? lanes[i] : top; \
    minus = V##_set1(-top * scale); \
    for (i = 0; i < padded; i += 16) { \
        V##_v e = V##_exp_v(V##_fma(V##_load(s + i), by, minus)); \
        V##_store(s + i, e); \
        sum = V##_add(sum, e); \
    } \
    by = V##_set1(1.0f / V##_sum1(sum)); \
    for (i = 0; i < padded; i += 16) V##_store(s + i, V##_mul(V##_load(s + i), by)); \
} \
TARGET static void V##_rmsnorm(float *y, const float *x, const float *gain, int n, float eps) { \
    V##_v sum = V##_zero(), v, by; \
    int i; \
    for (i = 0; i < n; i += 16) v = V##_load_n(x + i, n - i), sum = V##_fma(v, v, sum); \
    by = V##_set1(1.0f / sqrtf(V##_sum1(sum) / (float)n + eps)); \
    for (i = 0; i < n; i += 16) \
        V##_store_n(y + i, V##_mul(V##_mul(V##_load_n(x + i, n - i), by), V##_load_n(gain + i, n - i)), \
                    n - i); \
} \
TARGET static void V##_silu_mul(float *y, const float *gate, const float *up, int n) { \
    V##_v one = V##_set1(1.0f), g, e; \
    int i; \
    for (i = 0; i < n; i += 16) { \
        g = V##_load_n(gate + i, n - i); \
        e = V##_exp_v(V##_mul(g, V##_set1(-1.0f))); \
        V##_store_n(y + i, V##_mul(V##_div(g, V##_add(one, e)), V##_load_n(up + i, n - i)), n - i); \
    } \
} \
TARGET static void V##_store_row(void *y, const float *x, qwen3i_type type, int n) { \
    uint16_t *h = (uint16_t *)y; \
    int i; \
    if (type == QWEN3I_F32) { memcpy(y, x, (size_t)n * 4); return; } \
    for (i = 0; i + 16 <= n; i += 16) { \
        if (type == QWEN3I_F16) V##_store_f16(h + i, V##_load(x + i)); \
        else V##_store_bf16(h + i, V##_load(x + i)); \
    } \
    for (; i < n; i++) h[i] = type == QWEN3I_F16 ? qwen3i_f32_to_f16(x[i]) : qwen3i_f32_to_bf16(x[i]); \
}

/* Blocks of 16 rows, `ld` bytes apart, to a panel, to the bits that WEIGHT FORMATS gives: words of 4 bytes are turned so
   that those of 16 rows lie side by side, and unpacked so. V_i is 16 of them; V_turn(v, b, ld) makes v[4] of 16
   bytes of each row; V_words, keep load and store; V_all repeats a word; and, or, shl, shr are on words, less and
   pick(table, v) on bytes; V_float makes numbers, V_half takes the lower half as one, V_as_float the bits. */
#define QWEN3I_DEFINE_FORMATS(V, TARGET) \
TARGET QWEN3I_INLINE void V##_take(V##_i *v, const uint8_t *b, qwen3i_strip *strip) { \
    V##_turn(v, b, strip->ld); \
    qwen3i_fetch(strip, 128); \
} \
TARGET QWEN3I_INLINE V##_v V##_byte(V##_i v, int j) { return V##_float(V##_and(V##_shr(v, 8 * j), 255)); } \
TARGET QWEN3I_INLINE V##_v V##_negative(V##_v v) { return V##_mul(v, V##_set1(-1)); } \
TARGET QWEN3I_INLINE V##_v V##_plus(V##_v v, float f) { return V##_add(v, V##_set1(f)); } \
/* 16 bytes: low halves are columns from `low` on, high ones from `high` on, less a number, or out of a table */ \
TARGET QWEN3I_INLINE void V##_nibbles(qwen3i_panel *p, int low, int high, const uint8_t *b, qwen3i_strip *strip, V##_i less) { \
    V##_i v[4]; \
    V##_take(v, b, strip); \
    QWEN3I_UNROLL for (int i = 0; i < 4; i++) { \
        V##_keep(p->q[low / 4 + i], V##_less(V##_and(v[i], 0x0F0F0F0F), less)); \
        V##_keep(p->q[high / 4 + i], V##_less(V##_and(V##_shr(v[i], 4), 0x0F0F0F0F), less)); \
    } \
} \
TARGET QWEN3I_INLINE void V##_pick_nibbles(qwen3i_panel *p, int low, int high, V##_i v, const int8_t *table) { \
    V##_keep(p->q[low / 4], V##_pick(table, V##_and(v, 0x0F0F0F0F))); \
    V##_keep(p->q[high / 4], V##_pick(table, V##_and(V##_shr(v, 4), 0x0F0F0F0F))); \
} \
TARGET QWEN3I_INLINE void V##_picks(qwen3i_panel *p, int low, int high, const uint8_t *b, qwen3i_strip *strip, \
                                    const int8_t *table) { \
    V##_i v[4]; \
    V##_take(v, b, strip); \
    QWEN3I_UNROLL for (int i = 0; i < 4; i++) V##_pick_nibbles(p, low + 4 * i, high + 4 * i, v[i], table); \
} \
/* Fields of 16 bytes, whose lowest bit is `shift`, join 16 columns from c on; then these become less. */ \
TARGET QWEN3I_INLINE void V##_join(qwen3i_panel *p, int c, const V##_i *v, int shift, int mask, int left, int less) { \
    QWEN3I_UNROLL for (int i = 0; i < 4; i++) { \
        V##_i field = V##_shl(V##_and(V##_shr(v[i], shift), mask * 0x01010101), left); \
        V##_keep(p->q[c / 4 + i], V##_less(V##_or(V##_words(p->q[c / 4 + i]), field), V##_all(less * 0x01010101))); \
    } \
} \
/* Bits of a word join 32 columns from c on, as their fifth. */ \
TARGET QWEN3I_INLINE void V##_fives(qwen3i_panel *p, int c, V##_i bits, int less) { \
    for (int i = 0; i < 8; i++) { \
        V##_i v = V##_and(V##_shr(bits, 4 * i), 15); \
        v = V##_or(V##_or(v, V##_shl(v, 7)), V##_or(V##_shl(v, 14), V##_shl(v, 21))); \
        v = V##_or(V##_words(p->q[c / 4 + i]), V##_shl(V##_and(v, 0x01010101), 4)); \
        V##_keep(p->q[c / 4 + i], V##_less(v, V##_all(less * 0x01010101))); \
    } \
} \
TARGET QWEN3I_INLINE void V##_copy16(qwen3i_panel *p, int c, const uint8_t *b, qwen3i_strip *strip) { \
    V##_i v[4]; \
    V##_take(v, b, strip); \
    QWEN3I_UNROLL for (int i = 0; i < 4; i++) V##_keep(p->q[c / 4 + i], v[i]); \
} \
/* Blocks of 32 whose columns are c .. c + 31 */ \
TARGET static void V##_panel32(qwen3i_panel *p, int c, const uint8_t *b, qwen3i_strip *strip, qwen3i_type type) { \
    const V##_i none = V##_all(0); \
    V##_i v[4]; \
    V##_v d; \
    V##_take(v, b, strip); \
    d = V##_half(v[0]); \
    switch (type) { \
        case QWEN3I_Q4_0: V##_picks(p, c, c + 16, b + 2, strip, qwen3i_q4_0_values); break; \
        case QWEN3I_Q4_1: V##_nibbles(p, c, c + 16, b + 4, strip, none); break; \
        case QWEN3I_Q5_0: V##_nibbles(p, c, c + 16, b + 6, strip, none); \
                          V##_fives(p, c, V##_or(V##_shr(v[0], 16), V##_shl(v[1], 16)), 16); break; \
        case QWEN3I_Q5_1: V##_nibbles(p, c, c + 16, b + 8, strip, none); V##_fives(p, c, v[1], 0); break; \
        case QWEN3I_IQ4_NL: V##_picks(p, c, c + 16, b + 2, strip, qwen3i_iq4_values); break; \
        case QWEN3I_INT4S: { \
            V##_i zero = V##_and(v[0], 127); \
            zero = V##_or(zero, V##_shl(zero, 8)); \
            V##_nibbles(p, c, c + 16, b + 4, strip, V##_or(zero, V##_shl(zero, 16))); \
            d = V##_as_float(V##_and(v[0], ~255)); \
            break; \
        } \
        default: { \
            float scales[16]; \
            for (int r = 0; r < 16; r++) scales[r] = qwen3i_e8m0_half(b[(size_t)r * strip->ld]); \
            V##_picks(p, c, c + 16, b + 1, strip, qwen3i_fp4_values); \
            d = V##_load(scales); \
        } \
    } \
    V##_store(p->d[c / 32], d); \
    if (type == QWEN3I_Q4_1 || type == QWEN3I_Q5_1) V##_store(p->m[c / 32], V##_half(V##_shr(v[0], 16))); \
} \
/* Eight blocks of Q4_0 or IQ4_NL, 36 words of which every other block begins within one */ \
TARGET QWEN3I_INLINE void V##_panel_18(qwen3i_panel *p, const uint8_t *b, qwen3i_strip *strip, const int8_t *table) { \
    V##_i v[36]; \
    V##_take(v, b, strip); \
    QWEN3I_UNROLL for (int j = 0; j < 4; j++) { \
        const V##_i *w = v + 9 * j; \
        V##_take(v + 8 * j + 4, b + 32 * j + 16, strip); \
        V##_take(v + 8 * j + 8, b + 32 * j + 32, strip); \
        V##_store(p->d[2 * j], V##_half(w[0])); \
        V##_store(p->d[2 * j + 1], V##_half(V##_shr(w[4], 16))); \
        QWEN3I_UNROLL for (int i = 0; i < 4; i++) { \
            const V##_i even = V##_or(V##_shr(w[i], 16), V##_shl(w[i + 1], 16)); \
            V##_pick_nibbles(p, 64 * j + 4 * i, 64 * j + 4 * i + 16, even, table); \
            V##_pick_nibbles(p, 64 * j + 4 * i + 32, 64 * j + 4 * i + 48, w[i + 5], table); \
        } \
    } \
} \
TARGET QWEN3I_INLINE void V##_panel_nvfp4(qwen3i_panel *p, int c, const uint8_t *b, qwen3i_strip *strip) { \
    float scales[16]; \
    V##_i v[4]; \
    for (int h = 0; h < 2; h++) { \
        V##_take(v, b + 4 + 16 * h, strip); \
        QWEN3I_UNROLL for (int i = 0; i < 4; i++) { \
            int8_t (*to)[16][4] = &p->q[c / 4 + 8 * h + i / 2 * 4 + i % 2]; \
            V##_keep(to[0], V##_pick(qwen3i_fp4_values, V##_and(v[i], 0x0F0F0F0F))); \
            V##_keep(to[2], V##_pick(qwen3i_fp4_values, V##_and(V##_shr(v[i], 4), 0x0F0F0F0F))); \
        } \
    } \
    for (int j = 0; j < 4; j++) { \
        for (int r = 0; r < 16; r++) scales[r] = qwen3i_ue4m3_to_f32(b[(size_t)r * strip->ld + (size_t)j]) / 2; \
        memcpy(p->d[c / 16 + j], scales, sizeof scales); \
    } \
} \
/* Blocks of 128: INT4 is one scale for four of INT4S. */ \
TARGET QWEN3I_INLINE void V##_panel128(qwen3i_panel *p, int c, const uint8_t *b, qwen3i_strip *strip, qwen3i_type type) { \
    V##_i v[4], zero; \
    V##_v d; \
    V##_take(v, b, strip); \
    d = V##_as_float(V##_and(v[0], ~255)); \
    zero = V##_and(v[0], 127); \
    zero = V##_or(zero, V##_shl(zero, 8)); \
    zero = V##_or(zero, V##_shl(zero, 16)); \
    for (int k = 0; k < 4; k++) { \
        if (type == QWEN3I_INT4) V##_nibbles(p, c + 32 * k, c + 32 * k + 16, b + 4 + 16 * k, strip, zero); \
        else { \
            V##_copy16(p, c + 32 * k, b + 4 + 32 * k, strip); \
            V##_copy16(p, c + 32 * k + 16, b + 20 + 32 * k, strip); \
            V##_store(p->m[c / 32 + k], V##_mul(V##_negative(d), V##_plus(V##_byte(v[0], 0), -128))); \
        } \
        V##_store(p->d[c / 32 + k], d); \
    } \
} \
TARGET QWEN3I_INLINE void V##_panel_q2_k(qwen3i_panel *p, const uint8_t *b, qwen3i_strip *strip) { \
    V##_i v[4], s[4]; \
    V##_v d, m; \
    V##_take(v, b + 68, strip); \
    V##_take(s, b, strip); \
    d = V##_half(v[3]); \
    m = V##_negative(V##_half(V##_shr(v[3], 16))); \
    for (int i = 0; i < 16; i++) { \
        V##_i scale = V##_shr(s[i / 4], i % 4 * 8); \
        V##_store(p->d[i], V##_mul(d, V##_float(V##_and(scale, 15)))); \
        V##_store(p->m[i], V##_mul(m, V##_float(V##_and(V##_shr(scale, 4), 15)))); \
    } \
    memset(p->q, 0, sizeof p->q); \
    for (int i = 0; i < 4; i++) { \
        V##_take(v, b + 16 + 16 * i, strip); \
        for (int k = 0; k < 4; k++) V##_join(p, 128 * (i / 2) + 32 * k + 16 * (i % 2), v, 2 * k, 3, 0, 0); \
    } \
} \
TARGET QWEN3I_INLINE void V##_panel_q3_k(qwen3i_panel *p, const uint8_t *b, qwen3i_strip *strip) { \
    V##_i v[4], high[4], u[3]; \
    V##_v d; \
    V##_take(v, b + 94, strip); \
    d = V##_half(V##_shr(v[3], 16)); \
    for (int i = 0; i < 3; i++) u[i] = V##_or(V##_shr(v[i], 16), V##_shl(v[i + 1], 16)); \
    for (int i = 0; i < 16; i++) { \
        V##_i low = V##_and(V##_shr(u[i / 4 % 2], 8 * (i % 4) + 4 * (i / 8)), 15); \
        V##_i upper = V##_and(V##_shr(u[2], 8 * (i % 4) + 2 * (i / 4)), 3); \
        V##_store(p->d[i], V##_mul(d, V##_plus(V##_float(V##_or(low, V##_shl(upper, 4))), -32))); \
    } \
    memset(p->q, 0, sizeof p->q); \
    for (int i = 0; i < 4; i++) { \
        V##_take(v, b + 32 + 16 * i, strip); \
        V##_take(high, b + 16 * (i % 2), strip); \
        for (int k = 0; k < 4; k++) { \
            const int c = 128 * (i / 2) + 32 * k + 16 * (i % 2); \
            V##_join(p, c, v, 2 * k, 3, 0, 0); \
            V##_join(p, c, high, 4 * (i / 2) + k, 1, 2, 4); \
        } \
    } \
} \
/* Q4_K, Q5_K */ \
TARGET QWEN3I_INLINE void V##_panel_k(qwen3i_panel *p, const uint8_t *b, qwen3i_strip *strip, int fives) { \
    V##_i v[4], s[4]; \
    V##_v d, m; \
    V##_take(v, b, strip); \
    d = V##_half(v[0]); \
    m = V##_negative(V##_half(V##_shr(v[0], 16))); \
    s[0] = V##_and(v[1], 0x3F3F3F3F); \
    s[1] = V##_or(V##_and(v[3], 0x0F0F0F0F), V##_shl(V##_and(V##_shr(v[1], 6), 0x03030303), 4)); \
    s[2] = V##_and(v[2], 0x3F3F3F3F); \
    s[3] = V##_or(V##_and(V##_shr(v[3], 4), 0x0F0F0F0F), V##_shl(V##_and(V##_shr(v[2], 6), 0x03030303), 4)); \
    QWEN3I_UNROLL for (int i = 0; i < 4; i++) { \
        V##_store(p->d[i], V##_mul(d, V##_byte(s[0], i))); \
        V##_store(p->d[i + 4], V##_mul(d, V##_byte(s[1], i))); \
        V##_store(p->m[i], V##_mul(m, V##_byte(s[2], i))); \
        V##_store(p->m[i + 4], V##_mul(m, V##_byte(s[3], i))); \
    } \
    for (int i = 0; i < 8; i++) { \
        const int c = 64 * (i / 2) + 16 * (i % 2); \
        V##_nibbles(p, c, c + 32, b + (fives ? 48 : 16) + 16 * i, strip, V##_all(0)); \
    } \
    for (int i = 0; fives && i < 2; i++) { \
        V##_take(v, b + 16 + 16 * i, strip); \
        for (int k = 0; k < 8; k++) V##_join(p, 32 * k + 16 * i, v, k, 1, 4, 0); \
    } \
} \
TARGET QWEN3I_INLINE void V##_panel_q6_k(qwen3i_panel *p, const uint8_t *b, qwen3i_strip *strip) { \
    V##_i v[4], low[2][4]; \
    V##_v d; \
    V##_take(v, b + 194, strip); \
    d = V##_half(V##_shr(v[3], 16)); \
    V##_take(v, b + 192, strip); \
    QWEN3I_UNROLL for (int i = 0; i < 16; i++) \
        V##_store(p->d[i], V##_mul(d, V##_plus(V##_byte(V##_less(v[i / 4], V##_all((int)0x80808080u)), i % 4), -128))); \
    for (int i = 0; i < 4; i++) {       /* 16 bytes of high pairs are 64 columns, in four parts of 128 */ \
        const int c = 128 * (i / 2) + 16 * (i % 2); \
        V##_take(v, b + 128 + 16 * i, strip); \
        V##_take(low[0], b + c / 2 + i % 2 * 8, strip); \
        V##_take(low[1], b + c / 2 + i % 2 * 8 + 32, strip); \
        QWEN3I_UNROLL for (int k = 0; k < 4; k++) { \
            QWEN3I_UNROLL for (int j = 0; j < 4; j++) { \
                V##_i field = V##_shl(V##_and(V##_shr(v[j], 2 * k), 0x03030303), 4); \
                V##_i q = V##_or(V##_and(V##_shr(low[k % 2][j], k / 2 * 4), 0x0F0F0F0F), field); \
                V##_keep(p->q[c / 4 + 8 * k + j], V##_less(q, V##_all(0x20202020))); \
            } \
        } \
    } \
} \
TARGET QWEN3I_INLINE void V##_panel_iq4_xs(qwen3i_panel *p, const uint8_t *b, qwen3i_strip *strip) { \
    V##_i v[4]; \
    V##_v d; \
    V##_take(v, b, strip); \
    d = V##_half(v[0]); \
    for (int k = 0; k < 8; k++) { \
        V##_i low = V##_and(V##_shr(v[1], 4 * k), 15), high = V##_and(V##_shr(v[0], 16 + 2 * k), 3); \
        V##_store(p->d[k], V##_mul(d, V##_plus(V##_float(V##_or(low, V##_shl(high, 4))), -32))); \
        V##_picks(p, 32 * k, 32 * k + 16, b + 8 + 16 * k, strip, qwen3i_iq4_values); \
    } \
} \
/* n_cols columns, from the beginning of a block on; so many rows that there may be no 16 are repeated. */ \
TARGET static void V##_panel(qwen3i_panel *p, const uint8_t *w, qwen3i_strip *strip, qwen3i_type type, int n_rows, int n_cols) { \
    const qwen3i_format *f = qwen3i_format_of(type); \
    const int bytes = (n_cols + f->elements - 1) / f->elements * f->bytes; \
    uint8_t copy[16][QWEN3I_MAX_ROW]; \
    if (n_rows < 16) { \
        for (int r = 0; r < 16; r++) memcpy(copy[r], w + (size_t)qwen3i_min(r, n_rows - 1) * strip->ld, (size_t)bytes); \
        w = copy[0]; \
        strip->ld = QWEN3I_MAX_ROW; \
    } \
    if (n_cols == 256 && f->bytes == 18) { \
        V##_panel_18(p, w, strip, type == QWEN3I_Q4_0 ? qwen3i_q4_0_values : qwen3i_iq4_values); \
        return; \
    } \
    for (int c = 0; c < n_cols; c += f->elements, w += f->bytes) \
        switch (type) { \
            case QWEN3I_Q2_K: V##_panel_q2_k(p, w, strip); break; \
            case QWEN3I_Q3_K: V##_panel_q3_k(p, w, strip); break; \
            case QWEN3I_Q4_K: V##_panel_k(p, w, strip, 0); break; \
            case QWEN3I_Q5_K: V##_panel_k(p, w, strip, 1); break; \
            case QWEN3I_Q6_K: V##_panel_q6_k(p, w, strip); break; \
            case QWEN3I_IQ4_XS: V##_panel_iq4_xs(p, w, strip); break; \
            case QWEN3I_NVFP4: V##_panel_nvfp4(p, c, w, strip); break; \
            case QWEN3I_INT4: case QWEN3I_INT8: V##_panel128(p, c, w, strip, type); break; \
            default: V##_panel32(p, c, w, strip, type); break; \
        } \
}

/* Products with blocks. U is the prefix of the instruction set's operations on whole numbers, beside V's: the types
   U_w (four columns of a panel, widened), U_x (four columns of a row of x) and U_sums, and the functions V_cut (V_v to
   V_i, towards 0), U_order (see qwen3i_order), U_wide, spread, none(whole), dot4 (adds the products of four columns) and
   total(sums), with whole the sum of x. A tile is R panels times up to C rows of x. */
#define QWEN3I_DEFINE_BLOCKS(V, U, TARGET, R, C) \
TARGET static void U##_round_row(qwen3i_rounded *y, const float *x, int n) { \
    for (; n > 0; n -= QWEN3I_PART, x += QWEN3I_PART, y++) { \
        const V##_v v = V##_load_n(x, n); \
        uint32_t part[16], most = 0; \
        int32_t q[16]; \
        float by; \
        V##_store((float *)(void *)part, v); \
        for (int i = 0; i < 16; i++) most = (part[i] & 0x7FFFFFFFu) > most ? part[i] & 0x7FFFFFFFu : most; \
        y->d = qwen3i_float_from_bits(most); \
        by = most < 0x7F800000u && y->d > 1e-30f ? QWEN3I_ROUNDED_MAX / y->d : 0.0f; \
        if (most < 0x7F800000u) y->d /= QWEN3I_ROUNDED_MAX; \
        V##_keep(q, V##_cut(V##_fma(by > 0 ? v : V##_zero(), V##_set1(by), V##_set1(32768.5f)))); \
        y->sum = -32768 * QWEN3I_PART; \
        for (int i = 0; i < 16; i++) y->sum += q[i], q[i] -= 32768; \
        U##_order(y->q, q); \
    } \
} \
/* One tile over n columns; w: of R panels' columns, whose groups are `group` columns */ \
TARGET QWEN3I_INLINE void U##_block_tile(float *y, size_t ldy, const qwen3i_panel *w, int n_w, int group, int offsets, \
                                         const qwen3i_rounded *x, size_t ldx, int n_x, int n, int add, \
                                         qwen3i_strip *strip) { \
    V##_v acc[C][R], d[R]; \
    U##_sums sums[C][R]; \
    U##_w wv[R]; \
    QWEN3I_UNROLL for (int t = 0; t < n_x; t++) { QWEN3I_UNROLL for (int r = 0; r < R; r++) acc[t][r] = V##_zero(); } \
    for (int c = 0; c < n; c += QWEN3I_PART, x++) { \
        const int8_t *q = w->q[c / 4][0]; \
        const int g = c / group; \
        qwen3i_fetch(strip, 256); \
        QWEN3I_UNROLL for (int t = 0; t < n_x; t++) { \
            const U##_sums none = U##_none(x[(size_t)t * ldx].sum); \
            QWEN3I_UNROLL for (int r = 0; r < R; r++) sums[t][r] = none; \
        } \
        QWEN3I_UNROLL for (int i = 0; i < 4; i++) { \
            QWEN3I_UNROLL for (int r = 0; r < R; r++) wv[r] = U##_wide(q + (size_t)r * sizeof *w + 64 * i); \
            QWEN3I_UNROLL for (int t = 0; t < n_x; t++) { \
                U##_x xv = U##_spread(x[(size_t)t * ldx].q + 4 * i); \
                if (i == 0) QWEN3I_PREFETCH(x + (size_t)(t + n_x) * ldx);       /* for the next tile */ \
                QWEN3I_UNROLL for (int r = 0; r < R; r++) sums[t][r] = U##_dot4(sums[t][r], wv[r], xv); \
            } \
        } \
        QWEN3I_UNROLL for (int r = 0; r < R; r++) d[r] = V##_load(w[r].d[g]); \
        QWEN3I_UNROLL for (int t = 0; t < n_x; t++) { \
            V##_v by = V##_set1(x[(size_t)t * ldx].d); \
            QWEN3I_UNROLL for (int r = 0; r < R; r++) \
                acc[t][r] = V##_fma(V##_mul(V##_float(U##_total(sums[t][r])), by), d[r], acc[t][r]); \
        } \
        if (!offsets) continue; \
        QWEN3I_UNROLL for (int r = 0; r < R; r++) d[r] = V##_load(w[r].m[g]); \
        QWEN3I_UNROLL for (int t = 0; t < n_x; t++) { \
            V##_v by = V##_set1(x[(size_t)t * ldx].d * (float)x[(size_t)t * ldx].sum); \
            QWEN3I_UNROLL for (int r = 0; r < R; r++) acc[t][r] = V##_fma(by, d[r], acc[t][r]); \
        } \
    } \
    QWEN3I_UNROLL for (int t = 0; t < n_x; t++, y += ldy) { \
        QWEN3I_UNROLL for (int r = 0; r < R; r++) { \
            const int m = n_w - 16 * r; \
            if (m > 0) V##_store_n(y + 16 * r, add ? V##_add(V##_load_n(y + 16 * r, m), acc[t][r]) : acc[t][r], m); \
        } \
    } \
} \
TARGET static void U##_dot_blocks(float *y, size_t ldy, const void *w, size_t row_bytes, qwen3i_type type, int n_w, \
                                  const qwen3i_rounded *x, size_t ldx, int n_x, int n_cols, int add, \
                                  qwen3i_panel *panels) { \
    const qwen3i_format *f = qwen3i_format_of(type); \
    const int group = qwen3i_group_of(type), offsets = qwen3i_has_offsets(type); \
    for (int r = 0; r < n_w; r += 16 * R) \
        for (int k = 0, n_k; k < n_cols; k += n_k) { \
            const uint8_t *at = (const uint8_t *)w + (size_t)r * row_bytes + (size_t)(k / f->elements) * (size_t)f->bytes; \
            const int n_r = qwen3i_min(16 * R, n_w - r), join = add || k > 0; \
            n_k = qwen3i_min(QWEN3I_MAX_BLOCK, n_cols - k); \
            qwen3i_strip strip; \
            strip.next = (const uint8_t *)w + (size_t)(r + 16 * R) * row_bytes + 16 * R * row_bytes * (size_t)k / (size_t)n_cols; \
            strip.end = strip.next + 16 * R * row_bytes * (size_t)n_k / (size_t)n_cols; \
            for (int i = 0; i < R; i++) { \
                const int first = 16 * i < n_r ? 16 * i : 0; \
                strip.ld = row_bytes; \
                V##_panel(panels + i, at + (size_t)first * row_bytes, &strip, type, qwen3i_min(16, n_r - first), n_k); \
            } \
            for (int t = 0, m; t < n_x; t += m) { \
                const qwen3i_rounded *xt = x + (size_t)t * ldx + k / QWEN3I_PART; \
                float *yt = y + (size_t)t * ldy + r; \
                m = n_x - t >= C ? C : n_x - t >= 2 ? 2 : 1; \
                if (m == C) U##_block_tile(yt, ldy, panels, n_r, group, offsets, xt, ldx, C, n_k, join, &strip); \
                else if (m == 2) U##_block_tile(yt, ldy, panels, n_r, group, offsets, xt, ldx, C > 2 ? 2 : 1, n_k, join, &strip); \
                else U##_block_tile(yt, ldy, panels, n_r, group, offsets, xt, ldx, 1, n_k, join, &strip); \
            } \
        } \
}

/* The table of an instruction set */
#define QWEN3I_KERNELS(V, U) {U##_name, V##_dot, V##_dot_bytes, U##_round_row, U##_dot_blocks, V##_mix, V##_softmax, V##_rmsnorm, \
                              V##_silu_mul, V##_exp, V##_load_row, V##_store_row}

/* ---- plain C lanes: gcc's and clang's vectors of four where they have no fused multiply-add, else floats ---- */
#if defined(__GNUC__) && !defined(FP_FAST_FMAF)
typedef float qwen3i_quad __attribute__((vector_size(16)));
#else
typedef float qwen3i_quad;
#endif
#define qwen3i_plain_load_once qwen3i_plain_load
#define qwen3i_plain_name "plain C"
typedef struct qwen3i_plain_v { qwen3i_quad q[64 / sizeof(qwen3i_quad)]; } qwen3i_plain_v;
#define QWEN3I_PLAIN_QUADS QWEN3I_UNROLL for (i = 0; i < QWEN3I_COUNT(((qwen3i_plain_v *)0)->q); i++)
#define QWEN3I_LANES for (i = 0; i < 16; i++)

QWEN3I_INLINE void qwen3i_plain_store(float *p, qwen3i_plain_v v) { memcpy(p, &v, 64); }

QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_load(const float *p) {
    qwen3i_plain_v y;
    memcpy(&y, p, 64);
    return y;
}

QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_zero(void) {
    qwen3i_plain_v y;
    memset(&y, 0, 64);
    return y;
}

QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_set1(float a) {
    float part[sizeof(qwen3i_quad) / 4];
    qwen3i_plain_v y = qwen3i_plain_zero();
    qwen3i_quad quad;
    int i;
    for (i = 0; i < QWEN3I_COUNT(part); i++) part[i] = a;
    memcpy(&quad, part, sizeof quad);   /* adding a to a vector would make it a long double on x87 */
    QWEN3I_PLAIN_QUADS y.q[i] = quad;
    return y;
}

QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_load_bf16(const uint16_t *p) {
    float y[16];
    int i;
    QWEN3I_LANES y[i] = qwen3i_bf16_to_f32(p[i]);
    return qwen3i_plain_load(y);
}

QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_load_f16(const uint16_t *p) {
    float y[16];
    int i;
    QWEN3I_LANES y[i] = qwen3i_f16_to_f32(p[i]);
    return qwen3i_plain_load(y);
}

QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_load_i8(const int8_t *p) {
    float y[16];
    int i;
    QWEN3I_LANES y[i] = (float)p[i];
    return qwen3i_plain_load(y);
}

QWEN3I_INLINE void qwen3i_plain_store_bf16(uint16_t *p, qwen3i_plain_v v) {
    float x[16];
    int i;
    qwen3i_plain_store(x, v);
    QWEN3I_LANES p[i] = qwen3i_f32_to_bf16(x[i]);
}

QWEN3I_INLINE void qwen3i_plain_store_f16(uint16_t *p, qwen3i_plain_v v) {
    float x[16];
    int i;
    qwen3i_plain_store(x, v);
    QWEN3I_LANES p[i] = qwen3i_f32_to_f16(x[i]);
}

#define QWEN3I_PLAIN_BINARY(name, operation) \
QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_##name(qwen3i_plain_v a, qwen3i_plain_v b) { \
    int i; \
    QWEN3I_PLAIN_QUADS a.q[i] = a.q[i] operation b.q[i]; \
    return a; \
}
QWEN3I_PLAIN_BINARY(add, +)
QWEN3I_PLAIN_BINARY(mul, *)
QWEN3I_PLAIN_BINARY(div, /)

#define QWEN3I_PLAIN_LANES(name, expression) \
QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_##name(qwen3i_plain_v a, qwen3i_plain_v b) { \
    float x[16], y[16]; \
    int i; \
    qwen3i_plain_store(x, a); \
    qwen3i_plain_store(y, b); \
    QWEN3I_LANES x[i] = expression; \
    return qwen3i_plain_load(x); \
}
QWEN3I_PLAIN_LANES(max, x[i] > y[i] ? x[i] : y[i])
QWEN3I_PLAIN_LANES(min, x[i] < y[i] ? x[i] : y[i])

QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_fma(qwen3i_plain_v a, qwen3i_plain_v b, qwen3i_plain_v c) {
    int i;
  #ifdef FP_FAST_FMAF                   /* else the compiler might fuse one copy of a loop and not another */
    QWEN3I_PLAIN_QUADS c.q[i] = fmaf(a.q[i], b.q[i], c.q[i]);
  #else
    QWEN3I_PLAIN_QUADS c.q[i] += a.q[i] * b.q[i];
  #endif
    return c;
}

QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_round(qwen3i_plain_v v) {
    float x[16];
    int i;
    qwen3i_plain_store(x, v);
    QWEN3I_LANES x[i] = (float)(int)(x[i] < 0 ? x[i] - 0.5f : x[i] + 0.5f);
    return qwen3i_plain_load(x);
}

QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_exp2i(qwen3i_plain_v n) {
    float x[16];
    int i;
    qwen3i_plain_store(x, n);
    QWEN3I_LANES x[i] = qwen3i_float_from_bits((uint32_t)((int)x[i] + 127) << 23);
    return qwen3i_plain_load(x);
}

QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_drop_below(qwen3i_plain_v y, qwen3i_plain_v x, float low) {
    float a[16], b[16];
    int i;
    qwen3i_plain_store(a, y);
    qwen3i_plain_store(b, x);
    QWEN3I_LANES a[i] = b[i] < low ? 0.0f : a[i];
    return qwen3i_plain_load(a);
}

QWEN3I_INLINE void qwen3i_plain_sum(float *sums, qwen3i_plain_v *rows) {
    float x[16];
    int i, half;
    qwen3i_plain_store(x, rows[0]);
    for (half = 8; half > 0; half /= 2)
        for (i = 0; i < half; i++) x[i] += x[i + half];
    sums[0] = x[0];
}

/* E4M3's exponent and fraction in those of a float are the number times 2^-120; so for all instruction sets */
#define QWEN3I_E4M3_UNIT 1.329227995784916e36f
QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_e4m3(const uint8_t *p) {
    float y[16];
    int i;
    QWEN3I_LANES y[i] = qwen3i_e4m3_to_f32(p[i]);
    return qwen3i_plain_load(y);
}

QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_all_half(const uint8_t *b) { return qwen3i_plain_set1(qwen3i_half_at(b)); }

typedef struct qwen3i_plain_i { int32_t at[16]; } qwen3i_plain_i;
typedef const int8_t *qwen3i_plain_w;
typedef const int16_t *qwen3i_plain_x;
QWEN3I_INLINE qwen3i_plain_w qwen3i_plain_wide(const int8_t *w) { return w; }
QWEN3I_INLINE qwen3i_plain_x qwen3i_plain_spread(const int16_t *x) { return x; }

QWEN3I_INLINE qwen3i_plain_i qwen3i_plain_all(int32_t a) {
    qwen3i_plain_i y;
    int i;
    QWEN3I_LANES y.at[i] = a;
    return y;
}

QWEN3I_INLINE qwen3i_plain_i qwen3i_plain_dot4(qwen3i_plain_i sum, qwen3i_plain_w w, qwen3i_plain_x x) {
    int i;
    QWEN3I_LANES sum.at[i] += w[4 * i] * x[0] + w[4 * i + 2] * x[1] + w[4 * i + 1] * x[2] + w[4 * i + 3] * x[3];
    return sum;
}

QWEN3I_INLINE qwen3i_plain_v qwen3i_plain_float(qwen3i_plain_i v) {
    float y[16];
    int i;
    QWEN3I_LANES y[i] = (float)v.at[i];
    return qwen3i_plain_load(y);
}

QWEN3I_INLINE qwen3i_plain_i qwen3i_plain_cut(qwen3i_plain_v v) {
    float x[16];
    qwen3i_plain_i y;
    int i;
    qwen3i_plain_store(x, v);
    QWEN3I_LANES y.at[i] = (int32_t)x[i];
    return y;
}

QWEN3I_INLINE void qwen3i_plain_keep(int32_t *p, qwen3i_plain_i v) { memcpy(p, &v, sizeof v); }

/* n_cols columns of up to 16 rows to a panel, by WEIGHT FORMATS */
static void qwen3i_plain_panel(qwen3i_panel *p, const uint8_t *w, qwen3i_strip *strip, qwen3i_type type, int n_rows, int n_cols) {
    const qwen3i_format *f = qwen3i_format_of(type);
    const int group = qwen3i_group_of(type), offsets = qwen3i_has_offsets(type);
    qwen3i_unpacked u;
    for (int r = 0; r < 16; r++) {
        const uint8_t *b = w + (size_t)qwen3i_min(r, n_rows - 1) * strip->ld;
        for (int c = 0; c < n_cols; c += f->elements, b += f->bytes) {
            f->unpack(u.q, u.d, u.m, b);
            for (int i = 0; i < f->elements; i += 4) memcpy(p->q[(c + i) / 4][r], u.q + i, 4);
            for (int g = 0; g < f->elements / group; g++) {
                p->d[c / group + g][r] = u.d[g];
                if (offsets) p->m[c / group + g][r] = u.m[g];
            }
        }
    }
}

typedef qwen3i_plain_i qwen3i_plain_sums;
#define qwen3i_plain_none(whole) ((void)(whole), qwen3i_plain_all(0))
#define qwen3i_plain_total(sums) (sums)
#define qwen3i_plain_order qwen3i_order
QWEN3I_DEFINE_KERNELS(qwen3i_plain, , 1, 2)
QWEN3I_DEFINE_BLOCKS(qwen3i_plain, qwen3i_plain, , 1, 2)
static const qwen3i_simd qwen3i_plain_kernels = QWEN3I_KERNELS(qwen3i_plain, qwen3i_plain);

#ifdef QWEN3I_X86
#if defined(__GNUC__) || defined(__clang__)
  #define QWEN3I_TARGET(features) __attribute__((target(features)))
#else
  #define QWEN3I_TARGET(features)       /* Visual C++ compiles any intrinsic anywhere */
#endif
#if defined(__GNUC__) && !defined(__clang__)
  #pragma GCC diagnostic push
  #pragma GCC diagnostic ignored "-Wmaybe-uninitialized"    /* the undefined operands of gcc's own intrinsics */
  #pragma GCC diagnostic ignored "-Wuninitialized"
#endif
/* ---- AVX2 lanes: two registers ------------------------------------------------------------------- */
#define QWEN3I_AVX2_SETS "avx2,fma,f16c"
#define QWEN3I_AVX2 QWEN3I_TARGET(QWEN3I_AVX2_SETS)
#define qwen3i_avx2_load_once qwen3i_avx2_load
#define qwen3i_avx2_name "AVX2"
typedef struct qwen3i_avx2_v { __m256 lo, hi; } qwen3i_avx2_v;

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_pair(__m256 lo, __m256 hi) {
    qwen3i_avx2_v y;
    y.lo = lo;
    y.hi = hi;
    return y;
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_zero(void) {
    return qwen3i_avx2_pair(_mm256_setzero_ps(), _mm256_setzero_ps());
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_set1(float a) {
    return qwen3i_avx2_pair(_mm256_set1_ps(a), _mm256_set1_ps(a));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_load(const float *p) {
    return qwen3i_avx2_pair(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}

QWEN3I_AVX2 QWEN3I_INLINE void qwen3i_avx2_store(float *p, qwen3i_avx2_v v) {
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
}

#define QWEN3I_AVX2_BINARY(name) \
QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_##name(qwen3i_avx2_v a, qwen3i_avx2_v b) { \
    return qwen3i_avx2_pair(_mm256_##name##_ps(a.lo, b.lo), _mm256_##name##_ps(a.hi, b.hi)); \
}
QWEN3I_AVX2_BINARY(add)
QWEN3I_AVX2_BINARY(mul)
QWEN3I_AVX2_BINARY(div)
QWEN3I_AVX2_BINARY(max)
QWEN3I_AVX2_BINARY(min)

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_fma(qwen3i_avx2_v a, qwen3i_avx2_v b, qwen3i_avx2_v c) {
    return qwen3i_avx2_pair(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi));
}

QWEN3I_AVX2 QWEN3I_INLINE __m256 qwen3i_avx2_widen(const uint16_t *p) {
    __m128i half = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_load_bf16(const uint16_t *p) {
    return qwen3i_avx2_pair(qwen3i_avx2_widen(p), qwen3i_avx2_widen(p + 8));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_load_f16(const uint16_t *p) {
    return qwen3i_avx2_pair(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)),
                            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p + 8))));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_all_half(const uint8_t *b) {
    const __m256 d = _mm256_cvtph_ps(_mm_set1_epi16((short)(b[0] | b[1] << 8)));
    return qwen3i_avx2_pair(d, d);
}

QWEN3I_AVX2 QWEN3I_INLINE __m256 qwen3i_avx2_eight_i8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_load_i8(const int8_t *p) {
    return qwen3i_avx2_pair(qwen3i_avx2_eight_i8(p), qwen3i_avx2_eight_i8(p + 8));
}

QWEN3I_AVX2 QWEN3I_INLINE __m256 qwen3i_avx2_eight_e4m3(const uint8_t *p) {
    __m256i v = _mm256_slli_epi32(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)p)), 20);
    v = _mm256_and_si256(v, _mm256_set1_epi32((int)0x87F00000u));
    return _mm256_mul_ps(_mm256_castsi256_ps(v), _mm256_set1_ps(QWEN3I_E4M3_UNIT));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_e4m3(const uint8_t *p) {
    return qwen3i_avx2_pair(qwen3i_avx2_eight_e4m3(p), qwen3i_avx2_eight_e4m3(p + 8));
}

/* Whole numbers: of each four columns the even ones lie in two registers, the odd ones in two. */
typedef struct qwen3i_avx2_i { __m256i lo, hi; } qwen3i_avx2_i;
typedef struct qwen3i_avx2_w { qwen3i_avx2_i even, odd; } qwen3i_avx2_w;
typedef struct qwen3i_avx2_x { __m256i even, odd; } qwen3i_avx2_x;

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_i qwen3i_avx2_both(__m256i lo, __m256i hi) {
    qwen3i_avx2_i y;
    y.lo = lo;
    y.hi = hi;
    return y;
}

#define QWEN3I_AVX2_WHOLE(name, parameter, expression) \
QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_i qwen3i_avx2_##name(qwen3i_avx2_i v, parameter) { \
    __m256i a = v.lo; \
    v.lo = expression; \
    a = v.hi; \
    v.hi = expression; \
    return v; \
}
QWEN3I_AVX2_WHOLE(shr, int n, _mm256_srli_epi32(a, n))
QWEN3I_AVX2_WHOLE(shl, int n, _mm256_slli_epi32(a, n))
QWEN3I_AVX2_WHOLE(and, int mask, _mm256_and_si256(a, _mm256_set1_epi32(mask)))

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_i qwen3i_avx2_or(qwen3i_avx2_i a, qwen3i_avx2_i b) {
    return qwen3i_avx2_both(_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_i qwen3i_avx2_less(qwen3i_avx2_i a, qwen3i_avx2_i b) {
    return qwen3i_avx2_both(_mm256_sub_epi8(a.lo, b.lo), _mm256_sub_epi8(a.hi, b.hi));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_i qwen3i_avx2_pick(const int8_t *table, qwen3i_avx2_i v) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)table));
    return qwen3i_avx2_both(_mm256_shuffle_epi8(t, v.lo), _mm256_shuffle_epi8(t, v.hi));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_i qwen3i_avx2_all(int a) {
    return qwen3i_avx2_both(_mm256_set1_epi32(a), _mm256_set1_epi32(a));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_i qwen3i_avx2_words(const void *p) {
    const __m256i *y = (const __m256i *)p;
    return qwen3i_avx2_both(_mm256_loadu_si256(y), _mm256_loadu_si256(y + 1));
}

QWEN3I_AVX2 QWEN3I_INLINE void qwen3i_avx2_keep(void *p, qwen3i_avx2_i v) {
    __m256i *y = (__m256i *)p;
    _mm256_storeu_si256(y, v.lo);
    _mm256_storeu_si256(y + 1, v.hi);
}

QWEN3I_AVX2 QWEN3I_INLINE __m256 qwen3i_avx2_eight_halves(__m256i v) {
    v = _mm256_and_si256(v, _mm256_set1_epi32(0xFFFF));
    return _mm256_cvtph_ps(_mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_half(qwen3i_avx2_i v) {
    return qwen3i_avx2_pair(qwen3i_avx2_eight_halves(v.lo), qwen3i_avx2_eight_halves(v.hi));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_as_float(qwen3i_avx2_i v) {
    return qwen3i_avx2_pair(_mm256_castsi256_ps(v.lo), _mm256_castsi256_ps(v.hi));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_w qwen3i_avx2_wide(const int8_t *p) {
    const __m256i lo = _mm256_loadu_si256((const __m256i *)(const void *)p),
                  hi = _mm256_loadu_si256((const __m256i *)(const void *)(p + 32));
    qwen3i_avx2_w w;
    w.even.lo = _mm256_srai_epi16(_mm256_slli_epi16(lo, 8), 8);
    w.even.hi = _mm256_srai_epi16(_mm256_slli_epi16(hi, 8), 8);
    w.odd.lo = _mm256_srai_epi16(lo, 8);
    w.odd.hi = _mm256_srai_epi16(hi, 8);
    return w;
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_x qwen3i_avx2_spread(const int16_t *p) {
    float even, odd;                    /* not one load of both, which gcc would then take apart */
    qwen3i_avx2_x x;
    memcpy(&even, p, 4);
    memcpy(&odd, p + 2, 4);
    x.even = _mm256_castps_si256(_mm256_set1_ps(even));
    x.odd = _mm256_castps_si256(_mm256_set1_ps(odd));
    return x;
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_i qwen3i_avx2_dot4(qwen3i_avx2_i sum, qwen3i_avx2_w w, qwen3i_avx2_x x) {
    sum.lo = _mm256_add_epi32(sum.lo, _mm256_madd_epi16(w.even.lo, x.even));
    sum.hi = _mm256_add_epi32(sum.hi, _mm256_madd_epi16(w.even.hi, x.even));
    sum.lo = _mm256_add_epi32(sum.lo, _mm256_madd_epi16(w.odd.lo, x.odd));
    sum.hi = _mm256_add_epi32(sum.hi, _mm256_madd_epi16(w.odd.hi, x.odd));
    return sum;
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_float(qwen3i_avx2_i v) {
    return qwen3i_avx2_pair(_mm256_cvtepi32_ps(v.lo), _mm256_cvtepi32_ps(v.hi));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_i qwen3i_avx2_cut(qwen3i_avx2_v v) {
    return qwen3i_avx2_both(_mm256_cvttps_epi32(v.lo), _mm256_cvttps_epi32(v.hi));
}

QWEN3I_AVX2 QWEN3I_INLINE __m256i qwen3i_avx2_short(const int32_t *q) {
    const __m256i lo = _mm256_loadu_si256((const __m256i *)(const void *)q),
                  hi = _mm256_loadu_si256((const __m256i *)(const void *)(q + 8));
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xD8);
}

QWEN3I_AVX2 QWEN3I_INLINE void qwen3i_avx2_ordered(int16_t *to, const int32_t *q) {
    const __m256i v = _mm256_shufflelo_epi16(qwen3i_avx2_short(q), 0xD8);
    _mm256_storeu_si256((__m256i *)(void *)to, _mm256_shufflehi_epi16(v, 0xD8));
}

QWEN3I_AVX2 QWEN3I_INLINE __m256i qwen3i_avx2_two_rows(const char *p, size_t ld) {
    const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)p));
    return _mm256_inserti128_si256(low, _mm_loadu_si128((const __m128i *)(const void *)(p + 4 * ld)), 1);
}

/* Eight rows: four words of each become four registers, of which y has these halves. */
QWEN3I_AVX2 QWEN3I_INLINE void qwen3i_avx2_turn8(__m256i *y, const char *p, size_t ld) {
    const __m256i a = qwen3i_avx2_two_rows(p, ld), b = qwen3i_avx2_two_rows(p + ld, ld),
                  c = qwen3i_avx2_two_rows(p + 2 * ld, ld), d = qwen3i_avx2_two_rows(p + 3 * ld, ld);
    const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d),
                  AB = _mm256_unpackhi_epi32(a, b), CD = _mm256_unpackhi_epi32(c, d);
    y[0] = _mm256_unpacklo_epi64(ab, cd);
    y[1] = _mm256_unpackhi_epi64(ab, cd);
    y[2] = _mm256_unpacklo_epi64(AB, CD);
    y[3] = _mm256_unpackhi_epi64(AB, CD);
}

QWEN3I_AVX2 QWEN3I_INLINE void qwen3i_avx2_turn(qwen3i_avx2_i *y, const uint8_t *b, size_t ld) {
    __m256i lo[4], hi[4];
    qwen3i_avx2_turn8(lo, (const char *)b, ld);
    qwen3i_avx2_turn8(hi, (const char *)b + 8 * ld, ld);
    QWEN3I_UNROLL for (int i = 0; i < 4; i++) y[i] = qwen3i_avx2_both(lo[i], hi[i]);
}

/* as qwen3i_f32_to_bf16, except for NaN */
QWEN3I_AVX2 QWEN3I_INLINE __m256i qwen3i_avx2_bf16_bits(__m256 v) {
    const __m256 top = _mm256_castsi256_ps(_mm256_set1_epi32(0x7F7F0000));
    __m256i bits = _mm256_castps_si256(_mm256_max_ps(_mm256_min_ps(v, top),
                                                     _mm256_sub_ps(_mm256_setzero_ps(), top)));
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
}

QWEN3I_AVX2 QWEN3I_INLINE void qwen3i_avx2_store_bf16(uint16_t *p, qwen3i_avx2_v v) {
    __m256i packed = _mm256_packus_epi32(qwen3i_avx2_bf16_bits(v.lo), qwen3i_avx2_bf16_bits(v.hi));
    _mm256_storeu_si256((__m256i *)(void *)p, _mm256_permute4x64_epi64(packed, 0xD8));
}

QWEN3I_AVX2 QWEN3I_INLINE __m128i qwen3i_avx2_f16_bits(__m256 v) {
    v = _mm256_max_ps(_mm256_min_ps(v, _mm256_set1_ps(65504.0f)), _mm256_set1_ps(-65504.0f));
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
}

QWEN3I_AVX2 QWEN3I_INLINE void qwen3i_avx2_store_f16(uint16_t *p, qwen3i_avx2_v v) {
    _mm_storeu_si128((__m128i *)(void *)p, qwen3i_avx2_f16_bits(v.lo));
    _mm_storeu_si128((__m128i *)(void *)(p + 8), qwen3i_avx2_f16_bits(v.hi));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_round(qwen3i_avx2_v v) {
    return qwen3i_avx2_pair(_mm256_round_ps(v.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                            _mm256_round_ps(v.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

QWEN3I_AVX2 QWEN3I_INLINE __m256 qwen3i_avx2_exp2i8(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n),
                                                                  _mm256_set1_epi32(127)), 23));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_exp2i(qwen3i_avx2_v n) {
    return qwen3i_avx2_pair(qwen3i_avx2_exp2i8(n.lo), qwen3i_avx2_exp2i8(n.hi));
}

QWEN3I_AVX2 QWEN3I_INLINE qwen3i_avx2_v qwen3i_avx2_drop_below(qwen3i_avx2_v y, qwen3i_avx2_v x, float low) {
    __m256 limit = _mm256_set1_ps(low);
    return qwen3i_avx2_pair(_mm256_andnot_ps(_mm256_cmp_ps(x.lo, limit, _CMP_LT_OQ), y.lo),
                            _mm256_andnot_ps(_mm256_cmp_ps(x.hi, limit, _CMP_LT_OQ), y.hi));
}

QWEN3I_AVX2 QWEN3I_INLINE void qwen3i_avx2_sum(float *sums, const qwen3i_avx2_v *rows) {
    __m256 a = _mm256_add_ps(rows[0].lo, rows[0].hi), b = _mm256_add_ps(rows[1].lo, rows[1].hi);
    __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    ab = _mm256_add_ps(ab, _mm256_permute_ps(ab, 0x4E));
    ab = _mm256_add_ps(ab, _mm256_permute_ps(ab, 0xB1));
    sums[0] = _mm256_cvtss_f32(ab);
    sums[1] = _mm_cvtss_f32(_mm256_extractf128_ps(ab, 1));
}

typedef qwen3i_avx2_i qwen3i_avx2_sums;
#define qwen3i_avx2_none(whole) ((void)(whole), qwen3i_avx2_all(0))
#define qwen3i_avx2_total(sums) (sums)
#define qwen3i_avx2_order qwen3i_avx2_ordered
QWEN3I_DEFINE_KERNELS(qwen3i_avx2, QWEN3I_AVX2, 2, 3)
QWEN3I_DEFINE_FORMATS(qwen3i_avx2, QWEN3I_AVX2)
QWEN3I_DEFINE_BLOCKS(qwen3i_avx2, qwen3i_avx2, QWEN3I_AVX2, 1, 4)
static const qwen3i_simd qwen3i_avx2_kernels = QWEN3I_KERNELS(qwen3i_avx2, qwen3i_avx2);

/* ---- AVX-512 lanes: one register ------------------------------------------------------------- */
#define QWEN3I_AVX512_SETS "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#define QWEN3I_AVX512 QWEN3I_TARGET(QWEN3I_AVX512_SETS)
#define qwen3i_avx512_name "AVX-512"
typedef __m512 qwen3i_avx512_v;

QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_zero(void) { return _mm512_setzero_ps(); }
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_set1(float a) { return _mm512_set1_ps(a); }
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_load(const float *p) { return _mm512_loadu_ps(p); }
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_load_once(const float *p) {
    __m512 v = _mm512_loadu_ps(p);
#if defined(__GNUC__)
    /* or gcc gives each use a load of its own, and loads become the limit */
    __asm__("" : "+v"(v));
#endif
    return v;
}
QWEN3I_AVX512 QWEN3I_INLINE void   qwen3i_avx512_store(float *p, __m512 v) { _mm512_storeu_ps(p, v); }
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_div(__m512 a, __m512 b) { return _mm512_div_ps(a, b); }
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_max(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_min(__m512 a, __m512 b) { return _mm512_min_ps(a, b); }
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_fma(__m512 a, __m512 b, __m512 c) {
    return _mm512_fmadd_ps(a, b, c);
}
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_round(__m512 v) {
    return _mm512_cvtepi32_ps(_mm512_cvtps_epi32(v));
}

QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_load_bf16(const uint16_t *p) {
    __m256i half = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_all_half(const uint8_t *b) {
    return _mm512_cvtph_ps(_mm256_set1_epi16((short)(b[0] | b[1] << 8)));
}

QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_load_i8(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)));
}

QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_e4m3(const uint8_t *p) {
    __m512i v = _mm512_slli_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(const void *)p)), 20);
    v = _mm512_and_si512(v, _mm512_set1_epi32((int)0x87F00000u));
    return _mm512_mul_ps(_mm512_castsi512_ps(v), _mm512_set1_ps(QWEN3I_E4M3_UNIT));
}

/* Whole numbers: of each four columns the even ones lie in one register, the odd ones in another. */
typedef __m512i qwen3i_avx512_i;
typedef struct qwen3i_avx512_w { __m512i even, odd; } qwen3i_avx512_w;
typedef qwen3i_avx512_w qwen3i_avx512_x;

QWEN3I_AVX512 QWEN3I_INLINE __m512i qwen3i_avx512_all(int a) { return _mm512_set1_epi32(a); }
QWEN3I_AVX512 QWEN3I_INLINE __m512i qwen3i_avx512_words(const void *p) { return _mm512_loadu_si512(p); }
QWEN3I_AVX512 QWEN3I_INLINE void qwen3i_avx512_keep(void *p, __m512i v) { _mm512_storeu_si512(p, v); }
QWEN3I_AVX512 QWEN3I_INLINE __m512i qwen3i_avx512_shr(__m512i v, int n) { return _mm512_srli_epi32(v, (unsigned)n); }
QWEN3I_AVX512 QWEN3I_INLINE __m512i qwen3i_avx512_shl(__m512i v, int n) { return _mm512_slli_epi32(v, (unsigned)n); }
QWEN3I_AVX512 QWEN3I_INLINE __m512i qwen3i_avx512_and(__m512i v, int mask) {
    return _mm512_and_si512(v, _mm512_set1_epi32(mask));
}
QWEN3I_AVX512 QWEN3I_INLINE __m512i qwen3i_avx512_or(__m512i a, __m512i b) { return _mm512_or_si512(a, b); }
QWEN3I_AVX512 QWEN3I_INLINE __m512i qwen3i_avx512_less(__m512i a, __m512i b) { return _mm512_sub_epi8(a, b); }
QWEN3I_AVX512 QWEN3I_INLINE __m512i qwen3i_avx512_pick(const int8_t *table, __m512i v) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(const void *)table)), v);
}
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_as_float(__m512i v) { return _mm512_castsi512_ps(v); }
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_half(__m512i v) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v));
}
QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_float(__m512i v) { return _mm512_cvtepi32_ps(v); }
QWEN3I_AVX512 QWEN3I_INLINE __m512i qwen3i_avx512_cut(__m512 v) { return _mm512_cvttps_epi32(v); }

QWEN3I_AVX512 QWEN3I_INLINE qwen3i_avx512_w qwen3i_avx512_wide(const int8_t *p) {
    const __m512i v = _mm512_loadu_si512(p);
    qwen3i_avx512_w w;
    w.even = _mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8);
    w.odd = _mm512_srai_epi16(v, 8);
    return w;
}

QWEN3I_AVX512 QWEN3I_INLINE qwen3i_avx512_x qwen3i_avx512_spread(const int16_t *p) {
    float even, odd;                    /* not one load of both, which gcc would then take apart */
    qwen3i_avx512_x x;
    memcpy(&even, p, 4);
    memcpy(&odd, p + 2, 4);
    x.even = _mm512_castps_si512(_mm512_set1_ps(even));
    x.odd = _mm512_castps_si512(_mm512_set1_ps(odd));
    return x;
}

QWEN3I_AVX512 QWEN3I_INLINE __m512i qwen3i_avx512_dot4(__m512i sum, qwen3i_avx512_w w, qwen3i_avx512_x x) {
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(w.even, x.even));
    return _mm512_add_epi32(sum, _mm512_madd_epi16(w.odd, x.odd));
}

QWEN3I_AVX512 QWEN3I_INLINE __m512i qwen3i_avx512_four_rows(const char *p, size_t ld) {
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(const void *)p));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(const void *)(p + 4 * ld)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(const void *)(p + 8 * ld)), 2);
    return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i *)(const void *)(p + 12 * ld)), 3);
}

QWEN3I_AVX512 QWEN3I_INLINE void qwen3i_avx512_turn(__m512i *y, const uint8_t *from, size_t ld) {
    const char *p = (const char *)from;
    const __m512i a = qwen3i_avx512_four_rows(p, ld), b = qwen3i_avx512_four_rows(p + ld, ld),
                  c = qwen3i_avx512_four_rows(p + 2 * ld, ld), d = qwen3i_avx512_four_rows(p + 3 * ld, ld);
    const __m512i ab = _mm512_unpacklo_epi32(a, b), cd = _mm512_unpacklo_epi32(c, d),
                  AB = _mm512_unpackhi_epi32(a, b), CD = _mm512_unpackhi_epi32(c, d);
    y[0] = _mm512_unpacklo_epi64(ab, cd);
    y[1] = _mm512_unpackhi_epi64(ab, cd);
    y[2] = _mm512_unpacklo_epi64(AB, CD);
    y[3] = _mm512_unpackhi_epi64(AB, CD);
}

/* as qwen3i_f32_to_bf16, except for NaN */
QWEN3I_AVX512 QWEN3I_INLINE void qwen3i_avx512_store_bf16(uint16_t *p, __m512 v) {
    const __m512 top = _mm512_castsi512_ps(_mm512_set1_epi32(0x7F7F0000));
    __m512i bits = _mm512_castps_si512(_mm512_max_ps(_mm512_min_ps(v, top),
                                                     _mm512_sub_ps(_mm512_setzero_ps(), top)));
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(bits));
}

QWEN3I_AVX512 QWEN3I_INLINE void qwen3i_avx512_store_f16(uint16_t *p, __m512 v) {
    v = _mm512_max_ps(_mm512_min_ps(v, _mm512_set1_ps(65504.0f)), _mm512_set1_ps(-65504.0f));
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_maskz_cvtps_ph(0xFFFF, v, _MM_FROUND_TO_NEAREST_INT));
}

QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_exp2i(__m512 n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n),
                                                                  _mm512_set1_epi32(127)), 23));
}

QWEN3I_AVX512 QWEN3I_INLINE __m512 qwen3i_avx512_drop_below(__m512 y, __m512 x, float low) {
    return _mm512_maskz_mov_ps(_mm512_cmpnlt_ps_mask(x, _mm512_set1_ps(low)), y);
}

/* Four trees at once: each step adds halves of two vectors, so that half as many vectors remain. */
QWEN3I_AVX512 QWEN3I_INLINE void qwen3i_avx512_sum(float *sums, const __m512 *rows) {
    __m512 a = rows[0], b = rows[1], c = rows[2], d = rows[3];
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4E));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xB1));
    _mm_storeu_ps(sums, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, all)));
}

typedef qwen3i_avx512_i qwen3i_avx512_sums;
#define qwen3i_avx512_none(whole) ((void)(whole), qwen3i_avx512_all(0))
#define qwen3i_avx512_total(sums) (sums)
#define qwen3i_avx512_order qwen3i_avx2_ordered
QWEN3I_DEFINE_KERNELS(qwen3i_avx512, QWEN3I_AVX512, 4, 6)
QWEN3I_DEFINE_FORMATS(qwen3i_avx512, QWEN3I_AVX512)
QWEN3I_DEFINE_BLOCKS(qwen3i_avx512, qwen3i_avx512, QWEN3I_AVX512, 2, 6)
static const qwen3i_simd qwen3i_avx512_kernels = QWEN3I_KERNELS(qwen3i_avx512, qwen3i_avx512);

/* ---- AVX-512 with instructions that multiply and add whole numbers ---- */
#define QWEN3I_VNNI_SETS "avx512vnni," QWEN3I_AVX512_SETS
#define QWEN3I_VNNI QWEN3I_TARGET(QWEN3I_VNNI_SETS)
#define qwen3i_vnni_name "AVX-512 VNNI"
typedef __m512i qwen3i_vnni_w;          /* with 128 added, as these instructions multiply numbers with signs by others */
typedef struct qwen3i_vnni_x { __m512i high, low; } qwen3i_vnni_x;
typedef qwen3i_vnni_x qwen3i_vnni_sums;

QWEN3I_VNNI QWEN3I_INLINE __m512i qwen3i_vnni_wide(const int8_t *p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0x80808080u));
}

QWEN3I_VNNI QWEN3I_INLINE qwen3i_vnni_x qwen3i_vnni_spread(const int16_t *p) {
    float high, low;                    /* not one load of both, which gcc would then take apart */
    qwen3i_vnni_x x;
    memcpy(&high, p, 4);
    memcpy(&low, p + 2, 4);
    x.high = _mm512_castps_si512(_mm512_set1_ps(high));
    x.low = _mm512_castps_si512(_mm512_set1_ps(low));
    return x;
}

/* Of each four columns the upper bytes, rounded, then the lower ones */
QWEN3I_VNNI QWEN3I_INLINE void qwen3i_vnni_order(int16_t *to, const int32_t *q) {
    const __m256i v = qwen3i_avx2_short(q), up = _mm256_add_epi16(v, _mm256_set1_epi16(128));
    const __m256i bytes = _mm256_blendv_epi8(v, up, _mm256_set1_epi16(-256));
    _mm256_storeu_si256((__m256i *)(void *)to,
                        _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(
                            _mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13, 15, 8, 10, 12, 14))));
}

/* The products of 128 are taken off first. */
QWEN3I_VNNI QWEN3I_INLINE qwen3i_vnni_sums qwen3i_vnni_none(int32_t whole) {
    qwen3i_vnni_sums y;
    y.high = _mm512_setzero_si512();
    y.low = _mm512_set1_epi32(-128 * whole);
    return y;
}

QWEN3I_VNNI QWEN3I_INLINE qwen3i_vnni_sums qwen3i_vnni_dot4(qwen3i_vnni_sums y, __m512i w, qwen3i_vnni_x x) {
    y.high = _mm512_dpbusd_epi32(y.high, w, x.high);
    y.low = _mm512_dpbusd_epi32(y.low, w, x.low);
    return y;
}

QWEN3I_VNNI QWEN3I_INLINE __m512i qwen3i_vnni_total(qwen3i_vnni_sums y) {
    return _mm512_add_epi32(_mm512_slli_epi32(y.high, 8), y.low);
}

QWEN3I_DEFINE_BLOCKS(qwen3i_avx512, qwen3i_vnni, QWEN3I_VNNI, 2, 4)
static const qwen3i_simd qwen3i_vnni_kernels = QWEN3I_KERNELS(qwen3i_avx512, qwen3i_vnni);
#if defined(__GNUC__) && !defined(__clang__)
  #pragma GCC diagnostic pop
#endif
#endif /* QWEN3I_X86 */

#ifdef QWEN3I_NEON
/* ---- NEON lanes: four registers -------------------------------------------------------------- */
#define qwen3i_neon_load_once qwen3i_neon_load
#define qwen3i_neon_name "NEON"
#define QWEN3I_QUADS for (i = 0; i < 4; i++)
typedef float32x4x4_t qwen3i_neon_v;

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_set1(float a) {
    qwen3i_neon_v y;
    int i;
    QWEN3I_QUADS y.val[i] = vdupq_n_f32(a);
    return y;
}

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_zero(void) { return qwen3i_neon_set1(0.0f); }

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_load(const float *p) {
    qwen3i_neon_v y;
    int i;
    QWEN3I_QUADS y.val[i] = vld1q_f32(p + 4 * i);
    return y;
}

QWEN3I_INLINE void qwen3i_neon_store(float *p, qwen3i_neon_v v) {
    int i;
    QWEN3I_QUADS vst1q_f32(p + 4 * i, v.val[i]);
}

#define QWEN3I_NEON_BINARY(name) \
QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_##name(qwen3i_neon_v a, qwen3i_neon_v b) { \
    int i; \
    QWEN3I_QUADS a.val[i] = v##name##q_f32(a.val[i], b.val[i]); \
    return a; \
}
QWEN3I_NEON_BINARY(add)
QWEN3I_NEON_BINARY(mul)
QWEN3I_NEON_BINARY(div)
QWEN3I_NEON_BINARY(max)
QWEN3I_NEON_BINARY(min)

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_round(qwen3i_neon_v v) {
    int i;
    QWEN3I_QUADS v.val[i] = vrndnq_f32(v.val[i]);
    return v;
}

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_fma(qwen3i_neon_v a, qwen3i_neon_v b, qwen3i_neon_v c) {
    int i;
    QWEN3I_QUADS c.val[i] = vfmaq_f32(c.val[i], a.val[i], b.val[i]);
    return c;
}

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_load_bf16(const uint16_t *p) {
    qwen3i_neon_v y;
    int i;
    QWEN3I_QUADS y.val[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
    return y;
}

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_load_f16(const uint16_t *p) {
    qwen3i_neon_v y;
    int i;
    QWEN3I_QUADS y.val[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
    return y;
}

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_all_half(const uint8_t *b) {
    const uint16_t half = (uint16_t)(b[0] | b[1] << 8);
    return qwen3i_neon_set1(vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(half))), 0));
}

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_load_i8(const int8_t *p) {
    int16x8_t low = vmovl_s8(vld1_s8(p)), high = vmovl_s8(vld1_s8(p + 8));
    qwen3i_neon_v y;
    y.val[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(low)));
    y.val[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(low)));
    y.val[2] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(high)));
    y.val[3] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)));
    return y;
}

QWEN3I_INLINE float32x4_t qwen3i_neon_four_e4m3(int16x4_t v) {
    int32x4_t bits = vandq_s32(vshlq_n_s32(vmovl_s16(v), 20), vdupq_n_s32((int32_t)0x87F00000u));
    return vmulq_n_f32(vreinterpretq_f32_s32(bits), QWEN3I_E4M3_UNIT);
}

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_e4m3(const uint8_t *p) {
    int8x16_t v = vreinterpretq_s8_u8(vld1q_u8(p));
    int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_s8(vget_high_s8(v));
    qwen3i_neon_v y;
    y.val[0] = qwen3i_neon_four_e4m3(vget_low_s16(low));
    y.val[1] = qwen3i_neon_four_e4m3(vget_high_s16(low));
    y.val[2] = qwen3i_neon_four_e4m3(vget_low_s16(high));
    y.val[3] = qwen3i_neon_four_e4m3(vget_high_s16(high));
    return y;
}

/* Whole numbers: of four rows the columns 0, 2, 1, 3 */
typedef int32x4x4_t qwen3i_neon_i;
typedef struct qwen3i_neon_w { int16x4_t at[4][4]; } qwen3i_neon_w;
typedef int16x4_t qwen3i_neon_x;

#define QWEN3I_NEON_WHOLE(name, parameter, expression) \
QWEN3I_INLINE qwen3i_neon_i qwen3i_neon_##name(qwen3i_neon_i v, parameter) { \
    int i; \
    QWEN3I_QUADS v.val[i] = expression; \
    return v; \
}
QWEN3I_NEON_WHOLE(shr, int n, vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(v.val[i]), vdupq_n_s32(-n))))
QWEN3I_NEON_WHOLE(shl, int n, vshlq_s32(v.val[i], vdupq_n_s32(n)))
QWEN3I_NEON_WHOLE(and, int mask, vandq_s32(v.val[i], vdupq_n_s32(mask)))
QWEN3I_NEON_WHOLE(or, qwen3i_neon_i w, vorrq_s32(v.val[i], w.val[i]))
QWEN3I_NEON_WHOLE(less, qwen3i_neon_i w,
                  vreinterpretq_s32_s8(vsubq_s8(vreinterpretq_s8_s32(v.val[i]), vreinterpretq_s8_s32(w.val[i]))))

QWEN3I_INLINE qwen3i_neon_i qwen3i_neon_pick(const int8_t *table, qwen3i_neon_i v) {
    const int8x16_t t = vld1q_s8(table);
    int i;
    QWEN3I_QUADS v.val[i] = vreinterpretq_s32_s8(vqtbl1q_s8(t, vreinterpretq_u8_s32(v.val[i])));
    return v;
}

QWEN3I_INLINE qwen3i_neon_i qwen3i_neon_all(int32_t a) {
    qwen3i_neon_i y;
    int i;
    QWEN3I_QUADS y.val[i] = vdupq_n_s32(a);
    return y;
}

QWEN3I_INLINE int32x4_t qwen3i_neon_four_words(const void *p) { return vreinterpretq_s32_s8(vld1q_s8((const int8_t *)p)); }

QWEN3I_INLINE qwen3i_neon_i qwen3i_neon_words(const void *p) {
    qwen3i_neon_i y;
    int i;
    QWEN3I_QUADS y.val[i] = qwen3i_neon_four_words((const int8_t *)p + 16 * i);
    return y;
}

QWEN3I_INLINE void qwen3i_neon_keep(void *p, qwen3i_neon_i v) {
    int i;
    QWEN3I_QUADS vst1q_s8((int8_t *)p + 16 * i, vreinterpretq_s8_s32(v.val[i]));
}

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_half(qwen3i_neon_i v) {
    qwen3i_neon_v y;
    int i;
    QWEN3I_QUADS y.val[i] = vcvt_f32_f16(vreinterpret_f16_s16(vmovn_s32(v.val[i])));
    return y;
}

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_as_float(qwen3i_neon_i v) {
    qwen3i_neon_v y;
    int i;
    QWEN3I_QUADS y.val[i] = vreinterpretq_f32_s32(v.val[i]);
    return y;
}

QWEN3I_INLINE qwen3i_neon_w qwen3i_neon_wide(const int8_t *p) {
    qwen3i_neon_w w;
    int i;
    QWEN3I_QUADS {
        int16x8_t v = vreinterpretq_s16_s8(vld1q_s8(p + 16 * i));
        int16x8_t even = vshrq_n_s16(vshlq_n_s16(v, 8), 8), odd = vshrq_n_s16(v, 8);
        w.at[i][0] = vget_low_s16(vuzp1q_s16(even, even));
        w.at[i][1] = vget_low_s16(vuzp2q_s16(even, even));
        w.at[i][2] = vget_low_s16(vuzp1q_s16(odd, odd));
        w.at[i][3] = vget_low_s16(vuzp2q_s16(odd, odd));
    }
    return w;
}

QWEN3I_INLINE qwen3i_neon_x qwen3i_neon_spread(const int16_t *p) { return vld1_s16(p); }

QWEN3I_INLINE qwen3i_neon_i qwen3i_neon_dot4(qwen3i_neon_i sum, qwen3i_neon_w w, qwen3i_neon_x x) {
    int i;
    QWEN3I_QUADS {
        sum.val[i] = vmlal_lane_s16(sum.val[i], w.at[i][0], x, 0);
        sum.val[i] = vmlal_lane_s16(sum.val[i], w.at[i][1], x, 1);
        sum.val[i] = vmlal_lane_s16(sum.val[i], w.at[i][2], x, 2);
        sum.val[i] = vmlal_lane_s16(sum.val[i], w.at[i][3], x, 3);
    }
    return sum;
}

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_float(qwen3i_neon_i v) {
    qwen3i_neon_v y;
    int i;
    QWEN3I_QUADS y.val[i] = vcvtq_f32_s32(v.val[i]);
    return y;
}

QWEN3I_INLINE qwen3i_neon_i qwen3i_neon_cut(qwen3i_neon_v v) {
    qwen3i_neon_i y;
    int i;
    QWEN3I_QUADS y.val[i] = vcvtq_s32_f32(v.val[i]);
    return y;
}

QWEN3I_INLINE void qwen3i_neon_turn(qwen3i_neon_i *y, const uint8_t *b, size_t ld) {
    int i;
    QWEN3I_QUADS {
        const uint8_t *p = b + 4 * (size_t)i * ld;
        int32x4x2_t even = vzipq_s32(qwen3i_neon_four_words(p), qwen3i_neon_four_words(p + 2 * ld)),
                    odd = vzipq_s32(qwen3i_neon_four_words(p + ld), qwen3i_neon_four_words(p + 3 * ld));
        int32x4x2_t low = vzipq_s32(even.val[0], odd.val[0]), high = vzipq_s32(even.val[1], odd.val[1]);
        y[0].val[i] = low.val[0];
        y[1].val[i] = low.val[1];
        y[2].val[i] = high.val[0];
        y[3].val[i] = high.val[1];
    }
}

QWEN3I_INLINE void qwen3i_neon_store_bf16(uint16_t *p, qwen3i_neon_v v) {
    float part[16];
    int i;
    qwen3i_neon_store(part, v);
    QWEN3I_LANES p[i] = qwen3i_f32_to_bf16(part[i]);
}

QWEN3I_INLINE void qwen3i_neon_store_f16(uint16_t *p, qwen3i_neon_v v) {
    int i;
    v = qwen3i_neon_max(qwen3i_neon_min(v, qwen3i_neon_set1(65504.0f)), qwen3i_neon_set1(-65504.0f));
    QWEN3I_QUADS vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(v.val[i])));
}

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_exp2i(qwen3i_neon_v n) {
    int i;
    QWEN3I_QUADS {
        int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.val[i]), vdupq_n_s32(127));
        n.val[i] = vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
    }
    return n;
}

QWEN3I_INLINE qwen3i_neon_v qwen3i_neon_drop_below(qwen3i_neon_v y, qwen3i_neon_v x, float low) {
    int i;
    QWEN3I_QUADS {
        uint32x4_t below = vcltq_f32(x.val[i], vdupq_n_f32(low));
        y.val[i] = vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y.val[i]), below));
    }
    return y;
}

QWEN3I_INLINE void qwen3i_neon_sum(float *sums, const qwen3i_neon_v *rows) {
    int r;
    for (r = 0; r < 2; r++) {
        float32x4_t even = vaddq_f32(rows[r].val[0], rows[r].val[2]),
                           odd = vaddq_f32(rows[r].val[1], rows[r].val[3]);
        float32x4_t four = vaddq_f32(even, odd);
        float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        sums[r] = vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
}

typedef qwen3i_neon_i qwen3i_neon_sums;
#define qwen3i_neon_none(whole) ((void)(whole), qwen3i_neon_all(0))
#define qwen3i_neon_total(sums) (sums)
#define qwen3i_neon_order qwen3i_order
QWEN3I_DEFINE_KERNELS(qwen3i_neon, , 2, 3)
QWEN3I_DEFINE_FORMATS(qwen3i_neon, )
QWEN3I_DEFINE_BLOCKS(qwen3i_neon, qwen3i_neon, , 1, 2)
static const qwen3i_simd qwen3i_neon_kernels = QWEN3I_KERNELS(qwen3i_neon, qwen3i_neon);
#endif /* QWEN3I_NEON */

#ifdef QWEN3I_WASM
/* ---- WebAssembly lanes: four registers; the same bits as plain C, since neither fuses products and sums ---- */
#define qwen3i_wasm_load_once qwen3i_wasm_load
#define qwen3i_wasm_name "WebAssembly SIMD"
#define QWEN3I_WASM_QUADS for (i = 0; i < 4; i++)
typedef struct qwen3i_wasm_v { v128_t q[4]; } qwen3i_wasm_v;

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_set1(float a) {
    qwen3i_wasm_v y;
    int i;
    QWEN3I_WASM_QUADS y.q[i] = wasm_f32x4_splat(a);
    return y;
}

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_zero(void) { return qwen3i_wasm_set1(0.0f); }

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_load(const float *p) {
    qwen3i_wasm_v y;
    int i;
    QWEN3I_WASM_QUADS y.q[i] = wasm_v128_load(p + 4 * i);
    return y;
}

QWEN3I_INLINE void qwen3i_wasm_store(float *p, qwen3i_wasm_v v) {
    int i;
    QWEN3I_WASM_QUADS wasm_v128_store(p + 4 * i, v.q[i]);
}

#define QWEN3I_WASM_BINARY(name, operation) \
QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_##name(qwen3i_wasm_v a, qwen3i_wasm_v b) { \
    int i; \
    QWEN3I_WASM_QUADS a.q[i] = operation; \
    return a; \
}
QWEN3I_WASM_BINARY(add, wasm_f32x4_add(a.q[i], b.q[i]))
QWEN3I_WASM_BINARY(mul, wasm_f32x4_mul(a.q[i], b.q[i]))
QWEN3I_WASM_BINARY(div, wasm_f32x4_div(a.q[i], b.q[i]))
QWEN3I_WASM_BINARY(max, wasm_f32x4_pmax(b.q[i], a.q[i]))     /* a > b ? a : b */
QWEN3I_WASM_BINARY(min, wasm_f32x4_pmin(b.q[i], a.q[i]))     /* a < b ? a : b */

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_fma(qwen3i_wasm_v a, qwen3i_wasm_v b, qwen3i_wasm_v c) {
    return qwen3i_wasm_add(c, qwen3i_wasm_mul(a, b));
}

QWEN3I_INLINE v128_t qwen3i_wasm_whole(v128_t x) {     /* to the nearest integer, halves away from zero */
    v128_t sign = wasm_v128_and(x, wasm_f32x4_splat(-0.0f));
    return wasm_i32x4_trunc_sat_f32x4(wasm_f32x4_add(x, wasm_v128_or(sign, wasm_f32x4_splat(0.5f))));
}

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_round(qwen3i_wasm_v v) {
    int i;
    QWEN3I_WASM_QUADS v.q[i] = wasm_f32x4_convert_i32x4(qwen3i_wasm_whole(v.q[i]));
    return v;
}

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_load_bf16(const uint16_t *p) {
    qwen3i_wasm_v y;
    int i;
    QWEN3I_WASM_QUADS y.q[i] = wasm_i32x4_shl(wasm_u32x4_load16x4(p + 4 * i), 16);
    return y;
}

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_all_half(const uint8_t *b) { return qwen3i_wasm_set1(qwen3i_half_at(b)); }

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_load_i8(const int8_t *p) {
    v128_t low = wasm_i16x8_load8x8(p), high = wasm_i16x8_load8x8(p + 8);
    qwen3i_wasm_v y;
    y.q[0] = wasm_f32x4_convert_i32x4(wasm_i32x4_extend_low_i16x8(low));
    y.q[1] = wasm_f32x4_convert_i32x4(wasm_i32x4_extend_high_i16x8(low));
    y.q[2] = wasm_f32x4_convert_i32x4(wasm_i32x4_extend_low_i16x8(high));
    y.q[3] = wasm_f32x4_convert_i32x4(wasm_i32x4_extend_high_i16x8(high));
    return y;
}

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_e4m3(const uint8_t *p) {
    qwen3i_wasm_v y;
    int i;
    QWEN3I_WASM_QUADS {
        v128_t v = wasm_i32x4_extend_low_i16x8(wasm_i16x8_extend_low_i8x16(wasm_v128_load32_zero(p + 4 * i)));
        v = wasm_v128_and(wasm_i32x4_shl(v, 20), wasm_i32x4_splat((int)0x87F00000u));
        y.q[i] = wasm_f32x4_mul(v, wasm_f32x4_splat(QWEN3I_E4M3_UNIT));
    }
    return y;
}

/* as qwen3i_f16_to_f32: the exponent is put right by a product, which also makes subnormals normal */
QWEN3I_INLINE v128_t qwen3i_wasm_widen_f16(v128_t half) {
    const v128_t top = wasm_f32x4_splat(65536.0f);     /* from here on: infinity and NaN */
    v128_t sign = wasm_i32x4_shl(wasm_v128_and(half, wasm_i32x4_splat(0x8000)), 16);
    v128_t bits = wasm_i32x4_shl(wasm_v128_and(half, wasm_i32x4_splat(0x7FFF)), 13);
    v128_t y = wasm_f32x4_mul(bits, wasm_f32x4_splat(5.192296858534828e33f));      /* 2^112 */
    v128_t special = wasm_v128_and(wasm_f32x4_ge(y, top), wasm_i32x4_splat(0x7F800000));
    return wasm_v128_or(wasm_v128_or(y, special), sign);
}

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_load_f16(const uint16_t *p) {
    qwen3i_wasm_v y;
    int i;
    QWEN3I_WASM_QUADS y.q[i] = qwen3i_wasm_widen_f16(wasm_u32x4_load16x4(p + 4 * i));
    return y;
}

QWEN3I_INLINE void qwen3i_wasm_store_bf16(uint16_t *p, qwen3i_wasm_v v) {
    float part[16];
    int i;
    qwen3i_wasm_store(part, v);
    QWEN3I_LANES p[i] = qwen3i_f32_to_bf16(part[i]);
}

QWEN3I_INLINE void qwen3i_wasm_store_f16(uint16_t *p, qwen3i_wasm_v v) {
    float part[16];
    int i;
    qwen3i_wasm_store(part, v);
    QWEN3I_LANES p[i] = qwen3i_f32_to_f16(part[i]);
}

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_exp2i(qwen3i_wasm_v n) {
    int i;
    QWEN3I_WASM_QUADS {
        v128_t exponent = wasm_i32x4_add(wasm_i32x4_trunc_sat_f32x4(n.q[i]), wasm_i32x4_splat(127));
        n.q[i] = wasm_i32x4_shl(exponent, 23);
    }
    return n;
}

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_drop_below(qwen3i_wasm_v y, qwen3i_wasm_v x, float low) {
    int i;
    QWEN3I_WASM_QUADS y.q[i] = wasm_v128_andnot(y.q[i], wasm_f32x4_lt(x.q[i], wasm_f32x4_splat(low)));
    return y;
}

QWEN3I_INLINE void qwen3i_wasm_sum(float *sums, const qwen3i_wasm_v *rows) {
    v128_t even = wasm_f32x4_add(rows[0].q[0], rows[0].q[2]),
                  odd = wasm_f32x4_add(rows[0].q[1], rows[0].q[3]);
    v128_t four = wasm_f32x4_add(even, odd);
    v128_t two = wasm_f32x4_add(four, wasm_i32x4_shuffle(four, four, 2, 3, 0, 1));
    sums[0] = wasm_f32x4_extract_lane(two, 0) + wasm_f32x4_extract_lane(two, 1);
}

/* ---- whole numbers: of each four columns the even ones lie in one register, the odd ones in another ---- */
typedef struct qwen3i_wasm_i { v128_t q[4]; } qwen3i_wasm_i;
typedef struct qwen3i_wasm_w { v128_t even[4], odd[4]; } qwen3i_wasm_w;
typedef struct qwen3i_wasm_x { v128_t even, odd; } qwen3i_wasm_x;

#define QWEN3I_WASM_WHOLE(name, argument, operation) \
QWEN3I_INLINE qwen3i_wasm_i qwen3i_wasm_##name(qwen3i_wasm_i v, argument) { \
    int i; \
    QWEN3I_WASM_QUADS v.q[i] = operation; \
    return v; \
}
QWEN3I_WASM_WHOLE(shr, int by, wasm_u32x4_shr(v.q[i], by))
QWEN3I_WASM_WHOLE(shl, int by, wasm_i32x4_shl(v.q[i], by))
QWEN3I_WASM_WHOLE(and, int mask, wasm_v128_and(v.q[i], wasm_i32x4_splat(mask)))
QWEN3I_WASM_WHOLE(or, qwen3i_wasm_i a, wasm_v128_or(v.q[i], a.q[i]))
QWEN3I_WASM_WHOLE(less, qwen3i_wasm_i a, wasm_i8x16_sub(v.q[i], a.q[i]))

QWEN3I_INLINE qwen3i_wasm_i qwen3i_wasm_pick(const int8_t *table, qwen3i_wasm_i v) {
    const v128_t t = wasm_v128_load(table);
    int i;
    QWEN3I_WASM_QUADS v.q[i] = wasm_i8x16_swizzle(t, v.q[i]);
    return v;
}

QWEN3I_INLINE qwen3i_wasm_i qwen3i_wasm_all(int32_t a) {
    qwen3i_wasm_i y;
    int i;
    QWEN3I_WASM_QUADS y.q[i] = wasm_i32x4_splat(a);
    return y;
}

QWEN3I_INLINE qwen3i_wasm_i qwen3i_wasm_words(const void *p) {
    qwen3i_wasm_i y;
    int i;
    QWEN3I_WASM_QUADS y.q[i] = wasm_v128_load((const char *)p + 16 * i);
    return y;
}

QWEN3I_INLINE void qwen3i_wasm_keep(void *p, qwen3i_wasm_i v) {
    int i;
    QWEN3I_WASM_QUADS wasm_v128_store((char *)p + 16 * i, v.q[i]);
}

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_half(qwen3i_wasm_i v) {
    qwen3i_wasm_v y;
    int i;
    QWEN3I_WASM_QUADS y.q[i] = qwen3i_wasm_widen_f16(wasm_v128_and(v.q[i], wasm_i32x4_splat(0xFFFF)));
    return y;
}

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_as_float(qwen3i_wasm_i v) {
    qwen3i_wasm_v y;
    int i;
    QWEN3I_WASM_QUADS y.q[i] = v.q[i];
    return y;
}

QWEN3I_INLINE qwen3i_wasm_w qwen3i_wasm_wide(const int8_t *p) {
    qwen3i_wasm_w w;
    int i;
    QWEN3I_WASM_QUADS {
        v128_t v = wasm_v128_load(p + 16 * i);
        w.even[i] = wasm_i16x8_shr(wasm_i16x8_shl(v, 8), 8);
        w.odd[i] = wasm_i16x8_shr(v, 8);
    }
    return w;
}

QWEN3I_INLINE qwen3i_wasm_x qwen3i_wasm_spread(const int16_t *p) {
    qwen3i_wasm_x x;
    x.even = wasm_v128_load32_splat(p);
    x.odd = wasm_v128_load32_splat(p + 2);
    return x;
}

QWEN3I_INLINE qwen3i_wasm_i qwen3i_wasm_dot4(qwen3i_wasm_i sum, qwen3i_wasm_w w, qwen3i_wasm_x x) {
    int i;
    QWEN3I_WASM_QUADS sum.q[i] = wasm_i32x4_add(wasm_i32x4_add(sum.q[i], wasm_i32x4_dot_i16x8(w.even[i], x.even)),
                                                wasm_i32x4_dot_i16x8(w.odd[i], x.odd));
    return sum;
}

QWEN3I_INLINE qwen3i_wasm_v qwen3i_wasm_float(qwen3i_wasm_i v) {
    qwen3i_wasm_v y;
    int i;
    QWEN3I_WASM_QUADS y.q[i] = wasm_f32x4_convert_i32x4(v.q[i]);
    return y;
}

QWEN3I_INLINE qwen3i_wasm_i qwen3i_wasm_cut(qwen3i_wasm_v v) {
    qwen3i_wasm_i y;
    int i;
    QWEN3I_WASM_QUADS y.q[i] = wasm_i32x4_trunc_sat_f32x4(v.q[i]);
    return y;
}

QWEN3I_INLINE void qwen3i_wasm_turn(qwen3i_wasm_i *y, const uint8_t *from, size_t ld) {
    int i;
    QWEN3I_WASM_QUADS {
        const uint8_t *p = from + 4 * (size_t)i * ld;
        v128_t a = wasm_v128_load(p), b = wasm_v128_load(p + ld), c = wasm_v128_load(p + 2 * ld),
               d = wasm_v128_load(p + 3 * ld);
        v128_t ab = wasm_i32x4_shuffle(a, b, 0, 4, 1, 5), cd = wasm_i32x4_shuffle(c, d, 0, 4, 1, 5),
               AB = wasm_i32x4_shuffle(a, b, 2, 6, 3, 7), CD = wasm_i32x4_shuffle(c, d, 2, 6, 3, 7);
        y[0].q[i] = wasm_i64x2_shuffle(ab, cd, 0, 2);
        y[1].q[i] = wasm_i64x2_shuffle(ab, cd, 1, 3);
        y[2].q[i] = wasm_i64x2_shuffle(AB, CD, 0, 2);
        y[3].q[i] = wasm_i64x2_shuffle(AB, CD, 1, 3);
    }
}

typedef qwen3i_wasm_i qwen3i_wasm_sums;
#define qwen3i_wasm_none(whole) ((void)(whole), qwen3i_wasm_all(0))
#define qwen3i_wasm_total(sums) (sums)
#define qwen3i_wasm_order qwen3i_order
QWEN3I_DEFINE_KERNELS(qwen3i_wasm, , 1, 2)
QWEN3I_DEFINE_FORMATS(qwen3i_wasm, )
QWEN3I_DEFINE_BLOCKS(qwen3i_wasm, qwen3i_wasm, , 1, 2)
static const qwen3i_simd qwen3i_wasm_kernels = QWEN3I_KERNELS(qwen3i_wasm, qwen3i_wasm);
#endif /* QWEN3I_WASM */

#ifdef QWEN3I_X86
/* registers a, b, c, d of cpuid, zero if the processor does not know the leaf */
static void qwen3i_cpuid(unsigned leaf, unsigned *r) {
#if defined(_MSC_VER)
    int known[4], at[4];
    __cpuid(known, 0);
    __cpuidex(at, (int)leaf, 0);
    for (int i = 0; i < 4; i++) r[i] = (unsigned)known[0] >= leaf ? (unsigned)at[i] : 0;
#else
    memset(r, 0, 4 * sizeof *r);
    __get_cpuid_count(leaf, 0, &r[0], &r[1], &r[2], &r[3]);
#endif
}

/* Which registers the system saves: bit 2 for those of AVX, bits 5 to 7 for those of AVX-512 */
QWEN3I_TARGET("xsave") static unsigned qwen3i_saved_registers(void) {
    unsigned r[4];
    qwen3i_cpuid(1, r);
    if (!(r[2] >> 27 & 1)) return 0;    /* it does not say */
#if defined(_MSC_VER)
    return (unsigned)_xgetbv(0);
#else
    __asm__("xgetbv" : "=a"(r[0]), "=d"(r[3]) : "c"(0));
    return r[0];
#endif
}

/* Does this machine have all of these sets? The string is the one that the kernels are compiled with. */
static int qwen3i_cpu_has(const char *sets) {
    static const struct { const char *name; unsigned leaf, reg, bit, saved; } known[] = {
        {"fma", 1, 2, 12, 0x06}, {"f16c", 1, 2, 29, 0x06}, {"avx2", 7, 1, 5, 0x06},
        {"avx512f", 7, 1, 16, 0xE6}, {"avx512dq", 7, 1, 17, 0xE6}, {"avx512bw", 7, 1, 30, 0xE6},
        {"avx512vl", 7, 1, 31, 0xE6}, {"avx512vnni", 7, 2, 11, 0xE6}};
    const unsigned saved = qwen3i_saved_registers();
    unsigned r[4];
    size_t n;
    int i;
    for (; *sets; sets += n + (sets[n] == ',')) {
        n = strcspn(sets, ",");
        for (i = 0; i < QWEN3I_COUNT(known); i++)
            if (strlen(known[i].name) == n && memcmp(known[i].name, sets, n) == 0) break;
        if (i == QWEN3I_COUNT(known)) return 0;
        qwen3i_cpuid(known[i].leaf, r);
        if (!(r[known[i].reg] >> known[i].bit & 1) || (saved & known[i].saved) != known[i].saved) return 0;
    }
    return 1;
}
#endif

/* Kernels of sets below what the compiler takes for granted are never reached, and so left out: with
   -march=x86-64-v3 the plain ones, with -march=x86-64-v4 those of AVX2, too. Tests compare all. */
#ifdef QWEN3I_ALL_SETS
  #define QWEN3I_SURE_AVX2   0
  #define QWEN3I_SURE_AVX512 0
  #define QWEN3I_PLAIN       1
#else
  #if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
    #define QWEN3I_SURE_AVX2 1
  #else
    #define QWEN3I_SURE_AVX2 0
  #endif
  #if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
    #define QWEN3I_SURE_AVX512 QWEN3I_SURE_AVX2
  #else
    #define QWEN3I_SURE_AVX512 0
  #endif
  #if defined(QWEN3I_NEON) || defined(QWEN3I_WASM)
    #define QWEN3I_PLAIN 0
  #elif defined(QWEN3I_X86)
    #define QWEN3I_PLAIN !QWEN3I_SURE_AVX2
  #else
    #define QWEN3I_PLAIN 1
  #endif
#endif

/* The instruction sets that this machine runs, best first; level 0 is what contexts use. NULL: no more. */
static const qwen3i_simd *qwen3i_simd_level(int level) {
    const qwen3i_simd *found[5];
    int n = 0;
#ifdef QWEN3I_X86
    if (qwen3i_cpu_has(QWEN3I_VNNI_SETS)) found[n++] = &qwen3i_vnni_kernels;
    if (QWEN3I_SURE_AVX512 || qwen3i_cpu_has(QWEN3I_AVX512_SETS)) found[n++] = &qwen3i_avx512_kernels;
    if (!QWEN3I_SURE_AVX512 && (QWEN3I_SURE_AVX2 || qwen3i_cpu_has(QWEN3I_AVX2_SETS)))
        found[n++] = &qwen3i_avx2_kernels;
#endif
#ifdef QWEN3I_NEON
    found[n++] = &qwen3i_neon_kernels;
#endif
#ifdef QWEN3I_WASM
    found[n++] = &qwen3i_wasm_kernels;
#endif
    if (QWEN3I_PLAIN) found[n++] = &qwen3i_plain_kernels;
    return level < n ? found[level] : NULL;
}

/* ================================================================================================
   CPU BACKEND: the reference. float32 everywhere between the matrices; every row's result depends on
   that row alone, bit for bit, whatever the batch, the chunk size and the number of threads.
   ================================================================================================ */
#define QWEN3I_PANEL_ROWS 64            /* rows of a matrix in Q8_0 or FP8, of QWEN3I_K_BLOCK columns, that
                                           become float32 at a time */
#define QWEN3I_PANEL_LD (QWEN3I_K_BLOCK + 16)   /* floats between them: powers of two collide in caches */

typedef union qwen3i_panels {           /* one lane's part of a matrix, unpacked */
    float        floats[QWEN3I_PANEL_ROWS * QWEN3I_PANEL_LD];
    qwen3i_panel whole[QWEN3I_PANELS];
} qwen3i_panels;

typedef struct qwen3i_exec {            /* who computes, and with which instructions */
    qwen3i_pool       *pool;
    const qwen3i_simd *simd;
    qwen3i_panels     *panels;          /* [lanes] */
    qwen3i_rounded    *parts;           /* [rows, qwen3i_parts(the most columns of a matrix)] */
} qwen3i_exec;

/* ---- embedding and norms ------------------------------------------------------------------------- */
/* x[i] = embed[tokens[i]]: tokens [n], embed [n_vocab, n_embd], x [n, n_embd] */
static void qwen3i_embed(const qwen3i_exec *e, float *x, const qwen3i_matrix *embed,
                         const qwen3_token *tokens, int n) {
    size_t row_bytes = (size_t)qwen3i_row_bytes(embed->type, embed->cols);
    const char *table = (const char *)embed->data;
    int i;
    for (i = 0; i < n; i++, x += embed->cols)
        e->simd->load(x, table + (size_t)tokens[i] * row_bytes, embed->type, embed->cols);
}

typedef struct qwen3i_rmsnorm_args {
    const qwen3i_simd *simd;
    float             *y;               /* [n, width] */
    const float       *x, *gain;        /* [n, width], [width] */
    int                width;
    float              eps;
} qwen3i_rmsnorm_args;

static void qwen3i_rmsnorm_rows(void *args, int begin, int end, int lane) {
    const qwen3i_rmsnorm_args *a = (const qwen3i_rmsnorm_args *)args;
    size_t width = (size_t)a->width, i;
    (void)lane;
    for (i = (size_t)begin; i < (size_t)end; i++)
        a->simd->rmsnorm(a->y + i * width, a->x + i * width, a->gain, a->width, a->eps);
}

/* y = x / sqrt(mean(x^2) + eps) * gain for each row: x, y [n, width], gain [width]; y may be x */
static void qwen3i_rmsnorm(const qwen3i_exec *e, float *y, const float *x, const float *gain,
                           int n, int width, float eps) {
    qwen3i_rmsnorm_args a;
    a.simd = e->simd; a.y = y; a.x = x; a.gain = gain; a.width = width; a.eps = eps;
    qwen3i_parallel(e->pool, n, 4, qwen3i_rmsnorm_rows, &a);
}

/* The same for each head of one row, in place: x [n_head, head_dim], gain [head_dim] */
static void qwen3i_rmsnorm_heads(const qwen3i_simd *simd, float *x, const float *gain,
                                 int n_head, int head_dim, float eps) {
    int i;
    for (i = 0; i < n_head; i++, x += head_dim) simd->rmsnorm(x, x, gain, head_dim, eps);
}

/* ---- rotary position embedding --------------------------------------------------------------- */
/* The pair of dimensions that turns `turns` times over the original context (YaRN). */
static double qwen3i_yarn_pair(const qwen3i_config *cfg, double original_ctx, double turns) {
    return cfg->head_dim * log(original_ctx / (turns * 6.283185307179586)) / (2 * log(cfg->rope_theta));
}

/* freqs [head_dim / 2]: radians a position, in float32 as transformers computes them. yarn_factor
   overrides the configuration's if it is not 0. Returns the factor for cosines and sines. */
QWEN3I_COLD
static float qwen3i_rope_freqs(float *freqs, const qwen3i_config *cfg, double yarn_factor) {
    double factor = yarn_factor > 0 ? yarn_factor : cfg->yarn_factor, low, high;
    int i, half = cfg->head_dim / 2;
    for (i = 0; i < half; i++)
        freqs[i] = 1.0f / (float)pow((double)(float)cfg->rope_theta,
                                     (double)((float)(2 * i) / (float)cfg->head_dim));
    if (factor <= 0) return 1.0f;
    low  = qwen3i_yarn_pair(cfg, cfg->yarn_original_ctx, cfg->yarn_beta_fast);
    high = qwen3i_yarn_pair(cfg, cfg->yarn_original_ctx, cfg->yarn_beta_slow);
    if (!cfg->yarn_untruncated) { low = floor(low); high = ceil(high); }
    if (low < 0) low = 0;
    if (high > cfg->head_dim - 1) high = cfg->head_dim - 1;
    if (low == high) high += 0.001;
    for (i = 0; i < half; i++) {        /* fast pairs stay as they are, slow ones are slowed down by factor */
        float slow = ((float)i - (float)low) / (float)(high - low), keep, base = freqs[i];
        slow = slow < 0 ? 0.0f : slow > 1 ? 1.0f : slow;
        keep = 1.0f - slow;
        freqs[i] = 1.0f / ((float)factor * (1.0f / base)) * (1.0f - keep) + base * keep;
    }
    if (yarn_factor <= 0 && cfg->yarn_attn_factor > 0) return (float)cfg->yarn_attn_factor;
    return (float)qwen3i_yarn_magnitude(factor, 1);
}

/* cosines, sines [n, half] of positions [n] times freqs [half], times scale */
static void qwen3i_rope_angles(float *cosines, float *sines, const int32_t *positions, int n,
                               const float *freqs, int half, float scale) {
    int i, j;
    for (i = 0; i < n; i++)
        for (j = 0; j < half; j++) {
            float angle = (float)positions[i] * freqs[j];
            *cosines++ = (float)cos((double)angle) * scale;
            *sines++ = (float)sin((double)angle) * scale;
        }
}

/* Rotate the pairs (j, j + head_dim / 2) of each head of one row: x [n_head, head_dim],
   cosines, sines [head_dim / 2] */
static void qwen3i_rope(float *x, const float *cosines, const float *sines, int n_head, int head_dim) {
    int i, j, half = head_dim / 2;
    for (i = 0; i < n_head; i++, x += head_dim)
        for (j = 0; j < half; j++) {
            float a = x[j], b = x[j + half];
            x[j]        = a * cosines[j] - b * sines[j];
            x[j + half] = b * cosines[j] + a * sines[j];
        }
}

/* ---- matrix products ------------------------------------------------------------------------- */
#define QWEN3I_PIECE_ROWS 128           /* most rows of a matrix that are one piece of work */
#define QWEN3I_GLU_ROWS    64           /* the same where two matrices meet, whose results are held for */
#define QWEN3I_GLU_TOKENS  60           /* so many rows of x: 15 KB on the stack */

typedef struct qwen3i_matmul_args {
    const qwen3i_simd   *simd;
    const qwen3i_matrix *w[3];          /* with the same number of columns */
    float               *y[3];          /* [n, rows of w] */
    int                  n_w;
    const float         *x;             /* [n, cols] */
    int                  n;
    int                  add;           /* to y, instead of replacing it */
    qwen3i_panels       *panels;        /* [lanes] */
    qwen3i_rounded      *parts;         /* [n, qwen3i_parts(cols)]: x in whole numbers */
} qwen3i_matmul_args;

/* A matrix in Q8_0 or FP8 becomes float32 panel by panel: a part that the second-level cache holds, or none
   for one row of x. The sums run as for a matrix of numbers, so their bits do not depend on the panels. */
static void qwen3i_matmul_bytes(const qwen3i_matmul_args *a, const qwen3i_matrix *w, float *y, size_t ldy,
                              int begin, int end, int t, int n, float *panel) {
    size_t row_bytes = (size_t)qwen3i_row_bytes(w->type, w->cols), cols = (size_t)w->cols;
    int r, k, i, m, n_k;
    if (n == 1 && w->cols % qwen3i_format_of(w->type)->elements == 0) {
        a->simd->dot_bytes(y, (const char *)w->data + (size_t)begin * row_bytes, row_bytes, w->type,
                           end - begin,
                           a->x + (size_t)t * cols, w->cols, a->add);
        return;
    }
    for (r = begin; r < end; r += m, y += m) {
        m = qwen3i_min(QWEN3I_PANEL_ROWS, end - r);
        for (k = 0; k < w->cols; k += n_k) {
            const char *at = (const char *)w->data + (size_t)r * row_bytes + qwen3i_row_bytes(w->type, k);
            n_k = qwen3i_min(QWEN3I_K_BLOCK, w->cols - k);
            for (i = 0; i < m; i++, at += row_bytes)
                a->simd->load(panel + i * QWEN3I_PANEL_LD, at, w->type, n_k);
            a->simd->dot(y, ldy, panel, QWEN3I_PANEL_LD, QWEN3I_F32, m, a->x + (size_t)t * cols + k, cols, n,
                         n_k, a->add || k > 0);
        }
    }
}

/* Rows begin .. end - 1 of W x for rows t .. t + n - 1 of x; y points at row `begin` of the first result */
static void qwen3i_matmul_block(const qwen3i_matmul_args *a, const qwen3i_matrix *w, float *y, size_t ldy,
                                int begin, int end, int t, int n, int lane) {
    const size_t cols = (size_t)w->cols, row_bytes = (size_t)qwen3i_row_bytes(w->type, w->cols);
    const char *rows = (const char *)w->data + (size_t)begin * row_bytes;
    qwen3i_panels *panels = a->panels + lane;
    if (qwen3i_is_bytes(w->type)) qwen3i_matmul_bytes(a, w, y, ldy, begin, end, t, n, panels->floats);
    else if (qwen3i_is_block(w->type)) {
        const size_t parts = (size_t)qwen3i_parts(w->cols);
        a->simd->dot_blocks(y, ldy, rows, row_bytes, w->type, end - begin, a->parts + (size_t)t * parts,
                            parts, n,
                            w->cols, a->add, panels->whole);
    }
    else a->simd->dot(y, ldy, rows, cols, w->type, end - begin, a->x + (size_t)t * cols, cols, n, w->cols,
                      a->add);
}

static void qwen3i_round_rows(void *args, int begin, int end, int lane) {
    const qwen3i_matmul_args *a = (const qwen3i_matmul_args *)args;
    const int cols = a->w[0]->cols;
    (void)lane;
    for (int i = begin; i < end; i++)
        a->simd->round_row(a->parts + (size_t)i * (size_t)qwen3i_parts(cols), a->x + (size_t)i * (size_t)cols,
                           cols);
}

/* What products of x [n, cols] with n_w matrices of cols columns begin with */
static qwen3i_matmul_args qwen3i_matmul_begin(const qwen3i_exec *e, const qwen3i_matrix *w0,
                                              const qwen3i_matrix *w1, const qwen3i_matrix *w2, int n_w,
                                              const float *x, int n, int add) {
    qwen3i_matmul_args a;
    int i, blocks = 0;
    a.simd = e->simd; a.panels = e->panels; a.parts = e->parts; a.n_w = n_w; a.x = x; a.n = n; a.add = add;
    a.w[0] = w0; a.w[1] = w1; a.w[2] = w2;
    for (i = 0; i < n_w; i++) blocks |= qwen3i_is_block(a.w[i]->type) && !qwen3i_is_bytes(a.w[i]->type);
    if (blocks) qwen3i_parallel(e->pool, n, 4, qwen3i_round_rows, &a);
    return a;
}

/* How many of n_rows make one piece: enough pieces for all lanes, and not too many */
static int qwen3i_matmul_grain(const qwen3i_pool *pool, int n_rows) {
    return qwen3i_max(32, qwen3i_min(n_rows / (4 * pool->n_lanes), QWEN3I_PIECE_ROWS)) / 32 * 32;
}

static void qwen3i_matmul_rows(void *args, int begin, int end, int lane) {
    const qwen3i_matmul_args *a = (const qwen3i_matmul_args *)args;
    int i, first = 0;                   /* the matrices' rows are counted through */
    for (i = 0; i < a->n_w; first += a->w[i++]->rows) {
        int from = qwen3i_max(begin - first, 0), to = qwen3i_min(end - first, a->w[i]->rows);
        if (from < to)
            qwen3i_matmul_block(a, a->w[i], a->y[i] + from, (size_t)a->w[i]->rows, from, to, 0, a->n, lane);
    }
}

/* y = W x, or y = y + W x if add, for each row of x: x [n, cols], y [n, rows] */
static void qwen3i_matmul_to(const qwen3i_exec *e, float *y, const qwen3i_matrix *w, const float *x, int n,
                             int add) {
    qwen3i_matmul_args a = qwen3i_matmul_begin(e, w, NULL, NULL, 1, x, n, add);
    a.y[0] = y;
    qwen3i_parallel(e->pool, w->rows, qwen3i_matmul_grain(e->pool, w->rows), qwen3i_matmul_rows, &a);
}

static void qwen3i_matmul(const qwen3i_exec *e, float *y, const qwen3i_matrix *w, const float *x, int n) {
    qwen3i_matmul_to(e, y, w, x, n, 0);
}

static void qwen3i_matmul_add(const qwen3i_exec *e, float *y, const qwen3i_matrix *w, const float *x, int n) {
    qwen3i_matmul_to(e, y, w, x, n, 1);
}

/* q = Wq x, k = Wk x, v = Wv x, in one go */
static void qwen3i_matmul_qkv(const qwen3i_exec *e, float *q, float *k, float *v, const qwen3i_layer *layer,
                              const float *x, int n) {
    qwen3i_matmul_args a = qwen3i_matmul_begin(e, &layer->wq, &layer->wk, &layer->wv, 3, x, n, 0);
    int rows = layer->wq.rows + layer->wk.rows + layer->wv.rows;
    a.y[0] = q; a.y[1] = k; a.y[2] = v;
    qwen3i_parallel(e->pool, rows, qwen3i_matmul_grain(e->pool, rows), qwen3i_matmul_rows, &a);
}

/* w[0] is the gate, w[1] what it lets through. */
static void qwen3i_swiglu_rows(void *args, int begin, int end, int lane) {
    const qwen3i_matmul_args *a = (const qwen3i_matmul_args *)args;
    float up[QWEN3I_GLU_TOKENS * QWEN3I_GLU_ROWS];
    size_t ldy = (size_t)a->w[0]->rows;
    int t, n, i, rows = end - begin;
    for (t = 0; t < a->n; t += n) {
        float *y = a->y[0] + (size_t)t * ldy + begin;
        n = qwen3i_min(QWEN3I_GLU_TOKENS, a->n - t);
        qwen3i_matmul_block(a, a->w[0], y, ldy, begin, end, t, n, lane);
        qwen3i_matmul_block(a, a->w[1], up, (size_t)rows, begin, end, t, n, lane);
        for (i = 0; i < n; i++, y += ldy) a->simd->silu_mul(y, y, up + i * rows, rows);
    }
}

/* y = silu(Wgate x) * (Wup x) for each row of x, with silu(g) = g / (1 + exp(-g)): x [n, n_embd], y [n,
   n_ff] */
static void qwen3i_swiglu(const qwen3i_exec *e, float *y, const qwen3i_matrix *w_gate,
                          const qwen3i_matrix *w_up, const float *x, int n) {
    int grain = qwen3i_min(qwen3i_matmul_grain(e->pool, w_gate->rows), QWEN3I_GLU_ROWS);
    qwen3i_matmul_args a = qwen3i_matmul_begin(e, w_gate, w_up, NULL, 2, x, n, 0);
    a.y[0] = y;
    qwen3i_parallel(e->pool, w_gate->rows, grain, qwen3i_swiglu_rows, &a);
}

/* ---- attention ------------------------------------------------------------------------------- */
#define QWEN3I_ATTENTION_ROWS  24       /* query rows that share one pass over keys and values */
#define QWEN3I_ATTENTION_BLOCK 64       /* positions of it at a time */

typedef struct qwen3i_attention_args {
    const qwen3i_simd *simd;
    float             *a;               /* [n, n_head * head_dim] out */
    const float       *q;               /* [n, n_head * head_dim] after norm and rotation */
    const void        *k, *v;           /* [seqs, n_head_kv, max_ctx, head_dim]: this layer's cache */
    qwen3i_type        type;            /* of the cache */
    const int32_t     *seqs, *positions;/* [n] rows of one sequence are consecutive, positions ascend by 1 */
    int                n, n_head, n_head_kv, head_dim, max_ctx;
    int                tokens, heads;   /* most in a piece of work: tokens * heads <= QWEN3I_ATTENTION_ROWS */
    float             *scratch;         /* [lanes, qwen3i_attention_scratch()]: scores, queries, results */
} qwen3i_attention_args;

/* Floats between the score rows of one lane: softmax wants multiples of 16; powers of two collide in
   caches */
static uint64_t qwen3i_attention_stride(int max_ctx) { return ((uint64_t)max_ctx + 15) / 16 * 16 + 16; }

/* Floats of scratch a lane: scores, queries, results, panel. Below 2^40 */
static uint64_t qwen3i_attention_scratch(int max_ctx, int head_dim) {
    return QWEN3I_ATTENTION_ROWS * (qwen3i_attention_stride(max_ctx) + 2 * (uint64_t)head_dim) +
           QWEN3I_ATTENTION_BLOCK * (uint64_t)head_dim;
}

/* m positions of a cache as the kernels read them: where they are, or out of blocks into the panel
   [QWEN3I_ATTENTION_BLOCK, head_dim] as float32 */
static const void *qwen3i_cache_rows(const qwen3i_attention_args *a, float *panel, const char *rows, int m) {
    const size_t row = (size_t)qwen3i_row_bytes(a->type, a->head_dim);
    if (!qwen3i_is_block(a->type)) return rows;
    for (int i = 0; i < m; i++)
        a->simd->load(panel + (size_t)i * (size_t)a->head_dim, rows + (size_t)i * row, a->type, a->head_dim);
    return panel;
}

/* Tokens t .. t + n_t - 1 (one sequence), query heads h .. h + n_h - 1 (one KV head). The rows of the
   piece are (token, head) pairs. Scores are held in full, so that sums run in order of position. */
static void qwen3i_attention_piece(const qwen3i_attention_args *a, float *scratch, int t, int n_t, int h,
                                   int n_h) {
    size_t dim = (size_t)a->head_dim, ld = (size_t)qwen3i_attention_stride(a->max_ctx);
    size_t q_dim = (size_t)a->n_head * dim, at = (size_t)t * q_dim + (size_t)h * dim,
           width = (size_t)n_h * dim;
    size_t row = (size_t)qwen3i_row_bytes(a->type, a->head_dim);
    qwen3i_type type = qwen3i_is_block(a->type) ? QWEN3I_F32 : a->type;     /* of what the kernels read */
    size_t head = (size_t)a->seqs[t] * (size_t)a->n_head_kv + (size_t)(h / (a->n_head / a->n_head_kv));
    const char *k = (const char *)a->k + head * (size_t)a->max_ctx * row;           /* [max_ctx, head_dim] */
    const char *v = (const char *)a->v + head * (size_t)a->max_ctx * row;
    float *scores = scratch, *q = scores + QWEN3I_ATTENTION_ROWS * ld, *out = q + QWEN3I_ATTENTION_ROWS * dim;
    float *panel = out + QWEN3I_ATTENTION_ROWS * dim;
    int first = a->positions[t], last = first + n_t - 1, i, p, m;

    for (i = 0; i < n_t; i++) memcpy(q + (size_t)i * width, a->q + at + (size_t)i * q_dim, width * 4);
    for (p = 0; p <= last; p += m) {                    /* scores = q . k */
        m = qwen3i_min(QWEN3I_ATTENTION_BLOCK, last + 1 - p);
        a->simd->dot(scores + p, ld, qwen3i_cache_rows(a, panel, k + (size_t)p * row, m), dim, type,
                     m, q, dim,
                     n_t * n_h, a->head_dim, 0);
    }
    for (i = 0; i < n_t * n_h; i++)                     /* each token sees the positions up to its own */
        a->simd->softmax(scores + (size_t)i * ld, first + i / n_h + 1,
                         (float)(1.0 / sqrt((double)a->head_dim)));
    memset(out, 0, (size_t)n_t * width * 4);
    for (p = 0; p <= first; p += m) {                   /* out = scores . v: what all tokens see, ... */
        m = qwen3i_min(QWEN3I_ATTENTION_BLOCK, first + 1 - p);
        a->simd->mix(out, dim, scores + p, ld, n_t * n_h,
                     qwen3i_cache_rows(a, panel, v + (size_t)p * row, m), dim,
                     type, m, a->head_dim);
    }
    const void *rest = qwen3i_cache_rows(a, panel, v + (size_t)p * row, n_t - 1);
    for (i = 1; i < n_t; i++)                           /* ... then the rest */
        a->simd->mix(out + (size_t)i * width, dim, scores + (size_t)(i * n_h) * ld + p, ld, n_h, rest,
                     dim, type,
                     i, a->head_dim);
    for (i = 0; i < n_t; i++) memcpy(a->a + at + (size_t)i * q_dim, out + (size_t)i * width, width * 4);
}

/* Pieces of work are (tokens, heads) tiles: [ceil(n / tokens), n_head_kv, ceil(group / heads)] */
static void qwen3i_attention_pieces(void *args, int begin, int end, int lane) {
    const qwen3i_attention_args *a = (const qwen3i_attention_args *)args;
    float *scratch = a->scratch + (size_t)((uint64_t)lane * qwen3i_attention_scratch(a->max_ctx,
            a->head_dim));
    int group = a->n_head / a->n_head_kv, splits = (group + a->heads - 1) / a->heads, i;
    for (i = begin; i < end; i++) {
        int h = i / splits % a->n_head_kv * group + i % splits * a->heads;
        int n_h = qwen3i_min(a->heads, group - i % splits * a->heads);
        int t = i / splits / a->n_head_kv * a->tokens, t_end = qwen3i_min(t + a->tokens, a->n), n_t;
        for (; t < t_end; t += n_t) {
            for (n_t = 1; t + n_t < t_end && a->seqs[t + n_t] == a->seqs[t]; n_t++) {}
            qwen3i_attention_piece(a, scratch, t, n_t, h, n_h);
        }
    }
}

static int qwen3i_attention_count(const qwen3i_attention_args *a) {
    int group = a->n_head / a->n_head_kv;
    return (a->n + a->tokens - 1) / a->tokens * a->n_head_kv * ((group + a->heads - 1) / a->heads);
}

/* a = softmax(q . k / sqrt(head_dim)) v, each row over the positions of its sequence up to its own. The
   query heads of a group, and as many tokens as fit, share the pass over keys and values. */
static void qwen3i_attention(const qwen3i_exec *e, qwen3i_attention_args *a) {
    a->simd = e->simd;
    a->heads = qwen3i_min(a->n_head / a->n_head_kv, QWEN3I_ATTENTION_ROWS);
    a->tokens = QWEN3I_ATTENTION_ROWS / a->heads;
    while (a->tokens > 1 && qwen3i_attention_count(a) < 4 * e->pool->n_lanes) a->tokens = (a->tokens + 1) / 2;
    while (a->heads > 1 && qwen3i_attention_count(a) < e->pool->n_lanes) a->heads = (a->heads + 1) / 2;
    qwen3i_parallel(e->pool, qwen3i_attention_count(a), 1, qwen3i_attention_pieces, a);
}

/* ---- the context ----------------------------------------------------------------------------- */
#define QWEN3I_HEAD_ROWS 16             /* rows of logits computed at a time */

typedef struct qwen3i_cpu {
    const qwen3i_config  *config;
    const qwen3i_weights *weights;
    qwen3_ctx_desc        desc;
    qwen3i_exec           exec;
    qwen3i_pool           pool;
    void                 *memory;       /* holds all that follows */
    uint64_t              memory_size;
    char  *k, *v;                       /* [n_layer, max_seqs, n_head_kv, max_ctx, head_dim] in the KV type: attention
                                           reads a head's positions as one stream */
    float *kept;                        /* [max_seqs, n_vocab] logits after each sequence's last token */
    float *x, *h;                       /* [rows, n_embd]: residual stream, normalised (qwen3i_cpu_rows) */
    float *q, *a;                       /* [rows, n_head * head_dim]: queries, attention's result */
    float *key, *value;                 /* [rows, n_head_kv * head_dim]: on their way to the cache */
    float *ff;                          /* [rows, n_ff] */
    float *ordered;                     /* [rows, the widest of h, a, ff] in the order of a matrix' columns */
    float *route;                       /* [rows, n_expert, to a multiple of 16] the router's probabilities */
    int32_t *picked;                    /* [rows, n_expert_used] experts, in order */
    float *share;                       /* [rows, n_expert_used] their weights */
    int32_t *members;                   /* [rows] of an expert; [rows] its place among what each has picked */
    float *gathered, *mixed;            /* [rows, n_embd] an expert's inputs, then results; the sum of all */
    float *freqs, *cosines, *sines;     /* [head_dim / 2], [rows, head_dim / 2] */
    float  rope_scale;
    float *logits;                      /* [QWEN3I_HEAD_ROWS or rows, n_vocab] */
    float *attention;                   /* [lanes, qwen3i_attention_scratch()] */
} qwen3i_cpu;

/* Floats of a row of c->route: softmax writes whole vectors. */
static int qwen3i_route_stride(const qwen3i_config *cfg) { return (cfg->n_expert + 15) / 16 * 16; }

static int qwen3i_cpu_rows(const qwen3_ctx_desc *desc) {
    return qwen3i_max(desc->prefill_chunk, desc->max_seqs);
}

static uint64_t qwen3i_most_parts(const qwen3i_config *cfg) {
    const int cols = qwen3i_max(cfg->n_embd, qwen3i_max(cfg->n_ff, cfg->n_ff_expert));
    return (uint64_t)qwen3i_max(qwen3i_parts(cols), qwen3i_parts(cfg->n_head * cfg->head_dim));
}

/* Lay the context's arrays out in a block (NULL: only count). Returns the block's size. */
QWEN3I_COLD
static uint64_t qwen3i_cpu_layout(qwen3i_cpu *c, const qwen3i_config *cfg, const qwen3_ctx_desc *desc,
                                  void *block) {
    qwen3i_arena m = qwen3i_arena_at(block, 64);
    uint64_t rows = (uint64_t)qwen3i_cpu_rows(desc), seqs = (uint64_t)desc->max_seqs,
             lanes = (uint64_t)qwen3i_pool_lanes(desc);
    uint64_t head_rows = rows < QWEN3I_HEAD_ROWS ? rows : QWEN3I_HEAD_ROWS;
    uint64_t dim = (uint64_t)cfg->head_dim, half = dim / 2;
    uint64_t q_dim = (uint64_t)cfg->n_head * dim, kv_dim = (uint64_t)cfg->n_head_kv * dim;
    uint64_t kv_row = (uint64_t)cfg->n_head_kv * qwen3i_row_bytes((qwen3i_type)desc->kv_type, cfg->head_dim);
    c->k         = (char *)qwen3i_arena_take(&m, (uint64_t)cfg->n_layer * seqs, (uint64_t)desc->max_ctx,
                                             kv_row);
    c->v         = (char *)qwen3i_arena_take(&m, (uint64_t)cfg->n_layer * seqs, (uint64_t)desc->max_ctx,
                                             kv_row);
    c->kept      = (float *)qwen3i_arena_take(&m, seqs, (uint64_t)cfg->n_vocab, 4);
    c->x         = (float *)qwen3i_arena_take(&m, rows, (uint64_t)cfg->n_embd, 4);
    c->h         = (float *)qwen3i_arena_take(&m, rows, (uint64_t)cfg->n_embd, 4);
    c->q         = (float *)qwen3i_arena_take(&m, rows, q_dim, 4);
    c->a         = (float *)qwen3i_arena_take(&m, rows, q_dim, 4);
    c->key       = (float *)qwen3i_arena_take(&m, rows, kv_dim, 4);
    c->value     = (float *)qwen3i_arena_take(&m, rows, kv_dim, 4);
    c->ff        = (float *)qwen3i_arena_take(&m, rows, (uint64_t)qwen3i_max(cfg->n_ff, cfg->n_ff_expert), 4);
    const int widest = qwen3i_max(cfg->n_head * cfg->head_dim, qwen3i_max(cfg->n_embd, cfg->n_ff));
    if (cfg->ordered)
        c->ordered = (float *)qwen3i_arena_take(&m, rows, (uint64_t)widest, 4);
    if (cfg->n_expert) {
        c->route    = (float *)qwen3i_arena_take(&m, rows, (uint64_t)qwen3i_route_stride(cfg), 4);
        c->picked   = (int32_t *)qwen3i_arena_take(&m, rows, (uint64_t)cfg->n_expert_used, 4);
        c->share    = (float *)qwen3i_arena_take(&m, rows, (uint64_t)cfg->n_expert_used, 4);
        c->members  = (int32_t *)qwen3i_arena_take(&m, rows, 2, 4);
        c->gathered = (float *)qwen3i_arena_take(&m, rows, 2 * (uint64_t)cfg->n_embd, 4);
        c->mixed    = (float *)qwen3i_arena_take(&m, rows, (uint64_t)cfg->n_embd, 4);
    }
    c->freqs     = (float *)qwen3i_arena_take(&m, 1, half, 4);
    c->cosines   = (float *)qwen3i_arena_take(&m, rows, half, 4);
    c->sines     = (float *)qwen3i_arena_take(&m, rows, half, 4);
    c->logits    = (float *)qwen3i_arena_take(&m, head_rows, (uint64_t)cfg->n_vocab, 4);
    c->attention = (float *)qwen3i_arena_take(&m, lanes,
                                              qwen3i_attention_scratch(desc->max_ctx, cfg->head_dim), 4);
    c->exec.panels = (qwen3i_panels *)qwen3i_arena_take(&m, lanes, sizeof *c->exec.panels, 1);
    c->exec.parts  = (qwen3i_rounded *)qwen3i_arena_take(&m, rows, qwen3i_most_parts(cfg),
                                                         sizeof(qwen3i_rounded));
    return qwen3i_arena_size(&m);
}

QWEN3I_COLD
static qwen3_memory qwen3i_cpu_memory(const void *model_state, const qwen3_model *model,
                                      const qwen3_ctx_desc *desc) {
    qwen3_memory m = {0, 0};
    qwen3i_cpu c;
    (void)model_state;
    m.host_bytes = qwen3i_size_add(qwen3i_cpu_layout(&c, qwen3_backend_view(model).config, desc, NULL),
                                   sizeof c);
    return m;
}

static void qwen3i_cpu_free(void *ctx_state) {
    qwen3i_cpu *c = (qwen3i_cpu *)ctx_state;
    if (!c) return;
    qwen3i_pool_destroy(&c->pool);
    qwen3i_free(&c->desc.allocator, c->memory, (size_t)c->memory_size);
    qwen3i_free(&c->desc.allocator, c, sizeof *c);
}

static qwen3_result qwen3i_cpu_fill(qwen3i_cpu *c, const qwen3i_err *err) {
    uint64_t size = qwen3i_cpu_layout(c, c->config, &c->desc, NULL);
    fenv_t callers;
    if (qwen3i_size_fits(size)) c->memory = qwen3i_alloc(&c->desc.allocator, (size_t)size);
    if (!c->memory) return qwen3i_no_memory(err, "the context", size);
    c->memory_size = size;
    qwen3i_cpu_layout(c, c->config, &c->desc, c->memory);
    callers = qwen3i_float_enter();
    memset(c->kept, 0, (size_t)c->desc.max_seqs * (size_t)c->config->n_vocab * 4);
    c->rope_scale = qwen3i_rope_freqs(c->freqs, c->config, (double)c->desc.yarn_factor);
    qwen3i_float_leave(callers);
    return QWEN3_OK;
}

QWEN3I_COLD
static qwen3_result qwen3i_cpu_create(void **ctx_state, void *model_state, const qwen3_model *model,
                                      const qwen3_ctx_desc *desc, const qwen3i_err *err) {
    qwen3i_model_view view = qwen3_backend_view(model);
    qwen3i_cpu *c = (qwen3i_cpu *)qwen3i_alloc_zero(&desc->allocator, 1, sizeof *c);
    qwen3_result r;
    (void)model_state;
    *ctx_state = NULL;
    if (!c) return qwen3i_no_memory(err, "a context", sizeof *c);
    c->config = view.config;
    c->weights = view.weights;
    c->desc = *desc;
    c->exec.simd = qwen3i_simd_level(0);
    c->exec.pool = &c->pool;
    r = qwen3i_cpu_fill(c, err);
    if (r == QWEN3_OK) r = qwen3i_pool_create(&c->pool, desc, err);
    if (r == QWEN3_OK) { *ctx_state = c; return QWEN3_OK; }
    qwen3i_free(&desc->allocator, c->memory, (size_t)c->memory_size);
    qwen3i_free(&desc->allocator, c, sizeof *c);
    return r;
}

/* Bytes of one head at one position in the cache. */
static size_t qwen3i_cpu_kv_row(const qwen3i_cpu *c) {
    return (size_t)qwen3i_row_bytes((qwen3i_type)c->desc.kv_type, c->config->head_dim);
}

/* The byte in c->k or c->v where position pos of a sequence's KV head lies. */
static size_t qwen3i_cpu_kv_at(const qwen3i_cpu *c, int layer, int seq, int head, int pos) {
    size_t n = (size_t)layer * (size_t)c->desc.max_seqs + (size_t)seq;
    n = n * (size_t)c->config->n_head_kv + (size_t)head;
    return (n * (size_t)c->desc.max_ctx + (size_t)pos) * qwen3i_cpu_kv_row(c);
}

/* ---- the decoder ----------------------------------------------------------------------------- */
typedef struct qwen3i_step { qwen3i_cpu *c; const qwen3i_batch *batch; int layer; } qwen3i_step;

/* One head of one position into the cache */
static void qwen3i_cache_store(const qwen3i_cpu *c, char *to, const float *x) {
    const qwen3i_type type = (qwen3i_type)c->desc.kv_type;
    const int n = c->config->head_dim;
    if (type != QWEN3I_Q8_0) { c->exec.simd->store(to, x, type, n); return; }
    for (int i = 0; i < n; i += 32, to += 34) qwen3i_round_q8_0((uint8_t *)to, x + i);
}

/* For each row: norm the heads of q and k, rotate them, round k and v into the cache. */
static void qwen3i_place_rows(void *step, int begin, int end, int lane) {
    const qwen3i_step *s = (const qwen3i_step *)step;
    const qwen3i_cpu *c = s->c;
    const qwen3i_config *cfg = c->config;
    const qwen3i_layer *w = &c->weights->layers[s->layer];
    int i, j, kv_dim = cfg->n_head_kv * cfg->head_dim, half = cfg->head_dim / 2;
    (void)lane;
    for (i = begin; i < end; i++) {
        float *q = c->q + (size_t)i * (size_t)(cfg->n_head * cfg->head_dim);        /* [n_head, head_dim] */
        float *k = c->key + (size_t)i * (size_t)kv_dim;                         /* [n_head_kv, head_dim] */
        float *v = c->value + (size_t)i * (size_t)kv_dim;
        const float *cosines = c->cosines + (size_t)i * (size_t)half,
                     *sines = c->sines + (size_t)i * (size_t)half;
        qwen3i_rmsnorm_heads(c->exec.simd, q, w->q_norm, cfg->n_head, cfg->head_dim, cfg->rms_eps);
        qwen3i_rmsnorm_heads(c->exec.simd, k, w->k_norm, cfg->n_head_kv, cfg->head_dim, cfg->rms_eps);
        qwen3i_rope(q, cosines, sines, cfg->n_head, cfg->head_dim);
        qwen3i_rope(k, cosines, sines, cfg->n_head_kv, cfg->head_dim);
        for (j = 0; j < cfg->n_head_kv; j++, k += cfg->head_dim, v += cfg->head_dim) {
            size_t at = qwen3i_cpu_kv_at(c, s->layer, s->batch->seqs[i], j, s->batch->positions[i]);
            qwen3i_cache_store(c, c->k + at, k);
            qwen3i_cache_store(c, c->v + at, v);
        }
    }
}

static void qwen3i_attend(const qwen3i_step *s) {
    const qwen3i_cpu *c = s->c;
    qwen3i_attention_args a;
    a.a = c->a; a.q = c->q;
    a.k = c->k + qwen3i_cpu_kv_at(c, s->layer, 0, 0, 0);
    a.v = c->v + qwen3i_cpu_kv_at(c, s->layer, 0, 0, 0);
    a.type = (qwen3i_type)c->desc.kv_type;
    a.seqs = s->batch->seqs; a.positions = s->batch->positions; a.n = s->batch->n_rows;
    a.n_head = c->config->n_head; a.n_head_kv = c->config->n_head_kv; a.head_dim = c->config->head_dim;
    a.max_ctx = c->desc.max_ctx;
    a.scratch = c->attention;
    qwen3i_attention(&c->exec, &a);
}

/* A layer's values to the probe: none of the buffers has been used twice. */
static void qwen3i_show(const qwen3i_step *s) {
    const qwen3i_cpu *c = s->c;
    const qwen3i_config *cfg = c->config;
    const qwen3_probe *p = &c->desc.probe;
    int n = s->batch->n_rows, q_dim = cfg->n_head * cfg->head_dim, kv_dim = cfg->n_head_kv * cfg->head_dim;
    if (!p->show) return;
    p->show(s->layer, QWEN3_VALUE_Q, c->q, n, q_dim, p->user);
    p->show(s->layer, QWEN3_VALUE_K, c->key, n, kv_dim, p->user);
    p->show(s->layer, QWEN3_VALUE_V, c->value, n, kv_dim, p->user);
    p->show(s->layer, QWEN3_VALUE_ATTENTION, c->a, n, q_dim, p->user);
    p->show(s->layer, QWEN3_VALUE_MLP_INPUT, c->h, n, cfg->n_embd, p->user);
    if (!c->weights->layers[s->layer].experts)
        p->show(s->layer, QWEN3_VALUE_PRODUCT, c->ff, n, cfg->n_ff, p->user);
    p->show(s->layer, QWEN3_VALUE_RESIDUAL, c->x, n, cfg->n_embd, p->user);
}

/* After the last layer's attention, rows of which nothing is wanted have done their part: the others' x and a
   move together. Not with a probe, which is shown all rows. */
static int qwen3i_only_wanted(const qwen3i_cpu *c) { return !c->desc.probe.show; }

static int qwen3i_keep_wanted(const qwen3i_cpu *c, const qwen3i_batch *batch) {
    size_t n_embd = (size_t)c->config->n_embd, q_dim = (size_t)c->config->n_head *
                    (size_t)c->config->head_dim, i;
    for (i = 0; i < (size_t)batch->n_outs; i++) {
        size_t row = (size_t)batch->outs[i].row;
        memmove(c->x + i * n_embd, c->x + row * n_embd, n_embd * 4);
        memmove(c->a + i * q_dim, c->a + row * q_dim, q_dim * 4);
    }
    return batch->n_outs;
}

/* ---- mixture of experts ---------------------------------------------------------------------- */
/* The n_used most probable of p [n], ties to the lower index, in order of index; their weights in share */
static void qwen3i_pick_experts(const float *p, int n, int n_used, int norm, int32_t *picked, float *share) {
    float sum = 0;
    int i, k, at;
    for (k = 0; k < n_used; k++) {
        int best = -1, before;
        for (i = 0; i < n; i++) {
            for (before = 0; before < k && picked[before] != i; before++) { }
            if (before == k && (best < 0 || p[i] > p[best])) best = i;
        }
        for (at = k; at > 0 && picked[at - 1] > best; at--) picked[at] = picked[at - 1];
        picked[at] = best;
    }
    for (k = 0; k < n_used; k++) sum += p[picked[k]];
    for (k = 0; k < n_used; k++) share[k] = norm ? p[picked[k]] / sum : p[picked[k]];
}

static void qwen3i_route_rows(void *args, int begin, int end, int lane) {
    qwen3i_cpu *c = (qwen3i_cpu *)args;
    const qwen3i_config *cfg = c->config;
    int i;
    (void)lane;
    for (i = begin; i < end; i++) {
        float *p = c->route + (size_t)i * (size_t)qwen3i_route_stride(cfg);
        size_t at = (size_t)i * (size_t)cfg->n_expert_used;
        c->exec.simd->softmax(p, cfg->n_expert, 1.0f);
        qwen3i_pick_experts(p, cfg->n_expert, cfg->n_expert_used, cfg->norm_topk, c->picked + at,
                            c->share + at);
    }
}

/* Rows that have picked this expert: into c->members, and their inputs side by side. How many there are */
static int qwen3i_gather_members(qwen3i_cpu *c, int expert, int n) {
    const int used = c->config->n_expert_used;
    const size_t n_embd = (size_t)c->config->n_embd;
    int i, k, m = 0;
    for (i = 0; i < n; i++)
        for (k = 0; k < used; k++) {
            if (c->picked[i * used + k] != expert) continue;
            memcpy(c->gathered + (size_t)m * n_embd, c->h + (size_t)i * n_embd, n_embd * 4);
            c->members[2 * m] = i;
            c->members[2 * m++ + 1] = i * used + k;
        }
    return m;
}

/* x += the sum over the experts that a row has picked of weight * Wdown(silu(Wgate h) * (Wup h)), in order of
   index. Rows are taken together by expert, so that each expert's weights are read once; a row's sums do not
   depend on the others. */
static void qwen3i_experts_mlp(qwen3i_cpu *c, const qwen3i_experts *w, int n) {
    const qwen3i_config *cfg = c->config;
    const qwen3i_exec *e = &c->exec;
    const size_t n_embd = (size_t)cfg->n_embd;
    float *results = c->gathered + (size_t)qwen3i_cpu_rows(&c->desc) * n_embd;
    int i, expert, m;
    size_t j;
    qwen3i_matmul(e, c->route, &w->router, c->h, n);
    for (i = n - 1; i > 0; i--)         /* rows apart, as softmax needs them */
        memmove(c->route + (size_t)i * (size_t)qwen3i_route_stride(cfg),
                c->route + (size_t)i * (size_t)cfg->n_expert,
                (size_t)cfg->n_expert * 4);
    qwen3i_parallel(e->pool, n, 4, qwen3i_route_rows, c);
    memset(c->mixed, 0, (size_t)n * n_embd * 4);
    for (expert = 0; expert < cfg->n_expert; expert++) {
        m = qwen3i_gather_members(c, expert, n);
        if (m == 0) continue;
        qwen3i_swiglu(e, c->ff, &w->gate[expert], &w->up[expert], c->gathered, m);
        qwen3i_matmul(e, results, &w->down[expert], c->ff, m);
        for (i = 0; i < m; i++) {
            float *y = c->mixed + (size_t)c->members[2 * i] * n_embd, share = c->share[c->members[2 * i + 1]];
            for (j = 0; j < n_embd; j++) y[j] += share * results[(size_t)i * n_embd + j];
        }
    }
    for (j = 0; j < (size_t)n * n_embd; j++) c->x[j] += c->mixed[j];
}

typedef struct qwen3i_order_args {
    float *y; const float *x; const int32_t *order; int width;
} qwen3i_order_args;

static void qwen3i_order_rows(void *args, int begin, int end, int lane) {
    const qwen3i_order_args *a = (const qwen3i_order_args *)args;
    int i, j;
    (void)lane;
    for (i = begin; i < end; i++) {
        const float *x = a->x + (size_t)i * (size_t)a->width;
        float *y = a->y + (size_t)i * (size_t)a->width;
        for (j = 0; j < a->width; j++) y[j] = x[a->order[j]];
    }
}

/* x [n, width], or it in the order of the columns that it meets */
static const float *qwen3i_in_order(const qwen3i_cpu *c, const int32_t *order, const float *x, int n,
                                    int width) {
    qwen3i_order_args a;
    if (!order) return x;
    a.y = c->ordered; a.x = x; a.order = order; a.width = width;
    qwen3i_parallel(c->exec.pool, n, 4, qwen3i_order_rows, &a);
    return c->ordered;
}

/* One decoder layer: x [n_rows, n_embd] in place; the last one: x [n_outs, n_embd], see above */
static void qwen3i_decoder_layer(qwen3i_cpu *c, const qwen3i_batch *batch, int layer) {
    const qwen3i_layer *w = &c->weights->layers[layer];
    const qwen3i_exec *e = &c->exec;
    int n = batch->n_rows, n_embd = c->config->n_embd;
    float eps = c->config->rms_eps;
    qwen3i_step step;
    step.c = c; step.batch = batch; step.layer = layer;

    /* h = RMSNorm(x) */
    qwen3i_rmsnorm(e, c->h, c->x, w->attn_norm, n, n_embd, eps);
    /* q, k, v = Wq h, Wk h, Wv h */
    qwen3i_matmul_qkv(e, c->q, c->key, c->value, w, qwen3i_in_order(c, w->qkv_order, c->h, n, n_embd), n);
    qwen3i_parallel(e->pool, n, 4, qwen3i_place_rows, &step);       /* q, k = RoPE(RMSNorm of each head) */
    qwen3i_attend(&step);                                           /* a = softmax(q . k / sqrt(dim)) v  */
    if (layer == c->config->n_layer - 1 && qwen3i_only_wanted(c)) n = qwen3i_keep_wanted(c, batch);
    /* x = x + Wo a */
    qwen3i_matmul_add(e, c->x, &w->wo, qwen3i_in_order(c, w->o_order, c->a, n, w->wo.cols), n);
    qwen3i_rmsnorm(e, c->h, c->x, w->mlp_norm, n, n_embd, eps);     /* h = RMSNorm(x)                    */
    if (w->experts) qwen3i_experts_mlp(c, w->experts, n);           /* x = x + a sum of experts          */
    else {
        /* f = silu(Wgate h) * (Wup h) */
        qwen3i_swiglu(e, c->ff, &w->w_gate, &w->w_up, qwen3i_in_order(c, w->mlp_order, c->h, n, n_embd), n);
        /* x = x + Wdown f */
        qwen3i_matmul_add(e, c->x, &w->w_down,
                          qwen3i_in_order(c, w->down_order, c->ff, n, w->w_down.cols), n);
    }
    qwen3i_show(&step);
}

/* ln P(target) under logits [n] */
static float qwen3i_log_prob(const qwen3i_simd *simd, const float *logits, int n, qwen3_token target) {
    float top = logits[0], part[256];
    double sum = 0;
    int i, j, m;
    for (i = 1; i < n; i++) top = logits[i] > top ? logits[i] : top;
    for (i = 0; i < n; i += m) {
        m = qwen3i_min(QWEN3I_COUNT(part), n - i);
        simd->exp(part, logits + i, top, m);
        for (j = 0; j < m; j++) sum += (double)part[j];
    }
    return (float)((double)logits[target] - (double)top - log(sum));
}

typedef struct qwen3i_head_deliver_args {
    const qwen3i_cpu *c;
    const qwen3i_out *outs;
} qwen3i_head_deliver_args;

/* outs[i] gets row i of c->h and c->logits. */
static void qwen3i_head_deliver(void *args, int begin, int end, int lane) {
    const qwen3i_head_deliver_args *a = (const qwen3i_head_deliver_args *)args;
    const qwen3i_cpu *c = a->c;
    size_t n_embd = (size_t)c->config->n_embd, n_vocab = (size_t)c->config->n_vocab;
    int i;
    (void)lane;
    for (i = begin; i < end; i++) {
        const qwen3i_out *o = &a->outs[i];
        const float *logits = c->logits + (size_t)i * n_vocab;
        if (o->hidden) memcpy(o->hidden, c->h + (size_t)i * n_embd, n_embd * 4);
        if (o->logits) memcpy(o->logits, logits, n_vocab * 4);
        if (o->keep_seq >= 0) memcpy(c->kept + (size_t)o->keep_seq * n_vocab, logits, n_vocab * 4);
        if (o->logprob) *o->logprob = qwen3i_log_prob(c->exec.simd, logits, c->config->n_vocab, o->target);
    }
}

/* Final norm and logits of n rows that are wanted from outs[first] on, at most QWEN3I_HEAD_ROWS of them (and
   no more than there is scratch for) */
static void qwen3i_head(qwen3i_cpu *c, const qwen3i_batch *batch, int first, int n) {
    qwen3i_head_deliver_args args;
    const qwen3i_out *outs = batch->outs + first;
    size_t n_embd = (size_t)c->config->n_embd;
    int i, any = 0;
    for (i = 0; i < n; i++) {
        size_t row = (size_t)(qwen3i_only_wanted(c) ? first + i : outs[i].row);
        c->exec.simd->rmsnorm(c->h + (size_t)i * n_embd, c->x + row * n_embd, c->weights->final_norm,
                              c->config->n_embd, c->config->rms_eps);
        any |= outs[i].logits || outs[i].logprob || outs[i].keep_seq >= 0;
    }
    if (any) qwen3i_matmul(&c->exec, c->logits, &c->weights->head, c->h, n);
    args.c = c; args.outs = outs;
    qwen3i_parallel(&c->pool, n, 1, qwen3i_head_deliver, &args);
}

static int qwen3i_cpu_cancelled(const qwen3i_cpu *c) {
    return c->desc.cancel && c->desc.cancel(c->desc.cancel_user);
}

static qwen3_result qwen3i_decoder(qwen3i_cpu *c, const qwen3i_batch *batch) {
    int i, tile = qwen3i_min(QWEN3I_HEAD_ROWS, qwen3i_cpu_rows(&c->desc));
    qwen3i_embed(&c->exec, c->x, &c->weights->embed, batch->tokens, batch->n_rows);
    qwen3i_rope_angles(c->cosines, c->sines, batch->positions, batch->n_rows,
                       c->freqs, c->config->head_dim / 2, c->rope_scale);
    for (i = 0; i < c->config->n_layer; i++) {
        if (qwen3i_cpu_cancelled(c)) return QWEN3_STOPPED;
        qwen3i_decoder_layer(c, batch, i);
    }
    for (i = 0; i < batch->n_outs; i += tile) {
        if (qwen3i_cpu_cancelled(c)) return QWEN3_STOPPED;
        qwen3i_head(c, batch, i, qwen3i_min(tile, batch->n_outs - i));
    }
    return QWEN3_OK;
}

static qwen3_result qwen3i_cpu_forward(void *ctx_state, const qwen3i_batch *batch, const qwen3i_err *err) {
    const fenv_t callers = qwen3i_float_enter();
    const qwen3_result r = qwen3i_decoder((qwen3i_cpu *)ctx_state, batch);
    (void)err;
    qwen3i_float_leave(callers);
    return r;
}

/* ---- the rest of the interface --------------------------------------------------------------- */
static qwen3_result qwen3i_cpu_model_create(void **model_state, const qwen3_model *model,
                                            const qwen3_load_desc *desc, const qwen3i_err *err) {
    (void)model; (void)desc; (void)err;
    *model_state = NULL;                /* the weights are used where they are */
    return QWEN3_OK;
}

static void qwen3i_cpu_model_free(void *model_state) { (void)model_state; }

static const char *qwen3i_cpu_device_name(const void *model_state) {
    (void)model_state;
    return qwen3i_simd_level(0)->name;
}

static float *qwen3i_cpu_kept(const qwen3i_cpu *c, int seq) {
    return c->kept + (size_t)seq * (size_t)c->config->n_vocab;
}

static qwen3_result qwen3i_cpu_logits(void *ctx_state, int seq, const float **out, const qwen3i_err *err) {
    (void)err;
    *out = qwen3i_cpu_kept((const qwen3i_cpu *)ctx_state, seq);
    return QWEN3_OK;
}

static qwen3_result qwen3i_cpu_set_logits(void *ctx_state, int seq, const float *logits,
                                          const qwen3i_err *err) {
    const qwen3i_cpu *c = (const qwen3i_cpu *)ctx_state;
    (void)err;
    memmove(qwen3i_cpu_kept(c, seq), logits, (size_t)c->config->n_vocab * 4);
    return QWEN3_OK;
}

/* Copy between the cache, [n_head_kv, max_ctx, head_dim], and the interface's [n_pos, n_head_kv *
   head_dim]. */
static void qwen3i_cpu_kv_copy(const qwen3i_cpu *c, char *cache, char *flat, int n_pos, int to_cache) {
    size_t row = qwen3i_cpu_kv_row(c), n_head = (size_t)c->config->n_head_kv, h, p;
    for (h = 0; h < n_head; h++)
        for (p = 0; p < (size_t)n_pos; p++) {
            char *in_cache = cache + (h * (size_t)c->desc.max_ctx + p) * row,
                             *in_flat = flat + (p * n_head + h) * row;
            if (to_cache) memcpy(in_cache, in_flat, row);
            else memcpy(in_flat, in_cache, row);
        }
}

static qwen3_result qwen3i_cpu_kv_read(void *ctx_state, int seq, int layer, int n_pos, void *k, void *v,
                                       const qwen3i_err *err) {
    const qwen3i_cpu *c = (const qwen3i_cpu *)ctx_state;
    size_t at = qwen3i_cpu_kv_at(c, layer, seq, 0, 0);
    (void)err;
    qwen3i_cpu_kv_copy(c, c->k + at, (char *)k, n_pos, 0);
    qwen3i_cpu_kv_copy(c, c->v + at, (char *)v, n_pos, 0);
    return QWEN3_OK;
}

static qwen3_result qwen3i_cpu_kv_write(void *ctx_state, int seq, int layer, int n_pos, const void *k,
                                        const void *v, const qwen3i_err *err) {
    const qwen3i_cpu *c = (const qwen3i_cpu *)ctx_state;
    size_t at = qwen3i_cpu_kv_at(c, layer, seq, 0, 0);
    (void)err;
    qwen3i_cpu_kv_copy(c, c->k + at, (char *)k, n_pos, 1);
    qwen3i_cpu_kv_copy(c, c->v + at, (char *)v, n_pos, 1);
    return QWEN3_OK;
}

static qwen3_result qwen3i_cpu_seq_copy(void *ctx_state, int dst, int src, int n_pos, const qwen3i_err *err) {
    const qwen3i_cpu *c = (const qwen3i_cpu *)ctx_state;
    int i, h;
    if (dst == src) return QWEN3_OK;
    for (i = 0; i < c->config->n_layer; i++)
        for (h = 0; h < c->config->n_head_kv; h++) {
            size_t to = qwen3i_cpu_kv_at(c, i, dst, h, 0), from = qwen3i_cpu_kv_at(c, i, src, h, 0);
            memcpy(c->k + to, c->k + from, (size_t)n_pos * qwen3i_cpu_kv_row(c));
            memcpy(c->v + to, c->v + from, (size_t)n_pos * qwen3i_cpu_kv_row(c));
        }
    return qwen3i_cpu_set_logits(ctx_state, dst, qwen3i_cpu_kept(c, src), err);
}

static const qwen3_backend *qwen3i_cpu_backend(void) {
    static const qwen3_backend backend = {
        QWEN3_VERSION, "cpu", 128,
        qwen3i_cpu_model_create, qwen3i_cpu_model_free, qwen3i_cpu_device_name,
        qwen3i_cpu_memory, qwen3i_cpu_create, qwen3i_cpu_free, qwen3i_cpu_forward, qwen3i_cpu_logits,
        NULL,                           /* next: sampling is the core's */
        qwen3i_cpu_seq_copy, qwen3i_cpu_kv_read, qwen3i_cpu_kv_write, qwen3i_cpu_set_logits,
        1, 1, 1, 0, NULL, NULL          /* block_types, experts, orders, devices; nothing to start */
    };
    return &backend;
}
/* ================================================================================================
   SAMPLER: from logits to one token. Order of the kept tokens: by logit, ties towards the lower id.
   After the temperature everything is integers, so that every platform and backend agrees.
   ================================================================================================ */
typedef struct qwen3i_candidate { float logit; int32_t id; } qwen3i_candidate;

typedef struct qwen3i_sampler_scratch { /* both [n_vocab]; owned by the context */
    float            *logits;
    qwen3i_candidate *candidates;
    const uint32_t   *mask;             /* NULL, or a bit for each token: may it come? */
    int               banned;           /* 0, or a token + 1 that may not come */
} qwen3i_sampler_scratch;

QWEN3_API qwen3_sampler qwen3_sampler_preset(qwen3_preset preset, uint64_t seed) {
    qwen3_sampler s;
    memset(&s, 0, sizeof s);
    s.rng = seed;
    if (preset == QWEN3_THINKING)     { s.temperature = 0.6f; s.top_p = 0.95f; s.top_k = 20; }
    if (preset == QWEN3_NON_THINKING) { s.temperature = 0.7f; s.top_p = 0.8f;  s.top_k = 20; }
    return s;
}

static uint64_t qwen3i_candidate_weight(qwen3i_candidate c, float top, float temperature) {
    return qwen3i_weight(qwen3i_octaves_below(c.logit, top, temperature));
}

static int qwen3i_between(float x, float low, float high) {
    return qwen3i_is_number(x) && x >= low && x <= high;
}

static int qwen3i_ranks_before(qwen3i_candidate a, qwen3i_candidate b) {
    return a.logit > b.logit || (!(a.logit < b.logit) && a.id < b.id);
}

static int qwen3i_compare_rank(const void *a, const void *b) {
    return qwen3i_ranks_before(*(const qwen3i_candidate *)b, *(const qwen3i_candidate *)a) -
           qwen3i_ranks_before(*(const qwen3i_candidate *)a, *(const qwen3i_candidate *)b);
}

static int qwen3i_compare_id(const void *a, const void *b) {
    const int32_t x = ((const qwen3i_candidate *)a)->id, y = ((const qwen3i_candidate *)b)->id;
    return (x > y) - (x < y);
}

/* Restore the heap below i: the root is the candidate that ranks last (least = 1) or first (least = 0). */
static void qwen3i_sift(qwen3i_candidate *h, int n, int i, int least) {
    int child;
    while ((child = 2 * i + 1) < n) {
        qwen3i_candidate tmp = h[i];
        if (child + 1 < n && qwen3i_ranks_before(h[child + 1], h[child]) != least) child++;
        if (qwen3i_ranks_before(h[child], h[i]) == least) return;
        h[i] = h[child];
        h[child] = tmp;
        i = child;
    }
}

static void qwen3i_heapify(qwen3i_candidate *h, int n, int least) {
    int i;
    for (i = n / 2 - 1; i >= 0; i--) qwen3i_sift(h, n, i, least);
}

static int qwen3i_may_come(const qwen3i_sampler_scratch *s, int token) {
    return !s || (token + 1 != s->banned && (!s->mask || (s->mask[token >> 5] >> (token & 31) & 1u)));
}

/* All tokens that may be sampled, in order of id. Returns how many. */
static int qwen3i_all_candidates(const float *logits, int n, const qwen3i_sampler_scratch *s,
                                 qwen3i_candidate *out) {
    int i, count = 0;
    for (i = 0; i < n; i++)
        if (qwen3i_may_come(s, i) && qwen3i_allowed(logits[i])) {
            out[count].logit = logits[i];
            out[count++].id = i;
        }
    return count;
}

/* The k that rank first, in order of rank. O(n log k) at worst, O(n) in practice. Returns how many. */
static int qwen3i_select_top(const float *logits, int n, int k, const qwen3i_sampler_scratch *s,
                             qwen3i_candidate *out) {
    qwen3i_candidate c;
    int count = 0;
    for (c.id = 0; c.id < n; c.id++) {
        c.logit = logits[c.id];
        if (count == k && !(c.logit > out[0].logit)) continue;      /* ids ascend: a tie ranks after */
        if (!qwen3i_allowed(c.logit) || !qwen3i_may_come(s, c.id)) continue;
        if (count < k) {
            out[count++] = c;
            if (count == k) qwen3i_heapify(out, k, 1);
        } else {
            out[0] = c;
            qwen3i_sift(out, k, 0, 1);
        }
    }
    qwen3i_sort(out, (size_t)count, sizeof *out, qwen3i_compare_rank);
    return count;
}

/* Keep the fewest candidates, in order of rank, whose weights reach the share top_p of all. Sorted ones are
   walked; unsorted ones come off a heap, so that only what is kept is put in order. Returns how many. */
static int qwen3i_cut_top_p(qwen3i_candidate *c, int n, int sorted, float top_p, float top,
                            float temperature) {
    uint64_t total = 0, sum = 0, need;
    int i, kept = 0;
    for (i = 0; i < n; i++) total += qwen3i_candidate_weight(c[i], top, temperature);
    need = qwen3i_share_of(total, top_p);
    if (sorted) {
        do sum += qwen3i_candidate_weight(c[kept++], top, temperature); while (kept < n && sum < need);
        return kept;
    }
    qwen3i_heapify(c, n, 0);
    do {
        qwen3i_candidate best = c[0];
        sum += qwen3i_candidate_weight(best, top, temperature);
        kept++;
        c[0] = c[n - kept];
        c[n - kept] = best;             /* what is kept gathers at the end of the array */
        qwen3i_sift(c, n - kept, 0, 0);
    } while (kept < n && sum < need);
    memmove(c, c + n - kept, (size_t)kept * sizeof *c);
    return kept;
}

/* Walk the candidates in order of id until a random share of their total weight is reached. */
static qwen3_token qwen3i_draw(qwen3i_candidate *c, int n, float top, float min_p, float temperature,
                               uint64_t *rng) {
    uint64_t total = 0, target, w, least = qwen3i_share_of(QWEN3I_WEIGHT_ONE, min_p);
    int i;
    for (i = 0; i < n; i++) {
        w = qwen3i_candidate_weight(c[i], top, temperature);
        if (w >= least) total += w;
    }
    target = qwen3i_mul_high(qwen3i_random(rng), total);
    for (i = 0; i < n; i++) {
        w = qwen3i_candidate_weight(c[i], top, temperature);
        if (w < least) continue;
        if (target < w) break;
        target -= w;
    }
    return c[i < n ? i : n - 1].id;
}

/* Presence and repetition penalties, once for each distinct token among the last ones. */
static void qwen3i_penalise(float *logits, int n_vocab, const qwen3_token *seq, int n,
                            const qwen3_sampler *s, qwen3i_candidate *mark) {
    const int from = qwen3i_penalty_begin(s, n);
    int i;
    for (i = from; i < n; i++) if (seq[i] >= 0 && seq[i] < n_vocab) mark[seq[i]].id = 0;
    for (i = from; i < n; i++) {
        float *l = seq[i] >= 0 && seq[i] < n_vocab ? &logits[seq[i]] : NULL;
        if (!l || mark[seq[i]].id) continue;
        mark[seq[i]].id = 1;
        *l = qwen3i_penalised(*l, s->repeat_penalty, s->presence_penalty);
    }
}

static int qwen3i_changes_logits(const qwen3_sampler *s) {
    return s->n_bias > 0 || s->filter || qwen3i_penalises(s);
}

/* The logits to choose from: those given, or a copy with bias, penalties and filter applied. */
static const float *qwen3i_adjust(const float *logits, int n_vocab, const qwen3_token *seq, int n,
                                  const qwen3_sampler *s, const qwen3i_sampler_scratch *scratch) {
    int i;
    if (!qwen3i_changes_logits(s)) return logits;
    memcpy(scratch->logits, logits, (size_t)n_vocab * sizeof *logits);
    for (i = 0; i < s->n_bias; i++)
        if (s->bias[i].token >= 0 && s->bias[i].token < n_vocab)
            scratch->logits[s->bias[i].token] += s->bias[i].bias;
    qwen3i_penalise(scratch->logits, n_vocab, seq, n, s, scratch->candidates);
    if (s->filter) s->filter(scratch->logits, n_vocab, seq, n, s->filter_user);
    return scratch->logits;
}

/* logits [n_vocab]; only ids below n_choose are ever chosen; seq [n]: the tokens so far. */
static qwen3_result qwen3i_choose(const float *logits, int n_vocab, int n_choose, const qwen3_token *seq,
                                  int n, qwen3_sampler *s, const qwen3i_sampler_scratch *scratch,
                                      qwen3_token *out, const qwen3i_err *err) {
    qwen3i_candidate *c = scratch->candidates;
    const int cut_p = s && s->top_p > 0 && s->top_p < 1;
    int greedy, count;
    float top;
    if (s) logits = qwen3i_adjust(logits, n_vocab, seq, n, s, scratch);
    greedy = !s || !(s->temperature > 0);
    if (greedy || s->top_k > 0)
        count = qwen3i_select_top(logits, n_choose, greedy ? 1 : qwen3i_min(s->top_k, n_choose), scratch, c);
    else count = qwen3i_all_candidates(logits, n_choose, scratch, c);
    if (count == 0)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "every token is banned by bias, filter or grammar, or the "
                                               "logits are not numbers");
    *out = c[0].id;
    if (greedy) return QWEN3_OK;
    top = c[0].logit;
    if (s->top_k <= 0) { int i; for (i = 1; i < count; i++) if (c[i].logit > top) top = c[i].logit; }
    if (cut_p) count = qwen3i_cut_top_p(c, count, s->top_k > 0, s->top_p, top, s->temperature);
    if (cut_p || s->top_k > 0) qwen3i_sort(c, (size_t)count, sizeof *c, qwen3i_compare_id);
    *out = qwen3i_draw(c, count, top, s->min_p > 0 ? s->min_p : 0.0f, s->temperature, &s->rng);
    return QWEN3_OK;
}

static qwen3_result qwen3i_check_sampler(const qwen3_sampler *s, const qwen3i_err *err) {
    if (!s) return QWEN3_OK;
    if (!qwen3i_between(s->temperature, 0, 1e4f))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "sampler: temperature is not between 0 and 10000");
    if (!qwen3i_between(s->top_p, 0, 1))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "sampler: top_p is not between 0 and 1");
    if (!qwen3i_between(s->min_p, 0, 1))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "sampler: min_p is not between 0 and 1");
    if (s->top_k < 0) return qwen3i_fail(err, QWEN3_ERR_ARG, "sampler: top_k is negative");
    if (!qwen3i_between(s->repeat_penalty, 0, 1e4f))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "sampler: repeat_penalty is not between 0 and 10000");
    if (!qwen3i_between(s->presence_penalty, -1e4f, 1e4f))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "sampler: presence_penalty is not between -10000 and 10000");
    if (s->n_bias < 0 || (s->n_bias > 0 && !s->bias))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "sampler: bias is NULL or n_bias negative");
    return QWEN3_OK;
}

static qwen3_result qwen3i_not_numbers(const qwen3i_err *err) {
    return qwen3i_fail(err, QWEN3_ERR_FORMAT, "the model computes what is not a number; QWEN3_LOAD_CHECK "
                                              "looks for that in its weights");
}

/* ln sum exp(logits), in double. */
static double qwen3i_log_sum_exp(const float *logits, int n) {
    const fenv_t callers = qwen3i_float_enter();
    double sum = 0;
    float top = logits[0];
    int i;
    for (i = 1; i < n; i++) if (logits[i] > top) top = logits[i];
    for (i = 0; i < n; i++) sum += exp((double)(logits[i] - top));
    sum = (double)top + log(sum);
    qwen3i_float_leave(callers);
    return sum;
}
/* ================================================================================================
   GRAMMARS: output that always parses
   A grammar becomes a nondeterministic pushdown machine over bytes. Its lexemes (strings, numbers,
   literals, regular expressions) are deterministic automata that are built when it is compiled; an
   object remembers which of its properties were seen, a list counts. What may follow is a set of
   threads; the tokens allowed are found by walking the vocabulary, sorted as a tree of bytes, with them.
   ================================================================================================ */
#define QWEN3I_FAR        (1 << 28)     /* a distance: there is no way */
#define QWEN3I_RAW_STATES 65000         /* most states of one automaton */
#define QWEN3I_MAX_STEPS  40000000      /* that compiling may take: a fraction of a second */
#define QWEN3I_MAX_BYTES  ((size_t)64 << 20)    /* of a compiled grammar */

#define QWEN3I_ARRAY(T, buf) ((T *)(void *)(buf).p)
#define QWEN3I_LEN(T, buf)   ((int)((buf).n / sizeof(T)))

/* Lists of numbers, each stored once and known by its index. */
typedef struct qwen3i_interner { qwen3i_buf data, spans, table; } qwen3i_interner;
typedef struct qwen3i_span { int first, n; } qwen3i_span;

typedef struct qwen3i_edge { unsigned char low, high; uint16_t to; } qwen3i_edge;   /* bytes low..high */
typedef struct qwen3i_state {           /* of a deterministic automaton; state numbers are its own */
    int      edges, row;                /* its edges; or its row [256] of states + 1, -1: none */
    uint16_t n_edges;
    unsigned char final, boundary;      /* boundary: between two characters of a string */
    unsigned char anything;             /* there, any character may follow */
    int      label;                     /* of a final one: which key of an object this is */
    int      distance, chars;           /* bytes to the nearest final one, whole characters likewise */
    /* labels within reach: names low..high - 1; bytes to that of any other key */
    int      low, high, open;
} qwen3i_state;
typedef struct qwen3i_dfa { int first, n_states; } qwen3i_dfa;

enum { QWEN3I_NFA_DEAD, QWEN3I_NFA_RANGE, QWEN3I_NFA_SPLIT, QWEN3I_NFA_FINAL,
       QWEN3I_NFA_START_ONLY,           /* ^ */
       QWEN3I_NFA_END_ONLY,             /* $ */
       QWEN3I_NFA_LAST,                 /* the end of an expression: goes on to out, or ends with out1 */
       QWEN3I_NFA_ANYTHING };           /* no way on: marks where any characters may follow */
enum { QWEN3I_NFA_INSIDE = 0, QWEN3I_NFA_BOUNDARY = 1, QWEN3I_NFA_OPENS = 2 };
typedef struct qwen3i_nfa {
    /* place: a range at a boundary, or the quote that opens a string */
    unsigned char kind, low, high, place;
    int out, out1;                      /* FINAL: out is its mark */
} qwen3i_nfa;

struct qwen3_grammar {                  /* immutable once compiled */
    qwen3_allocator allocator;
    const qwen3_model *model;
    const struct qwen3i_index *vocab;
    uint64_t    serial;                 /* hash of its text: tells cached masks apart */
    int         flags, kind, max_depth;
    qwen3i_buf  dfas, states, edges, rows;
    qwen3i_buf  lexemes, nodes, lists, objects, members, arrays;
    int         root, plain;            /* node; the automaton of any string */
    qwen3_token call_begin, call_end;   /* TOOLS: the tags; -1 */
};

typedef struct qwen3i_compiler {
    qwen3_grammar     *g;
    qwen3_result       result;          /* after a failure nothing more is done */
    int                refused;         /* that was a keyword, or a part of an expression, that is not enforced */
    char               message[400];    /* what the failure was */
    int64_t            steps, max_steps;
    size_t             max_bytes;
    const char        *where;           /* what is being compiled, for messages */
    int                json;            /* characters are written as in JSON strings */
    qwen3i_buf         nfa, marks, stack, set, seeds;
    uint32_t           stamp;
    struct { unsigned char low, high, place; int out, state; } tails[8];
    int                n_tails;
    qwen3i_interner    subsets;
    qwen3i_buf         ast, ranges, bnf;
    int                keeps_ast;
    /* JSON Schema */
    qwen3i_buf         dom, text, shapes, rules, terms;
    qwen3i_interner    values;          /* sets of terms: one value node each */
    qwen3i_buf         value_nodes, empties, pending, patterns;
    int                depth, levels;
    int                number_dfas[2], words[8], any_string[2];
} qwen3i_compiler;

QWEN3I_PRINTF(3, 4)
static int qwen3i_reject(qwen3i_compiler *c, qwen3_result code, const char *format, ...) {
    va_list args;
    if (c->result != QWEN3_OK) return 0;
    va_start(args, format);
    vsnprintf(c->message, sizeof c->message, format, args);
    va_end(args);
    c->result = code;
    return 0;
}

/* Count work; 0 when it is too much, or after another failure. */
static int qwen3i_spend(qwen3i_compiler *c, int64_t steps) {
    c->steps += steps;
    if (c->steps > c->max_steps)
        qwen3i_reject(c, QWEN3_ERR_UNSUPPORTED, "%s: too complex", c->where ? c->where : "the grammar");
    return c->result == QWEN3_OK;
}

/* Is there room for what automata take, and for what they are made from? */
static int qwen3i_fits(qwen3i_compiler *c) {
    const qwen3_grammar *g = c->g;
    const size_t others = g->nodes.n + g->lists.n + g->lexemes.n + g->objects.n + g->members.n + g->arrays.n;
    if (g->states.n + g->edges.n + g->rows.n + others > c->max_bytes || c->nfa.n > c->max_bytes)
        qwen3i_reject(c, QWEN3_ERR_UNSUPPORTED, "%s: too complex: the grammar takes more than %lu bytes",
                      c->where ? c->where : "the grammar", (unsigned long)c->max_bytes);
    return c->result == QWEN3_OK;
}

static int qwen3i_out_of_memory(qwen3i_compiler *c) {
    return qwen3i_reject(c, QWEN3_ERR_MEMORY, "out of memory for a grammar");
}

static int qwen3i_append_all(qwen3i_compiler *c, qwen3i_buf *b, const void *items, size_t size) {
    if (c->result != QWEN3_OK) return 0;
    return qwen3i_buf_add(b, (const char *)items, size) ? 1 : qwen3i_out_of_memory(c);
}

/* Append an element; its index. After a failure 0: every array has an element 0. */
static int qwen3i_push(qwen3i_compiler *c, qwen3i_buf *b, const void *item, size_t size) {
    return qwen3i_append_all(c, b, item, size) ? (int)(b->n / size) - 1 : 0;
}

static int qwen3i_push_int(qwen3i_compiler *c, qwen3i_buf *b, int value) {
    return qwen3i_push(c, b, &value, sizeof value);
}

/* ---- lists of numbers, each stored once ------------------------------------------------------ */
static void qwen3i_intern_reset(qwen3i_interner *in) {
    in->data.n = in->spans.n = 0;
    if (in->table.n) memset(in->table.p, 0, in->table.n);
}

static void qwen3i_intern_put(qwen3i_interner *in, uint32_t mask, uint64_t hash, int id) {
    int *table = QWEN3I_ARRAY(int, in->table);
    uint32_t at = (uint32_t)hash & mask;
    while (table[at]) at = (at + 1) & mask;
    table[at] = id + 1;
}

static int qwen3i_intern_grow(qwen3i_compiler *c, qwen3i_interner *in) {
    const qwen3i_span *spans = QWEN3I_ARRAY(qwen3i_span, in->spans);
    const int *data = QWEN3I_ARRAY(int, in->data);
    int i, n = QWEN3I_LEN(qwen3i_span, in->spans);
    size_t size = in->table.n ? in->table.n : 128 * sizeof(int);
    if ((size_t)n * 2 * sizeof(int) < in->table.n) return 1;
    in->table.n = 0;
    if (!qwen3i_buf_reserve(&in->table, 2 * size))
        return qwen3i_out_of_memory(c);
    in->table.n = 2 * size;
    memset(in->table.p, 0, in->table.n);
    for (i = 0; i < n; i++)
        qwen3i_intern_put(in, (uint32_t)(in->table.n / sizeof(int)) - 1,
                          spans[i].n > 0 ? qwen3i_hash(0, data + spans[i].first,
                                                       (size_t)spans[i].n * sizeof *data) : 0, i);
    return 1;
}

/* The index of a list; *fresh: it is new. */
static int qwen3i_intern(qwen3i_compiler *c, qwen3i_interner *in, const int *list, int n, int *fresh) {
    const uint64_t hash = n > 0 ? qwen3i_hash(0, list, (size_t)n * sizeof *list) : 0;
    qwen3i_span span;
    uint32_t mask, at;
    *fresh = 0;
    if (c->result != QWEN3_OK || !qwen3i_intern_grow(c, in)) return 0;
    mask = (uint32_t)(in->table.n / sizeof(int)) - 1;
    for (at = (uint32_t)hash & mask; QWEN3I_ARRAY(int, in->table)[at]; at = (at + 1) & mask) {
        const int id = QWEN3I_ARRAY(int, in->table)[at] - 1;
        span = QWEN3I_ARRAY(qwen3i_span, in->spans)[id];
        if (span.n == n && (n == 0 || memcmp(QWEN3I_ARRAY(int, in->data) + span.first, list,
                                             (size_t)n * sizeof *list) == 0)) return id;
    }
    span.first = QWEN3I_LEN(int, in->data);
    span.n = n;
    if (!qwen3i_append_all(c, &in->data, list, (size_t)n * sizeof *list)) return 0;
    *fresh = 1;
    qwen3i_push(c, &in->spans, &span, sizeof span);
    if (c->result != QWEN3_OK) return 0;
    qwen3i_intern_put(in, mask, hash, QWEN3I_LEN(qwen3i_span, in->spans) - 1);
    return QWEN3I_LEN(qwen3i_span, in->spans) - 1;
}

/* ---- nondeterministic automata, built from the end ------------------------------------------- */
static int qwen3i_ast_add(qwen3i_compiler *c, int kind, int child);

static void qwen3i_nfa_reset(qwen3i_compiler *c) {
    qwen3i_nfa dead;
    memset(&dead, 0, sizeof dead);
    c->nfa.n = 0;
    c->n_tails = 0;
    qwen3i_push(c, &c->nfa, &dead, sizeof dead);
    if (c->keeps_ast) return;           /* rules are made one after another */
    c->ast.n = c->ranges.n = 0;
    qwen3i_ast_add(c, 0, 0);
}

static int qwen3i_nfa_add(qwen3i_compiler *c, int kind, int out, int out1) {
    qwen3i_nfa s;
    memset(&s, 0, sizeof s);
    s.kind = (unsigned char)kind;
    s.out = out;
    s.out1 = out1;
    return qwen3i_spend(c, 1) && qwen3i_fits(c) ? qwen3i_push(c, &c->nfa, &s, sizeof s) : 0;
}

static int qwen3i_nfa_split(qwen3i_compiler *c, int a, int b) {
    return !a ? b : !b ? a : qwen3i_nfa_add(c, QWEN3I_NFA_SPLIT, a, b);
}

/* One byte of low..high, then out. The last few are remembered: characters share their last bytes. */
static int qwen3i_nfa_range(qwen3i_compiler *c, int low, int high, int place, int out) {
    qwen3i_nfa *s;
    int i, at;
    if (!out) return 0;
    for (i = 0; i < 8 && i < c->n_tails; i++)
        if (c->tails[i].low == low && c->tails[i].high == high && c->tails[i].place == place &&
            c->tails[i].out == out)
            return c->tails[i].state;
    at = qwen3i_nfa_add(c, QWEN3I_NFA_RANGE, out, 0);
    if (!at) return 0;
    s = &QWEN3I_ARRAY(qwen3i_nfa, c->nfa)[at];
    s->low = (unsigned char)low; s->high = (unsigned char)high; s->place = (unsigned char)place;
    i = c->n_tails++ % 8;
    c->tails[i].low = s->low; c->tails[i].high = s->high; c->tails[i].place = s->place;
    c->tails[i].out = out; c->tails[i].state = at;
    return at;
}

static int qwen3i_nfa_byte(qwen3i_compiler *c, int byte, int place, int out) {
    return qwen3i_nfa_range(c, byte, byte, place, out);
}

static int qwen3i_nfa_text(qwen3i_compiler *c, const char *p, size_t n, int out) {
    while (n > 0) out = qwen3i_nfa_byte(c, (unsigned char)p[--n], QWEN3I_NFA_INSIDE, out);
    return out;
}

/* The characters low..high as UTF-8. */
static int qwen3i_nfa_utf8(qwen3i_compiler *c, uint32_t low, uint32_t high, int out) {
    static const uint32_t last[3] = {0x7F, 0x7FF, 0xFFFF};
    char a[4], b[4];
    int i, n;
    uint32_t m;
    for (i = 0; i < 3; i++)
        if (low <= last[i] && high > last[i])
            return qwen3i_nfa_split(c, qwen3i_nfa_utf8(c, low, last[i], out),
                                    qwen3i_nfa_utf8(c, last[i] + 1, high, out));
    for (i = 1; i < 4 && high >= 0x80; i++) {
        m = (1u << 6 * i) - 1;
        if ((low & ~m) == (high & ~m)) continue;
        if (low & m)
            return qwen3i_nfa_split(c, qwen3i_nfa_utf8(c, low, low | m, out),
                                    qwen3i_nfa_utf8(c, (low | m) + 1, high, out));
        if ((high & m) != m)
            return qwen3i_nfa_split(c, qwen3i_nfa_utf8(c, low, (high & ~m) - 1, out),
                                    qwen3i_nfa_utf8(c, high & ~m, high, out));
    }
    n = qwen3i_utf8_put(a, low);
    qwen3i_utf8_put(b, high);
    for (i = n - 1; i > 0; i--)
        out = qwen3i_nfa_range(c, (unsigned char)a[i], (unsigned char)b[i], QWEN3I_NFA_INSIDE, out);
    return qwen3i_nfa_range(c, (unsigned char)a[0], (unsigned char)b[0], QWEN3I_NFA_BOUNDARY, out);
}

/* Hexadecimal digits of value a..b; upper: capitals, too. */
static int qwen3i_nfa_hex_digit(qwen3i_compiler *c, uint32_t a, uint32_t b, int upper, int out) {
    int s = 0;
    if (a < 10) s = qwen3i_nfa_range(c, '0' + (int)a, '0' + (int)(b < 10 ? b : 9), QWEN3I_NFA_INSIDE, out);
    if (b < 10) return s;
    a = a < 10 ? 0 : a - 10;
    b -= 10;
    s = qwen3i_nfa_split(c, s, qwen3i_nfa_range(c, 'a' + (int)a, 'a' + (int)b, QWEN3I_NFA_INSIDE, out));
    return upper ? qwen3i_nfa_split(c, s, qwen3i_nfa_range(c, 'A' + (int)a, 'A' + (int)b, QWEN3I_NFA_INSIDE,
                                                           out)) : s;
}

/* The numbers low..high with this many hexadecimal digits. */
static int qwen3i_nfa_hex(qwen3i_compiler *c, uint32_t low, uint32_t high, int digits, int upper, int out) {
    const int shift = 4 * (digits - 1);
    uint32_t m;
    if (digits == 0) return out;
    m = (1u << shift) - 1;
    if (low >> shift == high >> shift)
        return qwen3i_nfa_hex_digit(c, low >> shift, high >> shift, upper,
                                    qwen3i_nfa_hex(c, low & m, high & m, digits - 1, upper, out));
    if (low & m)
        return qwen3i_nfa_split(c, qwen3i_nfa_hex(c, low, low | m, digits, upper, out),
                                qwen3i_nfa_hex(c, (low | m) + 1, high, digits, upper, out));
    if ((high & m) != m)
        return qwen3i_nfa_split(c, qwen3i_nfa_hex(c, low, (high & ~m) - 1, digits, upper, out),
                                qwen3i_nfa_hex(c, high & ~m, high, digits, upper, out));
    return qwen3i_nfa_hex_digit(c, low >> shift, high >> shift, upper,
                                qwen3i_nfa_hex(c, 0, m, digits - 1, upper, out));
}

typedef struct qwen3i_chars { uint32_t low, high; } qwen3i_chars;    /* a range of characters */

/* What a class contains of low..high, as UTF-8. */
static int qwen3i_nfa_part(qwen3i_compiler *c, qwen3i_chars r, uint32_t low, uint32_t high, int out) {
    if (r.low > low) low = r.low;
    if (r.high < high) high = r.high;
    return low <= high ? qwen3i_nfa_utf8(c, low, high, out) : 0;
}

/* The escapes, after their backslash, of what must be escaped in a JSON string; each character in one way. */
static int qwen3i_nfa_escapes(qwen3i_compiler *c, qwen3i_chars r, int out) {
    static const char from[] = "\b\t\n\f\r\"\\", to[] = "btnfr\"\\";
    int i, s = 0, u = 0;
    uint32_t x;
    for (i = 0; i < 7; i++)
        if ((uint32_t)from[i] >= r.low && (uint32_t)from[i] <= r.high)
            s = qwen3i_nfa_split(c, s, qwen3i_nfa_byte(c, to[i], QWEN3I_NFA_INSIDE, out));
    for (x = r.low; x < 0x20 && x <= r.high; x++)
        if (!x || !strchr(from, (int)x)) u = qwen3i_nfa_split(c, u, qwen3i_nfa_hex(c, x, x, 2, 0, out));
    return u ? qwen3i_nfa_split(c, s, qwen3i_nfa_text(c, "u00", 3, u)) : s;
}

/* One character of a class. */
static int qwen3i_nfa_class(qwen3i_compiler *c, qwen3i_span set, int out) {
    int i, s = 0, escapes = 0;
    for (i = 0; i < set.n && c->result == QWEN3_OK; i++) {
        const qwen3i_chars r = QWEN3I_ARRAY(qwen3i_chars, c->ranges)[set.first + i];
        if (c->json) {
            s = qwen3i_nfa_split(c, s, qwen3i_nfa_part(c, r, 0x20, 0x21, out));
            s = qwen3i_nfa_split(c, s, qwen3i_nfa_part(c, r, 0x23, 0x5B, out));
            s = qwen3i_nfa_split(c, s, qwen3i_nfa_part(c, r, 0x5D, 0xD7FF, out));
            if (r.low <= 0x5C) escapes = qwen3i_nfa_split(c, escapes, qwen3i_nfa_escapes(c, r, out));
        } else s = qwen3i_nfa_split(c, s, qwen3i_nfa_part(c, r, 0, 0xD7FF, out));
        s = qwen3i_nfa_split(c, s, qwen3i_nfa_part(c, r, 0xE000, 0x10FFFF, out));
    }
    return escapes ? qwen3i_nfa_split(c, s, qwen3i_nfa_byte(c, '\\', QWEN3I_NFA_BOUNDARY, escapes)) : s;
}

/* ---- deterministic automata ------------------------------------------------------------------ */
/* Does the expression end here without another character? Then what follows its end, else 0. */
static int qwen3i_nfa_ends(qwen3i_compiler *c, int s) {
    const qwen3i_nfa *nfa = QWEN3I_ARRAY(qwen3i_nfa, c->nfa);
    int steps;
    int stack[64], n = 1;
    stack[0] = s;
    for (steps = 0; n > 0 && steps < 4096; steps++) {
        const qwen3i_nfa *a = &nfa[stack[--n]];
        if (a->kind == QWEN3I_NFA_LAST) return a->out1;
        if (a->kind == QWEN3I_NFA_END_ONLY) stack[n++] = a->out;
        if (a->kind == QWEN3I_NFA_SPLIT && n < 62) { stack[n++] = a->out; stack[n++] = a->out1; }
    }
    return 0;
}

/* Put into c->set, in order, what can be reached from the seeds without a byte. */
static int qwen3i_compare_int(const void *a, const void *b) {
    const int x = *(const int *)a, y = *(const int *)b;
    return (x > y) - (x < y);
}

static void qwen3i_closure(qwen3i_compiler *c, int at_start) {
    const qwen3i_nfa *nfa = QWEN3I_ARRAY(qwen3i_nfa, c->nfa);
    uint32_t *stamps = QWEN3I_ARRAY(uint32_t, c->marks);
    int64_t steps = 0;
    c->stamp++;
    c->set.n = 0;
    while (c->seeds.n > 0 && c->result == QWEN3_OK) {
        int s = QWEN3I_ARRAY(int, c->seeds)[c->seeds.n / sizeof(int) - 1];
        const qwen3i_nfa *a = &nfa[s];
        c->seeds.n -= sizeof(int);
        steps++;
        if (stamps[s] == c->stamp || a->kind == QWEN3I_NFA_DEAD) continue;
        stamps[s] = c->stamp;
        if (a->kind == QWEN3I_NFA_RANGE || a->kind == QWEN3I_NFA_FINAL || a->kind == QWEN3I_NFA_ANYTHING)
            qwen3i_push_int(c, &c->set, s);
        if (a->kind == QWEN3I_NFA_SPLIT || a->kind == QWEN3I_NFA_LAST) {
            qwen3i_push_int(c, &c->seeds, a->out);
            qwen3i_push_int(c, &c->seeds, a->out1);
        }
        if (a->kind == QWEN3I_NFA_START_ONLY && at_start) qwen3i_push_int(c, &c->seeds, a->out);
        if (a->kind == QWEN3I_NFA_END_ONLY) qwen3i_push_int(c, &c->seeds, qwen3i_nfa_ends(c, a->out));
    }
    qwen3i_spend(c, steps + (int64_t)(c->set.n / sizeof(int)) * 4);
    qwen3i_sort(c->set.p, c->set.n / sizeof(int), sizeof(int), qwen3i_compare_int);
}

static int qwen3i_dfa_begin(qwen3i_compiler *c) {
    qwen3i_dfa d;
    d.first = QWEN3I_LEN(qwen3i_state, c->g->states);
    d.n_states = 0;
    qwen3i_intern_reset(&c->subsets);
    return qwen3i_push(c, &c->g->dfas, &d, sizeof d);
}

static qwen3i_state qwen3i_state_make(void) {
    qwen3i_state s;
    memset(&s, 0, sizeof s);
    s.row = -1;
    return s;
}

/* Keep a state, with edges from its row [256] of states + 1. */
static void qwen3i_dfa_edges(qwen3i_compiler *c, int at, qwen3i_state s, const int *row) {
    int b = 0;
    s.edges = QWEN3I_LEN(qwen3i_edge, c->g->edges);
    while (b < 256) {
        qwen3i_edge e;
        int first = b;
        while (b < 256 && row[b] == row[first]) b++;
        if (!row[first]) continue;
        e.low = (unsigned char)first;
        e.high = (unsigned char)(b - 1);
        e.to = (uint16_t)(row[first] - 1);
        qwen3i_push(c, &c->g->edges, &e, sizeof e);
        s.n_edges++;
    }
    if (c->result == QWEN3_OK) QWEN3I_ARRAY(qwen3i_state, c->g->states)[at] = s;
}

static int qwen3i_near(int a, int b) { return a + b < QWEN3I_FAR ? a + b : QWEN3I_FAR; }

/* What a state can reach, from what its edges lead to. Returns whether anything changed. */
static int qwen3i_state_update(const qwen3_grammar *g, qwen3i_state *all, qwen3i_state *s) {
    qwen3i_state old = *s;
    int i;
    for (i = 0; i < s->n_edges; i++) {
        const qwen3i_state *to = &all[QWEN3I_ARRAY(qwen3i_edge, g->edges)[s->edges + i].to];
        if (to->distance >= QWEN3I_FAR) continue;
        s->distance = qwen3i_min(s->distance, to->distance + 1);
        s->chars = qwen3i_min(s->chars, to->chars + (to->boundary && !to->final));
        s->open = qwen3i_min(s->open, qwen3i_near(to->open, 1));
        if (to->low < to->high) {
            s->low = s->low < s->high ? qwen3i_min(s->low, to->low) : to->low;
            s->high = qwen3i_max(s->high, to->high);
        }
    }
    return s->distance != old.distance || s->chars != old.chars || s->open != old.open ||
           s->low != old.low || s->high != old.high;
}

static void qwen3i_dfa_row(qwen3i_compiler *c, qwen3i_state *s) {
    uint16_t row[256];
    int i, b;
    if (s->n_edges <= 8 || !qwen3i_fits(c)) return;
    memset(row, 0, sizeof row);
    for (i = 0; i < s->n_edges; i++) {
        const qwen3i_edge e = QWEN3I_ARRAY(qwen3i_edge, c->g->edges)[s->edges + i];
        for (b = e.low; b <= e.high; b++) row[b] = (uint16_t)(e.to + 1);
    }
    s->row = (int)(c->g->rows.n / sizeof row);
    qwen3i_push(c, &c->g->rows, row, sizeof row);
}

/* Find the distances and take out what leads nowhere. n_names: labels below are names. Returns whether
   anything is left. */
static int qwen3i_dfa_end(qwen3i_compiler *c, int dfa, int n_names) {
    const qwen3i_dfa d = QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas)[dfa];
    qwen3i_state *all = QWEN3I_ARRAY(qwen3i_state, c->g->states) + d.first;
    qwen3i_edge *edges = QWEN3I_ARRAY(qwen3i_edge, c->g->edges);
    int i, k, changed;
    if (c->result != QWEN3_OK) return 0;
    for (i = 0; i < d.n_states; i++) {
        qwen3i_state *s = &all[i];
        s->distance = s->chars = s->final ? 0 : QWEN3I_FAR;
        s->low = s->final && s->label < n_names ? s->label : 0;
        s->high = s->final && s->label < n_names ? s->label + 1 : 0;
        s->open = s->final && s->label >= n_names ? 0 : QWEN3I_FAR;
    }
    do for (changed = 0, i = d.n_states - 1; i >= 0; i--) changed |= qwen3i_state_update(c->g, all, &all[i]);
    while (changed && qwen3i_spend(c, d.n_states));
    for (i = 0; i < d.n_states; i++) {
        int kept = 0;
        for (k = 0; k < all[i].n_edges; k++)
            if (all[edges[all[i].edges + k].to].distance < QWEN3I_FAR)
                edges[all[i].edges + kept++] = edges[all[i].edges + k];
        all[i].n_edges = (uint16_t)kept;
    }
    return all[0].distance < QWEN3I_FAR;
}

/* A state for the list of numbers in c->set, or the one that it has already: its index + 1. */
static int qwen3i_dfa_state(qwen3i_compiler *c, int dfa) {
    qwen3i_dfa *d;
    qwen3i_state s = qwen3i_state_make();
    int fresh, id = qwen3i_intern(c, &c->subsets, QWEN3I_ARRAY(int, c->set), QWEN3I_LEN(int, c->set), &fresh);
    if (fresh) {
        d = &QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas)[dfa];
        if (d->n_states >= QWEN3I_RAW_STATES)
            return qwen3i_reject(c, QWEN3_ERR_UNSUPPORTED, "%s: too complex", c->where ? c->where :
                                 "the grammar");
        d->n_states++;
        if (qwen3i_fits(c)) qwen3i_push(c, &c->g->states, &s, sizeof s);
    }
    return c->result == QWEN3_OK ? id + 1 : 0;
}

/* The row of a set of nondeterministic states. */
static void qwen3i_subset_row(qwen3i_compiler *c, int dfa, qwen3i_span span, int *row) {
    unsigned char cut[257];
    int i, b = 0, opens = 0;
    memset(cut, 0, sizeof cut);
    memset(row, 0, 256 * sizeof *row);
    for (i = 0; i < span.n; i++) {
        const qwen3i_nfa *a = &QWEN3I_ARRAY(qwen3i_nfa,
                                            c->nfa)[QWEN3I_ARRAY(int, c->subsets.data)[span.first + i]];
        if (a->kind != QWEN3I_NFA_RANGE) continue;
        cut[a->low] = cut[a->high + 1] = 1;
        opens |= a->place == QWEN3I_NFA_OPENS;
    }
    while (b < 256 && c->result == QWEN3_OK) {
        int first = b++, to;
        while (b < 256 && !cut[b]) b++;
        c->seeds.n = 0;
        for (i = 0; i < span.n; i++) {
            const qwen3i_nfa *a = &QWEN3I_ARRAY(qwen3i_nfa,
                                                c->nfa)[QWEN3I_ARRAY(int, c->subsets.data)[span.first + i]];
            if (a->kind == QWEN3I_NFA_RANGE && a->low <= first && first <= a->high)
                qwen3i_push_int(c, &c->seeds, a->out);
        }
        qwen3i_spend(c, span.n);
        if (c->seeds.n == 0) continue;
        qwen3i_closure(c, opens);
        if (c->set.n == 0) continue;
        to = qwen3i_dfa_state(c, dfa);
        for (; first < b; first++) row[first] = to;
    }
}

/* Marks of a final state to its label; below 0: it is not final after all. */
typedef int (*qwen3i_label_fn)(qwen3i_compiler *c, const int *marks, int n, void *user);

static void qwen3i_subset_kind(qwen3i_compiler *c, qwen3i_span span, qwen3i_state *s, qwen3i_label_fn label,
                               void *user) {
    int i;
    c->seeds.n = 0;
    for (i = 0; i < span.n; i++) {
        const qwen3i_nfa *a = &QWEN3I_ARRAY(qwen3i_nfa,
                                            c->nfa)[QWEN3I_ARRAY(int, c->subsets.data)[span.first + i]];
        if (a->kind == QWEN3I_NFA_ANYTHING) s->anything = 1;
        if (a->kind == QWEN3I_NFA_FINAL) { s->final = 1; qwen3i_push_int(c, &c->seeds, a->out); }
        else if (a->place == QWEN3I_NFA_BOUNDARY) s->boundary = 1;
    }
    if (!s->final || !label) return;
    s->label = label(c, QWEN3I_ARRAY(int, c->seeds), QWEN3I_LEN(int, c->seeds), user);
    if (s->label < 0) s->final = 0;
}

/* The deterministic automaton of a nondeterministic one. Call qwen3i_dfa_end on it. */
static int qwen3i_determinise(qwen3i_compiler *c, int start, qwen3i_label_fn label, void *user) {
    int i, row[256], dfa = qwen3i_dfa_begin(c);
    size_t bytes = c->nfa.n / sizeof(qwen3i_nfa) * sizeof(uint32_t);
    c->marks.n = 0;
    if (!qwen3i_buf_reserve(&c->marks, bytes))
        return qwen3i_out_of_memory(c);
    c->marks.n = bytes;
    memset(c->marks.p, 0, bytes);
    c->stamp = 0;
    c->seeds.n = 0;
    qwen3i_push_int(c, &c->seeds, start);
    qwen3i_closure(c, 1);
    qwen3i_dfa_state(c, dfa);
    for (i = 0; c->result == QWEN3_OK && i < QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas)[dfa].n_states; i++) {
        const int at = QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas)[dfa].first + i;
        qwen3i_state s = qwen3i_state_make();
        qwen3i_subset_row(c, dfa, QWEN3I_ARRAY(qwen3i_span, c->subsets.spans)[i], row);
        if (c->result != QWEN3_OK) return 0;
        qwen3i_subset_kind(c, QWEN3I_ARRAY(qwen3i_span, c->subsets.spans)[i], &s, label, user);
        qwen3i_dfa_edges(c, at, s, row);
    }
    return dfa;
}

/* The state after a byte, -1: none. */
QWEN3I_INLINE int qwen3i_dfa_step(const qwen3_grammar *g, const qwen3i_dfa *d, int state,
                                  unsigned char byte) {
    const qwen3i_state *s = &QWEN3I_ARRAY(qwen3i_state, g->states)[d->first + state];
    const qwen3i_edge *e = QWEN3I_ARRAY(qwen3i_edge, g->edges) + s->edges, *end = e + s->n_edges;
    if (s->row >= 0) return QWEN3I_ARRAY(uint16_t, g->rows)[(size_t)s->row * 256 + byte] - 1;
    for (; e < end; e++) if (byte >= e->low && byte <= e->high) return e->to;
    return -1;
}

enum { QWEN3I_AND, QWEN3I_AND_NOT, QWEN3I_OR };

static int qwen3i_pair_state(qwen3i_compiler *c, int dfa, int a, int b) {
    c->set.n = 0;
    qwen3i_push_int(c, &c->set, a);
    qwen3i_push_int(c, &c->set, b);
    return qwen3i_dfa_state(c, dfa);
}

static const qwen3i_state *qwen3i_state_at(const qwen3_grammar *g, int dfa, int state) {
    return &QWEN3I_ARRAY(qwen3i_state, g->states)[QWEN3I_ARRAY(qwen3i_dfa, g->dfas)[dfa].first + state];
}

/* Two automata as one: words of a and b, of a but not b, of a or b. 0 if there are none. Labels are a's. */
static int qwen3i_product(qwen3i_compiler *c, int a, int b, int mode) {
    int i, k, row[256], dfa = qwen3i_dfa_begin(c);
    qwen3i_pair_state(c, dfa, 0, 0);
    for (i = 0; c->result == QWEN3_OK && i < QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas)[dfa].n_states; i++) {
        const qwen3i_dfa *dfas = QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas);
        const int *pair = QWEN3I_ARRAY(int, c->subsets.data) + 2 * i, p = pair[0], q = pair[1];
        const qwen3i_state *sp = p >= 0 ? qwen3i_state_at(c->g, a, p) : NULL,
                            *sq = q >= 0 ? qwen3i_state_at(c->g, b, q) : NULL;
        const int fp = sp && sp->final, fq = sq && sq->final, at = dfas[dfa].first + i;
        qwen3i_state s = qwen3i_state_make();
        s.final = (unsigned char)(mode == QWEN3I_AND ? fp && fq : mode == QWEN3I_OR ? fp || fq : fp && !fq);
        s.boundary = sp ? sp->boundary : sq ? sq->boundary : 0;
        s.label = sp ? sp->label : 0;
        s.anything = sp && sq && sp->anything && sq->anything;
        for (k = 0; k < 256; k++) {
            int x = p >= 0 ? qwen3i_dfa_step(c->g, &dfas[a], p, (unsigned char)k) : -1;
            int y = q >= 0 ? qwen3i_dfa_step(c->g, &dfas[b], q, (unsigned char)k) : -1, alive;
            alive = mode == QWEN3I_AND ? x >= 0 && y >= 0 : mode == QWEN3I_OR ? x >= 0 || y >= 0 : x >= 0;
            row[k] = !alive ? 0 : qwen3i_pair_state(c, dfa, x, y);
            dfas = QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas);
        }
        qwen3i_spend(c, 256);
        qwen3i_dfa_edges(c, at, s, row);
    }
    return qwen3i_dfa_end(c, dfa, 0) ? dfa : 0;
}

/* ---- regular expressions: the part of ECMAScript's that schemas use -------------------------- */
#define QWEN3I_MAX_NESTING 128
#define QWEN3I_NO_LIMIT    (-1)

enum { QWEN3I_AST_EMPTY, QWEN3I_AST_CLASS, QWEN3I_AST_CAT, QWEN3I_AST_ALT, QWEN3I_AST_REPEAT, QWEN3I_AST_START, QWEN3I_AST_END,
       QWEN3I_AST_RULE };
typedef struct qwen3i_ast {
    /* CAT, ALT, REPEAT: the first child; the next child of the parent; 0: none */
    int kind, child, next;
    int min, max;                       /* REPEAT; max QWEN3I_NO_LIMIT. RULE: min is its number */
    qwen3i_span set;                    /* CLASS: ranges of characters */
} qwen3i_ast;

/* What reads expressions, and GBNF, whose rules are such. */
typedef struct qwen3i_regex { qwen3i_compiler *c; const char *p, *end, *start; int depth, bnf; } qwen3i_regex;

static int qwen3i_ast_add(qwen3i_compiler *c, int kind, int child) {
    qwen3i_ast a;
    memset(&a, 0, sizeof a);
    a.kind = kind;
    a.child = child;
    return qwen3i_spend(c, 1) ? qwen3i_push(c, &c->ast, &a, sizeof a) : 0;
}

static qwen3i_ast *qwen3i_ast_at(qwen3i_compiler *c, int i) { return &QWEN3I_ARRAY(qwen3i_ast, c->ast)[i]; }

static int qwen3i_regex_bad(qwen3i_regex *r, qwen3_result code, const char *what) {
    const char *p;
    int line = 1;
    if (r->c->result == QWEN3_OK) r->c->refused = code == QWEN3_ERR_UNSUPPORTED;
    for (p = r->start; r->bnf && p < r->p; p++) line += *p == '\n';
    if (r->bnf) return qwen3i_reject(r->c, code, "line %d: %s", line, what);
    return qwen3i_reject(r->c, code, "%s: %s at byte %d of the expression", r->c->where ? r->c->where :
                         "regular expression", what, (int)(r->p - r->start));
}

static void qwen3i_set_add(qwen3i_compiler *c, uint32_t low, uint32_t high) {
    qwen3i_chars r;
    r.low = low;
    r.high = high;
    qwen3i_push(c, &c->ranges, &r, sizeof r);
}

static int qwen3i_compare_chars(const void *a, const void *b) {
    const uint32_t x = ((const qwen3i_chars *)a)->low, y = ((const qwen3i_chars *)b)->low;
    return (x > y) - (x < y);
}

/* The ranges added since first: in order, joined, and what they leave out if negated. */
static qwen3i_span qwen3i_set_end(qwen3i_compiler *c, int first, int negated) {
    qwen3i_span set;
    qwen3i_chars *r = QWEN3I_ARRAY(qwen3i_chars, c->ranges) + first;
    int i, n = QWEN3I_LEN(qwen3i_chars, c->ranges) - first, kept = 0;
    uint32_t next = 0;
    set.first = first;
    set.n = 0;
    if (c->result != QWEN3_OK) return set;
    qwen3i_sort(r, (size_t)n, sizeof *r, qwen3i_compare_chars);
    for (i = 0; i < n; i++) {
        if (kept > 0 && r[i].low <= r[kept - 1].high + 1) {
            if (r[i].high > r[kept - 1].high) r[kept - 1].high = r[i].high;
        }
        else r[kept++] = r[i];
    }
    c->ranges.n = (size_t)(first + kept) * sizeof *r;
    set.n = kept;
    if (!negated) return set;
    for (i = 0; i < kept; i++) {
        const qwen3i_chars hole = QWEN3I_ARRAY(qwen3i_chars, c->ranges)[first + i];
        if (hole.low > next) qwen3i_set_add(c, next, hole.low - 1);
        next = hole.high + 1;
    }
    if (next <= 0x10FFFF) qwen3i_set_add(c, next, 0x10FFFF);
    set.first = first + kept;
    set.n = QWEN3I_LEN(qwen3i_chars, c->ranges) - set.first;
    return set;
}

/* \d \w \s and their complements; 0: not one of them. */
static int qwen3i_set_named(qwen3i_compiler *c, char name) {
    static const uint32_t digit[] = {'0', '9'}, word[] = {'0', '9', 'A', 'Z', '_', '_', 'a', 'z'},
        space[] = {9, 13, 32, 32, 0xA0, 0xA0, 0x1680, 0x1680, 0x2000, 0x200A, 0x2028, 0x2029, 0x202F, 0x202F,
                   0x205F, 0x205F, 0x3000, 0x3000, 0xFEFF, 0xFEFF};
    const char lower = (char)(name | 0x20);
    const uint32_t *list = lower == 'd' ? digit : lower == 'w' ? word : lower == 's' ? space : NULL;
    int i, n = lower == 'd' ? 2 : lower == 'w' ? 8 : 20;
    uint32_t next = 0;
    if (!list) return 0;
    for (i = 0; i < n; i += 2) {
        if (name == lower) qwen3i_set_add(c, list[i], list[i + 1]);
        else if (list[i] > next) qwen3i_set_add(c, next, list[i] - 1);
        next = list[i + 1] + 1;
    }
    if (name != lower) qwen3i_set_add(c, next, 0x10FFFF);
    return 1;
}

static int qwen3i_regex_hex(qwen3i_regex *r, int digits, uint32_t *out) {
    *out = 0;
    for (; digits > 0; digits--, r->p++) {
        int h = r->p < r->end ? qwen3i_hex(*r->p) : -1;
        if (h < 0) return qwen3i_regex_bad(r, QWEN3_ERR_FORMAT, "hexadecimal digits are missing");
        *out = *out * 16 + (uint32_t)h;
    }
    return 1;
}

/* The character after a backslash, which is at p. */
static uint32_t qwen3i_regex_escape(qwen3i_regex *r, int in_class) {
    static const char from[] = "tnrfv0", to[] = "\t\n\r\f\v";
    const char *hit;
    uint32_t c = 0, low;
    if (r->p >= r->end) { qwen3i_regex_bad(r, QWEN3_ERR_FORMAT, "it ends with a backslash"); return 0; }
    if (*r->p == 'x') { r->p++; qwen3i_regex_hex(r, 2, &c); return c; }
    if (*r->p == 'u' && r->end - r->p > 1 && r->p[1] == '{') {
        for (r->p += 2; r->p < r->end && qwen3i_hex(*r->p) >= 0 && c <= 0x10FFFF; r->p++)
            c = c * 16 + (uint32_t)qwen3i_hex(*r->p);
        if (r->p >= r->end || *r->p++ != '}' || c > 0x10FFFF) qwen3i_regex_bad(r, QWEN3_ERR_FORMAT,
                "bad \\u{} escape");
        return c;
    }
    if (*r->p == 'u') {
        r->p++;
        if (!qwen3i_regex_hex(r, 4, &c)) return 0;
        if (c < 0xD800 || c > 0xDBFF || r->end - r->p < 6 || r->p[0] != '\\' || r->p[1] != 'u') return c;
        r->p += 2;
        return qwen3i_regex_hex(r, 4, &low) ? 0x10000u + ((c - 0xD800u) << 10) + (low - 0xDC00u) : 0;
    }
    if (*r->p == 'c' && r->end - r->p > 1) { r->p += 2; return (uint32_t)r->p[-1] & 31; }
    if (in_class && *r->p == 'b') { r->p++; return 8; }
    hit = strchr(from, *r->p);
    if (hit && *r->p) { r->p++; return (uint32_t)to[hit - from]; }
    if ((*r->p >= '1' && *r->p <= '9') || *r->p == 'k')
        qwen3i_regex_bad(r, QWEN3_ERR_UNSUPPORTED, "back references are not supported");
    if (*r->p == 'p' || *r->p == 'P') qwen3i_regex_bad(r, QWEN3_ERR_UNSUPPORTED, "\\p is not supported");
    if (*r->p == 'b' || *r->p == 'B') qwen3i_regex_bad(r, QWEN3_ERR_UNSUPPORTED, "\\b is not supported");
    r->p += qwen3i_utf8_get(r->p, r->end, &c);
    return c;
}

/* One character of a [class], or all of a \d: then *is_set. */
static uint32_t qwen3i_regex_member(qwen3i_regex *r, int *is_set) {
    uint32_t c;
    *is_set = 0;
    if (*r->p != '\\') { r->p += qwen3i_utf8_get(r->p, r->end, &c); return c; }
    r->p++;
    if (r->p < r->end && qwen3i_set_named(r->c, *r->p)) { r->p++; *is_set = 1; return 0; }
    return qwen3i_regex_escape(r, 1);
}

/* [...], after its bracket. */
static qwen3i_span qwen3i_regex_set(qwen3i_regex *r) {
    int first = QWEN3I_LEN(qwen3i_chars, r->c->ranges), negated = r->p < r->end && *r->p == '^', is_set,
        other_set;
    r->p += negated;
    while (r->p < r->end && *r->p != ']' && r->c->result == QWEN3_OK) {
        uint32_t low = qwen3i_regex_member(r, &is_set), high = low;
        if (r->end - r->p > 1 && *r->p == '-' && r->p[1] != ']' && !is_set) {
            r->p++;
            high = qwen3i_regex_member(r, &other_set);
            if (other_set) { qwen3i_set_add(r->c, '-', '-'); high = low; }
            if (high < low) qwen3i_regex_bad(r, QWEN3_ERR_FORMAT, "a range is out of order");
        }
        if (!is_set) qwen3i_set_add(r->c, low, high);
    }
    if (r->p >= r->end) qwen3i_regex_bad(r, QWEN3_ERR_FORMAT, "a [ is not closed");
    else r->p++;
    return qwen3i_set_end(r->c, first, negated);
}

static int qwen3i_ast_class(qwen3i_compiler *c, qwen3i_span set) {
    int a = qwen3i_ast_add(c, QWEN3I_AST_CLASS, 0);
    if (c->result == QWEN3_OK) qwen3i_ast_at(c, a)->set = set;
    return a;
}

static int qwen3i_ast_char(qwen3i_compiler *c, uint32_t code) {
    int first = QWEN3I_LEN(qwen3i_chars, c->ranges);
    qwen3i_set_add(c, code, code);
    return qwen3i_ast_class(c, qwen3i_set_end(c, first, 0));
}

static int qwen3i_regex_alternatives(qwen3i_regex *r, int nested);

/* (...), after its parenthesis. */
static int qwen3i_regex_group(qwen3i_regex *r) {
    int a;
    if (!r->bnf && r->end - r->p > 1 && *r->p == '?') {
        r->p++;
        if (*r->p == ':') r->p++;
        else if (*r->p == '<' && r->end - r->p > 1 && r->p[1] != '=' &&
                 r->p[1] != '!') { while (r->p < r->end && *r->p++ != '>') {} }
        else return qwen3i_regex_bad(r, QWEN3_ERR_UNSUPPORTED, "lookahead and lookbehind are not supported");
    }
    a = qwen3i_regex_alternatives(r, 1);
    if (r->p >= r->end || *r->p != ')') return qwen3i_regex_bad(r, QWEN3_ERR_FORMAT, "a ( is not closed");
    r->p++;
    return a;
}

static int qwen3i_regex_atom(qwen3i_regex *r) {
    qwen3i_compiler *c = r->c;
    int first = QWEN3I_LEN(qwen3i_chars, c->ranges);
    uint32_t code;
    switch (*r->p) {
        case '(': r->p++; return qwen3i_regex_group(r);
        case '[': r->p++; return qwen3i_ast_class(c, qwen3i_regex_set(r));
        case '^': r->p++; return qwen3i_ast_add(c, QWEN3I_AST_START, 0);
        case '$': r->p++; return qwen3i_ast_add(c, QWEN3I_AST_END, 0);
        case '*': case '+': case '?': return qwen3i_regex_bad(r, QWEN3_ERR_FORMAT,
                                                              "there is nothing to repeat");
        case '.':
            r->p++;
            qwen3i_set_add(c, '\n', '\n'); qwen3i_set_add(c, '\r', '\r'); qwen3i_set_add(c, 0x2028, 0x2029);
            return qwen3i_ast_class(c, qwen3i_set_end(c, first, 1));
        case '\\':
            r->p++;
            if (r->p < r->end && qwen3i_set_named(c, *r->p)) {
                r->p++;
                return qwen3i_ast_class(c, qwen3i_set_end(c, first, 0));
            }
            return qwen3i_ast_char(c, qwen3i_regex_escape(r, 0));
        default: r->p += qwen3i_utf8_get(r->p, r->end, &code); return qwen3i_ast_char(c, code);
    }
}

static int qwen3i_regex_count(qwen3i_regex *r, const char **p) {
    int n = 0;
    const char *from = *p;
    for (; *p < r->end && **p >= '0' && **p <= '9'; ++*p) if (n < 100000000) n = n * 10 + (**p - '0');
    return *p > from ? n : -1;
}

/* * + ? {m} {m,} {m,n} at p: 0 if there is none. */
static int qwen3i_regex_quantifier(qwen3i_regex *r, int *min, int *max) {
    const char *p = r->p;
    if (p >= r->end || (*p != '*' && *p != '+' && *p != '?' && *p != '{')) return 0;
    *min = *p == '+';
    *max = *p == '?' ? 1 : QWEN3I_NO_LIMIT;
    if (*p++ == '{') {
        *min = *max = qwen3i_regex_count(r, &p);
        if (*min < 0) return 0;         /* a brace by itself */
        if (p < r->end && *p == ',') { p++; *max = qwen3i_regex_count(r, &p); }
        if (p >= r->end || *p++ != '}') return 0;
        if (*max >= 0 && *max < *min)
            return qwen3i_regex_bad(r, QWEN3_ERR_FORMAT, "a repetition's limits are out of order");
    }
    r->p = p;
    return 1;
}

static int qwen3i_ast_repeat(qwen3i_compiler *c, int child, int min, int max) {
    int a = qwen3i_ast_add(c, QWEN3I_AST_REPEAT, child);
    if (c->result != QWEN3_OK) return 0;
    qwen3i_ast_at(c, a)->min = min;
    qwen3i_ast_at(c, a)->max = max;
    return a;
}

static int qwen3i_bnf_item(qwen3i_regex *r);

/* White space and comments of GBNF; over the ends of lines only where a rule cannot end. */
static void qwen3i_bnf_space(qwen3i_regex *r, int lines) {
    for (; r->bnf && r->p < r->end; r->p++) {
        if (*r->p == '#') while (r->p + 1 < r->end && r->p[1] != '\n') r->p++;
        else if (*r->p != ' ' && *r->p != '\t' && !(lines && (*r->p == '\n' || *r->p == '\r'))) return;
    }
}

static int qwen3i_regex_ends(const qwen3i_regex *r) {
    return r->p >= r->end || r->c->result != QWEN3_OK || *r->p == '|' || *r->p == ')' ||
           (r->bnf && (*r->p == '\n' || *r->p == '\r'));
}

static int qwen3i_regex_sequence(qwen3i_regex *r, int nested) {
    int first = 0, last = 0, a, min, max;
    for (qwen3i_bnf_space(r, nested); !qwen3i_regex_ends(r); last = a) {
        a = r->bnf ? qwen3i_bnf_item(r) : qwen3i_regex_atom(r);
        while (r->c->result == QWEN3_OK && qwen3i_regex_quantifier(r, &min, &max)) {
            a = qwen3i_ast_repeat(r->c, a, min, max);
            /* lazy, possessive: the same words */
            if (!r->bnf && r->p < r->end && (*r->p == '?' || *r->p == '+')) r->p++;
        }
        if (r->c->result != QWEN3_OK) return 0;
        if (last) qwen3i_ast_at(r->c, last)->next = a; else first = a;
        qwen3i_bnf_space(r, nested);
    }
    if (first && first == last) return first;
    return qwen3i_ast_add(r->c, first ? QWEN3I_AST_CAT : QWEN3I_AST_EMPTY, first);
}

static int qwen3i_regex_alternatives(qwen3i_regex *r, int nested) {
    int first, last, a;
    if (++r->depth > QWEN3I_MAX_NESTING)
        return qwen3i_regex_bad(r, QWEN3_ERR_UNSUPPORTED, "nested too deeply");
    first = last = qwen3i_regex_sequence(r, nested);
    for (; r->p < r->end && *r->p == '|' && r->c->result == QWEN3_OK; last = a) {
        r->p++;
        qwen3i_bnf_space(r, 1);
        a = qwen3i_regex_sequence(r, nested);
        if (r->c->result == QWEN3_OK) qwen3i_ast_at(r->c, last)->next = a;
    }
    r->depth--;
    return first != last ? qwen3i_ast_add(r->c, QWEN3I_AST_ALT, first) : first;
}

static qwen3i_regex qwen3i_regex_begin(qwen3i_compiler *c, const char *text, size_t n, int bnf) {
    qwen3i_regex r;
    r.c = c;
    r.p = r.start = text;
    r.end = text + n;
    r.depth = 0;
    r.bnf = bnf;
    return r;
}

static int qwen3i_regex_parse(qwen3i_compiler *c, const char *text, size_t n) {
    qwen3i_regex r = qwen3i_regex_begin(c, text, n, 0);
    const int a = qwen3i_regex_alternatives(&r, 1);
    if (c->result == QWEN3_OK && r.p < r.end) qwen3i_regex_bad(&r, QWEN3_ERR_FORMAT, "a ) is too many");
    return a;
}

/* Does every way through begin with ^? */
static int qwen3i_ast_anchored(qwen3i_compiler *c, int i, int depth) {
    const qwen3i_ast *a = qwen3i_ast_at(c, i);
    int k;
    if (a->kind == QWEN3I_AST_START) return 1;
    if (a->kind == QWEN3I_AST_CAT)
        return depth < QWEN3I_MAX_NESTING && qwen3i_ast_anchored(c, a->child, depth + 1);
    if (a->kind != QWEN3I_AST_ALT) return 0;
    for (k = a->child; k; k = qwen3i_ast_at(c, k)->next) if (!qwen3i_ast_anchored(c, k, depth + 1)) return 0;
    return 1;
}

static int qwen3i_ast_nfa(qwen3i_compiler *c, int i, int out);

static int qwen3i_ast_cat(qwen3i_compiler *c, int child, int out) {
    int first = QWEN3I_LEN(int, c->stack), k;
    for (k = child; k; k = qwen3i_ast_at(c, k)->next) qwen3i_push_int(c, &c->stack, k);
    while (c->result == QWEN3_OK && QWEN3I_LEN(int, c->stack) > first) {
        c->stack.n -= sizeof(int);
        out = qwen3i_ast_nfa(c, QWEN3I_ARRAY(int, c->stack)[c->stack.n / sizeof(int)], out);
    }
    return out;
}

static int qwen3i_ast_nfa_repeat(qwen3i_compiler *c, const qwen3i_ast a, int out) {
    int k, s = out;
    if (a.max == QWEN3I_NO_LIMIT) {
        s = qwen3i_nfa_add(c, QWEN3I_NFA_SPLIT, 0, out);
        k = qwen3i_ast_nfa(c, a.child, s);
        if (c->result != QWEN3_OK) return 0;
        QWEN3I_ARRAY(qwen3i_nfa, c->nfa)[s].out = k;
    } else for (k = a.min; k < a.max && qwen3i_spend(c, 1); k++)
        s = qwen3i_nfa_split(c, qwen3i_ast_nfa(c, a.child, s), out);
    for (k = 0; k < a.min && qwen3i_spend(c, 1); k++) s = qwen3i_ast_nfa(c, a.child, s);
    return s;
}

static int qwen3i_ast_nfa_rule(qwen3i_compiler *c, int rule, int out);     /* of GBNF */

/* The nondeterministic automaton of an expression, followed by out. */
static int qwen3i_ast_nfa(qwen3i_compiler *c, int i, int out) {
    const qwen3i_ast a = *qwen3i_ast_at(c, i);
    int k, s = 0;
    if (c->result != QWEN3_OK) return 0;
    switch (a.kind) {
        case QWEN3I_AST_CLASS:  return qwen3i_nfa_class(c, a.set, out);
        case QWEN3I_AST_CAT:    return qwen3i_ast_cat(c, a.child, out);
        case QWEN3I_AST_REPEAT: return qwen3i_ast_nfa_repeat(c, a, out);
        case QWEN3I_AST_START:  return qwen3i_nfa_add(c, QWEN3I_NFA_START_ONLY, out, 0);
        case QWEN3I_AST_END:    return qwen3i_nfa_add(c, QWEN3I_NFA_END_ONLY, out, 0);
        case QWEN3I_AST_ALT:
            for (k = a.child; k; k = qwen3i_ast_at(c, k)->next)
                s = qwen3i_nfa_split(c, s, qwen3i_ast_nfa(c, k, out));
            return s;
        case QWEN3I_AST_RULE:   return qwen3i_ast_nfa_rule(c, a.min, out);
        default: return out;
    }
}

/* ---- strings as JSON has them: from quote to quote ------------------------------------------- */
static int qwen3i_dfa_make(qwen3i_compiler *c, int start);

static int qwen3i_nfa_open(qwen3i_compiler *c, int out) {
    return qwen3i_nfa_byte(c, '"', QWEN3I_NFA_OPENS, out);
}

static int qwen3i_nfa_close(qwen3i_compiler *c, int mark) {
    return qwen3i_nfa_byte(c, '"', QWEN3I_NFA_BOUNDARY, qwen3i_nfa_add(c, QWEN3I_NFA_FINAL, mark, 0));
}

static qwen3i_span qwen3i_set_of(qwen3i_compiler *c, uint32_t low, uint32_t high) {
    int first = QWEN3I_LEN(qwen3i_chars, c->ranges);
    qwen3i_set_add(c, low, high);
    return qwen3i_set_end(c, first, 0);
}

/* Any characters, then out. */
static int qwen3i_nfa_any(qwen3i_compiler *c, int out) {
    const int mark = qwen3i_nfa_add(c, QWEN3I_NFA_ANYTHING, 0, 0),
              rest = qwen3i_nfa_add(c, QWEN3I_NFA_SPLIT, mark, out);
    int loop = qwen3i_nfa_add(c, QWEN3I_NFA_SPLIT, 0, rest),
        s = qwen3i_nfa_class(c, qwen3i_set_of(c, 0, 0x10FFFF), loop);
    if (c->result != QWEN3_OK) return 0;
    QWEN3I_ARRAY(qwen3i_nfa, c->nfa)[loop].out = s;
    return loop;
}

/* The characters of a text, then out. */
static int qwen3i_nfa_literal(qwen3i_compiler *c, qwen3i_str s, int out) {
    const char *p = s.p, *end = s.p + s.n;
    int first = QWEN3I_LEN(int, c->stack);
    uint32_t code;
    for (; p < end; p += qwen3i_utf8_get(p, end, &code)) qwen3i_push_int(c, &c->stack, (int)(p - s.p));
    while (c->result == QWEN3_OK && QWEN3I_LEN(int, c->stack) > first) {
        c->stack.n -= sizeof(int);
        p = s.p + QWEN3I_ARRAY(int, c->stack)[c->stack.n / sizeof(int)];
        qwen3i_utf8_get(p, end, &code);
        out = qwen3i_nfa_class(c, qwen3i_set_of(c, code, code), out);
        c->ranges.n -= sizeof(qwen3i_chars);
    }
    return out;
}

/* Strings that contain a match of the expression, closing with this mark. */
static int qwen3i_nfa_pattern(qwen3i_compiler *c, int ast, int mark) {
    int close = qwen3i_nfa_close(c, mark), last, s;
    last = qwen3i_nfa_add(c, QWEN3I_NFA_LAST, qwen3i_nfa_any(c, close), close);
    s = qwen3i_ast_nfa(c, ast, last);
    if (c->result != QWEN3_OK || qwen3i_ast_anchored(c, ast, 0)) return s;
    return qwen3i_nfa_any(c, s);
}

/* The strings of a, which have no needless escapes, with at least so many characters. 0 if there are none. */
static int qwen3i_at_least(qwen3i_compiler *c, int a, int n) {
    qwen3i_span all;
    int s, b;
    qwen3i_nfa_reset(c);
    s = qwen3i_nfa_any(c, qwen3i_nfa_close(c, 0));
    all = qwen3i_set_of(c, 0, 0x10FFFF);
    for (; n > 0 && c->result == QWEN3_OK; n--) s = qwen3i_nfa_class(c, all, s);
    b = qwen3i_dfa_make(c, qwen3i_nfa_open(c, s));
    return b ? qwen3i_product(c, a, b, QWEN3I_AND) : 0;
}

/* Any string, with all of JSON's escapes. */
static int qwen3i_nfa_any_string(qwen3i_compiler *c) {
    static const char escapes[] = "\"\\/bfnrt";
    int close = qwen3i_nfa_close(c, 0), loop = qwen3i_nfa_add(c, QWEN3I_NFA_SPLIT, 0, close), i, s, low,
        e = 0;
    qwen3i_chars all;
    all.low = 0;
    all.high = 0x10FFFF;
    for (i = 0; escapes[i]; i++)
        e = qwen3i_nfa_split(c, e, qwen3i_nfa_byte(c, escapes[i], QWEN3I_NFA_INSIDE, loop));
    low = qwen3i_nfa_text(c, "\\u", 2, qwen3i_nfa_hex(c, 0xDC00, 0xDFFF, 4, 1, loop));
    s = qwen3i_nfa_split(c, qwen3i_nfa_hex(c, 0, 0xD7FF, 4, 1, loop),
                         qwen3i_nfa_hex(c, 0xE000, 0xFFFF, 4, 1, loop));
    s = qwen3i_nfa_split(c, s, qwen3i_nfa_hex(c, 0xD800, 0xDBFF, 4, 1, low));
    e = qwen3i_nfa_byte(c, '\\', QWEN3I_NFA_BOUNDARY,
                        qwen3i_nfa_split(c, e, qwen3i_nfa_byte(c, 'u', QWEN3I_NFA_INSIDE, s)));
    e = qwen3i_nfa_split(c, e, qwen3i_nfa_part(c, all, 0x20, 0x21, loop));
    e = qwen3i_nfa_split(c, e, qwen3i_nfa_part(c, all, 0x23, 0x5B, loop));
    e = qwen3i_nfa_split(c, e, qwen3i_nfa_part(c, all, 0x5D, 0xD7FF, loop));
    e = qwen3i_nfa_split(c, e, qwen3i_nfa_part(c, all, 0xE000, 0x10FFFF, loop));
    if (c->result == QWEN3_OK) QWEN3I_ARRAY(qwen3i_nfa, c->nfa)[loop].out = e;
    return qwen3i_nfa_open(c, loop);
}

/* ---- formats of strings, as expressions ------------------------------------------------------ */
#define QWEN3I_RE_YEAR "(?:[1-9]\\d{3}|0[1-9]\\d\\d|00[1-9]\\d|000[1-9])"
#define QWEN3I_RE_LEAP "(?:\\d\\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
#define QWEN3I_RE_DATE "(?:" QWEN3I_RE_YEAR "-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\\d|3[01])|" \
                       "(?:0[469]|11)-(?:0[1-9]|[12]\\d|30)|02-(?:0[1-9]|1\\d|2[0-8]))|" QWEN3I_RE_LEAP "-02-29)"
#define QWEN3I_RE_TIME "(?:[01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(?:\\.\\d+)?(?:[Zz]|[+-](?:[01]\\d|2[0-3]):[0-5]\\d)"
#define QWEN3I_RE_LABEL "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
#define QWEN3I_RE_HOST QWEN3I_RE_LABEL "(?:\\." QWEN3I_RE_LABEL ")*"
#define QWEN3I_RE_ATOM "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
#define QWEN3I_RE_BYTE "(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)"
#define QWEN3I_RE_IPV4 QWEN3I_RE_BYTE "(?:\\." QWEN3I_RE_BYTE "){3}"
#define QWEN3I_RE_H16  "[0-9A-Fa-f]{1,4}"
#define QWEN3I_RE_LS32 "(?:" QWEN3I_RE_H16 ":" QWEN3I_RE_H16 "|" QWEN3I_RE_IPV4 ")"
#define QWEN3I_RE_IPV6 "(?:" QWEN3I_RE_H16 ":){6}" QWEN3I_RE_LS32 "|::(?:" QWEN3I_RE_H16 ":){5}" QWEN3I_RE_LS32 \
    "|(?:" QWEN3I_RE_H16 ")?::(?:" QWEN3I_RE_H16 ":){4}" QWEN3I_RE_LS32 \
    "|(?:(?:" QWEN3I_RE_H16 ":){0,1}" QWEN3I_RE_H16 ")?::(?:" QWEN3I_RE_H16 ":){3}" QWEN3I_RE_LS32 \
    "|(?:(?:" QWEN3I_RE_H16 ":){0,2}" QWEN3I_RE_H16 ")?::(?:" QWEN3I_RE_H16 ":){2}" QWEN3I_RE_LS32 \
    "|(?:(?:" QWEN3I_RE_H16 ":){0,3}" QWEN3I_RE_H16 ")?::" QWEN3I_RE_H16 ":" QWEN3I_RE_LS32 \
    "|(?:(?:" QWEN3I_RE_H16 ":){0,4}" QWEN3I_RE_H16 ")?::" QWEN3I_RE_LS32 \
    "|(?:(?:" QWEN3I_RE_H16 ":){0,5}" QWEN3I_RE_H16 ")?::" QWEN3I_RE_H16 \
    "|(?:(?:" QWEN3I_RE_H16 ":){0,6}" QWEN3I_RE_H16 ")?::"
#define QWEN3I_RE_PCHAR(more, colon) "(?:[A-Za-z0-9._~!$&'()*+,;=" colon more "-]|%[0-9A-Fa-f]{2})"
#define QWEN3I_RE_AUTHORITY(more) "//(?:" QWEN3I_RE_PCHAR(more, ":") "*@)?" QWEN3I_RE_PCHAR(more, "") "*(?::\\d*)?"
#define QWEN3I_RE_SEGMENTS(more) "(?:/" QWEN3I_RE_PCHAR(more, ":@") "*)*"
#define QWEN3I_RE_TAIL(more) "(?:\\?(?:" QWEN3I_RE_PCHAR(more, ":@/?") ")*)?(?:#(?:" QWEN3I_RE_PCHAR(more, ":@/?") ")*)?"
#define QWEN3I_RE_ROOTED(more) QWEN3I_RE_AUTHORITY(more) QWEN3I_RE_SEGMENTS(more) "|/(?:" QWEN3I_RE_PCHAR(more, ":@") "+" QWEN3I_RE_SEGMENTS(more) ")?"
#define QWEN3I_RE_URI(more) "[A-Za-z][A-Za-z0-9+.-]*:(?:" QWEN3I_RE_ROOTED(more) "|" QWEN3I_RE_PCHAR(more, ":@") "+" QWEN3I_RE_SEGMENTS(more) ")?" \
    QWEN3I_RE_TAIL(more)
#define QWEN3I_RE_RELATIVE(more) "(?:" QWEN3I_RE_ROOTED(more) "|" QWEN3I_RE_PCHAR(more, "@") "+" QWEN3I_RE_SEGMENTS(more) ")?" QWEN3I_RE_TAIL(more)
#define QWEN3I_RE_UCS "\\u00A0-\\uD7FF\\uF900-\\uFDCF\\uFDF0-\\uFFEF"
#define QWEN3I_RE_POINTER "(?:/(?:[^~/]|~[01])*)*"
#define QWEN3I_RE_CLOCK "T(?:\\d+H(?:\\d+M(?:\\d+S)?)?|\\d+M(?:\\d+S)?|\\d+S)"

typedef struct qwen3i_text_format { const char *name, *expression; } qwen3i_text_format;

/* RFC 3339, 5321, 1123, 4122, 3986, 3987, 6901; ISO 8601 as in RFC 3339's appendix. NULL: known, but not
   supported. */
static const qwen3i_text_format *qwen3i_text_format_find(qwen3i_str name) {
    static const qwen3i_text_format formats[] = {
        {"date", QWEN3I_RE_DATE}, {"time", QWEN3I_RE_TIME}, {"date-time", QWEN3I_RE_DATE "[Tt]" QWEN3I_RE_TIME},
        {"email", QWEN3I_RE_ATOM "(?:\\." QWEN3I_RE_ATOM ")*@" QWEN3I_RE_HOST}, {"hostname", QWEN3I_RE_HOST},
        {"uuid", "[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"},
        {"ipv4", QWEN3I_RE_IPV4}, {"ipv6", QWEN3I_RE_IPV6}, {"uri", QWEN3I_RE_URI("")}, {"iri", QWEN3I_RE_URI(QWEN3I_RE_UCS)},
        {"uri-reference", QWEN3I_RE_URI("") "|" QWEN3I_RE_RELATIVE("")}, {"json-pointer", QWEN3I_RE_POINTER},
        {"iri-reference", QWEN3I_RE_URI(QWEN3I_RE_UCS) "|" QWEN3I_RE_RELATIVE(QWEN3I_RE_UCS)},
        {"relative-json-pointer", "(?:0|[1-9]\\d*)(?:#|" QWEN3I_RE_POINTER ")"},
        {"duration", "P(?:\\d+W|(?:\\d+Y(?:\\d+M(?:\\d+D)?)?|\\d+M(?:\\d+D)?|\\d+D)(?:" QWEN3I_RE_CLOCK ")?|" QWEN3I_RE_CLOCK ")"},
        {"regex", NULL}, {"idn-email", NULL}, {"idn-hostname", NULL}, {"uri-template", NULL}};
    int i;
    for (i = 0; i < QWEN3I_COUNT(formats); i++)
        if (strlen(formats[i].name) == name.n && memcmp(formats[i].name, name.p, name.n) == 0)
            return &formats[i];
    return NULL;                        /* a name that the standard does not know says nothing about a text */
}

/* ---- numbers as JSON has them ---------------------------------------------------------------- */
#define QWEN3I_MAX_DIGITS 330

typedef struct qwen3i_bound {           /* a decimal number: whole.fraction, without needless zeros */
    int  negative, n_whole, n_fraction;
    char whole[QWEN3I_MAX_DIGITS], fraction[QWEN3I_MAX_DIGITS];
} qwen3i_bound;

/* Read the text of a JSON number; 0: it has too many digits. */
static int qwen3i_bound_read(qwen3i_str s, qwen3i_bound *b) {
    char digits[QWEN3I_MAX_DIGITS];
    const char *p = s.p, *end = s.p + s.n;
    int n = 0, point = 0, seen_point = 0, exponent = 0, negative, i;
    memset(b, 0, sizeof *b);
    b->negative = *p == '-';
    for (p += b->negative; p < end && *p != 'e' && *p != 'E'; p++) {
        if (*p == '.') { seen_point = 1; continue; }
        if (n == 0 && *p == '0') { point -= seen_point; continue; }
        if (n == QWEN3I_MAX_DIGITS) return 0;
        digits[n++] = *p;
        point += !seen_point;
    }
    if (p < end) {
        negative = *++p == '-';
        for (p += *p == '-' || *p == '+'; p < end; p++)
            if (exponent < 10000) exponent = exponent * 10 + (*p - '0');
        point += negative ? -exponent : exponent;
    }
    while (n > 0 && digits[n - 1] == '0') n--;
    if (n == 0) { b->negative = 0; b->whole[0] = '0'; b->n_whole = 1; return 1; }
    if (point >= QWEN3I_MAX_DIGITS || n - point >= QWEN3I_MAX_DIGITS) return 0;
    for (i = 0; i < point; i++) b->whole[b->n_whole++] = i < n ? digits[i] : '0';
    if (b->n_whole == 0) b->whole[b->n_whole++] = '0';
    for (i = point; i < n; i++) b->fraction[b->n_fraction++] = i < 0 ? '0' : digits[i];
    return 1;
}

static int qwen3i_nfa_digit(qwen3i_compiler *c, int low, int high, int out) {
    return low <= high ? qwen3i_nfa_range(c, low, high, QWEN3I_NFA_INSIDE, out) : 0;
}

/* Any number of digits low..high, then out. */
static int qwen3i_nfa_digits(qwen3i_compiler *c, int low, int high, int out) {
    int loop = qwen3i_nfa_add(c, QWEN3I_NFA_SPLIT, 0, out), s = qwen3i_nfa_digit(c, low, high, loop);
    if (c->result == QWEN3_OK) QWEN3I_ARRAY(qwen3i_nfa, c->nfa)[loop].out = s;
    return loop;
}

static int qwen3i_nfa_point(qwen3i_compiler *c, int out) {
    return qwen3i_nfa_byte(c, '.', QWEN3I_NFA_INSIDE, out);
}

/* Perhaps a fraction, then out. */
static int qwen3i_nfa_fraction(qwen3i_compiler *c, int out) {
    return qwen3i_nfa_split(c, out, qwen3i_nfa_point(c,
                                                     qwen3i_nfa_digit(c, '0', '9',
                                                                      qwen3i_nfa_digits(c, '0', '9', out))));
}

/* A whole number without sign: 0, or no zero first. */
static int qwen3i_nfa_whole(qwen3i_compiler *c, int out) {
    return qwen3i_nfa_split(c, qwen3i_nfa_digit(c, '0', '0', out),
                            qwen3i_nfa_digit(c, '1', '9', qwen3i_nfa_digits(c, '0', '9', out)));
}

/* A fraction that is not zero, after what is known of it. */
static int qwen3i_nfa_more(qwen3i_compiler *c, int out) {
    return qwen3i_nfa_digits(c, '0', '0', qwen3i_nfa_digit(c, '1', '9', qwen3i_nfa_digits(c, '0', '9', out)));
}

/* The fractions (with their point) above that of b, or equal to it if inclusive. */
static int qwen3i_nfa_fraction_above(qwen3i_compiler *c, const qwen3i_bound *b, int inclusive, int out) {
    int i, any = qwen3i_nfa_digits(c, '0', '9', out), s = inclusive ? any : qwen3i_nfa_more(c, out);
    if (b->n_fraction == 0) return inclusive ? qwen3i_nfa_fraction(c, out) : qwen3i_nfa_point(c, s);
    for (i = b->n_fraction - 1; i >= 0; i--)
        s = qwen3i_nfa_split(c, qwen3i_nfa_digit(c, b->fraction[i] + 1, '9', any),
                             qwen3i_nfa_digit(c, b->fraction[i], b->fraction[i], s));
    return qwen3i_nfa_point(c, s);
}

static int qwen3i_nfa_fraction_below(qwen3i_compiler *c, const qwen3i_bound *b, int inclusive, int out) {
    int i, any = qwen3i_nfa_digits(c, '0', '9', out), zeros = qwen3i_nfa_digits(c, '0', '0', out),
        s = inclusive ? zeros : 0;
    if (b->n_fraction == 0)
        return inclusive ? qwen3i_nfa_split(c, out,
                                            qwen3i_nfa_point(c, qwen3i_nfa_digit(c, '0', '0', zeros))) : 0;
    for (i = b->n_fraction - 1; i >= 0; i--) {
        s = qwen3i_nfa_split(c, qwen3i_nfa_digit(c, '0', b->fraction[i] - 1, any),
                             qwen3i_nfa_digit(c, b->fraction[i], b->fraction[i], s));
        if (i > 0) s = qwen3i_nfa_split(c, s, out);
    }
    return qwen3i_nfa_split(c, out, qwen3i_nfa_point(c, s));
}

/* Numbers without sign at least b (above = 1) or at most b. */
static int qwen3i_nfa_beyond(qwen3i_compiler *c, const qwen3i_bound *b, int above, int inclusive, int out) {
    /* rest: n - 1 - i digits and a fraction */
    int fraction = qwen3i_nfa_fraction(c, out), rest = fraction, shorter = 0, i;
    int s = above ? qwen3i_nfa_fraction_above(c, b, inclusive, out) :
            qwen3i_nfa_fraction_below(c, b, inclusive, out);
    for (i = b->n_whole - 1; i >= 0; i--) {
        const int d = b->whole[i], least = i == 0 && b->n_whole > 1 ? '1' : '0';
        int other = above ? qwen3i_nfa_digit(c, d + 1, '9', rest) : qwen3i_nfa_digit(c, least, d - 1, rest);
        s = qwen3i_nfa_split(c, other, qwen3i_nfa_digit(c, d, d, s));
        if (!above && i > 0)
            shorter = qwen3i_nfa_split(c, shorter,
                                       qwen3i_nfa_digit(c, rest == fraction ? '0' : '1', '9', rest));
        rest = qwen3i_nfa_digit(c, '0', '9', rest);
    }
    if (!above) return qwen3i_nfa_split(c, s, shorter);
    for (i = 0, rest = qwen3i_nfa_digits(c, '0', '9', fraction); i < b->n_whole; i++)
        rest = qwen3i_nfa_digit(c, '0', '9', rest);
    return qwen3i_nfa_split(c, s, qwen3i_nfa_digit(c, '1', '9', rest));
}

static int qwen3i_nfa_minus(qwen3i_compiler *c, int out) {
    return qwen3i_nfa_byte(c, '-', QWEN3I_NFA_INSIDE, out);
}

/* Numbers, without exponent, on one side of b. */
static int qwen3i_nfa_limit(qwen3i_compiler *c, const qwen3i_bound *b, int above, int inclusive, int out) {
    int same = qwen3i_nfa_beyond(c, b, above != b->negative, inclusive, out), all;
    if (b->negative) same = qwen3i_nfa_minus(c, same);
    if (above != b->negative) return same;
    all = qwen3i_nfa_whole(c, qwen3i_nfa_fraction(c, out));
    if (b->n_whole == 1 && b->whole[0] == '0' && b->n_fraction == 0 && !inclusive)      /* -0 is not below 0 */
        all = qwen3i_nfa_beyond(c, b, 1, 0, out);
    return qwen3i_nfa_split(c, same, b->negative ? all : qwen3i_nfa_minus(c, all));
}

/* All numbers: whole ones; or with a fraction of at most `places` digits (0: any number, and an exponent). */
static int qwen3i_nfa_number(qwen3i_compiler *c, int whole, int places, int out) {
    int i, s = out, e;
    if (!whole && places == 0) {
        e = qwen3i_nfa_digit(c, '0', '9', qwen3i_nfa_split(c, out, qwen3i_nfa_digit(c, '0', '9', out)));
        e = qwen3i_nfa_split(c, e, qwen3i_nfa_digit(c, '1', '2',
                                                    qwen3i_nfa_digit(c, '0', '9',
                                                                     qwen3i_nfa_digit(c, '0', '9', out))));
        e = qwen3i_nfa_split(c, e, qwen3i_nfa_split(c, qwen3i_nfa_byte(c, '+', QWEN3I_NFA_INSIDE, e),
                                                    qwen3i_nfa_minus(c, e)));
        e = qwen3i_nfa_split(c, qwen3i_nfa_byte(c, 'e', QWEN3I_NFA_INSIDE, e),
                             qwen3i_nfa_byte(c, 'E', QWEN3I_NFA_INSIDE, e));
        s = qwen3i_nfa_fraction(c, qwen3i_nfa_split(c, out, e));
    } else if (!whole) {
        for (i = 0; i < places; i++) s = qwen3i_nfa_split(c, out, qwen3i_nfa_digit(c, '0', '9', s));
        s = qwen3i_nfa_split(c, out, qwen3i_nfa_point(c, qwen3i_nfa_digit(c, '0', '9', s)));
    }
    s = qwen3i_nfa_whole(c, s);
    return qwen3i_nfa_split(c, s, qwen3i_nfa_minus(c, s));
}

/* Whole numbers that m divides. */
static int qwen3i_nfa_multiple(qwen3i_compiler *c, int m, int out) {
    int first = 0, r, d, s = 0, k;
    for (r = 0; r < m && c->result == QWEN3_OK; r++) {      /* after digits that leave r: */
        for (d = 0; d < 10; d++)
            k = qwen3i_nfa_add(c, QWEN3I_NFA_SPLIT, 0, 0), first = r == 0 && d == 0 ? k : first;
    }
    for (r = 0; r < m && c->result == QWEN3_OK; r++)
        for (d = 0; d < 10; d++) {
            int to = first + (r * 10 + d) % m * 10, digit = qwen3i_nfa_digit(c, '0' + d, '0' + d, to);
            qwen3i_nfa *a = &QWEN3I_ARRAY(qwen3i_nfa, c->nfa)[first + r * 10 + d];
            if (c->result != QWEN3_OK) return 0;
            a->out = digit;
            a->out1 = d < 9 ? first + r * 10 + d + 1 : r == 0 ? out : 0;
        }
    for (d = 1; d < 10; d++)
        s = qwen3i_nfa_split(c, s, qwen3i_nfa_digit(c, '0' + d, '0' + d, first + d % m * 10));
    s = qwen3i_nfa_split(c, s, qwen3i_nfa_digit(c, '0', '0', out));
    return qwen3i_nfa_split(c, s, qwen3i_nfa_minus(c, s));
}

/* All ways to write a number without exponent. */
static int qwen3i_nfa_equal(qwen3i_compiler *c, const qwen3i_bound *b, int out) {
    int zeros = qwen3i_nfa_digits(c, '0', '0', out), s;
    if (b->n_fraction) s = qwen3i_nfa_point(c, qwen3i_nfa_text(c, b->fraction, (size_t)b->n_fraction, zeros));
    else s = qwen3i_nfa_split(c, out, qwen3i_nfa_point(c, qwen3i_nfa_digit(c, '0', '0', zeros)));
    s = qwen3i_nfa_text(c, b->whole, (size_t)b->n_whole, s);
    if (b->negative) return qwen3i_nfa_minus(c, s);
    return b->n_whole == 1 && b->whole[0] == '0' &&
           !b->n_fraction ? qwen3i_nfa_split(c, s, qwen3i_nfa_minus(c, s)) : s;
}

/* ---- JSON Schema: the document --------------------------------------------------------------- */
typedef struct qwen3i_dom {             /* a value of the schema's text; 0 is none */
    int  parent, first, last, next;     /* of an object or array: its members */
    int  key, n_key, text, n_text;      /* in c->text: the key; a string, or a number as it is written */
    char type;                          /* { [ " 0 t f n */
    char is_root;                       /* references within it start here */
} qwen3i_dom;

#define QWEN3I_SCHEMA_DEPTH 256

static qwen3i_dom *qwen3i_dom_at(const qwen3i_compiler *c, int i) {
    return &QWEN3I_ARRAY(qwen3i_dom, c->dom)[i];
}

/* Each member k of an object or array of the document, until something fails. */
#define QWEN3I_EACH(k, node) \
    for (k = qwen3i_dom_at(c, node)->first; k && c->result == QWEN3_OK; k = qwen3i_dom_at(c, k)->next)

static qwen3i_str qwen3i_slice(const qwen3i_compiler *c, int at, int n) {
    qwen3i_str s;
    s.p = c->text.p ? c->text.p + at : "";
    s.n = (size_t)n;
    return s;
}
static qwen3i_str qwen3i_dom_key(const qwen3i_compiler *c, int i) {
    return qwen3i_slice(c, qwen3i_dom_at(c, i)->key, qwen3i_dom_at(c, i)->n_key);
}
static qwen3i_str qwen3i_dom_text(const qwen3i_compiler *c, int i) {
    return qwen3i_slice(c, qwen3i_dom_at(c, i)->text, qwen3i_dom_at(c, i)->n_text);
}

static int qwen3i_same(qwen3i_str a, qwen3i_str b) { return a.n == b.n && memcmp(a.p, b.p, a.n) == 0; }
static int qwen3i_is(qwen3i_str a, const char *text) {
    return a.n == strlen(text) && memcmp(a.p, text, a.n) == 0;
}

/* Keep text; escaped: of a JSON string. Returns where, *n: its length. */
static int qwen3i_keep(qwen3i_compiler *c, qwen3i_str s, int escaped, int *n) {
    int at = (int)c->text.n;
    *n = 0;
    if (c->result != QWEN3_OK) return 0;
    if (!qwen3i_buf_reserve(&c->text, s.n + 1))
        return qwen3i_out_of_memory(c);
    if (escaped) *n = (int)qwen3i_json_unescape(s, c->text.p + at);
    else { memcpy(c->text.p + at, s.p, s.n); *n = (int)s.n; }
    c->text.n += (size_t)*n;
    return at;
}

static int qwen3i_dom_add(qwen3i_compiler *c, int parent, qwen3i_str key, char type) {
    qwen3i_dom d, *p;
    int at;
    memset(&d, 0, sizeof d);
    d.parent = parent;
    d.type = type;
    d.key = qwen3i_keep(c, key, 1, &d.n_key);
    at = qwen3i_push(c, &c->dom, &d, sizeof d);
    if (c->result != QWEN3_OK || !parent) return at;
    p = qwen3i_dom_at(c, parent);
    if (p->last) qwen3i_dom_at(c, p->last)->next = at; else p->first = at;
    p->last = at;
    return at;
}

static void qwen3i_dom_scalar(qwen3i_compiler *c, qwen3i_json *j, int node) {
    qwen3i_str s;
    int at, n;
    const char *start;
    char type = qwen3i_json_peek(j);
    start = j->p;
    if (type == '"') { if (!qwen3i_json_string(j, &s)) return; }
    else {
        if (!qwen3i_json_scalar(j)) return;
        s.p = start;
        s.n = (size_t)(j->p - start);
    }
    at = qwen3i_keep(c, s, type == '"', &n);
    if (c->result != QWEN3_OK) return;
    qwen3i_dom_at(c, node)->text = at;
    qwen3i_dom_at(c, node)->n_text = n;
    qwen3i_dom_at(c, node)->type = (char)(type == '-' || (type >= '0' && type <= '9') ? '0' : type);
}

/* Read a document; its root's index. */
static int qwen3i_dom_read(qwen3i_compiler *c, const char *text, size_t n) {
    qwen3i_json j = qwen3i_json_begin(text, n);
    qwen3i_json_iter stack[QWEN3I_SCHEMA_DEPTH];
    qwen3i_str key;
    int depth = 0, node, root = 0, parent = 0;
    key.p = "";
    key.n = 0;
    do {
        char type = qwen3i_json_peek(&j);
        node = qwen3i_dom_add(c, parent, key, type);
        if (!root) root = node;
        if (type == '{' || type == '[') {
            if (depth == QWEN3I_SCHEMA_DEPTH) { qwen3i_json_bad(&j, "nested too deeply"); break; }
            qwen3i_json_open(&j, type, &stack[depth++]);
            parent = node;
        } else qwen3i_dom_scalar(c, &j, node);
        key.n = 0;
        while (depth > 0 && c->result == QWEN3_OK && !qwen3i_json_next(&j, &stack[depth - 1], &key) &&
               !j.error) {
            depth--;
            parent = qwen3i_dom_at(c, parent)->parent;
            key.n = 0;
        }
    } while (depth > 0 && !j.error && c->result == QWEN3_OK);
    if (c->result == QWEN3_OK && !qwen3i_json_end(&j))
        qwen3i_reject(c, QWEN3_ERR_FORMAT, "the schema is not JSON: %s at byte %d", j.error,
                      (int)qwen3i_json_offset(&j));
    return root;
}

/* The member with this key, 0: none. The last counts, as in most readers. */
static int qwen3i_dom_get(const qwen3i_compiler *c, int object, const char *key) {
    int i, hit = 0;
    if (qwen3i_dom_at(c, object)->type != '{') return 0;
    QWEN3I_EACH(i, object)
        if (qwen3i_is(qwen3i_dom_key(c, i), key)) hit = i;
    return hit;
}

static int qwen3i_dom_find(const qwen3i_compiler *c, int object, qwen3i_str key) {
    int i, hit = 0;
    QWEN3I_EACH(i, object)
        if (qwen3i_same(qwen3i_dom_key(c, i), key)) hit = i;
    return hit;
}

static int qwen3i_dom_count(const qwen3i_compiler *c, int node) {
    int i, n = 0;
    QWEN3I_EACH(i, node) n++;
    return n;
}

/* The schema that a value is part of, as a document. */
static int qwen3i_dom_root(const qwen3i_compiler *c, int node) {
    while (qwen3i_dom_at(c, node)->parent && !qwen3i_dom_at(c, node)->is_root)
        node = qwen3i_dom_at(c, node)->parent;
    return node;
}

/* The JSON pointer to a value, in at most `size` bytes. */
static const char *qwen3i_dom_path(const qwen3i_compiler *c, int node, char *path, size_t size) {
    int chain[QWEN3I_SCHEMA_DEPTH + 2], n = 0, i, k;
    size_t at = 0;
    for (; qwen3i_dom_at(c, node)->parent; node = qwen3i_dom_at(c, node)->parent) chain[n++] = node;
    path[0] = '\0';
    if (n == 0) snprintf(path, size, "/");
    while (n > 0 && at < size - 1) {
        const int parent = qwen3i_dom_at(c, chain[--n])->parent;
        qwen3i_str key = qwen3i_dom_key(c, chain[n]);
        if (qwen3i_dom_at(c, parent)->type == '{')
            snprintf(path + at, size - at, "/%.*s", (int)qwen3i_min_size(key.n, 200), key.p);
        else {
            for (i = 0, k = qwen3i_dom_at(c, parent)->first; k != chain[n]; k = qwen3i_dom_at(c, k)->next)
                i++;
            snprintf(path + at, size - at, "/%d", i);
        }
        at += strlen(path + at);
    }
    return path;
}

QWEN3I_PRINTF(4, 5)
static int qwen3i_schema_bad(qwen3i_compiler *c, int node, qwen3_result code, const char *format, ...) {
    char path[200], what[160];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    if (c->result == QWEN3_OK) c->refused = code == QWEN3_ERR_UNSUPPORTED;
    return qwen3i_reject(c, code, "%s: %s", qwen3i_dom_path(c, node, path, sizeof path), what);
}

/* ---- JSON Schema: what a set of schemas allows, as alternatives ------------------------------ */
enum { QWEN3I_T_NULL = 1, QWEN3I_T_FALSE = 2, QWEN3I_T_TRUE = 4, QWEN3I_T_NUMBER = 8, QWEN3I_T_STRING = 16, QWEN3I_T_LIST = 32, QWEN3I_T_OBJECT = 64,
       QWEN3I_T_ALL_TYPES = 127 };

/* A term is a value of the document with a meaning: a schema that holds, or not; a value that is equal, or
   not. */
enum { QWEN3I_HOLDS, QWEN3I_FAILS, QWEN3I_EQUALS, QWEN3I_DIFFERS };
#define QWEN3I_TERM(node, kind) ((node) * 4 + (kind))
#define QWEN3I_NEVER (-1)               /* the term that nothing satisfies */

enum { QWEN3I_R_WHOLE, QWEN3I_R_NOT_WHOLE, QWEN3I_R_MIN, QWEN3I_R_MAX, QWEN3I_R_MULTIPLE, QWEN3I_R_ONE_OF, QWEN3I_R_NONE_OF,
       QWEN3I_R_PATTERN, QWEN3I_R_NOT_PATTERN, QWEN3I_R_FORMAT, QWEN3I_R_NOT_FORMAT, QWEN3I_R_MIN_COUNT, QWEN3I_R_MAX_COUNT,
       QWEN3I_R_GROUP, QWEN3I_R_EQUAL, QWEN3I_R_ITEM, QWEN3I_R_PROPERTY, QWEN3I_R_REQUIRED,
           QWEN3I_R_FORBIDDEN, QWEN3I_R_NAMES };
/* a list of them, that grows at its head */
typedef struct qwen3i_rule { int kind, a, b, next; } qwen3i_rule;

/* and the rules for each type */
typedef struct qwen3i_shape { int types, number, string, list, object; } qwen3i_shape;

static qwen3i_shape *qwen3i_shape_at(qwen3i_compiler *c, int i) {
    return &QWEN3I_ARRAY(qwen3i_shape, c->shapes)[i];
}
static qwen3i_rule *qwen3i_rule_at(qwen3i_compiler *c, int i) {
    return &QWEN3I_ARRAY(qwen3i_rule, c->rules)[i];
}
#define QWEN3I_EACH_RULE(i, rules) \
    for (i = rules; i && c->result == QWEN3_OK; i = qwen3i_rule_at(c, i)->next)

#define QWEN3I_MAX_SHAPES 2048

static qwen3i_span qwen3i_shapes_begin(qwen3i_compiler *c) {
    qwen3i_span s;
    s.first = QWEN3I_LEN(qwen3i_shape, c->shapes);
    s.n = 0;
    return s;
}

static void qwen3i_shapes_add(qwen3i_compiler *c, qwen3i_span *list, qwen3i_shape s) {
    if (s.types == 0) return;
    if (list->n >= QWEN3I_MAX_SHAPES) {
        qwen3i_reject(c, QWEN3_ERR_UNSUPPORTED, "%s: too many alternatives", c->where ? c->where :
                      "the schema");
        return;
    }
    if (!qwen3i_spend(c, 8)) return;
    qwen3i_push(c, &c->shapes, &s, sizeof s);
    list->n++;
}

static qwen3i_span qwen3i_shapes_join(qwen3i_compiler *c, qwen3i_span a, qwen3i_span b) {
    qwen3i_span out = qwen3i_shapes_begin(c);
    int i;
    if (b.n == 0) return a;
    if (a.n == 0) return b;
    for (i = 0; i < a.n && c->result == QWEN3_OK; i++)
        qwen3i_shapes_add(c, &out, *qwen3i_shape_at(c, a.first + i));
    for (i = 0; i < b.n && c->result == QWEN3_OK; i++)
        qwen3i_shapes_add(c, &out, *qwen3i_shape_at(c, b.first + i));
    return out;
}

/* Keep only these types, and add a rule for one of them (0: none). */
static qwen3i_span qwen3i_restrict(qwen3i_compiler *c, qwen3i_span in, int types, int type, int kind, int a,
                                   int b) {
    qwen3i_span out = qwen3i_shapes_begin(c);
    int i;
    for (i = 0; i < in.n && c->result == QWEN3_OK; i++) {
        qwen3i_shape s = *qwen3i_shape_at(c, in.first + i);
        int *list = type == QWEN3I_T_NUMBER ? &s.number : type == QWEN3I_T_STRING ? &s.string :
                    type == QWEN3I_T_LIST ? &s.list : &s.object;
        s.types &= types;
        if (type && (s.types & type)) {
            qwen3i_rule r;
            r.kind = kind; r.a = a; r.b = b; r.next = *list;
            *list = qwen3i_push(c, &c->rules, &r, sizeof r);
        }
        qwen3i_shapes_add(c, &out, s);
    }
    return out;
}

static qwen3i_span qwen3i_apply(qwen3i_compiler *c, qwen3i_span in, int term);

static int qwen3i_scalar_type(const qwen3i_compiler *c, int node) {
    switch (qwen3i_dom_at(c, node)->type) {
        case 'n': return QWEN3I_T_NULL;
        case 't': return QWEN3I_T_TRUE;
        case 'f': return QWEN3I_T_FALSE;
        case '0': return QWEN3I_T_NUMBER;
        case '"': return QWEN3I_T_STRING;
        default:  return 0;
    }
}

/* A value that is equal to an object or array of the schema, or not. */
static qwen3i_span qwen3i_apply_composite(qwen3i_compiler *c, qwen3i_span in, int value, int equal) {
    const int is_object = qwen3i_dom_at(c, value)->type == '{', type = is_object ? QWEN3I_T_OBJECT :
                          QWEN3I_T_LIST, n = qwen3i_dom_count(c, value);
    qwen3i_span out, part;
    int k, i = 0;
    if (equal) return qwen3i_restrict(c, in, type, type, QWEN3I_R_EQUAL, value, 0);
    out = qwen3i_restrict(c, in, QWEN3I_T_ALL_TYPES & ~type, 0, 0, 0, 0);
    out = qwen3i_shapes_join(c, out, qwen3i_restrict(c, in, type, type, QWEN3I_R_MIN_COUNT, n + 1, 0));
    if (n > 0)
        out = qwen3i_shapes_join(c, out, qwen3i_restrict(c, in, type, type, QWEN3I_R_MAX_COUNT, n - 1, 0));
    for (k = qwen3i_dom_at(c, value)->first; k && c->result == QWEN3_OK; k = qwen3i_dom_at(c, k)->next, i++) {
        part = is_object ? qwen3i_restrict(c, in, type, type, QWEN3I_R_PROPERTY, k,
                                           QWEN3I_TERM(k, QWEN3I_DIFFERS))
                         : qwen3i_restrict(c, in, type, type, QWEN3I_R_ITEM, i,
                                           QWEN3I_TERM(k, QWEN3I_DIFFERS));
        part = is_object ? qwen3i_restrict(c, part, type, type, QWEN3I_R_REQUIRED, k, 1)
                         : qwen3i_restrict(c, part, type, type, QWEN3I_R_MIN_COUNT, i + 1, 0);
        out = qwen3i_shapes_join(c, out, part);
    }
    return out;
}

/* One of the values (children of a node, or the node alone), or none of them. */
static qwen3i_span qwen3i_apply_values(qwen3i_compiler *c, qwen3i_span in, int node, int alone, int equal) {
    int k, types = 0, first = alone ? node : qwen3i_dom_at(c, node)->first;
    qwen3i_span out;
    for (k = first; k; k = alone ? 0 : qwen3i_dom_at(c, k)->next) types |= qwen3i_scalar_type(c, k);
    if (!equal) types = QWEN3I_T_ALL_TYPES & ~(types & (QWEN3I_T_NULL | QWEN3I_T_TRUE | QWEN3I_T_FALSE));
    out = qwen3i_restrict(c, in, types, QWEN3I_T_NUMBER, equal ? QWEN3I_R_ONE_OF : QWEN3I_R_NONE_OF, node,
                          alone);
    out = qwen3i_restrict(c, out, types, QWEN3I_T_STRING, equal ? QWEN3I_R_ONE_OF : QWEN3I_R_NONE_OF, node,
                          alone);
    for (k = first; k && c->result == QWEN3_OK; k = alone ? 0 : qwen3i_dom_at(c, k)->next) {
        if (qwen3i_scalar_type(c, k)) continue;
        if (equal) out = qwen3i_shapes_join(c, out, qwen3i_apply_composite(c, in, k, 1));
        else out = qwen3i_apply_composite(c, out, k, 0);
    }
    return out;
}

enum { QWEN3I_K_NONE, QWEN3I_K_TYPE, QWEN3I_K_ENUM, QWEN3I_K_CONST, QWEN3I_K_REF, QWEN3I_K_EACH,
       QWEN3I_K_ONE_OF, QWEN3I_K_NOT, QWEN3I_K_IF, QWEN3I_K_BOUND, QWEN3I_K_MULTIPLE_OF, QWEN3I_K_COUNT,
       QWEN3I_K_STRING, QWEN3I_K_ITEMS, QWEN3I_K_UNIQUE, QWEN3I_K_PROPERTIES, QWEN3I_K_REQUIRED,
       QWEN3I_K_NAMES, QWEN3I_K_DEPENDENCIES, QWEN3I_K_REFUSED };

/* EACH: a: does one suffice? BOUND: a: a lower one, b: exclusive; COUNT: a: the least, b: of which type;
   STRING: a: rule */
typedef struct qwen3i_keyword { const char *name; int kind, a, b; } qwen3i_keyword;

static const qwen3i_keyword *qwen3i_keyword_of(qwen3i_str key) {
    static const qwen3i_keyword words[] = {
        {"type", QWEN3I_K_TYPE, 0, 0}, {"enum", QWEN3I_K_ENUM, 0, 0}, {"const", QWEN3I_K_CONST, 0, 0},
        {"$ref", QWEN3I_K_REF, 0, 0}, {"allOf", QWEN3I_K_EACH, 0, 0}, {"anyOf", QWEN3I_K_EACH, 1, 0},
        {"oneOf", QWEN3I_K_ONE_OF, 0, 0}, {"not", QWEN3I_K_NOT, 0, 0}, {"if", QWEN3I_K_IF, 0, 0},
        {"minimum", QWEN3I_K_BOUND, 1, 0}, {"exclusiveMinimum", QWEN3I_K_BOUND, 1, 1},
        {"maximum", QWEN3I_K_BOUND, 0, 0}, {"exclusiveMaximum", QWEN3I_K_BOUND, 0, 1},
        {"multipleOf", QWEN3I_K_MULTIPLE_OF, 0, 0},
        {"minLength", QWEN3I_K_COUNT, 1, QWEN3I_T_STRING}, {"maxLength", QWEN3I_K_COUNT, 0, QWEN3I_T_STRING},
        {"minItems", QWEN3I_K_COUNT, 1, QWEN3I_T_LIST}, {"maxItems", QWEN3I_K_COUNT, 0, QWEN3I_T_LIST},
        {"minProperties", QWEN3I_K_COUNT, 1, QWEN3I_T_OBJECT},
        {"maxProperties", QWEN3I_K_COUNT, 0, QWEN3I_T_OBJECT},
        {"pattern", QWEN3I_K_STRING, QWEN3I_R_PATTERN, 0}, {"format", QWEN3I_K_STRING, QWEN3I_R_FORMAT, 0},
        {"items", QWEN3I_K_ITEMS, 0, 0}, {"prefixItems", QWEN3I_K_ITEMS, 0, 0},
        {"additionalItems", QWEN3I_K_ITEMS, 0, 0}, {"uniqueItems", QWEN3I_K_UNIQUE, 0, 0},
        {"properties", QWEN3I_K_PROPERTIES, 0, 0}, {"patternProperties", QWEN3I_K_PROPERTIES, 0, 0},
        {"additionalProperties", QWEN3I_K_PROPERTIES, 0, 0}, {"required", QWEN3I_K_REQUIRED, 0, 0},
        {"propertyNames", QWEN3I_K_NAMES, 0, 0}, {"dependencies", QWEN3I_K_DEPENDENCIES, 0, 0},
        {"dependentRequired", QWEN3I_K_DEPENDENCIES, 0, 0}, {"dependentSchemas", QWEN3I_K_DEPENDENCIES, 0, 0},
        {"contains", QWEN3I_K_REFUSED, 0, 0}, {"unevaluatedProperties", QWEN3I_K_REFUSED, 0, 0},
        {"unevaluatedItems", QWEN3I_K_REFUSED, 0, 0}, {"$dynamicRef", QWEN3I_K_REFUSED, 0, 0},
        {"$recursiveRef", QWEN3I_K_REFUSED, 0, 0}, {"", QWEN3I_K_NONE, 0, 0}};
    int i;
    for (i = 0; i < QWEN3I_COUNT(words) - 1 && !qwen3i_is(key, words[i].name);) i++;
    return &words[i];
}

static int qwen3i_type_name(qwen3i_compiler *c, int node, int *whole) {
    static const struct { const char *name; int types; } names[] = {{"null", QWEN3I_T_NULL}, {"boolean", QWEN3I_T_TRUE | QWEN3I_T_FALSE},
        {"number", QWEN3I_T_NUMBER}, {"integer", 0}, {"string", QWEN3I_T_STRING}, {"array", QWEN3I_T_LIST}, {"object", QWEN3I_T_OBJECT}};
    int i;
    for (i = 0; i < QWEN3I_COUNT(names) && qwen3i_dom_at(c, node)->type == '"'; i++)
        if (qwen3i_is(qwen3i_dom_text(c, node), names[i].name)) { *whole |= i == 3; return names[i].types; }
    return qwen3i_schema_bad(c, node, QWEN3_ERR_FORMAT, "unknown type");
}

static qwen3i_span qwen3i_apply_type(qwen3i_compiler *c, qwen3i_span in, int node, int negated) {
    int k, types = 0, whole = 0;
    if (qwen3i_dom_at(c, node)->type != '[') types = qwen3i_type_name(c, node, &whole);
    else QWEN3I_EACH(k, node)
        types |= qwen3i_type_name(c, k, &whole);
    whole = whole && !(types & QWEN3I_T_NUMBER);
    if (negated) types = QWEN3I_T_ALL_TYPES & ~types;
    else if (whole) types |= QWEN3I_T_NUMBER;
    return qwen3i_restrict(c, in, types, whole ? QWEN3I_T_NUMBER : 0, negated ? QWEN3I_R_NOT_WHOLE :
                           QWEN3I_R_WHOLE, 0, 0);
}

/* A count: a whole number from 0 on. */
static int qwen3i_dom_int(qwen3i_compiler *c, int node) {
    qwen3i_str s = qwen3i_dom_text(c, node);
    qwen3i_json j = qwen3i_json_begin(s.p, s.n);
    int64_t v;
    if (qwen3i_dom_at(c, node)->type != '0' || !qwen3i_json_int(&j, &v) || v < 0)
        return qwen3i_schema_bad(c, node, QWEN3_ERR_FORMAT, "a whole number from 0 on was expected");
    return v > 1 << 30 ? 1 << 30 : (int)v;
}

static int qwen3i_want_type(qwen3i_compiler *c, int node, char type, const char *what) {
    return qwen3i_dom_at(c, node)->type == type ? 1 :
           qwen3i_schema_bad(c, node, QWEN3_ERR_FORMAT, "%s was expected", what);
}

/* A bound. draft: a boolean "exclusiveMinimum" beside "minimum", as in draft 4. */
static qwen3i_span qwen3i_apply_bound(qwen3i_compiler *c, qwen3i_span in, int schema, int node, int low,
                                      int exclusive, int negated) {
    int other = exclusive ? 0 : qwen3i_dom_get(c, schema, low ? "exclusiveMinimum" : "exclusiveMaximum");
    /* draft 4: says something about its neighbour */
    if (exclusive && qwen3i_dom_at(c, node)->type != '0') return in;
    if (!qwen3i_want_type(c, node, '0', "a number")) return in;
    if (other && qwen3i_dom_at(c, other)->type == 't') exclusive = 1;
    if (!negated)
        return qwen3i_restrict(c, in, QWEN3I_T_ALL_TYPES, QWEN3I_T_NUMBER, low ? QWEN3I_R_MIN : QWEN3I_R_MAX,
                               node, exclusive);
    return qwen3i_restrict(c, in, QWEN3I_T_NUMBER, QWEN3I_T_NUMBER, low ? QWEN3I_R_MAX : QWEN3I_R_MIN, node,
                           !exclusive);
}

static qwen3i_span qwen3i_apply_count(qwen3i_compiler *c, qwen3i_span in, int node, int type, int low,
                                      int negated) {
    int n = qwen3i_dom_int(c, node);
    if (!negated)
        return qwen3i_restrict(c, in, QWEN3I_T_ALL_TYPES, type, low ? QWEN3I_R_MIN_COUNT :
                               QWEN3I_R_MAX_COUNT, n, 0);
    if (low && n == 0) { in.n = 0; return in; }
    return qwen3i_restrict(c, in, type, type, low ? QWEN3I_R_MAX_COUNT : QWEN3I_R_MIN_COUNT, low ? n - 1 :
                           n + 1, 0);
}

static qwen3i_span qwen3i_apply_string(qwen3i_compiler *c, qwen3i_span in, int node, int kind, int negated) {
    if (!qwen3i_want_type(c, node, '"', "a string")) return in;
    if (kind == QWEN3I_R_FORMAT) {
        const qwen3i_text_format *f = qwen3i_text_format_find(qwen3i_dom_text(c, node));
        if (f && !f->expression)
            qwen3i_schema_bad(c, node, QWEN3_ERR_UNSUPPORTED, "format \"%s\" is not supported", f->name);
        if (!f && negated) in.n = 0;
        if (!f) return in;
    }
    return qwen3i_restrict(c, in, negated ? QWEN3I_T_STRING : QWEN3I_T_ALL_TYPES, QWEN3I_T_STRING,
                           kind + negated, node, 0);
}

static qwen3i_span qwen3i_apply_each(qwen3i_compiler *c, qwen3i_span in, int node, int kind, int join) {
    qwen3i_span out = in;
    int k;
    if (!qwen3i_want_type(c, node, '[', "a list of schemas")) return in;
    if (join) out.n = 0;
    QWEN3I_EACH(k, node) {
        if (join) out = qwen3i_shapes_join(c, out, qwen3i_apply(c, in, QWEN3I_TERM(k, kind)));
        else out = qwen3i_apply(c, out, QWEN3I_TERM(k, kind));
    }
    return out;
}

static qwen3i_span qwen3i_possible(qwen3i_compiler *c, qwen3i_span in);

/* Exactly one: each alternative without those of the others that it has something in common with. */
static qwen3i_span qwen3i_apply_one_of(qwen3i_compiler *c, qwen3i_span in, int node) {
    qwen3i_span out, part, both;
    int k, other;
    out = in;
    out.n = 0;
    if (!qwen3i_want_type(c, node, '[', "a list of schemas")) return in;
    QWEN3I_EACH(k, node) {
        part = qwen3i_possible(c, qwen3i_apply(c, in, QWEN3I_TERM(k, QWEN3I_HOLDS)));
        for (other = qwen3i_dom_at(c, node)->first; other && part.n > 0 &&
             c->result == QWEN3_OK; other = qwen3i_dom_at(c, other)->next) {
            if (other == k) continue;
            both = qwen3i_possible(c, qwen3i_apply(c, part, QWEN3I_TERM(other, QWEN3I_HOLDS)));
            if (both.n > 0)
                part = qwen3i_possible(c, qwen3i_apply(c, part, QWEN3I_TERM(other, QWEN3I_FAILS)));
        }
        out = qwen3i_shapes_join(c, out, part);
    }
    return out;
}

static qwen3i_span qwen3i_apply_if(qwen3i_compiler *c, qwen3i_span in, int schema, int node, int negated) {
    const int then = qwen3i_dom_get(c, schema, "then"), other = qwen3i_dom_get(c, schema, "else"),
              kind = negated ? QWEN3I_FAILS : QWEN3I_HOLDS;
    qwen3i_span yes, no;
    if (!then && !other) { if (negated) in.n = 0; return in; }
    yes = qwen3i_apply(c, in, QWEN3I_TERM(node, QWEN3I_HOLDS));
    no = qwen3i_apply(c, in, QWEN3I_TERM(node, QWEN3I_FAILS));
    if (then) yes = qwen3i_apply(c, yes, QWEN3I_TERM(then, kind)); else if (negated) yes.n = 0;
    if (other) no = qwen3i_apply(c, no, QWEN3I_TERM(other, kind)); else if (negated) no.n = 0;
    return qwen3i_shapes_join(c, yes, no);
}

static qwen3i_span qwen3i_apply_required(qwen3i_compiler *c, qwen3i_span in, int node, int negated) {
    qwen3i_span out = in;
    int k;
    if (!qwen3i_want_type(c, node, '[', "a list of names")) return in;
    if (negated) out.n = 0;
    QWEN3I_EACH(k, node) {
        if (!qwen3i_want_type(c, k, '"', "a name")) return in;
        if (!negated)
            out = qwen3i_restrict(c, out, QWEN3I_T_ALL_TYPES, QWEN3I_T_OBJECT, QWEN3I_R_REQUIRED, k, 0);
        else out = qwen3i_shapes_join(c, out, qwen3i_restrict(c, in, QWEN3I_T_OBJECT, QWEN3I_T_OBJECT,
                                                              QWEN3I_R_FORBIDDEN, k, 0));
    }
    return out;
}

static qwen3i_span qwen3i_apply_dependencies(qwen3i_compiler *c, qwen3i_span in, int node, int negated) {
    qwen3i_span out = in, with, without;
    int k;
    if (!qwen3i_want_type(c, node, '{', "an object")) return in;
    if (negated) out.n = 0;
    QWEN3I_EACH(k, node) {
        const int is_list = qwen3i_dom_at(c, k)->type == '[';
        with = qwen3i_restrict(c, negated ? in : out, QWEN3I_T_OBJECT, QWEN3I_T_OBJECT, QWEN3I_R_REQUIRED, k,
                               1);
        with = is_list ? qwen3i_apply_required(c, with, k, negated) :
               qwen3i_apply(c, with, QWEN3I_TERM(k, negated ? QWEN3I_FAILS : QWEN3I_HOLDS));
        without = qwen3i_restrict(c, out, QWEN3I_T_ALL_TYPES, QWEN3I_T_OBJECT, QWEN3I_R_FORBIDDEN, k, 1);
        out = negated ? qwen3i_shapes_join(c, out, with) : qwen3i_shapes_join(c, without, with);
    }
    return out;
}

/* properties, patternProperties and additionalProperties say together what they say: one rule, at the first
   of them. */
static qwen3i_span qwen3i_apply_properties(qwen3i_compiler *c, qwen3i_span in, int schema, int node,
                                           int negated) {
    static const char *const keys[] = {"properties", "patternProperties", "additionalProperties"};
    int i, k;
    qwen3i_span out = in;
    if (!negated) {
        for (i = 0; i < 3; i++) {
            k = qwen3i_dom_get(c, schema, keys[i]);
            if (k && k < node) return in;
            if (k && i < 2 && !qwen3i_want_type(c, k, '{', "an object")) return in;
        }
        return qwen3i_restrict(c, in, QWEN3I_T_ALL_TYPES, QWEN3I_T_OBJECT, QWEN3I_R_GROUP, schema, 0);
    }
    out.n = 0;
    if (!qwen3i_is(qwen3i_dom_key(c, node), "properties")) return out;
    QWEN3I_EACH(k, node) {
        qwen3i_span part = qwen3i_restrict(c, in, QWEN3I_T_OBJECT, QWEN3I_T_OBJECT, QWEN3I_R_PROPERTY, k,
                                           QWEN3I_TERM(k, QWEN3I_FAILS));
        out = qwen3i_shapes_join(c, out, qwen3i_restrict(c, part, QWEN3I_T_OBJECT, QWEN3I_T_OBJECT,
                                                         QWEN3I_R_REQUIRED, k, 1));
    }
    return out;
}

static qwen3i_span qwen3i_apply_items(qwen3i_compiler *c, qwen3i_span in, int schema, int node, int negated) {
    static const char *const keys[] = {"items", "prefixItems", "additionalItems"};
    int i, k;
    if (negated) { in.n = 0; return in; }
    for (i = 0; i < 3; i++) {
        k = qwen3i_dom_get(c, schema, keys[i]);
        if (k && k < node) return in;
    }
    return qwen3i_restrict(c, in, QWEN3I_T_ALL_TYPES, QWEN3I_T_LIST, QWEN3I_R_GROUP, schema, 0);
}

/* The target of a local reference. */
static int qwen3i_resolve(qwen3i_compiler *c, int node);
static int qwen3i_pattern_dfa(qwen3i_compiler *c, int node, int format);
static int qwen3i_multiple_dfa(qwen3i_compiler *c, int node);

static qwen3i_span qwen3i_apply_enforced(qwen3i_compiler *c, qwen3i_span in, int schema, int node,
                                         int negated) {
    const qwen3i_keyword *word = qwen3i_keyword_of(qwen3i_dom_key(c, node));
    const int kind = negated ? QWEN3I_FAILS : QWEN3I_HOLDS;
    qwen3i_span none = in;
    none.n = 0;
    switch (word->kind) {
        case QWEN3I_K_TYPE:  return qwen3i_apply_type(c, in, node, negated);
        case QWEN3I_K_ENUM:
            if (!qwen3i_want_type(c, node, '[', "a list of values")) return in;
            return qwen3i_apply_values(c, in, node, 0, !negated);
        case QWEN3I_K_CONST: return qwen3i_apply_values(c, in, node, 1, !negated);
        case QWEN3I_K_REF:   return qwen3i_apply(c, in, QWEN3I_TERM(qwen3i_resolve(c, node), kind));
        case QWEN3I_K_EACH:  return qwen3i_apply_each(c, in, node, kind, word->a != negated);
        case QWEN3I_K_ONE_OF:       /* negated: none of them; that more than one holds is left out */
            return negated ? qwen3i_apply_each(c, in, node, kind, 0) : qwen3i_apply_one_of(c, in, node);
        case QWEN3I_K_NOT:
            return qwen3i_apply(c, in, QWEN3I_TERM(node, negated ? QWEN3I_HOLDS : QWEN3I_FAILS));
        case QWEN3I_K_IF:     return qwen3i_apply_if(c, in, schema, node, negated);
        case QWEN3I_K_BOUND:  return qwen3i_apply_bound(c, in, schema, node, word->a, word->b, negated);
        case QWEN3I_K_COUNT:  return qwen3i_apply_count(c, in, node, word->b, word->a, negated);
        case QWEN3I_K_STRING: return qwen3i_apply_string(c, in, node, word->a, negated);
        case QWEN3I_K_ITEMS:  return qwen3i_apply_items(c, in, schema, node, negated);
        case QWEN3I_K_PROPERTIES: return qwen3i_apply_properties(c, in, schema, node, negated);
        case QWEN3I_K_REQUIRED:   return qwen3i_apply_required(c, in, node, negated);
        case QWEN3I_K_DEPENDENCIES: return qwen3i_apply_dependencies(c, in, node, negated);
        case QWEN3I_K_MULTIPLE_OF:
            return negated ? none : qwen3i_restrict(c, in, QWEN3I_T_ALL_TYPES, QWEN3I_T_NUMBER,
                                                    QWEN3I_R_MULTIPLE, node, 0);
        case QWEN3I_K_NAMES:
            return negated ? none : qwen3i_restrict(c, in, QWEN3I_T_ALL_TYPES, QWEN3I_T_OBJECT,
                                                    QWEN3I_R_NAMES, node, 0);
        case QWEN3I_K_UNIQUE:
            if (qwen3i_dom_at(c, node)->type != 't') return negated ? none : in;
            if (negated) return none;
            break;                      /* refused */
        case QWEN3I_K_REFUSED: break;
        default: return negated ? none : in;
    }
    qwen3i_schema_bad(c, node, QWEN3_ERR_UNSUPPORTED, "%s is not supported", word->name);
    return none;
}

/* Can what a keyword says of strings and numbers be made at all? Finds out before anything depends on it. */
static void qwen3i_try_keyword(qwen3i_compiler *c, int node) {
    const qwen3i_str key = qwen3i_dom_key(c, node);
    int k;
    if (qwen3i_is(key, "pattern") && qwen3i_dom_at(c, node)->type == '"') qwen3i_pattern_dfa(c, node, 0);
    if (qwen3i_is(key, "multipleOf")) qwen3i_multiple_dfa(c, node);
    if (!qwen3i_is(key, "patternProperties")) return;
    QWEN3I_EACH(k, node)
        qwen3i_pattern_dfa(c, k, 2);
}

/* The same; with QWEN3_GRAMMAR_WARN, what is refused says nothing. */
static qwen3i_span qwen3i_apply_keyword(qwen3i_compiler *c, qwen3i_span in, int schema, int node,
                                        int negated) {
    const int may_drop = c->result == QWEN3_OK && (c->g->flags & QWEN3_GRAMMAR_WARN);
    qwen3i_span out;
    if (may_drop) qwen3i_try_keyword(c, node);
    out = qwen3i_apply_enforced(c, in, schema, node, negated);
    if (c->result == QWEN3_OK || !may_drop || !c->refused || c->steps > c->max_steps) return out;
    qwen3i_log(&c->g->model->logger, QWEN3_LOG_WARN, "grammar: not enforced: %s", c->message);
    c->result = QWEN3_OK;
    if (negated) in.n = 0;
    return in;
}

/* Schemas with a draft before 2019-09: what stands beside $ref does not count. */
static int qwen3i_old_draft(qwen3i_compiler *c, int schema) {
    int node = qwen3i_dom_get(c, qwen3i_dom_root(c, schema), "$schema");
    qwen3i_str s = qwen3i_dom_text(c, node);
    return node && qwen3i_str_find(s, "/draft-0", 0) < s.n;
}

static qwen3i_span qwen3i_apply_schema(qwen3i_compiler *c, qwen3i_span in, int schema, int negated) {
    char path[200];
    const char *outer = c->where;
    qwen3i_span out = in;
    int k, type = qwen3i_dom_at(c, schema)->type, ref;
    out.n = 0;
    if (type == (negated ? 'f' : 't')) return in;
    if (type == 't' || type == 'f') return out;
    if (type != '{') {
        qwen3i_schema_bad(c, schema, QWEN3_ERR_FORMAT, "a schema is an object or a boolean");
        return in;
    }
    ref = qwen3i_dom_get(c, schema, "$ref");
    if (ref && qwen3i_dom_at(c, ref)->type == '"' && qwen3i_old_draft(c, schema))
        return qwen3i_apply_keyword(c, in, schema, ref, negated);
    c->where = qwen3i_dom_path(c, schema, path, sizeof path);
    if (!negated) out = in;
    QWEN3I_EACH(k, schema) {
        if (negated) out = qwen3i_shapes_join(c, out, qwen3i_apply_keyword(c, in, schema, k, 1));
        else out = qwen3i_apply_keyword(c, out, schema, k, 0);
    }
    c->where = outer;
    return out;
}

static qwen3i_span qwen3i_apply(qwen3i_compiler *c, qwen3i_span in, int term) {
    const int node = term >> 2, kind = term & 3;
    if (in.n == 0 || c->result != QWEN3_OK) return in;
    if (term == QWEN3I_NEVER) { in.n = 0; return in; }
    if (c->depth > QWEN3I_MAX_NESTING) {
        qwen3i_schema_bad(c, node, QWEN3_ERR_UNSUPPORTED, "a schema refers to itself without end");
        return in;
    }
    c->depth++;
    if (kind == QWEN3I_EQUALS || kind == QWEN3I_DIFFERS)
        in = qwen3i_apply_values(c, in, node, 1, kind == QWEN3I_EQUALS);
    else in = qwen3i_apply_schema(c, in, node, kind == QWEN3I_FAILS);
    c->depth--;
    return in;
}

/* ---- JSON Schema: references ----------------------------------------------------------------- */
/* One step of a JSON pointer, decoded in place of the text; *rest: what follows it. */
static int qwen3i_pointer_step(qwen3i_compiler *c, int node, qwen3i_str *rest) {
    char name[512];
    size_t n = 0;
    int k, index = 0;
    const char *p = rest->p + 1, *end = rest->p + rest->n;
    for (; p < end && *p != '/' && n < sizeof name; p++) {
        char x = *p;
        if (x == '%' && end - p > 2 && qwen3i_hex(p[1]) >= 0 && qwen3i_hex(p[2]) >= 0) {
            x = (char)(qwen3i_hex(p[1]) * 16 + qwen3i_hex(p[2]));
            p += 2;
        }
        if (x == '~' && end - p > 1) { x = p[1] == '0' ? '~' : '/'; p++; }
        name[n++] = x;
    }
    rest->n = (size_t)(end - p);
    rest->p = p;
    if (qwen3i_dom_at(c, node)->type == '{') {
        qwen3i_str key;
        key.p = name;
        key.n = n;
        return qwen3i_dom_find(c, node, key);
    }
    if (qwen3i_dom_at(c, node)->type != '[' || n == 0 || n > 8) return 0;
    for (k = 0; k < (int)n; k++)
        index = name[k] >= '0' && name[k] <= '9' ? index * 10 + (name[k] - '0') : 1 << 24;
    for (k = qwen3i_dom_at(c, node)->first; k && index > 0; k = qwen3i_dom_at(c, k)->next) index--;
    return k;
}

/* The schema with this identifier; a fragment: by its anchor. */
static int qwen3i_find_id(qwen3i_compiler *c, int root, qwen3i_str id, int anchor) {
    int i, k, n = QWEN3I_LEN(qwen3i_dom, c->dom);
    for (i = root; i < n; i++) {
        qwen3i_str text;
        if (qwen3i_dom_at(c, i)->type != '{' || qwen3i_dom_root(c, i) != root) continue;
        k = qwen3i_dom_get(c, i, anchor ? "$anchor" : "$id");
        if (!k) k = qwen3i_dom_get(c, i, "id");
        if (!k || qwen3i_dom_at(c, k)->type != '"') continue;
        text = qwen3i_dom_text(c, k);
        if (text.n > 0 && text.p[0] == '#' && anchor) text = qwen3i_str_from(text, 1);
        if (!anchor && text.n > 0 && text.p[text.n - 1] == '#') text.n--;
        if (qwen3i_same(text, id)) return i;
    }
    return 0;
}

static int qwen3i_resolve(qwen3i_compiler *c, int node) {
    qwen3i_str ref, base;
    const int root = qwen3i_dom_root(c, node);
    int at = root;
    size_t hash;
    if (!qwen3i_want_type(c, node, '"', "a reference")) return root;
    ref = base = qwen3i_dom_text(c, node);
    hash = qwen3i_str_find(ref, "#", 0);
    base.n = hash;
    if (base.n > 0) at = qwen3i_find_id(c, root, base, 0);
    ref = qwen3i_str_from(ref, hash < ref.n ? hash + 1 : ref.n);
    if (at && ref.n > 0 && ref.p[0] != '/') at = qwen3i_find_id(c, root, ref, 1);
    else while (at && ref.n > 0) at = qwen3i_pointer_step(c, at, &ref);
    if (at) return at;
    ref = qwen3i_dom_text(c, node);
    qwen3i_schema_bad(c, node, QWEN3_ERR_UNSUPPORTED, "there is no \"%.*s\" in this document",
                      (int)qwen3i_min_size(ref.n, 80), ref.p);
    return root;
}

/* ---- JSON Schema: what can be at all --------------------------------------------------------- */
static int qwen3i_compare_bounds(const qwen3i_bound *a, const qwen3i_bound *b) {
    int order, n = qwen3i_min(a->n_fraction, b->n_fraction);
    if (a->negative != b->negative) return a->negative ? -1 : 1;
    order = a->n_whole != b->n_whole ? a->n_whole - b->n_whole :
            memcmp(a->whole, b->whole, (size_t)a->n_whole);
    if (order == 0) order = memcmp(a->fraction, b->fraction, (size_t)n);
    if (order == 0) order = a->n_fraction - b->n_fraction;
    return a->negative ? -order : order;
}

static int qwen3i_dom_bound(qwen3i_compiler *c, int node, qwen3i_bound *b) {
    if (qwen3i_bound_read(qwen3i_dom_text(c, node), b)) return 1;
    return qwen3i_schema_bad(c, node, QWEN3_ERR_UNSUPPORTED, "a number with more than %d digits",
                             QWEN3I_MAX_DIGITS);
}

static int qwen3i_same_scalar(qwen3i_compiler *c, int a, int b) {
    qwen3i_bound x, y;
    if (qwen3i_dom_at(c, a)->type != qwen3i_dom_at(c, b)->type) return 0;
    if (qwen3i_dom_at(c, a)->type != '0') return qwen3i_same(qwen3i_dom_text(c, a), qwen3i_dom_text(c, b));
    return qwen3i_dom_bound(c, a, &x) && qwen3i_dom_bound(c, b, &y) && qwen3i_compare_bounds(&x, &y) == 0;
}

/* The values of a ONE_OF or NONE_OF rule, one after another. */
static int qwen3i_rule_first(qwen3i_compiler *c, const qwen3i_rule *r) {
    return r->b ? r->a : qwen3i_dom_at(c, r->a)->first;
}
static int qwen3i_rule_next(qwen3i_compiler *c, const qwen3i_rule *r, int k) {
    return r->b ? 0 : qwen3i_dom_at(c, k)->next;
}

static int qwen3i_rule_has(qwen3i_compiler *c, const qwen3i_rule *r, int value) {
    int k;
    for (k = qwen3i_rule_first(c, r); k; k = qwen3i_rule_next(c, r, k))
        if (qwen3i_same_scalar(c, k, value)) return 1;
    return 0;
}

/* Does a number of the schema keep these rules? */
static int qwen3i_number_keeps(qwen3i_compiler *c, int rules, int value) {
    qwen3i_bound v, limit;
    int i, order;
    if (!qwen3i_dom_bound(c, value, &v)) return 0;
    QWEN3I_EACH_RULE(i, rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind == QWEN3I_R_ONE_OF && !qwen3i_rule_has(c, &r, value)) return 0;
        if (r.kind == QWEN3I_R_NONE_OF && qwen3i_rule_has(c, &r, value)) return 0;
        if (r.kind == QWEN3I_R_WHOLE && v.n_fraction > 0) return 0;
        if (r.kind == QWEN3I_R_NOT_WHOLE && v.n_fraction == 0) return 0;
        if (r.kind != QWEN3I_R_MIN && r.kind != QWEN3I_R_MAX) continue;
        if (!qwen3i_dom_bound(c, r.a, &limit)) return 0;
        order = qwen3i_compare_bounds(&v, &limit);
        if (r.kind == QWEN3I_R_MAX) order = -order;
        if (order < 0 || (order == 0 && r.b)) return 0;
    }
    return 1;
}

/* Is the text, written as a JSON string, a word of the automaton? -1: the state where it ends, if that is
   final. */
static int qwen3i_dfa_match(qwen3i_compiler *c, int dfa, qwen3i_str text) {
    static const char from[] = "\b\t\n\f\r\"\\", to[] = "btnfr\"\\", digits[] = "0123456789abcdef";
    const qwen3i_dfa *d = &QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas)[dfa];
    int state;
    size_t i;
    if (!dfa) return -1;
    state = qwen3i_dfa_step(c->g, d, 0, '"');
    for (i = 0; i < text.n && state >= 0; i++) {
        unsigned char x = (unsigned char)text.p[i];
        const char *hit = x ? strchr(from, x) : NULL;
        if (hit || x < 0x20) state = qwen3i_dfa_step(c->g, d, state, '\\');
        if (hit) x = (unsigned char)to[hit - from];
        else if (x < 0x20) {
            const char *u = "u00";
            for (; *u && state >= 0; u++) state = qwen3i_dfa_step(c->g, d, state, (unsigned char)*u);
            if (state >= 0) state = qwen3i_dfa_step(c->g, d, state, (unsigned char)digits[x >> 4]);
            x = (unsigned char)digits[x & 15];
        }
        if (state >= 0) state = qwen3i_dfa_step(c->g, d, state, x);
    }
    if (state >= 0) state = qwen3i_dfa_step(c->g, d, state, '"');
    return state >= 0 && qwen3i_state_at(c->g, dfa, state)->final ? state : -1;
}

static int qwen3i_count_chars(qwen3i_str s) {
    int n = 0;
    size_t i;
    for (i = 0; i < s.n; i++) n += ((unsigned char)s.p[i] & 0xC0) != 0x80;
    return n;
}

static int qwen3i_string_keeps(qwen3i_compiler *c, int rules, int value) {
    const qwen3i_str text = qwen3i_dom_text(c, value);
    const int n = qwen3i_count_chars(text);
    int i;
    QWEN3I_EACH_RULE(i, rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        const int wanted = r.kind == QWEN3I_R_PATTERN || r.kind == QWEN3I_R_FORMAT;
        if (r.kind == QWEN3I_R_ONE_OF && !qwen3i_rule_has(c, &r, value)) return 0;
        if (r.kind == QWEN3I_R_NONE_OF && qwen3i_rule_has(c, &r, value)) return 0;
        if ((r.kind == QWEN3I_R_MIN_COUNT && n < r.a) || (r.kind == QWEN3I_R_MAX_COUNT && n > r.a)) return 0;
        if (!wanted && r.kind != QWEN3I_R_NOT_PATTERN && r.kind != QWEN3I_R_NOT_FORMAT) continue;
        if ((qwen3i_dfa_match(c, qwen3i_pattern_dfa(c, r.a, r.kind >= QWEN3I_R_FORMAT),
                              text) >= 0) != wanted) return 0;
    }
    return 1;
}

/* Numbers and strings: does at least one of the values that are named keep all rules? Without such: yes. */
static int qwen3i_scalar_possible(qwen3i_compiler *c, int rules, char type) {
    int i, k, min = 0, max = INT_MAX, whole = 0;
    QWEN3I_EACH_RULE(i, rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind == QWEN3I_R_MIN_COUNT) min = qwen3i_max(min, r.a);
        if (r.kind == QWEN3I_R_MAX_COUNT) max = qwen3i_min(max, r.a);
        if (r.kind == QWEN3I_R_WHOLE) whole |= 1;
        if (r.kind == QWEN3I_R_NOT_WHOLE) whole |= 2;
    }
    if (min > max || whole == 3) return 0;
    QWEN3I_EACH_RULE(i, rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind != QWEN3I_R_ONE_OF) continue;
        for (k = qwen3i_rule_first(c, &r); k; k = qwen3i_rule_next(c, &r, k)) {
            if (qwen3i_dom_at(c, k)->type != type) continue;
            if (type == '0' ? qwen3i_number_keeps(c, rules, k) : qwen3i_string_keeps(c, rules, k)) return 1;
        }
        return 0;
    }
    return 1;
}

/* ---- JSON Schema: sets of terms -------------------------------------------------------------- */
/* Follow references, and drop what says nothing: 0. */
static int qwen3i_term_simple(qwen3i_compiler *c, int term) {
    int steps;
    for (steps = 0; steps < 64 && term > 0 && (term & 3) == QWEN3I_HOLDS; steps++) {
        const qwen3i_dom *d = qwen3i_dom_at(c, term >> 2);
        int ref;
        if (d->type == 't' || (d->type == '{' && !d->first)) return 0;
        if (d->type == 'f') return QWEN3I_NEVER;
        ref = d->type == '{' ? qwen3i_dom_get(c, term >> 2, "$ref") : 0;
        if (!ref || qwen3i_dom_at(c, ref)->type != '"' || (d->first != d->last && !qwen3i_old_draft(c, term >> 2)))
            break;
        term = QWEN3I_TERM(qwen3i_resolve(c, ref), QWEN3I_HOLDS);
        if (c->result != QWEN3_OK) return 0;
    }
    return term;
}

/* Push a term on c->terms. */
static void qwen3i_push_term(qwen3i_compiler *c, int term) {
    term = qwen3i_term_simple(c, term);
    if (term) qwen3i_push_int(c, &c->terms, term);
}

/* The index of the set of terms pushed since first, which are taken off; -1: nothing satisfies it. */
static int qwen3i_pop_terms(qwen3i_compiler *c, int first) {
    int *t = QWEN3I_ARRAY(int, c->terms) + first, n = QWEN3I_LEN(int, c->terms) - first, i, kept = 0, fresh,
         id, zero = 0;
    c->terms.n = (size_t)first * sizeof(int);
    if (c->result != QWEN3_OK) return -1;
    qwen3i_sort(t, (size_t)n, sizeof *t, qwen3i_compare_int);
    for (i = 0; i < n; i++) {
        if (t[i] == QWEN3I_NEVER) return -1;
        if (kept == 0 || t[i] != t[kept - 1]) t[kept++] = t[i];
    }
    id = qwen3i_intern(c, &c->values, t ? t : &zero, kept, &fresh);
    if (fresh) {
        qwen3i_push_int(c, &c->value_nodes, 0);
        qwen3i_push(c, &c->empties, "", 1);
    }
    return c->result == QWEN3_OK ? id : -1;
}

static qwen3i_str qwen3i_rule_name(qwen3i_compiler *c, const qwen3i_rule *r) {
    return r->kind == QWEN3I_R_PROPERTY || r->b ? qwen3i_dom_key(c, r->a) : qwen3i_dom_text(c, r->a);
}

/* What the value of a property must satisfy, by one group of properties, patternProperties,
   additionalProperties. */
static void qwen3i_group_terms(qwen3i_compiler *c, int schema, qwen3i_str name) {
    const int named = qwen3i_dom_get(c, schema, "properties"),
              patterns = qwen3i_dom_get(c, schema, "patternProperties"),
        others = qwen3i_dom_get(c, schema, "additionalProperties");
    int k, any = 0;
    if (named && (k = qwen3i_dom_find(c, named, name)) != 0) {
        any = 1;
        qwen3i_push_term(c, QWEN3I_TERM(k, QWEN3I_HOLDS));
    }
    for (k = patterns ? qwen3i_dom_at(c, patterns)->first : 0; k &&
         c->result == QWEN3_OK; k = qwen3i_dom_at(c, k)->next)
        if (qwen3i_dfa_match(c, qwen3i_pattern_dfa(c, k, 2), name) >= 0) {
            any = 1;
            qwen3i_push_term(c, QWEN3I_TERM(k, QWEN3I_HOLDS));
        }
    if (!any && others) qwen3i_push_term(c, QWEN3I_TERM(others, QWEN3I_HOLDS));
}

static int qwen3i_property_value(qwen3i_compiler *c, int rules, qwen3i_str name) {
    int i, k, first = QWEN3I_LEN(int, c->terms);
    QWEN3I_EACH_RULE(i, rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind == QWEN3I_R_GROUP) qwen3i_group_terms(c, r.a, name);
        if (r.kind == QWEN3I_R_EQUAL) {
            k = qwen3i_dom_find(c, r.a, name);
            qwen3i_push_term(c, k ? QWEN3I_TERM(k, QWEN3I_EQUALS) : QWEN3I_NEVER);
        }
        if (r.kind == QWEN3I_R_PROPERTY && qwen3i_same(qwen3i_rule_name(c, &r), name))
            qwen3i_push_term(c, r.b);
        if (r.kind == QWEN3I_R_FORBIDDEN && qwen3i_same(qwen3i_rule_name(c, &r), name))
            qwen3i_push_term(c, QWEN3I_NEVER);
    }
    return qwen3i_pop_terms(c, first);
}

/* The schemas of a list's first items, and of the rest: children of *tuple, and *rest (0: anything). */
static void qwen3i_items_of(qwen3i_compiler *c, int schema, int *tuple, int *rest) {
    const int items = qwen3i_dom_get(c, schema, "items"), prefix = qwen3i_dom_get(c, schema, "prefixItems");
    const int is_tuple = items && qwen3i_dom_at(c, items)->type == '[';
    *tuple = prefix ? prefix : is_tuple ? items : 0;
    *rest = is_tuple && !prefix ? qwen3i_dom_get(c, schema, "additionalItems") : is_tuple ? 0 : items;
}

static int qwen3i_item_value(qwen3i_compiler *c, int rules, int index) {
    int i, k, at, tuple, rest, first = QWEN3I_LEN(int, c->terms);
    QWEN3I_EACH_RULE(i, rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind == QWEN3I_R_ITEM && r.a == index) qwen3i_push_term(c, r.b);
        if (r.kind != QWEN3I_R_GROUP && r.kind != QWEN3I_R_EQUAL) continue;
        if (r.kind == QWEN3I_R_GROUP)
            qwen3i_items_of(c, r.a, &tuple, &rest);
        else { tuple = r.a; rest = QWEN3I_NEVER; }
        for (at = 0, k = tuple ? qwen3i_dom_at(c, tuple)->first : 0; k &&
             at < index; k = qwen3i_dom_at(c, k)->next) at++;
        if (k) qwen3i_push_term(c, QWEN3I_TERM(k, r.kind == QWEN3I_R_GROUP ? QWEN3I_HOLDS : QWEN3I_EQUALS));
        else if (rest == QWEN3I_NEVER) qwen3i_push_term(c, QWEN3I_NEVER);
        else if (rest) qwen3i_push_term(c, QWEN3I_TERM(rest, QWEN3I_HOLDS));
    }
    return qwen3i_pop_terms(c, first);
}

/* The alternatives of a set of terms. */
static qwen3i_span qwen3i_expand(qwen3i_compiler *c, int value) {
    qwen3i_span list = qwen3i_shapes_begin(c);
    qwen3i_shape all;
    int i, n = QWEN3I_ARRAY(qwen3i_span, c->values.spans)[value].n;
    memset(&all, 0, sizeof all);
    all.types = QWEN3I_T_ALL_TYPES;
    qwen3i_shapes_add(c, &list, all);
    for (i = 0; i < n && c->result == QWEN3_OK; i++)
        list = qwen3i_apply(c, list, QWEN3I_ARRAY(int,
                                                  c->values.data)[QWEN3I_ARRAY(qwen3i_span,
                                                          c->values.spans)[value].first + i]);
    return qwen3i_possible(c, list);
}

enum { QWEN3I_UNKNOWN, QWEN3I_ASKED, QWEN3I_SOME, QWEN3I_EMPTY };

/* Is it certain that nothing satisfies these terms? Looks a few levels deep. */
static int qwen3i_is_empty(qwen3i_compiler *c, int value) {
    size_t shapes = c->shapes.n;
    qwen3i_span list;
    if (value < 0) return 1;
    if (c->empties.p[value] != QWEN3I_UNKNOWN) return c->empties.p[value] == QWEN3I_EMPTY;
    if (c->levels >= 6) return 0;
    c->levels++;
    c->empties.p[value] = QWEN3I_ASKED;
    list = qwen3i_expand(c, value);
    c->empties.p[value] = list.n > 0 ? QWEN3I_SOME : QWEN3I_EMPTY;
    c->shapes.n = shapes;
    c->levels--;
    return list.n == 0;
}

static int qwen3i_list_possible(qwen3i_compiler *c, int rules) {
    int i, min = 0, max = INT_MAX;
    QWEN3I_EACH_RULE(i, rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind == QWEN3I_R_MIN_COUNT) min = qwen3i_max(min, r.a);
        if (r.kind == QWEN3I_R_MAX_COUNT) max = qwen3i_min(max, r.a);
        if (r.kind == QWEN3I_R_EQUAL) {
            min = qwen3i_max(min, qwen3i_dom_count(c, r.a));
            max = qwen3i_min(max, qwen3i_dom_count(c, r.a));
        }
    }
    if (min > max) return 0;
    for (i = 0; i < min && i < 8; i++) if (qwen3i_is_empty(c, qwen3i_item_value(c, rules, i))) return 0;
    return 1;
}

static int qwen3i_object_possible(qwen3i_compiler *c, int rules) {
    int i, k;
    QWEN3I_EACH_RULE(i, rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind == QWEN3I_R_REQUIRED && qwen3i_is_empty(c,
                                                           qwen3i_property_value(c, rules,
                                                                   qwen3i_rule_name(c, &r)))) return 0;
        if (r.kind != QWEN3I_R_EQUAL) continue;
        QWEN3I_EACH(k, r.a)
            if (qwen3i_is_empty(c, qwen3i_property_value(c, rules, qwen3i_dom_key(c, k)))) return 0;
    }
    return 1;
}

/* Leave out what is certain to be impossible. */
static qwen3i_span qwen3i_possible(qwen3i_compiler *c, qwen3i_span in) {
    int i;
    qwen3i_span out = qwen3i_shapes_begin(c);
    for (i = 0; i < in.n && c->result == QWEN3_OK; i++) {
        qwen3i_shape s = *qwen3i_shape_at(c, in.first + i);
        if ((s.types & QWEN3I_T_NUMBER) && !qwen3i_scalar_possible(c, s.number, '0'))
            s.types &= ~QWEN3I_T_NUMBER;
        if ((s.types & QWEN3I_T_STRING) && !qwen3i_scalar_possible(c, s.string, '"'))
            s.types &= ~QWEN3I_T_STRING;
        if ((s.types & QWEN3I_T_LIST) && !qwen3i_list_possible(c, s.list)) s.types &= ~QWEN3I_T_LIST;
        if ((s.types & QWEN3I_T_OBJECT) && !qwen3i_object_possible(c, s.object)) s.types &= ~QWEN3I_T_OBJECT;
        qwen3i_shapes_add(c, &out, s);
    }
    return out;
}

/* ---- the machine's parts --------------------------------------------------------------------- */
enum { QWEN3I_END, QWEN3I_RETURN, QWEN3I_LEXEME, QWEN3I_CALL, QWEN3I_CHOICE, QWEN3I_VALUE, QWEN3I_MEMBERS,
       QWEN3I_ITEMS };
typedef struct qwen3i_node {
    /* LEXEME: which; CALL: where, b: a value with no white space before it; CHOICE, VALUE: a list of b nodes
       at a; MEMBERS, ITEMS: which */
    int kind, a, b;
    int next;                           /* LEXEME, CALL: what follows */
    int cost;                           /* bytes of the shortest text from here to the return */
} qwen3i_node;

/* characters of a string; max -1: any; bytes of one; most characters that a state needs to an end */
typedef struct qwen3i_lexeme { int dfa, min, max, loop, quoted, longest; } qwen3i_lexeme;
/* node; bytes of the key with its quotes */
typedef struct qwen3i_property { int value, required, key; } qwen3i_property;
typedef struct qwen3i_object {
    int dfa, members, n_names, n_labels, min, max, n_words, all_open;
    int filler;                         /* bytes of a member that is there only to make up the number */
} qwen3i_object;
/* nodes of the first items at first; of the others */
typedef struct qwen3i_items { int first, n, rest, min, max; } qwen3i_items;

#define QWEN3I_NODE(g, i) (&QWEN3I_ARRAY(qwen3i_node, (g)->nodes)[i])

static int qwen3i_node_add(qwen3i_compiler *c, int kind, int a, int b, int next) {
    qwen3i_node n;
    n.kind = kind; n.a = a; n.b = b; n.next = next;
    n.cost = kind == QWEN3I_END || kind == QWEN3I_RETURN ? 0 : QWEN3I_FAR;
    return qwen3i_fits(c) ? qwen3i_push(c, &c->g->nodes, &n, sizeof n) : 0;
}

/* The lexeme with these parts. */
static int qwen3i_lexeme_add(qwen3i_compiler *c, int dfa, int min, int max) {
    qwen3i_lexeme x, *all = QWEN3I_ARRAY(qwen3i_lexeme, c->g->lexemes);
    int i, n = QWEN3I_LEN(qwen3i_lexeme, c->g->lexemes);
    for (i = 1; i < n; i++) if (all[i].dfa == dfa && all[i].min == min && all[i].max == max) return i;
    x.dfa = dfa; x.min = min; x.max = max; x.loop = 1;
    for (x.longest = i = 0; i < QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas)[dfa].n_states && max >= 0; i++) {
        const int chars = qwen3i_state_at(c->g, dfa, i)->chars;
        if (chars < QWEN3I_FAR) x.longest = qwen3i_max(x.longest, chars);
    }
    x.quoted = dfa && qwen3i_dfa_step(c->g, &QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas)[dfa], 0, '"') >= 0 &&
               c->json &&
               qwen3i_state_at(c->g, dfa, 0)->chars < QWEN3I_FAR;
    return qwen3i_push(c, &c->g->lexemes, &x, sizeof x);
}

static int qwen3i_lexeme_node(qwen3i_compiler *c, int lexeme, int next) {
    return qwen3i_node_add(c, QWEN3I_LEXEME, lexeme, 0, next);
}

/* A finished automaton: 0 if it has no words. */
static int qwen3i_dfa_make(qwen3i_compiler *c, int start) {
    int dfa = start ? qwen3i_determinise(c, start, NULL, NULL) : 0;
    return dfa && qwen3i_dfa_end(c, dfa, 0) ? dfa : 0;
}

/* ---- JSON Schema: strings and numbers -------------------------------------------------------- */
/* of the expressions that were met */
typedef struct qwen3i_pattern { int kind, text, n_text, dfa; } qwen3i_pattern;

/* Strings that match: a "pattern" (0), a "format" (1), the key of a patternProperties (2). Each is made
   once. */
static int qwen3i_pattern_dfa(qwen3i_compiler *c, int node, int format) {
    const qwen3i_str text = format == 2 ? qwen3i_dom_key(c, node) : qwen3i_dom_text(c, node);
    qwen3i_pattern p, *all = QWEN3I_ARRAY(qwen3i_pattern, c->patterns);
    char path[200], expression[4096];
    const char *outer = c->where;
    int i, ast;
    for (i = 0; i < QWEN3I_LEN(qwen3i_pattern, c->patterns); i++)
        if (all[i].kind == (format == 1) && qwen3i_same(qwen3i_slice(c, all[i].text, all[i].n_text), text))
            return all[i].dfa;
    p.kind = format == 1;
    p.text = (int)(text.p - c->text.p);
    p.n_text = (int)text.n;
    c->where = qwen3i_dom_path(c, node, path, sizeof path);
    qwen3i_nfa_reset(c);
    if (format == 1) {
        snprintf(expression, sizeof expression, "^(?:%s)$", qwen3i_text_format_find(text)->expression);
        ast = qwen3i_regex_parse(c, expression, strlen(expression));
    } else ast = qwen3i_regex_parse(c, text.p, text.n);
    p.dfa = qwen3i_dfa_make(c, qwen3i_nfa_open(c, qwen3i_nfa_pattern(c, ast, 0)));
    c->where = outer;
    qwen3i_push(c, &c->patterns, &p, sizeof p);
    return p.dfa;
}

/* The strings of a ONE_OF or NONE_OF rule. */
static int qwen3i_enum_dfa(qwen3i_compiler *c, const qwen3i_rule *r) {
    int k, s = 0, close;
    qwen3i_nfa_reset(c);
    close = qwen3i_nfa_close(c, 0);
    for (k = qwen3i_rule_first(c, r); k && c->result == QWEN3_OK; k = qwen3i_rule_next(c, r, k))
        if (qwen3i_dom_at(c, k)->type == '"')
            s = qwen3i_nfa_split(c, s, qwen3i_nfa_literal(c, qwen3i_dom_text(c, k), close));
    return qwen3i_dfa_make(c, qwen3i_nfa_open(c, s));
}

/* Any string: with all escapes, or only with those that must be. */
static int qwen3i_any_dfa(qwen3i_compiler *c, int canonical) {
    if (c->any_string[canonical]) return c->any_string[canonical];
    qwen3i_nfa_reset(c);
    c->any_string[canonical] = qwen3i_dfa_make(c,
                                               canonical ? qwen3i_nfa_open(c,
                                                       qwen3i_nfa_any(c, qwen3i_nfa_close(c, 0))) :
                                                           qwen3i_nfa_any_string(c));
    return c->any_string[canonical];
}

/* An expression that is ^ one class, repeated, $: then its characters are just counted. */
static int qwen3i_simple_pattern(qwen3i_compiler *c, int node, int *min, int *max) {
    const qwen3i_str text = qwen3i_dom_text(c, node);
    qwen3i_pattern p;
    qwen3i_ast a, part[3];
    int k, n = 0, loop, close, i;
    char path[200];
    const char *outer = c->where;
    c->where = qwen3i_dom_path(c, node, path, sizeof path);
    qwen3i_nfa_reset(c);
    a = *qwen3i_ast_at(c, qwen3i_regex_parse(c, text.p, text.n));
    c->where = outer;
    if (a.kind != QWEN3I_AST_CAT || c->result != QWEN3_OK) return 0;
    for (k = a.child; k && n < 3; k = qwen3i_ast_at(c, k)->next) part[n++] = *qwen3i_ast_at(c, k);
    if (k || n < 3 || part[0].kind != QWEN3I_AST_START || part[2].kind != QWEN3I_AST_END ||
        part[1].kind != QWEN3I_AST_REPEAT ||
        qwen3i_ast_at(c, part[1].child)->kind != QWEN3I_AST_CLASS ||
            (part[1].min < 2 && part[1].max < 2 && part[1].max >= 0)) return 0;
    *min = part[1].min;
    *max = part[1].max;
    for (i = 0; i < QWEN3I_LEN(qwen3i_pattern, c->patterns); i++) {
        p = QWEN3I_ARRAY(qwen3i_pattern, c->patterns)[i];
        if (p.kind == 2 && qwen3i_same(qwen3i_slice(c, p.text, p.n_text), text)) return p.dfa;
    }
    close = qwen3i_nfa_close(c, 0);
    loop = qwen3i_nfa_add(c, QWEN3I_NFA_SPLIT, 0, close);
    k = qwen3i_nfa_class(c, qwen3i_ast_at(c, part[1].child)->set, loop);
    if (c->result != QWEN3_OK) return 0;
    QWEN3I_ARRAY(qwen3i_nfa, c->nfa)[loop].out = k;
    p.dfa = qwen3i_dfa_make(c, qwen3i_nfa_open(c, loop));
    p.kind = 2;
    p.text = (int)(text.p - c->text.p);
    p.n_text = (int)text.n;
    qwen3i_push(c, &c->patterns, &p, sizeof p);
    return p.dfa;
}

/* The strings that keep these rules, as a lexeme; 0: none. */
static int qwen3i_string_lexeme(qwen3i_compiler *c, int rules) {
    int i, min = 0, max = QWEN3I_NO_LIMIT, dfa = 0, n = 0, pattern = 0, low, high, loop = 1;
    QWEN3I_EACH_RULE(i, rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind == QWEN3I_R_MIN_COUNT) min = qwen3i_max(min, r.a);
        else if (r.kind == QWEN3I_R_MAX_COUNT) max = max < 0 ? r.a : qwen3i_min(max, r.a);
        else { n++; pattern = r.kind == QWEN3I_R_PATTERN ? r.a : 0; }
        if (r.kind == QWEN3I_R_FORMAT && qwen3i_is(qwen3i_dom_text(c, r.a), "hostname"))
            max = max < 0 ? 253 : qwen3i_min(max, 253);
    }
    if (n == 0) dfa = qwen3i_any_dfa(c, 0);
    else if (n == 1 && pattern && (dfa = qwen3i_simple_pattern(c, pattern, &low, &high)) != 0) {
        min = qwen3i_max(min, low);
        if (high >= 0) max = max < 0 ? high : qwen3i_min(max, high);
    } else {
        loop = 0;
        dfa = qwen3i_any_dfa(c, 1);
        for (i = rules; i && dfa && c->result == QWEN3_OK; i = qwen3i_rule_at(c, i)->next) {
            const qwen3i_rule r = *qwen3i_rule_at(c, i);
            const int negated = r.kind == QWEN3I_R_NONE_OF || r.kind == QWEN3I_R_NOT_PATTERN ||
                                r.kind == QWEN3I_R_NOT_FORMAT;
            int other;
            if (r.kind == QWEN3I_R_MIN_COUNT || r.kind == QWEN3I_R_MAX_COUNT) continue;
            if (r.kind == QWEN3I_R_ONE_OF || r.kind == QWEN3I_R_NONE_OF) other = qwen3i_enum_dfa(c, &r);
            else other = qwen3i_pattern_dfa(c, r.a, r.kind >= QWEN3I_R_FORMAT);
            if (!other && negated) continue;
            if (!other) return 0;
            dfa = dfa == c->any_string[1] && !negated ? other :
                  qwen3i_product(c, dfa, other, negated ? QWEN3I_AND_NOT : QWEN3I_AND);
        }
    }
    if (max >= 0 && min > max) return 0;
    if (dfa && !loop && min > 0) { dfa = qwen3i_at_least(c, dfa, min); min = 0; }
    if (!dfa || (max >= 0 && qwen3i_state_at(c->g, dfa, 0)->chars - 1 > max)) return 0;
    return qwen3i_lexeme_add(c, dfa, min, max);
}

/* Numbers of the schema as they are written there; canonical: all their ways of writing. */
static int qwen3i_number_enum(qwen3i_compiler *c, const qwen3i_rule *r, int all_ways) {
    qwen3i_bound b;
    int k, s = 0, end;
    qwen3i_nfa_reset(c);
    end = qwen3i_nfa_add(c, QWEN3I_NFA_FINAL, 0, 0);
    for (k = qwen3i_rule_first(c, r); k && c->result == QWEN3_OK; k = qwen3i_rule_next(c, r, k)) {
        const qwen3i_str text = qwen3i_dom_text(c, k);
        if (qwen3i_dom_at(c, k)->type != '0' || !qwen3i_dom_bound(c, k, &b)) continue;
        s = qwen3i_nfa_split(c, s, all_ways ? qwen3i_nfa_equal(c, &b, end) :
                             qwen3i_nfa_text(c, text.p, text.n, end));
        if (!all_ways && b.n_fraction == 0) {
            int whole = qwen3i_nfa_text(c, b.whole, (size_t)b.n_whole, end);
            s = qwen3i_nfa_split(c, s, b.negative ? qwen3i_nfa_minus(c, whole) : whole);
        }
    }
    return qwen3i_dfa_make(c, s);
}

static int qwen3i_limit_dfa(qwen3i_compiler *c, const qwen3i_rule *r) {
    qwen3i_bound b;
    if (!qwen3i_dom_bound(c, r->a, &b)) return 0;
    qwen3i_nfa_reset(c);
    return qwen3i_dfa_make(c, qwen3i_nfa_limit(c, &b, r->kind == QWEN3I_R_MIN, !r->b,
                                               qwen3i_nfa_add(c, QWEN3I_NFA_FINAL, 0, 0)));
}

static int qwen3i_multiple_dfa(qwen3i_compiler *c, int node) {
    qwen3i_bound b;
    int i, m = 0;
    if (!qwen3i_want_type(c, node, '0', "a number") || !qwen3i_dom_bound(c, node, &b)) return 0;
    if (b.negative || (b.n_whole == 1 && b.whole[0] == '0' && b.n_fraction == 0))
        return qwen3i_schema_bad(c, node, QWEN3_ERR_FORMAT, "multipleOf is not above 0");
    for (i = 0; i < b.n_whole && m < 100000; i++) m = m * 10 + (b.whole[i] - '0');
    if (b.n_fraction > 0 || m > 4000)
        return qwen3i_schema_bad(c, node, QWEN3_ERR_UNSUPPORTED,
                                 "multipleOf is supported for whole numbers up to 4000");
    qwen3i_nfa_reset(c);
    return qwen3i_dfa_make(c, qwen3i_nfa_multiple(c, m, qwen3i_nfa_add(c, QWEN3I_NFA_FINAL, 0, 0)));
}

/* All numbers. places: see qwen3i_nfa_number. */
static int qwen3i_base_number(qwen3i_compiler *c, int whole, int places) {
    int dfa;
    if (places == 0 && c->number_dfas[whole]) return c->number_dfas[whole];
    qwen3i_nfa_reset(c);
    dfa = qwen3i_dfa_make(c, qwen3i_nfa_number(c, whole, places, qwen3i_nfa_add(c, QWEN3I_NFA_FINAL, 0, 0)));
    if (places == 0) c->number_dfas[whole] = dfa;
    return dfa;
}

/* The numbers that keep these rules; 0: none. */
static int qwen3i_number_dfa(qwen3i_compiler *c, int rules) {
    int i, whole = 0, exact = 0, dfa, other;
    QWEN3I_EACH_RULE(i, rules) {
        const int kind = qwen3i_rule_at(c, i)->kind;
        whole |= kind == QWEN3I_R_WHOLE || kind == QWEN3I_R_MULTIPLE;
        exact |= kind != QWEN3I_R_WHOLE && kind != QWEN3I_R_MULTIPLE && kind != QWEN3I_R_ONE_OF;
    }
    /* few enough digits that a double tells them apart */
    dfa = qwen3i_base_number(c, whole, exact && !whole ? 12 : 0);
    for (i = rules; i && dfa && c->result == QWEN3_OK; i = qwen3i_rule_at(c, i)->next) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        int mode = QWEN3I_AND;
        if (r.kind == QWEN3I_R_WHOLE) continue;
        if (r.kind == QWEN3I_R_MIN || r.kind == QWEN3I_R_MAX) other = qwen3i_limit_dfa(c, &r);
        else if (r.kind == QWEN3I_R_MULTIPLE) other = qwen3i_multiple_dfa(c, r.a);
        else if (r.kind == QWEN3I_R_NOT_WHOLE) {
            qwen3i_bound zero;
            memset(&zero, 0, sizeof zero);
            qwen3i_nfa_reset(c);
            other = qwen3i_nfa_fraction_above(c, &zero, 0, qwen3i_nfa_add(c, QWEN3I_NFA_FINAL, 0, 0));
            other = qwen3i_nfa_whole(c, other);
            other = qwen3i_dfa_make(c, qwen3i_nfa_split(c, other, qwen3i_nfa_minus(c, other)));
        } else {
            other = qwen3i_number_enum(c, &r, r.kind == QWEN3I_R_NONE_OF);
            if (r.kind == QWEN3I_R_NONE_OF) mode = QWEN3I_AND_NOT;
        }
        if (!other && mode == QWEN3I_AND_NOT) continue;
        dfa = other ? qwen3i_product(c, dfa, other, mode) : 0;
    }
    return dfa;
}

/* ---- JSON Schema: objects and lists ---------------------------------------------------------- */
/* The node of a set of terms; its alternatives follow later. */
static int qwen3i_value_node(qwen3i_compiler *c, int value) {
    int *node;
    if (value < 0 || c->result != QWEN3_OK) return 0;
    node = &QWEN3I_ARRAY(int, c->value_nodes)[value];
    if (*node) return *node;
    *node = qwen3i_node_add(c, QWEN3I_VALUE, 0, 0, QWEN3I_RETURN);
    qwen3i_push_int(c, &c->pending, value);
    return c->result == QWEN3_OK ? QWEN3I_ARRAY(int, c->value_nodes)[value] : 0;
}

typedef struct qwen3i_keys {            /* of one object, while its automaton is made */
    qwen3i_buf names;                   /* qwen3i_str, in order */
    qwen3i_buf members;                 /* qwen3i_property: the names', then one for each kind of other key */
    qwen3i_buf patterns;                /* the nodes of patternProperties, by mark */
    int rules, n_names;
} qwen3i_keys;

static void qwen3i_keys_add(qwen3i_compiler *c, qwen3i_keys *k, qwen3i_str name) {
    qwen3i_push(c, &k->names, &name, sizeof name);
}

static void qwen3i_keys_of(qwen3i_compiler *c, qwen3i_keys *k, int object, int patterns) {
    int i;
    for (i = object ? qwen3i_dom_at(c, object)->first : 0; i; i = qwen3i_dom_at(c, i)->next) {
        if (patterns) qwen3i_push_int(c, &k->patterns, i);
        else qwen3i_keys_add(c, k, qwen3i_dom_key(c, i));
    }
}

/* As JSON writes them: what is escaped comes with the backslash. */
static int qwen3i_key_byte(unsigned char x) {
    return x < 0x20 || x == '"' || x == '\\' ? '\\' * 256 + x : x * 256;
}

static int qwen3i_compare_keys(const void *a, const void *b) {
    const qwen3i_str x = *(const qwen3i_str *)a, y = *(const qwen3i_str *)b;
    size_t i;
    for (i = 0; i < x.n && i < y.n; i++)
        if (x.p[i] != y.p[i])
            return qwen3i_key_byte((unsigned char)x.p[i]) - qwen3i_key_byte((unsigned char)y.p[i]);
    return (x.n > y.n) - (x.n < y.n);
}

/* All names that an object's rules mention, and its patterns. */
static void qwen3i_keys_collect(qwen3i_compiler *c, qwen3i_keys *k) {
    qwen3i_str *names;
    int i, n, kept = 0;
    QWEN3I_EACH_RULE(i, k->rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind == QWEN3I_R_GROUP) {
            qwen3i_keys_of(c, k, qwen3i_dom_get(c, r.a, "properties"), 0);
            qwen3i_keys_of(c, k, qwen3i_dom_get(c, r.a, "patternProperties"), 1);
        }
        if (r.kind == QWEN3I_R_EQUAL) qwen3i_keys_of(c, k, r.a, 0);
        if (r.kind == QWEN3I_R_PROPERTY || r.kind == QWEN3I_R_REQUIRED || r.kind == QWEN3I_R_FORBIDDEN)
            qwen3i_keys_add(c, k, qwen3i_rule_name(c, &r));
    }
    names = QWEN3I_ARRAY(qwen3i_str, k->names);
    n = QWEN3I_LEN(qwen3i_str, k->names);
    qwen3i_sort(names, (size_t)n, sizeof *names, qwen3i_compare_keys);
    for (i = 0; i < n; i++)
        if (kept == 0 || !qwen3i_same(names[i], names[kept - 1])) names[kept++] = names[i];
    k->n_names = kept;
}

static int qwen3i_key_required(qwen3i_compiler *c, int rules, qwen3i_str name) {
    int i;
    QWEN3I_EACH_RULE(i, rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind == QWEN3I_R_REQUIRED && qwen3i_same(qwen3i_rule_name(c, &r), name)) return 1;
        if (r.kind == QWEN3I_R_EQUAL && qwen3i_dom_find(c, r.a, name)) return 1;
    }
    return 0;
}

static int qwen3i_key_cost(qwen3i_str s) {
    int n = 2;
    size_t i;
    for (i = 0; i < s.n; i++) n += (unsigned char)s.p[i] < 0x20 ? 6 : s.p[i] == '"' || s.p[i] == '\\' ? 2 : 1;
    return n;
}

/* What a key that has no name must have as its value, by the patterns (marks) that it matches. */
static int qwen3i_other_value(qwen3i_compiler *c, const qwen3i_keys *k, const int *marks, int n) {
    int i, m, matched, first = QWEN3I_LEN(int, c->terms);
    QWEN3I_EACH_RULE(i, k->rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        int others, patterns;
        if (r.kind == QWEN3I_R_EQUAL) qwen3i_push_term(c, QWEN3I_NEVER);
        if (r.kind != QWEN3I_R_GROUP) continue;
        patterns = qwen3i_dom_get(c, r.a, "patternProperties");
        for (matched = m = 0; m < n; m++) {
            const int at = marks[m] - k->n_names, node = at >= 0 &&
                           at < QWEN3I_LEN(int, k->patterns) ? QWEN3I_ARRAY(int, k->patterns)[at] : 0;
            if (!node || qwen3i_dom_at(c, node)->parent != patterns) continue;
            matched = 1;
            qwen3i_push_term(c, QWEN3I_TERM(node, QWEN3I_HOLDS));
        }
        others = qwen3i_dom_get(c, r.a, "additionalProperties");
        if (!matched && others) qwen3i_push_term(c, QWEN3I_TERM(others, QWEN3I_HOLDS));
    }
    return qwen3i_pop_terms(c, first);
}

static int qwen3i_key_label(qwen3i_compiler *c, const int *marks, int n, void *user) {
    qwen3i_keys *k = (qwen3i_keys *)user;
    qwen3i_property m;
    int i;
    for (i = 0; i < n; i++)
        if (marks[i] < k->n_names)
            return QWEN3I_ARRAY(qwen3i_property, k->members)[marks[i]].value ? marks[i] : -1;
    memset(&m, 0, sizeof m);
    m.value = qwen3i_value_node(c, qwen3i_other_value(c, k, marks, n));
    if (!m.value) return -1;
    for (i = k->n_names; i < QWEN3I_LEN(qwen3i_property, k->members); i++)
        if (QWEN3I_ARRAY(qwen3i_property, k->members)[i].value == m.value) return i;
    return qwen3i_push(c, &k->members, &m, sizeof m);
}

/* The automaton of an object's keys, with their quotes. */
static int qwen3i_keys_dfa(qwen3i_compiler *c, qwen3i_keys *k) {
    int i, s = 0, n_patterns = QWEN3I_LEN(int, k->patterns), zero = 0;
    const int any = qwen3i_other_value(c, k, &zero, 0);
    qwen3i_nfa_reset(c);
    for (i = 0; i < k->n_names && c->result == QWEN3_OK; i++)
        s = qwen3i_nfa_split(c, s, qwen3i_nfa_literal(c, QWEN3I_ARRAY(qwen3i_str, k->names)[i],
                                                      qwen3i_nfa_close(c, i)));
    for (i = 0; i < n_patterns && c->result == QWEN3_OK; i++) {
        const int node = QWEN3I_ARRAY(int, k->patterns)[i];
        const qwen3i_str text = qwen3i_dom_key(c, node);
        char path[200];
        c->where = qwen3i_dom_path(c, node, path, sizeof path);
        s = qwen3i_nfa_split(c, s, qwen3i_nfa_pattern(c, qwen3i_regex_parse(c, text.p, text.n),
                                                      k->n_names + i));
        c->where = NULL;
    }
    if (any >= 0) s = qwen3i_nfa_split(c, s, qwen3i_nfa_any(c, qwen3i_nfa_close(c, k->n_names + n_patterns)));
    s = qwen3i_nfa_open(c, s);
    return s && c->result == QWEN3_OK ? qwen3i_determinise(c, s, qwen3i_key_label, k) : 0;
}

/* The strings that a schema allows, as one automaton; 0: none. */
static int qwen3i_value_strings(qwen3i_compiler *c, int node) {
    int first = QWEN3I_LEN(int, c->terms), value, i, dfa = 0;
    qwen3i_span list;
    qwen3i_push_term(c, QWEN3I_TERM(node, QWEN3I_HOLDS));
    value = qwen3i_pop_terms(c, first);
    if (value < 0) return 0;
    list = qwen3i_expand(c, value);
    for (i = 0; i < list.n && c->result == QWEN3_OK; i++) {
        const qwen3i_shape s = *qwen3i_shape_at(c, list.first + i);
        qwen3i_lexeme x;
        int lexeme = s.types & QWEN3I_T_STRING ? qwen3i_string_lexeme(c, s.string) : 0;
        if (!lexeme) continue;
        x = QWEN3I_ARRAY(qwen3i_lexeme, c->g->lexemes)[lexeme];
        if (x.max >= 0 && x.max < 1 << 20)
            return qwen3i_schema_bad(c, node, QWEN3_ERR_UNSUPPORTED, "maxLength of names is not supported");
        if (x.min > 0) x.dfa = qwen3i_at_least(c, x.dfa, x.min);
        dfa = dfa ? qwen3i_product(c, dfa, x.dfa, QWEN3I_OR) : x.dfa;
    }
    return dfa;
}

/* Make the keys of an object what propertyNames says, too. */
static int qwen3i_keys_named(qwen3i_compiler *c, int rules, int dfa) {
    int i, other;
    for (i = rules; i && dfa && c->result == QWEN3_OK; i = qwen3i_rule_at(c, i)->next) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind != QWEN3I_R_NAMES) continue;
        other = qwen3i_value_strings(c, r.a);
        if (!other) return 0;
        qwen3i_dfa_end(c, dfa, 0);
        dfa = qwen3i_product(c, dfa, other, QWEN3I_AND);
    }
    return dfa;
}

static int qwen3i_object_node(qwen3i_compiler *c, int rules) {
    qwen3i_object o;
    qwen3i_keys k;
    qwen3i_property m;
    int i, node = 0;
    memset(&o, 0, sizeof o);
    memset(&k, 0, sizeof k);
    k.names = k.members = k.patterns = qwen3i_buf_make(&c->g->allocator);
    k.rules = rules;
    o.max = QWEN3I_NO_LIMIT;
    QWEN3I_EACH_RULE(i, rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind == QWEN3I_R_MIN_COUNT) o.min = qwen3i_max(o.min, r.a);
        if (r.kind == QWEN3I_R_MAX_COUNT) o.max = o.max < 0 ? r.a : qwen3i_min(o.max, r.a);
    }
    qwen3i_keys_collect(c, &k);
    for (i = 0; i < k.n_names && c->result == QWEN3_OK; i++) {
        const qwen3i_str name = QWEN3I_ARRAY(qwen3i_str, k.names)[i];
        m.value = qwen3i_value_node(c, qwen3i_property_value(c, rules, name));
        m.required = qwen3i_key_required(c, rules, name);
        m.key = qwen3i_key_cost(name);
        qwen3i_push(c, &k.members, &m, sizeof m);
    }
    o.dfa = qwen3i_keys_named(c, rules, qwen3i_keys_dfa(c, &k));
    if (o.dfa) qwen3i_dfa_end(c, o.dfa, k.n_names);
    o.n_names = k.n_names;
    o.n_labels = QWEN3I_LEN(qwen3i_property, k.members);
    o.n_words = (k.n_names + 1 + 31) / 32;          /* one more: was there any other key */
    o.members = QWEN3I_LEN(qwen3i_property, c->g->members);
    /* names that propertyNames forbids are not there */
    for (i = 0; i < o.n_names && c->result == QWEN3_OK; i++) {
        qwen3i_property *p = &QWEN3I_ARRAY(qwen3i_property, k.members)[i];
        if (qwen3i_dfa_match(c, o.dfa, QWEN3I_ARRAY(qwen3i_str, k.names)[i]) < 0) p->value = 0;
    }
    qwen3i_append_all(c, &c->g->members, k.members.p, k.members.n);
    node = qwen3i_node_add(c, QWEN3I_MEMBERS, qwen3i_push(c, &c->g->objects, &o, sizeof o), 0, QWEN3I_RETURN);
    qwen3i_buf_free(&k.names);
    qwen3i_buf_free(&k.members);
    qwen3i_buf_free(&k.patterns);
    return node;
}

#define QWEN3I_MAX_TUPLE 4096

static int qwen3i_list_node(qwen3i_compiler *c, int rules) {
    qwen3i_items items;
    int i, tuple, rest, n = 0;
    items.first = 0; items.min = 0; items.max = QWEN3I_NO_LIMIT;
    QWEN3I_EACH_RULE(i, rules) {
        const qwen3i_rule r = *qwen3i_rule_at(c, i);
        if (r.kind == QWEN3I_R_MIN_COUNT) items.min = qwen3i_max(items.min, r.a);
        if (r.kind == QWEN3I_R_MAX_COUNT) items.max = items.max < 0 ? r.a : qwen3i_min(items.max, r.a);
        if (r.kind == QWEN3I_R_ITEM) n = qwen3i_max(n, r.a + 1);
        if (r.kind == QWEN3I_R_GROUP) qwen3i_items_of(c, r.a, &tuple, &rest);
        else if (r.kind == QWEN3I_R_EQUAL) {
            tuple = r.a;
            items.min = qwen3i_max(items.min, qwen3i_dom_count(c, r.a));
        }
        else continue;
        if (tuple) n = qwen3i_max(n, qwen3i_dom_count(c, tuple));
    }
    if (n > QWEN3I_MAX_TUPLE)
        return qwen3i_reject(c, QWEN3_ERR_UNSUPPORTED, "%s: a list with more than %d places",
                             c->where ? c->where : "/", QWEN3I_MAX_TUPLE);
    items.n = n;
    items.rest = qwen3i_value_node(c, qwen3i_item_value(c, rules, n));
    for (i = 0; i < n && c->result == QWEN3_OK; i++) {
        int at, node = qwen3i_value_node(c, qwen3i_item_value(c, rules, i));
        at = qwen3i_push_int(c, &c->g->lists, node);
        if (i == 0) items.first = at;
    }
    return qwen3i_node_add(c, QWEN3I_ITEMS, qwen3i_push(c, &c->g->arrays, &items, sizeof items), 0,
                           QWEN3I_RETURN);
}

/* ---- JSON Schema: values --------------------------------------------------------------------- */
/* null, false and true, as far as they are among the types. */
static int qwen3i_word_lexeme(qwen3i_compiler *c, int types) {
    static const struct { int type; const char *text; } words[] = {{QWEN3I_T_NULL, "null"},
                                                                   {QWEN3I_T_FALSE, "false"},
                                                                           {QWEN3I_T_TRUE, "true"}};
    int i, s = 0, end;
    if (!c->words[types]) {
        qwen3i_nfa_reset(c);
        end = qwen3i_nfa_add(c, QWEN3I_NFA_FINAL, 0, 0);
        for (i = 0; i < 3; i++)
            if (types & words[i].type)
                s = qwen3i_nfa_split(c, s, qwen3i_nfa_text(c, words[i].text, strlen(words[i].text), end));
        c->words[types] = qwen3i_lexeme_add(c, qwen3i_dfa_make(c, s), 0, QWEN3I_NO_LIMIT);
    }
    return c->words[types];
}

/* The lexemes of the strings of all alternatives: those without counters become one. */
static void qwen3i_value_lexemes(qwen3i_compiler *c, qwen3i_span list, qwen3i_buf *nodes) {
    int i, dfa = 0, numbers = 0, any = 0, first = QWEN3I_LEN(int, *nodes);
    for (i = 0; i < list.n && c->result == QWEN3_OK; i++) {
        const qwen3i_shape s = *qwen3i_shape_at(c, list.first + i);
        qwen3i_lexeme x;
        int lexeme;
        if (s.types & QWEN3I_T_NUMBER) {
            int other = numbers && numbers == c->number_dfas[0] ? 0 : qwen3i_number_dfa(c, s.number);
            numbers = !other || other == numbers ? numbers : !numbers || other == c->number_dfas[0] ? other :
                      qwen3i_product(c, numbers, other, QWEN3I_OR);
        }
        lexeme = (s.types & QWEN3I_T_STRING) && !any ? qwen3i_string_lexeme(c, s.string) : 0;
        if (!lexeme) continue;
        x = QWEN3I_ARRAY(qwen3i_lexeme, c->g->lexemes)[lexeme];
        any |= x.dfa == c->any_string[0] && x.min == 0 && x.max < 0;
        if (any) { dfa = x.dfa; nodes->n = (size_t)first * sizeof(int); }
        else if (x.min > 0 || x.max >= 0)
            qwen3i_push_int(c, nodes, qwen3i_lexeme_node(c, lexeme, QWEN3I_RETURN));
        else dfa = dfa && dfa != x.dfa ? qwen3i_product(c, dfa, x.dfa, QWEN3I_OR) : x.dfa;
    }
    if (dfa)
        qwen3i_push_int(c, nodes, qwen3i_lexeme_node(c, qwen3i_lexeme_add(c, dfa, 0, QWEN3I_NO_LIMIT),
                                                     QWEN3I_RETURN));
    if (numbers)
        qwen3i_push_int(c, nodes, qwen3i_lexeme_node(c, qwen3i_lexeme_add(c, numbers, 0, QWEN3I_NO_LIMIT),
                                                     QWEN3I_RETURN));
}

static void qwen3i_value_build(qwen3i_compiler *c, int value) {
    qwen3i_buf nodes = qwen3i_buf_make(&c->g->allocator);
    qwen3i_span list;
    qwen3i_node *node;
    int i, types = 0, first;
    c->shapes.n = 0;
    list = qwen3i_expand(c, value);
    for (i = 0; i < list.n; i++) types |= qwen3i_shape_at(c, list.first + i)->types & 7;
    if (types && c->result == QWEN3_OK)
        qwen3i_push_int(c, &nodes, qwen3i_lexeme_node(c, qwen3i_word_lexeme(c, types), QWEN3I_RETURN));
    qwen3i_value_lexemes(c, list, &nodes);
    for (i = 0; i < list.n && c->result == QWEN3_OK; i++) {
        const qwen3i_shape s = *qwen3i_shape_at(c, list.first + i);
        int k, again = 0;
        for (k = 0; k < i; k++) {
            const qwen3i_shape o = *qwen3i_shape_at(c, list.first + k);
            if ((o.types & QWEN3I_T_OBJECT) && o.object == s.object) again |= QWEN3I_T_OBJECT;
            if ((o.types & QWEN3I_T_LIST) && o.list == s.list) again |= QWEN3I_T_LIST;
        }
        if (s.types & ~again & QWEN3I_T_OBJECT) qwen3i_push_int(c, &nodes, qwen3i_object_node(c, s.object));
        if (s.types & ~again & QWEN3I_T_LIST) qwen3i_push_int(c, &nodes, qwen3i_list_node(c, s.list));
    }
    first = QWEN3I_LEN(int, c->g->lists);
    qwen3i_append_all(c, &c->g->lists, nodes.p, nodes.n);
    if (c->result == QWEN3_OK) {
        node = QWEN3I_NODE(c->g, QWEN3I_ARRAY(int, c->value_nodes)[value]);
        node->a = first;
        node->b = QWEN3I_LEN(int, nodes);
    }
    qwen3i_buf_free(&nodes);
}

/* ---- costs: the fewest bytes to an end ------------------------------------------------------- */
static int qwen3i_object_cost(const qwen3_grammar *g, qwen3i_object *o) {
    const qwen3i_property *m = QWEN3I_ARRAY(qwen3i_property, g->members) + o->members;
    const int open = o->dfa ? qwen3i_state_at(g, o->dfa, 0)->open : QWEN3I_FAR;
    int i, cost = 2, n = 0, available = 0, other = 0;
    o->filler = 0;
    for (i = 0; i < o->n_labels; i++) {
        const int value = m[i].value ? QWEN3I_NODE(g, m[i].value)->cost : QWEN3I_FAR;
        const int all = qwen3i_near(i < o->n_names ? m[i].key : open, qwen3i_near(value, 1));
        if (m[i].required) { n++; cost = qwen3i_near(cost, all + (n > 1)); }
        else if (all < QWEN3I_FAR) {
            if (i < o->n_names) available++;
            else other = 1;
            o->filler = qwen3i_max(o->filler, all + 1);
        }
    }
    if (o->max >= 0 && n > o->max) return QWEN3I_FAR;
    if (o->min > n && available + other < o->min - n) return QWEN3I_FAR;
    return o->min > n ? qwen3i_near(cost, (o->min - n) * o->filler - (n == 0)) : cost;
}

static int qwen3i_list_cost(const qwen3_grammar *g, qwen3i_items *a) {
    int i, cost = 2;
    if (a->max >= 0 && a->min > a->max) return QWEN3I_FAR;
    for (i = 0; i < a->n && i < a->min; i++)
        cost = qwen3i_near(cost, QWEN3I_NODE(g, QWEN3I_ARRAY(int, g->lists)[a->first + i])->cost + (i > 0));
    if (a->min > a->n) {
        const int64_t rest = a->rest ? QWEN3I_NODE(g, a->rest)->cost : QWEN3I_FAR,
                      more = (rest + 1) * (a->min - a->n);
        cost = more >= QWEN3I_FAR ? QWEN3I_FAR : qwen3i_near(cost, (int)more - (a->n == 0));
    }
    return cost;
}

static int qwen3i_lexeme_cost(const qwen3_grammar *g, const qwen3i_lexeme *x) {
    return x->dfa ? qwen3i_near(qwen3i_state_at(g, x->dfa, 0)->distance,
                                qwen3i_min(x->min, QWEN3I_FAR / 4) * x->loop) : QWEN3I_FAR;
}

static int qwen3i_node_cost(const qwen3_grammar *g, const qwen3i_node *n) {
    int i, cost = QWEN3I_FAR;
    switch (n->kind) {
        case QWEN3I_LEXEME:
            return qwen3i_near(qwen3i_lexeme_cost(g, &QWEN3I_ARRAY(qwen3i_lexeme, g->lexemes)[n->a]),
                               QWEN3I_NODE(g, n->next)->cost);
        case QWEN3I_CALL:   return qwen3i_near(QWEN3I_NODE(g, n->a)->cost, QWEN3I_NODE(g, n->next)->cost);
        case QWEN3I_CHOICE: case QWEN3I_VALUE:
            for (i = 0; i < n->b; i++)
                cost = qwen3i_min(cost, QWEN3I_NODE(g, QWEN3I_ARRAY(int, g->lists)[n->a + i])->cost);
            return cost;
        case QWEN3I_MEMBERS: return qwen3i_object_cost(g, &QWEN3I_ARRAY(qwen3i_object, g->objects)[n->a]);
        case QWEN3I_ITEMS:  return qwen3i_list_cost(g, &QWEN3I_ARRAY(qwen3i_items, g->arrays)[n->a]);
        default:            return n->cost;
    }
}

static void qwen3i_costs(qwen3i_compiler *c) {
    const qwen3_grammar *g = c->g;
    int i, changed, n = QWEN3I_LEN(qwen3i_node, g->nodes);
    do for (changed = 0, i = n - 1; i >= 0 && qwen3i_spend(c, 4); i--) {
        const int cost = qwen3i_node_cost(g, QWEN3I_NODE(g, i));
        changed |= cost < QWEN3I_NODE(g, i)->cost;
        QWEN3I_NODE(g, i)->cost = qwen3i_min(cost, QWEN3I_NODE(g, i)->cost);
    } while (changed && c->result == QWEN3_OK);
}

/* Take out what can never end: members whose values cannot, places of lists. */
static void qwen3i_prune_object(qwen3i_compiler *c, qwen3i_object *o) {
    qwen3i_property *m = QWEN3I_ARRAY(qwen3i_property, c->g->members) + o->members;
    const qwen3i_dfa d = QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas)[o->dfa];
    int i;
    for (i = 0; i < o->n_labels; i++)
        if (m[i].value && QWEN3I_NODE(c->g, m[i].value)->cost >= QWEN3I_FAR) m[i].value = 0;
    for (i = 0; i < d.n_states; i++) {
        qwen3i_state *s = &QWEN3I_ARRAY(qwen3i_state, c->g->states)[d.first + i];
        if (s->final && !m[s->label].value) s->final = 0;
    }
    if (o->dfa && !qwen3i_dfa_end(c, o->dfa, o->n_names)) o->dfa = 0;
    for (i = 0, o->all_open = o->dfa != 0; i < d.n_states && o->dfa; i++) {
        const qwen3i_state *s = qwen3i_state_at(c->g, o->dfa, i);
        if (s->distance < QWEN3I_FAR && !s->final && s->open >= QWEN3I_FAR) o->all_open = 0;
    }
}

static void qwen3i_prune_list(const qwen3_grammar *g, qwen3i_items *a) {
    int i;
    if (a->rest && QWEN3I_NODE(g, a->rest)->cost >= QWEN3I_FAR) a->rest = 0;
    if (!a->rest) a->max = a->max < 0 ? a->n : qwen3i_min(a->max, a->n);
    for (i = 0; i < a->n; i++) {
        const int item = QWEN3I_ARRAY(int, g->lists)[a->first + i];
        if (item && QWEN3I_NODE(g, item)->cost < QWEN3I_FAR) continue;
        a->max = a->max < 0 ? i : qwen3i_min(a->max, i);
        return;
    }
}

static void qwen3i_prune_choice(const qwen3_grammar *g, qwen3i_node *n) {
    int i, kept = 0, *list = QWEN3I_ARRAY(int, g->lists) + n->a;
    for (i = 0; i < n->b; i++) if (QWEN3I_NODE(g, list[i])->cost < QWEN3I_FAR) list[kept++] = list[i];
    n->b = kept;
}

static void qwen3i_fast_rows(qwen3i_compiler *c, int dfa) {
    const qwen3i_dfa d = QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas)[dfa];
    int i;
    for (i = 0; i < d.n_states && c->result == QWEN3_OK; i++) {
        qwen3i_state *s = &QWEN3I_ARRAY(qwen3i_state, c->g->states)[d.first + i];
        if (s->row < 0) qwen3i_dfa_row(c, s);
    }
}

/* Costs, pruning, and quick rows for the automata that remain. */
static void qwen3i_finish(qwen3i_compiler *c) {
    qwen3_grammar *g = c->g;
    int i;
    qwen3i_costs(c);
    for (i = 1; i < QWEN3I_LEN(qwen3i_object, g->objects) && c->result == QWEN3_OK; i++) {
        qwen3i_prune_object(c, &QWEN3I_ARRAY(qwen3i_object, g->objects)[i]);
        qwen3i_fast_rows(c, QWEN3I_ARRAY(qwen3i_object, g->objects)[i].dfa);
    }
    for (i = 1; i < QWEN3I_LEN(qwen3i_items, g->arrays) && c->result == QWEN3_OK; i++)
        qwen3i_prune_list(g, &QWEN3I_ARRAY(qwen3i_items, g->arrays)[i]);
    for (i = 0; i < QWEN3I_LEN(qwen3i_node, g->nodes) && c->result == QWEN3_OK; i++)
        if (QWEN3I_NODE(g, i)->kind == QWEN3I_VALUE || QWEN3I_NODE(g, i)->kind == QWEN3I_CHOICE)
            qwen3i_prune_choice(g, QWEN3I_NODE(g, i));
    for (i = 1; i < QWEN3I_LEN(qwen3i_lexeme, g->lexemes) && c->result == QWEN3_OK; i++)
        qwen3i_fast_rows(c, QWEN3I_ARRAY(qwen3i_lexeme, g->lexemes)[i].dfa);
}

/* The node of what satisfies one or two schemas (0: none). */
static int qwen3i_schema_node(qwen3i_compiler *c, int schema, int other) {
    const int first = QWEN3I_LEN(int, c->terms);
    int value;
    if (c->result != QWEN3_OK) return 0;
    if (schema) qwen3i_push_term(c, QWEN3I_TERM(schema, QWEN3I_HOLDS));
    if (other) qwen3i_push_term(c, QWEN3I_TERM(other, QWEN3I_HOLDS));
    value = qwen3i_pop_terms(c, first);
    if (value < 0) return qwen3i_schema_bad(c, schema, QWEN3_ERR_FORMAT, "nothing satisfies this schema");
    return qwen3i_value_node(c, value);
}

/* Make the values that nodes stand for, and those that they ask for. */
static void qwen3i_build_pending(qwen3i_compiler *c) {
    int i;
    for (i = 0; c->result == QWEN3_OK && i < QWEN3I_LEN(int, c->pending) && qwen3i_spend(c, 1); i++)
        qwen3i_value_build(c, QWEN3I_ARRAY(int, c->pending)[i]);
}

static int qwen3i_compile_schema(qwen3i_compiler *c, const char *text, size_t n) {
    int root;
    c->json = 1;
    qwen3i_dom_read(c, text, n);
    root = qwen3i_schema_node(c, 1, 0);
    qwen3i_build_pending(c);
    return root;
}

/* ---- tools: calls as the chat template has them ---------------------------------------------- */
#define QWEN3I_MAX_TOOLS 250            /* the machine follows as many ways */

static int qwen3i_text_node(qwen3i_compiler *c, const char *before, qwen3i_str name, const char *behind,
                            int next) {
    int s;
    qwen3i_nfa_reset(c);
    s = qwen3i_nfa_text(c, behind, strlen(behind), qwen3i_nfa_add(c, QWEN3I_NFA_FINAL, 0, 0));
    s = qwen3i_nfa_text(c, before, strlen(before), qwen3i_nfa_literal(c, name, s));
    return qwen3i_lexeme_node(c, qwen3i_lexeme_add(c, qwen3i_dfa_make(c, s), 0, QWEN3I_NO_LIMIT), next);
}

/* The node of calls of one tool; 0: it is another one than the one that is wanted. */
static int qwen3i_tool_node(qwen3i_compiler *c, int tool, const char *only, int object, int tail) {
    const int f = qwen3i_dom_get(c, tool, "function") ? qwen3i_dom_get(c, tool, "function") : tool,
              name = qwen3i_dom_get(c, f, "name"), parameters = qwen3i_dom_get(c, f, "parameters");
    int node;
    if (!name || qwen3i_dom_at(c, name)->type != '"')
        return qwen3i_schema_bad(c, f, QWEN3_ERR_FORMAT, "a tool has a \"name\"");
    if (only && !qwen3i_is(qwen3i_dom_text(c, name), only)) return 0;
    qwen3i_dom_at(c, parameters)->is_root = 1;
    node = qwen3i_schema_node(c, parameters, object);
    node = qwen3i_node_add(c, QWEN3I_CALL, node, 1, tail);
    return qwen3i_text_node(c, "\n{\"name\": \"", qwen3i_dom_text(c, name), "\", \"arguments\": ", node);
}

/* only: NULL, or the name of the only tool that counts. */
static int qwen3i_compile_tools(qwen3i_compiler *c, const char *text, size_t n, const char *only) {
    static const char object[] = "{\"type\":\"object\"}";
    int nodes[QWEN3I_MAX_TOOLS], n_nodes = 0, i, k, tail, is_object;
    qwen3i_str none;
    none.p = "";
    none.n = 0;
    c->json = 1;
    qwen3i_dom_read(c, text, n);
    is_object = qwen3i_dom_read(c, object, sizeof object - 1);
    if (c->result != QWEN3_OK || !qwen3i_want_type(c, 1, '[', "a list of tools")) return 0;
    tail = qwen3i_text_node(c, "}\n", none, "", QWEN3I_RETURN);
    for (k = qwen3i_dom_at(c, 1)->first; k && c->result == QWEN3_OK; k = qwen3i_dom_at(c, k)->next) {
        const int node = qwen3i_tool_node(c, k, only, is_object, tail);
        if (node && n_nodes == QWEN3I_MAX_TOOLS)
            return qwen3i_reject(c, QWEN3_ERR_UNSUPPORTED, "more than %d tools", QWEN3I_MAX_TOOLS);
        if (node) nodes[n_nodes++] = node;
    }
    if (c->result == QWEN3_OK && n_nodes == 0)
        return qwen3i_reject(c, QWEN3_ERR_ARG, "there is no tool %s", only ? only : "at all");
    k = QWEN3I_LEN(int, c->g->lists);
    for (i = 0; i < n_nodes; i++) qwen3i_push_int(c, &c->g->lists, nodes[i]);
    k = qwen3i_node_add(c, QWEN3I_CHOICE, k, n_nodes, 0);
    qwen3i_build_pending(c);
    return k;
}

/* ---- GBNF: llama.cpp's notation -------------------------------------------------------------- */
/* of a GBNF grammar */
typedef struct qwen3i_rule_of { qwen3i_str name; int ast, node, state; } qwen3i_rule_of;
enum { QWEN3I_NOT_SEEN, QWEN3I_SEEING, QWEN3I_REGULAR, QWEN3I_RECURSIVE };

static qwen3i_rule_of *qwen3i_bnf_rule(const qwen3i_compiler *c, int i) {
    return &QWEN3I_ARRAY(qwen3i_rule_of, c->bnf)[i];
}

static int qwen3i_bnf_bad(qwen3i_regex *r, const char *what) {
    return qwen3i_regex_bad(r, QWEN3_ERR_FORMAT, what);
}

static int qwen3i_bnf_letter(char x) {
    return (x >= 'a' && x <= 'z') || (x >= 'A' && x <= 'Z') || (x >= '0' && x <= '9') || x == '-' || x == '_';
}

static qwen3i_str qwen3i_bnf_name(qwen3i_regex *r) {
    qwen3i_str s;
    s.p = r->p;
    while (r->p < r->end && qwen3i_bnf_letter(*r->p)) r->p++;
    s.n = (size_t)(r->p - s.p);
    return s;
}

/* The number of a rule, which may be defined later. */
static int qwen3i_bnf_find(qwen3i_compiler *c, qwen3i_str name) {
    qwen3i_rule_of rule;
    int i, n = QWEN3I_LEN(qwen3i_rule_of, c->bnf);
    for (i = 0; i < n; i++) if (qwen3i_same(qwen3i_bnf_rule(c, i)->name, name)) return i;
    memset(&rule, 0, sizeof rule);
    rule.name = name;
    qwen3i_spend(c, n);
    return qwen3i_push(c, &c->bnf, &rule, sizeof rule);
}

static int qwen3i_bnf_literal(qwen3i_regex *r) {
    int first = 0, last = 0, a;
    uint32_t code;
    for (r->p++; r->p < r->end && *r->p != '"' && r->c->result == QWEN3_OK; last = a) {
        if (*r->p == '\\') { r->p++; code = qwen3i_regex_escape(r, 1); }
        else r->p += qwen3i_utf8_get(r->p, r->end, &code);
        a = qwen3i_ast_char(r->c, code);
        if (r->c->result != QWEN3_OK) return 0;
        if (last) qwen3i_ast_at(r->c, last)->next = a; else first = a;
    }
    if (r->p >= r->end) return qwen3i_bnf_bad(r, "a text is not closed");
    r->p++;
    return qwen3i_ast_add(r->c, first ? QWEN3I_AST_CAT : QWEN3I_AST_EMPTY, first);
}

static int qwen3i_bnf_item(qwen3i_regex *r) {
    int a;
    if (*r->p == '"') return qwen3i_bnf_literal(r);
    if (*r->p == '[') { r->p++; return qwen3i_ast_class(r->c, qwen3i_regex_set(r)); }
    if (*r->p == '.') { r->p++; return qwen3i_ast_class(r->c, qwen3i_set_of(r->c, 0, 0x10FFFF)); }
    if (*r->p == '(') { r->p++; return qwen3i_regex_group(r); }
    if (!qwen3i_bnf_letter(*r->p)) return qwen3i_bnf_bad(r, "a text, a class, a name or ( was expected");
    a = qwen3i_ast_add(r->c, QWEN3I_AST_RULE, 0);
    if (r->c->result == QWEN3_OK) qwen3i_ast_at(r->c, a)->min = qwen3i_bnf_find(r->c, qwen3i_bnf_name(r));
    return a;
}

static void qwen3i_bnf_parse(qwen3i_compiler *c, const char *text, size_t n) {
    qwen3i_regex r = qwen3i_regex_begin(c, text, n, 1);
    int rule, a;
    for (qwen3i_bnf_space(&r, 1); r.p < r.end && c->result == QWEN3_OK; qwen3i_bnf_space(&r, 1)) {
        const qwen3i_str name = qwen3i_bnf_name(&r);
        if (name.n == 0) { qwen3i_bnf_bad(&r, "a rule's name was expected"); return; }
        rule = qwen3i_bnf_find(c, name);
        qwen3i_bnf_space(&r, 0);
        if (r.end - r.p < 3 || memcmp(r.p, "::=", 3) != 0) { qwen3i_bnf_bad(&r, "::= was expected"); return; }
        r.p += 3;
        qwen3i_bnf_space(&r, 1);
        a = qwen3i_regex_alternatives(&r, 0);
        if (c->result != QWEN3_OK) return;
        if (qwen3i_bnf_rule(c, rule)->ast) { qwen3i_bnf_bad(&r, "a rule is defined twice"); return; }
        qwen3i_bnf_rule(c, rule)->ast = a;
        if (r.p < r.end && *r.p == ')') { qwen3i_bnf_bad(&r, "a ) is too many"); return; }
    }
}

/* Is what an expression describes regular: does no rule in it come back to itself? Such are made one
   automaton. */
static int qwen3i_bnf_regular(qwen3i_compiler *c, int ast, int depth) {
    const qwen3i_ast a = *qwen3i_ast_at(c, ast);
    qwen3i_rule_of *rule;
    int k, regular = 1;
    if (depth > 1500) return qwen3i_reject(c, QWEN3_ERR_UNSUPPORTED, "rules are nested too deeply");
    if (!qwen3i_spend(c, 1)) return 0;
    if (a.kind != QWEN3I_AST_RULE) {
        for (k = a.child; k; k = a.kind == QWEN3I_AST_REPEAT ? 0 : qwen3i_ast_at(c, k)->next)
            regular &= qwen3i_bnf_regular(c, k, depth + 1);
        return regular;
    }
    rule = qwen3i_bnf_rule(c, a.min);
    if (!rule->ast)
        return qwen3i_reject(c, QWEN3_ERR_FORMAT, "rule \"%.*s\" is not defined",
                             (int)qwen3i_min_size(rule->name.n, 80), rule->name.p);
    if (rule->state == QWEN3I_NOT_SEEN) {
        rule->state = QWEN3I_SEEING;
        regular = qwen3i_bnf_regular(c, rule->ast, depth + 1);
        rule->state = regular ? QWEN3I_REGULAR : QWEN3I_RECURSIVE;
    }
    return rule->state == QWEN3I_REGULAR;
}

static int qwen3i_ast_nfa_rule(qwen3i_compiler *c, int rule, int out) {
    return qwen3i_ast_nfa(c, qwen3i_bnf_rule(c, rule)->ast, out);
}

static int qwen3i_bnf_node(qwen3i_compiler *c, int ast, int next);

/* A lexeme for a sequence of regular expressions: n of them from `child` on. */
static int qwen3i_bnf_lexeme(qwen3i_compiler *c, int child, int n, int next) {
    int i, s;
    qwen3i_nfa_reset(c);
    s = qwen3i_nfa_add(c, QWEN3I_NFA_FINAL, 0, 0);
    for (i = 0; i < n; i++, child = qwen3i_ast_at(c, child)->next) qwen3i_push_int(c, &c->stack, child);
    for (i = 0; i < n && c->result == QWEN3_OK; i++) {
        c->stack.n -= sizeof(int);
        s = qwen3i_ast_nfa(c, QWEN3I_ARRAY(int, c->stack)[c->stack.n / sizeof(int)], s);
    }
    return qwen3i_lexeme_node(c, qwen3i_lexeme_add(c, qwen3i_dfa_make(c, s), 0, QWEN3I_NO_LIMIT), next);
}

/* The parts of a sequence from `child` on: as long as they are regular, one lexeme. */
static int qwen3i_bnf_parts(qwen3i_compiler *c, int child, int next) {
    int k, n = 0, rest;
    if (!child || c->result != QWEN3_OK) return next;
    for (k = child; k && qwen3i_bnf_regular(c, k, 0); k = qwen3i_ast_at(c, k)->next) n++;
    if (n > 0) return qwen3i_bnf_lexeme(c, child, n, k ? qwen3i_bnf_parts(c, k, next) : next);
    rest = qwen3i_bnf_parts(c, qwen3i_ast_at(c, child)->next, next);
    return qwen3i_bnf_node(c, child, rest);
}

static int qwen3i_bnf_choice(qwen3i_compiler *c, const int *list, int n) {
    int i, first = QWEN3I_LEN(int, c->g->lists);
    for (i = 0; i < n; i++) qwen3i_push_int(c, &c->g->lists, list[i]);
    return qwen3i_node_add(c, QWEN3I_CHOICE, first, n, 0);
}

static int qwen3i_bnf_repeat(qwen3i_compiler *c, const qwen3i_ast a, int next) {
    int k, s = next, pair[2] = {0, 0};
    if (a.max == QWEN3I_NO_LIMIT) {
        pair[1] = next;
        s = qwen3i_bnf_choice(c, pair, 2);
        k = qwen3i_bnf_node(c, a.child, s);
        if (c->result == QWEN3_OK) QWEN3I_ARRAY(int, c->g->lists)[QWEN3I_NODE(c->g, s)->a] = k;
    } else for (k = a.min; k < a.max && qwen3i_spend(c, 64); k++) {
        pair[0] = qwen3i_bnf_node(c, a.child, s);
        pair[1] = next;
        s = qwen3i_bnf_choice(c, pair, 2);
    }
    for (k = 0; k < a.min && qwen3i_spend(c, 64); k++) s = qwen3i_bnf_node(c, a.child, s);
    return s;
}

/* The machine's part for an expression that is followed by `next`. */
static int qwen3i_bnf_node(qwen3i_compiler *c, int ast, int next) {
    const qwen3i_ast a = *qwen3i_ast_at(c, ast);
    int k, n = 0, first, node;
    if (!qwen3i_spend(c, 64)) return 0;
    if (qwen3i_bnf_regular(c, ast, 0)) return qwen3i_bnf_lexeme(c, ast, 1, next);
    if (a.kind == QWEN3I_AST_CAT) return qwen3i_bnf_parts(c, a.child, next);
    if (a.kind == QWEN3I_AST_REPEAT) return qwen3i_bnf_repeat(c, a, next);
    if (a.kind == QWEN3I_AST_RULE)
        return qwen3i_node_add(c, QWEN3I_CALL, qwen3i_bnf_rule(c, a.min)->node, 0, next);
    for (k = a.child; k; k = qwen3i_ast_at(c, k)->next) n++;
    for (first = QWEN3I_LEN(int, c->g->lists), k = 0; k < n; k++) qwen3i_push_int(c, &c->g->lists, 0);
    for (n = 0, k = a.child; k && c->result == QWEN3_OK; k = qwen3i_ast_at(c, k)->next, n++) {
        node = qwen3i_bnf_node(c, k, next);
        if (c->result == QWEN3_OK) QWEN3I_ARRAY(int, c->g->lists)[first + n] = node;
    }
    return qwen3i_node_add(c, QWEN3I_CHOICE, first, n, 0);
}

static int qwen3i_compile_bnf(qwen3i_compiler *c, const char *text, size_t n) {
    qwen3i_str root;
    int i, start, n_rules;
    root.p = "root";
    root.n = 4;
    c->keeps_ast = 1;
    qwen3i_nfa_reset(c);
    qwen3i_ast_add(c, 0, 0);
    start = qwen3i_bnf_find(c, root);
    qwen3i_bnf_parse(c, text, n);
    n_rules = QWEN3I_LEN(qwen3i_rule_of, c->bnf);
    if (c->result == QWEN3_OK && !qwen3i_bnf_rule(c, start)->ast)
        qwen3i_reject(c, QWEN3_ERR_FORMAT, "there is no rule \"root\"");
    for (i = 0; i < n_rules && c->result == QWEN3_OK; i++) {
        qwen3i_push_int(c, &c->g->lists, 0);
        qwen3i_bnf_rule(c, i)->node = qwen3i_node_add(c, QWEN3I_CHOICE, QWEN3I_LEN(int, c->g->lists) - 1, 1,
                                                      i);
        if (!qwen3i_bnf_rule(c, i)->ast)
            qwen3i_reject(c, QWEN3_ERR_FORMAT, "rule \"%.*s\" is not defined",
                          (int)qwen3i_min_size(qwen3i_bnf_rule(c, i)->name.n, 80),
                              qwen3i_bnf_rule(c, i)->name.p);
    }
    for (i = 0; i < n_rules && c->result == QWEN3_OK; i++) {
        qwen3i_rule_of *rule = qwen3i_bnf_rule(c, i);
        int node;
        if (qwen3i_bnf_regular(c, rule->ast, 0) && i != start) continue;   /* they are part of lexemes */
        node = qwen3i_bnf_node(c, rule->ast, QWEN3I_RETURN);
        if (c->result == QWEN3_OK)
            QWEN3I_ARRAY(int, c->g->lists)[QWEN3I_NODE(c->g, qwen3i_bnf_rule(c, i)->node)->a] = node;
    }
    return c->result == QWEN3_OK ? qwen3i_bnf_rule(c, start)->node : 0;
}

/* Does a way without bytes lead from a node back to it? Then the machine would not end: a left recursion. */
static int qwen3i_bnf_loops(qwen3i_compiler *c, int node, unsigned char *seen, int depth) {
    const qwen3_grammar *g = c->g;
    const qwen3i_node *n = QWEN3I_NODE(g, node);
    int i, loops = 0;
    if (seen[node] == QWEN3I_SEEING || depth > 3000) return 1;
    if (seen[node]) return 0;
    seen[node] = QWEN3I_SEEING;
    if (n->kind == QWEN3I_CHOICE)
        for (i = 0; i < n->b && !loops; i++)
            loops = qwen3i_bnf_loops(c, QWEN3I_ARRAY(int, g->lists)[n->a + i], seen, depth + 1);
    if (n->kind == QWEN3I_CALL) {
        loops = qwen3i_bnf_loops(c, n->a, seen, depth + 1);
        if (!loops && QWEN3I_NODE(g, n->a)->cost == 0) loops = qwen3i_bnf_loops(c, n->next, seen, depth + 1);
    }
    if (n->kind == QWEN3I_LEXEME && qwen3i_lexeme_cost(g,
                                                       &QWEN3I_ARRAY(qwen3i_lexeme, g->lexemes)[n->a]) == 0)
        loops = qwen3i_bnf_loops(c, n->next, seen, depth + 1);
    seen[node] = QWEN3I_REGULAR;
    return loops;
}

static void qwen3i_bnf_check(qwen3i_compiler *c) {
    const qwen3_grammar *g = c->g;
    const size_t n = g->nodes.n / sizeof(qwen3i_node);
    unsigned char *seen = c->result == QWEN3_OK ? (unsigned char *)qwen3i_alloc_zero(&g->allocator, n, 1) :
                          NULL;
    int i;
    if (c->result == QWEN3_OK && !seen) qwen3i_out_of_memory(c);
    for (i = 0; i < QWEN3I_LEN(qwen3i_rule_of, c->bnf) && c->result == QWEN3_OK; i++) {
        const qwen3i_rule_of *rule = qwen3i_bnf_rule(c, i);
        if (qwen3i_bnf_loops(c, rule->node, seen, 0))
            qwen3i_reject(c, QWEN3_ERR_UNSUPPORTED,
                          "rule \"%.*s\": left recursion, or a repetition of nothing",
                              (int)qwen3i_min_size(rule->name.n, 80), rule->name.p);
    }
    qwen3i_free(&g->allocator, seen, n);
}

#define QWEN3I_MAX_WAYS 8192

/* ---- running the machine --------------------------------------------------------------------- */
/* where in an object or list */
enum { QWEN3I_FIRST, QWEN3I_KEY, QWEN3I_IN_KEY, QWEN3I_COLON, QWEN3I_NEXT };
/* the parts of a frame; then its bits */
enum { QWEN3I_UP, QWEN3I_AT, QWEN3I_COUNT_OF, QWEN3I_COST, QWEN3I_SEEN };

typedef struct qwen3i_thread {
    int node, phase;
    /* of the automaton; VALUE: 1: no white space before it; COLON: the value's node */
    int state;
    int count;                          /* characters of the string, bytes of the key */
    int frame;                          /* what it returns to; -1: the end */
} qwen3i_thread;

typedef struct qwen3i_machine {         /* a set of threads is a slice of the pool */
    const qwen3_grammar *g;
    int           *frames;              /* records; each names an earlier one or -1 */
    int            n_frames, cap_frames;
    qwen3i_thread *pool;
    int            n_pool, cap_pool, base;  /* base: of the set that is being made */
    int            ways;                /* followed without a byte, in this step: bounds hostile grammars */
} qwen3i_machine;

static const qwen3i_object *qwen3i_object_of(const qwen3_grammar *g, int node) {
    return &QWEN3I_ARRAY(qwen3i_object, g->objects)[QWEN3I_NODE(g, node)->a];
}
static const qwen3i_items *qwen3i_items_at(const qwen3_grammar *g, int node) {
    return &QWEN3I_ARRAY(qwen3i_items, g->arrays)[QWEN3I_NODE(g, node)->a];
}
static int qwen3i_frame_size(const qwen3_grammar *g, int node) {
    return QWEN3I_SEEN + (QWEN3I_NODE(g, node)->kind == QWEN3I_MEMBERS ? qwen3i_object_of(g, node)->n_words :
                          0);
}
static int qwen3i_after(const qwen3i_machine *m, int frame) {
    return frame < 0 ? 0 : m->frames[frame + QWEN3I_COST];
}

/* Are two frames, and all that they return to, the same? */
static int qwen3i_frame_same(const qwen3i_machine *m, int a, int b) {
    while (a != b) {
        const int *x = m->frames + a, *y = m->frames + b;
        if (a < 0 || b < 0 || x[QWEN3I_AT] != y[QWEN3I_AT]) return 0;
        if (memcmp(x + QWEN3I_COUNT_OF, y + QWEN3I_COUNT_OF,
                   ((size_t)qwen3i_frame_size(m->g, x[QWEN3I_AT]) - QWEN3I_COUNT_OF) *
                       sizeof *x) != 0) return 0;
        a = x[QWEN3I_UP];
        b = y[QWEN3I_UP];
    }
    return 1;
}

/* Add a thread to the set being made, unless it is there. What does not fit is left out: less is allowed,
   never more. */
static void qwen3i_thread_add(qwen3i_machine *m, int node, int phase, int state, int count, int frame) {
    qwen3i_thread *t;
    int i;
    for (i = m->base; i < m->n_pool; i++) {
        t = &m->pool[i];
        if (t->node == node && t->phase == phase && t->state == state && t->count == count &&
            qwen3i_frame_same(m, t->frame, frame)) return;
    }
    if (m->n_pool == m->cap_pool || m->n_pool - m->base >= 256) return;
    t = &m->pool[m->n_pool++];
    t->node = node; t->phase = phase; t->state = state; t->count = count; t->frame = frame;
}

/* A new frame, a copy of another one if from >= 0; -1: there is no room. */
static int qwen3i_frame_new(qwen3i_machine *m, int up, int node, int from) {
    const int size = qwen3i_frame_size(m->g, node), at = m->n_frames;
    if (size > m->cap_frames - at) return -1;
    m->n_frames += size;
    if (from >= 0) memcpy(m->frames + at, m->frames + from, (size_t)size * sizeof(int));
    else memset(m->frames + at, 0, (size_t)size * sizeof(int));
    m->frames[at + QWEN3I_UP] = up;
    m->frames[at + QWEN3I_AT] = node;
    return at;
}

/* ---- objects: which keys may still come ------------------------------------------------------ */
static int qwen3i_seen(const int *frame, int i) {
    return (int)((unsigned)frame[QWEN3I_SEEN + i / 32] >> (i % 32) & 1u);
}

/* Members that must still come: required ones, and enough to make up the number. *distinct: keys that differ
   for sure. */
static int qwen3i_needed(const qwen3_grammar *g, const int *frame, int *distinct) {
    const qwen3i_object *o = qwen3i_object_of(g, frame[QWEN3I_AT]);
    const qwen3i_property *m = QWEN3I_ARRAY(qwen3i_property, g->members) + o->members;
    int i, required = 0;
    *distinct = qwen3i_seen(frame, o->n_names);
    for (i = 0; i < o->n_names; i++) {
        if (qwen3i_seen(frame, i)) ++*distinct;
        else required += m[i].required;
    }
    return qwen3i_max(required, o->min - *distinct);
}

/* May a key with this label come now? */
static int qwen3i_key_allowed(const qwen3_grammar *g, const int *frame, int label) {
    const qwen3i_object *o = qwen3i_object_of(g, frame[QWEN3I_AT]);
    const qwen3i_property *m = QWEN3I_ARRAY(qwen3i_property, g->members) + o->members;
    int distinct, needed, is_new = 1;
    if (!m[label].value || (label < o->n_names && qwen3i_seen(frame, label))) return 0;
    if (o->max < 0) return 1;
    needed = qwen3i_needed(g, frame, &distinct);
    if (label >= o->n_names) is_new = !qwen3i_seen(frame, o->n_names);
    if (m[label].required || (is_new && o->min - distinct == needed && needed > 0)) {
        int i, required = 0;
        for (i = 0; i < o->n_names; i++) required += m[i].required && !qwen3i_seen(frame, i);
        needed = qwen3i_max(required - m[label].required, o->min - distinct - is_new);
    }
    return qwen3i_max(needed, 0) <= o->max - frame[QWEN3I_COUNT_OF] - 1;
}

/* May any of the keys come that are within reach of this state? */
static int qwen3i_key_alive(const qwen3_grammar *g, const int *frame, const qwen3i_object *o,
                            const qwen3i_state *s) {
    int i;
    if (s->open < QWEN3I_FAR) {
        if (o->max < 0) return 1;
        for (i = o->n_names; i < o->n_labels; i++) if (qwen3i_key_allowed(g, frame, i)) return 1;
    }
    for (i = s->low; i < s->high; i++) if (qwen3i_key_allowed(g, frame, i)) return 1;
    return 0;
}

static int qwen3i_member_cost(const qwen3_grammar *g, const qwen3i_property *m, int key) {
    return qwen3i_near(key + 1, m->value ? QWEN3I_NODE(g, m->value)->cost : QWEN3I_FAR);
}

/* Bytes from after a value in this frame to the end. */
static void qwen3i_frame_cost(qwen3i_machine *m, int at) {
    const qwen3_grammar *g = m->g;
    int *f = m->frames + at, cost = qwen3i_after(m, f[QWEN3I_UP]), i, distinct, needed;
    const qwen3i_node *n = QWEN3I_NODE(g, f[QWEN3I_AT]);
    if (n->kind == QWEN3I_MEMBERS) {
        const qwen3i_object *o = qwen3i_object_of(g, f[QWEN3I_AT]);
        const qwen3i_property *all = QWEN3I_ARRAY(qwen3i_property, g->members) + o->members;
        needed = qwen3i_needed(g, f, &distinct);
        for (i = 0; i < o->n_names; i++)
            if (all[i].required && !qwen3i_seen(f, i)) {
                needed--;
                cost = qwen3i_near(cost, 1 + qwen3i_member_cost(g, &all[i], all[i].key));
            }
        cost = qwen3i_near(cost, 1 + qwen3i_max(needed, 0) * o->filler);
    } else if (n->kind == QWEN3I_ITEMS) {
        const qwen3i_items *a = qwen3i_items_at(g, f[QWEN3I_AT]);
        int64_t more;
        for (i = f[QWEN3I_COUNT_OF]; i < a->n && i < a->min; i++)
            cost = qwen3i_near(cost, 1 + QWEN3I_NODE(g, QWEN3I_ARRAY(int, g->lists)[a->first + i])->cost);
        more = i < a->min && a->rest ? (int64_t)(a->min - i) * (1 + QWEN3I_NODE(g, a->rest)->cost) : 0;
        cost = more >= QWEN3I_FAR ? QWEN3I_FAR : qwen3i_near(cost, 1 + (int)more);
    } else cost = qwen3i_near(cost, QWEN3I_NODE(g, n->next)->cost);
    f[QWEN3I_COST] = cost;
}

/* ---- steps ----------------------------------------------------------------------------------- */
/* A value has ended; go on in what it is part of. */
static void qwen3i_proceed(qwen3i_machine *m, int node, int frame, int depth);

static void qwen3i_resume(qwen3i_machine *m, int frame, int depth) {
    int node;
    if (frame < 0) { qwen3i_thread_add(m, 0, 0, 0, 0, -1); return; }
    node = m->frames[frame + QWEN3I_AT];
    if (QWEN3I_NODE(m->g, node)->kind == QWEN3I_CALL) { qwen3i_proceed(m, QWEN3I_NODE(m->g, node)->next, m->frames[frame + QWEN3I_UP], depth + 1); return; }
    qwen3i_thread_add(m, node, QWEN3I_NEXT, 0, 0, frame);
}

/* Go to a node, on to where bytes are wanted. */
static void qwen3i_proceed(qwen3i_machine *m, int node, int frame, int depth) {
    const qwen3i_node *n = QWEN3I_NODE(m->g, node);
    int i, at;
    if (depth > 256 || ++m->ways > QWEN3I_MAX_WAYS) return;
    switch (n->kind) {
        case QWEN3I_RETURN: qwen3i_resume(m, frame, depth + 1); return;
        case QWEN3I_CHOICE:
            for (i = 0; i < n->b; i++)
                qwen3i_proceed(m, QWEN3I_ARRAY(int, m->g->lists)[n->a + i], frame, depth + 1);
            return;
        case QWEN3I_CALL:
            if (QWEN3I_NODE(m->g, n->next)->kind == QWEN3I_RETURN) {
                qwen3i_proceed(m, n->a, frame, depth + 1);
                return;
            }
            at = qwen3i_frame_new(m, frame, node, -1);
            if (at < 0) return;
            qwen3i_frame_cost(m, at);
            if (n->b) qwen3i_thread_add(m, n->a, 0, 1, 0, at);
            else qwen3i_proceed(m, n->a, at, depth + 1);
            return;
        case QWEN3I_LEXEME: {
            const int dfa = QWEN3I_ARRAY(qwen3i_lexeme, m->g->lexemes)[n->a].dfa;
            const qwen3i_state *s = qwen3i_state_at(m->g, dfa, 0);
            if (s->n_edges) qwen3i_thread_add(m, node, 0, 0, -1, frame);
            if (s->final) qwen3i_proceed(m, n->next, frame, depth + 1);
            return;
        }
        default: qwen3i_thread_add(m, node, 0, 0, 0, frame);
    }
}

/* One byte within a lexeme. Returns its new state and count in t, or 0. */
static int qwen3i_lexeme_step(const qwen3_grammar *g, const qwen3i_lexeme *x, unsigned char byte, int *state,
                              int *count, const qwen3i_state **out) {
    const qwen3i_dfa *d = &QWEN3I_ARRAY(qwen3i_dfa, g->dfas)[x->dfa];
    const qwen3i_state *s;
    *state = qwen3i_dfa_step(g, d, *state, byte);
    if (*state < 0) return 0;
    *out = s = &QWEN3I_ARRAY(qwen3i_state, g->states)[d->first + *state];
    if (x->max < 0 && x->min == 0) return 1;
    if (s->final) return *count >= x->min;
    *count += s->boundary;
    return x->max < 0 || *count + s->chars <= x->max;
}

static void qwen3i_step_lexeme(qwen3i_machine *m, const qwen3i_thread t, unsigned char byte) {
    const qwen3i_node *n = QWEN3I_NODE(m->g, t.node);
    const qwen3i_state *s;
    int state = t.state, count = t.count;
    if (!qwen3i_lexeme_step(m->g, &QWEN3I_ARRAY(qwen3i_lexeme, m->g->lexemes)[n->a], byte, &state, &count,
                            &s)) return;
    if (s->n_edges) qwen3i_thread_add(m, t.node, 0, state, count, t.frame);
    if (s->final) qwen3i_proceed(m, n->next, t.frame, 0);
}

#define QWEN3I_MAX_BLANKS 120           /* in a run of white space, and one newline: models can get lost in more */
#define QWEN3I_NEWLINE    1000

/* White space between the parts of JSON: does the thread stay where it is? Its count is that of the run. */
static int qwen3i_step_space(qwen3i_machine *m, const qwen3i_thread t, unsigned char byte) {
    int count = t.count;
    if (byte != ' ' && byte != '\n' && byte != '\r' && byte != '\t') return 0;
    if (m->g->flags & QWEN3_GRAMMAR_COMPACT) return 1;
    if (byte == '\n') count = count < QWEN3I_NEWLINE ? QWEN3I_NEWLINE : -1;
    else if (byte != '\r') count = count % QWEN3I_NEWLINE < QWEN3I_MAX_BLANKS ? count + 1 : -1;
    if (count >= 0) qwen3i_thread_add(m, t.node, t.phase, t.state, count, t.frame);
    return 1;
}

/* The key has ended: remember it, and want its colon. */
static void qwen3i_key_end(qwen3i_machine *m, const qwen3i_thread t, int label) {
    const qwen3i_object *o = qwen3i_object_of(m->g, t.node);
    const qwen3i_property *member = &QWEN3I_ARRAY(qwen3i_property, m->g->members)[o->members + label];
    const int bit = qwen3i_min(label, o->n_names);
    int at;
    if (!qwen3i_key_allowed(m->g, m->frames + t.frame, label)) return;
    at = qwen3i_frame_new(m, m->frames[t.frame + QWEN3I_UP], t.node, t.frame);
    if (at < 0) return;
    if (o->max >= 0) m->frames[at + QWEN3I_COUNT_OF]++;
    m->frames[at + QWEN3I_SEEN + bit / 32] = (int)((unsigned)m->frames[at + QWEN3I_SEEN + bit / 32] |
                                                   1u << (bit % 32));
    qwen3i_frame_cost(m, at);
    qwen3i_thread_add(m, t.node, QWEN3I_COLON, member->value, 0, at);
}

static void qwen3i_step_key(qwen3i_machine *m, const qwen3i_thread t, unsigned char byte) {
    const qwen3i_object *o = qwen3i_object_of(m->g, t.node);
    int state = o->dfa ? qwen3i_dfa_step(m->g, &QWEN3I_ARRAY(qwen3i_dfa, m->g->dfas)[o->dfa], t.state,
                                         byte) : -1;
    const qwen3i_state *s;
    if (state < 0) return;
    s = qwen3i_state_at(m->g, o->dfa, state);
    if (s->final) qwen3i_key_end(m, t, s->label);
    else if (qwen3i_key_alive(m->g, m->frames + t.frame, o, s))
        qwen3i_thread_add(m, t.node, QWEN3I_IN_KEY, state, t.count + 1, t.frame);
}

static void qwen3i_step_object(qwen3i_machine *m, const qwen3i_thread t, unsigned char byte) {
    const qwen3i_object *o = qwen3i_object_of(m->g, t.node);
    const int *frame = m->frames + t.frame;
    int distinct;
    if (t.phase != QWEN3I_IN_KEY && qwen3i_step_space(m, t, byte)) return;
    if (t.phase == QWEN3I_COLON) { if (byte == ':') qwen3i_thread_add(m, t.state, 0, 0, 0, t.frame); return; }
    if (t.phase == QWEN3I_NEXT && byte == ',' && o->dfa && (o->max < 0 || frame[QWEN3I_COUNT_OF] < o->max) &&
        qwen3i_key_alive(m->g, frame, o, qwen3i_state_at(m->g, o->dfa, 0)))
        qwen3i_thread_add(m, t.node, QWEN3I_KEY, 0, 0, t.frame);
    if ((t.phase == QWEN3I_NEXT || t.phase == QWEN3I_FIRST) && byte == '}' &&
        qwen3i_needed(m->g, frame, &distinct) <= 0)
        qwen3i_resume(m, frame[QWEN3I_UP], 0);
    if (t.phase == QWEN3I_IN_KEY) qwen3i_step_key(m, t, byte);
    else if (byte == '"' && t.phase != QWEN3I_NEXT) {
        qwen3i_thread opened = t;
        opened.state = opened.count = 0;
        qwen3i_step_key(m, opened, byte);
    }
}

/* The node of a list's next item; 0: none may follow. */
static int qwen3i_next_item(const qwen3_grammar *g, const qwen3i_items *a, int count) {
    if (a->max >= 0 && count >= a->max) return 0;
    return count < a->n ? QWEN3I_ARRAY(int, g->lists)[a->first + count] : a->rest;
}

/* Begin the next item of a list, if one may follow: the frame counts those that have begun. */
static void qwen3i_begin_item(qwen3i_machine *m, int node, int frame) {
    const qwen3i_items *a = qwen3i_items_at(m->g, node);
    const int count = m->frames[frame + QWEN3I_COUNT_OF], item = qwen3i_next_item(m->g, a, count);
    /* beyond, the number does not matter */
    const int most = qwen3i_max(qwen3i_max(a->n, a->min), a->max);
    int at = frame;
    if (!item) return;
    if (count < most) at = qwen3i_frame_new(m, m->frames[frame + QWEN3I_UP], node, frame);
    if (at < 0) return;
    if (at != frame) { m->frames[at + QWEN3I_COUNT_OF]++; qwen3i_frame_cost(m, at); }
    qwen3i_thread_add(m, item, 0, 0, 0, at);
}

static void qwen3i_step_list(qwen3i_machine *m, const qwen3i_thread t, unsigned char byte) {
    const qwen3i_items *a = qwen3i_items_at(m->g, t.node);
    const int *frame = m->frames + t.frame;
    if (qwen3i_step_space(m, t, byte)) return;
    if (byte == ']' && frame[QWEN3I_COUNT_OF] >= a->min) qwen3i_resume(m, frame[QWEN3I_UP], 0);
    if (byte == ',' && t.phase == QWEN3I_NEXT) qwen3i_begin_item(m, t.node, t.frame);
}

/* The first byte of a value. */
static void qwen3i_step_value(qwen3i_machine *m, const qwen3i_thread t, unsigned char byte) {
    const qwen3i_node *n = QWEN3I_NODE(m->g, t.node);
    int i, at;
    if (t.state == 0 && qwen3i_step_space(m, t, byte)) return;
    for (i = 0; i < n->b; i++) {
        qwen3i_thread entry;
        const int node = QWEN3I_ARRAY(int, m->g->lists)[n->a + i], kind = QWEN3I_NODE(m->g, node)->kind;
        entry.node = node; entry.phase = 0; entry.state = 0; entry.count = -1; entry.frame = t.frame;
        if (kind == QWEN3I_LEXEME) qwen3i_step_lexeme(m, entry, byte);
        if (byte != (kind == QWEN3I_MEMBERS ? '{' : '[') || kind == QWEN3I_LEXEME) continue;
        at = qwen3i_frame_new(m, t.frame, node, -1);
        if (at < 0) continue;
        qwen3i_frame_cost(m, at);
        if (kind == QWEN3I_MEMBERS || qwen3i_items_at(m->g, node)->min == 0) qwen3i_thread_add(m, node, QWEN3I_FIRST, 0, 0, at);
        if (kind == QWEN3I_ITEMS) qwen3i_begin_item(m, node, at);
    }
}

static void qwen3i_step_thread(qwen3i_machine *m, const qwen3i_thread t, unsigned char byte) {
    switch (QWEN3I_NODE(m->g, t.node)->kind) {
        case QWEN3I_LEXEME:  qwen3i_step_lexeme(m, t, byte); break;
        case QWEN3I_VALUE:   qwen3i_step_value(m, t, byte); break;
        case QWEN3I_MEMBERS: qwen3i_step_object(m, t, byte); break;
        case QWEN3I_ITEMS:   qwen3i_step_list(m, t, byte); break;
        default: break;
    }
}

/* The set after a byte, on top of the pool: how many threads. */
static int qwen3i_advance(qwen3i_machine *m, qwen3i_span set, unsigned char byte) {
    int i;
    m->base = m->n_pool;
    m->ways = 0;
    for (i = 0; i < set.n; i++) qwen3i_step_thread(m, m->pool[set.first + i], byte);
    return m->n_pool - m->base;
}

/* ---- the shortest way to the end ------------------------------------------------------------- */
static int qwen3i_key_cost_from(const qwen3i_machine *m, const qwen3i_thread t) {
    const qwen3_grammar *g = m->g;
    const qwen3i_object *o = qwen3i_object_of(g, t.node);
    const qwen3i_property *all = QWEN3I_ARRAY(qwen3i_property, g->members) + o->members;
    const qwen3i_state *s = qwen3i_state_at(g, o->dfa, t.state);
    const int *frame = m->frames + t.frame;
    int i, best = QWEN3I_FAR, distinct, required = 0, filler;
    for (i = 0; i < o->n_names; i++) required += all[i].required && !qwen3i_seen(frame, i);
    filler = qwen3i_needed(g, frame, &distinct) > required ? o->filler : 0;     /* that this member makes up for */
    for (i = s->low; i < s->high; i++)
        if (qwen3i_key_allowed(g, frame, i))
            best = qwen3i_min(best, qwen3i_member_cost(g, &all[i], all[i].key) - t.count -
                                    (all[i].required ? 1 + qwen3i_member_cost(g, &all[i], all[i].key) : filler));
    for (i = o->n_names; i < o->n_labels && s->open < QWEN3I_FAR; i++)
        if (qwen3i_key_allowed(g, frame, i)) best = qwen3i_min(best, qwen3i_member_cost(g, &all[i], s->open) - (qwen3i_seen(frame, o->n_names) ? 0 : filler));
    return qwen3i_near(best, frame[QWEN3I_COST]);
}

static int qwen3i_thread_cost(const qwen3i_machine *m, const qwen3i_thread t) {
    const qwen3_grammar *g = m->g;
    const qwen3i_node *n = QWEN3I_NODE(g, t.node);
    int cost, missing, distinct;
    if (n->kind == QWEN3I_END) return 0;
    if (n->kind == QWEN3I_LEXEME) {
        const qwen3i_lexeme *x = &QWEN3I_ARRAY(qwen3i_lexeme, g->lexemes)[n->a];
        missing = x->min > 0 ? qwen3i_max(0, x->min - qwen3i_max(t.count, 0)) : 0;
        cost = qwen3i_near(qwen3i_state_at(g, x->dfa, t.state)->distance, missing * x->loop);
        return qwen3i_near(cost, qwen3i_near(QWEN3I_NODE(g, n->next)->cost, qwen3i_after(m, t.frame)));
    }
    cost = qwen3i_after(m, t.frame);
    if (n->kind == QWEN3I_VALUE) return qwen3i_near(n->cost, cost);
    if (n->kind == QWEN3I_ITEMS || t.phase == QWEN3I_NEXT) return cost;
    if (t.phase == QWEN3I_COLON) return qwen3i_near(cost, 1 + QWEN3I_NODE(g, t.state)->cost);
    if (t.phase == QWEN3I_IN_KEY) return qwen3i_key_cost_from(m, t);
    missing = qwen3i_needed(g, m->frames + t.frame, &distinct) > 0;
    if (t.phase == QWEN3I_FIRST) return cost - missing;
    return missing ? cost - 1 : qwen3i_near(cost, qwen3i_object_of(g, t.node)->filler);
}

static int qwen3i_set_cost(const qwen3i_machine *m, qwen3i_span set) {
    int i, best = QWEN3I_FAR;
    for (i = 0; i < set.n; i++) best = qwen3i_min(best, qwen3i_thread_cost(m, m->pool[set.first + i]));
    return best;
}

static int qwen3i_set_may_end(const qwen3i_machine *m, qwen3i_span set) {
    int i;
    for (i = 0; i < set.n; i++)
        if (QWEN3I_NODE(m->g, m->pool[set.first + i].node)->kind == QWEN3I_END) return 1;
    return 0;
}

/* ---- the vocabulary as a tree of bytes ------------------------------------------------------- */
/* in order: a node's first child follows it, its next sibling is at skip */
typedef struct qwen3i_branch {
    uint32_t skip;
    int32_t  token;                     /* that ends here, -1: none */
    uint16_t depth;                     /* bytes up to and with this one, from 1 */
    unsigned char byte;
} qwen3i_branch;
typedef struct qwen3i_tree { qwen3i_branch *nodes; uint32_t n; } qwen3i_tree;

/* of a token, after a quote in it */
typedef struct qwen3i_tail { int32_t token; int32_t suffix; uint16_t chars; } qwen3i_tail;
/* tails after a string's final state */
typedef struct qwen3i_crossing { uint32_t first, n; int state; } qwen3i_crossing;

typedef struct qwen3i_index {           /* built once a model */
    qwen3_allocator allocator;
    int             n_words;            /* of a mask: 32 tokens each */
    int             depth;              /* bytes of the longest token */
    qwen3i_tree     tree, suffixes;
    uint32_t       *quotes;             /* [n_quotes + 1] nodes of the tree that are a quote, */
    uint32_t       *quote_tails;        /* [n_quotes + 1] and where their tails begin */
    uint32_t        n_quotes;
    /* the beginnings of tokens up to a quote, which are its token numbers */
    qwen3i_tree     quoted;
    uint32_t       *any_mask;           /* what a string that needs no escapes may go on with */
    qwen3i_tail    *tails;
    uint32_t        n_tails;
    unsigned char  *chars;              /* [n_vocab] characters that a token makes a string longer */
    int32_t        *by_chars;           /* [n_text] tokens in order of that */
    int             n_text;
    const struct qwen3_grammar *plain;  /* any string, and what it allows between two characters: */
    uint32_t       *plain_mask;
    qwen3i_crossing *plain_crossings;
    int             n_plain_crossings, plain_state, max_chars;
} qwen3i_index;

typedef struct qwen3i_word { uint64_t head; const char *p; uint32_t n; int32_t id; } qwen3i_word;

static int qwen3i_compare_words(const void *a, const void *b) {
    const qwen3i_word *x = (const qwen3i_word *)a, *y = (const qwen3i_word *)b;
    int order;
    if (x->head != y->head) return x->head < y->head ? -1 : 1;
    order = memcmp(x->p, y->p, qwen3i_min_size(x->n, y->n));
    return order ? order : x->n != y->n ? x->n < y->n ? -1 : 1 : (x->id > y->id) - (x->id < y->id);
}

static qwen3i_word qwen3i_word_make(const char *p, uint32_t n, int32_t id) {
    qwen3i_word w;
    uint32_t i;
    w.head = 0;
    for (i = 0; i < 8; i++) w.head = w.head << 8 | (i < n ? (unsigned char)p[i] : 0u);
    w.p = p;
    w.n = n;
    w.id = id;
    return w;
}

/* Sort words with room for as many more: by their first eight bytes, from the last of these to the first,
   then those that have them in common. */
static void qwen3i_words_sort(qwen3i_word *w, qwen3i_word *room, int n) {
    int i, shift, first;
    for (shift = 0; shift < 64; shift += 8) {
        int at[257];
        qwen3i_word *swap = w;
        memset(at, 0, sizeof at);
        for (i = 0; i < n; i++) at[(w[i].head >> shift & 255) + 1]++;
        for (i = 1; i < 257; i++) at[i] += at[i - 1];
        for (i = 0; i < n; i++) room[at[w[i].head >> shift & 255]++] = w[i];
        w = room;
        room = swap;
    }
    for (first = 0, i = 1; i <= n; i++) {
        if (i < n && w[i].head == w[first].head) continue;
        qwen3i_sort(w + first, (size_t)(i - first), sizeof *w, qwen3i_compare_words);
        first = i;
    }
}

static uint32_t qwen3i_common(const qwen3i_word *a, const qwen3i_word *b) {
    uint32_t i = 0;
    while (i < a->n && i < b->n && a->p[i] == b->p[i]) i++;
    return i;
}

/* A tree of words in order; equal words share a node, which has the first one's id. 0: no memory. */
static int qwen3i_tree_build(const qwen3_allocator *a, qwen3i_tree *t, const qwen3i_word *w, int n,
                             uint32_t *path) {
    uint32_t total = 0, k, depth = 0;
    int i;
    for (i = 0; i < n; i++) total += w[i].n - (i ? qwen3i_common(&w[i - 1], &w[i]) : 0);
    t->nodes = (qwen3i_branch *)qwen3i_alloc_array(a, total, sizeof *t->nodes);
    t->n = total;
    if (!t->nodes) return 0;
    for (total = 0, i = 0; i < n; i++) {
        uint32_t common = i ? qwen3i_common(&w[i - 1], &w[i]) : 0;
        for (k = depth; k > common; k--) t->nodes[path[k]].skip = total;
        for (k = common; k < w[i].n; k++) {
            qwen3i_branch *b = &t->nodes[total];
            b->byte = (unsigned char)w[i].p[k];
            b->depth = (uint16_t)(k + 1);
            b->token = k + 1 == w[i].n ? w[i].id : -1;
            path[k + 1] = total++;
        }
        depth = w[i].n;
    }
    for (k = depth; k > 0; k--) t->nodes[path[k]].skip = total;
    return 1;
}

/* ---- masks: which tokens may come ------------------------------------------------------------ */
#define QWEN3I_MAX_CROSSINGS 4096

/* what a state inside a string allows: does not depend on what is around it */
typedef struct qwen3i_cached {
    uint64_t serial, used;              /* 0: nothing is here */
    int      dfa, state, n;
    uint32_t *mask;
    const uint32_t *inside;             /* that mask, or the vocabulary's */
    qwen3i_crossing *crossings;         /* [n] by state */
} qwen3i_cached;

/* of a walk through the tree */
typedef struct qwen3i_level { qwen3i_span set; int frames, state, count; } qwen3i_level;

#define QWEN3I_CACHED 24
typedef struct qwen3i_masker {          /* scratch of a context, made when a grammar is first used in it */
    qwen3i_machine m;
    qwen3i_cached  cached[QWEN3I_CACHED];
    uint64_t       clock;
    qwen3i_level  *levels;              /* [depth + 1] */
    unsigned char *suffix_ok;           /* [suffixes] */
    uint32_t      *mask;                /* the result, */
    const struct qwen3i_guide *guide;   /* of this place; NULL: of none */
    uint64_t       version;
    void          *memory;
    size_t         memory_size;
    const qwen3i_index *v;
} qwen3i_masker;

static void qwen3i_allow(uint32_t *mask, int32_t token) { mask[token >> 5] |= 1u << (token & 31); }

/* Walk the part [begin, end) of a tree, below a node of this depth where the machine is in `set`. Tokens go
   to the mask; with suffixes, they go to k->suffix_ok. */
static void qwen3i_walk(qwen3i_masker *k, const qwen3i_tree *t, qwen3i_span set, uint32_t begin,
                        uint32_t end, int depth);

static void qwen3i_found(qwen3i_masker *k, const qwen3i_tree *t, int32_t token) {
    if (t == &k->v->tree) qwen3i_allow(k->mask, token);
    else k->suffix_ok[token] = 1;
}

/* The bytes with which a set can go on. */
static void qwen3i_first_bytes(qwen3i_masker *k, qwen3i_span set, unsigned char *ok) {
    const int pool = k->m.n_pool, frames = k->m.n_frames;
    int b;
    for (b = 0; b < 256; b++) {
        ok[b] = set.n > 0 && qwen3i_advance(&k->m, set, (unsigned char)b) > 0;
        k->m.n_pool = pool;
        k->m.n_frames = frames;
    }
}

/* The same where the machine is in one lexeme: its automaton alone until it may end. */
static void qwen3i_walk_lexeme(qwen3i_masker *k, const qwen3i_tree *t, const qwen3i_thread thread,
                               uint32_t begin, uint32_t end, int depth) {
    const qwen3_grammar *g = k->m.g;
    const qwen3i_node *n = QWEN3I_NODE(g, thread.node);
    const qwen3i_lexeme *x = &QWEN3I_ARRAY(qwen3i_lexeme, g->lexemes)[n->a];
    const int pool = k->m.n_pool, frames = k->m.n_frames;
    unsigned char first[256];
    int known = 0, top_frames;
    uint32_t i;
    qwen3i_span rest, after;
    const qwen3i_state *s;
    k->levels[depth].state = thread.state;
    k->levels[depth].count = thread.count;
    rest.first = pool;
    rest.n = 0;
    top_frames = frames;
    for (i = begin; i < end;) {
        const qwen3i_branch *b = &t->nodes[i];
        int state = k->levels[b->depth - 1].state, count = k->levels[b->depth - 1].count, deep = 0;
        /* what follows the lexeme may begin here */
        if (qwen3i_state_at(g, x->dfa, state)->final && b->depth - 1 > depth) {
            if (known && first[b->byte]) {
                after.first = k->m.n_pool;
                after.n = qwen3i_advance(&k->m, rest, b->byte);
                if (after.n && b->token >= 0) qwen3i_found(k, t, b->token);
                if (after.n) qwen3i_walk(k, t, after, i + 1, b->skip, b->depth);
                k->m.n_pool = pool + rest.n;
                k->m.n_frames = top_frames;
            }
        }
        if (!qwen3i_lexeme_step(g, x, b->byte, &state, &count, &s)) { i = b->skip; continue; }
        if (b->token >= 0) qwen3i_found(k, t, b->token);
        if (s->final && !known) {
            known = 1;
            k->m.base = k->m.n_pool;
            k->m.ways = 0;
            qwen3i_proceed(&k->m, n->next, thread.frame, 0);
            rest.n = k->m.n_pool - pool;
            top_frames = k->m.n_frames;
            qwen3i_first_bytes(k, rest, first);
        }
        deep = s->n_edges > 0 || s->final;
        k->levels[b->depth].state = state;
        k->levels[b->depth].count = count;
        i = deep ? i + 1 : b->skip;
    }
    k->m.n_pool = pool;
    k->m.n_frames = frames;
}

static void qwen3i_walk(qwen3i_masker *k, const qwen3i_tree *t, qwen3i_span set, uint32_t begin,
                        uint32_t end, int depth) {
    const int pool = k->m.n_pool, frames = k->m.n_frames;
    uint32_t i;
    k->levels[depth].set = set;
    k->levels[depth].frames = frames;
    for (i = begin; i < end;) {
        const qwen3i_branch *b = &t->nodes[i];
        const qwen3i_level up = k->levels[b->depth - 1];
        qwen3i_span next;
        k->m.n_pool = b->depth - 1 == depth ? pool : up.set.first + up.set.n;
        k->m.n_frames = up.frames;
        next.first = k->m.n_pool;
        next.n = qwen3i_advance(&k->m, up.set, b->byte);
        if (next.n == 0) { i = b->skip; continue; }
        if (b->token >= 0) qwen3i_found(k, t, b->token);
        if (next.n == 1 && QWEN3I_NODE(k->m.g, k->m.pool[next.first].node)->kind == QWEN3I_LEXEME) {
            qwen3i_walk_lexeme(k, t, k->m.pool[next.first], i + 1, b->skip, b->depth);
            i = b->skip;
            continue;
        }
        k->levels[b->depth].set = next;
        k->levels[b->depth].frames = k->m.n_frames;
        i++;
    }
    k->m.n_pool = pool;
    k->m.n_frames = frames;
}

/* Walk with an automaton of strings alone: the tokens that stay inside. */
static void qwen3i_walk_inside(const qwen3_grammar *g, const qwen3i_index *v, int dfa, int state,
                               qwen3i_level *levels, uint32_t *mask) {
    const qwen3i_dfa *d = &QWEN3I_ARRAY(qwen3i_dfa, g->dfas)[dfa];
    const qwen3i_branch *t = v->tree.nodes;
    uint32_t i;
    memset(mask, 0, (size_t)v->n_words * sizeof *mask);
    levels[0].state = state;
    for (i = 0; i < v->tree.n;) {
        const qwen3i_branch b = t[i];
        const int next = qwen3i_dfa_step(g, d, levels[b.depth - 1].state, b.byte);
        if (next < 0 || qwen3i_state_at(g, dfa, next)->final) { i = b.skip; continue; }
        if (b.token >= 0) qwen3i_allow(mask, b.token);
        levels[b.depth].state = next;
        i++;
    }
}

/* The same: where tokens reach the string's end. Returns how many such places there are, -1: too many. */
static int qwen3i_walk_quotes(const qwen3_grammar *g, const qwen3i_index *v, int dfa, int state,
                              qwen3i_level *levels, qwen3i_crossing *out) {
    const qwen3i_dfa *d = &QWEN3I_ARRAY(qwen3i_dfa, g->dfas)[dfa];
    const qwen3i_branch *t = v->quoted.nodes;
    int n = 0;
    uint32_t i;
    levels[0].state = state;
    for (i = 0; i < v->quoted.n;) {
        const qwen3i_branch b = t[i];
        const int next = qwen3i_dfa_step(g, d, levels[b.depth - 1].state, b.byte);
        if (next >= 0 && b.token >= 0 && qwen3i_state_at(g, dfa, next)->final) {
            if (n == QWEN3I_MAX_CROSSINGS) return -1;
            out[n].first = v->quote_tails[b.token];
            out[n].n = v->quote_tails[b.token + 1] - v->quote_tails[b.token];
            out[n++].state = next;
        }
        if (next < 0 || qwen3i_state_at(g, dfa, next)->final) { i = b.skip; continue; }
        levels[b.depth].state = next;
        i++;
    }
    return n;
}

static int qwen3i_compare_crossings(const void *a, const void *b) {
    const qwen3i_crossing *x = (const qwen3i_crossing *)a, *y = (const qwen3i_crossing *)b;
    return x->state != y->state ? (x->state > y->state) - (x->state < y->state) :
           (x->first > y->first) - (x->first < y->first);
}

/* What a string's state allows, from the cache. NULL: it cannot be kept. */
static qwen3i_cached *qwen3i_lookup(qwen3i_masker *k, int dfa, int state) {
    const qwen3i_index *v = k->v;
    const qwen3i_state *s = qwen3i_state_at(k->m.g, dfa, state);
    qwen3i_cached *oldest = &k->cached[0];
    int i, n;
    for (i = 0; i < QWEN3I_CACHED; i++) {
        qwen3i_cached *e = &k->cached[i];
        if (e->serial == k->m.g->serial && e->dfa == dfa && e->state == state && e->used) {
            e->used = ++k->clock;
            return e;
        }
        if (e->used < oldest->used) oldest = e;
    }
    oldest->used = 0;
    n = qwen3i_walk_quotes(k->m.g, v, dfa, state, k->levels, oldest->crossings);
    if (n < 0) return NULL;
    oldest->inside = oldest->mask;
    if (s->anything && s->boundary) oldest->inside = v->any_mask;
    else qwen3i_walk_inside(k->m.g, v, dfa, state, k->levels, oldest->mask);
    qwen3i_sort(oldest->crossings, (size_t)n, sizeof *oldest->crossings, qwen3i_compare_crossings);
    oldest->serial = k->m.g->serial;
    oldest->dfa = dfa;
    oldest->state = state;
    oldest->n = n;
    oldest->used = ++k->clock;
    return oldest;
}

/* Tokens that end the string: those whose part behind the quote may follow. low, high: characters allowed
   before it. */
static void qwen3i_cross(qwen3i_masker *k, const qwen3i_thread t, const qwen3i_crossing *x, int n, int low,
                         int high) {
    const qwen3_grammar *g = k->m.g;
    const int pool = k->m.n_pool, frames = k->m.n_frames,
              is_key = QWEN3I_NODE(g, t.node)->kind == QWEN3I_MEMBERS;
    int i, done = -1;
    uint32_t j;
    for (i = 0; i < n; i++) {
        if (x[i].state != done) {
            qwen3i_span set;
            done = x[i].state;
            memset(k->suffix_ok, 0, k->v->suffixes.n + 1);
            k->m.base = set.first = k->m.n_pool = pool;
            k->m.n_frames = frames;
            k->m.ways = 0;
            if (is_key)
                qwen3i_key_end(&k->m, t, qwen3i_state_at(g, qwen3i_object_of(g, t.node)->dfa, done)->label);
            else qwen3i_proceed(&k->m, QWEN3I_NODE(g, t.node)->next, t.frame, 0);
            set.n = k->m.n_pool - pool;
            k->suffix_ok[0] = set.n > 0;        /* nothing behind the quote */
            if (set.n > 0) qwen3i_walk(k, &k->v->suffixes, set, 0, k->v->suffixes.n, 0);
        }
        for (j = x[i].first; j < x[i].first + x[i].n; j++) {
            const qwen3i_tail *tail = &k->v->tails[j];
            if (k->suffix_ok[tail->suffix] && tail->chars >= low && tail->chars <= high)
                qwen3i_allow(k->mask, tail->token);
        }
    }
    k->m.n_pool = pool;
    k->m.n_frames = frames;
}

/* Tokens that stay inside a string, of which at most `room` more characters may come. */
static void qwen3i_mask_inside(qwen3i_masker *k, const uint32_t *inside, int room) {
    const qwen3i_index *v = k->v;
    int i;
    if (room >= v->max_chars) { for (i = 0; i < v->n_words; i++) k->mask[i] |= inside[i]; return; }
    for (i = 0; i < v->n_text && v->chars[v->by_chars[i]] <= room; i++) {
        const int32_t token = v->by_chars[i];
        if (inside[token >> 5] >> (token & 31) & 1u) qwen3i_allow(k->mask, token);
    }
}

/* A thread inside a string or an object's key, by the cache. 0: it must be walked. */
static int qwen3i_mask_string(qwen3i_masker *k, const qwen3i_thread t) {
    const qwen3_grammar *g = k->m.g;
    const qwen3i_index *v = k->v;
    const qwen3i_node *n = QWEN3I_NODE(g, t.node);
    const qwen3i_lexeme *x = n->kind == QWEN3I_LEXEME ? &QWEN3I_ARRAY(qwen3i_lexeme, g->lexemes)[n->a] : NULL;
    const int counted = x && (x->min > 0 || x->max >= 0), dfa = x ? x->dfa : qwen3i_object_of(g, t.node)->dfa;
    const qwen3i_state *s = qwen3i_state_at(g, dfa, t.state);
    int low = 0, high = INT_MAX;
    qwen3i_cached *e;
    if (x && (t.state == 0 || !x->quoted)) return 0;
    if (!x && (t.phase != QWEN3I_IN_KEY || !qwen3i_object_of(g, t.node)->all_open)) return 0;
    if (!x && !qwen3i_key_alive(g, k->m.frames + t.frame, qwen3i_object_of(g, t.node), s)) return 0;
    if (counted && !s->boundary) return 0;
    if (counted) { low = x->min - t.count; high = x->max < 0 ? INT_MAX : x->max - t.count; }
    if (counted && x->longest > 1 && high < v->max_chars + x->longest) return 0;    /* it may need them */
    if (dfa == g->plain && t.state == v->plain_state) {
        qwen3i_mask_inside(k, v->plain_mask, high);
        qwen3i_cross(k, t, v->plain_crossings, v->n_plain_crossings, low, high);
        return 1;
    }
    e = qwen3i_lookup(k, dfa, t.state);
    if (!e) return 0;
    qwen3i_mask_inside(k, e->inside, high);
    qwen3i_cross(k, t, e->crossings, e->n, low, high);
    return 1;
}

/* The mask of a set at the bottom of the pool: tokens whose bytes may come next. */
static void qwen3i_mask_make(qwen3i_masker *k, int n_threads) {
    qwen3i_span rest;
    int i;
    k->m.n_pool = n_threads;
    memset(k->mask, 0, (size_t)k->v->n_words * sizeof *k->mask);
    rest.first = k->m.n_pool;
    for (i = 0; i < n_threads; i++) {
        const qwen3i_thread t = k->m.pool[i];
        const int kind = QWEN3I_NODE(k->m.g, t.node)->kind;
        if ((kind == QWEN3I_LEXEME || kind == QWEN3I_MEMBERS) && qwen3i_mask_string(k, t)) continue;
        if (kind == QWEN3I_LEXEME) qwen3i_walk_lexeme(k, &k->v->tree, t, 0, k->v->tree.n, 0);
        else if (k->m.n_pool < k->m.cap_pool) k->m.pool[k->m.n_pool++] = t;
    }
    rest.n = k->m.n_pool - rest.first;
    if (rest.n > 0) qwen3i_walk(k, &k->v->tree, rest, 0, k->v->tree.n, 0);
    k->m.n_pool = n_threads;
}

/* ---- the vocabulary's index ------------------------------------------------------------------ */
static void qwen3i_grammar_free(qwen3_grammar *g);

static void qwen3i_index_free(qwen3i_index *v) {
    qwen3_allocator a;
    if (!v) return;
    a = v->allocator;
    qwen3i_free(&a, v->tree.nodes, v->tree.n * sizeof *v->tree.nodes);
    qwen3i_free(&a, v->suffixes.nodes, v->suffixes.n * sizeof *v->suffixes.nodes);
    qwen3i_free(&a, v->quoted.nodes, v->quoted.n * sizeof *v->quoted.nodes);
    qwen3i_free(&a, v->any_mask, (size_t)v->n_words * sizeof *v->any_mask);
    qwen3i_free(&a, v->quotes, 2 * ((size_t)v->n_quotes + 1) * sizeof *v->quotes);
    qwen3i_free(&a, v->tails, v->n_tails * sizeof *v->tails);
    qwen3i_free(&a, v->chars, (size_t)v->n_words * 32);
    qwen3i_free(&a, v->by_chars, (size_t)v->n_words * 32 * sizeof *v->by_chars);
    qwen3i_free(&a, v->plain_mask, (size_t)v->n_words * sizeof *v->plain_mask);
    qwen3i_free(&a, v->plain_crossings, QWEN3I_MAX_CROSSINGS * sizeof *v->plain_crossings);
    qwen3i_grammar_free((qwen3_grammar *)(void *)v->plain);
    qwen3i_free(&a, v, sizeof *v);
}

/* All tokens with a text, but not added ones: those are never part of what a grammar describes. */
static int qwen3i_index_words(const qwen3_model *model, qwen3i_word *w) {
    const qwen3i_tokenizer *t = model->tokenizer;
    int i, n = 0, length;
    for (i = 0; i < t->n_tokens && i < model->config.n_vocab; i++) {
        const char *p = qwen3i_token_bytes(model, i, &length);
        int k, added = 0;
        for (k = 0; k < t->n_added; k++) added |= t->added[k].id == i;
        if (p && length > 0 && length <= QWEN3I_MAX_ADDED && !added)
            w[n++] = qwen3i_word_make(p, (uint32_t)length, i);
    }
    return n;
}

/* A token at or below a node. */
static uint32_t qwen3i_some_token(const qwen3i_tree *t, uint32_t i) {
    while (t->nodes[i].token < 0) i++;
    return i;
}

/* The quotes in the tree, and what stands behind each in the tokens below it. */
static int qwen3i_index_tails(qwen3i_index *v, const qwen3_model *model, uint32_t *path) {
    const qwen3i_branch *t = v->tree.nodes;
    qwen3i_word *w, *begin;
    uint32_t i, j, q = 0, n = 0;
    int k, length, distinct = 0;
    for (i = 0; i < v->tree.n; i++) {
        if (t[i].byte != '"') continue;
        v->n_quotes++;
        for (j = i; j < t[i].skip; j++) v->n_tails += t[j].token >= 0;
    }
    v->quotes = (uint32_t *)qwen3i_alloc_array(&v->allocator, 2 * ((size_t)v->n_quotes + 1),
                                               sizeof *v->quotes);
    v->tails = (qwen3i_tail *)qwen3i_alloc_array(&v->allocator, v->n_tails, sizeof *v->tails);
    w = (qwen3i_word *)qwen3i_alloc_array(&v->allocator, v->n_tails, sizeof *w);
    begin = (qwen3i_word *)qwen3i_alloc_array(&v->allocator, v->n_quotes, sizeof *begin);
    if (!v->quotes || !v->tails || !w || !begin) {
        qwen3i_free(&v->allocator, begin, v->n_quotes * sizeof *begin);
        qwen3i_free(&v->allocator, w, v->n_tails * sizeof *w); return 0; }
    v->quote_tails = v->quotes + v->n_quotes + 1;
    for (i = 0; i < v->tree.n; i++) {
        if (t[i].byte != '"') continue;
        begin[q] = qwen3i_word_make(qwen3i_token_bytes(model,
                                                      v->tree.nodes[qwen3i_some_token(&v->tree, i)].token,
                                                          &length), t[i].depth, (int32_t)q);
        v->quotes[q] = i;
        v->quote_tails[q++] = n;
        for (j = i; j < t[i].skip; j++) {
            const char *p;
            if (t[j].token < 0) continue;
            p = qwen3i_token_bytes(model, t[j].token, &length);
            v->tails[n].token = t[j].token;
            w[n] = qwen3i_word_make(p + t[i].depth, (uint32_t)length - t[i].depth, (int32_t)n);
            n++;
        }
    }
    v->quotes[q] = v->tree.n;
    v->quote_tails[q] = n;
    qwen3i_sort(w, n, sizeof *w, qwen3i_compare_words);
    for (k = 0, i = 0; i < n; i++) {    /* suffix 0 is none; the others from 1, each once */
        qwen3i_tail *tail = &v->tails[w[i].id];
        const int is_new = w[i].n > 0 && (k == 0 || w[k - 1].n != w[i].n ||
                                          qwen3i_common(&w[k - 1], &w[i]) != w[i].n);
        if (is_new) { w[k] = w[i]; w[k++].id = ++distinct; }
        tail->suffix = w[i].n > 0 ? distinct : 0;
    }
    k = qwen3i_tree_build(&v->allocator, &v->suffixes, w, k, path) &&
        qwen3i_tree_build(&v->allocator, &v->quoted, begin, (int)v->n_quotes, path);
    qwen3i_free(&v->allocator, begin, v->n_quotes * sizeof *begin);
    qwen3i_free(&v->allocator, w, v->n_tails * sizeof *w);
    return k;
}

/* Chars of tokens, and what any string allows: by its automaton, once. */
static void qwen3i_index_count(qwen3i_index *v, qwen3i_level *levels) {
    const qwen3_grammar *g = v->plain;
    const qwen3i_dfa *d = &QWEN3I_ARRAY(qwen3i_dfa, g->dfas)[g->plain];
    const qwen3i_branch *t = v->tree.nodes;
    uint32_t i, j, q = 0;
    levels[0].state = v->plain_state;
    levels[0].count = 0;
    for (i = 0; i < v->tree.n;) {
        const qwen3i_level up = levels[t[i].depth - 1];
        const int next = qwen3i_dfa_step(g, d, up.state, t[i].byte);
        const qwen3i_state *s = next < 0 ? NULL : qwen3i_state_at(g, g->plain, next);
        if (s && s->final) {
            while (v->quotes[q] < i) q++;
            for (j = v->quote_tails[q]; j < v->quote_tails[q + 1]; j++)
                v->tails[j].chars = (uint16_t)up.count;
        }
        if (!s || s->final) { i = t[i].skip; continue; }
        levels[t[i].depth].state = next;
        levels[t[i].depth].count = up.count + s->boundary;
        if (t[i].token >= 0)
            v->chars[t[i].token] = (unsigned char)qwen3i_min(255, up.count + s->boundary + s->chars);
        i++;
    }
}

static void qwen3i_index_order(qwen3i_index *v) {
    int count[257], i, n = v->n_words * 32;
    memset(count, 0, sizeof count);
    for (i = 0; i < n; i++) if (v->chars[i]) { count[v->chars[i] +
                                                     1]++; v->max_chars = qwen3i_max(v->max_chars,
                                                             v->chars[i]); }
    for (i = 1; i < 257; i++) count[i] += count[i - 1];
    for (i = 0; i < n; i++) if (v->chars[i]) v->by_chars[count[v->chars[i]]++] = i;
    v->n_text = count[256];
}

static qwen3_result qwen3i_grammar_compile(qwen3_grammar *g, const qwen3_grammar_desc *desc,
                                           const char *only, const qwen3i_err *err);

static qwen3_result qwen3i_index_fill(qwen3i_index *v, const qwen3_model *model, qwen3i_word *words,
                                      uint32_t *path, qwen3i_level *levels) {
    /* keys of objects: strings without escapes */
    static const char any[] = "{\"type\":[\"string\",\"object\"]}";
    qwen3_grammar_desc desc;
    qwen3_grammar *g;
    qwen3_result r;
    int i, keys, n = qwen3i_index_words(model, words);
    qwen3i_words_sort(words, words + n, n);
    if (!qwen3i_tree_build(&v->allocator, &v->tree, words, n, path)) return QWEN3_ERR_MEMORY;
    for (i = 0; i < n; i++) v->depth = qwen3i_max(v->depth, (int)words[i].n);
    if (!qwen3i_index_tails(v, model, path)) return QWEN3_ERR_MEMORY;
    v->chars = (unsigned char *)qwen3i_alloc_zero(&v->allocator, (size_t)v->n_words, 32);
    v->by_chars = (int32_t *)qwen3i_alloc_zero(&v->allocator, (size_t)v->n_words * 32, sizeof *v->by_chars);
    v->plain_mask = (uint32_t *)qwen3i_alloc_zero(&v->allocator, (size_t)v->n_words, sizeof *v->plain_mask);
    v->any_mask = (uint32_t *)qwen3i_alloc_zero(&v->allocator, (size_t)v->n_words, sizeof *v->any_mask);
    v->plain_crossings = (qwen3i_crossing *)qwen3i_alloc_array(&v->allocator, QWEN3I_MAX_CROSSINGS,
                                                               sizeof *v->plain_crossings);
    g = (qwen3_grammar *)qwen3i_alloc_zero(&v->allocator, 1, sizeof *g);
    v->plain = g;
    if (!v->chars || !v->by_chars || !v->plain_mask || !v->any_mask || !v->plain_crossings || !g)
        return QWEN3_ERR_MEMORY;
    memset(&desc, 0, sizeof desc);
    desc.kind = QWEN3_GRAMMAR_JSON_SCHEMA;
    desc.text = any;
    desc.n_bytes = sizeof any - 1;
    g->allocator = v->allocator;
    r = qwen3i_grammar_compile(g, &desc, NULL, NULL);
    if (r != QWEN3_OK) return r;
    v->plain_state = qwen3i_dfa_step(g, &QWEN3I_ARRAY(qwen3i_dfa, g->dfas)[g->plain], 0, '"');
    v->n_plain_crossings = qwen3i_walk_quotes(g, v, g->plain, v->plain_state, levels, v->plain_crossings);
    qwen3i_walk_inside(g, v, g->plain, v->plain_state, levels, v->plain_mask);
    keys = QWEN3I_ARRAY(qwen3i_object, g->objects)[1].dfa;
    qwen3i_walk_inside(g, v, keys, qwen3i_dfa_step(g, &QWEN3I_ARRAY(qwen3i_dfa, g->dfas)[keys], 0, '"'),
                       levels, v->any_mask);
    if (v->n_plain_crossings < 0) return QWEN3_ERR_UNSUPPORTED;
    qwen3i_index_count(v, levels);
    qwen3i_index_order(v);
    return QWEN3_OK;
}

static void qwen3i_index_drop(void *cell) {
    qwen3i_index_free((qwen3i_index *)(uintptr_t)qwen3i_atomic_get((qwen3i_atomic *)cell));
}

/* The index of a model's vocabulary: made by the first who asks. */
static qwen3_result qwen3i_index_get(const qwen3_model *model, const qwen3i_index **out) {
    qwen3i_index *v = (qwen3i_index *)(uintptr_t)qwen3i_atomic_get((qwen3i_atomic *)model->vocab);
    const qwen3_allocator *a = &model->allocator;
    const size_t n_words = (size_t)model->config.n_vocab, n_depth = QWEN3I_MAX_ADDED + 2;
    qwen3i_word *words;
    uint32_t *path;
    qwen3i_level *levels;
    qwen3_result r = QWEN3_ERR_MEMORY;
    *out = v;
    if (v) return QWEN3_OK;
    v = (qwen3i_index *)qwen3i_alloc_zero(a, 1, sizeof *v);
    words = (qwen3i_word *)qwen3i_alloc_array(a, 2 * n_words, sizeof *words);
    path = (uint32_t *)qwen3i_alloc_array(a, n_depth, sizeof *path);
    levels = (qwen3i_level *)qwen3i_alloc_array(a, n_depth, sizeof *levels);
    if (v) { v->allocator = *a; v->n_words = (model->config.n_vocab + 31) / 32; }
    if (v && words && path && levels) r = qwen3i_index_fill(v, model, words, path, levels);
    qwen3i_free(a, words, 2 * n_words * sizeof *words);
    qwen3i_free(a, path, n_depth * sizeof *path);
    qwen3i_free(a, levels, n_depth * sizeof *levels);
    if (r != QWEN3_OK) { qwen3i_index_free(v); return r; }
    /* another thread was first */
    if (!qwen3i_atomic_swap((qwen3i_atomic *)model->vocab, 0, (uint64_t)(uintptr_t)v)) {
        qwen3i_index_free(v);
        v = (qwen3i_index *)(uintptr_t)qwen3i_atomic_get((qwen3i_atomic *)model->vocab);
    }
    *out = v;
    return QWEN3_OK;
}

/* ---- creating -------------------------------------------------------------------------------- */
enum { QWEN3I_GRAMMAR_BUFS = 10, QWEN3I_COMPILER_BUFS = QWEN3I_GRAMMAR_BUFS + 23 };

static void qwen3i_grammar_bufs(qwen3_grammar *g, qwen3i_buf **all) {
    qwen3i_buf *list[QWEN3I_GRAMMAR_BUFS];
    list[0] = &g->dfas; list[1] = &g->states; list[2] = &g->edges; list[3] = &g->rows; list[4] = &g->lexemes;
    list[5] = &g->nodes; list[6] = &g->lists; list[7] = &g->objects; list[8] = &g->members; list[9] = &g->arrays;
    memcpy(all, list, sizeof list);
}

/* The grammar's, then those that only compiling needs. */
static void qwen3i_compiler_bufs(qwen3i_compiler *c, qwen3i_buf **all) {
    qwen3i_buf *list[QWEN3I_COMPILER_BUFS - QWEN3I_GRAMMAR_BUFS];
    list[0] = &c->dom; list[1] = &c->rules; list[2] = &c->nfa; list[3] = &c->marks; list[4] = &c->stack;
    list[5] = &c->set; list[6] = &c->seeds; list[7] = &c->ast; list[8] = &c->ranges; list[9] = &c->text;
    list[10] = &c->subsets.data; list[11] = &c->subsets.spans; list[12] = &c->subsets.table;
    list[13] = &c->values.data; list[14] = &c->values.spans; list[15] = &c->values.table;
    list[16] = &c->shapes; list[17] = &c->terms; list[18] = &c->value_nodes; list[19] = &c->empties;
    list[20] = &c->pending; list[21] = &c->patterns; list[22] = &c->bnf;
    qwen3i_grammar_bufs(c->g, all);
    memcpy(all + QWEN3I_GRAMMAR_BUFS, list, sizeof list);
}

static void qwen3i_grammar_free(qwen3_grammar *g) {
    qwen3i_buf *all[QWEN3I_GRAMMAR_BUFS];
    qwen3_allocator a;
    int i;
    if (!g) return;
    a = g->allocator;
    qwen3i_grammar_bufs(g, all);
    for (i = 0; i < QWEN3I_GRAMMAR_BUFS; i++) qwen3i_free(&a, all[i]->p, all[i]->cap);
    qwen3i_free(&a, g, sizeof *g);
}

QWEN3_API void qwen3_grammar_free(qwen3_grammar *grammar) { qwen3i_grammar_free(grammar); }

/* Every array has memory from the start, and an element 0, all zero, that means none: after a failure,
   indices are 0. */
static void qwen3i_compiler_begin(qwen3i_compiler *c, qwen3i_buf **all) {
    static const size_t first[QWEN3I_COMPILER_BUFS] = {
        sizeof(qwen3i_dfa), sizeof(qwen3i_state), 0, 0, sizeof(qwen3i_lexeme), 0, sizeof(int),
        sizeof(qwen3i_object), 0, sizeof(qwen3i_items), sizeof(qwen3i_dom), sizeof(qwen3i_rule)};
    enum { ROOM = 256 };
    qwen3i_state *s;
    int i;
    for (i = 0; i < QWEN3I_COMPILER_BUFS; i++) *all[i] = qwen3i_buf_make(&c->g->allocator);
    for (i = 0; i < QWEN3I_COMPILER_BUFS && c->result == QWEN3_OK; i++) {
        if (!qwen3i_buf_reserve(all[i], ROOM)) {
            qwen3i_out_of_memory(c);
            return;
        }
        memset(all[i]->p, 0, ROOM);
        all[i]->n = first[i];
    }
    s = QWEN3I_ARRAY(qwen3i_state, c->g->states);
    s->row = -1;
    s->distance = s->open = s->chars = QWEN3I_FAR;
    QWEN3I_ARRAY(qwen3i_dfa, c->g->dfas)->n_states = 1;
    qwen3i_node_add(c, QWEN3I_END, 0, 0, 0);
    qwen3i_node_add(c, QWEN3I_RETURN, 0, 0, 0);
}

static int qwen3i_compile_regex(qwen3i_compiler *c, const char *text, size_t n) {
    int end, dfa;
    qwen3i_nfa_reset(c);
    end = qwen3i_nfa_add(c, QWEN3I_NFA_FINAL, 0, 0);
    end = qwen3i_nfa_add(c, QWEN3I_NFA_LAST, 0, end);
    dfa = qwen3i_dfa_make(c, qwen3i_ast_nfa(c, qwen3i_regex_parse(c, text, n), end));
    return qwen3i_lexeme_node(c, qwen3i_lexeme_add(c, dfa, 0, QWEN3I_NO_LIMIT), QWEN3I_RETURN);
}

/* A number of its own for each text. */
static uint64_t qwen3i_grammar_serial(const qwen3_grammar_desc *desc, const char *only) {
    uint64_t h = qwen3i_hash((uint64_t)desc->kind * 8 + (uint64_t)desc->flags + 1, desc->text, desc->n_bytes);
    return (only ? qwen3i_hash(h, only, strlen(only)) : h) | 1;
}

static qwen3_result qwen3i_grammar_compile(qwen3_grammar *g, const qwen3_grammar_desc *desc,
                                           const char *only, const qwen3i_err *err) {
    qwen3i_compiler c;
    qwen3i_buf *all[QWEN3I_COMPILER_BUFS];
    int i;
    memset(&c, 0, sizeof c);
    c.g = g;
    c.max_steps = desc->max_steps > 0 ? desc->max_steps : QWEN3I_MAX_STEPS;
    c.max_bytes = desc->max_bytes > 0 ? desc->max_bytes : QWEN3I_MAX_BYTES;
    qwen3i_compiler_bufs(&c, all);
    qwen3i_compiler_begin(&c, all);
    g->flags = desc->flags;
    g->kind = (int)desc->kind;
    g->serial = qwen3i_grammar_serial(desc, only);
    if (c.result == QWEN3_OK) {
        if (desc->kind == QWEN3_GRAMMAR_JSON_SCHEMA)
            g->root = qwen3i_compile_schema(&c, desc->text, desc->n_bytes);
        else if (desc->kind == QWEN3_GRAMMAR_TOOLS)
            g->root = qwen3i_compile_tools(&c, desc->text, desc->n_bytes, only);
        else if (desc->kind == QWEN3_GRAMMAR_REGEX)
            g->root = qwen3i_compile_regex(&c, desc->text, desc->n_bytes);
        else g->root = qwen3i_compile_bnf(&c, desc->text, desc->n_bytes);
    }
    if (c.result == QWEN3_OK) qwen3i_finish(&c);
    if (desc->kind == QWEN3_GRAMMAR_GBNF) qwen3i_bnf_check(&c);
    g->plain = c.any_string[0];
    if (c.result == QWEN3_OK && QWEN3I_NODE(g, g->root)->cost >= QWEN3I_FAR)
        qwen3i_reject(&c, QWEN3_ERR_FORMAT, "nothing finite satisfies this grammar");
    for (i = QWEN3I_GRAMMAR_BUFS; i < QWEN3I_COMPILER_BUFS; i++) qwen3i_buf_free(all[i]);
    return c.result == QWEN3_OK ? QWEN3_OK : qwen3i_fail(err, c.result, "%s", c.message);
}

static qwen3_result qwen3i_grammar_make(qwen3_grammar **out, const qwen3_model *model,
                                        const qwen3_allocator *allocator, const qwen3_grammar_desc *desc,
                                        const char *only, const qwen3i_err *err) {
    qwen3_grammar *g;
    qwen3_result r;
    if (!QWEN3I_GRAMMARS)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "grammars were left out by QWEN3_NO_GRAMMAR");
    g = (qwen3_grammar *)qwen3i_alloc_zero(allocator, 1, sizeof *g);
    if (!g) return qwen3i_no_memory(err, "a grammar", sizeof *g);
    g->allocator = *allocator;
    g->model = model;
    g->call_begin = qwen3i_added_id(model->tokenizer, "<tool_call>");
    g->call_end = qwen3i_added_id(model->tokenizer, "</tool_call>");
    r = qwen3i_index_get(model, &g->vocab);
    if (r != QWEN3_OK) qwen3i_fail(err, r, "the vocabulary cannot be indexed: %s", qwen3_result_string(r));
    else if (desc->kind == QWEN3_GRAMMAR_TOOLS && (g->call_begin < 0 || g->call_end < 0))
        r = qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "the tokenizer has no <tool_call> and </tool_call>");
    else r = qwen3i_grammar_compile(g, desc, only, err);
    if (r != QWEN3_OK) qwen3i_grammar_free(g); else *out = g;
    return r;
}

QWEN3_API qwen3_result qwen3_grammar_create(qwen3_grammar **out, const qwen3_model *model,
                                            const qwen3_grammar_desc *desc, char *err_text, size_t err_size) {
    const qwen3i_err err = qwen3i_err_begin(err_text, err_size);
    int kind;
    if (!out) return qwen3i_fail(&err, QWEN3_ERR_ARG, "out is NULL");
    *out = NULL;
    if (!model || !desc || !desc->text)
        return qwen3i_fail(&err, QWEN3_ERR_ARG, "model, desc or its text is NULL");
    if (!model->tokenizer)
        return qwen3i_fail(&err, QWEN3_ERR_UNSUPPORTED, "the model was loaded without tokenizer files");
    kind = (int)desc->kind;
    if (kind < QWEN3_GRAMMAR_JSON_SCHEMA || kind > QWEN3_GRAMMAR_TOOLS || (desc->flags & ~15))
        return qwen3i_fail(&err, QWEN3_ERR_ARG, "the grammar's kind or flags are unknown");
    if (desc->n_bytes > 1 << 26)
        return qwen3i_fail(&err, QWEN3_ERR_UNSUPPORTED, "a grammar of more than 64 MiB");
    return qwen3i_grammar_make(out, model, &model->allocator, desc, NULL, &err);
}

/* ---- a sequence's place in its grammar ------------------------------------------------------- */
#define QWEN3I_GUIDE_THREADS 256
#define QWEN3I_GUIDE_FRAMES  16384      /* numbers: about 2,000 levels */
#define QWEN3I_POOL_THREADS  32768
#define QWEN3I_POOL_FRAMES   (1 << 18)

typedef struct qwen3i_guide {
    const qwen3_grammar *g;             /* NULL: none */
    uint64_t      serial, version;      /* of the grammar; counts its changes */
    /* tokens from start are the grammar's; those before pos were followed; -1: none */
    int           start, pos;
    int           n_threads, n_frames;
    uint32_t     *mask;                 /* what a backend chooses by; in a context */
    qwen3i_thread threads[QWEN3I_GUIDE_THREADS];
    int           frames[QWEN3I_GUIDE_FRAMES];
} qwen3i_guide;

/* Put the machine where the guide is: its threads at the bottom of the pool. */
static qwen3i_span qwen3i_guide_load(qwen3i_masker *k, const qwen3i_guide *s) {
    qwen3i_span set;
    k->m.g = s->g;
    memcpy(k->m.pool, s->threads, (size_t)s->n_threads * sizeof *s->threads);
    memcpy(k->m.frames, s->frames, (size_t)s->n_frames * sizeof *s->frames);
    k->m.n_pool = set.n = s->n_threads;
    k->m.n_frames = s->n_frames;
    set.first = 0;
    return set;
}

/* Copy a frame and all it returns to, each once; its place in the guide, or -2: there is no room. */
static int qwen3i_guide_frame(qwen3i_masker *k, qwen3i_guide *s, int frame) {
    int *f = k->m.frames, *path = f + k->m.n_frames, n = 0, up, size;
    for (up = frame; up >= 0 && f[up + QWEN3I_AT] >= 0; up = f[up + QWEN3I_UP]) {
        if (k->m.n_frames + n >= k->m.cap_frames) return -2;
        path[n++] = up;
    }
    up = up < 0 ? -1 : -1 - f[up + QWEN3I_AT];      /* where it went already */
    while (n > 0) {
        const int at = path[--n];
        size = qwen3i_frame_size(k->m.g, f[at + QWEN3I_AT]);
        if (size > QWEN3I_GUIDE_FRAMES - s->n_frames) return -2;
        memcpy(s->frames + s->n_frames, f + at, (size_t)size * sizeof *f);
        s->frames[s->n_frames + QWEN3I_UP] = up;
        f[at + QWEN3I_AT] = -1 - s->n_frames;
        up = s->n_frames;
        s->n_frames += size;
    }
    return up;
}

/* Take over a set of the machine, with the frames that it needs. The machine is used up. Returns how many
   threads it has. */
static int qwen3i_guide_store(qwen3i_masker *k, qwen3i_guide *s, qwen3i_span set) {
    int i;
    s->n_threads = s->n_frames = 0;
    s->version++;
    for (i = 0; i < set.n && s->n_threads < QWEN3I_GUIDE_THREADS; i++) {
        qwen3i_thread t = k->m.pool[set.first + i];
        t.frame = qwen3i_guide_frame(k, s, t.frame);
        if (t.frame > -2) s->threads[s->n_threads++] = t;
    }
    return s->n_threads;
}

static void qwen3i_guide_begin(qwen3i_masker *k, qwen3i_guide *s, const qwen3_grammar *g) {
    qwen3i_span set;
    int i;
    s->g = k->m.g = g;
    s->serial = g->serial;
    k->m.n_pool = k->m.base = k->m.n_frames = k->m.ways = set.first = 0;
    qwen3i_proceed(&k->m, g->root, -1, 0);
    for (i = 0; i < k->m.n_pool; i++)
        if (QWEN3I_NODE(g, k->m.pool[i].node)->kind == QWEN3I_VALUE) k->m.pool[i].state = 1;
    set.n = k->m.n_pool;
    qwen3i_guide_store(k, s, set);
}

/* The place after these bytes. 0: they are not part of the grammar, and the guide is as it was. */
static int qwen3i_guide_bytes(qwen3i_masker *k, qwen3i_guide *s, const char *p, int n) {
    qwen3i_span set = qwen3i_guide_load(k, s);
    int i;
    for (i = 0; i < n && set.n > 0; i++) {
        const int count = qwen3i_advance(&k->m, set, (unsigned char)p[i]);
        set.first = k->m.base;
        set.n = count;
    }
    return set.n > 0 && qwen3i_guide_store(k, s, set);
}

/* The mask of the tokens that may come next, in k->mask. Returns whether the text may end here. */
static int qwen3i_guide_mask(qwen3i_masker *k, const qwen3i_guide *s) {
    qwen3i_span set = qwen3i_guide_load(k, s);
    qwen3i_mask_make(k, set.n);
    return qwen3i_set_may_end(&k->m, set);
}

/* Bytes of the shortest way to the end after a text; FAR: it does not fit. */
static int qwen3i_guide_cost(qwen3i_masker *k, const qwen3i_guide *s, const char *p, int n) {
    qwen3i_span set = qwen3i_guide_load(k, s);
    int i;
    for (i = 0; i < n && set.n > 0; i++) {
        const int count = qwen3i_advance(&k->m, set, (unsigned char)p[i]);
        set.first = k->m.base;
        set.n = count;
    }
    return qwen3i_set_cost(&k->m, set);
}

/* The longest token on the shortest way to the end; -1: this is the end. */
static qwen3_token qwen3i_guide_shortest(qwen3i_masker *k, const qwen3i_guide *s) {
    const qwen3i_branch *t = k->v->tree.nodes;
    qwen3i_span set = qwen3i_guide_load(k, s), best_set, next;
    uint32_t i, begin = 0, end = k->v->tree.n, best;
    int cost = qwen3i_set_cost(&k->m, set), token = -1;
    while (cost > 0 && begin < end) {
        const int pool = k->m.n_pool, frames = k->m.n_frames;
        int lowest = cost;
        best = end;
        for (i = begin; i < end; i = t[i].skip) {
            int value;
            next.first = k->m.n_pool = pool;
            k->m.n_frames = frames;
            next.n = qwen3i_advance(&k->m, set, t[i].byte);
            value = qwen3i_set_cost(&k->m, next);
            if (next.n > 0 && (value < lowest || (best == end && token < 0 && value <= lowest))) {
                lowest = value;
                best = i;
            }
        }
        if (best == end) break;
        best_set.first = k->m.n_pool = pool;
        k->m.n_frames = frames;
        best_set.n = qwen3i_advance(&k->m, set, t[best].byte);
        set = best_set;
        cost = lowest;
        if (t[best].token >= 0) token = t[best].token;
        begin = best + 1;
        end = t[best].skip;
    }
    return token;
}

/* The only token in the mask; -1: there are none, or several. */
static qwen3_token qwen3i_mask_single(const qwen3i_masker *k) {
    qwen3_token token = -1;
    int i, b;
    for (i = 0; i < k->v->n_words; i++) {
        const uint32_t w = k->mask[i];
        if (w == 0) continue;
        if (token >= 0 || (w & (w - 1))) return -1;
        for (b = 0; !(w >> b & 1u); b++) {}
        token = 32 * i + b;
    }
    return token;
}

/* ---- scratch memory of a context ------------------------------------------------------------- */
static void qwen3i_masker_free(const qwen3_allocator *a, qwen3i_masker *k) {
    if (!k) return;
    qwen3i_free(a, k->memory, k->memory_size);
    qwen3i_free(a, k, sizeof *k);
}

/* A part of a block, or only its size. */
static void *qwen3i_masker_part(char *base, size_t *used, size_t n, size_t size) {
    const size_t at = (*used + 63) / 64 * 64;
    *used = at + n * size;
    return base ? base + at : NULL;
}

static void qwen3i_masker_carve(qwen3i_masker *k, char *base, size_t *used) {
    const size_t words = (size_t)k->v->n_words;
    int i;
    k->m.pool = (qwen3i_thread *)qwen3i_masker_part(base, used, QWEN3I_POOL_THREADS, sizeof *k->m.pool);
    k->m.frames = (int *)qwen3i_masker_part(base, used, QWEN3I_POOL_FRAMES, sizeof *k->m.frames);
    k->levels = (qwen3i_level *)qwen3i_masker_part(base, used, (size_t)k->v->depth + 2, sizeof *k->levels);
    k->suffix_ok = (unsigned char *)qwen3i_masker_part(base, used, (size_t)k->v->suffixes.n + 1, 1);
    k->mask = (uint32_t *)qwen3i_masker_part(base, used, words, sizeof *k->mask);
    for (i = 0; i < QWEN3I_CACHED; i++) {
        k->cached[i].mask = (uint32_t *)qwen3i_masker_part(base, used, words, sizeof *k->mask);
        k->cached[i].crossings = (qwen3i_crossing *)qwen3i_masker_part(base, used, QWEN3I_MAX_CROSSINGS,
                sizeof(qwen3i_crossing));
    }
}

static qwen3i_masker *qwen3i_masker_make(const qwen3_allocator *a, const qwen3i_index *v) {
    qwen3i_masker *k = (qwen3i_masker *)qwen3i_alloc_zero(a, 1, sizeof *k);
    size_t used = 0;
    if (!k) return NULL;
    k->v = v;
    k->m.cap_pool = QWEN3I_POOL_THREADS;
    k->m.cap_frames = QWEN3I_POOL_FRAMES;
    qwen3i_masker_carve(k, NULL, &used);
    k->memory_size = used;
    k->memory = qwen3i_alloc(a, used);
    if (!k->memory) { qwen3i_masker_free(a, k); return NULL; }
    used = 0;
    qwen3i_masker_carve(k, (char *)k->memory, &used);
    return k;
}
/* ================================================================================================
   SERVICES FOR BACKENDS: see the backend interface
   ================================================================================================ */
QWEN3_API qwen3i_model_view qwen3_backend_view(const qwen3_model *m) {
    qwen3i_model_view v;
    v.config = &m->config;
    v.weights = &m->weights;
    v.allocator = &m->allocator;
    v.eos = m->eos;
    v.n_eos = m->n_eos;
    v.n_tokens = m->info.n_tokens ? m->info.n_tokens : m->config.n_vocab;
    return v;
}

QWEN3_API float qwen3_backend_rotation(float *freqs, const qwen3i_config *cfg, double yarn_factor) {
    return qwen3i_rope_freqs(freqs, cfg, yarn_factor);
}
/* ================================================================================================
   CONTEXT: sequences, and evaluating batches of them in chunks
   ================================================================================================ */
#define QWEN3I_MAX_DRAFT 16
#define QWEN3I_PATIENCE  64             /* see qwen3i_draft */

typedef struct qwen3i_draft {           /* what a sequence speculates with */
    float      *logits;                 /* [most + 1, n_vocab] of a step's rows */
    int         most, n;                /* guesses that there is room for; those of this step, */
    qwen3_token tokens[1 + QWEN3I_MAX_DRAFT];   /* behind the token that was chosen before them */
    double      rate;                   /* share of the guesses that were right lately */
    int         idle, patience;         /* steps since the last guess; after so many one is tried */
} qwen3i_draft;

typedef struct qwen3i_seq {
    qwen3_token *tokens;                /* [max_ctx] */
    int          len;
    int          fresh;                 /* the kept logits are those of the last token */
    int          planned;               /* tokens of a prompt that is being brought in: those from len on
                                           are still to be evaluated. 0: there is none */
    int          grammar_start;         /* position from which a grammar applies; -1: not known */
    qwen3i_guide *guide;                /* its place in that grammar; NULL until it has one */
    qwen3i_draft  draft;                /* most is 0 until it speculates */
    qwen3_grammar *tools;               /* of the conversation's tools, if calls are held to them */
} qwen3i_seq;

typedef struct qwen3i_pace {            /* how much to evaluate at once */
    int  (*cancel)(void *user);         /* the caller's hook */
    void  *cancel_user;
    /* in a step at most: prefill_chunk, or less after steps were cancelled */
    int    rows;
    int    n_steps;                     /* complete in this call */
    int    insist;                      /* the first step of this call is not cancelled */
    /* even a step of one row was cancelled in this call, before it came to any */
    int    starved;
    double prompt_ms, decode_ms;        /* a prompt's row, a decode step, as last measured */
    int    prompt_rows;                 /* in the step that prompt_ms is of */
    /* lately: a step of one sequence with so many guesses (0: not known), and a guess of a draft's model */
    double step_ms[1 + QWEN3I_MAX_DRAFT], draft_ms;
    int    chosen_there;                /* the backend, which works ahead, chose the last step's tokens */
    int    always_guess;                /* whatever it costs: for tests, */
    const qwen3_token *answer;          /* [max_ctx] as is this: guesses instead of others; NULL: none */
    int    turn;                        /* whose turn it is where a budget is short: answers or prompts */
} qwen3i_pace;

struct qwen3_ctx {
    const qwen3_model *model;
    qwen3_ctx_desc     desc;            /* with all defaults filled in */
    void              *state;           /* the backend's */
    qwen3i_seq        *seqs;            /* [max_seqs] */
    qwen3_token       *prompt;          /* [max_ctx] where conversations are rendered */
    qwen3_token       *row_tokens;      /* [rows] the batch being built, */
    int32_t           *row_seqs, *row_positions;
    qwen3i_out        *outs;            /* [rows] and what is wanted of it */
    qwen3i_next       *next;            /* [max_seqs] a decode step */
    qwen3_item        *items;           /* [max_seqs] */
    uint64_t          *rngs;            /* [max_seqs] */
    qwen3i_sampler_scratch scratch;
    qwen3i_masker     *masker;          /* NULL until a grammar is used */
    qwen3_stats        stats;
    qwen3i_pace        pace;
    char               error[256];
    void              *memory;          /* all of the above lies in one block */
    size_t             memory_size;
};

static qwen3i_err qwen3i_ctx_err(qwen3_ctx *c) {
    qwen3i_err e;
    e.text = c->error;
    e.cap = sizeof c->error;
    return e;
}

static int qwen3i_poll_cancel(void *user) {
    const qwen3i_pace *p = &((const qwen3_ctx *)user)->pace;
    return !(p->insist && p->n_steps == 0) && p->cancel(p->cancel_user);
}

/* Every public function on a context begins here: its messages go to the context. */
static qwen3_result qwen3i_enter(qwen3_ctx *c, qwen3i_err *err) {
    if (!c) return QWEN3_ERR_ARG;
    *err = qwen3i_ctx_err(c);
    c->pace.n_steps = 0;
    c->pace.insist = c->pace.starved;
    c->pace.starved = 0;
    return QWEN3_OK;
}

QWEN3_API const char *qwen3_ctx_error(const qwen3_ctx *c) { return c ? c->error : ""; }

QWEN3_API qwen3_stats qwen3_ctx_stats(const qwen3_ctx *c) {
    qwen3_stats none;
    if (c) return c->stats;
    memset(&none, 0, sizeof none);
    return none;
}

/* ---- creating -------------------------------------------------------------------------------- */
/* Positions the model can tell apart, stretched by YaRN if that is on. */
static int qwen3i_max_positions(const qwen3i_config *cfg, float yarn_factor) {
    const double factor = yarn_factor > 0 ? (double)yarn_factor : cfg->yarn_factor;
    double n = cfg->yarn_original_ctx * factor;
    if (!(n > cfg->max_ctx)) return cfg->max_ctx;
    return n < INT_MAX ? (int)n : INT_MAX;
}

static int qwen3i_rows(const qwen3_ctx_desc *d) { return qwen3i_max(d->prefill_chunk, d->max_seqs); }

/* Check a descriptor and fill its defaults in. */
QWEN3I_COLD
static qwen3_result qwen3i_resolve_ctx(const qwen3_model *m, const qwen3_ctx_desc *in, qwen3_ctx_desc *d,
                                       const qwen3i_err *err) {
    int limit;
    memset(d, 0, sizeof *d);
    if (in) *d = *in;
    if (!qwen3i_between(d->yarn_factor, 0, 1024))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "yarn_factor is not between 0 and 1024");
    limit = qwen3i_max_positions(&m->config, d->yarn_factor);
    if (d->max_ctx == 0) d->max_ctx = qwen3i_min(4096, limit);
    if (d->max_ctx < 0 || d->max_ctx > limit)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "max_ctx is %d; the model has 1 to %d positions (more with "
                                               "yarn_factor)", d->max_ctx, limit);
    if (d->max_seqs == 0) d->max_seqs = 1;
    if (d->max_seqs < 0 || d->max_seqs > 4096)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "max_seqs is %d; 1 to 4096 is possible", d->max_seqs);
    if (d->prefill_chunk < 0 || d->prefill_chunk > 65536)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "prefill_chunk is %d; 1 to 65536 is possible",
                           d->prefill_chunk);
    if (d->prefill_chunk == 0) d->prefill_chunk = m->backend->default_chunk;
    if ((int64_t)d->prefill_chunk > (int64_t)d->max_ctx * d->max_seqs)
        d->prefill_chunk = d->max_ctx * d->max_seqs;
    if (d->kv_type == QWEN3_KV_DEFAULT) d->kv_type = QWEN3_KV_F16;
    if (d->kv_type < QWEN3_KV_F32 || d->kv_type > QWEN3_KV_Q8_0)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "kv_type %d is unknown", d->kv_type);
    if (d->kv_type == QWEN3_KV_Q8_0 && m->backend != qwen3i_cpu_backend())
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "kv_type Q8_0: the %s backend has F32, F16 and BF16",
                           m->backend->name);
    if (d->kv_type == QWEN3_KV_Q8_0 && m->config.head_dim % 32)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "kv_type Q8_0 needs heads of whole blocks of 32; this "
                                                       "model's have %d", m->config.head_dim);
    if (d->threads < 0) return qwen3i_fail(err, QWEN3_ERR_ARG, "threads is negative");
    if (d->threads == 0) d->threads = qwen3i_default_threads();         /* once: the layout must not change */
    if (d->probe.show && m->backend != qwen3i_cpu_backend())
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "a probe needs the CPU backend");
    if (!d->allocator.alloc && !d->allocator.free) d->allocator = m->allocator;
    if (!d->logger.log) d->logger = m->logger;
    return qwen3i_check_allocator(&d->allocator, err);
}

/* Lay a context's arrays out in a block (NULL: only count). Returns the block's size. */
QWEN3I_COLD
static uint64_t qwen3i_ctx_layout(qwen3_ctx *c, const qwen3i_config *cfg, const qwen3_ctx_desc *d,
                                  void *block) {
    qwen3i_arena m = qwen3i_arena_at(block, 64);
    const uint64_t rows = (uint64_t)qwen3i_rows(d), seqs = (uint64_t)d->max_seqs,
                   vocab = (uint64_t)cfg->n_vocab;
    qwen3_token *tokens;
    int i;
    c->seqs          = (qwen3i_seq *)qwen3i_arena_take(&m, seqs, 1, sizeof *c->seqs);
    tokens           = (qwen3_token *)qwen3i_arena_take(&m, seqs, (uint64_t)d->max_ctx, sizeof *tokens);
    c->prompt        = (qwen3_token *)qwen3i_arena_take(&m, (uint64_t)d->max_ctx, 1, sizeof *c->prompt);
    c->row_tokens    = (qwen3_token *)qwen3i_arena_take(&m, rows, 1, sizeof *c->row_tokens);
    c->row_seqs      = (int32_t *)qwen3i_arena_take(&m, rows, 1, sizeof *c->row_seqs);
    c->row_positions = (int32_t *)qwen3i_arena_take(&m, rows, 1, sizeof *c->row_positions);
    c->outs          = (qwen3i_out *)qwen3i_arena_take(&m, rows, 1, sizeof *c->outs);
    c->next          = (qwen3i_next *)qwen3i_arena_take(&m, seqs, 1, sizeof *c->next);
    c->items         = (qwen3_item *)qwen3i_arena_take(&m, seqs, 1, sizeof *c->items);
    c->rngs          = (uint64_t *)qwen3i_arena_take(&m, seqs, 1, sizeof *c->rngs);
    c->scratch.logits     = (float *)qwen3i_arena_take(&m, vocab, 1, sizeof *c->scratch.logits);
    c->scratch.candidates = (qwen3i_candidate *)qwen3i_arena_take(&m, vocab, 1,
                                                                  sizeof *c->scratch.candidates);
    for (i = 0; block && i < d->max_seqs; i++) {
        c->seqs[i].tokens = tokens + (size_t)i * (size_t)d->max_ctx;
        c->seqs[i].len = 0;
        c->seqs[i].grammar_start = -1;
        c->seqs[i].guide = NULL;
        c->seqs[i].draft.most = 0;
        c->seqs[i].tools = NULL;
        c->seqs[i].fresh = 0;
        c->seqs[i].planned = 0;
    }
    return qwen3i_arena_size(&m);
}

static uint64_t qwen3i_ctx_bytes(const qwen3_model *m, const qwen3_ctx_desc *d) {
    qwen3_ctx c;
    return qwen3i_size_add(qwen3i_ctx_layout(&c, &m->config, d, NULL), sizeof c);
}

QWEN3_API qwen3_memory qwen3_ctx_memory(const qwen3_model *m, const qwen3_ctx_desc *desc) {
    qwen3_memory bytes = {0, 0};
    qwen3_ctx_desc d;
    if (!m || !m->weights.layers || qwen3i_resolve_ctx(m, desc, &d, NULL) != QWEN3_OK) return bytes;
    bytes = m->backend->ctx_memory(m->backend_state, m, &d);
    bytes.host_bytes = qwen3i_size_add(bytes.host_bytes, qwen3i_ctx_bytes(m, &d));
    return bytes;
}

static qwen3_result qwen3i_build_ctx(qwen3_ctx *c, const qwen3i_err *err) {
    const qwen3_model *m = c->model;
    uint64_t bytes = qwen3i_ctx_layout(c, &m->config, &c->desc, NULL);
    if (qwen3i_size_fits(bytes)) c->memory = qwen3i_alloc(&c->desc.allocator, (size_t)bytes);
    if (!c->memory) return qwen3i_no_memory(err, "the context", bytes);
    c->memory_size = (size_t)bytes;
    qwen3i_ctx_layout(c, &m->config, &c->desc, c->memory);
    return m->backend->ctx_create(&c->state, m->backend_state, m, &c->desc, err);
}

QWEN3I_COLD
QWEN3_API qwen3_result qwen3_ctx_create(qwen3_ctx **out, const qwen3_model *m, const qwen3_ctx_desc *desc,
                                        char *err_text, size_t err_size) {
    qwen3i_err err;
    qwen3_ctx_desc d;
    qwen3_ctx *c;
    qwen3_result r;
    err = qwen3i_err_begin(err_text, err_size);
    if (!out) return qwen3i_fail(&err, QWEN3_ERR_ARG, "out is NULL");
    *out = NULL;
    if (!m) return qwen3i_fail(&err, QWEN3_ERR_ARG, "model is NULL");
    if (!m->weights.layers)
        return qwen3i_fail(&err, QWEN3_ERR_ARG, "the model was loaded with QWEN3_LOAD_VOCAB_ONLY: it has no "
                                                "weights");
    r = qwen3i_resolve_ctx(m, desc, &d, &err);
    if (r != QWEN3_OK) return r;
    c = (qwen3_ctx *)qwen3i_alloc_zero(&d.allocator, 1, sizeof *c);
    if (!c) return qwen3i_no_memory(&err, "the context", sizeof *c);
    c->model = m;
    c->desc = d;
    c->pace.rows = qwen3i_rows(&d);
    c->pace.cancel = d.cancel;
    c->pace.cancel_user = d.cancel_user;
    if (d.cancel) { c->desc.cancel = qwen3i_poll_cancel; c->desc.cancel_user = c; }
    r = qwen3i_build_ctx(c, &err);
    if (r != QWEN3_OK) { qwen3_ctx_free(c); return r; }
    *out = c;
    return QWEN3_OK;
}

static size_t qwen3i_draft_bytes(const qwen3_ctx *c, int most) {
    return (size_t)(most + 1) * (size_t)c->model->config.n_vocab * sizeof(float);
}

static void qwen3i_draft_free(qwen3_ctx *c, qwen3i_draft *d) {
    if (d->most > 0) qwen3i_free(&c->desc.allocator, d->logits, qwen3i_draft_bytes(c, d->most));
    d->most = 0;
}

/* A guide, and the mask that goes to a backend. */
static size_t qwen3i_guide_size(const qwen3_ctx *c) {
    return sizeof(qwen3i_guide) + (size_t)c->masker->v->n_words * sizeof(uint32_t);
}

QWEN3I_COLD
QWEN3_API void qwen3_ctx_free(qwen3_ctx *c) {
    qwen3_allocator a;
    int i;
    if (!c) return;
    a = c->desc.allocator;
    if (c->state) c->model->backend->ctx_free(c->state);
    for (i = 0; c->memory && i < c->desc.max_seqs; i++) {
        if (c->seqs[i].guide) qwen3i_free(&a, c->seqs[i].guide, qwen3i_guide_size(c));
        qwen3i_draft_free(c, &c->seqs[i].draft);
        qwen3i_grammar_free(c->seqs[i].tools);
    }
    qwen3i_masker_free(&a, c->masker);
    qwen3i_free(&a, c->memory, c->memory_size);
    qwen3i_free(&a, c, sizeof *c);
}

/* ---- sequences ------------------------------------------------------------------------------- */
static qwen3_result qwen3i_check_seq(qwen3_ctx *c, int seq, const qwen3i_err *err) {
    if (seq >= 0 && seq < c->desc.max_seqs) return QWEN3_OK;
    return qwen3i_fail(err, QWEN3_ERR_ARG, "there is no sequence %d; max_seqs is %d", seq, c->desc.max_seqs);
}

static qwen3_result qwen3i_enter_seq(qwen3_ctx *c, int seq, qwen3i_err *err) {
    qwen3_result r = qwen3i_enter(c, err);
    return r == QWEN3_OK ? qwen3i_check_seq(c, seq, err) : r;
}

static qwen3_result qwen3i_check_tokens(const qwen3_ctx *c, const qwen3_token *tokens, int n,
                                        const qwen3i_err *err) {
    int i;
    if (n < 0 || (n > 0 && !tokens)) return qwen3i_fail(err, QWEN3_ERR_ARG, "tokens is NULL or n negative");
    for (i = 0; i < n; i++)
        if (tokens[i] < 0 || tokens[i] >= c->model->config.n_vocab)
            return qwen3i_fail(err, QWEN3_ERR_ARG, "tokens[%d] is %d; ids are 0 to %d", i, (int)tokens[i],
                               c->model->config.n_vocab - 1);
    return QWEN3_OK;
}

QWEN3_API const qwen3_token *qwen3_seq_tokens(const qwen3_ctx *c, int seq, int *n) {
    const int known = c && seq >= 0 && seq < c->desc.max_seqs;
    if (n) *n = known ? c->seqs[seq].len : -1;
    return known ? c->seqs[seq].tokens : NULL;
}

static void qwen3i_truncate(qwen3i_seq *s, int len) {
    if (len < s->len) s->fresh = 0;
    if (s->guide && len < s->guide->pos) s->guide->pos = -1;   /* it is found again from the tokens */
    if (len < s->grammar_start) s->grammar_start = -1;
    s->len = len;
    s->planned = 0;
}

QWEN3_API qwen3_result qwen3_seq_truncate(qwen3_ctx *c, int seq, int len) {
    qwen3i_err err;
    qwen3_result r = qwen3i_enter_seq(c, seq, &err);
    if (r != QWEN3_OK) return r;
    if (len < 0 || len > c->seqs[seq].len)
        return qwen3i_fail(&err, QWEN3_ERR_ARG, "cannot truncate sequence %d of %d tokens to %d", seq,
                           c->seqs[seq].len, len);
    qwen3i_truncate(&c->seqs[seq], len);
    return QWEN3_OK;
}

QWEN3_API qwen3_result qwen3_seq_copy(qwen3_ctx *c, int dst, int src) {
    qwen3i_err err;
    qwen3i_seq *from, *to;
    qwen3_result r = qwen3i_enter_seq(c, dst, &err);
    if (r == QWEN3_OK) r = qwen3i_check_seq(c, src, &err);
    if (r != QWEN3_OK || dst == src) return r;
    from = &c->seqs[src];
    to = &c->seqs[dst];
    r = c->model->backend->seq_copy(c->state, dst, src, from->len, &err);
    if (r != QWEN3_OK) return r;
    memcpy(to->tokens, from->tokens, (size_t)from->len * sizeof *to->tokens);
    to->len = from->len;
    to->fresh = from->fresh;
    to->planned = 0;
    to->grammar_start = from->grammar_start;
    if (to->guide) to->guide->pos = -1;
    return QWEN3_OK;
}

/* ---- evaluating ------------------------------------------------------------------------------ */
/* Describe what item wants of its k-th token's row. Returns 0 if nothing. */
static int qwen3i_want(const qwen3_ctx *c, const qwen3_item *item, int k, int row, qwen3i_out *out) {
    const size_t vocab = (size_t)c->model->config.n_vocab, embd = (size_t)c->model->config.n_embd;
    const int last = k == item->n - 1, keep = last && !item->more && c->model->info.has_head;
    memset(out, 0, sizeof *out);
    out->row = row;
    out->keep_seq = keep ? item->seq : -1;
    if (item->all_logits) out->logits = item->all_logits + (size_t)k * vocab;
    if (item->all_hidden) out->hidden = item->all_hidden + (size_t)k * embd;
    else if (last)        out->hidden = item->hidden;
    if (item->logprobs && !last) { out->logprob = &item->logprobs[k + 1]; out->target = item->tokens[k + 1]; }
    return keep || out->logits || out->hidden || out->logprob;
}

/* hidden and all_hidden both wanted: the last row of one is the other. */
static void qwen3i_copy_hidden(const qwen3_ctx *c, const qwen3_item *item) {
    const size_t embd = (size_t)c->model->config.n_embd;
    if (item->hidden && item->all_hidden && item->n > 0)
        memcpy(item->hidden, item->all_hidden + ((size_t)item->n - 1) * embd, embd * sizeof(float));
}

/* The sequences take over the tokens of a batch that was evaluated. */
static void qwen3i_append_rows(qwen3_ctx *c, const qwen3i_batch *b) {
    int i;
    for (i = 0; i < b->n_rows; i++) {
        qwen3i_seq *s = &c->seqs[b->seqs[i]];
        s->tokens[s->len++] = b->tokens[i];
        s->fresh = 0;
    }
    for (i = 0; i < b->n_outs; i++) if (b->outs[i].keep_seq >= 0) c->seqs[b->outs[i].keep_seq].fresh = 1;
}

/* A step that failed may have replaced some of the kept logits: have them computed again when asked for. */
static void qwen3i_forget_logits(qwen3_ctx *c, const qwen3i_batch *b) {
    int i;
    for (i = 0; i < b->n_outs; i++) if (b->outs[i].keep_seq >= 0) c->seqs[b->outs[i].keep_seq].fresh = 0;
}

/* A step is complete. Where steps had become small they grow again. */
static void qwen3i_stepped(qwen3_ctx *c) {
    qwen3i_pace *p = &c->pace;
    if (++p->n_steps % 4 == 0) p->rows = qwen3i_min(qwen3i_rows(&c->desc), 2 * p->rows);
}

/* A step of so many rows was cancelled. Smaller ones follow if it was the call's first: see desc.cancel. */
static void qwen3i_cancelled(qwen3i_pace *p, int rows, int may_shrink) {
    if (p->n_steps > p->insist) return;
    if (may_shrink && rows > 1) p->rows = qwen3i_max(1, rows / 8);
    else p->starved = 1;
}

/* Evaluate a batch. decode: its rows are tokens one by one, rather than pieces of prompts. */
static qwen3_result qwen3i_eval_step(qwen3_ctx *c, const qwen3i_batch *b, int decode, const qwen3i_err *err) {
    const double start = qwen3i_now_ms();
    qwen3_result r = c->model->backend->forward(c->state, b, err);
    if (r == QWEN3_STOPPED) qwen3i_cancelled(&c->pace, b->n_rows, !decode);
    if (r != QWEN3_OK) { qwen3i_forget_logits(c, b); return r; }
    qwen3i_append_rows(c, b);
    qwen3i_stepped(c);
    if (decode) { c->stats.n_decode += b->n_rows;  c->stats.decode_ms += qwen3i_now_ms() - start; }
    else        { c->stats.n_prefill += b->n_rows; c->stats.prefill_ms += qwen3i_now_ms() - start; }
    return QWEN3_OK;
}

typedef struct qwen3i_cursor { int item, k; } qwen3i_cursor;     /* the next token: items[item].tokens[k] */

/* Fill a batch of at most so many rows. */
static void qwen3i_fill(qwen3_ctx *c, const qwen3_item *items, int n_items, int rows, qwen3i_cursor *at,
                        qwen3i_batch *b) {
    const qwen3i_cursor first = *at;
    b->n_rows = b->n_outs = 0;
    while (at->item < n_items && b->n_rows < rows) {
        const qwen3_item *it = &items[at->item];
        if (at->k == it->n) { at->item++; at->k = 0; continue; }
        c->row_tokens[b->n_rows] = it->tokens[at->k];
        c->row_seqs[b->n_rows] = it->seq;
        c->row_positions[b->n_rows] = c->seqs[it->seq].len + at->k - (at->item == first.item ? first.k : 0);
        b->n_outs += qwen3i_want(c, it, at->k, b->n_rows, &c->outs[b->n_outs]);
        b->n_rows++;
        at->k++;
    }
}

/* Evaluate items whose arguments have been checked, in steps. */
static qwen3_result qwen3i_eval(qwen3_ctx *c, const qwen3_item *items, int n_items, const qwen3i_err *err) {
    qwen3i_cursor at = {0, 0};
    qwen3i_batch b;
    qwen3_result r = QWEN3_OK;
    int i, decode = 1;
    for (i = 0; i < n_items; i++) decode &= items[i].n <= 1;
    b.tokens = c->row_tokens;
    b.seqs = c->row_seqs;
    b.positions = c->row_positions;
    b.outs = c->outs;
    while (r == QWEN3_OK) {
        qwen3i_fill(c, items, n_items, decode ? qwen3i_rows(&c->desc) : c->pace.rows, &at, &b);
        if (b.n_rows == 0) break;
        r = qwen3i_eval_step(c, &b, decode, err);
    }
    return r;
}

/* Append one token. */
static qwen3_result qwen3i_append(qwen3_ctx *c, int seq, qwen3_token token, const qwen3i_err *err) {
    qwen3_item item;
    memset(&item, 0, sizeof item);
    item.seq = seq;
    item.tokens = &token;
    item.n = 1;
    return qwen3i_eval(c, &item, 1, err);
}

static qwen3_result qwen3i_check_head(const qwen3_model *m, const qwen3i_err *err) {
    if (m->info.has_head) return QWEN3_OK;
    return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                       "the model has no lm_head.weight: it makes embeddings, not logits");
}

/* Make the kept logits those of the sequence's last token, evaluating it once more if they are not. */
static qwen3_result qwen3i_refresh(qwen3_ctx *c, int seq, const qwen3i_err *err) {
    qwen3i_seq *s = &c->seqs[seq];
    qwen3_result r = qwen3i_check_head(c->model, err);
    if (r != QWEN3_OK) return r;
    if (s->fresh) return QWEN3_OK;
    if (s->len == 0)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "sequence %d is empty: evaluate something first", seq);
    s->len--;
    r = qwen3i_append(c, seq, s->tokens[s->len], err);
    if (r != QWEN3_OK) s->len++;
    else c->pace.n_steps--;             /* nothing was gained */
    return r;
}

/* The logits that follow a sequence: [n_vocab] on the host. */
static qwen3_result qwen3i_get_logits(qwen3_ctx *c, int seq, const float **out, const qwen3i_err *err) {
    qwen3_result r = qwen3i_refresh(c, seq, err);
    return r == QWEN3_OK ? c->model->backend->logits(c->state, seq, out, err) : r;
}

/* The log-probability of an item's first token comes from the logits that the sequence already has. */
static qwen3_result qwen3i_first_logprob(qwen3_ctx *c, const qwen3_item *item, const qwen3i_err *err) {
    const float *logits;
    qwen3_result r;
    if (!item->logprobs || item->n == 0) return QWEN3_OK;
    item->logprobs[0] = 0;
    if (c->seqs[item->seq].len == 0) return QWEN3_OK;
    r = qwen3i_get_logits(c, item->seq, &logits, err);
    if (r == QWEN3_OK)
        item->logprobs[0] = (float)((double)logits[item->tokens[0]] - qwen3i_log_sum_exp(logits,
                c->model->config.n_vocab));
    return r;
}

static qwen3_result qwen3i_check_item(qwen3_ctx *c, const qwen3_item *items, int i, const qwen3i_err *err) {
    const qwen3_item *item = &items[i];
    qwen3_result r = qwen3i_check_seq(c, item->seq, err);
    int len, k;
    if (r == QWEN3_OK) r = qwen3i_check_tokens(c, item->tokens, item->n, err);
    if (r != QWEN3_OK) return r;
    for (k = 0; k < i; k++)
        if (items[k].seq == item->seq)
            return qwen3i_fail(err, QWEN3_ERR_ARG, "items %d and %d are both of sequence %d", k, i,
                               item->seq);
    if (item->all_logits || item->logprobs) r = qwen3i_check_head(c->model, err);
    if (r != QWEN3_OK) return r;
    len = c->seqs[item->seq].len;
    if (item->n > c->desc.max_ctx - len)
        return qwen3i_fail(err, QWEN3_ERR_CONTEXT_FULL,
                           "sequence %d holds %d of %d positions: %d more do not fit", item->seq, len,
                               c->desc.max_ctx, item->n);
    return QWEN3_OK;
}

QWEN3_API qwen3_result qwen3_eval(qwen3_ctx *c, const qwen3_item *items, int n_items) {
    qwen3i_err err;
    qwen3_result r = qwen3i_enter(c, &err);
    int i;
    if (r != QWEN3_OK) return r;
    if (n_items < 0 || n_items > c->desc.max_seqs || (n_items > 0 && !items))
        return qwen3i_fail(&err, QWEN3_ERR_ARG, "items is NULL, or n_items (%d) not 0 to max_seqs (%d)",
                           n_items,
                           c->desc.max_seqs);
    for (i = 0; i < n_items && r == QWEN3_OK; i++) r = qwen3i_check_item(c, items, i, &err);
    for (i = 0; i < n_items && r == QWEN3_OK; i++) r = qwen3i_first_logprob(c, &items[i], &err);
    for (i = 0; i < n_items && r == QWEN3_OK; i++) c->seqs[items[i].seq].planned = 0;
    if (r == QWEN3_OK) r = qwen3i_eval(c, items, n_items, &err);
    for (i = 0; i < n_items && r == QWEN3_OK; i++) qwen3i_copy_hidden(c, &items[i]);
    return r;
}

/* ---- prompts: what a sequence shall hold, brought in by pieces ------------------------------- */
static int qwen3i_to_come(const qwen3i_seq *s) { return qwen3i_max(0, s->planned - s->len); }

/* Keep what the sequence and these tokens have in common, and put the others behind it, to be evaluated. What
   an unfinished plan had evaluated, or found, is not counted as reused once more. */
static qwen3_result qwen3i_plan(qwen3_ctx *c, int seq, const qwen3_token *tokens, int n,
                                const qwen3i_err *err) {
    qwen3i_seq *s = &c->seqs[seq];
    const int known = qwen3i_to_come(s) > 0 ? s->len : 0;
    int common = 0;
    if (n > c->desc.max_ctx)
        return qwen3i_fail(err, QWEN3_ERR_CONTEXT_FULL, "%d tokens do not fit into %d positions", n,
                           c->desc.max_ctx);
    while (common < n && common < s->len && s->tokens[common] == tokens[common]) common++;
    qwen3i_truncate(s, common);
    memmove(s->tokens + common, tokens + common, (size_t)(n - common) * sizeof *tokens);
    s->planned = n;
    c->stats.n_reused += qwen3i_max(0, common - known);
    return QWEN3_OK;
}

/* The next piece of at most `most` tokens of what is planned. */
static qwen3_item qwen3i_piece(const qwen3_ctx *c, int seq, int most) {
    const qwen3i_seq *s = &c->seqs[seq];
    qwen3_item item;
    memset(&item, 0, sizeof item);
    item.seq = seq;
    item.tokens = s->tokens + s->len;
    item.n = qwen3i_min(qwen3i_to_come(s), most);
    item.more = item.n < qwen3i_to_come(s);
    return item;
}

/* All that is planned, or at most max_new tokens of it. */
static qwen3_result qwen3i_bring_in(qwen3_ctx *c, int seq, int max_new, const qwen3i_err *err) {
    qwen3_item item = qwen3i_piece(c, seq, max_new > 0 ? max_new : c->desc.max_ctx);
    return item.n > 0 ? qwen3i_eval(c, &item, 1, err) : QWEN3_OK;
}

QWEN3_API int qwen3_sync(qwen3_ctx *c, int seq, const qwen3_token *tokens, int n, int max_new) {
    qwen3i_err err;
    qwen3_result r = qwen3i_enter_seq(c, seq, &err);
    if (r == QWEN3_OK) r = qwen3i_check_tokens(c, tokens, n, &err);
    if (r == QWEN3_OK && max_new < 0) r = qwen3i_fail(&err, QWEN3_ERR_ARG, "max_new is negative");
    if (r == QWEN3_OK && n > 0) r = qwen3i_plan(c, seq, tokens, n, &err);
    else if (r == QWEN3_OK) qwen3i_truncate(&c->seqs[seq], 0);
    if (r == QWEN3_OK) r = qwen3i_bring_in(c, seq, max_new, &err);
    return r < 0 ? (int)r : qwen3i_to_come(&c->seqs[seq]);
}

QWEN3_API const float *qwen3_logits(qwen3_ctx *c, int seq) {
    const float *logits = NULL;
    qwen3i_err err;
    qwen3_result r = qwen3i_enter_seq(c, seq, &err);
    return r == QWEN3_OK && qwen3i_get_logits(c, seq, &logits, &err) == QWEN3_OK ? logits : NULL;
}

/* ================================================================================================
   GENERATION: choosing tokens, one by one, and turning them into text
   ================================================================================================ */
static int qwen3i_is_eos(const qwen3_model *m, qwen3_token t) {
    int i;
    for (i = 0; i < m->n_eos; i++) if (m->eos[i] == t) return 1;
    return 0;
}

/* Ids from which a token may be chosen: the embedding's padding rows have no text. */
static int qwen3i_n_choose(const qwen3_model *m) {
    return m->info.n_tokens ? m->info.n_tokens : m->config.n_vocab;
}

/* ---- grammars: where one applies, and the tokens that it allows ------------------------------ */
enum { QWEN3I_NO_TURN = -1, QWEN3I_THINKS = -2, QWEN3I_HAS_THOUGHT = -3 };

/* Behind the head of an assistant's turn; 0: it is no such head. */
static int qwen3i_turn_start(const qwen3_model *m, const qwen3i_seq *s, int i) {
    const char *role = "assistant\n", *p;
    int bytes;
    for (; *role && i < s->len; role += bytes, i++) {
        p = qwen3i_token_bytes(m, s->tokens[i], &bytes);
        if (!p || bytes == 0 || strncmp(role, p, (size_t)bytes) != 0) return 0;
    }
    return *role ? 0 : i;
}

/* Where the answer of the turn that is open begins, or one of the above. *may_think: it could begin with
   <think>. */
static int qwen3i_answer_start(const qwen3_model *m, const qwen3i_seq *s, int *may_think) {
    int i, at, bytes, newlines;
    const char *p;
    *may_think = 0;
    for (i = s->len - 1; i >= 0; i--) {
        const qwen3_token t = s->tokens[i];
        if (t >= 0 && t == m->info.think_end) break;
        if (t >= 0 && t == m->info.think_begin) return QWEN3I_THINKS;
        if (qwen3i_is_eos(m, t)) return QWEN3I_NO_TURN;
        at = t >= 0 && t == m->info.im_start ? qwen3i_turn_start(m, s, i + 1) : 0;
        *may_think = at && m->info.chat_style == QWEN3_STYLE_HYBRID && m->info.think_begin >= 0;
        if (at) return at;
    }
    if (i < 0) return QWEN3I_NO_TURN;
    if (++i == s->len) return QWEN3I_HAS_THOUGHT;
    for (newlines = 0; i < s->len && newlines < 2; i++, newlines += bytes) {    /* which belong to the tag */
        p = qwen3i_token_bytes(m, s->tokens[i], &bytes);
        if (!p || bytes == 0 || p[0] != '\n' || p[bytes - 1] != '\n') break;
    }
    return i;
}

/* Memory for grammars, when the first one is used. */
static qwen3_result qwen3i_guide_ready(qwen3_ctx *c, qwen3i_seq *s, const qwen3_grammar *g,
                                       const qwen3i_err *err) {
    if (g->model != c->model)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "the grammar was compiled for another model");
    if (!c->masker) c->masker = qwen3i_masker_make(&c->desc.allocator, g->vocab);
    if (c->masker && !s->guide) {
        s->guide = (qwen3i_guide *)qwen3i_alloc_zero(&c->desc.allocator, 1, qwen3i_guide_size(c));
        if (s->guide) s->guide->mask = (uint32_t *)(s->guide + 1);
    }
    return c->masker && s->guide ? QWEN3_OK : qwen3i_no_memory(err, "a sequence's place in a grammar",
                                                               sizeof *s->guide);
}

/* Bring the guide up to the sequence's end, from where it is or from the start. Returns whether the tokens
   fit. */
static int qwen3i_guide_follow(qwen3_ctx *c, qwen3i_seq *s, const qwen3_grammar *g, int start) {
    qwen3i_guide *guide = s->guide;
    const char *p;
    int n;
    if (guide->g != g || guide->serial != g->serial || guide->start != start || guide->pos < start ||
        guide->pos > s->len) {
        qwen3i_guide_begin(c->masker, guide, g);
        guide->start = guide->pos = start;
    }
    for (; guide->pos < s->len; guide->pos++) {
        p = qwen3i_added_of(c->model->tokenizer, s->tokens[guide->pos]) ? NULL :
            qwen3i_token_bytes(c->model, s->tokens[guide->pos], &n);
        if (!p || !qwen3i_guide_bytes(c->masker, guide, p, n)) return 0;
    }
    return 1;
}

/* The mask with one token. */
static const uint32_t *qwen3i_mask_only(qwen3i_masker *k, qwen3_token t) {
    memset(k->mask, 0, (size_t)k->v->n_words * sizeof *k->mask);
    qwen3i_allow(k->mask, t);
    k->guide = NULL;
    return k->mask;
}

/* The mask without what ends the turn. */
static const uint32_t *qwen3i_mask_no_end(const qwen3_model *m, qwen3i_masker *k) {
    int i;
    memset(k->mask, 0xFF, (size_t)k->v->n_words * sizeof *k->mask);
    for (i = 0; i < m->n_eos; i++) k->mask[m->eos[i] >> 5] &= ~(1u << (m->eos[i] & 31));
    k->guide = NULL;
    return k->mask;
}

/* Which grammars hold: the sampler's own may be that of calls. */
static void qwen3i_next_grammars(qwen3i_next *next) {
    if (!next->grammar && next->sampler) next->grammar = next->sampler->grammar;
    if (!next->grammar || next->grammar->kind != QWEN3_GRAMMAR_TOOLS) return;
    if (!next->tools) {
        next->calls = next->grammar;
        next->tools = next->calls->flags & QWEN3_GRAMMAR_CALL ? QWEN3_CHAT_TOOLS_REQUIRED :
                                                                QWEN3_CHAT_TOOLS_AUTO;
    }
    next->grammar = NULL;
}

/* Make the mask of a grammar that begins at `start`. A text there that it cannot follow, as after a prompt,
   is not part of it: then it begins at the end. Returns where it begins; a call that it cannot follow: -1. */
static int qwen3i_answer_mask(qwen3_ctx *c, qwen3i_seq *s, const qwen3_grammar *g, int start) {
    int i, ends;
    if (!qwen3i_guide_follow(c, s, g, start)) {
        if (g->kind == QWEN3_GRAMMAR_TOOLS) return -1;
        start = s->len;
        s->guide->pos = -1;
        qwen3i_guide_follow(c, s, g, start);
    }
    if (c->masker->guide == s->guide && c->masker->version == s->guide->version) return start;
    ends = qwen3i_guide_mask(c->masker, s->guide);
    c->masker->guide = s->guide;
    c->masker->version = s->guide->version;
    if (ends && g->kind == QWEN3_GRAMMAR_TOOLS) qwen3i_allow(c->masker->mask, g->call_end);
    else for (i = 0; ends && i < c->model->n_eos; i++) qwen3i_allow(c->masker->mask, c->model->eos[i]);
    return start;
}

/* The tag of calls that came last in an answer, -1: none. *at: where what follows it begins. */
static qwen3_token qwen3i_last_call(const qwen3i_seq *s, const qwen3_grammar *calls, int start, int *at) {
    for (*at = s->len; *at > start; --*at) {
        const qwen3_token t = s->tokens[*at - 1];
        if (t == calls->call_begin || t == calls->call_end) return t;
    }
    return -1;
}

/* Tokens that the shortest answer takes: its bytes at most, and the tags of a call. */
static int qwen3i_least_room(const qwen3_grammar *g) {
    return qwen3i_near(QWEN3I_NODE(g, g->root)->cost, g->kind == QWEN3_GRAMMAR_TOOLS ? 2 : 0);
}

/* Between calls: a newline and the next one, or the end. Text that is there already may go on. */
static const uint32_t *qwen3i_between_calls(qwen3_ctx *c, const qwen3i_seq *s, const qwen3i_next *next,
                                            int at) {
    const int newline = (int)qwen3i_word_id(c->model->tokenizer, "\n", 1);
    int i;
    if (at + 1 == s->len && s->tokens[at] == newline)
        return qwen3i_mask_only(c->masker, next->calls->call_begin);
    if (at < s->len) return NULL;
    qwen3i_mask_only(c->masker, c->model->eos[0]);
    for (i = 1; i < c->model->n_eos; i++) qwen3i_allow(c->masker->mask, c->model->eos[i]);
    if (newline >= 0 && next->room > qwen3i_least_room(next->calls)) qwen3i_allow(c->masker->mask, newline);
    return c->masker->mask;
}

/* Where calls are held to tools: 1: *mask is what may come. 0: the answer's text goes on. */
static int qwen3i_call_mask(qwen3_ctx *c, qwen3i_seq *s, const qwen3i_next *next, int start, int may_think,
                            const uint32_t **mask) {
    const qwen3_grammar *g = next->calls;
    const int required = next->tools == QWEN3_CHAT_TOOLS_REQUIRED;
    int at;
    const qwen3_token tag = qwen3i_last_call(s, g, start, &at);
    if (tag == g->call_begin) {
        *mask = qwen3i_answer_mask(c, s, g, at) < 0 ? NULL : c->masker->mask;
        return 1;
    }
    if (tag == g->call_end && (required || next->grammar)) {
        *mask = qwen3i_between_calls(c, s, next, at);
        return 1;
    }
    if (tag < 0 && required) {
        qwen3i_mask_only(c->masker, g->call_begin);
        if (may_think && start == s->len) qwen3i_allow(c->masker->mask, c->model->info.think_begin);
        *mask = c->masker->mask;
        return 1;
    }
    if (next->grammar) return 0;
    if (next->room < qwen3i_least_room(g)) c->scratch.banned = g->call_begin + 1;
    return 1;
}

/* The tokens that may come next; NULL: all, as while the model thinks. */
static qwen3_result qwen3i_next_mask(qwen3_ctx *c, const qwen3i_next *next, const uint32_t **mask,
                                     const qwen3i_err *err) {
    const qwen3_model *m = c->model;
    const qwen3_grammar *g = next->grammar, *calls = next->calls,
                        *first = next->tools == QWEN3_CHAT_TOOLS_REQUIRED || !g ? calls : g;
    qwen3i_seq *s = &c->seqs[next->seq];
    int may_think, start = qwen3i_answer_start(m, s, &may_think);
    qwen3_result r = QWEN3_OK;
    *mask = NULL;
    c->scratch.banned = next->tools == QWEN3_CHAT_TOOLS_NONE && start != QWEN3I_THINKS ?
                        qwen3i_added_id(m->tokenizer, "<tool_call>") + 1 : 0;
    if (!first || !QWEN3I_GRAMMARS) return QWEN3_OK;
    r = qwen3i_guide_ready(c, s, first, err);
    if (r == QWEN3_OK && calls && g) r = qwen3i_guide_ready(c, s, g, err);
    if (r != QWEN3_OK) return r;
    if (start == QWEN3I_THINKS) {       /* in time for the shortest answer */
        const int late = next->room <= qwen3i_least_room(first) + 3 &&
                         !(first->flags & QWEN3_GRAMMAR_MAY_BREAK_OFF);
        if (g || next->tools == QWEN3_CHAT_TOOLS_REQUIRED)
            *mask = late ? qwen3i_mask_only(c->masker, m->info.think_end) : qwen3i_mask_no_end(m, c->masker);
        return QWEN3_OK;
    }
    if (start == QWEN3I_HAS_THOUGHT && qwen3i_word_id(m->tokenizer, "\n\n", 2) != QWEN3I_NONE) {
        if (g || next->tools == QWEN3_CHAT_TOOLS_REQUIRED)
            *mask = qwen3i_mask_only(c->masker, (qwen3_token)qwen3i_word_id(m->tokenizer, "\n\n", 2));
        return QWEN3_OK;
    }
    if (start == QWEN3I_HAS_THOUGHT) start = s->len;
    if (start < s->grammar_start && s->grammar_start <= s->len) start = s->grammar_start;
    if (start < 0) start = s->len;
    s->grammar_start = start;
    if (calls && qwen3i_call_mask(c, s, next, start, may_think, mask)) return QWEN3_OK;
    s->grammar_start = qwen3i_answer_mask(c, s, g, start);
    if (may_think && start == s->len) qwen3i_allow(c->masker->mask, m->info.think_begin);
    if (calls && start == s->len && next->room >= qwen3i_least_room(calls))
        qwen3i_allow(c->masker->mask, calls->call_begin);
    *mask = c->masker->mask;
    return QWEN3_OK;
}

/* Where a grammar applies: is there room to end the text after this token? If not, *t becomes the first token
   of the shortest way to the end. */
static void qwen3i_lead_to_end(qwen3_ctx *c, const qwen3i_guide *guide, int room, qwen3_token *t) {
    int n, cost, is_call;
    const char *p = qwen3i_token_bytes(c->model, *t, &n);
    if (!QWEN3I_GRAMMARS || !guide || (guide->g->flags & QWEN3_GRAMMAR_MAY_BREAK_OFF)) return;
    if (qwen3i_is_eos(c->model, *t) || qwen3i_added_of(c->model->tokenizer, *t)) return;
    is_call = guide->g->kind == QWEN3_GRAMMAR_TOOLS;
    cost = qwen3i_guide_cost(c->masker, guide, p, n);
    if (cost + is_call <= room - 1) return;
    *t = qwen3i_guide_shortest(c->masker, guide);
    if (*t < 0) *t = is_call ? guide->g->call_end : c->model->eos[0];
}

/* The same where there may be no grammar. */
static qwen3_result qwen3i_next_allowed(qwen3_ctx *c, qwen3i_next *next, const uint32_t **mask,
                                        const qwen3i_err *err) {
    const int left = c->desc.max_ctx - c->seqs[next->seq].len;
    qwen3i_next_grammars(next);
    next->room = next->room > 0 ? qwen3i_min(next->room, left) : left;
    *mask = NULL;
    c->scratch.banned = 0;
    return next->grammar || next->tools ? qwen3i_next_mask(c, next, mask, err) : QWEN3_OK;
}

/* Choose what follows a sequence from these logits. */
static qwen3_result qwen3i_choose_next(qwen3_ctx *c, qwen3i_next *next, const float *logits,
                                       const qwen3i_err *err) {
    const qwen3i_seq *s = &c->seqs[next->seq];
    fenv_t callers;
    qwen3_result r = qwen3i_check_sampler(next->sampler, err);
    if (r != QWEN3_OK) return r;
    r = qwen3i_next_allowed(c, next, &c->scratch.mask, err);
    if (r != QWEN3_OK) return r;
    callers = qwen3i_float_enter();
    r = qwen3i_choose(logits, c->model->config.n_vocab, qwen3i_n_choose(c->model), s->tokens, s->len,
                      next->sampler, &c->scratch, &next->out, err);
    qwen3i_float_leave(callers);
    if (r == QWEN3_OK && c->scratch.mask) qwen3i_lead_to_end(c, c->masker->guide, next->room, &next->out);
    if (r == QWEN3_OK) next->ended = qwen3i_is_eos(c->model, next->out);
    return r;
}

static qwen3_result qwen3i_sample(qwen3_ctx *c, qwen3i_next *next, const qwen3i_err *err) {
    const float *logits;
    qwen3_result r = qwen3i_get_logits(c, next->seq, &logits, err);
    return r == QWEN3_OK ? qwen3i_choose_next(c, next, logits, err) : r;
}

QWEN3_API qwen3_result qwen3_sample(qwen3_ctx *c, int seq, qwen3_sampler *sampler, qwen3_token *out) {
    qwen3i_err err;
    qwen3i_next next;
    qwen3_result r = qwen3i_enter_seq(c, seq, &err);
    if (r != QWEN3_OK) return r;
    if (!out) return qwen3i_fail(&err, QWEN3_ERR_ARG, "out is NULL");
    memset(&next, 0, sizeof next);
    next.seq = seq;
    next.sampler = sampler;
    r = qwen3i_sample(c, &next, &err);
    if (r == QWEN3_OK) *out = next.out;
    return r;
}

QWEN3_API int qwen3_top_probs(qwen3_ctx *c, int seq, qwen3_prob *out, int k) {
    const float *logits;
    qwen3i_err err;
    double lse;
    qwen3_result r = qwen3i_enter_seq(c, seq, &err);
    int i, n;
    if (r != QWEN3_OK) return r;
    if (k < 0 || (k > 0 && !out)) return qwen3i_fail(&err, QWEN3_ERR_ARG, "out is NULL or k negative");
    r = qwen3i_get_logits(c, seq, &logits, &err);
    if (r != QWEN3_OK || k == 0) return r;
    n = qwen3i_select_top(logits, c->model->config.n_vocab, qwen3i_min(k, c->model->config.n_vocab), NULL,
                          c->scratch.candidates);
    lse = qwen3i_log_sum_exp(logits, c->model->config.n_vocab);
    if (!qwen3i_is_number((float)lse)) return qwen3i_not_numbers(&err);
    for (i = 0; i < n; i++) {
        out[i].token = c->scratch.candidates[i].id;
        out[i].logprob = (float)((double)c->scratch.candidates[i].logit - lse);
    }
    return n;
}

/* ---- decode steps ---------------------------------------------------------------------------- */
/* Choose on the host, then evaluate what was chosen. */
static qwen3_result qwen3i_next_on_host(qwen3_ctx *c, qwen3i_next *next, int n, const qwen3i_err *err) {
    qwen3_result r = QWEN3_OK;
    int i, n_items = 0;
    for (i = 0; i < n && r == QWEN3_OK; i++) {
        r = qwen3i_sample(c, &next[i], err);
        if (r != QWEN3_OK || next[i].ended) continue;
        memset(&c->items[n_items], 0, sizeof *c->items);
        c->items[n_items].seq = next[i].seq;
        c->items[n_items].tokens = &next[i].out;
        c->items[n_items++].n = 1;
    }
    return r == QWEN3_OK && n_items > 0 ? qwen3i_eval(c, c->items, n_items, err) : r;
}

/* The mask that the backend chooses by, if any. */
static qwen3_result qwen3i_mask_for_backend(qwen3_ctx *c, qwen3i_next *next, const qwen3i_err *err) {
    const qwen3i_seq *s = &c->seqs[next->seq];
    const uint32_t *mask;
    qwen3_result r = qwen3i_next_allowed(c, next, &mask, err);
    if (r == QWEN3_OK && c->scratch.banned) r = QWEN3_ERR_UNSUPPORTED;
    if (r != QWEN3_OK || !mask) return r;
    memcpy(s->guide->mask, mask, (size_t)c->masker->v->n_words * sizeof *mask);
    next->mask = s->guide->mask;
    next->guided = c->masker->guide != NULL;
    return QWEN3_OK;
}

/* What the backend chose may leave no room for the text's end: then the first token of the shortest way there
   is evaluated in its place. Returns whether that was done. */
static int qwen3i_led_to_end(qwen3_ctx *c, qwen3i_next *next, qwen3_result *r, const qwen3i_err *err) {
    qwen3i_seq *s = &c->seqs[next->seq];
    qwen3_token t = next->out;
    if (next->guided) qwen3i_lead_to_end(c, s->guide, next->room, &t);
    if (t == next->out) return 0;
    s->fresh = 0;
    next->out = t;
    next->ended = qwen3i_is_eos(c->model, t);
    if (!next->ended) *r = qwen3i_append(c, next->seq, t, err);
    return 1;
}

/* The backend chooses and evaluates; the sequences then take the tokens over. */
static qwen3_result qwen3i_next_on_backend(qwen3_ctx *c, qwen3i_next *next, int n, const qwen3i_err *err) {
    double start;
    qwen3_result r = QWEN3_OK;
    int i;
    for (i = 0; i < n && r == QWEN3_OK; i++) {
        r = qwen3i_check_sampler(next[i].sampler, err);
        if (r == QWEN3_OK) r = qwen3i_refresh(c, next[i].seq, err);
        if (r == QWEN3_OK) r = qwen3i_mask_for_backend(c, &next[i], err);
        next[i].tokens = c->seqs[next[i].seq].tokens;
        next[i].n = c->seqs[next[i].seq].len;
    }
    start = qwen3i_now_ms();
    if (r == QWEN3_OK) r = c->model->backend->next(c->state, next, n, err);
    if (r == QWEN3_STOPPED) qwen3i_cancelled(&c->pace, n, 0);
    if (r != QWEN3_OK) return r;
    qwen3i_stepped(c);
    c->stats.decode_ms += qwen3i_now_ms() - start;
    for (i = 0; i < n; i++) {
        qwen3i_seq *s = &c->seqs[next[i].seq];
        if (next[i].ended || qwen3i_led_to_end(c, &next[i], &r, err)) continue;
        s->tokens[s->len++] = next[i].out;
        c->stats.n_decode++;
    }
    return r;
}

/* One decode step of n sequences that have room. A failure leaves the samplers as they were. */
static qwen3_result qwen3i_next_step(qwen3_ctx *c, qwen3i_next *next, int n, const qwen3i_err *err) {
    int i, host = !c->model->backend->next;
    qwen3_result r;
    for (i = 0; i < n; i++) {
        c->rngs[i] = next[i].sampler ? next[i].sampler->rng : 0;
        qwen3i_next_grammars(&next[i]);
        host |= next[i].sampler && next[i].sampler->filter;
    }
    r = host ? QWEN3_ERR_UNSUPPORTED : qwen3i_next_on_backend(c, next, n, err);
    if (r == QWEN3_ERR_UNSUPPORTED) r = qwen3i_next_on_host(c, next, n, err);
    for (i = 0; i < n && r != QWEN3_OK; i++) if (next[i].sampler) next[i].sampler->rng = c->rngs[i];
    return r;
}

/* results (may be NULL), one for each of seqs: OK, END or CONTEXT_FULL. */
static qwen3_result qwen3i_next_batch(qwen3_ctx *c, const int *seqs, int n, qwen3_sampler *const *samplers,
                                      qwen3_token *out, qwen3_result *results, const qwen3i_err *err) {
    qwen3_result r = QWEN3_OK;
    int i, k, active = 0;
    for (i = 0; i < n; i++) {
        out[i] = -1;
        if (results) results[i] = QWEN3_ERR_CONTEXT_FULL;
        if (c->seqs[seqs[i]].len >= c->desc.max_ctx) continue;
        memset(&c->next[active], 0, sizeof *c->next);
        c->next[active].seq = seqs[i];
        c->next[active++].sampler = samplers ? samplers[i] : NULL;
        c->seqs[seqs[i]].planned = 0;
    }
    if (active > 0) r = qwen3i_next_step(c, c->next, active, err);
    for (i = 0; i < n && r != QWEN3_OK && results; i++) results[i] = r;
    for (i = k = 0; i < n && r == QWEN3_OK; i++) {
        if (k == active || c->next[k].seq != seqs[i]) continue;
        out[i] = c->next[k].out;
        if (results) results[i] = c->next[k].ended ? QWEN3_END : QWEN3_OK;
        k++;
    }
    return r;
}

QWEN3_API qwen3_result qwen3_next_batch(qwen3_ctx *c, const int *seqs, int n, qwen3_sampler *const *samplers,
                                        qwen3_token *out, qwen3_result *results) {
    qwen3i_err err;
    qwen3_result r = qwen3i_enter(c, &err);
    int i, k;
    if (r != QWEN3_OK) return r;
    if (n < 0 || n > c->desc.max_seqs || (n > 0 && (!seqs || !out)))
        return qwen3i_fail(&err, QWEN3_ERR_ARG, "seqs or out is NULL, or n (%d) not 0 to max_seqs (%d)", n,
                           c->desc.max_seqs);
    for (i = 0; i < n; i++) {
        r = qwen3i_check_seq(c, seqs[i], &err);
        if (r != QWEN3_OK) return r;
        for (k = 0; k < i; k++)
            if (seqs[k] == seqs[i])
                return qwen3i_fail(&err, QWEN3_ERR_ARG, "sequence %d appears twice", seqs[i]);
    }
    return qwen3i_next_batch(c, seqs, n, samplers, out, results, &err);
}

static qwen3_result qwen3i_full(const qwen3_ctx *c, int seq, const qwen3i_err *err) {
    return qwen3i_fail(err, QWEN3_ERR_CONTEXT_FULL, "sequence %d holds all of its %d positions", seq,
                       c->desc.max_ctx);
}

QWEN3_API qwen3_result qwen3_next(qwen3_ctx *c, int seq, qwen3_sampler *sampler, qwen3_token *out) {
    qwen3i_err err;
    qwen3_result one = QWEN3_OK, r = qwen3i_enter_seq(c, seq, &err);
    if (r != QWEN3_OK) return r;
    if (!out) return qwen3i_fail(&err, QWEN3_ERR_ARG, "out is NULL");
    r = qwen3i_next_batch(c, &seq, 1, &sampler, out, &one, &err);
    if (r == QWEN3_OK && one == QWEN3_ERR_CONTEXT_FULL) return qwen3i_full(c, seq, &err);
    return r == QWEN3_OK ? one : r;
}

/* ---- streams: tokens to whole characters, what kind of text they are, stop strings ----------- */
#define QWEN3I_MAX_STOP 1024            /* half of the pending bytes: such a string and a character fit */

/* its own kind; that of what follows */
typedef struct qwen3i_tag { const char *text; int tag, then; } qwen3i_tag;

/* The tag that a token is, where text is of this kind: within thinking, calls are only talked about. */
static const qwen3i_tag *qwen3i_tag_of(const qwen3_model *m, int kind, qwen3_token t) {
    static const qwen3i_tag tags[] = {
        {"<think>",      QWEN3_TEXT_THINKING | QWEN3_TEXT_TAG, QWEN3_TEXT_THINKING},
        {"</think>",     QWEN3_TEXT_THINKING | QWEN3_TEXT_TAG, QWEN3_TEXT_ANSWER},
        {"<tool_call>",  QWEN3_TEXT_CALL | QWEN3_TEXT_TAG,     QWEN3_TEXT_CALL},
        {"</tool_call>", QWEN3_TEXT_CALL | QWEN3_TEXT_TAG,     QWEN3_TEXT_ANSWER}
    };
    const qwen3i_added *a = m->tokenizer ? qwen3i_added_of(m->tokenizer, t) : NULL;
    int i;
    for (i = 0; a && i < (kind == QWEN3_TEXT_THINKING ? 2 : QWEN3I_COUNT(tags)); i++)
        if (a->length == strlen(tags[i].text) && memcmp(a->p, tags[i].text, a->length) == 0) return &tags[i];
    return NULL;
}

static int qwen3i_all_newlines(const char *p, int n) {
    while (n > 0 && p[n - 1] == '\n') n--;
    return n == 0;
}

/* What kind of text follows the tokens of a turn, and whether newlines are still a tag's: as if it had been
   streamed. The turn begins behind the last <|im_start|>. */
static void qwen3i_stream_find_kind(qwen3_stream *s, const qwen3_token *tokens, int n) {
    const qwen3_model *m = s->ctx->model;
    int i = n, bytes;
    s->kind = s->tag = 0;
    while (i > 0 && m->info.im_start >= 0 && tokens[i - 1] != m->info.im_start) i--;
    for (; i < n; i++) {
        const qwen3i_tag *tag = qwen3i_tag_of(m, s->kind, tokens[i]);
        const char *text = qwen3i_token_bytes(m, tokens[i], &bytes);
        if (tag) { s->kind = tag->then; s->tag = tag->tag; }
        else if (!qwen3i_all_newlines(text, bytes)) s->tag = 0;
    }
}

/* The length of the UTF-8 sequence that starts with this byte, 0 if none does. */
static int qwen3i_utf8_length(unsigned char c) {
    return c < 0x80 ? 1 : c >= 0xC2 && c < 0xE0 ? 2 : c >= 0xE0 && c < 0xF0 ? 3 : c >= 0xF0 && c < 0xF5 ? 4 :
           0;
}

/* How many bytes at p form one valid character; 0: the first byte is not part of one. */
static int qwen3i_utf8_valid(const char *p, int n) {
    const unsigned char *u = (const unsigned char *)p;
    int i, len = qwen3i_utf8_length(u[0]);
    if (len == 0 || len > n) return 0;
    for (i = 1; i < len; i++) if ((u[i] & 0xC0) != 0x80) return 0;
    if ((u[0] == 0xE0 && u[1] < 0xA0) || (u[0] == 0xED && u[1] > 0x9F)) return 0;   /* overlong; surrogates */
    if ((u[0] == 0xF0 && u[1] < 0x90) || (u[0] == 0xF4 && u[1] > 0x8F)) return 0;   /* overlong; > U+10FFFF */
    return len;
}

static void qwen3i_deliver_valid(qwen3_stream *s, const char *p, int n, int kind) {
    if (n > 0 && s->gen.on_text && !s->closed) s->closed = s->gen.on_text(p, n, kind, s->gen.user) != 0;
}

/* Deliver bytes as valid UTF-8: what never becomes a character is replaced by U+FFFD. */
static void qwen3i_deliver(qwen3_stream *s, const char *p, int n, int kind) {
    int start = 0, i = 0;
    while (i < n) {
        int len = qwen3i_utf8_valid(p + i, n - i);
        if (len) { i += len; continue; }
        qwen3i_deliver_valid(s, p + start, i - start, kind);
        qwen3i_deliver_valid(s, "\xEF\xBF\xBD", 3, kind);
        start = ++i;
    }
    qwen3i_deliver_valid(s, p + start, i - start, kind);
}

/* Deliver the first n pending bytes. Newlines behind a tag are still the tag's. STOPPED if the callback said
   so. */
static qwen3_result qwen3i_flush(qwen3_stream *s, int n) {
    int lead = 0;
    while (s->tag && lead < n && s->pending[lead] == '\n') lead++;
    qwen3i_deliver(s, s->pending, lead, s->tag);
    qwen3i_deliver(s, s->pending + lead, n - lead, s->kind);
    if (lead < n) s->tag = 0;
    memmove(s->pending, s->pending + n, (size_t)(s->n_pending - n));
    s->n_pending -= n;
    return s->closed ? QWEN3_STOPPED : QWEN3_MORE;
}

/* Where in the pending bytes a stop string begins; n_pending if none does. *held: bytes at the end that may
   still become one. */
static int qwen3i_find_stop(qwen3_stream *s, int *held) {
    int i, k, first = s->n_pending;
    *held = 0;
    for (k = 0; k < s->gen.n_stop; k++) {
        const char *stop = s->gen.stop[k];
        const int len = (int)strlen(stop);
        for (i = 0; i < s->n_pending; i++) {
            const int common = qwen3i_min(len, s->n_pending - i);
            if (s->pending[i] != stop[0] || memcmp(s->pending + i, stop, (size_t)common) != 0) continue;
            if (common < len) *held = qwen3i_max(*held, s->n_pending - i);
            else if (i < first) { first = i; s->stopped_by = k; }
            break;
        }
    }
    return first;
}

/* Deliver what is certain: whole characters, no beginning of a stop string, no last newline, which a tag may
   follow. END if a stop string is complete. */
static qwen3_result qwen3i_pump(qwen3_stream *s) {
    int held, ready, stop = qwen3i_find_stop(s, &held);
    if (stop < s->n_pending) {
        qwen3_result r = qwen3i_flush(s, stop);
        s->n_pending = 0;
        return r == QWEN3_MORE ? QWEN3_END : r;
    }
    ready = qwen3i_utf8_complete(s->pending, s->n_pending - held);
    if (ready > 0 && ready == s->n_pending && s->pending[ready - 1] == '\n') ready--;
    return qwen3i_flush(s, ready);
}

static qwen3_result qwen3i_stream_bytes(qwen3_stream *s, const char *bytes, int n) {
    qwen3_result r = QWEN3_MORE;
    while (n > 0 && r == QWEN3_MORE) {  /* tokens may be longer than the buffer */
        int part = qwen3i_min(n, (int)sizeof s->pending - s->n_pending);
        memcpy(s->pending + s->n_pending, bytes, (size_t)part);
        s->n_pending += part;
        bytes += part;
        n -= part;
        r = qwen3i_pump(s);
    }
    return r;
}

/* A tag ends the text before it, of which the last newline is the tag's. */
static qwen3_result qwen3i_stream_tag(qwen3_stream *s, const qwen3i_tag *tag, const char *bytes, int n) {
    const int newline = s->n_pending > 0 && s->pending[s->n_pending - 1] == '\n';
    qwen3_result r = qwen3i_flush(s, s->n_pending - newline);
    s->kind = tag->tag;
    if (r == QWEN3_MORE) r = qwen3i_stream_bytes(s, bytes, n);
    if (r == QWEN3_MORE) r = qwen3i_flush(s, s->n_pending);
    s->kind = tag->then;
    s->tag = tag->tag;
    return r;
}

/* A token's text; control tokens have none. */
static qwen3_result qwen3i_stream_text(qwen3_stream *s, qwen3_token t) {
    const qwen3_model *m = s->ctx->model;
    const qwen3i_tag *tag = qwen3i_tag_of(m, s->kind, t);
    int n;
    const char *bytes = qwen3i_token_bytes(m, t, &n);
    if (tag) return qwen3i_stream_tag(s, tag, bytes, n);
    if (!m->tokenizer || qwen3i_is_special(m->tokenizer, t)) return QWEN3_MORE;
    return qwen3i_stream_bytes(s, bytes, n);
}

/* The reply is complete: what was held back is text after all. */
static qwen3_result qwen3i_stream_end(qwen3_stream *s, qwen3_result r) {
    qwen3_result last = qwen3i_flush(s, s->n_pending);
    s->result = (r == QWEN3_OK || r == QWEN3_END) && last == QWEN3_STOPPED ? last : r;
    if (s->gen.stopped_by) *s->gen.stopped_by = s->stopped_by;
    return s->result;
}

static qwen3_result qwen3i_feed(qwen3_stream *s, qwen3_token t) {
    const qwen3_model *m = s->ctx->model;
    const int kind = s->kind;
    qwen3_result r;
    if (qwen3i_is_eos(m, t)) return qwen3i_stream_end(s, QWEN3_END);
    r = qwen3i_stream_text(s, t);
    s->n_tokens++;
    s->n_thinking += kind == QWEN3_TEXT_THINKING && s->kind == QWEN3_TEXT_THINKING;
    s->forced = s->kind == QWEN3_TEXT_THINKING && s->gen.think_budget > 0 &&
                s->n_thinking >= s->gen.think_budget
              ? m->info.think_end : -1;
    if (r == QWEN3_MORE && s->n_tokens == s->gen.max_tokens) r = QWEN3_OK;
    return r == QWEN3_MORE ? r : qwen3i_stream_end(s, r);
}

static int qwen3i_reads(const qwen3_stream *s)   { return s->result == QWEN3_MORE && s->n_prompt > 0; }
static int qwen3i_answers(const qwen3_stream *s) { return s->result == QWEN3_MORE && s->n_prompt == 0; }

/* Tokens that may still come; 0: as many as the context has positions. */
static int qwen3i_left(const qwen3_stream *s) {
    return s->gen.max_tokens > 0 ? s->gen.max_tokens - s->n_tokens : 0;
}

QWEN3_API qwen3_result qwen3_stream_feed(qwen3_stream *s, qwen3_token token) {
    if (!s || !s->ctx) return QWEN3_ERR_ARG;
    if (s->result == QWEN3_MORE) qwen3i_feed(s, token);
    return s->result;
}

static qwen3_result qwen3i_check_gen(const qwen3_ctx *c, const qwen3_gen_desc *g, const qwen3i_err *err) {
    int i;
    if (!g) return qwen3i_fail(err, QWEN3_ERR_ARG, "gen is NULL");
    if (g->max_tokens < 0 || g->think_budget < 0 || g->draft_tokens < 0)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "max_tokens, think_budget or draft_tokens is negative");
    if (g->n_stop < 0 || (g->n_stop > 0 && !g->stop))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "stop is NULL or n_stop negative");
    for (i = 0; i < g->n_stop; i++)
        if (!g->stop[i] || !g->stop[i][0] || strlen(g->stop[i]) > QWEN3I_MAX_STOP)
            return qwen3i_fail(err, QWEN3_ERR_ARG, "stop[%d] is NULL, empty, or longer than %d bytes", i,
                               QWEN3I_MAX_STOP);
    if ((g->on_text || g->n_stop) && !c->model->tokenizer)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                           "the model was loaded without tokenizer files: it can make tokens but no text");
    return QWEN3_OK;
}

/* ---- replies taken apart --------------------------------------------------------------------- */
typedef struct qwen3i_reply {           /* what is still to be read, */
    qwen3i_str rest;
    int        kind;                    /* and what it begins with; ANSWER or THINKING */
    int        behind_tag, n_calls;     /* calls begun */
    qwen3i_str part, name;              /* the last part; of a call: arguments, and name, still escaped */
    const char *why;                    /* it is a call that is malformed, here: */
    size_t      where;
} qwen3i_reply;

/* JSON has no NaN and no Infinity, though the reader knows them. */
static int qwen3i_only_json(qwen3i_str s) {
    size_t i;
    int quoted = 0;
    for (i = 0; i < s.n; i++) {
        if (quoted && s.p[i] == '\\') i++;
        else if (s.p[i] == '"') quoted = !quoted;
        else if (!quoted && (s.p[i] == 'N' || s.p[i] == 'I')) return 0;
    }
    return 1;
}

/* The fields of a call. */
static int qwen3i_reply_fields(qwen3i_reply *r, qwen3i_json *j) {
    qwen3i_json_iter it;
    qwen3i_str key;
    int named = 0;
    r->part.p = "{}";
    r->part.n = 2;
    if (qwen3i_json_open(j, '{', &it)) while (qwen3i_json_next(j, &it, &key)) {
        const char first = qwen3i_json_peek(j), *from = j->p;
        const int is_name = qwen3i_json_is(key, "name"), is_arguments = qwen3i_json_is(key, "arguments");
        if (is_name && first != '"') return qwen3i_json_bad(j, "the name is not a string");
        if (is_arguments && first != '{') return qwen3i_json_bad(j, "the arguments are not an object");
        if (is_name) named = qwen3i_json_string(j, &r->name);
        else if (qwen3i_json_skip(j) && is_arguments) {
            r->part.p = from;
            r->part.n = (size_t)(j->p - from);
            if (!qwen3i_only_json(r->part)) return qwen3i_json_bad(j, "the arguments are not JSON");
        }
    }
    return j->error ? 0 : named ? 1 : qwen3i_json_bad(j, "it has no name");
}

/* A call, from its tag on. What it cannot be read as stays text, up to the tag that closes it. */
static int qwen3i_reply_call(qwen3i_reply *r) {
    static const char begin[] = "<tool_call>", end[] = "</tool_call>";
    qwen3i_json j = qwen3i_json_begin(r->rest.p + sizeof begin - 1, r->rest.n - (sizeof begin - 1));
    qwen3i_str tail = r->rest;
    size_t close;
    r->n_calls++;
    if (qwen3i_reply_fields(r, &j)) {
        qwen3i_json_peek(&j);
        tail = qwen3i_str_from(r->rest, (size_t)(j.p - r->rest.p));
        if (qwen3i_str_begins(tail, end)) tail = qwen3i_str_from(tail, sizeof end - 1);
        else if (tail.n > 0 && !qwen3i_str_begins(tail, begin)) qwen3i_json_bad(&j, "text follows it");
    }
    if (!j.error) { r->rest = tail; return QWEN3_TEXT_CALL; }
    r->why = j.error;
    r->where = qwen3i_json_offset(&j);
    close = qwen3i_str_find(r->rest, end, 0);
    r->part = r->rest;
    r->part.n = close < r->rest.n ? close + sizeof end - 1 : r->rest.n;
    r->rest = qwen3i_str_from(r->rest, r->part.n);
    return QWEN3_TEXT_ANSWER;
}

/* Text up to a tag, or to the end. The newlines behind a tag are the tag's, and one before it. */
static void qwen3i_reply_text(qwen3i_reply *r, size_t n, int tagged) {
    r->part = r->rest;
    r->part.n = n;
    r->rest = qwen3i_str_from(r->rest, n);
    if (r->behind_tag) r->part = qwen3i_str_strip(r->part, 1, 0);
    if (tagged && r->part.n > 0 && r->part.p[r->part.n - 1] == '\n') r->part.n--;
}

/* The kind of the next part; -1: there is none. */
static int qwen3i_reply_next(qwen3i_reply *r) {
    static const char begin[] = "<think>", end[] = "</think>", call[] = "<tool_call>";
    size_t n;
    int kind;
    r->why = NULL;
    if (r->kind == QWEN3_TEXT_ANSWER && qwen3i_str_begins(r->rest, begin)) {
        r->rest = qwen3i_str_from(r->rest, sizeof begin - 1);
        r->kind = QWEN3_TEXT_THINKING;
        r->behind_tag = 1;
    }
    if (r->rest.n == 0) return -1;
    if (r->kind == QWEN3_TEXT_THINKING) {
        n = qwen3i_str_find(r->rest, end, 0);
        qwen3i_reply_text(r, n, n < r->rest.n);
        if (r->rest.n > 0) r->rest = qwen3i_str_from(r->rest, sizeof end - 1);
        r->kind = QWEN3_TEXT_ANSWER;
        r->behind_tag = 1;
        return QWEN3_TEXT_THINKING;
    }
    if (qwen3i_str_begins(r->rest, call)) {
        kind = qwen3i_reply_call(r);
        r->behind_tag = 1;
        return kind;
    }
    for (n = 1; n < r->rest.n; n++) {
        const qwen3i_str from = qwen3i_str_from(r->rest, n);
        if (*from.p == '<' && (qwen3i_str_begins(from, begin) || qwen3i_str_begins(from, call))) break;
    }
    qwen3i_reply_text(r, n, n < r->rest.n);
    return QWEN3_TEXT_ANSWER;
}

typedef struct qwen3i_room { char *p; size_t size, n; } qwen3i_room;     /* what does not fit only counts */

static void qwen3i_room_add(qwen3i_room *to, const char *p, size_t n) {
    if (to->n + n <= to->size) memcpy(to->p + to->n, p, n);
    to->n += n;
}

/* A text, or a string of JSON with its escapes, as valid UTF-8 without a NUL. */
static void qwen3i_room_text(qwen3i_room *to, qwen3i_str s, int escaped) {
    const char *p = s.p, *end = s.p + s.n;
    char letter[4];
    while (p < end) {
        int n = qwen3i_utf8_valid(p, (int)qwen3i_min_size((size_t)(end - p), 4));
        const char *from = p;
        p += n ? n : 1;
        if (escaped && *from == '\\') {
            n = qwen3i_utf8_put(letter, qwen3i_json_escape(&p, end));
            from = letter;
        }
        if (n == 0 || !*from) { from = "\xEF\xBF\xBD"; n = 3; }
        qwen3i_room_add(to, from, (size_t)n);
    }
}

/* All parts of a kind, a newline between them; where they begin. */
static size_t qwen3i_reply_gather(qwen3i_reply r, int kind, qwen3i_room *to) {
    const size_t at = to->n;
    int k;
    while ((k = qwen3i_reply_next(&r)) >= 0) {
        if (k != kind || r.part.n == 0) continue;
        if (to->n > at) qwen3i_room_add(to, "\n", 1);
        qwen3i_room_text(to, r.part, 0);
    }
    qwen3i_room_add(to, "", 1);
    return at;
}

/* The calls, to `calls` if they fit. */
static void qwen3i_reply_calls(qwen3i_reply r, qwen3_tool_call *calls, qwen3i_room *to) {
    int k;
    while ((k = qwen3i_reply_next(&r)) >= 0) {
        const size_t name = to->n;
        size_t arguments;
        if (k != QWEN3_TEXT_CALL) continue;
        qwen3i_room_text(to, r.name, 1);
        qwen3i_room_add(to, "", 1);
        arguments = to->n;
        qwen3i_room_text(to, r.part, 0);
        qwen3i_room_add(to, "", 1);
        if (to->n > to->size) continue;
        calls->name = to->p + name;
        calls++->arguments = to->p + arguments;
    }
}

/* The whole text; it may begin within thinking, be it only by a </think> without a <think>. */
static qwen3i_reply qwen3i_reply_begin(const char *text, size_t n, int kind) {
    qwen3i_reply r;
    memset(&r, 0, sizeof r);
    r.rest.p = n ? text : "";
    r.rest.n = n;
    if (qwen3i_str_begins(r.rest, "<think>")) return r;
    r.behind_tag = (kind & QWEN3_TEXT_THINKING) ||
                   qwen3i_str_find(r.rest, "</think>", 0) < qwen3i_str_find(r.rest, "<think>", 0);
    r.kind = r.behind_tag ? QWEN3_TEXT_THINKING : QWEN3_TEXT_ANSWER;
    return r;
}

QWEN3I_COLD
QWEN3_API int qwen3_reply_parse(const char *text, size_t n_bytes, int kind, qwen3_msg *out, void *memory,
                                size_t size, char *err_text, size_t err_size) {
    const qwen3i_err err = qwen3i_err_begin(err_text, err_size);
    const size_t word = sizeof(void *), pad = (word - (size_t)((uintptr_t)memory % word)) % word;
    qwen3i_reply all, r;
    qwen3i_room to;
    size_t thinking, answer;
    int k, n_calls = 0, bad = 0;
    if (!out || (!text && n_bytes) || (!memory && size) || n_bytes > (size_t)1 << 28)
        return qwen3i_fail(&err, QWEN3_ERR_ARG, "text, out or memory is NULL, or there is too much text");
    memset(out, 0, sizeof *out);
    r = all = qwen3i_reply_begin(text, n_bytes, kind);
    while ((k = qwen3i_reply_next(&r)) >= 0) {
        n_calls += k == QWEN3_TEXT_CALL;
        if (r.why && !bad++)
            qwen3i_fail(&err, QWEN3_ERR_FORMAT, "call %d: %s at its byte %lu", r.n_calls, r.why,
                        (unsigned long)r.where);
    }
    to.p = (char *)memory;
    to.size = size;
    to.n = word - 1 + (size_t)n_calls * sizeof *out->calls;     /* wherever memory lies */
    thinking = qwen3i_reply_gather(all, QWEN3_TEXT_THINKING, &to);
    answer = qwen3i_reply_gather(all, QWEN3_TEXT_ANSWER, &to);
    qwen3i_reply_calls(all, n_calls && to.n <= size ? (qwen3_tool_call *)(void *)(to.p + pad) : NULL, &to);
    if (to.n > size) return (int)to.n;
    out->role = QWEN3_ASSISTANT;
    out->reasoning = to.p + thinking;
    out->text = to.p + answer;
    if (n_calls) out->calls = (const qwen3_tool_call *)(const void *)(to.p + pad);
    out->n_calls = n_calls;
    return (int)to.n;
}

/* ---- speculation: several tokens a step, and the same text ------------------------------------ */
static void qwen3i_smooth(double *x, double latest) { *x = *x > 0 ? *x + (latest - *x) / 4 : latest; }

/* Do two models mean the same by each token? */
static int qwen3i_same_vocabulary(const qwen3_model *a, const qwen3_model *b) {
    int i, n, n_b;
    if (a->config.n_vocab != b->config.n_vocab || a->info.n_tokens != b->info.n_tokens) return 0;
    for (i = 0; i < a->info.n_tokens; i++) {
        const char *p = qwen3i_token_bytes(a, i, &n), *q = qwen3i_token_bytes(b, i, &n_b);
        if (n != n_b || (n > 0 && memcmp(p, q, (size_t)n) != 0)) return 0;
    }
    return 1;
}

static qwen3_result qwen3i_check_draft(const qwen3_ctx *c, int seq, const qwen3_ctx *draft,
                                       const qwen3i_err *err) {
    if (draft == c) return qwen3i_fail(err, QWEN3_ERR_ARG, "draft is the context that it is to guess for");
    if (seq >= draft->desc.max_seqs)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "draft has no sequence %d; its max_seqs is %d", seq,
                           draft->desc.max_seqs);
    if (!qwen3i_same_vocabulary(c->model, draft->model))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "draft is of a model with another vocabulary");
    return qwen3i_check_head(draft->model, err);
}

static qwen3_result qwen3i_draft_begin(qwen3_ctx *c, int seq, const qwen3_gen_desc *gen,
                                       const qwen3i_err *err) {
    qwen3i_draft *d = &c->seqs[seq].draft;
    const int most = qwen3i_min(gen->draft_tokens, QWEN3I_MAX_DRAFT);
    qwen3_result r = gen->draft ? qwen3i_check_draft(c, seq, gen->draft, err) : QWEN3_OK;
    if (r == QWEN3_OK) r = qwen3i_check_head(c->model, err);
    if (r != QWEN3_OK) return r;
    d->n = d->idle = 0;
    d->patience = QWEN3I_PATIENCE;
    d->rate = 0.7;
    if (most <= d->most) return QWEN3_OK;
    qwen3i_draft_free(c, d);
    d->logits = (float *)qwen3i_alloc(&c->desc.allocator, qwen3i_draft_bytes(c, most));
    if (!d->logits) return qwen3i_no_memory(err, "logits of guesses", qwen3i_draft_bytes(c, most));
    d->most = most;
    return QWEN3_OK;
}

/* How long a step with n guesses takes: as measured, or in line with the nearest numbers that were. */
static double qwen3i_guess_ms(const qwen3i_pace *p, int n) {
    int below = n, above = n;
    double slope = 0;
    while (below > 0 && p->step_ms[below] <= 0) below--;
    while (above < QWEN3I_MAX_DRAFT && p->step_ms[above] <= 0) above++;
    if (p->step_ms[above] <= 0) { above = below; below = 0; }
    if (above > below) slope = (p->step_ms[above] - p->step_ms[below]) / (above - below);
    return p->step_ms[below] + slope * (n - below);
}

/* How many guesses bring the most tokens for their time; 0: none is worth it. Now and then one is tried. */
static int qwen3i_draft_count(const qwen3i_pace *p, const qwen3i_draft *d, int most, int by_model) {
    double best, tokens = 1, chance = 1;
    int n, count = 0;
    if (p->always_guess) return most;
    if (p->step_ms[0] <= 0) return 0;   /* first a step to compare with */
    best = 1 / p->step_ms[0];
    for (n = 1; n <= most; n++) {
        const double ms = qwen3i_guess_ms(p, n) + (by_model ? n * p->draft_ms : 0);
        chance *= d->rate;
        tokens += chance;
        if (tokens > best * ms) { best = tokens / ms; count = n; }
    }
    return count == 0 && d->idle >= d->patience ? most : count;
}

/* Prompt lookup: what followed when the sequence's last tokens were said before. The longest match counts, of
   two such the later. */
static int qwen3i_draft_lookup(const qwen3_token *tokens, int n, qwen3_token *out, int most) {
    int i, k, at = 0, longest = 1;      /* one token alone says little */
    for (i = n - 1; i > 0 && longest < QWEN3I_MAX_DRAFT; i--) {
        for (k = 0; k < i && k < QWEN3I_MAX_DRAFT && tokens[i - 1 - k] == tokens[n - 1 - k];) k++;
        if (k > longest) { longest = k; at = i; }
    }
    most = at ? qwen3i_min(most, n - at) : 0;
    memcpy(out, tokens + at, (size_t)most * sizeof *out);
    return most;
}

/* What the smaller model says. Where it cannot go on, as its context is full, there are fewer guesses. */
static qwen3_result qwen3i_draft_ask(qwen3_ctx *draft, int seq, const qwen3_token *tokens, int n,
                                     qwen3_token *out, int most, int *count, const qwen3i_err *err) {
    qwen3i_err own;
    qwen3_result r = qwen3i_enter(draft, &own);
    *count = 0;
    if (n > draft->desc.max_ctx) return QWEN3_OK;
    if (r == QWEN3_OK) r = qwen3i_check_tokens(draft, tokens, n, &own);
    if (r == QWEN3_OK) r = qwen3i_plan(draft, seq, tokens, n, &own);
    if (r == QWEN3_OK) r = qwen3i_bring_in(draft, seq, 0, &own);
    while (r == QWEN3_OK && *count < most && draft->seqs[seq].len < draft->desc.max_ctx) {
        qwen3i_next next;
        memset(&next, 0, sizeof next);
        next.seq = seq;
        next.room = most - *count - 1;          /* the last one is not evaluated: it may be wrong */
        r = next.room > 0 ? qwen3i_next_step(draft, &next, 1, &own) : qwen3i_sample(draft, &next, &own);
        if (r != QWEN3_OK || next.ended) break;
        out[(*count)++] = next.out;
    }
    return r < 0 ? qwen3i_fail(err, r, "draft: %s", draft->error) : QWEN3_OK;
}

/* Is it likely enough that guesses pay for the host to choose in this step? Where it does so anyway, that is
   seen when the choice is known. */
static int qwen3i_may_guess(qwen3_ctx *c, const qwen3_stream *s) {
    const qwen3i_seq *seq = &c->seqs[s->seq];
    qwen3i_draft *d = &c->seqs[s->seq].draft;
    qwen3_token next;
    if (s->gen.draft_tokens == 0) return 0;
    d->idle++;
    if (!c->model->backend->next || c->pace.always_guess) return 1;
    if (s->gen.draft && qwen3i_draft_count(&c->pace, d, s->gen.draft_tokens, 1) > 0) return 1;
    if (qwen3i_draft_count(&c->pace, d, s->gen.draft_tokens, 0) == 0) return 0;
    return c->pace.answer || qwen3i_draft_lookup(seq->tokens, seq->len, &next, 1) > 0;
}

/* What was tried is measured anew, and tried the less often the more often that was in vain. */
static void qwen3i_guessed(qwen3i_pace *p, qwen3i_draft *d) {
    const int tried = d->idle >= d->patience;
    if (tried) p->step_ms[d->n] = 0;
    d->patience = tried ? qwen3i_min(2 * d->patience, 1024) : QWEN3I_PATIENCE;
    d->idle = 0;
}

/* Guess what follows the sequence and the token that was chosen: at most so many tokens. asked_ms: += how long
   the draft's model took. */
static qwen3_result qwen3i_guess(qwen3_ctx *c, const qwen3_stream *s, qwen3_token chosen, int most,
                                 double *asked_ms, const qwen3i_err *err) {
    qwen3i_seq *seq = &c->seqs[s->seq];
    qwen3i_draft *d = &seq->draft;
    const qwen3_token *answer = c->pace.answer;
    const int n = seq->len + 1;
    const double start = qwen3i_now_ms();
    qwen3_result r = QWEN3_OK;
    most = qwen3i_min(qwen3i_min(most, s->gen.draft_tokens), qwen3i_min(d->most, c->desc.max_ctx - n));
    if (s->gen.max_tokens > 0) most = qwen3i_min(most, s->gen.max_tokens - s->n_tokens - 1);
    d->n = 0;
    d->tokens[0] = chosen;
    if (s->gen.draft_tokens == 0 || most <= 0) return QWEN3_OK;
    seq->tokens[seq->len] = chosen;
    if (!answer) d->n = qwen3i_draft_lookup(seq->tokens, n, d->tokens + 1, most);
    else if (!s->gen.draft) d->n = most;
    if (d->n > 0) d->n = qwen3i_draft_count(&c->pace, d, d->n, 0);
    else if (s->gen.draft && (most = qwen3i_draft_count(&c->pace, d, most, 1)) > 0) {
        r = qwen3i_draft_ask(s->gen.draft, s->seq, seq->tokens, n, d->tokens + 1, most, &d->n, err);
        *asked_ms += qwen3i_now_ms() - start;
        if (d->n > 0) qwen3i_smooth(&c->pace.draft_ms, (qwen3i_now_ms() - start) / d->n);
    }
    if (answer) memcpy(d->tokens + 1, answer + n, (size_t)d->n * sizeof *d->tokens);
    if (d->n > 0) qwen3i_guessed(&c->pace, d);
    return r;
}

/* The token that was chosen, with the guesses behind it. */
static qwen3_item qwen3i_guessed_item(const qwen3_ctx *c, int seq, int *n_guesses) {
    const qwen3i_draft *d = &c->seqs[seq].draft;
    qwen3_item item;
    memset(&item, 0, sizeof item);
    item.seq = seq;
    item.tokens = d->tokens;
    item.n = 1 + d->n;
    item.all_logits = d->n > 0 ? d->logits : NULL;
    *n_guesses += d->n;
    return item;
}

/* The stream takes the token that was chosen, and its guesses as far as they are chosen, too. The sequence then
   ends where it would without those that are not. */
static qwen3_result qwen3i_verify(qwen3_ctx *c, qwen3_stream *s, qwen3i_next *next,
                                  const qwen3i_err *err) {
    qwen3i_seq *seq = &c->seqs[s->seq];
    qwen3i_draft *d = &seq->draft;
    const size_t vocab = (size_t)c->model->config.n_vocab;
    const int len = next->n, evaluated = seq->len - len;
    qwen3_result r = QWEN3_OK, kept;
    int k;
    qwen3i_feed(s, next->out);
    if (next->ended) return QWEN3_OK;
    d->n = evaluated - 1;
    for (k = 0; k < d->n && qwen3i_answers(s) && s->forced < 0; k++) {
        const uint64_t rng = next->sampler ? next->sampler->rng : 0;
        int right;
        seq->len = len + 1 + k;
        next->room = qwen3i_left(s);
        r = qwen3i_choose_next(c, next, d->logits + (size_t)k * vocab, err);
        right = r == QWEN3_OK && next->out == d->tokens[1 + k];
        if (r == QWEN3_OK) d->rate += (right - d->rate) / 6;
        if (!right && next->sampler) next->sampler->rng = rng;      /* it is chosen again in the next step */
        if (!right) break;
        qwen3i_feed(s, next->out);
    }
    seq->len = len + evaluated;
    c->stats.n_drafted += d->n;
    c->stats.n_accepted += k;
    if (k == d->n && seq->fresh) return r;
    qwen3i_truncate(seq, len + 1 + k);
    kept = c->model->backend->set_logits(c->state, s->seq, d->logits + (size_t)k * vocab, err);
    seq->fresh = kept == QWEN3_OK;
    return r == QWEN3_OK ? kept : r;
}

/* Tokens evaluated with guesses count as decoded, as far as they are kept. */
static void qwen3i_count_guessed(qwen3_stats *now, const qwen3_stats *before, double ms) {
    now->n_decode += now->n_prefill - before->n_prefill;
    now->n_decode -= now->n_drafted - before->n_drafted - (now->n_accepted - before->n_accepted);
    now->n_prefill = before->n_prefill;
    now->prefill_ms = before->prefill_ms;
    now->decode_ms = before->decode_ms + ms;
}

/* A decode step of replies of which some speculate; c->next has those that are to go on, in order. */
static qwen3_result qwen3i_guessing_step(qwen3_ctx *c, qwen3_stream *const *streams, int active,
                                         const qwen3i_err *err) {
    qwen3i_next *next = c->next;
    const qwen3_stats before = c->stats;
    const double start = qwen3i_now_ms();
    qwen3_result r = QWEN3_OK, one;
    double asked_ms = 0;
    const int room = c->desc.invariant ? qwen3i_max(QWEN3I_SAME_ROWS - active, 0) : INT_MAX;
    int i, k, n_items = 0, n_guesses = 0;
    for (k = 0; k < active; k++) {
        c->rngs[k] = next[k].sampler ? next[k].sampler->rng : 0;
        next[k].n = c->seqs[next[k].seq].len;
    }
    for (i = k = 0; k < active && r == QWEN3_OK; i++) {
        if (streams[i]->seq != next[k].seq) continue;
        r = qwen3i_sample(c, &next[k], err);
        if (r == QWEN3_OK && !next[k].ended)
            r = qwen3i_guess(c, streams[i], next[k].out, room - n_guesses, &asked_ms, err);
        if (r == QWEN3_OK && !next[k].ended)
            c->items[n_items++] = qwen3i_guessed_item(c, next[k].seq, &n_guesses);
        k++;
    }
    if (r == QWEN3_OK && n_items > 0) r = qwen3i_eval(c, c->items, n_items, err);
    for (i = k = 0; k < active; i++) {                  /* of a step that failed, too, what is complete */
        if (streams[i]->seq != next[k].seq) continue;
        if (r == QWEN3_OK || c->seqs[next[k].seq].len > next[k].n) {
            one = qwen3i_verify(c, streams[i], &next[k], err);
            if (r == QWEN3_OK) r = one;
        } else if (next[k].sampler) next[k].sampler->rng = c->rngs[k];
        k++;
    }
    if (n_guesses > 0) qwen3i_count_guessed(&c->stats, &before, qwen3i_now_ms() - start);
    if (r == QWEN3_OK && n_items == 1 && (n_guesses > 0 || !c->model->backend->next))
        qwen3i_smooth(&c->pace.step_ms[n_guesses], qwen3i_now_ms() - start - asked_ms);
    c->pace.chosen_there = 0;
    return r;
}

/* A decode step of replies that do not speculate now. */
static qwen3_result qwen3i_plain_step(qwen3_ctx *c, int active, const qwen3i_err *err) {
    const double start = qwen3i_now_ms();
    const qwen3_result r = qwen3i_next_step(c, c->next, active, err);
    if (r != QWEN3_OK) return r;
    /* of the first that a backend begins ahead, the end is not seen */
    if (active == 1 && c->pace.chosen_there) qwen3i_smooth(&c->pace.step_ms[0], qwen3i_now_ms() - start);
    c->pace.chosen_there = 1;
    return r;
}

/* ---- replies: prompts by pieces, then token by token, of several sequences together ---------- */
/* Where the texts of two lists of tokens, which differ in their first one, come together again; 0 if they do
   not before a control token or the end of one. *i and *k: how many tokens that takes of each. */
static int qwen3i_same_text(const qwen3_model *m, const qwen3_token *x, int n_x, const qwen3_token *y,
                            int n_y, int *i, int *k) {
    const char *p = NULL, *q = NULL;
    int n_p = 0, n_q = 0, n;
    for (*i = *k = 0;;) {
        if (n_p == 0) {
            if (*i == n_x || qwen3i_added_of(m->tokenizer, x[*i])) return 0;
            p = qwen3i_token_bytes(m, x[(*i)++], &n_p);
        }
        if (n_q == 0) {
            if (*k == n_y || qwen3i_added_of(m->tokenizer, y[*k])) return 0;
            q = qwen3i_token_bytes(m, y[(*k)++], &n_q);
        }
        n = qwen3i_min(n_p, n_q);
        if (n == 0 || memcmp(p, q, (size_t)n) != 0) return 0;
        if (n_p == n_q) return 1;
        p += n; q += n;
        n_p -= n; n_q -= n;
    }
}

/* A model may write a text with other tokens than the tokenizer would. Where the rendered tokens have the
   same text as those that the sequence holds, take the latter: they are what the model said, and they are
   evaluated. Returns how many there are now. */
static int qwen3i_take_held(qwen3_ctx *c, int seq, int n) {
    const qwen3i_seq *s = &c->seqs[seq];
    qwen3_token *prompt = c->prompt;
    int at, held, rendered;
    for (at = 0; at < n && at < s->len; at++) {
        if (prompt[at] == s->tokens[at]) continue;
        if (!qwen3i_same_text(c->model, s->tokens + at, s->len - at, prompt + at, n - at, &held, &rendered))
            break;
        if (n - rendered + held > c->desc.max_ctx) break;
        memmove(prompt + at + held, prompt + at + rendered, (size_t)(n - at - rendered) * sizeof *prompt);
        memcpy(prompt + at, s->tokens + at, (size_t)held * sizeof *prompt);
        n += held - rendered;
        at += held - 1;
    }
    return n;
}

/* Render a conversation and plan to bring the sequence up to date with it. */
QWEN3I_COLD
static qwen3_result qwen3i_plan_chat(qwen3_ctx *c, int seq, const qwen3_chat_desc *chat,
                                     const qwen3i_err *err) {
    int n = qwen3i_chat_render(c->model, chat, c->prompt, c->desc.max_ctx, err);
    if (n < 0) return (qwen3_result)n;
    if (n > c->desc.max_ctx)
        return qwen3i_fail(err, QWEN3_ERR_CONTEXT_FULL,
                           "the conversation has %d tokens, the sequence %d positions", n, c->desc.max_ctx);
    return qwen3i_plan(c, seq, c->prompt, qwen3i_take_held(c, seq, n), err);
}

/* The grammar of a conversation's tools stays with the sequence until others come. */
static qwen3_result qwen3i_tools_ready(qwen3_ctx *c, qwen3i_seq *s, const qwen3_chat_desc *chat,
                                       const qwen3i_err *err) {
    qwen3i_buf text = qwen3i_buf_make(&c->desc.allocator);
    qwen3_grammar_desc desc;
    qwen3_grammar *g = NULL;
    qwen3_result r = QWEN3_OK;
    int i, ok = 1;
    for (i = 0; i < chat->n_tools && ok; i++)
        ok = qwen3i_buf_add(&text, i ? "," : "[", 1) &&
             qwen3i_buf_add(&text, chat->tools[i], strlen(chat->tools[i]));
    if (!ok || !qwen3i_buf_add(&text, "]", 1)) r = qwen3i_no_memory(err, "the tools", text.n);
    memset(&desc, 0, sizeof desc);
    desc.kind = QWEN3_GRAMMAR_TOOLS;
    desc.text = text.p;
    desc.n_bytes = text.n;
    if (r == QWEN3_OK && (!s->tools || s->tools->serial != qwen3i_grammar_serial(&desc, chat->tool))) {
        r = qwen3i_grammar_make(&g, c->model, &c->desc.allocator, &desc, chat->tool, err);
        if (r == QWEN3_OK) { qwen3i_grammar_free(s->tools); s->tools = g; }
    }
    qwen3i_buf_free(&text);
    return r;
}

static qwen3_result qwen3i_begin(qwen3_ctx *c, int seq, const qwen3_chat_desc *chat,
                                 const qwen3_gen_desc *gen, qwen3_stream *s, const qwen3i_err *err) {
    qwen3_result r = qwen3i_check_gen(c, gen, err);
    if (r == QWEN3_OK && chat) r = qwen3i_plan_chat(c, seq, chat, err);
    if (r == QWEN3_OK && chat && (chat->flags & (QWEN3_CHAT_TOOLS_AUTO | QWEN3_CHAT_TOOLS_REQUIRED)))
        r = qwen3i_tools_ready(c, &c->seqs[seq], chat, err);
    if (r != QWEN3_OK) return r;
    s->ctx = c;
    s->seq = seq;
    s->gen = *gen;
    s->result = QWEN3_MORE;
    s->n_prompt = qwen3i_to_come(&c->seqs[seq]);
    s->n_tokens = s->n_thinking = s->closed = s->n_pending = 0;
    s->stopped_by = s->forced = -1;
    s->tools = chat ? chat->flags & QWEN3I_CHAT_TOOLS : 0;
    qwen3i_stream_find_kind(s, c->seqs[seq].tokens, c->seqs[seq].len + s->n_prompt);
    return gen->draft_tokens > 0 ? qwen3i_draft_begin(c, seq, gen, err) : QWEN3_OK;
}

QWEN3_API qwen3_result qwen3_stream_begin(qwen3_ctx *c, int seq, const qwen3_chat_desc *chat,
                                          const qwen3_gen_desc *gen, qwen3_stream *s) {
    qwen3i_err err;
    qwen3_result r = qwen3i_enter_seq(c, seq, &err);
    if (r != QWEN3_OK) return r;
    if (!s) return qwen3i_fail(&err, QWEN3_ERR_ARG, "stream is NULL");
    s->ctx = NULL;
    s->result = r = qwen3i_begin(c, seq, chat, gen, s, &err);
    if (r == QWEN3_OK) s->result = QWEN3_MORE;
    return r;
}

/* A piece of the prompts, of so many rows in all. wait: until it is done, where a backend works behind our
   back. */
static qwen3_result qwen3i_read_prompts(qwen3_ctx *c, qwen3_stream *const *streams, int n, int rows, int wait,
                                        const qwen3i_err *err) {
    const double start = qwen3i_now_ms();
    const int all = rows;
    qwen3_result r;
    int i, n_items = 0;
    for (i = 0; i < n && rows > 0; i++) {
        if (!qwen3i_reads(streams[i])) continue;
        c->items[n_items] = qwen3i_piece(c, streams[i]->seq, rows);
        rows -= c->items[n_items++].n;
    }
    if (wait && c->model->config.n_embd <= c->model->config.n_vocab)
        c->items[n_items - 1].hidden = c->scratch.logits;
    r = qwen3i_eval(c, c->items, n_items, err);
    for (i = 0; i < n; i++)
        if (qwen3i_reads(streams[i])) streams[i]->n_prompt = qwen3i_to_come(&c->seqs[streams[i]->seq]);
    c->pace.chosen_there = 0;
    if (r != QWEN3_OK) return r;
    c->pace.prompt_rows = all - rows;
    c->pace.prompt_ms = qwen3i_now_ms() - start;
    return r;
}

/* What the thinking budget forces, or no room: replies that a decode step has nothing to choose for. */
static qwen3_result qwen3i_without_choice(qwen3_ctx *c, qwen3_stream *s, const qwen3i_err *err) {
    qwen3_result r;
    if (c->seqs[s->seq].len >= c->desc.max_ctx) {
        qwen3i_stream_end(s, qwen3i_full(c, s->seq, err));
        return QWEN3_OK;
    }
    if (s->forced < 0) return QWEN3_OK;
    r = qwen3i_append(c, s->seq, s->forced, err);
    if (r == QWEN3_OK) qwen3i_feed(s, s->forced);
    return r;
}

/* A reply's part of a decode step. */
static qwen3i_next qwen3i_next_of(const qwen3_stream *s) {
    qwen3i_next next;
    memset(&next, 0, sizeof next);
    next.seq = s->seq;
    next.sampler = s->gen.sampler;
    next.grammar = s->gen.grammar;
    next.tools = s->tools;
    if (s->tools & ~QWEN3_CHAT_TOOLS_NONE) next.calls = s->ctx->seqs[s->seq].tools;
    next.room = qwen3i_left(s);
    qwen3i_next_grammars(&next);
    return next;
}

#define QWEN3I_MAX_FORCED 32

/* Tokens to which the grammar leaves no alternative: chosen without logits, and evaluated together. */
static qwen3_result qwen3i_say_forced(qwen3_ctx *c, qwen3_stream *s, const qwen3i_err *err) {
    const qwen3_sampler *sampler = s->gen.sampler;
    qwen3i_next next = qwen3i_next_of(s);
    qwen3_token tokens[QWEN3I_MAX_FORCED];
    qwen3i_seq *seq = &c->seqs[s->seq];
    const uint32_t *mask;
    const int len = seq->len, left = s->gen.max_tokens > 0 ? s->gen.max_tokens - s->n_tokens :
                    QWEN3I_MAX_FORCED;
    int i, n = 0, most = qwen3i_min(qwen3i_min(left, c->desc.max_ctx - len),
                                    c->desc.invariant ? QWEN3I_SAME_ROWS : QWEN3I_MAX_FORCED);
    qwen3_item item;
    qwen3_result r = QWEN3_OK;
    if ((!next.grammar && !next.calls) || s->forced >= 0) return QWEN3_OK;
    if (sampler && (sampler->n_bias > 0 || sampler->filter)) return QWEN3_OK;
    for (next.room = INT_MAX; n < most; n++) {
        r = qwen3i_next_mask(c, &next, &mask, err);
        if (r != QWEN3_OK) return r;
        tokens[n] = mask ? qwen3i_mask_single(c->masker) : -1;
        if (tokens[n] < 0 || qwen3i_is_eos(c->model, tokens[n])) break;
        seq->tokens[seq->len++] = tokens[n];    /* to find what follows it; evaluated below */
    }
    seq->len = len;
    if (n < 2) return QWEN3_OK;         /* one is not worth it: the next step says it */
    memset(&item, 0, sizeof item);
    item.seq = s->seq;
    item.tokens = tokens;
    item.n = n;
    r = qwen3i_eval(c, &item, 1, err);
    if (r != QWEN3_OK) return r;
    if (sampler && sampler->temperature > 0) s->gen.sampler->rng += (uint64_t)n * QWEN3I_RNG_STEP;
    for (i = 0; i < n && qwen3i_answers(s); i++) qwen3i_feed(s, tokens[i]);
    qwen3i_truncate(seq, len + i);      /* a stop string may have come before the end of them */
    return QWEN3_OK;
}

/* A token each for all replies whose prompts are in. */
static qwen3_result qwen3i_answer(qwen3_ctx *c, qwen3_stream *const *streams, int n, const qwen3i_err *err) {
    const double start = qwen3i_now_ms();
    qwen3_result r = QWEN3_OK;
    int i, k, active = 0, guesses = 0;
    for (i = 0; i < n && r == QWEN3_OK; i++) {
        qwen3_stream *s = streams[i];
        if (qwen3i_answers(s)) r = qwen3i_without_choice(c, s, err);
        if (!qwen3i_answers(s)) continue;
        c->next[active++] = qwen3i_next_of(s);
        guesses |= qwen3i_may_guess(c, s);
    }
    if (r == QWEN3_OK && active > 0)
        r = guesses ? qwen3i_guessing_step(c, streams, active, err) :
            qwen3i_plain_step(c, active, err);
    for (i = k = 0; i < n && k < active && r == QWEN3_OK && !guesses; i++)
        if (streams[i]->seq == c->next[k].seq) qwen3i_feed(streams[i], c->next[k++].out);
    for (i = 0; i < n && r == QWEN3_OK; i++)
        if (qwen3i_answers(streams[i])) r = qwen3i_say_forced(c, streams[i], err);
    c->pace.decode_ms = qwen3i_now_ms() - start;
    return r;
}

static double qwen3i_row_ms(const qwen3i_pace *p) { return p->prompt_ms / qwen3i_max(p->prompt_rows, 1); }

/* Rows of prompts that take about as long as is left, as far as the last piece's time tells. */
static int qwen3i_affordable(const qwen3i_pace *p, double left_ms) {
    const int last = qwen3i_max(p->prompt_rows, 1), most = qwen3i_min(p->rows, 2 * last);
    const double rows = p->prompt_ms > 0 ? left_ms / qwen3i_row_ms(p) : last;
    return rows < 1 ? 1 : rows < most ? (int)rows : most;
}

/* Work on replies until none is left (OK) or the time is over (MORE). Where both are waiting, answers and
   prompts take turns. */
static qwen3_result qwen3i_run(qwen3_ctx *c, qwen3_stream *const *streams, int n, double budget_ms,
                               const qwen3i_err *err) {
    const double start = qwen3i_now_ms();
    qwen3_result r = QWEN3_OK;
    int i, first = 1;
    for (; r == QWEN3_OK; first = 0) {
        const double left = budget_ms - (qwen3i_now_ms() - start);
        int reads = 0, answers = 0, rows = c->pace.rows;
        for (i = 0; i < n; i++) { reads += qwen3i_reads(streams[i]); answers += qwen3i_answers(streams[i]); }
        if (reads + answers == 0) return QWEN3_OK;
        if (reads && answers) { c->pace.turn ^= 1; reads = c->pace.turn; }
        if (budget_ms > 0) {
            rows = qwen3i_affordable(&c->pace, left);
            if (!first && left < (reads ? qwen3i_row_ms(&c->pace) : c->pace.decode_ms)) return QWEN3_MORE;
        }
        r = reads ? qwen3i_read_prompts(c, streams, n, rows, budget_ms > 0, err) :
            qwen3i_answer(c, streams, n, err);
    }
    return r;
}

static qwen3_result qwen3i_check_streams(qwen3_ctx *c, qwen3_stream *const *streams, int n,
                                         const qwen3i_err *err) {
    int i, k;
    if (n < 0 || n > c->desc.max_seqs || (n > 0 && !streams))
        return qwen3i_fail(err, QWEN3_ERR_ARG, "streams is NULL, or n (%d) not 0 to max_seqs (%d)", n,
                           c->desc.max_seqs);
    for (i = 0; i < n; i++) {
        if (!streams[i] || streams[i]->ctx != c)
            return qwen3i_fail(err, QWEN3_ERR_ARG, "streams[%d] was not begun on this context", i);
        for (k = 0; k < i; k++)
            if (streams[k]->seq == streams[i]->seq)
                return qwen3i_fail(err, QWEN3_ERR_ARG, "streams[%d] and [%d] are both of sequence %d", k, i,
                                   streams[i]->seq);
        if (streams[i]->n_prompt != qwen3i_to_come(&c->seqs[streams[i]->seq]) && qwen3i_reads(streams[i]))
            return qwen3i_fail(err, QWEN3_ERR_ARG,
                               "streams[%d]: sequence %d was changed before its prompt was complete",
                               i, streams[i]->seq);
    }
    return QWEN3_OK;
}

QWEN3_API qwen3_result qwen3_stream_step(qwen3_ctx *c, qwen3_stream *const *streams, int n,
                                         int64_t budget_us) {
    qwen3i_err err;
    qwen3_result r = qwen3i_enter(c, &err);
    if (r == QWEN3_OK) r = qwen3i_check_streams(c, streams, n, &err);
    return r == QWEN3_OK ? qwen3i_run(c, streams, n, budget_us < 0 ? 1e-3 : 1e-3 * (double)budget_us, &err) :
           r;
}

/* Push: all of it in one call. */
static qwen3_result qwen3i_generate(qwen3_ctx *c, int seq, const qwen3_chat_desc *chat,
                                    const qwen3_gen_desc *gen, int of_chat) {
    qwen3i_err err;
    qwen3_stream s, *list = &s;
    qwen3_result r = qwen3i_enter_seq(c, seq, &err);
    if (r == QWEN3_OK && of_chat && !chat) r = qwen3i_fail(&err, QWEN3_ERR_ARG, "chat is NULL");
    if (r == QWEN3_OK) r = qwen3i_begin(c, seq, chat, gen, &s, &err);
    if (r != QWEN3_OK) return r;
    r = qwen3i_run(c, &list, 1, 0, &err);
    return r == QWEN3_OK ? s.result : qwen3i_stream_end(&s, r);
}

QWEN3_API qwen3_result qwen3_generate(qwen3_ctx *c, int seq, const qwen3_gen_desc *gen) {
    return qwen3i_generate(c, seq, NULL, gen, 0);
}

QWEN3_API qwen3_result qwen3_chat(qwen3_ctx *c, int seq, const qwen3_chat_desc *chat,
                                  const qwen3_gen_desc *gen) {
    return qwen3i_generate(c, seq, chat, gen, 1);
}

/* ---- embeddings and reranking, as their model cards define them ------------------------------ */
static qwen3_result qwen3i_check_texts(const qwen3_ctx *c, const char *a, const char *b, const void *out,
                                       const qwen3i_err *err) {
    if (!a || !b || !out) return qwen3i_fail(err, QWEN3_ERR_ARG, "a text or out is NULL");
    if (c->model->tokenizer) return QWEN3_OK;
    return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED, "the model was loaded without tokenizer files");
}

/* Join texts into one string that the caller frees with its size; NULL if there is no memory. */
static char *qwen3i_join(const qwen3_allocator *a, const char *const *parts, int n, size_t *size) {
    char *text;
    size_t at = 0;
    int i;
    *size = 1;
    for (i = 0; i < n; i++) *size += strlen(parts[i]);
    text = (char *)qwen3i_alloc(a, *size);
    if (!text) return NULL;
    for (i = 0; i < n; i++) { size_t len = strlen(parts[i]); memcpy(text + at, parts[i], len); at += len; }
    text[at] = '\0';
    return text;
}

/* To length 1. 0: something in it is not a number. */
static int qwen3i_normalise(float *x, int n) {
    const fenv_t callers = qwen3i_float_enter();
    double sum = 0, scale;
    int i, numbers = 1;
    for (i = 0; i < n; i++) {
        numbers &= qwen3i_is_number(x[i]);
        sum += (double)x[i] * (double)x[i];
    }
    scale = sum > 0 ? 1.0 / sqrt(sum) : 0.0;
    for (i = 0; i < n; i++) x[i] = (float)((double)x[i] * scale);
    qwen3i_float_leave(callers);
    return numbers;
}

QWEN3I_COLD
QWEN3_API qwen3_result qwen3_embed(qwen3_ctx *c, int seq, const char *task, const char *text, float *out) {
    const char *parts[4];
    qwen3i_err err;
    qwen3_item item;
    qwen3_result r;
    size_t size;
    char *joined;
    int n;
    r = qwen3i_enter_seq(c, seq, &err);
    if (r == QWEN3_OK) r = qwen3i_check_texts(c, text, "", out, &err);
    if (r != QWEN3_OK) return r;
    if (c->model->no_embedding[0])
        return qwen3i_fail(&err, QWEN3_ERR_UNSUPPORTED, "%s", c->model->no_embedding);
    if (c->model->info.end_of_text < 0)
        return qwen3i_fail(&err, QWEN3_ERR_UNSUPPORTED,
                           "the tokenizer has no <|endoftext|>, at which embeddings are read");
    if (c->model->info.has_head && !c->model->says_pooling)
        qwen3i_log(&c->desc.logger, QWEN3_LOG_WARN,
                   "embedding with a model that does not say that it was made for it "
                   "(1_Pooling/config.json, pooling_type in a GGUF file)");
    parts[0] = "Instruct: "; parts[1] = task; parts[2] = "\nQuery:"; parts[3] = text;
    joined = task ? qwen3i_join(&c->desc.allocator, parts, 4, &size) :
             qwen3i_join(&c->desc.allocator, &parts[3], 1, &size);
    if (!joined) return qwen3i_no_memory(&err, "a text", size);
    n = qwen3i_encode(c->model, joined, size - 1, 0, c->prompt, c->desc.max_ctx - 1, &err);
    qwen3i_free(&c->desc.allocator, joined, size);
    if (n < 0) return (qwen3_result)n;
    if (n >= c->desc.max_ctx)
        return qwen3i_fail(&err, QWEN3_ERR_CONTEXT_FULL, "the text has %d tokens, the sequence %d positions",
                           n + 1, c->desc.max_ctx);
    c->prompt[n] = c->model->info.end_of_text;
    memset(&item, 0, sizeof item);
    item.seq = seq; item.tokens = c->prompt; item.n = n + 1; item.hidden = out;
    qwen3i_truncate(&c->seqs[seq], 0);
    r = qwen3i_eval(c, &item, 1, &err);
    qwen3i_truncate(&c->seqs[seq], 0);
    if (r == QWEN3_OK && !qwen3i_normalise(out, c->model->config.n_embd)) return qwen3i_not_numbers(&err);
    return r;
}

/* P(yes) against P(no) */
static qwen3_result qwen3i_relevance(double yes, double no, float *score, const qwen3i_err *err) {
    if (!qwen3i_is_number((float)yes) || !qwen3i_is_number((float)no)) return qwen3i_not_numbers(err);
    *score = (float)(1 / (1 + exp(no - yes)));
    return QWEN3_OK;
}

/* By a reranker's own two rows: they need the last token's state, which it is evaluated again for. */
static qwen3_result qwen3i_rank_by_rows(qwen3_ctx *c, int seq, float *score, const qwen3i_err *err) {
    const int n = c->model->config.n_embd;
    const float *rows = c->model->rank;
    double yes = 0, no = 0;
    qwen3i_seq *s = &c->seqs[seq];
    const qwen3_token token = s->tokens[s->len - 1];
    qwen3_item item;
    float *state = (float *)qwen3i_alloc_array(&c->desc.allocator, (size_t)n, sizeof *state);
    qwen3_result r;
    int i;
    if (!state) return qwen3i_no_memory(err, "a state", (uint64_t)n * sizeof *state);
    memset(&item, 0, sizeof item);
    item.seq = seq; item.tokens = &token; item.n = 1; item.hidden = state;
    qwen3i_truncate(s, s->len - 1);
    r = qwen3i_eval(c, &item, 1, err);
    for (i = 0; i < n && r == QWEN3_OK; i++) {
        yes += (double)rows[i] * (double)state[i];
        no += (double)rows[n + i] * (double)state[i];
    }
    qwen3i_free(&c->desc.allocator, state, (size_t)n * sizeof *state);
    return r == QWEN3_OK ? qwen3i_relevance(yes, no, score, err) : r;
}

/* The same after a prompt that is in the sequence. */
static qwen3_result qwen3i_yes_or_no(qwen3_ctx *c, int seq, float *score, const qwen3i_err *err) {
    qwen3_token yes, no;
    const float *logits;
    qwen3_result r;
    if (c->model->rank) return qwen3i_rank_by_rows(c, seq, score, err);
    if (qwen3i_encode(c->model, "yes", 3, 0, &yes, 1, err) != 1 ||
        qwen3i_encode(c->model, "no", 2, 0, &no, 1, err) != 1)
        return qwen3i_fail(err, QWEN3_ERR_UNSUPPORTED,
                           "the tokenizer has no tokens \"yes\" and \"no\": not a reranker");
    r = qwen3i_get_logits(c, seq, &logits, err);
    return r == QWEN3_OK ? qwen3i_relevance((double)logits[yes], (double)logits[no], score, err) : r;
}

QWEN3I_COLD
QWEN3_API qwen3_result qwen3_rerank(qwen3_ctx *c, int seq, const char *task, const char *query,
                                    const char *document, float *score) {
    const char *parts[6];
    qwen3_msg msgs[2];
    qwen3_chat_desc chat;
    qwen3i_err err;
    qwen3_result r;
    size_t size;
    char *joined;
    r = qwen3i_enter_seq(c, seq, &err);
    if (r == QWEN3_OK) r = qwen3i_check_texts(c, query, document, score, &err);
    if (r != QWEN3_OK) return r;
    parts[0] = "<Instruct>: ";
    parts[1] = task ? task : "Given a web search query, retrieve relevant passages that answer the query";
    parts[2] = "\n<Query>: ";  parts[3] = query;
    parts[4] = "\n<Document>: "; parts[5] = document;
    joined = qwen3i_join(&c->desc.allocator, parts, 6, &size);
    if (!joined) return qwen3i_no_memory(&err, "a prompt", size);
    memset(msgs, 0, sizeof msgs);
    msgs[0].role = QWEN3_SYSTEM;
    msgs[0].text = "Judge whether the Document meets the requirements based on the Query and the Instruct "
                   "provided. "
                   "Note that the answer can only be \"yes\" or \"no\".";
    msgs[1].role = QWEN3_USER;
    msgs[1].text = joined;
    memset(&chat, 0, sizeof chat);
    chat.msgs = msgs; chat.n_msgs = 2; chat.flags = QWEN3_CHAT_NO_THINK;
    r = qwen3i_plan_chat(c, seq, &chat, &err);
    if (r == QWEN3_OK) r = qwen3i_bring_in(c, seq, 0, &err);
    qwen3i_free(&c->desc.allocator, joined, size);
    return r == QWEN3_OK ? qwen3i_yes_or_no(c, seq, score, &err) : r;
}
/* ================================================================================================
   SAVED STATES: one sequence as bytes, little-endian:
     header | tokens int32 [n] | logits float32 [n_vocab], if kept | per layer: K [n, kv_dim], V [n, kv_dim]
     | sampler, if it goes with it | the caller's bytes
   ================================================================================================ */
#define QWEN3I_STATE_MAGIC   0x324553334E455751u    /* "QWEN3SE2" */

typedef struct qwen3i_state_header {    /* 80 bytes, no padding */
    uint64_t magic, fingerprint, total; /* total: bytes in all */
    uint64_t checksum;                  /* of everything after this field */
    uint64_t user_size;
    uint32_t kv_type, n_layer, kv_dim, n_vocab, n_tokens, has_logits, yarn_bits, has_sampler;
    uint32_t grammar_from, reserved;    /* position where a grammar began, from 1; 0: none */
} qwen3i_state_header;

typedef struct qwen3i_state_sampler {   /* 40 bytes, no padding: a sampler's numbers */
    uint64_t rng;
    float    temperature, top_p, min_p, repeat_penalty, presence_penalty;
    int32_t  top_k, penalty_last_n, reserved;
} qwen3i_state_sampler;

#define QWEN3I_CHECKSUM_FROM offsetof(qwen3i_state_header, user_size)

static qwen3i_state_header qwen3i_state_of(const qwen3_ctx *c, uint32_t n_tokens, int has_logits,
                                           int has_sampler, uint64_t user_size) {
    const qwen3i_config *cfg = &c->model->config;
    qwen3i_state_header h;
    uint64_t per_token;
    memset(&h, 0, sizeof h);
    h.magic = QWEN3I_STATE_MAGIC;
    h.fingerprint = c->model->info.fingerprint;
    h.kv_type = (uint32_t)c->desc.kv_type;
    h.n_layer = (uint32_t)cfg->n_layer;
    h.kv_dim = (uint32_t)(cfg->n_head_kv * cfg->head_dim);
    h.n_vocab = (uint32_t)cfg->n_vocab;
    h.n_tokens = n_tokens;
    h.has_logits = (uint32_t)has_logits;
    h.has_sampler = (uint32_t)has_sampler;
    h.user_size = user_size;
    memcpy(&h.yarn_bits, &c->desc.yarn_factor, 4);
    per_token = 2 * (uint64_t)h.n_layer * qwen3i_row_bytes((qwen3i_type)h.kv_type, (int)h.kv_dim) +
                sizeof(qwen3_token);
    h.total = sizeof h + n_tokens * per_token + (has_logits ? (uint64_t)h.n_vocab * sizeof(float) : 0);
    h.total += (has_sampler ? sizeof(qwen3i_state_sampler) : 0) + user_size;
    return h;
}

static qwen3i_state_sampler qwen3i_state_sampler_of(const qwen3_sampler *s) {
    qwen3i_state_sampler n;
    n.rng = s->rng;
    n.temperature = s->temperature;
    n.top_p = s->top_p;
    n.min_p = s->min_p;
    n.repeat_penalty = s->repeat_penalty;
    n.presence_penalty = s->presence_penalty;
    n.top_k = s->top_k;
    n.penalty_last_n = s->penalty_last_n;
    n.reserved = 0;
    return n;
}

static void qwen3i_state_sampler_to(const qwen3i_state_sampler *n, qwen3_sampler *s) {
    s->rng = n->rng;
    s->temperature = n->temperature;
    s->top_p = n->top_p;
    s->min_p = n->min_p;
    s->repeat_penalty = n->repeat_penalty;
    s->presence_penalty = n->presence_penalty;
    s->top_k = n->top_k;
    s->penalty_last_n = n->penalty_last_n;
}

static qwen3_result qwen3i_save_body(qwen3_ctx *c, int seq, const qwen3i_state_header *h, char *p,
                                     const qwen3i_err *err) {
    const qwen3_backend *b = c->model->backend;
    const size_t row = (size_t)qwen3i_row_bytes((qwen3i_type)h->kv_type, (int)h->kv_dim);
    const size_t n = h->n_tokens, half = n * row;
    const float *logits;
    qwen3_result r = QWEN3_OK;
    uint32_t layer;
    if (n) memcpy(p, c->seqs[seq].tokens, n * sizeof(qwen3_token));
    p += n * sizeof(qwen3_token);
    if (h->has_logits) {
        r = b->logits(c->state, seq, &logits, err);
        if (r != QWEN3_OK) return r;
        memcpy(p, logits, h->n_vocab * sizeof *logits);
        p += h->n_vocab * sizeof *logits;
    }
    for (layer = 0; n > 0 && layer < h->n_layer && r == QWEN3_OK; layer++, p += 2 * half)
        r = b->kv_read(c->state, seq, (int)layer, (int)n, p, p + half, err);
    return r;
}

/* The state to dst, which has room for it. */
static qwen3_result qwen3i_save(qwen3_ctx *c, int seq, const qwen3_state *st, qwen3i_state_header *h,
                                char *dst, const qwen3i_err *err) {
    qwen3_result r = qwen3i_save_body(c, seq, h, dst + sizeof *h, err);
    char *end = dst + (size_t)(h->total - h->user_size);
    if (r != QWEN3_OK) return r;
    if (h->user_size) memcpy(end, st->user, (size_t)h->user_size);
    if (st->sampler) {
        const qwen3i_state_sampler numbers = qwen3i_state_sampler_of(st->sampler);
        memcpy(end - sizeof numbers, &numbers, sizeof numbers);
    }
    memcpy(dst, h, sizeof *h);
    h->checksum = qwen3i_hash(h->fingerprint, dst + QWEN3I_CHECKSUM_FROM,
                              (size_t)h->total - QWEN3I_CHECKSUM_FROM);
    memcpy(dst, h, sizeof *h);
    return QWEN3_OK;
}

static qwen3_result qwen3i_save_file(qwen3_ctx *c, int seq, const qwen3_state *st, qwen3i_state_header *h,
                                     const qwen3i_err *err) {
    const qwen3_allocator *a = &c->desc.allocator;
    const size_t size = (size_t)h->total;
    char *bytes = h->total < (size_t)-1 ? (char *)qwen3i_alloc(a, size) : NULL;
    qwen3_result r = bytes ? qwen3i_save(c, seq, st, h, bytes, err) :
                     qwen3i_no_memory(err, "the saved state", h->total);
    if (r == QWEN3_OK) r = qwen3i_write_file(a, st->path, bytes, size, err);
    qwen3i_free(a, bytes, size);
    return r;
}

QWEN3I_COLD
QWEN3_API qwen3_result qwen3_seq_save(qwen3_ctx *c, int seq, qwen3_state *st) {
    qwen3i_state_header h;
    qwen3i_err err;
    qwen3_result r = qwen3i_enter_seq(c, seq, &err);
    if (r != QWEN3_OK) return r;
    if (!st || (st->path && st->data) || (!st->user && st->user_size))
        return qwen3i_fail(&err, QWEN3_ERR_ARG, "state or its user is NULL, or it has both path and data");
    h = qwen3i_state_of(c, (uint32_t)c->seqs[seq].len, c->seqs[seq].fresh, st->sampler != NULL,
                        st->user_size);
    h.grammar_from = (uint32_t)(c->seqs[seq].grammar_start + 1);
    if (st->path) r = qwen3i_save_file(c, seq, st, &h, &err);
    else if (st->data && st->size < h.total)
        r = qwen3i_fail(&err, QWEN3_ERR_ARG, "the state has %llu bytes, the buffer %llu",
                        (unsigned long long)h.total,
                        (unsigned long long)st->size);
    else if (st->data) r = qwen3i_save(c, seq, st, &h, (char *)st->data, &err);
    st->size = h.total;
    return r;
}

/* Every field is compared with what this context would have written. */
static qwen3_result qwen3i_check_state(const qwen3_ctx *c, const void *src, uint64_t size,
                                       qwen3i_state_header *h, const qwen3i_err *err) {
    qwen3i_state_header want;
    if (size < sizeof *h)
        return qwen3i_fail(err, QWEN3_ERR_FORMAT, "the saved state is too short: %llu bytes",
                           (unsigned long long)size);
    memcpy(h, src, sizeof *h);
    if (h->magic != QWEN3I_STATE_MAGIC)
        return qwen3i_fail(err, QWEN3_ERR_FORMAT, "not a saved state, or of another version");
    if (h->total != size)
        return qwen3i_fail(err, QWEN3_ERR_FORMAT, "the saved state has %llu bytes, of %llu",
                           (unsigned long long)size, (unsigned long long)h->total);
    if (h->checksum != qwen3i_hash(h->fingerprint, (const char *)src + QWEN3I_CHECKSUM_FROM,
                                   (size_t)size - QWEN3I_CHECKSUM_FROM))
        return qwen3i_fail(err, QWEN3_ERR_FORMAT, "the saved state is damaged: its checksum is wrong");
    if (h->has_logits > 1 || h->has_sampler > 1 || h->user_size > size ||
        h->grammar_from > (uint64_t)h->n_tokens + 1 || h->reserved)
        return qwen3i_fail(err, QWEN3_ERR_FORMAT, "the saved state is damaged");
    want = qwen3i_state_of(c, h->n_tokens, (int)h->has_logits, (int)h->has_sampler, h->user_size);
    if (h->fingerprint != want.fingerprint || h->n_layer != want.n_layer || h->kv_dim != want.kv_dim ||
        h->n_vocab != want.n_vocab)
        return qwen3i_fail(err, QWEN3_ERR_MISMATCH, "the saved state belongs to another model");
    if (h->kv_type != want.kv_type || h->yarn_bits != want.yarn_bits)
        return qwen3i_fail(err, QWEN3_ERR_MISMATCH,
                           "the saved state has another KV type or yarn_factor than this context");
    if (h->n_tokens > (uint32_t)c->desc.max_ctx)                /* first: the total could overflow */
        return qwen3i_fail(err, QWEN3_ERR_CONTEXT_FULL,
                           "the saved state has %u tokens, the sequence %d positions", (unsigned)h->n_tokens,
                               c->desc.max_ctx);
    if (h->total != want.total) return qwen3i_fail(err, QWEN3_ERR_FORMAT, "the saved state is damaged");
    return QWEN3_OK;
}

static qwen3_result qwen3i_load_body(qwen3_ctx *c, int seq, const qwen3i_state_header *h, const char *p,
                                     const qwen3i_err *err) {
    const qwen3_backend *b = c->model->backend;
    const size_t row = (size_t)qwen3i_row_bytes((qwen3i_type)h->kv_type, (int)h->kv_dim);
    const size_t n = h->n_tokens, half = n * row;
    qwen3_result r = QWEN3_OK;
    uint32_t layer;
    p += n * sizeof(qwen3_token);
    if (h->has_logits) {
        memcpy(c->scratch.logits, p, h->n_vocab * sizeof(float));     /* src may not be aligned */
        r = b->set_logits(c->state, seq, c->scratch.logits, err);
        p += h->n_vocab * sizeof(float);
    }
    for (layer = 0; n > 0 && layer < h->n_layer && r == QWEN3_OK; layer++, p += 2 * half)
        r = b->kv_write(c->state, seq, (int)layer, (int)n, p, p + half, err);
    return r;
}

static qwen3_result qwen3i_check_state_tokens(const qwen3_ctx *c, const char *p, uint32_t n,
                                              const qwen3i_err *err) {
    qwen3_token t;
    uint32_t i;
    for (i = 0; i < n; i++) {
        memcpy(&t, p + i * sizeof t, sizeof t);
        if (t < 0 || t >= c->model->config.n_vocab)
            return qwen3i_fail(err, QWEN3_ERR_FORMAT, "the saved state is damaged: token %u is %d",
                               (unsigned)i, (int)t);
    }
    return QWEN3_OK;
}

/* What goes with the sequence; checked before anything is changed. */
static qwen3_result qwen3i_load_rest(const qwen3i_state_header *h, const char *src, qwen3_state *st,
                                     const qwen3i_err *err) {
    const char *end = src + (size_t)(h->total - h->user_size);
    const size_t room = st->user_size;
    qwen3i_state_sampler numbers;
    qwen3_sampler sampler;
    qwen3_result r;
    if (st->sampler && h->has_sampler) {
        sampler = *st->sampler;
        memcpy(&numbers, end - sizeof numbers, sizeof numbers);
        qwen3i_state_sampler_to(&numbers, &sampler);
        r = qwen3i_check_sampler(&sampler, err);
        if (r != QWEN3_OK) return r;
    }
    st->user_size = (size_t)h->user_size;
    if (st->user && room < h->user_size)
        return qwen3i_fail(err, QWEN3_ERR_ARG, "the state has %llu bytes of the caller's, user room for %llu",
                           (unsigned long long)h->user_size, (unsigned long long)room);
    if (st->user && h->user_size) memcpy(st->user, end, (size_t)h->user_size);
    if (st->sampler && h->has_sampler) *st->sampler = sampler;
    return QWEN3_OK;
}

QWEN3I_COLD
static qwen3_result qwen3i_load(qwen3_ctx *c, int seq, const void *src, uint64_t size, qwen3_state *st,
                                const qwen3i_err *err) {
    qwen3i_seq *s = &c->seqs[seq];
    const char *body = (const char *)src + sizeof(qwen3i_state_header);
    qwen3i_state_header h;
    qwen3_result r = qwen3i_check_state(c, src, size, &h, err);
    if (r == QWEN3_OK) r = qwen3i_check_state_tokens(c, body, h.n_tokens, err);
    if (r == QWEN3_OK) r = qwen3i_load_rest(&h, (const char *)src, st, err);
    if (r != QWEN3_OK) return r;
    qwen3i_truncate(s, 0);              /* from here on only the device can fail: the context is lost */
    s->fresh = 0;
    r = qwen3i_load_body(c, seq, &h, body, err);
    if (r != QWEN3_OK) return r;
    if (h.n_tokens) memcpy(s->tokens, body, h.n_tokens * sizeof(qwen3_token));
    s->len = (int)h.n_tokens;
    s->grammar_start = (int)h.grammar_from - 1;
    s->fresh = h.n_tokens > 0 && h.has_logits;
    return QWEN3_OK;
}

static qwen3_result qwen3i_load_file(qwen3_ctx *c, int seq, qwen3_state *st, const qwen3i_err *err) {
    const qwen3_allocator *a = &c->desc.allocator;
    char *bytes = NULL;
    qwen3_result r = qwen3i_read_file(a, st->path, &bytes, &st->size, err);
    if (r == QWEN3_OK) r = qwen3i_load(c, seq, bytes, st->size, st, err);
    qwen3i_free(a, bytes, (size_t)st->size);
    return r;
}

QWEN3I_COLD
QWEN3_API qwen3_result qwen3_seq_load(qwen3_ctx *c, int seq, qwen3_state *st) {
    qwen3i_err err;
    qwen3_result r = qwen3i_enter_seq(c, seq, &err);
    if (r != QWEN3_OK) return r;
    if (!st || !st->path == !st->data)
        return qwen3i_fail(&err, QWEN3_ERR_ARG, "state is NULL, or has not one of path and data");
    return st->path ? qwen3i_load_file(c, seq, st, &err) : qwen3i_load(c, seq, st->data, st->size, st, &err);
}
#endif /* QWEN3I_IMPLEMENTED */
#endif /* QWEN3_IMPLEMENTATION */

/* ------------------------------------------------------------------------------------------------
   This software is available under two licences; choose whichever you prefer.

   ALTERNATIVE A - MIT License
   Copyright (c) 2026 the qwen3.h authors
   Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
   associated documentation files (the "Software"), to deal in the Software without restriction,
   including without limitation the rights to use, copy, modify, merge, publish, distribute,
   sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
   furnished to do so, subject to the following conditions: The above copyright notice and this
   permission notice shall be included in all copies or substantial portions of the Software.
   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
   NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
   NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
   DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
   OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

   ALTERNATIVE B - Public Domain (www.unlicense.org)
   This is free and unencumbered software released into the public domain. Anyone is free to copy,
   modify, publish, use, compile, sell, or distribute this software, either in source code form or as
   a compiled binary, for any purpose, commercial or non-commercial, and by any means. In
   jurisdictions that recognize copyright laws, the author or authors of this software dedicate any
   and all copyright interest in the software to the public domain. We make this dedication for the
   benefit of the public at large and to the detriment of our heirs and successors. We intend this
   dedication to be an overt act of relinquishment in perpetuity of all present and future rights to
   this software under copyright law.
   THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
   NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
   NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
   LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
   CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
   ------------------------------------------------------------------------------------------------ */
