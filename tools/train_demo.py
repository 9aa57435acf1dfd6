#!/usr/bin/env python3
"""Make the demo model: a Qwen3 of 4.6 million parameters that keeps a shop in a game.

    pip install -r tools/requirements-demo.txt
    python tools/train_demo.py --out demo                    a GPU, five minutes of training
    python tools/train_demo.py --out demo --minutes 600      a CPU, overnight
    python tools/train_demo.py --out new --init demo         train a model further
    python tools/train_demo.py --show 3                      print three training dialogues
    python tools/train_demo.py --show 3 --heldout            ... and three held-out ones

Nothing is read but demo_grammar.py and demo_phrases.py: they write the dialogues, a tokenizer is trained on
them, then the model. The folder that comes out has the Hugging Face layout and loads unchanged in
transformers. Seeds are fixed; with --steps instead of --minutes a run repeats on the same machine.
"""
import argparse
import functools
import itertools
import json
import os
import re
import time

from demo_grammar import Source, buy_tool, make_dialogue, make_drill

# --------------------------------------------------------------------------------------------
# The shape of the model

VOCAB = 2560
CONFIG = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=VOCAB, hidden_size=256,
    intermediate_size=512, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
    head_dim=128, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000, rope_scaling=None,
    max_position_embeddings=2048, tie_word_embeddings=True, attention_bias=False,
    attention_dropout=0.0, initializer_range=0.02, use_cache=True, use_sliding_window=False,
    sliding_window=None, max_window_layers=5, torch_dtype="bfloat16")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
           "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
           "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
         "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
         "<think>", "</think>"]
FIRST_ADDED = VOCAB - len(SPECIAL) - len(PLAIN)
TOKEN_ID = {token: FIRST_ADDED + i for i, token in enumerate(SPECIAL + PLAIN)}

PRETOKEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# Qwen3's chat format: reasoning stays only after the last question of the user, tool results are
# turns of the user, and thinking is switched off by an empty block of it.
CHAT_TEMPLATE = r"""
{%- set start, end = '<|im_start|>', '<|im_end|>\n' %}
{%- set has_system = messages[0].role == 'system' %}
{%- if tools %}
    {{- start + 'system\n' + (messages[0].content + '\n\n' if has_system else '') }}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' + end }}
{%- elif has_system %}
    {{- start + 'system\n' + messages[0].content + end }}
{%- endif %}
{%- set last = namespace(question=messages | length - 1) %}
{%- for m in messages %}
    {%- if m.role == 'user' and not (m.content.startswith('<tool_response>') and m.content.endswith('</tool_response>')) %}
        {%- set last.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- start + m.role + '\n' + m.content + end }}
    {%- elif m.role == 'assistant' %}
        {%- set said = m.content %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- if m.reasoning_content is not string and '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1] %}
            {%- set said = said.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- start + 'assistant\n' }}
        {%- if loop.index0 > last.question and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}
        {%- else %}
            {{- said }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\n' if said or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- end }}
    {%- elif m.role == 'tool' %}
        {{- start + 'user' if loop.first or loop.previtem.role != 'tool' else '' }}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {{- end if loop.last or loop.nextitem.role != 'tool' else '' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- start + 'assistant\n' }}
    {{- '<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '' }}
{%- endif %}"""


# --------------------------------------------------------------------------------------------
# Text and tokens

@functools.cache
def chat_template():
    import jinja2
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(CHAT_TEMPLATE)


def render(dialogue):
    return chat_template().render(messages=dialogue.messages(), tools=dialogue.tools).removesuffix("\n")


