"""Settings of who shares the work of a build."""

from __future__ import annotations

import pytest

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.scale_settings import Executor, ScaleConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"executor": Executor.RAY, "devices": ("cuda:0",)}, "devices are of local workers, .*leave devices out"),
        ({"ray_address": "auto"}, "ray_address is 'auto', but the executor is local; name the executor ray"),
        ({"devices": ("cuda:0", "cpu")}, "devices are of the kinds cpu, cuda, which round differently, expected one"),
        ({"executor": Executor.RAY, "gpu_share": 1.5}, "gpu_share is 1.5, expected a number above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ScaleConfig(**settings)
