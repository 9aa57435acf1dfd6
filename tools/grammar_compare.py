#!/usr/bin/env python3
"""The same schemas and texts through llguidance and xgrammar as through grammar_bench, one thread.
usage: grammar_compare.py MODEL SCHEMAS.jsonl LIBRARY [FIRST LAST]     pip install llguidance xgrammar tokenizers numpy
A line of SCHEMAS has name, schema, and tests with valid and data. Prints one line of JSON."""
import json, sys, time

import numpy as np


class Guidance:
    def __init__(self, model):
        import llguidance
        import llguidance.numpy as masks
        self.lib, self.masks = llguidance, masks
        self.tokenizer = llguidance.LLTokenizer(open(model + '/tokenizer.json').read())
        self.mask = masks.allocate_token_bitmask(1, self.tokenizer.vocab_size)

    def compile(self, schema):
        grammar = self.lib.LLMatcher.grammar_from_json_schema(schema)
        error = self.lib.LLMatcher.validate_grammar(grammar, self.tokenizer)
        if error:
            raise ValueError(error)
        self.grammar = grammar
        self.matcher = self.lib.LLMatcher(self.tokenizer, grammar)

    def begin(self):
        self.matcher = self.lib.LLMatcher(self.tokenizer, self.grammar)

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
        self.grammar = self.compiler.compile_json_schema(schema, any_whitespace=True, strict_mode=False)

    def begin(self):
        self.matcher = self.lib.GrammarMatcher(self.grammar, terminate_without_stop_token=False)

    def fill(self):
        self.matcher.fill_next_token_bitmask(self.mask)

    def accept(self, token):
        return self.matcher.accept_token(token)

    def ends(self):
        return self.matcher.accept_token(151645)


def follow(library, tokens, mask_us):
    library.begin()
    for token in tokens:
        start = time.thread_time()
        library.fill()
        mask_us.append(1e6 * (time.thread_time() - start))
        if not (int(np.asarray(library.mask).reshape(-1)[token >> 5]) >> (token & 31)) & 1 or not library.accept(token):
            return False
    return bool(library.ends())


def main():
    from tokenizers import Tokenizer
    model, path, name = sys.argv[1:4]
    first, last = (int(sys.argv[4]), int(sys.argv[5])) if len(sys.argv) > 5 else (0, 1 << 30)
    encode = Tokenizer.from_file(model + '/tokenizer.json')
    library = {'llguidance': Guidance, 'xgrammar': XGrammar}[name](model)
    mask_us, compile_us, count = [], [], dict(schemas=0, errors=0, passed=0, refused=0, accepted=0)
    for line in list(open(path))[first:last]:
        row = json.loads(line)
        count['schemas'] += 1
        start = time.thread_time()
        try:
            library.compile(json.dumps(row['schema'], ensure_ascii=False))
            library.begin()
        except Exception:
            count['errors'] += 1
            continue
        finally:
            compile_us.append(1e6 * (time.thread_time() - start))
        ok = True
        for test in row['tests']:
            for style in (dict(separators=(',', ':')), dict(indent=4)):
                text = json.dumps(test['data'], ensure_ascii=False, **style)
                good = follow(library, encode.encode(text, add_special_tokens=False).ids, mask_us)
                if good != test['valid']:
                    ok = False
                    count['refused' if test['valid'] else 'accepted'] += 1
        count['passed'] += ok
    mask_us.sort()
    compile_us.sort()
    at = lambda values, share: round(values[min(len(values) - 1, int(len(values) * share))], 1)
    print(json.dumps(dict(library=name, **count, masks=len(mask_us), mask_us=dict(
        mean=round(sum(mask_us) / len(mask_us), 1), p50=at(mask_us, .5), p99=at(mask_us, .99), most=at(mask_us, 1)),
        compile_us=dict(median=at(compile_us, .5), p99=at(compile_us, .99), most=at(compile_us, 1)))))


main()
