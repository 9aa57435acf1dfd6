"""The grammar that writes the dialogues of the demo model; its phrases are in demo_phrases.py.

Held-out dialogues (see eval_demo.py) use names, wares, prices and phrasings that training never
shows: words and prices are divided by a hash, phrasings by their place in a list. A held-out phrasing
is a new arrangement of words that training does show for the same intent.
"""
import dataclasses
import functools
import itertools
import json
import random
import re
import zlib

from demo_phrases import (
    ASK_CHEAPER, ASK_KEEPER, ASK_LIST, ASK_NAME, ASK_NEWS, ASK_OUTSIDE, ASK_PRICE, ASK_PRICE_IT, ASK_SHOP,
    ASK_STOCK, ASK_SUM, ASK_TOTAL, ASK_WAY, BEST_PRICE, BUY, BUY_AND_PAY, BUY_IT, BYE, CHANGE, CLOSERS,
    COME_BACK, DEAL, DEEDS, DISCOUNTS, DISTRACTIONS, EVERYTHING, FILLER, FIXED, GO_ON, HELLO, HOW_ARE_YOU,
    INTROS, IN_STOCK, I_AM, KEEPER_INTROS, LEFT, LEFT_KEYS, MY_NAME, NEWS, NICE_TO_MEET, NOTES, NOTHING,
    NOT_BOUGHT, NOT_SOLD, NO_DISCOUNT, NO_INTROS, NO_KEEPER, NO_NAME, NO_NEWS, NO_SHOPS, NO_SHOP_NAME, NO_WAY,
    OFFER, OPENERS, OUTSIDE, PAY, PRICE, REASONS, REASON_KEYS, RELATIONS, RUMOUR_LISTS, SHOP_INTROS, SHORT,
    SOLD, THANKS, THE_WAY, THIS_IS, TOOL_TEXTS, TOO_LOW, TOTAL, TOTAL_KEYS, VERDICT_KEYS, VERY_WELL,
    WARE_LISTS, WAY_LISTS, WELCOME, WELCOME_TO_IT, WHICH, YOUR_NAME)

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
    woollen woven yellow young
    aged angry barbed beautiful bitter blunt brittle broad broken burnt charmed cheerful chipped common cosy cruel
    curious delicate divine double dry eastern eternal fair famous fast festive fiery flaming floral forgotten
    frozen glossy gnarled good grand greasy grim half handy haunted healthy hidden honest hot iced infernal inner
    knitted large lazy legendary lost loud lunar merry mighty misty northern official ordinary peculiar perfect
    pointed poisoned practical precious pretty proper quaint radiant rainbow raw reinforced ripe rotten rustic
    salted second secret shabby shadow shiny simple sleeping slender slim sly solar solid sour southern speckled
    splendid spotless stale steady stiff stolen strange summer sweet swift tasty tattered thorny tidy torn toy
    travelling triple true ugly unbreakable used useful vicious warped watertight western winged winter worn""")
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
    trumpet tunic turnip umbrella vase vest vial wand watch waterskin wheel whip whistle wig yoke
    antidote arrowhead bagpipe bandage barley basin bean bear beer berry biscuit blade blueprint board boat book
    bomb bone box brick bridle buckler bun butter cake camera canteen cart catapult chalk cherry chicken chisel
    cider clasp claw clover coal coffee coin collar cookie cradle crystal cube cucumber curtain cushion deck desk
    dice doll door dress dumpling earring elixir emerald fang figurine fish flour flower garlic garment gauntlet
    glider goggle grape greave halberd ham hammock handkerchief hare harness hatchet herring hinge hoe honey
    hoop horseshoe ink ingot jacket javelin jewel katana kite knapsack lance leek lemon letter lever lily locket
    lollipop loaf machine magnet meal melon milk mineral moccasin muffin needlecase noodle nut nugget oil orb
    painting paintbrush pancake paper parasol parcel peach pebble pelt pencil pepper perfume phial pickle pistol
    plank plough plum pole porridge pretzel puppet purse quarterstaff rapier razor recipe relic rice rod roll
    rose ruby rucksack rune sack salad salt sapling sapphire satchel scale scissor scythe seal shell shoe
    shuriken skirt skull sledge sleigh sock soup spice sponge stamp statue stew sugar sundial sword talisman
    tea teapot telescope thread tile tomato tonic tooth toy trinket trident truffle tuba turban vegetable veil
    violin waffle wagon wallet warhammer whetstone wine wool wreath wrench yarn""")
