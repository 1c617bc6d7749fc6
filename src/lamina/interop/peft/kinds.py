"""peft's kinds of layers: the engine's own, with peft's constructors.

A model that is adapted in the drop-in gets these, so that what is patched or derived from is what
computes. A native layer counts as an instance.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lamina.engine import layers as native
from lamina.engine.layers.conv import _ConvNd as NativeConv
from lamina.interop.peft import proxies, variants
from lamina.interop.peft.building import BuiltLayer

__all__ = ["LoraLayer"]

Variants = dict[tuple[str, ...], Any]


class LoraLayer(BuiltLayer):
    """What to derive from for a layer of one's own; as it is, it computes as `Linear`.

    Every layer with factors is an instance of this; those that replace rows are none.
    """

    stands_for: Any = native.LoraLayer
    stands_not_for: Any = native.TrainableTokensLayer
    fan_in_fan_out = False
    in_features: int | None
    out_features: int | None
    add_factors: Any = native.Linear.add_factors
    dropped: Any = native.Linear.dropped
    update: Any = native.Linear.update

    def _stand(self, base_layer: nn.Module, *more: Any) -> None:
        super()._stand(base_layer, *more)
        if "lora_A" not in self._modules:
            self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.in_features, self.out_features = self._get_in_out_features(self.get_base_layer())

    def _plain_delta(self, adapter: str) -> Any:
        plain: Any = native.Linear.delta_weight
        return plain(self, adapter)


class Linear(BuiltLayer, native.Linear):
    """LoRA on a linear layer, built with its first adapter.

    Args:
        base_layer: the layer that is adapted.
        adapter_name: the adapter's name.
        config: the adapter's settings.
        r: its rank.
        lora_alpha: the numerator of its scaling.
        is_target_conv_1d_layer: whether the layer is transformers' `Conv1D`; it is seen by itself.
        kwargs: `target_name`, the layer's name in the model.
    """

    stands_for: Any = native.Linear
    standing = True

    def __init__(
        self,
        base_layer: nn.Module | None = None,
        adapter_name: str = "default",
        config: Any = None,
        r: int = 0,
        lora_alpha: float = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        _built(self, base_layer, adapter_name, config, r, lora_alpha, kwargs)
        self.is_target_conv_1d_layer = is_target_conv_1d_layer

    @property
    def lora_variants(self) -> Variants:
        """What a config may ask for at once -> the class of the variant."""
        return {
            (): None,
            ("use_dora",): variants.DoraLinearVariant,
            ("arrow_config",): variants.ArrowLinearVariant,
            ("use_bdlora",): variants.BdLoraLinearVariant,
            ("alora_invocation_tokens",): variants.ALoraLinearVariant,
            ("velora_config",): variants.VeloraLinearVariant,
            ("monteclora_config",): variants.MontecloraLinearVariant,
            ("mica",): variants.MiCALinearVariant,
            ("kasa_config",): variants.KasaLinearVariant,
        }


class Embedding(BuiltLayer, native.Embedding):
    """LoRA on an embedding, built with its first adapter; see `Linear`."""

    stands_for: Any = native.Embedding
    standing = True

    def __init__(
        self,
        base_layer: nn.Module | None = None,
        adapter_name: str = "default",
        config: Any = None,
        r: int = 0,
        lora_alpha: float = 1,
        init_lora_weights: bool | str = True,
        **kwargs: Any,
    ) -> None:
        _built(self, base_layer, adapter_name, config, r, lora_alpha, kwargs)

    @property
    def lora_variants(self) -> Variants:
        """What a config may ask for at once -> the class of the variant."""
        return {
            (): None,
            ("use_dora",): variants.DoraEmbeddingVariant,
            ("mica",): variants.MiCAEmbeddingVariant,
        }


class _ConvNd(BuiltLayer, NativeConv):
    """LoRA on a convolution, built with its first adapter; see `Linear`."""

    stands_for: Any = NativeConv

    def __init__(
        self,
        base_layer: nn.Module | None = None,
        adapter_name: str = "default",
        config: Any = None,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        _built(self, base_layer, adapter_name, config, r, lora_alpha, kwargs)


class Conv1d(_ConvNd, native.Conv1d):
    """LoRA on `nn.Conv1d`; see `Linear`."""

    stands_for: Any = native.Conv1d
    standing = True

    @property
    def lora_variants(self) -> Variants:
        """What a config may ask for at once -> the class of the variant."""
        return {(): None, ("use_dora",): variants.DoraConv1dVariant}


class Conv2d(_ConvNd, native.Conv2d):
    """LoRA on `nn.Conv2d`; see `Linear`."""

    stands_for: Any = native.Conv2d
    standing = True

    @property
    def lora_variants(self) -> Variants:
        """What a config may ask for at once -> the class of the variant."""
        return {(): None, ("use_dora",): variants.DoraConv2dVariant}


class Conv3d(_ConvNd, native.Conv3d):
    """LoRA on `nn.Conv3d`; see `Linear`."""

    stands_for: Any = native.Conv3d
    standing = True

    @property
    def lora_variants(self) -> Variants:
        """What a config may ask for at once -> the class of the variant."""
        return {(): None, ("use_dora",): variants.DoraConv3dVariant}


class MultiheadAttention(BuiltLayer, native.MultiheadAttention):
    """LoRA on `nn.MultiheadAttention`, built with its first adapter; see `Linear`."""

    stands_for: Any = native.MultiheadAttention
    standing = True

    def __init__(
        self,
        base_layer: nn.Module | None = None,
        adapter_name: str = "default",
        config: Any = None,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        reason = None if base_layer is None else self.why_not(base_layer)
        if reason is not None:
            raise ValueError(reason)
        _built(self, base_layer, adapter_name, config, r, lora_alpha, kwargs)


class ParamWrapper(BuiltLayer, native.ParamWrapper):
    """LoRA on a parameter, built with its first adapter; see `Linear`.

    Args:
        base_layer: the module, or the wrapper of another parameter of it.
        adapter_name: the adapter's name.
        parameter_name: the parameter's name in the module.
        config: the adapter's settings.
        r: its rank.
        lora_alpha: the numerator of its scaling.
        kwargs: `target_name`, the module's name in the model.
    """

    stands_for: Any = native.ParamWrapper
    standing = True

    def __init__(
        self,
        base_layer: nn.Module | None = None,
        adapter_name: str = "default",
        parameter_name: str = "",
        config: Any = None,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        dropout = getattr(config, "lora_dropout", 0)
        if dropout:
            raise ValueError(f"lora.ParamWrapper does not work with lora_dropout={dropout}.")
        _built(self, base_layer, adapter_name, config, r, lora_alpha, kwargs, parameter_name)

    @classmethod
    def around(cls, layer: nn.Module, state: Any, parameter_name: str) -> ParamWrapper:
        """A wrapper in a model; its adapters come from the engine."""
        made = cls.__new__(cls)
        native.ParamWrapper.__init__(made, layer, state, parameter_name)
        return made

    def add_adapter(self, name: str, record: Any, **options: Any) -> None:
        """Add an adapter, by the engine's code alone.

        transformers replaces `update_layer` by one that swaps the sides of some parameters; here
        the module itself is asked which they are.
        """
        native.ParamWrapper.add_adapter(self, name, record, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with the sum in the parameter's place."""
        names = self.contributing()
        if not proxies.is_replaced() or len(names) != 1 or self.weight_view.is_parametrized:
            return native.ParamWrapper.forward(self, *args, **kwargs)
        module, name = self.get_base_layer(), self.parameter_name
        with proxies.folding(module, name, *self.sides(names[0]), self.scaling[names[0]]):
            return self.base_layer(*args, **kwargs)


