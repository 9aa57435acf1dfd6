#!/usr/bin/env python3
"""Our speed beside transformers on the same GPU, in one run: prefill (eager) and decoding of one sequence
(torch.compile with a static cache, and eager), with random weights of the real shapes; and the products of a prefill's
layers alone, in cuBLASLt, back to back: what a prefill could reach if all else took no time.

usage: compare_speed.py [--bench ./bench] [--sizes 0.6B,4B,8B] [--prefill 2048] [--context 512] [--tokens 64]
                        [--repeat 3] [--kinds prefill,products,compiled,eager] [--device cuda|cpu] [--json]

Ours and theirs take turns; the medians' ratios go to a table in Markdown. --device cpu with --sizes tiny is a dry run.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.cache_utils import StaticCache

SHAPES = {  # layers, hidden, ffn, heads, KV heads, tied
    'tiny': (2, 64, 128, 4, 2, True), '0.6B': (28, 1024, 3072, 16, 8, True), '1.7B': (28, 2048, 6144, 16, 8, True),
    '4B': (36, 2560, 9728, 32, 8, True), '8B': (36, 4096, 12288, 32, 8, False)}
NAMES = {'prefill': 'prefill', 'products': 'prefill, products alone', 'compiled': 'decode, compiled', 'eager': 'decode, eager'}


def make_model(size, device):
    layers, hidden, ffn, heads, kv_heads, tied = SHAPES[size]
    tiny = size == 'tiny'
    config = Qwen3Config(num_hidden_layers=layers, hidden_size=hidden, intermediate_size=ffn, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, head_dim=32 if tiny else 128, vocab_size=500 if tiny else 151936,
                         max_position_embeddings=40960, rms_norm_eps=1e-6, tie_word_embeddings=tied)
    config.rope_parameters = {'rope_type': 'default', 'rope_theta': 1e6}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def wait(device):
    if device == 'cuda':
        torch.cuda.synchronize()


def seconds(device, work):
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def prefill(model, options):
    tokens = torch.randint(0, model.config.vocab_size, (1, options.prefill), device=options.device)
    return lambda: model(tokens, use_cache=True, logits_to_keep=1)


def products(model, options):
    """The four products of each layer in F16, as ours are, and as one matrix each where they share their input."""
    def joined(*layers):
        return torch.cat([layer.weight for layer in layers]).half()
    matrices = []
    for layer in model.model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        matrices += [joined(attn.q_proj, attn.k_proj, attn.v_proj), joined(attn.o_proj),
                     joined(mlp.gate_proj, mlp.up_proj), joined(mlp.down_proj)]
    inputs = {m.shape[1]: torch.randn(options.prefill, m.shape[1], device=options.device, dtype=m.dtype) for m in matrices}

    def work():
        for m in matrices:
            inputs[m.shape[1]] @ m.T
    return work


class Decoder:
    """Greedy decoding into a static cache; the token stays on the device."""

    def __init__(self, model, options, compiled):
        self.model, self.options = model, options
        self.cache = StaticCache(config=model.config, max_cache_len=options.context + options.tokens + 8)
        self.step = torch.compile(self.one, mode='reduce-overhead', fullgraph=True) if compiled else self.one
        self.prompt = torch.randint(0, model.config.vocab_size, (1, options.context), device=options.device)
        self.token = self.prompt[:, :1].clone()

    def one(self, token, position):
        logits = self.model(token, past_key_values=self.cache, cache_position=position, position_ids=position[None],
                            use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)

    def start(self):
        self.cache.reset()
        self.model(self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1,
                   cache_position=torch.arange(self.options.context, device=self.options.device))
        self.position = torch.tensor([self.options.context], device=self.options.device)

    def run(self):
        for _ in range(self.options.tokens):
            self.token.copy_(self.step(self.token, self.position))
            self.position += 1


def theirs(kind, model, options):
    """A function that measures tokens a second once."""
    if kind in ('prefill', 'products'):
        work = prefill(model, options) if kind == 'prefill' else products(model, options)
        work()
        return lambda: options.prefill / seconds(options.device, work)
    decoder = Decoder(model, options, kind == 'compiled')
    for _ in range(3):                  # compiles, captures
        decoder.start()
        decoder.run()

    def measure():
        decoder.start()
        return options.tokens / seconds(options.device, decoder.run)
    return measure


def ours(size, options):
    """Tokens a second of one run of bench, the medians of its repeats: of prefill and decode."""
    if size == 'tiny':
        return {'prefill': float('nan'), 'decode': float('nan')}        # bench has no such shape
    tests = f'pp{options.prefill},tg{options.tokens}@{options.context}'
    command = [options.bench, '--random', size, '--tests', tests, '--json', '--repeat', str(options.repeat)]
    command.append('--cuda' if options.device == 'cuda' else '--cpu')
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    prefill, decode = (json.loads(line)['tokens_per_s'] for line in out.splitlines() if '"test"' in line)
    return {'prefill': prefill, 'decode': decode}


def compare(size, options):
    """For each kind: our and their medians and their spread."""
    before = ours(size, options)
    rows = []
    with torch.inference_mode():
        model = make_model(size, options.device)
        for kind in options.kinds.split(','):
            measure = theirs(kind, model, options)
            values = [measure() for _ in range(options.repeat)]
            # a size takes minutes, and its lines come last
            print(f'{size} {NAMES[kind]}: {statistics.median(values):,.0f}', file=sys.stderr, flush=True)
            rows.append({'size': size, 'kind': kind, 'theirs': statistics.median(values), 'min': min(values),
                         'max': max(values)})
    del model
    if options.device == 'cuda':
        torch.cuda.empty_cache()
    after = ours(size, options)         # the chip's state may have changed meanwhile
    for row in rows:
        kind = 'prefill' if row['kind'] in ('prefill', 'products') else 'decode'
        row.update(ours=(before[kind] + after[kind]) / 2, ours_before=before[kind], ours_after=after[kind])
        row['ratio'] = row['ours'] / row['theirs']
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--bench', default='./bench')
    parser.add_argument('--sizes', default='0.6B,4B,8B')
    parser.add_argument('--prefill', type=int, default=2048)
    parser.add_argument('--context', type=int, default=512)
    parser.add_argument('--tokens', type=int, default=64)
    parser.add_argument('--repeat', type=int, default=3)
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'])
    parser.add_argument('--kinds', default=','.join(NAMES))
    parser.add_argument('--json', action='store_true')
    options = parser.parse_args()
    if not set(options.kinds.split(',')) <= set(NAMES):
        sys.exit(f'compare_speed: kinds are {", ".join(NAMES)}, not {options.kinds}')
    device = torch.cuda.get_device_name() if options.device == 'cuda' else 'CPU'
    import transformers
    if options.device == 'cuda':
        torch.backends.cuda.preferred_blas_library('cublaslt')
    if not options.json:
        print(f'{device}, torch {torch.__version__}, transformers {transformers.__version__}; BF16, prefill of '
              f'{options.prefill}, decode of {options.tokens} after {options.context}\n')
        print('| | ours, before and after | transformers or cuBLASLt (spread) | ratio |\n|---|---|---|---|')
    for size in options.sizes.split(','):
        if size not in SHAPES:
            sys.exit(f'compare_speed: sizes are {", ".join(SHAPES)}, not {size}')
        for row in compare(size, options):
            if options.json:
                print(json.dumps(row), flush=True)
            else:
                print(f"| {size} {NAMES[row['kind']]} | {row['ours_before']:,.0f}, {row['ours_after']:,.0f} | "
                      f"{row['theirs']:,.0f} ({row['min']:,.0f} to {row['max']:,.0f}) | {row['ratio']:.2f} |",
                      flush=True)


if __name__ == '__main__':
    main()
