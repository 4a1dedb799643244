"""What runs the benchmarks: its device, its name, and the versions of what is installed."""

from __future__ import annotations

import os
import platform
import re
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

import bnstats


def device() -> torch.device:
    """Return the device that models and batches are made on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def slug() -> str:
    """Return the name of the folder of results: "cpu", or the CUDA device's name."""
    if device().type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def machine() -> dict[str, str | int]:
    """Say what ran this."""
    name = torch.cuda.get_device_name() if device().type == "cuda" else _processor()
    return {"device": name, "cores": os.cpu_count() or 1, "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Return the versions of all that is measured."""
    peers = {name: version(name) for name in ("numpy", "torchvision", "fvcore", "timm")}
    python = platform.python_version()
    return {"bnstats": bnstats.__version__, "torch": torch.__version__, "python": python, **peers}


def today() -> str:
    """Return the date, as 2026-01-31."""
    return str(date.today())


def _processor() -> str:
    # platform.processor() says no more than the architecture on Linux
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()
