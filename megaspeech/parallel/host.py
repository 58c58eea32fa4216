"""CPU ranks: what megatron-core asks of CUDA, answered by the host. The only place that knows a machine without GPU.

megatron-core 0.16.1 takes a GPU for granted: it builds tensors on `torch.cuda.current_device()`, copies RNG states to
and from the device, waits for streams. `enable()` gives each of those names its host meaning and `disable()` restores
every one; all other code is what runs on GPUs. `REPLACEMENTS` names the megatron-core line each answer is for, and
`_optimizer_patches` what torch's Adam needs where neither TransformerEngine nor Apex brings another.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
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

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name in ("wait_stream", "wait_event", "record", "record_event", "wait", "synchronize"):
            return lambda *_, **__: None
        raise AttributeError(name)


class _HostMode(TorchFunctionMode):
    """Factories asked for device="cuda" build on the CPU; `Tensor.cuda()` is the identity."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": _host_device(kwargs["device"])}
        if func is torch.Tensor.cuda:
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
)
"""(module, name, host meaning, the megatron-core line that needs it)."""

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
    replacements += _optimizer_patches()
    mode = _HostMode()
    mode.__enter__()
    _restore.append(lambda: mode.__exit__(None, None, None))
    try:
        for owner, name, value in replacements:
            _replace(owner, name, value)
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


def _replace(owner: Any, name: str, value: Any) -> None:
    original = getattr(owner, name)
    setattr(owner, name, value)
    _restore.append(lambda: setattr(owner, name, original))


def _optimizer_patches() -> Iterator[tuple[Any, str, Callable]]:
    """What megatron-core's DistributedOptimizer needs to save and load torch's Adam, whose `step` is a tensor of every
    parameter, where FusedAdam's is a number of the group."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    state_dict, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict

    def state_dict_with_state(self: Any) -> Any:
        # distrib_optimizer.py asserts one common step: before the first step there is none, so make it.
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return state_dict(self)

    def load_state_dict_unshared(self: Any, state: Any) -> Any:
        result = load_state_dict(self, state)
        # It hands all parameters one `step` tensor, which Adam would then advance once for each of them.
        for values in self.optimizer.state.values():
            if "step" in values:
                values["step"] = values["step"].clone()
        return result

    @torch.no_grad()  # without TransformerEngine the main parameters are leaves that require gradients
    def set_without_step(self: Any, model_parameter: Any, tensors: dict) -> None:
        group, order = self.model_param_group_index_map[model_parameter]
        main = self.optimizer.param_groups[group]["params"][order]
        for key, value in {"param": main, **self.optimizer.state[main]}.items():
            if key != "step":  # distrib_optimizer.py:939 would look for it among the tensors
                value.copy_(tensors[key])

    yield DistributedOptimizer, "state_dict", state_dict_with_state
    yield DistributedOptimizer, "load_state_dict", load_state_dict_unshared
    yield DistributedOptimizer, "_set_main_param_and_optimizer_states", set_without_step
