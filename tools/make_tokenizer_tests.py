#!/usr/bin/env python3
"""Expected results for the tokenizer and the chat format, from Hugging Face tokenizers and Jinja2.

    make_tokenizer_tests.py write DIR          make tests/data/tokenizer anew: a small tokenizer, trained here, and what it
                                               and the chat template in DIR give
    make_tokenizer_tests.py compare DIR [N]    N (20000) strings and N/40 conversations, made up, through both; DIR holds
                                               a model's tokenizer.json and tokenizer_config.json
    make_tokenizer_tests.py bench DIR          speed of both, in one run

compare and bench compile qwen3.h (or the header that $QWEN3_HEADER names) with $CC, into a temporary directory.
"""
import ctypes
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import unicodedata

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer, models, trainers

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
DATA = os.path.join(ROOT, 'tests', 'data', 'tokenizer')
SYSTEM, USER, ASSISTANT, TOOL = range(4)
ROLES = ['system', 'user', 'assistant', 'tool']
NO_THINK, KEEP_THINKING, NO_REPLY_HEADER = 1, 2, 4
HYBRID, THINKING, INSTRUCT = range(3)
SPOKEN = '<think>', '</think>', '<tool_call>', '</tool_call>'     # added tokens that an assistant's text makes
HIDE = '\uE000'                         # stands for '<' where it must not start an added token


# ---- the reference -------------------------------------------------------------------------------------
class Reference:
    """Tokens of a text, of a text with added tokens, and of a conversation."""

    def __init__(self, spec, template):
        self.spec = spec
        self.full = Tokenizer.from_str(json.dumps(spec))
        self.plain = Tokenizer.from_str(json.dumps(dict(spec, added_tokens=[])))
        self.added = {t['content']: t['id'] for t in spec['added_tokens']}
        self.special = [t['content'] for t in spec['added_tokens'] if t['special']]
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        env.filters['tojson'] = lambda x: json.dumps(x, ensure_ascii=False)
        self.templates = [env.from_string(styled(template, style)) for style in (HYBRID, THINKING, INSTRUCT)]

    def encode(self, data, special=False):
        return (self.full if special else self.plain).encode(data.decode('utf-8', 'replace'), add_special_tokens=False).ids

    def rendered(self, chat):
        messages = [message(self, m) for m in chat['messages']]
        return self.templates[chat['style']].render(
            messages=messages, tools=[json.loads(t) for t in chat['tools']] or None,
            add_generation_prompt=not chat['flags'] & NO_REPLY_HEADER,
            enable_thinking=not chat['flags'] & NO_THINK, keep_thinking=bool(chat['flags'] & KEEP_THINKING))

    def render(self, chat):
        text = self.rendered(chat)
        ids, run, i = [], 0, 0
        longest = sorted(self.added, key=len, reverse=True)
        while i < len(text):
            hit = next((t for t in longest if text.startswith(t, i)), None) if text[i] == '<' else None
            if not hit: i += 1; continue
            ids += self.run(text[run:i]) + [self.added[hit]]
            i += len(hit)
            run = i
        ids += self.run(text[run:])
        if HIDE not in text: assert ids == self.full.encode(text, add_special_tokens=False).ids
        return ids

    def run(self, text):
        return self.plain.encode(text.replace(HIDE, '<'), add_special_tokens=False).ids


def styled(template, style):
    """The template of the other models, from the hybrid one (which gains the option to keep all reasoning)."""
    keep = template.replace('{%- if loop.index0 > ns.last_query_index %}',
                            '{%- if loop.index0 > ns.last_query_index or (keep_thinking and reasoning_content) %}')
    switch = "{%- if enable_thinking is defined and enable_thinking is false %}\n        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}"
    assert keep != template and switch in keep
    if style == HYBRID: return keep
    if style == THINKING: return keep.replace(switch, "{{- '<think>\\n' }}")
    begin = keep.index("{%- set reasoning_content = '' %}")
    end = keep.index('{%- if message.tool_calls %}')
    return keep.replace(switch, '')[:begin] + "{{- '<|im_start|>' + message.role + '\\n' + content }}\n" + keep.replace(switch, '')[end:]


