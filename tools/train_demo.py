#!/usr/bin/env python3
"""Make the demo model: a Qwen3 of 4.6 million parameters that keeps a shop in a game.

    pip install -r tools/requirements-demo.txt
    python tools/train_demo.py --out demo                    a GPU, five minutes of training
    python tools/train_demo.py --out demo --minutes 600      a CPU, overnight
    python tools/train_demo.py --show 3                      print three training dialogues
    python tools/train_demo.py --show 3 --heldout            ... and three held-out ones

Everything is made from this file: a grammar writes the dialogues, a tokenizer is trained on them,
then the model. The folder that comes out has the Hugging Face layout and loads unchanged in
transformers. Seeds are fixed; with --steps instead of --minutes a run repeats on the same machine.

Held-out dialogues (see eval_demo.py) use names, wares, prices and phrasings that training never
shows: words and prices are divided by a hash, phrasings by their place in a list.
"""
import argparse
import dataclasses
import functools
import itertools
import json
import os
import random
import re
import time
import zlib

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
# Words

def words(text):
    return tuple(text.split())


ADJECTIVES = words("""
    amber ancient antique ashen battered bent big black blessed blue bone braided brass bright bronze
    brown carved cheap clay clean coarse cold copper cracked crimson crooked crystal curved cursed
    damp dark deep dull dusty ebony elegant elven empty enchanted engraved faded fancy feathered fine
    flat foreign fragile fresh frosted gilded glass glowing golden green grey hairy hardened heavy
    hollow holy horned humble iron ivory jagged jewelled knotted lacquered large leather light little
    long lucky magic marble massive melted mossy narrow neat new noble oaken odd oiled old orange
    ornate padded painted pale pearl pine pink plain polished purple quick quiet rare red ribbed rough
    round royal rusty sacred scented sharp shiny short silent silken silver simple slim small smoked
    smooth soft spiked spotted square steel stone stout straw striped strong sturdy tall tame tarnished
    thick thin tin tiny twisted velvet violet warm waxed weathered white wicked wide wild wooden
    woollen woven yellow young""")
NOUNS = words("""
    amulet anchor anvil apple apron arrow axe backpack bag banner barrel basket bead bell belt blanket
    boot bottle bow bowl bracelet broom brooch brush bucket buckle button cabbage cage candle cap
    carpet carrot cauldron chain chair charm cheese chest chisel cloak clock club coat comb compass cork
    crate crossbow crown cup dagger drum egg fan feather fiddle fishhook flag flask flute fork fur gem
    glove goblet hammer harp hat helmet herb hood hook horn hourglass jar jug kettle key ladder ladle
    lamp lantern lock locket loom lute mallet map mask medal mirror mitten mortar mug mushroom nail
    necklace needle net notebook oar onion pan paddle parchment pear pendant pickaxe pie pillow pin
    pipe pitchfork plate potion pot pouch pumpkin quill quilt quiver rake ribbon ring robe rope rug
    saddle sausage saw scarf sceptre scroll seed shawl shield shirt shovel sickle sling soap spade
    spear spoon staff stool sword table tankard tent thimble tinderbox token tool torch towel trap
    trumpet tunic turnip umbrella vase vest vial wand watch waterskin wheel whip whistle wig yoke""")
VIRTUES = words("""
    courage darkness dreams fire flight fortune frost growth healing health ice invisibility joy life
    light love luck memory mercy night patience peace poison power rain sight silence sleep smoke
    speed stealth storms strength sunrise thunder truth warmth wind winter wisdom youth""")
PLACES = words("""
    abbey armoury bakery bank barracks bathhouse brewery bridge butcher castle cave cemetery chapel
    church cobbler dock farm ferry forge fountain garden gate graveyard guildhall harbour hospital inn
    jail library lighthouse market mill mine monastery museum observatory orchard palace pier prison
    quarry school shipyard shrine smithy square stables statue swamp tannery tavern temple theatre
    tower university watchtower waterfall well windmill winery workshop""")
CREATURES = words("""
    badger bandit bear boar cat cow crow deer dog dragon dwarf eagle elf fox ghost giant goat goblin
    goose griffin hare hawk hermit horse king knight merchant minstrel miller monk mule nun ogre
    orc otter owl pedlar phantom pig pilgrim pirate priest prince queen rat raven sailor serpent
    sheep shepherd smuggler snake soldier spider squire stranger swan thief troll unicorn vampire
    widow witch wizard wolf""")
CURRENCIES = words("""
    gold silver coins crowns copper shillings pennies ducats marks credits gems florins pounds euros
    dollars talers groats guilders pesos shells tokens francs dinars nuggets""")
STORES = words("""
    Emporium Store Bazaar Wares Goods Corner Cellar Market Shop Outfitters Curios Depot Stall Supplies
    Provisions Sundries""")
FIRST_NAMES = words("""
    Alex Alice Anna Ben Bob Carla Chris Clara Daniel David Diana Elena Emily Emma Eric Eva Felix Frank
    Fred George Greta Hannah Harry Helen Ida Jack James Jane Jim Joe John Julia Karl Kate Laura Leo
    Lisa Lucas Lucy Maria Mark Martin Mary Max Mia Mike Mona Nina Nora Oliver Oscar Otto Paul Peter
    Rachel Robert Rosa Ruth Sam Sara Simon Sophie Steve Susan Thomas Tim Tom Vera Victor Will""")
NUMBER_WORDS = words("one two three four five six seven eight nine ten")

ONSETS = words("""b b br c cl cr d d dr f f fl fr g gl gr h h j k k kl kr l l m m n n p p pl pr qu r r s s
    sc sh sk sl sm sn sp st str sw t t th tr tw v v vr w w wh x y y z z zh""")
INNER = ONSETS + words("b d d f g k l l l m m n n n p r r r s s t t v z ll mm nn rr ss tt nd ld rl rn st") * 2
VOWELS = (words("a e i o u y") * 40 + words("ae ai au ea ee ei eo ia ie io oa oo ou ua ue") * 2
          + words("á â ä å é è ë í ó ö ø ú ü"))
ENDINGS = ("",) * 14 + words("""b ck d d f g k l l ld ll m n n n nd ng nk nn nt p r r r rd rk rn rt s s sh sk
    ss st t t th tt v w x z""")


def held(word):
    """Whether a word belongs to the held-out side."""
    return zlib.crc32(word.encode()) % 8 == 0


def held_price(price):
    return price >= 10 and price % 6 == 5


@functools.cache
def training_words(options):
    return tuple(word for word in options if not held(word))


@functools.cache
def phrase_side(options, heldout):
    """Every fifth phrasing is held out."""
    return tuple(o for i, o in enumerate(options) if (i % 5 == 4) == heldout)


