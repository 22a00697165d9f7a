"""Kernels of a few PTX instructions, for tests of the emulator."""

import torch

from tests.gpu.ptx.emulator import execute

LANES = 32
REGISTER = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}  # prefix by bytes


def kernel(body, *, parameters=1, threads=LANES):
    """A kernel with its first parameters in %rd90 and up, and %tid.x in %r90."""
    names = [f"kernel_param_{i}" for i in range(parameters)]
    head = ",\n".join(f"\t.param .u64 .ptr .global .align 1 {name}" for name in names)
    loads = "\n".join(f"\tld.param.b64 \t%rd{90 + i}, [{n}];" for i, n in enumerate(names))
    return f"""
.version 8.7
.target sm_80
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
{head}
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<99>;
	.reg .b32 	%r<99>;
	.reg .b64 	%rd<99>;
{loads}
	mov.u32 	%r90, %tid.x;
{body}
}}
"""


def _address(number, size, result):
    """Pointer of element %tid.x of parameter `number`."""
    return f"mad.wide.u32 %rd{result}, %r90, {size}, %rd{90 + number};\n"


def lanes(code, *inputs, dtype):
    """One thread per element: `code` makes {d} of {a}, {b} and {c}."""
    tensors = [torch.empty(LANES, dtype=dtype), *inputs]
    names, body = {}, ""
    for i, tensor in enumerate(tensors):
        size = tensor.element_size()
        names["dabc"[i]] = f"{REGISTER[size]}{80 + i}"
        body += _address(i, size, 70 + i)
        if i:
            body += f"ld.global.b{8 * size} {names['dabc'[i]]}, [%rd{70 + i}];\n"
    size = tensors[0].element_size()
    body += code.format(**names) + f"\nst.global.b{8 * size} [%rd70], {names['d']};\nret;"
    execute(kernel(body, parameters=len(tensors)), tensors, (1,))
    return tensors[0]


def per_lane(*values, dtype=torch.int32):
    """One value for each lane; those given, again and again."""
    return torch.tensor(values, dtype=dtype).repeat(LANES)[:LANES]
