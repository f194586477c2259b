"""The Hugging Face hub: download a model or its configs, and push an export.

If the hub refuses, the error says why and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # from the HTTP library that this huggingface_hub uses
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from bitpolicy.kernels.errors import BitPolicyError

_CONFIGS = ["*.json", "**/*.json", "*.txt", "**/*.txt", "**/*.model"]  # as in diffusers' from_single_file
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def download(model: str, revision: str | None, variant: str | None) -> Path:
    """The snapshot of a hub model's pipeline, from the cache if it is there.

    Raises:
        BitPolicyError: the hub refuses, cannot be reached, or has no such model.
    """
    with _explained(model, revision):
        return Path(DiffusionPipeline.download(model, revision=revision, variant=variant))


def download_configs(model: str, revision: str | None = None) -> Path:
    """The same without weights: the files that are needed to read a single file."""
    with _explained(model, revision):
        return Path(snapshot_download(model, revision=revision, allow_patterns=_CONFIGS))


def require_login(repo: str) -> None:
    """Check, before hours of work, that a push can succeed.

    Raises:
        BitPolicyError: `repo` is not OWNER/NAME, or there is no token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise BitPolicyError(f"--push-to-hub {repo}: {error}; write OWNER/NAME") from error
    if get_token() is None:
        raise BitPolicyError(f"--push-to-hub {repo} needs a token with write access, and there is none; {_LOG_IN}")


def push(folder: Path, repo: str) -> str:
    """Upload an exported folder to a model repository, which is created if needed; returns its address.

    Raises:
        BitPolicyError: the hub refuses or cannot be reached. The folder is kept.
    """
    later = f"{folder} is complete; once that is fixed, push it with `hf upload {repo} {folder}`"
    try:
        api = HfApi()
        address = api.create_repo(repo, repo_type="model", exist_ok=True)
        stale = ["*.safetensors", "*.index.json"]  # weights of an earlier push that are not in this one
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            repo_type="model",
            commit_message="Packed by bitpolicy",
            delete_patterns=stale,
        )
        return str(address)
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError, HTTPError) as error:
        raise BitPolicyError(f"cannot push to {repo}: {_refused(error)}; {later}") from error


def _refused(error: Exception) -> str:
    """Why a push failed."""
    code = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, LocalTokenNotFoundError) or code == 401:
        return f"the token is missing or not valid: {_LOG_IN}"
    if code == 403:
        return f"the token has no write access: create one that has, and {_LOG_IN}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if _no_answer(error):
        return f"the hub cannot be reached ({_words(error)})"
    return _words(error)


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """Replace the error of a failed download by one that names the reason. diffusers wraps the hub's errors; the reason
    is at the end of the chain."""
    try:
        yield
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError, ValueError, HTTPError) as error:
        raise BitPolicyError(_why(model, revision, list(_chain(error)))) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _why(model: str, revision: str | None, errors: list[BaseException]) -> str:
    kinds = tuple(type(error) for error in errors)

    def is_a(*wanted: type[BaseException]) -> bool:
        return any(issubclass(kind, wanted) for kind in kinds)

    if is_a(GatedRepoError):
        return f"{model} is gated: accept its terms on https://huggingface.co/{model}, then {_LOG_IN}"
    if is_a(RevisionNotFoundError):
        return f"{model} has no revision {revision!r}; see 'Files and versions' on https://huggingface.co/{model}"
    if is_a(RepositoryNotFoundError):
        found = f"{model} is neither a folder here nor a public model on the hub"
        return f"{found}; check the name; if it is private, {_LOG_IN}"
    if is_a(OfflineModeIsEnabled):
        return f"{model} is not in the cache, and HF_HUB_OFFLINE is set; unset it, or give a local folder"
    answers = [error for error in errors if isinstance(error, HfHubHTTPError)]
    if answers:
        return f"cannot download {model}: {_words(answers[0])}; try again later, or give a local folder"
    if is_a(LocalEntryNotFoundError) or any(map(_no_answer, errors)):
        return (
            f"{model} is not in the cache, and the hub cannot be reached ({_words(errors[-1])}); "
            "give a local folder, or download it on a machine with a network: "
            f"`hf download {model} --local-dir FOLDER`"
        )
    return f"cannot download {model}: {_words(errors[0])}; give a local folder if there is no network"


def _no_answer(error: BaseException) -> bool:
    """Whether the hub was not reached. Its answers are errors of another class."""
    return isinstance(error, ConnectionError | HTTPError) and not isinstance(error, HfHubHTTPError)


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
