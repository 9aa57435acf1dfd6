#!/usr/bin/env python3
"""Names in comments and documents must exist: a comment that says `qwen3i_rope` of a function that is now called
otherwise misleads. Checks every word that starts with qwen3_, qwen3i_ or QWEN3 in the comments of the sources and in the
documents; so a kernel's twin on the CPU, which its comment names, is one that there is. And inner functions of qwen3.h
do not call public ones, which would begin a message anew.

    tools/check_names.py            prints what is not there; the exit status says whether there was any
"""
import pathlib
import re
import sys

TOP = pathlib.Path(__file__).resolve().parent.parent
SOURCES = [p for pattern in ("*.h", "*.c", "*.cu", "*.cuh", "tests/*.h", "tests/*.c", "tests/*.cu", "tests/fuzz/*.c",
                             "tests/cuda_on_cpu/*.h", "tools/*.h", "tools/*.c", "tools/*.cu", "examples/*.c", "web/*.c")
           for p in sorted(TOP.glob(pattern))]
DOCUMENTS = [p for pattern in ("*.md", "docs/*.md") for p in sorted(TOP.glob(pattern))]
SCRIPTS = [p for pattern in ("Makefile", "tools/*.mk", "tools/*.sh", "tools/*.py", "tests/*.sh", "tests/*.py", ".ci/run")
           for p in sorted(TOP.glob(pattern))]
NAME = re.compile(r"\b(?:qwen3i?_\w+|QWEN3I?_\w+)(\*?)")
TOKEN = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.S)
SERVICES = {"qwen3_backend_view", "qwen3_backend_rotation", "qwen3_result_string"}      # for inner functions, too
# Names that are not of this code: other libraries' functions, and files.
FOREIGN = {"qwen3_vl", "qwen3_moe", "qwen3_next", "qwen3_cuda", "QWEN3_NUMERICAL_STABILITY_GUIDE"}


def comments_and_code(text):
    """[(line, comment)], and the text without comments"""
    found, code, at = [], [], 0
    for match in TOKEN.finditer(text):
        if not match[0].startswith("/"):
            continue
        found.append((text.count("\n", 0, match.start()) + 1, match[0]))
        code.append(text[at:match.start()])
        at = match.end()
    return found, " ".join(code + [text[at:]])


def known_names(codes):
    """Every name in the code; a name that a macro pastes together (name##_v) counts with all its endings."""
    names = set()
    for code in codes:
        names.update(re.findall(r"\bqwen3i?_\w+|\bQWEN3I?\w*", code))
    for base in re.findall(r"QWEN3I_DEFINE_\w+\((qwen3i_\w+)", " ".join(codes)):
        for ending in re.findall(r"\bV##(_\w+)", " ".join(codes)):
            names.add(base + ending)
    return names


def missing(text, names):
    for match in NAME.finditer(text):
        name = match[0].rstrip("*")
        if name in names or name in FOREIGN:
            continue
        if (match[1] or name.endswith("_")) and any(n.startswith(name) for n in names):     # qwen3_stream_*
            continue
        yield match.start(), name


def inner_calls(text):
    """(line, inner function, the public one that it calls)"""
    public = set(re.findall(r"^QWEN3_API [^;{(]*?\b(qwen3_\w+)\(", text, re.M)) - SERVICES
    for match in re.finditer(r"^static [^;{}]*?\b(qwen3i_\w+)\([^;{}]*\) \{([^\n]*\}$|.*?^\})", text, re.M | re.S):
        for name in re.findall(r"\b(qwen3_\w+)\(", match[2]):
            if name in public:
                yield text.count("\n", 0, match.start()) + 1, match[1], name


def main():
    parsed = {p: comments_and_code(p.read_text(encoding="utf-8")) for p in SOURCES}
    names = known_names([code for _, code in parsed.values()] + [p.read_text(encoding="utf-8") for p in SCRIPTS])
    bad = []
    for path, (comments, _) in parsed.items():
        for line, comment in comments:
            for at, name in missing(comment, names):
                bad.append(f"{path.relative_to(TOP)}:{line + comment.count(chr(10), 0, at)}: {name} does not exist")
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for at, name in missing(text, names):
            bad.append(f"{path.relative_to(TOP)}:{text.count(chr(10), 0, at) + 1}: {name} does not exist")
    header = (TOP / "qwen3.h").read_text(encoding="utf-8")
    bad += [f"qwen3.h:{line}: {inner} calls {name}" for line, inner, name in inner_calls(header)]
    print("\n".join(bad) if bad else f"{len(names)} names; all that comments and documents say exist")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
