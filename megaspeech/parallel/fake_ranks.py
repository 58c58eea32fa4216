"""One rank of a large run on a small machine: real modules and schedule, tensors without numbers, nothing sent.

torch's "fake" process group answers every collective at once, and under FakeTensorMode tensors have shapes, types and
storages but no memory. So the 40B model's stages are built and run, one rank after the other, on any machine.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from megaspeech.config import Config
from megaspeech.parallel import groups, host
from megaspeech.parallel.groups import Grid


def _answer_alone(answers: list[Any], own: Any, group: Any = None) -> None:
    answers[:] = [own] * len(answers)


@contextlib.contextmanager
def _no_coalescing(*_: object, **__: object) -> Iterator[Any]:
    yield mock.MagicMock()


def _nothing(*_: object, **__: object) -> None: ...


def _no_fork(*_: object, **__: object) -> Any:
    return contextlib.nullcontext()


def _converted(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.dtype != dtype:
                owner._parameters[name] = torch.nn.Parameter(parameter.detach().to(dtype))
                vars(owner._parameters[name]).update(vars(parameter))
    return module


def _real_mesh(*arguments: Any, **options: Any) -> DeviceMesh:
    with unset_fake_temporarily():
        return MESH_OF_GROUP(*arguments, **options)


def _all_places(kept_TB: torch.Tensor) -> torch.Tensor:
    return torch.arange(kept_TB.numel())


MESH_OF_GROUP = DeviceMesh.from_group
REPLACEMENTS: tuple[tuple[str, Any, str], ...] = (
    ("torch.get_rng_state", _nothing, "random states are numbers, which fake tensors have not"),
    ("torch.set_rng_state", _nothing, "likewise"),
    ("torch.cuda.get_rng_state", _nothing, "likewise"),
    ("megatron.core.tensor_parallel.random._get_cuda_rng_state", _nothing, "likewise"),
    ("megatron.core.tensor_parallel.random._set_cuda_rng_state", _nothing, "likewise"),
    ("megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork", _no_fork, "likewise"),
    (
        "torch.nn.Module.bfloat16",
        functools.partialmethod(_converted, torch.bfloat16),
        "torch cannot swap fake parameters",
    ),
    ("torch.nn.Module.to", lambda module, *_, **__: module, "likewise; everything is where it is to be"),
    ("torch.nn.Module.float", functools.partialmethod(_converted, torch.float32), "likewise"),
    ("torch.distributed.device_mesh.DeviceMesh.from_group", _real_mesh, "reads ranks out of a tensor"),
    ("torch.distributed.all_gather_object", _answer_alone, "reads lengths out of tensors"),
    (
        "megatron.core.distributed.param_and_grad_buffer._coalescing_manager",
        _no_coalescing,
        "param_and_grad_buffer.py:417: the coalesced reduction has no fake kernel",
    ),
    (
        "megaspeech.model.speech_text_model._places",
        _all_places,
        "how many frames weigh is read from their numbers; here all do",
    ),
)
"""(name, what it is here, why)."""


@contextlib.contextmanager
def fake_rank(config: Config, *, rank: int, world_size: int) -> Iterator[Grid]:
    """Be one rank of `world_size`; what is built inside has no memory. No process group may be up.

    Raises:
        RuntimeError: a process group is up already, or CUDA is in use.
    """
    if dist.is_initialized():
        raise RuntimeError("a process group is up; fake ranks need a process of their own")
    host.enable()
    try:
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        grid = groups.build_grid(config.parallel, seed=config.run.seed)
        with contextlib.ExitStack() as stack:
            for name, value, _ in REPLACEMENTS:
                stack.enter_context(mock.patch(name, value))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            yield grid
    finally:
        groups.shut_down()


def rank_of_stage(config: Config, *, stage: int, world_size: int) -> int:
    """The first rank of a pipeline stage: stages are the outermost axis of megatron-core's grid."""
    return stage * (world_size // config.parallel.pipeline_model_parallel_size)
