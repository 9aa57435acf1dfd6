#!/usr/bin/env python3
"""Write tests/data/gguf/small.gguf and small-f32.gguf with gguf-py, for tests/test_gguf.h: one small model with a vocabulary, its
matrices in blocks of six formats and of F16, and the same weights as gguf-py dequantises them.

pip install gguf==0.19.0 numpy; then: tools/make_small_gguf.py tests/data/gguf
"""
import os
import sys

import numpy as np
from gguf import GGMLQuantizationType as T, GGUFWriter
from gguf.quants import dequantize, quantize

EMBD, HEADS, KV, DIM, FF, VOCAB = 64, 4, 2, 32, 96, 264
MATRICES = {'attn_q': (HEADS * DIM, EMBD, T.Q4_0), 'attn_k': (KV * DIM, EMBD, T.Q4_1), 'attn_v': (KV * DIM, EMBD, T.Q5_0),
            'attn_output': (EMBD, HEADS * DIM, T.Q5_1), 'ffn_gate': (FF, EMBD, T.Q8_0), 'ffn_up': (FF, EMBD, T.F16),
            'ffn_down': (EMBD, FF, T.BF16)}


def alphabet():
    """Bytes as byte-level vocabularies write them"""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def write(path, exact):
    rng = np.random.default_rng(20)
    w = GGUFWriter(path, 'qwen3')
    w.add_type('model')
    w.add_block_count(1)
    w.add_context_length(64)
    w.add_embedding_length(EMBD)
    w.add_feed_forward_length(FF)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV)
    w.add_key_length(DIM)
    w.add_value_length(DIM)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(10000.0)
    w.add_tokenizer_model('gpt2')
    w.add_tokenizer_pre('qwen2')
    w.add_token_list(alphabet() + ['ab', '<|im_end|>', '<|im_start|>', '<think>', *(f'[PAD{i}]' for i in range(260, VOCAB))])
    w.add_token_types([1] * 257 + [3, 3, 4] + [5] * 4)
    w.add_token_merges(['a b'])
    w.add_eos_token_id(257)
    w.add_chat_template('{{ enable_thinking }}')

    def add(name, x, kind=T.F32):
        x = x.astype(np.float32)
        if kind != T.F32:
            data = quantize(x, kind)
            if not exact:
                w.add_tensor(name, data, raw_dtype=kind)
                return
            x = dequantize(data, kind).astype(np.float32)
        w.add_tensor(name, x)

    def gains(n):
        return 1 + 0.1 * rng.standard_normal(n)

    add('token_embd.weight', rng.standard_normal((VOCAB, EMBD)), T.Q8_0)
    add('output_norm.weight', gains(EMBD))
    for name, n in ('attn_norm', EMBD), ('ffn_norm', EMBD), ('attn_q_norm', DIM), ('attn_k_norm', DIM):
        add(f'blk.0.{name}.weight', gains(n))
    for name, (rows, cols, kind) in MATRICES.items():
        add(f'blk.0.{name}.weight', rng.standard_normal((rows, cols)) / np.sqrt(cols), kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    os.makedirs(sys.argv[1], exist_ok=True)
    write(os.path.join(sys.argv[1], 'small.gguf'), False)
    write(os.path.join(sys.argv[1], 'small-f32.gguf'), True)


main()
