#!/usr/bin/env python3
"""Make the reference data of the tests: small random Qwen3 models, and what transformers says of them.

    pip install -r tools/requirements.txt
    python tools/make_reference.py                writes tests/data/models/* and tests/data/sampler.ref
    python tools/make_reference.py --check        makes nothing; says whether what is there still agrees

The weights are drawn here, written as a Hugging Face directory, and read back by transformers'
Qwen3ForCausalLM from that directory alone: float32 arithmetic on the stored weights, eager
attention. Nothing of qwen3.h takes part. Every seed is fixed.

Each model is a directory with the files of a checkpoint and a reference.ref. A .ref file is
little-endian and holds named arrays, one after the other:

    8 bytes    "QWEN3REF"
    then until the end of the file, for each array:
    24 bytes   name, padded with zeros
    u32        type: 1 = int32, 2 = float32, 3 = bytes
    u32        count of elements
    ...        elements, padded with zeros to a multiple of 4 bytes

Arrays of a model (P = 0, 1, ... numbers the prompts; n tokens each):

    eos              int32 [.]            ids that end a turn
    n_tokens         int32 [1]            ids with text, or n_vocab: greedy stays below it
    P.tokens         int32 [n]            the prompt
    P.logits         float32 [n, n_vocab] at every position
    P.hidden         float32 [n, n_embd]  after the final norm
    P.greedy         int32 [24]           greedy continuation, with eos ids banned
    P.margin         float32 [24]         best logit minus second best, over the largest |logit|

The model `controls` adds what wrong implementations compute for prompt 0, for the test to tell them
from the right one: wrong.norm_after_rope, wrong.norm_skipped, wrong.interleaved, wrong.gqa, each
like 0.logits. The model `chat` has a tokenizer and adds text cases: embed.* and rerank.*.
"""
import argparse
import contextlib
import json
import math
import os
import struct
import sys

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.qwen3 import modeling_qwen3

N_GREEDY = 24
NOISE = 2e-5        # the reference's own float32 error must stay below this part of the largest logit
VISIBLE = 1e-3      # each wrong implementation must differ by more: ten times the bound of the tests

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


# --------------------------------------------------------------------------------------------
# Models: shape, then what is special about each

def shape(seed, layers, hidden, ffn, heads, kv_heads, head_dim, vocab, prompts, dtype=BF16, tied=True, **special):
    return dict(seed=seed, layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_heads=kv_heads,
                head_dim=head_dim, vocab=vocab, prompts=prompts, dtype=dtype, tied=tied, special=special)


MODELS = {
    "plain":    shape(11, 3, 64, 96, 4, 2, 16, 256, [1, 7, 90]),
    "hot":      shape(12, 2, 40, 64, 4, 2, 128, 240, [1, 5, 60], head_present=True, k_norm=[96.5, 44.5], final_norm=15.0),
    "sharded":  shape(13, 2, 48, 80, 4, 1, 64, 224, [1, 33], dtype=F16, tied=False, shards=3),
    "odd":      shape(14, 3, 37, 51, 8, 1, 16, 211, [1, 3, 41], dtype=F32, tied=False, no_generation_config=True),
    "mixed":    shape(15, 2, 45, 67, 3, 3, 16, 233, [1, 26], dtype="mixed"),
    "yarn":     shape(16, 2, 48, 64, 4, 2, 64, 200, [1, 100], dtype=F16, yarn=4.0, original=4096),
    "theta":    shape(17, 2, 32, 56, 4, 1, 128, 208, [1, 200], tied=False, theta=5e6, new_config=True),
    "controls": shape(18, 2, 32, 48, 4, 2, 16, 200, [24], dtype=F32, tied=False, small_rows=True),
    # mixtures of experts: how many, how many are used, the size of one, whether weights are made to add up to 1
    "experts8":   shape(31, 2, 24, 32, 4, 2, 16, 96, [1, 40], dtype=F32, experts=(8, 2, 12, True)),
    "experts128": shape(32, 2, 16, 24, 2, 1, 16, 80, [1, 33], tied=False, experts=(128, 8, 4, True), dense=[0]),
    "experts64":  shape(33, 2, 20, 28, 2, 2, 16, 88, [1, 37], dtype=F16, experts=(64, 4, 5, False)),
    "fused":      shape(34, 3, 21, 35, 4, 1, 16, 90, [1, 29], dtype=F32, tied=False, experts=(8, 3, 9, False), fused=True, step=2),
    "fused128":   shape(35, 1, 16, 24, 2, 1, 16, 80, [1, 31], experts=(128, 8, 4, True), fused=True),
    "chat":     shape(19, 2, 48, 96, 4, 2, 32, 344, [1, 17], tied=False, tokenizer=True),
}
MAX_POSITIONS = 512


