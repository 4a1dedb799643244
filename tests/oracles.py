"""The promised values, computed from their definitions in numpy float64 without bnstats."""

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
    """The running statistics after the batches, by the formulas of the exponential rule.

    Pooled: the variance that a value drawn by the weights has about their mean, divided by what
    that is of the variance of one distribution; Q is the sum of squared shares over sizes. All
    batches are of one size.
    """
    q = 0.0
    for t, batch in enumerate(batches, start=1):
        m, s = mean_var([batch])
        n = len(values(batch))
        a = momentum / (1 - (1 - momentum) ** t) if debias else momentum
        d = m - mean
        before, q = q, (1 - a) ** 2 * q + a**2 / n
        mean = mean + a * d
        if pooled:
            kept = (1 - a) * (1 - before) * var if a < 1 else 0
            var = (kept + a * (n - 1) / n * s + a * (1 - a) * d**2) / (1 - q)
        else:
            var = (1 - a) * var + a * s
    return mean, var


def exponential_shares(count, momentum, *, debias):
    """What each of so many batches weighs in an exponential average, and what is left of its start.

    Without debiasing the newest weighs momentum, and each weighs the share of its predecessor
    divided by ``1 - momentum``; debiased, those shares are scaled to a sum of 1.
    """
    shares = momentum * (1 - momentum) ** np.arange(count - 1, -1, -1.0)
    return (shares / shares.sum(), 0.0) if debias else (shares, (1 - momentum) ** count)


def weighted_mean_var(batches, shares, start=0.0):
    """Mean and unbiased variance of all values, where each batch has a share in all.

    The definition: every value weighs the share of its batch over its number of values, and the
    variance about the mean is divided by 1 minus the sum of the squared weights, which is its
    expectation for values of variance 1. What is left is the share of a state that was there
    before, of mean 0 and variance 1, as of a value without end.
    """
    x = np.concatenate([values(batch) for batch in batches])
    sizes = [len(values(batch)) for batch in batches]
    weights = np.repeat(np.asarray(shares) / sizes, sizes)[:, None]
    mean = (weights * x).sum(0)
    spread = (weights * (x - mean) ** 2).sum(0) + start * (1 + mean**2)
    return mean, spread / (1 - (weights**2).sum())


def batch_average(batches):
    """Algorithm 2 of the BatchNorm paper: averages of batch means and unbiased variances."""
    pairs = [mean_var([batch]) for batch in batches]
    return np.mean([m for m, _ in pairs], 0), np.mean([s for _, s in pairs], 0)


def gaussian_kl(mean_p, var_p, mean_q, var_q):
    """KL(p || q) of one-dimensional Gaussians, in nats."""
    return 0.5 * (np.log(var_q / var_p) + (var_p + (mean_p - mean_q) ** 2) / var_q - 1)


def renormalized(x, weight, bias, mean, var, eps, max_ratio, max_shift):
    """Batch Renormalization of a batch (N, C, ...) behind running statistics; and r and d."""
    x = np.asarray(x, dtype=np.float64)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    batch_mean, batch_var = mean_var([x], correction=0)
    sd, running_sd = np.sqrt(batch_var + eps), np.sqrt(var + eps)
    r = np.clip(sd / running_sd, 1 / max_ratio, max_ratio)
    d = np.clip((batch_mean - mean) / running_sd, -max_shift, max_shift)
    z = (x - batch_mean.reshape(shape)) / sd.reshape(shape)
    y = z * r.reshape(shape) + d.reshape(shape)
    return y * weight.reshape(shape) + bias.reshape(shape), r, d


class MovingAverage:
    """MABN (Yan et al. 2020, arXiv:2001.06838, section 4) for one layer, with its backward."""

    def __init__(self, channels, *, eps, momentum, window, warmup, renorm_warmup, max_ratio):
        self.eps, self.momentum, self.m = eps, momentum, window
        self.warmup, self.renorm_warmup, self.max_ratio = warmup, renorm_warmup, max_ratio
        self.weight, self.bias = np.ones(channels), np.zeros(channels)
        self.running_var = np.ones(channels)
        self.chi = np.zeros((window, channels))
        self.psi = np.zeros((window, channels))
        self.t = 0

    def forward(self, x):
        """The output, and what the backward needs of this forward."""
        x = np.asarray(x, dtype=np.float64)
        self.t += 1
        chi = (values(x) ** 2).mean(0)
        self.chi[self.t % self.m] = chi
        warm = self.t > self.m and self.t >= self.warmup
        var = self.chi.mean(0) if warm else chi
        r = np.ones_like(var)
        if self.t > max(self.renorm_warmup, self.warmup):
            r = np.sqrt(var + self.eps) / np.sqrt(self.running_var + self.eps)
            r = np.clip(r, 1 / self.max_ratio, self.max_ratio)
        self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var
        c = _per_channel(x)
        z = x / c(np.sqrt(var + self.eps))
        return c(self.weight * r) * z + c(self.bias), (self.t, warm, var, r, z)

    def backward(self, grad, saved):
        """Gradients of x, weight and bias."""
        t, warm, var, r, z = saved
        grad = np.asarray(grad, dtype=np.float64)
        c = _per_channel(grad)
        g = grad * c(self.weight * r)
        psi = values(g * z).mean(0)
        self.psi[t % self.m] = psi
        mean = self.psi.mean(0) if warm else psi
        grad_x = (g - z * c(mean)) / c(np.sqrt(var + self.eps))
        return grad_x, values(grad * c(r) * z).sum(0), values(grad).sum(0)


def _per_channel(x):
    """A function that gives numbers per channel the axes of x."""
    return lambda numbers: numbers.reshape(-1, *[1] * (x.ndim - 2))
