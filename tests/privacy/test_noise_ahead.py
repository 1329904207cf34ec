"""Noise that is made before it is asked for: the same numbers, and each in one sum only.

Every test compares with what a stream of the same secret gives in one thread, on demand.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedfuse.batch import Batch
from fedfuse.privacy import noise
from fedfuse.privacy.dpsgd import PrivateOptimizer, prepare, private_step
from fedfuse.privacy.noise import NoiseStream
from fedfuse.privacy.pieces import Pieces
from tests.privacy.books import fork

SECRET = b"a" * 32
SIGMA, CLIP, COUNT_SIGMA = 1.5, 0.5, 2.0
WIDE = 3 * noise._PIECE + 5
"""Numbers in four pieces, the last one of few."""


class Wide(nn.Module):
    """One weight for each of WIDE numbers; a record's gradient is the record at some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(WIDE, 1, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        x = batch.inputs["x"]
        return self.weight(nn.functional.pad(x, (0, WIDE - x.shape[1])))


NOBODY = Batch({"x": torch.zeros(0, 3)}, {"x": torch.zeros(0, dtype=torch.bool)}, torch.zeros(0))
SOMEBODY = Batch({"x": torch.zeros(1, 3)}, {"x": torch.ones(1, dtype=torch.bool)}, torch.zeros(1))
"""A record whose gradient is zero, so that a step's sum is its noise."""


def losses(outputs: Tensor, target: Tensor) -> Tensor:
    return outputs.squeeze(1)


def stream(**more: int) -> NoiseStream:
    return NoiseStream(SECRET, "noise", **more)


def optimizer_on(source: NoiseStream, model: nn.Module, count_noise: float = 0.0):  # type: ignore[no-untyped-def]
    return PrivateOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        noise_multiplier=SIGMA,
        clip_norm=CLIP,
        expected_batch=1.0,
        stream=source,
        count_noise=count_noise,
    )


class Node:
    """Steps whose sums are noise alone."""

    def __init__(self, source: NoiseStream, count_noise: float = 0.0) -> None:
        self.model = Wide()
        self.ready = prepare(self.model)
        self.optimizer = optimizer_on(source, self.model, count_noise)

    def step(
        self, loss: Callable[[Tensor, Tensor], Tensor] = losses, batch: Batch = SOMEBODY
    ) -> Tensor:
        """The noise of a whole step, in the dtype of the model."""
        private_step(self.ready, self.optimizer, batch, loss, physical_batch=4)
        return self.noise()

    def noise(self) -> Tensor:
        grad = self.model.weight.weight.grad
        assert grad is not None
        return grad.flatten().clone()


def expected(source: NoiseStream) -> Tensor:
    """The noise of the next step on a stream."""
    return source.normal(WIDE, SIGMA * CLIP).float()


