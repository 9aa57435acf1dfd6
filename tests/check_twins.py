#!/usr/bin/env python3
"""Every function of qwen3.h that a comment of qwen3_cuda.cu names must exist: kernels say which one they equal."""
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def main():
    comments = re.compile(r"/\*.*?\*/", re.S)
    defined = read("qwen3.h") + comments.sub("", read("qwen3_cuda.cu"))
    missing = []
    for file in ("qwen3_cuda.cu", "tests/cuda_lab.cu", "tests/cuda_lab.h"):
        for comment in comments.findall(read(file)):
            for name in re.findall(r"\bqwen3i?_\w+\b(?!\.)", comment):
                if not re.search(rf"\b{name}\(", defined):
                    missing.append(f"{file}: {name}")
    print("\n".join(missing) or "every function that the comments name exists")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
