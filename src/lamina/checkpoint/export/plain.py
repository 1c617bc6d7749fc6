"""Faults that targets have in common: what a program that knows plain LoRA can't take; no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lamina.checkpoint.export.contents import Contents, Finding
from lamina.checkpoint.methods import method_of

# Methods that only train otherwise: what is saved computes as plain LoRA does.
_PLAIN_WHEN_DONE = ("LoRA", "rsLoRA", "MiCA", "VeLoRA", "MonteCLoRA")
# Beginnings that take something out of the base, so that A and B lie over another base.
_DISPLACING = ("pissa", "olora", "corda", "loftq")
_SHOWN = 3
_CLOSE = "`lamina flatten DIR -o NEW --approximate --rank R --base BASE` comes close to it"
# What helps where folding it in is not the way, or not the only one.
_CURES = {
    "DoRA": f"{_CLOSE}; exactly, {{merge}}",
    "AdaLoRA": "`lamina flatten DIR -o NEW` makes plain LoRA of it",
    "aLoRA": "it acts from a token on, which no merged weight does; serve it with PEFT",
    "Arrow": "it chooses among adapters by token, which no merged weight does; serve it with PEFT",
}


def plain_faults(
    contents: Contents,
    program: str,
    merge: str,
    *,
    takes_whole: Collection[str] = (),
    takes_parameters: bool = True,
    takes_methods: Collection[str] = (),
) -> list[Finding]:
    """What is in an adapter beside the factors of linear layers and embeddings.

    Args:
        contents: the adapter's.
        program: the name of what is to take it.
        merge: the cure for what can't be taken at all.
        takes_whole: modules trained whole that it takes.
        takes_parameters: whether it takes adapted parameters, such as those of fused experts.
        takes_methods: methods that it knows beside plain LoRA.
    """
    config = contents.config
    faults = [Finding(line, "save or download the adapter again") for line in contents.halves]
    if not contents.factors:
        faults.append(Finding("no module is adapted", merge))
    wholes = [owner for owner in contents.wholes if owner not in takes_whole]
    if wholes:
        faults.append(Finding(f"{program} takes no modules trained whole: {some(wholes)}", merge))
    if contents.rows:
        faults.append(Finding(f"{program} takes no trained token rows", merge))
    faults += [
        Finding(f"{program} doesn't know {method}", _CURES.get(method, merge).format(merge=merge))
        for method in method_of(config).split(", ")
        if method not in {*_PLAIN_WHEN_DONE, *takes_methods}
    ]
    if contents.biases_of_B:
        faults.append(Finding(f"B has biases in {some(contents.biases_of_B)}", merge))
    if contents.biases:
        faults.append(Finding(f"{program} takes no trained biases: {some(contents.biases)}", merge))
    faults += _displaced(config)
    convolutions = [each.module for each in contents.factors if contents.is_convolution(each)]
    if convolutions:
        faults.append(Finding(f"{program} takes no convolutions: {some(convolutions)}", merge))
    parameters = [each.module for each in contents.factors if contents.is_parameter(each)]
    if parameters and not takes_parameters:
        faults.append(Finding(f"{program} takes no adapted parameters: {some(parameters)}", merge))
    if config.get("layer_replication"):
        faults.append(Finding(f"{program} doesn't know layer_replication", merge))
    if contents.base_weights:
        faults.append(
            Finding(
                f"it has values of the base beside the factors: {some(contents.base_weights)}",
                "--base DIR compares them with the base's, and leaves out those that are its own; "
                f"else {merge}",
            )
        )
    return faults


def table_faults(contents: Contents, program: str, merge: str, *, tied: bool) -> list[Finding]:
    """What goes wrong where the output shares the input embedding's weight.

    PEFT adapts the one without the other; these programs have one weight for both.
    """
    shared = [
        each.module
        for each in contents.factors
        if contents.is_embedding(each) or each.module.rpartition(".")[2] in ("lm_head", "wte")
    ]
    if not tied or not shared:
        return []
    return [
        Finding(
            f"{program} has one weight for input and output of this base, and only "
            f"{some(shared)} is adapted",
            merge,
        )
    ]


def _displaced(config: Mapping[str, Any]) -> list[Finding]:
    init = str(config.get("init_lora_weights", True)).lower()
    if not init.startswith(_DISPLACING):
        return []
    return [
        Finding(
            f"init_lora_weights={init!r}: A and B lie over a base that lacks what they began with",
            "load it with Lamina and save it: a stage that is saved lies over the base as it was",
        )
    ]


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
