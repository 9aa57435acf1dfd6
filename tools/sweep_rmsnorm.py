#!/usr/bin/env python3
"""How many threads a row, vectors a thread and rows a block RMSNorm wants: what rmsnorm_shape() in qwen3_cuda.cu is made from.

usage: sweep_rmsnorm.py [--library build/libqwen3_kernels.so] [--rows 1,16,512,2048,16384] [--widths 128,1024,2560,4096,5120]

For each point the best shapes, beside the one that the library takes. Microseconds under graph replay.
"""
import argparse

import torch
from compare_torch import TYPES, graph_of, load_library, norm_inputs, run_ours, times_of


def shapes(vectors, rows):
    """(k, lanes, together): k vectors a thread, so many threads a row, so many rows a block"""
    for k in (1, 2, 4, 8):
        lanes = -(-vectors // k)
        lanes = 8 if lanes <= 8 else 16 if lanes <= 16 else -(-lanes // 32) * 32
        most = 1024 if k <= 2 else 512 if k == 4 else 256           # norm_threads()
        if lanes > most or (k > 1 and lanes * (k // 2) >= vectors):
            continue                                # too many threads, or no fewer than with half of k
        for together in (1, 2, 4, 8, 16, 32):
            threads = lanes * together
            if threads % 32 == 0 and threads <= (most if together == 1 else min(most, 512)) and (together == 1 or together <= rows) or \
                    threads == 32:
                yield k, lanes, together


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--library', default='build/libqwen3_kernels.so')
    p.add_argument('--types', default='float32,bfloat16')
    p.add_argument('--widths', default='128,1024,2560,4096,5120', type=lambda s: [int(n) for n in s.split(',')])
    p.add_argument('--rows', default='1,16,512,2048,16384', type=lambda s: [int(n) for n in s.split(',')])
    args = p.parse_args()
    library = load_library(args.library)
    print(f'{torch.cuda.get_device_name()}\n{"type":9} {"rows":>6} {"width":>6} {"library":>8}   best shapes: (vectors, threads, rows) us')
    for dtype in [d for d in TYPES if str(d)[6:] in args.types.split(',')]:
        for width in args.widths:
            for rows in args.rows:
                x, y, gain = norm_inputs(dtype, rows, width)
                gain, n, repeats = gain.float(), len(x), 10 if rows > 2048 else 40
                tried = [(0, 0, 0)] + list(shapes(width * dtype.itemsize // 16, rows))
                graphs = [graph_of(lambda i: run_ours(library, y, x[i % n], gain, shape), repeats) for shape in tried]
                times = times_of(graphs, repeats, 7)
                best = sorted(zip(times[1:], tried[1:]))[:5]
                print(f'{str(dtype)[6:]:9} {rows:6} {width:6} {times[0]:8.2f}   ' +
                      '  '.join(f'({s[0]},{s[1]},{s[2]}) {t:.2f}' for t, s in best), flush=True)


if __name__ == '__main__':
    main()
