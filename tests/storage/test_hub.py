from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from lamina.errors import CheckpointError, MissingFileError
from lamina.storage.source import AdapterFiles, find_adapter, find_config
from tests.storage.directories import CONFIG, INDEX, PICKLE, SHARDS, WEIGHTS, fill, write_index


class Hub:
    """Stands for one repository: answers as huggingface_hub does, and notes what was asked."""

    def __init__(self, root: Path, *names: str) -> None:
        self.commit = "0123456789abcdef0123456789abcdef01234567"
        self.files = fill(root / "models--owner--name" / "snapshots" / self.commit, *names)
        self.error: Exception | None = None
        self.calls: list[dict[str, Any]] = []

    def download(self, repo_id: str, filename: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, "filename": filename, **options})
        if self.error is not None:
            raise self.error
        file = self.files / (options["subfolder"] or "") / filename
        if file.is_file():
            return str(file)
        if options["local_files_only"] or huggingface_hub.constants.HF_HUB_OFFLINE:
            raise hub_errors.LocalEntryNotFoundError("Cannot find the requested files")
        raise refusal(hub_errors.RemoteEntryNotFoundError, 404)

    def names(self, repo_id: str, **options: Any) -> list[str]:
        files = [path for path in self.files.rglob("*") if path.is_file()]
        return [path.relative_to(self.files).as_posix() for path in files]

    def asked(self) -> list[str]:
        return [call["filename"] for call in self.calls]


class Response:
    """As much of an HTTP response as the hub's errors look at."""

    def __init__(self, status: int) -> None:
        self.status_code = status
        self.headers: dict[str, str] = {}
        self.request = None


def refusal(kind: type[Exception], status: int) -> Exception:
    return kind(f"{status} Client Error.", response=Response(status))  # type: ignore[call-arg]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> Callable[..., Hub]:
    def made(*names: str) -> Hub:
        repository = Hub(tmp_path / "cache", *names)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", repository.download)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", repository.names)
        return repository

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return made


def test_a_hub_repository(hub: Callable[..., Hub], tmp_path: Path) -> None:
    repository = hub(CONFIG, WEIGHTS, PICKLE)
    found = find_adapter(
        "owner/name",
        revision="v1",
        token="t",
        cache_dir=str(tmp_path / "cache"),
        force_download=True,
    )
    assert found == AdapterFiles(
        config=repository.files / CONFIG,
        weights=(repository.files / WEIGHTS,),
        root="owner/name",
        pickle=False,
    )
    common = {
        "repo_id": "owner/name",
        "subfolder": None,
        "token": "t",
        "cache_dir": tmp_path / "cache",
        "local_files_only": False,
        "force_download": True,
    }
    # The weights are those of the commit that the config came from.
    assert repository.calls == [
        {**common, "filename": CONFIG, "revision": "v1"},
        {**common, "filename": WEIGHTS, "revision": repository.commit},
    ]


def test_a_bare_name_may_be_a_hub_id(hub: Callable[..., Hub]) -> None:
    repository = hub(CONFIG)
    assert find_config("name") == repository.files / CONFIG


def test_a_hub_subfolder(hub: Callable[..., Hub]) -> None:
    repository = hub(CONFIG, f"sft/{CONFIG}", f"sft/{WEIGHTS}")
    found = find_adapter("owner/name", subfolder="sft")
    assert found.weights == (repository.files / "sft" / WEIGHTS,)
    assert found.root == "owner/name/sft"


def test_hub_shards_are_all_fetched(hub: Callable[..., Hub]) -> None:
    repository = hub(CONFIG, *SHARDS)
    write_index(repository.files, SHARDS)
    assert find_adapter("owner/name").weights == tuple(repository.files / name for name in SHARDS)
    (repository.files / SHARDS[1]).unlink()
    with pytest.raises(MissingFileError, match="2 of the 3 shards"):
        find_adapter("owner/name")


def test_a_hub_index_cannot_ask_for_files_elsewhere(hub: Callable[..., Hub]) -> None:
    repository = hub(CONFIG)
    write_index(repository.files, ("../../x.safetensors",))
    with pytest.raises(CheckpointError, match="can't be followed"):
        find_adapter("owner/name")
    assert repository.asked() == [CONFIG, WEIGHTS, INDEX]


def test_a_hub_pickle_is_not_even_downloaded_unasked(hub: Callable[..., Hub]) -> None:
    repository = hub(CONFIG, PICKLE)
    with pytest.raises(CheckpointError, match="can run any code"):
        find_adapter("owner/name")
    assert PICKLE not in repository.asked()
    found = find_adapter("owner/name", allow_pickle=True)
    assert (found.weights, found.pickle) == ((repository.files / PICKLE,), True)


