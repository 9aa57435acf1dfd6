#!/usr/bin/env python3
"""Weights in blocks: this library's logits beside transformers' in float32 on the same dequantised weights, and how far
llama.cpp is from them on the same file and text.

    pip install -r tools/requirements.txt gguf==0.19.0
    make build/quantize && cc -O3 -march=native -I. tools/logits.c -o build/logits -lm -lpthread
    tools/check_formats.py MODEL_DIR TEXT --llama DIR       DIR has llama.cpp's llama-quantize and llama-perplexity

Files of Q8_0, Q6_K, Q5_K_M, Q4_K_M and Q4_0 are made by tools/quantize.c, of MXFP4 and NVFP4 here (the layers' matrices; NVFP4
with a factor for each, as files have it), directories by packed.py, the others by llama-quantize. gguf-py's
dequantisation of each goes into a float32 copy of the directory for transformers, and from there into a float32 GGUF for
llama.cpp's own reference. It fails unless max |difference| <= 1e-4 max |logit|; --strict also asks that the mean KL
divergence from transformers be at most 1/20 of llama.cpp's from its reference. llama-perplexity stores its reference in 16
bits: the line F32 says what is left of a file that is compared with itself.
"""
import argparse
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile

import gguf
import numpy as np
import torch
from gguf.quants import MXFP4, NVFP4, dequantize
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import packed

OURS = ['Q8_0', 'Q6_K', 'Q5_K_M', 'Q4_K_M', 'Q4_0']
THEIRS = ['Q4_1', 'Q5_0', 'Q5_1', 'Q2_K', 'Q3_K_M', 'IQ4_NL', 'IQ4_XS']
FLOATS = ['MXFP4', 'NVFP4']
LAYER = {'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm', 'attn_q_norm': 'self_attn.q_norm',
         'attn_k_norm': 'self_attn.k_norm', 'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj',
         'attn_v': 'self_attn.v_proj', 'attn_output': 'self_attn.o_proj', 'ffn_gate': 'mlp.gate_proj',
         'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj'}
OUTER = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}


def run(*command):
    r = subprocess.run(command, capture_output=True, text=True)
    if r.returncode:
        sys.exit(f'{" ".join(command)}: {r.stdout[-500:]}{r.stderr[-1500:]}')
    return r.stdout + r.stderr


def hugging_face_name(name):
    part = name.removesuffix('.weight').split('.')
    return (OUTER[part[0]] if part[0] != 'blk' else f'model.layers.{part[1]}.{LAYER[part[2]]}') + '.weight'


def float32_copy(model, file, directory):
    """The directory `model`, with the weights of the file as float32"""
    os.makedirs(directory)
    for name in os.listdir(model):
        if not name.endswith('.safetensors') and os.path.isfile(os.path.join(model, name)):
            shutil.copy(os.path.join(model, name), directory)
    all_tensors = {t.name: dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(file).tensors}
    tensors = {hugging_face_name(name): np.ascontiguousarray(x * all_tensors.get(name.replace('.weight', '.scale'), 1), np.float32)
               for name, x in all_tensors.items() if name.endswith('.weight')}
    save_file(tensors, os.path.join(directory, 'model.safetensors'), {'format': 'pt'})


def to_nvfp4(x):
    """Blocks, and the factor that puts the largest of their scales at the end of its range"""
    x = x.reshape(-1, 4, 16)
    factor = np.float32(np.abs(x).max() / (6 * 448))
    scales = NVFP4.fp32_to_ue4m3(np.abs(x).max(-1) / 6 / factor)
    d = NVFP4.ue4m3_to_fp32(scales)[..., None] * factor
    codes = np.abs(x[..., None] / np.maximum(d, 1e-30)[..., None] - np.array(NVFP4.kvalues, np.float32)).argmin(-1).astype(np.uint8)
    return np.concatenate([scales, (codes[..., :8] | codes[..., 8:] << 4).reshape(-1, 32)], -1), factor


