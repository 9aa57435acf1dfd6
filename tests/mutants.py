#!/usr/bin/env python3
"""Break the library on purpose, one change at a time, and demand that the tests notice.

    python tests/mutants.py              all of them: some minutes
    python tests/mutants.py -k rope      those whose name contains "rope"
    python tests/mutants.py --apply      whether each can still be made, without running one: no time

A test that passes when the mistake is in is not a test. Each mutant is a text in qwen3.h, or in qwen3_cuda.cu, that
must occur exactly once, and what to put there instead. The CUDA backend's kernels run on the CPU (tests/cuda_on_cpu).
The last line says how many were caught.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# tests that must notice, name, text, replacement
MUTANTS = [
    # the classic mistakes with this model
    ("parity", "norm after rope", r"""        qwen3i_rmsnorm_heads(c->exec.simd, k, w->k_norm, cfg->n_head_kv, cfg->head_dim, cfg->rms_eps);
        qwen3i_rope(q, cosines, sines, cfg->n_head, cfg->head_dim);
        qwen3i_rope(k, cosines, sines, cfg->n_head_kv, cfg->head_dim);
""", r"""        qwen3i_rope(q, cosines, sines, cfg->n_head, cfg->head_dim);
        qwen3i_rope(k, cosines, sines, cfg->n_head_kv, cfg->head_dim);
        qwen3i_rmsnorm_heads(c->exec.simd, k, w->k_norm, cfg->n_head_kv, cfg->head_dim, cfg->rms_eps);
"""),
    ("parity", "norm of q skipped", "        qwen3i_rmsnorm_heads(c->exec.simd, q, w->q_norm, cfg->n_head, cfg->head_dim, cfg->rms_eps);\n", ""),
    ("parity", "norm of k skipped", "        qwen3i_rmsnorm_heads(c->exec.simd, k, w->k_norm, cfg->n_head_kv, cfg->head_dim, cfg->rms_eps);\n", ""),
    ("parity", "interleaved rope", """            float a = x[j], b = x[j + half];
            x[j]        = a * cosines[j] - b * sines[j];
            x[j + half] = b * cosines[j] + a * sines[j];
""", """            float a = x[2 * j], b = x[2 * j + 1];
            x[2 * j]     = a * cosines[j] - b * sines[j];
            x[2 * j + 1] = b * cosines[j] + a * sines[j];
