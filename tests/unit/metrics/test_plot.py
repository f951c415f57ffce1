from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import jaxllm
from jaxllm.metrics.plot import plot_losses, smooth

BLUE, RED, GREY = (0x1F, 0x6F, 0xB4), (0xD1, 0x49, 0x5B), (0x8A, 0x90, 0x99)


def metrics(folder: Path, steps: int, validate: int | None = None, broken: int | None = None) -> Path:
    path = folder / "metrics.jsonl"
    lines = []
    for step in range(1, steps + 1):
        loss = None if step == broken else 8.0 - 4.0 * step / steps
        lines.append({"step": step, "split": "train", "loss": loss, "learning_rate": 1e-3})
        if validate and step % validate == 0:
            lines.append({"step": step, "split": "validation", "loss": 8.2 - 4.0 * step / steps})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def pixels(picture: Path, color: tuple[int, int, int]) -> int:
    """Pixels close to a colour."""
    image = matplotlib.image.imread(picture)[..., :3] * 255
    return int((np.abs(image - np.array(color)).max(axis=-1) < 16).sum())


def test_picture_has_both_losses_and_the_line_to_compare_with(tmp_path: Path) -> None:
    picture = tmp_path / "loss.png"
    assert plot_losses(metrics(tmp_path, 300, validate=50), picture, unigram_entropy=6.5)
    height, width = matplotlib.image.imread(picture).shape[:2]
    assert (width, height) == (1200, 750)
    assert pixels(picture, BLUE) > 2000
    assert pixels(picture, RED) > 1000
    assert pixels(picture, GREY) > 500
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_what_is_not_there_is_not_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "loss.png"
    assert plot_losses(metrics(tmp_path, 300), picture)
    assert pixels(picture, BLUE) > 2000
    assert pixels(picture, RED) == 0


@pytest.mark.parametrize("steps", [1, 2, 20, 5000])
def test_runs_of_any_length_with_a_broken_step(tmp_path: Path, steps: int) -> None:
    assert plot_losses(metrics(tmp_path, steps, validate=1 if steps < 100 else 500, broken=1), tmp_path / "loss.png", 5.0)


def test_only_validation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 3, "split": "validation", "loss": 3.0}) + "\n")
    assert plot_losses(path, tmp_path / "loss.png", title="evaluated")


def test_nothing_to_draw_writes_nothing(tmp_path: Path) -> None:
    assert not plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "spl')
    assert not plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_keeps_constants_and_lines_and_lessens_noise() -> None:
    assert smooth(np.full(50, 2.5), 3.0) == pytest.approx(np.full(50, 2.5), rel=1e-14)
    line = np.linspace(8.0, 2.0, 400)
    assert smooth(line, 4.0)[20:-20] == pytest.approx(line[20:-20], rel=1e-12)
    noise = np.random.default_rng(0).normal(size=4000)
    # The variance of a Gaussian-weighted mean of white noise is 1 / (2 sqrt(pi) width) of the noise's.
    assert smooth(noise, 10.0).var() == pytest.approx(1 / (2 * math.sqrt(math.pi) * 10.0), rel=0.15)


def test_plotting_needs_no_display_and_leaves_no_global_state(tmp_path: Path) -> None:
    path = metrics(tmp_path, 30)
    script = (
        "import sys; from pathlib import Path; from jaxllm.metrics.plot import plot_losses\n"
        "print(plot_losses(Path(sys.argv[1]), Path(sys.argv[2])), 'matplotlib.pyplot' in sys.modules)"
    )
    root = Path(jaxllm.__file__).parent.parent
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "loss.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "True False"
