"""Reading, encoding and writing of one preparation, a batch of texts at a time: what becomes of each document."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from command_line import duration, short
from data.dataset_writer import DatasetWriter
from data.encoding import DIGEST_BYTES, Encoded, Encoder, TextBatch
from data.plan import Plan
from data.sources import Position, Reader, TextPiece
from data.token_dataset import SPLITS
from data.tokenization import Tokenizer

BATCH_CHARACTERS = 1_000_000  # encoded at a time by one process
COMMIT_SECONDS = 10.0
DROPPED = "dropped"  # in place of a split: a document that has been seen before
DIGESTS = "digests.bin"  # of the documents kept so far, where duplicates are dropped
SHOW_SECONDS = {True: 0.5, False: 60.0}  # how often the progress is told: on a terminal, elsewhere


@dataclass
class _About:
    """What goes with a batch of texts: of each its split ("" where its key decides) and whether a document begins and ends
    with it; and how far the source had been read after the last of them."""

    parts: list[tuple[str, bool, bool]]
    position: Position
    share: float | None
    characters: int
    documents: dict[str, int]


class Pipeline:
    """Reads, encodes and writes the documents of a plan. `state` says what has been written; it is what is committed."""

    def __init__(self, plan: Plan, writer: DatasetWriter, coder: Tokenizer, num_proc: int | None, progress: bool):
        self.plan, self.writer, self.coder, self.num_proc, self.progress = plan, writer, coder, num_proc, progress
        self.state = dict(writer.state) if writer.state is not None else self.at_the_start(plan.moved)
        self.joined = plan.options.deduplicate or not coder.cuttable  # documents are encoded whole
        self.caps: dict[str, int] = {}
        if (limit := plan.options.max_tokens) is not None and plan.cut is not None:  # the beginning of each split is kept
            self.caps["val"] = min(limit - 1, max(1, round(limit * plan.options.val_fraction)))
            self.caps["train"] = limit - self.caps["val"]
        self.limits: dict[str, int] = {}  # of each split, where the source has its own
        if limit is not None and plan.source.splits_itself:
            self.limits = {split: plan.limit(limit, split) for split in SPLITS}
        self.digests = Digests(writer.staging / DIGESTS, self.state["kept"]) if plan.options.deduplicate else None

    @staticmethod
    def at_the_start(moved: dict[int, str]) -> dict:
        """The state before anything is written.

        position, characters, documents (by the split that the source names): how far the source has been read. full: the
        splits of a source with its own that have reached their limit. number: documents that were written or dropped;
        open: the split of the last one. kept, dropped: by the search for duplicates. nearest: of each split, the document
        that would be the first to go to the other one, as (distance, number); moved: those that did, number → split.
        """
        counts = dict.fromkeys(("characters", "number", "kept", "dropped"), 0)
        moved_to = {str(number): split for number, split in moved.items()}  # JSON has no other keys
        source = {"position": None, "documents": {}, "full": []}
        return {**counts, **source, "open": "", "stopped": False, "moved": moved_to, "nearest": {}}

    def run(self) -> None:
        """From where the state is to the end of the source, or until max_tokens is reached."""
        self.reader = reader = self.plan.source.read(self.state["position"])
        for split in self.state["full"]:
            reader.skip(split)
        progress, committed = ProgressLine(self), time.monotonic()
        try:
            with Encoder(self.coder, self.writer.staging, self.num_proc) as encoder:
                for batch, encoded in encoder.encoded(self.batches(reader)):
                    self.write(batch.about, encoded)
                    progress.tell(batch.about.share)
                    if self.state["stopped"]:
                        break
                    if time.monotonic() - committed > COMMIT_SECONDS:
                        self.commit()
                        committed = time.monotonic()
        finally:
            progress.close()

    def commit(self) -> None:
        """Let what has been written survive, if its source can be read on from here."""
        if self.writer.identity is not None:
            if self.digests is not None:
                self.state["kept"] = self.digests.commit()
            self.writer.commit(self.state)

    def batches(self, reader: Reader) -> Iterator[TextBatch]:
        """Texts of about BATCH_CHARACTERS together, with what is known of them."""
        plan, characters, documents = self.plan, self.state["characters"], dict(self.state["documents"])
        texts: list[str] = []
        parts: list[tuple[str, bool, bool]] = []
        held: list[str] = []
        size = 0
        if self.state["stopped"]:
            return
        for piece in plan.pieces(reader, documents):
            if self.joined:
                held.append(piece.text)
                if not piece.ends:
                    continue
                piece = TextPiece("".join(held), split=piece.split)
                held.clear()
            for split, part in plan.parts_of(piece, characters):
                if split not in self.caps or self.writer.tokens(split) < self.caps[split]:
                    texts.append(part.text)
                    parts.append((split, part.begins, part.ends))
                    size += len(part.text)
            characters += len(piece.text)
            if size >= BATCH_CHARACTERS:
                yield TextBatch(texts, _About(parts, reader.position(), reader.share(), characters, dict(documents)))
                texts, parts, size = [], [], 0
        yield TextBatch(texts, _About(parts, reader.position(), reader.share(), characters, dict(documents)))

    def write(self, about: _About, encoded: Encoded) -> None:
        """Append a batch to the splits that its documents belong to."""
        state, limit = self.state, self.plan.options.max_tokens
        for (split, begins, ends), ids, size, digest, key in zip(
            about.parts, encoded.ids, encoded.sizes, encoded.digests, encoded.keys
        ):
            if split in state["full"]:
                continue
            if begins:
                state["open"] = self.split_of(split, digest, key)
            if state["open"] == DROPPED:
                continue
            if self.caps:
                ids, size = self.capped(state["open"], ids, size)
            self.writer.add(state["open"], ids, size, begins=begins, ends=ends)
            if self.limits:
                if ends and self.writer.tokens(split) >= self.limits[split]:
                    state["full"] = [*state["full"], split]
                    self.reader.skip(split)
            elif ends and limit is not None and sum(map(self.writer.tokens, SPLITS)) >= limit:
                state["stopped"] = True
                break
        state.update(position=about.position, characters=about.characters, documents=about.documents)

    def split_of(self, given: str, digest: bytes, key: bytes) -> str:
        """Where the next document goes: to the split its source gives, or that its key decides; or nowhere."""
        state, plan = self.state, self.plan
        number, state["number"] = state["number"], state["number"] + 1
        if self.digests is not None and not self.digests.add(digest):
            state["dropped"] += 1
            return DROPPED
        if given:
            return given
        if moved := state["moved"].get(str(number)):
            return moved
        value = plan.key(number, key)
        split = plan.side(value)
        distance = [value if split == "train" else -value, number]
        state["nearest"][split] = min(distance, state["nearest"].get(split, distance))
        return split

    def capped(self, split: str, ids: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """As many of these ids as max_tokens leaves room for, and how many bytes they stand for."""
        room = self.caps[split] - self.writer.tokens(split)
        if len(ids) <= room:
            return ids, size
        ids = ids[:room]
        return ids, len(self.coder.decode_bytes(ids.tolist()))

    def document_for_the_empty_side(self) -> dict[int, str]:
        """The document that has to go to the split that got none, number → split; empty where each got some."""
        empty = [split for split in SPLITS if not self.writer.documents(split)]
        full = [split for split in SPLITS if self.writer.documents(split) > 1]
        if self.state["moved"] or len(empty) != 1 or len(full) != 1 or full[0] not in self.state["nearest"]:
            return {}
        return {self.state["nearest"][full[0]][1]: empty[0]}

    def begin_anew(self, moved: dict[int, str]) -> None:
        """Drop what has been written, to write it again with other splits."""
        self.writer.restart()
        self.state = self.at_the_start(moved)
        if self.digests is not None:
            self.digests = Digests(self.digests.path, 0)


class Digests:
    """The documents that have been seen, by their digests; `path` keeps the first `kept` of them over an interruption.

    They are held in memory: about 100 bytes a document.
    """

    def __init__(self, path: Path, kept: int):
        self.path, self.seen, self.new = path, set(), []
        with open(path, "ab") as file:
            file.truncate(kept * DIGEST_BYTES)
        content = path.read_bytes()
        self.seen.update(content[i : i + DIGEST_BYTES] for i in range(0, len(content), DIGEST_BYTES))

    def add(self, digest: bytes) -> bool:
        """Whether this one is new; from now on it is not."""
        if digest in self.seen:
            return False
        self.seen.add(digest)
        self.new.append(digest)
        return True

    def commit(self) -> int:
        """Bring all of them onto the disk; returns how many there are."""
        with open(self.path, "ab") as file:
            file.write(b"".join(self.new))
            file.flush()
            os.fsync(file.fileno())
        self.new.clear()
        return len(self.seen)


class ProgressLine:
    """A line on stderr about how far a preparation is, every now and then; none if nobody asked for it."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline, self.enabled = pipeline, pipeline.progress and sys.stderr is not None
        self.live = self.enabled and sys.stderr.isatty()
        self.started = self.told = time.monotonic()
        self.first_tokens, self.first_share = self.tokens(), None

    def tokens(self) -> int:
        return sum(map(self.pipeline.writer.tokens, SPLITS))

    def tell(self, share: float | None) -> None:
        """Tell it if it is time to. share: how much of the source has been read."""
        now, limit, tokens = time.monotonic(), self.pipeline.plan.options.max_tokens, self.tokens()
        if limit is not None:
            share = max(share or 0.0, min(1.0, tokens / limit))
        if self.first_share is None:
            self.first_share = share or 0.0
        if not self.enabled or now - self.told < SHOW_SECONDS[self.live]:
            return
        self.told = now
        documents = sum(map(self.pipeline.writer.documents, SPLITS))
        rate = (tokens - self.first_tokens) / (now - self.started)
        text = f"{short(tokens)} tokens, {short(documents)} documents, {short(rate)} tokens/s"
        if share is not None and share > self.first_share:
            left = (now - self.started) * (1 - share) / (share - self.first_share)
            text += f", {share:.1%} read, {duration(left)} left"
        print(f"\r\x1b[K{text}" if self.live else text, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the line away."""
        if self.live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
