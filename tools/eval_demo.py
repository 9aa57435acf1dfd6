#!/usr/bin/env python3
"""Score the demo model on dialogues whose names, wares, prices and phrasings it has never seen.

    python tools/eval_demo.py --engine ./example           the chat program
    python tools/eval_demo.py                              transformers, greedy, float32
    python tools/eval_demo.py --engine ./example --compare 50
                                                           the program's words against transformers'
    python tools/eval_demo.py --engine ./example --args=--cuda --compare 500 --with ./example --with-args=--cpu
                                                           the GPU's words against the CPU's

Prints a table of what was asked for and how often the answer was right. The exit status is 1 when
a target is missed, or when --compare finds a difference that is not a near tie: one where transformers in
float32 gives both ways to go on nearly the same probability.

The program reads one line a turn from its standard input, /tool RESULT for the result of a tool, and
ends each answer with a NUL byte. It is started once for all dialogues with the same tools and the same wish to
think, or for --jobs shares of them; /system and /reset begin a dialogue anew.
"""
import argparse
import collections
import concurrent.futures
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from demo_grammar import make_dialogue  # noqa: E402

TARGETS = {"name": 95, "price": 95, "tool call": 95, "sum": 90, "change": 90}
LONGEST_ANSWER = 400
NEAR_TIE = 0.05                         # difference of two logarithms of probability


# --------------------------------------------------------------------------------------------
# Is an answer right?

def spoken(answer):
    """An answer without its thoughts; nothing if they never end."""
    said = answer.rpartition("</think>")[2].strip()
    return "" if said.startswith("<think>") else said


def tool_call(said):
    match = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", said, re.S)
    try:
        return json.loads(match[1]) if match else None
    except ValueError:
        return None


CHECKS = {
    "has": lambda said, numbers, want: all(text.lower() in said for text in want),
    "any": lambda said, numbers, want: any(text.lower() in said for text in want),
    "lacks": lambda said, numbers, want: not any(text in said for text in want),
    "numbers": lambda said, numbers, want: set(numbers) == set(want),
    "holds": lambda said, numbers, want: set(want) <= set(numbers),
    "last": lambda said, numbers, want: numbers[-1:] == [want],
}


def is_right(turn, answer):
    said = spoken(answer)
    if turn.call:
        return tool_call(said) == {"name": "buy", "arguments": turn.call}
    numbers = [int(digits) for digits in re.findall(r"\d+", said)]
    checks = (CHECKS[kind](said.lower(), numbers, want) for kind, want in turn.want.items())
    return tool_call(said) is None and all(checks)


# --------------------------------------------------------------------------------------------
# The chat program

def kind(dialogue):
    """What the program is told on its command line; the rest can change from dialogue to dialogue."""
    tools = tuple(json.dumps(tool, ensure_ascii=False) for tool in dialogue.tools)
    return dialogue.thinking, bool(dialogue.system), tools


def input_line(turn):
    return ("/tool " if turn.role == "tool" else "") + turn.text + "\n"


class ProgramEngine:
    def __init__(self, program, model, args=(), jobs=1):
        self.line = [program, model, "-0", "--thoughts", "--temp", "0", "--max", str(LONGEST_ANSWER), *args]
        self.jobs = jobs

    def answers(self, dialogues):
        """Dialogues of one kind share a process, as long as there is a share for each of the jobs."""
        groups, most = collections.defaultdict(list), -(-len(dialogues) // self.jobs)
        for number, dialogue in enumerate(dialogues):
            groups[kind(dialogue)].append(number)
        shares = [same[first:first + most] for same in groups.values() for first in range(0, len(same), most)]
        answers = {}
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            given = pool.map(self.converse, ([dialogues[i] for i in share] for share in shares))
            for share, said in zip(shares, given):
                answers.update(zip(share, said))
        return [answers[i] for i in range(len(dialogues))]

    def converse(self, dialogues):
        """The dialogues one after the other; each begins with a system prompt of its own, or with /reset."""
        thinking, system, tools = kind(dialogues[0])
        with tempfile.TemporaryDirectory() as folder:
            def file(name, text):
                path = os.path.join(folder, name)
                with open(path, "w", encoding="utf-8", newline="") as out:
                    out.write(text)
                return path

            lines = []
            for number, dialogue in enumerate(dialogues):
                lines.append(f"/system @{file(str(number), dialogue.system)}\n" if system else "/reset\n")
                lines += [input_line(turn) for turn in dialogue.turns]
            line = self.line + ([] if thinking else ["--no-think"])
            line += ["--tools", file("tools", "\n".join(tools) + "\n")] if tools else []
            done = subprocess.run(line, input="".join(lines), capture_output=True, encoding="utf-8", errors="replace",
                                  timeout=600 * len(dialogues))
        answers, turns = done.stdout.split("\0")[:-1], sum(len(dialogue.turns) for dialogue in dialogues)
        if len(answers) != turns:
            sys.exit(f"{line[0]} gave {len(answers)} of {turns} answers: {done.stderr.strip()}")
        rest = iter(answers)
        return [list(itertools.islice(rest, len(dialogue.turns))) for dialogue in dialogues]


# --------------------------------------------------------------------------------------------
# transformers

class TransformersEngine:
    def __init__(self, model, device="cpu", batch=None):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        self.tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device)
        self.batch = batch or (500 if device == "cuda" else 32)

    def answers(self, dialogues):
        return [answers for first in range(0, len(dialogues), self.batch)
                for answers in self.converse(dialogues[first:first + self.batch])]

    def converse(self, dialogues):
        """All the dialogues side by side, one turn of each at a time."""
        talks = [[{"role": "system", "content": dialogue.system}] if dialogue.system else [] for dialogue in dialogues]
        answers = [[] for _ in dialogues]
        for number in range(max(len(dialogue.turns) for dialogue in dialogues)):
            active = [i for i, dialogue in enumerate(dialogues) if number < len(dialogue.turns)]
            for i in active:
                turn = dialogues[i].turns[number]
                talks[i].append({"role": turn.role, "content": turn.text})
            said = self.generate([self.prompt(dialogues[i], talks[i]) for i in active])
            for i, answer in zip(active, said):
                answers[i].append(answer)
                talks[i].append({"role": "assistant", "content": answer})
        return answers

    def prompt(self, dialogue, messages):
        return self.tokenizer.apply_chat_template(
            messages, tools=dialogue.tools or None, tokenize=False, add_generation_prompt=True,
            enable_thinking=dialogue.thinking)

    def gap(self, dialogue, said, one, other):
        """How far apart in log-probability two answers are where they part."""
        import torch
        talk = [{"role": "system", "content": dialogue.system}] if dialogue.system else []
        for turn, answer in zip(dialogue.turns, said + [None]):
            talk.append({"role": turn.role, "content": turn.text})
            talk += [{"role": "assistant", "content": answer}] if answer is not None else []
        start = self.tokenizer(self.prompt(dialogue, talk)).input_ids
        one, other = (self.tokenizer(text + "<|im_end|>").input_ids for text in (one, other))
        common = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)) - 1)
        with torch.no_grad():
            logits = self.model(torch.tensor([start + one[:common]], device=self.model.device)).logits[0, -1]
        return abs(float(logits[one[common]] - logits[other[common]]))

    def generate(self, prompts):
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.model.device)
        output = self.model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False,
                                     temperature=None, top_p=None, top_k=None)
        return self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


