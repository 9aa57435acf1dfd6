#!/usr/bin/env python3
"""Break the library on purpose, one change at a time, and demand that the tests notice.

    python tests/mutants.py              all of them: some minutes
    python tests/mutants.py -k rope      those whose name contains "rope"

A test that passes when the mistake is in is not a test. Each mutant is a text in qwen3.h that must
occur exactly once, and what to put there instead. The last line says how many were caught.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# tests that must notice, name, text, replacement
MUTANTS = [
    # the classic mistakes with this model
    ("parity", "norm after rope", r"""        qwen3i_rmsnorm_heads(c->exec.simd, k, w->k_norm, g->n_head_kv, g->head_dim, g->rms_eps);
        qwen3i_rope(q, cosines, sines, g->n_head, g->head_dim);
        qwen3i_rope(k, cosines, sines, g->n_head_kv, g->head_dim);
""", r"""        qwen3i_rope(q, cosines, sines, g->n_head, g->head_dim);
        qwen3i_rope(k, cosines, sines, g->n_head_kv, g->head_dim);
        qwen3i_rmsnorm_heads(c->exec.simd, k, w->k_norm, g->n_head_kv, g->head_dim, g->rms_eps);
"""),
    ("parity", "norm of q skipped", "        qwen3i_rmsnorm_heads(c->exec.simd, q, w->q_norm, g->n_head, g->head_dim, g->rms_eps);\n", ""),
    ("parity", "norm of k skipped", "        qwen3i_rmsnorm_heads(c->exec.simd, k, w->k_norm, g->n_head_kv, g->head_dim, g->rms_eps);\n", ""),
    ("parity", "interleaved rope", """            float a = x[j], b = x[j + half];
            x[j]        = a * cosines[j] - b * sines[j];
            x[j + half] = b * cosines[j] + a * sines[j];
""", """            float a = x[2 * j], b = x[2 * j + 1];
            x[2 * j]     = a * cosines[j] - b * sines[j];
            x[2 * j + 1] = b * cosines[j] + a * sines[j];
