"""Bounds of the metrics of a healthy run. Health warns of them, and reports draw them."""

FIRST = 5  # steps whose mean is where a metric begins

LOWEST = {"explained_variance": 0.0, "reward_std": 0.0, "finished_fraction": 0.0}
HIGHEST = {"kl_sequence": 50.0, "clip_fraction": 0.3}
# The lowest as a share of the mean of the first steps.
LEAST_SHARE = {"entropy": 0.1, "response_length": 0.1}
# The step from which on a metric is looked at, where it is not the first.
FROM_STEP = {"explained_variance": 50, "entropy": 4 * FIRST, "response_length": 4 * FIRST}
