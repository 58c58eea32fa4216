"""CPU ranks: what megatron-core asks of CUDA, answered by the host. The only place that knows a machine without GPU.

megatron-core 0.16.1 takes a GPU for granted: it builds tensors on `torch.cuda.current_device()`, copies RNG states to
and from the device, waits for streams. `enable()` gives each of those names its host meaning and `disable()` restores
every one; all other code is what runs on GPUs. `REPLACEMENTS` names the megatron-core line each answer is for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class _HostStream:
    """A stream, or an event, of a machine that computes in order: every wait is over before it starts."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _HostStream:
        return self

    def __exit__(self, *_: object) -> bool:
        return False

    def __getattr__(self, name: str) -> Callable[..., _HostStream]:
        if name in ("wait_stream", "wait_event", "record", "record_event", "wait", "synchronize"):
            return lambda *_, **__: self  # record_event gives an event, on which experts' dispatcher waits
        raise AttributeError(name)


class _HostMode(TorchFunctionMode):
    """Factories asked for device="cuda" build on the CPU; `Tensor.cuda()` is the identity."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _host_device(kwargs["device"])}
        if kwargs.get("pin_memory"):  # models/common/embeddings/rope_utils.py:62, under context parallelism
            kwargs = {**kwargs, "pin_memory": False}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(_host_device(arg) for arg in args)
        if func is torch.Tensor.type and len(args) == 1:
            # optimizer/optimizer.py:671 and clip_grads.py:167 compare the name with 'torch.cuda.FloatTensor'
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def _host_device(device: Any) -> Any:
    return CPU if isinstance(device, (str, torch.device)) and str(device).startswith("cuda") else device


# Every name gets a function of its own: torch's dynamo lists the torch.cuda functions by identity and refuses one that
# it finds under two names ("Duplicate torch object").
def _nothing() -> Callable[..., None]:
    return lambda *_, **__: None


def _stream() -> Callable[..., _HostStream]:
    return lambda *_, **__: _HostStream()


REPLACEMENTS: tuple[tuple[str, str, Any, str], ...] = (
    ("torch.cuda", "current_device", lambda: CPU, "tensor_parallel/mappings.py:91 builds its buffers on it"),
    ("torch.cuda", "device_count", lambda: 1, "dist_checkpointing/strategies/async_utils.py:488 divides by it"),
    ("torch.cuda", "set_device", _nothing(), "dist_checkpointing/strategies/async_utils.py:488"),
    ("torch.cuda", "synchronize", _nothing(), "pipeline_parallel/p2p_communication.py:398"),
    ("torch.cuda", "empty_cache", _nothing(), "distributed/distributed_data_parallel.py:594"),
    ("torch.cuda", "get_rng_state", lambda *_: torch.get_rng_state(), "tensor_parallel/random.py:235"),
    ("torch.cuda", "manual_seed", lambda seed: torch.random.default_generator.manual_seed(seed), "random.py:237"),
    ("torch.cuda", "Stream", _HostStream, "distributed/distributed_data_parallel.py:230"),
    ("torch.cuda", "Event", _HostStream, "transformer/moe/token_dispatcher.py records events"),
    ("torch.cuda", "stream", _stream(), "distributed/param_and_grad_buffer.py:417"),
    ("torch.cuda", "current_stream", _stream(), "tensor_parallel/layers.py waits for it"),
    ("torch.cuda", "default_stream", _stream(), "distributed/param_and_grad_buffer.py:422"),
    ("torch.cuda.nvtx", "range_push", _nothing(), "utils.py:2186"),
    ("torch.cuda.nvtx", "range_pop", _nothing(), "utils.py:2215"),
    (
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        lambda *_, **__: torch.get_rng_state(),
        "random.py:250 forks the RNG",
    ),
    (
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        lambda state, *_, **__: torch.set_rng_state(state),
        "random.py:255",
    ),
    (
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        lambda tensor, as_numpy=False, **_: tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor,
        "token_dispatcher.py:876: split sizes stay tensors where they are on the CPU already",
    ),
)
"""(module, name, host meaning, the megatron-core line that needs it)."""

WITHOUT_TRANSFORMER_ENGINE: tuple[tuple[str, str, Any, str], ...] = (
    (
        "megatron.core.transformer.moe.moe_utils",
        "te_general_gemm",
        None,
        "moe_utils.py:1192: the router asks for its matrix product",
    ),
    (
        "megatron.core.tensor_parallel.random",
        "FP8GlobalStateManager",
        SimpleNamespace(is_fp8_enabled=lambda: False),
        "random.py:589: recomputed norms and expert activations ask for FP8",
    ),
    (
        "megatron.core.tensor_parallel.random",
        "activation_recompute_forward",
        lambda **_: contextlib.nullcontext(),
        "random.py:592",
    ),
    ("megatron.core.tensor_parallel.random", "fp8_autocast", lambda **_: contextlib.nullcontext(), "random.py:687"),
)
"""Likewise, for names that megatron-core binds only where TransformerEngine is; those that are bound stay."""

_restore: list[Callable[[], None]] = []


def enabled() -> bool:
    """True between `enable()` and `disable()`."""
    return bool(_restore)


def enable() -> None:
    """Let megatron-core run on CPU ranks of this process until `disable()`. Does nothing when already enabled.

    Raises:
        RuntimeError: CUDA is in use by this process; the host's answers would be wrong for its tensors.
    """
    if enabled():
        return
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "CUDA is already in use by this process; enable the host ranks before any CUDA tensor is made"
        )
    # All is imported before anything is replaced: modules that look at torch.cuda find it as it is.
    replacements = [(importlib.import_module(module), name, value) for module, name, value, _ in REPLACEMENTS]
    unbound = [(importlib.import_module(module), name, value) for module, name, value, _ in WITHOUT_TRANSFORMER_ENGINE]
    mode = _HostMode()
    mode.__enter__()
    _restore.append(lambda: mode.__exit__(None, None, None))
    try:
        for owner, name, value in replacements:
            original = getattr(owner, name)
            setattr(owner, name, value)
            _restore.append(functools.partial(setattr, owner, name, original))
        for owner, name, value in unbound:
            if not hasattr(owner, name):
                setattr(owner, name, value)
                _restore.append(functools.partial(delattr, owner, name))
    except BaseException:
        disable()
        raise


def disable() -> None:
    """Put back everything that `enable()` replaced."""
    while _restore:
        _restore.pop()()


@contextlib.contextmanager
def host_ranks() -> Iterator[None]:
    """`enable()` for a block of code."""
    enable()
    try:
        yield
    finally:
        disable()
