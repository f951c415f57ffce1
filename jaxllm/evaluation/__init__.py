"""How good a model's outputs are: the measures of each task, by the libraries that everybody compares with."""

from jaxllm.evaluation.evaluate import Evaluated, evaluate
from jaxllm.evaluation.labels import Measures, measure_labels

__all__ = ["Evaluated", "Measures", "evaluate", "measure_labels"]