# --------------------------------------------------------------------------------------------
# Scores

def score(engine, count, show_wrong=0):
    """Right and asked for every slot over count held-out dialogues."""
    dialogues = [make_dialogue(seed, heldout=True) for seed in range(count)]
    right, asked, wrong = collections.Counter(), collections.Counter(), []
    for dialogue, answers in zip(dialogues, engine.answers(dialogues)):
        for turn, answer in zip(dialogue.turns, answers):
            if turn.slot:
                asked[turn.slot] += 1
                right[turn.slot] += is_right(turn, answer)
                if not is_right(turn, answer):
                    wrong.append((dialogue, turn, answer))
    for example in wrong[:show_wrong]:
        describe_wrong(*example)
    slots = {slot: {"right": right[slot], "asked": asked[slot], "target": TARGETS.get(slot),
                    "percent": round(100 * right[slot] / asked[slot], 1)} for slot in sorted(asked)}
    passed = all(s["percent"] >= (s["target"] or 0) for s in slots.values())
    return {"dialogues": count, "slots": slots, "passed": passed}


def describe_wrong(dialogue, turn, answer):
    print(f"{turn.slot}: {turn.text}\n  wanted {turn.call or turn.want}\n  got {answer!r}\n"
          f"  in {dialogue.system!r}", file=sys.stderr)


def markdown_table(result):
    lines = ["| asked for | right | of | percent | target |", "|---|---|---|---|---|"]
    lines += [f"| {slot} | {s['right']} | {s['asked']} | {s['percent']} | {s['target'] or ''} |"
              for slot, s in result["slots"].items()]
    return "\n".join(lines)


def compare(program, other, judge, count):
    """Whether two engines think and say the same, to the letter, up to the first difference of each dialogue,
    which must be a near tie."""
    dialogues = [make_dialogue(seed, heldout=True) for seed in range(count)]
    same = ties = different = 0
    for dialogue, ours, theirs in zip(dialogues, program.answers(dialogues), other.answers(dialogues)):
        for number, (turn, our, their) in enumerate(zip(dialogue.turns, ours, theirs)):
            if our == their:
                same += 1
                continue
            gap = judge.gap(dialogue, ours[:number], our, their)
            print(f"asked {turn.text!r}\n  one    {our!r}\n  other  {their!r}\n  apart  {gap:.4f}")
            ties, different = ties + (gap <= NEAR_TIE), different + (gap > NEAR_TIE)
            break  # what follows depends on it
    print(f"{count} dialogues: {same} answers are the same, {ties} differ at a near tie, {different} differ otherwise")
    return different == 0


def parse_arguments():
    parser = argparse.ArgumentParser(description="Score the demo model.")
    parser.add_argument("--engine", default="transformers", help="transformers or the path of the chat program")
    parser.add_argument("--model", default="demo", help="folder of the model")
    parser.add_argument("--count", type=int, default=500, help="number of dialogues")
    parser.add_argument("--args", default="", help="further arguments of the chat program, as one word")
    parser.add_argument("--jobs", type=int, default=1, help="chat programs at a time")
    parser.add_argument("--compare", type=int, metavar="N", help="compare on N dialogues with ...")
    parser.add_argument("--with", dest="other", default="transformers", help="... transformers or a chat program")
    parser.add_argument("--with-args", default="", help="further arguments of that chat program, as one word")
    parser.add_argument("--device", default="cpu", help="where transformers runs")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--wrong", type=int, default=0, metavar="N", help="show N wrong answers")
    return parser.parse_args()


def main():
    args = parse_arguments()
    judge = TransformersEngine(args.model, args.device) if args.compare or args.engine == "transformers" else None
    engine = judge
    if args.engine != "transformers":
        engine = ProgramEngine(args.engine, args.model, args.args.split(), args.jobs)
    if args.compare:
        other = judge
        if args.other != "transformers":
            other = ProgramEngine(args.other, args.model, args.with_args.split(), args.jobs)
        return 0 if compare(engine, other, judge, args.compare) else 1
    result = score(engine, args.count, args.wrong)
    print(json.dumps(result, indent=2) if args.json else markdown_table(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
