#!/usr/bin/env python3
"""Our CUDA kernels beside PyTorch's and transformers', in one process on one GPU.

usage: compare_torch.py [--only norm|layers] [--tokens 8,512] [--model DIR] [--device cuda|cpu] [--library FILE]

Build the library first: make build/libqwen3_kernels.so; for --device cpu, which has the second part alone,
make build/libqwen3_kernels_cpu.so

norm    RMSNorm on the same tensors, both replayed from CUDA graphs in turn: time, and error against float64.
layers  A model of the 0.6B shape with random BF16 weights and k_norm gains as hot as published. transformers in float32
        is the reference; ours and transformers in bfloat16 are compared with it: each operation of single layers, the
        residual stream after every layer, and the logits.
Exit status 1 if ours is slower or further off anywhere.
"""
import argparse
import ctypes
import statistics
import sys
import tempfile

import torch

TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
HOT = [96.5, 44.5, 44.0, 10.0, 41.75, 34.0]         # k_norm of layers 0 to 5; 10 of the others are above 10
EPS = 1e-6


def load_library(path):
    library = ctypes.CDLL(path)
    p, i, f = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    for name, result, arguments in [('lab_rmsnorm', ctypes.c_char_p, [p, p, p, p, i, i, i, f, i, i, i]),
                                    ('lab_open', p, [ctypes.c_char_p, i, i]), ('lab_close', None, [p]),
                                    ('lab_error', ctypes.c_char_p, []), ('lab_forward', ctypes.c_char_p, [p, p, i, p]),
                                    ('lab_layer', ctypes.c_char_p, [p, i, i] + [p] * 7),
                                    ('lab_logits', ctypes.c_char_p, [p, p, i, p])]:
        function = getattr(library, name, None)     # the CPU's library has no lab_rmsnorm
        if not function:
            continue
        function.restype, function.argtypes = result, arguments
    return library


def check(message):
    if message:
        raise RuntimeError(message.decode())


