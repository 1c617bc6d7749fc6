from __future__ import annotations

import pytest

from lamina.optim.factors import Factor, Pair, factor, owner, pairs

X = "base_model.model.x"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"{X}.lora_A.default.weight", Factor(X, "default", "A", False)),
        (f"{X}.lora_B.lora_A.weight", Factor(X, "lora_A", "B", False)),
        (f"{X}.lora_embedding_B.chat", Factor(X, "chat", "B", True)),
        ("lora_A.default.weight", Factor("", "default", "A", False)),
        ("my_lora_B.lora_A.d.weight", Factor("my_lora_B", "d", "A", False)),
        (f"{X}.lora_B.default.bias", None),
        (f"{X}.lora_magnitude_vector.default.weight", None),
        ("lora_B.x.lora_head.weight", None),
        (f"{X}.base_layer.weight", None),
    ],
)
def test_a_name_is_read_whole(name: str, expected: Factor | None) -> None:
    assert factor(name) == expected


def test_owners() -> None:
    assert owner(f"{X}.lora_magnitude_vector.chat.weight") == (X, "chat")
    assert owner(f"{X}.lora_embedding_A.chat") == (X, "chat")
    assert owner(f"{X}.base_layer.weight") is None


def test_pairs_are_of_one_layer_and_adapter_whatever_lies_between() -> None:
    names = [
        "x.lora_A.one.weight",
        "x.lora_A.two.weight",
        "x.lora_B.one.weight",
        "x.lora_B.two.weight",
        "x.lora_B.two.bias",
        "x.lora_magnitude_vector.one.weight",
        "y.lora_A.one.weight",
        "y.lora_B.one.weight",
        "z.lora_B.one.weight",
    ]
    assert pairs(names) == [
        Pair("x", "one", 0, 2),
        Pair("x", "two", 1, 3),
        Pair("y", "one", 6, 7),
    ]