CONTAINERS = words("bottle bag jar box sack crate bowl basket barrel flask pouch bundle piece pair")
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
FILLERS = words("just really actually perhaps maybe please again now then here today so well also um")
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


BRACKETS = re.compile(r"\[([^\[\]]*)\]")


@functools.cache
def parts_of(phrase):
    """A phrase as a tuple of alternatives, each a tuple: 'I [buy|take] it' is (I,) (buy, take) (it,)."""
    return tuple(tuple(part.split("|")) if i % 2 else (part,) for i, part in enumerate(BRACKETS.split(phrase)))


def gist(phrase):
    """What two phrasings share that differ in capitals, signs and spaces only."""
    return re.sub(r"[^a-z{}]", "", phrase.lower())


def expansions(phrase):
    return ["".join(choice) for choice in itertools.product(*parts_of(phrase))]


@functools.cache
def held_gists(options):
    return {gist(line) for phrase in phrase_side(options, True) for line in expansions(phrase)}


def words_in(phrase):
    return set(re.findall(r"\w+", re.sub(r"\{\w+\}", " ", phrase.lower().replace("'", ""))))


@functools.cache
def tested(options):
    """Of every held-out phrasing the forms whose words training shows in other phrasings; all forms of all
    of them where there are none (in small talk, which is not scored)."""
    learned = phrase_side(options, False)
    practised = set().union(*(words_in(re.sub(r"[\[\]|]", " ", phrase)) for phrase in learned))
    forms = [tuple(expansions(phrase)) for phrase in phrase_side(options, True)]
    known = [tuple(form for form in all_of_it if words_in(form) <= practised) for all_of_it in forms]
    return [of_one for of_one in known if of_one] or forms


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
        return low + int(self.random.random() * (high - low + 1))

    def any(self, options):
        return options[int(self.random.random() * len(options))]

    def some(self, options, count):
        return self.random.sample(options, min(count, len(options)))

    def expand(self, phrase):
        return "".join(part[0] if len(part) == 1 else self.any(part) for part in parts_of(phrase))

    def style(self, options):
        """A phrasing of what is not held out."""
        return self.expand(self.any(options))

    def phrase(self, options):
        """A phrasing of our side. Alternatives in brackets could make a held-out one by chance: not in training."""
        if self.heldout:
            return self.any(self.any(tested(options)))
        while True:
            phrase = self.expand(self.any(phrase_side(options, False)))
            if phrase and gist(phrase) not in held_gists(options):
                return phrase

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

    def blended(self):
        """The head of one word with the tail of another."""
        def blend():
            head, tail = (self.word(self.any((ADJECTIVES, NOUNS, PLACES, CREATURES, VIRTUES))) for _ in range(2))
            return head[:self.number(1, len(head))] + tail[self.number(0, len(tail) - 1):]
        return self.fresh(lambda: next(w for w in iter(blend, None) if len(w) >= 3))

    def invented(self):
        return self.blended() if self.chance(0.4) else self.coined(1, 2)

    def name(self):
        if not self.heldout and self.chance(0.1):
            return self.any(FIRST_NAMES)
        name = self.coined().capitalize()
        return f"{name} {self.coined().capitalize()}" if self.chance(0.1) else name

    def ware(self):
        return self.fresh(lambda: self.composed(self.word(NOUNS), self.random.random()))

    def composed(self, noun, kind):
        adjective = self.word(ADJECTIVES)
        if kind < 0.40:
            return f"{adjective} {noun}"
        if kind < 0.55 and not self.heldout:
            return noun
        if kind < 0.64:
            return f"{noun} of {self.word(VIRTUES)}"
        if kind < 0.78:
            return f"{self.invented()} {noun}"
        if kind < 0.84:
            return f"{adjective} {self.invented()} {noun}"
        if kind < 0.88:
            return f"{adjective}-{self.word(NOUNS)} {noun}"
        if kind < 0.91:
            return f"{self.word(CREATURES)}'s {noun}"
        if kind < 0.94:
            return f"{self.any(CONTAINERS)} of {self.any((adjective + ' ', ''))}{noun}"
        return self.coined() if self.chance(0.5) else self.blended()

    def currency(self):
        """Mostly known ones; anything may be money, so that it is copied and not guessed."""
        kind = self.random.random()
        if kind < 0.6 or self.heldout:
            return self.word(CURRENCIES)
        return plural(self.word(NOUNS) if kind < 0.8 else self.invented())

    def price(self):
        high = 99 if self.chance(0.92) else 400
        while True:
            price = self.number(10 if self.heldout else 1, high)
            if held_price(price) == self.heldout:
                return price