def float_blocks(source, file, name):
    """The 16-bit GGUF file `source` with the matrices of its layers in MXFP4 or NVFP4"""
    reader, kind = gguf.GGUFReader(source), gguf.GGMLQuantizationType[name]
    tensors = []                        # name, shape as in the file, type, bytes
    for t in reader.tensors:
        shape, x = t.shape.tolist(), dequantize(t.data, t.tensor_type)
        if len(shape) < 2 or not t.name.startswith('blk.'):
            tensors.append((t.name, shape, t.tensor_type, t.data.tobytes()))
            continue
        blocks, factor = to_nvfp4(x) if name == 'NVFP4' else (MXFP4.quantize_blocks(x.reshape(-1, 32)), None)
        tensors.append((t.name, shape, kind, blocks.tobytes()))
        if factor:
            tensors.append((t.name.replace('.weight', '.scale'), [1], gguf.GGMLQuantizationType.F32, factor.tobytes()))
    keys = [f for f in reader.fields.values() if f.offset >= 24]
    end = max(f.offset + sum(p.nbytes for p in f.parts) for f in keys)
    head, at = [struct.pack('<4sIQQ', b'GGUF', 3, len(tensors), len(keys)), reader.data[24:end].tobytes()], 0
    for key, shape, t, data in tensors:
        head.append(struct.pack(f'<Q{len(key)}sI{len(shape)}QIQ', len(key), key.encode(), len(shape), *shape, t, at))
        at += -(-len(data) // 32) * 32
    with open(file, 'wb') as f:
        f.write(b''.join(head))
        for data in [b''] + [t[3] for t in tensors]:
            f.write(data + bytes(-(f.tell() + len(data)) % 32))


def log_softmax(x):
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def mean_kl(p, q):
    p, q = log_softmax(p), log_softmax(q)
    return (np.exp(p) * (p - q)).sum(-1).mean()


def reference(directory, tokens):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation='eager').eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()


def ours(args, file, tokens, work):
    source, target = os.path.join(work, 'tokens'), os.path.join(work, 'logits')
    tokens.astype('<i4').tofile(source)
    run(args.logits, file, source, target, '--kv', 'f32')
    return np.fromfile(target, '<f4').reshape(len(tokens), -1)


def llama(args, exact, file, work):
    """Mean KL divergence of llama.cpp on the file from itself on the same weights in float32, both with an F32 cache"""
    base, whole = os.path.join(work, 'base.kld'), os.path.join(work, 'exact.gguf')
    program = [os.path.join(args.llama, 'llama-perplexity'), '-f', args.text, '-c', '128', '-t', '1', '--chunks', str(args.chunks),
               '-ctk', 'f32', '-ctv', 'f32', '-fa', 'off', '--kl-divergence-base', base]
    run(args.quantize, exact, whole, 'AS_IS')
    run(*program, '-m', whole)
    said = run(*program, '-m', file or whole, '--kl-divergence')
    return float(re.search(r'^Mean +KLD: +(\S+)', said, re.M).group(1))


def check(args, name, tokens, work):
    file, exact = os.path.join(work, f'{name}.gguf'), os.path.join(work, name)
    if name in packed.CONFIGS:
        file = os.path.join(work, f'{name}-packed')
        packed.write(args.model, file, exact, name)
    elif name in OURS:
        run(args.quantize, args.model, file, name)
    elif name == 'F32':
        run(args.quantize, args.model, file, 'AS_IS')
    else:
        run(args.quantize, args.model, f'{file}.16', 'AS_IS')
        if name in FLOATS: float_blocks(f'{file}.16', file, name)
        else: run(os.path.join(args.llama, 'llama-quantize'), f'{file}.16', file, name, '1')
    if name not in packed.CONFIGS:
        float32_copy(args.model, file, exact)
    want, got = reference(exact, tokens), ours(args, file, tokens, work)
    off, top, kl = np.abs(want - got).max(), np.abs(want).max(), mean_kl(want, got)
    theirs = llama(args, exact, None if name == 'F32' else file, work) if args.llama and name not in packed.CONFIGS else float('nan')
    good = off <= 1e-4 * top and (not args.strict or name == 'F32' or name in packed.CONFIGS or kl <= theirs / 20)
    print(f'{"ok" if good else "FAILED"} | {name} | {off / top:.1e} | {kl:.1e} | {theirs:.1e} | {theirs / max(kl, 1e-15):.0f}', flush=True)
    shutil.rmtree(exact)
    return good


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model')
    p.add_argument('text')
    p.add_argument('--llama', help='the directory of llama.cpp\'s programs')
    p.add_argument('--quantize', default='build/quantize')
    p.add_argument('--logits', default='build/logits')
    p.add_argument('--types', nargs='*')
    p.add_argument('--tokens', type=int, default=512)
    p.add_argument('--chunks', type=int, default=100)
    p.add_argument('--strict', action='store_true')
    args = p.parse_args()
    with open(args.text, encoding='utf-8') as f:
        tokens = np.array(AutoTokenizer.from_pretrained(args.model)(f.read())['input_ids'][:args.tokens])
    print('| | type | max difference / max logit | mean KL | llama.cpp | ratio |')
    with tempfile.TemporaryDirectory() as work:
        good = [check(args, name, tokens, work) for name in args.types or ['F32'] + OURS + FLOATS + (THEIRS if args.llama else []) + list(packed.CONFIGS)]
    sys.exit(not all(good))


main()
