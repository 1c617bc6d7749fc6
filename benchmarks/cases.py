"""What is measured, but for training: importing, injecting, switching, saving, folding."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.measure import Case, Side, timed
from benchmarks.memory import peak_mib
from benchmarks.models import Sizes, on_meta, with_weights


def importing(sizes: Sizes) -> Iterator[Case]:
    """A new process that imports; the interpreter's own start is part of it."""

    def run(statement: str) -> Side:
        command = [sys.executable, "-W", "ignore", "-c", statement]
        return lambda: timed(lambda: subprocess.run(command, check=True, capture_output=True))

    yield Case("import", "ms", lambda lib: run(f"import {lib.__name__}"), min(3, sizes.repeats))
    if sizes.whole_imports:
        yield Case(
            "import get_peft_model (with torch)",
            "ms",
            lambda lib: run(f"from {lib.__name__} import get_peft_model"),
            2,
        )


def adapter(library: ModuleType, r: int = 8) -> Any:
    """The config that all cases share: every linear of a layer."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return library.LoraConfig(r=r, lora_alpha=2 * r, target_modules=names)


def injecting(sizes: Sizes) -> Iterator[Case]:
    """The first adapter of a plain model."""
    build: dict[str, Callable[[], Any]] = {
        "on meta": lambda: on_meta(sizes.layers, sizes.hidden),
        "with weights": lambda: with_weights(sizes.layers, sizes.hidden),
    }
    for where, model_of in build.items():

        def prepare(library: ModuleType, model_of: Callable[[], Any] = model_of) -> Side:
            meta = model_of().device.type == "meta"

            def side() -> float:
                model, config = model_of(), adapter(library)
                return timed(lambda: library.get_peft_model(model, config, low_cpu_mem_usage=meta))

            return side

        yield Case(f"inject into {sizes.linears} linears, {where}", "ms", prepare, sizes.repeats)


def adapted(library: ModuleType, sizes: Sizes, count: int = 1, layers: int | None = None) -> Any:
    """A model with `count` adapters, named "0", "1" and so on; the first is active."""
    model = with_weights(layers or sizes.layers, sizes.hidden)
    facade = library.get_peft_model(model, adapter(library), adapter_name="0")
    for number in range(1, count):
        facade.add_adapter(str(number), adapter(library))
    return facade


def crowded(library: ModuleType, sizes: Sizes) -> Callable[[int], Any]:
    """A model that is given more adapters as they are asked for, since making it takes long."""
    models: list[Any] = []

    def with_adapters(count: int) -> Any:
        if not models:
            models.append(adapted(library, sizes))
        for number in range(len(models[0].peft_config), count):
            models[0].add_adapter(str(number), adapter(library))
        return models[0]

    return with_adapters


def crowding(sizes: Sizes) -> Iterator[Case]:
    """One more adapter where some are; switching, and all off and on again, where many are."""
    count = max(sizes.adapters) + 2
    crowds: dict[str, Callable[[int], Any]] = {}

    def crowd(library: ModuleType, size: int) -> Any:
        name = library.__name__
        return crowds.setdefault(name, crowded(library, sizes))(size)

    def add(present: int) -> Callable[[ModuleType], Side]:
        def prepare(library: ModuleType) -> Side:
            model, config = crowd(library, present), adapter(library)

            def side() -> float:
                spent = timed(lambda: model.add_adapter("more", config))
                model.delete_adapter("more")
                return spent

            return side

        return prepare

    def set_adapter(library: ModuleType) -> Side:
        model = crowd(library, count)

        def there_and_back() -> None:
            model.set_adapter("1")
            model.set_adapter("0")

        return lambda: timed(there_and_back, times=5) / 2

    def disable(library: ModuleType) -> Side:
        model = crowd(library, count)

        def off_and_on() -> None:
            with model.disable_adapter():
                pass

        return lambda: timed(off_and_on, times=5)

    # From few to many: the models grow.
    for present in sorted(sizes.adapters):
        yield Case(f"add an adapter, {present} present", "ms", add(present), sizes.repeats)
    yield Case(f"set_adapter among {count}", "ms", set_adapter, sizes.repeats)
    yield Case(f"disable_adapter among {count}, and back", "ms", disable, sizes.repeats)


def files(sizes: Sizes) -> Iterator[Case]:
    """One adapter to disk and back."""

    def save(library: ModuleType) -> Side:
        model = adapted(library, sizes)

        def side() -> float:
            with tempfile.TemporaryDirectory() as folder:
                return timed(lambda: model.save_pretrained(Path(folder) / "adapter"))

        return side

    def load(library: ModuleType) -> Side:
        source = adapted(library, sizes)
        folder = tempfile.TemporaryDirectory()
        source.save_pretrained(folder.name, selected_adapters=["0"])
        del source

        def side() -> float:
            model = with_weights(sizes.layers, sizes.hidden)
            where = str(Path(folder.name) / "0")
            return timed(lambda: library.PeftModel.from_pretrained(model, where))

        return side

    yield Case("save_pretrained", "ms", save, sizes.repeats)
    yield Case("from_pretrained", "ms", load, sizes.repeats)


def folding(sizes: Sizes) -> Iterator[Case]:
    """The adapter into the base weights: so that it can be undone, and for good."""
    for call, told in (("merge_adapter", "reversible"), ("merge_and_unload", "for good")):

        def milliseconds(library: ModuleType, call: str = call) -> Side:
            def side() -> float:
                model = adapted(library, sizes)
                return timed(getattr(model, call))

            return side

        def mebibytes(library: ModuleType, call: str = call) -> Side:
            return lambda: peak_mib(lambda: getattr(adapted(library, sizes), call))

        repeats = min(3, sizes.repeats)
        yield Case(f"{call} ({told})", "ms", milliseconds, repeats)
        yield Case(f"{call}, extra memory at its peak", "MiB", mebibytes, 1)


def combining(sizes: Sizes) -> Iterator[Case]:
    """Two adapters into a third: exactly, and as well as their rank allows."""

    # Decomposing dense matrices takes long.
    few = min(12, sizes.layers)

    def prepare(method: str, layers: int) -> Callable[[ModuleType], Side]:
        def side_of(library: ModuleType) -> Side:
            model = adapted(library, sizes, 2, layers)
            with_numbers(model)

            def combine() -> None:
                model.add_weighted_adapter(["0", "1"], [1.0, 1.0], "sum", combination_type=method)

            def side() -> float:
                spent = timed(combine)
                model.delete_adapter("sum")
                return spent

            return side

        return side_of

    cat, svd = prepare("cat", sizes.layers), prepare("svd", few)
    yield Case("combine two adapters by concatenation", "ms", cat, min(3, sizes.repeats))
    yield Case(f"combine two adapters by svd, {7 * few} linears", "ms", svd, 1)


def with_numbers(model: Any) -> None:
    """Fill all factors, so that none is zero as a fresh B is."""
    import torch

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