class Plain(str):
    """Text that must not produce added tokens: what the template asks of it is answered as it was."""
    def startswith(self, x): return self.replace(HIDE, '<').startswith(x)
    def endswith(self, x): return self.replace(HIDE, '<').endswith(x)


def hide(text, tokens):
    for t in tokens: text = text.replace(t, HIDE + t[1:])
    return text


def message(ref, m):
    out = {'role': ROLES[m['role']]}
    tokens = [t for t in ref.added if m['role'] != ASSISTANT or t not in SPOKEN]
    out['content'] = Plain(hide(m['text'], tokens))
    if m.get('reasoning') is not None: out['reasoning_content'] = hide(m['reasoning'], tokens)
    if m.get('calls'):
        out['tool_calls'] = [{'name': hide(n, tokens), 'arguments': hide(a, tokens)} for n, a in m['calls']]
    return out


# ---- made-up text --------------------------------------------------------------------------------------
def assigned():
    cats = {}
    for c in range(0x110000):
        if not 0xD800 <= c < 0xE000: cats.setdefault(unicodedata.category(chr(c)), []).append(chr(c))
    return cats


class Strings:
    def __init__(self, seed, added, corpus):
        self.r, self.added, self.corpus = random.Random(seed), added, corpus
        self.cats = assigned()
        self.marks = self.cats['Mn'] + self.cats['Mc']
        self.old = [c for c in self.marks if ord(c) < 0x3100]
        self.composed = [chr(c) for c in range(0x110000) if unicodedata.decomposition(chr(c))[:1] not in ('', '<')]
        self.spaces = [chr(c) for c in (9, 10, 11, 12, 13, 0x1C, 0x1F, 0x20, 0x85, 0xA0, 0x1680, 0x180E, 0x2000, 0x200B,
                                        0x2028, 0x2029, 0x202F, 0x3000, 0xFEFF)]
        self.scripts = [[chr(c) for c in range(a, b) if chr(c).isalpha() or unicodedata.combining(chr(c))] for a, b in (
            (0x41, 0x250), (0x370, 0x530), (0x531, 0x590), (0x591, 0x700), (0x900, 0xE00), (0xE00, 0x1000), (0x1000, 0x1400),
            (0x1780, 0x1900), (0x1E00, 0x2000), (0x3040, 0x3200), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4), (0x10000, 0x10B00),
            (0x11000, 0x11D00), (0x1E900, 0x1E960), (0x1D400, 0x1D800), (0xFB00, 0xFE00))]

    def some(self, pool, low, high): return ''.join(self.r.choice(pool) for _ in range(self.r.randint(low, high)))

    def anything(self): return self.some([chr(self.r.randrange(0xD800)) if self.r.random() < .7 else chr(self.r.randrange(0xE000, 0x110000))
                                          for _ in range(8)], 1, 20)

    def scripted(self):
        s = self.r.choice(self.scripts)
        return ''.join(self.r.choice([self.some(s, 1, 9), self.some('0123456789', 1, 4), self.some(self.spaces, 1, 2), ' ', ' ',
                                      self.some('.,;:!?-"\'()[]{}<>/\\@#$%^&*+=|~`', 1, 4)]) for _ in range(self.r.randint(1, 14)))

    def marked(self):
        pool = self.old if self.r.random() < .7 else self.marks
        return ''.join(self.r.choice(['a', 'e', 'o', ' ', '\u1100', '\u1161', '\u11a8', '\uac00', self.r.choice(self.composed)]) +
                       self.some(pool, 0, self.r.choice([1, 2, 4, 40])) for _ in range(self.r.randint(1, 8)))

    def jamo(self): return self.some([chr(self.r.choice([self.r.randrange(0x1100, 0x1200), self.r.randrange(0xAC00, 0xD7A4)])) for _ in range(6)], 1, 20)

    def ascii(self): return self.some([chr(c) for c in range(128)], 1, 60)

    def spaced(self):
        return ''.join(self.r.choice([self.some(self.spaces, 1, 4), self.some(' \n\r\t', 1, 6), 'a', 'Zebra', '7', '!', '...',
                                      "'s", "'LL", "'Re", "'\u017f", "'d", "x", '\u4e2d']) for _ in range(self.r.randint(1, 20)))

    def contracted(self):
        return ''.join(self.r.choice('aZ9 .\n\u00e9') + self.r.choice("''\u2019") + self.r.choice('sStTrRvVmMlLdDeE\u017f\u212a') +
                       self.r.choice('sStTrRvVmMlLdDeE \u017fx') for _ in range(self.r.randint(1, 12)))

    def emoji(self):
        pool = [chr(c) for c in range(0x1F300, 0x1FAFF)] + ['\u200d', '\ufe0f', '\U0001f3fd', '\u20e3', '#', '\U0001f1e6', '\U0001f1fa']
        return self.some(pool, 1, 25)

    def broken(self):
        b = bytearray(self.r.choice([self.scripted, self.emoji, self.marked])().encode())
        for _ in range(self.r.randint(1, 6)):
            i = self.r.randrange(len(b) + 1)
            b[i:i + self.r.randint(0, 2)] = bytes(self.r.choice([0x80, 0xBF, 0xC0, 0xC2, 0xE0, 0xED, 0xA0, 0xEF, 0xF0, 0xF4, 0x90, 0xF8, 0xFF])
                                                  for _ in range(self.r.randint(0, 3)))
        return bytes(b)

    def bytes(self): return bytes(self.r.randrange(256) for _ in range(self.r.randint(1, 30)))

    def real(self):
        i = self.r.randrange(len(self.corpus) - 1)
        return self.corpus[i:i + self.r.randint(1, 600)]

    def tagged(self):
        parts = [self.r.choice(self.added) for _ in range(4)]
        parts += [t[:self.r.randint(1, len(t))] for t in parts] + ['<', '>', '\u0338', ' ', '\n', 'word', '<|', '|>', self.marked(), self.scripted()]
        return self.some(parts, 1, 10)

    def run(self):
        unit = self.r.choice(['a', ' ', '\n', '\t', '=', '-', '0', '\u0301', '\u4e2d', '\U0001f600', 'ab', 'the', ' a', '\r\n', '\u0e01', 'A', "'"])
        return unit * self.r.choice([7, 63, 64, 65, 66, 128, 129, 300])

    def next(self):
        kinds = [(self.anything, 2), (self.scripted, 5), (self.marked, 4), (self.jamo, 1), (self.ascii, 3), (self.spaced, 3),
                 (self.contracted, 1), (self.emoji, 1), (self.broken, 2), (self.bytes, 1), (self.real, 3), (self.tagged, 2), (self.run, 1)]
        out = self.r.choices([k for k, _ in kinds], [w for _, w in kinds])[0]()
        return out if isinstance(out, bytes) else out.encode()


