"""One training on several devices, without a change to any method: networks are split, all the rest is not.

`torchrun --nproc-per-node=2 ...` starts the processes. Each draws the same whole batch; its network sees a part of it;
what the networks give is gathered, and every process computes the loss of the whole batch. So draws, batch and loss do
not depend on how many processes there are, and the losses are the same up to rounding. What is not a network, mostly
augmentation, every process does for itself: the share of it bounds what more devices can bring.
"""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn


def count():
    """How many processes train together; 1 where torchrun has not started this one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first():
    """Whether this process writes the files: the first one, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


def join(device):
    """Meet the other processes, once; where there are none, nothing is done.

    Args:
        device: torch.device. NCCL connects GPUs, of which every process of a machine has its own; gloo connects CPUs.
    """
    if count() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def wait():
    """Until all processes are here."""
    if count() > 1 and dist.is_initialized():
        dist.barrier()


class Gather(torch.autograd.Function):
    """What all processes give, as one batch; backward every process keeps its own part of the gradient.

    Every process has the whole loss and its whole gradient, so nothing needs to be sent back. ``average`` divides
    gradients by the number of processes: here they are multiplied by it.
    """

    @staticmethod
    def forward(ctx, part):
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        ctx.size = len(part)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        first = dist.get_rank() * ctx.size
        return dist.get_world_size() * gradient[first : first + ctx.size]


def own_part(batch):
    """This process's part of a batch; parts are of one size, so that the last images may come twice."""
    size = -(-len(batch) // dist.get_world_size())
    place = torch.arange(size, device=batch.device) + dist.get_rank() * size
    return batch[place.clamp_max(len(batch) - 1)]


def gathered(outputs, size):
    """Tensors, in lists and tuples, of all processes: the first ``size`` of each."""
    if isinstance(outputs, torch.Tensor):
        return Gather.apply(outputs)[:size]
    return type(outputs)(gathered(part, size) for part in outputs)


def called(network):
    """The outermost modules that can be called: a pair of student and teacher, say, is called by neither."""
    if type(network).forward is not nn.Module.forward:
        return [network]
    return [module for child in network.children() for module in called(child)]


@contextmanager
def spread(network):
    """Context in which the networks in ``network`` see a part of every batch each, and give the whole."""
    if count() == 1:
        yield
        return

    def before(module, inputs):
        module.whole = len(inputs[0])
        return tuple(own_part(batch) for batch in inputs)

    hooks = []
    for module in called(network):
        hooks.append(module.register_forward_pre_hook(before))
        hooks.append(module.register_forward_hook(lambda module, _, outputs: gathered(outputs, module.whole)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def average(parameters):
    """Give every parameter the mean of its gradients in all processes."""
    if count() == 1:
        return
    gradients = [value.grad for value in parameters if value.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / count()).split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))
