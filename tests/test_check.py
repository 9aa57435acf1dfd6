#!/usr/bin/env python3
"""example --check on the demo model as it is, with a weight that is not a number, with gains of k_norm a thousand times
as large. usage: tests/test_check.py [./example]"""
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, 'example'))
failed = 0


def edit(path, tensor, change):
    """Replace the 16-bit elements of a tensor (BF16) by change(element as a float)."""
    data = bytearray(open(path, 'rb').read())
    start = 8 + struct.unpack('<Q', data[:8])[0]
    entry = json.loads(data[8:start])[tensor]
    assert entry['dtype'] == 'BF16', entry
    for at in range(start + entry['data_offsets'][0], start + entry['data_offsets'][1], 2):
        value = struct.unpack('<f', b'\0\0' + data[at:at + 2])[0]
        data[at:at + 2] = struct.pack('<f', change(value))[2:]
    open(path, 'wb').write(data)


def check(name, status, text, tensor=None, change=None):
    global failed
    with tempfile.TemporaryDirectory() as directory:
        for file in os.listdir(os.path.join(ROOT, 'demo')):
            shutil.copy(os.path.join(ROOT, 'demo', file), directory)
        if tensor:
            edit(os.path.join(directory, 'model.safetensors'), tensor, change)
        run = subprocess.run([PROGRAM, directory, '--check'], capture_output=True, text=True)
    good = run.returncode == status and text in run.stdout
    failed += not good
    print(f'{"ok   " if good else "FAIL "} {name}')
    if not good:
        print(run.returncode, run.stdout, run.stderr)


check('as it is', 0, 'verdict: fine')
check('a weight that is not a number', 3, 'verdict: BROKEN. Layer 2', 'model.layers.2.mlp.up_proj.weight', lambda v: float('nan'))
check('gains of 1000', 3, 'kv_type to QWEN3_KV_F32', 'model.layers.1.self_attn.k_norm.weight', lambda v: 1000 * v)
check('keys beyond F16', 3, 'do not fit into an F16 cache', 'model.layers.1.self_attn.k_norm.weight', lambda v: 1e6 * v)
check('products beyond F16', 0, 'values beyond 65504', 'model.layers.3.mlp.up_proj.weight', lambda v: 3000 * v)
sys.exit(failed > 0)
