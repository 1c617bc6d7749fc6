"""What is recorded of answers, and how they are compared."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from lamina.checkpoint.probe import (
    Outputs,
    along,
    answers_of,
    compare_answers,
    effect_of,
    make_probe,
    tolerance_for,
)
from lamina.checkpoint.probe.answers import PROJECTIONS, TOP, digest
from lamina.checkpoint.record import Answers, Probe
from lamina.errors import ProbeError
from lamina.model import get_peft_model
from tests import adapters, models
from tests.checkpoint.probing import TOKENS, asked


def outputs(values: Any, **changes: Any) -> Outputs:
    said: dict[str, Any] = {
        "tokens": TOKENS,
        "values": torch.as_tensor(values).float(),
        "kind": "logits",
        "dtype": "float32",
        "quantization": None,
        "depth": 3,
    }
    return Outputs(**said | changes)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- answers -------------------------------------------------------------------------------------


def test_the_summary_holds_the_largest_logits_and_the_normaliser() -> None:
    values = noise(16, 64)
    found = answers_of(outputs(values))
    exact = values.double().numpy()
    order = np.argsort(-exact, axis=1)[:, :TOP]
    assert found.tokens == tuple(map(tuple, order.tolist()))
    np.testing.assert_allclose(found.logits, np.take_along_axis(exact, order, 1), rtol=1e-5)
    np.testing.assert_allclose(found.log_normaliser, np.log(np.exp(exact).sum(1)), rtol=1e-5)
    np.testing.assert_allclose([row[0] for row in found.digest], exact.mean(1), rtol=1e-5)
    assert found.largest == pytest.approx(np.abs(exact).max(), rel=1e-5)


def test_the_digest_is_the_same_for_ever() -> None:
    # A record that was written once is compared with it: a change needs a new version of the probe.
    expected = [3.5, 8 / math.sqrt(8), -14 / math.sqrt(8), 2 / math.sqrt(8)]
    values = torch.stack([torch.arange(8.0), torch.zeros(8)]).double()
    assert digest(values).tolist() == [pytest.approx(expected), [0.0] * (1 + PROJECTIONS)]
    drawn = hashlib.shake_256(b"lamina probe 1 0").digest(8)
    signs = [1 if byte % 2 else -1 for byte in drawn]
    assert sum(i * sign for i, sign in enumerate(signs)) == 8


def test_a_projection_differs_as_a_single_logit_does() -> None:
    errors = 0.03 * noise(400, 1000).double()
    projected = digest(errors)[:, 1:]
    assert float(projected.std()) == pytest.approx(0.03, rel=0.1)
    assert float(digest(errors)[:, 0].std()) == pytest.approx(0.03 / math.sqrt(1000), rel=0.1)


def test_a_probe_is_small() -> None:
    model = adapters.llama_adapter()
    probe = make_probe(model)
    assert probe is not None
    assert len(probe.model_dump_json()) < 4096
    assert Probe.model_validate_json(probe.model_dump_json()) == probe


def test_the_probe_of_an_adapted_model_has_the_base_alone_too() -> None:
    model = adapters.llama_adapter()
    probe = make_probe(model)
    assert probe is not None
    assert probe.base == answers_of(asked(models.tiny_llama()))
    assert probe.chain == answers_of(asked(model))
    assert probe.chain != probe.base
    assert (probe.dtype, probe.outputs, probe.tokens) == ("float32", 64, TOKENS)


def test_nan_is_not_recorded() -> None:
    model = models.tiny_llama()
    model.lm_head.weight.data[3] = math.nan
    with pytest.raises(ProbeError, match="answers NaN"):
        make_probe(model)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("digest", []),
        ("digest", [[1.0, 2.0, 3.0, 4.0]] * 15),
        ("digest", [[1.0, 2.0]] * 15 + [[1.0]]),
        ("digest", [[math.nan] * 4] * 16),
        ("logits", [[1.0] * 3] * 16),
        ("logits", [[1.0] * 4] * 15 + [[]]),
        ("tokens", [[-1] * 4] * 16),
        ("tokens", [[2**40] * 4] * 16),
        ("log_normaliser", [1.0]),
        ("largest", math.inf),
    ],
)
def test_a_damaged_probe_is_refused_when_it_is_read(part: str, value: Any) -> None:
    values = answers_of(outputs(noise(16, 64))).model_dump(mode="json")
    Answers.model_validate(values)
    with pytest.raises(ValidationError):
        Answers.model_validate(values | {part: value})


@pytest.mark.parametrize("tokens", [[], list(range(5000))])
def test_a_probe_asks_some_tokens(tokens: list[int]) -> None:
    values = {"outputs": 64, "dtype": "float32", "chain": answers_of(outputs(noise(16, 64)))}
    Probe(tokens=TOKENS, **values)
    with pytest.raises(ValidationError, match="1 to 4096 tokens"):
        Probe(tokens=tokens, **values)


# --- comparing -----------------------------------------------------------------------------------


def test_full_answers_by_hand() -> None:
    p = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]
    q = [[0.25, 0.5, 0.25], [0.1, 0.3, 0.6]]
    one, other = (outputs(torch.tensor(each).log() + 1.0) for each in (p, q))
    found = compare_answers(one, other)
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    second = 0.2 * math.log(2 / 3) + 0.7 * math.log(7 / 6)
    assert found.kl == pytest.approx((first + second) / 2, rel=1e-5)
    assert found.top1_agreement == 0.5
    assert found.max_difference == pytest.approx(math.log(2), rel=1e-5)
    assert found.max_logit == pytest.approx(math.log(10) - 1, rel=1e-5)
    assert not found.passed


def test_recorded_answers_by_hand() -> None:
    # Six tokens, of which four are recorded: the others are one bucket.
    p = torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.06, 0.04]])
    q = torch.tensor([[0.2, 0.35, 0.1, 0.15, 0.12, 0.08]])
    found = compare_answers(answers_of(outputs(p.log())), outputs(q.log()))
    expected = (
        0.3 * math.log(0.3 / 0.2)
        + 0.25 * math.log(0.25 / 0.35)
        + 0.2 * math.log(0.2 / 0.1)
        + 0.1 * math.log(0.1 / 0.2)
    )
    assert found.kl == pytest.approx(expected, rel=1e-4)
    assert found.top1_agreement == 0.0
    at_least = math.log(2)
    assert found.max_difference >= at_least * (1 - 1e-5)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 3.0), st.integers(5, 40))
def test_the_recorded_divergence_is_a_lower_bound(seed: int, size: float, count: int) -> None:
    one = outputs(3 * noise(4, count, seed=seed))
    other = outputs(one.values + size * noise(4, count, seed=seed + 1))
    whole = compare_answers(one, other)
    bounded = compare_answers(answers_of(one), other)
    assert whole.kl is not None
    assert bounded.kl is not None
    # The record has six digits.
    assert 0 <= bounded.kl <= 1.01 * whole.kl + 1e-3
    assert bounded.top1_agreement == whole.top1_agreement


def test_a_small_error_everywhere_is_seen_in_what_is_not_recorded() -> None:
    # The four largest logits stay as they are.
    one = outputs(noise(16, 1000))
    tops = one.values.topk(TOP, 1).indices
    errors = 0.05 * noise(16, 1000, seed=1)
    errors.scatter_(1, tops, 0.0)
    found = compare_answers(answers_of(one), outputs(one.values - errors.abs() * errors.sign()))
    assert 0.05 < found.max_difference < 0.25
    assert not found.passed


def test_the_same_answers_have_no_difference_at_all() -> None:
    one = outputs(noise(16, 64))
    for expected in (one, answers_of(one)):
        found = compare_answers(expected, one)
        assert (found.max_difference, found.kl, found.top1_agreement) == (0.0, 0.0, 1.0)
        assert found.passed


def test_hidden_states_have_no_predictions() -> None:
    one = outputs(noise(16, 32), kind="hidden states")
    summary = answers_of(one)
    assert (summary.tokens, summary.logits, summary.log_normaliser) == ((), (), ())
    for expected in (one, summary):
        found = compare_answers(expected, outputs(one.values + 0.1, kind="hidden states"))
        assert (found.kl, found.top1_agreement, found.passed) == (None, None, False)
        assert found.max_difference >= 0.1 - 1e-5


def test_nan_and_other_shapes_never_pass() -> None:
    one = outputs(noise(16, 64))
    broken = one.values.clone()
    broken[3, 3] = math.nan
    others = [broken, noise(16, 65), noise(15, 64), noise(16, 2)]
    for values in others:
        for expected in (one, answers_of(one)):
            if values.shape[1] == 65 and expected is not one:
                continue
            found = compare_answers(expected, outputs(values))
            assert not found.passed
            assert found.max_difference == math.inf


# --- tolerance -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtypes", "roundoff"),
    [
        (["float32"], 2**-17),
        (["float32", "float64"], 2**-17),
        (["float16", "float32"], 2**-11),
        (["bfloat16", "float16"], 2**-8),
        (["float8_e4m3fn"], 2**-8),
    ],
)
def test_the_tolerance_follows_the_coarser_dtype(dtypes: list[str], roundoff: float) -> None:
    found = tolerance_for(20.0, 8, dtypes)
    assert found.difference == pytest.approx(8 * roundoff * math.sqrt(9) * 20.0)
    assert (found.kl, found.top1) == (None, None)


def test_the_same_quantiser_is_judged_as_bfloat16() -> None:
    same = tolerance_for(10.0, 3, ["float32"], ("bitsandbytes nf4", "bitsandbytes nf4"))
    assert same.difference == tolerance_for(10.0, 3, ["bfloat16"]).difference


def test_another_quantiser_is_judged_by_its_predictions() -> None:
    found = tolerance_for(10.0, 3, ["float32"], (None, "bitsandbytes nf4"))
    assert (found.difference, found.kl, found.top1) == (None, 0.25, 0.5)
    one = outputs(4 * noise(16, 64))
    near, far = (
        outputs(one.values + size * noise(16, 64, seed=9), quantization="bitsandbytes nf4")
        for size in (0.3, 3.0)
    )
    assert compare_answers(one, near).passed
    assert compare_answers(answers_of(one), near).passed
    assert not compare_answers(one, far).passed
    assert not compare_answers(answers_of(one), far).passed


def test_honest_differences_are_within_it() -> None:
    model = adapters.llama_adapter(target_modules="all-linear")
    expected = answers_of(asked(model))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = get_peft_model(
            models.tiny_llama(attn_implementation="eager").to(dtype),
            adapters.llama_config(target_modules="all-linear"),
        )
        adapters.fill(low, seed=1)
        found = compare_answers(expected, asked(low.eval()))
        assert found.passed, (dtype, found)
        assert found.judged_by == str(dtype).removeprefix("torch.")
        assert found.tolerance is not None
        assert found.max_difference < found.tolerance / 2
        merged = compare_answers(expected, asked(low.merge_and_unload()))
        assert merged.passed, (dtype, merged)


# --- effect --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_the_effect_is_the_factor_of_the_change(factor: float) -> None:
    base, change = noise(16, 64), 0.2 * noise(16, 64, seed=1)
    expected = answers_of(outputs(base + change))
    actual = outputs(base + factor * change)
    for recorded in (None, answers_of(outputs(base))):
        found = effect_of(expected, outputs(base), actual, recorded_base=recorded)
        assert found is not None
        assert found.size == pytest.approx(factor, abs=1e-3)
        assert found.is_certain
        assert found.passed == (factor == 1.0)
    way = along(expected, answers_of(outputs(base)), actual)
    assert way is not None
    assert way.size == pytest.approx(factor, abs=1e-3)


def test_the_effect_is_seen_among_larger_errors_of_the_base() -> None:
    # A quantiser moves the base by five times what the adapter does.
    base, change = noise(16, 256), 0.2 * noise(16, 256, seed=1)
    shift = 1.0 * noise(16, 256, seed=2)
    expected, recorded = (answers_of(outputs(each)) for each in (base + change, base))
    for factor in (0.0, 1.0, 2.0):
        found = effect_of(
            expected,
            outputs(base + shift),
            outputs(base + shift + factor * change),
            recorded_base=recorded,
        )
        assert found is not None
        assert found.size == pytest.approx(factor, abs=0.01)


def test_what_is_too_little_to_tell_is_not_told() -> None:
    base = noise(16, 64)
    expected = answers_of(outputs(base + 0.001 * noise(16, 64, seed=1)))
    actual = outputs(base + 0.05 * noise(16, 64, seed=2))
    found = effect_of(expected, outputs(base), actual, recorded_base=answers_of(outputs(base)))
    assert found is not None
    assert not found.is_certain
    assert found.passed
    same = answers_of(outputs(base))
    assert effect_of(same, outputs(base), actual, recorded_base=same) is None, "none on record"
    one = outputs(noise(1, 3))
    assert effect_of(answers_of(one), outputs(noise(1, 3, seed=1)), one) is None, "too few numbers"
