"""Intervals hold what they say; convergence and area by hand."""

import math
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest

from harness import measures, report

DISTRIBUTIONS = {  # name: (samples of a shape, their median, positive)
    "normal": (lambda rng, shape: rng.normal(size=shape), 0, False),
    "log-normal": (lambda rng, shape: np.exp(0.5 * rng.normal(size=shape)), 1, True),
    "exponential": (lambda rng, shape: rng.exponential(size=shape), math.log(2), True),
    "heavy tails": (lambda rng, shape: rng.standard_t(3, size=shape), 0, False),
    "a third never": (lambda rng, shape: never(rng.uniform(size=shape)), 0.5, True),
}


def never(x):
    """Uniform on (0, 1), infinite above 2/3: the median is 1/2."""
    return np.where(x > 2 / 3, math.inf, x)


# The exact coverage of 5 values is 1 - 2 / 2⁵ = 0.9375, and the others' is 0.948 or more. The Monte Carlo error of
# 40,000 samples is √(0.94 · 0.06 / 40,000) = 0.0012, so 0.93, the least we want, needs no tolerance.
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("n", [3, 5, 10])
def test_an_interval_holds_the_median_at_least_93_times_in_100(n, name):
    draw, median, positive = DISTRIBUTIONS[name]
    _, low, high = measures.median_interval(draw(np.random.default_rng(n), (n, 40_000)), positive)
    assert 0.93 <= np.mean((low <= median) & (median <= high)) <= 0.975


def coverage_of_clusters(n, share, median):
    """How often the interval of n values holds their median: a share of them around 0, the others around 3,
    with σ 0.2."""
    rng = np.random.default_rng(n)
    values = 0.2 * rng.normal(size=(n, 40_000)) + 3 * (rng.random((n, 40_000)) > share)
    _, low, high = measures.median_interval(values)
    return np.mean((low <= median) & (median <= high))


def test_the_range_of_5_values_needs_no_assumption_and_other_intervals_do():
    """40% around 0: below the median is the lower cluster, and of the upper one what lies below it, 1/6:
    3 + 0.2 Φ⁻¹(1/6). Half around 0: the median is the middle of the gap. Of 3 values, all are in one cluster in
    2/2³ of the cases, and of 4 in 2/2⁴. Of 7, two or fewer are in one cluster in 2 (1 + 7)/2⁷ of the cases, of
    10 in 2 (1 + 10 + 45)/2¹⁰: an end between the ranks d and d + 1 lies then above the gap's middle if it is
    nearer to d + 1."""
    median = 3 + 0.2 * NormalDist().inv_cdf(1 / 6)
    exact = 1 - 2 / 2**5
    for share, middle in ((0.4, median), (0.5, 1.5)):
        assert coverage_of_clusters(5, share, middle) == pytest.approx(exact, abs=0.005)
    assert coverage_of_clusters(3, 0.4, median) == pytest.approx(0.90, abs=0.005)
    for n, coverage in ((3, 1 - 2 / 2**3), (4, 1 - 2 / 2**4), (7, 1 - 16 / 2**7), (10, 1 - 112 / 2**10)):
        assert coverage_of_clusters(n, 0.5, 1.5) == pytest.approx(coverage, abs=0.007)  # 4 Monte Carlo errors


@pytest.mark.parametrize("n", measures.WIDENED)
def test_the_widened_range_of_normal_values_lies_above_their_median_once_in_40(n):
    """P(lowest > c · (highest - lowest)) = n ∫ φ(x) [Φ(x + x/c) - Φ(x)]ⁿ⁻¹ dx over the lowest value x > 0."""
    phi = np.vectorize(NormalDist().cdf)
    x = np.linspace(0, 8, 4001)
    others = (phi(x + x / measures.WIDENED[n]) - phi(x)) ** (n - 1)
    density = n * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * others
    assert (density[1:] + density[:-1]).sum() / 2 * x[1] == pytest.approx(0.025, abs=1e-5)


def test_intervals_of_the_median_by_hand():
    assert measures.median_interval([5, 1, 4, 2, 3]) == (3, 1, 5)  # the range, 1 - 2/2⁵
    assert measures.median_interval([5, 1, 4, math.nan, 2, 3]) == (3, 1, 5)
    # Two values: Student's t, 0 ± 12.706 s/√2 with s = √2, which is how WIDENED is rounded: to 0.01%.
    np.testing.assert_allclose(measures.median_interval([-1, 1]), (0, -12.706, 12.706), rtol=1e-4)
    # and on the log the mean of log 1 and log e², so 1 ± the same
    ends = np.log(measures.median_interval([1, math.e**2], positive=True)[1:])
    np.testing.assert_allclose(ends, (1 - 12.706, 1 + 12.706), rtol=1e-4)
    # Ten: (x₍₂₎, x₍₉₎) holds 1 - 2·11/1024 = 0.9785, (x₍₃₎, x₍₈₎) 1 - 2·56/1024 = 0.8906. I = (0.9785 - 0.95) /
    # (0.9785 - 0.8906) = 0.3244; λ = 8 I / (2 + 6 I) = 0.6577.
    np.testing.assert_allclose(measures.median_interval(range(1, 11)), (5.5, 2.6577, 8.3423), atol=1e-4)
    columns = np.stack([np.arange(10), 7 * np.arange(10)], 1)
    both = [measures.median_interval(column) for column in columns.T]
    np.testing.assert_allclose(measures.median_interval(columns), np.transpose(both))


