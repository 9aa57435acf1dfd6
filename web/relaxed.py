#!/usr/bin/env python3
"""Give f32x4.relaxed_madd its number. Emscripten with clang before 16, as Debian 12 has it, writes that of a draft (0xAF,
today 0x105; both take two bytes), which browsers refuse. Only as many places as the module has of the instruction are
changed: python3 web/relaxed.py FILE.wasm..."""
import pathlib
import subprocess
import sys

DRAFT, FINAL = b"\xfd\xaf\x01", b"\xfd\x85\x02"

for path in map(pathlib.Path, sys.argv[1:]):
    code = path.read_bytes()
    found = code.count(DRAFT)
    if found == 0 and FINAL in code:
        continue                        # a newer compiler
    text = subprocess.run(["wasm-dis", "--all-features", path], check=True, capture_output=True, text=True).stdout
    if found == 0 or text.count("(f32x4.relaxed_fma") != found:
        sys.exit(f"{path}: {text.count('(f32x4.relaxed_fma')} multiplications with additions, but {found} places that look like one")
    path.write_bytes(code.replace(DRAFT, FINAL))
