"""Settings of who shares the work of a build; they do not change what is in an index."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from coreinfer_sim.base.decode_settings import choice
from coreinfer_sim.base.errors import ConfigError
from coreinfer_sim.base.settings import check_ratio


class Executor(str, Enum):
    """What runs the shards of a build."""

    LOCAL = "local"
    """Processes of this machine."""
    RAY = "ray"
    """Tasks of a Ray cluster; see https://docs.ray.io."""


@dataclass(frozen=True)
class ScaleConfig:
    """Who shares the work of a build."""

    executor: Executor = Executor.LOCAL
    """What runs the shards."""
    devices: tuple[str, ...] | None = None
    """Of the local workers, one each, such as cuda:0,cuda:1; the first is this process's. None: CPUs, or one GPU."""
    ray_address: str | None = None
    """Of a Ray cluster that runs; None: the variable RAY_ADDRESS, or a cluster on this machine for the time of the build."""
    gpu_share: float = 1.0
    """Of a GPU, that each Ray task on GPUs asks for."""

    def __post_init__(self) -> None:
        """Check what goes together."""
        object.__setattr__(self, "executor", choice("executor", self.executor, Executor))
        check_ratio("gpu_share", self.gpu_share)
        if self.devices is not None and self.executor is not Executor.LOCAL:
            raise ConfigError("devices are of local workers, but Ray gives its tasks their GPUs; leave devices out.")
        if self.ray_address is not None and self.executor is not Executor.RAY:
            raise ConfigError(f"ray_address is {self.ray_address!r}, but the executor is local; name the executor ray.")
        kinds = {device.partition(":")[0] for device in self.devices or ()}
        if len(kinds) > 1:
            raise ConfigError(
                f"devices are of the kinds {', '.join(sorted(kinds))}, which round differently, expected one kind."
            )