def chat_text(s, inject):
    r = s.r
    text = r.choice([s.scripted, s.spaced, s.real, s.marked, s.emoji, lambda: '', lambda: '\n', lambda: 'Hello'])()
    if r.random() < inject: text += r.choice(['', '\n', ' ']) + s.tagged()
    if r.random() < .1: text = '\n\n' + text + '\n'
    return text.replace(HIDE, '').replace('\0', '')


def json_value(s, depth):
    r = s.r
    if depth and r.random() < .4: return {chat_text(s, 0)[:12]: json_value(s, depth - 1) for _ in range(r.randint(0, 4))}
    if depth and r.random() < .3: return [json_value(s, depth - 1) for _ in range(r.randint(0, 4))]
    return r.choice([True, False, None, r.randint(-10 ** 6, 10 ** 20), round(r.uniform(-5, 5), r.randint(0, 8)), r.random() * 10 ** r.randint(-20, 20) // 1,
                     float('%.*e' % (r.randint(0, 14), r.uniform(0, 10) * 10.0 ** r.randint(-30, 30))), chat_text(s, 0), 0.0, -0.0, 1e16, 1e-5])


def as_json(s, value):
    """JSON as people write it: odd spacing, escapes, exponents."""
    text = json.dumps(value, ensure_ascii=s.r.random() < .5, indent=s.r.choice([None, 1, 4]), separators=s.r.choice([None, (',', ':'), (' , ', ' : ')]))
    return text.replace('/', '\\/') if s.r.random() < .2 else text


