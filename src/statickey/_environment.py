"""Where a result was made: software versions and hardware."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(accelerator: str) -> dict[str, Any]:
    """Versions, device and threads, for the record of a run."""
    packages = ("statickey", "torch", "timm", "lightning", "torchmetrics")
    on_gpu = accelerator in ("cuda", "gpu")
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if on_gpu else cpu_name(),
        "accelerator": accelerator,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "CPU"
