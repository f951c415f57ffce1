"""Small programs in the TPU compiler's notation, read at made-up costs."""

import textwrap

from jaxllm.planning.tpu.hlo import parse
from jaxllm.planning.tpu.program import read_program

MESH = {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}


class FlatCosts:
    """1000 cycles for everything the compiler does not estimate."""

    def kernel(self, _op_name, _operands):
        return 1000.0, 5.0

    def collective(self, _kind, _members, size):
        return 1000.0, size

    def transfer(self, _size):
        return 1000.0


def cycles(count):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


def program_of(entry, others="", head=""):
    text = f"HloModule jit_step\n{head}\n{textwrap.dedent(others)}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{entry}\n}}\n"
    return read_program(parse(text), MESH, FlatCosts())
