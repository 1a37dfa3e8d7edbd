"""Several processes that train one model: each with a copy of it or, with --shard, with a part (torch's own DDP and FSDP2).

Sharded, parameters, gradients, averages and optimizer states are split over the processes, and a network too large for one
card is whole only block by block, while each is at work. Checkpoints hold whole tensors: a run goes on under any number of
processes, sharded or not. What is split has a method `full_tensor`, what is sharded `unshard`; to import their classes would
make every start half a second longer.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn as nn
from torch import Tensor

from run import rank, world


def distribute(objective: nn.Module, shard: bool) -> nn.Module:
    """What to call for the loss of an objective, whose gradients are then the mean over all processes. Sharding replaces the
    parameters, so it comes before whatever keeps them."""
    if world() == 1:
        return objective
    if not shard:
        return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True)
    from torch.distributed.fsdp import fully_shard

    for block in objective.model.blocks:
        fully_shard(block)
    return fully_shard(objective)


@contextlib.contextmanager
def gradients(distributed: nn.Module, more: bool) -> Iterator[None]:
    """Around a micro-step: only the last one, with no `more` to come, sums gradients over the processes."""
    if hasattr(distributed, "unshard"):
        distributed.set_requires_gradient_sync(not more)
    with distributed.no_sync() if more and hasattr(distributed, "no_sync") else contextlib.nullcontext():
        yield


def unshard(objective: nn.Module) -> None:
    """From now on the model may be called without its objective, by all processes alike."""
    if hasattr(objective, "unshard"):
        objective.unshard()


def reshard(objective: nn.Module) -> None:
    if hasattr(objective, "reshard"):
        objective.reshard()


def whole(x: Tensor) -> Tensor:
    """A tensor, gathered from all processes if it is split over them."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def like(x: Tensor, p: Tensor) -> Tensor:
    """A whole tensor of the shape of p, where p is, and split as it is."""
    if not hasattr(p, "full_tensor"):
        return x.to(p.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements)


def to_save(content):
    """Nested dicts and lists with whole tensors, on the CPU of the first process, in place of split ones."""
    if isinstance(content, dict):
        return {name: to_save(value) for name, value in content.items()}
    if isinstance(content, list):
        return [to_save(value) for value in content]
    if not hasattr(content, "full_tensor"):
        return content
    content = content.full_tensor()  # one at a time
    return content.cpu() if rank() == 0 else None


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """optimizer.load_state_dict of whole tensors, but for its settings, which the run has. Raises one of many errors where
    they do not fit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if saved["state"].keys() != set(range(len(params))):
        raise ValueError("its optimizer has other parameters")
    state = {}
    for i, p in enumerate(params):
        values = saved["state"][i]
        if any(value.shape not in (p.shape, torch.Size()) for value in values.values()):
            raise ValueError("its optimizer has other parameters")
        state[i] = {name: like(value, p) if value.shape == p.shape else value for name, value in values.items()}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
