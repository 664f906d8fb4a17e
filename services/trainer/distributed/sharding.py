"""A student's weights in shards, one a rank, by PyTorch's FSDP2, and put together again where they are needed whole.

Masters and optimizer stay in fp32; gradients are summed in fp32 and never averaged, since the loop divides once by the
positions of all ranks. Layers are shards of their own, gathered when their turn comes, in bf16 on CUDA. Embedding,
final norm and output head are gathered together in fp32 before a forward pass and stay until its backward pass is over,
so a loss finds the head as a plain tensor, tied or not, sparse or dense, and its gradient is scattered with the others.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from opd.errors import ConfigError
from services.trainer.distributed.ranks import Alone, Ranks

_DECODE = "opd_decode"
_IS_GATHERED = "opd_is_gathered"


def shard_student(model: Any, mesh: DeviceMesh) -> None:
    """Cuts a Hugging Face causal LM into shards in place; every rank has loaded the same weights.

    Collective. The model moves to the mesh's device. Rollouts and plain forward passes need `gathered`. `ConfigError`
    for a model whose layers are not found.
    """
    layers = _layers(model)
    reduced = torch.float32 if next(model.parameters()).dtype != torch.float64 else torch.float64
    is_cuda = mesh.device_type == "cuda"
    of_layers = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if is_cuda else None, reduce_dtype=reduced, cast_forward_inputs=False
    )
    of_rest = MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=of_layers)
    fully_shard(model, mesh=mesh, mp_policy=of_rest)
    # FSDP gathers around a module's forward; the student calls the decoder alone, so that gets the same.
    setattr(model, _DECODE, MethodType(_decode, model))
    register_fsdp_forward_method(model, _DECODE)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        # A factor of 1 by nccl's plain sum; what it would do with another factor does not exist in gloo.
        module.set_force_sum_reduction_for_comms(True)
    # Left to itself, FSDP gathers ahead what it has seen run before, in passes of this rank alone too, such as an
    # evaluation's: ranks would then gather different things. The first layer has none before it and names itself.
    backwards = [model, *reversed(layers)]
    for module, before in zip(backwards, [*backwards[1:], layers[0]], strict=True):
        module.set_modules_to_backward_prefetch([before])
    # The first pass tells FSDP that the model is the root; one through a layer alone would make that one.
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device), use_cache=False)
    release(model)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def sharded_modules(model: nn.Module) -> list[Any]:
    """The model first, then its layers; empty for one that is not in shards."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class ShardedDecoder:
    """Calls a sharded student's decoder, with the weights outside of its layers gathered before and kept for a loss."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._is_stale = False

    def __call__(self, **inputs: Any) -> Any:
        if getattr(self._model, _IS_GATHERED, False):
            # All weights are here and as they should be, and the other ranks do something else.
            return _decode(self._model, **inputs)
        if self._is_stale:
            # A pass without a backward one left its copy behind, and the weights may have changed since.
            self._model.reshard()
        self._is_stale = not torch.is_grad_enabled()
        return getattr(self._model, _DECODE)(**inputs)


def release(model: nn.Module) -> None:
    """Lets go of gathered copies, so that the model's parameters are the shards, which alone are trained and saved.

    Nothing happens for a model that is not in shards.
    """
    for module in sharded_modules(model):
        module.reshard()


@contextmanager
def gathered(model: nn.Module, ranks: Ranks | None = None) -> Iterator[None]:
    """Within, every rank has all weights and forward passes ask nobody, as sampling needs; none may be changed.

    Collective on entry. Takes a copy of the weights in the precision they are gathered in. Nothing happens for a model
    that is not in shards. Of `ranks`, one that is gone is a `RankLostError`.
    """
    modules = sharded_modules(model)
    with (ranks or Alone()).in_step():
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            # Also when gathered already: that copy may be of older weights.
            module.reshard()
            module.unshard()
    setattr(model, _IS_GATHERED, bool(modules))
    try:
        yield
    finally:
        setattr(model, _IS_GATHERED, False)
        for module in modules:
            module.reshard()
            module.set_reshard_after_forward(module is not model, recurse=False)


def gathered_weights(model: nn.Module) -> dict[str, Tensor]:
    """What `state_dict` names, of a model whose weights are whole: within `gathered`, or not in shards at all.

    Within, `state_dict` itself would have FSDP put the shards back.
    """
    if not is_sharded(model):
        return model.state_dict()
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in module.named_buffers(prefix=path, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                found[name] = value
    return found


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be in shards; collective where it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a whole tensor, in shards as `parameter` is; every rank has read the same `value`."""
    if not isinstance(parameter, DTensor) or not value.dim():
        return value
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)


def whole_on_host(tensors: dict[str, Tensor], *, keeps: bool) -> dict[str, Tensor]:
    """Whole copies in this machine's memory where `keeps`, else none; one after the other, and collective.

    Names that share a tensor share the copy.
    """
    copies: dict[int, Tensor] = {}
    found = {}
    for name, tensor in tensors.items():
        if id(tensor) not in copies:
            full = whole(tensor.detach())
            copies[id(tensor)] = full.cpu() if keeps else full.new_empty(0)
            del full
        if keeps:
            found[name] = copies[id(tensor)]
    return found


def whole_weights(model: nn.Module, *, keeps: bool) -> dict[str, Tensor]:
    """What `state_dict` names, whole, where `keeps`; collective."""
    release(model)
    # Parameters by the names of all modules that share one, so that tied weights are recognised.
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return whole_on_host({name: named[name] for name in model.state_dict()}, keeps=keeps)


def _decode(self: Any, **inputs: Any) -> Any:
    return self.base_model(**inputs)


def _layers(model: Any) -> list[nn.Module]:
    """The decoder's layers: the one list of modules that makes up most of it."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    if not lists:
        raise ConfigError(
            f"student.model: {type(model).__name__} has no list of layers to cut into shards; start a single process"
        )
    largest = max(lists, key=lambda found: sum(weight.numel() for weight in found.parameters()))
    return list(largest)
