"""The output folder of a run: lines of metrics, samples, evaluations and events."""