def conversation(s, inject=.15):
    r, messages = s.r, []
    if r.random() < .4: messages.append(dict(role=SYSTEM, text=chat_text(s, inject)))
    for _ in range(r.randint(0 if messages else 1, 6)):
        role = r.choice([USER, USER, ASSISTANT, ASSISTANT, ASSISTANT, TOOL, TOOL, SYSTEM])
        m = dict(role=role, text=chat_text(s, inject))
        if role == USER and r.random() < .15: m['text'] = '<tool_response>' + m['text'] + '</tool_response>'
        if role == ASSISTANT:
            style = r.random()
            if style < .3: m['reasoning'] = chat_text(s, inject)
            elif style < .6: m['text'] = r.choice(['', 'x', '\n']) + '<think>' + chat_text(s, inject) + '</think>' + r.choice(['', '\n', '\n\n']) + m['text']
            elif style < .7: m['text'] = chat_text(s, 0) + '</think>' + m['text'] + r.choice(['', '</think>', '<think>'])
            if r.random() < .4:
                m['calls'] = [(chat_text(s, 0)[:12], as_json(s, {'a': json_value(s, 2)})) for _ in range(r.randint(1, 3))]
        messages.append(m)
    tools = [as_json(s, {'type': 'function', 'function': json_value(s, 3)}) for _ in range(r.randint(1, 3))] if r.random() < .3 else []
    return dict(messages=messages, tools=tools, flags=r.randrange(8), style=r.randrange(3))


# ---- qwen3.h, through ctypes ---------------------------------------------------------------------------
DRIVER = r'''
#define QWEN3_IMPLEMENTATION
#include "%s"
static qwen3_model model;
const char *t_load(const void *data, size_t n) {
    static char message[256];
    qwen3i_err err;
    err.text = message; err.cap = sizeof message; message[0] = 0;
    qwen3i_vocab_files f;
    memset(&f, 0, sizeof f);
    f.json.data = data; f.json.size = n;
    return qwen3i_tokenizer_read(&model.tokenizer, &model.allocator, &f, &err) ? message : NULL;
}
void t_free(void) { qwen3i_tokenizer_free(model.tokenizer); model.tokenizer = NULL; }
int t_encode(const char *text, size_t n, int flags, qwen3_token *out, int cap) { return qwen3_encode(&model, text, n, flags, out, cap, NULL, 0); }
int t_render(const qwen3_chat_desc *chat, int style, qwen3_token *out, int cap) {
    model.info.chat_style = (qwen3_chat_style)style;
    return qwen3_chat_render(&model, chat, out, cap, NULL, 0);
}
int t_bytes(int token, char *out) {
    int n;
    const char *p = qwen3_token_bytes(&model, token, &n);
    if (p) memcpy(out, p, (size_t)n);
    return n;
}
'''


class Call(ctypes.Structure):
    _fields_ = [('name', ctypes.c_char_p), ('arguments', ctypes.c_char_p)]


class Msg(ctypes.Structure):
    _fields_ = [('role', ctypes.c_int), ('text', ctypes.c_char_p), ('reasoning', ctypes.c_char_p), ('calls', ctypes.POINTER(Call)), ('n_calls', ctypes.c_int)]