def config_of(s):
    """config.json as published checkpoints have it; new_config: as transformers 5 writes it."""
    x = s["special"]
    c = dict(architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
             eos_token_id=2, head_dim=s["head_dim"], hidden_act="silu", hidden_size=s["hidden"],
             initializer_range=0.02, intermediate_size=s["ffn"],
             max_position_embeddings=int(x.get("original", MAX_POSITIONS) * x.get("yarn", 1)),
             max_window_layers=s["layers"], model_type="qwen3", num_attention_heads=s["heads"],
             num_hidden_layers=s["layers"], num_key_value_heads=s["kv_heads"], rms_norm_eps=1e-6,
             sliding_window=None, tie_word_embeddings=s["tied"], use_cache=True,
             use_sliding_window=False, vocab_size=s["vocab"])
    theta = x.get("theta", 1e6)
    if x.get("new_config"):
        c["rope_parameters"] = dict(rope_theta=theta, rope_type="default")
        c["layer_types"] = ["full_attention"] * s["layers"]
        c["dtype"] = "bfloat16"
    else:
        c["rope_theta"] = int(theta)
        c["rope_scaling"] = None
        c["torch_dtype"] = "bfloat16"
    if "experts" in x:
        n, used, size, norm = x["experts"]
        c.update(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_experts=n, num_experts_per_tok=used,
                 moe_intermediate_size=size, norm_topk_prob=norm, mlp_only_layers=x.get("dense", []),
                 decoder_sparse_step=x.get("step", 1), router_aux_loss_coef=0.001, output_router_logits=False)
    if "yarn" in x:
        c["rope_scaling"] = dict(rope_type="yarn", factor=x["yarn"], original_max_position_embeddings=x["original"])
    return c


def round_to(a, dtype):
    return torch.from_numpy(np.ascontiguousarray(a, np.float32)).to(dtype)