@pytest.mark.parametrize("offline", ["argument", "environment"])
def test_offline_the_cache_is_used(
    hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch, offline: str
) -> None:
    repository = hub(CONFIG, WEIGHTS)
    only = offline == "argument"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", not only)
    assert find_adapter("owner/name", local_files_only=only).pickle is False
    (repository.files / WEIGHTS).unlink()
    reason = "local_files_only=True" if only else "HF_HUB_OFFLINE"
    with pytest.raises(MissingFileError, match=f"its weights of the hub.*{reason}") as caught:
        find_adapter("owner/name", local_files_only=only)
    assert "hf download owner/name" in str(caught.value.cure)
    fill(repository.files, PICKLE)
    with pytest.raises(CheckpointError, match="can run any code"):
        find_adapter("owner/name", local_files_only=only)
    (repository.files / CONFIG).unlink()
    with pytest.raises(MissingFileError, match=f"{CONFIG} of the hub.*not in the cache"):
        find_config("owner/name", local_files_only=only)


def test_a_hub_repository_that_is_something_else(hub: Callable[..., Hub]) -> None:
    repository = hub(f"sft/{CONFIG}", f"sft/{WEIGHTS}", f"checkpoint-5/{CONFIG}", "config.json")
    with pytest.raises(MissingFileError, match="did you mean subfolder='sft'") as caught:
        find_adapter("owner/name")
    assert caught.value.cure == "PeftModel.from_pretrained(model, 'owner/name', subfolder='sft')"
    (repository.files / "sft" / CONFIG).unlink()
    with pytest.raises(MissingFileError, match="output of a training run") as caught:
        find_adapter("owner/name")
    assert "subfolder='checkpoint-5'" in str(caught.value.cure)
    (repository.files / "checkpoint-5" / CONFIG).unlink()
    (repository.files / "checkpoint-5").rmdir()
    with pytest.raises(MissingFileError, match="full model"):
        find_adapter("owner/name")
    with pytest.raises(MissingFileError, match="'owner/name/sft' has no adapter_config"):
        find_adapter("owner/name", subfolder="sft")


def test_a_listing_that_fails_does_not_hide_the_error(
    hub: Callable[..., Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub("README.md")

    def broken(*args: object, **kwargs: object) -> None:
        raise ConnectionError("gone")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", broken)
    with pytest.raises(MissingFileError, match="has no adapter_config"):
        find_adapter("owner/name")


@pytest.mark.parametrize(
    ("error", "says", "cure"),
    [
        (refusal(hub_errors.GatedRepoError, 403), "is gated", "hf auth login"),
        (refusal(hub_errors.RepositoryNotFoundError, 404), "neither a local", "spelling"),
        (refusal(hub_errors.RevisionNotFoundError, 404), "no revision 'v9'", "revision="),
        (refusal(hub_errors.HfHubHTTPError, 500), "getting it from the hub failed", "try again"),
        (hub_errors.HFValidationError("bad"), "can't be a hub repository", "owner/name"),
        (hub_errors.LocalEntryNotFoundError("no connection"), "can't be reached", "connection"),
        (ConnectionError("refused"), "can't be reached", "connection"),
        (OSError("disk"), "getting it from the hub failed", "try again"),
        (
            hub_errors.HfHubHTTPError.__bases__[0]("read timed out"),
            "getting it from the hub failed",
            "try again",
        ),
    ],
)
def test_each_refusal_of_the_hub_is_one_error_with_its_cure(
    hub: Callable[..., Hub], error: Exception, says: str, cure: str
) -> None:
    repository = hub(CONFIG, WEIGHTS)
    repository.error = error
    with pytest.raises(CheckpointError, match=says) as caught:
        find_adapter("owner/name", revision="v9")
    assert cure in str(caught.value.cure)
    assert caught.value.__cause__ is error
    assert len(repository.calls) == 1


def test_a_local_directory_that_may_have_been_meant_is_named(hub: Callable[..., Hub]) -> None:
    repository = hub()
    repository.error = refusal(hub_errors.RepositoryNotFoundError, 404)
    os.mkdir("chat")
    with pytest.raises(MissingFileError) as caught:
        find_adapter("chatt")
    assert caught.value.faults == ("there is a local 'chat'",)


@pytest.mark.parametrize("name", ["", "owner/na me", "owner/-name"])
def test_the_real_check_of_ids_speaks_before_any_request(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="can't be a hub repository"):
        find_adapter(name)
