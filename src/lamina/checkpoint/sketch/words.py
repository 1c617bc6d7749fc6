"""What was found of a base, said; each is what goes on after the base's name."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lamina.checkpoint.sketch.matching import Findings, correlation, module_of

# Weights of models that began as the same one are that much alike, others are not at all.
_RELATED = 0.9


def alike(found: Findings, base: str, notes: Collection[str]) -> str:
    """Where all values that were compared are the recorded ones."""
    if not found.compared:
        but = f", but {' and '.join(notes)}" if notes else ""
        return f"has the names and shapes of {base}{but}; no values of it can be looked at"
    unseen = len(found.hidden) + len(found.lost)
    dark = f", as far as can be seen: {unseen} of its weights can't be" if unseen else ""
    if not notes:
        return f"has the weights of {base}{dark}"
    return f"is {base}, but {' and '.join(notes)}{dark}"


def other(found: Findings, base: str) -> str:
    """Where values or shapes differ."""
    strange = [*found.differing, *found.reshaped]
    total = found.compared + len(found.reshaped)
    what = " or ".join(
        word for word, names in (("values", found.differing), ("shapes", found.reshaped)) if names
    )
    verb = "has" if len(strange) == 1 else "have"
    share = f"{len(strange)} of {total} weights {verb} other {what}"
    if 2 * len(strange) < total - len(found.flat):
        return f"is not quite {base}: {share} ({some(strange)})"
    if related(found):
        likeness = correlation({**found.dense, **found.quantised}) or 0.0
        alike = f"{likeness:.4f}" if likeness < 0.9999 else "above 0.9999"
        return f"is a relative of {base}, and not it: {share} (correlation {alike})"
    return f"is another model than {base}: {share}"


def related(found: Findings) -> bool:
    """Whether the weights that differ came from the same ones, to go by their correlation."""
    likeness = correlation({**found.dense, **found.quantised})
    return likeness is not None and likeness >= _RELATED


def share_of_targets(found: Findings, targets: Collection[str]) -> str:
    """How many of the adapter's targets differ."""
    looked = {*found.same, *found.near, *found.differing}
    aimed = [n for n in looked if n.endswith(".weight") and module_of(n) in targets]
    changed = sum(name in found.differing for name in aimed)
    share = f"all {changed}" if changed == len(aimed) else f"{changed} of the {len(aimed)}"
    return f"it differs in {share} weights that the adapter targets, and in nothing else"


def parts(found: Findings) -> str:
    """What is missing, and what is there besides."""
    said = []
    if found.missing:
        said.append(f"without {some(found.missing)}")
    if found.extra:
        said.append(f"with {some(found.extra)} besides")
    return " and ".join(said)


def rows(found: Findings) -> str:
    """How many rows there are instead of how many."""
    there, here = next(iter(found.rows.values()))
    names = some([*found.rows])
    if here > there:
        return f"with {here - there} more rows in {names} ({here} instead of {there})"
    return (
        f"with {there - here} rows fewer in {names} ({here} instead of {there}), so that what was "
        "trained on those is lost"
    )


def no_layers(names: Iterable[str]) -> bool:
    """Whether none of these weights is part of a numbered layer."""
    return not any(part.isdigit() for name in names for part in name.split("."))


def only_poolers(names: Iterable[str]) -> bool:
    """Whether these are all of the pooler on top of a bare model.

    Checkpoints of masked language models have none, so that every loading makes another one; what
    a bare model gives for each token doesn't depend on it.
    """
    return all(name.startswith("pooler.") for name in names)


def some(names: Collection[str]) -> str:
    """The first few."""
    shown = list(names)[:3]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