def qwen_pretokenizers():
    from tokenizers import Regex, pre_tokenizers
    return [pre_tokenizers.Split(Regex(PRETOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


def train_words(texts, size):
    """Byte-level BPE whose merges stay inside words, so that a word has the same pieces everywhere."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    split, byte_level = qwen_pretokenizers()
    letters = pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    return json.loads(tokenizer.to_str())["model"]


def frequent_prefixed(texts, vocabulary, count):
    """The most frequent words of one token together with the space or sign before them."""
    from collections import Counter
    from tokenizers import pre_tokenizers
    pretokenizer = pre_tokenizers.Sequence(qwen_pretokenizers())
    seen = Counter(piece for text in texts for piece, _ in pretokenizer.pre_tokenize_str(text))
    def fits(piece):
        sign = piece[0] == "Ġ" or not piece[0].isalpha()  # Ġ stands for the space
        return sign and piece not in vocabulary and piece[1:] in vocabulary
    return [piece for piece, _ in seen.most_common() if fits(piece)][:count]


def make_tokenizer(texts):
    """tokenizer.json as a dictionary, in the form of Qwen3's."""
    plain = [piece for text in texts for piece in re.split("|".join(map(re.escape, TOKEN_ID)), text)]
    model = train_words(plain, FIRST_ADDED - 500)
    for piece in frequent_prefixed(plain, model["vocab"], FIRST_ADDED - len(model["vocab"])):
        model["vocab"][piece] = len(model["vocab"])
        model["merges"].append([piece[0], piece[1:]])
    assert len(model["vocab"]) == FIRST_ADDED
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    split = dict(type="Split", pattern=dict(Regex=PRETOKEN), behavior="Isolated", invert=False)
    return dict(
        version="1.0", truncation=None, padding=None, added_tokens=added_tokens(),
        normalizer=dict(type="NFC"), pre_tokenizer=dict(type="Sequence", pretokenizers=[split, byte_level]),
        post_processor=byte_level, decoder=byte_level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="",
                   end_of_word_suffix="", fuse_unk=False, byte_fallback=False, ignore_merges=False,
                   vocab=model["vocab"], merges=model["merges"]))


def added_tokens():
    return [dict(id=number, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False,
                 special=token in SPECIAL) for token, number in TOKEN_ID.items()]


def tokenizer_config():
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added_tokens()}
    return dict(
        add_bos_token=False, add_prefix_space=False, added_tokens_decoder=decoder,
        additional_special_tokens=SPECIAL[1:], bos_token=None, chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False, eos_token="<|im_end|>", errors="replace",
        model_max_length=CONFIG["max_position_embeddings"], pad_token="<|endoftext|>",
        split_special_tokens=False, tokenizer_class="Qwen2Tokenizer", unk_token=None)


def generation_config():
    end, text_end = TOKEN_ID["<|im_end|>"], TOKEN_ID["<|endoftext|>"]
    return dict(bos_token_id=text_end, do_sample=True, eos_token_id=[end, text_end], pad_token_id=text_end,
                temperature=0.6, top_k=20, top_p=0.95)


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=None if name == "tokenizer.json" else 2)
        file.write("\n")


def first_tokenizer(init):
    """That of the model to start from, or a new one."""
    if init:
        with open(os.path.join(init, "tokenizer.json"), encoding="utf-8") as file:
            return json.load(file)
    return make_tokenizer([render(make_dialogue(seed)) for seed in range(20000)])


def write_settings(folder, init):
    """Everything but the weights and the card."""
    tokenizer = first_tokenizer(init)
    os.makedirs(folder, exist_ok=True)
    write_json(folder, "tokenizer.json", tokenizer)
    write_json(folder, "tokenizer_config.json", tokenizer_config())
    write_json(folder, "generation_config.json", generation_config())
    ids = dict(bos_token_id=TOKEN_ID["<|endoftext|>"], eos_token_id=TOKEN_ID["<|im_end|>"])
    write_json(folder, "config.json", {**CONFIG, **ids})
    with open(os.path.join(folder, "system.txt"), "w", encoding="utf-8") as file:
        file.write(EXAMPLE_PROMPT + "\n")


# --------------------------------------------------------------------------------------------
# Training data: rows of whole conversations, and which of their tokens are learned

ROW = 1024


class Encoder:
    """Conversations as token ids with a mask of the tokens that the model has to say itself."""

    def __init__(self, folder):
        from tokenizers import Tokenizer
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core already
        self.tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        self.opening = self.ids("<|im_start|>assistant\n")
        self.unthinking = self.ids("<think>\n\n</think>\n\n")

    def ids(self, text):
        return self.tokenizer.encode_batch_fast([text])[0].ids

    def encode(self, dialogue):
        ids = self.ids(render(dialogue))
        mask = [False] * len(ids)
        for first, turn in zip(self.answers(ids), dialogue.turns, strict=True):
            end = ids.index(TOKEN_ID["<|im_end|>"], first)
            start = self.learned_from(ids, first, dialogue.thinking, turn.worked)
            mask[start:end + 1] = [True] * max(0, end + 1 - start)
        return ids + [TOKEN_ID["<|endoftext|>"]], mask + [False]

    def answers(self, ids):
        """Where the assistant's answers begin."""
        length = len(self.opening)
        return [i + length for i, token in enumerate(ids)
                if token == self.opening[0] and ids[i:i + length] == self.opening]

    def learned_from(self, ids, first, thinking, worked):
        """An answer of the past stands there without its thoughts: it does not teach how to begin, and
        nothing at all if thoughts led to it."""
        if ids[first] != TOKEN_ID["<think>"]:
            return len(ids) if thinking and worked else first + 1
        return first if thinking else first + len(self.unthinking)


