"""Settings of a benchmark check themselves; what it measures is tested through its command, in tests/cli."""

from __future__ import annotations

import pytest

from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.bench.bench import BenchSettings


def test_a_setup_checks_itself():
    with pytest.raises(ConfigError, match="n_new is 1"):
        BenchSettings(n_new=1)
