"""Write functions that ONNX has no operator for, or whose plain form loses digits."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fnml.interop.onnx._builder import Builder, Lowering, Refused

# Giles 2010, "Approximating the erfinv function", table 5: the central region and the tail.
_ERF_INV_CENTRE = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_ERF_INV_TAIL = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)
# Press et al., Numerical Recipes, section 6.2: relative error 1.2e-7 everywhere.
_ERFC = (
    *(0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807),
    *(-0.18628806, 0.09678418, 0.37409196, 1.00002368, -1.26551223),
)
# Lanczos, g = 7, as tabled by Godfrey.
_LANCZOS = (
    *(676.5203681218851, -1259.1392167224028, 771.32342877765313, -176.61502916214059),
    *(12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6, 1.5056327351493116e-7),
)


def _polynomial(g: Builder, x: str, coefficients: Sequence[float]) -> str:
    """Evaluate by Horner's rule, highest power first."""
    result: Any = np.array(coefficients[0], g.dtypes[x])
    for c in coefficients[1:]:
        result = g("Add", g("Mul", result, x), c)
    return result


def _expm1(g: Builder, eqn: Any, x: str) -> str:
    # exp(x) - 1 = tanh(x / 2) (exp(x) + 1), without a difference of near numbers.
    return g("Mul", g("Tanh", g("Mul", x, 0.5)), g("Add", g("Exp", x), 1))


def _log1p(g: Builder, eqn: Any, x: str) -> str:
    return log1p(g, x)


def log1p(g: Builder, x: str) -> str:
    """Return log(1 + x), by an odd function of x / (2 + x) where x is small."""
    near = g("Less", g("Abs", x), 0.5)
    small = g("Where", near, x, 0)
    precise = g("Mul", g("Atanh", g("Div", small, g("Add", small, 2))), 2)
    return g("Where", near, precise, g("Log", g("Add", x, 1)))


def _erf_inv(g: Builder, eqn: Any, x: str) -> str:
    own = g.dtypes[x]
    if own == np.float64:
        raise Refused("it is exported in float32 precision only, got float64")
    w = g("Neg", log1p(g, g("Neg", g("Mul", x, x))))
    centre = _polynomial(g, g("Sub", w, 2.5), _ERF_INV_CENTRE)
    tail = _polynomial(g, g("Sub", g("Sqrt", w), 3), _ERF_INV_TAIL)
    inner = g("Mul", g("Where", g("Less", w, 5), centre, tail), x)
    edge = g("Equal", g("Abs", x), 1)
    return g("Where", edge, g("Mul", x, np.array(np.inf, own)), inner)


def _erfc(g: Builder, eqn: Any, x: str) -> str:
    if g.dtypes[x] == np.float64:
        return g("Sub", np.ones((), np.float64), g("Erf", x))
    size = g("Abs", x)
    t = g("Reciprocal", g("Add", g("Mul", size, 0.5), 1))
    power = g("Sub", _polynomial(g, t, _ERFC), g("Mul", size, size))
    right = g("Mul", t, g("Exp", power))
    left = g("Sub", np.array(2, g.dtypes[x]), right)
    return g("Where", g("Less", x, 0), left, right)


def _lgamma(g: Builder, eqn: Any, x: str) -> str:
    # Below 1/2 by reflection: log(pi / |sin(pi x)|) - lgamma(1 - x).
    own = g.dtypes[x]
    low = g("Less", x, 0.5)
    z = g("Sub", g("Where", low, g("Sub", np.ones((), own), x), x), 1)
    total: Any = np.array(0.99999999999980993, own)
    for i, c in enumerate(_LANCZOS):
        total = g("Add", g("Div", np.array(c, own), g("Add", z, i + 1)), total)
    t = g("Add", z, 7.5)
    whole = g("Sub", g("Mul", g("Add", z, 0.5), g("Log", t)), t)
    value = g("Add", g("Add", whole, 0.5 * math.log(2 * math.pi)), g("Log", total))
    turn = g("Abs", g("Sin", g("Mul", g("Sub", x, g("Round", x)), np.pi)))
    mirrored = g("Sub", g("Sub", np.array(np.log(np.pi), own), g("Log", turn)), value)
    return g("Where", low, mirrored, value)


LOWERINGS: Mapping[str, Lowering] = {
    "expm1": _expm1,
    "log1p": _log1p,
    "erf_inv": _erf_inv,
    "erfc": _erfc,
    "lgamma": _lgamma,
}
