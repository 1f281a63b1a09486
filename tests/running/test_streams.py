import copy
import pickle
import random

import numpy as np
import pytest
import torch

from lightning_uq.running.streams import RandomStream, from_plain, random_state, set_random_state, to_plain


def draw():
    return torch.rand(2).tolist(), random.random(), np.random.rand()  # noqa: NPY002


def seeded(seed, times):
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002
    return [draw() for _ in range(times)]


def test_a_stream_is_that_of_a_process_of_its_own():
    expected = seeded(4, 3)
    outside = seeded(9, 2)
    seeded(9, 1)
    stream, found = RandomStream(4), []
    for _ in range(3):
        with stream.active():
            found.append(draw())
    assert found == expected
    assert draw() == outside[1]


def test_streams_do_not_disturb_one_another():
    expected = [seeded(seed, 3) for seed in (1, 2)]
    streams = [RandomStream(seed) for seed in (1, 2)]
    found = [[], []]
    for _ in range(3):
        for stream, draws in zip(streams, found, strict=True):
            with stream.active():
                draws.append(draw())
    assert found == expected


@pytest.mark.parametrize("started", [False, True])
def test_what_is_not_to_count_is_forgotten(started):
    stream = RandomStream(1)
    expected = seeded(1, 2)
    if started:
        with stream.active():
            draw()
    with stream.active(advance=False):
        draw()
    with stream.active():
        assert draw() == expected[int(started)]


def test_an_error_inside_leaves_the_outside_as_it_was():
    def fail():
        with RandomStream(1).active():
            draw()
            raise RuntimeError("stop")

    expected = seeded(3, 1)
    seeded(3, 0)
    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [draw()] == expected


def test_streams_are_copied_and_pickled_with_where_they_stand():
    stream = RandomStream(1)
    with stream.active():
        draw()
    draws = []
    for twin in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream)), stream):
        with twin.active():
            draws.append(draw())
    assert draws[0] == draws[1] == draws[2]


def test_a_state_survives_a_file_of_plain_data(tmp_path):
    seeded(7, 3)
    np.random.randn()  # leaves a second normal waiting  # noqa: NPY002
    random.gauss(0, 1)
    torch.save(to_plain(random_state()), tmp_path / "state.pt")
    expected = (draw(), np.random.randn(), random.gauss(0, 1))  # noqa: NPY002
    seeded(8, 1)
    set_random_state(from_plain(torch.load(tmp_path / "state.pt", weights_only=True)))
    assert (draw(), np.random.randn(), random.gauss(0, 1)) == expected  # noqa: NPY002


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_streams_device_is_its_own_too():
    device = torch.device("cuda", 0)
    torch.manual_seed(5)
    expected = torch.rand(4, device=device)
    torch.manual_seed(6)
    outside = torch.rand(4, device=device)
    torch.manual_seed(6)
    stream, found = RandomStream(5), []
    with stream.active():  # first on the CPU, as when a member is built
        torch.rand(1)
    for _ in range(2):
        with stream.active(device):
            found.append(torch.rand(2, device=device))
    assert torch.equal(torch.cat(found)[:2], expected[:2])
    assert torch.equal(torch.rand(4, device=device), outside)
