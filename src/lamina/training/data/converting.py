"""From an example of a format to the columns that TRL's trainer of a method takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

from lamina.training.data.conversation import (
    BrokenRow,
    Message,
    answers,
    messages_in,
    text_in,
    with_system,
)
from lamina.training.data.formats import Layout

Row = Mapping[str, Any]
Converted = dict[str, Any]


def convert(row: Row, layout: Layout, method: str) -> Converted:
    """One example, as the method's trainer takes it.

    pt: text. sft: text, messages, or prompt and completion. dpo, orpo, kto: prompt, chosen and
    rejected. kto: also prompt, completion and label. reward: chosen and rejected, with prompt if
    there is one. grpo: prompt, and all other columns as they are.

    Raises:
        BrokenRow: something is missing in it, or of the wrong kind.
    """
    named = layout.named(row)
    converted = _CONVERTERS[layout.format](named)
    if layout.format == "preference":
        converted = _preference(named, with_prompt=method != "reward")
    if method == "grpo":
        rest = {key: named.get(key) for key in layout.used if key != "prompt"}
        return {**converted, **rest}
    if "tools" in layout.used:
        converted["tools"] = _tools(named.get("tools"))
    return converted


def _text(row: Row) -> Converted:
    return {"text": text_in(row.get("text"), "text")}


def _messages(row: Row) -> Converted:
    column = "messages" if row.get("messages") is not None else "conversations"
    talk = with_system(messages_in(row.get(column), column), row.get("system"))
    return {"messages": answers(talk, column)}


def _alpaca(row: Row) -> Converted:
    prompt = [*_history(row.get("history")), _asked(row)]
    answer = text_in(row.get("output"), "output")
    return {
        "prompt": with_system(prompt, row.get("system")),
        "completion": [{"role": "assistant", "content": answer}],
    }


def _asked(row: Row) -> Message:
    """What the user of an alpaca example says: the instruction, and the input on a new line."""
    said = text_in(row.get("instruction"), "instruction")
    more = row.get("input")
    if more is not None and not isinstance(more, str):
        raise BrokenRow("input is no text")
    return {"role": "user", "content": f"{said}\n{more}" if more else said}


def _history(turns: Any) -> list[Message]:
    if turns in (None, "", []):
        return []
    if not isinstance(turns, list):
        raise BrokenRow("history is no list of [question, answer]")
    told: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise BrokenRow(f"turn {number} of history is no [question, answer]")
        for role, said in zip(("user", "assistant"), turn, strict=True):
            told.append({"role": role, "content": text_in(said, f"turn {number} of history")})
    return told


def _prompt_completion(row: Row) -> Converted:
    prompt, completion = (
        _either(row.get("prompt"), "prompt"),
        _either(row.get("completion"), "completion"),
    )
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": completion}
    return {
        "prompt": _said(prompt, "user"),
        "completion": answers(_said(completion, "assistant"), "completion"),
    }


def _unpaired(row: Row) -> Converted:
    label = row.get("label")
    known = {"true": True, "1": True, "false": False, "0": False}
    told = str(int(label)) if isinstance(label, (bool, float, int)) else str(label).lower()
    if told not in known:
        raise BrokenRow(f"label is {label!r}, neither true nor false")
    return {**_prompt_completion(row), "label": known[told]}


def _prompt_only(row: Row) -> Converted:
    prompt = _either(row.get("prompt"), "prompt")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise BrokenRow("prompt ends with what the assistant says")
    return {"prompt": prompt}


def _preference(row: Row, with_prompt: bool = True) -> Converted:
    """Two answers to one prompt, which may be what both of them begin with."""
    chosen = _either(row.get("chosen"), "chosen")
    rejected = _either(row.get("rejected"), "rejected")
    prompt = _prompt_of(row)
    if isinstance(prompt, list) or isinstance(chosen, list) or isinstance(rejected, list):
        chosen, rejected = _said(chosen, "assistant"), _said(rejected, "assistant")
        prompt = _without_repeat(prompt, chosen, rejected)
        if isinstance(prompt, list):
            size = len(prompt)
            repeated = chosen[:size] == prompt and rejected[:size] == prompt
            chosen, rejected = (chosen[size:], rejected[size:]) if repeated else (chosen, rejected)
    if chosen == rejected:
        raise BrokenRow("chosen and rejected are the same")
    if prompt is None and with_prompt:
        prompt, chosen, rejected = _parted(chosen, rejected)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise BrokenRow(f"{name} is nothing but the prompt")
        if isinstance(answer, list):
            answers(answer, name)
    asked = {} if prompt is None else {"prompt": prompt}
    return {**asked, "chosen": chosen, "rejected": rejected}


def _prompt_of(row: Row) -> str | list[Message] | None:
    if row.get("instruction") is not None:
        return with_system([_asked(row)], row.get("system"))
    if row.get("conversations") is not None:
        return with_system(messages_in(row["conversations"], "conversations"), row.get("system"))
    if "prompt" not in row:
        return None
    prompt = _either(row["prompt"], "prompt")
    return with_system(_said(prompt, "user"), row["system"]) if row.get("system") else prompt


def _without_repeat(
    prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]
) -> list[Message] | None:
    """A prompt as messages; None if it is a text that the answers say again as conversations."""
    if not isinstance(prompt, str):
        return prompt
    if chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return _said(prompt, "user")
    said = {"role": "user", "content": prompt}
    if said in chosen and said in rejected:
        return None
    raise BrokenRow("chosen and rejected are conversations that don't begin with the prompt")


def _parted(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What two answers begin with, and what is left of each."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    size = sum(1 for _ in alike)
    # A space goes with the word behind it, which is how tokens are cut.
    if isinstance(chosen, str) and size and chosen[size - 1] == " ":
        size -= 1
    if not size:
        raise BrokenRow("there is no prompt, and chosen and rejected begin differently")
    return chosen[:size], chosen[size:], rejected[size:]


def _either(value: Any, column: str) -> str | list[Message]:
    """A text, or a list of messages."""
    if isinstance(value, (list, dict)):
        return messages_in(value, column)
    return text_in(value, column)


def _said(value: str | list[Message], role: str) -> list[Message]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _tools(value: Any) -> str | None:
    """Tools as the JSON that trainers parse."""
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    try:
        json.loads(value)
    except json.JSONDecodeError as error:
        raise BrokenRow(f"tools is no JSON: {error.msg}") from error
    return value


_CONVERTERS: dict[str, Callable[[Row], Converted]] = {
    "text": _text,
    "messages": _messages,
    "sharegpt": _messages,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "unpaired_preference": _unpaired,
    "prompt_only": _prompt_only,
    "preference": _preference,
}