"""),
    ("parity", "eps 1e-5", "k->rms_eps = (float)c->eps;", "k->rms_eps = 1e-5f;"),
    ("parity", "theta 1e4", "k->rope_theta = c->theta;", "k->rope_theta = 1e4;"),
    ("parity", "heads share the wrong KV head", "+ (size_t)(h / (a->n_head / a->n_head_kv));", "+ (size_t)(h % a->n_head_kv);"),
    ("parity", "attention scale", "(float)(1.0 / sqrt((double)a->head_dim))", "(float)(1.0 / a->head_dim)"),
    ("parity", "tokens see the future", "first + i / n_h + 1, (float)", "first + i / n_h + 2, (float)"),
    ("parity", "yarn without its attention factor", "return factor > 1 ? (float)(0.1 * log(factor) + 1) : 1.0f;", "return 1.0f;"),
    ("parity", "tied head ignored", "if (r == QWEN3_OK && !c->tied) r = qwen3i_bind(b, \"lm_head.weight\"", "if (r == QWEN3_OK && c->tied) r = qwen3i_bind(b, \"lm_head.weight\""),
    # sequences
    ("identical", "neighbours mixed up", "a->seqs[t + n_t] == a->seqs[t]; n_t++", "1; n_t++"),
    ("identical", "prefix not compared", "common < s->len && s->tokens[common] == tokens[common]", "common < s->len"),
    ("identical", "logits kept after truncating", "if (len < c->seqs[seq].len) c->seqs[seq].fresh = 0;", ""),
    ("identical", "copy forgets the last position", "memcpy(c->v + to, c->v + from, (size_t)n_pos *", "memcpy(c->v + to, c->v + from, (size_t)(n_pos - 1) *"),
    ("state", "restored logits that were not saved", "s->fresh = h.n_tokens > 0 && h.has_logits;", "s->fresh = h.n_tokens > 0;"),
    ("state", "checksum not checked", "if (h->checksum != qwen3i_hash(", "if (0 && h->checksum != qwen3i_hash("),
    ("fault", "logits of a cancelled step kept", "{ qwen3i_forget_logits(c, &b); return r; }", "{ (void)qwen3i_forget_logits; return r; }"),
    ("fault", "random state of a cancelled step kept", "if (next[i].sampler) next[i].sampler->rng = c->rngs[i];", "{ }"),
    # sampling and text
    ("sampler", "padding rows chosen", "return m->info.n_tokens ? m->info.n_tokens : m->config.n_vocab; }", "return m->config.n_vocab; }"),
    ("sampler", "ties towards the higher id", "(!(a.logit < b.logit) && a.id < b.id)", "(!(a.logit < b.logit) && a.id > b.id)"),
    ("sampler", "top_p one token short", "while (kept < n && sum < need);\n    memmove", "while (kept < n && sum * 2 < need);\n    memmove"),
    ("sampler", "penalty once for each occurrence", "        mark[seq[i]].id = 1;\n", ""),
    ("api_", "stop strings not held back", "else *held = qwen3i_max(*held, s->n - i);", "else *held = 0;"),
    ("api_", "half characters delivered", "ready = qwen3i_utf8_complete(s->pending, s->n_pending - held);", "ready = s->n_pending - held;"),
    # memory
    ("fault", "a leak when embedding", "    qwen3i_free(&c->desc.allocator, joined, size);\n    if (n < 0) return qwen3i_fail(&err", "    if (n < 0) return qwen3i_fail(&err"),
]


def broken(source, text, replacement):
    if source.count(text) != 1:
        return None
    return source.replace(text, replacement)


def build_and_run(folder, cc, tests):
    exe = os.path.join(folder, "test")
    build = [cc, "-O1", "-w", "-DQWEN3_NO_SIMD", "-I", folder, "-I", ROOT, os.path.join(folder, "test.c"), "-o", exe, "-lm", "-lpthread"]
    done = subprocess.run(build, capture_output=True, text=True)
    if done.returncode:
        return "does not compile: " + done.stderr.split("\n")[0]
    try:
        done = subprocess.run([exe, "-q", "-k", tests], cwd=ROOT, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return "caught: hangs"
    failed = re.findall(r"^FAIL  (\S+)", done.stdout, re.M)
    if failed:
        return f"caught by {len(failed)} tests, first {failed[0]}"
    return "caught: crashes" if done.returncode < 0 else "NOT CAUGHT"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-k", default="", help="part of a name")
    p.add_argument("--cc", default=os.environ.get("CC", "cc"))
    o = p.parse_args()
    source = open(os.path.join(ROOT, "qwen3.h"), encoding="utf-8").read()
    caught = missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for file in ("test.c", "tests"):
            os.symlink(os.path.join(ROOT, file), os.path.join(folder, file))
        os.remove(os.path.join(folder, "test.c"))       # a copy: it includes the qwen3.h beside it
        with open(os.path.join(folder, "test.c"), "w") as f:
            f.write(open(os.path.join(ROOT, "test.c")).read())
        for tests, name, text, replacement in MUTANTS:
            if o.k not in name:
                continue
            changed = broken(source, text, replacement)
            if changed is None:
                verdict = f"does not apply: its text occurs {source.count(text)} times in qwen3.h"
            else:
                with open(os.path.join(folder, "qwen3.h"), "w", encoding="utf-8") as f:
                    f.write(changed)
                verdict = build_and_run(folder, o.cc, tests)
            ok = verdict.startswith("caught")
            caught, missed = caught + ok, missed + (not ok)
            print(f"{'ok  ' if ok else 'FAIL'}  {name}: {verdict}", flush=True)
    print(f"{caught} passed, {missed} failed")
    return missed != 0


if __name__ == "__main__":
    sys.exit(main())
