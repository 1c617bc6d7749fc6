"""An adapter's files in a hub repository, and the hub's refusals in words that help."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from lamina.errors import CheckpointError, MissingFileError
from lamina.storage.misplaced import CONFIG_NAME, no_config, no_weights

_COMMIT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]")


@dataclass(frozen=True)
class HubAccess:
    """How to ask the hub: the arguments of huggingface_hub's downloads, by their names there."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False


@dataclass
class HubRepository:
    """A repository, a folder in it, and a local path (`like`) that may have been meant instead.

    The revision is pinned to a commit by the first file, so that a push in between can't give a
    config of one version and weights of another.
    """

    repo_id: str
    subfolder: str | None = None
    access: HubAccess = HubAccess()
    like: Path | None = None
    _names: Collection[str] | None = field(default=None, init=False, repr=False)

    @property
    def label(self) -> str:
        """The id, with the subfolder if there is one."""
        return "/".join(part for part in (self.repo_id, self.subfolder) if part)

    def get(self, name: str) -> Path | None:
        """Download `name`, or find it in the cache; None if the repository hasn't got it.

        Raises:
            CheckpointError: the hub refuses, doesn't know the repository or can't be reached.
        """
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            file = huggingface_hub.hf_hub_download(
                self.repo_id,
                name,
                subfolder=self.subfolder,
                revision=self.access.revision,
                token=self.access.token,
                cache_dir=None if self.access.cache_dir is None else Path(self.access.cache_dir),
                local_files_only=self.access.local_files_only,
                force_download=self.access.force_download,
            )
        except LocalEntryNotFoundError as error:
            if self._offline:
                return None
            raise self._explained(error) from error
        except EntryNotFoundError:
            return None
        except (OSError, ValueError, _http_client_error()) as error:
            raise self._explained(error) from error
        commit = _COMMIT.search(file)
        if commit:
            self.access = replace(self.access, revision=commit[1])
        return Path(file)

    def has(self, name: str) -> bool:
        """Whether the repository, or offline its cached copy, has `name`; downloads nothing."""
        return self.get(name) is not None if self._offline else name in self.names()

    def names(self) -> Collection[str]:
        """The files below the subfolder; none if the hub doesn't tell."""
        if self._names is None:
            self._names = self._listed()
        return self._names

    def call(self, folder: str) -> str:
        """The call that opens the adapter in `folder` of this place."""
        inside = "/".join(part for part in (self.subfolder, folder) if part)
        return f"PeftModel.from_pretrained(model, '{self.repo_id}', subfolder='{inside}')"

    def without_config(self) -> CheckpointError:
        """The error for a repository in which there is no config to be found."""
        if self._offline:
            return self._not_cached(CONFIG_NAME)
        return no_config(self.label, self.names(), self.call)

    def without_weights(self) -> CheckpointError:
        """The error for a repository in which there are no weights to be found."""
        if self._offline:
            return self._not_cached("its weights")
        return no_weights(self.label, self.names())

    @property
    def _offline(self) -> bool:
        from huggingface_hub import constants

        return self.access.local_files_only or bool(constants.HF_HUB_OFFLINE)

    def _listed(self) -> Collection[str]:
        import huggingface_hub

        try:
            names = huggingface_hub.list_repo_files(
                self.repo_id, revision=self.access.revision, token=self.access.token
            )
        except Exception:  # only used to word an error that is on its way already
            return ()
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        return {name[len(prefix) :] for name in names if name.startswith(prefix)}

    def _not_cached(self, what: str) -> CheckpointError:
        reason = (
            "local_files_only=True" if self.access.local_files_only else "HF_HUB_OFFLINE is set"
        )
        return MissingFileError(
            f"'{self.label}' is no local directory, and {what} of the hub repository of that name "
            f"is not in the cache ({reason}).",
            faults=self._meant(),
            cure=f"hf download {self.repo_id} while online, or give the path of a local directory",
        )

    def _meant(self) -> list[str]:
        return [f"there is a local '{self.like}'"] if self.like else []

    def _explained(self, error: Exception) -> CheckpointError:
        from huggingface_hub import errors

        hub = f"https://huggingface.co/{self.repo_id}"
        if isinstance(error, errors.GatedRepoError):
            return CheckpointError(
                f"'{self.repo_id}' is gated, and this account has no access to it.",
                cure=f"ask for access at {hub}, then run hf auth login or pass token=",
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return MissingFileError(
                f"'{self.repo_id}' is neither a local directory nor a repository that the hub "
                "shows to this account.",
                faults=self._meant(),
                cure="check the spelling; for a private one run hf auth login or pass token=",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return MissingFileError(
                f"'{self.repo_id}' has no revision '{self.access.revision}'.",
                cure=f"pass revision= with a branch, tag or commit listed at {hub}/tree/main",
            )
        if isinstance(error, errors.HFValidationError):
            return MissingFileError(
                f"'{self.repo_id}' is no local directory, and can't be a hub repository either.",
                faults=self._meant(),
                cure="give a path, or an id of the form 'owner/name'",
            )
        unreachable = (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
        offline = isinstance(error, unreachable)
        return CheckpointError(
            f"'{self.label}' is no local directory, and "
            + ("the hub can't be reached." if offline else "getting it from the hub failed."),
            faults=[str(error).strip().splitlines()[0]] if str(error).strip() else [],
            cure="mend the connection and try again, or give the path of a local directory",
        )


def _http_client_error() -> type[Exception]:
    """The base error of the HTTP client, which is another one in each line of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    bases = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    return bases[0]
