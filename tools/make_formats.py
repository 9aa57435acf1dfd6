#!/usr/bin/env python3
"""Write tests/data/formats.ref: what gguf-py makes of blocks of each format, for tests/test_formats.h.

pip install gguf==0.19.0 numpy; then: tools/make_formats.py > tests/data/formats.ref

A line: name, number, elements and bytes of a block, blocks, a sum over the bits of all values, and the first and last
value. Block i's bytes come from a generator; where the format has scales in half precision, they are the finite halves
i and i * 40503 (mod 2^16), so that every one occurs; byte 0 of MXFP4 and bytes 0 to 3 of NVFP4 run through all values.
"""
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize

HALVES = {'Q8_0': [0], 'Q4_0': [0], 'Q4_1': [0, 2], 'Q5_0': [0], 'Q5_1': [0, 2], 'Q2_K': [80, 82], 'Q3_K': [108], 'Q4_K': [0, 2],
          'Q5_K': [0, 2], 'Q6_K': [208], 'IQ4_NL': [0], 'IQ4_XS': [0], 'MXFP4': [], 'NVFP4': []}
BLOCKS = 65536


def random_bytes(n, seed):
    """x = x * 1664525 + 1013904223 (mod 2^32) from x = seed; the upper byte of each x."""
    a, c, x = np.ones(1, np.uint32), np.zeros(1, np.uint32), np.uint32(seed)
    with np.errstate(over='ignore'):
        while len(a) < n:               # the composition of steps: so many more at once
            a1, c1 = a[-1] * np.uint32(1664525), c[-1] * np.uint32(1664525) + np.uint32(1013904223)
            a, c = np.concatenate([a, a * a1]), np.concatenate([c, a * c1 + c])
        a, c = a[:n + 1] if len(a) > n else a, c[:n + 1] if len(c) > n else c
        x = np.uint32(seed) * np.uint32(1664525) + np.uint32(1013904223)
        return ((a[:n] * x + c[:n]) >> 24).astype(np.uint8)


def finite(h):
    return np.where((h & 0x7C00) == 0x7C00, h & 0x83FF, h).astype(np.uint16)


def main():
    for name, halves in HALVES.items():
        t = T[name]
        elements, size = GGML_QUANT_SIZES[t]
        b = random_bytes(BLOCKS * size, int(t)).reshape(BLOCKS, size)
        i = np.arange(BLOCKS, dtype=np.uint32)
        for at, half in zip(halves, (finite(i & 0xFFFF), finite(i * 40503 & 0xFFFF))):
            b[:, at:at + 2] = half.astype('<u2').view(np.uint8).reshape(-1, 2)
        if name == 'MXFP4':
            b[:, 0] = i & 0xFF
        if name == 'NVFP4':
            b[:, :4] = (i[:, None] * np.uint32(4) + np.arange(4, dtype=np.uint32)) & 0x7F
        y = dequantize(b, t).astype(np.float32).ravel() + np.float32(0)     # one zero
        bits = y.view(np.uint32).astype(np.uint64)
        with np.errstate(over='ignore'):
            k = np.arange(len(bits), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
            total = (bits * k).sum(dtype=np.uint64)
        print(name, int(t), elements, size, BLOCKS, f'{int(total):016x}', *(repr(float(v)) for v in (y[0], y[-1])))


main()