class Chat(ctypes.Structure):
    _fields_ = [('msgs', ctypes.POINTER(Msg)), ('n_msgs', ctypes.c_int), ('tools', ctypes.POINTER(ctypes.c_char_p)), ('n_tools', ctypes.c_int),
                ('flags', ctypes.c_int)]


class Ours:
    def __init__(self, where):
        header = os.path.abspath(os.environ.get('QWEN3_HEADER', os.path.join(ROOT, 'qwen3.h')))
        source, lib = os.path.join(where, 'driver.c'), os.path.join(where, 'driver.so')
        open(source, 'w').write(DRIVER % header)
        subprocess.run([os.environ.get('CC', 'cc'), '-O2', '-w', '-shared', '-fPIC', source, '-o', lib, '-lm', '-lpthread'], check=True)
        self.lib, self.texts = ctypes.CDLL(lib), {}
        self.lib.t_load.restype = ctypes.c_char_p
        self.lib.t_load.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        self.lib.t_encode.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]

    def load(self, spec):
        error = self.lib.t_load(spec, len(spec))
        if error is not None: sys.exit(error)

    def encode(self, data, special=False):
        out = (ctypes.c_int32 * (len(data) + 16))()     # U+FFFD has three bytes, and at least one token in each
        n = self.lib.t_encode(data, len(data), int(special), out, len(out))
        if n > len(out):
            out = (ctypes.c_int32 * n)()
            n = self.lib.t_encode(data, len(data), int(special), out, n)
        return out[:n] if n >= 0 else n

    def render(self, chat):
        msgs = (Msg * len(chat['messages']))()
        for m, x in zip(msgs, chat['messages']):
            m.role, m.text = x['role'], x['text'].encode()
            if x.get('reasoning') is not None: m.reasoning = x['reasoning'].encode()
            calls = x.get('calls', [])
            m.calls = (Call * len(calls))(*[Call(n.encode(), a.encode()) for n, a in calls])
            m.n_calls = len(calls)
        tools = (ctypes.c_char_p * len(chat['tools']))(*[t.encode() for t in chat['tools']])
        desc = Chat(msgs, len(msgs), tools, len(tools), chat['flags'])
        n = self.lib.t_render(ctypes.byref(desc), chat['style'], None, 0)
        if n < 0: return n
        out = (ctypes.c_int32 * n)()
        self.lib.t_render(ctypes.byref(desc), chat['style'], out, n)
        return out[:]

    def decode(self, ids):
        out = []
        for i in ids:
            if i not in self.texts:
                buf = ctypes.create_string_buffer(4096)
                n = self.lib.t_bytes(i, buf)
                self.texts[i] = buf.raw[:n]
            out.append(self.texts[i])
        return b''.join(out)


def corpus():
    """Text and code that every Python has."""
    parts = []
    for name in ('argparse', 'asyncio.tasks', 'decimal', 'difflib', 'json.decoder', 'statistics', 'this', 'typing', 'unittest.mock'):
        path = os.path.join(os.path.dirname(os.__file__), name.replace('.', '/') + '.py')
        if os.path.exists(path): parts.append(open(path, encoding='utf8').read())
    return '\n'.join(parts)


def load_model(directory):
    spec = json.load(open(os.path.join(directory, 'tokenizer.json'), encoding='utf8'))
    config = json.load(open(os.path.join(directory, 'tokenizer_config.json'), encoding='utf8'))
    return Reference(spec, config['chat_template']), open(os.path.join(directory, 'tokenizer.json'), 'rb').read()


