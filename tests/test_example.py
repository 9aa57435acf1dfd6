#!/usr/bin/env python3
"""The chat program: in a pipe, and in a terminal where Ctrl-C is pressed. usage: tests/test_example.py [PROGRAM]"""
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import tempfile
import time
import unittest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DEMO = os.path.join(ROOT, 'demo')
PROGRAM = os.path.abspath(sys.argv.pop(1) if len(sys.argv) > 1 else os.path.join(ROOT, 'example'))
TOOL = '{"type": "function", "function": {"name": "buy", "parameters": {"type": "object", "properties": {}}}}'


class Terminal:
    """The program in a pseudo-terminal; what it has printed so far is in self.seen."""

    def __init__(self, *arguments):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(PROGRAM, [PROGRAM, *arguments])
        self.seen = b''

    def read(self, seconds):
        ready, _, _ = select.select([self.fd], [], [], seconds)
        try:
            part = os.read(self.fd, 65536) if ready else b''
        except OSError:                                 # it has ended
            part = b''
        self.seen += part
        return part

    def wait_for(self, text, count=1, seconds=60):
        end = time.monotonic() + seconds
        while self.seen.count(text) < count:
            left = end - time.monotonic()
            if left < 0 or (not self.read(left) and left > 0.1 and self.ended()):
                raise AssertionError(f'{text!r} did not come {count} times: {self.seen!r}')

    def ended(self):
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def type(self, text):
        os.write(self.fd, text)

    def status(self):
        while self.read(10):
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class ExampleTest(unittest.TestCase):
    def setUp(self):
        self.dir = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.dir)

    def path(self, name, text=None):
        path = os.path.join(self.dir, name)
        if text is not None:
            with open(path, 'w', encoding='utf-8') as file:
                file.write(text)
        return path

    def model(self, edit, name):
        """The demo with one of its JSON files edited."""
        model = self.path('model')
        shutil.copytree(DEMO, model)
        with open(os.path.join(model, name), encoding='utf-8') as file:
            data = json.load(file)
        edit(data)
        with open(os.path.join(model, name), 'w', encoding='utf-8') as file:
            json.dump(data, file)
        return model

    def talk(self, text, *arguments, model=DEMO, status=0):
        run = subprocess.run([PROGRAM, model, '--cpu', *arguments], input=text.encode(), capture_output=True, timeout=120)
        self.assertEqual(run.returncode, status, run)
        return run.stdout.decode(), run.stderr.decode()

    def test_guesses(self):
        """The same answer, whoever guesses it."""
        said = [subprocess.run([PROGRAM, DEMO, '-s', '@' + os.path.join(DEMO, 'system.txt'), '--cpu', '--temp', '0', *draft,
                                '-p', 'I want two ropes and a brass lamp.'], capture_output=True, check=True).stdout
                for draft in ([], ['--draft', 'lookup'], ['--draft', DEMO])]
        self.assertTrue(said[0] and said[0] == said[1] == said[2])
        wrong = subprocess.run([PROGRAM, DEMO, '--draft', 'nowhere', '-p', 'Hi'], capture_output=True)
        self.assertEqual(wrong.returncode, 1)
        self.assertIn(b'nowhere', wrong.stderr)

    def test_what_was_loaded(self):
        """In a terminal: the type of most weights, the size, bits a weight"""
        small = os.path.join(ROOT, 'tests', 'data', 'gguf', 'small.gguf')
        for model, said in (DEMO, b'BF16, 9 MB (16.00 bits a weight)'), (small, b'Q8_0, 0 MB (8.80 bits a weight)'):
            terminal = Terminal(model, '--cpu')
            terminal.wait_for(said)
            terminal.wait_for(b'> ')
            terminal.type(b'/quit\n')
            self.assertEqual(terminal.status(), 0)

    def test_one_compiler_call_is_enough(self):
        for name in 'example.c', 'qwen3.h':
            shutil.copy(os.path.join(ROOT, name), self.dir)
        subprocess.run(['cc', 'example.c', '-o', 'example', '-lm', '-lpthread'], cwd=self.dir, check=True)
        subprocess.run([self.path('example'), DEMO, '-p', 'hi'], check=True, stdout=subprocess.DEVNULL)

    # ---- in a terminal ------------------------------------------------------------------------------
    def test_ctrl_c_three_times(self):
        """Each stops an answer, which a long prompt delays, and none the program."""
        model = self.model(lambda config: config.update(max_position_embeddings=65536), 'config.json')
        prompt = self.path('prompt', 'The quick brown fox jumps over the lazy dog. ' * 2500)
        chat = Terminal(model, '--cpu', '--threads', '1', '--ctx', '60000', '-s', '@' + prompt)
        for n in 1, 2, 3:
            chat.wait_for(b'\n> ', n)
            chat.type(b'hi\n')
            chat.wait_for(b'hi\r\n', n)
            time.sleep(0.1)
            chat.type(b'\x03')
            chat.wait_for(b'[stopped]', n)
        chat.type(b'\x04')
        self.assertEqual(chat.status(), 0)

    def test_control_characters(self):
        """A model that says ESC instead of a comma: a pipe gets it, a terminal does not."""
        def swap(data):
            vocab = data['model']['vocab']
            vocab[','], vocab['\u011b'] = vocab['\u011b'], vocab[',']       # the byte 27 is written so
        model = self.model(swap, 'tokenizer.json')
        asked = 'what do you sell?', '-s', '@' + os.path.join(DEMO, 'system.txt'), '--no-think', '--temp', '0'
        piped, _ = self.talk('', '-p', *asked, model=model)
        self.assertIn('\x1b', piped)
        chat = Terminal(model, '--cpu', '-p', *asked)
        self.assertEqual(chat.status(), 0)
        self.assertNotIn(b'\x1b', chat.seen.replace(b'\x1b[K', b''))    # that is the end of the progress line
        self.assertIn('\ufffd'.encode(), chat.seen)

    # ---- in a pipe ----------------------------------------------------------------------------------
    def test_full_context(self):
        text = 'word ' * 3000 + '\nhi\nhello\n'
        out, err = self.talk(text, '--no-think', status=3)
        self.assertEqual([bool(line) for line in out.splitlines()], [False, True, True], out)
        self.assertEqual(err.count('example:'), 1, err)
        self.assertIn('/reset', err)

    def test_shift(self):
        """With room for few turns, the oldest go; the system prompt stays."""
        system = '@' + os.path.join(DEMO, 'system.txt')
        text = 'What do you sell?\n' * 20 + 'Who are you?\n'
        _, err = self.talk(text, '-s', system, '--ctx', '320', '--no-think', '--max', '60', status=3)
        self.assertIn('--shift', err)
        out, err = self.talk(text, '-s', system, '--ctx', '320', '--no-think', '--max', '60', '--shift')
        self.assertEqual((len(out.splitlines()), err), (21, ''))
        self.assertIn('Gilded Anchor', out.splitlines()[-1])

    def test_save_and_load(self):
        chat = self.path('chat')
        out, err = self.talk(f'my name is Ada\n/save {chat}\n/reset\n/load {chat}\nwhat is my name?\n', '--no-think')
        self.assertIn('Ada', out.splitlines()[-1])
        self.assertEqual(err, f'saved to {chat}\nloaded {chat}\n')

    def test_load_of_something_else(self):
        chat = self.path('chat')
        self.talk(f'hi\n/save {chat}\n')
        with open(chat, 'rb') as file:
            whole = file.read()
        for bad in b'', b'qwen3', whole[:-1], whole[:100], whole + b'x', b'\0' * 999:
            with open(chat, 'wb') as file:
                file.write(bad)
            out, err = self.talk(f'my name is Ada\n/load {chat}\nwhat is my name?\n', '--no-think', status=3)
            self.assertIn(f'cannot load {chat}', err)
            self.assertIn('Ada', out.splitlines()[-1])

    def test_reasons(self):
        for line, reason in (('/save /no/such/directory/x', 'No such file'), ('/load /no/such/file', 'no such file'),
                             ('/system @/no/such/file', 'No such file')):
            self.assertIn(reason, self.talk(line + '\n', status=3)[1])

    def test_wrong_usage(self):
        for arguments, reason in ((['-s', '@nofile'], 'nofile: No such file'), (['--tools', 'nofile'], 'nofile: No such file'),
                                  (['--temp', '101'], '--temp: a number up to 100, not 101'),
                                  (['--ctx', '-1'], 'not -1'), (['--seed', 'x'], 'not x'), (['--top-p'], 'missing'),
                                  (['--such'], '--such')):
            self.assertIn(reason, self.talk('hi\n', *arguments, status=2)[1])

    def test_unusable_model(self):
        self.assertIn('no/such/model', self.talk('', model='no/such/model', status=1)[1])

    def test_output_that_cannot_be_written(self):
        with open('/dev/full', 'wb') as full:
            run = subprocess.run([PROGRAM, DEMO, '--cpu', '-p', 'hi'], stdout=full, stderr=subprocess.PIPE)
        self.assertEqual(run.returncode, 3)
        self.assertIn(b'cannot write', run.stderr)

    def test_tools(self):
        bad = self.path('bad', TOOL + '\nnot JSON\n')
        self.assertIn('tools[1]', self.talk('hi\n', '--tools', bad, status=3)[1])
        tools = self.path('tools', (TOOL + '\n') * 3)
        out, _ = self.talk('two ropes, please\n', '--tools', tools, '-0', '--no-think')
        self.assertTrue(out.endswith('\0'))
        self.assertIn('/0/parameters/contains', self.talk(
            'hi\n', '--tools', self.path('refused', '{"name": "f", "parameters": {"contains": 1}}'), status=3)[1])
        out, _ = self.talk('', '-s', '@' + DEMO + '/system.txt', '--no-think', '--temp', '0', '--tools', DEMO + '/buy.json',
                           '-p', 'I want three ropes.')
        self.assertEqual(json.loads(out.split('\n')[1]), {'name': 'buy', 'arguments': {'item': 'rope', 'quantity': 3}})

    def test_answers_of_a_grammar(self):
        schema = self.path('schema', '{"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},'
                           '"required": ["n"], "additionalProperties": false}')
        for seed in '123':
            out = self.talk('', '--json-schema', schema, '--seed', seed, '-p', 'hi')[0]
            self.assertIn(json.loads(out)['n'], range(10))
            self.assertRegex(self.talk('', '--regex', 'yes|no', '--seed', seed, '-p', 'hi')[0], '^(yes|no)\n$')
        grammar = self.path('grammar', 'root ::= "<" [a-c]{3} ">"')
        self.assertRegex(self.talk('hi\n', '--grammar', grammar)[0], '^<[abc]{3}>\n$')
        self.assertIn('not closed', self.talk('', '--regex', '(', '-p', 'hi', status=2)[1])
        self.assertIn('nofile: No such file', self.talk('', '--grammar', 'nofile', '-p', 'hi', status=2)[1])


if __name__ == '__main__':
    unittest.main()
