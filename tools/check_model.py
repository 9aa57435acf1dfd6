#!/usr/bin/env python3
"""Compare a whole model's logits, and what it generates, with transformers' in float32.

    cc -O3 -I. tools/logits.c -o logits -lm -lpthread                   the program
    python tools/check_model.py MODEL_DIR                               on the CPU
    python tools/check_model.py MODEL_DIR --args=--cuda --device cuda --tokens 64 --generate 200 \\
        --rounded "--kv f16 --step 64" --exact "--kv f32 --step 1" --float32 "--kv f32"
                                                                        on a GPU (-DQWEN3_WITH_CUDA and its libraries)

Random token ids (fixed seed), and what the program generates after them, go through both. Each of --exact, --rounded and
--float32 (all may be repeated) is one more run of the program, with its arguments:

--exact    everything is float32 but the weights, which are what they are: max |difference| <= 2e-4 max |logit|
--float32  the same with the weights stored as float32, in a copy of the model
--rounded  something is rounded to 16 bits on the way: mean KL divergence <= 1e-5, or, if rounding K and V to F16 within
           transformers does more than that by itself, four times what it does (errors twice as large); and the same first
           choice at 99.9 % of the positions, not counting near ties: two logits that are no further apart than that
           rounding moves the logits of the position. The line says which of the two bounds was needed.

What is generated must be transformers' first choice, too, but for near ties. The exit status is 1 if anything is not so.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3 import modeling_qwen3

EXACT, MEAN_KL, SAME = 2e-4, 1e-5, 0.999


# ---- the program -----------------------------------------------------------------------------------------------

def ours(args, model, tokens, directory, more):
    """Logits [n, n_vocab], and the tokens with what was generated after them."""
    source, target = os.path.join(directory, 'tokens'), os.path.join(directory, 'logits')
    tokens.astype('<i4').tofile(source)
    subprocess.run([args.program, model, source, target, *args.args.split(), *more.split()], check=True)
    logits = np.fromfile(target, '<f4')
    os.remove(target)
    return logits.reshape(len(tokens), -1), np.fromfile(source, '<i4')


def safetensors(directory):
    return sorted(name for name in os.listdir(directory) if name.endswith('.safetensors'))


def read_header(file):
    return json.loads(file.read(int.from_bytes(file.read(8), 'little')))


def float32_copy(source, target):
    """The same model with its weights stored as float32."""
    for name in os.listdir(source):
        if name in safetensors(source):
            with open(os.path.join(source, name), 'rb') as old, open(os.path.join(target, name), 'wb') as new:
                widen(old, new)
        elif name.endswith('.json'):
            shutil.copy(os.path.join(source, name), target)


def widen(old, new):
    header, at = read_header(old), 0
    start = old.tell()
    header.pop('__metadata__', None)
    tensors = sorted(header.items(), key=lambda item: item[1]['data_offsets'])
    wide = {}
    for name, tensor in tensors:
        n = 4 * int(np.prod(tensor['shape']))
        wide[name] = {'dtype': 'F32', 'shape': tensor['shape'], 'data_offsets': [at, at + n]}
        at += n
    text = json.dumps(wide).encode()
    text += b' ' * (-len(text) % 8)
    new.write(len(text).to_bytes(8, 'little') + text)
    kinds = {'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16}
    for _, tensor in tensors:
        first, last = tensor['data_offsets']
        old.seek(start + first)
        torch.frombuffer(bytearray(old.read(last - first)), dtype=kinds[tensor['dtype']]).float().numpy().tofile(new)


# ---- transformers ----------------------------------------------------------------------------------------------

def load_reference(directory, device):
    """In float32. Weights that are all of one type go to the device as they are, which is quicker, and become float32 there."""
    kinds = set()
    for name in safetensors(directory):
        with open(os.path.join(directory, name), 'rb') as file:
            kinds |= {tensor['dtype'] for key, tensor in read_header(file).items() if key != '__metadata__'}
    stored = torch.bfloat16 if kinds == {'BF16'} else torch.float32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=stored, attn_implementation='eager')
    return model.to(device).float().eval()


def reference(args, tokens):
    """Logits [n, n_vocab]; how far rounding K and V to F16 moves those of each position at most, and the KL divergence."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = load_reference(args.model, args.device)
    ids = torch.tensor(tokens[None].astype(np.int64), device=args.device)
    plain = modeling_qwen3.eager_attention_forward

    def with_f16_cache(module, query, key, value, *rest, **named):
        return plain(module, query, key.half().float(), value.half().float(), *rest, **named)

    with torch.no_grad():
        exact = model(ids).logits[0]
        modeling_qwen3.eager_attention_forward = with_f16_cache
        rounded = model(ids).logits[0]
        modeling_qwen3.eager_attention_forward = plain
    moved = (rounded - exact).abs().max(1).values
    if not float(moved.max()) > 0:
        sys.exit('check_model: rounding K and V changes nothing: is attention still called as it was?')
    exact, rounded, moved = exact.cpu().numpy(), rounded.cpu().numpy(), moved.cpu().numpy()
    del model
    if args.device.startswith('cuda'):
        torch.cuda.empty_cache()        # the program needs the room
    return exact, moved, mean_kl(rounded, exact)