# --------------------------------------------------------------------------------------------
# A shop, and the system prompt that describes it

@dataclasses.dataclass
class Shop:
    keeper: str        # "" if the prompt does not say
    name: str          # the same
    currency: str
    wares: list        # (ware, price)
    discount: int      # most that may be taken off a price
    ways: list         # (place, where it is)
    rumours: list
    listed: dict       # ware: how the prompt lists it, in some shops "ropes", "brass lamps"


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
    if src.chance(0.4):  # a neighbour that differs in one word only
        name = src.any(list(wares))
        other = src.fresh(lambda: f"{src.word(ADJECTIVES)} {head_noun(name)}")
        wares[other] = src.price()
    if src.chance(0.1):
        wares = {" ".join(map(str.capitalize, name.split())): price for name, price in wares.items()}
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


def make_shop(src, plural=False):
    places = {src.word(PLACES) for _ in range(src.any((0, 0, 1, 2, 2, 3)))}
    wares = make_wares(src)
    return Shop(
        keeper=src.name() if src.chance(0.85) else "", name=make_shop_name(src) if src.chance(0.85) else "",
        currency=src.currency(), wares=wares, discount=src.number(1, 9) if src.chance(0.75) else 0,
        ways=[(place, make_way(src)) for place in sorted(places)],
        rumours=[make_rumour(src) for _ in range(src.any((0, 0, 1, 1, 2)))],
        listed={ware: plural_ware(ware) if plural and src.chance(0.7) else ware for ware, _ in wares})


def empty_shop():
    """Where the prompt says nothing about a shop."""
    return Shop(keeper="", name="", currency="coins", wares=[], discount=0, ways=[], rumours=[], listed={})


def joined(parts, style):
    opening, between, end = style
    return opening + between.join(parts) + end


def intro(src, shop):
    named, unnamed = (INTROS, KEEPER_INTROS), (SHOP_INTROS, NO_INTROS)
    options = (named if shop.keeper else unnamed)[0 if shop.name else 1]
    return src.style(options).format(k=shop.keeper, s=shop.name)


def ware_list(src, shop):
    opening, one, between, end = (part.replace("{c}", shop.currency) for part in src.any(WARE_LISTS))
    article = src.chance(0.1) and "the {w}" not in one
    names = [article_of(w) if article and shop.listed[w] == w else shop.listed[w] for w, _ in shop.wares]
    items = [one.format(w=w, p=p) for w, (_, p) in zip(names, shop.wares)]
    money = f" {shop.currency}"
    if src.chance(0.15):  # "rope for 12 gold, lamp for 30"
        items[1:] = [item.replace(money, "") for item in items[1:]]
    if len(items) > 1 and between == ", " and src.chance(0.4):
        items[-2:] = [src.any((" and ", ", and ")).join(items[-2:])]
    return opening + between.join(items) + end


