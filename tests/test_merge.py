"""Standard errors of merged statistics: the real ones, however the data were cut."""

import pytest
import torch
from torch import nn

import bnstats
from bnstats import PopulationStats

REPETITIONS = 400  # each one a channel, so that one pass simulates them all


def measure(batches, **options):
    layer = nn.BatchNorm1d(REPETITIONS).double()
    return bnstats.measure_population_stats(layer, batches, **options)


def merged(parts):
    first, *others = (measure(part) for part in parts)
    for other in others:
        first = first.merge(other)
    return first[""]


def draw(kind, batches, sizes, generator):
    """Batches that vary in mean and scale; skewed to the right (1), to the left (-1), not (0)."""
    for i in range(batches):
        size = sizes[i % len(sizes)]
        noise = torch.randn(size, REPETITIONS, generator=generator).double()
        if kind:
            noise = kind * (torch.empty_like(noise).exponential_(generator=generator) - 1)
        yield 0.1 * torch.randn(1, REPETITIONS, generator=generator).double() + noise


def ratios(stats, mean, var):
    """Real over reported standard error, of the mean and of the variance."""
    pairs = ((stats.mean - mean, stats.mean_stderr), (stats.var - var, stats.var_stderr))
    return [float((real.square().mean() / said.square().mean()).sqrt()) for real, said in pairs]


STRATA = {
    # kind of skew and offset of each stratum: away from each other, towards, alike, none
    "skewed outwards": ((-1, -1.5), (1, 1.5)),
    "skewed inwards": ((1, -1.5), (-1, 1.5)),
    "one skewed": ((1, -1.5), (0, 1.5)),
    "alike": ((1, -1.5), (1, 1.5)),
    "far apart": ((1, -20.0), (1, 20.0)),
    "in one place": ((1, 0.0), (1, 0.0)),
}


@pytest.mark.parametrize("strata", STRATA.values(), ids=STRATA.keys())
@pytest.mark.parametrize("sizes", [[16], [4, 30, 9, 17]], ids=["even", "uneven"])
def test_the_real_error_of_merged_strata_is_the_reported_one(strata, sizes):
    generator = torch.Generator().manual_seed(0)
    parts = [[x + offset for x in draw(kind, 40, sizes, generator)] for kind, offset in strata]
    between = strata[1][1] ** 2
    real = ratios(merged(parts), 0.0, 1 + 0.01 + between)
    assert all(0.8 < ratio < 1.25 for ratio in real), real


@pytest.mark.parametrize("shards", [2, 5, 40])
def test_the_real_error_of_merged_shards_of_one_sample_is_the_reported_one(shards):
    generator = torch.Generator().manual_seed(1)
    batches = list(draw(1, 40, [12, 20], generator))
    size = len(batches) // shards
    parts = [batches[i : i + size] for i in range(0, len(batches), size)]
    real = ratios(merged(parts), 0.0, 1 + 0.01)
    assert all(0.8 < ratio < 1.25 for ratio in real), real


@pytest.mark.parametrize("correction", [0, 1])
def test_shards_of_one_batch_merge_into_the_errors_of_the_whole(correction):
    batches = list(draw(1, 12, [5, 8, 30], torch.Generator().manual_seed(2)))
    whole = measure(batches, correction=correction)
    parts = [measure([x], correction=correction) for x in batches]
    assert parts[0][""].mean_stderr.isnan().all()
    together = PopulationStats({})
    for part in reversed(parts):
        together = together.merge(part)
    for key, value in vars(whole[""]).items():
        torch.testing.assert_close(getattr(together[""], key), value, rtol=1e-9, atol=1e-9)


def test_the_spread_is_that_of_the_definition_and_whole_after_any_merge():
    batches = list(draw(-1, 9, [5, 8, 30], torch.Generator().manual_seed(3)))
    whole = measure(batches)[""]
    rows = torch.stack(
        [
            len(x) * torch.stack([torch.ones_like(whole.mean), a, b])
            for x in batches
            for a in [x.mean(0) - whole.mean]
            for b in [(x - whole.mean).square().mean(0) - whole.var * (1 - 1 / whole.count)]
        ]
    )
    expected = torch.einsum("uic,ujc->cij", rows, rows)
    torch.testing.assert_close(whole.spread, expected, rtol=1e-9, atol=1e-9)
    for cut in (1, 4):
        part = merged([batches[:cut], batches[cut:]])
        torch.testing.assert_close(part.spread, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(part.unit_covariance, whole.unit_covariance)


def test_the_covariance_of_one_unit_foretells_the_error_of_a_few():
    generator = torch.Generator().manual_seed(4)
    unit = measure(list(draw(1, 400, [16], generator)))[""].unit_covariance
    few = measure(list(draw(1, 4, [16], generator)))[""]
    for error, variance in ((few.mean, unit[:, 0, 0]), (few.var - 1.01, unit[:, 1, 1])):
        assert 0.8 < float((error.square().mean() / (variance / 4).mean()).sqrt()) < 1.25


def test_merging_what_was_saved_gives_the_same_bits(tmp_path):
    parts = [measure(list(draw(1, n, [8], torch.Generator().manual_seed(n)))) for n in (1, 5)]
    direct = parts[0].merge(parts[1])[""]
    for index, part in enumerate(parts):
        part.save(tmp_path / str(index))
    loaded = PopulationStats.load(tmp_path / "0").merge(PopulationStats.load(tmp_path / "1"))[""]
    for key, value in vars(direct).items():
        other = getattr(loaded, key)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


def test_what_an_early_file_does_not_know_is_nan_after_a_merge():
    batches = list(draw(1, 6, [8], torch.Generator().manual_seed(5)))
    a, b = measure(batches[:3])[""], measure(batches[3:])[""]
    early = bnstats.LayerStats(a.count, 3, a.mean, a.var, a.mean_stderr, a.var_stderr)
    together = early.merge(b)
    torch.testing.assert_close(together.mean_stderr, a.merge(b).mean_stderr)
    assert together.var_stderr.isnan().all()
    assert together.spread.isnan().all()


def test_about_zero_the_error_of_a_merged_mean_square_is_the_real_one():
    class AboutZero(nn.BatchNorm1d):
        def statistics_about_zero(self):
            return True

    generator = torch.Generator().manual_seed(6)
    parts = [
        bnstats.measure_population_stats(
            AboutZero(REPETITIONS).double(), [x + 2 for x in draw(1, 30, [8, 20], generator)]
        )
        for _ in range(2)
    ]
    stats = parts[0].merge(parts[1])[""]
    assert (stats.mean_stderr == 0).all()
    assert 0.8 < ratios(stats, 0, 4 + 1.01)[1] < 1.25
