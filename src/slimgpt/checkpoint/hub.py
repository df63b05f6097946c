"""Upload of finished folders to the Hugging Face hub; what can be refused is refused before the long work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from slimgpt.errors import OutputError, UsageError, one_line

HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Of httpx or httpx2, as the version of huggingface_hub has it."""

UNTOUCHED = {".gitattributes"}
"""Files of a repository that is as good as empty."""

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, to a token that may write"


@dataclass(frozen=True)
class HubRepository:
    """A model repository that may be written to.

    Args:
        name: with its owner, such as ``me/slim``.
        replace: whether files that are there already give way.
    """

    name: str
    replace: bool

    @property
    def url(self) -> str:
        """Its page."""
        return f"{HfApi().endpoint}/{self.name}"

    def upload(self, path: Path) -> str:
        """Upload a finished folder in one commit, or a single file; returns the page's address.

        Raises:
            OutputError: the upload failed; what was saved stays where it is.
        """
        api = HfApi()
        try:
            if path.is_dir():
                old = "*" if self.replace else None  # a shard that nobody names any more would be loaded by some
                api.upload_folder(
                    folder_path=path, repo_id=self.name, commit_message="Upload of slimgpt", delete_patterns=old
                )
            else:
                api.upload_file(
                    path_or_fileobj=path,
                    path_in_repo=path.name,
                    repo_id=self.name,
                    commit_message="Upload of slimgpt",
                )
        except (HTTP_ERROR, OSError) as error:
            raise OutputError(
                f"{path} is whole, and its upload to {self.name} failed: {one_line(error)}; "
                f"go on with: hf upload {self.name} {path}"
            ) from error
        return self.url


def check_repository(
    push_to_hub: str | None,
    *,
    private: bool = False,
    overwrite: bool = False,
    file: str | None = None,
    create: bool = True,
) -> HubRepository | None:
    """Check name and token, and make the repository if there is none.

    Args:
        push_to_hub: its name, with or without its owner; ``None``: nothing is uploaded.
        private: whether a new repository is seen by its owner only.
        overwrite: whether what is in it may be replaced.
        file: the single file that will be uploaded; ``None`` for a folder.
        create: whether a repository is made; else only name and token are checked, and nothing is written.

    Raises:
        UsageError: a name that the hub refuses, no token or one that may not write, a repository of somebody else or
            one that holds a model, or no network.
    """
    if push_to_hub is None:
        if private:
            raise UsageError("--private is for a new repository of the hub; name it with --push-to-hub me/slim")
        return None
    try:
        validate_repo_id(push_to_hub)
    except HFValidationError as error:
        raise UsageError(
            f"--push-to-hub '{push_to_hub}' is no name of a repository such as me/slim: {one_line(error)}"
        ) from error
    api = HfApi()
    with _reaching(push_to_hub):
        account = api.whoami()
    _check_account(push_to_hub, account)
    if not create:
        return None
    with _reaching(push_to_hub):
        name = api.create_repo(push_to_hub, private=private or None, exist_ok=True).repo_id
        present = set(api.list_repo_files(name)) - UNTOUCHED
    clash = present if file is None else present & {file}
    if clash and not overwrite:
        raise UsageError(
            f"the repository {name} holds {min(clash)} already; name another one, or pass --overwrite to replace what "
            "is in it"
        )
    return HubRepository(name, overwrite)


def _check_account(repository: str, account: dict[str, Any]) -> None:
    """Refuse an owner that the token does not stand for, and a token that may only read."""
    owners = [account["name"], *(organisation["name"] for organisation in account.get("orgs", ()))]
    owner = repository.partition("/")[0] if "/" in repository else account["name"]
    if owner not in owners:
        raise UsageError(
            f"--push-to-hub {repository} belongs to {owner}, and the token to {', '.join(owners)}; name one of your "
            "repositories"
        )
    token = (account.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UsageError(f"the token of {account['name']} may only read, and --push-to-hub writes; {LOG_IN}")


@contextmanager
def _reaching(repository: str) -> Iterator[None]:
    """Turn what goes wrong on the way to the hub into one line."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise UsageError(f"--push-to-hub {repository} needs a token, and there is none; {LOG_IN}") from error
    except OfflineModeIsEnabled as error:
        raise UsageError(
            f"--push-to-hub {repository} needs the hub, and HF_HUB_OFFLINE forbids it; unset it, or leave out "
            "--push-to-hub"
        ) from error
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise UsageError(f"the hub does not take the token for --push-to-hub {repository}; {LOG_IN}") from error
        raise UsageError(f"the hub refuses --push-to-hub {repository}: {one_line(error)}; {LOG_IN}") from error
    except (HTTP_ERROR, OSError) as error:
        raise UsageError(
            f"the hub cannot be reached for --push-to-hub {repository}: {one_line(error)}; connect, or leave out "
            "--push-to-hub"
        ) from error


__all__ = ["HubRepository", "check_repository"]
