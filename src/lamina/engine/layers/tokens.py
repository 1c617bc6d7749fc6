"""Rows of a table that an adapter replaces (`trainable_token_indices`), such as new tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lamina.engine.dtypes import accumulation_dtype, adapter_dtype, to_adapter_input
from lamina.engine.layers.base import LayerAdapter, LoraLayer
from lamina.engine.layers.linear import linear_shape
from lamina.engine.state import AdapterState
from lamina.engine.weights import BaseWeight, weight_of
from lamina.errors import ConfigError


class OwnRows(Mapping[str, torch.Tensor]):
    """adapter -> a table's own rows, read as items or as attributes, as a torch module's are."""

    def __init__(self, layer: TrainableTokensLayer) -> None:
        self._layer = layer

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._layer.records:
            raise KeyError(name)
        return self._layer.original_rows(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.records)

    def __len__(self) -> int:
        return len(self._layer.records)

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class TrainableTokensLayer(LoraLayer):
    """`W'[i] = rows[i]` for the token indices i of an adapter, over an embedding or an output head.

    Nothing as large as the table is made in a forward: an embedding looks its tokens up among the
    rows, a head computes the logits of these rows alone. Low-rank updates of the same table are
    added to the replaced rows too.

    Args:
        base_layer: the embedding or linear layer, adapted or not.
        state: the model's shared state.
        tied_adapter: the layer over the same table whose rows this one uses, and doesn't train.
    """

    kind = "tokens"
    family = ""
    factor_names = ("trainable_tokens_delta",)

    def __init__(
        self,
        base_layer: nn.Module,
        state: AdapterState,
        tied_adapter: TrainableTokensLayer | None = None,
    ) -> None:
        super().__init__(base_layer, state)
        self.in_features, self.out_features = _shape(self.get_base_layer())
        # In a list, so that it isn't a child.
        self._tied_adapter = [tied_adapter] if tied_adapter is not None else []
        self.token_indices: dict[str, list[int]] = {}
        self.trainable_tokens_delta = nn.ParameterDict()
        if tied_adapter is not None:
            self.token_indices = tied_adapter.token_indices
            self.trainable_tokens_delta = tied_adapter.trainable_tokens_delta

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The layer whose rows this one uses."""
        return self._tied_adapter[0] if self._tied_adapter else None

    def source_of(self, name: str) -> LoraLayer | None:
        return self.tied_adapter

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapters, in a list even if there is one."""
        return self.active_adapters

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """The places in which adapters of this layer have parameters."""
        return self.factor_names

    def get_base_layer(self) -> nn.Module:
        """The table's own module, inside all that adapts it."""
        inner = self.base_layer
        return inner.get_base_layer() if isinstance(inner, LoraLayer) else inner

    @property
    def weight_view(self) -> BaseWeight:
        return weight_of(self.get_base_layer())

    # --- adapters ----------------------------------------------------------------------------

    def expect(self, name: str, indices: Sequence[int]) -> None:
        """Say which rows the adapter that is about to be added replaces."""
        self.token_indices[name] = list(indices)

    def add_factors(self, name: str, record: LayerAdapter, dtype: torch.dtype) -> None:
        shape = (len(self.token_indices[name]), self.weight.shape[1])
        self.trainable_tokens_delta[name] = nn.Parameter(
            torch.empty(shape, device="meta", dtype=dtype)
        )

    def add_adapter(
        self,
        name: str,
        record: LayerAdapter,
        *,
        init: bool | str | None = True,
        upcast: bool = True,
    ) -> None:
        """Add an adapter whose rows begin as the table's; None leaves them on the meta device."""
        self.records[name] = record
        self.lora_dropout[name] = nn.Identity()
        if self.tied_adapter is None:
            self.add_factors(name, record, adapter_dtype(self.weight_view.dtype, upcast=upcast))
            if init is not None:
                self.initialise(name, init)

    @torch.no_grad()
    def initialise(self, name: str, init: bool | str) -> None:
        """Begin an adapter's rows as the table's, or for False as noise."""
        if self.weight_view.device.type == "meta" or self.tied_adapter is not None:
            return
        rows = self.original_rows(name)
        values = torch.randn_like(rows) if init is False else rows.clone()
        self.assign(name, "trainable_tokens_delta", values.to(self.rows(name).dtype))

    def delete_adapter(self, name: str) -> None:
        super().delete_adapter(name)
        self.token_indices.pop(name, None)

    def rows(self, name: str) -> torch.Tensor:
        """What an adapter puts in the place of its tokens' rows."""
        rows: torch.Tensor = self.trainable_tokens_delta[name]
        return rows

    def index(self, name: str) -> torch.Tensor:
        """The indices of an adapter's tokens."""
        device = self.weight_view.device
        return torch.tensor(self.token_indices[name], dtype=torch.long, device=device)

    def original_rows(self, name: str) -> torch.Tensor:
        """What the table has in these rows, whatever is folded in."""
        stored = self._unfolded.get("weight")
        view = self.weight_view
        weight = view.read() if stored is None else view.values_of(stored).to(view.device)
        return weight.detach()[self.index(name)]

    @property
    def trainable_tokens_original(self) -> OwnRows:
        """adapter -> the table's own rows."""
        return OwnRows(self)

    # --- forward -----------------------------------------------------------------------------

    def added(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        routing = self.adapter_state.routing
        if routing is None or routing.names is None:
            names = self.contributing()
            self.check_apart(names)
            for name in names:
                result = self._replaced(name, x, result)
            return result
        for name in routing.adapters if not self.disable_adapters else ():
            if name in self.records:
                rows = routing.rows(name, x.shape[0], x.device)
                part = self._replaced(name, x[rows], result[rows])
                result = result.index_copy(0, rows, part)
        return result

    def _replaced(self, name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        rows = self.rows(name)
        # Under low-rank updates of the same table, only the difference can be added.
        over = isinstance(self.base_layer, LoraLayer)
        if over:
            rows = rows - self.original_rows(name).to(rows.dtype)
        if isinstance(self.get_base_layer(), nn.Embedding):
            return self._looked_up(name, x, result, rows, over)
        index = self.index(name)
        logits = F.linear(to_adapter_input(x, rows.dtype), rows)
        bias = self.get_base_layer()._parameters.get("bias")
        if over:
            logits = logits + result[..., index]
        elif bias is not None:
            logits = logits + bias[index]
        return result.index_copy(-1, index, logits.to(result.dtype))

    def _looked_up(
        self, name: str, x: torch.Tensor, result: torch.Tensor, rows: torch.Tensor, over: bool
    ) -> torch.Tensor:
        in_order, order = torch.sort(self.index(name))
        place = torch.searchsorted(in_order, x).clamp(max=len(in_order) - 1)
        hit = (in_order[place] == x).unsqueeze(-1)
        found = F.embedding(order[place], rows)
        # Some models scale inside their embedding's forward; the rows have to follow.
        scale = getattr(self.get_base_layer(), "embed_scale", None)
        if scale is not None:
            found = found * torch.as_tensor(scale).to(found)
        new = (result + found if over else found).to(result.dtype)
        return torch.where(hit, new, result)

    def check_apart(self, names: Sequence[str]) -> None:
        """Refuse adapters that would replace the same row.

        Raises:
            ConfigError: two of them name the same token.
        """
        taken: set[int] = set()
        for name in dict.fromkeys([*self.merged_adapters, *names]) if len(names) > 0 else ():
            both = taken & set(self.token_indices[name])
            if both:
                raise ConfigError(
                    f"Token indices of adapter {name} are already defined and would result in "
                    f"undefined merging behavior: {sorted(both)[:8]} are another adapter's too.",
                    cure="make one of them active at a time",
                )
            taken |= set(self.token_indices[name])

    def get_merged_weights(self, active_adapters: Sequence[str]) -> torch.Tensor:
        """The table with these adapters' rows in it, as a tensor; gradients flow to the rows."""
        weight = self.weight
        for name in active_adapters if not self.disable_adapters else ():
            if name in self.records and name not in self.merged_adapters:
                weight = weight.index_copy(0, self.index(name), self.rows(name).to(weight))
        return weight

    # --- folding -----------------------------------------------------------------------------

    def why_not_foldable(self, names: Sequence[str]) -> str | None:
        self.check_apart(names)
        inner = self.base_layer
        if isinstance(inner, LoraLayer) and inner.merged_adapters:
            return "a low-rank update is folded into its rows already; unfold that first"
        if getattr(self.get_base_layer(), "max_norm", None) is not None:
            return "its rows would be shrunk to max_norm"
        return self.weight_view.why_not_writable

    @torch.no_grad()
    def folded(self, names: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The table with these adapters' rows in it."""
        stored = self.weight_view.read()
        weight = stored.to(accumulation_dtype(stored.dtype), copy=True)
        for name in names:
            weight[self.index(name)] = self.rows(name).to(weight)
        return weight, None

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What an adapter changes in the table; zero but for its rows."""
        return self.delta_weight(adapter).to(self.rows(adapter).dtype)

    def update(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """Rows are replaced, nothing is added."""
        raise NotImplementedError

    def delta_weight(self, adapter: str) -> torch.Tensor:
        weight = torch.zeros_like(self.weight)
        rows = self.rows(adapter)
        weight[self.index(adapter)] = (rows - self.original_rows(adapter).to(rows)).to(weight)
        return weight


def _shape(base: Any) -> tuple[int, int]:
    """(in features, out features), for an embedding (rows, their length)."""
    if isinstance(base, nn.Embedding):
        return base.num_embeddings, base.embedding_dim
    return linear_shape(base)


class TrainableTokensWrapper(nn.Module):
    """What stands in an embedding's place, beside low-rank updates: `token_adapter` does the work.

    Args:
        module: the embedding or head, adapted or not.
        state: the model's shared state.
        tied_adapter: the layer over the same table whose rows are used.
    """

    def __init__(
        self,
        module: nn.Module,
        state: AdapterState,
        tied_adapter: TrainableTokensLayer | None = None,
    ) -> None:
        super().__init__()
        self.token_adapter = TrainableTokensLayer(module, state, tied_adapter)
        self.train(module.training)

    @property
    def original_module(self) -> nn.Module:
        """The module itself."""
        inner: nn.Module = self.token_adapter.base_layer
        return inner

    @property
    def weight(self) -> torch.Tensor:
        """The table with the active adapters' rows in it."""
        return self.token_adapter.get_merged_weights(self.token_adapter.active_adapters)

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters that have rows here."""
        inner = self.token_adapter
        return [name for name in inner.active_names if name in inner.records]

    @property
    def _adapters(self) -> set[str]:
        return set(self.token_adapter.records)

    def _get_available_adapters(self) -> set[str]:
        return self._adapters

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """The name of an adapter's rows on disk -> in this module, as transformers asks for it."""
        if self.token_adapter.tied_adapter is not None:
            return {}
        rows = "token_adapter.trainable_tokens_delta"
        return {rows: f"{rows}.{adapter_name}"}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives, with the active adapters' rows."""
        return self.token_adapter(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            inner = self.__dict__.get("_modules", {}).get("token_adapter")
            if inner is None or name.startswith("_"):
                raise
            return getattr(inner, name)
