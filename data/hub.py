"""What comes from the Hugging Face Hub, and what to say where it cannot: gated, missing, or out of reach.

`HubRows` reads a dataset row by row through the `datasets` library, as it comes over the network or from a local copy in
the same layout; nothing is stored besides.
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import DatasetError
from data.sources import Documents, Position, Reader, Source, Splits, TextFiles, TextPiece, find_text_files

if TYPE_CHECKING:
    from datasets import IterableDataset

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


# ------------------------------------------------------------------------------------------- datasets


class HubRows(Source):
    """The rows of a split of a dataset on the Hub, or of a local copy of it (`local`: a folder in the Hub's layout).

    config: the name of one of its configurations. folder: where that one lies in the repository, for local copies without
    the card that says so. text_key: the column with the text; empty ones are passed over. Raises DatasetError, with the
    reason and what else could be done.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        *,
        config: str | None = None,
        folder: str | None = None,
        text_key: str = "text",
        local: Path | None = None,
    ):
        self.name, self.split, self.config, self.folder = name, split, config, folder
        self.text_key, self.local = text_key, local
        which = ", ".join(filter(None, (config, split)))
        self.description = f"{name} ({which})" + (f", a copy in {local.name}" if local is not None else "")
        self.revision: str | None = None

    def identity(self) -> dict:
        asked = {"hub": self.name, "config": self.config, "split": self.split, "text_key": self.text_key}
        if self.local is not None:
            stats = [(file.relative_to(self.local).as_posix(), file.stat()) for file in self._local_files()]
            listed = json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
            asked["local"] = hashlib.sha256(listed.encode()).hexdigest()[:16]
        return asked

    def facts(self) -> dict:
        return {key: value for key, value in self.identity().items() if key != "local"}

    def changed(self) -> float:
        return max((file.stat().st_mtime for file in self._local_files()), default=0.0) if self.local is not None else 0.0

    def _local_files(self) -> list[Path]:
        return [file for file in sorted(self.local.rglob("*")) if file.is_file() and ".cache" not in file.parts]

    def read(self, position: Position = None) -> Reader:
        revision, state = position or (self.revision, None)
        rows = self.open(revision)
        if state is not None:
            rows.load_state_dict(state)
        return _RowsReader(self, rows, state)

    def samples(self, number: int) -> list[Reader]:
        """Readers of files spread over the dataset; of a local copy, places in its files."""
        if self.local is not None:
            return self.local_files().samples(number)
        rows = self.open(self.revision)
        shards = min(number, rows.num_shards)
        return [_RowsReader(self, rows.shard(rows.num_shards, i * rows.num_shards // shards), None) for i in range(shards)]

    def local_files(self) -> TextFiles:
        """The files of a local copy that seem to belong to this split: enough to estimate its size by."""
        files = find_text_files([self._local_root()])
        word = re.compile(rf"(^|[\W_]){self.split}([\W_]|$)")
        named = [file for file in files if word.search(file.relative_to(self.local).as_posix())]
        return TextFiles(named or files, self.text_key)

    def extent(self) -> tuple[int | None, int | None]:
        """(rows, bytes to download) as the dataset's card says; None where it does not."""
        info = self.open(self.revision).info
        split = (info.splits or {}).get(self.split)
        return getattr(split, "num_examples", None), info.download_size

    def _local_root(self) -> Path:
        """The folder of a local copy that is read: that of the configuration, where it has one of its own."""
        candidates = [self.local / name for name in (self.folder, self.config) if name]
        return next((path for path in candidates if path.is_dir()), self.local)

    def open(self, revision: str | None = None) -> IterableDataset:
        """The rows, connected to; only the text of each. The first time on the Hub its present revision is looked up."""
        datasets = _import_datasets(self.name)
        try:
            if self.local is not None:
                rows = self._open_local(datasets)
            else:
                self.revision = revision = revision or current_revision(self.name)
                rows = datasets.load_dataset(self.name, self.config, split=self.split, streaming=True, revision=revision)
            columns = rows.column_names or list(next(iter(rows), {}))
        except Exception as error:  # the hub, the formats and the network have dozens of kinds
            raise self._unreachable(error) from None
        if self.text_key not in columns:
            raise DatasetError(
                f"{self.description} has no column {self.text_key!r} (it has: {', '.join(columns) or 'none'}); name the column "
                "with --text_key."
            )
        return rows.select_columns([self.text_key])

    def _open_local(self, datasets: Any) -> IterableDataset:
        if not self.local.is_dir():
            raise FileNotFoundError(f"there is no folder {self.local}")
        try:
            return datasets.load_dataset(str(self.local), self.config, split=self.split, streaming=True)
        except ValueError:  # without its card a folder has no configurations
            if self.config is None:
                raise
            return datasets.load_dataset(str(self._local_root()), split=self.split, streaming=True)

    def _unreachable(self, error: Exception) -> DatasetError:
        if self.local is not None:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            return DatasetError(
                f"{self.local} cannot be read as a copy of {self.name} ({reason}). It has to be laid out as on the Hub: fetch it "
                f"with hf download {self.name} --repo-type dataset --local-dir DIR, and give --source=DIR."
            )
        return DatasetError(
            f"{self.name} cannot be read: {hub_reason(error, self.name, 'datasets/')}. Alternatives: a mirror (the environment "
            f"variable HF_ENDPOINT); a copy fetched elsewhere (hf download {self.name} --repo-type dataset --local-dir DIR) with "
            "--source=DIR; or another corpus in its place, such as --fallback=pydocs."
        )


def current_revision(name: str) -> str:
    """The commit that a dataset on the Hub is at now, so that an interrupted preparation goes on with the same one."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name).sha


class _RowsReader(Reader):
    def __init__(self, source: HubRows, rows: IterableDataset, state: Any):
        self.source, self.rows, self.state = source, rows, state

    def __iter__(self) -> Iterator[TextPiece]:
        row, key = 0, self.source.text_key
        try:
            for record in self.rows:
                row += 1
                text = record[key]
                if text is not None and not isinstance(text, str):
                    raise DatasetError(
                        f"{self.source.description}: the column {key!r} is {type(text).__name__}, not text; name another column "
                        "with --text_key."
                    )
                if text and text.strip():
                    yield TextPiece(text)
        except (DatasetError, KeyboardInterrupt, GeneratorExit):
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else "no reason was given"
            raise DatasetError(
                f"{self.source.description} cannot be read beyond row {row:,} ({type(error).__name__}: {reason}); the same "
                "command goes on from what has been written."
            ) from None

    def position(self) -> Position:
        return [self.source.revision, self.rows.state_dict()]


def _import_datasets(name: str) -> Any:
    """The library `datasets`, quiet, and able to unpack .zst through pyarrow (it would need one more package for that)."""
    try:
        import datasets
        import fsspec.compression
        import pyarrow
    except ImportError:
        raise DatasetError(f"Reading {name} needs the package 'datasets', which is not installed: pip install datasets") from None

    def unpacked(file: Any, mode: str = "rb", **_: Any) -> Any:
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")

    datasets.disable_progress_bars()
    fsspec.compression.register_compression("zstd", unpacked, "zst", force=True)
    return datasets


class Articles(Source):
    """Rows that are lines, joined to documents: one begins with each line that `heads` matches. A position counts documents."""

    def __init__(self, rows: HubRows, heads: str):
        self.rows, self.heads, self.description = rows, re.compile(heads), rows.description

    def identity(self) -> dict:
        return {**self.rows.identity(), "heads": self.heads.pattern}

    def facts(self) -> dict:
        return {**self.rows.facts(), "heads": self.heads.pattern}

    def changed(self) -> float:
        return self.rows.changed()

    def read(self, position: Position = None) -> Reader:
        return _ArticlesReader(self, position or 0)


class _ArticlesReader(Reader):
    def __init__(self, source: Articles, skipped: int):
        self.source, self.at = source, skipped

    def __iter__(self) -> Iterator[TextPiece]:
        skipped = self.at
        for number, text in enumerate(self.texts(), 1):
            if number > skipped:
                self.at = number
                yield TextPiece(text)

    def texts(self) -> Iterator[str]:
        """The documents: their lines as they are, an empty row is an empty line; nothing before the first head but space."""
        lines: list[str] = []
        rows, key = self.source.rows, self.source.rows.text_key
        for record in rows.open(rows.revision):
            line = record[key] or "\n"
            if self.source.heads.fullmatch(line.strip("\n")) and "".join(lines).strip():
                yield "".join(lines)
                lines = []
            lines.append(line if line.endswith("\n") else line + "\n")
        if "".join(lines).strip():
            yield "".join(lines)


ARTICLE = r" = (?!= ).+ = "  # WikiText's line with the title of an article: " = Title = "; sections have " = = Title = = "


def hub_splits(name: str, local: Path | None, config: str | None = None, heads: str | None = None) -> Splits:
    """The splits "train" and "validation" of a dataset on the Hub. heads: what begins a document, where rows are lines."""

    def part(split: str) -> Source:
        rows = HubRows(name, split, config=config, local=local)
        return rows if heads is None else Articles(rows, heads)

    return Splits({"train": part("train"), "val": part("validation")})


# ------------------------------------------------------------------------------------------- a file on the web


def web_text(url: str, sha256: str, local: Path | None = None) -> Source:
    """One text from the web, held in memory, or from a file of that name (or the only .txt) in the folder `local`."""
    name = url.rsplit("/", 1)[-1]
    if local is not None:
        found = [local / name] if (local / name).is_file() else sorted(local.glob("*.txt"))
        if len(found) != 1:
            raise DatasetError(f"{local} has neither {name} nor one other .txt file; fetch {url} into it.")
        return TextFiles(found)
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        reason = getattr(error, "reason", None) or error
        raise DatasetError(
            f"{url} cannot be fetched ({reason}). Alternatives: fetch it elsewhere into a folder and give --source=DIR; or "
            "another corpus in its place, such as --fallback=pydocs."
        ) from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise DatasetError(f"What {url} gave is not the text it should be (its sha256 differs); try again, or give --source=DIR.")
    text = content.decode("utf-8")
    return Documents(lambda: iter([(name, text)]), url, name=sha256)


def tiny_shakespeare(local: Path | None = None) -> Source:
    """A million characters of Shakespeare's plays, as char-rnn and nanoGPT read them."""
    return web_text(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        local=local,
    )
