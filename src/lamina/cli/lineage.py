"""`lamina lineage`: the chain of stages that made an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text
from rich.tree import Tree

from lamina.amounts import count_of
from lamina.cli.arguments import Directory, Json, Revision, Subfolder
from lamina.cli.inspect import base_line, metrics_line, when
from lamina.cli.terminal import console, print_json, some, span

if TYPE_CHECKING:
    from lamina.checkpoint.chain import Chain, RankGroup, StageSummary
    from lamina.checkpoint.describe import AdapterDescription


def lineage(
    directory: Directory,
    subfolder: Subfolder = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Show the chain that made an adapter: base, stages, and whose ranks are whose."""
    from lamina.checkpoint.describe import describe_adapter

    found = describe_adapter(
        directory, look_for_zeros=False, subfolder=subfolder, revision=revision
    )
    if as_json:
        told = found.to_dict()
        print_json({name: told[name] for name in ("source", "base", "has_record", "chain")})
        return
    console().print(_tree(found))


def _tree(found: AdapterDescription) -> Tree:
    tree = Tree(Text.assemble((base_line(found.base), "bold")), guide_style="dim")
    if found.chain.left_out:
        tree.add(Text(f"without {', '.join(found.chain.left_out)}, left out of this file"))
    branch = tree
    for stage in found.chain.stages:
        # A stage grows out of the one before it.
        branch = branch.add(_heading(stage))
        for line in _changes(stage, found.chain):
            branch.add(Text(line, style="dim"))
    return tree


def _heading(stage: StageSummary) -> Text:
    mode = stage.mode or "unknown origin"
    created = f"  {when(stage.created)}" if stage.created else ""
    return Text.assemble((stage.name, "bold cyan"), f"  {mode}", (created, "dim"))


def _changes(stage: StageSummary, chain: Chain) -> Iterator[str]:
    put_into = next((g.made_of[-1] for g in chain.groups if stage.name in g.made_of[:-1]), None)
    if put_into is not None:
        yield f"flattened: its ranks are in those of {put_into}"
    if stage.trained is not None:
        yield _ranks_line(stage, chain.groups[stage.trained])
    if stage.saved_modules:
        yield f"trained whole: {some(stage.saved_modules)}"
    if stage.biases:
        yield f"biases: {some(stage.biases)}"
    if stage.metrics:
        yield f"measured: {metrics_line(stage)}"
    if stage.data is not None:
        told = stage.data if isinstance(stage.data, str) else json.dumps(stage.data)
        yield f"trained on: {told}"


def _ranks_line(stage: StageSummary, group: RankGroup) -> str:
    modules = count_of(len(group.ranks), "module")
    if group.begun_by not in (stage.name, None):
        return f"went on training {group.begun_by}'s rank {span(group.rank_range)} in {modules}"
    lost = ""
    if group.error is not None:
        lost = f"; compressed, error {group.error:.2g}"
    if group.made_of:
        made_of = ", ".join(group.made_of)
        return f"rank {span(group.rank_range)} in {modules} holds {made_of} as one{lost}"
    targets = group.target_modules
    named = targets if isinstance(targets, str) else some(targets)
    line = f"added rank {span(group.rank_range)} to {modules} ({named}){lost}"
    if group.continued_by:
        line += f", trained on by {some(group.continued_by)}"
    return line
