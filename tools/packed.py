"""Directories of quantised weights, for check_formats.py: the linear layers of a model as FP8, AWQ, GPTQ and compressed-tensors keep
them, and the same weights in float32. Layouts as the makers' documents have them; rounding is to nearest, nothing is calibrated.
"""
import json
import os
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file

GROUP = 128


def float_config(strategy):
    return {'quant_method': 'compressed-tensors', 'format': 'float-quantized', 'config_groups': {'group_0': {
        'weights': {'num_bits': 8, 'type': 'float', 'strategy': strategy, 'symmetric': True}}}, 'ignore': ['lm_head']}


def int_config(bits, symmetric, **more):
    return {'quant_method': 'compressed-tensors', 'format': 'pack-quantized', 'config_groups': {'group_0': {'weights': {
        'num_bits': bits, 'group_size': GROUP, 'type': 'int', 'strategy': 'group', 'symmetric': symmetric, **more}}}, 'ignore': ['lm_head']}


def gptq_config(bits, **more):
    return {'quant_method': 'gptq', 'bits': bits, 'group_size': GROUP, 'desc_act': False, 'sym': False, **more}


CONFIGS = {                             # quantization_config
    'FP8': {'quant_method': 'fp8', 'fmt': 'e4m3', 'activation_scheme': 'dynamic', 'weight_block_size': [128, 128]},
    'FP8-channel': float_config('channel'), 'FP8-tensor': float_config('tensor'),
    'AWQ': {'quant_method': 'awq', 'bits': 4, 'group_size': GROUP, 'zero_point': True, 'version': 'gemm'},
    'GPTQ-4': gptq_config(4), 'GPTQ-8': gptq_config(8), 'GPTQ-v2': gptq_config(4, checkpoint_format='gptq_v2'),
    'GPTQ-order': gptq_config(4, desc_act=True),
    'W4A16': int_config(4, True), 'W8A16': int_config(8, True), 'W4A16-zeros': int_config(4, False),
    'W4A16-order': int_config(4, False, actorder='group')}


def pack(fields, bits, axis):
    """Fields along an axis into words, the first of them in the lowest bits"""
    x = np.moveaxis(fields.astype(np.uint32), axis, -1)
    x = x.reshape(*x.shape[:-1], -1, 32 // bits)
    words = (x << (bits * np.arange(32 // bits, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.int32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)))


def fp8(name, w):
    """Tensors by the ends of their names, and the weights that they mean"""
    rows, cols = {'FP8': (128, 128), 'FP8-channel': (1, w.shape[1]), 'FP8-tensor': w.shape}[name]
    x = torch.from_numpy(w).reshape(w.shape[0] // rows, rows, w.shape[1] // cols, cols)
    scale = (x.abs().amax((1, 3)) / 448).to(torch.bfloat16)
    wide = scale.float()[:, None, :, None]
    q = (x / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    exact = (q.float() * wide).reshape(w.shape).numpy()
    key = 'weight_scale_inv' if name == 'FP8' else 'weight_scale'
    return {'weight': q.reshape(w.shape), key: scale.reshape(1) if name == 'FP8-tensor' else scale}, exact


def whole_numbers(name, w):
    bits, symmetric, (out, n) = 8 if '8' in name else 4, name in ('W4A16', 'W8A16'), w.shape
    order = np.random.default_rng(n).permutation(n) if 'order' in name else np.arange(n)
    group_of = np.empty(n, np.int32)
    group_of[order] = np.arange(n) // GROUP
    x = w[:, order].reshape(out, -1, GROUP)
    low, high, top = x.min(-1), x.max(-1), 2 ** bits - 1
    scale = (np.abs(x).max(-1) / (top // 2) if symmetric else (high - low) / top).astype(np.float16)
    zero = np.full(scale.shape, top // 2 + 1) if symmetric else np.clip(np.rint(-low / scale.astype(np.float32)), 1, top).astype(int)
    scales, zeros = scale.astype(np.float32)[:, group_of], zero[:, group_of]
    q = np.clip(np.rint(w / scales) + zeros, 0, top).astype(int)
    exact = (q - zeros).astype(np.float32) * scales
    half = torch.from_numpy(np.ascontiguousarray(scale))
    if name == 'AWQ':
        def mixed(a):
            return a.reshape(a.shape[0], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(a.shape)
        return {'qweight': pack(mixed(q.T), 4, 1), 'qzeros': pack(mixed(zero.T), 4, 1), 'scales': half.T.contiguous()}, exact
    if name.startswith('GPTQ'):
        stored = zero if name == 'GPTQ-v2' else zero - 1
        return {'qweight': pack(q.T, bits, 0), 'qzeros': pack(stored.T, bits, 1), 'scales': half.T.contiguous(),
                'g_idx': torch.from_numpy(group_of)}, exact
    parts = {'weight_packed': pack(q, bits, 1), 'weight_scale': half, 'weight_shape': torch.tensor([out, n])}
    if not symmetric:
        parts['weight_zero_point'] = pack(zero, bits, 0)
    if 'order' in name:
        parts['weight_g_idx'] = torch.from_numpy(group_of)
    return parts, exact


def write(model, directory, exact_directory, name):
    """The directory `model` as `name` keeps it, and one of float32 with the same weights"""
    packed, exact = {}, {}
    for key, t in load_file(os.path.join(model, 'model.safetensors')).items():
        if not key.endswith('_proj.weight'):
            packed[key], exact[key] = t, t.float()
            continue
        parts, values = (fp8 if name.startswith('FP8') else whole_numbers)(name, t.float().numpy())
        packed.update({key.removesuffix('weight') + part: x for part, x in parts.items()})
        exact[key] = torch.from_numpy(values)
    with open(os.path.join(model, 'config.json'), encoding='utf-8') as f:
        config = json.load(f)
    for to, tensors, c in (directory, packed, config | {'quantization_config': CONFIGS[name]}), (exact_directory, exact, config):
        os.makedirs(to)
        for file in os.listdir(model):
            if not file.endswith('.safetensors') and os.path.isfile(os.path.join(model, file)):
                shutil.copy(os.path.join(model, file), to)
        with open(os.path.join(to, 'config.json'), 'w', encoding='utf-8') as f:
            json.dump(c, f)
        save_file(tensors, os.path.join(to, 'model.safetensors'), {'format': 'pt'})