# ---- comparing -------------------------------------------------------------------------------------------------

def mean_kl(a, b):
    total = 0.0
    for x, y in zip(a, b):
        x, y = (torch.from_numpy(np.ascontiguousarray(row)).double().log_softmax(0) for row in (x, y))
        total += float((y.exp() * (y - x)).sum())
    return total / len(b)


def differ(choices, b, near):
    """Positions whose choice is not that of b, and those of them that are not near ties."""
    gaps = np.array([row.max() - row[choice] for row, choice in zip(b, choices)])
    return int((gaps > 0).sum()), int((gaps > near).sum())


def compare(name, exactly, a, b, near, least_kl):
    """Prints one line; returns whether all is as it must be. least_kl: what rounding K and V does by itself."""
    worst, top, kl = np.abs(a - b).max(), np.abs(b).max(), mean_kl(a, b)
    other, wrong = differ(a.argmax(1), b, near)
    most_kl = 4 * least_kl if least_kl > MEAN_KL else MEAN_KL
    good = worst <= EXACT * top if exactly else kl <= most_kl and wrong <= (1 - SAME) * len(b)
    beyond = '' if exactly or kl <= MEAN_KL else f' (above {MEAN_KL:g}; bound {most_kl:.2e})'
    print(f'{"ok" if good else "FAILED":6} {name}: max|d| {worst:.3g} / max|logit| {top:.4g} = {worst / top:.2e}, mean KL {kl:.2e}{beyond}, '
          f'first choice the same at {100 * (1 - other / len(b)):.2f} % of {len(b)}, {other - wrong} near ties, '
          f'{wrong} others')
    return bool(good)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model')
    p.add_argument('--tokens', type=int, default=512)
    p.add_argument('--generate', type=int, default=0, help='so many more, by the program with --args alone and an F16 cache')
    p.add_argument('--program', default='./logits')
    p.add_argument('--args', default='', help='of every run')
    p.add_argument('--device', default='cpu', help='where transformers runs')
    p.add_argument('--exact', action='append', default=[])
    p.add_argument('--float32', action='append', default=[])
    p.add_argument('--rounded', action='append', default=[])
    args = p.parse_args()
    if not args.exact + args.float32 + args.rounded:
        args.exact = ['--kv f32']
    with open(os.path.join(args.model, 'config.json'), encoding='utf-8') as file:
        vocab = min(json.load(file)['vocab_size'], 151643)              # above that Qwen3 has control tokens
    tokens, good = np.random.default_rng(7).integers(0, vocab, args.tokens), True
    start = time.time()
    with tempfile.TemporaryDirectory() as directory:
        if args.generate:
            tokens = ours(args, args.model, tokens, directory, f'--kv f16 --generate {args.generate}')[1]
        b, near, least_kl = reference(args, tokens)
        print(f'{args.model}: {len(tokens)} positions; rounding K and V to F16 moves the logits by {np.median(near):.2g} '
              f'({near.min():.2g} to {near.max():.2g}), mean KL {least_kl:.2e}; {time.time() - start:.0f} s')
        if args.generate:
            made = tokens[args.tokens:]
            other, wrong = differ(made, b[args.tokens - 1:-1], near[args.tokens - 1:-1])
            good &= wrong == 0 and len(made) == args.generate
            print(f'{"FAILED" if wrong or len(made) < args.generate else "ok":6} generated {len(made)} of {args.generate} tokens: '
                  f'{other - wrong} at near ties, {wrong} otherwise not the first choice')
        copy = os.path.join(directory, 'float32')
        if args.float32:
            os.mkdir(copy)
            float32_copy(args.model, copy)
        runs = ([(args.model, True, more, 'exact') for more in args.exact]
                + [(args.model, False, more, 'rounded') for more in args.rounded]
                + [(copy, True, more, 'float32 weights') for more in args.float32])
        for model, exactly, more, name in runs:
            start = time.time()
            a = ours(args, model, tokens, directory, more)[0]
            good &= compare(f'{name}, {args.args} {more}, {time.time() - start:.0f} s', exactly, a, b, near, least_kl)
    return int(not good)


if __name__ == '__main__':
    sys.exit(main())
