"""The base classes of tuners and their layers, and `LoraModel` as peft has it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lamina import model as native
from lamina.engine.inject import find_state
from lamina.engine.layers import LoraLayer, ParamWrapper, lora_layers
from lamina.engine.names import adapted_layers
from lamina.engine.state import AdapterState
from lamina.errors import FoldError
from lamina.interop.peft import constants, folding, switching, ties
from lamina.interop.peft.beginnings import refuse_unknown_bias, warn_of_missing_bias
from lamina.interop.peft.fitting import fit, refuse_own_name, warn_misfits, warn_of_custom
from lamina.interop.peft.injected import hand_out
from lamina.interop.peft.matching import check_target_module_exists
from lamina.interop.peft.parts import names_tied_with_embedding
from lamina.interop.peft.standing import StandsFor

_TIED = """The model ties its embeddings (`tie_word_embeddings=True`), and
tied_target_modules={tied} are part of the adapter: what is folded into one changes the other.
Untie them before:
```python
model = AutoModelForCausalLM.from_pretrained(name, tie_word_embeddings=False)
model.lm_head.weight.data = model.get_input_embeddings().weight.data.clone()
model.save_pretrained(untied_model_dir)

# Now use the original model but in untied format
model = AutoModelForCausalLM.from_pretrained(untied_model_dir)
```
"""


class BaseTunerLayer(metaclass=StandsFor):
    """Every adapted layer is an instance of this."""

    stands_for: Any = LoraLayer


class BaseTuner(nn.Module, metaclass=StandsFor):
    """Every tuner is an instance of this."""

    stands_for: Any = native.LoraModel
    prefix: str = ""
    uses_shared_state = False

    @staticmethod
    def get_model_config(model: Any) -> dict[str, Any]:
        """A model's config as a dict; a stand-in for models without one."""
        config: Any = getattr(model, "config", constants.DUMMY_MODEL_CONFIG)
        if hasattr(config, "to_dict"):
            config = config.to_dict()
        elif dataclasses.is_dataclass(config) and not isinstance(config, type):
            config = dataclasses.asdict(config)
        found: dict[str, Any] = config
        return found


