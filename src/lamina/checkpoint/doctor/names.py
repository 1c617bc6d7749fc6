"""Checks of the names and shapes of tensors: do they make an adapter, and whose is it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lamina.checkpoint.doctor.evidence import StoredTensor
from lamina.checkpoint.doctor.findings import Finding
from lamina.checkpoint.doctor.registry import check
from lamina.checkpoint.export.contents import Contents
from lamina.checkpoint.origin import PREFIX, WRAPPERS

_NESTED = PREFIX * 2
_NAMED = re.compile(r"\.lora_(?:A|B|embedding_A|embedding_B)\.[^.]+\.?(?:weight|bias)?$")
_UNNAMED = re.compile(r"\.lora_[AB]\.(?:weight|bias)$")
# What names by other tools have in them -> the tool, and how its files are turned into PEFT's.
_OTHER_TOOLS = {
    re.compile(r"^lora_(unet|te\d?|transformer)_|\.lora_(up|down)\.|\.alpha$"): (
        "kohya's sd-scripts",
        "diffusers reads it: pipe.load_lora_weights(FILE), then pipe.save_lora_adapter(NEW)",
    ),
    re.compile(r"\.lora_[ab]$"): (
        "mlx-lm",
        "give A and B the names of PEFT, and transpose both",
    ),
    re.compile(r"\.lora_[ab]\.weight$"): (
        "torchtune",
        "its checkpointer writes PEFT's form too: take the adapter_model.safetensors beside it",
    ),
    re.compile(r"^(diffusion_model|unet|transformer|text_encoder)\..*lora"): (
        "diffusers",
        "load it with pipe.load_lora_weights(FILE)",
    ),
    re.compile(r"\.(hada_w|lokr_w|oft_|boft_|ia3_|vera_lambda|prompt_embeddings)"): (
        "a method other than LoRA",
        "open it with peft itself",
    ),
}


@check
def no_tensors(tensors: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    """Whether the weights hold anything."""
    if not tensors:
        what = "The weights hold no tensor at all"
        cure = "save again; with FSDP or ZeRO-3 through Lamina, which gathers what is sharded"
        yield Finding("error", "no-tensors", what, (), cure)
    # A layer whose ranks all went to others (AdaLoRA) has factors (0, in) and (out, 0).
    empty = tuple(
        each.key
        for name, each in tensors.items()
        if not math.prod(each.shape) and (len(each.shape) < 2 or ".lora_" not in name)
    )
    if empty:
        what = "Tensors have no entries: they were sharded away when they were saved"
        cure = "gather the parameters before saving (save_stage and save_pretrained do)"
        yield Finding("error", "tensor-empty", what, empty, cure)


@check
def other_tools(tensors: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    """Names that other tools and methods give."""
    for pattern, (tool, cure) in _OTHER_TOOLS.items():
        keys = tuple(e.key for e in tensors.values() if pattern.search(e.key))
        if keys:
            what = f"Tensors have names by {tool}, which readers of PEFT's form drop"
            yield Finding("error", "names-of-another-tool", what, keys, cure)
            return


@check
def wrapped_names(tensors: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    """Names with parts that don't belong on disk."""
    cure = "PeftModel.from_pretrained(base, DIR).save_pretrained(NEW): Lamina reads and mends them"
    keys = [each.key for each in tensors.values()]
    wrapped = tuple(key for key in keys if WRAPPERS.search(key))
    if wrapped:
        what = "Names have parts that torch's wrappers (compile, FSDP) put in"
        yield Finding("warning", "names-wrapped", f"{what}; other readers drop them", wrapped, cure)
    named = tuple(key for key in keys if _NAMED.search(key) and not _UNNAMED.search(key))
    if named:
        what = "Names have an adapter's name in them; other readers drop them"
        yield Finding("warning", "names-with-adapter", what, named, cure)
    nested = tuple(key for key in keys if _NESTED in key)
    if nested:
        what = "The adapter was laid over an adapted model (a PeftModel in a PeftModel)"
        cure = "open it with key_mapping={r'^base_model\\.model\\.base_model\\.model\\.': "
        cure += "'base_model.model.'}, and save it again"
        yield Finding("error", "names-nested", what, nested, cure)


@check
def missing_prefix(tensors: Mapping[str, StoredTensor], contents: Contents) -> Iterator[Finding]:
    """Names without the prefix of PEFT."""
    factors = {key for each in contents.factors for key in each.keys}
    without = tuple(t.key for n, t in tensors.items() if n in factors and not n.startswith(PREFIX))
    if without:
        what = f"Names don't begin with {PREFIX!r}; PEFT drops such tensors in silence"
        cure = "PeftModel.from_pretrained(base, DIR).save_pretrained(NEW): Lamina reads them"
        yield Finding("warning", "prefix-missing", what, without, cure)


@check
def halves(tensors: Mapping[str, StoredTensor], contents: Contents) -> Iterator[Finding]:
    """A without B, and shapes that don't go together."""
    lines = tuple(line for line in contents.halves if " has no " in line)
    if lines:
        what = "Of A and B, modules have only one"
        cure = "the save was cut off or edited; save or download it again"
        yield Finding("error", "factor-missing", what, lines, cure)
    shapes = tuple(line for line in contents.halves if " has no " not in line)
    if shapes:
        what = "The shapes of A and B don't go together"
        cure = "the tensors are of different saves; save or download it again"
        yield Finding("error", "shapes-contradict", what, shapes, cure)