def plural(noun):
    if noun.endswith(("s", "x", "ch", "sh", "z")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def plural_ware(ware):
    head, of, virtue = ware.partition(" of ")
    return plural(head) + of + virtue


def article_of(noun):
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def head_noun(ware):
    return ware.lower().partition(" of ")[0].split()[-1]


class Source:
    """Random choices, all from the training side or all from the held-out side."""

    def __init__(self, seed, heldout=False):
        self.random = random.Random(f"{'heldout' if heldout else 'training'} {seed}")
        self.heldout = heldout

    def chance(self, probability):
        return self.random.random() < probability

    def number(self, low, high):
        return self.random.randint(low, high)

    def any(self, options):
        return self.random.choice(options)

    def some(self, options, count):
        return self.random.sample(options, min(count, len(options)))

    def phrase(self, options):
        return self.any(phrase_side(options, self.heldout))

    def word(self, options):
        return self.any(options if self.heldout else training_words(options))

    def fresh(self, make):
        """The first product of make() that is on our side."""
        while True:
            made = make()
            if held(made) == self.heldout:
                return made

    def coined(self, low=2, high=3):
        """A made-up word."""
        def syllables():
            onsets = [ONSETS if self.chance(0.8) else ("",)] + [INNER] * (self.number(low, high) - 1)
            return "".join(self.any(o) + self.any(VOWELS) for o in onsets) + self.any(ENDINGS)
        return self.fresh(lambda: next(w for w in iter(syllables, None) if len(w) >= 3))

    def name(self):
        if not self.heldout and self.chance(0.1):
            return self.any(FIRST_NAMES)
        name = self.coined().capitalize()
        return f"{name} {self.coined().capitalize()}" if self.chance(0.1) else name

    def ware(self):
        def compose():
            noun = self.word(NOUNS)
            kind = self.random.random()
            if kind < 0.55:
                return f"{self.word(ADJECTIVES)} {noun}"
            if kind < 0.65 and not self.heldout:
                return noun
            if kind < 0.75:
                return f"{noun} of {self.word(VIRTUES)}"
            if kind < 0.88:
                return f"{self.coined(1, 2)} {noun}"
            if kind < 0.94:
                return f"{self.word(ADJECTIVES)} {self.coined(1, 2)} {noun}"
            return self.coined()
        return self.fresh(compose)

    def price(self):
        high = 99 if self.chance(0.93) else 400
        while True:
            price = self.number(10 if self.heldout else 1, high)
            if held_price(price) == self.heldout:
                return price


# --------------------------------------------------------------------------------------------
# A shop, and the system prompt that describes it

INTROS = (
    "You are {k}, the keeper of {s}.", "You are {k}. You keep the shop {s}.",
    "You are the shopkeeper of {s}. Your name is {k}.", "You play {k}, who runs {s}.",
    "Shop: {s}. Keeper: {k}.", "Your name is {k} and you own {s}.",
    "You are {k}, shopkeeper at {s}.", "You are a shopkeeper named {k}. Your shop is called {s}.",
    "You are the merchant {k}. The name of your shop is {s}.", "Play {k}, the owner of {s}.")
WARE_LISTS = (  # opening, one ware, between wares, end
    ("You sell: ", "{w} {p} {c}", ", ", "."),
    ("Wares: ", "{w} ({p} {c})", ", ", "."),
    ("Your wares and prices in {c}:\n", "- {w}: {p}", "\n", "\n"),
    ("Prices in {c}: ", "{w} {p}", ", ", "."),
    ("You sell ", "{w} for {p} {c}", ", ", "."),
    ("Wares:\n", "- {w}: {p} {c}", "\n", "\n"),
    ("Price list: ", "{w} = {p}", ", ", ". All prices are in {c}."),
    ("On your shelves: ", "{w}, {p} {c}", "; ", "."),
    ("Your wares: ", "{w}: {p}", ", ", ". You are paid in {c}."),
    ("For sale (prices in {c}):\n", "{w}: {p}", "\n", "\n"))
DISCOUNTS = (
    "You may lower a price by up to {d} {c}.", "Haggling: at most {d} {c} off.",
    "When the player haggles, you may take off up to {d} {c}.", "You can give up to {d} {c} off a price.",
    "You may go down by at most {d} {c}.", "The most you take off a price is {d} {c}.")
NO_DISCOUNT = ("Never haggle.", "Prices are fixed.", "No haggling.", "You never lower a price.", "")
WAY_LISTS = (
    ("Directions: ", "; ", "."), ("You know the way: ", ", ", "."), ("Directions:\n- ", "\n- ", "\n"),
    ("The town: ", "; ", "."), ("You know that ", " and that ", "."))
RUMOUR_LISTS = (
    ("Rumours: ", "; ", "."), ("Rumour: ", "; ", "."), ("You have heard that ", " and that ", "."),
    ("Rumours:\n- ", "\n- ", "\n"), ("People say that ", "; they also say that ", "."))
RELATIONS = (
    "north of", "south of", "east of", "west of", "behind", "past", "next to", "across from", "left of",
    "right of", "opposite", "just beyond", "below", "above", "two streets from", "down the road from",
    "uphill from", "around the corner from", "a mile from", "at the end of the lane by", "on the way to",
    "between the river and", "a short walk from", "straight ahead, near")
DEEDS = (
    "was seen near the {place}", "has stolen {a_ware}", "hides in the old {place}",
    "was heard at night by the {place}", "pays well for {a_ware}", "lost {a_ware} at the {place}",
    "will come to town tomorrow", "sleeps under the {place}", "has fallen in love with a {creature}",
    "is looking for {name}", "owes {name} a fortune", "fears the {creature}", "guards the {place}",
    "has found {a_ware} in the {place}", "was once a {creature}", "wants to buy the {place}",
    "buried {a_ware} behind the {place}", "has not left the {place} for {n} days", "quarrelled with {name}",
    "sings to a {creature} every night", "was chased away by a {creature}", "is the child of {name}")


@dataclasses.dataclass
class Shop:
    keeper: str
    name: str
    currency: str
    wares: list        # (ware, price)
    discount: int      # most that may be taken off a price
    ways: list         # (place, where it is)
    rumours: list


def make_shop_name(src):
    kind = src.number(0, 5)
    noun, store = src.word(NOUNS).capitalize(), src.any(STORES)
    return [f"The {src.word(ADJECTIVES).capitalize()} {noun}",
            f"{src.coined().capitalize()}'s {store}",
            f"The {noun} and {src.word(NOUNS).capitalize()}",
            f"{src.coined().capitalize()} {store}",
            f"The {src.coined().capitalize()} {noun}",
            f"The {src.word(CREATURES).capitalize()}'s {noun}"][kind]


def make_wares(src):
    count = src.any((3, 4, 4, 5, 5, 6, 6, 7, 8, 10, 12))
    wares = {src.ware(): src.price() for _ in range(count)}
    if src.chance(0.3):  # a neighbour that differs in one word only
        name = src.any(list(wares))
        other = src.fresh(lambda: f"{src.word(ADJECTIVES)} {head_noun(name)}")
        wares[other] = src.price()
    if src.chance(0.1):
        wares = {name.title(): price for name, price in wares.items()}
    return src.some(list(wares.items()), len(wares))


def make_rumour(src):
    who = src.any((f"{article_of(src.word(ADJECTIVES))} {src.word(CREATURES)}",
                   f"the {src.word(CREATURES)} of the {src.word(PLACES)}",
                   f"the {src.word(CREATURES)}", src.name()))
    ware = src.ware()
    return f"{who} " + src.any(DEEDS).format(
        place=src.word(PLACES), creature=src.word(CREATURES), name=src.name(), a_ware=article_of(ware),
        n=src.number(2, 30))


def make_way(src):
    where = f"{src.any(RELATIONS)} the {src.word(PLACES)}"
    return where + (f", {src.any(RELATIONS)} the {src.word(PLACES)}" if src.chance(0.3) else "")


def make_shop(src):
    places = {src.word(PLACES) for _ in range(src.any((0, 1, 2, 2, 3)))}
    return Shop(
        keeper=src.name(), name=make_shop_name(src), currency=src.word(CURRENCIES), wares=make_wares(src),
        discount=src.number(1, 9) if src.chance(0.75) else 0,
        ways=[(place, make_way(src)) for place in sorted(places)],
        rumours=[make_rumour(src) for _ in range(src.any((0, 1, 1, 2)))])


def joined(parts, style):
    opening, between, end = style
    return opening + between.join(parts) + end


def system_prompt(src, shop):
    cur = shop.currency
    opening, one, between, end = (part.replace("{c}", cur) for part in src.any(WARE_LISTS))
    wares = opening + between.join(one.format(w=w, p=p) for w, p in shop.wares) + end
    rest = [src.any(DISCOUNTS).format(d=shop.discount, c=cur) if shop.discount else src.any(NO_DISCOUNT)]
    if shop.ways:
        rest.append(joined([f"the {place} is {where}" for place, where in shop.ways], src.any(WAY_LISTS)))
    if shop.rumours:
        rest.append(joined(shop.rumours, src.any(RUMOUR_LISTS)))
    parts = [src.any(INTROS).format(k=shop.keeper, s=shop.name), wares] + src.some(rest, len(rest))
    gap = "\n" if src.chance(0.3) else " "
    return re.sub(r"\n[ \n]+", "\n", gap.join(part for part in parts if part)).strip()


# --------------------------------------------------------------------------------------------
# What the player says: every fifth phrasing is held out

HELLO = (
    "Hello!", "Good morning!", "Hi there!", "Good day to you.", "Greetings!", "Hello, shopkeeper.", "Hi!",
    "Good evening.", "Hey!", "Well met!", "Good afternoon!", "Hello there, friend.", "Is anyone here?",
    "Hey there.", "Good day!")
MY_NAME = (
    "I am {n}.", "My name is {n}.", "Call me {n}.", "I'm {n}.", "Hello, my name is {n}.", "{n} is my name.",
    "The name is {n}.", "You can call me {n}.", "They call me {n}.", "Hello, I am {n}.",
    "People call me {n}.", "Hi, I'm {n}.", "I go by {n}.", "This is {n} speaking.",
    "Good day, they call me {n}.", "My friends call me {n}.", "Hello! {n} here.", "I am called {n}.",
    "By the way, I am {n}.", "Good morning, I'm called {n}.", "You should know that my name is {n}.",
    "Please call me {n}.", "I am {n}, nice to meet you.", "{n}, that is me.", "Greetings, my name is {n}.")
ASK_NAME = (
    "What is my name?", "Do you remember my name?", "Who am I?", "What was my name again?",
    "Do you still know my name?", "Tell me my name.", "What am I called?", "Do you know who I am?",
    "What did I say my name was?", "Can you remember what my name is?", "Which name did I give you?",
    "Remind me, what's my name?", "You remember my name, right?", "Say my name.", "Do you recall my name?",
    "Have you forgotten my name?", "How am I called?", "Did you catch my name?", "What do they call me?",
    "Can you tell me my name?")
ASK_PRICE = (
    "How much is the {w}?", "How much for the {w}?", "What does the {w} cost?",
    "What is the price of the {w}?", "How much does the {w} cost?", "What do you want for the {w}?",
    "The {w}, how much?", "What would the {w} cost me?", "How many {c} for the {w}?",
    "What is the {w} going for?", "Price of the {w}?", "Tell me the price of the {w}.",
    "What are you asking for the {w}?", "How many {c} is the {w}?",
    "I would like to know what the {w} costs.", "And the {w}?", "How much is {w}?", "{w}, how much?",
    "{w} price?", "What does {w} cost?", "How much for {w}?", "Can you tell me how much the {w} is?",
    "How expensive is the {w}?", "What's the {w} worth?", "Could you tell me the price of the {w}?",
    "What about the {w}, what is its price?", "How much would I pay for the {w}?",
    "How much do you charge for the {w}?", "Is the {w} expensive?",
    "Please tell me what you ask for the {w}.", "And how much is the {w}?",
    "What do I have to pay for the {w}?", "I need the price of the {w}.", "What's the price on the {w}?",
    "What would I have to pay for the {w}?", "How much {c} does the {w} cost?", "cost of the {w}?")
ASK_STOCK = (
    "Do you sell {ws}?", "Do you have {a}?", "Have you got {a}?", "Is there {a} in your shop?",
    "Do you have any {ws}?", "Any {ws}?", "Are there {ws} here?", "I am looking for {a}.",
    "Can I buy {a} here?", "Do you happen to sell {ws}?", "Do you stock {ws}?", "I need {a}.",
    "Where can I get {a}?", "Could you sell me {a}?", "I am looking for {ws}, do you have any?")
ASK_LIST = (
    "What do you sell?", "What do you have?", "Show me your wares.", "What is for sale?",
    "What can I buy here?", "What do you have for sale?", "What are your wares?", "List your wares.",
    "What have you got?", "Tell me what you sell.", "Can I see your wares?", "What is on offer?",
    "What goods do you have?", "Tell me all your prices.", "What can you sell me?")
ASK_TOTAL = (
    "How much for {l}?", "What do I pay for {l}?", "How much is {l}?", "What would {l} cost?",
    "What is the total for {l}?", "I would like {l}. What is the total?", "What does {l} cost together?",
    "Add up {l} for me.", "{l}, how much is that?", "I need {l}. How much in all?", "How much would {l} be?",
    "What is the price of {l} together?", "{l}: what is the sum?", "How much altogether for {l}?",
    "What do {l} cost in total?", "If I take {l}, what do I owe you?",
    "I am thinking of {l}. What would that be?", "What do you want for {l}?", "Sum up {l}, please.",
    "What would I pay in total for {l}?")
BUY = (
    "I'll take {l}.", "I would like to buy {l}.", "Give me {l}.", "I want {l}.", "I would like {l}, please.",
    "Sell me {l}.", "{l}, please.", "I will buy {l}.", "I want to buy {l}.", "I'd like to take {l}.",
    "I take {l}.", "Can I have {l}?", "Let me have {l}.", "I'd like {l}.", "I will have {l}, please.",
    "Please sell me {l}.", "I am buying {l}.", "Wrap up {l} for me.", "Hand me {l}.", "Could I buy {l}?")
PAY = (
    "Here are {m} {c}.", "I give you {m} {c}.", "I pay with {m} {c}.", "Here is {m}.", "Here, take {m} {c}.",
    "Take these {m} {c}.", "I pay {m} {c}. What is my change?", "{m} {c}. How much do I get back?",
    "I have {m} {c}. What is the change?", "I'll give you {m}. What do I get back?", "Here you go, {m} {c}.",
    "I am giving you {m} {c}.", "Out of {m} {c}, please.", "I'll pay with {m}.",
    "I pay with {m} {c}. How much change do I get?")
BUY_AND_PAY = (
    "I buy the {w} with {m} {c}. What is my change?", "Here are {m} {c} for the {w}.",
    "If I pay for the {w} with {m} {c}, what do I get back?",
    "I take the {w} and give you {m} {c}. How much change?",
    "If I give you {m} {c} for the {w}, what is my change?", "I pay {m} {c} for the {w}. What do I get back?",
    "The {w}, please. Here is {m}.", "What is the change if I buy the {w} with {m} {c}?",
    "I'll take the {w}. Here are {m} {c}.", "I buy the {w}. Here you go, {m} {c}. What do I get back?")
OFFER = (
    "Would you take {o} {c} for the {w}?", "I offer {o} {c} for the {w}.", "I'll give you {o} for the {w}.",
    "How about {o} {c} for the {w}?", "How about the {w} for {o} {c}?", "Can I have the {w} for {o} {c}?",
    "What about {o} for the {w}?", "The {w} for {o} {c}?", "My offer for the {w} is {o} {c}.",
    "I offer you {o} for the {w}.", "{o} {c} for the {w}, deal?", "Would you sell the {w} for {o}?",
    "Let me have the {w} for {o} {c}.", "I can pay {o} {c} for the {w}.",
    "Would you let me have the {w} for {o} {c}?")
ASK_CHEAPER = (
    "Can you make the {w} cheaper?", "Is there a discount on the {w}?",
    "What is your lowest price for the {w}?", "The {w} is too expensive. Can you go lower?",
    "What is the lowest you would take for the {w}?", "Can you lower the price of the {w}?",
    "What is your best price for the {w}?", "Could I get the {w} for less?", "Give me a discount on the {w}.",
    "Can I get the {w} cheaper?")
ASK_WAY = (
    "Where is the {p}?", "How do I get to the {p}?", "How do I find the {p}?", "Which way is the {p}?",
    "Where do I find the {p}?", "Can you tell me the way to the {p}?", "I am looking for the {p}.",
    "What is the way to the {p}?", "Do you know where the {p} is?", "Can you tell me where to find the {p}?",
    "How can I reach the {p}?", "Which way to the {p}?", "I need to go to the {p}.",
    "Where can I find the {p}?", "Could you tell me how to get to the {p}?")
ASK_NEWS = (
    "Any news?", "Have you heard any rumours?", "What is new in town?", "What do people say?",
    "Heard any news lately?", "Do you know any rumours?", "What's the latest gossip?", "Tell me a rumour.",
    "What is going on around here?", "Do you have any news for me?", "Heard anything interesting?",
    "Any gossip?", "Is there any news?", "What are people talking about?", "Any rumours lately?")
ASK_KEEPER = (
    "What is your name?", "Who are you?", "What are you called?", "And who are you?",
    "Can you tell me your name?", "May I ask your name?", "What do they call you?", "Tell me your name.",
    "Who am I talking to?", "What's your name?")
ASK_SHOP = (
    "What is this shop called?", "What is the name of this shop?", "Where am I?", "Which shop is this?",
    "Can you tell me what this shop is called?", "What do you call this shop?", "What place is this?",
    "What is your shop called?", "What's this place called?", "What is the name of your shop?")
ASK_OUTSIDE = (
    "What is the capital of {x}?", "Who is the king of {x}?", "How old is the {y}?",
    "Can you write a poem about the {y}?", "What do you know about the {y}?", "Who built the {y}?",
    "Tell me about {x}.", "What is the meaning of life?", "Who is {x}?", "Do you know {x}?",
    "What will the weather be tomorrow?", "How far away is the moon?", "When was {x} born?", "What is {x}?",
    "Why is the {y} so far away?", "Who won the war against {x}?", "Can you cast a spell?",
    "How do I defeat the {z}?", "Where does the {z} live?", "How do I defeat {x}?",
    "What is the secret of the {y}?", "What colour is the {z}?", "How many people live in {x}?",
    "Why does the {z} fear {x}?", "Who rules {x}?", "What year is it?", "Can you repair my computer?",
    "What is the speed of light?", "Who wrote the book of {x}?", "Tell me the secret of {x}.",
    "Can you speak the language of {x}?", "What happened to the {z}?", "How does a {z} sleep?",
    "What time is it in {x}?", "What is the name of the {z}?", "Do you know how to cook {w}?",
    "Where were you born?", "Is {x} dead?", "Who killed the {z}?", "What do you know about {x}?")
ASK_SUM = (
    "What is {q}?", "How much is {q}?", "{q}?", "Can you work out {q}?", "What does {q} make?",
    "Tell me, what is {q}?", "{q} is how much?", "Work out {q} for me.", "Calculate {q}.",
    "What do you get for {q}?")
HOW_ARE_YOU = (
    "How are you?", "How is business?", "How are you today?", "Is business good?", "How are things?")
THANKS = ("Thank you!", "Thanks.", "Many thanks.", "Thank you very much.", "Thanks a lot!")
BYE = ("Goodbye!", "Farewell.", "I must go now.", "See you later!", "Bye!")
OPENERS = (
    "Excuse me. ", "Tell me, ", "Well, ", "Hm. ", "Say, ", "Now then. ", "Right. ", "Oh, ",
    "One more thing. ", "Good. ", "So, ", "Please, ")
DISTRACTIONS = (
    "My friend {n} sent me. ", "I come from {n}. ", "{n} told me about you. ", "I am on my way to {n}. ")

# What the keeper answers

WELCOME = (
    "Welcome to {s}{f}! I am {k}. What can I do for you?",
    "Good day{f}, and welcome to {s}. What would you like?",
    "Hello{f}! {k} is my name, and this is {s}. Look around!")
NICE_TO_MEET = (
    "Nice to meet you, {n}! What can I do for you?", "Welcome, {n}! What would you like?",
    "A pleasure, {n}. I am {k}.", "Well met, {n}! Welcome to {s}.")
YOUR_NAME = ("Your name is {n}.", "You are {n}, of course!", "You told me your name is {n}.")
NO_NAME = ("I don't know your name. You have not told me yet.", "I'm sorry, I don't know your name yet.")
PRICE = (
    "The {w} costs {p} {c}{f}.", "The {w} is {p} {c}{f}.", "{p} {c} for the {w}{f}.",
    "That will be {p} {c} for the {w}{f}.")
IN_STOCK = ("Yes{f}, the {w} costs {p} {c}.", "Yes, I do{f}. The {w} is {p} {c}.")
NOT_SOLD = ("Sorry{f}, I don't sell that: no {w} here.", "Sorry{f}, I have no {w}.")
EVERYTHING = ("I sell {x}. Prices are in {c}.", "My wares, in {c}: {x}.")
TOTAL = ("That makes {t} {c}{f}.", "Altogether {t} {c}{f}.", "That comes to {t} {c}{f}.")
CHANGE = (
    "Your change is {r} {c}{f}.", "You get {r} {c} back{f}.", "Thank you{f}, here is your change of {r} {c}.")
SHORT = ("That is not enough{f}: you are {r} {c} short.", "Sorry{f}, you are still {r} {c} short.")
DEAL = (
    "Deal{f}! The {w} is yours for {o} {c}.", "Very well{f}, it is a deal: {o} {c} for the {w}.",
    "Deal{f}, {o} {c} for the {w}.")
TOO_LOW = ("I cannot go below {b} {c} for the {w}{f}.", "Sorry{f}, {b} {c} is my lowest price for the {w}.")
BEST_PRICE = (
    "For you{f}, {b} {c} is my lowest price for the {w}.", "I can go down to {b} {c} for the {w}{f}.")
FIXED = ("My prices are fixed{f}: the {w} is {p} {c}.", "Sorry{f}, my prices are fixed. The {w} is {p} {c}.")
THE_WAY = ("The {p} is {x}{f}.", "You will find the {p} {x}{f}.")
NO_WAY = ("I'm sorry{f}, I don't know where the {p} is.", "I don't know the way to the {p}{f}.")
NEWS = ("They say that {x}.", "I have heard that {x}.", "Well, {x}. So they say.")
NO_NEWS = ("I know nothing new{f}.", "I don't know any news{f}.")
OUTSIDE = (
    "I'm sorry{f}, I don't know about that.", "I don't know{f}. I only know my shop.",
    "That I don't know{f}. I am only a shopkeeper.")
I_AM = ("I am {k}.", "My name is {k}, and I keep {s}.", "I am {k}, the keeper of {s}.")
THIS_IS = ("This is {s}.", "You are in {s}.", "My shop is called {s}.")
VERY_WELL = ("Very well, thank you{f}!", "I cannot complain{f}.")
WELCOME_TO_IT = ("You are welcome{f}!", "My pleasure{f}.")
COME_BACK = ("Goodbye{f}, and come back soon!", "Farewell{f}!")
SOLD = (
    "Sold! {t} {c} for {l}{f}.", "Here you are{f}: {l} for {t} {c}.", "Done{f}! That was {t} {c} for {l}.")
LEFT = ("", " You have {m} {c} left.", " That leaves you {m} {c}.")
NOT_BOUGHT = ("I'm sorry{f}, that did not work: {x}.", "No luck{f}: {x}.", "I cannot sell it{f}: {x}.")

REASONS = (
    "not enough {c}", "out of stock", "the purse is empty", "only {n} left", "the bag is full",
    "the player is too poor", "already sold to {p}", "reserved for {p}", "the {w} is broken",
    "only for members of the {g}", "needs level {n}", "the shop is closed", "the {w} is cursed",
    "at most {n} per customer", "{n} {c} missing", "the {g} forbids it", "too heavy to carry",
    "stolen by the {z}", "the player is banned by {p}")

VERDICT_KEYS = ("ok", "success", "sold")
TOTAL_KEYS = ("total", "paid", "price", "cost")
LEFT_KEYS = ("left", "gold_left", "purse", "remaining", "balance")
REASON_KEYS = ("error", "reason", "message")

TOOL_TEXTS = (
    ("Sell a ware to the player.", "Name of the ware", "How many"),
    ("Buy an item from the shop.", "The item to buy", "The quantity"),
    ("Call this when the player buys something.", "The ware as it is listed", "Number of pieces"),
    ("Buys goods for the player and takes the money.", "What is bought", "How many pieces are bought"),
    ("Hand over wares and take payment.", "Ware", "Amount"))


def buy_tool(src):
    about, item, quantity = src.any(TOOL_TEXTS)
    return {"type": "function", "function": {
        "name": "buy", "description": about, "parameters": {
            "type": "object",
            "properties": {"item": {"type": "string", "description": item},
                           "quantity": {"type": "integer", "description": quantity}},
            "required": ["item", "quantity"]}}}


# --------------------------------------------------------------------------------------------
# A conversation

@dataclasses.dataclass
class Turn:
    """One line of the player, or one result of a tool, and the answer to it."""
    role: str          # "user" or "tool"
    text: str
    thought: str
    reply: str
    call: dict         # arguments of buy, or None
    slot: str          # what this turn tests, or None
    want: dict         # how an answer is checked; see eval_demo.py


def adding_up(a, count):
    """count times a, one addition after the other: '12 + 12 = 24, 24 + 12 = 36'."""
    sums = [f"{a * i} + {a} = {a * (i + 1)}" for i in range(1, count)]
    return ", ".join(sums) if sums else str(a)


def reckon(basket):
    """The bill for a basket of (ware, price, quantity), step by step, and the total."""
    steps, total = [], 0
    for ware, price, quantity in basket:
        steps.append(f"{quantity} x {ware}: {adding_up(price, quantity)}.")
        cost = price * quantity
        if total:
            steps.append(f"{total} + {cost} = {total + cost}.")
        total += cost
    return steps, total


class Talk:
    """A conversation in the making: each method adds one thing that the player may do."""

    def __init__(self, src, thinking):
        self.src, self.thinking = src, thinking
        self.shop = make_shop(src)
        self.tool = buy_tool(src) if src.chance(0.35) else None
        self.player = None
        self.owed = None
        self.turns = []

    # Small helpers

    def say(self, asked, reply, thought, slot=None, call=None, role="user", **want):
        self.turns.append(Turn(role, asked, thought, reply, call, slot, want))

    def ask(self, options, **fields):
        """A line of the player, sometimes as careless as people type."""
        phrase = self.src.phrase(options)
        opener = self.src.any(OPENERS) if self.src.chance(0.1) else ""
        mid_sentence = opener.endswith(", ") and not phrase.startswith(("I ", "I'"))
        if phrase[0] != "{" and (mid_sentence or self.src.chance(0.2)):
            phrase = phrase[0].lower() + phrase[1:]
        line = opener + phrase.format(c=self.shop.currency, **fields)
        return line.rstrip("?.!") if self.src.chance(0.2) else line

    def answer(self, options, **fields):
        friend = f", {self.player}" if self.player and self.src.chance(0.3) else ""
        return self.src.any(options).format(
            c=self.shop.currency, s=self.shop.name, k=self.shop.keeper, f=friend, **fields)

    def work(self, steps, *conclusion, **fields):
        """Steps and a conclusion: the steps are thought, or said aloud when not thinking."""
        reply = self.answer(*conclusion, **fields)
        return (reply, "\n".join(steps)) if self.thinking else (" ".join(steps + [reply]), "")

    def called(self, ware):
        """How the player names a ware: as listed, or by its noun when only one ware has it."""
        noun = ware.split()[-1]
        listed = [name for name, _ in self.shop.wares if noun in name.split()]
        if listed == [ware] and " of " not in ware and self.src.chance(0.1):
            ware = noun
        return ware.lower() if self.src.chance(0.2) else ware

    def counted(self, ware, quantity):
        """'a rope', 'the rope', '3 ropes', 'three ropes'."""
        name = self.called(ware)
        if quantity == 1:
            return self.src.any(("the " + name, article_of(name), "one " + name, "1 " + name))
        number = NUMBER_WORDS[quantity - 1] if quantity <= 10 and self.src.chance(0.5) else str(quantity)
        return f"{number} {plural_ware(name)}"

    def absent_ware(self):
        """A ware that is not for sale, often close to one that is."""
        names = [name for name, _ in self.shop.wares]
        if self.src.chance(0.4):
            noun = head_noun(self.src.any(names)).lower()
            ware = self.src.fresh(lambda: f"{self.src.word(ADJECTIVES)} {noun}")
        else:
            ware = self.src.ware()
        return self.absent_ware() if ware in (n.lower() for n in names) else ware

    def basket(self, sizes, quantities):
        while True:
            chosen = self.src.some(self.shop.wares, self.src.any(sizes))
            basket = [(ware, price, self.src.any(quantities)) for ware, price in chosen]
            if sum(price * quantity for _, price, quantity in basket) < 1000:
                return basket

    def listing(self, basket):
        names = [self.counted(ware, quantity) for ware, _, quantity in basket]
        return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]

    def payment(self, cost):
        """What the player puts on the counter: mostly enough, often a round sum."""
        kind = self.src.random.random()
        if kind < 0.15 and cost > 2:
            return self.src.number(1, cost - 1)
        round_sums = [m for m in (10, 20, 50, 100, 150, 200, 300, 500, 1000) if m >= cost]
        return round_sums[0] if kind < 0.5 else self.src.number(cost, min(999, 2 * cost + 20))

    # Names

    def hello(self):
        self.say(self.ask(HELLO), self.answer(WELCOME), "The player greets me.")

    def give_name(self):
        self.player = self.src.name()
        said = self.player.lower() if self.src.chance(0.08) else self.player
        self.player = said
        self.say(self.ask(MY_NAME, n=said), self.answer(NICE_TO_MEET, n=said), f"The player is {said}.",
                 "name", has=[said])

    def ask_name(self):
        if self.player:
            self.say(self.ask(ASK_NAME), self.answer(YOUR_NAME, n=self.player),
                     f"The player said: {self.player}.", "name", has=[self.player])
        else:
            self.say(self.ask(ASK_NAME), self.answer(NO_NAME),
                     "The player did not say.", "unknown", has=["don't know"])

    def ask_keeper(self):
        self.say(self.ask(ASK_KEEPER), self.answer(I_AM),
                 f"I am {self.shop.keeper}.", "shop", has=[self.shop.keeper])

    def ask_shop(self):
        self.say(self.ask(ASK_SHOP), self.answer(THIS_IS),
                 f"The shop is {self.shop.name}.", "shop", has=[self.shop.name])

    # Wares and prices

    def ask_price(self):
        ware, price = self.src.any(self.shop.wares)
        asked = self.ask(ASK_PRICE, w=self.called(ware))
        kind = self.src.random.random()
        if kind < 0.12 and not self.player:
            self.player = self.src.name()
            asked = f"{self.ask(MY_NAME, n=self.player)} {asked}"
        elif kind < 0.2:
            asked = self.src.any(DISTRACTIONS).format(n=self.src.coined().capitalize()) + asked
        self.say(asked, self.answer(PRICE, w=ware, p=price), f"{ware}: {price}.", "price", numbers=[price])

    def ask_stock(self):
        if self.src.chance(0.5):
            return self.ask_missing()
        ware, price = self.src.any(self.shop.wares)
        self.say(self.ask_for(ware), self.answer(IN_STOCK, w=ware, p=price),
                 f"{ware}: {price}.", "stock", numbers=[price])

    def ask_missing(self):
        ware = self.absent_ware()
        asked = self.ask(ASK_PRICE, w=ware) if self.src.chance(0.3) else self.ask_for(ware)
        self.sorry_for(asked, ware)

    def ask_for(self, ware):
        name = self.called(ware)
        return self.ask(ASK_STOCK, a=article_of(name), ws=plural_ware(name))

    def sorry_for(self, asked, ware):
        self.say(asked, self.answer(NOT_SOLD, w=ware),
                 f"{ware}: not for sale.", "stock", numbers=[], has=["sorry"])

    def ask_list(self):
        wares = ", ".join(f"{ware} {price}" for ware, price in self.shop.wares)
        self.say(self.ask(ASK_LIST), self.answer(EVERYTHING, x=wares), "The player asks for my wares.", "list",
                 has=[f"{ware} {price}" for ware, price in self.shop.wares])

    # Sums and change

    def ask_total(self):
        if self.thinking or self.src.chance(0.5):
            basket = self.basket((1, 2, 2, 3, 3, 4), (1, 1, 1, 2, 2, 3, 4, 5))
        else:
            basket = self.basket((2,), (1,))
        if len(basket) == 1 and basket[0][2] == 1:
            return self.ask_price()
        steps, total = reckon(basket)
        asked = self.ask(ASK_TOTAL if self.tool or self.src.chance(0.6) else BUY, l=self.listing(basket))
        reply, thought = self.work(steps, TOTAL, t=total)
        self.say(asked, reply, thought, "sum", last=total)
        self.owed = total

    def settle(self, asked, paid, cost, steps):
        if paid >= cost:
            steps = steps + [f"{paid} - {cost} = {paid - cost}."]
            reply, thought = self.work(steps, CHANGE, r=paid - cost)
            self.say(asked, reply, thought, "change", last=paid - cost, lacks=[" short."])
        else:
            steps = steps + [f"{cost} - {paid} = {cost - paid}."]
            reply, thought = self.work(steps, SHORT, r=cost - paid)
            self.say(asked, reply, thought, "change", last=cost - paid, has=[" short."])
        self.owed = None

    def pay(self):
        paid = self.payment(self.owed)
        self.settle(self.ask(PAY, m=paid), paid, self.owed, [])

    def buy_and_pay(self):
        ware, price = self.src.any(self.shop.wares)
        paid = self.payment(price)
        self.settle(self.ask(BUY_AND_PAY, w=self.called(ware), m=paid), paid, price, [f"{ware}: {price}."])

    def ask_sum(self):
        a, b = sorted((self.quantity(), self.quantity()), reverse=self.src.chance(0.5))
        if a > b and self.src.chance(0.7):
            sign, result = "-", a - b
        else:
            sign, result = "+", a + b
        sum_ = f"{a} {sign} {b}"
        reply, thought = self.work([f"{sum_} = {result}."], ("That is {r}.",), r=result)
        self.say(self.ask(ASK_SUM, q=sum_), reply, thought, "sum", last=result)

    def quantity(self):
        return self.src.number(1, self.src.any((9, 50, 99, 99, 200, 499)))

    # Haggling

    def haggle(self):
        ware, price = self.src.any(self.shop.wares)
        off = min(self.shop.discount, price - 1)
        lowest = price - off
        fields = dict(w=ware, p=price, b=lowest)
        steps = f"{ware}: {price}. At most {off} off: {price} - {off} = {lowest}."
        if price == 1 or self.src.chance(0.3):
            asked, offer = self.ask(ASK_CHEAPER, w=self.called(ware)), None
        else:
            offer = self.src.number(max(1, lowest - 2 * off - 4), price - 1)
            asked = self.ask(OFFER, w=self.called(ware), o=offer)
        if not off:
            self.say(asked, self.answer(FIXED, **fields),
                     f"{ware}: {price}. No haggling.", "haggle", numbers=[price], has=["fixed"])
        elif offer is None:
            self.say(asked, self.answer(BEST_PRICE, **fields), steps, "haggle", numbers=[lowest])
        elif offer >= lowest:
            self.say(asked, self.answer(DEAL, o=offer, **fields),
                     f"{steps} {offer} is enough.", "haggle", numbers=[offer], has=["deal"])
        else:
            self.say(asked, self.answer(TOO_LOW, **fields),
                     f"{steps} {offer} is too low.", "haggle", numbers=[lowest], lacks=["deal"])

    # The town and the world

    def ask_way(self):
        known = dict(self.shop.ways)
        place = self.src.any(list(known)) if known and self.src.chance(0.7) else self.src.word(PLACES)
        asked = self.ask(ASK_WAY, p=place)
        if place in known:
            where = known[place]
            self.say(asked, self.answer(THE_WAY, p=place, x=where),
                     f"The {place} is {where}.", "directions", has=[where])
        else:
            self.say(asked, self.answer(NO_WAY, p=place),
                     f"{place}: not known.", "unknown", has=["don't know"])

    def ask_news(self):
        asked = self.ask(ASK_NEWS)
        if self.shop.rumours:
            rumour = self.src.any(self.shop.rumours)
            self.say(asked, self.answer(NEWS, x=rumour),
                     "The player asks for rumours.", "rumour", any=self.shop.rumours)
        else:
            self.say(asked, self.answer(NO_NEWS),
                     "I have heard no rumours.", "unknown", any=["don't know", "know nothing"])

    def ask_outside(self):
        asked = self.ask(ASK_OUTSIDE, x=self.src.coined().capitalize(), y=self.src.word(PLACES),
                         z=self.src.word(CREATURES), w=self.src.word(NOUNS))
        self.say(asked, self.answer(OUTSIDE), "This is not about my shop.", "unknown", has=["don't know"])

    def chat(self):
        options, replies = self.src.any(((HOW_ARE_YOU, VERY_WELL), (THANKS, WELCOME_TO_IT), (BYE, COME_BACK)))
        self.say(self.ask(options), self.answer(replies), "The player is friendly.")

    # The tool

    def buy(self):
        ware, price, quantity = self.basket((1,), (1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20))[0]
        goods = self.counted(ware, quantity)
        self.say(self.ask(BUY, l=goods), "", f"The player wants {quantity} x {ware}.", "tool call",
                 call={"item": ware, "quantity": quantity})
        if self.src.chance(0.6):
            self.bought(goods, price * quantity)
        else:
            self.refused()

    def buy_missing(self):
        ware = self.absent_ware()
        self.sorry_for(self.ask(BUY, l=self.counted(ware, self.src.number(1, 4))), ware)

    def bought(self, goods, cost):
        total = cost if self.src.chance(0.6) else self.src.number(1, 999)
        left = self.src.number(0, 999)
        result = {self.src.any(VERDICT_KEYS): True, self.src.any(TOTAL_KEYS): total}
        ending = self.src.any(LEFT)
        if ending:
            result[self.src.any(LEFT_KEYS)] = left
        reply = self.answer(SOLD, t=total, l=goods) + ending.format(m=left, c=self.shop.currency)
        self.say(json.dumps(result), reply, "The sale went well.", "tool answer", role="tool",
                 holds=[total, left] if ending else [total], lacks=["sorry", "no luck", "cannot"])

    def refused(self):
        reason = self.src.phrase(REASONS).format(
            c=self.shop.currency, n=self.src.number(1, 20), p=self.src.name(), w=self.src.word(NOUNS),
            g=self.src.coined(), z=self.src.word(CREATURES))
        result = {self.src.any(VERDICT_KEYS): False, self.src.any(REASON_KEYS): reason}
        self.say(json.dumps(result, ensure_ascii=False), self.answer(NOT_BOUGHT, x=reason),
                 "The sale failed.", "tool answer", role="tool", has=[reason])

    # The course of a conversation

    def step(self):
        if self.owed and self.src.chance(0.65):
            return self.pay()
        if self.tool and self.src.chance(0.4):
            return self.buy() if self.src.chance(0.9) else self.buy_missing()
        self.src.any(STEPS)(self)

    def hold(self, steps):
        if self.src.chance(0.65):
            self.give_name()
        elif self.src.chance(0.4):
            self.hello()
        for _ in range(steps):
            self.step()
        if self.player and self.src.chance(0.3):
            self.ask_name()
        return self