def weights_of(s):
    """Branches of about the size of the residual and attention scores of a few units, so that every part shows."""
    rng, x = np.random.default_rng(s["seed"]), s["special"]
    hidden, ffn, vocab = s["hidden"], s["ffn"], s["vocab"]
    q_dim, kv_dim = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    mixed = s["dtype"] == "mixed"
    matrix_types = [BF16, F16, F32] if mixed else [s["dtype"]]
    w = {}

    def matrix(name, rows, cols, gain=1.0):
        a = rng.standard_normal((rows, cols)) * gain / math.sqrt(cols)
        w[name] = round_to(a, matrix_types[len(w) % len(matrix_types)])
        return a

    def gain(name, n, mean=1.0, spread=0.25, top=None):
        a = mean + spread * rng.standard_normal(n)
        if top is not None:
            a[(n * 3) // 4 + 1] = top           # a slow rotation, as in the trained models
        w[name] = round_to(a, F32 if mixed else s["dtype"])

    def experts(p):
        n, _, size, _ = x["experts"]
        matrix(p + "gate.weight", n, hidden, 2.0)
        for e in range(n):
            q = f"{p}experts.{e}."
            matrix(q + "gate_proj.weight", size, hidden, 1.5)
            matrix(q + "up_proj.weight", size, hidden, 1.5)
            matrix(q + "down_proj.weight", hidden, size, 2.0)
        if not x.get("fused"):
            return
        take = lambda part: [w.pop(f"{p}experts.{e}.{part}_proj.weight") for e in range(n)]
        gate, up, down = take("gate"), take("up"), take("down")
        w[p + "experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(gate, up)])
        w[p + "experts.down_proj"] = torch.stack(down)

    matrix("model.embed_tokens.weight", vocab, hidden, 2.0)
    if x.get("small_rows"):                     # rows whose mean square is near eps: a wrong eps shows
        a = w["model.embed_tokens.weight"]
        a[::3] *= 1.5e-3
    for l in range(s["layers"]):
        p = f"model.layers.{l}."
        hot = x.get("k_norm", [])
        gain(p + "input_layernorm.weight", hidden)
        matrix(p + "self_attn.q_proj.weight", q_dim, hidden)
        matrix(p + "self_attn.k_proj.weight", kv_dim, hidden)
        matrix(p + "self_attn.v_proj.weight", kv_dim, hidden)
        matrix(p + "self_attn.o_proj.weight", hidden, q_dim)
        gain(p + "self_attn.q_norm.weight", s["head_dim"], 1.3, 0.4)
        gain(p + "self_attn.k_norm.weight", s["head_dim"], 1.3, 0.4, hot[l] if l < len(hot) else None)
        gain(p + "post_attention_layernorm.weight", hidden)
        if "experts" in x and l not in x.get("dense", []) and (l + 1) % x.get("step", 1) == 0:
            experts(p + "mlp.")
            continue
        matrix(p + "mlp.gate_proj.weight", ffn, hidden, 1.5)
        matrix(p + "mlp.up_proj.weight", ffn, hidden, 1.5)
        matrix(p + "mlp.down_proj.weight", hidden, ffn)
    gain("model.norm.weight", hidden, 1.5, 0.4, x.get("final_norm"))
    if not s["tied"]:
        matrix("lm_head.weight", vocab, hidden, 2.0)
    elif x.get("head_present"):
        w["lm_head.weight"] = w["model.embed_tokens.weight"].clone()
    return w


def write_json(path, value):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, ensure_ascii=False)
        f.write("\n")


def write_weights(folder, w, shards):
    if shards == 1:
        save_file(w, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        return
    names, files = list(w), {}
    for i in range(shards):
        part = names[i::shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: w[n] for n in part}, os.path.join(folder, file), metadata={"format": "pt"})
        files.update({n: file for n in part})
    size = sum(t.numel() * t.element_size() for t in w.values())
    write_json(os.path.join(folder, "model.safetensors.index.json"),
               dict(metadata=dict(total_size=size), weight_map=dict(sorted(files.items()))))


# --------------------------------------------------------------------------------------------
# A tokenizer of the form that Qwen3 checkpoints ship, with few merges

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
           "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
           "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
         "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
PRETOKEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CORPUS = ["yes no yes no yes no\nyes\nno"] * 50 + [
    "The capital of France is Paris. What is the capital of France?", "user system assistant",
    "the quick brown fox jumps over the lazy dog and then the other", "  spaces   and\n\nlines\n"] * 20
N_BPE = 310         # 256 bytes and the merges; then the added tokens; rows after those have no text


def write_tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    t = Tokenizer(models.BPE())
    t.normalizer = normalizers.NFC()
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(PRETOKEN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=N_BPE, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    model = json.loads(t.to_str())["model"]
    assert len(model["vocab"]) == N_BPE and "yes" in model["vocab"] and "no" in model["vocab"]
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    added = [dict(id=N_BPE + i, content=c, single_word=False, lstrip=False, rstrip=False, normalized=False,
                  special=c in SPECIAL) for i, c in enumerate(SPECIAL + PLAIN)]
    write_json(os.path.join(folder, "tokenizer.json"), dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=dict(type="NFC"),
        pre_tokenizer=dict(type="Sequence", pretokenizers=[
            dict(type="Split", pattern=dict(Regex=PRETOKEN), behavior="Isolated", invert=False), byte_level]),
        post_processor=byte_level, decoder=byte_level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="", end_of_word_suffix="",
                   fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab=model["vocab"],
                   merges=[list(m) if isinstance(m, (list, tuple)) else m.split(" ") for m in model["merges"]])))
    return N_BPE + len(added), {c: N_BPE + i for i, c in enumerate(SPECIAL + PLAIN)}


# --------------------------------------------------------------------------------------------
# Reference computation

def load_model(folder, dtype=F32):
    m = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager")
    return m.eval()


@torch.no_grad()
def forward(model, tokens):
    """logits [n, vocab] and final hidden states [n, hidden], in the model's arithmetic."""
    ids = torch.tensor([tokens])
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden)[0].numpy(), hidden[0].numpy()


def greedy(model, tokens, banned):
    out, margins = [], []
    for _ in range(N_GREEDY):
        row = forward(model, tokens + out)[0][-1].astype(np.float64)
        allowed = row.copy()
        allowed[banned] = -np.inf
        first, second = np.argsort(-allowed, kind="stable")[:2]
        out.append(int(first))
        margins.append((allowed[first] - allowed[second]) / np.abs(row).max())
    return out, margins


def relative_error(a, b):
    """The largest difference in a row over the largest value of that row in b; the worst row."""
    return float((np.abs(a - b).max(-1) / np.abs(b).max(-1)).max())


