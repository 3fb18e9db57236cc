"""Speed and memory, against the fastest there is and against the limits of the machine."""

from .main import bench
from .suites import SUITES

__all__ = ["SUITES", "bench"]
