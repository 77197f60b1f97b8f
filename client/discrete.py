"""Discrete Laplace noise, sampled exactly: whole numbers of the operating system's generator.

Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020
(https://arxiv.org/abs/2004.00010), Algorithm 1 (a coin of probability e^-γ) and Algorithm 2:

    P(z) = (e^r - 1) / (e^r + 1) · e^(-r·|z|)   for every whole z;   r  rate, ε over sensitivity

This is the two-sided geometric distribution of Ghosh, Roughgarden and Sundararajan 2009. The rate
is a fraction and every step compares whole numbers, so no rounding stands between the code and the
proof: a float's rate means exactly the fraction that the float is.

How long a draw takes depends on its value (Jin et al. 2022, on timing discrete samplers): whoever
can time the site's processor learns something of the noise. Nobody outside the site can.
"""

import secrets
from fractions import Fraction


def discrete_laplace(rate: Fraction) -> int:
    """Return one draw of P(z) ∝ e^(-rate·|z|).

    Algorithm 2 with s / t = rate: U and V are the digits of a geometric number in base t, and the
    rejected -0 keeps zero from counting twice.

    Raises:
        ValueError: the rate is not positive.
    """
    if rate <= 0:
        raise ValueError(f"rate is {rate}, expected more than 0")
    s, t = rate.numerator, rate.denominator
    while True:
        u = secrets.randbelow(t)
        if not coin(Fraction(u, t)):
            continue
        v = 0
        while coin(Fraction(1)):
            v += 1
        size = (u + t * v) // s
        is_negative = secrets.randbelow(2) == 1
        if not (is_negative and size == 0):
            return -size if is_negative else size


def coin(gamma: Fraction) -> bool:
    """Return True with probability e^-gamma.

    Algorithm 1: the first K with a failed coin of probability γ/K is odd with probability
    1 - γ + γ²/2! - γ³/3! …

    Raises:
        ValueError: ``gamma`` is not between 0 and 1.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma is {gamma}, expected 0 to 1")
    k = 1
    while secrets.randbelow(gamma.denominator * k) < gamma.numerator:
        k += 1
    return k % 2 == 1
