#!/usr/bin/env python3
"""Nsight Compute's figures for each kernel of a decode step and of a prefill, as a table.

usage: profile_kernels.py [--bench ./bench] [--sizes 0.6B,8B] [--ncu ncu] [--tests tg2@512,pp2048]
                          [--launches 20]

Only a step's own kernels are looked at, by name: of the decode step at least one from end to end, of the prefill
--launches. For every kernel the launch that took longest is shown: microseconds, share of the peak of memory (DRAM), of the second-level
cache, of the multiprocessors, and of the tensor cores, warps in flight of those that fit, registers, and the three largest reasons why warps waited (issue
slots lost to each). Clocks are left as they are. Needs permission to read the GPU's counters.
"""
import argparse
import csv
import io
import os
import pathlib
import subprocess
import sys
import tempfile

STALLS = ['long_scoreboard', 'short_scoreboard', 'barrier', 'membar', 'wait', 'math_pipe_throttle', 'mio_throttle',
          'lg_throttle', 'tex_throttle', 'not_selected', 'no_instruction', 'sleeping', 'branch_resolve', 'gmma']
STALL = 'smsp__average_warps_issue_stalled_{}_per_issue_active.ratio'
TIME, DRAM, SM = 'gpu__time_duration.sum', 'dram__throughput.avg.pct_of_peak_sustained_elapsed', \
    'sm__throughput.avg.pct_of_peak_sustained_elapsed'
L2, TENSOR = 'lts__throughput.avg.pct_of_peak_sustained_elapsed', \
    'sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed'
WARPS, REGISTERS = 'sm__warps_active.avg.pct_of_peak_sustained_active', 'launch__registers_per_thread'

# What one row goes through; the prefill before it has none of these but for its last row (embedding, norm, head).
DECODE = '^(stream_.*|vector_product|attention_decode|attention_split|rmsnorm|embed|choose|best|adjust|keep_logits)_kernel'
PREFILL = '^(large_.*|attention_tile|skinny_product|rmsnorm|embed)_kernel'
LAYERS = {'0.6B': 28, '1.7B': 28, '4B': 36, '8B': 36}
A_LAYER, BESIDE = 7, 10                 # most launches of a decode step in each layer, and before and after the layers


def profile(args, size, test):
    """Rows of ncu's CSV, one a launch, with units taken into account."""
    if test.startswith('tg'):           # only launches of that name count: past the last row of the prefill, then a step
        which = ['--kernel-name', f'regex:{DECODE}', '--launch-skip', str(BESIDE),
                 '--launch-count', str(A_LAYER * LAYERS.get(size, 64) + BESIDE)]
    else:
        which = ['--kernel-name', f'regex:{PREFILL}', '--launch-count', str(args.launches)]
    metrics = ','.join([TIME, DRAM, L2, SM, TENSOR, WARPS, REGISTERS] + [STALL.format(s) for s in STALLS])
    command = [args.ncu, '--clock-control', 'none', '--csv', '--page', 'raw', '--print-units', 'base', '--metrics', metrics,
               *which, args.bench, '--cuda', '--random', size, '--tests', test, '--repeat', '1']
    build = pathlib.Path(__file__).resolve().parent.parent / 'build'
    build.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=build) as reports:     # ncu keeps its report in TMPDIR, which may be gone
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'TMPDIR': reports})
    lines = run.stdout.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        sys.exit(f'no figures from: {" ".join(command)}\n{run.stdout[-2000:]}{run.stderr[-2000:]}')
    return [row for row in csv.DictReader(io.StringIO('\n'.join(lines[start:]))) if row['ID'].isdigit()]


def number(row, name):
    try:
        return float(row.get(name, '').replace(',', ''))
    except ValueError:
        return 0.0


def table(rows):
    longest = {}
    for row in rows:
        name = row['Kernel Name']
        for noise in ('void ', '<unnamed>::', '(anonymous namespace)::', '(int)', '(bool)'):
            name = name.replace(noise, '')
        name = name.split('>(')[0] + '>' if '>(' in name else name.split('(')[0]
        if name not in longest or number(row, TIME) > number(longest[name], TIME):
            longest[name] = row
    print(f'{"us":>8} {"DRAM %":>7} {"L2 %":>6} {"SM %":>6} {"tensor %":>8} {"warps %":>8} {"regs":>5}  {"grid x block":24} {"kernel":44} waits for')
    for name, row in sorted(longest.items(), key=lambda item: -number(item[1], TIME)):
        stalls = sorted(((number(row, STALL.format(s)), s) for s in STALLS), reverse=True)[:3]
        shape = f'{row["Grid Size"]} x {row["Block Size"]}'.replace(' ', '')
        print(f'{number(row, TIME) / 1000:8.2f} {number(row, DRAM):7.1f} {number(row, L2):6.1f} {number(row, SM):6.1f} '
              f'{number(row, TENSOR):8.1f} {number(row, WARPS):8.1f} '
              f'{number(row, REGISTERS):5.0f}  {shape:24} {name[:44]:44} ' + ', '.join(f'{s} {v:.1f}' for v, s in stalls if v))


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--bench', default='./bench')
    p.add_argument('--sizes', default='0.6B')
    p.add_argument('--ncu', default='ncu')
    p.add_argument('--tests', default='tg2@512,pp2048')
    p.add_argument('--launches', type=int, default=20)
    args = p.parse_args()
    for size in args.sizes.split(','):
        for test in args.tests.split(','):
            print(f'{size}, {test}', flush=True)
            table(profile(args, size, test))


main()