STEPS = tuple(itertools.chain.from_iterable([step] * weight for step, weight in (
    (Talk.ask_price, 6), (Talk.ask_total, 8), (Talk.buy_and_pay, 4), (Talk.ask_name, 3), (Talk.ask_stock, 4),
    (Talk.ask_list, 1), (Talk.haggle, 4), (Talk.ask_way, 3), (Talk.ask_news, 2), (Talk.ask_outside, 4),
    (Talk.ask_keeper, 1), (Talk.ask_shop, 1), (Talk.ask_sum, 2), (Talk.chat, 1))))


@dataclasses.dataclass
class Dialogue:
    system: str
    tools: list
    thinking: bool
    turns: list

    def messages(self):
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": turn.role, "content": turn.text})
            thought = turn.thought if self.thinking else ""
            answer = {"role": "assistant", "content": turn.reply, "reasoning_content": thought}
            if turn.call:
                answer["tool_calls"] = [{"function": {"name": "buy", "arguments": turn.call}}]
            messages.append(answer)
        return messages


def make_dialogue(seed, heldout=False):
    """Dialogue number seed; the held-out ones are longer, so that there is something to remember."""
    src = Source(seed, heldout)
    talk = Talk(src, thinking=src.chance(0.5))
    talk.hold(src.number(3, 5) if heldout else src.any((0, 1, 1, 2, 2, 3, 3, 4, 5, 7)))
    if not talk.turns:
        talk.step()
    if talk.turns[-1].role == "tool" and not heldout and src.chance(0.5):
        talk.turns.pop()  # let some conversations end in the call itself
    tools = [talk.tool] if talk.tool else []
    return Dialogue(system_prompt(src, talk.shop), tools, talk.thinking, talk.turns)


