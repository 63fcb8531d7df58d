"""Who writes which part, and putting tensors together again from any parts."""

from __future__ import annotations

import random

import pytest
import torch

from training import shards
from training.shards import StoredTensors, held, kind_of, share_out, write_shards
from training.tensor_files import write_tensors


def random_holdings(chance: random.Random) -> list[shards.Held]:
    """What some processes hold of some tensors: sharded, whole in each, sharded within groups, or in one process alone."""
    size, everyones = chance.randint(1, 6), []
    everyones = [{} for _ in range(size)]
    for number in range(chance.randint(1, 30)):
        name = f"{chance.choice(('model', 'optimizer', 'rng'))}.{number}"
        groups = chance.choice([g for g in (1, 2, 3, size) if size % g == 0])
        for rank, holding in enumerate(everyones):
            shard = rank % (size // groups)
            if chance.random() < 0.9 or name.startswith("rng"):
                holding[name] = ((shard * 10, 0), chance.randint(1, 100) if groups == size else 10)
    return everyones


def test_every_part_is_written_once_by_a_process_that_holds_it_and_kinds_are_not_mixed(monkeypatch):
    monkeypatch.setattr(shards, "FILE_BYTES", 60)
    for seed in range(200):
        everyones = random_holdings(random.Random(seed))
        plan = share_out(everyones)
        parts = [(name, everyones[rank][name][0]) for rank, files in enumerate(plan) for name in files]
        assert len(parts) == len(set(parts)), "written twice"
        assert set(parts) == {(name, at) for holding in everyones for name, (at, _) in holding.items()}, "not written"
        numbers = {}
        for files in plan:
            for name, number in files.items():
                numbers.setdefault(number, set()).add(name)
                assert numbers[number] >= {name}
        assert all(len(set(map(kind_of, names))) == 1 for names in numbers.values())
        assert {name: n for files in plan for name, n in files.items()} == {
            name: n for n, names in numbers.items() for name in names
        }, "a tensor's parts have the same number in every process"


def test_what_all_hold_alike_is_written_by_all_in_turns():
    alike = {f"model.{number}": ((0,), 100) for number in range(40)}
    plan = share_out([alike] * 4)
    assert [len(files) for files in plan] == [10, 10, 10, 10]


def test_the_state_of_one_process_is_written_as_files_of_one_kind_each(tmp_path):
    tensors = {"model.a": torch.ones(3), "optimizer.a": torch.ones(2), "rng.0": torch.ones(1), "model.b": torch.ones(0)}
    written = []
    write_shards(tmp_path, tensors, 0, share_out([held(tensors)]), lambda name: True, lambda *w: written.append(w), lambda: None)
    assert [names for _, names, _ in written] == [["model.a"], ["optimizer.a"], ["rng.0"], ["model.b"]]
    found = StoredTensors(path for path, _, _ in written)
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    found.load(into)
    assert all(torch.equal(into[name], tensors[name]) for name in tensors)


def boxes(shape: tuple[int, ...], cuts: list[list[int]]) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """The parts of a shape that is cut at these places of each dimension: (offsets, slices)."""
    found: list[tuple[tuple[int, ...], tuple[slice, ...]]] = [((), ())]
    for length, places in zip(shape, cuts):
        edges = [0, *sorted(set(places) - {0, length}), length]
        found = [((*at, begin), (*inside, slice(begin, end))) for at, inside in found for begin, end in zip(edges, edges[1:])]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_a_tensor_cut_into_any_boxes_is_put_together_again_in_any_other(tmp_path, seed, monkeypatch):
    """Tensor and sequence parallelism will cut other dimensions than rows."""
    chance = random.Random(seed)
    shape = tuple(chance.randint(1, 9) for _ in range(chance.randint(1, 3)))
    whole = torch.randn(shape)
    parts = boxes(shape, [[chance.randrange(n) for _ in range(2)] for n in shape])
    for number, (at, inside) in enumerate(parts):
        write_tensors(tmp_path / f"{number}.safetensors", {"a": whole[inside]}, offsets={"a": at})
    stored = StoredTensors(sorted(tmp_path.glob("*.safetensors")))
    assert stored.shape("a") == shape
    into = torch.zeros(shape, dtype=torch.float64)
    for at, inside in boxes(shape, [[chance.randrange(n) for _ in range(2)] for n in shape]):
        with monkeypatch.context() as patch:
            patch.setattr(shards, "own_part", lambda tensor, at=at, inside=inside: (at, tensor[inside]))
            stored.load({"a": into})
    assert torch.equal(into, whole.double())


def test_a_part_that_is_missing_or_there_twice_is_an_error(tmp_path):
    """torch.distributed.checkpoint leaves what a missing part would have filled as it was in memory."""
    for number in range(3):
        write_tensors(tmp_path / f"{number}", {"a": torch.ones(2, 3)}, offsets={"a": (2 * number, 0)})
    assert StoredTensors(tmp_path / f"{n}" for n in range(3)).shape("a") == (6, 3)
    for files in ((0, 2), (1, 2), (0, 1, 2, 1)):
        with pytest.raises(ValueError, match="parts of a"):
            StoredTensors(tmp_path / f"{n}" for n in files)
