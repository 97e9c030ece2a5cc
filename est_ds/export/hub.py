"""Puts an export into a repository of the Hub."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from est_ds.config.published import HUB_NAME
from est_ds.errors import Failure, UserError, error_line

# Of a former export: its weights may have lain in more files.
_REPLACED = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True)
class Hub:
    """A repository that may not be there yet, of a user whom the Hub knows.

    Attributes:
        api: a `huggingface_hub.HfApi`.
        endpoint: where the Hub is.
        name: as the user gave it.
        token: of the user; nobody is shown it.
    """

    api: Any
    endpoint: str
    name: str
    token: str = field(repr=False)

    def push(self, folder: Path, message: str, without: str) -> str:
        """Uploads a folder, in place of a former export.

        The repository is made if there is none; only its owner sees it then.

        Args:
            without: a file that stays here.

        Returns:
            The address of the repository.

        Raises:
            Failure: the Hub does not take it.
        """
        if not sys.stderr.isatty():
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()
        try:
            made = self.api.create_repo(self.name, private=True, exist_ok=True)
            self.api.upload_folder(
                repo_id=made.repo_id,
                folder_path=folder,
                commit_message=message,
                ignore_patterns=[without],
                delete_patterns=_REPLACED,
            )
        except Exception as e:  # whatever the library raises for what the Hub or the network says
            raise Failure(
                f"{folder} is exported, but {self.endpoint} does not take it as {self.name!r} "
                f"({error_line(e, self.token)}); put it there with `hf upload {self.name} {folder} "
                f"--private --exclude {without}`."
            ) from None
        return f"{self.endpoint}/{made.repo_id}"


def find_hub(name: str) -> Hub:
    """Finds the Hub and the user on it, before anything is computed.

    Args:
        name: OWNER/NAME, or NAME, which is the user's own. `HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME`
            mean what they mean to huggingface_hub.

    Raises:
        UserError: the name is none, nobody is logged in, or the Hub cannot be reached.
    """
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"--push={name!r} is no name of a repository; give OWNER/NAME.")
    from huggingface_hub import HfApi, constants, get_token

    endpoint, token = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT, get_token()
    if token is None:
        raise UserError(
            f"--push={name} needs a token of {endpoint} that may write; log in with `hf auth "
            f"login`, or set HF_TOKEN."
        )
    api = HfApi(endpoint=endpoint, token=token)
    try:
        api.whoami()
    except Exception as e:  # whatever the library raises without a network, or for such a token
        raise UserError(
            f"--push={name}: {endpoint} cannot be reached, or does not know the token "
            f"({error_line(e, token)}); log in with `hf auth login`, or export without --push and "
            f"call `hf upload {name} DIR` where there is a network."
        ) from None
    return Hub(api, endpoint, name, token)
