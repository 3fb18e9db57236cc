import multiprocessing
import multiprocessing.forkserver
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything loads triton, which reads it once
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # these models are tiny: a second thread costs more than it brings
os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start: one forked from one with threads may hang
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read once, by whichever test profiles first
_PRELOADED = [
    *("statickey.tasks", "statickey.bench", "tensorboard.compat", "sklearn.datasets"),
    *("segmentation_models_pytorch", "faster_coco_eval"),
]
"""What children of the one server would each import else, which takes longer than what they do."""
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def cifar10_folder():
    folder = Path(os.environ.get("STATICKEY_CIFAR10", SHARED_DATA / "cifar10"))
    if not folder.is_dir():
        pytest.skip("needs CIFAR-10 as parquet: set STATICKEY_CIFAR10 to its folder")
    return folder


@pytest.fixture
def dense_folder():
    """Path of one of the real data sets with marks, by name."""

    def folder(name):
        path = Path(os.environ.get("STATICKEY_DENSE", SHARED_DATA)) / name
        if not path.is_dir():
            pytest.skip(f"needs {name}: set STATICKEY_DENSE to the folder that holds it")
        return path

    return folder


def pytest_collection_finish(session):
    """The server of ``processes`` imports while the first tests run."""
    if not session.config.option.collectonly and any("processes" in item.fixturenames for item in session.items):
        _server()


@pytest.fixture(scope="session")
def processes():
    """The one server that has imported everything and forks each child in no time."""
    return _server()


def _server():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # as where peaks of memory are measured
        multiprocessing.forkserver.ensure_running()
    return context