def test_equal_values_give_a_point_and_one_has_no_interval():
    for n in (2, 3, 4, 5, 6, 10):
        for value in (3, math.inf):
            assert measures.median_interval([value] * n, positive=True) == pytest.approx((value,) * 3)
    assert measures.median_interval([7])[0] == 7 and np.isnan(measures.median_interval([7])[1:]).all()
    assert np.isnan(measures.median_interval([math.nan])).all()
    assert report.with_interval([61, math.nan]) == "61" and report.with_interval([math.nan]) == "–"


def test_runs_that_never_converge_count_as_infinite():
    inf = math.inf
    assert measures.median_interval([1, 2, 3, 4, inf], positive=True) == (3, 1, inf)
    assert measures.median_interval([1, 2, inf, inf, inf], positive=True) == (inf, 1, inf)
    assert measures.median_interval([1, 2, inf], positive=True) == (2, 0, inf)  # three such runs say nothing
    # ten runs: no interpolation where an end is infinite; the second and the ninth
    assert measures.median_interval([1, 2, *[inf] * 8], positive=True) == (inf, 2, inf)
    assert measures.median_interval([*[1] * 8, inf, inf], positive=True) == (1, 1, inf)
    assert report.with_interval([60, 70, 80, 90, inf], positive=True) == "80 [60, never]"
    assert report.with_interval([inf]) == "inf"  # a return


def test_ratios_are_paired_by_seed():
    theirs, ours = {1: 2, 2: 6, 3: 12, 4: 20, 5: 30, 6: 1}, {5: 5, 4: 4, 3: 3, 2: 2, 1: 1, 7: 9}
    np.testing.assert_allclose(measures.ratio_interval(theirs, ours), (4, 2, 6))  # 2, 3, 4, 5 and 6: their range
    assert report.speed_up(theirs, ours) == "4× [2, 6]"
    assert report.speed_up({1: 3}, {1: 2}) == "1.5×" and report.speed_up({1: 3}, {2: 2}) == "–"
    assert report.speed_up({1: math.nan, 2: 4}, {1: 1, 2: 2}) == "2×"


def test_ratios_of_runs_that_never_converge():
    never, ours = math.inf, dict.fromkeys(range(5), 1.0)
    theirs = {0: 2, 1: 2, 2: 3, 3: 3, 4: never}
    assert report.speed_up(theirs, ours) == "3× [2, ∞]"
    assert report.speed_up(ours, theirs) == "0.333× [0, 0.5]"
    both = ours | {4: never}  # that of 4 can be anything from 0 to infinity, and the median anything from 2 to 3
    assert report.speed_up({0: 2, 1: 2, 2: 3, 3: 3, 4: never}, both) == "– [0, ∞]"
    assert report.speed_up({0: 2, 1: 3, 2: 3, 3: 3, 4: never}, both) == "3× [0, ∞]"
    assert report.speed_up({0: never}, {0: never}) == "–"


def test_the_probability_of_improvement_by_hand():
    """Of four pairs (1 or 3 against 2 or 3): 1 < 2, 1 < 3, 3 > 2, and a tie, which counts half: 2.5 / 4.

    If all pairs of 5 and 5 runs agree, the low end P has 25 (1 - P) = 1.96² P [1 + 4 ((1 - P)/(2 - P) + P/(1 + P))]:
    at 0.6427 that is 8.932 = 3.8416 · 0.6427 · [1 + 4 (0.2633 + 0.3912)] = 8.933."""
    p, low, high = measures.probability_interval([1, 3], [2, 3])
    assert p == 0.625 and low < 0.5 < high
    np.testing.assert_allclose(measures.probability_interval([1] * 5, [math.inf] * 5), (1, 0.6427, 1), atol=1e-4)
    np.testing.assert_allclose(measures.probability_interval([2] * 5, [1] * 5), (0, 0, 1 - 0.6427), atol=1e-4)
    assert measures.probability_interval([math.inf] * 3, [math.inf] * 2)[0] == 0.5
    assert report.improvement([1] * 5, [2] * 5) == "1.00 [0.64, 1.00]"
    assert report.improvement([1], [2, 3]) == report.improvement([1, 2], [3]) == "–"


def pairs_won(n, wins):
    """n runs and n others, such that the first need less in `wins` of the n² pairs."""
    full, rest = divmod(wins, n)
    return range(n), [n] * full + ([rest - 0.5] + [-1] * (n - full - 1) if full < n else [])