class LoraModel(native.LoraModel, metaclass=StandsFor):
    """A model with LoRA adapters, by peft's methods and with its leniency.

    Args:
        model: the model to adapt, in place; one that has adapters gets one more.
        peft_config: the adapter's config, or a dict from its name to it.
        adapter_name: its name.
        low_cpu_mem_usage: leave its weights on the meta device, to be loaded.
        state_dict: adapt the modules that these tensors are named after.
        autocast_adapter_dtype: keep adapters over half-precision weights in fp32.
    """

    stands_for: Any = native.LoraModel
    tuner_layer_cls = LoraLayer
    target_module_mapping = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    uses_shared_state = False
    # What ties weights again that were untied when adapters were folded into one of them.
    _tie_again: Callable[[], None] | None = None
    get_model_config = staticmethod(BaseTuner.get_model_config)
    _check_target_module_exists = staticmethod(check_target_module_exists)

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Any] | None = None,
        autocast_adapter_dtype: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.adapter_state = find_state(model) or AdapterState()
        # peft rounds to a quantised base without being asked.
        self.adapter_state.requantise = True
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        if self.adapter_state.configs:
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having "
                "multiple adapters in the model. Make sure to know what you are doing!",
                stacklevel=3,
            )
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        self.inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype,
            low_cpu_mem_usage,
            state_dict,
            config=configs[adapter_name],
        )
        self.set_adapter(adapter_name, inference_mode=configs[adapter_name].inference_mode)
        hand_out(model, self.adapter_state)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Any] | None = None,
        *,
        config: Any = None,
    ) -> None:
        """Add an adapter; it is not active yet. An old one of this name is replaced.

        Raises:
            NoMatchingPeftModuleError: its config matches nothing.
        """
        config = self._make_room(adapter_name, config)
        refuse_unknown_bias(config.bias)
        self._refuse_second_bias(config)
        self._refuse_mixed_kasa(config)
        ties.refuse_other_parameters(config, self.peft_config)
        misfits = fit(self, config, state_dict)
        refuse_own_name(self, config, adapter_name)
        self.adapter_state.changes_stay = True
        self.adapter_state.copies_begin_as_base = True
        with ties.told_shortly():
            native.LoraModel.add(
                self,
                adapter_name,
                misfits.config,
                initialise=not low_cpu_mem_usage,
                upcast=autocast_adapter_dtype,
                strict=False,
            )
        switching.begin_training_mode(model, adapter_name)
        warn_of_missing_bias(model, adapter_name)
        # The caller's config is the adapter's, as peft has it.
        self.adapter_state.configs[adapter_name] = config
        here, parameters = _adapted(model, adapter_name)
        extend(self.targeted_module_names, here)
        extend(self.targeted_parameter_names, parameters)
        warn_misfits(misfits, here)
        warn_of_custom(model, adapter_name, config)
        ties.warn_of_ties(model, config)

    def _make_room(self, adapter_name: str, config: Any) -> Any:
        """The config of an adapter that is about to be added; an old one of its name goes."""
        config = self.peft_config[adapter_name] if config is None else config
        if adapter_name in self.peft_config:
            native.LoraModel.delete_adapter(self, adapter_name)
        return config

    def _get_kasa_loss(self, adapter_names: Any = None) -> Any:
        return self.kasa_loss(adapter_names)

    def _get_monteclora_loss(self, adapter_names: Any = None) -> Any:
        return self.monteclora_loss(adapter_names)

    def _refuse_mixed_kasa(self, config: Any) -> None:
        """In this mode what KaSA took out of the base stays out of it, for all adapters."""
        others = [c for c in self.peft_config.values() if c is not config]
        if any((c.kasa_config is None) != (config.kasa_config is None) for c in others):
            raise ValueError(
                "KaSA cannot be combined with adapters that don't use KaSA, since KaSA changes the "
                "base's weights."
            )

    def _refuse_second_bias(self, config: Any) -> None:
        biased = [c for c in self.peft_config.values() if c.bias != "none"]
        if biased and config.bias != "none":
            raise ValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple "
                "adapters, set bias to 'none' for all adapters."
            )

    @property
    def peft_config(self) -> dict[str, Any]:
        """adapter -> config."""
        return self.adapter_state.configs

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        if value is not self.adapter_state.configs:
            self.adapter_state.configs.clear()
            self.adapter_state.configs.update(value)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return names_tied_with_embedding(self.model)

    # --- switching ---------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str | list[str]:  # type: ignore[override]
        """The active adapter; a list if there are several, or none."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    def set_adapter(self, adapter_name: str | Iterable[str], inference_mode: bool = False) -> None:
        """Make adapters active and, unless `inference_mode`, trainable, and no others."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        switching.refuse_rivals(self.model, names)
        if any(layer.merged for _, layer in lora_layers(self.model)):
            warnings.warn(
                "Adapter cannot be set when the model is merged. Unmerging the model first.",
                stacklevel=2,
            )
            self.unmerge_adapter()
        self.activate(names, () if inference_mode else names)

    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Let adapters' weights ask for gradients, or not, whether they are active or not."""
        switching.set_requires_grad(self.model, adapter_names, requires_grad)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off until they are switched on again."""
        for name in self.active_adapters:
            if self.peft_config[name].bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be "
                    f"'{self.peft_config[name].bias}' does not produce the same output as the base "
                    "model would without adaption.",
                    stacklevel=2,
                )
        switching.switch_off(self.model, self.adapter_state)

    def enable_adapter_layers(self) -> None:
        """Switch the adapters on again."""
        switching.switch_on(self.model, self.adapter_state)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter.

        Raises:
            ValueError: there is none of this name, or it is folded into the base weights.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        try:
            switching.remove_adapter(self.model, adapter_name, self.adapter_state)
        except FoldError as error:
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. "
                "Please unmerge them first."
            ) from error

    def add_weighted_adapter(  # type: ignore[override]
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Add an adapter made of others; one that is there already stays as it is."""
        if adapter_name in self.peft_config:
            warnings.warn(
                f"There is an adapter {adapter_name!r} already, which is left as it is: delete it "
                "first to make it anew.",
                stacklevel=3,
            )
            return
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)

    # --- taking apart ------------------------------------------------------------------------

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """The plain model with adapters folded in for good."""
        self._warn_if_tied()
        tie_again = folding.untie_for_folding(self.model, self._to_fold(adapter_names))
        with folding.undone_on_error(tie_again):
            merged = super().merge_and_unload(progressbar, safe_merge, adapter_names, **kwargs)
        ties.tell_untied(merged)
        return self._unconfigured(merged)

    def unload(self) -> nn.Module:
        """The plain model as it was before it was adapted."""
        return self._unconfigured(super().unload())

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, **kwargs: Any
    ) -> None:
        """Fold adapters into the base weights, reversibly; those that are in it already warn."""
        self._warn_if_tied()
        names = self._to_fold(adapter_names)
        folding.warn_of_merged(self.model, names)
        tie_again = folding.untie_for_folding(self.model, names)
        with folding.undone_on_error(tie_again):
            super().merge_adapter(adapter_names, safe_merge, **kwargs)
        self._tie_again = tie_again or self._tie_again

    def unmerge_adapter(self) -> None:
        """Take all folded adapters out again, and tie what was untied for them."""
        super().unmerge_adapter()
        if self._tie_again is not None:
            self._tie_again()
            self._tie_again = None

    def _to_fold(self, names: list[str] | None) -> list[str]:
        return self.active_adapters if names is None else names

    def _warn_if_tied(self) -> None:
        """Folding into one of two tied weights changes the other one."""
        if not self.get_model_config(self.model).get("tie_word_embeddings"):
            return
        ends = constants.EMBEDDING_LAYER_NAMES
        tied = [n for n in self.targeted_module_names if n.rpartition(".")[2] in ends]
        if tied:
            warnings.warn(_TIED.format(tied=tied), stacklevel=3)

    def _unconfigured(self, model: nn.Module) -> nn.Module:
        if "peft_config" in model.__dict__:
            del model.peft_config
        return model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can turn an adapter into plain LoRA."""
        from lamina.model.conversion import supports_lora_conversion

        return supports_lora_conversion(self.model, adapter_name)


def extend(names: list[str], more: Iterable[str]) -> None:
    """Add the names that aren't there yet, in their order."""
    known = set(names)
    names += [name for name in more if name not in known]


def _adapted(model: nn.Module, adapter: str) -> tuple[list[str], list[str]]:
    """(modules, parameters) that an adapter adapts, by their plain names."""
    modules, parameters = [], []
    for name, outer in adapted_layers(model):
        wrapped: list[str] = []
        layer: Any = outer
        while isinstance(layer, ParamWrapper):
            if adapter in layer.records:
                wrapped.insert(0, f"{name}.{layer.parameter_name}")
            layer = layer.base_layer
        parameters += wrapped
        if isinstance(layer, LoraLayer) and adapter in layer.records:
            modules.append(name)
    return modules, parameters
