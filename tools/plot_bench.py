#!/usr/bin/env python3
"""Draw a roofline picture of single operations from what `bench --kernels ... --json` prints.

usage: bench --cuda --random 0.6B --kernels 1@512,64@512,2048 --tests "" --json | plot_bench.py -o roofline.svg [-t TITLE]
       plot_bench.py FILE... -o roofline.svg       several runs, each with its limits; the first file's roof is drawn
       plot_bench.py --text FILE...                all that a run printed as lines of text, without a picture
"""
import argparse
import json
import sys

MARKS = {'norm': 'x', 'qkv_rope': 'o', 'attention': '*', 'o_proj': 's', 'mlp': 'D', 'down': '^', 'head': 'P'}


def entries(lines):
    return [json.loads(line) for line in lines if line.startswith('{')]


def text(entry):
    if 'test' in entry:
        share = f", {100 * entry['share_of_stream']:.1f} % of the stream" if entry['share_of_stream'] else ''
        return (f"{entry['test']} batch {entry['batch']}: {entry['tokens_per_s']:,.1f} tok/s "
                f"({entry['min']:,.1f} to {entry['max']:,.1f}){share}")
    if 'kernel' in entry:
        return (f"{entry['kernel']}, {batch_name(entry)}: {entry['us']:.2f} us ({entry['min']:.2f} to {entry['max']:.2f}), "
                f"{100 * entry['share_of_stream']:.1f} % of the stream, {100 * entry['share_of_product']:.1f} % of the "
                'product')
    if 'limits' in entry:
        return (f"limits: {entry['stream_bytes_per_s'] * 1e-12:.3f} TB/s read, "
                f"{entry['product_flop_per_s'] * 1e-12:.1f} TFLOP/s product")
    return ', '.join(f'{key} {value}' for key, value in entry.items())


def read(lines):
    """The limits and the operations of one run; other lines are left out."""
    limits, kernels = None, []
    for entry in entries(lines):
        if 'limits' in entry:
            limits = entry
        elif 'kernel' in entry:
            kernels.append(entry)
    if not limits or not kernels:
        sys.exit('plot_bench: no limits or no operations in the input: was it bench --kernels ... --json?')
    return limits, kernels


def batch_name(entry):
    return f"{entry['rows']} row{'s' if entry['rows'] > 1 else ''}" + (f" at {entry['ctx']}" if entry['ctx'] else '')


def draw(runs, title, path):
    import matplotlib
    matplotlib.use('svg')
    import matplotlib.pyplot as plt
    limits = runs[0][0]
    stream, product = limits['stream_bytes_per_s'], limits['product_flop_per_s']
    plt.rcParams.update({'svg.fonttype': 'none', 'font.size': 9, 'svg.hashsalt': 'qwen3'})
    figure, axes = plt.subplots(figsize=(7.5, 4.8))
    points = [k for _, kernels in runs for k in kernels if k['flop'] > 0]
    batches = list(dict.fromkeys(batch_name(k) for k in points))
    colours = {name: f'C{i}' for i, name in enumerate(batches)}
    for k in points:
        axes.plot(k['flop'] / k['bytes'], k['flop'] / k['us'] * 1e-6, MARKS.get(k['kernel'], '.'),
                  color=colours[batch_name(k)], markersize=6)
    low = min(k['flop'] / k['bytes'] for k in points) / 2
    high = max(max(k['flop'] / k['bytes'] for k in points), product / stream) * 3
    edge = product / stream
    axes.plot([low, edge, high], [low * stream * 1e-12, product * 1e-12, product * 1e-12], 'k-', linewidth=1)
    axes.annotate(f'{stream * 1e-12:.2f} TB/s read', (low * 1.1, low * 2.5 * stream * 1e-12))
    axes.annotate(f'{product * 1e-12:.0f} TFLOP/s product', (edge, product * 1.08e-12))
    axes.set(xscale='log', yscale='log', xlim=(low, high), xlabel='FLOP a byte that must be moved', ylabel='TFLOP/s',
             title=title or limits['limits'])
    seen = [name for name in MARKS if any(k['kernel'] == name for k in points)]
    legend = [plt.Line2D([], [], marker=MARKS[name], linestyle='', color='grey', label=name) for name in seen]
    legend += [plt.Line2D([], [], marker='o', linestyle='', color=colours[name], label=name) for name in batches]
    axes.legend(handles=legend, fontsize=8, loc='lower right')
    axes.grid(True, which='major', linewidth=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={'Date': None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='*', help='outputs of bench (default: standard input)')
    parser.add_argument('-o', '--output')
    parser.add_argument('-t', '--title')
    parser.add_argument('--text', action='store_true')
    options = parser.parse_args()
    if options.text:
        for name in options.files:
            with open(name, encoding='utf-8') as file:
                for entry in entries(file):
                    print('    ' + text(entry))
        return
    if not options.output:
        parser.error('-o is missing')
    if options.files:
        runs = []
        for name in options.files:
            with open(name, encoding='utf-8') as file:
                runs.append(read(file))
    else:
        runs = [read(sys.stdin)]
    draw(runs, options.title, options.output)


if __name__ == '__main__':
    main()