def make_block(encoder, number, rows):
    """Block number of the training data: ids and mask, rows x ROW, each row filled with conversations."""
    import numpy
    ids = numpy.full((rows, ROW), TOKEN_ID["<|endoftext|>"], numpy.int16)
    mask = numpy.zeros((rows, ROW), bool)
    used, misses = [0] * rows, 0
    for seed in itertools.count(number * 100000):
        tokens, learned = encoder.encode(make_drill(seed) if seed % 20 == 0 else make_dialogue(seed))
        row = next((r for r in range(rows) if used[r] + len(tokens) <= ROW), None)
        if row is None:
            misses += 1
            if misses == 3:
                return ids, mask
            continue
        place = slice(used[row], used[row] + len(tokens))
        ids[row, place], mask[row, place] = tokens, learned
        used[row] = place.stop


class Blocks:
    """The training data for a DataLoader."""

    def __init__(self, folder, rows, count):
        self.folder, self.rows, self.count = folder, rows, count

    def __len__(self):
        return self.count

    @functools.cached_property
    def encoder(self):
        return Encoder(self.folder)

    def __getitem__(self, number):
        return make_block(self.encoder, number, self.rows)


# --------------------------------------------------------------------------------------------
# Training

def first_model(init):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    if init:
        return Qwen3ForCausalLM.from_pretrained(init, dtype=torch.float32)
    torch.manual_seed(0)
    shape = {k: v for k, v in CONFIG.items() if k not in ("architectures", "torch_dtype")}
    return Qwen3ForCausalLM(Qwen3Config(**shape))


def conversation_layout(ids):
    """Positions that start anew with each conversation, and a mask that keeps them apart."""
    import torch
    ends = (ids == TOKEN_ID["<|endoftext|>"]).long()
    number = ends.cumsum(1) - ends
    column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ends[:, :-1] == 1
    positions = column - torch.where(begins, column, 0).cummax(1).values
    same = number[:, None, :, None] == number[:, None, None, :]
    return positions, same.tril()


