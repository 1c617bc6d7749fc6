"""`LoraModel`: the model that is adapted, under the name that PEFT's format gives it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from lamina.config import LoraConfig
from lamina.engine import fold
from lamina.engine.combine import Settings
from lamina.engine.inject import delete_adapter, inject
from lamina.engine.state import AdapterState
from lamina.engine.trainability import (
    apply_bias_trainability,
    apply_trainability,
    live_adapters,
)
from lamina.errors import ConfigError
from lamina.model import merging, penalties
from lamina.model.combining import CombineReport, add_weighted_adapter
from lamina.model.conversion import supports_lora_conversion


class LoraModel(nn.Module):
    """A model with adapters, without anything that knows about files.

    Args:
        model: the model to adapt, in place.
        config: the first adapter's config, or a dict from names to configs; None for none yet.
        adapter_name: the first adapter's name.
    """

    prefix = "lora_"
    peft_type = "LORA"

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig | dict[str, LoraConfig] | None = None,
        adapter_name: str = "default",
        *,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.adapter_state = AdapterState()
        configs = config if isinstance(config, dict) else {adapter_name: config}
        for name, each in configs.items():
            if each is not None:
                self.add(name, each, initialise=not low_cpu_mem_usage)

    def kasa_loss(self, adapters: str | Iterable[str] | None = None) -> torch.Tensor | float:
        """What KaSA adds to the loss; see `lamina.model.penalties`."""
        return penalties.kasa_loss(self.model, self.adapter_state, adapters)

    def monteclora_loss(self, adapters: str | Iterable[str] | None = None) -> torch.Tensor | float:
        """What MonteCLoRA adds to the loss; see `lamina.model.penalties`."""
        return penalties.monteclora_loss(self.model, self.adapter_state, adapters)

    def add(
        self,
        name: str,
        config: LoraConfig,
        *,
        trainable: bool | None = None,
        initialise: bool = True,
        upcast: bool = True,
        strict: bool = True,
    ) -> None:
        """Add an adapter; it becomes active only if it is the first."""
        first = not self.adapter_state.configs
        self.check_method(config)
        inject(
            self.model,
            name,
            config,
            self.adapter_state,
            trainable=not config.inference_mode if trainable is None else trainable,
            initialise=initialise,
            upcast=upcast,
            strict=strict,
        )
        if first:
            self.activate([name])

    def check_method(self, config: LoraConfig) -> None:
        """Refuse adapters of several methods in one model.

        Raises:
            ConfigError: there are some of another one.
        """
        kinds = {each.peft_type for each in (*self.adapter_state.configs.values(), config)}
        if len(kinds) > 1:
            names = " and ".join(sorted(getattr(kind, "value", str(kind)) for kind in kinds))
            raise ConfigError(
                f"Cannot combine adapters with different peft types: {names}.",
                cure="use a model of its own for each method, or merge one adapter first",
            )

    def activate(self, names: Iterable[str], train: Iterable[str] | None = None) -> None:
        """Make exactly these adapters active; `train` says which of all are trainable."""
        state = self.adapter_state
        before, overridden = live_adapters(state), state.overridden
        state.activate(names)
        asked: frozenset[str] = frozenset()
        if train is not None:
            asked = state.trainable = frozenset(state.check_known(train))
        changed = asked | (before ^ live_adapters(state))
        if overridden:
            # Layers that were switched one by one have changed what trains there.
            apply_trainability(self.model, state)
        elif changed:
            apply_trainability(self.model, state, changed)
        else:
            apply_bias_trainability(state)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        delete_adapter(self.model, adapter_name, self.adapter_state)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> CombineReport:
        """Add a frozen, inactive adapter made of others: `sum_i w_i * s_i * B_i @ A_i`.

        `cat` is exact, its rank the sum of the ranks; so is `svd` where the rank suffices. The
        others approximate, and the report says by how much, in each layer and over all. `linear`,
        `ties`, `dare_linear`, `dare_ties` and `magnitude_prune` treat A and B each for itself, so
        that every A meets every B: mostly a rough approximation.

        One adapter with the weight 1 (and the density 1) gives its own update back. With a
        density below 1 the method prunes it as it does several. Where an adapter doesn't adapt a
        layer, it counts as zero there. Each layer has a rank of its own. DoRA and other updates
        that are not `scaling * B @ A` are taken by `svd` and the methods that end in `_svd`, and
        refused by the others. Biases are summed exactly; a module that one of the adapters has
        trained whole is copied.

        Args:
            adapters: the names of those to combine.
            weights: one for each; negative takes away.
            adapter_name: of the new one.
            combination_type: one of `lamina.engine.combine.METHODS`.
            svd_rank: the rank of methods with `svd`; None takes a layer's largest.
            svd_clamp: factors from a decomposition are clamped to plus and minus this quantile.
            svd_full_matrices: accepted; it makes no difference to the result.
            svd_driver: the cuSOLVER routine, on CUDA.
            density: the share of entries that `ties`, `dare` and `magnitude_prune` keep.
            majority_sign_method: how `ties` elects signs: by "total" or "frequency".

        Raises:
            ConfigError, AdapterNameError: with all that is wrong; nothing has been changed.

        Sources: TIES-Merging, arXiv:2306.01708; DARE, arXiv:2311.03099.
        """
        settings = Settings(svd_rank, density, majority_sign_method, svd_clamp, svd_driver)
        return add_weighted_adapter(
            self.model,
            self.adapter_state,
            adapters,
            weights,
            adapter_name,
            combination_type,
            settings,
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can turn an adapter into plain LoRA."""
        return supports_lora_conversion(self.model, adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted model's output."""
        return self.finish(self.model(*args, **kwargs))

    def finish(self, outputs: Any) -> Any:
        """What the model answers, from what the adapted one gives: the same."""
        return outputs

    # --- folding -----------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        target: Literal["quantized"] | None = None,
    ) -> None:
        """Fold adapters (None: the active ones) into the base weights, reversibly.

        Args:
            adapter_names: the adapters.
            safe_merge: look for NaN and Inf in all results before any weight is changed.
            target: "quantized" lets a quantised base round the sums to its codes again; what it
                held comes back bit for bit all the same.

        Raises:
            FoldError: a layer can't be folded into, or is quantised and no target is given.
        """
        merging.check_target(target, only="quantized")
        fold.fold(
            self.model,
            self.adapter_state,
            adapter_names,
            safe=safe_merge,
            requantise=True if target else None,
        )

    def unmerge_adapter(self) -> None:
        """Take all folded adapters out again; the base weights come back bit for bit."""
        fold.unfold(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        target: merging.Target | None = None,
        dtype: torch.dtype | None = None,
        untie: bool = False,
    ) -> nn.Module:
        """The plain model with adapters (None: the active ones) folded in for good.

        Over a quantised base there are two ways, which `lamina.compare_merges` measures; a third,
        into the base in full precision, is `lamina merge`.

        Args:
            progressbar: accepted; there is none.
            safe_merge: look for NaN and Inf in all results before any weight is changed.
            adapter_names: the adapters.
            target: what quantised layers become: "quantized" rounds the sums to their codes
                again, "dequantized" makes all of them dense.
            dtype: of the layers that become dense; None takes that of the model's dense
                parameters.
            untie: give modules that share a weight (an embedding and the head) one each before, so
                that what is folded into one leaves the others as they are.

        Raises:
            ConfigError: the settings contradict each other.
            FoldError: a layer can't be folded into, or is quantised and no target is given.
        """
        return merging.merge(
            self.model,
            self.adapter_state,
            adapter_names,
            safe=safe_merge,
            target=target,
            dtype=dtype,
            untie=untie,
        )

    def unload(self) -> nn.Module:
        """The plain model as it was before it was adapted."""
        return fold.unload(self.model, self.adapter_state)

    # --- what code in the wild reads ---------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """adapter -> config."""
        return self.adapter_state.configs

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters in order."""
        return list(self.adapter_state.active)

    active_adapter = active_adapters

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)
