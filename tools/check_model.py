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
--rounded  something is rounded to 16 bits on the way: mean KL divergence <= 1e-5, or, if the same rounding within
           transformers does more than that by itself, four times what it does (errors twice as large); and the same first
           choice at 99.9 % of the positions, not counting near ties: two logits that are no further apart than that
           rounding moves the logits of the position. The line says which of the two bounds was needed.

What is generated must be transformers' first choice, too, but for near ties. The exit status is 1 if anything is not so.

"The same rounding" is what the arguments of a run make the program round by design (the head of qwen3_cuda.cu), done once
within transformers, since what was not rounded there would count as an error here:

    --kv f16, bf16   K and V, to that type; nothing else on the CPU, or on a GPU with so few rows at once (--step, --chunk) that
                     they go through the matrix-vector kernels: 1 on Hopper, up to 8 elsewhere, none with --standard
    --cuda           with more rows and 16-bit weights the inputs of o, gate, up, down and of the head, too: F16 times a power
                     of two for each row. Those of q, k and v keep 22 bits, which is no rounding to speak of, ...
    on Hopper        ... but here, without --standard, they are rounded like the others; and with more than 64 rows and an F16
                     cache q and the softmax weights are (what attention gives, too: it is the input of o)

Hopper: compute capability 9.0, of the GPU that PyTorch sees or as --capability says, and shapes that its kernels take (head_dim
128, widths that are multiples of 128). A last step with fewer rows is taken to round what the others do; of what is generated only
K and V.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

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


# ---- what the program rounds -----------------------------------------------------------------------------------

class Rounding(NamedTuple):
    cache: str = ''             # K and V, to 'f16' or 'bf16'
    inputs: bool = False        # of o, gate, up, down and of the head
    qkv_inputs: bool = False
    attention: bool = False     # q and the softmax weights

    def __str__(self):
        return ', '.join(text for true, text in (
            (self.cache, f'K and V to {self.cache.upper()}'), (self.inputs, 'inputs of o, gate, up, down, head'),
            (self.qkv_inputs, 'of q, k, v'), (self.attention, 'q and softmax weights')) if true)


NOTHING = Rounding()


def rounding_of(args, n, more):
    """What a run with these arguments rounds when it evaluates n tokens."""
    p = argparse.ArgumentParser(allow_abbrev=False)
    p.add_argument('--cuda', action='store_true')
    p.add_argument('--standard', action='store_true')
    p.add_argument('--kv', default='f32')
    p.add_argument('--step', type=int, default=32)
    p.add_argument('--chunk', type=int, default=0)
    run = p.parse_known_args(args.args.split() + more.split())[0]
    with open(os.path.join(args.model, 'config.json'), encoding='utf-8') as file:
        config = json.load(file)
    rows = min(run.step, run.chunk or n, n)
    halves = run.cuda and not any(kind == 'F32' for kind, shape in tensors(args.model) if len(shape) == 2)
    hopper = (args.capability == 90 and not run.standard and config.get('head_dim') == 128
              and config['hidden_size'] % 128 == config['intermediate_size'] % 128 == 0)
    inputs = halves and (run.standard or rows > (1 if hopper else 8))
    return Rounding(run.kv if run.kv in ('f16', 'bf16') else '', inputs, inputs and hopper,
                    inputs and hopper and rows > 64 and run.kv == 'f16')


# ---- transformers ----------------------------------------------------------------------------------------------

def tensors(directory):
    """Type and shape of each."""
    for name in safetensors(directory):
        with open(os.path.join(directory, name), 'rb') as file:
            yield from ((tensor['dtype'], tensor['shape']) for key, tensor in read_header(file).items() if key != '__metadata__')


def load_reference(directory, device):
    """In float32. Weights that are all of one type go to the device as they are, which is quicker, and become float32 there."""
    stored = torch.bfloat16 if {kind for kind, _ in tensors(directory)} == {'BF16'} else torch.float32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=stored, attn_implementation='eager')
    return model.to(device).float().eval()


def to_f16(x):
    """Each row rounded to F16 times a power of two, with which its largest element is in [2^14, 2^15)."""
    up = 15 - torch.frexp(x.abs().amax(-1, keepdim=True)).exponent
    return torch.ldexp(torch.ldexp(x, up).half().float(), -up)


def attention_with(rounding, plain):
    """eager_attention_forward with K and V, q and the softmax weights rounded."""
    cache = {'': torch.float32, 'f16': torch.float16, 'bf16': torch.bfloat16}[rounding.cache]

    def attention(module, query, key, value, mask, scaling, **named):
        key, value = key.to(cache).float(), value.to(cache).float()
        if not rounding.attention:
            return plain(module, query, key, value, mask, scaling, **named)
        _, weights = plain(module, query.half().float(), key, value, mask, scaling, **named)
        value = modeling_qwen3.repeat_kv(value, module.num_key_value_groups)
        return (to_f16(weights) @ value).transpose(1, 2).contiguous(), weights

    return attention


