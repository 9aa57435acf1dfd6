#!/usr/bin/env python3
"""Cases for grammar_bench, and the sum of its results.
usage: grammar_cases.py SCHEMAS.jsonl > cases;   grammar_bench MODEL < cases > results;   grammar_cases.py SCHEMAS.jsonl results
       grammar_bench MODEL 20 < cases > texts;   grammar_cases.py SCHEMAS.jsonl texts --judge     (pip install jsonschema)
A line of SCHEMAS has name, schema, and tests with valid and data; each text is tried compact and with indentation."""
import collections, json, re, sys

STYLES = dict(separators=(',', ':')), dict(indent=4)


def dump(value, **style):
    return json.dumps(value, ensure_ascii=False, **style).encode('utf-8', 'surrogatepass')


def cases_of(row):
    """The schema, then each of its texts."""
    schema = dump(row['schema'])
    yield b'S %d\n%s\n' % (len(schema), schema)
    for test in row['tests']:
        for style in STYLES:
            text = dump(test['data'], **style)
            yield b'T %d %d\n%s\n' % (test['valid'], len(text), text)


def summary(values):
    values = sorted(values)
    at = lambda share: values[min(len(values) - 1, int(len(values) * share))]
    return 'mean %.1f, median %.1f, 99%% %.1f, most %.1f us' % (sum(values) / len(values), at(.5), at(.99), values[-1])


def score(rows, lines):
    masks, compiles, results, count = [], [], [], collections.Counter()
    for line in lines:
        words = line.split()
        if words[:1] in (['C'], ['E']):
            compiles.append(float(words[1]))
            results.append((words[0], [], line))
        elif words[:1] == ['M']:
            masks += map(float, words[1:])
        elif words[:1] == ['R']:
            results[-1][1].append(words[1] == '1')
        elif words[:1] == ['X']:
            count['mask and machine disagree'] += 1
    for row, (kind, accepted, line) in zip(rows, results):
        wanted = [test['valid'] for test in row['tests'] for _ in STYLES]
        count['schemas refused'] += kind == 'E'
        count['passed'] += kind == 'C' and accepted == wanted
        if kind == 'C':
            count['valid refused'] += sum(w and not a for w, a in zip(wanted, accepted))
            count['invalid accepted'] += sum(a and not w for w, a in zip(wanted, accepted))
        else:
            print(row['name'], line.strip())
    print(len(rows), 'schemas:', dict(count))
    print(len(masks), 'masks:', summary(masks))
    print('compiling:', summary(compiles))


class Ecma:
    """Expressions as schemas mean them: $ is the end, and not, as in Python, before a newline at the end, too."""
    @staticmethod
    def search(pattern, text):
        return re.search(re.sub(r'(\\.|\[(?:\\.|[^]])*])|\$', lambda m: m[1] or r'\Z', pattern), text)


def judge(rows, data):
    import jsonschema
    jsonschema._keywords.re = jsonschema._utils.re = Ecma
    count, at, rows = collections.Counter(), 0, iter(rows)
    while at < len(data):
        end = data.index(b'\n', at)
        words, at = data[at:end].split(), end + 1
        if words[0] in (b'C', b'E'):
            row = next(rows)
            kind = jsonschema.validators.validator_for(row['schema'], default=jsonschema.Draft202012Validator)
            validator = kind(row['schema'], format_checker=kind.FORMAT_CHECKER)
        elif words[0] == b'G':
            text, at = data[at:at + int(words[3])], at + int(words[3]) + 1
            try:
                error = next(validator.iter_errors(json.loads(text)), None) if words[1] == b'1' else 'has no end'
                count['invalid' if error else 'valid'] += 1
            except json.JSONDecodeError as e:
                error = e
                count['does not parse'] += 1
            except Exception:
                error = None
                count['the judge fails'] += 1
            if error:
                print(row['name'], str(error)[:100], text[:100])
        else:
            count['dead ends'] += 1
    print(dict(count))


def main():
    rows = [json.loads(line) for line in open(sys.argv[1])]
    if len(sys.argv) == 2:
        for row in rows:
            sys.stdout.buffer.writelines(cases_of(row))
    elif '--judge' in sys.argv:
        judge(rows, open(sys.argv[2], 'rb').read())
    else:
        score(rows, open(sys.argv[2], errors='replace'))


if __name__ == '__main__':
    main()
