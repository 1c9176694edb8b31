"""Views: the pictures themselves, then crops of at least half their area, some mirrored."""

from __future__ import annotations

import torch

from qhyvit.data.views import with_views


def ramps(count: int, side: int = 64) -> torch.Tensor:
    """Pictures that grow from 0 to 1 across their width, all rows alike."""
    return torch.linspace(0, 1, side).expand(count, 3, side, side).contiguous()


def test_the_first_view_is_the_batch_and_the_same_seed_gives_the_same_views() -> None:
    batches = list(torch.randn(10, 3, 20, 28, generator=torch.Generator().manual_seed(0)).split(4))
    found, again, other = (with_views(batches, 3, seed) for seed in (1, 1, 2))
    assert [[len(view) for view in views] for views in found] == [[4] * 3, [4] * 3, [2] * 3]
    for i, batch in enumerate(batches):
        assert torch.equal(found[i][0], batch)
        assert all(torch.equal(a, b) for a, b in zip(found[i], again[i], strict=True))
        assert not torch.allclose(found[i][1], other[i][1], atol=0.1)
        assert not torch.allclose(found[i][1], found[i][2], atol=0.1)
    assert with_views(batches, 1)[0][0] is batches[0]


def test_a_crop_keeps_half_the_area_at_least_and_lies_within_the_picture() -> None:
    ((_, crops),) = with_views([ramps(200)], 2)
    rises = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    share = rises.abs().square()  # of the area: both sides are cut alike
    assert 0.45 < float(share.min()) < 0.55
    assert 0.9 < float(share.max()) < 1.1
    assert 0.35 < float((rises < 0).float().mean()) < 0.65  # mirrored
    assert float(crops.min()) > -0.05
    assert float(crops.max()) < 1.05
    assert float((crops - crops[:, :1, :1]).abs().max()) < 1e-5  # channels and rows are cut alike
