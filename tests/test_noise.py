"""An address names its noise: alone, in any batch, in any order."""

import numpy as np
import pytest
import torch
from scipy import stats

from fewstep import noise

MAKERS = {
    "normal": lambda **a: noise.normal((3, 2), **a),
    "uniform": lambda **a: noise.uniform((3, 2), **a),
    "integers": lambda **a: noise.integers(0, 2**40, **a),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_same_numbers_alone_in_a_batch_and_permuted(make):
    index = [0, 7, 3, 10**12]
    batch = make(seed=5, index=index, step=2)
    for row, i in enumerate(index):
        assert torch.equal(make(seed=5, index=[i], step=2)[0], batch[row])
    assert torch.equal(make(seed=5, index=index[::-1], step=2), batch.flip(0))
    assert torch.equal(make(seed=5, index=torch.tensor(index), step=2), batch)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_every_part_of_the_address_matters(make):
    here = make(seed=1, index=[2], step=3)
    others = [(2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (3, 2, 1), (1, 3, 2)]
    for seed, i, step in others:
        assert not torch.equal(make(seed=seed, index=[i], step=step), here)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    noise.normal((4,), seed=0, index=range(3), step=0)
    assert torch.equal(torch.rand(1), expected)


def test_distributions():
    z = noise.normal((64,), seed=0, index=range(500), step=0)
    assert z.dtype == torch.float32 and abs(float(z.mean())) < 0.03 and abs(float(z.std()) - 1) < 0.03
    neighbours = (z[1:] * z[:-1]).mean()
    assert abs(float(neighbours)) < 0.03
    u = noise.uniform((64,), seed=0, index=range(500), step=0)
    assert float(u.min()) >= 0 and float(u.max()) < 1 and abs(float(u.mean()) - 0.5) < 0.02
    k = noise.integers(2, 6, seed=0, index=range(2000), step=0)
    counts = torch.bincount(k, minlength=6)
    assert counts[:2].tolist() == [0, 0] and int(counts[2:].min()) > 400


def test_shapes():
    assert noise.normal((), seed=0, index=[1, 2], step=0).shape == (2,)
    assert noise.normal((16, 8, 8), seed=0, index=[], step=0).shape == (0, 16, 8, 8)
    assert noise.integers(0, 4, seed=0, index=[1, 2], step=0).dtype == torch.int64
    with pytest.raises(ValueError, match="low < high"):
        noise.integers(4, 4, seed=0, index=[1], step=0)


def test_hash_is_splitmix64_and_addresses_do_not_collide():
    assert noise._splitmix64(0) == 0xE220A8397B1DCDAF  # first output of the reference generator seeded with 0
    addresses = {noise.address(s, i, k) for s in range(-5, 5) for i in range(50) for k in range(10)}
    assert len(addresses) == 10 * 50 * 10
    assert len({a & 0xFFFFFFFF for a in addresses}) == 10 * 50 * 10


def test_many_addresses_at_once_are_those_one_by_one():
    index = [0, 1, 2**40, -1]
    for seed, step in ((0, 0), (5, 2), (-3, 2**63), (2**64 - 1, 7)):
        found = noise.addresses(seed, torch.tensor(index), step).numpy().view(np.uint64)
        assert found.tolist() == [noise.address(seed, i, step) for i in index]


def test_words_of_a_gpu_are_splitmix64_started_at_the_address():
    words = noise._words(5, [3, 4], 2, 3, noise.CPU).numpy().view(np.uint64)
    for row, i in zip(words, (3, 4), strict=True):
        start = noise.address(5, i, 2)
        assert row.tolist() == [noise._splitmix64((start + k * noise._GOLDEN) % 2**64) for k in range(3)]


def test_normals_of_a_gpu_are_the_same_in_any_batch_and_normal():
    batch = noise.many_normals((3, 67), 1, range(2000), 2, noise.CPU)  # an odd number: half of a pair is left out
    assert batch.shape == (2000, 3, 67) and batch.dtype == torch.float32
    assert torch.equal(noise.many_normals((3, 67), 1, [77], 2, noise.CPU)[0], batch[77])
    assert stats.kstest(batch.flatten()[::5].double().numpy(), "norm").pvalue > 1e-3
    flat = batch.flatten(1)
    apart = torch.corrcoef(flat.T) - torch.eye(201)  # within a sample, cosines against their sines included
    assert float(apart.abs().max()) < 6 / 2000**0.5 and float(torch.corrcoef(flat[:200]).triu(1).abs().max()) < 6 / 201**0.5
    assert float(batch.abs().max()) < 5.9


def test_what_is_asked_for_elsewhere_is_there_in_shape():
    meta, at = torch.device("meta"), {"seed": 1, "index": range(4), "step": 2}
    made = [noise.normal((2, 3), **at, device=meta), noise.uniform((), **at, device=meta)]
    made.append(noise.integers(3, 9, **at, device=meta))
    assert [tuple(m.shape) for m in made] == [(4, 2, 3), (4,), (4,)] and {m.device for m in made} == {meta}
    assert made[2].dtype == torch.int64


def test_fractions_and_integers_of_a_gpu_are_even():
    words = noise._words(1, range(5000), 0, 1, noise.CPU)[:, 0]
    u = noise._fraction(words, 40)
    assert 0 <= float(u.min()) and float(u.max()) < 1 and stats.kstest(u.numpy(), "uniform").pvalue > 1e-3
    counts = torch.bincount(noise._shifted(words, 1) % 7, minlength=7)
    assert len(counts) == 7 and stats.chisquare(counts.numpy()).pvalue > 1e-3
