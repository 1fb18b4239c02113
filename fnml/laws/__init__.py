"""Check the laws of the transforms, and the gradient, on a loss of the user's own."""

from fnml.laws._check_grad import check_grad as check_grad
from fnml.laws._check_laws import check_laws as check_laws
from fnml.laws._finding import Finding as Finding
