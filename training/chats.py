"""Rule-made chats: what a small honest program can say, many ways of saying it, and many ways of not knowing.

A chat is a list of {"role", "content"} messages. Each maker returns one; `make_chat` picks among them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from training.intents import CAN_NOT_ROWS, EVERYDAY_ROWS, IDENTITY_ROWS, SLOTS, SMALL_TALK_ROWS
from training.stories import MORALS, Story, choose, plural_food, tell, tell_short
from training.words import (
    ANIMALS,
    BOYS,
    CAPITALS,
    COLOR_OF,
    COLORS,
    FACTS,
    FOODS,
    GIRLS,
    HEROES,
    JOBS,
    NUMBERS,
    OPPOSITE_PAIRS,
    PET_NAMES,
    PLACES,
    THINGS,
    TOYS,
    UNTAUGHT_COUNTRIES,
    article,
    cap,
)

Turn = tuple[str, str]
Message = dict[str, str]
NAMES = GIRLS + BOYS
SLOT = re.compile(r"\{(\w+)\}")
# What a question may put after "a": nothing that wants "an".
AFTER_A = {
    kind: [word for word in words if word[0] not in "aeiou"]
    for kind, words in (("animal", HEROES), ("thing", list(THINGS)), ("job", list(JOBS)))
}

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SIZES = [row.split() for row in ("ant bee", "snail butterfly", "mouse frog", "robin", "squirrel hedgehog", "rabbit duck hen crow", "cat fox goose penguin",
         "dog swan koala", "sheep goat wolf", "pig deer panda", "lion tiger bear donkey", "horse cow zebra camel", "giraffe", "elephant", "whale")]  # fmt: skip

SYSTEMS = [
    "You are a helpful assistant.",
    "You are a friendly assistant. Answer in short sentences.",
    "You are the small demo model of dsv2.",
    "Answer simply and honestly.",
    "You tell short stories and answer simple questions.",
    "You are a kind story teller.",
    "Be brief.",
]

STORY_ASKS = [
    "Tell me a story about {x}.", "Tell me a story about {x}", "Can you tell me a story about {x}?",
    "Write a story about {x}.", "Please tell a short story about {x}.", "I would like a story about {x}.",
    "Make up a story about {x}.", "A story about {x}, please.", "Do you know a story about {x}?",
    "Write a short story about {x}", "tell me a story about {x}", "Could you write a tale about {x}?",
]  # fmt: skip
ANY_STORY = [
    "Tell me a story.", "Tell me a story", "Can you tell me a story?", "Please tell me a story.", "I want a story.",
    "Write a short story.", "Another story, please.", "Tell me a bedtime story.", "story please", "Tell me a tale.",
    "Make up a story.", "Do you know a story?",
]  # fmt: skip
LEADS = ["", "", "", "", "Sure! ", "Of course. ", "Here is a story. "]
UNKNOWN = [
    "I do not know that.", "I do not know. I am a very small model.", "I am sorry, I do not know that.",
    "I have not learned that.", "That is something I do not know.", "I am not sure, so I will not guess.",
]  # fmt: skip
UNKNOWN_ASKS = [
    "What is the capital of {country}?", "How many people live in {country}?", "Who is the king of {country}?",
    "Who wrote the book about {x}?", "When was {name} {surname} born?", "Who is {name} {surname}?",
    "Who invented the {thing}?", "When was the {thing} invented?", "How much does {a_thing} cost?",
    "How far is it to {country}?", "What language do people speak in {country}?", "How heavy is {x}?",
    "How long does {x} live?", "What did {name} {surname} do?", "Where was {name} {surname} born?",
    "Who painted the {thing}?", "What is the biggest city in {country}?", "How tall is {name} {surname}?",
    "What is the history of {country}?", "Which company makes the best {thing}?", "Who discovered {country}?",
]  # fmt: skip
HELD_OUT_ASKS = ["What is the largest lake in {country}?", "Which songs did {name} {surname} write?"]
SURNAMES = """Smith Brown Miller Wilson Moore Taylor Clark Hall Young King Wright Scott Hill Adams Baker Nelson Carter
Turner Parker Evans Morris Cook Bell Ward Cox Gray James Watson Brooks Price Wood Ross Long Foster Perry""".split()


def vary(rng: random.Random, text: str) -> str:
    """People drop capitals and marks, and add a word of politeness."""
    roll = rng.random()
    if roll < 0.12:
        return text.lower()
    if roll < 0.22:
        return text.rstrip(".?!")
    if roll < 0.27:
        return "Please: " + text
    if roll < 0.30:
        return "Hello. " + text
    if roll < 0.33:
        return text.lower().rstrip(".?!")
    return text


def fill(rng: random.Random, *texts: str) -> list[str]:
    """The texts with each `{slot}` filled alike in all of them."""
    animal, thing, food = rng.choice(AFTER_A["animal"]), rng.choice(AFTER_A["thing"]), rng.choice(FOODS)
    pet, pet2 = rng.sample(PET_NAMES, 2)
    values = {name: rng.choice(choices) for name, choices in SLOTS.items()} | {
        "animal": animal, "thing": thing, "a_thing": article(thing), "a_food": article(food), "foods": plural_food(food),
        "name": rng.choice(NAMES), "pet": pet, "pet2": pet2, "job": rng.choice(AFTER_A["job"]),
        "country": rng.choice([*CAPITALS, *UNTAUGHT_COUNTRIES]), "number": rng.choice(NUMBERS[4:]),
        "big": str(rng.randint(21, 999)), "big2": str(rng.randint(21, 999)),
    }  # fmt: skip
    return [
        cap(SLOT.sub(lambda match: values[match.group(1)], text)) if SLOT.search(text) else text
        for text in texts
    ]


def from_rows(rng: random.Random, rows: list[tuple[list[str], list[str]]]) -> list[Turn]:
    asks, replies = rng.choice(rows)
    ask, reply = fill(rng, rng.choice(asks), rng.choice(replies))
    return [(vary(rng, ask), reply)]


def small_talk(rng: random.Random) -> list[Turn]:
    return from_rows(rng, SMALL_TALK_ROWS)


def identity(rng: random.Random) -> list[Turn]:
    return from_rows(rng, IDENTITY_ROWS)


def can_not(rng: random.Random) -> list[Turn]:
    return from_rows(rng, CAN_NOT_ROWS)


def everyday(rng: random.Random) -> list[Turn]:
    return from_rows(rng, EVERYDAY_ROWS)


def unknown(rng: random.Random, held_out: bool = False) -> list[Turn]:
    thing = rng.choice(list(THINGS))
    ask = rng.choice(HELD_OUT_ASKS if held_out else UNKNOWN_ASKS).format(
        country=rng.choice(UNTAUGHT_COUNTRIES), name=rng.choice(NAMES), surname=rng.choice(SURNAMES), thing=thing,
        a_thing=article(thing), x=article(rng.choice(list(ANIMALS))),
    )  # fmt: skip
    return [(vary(rng, ask), rng.choice(UNKNOWN))]


def animal_fact(rng: random.Random) -> Turn:
    """One question and its answer from the table of animals."""
    name = rng.choice(list(ANIMALS))
    animal, a_name = ANIMALS[name], article(name)
    plural = {"mouse": "mice", "sheep": "sheep", "goose": "geese", "deer": "deer", "wolf": "wolves", "fish": "fish",
              "butterfly": "butterflies", "fox": "foxes", "donkey": "donkeys", "monkey": "monkeys"}.get(name, name + "s")  # fmt: skip
    legs = animal["legs"]
    leg_line = f"{cap(a_name)} has no legs." if legs == "no" else f"{cap(a_name)} has {legs} legs."
    sound = animal["sound"]
    sound_line = (
        f"{cap(a_name)} makes almost no sound." if sound == "no sound" else f"{cap(a_name)} says {sound}."
    )
    if sound in "song click sniff hum buzz bark chatter growl roar trumpet hiss howl".split():
        sound_line = f"The sound of {a_name} is a {sound}."
    return rng.choice(
        [
            (f"[What do {plural} eat?|What does {a_name} eat?|What is the food of {a_name}?]", f"[{cap(plural)} eat {animal['food']}.|{cap(a_name)} eats {animal['food']}.]"),
            (f"[How many legs does {a_name} have?|How many legs do {plural} have?]", leg_line),
            (f"[What is a baby {name} called?|What do you call a young {name}?|What is the name for a baby {name}?]", f"A baby {name} is called {article(animal['baby'])}."),
            (f"[What sound does {a_name} make?|What does {a_name} say?|What noise does {a_name} make?]", sound_line),
            (f"[Where do {plural} live?|Where does {a_name} live?|Where can I find {a_name}?]", f"{cap(a_name)} can live {PLACES.get(animal['place'], 'in the ' + animal['place'])}."),
            (f"[What can {a_name} do?|What are {plural} good at?|What do {plural} do?]", f"{cap(a_name)} can {animal['can']}."),
        ]
    )  # fmt: skip


def thing_fact(rng: random.Random) -> Turn:
    thing = rng.choice(list(THINGS))
    use, stuff = THINGS[thing]
    return rng.choice(
        [
            (f"[What is {article(thing)} for?|What do you do with {article(thing)}?|What is the use of {article(thing)}?|What do people use {article(thing)} for?]", f"{cap(article(thing))} is for {use}."),
            (f"[What is {article(thing)} made of?|What are {thing}s made of?]", f"{cap(article(thing))} is often made of {stuff}."),
            (f"[What is {article(thing)}?|Can you explain what {article(thing)} is?]", f"{cap(article(thing))} is a thing for {use}."),
        ]
    )  # fmt: skip


def fact(rng: random.Random) -> Turn:
    """A taught fact, its wordings still in brackets: the only ones the model may be expected to know."""
    roll = rng.random()
    if roll < 0.28:
        ask, answer = animal_fact(rng)
    elif roll < 0.42:
        ask, answer = thing_fact(rng)
    elif roll < 0.52:
        country = rng.choice(list(CAPITALS))
        ask = f"[What is the capital of {country}?|What is {country}'s capital?|Which city is the capital of {country}?]"
        answer = f"The capital of {country} is {CAPITALS[country]}."
    elif roll < 0.61:
        thing = rng.choice(list(COLOR_OF))
        ask, answer = (
            f"[What color is {thing}?|Which color does {thing} have?]",
            f"{cap(thing)} is {COLOR_OF[thing]}.",
        )
    elif roll < 0.70:
        pair = rng.choice(OPPOSITE_PAIRS)
        a, b = pair if rng.random() < 0.5 or pair[0] in ("light",) else (pair[0], pair[1])
        ask = f"[What is the opposite of {a}?|Tell me the opposite of {a}.|What is not {a}?]"
        answer = f"The opposite of {a} is {b}."
    elif roll < 0.77:
        job = rng.choice(list(JOBS))
        ask, answer = (
            f"[What does {article(job)} do?|What is the job of {article(job)}?]",
            f"{cap(article(job))} {JOBS[job]}.",
        )
    else:
        ask, answer = rng.choice(FACTS)
    return ask, answer


def facts(rng: random.Random) -> list[Turn]:
    pairs = [fact(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
    return [(vary(rng, choose(rng, ask)), choose(rng, answer)) for ask, answer in pairs]


def sums(rng: random.Random) -> list[Turn]:
    turns = []
    for _ in range(rng.choice([1, 2, 3])):
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        if rng.random() < 0.5:
            a, b = max(a, b), min(a, b)
            words, sign, total = "minus", "-", a - b
        else:
            words, sign, total = "plus", "+", a + b
        if rng.random() < 0.5:
            ask = rng.choice(
                ["What is {a} {s} {b}?", "{a} {s} {b} = ?", "How much is {a} {s} {b}?", "{a}{s}{b}"]
            )
            turns.append((ask.format(a=a, s=sign, b=b), f"{a} {sign} {b} = {total}."))
        else:
            ask = rng.choice(["What is {a} {w} {b}?", "How much is {a} {w} {b}?"]).format(
                a=NUMBERS[a], w=words, b=NUMBERS[b]
            )
            turns.append((vary(rng, ask), f"{cap(NUMBERS[a])} {words} {NUMBERS[b]} is {NUMBERS[total]}."))
    return turns


def story_request(rng: random.Random, held_out: bool = False) -> list[Turn]:
    """A story about what was asked for, and sometimes questions about it."""
    wanted: dict[str, str] = {}
    roll = rng.random()
    if roll < 0.14:
        ask = rng.choice(ANY_STORY)
    else:
        x = []
        if roll < 0.52:
            wanted["kind"] = rng.choice(HEROES)
            x.append(article(wanted["kind"]) if rng.random() < 0.9 else "the " + wanted["kind"])
            if rng.random() < 0.25:
                wanted["hero"] = rng.choice(PET_NAMES + NAMES)
                x[-1] += rng.choice([" named ", " called "]) + wanted["hero"]
        elif roll < 0.68:
            wanted["hero"] = rng.choice(NAMES)
            wanted["kind"] = "girl" if wanted["hero"] in GIRLS else "boy"
            x.append(wanted["hero"] if rng.random() < 0.5 else f"a {wanted['kind']} named {wanted['hero']}")
        if not x or rng.random() < 0.3:
            key = rng.choice(["toy", "place", "food"])
            wanted[key] = rng.choice({"toy": TOYS, "place": list(PLACES), "food": FOODS}[key])
            x.append(article(wanted[key]) if key != "place" or rng.random() < 0.5 else "the " + wanted[key])
        if wanted.get("kind") in ANIMALS and rng.random() < 0.15:
            wanted["fkind"] = rng.choice([animal for animal in HEROES if animal != wanted["kind"]])
            x.append(article(wanted["fkind"]))
        ask = rng.choice(STORY_ASKS).format(x=" and ".join(x))
        if rng.random() < 0.12:
            key = rng.choice([key for key in ("hero", "place", "toy") if key not in wanted])
            wanted[key] = rng.choice({"hero": PET_NAMES, "place": list(PLACES), "toy": TOYS}[key])
            more = {
                "hero": "The hero should be called {}.",
                "place": "It should happen {}.",
                "toy": "There should be {} in it.",
            }[key]
            ask += " " + more.format(
                {"place": PLACES.get(wanted[key]), "toy": article(wanted[key])}.get(key, wanted[key])
            )
    story = None
    for _ in range(40):  # a thing that was asked for must come up
        story = tell(rng, held_out=held_out, **wanted)
        if all(word in story.text for key, word in wanted.items()):
            break
    assert story is not None
    turns = [(vary(rng, ask), rng.choice(LEADS) + story.text)]
    if rng.random() < 0.45:
        turns += story_questions(rng, story)
    return turns


def story_questions(rng: random.Random, story: Story) -> list[Turn]:
    slots, text = story.slots, story.text
    he, hero, kind, friend, fkind = (slots[key] for key in ("he", "hero", "kind", "friend", "fkind"))
    pairs = [
        (f"[What was the name of the {kind}?|What was the {kind} called?|Who was the story about?]", f"[The {kind} was called {hero}.|The name of the {kind} was {hero}.]"),
        (f"[What kind of animal was {friend}?|Who was {friend}?]", f"{friend} was {article(fkind)}."),
        (f"[Who was {hero}?|Was {hero} a cat?]" if kind not in ("girl", "boy", "cat") else f"Who was {hero}?", f"{hero} was {article(kind)}."),
        (f"[Who was {slots['his']} friend?|Who was {hero}'s friend?|Who was the friend?]", f"[The friend was {friend} the {fkind}.|{hero}'s friend was {friend}.]"),
    ]  # fmt: skip
    if f"lived {slots['in_place']}" in text:
        pairs.append((f"[Where did {hero} live?|Where did {he} live?]", f"{hero} lived {slots['in_place']}."))
    pairs.append(
        (
            "[What can we learn from the story?|What is the moral of the story?|What did we learn from it?|What does the story teach?]",
            MORALS[story.plot],
        )
    )
    pairs.append(
        (
            "[What is a good title?|Give the story a title.|What should the story be called?]",
            f"[{hero} the {cap(kind)}|{hero} and {friend}|The {cap(kind)} and the {cap(fkind)}|The Day of {hero}]",
        )
    )
    thanks = (
        "[Thank you!|That was nice.|I liked it.|Nice story!|Good story]",
        "[I am glad that you liked it.|You are welcome! Would you like another one?|Thank you.]",
    )
    pairs = [pair for pair in pairs if friend in text or friend not in pair[1]]
    chosen = rng.sample(pairs, rng.choice([1, 1, 2]))
    if rng.random() < 0.3:
        chosen.append(thanks)
    return [(choose(rng, ask), choose(rng, answer)) for ask, answer in chosen]


def any_name(rng: random.Random) -> str:
    """A known name, or one made up on the spot: remembering must mean copying, not knowing."""
    if rng.random() < 0.6:
        return rng.choice(NAMES + SURNAMES)
    syllables = [
        rng.choice("bdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.choice([1, 2, 2, 3]))
    ]
    return cap(
        rng.choice(["", "", "a", "e", "i", "o", "u"])
        + "".join(syllables)
        + rng.choice(["", "", "n", "l", "s", "r", "x"])
    )


def memory(rng: random.Random) -> list[Turn]:
    """Something the user says about themselves, some turns in between, and a question about it."""
    name, pet, color, food, pet_kind = (
        any_name(rng), any_name(rng) if rng.random() < 0.3 else rng.choice(PET_NAMES), rng.choice(COLORS), rng.choice(FOODS),
        rng.choice("dog cat rabbit mouse parrot horse turtle".split()),
    )  # fmt: skip
    told = [
        (f"[My name is {name}.|I am {name}.|Hi, I am {name}.|Hello, my name is {name}|You can call me {name}.|I'm {name}]",
         f"[Hello, {name}! What can I do for you?|Nice to meet you, {name}.|Hi {name}! Would you like a story?]",
         "[What is my name?|Do you know my name?|What's my name?|Who am I?|Do you remember my name?]",
         f"[Your name is {name}.|You told me that your name is {name}.]", "name"),
        (f"[My favorite color is {color}.|I like the color {color}.]", f"[{cap(color)} is a nice color.|I will remember that in this chat.]",
         "[What is my favorite color?|Which color do I like?]", f"[Your favorite color is {color}.|You like {color}.]", "favorite color"),
        (f"[My favorite food is {food}.|I like to eat {food}.]", f"[{cap(food)} is good.|That sounds tasty.]",
         "[What is my favorite food?|What do I like to eat?]", f"[Your favorite food is {food}.|You like {food}.]", "favorite food"),
        (f"[I have a {pet_kind} named {pet}.|My {pet_kind} is called {pet}.]", f"[{pet} is a nice name for a {pet_kind}.|How nice! A {pet_kind} is a good friend.]",
         f"[What is my {pet_kind} called?|What is the name of my {pet_kind}?|What is my {pet_kind}'s name?]", f"Your {pet_kind} is called {pet}.", "pet"),
    ]  # fmt: skip
    chosen = rng.sample(told, rng.choice([1, 1, 2])) if rng.random() < 0.5 else [told[0]]
    turns = [(ask, answer) for ask, answer, *_ in chosen]
    for _ in range(rng.choice([0, 1, 1, 2, 2, 3])):
        turns += rng.choice([small_talk, sums, facts, unknown, identity, can_not])(rng)[:1]
    for _, _, ask, answer, _ in rng.sample(chosen, len(chosen)):
        turns.append((ask, answer))
    if rng.random() < 0.25:
        missing = rng.choice([row for row in told if row not in chosen])
        turns.append(
            (
                missing[2],
                f"[You have not told me that.|I do not know. You have not told me about your {missing[4]}.]",
            )
        )
    return [(vary(rng, choose(rng, ask)), choose(rng, answer)) for ask, answer in turns]


def never_told(rng: random.Random) -> list[Turn]:
    ask = choose(
        rng,
        "[What is my name?|Do you know my name?|Who am I?|What is my dog called?|What is my favorite color?]",
    )
    return [
        (
            vary(rng, ask),
            rng.choice(["You have not told me that.", "I do not know. You have not told me yet."]),
        )
    ]


def list_request(rng: random.Random) -> list[Turn]:
    count, (what, pool) = rng.choice([2, 3, 4]), rng.choice(
        [("animals", HEROES), ("colors", COLORS), ("fruits", "apple pear plum banana orange peach melon strawberry".split()),
         ("things to eat", FOODS), ("girl names", GIRLS), ("boy names", BOYS), ("toys", TOYS), ("jobs", list(JOBS)),
         ("animals on a farm", "cow pig horse sheep goat hen duck goose donkey".split()), ("birds", "duck hen owl crow robin swan parrot penguin goose".split())]
    )  # fmt: skip
    picked = rng.sample(pool, count)
    ask = choose(
        rng,
        f"[Name {NUMBERS[count]} {what}.|Tell me {NUMBERS[count]} {what}.|Can you name {NUMBERS[count]} {what}?|Give me {NUMBERS[count]} {what}.|List {count} {what}.]",
    )
    listed = ", ".join(picked[:-1]) + " and " + picked[-1]
    return [(vary(rng, ask), choose(rng, f"[{cap(listed)}.|Here are {NUMBERS[count]} {what}: {listed}.]"))]


def sentence_request(rng: random.Random) -> list[Turn]:
    word = rng.choice(HEROES + TOYS + FOODS)
    name, place = rng.choice(NAMES), rng.choice(list(PLACES))
    ask = choose(
        rng,
        f"[Make a sentence with the word {word}.|Use {word} in a sentence.|Write a sentence about {article(word)}.|Say something about {article(word)}.]",
    )
    answer = choose(
        rng,
        f"[{name} saw {article(word)} {PLACES[place]}.|There is {article(word)} {PLACES[place]}.|{name} has a picture of {article(word)}.]",
    )
    return [(vary(rng, ask), answer)]


def counting(rng: random.Random) -> list[Turn]:
    """Numbers, weekdays and letters in their order."""
    roll = rng.random()
    if roll < 0.35:
        first = rng.choice([1, 1, 1, rng.randint(2, 9)])
        last = first + rng.randint(2, 9)
        ask = f"[Count from {first} to {last}.|Can you count from {first} to {last}?|Count from {NUMBERS[first]} to {NUMBERS[last]}.]"
        if first == 1:
            ask = f"[Count to {last}.|Can you count to {NUMBERS[last]}?|Please count to {last}|{ask}]"
        answer = ", ".join(map(str, range(first, last + 1))) + "."
    elif roll < 0.6:
        number = rng.randint(1, 19)
        ask = f"[What comes after {number}?|Which number comes after {NUMBERS[number]}?|What number follows {number}?]"
        answer = f"After {number} comes {number + 1}."
    elif roll < 0.8:
        i = rng.randint(1, 6)
        ask, answer = (
            f"[What day comes before {DAYS[i]}?|What comes before {DAYS[i]}?]",
            f"{DAYS[i - 1]} comes before {DAYS[i]}.",
        )
    else:
        i = rng.randint(0, 24)
        a, b = chr(65 + i), chr(66 + i)
        ask, answer = (
            f"[What letter comes after {a}?|Which letter follows {a}?]",
            f"The letter {b} comes after {a}.",
        )
    return [(vary(rng, choose(rng, ask)), answer)]


def compare(rng: random.Random) -> list[Turn]:
    """Which of two animals is bigger; SIZES runs from small to big."""
    i, j = sorted(rng.sample(range(len(SIZES)), 2))
    small, big = rng.choice(SIZES[i]), rng.choice(SIZES[j])
    a, b = rng.sample([small, big], 2)
    if rng.random() < 0.5:
        word, winner = ("bigger", big) if rng.random() < 0.6 else ("smaller", small)
        ask = f"[Which is {word}, {article(a)} or {article(b)}?|What is {word}: {article(a)} or {article(b)}?|Who is {word}, the {a} or the {b}?]"
        return [
            (
                vary(rng, choose(rng, ask)),
                f"{cap(article(winner))} is {word} than {article(a if winner == b else b)}.",
            )
        ]
    yes = a == big
    answer = (
        f"Yes, {article(a)} is bigger than {article(b)}."
        if yes
        else f"No, {article(a)} is smaller than {article(b)}."
    )
    return [(vary(rng, f"Is {article(a)} bigger than {article(b)}?"), answer)]


def repeat(rng: random.Random) -> list[Turn]:
    name, animal, place, toy = (
        rng.choice(NAMES),
        rng.choice(AFTER_A["animal"]),
        rng.choice(list(PLACES)),
        rng.choice(TOYS),
    )
    words = choose(
        rng,
        f"[{name} has a {animal}.|The {animal} is {PLACES[place]}.|good morning|{toy}|{name}|{animal} and {toy}|the {rng.choice(COLORS)} {toy}|I like the {animal}.]",
    )
    ask = rng.choice(
        [
            "Say {x}",
            "Repeat: {x}",
            "Repeat after me: {x}",
            "Please say {x}",
            "Write {x}",
            'Say "{x}"',
            "Can you say {x}",
        ]
    )
    return [(ask.format(x=words), cap(words.rstrip(".")) + ".")]


def poem(rng: random.Random) -> list[Turn]:
    animal, toy, place = rng.choice(AFTER_A["animal"]), rng.choice(TOYS), rng.choice(list(PLACES))
    about, verses = rng.choice([
        (f"a {animal}", f"[A little {animal} went out to play,|A {animal} woke up on a sunny day,|I met a {animal} on my way,] [it ran and sang the whole long day.|and all the clouds had gone away.|and this is what it had to say:] [\"Be kind to me, be kind to all,|The sky was blue, the grass was tall,|It saw a leaf, it saw it fall,] [the big, the slow, the very small.\"|and it was happy with it all.|and that was not so bad at all.]"),
        (article(toy), f"[I have {article(toy)}, I keep it near,|There is {article(toy)} I hold so dear,|My {toy} is old, my {toy} is dear,] [it makes me glad throughout the year.|I take it with me there and here.|and when I see it, I have no fear.] [When day is done and lights are low,|When winter comes with wind and snow,|And if you ask me, I will show] [it stays with me wherever I go.|I never, never let it go.|how well it shines, how bright its glow.]"),
        (f"the {place}", f"[The {place} is quiet, the {place} is wide,|I went to the {place} with a friend by my side,|Oh, the {place} in the morning is where I hide,] [and a bird is singing on every side.|and the wind came along like a friend and a guide.|with the sun and the wind and the sky outside.] [We laughed and we stayed till the end of the day,|The clouds float over and drift away,|The light grows soft and the sky turns gray,] [and then we went home by the longest way.|but I would like very much to stay.|and all who were here have gone away.]"),
    ])  # fmt: skip
    ask = choose(
        rng,
        f"[Write a poem about {about}.|Can you write a poem about {about}?|Make a rhyme about {about}|I would like a poem about {about}.|Tell me a short poem about {about}.]",
    )
    return [(vary(rng, ask), choose(rng, verses).replace("say: The", "say: the"))]


def note(rng: random.Random) -> list[Turn]:
    """A line or two for someone, with the name and the occasion that were asked for."""
    who = rng.choice(["my mother", "my teacher", "my friend", "my grandmother", *rng.sample(NAMES, 8)])
    dear, toy = who.replace("my ", "").capitalize(), rng.choice(TOYS)
    ask, answer = rng.choice([
        (f"[Write a birthday wish for {who}.|Write a birthday card to {who}|What can I write for {who}'s birthday?]", f"Dear {dear}, happy birthday! I wish you [a wonderful year|a day full of joy|good health and many friends]."),
        (f"[Write a thank you note to {who} for {article(toy)}.|Thank {who} for the {toy}.|Help me thank {who} for {article(toy)}]", f"Dear {dear}, thank you for the {toy}. [I like it very much.|I use it every day.|It was very kind of you.]"),
        (f"[Write an invitation for {who}.|Invite {who} to my party|Write a party card to {who}.]", f"Dear {dear}, please come to my party. [There will be cake and games.|I would be so glad to see you.|We will have a good time.]"),
        (f"[Write a get well card for {who}.|{who} is sick. What can I write?|Write some kind words to {who}, who is sick.]", f"Dear {dear}, I hope that you feel better soon. [I think of you.|Rest well.|We miss you.]"),
        (f"[Write an apology to {who}.|Help me say sorry to {who}|Write to {who} that I am sorry about the {toy}.]", f"Dear {dear}, I am sorry. [I will do better next time.|I hope that you can forgive me.|I did not mean it.]"),
    ])  # fmt: skip
    return [(vary(rng, cap(choose(rng, ask))), choose(rng, answer))]


def short_story(rng: random.Random) -> list[Turn]:
    kind = rng.choice(HEROES)
    ask = rng.choice(
        [
            "Tell me a very short story about {x}.",
            "Write a story about {x} in three sentences.",
            "A tiny story about {x}, please",
            "Tell me a story about {x}, but keep it short.",
            "Can you tell a story about {x} in a few words?",
            "Make it short: a story about {x}.",
        ]
    )
    return [(vary(rng, ask.format(x=article(kind))), tell_short(rng, kind=kind).text)]


MAKERS: list[tuple[float, Callable[[random.Random], list[Turn]]]] = [
    (0.15, story_request), (0.12, facts), (0.08, memory), (0.09, small_talk), (0.14, identity), (0.16, can_not),
    (0.04, everyday), (0.06, unknown), (0.04, sums), (0.01, never_told), (0.03, list_request), (0.02, sentence_request),
    (0.04, counting), (0.05, compare), (0.04, repeat), (0.01, poem), (0.01, note), (0.01, short_story),
]  # fmt: skip


def make_chat(rng: random.Random, held_out: bool = False) -> list[Message]:
    """One conversation as messages. Held-out chats use only plots and wordings that training never sees."""
    if held_out:
        turns = story_request(rng, True) if rng.random() < 0.6 else unknown(rng, True)
    else:
        weights, makers = zip(*MAKERS, strict=True)
        count = rng.choice([1, 1, 1, 2, 2, 3, 4])
        turns = [turn for maker in rng.choices(makers, weights, k=count) for turn in maker(rng)]
    messages = [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.25 else []
    for ask, answer in turns:
        # The template puts "Assistant: " before an old answer but "Assistant:" before a new one.
        messages += [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return messages
