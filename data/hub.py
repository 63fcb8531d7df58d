"""What is fetched from the Hugging Face Hub, and what to say where it cannot be: gated, missing, or out of reach."""

from __future__ import annotations

import re
from pathlib import Path

from data.files import DatasetError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name


def fetch_tokenizer(name: str) -> Path:
    """The folder in the Hub's cache with the tokenizer.json of the model owner/name. Raises DatasetError."""
    alternatives = (
        "Alternatives: an ungated tokenizer (--tokenizer=gpt2, or TinyLlama/TinyLlama_v1.1, whose 32,000 tokens are Llama 2's), "
        "a mirror (the environment variable HF_ENDPOINT), or a local folder with its tokenizer.json."
    )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError:
        raise DatasetError(
            f"Fetching the tokenizer {name} needs the package 'huggingface_hub', which is not installed: pip install "
            "huggingface_hub."
        ) from None
    try:
        found = Path(hf_hub_download(name, "tokenizer.json"))
    except Exception as error:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise DatasetError(
                f"{name} has no tokenizer.json. Make one where transformers is installed, with "
                f"AutoTokenizer.from_pretrained({name!r}).save_pretrained(FOLDER), and give --tokenizer=FOLDER."
            ) from None
        raise DatasetError(f"The tokenizer {name} cannot be fetched: {hub_reason(error, name)}. {alternatives}") from None
    try:
        hf_hub_download(name, "tokenizer_config.json")
    except Exception as error:
        if not isinstance(error, EntryNotFoundError) or isinstance(error, LocalEntryNotFoundError):
            raise DatasetError(f"The tokenizer {name} cannot be fetched: {hub_reason(error, name)}. {alternatives}") from None
    return found.parent


def hub_reason(error: BaseException, name: str, kind: str = "") -> str:
    """Why something of the repository `name` cannot be had, in words. kind: "" for a model, "datasets/" for a dataset."""
    names = {cls.__name__ for cls in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in names or status in (401, 403):
        return (
            f"it is gated; accept its licence at https://huggingface.co/{kind}{name}, then log in with `hf auth login` (or set "
            "HF_TOKEN)"
        )
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"} or status == 404:
        return f"there is no such repository on the Hub, or it is private (https://huggingface.co/{kind}{name})"
    if names & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError", "TimeoutException"}:
        return "the Hub cannot be reached from here, and it is not in the cache"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason was given'}"
