"""Keep off the terminal what libraries say to themselves."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lamina.errors import LaminaWarning

_TALKING = ("transformers", "trl", "accelerate", "datasets", "peft", "bitsandbytes", "torch")


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and remarks of other libraries inside; Lamina's own are shown."""
    with ExitStack() as stack:
        stack.enter_context(_bars_off())
        stack.enter_context(warnings.catch_warnings())
        for category in (UserWarning, FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        warnings.simplefilter("default", LaminaWarning)
        for name in _TALKING:
            stack.enter_context(errors_only(logging.getLogger(name)))
        yield


@contextmanager
def errors_only(logger: logging.Logger) -> Iterator[None]:
    """Nothing below an error of one logger inside."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _bars_off() -> Iterator[None]:
    import datasets
    from transformers.utils import logging as bars

    shown: Any = bars.is_progress_bar_enabled()
    mapped, silenced = datasets.are_progress_bars_disabled(), os.environ.get("TQDM_DISABLE")
    bars.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
        if not mapped:
            datasets.enable_progress_bars()
        if silenced is None:
            del os.environ["TQDM_DISABLE"]
