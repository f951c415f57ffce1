"""How many tokens a model wants, and which model a budget pays for: the Chinchilla laws.

Hoffmann et al., "Training Compute-Optimal Large Language Models" (arXiv:2203.15556), approach 3: the loss of N parameters
after D tokens is

    L(N, D) = E + A / N^alpha + B / D^beta

and at a fixed number of FLOPs C = 6 N D it is lowest for N = G (C / 6)^(beta / (alpha + beta)) with
G = (alpha A / (beta B))^(1 / (alpha + beta)).  The constants of the paper contradict its other two approaches and its own
advice of about 20 tokens for each parameter; Besiroglu et al., "Chinchilla Scaling: A replication attempt" (arXiv:2404.10102)
fitted them again to the paper's data, and theirs are the ones below.

The laws are of one data set, tokenizer and family of models: the loss is a guide and the ratio a rule of thumb.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "arXiv:2203.15556, approach 3, constants of arXiv:2404.10102"

_E, _A, _B, _ALPHA, _BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658


@dataclass(frozen=True)
class Optimum:
    """What a number of FLOPs is best spent on."""

    parameters: float
    tokens: float


def loss(parameters: float, tokens: float) -> float:
    """Nats per token that the law expects."""
    return float(_E + _A / parameters**_ALPHA + _B / tokens**_BETA)


def optimum(flops: float) -> Optimum:
    """The best model and number of tokens for C = 6 N D FLOPs."""
    ratio = (_ALPHA * _A / (_BETA * _B)) ** (1 / (_ALPHA + _BETA))
    parameters = ratio * (flops / 6) ** (_BETA / (_ALPHA + _BETA))
    return Optimum(parameters, flops / 6 / parameters)


def optimal_tokens(parameters: float) -> float:
    """Tokens at which a model of this size is the best use of the FLOPs it has taken."""
    ratio = (_ALPHA * _A / (_BETA * _B)) ** (1 / (_ALPHA + _BETA))
    product = (parameters / ratio) ** ((_ALPHA + _BETA) / _BETA)
    return float(product / parameters)


def equivalent(parameters: float, tokens: float) -> float:
    """Parameters of the compute-optimal model, with its own number of tokens, that would reach the same loss."""
    wanted = loss(parameters, tokens)
    low, high = 1e5, 1e14
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if loss(middle, optimal_tokens(middle)) > wanted else (low, middle)
    return low


def meaning(parameters: float, tokens: float) -> str:
    """One sentence on a run's ratio of tokens to parameters."""
    best = optimal_tokens(parameters)
    share = tokens / best
    if share < 0.8:
        return (
            f"under-trained: {1 / share:.1f} times as many tokens would be compute-optimal; a smaller model would do better "
            "with the same FLOPs"
        )
    if share <= 1.25:
        return "compute-optimal: no other size does better with the same FLOPs"
    return (
        f"over-trained {share:.1f} times: more FLOPs than this loss needs, for a model that is smaller and cheaper to run than "
        "the compute-optimal one"
    )
