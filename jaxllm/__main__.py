"""`python -m jaxllm`."""

from __future__ import annotations

from jaxllm.cli.start import start

start()
