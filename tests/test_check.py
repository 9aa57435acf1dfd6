#!/usr/bin/env python3
"""build/check on the demo model as it is, and with weights that break it in one way each.
usage: tests/test_check.py [build/check]"""
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAM = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else os.path.join(ROOT, 'build', 'check'))
failed = 0


def edit(directory, tensor, change):
    """Replace rows of a tensor (BF16) by change(rows)."""
    path = os.path.join(directory, 'model.safetensors')
    data = bytearray(open(path, 'rb').read())
    start = 8 + struct.unpack('<Q', data[:8])[0]
    entry = json.loads(data[8:start])[tensor]
    assert entry['dtype'] == 'BF16', entry
    begin, end = (start + at for at in entry['data_offsets'])
    values = [struct.unpack('<f', b'\0\0' + data[at:at + 2])[0] for at in range(begin, end, 2)]
    width = entry['shape'][-1]
    rows = change([values[at:at + width] for at in range(0, len(values), width)])
    data[begin:end] = b''.join(struct.pack('<f', v)[2:] for row in rows for v in row)
    open(path, 'wb').write(data)


def each(change):
    return lambda rows: [[change(v) for v in row] for row in rows]


def twins(rows):
    """Value 1 of each head is three times value 0, exactly: of its weights all but 6 bits go."""
    def short(v):
        return struct.unpack('<f', struct.pack('<I', struct.unpack('<I', struct.pack('<f', v))[0] & 0xFFFC0000))[0]
    for head in range(0, len(rows), 128):
        rows[head] = [short(v) for v in rows[head]]
        rows[head + 1] = [3 * v for v in rows[head]]
    return rows


def difference(rows):
    """The output takes 3 times value 0 less value 1, many times: nothing, but for the rounding of these."""
    for n, row in enumerate(rows):
        for head in range(0, len(row), 128):
            row[head], row[head + 1] = 96.0 * (n % 7 - 3), -32.0 * (n % 7 - 3)
    return rows


def check(name, status, text, *edits):
    global failed
    with tempfile.TemporaryDirectory() as directory:
        for file in os.listdir(os.path.join(ROOT, 'demo')):
            shutil.copy(os.path.join(ROOT, 'demo', file), directory)
        for tensor, change in edits:
            edit(directory, tensor, change)
        run = subprocess.run([PROGRAM, directory], capture_output=True, text=True)
    good = run.returncode == status and text in run.stdout
    failed += not good
    print(f'{"ok   " if good else "FAIL "} {name}')
    if not good:
        print(run.returncode, run.stdout, run.stderr)


check('as it is', 0, 'verdict: near ties')
check('a weight that is not a number', 3, 'verdict: BROKEN. Layer 2',
      ('model.layers.2.mlp.up_proj.weight', each(lambda v: float('nan'))))
check('gains of 1000 in every layer', 3, 'verdict: an F16 cache changes next tokens',
      *((f'model.layers.{layer}.self_attn.k_norm.weight', each(lambda v: 1000 * v)) for layer in range(5)))
check('keys beyond F16', 3, 'do not fit into an F16 cache',
      ('model.layers.1.self_attn.k_norm.weight', each(lambda v: 1e6 * v)))
check('products beyond F16', 0, 'values beyond 65504', ('model.layers.3.mlp.up_proj.weight', each(lambda v: 3000 * v)))
check('values that cancel', 3, 'verdict: an F16 cache changes next tokens',
      *((f'model.layers.{layer}.self_attn.{what}_proj.weight', change)
        for layer in range(5) for what, change in (('v', twins), ('o', difference))))
check('certain of each token', 0, 'verdict: fine', ('model.norm.weight', each(lambda v: 0)))
sys.exit(failed > 0)
