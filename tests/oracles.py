"""What the promises say, from their definitions, in numpy float64; nothing of bnstats."""

import numpy as np


def values(x):
    """The values of each channel, (values, C), of an array (N, C, ...)."""
    x = np.asarray(x, dtype=np.float64)
    return np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


def mean_var(batches, correction=1):
    """Mean and variance of all values of the batches together: the definition, two passes."""
    together = np.concatenate([values(batch) for batch in batches])
    mean = together.mean(0)
    return mean, ((together - mean) ** 2).sum(0) / (len(together) - correction)


def exponential(batches, momentum, *, debias, pooled, mean=0.0, var=1.0):
    """The running statistics after the batches, by the formulas of the exponential rule."""
    for t, batch in enumerate(batches, start=1):
        m, s = mean_var([batch])
        a = momentum / (1 - (1 - momentum) ** t) if debias else momentum
        d = m - mean
        mean = mean + a * d
        var = (1 - a) * var + a * s + (a * (1 - a) * d**2 if pooled else 0)
    return mean, var


def batch_average(batches):
    """Algorithm 2 of the BatchNorm paper: averages of batch means and unbiased variances."""
    pairs = [mean_var([batch]) for batch in batches]
    return np.mean([m for m, _ in pairs], 0), np.mean([s for _, s in pairs], 0)


def gaussian_kl(mean_p, var_p, mean_q, var_q):
    """KL(p || q) of one-dimensional Gaussians, in nats."""
    return 0.5 * (np.log(var_q / var_p) + (var_p + (mean_p - mean_q) ** 2) / var_q - 1)
