from __future__ import annotations

import pytest
import torch

from quire.kv.fetch import clusters
from quire.kv.fetch.choosing import largest, listed
from quire.kv.fetch.clusters import cluster, means_of, nearest


@pytest.mark.parametrize(("n", "count"), [(200, 9), (37, 36), (5, 1), (300, 80), (3, 7)])
def test_every_point_has_its_nearest_centre(
    n: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(n)
    points = torch.randn(2, n, 6)
    centres, labels = cluster(points, count, 5)
    assert centres.shape == (2, count, 6)
    apart = torch.cdist(points.double(), centres.double())
    mine = apart.gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(mine, apart.amin(-1), rtol=1e-4, atol=1e-4)
    again = cluster(points, count, 5)
    assert torch.equal(again[0], centres)
    assert torch.equal(again[1], labels)
    monkeypatch.setattr(clusters, "CELLS", 50)
    assert torch.equal(nearest(points, centres), labels)


@pytest.mark.parametrize("count", [8, 40])
def test_clusters_that_are_there_are_found(count: int) -> None:
    """Also where several centres are drawn at a time."""
    torch.manual_seed(0)
    middles = torch.randn(3, count, 16) * 10
    of = torch.arange(count).repeat(12)
    points = middles[:, of] + 0.1 * torch.randn(3, len(of), 16)
    centres, labels = cluster(points, count, 10)
    spread = (points - centres.gather(1, labels[..., None].expand_as(points))).square().sum(-1)
    drawn = points[:, torch.randperm(len(of))[:count]]
    random = torch.cdist(points, drawn).amin(-1).square()
    assert spread.mean() < 0.2 * random.mean()
    if count == 8:
        assert spread.mean() < 16 * 0.02


def test_means() -> None:
    points = torch.tensor([[[1.0], [2.0], [6.0], [9.0]]])
    labels = torch.tensor([[0, 0, 2, 0]])
    means, sizes = means_of(points, labels, 4, torch.tensor([[1, 3, 1, 0]]))
    assert means.flatten().tolist() == [1.75, 0.0, 6.0, 0.0]
    assert sizes.tolist() == [[4, 0, 1, 0]]


def test_equal_points() -> None:
    centres, labels = cluster(torch.ones(2, 20, 4), 6, 4)
    assert torch.equal(centres, torch.ones(2, 6, 4))
    assert labels.max() < 6


def test_lists() -> None:
    read = torch.tensor([[[0, 1, 1, 0, 1], [0, 0, 0, 1, 0]]]).bool()
    found = listed(read)
    places, mask = found.chunks, found.mask
    assert mask is not None
    assert places[mask].tolist() == [1, 2, 4, 3]
    assert mask.sum(-1).tolist() == [[3, 1]]
    found = listed(read[:, :1])
    places, mask = found.chunks, found.mask
    assert places.tolist() == [[[1, 2, 4]]]
    assert mask is None
    found = listed(torch.zeros(2, 3, 4, dtype=torch.bool))
    places, mask = found.chunks, found.mask
    assert places.shape == (2, 3, 1)
    assert mask is not None
    assert not mask.any()


def test_largest() -> None:
    scores = torch.tensor([[3.0, -torch.inf, 5.0, 4.0]])
    assert largest(scores, 2).tolist() == [[False, False, True, True]]
    assert largest(scores, 9).all()
