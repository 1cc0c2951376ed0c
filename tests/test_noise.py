"""An address names its noise: alone, in any batch, in any order."""

import pytest
import torch

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
