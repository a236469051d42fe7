"""The shapes of TPU slices."""

import pytest

from loraplus_jax.plan.tpu import CHIPS, topology_shapes, tpu_devices

from ..messages import mentions


@pytest.mark.parametrize(
    ("topology", "near"),
    [
        ("v5e:3x3", "v5e:2x4, "),
        ("v6e:2x3", "v6e:2x4, "),
        ("v5e:6x6", "v5e:4x8, "),
        ("v5e:4x2", "v5e:2x4, "),
        ("v5e:2x128", "v5e:16x16, "),
        ("v5p:2x2x3", "v5p:2x2x4, "),
        ("v5p:8x4x4", "v5p:4x4x8, "),
        ("v4:1x1x1", "v4:2x2x1, "),
    ],
)
def test_an_unavailable_shape_names_the_nearest(topology, near):
    with pytest.raises(ValueError, match=mentions(topology)) as caught:
        tpu_devices(topology)
    assert near in str(caught.value).partition(topology)[2]


def test_the_shapes_of_large_slices():
    assert (16, 16, 16) in topology_shapes(CHIPS["v4"])
    assert (8, 16, 16) in topology_shapes(CHIPS["v5p"])
    assert len(topology_shapes(CHIPS["v6e"])) == 8