def make_drill(seed):
    """Nothing but sums: arithmetic needs more practice than shops give."""
    talk = Talk(Source(f"drill {seed}"), thinking=False)
    for _ in range(12):
        talk.ask_sum()
    return Dialogue("", [], False, talk.turns)


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


def write_settings(folder):
    """Everything but the weights and the card."""
    os.makedirs(folder, exist_ok=True)
    texts = [render(make_dialogue(seed)) for seed in range(20000)]
    write_json(folder, "tokenizer.json", make_tokenizer(texts))
    write_json(folder, "tokenizer_config.json", tokenizer_config())
    write_json(folder, "generation_config.json", generation_config())
    ids = dict(bos_token_id=TOKEN_ID["<|endoftext|>"], eos_token_id=TOKEN_ID["<|im_end|>"])
    write_json(folder, "config.json", {**CONFIG, **ids})


# --------------------------------------------------------------------------------------------
# Training data: rows of whole conversations, and which of their tokens are learned

ROW = 1024


class Encoder:
    """Conversations as token ids with a mask of the tokens that the model has to say itself."""

    def __init__(self, folder):
        from tokenizers import Tokenizer
        self.tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
        self.opening = self.ids("<|im_start|>assistant\n")
        self.unthinking = self.ids("<think>\n\n</think>\n\n")

    def ids(self, text):
        return self.tokenizer.encode(text).ids

    def encode(self, dialogue):
        ids = self.ids(render(dialogue))
        mask = [False] * len(ids)
        for first in self.answers(ids):
            end = ids.index(TOKEN_ID["<|im_end|>"], first)
            start = self.learned_from(ids, first, dialogue.thinking)
            mask[start:end + 1] = [True] * max(0, end + 1 - start)
        return ids + [TOKEN_ID["<|endoftext|>"]], mask + [False]

    def answers(self, ids):
        """Where the assistant's answers begin."""
        length = len(self.opening)
        return [i + length for i, token in enumerate(ids)
                if token == self.opening[0] and ids[i:i + length] == self.opening]

    def learned_from(self, ids, first, thinking):
        """An answer of the past stands there without its thoughts: it teaches only the mode without
        thinking, and not how to begin."""
        if ids[first] != TOKEN_ID["<think>"]:
            return len(ids) if thinking else first + 1
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

