#!/usr/bin/env python3
"""Compare a whole model's logits with transformers' in float32.

usage: check_model.py MODEL_DIR [--tokens 512] [--program ./logits] [--args=--cuda] [--device cpu|cuda] [--bound 1e-4]

Build the program first:  cc -O3 -I. tools/logits.c -o logits -lm -lpthread
Random token ids (fixed seed) go through both. Prints max |difference| / max |logit|, the mean KL
divergence and the share of equal argmaxes; exit status 1 if the first is above the bound.
"""
import argparse
import os
import subprocess
import sys
import tempfile

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def ours(args, tokens, directory):
    source, target = os.path.join(directory, 'tokens'), os.path.join(directory, 'logits')
    tokens.astype('<i4').tofile(source)
    subprocess.run([args.program, args.model, source, target, *args.args.split()], check=True)
    return np.memmap(target, '<f4', 'r').reshape(len(tokens), -1)


def reference(args, tokens):
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation='eager').to(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        return model(torch.tensor(tokens[None].astype(np.int64), device=args.device)).logits[0].float().cpu().numpy()


def main():
    p = argparse.ArgumentParser()
    p.add_argument('model')
    p.add_argument('--tokens', type=int, default=512)
    p.add_argument('--program', default='./logits')
    p.add_argument('--args', default='')
    p.add_argument('--device', default='cpu')
    p.add_argument('--bound', type=float, default=1e-4)
    args = p.parse_args()
    vocab = 151643
    tokens = np.random.default_rng(7).integers(0, vocab, args.tokens)
    with tempfile.TemporaryDirectory() as directory:
        a = ours(args, tokens, directory)
        b = reference(args, tokens)
        worst = max(np.abs(a[i] - b[i]).max() for i in range(len(tokens)))
        top = np.abs(b).max()
        agree = np.mean([a[i].argmax() == b[i].argmax() for i in range(len(tokens))])
        kl = 0.0
        for i in range(len(tokens)):
            x, y = torch.tensor(np.array(a[i])).double().log_softmax(0), torch.tensor(b[i]).double().log_softmax(0)
            kl += float((y.exp() * (y - x)).sum()) / len(tokens)
    print(f'{args.model}: {len(tokens)} positions, max|d| {worst:.3g} / max|logit| {top:.4g} = {worst / top:.3g}, '
          f'mean KL {kl:.3g}, same argmax {100 * agree:.2f} %')
    return int(not worst <= args.bound * top)


sys.exit(main())
