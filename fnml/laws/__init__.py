"""Check the laws of the transforms, the gradient, and the usual faults, on a user's own loss."""

from fnml.laws._check_grad import check_grad as check_grad
from fnml.laws._check_laws import check_laws as check_laws
from fnml.laws._check_loss import check_loss as check_loss
from fnml.laws._finding import Finding as Finding
