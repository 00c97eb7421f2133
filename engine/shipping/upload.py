"""An exported folder -> a repository of the Hub, by the Hub's own client; or, dry, a list of what would go there.

The client finds the token where `hf auth login` has put it. Here none is read, kept or told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from engine.errors import ENVIRONMENT, REFUSED, RunError
from engine.reporting.picture import weight

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_TOKEN = re.compile(r"hf_\w+")


def refuse_name(repository: str) -> None:
    """Raise `RunError` for what can't name a repository, before anything is made for it."""
    if not _NAME.fullmatch(repository):
        raise RunError(f"`{repository[:100]}` names no repository of the Hub; write `owner/name`", REFUSED)


def listed(folder: Path) -> Iterator[str]:
    """Every file that lies in a folder, with its size."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        yield f"{weight(path.stat().st_size):>9}  {path.relative_to(folder).as_posix()}"
    yield f"{weight(sum(path.stat().st_size for path in files)):>9}  in {len(files)} files"


def push(folder: Path, repository: str) -> str:
    """Send a folder to a repository, which is made, private, where there is none; returns its address.

    Raises `RunError` where the Hub can't be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    refuse_name(repository)
    kept = f"what was exported is in {folder}"
    try:
        client = HfApi()
        address = client.create_repo(repository, private=True, exist_ok=True)
        client.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export from Frostline")
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        said = f"refuses {repository} ({code})" if code else "knows no token of yours"
        advice = "`hf auth login` with a token that may write there"
        raise RunError(f"the Hub {said}: {advice}; {kept}", ENVIRONMENT) from error
    except HFValidationError as error:
        raise RunError(f"{_plain(error)}; {kept}", REFUSED) from error
    except Exception as error:  # every library below the client has its own class for a network that is not there
        network = f"the Hub can't be reached ({type(error).__name__}: {_plain(error)})"
        raise RunError(f"{network}: check the network and HF_HUB_OFFLINE; {kept}", ENVIRONMENT) from error
    return str(address)


def _plain(error: Exception) -> str:
    """An error on one line, without anything that looks like a token."""
    return _TOKEN.sub("hf_...", " ".join(str(error).split()))[:160]