def rounded_logits(model, ids, rounding):
    names = (('o_proj', 'gate_proj', 'up_proj', 'down_proj', 'lm_head') * rounding.inputs
             + ('q_proj', 'k_proj', 'v_proj') * rounding.qkv_inputs)
    hooks = [module.register_forward_pre_hook(lambda _, inputs: (to_f16(inputs[0]),))
             for name, module in model.named_modules() if name.split('.')[-1] in names]
    plain = modeling_qwen3.eager_attention_forward
    modeling_qwen3.eager_attention_forward = attention_with(rounding, plain)
    logits = model(ids).logits[0]
    modeling_qwen3.eager_attention_forward = plain
    for hook in hooks:
        hook.remove()
    return logits


def reference(args, tokens, roundings):
    """Logits [n, n_vocab]; for each rounding, how far it moves those of each position at most, and the KL divergence."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = load_reference(args.model, args.device)
    ids = torch.tensor(tokens[None].astype(np.int64), device=args.device)
    effects = {NOTHING: (np.zeros(len(tokens), np.float32), 0.0)}
    with torch.no_grad():
        exact = model(ids).logits[0].cpu().numpy()
        for rounding in roundings:
            if rounding not in effects:
                rounded = rounded_logits(model, ids, rounding).cpu().numpy()
                effects[rounding] = np.abs(rounded - exact).max(1), mean_kl(rounded, exact)
                if not effects[rounding][0].max() > 0:
                    sys.exit(f'check_model: rounding {rounding} changes nothing: is attention still called as it was?')
    del model
    if args.device.startswith('cuda'):
        torch.cuda.empty_cache()        # the program needs the room
    return exact, effects


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
    """Prints one line; returns whether all is as it must be. near, least_kl: what the same rounding does by itself."""
    worst, top, kl = np.abs(a - b).max(), np.abs(b).max(), mean_kl(a, b)
    other, wrong = differ(a.argmax(1), b, near)
    most_kl = 4 * least_kl if least_kl > MEAN_KL else MEAN_KL
    good = worst <= EXACT * top if exactly else kl <= most_kl and wrong <= (1 - SAME) * len(b)
    alone = f' (rounding alone {least_kl:.2e})' if least_kl else ''
    beyond = '' if exactly or kl <= MEAN_KL else f' (above {MEAN_KL:g}; bound {most_kl:.2e})'
    ties = '' if exactly else f', {other - wrong} near ties, {wrong} others'
    print(f'{"ok" if good else "FAILED":6} {name}: max|d| {worst:.3g} / max|logit| {top:.4g} = {worst / top:.2e}, mean KL {kl:.2e}{alone}{beyond}, '
          f'first choice the same at {100 * (1 - other / len(b)):.2f} % of {len(b)}{ties}')
    return bool(good)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model')
    p.add_argument('--tokens', type=int, default=512)
    p.add_argument('--generate', type=int, default=0, help='so many more, by the program with --args alone and an F16 cache')
    p.add_argument('--program', default='./logits')
    p.add_argument('--args', default='', help='of every run')
    p.add_argument('--device', default='cpu', help='where transformers runs')
    p.add_argument('--capability', type=int, help="of the program's GPU, as 90 for 9.0")
    p.add_argument('--exact', action='append', default=[])
    p.add_argument('--float32', action='append', default=[])
    p.add_argument('--rounded', action='append', default=[])
    args = p.parse_args()
    if not args.exact + args.float32 + args.rounded:
        args.exact = ['--kv f32']
    if args.capability is None and torch.cuda.is_available():
        args.capability = int('%d%d' % torch.cuda.get_device_capability())
    with open(os.path.join(args.model, 'config.json'), encoding='utf-8') as file:
        vocab = min(json.load(file)['vocab_size'], 151643)              # above that Qwen3 has control tokens
    tokens, good = np.random.default_rng(7).integers(0, vocab, args.tokens), True
    start = time.time()
    with tempfile.TemporaryDirectory() as directory:
        if args.generate:
            tokens = ours(args, args.model, tokens, directory, f'--kv f16 --generate {args.generate}')[1]
        decoding = rounding_of(args, 1, '--kv f16')
        roundings = {more: rounding_of(args, len(tokens), more) for more in args.rounded}
        b, effects = reference(args, tokens, [decoding] * (args.generate > 0) + list(roundings.values()))
        print(f'{args.model}: {len(tokens)} positions; {time.time() - start:.0f} s')
        for rounding, (near, kl) in effects.items():
            if rounding != NOTHING:
                print(f'rounding {rounding}: moves the logits by {np.median(near):.2g} ({near.min():.2g} to {near.max():.2g}), mean KL {kl:.2e}')
        if args.generate:
            made, near = tokens[args.tokens:], effects[decoding][0]
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
            good &= compare(f'{name}, {args.args} {more}, {time.time() - start:.0f} s', exactly, a, b,
                            *effects[NOTHING if exactly else roundings[more]])
    return int(not good)


if __name__ == '__main__':
    sys.exit(main())