def rope_interleaved(q, k, cos, sin, unsqueeze_dim=1):
    half = cos.shape[-1] // 2
    c, s = cos[..., :half].unsqueeze(unsqueeze_dim), sin[..., :half].unsqueeze(unsqueeze_dim)

    def turn(x):
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    return turn(q), turn(k)


def attention_norm_after_rope(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
    shape = (*hidden_states.shape[:-1], -1, self.head_dim)
    q = self.q_proj(hidden_states).view(shape).transpose(1, 2)
    k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
    v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
    q, k = modeling_qwen3.apply_rotary_pos_emb(q, k, *position_embeddings)
    a, _ = modeling_qwen3.eager_attention_forward(self, self.q_norm(q), self.k_norm(k), v, attention_mask, self.scaling)
    return self.o_proj(a.reshape(*hidden_states.shape[:-1], -1)), None


@contextlib.contextmanager
def patched(target, name, value):
    old = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, old)


def wrong_logits(model, config, tokens):
    """What each classic mistake computes, by name. The model's own code, with one thing replaced."""
    q = modeling_qwen3
    with patched(q, "apply_rotary_pos_emb", rope_interleaved):
        yield "interleaved", forward(model, tokens)[0]
    with patched(q.Qwen3Attention, "forward", attention_norm_after_rope):
        yield "norm_after_rope", forward(model, tokens)[0]
    with patched(q.Qwen3RMSNorm, "forward", lambda self, x, old=q.Qwen3RMSNorm.forward:
                 x if self.weight.numel() == config["head_dim"] else old(self, x)):
        yield "norm_skipped", forward(model, tokens)[0]
    if config["num_key_value_heads"] not in (1, config["num_attention_heads"]):
        with patched(q, "repeat_kv", lambda x, n: x.repeat(1, n, 1, 1)):
            yield "gqa", forward(model, tokens)[0]


def wrong_configs(folder, config, tokens):
    """The mistakes that a changed config.json makes; the C test makes the same change."""
    for name, change in (("eps", dict(rms_norm_eps=1e-5)), ("theta", dict(rope_theta=10000, rope_parameters=None))):
        c = transformers.Qwen3Config(**{**config, **change})
        m = transformers.Qwen3ForCausalLM.from_pretrained(folder, config=c, dtype=F32, attn_implementation="eager")
        yield name, forward(m.eval(), tokens)[0]


RERANK_SYSTEM = ("Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
                 'Note that the answer can only be "yes" or "no".')
RERANK_TASK = "Given a web search query, retrieve relevant passages that answer the query"


