#!/usr/bin/env python3
"""The same schemas and texts through qwen3.h, llguidance and xgrammar: by turns, schema by schema, one thread each.
usage: grammar_compare.py MODEL SCHEMAS.jsonl GRAMMAR_BENCH [EVERY [NAME...]]    pip install llguidance xgrammar tokenizers numpy
A line of SCHEMAS has name, schema, and tests with valid and data. EVERY: only each such line. Prints a table; on the way, too.
Times are the thread's own. A library that crashes, or takes more than LIMIT seconds for a schema, is started again."""
import collections, json, signal, subprocess, sys, time

from grammar_cases import STYLES, cases_of, dump

LIMIT = 60


class Guidance:
    def __init__(self, model):
        import llguidance
        import llguidance.numpy as masks
        self.lib, self.masks = llguidance, masks
        self.tokenizer = llguidance.LLTokenizer(open(model + '/tokenizer.json').read())
        self.mask = masks.allocate_token_bitmask(1, self.tokenizer.vocab_size)

    def compile(self, schema):
        self.matcher = self.lib.LLMatcher(self.tokenizer, self.lib.LLMatcher.grammar_from_json_schema(schema))
        if self.matcher.is_error():
            raise ValueError(self.matcher.get_error())

    def begin(self):
        self.matcher.reset()

    def fill(self):
        self.masks.fill_next_token_bitmask(self.matcher, self.mask, 0)

    def accept(self, token):
        return self.matcher.consume_token(token)

    def ends(self):
        return self.matcher.is_accepting()


class XGrammar:
    def __init__(self, model):
        import xgrammar
        from tokenizers import Tokenizer
        self.lib = xgrammar
        tokenizer = Tokenizer.from_file(model + '/tokenizer.json')
        vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        info = xgrammar.TokenizerInfo([t for t, _ in vocab], vocab_type=xgrammar.VocabType.BYTE_LEVEL, vocab_size=151936,
                                      stop_token_ids=[151645])
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self.mask = xgrammar.allocate_token_bitmask(1, 151936)

    def compile(self, schema):
        grammar = self.compiler.compile_json_schema(schema, any_whitespace=True, strict_mode=False)
        self.matcher = self.lib.GrammarMatcher(grammar, terminate_without_stop_token=False)

    def begin(self):
        self.matcher.reset()

    def fill(self):
        self.matcher.fill_next_token_bitmask(self.mask)

    def accept(self, token):
        return self.matcher.accept_token(token)

    def ends(self):
        return self.matcher.accept_token(151645)


def follow(library, tokens, mask_us):
    import numpy as np
    library.begin()
    for token in tokens:
        start = time.thread_time()
        library.fill()
        mask_us.append(round(1e6 * (time.thread_time() - start), 1))
        if not int(np.asarray(library.mask).reshape(-1)[token >> 5]) >> (token & 31) & 1 or not library.accept(token):
            return False
    return bool(library.ends())


def work(name, model):
    """Schemas from stdin; of each a line: the time of its compilation, those of its masks, and which texts it accepts."""
    from tokenizers import Tokenizer
    encode = Tokenizer.from_file(model + '/tokenizer.json')
    library = {'llguidance': Guidance, 'xgrammar': XGrammar}[name](model)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        row, masks, accepted = json.loads(line), [], []
        schema, start = json.dumps(row['schema']), time.thread_time()
        try:
            library.compile(schema)
        except Exception:
            accepted = None
        us = round(1e6 * (time.thread_time() - start), 1)
        for text in texts_of(row) if accepted is not None else []:
            tokens = encode.encode(text.decode('utf-8', 'replace'), add_special_tokens=False).ids
            try:
                accepted.append(follow(library, tokens, masks))
            except Exception:
                accepted.append(False)
        print(json.dumps([us, masks, accepted]), flush=True)


def texts_of(row):
    return [dump(test['data'], **style) for test in row['tests'] for style in STYLES]


class Worker:
    """A library in a process of its own; run() is None if it died."""
    def __init__(self, name, model, bench):
        self.bench = name == 'qwen3.h'
        self.command = [bench, model] if self.bench else [sys.executable, __file__, '--work', name, model]
        self.process = None

    def tell(self, data):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def read(self):
        return self.process.stdout.readline().split()

    def ask_bench(self, row):
        schema, *texts = cases_of(row)
        self.tell(schema)
        words, masks, accepted = self.read(), [], []
        if words[0] == b'E':
            return float(words[1]), masks, None
        us = float(words[1])
        for text in texts:
            self.tell(text)
            words = self.read()
            while words[0] != b'R':
                masks += map(float, words[1:] if words[0] == b'M' else ())
                words = self.read()
            accepted.append(words[1] == b'1')
        return us, masks, accepted

    def run(self, row):
        if not self.process:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            if self.bench:
                return self.ask_bench(row)
            self.tell(json.dumps(row).encode() + b'\n')
            return json.loads(self.process.stdout.readline())
        except (OSError, IndexError, ValueError):
            self.process.kill()
            self.process = None


class Total:
    def __init__(self):
        self.count, self.masks, self.compiles = collections.Counter(), collections.Counter(), []

    def add(self, row, result):
        self.count['schemas'] += 1
        if not result:
            self.count['died'] += 1
            return
        us, masks, accepted = result
        self.compiles.append(us)
        self.masks.update(masks)
        if accepted is None:
            return
        self.count['compile'] += 1
        wanted = [test['valid'] for test in row['tests'] for _ in STYLES]
        self.count['passing'] += accepted == wanted
        self.count['valid refused'] += sum(w and not a for w, a in zip(wanted, accepted))
        self.count['invalid accepted'] += sum(a and not w for w, a in zip(wanted, accepted))

    def row(self, name):
        n, count, at, left = sum(self.masks.values()), self.count, {}, 0
        for us in sorted(self.masks):
            left += self.masks[us]
            if left > n * .99:
                at.setdefault('99', us)
        mean = sum(us * times for us, times in self.masks.items()) / max(n, 1)
        compiles = sorted(self.compiles) or [0]
        part = lambda share: compiles[min(len(compiles) - 1, int(len(compiles) * share))] / 1000
        return '| %s | %d | %d | %d | %d | %d | %d | %d | %.1f us | %.0f us | %.1f ms | %.2f ms | %.1f ms | %.0f ms |' % (
            name, count['schemas'], count['died'], count['compile'], count['passing'], count['invalid accepted'],
            count['valid refused'], n, mean, at.get('99', 0), max(self.masks or [0]) / 1000, part(.5), part(.99), part(1))


HEAD = ('| | schemas | died | compile | passing | invalid accepted | valid refused | masks | mean | 99 % | largest '
        '| compile median | 99 % | longest |\n|' + '---|' * 14)


def main():
    if sys.argv[1] == '--work':
        return work(*sys.argv[2:4])
    model, path, bench = sys.argv[1:4]
    every = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    names = sys.argv[5:] or ['qwen3.h', 'llguidance', 'xgrammar']
    workers = {name: Worker(name, model, bench) for name in names}
    totals = {name: Total() for name in names}
    table = lambda: '\n'.join([HEAD] + [totals[name].row(name) for name in names])
    for i, line in enumerate(open(path)):
        if i % every:
            continue
        row = json.loads(line)
        for name in names:
            totals[name].add(row, workers[name].run(row))
        if totals[names[0]].count['schemas'] % 500 == 0:
            print(table(), flush=True, file=sys.stderr)
    print(table())


main()
