#!/usr/bin/env python3
"""Draw a conversation with the demo model as a picture of a terminal.

    make example && python tools/record_demo.py        writes docs/demo.svg

The program runs in a terminal of its own and decodes greedily, so the picture is what a person sees and
comes out the same every time. How fast it answered is left out: that differs.
"""
import argparse
import os
import pty
import re
import select
import subprocess
import sys
from xml.sax.saxutils import escape

QUESTIONS = (
    "Hello, I am Torvin.", "What do you sell?", "How much for two ropes and a brass lamp?",
    "Would you take 10 gold for the rope?", "Where is the harbour?", "Any news?", "What is my name?")
COLUMNS = 92
CHARACTER, LINE, MARGIN = 8.43, 20, 18  # pixels, for a font of 14 pixels
COLOURS = {"command": "#e6edf3", "asked": "#7ee787", "thought": "#6e7681", "said": "#c9d1d9"}
DIM, PLAIN = "\033[2m", "\033[0m"


class Terminal:
    """The program behind a pseudo-terminal."""

    def __init__(self, command):
        self.fd, inside = pty.openpty()
        self.process = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=subprocess.DEVNULL)
        os.close(inside)

    def until_prompt(self):
        """What the program writes up to its next prompt."""
        seen = b""
        while not seen.endswith(b"\n> "):
            if not select.select([self.fd], [], [], 60)[0]:
                sys.exit(f"no prompt after a minute: {seen!r}")
            seen += os.read(self.fd, 4096)
        return seen[:-3].decode().replace("\r\n", "\n")

    def ask(self, line):
        os.write(self.fd, line.encode() + b"\n")
        return self.until_prompt().removeprefix(line + "\n")

    def close(self):
        os.write(self.fd, b"/quit\n")
        self.process.wait(timeout=60)
        os.close(self.fd)


def styled(answer):
    """(kind, line) for every line of an answer: dimmed lines are thoughts."""
    kind = "said"
    for part in re.split(r"(\033\[[02]m)", answer.strip("\n")):
        if part in (DIM, PLAIN):
            kind = "thought" if part == DIM else "said"
        else:
            yield from ((kind, line) for line in part.split("\n"))


def folded(lines):
    """Long lines are broken at the edge of the terminal; of several empty lines one stays."""
    result = []
    for kind, line in lines:
        for at in range(0, max(1, len(line)), COLUMNS):
            if line or not result or result[-1][1]:
                result.append((kind, line[at:at + COLUMNS]))
    return result


def record(program, model):
    shown = f"{program} {model} -s @{model}/system.txt --temp 0"
    lines = [("command", f"$ {shown}"), ("said", "")]
    terminal = Terminal(shown.split())
    terminal.until_prompt()
    for question in QUESTIONS:
        lines += [("asked", f"> {question}"), *styled(terminal.ask(question)), ("said", "")]
    terminal.close()
    return folded(lines)


def svg(lines):
    width, height = round(COLUMNS * CHARACTER + 2 * MARGIN), len(lines) * LINE + 2 * MARGIN
    rules = "".join(f".{kind}{{fill:{colour}}}" for kind, colour in COLOURS.items())
    texts = [f'<text class="{kind}" x="{MARGIN}" y="{MARGIN + LINE * i + 14}">{escape(line)}</text>'
             for i, (kind, line) in enumerate(lines) if line]
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<title>A conversation with the demo model</title>",
        f"<style>text{{font:14px ui-monospace,Menlo,Consolas,monospace;white-space:pre}}{rules}</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>', *texts, "</svg>"]) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Draw a conversation with the demo model.")
    parser.add_argument("--program", default="./example")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--out", default="docs/demo.svg")
    args = parser.parse_args()
    picture = svg(record(args.program, args.model))
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out, "w", encoding="utf-8") as file:
        file.write(picture)


if __name__ == "__main__":
    main()
