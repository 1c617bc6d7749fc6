"""What a model should answer: asked when it is saved, asked again when it is opened.

Weights that are all there can still be wrong: another base of the same shape, an update applied
twice, a prefix that hit nothing. What a model answers to a few tokens tells.
"""

from lamina.checkpoint.probe.answers import answers_of, make_probe
from lamina.checkpoint.probe.asking import Outputs, ask, in_eval, probe_tokens, values_of
from lamina.checkpoint.probe.comparison import ProbeComparison, compare_answers, compare_logits
from lamina.checkpoint.probe.effect import Effect, along, effect_of
from lamina.checkpoint.probe.tolerance import Tolerance, tolerance_for

__all__ = [
    "Effect",
    "Outputs",
    "ProbeComparison",
    "Tolerance",
    "along",
    "answers_of",
    "ask",
    "compare_answers",
    "compare_logits",
    "effect_of",
    "in_eval",
    "make_probe",
    "probe_tokens",
    "tolerance_for",
    "values_of",
]
