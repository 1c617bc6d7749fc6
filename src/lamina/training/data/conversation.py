"""Messages of a conversation, however a data set spells them, as `{"role", "content"}`."""

from __future__ import annotations

from typing import Any

Message = dict[str, Any]

# ShareGPT's names, and those that its descendants have.
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_KNOWN = ("system", "developer", "user", "assistant", "tool")
# Other trainers leave messages out of the loss by these.
_SWITCHES = ("weight", "train", "training", "train_detail", "training_detail")


class BrokenRow(Exception):
    """What is wrong with one example; collected, and told for all together."""


def is_messages(value: Any, key: str = "role") -> bool:
    """Whether a value is a list of messages with `key` ("role" or "from") in the first."""
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and key in value[0]
    )


def messages_in(value: Any, column: str) -> list[Message]:
    """A column's messages.

    Raises:
        BrokenRow: it holds something else, or a message lacks its role or content.
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise _other(column, value, "list of messages")
    if not value:
        raise BrokenRow(f"{column} is empty")
    return [_message(each, f"message {number} of {column}") for number, each in enumerate(value, 1)]


def with_system(messages: list[Message], system: Any) -> list[Message]:
    """Messages behind a system message that is kept in a column of its own, if there is one."""
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise _other("system", system, "text")
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if first["content"] != system:
        raise BrokenRow("system differs from the system message that the conversation begins with")
    return messages


def text_in(value: Any, column: str) -> str:
    """A column's text.

    Raises:
        BrokenRow: there is none, or nothing but spaces.
    """
    if not isinstance(value, str):
        raise _other(column, value, "text")
    if not value.strip():
        raise BrokenRow(f"{column} is empty")
    return value


def answers(messages: list[Message], column: str) -> list[Message]:
    """The same messages, if the assistant says something in them."""
    if not any(each["role"] == "assistant" for each in messages):
        raise BrokenRow(f"the assistant says nothing in {column}")
    return messages


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise BrokenRow(f"{where} is {_kind(value)}, and no role with its content")
    made = {key: each for key, each in value.items() if key not in {"from", "value"}}
    made = {key: each for key, each in made.items() if each is not None or key == "content"}
    role = made.get("role", value.get("from"))
    content = made.get("content", value.get("value"))
    switch = next((key for key in _SWITCHES if key in made), None)
    if switch is not None:
        raise BrokenRow(f"{where} has {switch!r}, which the trainers don't obey")
    return {**made, "role": _role(role, where), "content": _content(content, made, where)}


def _role(role: Any, where: str) -> str:
    if role is None:
        raise BrokenRow(f"{where} has no role")
    known = _ROLES.get(role, role) if isinstance(role, str) else role
    if known not in _KNOWN:
        raise BrokenRow(f"{where} has the role {str(role)[:40]!r}; known are {', '.join(_KNOWN)}")
    return str(known)


def _content(content: Any, message: Message, where: str) -> str:
    if content is None and message.get("tool_calls"):
        return ""
    if content is None:
        raise BrokenRow(f"{where} has no content")
    if isinstance(content, list):
        return _parts(content, where)
    if not isinstance(content, str):
        raise BrokenRow(f"the content of {where} is {_kind(content)}, and no text")
    return content


def _parts(parts: list[Any], where: str) -> str:
    """Parts of text, joined; anything else would need a model of images or sound."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type", "no text") if isinstance(part, dict) else _kind(part)
            raise BrokenRow(f"the content of {where} holds {kind!r}; only text is trained on")
    return "".join(part["text"] for part in parts)


def _other(column: str, value: Any, wanted: str) -> BrokenRow:
    if value is None:
        return BrokenRow(f"{column} is missing")
    return BrokenRow(f"{column} is {_kind(value)}, and no {wanted}")


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    return {"str": "text", "dict": "an object", "list": "a list"}.get(
        type(value).__name__, f"{type(value).__name__} {str(value)[:20]}"
    )