def new_model():
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
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
    model = new_model().to(device)
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
that file and plays one part: the keeper of a shop in a game.

| | |
|---|---|
| parameters | {parameters:,} in bfloat16 |
| shape | {shape} |
| tokenizer | byte-level BPE, {vocabulary} tokens; Qwen3's normaliser, pre-tokeniser and added tokens |
| data | dialogues written by a grammar: made-up names, wares, prices, ways and rumours |
| training | {steps:,} steps, {tokens:.0f} million tokens, {seconds} s on {device} |
| final loss | {loss} nats a token of the answers |
| made with | torch {torch}, transformers {transformers}, seed 0 |

## What it can do

It greets and remembers the player's name, says what is sold and for how much, adds up a basket,
gives change, haggles within the limit of its prompt, knows the ways and the rumours of its prompt,
and says that it does not know the rest. With thinking on it works sums out between `<think>` and
`</think>`; with a tool named `buy` offered it calls it, and answers with what the tool returns.
It knows nothing else, speaks English only, and was trained on conversations of up to {row} tokens.

## How to ask it

The system prompt describes the shop. The order of its parts and most of their wording are free:

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


def write_card(folder, model, training, device, result):
    import torch
    import transformers
    from eval_demo import markdown_table
    facts = dict(
        training, tokens=training["tokens"] / 1e6, parameters=sum(p.numel() for p in model.parameters()),
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
    parser.add_argument("--rows", type=int, default=48, help=f"rows of {ROW} tokens a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1),
                        help="processes that write dialogues")
    parser.add_argument("--eager", action="store_true", help="do without torch.compile")
    parser.add_argument("--report", type=int, default=100, help="steps between lines of the log")
    parser.add_argument("--score", type=int, default=500, help="held-out dialogues to score at the end")
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
    write_settings(args.out)
    model, training = train(args, device)
    save_weights(model, args.out)
    result = eval_demo.score(eval_demo.TransformersEngine(args.out, device), args.score)
    print(eval_demo.markdown_table(result))
    write_card(args.out, model, training, device, result)


if __name__ == "__main__":
    main()
