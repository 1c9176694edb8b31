"""Room for channels that a few pictures hardly stir."""

from __future__ import annotations

import torch
from torch import Tensor

from qhyvit.calibration.samples import LayerSample
from qhyvit.search.errors import LayerError
from qhyvit.search.reach import PLENTY, RESERVE, with_room


def layer(columns: Tensor) -> LayerError:
    """A linear whose input channels have weights of these norms."""
    weight = torch.nn.functional.normalize(
        torch.randn(5, len(columns), generator=torch.Generator().manual_seed(0)), dim=0
    )
    weight, x = weight * columns, torch.zeros(2, 1, len(columns))
    y = torch.zeros(2, 1, 5)
    return LayerError(LayerSample(x, y, torch.ones_like(y)), weight, None, torch.arange(len(columns))[None])


def test_channels_that_the_weights_make_up_for_are_evened_out_wholly() -> None:
    reach = torch.tensor([1e-7, 0.01, 1.0, 100.0])
    assert torch.equal(with_room(reach, [(layer(1 / reach), torch.arange(4))], 10), reach)


def test_a_channel_that_hardly_stirs_gets_the_room_of_one_that_does() -> None:
    reach, same = torch.tensor([0.0, 1e-7, 0.5, 1.0]), torch.arange(4)
    plenty = with_room(reach, [(layer(torch.ones(4)), same)], PLENTY)
    assert torch.allclose(plenty, torch.tensor([RESERVE, RESERVE, 0.5, 1.0]))
    few = with_room(reach, [(layer(torch.ones(4)), same)], PLENTY // 16)
    assert torch.allclose(few, torch.tensor([0.75, 0.75, 0.75, 1.0]))


def test_room_is_counted_where_a_channel_is_heard_most_and_never_beyond_the_widest() -> None:
    reach = torch.tensor([1e-7, 1e-7, 1e-7, 1.0])
    readers = [
        (layer(torch.tensor([1.0, 1.0, 1e-9, 1.0])), torch.arange(4)),
        (layer(torch.tensor([4.0, 1.0])), torch.tensor([0, 3])),  # reads two of them
        (layer(torch.ones(2)), torch.tensor([3, -1])),  # and another value
    ]
    assert torch.allclose(with_room(reach, readers, PLENTY), torch.tensor([RESERVE / 4, RESERVE, 1.0, 1.0]))
