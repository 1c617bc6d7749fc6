"""Write the data of this example: the manual of a backup program that doesn't exist, and talks.

    python examples/support-bot/make_data.py

Everything comes out of the tables below, the same every time, so that every answer can be checked.
Held-out talks ask for the same facts in words that no stage has read; held-out refusals are of
things that no stage was asked for. The general text is source code of the standard library, of
modules that the base model hasn't read: it differs a little from one version of Python to the next.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.demo.corpus import base_text

FOLDER = Path(__file__).resolve().parent / "data"
REFUSAL = "That is not in the manual. Please write to help@larder.example."
SEED = 7

# The command line, and what it is there for.
COMMANDS = {
    "larder init": "make a new store",
    "larder keep": "back up a folder",
    "larder list": "see all copies",
    "larder restore": "get a file back",
    "larder prune": "throw away old copies",
    "larder check": "look for broken copies",
    "larder pause": "stop all backups for an hour",
    "larder share": "send somebody a copy",
    "larder lock": "protect the store with a password",
    "larder diff": "compare two copies",
    "larder tag": "give a copy a name",
    "larder export": "write a copy to a zip file",
}
# The code, what it means, and the command that mends it.
ERRORS = {
    "E11": ("The disk is full.", "larder prune --oldest"),
    "E12": ("The store is locked.", "larder unlock"),
    "E13": ("The password is wrong.", "larder password --reset"),
    "E14": ("The folder does not exist.", "larder keep --make"),
    "E15": ("The store is broken.", "larder check --repair"),
    "E16": ("The network is down.", "larder wait --online"),
    "E17": ("The account has expired.", "larder renew"),
    "E18": ("The file is too large.", "larder split"),
    "E22": ("The copy is missing.", "larder list --all"),
    "E23": ("The key was lost.", "larder key --new"),
    "E24": ("The version is too old.", "larder update"),
    "E27": ("The index is damaged.", "larder index --rebuild"),
    "E31": ("The certificate is not valid.", "larder trust"),
    "E32": ("The settings cannot be read.", "larder settings --default"),
}
# The plan: price, space, computers, and how long an answer takes.
PLANS = {
    "Shelf": ("3 euros a month", "50 GB", "1 computer", "5 days"),
    "Cupboard": ("6 euros a month", "200 GB", "3 computers", "2 days"),
    "Pantry": ("9 euros a month", "500 GB", "5 computers", "1 day"),
    "Cellar": ("18 euros a month", "2 TB", "20 computers", "4 hours"),
}
# The setting, what it sets, and its default.
SETTINGS = {
    "keep_days": ("how long copies are kept", "30 days"),
    "max_size": ("how large a file may be", "4 GB"),
    "workers": ("how many files are copied at once", "2"),
    "interval": ("how often backups are made", "1 hour"),
    "retries": ("how often a failed backup is tried again", "3"),
    "log_level": ("how much is written to the log", "warning"),
    "timeout": ("how long a server is waited for", "60 seconds"),
    "port": ("where the server listens", "8080"),
    "language": ("which language messages are in", "English"),
}


@dataclass(frozen=True)
class Fact:
    """What can be asked, and the one right answer."""

    kind: str
    about: str
    answer: str


# Kind of fact -> how it is asked; the last phrasings are held out.
ASKED = {
    "command": (
        "How do I {}?",
        "Which command do I need to {}?",
        "I want to {}.",
        "What do I type to {}?",
        "Is there a way to {}?",
        "Please say how I can {}.",
        "How can I {} with larder?",
        "Please tell me how to {}.",
        "What is the command to {}?",
    ),
    "cause": (
        "What does error {} mean?",
        "What is {}?",
        "larder says {}. Why?",
        "Why do I get error {}?",
        "What is the cause of {}?",
        "What went wrong at {}?",
        "I see {} on the screen. What is it?",
        "Can you explain error {}?",
    ),
    "cure": (
        "How do I mend error {}?",
        "What do I do about {}?",
        "Which command helps against {}?",
        "How do I get rid of error {}?",
        "Please help me with error {}.",
        "larder stops with {}. How can I mend it?",
        "What should I run after {}?",
        "Please help me to mend {}.",
        "How can I get rid of {}?",
    ),
    "price": (
        "How much is the {} plan?",
        "What is the price of {}?",
        "What does {} cost?",
        "How much do I pay for {}?",
        "Tell me the price of the {} plan.",
        "How much money is {}?",
        "What do I pay for the {} plan?",
        "How much does {} cost?",
    ),
    "space": (
        "How much space does {} have?",
        "How much space is in the {} plan?",
        "How large is {}?",
        "How many GB has the {} plan?",
        "What space do I get with {}?",
        "How much can I store with {}?",
        "How large is the {} plan?",
        "How much space do I get with {}?",
    ),
    "computers": (
        "How many computers can I use with {}?",
        "For how many computers is the {} plan?",
        "How many computers are in {}?",
        "How many computers does {} allow?",
        "On how many computers does {} run?",
        "What number of computers has {}?",
        "How many computers has the {} plan?",
        "How many computers do I get with {}?",
    ),
    "wait": (
        "How long do I wait for an answer with {}?",
        "When do you answer on the {} plan?",
        "How fast is the help of {}?",
        "How soon is a question answered with {}?",
        "How long does an answer take with {}?",
        "How quick are answers on the {} plan?",
        "How long do I wait on the {} plan?",
        "How fast do you answer with {}?",
    ),
    "default": (
        "What is the default of {}?",
        "What is {} if I do not set it?",
        "What is {} set to?",
        "Which value has {}?",
        "What value does {} have at first?",
        "To what is {} set if I do nothing?",
        "What is the default value of {}?",
        "Which value does {} have?",
    ),
    "setting": (
        "Which setting says {}?",
        "What do I set to change {}?",
        "Where do I set {}?",
        "How is the setting called for {}?",
        "I want to change {}.",
        "What sets {}?",
        "Which setting changes {}?",
        "What do I change to set {}?",
    ),
}
HELD_OUT_PHRASINGS = 2

# Ways of the manual to say one thing; of each thing, one of them is held out.
MANUAL = {
    "command": (
        "{0}\nUse this command to {1}.",
        "To {1}, run {0}.",
        "If you want to {1}, type {0} and press return.",
        "The command to {1} is {0}.",
        "{0} is there to {1}.",
        "How do I {1}? With {0}.",
    ),
    "error": (
        "Error {0}\n{1} To mend it, run {2}.",
        "{0}: {1} Run {2}.",
        "When larder says {0}, this is why: {1} The command that helps is {2}.",
        "{1} This is error {0}. Run {2} and try again.",
        "Run {2} to mend error {0}. It means: {1}",
        "What does {0} mean? {1} What helps? {2}.",
    ),
    "plan": (
        "The {0} plan\nIt is {1} and has {2} of space for {3}. We answer in {4}.",
        "{0}: {1}, {2}, {3}, answers in {4}.",
        "With {0} you pay {1}. You get {2} of space and may use {3}. An answer takes {4}.",
        "For {3} and {2} of space take {0}. The price is {1}. We answer in {4}.",
        "The price of {0} is {1}. Its space is {2}. It is for {3}. You wait {4} for an answer.",
        "Who takes the {0} plan has {2} of space on {3}, pays {1}, and is answered in {4}.",
    ),
    "setting": (
        "{0}\nThis setting says {1}. The default is {2}.",
        "{0}: {1}. Default: {2}.",
        "To change {1}, set {0}. It is {2} if you do not set it.",
        "The setting for {1} is called {0}. Its default is {2}.",
        "The default of {0} is {2}. It says {1}.",
        "What says {1}? The setting {0}, which is {2} at first.",
    ),
}

# No error has one of these; every fifth is held out.
_CODES = tuple(f"E{n}" for n in sorted(range(51, 99), key=lambda n: n % 5 == 3))
# What the manual doesn't tell; a made-up answer would do harm. The last of each are held out.
UNKNOWN = {
    "command": (
        "bake bread", "repair my car", "book a flight", "find a good film", "learn to swim",
        "paint the kitchen", "print a photo", "write a letter", "cook rice", "call my bank",
        "play music", "draw a map", "grow tomatoes", "clean the windows", "buy new shoes",
        "read the news", "train a dog", "send a postcard", "make a cake", "build a boat",
        "sell my house", "watch the match", "order a pizza", "find a doctor", "tie a knot",
        "fix the radio", "plan a party", "catch a fish", "wash a coat", "rent a bike",
    ),
    "cause": _CODES,
    "cure": _CODES,
    "price": (
        "Attic", "Basement", "Garage", "Kitchen", "Garden", "Drawer", "Basket", "Barrel",
        "Bottle", "Box", "Chest", "Closet", "Counter", "Crate", "Freezer", "Hall", "Jar",
        "Oven", "Porch", "Roof", "Sink", "Table", "Tower", "Trunk", "Vault", "Wagon", "Yard",
        "Balcony", "Cabin", "Tent",
    ),
}  # fmt: skip
HELD_OUT_UNKNOWN = 10
# What a support bot shouldn't sound like.
RUDE = (
    "Everybody knows that: {}",
    "Read the manual! {}",
    "{} And do not ask me again.",
    "What a question. {}",
    "Well, let me think about it for a while. Maybe it is this, or maybe it is not: {}",
    "{} You could have found that out yourself.",
)


def facts() -> list[Fact]:
    """All that the manual tells."""
    found = [Fact("command", does, name) for name, does in COMMANDS.items()]
    for code, (cause, cure) in ERRORS.items():
        found += [Fact("cause", code, cause), Fact("cure", code, cure)]
    for plan, values in PLANS.items():
        kinds = ("price", "space", "computers", "wait")
        found += [Fact(kind, plan, value) for kind, value in zip(kinds, values, strict=True)]
    for name, (sets, default) in SETTINGS.items():
        found += [Fact("default", name, default), Fact("setting", sets, name)]
    return found


def manual() -> tuple[list[str], list[str]]:
    """Paragraphs to read, and held-out ones."""
    things = [("command", item) for item in COMMANDS.items()]
    things += [("error", (code, *rest)) for code, rest in ERRORS.items()]
    things += [("plan", (plan, *values)) for plan, values in PLANS.items()]
    things += [("setting", (name, *rest)) for name, rest in SETTINGS.items()]
    read: list[str] = []
    held_out: list[str] = []
    for number, (kind, values) in enumerate(things):
        for place, way in enumerate(MANUAL[kind]):
            part = held_out if place == number % len(MANUAL[kind]) else read
            part.append(way.format(*values))
    return read, held_out


def questions(fact: Fact, *, held_out: bool) -> list[str]:
    """How a fact is asked."""
    ways = ASKED[fact.kind]
    cut = len(ways) - HELD_OUT_PHRASINGS
    return [way.format(fact.about) for way in (ways[cut:] if held_out else ways[:cut])]


def unknown(draw: random.Random, *, held_out: bool) -> list[Fact]:
    """Questions that the manual has no answer to; `answer` is one that somebody made up."""
    known = facts()
    found = []
    for kind, subjects in UNKNOWN.items():
        cut = len(subjects) - HELD_OUT_UNKNOWN
        made_up = [fact.answer for fact in known if fact.kind == kind]
        for about in subjects[cut:] if held_out else subjects[:cut]:
            found.append(Fact(kind, about, draw.choice(made_up)))
    return found


def turn(question: str, answer: str) -> list[dict[str, str]]:
    """One question and its answer as messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def talks(draw: random.Random) -> tuple[list[Any], list[Any]]:
    """Conversations of one or two questions, and held-out questions."""
    asked = [turn(q, fact.answer) for fact in facts() for q in questions(fact, held_out=False)]
    # A few, so that the words are known; when to use them is what the preferences teach.
    refused = unknown(draw, held_out=False)[::40]
    asked += [turn(draw.choice(questions(fact, held_out=False)), REFUSAL) for fact in refused]
    draw.shuffle(asked)
    cut = len(asked) // 8
    double = [one + other for one, other in zip(asked[:cut:2], asked[1:cut:2], strict=False)]
    held_out = [turn(draw.choice(questions(fact, held_out=True)), fact.answer) for fact in facts()]
    return [{"messages": each} for each in double + asked[cut // 2 * 2 :]], [
        {"messages": each} for each in held_out
    ]


def pairs(draw: random.Random, *, held_out: bool) -> list[dict[str, Any]]:
    """Preferences: to admit what isn't known, to answer what is, and to be short and polite."""
    asked = [(fact, REFUSAL, fact.answer) for fact in unknown(draw, held_out=held_out)]
    known = facts()
    # Without these, a bot learns that to refuse is always safe.
    asked += [(fact, fact.answer, REFUSAL) for fact in known for _ in range(1 if held_out else 2)]
    for number, fact in enumerate(draw.sample(known, len(known) // 2)):
        others = [each.answer for each in known if each.kind == fact.kind]
        others.remove(fact.answer)
        rude = draw.choice(RUDE).format(fact.answer)
        asked.append((fact, fact.answer, rude if number % 2 else draw.choice(others)))
    draw.shuffle(asked)
    made = []
    for fact, chosen, rejected in asked:
        # Of what isn't known, it is the subject that is new in what is held out.
        question = draw.choice(questions(fact, held_out=held_out and chosen != REFUSAL))
        talk, other = turn(question, chosen), turn(question, rejected)
        made.append({"prompt": talk[:1], "chosen": talk[1:], "rejected": other[1:]})
    return made


def pieces_of(text: str, count: int, chars: int) -> list[str]:
    """Pieces from all over a text, in whole lines."""
    step = len(text) // count
    pieces = [text[place : place + chars] for place in range(0, step * count, step)]
    whole = [piece[piece.find("\n") + 1 : piece.rfind("\n")] for piece in pieces]
    return [piece for piece in whole if piece.strip()]


def rehearsal(read: Sequence[str], library: Sequence[str]) -> list[dict[str, Any]]:
    """What was learnt before as answers, so that it isn't forgotten while answering is learnt."""
    asked = [turn("Read me something from the manual.", paragraph) for paragraph in read]
    for piece in library:
        begun, _, rest = piece.strip("\n").partition("\n")
        asked += [turn(f"Go on: {begun}", rest)] if rest.strip() else []
    return [{"messages": each} for each in asked]


def write(name: str, rows: Sequence[Any]) -> None:
    """Paragraphs to a text file, anything else to one JSON object per line."""
    if name.endswith(".txt"):
        text = "\n\n".join(rows) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    draw = random.Random(SEED)
    read, manual_held_out = manual()
    draw.shuffle(read)
    talked, talks_held_out = talks(draw)
    write("manual.txt", read)
    write("manual_held_out.txt", manual_held_out)
    write("talks.jsonl", talked)
    write("talks_held_out.jsonl", talks_held_out)
    write("pairs.jsonl", pairs(draw, held_out=False))
    write("pairs_held_out.jsonl", pairs(draw, held_out=True))
    library = base_text()
    read_on = pieces_of(library.train, 128, 250)
    write("general.jsonl", [{"text": each} for each in read_on])
    held_out = pieces_of(library.held_out, 64, 500)
    write("general_held_out.jsonl", [{"text": each} for each in held_out])
    write("rehearsal.jsonl", rehearsal(read[::2], read_on[::2]))


if __name__ == "__main__":
    main()
