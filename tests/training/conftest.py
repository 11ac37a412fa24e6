"""A small random 4-bit base, made once."""

from __future__ import annotations

import pytest
import torch

from mora_serve.config import BaseConfig
from mora_serve.model.loading import load_base
from router_training.demo.base import build_model
from router_training.demo.nf4 import save_nf4


@pytest.fixture(scope="package", autouse=True)
def process_settings():
    """One thread: small products are slower on several, and their sums differ.

    What a build sets for the whole process is taken back: hypothesis needs denormal numbers.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory):
    """The demo's shape with random weights, saved in NF4."""
    directory = tmp_path_factory.mktemp("base")
    save_nf4(build_model(0), directory)
    return directory


@pytest.fixture(scope="session")
def base(base_directory):
    """The same base on the server's decoder, in fp32."""
    return load_base(BaseConfig(str(base_directory), dtype="fp32", device="cpu"))