# ---- RMSNorm -----------------------------------------------------------------------------------------------------
def norm_inputs(dtype, rows, width):
    """Enough sets of x that a large one is not in the cache when its turn comes again; one y, as PyTorch's allocator gives
    the same memory to each result in turn."""
    size = rows * width * dtype.itemsize
    n = max(1, min(8, 200_000_000 // size))
    x = [torch.randn(rows, width, device='cuda', dtype=torch.float32).to(dtype) for _ in range(n)]
    for t in x:
        t[:, 5] *= 300                              # an outlier channel
    gain = (1 + 0.25 * torch.randn(width, device='cuda')).to(dtype)
    gain[7] = 40
    return x, torch.full_like(x[0], float('nan')), gain


def run_ours(library, y, x, gain, shape=(0, 0, 0)):
    stream = torch.cuda.current_stream().cuda_stream
    rows, width = x.shape
    check(library.lab_rmsnorm(stream, y.data_ptr(), x.data_ptr(), gain.data_ptr(), TYPES[x.dtype], rows, width, EPS, *shape))


def graph_of(function, repeats):
    """A CUDA graph of so many calls function(0), function(1), ..."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function(0)                                 # loads the code
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(repeats):
            function(i)
    return graph


def times_of(graphs, repeats, rounds=15):
    """Median microseconds of one call of each; the graphs take turns."""
    times = [[] for _ in graphs]
    for _ in range(rounds):
        for graph, list_ in zip(graphs, times):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            list_.append(1000 * start.elapsed_time(end) / repeats)
    return [statistics.median(list_[2:]) for list_ in times]


def norm_error(y, x, gain):
    """Relative error of the worst row."""
    x = x.double()
    want = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * gain.double()
    return ((y.double() - want).norm(dim=-1) / want.norm(dim=-1)).max().item()


def compare_norm(library, widths, rows_list):
    print(f'RMSNorm, microseconds under graph replay, and relative error against float64 of the worst row\n'
          f'{"type":9} {"rows":>6} {"width":>6} {"torch":>8} {"ours":>8} {"ratio":>6} {"error torch":>12} {"ours":>9}')
    bad = 0
    for dtype in TYPES:
        for width in widths:
            for rows in rows_list:
                x, y, gain = norm_inputs(dtype, rows, width)
                gain32, n, repeats = gain.float(), len(x), 20 if rows > 2048 else 60
                graphs = [graph_of(lambda i: torch.nn.functional.rms_norm(x[i % n], (width,), gain, EPS), repeats),
                          graph_of(lambda i: run_ours(library, y, x[i % n], gain32), repeats)]
                theirs, ours = times_of(graphs, repeats)
                x, y, gain = norm_inputs(dtype, max(rows, 512), width)  # one row's error is chance
                run_ours(library, y, x[0], gain.float())
                errors = [norm_error(torch.nn.functional.rms_norm(x[0], (width,), gain, EPS), x[0], gain),
                          norm_error(y, x[0], gain)]
                worse = ours > 1.02 * theirs or errors[1] > 1.001 * errors[0]
                bad += worse
                print(f'{str(dtype)[6:]:9} {rows:6} {width:6} {theirs:8.2f} {ours:8.2f} {theirs / ours:6.2f} '
                      f'{errors[0]:12.2e} {errors[1]:9.2e}{" <-- worse" if worse else ""}', flush=True)
    return bad


# ---- layers and whole models ---------------------------------------------------------------------------------------
def make_model(directory, small):
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(1)
    shape = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=64, vocab_size=256) if small else \
        dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
             num_key_value_heads=8, head_dim=128, vocab_size=8192)
    config = Qwen3Config(max_position_embeddings=40960, rms_norm_eps=EPS, tie_word_embeddings=True,
                         rope_parameters={'rope_type': 'default', 'rope_theta': 1e6}, rope_theta=1e6, **shape)
    model = Qwen3ForCausalLM(config).float()
    def gains(weight, top):
        weight.copy_(1 + 0.25 * torch.randn_like(weight))
        weight[7], weight[weight.numel() // 2 + 3] = top, top / 4
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1)
        gains(model.model.norm.weight, 15.3)
        for i, layer in enumerate(model.model.layers):
            gains(layer.input_layernorm.weight, 8)
            gains(layer.post_attention_layernorm.weight, 8)
            gains(layer.self_attn.q_norm.weight, 2)
            gains(layer.self_attn.k_norm.weight, HOT[i] if i < len(HOT) else 12 if i < 16 else 5)
    model.to(torch.bfloat16).save_pretrained(directory)
    return config


class Transformers:
    """The same weights in one precision; records what the operations of a layer give."""

    def __init__(self, directory, dtype, device):
        from transformers import AutoModelForCausalLM
        from transformers.models.qwen3 import modeling_qwen3
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation='sdpa').to(device)
        self.seen, self.dtype, self.device = {}, dtype, device
        rotate = modeling_qwen3.apply_rotary_pos_emb

        def recording(q, k, *args, **kwargs):
            q, k = rotate(q, k, *args, **kwargs)
            Transformers.rotated = q, k
            return q, k
        if rotate.__name__ != 'recording':
            modeling_qwen3.apply_rotary_pos_emb = recording

    def states(self, tokens):
        """[n_layer + 1, n, n_embd] and logits [n, n_vocab]"""
        states = []
        hooks = [layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in self.model.model.layers]
        hooks.append(self.model.model.norm.register_forward_pre_hook(lambda _, args: states.append(args[0])))
        with torch.no_grad():
            logits = self.model(tokens[None].to(self.device)).logits[0]
        for hook in hooks:
            hook.remove()
        return torch.stack([s.reshape(tokens.numel(), -1).float().cpu() for s in states]), logits.float().cpu()

    def layer(self, index, x):
        """The operations of one layer on x [n, n_embd] in float32: q, k, attention, silu(gate) * up, layer"""
        layer, seen = self.model.model.layers[index], {}
        x = x.to(self.device, self.dtype)[None]
        positions = torch.arange(x.shape[1], device=self.device)[None]
        hooks = [layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(attention=args[0])),
                 layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.update(product=args[0]))]
        with torch.no_grad():
            out = layer(x, position_embeddings=self.model.model.rotary_emb(x, positions), position_ids=positions)
        for hook in hooks:
            hook.remove()
        seen['q'], seen['k'] = (t.transpose(1, 2) for t in Transformers.rotated)
        seen['layer'] = out[0] if isinstance(out, tuple) else out
        return {name: t.reshape(x.shape[1], -1).float().cpu() for name, t in seen.items()}


class Ours:
    def __init__(self, library, directory, rows, config, kv):
        self.library, self.config = library, config
        self.model = library.lab_open(directory.encode(), rows, kv)     # 1: a cache of F32, 2: of F16
        if not self.model:
            check(library.lab_error())

    def close(self):
        self.library.lab_close(self.model)

    def states(self, tokens):
        c, n = self.config, tokens.numel()
        ids, states = tokens.int(), torch.full((c.num_hidden_layers + 1, n, c.hidden_size), float('nan'))
        logits = torch.full((n, c.vocab_size), float('nan'))
        check(self.library.lab_forward(self.model, ids.data_ptr(), n, states.data_ptr()))
        check(self.library.lab_logits(self.model, ids.data_ptr(), n, logits.data_ptr()))
        return states, logits

    def layer(self, index, x):
        c, n = self.config, x.shape[0]
        q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        x = x.contiguous()
        q, k, v, a, product, out = (torch.full((n, w), float('nan')) for w in
                                    (q_dim, kv_dim, kv_dim, q_dim, c.intermediate_size, c.hidden_size))
        check(self.library.lab_layer(self.model, index, n, *(t.data_ptr() for t in (x, q, k, v, a, product, out))))
        return {'q': q, 'k': k, 'attention': a, 'product': product, 'layer': out}


def distance(a, b):
    """||a - b|| / ||b||"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def compare_layers(library, args):
    bad = 0
    with tempfile.TemporaryDirectory() as directory:
        if args.model:
            from transformers import AutoConfig
            directory, config = args.model, AutoConfig.from_pretrained(args.model)
        else:
            config = make_model(directory, args.small)
        models = [Transformers(directory, dtype, args.device) for dtype in (torch.float32, torch.bfloat16)]
        for n in args.tokens:
            tokens = torch.randint(0, config.vocab_size, (n,), generator=torch.Generator().manual_seed(2))
            engines = [*models, Ours(library, directory, n, config, 1), Ours(library, directory, n, config, 2)]
            print(f'\n{n} tokens: distance from transformers in float32, ||d|| / ||reference||')

            def line(name, results):
                d = [distance(r, results[0]) for r in results[1:]]
                worse = not (d[1] < d[0] and d[2] < d[0])
                print(f'{name:28} {d[0]:18.2e} {d[1]:16.2e} {d[2]:16.2e}{" <-- worse" if worse else ""}')
                return worse
            states = [e.states(tokens) for e in engines]
            head = f'{"transformers bf16":>18} {"ours, F32 cache":>16} {"ours, F16 cache":>16}'
            print(f'{"one layer, the same input":28} {head}')
            for index in [i for i in (0, 1, 5, 14, 27) if i < config.num_hidden_layers]:
                parts = [e.layer(index, states[0][0][index]) for e in engines]
                for name in ('q', 'k', 'attention', 'product', 'layer'):
                    bad += line(f'layer {index}, {name}', [p[name] for p in parts])
            print(f'{"whole model, after":28} {head}')
            for i in range(1, config.num_hidden_layers + 1):
                bad += line(f'layer {i - 1}', [s[0][i] for s in states])
            bad += line('logits', [s[1] for s in states])
            same = [100 * (s[1].argmax(-1) == states[0][1].argmax(-1)).float().mean().item() for s in states[1:]]
            print(f'{"same first choice":28} {same[0]:17.1f}% {same[1]:15.1f}% {same[2]:15.1f}%', flush=True)
            for engine in engines[2:]:
                engine.close()
    return bad


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--library', help='default: build/libqwen3_kernels.so, or build/libqwen3_kernels_cpu.so')
    p.add_argument('--only', choices=['norm', 'layers'])
    p.add_argument('--tokens', default='8,512', type=lambda s: [int(n) for n in s.split(',')])
    p.add_argument('--widths', default='128,1024,2560,4096,5120', type=lambda s: [int(n) for n in s.split(',')])
    p.add_argument('--rows', default='1,16,512,2048,16384', type=lambda s: [int(n) for n in s.split(',')])
    p.add_argument('--model', help='a model directory instead of random weights')
    p.add_argument('--device', default='cuda')
    p.add_argument('--small', action='store_true')
    args = p.parse_args()
    library = load_library(args.library or f'build/libqwen3_kernels{"_cpu" if args.device == "cpu" else ""}.so')
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if args.device == 'cuda':
        print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}')
        torch.backends.cuda.enable_flash_sdp(True)
    bad = 0
    if args.only != 'layers' and args.device == 'cuda':
        bad += compare_norm(library, args.widths, args.rows)
    if args.only != 'norm':
        bad += compare_layers(library, args)
    print(f'{bad} points where ours is worse')
    return int(bad > 0)


if __name__ == '__main__':
    sys.exit(main())
