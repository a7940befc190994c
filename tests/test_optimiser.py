import subprocess
import sys

import pytest
import torch
from torch import nn

from lib.optimiser import AdamW
from lib.params import ROOT


def train(make, steps=(0, 6), resumed=None):
    """A small network trained by the optimiser that ``make`` gives; its third layer gets no gradients."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2), nn.Linear(2, 2))
    if resumed:
        network.load_state_dict(resumed[0])
    optimiser = make(network.parameters())
    if resumed:
        optimiser.load_state_dict(resumed[1])
    for step in range(*steps):
        optimiser.zero_grad()
        network[:3](torch.full((4, 3), step + 1.0)).square().sum().backward()
        optimiser.step()
    return network, optimiser


def weights(network):
    return torch.cat([value.flatten() for value in network.state_dict().values()])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_gives_the_numbers_of_torchs_own(fused, decay):
    mine, _ = train(lambda parameters: AdamW(parameters, 0.01, decay, fused))
    own = lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=decay, fused=fused, foreach=False)
    assert torch.equal(weights(mine), weights(train(own)[0]))


def test_it_goes_on_from_what_it_saved():
    make = lambda parameters: AdamW(parameters, 0.01, 0.1)
    network, optimiser = train(make, (0, 3))
    saved = network.state_dict(), optimiser.state_dict()
    assert torch.equal(weights(train(make)[0]), weights(train(make, (3, 6), saved)[0]))


def test_training_does_not_import_torchs_compiler():
    code = ("import sys, torch; from lib.optimiser import AdamW; p = torch.nn.Parameter(torch.ones(2));"
            "o = AdamW([p], 0.1); o.zero_grad(); p.sum().backward(); o.step(); print('torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
