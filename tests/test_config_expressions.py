"""Regular expressions from files: the same answers as `re` gives, in bounded time."""

from __future__ import annotations

import random
import re
import time

import pytest

from lamina.config import LoraConfig
from lamina.config.automaton import Automaton
from lamina.config.expressions import fullmatch, why_not
from lamina.config.patterns import first_match, means
from lamina.engine.targets import layer_index
from lamina.errors import ConfigError

NAMES = [
    f"model.layers.{layer}.{part}"
    for layer in range(12)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "visual.mlp.up_proj")
]
USUAL = [
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r".*\.layers\.\d+\..*\.?(mlp|self_attn)\..*_proj",
    r"(?:[^.]+\.)*q_proj",
    r"(\w+\.)*(q|v)_proj",
    r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
    r"model\.layers\.(1|3|11)\.self_attn\.(q|v)_proj",
    r"(?i).*Q_PROJ",
    r".*\.\d{1,2}\..*",
]
ENDLESS = [
    "(a+)+$",
    r"(\w+\.?)*x",
    "(.|\\w)*Q",
    "(.*)" * 12 + "Q",
    "(?:(?:.+)?)+?Q",
    r"(x?){25}(.*)+Q",
]
REFUSED = [
    r"(.*)\1+\1+\1+Q",
    "(?=(.*)+Q).*",
    "(?i:(.+)+q)Q",
    "((.?){30}){30}Q",
    ".*" * 3_000,
    "(" * 9_000 + ")" * 9_000,
    "a{99999999999999999999}",
    "x" * 300_000,
]


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_expressions_mean_what_re_means(pattern: str) -> None:
    expected = [bool(re.fullmatch(pattern, name)) for name in NAMES]
    assert [fullmatch(pattern, name) for name in NAMES] == expected
    assert LoraConfig(target_modules=pattern).target_modules == pattern


def _expression(rng: random.Random, depth: int) -> str:
    atoms = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\D", r"\s", "(a)", "^", "$", "[a-c.]"]
    kind = rng.randrange(5) if depth else 4
    one = _expression(rng, depth - 1) if depth else ""
    if kind == 0:
        return one + _expression(rng, depth - 1)
    if kind == 1:
        return f"(?:{one}){rng.choice(['*', '+', '?', '*?', '{0,2}', '{2}', '{2,}'])}"
    if kind == 2:
        return f"({one}|{_expression(rng, depth - 1)})"
    return rng.choice(atoms)


def test_the_automaton_agrees_with_re_on_any_expression() -> None:
    rng = random.Random(0)
    answers = set()
    for _ in range(1_500):
        pattern = _expression(rng, 4)
        compiled, automaton = re.compile(pattern), Automaton(pattern)
        for _ in range(6):
            name = "".join(rng.choice("ab.1 ") for _ in range(rng.randrange(7)))
            expected = bool(compiled.fullmatch(name))
            assert automaton.matches(name) == expected, (pattern, name)
            answers.add(expected)
    assert answers == {True, False}


@pytest.mark.parametrize("pattern", ENDLESS)
def test_expressions_that_take_re_forever_take_no_time(pattern: str) -> None:
    began = time.process_time()
    assert why_not(pattern) is None
    assert not any(fullmatch(pattern, f"{'a' * 60}.{name}") for name in NAMES)
    assert not any(means(pattern, f"{'a' * 60}.{name}") for name in NAMES)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("pattern", REFUSED)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_what_can_not_be_bounded_is_refused(pattern: str, field: str) -> None:
    value = {pattern: 4} if field == "rank_pattern" and pattern != REFUSED[-1] else pattern
    with pytest.raises(ConfigError, match=rf"{field}.*(bounded time|a dict)") as caught:
        LoraConfig(**{field: value})
    assert len(str(caught.value)) < 10_000


def test_an_expression_that_is_none_inside_a_table() -> None:
    # By itself it is one, as a part of a larger one it isn't, and the other way around.
    for pattern in ("(?i)q_proj", "a)|(b"):
        with pytest.raises(ConfigError, match="rank_pattern"):
            LoraConfig(rank_pattern={pattern: 4})


def test_too_many_expressions_in_a_table() -> None:
    LoraConfig(rank_pattern={f"layers.{i}.q_proj": 4 for i in range(50_000)})
    with pytest.raises(ConfigError, match="2,001 regular expressions"):
        LoraConfig(rank_pattern={f"{i}.*": 4 for i in range(2_001)})


def test_plain_patterns_are_ends_of_names_as_before() -> None:
    cases = ["q_proj", "self_attn.q_proj", "proj", "layers.1.self.attn.q_proj", "self_attn?q_proj"]
    for pattern in ["", ".", "..proj", "model", *cases]:
        for name in [*NAMES, "q_proj", ""]:
            expected = bool(re.match(rf"(.*\.)?({pattern})$", name))
            assert means(pattern, name) == expected, (pattern, name)
    assert first_match({"v_proj": 1, r".*\.q_proj": 2, "q_proj": 3}, NAMES[0], 4) == 2


def test_a_list_of_layers_with_groups_of_its_own() -> None:
    assert layer_index("model.layers.7.q_proj", "(layers|h)") == 7
    assert layer_index("model.h.7.q_proj", "layers|h") == 7
    with pytest.raises(ConfigError, match="layers_pattern"):
        LoraConfig(layers_pattern=".*" * 5, layers_to_transform=[0])
