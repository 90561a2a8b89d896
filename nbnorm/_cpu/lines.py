"""Loops over neighbours that share statistics, each with a parameter of its own."""

from __future__ import annotations

from nbnorm._cpu.halves import narrow, widen
from nbnorm._cpu.launch import helper, inlined, reduction
from nbnorm._math import input_gradient, normalize, rounded, standardize


@helper
def apply_line(x, y, mean_hi, rstd, rest, weight, bias):
    """Normalize neighbours that share statistics; ``rest`` is what the rounded mean leaves of x_hat."""
    for i in range(x.shape[0]):
        z = normalize(widen(x[i]), mean_hi, rstd, rest)
        if weight is not None:
            z = rounded(z * weight[i], x)
        if bias is not None:
            z = rounded(z + bias[i], x)
        y[i] = narrow(z, y)


@reduction
def piece_grad_sums(x, dy, weight, mean_hi, rstd):
    """Sums of g = dy * weight and of g * x_hat over one piece, x_hat relative to the rounded mean."""
    sum_g = rounded(0.0, x)
    sum_g_x_hat = rounded(0.0, x)
    for i in range(x.shape[0]):
        g = widen(dy[i])
        if weight is not None:
            g = rounded(g * weight[i], x)
        sum_g += g
        sum_g_x_hat += g * standardize(widen(x[i]), mean_hi, rstd)
    return sum_g, sum_g_x_hat


@inlined
def input_grad_line(x, dy, dx, weight, mean_hi, rstd, slope, offset, gain):
    """Dx of neighbours that share statistics."""
    for i in range(x.shape[0]):
        g = widen(dy[i])
        if weight is not None:
            g = rounded(g * weight[i], x)
        x_hat = standardize(widen(x[i]), mean_hi, rstd)
        dx[i] = narrow(input_gradient(g, x_hat, slope, offset, gain), dx)


@inlined
def parameter_grad_line(x, dy, mean_hi, rstd, rest, sum_dz, sum_dz_x_hat):
    """Add the row's terms to the parameters' gradients."""
    for i in range(x.shape[0]):
        d = widen(dy[i])
        sum_dz[i] += d
        sum_dz_x_hat[i] += d * normalize(widen(x[i]), mean_hi, rstd, rest)


@inlined
def parameter_grad_four(xa, xb, xc, xd, a, b, c, d, terms, sum_dz, sum_dz_x_hat):
    """Add four rows at once, so that the sums are read and written once for all of them."""
    ma, ra, oa = terms[0, 0], terms[0, 1], terms[0, 2]
    mb, rb, ob = terms[1, 0], terms[1, 1], terms[1, 2]
    mc, rc, oc = terms[2, 0], terms[2, 1], terms[2, 2]
    md, rd, od = terms[3, 0], terms[3, 1], terms[3, 2]
    for i in range(xa.shape[0]):
        da, db, dc, dd = widen(a[i]), widen(b[i]), widen(c[i]), widen(d[i])
        sum_dz[i] += (da + db) + (dc + dd)
        sum_dz_x_hat[i] += (
            da * normalize(widen(xa[i]), ma, ra, oa) + db * normalize(widen(xb[i]), mb, rb, ob)
        ) + (dc * normalize(widen(xc[i]), mc, rc, oc) + dd * normalize(widen(xd[i]), md, rd, od))
