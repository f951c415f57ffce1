"""What becomes of checks and curves: verdicts, tables, JSON, pictures."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from jaxllm.parity.figures import error_figure, gradient_figure, loss_figure
from jaxllm.parity.html import html_report
from jaxllm.parity.report import AMPLIFIES, REFEREED, Terminal, rungs
from jaxllm.parity.results import Check, Curve, Report, layer_and_kind


def _gradient(parameter: str, error: float, fed: str = "packed text") -> Check:
    name = f"gradient of {parameter}, {fed}"
    return Check("backward", "fp64", name, error, 1e-12, {"parameter": parameter, "input": fed})


LAYER = "model.layers.{}.mlp.up_proj.weight"
CHECKS = (
    Check("weights", "fp64", "params, elements that differ", 0.0, 0.0),
    Check("forward", "fp64", "logits, packed text", 3e-16, 1e-12),
    *(_gradient(LAYER.format(layer), 10.0 ** -(14 + layer % 2)) for layer in range(12)),
    _gradient(LAYER.format(3), 5e-13, "rare tokens"),
    _gradient("lm_head.weight", 1e-16),
    Check("trajectory", "fp32", "parameters", 3e-3, math.inf),
)
CURVES = (
    Curve("trajectory", "fp32", "JAX, 1 device", {1: 2.0, 2: 1.0}),
    Curve("trajectory", "fp32", "DeepSpeed <0>", {1: 2.0, 2: 1.0}, "JAX, 1 device", {1: 0.0, 2: 1e-7}, {2: 3e-3}),
)


def _report(*more: Check) -> Report:
    versions = {"jax": "1", "torch": "2"}
    return Report("run", "llama", 2, versions, {"cpu": "x"}, ("a note",), (*CHECKS, *more), CURVES)


def _shown(report: Report, width: int = 120) -> str:
    written = io.StringIO()
    terminal = Terminal(Console(file=written, width=width))
    for check in report.checks:
        terminal.check(check)
    terminal.finish(report)
    return written.getvalue()


@pytest.mark.parametrize(
    ("measured", "bound", "passed"),
    [
        (0.0, 0.0, True),
        (1e-12, 1e-12, True),
        (1.1e-12, 1e-12, False),
        (math.nan, 1e-12, False),
        (math.nan, math.inf, False),
        (math.inf, math.inf, False),
        (5.0, math.inf, True),
    ],
)
def test_verdicts(measured: float, bound: float, passed: bool) -> None:
    assert Check("forward", "fp64", "x", measured, bound).passed is passed


def test_a_report_passes_when_something_was_checked_and_all_of_it_passed() -> None:
    assert _report().passed
    assert not _report(Check("forward", "fp64", "loss", math.nan, 1e-12)).passed
    assert not Report("run", "llama", 2, {}, {}).passed


def test_the_gradients_of_all_inputs_become_one_table() -> None:
    gradients = {(each.layer, each.kind): each.error for each in _report().gradients()}
    assert len(gradients) == 13
    assert gradients[3, "mlp.up_proj.weight"] == 5e-13
    assert gradients[None, "lm_head.weight"] == 1e-16
    with_nan = _report(_gradient(LAYER.format(3), math.nan), _gradient(LAYER.format(3), 1.0)).gradients()
    assert math.isnan(next(each.error for each in with_nan if each.layer == 3))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.layers.11.self_attn.q_proj.weight", (11, "self_attn.q_proj.weight")),
        ("transformer.h.0.ln_1.bias", (0, "ln_1.bias")),
        ("model.embed_tokens.weight", (None, "model.embed_tokens.weight")),
    ],
)
def test_layer_and_kind(name: str, wanted: tuple[int | None, str]) -> None:
    assert layer_and_kind(name) == wanted


def test_json_holds_no_number_that_json_cannot() -> None:
    text = json.dumps(_report(Check("forward", "fp64", "loss", math.nan, 1e-12)).to_json(), allow_nan=False)
    read = json.loads(text)
    assert (read["checks"][-1]["measured"], read["checks"][-1]["passed"]) == (None, False)
    assert read["checks"][-2]["bound"] is None
    assert read["curves"][1]["parameter_distance"] == [[2, 3e-3]]


def test_the_terminal_shows_the_worst_gradients_and_counts_the_rest() -> None:
    lines = _shown(_report()).splitlines()
    gradients = [line for line in lines if "backward    gradient" in line]
    assert len(gradients) == 8
    assert "layers.3.mlp.up_proj.weight, rare tokens" in gradients[0]
    assert any("and 6 more, at most 1.0e-15" in line for line in lines)
    assert any("parameters" in line and "none" in line for line in lines)
    assert lines[-1] == "passed: 17 checks, no bound broken"


def test_every_broken_bound_is_shown() -> None:
    broken = [_gradient(f"model.layers.{layer}.bad.weight", 1.0) for layer in range(20)]
    text = _shown(_report(*broken))
    assert len([line for line in text.splitlines() if "bad.weight" in line and "FAIL" in line]) == 20 + 1  # and in the ladder
    assert "FAILED: 20 of 37 checks broke their bound" in text
    assert "--find" in text


def test_fp64_is_shown_as_the_referee_of_a_broken_bound() -> None:
    detail = {"input": "packed text", "parameter": "a.weight"}
    broken = Check("backward", "fp32", "gradient of a.weight, packed text", 3e-5, 1e-5, detail)
    name = "referee: gradient of a.weight, packed text, JAX against itself in fp64"
    referee = Check("backward", "fp32", name, 2e-5, math.inf, {"referee": True, "input": "packed text"})
    shown = _shown(_report(broken, referee), width=400)
    assert REFEREED in shown
    assert shown.index("gradient of a.weight, packed text  ") < shown.index("referee: gradient"), "held back for too long"
    page = html_report(_report(broken, referee)).replace("&#x27;", "'")
    assert REFEREED in page
    assert page.index(name) < page.index("<h2>Every check</h2>")


def test_a_run_that_amplifies_rounding_is_explained() -> None:
    checks = (
        Check("trajectory", "fp64", "loss", 1e-3, 1e-12),
        Check("trajectory", "fp64", "control: loss", 1e-3, math.inf, {"control": True, "amplifies": True}),
    )
    assert AMPLIFIES in _shown(_report(*checks), width=400)
    assert AMPLIFIES in html_report(_report(*checks)).replace("&#x27;", "'")


def test_long_names_are_folded_and_not_cut() -> None:
    name = " ".join(f"word{number}" for number in range(40))
    text = _shown(_report(Check("switch", "fp64", name, 0.0, 1.0)), width=80)
    assert "word39" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_rungs_climb_the_ladder_and_part_what_has_no_bound() -> None:
    found = [(rung.precision, rung.level, len(rung.checks), rung.worst.bound) for rung in rungs(CHECKS)]
    assert found == [
        ("fp64", "weights", 1, 0.0),
        ("fp64", "forward", 1, 1e-12),
        ("fp64", "backward", 14, 1e-12),
        ("fp32", "trajectory", 1, math.inf),
    ]


def test_the_page_escapes_names_and_says_what_was_found() -> None:
    page = html_report(_report(Check("forward", "fp64", "a <b> & c", 1.0, 1e-12)))
    assert "a &lt;b&gt; &amp; c" in page
    assert "<b>" not in page
    assert "DeepSpeed &lt;0&gt; against JAX, 1 device" in page
    assert 'class="verdict fail">failed' in page
    assert page.count("<svg") == page.count("</svg>") == 4


def test_pictures_hold_what_they_show() -> None:
    losses = loss_figure(CURVES)
    assert "DeepSpeed &lt;0&gt;" in losses
    errors = error_figure(CURVES[1:], lambda curve: curve.loss_error, "relative difference", 1e-5)
    assert "bound 1e-05" in errors
    single = error_figure(CURVES[1:], lambda curve: curve.parameter_distance, "relative distance", math.inf)
    assert "bound" not in single
    gradients = gradient_figure(_report().gradients(), "fp64", 1e-12)
    assert "mlp.up_proj.weight" in gradients
    assert "-12.3" in gradients.replace("\N{MINUS SIGN}", "-")
    assert all("data:image" not in picture and "<script" not in picture for picture in (losses, errors, gradients))