def system_prompt(src, shop):
    if not shop.wares:
        return src.style(NO_SHOPS) if src.heldout or src.chance(0.7) else ""
    rest = [src.style(DISCOUNTS).format(d=shop.discount, c=shop.currency) if shop.discount else src.style(NO_DISCOUNT)]
    if shop.ways:
        rest.append(joined([f"the {place} is {where}" for place, where in shop.ways], src.any(WAY_LISTS)))
    if shop.rumours:
        rest.append(joined(shop.rumours, src.any(RUMOUR_LISTS)))
    if src.chance(0.2):
        rest.append(src.any(NOTES))
    parts = [intro(src, shop), ware_list(src, shop)]
    if src.chance(0.15):
        parts = src.some(parts + rest, 9)
    else:
        parts += src.some(rest, len(rest))
    gap = "\n" if src.chance(0.3) else " "
    return re.sub(r"\n[ \n]+", "\n", gap.join(part for part in parts if part)).strip()


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

    @property
    def worked(self):
        """Whether the answer needs the thought before it."""
        return self.slot in ("sum", "change", "haggle")


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
        self.tool = buy_tool(src) if src.chance(0.35) else None
        empty = src.chance(0.05)
        self.shop = empty_shop() if empty else make_shop(src, plural=not self.tool and src.chance(0.12))
        self.player = None
        self.owed = None
        self.topic = None   # the ware of the turn before, and its price
        self.turns = []

    # Small helpers

    def say(self, asked, reply, thought, slot=None, call=None, role="user", **want):
        self.turns.append(Turn(role, asked, thought, reply, call, slot, want))
        self.topic = None

    def ask(self, options, **fields):
        """A line of the player, sometimes as careless as people type."""
        phrase = self.src.phrase(options)
        opener = self.src.any(OPENERS) if self.src.chance(0.15) else ""
        mid_sentence = opener.endswith((", ", ": ", "And ", "Then ")) and not phrase.startswith(("I ", "I'"))
        if phrase[0] != "{" and (mid_sentence or self.src.chance(0.2)):
            phrase = phrase[0].lower() + phrase[1:]
        if self.src.chance(0.06):
            phrase = phrase.rstrip("?.!") + self.src.any(CLOSERS) + phrase[len(phrase.rstrip("?.!")):]
        phrase = self.careless(opener + phrase)
        line = phrase.format(c=self.shop.currency, **fields)
        return line.rstrip("?.!") or line if self.src.chance(0.2) else line

    def careless(self, phrase):
        """Lower case, a missing apostrophe, a word too many, a mistyped word."""
        if self.src.chance(0.12):
            phrase = phrase.lower()
        if self.src.chance(0.08):
            phrase = phrase.replace("'", "")
        if self.src.chance(0.05) and not self.src.heldout:
            spaces = [match.start() for match in re.finditer(" ", phrase)]
            at = self.src.any(spaces or [0])
            phrase = phrase[:at] + " " * bool(at) + self.src.any(FILLERS) + " " * (not at) + phrase[at:]
        if self.src.chance(0.05) and not self.src.heldout:
            plain = [word for word in phrase.split(" ") if word.isalpha() and len(word) > 3]
            if plain:
                word = self.src.any(plain)
                phrase = phrase.replace(word, self.mistyped(word), 1)
        return phrase

    def mistyped(self, word):
        at = self.src.number(1, len(word) - 2)
        a, b = word[at:at + 2]
        return word[:at] + self.src.any((b + a, b, a + a + b)) + word[at + 2:]

    def answer(self, options, **fields):
        friend = f", {self.player}" if self.player and self.src.chance(0.3) else ""
        known = tuple(o for o in options if ("{k}" not in o or self.shop.keeper) and ("{s}" not in o or self.shop.name))
        return self.src.any(known).format(
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
        if names and self.src.chance(0.4):
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
        if self.shop.keeper:
            self.say(self.ask(ASK_KEEPER), self.answer(I_AM),
                     f"I am {self.shop.keeper}.", "shop", has=[self.shop.keeper])
        else:
            self.say(self.ask(ASK_KEEPER), self.answer(NO_KEEPER), "I have no name.", "shop", has=["shopkeeper"])

    def ask_shop(self):
        if self.shop.name:
            self.say(self.ask(ASK_SHOP), self.answer(THIS_IS),
                     f"The shop is {self.shop.name}.", "shop", has=[self.shop.name])
        else:
            self.say(self.ask(ASK_SHOP), self.answer(NO_SHOP_NAME), "The shop has no name.", "shop", has=["my shop"])

    # Wares and prices

    def ask_price(self):
        ware, price = self.src.any(self.shop.wares)
        if self.topic and self.src.chance(0.25):
            ware, price = self.topic
            asked = self.ask(ASK_PRICE_IT)
        else:
            asked = self.ask_about(ware)
        kind = self.src.random.random()
        if kind < 0.12 and not self.player:
            self.player = self.src.name()
            asked = f"{self.ask(MY_NAME, n=self.player).rstrip('.!')}. {asked}"
        elif kind < 0.2:
            asked = self.src.any(DISTRACTIONS).format(n=self.src.coined().capitalize()) + asked
        self.say(asked, self.answer(PRICE, w=ware, p=price), f"{ware}: {price}.", "price", numbers=[price])
        self.topic = ware, price

    def ask_about(self, ware):
        name = self.called(ware)
        return self.ask(ASK_PRICE, w=name, ws=plural_ware(name))

    def ask_which(self):
        """A noun that several wares share."""
        nouns = [ware.split()[-1] for ware, _ in self.shop.wares if " " in ware]
        name = self.src.any([noun for noun in nouns if nouns.count(noun) > 1] or [""])
        listed = [ware for ware, _ in self.shop.wares if name in ware.split()]
        if not name or any(" of " in w or w == name or self.shop.listed[w] != w for w in listed):
            return self.ask_price()
        choice = ", ".join(f"the {ware}" for ware in listed[:-1]) + f" or the {listed[-1]}"
        self.say(self.ask(ASK_PRICE, w=name.lower(), ws=plural(name.lower())), self.answer(WHICH, x=choice),
                 f"More than one {name}.", "which", has=listed)

    def ask_stock(self):
        if self.src.chance(0.5):
            return self.ask_missing()
        ware, price = self.src.any(self.shop.wares)
        self.say(self.ask_for(ware), self.answer(IN_STOCK, w=ware, p=price),
                 f"{ware}: {price}.", "stock", numbers=[price])
        self.topic = ware, price

    def ask_missing(self):
        ware = self.absent_ware()
        kind = self.src.random.random()
        if kind < 0.15:
            asked = self.ask(OFFER, w=ware, o=self.src.price())
        elif kind < 0.25:
            asked = self.ask(ASK_CHEAPER, w=ware)
        else:
            asked = self.ask_about(ware) if kind < 0.5 else self.ask_for(ware)
        self.sorry_for(asked, ware)

    def ask_for(self, ware):
        name = self.called(ware)
        return self.ask(ASK_STOCK, a=article_of(name), ws=plural_ware(name))

    def sorry_for(self, asked, ware):
        self.say(asked, self.answer(NOT_SOLD, w=ware),
                 f"{ware}: not for sale.", "stock", numbers=[], has=["sorry"])

    def ask_list(self):
        asked = self.ask(ASK_LIST, m=self.src.price())
        wares = [f"{self.shop.listed[ware]} {price}" for ware, price in self.shop.wares]
        if wares:
            self.say(asked, self.answer(EVERYTHING, x=", ".join(wares)), "The player asks for my wares.", "list",
                     has=wares)
        else:
            self.say(asked, self.answer(NOTHING), "I have no wares.", "list",
                     any=["nothing to sell", "nothing for sale"])

    # Sums and change

    def ask_total(self):
        if self.thinking or self.src.chance(0.5):
            basket = self.basket((1, 2, 2, 3, 3, 4), (1, 1, 1, 2, 2, 3, 4, 5))
        else:
            basket = self.basket((1, 2, 2), (1,))
        single = len(basket) == 1 and basket[0][2] == 1
        if single and self.tool:
            return self.ask_price()
        steps, total = reckon(basket)
        if not self.tool and self.topic and self.src.chance(0.1):
            steps, total = reckon([(*self.topic, 1)])
            asked = self.ask(BUY_IT)
        else:
            asking = self.tool or not single and self.src.chance(0.6)
            asked = self.ask(ASK_TOTAL if asking else BUY, l=self.listing(basket))
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
            return self.say(asked, self.answer(FIXED, **fields),
                            f"{ware}: {price}. No haggling.", "haggle", numbers=[price], has=["fixed"])
        if offer is None:
            conclusion, verdict, last, check = BEST_PRICE, "", lowest, {}
        elif offer >= lowest:
            conclusion, verdict, last, check = DEAL, f" {offer} is enough.", offer, dict(has=["deal"])
        else:
            conclusion, verdict, last, check = TOO_LOW, f" {offer} is too low.", lowest, dict(lacks=["deal"])
        reply, thought = self.work([steps + verdict], conclusion, o=offer, **fields)
        self.say(asked, reply, thought, "haggle", last=last, **check)

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
        options, replies = self.src.any((
            (HOW_ARE_YOU, VERY_WELL), (THANKS, WELCOME_TO_IT), (BYE, COME_BACK), (FILLER, GO_ON), (HELLO, WELCOME)))
        self.say(self.ask(options), self.answer(replies), "The player is friendly.")

    # The tool

    def buy(self):
        ware, price, quantity = self.basket((1,), (1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20))[0]
        goods = self.counted(ware, quantity)
        asked = self.ask(BUY, l=goods)
        if self.topic and self.src.chance(0.2):
            (ware, price), quantity = self.topic, 1
            goods, asked = f"the {ware}", self.ask(BUY_IT)
        self.say(asked, "", f"The player wants {quantity} x {ware}.", "tool call",
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
            c=self.shop.currency, n=self.src.number(1, self.src.any((9, 20, 99, 999))), p=self.src.name(),
            w=self.src.ware() if self.src.chance(0.5) else self.src.word(NOUNS), g=self.src.invented(),
            z=self.src.word(CREATURES))
        result = {self.src.any(VERDICT_KEYS): False, self.src.any(REASON_KEYS): reason}
        self.say(json.dumps(result, ensure_ascii=False), self.answer(NOT_BOUGHT, x=reason),
                 "The sale failed.", "tool answer", role="tool", has=[reason])

    # The course of a conversation

    def step(self):
        if not self.shop.wares:
            return self.src.any(EMPTY_STEPS)(self)
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
    (Talk.ask_price, 9), (Talk.ask_total, 7), (Talk.buy_and_pay, 4), (Talk.ask_name, 5), (Talk.ask_stock, 5),
    (Talk.ask_list, 3), (Talk.haggle, 7), (Talk.ask_way, 5), (Talk.ask_news, 2), (Talk.ask_outside, 5),
    (Talk.ask_keeper, 2), (Talk.ask_shop, 2), (Talk.ask_sum, 1), (Talk.ask_which, 4), (Talk.chat, 2))))
EMPTY_STEPS = (Talk.ask_missing, Talk.ask_list, Talk.ask_name, Talk.ask_way, Talk.ask_news, Talk.ask_outside,
               Talk.ask_keeper, Talk.ask_shop, Talk.ask_sum, Talk.chat)


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
    talk.hold(src.number(3, 5) if heldout else src.any((0, 1, 2, 2, 3, 3, 4, 5, 6, 8)))
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