# 0.93 less 4 Monte Carlo errors of 20,000 samples, √(0.93 · 0.07 / 20,000) = 0.0018; at 3 it is 0.90 where P = 1/2.
@pytest.mark.parametrize("n, least", [(3, 0.89), (5, 0.93 - 0.0072), (10, 0.93 - 0.0072)])
def test_the_interval_of_a_probability_of_improvement_holds_it(n, least):
    rng = np.random.default_rng(n)
    low, high = np.array([measures.probability_interval(*pairs_won(n, wins))[1:] for wins in range(n * n + 1)]).T
    shifts = np.sort(np.subtract(*rng.standard_t(3, size=(2, 400_000))))  # its quantiles are t's shifts
    for p in (0.5, 0.8, 0.95):
        others = {
            "normal": lambda x, p=p: x + math.sqrt(2) * NormalDist().inv_cdf(p),
            "exponential": lambda x, p=p: x * p / (1 - p),
            "heavy tails": lambda x, p=p: x + shifts[int(p * len(shifts))],
        }
        for name, moved in others.items():
            ours, theirs = (DISTRIBUTIONS[name][0](rng, (20_000, n)) for _ in range(2))
            wins = (ours[:, :, None] < moved(theirs)[:, None, :]).sum((1, 2))
            assert np.mean((low[wins] <= p + 1e-9) & (p - 1e-9 <= high[wins])) >= least, (name, p)


def test_ema_by_hand():
    np.testing.assert_allclose(measures.ema([10, 20, 0]), [10, 11, 9.9])
    assert measures.smoothed(math.nan, 10) == 10


def logged(returns, env_steps=None, failed=False):
    epochs = np.arange(1.0, len(returns) + 1)
    log = {"epoch": epochs, "env_steps": 100 * epochs if env_steps is None else np.array(env_steps, dtype=float)}
    return SimpleNamespace(failed=failed, log=log | {"return_post": np.array(returns, dtype=float)})


def test_first_passage_and_sustained_by_hand():
    """Over 9 in epochs 1 to 5 (10), under it in 6 to 105 (0), over it again in 106 to 305 (10).

    The smoothed return starts at 10: the first passage is epoch 1. A mean of 100 epochs is 10 n/100 with n of
    them good. From epoch t in 6 .. 105 on n = t - 6; the first mean over 9, with n = 91, is that from epoch 97
    on, and all later ones are over it too. The mean over 10 never is: 10 is not over 10."""
    run = logged([10] * 5 + [0] * 100 + [10] * 200)
    assert measures.spent(run, "convergence", "epoch", [9]) == [1]
    assert measures.spent(run, "sustained", "epoch", [9, 8.9, 0, 10]).tolist() == [97, 96, 7, math.inf]
    assert measures.spent(run, "sustained", "env_steps", [9]) == [9700]


def test_a_run_is_not_sustained_before_it_has_converged():
    """0 to epoch 150, then 10: the smoothed return is 0.1 · 10 = 1 at epoch 151. A mean of 100 epochs that holds 10
    of the later ones is 1 too, and the one from epoch 61 on does."""
    run = logged([0] * 150 + [10] * 100)
    for criterion in measures.CRITERIA:
        assert measures.spent(run, criterion, "epoch", [0.9]) == [151]


def test_what_does_not_stay_over_the_threshold_until_the_end_is_not_sustained():
    """One epoch at 0 of 100 makes the last mean 9.9."""
    run = logged([10] * 299 + [0])
    assert measures.spent(run, "sustained", "epoch", [9.8, 9.95]).tolist() == [1, math.inf]
    assert measures.spent(run, "convergence", "epoch", [9.95]) == [1]


def test_of_fewer_than_100_epochs_and_of_failed_runs_none_is_sustained():
    assert measures.spent(logged([10] * 99), "sustained", "epoch", [9]) == [math.inf]
    assert measures.spent(logged([10] * 100), "sustained", "epoch", [9]) == [1]
    for criterion in measures.CRITERIA:
        assert measures.spent(logged([10] * 100, failed=True), criterion, "epoch", [9]) == [math.inf]
    assert measures.spent(logged([math.nan] * 20), "convergence", "epoch", [9]) == [math.inf]


def test_the_area_is_the_mean_return_over_equal_env_steps():
    """100 steps at 1, 300 at 2 and of the last 600, at 4, 100: (100 + 600 + 400) / 500 = 2.2."""
    assert measures.area(logged([1, 2, 4], [100, 400, 1000]), 500) == pytest.approx(2.2)
    for failed in (True, False):  # one that ended before keeps its last return
        assert measures.area(logged([1, 2], [100, 400], failed=failed), 500) == pytest.approx((100 + 800) / 500)
    runs = [logged([1, 2], [100, 400]), logged([1, 2], [150, 350]), logged([1], [50], failed=True)]
    assert measures.equal_env_steps({"a": runs[:1], "b": runs[1:]}) == 350
    assert measures.equal_env_steps({"a": runs[2:]}) == 50
