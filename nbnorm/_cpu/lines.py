"""Loops over neighbours that share statistics, each with a parameter of its own."""

from __future__ import annotations

from nbnorm._cpu.halves import narrow, widen
from nbnorm._cpu.launch import inlined, loop, narrow_loop, reduction
from nbnorm._cpu.spans import ROWS
from nbnorm._math import input_gradient, normalize, rounded, scaled, standardize


def _line(x, y, mean_hi, rstd, rest, weight, bias):
    """Normalize neighbours that share statistics; ``rest`` is what the rounded mean leaves of x_hat."""
    for i in range(x.shape[0]):
        z = normalize(widen(x[i]), mean_hi, rstd, rest)
        if weight is not None and bias is not None:
            z = rounded(scaled(z, weight[i], bias[i]), x)
        elif weight is not None:
            z = rounded(z * weight[i], x)
        elif bias is not None:
            z = rounded(z + bias[i], x)
        y[i] = narrow(z, y)


apply_line = loop(_line)
# The same for the few elements of a block, which then stay in registers.
apply_block = inlined(_line)


def _input_grad_line(x, dy, dx, weight, terms, k):
    """Dx of neighbours that share statistics; for ``terms`` see `row_sums.fill_terms`."""
    mean_hi, rstd = terms[k], terms[ROWS + k]
    slope, offset, gain = terms[3 * ROWS + k], terms[4 * ROWS + k], terms[5 * ROWS + k]
    for i in range(x.shape[0]):
        g = widen(dy[i])
        if weight is not None:
            g = rounded(g * weight[i], x)
        x_hat = standardize(widen(x[i]), mean_hi, rstd)
        dx[i] = narrow(input_gradient(g, x_hat, slope, offset, gain), dx)


input_grad_line = inlined(_input_grad_line)
# The same over a short row.
short_input_grad_line = narrow_loop(_input_grad_line)


@inlined
def normal_terms(terms, k):
    """Coefficients of a row's `normalize`."""
    return terms[k], terms[ROWS + k], terms[2 * ROWS + k]


@narrow_loop
def parameter_grad_line(x, dy, terms, k, sum_dz, sum_dz_x_hat):
    """Add a row's terms to the parameters' gradients."""
    mean_hi, rstd, rest = normal_terms(terms, k)
    for i in range(x.shape[0]):
        d = widen(dy[i])
        sum_dz[i] += d
        sum_dz_x_hat[i] += d * normalize(widen(x[i]), mean_hi, rstd, rest)


@narrow_loop
def parameter_grad_four(xa, xb, xc, xd, dya, dyb, dyc, dyd, terms, k, sum_dz, sum_dz_x_hat):
    """Add four rows at once, so that the sums are read and written once for all of them."""
    mean_a, rstd_a, rest_a = normal_terms(terms, k)
    mean_b, rstd_b, rest_b = normal_terms(terms, k + 1)
    mean_c, rstd_c, rest_c = normal_terms(terms, k + 2)
    mean_d, rstd_d, rest_d = normal_terms(terms, k + 3)
    for i in range(xa.shape[0]):
        a, b, c, d = widen(dya[i]), widen(dyb[i]), widen(dyc[i]), widen(dyd[i])
        sum_dz[i] += (a + b) + (c + d)
        sum_dz_x_hat[i] += (
            a * normalize(widen(xa[i]), mean_a, rstd_a, rest_a)
            + b * normalize(widen(xb[i]), mean_b, rstd_b, rest_b)
        ) + (
            c * normalize(widen(xc[i]), mean_c, rstd_c, rest_c)
            + d * normalize(widen(xd[i]), mean_d, rstd_d, rest_d)
        )


@reduction
def grads_of_four(xa, xb, xc, xd, dya, dyb, dyc, dyd, weight, terms, sum_dz, sum_dz_x_hat):
    """Add four rows at once, if sums are wanted, and return the sums of g over each, then those of g * x_hat.

    Parameters and their sums are read and written once for all of them.
    """
    mean_a, rstd_a, rest_a = normal_terms(terms, 0)
    mean_b, rstd_b, rest_b = normal_terms(terms, 1)
    mean_c, rstd_c, rest_c = normal_terms(terms, 2)
    mean_d, rstd_d, rest_d = normal_terms(terms, 3)
    sum_a = sum_b = sum_c = sum_d = sum_p = sum_q = sum_r = sum_s = rounded(0.0, xa)
    for i in range(xa.shape[0]):
        a, b, c, d = widen(dya[i]), widen(dyb[i]), widen(dyc[i]), widen(dyd[i])
        p = a * normalize(widen(xa[i]), mean_a, rstd_a, rest_a)
        q = b * normalize(widen(xb[i]), mean_b, rstd_b, rest_b)
        r = c * normalize(widen(xc[i]), mean_c, rstd_c, rest_c)
        s = d * normalize(widen(xd[i]), mean_d, rstd_d, rest_d)
        if sum_dz is not None:
            sum_dz[i] += (a + b) + (c + d)
            sum_dz_x_hat[i] += (p + q) + (r + s)
        if weight is not None:
            w = weight[i]
            a, b, c, d = rounded(a * w, xa), rounded(b * w, xa), rounded(c * w, xa), rounded(d * w, xa)
            p, q, r, s = rounded(p * w, xa), rounded(q * w, xa), rounded(r * w, xa), rounded(s * w, xa)
        sum_a += a
        sum_b += b
        sum_c += c
        sum_d += d
        sum_p += p
        sum_q += q
        sum_r += r
        sum_s += s
    return sum_a, sum_b, sum_c, sum_d, sum_p, sum_q, sum_r, sum_s