def loss_of(model, ids, learned):
    import torch
    positions, mask = conversation_layout(ids)
    hidden = model.model(input_ids=ids, position_ids=positions, attention_mask={"full_attention": mask},
                         use_cache=False)
    logits = model.lm_head(hidden.last_hidden_state[:, :-1]).float()
    targets = torch.where(learned[:, 1:], ids[:, 1:], -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_optimizers(model, rate):
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    import torch
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    return [torch.optim.Muon(inner, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(outer, lr=rate / 2, betas=(0.9, 0.98), weight_decay=0.0)]


class Schedule:
    """How far training is, by steps or by the clock, and the learning rate there."""

    def __init__(self, steps, minutes):
        self.steps, self.seconds, self.start = steps, minutes * 60, None

    def progress(self, step):
        if self.steps:
            return step / self.steps
        self.start = self.start if step > 1 else time.time()  # the clock leaves out compilation
        return (time.time() - self.start) / self.seconds

    def rate(self, step, progress):
        return min(1, (step + 1) / 200) * max(0, 1 - progress)


def recent(losses):
    return sum(losses[-100:]).item() / len(losses[-100:])


def train(args, device):
    import torch
    model = first_model(args.init).to(device)
    optimizers = make_optimizers(model, args.rate)
    blocks = Blocks(args.out, args.rows, args.steps or 10**6)
    loader = torch.utils.data.DataLoader(
        blocks, batch_size=None, num_workers=args.workers, prefetch_factor=4, pin_memory=device == "cuda")
    loss_function = loss_of if args.eager or device == "cpu" else torch.compile(loss_of)
    schedule, begun, losses = Schedule(args.steps, args.minutes), time.time(), []
    for step, (ids, learned) in enumerate(loader):
        progress = schedule.progress(step)
        if progress >= 1:
            break
        ids, learned = ids.to(device, torch.long, non_blocking=True), learned.to(device, non_blocking=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_function(model, ids, learned)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * schedule.rate(step, progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step % args.report == 0:
            seconds = time.time() - begun
            print(f"step {step}  {progress:4.0%}  loss {recent(losses):.4f}  {seconds:.0f} s", flush=True)
    return model, dict(steps=len(losses), tokens=len(losses) * args.rows * ROW, loss=round(recent(losses), 4),
                       seconds=round(time.time() - begun))


def save_weights(model, folder):
    import torch
    from safetensors.torch import save_file
    tensors = {name: value.detach().to("cpu", torch.bfloat16).contiguous()
               for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


# --------------------------------------------------------------------------------------------
# The card

SHAPE = ("{num_hidden_layers} layers, hidden {hidden_size}, ffn {intermediate_size}, {num_attention_heads} query "
         "and {num_key_value_heads} key/value heads of {head_dim}, tied embedding, rope theta {rope_theta:,}")
EXAMPLE_PROMPT = """\
You are Mirna, the keeper of The Gilded Anchor. You sell: rope 12 gold, brass lamp 30 gold, wool
blanket 18 gold, potion of healing 45 gold. You may lower a price by up to 3 gold. Directions: the
mill is behind the chapel; the harbour is south of the market. Rumours: a grey wolf was seen near
the mill.""".replace("\n", " ")
CARD = """# The demo model: a shopkeeper

A Qwen3 small enough to keep beside the code. It is made by `tools/train_demo.py` from nothing but
the phrases and the grammar beside it, and plays one part: the keeper of a shop in a game.

| | |
|---|---|
| parameters | {parameters:,} in bfloat16 |
| shape | {shape} |
| tokenizer | byte-level BPE, {vocabulary} tokens; Qwen3's normaliser, pre-tokeniser and added tokens |
| data | dialogues written by a grammar: made-up names, wares, prices, ways and rumours |
| training | {steps:,} steps, {tokens:.0f} million tokens, {seconds} s on {device} |
| started from | {start} |
| final loss | {loss} nats a token of the answers |
| made with | torch {torch}, transformers {transformers} |

## What it can do

It greets and remembers the player's name, says what is sold and for how much, adds up a basket,
gives change, haggles within the limit of its prompt, knows the ways and the rumours of its prompt,
and says that it does not know the rest. With thinking on it works sums out between `<think>` and
`</think>`; with a tool named `buy` offered it calls it, and answers with what the tool returns.
It knows nothing else, speaks English only, and was trained on conversations of up to {row} tokens.

## How to ask it

The system prompt describes the shop. The order of its parts and most of their wording are free; this one
lies beside the model as `system.txt`:

```
{prompt}
```

The tool takes `item` and `quantity`:

```
{tool}
```

## Scores

{count} held-out dialogues with names, wares, prices and phrasings that training never showed,
decoded greedily (`tools/eval_demo.py`):

{table}

## Licence

Weights, tokenizer and this text: public domain or MIT, whichever you prefer. No text of others was used.
"""


def write_card(folder, model, training, device, result, start):
    import torch
    import transformers
    from eval_demo import markdown_table
    facts = dict(
        training, tokens=training["tokens"] / 1e6, start=start, parameters=sum(p.numel() for p in model.parameters()),
        shape=SHAPE.format(**CONFIG), vocabulary=VOCAB, row=ROW, torch=torch.__version__,
        transformers=transformers.__version__, prompt=EXAMPLE_PROMPT, tool=json.dumps(buy_tool(Source(0))),
        device=torch.cuda.get_device_name() if device == "cuda" else "a CPU",
        count=result["dialogues"], table=markdown_table(result))
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
        file.write(CARD.format(**facts))


# --------------------------------------------------------------------------------------------

def show(count, heldout):
    for seed in range(count):
        print(render(make_dialogue(seed, heldout)), end="\n\n" + "-" * 80 + "\n\n")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Make the demo model.")
    parser.add_argument("--out", help="folder for the model")
    parser.add_argument("--minutes", type=float, default=5, help="training time; the schedule adapts to it")
    parser.add_argument("--steps", type=int, help="train so many steps instead")
    parser.add_argument("--init", metavar="DIR", help="start from this model and keep its tokenizer")
    parser.add_argument("--rows", type=int, default=48, help=f"rows of {ROW} tokens a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1),
                        help="processes that write dialogues")
    parser.add_argument("--eager", action="store_true", help="do without torch.compile")
    parser.add_argument("--report", type=int, default=100, help="steps between lines of the log")
    parser.add_argument("--score", type=int, default=500, help="held-out dialogues to score at the end")
    parser.add_argument("--wrong", type=int, default=0, metavar="N", help="show N wrong answers of the score")
    parser.add_argument("--show", type=int, metavar="N", help="print N dialogues and stop")
    parser.add_argument("--heldout", action="store_true", help="show held-out dialogues")
    args = parser.parse_args()
    if not (args.out or args.show):
        parser.error("--out or --show is needed")
    return args


def main():
    args = parse_arguments()
    if args.show:
        return show(args.show, args.heldout)
    import torch
    import eval_demo
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_settings(args.out, args.init)
    model, training = train(args, device)
    save_weights(model, args.out)
    result = eval_demo.score(eval_demo.TransformersEngine(args.out, device), args.score, args.wrong)
    print(eval_demo.markdown_table(result))
    start = "an earlier model of the same program, with its tokenizer" if args.init else "random weights, seed 0"
    write_card(args.out, model, training, device, result, start)


if __name__ == "__main__":
    main()