def _built(
    layer: Any,
    base_layer: nn.Module | None,
    adapter: str,
    config: Any,
    r: int,
    lora_alpha: float,
    options: dict[str, Any],
    *more: Any,
) -> None:
    """Let a layer stand around its base, with its first adapter."""
    if base_layer is None:
        nn.Module.__init__(layer)
        return
    layer._stand(base_layer, *more)
    layer.kwargs = options
    layer.ephemeral_gpu_offload = options.get("ephemeral_gpu_offload", False)
    if not more:
        # Only for its warning: the engine takes the sizes from the layer itself.
        layer._get_in_out_features(layer.get_base_layer())
    layer._active_adapter = adapter
    layer.update_layer(adapter, r, lora_alpha=lora_alpha, config=config, **options)


# The engine's kinds -> those that a model gets in the drop-in.
STANDING: dict[type, type] = {
    native.Linear: Linear,
    native.Embedding: Embedding,
    native.Conv1d: Conv1d,
    native.Conv2d: Conv2d,
    native.Conv3d: Conv3d,
    native.MultiheadAttention: MultiheadAttention,
    native.ParamWrapper: ParamWrapper,
}


def dispatch_default(
    target: Any,
    adapter_name: str,
    config: Any,
    parameter_name: str | None = None,
    **kwargs: Any,
) -> nn.Module | None:
    """A layer around `target`, with its first adapter; None for what no kind adapts."""
    if parameter_name is not None:
        return ParamWrapper(target, adapter_name, parameter_name, config=config, **kwargs)
    base = target.get_base_layer() if isinstance(target, native.LoraLayer) else target
    usual = native.layer_class(base)
    kind: Any = None if usual is None else STANDING.get(usual)
    made: nn.Module | None = kind and kind(target, adapter_name, config=config, **kwargs)
    return made
