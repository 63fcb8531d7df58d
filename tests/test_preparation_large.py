"""A text of 2 GB: memory, speed, and whether what was said beforehand was true. LARGE_TEXT_BYTES makes it another size."""

import itertools
import os
import random
import re
import subprocess
import sys
import time

import pytest

from data.sources import TextFiles
from data.token_dataset import DATA_DIR, TokenDataset
from data.tokenization import load_tokenizer

BYTES = int(float(os.environ.get("LARGE_TEXT_BYTES", 2e9)))
MOST_MEMORY = 1.5e9


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of words of a skewed distribution, no two of its megabytes alike, with letters of several bytes."""
    drawn = random.Random(7)
    letters = "etaoinshrdlucmfwypvbgkjqxzéüñ"
    words = ["".join(drawn.choices(letters, range(len(letters), 0, -1), k=drawn.randint(2, 9))) for _ in range(30_000)]
    shares = [1 / (rank + 3) for rank in range(len(words))]
    path = tmp_path_factory.mktemp("large") / "large.txt"
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < BYTES:
            line = " ".join(drawn.choices(words, shares, k=20_000)).replace(" e", ".\n\nE")
            written += len(line.encode()) + 1
            file.write(line + "\n")
    yield path
    path.unlink()


PEAK = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"peak {used.ru_maxrss * 1024} processor {used.ru_utime + used.ru_stime}", file=sys.stderr)
"""


def command(*arguments, cwd):
    """(seconds, those of the processor, peak bytes of memory, stdout) of data/textfile/prepare.py on one core."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(DATA_DIR / "textfile" / "prepare.py"), *map(str, arguments), "--num_proc=1"],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    peak, processor = re.search(r"peak (\d+) processor ([\d.]+)", done.stderr).groups()
    return seconds, float(processor), int(peak), done.stdout


def plain_rate(text, folder) -> float:
    """Tokens a second of the processor of a loop that does nothing but read pieces and encode them."""
    coder, plain, started = load_tokenizer(folder), 0, time.process_time()
    for piece in itertools.islice(TextFiles([text]).read(), 30):
        plain += len(coder.encode_batch([piece.text])[0])
    return plain / (time.process_time() - started)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other units")
def test_a_large_text_takes_little_memory_and_as_long_as_its_tokenizer_and_as_was_said(text, tmp_path):
    """The tokenizer is a BPE that was trained before, on the beginning. The plain loop against which the speed is held reads
    the pieces that the preparation reads and encodes them by the same tokenizer; it sees a part of them, as all are alike."""
    with open(text, "rb") as file:
        (tmp_path / "beginning.txt").write_bytes(file.read(4_000_000).rpartition(b"\n")[0])
    command("beginning.txt", "--out=small", "--tokenizer=bpe", "--vocab_size=8000", cwd=tmp_path)
    given = (text, "--out=set", "--tokenizer=small")
    said = command(*given, "--dry_run", cwd=tmp_path)[3]
    assert not (tmp_path / "set").exists()
    before = plain_rate(text, tmp_path / "small")
    seconds, processor, peak, _ = command(*given, cwd=tmp_path)
    dataset = TokenDataset.open(tmp_path / "set")
    tokens = sum(len(dataset.split(split)) for split in ("train", "val"))
    disk = sum(dataset.split(split).size for split in ("train", "val"))
    rate = (before + plain_rate(text, tmp_path / "set")) / 2  # what others do to the processor changes meanwhile
    told = dict(re.findall(r"^(\w+) +(.*)$", said, re.M))
    print(
        f"{tokens:,} tokens, peak {peak / 1e6:.0f} MB, {seconds:.0f} s, {processor:.0f} s of the processor = "
        f"{tokens / processor:,.0f} tokens/s; plain loop {rate:,.0f} tokens/s; said before: {told}"
    )
    size, name = told["disk"].split()
    assert float(told["tokens"].replace(",", "")) == pytest.approx(tokens, rel=0.05)
    assert float(size) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[name] == pytest.approx(disk, rel=0.05)
    assert peak < MOST_MEMORY
    assert tokens / processor >= 0.9 * rate
    units = {"s": 1, "min": 60, "h": 3600}
    told_seconds = sum(float(n) * units[unit] for n, unit in re.findall(r"([\d.]+) (s|min|h)\b", told["time"]))
    assert told_seconds == pytest.approx(seconds, rel=0.3)  # where no other work takes the processor meanwhile
