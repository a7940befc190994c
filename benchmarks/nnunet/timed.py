"""nnU-Net with a limit on time, in a folder of its own: nnU-Net imports all that lies in ``nnUNet_extTrainer``."""

import os
import time

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class TimedTrainer(nnUNetTrainer):
    """nnU-Net's own trainer, which ends after ``NNUNET_MINUTES`` instead of 1,000 epochs.

    The learning rate falls from its first value to zero as it does by default. No case is held out, so nothing is
    validated: the last weights are used, as nnU-Net does, too.
    """

    def run_training(self):
        limit, began = 60 * float(os.environ["NNUNET_MINUTES"]), time.monotonic()
        self.on_train_start()
        self.network.train()
        steps = 0
        while (share := (time.monotonic() - began) / limit) < 1:
            self.lr_scheduler.step(share * self.num_epochs)
            self.train_step(next(self.dataloader_train))
            steps += 1
        self.print_to_log_file(f"{steps} steps of {self.batch_size}")
        self.on_train_end()

    def perform_actual_validation(self, save_probabilities=False):
        pass