def text_cases(folder, model, ids, arrays):
    """Embedding and reranking as the model cards of Qwen3-Embedding and Qwen3-Reranker do it."""
    tok = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))

    def encode(text):
        return tok.encode(text, add_special_tokens=False).ids

    def embed(text):
        h = forward(model, encode(text) + [ids["<|endoftext|>"]])[1][-1].astype(np.float64)
        return h / np.linalg.norm(h)

    text, task = "The capital of France is Paris.", "Find the city"
    arrays["embed.text"], arrays["embed.task"] = text, task
    arrays["embed.plain"] = embed(text)
    arrays["embed.query"] = embed(f"Instruct: {task}\nQuery:{text}")
    for i, (query, document) in enumerate([("What is the capital of France?", text), ("fox", "lazy dog"), ("", "")]):
        prompt = (f"<|im_start|>system\n{RERANK_SYSTEM}<|im_end|>\n<|im_start|>user\n<Instruct>: {RERANK_TASK}\n"
                  f"<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
        row = forward(model, encode(prompt))[0][-1].astype(np.float64)
        yes, no = row[tok.token_to_id("yes")], row[tok.token_to_id("no")]
        arrays[f"rerank.{i}.query"], arrays[f"rerank.{i}.document"] = query, document
        arrays[f"rerank.{i}.score"] = np.array([1 / (1 + math.exp(no - yes))])


def invite_end(w, folder, s, ids):
    """Tilt the head so that a reply ends after some tokens, and so that rows without text look best."""
    model = load_model(folder)
    rng = np.random.default_rng(s["seed"] + 1000)
    hidden = forward(model, rng.integers(0, 256, 200).tolist())[1]
    mean = torch.from_numpy(hidden.mean(0))
    push = mean / mean.dot(mean)
    head = w["lm_head.weight"].float()
    head[ids["<|im_end|>"]] += 2.0 * push
    padding = head[N_BPE + len(ids):]           # pairs of opposite long rows: one of each pair has a large logit
    padding[::2] *= 6.0
    padding[1::2] = -padding[::2]
    w["lm_head.weight"] = head.to(s["dtype"])


# --------------------------------------------------------------------------------------------
# Files

def write_ref(path, arrays):
    with open(path, "wb") as f:
        f.write(b"QWEN3REF")
        for name, value in arrays.items():
            if isinstance(value, str):
                kind, count, data = 3, len(value.encode()), value.encode()
            else:
                a = np.asarray(value)
                kind = 2 if a.dtype.kind == "f" else 1
                count, data = a.size, a.astype("<f4" if kind == 2 else "<i4").tobytes()
            assert len(name) < 24, name
            f.write(struct.pack("<24sII", name.encode(), kind, count) + data + b"\0" * (-len(data) % 4))


def read_ref(path):
    data, at, arrays = open(path, "rb").read(), 8, {}
    while at < len(data):
        name, kind, count = struct.unpack_from("<24sII", data, at)
        at += 32
        size = count if kind == 3 else 4 * count
        raw = data[at:at + size]
        arrays[name.rstrip(b"\0").decode()] = raw.decode() if kind == 3 else np.frombuffer(raw, "<i4" if kind == 1 else "<f4")
        at += size + (-size % 4)
    return arrays


def build(folder, s):
    """Write the checkpoint."""
    os.makedirs(folder, exist_ok=True)
    config, w, x = config_of(s), weights_of(s), s["special"]
    ids, eos = {}, [2, 0]
    if x.get("tokenizer"):
        _, ids = write_tokenizer(folder)
        eos = [ids["<|im_end|>"], ids["<|endoftext|>"]]
        config.update(bos_token_id=eos[1], eos_token_id=eos[0])
    write_json(os.path.join(folder, "config.json"), config)
    if not x.get("no_generation_config"):
        write_json(os.path.join(folder, "generation_config.json"),
                   dict(bos_token_id=eos[1], do_sample=True, eos_token_id=eos, pad_token_id=eos[1],
                        temperature=0.6, top_k=20, top_p=0.95, transformers_version="4.51.0"))
    write_weights(folder, w, x.get("shards", 1))
    if ids:
        invite_end(w, folder, s, ids)
        write_weights(folder, w, 1)


def reference(name, folder, s):
    """What transformers computes from the checkpoint, as named arrays."""
    config = json.load(open(os.path.join(folder, "config.json"), encoding="utf-8"))
    model, exact = load_model(folder), load_model(folder, torch.float64)
    ids, arrays = {}, {}
    n_tokens, eos = s["vocab"], [2] if s["special"].get("no_generation_config") else [2, 0]
    if s["special"].get("tokenizer"):
        added = json.load(open(os.path.join(folder, "tokenizer.json"), encoding="utf-8"))["added_tokens"]
        ids = {a["content"]: a["id"] for a in added}
        n_tokens, eos = N_BPE + len(ids), [ids["<|im_end|>"], ids["<|endoftext|>"]]
    arrays["eos"], arrays["n_tokens"] = np.array(eos), np.array([n_tokens])
    rng, noise, margin, peak = np.random.default_rng(s["seed"] + 100), 0.0, 1.0, 0.0
    for i, n in enumerate(s["prompts"]):
        tokens = rng.integers(0, n_tokens, n).tolist()
        logits, hidden = forward(model, tokens)
        noise = max(noise, relative_error(logits, forward(exact, tokens)[0]))
        out, margins = greedy(model, tokens, eos + list(range(n_tokens, s["vocab"])))
        margin, peak = min(margin, *margins), max(peak, float(np.abs(logits).max()))
        arrays.update({f"{i}.tokens": np.array(tokens), f"{i}.logits": logits, f"{i}.hidden": hidden,
                       f"{i}.greedy": np.array(out), f"{i}.margin": np.array(margins)})
    line = f"{name:9} noise {noise:.1e}  margin {margin:.1e}  max |logit| {peak:5.1f}  distinct {len(set(out)):2}"
    assert noise < NOISE, f"{name}: the reference itself is off by {noise:.1e}"
    if name == "controls":
        tokens, right = arrays["0.tokens"].tolist(), arrays["0.logits"]
        for mistake, wrong in wrong_logits(model, config, tokens):
            arrays[f"wrong.{mistake}"] = wrong
            line += check_visible(mistake, wrong, right)
        for mistake, wrong in wrong_configs(folder, config, tokens):
            line += check_visible(mistake, wrong, right)
    if ids:
        text_cases(folder, model, ids, arrays)
    print(line, flush=True)
    return arrays


def check_visible(mistake, wrong, right):
    by = relative_error(wrong, right)
    assert by > VISIBLE, f"{mistake} would pass: differs by {by:.1e}"
    return f"\n          {mistake} differs by {by:.1e}"


# --------------------------------------------------------------------------------------------
# Sampler: the distribution that the documented order of steps gives, in float64

def sampler_case(rng, n, history=(), bias=(), scale=3.0, **p):
    logits = (rng.standard_normal(n) * scale).astype(np.float32)
    x = logits.astype(np.float64)
    for token, b in bias:
        x[token] += b
    last = p.get("penalty_last_n", 0)
    window = history if last == -1 else history[-(last or 256):]
    for t in sorted(set(window)):
        r = p.get("repeat_penalty", 0) or 1.0
        x[t] = x[t] / r if x[t] > 0 else x[t] * r
        x[t] -= p.get("presence_penalty", 0.0)
    x /= p["temperature"]
    order = np.lexsort((np.arange(n), -x))
    keep = order[:p.get("top_k") or n]
    prob = np.exp(x[keep] - x[keep[0]])
    prob /= prob.sum()
    if 0 < p.get("top_p", 0) < 1:
        n_keep = int(np.searchsorted(np.cumsum(prob), p["top_p"])) + 1
        keep, prob = keep[:n_keep], prob[:n_keep]
    if p.get("min_p"):
        above = prob >= p["min_p"] * prob[0]
        keep, prob = keep[above], prob[above]
    full = np.zeros(n)
    full[keep] = prob / prob.sum()
    names = ("temperature", "top_p", "min_p", "top_k", "repeat_penalty", "presence_penalty", "penalty_last_n")
    return dict(logits=logits, params=np.array([p.get(k, 0) for k in names], np.float64), probs=full,
                history=np.array(history, np.int64), bias_ids=np.array([b[0] for b in bias], np.int64),
                bias=np.array([b[1] for b in bias], np.float64))


def sampler_cases():
    rng = np.random.default_rng(77)
    history = rng.integers(0, 40, 30).tolist()
    cases = [
        sampler_case(rng, 40, temperature=1.0),
        sampler_case(rng, 40, temperature=0.7, top_k=7),
        sampler_case(rng, 40, temperature=1.5, top_p=0.8),
        sampler_case(rng, 40, temperature=1.0, min_p=0.1),
        sampler_case(rng, 40, temperature=0.6, top_k=20, top_p=0.95),
        sampler_case(rng, 40, temperature=2.0, top_k=15, top_p=0.9, min_p=0.05),
        sampler_case(rng, 40, temperature=1.2, repeat_penalty=1.3, history=history),
        sampler_case(rng, 40, temperature=1.2, presence_penalty=1.5, history=history, penalty_last_n=8),
        sampler_case(rng, 40, temperature=1.0, repeat_penalty=1.5, presence_penalty=1.0, history=history,
                     penalty_last_n=-1, bias=[(3, 2.0), (5, -1e30), (7, 1.0)], top_k=12, top_p=0.9),
        sampler_case(rng, 3000, temperature=1.0, scale=1.0, top_p=0.5),
        sampler_case(rng, 3000, temperature=0.9, scale=2.0, top_k=50, top_p=0.95),
    ]
    return {f"{i}.{k}": v for i, c in enumerate(cases) for k, v in c.items()}


def main():
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "tests", "data")
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default=os.path.normpath(root))
    p.add_argument("--check", action="store_true", help="compute again from the checkpoints there, and compare")
    p.add_argument("--only", help="one model")
    o = p.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bad = 0
    for name, s in MODELS.items():
        if o.only and name != o.only:
            continue
        folder = os.path.join(o.out, "models", name)
        if not o.check:
            build(folder, s)
        arrays, path = reference(name, folder, s), os.path.join(folder, "reference.ref")
        if not o.check:
            write_ref(path, arrays)
            continue
        for key, old in read_ref(path).items():
            value = arrays[key]
            same = value == old if isinstance(value, str) else np.allclose(
                np.ravel(value), old, rtol=0, atol=1e-5 * max(1.0, float(np.abs(old).max(initial=0))))
            if not same:
                bad = 1
                print(f"{name}: {key} differs")
    if not o.check and not o.only:
        write_ref(os.path.join(o.out, "sampler.ref"), sampler_cases())
    return bad


if __name__ == "__main__":
    sys.exit(main())