def long_strings():
    r = random.Random(5)
    letters = 'abcdefghijklmnopqrstuvwxyz'
    yield ''.join(r.choice(letters) for _ in range(1 << 20))            # a megabyte without a space
    yield 'a' * 100000
    yield ' ' * 100000 + 'x'
    yield '\n' * 50000 + ' ' * 50000
    yield 'e' + '\u0301\u0323' * 30000                                  # marks to be put in order
    yield '\u4e2d\u6587' * 50000
    yield '=' * 70000 + '\n'
    yield '\U0001f600' * 20000
    yield '1' * 50000
    for context in ("x'%sl", "'%s ", " %s1", "a%s\u0301b", "'l%s", "\n%s\n", "%s%s", "'v%sx", "\u1100%s\u11a8"):
        for base in range(0, 0x110000, 0x4000):                         # every character, in contexts that matter
            chars = [chr(c) for c in range(base, base + 0x4000) if not 0xD800 <= c < 0xE000]
            if chars: yield ' . '.join(context.replace('%s', c) for c in chars)


def compare(directory, count):
    reference, raw = load_model(directory)
    with tempfile.TemporaryDirectory() as where:
        ours = Ours(where)
        ours.load(raw)
        strings = Strings(1, list(reference.added), corpus())
        bad = total = 0

        def check(kind, want, got, what):
            nonlocal bad, total
            total += 1
            if want == got: return
            bad += 1
            if bad < 20: print('%s differs: %s\n  want %s\n  got  %s' % (kind, ascii(what)[:600], want[:60], got[:60] if isinstance(got, list) else got))

        for i in range(count):
            data = strings.next()
            special = i % 4 == 0
            got = ours.encode(data, special)
            check('encode', reference.encode(data, special), got, data)
            text = data.decode('utf-8', 'replace')
            if not special and text.isascii(): check('decode', text.encode(), ours.decode(got), data)
            elif not special and reference.full.normalizer.normalize_str(text) == text: check('decode', text.encode(), ours.decode(got), data)
        print('%d strings: %d differences' % (count, bad))
        for n, text in enumerate(long_strings()): check('long', reference.encode(text.encode()), ours.encode(text.encode()), text)
        print('%d long strings: %d differences in all' % (n + 1, bad))
        for _ in range(count // 40):
            chat = conversation(strings)
            check('chat', reference.render(chat), ours.render(chat), chat)
        print('%d conversations: %d differences in all, of %d comparisons' % (count // 40, bad, total))
        return 1 if bad else 0


def bench(directory):
    reference, raw = load_model(directory)
    english = ' '.join(corpus().split('"""')[1::2])                    # the prose: docstrings
    texts = {'english': english, 'code': corpus(), 'chinese': '\u4e2d\u6587\u6587\u672c\u7684\u5206\u8bcd\u901f\u5ea6\uff0c\u6d4b\u8bd5\u4e00\u4e0b\u3002\u4eba\u5de5\u667a\u80fd\u7684\u53d1\u5c55\u5f88\u5feb\u3002' * 8000,
             'russian, decomposed': unicodedata.normalize('NFD', '\u0421\u044a\u0435\u0448\u044c \u0435\u0449\u0451 \u044d\u0442\u0438\u0445 \u043c\u044f\u0433\u043a\u0438\u0445 \u0444\u0440\u0430\u043d\u0446\u0443\u0437\u0441\u043a\u0438\u0445 \u0431\u0443\u043b\u043e\u043a, \u0434\u0430 \u0432\u044b\u043f\u0435\u0439 \u0447\u0430\u044e. ' * 8000)}
    with tempfile.TemporaryDirectory() as where:
        ours = Ours(where)
        best = 9e9
        for _ in range(5):
            start = time.perf_counter()
            ours.load(raw)
            best = min(best, time.perf_counter() - start)
            ours.lib.t_free()
        ours.load(raw)
        start = time.perf_counter()
        Tokenizer.from_str(raw.decode())
        print('load %d bytes: %.0f ms; Hugging Face %.0f ms' % (len(raw), 1e3 * best, 1e3 * (time.perf_counter() - start)))
        for name, text in texts.items():
            text = (text * (4000000 // len(text.encode()) + 1))
            data = text.encode()
            out, speed = (ctypes.c_int32 * len(data))(), {}
            batch = [text[i:i + 20000] for i in range(0, len(text), 20000)]
            for _ in range(3):
                for kind, f in (('ours', lambda: ours.lib.t_encode(data, len(data), 0, out, len(out))),
                                ('encode', lambda: reference.plain.encode(text, add_special_tokens=False)),
                                ('encode_batch', lambda: reference.plain.encode_batch(batch, add_special_tokens=False))):
                    start = time.perf_counter()
                    f()
                    speed[kind] = max(speed.get(kind, 0), len(data) / 1e6 / (time.perf_counter() - start))
            print('%-20s %6.1f MB/s; Hugging Face encode %5.2f, encode_batch %5.2f MB/s' % (name, speed['ours'], speed['encode'], speed['encode_batch']))
    return 0


# ---- the small tokenizer and its tests -------------------------------------------------------------------
PROSE = """The library reads a model from a directory and answers questions about it. Every test is small, exact and fast.
It doesn't print, it doesn't exit, and it won't surprise you: we've checked that, they'll check it, and I'd check it again.
What is the capital of France? The capital of France is Paris. How many people live there? About two million people live there.
Please write a short story about a dragon who keeps a shop at the edge of the forest and sells maps of places nobody has seen.
The weather in London is 12 degrees with light rain; tomorrow it will be 15 degrees and sunny. Temperatures: 12.5, 13.75, 100%.
def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(add(i, i * 2))  # twice\n
int main(int argc, char **argv) {\n\tif (argc > 1) puts(argv[1]);\n\treturn 0;\n}\n\n
{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}\n{"type": "function", "function": {"name": "search"}}
# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures
assistant\nuser\nsystem\nThink about it first, step by step. Okay, the user asks about the weather. Let me think.\n\n
Das schnelle Flugzeug \u00fcberquert die Stra\u00dfe, w\u00e4hrend M\u00e4dchen \u00fcber die Br\u00fccke gehen und \u00c4pfel essen.
Voil\u00e0 l'\u00e9t\u00e9 o\u00f9 les gar\u00e7ons d\u00e9j\u00e0 fatigu\u00e9s ont mang\u00e9 des cr\u00eapes pr\u00e8s de la for\u00eat.
\u0411\u044b\u0441\u0442\u0440\u044b\u0439 \u043f\u0451\u0441 \u0431\u0435\u0436\u0438\u0442 \u043f\u043e \u0443\u043b\u0438\u0446\u0435, \u0430 \u043a\u043e\u0448\u043a\u0430 \u0441\u043f\u0438\u0442 \u0434\u043e\u043c\u0430.
\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u6563\u6b65\u5427\u3002\u4f60\u597d\uff0c\u4e16\u754c\uff01\u4f60\u597d\u5417\uff1f
\u4eca\u65e5\u306f\u3068\u3066\u3082\u3044\u3044\u5929\u6c17\u3067\u3059\u306d\u3002\u3053\u3093\u306b\u3061\u306f\u3001\u4e16\u754c\u3002
\uc548\ub155\ud558\uc138\uc694, \uc138\uacc4! \uc624\ub298\uc740 \ub0a0\uc528\uac00 \uc88b\ub124\uc694.
\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645. \u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e\u0964 \U0001f600\U0001f680\U0001f600 \u2014 \u201cquoted\u201d \u2026"""


def small_spec(big):
    """A tokenizer like the real one, with a vocabulary of 1,400 and one more added token."""
    r = random.Random(7)
    lines = PROSE.replace('\\n', '\n').split('\n')
    words = PROSE.split()
    text = lines * 3 + [' '.join(r.choices(words, k=12)) for _ in range(600)]
    spec = dict(big, added_tokens=[])
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.model = models.BPE()
    tokenizer.train_from_iterator(['\n'.join(text)], trainers.BpeTrainer(
        vocab_size=1400, show_progress=False, initial_alphabet=sorted(c for c in big['model']['vocab'] if len(c) == 1)))
    trained = json.loads(tokenizer.to_str())['model']
    spec['model'] = dict(big['model'], vocab=trained['vocab'], merges=[list(m) if isinstance(m, list) else m.split(' ') for m in trained['merges']])
    first = len(trained['vocab'])
    spec['added_tokens'] = [dict(t, id=first + i) for i, t in enumerate(big['added_tokens'])]
    spec['added_tokens'].append(dict(spec['added_tokens'][-1], id=first + len(big['added_tokens']), content='<norm\u00e9>', normalized=True))
    return spec


def escaped(data):
    """Text for a line of a test file: only what would break the line, or is not UTF-8, is escaped."""
    out = []
    for c in data.decode('utf-8', 'surrogateescape'):
        o = ord(c)
        if 0xDC80 <= o < 0xDD00: out.append('\\x%02X' % (o - 0xDC00))
        elif c == '\\' or o < 32 or o == 127: out.append('\\x%02X' % o)
        else: out.append(c)
    return ''.join(out)


def write(directory):
    reference, _ = load_model(directory)
    config = json.load(open(os.path.join(directory, 'tokenizer_config.json'), encoding='utf8'))
    spec = small_spec(reference.spec)
    small = Reference(spec, config['chat_template'])
    strings = Strings(3, list(small.added), PROSE)
    os.makedirs(DATA, exist_ok=True)

    def save(name, text): open(os.path.join(DATA, name), 'w', encoding='utf8', newline='\n').write(text)

    save('tokenizer.json', json.dumps(spec, ensure_ascii=False, separators=(',', ':')))
    lines, cases = [], []
    while len(cases) < 420:
        data = strings.next()
        if len(data) <= 160: cases.append((len(cases) % 4 == 0, 1, data))
    cases += [(False, n, unit.encode()) for n, unit in (
        (100000, 'a'), (30000, ' '), (30000, '\n'), (50000, 'ab'), (20000, '\u0301\u0323'), (30000, '\u4e2d\u6587'), (20000, '7'),
        (1 << 16, 'thequickbrownfox'), (10000, '\U0001f600'), (5000, "it's"), (20000, '='), (9000, 'e\u0301\u0323'))]
    cases += [(True, 3000, b'<think>x</think>'), (True, 20000, b'<|im_'), (True, 3, 'a<norme\u0301>b<norm\u00e9>'.encode()),
              (False, 1, '<norm\u00e9>'.encode())]
    for special, repeat, data in cases:
        ids = small.encode(data * repeat, special)
        h = 0
        for i in ids: h = (h * 31 + i + 1) % (1 << 32)
        lines.append('%d\t%d\t%s\t%s' % (special, repeat, escaped(data), ' '.join(map(str, ids)) if repeat == 1 else '#%d %d' % (len(ids), h)))
    save('strings.txt', '\n'.join(lines) + '\n')
    lines = []
    for _ in range(100):
        chat = conversation(strings, .3)
        if len(small.rendered(chat)) > 1300: continue
        lines.append('c%d %d' % (chat['style'], chat['flags']))
        lines += ['t' + escaped(t.encode()) for t in chat['tools']]
        for m in chat['messages']:
            lines.append('%d%s' % (m['role'], escaped(m['text'].encode())))
            if m.get('reasoning') is not None: lines.append('r' + escaped(m['reasoning'].encode()))
            lines += ['k' + escaped(n.encode()) + '\t' + escaped(a.encode()) for n, a in m.get('calls', [])]
        lines.append('=' + ' '.join(map(str, small.render(chat))))
    save('chats.txt', '\n'.join(lines) + '\n')
    return 0


if __name__ == '__main__':
    if sys.argv[1:2] == ['write'] and len(sys.argv) > 2: sys.exit(write(sys.argv[2]))
    if sys.argv[1:2] == ['compare'] and len(sys.argv) > 2: sys.exit(compare(sys.argv[2], int((sys.argv + ['20000'])[3])))
    if sys.argv[1:2] == ['bench'] and len(sys.argv) > 2: sys.exit(bench(sys.argv[2]))
    sys.exit(__doc__)
