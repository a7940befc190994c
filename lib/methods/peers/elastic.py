"""fs+elastic, the honest baseline: the labelled images alone, under all of the augmentation that the others have."""

from lib.methods.peers.learning import prediction
from lib.methods.peers.supervised import train as train_supervised


def train(experiment):
    """(ResidualUNet, Fit)."""
    return train_supervised(experiment, "elastic", bend=True)


def predict(experiment, index):
    """See methods.table."""
    return prediction(experiment, index, "elastic", "fs+elastic")
