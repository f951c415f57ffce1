"""`python -m jaxllm`."""

from __future__ import annotations

from jaxllm.cli.main import main

main()