@pytest.mark.parametrize("count_noise", [0.0, COUNT_SIGMA])
@pytest.mark.parametrize(("threads", "idle"), [(1, 1), (3, 2)])
def test_noise_made_ahead_is_that_of_one_thread(
    threads: int, idle: int, count_noise: float
) -> None:
    node, plain = Node(stream(threads=threads, idle=idle), count_noise), stream()
    for batch in (SOMEBODY, NOBODY, SOMEBODY):
        found = node.step(batch=batch)
        if count_noise:
            drawn = float(plain.normal(1, count_noise))
            assert node.optimizer.unclipped[-1] - drawn in (0.5, 0.0)
        assert torch.equal(found, expected(plain))
    assert torch.equal(node.optimizer.stream.normal(5, 1.0), plain.normal(5, 1.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [noise._WORTH, noise._PIECE, noise._PIECE + 1, WIDE])
def test_the_sum_is_cut_as_it_is_without(count: int, dtype: torch.dtype) -> None:
    sums = torch.linspace(-3, 3, count, dtype=torch.float64).to(dtype)
    ahead, plain = sums.clone(), sums.clone()
    made, late = stream(idle=1), stream()
    made.make_ahead(ahead, 0.7)
    assert made._ahead is not None
    made.add_normal(ahead, 0.7)
    late.add_normal(plain, 0.7)
    assert torch.equal(ahead, plain)


def test_numbers_of_a_step_that_broke_off_are_in_the_next_sum_and_no_other() -> None:
    def broken(outputs: Tensor, target: Tensor) -> Tensor:
        raise ZeroDivisionError

    def stopped(outputs: Tensor, target: Tensor) -> Tensor:
        raise KeyboardInterrupt

    node, plain = Node(stream(idle=1)), stream()
    for loss, error in ((broken, ZeroDivisionError), (stopped, KeyboardInterrupt)):
        with pytest.raises(error):
            node.step(loss)
        # They were in no sum, so the step that follows has them, as it has without any ahead.
        assert torch.equal(node.step(), expected(plain))


def test_numbers_of_a_step_that_was_interrupted_while_they_were_added_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, plain = Node(stream(idle=1)), stream()

    def interrupted(self: Pieces, helpers: int = 0) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            node.step()
    expected(plain)
    assert torch.equal(node.step(), expected(plain))


@pytest.mark.parametrize("idle", [0, 1])
def test_an_interrupted_sum_of_several_threads_uses_its_numbers_up(
    idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next numbers drawn are others, whoever makes them."""
    source, plain = stream(threads=2, idle=idle), stream()

    def interrupted(self: Pieces, helpers: int = 0) -> None:
        raise KeyboardInterrupt

    sums = torch.zeros(WIDE)
    source.make_ahead(sums, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(Pieces, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            source.add_normal(sums, 1.0)
    plain.normal(WIDE, 1.0)
    assert torch.equal(source.normal(3, 1.0), plain.normal(3, 1.0))
    assert torch.equal(source.normal(WIDE, 1.0), plain.normal(WIDE, 1.0))


def test_two_optimizers_on_one_stream_share_no_number() -> None:
    source, plain = stream(idle=1), stream()
    one, two = Node(source), Node(source)
    for first, second in ((one, two), (two, one)):
        one.optimizer.begin()
        two.optimizer.begin()
        for node in (first, second):
            node.optimizer.pre_step()
            assert torch.equal(node.noise(), expected(plain))


def test_a_step_that_is_skipped_or_begun_twice_changes_nothing() -> None:
    node, plain = Node(stream(idle=1)), stream()
    node.optimizer.begin()
    node.optimizer.begin()
    assert torch.equal(node.step(), expected(plain))
    node.optimizer.begin()
    assert torch.equal(node.optimizer.stream.normal(3, 1.0), plain.normal(3, 1.0))
    assert torch.equal(node.step(), expected(plain))


def test_a_deviation_that_changes_meanwhile_is_the_one_that_counts() -> None:
    node, plain = Node(stream(idle=1)), stream()
    node.optimizer.begin()
    node.optimizer.max_grad_norm = 4 * CLIP
    node.optimizer.pre_step()
    assert torch.equal(node.noise(), plain.normal(WIDE, SIGMA * 4 * CLIP).float())


def test_what_fails_in_a_thread_fails_in_the_step_and_the_next_one_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: object, values: object, std: float) -> None:
        raise MemoryError

    node, plain = Node(stream(idle=1)), stream()
    with monkeypatch.context() as patch:
        patch.setattr(noise._Source, "add_normals", broken)
        node.optimizer.begin()
        with pytest.raises(MemoryError):
            node.optimizer.pre_step()
    expected(plain)
    assert torch.equal(node.step(), expected(plain))


def test_after_a_step_no_noise_is_left_in_memory() -> None:
    source = stream(idle=1)
    sums = torch.full((WIDE,), 3.0)
    source.make_ahead(sums, 1.0)
    source.add_normal(sums, 1.0)
    assert source._ahead is None
    assert source._buffer is not None
    assert torch.equal(source._buffer.float(), sums)
    before = source._buffer.data_ptr()
    source.make_ahead(sums, 1.0)
    source.add_normal(sums, 1.0)
    assert source._buffer.data_ptr() == before


def test_nothing_is_made_ahead_of_few_numbers_or_where_no_core_is_idle() -> None:
    for source, count in ((stream(threads=4), WIDE), (stream(idle=1), noise._WORTH - 1)):
        source.make_ahead(torch.zeros(count), 1.0)
        assert source._ahead is None


def test_pieces_that_nobody_began_are_made_by_who_waits_and_none_twice() -> None:
    begun, go = threading.Event(), threading.Event()
    made: list[tuple[int, str]] = []

    def make(start: int) -> None:
        if start == 0:
            begun.set()
            assert go.wait(60)
        if start == 3:
            go.set()
        made.append((start, threading.current_thread().name))

    pieces = Pieces(make, range(4), 1)
    assert begun.wait(60)
    pieces.finish()
    own = threading.current_thread().name
    assert made[:3] == [(1, own), (2, own), (3, own)]
    assert [start for start, name in made[3:] if name != own] == [0]


def test_a_forked_child_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What its parent had begun is made anew, and the parent's own is as it was."""
    real, begun, go = noise._Source.add_normals, threading.Event(), threading.Event()

    def held(self: noise._Source, values: NDArray[Any], std: float) -> None:
        begun.set()
        assert go.wait(60)
        real(self, values, std)

    node, plain = Node(stream(idle=1)), stream()
    with monkeypatch.context() as patch:
        patch.setattr(noise._Source, "add_normals", held)
        node.optimizer.begin()
        assert begun.wait(60)
        read, write = os.pipe()
        child = fork()
        if child == 0:
            found = b"broken"
            try:
                torch.set_num_threads(1)  # OpenMP's own threads are not in a child
                noise._Source.add_normals = real  # type: ignore[method-assign]
                node.optimizer.pre_step()
                found = node.noise().numpy().tobytes() + node.step().numpy().tobytes()
            finally:
                with os.fdopen(write, "wb") as pipe:
                    pipe.write(found)
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            found = pipe.read()
        os.waitpid(child, 0)
        go.set()
    node.optimizer.pre_step()
    own = node.noise()
    assert found == own.numpy().tobytes() + node.step().numpy().tobytes()
    assert torch.equal(own, expected(plain))


ENDS = """
import torch
from fedfuse.privacy.noise import NoiseStream
stream = NoiseStream(bytes(32), "noise", idle=1)
stream.make_ahead(torch.zeros(3_000_000), 1.0)
print("made")
"""


def test_a_process_ends_although_noise_is_being_made() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "made\n", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_on_a_gpu_is_that_of_the_cpu(dtype: torch.dtype) -> None:
    """Also where the copy of one step may still be under way when the next is made."""
    made, plain = stream(), stream()
    for place in range(5):
        sums = torch.full((WIDE,), float(place), dtype=dtype)
        there = sums.cuda()
        made.make_ahead(there, 0.7)
        assert made._ahead is not None
        assert made._ahead.numbers.is_pinned()
        made.add_normal(there, 0.7)
        plain.add_normal(sums, 0.7)
        assert made._buffer is None
        assert torch.equal(there.cpu(), sums)
