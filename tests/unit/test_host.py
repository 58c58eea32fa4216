"""The host: it answers for CUDA while it is enabled, and leaves no trace when it is disabled."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megaspeech.parallel import host

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="host ranks are for machines without a GPU")


@pytest.fixture(autouse=True)
def disabled_afterwards() -> Iterator[None]:
    assert not host.enabled()
    yield
    host.disable()


def replaced_names() -> dict[tuple[str, str], Any]:
    """What every name that the host replaces is bound to now."""
    return {
        (module, name): getattr(importlib.import_module(module), name, "not bound")
        for module, name, *_ in (*host.REPLACEMENTS, *host.WITHOUT_TRANSFORMER_ENGINE)
    }


def test_disable_restores_every_name() -> None:
    before = replaced_names()
    host.enable()
    during = replaced_names()
    host.disable()
    after = replaced_names()
    assert after.keys() == before.keys()
    assert not [key for key in before if after[key] is not before[key]]
    changed = {key for key in before if during[key] is not before[key]}
    assert {(module, name) for module, name, *_ in host.REPLACEMENTS} <= changed


def test_every_replacement_says_what_for() -> None:
    assert all(".py" in line for *_, line in host.REPLACEMENTS)
    names = [(module, name) for module, name, *_ in host.REPLACEMENTS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)])
def test_device_strings_build_on_the_cpu_while_enabled(device: str | torch.device) -> None:
    makers = (
        lambda: torch.empty(2, device=device),
        lambda: torch.tensor([1.0], device=device),
        lambda: torch.arange(3, device=device),
        lambda: torch.ones(2).to(device),
        lambda: torch.ones(2).to(device=device),
        lambda: torch.ones(2).new_zeros(3, device=device),
        lambda: torch.ones(2).cuda(),
    )
    host.enable()
    assert [maker().device.type for maker in makers] == ["cpu"] * len(makers)
    host.disable()
    for maker in makers:
        with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
            maker()


def test_other_devices_stay_what_they_are() -> None:
    with host.host_ranks():
        assert torch.empty(2, device="meta").device.type == "meta"
        assert torch.ones(2).to(torch.float64).dtype is torch.float64
        values = torch.ones(2)
        assert values.to("cuda") is values and values.cuda() is values


def test_answers() -> None:
    with host.host_ranks():
        assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
        # clip_grads.py compares this name; a wrong one and gradients are silently not clipped.
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        stream = torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            stream.wait_stream(torch.cuda.default_stream())
            torch.cuda.Event(enable_timing=True).record(stream)
        with pytest.raises(AttributeError):
            stream.no_such_method()
        torch.cuda.manual_seed(5)
        first = torch.rand(3)
        torch.cuda.manual_seed(5)
        assert torch.equal(torch.rand(3), first)
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_enabling_twice_is_undone_at_once() -> None:
    before = replaced_names()
    host.enable()
    host.enable()
    assert host.enabled()
    host.disable()
    assert not host.enabled() and replaced_names() == before
    host.disable()  # and once more does nothing


def test_block_restores_after_an_error() -> None:
    before = replaced_names()
    with pytest.raises(KeyError), host.host_ranks():
        raise KeyError
    assert not host.enabled() and replaced_names() == before


def test_refuses_once_cuda_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    before = replaced_names()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA is already in use"):
        host.enable()
    assert not host.enabled() and replaced_names() == before


def test_torch_can_still_compile() -> None:
    """dynamo lists the torch.cuda functions it knows, and refuses one function under two of their names."""
    with host.host_ranks():
        torch._dynamo.trace_rules.clear_lru_cache()  # as torch/distributed/distributed_c10d.py:1785 does
        assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2


def test_failure_puts_back_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    before = replaced_names()
    broken = (*host.REPLACEMENTS, ("torch.cuda", "no_such_name", None, "nothing.py"))
    with monkeypatch.context() as patch, pytest.raises(AttributeError, match="no_such_name"):
        patch.setattr(host, "REPLACEMENTS", broken)
        host.enable()
    assert not host.enabled() and replaced_names() == before


def test_enable_needs_nothing_imported_before() -> None:
    code = "from megaspeech.parallel import host; host.enable(); host.disable()"
    subprocess.run([sys.executable, "-c", code], check=True)