@check
def companions(config: dict[str, Any], contents: Contents) -> Iterator[Finding]:
    """What methods keep beside A and B."""
    modules = [each.module for each in contents.factors]
    wanted = {
        "lora_magnitude_vector": ("use_dora", bool(config.get("use_dora")), modules),
        "lora_E": ("peft_type", config.get("peft_type") == "ADALORA", modules),
        "lora_B.bias": ("lora_bias", bool(config.get("lora_bias")), modules),
    }
    for leaf, (field, asked, owners) in wanted.items():
        have = {n[: -len(leaf) - 1] for n in contents.shapes if n.endswith(f".{leaf}")}
        have = {name.removeprefix(PREFIX) for name in have}
        lacking = tuple(sorted({*owners} - have)) if asked else ()
        if lacking and leaf != "lora_B.bias":
            what = f"{field} asks for {leaf}, which modules lack"
            cure = "without it the update isn't what was trained; save or download it again"
            yield Finding("error", "companion-missing", what, lacking, cure)
        elif lacking == tuple(sorted(owners)) and lacking:
            what = f"{field} is on, but no module has a {leaf}"
            cure = f"set {field} to false in adapter_config.json, if it was trained without"
            yield Finding("error", "companion-missing", what, lacking, cure)
        if have and not asked:
            what = f"There are {leaf}, which the config doesn't ask for"
            cure = f"correct {field} in adapter_config.json: readers that go by it drop the tensors"
            yield Finding("error", "companion-unasked", what, tuple(sorted(have)), cure)


@check
def unexplained(
    config: dict[str, Any], tensors: Mapping[str, StoredTensor], contents: Contents
) -> Iterator[Finding]:
    """Tensors that nothing in the config asks for."""
    wanted = tuple(config.get("modules_to_save") or ())
    strange = {
        owner: names
        for owner, names in contents.wholes.items()
        if not (wanted and owner.endswith(wanted))
    }
    tables = {owner for owner in strange if _is_table(owner)}
    keys = _keys(
        tensors, (name for o, names in strange.items() if o not in tables for name in names)
    )
    if keys:
        what = "Tensors belong to no adapted module and to none of modules_to_save"
        cure = "name their modules in modules_to_save if they were trained whole; else save again"
        yield Finding("warning", "tensor-unexplained", what, keys, cure)
    whole = _keys(tensors, (name for owner in tables for name in strange[owner]))
    whole += _keys(tensors, contents.base_weights)
    if whole:
        keys_of_tables = set(whole)
        size = sum(each.size for each in tensors.values() if each.key in keys_of_tables)
        total = sum(each.size for each in tensors.values())
        what = f"Whole tables of the vocabulary are saved along: {_mib(size)} of {_mib(total)}"
        cure = "if no rows were trained, save with Lamina or save_embedding_layers=False; to train "
        cure += "new rows only, use trainable_token_indices"
        yield Finding("note", "table-saved", what, whole, cure)


def _is_table(module: str) -> bool:
    last = module.rpartition(".")[2]
    return last in ("embed_tokens", "lm_head", "wte", "word_embeddings", "embed_out", "embeddings")


def _keys(tensors: Mapping[str, StoredTensor], names: Iterable[str]) -> tuple[str, ...]:
    found = []
    for name in names:
        tensor = tensors.get(name) or tensors.get(PREFIX + name)
        found.append(tensor.key if tensor else name)
    return tuple(found)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


@check
def rows(config: dict[str, Any], contents: Contents) -> Iterator[Finding]:
    """Trained rows of tables, against the config."""
    asked = config.get("trainable_token_indices")
    if contents.rows and not asked:
        what = "There are trained rows of tables, but the config doesn't say which"
        cure = "give trainable_token_indices in adapter_config.json the rows that were trained"
        yield Finding("error", "rows-unasked", what, contents.rows, cure)
    if asked and not contents.rows:
        what = "trainable_token_indices is set, but no trained rows are in the file"
        cure = "save it again, by a version that saves them; or leave the field out"
        yield Finding("error", "rows-missing", what, ("trainable_token_indices",), cure)
    if asked and contents.rows:
        lists = asked.values() if isinstance(asked, dict) else [asked]
        counts = {len(each) for each in lists if each is not None}
        wrong = tuple(n for n in contents.rows if contents.shapes[n][0] not in counts)
        if wrong:
            what = "The number of trained rows is another than trainable_token_indices has"
            cure = (
                "correct trainable_token_indices: one index for each row, in the order of the file"
            )
            yield Finding("error", "rows-contradict", what, wrong, cure)


@check
def uneven_layers(contents: Contents) -> Iterator[Finding]:
    """Layers that lack modules which others have."""
    layers: dict[tuple[str, str], set[int]] = {}
    for each in contents.factors:
        found = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", each.module)
        if found:
            layers.setdefault((found[1], found[3]), set()).add(int(found[2]))
    stacks: dict[str, set[int]] = {}
    for (stack, _), present in layers.items():
        stacks.setdefault(stack, set()).update(present)
    lacking = []
    for (stack, name), present in layers.items():
        peers = stacks[stack]
        if len(present) < len(peers) and len(present) * 2 > len(peers):
            gaps = ", ".join(str(index) for index in sorted(peers - present)[:8])
            lacking.append(f"{stack}.*.{name}: not in layer {gaps}")
    if lacking:
        what = "Most layers have these modules, some don't"
        cure = "fine if layers of the model differ; `lamina doctor DIR --base BASE` tells"
        yield Finding("note", "layers-uneven", what, tuple(lacking), cure)
