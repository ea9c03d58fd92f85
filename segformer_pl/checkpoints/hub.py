"""The Hugging Face hub: fetch a repository into the cache, upload a folder to one.

``huggingface_hub`` is imported when it is needed. Its errors, and those of the HTTP library below
it, become one sentence.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segformer_pl.checkpoints.pretrained_folder import DOWNLOADS, TENSOR_FILES, tensor_files
from segformer_pl.errors import UserError, brief

_COMMIT = re.compile(r"[0-9a-f]{40}")


def pinned_folder(repo: str, revision: str | None) -> Path:
    """Return the folder of a repository in the cache; it is downloaded if it is not there.

    Args:
        repo: Name of the repository, ``owner/name``.
        revision: Commit. None, a branch or a tag is refused, as its weights could change.

    Raises:
        UserError: No commit is given, there is no such repository or commit, it holds no weights,
            or the hub cannot be reached.
    """
    name = f"{repo}@{revision}" if revision else repo
    is_pinned = revision is not None and _COMMIT.fullmatch(revision)
    if is_pinned and (folder := _fetch(repo, revision=revision, local_files_only=True)):
        return folder
    with _reading(repo, revision):
        if not is_pinned:
            raise UserError(
                f"hub name {name!r} pins no commit, so its weights could change; write "
                f"'{repo}@{_current_commit(repo, revision)}', the current commit"
            )
        _current_commit(repo, revision)
        folder = _fetch(repo, revision=revision)
    return _checked(folder, name)


def download(repo: str, revision: str | None, **options: Any) -> Path:
    """Download a repository into the cache; return its folder.

    Args:
        repo: Name of the repository, ``owner/name``.
        revision: Commit, branch or tag. None: the current commit.
        options: Further arguments of ``huggingface_hub.snapshot_download``.

    Raises:
        UserError: There is no such repository or revision, it holds no weights, or the hub cannot
            be reached.
    """
    name = f"{repo}@{revision}" if revision else repo
    with _reading(repo, revision):
        folder = _fetch(repo, revision=revision, **options)
    return _checked(folder, name)


def log_in(repo: str) -> str:
    """Check the name of a repository and the token, before anything is written.

    Args:
        repo: Name of the repository to upload to.

    Returns:
        Name of the user whose token it is.

    Raises:
        UserError: The name is not ``owner/name``, there is no token, the hub does not accept it or
            cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    check_name(repo)
    if get_token() is None:
        raise UserError(
            f"the hub needs a token to write to {repo!r}, and there is none; run `hf auth login`, "
            "or set HF_TOKEN to a token with write access "
            "(https://huggingface.co/settings/tokens)"
        )
    with _writing(repo, "you"):
        return HfApi().whoami()["name"]


def check_name(repo: str) -> None:
    """Raise a UserError unless this can be the name of a repository, ``owner/name``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    reason = "it has no owner" if "/" not in repo else None
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = brief(error)
    if reason is not None:
        raise UserError(
            f"{repo!r} cannot be the name of a hub repository ({reason}); give owner/name"
        )


def upload(folder: Path, repo: str, user: str, private: bool, message: str) -> str:
    """Upload a folder to a repository, which is created if there is none.

    Files of :data:`~segformer_pl.checkpoints.pretrained_folder` names that an earlier upload left
    there and this one lacks are deleted in the same commit, as they belong to other weights.

    Args:
        folder: Folder whose files are uploaded.
        repo: Name of the repository, ``owner/name``.
        user: Name of the user, for messages.
        private: Whether a new repository is private.
        message: Message of the commit.

    Returns:
        The commit.

    Raises:
        UserError: The user may not write there, the repository is public although ``private`` is
            asked for, the hub refuses the model card or cannot be reached.
    """
    from huggingface_hub import HfApi

    stale = ["config.json", "preprocessor_config.json", "model*.safetensors*", "pytorch_model*"]
    with _writing(repo, user):
        api = HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise UserError(
                f"{repo!r} exists and is public, and --private makes only new repositories "
                "private; change it in its settings, or give another name"
            )
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=stale
        )
        return commit.oid


def _current_commit(repo: str, revision: str | None) -> str | None:
    from huggingface_hub import HfApi

    # This request fails within 10 s without network; a download would retry for 30 s.
    return HfApi().model_info(repo, revision=revision, timeout=10).sha


def _fetch(repo: str, **options: Any) -> Path | None:
    """Download a repository; return its folder in the cache, None if it has no file of tensors."""
    from huggingface_hub import errors, snapshot_download

    for patterns in DOWNLOADS:
        try:
            folder = Path(
                snapshot_download(repo, allow_patterns=["*config.json", *patterns], **options)
            )
        except errors.LocalEntryNotFoundError:
            if options.get("local_files_only"):
                return None
            raise
        files = tensor_files(folder, repo)
        if files and all(file.is_file() for file in files):
            return folder
    return None


def _checked(folder: Path | None, name: str) -> Path:
    if folder is None:
        raise UserError(
            f"hub repository {name!r} holds neither {' nor '.join(TENSOR_FILES)}; give one that "
            "save_pretrained wrote"
        )
    return folder


@contextmanager
def _reading(repo: str, revision: str | None) -> Iterator[None]:
    """Turn the errors of reading from the hub into one sentence."""
    from huggingface_hub import errors

    name = f"{repo}@{revision}" if revision else repo
    commit = revision if revision and _COMMIT.fullmatch(revision) else "COMMIT"
    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(
            f"the hub has no {name!r}, or does not grant access to it ({type(error).__name__}); "
            "check the name, or give a local file or folder"
        ) from error
    except UserError:
        raise
    except Exception as error:  # raised by the HTTP library, the hub or the cache
        raise UserError(
            f"the hub cannot be reached for {name!r} ({type(error).__name__}); check the name and "
            "the network, give a local file or folder, or fill the cache on a machine with "
            f"network: hf download {repo} --revision {commit}"
        ) from error


@contextmanager
def _writing(repo: str, user: str) -> Iterator[None]:
    """Turn the errors of writing to the hub into one sentence."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        said = " ".join((error.server_message or "").split())
        if status == 401:
            raise UserError(
                "the hub does not accept the token; make another one with write access "
                "(https://huggingface.co/settings/tokens) and give it to `hf auth login` or as "
                "HF_TOKEN, which takes precedence"
            ) from error
        if status in (403, 404):
            raise UserError(
                f"the token of {user} may not write to {repo!r}{f' ({said})' if said else ''}; "
                "take one with write access to it, or give a repository of your own, such as "
                f"{user}/{repo.partition('/')[2]}"
            ) from error
        raise UserError(
            f"the hub refuses {repo!r} (status {status}{f': {said}' if said else ''}); try again "
            "later, or write the folder with --output and upload it with `hf upload`"
        ) from error
    except ValueError as error:  # of huggingface_hub, before anything is uploaded
        reason = " ".join(str(error).split())
        raise UserError(
            f"the hub refuses the model card of {repo!r} ({reason}); check --license"
        ) from error
    except Exception as error:  # raised by the HTTP library or the upload protocol
        raise UserError(
            f"the hub cannot be reached for {repo!r} ({type(error).__name__}); check the network "
            "and HF_ENDPOINT, or write the folder with --output and upload it later with `hf "
            "upload`"
        ) from error
