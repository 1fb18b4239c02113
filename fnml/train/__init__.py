"""Losses, the training step, and the loop over it."""

from fnml.train._check import check_step as check_step
from fnml.train._early_stopping import early_stopping as early_stopping
from fnml.train._every import Every as Every
from fnml.train._fit import Fit as Fit
from fnml.train._fit import Progress as Progress
from fnml.train._fit import fit as fit
from fnml.train._in_place import adamw as adamw
from fnml.train._logbook import means as means
from fnml.train._losses import accuracy as accuracy
from fnml.train._losses import cross_entropy as cross_entropy
from fnml.train._losses import linear_next_token as linear_next_token
from fnml.train._losses import mse as mse
from fnml.train._losses import next_token as next_token
from fnml.train._optimizer import OptimizerConfig as OptimizerConfig
from fnml.train._optimizer import optimizer as optimizer
from fnml.train._step import eval_step as eval_step
from fnml.train._step import evaluator as evaluator
from fnml.train._step import train_step as train_step
from fnml.train._stop_signals import stop_on_signals as stop_on_signals