"""),
    ("parity", "eps 1e-5", "cfg->rms_eps = (float)eps;", "cfg->rms_eps = 1e-5f;"),
    ("parity", "theta 1e4", "cfg->rope_theta = theta;", "cfg->rope_theta = 1e4;"),
    ("parity", "heads share the wrong KV head", "+ (size_t)(h / (a->n_head / a->n_head_kv));", "+ (size_t)(h % a->n_head_kv);"),
    ("parity", "attention scale", "(float)(1.0 / sqrt((double)a->head_dim))", "(float)(1.0 / a->head_dim)"),
    ("parity", "tokens see the future", "softmax(scores + (size_t)i * ld, first + i / n_h + 1,", "softmax(scores + (size_t)i * ld, first + i / n_h + 2,"),
    ("parity", "yarn without its attention factor", "return factor > 1 ? 0.1 * mscale * log(factor) + 1 : 1;", "return factor > 1 ? 1 : mscale;"),
    ("malformed", "tied head ignored", "    cfg->tied = c->values[QWEN3I_KEY_TIED] != 0;\n", ""),
    ("checkpoints_yarn", "yarn stretches all positions of the file", "cfg->max_ctx == 40960 ? 32768 : cfg->max_ctx;", "cfg->max_ctx;"),
    # sequences
    ("identical", "neighbours mixed up", "a->seqs[t + n_t] == a->seqs[t]; n_t++", "1; n_t++"),
    ("identical", "prefix not compared", "common < s->len && s->tokens[common] == tokens[common]", "common < s->len"),
    ("identical", "logits kept after truncating", "    if (len < s->len) s->fresh = 0;\n", ""),
    ("identical", "copy forgets the last position", "memcpy(c->v + to, c->v + from, (size_t)n_pos *", "memcpy(c->v + to, c->v + from, (size_t)(n_pos - 1) *"),
    ("state", "restored logits that were not saved", "s->fresh = h.n_tokens > 0 && h.has_logits;", "s->fresh = h.n_tokens > 0;"),
    ("state", "checksum not checked", "if (h->checksum != qwen3i_hash(", "if (0 && h->checksum != qwen3i_hash("),
    ("fault", "logits of a cancelled step kept", "{ qwen3i_forget_logits(c, b); return r; }", "{ (void)qwen3i_forget_logits; return r; }"),
    ("fault", "random state of a cancelled step kept", "if (next[i].sampler) next[i].sampler->rng = c->rngs[i];", "{ }"),
    # sampling and text
    ("sampler", "padding rows chosen", "    return m->info.n_tokens ? m->info.n_tokens : m->config.n_vocab;\n", "    return m->config.n_vocab;\n"),
    ("sampler", "ties towards the higher id", "(!(a.logit < b.logit) && a.id < b.id)", "(!(a.logit < b.logit) && a.id > b.id)"),
    ("sampler", "top_p one token short", "while (kept < n && sum < need);\n    memmove", "while (kept < n && sum * 2 < need);\n    memmove"),
    ("sampler", "penalty once for each occurrence", "        mark[seq[i]].id = 1;\n", ""),
    ("api_", "stop strings not held back", "if (common < len) *held = qwen3i_max(*held, s->n_pending - i);", "if (common < len) *held = 0;"),
    ("api_", "half characters delivered", "ready = qwen3i_utf8_complete(s->pending, s->n_pending - held);", "ready = s->n_pending - held;"),
    # memory
    ("fault", "a leak when embedding", "    qwen3i_free(&c->desc.allocator, joined, size);\n    if (n < 0) return (qwen3_result)n;", "    if (n < 0) return (qwen3_result)n;"),
    # what once was wrong
    ("sampler", "presence before the repeat penalty", "return logit > 0 ? logit / by - presence : fmaf(logit, by, -presence);", "logit -= presence; return logit > 0 ? logit / by : logit * by;"),
    ("sampler", "what is banned is lifted", "    if (!qwen3i_allowed(logit)) return logit;\n", ""),
    ("sampler", "weights end six octaves earlier", "if (!(octaves < (float)QWEN3I_OCTAVES)) return 0;", "if (!(octaves < 33)) return 0;"),
    ("stream", "text held back before thinking is thinking", "    qwen3_result r = qwen3i_flush(s, s->n_pending - newline);\n    s->kind = tag->tag;", "    qwen3_result r = QWEN3_MORE; (void)newline;\n    s->kind = tag->tag;"),
    ("stream_warnings", "a context's logger has no effect", "qwen3i_log(&c->desc.logger, QWEN3_LOG_WARN,", "qwen3i_log(&c->model->logger, QWEN3_LOG_WARN,"),
]

# the same for qwen3_cuda.cu
CUDA_MUTANTS = [
    ("cuda_draws", "device: penalties without presence", "l[t] = qwen3i_penalised(l[t], c.repeat, c.presence);", "l[t] = qwen3i_penalised(l[t], c.repeat, 0);"),
    ("cuda_draws", "device: ties towards the higher id", "<< 32 | (0xFFFFFFFFu - (unsigned)id);", "<< 32 | (unsigned)id;"),
    ("cuda_draws", "device: min_p of all, not of the best", "            if (w >= least) mine += w;", "            mine += w;"),
    ("cuda_draws", "device: the last token is not penalised", "for (int i = from; i < item->n; i++) slot->lists", "for (int i = from; i + 1 < item->n; i++) slot->lists"),
    ("cuda_kernels_clusters", "device: a cluster's head is finished early", "barrier_expect(arrived, (unsigned)dim * 4);", "barrier_expect(arrived, (unsigned)dim * 2);"),
    ("cuda_kernels_clusters", "device: parts of a row joined as if their largest scores were one", "more = exp2f(top - high);", "more = 1.0f;"),
    ("cuda_kernels_clusters", "device: one row is normed by a factor of its own", "= rms_scale(block_sum(sum, shared), (float)in.k, in.eps)", "= 1.001f * rms_scale(block_sum(sum, shared), (float)in.k, in.eps)"),
    ("cuda_kernels_blocks", "device: few rows are normed by a factor of their own", "a.gain ? rms_scale(block_sum(sum, shared)", "a.gain ? 1.001f * rms_scale(block_sum(sum, shared)"),
    ("cuda_kernels_hopper", "device: parts of a product forgotten", "        lo.x += v[i].x; lo.y += v[i].y;", "        lo.x += v[i].x;"),
    ("cuda_kernels_batched", "device: tokens of a tile see the future", "rows.last[i] = tile.pos0 + (token < tile.n_tokens ? token : tile.n_tokens - 1);\n        rows.top", "rows.last[i] = tile.pos0 + tile.n_tokens - 1;\n        rows.top"),
    ("cuda_kernels_batched", "device: rows of q, k, v not scaled back", "const float s = scale ? scale[row] : 1.0f;\n    const row_angles", "const float s = 1.0f; (void)scale;\n    const row_angles"),
    ("cuda_models_f16", "device: scales of matrices forgotten", "g.to->scale = 1.0f / half_scale(qwen3i_float_from_bits(host[i % room]));", "g.to->scale = 1.0f;"),
    ("cuda_models_f16", "device: scales of the first piece for all", "qwen3i_float_from_bits(host[i % room])", "qwen3i_float_from_bits(host[0])"),
    ("cuda_kernels_fused", "device: vectors: the second row of a warp forgotten", "first + 1 < mine.end ? first + 1 : -1;", "-1;"),
    ("cuda_invariant", "device: vectors: rows after the eighth end where the first do", "    e->qkv.rows += n;\n", ""),
    ("cuda_cancel", "device: copies to the caller under way", "give_up(c);\n    cudaStreamSynchronize(c->stream);\n    return r;", "give_up(c);\n    return r;"),
]


def broken(source, text, replacement):
    if source.count(text) != 1:
        return None
    return source.replace(text, replacement)


def failed(command):
    done = subprocess.run(command, capture_output=True, text=True)
    return "does not compile: " + done.stderr.split("\n")[0] if done.returncode else None


def build(folder, cc, exe):
    return failed([cc, "-O1", "-w", "-DQWEN3_NO_SIMD", "-I", folder, os.path.join(folder, "test.c"), "-o", exe, "-lm", "-lpthread"])


def build_cuda(folder, cc, exe):
    here = ["-w", "-I", os.path.join(folder, "tests/cuda_on_cpu"), "-I", folder]
    return failed(["c++", "-std=c++17", "-O1", "-x", "c++", *here, "-c", os.path.join(folder, "tests/cuda_lab.cu"), "-o", exe + ".o"]) or \
        failed([cc, "-O1", *here, "-DQWEN3_WITH_CUDA", "-DQWEN3_TEST_CUDA_ON_CPU", os.path.join(folder, "test.c"), exe + ".o",
                "-o", exe, "-lm", "-lpthread", "-lstdc++"])


def build_and_run(build, folder, cc, tests):
    exe = os.path.join(folder, "test")
    problem = build(folder, cc, exe)
    if problem:
        return problem
    try:
        done = subprocess.run([exe, "-q", "-k", tests], cwd=ROOT, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return "caught: hangs"
    names = re.findall(r"^FAIL  (\S+)", done.stdout, re.M)
    if names:
        return f"caught by {len(names)} tests, first {names[0]}"
    return "caught: crashes" if done.returncode < 0 else "NOT CAUGHT"


def apply_all(o, name_of_file, mutants):
    source = open(os.path.join(ROOT, name_of_file), encoding="utf-8").read()
    chosen = [m for m in mutants if o.k in m[1]]
    stale = [m for m in chosen if broken(source, m[2], m[3]) is None]
    for _, name, text, _ in stale:
        print(f"FAIL  {name}: its text occurs {source.count(text)} times in {name_of_file}")
    return len(chosen) - len(stale), len(stale)


def run_all(o, name_of_file, mutants, build):
    path = os.path.join(ROOT, name_of_file)
    source = open(path, encoding="utf-8").read()
    caught = missed = 0
    with tempfile.TemporaryDirectory() as folder:       # copies: each file includes what lies beside it
        for file in ("test.c", "qwen3.h", "qwen3_cuda.cu"):
            shutil.copy(os.path.join(ROOT, file), folder)
        shutil.copytree(os.path.join(ROOT, "tests"), os.path.join(folder, "tests"))
        for tests, name, text, replacement in mutants:
            if o.k not in name:
                continue
            changed = broken(source, text, replacement)
            if changed is None:
                verdict = f"does not apply: its text occurs {source.count(text)} times in {name_of_file}"
            else:
                with open(os.path.join(folder, name_of_file), "w", encoding="utf-8") as f:
                    f.write(changed)
                verdict = build_and_run(build, folder, o.cc, tests)
            ok = verdict.startswith("caught")
            caught, missed = caught + ok, missed + (not ok)
            print(f"{'ok  ' if ok else 'FAIL'}  {name}: {verdict}", flush=True)
    return caught, missed


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-k", default="", help="part of a name")
    p.add_argument("--cc", default=os.environ.get("CC", "cc"))
    p.add_argument("--apply", action="store_true", help="only see that the text of each occurs once")
    o = p.parse_args()
    run = (lambda o, file, mutants, _: apply_all(o, file, mutants)) if o.apply else run_all
    caught, missed = run(o, "qwen3.h", MUTANTS, build)
    more, worse = run(o, "qwen3_cuda.cu", CUDA_MUTANTS, build_cuda)
    caught, missed = caught + more, missed + worse
    print(f"{caught} passed, {missed} failed")
    return missed != 0


if __name__ == "__main__":
    sys.exit(main())
