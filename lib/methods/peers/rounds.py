"""P1's joint training by the rules of recipe `strong`: rounds in which both networks teach each other.

A first part of the steps trains the segmentation on the labelled images alone. In every round after that both networks
give soft pseudo-masks to the unlabelled images. The segmentation goes on from them and the labelled images, half and
half, the registration from pairs of all, guided by the masks. The number of rounds is fixed and the last one is tested.
"""

import torch

from lib.methods.experiment import Prediction, load_pretrained_registration
from lib.methods.peers.learning import labelled_loss, learn, taught_loss
from lib.methods.pretraining import train_registration
from lib.training import weights_digest


def train(experiment):
    """(ResidualUNet, Fit) of the last round; the Fit's seconds are those of all training."""
    settings, data = experiment.settings, experiment.data
    options = settings.strong.joint
    everything = torch.cat((data.labelled, data.unlabelled))

    network, found = learn(
        experiment, "joint_start", labelled_loss, part=options.pretraining, label="before the rounds"
    )
    registration, seconds = load_pretrained_registration(experiment), found.seconds
    for number in range(1, options.rounds + 1):
        digests = [weights_digest(network), weights_digest(registration)]
        label = f"round {number}: pseudo-masks"
        soft = experiment.generate((network, registration), data.unlabelled, label, "strong joint", number).soft

        def batch_loss(lesson, generator, step, soft=soft):
            return taught_loss(lesson, soft, generator)

        guided = train_registration(
            experiment,
            registration,
            data.images[everything],
            torch.cat((data.masks[data.labelled], soft)),
            steps=options.registration_steps,
            peak=options.registration_learning_rate,
            label=f"round {number}: registration",
            names=("strong joint", "registration", number),
            positions=data.positions(everything),
            depends=digests,
        )
        part = (1 - options.pretraining) / options.rounds
        label = f"round {number}: segmentation"
        network, found = learn(experiment, f"joint_{number}", batch_loss, digests, part, label, start=network)
        seconds += guided.seconds + found.seconds
    weights = {"segmentation": network.state_dict(), "registration": registration.state_dict()}
    experiment.cabinet.save(weights, "joint")
    experiment.note_cost("joint", seconds)
    return network, found._replace(seconds=seconds)


def predict(experiment, index):
    """Masks of ``joint``, ``registration`` and ``combined``. See methods.table."""
    saved = experiment.cabinet.load("joint")
    networks = experiment.segmentation_network(), experiment.registration_network()
    for network, name in zip(networks, ("segmentation", "registration")):
        network.load_state_dict(saved[name])
    made = experiment.generate(networks, index, "test, joint", "test", "strong joint")
    fields = {"registration": made.registration, "joint": made.plain, "combined": made.soft}
    return {method: Prediction(0, masks) for method, masks in fields.items()}
