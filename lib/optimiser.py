"""AdamW by torch's functional form.

The class torch.optim.AdamW imports torch's compiler, which nothing here uses and which takes every stage two seconds.
"""

import torch
from torch.optim.adamw import adamw


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019): the numbers of torch.optim.AdamW.

    Args:
        parameters: tensors to train.
        rate: learning rate; may be changed between steps.
        weight_decay: times the learning rate; 0 is plain Adam.
        fused: all of a step in one pass over the parameters.
    """

    def __init__(self, parameters, rate, weight_decay=0.0, fused=True):
        self.parameters = list(parameters)
        self.rate = rate
        self.weight_decay = weight_decay
        self.fused = fused
        device = lambda parameter: parameter.device if fused else "cpu"
        self.steps = [torch.zeros((), device=device(parameter)) for parameter in self.parameters]
        self.means = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.squares = [torch.zeros_like(parameter) for parameter in self.parameters]

    def zero_grad(self):
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self):
        """One step along the gradients; parameters without one stay as they are."""
        chosen = [k for k, parameter in enumerate(self.parameters) if parameter.grad is not None]
        pick = lambda tensors: [tensors[k] for k in chosen]
        adamw(
            pick(self.parameters), [self.parameters[k].grad for k in chosen], pick(self.means), pick(self.squares), [],
            pick(self.steps), foreach=False, fused=self.fused, amsgrad=False, beta1=0.9, beta2=0.999, lr=self.rate,
            weight_decay=self.weight_decay, eps=1e-8, maximize=False,
        )

    def state_dict(self):
        """Everything that a later run needs to go on, by parameter."""
        return {"state": {k: {"step": step, "exp_avg": mean, "exp_avg_sq": square} for k, (step, mean, square)
                          in enumerate(zip(self.steps, self.means, self.squares))}}

    @torch.no_grad()
    def load_state_dict(self, saved):
        """Go on from ``state_dict``; parameters that have never had a gradient are not in it."""
        for k, values in saved["state"].items():
            for kept, name in ((self.steps, "step"), (self.means, "exp_avg"), (self.squares, "exp_avg_sq")):
                kept[k].copy_(values[name])
